"""The sandbox's own parts: what it says where it cannot be, and what it shows of a project in an odd place."""

import os
import subprocess
from pathlib import Path

import pytest

from autograder.execute import Limits
from autograder.kernels import sandbox


def programs(folder: Path, **scripts: str) -> str:
    """A folder for PATH with these programs, and the others that a sandbox needs."""
    for name in ("choom", "prlimit", "setpriv", "sh"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("bwrap", "words"),
    [
        (None, ["bwrap is not installed", "apt install bubblewrap"]),
        ("echo bubblewrap 0.6.1", ["bubblewrap 0.8 or newer", "0.6.1"]),
        (
            'test "$1" = --version && echo bubblewrap 0.11.0 || { echo bwrap: No permissions >&2; exit 1; }',
            ["does not work here (bwrap: No permissions)", "user namespaces", "privileged"],
        ),
    ],
)
def test_where_it_cannot_be_it_says_why_and_what_to_do(tmp_path, monkeypatch, bwrap, words):
    monkeypatch.setenv("PATH", programs(tmp_path, **({"bwrap": bwrap} if bwrap else {})))
    said = sandbox._try_sandbox.__wrapped__()
    for word in words:
        assert word in said


def test_not_on_linux(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert "grade on a Linux machine" in sandbox._try_sandbox.__wrapped__()


def test_a_project_inside_of_what_is_shown_is_covered(tmp_path, monkeypatch):
    """An environment around the project, as in a container that has all in /usr/src, shows nothing more of it."""
    around = tmp_path / "environment"
    project = around / "project"
    for place in ("solutions", "tests", "llm40", "autograder", "autograder/judge", ".venv"):
        (project / place).mkdir(parents=True)
        (project / place / "file").touch()
    pythons = sandbox.find_pythons()
    monkeypatch.setattr(sandbox, "ROOT", project)
    monkeypatch.setattr(sandbox, "find_pythons", lambda: [*pythons, around, project / ".venv"])
    look = sandbox.make_command(["find", str(around), "-type", "f"], Limits(), sandbox.choose_user())
    seen = subprocess.run(
        look, env=sandbox.make_sandbox_environment(dict(os.environ), Limits()), capture_output=True, text=True
    )
    shown = [str(project / place / "file") for place in (".venv", "autograder/judge", "llm40")]
    assert sorted(seen.stdout.split()) == shown, seen.stderr


def test_where_memory_ends_the_kernel_goes_first():
    look = sandbox.make_command(["cat", "/proc/self/oom_score_adj"], Limits(), sandbox.choose_user())
    env = sandbox.make_sandbox_environment(dict(os.environ), Limits())
    assert subprocess.run(look, env=env, capture_output=True, text=True).stdout == "1000\n"


def test_a_gpu_has_its_devices_and_a_share_of_its_memory(monkeypatch):
    """Only the command line: no GPU was at hand."""
    monkeypatch.setattr(sandbox, "glob", lambda pattern: ["/dev/dri"] if pattern == "/dev/dri" else [])
    assert sandbox.find_gpus({}) == []  # a screen's, which PyTorch does not use
    monkeypatch.setattr(sandbox, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    monkeypatch.setattr(sandbox, "version", lambda package: "2.13.0")
    assert "/dev/nvidia0" in sandbox.find_gpus({})
    assert sandbox.find_gpus({"LLM40_PROFILE": "cpu"}) == []
    line = " ".join(sandbox.make_command(["true"], Limits(memory=7), None, gpu=sandbox.find_gpus({})))
    assert "--dev-bind /dev/nvidia0 /dev/nvidia0" in line
    assert "--ro-bind /sys /sys" in line
    assert "--data=7" in line  # CUDA reserves more addresses than --as could allow
    assert "--as=" not in line
    share = sandbox.make_sandbox_environment({}, Limits(gpu=0.25))["PYTORCH_CUDA_ALLOC_CONF"]
    assert share == "per_process_memory_fraction:0.250"
    monkeypatch.setattr(sandbox, "version", lambda package: "2.11.0+cu130")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in sandbox.make_sandbox_environment({}, Limits(gpu=0.25))
