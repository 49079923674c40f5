"""Whether a Triton kernel that runs in the interpreter also compiles for a GPU.

The interpreter runs a kernel as Python and takes what no GPU has: lists, `try`, `break`, an `if` on a block. Triton's
compiler refuses it, and needs no GPU to do so. Where the interpreter is on, Triton's own library functions (tl.sum,
tl.zeros) are interpreted ones, which the compiler can't use; so its Python modules are loaded a second time, without
the interpreter, and a kernel is rebuilt among them from its text. What passes from one to the other, `sources` and
`argument_types`, are plain texts and numbers.
"""

import ast
import importlib
import inspect
import linecache
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

from llm40 import profile
from llm40.checks.work import arguments_of, watched_launches

CAPABILITY = 90  # compute capability 9.0: H100, H200
PTX_VERSION = 80  # the first for it; said here, so that no ptxas is asked for its version
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
TF32_PRODUCT = re.compile(r"tt\.dot .*inputPrecision = tf32 : tensor<[^>]*xf32>")
ROUNDED = (
    "rounds float32 to TF32, ten bits of mantissa, before it multiplies: tl.dot's default on a GPU, which the "
    'interpreter does not show. input_precision="ieee" asks for float32.'
)
POINTERS = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i1",
}


@contextmanager
def compiled() -> Iterator[None]:
    """Every Triton kernel launched inside the block also compiles for a GPU (sm_90), which needs no GPU.

    A kernel is compiled once for each combination of argument types and constants with which it is launched: at the end
    of the block, and not again in the same process. The first time it is compiled as far as PTX, for other types as far
    as Triton's own language. If Triton refuses it, its own sentence is the message; products of float32 that a GPU
    would round to TF32 are refused too. On a GPU, where the launch itself compiles, and where Triton is not installed,
    nothing is done.

    Whole numbers are compiled as 32- or 64-bit arguments by their size; Triton's special treatment of 1 and of
    multiples of 16 is left out.
    """
    if not (profile.has_triton and profile.interpret):
        yield
        return
    launched: dict[tuple, str] = {}

    def record(kernel: Any, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        launched[sources(kernel), argument_types(kernel, args, kwargs)] = kernel.fn.__name__

    with watched_launches(record):
        yield
    for (functions, types), kernel in launched.items():
        problem = refusal(functions, types)
        if problem:
            raise AssertionError(f"{kernel} {problem}")


# --- What is measured: a kernel as text, its arguments as types -------------------------------------------------------


def sources(kernel: Any) -> tuple[tuple, ...]:
    """The kernel and the jitted functions that it reaches, the kernel first: (key, name, text, its global names).

    What a name means is told in plain values, see `_meaning`.
    """
    found: dict[str, tuple] = {}

    def reach(fn: FunctionType) -> str:
        key = f"{fn.__module__}.{fn.__qualname__}, line {fn.__code__.co_firstlineno} of {fn.__code__.co_filename}"
        if key not in found:
            found[key] = ()  # it may call itself
            text = textwrap.dedent(inspect.getsource(fn))
            used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
            used -= {*fn.__code__.co_varnames, *fn.__code__.co_cellvars}  # its own, whatever the notebook calls so
            names = fn.__globals__ | inspect.getclosurevars(fn).nonlocals
            meanings = {name: _meaning(names[name], reach) for name in sorted(used & names.keys())}
            found[key] = (key, fn.__name__, text, tuple(meanings.items()))
        return key

    reach(kernel.fn)
    return tuple(found.values())


def _meaning(value: Any, reach: Any = None) -> tuple:
    """What a name stands for: ("module", name), ("function", key), ("triton", module, name), ("dtype", name),
    ("constexpr", meaning), ("tuple", meanings), ("plain", value), or ("other",) for what no kernel may use."""
    from triton import language
    from triton.runtime.jit import KernelInterface

    if isinstance(value, ModuleType):
        return ("module", value.__name__)
    if isinstance(value, KernelInterface):  # an autotuned kernel has one inside
        while isinstance(value.fn, KernelInterface):
            value = value.fn
        if reach is not None and not value.fn.__module__.startswith("triton."):
            return ("function", reach(value.fn))
        value = value.fn
    if isinstance(value, language.constexpr):
        return ("constexpr", _meaning(value.value, reach))
    if isinstance(value, language.dtype):
        return ("dtype", value.name)
    if isinstance(value, tuple):
        return ("tuple", tuple(_meaning(item, reach) for item in value))
    if value is None or type(value) in (bool, int, float, str):
        return ("plain", value)
    if isinstance(value, type | FunctionType) and value.__module__.startswith("triton."):
        return ("triton", value.__module__, value.__qualname__)
    return ("other",)


def argument_types(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """How Triton sees the arguments of a launch: (name, "*fp32" or "i32" …) or (name, "constexpr", meaning) for each,
    then the options with which it is compiled."""
    types = []
    for name, value in arguments_of(kernel, args, kwargs).items():
        constant = "constexpr" in str(kernel.fn.__annotations__.get(name, ""))
        if constant or value is None:
            types.append((name, "constexpr", _meaning(getattr(value, "value", value))))
        elif hasattr(value, "data_ptr"):
            types.append((name, "*" + POINTERS.get(str(value.dtype).removeprefix("torch."), "?")))
        elif isinstance(value, bool):
            types.append((name, "i1"))
        elif isinstance(value, int):
            types.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
        else:
            types.append((name, "fp32" if isinstance(value, float) else "?"))
    options = tuple((name, kwargs[name]) for name in OPTIONS if name in kwargs and name not in kernel.arg_names)
    return tuple(types), options


# --- The compiler -----------------------------------------------------------------------------------------------------


@cache
def refusal(functions: tuple, types: tuple) -> str | None:
    """What is to be said of a kernel, behind its name, given as `sources` and `argument_types`; None for nothing.

    None too where this machine's Triton can't compile, or an argument's type is not one of those known here.
    """
    if any(kind == "*?" or kind == "?" for _, kind, *_ in types[0]) or not _works():
        return None
    return _refusal(functions, types)


_whole: set = set()  # the kernels that were compiled as far as PTX


def _refusal(functions: tuple, types: tuple) -> str | None:
    modules = _second_triton()
    arguments, options = types
    whole = functions not in _whole
    _whole.add(functions)
    with _in_place_of_triton(modules), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = _rebuilt(functions, modules)
            constants = {name: _value(meaning[0], made, modules) for name, kind, *meaning in arguments if meaning}
            rounded = _compile(
                made[functions[0][0]],
                {name: kind for name, kind, *_ in arguments},
                constants,
                dict(options),
                modules,
                whole,
            )
        except Exception as error:  # whatever Triton raises is its answer
            return f"runs in Triton's interpreter and does not compile for a GPU: {_told(error, modules)}"
    return ROUNDED if rounded else None


def _compile(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    modules: dict[str, ModuleType],
    whole: bool,
) -> bool:
    """triton.compile without its cache on disk, whose key alone takes half a second; whether TF32 is used."""
    ir = sys.modules["triton._C.libtriton"].ir
    target = modules["triton.backends.compiler"].GPUTarget("cuda", CAPABILITY, 32)
    backend = modules["triton.compiler.compiler"].make_backend(target)
    source = modules["triton.compiler.compiler"].ASTSource(kernel, signature, constants)
    settings = backend.parse_options({"ptx_version": PTX_VERSION} | options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = source.make_ir(
        target, settings, backend.get_codegen_implementation(settings), backend.get_module_map(), context
    )
    rounded = bool(TF32_PRODUCT.search(str(code)))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, settings, source.language)
    metadata: dict[str, Any] = {}
    for stage, run in stages.items():
        code = run(code, metadata)
        if stage == ("ptx" if whole else "ttir"):
            break
    return rounded


@cache
def _works() -> bool:
    """Whether Triton compiles here a kernel that is right: its inner functions are no public interface."""
    text = "def kernel(x, n, BLOCK: tl.constexpr):\n    i = tl.arange(0, BLOCK)\n    tl.store(x + i, 1.0, mask=i < n)\n"
    functions = (("probe", "kernel", text, (("tl", ("module", "triton.language")),)),)
    types = ((("x", "*fp32"), ("n", "i32"), ("BLOCK", "constexpr", ("plain", 16))), ())
    try:
        return _refusal(functions, types) is None
    except Exception:  # another Triton, whose modules are others
        return False


@cache
def _second_triton() -> dict[str, ModuleType]:
    """Triton's Python modules, loaded once more and without the interpreter; its library in C is the same."""
    ours = {name: module for name, module in sys.modules.items() if _python_of_triton(name)}
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        for name in ours:
            del sys.modules[name]
        try:
            for name in ("triton", "triton.compiler.code_generator", "triton.backends"):
                importlib.import_module(name)
            return {name: module for name, module in sys.modules.items() if _python_of_triton(name)}
        finally:
            for name in [name for name in sys.modules if _python_of_triton(name)]:
                del sys.modules[name]
            sys.modules.update(ours)


def _python_of_triton(name: str) -> bool:
    return name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C"))


@contextmanager
def _in_place_of_triton(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Inside the block `import triton` finds these modules: Triton imports some of its parts as it runs."""
    ours = {name: module for name, module in sys.modules.items() if _python_of_triton(name)}
    for name in ours:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        modules.update({name: module for name, module in sys.modules.items() if _python_of_triton(name)})
        for name in [name for name in sys.modules if _python_of_triton(name)]:
            del sys.modules[name]
        sys.modules.update(ours)


def _rebuilt(functions: tuple, modules: dict[str, ModuleType]) -> dict[str, Any]:
    """The functions as jitted ones of the second Triton, by their keys."""
    made: dict[str, Any] = {}
    spaces: dict[str, dict[str, Any]] = {}
    for key, name, text, _ in functions:
        start = re.search(r"^def\s+\w+\s*\(", text, re.MULTILINE)
        if start is None:
            raise ValueError("a kernel is written as a function of its own, with `def`")
        text = text[start.start() :]  # without its decorators
        file = f"<kernel {name} {len(linecache.cache)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where inspect looks
        spaces[key] = {"__name__": "kernels"}
        made[key] = (compile(text, file, "exec", dont_inherit=True), name)
    for key, _, _, meanings in functions:  # what their annotations and defaults need, before they are defined
        spaces[key] |= {n: _value(meaning, {}, modules) for n, meaning in meanings if meaning[0] != "function"}
    for key, (code, name) in made.items():
        exec(code, spaces[key])
        made[key] = modules["triton.runtime.jit"].JITFunction(spaces[key][name])
    for key, _, _, meanings in functions:
        spaces[key] |= {n: made[meaning[1]] for n, meaning in meanings if meaning[0] == "function"}
    return made


def _value(meaning: tuple, made: dict[str, Any], modules: dict[str, ModuleType]) -> Any:
    """What a meaning stands for among the second Triton's modules."""
    kind, *rest = meaning
    language = modules["triton.language"]
    if kind == "module":
        return modules.get(rest[0]) or sys.modules.get(rest[0], object())
    if kind == "constexpr":
        return language.constexpr(_value(rest[0], made, modules))
    if kind == "dtype":
        return language.dtype(rest[0])
    if kind == "tuple":
        return tuple(_value(item, made, modules) for item in rest[0])
    if kind == "triton":
        value: Any = modules[rest[0]]
        for part in rest[1].split("."):
            value = getattr(value, part)
        return value
    return rest[0] if kind == "plain" else object()


def _told(error: Exception, modules: dict[str, ModuleType]) -> str:
    """Triton's own sentence, with the line of the kernel that it is about."""
    line, text = "", ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, modules["triton.compiler.errors"].CompilationError):
            if not line and hasattr(cause.node, "lineno"):
                line = cause.src.split("\n")[cause.node.lineno - 1].strip()
            text = cause.error_message or text
        elif not text:
            text = f"{type(cause).__name__}: {cause}"
        cause = cause.__cause__
    quoted = re.fullmatch(r"\w+\((['\"])(.*)\1\)", text, re.DOTALL)  # the repr of an exception
    text = " ".join((quoted[2] if quoted else text).split())
    return f"{text.rstrip('.')}, in the line `{line}`." if line else f"{text.rstrip('.')}."
