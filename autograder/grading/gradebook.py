"""The gradebook, and the one who writes it: nbgrader's own database, through nbgrader's own API.

So nbgrader's formgrader and `nbgrader export` show what we show. A stage is an assignment, a lesson a notebook in it.
Beside nbgrader's tables stands one of ours with every result as it came, so that a later call need not grade again what
did not change. A result and its grades are written in one transaction: whenever the power goes, both are there or
neither.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from nbformat import NotebookNode
from nbgrader.api import (
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
from nbgrader.utils import is_grade, is_locked, is_solution, parse_utc
from sqlalchemy import Column, MetaData, String, Table, Text, delete, insert, select
from sqlalchemy.exc import ArgumentError, OperationalError

from autograder.grading.late import Penalty, no_penalty
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


class NoDatabase(RuntimeError):
    """The gradebook's database cannot be opened; the message says which and why."""


def _key(student: str, stage: str, lesson: str):
    return (RESULTS.c.student == student) & (RESULTS.c.stage == stage) & (RESULTS.c.lesson == lesson)


class Gradebook:
    """Takes masters and results, one at a time, from one process.

    `waiting` is told, once, when the database's server is away and is being waited for; `penalty` says what handing in
    late costs.
    """

    def __init__(self, url: str, waiting: Callable[[str], None] = print, penalty: Penalty = no_penalty):
        self.waiting = waiting
        self.penalty = penalty
        # For a new database nbgrader calls the command `alembic`, which only an activated environment has on its path.
        path = os.environ.get("PATH", "")
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
        try:
            self.database = Database(url, COURSE)
            RESULTS.create(self.database.engine, checkfirst=True)
        except (OperationalError, ArgumentError, ImportError) as error:
            reason = str(getattr(error, "orig", None) or error).strip()
            raise NoDatabase(f"the gradebook {_shown(url)} cannot be opened: {reason}") from error
        finally:
            os.environ["PATH"] = path

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

    def _patiently(self, write: Callable[[], None]) -> None:
        """Writes; again and again while the database's server is away (restarted, say), up to PATIENCE seconds."""
        until = time.monotonic() + PATIENCE
        told = False
        while True:
            try:
                return write()
            except OperationalError as error:
                if time.monotonic() > until:
                    raise
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
        self.database.update_or_create_assignment(stage)
        kernel = json.dumps(master.metadata.get("kernelspec", {}))
        notebook = self.database.update_or_create_notebook(lesson, stage, kernelspec=kernel)
        cells = [cell for cell in master.cells if "nbgrader" in cell.metadata]
        kinds = (
            (GradeCell, notebook.grade_cells, is_grade, self._grade_cell),
            (SolutionCell, notebook.solution_cells, is_solution, lambda cell: {}),
            (SourceCell, notebook.source_cells, self._has_source, self._source_cell),
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
            db.expire_all()  # or what was just deleted is still in the lists
            for submission in notebook.assignment.submissions:
                self._complete(submission, notebook)

    @staticmethod
    def _grade_cell(cell: NotebookNode) -> dict:
        return {"max_score": float(cell.metadata.nbgrader.points), "cell_type": cell.cell_type}

    @staticmethod
    def _has_source(cell: NotebookNode) -> bool:
        return is_grade(cell) or is_solution(cell) or is_locked(cell)

    @staticmethod
    def _source_cell(cell: NotebookNode) -> dict:
        return {
            "cell_type": cell.cell_type,
            "locked": is_locked(cell),
            "source": cell.source,
            "checksum": cell.metadata.nbgrader.get("checksum"),
        }

    def _complete(self, submission: SubmittedAssignment, notebook: Notebook) -> SubmittedNotebook:
        """A student's part of a lesson, with a grade and a comment for every cell that has one."""
        db = self.database.db
        ours = next((n for n in submission.notebooks if n.notebook_id == notebook.id), None)
        if ours is None:
            ours = SubmittedNotebook(notebook=notebook, assignment=submission)
            db.add(ours)
        graded = {grade.cell_id for grade in ours.grades}
        commented = {comment.cell_id for comment in ours.comments}
        for cell in notebook.grade_cells:
            if cell.id not in graded:
                db.add(Grade(cell_id=cell.id, notebook=ours, auto_score=0.0, needs_manual_grade=False))
        for cell in notebook.solution_cells:
            if cell.id not in commented:
                db.add(Comment(cell_id=cell.id, notebook=ours))
        db.flush()
        return ours

    # --- what was earned --------------------------------------------------------------------------------------

    def stored(
        self, student: str, stage: str, lesson: str, timestamp: str | None = None
    ) -> tuple[str, Result, bool] | None:
        """The fingerprint and the result written last, with the scores that count now; None if there are none.

        The third says whether lateness costs something else than before: with the `timestamp`, when it was handed in,
        or by another due date.
        """
        row = self.database.db.execute(select(RESULTS).where(_key(student, stage, lesson))).one_or_none()
        if row is None:
            return None
        try:
            notebook = self.database.find_submission_notebook(lesson, stage, student)
        except MissingEntry:  # somebody removed the student or the submission with nbgrader
            return None
        result = _loaded(row.result)
        grades = {grade.name: grade for grade in notebook.grades}
        if grades.keys() != {check.check for check in result.checks}:
            return None
        for check in result.checks:
            _count(check, grades[check.check])
        if result.status == "withheld" and not result.waits:  # a person has decided
            result.status = "graded"
        before = notebook.late_submission_penalty
        with self._together():
            notebook.assignment.timestamp = _utc(timestamp)
            self._penalize(result, notebook)
        return row.fingerprint, result, notebook.late_submission_penalty != before

    def commit(
        self,
        result: Result,
        fingerprint: str,
        answers: dict[str, str],
        timestamp: str | None = None,
        files: Callable[[Result], None] = lambda result: None,
    ) -> None:
        """Writes a result's scores, and puts the scores that count into the result, which `files` is then given.

        What a person has entered (manual scores, extra credit, comments) stays. `answers` are the hashes of the written
        answers: a person's score for one that is not that of the run before is asked for again, as it is where the
        automatic score has changed under a manual one. Everything is written at the end, after `files`.
        """
        record = _dumped(result)
        scores = {check.check: check.score for check in result.checks}
        statuses = {check.check: check.status for check in result.checks}
        where = _key(result.student, result.stage, result.lesson)

        def write() -> None:
            with self._together() as db:
                row = db.execute(select(RESULTS.c.answers).where(where)).one_or_none()
                before = json.loads(row.answers) if row else {}
                changed = {name for name, digest in answers.items() if before and before.get(name) != digest}
                submission = self._submission(result.stage, result.student, timestamp)
                notebook = self.database.find_notebook(result.lesson, result.stage)
                checks = {check.check: check for check in result.checks}
                theirs = self._complete(submission, notebook)
                for grade in theirs.grades:
                    check = checks[grade.name]
                    check.score, check.status = scores[grade.name], statuses[grade.name]
                    self._enter(grade, None if check.status in WAITING else check.score, grade.name in changed)
                db.flush()
                # The score that counts is the database's to say: asked for all at once.
                for grade in db.query(Grade).filter_by(notebook_id=theirs.id).populate_existing():
                    _count(checks[grade.name], grade)
                self._penalize(result, theirs)
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
                files(result)

        self._patiently(write)

    def _penalize(self, result: Result, notebook: SubmittedNotebook) -> None:
        """Enters what lateness costs, by the due date as it is now."""
        result.late_penalty = 0.0
        seconds = notebook.assignment.total_seconds_late
        result.late_penalty = self.penalty(result.student, result.score, seconds) if seconds else 0.0
        notebook.late_submission_penalty = result.late_penalty or None

    def _submission(self, stage: str, student: str, timestamp: str | None) -> SubmittedAssignment:
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
        submission.timestamp = _utc(timestamp)
        return submission

    @staticmethod
    def _enter(grade: Grade, score: float | None, changed: bool) -> None:
        if grade.manual_score is None:
            grade.needs_manual_grade = score is None
        elif changed or grade.auto_score != score:
            grade.needs_manual_grade = True
        grade.auto_score = score


def _utc(timestamp: str | None) -> datetime | None:
    return parse_utc(timestamp) if timestamp else None


def _count(check: Check, grade: Grade) -> None:
    """The score that counts: a person's, where there is one."""
    check.score = grade.score
    if grade.manual_score is not None:
        check.status = "by hand"


def _dumped(result: Result) -> str:
    fields = asdict(result)
    del fields["notebook"]
    return json.dumps(fields)


def _loaded(text: str) -> Result:
    fields = json.loads(text)
    return Result(**fields | {"checks": [Check(**check) for check in fields["checks"]]})


def _shown(url: str) -> str:
    """The address without its password."""
    head, _, rest = url.partition("://")
    return f"{head}://{rest.rpartition('@')[2]}"
