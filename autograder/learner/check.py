"""`make check`: a learner's notebooks, run as the grader runs them but without its hidden tests, and how far they are.

A notebook is merged with the lesson as it is now, in memory; nothing is written but the progress and the roadmap. The
code is the learner's own on their own machine: no sandbox, and checks run in the kernel as in JupyterLab.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from nbformat import NotebookNode
from tqdm import tqdm

from autograder.catalog import UsageError
from autograder.execute import GIVEN_SEED, KernelFailed, Managers, Step, execute, stop_all
from autograder.grading.origins import Origins
from autograder.grading.rebuild import (
    SubmittedCell,
    Unreadable,
    find_own_text,
    is_run,
    read_name,
    read_role,
    read_submission,
)
from autograder.grading.verdicts import Check, judge_check
from autograder.kernels.limits import Limits
from autograder.kernels.manager import Kernels
from autograder.layout import ROOT
from autograder.learner.merge import merge
from autograder.learner.progress import (
    FAILED,
    PASSED,
    Finding,
    Progress,
    describe_next,
    draw_bar,
    draw_index,
    find_closed,
    find_next,
    keep_records,
    make_progress,
    read_records,
    sum_up,
)
from autograder.learner.work import Work
from autograder.pool import count_cores

KERNELS = Kernels(sandbox=False)
LIMITS = Limits()


@dataclass
class CheckedLesson:
    """A lesson that was looked at; `trouble` says why it could not be run."""

    key: str
    record: dict = field(default_factory=dict)
    trouble: str = ""


def check_work(
    lesson: str | None = None, stage: str | None = None, root: Path = ROOT, kernels: Managers = KERNELS
) -> int:
    """Prints how far the learner is; returns the exit code, 0 whatever passes or fails.

    A lesson that has not changed since it was run last is not run again, unless it is asked for by name.
    """
    work = Work(root)
    try:
        keys = work.select(lesson, stage)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    records = {} if lesson else read_records(work)
    checked, interrupted = [], False
    try:
        with ThreadPoolExecutor(max(1, min(count_cores(), len(keys)))) as pool:
            runs = pool.map(lambda key: check_lesson(work, key, records.get(key), kernels), keys)
            try:
                for one in tqdm(runs, total=len(keys), unit="lesson", disable=not sys.stderr.isatty(), leave=False):
                    checked.append(one)
            except BaseException:
                stop_all()
                raise
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupted = True
    try:
        with work.lock():
            keep_records(work, {one.key: one.record for one in checked if one.record})
            lessons = draw_index(work)
    except (UsageError, OSError) as error:
        print(f"the progress could not be kept in work/: {error}", file=sys.stderr)
        lessons = [_read_with_found(work, one) for one in checked]
    if interrupted:
        print("interrupted; what had run is kept", file=sys.stderr)
        return 130
    troubles = {one.key: one.trouble for one in checked if one.trouble}
    _print_progress([one for one in lessons if one.entry.key in keys], lessons, troubles, bool(lesson))
    return 0


def _read_with_found(work: Work, one: CheckedLesson) -> Progress:
    lesson = make_progress(one.key, work.read_course(one.key))
    lesson.found = {exercise: Finding(**value) for exercise, value in one.record.get("exercises", {}).items()}
    return lesson


# --- one lesson -------------------------------------------------------------------------------------------------


def check_lesson(work: Work, key: str, record: dict | None, kernels: Managers) -> CheckedLesson:
    """Runs a learner's copy, if they have written in it and `record` is not of the same."""
    path = work.find_copy(key)
    try:
        data = work.read_copy(key)
        if data is None:
            return CheckedLesson(key, _make_record("", {}))
        merged, _ = merge(work.read_course(key), data, work.read_base(key, data), experiments=True)
        files = {place: (path.parent / place).read_bytes() for place in work.find_beside(key)[0]}
    except (OSError, Unreadable) as error:
        return CheckedLesson(key, trouble=f"{work.show_path(path)}: {error}")
    stubs = _read_stubs(work.read_course(key))
    begun = {read_name(cell) for cell in merged.cells if _is_begun(cell, stubs)}
    if not begun:
        return CheckedLesson(key, _make_record("", {}))
    cells = [cell for cell in merged.cells if is_run(cell)]
    print_of = _take_fingerprint(cells, files)
    if record and record.get("fingerprint") == print_of:
        return CheckedLesson(key, record)
    try:
        verdicts = run_checks(cells, read_submission(data)[0], files, kernels)
    except (KernelFailed, OSError) as error:
        return CheckedLesson(key, trouble=f"{work.show_path(path)}: {error}")
    return CheckedLesson(key, _make_record(print_of, _sum_up(verdicts, begun)))


def _make_record(fingerprint: str, found: dict[str, Finding]) -> dict:
    return {"fingerprint": fingerprint, "exercises": {exercise: asdict(one) for exercise, one in found.items()}}


def _read_stubs(course: str) -> dict[str, str]:
    cells = [NotebookNode(cell) for cell in json.loads(course)["cells"] if cell["cell_type"] == "code"]
    return {cell["id"]: find_own_text("".join(cell["source"])) for cell in cells}


def _is_begun(cell: NotebookNode, stubs: dict[str, str]) -> bool:
    """Whether the learner has written in an exercise's cell."""
    return read_role(cell) == "exercise" and find_own_text(cell.source) not in ("", stubs.get(read_name(cell)))


def run_checks(
    cells: list[NotebookNode], copy: list[SubmittedCell], files: dict[str, bytes], kernels: Managers
) -> list[Check]:
    """Runs `cells`, made of a learner's copy: what that has besides says where a missing name is made."""
    outcomes = execute([Step(cell.source) for cell in cells], LIMITS, GIVEN_SEED, kernels, files=files)
    ran = list(zip(cells, outcomes, strict=True))
    exercises = {read_name(cell): outcome for cell, outcome in ran if read_role(cell) == "exercise"}
    origins = Origins(ran, copy)
    return [
        judge_check(cell, outcome, exercises, LIMITS, origins) for cell, outcome in ran if read_role(cell) == "check"
    ]


def _sum_up(verdicts: list[Check], begun: set[str]) -> dict[str, Finding]:
    """Exercise → what was found; one that was not begun has no points, whatever its checks say."""
    found = {}
    for exercise in begun:
        checks = [check for check in verdicts if check.exercise == exercise]
        failed = next((check for check in checks if check.status != "passed"), None)
        message = failed.message if failed else ""
        if failed and failed.status == "stub":
            message = "a line that says `your turn` is left, here or in an exercise that this one needs"
        found[exercise] = Finding(FAILED if failed else PASSED, sum(check.score for check in checks), message)
    return found


def _take_fingerprint(cells: list[NotebookNode], files: dict[str, bytes]) -> str:
    """A hash of all that decides what is found: the code, the files beside it, and the library."""
    beside = {place: hashlib.sha256(data).hexdigest() for place, data in files.items()}
    found = [_read_library(), beside, [cell.source for cell in cells]]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _read_library() -> str:
    """The hash of `llm40` as it lies here."""
    hashed = hashlib.sha256()
    for path in sorted((ROOT / "llm40").rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


# --- the report -------------------------------------------------------------------------------------------------


def _print_progress(
    asked: list[Progress], lessons: list[Progress], troubles: dict[str, str], alone: bool, tell: Callable = print
) -> None:
    quiet = []
    for lesson in asked:
        if lesson.entry.key in troubles:
            tell(f"{_describe_head(lesson)}\n  could not be run: {troubles[lesson.entry.key]}\n")
        elif lesson.begun or alone:
            tell("\n".join([_describe_head(lesson), *_describe_exercises(lesson), ""]))
        else:
            quiet.append(lesson)
    if quiet:
        tell(f"not begun: {', '.join(f'{lesson.entry.number:02}' for lesson in quiet)}\n")
    total = sum_up(lessons)
    tell(f"All lessons: {draw_bar(total.share)} · {total.describe_points()} points · {total.describe_time()}")
    following = find_next(lessons)
    if following:
        tell(f"Next: {following.entry.number:02} {following.entry.title}, {describe_next(following)}")
    ready = [one for one in lessons if one.next and not one.core_done and not find_closed(one, lessons)]
    if ready:
        tell(f"Open now: {', '.join(f'{one.entry.number:02}' for one in ready)}. The roadmap: work/index.ipynb")


def _describe_head(lesson: Progress) -> str:
    standing = lesson.standing
    more = standing.points - standing.core_points
    parts = [f"{lesson.entry.number:02} {lesson.entry.title}", draw_bar(standing.share)]
    parts += [f"{standing.describe_points()} points", f"core {standing.describe_core()}"]
    parts += [f"more {standing.score - standing.core_score:g} of {more:g}"] if more else []
    return " · ".join(parts)


def _describe_exercises(lesson: Progress) -> list[str]:
    wide = max((len(exercise.name) for exercise in lesson.exercises), default=0)
    lines = []
    for exercise in lesson.exercises:
        found = lesson.find(exercise)
        more = "" if exercise.path == "core" else " (more)"
        points = f"{found.score:g} of {exercise.points:g}"
        line = f"  {exercise.number:>2}  {exercise.name:<{wide}}  {found.status:<9}  {points:>8}{more}"
        lines.append(line)
        lines += [f"        {text}" for text in found.message.split("\n") if text and found.status == FAILED]
    if lesson.next:
        lines.append(f"  next: {describe_next(lesson)}")
    return lines
