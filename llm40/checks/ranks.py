"""What the processes of a distributed lesson send and hold, and many cases in one launch of them."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llm40.distributed import launch

PATIENCE = 15.0  # seconds until a launch that hangs is ended

# Methods of a process group, beneath the functions of torch.distributed.
OPERATIONS = {
    "send": "message",
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "allgather": "all-gather",
    "all_gather_single": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "_allgather_base": "all-gather",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
}


@contextmanager
def communication() -> Iterator[list[tuple[str, int]]]:
    """`with communication() as log:` … (kind, elements of the whole tensor) of all that this rank asks of its process
    groups, in order. The kinds are the values of `OPERATIONS`; operations that only receive are left out.
    """
    log: list[tuple[str, int]] = []
    with ExitStack() as patches:
        for name, kind in OPERATIONS.items():
            if hasattr(dist.ProcessGroup, name):  # PyTorch's versions differ
                patches.enter_context(mock.patch.object(dist.ProcessGroup, name, _noting(name, kind, log)))
        yield log


def _noting(name: str, kind: str, log: list[tuple[str, int]]) -> Callable:
    """A process group's method, which writes down that it was called."""
    act = getattr(dist.ProcessGroup, name)

    def note(group: Any, *args: Any, **kwargs: Any) -> Any:
        log.append((kind, max(sum(t.numel() for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args)))
        return act(group, *args, **kwargs)

    return note


def on_ranks(
    ranks: int, act: Callable[[int, Any], Any], cases: Iterable, first: Callable[[int], object] | None = None
) -> list[list]:
    """What act(rank, case) gives, all cases one after another in one launch: [case][rank].

    `first(rank)` is what each rank does before.
    """

    def all_cases(rank: int) -> list:
        if first is not None:
            first(rank)
        return [act(rank, case) for case in cases]

    return [list(of_case) for of_case in zip(*launch(all_cases, ranks, timeout=PATIENCE), strict=True)]


def held_elements(thing: object, besides: Iterable[Tensor] = ()) -> int:
    """Elements in all tensors that an object leads to, each storage once and whole, but for those of `besides`.

    Gradients and what functions keep in closures are not counted.
    """
    counted = {t.untyped_storage().data_ptr() for t in besides}
    elements, visited, todo = 0, set(), [thing]
    while todo:
        value = todo.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if not value.is_meta and storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                elements += storage.nbytes() // value.element_size()
        elif not isinstance(value, type | ModuleType | FunctionType | MethodType | GeneratorType | FrameType):
            todo += gc.get_referents(value)
    return elements
