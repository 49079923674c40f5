"""`make lab`: JupyterLab on the learner's own copies, without nbgrader's panels for instructors."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from autograder.catalog import UsageError
from autograder.layout import ROOT
from autograder.learner.progress import draw_index
from autograder.learner.work import Work

SETTINGS = Path(__file__).with_name("jupyter")  # Jupyter's configuration for learners


def open_lab(lesson: str | None = None, arguments: Sequence[str] = (), root: Path = ROOT) -> int:
    """Makes work/ current, and becomes JupyterLab; returns the exit code."""
    work = Work(root)
    try:
        chosen = work.select(lesson)
        page = work.find_copy(chosen[0] if lesson else "index")
        with work.lock():
            lines = work.make_current(work.list_lessons())
            draw_index(work)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"work/ cannot be written: {error.strerror}; what was there is as it was", file=sys.stderr)
        return 1
    for line in lines:
        print(line, flush=True)
    paths = [str(SETTINGS), os.environ.get("JUPYTER_CONFIG_PATH")]
    env = {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}
    # Its root is work/ whichever page is opened, so that links between lessons lead somewhere.
    options = [f"--ServerApp.root_dir={work.folder}", *arguments]
    return run_in_place([sys.executable, "-m", "jupyterlab", str(page), *options], root, env)


def run_in_place(command: Sequence[str], folder: Path, env: dict[str, str]) -> int:
    """Runs the command in this process's place, so that it has Ctrl-C and the terminal; on Windows, as a child."""
    if sys.platform != "win32":
        os.chdir(folder)
        os.execve(command[0], command, env)
    process = subprocess.Popen(command, cwd=folder, env=env)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it has got that too, and asks whether to end
            continue
