"""Grades a class: what was handed in → gradebook, tables, feedback, report.

This module knows folders and prints; submissions finds the notebooks, task grades one, engine distributes them,
gradebook has the database. A notebook whose result stands in the gradebook already, with
everything it depends on unchanged, is not graded again: a call that was interrupted, or killed, goes on where it was.
The exit code says how it went: OK when every submission got an answer (zero points included), USAGE when there was
nothing to grade, FAULT when the grader failed.
"""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from autograder import catalog
from autograder.build import build_sources
from autograder.catalog import Entry
from autograder.execute import Limits
from autograder.grading import exports, pages, similarity, submissions
from autograder.grading.archives import BadArchive
from autograder.grading.class_pages import write_class_pages
from autograder.grading.engine import Engine, NoScheduler, run_tasks
from autograder.grading.files import Delivery, decode_name, is_out_of_room
from autograder.grading.fingerprint import digest_answers, make_fingerprint
from autograder.grading.gradebook import COURSE, Gradebook, ManualEntries, NoDatabase, make_address
from autograder.grading.late import BadConfig, HandIn, read_penalty, waive_penalty
from autograder.grading.masters import MasterLesson, read_masters
from autograder.grading.rebuild import find_exercise, read_name, read_role
from autograder.grading.submissions import Submission
from autograder.grading.task import Check, Result, Task, is_graded_by_hand, parse
from autograder.kernels.manager import Kernels
from autograder.kernels.sandbox import find_sandbox_trouble
from autograder.layout import ROOT, write
from autograder.pool import count_cores

OK, USAGE, FAULT = 0, 2, 3
SAMPLE = ROOT / "build" / "sample_class"
SAMPLE_LESSONS = (9, 29)  # a class small enough to grade in a minute
SEED = 40  # the same fresh inputs for everyone in a class, and again when it is graded again
LAYOUT = "SUBMITTED/<student>/<stage>/<lesson>.ipynb, for example {example}"
PLACES = "; a zip archive, and what Moodle, Canvas and nbgrader's exchange give, are taken as they are"

log = logging.getLogger("autograder.grading")


class CannotGrade(Exception):
    """The call asks for what cannot be graded; the message says what was expected and what was found."""


# --- what is there --------------------------------------------------------------------------------------------


def open_delivery(submitted: Path, student: str | None = None, stages: Collection[str] = ()) -> Delivery:
    """Everything under SUBMITTED and whose it is, or one student's part of it. Raises CannotGrade."""
    expected = f"expected {LAYOUT.format(example=f'lin-mei/{catalog.BY_NUMBER[9].key}.ipynb')}{PLACES}"
    if not submitted.exists():
        raise CannotGrade(f"{submitted}: there is no such folder; {expected}")
    if submitted.is_file() and submitted.suffix.lower() != ".zip":
        raise CannotGrade(f"{submitted}: this is a file, not a folder or a zip archive; {expected}")
    found = submissions.collect(submitted, {*stages, *(stage.folder for stage in catalog.STAGES)})
    if not found.students:
        places = ", ".join([file.place for file in found.files if ".ipynb" in file.name][:3])
        lying = places or ", ".join(sorted({file.parts[0] for file in found.files})[:5]) or "nothing"
        raise CannotGrade(f"{submitted}: no student's folder in it; {expected}; found {lying}")
    if student is None:
        return found
    wanted = decode_name(student)
    if wanted not in found.students:
        raise CannotGrade(f'{submitted}: there is no student "{student}" in it')
    return found.select_student(wanted)


def find_class(
    submitted: Path, lessons: list[MasterLesson], lesson: str | None, student: str | None
) -> tuple[list[Submission], Delivery]:
    """The notebooks to grade, and every file with what became of it. Raises CannotGrade where there is nothing."""
    found = open_delivery(submitted, student, [k.stage for k in lessons])
    try:
        keys = catalog.select_keys([k.key for k in lessons], lesson)
    except catalog.NoSuchLesson as error:
        raise CannotGrade(str(error)) from None
    chosen = [k for k in lessons if k.key in keys]
    submissions.find_lessons(found, lessons, [entry.name for entry in catalog.LESSONS])
    handed = submissions.hand_out(found, chosen)
    if not handed:
        lying = "; ".join(exports.tell_file(file) for file in found.files[:5]) or "no file at all"
        raise CannotGrade(f"{submitted}: no notebook of {lesson or 'the course'} in it; found {lying}")
    return handed, found


# --- grading --------------------------------------------------------------------------------------------------


def find_written_answers(notebook: NotebookNode) -> dict[str, str]:
    """The texts that a person scores."""
    return {read_name(cell): cell.source for cell in notebook.cells if is_graded_by_hand(cell)}


def make_undecided_result(handed: Submission) -> Result:
    """A result without a score: a person must say which of several files counts."""
    cells = [cell for cell in handed.lesson.master.cells if read_role(cell) == "check" or is_graded_by_hand(cell)]
    checks = [
        Check(
            find_exercise(read_name(c)),
            read_name(c),
            float(c.metadata.nbgrader.points),
            0.0,
            "withheld",
            handed.undecided,
        )
        for c in cells
    ]
    return Result(handed.student, handed.lesson.stage, handed.lesson.name, "withheld", checks=checks)


class Writer:
    """Makes the tasks, and writes each result as it comes: to the gradebook, and as files under `out`."""

    def __init__(self, out: Path, book: Gradebook, handed: list[Submission], unsafe: bool):
        self.out = out
        self.unsafe = unsafe
        self.book = book
        self.handed = {(h.student, h.lesson.stage, h.lesson.name): h for h in handed}
        self.fingerprints: dict[tuple[str, str, str], str] = {}
        self.results: list[Result] = []
        self.unchanged = 0

    def make_tasks(
        self, limits: Limits, seed: int, kernels: Kernels, again: bool, done: Callable[[Result], None]
    ) -> Iterator[Task]:
        """The tasks, one by one: a notebook is read when its turn comes.

        `done` is called after what needs no grading: a result that still holds (unless everything is to be graded
        `again`), a choice that waits for a person, and a file that may not be read.
        """
        for (student, stage, lesson), h in self.handed.items():
            log.info("%s %s: handed in as %s", student, lesson, h.file.place if h.file else h.undecided or "nothing")
            if h.undecided:
                self.fingerprints[student, stage, lesson] = ""
                done(self.take(make_undecided_result(h)))
                continue
            try:
                data, files = h.read(), h.read_beside()
            except (OSError, BadArchive) as error:
                done(self.take(Result(student, stage, lesson, "fault", flags=[f"cannot be opened: {error}"])))
                continue
            master = nbformat.writes(h.lesson.master).encode()
            task = Task(student, stage, lesson, data, master, limits, seed, kernels, files)
            self.fingerprints[student, stage, lesson] = make_fingerprint(task)
            kept = self._find_kept(h, again)
            if kept is None:
                log.info("%s %s: to be graded, %s", student, lesson, f"{len(data)} bytes" if data else "no file")
                yield task
                continue
            log.info("%s %s: the result of an earlier call holds", student, lesson)
            self._finish(kept)
            self.unchanged += 1
            done(kept)

    def _find_kept(self, handed: Submission, again: bool) -> Result | None:
        """The result of an earlier call, if everything it depends on is the same and its files are there.

        What was graded once and is not handed in this time (another week's folder) keeps its result too.
        """
        where = handed.student, handed.lesson.stage, handed.lesson.name
        stored = self.book.find_stored(*where, handed.file.time if handed.file else None)
        if stored is None:
            return None
        result = stored.result
        if handed.file is None and result.status != "missing":
            result.flags.append("file: not handed in this time; graded earlier, and that counts")
            return result
        autograded, page = self._find_files(result)
        same = stored.fingerprint == self.fingerprints[where] and not again
        if not same or (handed.file and not (autograded.is_file() and page.is_file())):
            return None
        if handed.file:
            if autograded.stat().st_mtime_ns > page.stat().st_mtime_ns:  # replaced since, by nbgrader autograde say
                return None
            shown = pages.digest_shown(
                result, self._find_title(result), self._collect_flags(result), self.unsafe, stored.entered
            )
            if not pages.shows(page, shown):  # a person has entered something since, or lateness costs something else
                result.notebook = autograded.read_bytes()
                self._write_page(result, page, stored.entered)
        return result

    def take(self, result: Result) -> Result:
        """Writes a new result down."""
        where = (result.student, result.stage, result.lesson)
        if result.status != "fault":
            notebook = parse(result.notebook) if result.notebook else None
            judged = digest_answers(find_written_answers(notebook)) if notebook else {}
            handed_in = HandIn(self.handed[where].file and self.handed[where].file.time, digest_work(notebook))
            self.book.commit(result, self.fingerprints[where], judged, handed_in, self._write_files)
        self._finish(result)
        return result

    def _finish(self, result: Result) -> None:
        result.flags = self._collect_flags(result)
        result.notebook = None
        self.results.append(result)
        for check in result.checks:
            said = f": {check.message}" if check.message else ""
            log.info(
                "%s %s %s: %s, %g of %g%s",
                result.student,
                result.lesson,
                check.check,
                check.status,
                check.score,
                check.points,
                said,
            )
        for flag in result.flags:
            log.info("%s %s: %s", result.student, result.lesson, flag)
        log.info("%s %s: %s, %g of %g", result.student, result.lesson, result.status, result.score, result.max_score)

    def _collect_flags(self, result: Result) -> list[str]:
        """The flags about a notebook's file, and those of its grading."""
        return self._find_submission(result).flags + result.flags

    def _find_title(self, result: Result) -> str:
        return self._find_submission(result).lesson.title

    def _find_submission(self, result: Result) -> Submission:
        return self.handed[result.student, result.stage, result.lesson]

    def _find_files(self, result: Result) -> tuple[Path, Path]:
        """A result's executed notebook and its learner's page."""
        place = Path(result.student, result.stage)
        notebooks, pages_ = self.out / "autograded" / place, self.out / "feedback" / place
        return notebooks / f"{result.lesson}.ipynb", pages_ / f"{result.lesson}.html"

    def _write_files(self, result: Result, entered: ManualEntries) -> None:
        autograded, page = self._find_files(result)
        if result.notebook is None:
            autograded.unlink(missing_ok=True)
        else:
            write(autograded, result.notebook, durable=False)
        if result.status == "missing":
            page.unlink(missing_ok=True)
        else:
            self._write_page(result, page, entered)

    def _write_page(self, result: Result, page: Path, entered: ManualEntries) -> None:
        text = pages.make_feedback(result, self._find_title(result), self._collect_flags(result), self.unsafe, entered)
        write(page, text, durable=False)


def digest_work(notebook: NotebookNode | None) -> str:
    """A hash of the learner's text in a notebook: it stays when only outputs or given cells have changed."""
    cells = notebook.cells if notebook else []
    written = "\n\n".join(cell.source for cell in cells if read_role(cell) in ("exercise", "answer", "added"))
    return digest_answers({"work": written})["work"] if notebook else ""


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
    each other. Raises CannotGrade where there is nothing to grade or no sandbox (unless none is asked for), BadConfig
    for a bad configuration, NoDatabase and NoScheduler where those do not answer.
    """
    began = time.monotonic()
    kernels = kernels or Kernels()
    unsafe = not kernels.sandbox
    lessons = read_masters(source)
    handed, found = find_class(submitted, lessons, lesson, student)
    if not hasattr(socket, "AF_UNIX"):
        raise CannotGrade("grading needs UNIX sockets, which Python has on Linux and macOS: on Windows use WSL")
    if kernels.sandbox and find_sandbox_trouble():
        raise CannotGrade(
            f"{find_sandbox_trouble()}. Or grade people whom you trust with all that you may do yourself: --unsafe"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotGrade(f"{out}: this folder cannot be made: {error.strerror}") from None
    jobs = min(jobs or count_cores(), max(1, len(handed)))
    limits = replace(limits or Limits(), gpu=1 / jobs)
    walls = pages.UNSAFE if unsafe else "Each kernel runs in a sandbox."
    for line in exports.tell_files(found.files):
        show(line)
    show(f"Grading {len(handed)} notebooks of {len({h.student for h in handed})} students. {walls}")
    db = db or make_address(out / "gradebook.db")
    penalty = read_penalty(late) if late else waive_penalty
    with Gradebook(db, waiting=tqdm.write, penalty=penalty) as book:
        stages = {h.lesson.stage for h in handed}
        for k in lessons:
            if k.stage in stages:
                book.register(k.stage, k.name, k.master)
        writer = Writer(out, book, handed, unsafe)
        with tqdm(total=len(handed), unit="notebook", file=sys.stderr, dynamic_ncols=True) as bar:

            def count(result: Result) -> None:
                bar.set_postfix_str(f"{result.student} {result.lesson}", refresh=False)
                bar.update()

            for result in engine(writer.make_tasks(limits, seed, kernels, again, count), jobs):
                writer.take(result)
                count(result)
    results = sorted(writer.results, key=lambda r: (r.student, r.stage, r.lesson))
    for name, make_table in exports.TABLES.items():
        write(out / name, make_table(results), durable=False)
    write(out / "intake.csv", exports.make_intake(found.files), durable=False)
    write(out / "nbgrader_config.py", _make_config(submitted, out, source, db), durable=False)
    pairs = list(_compare_answers(out, lessons, results, show)) if compare else None
    notes = exports.list_left_out(found.files)
    write_class_pages(out, results, lessons, notes, time.monotonic() - began, unsafe, pairs)
    show(pages.format_results(results))
    if writer.unchanged:
        show(f"{writer.unchanged} of {len(results)} had not changed since they were graded and were not run again.")
    tables = "grades.csv, checks.csv, canvas.csv, moodle.csv, intake.csv"
    show(f"In {out}: report.html, {tables}, feedback/ and autograded/.")
    if unsafe:
        show(pages.UNSAFE)
    return results


def _compare_answers(
    out: Path, lessons: list[MasterLesson], results: list[Result], show: Callable[[str], None]
) -> Iterator[similarity.SimilarPair]:
    """Answers that resemble each other, from the notebooks as they were graded."""
    for k in lessons:
        paths = {
            r.student: out / "autograded" / r.student / k.stage / f"{k.name}.ipynb"
            for r in results
            if r.lesson == k.name and r.status in ("graded", "incomplete", "withheld")
        }
        answers = {
            who: similarity.collect_code(parse(path.read_bytes())) for who, path in paths.items() if path.is_file()
        }
        too_long = []
        yield from similarity.find_alike(k.name, answers, similarity.collect_code(k.master), too_long.append)
        for who in too_long:
            show(f"not compared: {who}/{k.stage}/{k.name}.ipynb: its code is too long")


def _make_config(submitted: Path, out: Path, source: Path, db: str) -> str:
    """A configuration with which nbgrader's own commands, run in OUT, show this gradebook and harm nothing in it."""
    return f'''# Written by the grader. Started in this folder, `nbgrader export` and the formgrader show these grades.
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.converters import Autograde
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import ClearHiddenTests, ClearOutput, GetGrades

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = {COURSE!r}
c.CourseDirectory.root = {str(out.resolve())!r}
c.CourseDirectory.db_url = {db!r}
c.CourseDirectory.submitted_directory = {str(submitted.resolve())!r}
c.CourseDirectory.source_directory = {str(source.resolve())!r}
c.CourseDirectory.release_directory = {str(ROOT / "course")!r}
c.CsvExportPlugin.to = "nbgrader.csv"  # by default it would be grades.csv, which is the grader's

# feedback/ is for learners. The pages of `nbgrader generate_feedback` go elsewhere, and have no hidden tests either.
c.CourseDirectory.feedback_directory = "nbgrader/feedback"
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, ClearOutput, CSSHTMLHeaderPreprocessor]
c.ClearHiddenTests.enforce_metadata = False


def refuse(self):
    """`nbgrader autograde` would put grades of its own over these, and run learners' code without a sandbox."""
    message = "This class is graded by `make grade` (python -m autograder grade): run that again instead."
    self.log.error(message)
    raise NbGraderException(message)


Autograde.start = refuse
'''


def find_wanted_lessons(submitted: Path | None, lesson: str | None, student: str | None = None) -> list[Entry]:
    """The lessons whose masters must be current: the one asked for, those handed in, or the sample's.

    All of them where a notebook tells neither by its metadata nor by its name which lesson it is.
    """
    written = [entry for entry in catalog.LESSONS if (ROOT / "solutions" / f"{entry.key}.py").is_file()]
    if not written and not (ROOT / "build" / "source").is_dir():
        raise CannotGrade(
            f"{ROOT / 'solutions'}: the lessons are not here; call the grader in the folder of a checkout"
        )
    asked = None
    if lesson:
        try:
            [asked] = catalog.select(lesson)
        except catalog.NoSuchLesson as error:
            raise CannotGrade(str(error)) from None
        if asked not in written:
            raise CannotGrade(f"lesson {asked.name} is not written yet: there is no solutions/{asked.key}.py")
    if submitted is None:
        return [asked] if asked else [e for e in written if e.number in SAMPLE_LESSONS]
    told = submissions.name_lessons(open_delivery(submitted, student), [entry.name for entry in catalog.LESSONS])
    if told is None:
        return written
    return [asked] if asked else [entry for entry in written if entry.name in told]


def make_sample_class(lessons: list[Entry]) -> Path:
    """The folder of the sample class, whose notebooks are made anew. Raises CannotGrade outside a whole checkout."""
    maker = ROOT / "tests" / "support" / "sample_class.py"
    if not maker.is_file():
        raise CannotGrade(f"there is no sample class here ({maker}): name a folder of submissions, --submitted")
    submitted = SAMPLE / "submitted"
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, str(maker), str(submitted), *(e.key for e in lessons)], env=env, check=True)
    return submitted


class AroundProgressBar(logging.Handler):
    """Writes the log to standard error, around the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
    """A line for each step of each notebook."""
    if not log.handlers:
        handler = AroundProgressBar()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


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
    verbose: bool = False,
) -> int:
    """Grades a class, or without a folder the sample class; returns the exit code.

    `unsafe` lets learners' code run as whoever grades, with all rights that they have; `verbose` shows the log.
    """
    if verbose:
        show_log()
    try:
        results = _grade_class(
            submitted,
            out,
            lesson,
            student,
            jobs,
            engine or partial(run_tasks, scheduler=scheduler),
            db,
            again,
            late,
            compare,
            limits,
            unsafe,
        )
    except (CannotGrade, BadConfig, NoDatabase, NoScheduler, OSError, SQLAlchemyError) as error:
        if is_out_of_room(error) or is_out_of_room(error.__cause__):
            print(
                f"Stopped, the disk is full: {_tell_first_line(error)}. Results so far are kept; make room and run the "
                "same command again.",
                file=sys.stderr,
            )
            return FAULT
        if isinstance(error, OSError | SQLAlchemyError):
            reason = str(getattr(error, "orig", None) or error).strip()
            print(f"Grading stopped: {reason}. What was graded stays, and the same command goes on.", file=sys.stderr)
            return FAULT
        print(f"Nothing graded: {error}.", file=sys.stderr)
        return USAGE
    if results is None:
        print("Nothing graded: these lessons cannot be built.", file=sys.stderr)
        return FAULT
    faults = [result for result in results if result.status == "fault"]
    for result in faults:
        reason = result.traceback or result.flags[-1]
        print(f"The grader failed on {result.student} {result.lesson}: {reason}", file=sys.stderr)
    return FAULT if faults else OK


def _grade_class(
    submitted: Path | None,
    out: Path | None,
    lesson: str | None,
    student: str | None,
    jobs: int | None,
    engine: Engine,
    db: str | None,
    again: bool,
    late: Path | None,
    compare: bool,
    limits: Limits | None,
    unsafe: bool,
) -> list[Result] | None:
    """The results; None where the lessons cannot be built."""
    wanted = find_wanted_lessons(submitted, lesson, student)
    if wanted and build_sources([entry.key for entry in wanted]):
        return None
    if submitted is None:
        submitted, out = make_sample_class(wanted), out or SAMPLE
    return grade_folder(
        submitted,
        out or Path("grades"),
        ROOT / "build" / "source",
        lesson,
        student,
        jobs,
        limits,
        engine=engine,
        kernels=Kernels(sandbox=not unsafe),
        db=db,
        again=again,
        late=late,
        compare=compare,
    )


def _tell_first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0]
