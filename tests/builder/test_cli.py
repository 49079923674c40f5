"""The command line: quick, and its exit codes."""

import subprocess
import sys

import pytest

from autograder.layout import ROOT

HEAVY = ("torch", "nbgrader", "jupytext", "nbformat", "papermill", "dask", "IPython", "jinja2")


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "autograder", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, autograder.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["course", "run", "grade", "release"])
def test_every_command_has_help(command: str) -> None:
    done = call(command, "--help")
    assert done.returncode == 0
    assert command in done.stdout


@pytest.mark.parametrize("arguments", [["course", "--lesson", "99"], ["course", "--stage", "9"], ["nonsense"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
