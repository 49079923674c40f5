"""Finds where a missing name is made when a notebook is graded: in a cell that does not run, or that failed."""

from collections.abc import Sequence

from nbformat import NotebookNode

from autograder.execute import Outcome
from autograder.grading.rebuild import SubmittedCell, read_name, read_role
from autograder.grading.verdicts import UNKNOWN
from autograder.judge.sources import find_bound_names
from autograder.lesson import python_of

SHOWN = 50  # characters of a cell's first line


class Origins:
    """Says in a sentence where a name is made; it is called with the name and with the cell that asks for it."""

    def __init__(
        self,
        ran: Sequence[tuple[NotebookNode, Outcome]],
        submitted: Sequence[SubmittedCell],
        cells: Sequence[NotebookNode] = (),
    ):
        """`cells` are the whole notebook's: its experiments are known there where a copy has lost its metadata."""
        self.ran, self.submitted, self.cells = ran, submitted, cells

    def __call__(self, wanted: str, asked_by: str) -> str:
        return self._tell_of_learners_cells(wanted, asked_by) or self._tell_of_cells_not_run(wanted)

    def _tell_of_learners_cells(self, wanted: str, asked_by: str) -> str:
        below = False
        for cell, outcome in self.ran:
            below = below or read_name(cell) == asked_by
            if read_role(cell) == "check" or read_name(cell) == asked_by or not _is_made_in(cell.source, wanted):
                continue
            where = f"{wanted} is made in {_describe(cell)}"
            if outcome.status != "ok":
                said = outcome.evalue.strip().split("\n")[0]
                missing = UNKNOWN.search(said) if outcome.ename == "NameError" else None
                why = self._tell_of_cells_not_run(missing[1]) if missing else ""
                failed = f"{outcome.ename}: {said}" if outcome.ename else outcome.status
                return f"{where}, which failed: {failed}. {why}".rstrip()
            if below:
                return f"{where}, further down: a notebook is run once, from top to bottom."
        return ""

    def _tell_of_cells_not_run(self, wanted: str) -> str:
        experiments = [cell.source for cell in self.submitted if cell.experiment]
        experiments += [cell.source for cell in self.cells if read_role(cell) == "experiment"]
        source = next((source for source in experiments if _is_made_in(source, wanted)), None)
        if source is not None:
            return (
                f"{wanted} is made in an experiment ({_find_telling_line(source)}), and experiments are not run in "
                "grading, only their imports: make it in the exercise's cell or in a cell of your own."
            )
        if any(cell.kind == "code" and _is_made_in(cell.source, wanted) for cell in self.submitted):
            return f"{wanted} is made in an edited given cell: put it in the exercise's cell or in your own."
        if any(cell.kind != "code" and _is_made_in(cell.source, wanted) for cell in self.submitted):
            return f"{wanted} is made in a cell that is Markdown or raw text, which is not run."
        return ""


def _is_made_in(source: str, wanted: str) -> bool:
    return wanted in source and wanted in find_bound_names(python_of(source))


def _describe(cell: NotebookNode) -> str:
    if read_role(cell) == "exercise":
        return f"the cell of {read_name(cell)}"
    kinds = {"added": "your own cell", "imports": "an experiment's imports"}
    return f"{kinds.get(read_role(cell), 'the cell')} ({_find_telling_line(cell.source)})"


def _find_telling_line(source: str) -> str:
    lines = [line.strip() for line in source.strip().split("\n")]
    first = next((line for line in lines if line and not line.startswith(("#", "%", "import ", "from "))), lines[0])
    return first if len(first) <= SHOWN else first[: SHOWN - 1] + "…"
