"""The sample class is what its file says, shown on the tiny lesson."""

import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import tiny

from autograder.execute import Limits
from autograder.grading.grade import grade_folder

sys.path.append(str(Path(__file__).parents[1] / "support"))

from sample_class import STUDENTS, make_class

pytestmark = pytest.mark.xdist_group("grading")

ANSWERS = """
# %% wrong="double" because="adds two"
def double(x):
    return x + 2

# %% right="double" because="adds it to itself"
def double(x):
    return x + x

# %% wrong="half" because="rounds"
def half(x):
    return x // 2
"""


def test_each_student_gets_what_the_notebook_deserves(tmp_path):
    key = f"{tiny.STAGE}/{tiny.LESSON}"
    tiny.build(tmp_path / "build")
    for path, text in (
        (tmp_path / "build" / "release" / f"{key}.ipynb", nbformat.writes(tiny.stub())),
        (tmp_path / "tests" / "answers" / f"{key}.py", ANSWERS),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    submitted = make_class(tmp_path / "class", [SimpleNamespace(key=key)], tmp_path)
    source = tmp_path / "build" / "source"
    results = grade_folder(
        submitted,
        tmp_path / "out",
        source,
        jobs=2,
        limits=Limits(cell=5, notebook=30),
        show=lambda line: None,
        kernels=tiny.KERNELS,
    )
    assert {r.student: (r.status, r.score) for r in results} == {
        "sample-01": ("graded", 8),
        "sample-02": ("graded", 0),
        "sample-03": ("graded", 5),
        "sample-04": ("graded", 5),
        "sample-05-李雷": ("graded", 8),
        "sample-06": ("unreadable", 0),
        "sample-07": ("graded", 5),
    }
    assert {r.student for r in results} == set(STUDENTS)
    flags = {r.student: r.flags for r in results}
    assert flags["sample-04"] == [
        "double-check-1: edited; the course's was used",
        "double-check-2: deleted; the course's was used",
    ]
    assert "recognized by their text" in flags["sample-05-李雷"][0]
    assert "double-check-1: ended the kernel" in flags["sample-07"][0]
