"""One submission graded: bytes in, bytes out. A task knows no file, no gradebook and no other submission.

So it can run in any process, on any machine; what it needs is in it, and what it found is in its result.
"""

import time
import traceback
from dataclasses import dataclass, field
from functools import lru_cache

import nbformat
from nbformat import NotebookNode

from autograder.execute import Limits, Managers, Outcome, Step, execute
from autograder.grading import integrity
from autograder.grading.rebuild import Unreadable, exercise_of, name, read_submission, rebuild, role
from autograder.kernels.guardian import Lesson
from autograder.kernels.manager import Kernels
from autograder.lesson import python_of

MESSAGE_LINES, MESSAGE_CHARS = 4, 500
WAITING = ("to grade", "withheld")  # checks whose score a person gives


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be graded. `submission` is None where the student handed in nothing for this lesson."""

    student: str
    stage: str
    lesson: str
    submission: bytes | None
    master: bytes  # the notebook without answers, with its hidden tests
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    kernels: Managers = field(default_factory=Kernels)


@dataclass
class Check:
    """One check's verdict: `passed`, `failed`, `stub`, `timeout`, `crashed`, `not run`, or `withheld`: passed in a
    submission that bent what judges it, so that a person decides.

    A written answer that a person grades is here too: `to grade`, or `stub` where nothing was written. The gradebook
    makes it `by hand` once a person has given a score.
    """

    exercise: str
    check: str
    points: float
    score: float
    status: str
    message: str = ""


@dataclass
class Result:
    """What came out.

    `status` is `graded`; `unreadable` or `missing`, with zero points; `incomplete` where a limit of the notebook left
    checks unrun; `withheld` where points wait for a person, as the submission bent what judges it; or `fault`, when the
    grader itself failed: then there is no score. The flags say why.
    """

    student: str
    stage: str
    lesson: str
    status: str
    seconds: float = 0.0
    cell_seconds: float = 0.0  # of them those in which cells ran
    flags: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notebook: bytes | None = None  # as it was run, with its outputs
    traceback: str = ""  # of a fault
    late_penalty: float = 0.0  # points, put in by the gradebook

    @property
    def score(self) -> float:
        return max(0.0, sum(check.score for check in self.checks) - self.late_penalty)

    @property
    def waits(self) -> bool:
        """Whether a person has still to decide on points."""
        return any(check.status in WAITING for check in self.checks)

    @property
    def max_score(self) -> float:
        return sum(check.points for check in self.checks)


@lru_cache(64)
def _lesson(master: bytes) -> Lesson:
    return integrity.lesson_of(parse(master))


def parse(notebook: bytes) -> NotebookNode:
    return nbformat.reads(notebook.decode(), as_version=4)


def grade(task: Task) -> Result:
    """Grades one submission. Never raises: what fails here of ours is a result too, `fault`."""
    began = time.monotonic()
    result = Result(task.student, task.stage, task.lesson, "graded")
    try:
        _grade(task, result)
    except Exception:
        result.status = "fault"
        result.flags.append("the grader failed: " + traceback.format_exc().strip().split("\n")[-1])
        result.traceback = traceback.format_exc()
    result.seconds = time.monotonic() - began
    return result


def _grade(task: Task, result: Result) -> None:
    master = parse(task.master)
    if task.submission is None:
        result.status = "missing"
        _nothing(master, result, "not handed in")
        return
    try:
        cells, flags = read_submission(task.submission)
    except Unreadable as error:
        result.status = "unreadable"
        result.flags.append(str(error))
        _nothing(master, result, str(error))
        master.cells.insert(0, nbformat.v4.new_markdown_cell(f"This submission was not run: {error}.", id="unreadable"))
        result.notebook = nbformat.writes(master).encode()
        return
    released = {name(cell): cell.source for cell in master.cells}
    lesson = _lesson(task.master)
    notebook, more = rebuild(master, cells)
    result.flags += flags + more
    caught = integrity.suspicious(notebook)

    to_run = [c for c in notebook.cells if c.cell_type == "code" and role(c) != "experiment" and c.source.strip()]
    outcomes = execute([_step(cell, lesson) for cell in to_run], task.limits, task.seed, task.kernels, lesson)
    result.cell_seconds = sum(outcome.seconds for outcome in outcomes)
    for cell, outcome in zip(to_run, outcomes, strict=True):
        cell.outputs = nbformat.from_dict(outcome.outputs)
        cell.execution_count = outcome.count
        if outcome.status in ("timeout", "died"):
            result.flags.append(f"{name(cell)}: {_accident(outcome, task.limits)}")
        elif role(cell) == "plain" and outcome.status == "error":
            result.flags.append(f"{name(cell)}: this cell of ours raised {_said(outcome)}")

    exercises = {}
    for cell, outcome in zip(to_run, outcomes, strict=True):
        if role(cell) == "exercise":
            exercises[name(cell)] = outcome
        elif role(cell) == "check":
            result.checks.append(_judge(cell, outcome, exercises, task.limits))
    caught += integrity.flags_of(report for outcome in outcomes for report in outcome.reports)
    _withhold(result, caught)
    for cell in notebook.cells:
        if by_hand(cell):
            written = cell.source.strip() != released[name(cell)].strip()
            points = float(cell.metadata.nbgrader.points)
            result.checks.append(Check(name(cell), name(cell), points, 0.0, "to grade" if written else "stub"))
    unrun = [outcome for outcome in outcomes if outcome.status == "not run"]
    if unrun:
        result.status = "incomplete"
        result.flags.append(f"{len(unrun)} cells were not run: {unrun[0].evalue}")
    result.notebook = nbformat.writes(notebook).encode()


def _step(cell: NotebookNode, lesson: Lesson) -> Step:
    """A learner's cell runs as it stands; ours have a name, and a check is armed."""
    kind, source = role(cell), cell.source
    if kind not in ("plain", "check"):
        return Step(source)
    armed = integrity.armed(source, name(cell), lesson.theirs, lesson.helpers) if kind == "check" else b""
    return Step(python_of(source), kind == "check", name(cell), armed, integrity.counts_calls(source))


def _withhold(result: Result, caught: list[str]) -> None:
    """A submission that was caught keeps no points by itself: they wait for a person."""
    caught += [f"{check.check}: {check.message}" for check in result.checks if check.status == "withheld"]
    if not caught:
        return
    for check in result.checks:
        if check.status == "passed":
            check.score, check.status, check.message = 0.0, "withheld", f"passed, but {caught[0]}"
    points = sum(check.points for check in result.checks if check.status == "withheld")
    if points:
        result.status = "withheld"
        caught.insert(0, f"withheld: {points:g} points wait for a person's decision")
    result.flags[:0] = caught


def by_hand(cell: NotebookNode) -> bool:
    """Whether a cell is a written answer with points."""
    return role(cell) == "answer" and bool(cell.metadata.get("nbgrader", {}).get("grade"))


def _nothing(master: NotebookNode, result: Result, reason: str) -> None:
    """No submission to run: every check is there, with no points."""
    for cell in master.cells:
        if role(cell) == "check" or by_hand(cell):
            points = float(cell.metadata.nbgrader.points)
            result.checks.append(Check(exercise_of(name(cell)), name(cell), points, 0.0, "not run", reason))


def _judge(cell: NotebookNode, outcome: Outcome, exercises: dict[str, Outcome], limits: Limits) -> Check:
    """The verdict: a check that raises gives nothing, one that does not gives all; what it prints is nothing to us."""
    points = float(cell.metadata.nbgrader.points)
    check = Check(exercise_of(name(cell)), name(cell), points, 0.0, "failed")
    if outcome.status == "ok":
        check.score, check.status = points, "passed"
        return check
    if outcome.status in ("timeout", "died"):
        check.status = "timeout" if outcome.status == "timeout" else "crashed"
        check.message = _accident(outcome, limits)
    elif outcome.status == "not run":
        check.status, check.message = "not run", outcome.evalue
    elif outcome.ename == "NotImplementedError":
        check.status, check.message = "stub", "not written yet"
    elif outcome.ename == "Bent":
        check.status, check.message = "withheld", _said(outcome).removeprefix("Bent: ")
    else:
        check.message = _said(outcome)
    exercise = exercises.get(check.exercise)
    if exercise and exercise.status in ("error", "timeout", "died"):
        cause = _said(exercise) if exercise.status == "error" else _accident(exercise, limits)
        check.message = f"the cell of the exercise itself failed: {cause}"
    return check


def _accident(outcome: Outcome, limits: Limits) -> str:
    if outcome.status == "timeout":
        return f"stopped after {outcome.seconds:.0f} s (limit {limits.cell:g} s): is there a loop that does not end?"
    return "ended the kernel (a crash, or an exit); a new one was started"


def _said(outcome: Outcome) -> str:
    """The first lines of what was raised; an assertion speaks for itself, other exceptions with their name."""
    lines = [line.rstrip() for line in outcome.evalue.strip().split("\n") if line.strip()][:MESSAGE_LINES]
    text = "\n".join(lines)[:MESSAGE_CHARS]
    if outcome.ename == "AssertionError" and text:
        return text
    return (f"{outcome.ename}: {text}" if text else outcome.ename)[:MESSAGE_CHARS]
