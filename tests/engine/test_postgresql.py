"""The shared gradebook: a real server, also one that goes away for a while."""

import threading
import time

import pytest
import sqlalchemy
from classroom import new_class, recorded

from autograder.grading import gradebook
from autograder.grading.gradebook import Gradebook, NoDatabase
from autograder.grading.task import grade_task

pytestmark = pytest.mark.xdist_group("engine")


@pytest.fixture
def database(postgresql):
    """The address of an empty database."""
    engine = sqlalchemy.create_engine(postgresql.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("DROP DATABASE IF EXISTS class WITH (FORCE)"))
        connection.execute(sqlalchemy.text("CREATE DATABASE class"))
    engine.dispose()
    return postgresql.url.replace("/postgres", "/class")


def in_this_process(tasks, jobs):
    return map(grade_task, tasks)


def test_the_same_as_in_a_file(tmp_path, database):
    made = new_class(tmp_path / "课程", 3)
    assert made.grade(engine=in_this_process, db=database) == made.expected
    assert not (made.out / "gradebook.db").exists()
    assert recorded(database) == made.expected
    assert made.grade(engine=in_this_process, db=database) == made.expected
    assert any("3 of 3 had not changed" in line for line in made.said)
    assert database in (made.out / "nbgrader_config.py").read_text(encoding="utf-8")


def test_restarted_during_a_run(tmp_path, postgresql, database, capsys):
    """Down for two seconds, as after a power failure, with results waiting to be written: none is lost."""
    made = new_class(tmp_path / "class", 4)

    def engine(tasks, jobs):
        for number, task in enumerate(tasks):
            result = grade_task(task)
            if number == 1:
                postgresql.stop()
                threading.Thread(target=lambda: (time.sleep(2), postgresql.start())).start()
            yield result

    assert made.grade(engine=engine, db=database) == made.expected
    assert recorded(database) == made.expected


def test_away_for_good(postgresql, database, monkeypatch, tmp_path):
    """A server that does not come back ends the run with its own error; what was written stays."""
    made = new_class(tmp_path / "class", 2)
    monkeypatch.setattr(gradebook, "PATIENCE", 1.0)

    def engine(tasks, jobs):
        for number, task in enumerate(tasks):
            result = grade_task(task)
            if number == 1:
                postgresql.stop()
            yield result

    with pytest.raises(sqlalchemy.exc.OperationalError):
        made.grade(engine=engine, db=database)
    postgresql.start()
    assert recorded(database)["学生-00"] == 8.0
    assert made.grade(engine=in_this_process, db=database) == made.expected


def test_no_server_there():
    address = "postgresql+psycopg://grader:secret@127.0.0.1:1/class"
    with pytest.raises(NoDatabase, match=r"postgresql\+psycopg://127\.0\.0\.1:1/class cannot be opened") as caught:
        Gradebook(address)
    assert "secret" not in str(caught.value)


def test_not_an_address():
    with pytest.raises(NoDatabase, match="cannot be opened"):
        Gradebook("nonsense")
