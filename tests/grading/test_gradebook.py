"""The gradebook over time: graded again, handed in again, touched by a person, and seen through nbgrader's own eyes."""

import csv
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import tiny
from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from nbgrader.plugins.export import CsvExportPlugin
from traitlets.config import Config

from autograder.execute import Limits
from autograder.grading.grade import grade_folder
from autograder.grading.task import grade_task

pytestmark = pytest.mark.xdist_group("grading")
WRONG = "def half(x):\n    return x // 2\n"


def in_this_process(tasks, jobs):
    """An engine without processes: the gradebook is what is tested here."""
    return map(grade_task, tasks)


def new_course(folder: Path) -> SimpleNamespace:
    """A course with the tiny lesson and nobody in it yet."""
    source = tiny.build(folder)

    def grade_all():
        limits = Limits(cell=5, notebook=30)
        results = grade_folder(
            folder / "in",
            folder / "out",
            source,
            limits=limits,
            engine=in_this_process,
            show=lambda line: None,
            kernels=tiny.KERNELS,
        )
        return {(r.student, r.lesson): r for r in results}

    return SimpleNamespace(folder=folder, submitted=folder / "in", out=folder / "out", source=source, grade=grade_all)


@pytest.fixture
def course(tmp_path):
    return new_course(tmp_path / "course 课程")


def opened(course) -> Gradebook:
    return Gradebook(f"sqlite:///{course.out / 'gradebook.db'}", "llm40")


def auto_scores(course, student) -> dict[str, float]:
    with opened(course) as book:
        notebook = book.find_submission_notebook(tiny.LESSON, tiny.STAGE, student)
        return {grade.name: grade.auto_score for grade in notebook.grades}


def exported(course) -> dict[tuple[str, str], float]:
    """nbgrader's own CSV: (student, stage) → score."""
    to = course.folder / "nbgrader.csv"
    with opened(course) as book:
        CsvExportPlugin(to=str(to)).export(book)
    rows = csv.DictReader(to.read_text(encoding="utf-8").splitlines())
    return {(row["student_id"], row["assignment"]): float(row["score"]) for row in rows}


def ours(course) -> dict[tuple[str, str], float]:
    totals = {}
    for row in csv.DictReader((course.out / "grades.csv").read_text(encoding="utf-8").splitlines()):
        key = (row["student"], row["stage"])
        totals[key] = totals.get(key, 0) + float(row["score"])
    return totals


def test_grading_again_changes_nothing_and_handing_in_again_does(course):
    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered(answer_why="It is dividing by two.")))
    course.grade()
    first = auto_scores(course, "mei")
    assert first == {
        "double-check-1": 2,
        "double-check-2": 1,
        "half-check-1": 2,
        "total-check-1": 3,
        "answer-why": None,
    }
    course.grade()
    assert auto_scores(course, "mei") == first

    notebook = tiny.answered(half=WRONG)
    del notebook.cells[tiny.find(notebook, "half-check-1")]  # stock nbgrader would keep the old 2 points
    tiny.hand_in(course.submitted, "mei", tiny.dumps(notebook))
    course.grade()
    assert auto_scores(course, "mei") == first | {"half-check-1": 0, "answer-why": 0}

    tiny.hand_in(course.submitted, "mei", b"{")
    course.grade()
    assert set(auto_scores(course, "mei").values()) == {0}


def test_what_a_person_entered_stays(course):
    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered(half=WRONG, answer_why="Two halves.")))
    course.grade()
    with opened(course) as book:
        for cell, score in (("answer-why", 1.5), ("half-check-1", 1.0)):
            grade = book.find_grade(cell, tiny.LESSON, tiny.STAGE, "mei")
            assert grade.needs_manual_grade == (cell == "answer-why")
            grade.manual_score, grade.needs_manual_grade = score, False
        book.find_comment("answer-why", tiny.LESSON, tiny.STAGE, "mei").manual_comment = "Why two?"
        book.db.commit()

    result = course.grade()["mei", tiny.LESSON]
    assert result.score == 2 + 1 + 1.0 + 3 + 1.5  # the person's figures count
    with opened(course) as book:
        grade = book.find_grade("answer-why", tiny.LESSON, tiny.STAGE, "mei")
        assert (grade.manual_score, grade.needs_manual_grade) == (1.5, False)
        assert book.find_comment("answer-why", tiny.LESSON, tiny.STAGE, "mei").manual_comment == "Why two?"

    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered(half=WRONG, answer_why="Because 2 = 1 + 1.")))
    course.grade()
    with opened(course) as book:  # another answer: the score stays, and a person is asked to look again
        grade = book.find_grade("answer-why", tiny.LESSON, tiny.STAGE, "mei")
        assert (grade.manual_score, grade.needs_manual_grade) == (1.5, True)
        assert not book.find_grade("half-check-1", tiny.LESSON, tiny.STAGE, "mei").needs_manual_grade
    assert exported(course) == ours(course)


def page_of(course, student) -> str:
    return (course.out / "feedback" / student / tiny.STAGE / f"{tiny.LESSON}.html").read_text(encoding="utf-8")


def test_what_a_person_wrote_is_on_the_page(course):
    """A comment and extra credit are entered in the formgrader after the page was made; nothing is run again for it."""
    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered(answer_why="Two halves.")))
    course.grade()
    assert "From your instructor" not in page_of(course, "mei")
    with opened(course) as book:
        book.find_comment("double", tiny.LESSON, tiny.STAGE, "mei").manual_comment = "WELL <b>SEEN"
        book.find_grade("half-check-1", tiny.LESSON, tiny.STAGE, "mei").extra_credit = 0.75
        book.db.commit()
    result = course.grade()["mei", tiny.LESSON]
    page = page_of(course, "mei")
    assert result.score == 8.75
    assert "WELL &lt;b&gt;SEEN" in page
    assert "8.75 of 10 points" in page
    assert "0.75 of them extra" in page
    before = (course.out / "feedback" / "mei" / tiny.STAGE / f"{tiny.LESSON}.html").stat().st_mtime_ns
    course.grade()
    assert (course.out / "feedback" / "mei" / tiny.STAGE / f"{tiny.LESSON}.html").stat().st_mtime_ns == before
    with opened(course) as book:
        book.find_comment("double", tiny.LESSON, tiny.STAGE, "mei").manual_comment = None
        book.db.commit()
    course.grade()
    assert "WELL" not in page_of(course, "mei")


def test_what_was_graded_and_is_not_handed_in_this_time_stays(course):
    """Another week's folder, or one without the file: no grade becomes a zero by it."""
    for who in ("mei", "kim"):
        tiny.hand_in(course.submitted, who, tiny.dumps(tiny.answered()))
    course.grade()
    (course.submitted / "mei" / tiny.STAGE / f"{tiny.LESSON}.ipynb").unlink()
    result = course.grade()["mei", tiny.LESSON]
    assert (result.status, result.score) == ("graded", 8)
    assert result.flags == ["file: not handed in this time; graded earlier, and that counts"]
    assert exported(course) == {("mei", tiny.STAGE): 8, ("kim", tiny.STAGE): 8}
    assert "mei,8" in (course.out / "moodle.csv").read_text(encoding="utf-8")


def test_two_notebooks_for_a_lesson_wait_for_a_person(course):
    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered()))
    second = tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered(half=WRONG)), lesson=f"{tiny.LESSON} (1)")
    result = course.grade()["mei", tiny.LESSON]
    assert (result.status, result.waits) == ("withheld", True)
    assert "2 different notebooks for this lesson" in result.flags[0]
    assert (course.out / "moodle.csv").read_text(encoding="utf-8").endswith("mei,\n")
    with opened(course) as book:
        assert all(g.needs_manual_grade for g in book.find_submission_notebook(tiny.LESSON, tiny.STAGE, "mei").grades)
    rows = list(csv.DictReader((course.out / "intake.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["became"] for row in rows] == ["waits for a person"] * 2
    second.unlink()  # the person has decided
    assert course.grade()["mei", tiny.LESSON].score == 8
    with opened(course) as book:
        grades = book.find_submission_notebook(tiny.LESSON, tiny.STAGE, "mei").grades
        assert not any(grade.needs_manual_grade for grade in grades)


def test_a_lesson_and_a_check_that_come_later(course):
    """The stage grows while a class is under way; nbgrader itself refuses to touch a notebook with submissions."""

    def answered(lesson: str) -> bytes:
        notebook = tiny.answered()
        notebook.metadata.llm40 = {"lesson": f"{tiny.STAGE}/{lesson}"}  # the cells are the same
        return tiny.dumps(notebook)

    tiny.hand_in(course.submitted, "mei", answered(tiny.LESSON))
    course.grade()
    later = tiny.master()
    check = tiny.find(later, "total-check-1")
    later.cells[check].metadata.nbgrader.points = 5
    del later.cells[tiny.find(later, "double-check-2")]
    nbformat.write(later, course.source / tiny.STAGE / f"{tiny.LESSON}.ipynb")
    nbformat.write(tiny.master(), course.source / tiny.STAGE / "98_more.ipynb")
    tiny.hand_in(course.submitted, "kim", answered("98_more"), lesson="98_more")
    results = course.grade()
    assert {key: (r.status, r.score, r.max_score) for key, r in results.items()} == {
        ("mei", tiny.LESSON): ("graded", 9, 11),
        ("mei", "98_more"): ("missing", 0, 10),
        ("kim", tiny.LESSON): ("missing", 0, 11),
        ("kim", "98_more"): ("graded", 8, 10),
    }
    assert auto_scores(course, "mei") == {"double-check-1": 2, "half-check-1": 2, "total-check-1": 5, "answer-why": 0}
    assert exported(course) == ours(course) == {("mei", tiny.STAGE): 9, ("kim", tiny.STAGE): 8}


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """A class of three that has been graded: a good notebook, a broken file, and a Chinese name."""
    course = new_course(tmp_path_factory.mktemp("course 课程"))
    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered(answer_why="Two halves.")))
    tiny.hand_in(course.submitted, "broken", b"{")
    tiny.hand_in(course.submitted, "李雷 2", tiny.dumps(tiny.answered(half=WRONG)))
    course.grade()
    return course


def test_nbgrader_shows_the_same(looked_at):
    course = looked_at
    assert (
        exported(course)
        == ours(course)
        == {("mei", tiny.STAGE): 8, ("broken", tiny.STAGE): 0, ("李雷 2", tiny.STAGE): 6}
    )
    config = Config()
    exec((course.out / "nbgrader_config.py").read_text(encoding="utf-8"), {"get_config": lambda: config})
    config.Exchange.root = str(course.folder)
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    listed = {s["student"]: s for s in api.get_submissions(tiny.STAGE)}
    assert {who: (s["score"], s["max_score"], s["autograded"]) for who, s in listed.items()} == {
        "mei": (8, 10, True),
        "broken": (0, 10, True),
        "李雷 2": (6, 10, True),
    }
    assert [who for who, s in listed.items() if s["needs_manual_grade"]] == ["mei"]


def test_nbgrader_commands_run_in_the_output_folder(looked_at):
    command = [sys.executable, "-m", "nbgrader", "export"]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    before = (looked_at.out / "grades.csv").read_bytes()
    done = subprocess.run(command, cwd=looked_at.out, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (looked_at.out / "grades.csv").read_bytes() == before
    rows = csv.DictReader((looked_at.out / "nbgrader.csv").read_text(encoding="utf-8").splitlines())
    assert {row["student_id"]: float(row["score"]) for row in rows} == {"mei": 8, "broken": 0, "李雷 2": 6}


def nbgrader(folder: Path, *command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [sys.executable, "-m", "nbgrader", *command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_feedback_by_nbgrader_leaves_the_pages_alone_and_tells_no_hidden_test(looked_at):
    before = files_of(looked_at.out / "feedback")
    done = nbgrader(looked_at.out, "generate_feedback", tiny.STAGE, "--force")
    assert done.returncode == 0, done.stderr
    assert files_of(looked_at.out / "feedback") == before
    made = list((looked_at.out / "nbgrader" / "feedback").rglob("*.html"))
    assert len(made) == 3
    for page in looked_at.out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "HIDDEN TESTS" not in text
        assert str(tiny.SECRET) not in text


def test_autograde_by_nbgrader_stops_with_a_sentence(looked_at):
    before = files_of(looked_at.out)
    done = nbgrader(looked_at.out, "autograde", tiny.STAGE, "--force")
    assert done.returncode == 1
    assert "This class is graded by `make grade`" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(looked_at.out) == before


def test_scores_that_nbgrader_overwrote_are_graded_again(course):
    """By its autograde, run in another folder on the same gradebook."""
    tiny.hand_in(course.submitted, "mei", tiny.dumps(tiny.answered()))
    course.grade()
    with opened(course) as book:
        book.find_grade("half-check-1", tiny.LESSON, tiny.STAGE, "mei").auto_score = 0
        book.db.commit()
    assert course.grade()["mei", tiny.LESSON].score == 8
    assert auto_scores(course, "mei")["half-check-1"] == 2


def test_the_formgraders_pages_answer(looked_at):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with opened(looked_at) as book:
        submission = book.find_submission_notebook(tiny.LESSON, tiny.STAGE, "mei").id
        broken = book.find_submission_notebook(tiny.LESSON, tiny.STAGE, "broken").id
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyter_server",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=",
            "--ServerApp.disable_check_xsrf=True",
            "--ServerApp.jpserver_extensions=nbgrader.server_extensions.formgrader=True",
        ],
        cwd=looked_at.out,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def page(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/formgrader/{path}", timeout=20) as answer:
            return answer.read().decode()

    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                page("api/status")
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "the formgrader did not start"
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
        for path in ("manage_assignments", f"manage_submissions/{tiny.STAGE}", f"gradebook/{tiny.STAGE}/{tiny.LESSON}"):
            assert "nbgrader" in page(path)
        assert '"score": 8.0' in page(f"api/submissions/{tiny.STAGE}")
        manual = page(f"submissions/{submission}/?index=0")  # where a person grades by hand
        assert "Two halves." in manual
        assert "answer-why" in manual or "Student's answer" in manual
        assert "This submission was not run" in page(f"submissions/{broken}/?index=0")
    finally:
        server.terminate()
        server.wait(10)
