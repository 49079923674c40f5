"""The only writer of the gradebook: nbgrader's own database, through nbgrader's own API.

So nbgrader's formgrader and `nbgrader export` show the same grades. A stage is an assignment, a lesson a notebook in
it. Beside nbgrader's tables stands one of the grader's with every result as it came, so that a later call need not
grade again what did not change. A result and its grades are written in one transaction: when the power fails, both are
there or neither is.
"""

import glob
import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import nbgrader.api
from alembic.script import ScriptDirectory
from nbformat import NotebookNode
from nbgrader.api import (
    Base,
    Comment,
    Grade,
    GradeCell,
    MissingEntry,
    Notebook,
    SolutionCell,
    SourceCell,
    Student,
    SubmittedAssignment,
    SubmittedNotebook,
)
from nbgrader.api import Gradebook as Database
from nbgrader.utils import is_grade, is_locked, is_solution
from sqlalchemy import (
    Column,
    Engine,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from autograder.grading.files import is_out_of_room
from autograder.grading.late import HandIn, Penalty, waive_penalty
from autograder.grading.task import WAITING, Check, Result

COURSE = "llm40"  # as in nbgrader_config.py
PATIENCE = 120.0  # seconds for which a database server may be away
RESULTS = Table(
    "llm40_result",
    MetaData(),
    Column("student", String(128), primary_key=True),
    Column("stage", String(128), primary_key=True),
    Column("lesson", String(128), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("result", Text, nullable=False),  # as JSON, without the notebook
    Column("answers", Text, nullable=False),  # as JSON: written answer → hash of its text
)
# When graded work was handed in: a stage has one time in nbgrader's tables, but its lessons come one by one.
HANDED_IN = Table(
    "llm40_handed_in",
    MetaData(),
    Column("student", String(128), primary_key=True),
    Column("stage", String(128), primary_key=True),
    Column("lesson", String(128), primary_key=True),
    Column("work", String(64), nullable=False),  # hash of the learner's text
    Column("time", String(32)),  # UTC, ISO 8601; null where nobody knows
    Column("seen", String(32), nullable=False),  # when that work was graded first: it was there by then
)


@dataclass(frozen=True)
class ManualEntries:
    """Comments and extra credit that a person has entered in the formgrader."""

    comments: dict[str, str] = field(default_factory=dict)  # cell → text
    extra_credit: dict[str, float] = field(default_factory=dict)  # check → points, in its score already


@dataclass(frozen=True)
class StoredResult:
    """A result of an earlier call, with the scores that count now."""

    fingerprint: str
    result: Result
    entered: ManualEntries


class NoDatabase(RuntimeError):
    """The gradebook's database cannot be opened; the message says which and why."""


def make_address(path: Path) -> str:
    """The address of a gradebook in a file, whatever the folders above are called."""
    return f"sqlite:///{str(path.resolve()).replace('%', '%25').replace('?', '%3F')}"


def _match_key(table: Table, student: str, stage: str, lesson: str):
    return (table.c.student == student) & (table.c.stage == stage) & (table.c.lesson == lesson)


class Gradebook:
    """Takes masters and results, one at a time, from one process.

    `waiting` is called once, with a message, when the database's server is away; `penalty` says what lateness costs.
    """

    def __init__(self, url: str, waiting: Callable[[str], None] = print, penalty: Penalty = waive_penalty):
        self.waiting = waiting
        self.penalty = penalty
        self.database: Database | None = None
        try:
            self.database = self._retry(lambda: _open_database(url), away=False)
        except NoDatabase as error:
            raise NoDatabase(f"the gradebook {_hide_password(url)} cannot be used: {error}") from None
        except (SQLAlchemyError, ImportError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).strip()
            raise NoDatabase(f"the gradebook {_hide_password(url)} cannot be opened: {reason}") from error

    def __enter__(self) -> "Gradebook":
        return self

    def __exit__(self, *_) -> None:
        self.database.close()

    @contextmanager
    def _together(self):
        """Everything inside is written, or nothing is."""
        try:
            yield self.database.db
            self.database.db.commit()
        except BaseException:
            self.database.db.rollback()
            raise

    def _retry(self, work: Callable, away: bool = True):
        """Does the work, and again for up to PATIENCE seconds while another program has the file, or while the server
        is away (restarted, say) if it may be `away`; returns what the work returns."""
        until = time.monotonic() + PATIENCE
        told = False
        while True:
            try:
                return work()
            except OperationalError as error:
                if time.monotonic() > until or is_out_of_room(error) or not _may_pass(error, away):
                    raise
                if self.database:
                    self.database.db.rollback()
                if not told:
                    self.waiting(f"The gradebook does not answer; waiting up to {PATIENCE:.0f} s: {error.orig}")
                told = True
                time.sleep(0.5)

    # --- what can be earned -----------------------------------------------------------------------------------

    def register(self, stage: str, lesson: str, master: NotebookNode) -> None:
        """A lesson's cells and points, as the master has them now.

        A cell that the master has lost goes, with its grades; new cells and new lessons are also given to the students
        who handed in before. nbgrader's own way (SaveCells) refuses both as soon as there is a submission.
        """
        self._retry(lambda: self._register(stage, lesson, master))

    def _register(self, stage: str, lesson: str, master: NotebookNode) -> None:
        self.database.update_or_create_assignment(stage)
        kernel = json.dumps(master.metadata.get("kernelspec", {}))
        notebook = self.database.update_or_create_notebook(lesson, stage, kernelspec=kernel)
        cells = [cell for cell in master.cells if "nbgrader" in cell.metadata]
        kinds = (
            (GradeCell, notebook.grade_cells, is_grade, self._describe_grade_cell),
            (SolutionCell, notebook.solution_cells, is_solution, lambda cell: {}),
            (SourceCell, notebook.source_cells, self._has_source, self._describe_source_cell),
        )
        with self._together() as db:
            for model, present, belongs, fields in kinds:
                wanted = {cell.metadata.nbgrader.grade_id: fields(cell) for cell in cells if belongs(cell)}
                known = {cell.name: cell for cell in present}
                for name in known.keys() - wanted.keys():
                    for entry in [*getattr(known[name], "grades", ()), *getattr(known[name], "comments", ())]:
                        db.delete(entry)
                    db.delete(known[name])
                for name, values in wanted.items():
                    if name in known:
                        for field, value in values.items():
                            setattr(known[name], field, value)
                    else:
                        db.add(model(name=name, notebook=notebook, **values))
            db.flush()
            db.expire_all()  # or the lists still have the deleted rows
            for submission in notebook.assignment.submissions:
                self._complete(submission, notebook)

    @staticmethod
    def _describe_grade_cell(cell: NotebookNode) -> dict:
        return {"max_score": float(cell.metadata.nbgrader.points), "cell_type": cell.cell_type}

    @staticmethod
    def _has_source(cell: NotebookNode) -> bool:
        return is_grade(cell) or is_solution(cell) or is_locked(cell)

    @staticmethod
    def _describe_source_cell(cell: NotebookNode) -> dict:
        return {
            "cell_type": cell.cell_type,
            "locked": is_locked(cell),
            "source": cell.source,
            "checksum": cell.metadata.nbgrader.get("checksum"),
        }

    def _complete(self, submission: SubmittedAssignment, notebook: Notebook) -> SubmittedNotebook:
        """A student's part of a lesson, with a grade and a comment for every cell that has one."""
        db = self.database.db
        part = next((n for n in submission.notebooks if n.notebook_id == notebook.id), None)
        if part is None:
            part = SubmittedNotebook(notebook=notebook, assignment=submission)
            db.add(part)
        graded = {grade.cell_id for grade in part.grades}
        commented = {comment.cell_id for comment in part.comments}
        for cell in notebook.grade_cells:
            if cell.id not in graded:
                db.add(Grade(cell_id=cell.id, notebook=part, auto_score=0.0, needs_manual_grade=False))
        for cell in notebook.solution_cells:
            if cell.id not in commented:
                db.add(Comment(cell_id=cell.id, notebook=part))
        db.flush()
        return part

    # --- what was earned --------------------------------------------------------------------------------------

    def find_stored(self, student: str, stage: str, lesson: str, when: datetime | None = None) -> StoredResult | None:
        """The result written last, with the scores that count now; None if there is none.

        `when` is when the notebook was handed in, as far as this call knows.
        """
        return self._retry(lambda: self._find_stored(student, stage, lesson, when))

    def _find_stored(self, student: str, stage: str, lesson: str, when: datetime | None) -> StoredResult | None:
        row = self.database.db.execute(select(RESULTS).where(_match_key(RESULTS, student, stage, lesson))).one_or_none()
        if row is None:
            return None
        try:
            notebook = self.database.find_submission_notebook(lesson, stage, student)
        except MissingEntry:  # somebody removed the student or the submission with nbgrader
            return None
        try:
            result = _load_result(row.result)
        except (ValueError, TypeError, LookupError):  # of another version of the grader
            return None
        grades = {grade.name: grade for grade in notebook.grades}
        if grades.keys() != {check.check for check in result.checks}:
            return None
        if any(grades[check.check].auto_score != _find_automatic_score(check) for check in result.checks):
            return None  # somebody graded it with nbgrader since
        for check in result.checks:
            _set_counting_score(check, grades[check.check])
        if result.status == "withheld" and not result.waits:  # a person has decided
            result.status = "graded"
        with self._together():
            self._penalize(result, notebook, self._find_time_that_counts(result, HandIn(when)))
        return StoredResult(row.fingerprint, result, _read_entered(notebook))

    def commit(
        self,
        result: Result,
        fingerprint: str,
        answers: dict[str, str],
        handed_in: HandIn | None = None,
        files: Callable[[Result, ManualEntries], None] = lambda result, entered: None,
    ) -> None:
        """Writes a result's scores, and puts the scores that count into the result.

        `files` is then called with the result and what a person has entered.

        What a person has entered (manual scores, extra credit, comments) stays. `answers` are the hashes of the written
        answers: a person's score for one that is not that of the run before is asked for again, as it is where the
        automatic score has changed under a manual one. Everything is written at the end, after `files`.
        """
        record = _dump_result(result)
        scores = {check.check: check.score for check in result.checks}
        statuses = {check.check: check.status for check in result.checks}
        where = _match_key(RESULTS, result.student, result.stage, result.lesson)

        def write() -> None:
            with self._together() as db:
                row = db.execute(select(RESULTS.c.answers).where(where)).one_or_none()
                before = json.loads(row.answers) if row else {}
                changed = {name for name, digest in answers.items() if before and before.get(name) != digest}
                submission = self._find_or_make_submission(result.stage, result.student)
                notebook = self.database.find_notebook(result.lesson, result.stage)
                checks = {check.check: check for check in result.checks}
                part = self._complete(submission, notebook)
                for grade in part.grades:
                    check = checks[grade.name]
                    check.score, check.status = scores[grade.name], statuses[grade.name]
                    self._enter(grade, _find_automatic_score(check), grade.name in changed)
                db.flush()
                # The database says which score counts: it is asked for all at once.
                for grade in db.query(Grade).filter_by(notebook_id=part.id).populate_existing():
                    _set_counting_score(checks[grade.name], grade)
                if result.status == "withheld" and not result.waits:  # a person has decided
                    result.status = "graded"
                self._penalize(result, part, self._find_time_that_counts(result, handed_in or HandIn()))
                db.execute(delete(RESULTS).where(where))
                db.execute(
                    insert(RESULTS).values(
                        student=result.student,
                        stage=result.stage,
                        lesson=result.lesson,
                        fingerprint=fingerprint,
                        result=record,
                        answers=json.dumps(answers),
                    )
                )
                files(result, _read_entered(part))

        self._retry(write)

    def _find_time_that_counts(self, result: Result, handed_in: HandIn) -> datetime | None:
        """When the work was handed in first, as far as anybody knows; also writes it down.

        Work that has not changed keeps its time when the stage is handed in again with another lesson.
        """
        db, where = self.database.db, _match_key(HANDED_IN, result.student, result.stage, result.lesson)
        row = db.execute(select(HANDED_IN).where(where)).one_or_none()
        when, seen = handed_in.time, datetime.now(UTC).replace(tzinfo=None)
        if row is not None and handed_in.work in ("", row.work):
            before, seen = row.time and datetime.fromisoformat(row.time), datetime.fromisoformat(row.seen)
            when = min(filter(None, (when, before or seen))) if when or before else None
        work = handed_in.work or (row.work if row is not None else "")
        values = {"work": work, "time": when and when.isoformat(), "seen": seen.isoformat()}
        if row is None or (row.work, row.time) != (values["work"], values["time"]):
            key = {"student": result.student, "stage": result.stage, "lesson": result.lesson}
            db.execute(delete(HANDED_IN).where(where))
            db.execute(insert(HANDED_IN).values(**key, **values))
        return when

    def _penalize(self, result: Result, notebook: SubmittedNotebook, when: datetime | None) -> None:
        """Enters what lateness costs, by the due date as it is now."""
        submission = notebook.assignment
        of_stage = (HANDED_IN.c.student == result.student) & (HANDED_IN.c.stage == result.stage)
        times = self.database.db.execute(select(HANDED_IN.c.time).where(of_stage & HANDED_IN.c.time.is_not(None)))
        submission.timestamp = max((datetime.fromisoformat(value) for (value,) in times), default=None)
        due = submission.assignment.duedate and submission.duedate
        seconds = max(0.0, (when - due).total_seconds()) if when and due else 0.0
        result.late_penalty = 0.0
        result.late_penalty = self.penalty(result.student, result.score, seconds) if seconds else 0.0
        notebook.late_submission_penalty = result.late_penalty or None

    def _find_or_make_submission(self, stage: str, student: str) -> SubmittedAssignment:
        """A student's part of a stage. A new one has no points yet, in any of its lessons, and asks for no person."""
        db = self.database.db
        assignment = self.database.find_assignment(stage)
        wanted = {"assignment_id": assignment.id, "student_id": student}
        submission = db.query(SubmittedAssignment).filter_by(**wanted).one_or_none()
        if submission is None:
            if db.get(Student, student) is None:
                db.add(Student(id=student))
                db.flush()
            submission = SubmittedAssignment(**wanted)
            db.add(submission)
            db.flush()
            for notebook in assignment.notebooks:
                self._complete(submission, notebook)
        return submission

    @staticmethod
    def _enter(grade: Grade, score: float | None, changed: bool) -> None:
        if grade.manual_score is None:
            grade.needs_manual_grade = score is None
        elif changed or grade.auto_score != score:
            grade.needs_manual_grade = True
        grade.auto_score = score


def _find_automatic_score(check: Check) -> float | None:
    """The automatic score of a check as it came."""
    return None if check.status in WAITING else check.score


def _read_entered(notebook: SubmittedNotebook) -> ManualEntries:
    comments = {comment.name: comment.comment for comment in notebook.comments if comment.comment}
    extra = {grade.name: grade.extra_credit for grade in notebook.grades if grade.extra_credit}
    return ManualEntries(comments, extra)


def _set_counting_score(check: Check, grade: Grade) -> None:
    """The score that counts: a person's, where there is one."""
    check.score = grade.score
    if grade.manual_score is not None:
        check.status = "by hand"


def _dump_result(result: Result) -> str:
    fields = asdict(result)
    del fields["notebook"]
    return json.dumps(fields)


def _load_result(text: str) -> Result:
    fields = json.loads(text)
    return Result(**fields | {"checks": [Check(**check) for check in fields["checks"]]})


def _hide_password(url: str) -> str:
    """The address without its password."""
    head, _, rest = url.partition("://")
    return url if head.startswith("sqlite") else f"{head}://{rest.rpartition('@')[2]}"


def _may_pass(error: OperationalError, away: bool) -> bool:
    """Whether to wait may help: a file that another program has locked; a server, if it may be `away`."""
    name = getattr(error.orig, "sqlite_errorname", None)
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) if name else away


# --- opening --------------------------------------------------------------------------------------------------


def _open_database(url: str) -> Database:
    """nbgrader's gradebook with the grader's tables. A new file is made whole or not at all, an old one is checked."""
    path = _find_file(url)
    if path and (not path.exists() or not path.stat().st_size):
        _make_file(path)
    engine = create_engine(url)
    try:
        _check_database(engine)
    finally:
        engine.dispose()
    return _open_with_results(url)


def _find_file(url: str) -> Path | None:
    """The file of a gradebook whose address is a path; None for a server or a database in memory."""
    parsed = make_url(url)
    named = parsed.get_backend_name() == "sqlite" and (parsed.database or ":memory:")
    return Path(named) if named and not named.startswith((":memory:", "file:")) else None


def _find_newest_version() -> str:
    """The version of nbgrader's tables, which a new gradebook names."""
    return ScriptDirectory(Path(nbgrader.__file__).parent / "alembic").get_current_head()


# nbgrader starts a program to learn this: it takes two seconds, and must be on the path.
nbgrader.api.get_alembic_version = _find_newest_version


def _open_with_results(url: str) -> Database:
    database = Database(url, COURSE)
    for table in (RESULTS, HANDED_IN):
        table.create(database.engine, checkfirst=True)
    return database


def _make_file(path: Path) -> None:
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        _open_with_results(make_address(new)).close()
        if path.exists() and not path.stat().st_size:
            path.unlink()
        try:
            os.link(new, path)
        except FileExistsError:  # another call has made one meanwhile, and it may hold grades
            pass
        except OSError:  # no links on this file system
            os.replace(new, path)
    finally:
        for left in path.parent.glob(f"{glob.escape(new.name)}*"):
            left.unlink()


def _check_database(engine: Engine) -> None:
    """Raises NoDatabase where the database is damaged, or is not nbgrader's, before anything is written to it."""
    remedy = "put a copy of yours in its place, or move it away: then everyone is graded anew"
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            found = connection.execute(text("PRAGMA quick_check(1)")).scalar()
            if found != "ok":
                said = " ".join(str(found).split())
                raise NoDatabase(f"it is damaged ({said}); {remedy}")
        looked = inspect(connection)
        tables = {name: {column["name"] for column in looked.get_columns(name)} for name in looked.get_table_names()}
        expected = Base.metadata.tables
        if engine.dialect.name == "sqlite" and tables and not tables.keys() & expected.keys():
            raise NoDatabase(f"it is another program's, with the tables {', '.join(sorted(tables)[:5])}")
        for name, table in {**expected, RESULTS.name: RESULTS, HANDED_IN.name: HANDED_IN}.items():
            lacking = set(table.columns.keys()) - tables[name] if name in tables else ()
            if lacking:
                raise NoDatabase(
                    f"its table {name} has no column {', '.join(sorted(lacking))}: it is another program's, or that of "
                    "an older nbgrader, whose command `nbgrader db upgrade` mends it"
                )
        absent = sorted(expected.keys() - tables.keys())
        present = [table for name, table in expected.items() if name in tables]
        if absent and any(connection.execute(select(table).limit(1)).first() for table in present):
            raise NoDatabase(f"it lacks the table {absent[0]}, but has others with something in them; {remedy}")
