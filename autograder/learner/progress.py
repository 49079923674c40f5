"""How far a learner is: what `check` found, kept in work/.progress.json, and the roadmap that shows it."""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autograder import catalog
from autograder.catalog import Entry
from autograder.grading.rebuild import find_exercise
from autograder.layout import write
from autograder.learner.work import Work
from autograder.notebooks import dumps, format_minutes, make_prose_notebook, seal
from autograder.roadmap import ALT, draw_roadmap, show_gray
from autograder.templating import render

HEAD = re.compile(r"# Exercise (\d+) \(([a-z0-9_]+)\) .*?· ([\d.]+) min · (core|more)")
PASSED, FAILED, NOT_BEGUN = "passed", "failed", "not begun"
BAR = 10  # characters


@dataclass
class CourseExercise:
    name: str
    number: str
    minutes: float
    path: str
    points: float = 0


@dataclass
class Finding:
    """The state of an exercise: `passed`, `failed` with the sentence of its check, or `not begun`."""

    status: str = NOT_BEGUN
    score: float = 0
    message: str = ""


@dataclass
class Standing:
    """A lesson, or many together: points and minutes, those that are done and all."""

    score: float = 0
    points: float = 0
    core_score: float = 0
    core_points: float = 0
    minutes_done: float = 0
    minutes: float = 0

    def add(self, other: "Standing") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def share(self) -> float:
        """The share of the points, from 0 to 1."""
        return self.score / self.points if self.points else 0.0

    def describe_points(self) -> str:
        return f"{self.score:g} of {self.points:g}"

    def describe_core(self) -> str:
        return f"{self.core_score:g} of {self.core_points:g}"

    def describe_time(self) -> str:
        done, left = round_to_five(self.minutes_done), round_to_five(self.minutes) - round_to_five(self.minutes_done)
        return f"{format_minutes(done) or '0 min'} done, {format_minutes(left) or '0 min'} left"


@dataclass
class Progress:
    """A lesson of the course, and what was found of it."""

    entry: Entry
    minutes: tuple[int, int]  # core, whole
    exercises: list[CourseExercise] = field(default_factory=list)
    found: dict[str, Finding] = field(default_factory=dict)

    def find(self, exercise: CourseExercise) -> Finding:
        return self.found.get(exercise.name, Finding())

    @property
    def begun(self) -> bool:
        return any(self.find(exercise).status != NOT_BEGUN for exercise in self.exercises)

    @property
    def core_done(self) -> bool:
        return all(self.find(e).status == PASSED for e in self.exercises if e.path == "core")

    @property
    def next(self) -> CourseExercise | None:
        """The first exercise that does not pass, core ones first; None where all do."""
        left = [e for e in self.exercises if self.find(e).status != PASSED]
        return min(left, key=lambda exercise: exercise.path != "core", default=None)

    @property
    def standing(self) -> Standing:
        """Reading counts as done in the share of the exercises' minutes that are."""
        made = Standing(minutes=self.minutes[1])
        passed = 0.0
        for exercise in self.exercises:
            found = self.find(exercise)
            made.score += found.score
            made.points += exercise.points
            if exercise.path == "core":
                made.core_score += found.score
                made.core_points += exercise.points
            passed += exercise.minutes * (found.status == PASSED)
        made.minutes_done = self.minutes[1] * passed / (sum(e.minutes for e in self.exercises) or 1)
        return made


def round_to_five(minutes: float) -> int:
    """The nearest multiple of five minutes."""
    return 5 * round(minutes / 5)


# --- reading and keeping ----------------------------------------------------------------------------------------


def make_progress(key: str, text: str) -> Progress:
    """A lesson's exercises, times and points, from its notebook in course/."""
    notebook = json.loads(text)
    minutes = notebook["metadata"]["llm40"]["minutes"]
    lesson = Progress(catalog.BY_KEY[key], (minutes["core"], minutes["whole"]))
    by_name = {}
    for cell in notebook["cells"]:
        marks = cell["metadata"].get("nbgrader", {})
        head = HEAD.match("".join(cell["source"]))
        if marks.get("solution") and head:
            number, name, took, path = head.groups()
            by_name[name] = CourseExercise(name, number, float(took), path)
        elif marks.get("grade") and find_exercise(marks["grade_id"]) in by_name:
            by_name[find_exercise(marks["grade_id"])].points += marks["points"]
    lesson.exercises = list(by_name.values())
    return lesson


def read_records(work: Work) -> dict[str, dict]:
    """Lesson → what was kept of it; nothing where the file is damaged: `check` finds it again."""
    try:
        records = json.loads((work.folder / ".progress.json").read_text(encoding="utf-8"))["lessons"]
        return {key: record for key, record in records.items() if _read_found(record) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_found(record: dict) -> dict[str, Finding] | None:
    try:
        return {name: Finding(**value) for name, value in record["exercises"].items()}
    except (KeyError, TypeError, AttributeError):
        return None


def keep_records(work: Work, records: Mapping[str, dict]) -> None:
    """Puts these in the place of the records of the same lessons; call it with the lock."""
    kept = {**read_records(work), **records}
    text = json.dumps({"lessons": kept}, indent=1, ensure_ascii=False, sort_keys=True)
    write(work.folder / ".progress.json", text + "\n")


def read_progress(work: Work) -> list[Progress]:
    """All written lessons, with what was found last."""
    records = read_records(work)
    lessons = []
    for key in work.list_lessons():
        lesson = make_progress(key, work.read_course(key))
        lesson.found = _read_found(records.get(key, {})) or {}
        lessons.append(lesson)
    return lessons


def find_closed(lesson: Progress, lessons: Iterable[Progress]) -> list[Entry]:
    """The lessons that should be done before, and are not; those that are not written keep nobody waiting."""
    open_cores = {other.entry.number: other.entry for other in lessons if not other.core_done}
    return [open_cores[number] for number in lesson.entry.requires if number in open_cores]


def find_next(lessons: list[Progress]) -> Progress | None:
    """The lesson to go on with: one that was begun, else the first that is open; the core of all before the rest."""
    unfinished = [lesson for lesson in lessons if lesson.next]
    core = [lesson for lesson in unfinished if not lesson.core_done]
    begun = [lesson for lesson in core if lesson.begun]
    ready = [lesson for lesson in core if not find_closed(lesson, lessons)]
    return next(iter([*begun, *ready, *core, *unfinished]), None)


# --- showing ----------------------------------------------------------------------------------------------------


def draw_bar(share: float) -> str:
    """`████░░░░░░ 40 %`: full only where nothing is missing."""
    filled = int(share * BAR) if share < 1 else BAR
    filled = max(filled, 1) if share > 0 else 0
    percent = min(max(int(100 * share), int(share > 0)), 99 if share < 1 else 100)
    return f"{'█' * filled}{'░' * (BAR - filled)} {percent} %"


def sum_up(lessons: Iterable[Progress]) -> Standing:
    total = Standing()
    for lesson in lessons:
        total.add(lesson.standing)
    return total


def describe_next(lesson: Progress) -> str:
    """`exercise 3 (sdpa), core, 15 min`"""
    exercise = lesson.next
    if exercise is None:
        return ""
    return f"exercise {exercise.number} ({exercise.name}), {exercise.path}, {exercise.minutes:g} min"


def make_work_index(lessons: list[Progress]) -> dict:
    """The roadmap with a learner's progress, as nbformat's JSON."""
    by_number = {lesson.entry.number: lesson for lesson in lessons}
    svg = draw_roadmap(set(by_number), {number: lesson.standing.share for number, lesson in by_number.items()})
    stages = []
    for stage in catalog.STAGES:
        entries = [entry for entry in catalog.LESSONS if entry.stage == stage]
        own = [by_number[entry.number] for entry in entries if entry.number in by_number]
        rows = [_make_progress_row(entry, by_number.get(entry.number), lessons) for entry in entries]
        total = sum_up(own)
        told = f"{draw_bar(total.share)} · {total.describe_points()} points · {total.describe_time()}" if own else ""
        stages.append((stage, told, rows))
    total = sum_up(lessons)
    following = find_next(lessons)
    text = render(
        "work_index.md.j2",
        all={
            "bar": draw_bar(total.share),
            "points": total.describe_points(),
            "time": total.describe_time(),
            "core_bar": draw_bar(total.core_score / total.core_points if total.core_points else 0.0),
            "core_points": total.describe_core(),
        },
        next=following and f"{_link(following.entry)}, {describe_next(following)}",
        picture="data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        alt=ALT,
        stages=stages,
    )
    return make_prose_notebook("roadmap", text.split("\n---\n"))


def _link(entry: Entry) -> str:
    return f"[{entry.title}]({entry.key}.ipynb)"


def _make_progress_row(entry: Entry, lesson: Progress | None, lessons: list[Progress]) -> list[str]:
    if lesson is None:
        told = (f"{entry.number:02}", entry.title, "not written yet", "", "", "", "")
        return [show_gray(text) for text in told]
    standing = lesson.standing
    closed = ", ".join(f"{other.number:02}" for other in find_closed(lesson, lessons))
    state = "**done**" if not lesson.next else "core done" if lesson.core_done else ""
    state = state or (f"after {closed}" if closed else "**open**")
    return [
        f"{entry.number:02}",
        _link(entry),
        draw_bar(standing.share),
        standing.describe_points(),
        standing.describe_core(),
        standing.describe_time(),
        state,
    ]


def draw_index(work: Work) -> list[Progress]:
    """Draws the pages of work/ anew; call it with the lock."""
    lessons = read_progress(work)
    work.write_page("index", dumps(seal(make_work_index(lessons))))
    notation = work.layout.course / "notation.ipynb"
    if notation.is_file():
        work.write_page("notation", work.read_course("notation"))
    return lessons
