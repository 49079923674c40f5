"""A class graded: `SUBMITTED/<student>/<stage>/<lesson>.ipynb` → gradebook, tables, feedback, report.

This module knows folders and prints; the grading itself is in task, its distribution in engine, the database in
gradebook. A notebook whose result stands in the gradebook already, with everything it depends on unchanged, is not
graded again: a call that was interrupted, or killed, goes on where it was. The exit code says how it went: OK when
every submission got an answer (zero points included), USAGE when there was nothing to grade, FAULT when something of
ours failed.
"""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.utils import parse_utc
from tqdm import tqdm

from autograder import catalog
from autograder.build import build_sources
from autograder.catalog import Entry
from autograder.execute import Limits
from autograder.grading import exports, integrity, pages, similarity
from autograder.grading.engine import Engine, NoScheduler, cores, run_tasks
from autograder.grading.fingerprint import answer_digests, fingerprint
from autograder.grading.gradebook import COURSE, Gradebook, NoDatabase
from autograder.grading.late import BadConfig, no_penalty, penalty_of
from autograder.grading.rebuild import blank, name, role
from autograder.grading.task import Result, Task, by_hand, parse
from autograder.kernels.manager import Kernels
from autograder.kernels.sandbox import trouble
from autograder.sample_class import make as sample_class

OK, USAGE, FAULT = 0, 2, 3
ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "build" / "sample_class"
SEED = 40  # the same fresh inputs for everyone in a class, and again when it is graded again
LAYOUT = "SUBMITTED/<student>/<stage>/<lesson>.ipynb, for example {example}"
IGNORED = ("__MACOSX", "__pycache__", "lost+found")


class UsageError(Exception):
    """Nothing can be graded as asked; the message says what was expected and what was found."""


@dataclass
class Lesson:
    """A lesson that can be graded: its cells with hidden tests and without answers."""

    stage: str
    name: str
    title: str
    master: NotebookNode

    @property
    def number(self) -> str:
        return self.name.split("_")[0]


@dataclass
class Handed:
    """One notebook to grade; `path` is None where the student handed in others but not this one."""

    student: str
    lesson: Lesson
    path: Path | None
    flags: list[str]


# --- what is there --------------------------------------------------------------------------------------------


def read_masters(source: Path) -> list[Lesson]:
    """The lessons built in a folder like build/source."""
    lessons = []
    for path in sorted(source.glob("*/*.ipynb")):
        master = nbformat.read(path, as_version=4)
        title = master.metadata.get("llm40", {}).get("title", path.stem)
        master.metadata.setdefault("llm40", {})["methods"] = integrity.asked_methods(master)  # told by the answers
        lessons.append(Lesson(path.parent.name, path.stem, title, blank(master)))
    return lessons


def find_students(submitted: Path, example: str) -> list[Path]:
    """The students' folders."""
    expected = f"expected {LAYOUT.format(example=example)}"
    if not submitted.exists():
        raise UsageError(f"{submitted}: there is no such folder; {expected}")
    if not submitted.is_dir():
        raise UsageError(f"{submitted}: this is a file, not a folder; {expected}")
    students = [p for p in sorted(submitted.iterdir()) if p.is_dir() and p.name[0] != "." and p.name not in IGNORED]
    if not students:
        found = ", ".join(sorted(p.name for p in submitted.iterdir())[:5]) or "nothing"
        raise UsageError(f"{submitted}: no student's folder in it; {expected}; found {found}")
    return students


def find_notebooks(student: Path, lessons: list[Lesson]) -> tuple[list[Handed], list[str]]:
    """A student's notebooks, and a note for each that is no lesson's."""
    known = {(lesson.stage, lesson.name): lesson for lesson in lessons}
    handed, notes, strange = {}, [], []
    for path in sorted(student.rglob("*.ipynb")):
        inside = path.relative_to(student)
        if any(part.startswith(".") or part in IGNORED for part in inside.parts):
            continue
        if path.is_symlink() or not path.is_file():
            notes.append(f"{student.name}/{inside.as_posix()}: not a file of its own")
            continue
        lesson = known.get((inside.parent.as_posix(), path.stem))
        if lesson:
            handed[lesson.stage, lesson.name] = Handed(student.name, lesson, path, [])
        else:
            strange.append(inside)
    for inside in strange:  # "09_x (1).ipynb", "09_x-Copy1.ipynb": what browsers and JupyterLab make of a name
        stem = inside.stem
        here = [k for k in lessons if inside.parent.as_posix() == k.stage]
        lesson = next((k for k in here if stem.startswith((f"{k.name} ", f"{k.name}-"))), None)
        if lesson and (lesson.stage, lesson.name) not in handed:
            flag = f"file: named {inside.name}; taken for {lesson.name}.ipynb"
            handed[lesson.stage, lesson.name] = Handed(student.name, lesson, student / inside, [flag])
        else:
            notes.append(f"{student.name}/{inside.as_posix()}: no lesson has this name and place")
    return list(handed.values()), notes


def find_class(
    submitted: Path, lessons: list[Lesson], lesson: str | None, student: str | None
) -> tuple[list[Handed], list[str]]:
    """What is to be graded, and notes about what is not.

    A lesson is expected of everyone as soon as anyone has handed it in.
    """
    example = next((f"lin-mei/{k.stage}/{k.name}.ipynb" for k in lessons), f"lin-mei/{catalog.BY_NUMBER[9].key}.ipynb")
    students = find_students(submitted, example)
    if student is not None:
        students = [path for path in students if path.name == student]
        if not students:
            raise UsageError(f'{submitted}: there is no student "{student}" in it')
    if lesson is not None:
        wanted = lesson.removesuffix(".ipynb")
        lessons = [k for k in lessons if wanted == k.name or (wanted.isdecimal() and k.number == f"{int(wanted):02d}")]
        if not lessons:
            raise UsageError(f'there is no lesson "{lesson}"')
    found, notes = {}, []
    for path in students:
        found[path.name], more = find_notebooks(path, lessons)
        notes += [] if lesson else more
    given = {h.lesson.name for handed in found.values() for h in handed}
    if not given:
        seen = [p.relative_to(submitted).as_posix() for p in sorted(submitted.rglob("*.ipynb"))[:3]]
        raise UsageError(
            f"{submitted}: no notebook of {lesson or 'the course'} at the place where it belongs; "
            f"expected {LAYOUT.format(example=example)}; found {', '.join(seen) or 'no notebook at all'}"
        )
    handed = []
    for who, theirs in found.items():
        if not theirs and not lesson:
            notes.append(f"{who}: no notebook of the course in this folder")
        by_name = {h.lesson.name: h for h in theirs}
        handed += [by_name.get(k.name) or Handed(who, k, None, []) for k in lessons if k.name in given]
    return handed, notes


# --- grading --------------------------------------------------------------------------------------------------


def judged_by_person(result: Result, notebook: NotebookNode) -> dict[str, str]:
    """What a person's score is a score of: a written answer, or all of the learner's code where points are withheld."""
    written = {name(cell): cell.source for cell in notebook.cells if by_hand(cell)}
    code = "\n".join(cell.source for cell in notebook.cells if role(cell) in ("exercise", "added"))
    return written | {check.check: code for check in result.checks if check.status == "withheld"}


class Writer:
    """Makes the tasks, and writes each result as it comes: to the gradebook, and as files under `out`."""

    def __init__(self, out: Path, book: Gradebook, handed: list[Handed], submitted: Path, unsafe: bool):
        self.out = out
        self.unsafe = unsafe
        self.book = book
        self.submitted = submitted
        self.handed = {(h.student, h.lesson.stage, h.lesson.name): h for h in handed}
        self.fingerprints: dict[tuple[str, str, str], str] = {}
        self.times: dict[tuple[str, str, str], str | None] = {}  # when it was handed in
        self.results: list[Result] = []
        self.unchanged = 0

    def tasks(
        self, limits: Limits, seed: int, kernels: Kernels, again: bool, done: Callable[[Result], None]
    ) -> Iterator[Task]:
        """What is to be graded, one by one: a notebook is read when its turn comes.

        `done` is called after what needs no grading: a result that still holds (unless everything is to be graded
        `again`), and a file that the system does not let us read.
        """
        for (student, stage, lesson), h in self.handed.items():
            self.times[student, stage, lesson] = self._timestamp(h)
            try:
                data = h.path.read_bytes() if h.path else None
            except OSError as error:
                result = Result(student, stage, lesson, "fault", flags=[f"cannot be opened: {error}"])
                self.take(result)
                done(result)
                continue
            master = nbformat.writes(h.lesson.master).encode()
            task = Task(student, stage, lesson, data, master, limits, seed, kernels)
            self.fingerprints[student, stage, lesson] = fingerprint(task)
            kept = None if again else self._kept(student, stage, lesson)
            if kept is None:
                yield task
                continue
            self.results.append(kept)
            self.unchanged += 1
            done(kept)

    def _kept(self, *where: str) -> Result | None:
        """The result of an earlier call, if everything it depends on is the same and its files are there."""
        stored = self.book.stored(*where, self.times[where])
        if stored is None or stored[0] != self.fingerprints[where]:
            return None
        _, result, other_penalty = stored
        autograded, page = self._files(result)
        if result.status != "missing" and not (autograded.is_file() and page.is_file()):
            return None
        # A person's scores may have changed since, or what lateness costs.
        if result.status != "missing" and (other_penalty or any(check.status == "by hand" for check in result.checks)):
            result.notebook = autograded.read_bytes()
            self._write_page(result, page)
        result.flags[:0] = self.handed[where].flags
        result.notebook = None
        return result

    def take(self, result: Result) -> None:
        where = (result.student, result.stage, result.lesson)
        if result.status != "fault":
            notebook = parse(result.notebook) if result.notebook else None
            judged = answer_digests(judged_by_person(result, notebook)) if notebook else {}
            self.book.commit(result, self.fingerprints[where], judged, self.times[where], self._write_files)
        result.flags[:0] = self.handed[where].flags
        result.notebook = None
        self.results.append(result)

    def _files(self, result: Result) -> tuple[Path, Path]:
        """A result's executed notebook and its learner's page."""
        place = Path(result.student, result.stage)
        notebooks, pages_ = self.out / "autograded" / place, self.out / "feedback" / place
        return notebooks / f"{result.lesson}.ipynb", pages_ / f"{result.lesson}.html"

    def _write_files(self, result: Result) -> None:
        autograded, page = self._files(result)
        if result.notebook is None:
            autograded.unlink(missing_ok=True)
            page.unlink(missing_ok=True)
        else:
            pages.write(autograded, result.notebook)
            self._write_page(result, page)

    def _write_page(self, result: Result, page: Path) -> None:
        handed = self.handed[result.student, result.stage, result.lesson]
        pages.write(page, pages.feedback(result, handed.lesson.title, self.unsafe))

    def _timestamp(self, handed: Handed) -> str | None:
        """What nbgrader's own file says, where the submissions were collected by nbgrader."""
        path = self.submitted / handed.student / handed.lesson.stage / "timestamp.txt"
        if not path.is_file():
            return None
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        try:
            parse_utc(text)
        except (ValueError, OverflowError):
            handed.flags.append(f"timestamp.txt: {text[:40]!r} is no time: taken as handed in on time")
            return None
        return text


def grade_folder(
    submitted: Path,
    out: Path,
    source: Path,
    lesson: str | None = None,
    student: str | None = None,
    jobs: int | None = None,
    limits: Limits | None = None,
    seed: int = SEED,
    engine: Engine = run_tasks,
    show: Callable[[str], None] = print,
    kernels: Kernels | None = None,
    db: str | None = None,
    again: bool = False,
    late: Path | None = None,
    compare: bool = False,
) -> list[Result]:
    """Grades a class by the masters in `source`, into the gradebook `db`, by default OUT/gradebook.db.

    `late` is an nbgrader configuration that says what handing in late costs; `compare` looks for answers that resemble
    each other. Raises UsageError when there is nothing to grade or no sandbox to be had (and none that is not asked
    for), BadConfig for a bad configuration, NoDatabase and NoScheduler where those do not answer.
    """
    began = time.monotonic()
    kernels = kernels or Kernels()
    unsafe = not kernels.sandbox
    lessons = read_masters(source)
    handed, notes = find_class(submitted, lessons, lesson, student)
    if not hasattr(socket, "AF_UNIX"):
        raise UsageError("grading needs UNIX sockets, which Python has on Linux and macOS: on Windows use WSL")
    if kernels.sandbox and trouble():
        raise UsageError(f"{trouble()}. Or grade people whom you trust with all that you may do yourself: --unsafe")
    out.mkdir(parents=True, exist_ok=True)
    jobs = min(jobs or cores(), max(1, len(handed)))
    limits = replace(limits or Limits(), gpu=1 / jobs)
    walls = pages.UNSAFE if unsafe else "Each kernel runs in a sandbox."
    show(f"Grading {len(handed)} notebooks of {len({h.student for h in handed})} students. {walls}")
    db = db or f"sqlite:///{(out / 'gradebook.db').resolve()}"
    penalty = penalty_of(late) if late else no_penalty
    with Gradebook(db, waiting=tqdm.write, penalty=penalty) as book:
        stages = {h.lesson.stage for h in handed}
        for k in lessons:
            if k.stage in stages:
                book.register(k.stage, k.name, k.master)
        writer = Writer(out, book, handed, submitted, unsafe)
        with tqdm(total=len(handed), unit="notebook", file=sys.stderr, dynamic_ncols=True) as bar:

            def count(result: Result) -> None:
                bar.set_postfix_str(f"{result.student} {result.lesson}", refresh=False)
                bar.update()

            for result in engine(writer.tasks(limits, seed, kernels, again, count), jobs):
                writer.take(result)
                count(result)
    results = sorted(writer.results, key=lambda r: (r.student, r.stage, r.lesson))
    for made in (exports.grades, exports.checks, exports.canvas, exports.moodle):
        pages.write(out / f"{made.__name__}.csv", made(results))
    pages.write(out / "nbgrader_config.py", _config(submitted, out, source, db))
    pairs = list(_pairs(out, lessons, results)) if compare else None
    pages.write(out / "report.html", pages.class_report(results, notes, time.monotonic() - began, unsafe, pairs))
    show(pages.table(results))
    if writer.unchanged:
        show(f"{writer.unchanged} of {len(results)} had not changed since they were graded and were not run again.")
    for note in notes:
        show(f"not graded: {note}")
    tables = "grades.csv, checks.csv, canvas.csv, moodle.csv"
    show(f"In {out}: report.html, {tables}, feedback/ and autograded/.")
    if unsafe:
        show(pages.UNSAFE)
    return results


def _pairs(out: Path, lessons: list[Lesson], results: list[Result]) -> Iterator[similarity.Pair]:
    """Answers that resemble each other, from the notebooks as they were graded."""
    for k in lessons:
        paths = {
            r.student: out / "autograded" / r.student / k.stage / f"{k.name}.ipynb"
            for r in results
            if r.lesson == k.name and r.status in ("graded", "incomplete", "withheld")
        }
        answers = {who: similarity.code(parse(path.read_bytes())) for who, path in paths.items() if path.is_file()}
        yield from similarity.alike(k.name, answers, similarity.code(k.master))


def _config(submitted: Path, out: Path, source: Path, db: str) -> str:
    """So that nbgrader's own commands, run in OUT, show this gradebook."""
    return f'''# Written by the grader. Started in this folder, `nbgrader export` and the formgrader show these grades.
c = get_config()  # noqa: F821
c.CourseDirectory.course_id = {COURSE!r}
c.CourseDirectory.root = {str(out.resolve())!r}
c.CourseDirectory.db_url = {db!r}
c.CourseDirectory.submitted_directory = {str(submitted.resolve())!r}
c.CourseDirectory.source_directory = {str(source.resolve())!r}
c.CourseDirectory.release_directory = {str(ROOT / "course")!r}
c.CsvExportPlugin.to = "nbgrader.csv"  # by default it would be grades.csv, which is ours
'''


def wanted_lessons(submitted: Path | None, lesson: str | None) -> list[Entry]:
    """The lessons whose masters must be current: the one asked for, those handed in, or the sample's."""
    if lesson:
        try:
            chosen = catalog.select(lesson)
        except catalog.NoSuchLesson as error:
            raise UsageError(str(error)) from None
    elif submitted is None:
        chosen = [catalog.BY_NUMBER[number] for number in sample_class.LESSONS]
    else:
        chosen = [entry for entry in catalog.LESSONS if any(submitted.glob(f"*/{entry.key}*.ipynb"))]
    written = [entry for entry in chosen if (ROOT / "solutions" / f"{entry.key}.py").is_file()]
    if lesson and not written:
        raise UsageError(f"lesson {chosen[0].name} is not written yet: there is no solutions/{chosen[0].key}.py")
    return written


def grade_class(
    submitted: Path | None = None,
    out: Path | None = None,
    lesson: str | None = None,
    student: str | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
    db: str | None = None,
    again: bool = False,
    late: Path | None = None,
    compare: bool = False,
    engine: Engine | None = None,
    limits: Limits | None = None,
    unsafe: bool = False,
) -> int:
    """Grades a class, or without a folder the sample class; returns the exit code.

    `unsafe` lets learners' code run as whoever grades, with all rights that they have.
    """
    engine = engine or partial(run_tasks, scheduler=scheduler)
    try:
        wanted = wanted_lessons(submitted, lesson)
        if wanted and build_sources([entry.key for entry in wanted]):
            print("Nothing graded: these lessons cannot be built.", file=sys.stderr)
            return FAULT
        if submitted is None:
            submitted, out = sample_class.make_class(SAMPLE / "submitted", wanted, ROOT), out or SAMPLE
        source = ROOT / "build" / "source"
        results = grade_folder(
            submitted, out or Path("grades"), source, lesson, student, jobs, limits, engine=engine,
            kernels=Kernels(sandbox=not unsafe), db=db, again=again, late=late, compare=compare,
        )  # fmt: skip
    except (UsageError, BadConfig, NoDatabase, NoScheduler) as error:
        print(f"Nothing graded: {error}.", file=sys.stderr)
        return USAGE
    faults = [result for result in results if result.status == "fault"]
    for result in faults:
        reason = result.traceback or result.flags[-1]
        print(f"The grader failed on {result.student} {result.lesson}: {reason}", file=sys.stderr)
    return FAULT if faults else OK
