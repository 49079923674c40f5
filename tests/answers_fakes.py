"""Fakes: what nobody should get points for, made from the reference while it runs.

A fake takes the place of a target in the notebook's namespace: a function, `Class.method`, a Triton kernel or a value.
Before that, `Recorder` takes the same places while the checks run once, and tells which fakes make a difference.
"""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from types import FunctionType

import numpy
import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def unseen() -> Iterator[None]:
    """Checks that count or forbid PyTorch's operations do not see those inside the block."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


# --- fakes of results: what becomes of each tensor, array or number; the same object where nothing does ---------------


def zeros(leaf):
    if isinstance(leaf, torch.Tensor):
        return torch.zeros_like(leaf)
    return numpy.zeros_like(leaf) if isinstance(leaf, (numpy.ndarray, numpy.generic)) else type(leaf)(0)


def detached(leaf):
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


def rounded(leaf):
    """To bfloat16 and back."""
    if isinstance(leaf, int) or (isinstance(leaf, (numpy.ndarray, numpy.generic)) and leaf.dtype.kind != "f"):
        return leaf
    values = torch.as_tensor(leaf)
    if values.dtype not in (torch.float16, torch.float32, torch.float64):
        return leaf
    coarse = values.bfloat16().to(values.dtype)
    if torch.equal(coarse.nan_to_num(), values.nan_to_num()):
        return leaf
    if isinstance(leaf, torch.Tensor):
        return coarse
    return type(leaf)(coarse.item()) if isinstance(leaf, (float, numpy.generic)) else coarse.numpy()


def first_row(leaf):
    """The first row in place of every other one, along the first of several axes."""
    if not isinstance(leaf, (torch.Tensor, numpy.ndarray)) or leaf.ndim < 2 or bool((leaf[1:] == leaf[:1]).all()):
        return leaf
    if isinstance(leaf, torch.Tensor):
        return leaf[:1].expand_as(leaf).clone()
    return numpy.repeat(leaf[:1], len(leaf), axis=0)


OF_RESULTS = {"zeros": zeros, "detached": detached, "bfloat16": rounded, "row": first_row}


def changed(change: Callable, value):
    """A result with each tensor, array and number in it changed, and whether that made any difference."""
    if isinstance(value, (torch.Tensor, numpy.ndarray, numpy.generic, bool, int, float)):
        new = change(value)
        return new, new is not value
    if type(value) is dict:
        parts = [changed(change, v) for v in value.values()]
        return dict(zip(value, (v for v, _ in parts), strict=True)), any(c for _, c in parts)
    if isinstance(value, tuple) or type(value) is list:
        parts = [changed(change, v) for v in value]
        new = [v for v, _ in parts]
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new), any(c for _, c in parts)
    return value, False


# --- fakes of arguments ----------------------------------------------------------------------------------------


def tensors(arguments: list) -> list:
    """The tensors and arrays among the arguments, and in lists of them."""
    found = []
    for a in arguments:
        found += tensors(a) if type(a) in (list, tuple) else [a] if isinstance(a, (torch.Tensor, numpy.ndarray)) else []
    return found


def state(value):
    """What differs once a tensor or an array has been changed in place."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version
    return value.tobytes()


def untouched(value, before) -> bool:
    return before is not None and state(value) == before


def spoil(value) -> None:
    """Change a tensor or an array in place, where it can be written to."""
    with torch.no_grad():
        try:
            if value.dtype in (torch.bool, numpy.dtype(bool)):
                value ^= True
            else:
                value += 1
        except (RuntimeError, ValueError):  # a broadcast view, a read-only array
            return


GENERATORS = {
    torch.Generator: lambda old: _seeded(torch.Generator(old.device)),
    numpy.random.Generator: lambda _: numpy.random.default_rng(),
    random.Random: lambda _: random.Random(),
}


def _seeded(generator: torch.Generator) -> torch.Generator:
    generator.seed()
    return generator


def fresh(value):
    """Another generator in the place of a generator; anything else as it is."""
    return GENERATORS[type(value)](value) if type(value) in GENERATORS else value


# --- in the place of a target ------------------------------------------------------------------------------------


class Fake:
    """kind: "none", "zeros", "first", "in-place", "detached", "generator", "bfloat16" or "row"."""

    def __init__(self, kind: str):
        self.kind = kind

    def function(self, real: Callable, bound: int) -> Callable:
        """The fake of a function. bound: how many of its first arguments are `self` or the like."""

        @functools.wraps(real)
        def fake(*args, **kwargs):
            inputs = tensors([*args[bound:], *kwargs.values()])
            if self.kind == "none":
                return None
            if self.kind == "first":
                return inputs[0] if inputs else real(*args, **kwargs)
            if self.kind == "generator":
                return real(*map(fresh, args), **{k: fresh(v) for k, v in kwargs.items()})
            before = [state(t) for t in inputs] if self.kind == "in-place" else []
            result = real(*args, **kwargs)
            with unseen():
                for value, old in zip(inputs, before, strict=False):
                    if untouched(value, old):
                        spoil(value)
                return self.value(result)

        return fake

    def kernel(self, real):
        return IdleKernel(real) if self.kind == "none" else real

    def value(self, real):
        if self.kind == "none":
            return None
        return changed(OF_RESULTS[self.kind], real)[0] if self.kind in OF_RESULTS else real


class IdleKernel:
    """A kernel whose launch does nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getattr__(self, name: str):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class Recorder:
    """Takes the place of one target, does what it does, and keeps in `kinds` which fakes would make a difference."""

    def __init__(self):
        self.kinds: set[str] = set()

    def function(self, real: Callable, bound: int) -> Callable:
        @functools.wraps(real)
        def recorded(*args, **kwargs):
            arguments = [*args[bound:], *kwargs.values()]
            inputs = tensors(arguments)
            before = [state(t) for t in inputs]
            result = real(*args, **kwargs)
            with unseen():
                self.value(result)
                if inputs:
                    self.kinds.add("first")
                if any(map(untouched, inputs, before)):
                    self.kinds.add("in-place")
                if any(type(a) in GENERATORS for a in arguments):
                    self.kinds.add("generator")
            return result

        return recorded

    def kernel(self, real):
        self.kinds.add("none")
        return real

    def value(self, real):
        self.kinds.add("none")
        self.kinds |= {kind for kind in OF_RESULTS.keys() - self.kinds if changed(OF_RESULTS[kind], real)[1]}
        return real


def replace_target(namespace: dict, target: str, by: Fake | Recorder) -> None:
    owner, _, method = target.partition(".")
    if method:
        cls = namespace[owner]
        raw = cls.__dict__.get(method)
        wrap = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
        real = raw.__func__ if wrap else raw
        if isinstance(real, FunctionType):
            new = by.function(real, bound=0 if wrap is staticmethod else 1)
            setattr(cls, method, wrap(new) if wrap else new)
        return
    real = namespace.get(owner)
    if isinstance(real, FunctionType):
        namespace[owner] = by.function(real, bound=0)
    elif hasattr(real, "__getitem__") and hasattr(real, "fn"):  # a Triton kernel, maybe autotuned
        namespace[owner] = by.kernel(real)
    elif not callable(real):
        namespace[owner] = by.value(real)


# --- strides that a kernel could mix up --------------------------------------------------------------------------


class Strides:
    """Watches launches of kernels for pairs of tensors whose strides a mistaken kernel could exchange unnoticed.

    The stride arguments of a tensor `x_ptr` are named `x_row`, `x_head` and so on. Two tensors with stride arguments
    for the same axes are a pair, but for two results, whose strides the code under test chooses.
    """

    def __init__(self, kernels: list[str]):
        self.kernels = kernels
        self.pairs: dict[tuple[str, str, str], bool] = {}  # (kernel, tensor, tensor) → whether they ever differed
        self.written: set[tuple[str, str]] = set()

    def watch(self) -> None:
        """From now on, in this process."""
        try:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction
        except ImportError:  # no Triton here
            return
        for kind in (InterpretedFunction, JITFunction):
            kind.run = self.watched(kind.run)

    def watched(self, run: Callable) -> Callable:
        @functools.wraps(run)
        def watched_run(kernel, *args, **kwargs):
            name = kernel.fn.__name__
            if name not in self.kernels:
                return run(kernel, *args, **kwargs)
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            strides = {
                a.removesuffix("_ptr"): {
                    b.removeprefix(a.removesuffix("ptr")): value
                    for b, value in given.items()
                    if isinstance(value, int) and b.startswith(a.removesuffix("ptr")) and b != a
                }
                for a in given
                if a.endswith("_ptr") and isinstance(given[a], torch.Tensor)
            }
            with unseen():
                before = {x: given[f"{x}_ptr"].clone() for x in strides if (name, x) not in self.written}
            result = run(kernel, *args, **kwargs)
            with unseen():
                self.written |= {(name, x) for x, old in before.items() if not _same(old, given[f"{x}_ptr"])}
            for x, y in permutations(strides, 2):
                if x < y and strides[x] and strides[x].keys() == strides[y].keys():
                    self.pairs[name, x, y] = self.pairs.get((name, x, y), False) or strides[x] != strides[y]
            return result

        return watched_run

    def never_differ(self) -> list[str] | None:
        """A sentence for each pair that no launch tells apart; None where there is no pair."""
        pairs = {p: d for p, d in self.pairs.items() if not {(p[0], p[1]), (p[0], p[2])} <= self.written}
        if not pairs:
            return None
        return [f"{x} and {y} have the same strides in every launch of {k}" for (k, x, y), d in pairs.items() if not d]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())
