"""The commands: each parses its options and calls one function, which returns the exit code.

0: all well; 1: the course is at fault; 2: wrong usage; 3 (grade only): the grader or its machine failed. Heavy imports
happen inside a command, so that --help is quick.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from autograder.kernels.limits import MB, Limits
from autograder.learner import cli as learner
from autograder.logs import show_logs
from autograder.text import print_anything

app = typer.Typer(
    help="Builds, runs and grades the course.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@contextmanager
def for_good() -> Iterator[None]:
    """Imports inside are never garbage: the collector, which would take 0.4 s of a call for them, leaves them out."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


LessonOption = Annotated[str | None, typer.Option(help="Only this lesson: its number (09) or its name.")]
StageOption = Annotated[str | None, typer.Option(help="Only this stage: its number (2) or its folder.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Log every step on standard error.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Processes at once; by default one per core (run on a GPU: one).")
]


def expand(path: Path | None) -> Path | None:
    """`~/class` as the shell would have it, which quotes in a Makefile keep it from seeing."""
    return path.expanduser() if path else None


@app.callback()
def prepare() -> None:
    """Builds, runs and grades the course."""
    print_anything()


def as_mb(name: str) -> int:
    """A limit's default as the command line states it."""
    return getattr(Limits, name) // MB


@app.command()
def course(
    lesson: LessonOption = None,
    stage: StageOption = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if course/ is stale.")] = False,
    verbose: Verbose = False,
) -> None:
    """Rebuild course/ from solutions/."""
    from autograder.build import build_course

    show_logs(verbose)
    raise typer.Exit(build_course(lesson=lesson, stage=stage, check=check))


@app.command()
def run(
    lesson: LessonOption = None,
    stage: StageOption = None,
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
    verbose: Verbose = False,
) -> None:
    """Execute every lesson, and prove that the stubs fail."""
    from autograder.run import run_course

    show_logs(verbose)
    raise typer.Exit(
        run_course(
            lesson=lesson,
            stage=stage,
            profile=profile,
            jobs=jobs,
            notebooks=expand(notebooks),
            timeout=timeout,
            strict_budgets=strict_budgets,
        )
    )


@app.command()
def grade(
    submitted: Annotated[
        Path | None,
        typer.Option(
            help="A folder or zip archive: <student>/<stage>/<lesson>.ipynb, zips of `make submit`, downloads of "
            "Moodle and Canvas, nbgrader's exchange; by default the sample class."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the gradebook, tables and feedback go; by default grades/ (build/sample_class of the sample)."
        ),
    ] = None,
    lesson: LessonOption = None,
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
    verbose: Annotated[
        bool, typer.Option("--verbose", help="A line for every step of every notebook, on standard error.")
    ] = False,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Without a sandbox: learners' code can do whatever you can.")
    ] = False,
    cell_seconds: Annotated[float, typer.Option(min=1, help="Time that one cell may take.")] = Limits.cell,
    notebook_seconds: Annotated[float, typer.Option(min=1, help="Time that a notebook may take.")] = Limits.notebook,
    memory: Annotated[
        int, typer.Option(min=1200, help="MB of memory for each process of a kernel, and for all together.")
    ] = as_mb("memory"),
    processes: Annotated[int, typer.Option(min=16, help="Processes and threads of a kernel.")] = Limits.processes,
    file_size: Annotated[int, typer.Option(min=1, help="MB that a file may have.")] = as_mb("file"),
    folder_size: Annotated[int, typer.Option(min=1, help="MB that all files of a kernel may have.")] = as_mb("folder"),
) -> None:
    """Grade a class."""
    limits = Limits(
        cell=cell_seconds,
        notebook=notebook_seconds,
        memory=memory * MB,
        processes=processes,
        file=file_size * MB,
        folder=folder_size * MB,
    )
    if not scheduler:
        from autograder.kernels.forking import start_early

        start_early(limits, sandbox=not unsafe)  # its imports take as long as those here
    with for_good():
        from autograder.grading.grade import grade_class

    raise typer.Exit(
        grade_class(
            submitted=expand(submitted),
            out=expand(out),
            lesson=lesson,
            student=student,
            jobs=jobs,
            scheduler=scheduler,
            db=db,
            again=again,
            late=expand(late),
            compare=compare,
            limits=limits,
            unsafe=unsafe,
            verbose=verbose,
        )
    )


@app.command()
def release(
    out: Annotated[Path, typer.Option(help="The folder for the archives.")] = Path("dist"),
) -> None:
    """Make the archives: one for learners, one for instructors."""
    from autograder.release import make_release

    raise typer.Exit(make_release(out=out.expanduser()))


for command in (learner.lab, learner.check, learner.submit):
    app.command()(command)
