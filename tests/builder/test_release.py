"""The two archives."""

import hashlib
import json
import zipfile

import pytest
from tiny_course import KEY, Project

from autograder.build import build_course
from autograder.layout import ROOT
from autograder.leaks import find_telling_lines, split_statements
from autograder.lesson import read_lesson, secrets
from autograder.release import make_release


@pytest.fixture
def course(project: Project) -> Project:
    for name, text in {
        "pyproject.toml": '[project]\nname = "llm40"\nversion = "1.2.3"\n',
        "README.md": "# LLM40\n",
        "autograder/learner/edition/README.md": "# The learners' own\n",
        "autograder/learner/edition/Makefile": "lab:\n",
        "autograder/learner/work.py": "",
        "autograder/grading/grade.py": "",
        "llm40/__init__.py": "",
        f"tests/answers/{KEY}.py": '# %% right="norm" because="hypot"\ndef norm(x):\n    return math.hypot(*x)\n',
        "autograder/sample_class/full.ipynb": '{"cells": "sum_of_squares"}',
        ".venv/lib/x.py": "",
        "llm40/__pycache__/x.pyc": "",
    }.items():
        (project.root / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / name).write_text(text, encoding="utf-8")
    assert build_course(root=project.root) == 0
    return project


def test_editions(course: Project) -> None:
    out = course.root / "dist"
    assert make_release(out, root=course.root) == 0
    learners = zipfile.ZipFile(out / "llm40-learners-1.2.3.zip")
    names = {name.removeprefix("llm40-learners-1.2.3/") for name in learners.namelist()}
    assert names == {
        f"course/{KEY}.ipynb",
        "course/index.ipynb",
        "course/notation.ipynb",
        "llm40/__init__.py",
        "autograder/learner/work.py",
        "Makefile",
        "README.md",
        "pyproject.toml",
    }
    assert learners.read("llm40-learners-1.2.3/README.md") == b"# The learners' own\n"
    everything = "\n".join(learners.read(name).decode() for name in learners.namelist())
    for cell in read_lesson(course.source).cells:
        for secret in secrets(cell):
            for line in secret.split("\n"):
                assert not line.strip() or line not in everything

    instructors = zipfile.ZipFile(out / "llm40-instructors-1.2.3.zip").namelist()
    for name in (
        "README.md",
        "autograder/grading/grade.py",
        f"solutions/{KEY}.py",
        f"tests/answers/{KEY}.py",
        f"course/{KEY}.ipynb",
    ):
        assert f"llm40-instructors-1.2.3/{name}" in instructors
    assert not any(".venv" in name or "__pycache__" in name or "/build/" in name for name in instructors)


def test_same_course_same_bytes(course: Project) -> None:
    sums = []
    for folder in ("a", "b"):
        assert make_release(course.root / "dist" / folder, root=course.root) == 0
        archives = sorted((course.root / "dist" / folder).iterdir())
        sums.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in archives])
        for path in course.root.glob("course/*/*.ipynb"):
            path.touch()
    assert sums[0] == sums[1]


def test_stale_course_is_not_released(course: Project, capsys: pytest.CaptureFixture) -> None:
    course.replace("import math", "import math  # changed")
    assert make_release(course.root / "dist", root=course.root) == 1
    assert f"course/{KEY}.ipynb: differs from its source: run make course first" in capsys.readouterr().err
    assert not (course.root / "dist").exists()


def test_learners_own_file_with_answers_stops_the_release(course: Project, capsys: pytest.CaptureFixture) -> None:
    stray = course.root / "course" / "stage1_foundations" / "copy of the master.ipynb"
    stray.write_bytes(course.master.read_bytes())
    assert make_release(course.root / "dist", root=course.root) == 1
    assert "copy of the master.ipynb: holds a marker of an answer" in capsys.readouterr().err


def test_this_repository_gives_nothing_away() -> None:
    """No answer and no hidden test of a real lesson in any notebook that learners get, its own or another."""
    texts = {}
    for path in sorted((ROOT / "course").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells for line in split_statements("".join(cell["source"]))]
        texts[path.name] = "\n".join(["", *lines, ""])
    told = []
    for source in sorted((ROOT / "solutions").glob("*/*.py")):
        for cell in read_lesson(source).cells:
            runs = ["\n".join(["", *run, ""]) for run in find_telling_lines(cell)]
            told += [(source.name, cell.label, name) for name, text in texts.items() if any(r in text for r in runs)]
    assert not told
