"""The lessons that can be graded, each with its hidden tests and without its answers."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from autograder.grading.rebuild import read_name, read_role, remove_answers
from autograder.judge.sources import find_bound_names, find_definitions
from autograder.lesson import python_of


@dataclass
class MasterLesson:
    """A lesson that can be graded: its cells with hidden tests and without answers."""

    stage: str
    name: str
    title: str
    master: NotebookNode

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.name}"

    @property
    def number(self) -> str:
        return self.name.split("_")[0]

    @cached_property
    def ids(self) -> frozenset[str]:
        """The names of its cells, of which most stand in no other lesson."""
        return frozenset(read_name(cell) for cell in self.master.cells)

    @cached_property
    def paths(self) -> dict[str, str]:
        """Exercise (or written answer) → `core` or `more`."""
        marked = [cell for cell in self.master.cells if read_role(cell) in ("exercise", "answer")]
        return {read_name(cell): cell.metadata.get("llm40", {}).get("path", "core") for cell in marked}


def read_masters(source: Path) -> list[MasterLesson]:
    """The lessons built in a folder like build/source."""
    lessons = []
    for path in sorted(source.glob("*/*.ipynb")):
        master = nbformat.read(path, as_version=4)
        title = master.metadata.get("llm40", {}).get("title", path.stem)
        lessons.append(MasterLesson(path.parent.name, path.stem, title, make_sent_master(master)))
    return lessons


def make_sent_master(master: NotebookNode) -> NotebookNode:
    """A master as it is sent out, and in its metadata what the judge has to know of the answers that are taken out:
    the names that each exercise defines, and what its text says of them."""
    answers = {read_name(cell): python_of(cell.source) for cell in master.cells if read_role(cell) == "exercise"}
    sent = remove_answers(master)
    about = sent.metadata.setdefault("llm40", {})
    about["asked"] = {exercise: sorted(find_bound_names(answer)) for exercise, answer in answers.items()}
    about["defined"] = find_definitions(list(answers.values()))
    return sent
