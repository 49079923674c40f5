"""Whether a submission's code bent what judges it: what is asked of the guard in the kernel, and what its answers mean.

The guard (kernels/inside) does the watching. Here is what of a lesson it must know, how a check is armed against
values that judge themselves, the canaries, and a reading of the learner's code for names that no answer needs. A
submission that was caught keeps no points by itself: a person decides.
"""

import ast
import textwrap
from collections.abc import Iterable
from functools import cache

from nbformat import NotebookNode

from autograder.grading.rebuild import name, role
from autograder.kernels.guardian import Lesson, file_of, program
from autograder.kernels.inside.arms import CALCULATING, COMPARING, PRETENDING
from autograder.lesson import python_of

SPECIAL = COMPARING | CALCULATING | PRETENDING

# What no answer to an exercise needs; a lesson that itself uses such a name allows it.
SUSPICIOUS = {
    "reads what it was not given": (
        "_getframe", "_current_frames", "currentframe", "f_back", "f_locals", "f_globals", "tb_frame", "gi_frame",
        "cr_frame", "__globals__", "__closure__", "cell_contents", "get_objects", "get_referrers", "get_referents",
    ),
    "watches or replaces running code": (
        "settrace", "setprofile", "addaudithook", "ast_transformers", "input_transformers_cleanup", "__code__",
        "CodeType", "ctypes", "_ctypes", "PyThreadState_SetAsyncExc",
    ),
    "hides calls from PyTorch's modes": (
        "DisableTorchFunction", "DisableTorchFunctionSubclass", "_disable_current_modes", "_DisableTorchDispatch",
        "DisableTorchDispatch", "_get_current_function_mode_stack", "_get_current_dispatch_mode_stack",
        "_pop_torch_function_stack", "_pop_mode", "_push_mode", "_pop_mode_temporarily", "_BypassTorchFunctionMode",
        "start_new_thread", "_start_new_thread", "_start_joinable_thread", "start_joinable_thread",
        "_dispatch_tls_set_dispatch_key_excluded", "_ExcludeDispatchKeyGuard", "_IncludeDispatchKeyGuard",
    ),
    "replaces PyTorch's own operations": ("_dispatch_library",),
}  # fmt: skip

CANARIES = {
    "": {
        "an assertion that is false": "assert False",
        "1 == 2": "assert 1 == 2",
        "a sum that is wrong": "assert sum([1, 2]) == 4",
        "isinstance of another class": "assert isinstance('1', int)",
        "all of not all": "assert all([True, False, True])",
        "the largest of three": "assert max([1, 3, 2]) == 2",
        "a distance above its bound": "assert abs(1.0 - 1.5) < 0.1",
        "a list in another order": "assert sorted([2, 1]) == [2, 1]",
    },
    "math": {"math.isclose of what is not": "import math\nassert math.isclose(1.0, 1.01)"},
    "torch": {
        "torch.equal of what is not": "import torch\na = torch.randn(3, 2)\nassert torch.equal(a, a + 0.1)",
        "torch.allclose of what is not": "import torch\na = torch.randn(3, 2)\nassert torch.allclose(a, a + 0.1)",
        "assert_close of what is not": """
            import torch
            a = torch.randn(3, 2)
            torch.testing.assert_close(a, a + 0.1)""",
        "tensors that differ": "import torch\na = torch.randn(3, 2)\nassert bool((a == a + 0.1).all())",
        "tensors far apart": "import torch\na = torch.randn(3, 2)\nassert float((a - 2 * a - 1).abs().max()) < 1e-3",
        "a tensor of another shape": "import torch\nassert torch.randn(3, 2).shape == (2, 3)",
    },
    "llm40.checks": {
        "checks.close of what is not": """
            import torch
            from llm40 import checks
            a = torch.randn(3, 2)
            checks.close(a * 1.01, a)""",
        "checks.relative_l2 of what is not": """
            import torch
            from llm40 import checks
            a = torch.randn(3, 2)
            checks.relative_l2(a * 1.1, a, 1e-3)""",
        "checks.gradients of another function": """
            import torch
            from llm40 import checks
            checks.gradients(lambda x: x * 3, lambda x: x * 2, torch.randn(3))""",
        "checks.raises where nothing is raised": """
            from llm40 import checks
            checks.raises(ValueError, int, "3")""",
        "checks.unchanged of what changes": """
            import torch
            from llm40 import checks
            a = torch.randn(3)
            with checks.unchanged(a):
                a += 1""",
        "checks.forbidden of what is called": """
            import torch
            from llm40 import checks
            with checks.forbidden("softmax"):
                torch.softmax(torch.randn(3), 0)""",
    },
}

# What a library imports of its own later (the first optimizer, say), and which then replaces something of the library.
LATER = {"torch": "torch._dynamo", "tokenizers": "tokenizers.trainers"}


def lesson_of(master: NotebookNode) -> Lesson:
    """What the guard knows of a lesson."""
    ours = [ast.parse(python_of(cell.source)) for cell in _code(master, "plain", "check")]
    theirs = [ast.parse(python_of(cell.source)) for cell in _code(master, "exercise")]
    modules = dict.fromkeys(module for tree in ours for module in _imported(tree))
    if "llm40" in modules or any(module.startswith("llm40.") for module in modules):
        modules = dict.fromkeys(["llm40", "llm40.checks", *modules])  # first: it prepares Triton
        modules["torch"] = None
    tops = {module.partition(".")[0] for module in modules}
    modules |= {later: None for library, later in LATER.items() if library in tops}
    honest = master.metadata.get("llm40", {}).get("methods", {})
    return Lesson(
        modules=tuple(modules),
        honest={**_methods(ours + theirs), **honest},
        theirs=tuple(sorted({n for tree in theirs for n in _bound(tree)})),
        helpers=tuple(sorted(_helpers(master))),
        canaries=_canaries(frozenset(modules)),
    )


def asked_methods(master: NotebookNode) -> dict[str, list[str]]:
    """The special methods of the classes that a lesson's own answers define: class → names."""
    return _methods(ast.parse(python_of(cell.source)) for cell in _code(master, "exercise", "plain", "check"))


def _code(notebook: NotebookNode, *roles: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and role(cell) in roles]


def _imported(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "llm40")


def _bound(tree: ast.Module) -> Iterable[str]:
    """The names that a cell's top level makes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _helpers(master: NotebookNode) -> set[str]:
    """The functions that cells of ours define for checks."""
    trees = [ast.parse(python_of(cell.source)) for cell in _code(master, "plain")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def _methods(trees: Iterable[ast.AST]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)} & SPECIAL
                found.setdefault(node.name, set()).update(methods)
    return {kind: sorted(methods) for kind, methods in found.items()}


@cache
def _canaries(modules: frozenset[str]) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        (label, program(textwrap.dedent(source), file_of("canary")))
        for module, canaries in CANARIES.items()
        if not module or module in modules
        for label, source in canaries.items()
    )


WATCHING = {"forbidden", "calls", "allocations", "TorchFunctionMode", "TorchDispatchMode", "FlopCounterMode"}

# --- arming a check -------------------------------------------------------------------------------------------

# Builtins whose result says nothing of a value but what is looked at afterwards.
TAKING = ("enumerate", "id", "iter", "len", "list", "next", "print", "range", "reversed", "super", "tuple", "type",
          "zip")  # fmt: skip

SEARCHING = ("index", "count", "remove", "sort")  # methods that compare what is in a list


class Arming(ast.NodeTransformer):
    """Every operand, argument and owner of an attribute in a check goes through kernels/inside/arms.py first.

    `theirs` are names that the exercises define: what they name is called from a frame with no names in it. `helpers`
    are our own functions, which compare what they are given.
    """

    def __init__(self, theirs: frozenset[str], helpers: frozenset[str]):
        self.theirs, self.helpers = theirs, helpers

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        node.left = _asked("operand", node.left)
        kinds = ["collection" if isinstance(operator, (ast.In, ast.NotIn)) else "operand" for operator in node.ops]
        node.comparators = [_asked(kind, value) for kind, value in zip(kinds, node.comparators, strict=True)]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        node.left, node.right = _asked("operand", node.left), _asked("operand", node.right)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values = [_asked("operand", value) for value in node.values]
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        node.operand = _asked("operand", node.operand)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        node.test = _asked("operand", node.test)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            node.value = _asked("collection" if node.attr in SEARCHING else "owner", node.value)
        return node

    def visit_match_case(self, node: ast.match_case) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]  # a pattern is no expression
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in TAKING:
            return node
        kind = "handed" if isinstance(node.func, ast.Name) and node.func.id in self.helpers else "argument"
        node.args = [_asked(kind, value) for value in node.args]
        for keyword in node.keywords:
            keyword.value = _asked(kind, keyword.value)
        if isinstance(node.func, ast.Name) and node.func.id in self.theirs:
            node.args.insert(0, node.func)
            node.func = ast.copy_location(ast.Name("__call__", ast.Load()), node)
        return node


def _asked(function: str, value: ast.expr) -> ast.expr:
    if isinstance(value, (ast.Constant, ast.Lambda, ast.JoinedStr, ast.GeneratorExp)):
        return value  # ours
    if isinstance(value, ast.Starred):
        value.value = _asked(function, value.value)
        return value
    call = ast.Call(ast.Name(f"__{function}__", ast.Load()), [value], [])
    return ast.fix_missing_locations(ast.copy_location(call, value))


@cache
def counts_calls(source: str) -> bool:
    """Whether a check sees calls by PyTorch's modes (checks.forbidden and checks.calls), which are a thread's own."""
    return not WATCHING.isdisjoint(_own_words(source))


@cache
def armed(source: str, label: str, theirs: tuple[str, ...], helpers: tuple[str, ...]) -> bytes:
    """A check, compiled, its values asked whose they are."""
    return program(Arming(frozenset(theirs), frozenset(helpers)).visit(ast.parse(python_of(source))), file_of(label))


# --- reading --------------------------------------------------------------------------------------------------


def suspicious(notebook: NotebookNode) -> list[str]:
    """A flag for each name in the learner's code that no answer needs and the lesson's own cells do not use."""
    ours = {word for cell in _code(notebook, "plain", "check", "experiment") for word in _own_words(cell.source)}
    flags = []
    for cell in _code(notebook, "exercise", "added"):
        words = _words(cell.source) - ours
        for why, names in SUSPICIOUS.items():
            flags += [f"{name(cell)}: {word}: {why}" for word in names if word in words]
    return flags


@cache
def _own_words(source: str) -> frozenset[str]:
    """_words of a cell of ours, which the whole class has."""
    return frozenset(_words(source))


def _words(source: str) -> set[str]:
    """Every name in a program: variables, attributes, imports, and strings that are one word."""
    try:
        tree = ast.parse(python_of(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            words |= {part for alias in node.names for part in alias.name.split(".")}
            words |= set((getattr(node, "module", "") or "").split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)
    return words


REPORTED = {
    "patched": "replaced by the submission: {}",
    "asked": "asked for {}, which no answer needs",
    "beside": "{} ran beside a check that counts calls",
    "canary": "an assertion that must fail did not: {}",
}


def flags_of(reports: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence for each thing that the guard found, once."""
    return list(dict.fromkeys(REPORTED[kind].format(what) for kind, what in reports))
