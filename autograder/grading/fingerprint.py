"""A hash of all that a result depends on: while it stays the same, so does the grade, and no notebook is run again."""

import hashlib
import json
import platform
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from autograder.grading.task import Task

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "triton", "numpy", "ipykernel")


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:  # with its length before it: no two lists of parts run together to the same bytes
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.hexdigest()


@cache
def find_versions() -> dict[str, str]:
    """Name → version of all that a grade depends on: Python, libraries, the project's two packages by their text."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # triton, where there is no Linux
            found[name] = "none"
    for package in ("llm40", "autograder"):
        # Weights are named by checksums.json, so their megabytes need not be read.
        texts = sorted(p for ending in ("*.py", "*.json") for p in (ROOT / package).rglob(ending))
        parts = [p.relative_to(ROOT).as_posix().encode() + b"\0" + p.read_bytes() for p in texts]
        found[package] = _digest(*parts)[:12]
    return found


def make_fingerprint(task: Task) -> str:
    """The hash of a task: submission, files, master, limits, seed, whether there is a sandbox, and versions."""
    given = b"missing" if task.submission is None else b"given" + task.submission
    limits = asdict(task.limits)
    del limits["gpu"]  # a share: it follows from how many are graded at once
    settings = {"limits": limits, "seed": task.seed, "sandbox": task.kernels.sandbox, "versions": find_versions()}
    files = [part for name, data in sorted(task.files.items()) for part in (name.encode(), data)]
    return _digest(given, task.master, json.dumps(settings, sort_keys=True).encode(), *files)


def digest_answers(sources: dict[str, str]) -> dict[str, str]:
    """Name → hash of a written answer's text."""
    return {name: _digest(source.encode("utf-8", "surrogatepass")) for name, source in sources.items()}
