"""A course of one tiny lesson, with a run of it, and the Python that has the site's packages."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from autograder.build import build_course
from autograder.layout import ROOT

sys.path.append(str(Path(__file__).parents[1] / "builder"))  # the tiny lesson is theirs
from tiny_course import KEY, Project

RUN = {
    "created": "2026-01-02T03:04:05+00:00",
    "profile": "cpu",
    "python": "3.11.7",
    "device": "A CPU, 2 cores",
    "torch": "2.13.0",
    "triton": None,
}
MAKE = (
    "import sys, pathlib; from autograder.site.build import make_site; "
    "root, out = map(pathlib.Path, sys.argv[1:3]); "
    "sys.exit(make_site(out, solutions=sys.argv[3:] == ['answers'], root=root))"
)


@pytest.fixture(scope="session")
def python() -> str:
    """`.venv-site`, or what LLM40_SITE_PYTHON names."""
    path = os.environ.get("LLM40_SITE_PYTHON") or ROOT / ".venv-site" / "bin" / "python"
    if not Path(path).is_file():
        pytest.skip("the site's packages are not here: make site sets them up")
    return str(path)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Project:
    """The course that tests only read."""
    project = Project(tmp_path_factory.mktemp("site") / "课程 of lessons")
    (project.root / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/someone/course"\n', encoding="utf-8"
    )
    for name in ("learners", "grading"):
        (project.root / "docs").mkdir(exist_ok=True)
        (project.root / "docs" / f"{name}.md").write_text(f"# The {name} page\n", encoding="utf-8")
    project.replace("**length**", "**squared length**")
    assert build_course(root=project.root) == 0
    pretend_run(project)
    return project


@pytest.fixture
def copied(original: Project, tmp_path: Path) -> Path:
    """The folder of a copy, for tests that change it."""
    return Path(shutil.copytree(original.root, tmp_path / "copy", ignore=shutil.ignore_patterns("site*")))


def pretend_run(project: Project) -> None:
    """build/executed as `make run` leaves it: the experiment has drawn and printed, the exercise has printed too."""
    executed = json.loads(project.master.read_text(encoding="utf-8"))
    executed["metadata"]["llm40"]["run"] = RUN
    for cell in executed["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"] = 1
        if "experiment" in cell["metadata"].get("tags", []):
            cell["outputs"] = [say("the lengths are here"), draw()]
        elif cell["metadata"].get("nbgrader", {}).get("solution"):
            cell["outputs"] = [say("printed by the answer")]
    path = project.root / "build" / "executed" / f"{KEY}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(executed), encoding="utf-8")


def say(text: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": [f"{text}\n"]}


def draw() -> dict:
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([1, 2])
    png = io.BytesIO()
    figure.savefig(png)
    plt.close(figure)
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": "<Figure>"}
    return {"output_type": "display_data", "data": data, "metadata": {}}


@pytest.fixture(scope="session")
def make(python: str):
    """Makes the site of a project; returns what the process said, and the site's folder."""

    def run(root: Path, *options: str, out: Path | None = None) -> tuple[subprocess.CompletedProcess, Path]:
        out = out or root / "build" / "site"
        command = [python, "-c", MAKE, str(root), str(out), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False), out

    return run
