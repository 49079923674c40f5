"""Proves a lesson's checks: every wrong answer loses points, every right one gets all, and nothing fake gets any.

The answers are in tests/answers/<stage>/<lesson>.py (format: CONTRIBUTING.md); this adds by itself the reference, the
stub, and the fakes of everything that the exercise asks for. The work is done in answers_worker.py, one process per
lesson.
"""

import ast
import builtins
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from answers_file import AnswersError, read_answers

from autograder import build
from autograder import lesson as lessons
from autograder.grading.masters import make_sent_master
from autograder.grading.rebuild import is_run
from autograder.grading.task import make_steps
from autograder.lesson import Cell, Lesson

WORKER = Path(__file__).with_name("answers_worker.py")
JUDGED_WORKER = Path(__file__).with_name("answers_judged.py")
SECONDS_PER_ANSWER = 60.0

BUDGET = 45.0  # seconds of one core in which a lesson's checks are proved

# What each kind of answer must get: "all" points, "some lost", or "none".
DUE = {"reference": "all", "right": "all", "wrong": "some lost", "stub": "none", "fake-none": "none"}
# The other fakes, and what such an answer does; the target is one function, method or value, or the kernels.
FAKES = {
    "fake-zeros": "returns zeros from {}",
    "fake-first": "returns the first argument of {}",
    "fake-in-place": "changes the arguments of {} in place",
    "fake-detached": "detaches the result of {} from its graph",
    "fake-generator": "draws from another generator than the one that {} is given",
    "fake-bfloat16": "rounds the result of {} to bfloat16",
    "fake-row": "returns the first row of {}'s result for every row",
    "fake-strides": "takes one tensor's strides for another's in {}",
}
DUE |= dict.fromkeys(FAKES, "some lost")
# Fakes that get all points because the exercise allows what they do, by lesson, kind and what they fake.
OPEN = {
    ("06", "fake-in-place", "clip_grad_norm"),  # it changes gradients by its contract
    ("09", "fake-bfloat16", "induction_weights"),  # any weights do that attend as asked
}


@dataclass(frozen=True)
class Answer:
    lesson: str  # stage2_transformer/09_attention_mha_mqa_gqa
    exercise: str
    kind: str  # a key of DUE
    because: str = ""
    source: str = field(default="", repr=False)
    targets: tuple[str, ...] = ()  # what a fake replaces: `f`, `Class.method`, `value`

    @property
    def id(self) -> str:
        """`09-sdpa-wrong-scales_by_d_k_not_its_root`"""
        words = re.sub(r"\W+", "_", self.because).strip("_")[:60]
        number = self.lesson.rsplit("/", 1)[-1][:2]
        return "-".join(part for part in (number, self.exercise, self.kind, words) if part)


@dataclass
class Outcome:
    score: float
    total: float
    message: str  # of the first check that failed
    fake_applied: bool = True  # whether the fake makes a difference at all
    note: str = ""  # what the harness found, where it ran no checks
    seconds: float = 0.0  # of one core


def collect(lesson: Lesson, answers_file: Path) -> list[Answer]:
    """Every answer to every exercise of a lesson, the written ones and the ones that the harness adds."""
    key = lesson.entry.key
    references = {e.name: e.source for e in lesson.exercises}
    read = read_answers(answers_file, references) if answers_file.exists() else []
    written = [Answer(key, a.exercise, a.kind, a.because, a.source) for a in read]
    answers: list[Answer] = []
    for exercise in lesson.exercises:
        name, source = exercise.name, exercise.source
        answers.append(Answer(key, name, "reference", source=source))
        answers.append(Answer(key, name, "stub", source=lessons.stub(source)))
        targets = fake_targets(lesson, exercise)
        if targets:
            answers.append(Answer(key, name, "fake-none", "", source, tuple(targets)))
        # Answers to questions are asked for to one percent, which bfloat16 keeps.
        left_out = {"fake-strides", "fake-bfloat16"} if exercise.questions else {"fake-strides"}
        for kind in [k for k in FAKES if k not in left_out]:
            answers += [Answer(key, name, kind, target, source, (target,)) for target in targets]
        if kernels := kernels_of(exercise):
            answers.append(Answer(key, name, "fake-strides", " and ".join(kernels), source, tuple(kernels)))
        answers += [a for a in written if a.exercise == name]
    ids = [a.id for a in answers]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise AnswersError(f"{answers_file.name}: two answers say the same in because: {', '.join(twice)}")
    return answers


def too_few(answers: Iterable[Answer], exercise: str) -> str:
    """What an exercise still needs, or nothing: at least two wrong answers and a right one by another route."""
    kinds = [a.kind for a in answers if a.exercise == exercise]
    wrong, right = kinds.count("wrong"), kinds.count("right")
    return "" if wrong >= 2 and right >= 1 else f"{wrong} wrong and {right} right answers, it needs at least 2 and 1"


def unknown_names(lesson: Lesson, answers: Iterable[Answer]) -> list[str]:
    """A sentence for each answer that reads a name which neither it nor the lesson makes: a slip, no mistake."""
    known = set(dir(builtins))
    for cell in lesson.cells:
        if cell.kind == "code" and cell.role not in ("check", "experiment"):
            known |= lessons.cell_names(cell.source)[0]
    found = []
    for a in answers:
        try:
            bound, read, _ = lessons.cell_names(a.source)
        except SyntaxError:  # a wrong answer may be no Python
            continue
        if names := read - bound - known:
            found.append(f'{a.kind}="{a.exercise}" because="{a.because}" reads {", ".join(sorted(names))}')
    return found


def fake_targets(lesson: Lesson, exercise: Cell) -> list[str]:
    """What the learner writes in an exercise and others call: functions, public methods, kernels, values."""
    found = lessons.regions(exercise.source, lessons.BEGIN_SOLUTION, lessons.END_SOLUTION)
    tree = ast.parse(lessons.python_of(exercise.source))
    outside = set()
    for cell in lesson.cells:
        if cell is not exercise and cell.kind == "code" and cell.role in ("check", "plain", "exercise"):
            outside |= lessons.cell_names(cell.source)[1]

    def learners(node: ast.AST) -> bool:
        """Whether a solution region lies in the node, or the node in one."""
        first, last = node.lineno - 1, node.end_lineno - 1
        return any(a <= last and first <= b for a, b in found)

    targets = []
    for node in tree.body:
        if not learners(node):
            continue
        if isinstance(node, ast.FunctionDef):
            if node.name in outside:
                targets.append(node.name)
        elif isinstance(node, ast.ClassDef):
            targets += [
                f"{node.name}.{m.name}"
                for m in node.body
                if isinstance(m, ast.FunctionDef)
                and learners(m)
                and (m.name == "__call__" or not m.name.startswith("_"))
            ]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            targets += [name for name in names if name in outside]
    return list(dict.fromkeys(targets))


def kernels_of(exercise: Cell) -> list[str]:
    """The Triton kernels that an exercise defines."""
    tree = ast.parse(lessons.python_of(exercise.source))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)]


def cells_below(cells: list[Cell], exercise: str) -> list[int]:
    """The cells that run after an exercise, as far as its last check: no experiments, no checks of other exercises."""
    start = next(i for i, c in enumerate(cells) if c.role == "exercise" and c.name == exercise)
    checks = [i for i, c in enumerate(cells) if c.role == "check" and c.name == exercise]
    between = [i for i in range(start + 1, checks[-1]) if cells[i].role not in ("check", "experiment")]
    return sorted(between + checks)


def run_answers(
    lesson: Lesson, answers: list[Answer], limit: float = SECONDS_PER_ANSWER, judged: bool = False
) -> dict[str, Outcome]:
    """The outcome of every answer, by its id; `judged`: as the grader finds it, with the checks in another process.

    Raises AnswersError where the reference notebook itself does not run.
    """
    cells = [c for c in lesson.cells if c.kind == "code"]
    job = {
        "limit": limit,
        "cells": [{"role": c.role, "name": c.name, "source": c.source, "points": c.points} for c in cells],
        "answers": [
            {
                "id": a.id,
                "exercise": a.exercise,
                "source": a.source,
                "fake": {"kind": a.kind.removeprefix("fake-"), "targets": a.targets} if a.targets else None,
                "cells": cells_below(cells, a.exercise),
                "stop": DUE[a.kind] == "some lost",
            }
            for a in answers
        ],
    }
    if judged:
        add_steps(job["cells"], lesson)
    worker = JUDGED_WORKER if judged else WORKER
    root = worker.parent.parent
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="llm40-answers-") as folder:
        job_file, results_file = Path(folder, "job.json"), Path(folder, "results.jsonl")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, **threads, "PYTHONPATH": path, "IPYTHONDIR": folder}
        done = subprocess.run(
            [sys.executable, str(worker), str(job_file), str(results_file)],
            env=environment,
            cwd=folder,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            raise AnswersError(f"{lesson.entry.key}: {done.stderr.strip()[-3000:]}")
        outcomes = {}
        for line in results_file.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            checks = result["checks"]
            outcomes[result["id"]] = Outcome(
                score=sum(c["points"] for c in checks if not c["error"]),
                total=sum(c["points"] for c in checks),
                message=next((c["error"] for c in checks if c["error"]), ""),
                fake_applied=result["applies"],
                note=result["note"],
                seconds=result["seconds"],
            )
        return outcomes


def add_steps(cells: list[dict], lesson: Lesson) -> None:
    """Puts beside each cell of a job what the grader makes of it, `step`; null for an experiment."""
    master = build.dumps(build.make_master(lesson, build.Layout(WORKER.parent.parent)))
    about = make_sent_master(nbformat.reads(master, as_version=4)).metadata.llm40
    graded = [c for c in nbformat.reads(master, as_version=4).cells if is_run(c)]
    steps = iter(make_steps(graded, about.asked, about.defined))
    for cell in cells:
        cell["step"] = None if cell["role"] == "experiment" else dataclasses.asdict(next(steps))


def verdict(answer: Answer, outcome: Outcome) -> str:
    """What is wrong with the checks, as this answer shows it; empty where all is well."""
    got = f"{outcome.score:g} of {outcome.total:g} points"
    what = {
        "reference": "the reference answer",
        "stub": "the stub",
        "fake-none": f"an answer whose {' and '.join(answer.targets)} return None",
    }.get(answer.kind, f'the {answer.kind} answer "{answer.because}"')
    if answer.kind in FAKES:
        what = f"an answer that {FAKES[answer.kind].format(answer.because)}"
    due = DUE[answer.kind]
    if due == "all" and outcome.score < outcome.total:
        return f'exercise "{answer.exercise}": {what} got only {got}: {outcome.message}'
    if due == "none" and outcome.score > 0:
        return f'exercise "{answer.exercise}": {what} got {got}, it should get none: a check asks too little'
    if due == "some lost" and outcome.score >= outcome.total:
        return f'exercise "{answer.exercise}": {what} got all {got}: the checks do not catch it' + (
            f" ({outcome.note})" if outcome.note else ""
        )
    return ""


def state(answer: Answer, outcome: Outcome) -> str:
    """ "ok", "bad" (it shows a fault of the checks), "open" (one that is known) or "skipped" (it does not apply)."""
    if not outcome.fake_applied:
        return "skipped"
    if not verdict(answer, outcome):
        return "ok"
    number = answer.lesson.split("/")[1][:2]
    return "open" if (number, answer.kind, answer.because) in OPEN else "bad"


# --- the table at the end of a test run -----------------------------------------------------------------------


def row(answer: Answer, outcome: Outcome) -> dict:
    """What the table needs of an answer, as plain values."""
    return {
        "lesson": answer.lesson.split("/")[1],
        "exercise": answer.exercise,
        "kind": answer.kind,
        "because": answer.because,
        "score": outcome.score,
        "total": outcome.total,
        "message": outcome.note or outcome.message,
        "state": state(answer, outcome),
        "seconds": outcome.seconds,
    }


def table(rows: list[dict], messages: bool) -> list[str]:
    """Lines: one per exercise, one per lesson with its seconds, and with `messages` one per answer."""
    lines = [f"{'lesson and exercise':44} {'points':>6}  {'wrong caught':>12}  {'right accepted':>14}  {'fakes':>9}"]
    exercises: dict[tuple[str, str], list[dict]] = {}
    for r in rows:
        exercises.setdefault((r["lesson"], r["exercise"]), []).append(r)

    def count(group: list[dict], *kinds: str) -> str:
        counted = [r for r in group if r["kind"] in kinds and r["state"] != "skipped"]
        return f"{sum(r['state'] == 'ok' for r in counted)}/{len(counted)}"

    for (lesson, exercise), group in sorted(exercises.items()):
        group.sort(key=lambda r: (list(DUE).index(r["kind"]), r["because"]))
        total = max(r["total"] for r in group)
        right, fakes = count(group, "reference", "right"), count(group, "stub", "fake-none", *FAKES)
        lines.append(
            f"{lesson[:2] + ' ' + exercise:44} {total:6g}  {count(group, 'wrong'):>12}  {right:>14}  {fakes:>9}"
        )
        shown = ("bad", "open", "ok") if messages else ("bad", "open")
        lines += [_line(r) for r in group if r["state"] in shown and (r["kind"], r["state"]) != ("reference", "ok")]
    for lesson in sorted({r["lesson"] for r in rows}):
        seconds = sum(r["seconds"] for r in rows if r["lesson"] == lesson)
        over = f", over the budget of {BUDGET:g} s" if seconds > BUDGET else ""
        lines.append(f"{lesson:44} {seconds:6.1f} s of one core{over}")
    return lines


def _line(r: dict) -> str:
    sign = {"bad": "! ", "open": "? "}.get(r["state"], "  ")
    score = f"{r['score']:g}/{r['total']:g}"
    if DUE[r["kind"]] == "some lost" and r["score"] < r["total"]:
        score = "lost"  # the checks after the first that failed were not run
    said = " ".join(r["message"].split())
    return f"    {sign}{score:>6} {r['kind']} {r['because']}".rstrip() + (f": {said}" if said else "")
