"""The grader of the course: a class in a process of its own, its memory watched from outside; a notebook alone."""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import psutil

from autograder.grading.engine import run_tasks
from autograder.grading.grade import SEED, find_class, grade_folder
from autograder.grading.masters import read_masters
from autograder.grading.task import Result, Task, grade_task
from autograder.kernels.manager import Kernels
from autograder.layout import ROOT

SPAWN = multiprocessing.get_context("spawn")  # a fresh Python, as from the command line
MIB = 2**20
ROLES = ("grader", "Dask workers", "warm processes and kernels")


@dataclass
class Run:
    """A class graded: `seconds` from the start of its process to the end; one record for each notebook, as written."""

    seconds: float
    records: list[dict]
    memory: list[tuple[float, dict[str, int]]]  # when, and the bytes of each of ROLES


def verdict(result: Result) -> dict:
    """All that a learner is told by a result, as it left the task."""
    return {
        "status": result.status,
        "score": result.score,
        "flags": list(result.flags),
        "checks": [asdict(check) for check in result.checks],
    }


# --- a class --------------------------------------------------------------------------------------------------


def grade_class(submitted: Path, out: Path, source: Path, jobs: int, watch: bool = False) -> Run:
    """Grades a folder with the grader's defaults."""
    log = out / "log.jsonl"
    out.mkdir(parents=True)
    began = time.monotonic()
    process = SPAWN.Process(target=_grade_class, args=(submitted, out, source, jobs, log))
    process.start()
    with watched(process.pid) if watch else nullcontext([]) as memory:
        process.join()
    seconds = time.monotonic() - began
    if process.exitcode:
        raise RuntimeError(f"the grading of {submitted} ended with exit code {process.exitcode}")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return Run(seconds, records, memory)


def _grade_class(submitted: Path, out: Path, source: Path, jobs: int, log: Path) -> None:
    with open(log, "w", encoding="utf-8") as file:

        def logged(tasks: Iterable[Task], jobs: int) -> Iterator[Result]:
            """run_tasks, with a line in the log for each result and for how long it took to write it down."""
            for result in run_tasks(tasks, jobs):
                record = {"student": result.student, "lesson": result.lesson}
                record |= {"seconds": result.seconds, "cells": result.cell_seconds}
                record |= verdict(result)
                began = time.monotonic()
                yield result
                record |= {"writing": time.monotonic() - began, "at": time.time()}
                file.write(json.dumps(record) + "\n")

        grade_folder(submitted, out, source, jobs=jobs, engine=logged, show=lambda line: None)


def time_command(submitted: Path, out: Path) -> float:
    """Seconds of `python -m autograder grade`, from its start to its end: what an instructor waits for."""
    command = [sys.executable, "-m", "autograder", "grade", "--submitted", str(submitted), "--out", str(out)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - began


@contextmanager
def watched(pid: int, every: float = 1.0, share: float = 0.02) -> Iterator[list[tuple[float, dict[str, int]]]]:
    """Samples the memory of a process and all that come from it, until the end.

    Every second; less often where that would take more than a `share` of a core from those who are measured.
    """
    samples: list[tuple[float, dict[str, int]]] = []
    over = threading.Event()

    def watch() -> None:
        cost = 0.0
        while not over.wait(max(every, cost / share)):
            began = time.thread_time()
            samples.append((time.time(), memory_of(pid)))
            cost = time.thread_time() - began

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process and its descendants by role; what several share is shared out (PSS), where Linux tells."""
    used = dict.fromkeys(ROLES, 0)
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return used
    for process in family:
        try:
            command = " ".join(process.cmdline())
            used[_role(process.pid == pid, command)] += _bytes(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return used


def _role(root: bool, command: str) -> str:
    if root:
        return ROLES[0]
    return ROLES[1] if "multiprocessing" in command else ROLES[2]


def _bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return getattr(full, "pss", full.rss)
    except psutil.AccessDenied:
        return process.memory_info().rss


# --- one notebook ---------------------------------------------------------------------------------------------


def grade_alone(submitted: Path, source: Path, student: str, lesson: str) -> dict:
    """The verdict, in a process that grades nothing else."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(_grade_alone, submitted, source, student, lesson).result()


def _grade_alone(submitted: Path, source: Path, student: str, lesson: str) -> dict:
    [handed], _ = find_class(submitted, read_masters(source), lesson, student)
    master = nbformat.writes(handed.lesson.master).encode()
    task = Task(student, handed.lesson.stage, lesson, handed.read(), master, seed=SEED, kernels=Kernels())
    return verdict(grade_task(task))
