"""The rules that a lesson keeps. Each takes the lesson and returns (line, message) for every breach.

`judge(lesson)` returns one line for each, complete with file and line:

    solutions/stage2_transformer/09_x.py:123: cell check "sdpa": reads `loss`, which only the experiment …
"""

import ast
import builtins
import re
import unicodedata
from collections import Counter

from rich.cells import cell_len

from autograder.lesson import (
    BEGIN_HIDDEN,
    BEGIN_SOLUTION,
    END_HIDDEN,
    END_SOLUTION,
    LINK,
    STUB,
    Cell,
    Lesson,
    cell_names,
    headings,
    python_of,
    regions,
    remove_hidden,
    secrets,
    shown_path,
    stub,
)

Breach = tuple[int, str]
COLUMNS = 100
CORE_MINUTES = 180
SHOWN = 5  # breaches of one rule that are told one by one


def judge(lesson: Lesson) -> list[str]:
    """A line for each rule that the lesson breaks."""
    lines = []
    for name, rule in RULES.items():
        problems = sorted(set(rule(lesson)))
        left = len(problems) - SHOWN
        if left > 0:
            problems[SHOWN:] = [(problems[SHOWN][0], f"rule `{name}`: broken {left} times more from here on")]
        lines += [f"{shown_path(lesson.path)}:{line}: {message}" for line, message in problems]
    return lines


def _require_python(lesson: Lesson) -> list[Breach]:
    problems = []
    for cell in lesson.cells:
        if cell.kind == "code":
            try:
                ast.parse(python_of(cell.source))
            except SyntaxError as error:
                problems.append((cell.line + (error.lineno or 0), f"{cell.label}: does not parse: {error.msg}"))
    return problems


def _require_unique_names(lesson: Lesson) -> list[Breach]:
    problems, first = [], {}
    for cell in lesson.cells:
        if cell.role in ("exercise", "answer"):
            if cell.id in first:
                problems.append(
                    (
                        cell.line,
                        f"{cell.label}: the id is used twice (first in line {first[cell.id]}): rename one of them",
                    )
                )
            first.setdefault(cell.id, cell.line)
    return problems


def _require_checks(lesson: Lesson) -> list[Breach]:
    problems = []
    above, names = set(), {c.name for c in lesson.exercises}
    for cell in lesson.cells:
        if cell.role == "exercise":
            above.add(cell.name)
            checks = lesson.checks_of(cell.name)
            if not checks:
                problems.append(
                    (cell.line, f'{cell.label}: has no check: add a cell `# %% check="{cell.name}" points=…` below it')
                )
            elif not any(_has_hidden_tests(c) for c in checks):
                problems.append(
                    (
                        cell.line,
                        f"{cell.label}: none of its checks has hidden tests: put the judge between "
                        f"`{BEGIN_HIDDEN}` and `{END_HIDDEN}`",
                    )
                )
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


def _require_compiled_kernels(lesson: Lesson) -> list[Breach]:
    """What only Triton's interpreter takes gets no points, in no check of its exercise."""
    kernels = {c.name for c in lesson.exercises if "@triton.jit" in c.source}
    return [
        (cell.line, f"{cell.label}: launches a learner's kernel outside `checks.compiled()`: no GPU might compile it")
        for cell in lesson.cells
        if cell.role == "check" and cell.name in kernels and "checks.compiled(" not in cell.source
    ]


def _require_paired_markers(lesson: Lesson) -> list[Breach]:
    problems = []
    for cell in lesson.cells:
        for begin, end, role in ((BEGIN_SOLUTION, END_SOLUTION, "exercise"), (BEGIN_HIDDEN, END_HIDDEN, "check")):
            try:
                found = regions(cell.source, begin, end)
            except ValueError as error:
                problems.append((cell.line, f"{cell.label}: {error}"))
                continue
            if found and cell.role != role:
                problems.append((cell.line + found[0][0] + 1, f"{cell.label}: `{begin}` belongs in {role} cells only"))
    return problems


def _require_raising_stubs(lesson: Lesson) -> list[Breach]:
    problems = []
    for cell in lesson.cells:
        if cell.role != "exercise":
            continue
        try:
            count = len(regions(cell.source, BEGIN_SOLUTION, END_SOLUTION))
            tree = ast.parse(python_of(stub(cell.source)))
        except ValueError:
            continue  # told by _require_paired_markers
        except SyntaxError as error:
            problems.append(
                (
                    cell.line,
                    f"{cell.label}: without the solution it does not parse ({error.msg}): a marker "
                    "stands at the indent of the lines that it replaces",
                )
            )
            continue
        raises = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and ast.unparse(n) == ast.unparse(_STUB_NODE)]
        if count == 0:
            problems.append(
                (
                    cell.line,
                    f"{cell.label}: the whole answer is outside the markers: put it between "
                    f"`{BEGIN_SOLUTION}` and `{END_SOLUTION}`",
                )
            )
        elif len(raises) != count:
            problems.append(
                (
                    cell.line,
                    f"{cell.label}: the stub would not raise NotImplementedError: a marker stands inside a string",
                )
            )
        elif any(isinstance(n, ast.Try) and _inside(n, raises) for n in ast.walk(tree)):
            problems.append(
                (
                    cell.line,
                    f"{cell.label}: the stub would not raise NotImplementedError: a `try` around "
                    "the markers may catch it",
                )
            )
    return problems


_STUB_NODE = ast.parse(STUB).body[0]


def _inside(node: ast.Try, raises: list[ast.Raise]) -> bool:
    return bool(node.handlers) and any(r in ast.walk(part) for part in node.body for r in raises)


def _forbid_solution_outside_markers(lesson: Lesson) -> list[Breach]:
    """A line outside the markers that reads what only the solution makes is a piece of the solution left behind."""
    problems = []
    for cell in lesson.cells:
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
                makes, reads = _collect_names(scope)
                for name, node in reads:
                    made = makes.get(name)
                    if made and not hidden(node) and all(map(hidden, made)):
                        line = cell.line + node.lineno
                        problems.append(
                            (
                                line,
                                f"{cell.label}: reads `{name}` outside the markers, but only the "
                                "solution makes it: put this line inside them",
                            )
                        )
    return problems


def _collect_names(scope: ast.AST) -> tuple[dict[str, list[ast.AST]], list[tuple[str, ast.AST]]]:
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


def _restrict_names(lesson: Lesson) -> list[Breach]:
    """In grading, experiments are skipped and a check may fail: nothing else may read what they make.

    And what a support cell makes is for checks: a learner need not open one to follow the lesson.
    """
    cells = lesson.cells
    try:
        names = [cell_names(c.source) if c.kind == "code" else (set(), set(), set()) for c in cells]
    except SyntaxError:
        return []  # told by _require_python
    makers: dict[str, list[int]] = {}
    for i, (bound, _, _) in enumerate(names):
        for name in bound:
            makers.setdefault(name, []).append(i)

    problems = []
    for i, cell in enumerate(cells):
        if cell.kind != "code":
            continue
        bound, read, at_once = names[i]
        for name in sorted(read - bound - set(dir(builtins))):
            elsewhere = [j for j in makers.get(name, []) if j != i]
            lasting = [j for j in elsewhere if cells[j].role in ("plain", "exercise")]
            supports = [j for j in elsewhere if cells[j].support]
            if supports and supports == elsewhere and not (cell.role == "check" or cell.support):
                problems.append(
                    (
                        cell.line,
                        f"{cell.label}: reads `{name}`, which only the support cell in line "
                        f"{cells[supports[0]].line} makes: only checks may; make it in a plain "
                        "cell",
                    )
                )
            elif cell.role == "experiment":
                continue
            elif elsewhere and not lasting:
                other = cells[elsewhere[0]]
                maker = "experiment" if other.role == "experiment" else f'check "{other.name}"'
                problems.append(
                    (
                        cell.line,
                        f"{cell.label}: reads `{name}`, which only the {maker} in line "
                        f"{other.line} makes: make it here or in a plain cell",
                    )
                )
            elif lasting and name in at_once and min(lasting) > i:
                problems.append(
                    (
                        cell.line,
                        f"{cell.label}: reads `{name}`, which is made below it, in line "
                        f"{cells[min(lasting)].line}: move it up",
                    )
                )
            elif (
                cell.role == "plain"
                and name in at_once
                and lasting
                and all(cells[j].role == "exercise" for j in lasting)
            ):
                problems.append(
                    (
                        cell.line,
                        f"{cell.label}: uses `{name}`, which is the learner's, as soon as it "
                        'runs: mark it tags=["experiment"]',
                    )
                )
    return problems


def _forbid_rebinding(lesson: Lesson) -> list[Breach]:
    """What follows a check reads what the cells above made, in a learner's notebook too, where checks run in between.

    A name that is imported is the same whoever imports it. A cell that makes a name itself is taken to make it before
    it reads it.
    """
    cells = [c for c in lesson.cells if c.kind == "code"]
    try:
        names = [cell_names(c.source) for c in cells]
    except SyntaxError:
        return []  # told by _require_python
    imported = [_imported_names(c.source) for c in cells]
    problems = []
    for i, check in enumerate(cells):
        if check.role != "check":
            continue
        for name in sorted(names[i][0] - imported[i]):
            makers = [j for j, (bound, _, _) in enumerate(names) if name in bound and cells[j].role != "check"]
            above = [j for j in makers if j < i]
            if not above:
                continue
            readers = [
                k
                for k, (bound, read, at_once) in enumerate(names)
                if name in read - bound
                and (
                    (k > i and max(j for j in makers if j < k) < i)
                    or (k < i and cells[k].role != "check" and name not in at_once)
                )
            ]
            if readers:
                made, reader = cells[above[-1]], cells[readers[-1]]
                problems.append(
                    (
                        check.line,
                        f"{check.label}: binds `{name}` anew, which the {made.role} cell in line {made.line} makes and "
                        f"the {reader.role} cell in line {reader.line} reads: give it another name here",
                    )
                )
    return problems


def _imported_names(source: str) -> set[str]:
    tree = ast.parse(python_of(source))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}


def _forbid_shown_values(lesson: Lesson) -> list[Breach]:
    """nbgrader takes a value that a check shows for its score. Of most calls only a run tells whether they return
    something; `make run` looks."""
    problems = set()
    for cell in lesson.cells:
        if cell.role != "check":
            continue
        try:
            texts = [python_of(cell.source), python_of(remove_hidden(cell.source))]
            bodies = [ast.parse(text).body for text in texts if not text.rstrip().endswith(";")]
        except (ValueError, SyntaxError):
            continue  # told by other rules
        for last in [body[-1] for body in bodies if body]:
            if isinstance(last, ast.Expr) and _is_value(last.value):
                problems.add(
                    (
                        cell.line,
                        f"{cell.label}: ends with `{ast.unparse(last)[:60]}`, whose value is shown: nbgrader takes it "
                        "for a score; assert it, or delete it",
                    )
                )
    return sorted(problems)


def _is_value(node: ast.expr) -> bool:
    """Whether an expression is certain to have another value than None."""
    if isinstance(node, ast.Constant):
        return node.value is not None
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        return name in (RETURNING if isinstance(function, ast.Attribute) else RETURNING | RETURNING_BUILTINS)
    if isinstance(node, ast.IfExp):
        return _is_value(node.body) and _is_value(node.orelse)
    if isinstance(node, (ast.BoolOp, ast.NamedExpr)):
        return _is_value(node.values[-1] if isinstance(node, ast.BoolOp) else node.value)
    return not isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom))


RETURNING = {"all", "allclose", "any", "equal", "isclose", "item", "max", "mean", "min", "sum", "tolist"}
RETURNING_BUILTINS = {"abs", "bool", "float", "int", "isinstance", "len", "list", "repr", "round", "sorted", "str"}


def _require_titles(lesson: Lesson) -> list[Breach]:
    """Of a folded cell JupyterLab shows the first line, and nothing else."""
    problems = []
    for cell in lesson.cells:
        begin = "# Support: " if cell.support else "# Figure: " if cell.figure else ""
        first = cell.source.split("\n")[0]
        if not first.startswith(begin) or first.strip() == begin.strip() != "":
            problems.append((cell.line, f"{cell.label}: is shown folded: its first line must be its title, `{begin}…`"))
    return problems


def _require_hints(lesson: Lesson) -> list[Breach]:
    """A hint is a Markdown cell that begins with `<details>`, right below its exercise or the exercise's checks."""
    problems = []
    below: set[int] = set()  # indices of the cells that stand where a hint belongs
    for i, cell in enumerate(lesson.cells):
        if cell.role != "exercise":
            continue
        last = i
        for j in range(i + 1, len(lesson.cells)):
            other = lesson.cells[j]
            if other.role == "check" and other.name == cell.name:
                last = j
            elif other.kind == "code" and not other.support:
                break
        places = {j for j in (i + 1, last + 1) if j < len(lesson.cells)}
        below |= places
        if not cell.questions and not any(_is_hint(lesson.cells[j]) for j in places):
            problems.append(
                (
                    cell.line,
                    f"{cell.label}: has no hint: put a Markdown cell that begins with "
                    "`<details><summary>Hint: …</summary>` right below it",
                )
            )
    for i, cell in enumerate(lesson.cells):
        if cell.kind == "markdown" and "<summary>Hint" in cell.source and not (i in below and _is_hint(cell)):
            problems.append(
                (cell.line, f"{cell.label}: holds a hint: move it into a cell of its own, right below its exercise")
            )
    return problems


def _is_hint(cell: Cell) -> bool:
    return cell.kind == "markdown" and cell.source.lstrip().startswith("<details>")


def _limit_questions(lesson: Lesson) -> list[Breach]:
    asked = [cell for cell in lesson.exercises if cell.questions]
    return [
        (
            cell.line,
            f'{cell.label}: is the second one of kind="questions" (the first: "{asked[0].name}"): make '
            "one exercise of them",
        )
        for cell in asked[1:]
    ]


def _forbid_numbers(lesson: Lesson) -> list[Breach]:
    problems = []
    for cell in lesson.cells:
        if cell.kind == "markdown":
            found = [(2, r"\d+\s*[.·:]"), (3, r"Exercise\s+\d+")]
            for level, number in found:
                problems += [
                    (
                        cell.line + 1 + index,
                        f"{cell.label}: `{'#' * level} {text}` has a number: leave numbers out, the builder counts",
                    )
                    for index, text in headings(cell.source, level)
                    if re.match(number, text)
                ]
    return problems


def _require_link_targets(lesson: Lesson) -> list[Breach]:
    labels = Counter(section.label for section in lesson.sections)
    known = labels.keys() | {cell.name for cell in lesson.exercises}
    problems = [
        (section.line, f"section heading: the label `{section.label}` is used twice")
        for section in lesson.sections
        if labels[section.label] > 1
    ]
    for cell in lesson.cells:
        if cell.kind == "markdown":
            problems += [
                (
                    cell.line,
                    f"{cell.label}: `[](#{target})` names no exercise, and no section has the label `{{#{target}}}`",
                )
                for target in LINK.findall(cell.source)
                if target not in known
            ]
    return problems


def _limit_core_time(lesson: Lesson) -> list[Breach]:
    core, whole = lesson.minutes
    if core <= CORE_MINUTES:
        return []
    exercises = sum(cell.minutes for cell in lesson.exercises if cell.path == "core")
    return [
        (
            1,
            f"time: the core path takes {core} min ({exercises} in exercises, the rest reading; the whole "
            f'lesson {whole}), at most {CORE_MINUTES} are promised: mark exercises path="more"',
        )
    ]


def _limit_width(lesson: Lesson) -> list[Breach]:
    """Long are lines of more than COLUMNS; a link's address, a table's row and a formula of one line may be."""
    problems = []
    for number, line in enumerate(lesson.text.split("\n"), 1):
        shown = re.sub(r"\]\([^)\s]*\)|https?://\S+", "", line)
        if cell_len(shown) > COLUMNS and not re.match(r"# *(\||\$\$.*\$\$\W*$)", line):
            problems.append((number, f"text: the line has {cell_len(line)} columns, at most {COLUMNS} fit the page"))
    return problems


def _forbid_control_characters(lesson: Lesson) -> list[Breach]:
    """A control character is mostly an escape that went wrong: `\\b` of `\\bigl`, say."""
    return [
        (
            number,
            f"text: holds the control character {character!r}: was it meant as `\\{ESCAPES[character]}`?"
            if character in ESCAPES
            else f"text: holds the control character {character!r}: delete it",
        )
        for number, line in enumerate(lesson.text.split("\n"), 1)
        for character in line
        if unicodedata.category(character) == "Cc"
    ]


ESCAPES = {"\a": "a", "\b": "b", "\t": "t", "\v": "v", "\f": "f"}

RULES = {
    "parses": _require_python,
    "names": _require_unique_names,
    "checked": _require_checks,
    "kernels": _require_compiled_kernels,
    "markers": _require_paired_markers,
    "stubs": _require_raising_stubs,
    "solutions": _forbid_solution_outside_markers,
    "sources": _restrict_names,
    "rebinding": _forbid_rebinding,
    "values": _forbid_shown_values,
    "titles": _require_titles,
    "hints": _require_hints,
    "questions": _limit_questions,
    "numbers": _forbid_numbers,
    "links": _require_link_targets,
    "time": _limit_core_time,
    "width": _limit_width,
    "characters": _forbid_control_characters,
}
