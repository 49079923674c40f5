"""Does requirements.lock have a wheel for every package, on every machine and Python that the course is for?

    python tests/platforms.py

asks pip, in its own words a dry run, for each of them; needs the network. The hosted workflow runs it.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# What markers see of a machine, and the tags of the wheels that it takes, the newest first.
MACHINES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "Linux x86-64": (
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
        (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "manylinux2014_x86_64"),
    ),
    "Linux Arm": (
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64", "os_name": "posix"},
        (*(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1)), "manylinux2014_aarch64"),
    ),
    "Windows x86-64": (
        {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
        ("win_amd64",),
    ),
    "macOS 14, Apple silicon": (
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"},
        tuple(f"macosx_{major}_0_{kind}" for major in range(14, 10, -1) for kind in ("arm64", "universal2")),
    ),
}


def choose(machine: str, python: str) -> Iterator[str]:
    """The lock's lines that hold there, without their markers: pip would read those as of this machine."""
    here = default_environment() | MACHINES[machine][0]
    here |= {"python_version": python, "python_full_version": f"{python}.9", "implementation_name": "cpython"}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate(here):
                yield f"{one.name}{one.specifier}"


def resolve(case: tuple[str, str]) -> str:
    """Empty where there is a wheel for everything; else what pip says."""
    machine, python = case
    tags = [f"--platform={tag}" for tag in MACHINES[machine][1]]
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder, "chosen.txt")
        chosen.write_text("\n".join(choose(machine, python)), encoding="utf-8")
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", f"--target={folder}/none", *tags]
        # pip would compare what a package asks of Python with the one that pip runs on: that is done below.
        command += [f"--python-version={python}", "--implementation=cp", "--ignore-requires-python"]
        command += [f"--report={report}", "-r", str(chosen)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return "; ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
        found = [package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"]]
    strange = [p for p in found if f"{python}.9" not in SpecifierSet(p.get("requires_python") or "")]
    return "; ".join(f"{p['name']} {p['version']} asks for Python {p['requires_python']}" for p in strange)


if __name__ == "__main__":
    cases = list(itertools.product(MACHINES, PYTHONS))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(resolve, cases))
    for (machine, python), trouble in zip(cases, results, strict=True):
        print(f"Python {python}, {machine}: {trouble or 'a wheel for every package'}")
    sys.exit(any(results))
