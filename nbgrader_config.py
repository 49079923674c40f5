"""nbgrader's view of the course: a stage is an assignment, a lesson is a notebook in it.

`nbgrader` commands and the formgrader, started in this folder, work on the masters in build/source, the learners'
notebooks in course/ and the class in grades/, where `make grade` puts one by default. `make grade OUT=folder` puts a
class elsewhere: set LLM40_GRADES=folder to look at that one.
"""

import os
from pathlib import Path

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.converters import Autograde
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import ClearHiddenTests, ClearOutput, GetGrades

from autograder.learner.validate import follow_grading

c = get_config()  # noqa: F821  given by traitlets, which runs this file

root = Path(__file__).resolve().parent
follow_grading(root)  # `nbgrader validate`, and its button, accept what grading accepts
grades = (root / os.environ.get("LLM40_GRADES", "grades")).resolve()
grades.mkdir(parents=True, exist_ok=True)  # SQLite makes the file, but not its folder

c.CourseDirectory.root = str(root)
c.CourseDirectory.course_id = "llm40"
c.CourseDirectory.source_directory = "build/source"
c.CourseDirectory.release_directory = "course"
# nbgrader joins these to the root; an absolute folder stays what it is.
c.CourseDirectory.submitted_directory = str(grades / "submitted")
c.CourseDirectory.autograded_directory = str(grades / "autograded")
# grades/feedback is the grader's: `nbgrader generate_feedback` writes elsewhere, and without hidden tests.
c.CourseDirectory.feedback_directory = str(grades / "nbgrader" / "feedback")
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, ClearOutput, CSSHTMLHeaderPreprocessor]
c.CourseDirectory.db_url = f"sqlite:///{(grades / 'gradebook.db').as_posix()}"

# What a learner sees in the place of an answer: the line that autograder/lesson.py puts into its stubs.
c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("your turn: replace this line")'}
# Model answers to open questions are prose that nobody grades; nbgrader knows no such cell and would complain.
c.ClearSolutions.enforce_metadata = False

# Validate stops a cell that hangs, and goes on.
c.ExecutePreprocessor.timeout = 120


def refuse(self):
    """`nbgrader autograde` would put grades of its own over the grader's, and run learners' code without a sandbox."""
    message = "This class is graded by `make grade` (python -m autograder grade): run that instead."
    self.log.error(message)
    raise NbGraderException(message)


Autograde.start = refuse
