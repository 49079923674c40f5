"""The reference answers of every lesson, graded as a class is: behind the walls, by a judge with hidden tests."""

import nbformat
import pytest

from autograder import build
from autograder.grading.grade import SEED
from autograder.grading.masters import make_sent_master
from autograder.grading.task import Task, grade_task
from autograder.kernels.limits import Limits
from autograder.kernels.manager import Kernels
from autograder.layout import ROOT
from autograder.lesson import read_lesson, remove_hidden

KERNELS = Kernels()
SOURCES = sorted((ROOT / "solutions").glob("*/*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_reference_gets_full_marks(path):
    layout = build.Layout(ROOT)
    master = build.dumps(build.make_master(read_lesson(path), layout))
    submission = nbformat.reads(master, as_version=4)
    for cell in submission.cells:
        cell.source = remove_hidden(cell.source)
    key = path.parent.name, path.stem
    sent = nbformat.writes(make_sent_master(nbformat.reads(master, as_version=4))).encode()
    result = grade_task(Task("ada", *key, nbformat.writes(submission).encode(), sent, Limits(), SEED, KERNELS))
    lost = [(check.check, check.status, check.message) for check in result.checks if check.status != "passed"]
    assert (result.status, lost, result.flags) == ("graded", [], []), result.traceback
    assert result.checks
    print(f"{path.stem}: {result.seconds:.1f} s")
