"""What an instructor gets beside grades: tables for other systems, penalties for lateness, answers that are alike."""

import csv
import shutil
from datetime import UTC, datetime

import pytest
import tiny
from nbgrader.api import Gradebook

from autograder.execute import Limits
from autograder.grading import exports, similarity
from autograder.grading.grade import grade_folder
from autograder.grading.late import BadConfig, read_penalty, read_time
from autograder.grading.task import Check, Result, grade_task

pytestmark = pytest.mark.xdist_group("grading")


def result(student, lesson, score, status="graded") -> Result:
    checks = [] if status == "fault" else [Check("double", "double-check-1", 10.0, score, "passed")]
    return Result(student, "stage9_tiny", lesson, status, checks=checks)


CLASS = [
    result("mei", "99_tiny", 8.5),
    result("mei", "98_more", 10.0),
    result("=cmd()", "99_tiny", 0.0),
    result("李雷", "99_tiny", 0.0, "fault"),
]


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))


def test_canvas():
    assert rows(exports.make_canvas(CLASS)) == [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "98_more", "99_tiny"],
        ["    Points Possible", "", "", "", "", "10", "10"],
        ["'=cmd()", "", "", "'=cmd()", "", "", "0"],
        ["mei", "", "", "mei", "", "10", "8.5"],
        ["李雷", "", "", "李雷", "", "", ""],  # no score of ours: Canvas leaves what stands there
    ]


def test_moodle():
    assert rows(exports.make_moodle(CLASS)) == [
        ["username", "98_more", "99_tiny"],
        ["'=cmd()", "", "0"],
        ["mei", "10", "8.5"],
        ["李雷", "", ""],
    ]


@pytest.mark.parametrize("status", ["missing", "unreadable", "withheld", "fault"])
def test_no_zero_is_exported_where_nothing_was_graded(status):
    """An import would write it over an earlier grade."""
    results = [result("mei", "99_tiny", 0.0, status), result("kim", "99_tiny", 0.0)]
    assert rows(exports.make_moodle(results))[1:] == [["kim", "0"], ["mei", ""]]
    assert [row[-1] for row in rows(exports.make_canvas(results))[2:]] == ["0", ""]


# --- lateness -------------------------------------------------------------------------------------------------

ZERO = 'c.LateSubmissionPlugin.penalty_method = "zero"\n'
PER_DAY = """
from nbgrader.plugins import BasePlugin

class PerDay(BasePlugin):
    def late_submission_penalty(self, student_id, score, total_seconds_late):
        return 3 * total_seconds_late / 86400

c.AssignLatePenalties.plugin_class = PerDay
"""


def config(folder, text):
    path = folder / "late 迟交.py"
    path.write_text("c = get_config()\n" + text, encoding="utf-8")
    return path


TOO_MUCH, A_GIFT = PER_DAY.replace("3 *", "30 *"), PER_DAY.replace("3 *", "-1 *")


@pytest.mark.parametrize(("text", "expected"), [("", 0.0), (ZERO, 8.0), (PER_DAY, 6.0), (TOO_MUCH, 8.0), (A_GIFT, 0.0)])
def test_what_lateness_costs(tmp_path, text, expected):
    penalty = read_penalty(config(tmp_path, text))
    assert penalty("mei", 8.0, 2 * 86400) == expected
    assert penalty("mei", 8.0, 0) == 0


def test_a_bad_configuration_is_named(tmp_path):
    with pytest.raises(BadConfig, match="there is no such configuration file"):
        read_penalty(tmp_path / "nowhere.py")
    with pytest.raises(BadConfig, match="ZeroDivisionError"):
        read_penalty(config(tmp_path, "1 / 0"))
    with pytest.raises(BadConfig, match="half"):
        read_penalty(config(tmp_path, 'c.LateSubmissionPlugin.penalty_method = "half"'))


def test_a_late_class(tmp_path):
    """A due date set with nbgrader, files collected by nbgrader: the gradebook, our tables and its export agree."""
    source = tiny.build(tmp_path)
    for student, when in (("mei", "2026-11-02 12:00:00 UTC"), ("kim", "2026-11-04 12:00:00 UTC")):
        path = tiny.hand_in(tmp_path / "in", student, tiny.dumps(tiny.answered()))
        (path.parent / "timestamp.txt").write_text(when, encoding="utf-8")
    late = config(tmp_path, PER_DAY)

    def graded(**options):
        results = grade_folder(
            tmp_path / "in",
            tmp_path / "out",
            source,
            limits=Limits(cell=5, notebook=30),
            engine=lambda tasks, jobs: map(grade_task, tasks),
            show=lambda line: None,
            kernels=tiny.KERNELS,
            **options,
        )
        return {r.student: r.score for r in results}

    assert graded(late=late) == {"mei": 8, "kim": 8}  # no due date yet
    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'gradebook.db'}", "llm40") as book:
        book.find_assignment(tiny.STAGE).duedate = datetime(2026, 11, 3, 12, tzinfo=UTC).replace(tzinfo=None)
        book.db.commit()
    assert graded(late=late) == {"mei": 8, "kim": 5}  # nothing was graded again, and kim is a day late
    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'gradebook.db'}", "llm40") as book:
        assert book.find_submission(tiny.STAGE, "kim").late_submission_penalty == 3
    rows = {row["student"]: row for row in csv.DictReader((tmp_path / "out" / "grades.csv").open(encoding="utf-8"))}
    assert (rows["kim"]["score"], rows["kim"]["late_penalty"]) == ("5", "3")
    page = tmp_path / "out" / "feedback" / "kim" / tiny.STAGE / f"{tiny.LESSON}.html"
    handed = tmp_path / "in" / "kim" / tiny.STAGE / "timestamp.txt"
    handed.write_text("2026-11-03 11:59:00 UTC", encoding="utf-8")  # collected again, or mended by hand
    assert graded(late=late) == {"mei": 8, "kim": 8}
    tiny.hand_in(tmp_path / "in", "kim", tiny.dumps(tiny.answered(half=f"# my own\n{tiny.HALF}")))
    handed.write_text("2026-11-05 12:00:00 UTC", encoding="utf-8")
    assert graded(late=late) == {"mei": 8, "kim": 2}
    assert "6 points less for lateness" in page.read_text(encoding="utf-8")
    assert graded() == {"mei": 8, "kim": 8}
    assert "lateness" not in page.read_text(encoding="utf-8")


DUE = datetime(2026, 11, 3, 12)


@pytest.fixture
def late_class(tmp_path):
    """A stage of two lessons, due on DUE, in which lateness costs everything; `graded()` gives (lesson → result)."""
    source = tiny.build(tmp_path)
    shutil.copy(source / tiny.STAGE / f"{tiny.LESSON}.ipynb", source / tiny.STAGE / f"{MORE}.ipynb")
    late = config(tmp_path, ZERO)

    def graded(**options):
        results = grade_folder(
            tmp_path / "in",
            tmp_path / "out",
            source,
            limits=Limits(cell=5, notebook=30),
            late=late,
            engine=lambda tasks, jobs: map(grade_task, tasks),
            show=lambda line: None,
            kernels=tiny.KERNELS,
            **options,
        )
        with Gradebook(f"sqlite:///{tmp_path / 'out' / 'gradebook.db'}", "llm40") as book:
            book.find_assignment(tiny.STAGE).duedate = DUE
            book.db.commit()
        return {r.lesson: r for r in results}

    return graded


MORE = "98_more"


def hand_in_at(folder, when: str | None, lesson=tiny.LESSON, notebook=None):
    path = tiny.hand_in(folder / "in", "mei", tiny.dumps(notebook or tiny.answered()), lesson=lesson)
    if when:
        (path.parent / "timestamp.txt").write_text(when, encoding="utf-8")


def test_what_was_on_time_stays_so_when_the_next_lesson_is_late(late_class, tmp_path):
    hand_in_at(tmp_path, "2026-11-02 10:00:00 UTC")
    late_class()
    hand_in_at(tmp_path, "2026-11-16 10:00:00 UTC", MORE)
    results = late_class()
    assert {lesson: (r.score, r.late_penalty) for lesson, r in results.items()} == {tiny.LESSON: (8, 0), MORE: (0, 8)}
    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'gradebook.db'}", "llm40") as book:
        assert book.find_submission(tiny.STAGE, "mei").timestamp == datetime(2026, 11, 16, 10)
        notebooks = {n.name: n.late_submission_penalty for n in book.find_submission(tiny.STAGE, "mei").notebooks}
        assert notebooks == {tiny.LESSON: None, MORE: 8}


def test_nor_does_it_matter_that_the_file_was_saved_again_or_everything_is_graded_again(late_class, tmp_path):
    hand_in_at(tmp_path, "2026-11-02 10:00:00 UTC")
    late_class()
    saved_again = tiny.answered()
    saved_again.cells[tiny.find(saved_again, "code-imports")].execution_count = 7
    hand_in_at(tmp_path, "2026-11-16 10:00:00 UTC", notebook=saved_again)
    assert late_class(again=True)[tiny.LESSON].score == 8
    hand_in_at(tmp_path, None, notebook=tiny.answered(half=f"# changed\n{tiny.HALF}"))
    assert late_class()[tiny.LESSON].score == 0


def test_a_time_that_comes_later_to_light_counts(late_class, tmp_path):
    """Such as one whose zone was not certain, and was put right."""
    hand_in_at(tmp_path, "2026-11-05 10:00:00 IST")
    late_class()
    assert late_class()[tiny.LESSON].score == 8
    hand_in_at(tmp_path, "2026-11-05 10:00:00 +0530")
    assert late_class()[tiny.LESSON].score == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-03 13:00:00 +0100", (12, 0)),  # as nbgrader writes it where its time zone is set
        ("2026-11-03 13:00:00.123456 +01:00", (12, 0)),
        ("2026-11-03T17:30:00+0530", (12, 0)),
        ("2026-11-03 08:15:00 -0345", (12, 0)),
        ("2026-11-03 12:00:00.123456 UTC", (12, 0)),
        ("2026-11-03 12:00 GMT", (12, 0)),
        ("2026-11-03T12:00:00Z\n", (12, 0)),
        ("2026-11-03 12:00:00 +01", (11, 0)),
    ],
)
def test_times(text, expected):
    when, trouble = read_time(text)
    assert (when.day, when.hour, when.minute) == (3, *expected)
    assert trouble == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(
            (f"2026-11-03 12:00:00 {zone}", f"the zone {zone} is not certain")
            for zone in ("IST", "JST", "CST", "EST", "BST", "CET", "UTC+8", "Asia/Shanghai")
        ),
        ("2026-11-03 12:00:00", "it has no zone"),
        ("2026-13-03 12:00:00 UTC", "that is no time"),
        ("2026-11-03 12:00:00 +9999", "that is no time"),
        ("0001-01-01 00:00:00 +0100", "that is no time"),
        ("yester\ufffdday", "that is no time"),
        ("", "that is no time"),
    ],
)
def test_a_time_that_is_not_certain_costs_nothing_and_is_told(text, words):
    assert read_time(text) == (None, words)


def test_an_uncertain_time_in_a_class(late_class, tmp_path):
    hand_in_at(tmp_path, "2026-11-16 19:50:00 CST")
    late_class()
    result = late_class()[tiny.LESSON]
    assert (result.score, result.late_penalty) == (8, 0)
    assert "the zone CST is not certain; taken as handed in on time" in result.flags[0]


# --- answers that are alike -----------------------------------------------------------------------------------

LONG = """def total(xs):
    if not len(xs):
        return 0
    best, running = xs[0], 0
    for value in xs:
        running = max(value, running + value)
        best = max(best, running)
    return best if best > running else running
"""
COPIED = LONG.replace("running", "acc").replace("value", "v").replace("    best,", "    # my own idea\n    best,")
OTHER = """def total(xs):
    import itertools
    pairs = [(i, j) for i in range(len(xs)) for j in range(i, len(xs))]
    sums = {pair: sum(itertools.islice(xs, pair[0], pair[1] + 1)) for pair in pairs}
    return sorted(sums.values(), reverse=True)[0] if sums else 0
"""
THIRD = """def total(xs):
    def halves(left, right):
        middle = (left + right) // 2
        return xs[left] if left == right else halves(left, middle) + halves(middle + 1, right)
    return halves(0, len(xs) - 1) if xs else 0
"""
GIVEN = "def total(xs):\n    raise NotImplementedError\n"


def test_a_copy_with_other_names_and_comments_is_found():
    pairs = similarity.find_alike("09", {"ann": LONG, "bob": OTHER, "cem": COPIED, "dan": THIRD}, GIVEN)
    first, second = pairs[:2]
    assert (first.first, first.second) == ("ann", "cem")
    assert first.share > 0.9
    assert second.share < 0.5
    assert first.median < 0.5


def test_stubs_are_not_alike():
    assert similarity.find_alike("09", {"ann": GIVEN, "bob": GIVEN, "cem": LONG}, GIVEN) == []


def test_code_that_does_not_parse_is_compared_too():
    broken = LONG + "\nthis is ( not python\n"
    assert similarity.find_alike("09", {"ann": LONG, "bob": broken}, GIVEN)[0].share > 0.9


def test_the_report_shows_them(tmp_path):
    source = tiny.build(tmp_path)
    for student, text in (("ann", LONG), ("bob", OTHER), ("cem", COPIED)):
        tiny.hand_in(tmp_path / "in", student, tiny.dumps(tiny.answered(total=text)))
    grade_folder(
        tmp_path / "in",
        tmp_path / "out",
        source,
        limits=Limits(cell=5, notebook=30),
        compare=True,
        engine=lambda tasks, jobs: map(grade_task, tasks),
        show=lambda line: None,
        kernels=tiny.KERNELS,
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("ann and cem") < page.index("ann and bob")
