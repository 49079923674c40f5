"""The archives: one for learners, with nothing in it that gives an answer away, and one for instructors, with all."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from autograder.build import CourseError, build_lessons, find_stale_files
from autograder.layout import ROOT, Layout

EDITION = "autograder/learner/edition/"  # files of the learners' edition's own, for its root
# Learners get the lessons, the library they import, the files that set up the environment, and the modules of
# autograder that the learner's commands import.
LEARNERS = (
    "course/",
    "docs/learners.md",
    "llm40/",
    "LICENSE",
    "pyproject.toml",
    "requirements.lock",
    *(
        f"autograder/{name}"
        for name in (
            "__init__.py",
            "catalog.py",
            "execute.py",
            "grading/__init__.py",
            "grading/additions.py",
            "grading/archives.py",
            "grading/beside.py",
            "grading/files.py",
            "grading/late.py",
            "grading/masters.py",
            "grading/origins.py",
            "grading/owners.py",
            "grading/rebuild.py",
            "grading/verdicts.py",
            "judge/__init__.py",
            "judge/client.py",
            "judge/sources.py",
            "kernels/",
            "layout.py",
            "learner/",
            "lesson.py",
            "notebooks.py",
            "pool.py",
            "roadmap.py",
            "templates/work_index.md.j2",
            "templating.py",
            "text.py",
        )
    ),
)
NEVER = (".git", ".venv", ".venv-site", "build", "dist", "grades", "work", "__pycache__", ".ipynb_checkpoints")
MARKERS = ("BEGIN SOLUTION", "BEGIN HIDDEN TESTS")
EPOCH = (1980, 1, 1, 0, 0, 0)  # one date for every file, so that the same course gives the same bytes


def make_release(out: Path, root: Path = ROOT) -> int:
    """Write both archives into `out`; returns the exit code, 1 where course/ is not what solutions/ give."""
    layout = Layout(root)
    if not layout.solutions.is_dir():
        print("solutions/ is not here: this is the learners' edition, which makes no release", file=sys.stderr)
        return 2
    try:
        build_lessons(layout.list_written(), layout)
        stale = find_stale_files(layout, layout.list_written())
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    for path, why in stale:
        print(f"{path.relative_to(root).as_posix()}: {why}: run make course first", file=sys.stderr)
    if stale:
        return 1

    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    files = list_files(root)
    learners = choose_for_learners(files, root)
    for edition, chosen in (("learners", learners), ("instructors", {name: (root / name) for name in files})):
        if edition == "learners":
            told = [name for name in chosen if name.startswith("course/") and gives_away(root / name)]
            if told:
                print(f"{', '.join(told)}: holds a marker of an answer; no archive is written", file=sys.stderr)
                return 1
        name = f"llm40-{edition}-{version}"
        path = write_zip(out / f"{name}.zip", name, chosen)
        print(f"{path}: {len(chosen)} files, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def choose_for_learners(files: list[str], root: Path) -> dict[str, Path | bytes]:
    """Name in the learners' edition → the file, or what it holds there instead."""
    chosen: dict[str, Path | bytes] = {}
    for name in files:
        if name.startswith(EDITION):
            chosen[name.removeprefix(EDITION)] = root / name
        elif name.startswith(LEARNERS):
            chosen[name] = root / name
    # The instructors' commands are not here, so no script may start them.
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    chosen["pyproject.toml"] = project.replace('"autograder.cli:app"', '"autograder.learner.cli:app"').encode()
    return dict(sorted(chosen.items()))


def list_files(root: Path) -> list[str]:
    """Every file of the project, sorted: those that git knows or would add, or, without git, all but what is made."""
    if (root / ".git").exists():
        listed = (
            subprocess.run(
                ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                cwd=root,
                capture_output=True,
                check=True,
            )
            .stdout.decode()
            .split("\0")
        )
    else:
        listed = [
            p.relative_to(root).as_posix()
            for p in root.rglob("*")
            if not any(part in NEVER or part.endswith(".egg-info") for part in p.relative_to(root).parts)
        ]
    return sorted(f for f in listed if f and (root / f).is_file())


def gives_away(path: Path) -> bool:
    return any(marker in path.read_text(encoding="utf-8", errors="replace") for marker in MARKERS)


def write_zip(path: Path, folder: str, files: dict[str, Path | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(f"{folder}/{name}", EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, on every system: it says how to read the next line
            info.external_attr = (0o755 if name == ".ci/run" else 0o644) << 16
            archive.writestr(info, content if isinstance(content, bytes) else content.read_bytes())
    return path
