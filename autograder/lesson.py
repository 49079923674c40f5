"""One lesson: its source file, the cells in it, and the rules they keep.

`read_lesson(path)` returns a `Lesson` or raises `LessonError`, which carries every broken rule as one line:

    solutions/stage2_transformer/09_x.py:123: cell check "sdpa": reads `loss`, which only the experiment …

The format is described in CONTRIBUTING.md.
"""

import ast
import builtins
import hashlib
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

# A cell's marks, by role; every other key is a slip of the pen.
MARKS = {
    "exercise": {"exercise", "minutes", "difficulty"},
    "check": {"check", "points"},
    "experiment": {"tags"},
    "answer": {"answer"},
    "plain": set(),
}
HEADER_FIELDS = {
    "title": str,
    "title_zh": str,
    "builds": str,
    "minutes": int,
    "requires": list,
    "gpu": str,
    "papers": list,
}


class LessonError(Exception):
    """The rules that a lesson breaks, one line each in `lines`."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass
class Header:
    title: str
    title_zh: str
    builds: str
    minutes: int
    requires: tuple[int, ...]
    gpu: str
    papers: tuple[str, ...]


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
    id: str = ""  # the notebook cell's id, and for exercises and checks its grade_id

    @property
    def label(self) -> str:
        return f'cell {self.role} "{self.name}"' if self.name else f"{self.role} cell"


@dataclass
class Lesson:
    path: Path
    entry: Entry
    header: Header
    cells: list[Cell] = field(default_factory=list)

    @property
    def exercises(self) -> list[Cell]:
        return [c for c in self.cells if c.role == "exercise"]

    def checks_of(self, name: str) -> list[Cell]:
        return [c for c in self.cells if c.role == "check" and c.name == name]


def read_text(path: Path) -> str:
    """The file's text with `\\n` line ends and no byte-order mark, whatever editor wrote it."""
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def shown_path(path: Path) -> str:
    """`solutions/<stage>/<lesson>.py`: how errors name the file, wherever the project lies."""
    return "/".join(path.parts[-3:])


def read_lesson(path: Path) -> Lesson:
    """Read and judge one source file.

    Raises LessonError with one line for every broken rule.
    """
    where = shown_path(path)
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise LessonError([f"{where}:1: header: the file is not UTF-8 ({error}): save it as UTF-8"]) from error
    header, entry = read_header(path, text)
    cells, problems = _read_cells(text)
    if not problems:
        _derive_ids(cells)
        problems = [p for rule in RULES for p in rule(cells)]
    if problems:
        raise LessonError([f"{where}:{line}: {message}" for line, message in sorted(set(problems))])
    return Lesson(path, entry, header, cells)


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
    for name, kind in HEADER_FIELDS.items():
        if name not in given:
            problems.append(f"the field `{name}` is missing")
        elif not isinstance(given[name], kind) or isinstance(given[name], bool) or given[name] == "":
            problems.append(f"`{name}` must be {'a text' if kind is str else f'of type {kind.__name__}'}")
    problems += [f"unknown field `{name}`: one of {', '.join(HEADER_FIELDS)}" for name in given.keys() - HEADER_FIELDS]
    if not problems:
        if given["minutes"] <= 0:
            problems.append("`minutes` must be positive")
        for name, known in (("title", entry.title), ("title_zh", entry.title_zh), ("requires", list(entry.requires))):
            if given[name] != known:
                problems.append(f"`{name}` is {given[name]!r}, but autograder/catalog.py says {known!r}")
        if not all(isinstance(paper, str) for paper in given["papers"]):
            problems.append("every entry of `papers` must be a text: quote it")
    if problems:
        raise LessonError([f"{where}:{at}: header: {problem}" for problem in problems])
    given["requires"], given["papers"] = tuple(given["requires"]), tuple(given["papers"])
    return Header(**given), entry


def prerequisites(entry: Entry) -> list[Entry]:
    return [BY_NUMBER[number] for number in entry.requires]


# --- the cells ------------------------------------------------------------------------------------------------


def percent_cells(text: str) -> list[tuple[str, dict, str, int]]:
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
        raw = percent_cells(text)
    except ValueError as error:
        return [], [(1, f"file: {error}")]
    cells, problems = [], []
    for kind, marks, source, line in raw:
        role = next((r for r in ("exercise", "check", "answer") if r in marks), None)
        role = role or ("experiment" if marks.get("tags") == ["experiment"] else "plain")
        cell = Cell(kind, role, source, line, name=str(marks.get(role, "")))
        unknown = marks.keys() - MARKS[role]
        if unknown:
            problems.append((line, f"{cell.label}: does not know {', '.join(f'`{u}`' for u in sorted(unknown))}: "
                                   f"{_known_marks(role)}"))
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
        if role in ("exercise", "check", "experiment") and kind != "code":
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


def _known_marks(role: str) -> str:
    if role == "plain":
        return 'a cell is marked exercise="…", check="…", answer="…" or tags=["experiment"], or not at all'
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
            kind = "text" if cell.kind == "markdown" else "code" if cell.role == "plain" else "experiment"
            stem = f"{kind}-{hashlib.sha256(cell.source.encode()).hexdigest()[:10]}"
        seen[stem] = seen.get(stem, 0) + 1
        cell.id = f"{stem}-{seen[stem]}" if cell.role == "check" or seen[stem] > 1 else stem


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


def without_hidden(source: str) -> str:
    """A check as the learner gets it."""
    lines = source.split("\n")
    for begin, end in reversed(regions(source, BEGIN_HIDDEN, END_HIDDEN)):
        del lines[begin : end + 1]
    return "\n".join(lines)


def secrets(cell: Cell) -> list[str]:
    """What a learner must not see of a cell: the dedented text of each of its hidden regions."""
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
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


# --- rules: each takes the cells and returns (line, message) for every breach ----------------------------------


def _parses(cells: list[Cell]) -> list[tuple[int, str]]:
    problems = []
    for cell in cells:
        if cell.kind == "code":
            try:
                ast.parse(python_of(cell.source))
            except SyntaxError as error:
                problems.append((cell.line + (error.lineno or 0), f"{cell.label}: does not parse: {error.msg}"))
    return problems


def _names_are_unique(cells: list[Cell]) -> list[tuple[int, str]]:
    problems, first = [], {}
    for cell in cells:
        if cell.role in ("exercise", "answer"):
            if cell.id in first:
                problems.append((cell.line, f"{cell.label}: the id is used twice (first in line {first[cell.id]}): "
                                            "rename one of them"))
            first.setdefault(cell.id, cell.line)
    return problems


def _exercises_are_checked(cells: list[Cell]) -> list[tuple[int, str]]:
    problems = []
    above, names = set(), {c.name for c in cells if c.role == "exercise"}
    for cell in cells:
        if cell.role == "exercise":
            above.add(cell.name)
            checks = [c for c in cells if c.role == "check" and c.name == cell.name]
            if not checks:
                problems.append((cell.line, f'{cell.label}: has no check: add a cell `# %% check="{cell.name}" '
                                            "points=…` below it"))
            elif not any(_has_hidden_tests(c) for c in checks):
                problems.append((cell.line, f"{cell.label}: none of its checks has hidden tests: put the judge between "
                                            f"`{BEGIN_HIDDEN}` and `{END_HIDDEN}`"))
        elif cell.role == "check" and cell.name not in names:
            problems.append((cell.line, f"{cell.label}: there is no exercise of this name in the lesson"))
        elif cell.role == "check" and cell.name not in above:
            problems.append((cell.line, f"{cell.label}: stands before its exercise: move it below"))
    return problems


def _has_hidden_tests(check: Cell) -> bool:
    try:
        return any(ast.parse(python_of(text)).body for text in secrets(check))
    except (ValueError, SyntaxError):  # told by another rule
        return True


def _markers_pair(cells: list[Cell]) -> list[tuple[int, str]]:
    problems = []
    for cell in cells:
        for begin, end, role in ((BEGIN_SOLUTION, END_SOLUTION, "exercise"), (BEGIN_HIDDEN, END_HIDDEN, "check")):
            try:
                found = regions(cell.source, begin, end)
            except ValueError as error:
                problems.append((cell.line, f"{cell.label}: {error}"))
                continue
            if found and cell.role != role:
                problems.append((cell.line + found[0][0] + 1, f"{cell.label}: `{begin}` belongs in {role} cells only"))
    return problems


def _stubs_raise(cells: list[Cell]) -> list[tuple[int, str]]:
    problems = []
    for cell in cells:
        if cell.role != "exercise":
            continue
        try:
            count = len(regions(cell.source, BEGIN_SOLUTION, END_SOLUTION))
            tree = ast.parse(python_of(stub(cell.source)))
        except ValueError:
            continue  # told by _markers_pair
        except SyntaxError as error:
            problems.append((cell.line, f"{cell.label}: without the solution it does not parse ({error.msg}): a marker "
                                        "stands at the indent of the lines that it replaces"))
            continue
        raises = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and ast.unparse(n) == ast.unparse(_STUB_NODE)]
        if count == 0:
            problems.append((cell.line, f"{cell.label}: the whole answer is outside the markers: put it between "
                                        f"`{BEGIN_SOLUTION}` and `{END_SOLUTION}`"))
        elif len(raises) != count:
            problems.append((cell.line, f"{cell.label}: the stub would not raise NotImplementedError: a marker stands "
                                        "inside a string"))
        elif any(isinstance(n, ast.Try) and _inside(n, raises) for n in ast.walk(tree)):
            problems.append((cell.line, f"{cell.label}: the stub would not raise NotImplementedError: a `try` around "
                                        "the markers may catch it"))
    return problems


_STUB_NODE = ast.parse(STUB).body[0]


def _inside(node: ast.Try, raises: list[ast.Raise]) -> bool:
    return bool(node.handlers) and any(r in ast.walk(part) for part in node.body for r in raises)


def _no_solution_outside_markers(cells: list[Cell]) -> list[tuple[int, str]]:
    """A line outside the markers that reads what only the solution makes is a piece of the solution left behind."""
    problems = []
    for cell in cells:
        if cell.role != "exercise":
            continue
        try:
            found = regions(cell.source, BEGIN_SOLUTION, END_SOLUTION)
            tree = ast.parse(python_of(cell.source))
        except (ValueError, SyntaxError):
            continue

        def hidden(node: ast.AST, found=found) -> bool:
            return any(a < node.lineno - 1 < b for a, b in found)

        for scope in ast.walk(tree):
            if isinstance(scope, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef)):
                makes, reads = _names_in(scope)
                for name, node in reads:
                    made = makes.get(name)
                    if made and not hidden(node) and all(map(hidden, made)):
                        line = cell.line + node.lineno
                        problems.append((line, f"{cell.label}: reads `{name}` outside the markers, but only the "
                                               "solution makes it: put this line inside them"))
    return problems


def _names_in(scope: ast.AST) -> tuple[dict[str, list[ast.AST]], list[tuple[str, ast.AST]]]:
    """What one scope binds (name → nodes) and what it reads, nested functions and classes left out."""
    makes: dict[str, list[ast.AST]] = {}
    reads: list[tuple[str, ast.AST]] = []
    arguments = getattr(scope, "args", None)
    if arguments is not None:
        for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
            if a is not None:
                makes.setdefault(a.arg, []).append(a)
    queue = list(ast.iter_child_nodes(scope))
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            makes.setdefault(node.name, []).append(node)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                makes.setdefault(node.id, []).append(node)
            else:
                reads.append((node.id, node))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                makes.setdefault((alias.asname or alias.name).split(".")[0], []).append(node)
        queue.extend(ast.iter_child_nodes(node))
    return makes, reads


def cell_names(source: str) -> tuple[set[str], set[str], set[str]]:
    """(bound, read, read at once): the notebook names a cell binds, reads anywhere, and reads when it is run."""
    table = symtable.symtable(python_of(source), "<cell>", "exec")
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
    return table.get_type() == "class" or table.get_name() in ("listcomp", "setcomp", "dictcomp", "genexpr")


def _names_come_from_graded_cells(cells: list[Cell]) -> list[tuple[int, str]]:
    """In grading, experiments are skipped and a check may fail: nothing else may read what they make."""
    try:
        names = [cell_names(c.source) if c.kind == "code" else (set(), set(), set()) for c in cells]
    except SyntaxError:
        return []  # told by _parses
    makers: dict[str, list[int]] = {}
    for i, (bound, _, _) in enumerate(names):
        for name in bound:
            makers.setdefault(name, []).append(i)

    problems = []
    for i, cell in enumerate(cells):
        if cell.role not in ("plain", "check", "exercise") or cell.kind != "code":
            continue
        bound, read, at_once = names[i]
        for name in sorted(read - bound - set(dir(builtins))):
            elsewhere = [j for j in makers.get(name, []) if j != i]
            lasting = [j for j in elsewhere if cells[j].role in ("plain", "exercise")]
            if elsewhere and not lasting:
                other = cells[elsewhere[0]]
                maker = "experiment" if other.role == "experiment" else f'check "{other.name}"'
                problems.append((cell.line, f"{cell.label}: reads `{name}`, which only the {maker} in line "
                                            f"{other.line} makes: make it here or in a plain cell"))
            elif lasting and name in at_once and min(lasting) > i:
                problems.append((cell.line, f"{cell.label}: reads `{name}`, which is made below it, in line "
                                            f"{cells[min(lasting)].line}: move it up"))
            elif (
                cell.role == "plain"
                and name in at_once
                and lasting
                and all(cells[j].role == "exercise" for j in lasting)
            ):
                problems.append((cell.line, f"{cell.label}: uses `{name}`, which is the learner's, as soon as it "
                                            'runs: mark it tags=["experiment"]'))
    return problems


RULES = (
    _parses,
    _names_are_unique,
    _exercises_are_checked,
    _markers_pair,
    _stubs_raise,
    _no_solution_outside_markers,
    _names_come_from_graded_cells,
)
