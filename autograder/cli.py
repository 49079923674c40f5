"""The commands. Each one parses, calls its room and prints; heavy imports happen inside it, so --help is quick.

What the rooms provide (all paths are `Path`s, all options may be left out):

    build.build_course(lesson, stage, check) -> int
    run.run_course(lesson, stage, profile, jobs, notebooks, timeout, strict_budgets) -> int
    grading.grade.grade_class(submitted, out, lesson, student, jobs, …) -> int
    release.make_release(out) -> int

Each returns the exit code: 0 all well, 1 the course is at fault, 2 wrong usage, 3 (grade only) something of
ours failed.
"""

from pathlib import Path
from typing import Annotated

import typer

from autograder.kernels.limits import MB, Limits

app = typer.Typer(
    help="Builds, runs and grades the course.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Lesson = Annotated[str | None, typer.Option(help="Only this lesson: its number (09) or its name.")]
Stage = Annotated[str | None, typer.Option(help="Only this stage: its number (2) or its folder.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes at once; by default one per core.")]


def in_mb(name: str) -> int:
    """A limit's default as the command line states it."""
    return getattr(Limits, name) // MB


@app.command()
def course(
    lesson: Lesson = None,
    stage: Stage = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if course/ is stale.")] = False,
) -> None:
    """Rebuild course/ from solutions/."""
    from autograder.build import build_course

    raise typer.Exit(build_course(lesson=lesson, stage=stage, check=check))


@app.command()
def run(
    lesson: Lesson = None,
    stage: Stage = None,
    profile: Annotated[str, typer.Option(help="cpu, gpu, or auto: a GPU where there is one.")] = "auto",
    jobs: Jobs = None,
    notebooks: Annotated[
        Path | None,
        typer.Option(help="A folder of built notebooks (source/ and course/) to use instead of solutions/."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one cell may take.")] = 120,
    strict_budgets: Annotated[
        bool, typer.Option("--strict-budgets", help="A lesson over its budget of time or memory is a failure.")
    ] = False,
) -> None:
    """Execute every lesson, and prove that the stubs fail."""
    from autograder.run import run_course

    raise typer.Exit(
        run_course(
            lesson=lesson,
            stage=stage,
            profile=profile,
            jobs=jobs,
            notebooks=notebooks,
            timeout=timeout,
            strict_budgets=strict_budgets,
        )
    )


@app.command()
def grade(
    submitted: Annotated[
        Path | None,
        typer.Option(help="SUBMITTED/<student>/<stage>/<lesson>.ipynb; by default the sample class."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the gradebook, tables and feedback go; by default grades/.")
    ] = None,
    lesson: Lesson = None,
    student: Annotated[str | None, typer.Option(help="Only this student.")] = None,
    jobs: Jobs = None,
    scheduler: Annotated[
        str | None, typer.Option(help="The address of a Dask scheduler, tcp://host:8786, whose workers grade.")
    ] = None,
    db: Annotated[
        str | None,
        typer.Option(help="The gradebook: postgresql+psycopg://user@host/name; by default OUT/gradebook.db."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Grade what has not changed too, instead of keeping its result.")
    ] = False,
    late: Annotated[
        Path | None, typer.Option(help="An nbgrader configuration that says what handing in late costs.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="List the answers that resemble each other in the report.")
    ] = False,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Without a sandbox: learners' code can do whatever you can.")
    ] = False,
    cell_seconds: Annotated[float, typer.Option(min=1, help="Time that one cell may take.")] = Limits.cell,
    notebook_seconds: Annotated[float, typer.Option(min=1, help="Time that a notebook may take.")] = Limits.notebook,
    memory: Annotated[int, typer.Option(min=1200, help="MB of memory for each process of a kernel.")] = in_mb("memory"),
    processes: Annotated[int, typer.Option(min=16, help="Processes and threads of a kernel.")] = Limits.processes,
    file_size: Annotated[int, typer.Option(min=1, help="MB that a file may have.")] = in_mb("file"),
    folder_size: Annotated[int, typer.Option(min=1, help="MB that all files of a kernel may have.")] = in_mb("folder"),
) -> None:
    """Grade a class."""
    from autograder.grading.grade import grade_class

    limits = Limits(
        cell=cell_seconds, notebook=notebook_seconds, memory=memory * MB, processes=processes, file=file_size * MB,
        folder=folder_size * MB,
    )  # fmt: skip
    raise typer.Exit(
        grade_class(
            submitted=submitted, out=out, lesson=lesson, student=student, jobs=jobs, scheduler=scheduler, db=db,
            again=again, late=late, compare=compare, limits=limits, unsafe=unsafe,
        )
    )


@app.command()
def release(
    out: Annotated[Path, typer.Option(help="The folder for the archives.")] = Path("dist"),
) -> None:
    """Make the archives: one for learners, one for instructors."""
    from autograder.release import make_release

    raise typer.Exit(make_release(out=out))
