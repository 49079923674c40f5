"""A learner's copy of a lesson and the lesson as it is now become one notebook.

The merge is the grader's (grading/rebuild): answers, and the cells that a learner added, are the learner's, the rest is
the course's. What the grader need not know is here: which cells are left from an earlier edition of the lesson, and
what a cell has besides its text.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

import nbformat
from nbformat import NotebookNode

from autograder.grading.additions import find_additions
from autograder.grading.rebuild import (
    GENERATED,
    SubmittedCell,
    find_own_text,
    match_cells,
    read_name,
    read_role,
    read_submission,
    rebuild,
)

# How the builder calls the cells that are not the learner's to write.
GIVEN = re.compile(r"opening|setup|(text|code|experiment|support)-[0-9a-f]{10}(-\d+)?|[a-z0-9_]+-check-\d+")
KEPT = ("outputs", "execution_count", "attachments")  # of a cell, besides its text


@dataclass
class Changes:
    """The changes of a merge, for one line."""

    answers: int = 0  # kept in their places
    added: int = 0  # cells of the learner's own, kept
    new: list[str] = field(default_factory=list)  # exercises that were not there
    changed: list[str] = field(default_factory=list)  # exercises that ask for something else
    gone: list[str] = field(default_factory=list)  # exercises that are no more; their answers are plain cells
    edited: int = 0  # given cells that the learner had edited

    def __str__(self) -> str:
        parts = [f"{self.answers} answers and {self.added} cells of your own are kept"]
        parts += [f"new: {', '.join(self.new)}"] if self.new else []
        parts += [f"asks for something else: {', '.join(self.changed)}"] if self.changed else []
        parts += [f"no more asked for, your answer is a plain cell now: {', '.join(self.gone)}"] if self.gone else []
        parts += [f"the course's again: {self.edited} given cells that you had edited"] if self.edited else []
        return "; ".join(parts)


def merge(course: str, copy: bytes, base: str | None = None, experiments: bool = False) -> tuple[NotebookNode, Changes]:
    """The lesson with the learner's answers and cells in it.

    `course` is the lesson as it is now, `base` as the copy was made from, where that is known: then it is certain what
    of the copy is the learner's. With `experiments`, what those import stands in cells of its own, as for grading.
    Raises Unreadable where the copy is no notebook.
    """
    cells, _ = read_submission(copy)
    new = nbformat.reads(course, as_version=4)
    old = nbformat.reads(base, as_version=4) if base else None
    changes = Changes()
    mine = _sort_out(new, old, cells, changes)
    heads = {read_name(cell): cell.source.split("\n")[0] for cell in new.cells if read_role(cell) == "exercise"}
    stubs = {
        read_name(cell): find_own_text(cell.source) for cell in new.cells if read_role(cell) in ("exercise", "answer")
    }
    merged, _ = rebuild(new, mine, experiments)
    for cell in merged.cells:
        lines = cell.source.split("\n")
        if read_role(cell) == "exercise" and GENERATED.match(lines[0]):
            cell.source = "\n".join([heads[read_name(cell)], *lines[1:]])  # its number may be another one now
        changes.answers += read_name(cell) in stubs and find_own_text(cell.source) != stubs[read_name(cell)]
        changes.added += read_role(cell) == "added"
    if old:
        before = {read_name(cell): find_own_text(cell.source) for cell in old.cells if read_role(cell) == "exercise"}
        asked = {exercise: stubs[exercise] for exercise in heads}
        changes.new = [exercise for exercise in asked if exercise not in before]
        changes.changed = [e for e, text in asked.items() if e in before and before[e] != text]
    _keep_outputs(merged, copy)
    return merged, changes


def _sort_out(
    new: NotebookNode, old: NotebookNode | None, cells: list[SubmittedCell], changes: Changes
) -> list[SubmittedCell]:
    """The copy's cells without those that only an earlier edition of the lesson had, and with today's stubs."""
    here = match_cells(new, cells)[0]
    before = match_cells(old, cells)[0] if old else {}
    kept = []
    for number, cell in enumerate(cells):
        was = old.cells[before[number]] if number in before else None
        untouched = was is not None and find_own_text(was.source) == find_own_text(cell.source)
        was_learners = was is not None and read_role(was) in ("exercise", "answer")
        given = was is not None and was.cell_type == "code" and read_role(was) in ("plain", "setup")
        written = find_additions(was.source, cell.source) if given and not untouched else ""
        if number in here:
            now = new.cells[here[number]]
            if untouched:
                cell = replace(cell, source=now.source)
            elif given:
                cell = replace(cell, source=f"{now.source}\n{written}")
                changes.edited += 1
            elif read_role(now) not in ("exercise", "answer"):
                changes.edited += was is not None and not untouched
            kept.append(cell)
        elif was_learners:
            if not untouched:
                changes.gone.append(read_name(was))
                kept.append(cell)
        elif was is not None or GIVEN.fullmatch(cell.id) or GIVEN.fullmatch(cell.grade_id):
            changes.edited += was is not None and not untouched
            kept += [SubmittedCell("code", written)] if written else []
        else:
            kept.append(cell)
    return kept


def _keep_outputs(merged: NotebookNode, copy: bytes) -> None:
    """Gives the cells whose text is as it was in the copy what they had there: outputs, and pictures pasted in."""
    try:
        cells = json.loads(copy.decode("utf-8-sig"))["cells"]
        had = defaultdict(list)
        for cell in cells:
            had[cell["cell_type"], _normalize_line_ends("".join(cell["source"]))].append(cell)
    except (ValueError, KeyError, TypeError, RecursionError):  # the merge has read its text in another way
        return
    for cell in merged.cells:
        those = had.get((cell.cell_type, _normalize_line_ends(cell.source)))
        given = those.pop(0) if those else {}
        for key in KEPT:
            if key in given:
                _keep_if_valid(cell, key, nbformat.from_dict(given[key]))


def _keep_if_valid(cell: NotebookNode, key: str, value: object) -> None:
    before = cell.get(key)
    cell[key] = value
    try:
        nbformat.validate(cell, ref=f"{cell.cell_type}_cell", version=4, version_minor=5)
    except nbformat.ValidationError:  # no program wrote it
        cell[key] = before
        if before is None and key == "attachments":
            del cell[key]


def _normalize_line_ends(source: str) -> str:
    return source.replace("\r\n", "\n").replace("\r", "\n")
