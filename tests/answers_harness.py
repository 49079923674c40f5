"""Proves a lesson's checks: every wrong answer loses points, every right one gets all, and nothing fake gets any.

The answers are in tests/answers/<stage>/<lesson>.py (format: CONTRIBUTING.md); this adds by itself the reference, the
stub, and three fakes for each thing that the exercise asks for. The work is done in answers_worker.py, one process
per lesson.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from autograder import lesson as lessons
from autograder.lesson import Cell, Lesson

WORKER = Path(__file__).with_name("answers_worker.py")
SECONDS_PER_ANSWER = 60.0

# What each kind of answer must get: "all" points, "some lost", or "none".
DUE = {
    "reference": "all",
    "right": "all",
    "wrong": "some lost",
    "stub": "none",
    "fake-none": "none",
    "fake-zeros": "some lost",
    "fake-first": "some lost",
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
    fake_applied: bool = True


class AnswersError(Exception):
    """The answers file, or the reference that it is measured against, is unusable."""


def collect(lesson: Lesson, answers_file: Path) -> list[Answer]:
    """Every answer to every exercise of a lesson, the written ones and the ones that the harness adds."""
    key = lesson.entry.key
    where = "/".join(answers_file.parts[-4:])
    written: list[Answer] = []
    cells = lessons.percent_cells(lessons.read_text(answers_file)) if answers_file.exists() else []
    for _, marks, source, line in cells:
        kind = next((k for k in ("wrong", "right") if k in marks), None)
        if kind is None:
            if line == 1 or not source.strip():  # the file's own introduction
                continue
            raise AnswersError(f'{where}:{line}: a cell is marked wrong="…" or right="…", with because="…"')
        if marks[kind] not in {e.name for e in lesson.exercises}:
            raise AnswersError(f'{where}:{line}: the lesson has no exercise "{marks[kind]}"')
        if not marks.get("because"):
            raise AnswersError(f'{where}:{line}: {kind}="{marks[kind]}": because="…" is missing')
        written.append(Answer(key, marks[kind], kind, str(marks["because"]), source))

    answers: list[Answer] = []
    for exercise in lesson.exercises:
        name, source = exercise.name, exercise.source
        answers.append(Answer(key, name, "reference", source=source))
        answers.append(Answer(key, name, "stub", source=lessons.stub(source)))
        targets = fake_targets(lesson, exercise)
        if targets:
            answers.append(Answer(key, name, "fake-none", "", source, tuple(targets)))
        for kind in ("fake-zeros", "fake-first"):
            answers += [Answer(key, name, kind, target, source, (target,)) for target in targets]
        answers += [a for a in written if a.exercise == name]
    ids = [a.id for a in answers]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise AnswersError(f"{where}: two answers to one exercise say the same in because: {', '.join(twice)}")
    return answers


def too_few(answers: Iterable[Answer], exercise: str) -> str:
    """What an exercise still needs, or nothing: at least two wrong answers and a right one by another route."""
    kinds = [a.kind for a in answers if a.exercise == exercise]
    wrong, right = kinds.count("wrong"), kinds.count("right")
    return "" if wrong >= 2 and right >= 1 else f"{wrong} wrong and {right} right answers, it needs at least 2 and 1"


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


def run_answers(lesson: Lesson, answers: list[Answer], limit: float = SECONDS_PER_ANSWER) -> dict[str, Outcome]:
    """The outcome of every answer, by its id.

    Raises AnswersError where the reference notebook itself does not run.
    """
    job = {
        "limit": limit,
        "cells": [
            {"role": c.role, "name": c.name, "source": c.source, "points": c.points}
            for c in lesson.cells
            if c.kind == "code"
        ],
        "answers": [
            {
                "id": a.id,
                "exercise": a.exercise,
                "source": a.source,
                "fake": {"kind": a.kind.removeprefix("fake-"), "targets": a.targets} if a.targets else None,
            }
            for a in answers
        ],
    }
    root = WORKER.parent.parent
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="llm40-answers-") as folder:
        job_file, results_file = Path(folder, "job.json"), Path(folder, "results.jsonl")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, **threads, "PYTHONPATH": path, "IPYTHONDIR": folder}
        done = subprocess.run(
            [sys.executable, str(WORKER), str(job_file), str(results_file)],
            env=environment, cwd=folder, text=True, capture_output=True,
        )  # fmt: skip
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
                fake_applied=result["fake_applied"],
            )
        return outcomes


def verdict(answer: Answer, outcome: Outcome) -> str:
    """What is wrong with the checks, as this answer shows it; empty where all is well."""
    got = f"{outcome.score:g} of {outcome.total:g} points"
    what = {
        "reference": "the reference answer",
        "stub": "the stub",
        "fake-none": f"an answer whose {' and '.join(answer.targets)} return None",
        "fake-zeros": f"an answer whose {answer.because} returns zeros",
        "fake-first": f"an answer whose {answer.because} returns its first argument",
    }.get(answer.kind, f'the {answer.kind} answer "{answer.because}"')
    due = DUE[answer.kind]
    if due == "all" and outcome.score < outcome.total:
        return f'exercise "{answer.exercise}": {what} got only {got}: {outcome.message}'
    if due == "none" and outcome.score > 0:
        return f'exercise "{answer.exercise}": {what} got {got}, it should get none: a check asks too little'
    if due == "some lost" and outcome.score >= outcome.total:
        return f'exercise "{answer.exercise}": {what} got all {got}: the checks do not catch it'
    return ""


# --- the table at the end of a test run -----------------------------------------------------------------------


def table(rows: list[dict], messages: bool) -> list[str]:
    """Lines: one per exercise, and with `messages` one per answer with what its first failing check said.

    Each row: lesson, exercise, kind, because, score, total, message, state ("ok", "bad", "skipped").
    """
    lines = [f"{'lesson and exercise':44} {'points':>6}  {'wrong caught':>12}  {'right accepted':>14}  {'fakes':>9}"]
    exercises: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        exercises.setdefault((row["lesson"], row["exercise"]), []).append(row)

    def count(group: list[dict], kinds: tuple[str, ...]) -> str:
        counted = [r for r in group if r["kind"] in kinds and r["state"] != "skipped"]
        return f"{sum(r['state'] == 'ok' for r in counted)}/{len(counted)}"

    for (lesson, exercise), group in sorted(exercises.items()):
        group.sort(key=lambda r: (list(DUE).index(r["kind"]), r["because"]))
        total = max(r["total"] for r in group)
        fakes = count(group, ("stub", "fake-none", "fake-zeros", "fake-first"))
        lines.append(f"{lesson[:2] + ' ' + exercise:44} {total:6g}  {count(group, ('wrong',)):>12}  "
                     f"{count(group, ('reference', 'right')):>14}  {fakes:>9}")  # fmt: skip
        if messages:
            for r in group:
                if r["kind"] == "reference" and r["state"] == "ok":
                    continue
                name = f"{r['kind']} {r['because']}".strip()
                said = " ".join(r["message"].split())
                score = "  skip" if r["state"] == "skipped" else f"{r['score']:g}/{r['total']:g}".rjust(6)
                lines.append(f"    {'  ' if r['state'] != 'bad' else '! '}{score} {name}{': ' + said if said else ''}")
    return lines
