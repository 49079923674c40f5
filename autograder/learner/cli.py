"""A learner's commands. 0: all well; 1: something needs the learner's hand; 2: wrong usage."""

import os
import shlex
from typing import Annotated

import typer

from autograder.text import print_anything

app = typer.Typer(
    help="A learner's commands: open the lessons, see how far you are, hand in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

LessonOption = Annotated[str | None, typer.Option(help="Only this lesson: its number (09) or its name.")]
StageOption = Annotated[str | None, typer.Option(help="Only this stage: its number (2) or its folder.")]


@app.callback()
def prepare() -> None:
    """A learner's commands: open the lessons, see how far you are, hand in."""
    print_anything()


@app.command()
def lab(
    lesson: LessonOption = None,
    arguments: Annotated[str, typer.Option("--args", help="More options for JupyterLab, in one text.")] = "",
) -> None:
    """Lay copies of the lessons in work/, bring them up to date, and open them in JupyterLab."""
    from autograder.learner.lab import open_lab

    try:
        options = shlex.split(arguments, posix=os.name == "posix")  # on Windows a \ stands in paths
    except ValueError as error:
        raise typer.BadParameter(f"{arguments!r}: {error}", param_hint="--args") from None
    raise typer.Exit(open_lab(lesson, options))


@app.command()
def check(
    lesson: LessonOption = None,
    stage: StageOption = None,
    project: Annotated[
        str | None, typer.Option(help="Instead, the acceptance test of your project of this number.")
    ] = None,
) -> None:
    """Run the checks of your notebooks, and say how far you are."""
    if project:
        from autograder.learner.projects import check_project

        raise typer.Exit(check_project(project))
    from autograder.learner.check import check_work

    raise typer.Exit(check_work(lesson, stage))


@app.command()
def submit(
    student: Annotated[str, typer.Option(help="Your login, or whatever your course calls you by.")],
    stage: StageOption = None,
) -> None:
    """Write one zip archive of your notebooks, to hand in."""
    from autograder.learner.submit import submit_work

    raise typer.Exit(submit_work(student, stage))
