"""The gradebook, and the one who writes it: nbgrader's own database, through nbgrader's own API.

So nbgrader's formgrader and `nbgrader export` show what we show. A stage is an assignment, a lesson a notebook in it.
"""

import json
import os
import sys
import warnings
from contextlib import contextmanager
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
    SubmittedAssignment,
    SubmittedNotebook,
)
from nbgrader.api import Gradebook as Database
from nbgrader.utils import is_grade, is_locked, is_solution
from sqlalchemy.exc import SAWarning

from autograder.grading.task import Result

COURSE = "llm40"  # as in nbgrader_config.py


class Gradebook:
    """Takes masters and results, one at a time, from one process."""

    def __init__(self, url: str):
        # For a new database nbgrader calls the command `alembic`, which only an activated environment has on its path.
        path = os.environ.get("PATH", "")
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
        try:
            self.database = Database(url, COURSE)
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

    def commit(self, result: Result, changed: set[str], timestamp: str | None = None) -> None:
        """Writes a result's scores, and puts the scores that count into the result.

        What a person has entered (manual scores, extra credit, comments) stays. `changed` names the written answers
        that differ from those of the run before: a person's score for one of them is asked for again, as it is where
        the automatic score has changed under a manual one.
        """
        self.database.update_or_create_student(result.student)
        fresh = self._fresh(result)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # nbgrader builds a submission before it adds it
            submission = self.database.update_or_create_submission(result.stage, result.student, timestamp=timestamp)
        notebook = self.database.find_notebook(result.lesson, result.stage)
        checks = {check.check: check for check in result.checks}
        with self._together() as db:
            if fresh:  # nbgrader asks for a person until there is a score; the stage's other lessons have none yet
                for other in submission.notebooks:
                    for grade in other.grades:
                        grade.auto_score, grade.needs_manual_grade = 0.0, False
            for grade in self._complete(submission, notebook).grades:
                check = checks[grade.name]
                self._enter(grade, None if check.status == "to grade" else check.score, grade.name in changed)
                db.flush()
                db.refresh(grade)
                check.score = grade.score
                if grade.manual_score is not None:
                    check.status = "by hand"

    def _fresh(self, result: Result) -> bool:
        try:
            self.database.find_submission(result.stage, result.student)
        except MissingEntry:
            return True
        return False

    @staticmethod
    def _enter(grade: Grade, score: float | None, changed: bool) -> None:
        if grade.manual_score is None:
            grade.needs_manual_grade = score is None
        elif changed or grade.auto_score != score:
            grade.needs_manual_grade = True
        grade.auto_score = score
