"""Buffers with canaries, which tell a kernel that reads or writes where it should not.

Triton's interpreter checks no bounds, and a GPU checks those of the whole memory only.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llm40.checks.values import same_bits


@dataclass
class Guarded:
    """A tensor inside a larger buffer whose other elements are canaries."""

    tensor: Tensor
    buffer: Tensor
    inside: Tensor  # True where the buffer belongs to the tensor
    what: str

    def intact(self) -> None:
        """Nothing was written outside the tensor."""
        outside = self.buffer[~self.inside]
        if not bool(_is_canary(outside).all()):
            raise AssertionError(
                f"a kernel wrote outside {self.what} {tuple(self.tensor.shape)}: "
                f"{int((~_is_canary(outside)).sum())} elements beyond its edge were overwritten. "
                "Is every store masked at the edge of the rows and of the sequence, and does each "
                "tensor use its own strides?"
            )


def guarded(values: Tensor, *, row_pad: int = 0, what: str = "the buffer", margin: int = 256) -> Guarded:
    """`values` copied into a buffer of NaN (of a large number, for integers), with `margin` canaries before and after.

    With `row_pad`, as many canaries follow every row of the last axis, so that the rows are `size + row_pad` apart: a
    kernel that takes the row stride for the row's length, or reads past a ragged row, meets them.
    """
    pads = [0] * (values.dim() - 1) + [row_pad] if values.dim() else []
    return _placed(values, pads, range(values.dim()), what, margin)


class Buffers:
    """The tensors of a kernel, each in a buffer of its own, by name: `held.q`."""

    def __init__(self, guards: dict[str, Guarded]) -> None:
        self.guards = guards

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["guards"][name].tensor
        except KeyError:
            raise AttributeError(f"no tensor is called {name!r} here") from None

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors in the order in which they were given."""
        return (guard.tensor for guard in self.guards.values())


@contextmanager
def buffers(
    *, written: Sequence[str] = (), contiguous: Sequence[str] = (), margin: int = 256, **tensors: Tensor
) -> Iterator[Buffers]:
    """Each tensor of a kernel in a padded buffer of its own, no two with the same strides.

        with checks.buffers(q=q, k=k, v=v, do=do) as held:
            dq = flash_backward(held.q, held.k, held.v, held.do)

    The values are copied. Between and around them stand canaries: NaN, or the largest integer. The last axis has stride
    1; every other axis is padded by a number that is the tensor's own, and every second tensor of three or more axes
    has its outer axes in reverse order in memory, as (batch, heads, seq, dim) has after a transpose of (batch, seq,
    heads, dim). So a kernel that uses another tensor's strides, or reads past an edge, meets NaN; `contiguous` names
    the tensors that the exercise says are contiguous (canaries around them only); a tensor of one axis always is.

    At the end of the block no canary may have changed, nor any tensor but those that `written` names.
    """
    unknown = {*written, *contiguous} - tensors.keys()
    if unknown:
        raise ValueError(f"no tensor is called {', '.join(sorted(unknown))}; there are {', '.join(tensors)}")
    guards = {}
    for i, (name, values) in enumerate(tensors.items()):
        axes = list(range(values.dim()))
        pads = [0] * values.dim()
        if name not in contiguous and values.dim() > 1:
            pads = [1 + i] * (values.dim() - 1) + [3 + 2 * i]
            if i % 2:
                axes[:-1] = axes[-2::-1]
        guards[name] = _placed(values, pads, axes, name, margin)
    yield Buffers(guards)
    for name, guard in guards.items():
        guard.intact()
        if name not in written and not same_bits(guard.tensor, tensors[name].detach()):
            raise AssertionError(f"{name} was changed in place: a kernel writes to its outputs only.")


def _placed(values: Tensor, pads: Sequence[int], axes: Sequence[int], what: str, margin: int) -> Guarded:
    """`values` in a buffer where axis a has room for `pads[a]` more, and the axes lie in the order `axes`."""
    room = [values.shape[a] + pads[a] for a in axes]
    size = math.prod(room)
    buffer = torch.full((2 * margin + size,), _canary(values.dtype), dtype=values.dtype, device=values.device)
    inside = torch.zeros_like(buffer, dtype=torch.bool)

    def view(of: Tensor) -> Tensor:
        laid = of[margin : margin + size].view(room).permute([axes.index(a) for a in range(len(axes))])
        return laid[tuple(slice(n) for n in values.shape)]

    tensor = view(buffer)
    tensor.copy_(values.detach())
    view(inside).fill_(True)
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
    MAKERS = frozenset(
        f"{prefix}{kind}{suffix}"
        for kind in ("empty", "zeros", "ones", "full")
        for prefix, suffix in (("", ""), ("", "_like"), ("new_", ""))
    )

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
