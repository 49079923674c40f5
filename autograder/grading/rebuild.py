"""A submission and the master become the notebook that is run.

From a submission only text is taken: of the exercise cells, of the written answers, of the cells that the learner
added, and what they wrote into a given cell besides what stands there. Everything else (checks, given code, metadata,
outputs) comes from the master. So nothing that was deleted, edited or forged in a submission can change what is asked,
and nothing that is broken in it can stop the grading.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import nbformat
import nbformat.reader
from nbformat import NotebookNode

from autograder.grading.additions import find_additions, find_imports
from autograder.lesson import remove_hidden, stub
from autograder.text import make_printable

MAX_BYTES = 100_000_000  # of a file; outputs, which nobody reads, have most of them
MAX_CELLS, MAX_TEXT = 2_000, 20_000_000  # characters of all cells; pictures that were pasted into prose are text
MAX_CODE, MAX_LINES = 1_000_000, 20_000  # characters and lines of all code
ANSWER_STUB = "YOUR ANSWER HERE"  # nbgrader's text for a written answer
GENERATED = re.compile(r"#\s*(?:exercise\s+|Exercise \d+ \()([a-z0-9_]+)\b")  # the first line of every exercise cell
DEFINED = re.compile(r"^(?:async\s+def|def|class)\s+(\w+)", re.MULTILINE)
WORD = re.compile(r"\w+|[^\w\s]")
MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"# %%": "a text version of a notebook (Jupytext)",
}
NEWER = "file: saved by"  # begins a flag that is of interest only where a cell's syntax is not understood
SIMILAR = 0.75  # of a cell that has lost its metadata: enough of the master's words to be a copy of it


class Unreadable(ValueError):
    """A submission that is no notebook; the message says why, for the learner."""


@dataclass
class SubmittedCell:
    """A submitted cell: all that is ever read of it."""

    kind: str  # "code", "markdown" or "raw"
    source: str
    grade_id: str = ""
    id: str = ""
    experiment: bool = False


# --- reading --------------------------------------------------------------------------------------------------


def read_submission(data: bytes) -> tuple[list[SubmittedCell], list[str]]:
    """The cells of a submitted file, and a line for everything unusual about the file.

    Raises Unreadable where no cells can be read from it.
    """
    flags = []
    if len(data) > MAX_BYTES:
        raise Unreadable(f"the file has more than the {MAX_BYTES / 1e6:.0f} MB that are read")
    if not data.strip(b"\0 \t\r\n"):
        raise Unreadable("the file is empty" if not data else "the file has nothing but blanks or NUL bytes")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    else:
        if data.startswith(b"\xef\xbb\xbf"):
            flags.append("file: begins with a byte-order mark; ignored")
            data = data[3:]
        if b"\0" in data:
            flags.append("file: contains NUL bytes; removed")
            data = data.replace(b"\0", b"")
        encodings = ["utf-8", "latin-1", "gb18030"]
    notebook, problem = None, None
    for encoding in encodings:
        try:
            notebook = json.loads(data.decode(encoding))
        except UnicodeDecodeError as error:
            problem = problem or f"the file is not text ({error.reason} at byte {error.start})"
        except RecursionError:
            raise Unreadable("the file is nested too deeply to be a notebook") from None
        except ValueError as error:
            problem = f"the file is not a notebook: not valid JSON ({error})"
        else:
            if encoding != "utf-8":
                flags.append(f"file: not UTF-8; read as {encoding}")
            break
    if notebook is None:
        raise Unreadable(_describe_mistaken_file(data) or problem)
    return _read_submitted_cells(notebook, flags), flags


def _describe_mistaken_file(data: bytes) -> str:
    """Says what a file is that people hand in for a notebook by mistake; empty for any other."""
    start = data.lstrip()[:500]
    if re.search(rb"^(<<<<<<< |>>>>>>> )", data, re.MULTILINE):
        return "the file has git's marks of a merge conflict (<<<<<<<): the conflict has to be resolved first"
    if start.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer, not the notebook itself: git lfs pull gets it"
    if re.match(rb"(<!--.*?-->\s*)?<(!doctype\s+html|html|head|\?xml)\b", start, re.IGNORECASE | re.DOTALL):
        return "the file is a web page, not the notebook: in Jupyter, File → Download gives the notebook itself"
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return f"the file is {what}, not a notebook"
    return ""


def _read_submitted_cells(notebook: object, flags: list[str]) -> list[SubmittedCell]:
    version = notebook.get("nbformat") if isinstance(notebook, dict) else None
    if not isinstance(version, int):
        raise Unreadable("the file is JSON, but not a notebook")
    if version < 4:
        try:
            notebook = nbformat.convert(nbformat.reader.reads(json.dumps(notebook)), 4)
        except Exception as error:  # whatever an old, broken notebook makes the converter do
            raise Unreadable(f"the notebook is of the old version {version} and cannot be converted: {error}") from None
        flags.append(f"file: notebook format {version}; converted")
    flags += _flag_newer_python(notebook)
    cells = notebook.get("cells")
    if not isinstance(cells, list):
        raise Unreadable("the notebook has no list of cells")
    _check_at_most(MAX_CELLS, len(cells), "cells")
    found = []
    for cell in cells:
        if not isinstance(cell, dict) or cell.get("cell_type") not in ("code", "markdown", "raw"):
            flags.append("file: something that is no cell; left out")
            continue
        source = cell.get("source", "")
        if isinstance(source, list):
            source = "".join(line for line in source if isinstance(line, str))
        metadata = cell.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        marks = metadata.get("nbgrader")
        tags = metadata.get("tags")
        found.append(
            SubmittedCell(
                kind=cell["cell_type"],
                source=make_printable(str(source).replace("\r\n", "\n").replace("\r", "\n")),
                grade_id=str(marks.get("grade_id", "")) if isinstance(marks, dict) else "",
                id=str(cell.get("id", "")),
                experiment=isinstance(tags, list) and "experiment" in tags,
            )
        )
    _check_bounds(found)
    return found


def _flag_newer_python(notebook: dict) -> list[str]:
    """A flag where the notebook was saved by a newer Python than this one, which may not know its syntax."""
    metadata = notebook.get("metadata")
    language = metadata.get("language_info") if isinstance(metadata, dict) else None
    found = re.match(r"3\.(\d{1,3})\b", str(language.get("version")) if isinstance(language, dict) else "")
    if not found or int(found[1]) <= sys.version_info.minor:
        return []
    return [f"{NEWER} Python {found[0]}, and graded by {sys.version_info.major}.{sys.version_info.minor}"]


def _check_bounds(cells: list[SubmittedCell]) -> None:
    """Raises Unreadable where there is more than any work on a lesson has; the rest then costs a second at most."""
    code = [cell.source for cell in cells if cell.kind == "code"]
    _check_at_most(MAX_TEXT, sum(len(cell.source) for cell in cells), "characters")
    _check_at_most(MAX_CODE, sum(map(len, code)), "characters of code")
    _check_at_most(MAX_LINES, sum(source.count("\n") + 1 for source in code), "lines of code")


def _check_at_most(most: int, count: int, what: str) -> None:
    if count > most:
        raise Unreadable(f"the notebook has {count:,} {what}, more than the {most:,} that are read")


# --- the master -----------------------------------------------------------------------------------------------


def read_role(cell: NotebookNode) -> str:
    """The role of a cell.

    `exercise`, `check`, `answer` (for a person), `experiment`, `setup`, `plain`; `added` is a learner's own, `imports`
    what an experiment imports.
    """
    own = cell.metadata.get("llm40", {}).get("role")  # where nbgrader has no mark
    if own in ("added", "answer", "setup", "imports"):
        return own
    marks = cell.metadata.get("nbgrader", {})
    if marks.get("solution"):
        return "exercise" if cell.cell_type == "code" and not marks.get("grade") else "answer"
    if marks.get("grade") and cell.cell_type == "code":
        return "check"
    return "experiment" if "experiment" in cell.metadata.get("tags", []) else "plain"


def read_name(cell: NotebookNode) -> str:
    """The name of a master's cell in flags and tables: its grade_id, or its id."""
    return cell.metadata.get("nbgrader", {}).get("grade_id") or cell.get("id", "?")


def find_exercise(check: str) -> str:
    """The exercise that a check judges: `sdpa` for `sdpa-check-1`."""
    return re.sub(r"-check-\d+$", "", check)


def is_run(cell: NotebookNode) -> bool:
    """Whether a cell is run where answers are judged."""
    return cell.cell_type == "code" and bool(cell.source.strip()) and read_role(cell) not in ("experiment", "setup")


def find_own_text(source: str) -> str:
    """A cell's text without the first line that the builder makes, and without blanks at the ends of lines."""
    lines = [line.rstrip() for line in source.strip().split("\n")]
    return "\n".join(lines[1:] if GENERATED.match(lines[0]) else lines).strip()


def remove_answers(master: NotebookNode) -> NotebookNode:
    """The master without its answers: what a learner got, and the hidden tests. The reference goes no further."""
    for cell in master.cells:
        kind = read_role(cell)
        if kind == "exercise" or (kind == "answer" and cell.cell_type == "code"):
            cell.source = stub(cell.source)
        elif kind == "answer":
            cell.source = ANSWER_STUB
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    return master


# --- matching -------------------------------------------------------------------------------------------------


def _trim_ends(source: str) -> str:
    """A source without blanks at the ends of its lines."""
    return "\n".join(line.rstrip() for line in source.strip().split("\n"))


def _is_same_text(one: str, other: str) -> bool:
    """Whether two sources are the same but for blanks at the ends of lines."""
    return _trim_ends(one) == _trim_ends(other)


def _is_unchanged(cell: NotebookNode, source: str) -> bool:
    """Whether a source is the master's cell's, as released or as in the master."""
    return _is_same_text(source, cell.source) or _is_same_text(source, remove_hidden(cell.source))


def _measure_likeness(one: Counter, other: Counter) -> float:
    """The share of words that two texts have in common: twice the common ones by all (Dice's coefficient)."""
    sizes = one.total() + other.total()
    return 2 * (one & other).total() / sizes if sizes else 0.0


def looks_like(cell: NotebookNode, submitted: SubmittedCell) -> bool:
    """Whether a cell without marks is this exercise: by its generated first line, or by what the stub defines."""
    first = GENERATED.match(submitted.source.strip())
    if first:
        return first.group(1) == read_name(cell)
    wanted = set(DEFINED.findall(cell.source))
    return bool(wanted) and submitted.kind == "code" and wanted <= set(DEFINED.findall(submitted.source))


def match_cells(master: NotebookNode, cells: list[SubmittedCell]) -> tuple[dict[int, int], bool]:
    """Submitted cell → the master's cell that it copies (both by index), and whether some were known only by text."""
    by_grade_id = {read_name(c): i for i, c in enumerate(master.cells) if "nbgrader" in c.metadata}
    by_id = {c.id: i for i, c in enumerate(master.cells) if c.get("id")}
    found = {}
    for j, cell in enumerate(cells):
        i = by_grade_id.get(cell.grade_id, by_id.get(cell.id))
        if i is not None:
            found[j] = i

    def find_rest(roles: tuple[str, ...]) -> list[int]:
        taken = set(found.values())
        return [i for i, c in enumerate(master.cells) if i not in taken and read_role(c) in roles]

    def list_free() -> list[int]:
        return [j for j in range(len(cells)) if j not in found]

    by_text = {}
    for i in find_rest(("exercise",)):
        by_text |= {j: i for j in list_free() if looks_like(master.cells[i], cells[j])}
    stripped = bool(by_text) or not found
    found |= by_text
    trimmed = {j: _trim_ends(cells[j].source) for j in list_free()}
    for i in find_rest(("check", "plain", "experiment", "setup", "answer")):
        known = (_trim_ends(master.cells[i].source), _trim_ends(remove_hidden(master.cells[i].source)))
        same = [j for j in list_free() if trimmed[j] in known]
        found |= dict.fromkeys(same[:1], i)
    if stripped:
        words = {j: Counter(WORD.findall(cells[j].source)) for j in list_free()}
        for i in find_rest(("check", "plain", "experiment", "setup")):
            asked = Counter(WORD.findall(remove_hidden(master.cells[i].source)))
            near = {j: _measure_likeness(asked, words[j]) for j in list_free()}
            if near and max(near.values()) > SIMILAR:
                found[max(near, key=near.get)] = i
        for i in find_rest(("answer",)):  # it can have any text: only its place tells
            before = [j for j, k in found.items() if k == i - 1]
            if before and max(before) + 1 in list_free() and cells[max(before) + 1].kind == "markdown":
                found[max(before) + 1] = i
    return found, stripped


# --- rebuilding -----------------------------------------------------------------------------------------------


def _make_added_cell(cell: SubmittedCell, number: int) -> NotebookNode:
    kinds = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    made = kinds.get(cell.kind, nbformat.v4.new_raw_cell)(cell.source, id=f"added-{number}")
    made.metadata["llm40"] = {"role": "added"}
    if cell.experiment:
        made.metadata["tags"] = ["experiment"]
    return made


def _make_imports_cell(original: NotebookNode, source: str) -> NotebookNode:
    made = nbformat.v4.new_code_cell(source, id=f"imports-{read_name(original)}"[:64])
    made.metadata["llm40"] = {"role": "imports"}
    return made


def _collect_additions(original: NotebookNode, copies: list[SubmittedCell]) -> str:
    """The learner's text in a given cell of code besides what stands there; a check takes nothing of it."""
    if original.cell_type != "code" or read_role(original) not in ("plain", "setup"):
        return ""
    edited = [copy for copy in copies if copy.kind == "code" and not _is_unchanged(original, copy.source)]
    found = [find_additions(original.source, copy.source) for copy in edited]
    return "\n".join(dict.fromkeys(filter(None, found)))


def _flag_copies(original: NotebookNode, copies: list[SubmittedCell], kept: str) -> list[str]:
    """The flags about the copies of a master's cell; `kept` is their text besides the master's."""
    kind, label = read_role(original), read_name(original)
    is_learners = kind in ("exercise", "answer")
    if not is_learners and (original.cell_type != "code" or kind in ("experiment", "setup")) and not kept:
        return []  # prose and experiments are there to be played with, and graders need no set-up
    if not copies:
        used = "the untouched stub" if is_learners else "the course's"
        return [f"{label}: deleted; {used} was used"]
    flags = []
    if len(copies) > 1:
        counts = "the last counts, the others ran as added cells" if is_learners else "the course's was used, once"
        flags.append(f"{label}: {len(copies)} copies; {counts}")
    last = copies[-1]
    if last.kind != original.cell_type:
        remedy = f"read as {original.cell_type}" if is_learners else "the course's was used"
        flags.append(f"{label}: turned into a {last.kind} cell; {remedy}")
    elif not is_learners and not all(_is_unchanged(original, copy.source) for copy in copies):
        what = ", and then what was added to it" if kept else ""
        flags.append(f"{label}: edited; the course's was used{what}")
    return flags


def rebuild(
    master: NotebookNode, cells: list[SubmittedCell], experiments: bool = False
) -> tuple[NotebookNode, list[str]]:
    """The notebook to run, and a line for everything that was not as the course had handed it out.

    `master` has no answers (see `remove_answers`). A learner's own cell comes after the master's cell that it followed;
    what they added to a given cell is a cell of their own, right after it. Where `experiments` are not run, what they
    import in the submission stands after each in a cell of its own.
    """
    found, stripped = match_cells(master, cells)
    flags = []
    if stripped:
        flags.append("file: cells without nbgrader's metadata; recognized by their text")
    copies = defaultdict(list)
    for j, i in found.items():
        copies[i].append(j)
    for those in copies.values():
        those.sort()
    after = defaultdict(list)
    place = -1
    for j, cell in enumerate(cells):
        i = found.get(j)
        is_learners = i is not None and read_role(master.cells[i]) in ("exercise", "answer")
        if i is None or (is_learners and j != copies[i][-1]):
            if cell.source.strip():
                after[place].append(cell)
        else:
            place = i
    rebuilt, number = [], 0
    for i, original in enumerate([None, *master.cells], -1):
        if original is not None:
            mine = [cells[j] for j in copies[i]]
            written = _collect_additions(original, mine)
            flags += _flag_copies(original, mine, written)
            if mine and read_role(original) in ("exercise", "answer"):
                original.source = mine[-1].source
            rebuilt.append(original)
            if written:
                after[i].insert(0, SubmittedCell("code", written))
            if experiments and mine and read_role(original) == "experiment":
                imported = find_imports("\n".join(copy.source for copy in mine if copy.kind == "code"))
                rebuilt += [_make_imports_cell(original, imported)] if imported else []
        for cell in after[i]:
            number += 1
            rebuilt.append(_make_added_cell(cell, number))
    master.cells = rebuilt
    return master, flags
