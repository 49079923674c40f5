"""solutions → course: the masters in build/source, the learners' notebooks in course/.

A lesson's source becomes a notebook with nbgrader's metadata (the master, build/source/<stage>/<lesson>.ipynb), and
nbgrader's own generate_assignment makes the learner's from it: solutions and hidden tests cleared, cells locked,
checksums. Everything in both is derived from the source, so a rebuild without a change changes no byte.

How the cells are told apart, by those who read the notebooks:

    exercise    nbgrader: solution, grade_id `sdpa`          first line `# exercise sdpa · ●●○ · 15 min`
    check       nbgrader: grade, locked, points, `sdpa-check-1`   first line `# check sdpa · 2 points`
    experiment  tag `experiment`
    answer      metadata.llm40.role `answer`, id `answer-…` (nbgrader has no cell for prose that nobody grades)
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autograder import catalog, lesson
from autograder.catalog import Entry
from autograder.lesson import Cell, Header, Lesson, LessonError

ROOT = Path(__file__).resolve().parent.parent
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


@dataclass(frozen=True)
class Layout:
    """Where a project's folders are: the real ones, or a test's."""

    root: Path

    @property
    def solutions(self) -> Path:
        return self.root / "solutions"

    @property
    def course(self) -> Path:
        return self.root / "course"

    @property
    def masters(self) -> Path:
        return self.root / "build" / "source"

    @property
    def learners(self) -> Path:
        """The learners' notebooks as they were generated last; course/ is a copy of these."""
        return self.root / "build" / "release"

    @property
    def stamps(self) -> Path:
        return self.root / "build" / "stamps.json"

    def source(self, entry: Entry) -> Path:
        return self.solutions / f"{entry.key}.py"

    def written(self) -> list[Entry]:
        """The lessons that have a source."""
        return [entry for entry in catalog.LESSONS if self.source(entry).is_file()]


class CourseError(Exception):
    """The course cannot be built; the message is one line or several, each complete."""


# --- the commands ---------------------------------------------------------------------------------------------


def build_course(
    lesson: str | None = None, stage: str | None = None, check: bool = False, root: Path = ROOT
) -> int:
    """Rebuild course/, or with `check` only compare it with what solutions/ give; returns the exit code."""
    layout = Layout(root)
    try:
        if not layout.solutions.is_dir():
            print("solutions/ is not here: this is the learners' edition, whose course/ is complete", file=sys.stderr)
            return 2
        entries = _wanted(layout, lesson, stage)
    except (catalog.NoSuchLesson, CourseError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        made = build(entries, layout)
        stale = stale_files(layout, entries)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    if check:
        for path, why in stale:
            print(f"{path.relative_to(root).as_posix()}: {why}; run make course and commit it", file=sys.stderr)
        print(f"course/ agrees with solutions/: {len(entries)} lessons" if not stale else "course/ is out of date")
        return 1 if stale else 0
    update(layout, entries)
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
        build(entries, layout)
        update(layout, entries)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _wanted(layout: Layout, lesson: str | None, stage: str | None) -> list[Entry]:
    strangers = [p for p in sorted(layout.solutions.rglob("*.py")) if _key(layout, p) not in catalog.BY_KEY]
    if strangers:
        names = ", ".join(p.relative_to(layout.root).as_posix() for p in strangers)
        raise CourseError(f"{names}: no such lesson in autograder/catalog.py")
    chosen = catalog.select(lesson, stage)
    entries = [entry for entry in chosen if layout.source(entry).is_file()]
    if lesson and not entries:
        raise CourseError(f"solutions/{chosen[0].key}.py is not written yet")
    return entries


def _key(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.solutions).with_suffix("").as_posix()


# --- building -------------------------------------------------------------------------------------------------


def build(entries: Iterable[Entry], layout: Layout) -> list[Entry]:
    """Bring build/source and build/release up to date for these lessons; returns those that had to be built.

    Raises CourseError with every rule that a source breaks, after the other lessons have been built.
    """
    stamps = _read_stamps(layout)
    stale = [e for e in entries if stamps.get(e.key) != _stamp(layout, e)]
    problems: list[str] = []
    sources, masters = {}, {}
    for entry in stale:
        try:
            sources[entry] = lesson.read_lesson(layout.source(entry))
            masters[entry] = dumps(master(sources[entry], layout))
        except LessonError as error:
            problems += error.lines
    learners = generate(masters) if masters else {}
    made = []
    for entry, text in masters.items():
        leaked = leaks(sources[entry], learners[entry])
        problems += leaked
        if not leaked:
            write(layout.masters / f"{entry.key}.ipynb", text)
            write(layout.learners / f"{entry.key}.ipynb", learners[entry])
            stamps[entry.key] = _stamp(layout, entry)
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


def _stamp(layout: Layout, entry: Entry) -> list[str]:
    """Hashes of all that goes into a lesson and of what came out: equal stamps mean that nothing is to be done."""
    here = Path(__file__).parent
    code = [here / n for n in ("build.py", "lesson.py", "catalog.py", "templates/opening.md.j2")]
    made = [layout.masters / f"{entry.key}.ipynb", layout.learners / f"{entry.key}.ipynb"]
    linked = ",".join(e.key for e in lesson.prerequisites(entry) if layout.source(e).is_file())
    hashes = [hashlib.sha256(linked.encode()).hexdigest()]
    for path in [layout.source(entry), *code, ROOT / "nbgrader_config.py", *made]:
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
    return hashes


def master(read: Lesson, layout: Layout) -> dict:
    """The instructor's notebook, as nbformat 4.5's JSON."""
    opening = {
        "cell_type": "markdown",
        "id": "opening",
        "metadata": {"deletable": False, "editable": False},
        "source": opening_text(read, layout),
    }
    return {
        "cells": [opening, *(_notebook_cell(cell) for cell in read.cells)],
        "metadata": {
            "kernelspec": KERNELSPEC,
            "language_info": {"name": "python"},
            "llm40": {"lesson": read.entry.key, "title": read.header.title},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _notebook_cell(cell: Cell) -> dict:
    metadata: dict = {}
    source = cell.source
    if cell.role == "exercise":
        source = f"# exercise {cell.name} · {dots(cell.difficulty)} · {cell.minutes:g} min\n{source}"
        metadata["nbgrader"] = _nbgrader(cell, solution=True)
    elif cell.role == "check":
        source = f"# check {cell.name} · {cell.points:g} point{'' if cell.points == 1 else 's'}\n{source}"
        metadata["nbgrader"] = _nbgrader(cell, grade=True, locked=True, points=cell.points)
    elif cell.role == "experiment":
        metadata["tags"] = ["experiment"]
    elif cell.role == "answer":
        source = f"<!-- BEGIN SOLUTION -->\n{source}\n<!-- END SOLUTION -->"
        metadata["llm40"] = {"role": "answer"}
    made = {"cell_type": cell.kind, "id": cell.id, "metadata": metadata, "source": source}
    if cell.kind == "code":
        made |= {"execution_count": None, "outputs": []}
    return made


def _nbgrader(cell: Cell, **marks) -> dict:
    return {
        "cell_type": "code",
        "grade": False,
        "grade_id": cell.id,
        "locked": False,
        "schema_version": 3,
        "solution": False,
        "task": False,
        **marks,
    }


def dots(difficulty: int) -> str:
    return "●" * difficulty + "○" * (3 - difficulty)


def hours(minutes: int) -> str:
    """`2 h 30 min`"""
    parts = [f"{minutes // 60} h" if minutes >= 60 else "", f"{minutes % 60} min" if minutes % 60 else ""]
    return " ".join(filter(None, parts))


def opening_text(read: Lesson, layout: Layout) -> str:
    """The lesson's first cell: what, how long, after which lessons, on which machine, from which papers."""
    requires = []
    for entry in lesson.prerequisites(read.entry):
        name = f"{entry.number:02} {entry.title}"
        written = layout.source(entry).is_file()
        requires.append(f"[{name}](../{entry.key}.ipynb)" if written else name)
    points = sum(cell.points for cell in read.cells)
    return render(
        "opening.md.j2",
        number=f"{read.entry.number:02}",
        header=read.header,
        stage=read.entry.stage,
        time=hours(read.header.minutes),
        exercises=len(read.exercises),
        exercise_time=hours(int(sum(cell.minutes for cell in read.exercises))),
        points=f"{points:g}, from {sum(c.role == 'check' for c in read.cells)} checks",
        requires=", ".join(requires),
        papers=[link_arxiv(paper) for paper in read.header.papers],
    ).strip()


def link_arxiv(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def render(template: str, **values) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined).get_template(template).render(**values)


def dumps(notebook: dict) -> str:
    """The notebook's text as nbformat writes it, after its schema has been checked."""
    import nbformat

    node = nbformat.from_dict(notebook)
    nbformat.validate(node)
    return nbformat.writes(node) + "\n"


def generate(masters: dict[Entry, str]) -> dict[Entry, str]:
    """The learners' notebooks, made by nbgrader's generate_assignment from the masters' text.

    It runs in a temporary folder and without a gradebook (its own `--no-db`): no class's grades are read or written,
    and nothing depends on the characters in the project's path.
    """
    import logging

    from nbgrader.converters import GenerateAssignment
    from nbgrader.converters.base import NbGraderException
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    log = logging.getLogger("autograder.generate")
    log.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="llm40-build-") as folder:
        config.CourseDirectory.root = str(Path(folder).resolve())
        config.GenerateAssignment.no_database = True
        config.SaveCells.enabled = False
        for entry, text in masters.items():
            write(Path(folder, "build", "source", f"{entry.key}.ipynb"), text)
        for stage in dict.fromkeys(entry.stage.folder for entry in masters):
            config.CourseDirectory.assignment_id = stage
            coursedir = CourseDirectory(config=config, log=log)
            try:
                GenerateAssignment(coursedir=coursedir, config=config, log=log).start()
            except NbGraderException as error:
                raise CourseError(f"{stage}: nbgrader could not make the learners' notebooks: {error}") from error
        return {e: Path(folder, "course", f"{e.key}.ipynb").read_text(encoding="utf-8") for e in masters}


def leaks(read: Lesson, learners: str) -> list[str]:
    """What of the answers and hidden tests is still in the learner's notebook, one line each: nothing, or a bug."""
    where = lesson.shown_path(read.path)
    problems = []
    text = "\n"
    for cell in json.loads(learners)["cells"]:
        source = "".join(cell["source"])
        text += "\n".join([*(line.strip() for line in source.split("\n") if line.strip()), "\0\n"])
        if cell.get("outputs"):
            problems.append(f"{where}:1: file: the learner's notebook has outputs")
        for marker in ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"):
            if marker in source:
                problems.append(f"{where}:1: file: `{marker}` is left in the learner's cell {cell['id']}")
    for cell in read.cells:
        told = next((run for run in telling_lines(cell) if "\n".join(["", *run, ""]) in text), None)
        if told:
            what = "hidden tests" if cell.role == "check" else "answer"
            problems.append(f"{where}:{cell.line}: {cell.label}: its {what} can be read elsewhere in the "
                            f"learner's notebook: `{told[0]}` …")
    return problems


# The lines of every training loop in PyTorch: no secret.
TRAINING_STEP = {"optimizer.zero_grad()", "loss.backward()", "optimizer.step()", "losses.append(loss.item())"}


def telling_lines(cell: Cell) -> list[list[str]]:
    """Runs of stripped lines that give a cell's secret away.

    Of an answer any three lines in a row; of hidden tests only the whole, since a visible test may well be set up in
    the same way. Less than 30 characters are no secret: `return x` stands everywhere; nor are TRAINING_STEP's lines.
    """
    found = []
    for secret in lesson.secrets(cell):
        lines = [line.strip() for line in secret.split("\n") if line.strip()]
        whole = cell.role == "check" or len(lines) <= 3
        found += [lines] if whole else [lines[i : i + 3] for i in range(len(lines) - 2)]
    return [run for run in found if len("".join(run)) >= 30 and not TRAINING_STEP.issuperset(run)]


# --- course/ --------------------------------------------------------------------------------------------------


def _expected(layout: Layout, entries: Iterable[Entry]) -> dict[Path, str]:
    """What course/ should hold for these lessons, and the pages that belong to all."""
    from autograder.roadmap import index_notebook, notation_notebook

    expected = {
        layout.course / f"{e.key}.ipynb": (layout.learners / f"{e.key}.ipynb").read_text(encoding="utf-8")
        for e in entries
    }
    expected[layout.course / "index.ipynb"] = dumps(index_notebook(headers(layout)))
    expected[layout.course / "notation.ipynb"] = dumps(notation_notebook())
    return expected


def headers(layout: Layout) -> dict[Entry, Header]:
    """The headers of the written lessons.

    Raises CourseError for a header that is at fault.
    """
    found, problems = {}, []
    for entry in layout.written():
        try:
            found[entry], _ = lesson.read_header(layout.source(entry))
        except LessonError as error:
            problems += error.lines
    if problems:
        raise CourseError("\n".join(problems))
    return found


def _abandoned(layout: Layout) -> list[Path]:
    """Lessons in course/ and build/source whose source is gone; a learner's own files there are nobody's business."""
    written = {entry.key for entry in layout.written()}
    gone = [entry.key for entry in catalog.LESSONS if entry.key not in written]
    paths = [folder / f"{key}.ipynb" for folder in (layout.course, layout.masters, layout.learners) for key in gone]
    return [path for path in paths if path.is_file()]


def stale_files(layout: Layout, entries: Iterable[Entry]) -> list[tuple[Path, str]]:
    """(file in course/, what is wrong with it), line ends aside: git may have changed those."""
    found = []
    for path, text in _expected(layout, entries).items():
        if not path.is_file():
            found.append((path, "is missing"))
        elif path.read_bytes().replace(b"\r\n", b"\n") != text.encode():
            found.append((path, "differs from its source"))
    found += [(path, "has no source any more") for path in _abandoned(layout) if layout.course in path.parents]
    return sorted(found)


def update(layout: Layout, entries: Iterable[Entry]) -> None:
    """Make course/ what build/release says; files that are right already are not touched."""
    expected = _expected(layout, entries)
    for path, _ in stale_files(layout, entries):
        if path in expected:
            write(path, expected[path])
    for path in _abandoned(layout):
        path.unlink()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, with `\\n` line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(text.encode())
    temporary.replace(path)
