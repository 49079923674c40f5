"""What became of a check, in a word and a sentence."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from nbformat import NotebookNode

from autograder.execute import Outcome
from autograder.grading.rebuild import find_exercise, read_name
from autograder.kernels.limits import Limits

MESSAGE_LINES, MESSAGE_CHARS = 4, 500
UNKNOWN = re.compile(r"name '(\w+)' is not defined")


@dataclass
class Check:
    """One check's verdict: `passed`, `failed`, `stub`, `timeout`, `crashed`, `not run`, or `withheld` (a person has to
    choose between two files first). `counted`: it rests on something that was counted in the learner's own process
    (allocations, calls of PyTorch's functions).

    A written answer that a person grades is here too: `to grade`, or `stub` where nothing was written. The gradebook
    makes it `by hand` once a person has given a score.
    """

    exercise: str
    check: str
    points: float
    score: float
    status: str
    message: str = ""
    counted: bool = False


def judge_check(
    cell: NotebookNode,
    outcome: Outcome,
    exercises: dict[str, Outcome],
    limits: Limits,
    origin: Callable[[str, str], str] = lambda name, asked_by: "",
) -> Check:
    """The verdict: a check that raises gives no points, one that does not gives all; its output does not count.

    `origin` takes a name that is not defined and the cell that asks for it, and says where the name is made.
    """
    points = float(cell.metadata.nbgrader.points)
    check = Check(find_exercise(read_name(cell)), read_name(cell), points, 0.0, "failed", counted=outcome.counted)
    if outcome.status == "ok":
        check.score, check.status = points, "passed"
        return check
    if outcome.status in ("timeout", "died"):
        check.status = "timeout" if outcome.status == "timeout" else "crashed"
        check.message = tell_accident(outcome, limits)
    elif outcome.status == "not run":
        check.status, check.message = "not run", outcome.evalue
    elif outcome.ename == "NotImplementedError":
        check.status, check.message = "stub", "not written yet"
    else:
        check.message = tell_error(outcome)
    exercise = exercises.get(check.exercise)
    if exercise and exercise.status in ("error", "timeout", "died"):
        cause = tell_error(exercise) if exercise.status == "error" else tell_accident(exercise, limits)
        check.message = f"the cell of the exercise itself failed: {cause}"
        outcome = exercise
    unknown = UNKNOWN.search(outcome.evalue) if outcome.ename == "NameError" else None
    why = origin(unknown[1], check.exercise) if unknown else ""
    if why:
        check.message = f"{check.message[: MESSAGE_CHARS - len(why) - 1]}\n{why}"
    return check


def tell_accident(outcome: Outcome, limits: Limits) -> str:
    if outcome.status == "timeout":
        return f"stopped after {outcome.seconds:.0f} s (limit {limits.cell:g} s): is there a loop that does not end?"
    why = outcome.evalue or "a crash, or an exit"
    return f"ended the kernel ({why}); a new one was started"


def tell_error(outcome: Outcome) -> str:
    """The first lines of what was raised; an assertion speaks for itself, other exceptions with their name."""
    lines = [line.rstrip() for line in outcome.evalue.strip().split("\n") if line.strip()][:MESSAGE_LINES]
    text = "\n".join(lines)[:MESSAGE_CHARS]
    if outcome.ename == "AssertionError" and text:
        return text
    return (f"{outcome.ename}: {text}" if text else outcome.ename)[:MESSAGE_CHARS]
