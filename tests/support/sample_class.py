"""The sample class: seven students' notebooks, assembled from the lessons and from the answers that prove their checks.

`make grade` without a folder runs this file and grades what it writes. Nothing is stored: notebooks in the repository
would be out of step with the lessons after the first correction.

    sample-01       everything solved
    sample-02       the notebooks untouched
    sample-03       a typical mistake in every third exercise: the first wrong answer of tests/answers/
    sample-04       the first half solved, by another route; one check edited, one deleted, one cell added
    sample-05-李雷   everything solved, without nbgrader's metadata, as other platforms give notebooks back
    sample-06       the first notebook damaged (half a file), the others not handed in
    sample-07       everything solved but one exercise, which ends the kernel
"""

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

sys.path.append(str(Path(__file__).parents[1]))

from answers_file import read_answers

from autograder import catalog
from autograder.catalog import Entry
from autograder.grading.rebuild import read_name, read_role
from autograder.layout import ROOT, Layout

CRASH = """
import os

def {function}(*args, **kwargs):
    os._exit(1)
"""


@dataclass
class Lesson:
    """What a sample is made from: the learner's notebook, and texts for its exercises by name."""

    stub: NotebookNode
    solution: dict[str, str]
    right: dict[str, str]  # by another route, where there is one
    wrong: dict[str, str]

    def notebook(self, answers: dict[str, str]) -> NotebookNode:
        """The learner's notebook with these exercises answered."""
        notebook = nbformat.from_dict(self.stub)
        for cell in notebook.cells:
            if read_role(cell) == "exercise" and read_name(cell) in answers:
                cell.source = answers[read_name(cell)]
        return notebook


def read_lesson(entry: Entry, layout: Layout) -> Lesson:
    master = nbformat.read(layout.masters / f"{entry.key}.ipynb", as_version=4)
    solution = {read_name(cell): cell.source for cell in master.cells if read_role(cell) == "exercise"}
    answers: dict[str, dict[str, str]] = {"right": {}, "wrong": {}}
    path = layout.root / "tests" / "answers" / f"{entry.key}.py"
    for answer in read_answers(path, solution) if path.is_file() else ():
        answers[answer.kind].setdefault(answer.exercise, answer.source)
    stub = nbformat.read(layout.learners / f"{entry.key}.ipynb", as_version=4)
    return Lesson(stub, solution, solution | answers["right"], answers["wrong"])


# --- the students: each a function from a lesson to the bytes of a file ---------------------------------------


def dumps(notebook: NotebookNode) -> bytes:
    return nbformat.writes(notebook).encode()


def solved(lesson: Lesson) -> bytes:
    return dumps(lesson.notebook(lesson.solution))


def untouched(lesson: Lesson) -> bytes:
    return dumps(lesson.stub)


def mistaken(lesson: Lesson) -> bytes:
    exercises = list(lesson.solution)[::3]
    return dumps(lesson.notebook(lesson.solution | {e: lesson.wrong[e] for e in exercises if e in lesson.wrong}))


def halfway(lesson: Lesson) -> bytes:
    names = list(lesson.solution)
    done = names[: (len(names) + 1) // 2]
    notebook = lesson.notebook({exercise: lesson.right[exercise] for exercise in done})
    checks = [cell for cell in notebook.cells if read_role(cell) == "check"]
    checks[0].source = "pass  # it works on my machine"
    notebook.cells.remove(checks[1])
    place = next(i for i, cell in enumerate(notebook.cells) if read_name(cell) == done[0])
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("print('it runs')", id="my-own-cell"))
    return dumps(notebook)


def stripped(lesson: Lesson) -> bytes:
    notebook = lesson.notebook(lesson.solution)
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({"id": f"c{number}"})
        cell.id = f"c{number}"
    return dumps(notebook)


def damaged(lesson: Lesson) -> bytes:
    data = solved(lesson)
    return data[: len(data) // 2]


def crashing(lesson: Lesson) -> bytes:
    """The first exercise that is one function becomes one that ends its process."""
    defined = {label: re.findall(r"^def (\w+)", source, re.MULTILINE) for label, source in lesson.solution.items()}
    exercise = next(label for label, functions in defined.items() if len(functions) == 1)
    return dumps(lesson.notebook(lesson.solution | {exercise: CRASH.format(function=defined[exercise][0])}))


STUDENTS: dict[str, Callable[[Lesson], bytes]] = {
    "sample-01": solved,
    "sample-02": untouched,
    "sample-03": mistaken,
    "sample-04": halfway,
    "sample-05-李雷": stripped,
    "sample-06": damaged,
    "sample-07": crashing,
}


def make_class(folder: Path, entries: Sequence[Entry], root: Path = ROOT) -> Path:
    """Writes the class's notebooks for these lessons, which have been built; returns the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    layout = Layout(root)
    for number, entry in enumerate(entries):
        lesson = read_lesson(entry, layout)
        for student, hand_in in STUDENTS.items():
            if hand_in is damaged and number:
                continue
            path = folder / student / f"{entry.key}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(hand_in(lesson))
    return folder


if __name__ == "__main__":  # FOLDER and the lessons' keys
    make_class(Path(sys.argv[1]), [catalog.BY_KEY[key] for key in sys.argv[2:]])
