"""The archives: one for learners, with nothing in it that gives an answer away, and one for instructors, with all."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from autograder.build import ROOT, CourseError, Layout, build, stale_files

# What learners get: the lessons, the library they import, and what sets up the environment.
LEARNERS = (
    "course/",
    "docs/",
    "llm40/",
    "LICENSE",
    "Makefile",
    "README.md",
    "environment.yml",
    "pyproject.toml",
    "requirements.lock",
)
NEVER = (".git", ".venv", "build", "dist", "grades", "__pycache__", ".ipynb_checkpoints")
MARKERS = ("BEGIN SOLUTION", "BEGIN HIDDEN TESTS")
EPOCH = (1980, 1, 1, 0, 0, 0)  # one date for every file, so that the same course gives the same bytes


def make_release(out: Path, root: Path = ROOT) -> int:
    """Write both archives into `out`; returns the exit code, 1 where course/ is not what solutions/ give."""
    layout = Layout(root)
    if not layout.solutions.is_dir():
        print("solutions/ is not here: this is the learners' edition, which makes no release", file=sys.stderr)
        return 2
    try:
        build(layout.written(), layout)
        stale = stale_files(layout, layout.written())
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    for path, why in stale:
        print(f"{path.relative_to(root).as_posix()}: {why}: run make course first", file=sys.stderr)
    if stale:
        return 1

    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    files = project_files(root)
    for edition, chosen in (("learners", [f for f in files if f.startswith(LEARNERS)]), ("instructors", files)):
        if edition == "learners":
            told = [f for f in chosen if f.startswith("course/") and gives_away(root / f)]
            if told:
                print(f"{', '.join(told)}: holds a marker of an answer; no archive is written", file=sys.stderr)
                return 1
        name = f"llm40-{edition}-{version}"
        path = write_zip(out / f"{name}.zip", name, root, chosen)
        print(f"{path}: {len(chosen)} files, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def project_files(root: Path) -> list[str]:
    """Every file of the project, sorted: those that git knows or would add, or, without git, all but what is made."""
    if (root / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root, capture_output=True, check=True,
        ).stdout.decode().split("\0")  # fmt: skip
    else:
        listed = [
            p.relative_to(root).as_posix()
            for p in root.rglob("*")
            if not any(part in NEVER or part.endswith(".egg-info") for part in p.relative_to(root).parts)
        ]
    return sorted(f for f in listed if f and (root / f).is_file())


def gives_away(path: Path) -> bool:
    return any(marker in path.read_text(encoding="utf-8", errors="replace") for marker in MARKERS)


def write_zip(path: Path, folder: str, root: Path, files: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            info = zipfile.ZipInfo(f"{folder}/{name}", EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, on every system: it says how to read the next line
            info.external_attr = (0o755 if name == ".ci/run" else 0o644) << 16
            archive.writestr(info, (root / name).read_bytes())
    return path
