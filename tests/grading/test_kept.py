"""What is the learner's although it stands elsewhere: in our cells, in experiments, in files beside the notebook.

Thirty honest notebooks are validated by nbgrader's Validate, set up as `make lab` does, and graded: what the one
accepts, the other accepts too. And where a name is missing, both say where it is made.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
import tiny
from nbgrader.validator import Validator
from traitlets.config import Config

from autograder.execute import Limits
from autograder.grading.additions import find_additions, find_imports
from autograder.grading.grade import grade_folder
from autograder.grading.rebuild import read_role
from autograder.grading.task import Result, grade_task
from autograder.layout import Layout
from autograder.learner import validate

pytestmark = pytest.mark.xdist_group("grading")
LIMITS = Limits(cell=10, notebook=60, grace=1)
GIVEN = "import math\nOFFSET = 0"
HELPERS = "def halve(x):\n    return x / 2\n"
USES_HELPERS = "from helpers import halve\ndef half(x):\n    return halve(x)\n"


@dataclass
class Notebook:
    """An honest notebook: what is written into the given cell and the experiment, own cells above `half`, files."""

    half: str = tiny.HALF
    given: str = GIVEN
    experiment: str = ""
    cells: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    total: str = tiny.SUM

    def make(self) -> nbformat.NotebookNode:
        made = tiny.answered(half=tiny.HEAD["half"] + self.half, total=tiny.HEAD["total"] + self.total)
        made.metadata["llm40"] = {"lesson": f"{tiny.STAGE}/{tiny.LESSON}"}
        made.cells[tiny.find(made, "code-imports")].source = self.given
        if self.experiment:
            made.cells[tiny.find(made, "experiment-1")].source = self.experiment
        return tiny.with_cells(made, *(("half", tiny.added(source)) for source in self.cells))


def uses(name: str) -> str:
    return f"def half(x):\n    assert {name} is not None\n    return x / 2\n"


def halves_by(expression: str) -> str:
    return f"def half(x):\n    return {expression}\n"


HONEST = {
    # --- in our import cell ---
    "an import below ours": Notebook(uses("Fraction"), GIVEN + "\nfrom fractions import Fraction"),
    "an import above ours": Notebook(uses("Fraction"), "from fractions import Fraction\n" + GIVEN),
    "an import under another name": Notebook(halves_by("op.truediv(x, 2)"), GIVEN + "\nimport operator as op"),
    "our import widened": Notebook(uses("json"), "import math, json\nOFFSET = 0"),
    "an import over several lines": Notebook(
        uses("chain"), GIVEN + "\nfrom itertools import (\n    chain,\n    count,\n)"
    ),
    "an import that may fail": Notebook(
        uses("np"), GIVEN + "\ntry:\n    import numpy as np\nexcept ImportError:\n    np = 0"
    ),
    "a constant": Notebook(halves_by("x * HALF"), GIVEN + "\nHALF = 1 / 2"),
    "a helper": Notebook(halves_by("halve(x)"), f"{GIVEN}\n{HELPERS}"),
    "two statements in a line": Notebook(halves_by("x * A / B"), GIVEN + "\nA = 1; B = 2"),
    "a magic": Notebook(given="%precision 3\n" + GIVEN),
    "a shell line": Notebook(given=GIVEN + "\n!echo hello"),
    "a timed cell": Notebook(halves_by("x * HALF"), "%%time\n" + GIVEN + "\nHALF = 0.5"),
    "a setting": Notebook(given=GIVEN + "\nimport sys\nsys.setrecursionlimit(4000)"),
    "comments and blanks": Notebook(given="# mine\n\nimport math  # used below\n\n\nOFFSET = 0  # hm\n"),
    "what is awaited": Notebook(uses("DONE"), GIVEN + "\nimport asyncio\nDONE = await asyncio.sleep(0, result=True)"),
    # --- in experiments ---
    "an experiment's import": Notebook(uses("Counter"), experiment="from collections import Counter\nprint(1 / 0)"),
    "an experiment's import, of several": Notebook(
        uses("re"), experiment="import re\nimport json\nfigure = json.dumps([1])\nprint(figure)"
    ),
    "an experiment's import under a condition": Notebook(
        uses("sys"), experiment="if True:\n    import sys\nvalue = [1]\n"
    ),
    "an experiment's import in an own cell": Notebook(
        uses("TEXT"), experiment="import json", cells=("TEXT = json.dumps([1])",)
    ),
    "an experiment written anew": Notebook(experiment="print('my own experiment')"),
    # --- modules written by a cell ---
    "a module written by a magic": Notebook(USES_HELPERS, cells=("%%writefile helpers.py\n" + HELPERS,)),
    "a module written by a magic, added to": Notebook(
        USES_HELPERS,
        cells=("%%writefile helpers.py\n# mine", "%%writefile -a helpers.py\n" + HELPERS),
    ),
    "a module written by open": Notebook(
        USES_HELPERS, cells=(f"with open('helpers.py', 'w') as file:\n    file.write({HELPERS!r})",)
    ),
    "a package": Notebook(
        "from mine.helpers import halve as half\n",
        cells=("import os\nos.makedirs('mine')", "%%writefile mine/helpers.py\n" + HELPERS),
    ),
    "a module that is run": Notebook(
        halves_by("halve(x)"), cells=("%%writefile helpers.py\n" + HELPERS, "%run helpers.py")
    ),
    "a script that is started": Notebook(
        cells=(
            "%%writefile helpers.py\n" + HELPERS,
            "%%writefile go.py\nimport helpers\nprint('went')",
            "!python go.py",
        )
    ),
    # --- files beside ---
    "a module beside": Notebook(USES_HELPERS, files={"helpers.py": HELPERS}),
    "a package beside": Notebook(
        "from mine import halve as half\n",
        files={"mine/__init__.py": "from mine.deep import halve", "mine/deep.py": HELPERS},
    ),
    "a module beside that imports another": Notebook(
        USES_HELPERS, files={"helpers.py": "from more import halve", "more.py": HELPERS}
    ),
    "data beside": Notebook(
        halves_by("x * FACTOR"),
        cells=("import json\nFACTOR = json.load(open('data/factor.json'))",),
        files={"data/factor.json": "0.5"},
    ),
    "a notebook that uses nothing beside": Notebook(files={"notes.txt": "to do"}),
    # --- cells of their own ---
    "own cells": Notebook(halves_by("x * HALF"), cells=("HALF = 0.25", "HALF *= 2")),
    "an own cell that fails": Notebook(cells=("1 / 0",)),
    "an own helper that is used twice": Notebook(
        halves_by("sum_of([x / 2])"),
        cells=("def sum_of(xs):\n    return sum(xs)",),
        total="def total(xs):\n    return sum_of(xs)\n",
    ),
}
MISSING = {
    "a result of an experiment": (
        Notebook(halves_by("x * FACTOR"), experiment="import random\nFACTOR = 1 / 2"),
        "FACTOR is made in an experiment (FACTOR = 1 / 2), and experiments are not run in grading",
    ),
    "an experiment's result in an own cell": (
        Notebook(halves_by("x * FACTOR"), experiment="BASE = 1 / 2", cells=("FACTOR = BASE",)),
        "FACTOR is made in your own cell (FACTOR = BASE), which failed: NameError: name 'BASE' is not defined. "
        "BASE is made in an experiment (BASE = 1 / 2)",
    ),
    "a name of a cell further down": (
        Notebook("def half(x):\n    return x * LATER\n", total="LATER = 0.5\n\ndef total(xs):\n    return sum(xs)\n"),
        "LATER is made in the cell of total, further down: a notebook is run once, from top to bottom",
    ),
}


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A project whose course has the tiny lesson."""
    folder = tmp_path_factory.mktemp("a course 课程")
    path = Layout(folder).course / tiny.STAGE / f"{tiny.LESSON}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(tiny.stub(), path)
    return folder


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> dict[str, Result]:
    """All these notebooks, graded once."""
    folder = tmp_path_factory.mktemp("a class")
    for student, notebook in (HONEST | {name: notebook for name, (notebook, _) in MISSING.items()}).items():
        path = tiny.hand_in(folder / "in", student, tiny.dumps(notebook.make()))
        lay(path.parent, notebook.files)
    results = grade_folder(
        folder / "in",
        folder / "out",
        tiny.build(folder),
        limits=LIMITS,
        engine=lambda tasks, jobs: map(grade_task, tasks),
        show=lambda line: None,
        kernels=tiny.KERNELS,
    )
    return {result.student: result for result in results}


def lay(folder: Path, files: dict[str, str]) -> None:
    for place, text in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")


@pytest.fixture
def validated(course, tmp_path, monkeypatch):
    """What Validate finds in a notebook, for a learner whose JupyterLab was started by `make lab`."""
    monkeypatch.setattr(validate.AsGraded, "root", validate.AsGraded.root)  # put back at the end
    monkeypatch.setattr(validate, "BY_KEY", {f"{tiny.STAGE}/{tiny.LESSON}": None})
    monkeypatch.setattr(Validator, "_preprocess", Validator._preprocess)  # put back at the end
    validate.follow_grading(course)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(os.sys.executable).parent), os.environ["PATH"]]))

    def look(notebook: Notebook) -> dict:
        lay(tmp_path, notebook.files)
        path, made = tmp_path / f"{tiny.LESSON}.ipynb", notebook.make()
        for cell in made.cells:
            if read_role(cell) == "check":
                cell.source += ";"  # to nbgrader a value that is shown is a score
        nbformat.write(made, path)
        return Validator(config=Config()).validate(str(path))

    return look


def passed(result: Result) -> list[str]:
    return [c.message for c in result.checks if c.status not in ("passed", "stub")]


def test_there_are_thirty():
    assert len(HONEST) >= 30


@pytest.mark.parametrize("label", HONEST)
def test_grading_accepts_it(graded, label):
    result = graded[label]
    assert (passed(result), result.score) == ([], 8), result.flags


@pytest.mark.parametrize("label", HONEST)
def test_validate_accepts_it(validated, label):
    assert validated(HONEST[label]) == {}


@pytest.mark.parametrize("label", MISSING)
def test_both_say_where_a_missing_name_is_made(graded, validated, label):
    notebook, sentence = MISSING[label]
    messages = {check.exercise: check.message for check in graded[label].checks}
    assert sentence in messages["half"]
    (failed,) = validated(notebook)["failed"]
    assert sentence in failed["raw_error"].replace("\n", " ")


def test_an_addition_is_told_and_shown(graded):
    result = graded["an import below ours"]
    assert result.flags == ["code-imports: edited; the course's was used, and then what was added to it"]


# --- the text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("copy", "kept"),
    [
        (GIVEN, ""),
        ("import math\nOFFSET = 99", ""),
        ("OFFSET = 0", ""),
        (GIVEN + "\nOFFSET += 1", ""),
        (GIVEN + "\ndef (", ""),
        ("(" * 5000, ""),
        ("import math as m\nOFFSET = 0", "import math as m"),
        (GIVEN + "\n@staticmethod\ndef f():\n    pass", "@staticmethod\ndef f():\n    pass"),
        ("x = 1\n" * 60_000, ""),
    ],
)
def test_additions(copy, kept):
    assert find_additions(GIVEN, copy) == kept


def test_imports():
    source = (
        "import a\nx = 1\nfrom b import (\n    c,\n)\n\ndef f():\n    import d\n\nif x:\n    import e\n    print(1)"
    )
    assert find_imports(source) == "import a\nfrom b import (\n    c,\n)"
