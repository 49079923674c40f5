"""What a learner wrote into a given cell: read as text, never run here.

In JupyterLab a given cell takes what is typed into it, and an experiment's imports are there for the cells below. So
grading keeps both, in cells of the learner's own, and what passes there passes here.
"""

import ast
import re
from collections.abc import Callable

from autograder.judge.sources import find_bound_names
from autograder.lesson import python_of

LONGEST = 100_000  # characters of a cell that is read
# Cell magics that run the rest of the cell as it stands.
AROUND = re.compile(r"%%(time|capture|prun|debug)\b[^\n]*(\n|$)")


def find_additions(given: str, copy: str) -> str:
    """The statements of a given cell's copy that are not in it: imports, and what changes none of its names.

    A given name that is bound to something else stays what it was: a copy may be of an earlier edition.
    """
    known, written = _read_statements(given), _read_statements(copy)
    keys = {key for _, key, _ in known}
    bound = {name for _, _, names in known for name in names}
    kept = [
        text
        for text, key, names in written
        if key not in keys and (not names or names - bound or text.startswith(("import ", "from ")))
    ]
    return "\n".join(kept)


def find_imports(source: str) -> str:
    """The imports on a cell's top level, also those in a `try` or under a condition."""
    found = []
    for part in re.split(r"^(?=%%)", source, flags=re.MULTILINE):
        found += [text for text, _, _ in _read_statements(part, _is_import)]
    return "\n".join(dict.fromkeys(found))


def _is_import(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.If, ast.Try)):
        body = [*statement.body, *statement.orelse, *getattr(statement, "finalbody", [])]
        body += [inner for handler in getattr(statement, "handlers", []) for inner in handler.body]
        return any(map(_is_import, body)) and all(map(_is_part_of_an_import, body))
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def _is_part_of_an_import(statement: ast.stmt) -> bool:
    """Whether a statement may stand around imports: `np = None`, `pass`, `raise`."""
    small = isinstance(statement, ast.Assign) and isinstance(statement.value, (ast.Constant, ast.Name))
    return small or isinstance(statement, (ast.Pass, ast.Raise)) or _is_import(statement)


def _read_statements(
    source: str, wanted: Callable[[ast.stmt], bool] = lambda statement: True
) -> list[tuple[str, str, set[str]]]:
    """(text, what makes two of them the same, names that it binds) of each statement on the cell's top level.

    Empty where the cell is no Python. Lines for IPython (`%…`, `!…`) are statements too.
    """
    source = AROUND.sub("", source.lstrip(), count=1)
    if len(source) > LONGEST:
        return []
    try:
        return _parse_statements(source, python_of(source), wanted)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _parse_statements(source: str, python: str, wanted: Callable[[ast.stmt], bool]) -> list[tuple[str, str, set[str]]]:
    tree = compile(python, "<cell>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    lines, asked = source.split("\n"), python.split("\n")
    found, end = [], 0
    for statement in tree.body:
        if statement.lineno <= end or not wanted(statement):  # `a; b` is one line
            continue
        begin = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        end = max(one.end_lineno for one in tree.body if one.lineno <= statement.end_lineno)
        text = "\n".join(lines[begin - 1 : end])
        plain = "\n".join(asked[begin - 1 : end])
        key = ast.dump(ast.parse(plain)) if plain == text and not _has_await(statement) else text.strip()
        found.append((text, key, find_bound_names(plain)))
    return found


def _has_await(statement: ast.stmt) -> bool:
    return any(isinstance(node, (ast.Await, ast.AsyncFor, ast.AsyncWith)) for node in ast.walk(statement))
