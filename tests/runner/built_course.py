"""Tiny notebooks, written cell by cell, in the layout that `run --notebooks` takes."""

from pathlib import Path

import nbformat

SOLUTION = "def double(x):\n    return 2 * x"
STUB = "def double(x):\n    raise NotImplementedError"
CHECK = "assert double(3) == 6"


def code(source, **marks):
    """A code cell; `exercise=`, `check=` (with points=) or `experiment=True` say which kind."""
    cell = nbformat.v4.new_code_cell(source)
    if marks.get("experiment"):
        cell.metadata["tags"] = ["experiment"]
    name = marks.get("exercise") or marks.get("check")
    if name:
        check = "check" in marks
        cell.metadata["nbgrader"] = {
            "grade": check,
            "solution": not check,
            "locked": check,
            "task": False,
            "schema_version": 3,
            "grade_id": name,
            **({"points": marks.get("points", 1)} if check else {}),
        }
    return cell


def write(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


class Course:
    """A folder of built notebooks."""

    def __init__(self, root: Path):
        self.root = root

    def add(self, key: str, solution: list, stub: list | None = None) -> None:
        """A lesson; its stub defaults to one that is sound."""
        write(self.root / "source" / f"{key}.ipynb", solution)
        stub = stub or [code(STUB, exercise="double"), code(CHECK, check="double_1")]
        write(self.root / "course" / f"{key}.ipynb", stub)
