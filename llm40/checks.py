"""What the checks of a lesson are made of.

Every helper raises AssertionError with a sentence for the learner: what is wrong, where, and — where the check knows
it — which mistake gives exactly this. A helper never believes the value it is given: results must be plain tensors,
expected values are computed by the check, inputs are compared with copies taken before.
"""

import _thread
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm40 import profile

HALF = (torch.float16, torch.bfloat16)
# Relative tolerance by the coarser of the two formats compared.
RTOL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


# --- Random inputs ---

def seed() -> int:
    """The run's seed: fixed for a learner, chosen by the grader for each run (environment variable LLM40_SEED)."""
    return int(os.environ.get("LLM40_SEED", "40"))


def generator(salt: int = 0) -> torch.Generator:
    """A fresh generator of the run's seed; another `salt` gives another stream."""
    return torch.Generator().manual_seed(seed() * 1_000_003 + salt)


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers of standard deviation `scale` on the profile's device, drawn on the CPU: the same everywhere."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(profile.device)


# --- Values ---

def close(actual: Any, expected: Any, *, what: str = "the result", hint: str = "", rtol: float | None = None,
          atol: float | None = None, dtype: torch.dtype | None = None, mistakes: dict[str, Any] | None = None) -> None:
    """`actual` equals `expected` in shape and, elementwise, within `atol + rtol·|expected|`.

    rtol follows the coarser format of the two; atol is rtol times the largest finite |expected|, so that the tolerance
    is always far below what it judges. Integers and booleans must be equal. With `dtype`, `actual` must have that
    dtype; without it, and without an rtol, a half-precision `actual` is refused where `expected` is none: its tolerance
    would let wrong answers through. `mistakes` maps the name of a usual mistake to what it would give: a wrong answer
    that equals one of them is told so.
    """
    expected = _tensor(expected)
    actual = _result(actual, expected, what, hint)
    if dtype is not None and actual.dtype != dtype:
        raise AssertionError(_sentence(f"{what} has dtype {_name(actual.dtype)}, it should have {_name(dtype)}", hint))
    if dtype is None and rtol is None and actual.dtype in HALF and expected.dtype not in HALF:
        raise AssertionError(_sentence(f"{what} has dtype {_name(actual.dtype)}, too coarse to be compared with "
                                       f"{_name(expected.dtype)}: keep more digits", hint))
    if actual.shape != expected.shape:
        raise AssertionError(_sentence(f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}", hint))
    problem = _difference(actual, expected, rtol, atol)
    if problem is None:
        return
    for mistake, value in (mistakes or {}).items():
        value = _tensor(value).to(actual.device)
        if value.shape == actual.shape and _difference(actual, value, rtol, atol) is None:
            raise AssertionError(_sentence(f"{what}: {problem}. This is what {mistake} gives", hint))
    raise AssertionError(_sentence(f"{what}: {problem}", hint))


def relative_l2(actual: Any, expected: Tensor, limit: float, *, what: str = "the result", hint: str = "",
                mistakes: dict[str, Tensor] | None = None) -> None:
    """‖actual − expected‖ / ‖expected‖ ≤ `limit`, in float64: for kernels, where single elements round freely."""
    actual = _result(actual, expected, what, hint)
    if actual.shape != expected.shape:
        raise AssertionError(_sentence(f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}", hint))
    error = _relative_error(actual, expected)
    if error <= limit:
        return
    bad = ~torch.isfinite(actual)
    where = f"; {int(bad.sum())} values are not finite, first at {_index(bad)}" if bad.any() else ""
    for mistake, value in (mistakes or {}).items():
        if value.shape == actual.shape and _relative_error(actual, value) <= 10 * limit:
            where += f". This is what {mistake} gives"
            break
    raise AssertionError(_sentence(f"{what}: relative error {error:.1e}, allowed {limit:.1e}{where}", hint))


def _result(actual: Any, expected: Tensor, what: str, hint: str) -> Tensor:
    """The learner's value as a plain tensor without a graph, or a sentence that says what it is instead."""
    if isinstance(actual, bool | int | float) and expected.dim() == 0:
        return torch.tensor(actual, dtype=torch.float64 if isinstance(actual, float) else None, device=expected.device)
    if type(actual) not in (Tensor, torch.nn.Parameter):  # a subclass could redefine what equality means
        raise AssertionError(_sentence(f"{what} is {_describe(actual)}, it should be "
                                       + ("a number" if expected.dim() == 0 else "a torch.Tensor"), hint))
    return Tensor.detach(actual)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    is_float = any(isinstance(leaf, float) for leaf in tree_leaves(value))
    return torch.tensor(value, dtype=torch.float64 if is_float else None)


def _difference(actual: Tensor, expected: Tensor, rtol: float | None, atol: float | None) -> str | None:
    """None where they agree, else a description of the first place where they do not."""
    expected = expected.to(actual.device)
    if not actual.dtype.is_floating_point and not expected.dtype.is_floating_point:
        bad, error = actual != expected, None
    else:
        if rtol is None:
            rtol = max(RTOL.get(actual.dtype, 0.0), RTOL.get(expected.dtype, 0.0))
        a, e = actual.double(), expected.double()
        if atol is None:
            finite = e[torch.isfinite(e)].abs()
            atol = rtol * float(finite.max()) if finite.numel() else 0.0
        error = (a - e).abs()
        same = (a == e) | (torch.isnan(a) & torch.isnan(e))  # equal infinities too, whose difference is NaN
        bad = ~(same | (torch.isfinite(e) & (error <= atol + rtol * e.abs())))
    if not bad.any():
        return None
    index = _index(bad)
    place = f" at index {index}" if index else ""
    text = f"expected {_number(expected[index])}{place}, yours is {_number(actual[index])}"
    if bad.numel() > 1:
        text += f" ({int(bad.sum())} of {bad.numel()} values differ"
        if error is not None and torch.isfinite(error[bad]).any():
            text += f", by up to {float(error[bad & torch.isfinite(error)].max()):.2g}"
        text += ")"
    return text


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    a, e = actual.double(), expected.double().to(actual.device)
    error = float(torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e).clamp_min(1e-300))
    return math.inf if math.isnan(error) else error


def _index(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def _number(value: Tensor) -> str:
    value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    if value is None:
        return "None (is there a return?)"
    if value is NotImplemented or value is Ellipsis:
        return repr(value)
    return f"of type {type(value).__name__}"


def _article(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _sentence(text: str, hint: str) -> str:
    return f"{text}. {hint}" if hint else f"{text}."


# --- Inputs, gradients, errors ---

@contextmanager
def unchanged(*tensors: Tensor, **named: Tensor) -> Iterator[None]:
    """Inside the block these tensors (given by position or by name) keep their values, bit for bit."""
    watched = {f"input {i}": t for i, t in enumerate(tensors)} | named
    before = {name: t.detach().clone() for name, t in watched.items()}
    yield
    for name, t in watched.items():
        if not _same_bits(t.detach(), before[name]):
            raise AssertionError(f"{name} was changed in place: work on a copy, the caller still needs it.")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def gradients(fn: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, names: Sequence[str] = (),
              rtol: float | None = None, atol: float | None = None, hint: str = "",
              mistakes: dict[str, Callable[..., Tensor]] | None = None) -> None:
    """`fn` and `reference` (computed in float64) have the same gradients in all floating-point inputs.

    Both meet the same random cotangent. `mistakes` maps the name of a usual mistake to a function that makes it.
    """
    expected = _gradients(reference, [t.double() if t.is_floating_point() else t for t in inputs])
    actual = _gradients(fn, inputs)
    wrong = {name: _gradients(f, [t.double() if t.is_floating_point() else t for t in inputs])
             for name, f in (mistakes or {}).items()}
    position = 0
    for i, t in enumerate(inputs):
        if not t.is_floating_point():
            continue
        name = names[i] if i < len(names) else f"input {i}"
        if actual[position] is None:
            raise AssertionError(_sentence(f"no gradient reaches {name}: is part of the computation detached?", hint))
        close(actual[position], expected[position].to(t.dtype), what=f"the gradient of {name}", hint=hint,
              rtol=rtol, atol=atol, mistakes={m: g[position].to(t.dtype) for m, g in wrong.items()})
        position += 1


def _gradients(fn: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = fn(*leaves)
    if type(out) not in (Tensor, torch.nn.Parameter):
        raise AssertionError(f"the result is {_describe(out)}, it should be a torch.Tensor.")
    if not out.requires_grad:
        raise AssertionError("the result carries no gradient: is it detached, or computed outside PyTorch?")
    cotangent = torch.randn(out.shape, generator=generator(7)).to(out)
    floating = [t for t in leaves if t.is_floating_point()]
    return list(torch.autograd.grad(out, floating, cotangent, allow_unused=True))


def raises(error: type[BaseException] | tuple[type[BaseException], ...], fn: Callable[..., Any], *args: Any,
           because: str = "", mentions: str = "", **kwargs: Any) -> None:
    """Calling `fn` raises `error`, whose message contains `mentions`.

    An empty exercise's NotImplementedError never counts. Nothing is returned, so that a check which ends with this call
    shows no exception under a cell that passed.
    """
    try:
        value = fn(*args, **kwargs)
    except error as raised:
        if isinstance(raised, NotImplementedError):
            raise
        if mentions not in str(raised):
            raise AssertionError(f"the message of the {type(raised).__name__}, {str(raised)!r}, does not mention "
                                 f"{mentions}: say what was wrong.") from None
        return
    kinds = error if isinstance(error, tuple) else (error,)
    names = " or ".join(kind.__name__ for kind in kinds)
    raise AssertionError(_sentence(f"{names} should be raised here; the call returned {_article(value)}", because))


# --- Work and memory, counted ---

class _LightMode(TorchDispatchMode):
    """A dispatch mode that does not load torch._dynamo: two seconds and nine hundred modules, at its first use."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@dataclass
class Allocations(_LightMode):
    """Counts the elements of every tensor that an operation of PyTorch newly makes (views are free)."""

    largest: int = 0                    # elements of the largest single tensor
    total: int = 0                      # elements of all of them
    shapes: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                elements = t.untyped_storage().nbytes() // t.element_size()
                self.largest = max(self.largest, elements)
                self.total += elements
                self.shapes[tuple(t.shape)] += 1
        return out


def allocations() -> Allocations:
    """`with allocations() as made:` … then `made.largest`, `made.total` (elements) and `made.shapes`."""
    return Allocations()


class _Watch(TorchFunctionMode):
    """Sees every call of a function of PyTorch by its name, however it was imported or bound."""

    def __init__(self, names: Sequence[str], seen: Callable[[str], None]) -> None:
        super().__init__()
        self.names, self.seen = names, seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        called = getattr(func, "__name__", str(func))
        if called in self.names:
            self.seen(called)
        return func(*args, **(kwargs or {}))


class _WatchOperations(_LightMode):
    """Sees the operations underneath, for calls that reach them another way (torch.ops, a compiled module)."""

    def __init__(self, names: Sequence[str], seen: Callable[[str], None]) -> None:
        super().__init__()
        self.names, self.seen = names, seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in self.names:
            if name in func.overloadpacket.__name__:
                self.seen(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _everywhere(mode: Callable[[], Any]) -> Iterator[None]:
    """A mode in this thread, and in every thread that is started inside the block: PyTorch's are a thread's own."""
    def watched(start: Callable[..., Any]) -> Callable[..., Any]:
        def start_watched(function, *args, **kwargs):
            def run(*values, **named):
                with mode():
                    return function(*values, **named)
            return start(run, *args, **kwargs)
        return start_watched

    starts = [(module, name) for module in (_thread, threading)
              for name in ("start_new_thread", "_start_new_thread", "start_joinable_thread", "_start_joinable_thread")
              if hasattr(module, name)]
    with ExitStack() as patches:
        for module, name in starts:
            patches.enter_context(mock.patch.object(module, name, watched(getattr(module, name))))
        with mode():
            yield


@contextmanager
def calls(*names: str) -> Iterator[Counter]:
    """Counts calls of PyTorch's functions and methods by their name, e.g. `calls("matmul", "softmax")`."""
    counted: Counter = Counter()

    def seen(name: str) -> None:
        counted[name] += 1

    with _everywhere(lambda: _Watch(names, seen)):
        yield counted


@contextmanager
def forbidden(*names: str, because: str = "this exercise builds it") -> Iterator[None]:
    """Inside the block nothing may call PyTorch's functions of these names, e.g. "scaled_dot_product_attention"."""
    used: list[str] = []
    with _everywhere(lambda: _Watch(names, used.append)), _everywhere(lambda: _WatchOperations(names, used.append)):
        yield
    if used:  # raised at the end, where no `except` of the learner's can swallow it
        raise AssertionError(f"{used[0]} of PyTorch is called, but {because}.")


@dataclass
class Launches:
    """Launches of Triton kernels: how many, of which kernels, and how many programs in all."""

    count: int = 0
    programs: int = 0
    kernels: Counter = field(default_factory=Counter)


@contextmanager
def launches() -> Iterator[Launches]:
    """Counts the Triton kernels launched inside the block, in the interpreter and on a GPU."""
    if not profile.has_triton:
        raise RuntimeError("Triton is not installed here: it exists for Linux only")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counted = Launches()
    with ExitStack() as patches:
        for kind in (InterpretedFunction, JITFunction):
            patches.enter_context(mock.patch.object(kind, "run", _counting(kind.run, counted)))
        yield counted


def _counting(run: Callable[..., Any], counted: Launches) -> Callable[..., Any]:
    def counting_run(self, *args, grid, warmup, **kwargs):
        if not warmup:
            size = grid(kwargs) if callable(grid) else grid
            counted.count += 1
            counted.programs += math.prod(size)
            counted.kernels[getattr(self, "__name__", self.fn.__name__)] += 1
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)
    return counting_run


# --- Buffers with canaries, for kernels ---

@dataclass
class Guarded:
    """A tensor inside a larger buffer whose other elements are canaries."""

    tensor: Tensor
    buffer: Tensor
    inside: Tensor     # True where the buffer belongs to the tensor
    what: str

    def intact(self) -> None:
        """Nothing was written outside the tensor."""
        outside = self.buffer[~self.inside]
        if not bool(_is_canary(outside).all()):
            raise AssertionError(f"a kernel wrote outside {self.what} {tuple(self.tensor.shape)}: "
                                 f"{int((~_is_canary(outside)).sum())} elements beyond its edge were overwritten. "
                                 "Is every store masked at the edge of the rows and of the sequence?")


def guarded(values: Tensor, *, row_pad: int = 0, what: str = "the buffer", margin: int = 256) -> Guarded:
    """`values` copied into a buffer of NaN (of a large number, for integers), with `margin` canaries before and after.

    With `row_pad`, as many canaries follow every row of the last axis, so that the rows are `size + row_pad` apart: a
    kernel that takes the row stride for the row's length, or reads past a ragged row, meets them.
    """
    *outer, width = values.shape
    buffer = torch.full((2 * margin + math.prod(outer) * (width + row_pad),), _canary(values.dtype),
                        dtype=values.dtype, device=values.device)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    size = buffer.numel() - 2 * margin
    tensor = buffer[margin:margin + size].view(*outer, width + row_pad)[..., :width]
    inside[margin:margin + size].view(*outer, width + row_pad)[..., :width] = True
    tensor.copy_(values)
    return Guarded(tensor, buffer, inside, what)


@contextmanager
def guarded_allocations(margin: int = 256) -> Iterator[list[Guarded]]:
    """Every torch.empty, zeros, ones or full (and …_like, new_…) inside the block gets canaries around it.

    They are looked at when the block ends. torch.empty is filled with NaN besides, so that an element which the kernel
    never wrote shows.
    """
    made: list[Guarded] = []
    with _GuardAllocations(made, margin):
        yield made
    for buffer in made:
        buffer.intact()


class _GuardAllocations(TorchFunctionMode):
    MAKERS = frozenset(f"{prefix}{kind}{suffix}" for kind in ("empty", "zeros", "ones", "full")
                       for prefix, suffix in (("", ""), ("", "_like"), ("new_", "")))

    def __init__(self, made: list[Guarded], margin: int) -> None:
        super().__init__()
        self.made, self.margin = made, margin

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in self.MAKERS or not isinstance(out, Tensor) or out.dim() == 0 or not out.numel():
            return out
        if "empty" in name:
            out.fill_(_canary(out.dtype))
        guard = guarded(out.detach(), what="an output", margin=self.margin)
        self.made.append(guard)
        return guard.tensor.requires_grad_(out.requires_grad)


def _canary(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _is_canary(values: Tensor) -> Tensor:
    return values.isnan() if values.is_floating_point() else values == _canary(values.dtype)
