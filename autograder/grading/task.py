"""Grades one submission: bytes in, bytes out. A task knows no file, no gradebook and no other submission.

So it can run in any process, on any machine; all that it needs is in it, and all that it finds is in its result.
"""

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

import nbformat
from nbformat import NotebookNode

from autograder.execute import Limits, Managers, Step, execute
from autograder.grading.clerk import read_submission_safely
from autograder.grading.origins import Origins
from autograder.grading.rebuild import NEWER, Unreadable, find_exercise, is_run, read_name, read_role, rebuild
from autograder.grading.verdicts import Check, judge_check, tell_accident, tell_error
from autograder.judge.sources import find_bound_names
from autograder.kernels.manager import Kernels
from autograder.lesson import BEGIN_HIDDEN, python_of

WAITING = ("to grade", "withheld")  # checks whose score a person gives


@dataclass(frozen=True, eq=False)
class Task:
    """A submission to grade. `submission` is None where the student handed in nothing for this lesson.

    `files` lie beside the notebook: place → content.
    """

    student: str
    stage: str
    lesson: str
    submission: bytes | None
    master: bytes  # the notebook without answers, with its hidden tests
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    kernels: Managers = field(default_factory=Kernels)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Result:
    """The result of a task.

    `status` is `graded`; `unreadable` or `missing`, with zero points; `incomplete` where a limit of the notebook left
    checks unrun; `withheld` where a person has to choose between files; or `fault`, when the grader itself failed: then
    there is no score. The flags say why.
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


def parse(notebook: bytes) -> NotebookNode:
    return nbformat.reads(notebook.decode(), as_version=4)


def grade_task(task: Task) -> Result:
    """Grades one submission. Never raises: a failure of the grader is a result too, `fault`."""
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
        _add_unrun_checks(master, result, "not handed in")
        return
    try:
        cells, flags = read_submission_safely(task.submission)
    except Unreadable as error:
        result.status = "unreadable"
        result.flags.append(str(error))
        _add_unrun_checks(master, result, str(error))
        master.cells.insert(0, nbformat.v4.new_markdown_cell(f"This submission was not run: {error}.", id="unreadable"))
        result.notebook = nbformat.writes(master).encode()
        return
    released = {read_name(cell): cell.source for cell in master.cells}
    asked = master.metadata.get("llm40", {}).get("asked", {})
    defined = master.metadata.get("llm40", {}).get("defined", {})
    notebook, more = rebuild(master, cells, experiments=True)
    result.flags += flags + more

    to_run = [cell for cell in notebook.cells if is_run(cell)]
    steps = make_steps(to_run, asked, defined, task.files)
    outcomes = execute(steps, task.limits, task.seed, task.kernels, judging=True, files=task.files)
    result.cell_seconds = sum(outcome.seconds for outcome in outcomes)
    if not any(outcome.ename == "SyntaxError" for outcome in outcomes):
        result.flags = [flag for flag in result.flags if not flag.startswith(NEWER)]
    for cell, outcome in zip(to_run, outcomes, strict=True):
        cell.outputs = nbformat.from_dict(outcome.outputs)
        cell.execution_count = outcome.count
        if outcome.status in ("timeout", "died"):
            result.flags.append(f"{read_name(cell)}: {tell_accident(outcome, task.limits)}")
        elif read_role(cell) == "plain" and outcome.status == "error":
            result.flags.append(f"{read_name(cell)}: this cell of the course's raised {tell_error(outcome)}")

    exercises = {}
    origins = Origins(list(zip(to_run, outcomes, strict=True)), cells, notebook.cells)
    for cell, outcome in zip(to_run, outcomes, strict=True):
        if read_role(cell) == "exercise":
            exercises[read_name(cell)] = outcome
        elif read_role(cell) == "check":
            result.checks.append(judge_check(cell, outcome, exercises, task.limits, origins))
    for cell in notebook.cells:
        if is_graded_by_hand(cell):
            written = cell.source.strip() != released[read_name(cell)].strip()
            points = float(cell.metadata.nbgrader.points)
            result.checks.append(
                Check(read_name(cell), read_name(cell), points, 0.0, "to grade" if written else "stub")
            )
    unrun = [outcome for outcome in outcomes if outcome.status == "not run"]
    if unrun:
        result.status = "incomplete"
        result.flags.append(f"{len(unrun)} cells were not run: {unrun[0].evalue}")
    result.notebook = nbformat.writes(notebook).encode()


def make_steps(
    cells: list[NotebookNode],
    asked: dict[str, list[str]],
    defined: dict[str, dict],
    files: Mapping[str, bytes] | None = None,
) -> list[Step]:
    """The steps that run these cells: a learner's cell as it stands, an instructor's also in the judge."""
    steps, known, answers, added = [], set(), {}, []
    modules = [data.decode(errors="replace") for name, data in (files or {}).items() if name.endswith(".py")]
    for cell in cells:
        kind = read_role(cell)
        if kind not in ("plain", "check"):
            known |= set(asked.get(read_name(cell), ()))
            if kind == "exercise":
                answers[read_name(cell)] = python_of(cell.source)
            else:
                added.append(find_python(cell.source))
            steps.append(Step(cell.source))
            continue
        python = python_of(cell.source)
        if kind == "plain":
            known -= find_bound_names(python)
            steps.append(Step(cell.source, "given", read_name(cell), python))
        else:
            hidden = python[: python.find(BEGIN_HIDDEN)].count("\n") + 1 if BEGIN_HIDDEN in python else 0
            written = (answers.get(find_exercise(read_name(cell)), ""), *added, *modules)
            names = tuple(sorted(known))
            steps.append(Step(cell.source, "check", read_name(cell), python, names, hidden, written, defined))
    return steps


def find_python(source: str) -> str:
    """The Python in a learner's cell, also where a magic stands above it: `%%writefile helpers.py`."""
    first, _, rest = source.lstrip().partition("\n")
    return python_of(rest if first.startswith("%%") else source)


def is_graded_by_hand(cell: NotebookNode) -> bool:
    """Whether a cell is a written answer with points."""
    return read_role(cell) == "answer" and bool(cell.metadata.get("nbgrader", {}).get("grade"))


def _add_unrun_checks(master: NotebookNode, result: Result, reason: str) -> None:
    """Adds every check with no points, where there is no submission to run."""
    for cell in master.cells:
        if read_role(cell) == "check" or is_graded_by_hand(cell):
            points = float(cell.metadata.nbgrader.points)
            result.checks.append(Check(find_exercise(read_name(cell)), read_name(cell), points, 0.0, "not run", reason))
