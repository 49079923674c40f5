"""`make check PROJECT=1`: the acceptance test of one of the learner's projects, in work/projects/."""

import sys
from pathlib import Path
from textwrap import indent

from autograder.layout import ROOT
from autograder.learner.work import Work
from llm40.projects import PROJECTS, Project, accept


def check_project(which: str, root: Path = ROOT) -> int:
    """Runs a project's acceptance test; 0: accepted, 1: not, or not begun, 2: there is no such project.

    The code is the learner's own on their own machine: no sandbox.
    """
    project = _find(which)
    if project is None:
        names = "".join(f"\n  {project.number}  {project.title}" for project in PROJECTS)
        print(f"no project is called {which!r}; the projects are:{names}", file=sys.stderr)
        return 2
    path = Work(root).folder / "projects" / project.file
    if not path.is_file():
        lessons = ", ".join(f"lesson {number:02}" for number in project.lessons)
        print(f"{project.number} {project.title} · starts from {lessons}\n")
        print(
            "What its test asks:\n" + indent("\n".join(step.__doc__.split("\n")[0] for step in project.steps), "  - ")
        )
        print(f"\nWrite work/projects/{project.file}, which defines:\n\n{indent(project.provides, '    ')}")
        return 1
    return 0 if accept(project, path) else 1


def _find(which: str) -> Project | None:
    """The project of this number, name or file."""
    asked = which.strip().removesuffix(".py").lstrip("0")
    return next((p for p in PROJECTS if asked in (str(p.number), p.name, f"{p.number}_{p.name}")), None)
