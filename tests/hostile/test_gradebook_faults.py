"""A gradebook that is damaged, half made, locked or another's; a full disk; odd folders: a sentence, nothing lost."""

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from nbgrader.api import Base

from autograder.grading import grade as grading
from autograder.grading import gradebook
from autograder.grading.grade import FAULT, OK, USAGE, grade_class
from autograder.grading.task import Check, Result


def judged(tasks, jobs):
    """An engine that runs nothing: everybody has two points. What is written is what these tests are about."""
    others = ("double-check-2", "half-check-1", "total-check-1", "answer-why")
    for task in tasks:
        checks = [Check("double", "double-check-1", 2.0, 2.0, "passed")]
        checks += [Check(name.split("-check")[0], name, 1.0, 0.0, "failed") for name in others]
        notebook = tiny.dumps(tiny.stub())
        yield Result(task.student, task.stage, task.lesson, "graded", checks=checks, notebook=notebook)


@pytest.fixture
def course(tmp_path, monkeypatch, capsys) -> SimpleNamespace:
    """ada's notebook, and the command that grades it: `run` returns the exit code and the last line it said."""
    monkeypatch.setattr(grading, "ROOT", tmp_path)  # the tiny lesson takes the place of the course
    tiny.build(tmp_path / "build")
    tiny.hand_in(tmp_path / "in", "ada", tiny.dumps(tiny.answered()))

    def run(out: Path = tmp_path / "out") -> tuple[int, str]:
        capsys.readouterr()
        code = grade_class(tmp_path / "in", out, engine=judged)
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return SimpleNamespace(folder=tmp_path, out=tmp_path / "out", book=tmp_path / "out" / "gradebook.db", run=run)


def scores(out: Path) -> dict[str, float]:
    with closing(sqlite3.connect(out / "gradebook.db")) as book:
        rows = book.execute(
            "select a.student_id, sum(g.auto_score) from grade g join submitted_notebook n on n.id = g.notebook_id "
            "join submitted_assignment a on a.id = n.assignment_id group by 1"
        )
        return dict(rows.fetchall())


# --- the file -------------------------------------------------------------------------------------------------


def other_program(path: Path, *tables: str) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        for table in tables:
            database.execute(f"create table {table} (x)")
            database.execute(f"insert into {table} values (1)")
        database.commit()


SPOILT = {
    "random bytes": (lambda path: path.write_bytes(os.urandom(50_000)), "file is not a database"),
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "malformed|damaged"),
    "a page overwritten": (
        lambda path: path.write_bytes(path.read_bytes()[:8192] + b"\xff" * 8192 + path.read_bytes()[16384:]),
        "malformed|damaged",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "unable to open"),
    "another program's": (lambda path: other_program(path, "recipe"), "another program's, with the tables recipe"),
    "another program's, with a name of ours": (lambda path: other_program(path, "student"), "student has no column"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_gradebook_that_cannot_be_used(course, spoil, words):
    """It is said which and why, and the file is as it was."""
    assert course.run()[0] == OK
    spoil(course.book)
    before = course.book.read_bytes() if course.book.is_file() else None
    grades = (course.out / "grades.csv").read_bytes()
    code, said = course.run()
    assert code == USAGE
    assert said.startswith("Nothing graded: the gradebook sqlite:///")
    assert any(word in said for word in words.split("|")), said
    assert (course.book.read_bytes() if course.book.is_file() else None) == before
    assert (course.out / "grades.csv").read_bytes() == grades
    assert [path.name for path in course.out.glob(".*")] == []


def test_an_empty_file_is_a_new_gradebook(course):
    course.out.mkdir()
    course.book.touch()
    assert course.run()[0] == OK
    assert scores(course.out) == {"ada": 2.0}


def test_one_of_an_older_nbgrader(course):
    assert course.run()[0] == OK
    with closing(sqlite3.connect(course.book)) as book:
        book.execute("alter table student drop column lms_user_id")
        book.commit()
    code, said = course.run()
    assert code == USAGE
    assert "nbgrader db upgrade" in said


def test_one_that_was_half_made(course):
    """As nbgrader itself leaves one that is killed at its start: completed while it is empty, else refused."""
    course.run()
    with closing(sqlite3.connect(course.book)) as book:
        book.execute("pragma foreign_keys = off")
        for table in Base.metadata.tables:
            book.execute(f"delete from {table}")
        book.execute("drop table grade")
        book.commit()
    assert course.run()[0] == OK
    assert scores(course.out) == {"ada": 2.0}
    with closing(sqlite3.connect(course.book)) as book:
        book.execute("drop table grade")
        book.commit()
    code, said = course.run()
    assert code == USAGE
    assert "lacks the table grade" in said


def test_a_new_one_is_made_whole_or_not_at_all(course, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gradebook.RESULTS, "create", broken)  # nbgrader's part is written by then
        code, said = course.run()
    assert code == FAULT
    assert "the disk is full" in said
    assert list(course.out.iterdir()) == []
    assert course.run()[0] == OK


def test_a_result_of_another_version_is_graded_again(course):
    course.run()
    with closing(sqlite3.connect(course.book)) as book:
        book.execute("""update llm40_result set result = '{"half": ['""")
        book.commit()
    assert course.run()[0] == OK


# --- locked ---------------------------------------------------------------------------------------------------


def locked(course) -> sqlite3.Connection:
    course.run()
    tiny.hand_in(course.folder / "in", "bob", tiny.dumps(tiny.answered()))
    held = sqlite3.connect(course.book, isolation_level=None, check_same_thread=False)
    held.execute("begin exclusive")
    return held


def test_locked_for_a_while(course):
    """Longer than SQLite itself waits: 5 s."""
    with closing(locked(course)) as held:
        threading.Timer(7, lambda: held.execute("rollback")).start()
        assert course.run()[0] == OK
    assert scores(course.out) == {"ada": 2.0, "bob": 2.0}


def test_locked_for_good(course, monkeypatch):
    monkeypatch.setattr(gradebook, "PATIENCE", 1.0)
    with closing(locked(course)) as held:
        code, said = course.run()
        held.execute("rollback")
    assert (code, "database is locked" in said) == (USAGE, True)
    assert course.run()[0] == OK


def test_locked_in_the_middle(course, monkeypatch):
    """What was written stays; a later call goes on."""
    monkeypatch.setattr(gradebook, "PATIENCE", 1.0)
    course.run()
    for student in ("bob", "cem"):
        tiny.hand_in(course.folder / "in", student, tiny.dumps(tiny.answered()))

    def engine(tasks, jobs):
        for number, result in enumerate(judged(tasks, jobs)):
            if number == 1:
                held.execute("begin exclusive")
            yield result

    with closing(sqlite3.connect(course.book, isolation_level=None)) as held:
        assert grade_class(course.folder / "in", course.out, engine=engine) == FAULT
        held.execute("rollback")
    assert scores(course.out) == {"ada": 2.0, "bob": 2.0}
    assert course.run()[0] == OK
    assert scores(course.out) == {"ada": 2.0, "bob": 2.0, "cem": 2.0}


# --- OUT ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("kilobytes", [20, 100, 200, 300, 400, 500, 600])
def test_a_full_disk(course, kilobytes):
    """Wherever it ends: a sentence, a gradebook that is none or sound, and with room again all is there."""
    course.out.mkdir()
    for number in range(12):
        tiny.hand_in(course.folder / "in", f"s{number}", tiny.dumps(tiny.answered()))
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "x", str(course.out)])
    if made.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        code, said = course.run()
        assert code in (USAGE, FAULT)
        assert "full" in said or "No space left" in said, said
        if course.book.exists():
            with closing(sqlite3.connect(course.book)) as book:
                assert book.execute("pragma integrity_check").fetchone() == ("ok",)
        assert [path.name for path in course.out.rglob(".*")] == []
        subprocess.run(["mount", "-o", "remount,size=20m", str(course.out)], check=True)
        assert course.run()[0] == OK
        assert len(scores(course.out)) == 13
    finally:
        subprocess.run(["umount", "-l", str(course.out)], check=True)


@pytest.mark.parametrize("name", ["a?b", "a%20b", "100%", "a#b", "成绩 a\nb", "a'b\"c", "$HOME `x`", "-out", "a;b&c=d"])
def test_where_it_goes_is_where_it_was_asked_for(course, name):
    """And nowhere else; nbgrader, started there, finds it too."""
    before = {path.name for path in course.folder.iterdir()}
    out = course.folder / name
    assert course.run(out)[0] == OK
    assert {path.name for path in course.folder.iterdir()} - before == {name}
    assert scores(out) == {"ada": 2.0}
    assert course.run(out)[0] == OK
    if name in ("a?b", "100%"):
        done = subprocess.run([sys.executable, "-m", "nbgrader", "export"], cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ",ada,," in (out / "nbgrader.csv").read_text()
        assert {path.name for path in course.folder.iterdir()} - before == {name}


def test_out_is_a_file(course):
    course.out.write_text("mine")
    code, said = course.run()
    assert (code, course.out.read_text()) == (USAGE, "mine")
    assert "cannot be made" in said
