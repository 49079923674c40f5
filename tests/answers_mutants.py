"""Mutants of reference answers: one small change each, between the solution markers.

An operator or a comparison is exchanged for another, a number is changed, a boolean turned, a statement dropped.
"""

import ast
import math
from collections.abc import Iterator

from answers_harness import Answer

from autograder import lesson as lessons
from autograder.lesson import Cell, Lesson

PER_EXERCISE = 40

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def mutants(lesson: Lesson, per_exercise: int = PER_EXERCISE) -> list[Answer]:
    """Wrong answers made from the references, evenly chosen where an exercise has more than `per_exercise`."""
    answers = []
    for exercise in lesson.exercises:
        found = list(dict.fromkeys(of_exercise(exercise)))
        step = max(1.0, len(found) / per_exercise)
        chosen = [found[int(i * step)] for i in range(min(len(found), per_exercise))]
        for number, (label, source) in enumerate(chosen, 1):
            answers.append(Answer(lesson.entry.key, exercise.name, "wrong", f"{number}. {label}", source))
    return answers


def of_exercise(exercise: Cell) -> Iterator[tuple[str, str]]:
    """(what was changed, the cell's source) of every mutant of one exercise's reference."""
    regions = lessons.regions(exercise.source, lessons.BEGIN_SOLUTION, lessons.END_SOLUTION)
    source = lessons.python_of(exercise.source)
    for place, node in enumerate(ast.walk(ast.parse(source))):
        line = getattr(node, "lineno", 0)
        if not any(a < line - 1 < b for a, b in regions):
            continue
        for change in (exchange, drop):
            tree = ast.parse(source)
            label = change(tree, list(ast.walk(tree))[place])
            if label:
                yield f"line {line}: {label}", ast.unparse(ast.fix_missing_locations(tree))


def exchange(_: ast.Module, node: ast.AST) -> str:
    """Put another operator, comparison, number or boolean into the node; says which, or nothing where it has none."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OPERATORS:
        before = _text(node)
        was, node.op = node.op, OPERATORS[type(node.op)]()
        return f"{type(was).__name__} → {type(node.op).__name__} in {before}"
    if isinstance(node, ast.Compare):
        before = _text(node)
        node.ops[0] = OPERATORS[type(node.ops[0])]()
        return f"{before} → {_text(node)}"
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)) and math.isfinite(node.value):
        before = _text(node)
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
        return f"{before} → {_text(node)}"
    return ""


def drop(tree: ast.Module, node: ast.AST) -> str:
    """Put `pass` in the place of a statement that is no docstring; says which, or nothing where it cannot go."""
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not isinstance(node.value, ast.Constant):
        for parent in ast.walk(tree):
            for block in (getattr(parent, name, None) for name in ("body", "orelse", "finalbody")):
                if isinstance(block, list) and node in block:
                    block[block.index(node)] = ast.Pass()
                    return f"without {_text(node)}"
    return ""


def _text(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0][:80]
