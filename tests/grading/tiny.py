"""A lesson of three exercises, without PyTorch so that a kernel is quick, and ways to answer it well and badly."""

import copy
import json
from pathlib import Path

import nbformat

from autograder.kernels.manager import Kernels
from autograder.kernels.sandbox import find_sandbox_trouble

UNSAFE = bool(find_sandbox_trouble())  # these tests are of grading, and work without a sandbox too
KERNELS = Kernels(sandbox=not UNSAFE, libraries=())  # no lesson here imports PyTorch
STAGE, LESSON = "stage9_tiny", "99_tiny"
DOUBLE = "def double(x):\n    return 2 * x\n"
HALF = "def half(x):\n    return x / 2\n"
SUM = "def total(xs):\n    return sum(xs)\n"
HEAD = {
    "double": "# exercise double · ●○○ · 5 min\n",
    "half": "# exercise half · ●●○ · 10 min\n",
    "total": "# exercise total · ●●● · 20 min\n",
}
SECRET = 4711  # stands in hidden tests only


def _marked(make, source, grade_id, grade, solution, points=None):
    marks = {"grade": grade, "solution": solution, "locked": not solution, "task": False, "schema_version": 3}
    marks |= {"grade_id": grade_id, "cell_type": "markdown" if make is nbformat.v4.new_markdown_cell else "code"}
    if points is not None:
        marks["points"] = points
    return make(source, id=grade_id, metadata={"nbgrader": marks, "deletable": False, "editable": solution})


def _exercise(name, source):
    head, body = source.split("\n", 1)
    text = f"{HEAD[name]}{head}\n    ### BEGIN SOLUTION\n{body.rstrip()}\n    ### END SOLUTION"
    return _marked(nbformat.v4.new_code_cell, text, name, grade=False, solution=True)


def _check(name, number, visible, hidden, points):
    text = f"{visible}\n### BEGIN HIDDEN TESTS\n{hidden}\n### END HIDDEN TESTS"
    return _marked(nbformat.v4.new_code_cell, text, f"{name}-check-{number}", grade=True, solution=False, points=points)


def master() -> nbformat.NotebookNode:
    """As in build/source: answers and hidden tests in place."""
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [
        text("# A tiny lesson", id="text-title"),
        code("import math\nOFFSET = 0", id="code-imports"),
        _exercise("double", DOUBLE),
        _check("double", 1, "assert double(1) == 2, 'double(1) must be 2'", f"assert double({SECRET}) == 9422", 2),
        _check("double", 2, "double(0)", "assert double(-1) == -2, f'double(-1) must be -2; yours is {double(-1)}'", 1),
        code("raise RuntimeError('an experiment must not run')", id="experiment-1", metadata={"tags": ["experiment"]}),
        text("## Halves", id="text-halves"),
        _exercise("half", HALF),
        _check("half", 1, "half(2)", "assert half(5) == 2.5, 'half(5) must be 2.5: did you divide with //?'", 2),
        _exercise("total", SUM),
        _check("total", 1, "total([1])", "assert total(range(5)) == 10", 3),
        text("**How?** Nobody grades this one.", id="text-how"),
        text(
            "<!-- BEGIN SOLUTION -->\nThis way.\n<!-- END SOLUTION -->",
            id="answer-how",
            metadata={"llm40": {"role": "answer"}},
        ),
        text("**Why?** Write your answer below.", id="text-why"),
        _marked(text, "Because.", "answer-why", grade=True, solution=True, points=2),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def stub() -> nbformat.NotebookNode:
    """As in course/: what a learner gets."""
    from autograder.grading.rebuild import remove_answers
    from autograder.lesson import remove_hidden

    notebook = remove_answers(master())
    for cell in notebook.cells:
        cell.source = remove_hidden(cell.source)
    return notebook


def find(notebook, label):
    return next(i for i, cell in enumerate(notebook.cells) if cell.id == label)


def answered(**answers: str) -> nbformat.NotebookNode:
    """The learner's notebook, everything right but for the answers given by name."""
    notebook = stub()
    right = {"double": HEAD["double"] + DOUBLE, "half": HEAD["half"] + HALF, "total": HEAD["total"] + SUM}
    for label, source in (right | answers).items():
        notebook.cells[find(notebook, label.replace("_", "-"))].source = source
    return notebook


def dumps(notebook) -> bytes:
    return json.dumps(notebook, ensure_ascii=False, indent=1).encode()


def added(source, kind="code"):
    make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    return make(source, metadata={})


def with_cells(notebook, *places):
    """The notebook with a cell put before the cell of each label: (label, cell), ..."""
    for label, cell in places:
        notebook.cells.insert(find(notebook, label), cell)
    return notebook


def stripped(notebook):
    """As Colab may give it back: neither nbgrader's metadata nor our cell ids."""
    notebook = copy.deepcopy(notebook)
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {"id": f"x{number}"}
        cell.id = f"colab{number}"
    return notebook


def hand_in(folder: Path, student: str, data: bytes, stage: str = STAGE, lesson: str = LESSON) -> Path:
    path = folder / student / stage / f"{lesson}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def build(folder: Path) -> Path:
    """A folder like build/source with the tiny lesson."""
    path = folder / "source" / STAGE / f"{LESSON}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(master(), path)
    return folder / "source"
