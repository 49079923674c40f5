"""A course of two small lessons that need no PyTorch, in two editions, and a learner's work on it."""

import json
import shutil
from pathlib import Path

from autograder.catalog import BY_NUMBER
from autograder.kernels.manager import Kernels
from autograder.layout import ROOT
from autograder.learner.work import Work

KERNELS = Kernels(sandbox=False, libraries=())
ONE, TWO = BY_NUMBER[1].key, BY_NUMBER[2].key

HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: "Lengths."
#     gpu: "Nothing more."
# ---

# %% [markdown]
# ## Core ideas
# {prose}

# %%
{code}
"""
EXERCISE = '''
# %% exercise="{name}" minutes={minutes} difficulty=1 path="{path}"
def {name}(x):
    """{about}"""
    ### BEGIN SOLUTION
    secret_{name} = {answer}
    return secret_{name}
    ### END SOLUTION

# %% [markdown]
# <details><summary>Hint: how?</summary>
# Read {name} aloud.
# </details>

# %% check="{name}" points=2
assert {name}([3, 4]) == {visible}, f"{name}([3, 4]) must be {visible}; yours is {{{name}([3, 4])}}"
### BEGIN HIDDEN TESTS
assert {name}([6, 8]) == {hidden}, "hidden {name}"
### END HIDDEN TESTS
'''
TAIL = """
# %% tags=["experiment"]
raise RuntimeError("an experiment is not run here")

# %% [markdown]
# ## Key questions
# **Why?** Write your answer below.

# %% [markdown] answer="why"
# Because of {prose}

# %% [markdown]
# ## References
# - Somebody 2017, A paper, arXiv:1706.03762. All of it.
"""
NORM = {"name": "norm", "minutes": 30, "path": "core", "about": "The length.", "visible": 5, "hidden": 10}
NORM["answer"] = "math.hypot(*x)"
LONGEST = {"name": "longest", "minutes": 10, "path": "core", "about": "The largest.", "visible": 4, "hidden": 8}
LONGEST["answer"] = "max(x)"
SHORTEST = {"name": "shortest", "minutes": 10, "path": "more", "about": "The least.", "visible": 3, "hidden": 6}
SHORTEST["answer"] = "min(x)"
STUB = 'raise NotImplementedError("your turn: replace this line")'
MINE = "# mine: 我的\n    return (x[0] ** 2 + x[1] ** 2) ** 0.5"
ADDED = "own_cell = '自己的 cell'"
PROSE = "Why: because I say so, 因为"


def write_lesson(*exercises: dict, prose: str = "A vector has a length.", code: str = "import math") -> str:
    parts = [HEADER.format(prose=prose, code=code), *(EXERCISE.format(**exercise) for exercise in exercises)]
    return "".join([*parts, TAIL.format(prose=prose)])


FIRST = {ONE: write_lesson(NORM, LONGEST), TWO: write_lesson(SHORTEST | {"path": "core"})}
CHANGED = {
    ONE: write_lesson(
        NORM | {"about": "The Euclidean length."}, SHORTEST, prose="A vector has one length.", code="import math, sys"
    ),
    TWO: FIRST[TWO],
}


def make_project(root: Path, sources: dict[str, str]) -> Path:
    """A project with these lessons, built as `make course` builds them."""
    from autograder.build import build_course

    for key, text in sources.items():
        path = root / "solutions" / f"{key}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "nbgrader_config.py", root)
    assert build_course(root=root) == 0
    return root


def change_lesson(root: Path, changed: Path) -> None:
    """The course as after `git pull`: every file of course/ as in the other edition."""
    shutil.copytree(changed / "course", root / "course", dirs_exist_ok=True)


def lay(root: Path) -> list[str]:
    """What `make lab` does before it starts JupyterLab."""
    from autograder.learner.progress import draw_index

    work = Work(root)
    with work.lock():
        lines = work.make_current(work.list_lessons())
        draw_index(work)
    return lines


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, notebook: dict) -> None:
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1), encoding="utf-8")


def find(notebook: dict, name: str) -> dict:
    return next(cell for cell in notebook["cells"] if cell["id"] == name)


def text(cell: dict) -> str:
    return "".join(cell["source"])


def texts(path: Path) -> list[str]:
    return [text(cell) for cell in read(path)["cells"]]


def set_text(cell: dict, source: str) -> None:
    cell["source"] = source.splitlines(keepends=True)


def answer(root: Path, key: str = ONE, **answers: str) -> Path:
    """Writes a learner's answers into their copy: bodies of functions, in the place of the stub's line."""
    path = Work(root).find_copy(key)
    notebook = read(path)
    for name, body in answers.items():
        cell = find(notebook, name)
        assert STUB in text(cell)
        set_text(cell, text(cell).replace(STUB, body))
    write(path, notebook)
    return path


def solve(root: Path) -> Path:
    """A learner's evening: an exercise solved and run, a cell of their own, a picture pasted, an answer in prose."""
    path = answer(root, norm=MINE)
    notebook = read(path)
    find(notebook, "norm") | {"execution_count": 3}
    set_text(find(notebook, "answer-why"), PROSE)
    place = notebook["cells"].index(find(notebook, "norm")) + 1
    own = {"cell_type": "code", "id": "b7e1", "metadata": {}, "source": ADDED, "execution_count": 4}
    own["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "an output of mine"}]
    note = {"cell_type": "markdown", "id": "c9d2", "metadata": {}, "source": "![](attachment:me.png)"}
    note["attachments"] = {"me.png": {"image/png": "iVBORw0KGgo="}}
    notebook["cells"][place:place] = [own, note]
    write(path, notebook)
    return path
