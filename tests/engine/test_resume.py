"""A second call grades only what changed; a call that was killed leaves a true gradebook and is gone on with."""

import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import pytest
import tiny
from classroom import LIMITS, ROOT, WRONG, new_class, recorded, wait_until

from autograder.grading import fingerprint as module
from autograder.grading.gradebook import Gradebook
from autograder.grading.task import grade_task

pytestmark = pytest.mark.xdist_group("engine")


class Counting:
    """An engine in this process that remembers whom it graded."""

    def __init__(self):
        self.graded = []

    def __call__(self, tasks, jobs):
        for task in tasks:
            self.graded.append(task.student)
            yield grade_task(task)


@pytest.fixture
def graded(tmp_path):
    """A class of three that has been graded once."""
    made = new_class(tmp_path / "course 课程", 3)
    assert made.grade(engine=Counting()) == made.expected
    return made


def again(made, **options) -> list[str]:
    """Who is graded in a second call."""
    engine = Counting()
    made.scores = made.grade(engine=engine, **options)
    return engine.graded


def test_nothing_changed_nothing_graded(graded):
    assert again(graded) == []
    assert graded.scores == graded.expected
    assert any("3 of 3 had not changed" in line for line in graded.said)


def test_unless_it_is_asked_for(graded):
    assert len(again(graded, again=True)) == 3


def test_a_changed_submission(graded):
    tiny.hand_in(graded.folder / "in", "学生-01", tiny.dumps(tiny.answered(half=WRONG)))
    assert again(graded) == ["学生-01"]
    assert graded.scores == graded.expected | {"学生-01": 6.0}
    assert recorded(f"sqlite:///{graded.out / 'gradebook.db'}") == graded.scores


def test_a_corrected_check(graded):
    """A test that was wrong is mended, and everyone graded again; the assignment was not dropped for it."""
    master = tiny.master()
    check = master.cells[tiny.find(master, "half-check-1")]
    check.source = check.source.replace("assert half(5) == 2.5", "assert half(5) in (2, 2.5)")
    nbformat.write(master, graded.source / tiny.STAGE / f"{tiny.LESSON}.ipynb")
    assert len(again(graded)) == 3
    assert set(graded.scores.values()) == {8.0}


@pytest.mark.parametrize("changed", [{"limits": replace(LIMITS, cell=9)}, {"seed": 7}])
def test_other_limits_or_another_seed(graded, changed):
    assert len(again(graded, **changed)) == 3


@pytest.mark.skipif(tiny.UNSAFE, reason="there is no sandbox here")
def test_a_score_from_outside_the_sandbox_is_not_kept(graded):
    """Else a report would be silent about scores that came about without one."""
    assert len(again(graded, kernels=replace(tiny.KERNELS, sandbox=False))) == 3
    assert len(again(graded)) == 3


def test_other_versions(graded, monkeypatch):
    found = module.find_versions()
    monkeypatch.setattr(module, "find_versions", lambda: found | {"torch": "3.0"})
    assert len(again(graded)) == 3


def test_a_file_that_is_gone(graded):
    (graded.out / "feedback" / "学生-02" / tiny.STAGE / f"{tiny.LESSON}.html").unlink()
    assert again(graded) == ["学生-02"]


def test_a_submission_that_was_removed_in_nbgrader(graded):
    from nbgrader.api import Gradebook as Database

    with Database(f"sqlite:///{graded.out / 'gradebook.db'}", "llm40") as book:
        book.remove_student("学生-00")
    assert again(graded) == ["学生-00"]
    assert recorded(f"sqlite:///{graded.out / 'gradebook.db'}") == graded.expected


def test_a_persons_score_is_seen_without_grading(graded):
    with Gradebook(f"sqlite:///{graded.out / 'gradebook.db'}") as book:
        entry = book.database.find_grade("half-check-1", tiny.LESSON, tiny.STAGE, "学生-02")
        entry.manual_score = 1.0
        book.database.db.commit()
    assert again(graded) == []
    assert graded.scores == graded.expected | {"学生-02": 7.0}
    page = (graded.out / "feedback" / "学生-02" / tiny.STAGE / f"{tiny.LESSON}.html").read_text(encoding="utf-8")
    assert "graded by a person" in page


def test_what_a_failed_write_leaves(graded, monkeypatch):
    """The disk is full while the page is written: neither scores nor result have changed, and a later call mends it."""
    from autograder.grading import grade as grading

    def full(path, data, durable):
        raise OSError(28, "No space left on device")

    tiny.hand_in(graded.folder / "in", "学生-01", tiny.dumps(tiny.answered(half=WRONG)))
    with monkeypatch.context() as patch:
        patch.setattr(grading, "write", full)
        with pytest.raises(OSError, match="No space"):
            again(graded)
    assert recorded(f"sqlite:///{graded.out / 'gradebook.db'}") == graded.expected
    assert again(graded) == ["学生-01"]


DRIVER = """
import sys
from pathlib import Path
from autograder.execute import Limits
from autograder.grading.grade import grade_folder
from autograder.kernels.manager import Kernels
from autograder.kernels.sandbox import find_sandbox_trouble

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kernels = Kernels(sandbox=not find_sandbox_trouble(), libraries=())
    limits = Limits(cell=10, notebook=60)
    grade_folder(folder / "in", folder / "out", folder / "source", jobs=2, limits=limits, kernels=kernels)
"""
KILLS = 20


def written(database: Path) -> set[str]:
    """Whose results stand in a gradebook that another process may be writing."""
    if not database.exists():
        return set()
    with closing(sqlite3.connect(database, timeout=30)) as look:
        tables = {name for (name,) in look.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "llm40_result" not in tables:
            return set()
        return {name for (name,) in look.execute("SELECT student FROM llm40_result")}


def has_more(database: Path, than: set[str], process: subprocess.Popen) -> bool:
    assert not process.poll(), "the grader failed"  # None while it runs, 0 when all is graded
    return written(database) > than or process.poll() == 0


def test_killed_at_any_moment(tmp_path):
    """Twenty times, each at another moment: what was written is true, and nothing that was written is lost."""
    made = new_class(tmp_path / "课程", 30)
    database = made.out / "gradebook.db"
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    moments = random.Random(40)
    before = set()
    for number in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, str(driver), str(made.folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if number % 2:  # while it starts, or soon after; otherwise while results are written, however slow the machine
            time.sleep(moments.uniform(0.1, 4))
        else:
            more = partial(has_more, database, before, process)
            wait_until(more, 120, "no result was written")
            time.sleep(moments.uniform(0, 1))
        process.kill()
        process.wait()
        if not database.exists():
            continue
        with closing(sqlite3.connect(database)) as look:
            assert look.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        after = written(database)
        assert after >= before, "a result that was written is gone"
        before = after
        scores = recorded(f"sqlite:///{database}") if after else {}
        assert scores == {who: made.expected[who] for who in after}, "a grade is not that of the notebook"
    assert made.grade() == made.expected
    assert len(before) >= KILLS // 2
    assert any(f"{len(before)} of 30 had not changed" in line for line in made.said)
