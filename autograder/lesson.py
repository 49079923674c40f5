"""One lesson, read: its source file, the cells and sections in it, and what it takes in time.

`read_lesson(path)` returns a `Lesson` or raises `LessonError`, which carries every mistake as one line:

    solutions/stage2_transformer/09_x.py:123: cell check "sdpa": `points` is 0, but must be a positive number

The format is described in CONTRIBUTING.md; autograder/rules.py has the rules that a lesson keeps.
"""

import ast
import hashlib
import json
import math
import re
import symtable
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from autograder.catalog import BY_KEY, BY_NUMBER, Entry

STUB = 'raise NotImplementedError("your turn: replace this line")'
BEGIN_SOLUTION, END_SOLUTION = "### BEGIN SOLUTION", "### END SOLUTION"
BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"

# A cell's marks, by role; any other key is an error.
MARKS = {
    "exercise": {"exercise", "minutes", "difficulty", "path", "kind"},
    "check": {"check", "points"},
    "experiment": {"tags"},
    "answer": {"answer"},
    "plain": {"tags"},
}
TAGS = (["experiment"], ["experiment", "figure"], ["support"])
HEADER_FIELDS = ("builds", "gpu")
WORDS_PER_MINUTE = 200
LINK = re.compile(r"\[\]\(#([\w-]+)\)")  # `[](#tiling)`: the builder fills in "section 3", or "exercise 4"


class LessonError(Exception):
    """The rules that a lesson breaks, one line each in `lines`."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass
class Header:
    builds: str
    gpu: str


@dataclass
class Cell:
    kind: str  # "code" or "markdown"
    role: str  # "exercise", "check", "experiment", "answer" or "plain"
    source: str
    line: int  # of the cell's mark in the file, from 1
    name: str = ""  # of the exercise that it is or judges, or of the answer
    points: float = 0
    minutes: int = 0
    difficulty: int = 0
    path: str = "core"  # or "more": whether an exercise is on the lesson's core path
    questions: bool = False  # an exercise of short answers, which needs no hint
    support: bool = False  # a plain cell that only checks use, shown folded
    figure: bool = False  # an experiment that draws, shown folded
    id: str = ""  # the notebook cell's id, and for exercises and checks its grade_id
    number: str = ""  # `3` of the third exercise, `3b` of its second check

    @property
    def label(self) -> str:
        if self.name:
            return f'cell {self.role} "{self.name}"'
        return f"{'support' if self.support else 'figure' if self.figure else self.role} cell"


@dataclass
class Section:
    """A part of the lesson that a `## ` heading begins; the part above the first heading has no title."""

    title: str
    label: str  # the anchor that links name: `{#label}` behind the title, or `section-3`
    line: int = 0
    words: int = 0
    exercises: list[Cell] = field(default_factory=list)

    @property
    def more(self) -> bool:
        """Whether it is off the core path: it has exercises, and all of them are `more`."""
        return bool(self.exercises) and all(cell.path == "more" for cell in self.exercises)


@dataclass
class Lesson:
    path: Path
    entry: Entry
    header: Header
    text: str
    cells: list[Cell] = field(default_factory=list)

    @property
    def exercises(self) -> list[Cell]:
        return [c for c in self.cells if c.role == "exercise"]

    def checks_of(self, name: str) -> list[Cell]:
        return [c for c in self.cells if c.role == "check" and c.name == name]

    @property
    def sections(self) -> list[Section]:
        """The sections in order; the first is what stands above the first heading, which may be nothing."""
        found = [Section("", "")]
        for cell in self.cells:
            if cell.role == "exercise":
                found[-1].exercises.append(cell)
            elif cell.kind == "markdown" and cell.role != "answer":
                begins = dict(headings(cell.source, 2))
                for index, line in enumerate(cell.source.split("\n")):
                    if index in begins:
                        title, label = split_label(begins[index])
                        found.append(Section(title, label or f"section-{len(found)}", cell.line + 1 + index))
                    found[-1].words += len(line.split())
        return found

    @property
    def minutes(self) -> tuple[int, int]:
        """(core, whole): the exercises' minutes and reading, in steps of five minutes, rounded up."""

        def spend(sections: list[Section], paths: tuple[str, ...]) -> int:
            reading = sum(section.words for section in sections) / WORDS_PER_MINUTE
            working = sum(c.minutes for section in sections for c in section.exercises if c.path in paths)
            return 5 * math.ceil((reading + working) / 5)

        core = [section for section in self.sections if not section.more]
        return spend(core, ("core",)), spend(self.sections, ("core", "more"))


def read_text(path: Path) -> str:
    """The file's text with `\\n` line ends and no byte-order mark, whatever editor wrote it."""
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def shown_path(path: Path) -> str:
    """`solutions/<stage>/<lesson>.py`: how errors name the file, wherever the project lies."""
    return "/".join(path.parts[-3:])


def read_lesson(path: Path) -> Lesson:
    """Read one source file; its rules are judged by `rules.judge`.

    Raises LessonError with one line for every mistake that keeps it from being read.
    """
    where = shown_path(path)
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise LessonError([f"{where}:1: header: the file is not UTF-8 ({error}): save it as UTF-8"]) from error
    header, entry = read_header(path, text)
    cells, problems = _read_cells(text)
    if problems:
        raise LessonError([f"{where}:{line}: {message}" for line, message in sorted(set(problems))])
    _derive_ids(cells)
    _number_cells(cells)
    return Lesson(path, entry, header, text, cells)


# --- the header -----------------------------------------------------------------------------------------------


def read_header(path: Path, text: str | None = None) -> tuple[Header, Entry]:
    """The header and the catalog's entry of a lesson, without reading its cells."""
    where = shown_path(path)

    def refuse(message: str, line: int = 1) -> LessonError:
        return LessonError([f"{where}:{line}: header: {message}"])

    entry = BY_KEY.get(f"{path.parent.name}/{path.stem}")
    if entry is None:
        raise refuse("no such lesson in autograder/catalog.py: its folder and name must be those of the catalog")
    lines = (read_text(path) if text is None else text).split("\n")
    if lines[0].strip() != "# ---":
        raise refuse("the file does not begin with a header between two `# ---` lines: see CONTRIBUTING.md")
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "# ---"), None)
    if end is None:
        raise refuse("the header has no closing `# ---` line")
    try:
        data = yaml.safe_load("\n".join(re.sub(r"^# ?", "", line) for line in lines[1:end]))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise refuse(f"not valid YAML: {getattr(error, 'problem', error)}", mark.line + 2 if mark else 1) from error
    given = (data or {}).get("jupyter", {}).get("llm40") if isinstance(data, dict) else None
    if not isinstance(given, dict):
        raise refuse("no `llm40:` section under `jupyter:`: see CONTRIBUTING.md")

    at = next((i for i, line in enumerate(lines[:end], 1) if re.match(r"#\s+llm40:", line)), 1)
    problems = []
    for name in HEADER_FIELDS:
        if name not in given:
            problems.append(f"the field `{name}` is missing")
        elif not isinstance(given[name], str) or not given[name].strip():
            problems.append(f"`{name}` must be a text")
    problems += [f"unknown field `{name}`: one of {', '.join(HEADER_FIELDS)}" for name in given.keys() - HEADER_FIELDS]
    if problems:
        raise LessonError([f"{where}:{at}: header: {problem}" for problem in problems])
    return Header(**{name: text.strip() for name, text in given.items()}), entry


def find_prerequisites(entry: Entry) -> list[Entry]:
    return [BY_NUMBER[number] for number in entry.requires]


# --- the cells ------------------------------------------------------------------------------------------------


def read_percent_cells(text: str) -> list[tuple[str, dict, str, int]]:
    """(kind, marks, source, line) of each cell of a percent notebook; the line is where its `# %%` stands.

    Raises ValueError where Jupytext and the file's `# %%` lines do not agree.
    """
    import jupytext

    cells = jupytext.reads(text, fmt="py:percent").cells
    lines = [i for i, line in enumerate(text.split("\n"), 1) if re.match(r"# ?%%", line)]
    if len(lines) + 1 == len(cells):  # text before the first mark is a cell too
        lines.insert(0, 1)
    if len(lines) != len(cells):
        raise ValueError("a line inside a string begins with `# %%`: indent it")
    marks = [{k: v for k, v in c.metadata.items() if not k.startswith("lines_to_")} for c in cells]
    return [(c.cell_type, m, c.source, line) for c, m, line in zip(cells, marks, lines, strict=True)]


def _read_cells(text: str) -> tuple[list[Cell], list[tuple[int, str]]]:
    try:
        raw = read_percent_cells(text)
    except ValueError as error:
        return [], [(1, f"file: {error}")]
    cells, problems = [], []
    for kind, marks, source, line in raw:
        role = next((r for r in ("exercise", "check", "answer") if r in marks), None)
        tags = marks.get("tags", [])
        role = role or ("experiment" if "experiment" in str(tags) else "plain")
        cell = Cell(kind, role, source, line, name=str(marks.get(role, "")))
        cell.support, cell.figure = tags == ["support"], tags == ["experiment", "figure"]
        unknown = marks.keys() - MARKS[role]
        if unknown:
            names = ", ".join(f"`{mark}`" for mark in sorted(unknown))
            problems.append(
                (
                    line,
                    f"{cell.label}: does not know {names}: {_tell_known_marks(role)}",
                )
            )
        if tags and tags not in TAGS:
            problems.append(
                (line, f"{cell.label}: `tags` is {tags!r}, but must be one of {', '.join(map(json.dumps, TAGS))}")
            )
        for name, values in (("path", ("core", "more")), ("kind", ("questions",))):
            if name in marks and name in MARKS[role] and marks[name] not in values:
                said = " or ".join(f'"{value}"' for value in values)
                problems.append((line, f"{cell.label}: `{name}` is {marks[name]!r}, but must be {said}"))
        if role == "exercise":
            cell.path, cell.questions = marks.get("path", "core"), "kind" in marks
        for name in ("points", "minutes", "difficulty"):
            if name in MARKS[role]:
                value = marks.get(name)
                if name not in marks:
                    problems.append((line, f"{cell.label}: `{name}` is missing"))
                elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                    problems.append((line, f"{cell.label}: `{name}` is {value!r}, but must be a positive number"))
                elif name == "difficulty" and value not in (1, 2, 3):
                    problems.append((line, f"{cell.label}: `difficulty` is {value!r}, but must be 1, 2 or 3"))
                else:
                    setattr(cell, name, value)
        if role == "answer" and kind != "markdown":
            problems.append((line, f"{cell.label}: a model answer is prose: write `# %% [markdown] answer=…`"))
        if (role in ("exercise", "check", "experiment") or cell.support) and kind != "code":
            problems.append((line, f"{cell.label}: is a markdown cell, but must be code"))
        pattern, says = (
            (r"[a-z0-9][a-z0-9_-]*", "lower-case letters, digits, `_` and `-`")
            if role == "answer"
            else (r"[a-z0-9][a-z0-9_]*", "lower-case letters, digits and `_`")
        )
        if role in ("exercise", "check", "answer") and not (re.fullmatch(pattern, cell.name) and len(cell.name) <= 40):
            problems.append((line, f"{cell.label}: a name has only {says}, at most 40 of them"))
        cells.append(cell)
    return cells, problems


def _tell_known_marks(role: str) -> str:
    if role == "plain":
        return 'a cell is marked exercise="…", check="…", answer="…" or tags=[…], or not at all'
    return f"this cell takes only {', '.join(f'`{mark}`' for mark in sorted(MARKS[role]))}"


def _derive_ids(cells: list[Cell]) -> None:
    """Ids that depend on nothing but the cells: names where there are names, else the text, else its occurrence."""
    seen: dict[str, int] = {}
    for cell in cells:
        if cell.role == "exercise":
            cell.id = cell.name
            continue
        if cell.role == "answer":
            cell.id = f"answer-{cell.name}"
            continue
        if cell.role == "check":
            stem = f"{cell.name}-check"
        else:
            kind = "support" if cell.support else "code" if cell.role == "plain" else "experiment"
            kind = "text" if cell.kind == "markdown" else kind
            stem = f"{kind}-{hashlib.sha256(cell.source.encode()).hexdigest()[:10]}"
        seen[stem] = seen.get(stem, 0) + 1
        cell.id = f"{stem}-{seen[stem]}" if cell.role == "check" or seen[stem] > 1 else stem


def _number_cells(cells: list[Cell]) -> None:
    """Number the exercises from 1; their checks are 3a, 3b, … or, where there is only one, 3."""
    numbers = {}
    for cell in cells:
        if cell.role == "exercise":
            cell.number = numbers[cell.name] = str(len(numbers) + 1)
    for name, number in numbers.items():
        checks = [cell for cell in cells if cell.role == "check" and cell.name == name]
        for index, check in enumerate(checks):
            check.number = number + (chr(ord("a") + index) if len(checks) > 1 else "")


# --- prose ----------------------------------------------------------------------------------------------------


def headings(source: str, level: int) -> list[tuple[int, str]]:
    """(index of the line, text) of each heading of this level in a Markdown cell, fenced code left out."""
    found, fenced = [], False
    for index, line in enumerate(source.split("\n")):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.startswith("#" * level + " "):
            found.append((index, line[level:].strip()))
    return found


def split_label(heading: str) -> tuple[str, str]:
    """`Tiling {#tiling}` → ("Tiling", "tiling"); the label is empty where there is none."""
    found = re.fullmatch(r"(.*?)\s*\{#([\w-]+)\}", heading)
    return (found.group(1), found.group(2)) if found else (heading, "")


# --- regions --------------------------------------------------------------------------------------------------


def regions(source: str, begin: str, end: str) -> list[tuple[int, int]]:
    """(index of the begin line, index of the end line) of every region, lines counted from 0.

    Raises ValueError with a sentence where the markers do not pair.
    """
    found, start = [], None
    plain_begin, plain_end = begin.strip("# "), end.strip("# ")
    for i, line in enumerate(source.split("\n")):
        if plain_begin in line or plain_end in line:
            if line.strip() not in (begin, end):
                raise ValueError(f"`{line.strip()}` is no marker: a marker stands alone on its line, as `{begin}`")
            if line.strip() == begin:
                if start is not None:
                    raise ValueError(f"`{begin}` inside another: close the first with `{end}`")
                start = i
            else:
                if start is None:
                    raise ValueError(f"`{end}` without `{begin}` before it")
                found.append((start, i))
                start = None
    if start is not None:
        raise ValueError(f"`{begin}` is never closed with `{end}`")
    return found


def stub(source: str) -> str:
    """An exercise as the learner gets it: each solution region replaced by STUB, at the indent of its marker."""
    lines = source.split("\n")
    for begin, end in reversed(regions(source, BEGIN_SOLUTION, END_SOLUTION)):
        indent = re.match(r"\s*", lines[begin]).group()
        lines[begin : end + 1] = [indent + STUB]
    return "\n".join(lines)


def remove_hidden(source: str) -> str:
    """A check as the learner gets it."""
    lines = source.split("\n")
    for begin, end in reversed(regions(source, BEGIN_HIDDEN, END_HIDDEN)):
        del lines[begin : end + 1]
    return "\n".join(lines)


def secrets(cell: Cell) -> list[str]:
    """The texts of a cell that a learner must not see: each of its hidden regions, dedented."""
    if cell.role == "answer":
        return [cell.source]
    markers = {"exercise": (BEGIN_SOLUTION, END_SOLUTION), "check": (BEGIN_HIDDEN, END_HIDDEN)}.get(cell.role)
    if markers is None:
        return []
    lines = cell.source.split("\n")
    return [textwrap.dedent("\n".join(lines[a + 1 : b])) for a, b in regions(cell.source, *markers)]


def python_of(source: str) -> str:
    """The cell with IPython's magics and shell lines made `pass`, so that it parses as Python."""
    if source.lstrip().startswith("%%"):
        return ""
    return re.sub(r"^([^\S\n]*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


class _AsGenerators(ast.NodeTransformer):
    """Makes comprehensions generators: from Python 3.12 on the names of the former stand in the table around them."""

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(node.elt, node.generators)

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(ast.Tuple([node.key, node.value], ast.Load()), node.generators)


def cell_names(source: str) -> tuple[set[str], set[str], set[str]]:
    """(bound, read, read at once): the notebook names a cell binds, reads anywhere, and reads when it is run."""
    tree = _AsGenerators().visit(ast.parse(python_of(source)))
    table = symtable.symtable(ast.unparse(tree), "<cell>", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    at_once = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    read = set(at_once)
    queue = [(child, _runs_at_once(child)) for child in table.get_children()]
    while queue:
        child, now = queue.pop()
        names = {s.get_name() for s in child.get_symbols() if s.is_global() and s.is_referenced()}
        bound |= {s.get_name() for s in child.get_symbols() if s.is_declared_global() and s.is_assigned()}
        read |= names
        if now:
            at_once |= names
        queue.extend((c, now and _runs_at_once(c)) for c in child.get_children())
    return bound, read, at_once


def _runs_at_once(table: symtable.SymbolTable) -> bool:
    """Class bodies and comprehensions run with the cell; functions and lambdas when they are called."""
    return table.get_type() == "class" or table.get_name() == "genexpr"
