"""What a computation does: the tensors it makes, the functions it calls, the kernels it launches.

Counted inside a block (`with …:`) and never timed. What is counted are plain numbers.
"""

import _thread
import gc
import inspect
import math
import pkgutil
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm40 import profile


class _LightMode(TorchDispatchMode):
    """A dispatch mode that does not load torch._dynamo: two seconds and nine hundred modules, at its first use."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@dataclass
class Allocations(_LightMode):
    """Counts the elements of every tensor that an operation of PyTorch newly makes (views are free)."""

    largest: int = 0  # elements of the largest single tensor
    total: int = 0  # elements of all of them
    shapes: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Before the call: `out=` and `resize_` give an argument memory that it did not have.
        leaves = tree_leaves((args, kwargs))
        known = {t.untyped_storage().data_ptr() for t in leaves if isinstance(t, Tensor)}
        known |= {storage.data_ptr() for storage in leaves if isinstance(storage, UntypedStorage)}  # of `set_`
        out = func(*args, **(kwargs or {}))
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

    starts = [
        (module, name)
        for module in (_thread, threading)
        for name in ("start_new_thread", "_start_new_thread", "start_joinable_thread", "_start_joinable_thread")
        if hasattr(module, name)
    ]
    with ExitStack() as patches:
        for module, name in starts:
            patches.enter_context(mock.patch.object(module, name, watched(getattr(module, name))))
        with mode():
            yield


@dataclass
class Saved:
    """What autograd keeps for the backward pass, in elements."""

    elements: int = 0  # of all tensors that were kept
    largest: int = 0  # of the largest of them
    most: int = 0  # of those that were kept at the same time
    alive: int = 0  # of those that are still kept


class _Kept:
    """A tensor that autograd keeps: counted as long as it lives."""

    def __init__(self, tensor: Tensor, saved: Saved) -> None:
        self.tensor = tensor
        size = tensor.numel()
        saved.elements += size
        saved.largest = max(saved.largest, size)
        saved.alive += size
        saved.most = max(saved.most, saved.alive)
        weakref.finalize(self, lambda: setattr(saved, "alive", saved.alive - size))


@contextmanager
def saved() -> Iterator[Saved]:
    """`with saved() as kept:` … counts what the operations inside the block keep for their backward pass."""
    kept = Saved()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, kept), lambda holder: holder.tensor):
        yield kept


@dataclass
class Flops:
    """FLOPs of matrix products and attention."""

    total: int = 0


class _CountFlops(_LightMode):
    """Adds what PyTorch's formulas say of each operation; one that has no formula is first taken apart."""

    def __init__(self, counted: Flops) -> None:
        from torch.utils.flop_counter import flop_registry  # loads Triton

        super().__init__()
        self.counted, self.formulas = counted, flop_registry

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = self.formulas.get(func.overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.counted.total += formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def flops() -> Iterator[Flops]:
    """`with flops() as counted:` … then `counted.total`, as PyTorch's own counter has it (2 for a multiply-add)."""
    counted = Flops()
    with _CountFlops(counted):
        yield counted


def measured(made: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a context manager, or a function, of a given cell that looks at what the learner's code does in its process
    (memory traffic, operations seen by a mode): where the judge has a process of its own, it runs in the learner's."""
    return made


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
    """Inside the block nothing may call PyTorch's functions of these names, e.g. "scaled_dot_product_attention".

    A function that is no operation of PyTorch's is named by its path: "torch.utils.checkpoint.checkpoint".
    """
    used: list[str] = []
    paths = [name for name in names if "." in name]
    names = tuple(name for name in names if "." not in name)
    with ExitStack() as patches:
        for path in paths:
            noting = _noting(path, used)
            for names_of, name in list(_bound_names(pkgutil.resolve_name(path))):
                patches.enter_context(mock.patch.dict(names_of, {name: noting}))
            patches.enter_context(mock.patch(path, noting))
        with _everywhere(lambda: _Watch(names, used.append)), _everywhere(lambda: _WatchOperations(names, used.append)):
            yield
    if used:  # raised at the end, where no `except` of the learner's can swallow it
        raise AssertionError(f"{used[0]} of PyTorch is called, but {because}.")


def _noting(path: str, used: list[str]) -> Callable[..., Any]:
    """The function at a path, which notes that it was called."""
    function = pkgutil.resolve_name(path)

    def noting(*args: Any, **kwargs: Any) -> Any:
        used.append(path.rpartition(".")[2])
        return function(*args, **kwargs)

    return noting


OWN = ("torch", "llm40", "autograder")


def _bound_names(function: Any) -> Iterator[tuple[dict, str]]:
    """The namespaces, but for PyTorch's and the course's own, in which a name stands for the function: `from … import`
    binds one."""
    for names in gc.get_referrers(function):
        if isinstance(names, dict) and str(names.get("__name__", "torch")).split(".")[0] not in OWN:
            yield from ((names, name) for name, value in list(names.items()) if value is function)


@dataclass
class Launches:
    """Launches of Triton kernels: how many, of which kernels, and how many programs in all."""

    count: int = 0
    programs: int = 0
    kernels: Counter = field(default_factory=Counter)


@contextmanager
def launches() -> Iterator[Launches]:
    """Counts the Triton kernels launched inside the block, in the interpreter and on a GPU."""
    counted = Launches()

    def count(kernel: Any, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        counted.count += 1
        counted.programs += math.prod(grid)
        counted.kernels[kernel.fn.__name__] += 1

    with watched_launches(count):
        yield counted


def arguments_of(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kernel's parameters by name, with their defaults: what Triton gives to a grid that is a function."""
    own = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **own)
    bound.apply_defaults()
    return bound.arguments


@contextmanager
def watched_launches(seen: Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None]) -> Iterator[None]:
    """Calls `seen(kernel, grid, args, kwargs)` before every launch of a Triton kernel inside the block."""
    if not profile.has_triton:  # then nothing can be launched
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def watching(run: Callable[..., Any]) -> Callable[..., Any]:
        def watching_run(self, *args, grid, warmup, **kwargs):
            if not warmup:
                seen(self, grid(arguments_of(self, args, kwargs)) if callable(grid) else grid, args, kwargs)
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        return watching_run

    with ExitStack() as patches:
        for kind in (InterpretedFunction, JITFunction):
            patches.enter_context(mock.patch.object(kind, "run", watching(kind.run)))
        yield


# --- What kernels and operations move ---------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What kernels read and wrote: addresses in bytes, and how often; masked lanes are left out."""

    read: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)

    @property
    def loaded(self) -> int:
        """Elements read, counted as often as they are."""
        return self.read.total()

    @property
    def stored(self) -> int:
        """Elements written, counted as often as they are."""
        return self.written.total()

    def within(self, t: Tensor) -> int:
        """How many of the elements read lie in t, which is contiguous, counted as often as they are read."""
        first, last = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
        return sum(times for address, times in self.read.items() if first <= address < last)


@contextmanager
def traffic(*, dry: bool = False, only: Tensor | None = None) -> Iterator[Traffic | None]:
    """Counts what Triton kernels load and store inside the block, in the interpreter; None where it is not on.

    With `dry` no memory is touched: loads give the value of masked lanes. With `only` none outside this contiguous
    tensor is. So a kernel can be launched on tensors far larger than this machine (rows 2³⁰ elements apart, say), and
    where it would have read and written be compared with `addresses`: offsets of 32 bits show.
    """
    if not (profile.has_triton and profile.interpret):
        yield None
        return
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(pointers: Any, mask: Any, into: Counter) -> Any:
        # A scalar that was spread over a block is of int8, and a block pointer's mask is a plain array of NumPy.
        inside = np.asarray(mask.data).astype(bool)
        into.update(pointers.data[inside].tolist())
        touched = inside & (not dry)
        if only is not None:
            first, last = only.data_ptr(), only.data_ptr() + only.numel() * only.element_size()
            touched = touched & (pointers.data >= first) & (pointers.data < last)
        return TensorHandle(touched, language.int1)

    def counting_load(self, pointers, mask, *rest):
        return load(self, pointers, note(pointers, mask, seen.read), *rest)

    def counting_store(self, pointers, value, mask, *rest):
        return store(self, pointers, value, note(pointers, mask, seen.written), *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield seen


def addresses(t: Tensor, shape: Sequence[int] | None = None, strides: Sequence[int] | None = None) -> set[int]:
    """The addresses, in bytes, of the elements of t; with `shape` and `strides`, of a tensor laid out so from t on."""
    shape, strides = t.shape if shape is None else shape, t.stride() if strides is None else strides
    found = {t.data_ptr()}
    for size, stride in zip(shape, strides, strict=True):
        found = {start + i * stride * t.element_size() for start in found for i in range(size)}
    return found


class Moved(_LightMode):
    """Bytes that PyTorch's operations read and write, view operations left out: (operation, bytes) in order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, int]] = []

    @property
    def total(self) -> int:
        return sum(size for _, size in self.steps)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        only_written = {argument.name for argument in func._schema.arguments if argument.is_out}  # `out=`
        read = args, {name: value for name, value in kwargs.items() if name not in only_written}
        inputs = [t for t in tree_leaves(read) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        in_place = func.overloadpacket.__name__.endswith("_")
        if in_place or any(t.untyped_storage().data_ptr() not in known for t in results):
            self.steps.append((func.overloadpacket.__name__.strip("_"), sum(t.nbytes for t in inputs + results)))
        return out


def moved() -> Moved:
    """`with moved() as work:` … then `work.steps`, a list of (operation, bytes read and written), and `work.total`."""
    return Moved()
