"""CI's own files: the workflow against GitHub's schema, and every command in it against the Makefile."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "course.yml"
CI = ROOT / ".ci" / "run"


@pytest.fixture(scope="module")
def jobs() -> dict:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


@pytest.fixture(scope="module")
def makefile() -> tuple[set[str], set[str]]:
    """Its targets, and the variables that it takes."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+)\s*\??=", text, re.MULTILINE)
    return set(targets), set(variables)


def commands(job: dict) -> list[str]:
    return [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines()]


def check_schema(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_workflow_follows_githubs_schema():
    done = check_schema(WORKFLOW)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path):
    broken = tmp_path / "course.yml"
    broken.write_text(WORKFLOW.read_text(encoding="utf-8").replace("runs-on:", "run-on:"), encoding="utf-8")
    assert check_schema(broken).returncode != 0


def test_every_make_command_is_a_target_with_variables_it_takes(jobs, makefile):
    targets, variables = makefile
    calls = [shlex.split(line) for job in jobs.values() for line in commands(job) if line.startswith("make")]
    assert {"test", "course", "run", "grade", "site"} <= {call[1] for call in calls}
    for _, target, *options in calls:
        assert target in targets
        assert {option.split("=")[0] for option in options} <= variables


def test_pythons_are_those_of_the_package(jobs):
    with open(ROOT / "pyproject.toml", "rb") as file:
        supported = SpecifierSet(tomllib.load(file)["project"]["requires-python"])
    for name in ("tests", "cpu"):
        versions = jobs[name]["strategy"]["matrix"]["python"]
        assert versions == ["3.11", "3.12", "3.13"]
        assert all(version in supported for version in versions)


def test_the_gpu_is_ours_and_pull_requests_never_reach_it(jobs):
    gpu = jobs["gpu"]
    assert gpu["runs-on"] == ["self-hosted", "gpu"]
    events = set(re.findall(r"github\.event_name == '(\w+)'", gpu["if"]))
    assert events == {"schedule", "workflow_dispatch"}
    called = [shlex.split(line)[:2] for line in commands(gpu)]
    assert ["make", "gpu"] in called
    assert ["make", "gpu-wheels"] in called
    assert any(line.startswith("make run PROFILE=gpu") for line in commands(gpu))


def test_the_site_is_made_of_the_cpu_courses_run_and_only_main_is_published(jobs):
    steps = {step.get("uses", "").split("@")[0]: step for step in jobs["site"]["steps"]}
    [upload] = [step for step in jobs["cpu"]["steps"] if "upload-artifact" in step.get("uses", "")]
    name = upload["with"]["name"].replace("${{ matrix.python }}", "3.12")
    assert jobs["site"]["needs"] == "cpu"
    assert steps["actions/download-artifact"]["with"] == {"name": name, "path": "build/"}
    assert steps["actions/upload-pages-artifact"]["with"]["path"] == "build/site/"
    assert "site" in jobs["publish"]["needs"]
    assert "refs/heads/main" in jobs["publish"]["if"]
    assert "pull_request" in jobs["publish"]["if"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_reports_are_kept_whatever_happened(jobs, name):
    [upload] = [step for step in jobs[name]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    assert {"build/report.*", "build/executed/"} <= set(upload["with"]["path"].split())


def test_ci_run_calls_the_readmes_commands(makefile):
    assert os.access(CI, os.X_OK)
    subprocess.run(["bash", "-n", str(CI)], check=True)
    [called] = re.findall(r"^for target in (.+); do$", CI.read_text(encoding="utf-8"), re.MULTILINE)
    assert called.split() == ["test", "run", "grade"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in called.split():
        assert target in makefile[0]
        assert f"make {target}" in readme
