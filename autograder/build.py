"""solutions → course: the masters in build/source, the learners' notebooks in course/.

A lesson's source becomes a notebook with nbgrader's metadata (the master, build/source/<stage>/<lesson>.ipynb), and
nbgrader's own generate_assignment makes the learner's from it: solutions and hidden tests cleared, cells locked,
checksums. Everything in both is derived from the source, so a rebuild without a change changes no byte.
"""

import hashlib
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from autograder import catalog, lesson, rules
from autograder.catalog import Entry
from autograder.layout import ROOT, Layout, write
from autograder.leaks import find_leaks
from autograder.lesson import LessonError
from autograder.notebooks import dumps, find_seal, is_as_built, make_master, seal
from autograder.roadmap import make_index, make_notation

log = logging.getLogger(__name__)


class CourseError(Exception):
    """The course cannot be built; the message is one line or several, each complete."""


# --- the commands ---------------------------------------------------------------------------------------------


def build_course(lesson: str | None = None, stage: str | None = None, check: bool = False, root: Path = ROOT) -> int:
    """Rebuild course/, or with `check` only compare it with what solutions/ give; returns the exit code."""
    layout = Layout(root)
    try:
        if not layout.solutions.is_dir():
            print("solutions/ is not here: this is the learners' edition, whose course/ is complete", file=sys.stderr)
            return 2
        entries = _select_written(layout, lesson, stage)
    except (catalog.NoSuchLesson, CourseError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        made = build_lessons(entries, layout)
        stale = find_stale_files(layout, entries)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    if check:
        for path, why in stale:
            print(f"{path.relative_to(root).as_posix()}: {why}; run make course and commit it", file=sys.stderr)
        print(f"course/ agrees with solutions/: {len(entries)} lessons" if not stale else "course/ is out of date")
        return 1 if stale else 0
    try:
        update_course(layout, entries)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    for path, why in stale:
        print(f"{path.relative_to(root).as_posix()}: {why}")
    print(f"course/ is up to date: {len(entries)} lessons, {len(made)} built, {len(stale)} files changed")
    return 0


def build_sources(keys: Sequence[str], root: Path = ROOT) -> int:
    """Make masters and learners' notebooks of these lessons (`<stage>/<lesson>`) current; returns the exit code."""
    layout = Layout(root)
    try:
        strangers = [key for key in keys if key not in catalog.BY_KEY]
        if strangers:
            raise CourseError(f"solutions/{strangers[0]}.py: no such lesson in autograder/catalog.py")
        entries = [catalog.BY_KEY[key] for key in keys]
        build_lessons(entries, layout)
        update_course(layout, entries)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _select_written(layout: Layout, lesson: str | None, stage: str | None) -> list[Entry]:
    strangers = [p for p in sorted(layout.solutions.rglob("*.py")) if _find_key(layout, p) not in catalog.BY_KEY]
    if strangers:
        names = ", ".join(p.relative_to(layout.root).as_posix() for p in strangers)
        raise CourseError(f"{names}: no such lesson in autograder/catalog.py")
    chosen = catalog.select(lesson, stage)
    entries = [entry for entry in chosen if layout.find_source(entry).is_file()]
    if lesson and not entries:
        raise CourseError(f"solutions/{chosen[0].key}.py is not written yet")
    return entries


def _find_key(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.solutions).with_suffix("").as_posix()


# --- building -------------------------------------------------------------------------------------------------


def build_lessons(entries: Iterable[Entry], layout: Layout) -> list[Entry]:
    """Bring build/source and build/release up to date for these lessons; returns those that had to be built.

    Raises CourseError with every rule that a source breaks, after the other lessons have been built.
    """
    stamps = _read_stamps(layout)
    stale = [e for e in entries if stamps.get(e.key) != _make_stamp(layout, e)]
    log.debug("%d lessons to build: %s", len(stale), ", ".join(entry.name for entry in stale) or "none")
    problems: list[str] = []
    sources, masters = {}, {}
    for entry in stale:
        try:
            read = lesson.read_lesson(layout.find_source(entry))
        except LessonError as error:
            log.debug("%s: cannot be read: %d mistakes", entry.key, len(error.lines))
            problems += error.lines
            continue
        broken = rules.judge(read)
        log.debug("%s: read, %d cells, %d rules broken", entry.key, len(read.cells), len(broken))
        problems += broken
        if not broken:
            sources[entry] = read
            masters[entry] = dumps(make_master(read, layout))
    learners = generate(masters) if masters else {}
    made = []
    for entry, text in masters.items():
        leaked = find_leaks(sources[entry], learners[entry])
        log.debug("%s: learner's notebook made, %d leaks", entry.key, len(leaked))
        problems += leaked
        if not leaked:
            sealed = find_seal(json.loads(learners[entry]))  # in both: nbgrader's own command hands it on
            write(layout.masters / f"{entry.key}.ipynb", dumps(seal(json.loads(text), sealed)))
            write(layout.learners / f"{entry.key}.ipynb", dumps(seal(json.loads(learners[entry]), sealed)))
            stamps[entry.key] = _make_stamp(layout, entry)
            made.append(entry)
    if made:
        write(layout.stamps, json.dumps(stamps, indent=1, sort_keys=True) + "\n")
    if problems:
        raise CourseError("\n".join(problems))
    return made


def _read_stamps(layout: Layout) -> dict[str, list[str]]:
    try:
        return json.loads(layout.stamps.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _make_stamp(layout: Layout, entry: Entry) -> list[str]:
    """Hashes of all that goes into a lesson and of what came out: equal stamps mean that nothing is to be done."""
    here = Path(__file__).parent
    names = ("build", "catalog", "layout", "leaks", "lesson", "notebooks", "rules", "templating")
    code = [*(here / f"{name}.py" for name in names), here / "templates" / "opening.md.j2"]
    made = [layout.masters / f"{entry.key}.ipynb", layout.learners / f"{entry.key}.ipynb"]
    linked = ",".join(e.key for e in lesson.find_prerequisites(entry) if layout.find_source(e).is_file())
    hashes = [hashlib.sha256(linked.encode()).hexdigest()]
    settings = [ROOT / "nbgrader_config.py", ROOT / "pyproject.toml"]  # the latter names the repository
    for path in [layout.find_source(entry), *code, *settings, *made]:
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
    return hashes


def generate(masters: dict[Entry, str]) -> dict[Entry, str]:
    """The learners' notebooks, made by nbgrader's generate_assignment from the masters' text.

    It runs in a temporary folder and without a gradebook (its own `--no-db`): no class's grades are read or written,
    and nothing depends on the characters in the project's path.
    """
    from nbgrader.converters import GenerateAssignment
    from nbgrader.converters.base import NbGraderException
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    converter_log = logging.getLogger("autograder.build.nbgrader")
    converter_log.setLevel(logging.NOTSET if log.isEnabledFor(logging.DEBUG) else logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="llm40-build-") as folder:
        config.CourseDirectory.root = str(Path(folder).resolve())
        config.GenerateAssignment.no_database = True
        config.SaveCells.enabled = False
        for entry, text in masters.items():
            write(Path(folder, "build", "source", f"{entry.key}.ipynb"), text)
        for stage in dict.fromkeys(entry.stage.folder for entry in masters):
            config.CourseDirectory.assignment_id = stage
            coursedir = CourseDirectory(config=config, log=converter_log)
            try:
                GenerateAssignment(coursedir=coursedir, config=config, log=converter_log).start()
            except NbGraderException as error:
                raise CourseError(f"{stage}: nbgrader could not make the learners' notebooks: {error}") from error
        return {e: Path(folder, "course", f"{e.key}.ipynb").read_text(encoding="utf-8") for e in masters}


# --- course/ --------------------------------------------------------------------------------------------------


def _collect_expected(layout: Layout, entries: Iterable[Entry]) -> dict[Path, str]:
    """The texts that course/ should hold for these lessons, those of the pages of all lessons, and README's."""
    texts = {e: (layout.learners / f"{e.key}.ipynb").read_text(encoding="utf-8") for e in entries}
    minutes = {e: _read_minutes(layout, e, texts.get(e)) for e in layout.list_written()}
    return {
        **{layout.course / f"{e.key}.ipynb": text for e, text in texts.items()},
        layout.course / "index.ipynb": dumps(seal(make_index(minutes))),
        layout.course / "notation.ipynb": dumps(seal(make_notation())),
        **_update_state(layout),
    }


STATE = re.compile(r"\b\d+ of \d+ lessons are written\b")


def _update_state(layout: Layout) -> dict[Path, str]:
    """README with the number of lessons that are written, where it has such a sentence."""
    path = layout.root / "README.md"
    text = lesson.read_text(path) if path.is_file() else ""
    if not STATE.search(text):
        return {}
    return {path: STATE.sub(f"{len(layout.list_written())} of {len(catalog.LESSONS)} lessons are written", text)}


def _read_minutes(layout: Layout, entry: Entry, text: str | None) -> tuple[int, int]:
    """(core, whole) of a lesson: from its notebook's text, or that in course/, or where there is none from its source.

    Raises CourseError for a source that cannot be read.
    """
    path = layout.course / f"{entry.key}.ipynb"
    if text is None and path.is_file():
        text = path.read_text(encoding="utf-8")
    try:
        minutes = json.loads(text or "{}")["metadata"]["llm40"]["minutes"]
        return minutes["core"], minutes["whole"]
    except (ValueError, KeyError, TypeError):  # not built yet, or by an older builder, or spoiled
        try:
            return lesson.read_lesson(layout.find_source(entry)).minutes
        except LessonError as error:
            raise CourseError("\n".join(error.lines)) from error


def _find_abandoned(layout: Layout) -> list[Path]:
    """Lessons in course/ and build/source whose source is gone; learners' own files there are left alone."""
    written = {entry.key for entry in layout.list_written()}
    gone = [entry.key for entry in catalog.LESSONS if entry.key not in written]
    paths = [folder / f"{key}.ipynb" for folder in (layout.course, layout.masters, layout.learners) for key in gone]
    return [path for path in paths if path.is_file()]


def find_stale_files(layout: Layout, entries: Iterable[Entry]) -> list[tuple[Path, str]]:
    """(file in course/, or README; what is wrong with it), line ends aside: git may have changed those."""
    found = []
    for path, text in _collect_expected(layout, entries).items():
        if not path.is_file():
            found.append((path, "is missing"))
        elif path.read_bytes().replace(b"\r\n", b"\n") != text.encode():
            found.append((path, "differs from its source"))
    found += [(path, "has no source any more") for path in _find_abandoned(layout) if layout.course in path.parents]
    return sorted(found)


def update_course(layout: Layout, entries: Iterable[Entry]) -> None:
    """Make course/ what build/release says; files that are right already are not touched.

    Raises CourseError, after the rest is done, for notebooks that somebody has written in: those stay as they are.
    """
    expected = _collect_expected(layout, entries)
    kept = []
    for path, _ in find_stale_files(layout, entries):
        if path not in expected:
            continue
        if path.suffix == ".ipynb" and _is_written_in(path, layout):
            kept.append(path)
        else:
            write(path, expected[path])
    for path in _find_abandoned(layout):
        if layout.course in path.parents and _is_written_in(path, layout):
            kept.append(path)
        else:
            path.unlink()
    if kept:
        raise CourseError("\n".join(_tell_refusal(path, layout) for path in kept))


def _is_written_in(path: Path, layout: Layout) -> bool:
    """Whether a notebook in course/ holds what neither a build made nor git keeps: somebody's answers, it may be."""
    text = path.read_bytes() if path.is_file() else b""
    return bool(text.strip()) and not is_as_built(text) and not _is_committed(path, layout)


def _is_committed(path: Path, layout: Layout) -> bool:
    """Whether git has the file as it lies here."""
    command = ["git", "status", "--porcelain", "--ignored", "--", path.relative_to(layout.root).as_posix()]
    if not (layout.root / ".git").exists():
        return False
    try:
        done = subprocess.run(command, cwd=layout.root, capture_output=True, check=False)
    except OSError:  # no git here
        return False
    return done.returncode == 0 and not done.stdout


def _tell_refusal(path: Path, layout: Layout) -> str:
    here = path.relative_to(layout.root).as_posix()
    place = layout.work / path.relative_to(layout.course)
    place = place.with_stem(f"{place.stem} (from course)") if place.exists() else place
    there = place.relative_to(layout.root).as_posix()
    return f"{here}: not rebuilt, for somebody has written in it: move it to {there} (or delete it), and run this again"
