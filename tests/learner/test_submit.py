"""`make submit`: one archive that the grader takes, and what is said of it."""

import os
import zipfile

import learner_course as course
import pytest
from learner_course import MINE, ONE, TWO

from autograder import catalog
from autograder.grading.files import IGNORED, TAKEN
from autograder.grading.masters import read_masters
from autograder.grading.submissions import collect, find_lessons, hand_out
from autograder.learner.submit import read_student, submit_work

STAGES = [stage.folder for stage in catalog.STAGES]
NAMES = [entry.name for entry in catalog.LESSONS]


def take(folder, project) -> list[tuple[str, str, bytes]]:
    """(student, lesson, notebook) that the grader finds in a folder of archives."""
    lessons = read_masters(project / "build" / "source")
    found = collect(folder, STAGES)
    find_lessons(found, lessons, NAMES)
    handed = [one for one in hand_out(found, lessons) if one.file]
    assert {file.became for file in found.files} <= {TAKEN, IGNORED}
    return [(one.student, one.lesson.key, one.read()) for one in handed]


@pytest.mark.parametrize("student", ["ada", "李 雷", "o.brien-2", "s1234567", "ada@example.org", "José"])
def test_the_grader_takes_it(project, tmp_path, capsys, student) -> None:
    first, second = course.solve(project), course.answer(project, TWO, shortest="return max(x)")
    assert submit_work(student, root=project) == 0
    archive = project / "work" / f"{student}.zip"
    folder = tmp_path / "class"
    folder.mkdir()
    archive.rename(folder / archive.name)
    assert take(folder, project) == [(student, ONE, first.read_bytes()), (student, TWO, second.read_bytes())]
    said = capsys.readouterr().out
    assert said.startswith(f"work/{student}.zip: 2 notebooks, ")
    assert f"  {ONE}: 1 of 2 exercises written; not begun: longest\n" in said
    assert f"  {TWO}: 1 of 1 exercises written\n" in said


def test_a_class_of_such_archives(project, tmp_path) -> None:
    course.solve(project)
    folder = tmp_path / "class"
    folder.mkdir()
    for student, stage in (("ada", None), ("bo", "1"), ("ada2", None)):
        assert submit_work(student, stage, root=project) == 0
    for path in (project / "work").glob("*.zip"):
        path.rename(folder / path.name)
    assert sorted(path.name for path in folder.iterdir()) == ["ada.zip", "ada2.zip", "bo_stage1.zip"]
    assert [student for student, _, _ in take(folder, project)] == ["ada", "ada2", "bo"]


def test_what_is_missing_is_listed(project, capsys) -> None:
    course.answer(project, norm=MINE)
    assert submit_work("ada", root=project) == 0
    assert "  not in it, because nothing is written there: 02\n" in capsys.readouterr().out
    assert zipfile.ZipFile(project / "work" / "ada.zip").namelist() == [f"ada/{ONE}.ipynb"]


def test_a_notebook_that_cannot_be_read_is_told_and_does_not_keep_back_the_others(project, capsys) -> None:
    course.answer(project, norm=MINE)
    broken = project / "work" / f"{TWO}.ipynb"
    broken.write_text("{", encoding="utf-8")
    os.utime(broken, (0, 0))
    assert submit_work("ada", root=project) == 1
    said = capsys.readouterr().out
    assert f"NOT in it, because it cannot be read: work/{TWO}.ipynb: the file is not a notebook" in said
    assert zipfile.ZipFile(project / "work" / "ada.zip").namelist() == [f"ada/{ONE}.ipynb"]


def test_nothing_to_hand_in(project, capsys) -> None:
    assert submit_work("ada", root=project) == 2
    assert "no notebook in work/ has an answer" in capsys.readouterr().err
    assert not list((project / "work").glob("*.zip"))


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ("", "asks who you are"),
        ("a/b", "/ cannot be in it"),
        ("a\\b", "cannot be in it"),
        ("a:b", "cannot be in it"),
        (".ada", "begins and ends with a letter or digit"),
        ("ada.", "begins and ends with a letter or digit"),
        ("a" * 81, "80 at most"),
        ("work", "the name of a folder of the course"),
        ("stage1_foundations", "the name of a folder of the course"),
        ("CON", "the name of a folder of the course"),
        ("ada_12345_67890_x", "a name that a grader would not understand"),
        ("ada_1_assignsubmission_file", "a name that a grader would not understand"),
    ],
)
def test_names_that_would_not_arrive(project, capsys, student, says) -> None:
    course.answer(project, norm=MINE)
    assert submit_work(student, root=project) == 2
    assert says in capsys.readouterr().err
    assert not list((project / "work").glob("*.zip"))


def test_one_form_of_a_name() -> None:
    assert read_student(" Jose\u0301 ") == "Jos\u00e9"


def test_what_lies_beside_goes_along(project, tmp_path, capsys) -> None:
    path = course.solve(project)
    (path.parent / "helpers.py").write_text("A = 1\n", encoding="utf-8")
    (path.parent / "huge.bin").write_bytes(b"0" * 11_000_000)
    assert submit_work("ada", root=project) == 0
    said = capsys.readouterr().out
    assert f"  beside them: {ONE.split('/')[0]}/helpers.py\n" in said
    assert "  NOT in it: left out of what lies beside the notebook: huge.bin" in said
    found = collect(project / "work" / "ada.zip", STAGES)
    lessons = read_masters(project / "build" / "source")
    find_lessons(found, lessons, NAMES)
    (handed,) = [one for one in hand_out(found, lessons) if one.file]
    assert handed.read_beside() == {"helpers.py": b"A = 1\n"}
