"""nbgrader's Validate by the rules of grading, so that what it accepts is accepted there.

Given cells are the course's, with what the learner added to them; of an experiment only the imports run; and where a
name is missing for it, Validate says so. The checks are the learner's copies: nbgrader tells whether they were changed.
"""

from pathlib import Path
from textwrap import wrap

from nbformat import NotebookNode, read, writes
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, Execute, NbGraderPreprocessor
from nbgrader.validator import Validator

from autograder.catalog import BY_KEY
from autograder.execute import Outcome
from autograder.grading.origins import Origins
from autograder.grading.rebuild import (
    SubmittedCell,
    Unreadable,
    find_exercise,
    is_run,
    read_name,
    read_role,
    read_submission,
    rebuild,
)
from autograder.grading.verdicts import UNKNOWN
from autograder.layout import ROOT, Layout

WIDE = 80  # columns: nbgrader cuts what is wider


class AsGraded(NbGraderPreprocessor):
    """A notebook's cells as grading runs them; as they are where the lesson is not in the course."""

    root = ROOT  # of the project whose course it is

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        key = str(nb.metadata.get("llm40", {}).get("lesson"))
        path = Layout(self.root).course / f"{key}.ipynb"
        if key not in BY_KEY or not path.is_file():
            return nb, resources
        try:
            submitted, _ = read_submission(writes(nb).encode())
        except Unreadable:
            return nb, resources
        checks = {read_name(cell): cell for cell in nb.cells if read_role(cell) == "check"}
        merged, _ = rebuild(read(path, as_version=4), submitted, experiments=True)
        resources["llm40"] = submitted, merged.cells
        nb.cells = [
            checks.get(read_name(cell), cell) for cell in merged.cells if is_run(cell) or cell.cell_type != "code"
        ]
        return nb, resources


class Explain(NbGraderPreprocessor):
    """Says under a check for want of what name it failed, and where that is made."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        submitted: list[SubmittedCell]
        submitted, cells = resources.get("llm40", ([], []))
        ran = [(cell, _read_outcome(cell)) for cell in nb.cells if cell.cell_type == "code"]
        origins = Origins(ran, submitted, cells)
        exercises = {read_name(cell): outcome for cell, outcome in ran if read_role(cell) == "exercise"}
        for cell, outcome in ran:
            cause = exercises.get(find_exercise(read_name(cell)))
            said = cause if cause and cause.status == "error" else outcome
            unknown = UNKNOWN.search(said.evalue) if said.ename == "NameError" else None
            why = origins(unknown[1], find_exercise(read_name(cell))) if unknown and read_role(cell) == "check" else ""
            for output in cell.outputs:
                if why and output.output_type == "error":
                    output.traceback += wrap(why, WIDE)
        return nb, resources


def _read_outcome(cell: NotebookNode) -> Outcome:
    error = next((output for output in cell.outputs if output.output_type == "error"), None)
    return Outcome("error", error.ename, error.evalue) if error else Outcome("ok")


def follow_grading(root: Path = ROOT) -> None:
    """For this process: nbgrader's Validator prepares and explains as above. Called by nbgrader's configuration."""
    AsGraded.root = root

    def preprocess(self: Validator, nb: NotebookNode) -> NotebookNode:
        self.preprocessors = [CheckCellMetadata, ClearOutput, AsGraded, Execute, Explain]
        return stock(self, nb)

    stock = getattr(Validator._preprocess, "stock", Validator._preprocess)
    preprocess.stock = stock
    Validator._preprocess = preprocess
