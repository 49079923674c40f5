"""`make check`: what it says of each exercise, what it runs, and the roadmap that it draws."""

import base64
import os
import re

import learner_course as course
import pytest
from learner_course import MINE, ONE, TWO

from autograder import catalog
from autograder.learner import check
from autograder.learner.check import check_work
from autograder.learner.progress import CourseExercise, Finding, Progress, draw_bar, find_closed, find_next
from autograder.learner.work import Work


def run(project, capsys, **asked) -> str:
    assert check_work(root=project, kernels=course.KERNELS, **asked) == 0
    return capsys.readouterr().out


def test_passed_failed_with_its_sentence_and_not_begun(project, capsys) -> None:
    course.answer(project, norm=MINE)
    course.answer(project, TWO, shortest="return max(x)")
    assert run(project, capsys) == (
        "01 Geometry of high-dimensional space · █████░░░░░ 50 % · 2 of 4 points · core 2 of 4\n"
        "   1  norm     passed       2 of 2\n"
        "   2  longest  not begun    0 of 2\n"
        "  next: exercise 2 (longest), core, 10 min\n"
        "\n"
        "02 Automatic differentiation and computation graphs · ░░░░░░░░░░ 0 % · 0 of 2 points · core 0 of 2\n"
        "   1  shortest  failed       0 of 2\n"
        "        shortest([3, 4]) must be 3; yours is 4\n"
        "  next: exercise 1 (shortest), core, 10 min\n"
        "\n"
        "All lessons: ███░░░░░░░ 33 % · 2 of 6 points · 35 min done, 25 min left\n"
        "Next: 01 Geometry of high-dimensional space, exercise 2 (longest), core, 10 min\n"
        "Open now: 01. The roadmap: work/index.ipynb\n"
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return len(x", "the cell of the exercise itself failed: SyntaxError: incomplete input"),
        ("import os; os._exit(3)", "ended the kernel (a crash, or an exit); a new one was started"),
        ("return helper(x)", "NameError: name 'helper' is not defined"),
    ],
)
def test_other_ends(project, capsys, body, sentence) -> None:
    course.answer(project, norm=body)
    said = run(project, capsys, lesson="1")
    assert re.search(r"1  norm     failed +0 of 2\n +" + re.escape(sentence), said)


def test_an_exercise_that_needs_another(project, capsys) -> None:
    course.answer(project, longest="return norm(x) and max(x)")
    said = run(project, capsys, lesson="1")
    assert (
        "2  longest  failed       0 of 2\n        a line that says `your turn` is left, here or in an exercise" in said
    )


def test_nothing_is_run_before_anything_is_written(project, capsys, monkeypatch) -> None:
    monkeypatch.setattr(check, "run_checks", None)
    said = run(project, capsys)
    assert said.startswith("not begun: 01, 02\n")
    assert "not begun    0 of 2" in run(project, capsys, lesson="02")


def test_only_what_changed_is_run_again(project, capsys, monkeypatch) -> None:
    ran = []

    def record(cells, *others):
        ran.append([cell.id for cell in cells])
        return []

    monkeypatch.setattr(check, "run_checks", record)
    course.answer(project, norm=MINE)
    run(project, capsys)
    run(project, capsys)
    assert len(ran) == 1
    assert "setup" not in ran[0]
    assert not any(name.startswith("experiment") for name in ran[0])
    run(project, capsys, lesson="01")  # by name: always
    course.answer(project, longest="return max(x)")
    run(project, capsys)
    assert len(ran) == 3


def test_an_older_copy_is_checked_as_the_lesson_is_now(project, changed, capsys) -> None:
    path = course.answer(project, norm=MINE)
    before = path.read_bytes()
    course.change_lesson(project, changed)
    said = run(project, capsys, lesson="01")
    assert "1  norm      passed       2 of 2" in said
    assert "2  shortest  not begun    0 of 2 (more)" in said
    assert "core 2 of 2 · more 0 of 2" in said
    assert path.read_bytes() == before


def test_what_cannot_be_read_is_said_and_costs_nothing_else(project, capsys) -> None:
    course.answer(project, TWO, shortest="return min(x)")
    broken = project / "work" / f"{ONE}.ipynb"
    broken.write_text("<<<<<<< HEAD", encoding="utf-8")
    os.utime(broken, (0, 0))
    said = run(project, capsys)
    assert f"could not be run: work/{ONE}.ipynb: the file has git's marks of a merge conflict" in said
    assert "1  shortest  passed       2 of 2" in said


def test_a_damaged_record_is_made_again(project, capsys) -> None:
    course.answer(project, norm=MINE)
    said = run(project, capsys)
    for damage in ("", "{", f'{{"lessons": {{"{ONE}": {{"exercises": 3}}}}}}', '{"lessons": []}'):
        (project / "work" / ".progress.json").write_text(damage, encoding="utf-8")
        assert run(project, capsys) == said


def test_a_lesson_that_there_is_not(project, capsys) -> None:
    assert check_work("77", root=project) == 2
    assert 'there is no lesson "77"' in capsys.readouterr().err


# --- the roadmap ----------------------------------------------------------------------------------------------


def test_the_roadmap_shows_it(project, capsys) -> None:
    course.answer(project, norm=MINE, longest="return max(x)")
    course.answer(project, TWO, shortest="return max(x)")
    run(project, capsys)
    cells = course.texts(project / "work" / "index.ipynb")
    assert "| **All lessons** | ██████░░░░ 66 % | 4 of 6 | 45 min done, 15 min left |" in cells[0]
    assert f"**Next**: [Automatic differentiation and computation graphs]({TWO}.ipynb), exercise 1" in cells[0]
    page = "\n".join(cells)
    assert f"| 01 | [Geometry of high-dimensional space]({ONE}.ipynb) | ██████████ 100 % | 4 of 4 |" in page
    assert "0 min left | **done** |" in page
    assert "| 0 of 2 | 0 of 2 | 0 min done, 15 min left | **open** |" in page
    assert "██████░░░░ 66 % · 4 of 6 points · 45 min done, 15 min left" in page
    svg = base64.b64decode(re.search(r"base64,([\w+/=]+)", page).group(1)).decode()
    assert svg.count('height="6"') == 1
    for link in re.findall(r"\]\((stage[^)]+)\)", page):
        assert (project / "work" / link).is_file()


def test_lab_draws_it_too_and_without_a_record_nothing_is_done(project) -> None:
    page = "\n".join(course.texts(project / "work" / "index.ipynb"))
    assert "░░░░░░░░░░ 0 %" in page
    assert "| **open** |" in page
    assert "| after 01 |" in page
    assert (project / "work" / "notation.ipynb").is_file()


def make(number: int, **status: str) -> Progress:
    """A lesson whose exercises are named by what was found of them."""
    lesson = Progress(catalog.BY_NUMBER[number], (60, 60))
    for name, found in status.items():
        path = "more" if name.startswith("more") else "core"
        lesson.exercises.append(CourseExercise(name, "1", 10, path, 1))
        lesson.found[name] = Finding(found)
    return lesson


def test_what_is_open_follows_from_the_core_of_what_stands_before() -> None:
    one, two = make(1, a="passed", more_b="not begun"), make(2, a="failed")
    five, seven, nine = make(5, a="not begun"), make(7, a="not begun"), make(9, a="not begun")
    lessons = [one, two, five, seven, nine]
    assert [entry.number for entry in find_closed(two, lessons)] == []
    assert [entry.number for entry in find_closed(five, lessons)] == [2]
    assert [entry.number for entry in find_closed(nine, lessons)] == []  # 08 is not written
    assert find_next(lessons) is two  # begun
    two.found["a"] = Finding("passed")
    assert find_next(lessons) is five
    for lesson in (five, seven, nine):
        lesson.found["a"] = Finding("passed")
    assert find_next(lessons) is one  # what is not core comes last
    one.found["more_b"] = Finding("passed")
    assert find_next(lessons) is None


@pytest.mark.parametrize(
    ("share", "bar"),
    [
        (0, "░░░░░░░░░░ 0 %"),
        (0.001, "█░░░░░░░░░ 1 %"),
        (0.5, "█████░░░░░ 50 %"),
        (0.999, "█████████░ 99 %"),
        (1, "██████████ 100 %"),
    ],
)
def test_a_bar_is_full_or_empty_only_where_it_is_true(share, bar) -> None:
    assert draw_bar(share) == bar


def test_the_record_of_other_lessons_stays(project, capsys) -> None:
    course.answer(project, norm=MINE)
    course.answer(project, TWO, shortest="return min(x)")
    run(project, capsys, lesson="01")
    run(project, capsys, lesson="02")
    assert "4 of 6 points" in run(project, capsys)
    assert Work(project).find_copy(ONE).is_file()


def test_modules_beside_the_copy_are_there_as_in_grading(project, capsys) -> None:
    path = course.answer(project, norm="from helpers import length\n    return length(x)")
    helpers = path.parent / "helpers.py"
    helpers.write_text("def length(x):\n    return 5 if x == [3, 4] else 0\n", encoding="utf-8")
    assert "norm     passed" in run(project, capsys)
    helpers.write_text("def length(x):\n    return 0\n", encoding="utf-8")  # nothing but this has changed
    assert "norm     failed" in run(project, capsys)


def test_an_experiments_results_are_told_and_its_imports_run_in_their_place(project, capsys) -> None:
    path = course.answer(project, norm="return FIVE", longest="return max(Counter(x))")
    notebook = course.read(path)
    (experiment,) = [cell for cell in notebook["cells"] if "experiment" in cell["metadata"].get("tags", [])]
    course.set_text(experiment, "from collections import Counter\nFIVE = 5")
    course.write(path, notebook)
    said = run(project, capsys)
    assert "FIVE is made in an experiment (FIVE = 5), and experiments are not run in grading" in said
    assert "Counter is made in an experiment's imports (from collections import Counter), further down" in said
