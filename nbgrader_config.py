"""nbgrader's view of the course: a stage is an assignment, a lesson is a notebook in it.

`nbgrader` commands and the formgrader, started in this folder, work on the masters in build/source, the learners'
notebooks in course/ and the class that `make grade` graded last. `make grade OUT=folder` puts a class elsewhere: set
LLM40_GRADES=folder to look at that one.
"""

import os
from pathlib import Path

c = get_config()  # noqa: F821  given by traitlets, which runs this file

root = Path(__file__).resolve().parent
grades = (root / os.environ.get("LLM40_GRADES", "grades")).resolve()
grades.mkdir(parents=True, exist_ok=True)  # SQLite makes the file, but not its folder

c.CourseDirectory.root = str(root)
c.CourseDirectory.course_id = "llm40"
c.CourseDirectory.source_directory = "build/source"
c.CourseDirectory.release_directory = "course"
# nbgrader joins these to the root; an absolute folder stays what it is.
c.CourseDirectory.submitted_directory = str(grades / "submitted")
c.CourseDirectory.autograded_directory = str(grades / "autograded")
c.CourseDirectory.feedback_directory = str(grades / "feedback")
c.CourseDirectory.db_url = f"sqlite:///{(grades / 'gradebook.db').as_posix()}"

# What a learner sees in the place of an answer: the line that autograder/lesson.py puts into its stubs.
c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("your turn: replace this line")'}
# Model answers to open questions are prose that nobody grades; nbgrader knows no such cell and would complain.
c.ClearSolutions.enforce_metadata = False

# Validate and autograde stop a cell that hangs, and go on.
c.ExecutePreprocessor.timeout = 120
