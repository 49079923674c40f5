"""A call over the link inside the transforms of torch.func: `jacrev`, `grad`, `vmap`.

Tensors inside a transform are wrapped and have no value that could pass. An autograd function unwraps them, calls with
plain tensors, and defines each transform: a gradient is a call that pulls back, a batch is a loop.
"""

from collections.abc import Callable

import torch
from torch import Tensor, enable_grad
from torch.utils._pytree import tree_flatten, tree_unflatten

OfTensors = Callable[..., tuple[Tensor, ...]]
TENSOR = object()  # stands for a tensor among the parts of a result


def has_wrapped(args: tuple, kwargs: dict) -> bool:
    return any(torch.is_tensor(each) and is_wrapped(each) for each in tree_flatten((args, kwargs))[0])


def is_wrapped(t: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def call_wrapped(function: Callable[[tuple, dict], object], args: tuple, kwargs: dict) -> object:
    """Calls `function(args, kwargs)` with arguments that are wrapped."""
    leaves, shape = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
    result: dict = {}  # its parts, with TENSOR for each tensor, and its shape

    def act(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for place, value in zip(places, inputs, strict=True):
            given[place] = value
        parts, result["shape"] = tree_flatten(function(*tree_unflatten(given, shape)))
        result["parts"] = [TENSOR if torch.is_tensor(part) else part for part in parts]
        return tuple(part for part in parts if torch.is_tensor(part))

    made = iter(Applied.apply(TensorFunction(act, keeps=True), *(leaves[place] for place in places)))
    parts = [next(made) if part is TENSOR else part for part in result["parts"]]
    return tree_unflatten(parts, result["shape"])


class TensorFunction:
    """A function of tensors. One that `keeps` the graphs of its calls is not called again for their gradients."""

    def __init__(self, function: OfTensors, keeps: bool = False):
        self.function, self.keeps = function, keeps
        self.kept: list[tuple] = []  # (inputs, their copies that gather gradients, results)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = self.build_graph(inputs)[1] if self.keeps else self.function(*inputs)
        return tuple(result.detach() for result in results)

    def build_graph(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The inputs, as tensors that require gradients if they can, and the results as functions of them."""
        if any(t.requires_grad for t in inputs):
            return inputs, self.function(*inputs)
        for known, leaves, results in self.kept:
            if all(torch.equal(a, b) for a, b in zip(known, inputs, strict=True)):
                return leaves, results
        leaves = tuple(t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in inputs)
        with enable_grad():
            results = self.function(*leaves)
        self.kept.append((tuple(t.clone() for t in inputs), leaves, results))
        return leaves, results


def make_pull_back(function: TensorFunction, count: int) -> OfTensors:
    """Makes the function (`count` inputs, gradients at the results) → gradients at the inputs that can have one."""

    def act(*tensors: Tensor) -> tuple[Tensor, ...]:
        again = torch.is_grad_enabled()
        with enable_grad():
            inputs, results = function.build_graph(tensors[:count])
            wanted = [t for t in inputs if t.is_floating_point() or t.is_complex()]
            pairs = [(r, g) for r, g in zip(results, tensors[count:], strict=True) if r.requires_grad]
            if not pairs:
                return tuple(torch.zeros_like(t) for t in wanted)
            outputs, given = zip(*pairs, strict=True)
            return torch.autograd.grad(
                outputs, wanted, given, retain_graph=True, create_graph=again, materialize_grads=True
            )

    return act


class Applied(torch.autograd.Function):
    """Applies a TensorFunction, in any transform."""

    @staticmethod
    def forward(function, *inputs):
        return function(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.mark_non_differentiable(*(t for t in output if not (t.is_floating_point() or t.is_complex())))

    @staticmethod
    def backward(ctx, *cotangents):
        inputs = ctx.saved_tensors
        pull_back = TensorFunction(make_pull_back(ctx.function, len(inputs)))
        gradients = iter(Applied.apply(pull_back, *inputs, *cotangents))
        return None, *(next(gradients) if t.is_floating_point() or t.is_complex() else None for t in inputs)

    @staticmethod
    def vmap(info, in_dims, function, *inputs):
        def take_row(i):
            return (t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims[1:], strict=True))

        rows = [Applied.apply(function, *take_row(i)) for i in range(info.batch_size)]
        results = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        return results, (0,) * len(results)
