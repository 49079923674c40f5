"""A class of the tiny lesson, a PostgreSQL server, and Dask's own processes, each started for real."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[1] / "grading"))  # the tiny lesson is theirs

import tiny
from nbgrader.api import Gradebook

from autograder.execute import Limits
from autograder.grading.grade import grade_folder

ROOT = Path(__file__).parents[2]
LIMITS = Limits(cell=10, notebook=60)
WRONG = "def half(x):\n    return x // 2\n"


def new_class(folder: Path, students: int) -> SimpleNamespace:
    """A class whose every third member has one exercise wrong; `grade()` returns (student → score)."""
    source = tiny.build(folder)
    for i in range(students):
        notebook = tiny.answered(half=WRONG) if i % 3 == 2 else tiny.answered()
        tiny.hand_in(folder / "in", f"学生-{i:02}", tiny.dumps(notebook))
    said: list[str] = []

    def grade(**options) -> dict[str, float]:
        said.clear()
        given = {"out": folder / "out", "jobs": 2, "limits": LIMITS, "kernels": tiny.KERNELS} | options
        results = grade_folder(folder / "in", source=source, show=said.append, **given)
        assert all(r.status == "graded" for r in results), [(r.student, r.status, r.flags) for r in results]
        return {r.student: r.score for r in results}

    expected = {f"学生-{i:02}": 6.0 if i % 3 == 2 else 8.0 for i in range(students)}
    return SimpleNamespace(folder=folder, out=folder / "out", source=source, said=said, grade=grade, expected=expected)


def recorded(url: str) -> dict[str, float]:
    """What nbgrader reads in a gradebook: student → score of the tiny stage."""
    with Gradebook(url, "llm40") as book:
        return {s.student_id: s.score for s in book.assignment_submissions(tiny.STAGE)}


# --- PostgreSQL -----------------------------------------------------------------------------------------------


def programs() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps them off the path."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


class PostgreSQL:
    """A server of our own on a free port of this machine, in a folder of its own."""

    def __init__(self, programs: Path, folder: Path, port: int):
        self.programs, self.folder, self.port = programs, folder, port
        self.url = f"postgresql+psycopg://grader@127.0.0.1:{port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        # The server refuses to run as root.
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*user, str(self.programs / program), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off -k {self.folder}"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        """At once, as a power failure would."""
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- Dask -----------------------------------------------------------------------------------------------------


@contextmanager
def process_of_its_own(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    """A process whose home, temporary folder, working folder and copy of our code are its own."""
    folder.mkdir(parents=True)
    for package in ("autograder", "llm40"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    temporary = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))  # short: sockets have their path in it
    environment = os.environ | {"HOME": str(folder), "TMPDIR": str(temporary), "PYTHONPATH": str(folder)}
    environment["LLM40_WHERE"] = folder.name  # what begins so is seen in a sandbox too
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    process.name, process.log = folder.name, folder / "log"
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until(condition, seconds: float, complaint: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, complaint
        time.sleep(0.05)
