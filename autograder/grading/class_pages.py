"""The class in pages: a grid of students by lessons, a page for each lesson and one for each student."""

import base64
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import median

from autograder.grading.masters import MasterLesson
from autograder.grading.pages import UNSAFE
from autograder.grading.similarity import SimilarPair
from autograder.grading.task import WAITING, Check, Result
from autograder.layout import write
from autograder.templating import read_template, render

MESSAGES = 5  # of an exercise, the commonest
TO_DECIDE = 50  # notebooks listed on the first page because a person must look at them
SIGNS = {"missing": "·", "unreadable": "!", "fault": "×", "withheld": "?"}  # in place of a score


@dataclass
class Points:
    """Earned and possible points of one path through a lesson, or of several lessons."""

    earned: float = 0.0
    possible: float = 0.0

    @property
    def share(self) -> float | None:
        return self.earned / self.possible if self.possible else None

    def add(self, other: "Points") -> None:
        self.earned += other.earned
        self.possible += other.possible


@dataclass
class Mark:
    """A notebook in the grid: its result, with the points of the two paths apart."""

    result: Result
    lesson: MasterLesson
    core: Points = field(default_factory=Points)
    more: Points = field(default_factory=Points)

    @property
    def sign(self) -> str:
        """The sign in the grid in place of a score; empty where there is a score."""
        return SIGNS.get(self.result.status) or ("?" if self.result.waits else "")

    @property
    def color(self) -> str:
        """A class of the style sheet: how much of the core is done."""
        if self.sign:
            return self.result.status if self.result.status in SIGNS else "withheld"
        share = self.core.share if self.core.possible else self.more.share
        return f"s{0 if not share else 1 + sum(share >= bound for bound in (0.5, 0.8, 1.0))}"

    @property
    def page(self) -> str | None:
        """The learner's page, from OUT."""
        r = self.result
        return None if r.status in ("missing", "fault") else f"feedback/{r.student}/{r.stage}/{r.lesson}.html"


@dataclass
class Row:
    """A student's line in the grid."""

    student: str
    marks: dict[str, Mark]  # lesson's key → mark
    total: Points = field(default_factory=Points)
    core: Points = field(default_factory=Points)
    more: Points = field(default_factory=Points)

    def __post_init__(self) -> None:
        for mark in self.marks.values():
            self.total.add(Points(mark.result.score, mark.result.max_score))
            self.core.add(mark.core)
            self.more.add(mark.more)

    @property
    def words(self) -> str:
        """The words that the search looks at."""
        found = dict.fromkeys(mark.result.status for mark in self.marks.values())
        if any(mark.result.flags for mark in self.marks.values()):
            found["flagged"] = None
        return " ".join([self.student, *found]).lower()


@dataclass
class ExerciseTally:
    """An exercise in a class: how its checks went, over all who handed the lesson in and whose file could be read."""

    name: str
    path: str
    passed: int = 0
    stub: int = 0
    count: int = 0
    messages: Counter = field(default_factory=Counter)

    @property
    def commonest(self) -> list[tuple[str, int]]:
        return self.messages.most_common(MESSAGES)

    def add(self, check: Check) -> None:
        self.count += 1
        self.passed += check.status == "passed"
        self.stub += check.status == "stub"
        if check.message and check.status not in ("passed", "stub"):
            self.messages[check.message] += 1


class Class:
    """A class's results, as the pages need them."""

    def __init__(self, results: Sequence[Result], lessons: Sequence[MasterLesson]):
        known = {lesson.key: lesson for lesson in lessons}
        self.marks = [_make_mark(result, known[f"{result.stage}/{result.lesson}"]) for result in results]
        by_student: dict[str, dict[str, Mark]] = defaultdict(dict)
        self.by_lesson: dict[str, list[Mark]] = defaultdict(list)
        for mark in self.marks:
            by_student[mark.result.student][mark.lesson.key] = mark
            self.by_lesson[mark.lesson.key].append(mark)
        self.lessons = [lesson for lesson in lessons if lesson.key in self.by_lesson]
        self.rows = [Row(student, marks) for student, marks in sorted(by_student.items())]

    @cached_property
    def has_more(self) -> bool:
        return any(mark.more.possible for mark in self.marks)

    @cached_property
    def stages(self) -> dict[str, int]:
        """Stage → how many of the lessons are in it."""
        return Counter(lesson.stage for lesson in self.lessons)

    @cached_property
    def to_decide(self) -> list[Mark]:
        """Notebooks that a person must look at: no score, or a part of it, before that."""
        return [mark for mark in self.marks if mark.sign and mark.result.status != "missing"]

    def find_median(self, lesson: MasterLesson) -> float | None:
        scores = [mark.result.score for mark in self.by_lesson[lesson.key] if not mark.sign]
        return median(scores) if scores else None

    def tally_exercises(self, lesson: MasterLesson) -> list[ExerciseTally]:
        """How each exercise went, in the lesson's own order."""
        found: dict[str, ExerciseTally] = {}
        for mark in self.by_lesson[lesson.key]:
            if mark.result.status not in ("graded", "incomplete", "withheld"):
                continue
            for check in mark.result.checks:
                if check.status not in (*WAITING, "by hand"):
                    path = lesson.paths.get(check.exercise, "core")
                    found.setdefault(check.exercise, ExerciseTally(check.exercise, path)).add(check)
        return list(found.values())


def _make_mark(result: Result, lesson: MasterLesson) -> Mark:
    mark = Mark(result, lesson)
    for check in result.checks:
        path = mark.more if lesson.paths.get(check.exercise) == "more" else mark.core
        path.add(Points(check.score, check.points))
    return mark


def write_class_pages(
    out: Path,
    results: Sequence[Result],
    lessons: Sequence[MasterLesson],
    notes: Sequence[str],
    seconds: float,
    unsafe: bool,
    pairs: Sequence[SimilarPair] | None = None,
) -> None:
    """Writes OUT/report.html, OUT/report/lessons/… and OUT/report/students/…, and removes pages of an earlier call.

    `notes` are files that were left out; `pairs` are answers that resemble each other, None where nobody looked.
    """
    the_class = Class(results, lessons)
    script = read_template("class_report.js").strip()
    about = {
        "the_class": the_class,
        "unsafe": UNSAFE if unsafe else "",
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    front = {"notes": notes, "seconds": seconds, "pairs": pairs, "limit": TO_DECIDE, "top": ""}
    pages = {out / "report.html": render("class_report.html.j2", **about, **front)}
    for lesson in the_class.lessons:
        place = out / "report" / "lessons" / f"{lesson.name}.html"
        pages[place] = render("class_lesson.html.j2", **about, lesson=lesson, top="../../")
    for row in the_class.rows:
        place = out / "report" / "students" / f"{row.student}.html"
        pages[place] = render("class_student.html.j2", **about, row=row, top="../../")
    for place, text in pages.items():
        write(place, text, durable=False)
    for place in (out / "report").glob("*/*.html"):
        if place not in pages:
            place.unlink()
