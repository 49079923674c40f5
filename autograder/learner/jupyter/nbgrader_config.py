"""Read by nbgrader where `make lab` has started JupyterLab: its Validate button follows the rules of grading."""

from autograder.learner.validate import follow_grading

follow_grading()
c = get_config()  # noqa: F821  given by traitlets, which runs this file
c.ExecutePreprocessor.timeout = 120  # seconds for a cell
