"""nbgrader as it is installed, measured on some students' notebooks: `nbgrader autograde` in a course of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbgrader.api import Gradebook, MissingEntry
from tqdm import tqdm

from autograder.build import ROOT
from autograder.grading.rebuild import read_role

CONFIG = """c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "stock"
c.ClearSolutions.enforce_metadata = False  # our lessons have answers in prose that nobody grades
c.ExecutePreprocessor.timeout = 120  # seconds for a cell: by default 30, too few for some experiments
"""


@dataclass
class Stock:
    """`seconds` of `nbgrader autograde` alone, the scores of what it graded, the last lines of its log."""

    seconds: float
    scores: dict[tuple[str, str], float]  # (student, lesson) →
    log: str


def autograde(submitted: Path, sources: Sequence[Path], experiments: bool, label: str) -> Stock:
    """Grades a folder by these masters (build/source/<stage>/<lesson>.ipynb), with or without experiments."""
    stages = sorted({path.parent.name for path in sources})
    handed = list(submitted.glob("*/*/*.ipynb"))
    with tempfile.TemporaryDirectory(prefix="llm40-stock-") as folder:
        course = Path(folder).resolve()
        course.joinpath("nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
        for path in sources:
            _copy(path, course / "source" / path.parent.name / path.name)
        for path in handed:
            _hand_in(path, course / "submitted" / path.relative_to(submitted), experiments)
        for stage in stages:
            _nbgrader(course, "generate_assignment", stage)
        seconds = 0.0
        with tqdm(total=len(handed), unit="notebook", desc=label, dynamic_ncols=True) as bar:
            for stage in stages:
                began = time.monotonic()
                _nbgrader(course, "autograde", stage, bar)
                seconds += time.monotonic() - began
        log = course.joinpath("log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
        return Stock(seconds, _scores(course, handed), "\n".join(log))


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _hand_in(path: Path, target: Path, experiments: bool) -> None:
    _copy(path, target)
    if not experiments:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if read_role(cell) != "experiment"]
        nbformat.write(notebook, target)


def environment() -> dict[str, str]:
    """Ours, with this Python's own commands and kernel before all others, and with llm40, installed or not."""
    bin_, path = str(Path(sys.executable).parent), os.environ.get("PYTHONPATH")
    return os.environ | {
        "PATH": os.pathsep.join([bin_, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path])),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }


def _nbgrader(course: Path, command: str, stage: str, bar: tqdm | None = None) -> None:
    """One command of nbgrader's in a course. A submission that it fails on is in its log, and gets no score."""
    with open(course / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nbgrader", command, stage], cwd=course, env=environment(), stdout=log, stderr=log
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                if bar is not None:
                    bar.update(_done(course) - bar.n)
                if process.returncode is not None:
                    break
        finally:
            process.kill()
    if process.returncode and command != "autograde":
        raise RuntimeError(f"nbgrader {command} {stage} failed: {course.joinpath('log.txt').read_text()[-2000:]}")


def _done(course: Path) -> int:
    return len(list(course.glob("autograded/*/*/*.ipynb")))


def _scores(course: Path, handed: Sequence[Path]) -> dict[tuple[str, str], float]:
    found = {}
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        for path in handed:
            stage, student = path.parent.name, path.parent.parent.name
            if not course.joinpath("autograded", student, stage, path.name).is_file():
                continue
            try:
                found[student, path.stem] = book.find_submission_notebook(path.stem, stage, student).score
            except MissingEntry:
                continue
    return found
