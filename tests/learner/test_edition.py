"""The learners' archive, unpacked and used to the end, and its hand-in graded by the instructors' edition."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import learner_course as course
import pytest
from learner_course import MINE, ONE

from autograder.build import build_course
from autograder.kernels.sandbox import find_sandbox_trouble
from autograder.layout import ROOT
from autograder.release import make_release

PYTHON = """#!/bin/sh
PYTHONPATH='{root}' exec '{python}' "$@"
"""


@pytest.fixture(scope="module")
def instructors(editions, tmp_path_factory) -> Path:
    """The whole project with the small course in the place of the lessons."""
    root = tmp_path_factory.mktemp("instructors") / "llm40"
    shutil.copytree(editions[0], root)
    for name in ("autograder", "llm40", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "weights")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root)
    assert build_course(root=root) == 0  # README tells how many lessons there are
    assert make_release(root / "dist", root=root) == 0
    return root


@pytest.fixture(scope="module")
def archive(instructors) -> Path:
    [path] = (instructors / "dist").glob("llm40-learners-*.zip")
    return path


@pytest.fixture
def learners(archive, tmp_path) -> Path:
    """Unpacked where paths are hard. Its .venv, which pip would fill for minutes, is this environment."""
    folder = tmp_path / "我的 文件 夹"
    zipfile.ZipFile(archive).extractall(folder)
    [root] = folder.iterdir()
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(root=root, python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    (root / ".venv" / ".complete").touch()
    return root


def make(root: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(["make", *arguments], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_used_to_the_end(learners, instructors, tmp_path) -> None:
    make(learners, "lab", "ARGS=--version")  # JupyterLab's own: it says so and ends
    copy = learners / "work" / f"{ONE}.ipynb"
    assert (learners / "work" / "index.ipynb").is_file()
    course.answer(learners, norm=MINE)
    said = make(learners, "check", "LESSON=01")
    assert "1  norm     passed       2 of 2" in said
    assert "2  longest  not begun    0 of 2" in said
    said = make(learners, "submit", "STUDENT=李 雷", "STAGE=1")
    assert "work/李 雷_stage1.zip: 1 notebooks" in said
    assert MINE in "".join(course.texts(copy))

    hand_in = tmp_path / "class"
    hand_in.mkdir()
    shutil.copy(learners / "work" / "李 雷_stage1.zip", hand_in)
    arguments = ["grade", "--submitted", str(hand_in), "--out", str(tmp_path / "grades"), "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "autograder", *arguments, *(["--unsafe"] if find_sandbox_trouble() else [])],
        cwd=instructors,
        env={**os.environ, "PYTHONPATH": str(instructors)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "grades" / "checks.csv").read_text(encoding="utf-8-sig").splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["李 雷", "李 雷"]
    assert ",passed," in rows[1]
    assert ",stub," in rows[2]


def test_no_command_is_advertised_that_cannot_run(learners) -> None:
    readme = (learners / "README.md").read_text(encoding="utf-8")
    docs = (learners / "docs" / "learners.md").read_text(encoding="utf-8")
    makefile = (learners / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert targets == {"help", "setup", "lab", "check", "submit"}
    assert set(re.findall(r"\bmake ([a-z]+)\b", readme + docs)) <= targets
    assert set(re.findall(r"-m ([a-z.]+)\s", readme + docs + makefile)) <= {"autograder.learner", "venv", "pip"}
    for document, folder in ((readme, learners), (docs, learners / "docs")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document):
            assert (folder / link).is_file(), link
    for name in re.findall(r"`((?:llm40|autograder|docs)[/\\][\w./\\]+)`", readme + docs):
        assert (learners / name.replace("\\", "/")).is_file(), name
    said = subprocess.run(
        [learners / ".venv/bin/python", "-m", "autograder.learner", "--help"],
        cwd=learners,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {"lab", "check", "submit"} <= set(said.split())
    assert not {"grade", "run", "course", "release"} & set(said.split())


def test_its_commands_import_nothing_that_is_not_there(learners) -> None:
    code = "import autograder.learner.lab, autograder.learner.check, autograder.learner.submit, autograder; "
    code += "print(autograder.__file__)"
    done = subprocess.run(
        [learners / ".venv/bin/python", "-c", code], cwd=learners, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parents[1] == learners


def test_nothing_in_it_gives_an_answer_away(archive) -> None:
    with zipfile.ZipFile(archive) as opened:
        names = [name.split("/", 1)[1] for name in opened.namelist()]
        text = "".join(opened.read(name).decode("utf-8", "replace") for name in opened.namelist())
    assert not [name for name in names if name.startswith(("solutions/", "tests/", "build/", "benchmarks/"))]
    for secret in ("secret_norm", "hidden norm", "math.hypot", "max(x)"):
        assert secret not in text


def test_its_scripts_are_its_own(archive) -> None:
    with zipfile.ZipFile(archive) as opened:
        [name] = [name for name in opened.namelist() if name.endswith("pyproject.toml")]
        project = opened.read(name).decode()
    assert "autograder.cli:app" not in project
    assert 'autograder = "autograder.learner.cli:app"' in project
