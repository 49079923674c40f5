"""Reads the text of cells without running it."""

import ast
import re


def find_bound_names(source: str) -> set[str]:
    """The names that a cell's top level binds."""
    try:
        waiting: list = list(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a learner's text, however strange
        return set()
    names = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            waiting.extend(ast.iter_child_nodes(node))
    return names


COMPARING = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)
COMPUTING = ("__neg__", "__pos__", "__abs__", *(f"__{side}{name}__" for side in ("", "r", "i") for name in ARITHMETIC))
NUMBER = re.compile(r"(?<![\w.\-])[-+\u2212]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
CLAUSE = re.compile(r"[;:()]|\. |, yours")


def hide_expected(text: str) -> str:
    """Removes a message's numbers, which would tell what the check expects. Numbers that the learner's own code gave
    ("yours is 0.83") stay."""

    def keep_own(match: re.Match) -> str:
        before = CLAUSE.split(text[: match.start()])[-1]
        own = "yours" in before or text[: match.start()].rstrip().endswith(("yours is", "yours are"))
        return match.group() if own else "…"

    return NUMBER.sub(keep_own, text)


# --- uses that a measurement in the learner's process could miss, found in the learner's text ------------------------

LIBRARIES = {"torch", "F", "nn", "aten", "ops"}  # a chain of attributes that holds one of these is PyTorch's
OTHER_NAMES = {  # PyTorch's other names for the same function
    "scaled_dot_product_attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "cross_entropy": ("cross_entropy", "nll_loss"),
}
UNCOUNTED = {"numpy", "np", "ctypes", "multiprocessing", "subprocess", "fork", "asarray", "__array_interface__"}


def gather_text(exercise: str, others: list[str]) -> ast.Module:
    """An exercise's cell, and the statements of the learner's other cells that it uses, directly or not."""
    found, known = list(_parse(exercise)), {}
    for node in (node for other in others for node in _parse(other)):
        for name in find_bound_names(ast.unparse(node)):
            known[name] = node
    waiting = list(found)
    while waiting:
        for node in ast.walk(waiting.pop()):
            used = known.pop(node.id, None) if isinstance(node, ast.Name) else None
            if used is not None and used not in found:
                found.append(used)
                waiting.append(used)
    return ast.Module(found, [])


def _parse(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def find_forbidden_name(written: ast.Module, names: tuple[str, ...]) -> str:
    """A name in this text by which PyTorch offers one of these functions; "" if there is none."""
    starts = tuple(start for name in names for start in OTHER_NAMES.get(name, (name,)) if "." not in name)
    for node in ast.walk(written):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.strip("_").startswith(starts)
            and LIBRARIES & set(_list_chain(node))
        ):
            return node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            told = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if isinstance(told, str) and told.strip("_").startswith(starts):
                return told
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            for alias in node.names:
                if alias.name.strip("_").startswith(starts):
                    return alias.name
    return ""


def find_uncounted_name(written: ast.Module) -> str:
    """A name in this text whose memory checks.allocations does not count; "" if there is none."""
    for node in ast.walk(written):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in UNCOUNTED:
            return name
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                if UNCOUNTED & set(alias.name.split(".")) or UNCOUNTED & set(
                    (getattr(node, "module", "") or "").split(".")
                ):
                    return alias.name
    return ""


def _list_chain(node: ast.expr) -> list[str]:
    """The names of a chain of attributes: torch.ops.aten.x is x, aten, ops, torch."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*names, node.id] if isinstance(node, ast.Name) else names


def find_definitions(sources: list[str]) -> dict[str, dict]:
    """What the exercises' own text says of what it defines: `operators`, class → the comparisons and arithmetic that it
    has; `outs`, function or method → the place of its parameter `out`."""
    nodes = [node for source in sources for node in ast.walk(ast.Module(_parse(source), []))]
    operators, outs = {}, {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            assigned = [target for item in node.body if isinstance(item, ast.Assign) for target in item.targets]
            own |= {target.id for target in assigned if isinstance(target, ast.Name)}
            operators[node.name] = sorted(own & {*COMPARING, *COMPUTING, "__contains__"})
        elif isinstance(node, ast.FunctionDef):
            places = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")]
            if "out" in places:
                outs[node.name] = places.index("out")
    return {"operators": {name: own for name, own in operators.items() if own}, "outs": outs}
