# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: >-
#       One model cut apart, in real processes: layers by their columns and rows, a loss over a
#       vocabulary that no rank has whole, pipelines, attention over sequences that are cut, experts
#       that live elsewhere, and a plan that puts these together.
#     gpu: "Nothing more: all of it is processes that talk through gloo, on Linux or macOS."
# ---

# %% [markdown]
# ## The problem
#
# Lesson 19 cut the *batch*: every rank computes with the whole model. That ends in three ways. One
# example of 128,000 tokens does not fit, whatever is sharded. One large layer takes one GPU too
# long. And with a fixed batch there are at some point more ranks than examples. So this lesson cuts
# the computation of *one* example. There are few places to cut:
#
# - **Tensor parallel** cuts every matrix: each rank has some columns or rows of it.
# - **Sequence parallel** and **context parallel** cut the sequence: each rank has some tokens.
# - **Pipeline parallel** cuts the depth: each rank has some layers.
# - **Expert parallel** cuts a mixture of experts: each rank has some experts.
#
# Each pays with messages of another kind, and the whole art is to know which and how many bytes.
# The law of lesson 19 holds on: *p ranks must do exactly what one process would do.* Here it is
# about gradients, too, and that is where cut models are usually wrong: the forward pass is right,
# the loss falls, and one rank's gradients lack the other ranks' share.

# %%
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # backward passes load it: here once, not in each rank
import torch.nn.functional as F
from llm40 import checks, plot
from llm40.distributed import launch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

# %% [markdown]
# As in lesson 19, `launch(function, 2)` runs `function(rank)` in two forked processes, and
# `checks.communication()` writes down what a rank asks of its process groups.


# %% tags=["support"]
# Support: groups of ranks, and leaves in float64
@checks.measured
def group_of(members: tuple[tuple[int, ...], ...]) -> object:
    """The group of these that this rank is in, None (all ranks) for none. All ranks call it."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    return next((g for g, m in zip(groups, members, strict=True) if dist.get_rank() in m), None)


def mates(rank: int, ranks: int, members: tuple = ()) -> tuple[int, ...]:
    """The ranks in the group of this one: of these groups, or all ranks."""
    return next((m for m in members if rank in m), tuple(range(ranks)))


def wide(t: Tensor) -> Tensor:
    """A leaf of its own, in float64."""
    return t.detach().double().clone().requires_grad_()


def kinds(log: list) -> list[str]:
    return [kind for kind, _ in log]


@checks.measured
def run(function: Callable, x: Tensor, cotangent: Tensor, members: tuple = (), **options) -> dict:
    """function(x, group, …) on this rank, and the gradient of x for a cotangent of the result."""
    group = group_of(members)
    leaf = x.detach().requires_grad_()
    before, dy = leaf.detach().clone(), cotangent.clone()
    with checks.communication() as forward:
        y = function(leaf, group=group, **options)
    assert isinstance(y, Tensor), f"a tensor is asked for, not {type(y).__name__}"
    assert y.requires_grad, "the result carries no gradient: is it an autograd.Function?"
    value = y.detach().clone()
    with checks.communication() as backward:
        gradient = torch.autograd.grad(y, leaf, cotangent)[0]
    assert torch.equal(leaf, before), "x was changed in place: work on a copy"
    assert torch.equal(cotangent, dy), (
        "the gradient that comes in was changed in place: autograd may hand it to others, too"
    )
    return {"y": value, "dx": gradient, "forward": list(forward), "backward": list(backward)}


# %% [markdown]
# ## Groups, and a mesh of them {#mesh}
#
# Real runs cut in several ways at once. 16 ranks may be 2 replicas × 2 stages × 4 tensor ranks.
# They are thought of as a **mesh**, an array of ranks with named axes, and each line of it along an
# axis is a group with collectives of its own. The axis that talks most is the last: its ranks are
# neighbors, inside one machine.


# %% tags=["experiment"]
def mesh_groups(rank: int) -> dict[str, list[int]]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return {n: dist.get_process_group_ranks(mesh.get_group(n)) for n in ("data", "tensor")}


for rank, groups in enumerate(launch(mesh_groups, 4)):
    print(f"rank {rank} of a 2 × 2 mesh:", groups)

# %% [markdown]
# So every function of this lesson takes a `group`, and means it: rank and number of ranks are those
# *in the group*, `dist.get_rank(group)` and `dist.get_world_size(group)`. A function that uses all
# ranks instead works until the mesh gets a second axis.

# %% [markdown]
# ## Tensor parallel {#tensor-parallel}
#
# A layer $y = xW^\top$ with $W$ of shape (out, in) can be cut in two ways.
#
# **Column parallel**: each rank has some outputs, that is some rows of PyTorch's $W$ (columns of
# $W^\top$: hence the name). $x$ is whole on all ranks, $y$ comes out cut. Nothing is sent.
#
# **Row parallel**: each rank has some inputs. $x$ is cut, each rank gets a whole $y$, but only its
# share of the sum: $y=\sum_r x_r W_r^\top$, an all-reduce.
#
# A column-parallel layer followed by a row-parallel one makes a whole MLP with *one* all-reduce.
# GELU acts on each output alone, a gate on pairs that are cut alike, attention within a head: none
# of them needs another rank. With $y=\phi(xA^\top)B^\top$:
#
# $$ y = \sum_r \phi(x A_r^\top)\, B_r^\top . $$
#
# In one process, with the ranks in a loop:

# %% tags=["experiment"]
torch.manual_seed(0)
x, a, b = torch.randn(4, 6), torch.randn(8, 6), torch.randn(3, 8)
halves = zip(a.chunk(2, dim=0), b.chunk(2, dim=1), strict=True)  # columns of aᵀ, rows of bᵀ
shares = [F.gelu(x @ a_r.T) @ b_r.T for a_r, b_r in halves]
print("largest difference from the dense MLP:")
print(f"  the sum of both shares {(sum(shares) - F.gelu(x @ a.T) @ b.T).abs().max():.1e}")
print(f"  one share alone        {(shares[0] - F.gelu(x @ a.T) @ b.T).abs().max():.1e}")

# %% [markdown]
# Now backward. $\partial L/\partial x = \sum_r (\dots)A_r$: every rank has used $x$ for its own
# columns, so each knows only *its* share of the gradient of $x$, and here is a second all-reduce.
# Two operators say all of this; each is the other's mirror image, hence **conjugate**:
#
# | | forward | backward | stands |
# |---|---|---|---|
# | $f$ | nothing | all-reduce | before the column-parallel layer |
# | $g$ | all-reduce | nothing | after the row-parallel layer |
#
# Why is the backward of $g$ *nothing*, if $y=\sum_r y_r$ was summed? $\partial y/\partial y_r = 1$,
# and all ranks then compute the *same* loss from the same $y$: it is one loss, not $p$ of them.
# Whoever sums $\partial L/\partial y$ over the ranks counts it $p$ times.


# %% exercise="conjugate_operators" minutes=12 difficulty=1
def copy_to_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """f: x as it is; its gradient is the sum over the group of the gradients that come back.

    x: floating point, any shape and strides, the same on all ranks of `group` (all if None).
    Forward nothing is sent, backward one all-reduce of x's size. x and incoming gradients stay
    unchanged, and may be non-contiguous (`y.sum().backward()` sends an expanded one).
    """
    ### BEGIN SOLUTION
    return _Copy.apply(x, group)
    ### END SOLUTION


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """g: the sum of x over the group; the gradient is what comes back, as it is.

    x: each rank's own, of one shape. Forward one all-reduce, backward nothing. Everything else is
    as in copy_to_ranks.
    """
    ### BEGIN SOLUTION
    return _Sum.apply(x, group)
    ### END SOLUTION


# Here is room for your classes of torch.autograd.Function.
### BEGIN SOLUTION
def all_reduced(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return all_reduced(dy, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


### END SOLUTION

# %% [markdown]
# <details><summary>Hint: where to write a backward pass</summary>
#
# In a class of `torch.autograd.Function`: `forward(ctx, x, group)` and `backward(ctx, dy)`, both
# static; keep the group as `ctx.group`; `backward` returns one value for each argument of forward,
# None for the group. Your function returns `Name.apply(x, group)`.
# </details>
#
# <details><summary>Hint: dist.all_reduce changes its argument</summary>
#
# So it gets a contiguous copy: `x.clone(memory_format=torch.contiguous_format)`.
# </details>


# %% check="conjugate_operators" points=2
def run_operator(rank: int, case: tuple) -> dict:
    operator, xs, cotangents, *members = case
    return run(operator, xs[rank], cotangents[rank], *members)


def compare_operators(cases: list[tuple]) -> None:
    """Cases are pairs, copy then sum, of (operator, xs, cotangents, groups)."""
    ranks = len(cases[0][1])
    for i, (case, results) in enumerate(
        zip(cases, checks.on_ranks(ranks, run_operator, cases), strict=True)
    ):
        _, xs, dys, *members = case
        dtype, copies = xs[0].dtype, i % 2 == 0
        for rank, result in enumerate(results):
            mine = mates(rank, ranks, *members)
            total = sum(xs[r].double() for r in mine).to(dtype)
            gradient = sum(dys[r].double() for r in mine).to(dtype)
            name = "copy_to_ranks" if copies else "sum_over_ranks"
            checks.close(
                result["y"],
                xs[rank] if copies else total,
                what=f"{name} on rank {rank}",
                dtype=dtype,
                mistakes={"the mean": total / len(mine)},
            )
            checks.close(
                result["dx"],
                gradient if copies else dys[rank],
                what=f"the gradient that {name} passes back on rank {rank}",
                dtype=dtype,
                mistakes={
                    "the gradient of this rank alone": dys[rank],
                    "summing the gradient over the ranks": gradient,
                    "the mean": gradient / len(mine),
                },
            )
            logs = (result["forward"], result["backward"])
            due = ([], [("all-reduce", total.numel())])
            assert logs == (due if copies else due[::-1]), (
                f"{name} asks {logs[0] or 'nothing'} forward and {logs[1] or 'nothing'} backward; "
                "one all-reduce is asked for, in one of the two"
            )


x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
parts = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
compare_operators([(copy_to_ranks, x, 2 * parts), (sum_over_ranks, parts, 3 * x)])
### BEGIN HIDDEN TESTS
g = checks.generator(1)
cases = []
for shape, dtype in (((2, 3), torch.float64), ((4,), torch.bfloat16), ((), torch.float32)):
    x = torch.randn(1, *shape, generator=g).to(dtype).expand(3, *shape)
    drawn = torch.randint(-9, 9, (2, 3, *shape), generator=g).to(dtype)
    drawn = drawn / 3 if dtype == torch.float64 else drawn  # thirds have all its digits
    cases += [(copy_to_ranks, x, drawn[0]), (sum_over_ranks, drawn[1], drawn[0][:1].expand_as(x))]
uneven = torch.randn(3, 3, 5, generator=g)
cases += [  # not contiguous, and expanded
    (copy_to_ranks, uneven.mT, uneven[:, :1, :1].expand(3, 5, 3), ((0, 2), (1,))),
    (sum_over_ranks, uneven.mT, uneven[:, :1, :1].expand(3, 5, 3), ((0, 2), (1,))),
]
compare_operators(cases)
### END HIDDEN TESTS

# %% [markdown]
# Now the layers. Both are made from a dense `nn.Linear` that all ranks have (in a real run each
# rank draws or loads only its part), and keep copies of their parts.
#
# The bias needs a thought. Column parallel: cut as the outputs are. Row parallel: it belongs to the
# whole $y$, once. Added on each rank before the sum, it counts $p$ times; so it is added after. All
# ranks keep it whole, with the same gradient.
#
# And attention? Query, key and value projections are column parallel, by whole heads; the output
# projection is row parallel: one all-reduce forward and one backward, as in the MLP. A projection
# that computes q, k and v at once must be cut in each of its three parts; cut in $p$ pieces as it
# stands, rank 0 of 4 would get queries only. Where there are fewer KV heads than ranks (grouped
# queries, lesson 09) they are **replicated**: two ranks keep the same KV head, and its gradient is
# their sum.


# %% exercise="parallel_linears" minutes=25 difficulty=2
class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are cut among the ranks of `group`.

    linear: nn.Linear of float32 or float64, the same on all ranks, with or without bias; it stays
    as it is and nothing of it is kept. Parameters, in linear's dtype: `weight`, this rank's rows of
    linear.weight, and `bias`, its part of linear.bias (None if there is none). Parts are those of
    torch.tensor_split: sizes need not be divisible.

    forward(x): x (…, in), whole and the same on all ranks, gives this rank's part (…, out part).
    Backward, the gradient of x is the whole one on all ranks: one all-reduce of x's size, and
    nothing else is ever sent.
    """

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks)[rank].clone())
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().tensor_split(ranks)[rank].clone())
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return F.linear(copy_to_ranks(x, self.group), self.weight, self.bias)
        ### END SOLUTION


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are cut among the ranks of `group`.

    As above, but `weight` is this rank's columns of linear.weight (out, in part), and `bias` is
    all of linear.bias.

    forward(x): x (…, in part) gives the whole (…, out), the same on all ranks, with the bias in it
    once: one all-reduce of the result's size. Backward nothing is sent: the gradient of the result
    is whole on all ranks already.
    """

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks, dim=1)[rank].clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        y = sum_over_ranks(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a part that holds on to the whole</summary>
#
# `weight.tensor_split(ranks)[rank]` is a view: as long as it lives, so does the whole weight.
# `.clone()` it.
# </details>
#
# <details><summary>Hint: which operator, where</summary>
#
# $f$ before the first product, $g$ after the second: each pass has one all-reduce.
# </details>


# %% tags=["support"]
# Support: a column-parallel and a row-parallel layer on one rank, and in one process
def dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


@checks.measured
def parallel_pair(make: tuple, layers: list, x: Tensor, dy: Tensor, members: tuple = ()) -> dict:
    """Row-parallel(tanh(column-parallel(x))) on one rank. layers: two of (weight, bias)."""
    group = group_of(members)
    linears = [dense(*layer) for layer in layers]
    modules = [kind(linear, group) for kind, linear in zip(make, linears, strict=True)]
    for linear, layer in zip(linears, layers, strict=True):
        assert torch.equal(linear.weight, layer[0]), "the dense layer was changed"
    with torch.no_grad():
        parts = [p for module in modules for p in module.parameters()]
        before = [p.clone() for p in parts]
        for p in [p for linear in linears for p in linear.parameters()]:
            p.zero_()
    assert all(map(torch.equal, parts, before)), (
        "a part shares memory with the dense layer, which others may train on: clone it"
    )
    del linears, linear, p
    x = x.detach().requires_grad_()
    with checks.communication() as forward:
        hidden = modules[0](x)
        y = modules[1](torch.tanh(hidden))
    with checks.communication() as backward:
        y.backward(dy)
    return {
        "held": checks.held_elements(modules),
        "hidden": hidden.detach(),
        "y": y.detach(),
        "dx": x.grad,
        "parameters": [{n: p.detach() for n, p in m.named_parameters()} for m in modules],
        "gradients": [{n: p.grad for n, p in m.named_parameters()} for m in modules],
        "forward": list(forward),
        "backward": list(backward),
    }


def draw_pair(widths: tuple[int, int, int], shape: tuple, g: torch.Generator, **how) -> tuple:
    """Two layers (weight, bias) of these widths, an x and a cotangent."""
    bias, dtype = how.get("bias", True), how.get("dtype", torch.float64)
    layers = [
        (
            (torch.randn(b, a, generator=g) / a**0.5).to(dtype),
            torch.randn(b, generator=g).to(dtype) if bias else None,
        )
        for a, b in pairwise(widths)
    ]
    x = torch.randn(*shape, widths[0], generator=g).to(dtype)
    return layers, x, torch.randn(*shape, widths[2], generator=g).to(dtype)


def compare_pairs(ranks: int, make: tuple, *cases: tuple) -> list[list[dict]]:
    """Cases of (layers, x, dy) or (layers, x, dy, groups), against dense layers in one process."""
    results = checks.on_ranks(ranks, lambda rank, case: parallel_pair(make, *case), cases)
    for case, found in zip(cases, results, strict=True):
        compare_pair(found, *case)
    return results


def compare_pair(results: list, layers: list, x: Tensor, dy: Tensor, members: tuple = ()) -> None:
    tensors = [[None if t is None else wide(t) for t in layer] for layer in layers]
    (a, a_bias), (b, b_bias) = tensors
    whole_x = wide(x)
    hidden = F.linear(whole_x, a, a_bias)
    y = F.linear(torch.tanh(hidden), b, b_bias)
    hidden.retain_grad()
    y.backward(dy.double())
    for rank, result in enumerate(results):
        mine = mates(rank, len(results), members)
        r, p = mine.index(rank), len(mine)
        part = hidden.grad.tensor_split(p, dim=-1)[r] @ a.tensor_split(p)[r]

        def same(got: Tensor, due: Tensor, what: str, where=f", rank {r} of {p}", **known) -> None:
            checks.close(
                got,
                due.detach().to(x.dtype),
                what=what + where,
                dtype=x.dtype,
                rtol=1e-9 if x.dtype == torch.float64 else 3e-5,
                mistakes={n.replace("_", " "): m.detach().to(x.dtype) for n, m in known.items()},
            )

        same(result["hidden"], hidden.tensor_split(p, -1)[r], "the column-parallel layer's output")
        bias = 0 if b_bias is None else b_bias
        same(
            result["y"],
            y,
            "the row-parallel layer's output",
            the_bias_added_on_every_rank=y + (p - 1) * bias,
            a_mean_over_the_ranks=y / p,
        )
        same(
            result["dx"],
            whole_x.grad,
            "the gradient of x",
            this_rank_s_share_alone=part,
            a_gradient_summed_twice=whole_x.grad * p,
        )
        due = {
            (0, "weight"): (a, 0),
            (0, "bias"): (a_bias, 0),
            (1, "weight"): (b, 1),
            (1, "bias"): (b_bias, None),
        }
        for i, name in due:
            whole, dim = due[i, name]
            names = set(result["parameters"][i])
            if whole is None:
                assert name not in names, "the dense layer has no bias, the parallel one has"
                continue
            assert name in names, f"the parameters are weight and bias; yours are {sorted(names)}"
            what = f"the {'column' if i == 0 else 'row'}-parallel layer's {name}"
            cut = [t if dim is None else t.tensor_split(p, dim)[r] for t in (whole, whole.grad)]
            same(result["parameters"][i][name], cut[0], what)
            same(result["gradients"][i][name], cut[1], f"the gradient of {what}")


# %% check="parallel_linears" points=3
g = checks.generator(2)
make = ColumnParallelLinear, RowParallelLinear
found = compare_pairs(2, make, draw_pair((3, 4, 2), (2,), g, dtype=torch.float32))
### BEGIN HIDDEN TESTS
cases = [
    draw_pair((4, 7, 5), (2, 3), g),
    draw_pair((1, 2, 1), (2, 1), g, bias=False),  # a rank without a hidden unit
    draw_pair((5, 6, 3), (), g, dtype=torch.float32),
]
cases.append((*draw_pair((4, 5, 3), (2,), g), ((0, 2), (1,))))
layers, x, dy = draw_pair((3, 6, 3), (5, 3), g)
cases.append((layers, x.transpose(0, 1), dy[:1, :1].expand(3, 5, 3)))
found = compare_pairs(3, make, *cases)
### END HIDDEN TESTS

# %% check="parallel_linears" points=2
g = checks.generator(3)
make = ColumnParallelLinear, RowParallelLinear
layers, x, dy = draw_pair((16, 32, 8), (3,), g, dtype=torch.float32)
results = compare_pairs(2, make, (layers, x, dy))[0]
for rank, result in enumerate(results):
    for pass_, due in (("forward", [("all-reduce", 24)]), ("backward", [("all-reduce", 48)])):
        assert result[pass_] == due, (
            f"rank {rank} asks for {result[pass_] or 'nothing'} in the {pass_} pass of the two "
            f"layers; {due} is asked for: y is 3 × 8, x is 3 × 16"
        )
### BEGIN HIDDEN TESTS
for rank, result in enumerate(results):
    own = (32 * 16 + 32) // 2 + 8 * 32 // 2 + 8
    assert result["held"] <= own, (
        f"the two layers of rank {rank} of 2 hold {result['held']} elements, {own} are its part"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## The loss {#loss}
#
# The last layer maps to the vocabulary, 128,000 outputs or more, and it is cut like any other: rank
# $r$ has the logits of tokens $rV/p$ to $(r+1)V/p-1$. To gather them would send $n\cdot V$ numbers
# for a loss of $n$. What does cross-entropy need of the whole row?
#
# $$ \ell = \log\sum_j e^{z_j-m} - (z_t - m), \qquad m=\max_j z_j . $$
#
# Three numbers for each token: a maximum, a sum of exponentials, and the target's logit, which
# exactly one rank has. The maximum comes first, since the exponentials need it. The other two are
# both sums over ranks (those who do not have the target add 0), so they travel in *one* tensor:
# two all-reduces. (Megatron's plain version takes three, its fused one these two.)
#
# The gradient needs nobody: $\partial\ell/\partial z_j = e^{z_j-m}/\Sigma - [j=t]$, and after the
# forward pass each rank knows $m$ and $\Sigma$ for its own $j$.


# %% exercise="parallel_cross_entropy" minutes=20 difficulty=2
def parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The cross-entropy of each token, over a vocabulary that is cut among the ranks of `group`.

    logits: (…, own), float32 or float64: rank r has tokens r·own to (r+1)·own − 1; `own` is the
    same on all ranks. targets: (…) int64 in the whole vocabulary, the same on all ranks; where it
    equals `ignore_index` the loss is 0 and so is the gradient. Nothing is changed in place.
    Returns the losses (…) in logits' dtype, the same on all ranks, as F.cross_entropy with
    reduction="none" has them; no logit is too large. Backward, each rank gets the gradient of its
    own logits.

    With n tokens, there are two all-reduces: the maxima (n numbers), then sums of exponentials and
    target logits together (2n). Backward nothing is sent.
    """
    ### BEGIN SOLUTION
    own = logits.shape[-1]
    top = logits.detach().amax(-1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    shifted = logits - top[..., None]
    local = targets - dist.get_rank(group) * own
    here = (local >= 0) & (local < own) & (targets != ignore_index)
    at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)
    total, at_target = sum_over_ranks(torch.stack([shifted.exp().sum(-1), at_target]), group)
    return (total.log() - at_target).where(targets != ignore_index, 0.0)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: who has the target</summary>
#
# `targets - rank * own` is a place in the own part if it is in $[0, \text{own})$. Elsewhere take
# any valid place (0) and `where` away what comes out. (Multiplied by 0, a logit of −∞ that pads the
# vocabulary would become NaN.)
# </details>
#
# <details><summary>Hint: the gradient</summary>
#
# `sum_over_ranks` passes gradients back as they are, and that is what is right here. The maximum
# needs no gradient: `detach` it.
# </details>


# %% tags=["support"]
# Support: the loss over a cut vocabulary, on one rank
@checks.measured
def vocabulary_loss(loss: Callable, case: tuple, rank: int) -> dict:
    """case: logits (…, vocabulary), targets, cotangent, ignore_index, groups."""
    logits, targets, cotangent, ignored, members = case
    group = group_of(members)
    ranks = dist.get_world_size(group)
    leaf = logits.chunk(ranks, dim=-1)[dist.get_rank(group)].detach().requires_grad_()
    before = leaf.detach().clone(), targets.clone()
    with checks.communication() as forward:
        losses = loss(leaf, targets, group=group, ignore_index=ignored)
    assert losses.requires_grad, "the losses carry no gradient"
    with checks.communication() as backward:
        gradient = torch.autograd.grad(losses, leaf, cotangent)[0]
    assert torch.equal(leaf, before[0]), "logits were changed in place"
    assert torch.equal(targets, before[1]), "targets were changed in place"
    return {
        "losses": losses.detach(),
        "gradient": gradient,
        "forward": list(forward),
        "backward": list(backward),
    }


def compare_losses(loss: Callable, ranks: int, cases: list[tuple]) -> list[list[dict]]:
    found = checks.on_ranks(ranks, lambda rank, case: vocabulary_loss(loss, case, rank), cases)
    for (logits, targets, cotangent, ignored, members), results in zip(cases, found, strict=True):
        leaf = wide(logits)
        due = F.cross_entropy(
            leaf.flatten(0, -2), targets.flatten(), ignore_index=ignored, reduction="none"
        ).view_as(targets)
        due.backward(cotangent.double())
        dtype = logits.dtype
        for rank, result in enumerate(results):
            mine = mates(rank, ranks, members)
            r, p = mine.index(rank), len(mine)
            checks.close(
                result["losses"],
                due.to(dtype),
                what=f"the losses on rank {rank} of {ranks}, targets {targets.flatten().tolist()}",
                dtype=dtype,
                mistakes={"the loss over this rank's part alone": own_loss(logits, targets, r, p)},
            )
            checks.close(
                result["gradient"],
                leaf.grad.chunk(p, dim=-1)[r].to(dtype),
                what=f"the gradient of the logits of rank {rank} of {ranks}",
                dtype=dtype,
                atol=1e-6 if dtype == torch.float32 else 1e-12,
                mistakes={"summing it over the ranks": p * leaf.grad.chunk(p, -1)[r].to(dtype)},
            )
    return found


def own_loss(logits: Tensor, targets: Tensor, r: int, p: int) -> Tensor:
    """What a rank gets without the others: log of its own sum, minus its own target's logit."""
    z = logits.double()
    part = z.chunk(p, dim=-1)[r]
    local = targets - r * part.shape[-1]
    here = (local >= 0) & (local < part.shape[-1])
    own = part.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)
    return (part.logsumexp(-1) - own).to(logits.dtype)


# %% check="parallel_cross_entropy" points=3
logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 0.0, 0.0, 0.0]])
found = compare_losses(
    parallel_cross_entropy, 2, [(logits, torch.tensor([3, 1]), torch.ones(2), -100, ())]
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
cases = []
for shape, own, dtype, ignored, members in (
    ((2, 5), 4, torch.float64, -100, ()),
    ((7,), 1, torch.float32, 2, ()),
    ((1, 6), 6, torch.float64, 0, ((0, 2), (1,))),
):
    vocabulary = 6 if members else 3 * own
    logits = torch.randn(*shape, vocabulary, generator=g).to(dtype)
    targets = torch.randint(0, vocabulary, shape, generator=g)
    targets.view(-1)[1] = ignored
    targets.view(-1)[3] = vocabulary - 1
    cotangent = torch.randn(*shape, generator=g).to(dtype)
    cases.append((logits, targets, cotangent, ignored, members))
logits = torch.randn(4, 9, generator=g).double() * 5
logits += torch.tensor([[1e4], [-1e4], [800.0], [0.0]])  # no rank may overflow, none may vanish
logits[3, :3] -= 1e3
cases.append((logits, torch.tensor([0, 4, 8, 5]), torch.ones(4).double(), -100, ()))
few = torch.tensor([[8192.0, 8192.5, 0.0], [-4096.0, -4096.5, -4096.25]])  # exact in float32
padded = torch.tensor([[-torch.inf, 1.0, 2.0]])  # a place that no token has
for logits, targets in ((few, torch.tensor([0, 1])), (padded, torch.tensor([1]))):
    cases.append((logits, targets, torch.ones(len(targets)), -100, ()))
across = torch.randn(9, 4, generator=g).T  # not contiguous
cases.append((across, torch.tensor([8, 0, 3, 6]), torch.ones(1).expand(4), -100, ()))
found = compare_losses(parallel_cross_entropy, 3, cases)
### END HIDDEN TESTS

# %% check="parallel_cross_entropy" points=1
g = checks.generator(5)
case = (torch.randn(6, 8, generator=g), torch.randint(0, 8, (6,), generator=g), torch.ones(6))
results = compare_losses(parallel_cross_entropy, 2, [(*case, -100, ())])[0]
for result in results:
    assert result["forward"] == [("all-reduce", 6), ("all-reduce", 12)], (
        f"6 tokens: an all-reduce of 6 numbers and one of 12 are asked for; yours are "
        f"{result['forward']}. What can travel together?"
    )
### BEGIN HIDDEN TESTS
for result in results:
    assert not result["backward"], f"backward nothing is to be sent; yours: {result['backward']}"
### END HIDDEN TESTS

# %% [markdown]
# ## Sequence parallel {#sequence-parallel}
#
# Between the parallel layers stands what tensor parallelism does not cut: norms, residuals,
# dropout. Every rank does all of it, and keeps all its activations for the backward pass:
# (batch, seq, width), $p$ times over.
#
# An all-reduce is a reduce-scatter and an all-gather (lesson 19). So stop halfway: after the
# row-parallel layer, reduce-scatter *along the sequence*. Each rank then has the complete $y$ of
# some tokens, and norms, residuals and dropout need no more than that. Before the next
# column-parallel layer, all-gather.
#
# | | forward | backward | in place of |
# |---|---|---|---|
# | $\bar f$: gather | all-gather | reduce-scatter | $f$ |
# | $\bar g$: scatter the sum | reduce-scatter | all-gather | $g$ |
#
# The same bytes as before, in the forward and in the backward pass, and a $p$-th of these
# activations on each rank. The backward of the gather is a reduce-*scatter* and not a cut: each
# rank has used *all* tokens for its own columns, so it has a share of every token's gradient.
#
# One new duty: norm weights, and row-parallel biases added after $\bar g$, are whole on every rank
# but see only its tokens. Sum their gradients over the group before the optimizer's step.


# %% exercise="sequence_operators" minutes=18 difficulty=2
def gather_sequence(x: Tensor, dim: int = 1, group: dist.ProcessGroup | None = None) -> Tensor:
    """f̄: all ranks' parts of a sequence, one after another along `dim`, on every rank.

    x: this rank's part, of one shape on all ranks of `group`; any floating dtype and strides; dim
    may be negative. Forward one all-gather. Backward one reduce-scatter: the gradient of x is this
    rank's part of the sum of the ranks' gradients. Nothing else is sent, nothing changed in place.
    """
    ### BEGIN SOLUTION
    return _Gather.apply(x, dim, group)
    ### END SOLUTION


def scatter_sum(x: Tensor, dim: int = 1, group: dist.ProcessGroup | None = None) -> Tensor:
    """ḡ: this rank's part, along `dim`, of the sum of x over the ranks.

    x: of one shape on all ranks. ValueError where its length along `dim` is not divisible by their
    number. Forward one reduce-scatter, backward one all-gather: the gradient of x is, on all ranks,
    the parts' gradients one after another.
    """
    ### BEGIN SOLUTION
    if x.shape[dim] % dist.get_world_size(group):
        raise ValueError(f"{x.shape[dim]} positions are not divisible by the number of ranks")
    return _ScatterSum.apply(x, dim, group)
    ### END SOLUTION


# Here is room for your classes of torch.autograd.Function.
### BEGIN SOLUTION
def gathered(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim)


def summed_part(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim)]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, group=group)
    return mine


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        return summed_part(dy, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return summed_part(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        return gathered(dy, ctx.dim, ctx.group), None, None


### END SOLUTION

# %% [markdown]
# <details><summary>Hint: two functions do all of it</summary>
#
# One gathers along a dim, one reduce-scatters along it. Each is the forward of one operator and the
# backward of the other.
# </details>
#
# <details><summary>Hint: lists of tensors</summary>
#
# `dist.all_gather(list_of_parts, x)` and `dist.reduce_scatter(mine, list_of_parts)` want contiguous
# tensors; `torch.cat` and `chunk` take a dim. An `empty_like` of a transposed tensor is transposed,
# too.
# </details>


# %% check="sequence_operators" points=3
def run_along(rank: int, case: tuple) -> dict:
    operator, xs, cotangents, dim, *members = case
    return run(operator, xs[rank], cotangents[rank], *members, dim=dim)


def compare_along(ranks: int, cases: list[tuple], also: Callable | None = None) -> None:
    """Cases are pairs, gather then scatter, of (operator, xs, cotangents, dim, groups)."""
    found = checks.on_ranks(ranks, run_along, cases, also)
    for i, (case, results) in enumerate(zip(cases, found, strict=True)):
        _, xs, dys, dim, *members = case
        gathers = i % 2 == 0
        for rank, result in enumerate(results):
            mine = mates(rank, ranks, *members)
            r, p = mine.index(rank), len(mine)
            first, second = (xs, dys) if gathers else (dys, xs)
            whole = torch.cat([first[s] for s in mine], dim)
            total = sum(second[s].double() for s in mine).to(whole.dtype)
            part, alone = total.chunk(p, dim)[r], second[rank].chunk(p, dim)[r]
            name = "gather_sequence" if gathers else "scatter_sum"
            for what, got, due in (
                (f"the result of {name}", result["y"], whole if gathers else part),
                (f"the gradient from {name}", result["dx"], part if gathers else whole),
            ):
                checks.close(
                    got,
                    due,
                    what=f"{what} along dim {dim} on rank {rank}",
                    dtype=whole.dtype,
                    mistakes={
                        "cutting without a sum": alone,
                        "a mean over the ranks": part / p,
                        "summing what is complete": whole * p,
                    },
                )
            logs = [result["forward"], result["backward"]]
            due = [[("all-gather", whole.numel())], [("reduce-scatter", whole.numel())]]
            assert logs == (due if gathers else due[::-1]), (
                f"{name} asks for {logs[0]} forward and {logs[1]} backward, {due} are asked for, "
                "in one order or the other"
            )


parts = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
wholes = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[10.0, 20.0, 30.0, 40.0]]])
compare_along(2, [(gather_sequence, parts, wholes, 1), (scatter_sum, wholes, parts, 1)])
### BEGIN HIDDEN TESTS
g = checks.generator(6)
cases = []
for dim, dtype, short, long in (
    (1, torch.float64, (2, 2, 3), (2, 6, 3)),
    (-1, torch.bfloat16, (2, 1, 3), (2, 1, 9)),
    (0, torch.float32, (2, 3), (6, 3)),
):
    parts = [torch.randint(-9, 9, (3, *short), generator=g).to(dtype) for _ in range(2)]
    wholes = [torch.randint(-9, 9, (3, *long), generator=g).to(dtype) for _ in range(2)]
    cases.append((gather_sequence, parts[0], wholes[0], dim))
    cases.append((scatter_sum, wholes[1], parts[1], dim))
drawn = torch.randn(3, 4, 5, 2, generator=g).transpose(1, 2)  # rank, 5, 4, 2: not contiguous
short, long = drawn[:, :, :2], drawn[:, :1, :1].expand(3, 5, 4, 2)
mixed = [long[0], short[1], long[2]]  # rank 1 is alone in its group
cases += [(gather_sequence, short, mixed, 1, ((0, 2), (1,)))]
short = drawn[:, :1, :1].expand(3, 5, 2, 2)
cases += [(scatter_sum, mixed, short, 1, ((0, 2), (1,)))]


def uneven_sum(rank: int) -> None:
    checks.raises(ValueError, scatter_sum, torch.ones(2, 4), dim=-1)


compare_along(3, cases, uneven_sum)
### END HIDDEN TESTS

# %% [markdown]
# ## Pipelines {#pipelines}
#
# Tensor parallelism cuts each layer; a **pipeline** cuts *between* layers. Stage 0 has the first
# layers, stage 1 the next, and what travels is one activation forward and its gradient back: much
# less than the all-reduces of tensor parallelism. The price is waiting. With one batch, stage 1
# idles while stage 0 computes, and the other way round: of $p$ stages one works at a time.
#
# So the batch is cut, too: into $m$ **micro-batches**, which follow each other through the stages
# as cars follow each other on an assembly line. Gradients add up over them, and one optimizer step
# comes at the end, when all are through. If all micro-batches count equally many tokens, the mean
# over them is *exactly* the whole batch's.
#
# At both ends of a step some stages have nothing to do: that is the **bubble**. Let $t_F$ be the
# time of a micro-batch's forward pass in one stage and $t_B + t_W$ that of its backward pass
# ($t_B$ for the gradients of inputs, $t_W$ for those of weights). A stage is busy for the ideal
# time $m\,(t_F+t_B+t_W)$. The last stage can't begin before $p-1$ forward passes are done, and at
# the end the first stage has to wait for $p-1$ backward passes:
#
# $$ \text{bubble} = (p-1)(t_F+t_B+t_W), \qquad
# \frac{\text{bubble}}{\text{ideal}} = \frac{p-1}{m}, \qquad
# \frac{\text{bubble}}{\text{total}} = \frac{p-1}{m+p-1}. $$
#
# Both fractions are in use, and papers are not always clear about which one they mean.

# %% [markdown]
# ### Four orders of the same work
#
# A **schedule** says in which order each stage does its passes; *when* then follows from who waits
# for whom. Four are worth knowing:
#
# - **GPipe.** All forward passes, then all backward passes. Each stage holds the activations of
#   all $m$ micro-batches at once. (The paper keeps the stages' inputs and computes the rest again.)
# - **1F1B**, one forward, one backward. As soon as a micro-batch's gradient can come back, it does,
#   and its activations are freed. The bubble is the same; but rank $r$ holds $p-r$ micro-batches at
#   most, however large $m$ is. So $m$ can grow, and with it the bubble's share shrinks.
# - **Interleaved 1F1B.** Each rank has $v$ **chunks** of layers instead of one: rank 0 of 4 has
#   stages 0 and 4 of 8. A micro-batch goes round the ranks $v$ times, in steps of a $v$-th of the
#   length, and the bubble is a $v$-th: $\frac{p-1}{vm}$ of the ideal. There are $v$ times as many
#   messages, and a few more micro-batches are alive.
# - **Zero bubble, ZB-H1.** The backward pass of a layer $Y = XW^\top$ computes two things:
#   $\partial X = \partial Y\, W$, for which the previous stage is waiting, and
#   $\partial W = \partial Y^\top X$, for which nobody is. ZB-H1 separates them: **B** (gradients
#   of inputs) as soon as it can be, **W** (gradients of weights) where there would be a bubble.

# %% [markdown]
# Why does ZB-H1 idle for $(p-1)(t_F + t_B - t_W)$ only? The way there and back is now $p-1$ times
# $t_F + t_B$: nobody waits for a W. And rank $r$ puts off $r$ of its Ws: the last rank has put off
# $p-1$ when its last B ends, so that B ends $(p-1)\,t_W$ earlier. It needs $p-1$ more Bs to reach
# rank 0, which then does one W; the other ranks do the Ws that they have left meanwhile. Memory
# does not grow beyond what 1F1B needs on rank 0: rank $r$ holds $p-r$ micro-batches that wait for
# their B and $r$ that wait for their W.
#
# Below, a pass is a triple `(kind, microbatch, chunk)`, and `timeline` finds out when it runs.


# %%

# (kind, microbatch, chunk): kind "F", "BW" (both gradients), "B" or "W"
Pass = tuple[str, int, int]
COSTS = {"F": 1.0, "BW": 2.0, "B": 1.0, "W": 1.0}  # slots of time


def timeline(
    order: list[list[Pass]], costs: dict[str, float] = COSTS, message: float = 0.0
) -> list[list[tuple]]:
    """[rank] → (pass, start, end) in order: each pass starts as soon as its rank is free and what
    it needs is there. A message from stage to stage takes `message`, and keeps nobody busy.

    Chunk c of rank r is stage c · ranks + r. A forward pass needs that of the stage before; a
    backward pass (BW, B) its own forward pass and the BW or B of the next stage; a W its own B.
    Raises ValueError where ranks wait for each other for ever.
    """
    ranks = len(order)
    last = ranks * (1 + max((chunk for line in order for _, _, chunk in line), default=0)) - 1
    lines: list[list[tuple]] = [[] for _ in order]
    ends: dict[tuple, float] = {}  # of ("F" | "B", microbatch, stage)
    free = [0.0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, line in enumerate(order):
            for kind, microbatch, chunk in line[len(lines[rank]) :]:
                stage = chunk * ranks + rank
                if kind == "F":
                    needs = [("F", microbatch, stage - 1)] if stage else []
                elif kind == "W":
                    needs = [("B", microbatch, stage)]
                else:
                    needs = [("F", microbatch, stage)]
                    needs += [("B", microbatch, stage + 1)] if stage < last else []
                if not all(need in ends for need in needs):
                    break
                arrive = [ends[need] + message * (need[2] != stage) for need in needs]
                start = max([free[rank], *arrive])
                free[rank] = end = start + costs[kind]
                if kind != "W":
                    ends["F" if kind == "F" else "B", microbatch, stage] = end
                lines[rank].append(((kind, microbatch, chunk), start, end))
                moved = True
    for rank, line in enumerate(order):
        if len(lines[rank]) < len(line):
            stuck = line[len(lines[rank])]
            raise ValueError(f"rank {rank} waits for ever: what {stuck} needs never comes")
    return lines


def most_live(line: list[Pass]) -> int:
    """The most activations that a rank holds at once: from a pass F until its BW, or its W."""
    live = most = 0
    for kind, _, _ in line:
        live += (kind == "F") - (kind in ("BW", "W"))
        most = max(most, live)
    return most


# %% exercise="pipeline_schedule" minutes=35 difficulty=3
def pipeline_schedule(
    stages: int, microbatches: int, kind: str, chunks: int = 2
) -> list[list[tuple[str, int, int]]]:
    """In which order each rank of a pipeline does its passes.

    stages: the ranks, 1 or more. microbatches: 1 or more. kind: "gpipe", "1f1b", "interleaved" or
    "zb-h1"; ValueError for any other. chunks: the chunks of each rank (2 or more) for
    "interleaved"; the other kinds have one, chunk 0, whatever this says.
    Returns [rank] → passes (kind, microbatch, chunk) in order. Every rank has, for each micro-batch
    and chunk, one "F" and one "BW"; for "zb-h1" one "F", one "B" and one "W". Forward passes of a
    chunk are in ascending order of micro-batches; so are backward passes, but for those of "gpipe",
    which may be in any order that all ranks share.

    "gpipe"        all forward passes, then all backward passes.
    "1f1b"         rank r does stages − 1 − r forward passes ahead (all, if there are fewer), then
                   one forward and one backward in turn, then the backward passes that are left.
    "interleaved"  the same on chunks. Forward passes go in rounds: `stages` micro-batches through
                   chunk 0, the same through chunk 1, and so on, then the next `stages`
                   micro-batches; backward passes likewise, from the last chunk to the first.
                   Rank r does 2(stages − 1 − r) + (chunks − 1) · stages forward passes ahead (all,
                   if there are fewer). ValueError if stages do not divide microbatches.
    "zb-h1"        F and B as F and BW of "1f1b". Rank r does W of micro-batch i right after B of
                   micro-batch i + r, and the Ws that are left at the end.

    With t_BW = t_B + t_W (of one chunk) all passes together take a rank's busy time and (stages −
    1) · (t_F + t_BW); for "zb-h1" (stages − 1) · (t_F + t_B − t_W), if microbatches ≥ stages and
    t_W ≤ t_F, t_B.
    """
    ### BEGIN SOLUTION
    if kind not in ("gpipe", "1f1b", "interleaved", "zb-h1"):
        raise ValueError(f"kind is gpipe, 1f1b, interleaved or zb-h1, not {kind!r}")
    if kind != "interleaved":
        chunks = 1
    elif microbatches % stages:
        raise ValueError(f"{stages} stages do not divide {microbatches} micro-batches")

    # In rounds of `stages` micro-batches. With one chunk that is their order.
    places = []
    for begin in range(0, microbatches, stages):
        of_round = range(begin, min(begin + stages, microbatches))
        places += [(i, chunk) for chunk in range(chunks) for i in of_round]
    forward = [("F", i, chunk) for i, chunk in places]
    name = "B" if kind == "zb-h1" else "BW"
    backward = [(name, i, chunks - 1 - chunk) for i, chunk in places]

    def of_rank(rank: int) -> list[tuple[str, int, int]]:
        if kind == "gpipe":
            return forward + backward
        ahead = stages - 1 - rank
        if kind == "interleaved":
            ahead = 2 * ahead + (chunks - 1) * stages
        order = forward[:ahead]
        for i, back in enumerate(backward):
            order += [*forward[ahead + i :][:1], back]
            if kind == "zb-h1" and i >= rank:
                order.append(("W", i - rank, 0))
        if kind == "zb-h1":
            order += [("W", i, 0) for i in range(max(microbatches - rank, 0), microbatches)]
        return order

    return [of_rank(rank) for rank in range(stages)]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one loop for three kinds</summary>
#
# Write down all forward passes in their order, and all backward passes in theirs. Ahead come the
# first so many forward passes; then, for each backward pass, the next forward pass (while there is
# one) and that backward pass. The kinds differ in the two lists and in the number ahead.
# </details>
#
# <details><summary>Hint: rank 0 of 1F1B, four stages</summary>
#
# F0 F1 F2, then F3 B0, F4 B1, …: with the one that is in turn, four micro-batches are alive.
# </details>
#
# <details><summary>Hint: the order of an interleaved forward pass</summary>
#
# Two stages, two chunks, four micro-batches: micro-batches 0 1 in chunk 0, 0 1 in chunk 1, 2 3 in
# chunk 0, 2 3 in chunk 1. What is the same for the backward pass?
# </details>

# %% tags=["support"]
# Support: whether a schedule is complete and can run, and what it costs
UNEQUAL = {"F": 3.0, "BW": 4.0, "B": 2.0, "W": 2.0}


def examine(
    stages: int, microbatches: int, kind: str, chunks: int = 1, costs: dict = COSTS
) -> tuple[float, list[int]]:
    """The idle time of a learner's schedule beyond what each rank is busy, and most_live of each
    rank. Complete, and without ranks that wait for ever, or an AssertionError.
    """
    asked = {"chunks": chunks} if kind == "interleaved" else {}
    order = pipeline_schedule(stages, microbatches, kind, **asked)
    where = f"{kind}, {stages} stages, {microbatches} micro-batches" + (
        f", {chunks} chunks" if chunks > 1 else ""
    )
    checks.kind(order, list, what=where)
    assert len(order) == stages, f"{where}: a list of {stages} ranks is asked for"
    kinds = ("F", "B", "W") if kind == "zb-h1" else ("F", "BW")
    due = {(k, i, c) for k in kinds for i in range(microbatches) for c in range(chunks)}
    for rank, line in enumerate(order):
        checks.kind(line, list, what=f"{where}, rank {rank}")
        line[:] = [tuple(step) if isinstance(step, list) else step for step in line]
        missing, others = due - {*line}, [step for step in line if step not in due]
        assert not others, f"{where}: rank {rank} has {others[0]}, which is no pass of this kind"
        assert not missing, f"{where}: rank {rank} never does {min(missing)}"
        assert len(line) == len(due), f"{where}: rank {rank} does a pass twice"
        for k in kinds:
            behind = [step for step in line if step[0] == k]
            for chunk in range(chunks):
                done = [i for _, i, c in behind if c == chunk]
                assert k != "F" or done == sorted(done), (
                    f"{where}: rank {rank} takes micro-batches in the order {done}; each stage "
                    "gets them in the order in which the first stage began them"
                )
    try:
        lines = timeline(order, costs)
    except ValueError as stuck:
        raise AssertionError(f"{where}: {stuck}. In which order do the others do it?") from None
    busy = microbatches * chunks * sum(costs[k] for k in kinds)
    return max(line[-1][2] for line in lines) - busy, [most_live(line) for line in order]


# %% check="pipeline_schedule" points=1
idle, live = examine(4, 8, "gpipe")
checks.number(
    idle,
    9.0,
    to=0,
    what="the idle time of GPipe with 4 stages and 8 micro-batches",
    hint="(p − 1)(1 + 2) slots",
)
assert live == [8] * 4, f"GPipe, most live micro-batches: 8 on each rank, yours {live}"
### BEGIN HIDDEN TESTS
for stages, microbatches in ((1, 1), (1, 4), (2, 1), (3, 2), (5, 7), (4, 4), (2, 9)):
    for costs in (COSTS, UNEQUAL):
        idle, live = examine(stages, microbatches, "gpipe", costs=costs)
        checks.number(
            idle,
            (stages - 1) * (costs["F"] + costs["BW"]),
            atol=1e-9,
            what=f"the idle time of GPipe with {stages} stages, {microbatches} micro-batches",
        )
        assert live == [microbatches] * stages, (
            f"GPipe does all forward passes first: {microbatches} micro-batches are alive on each "
            f"rank, in yours {live}"
        )
### END HIDDEN TESTS

# %% check="pipeline_schedule" points=2
idle, live = examine(4, 8, "1f1b")
checks.number(
    idle,
    9.0,
    to=0,
    what="the idle time of 1F1B with 4 stages and 8 micro-batches",
    hint="The bubble is GPipe's: memory is what 1F1B saves.",
    mistakes={"one stage after the other, without a pipeline": 72.0},
)
assert live == [4, 3, 2, 1], (
    f"1F1B, most live micro-batches: [4, 3, 2, 1] for 4 ranks, yours {live}"
)
### BEGIN HIDDEN TESTS
for stages, microbatches in ((1, 1), (1, 4), (2, 1), (3, 2), (5, 7), (4, 4), (2, 9), (6, 3)):
    for costs in (COSTS, UNEQUAL):
        idle, live = examine(stages, microbatches, "1f1b", costs=costs)
        checks.number(
            idle,
            (stages - 1) * (costs["F"] + costs["BW"]),
            atol=1e-9,
            what=f"the idle time of 1F1B with {stages} stages, {microbatches} micro-batches",
        )
        due = [min(microbatches, stages - rank) for rank in range(stages)]
        assert live == due, (
            f"1F1B, {stages} stages, {microbatches} micro-batches: {due} are alive at most, in "
            f"yours {live}. How many forward passes does each rank do ahead?"
        )
### END HIDDEN TESTS

# %% check="pipeline_schedule" points=2
idle, live = examine(4, 8, "interleaved", chunks=2)
checks.number(
    idle,
    9.0,
    to=0,
    what="the idle time of 4 ranks with 2 chunks, 8 micro-batches",
    hint="(p − 1)(1 + 2) slots, of half the length: a pass is one chunk's",
    mistakes={"each chunk a pipeline of its own": 18.0},
)
### BEGIN HIDDEN TESTS
for stages, microbatches, chunks in (
    (1, 2, 2),
    (2, 2, 2),
    (2, 6, 3),
    (3, 3, 4),
    (3, 9, 2),
    (4, 8, 3),
    (5, 5, 2),
):
    for costs in (COSTS, UNEQUAL):
        idle, live = examine(stages, microbatches, "interleaved", chunks=chunks, costs=costs)
        what = f"{stages} stages, {microbatches} micro-batches, {chunks} chunks"
        checks.number(
            idle,
            (stages - 1) * (costs["F"] + costs["BW"]),
            atol=1e-9,
            what=f"the idle time of {what}",
        )
        for rank, most in enumerate(live):
            ahead = 2 * (stages - 1 - rank) + (chunks - 1) * stages
            due = min(ahead + 1, microbatches * chunks)
            assert most == due, (
                f"{what}: rank {rank} holds up to {most} activations of a chunk, {due} are asked "
                "for. How many forward passes does it do ahead?"
            )
checks.raises(ValueError, pipeline_schedule, 4, 6, "interleaved", because="4 does not divide 6")
for rank, line in enumerate(pipeline_schedule(2, 2, "interleaved")):  # chunks left to its default
    assert len(line) == 8, f"2 micro-batches in 2 chunks: 8 passes on rank {rank}, not {len(line)}"
### END HIDDEN TESTS

# %% check="pipeline_schedule" points=2
idle, live = examine(4, 8, "zb-h1")
checks.number(
    idle,
    3.0,
    to=0,
    what="the idle time of ZB-H1 with 4 stages and 8 micro-batches",
    hint="(p − 1)(1 + 1 − 1) slots: what fills the others?",
    mistakes={"each W right after its B": 6.0, "no bubble filled": 9.0},
)
assert live == [4, 4, 4, 4], (
    f"ZB-H1, most live micro-batches (until their W): 4 on each rank, yours {live}"
)
### BEGIN HIDDEN TESTS
for stages, microbatches in ((1, 1), (1, 3), (2, 2), (2, 5), (3, 3), (4, 6), (5, 9), (6, 6)):
    for costs in (COSTS, UNEQUAL, {"F": 2.0, "BW": 2.5, "B": 2.0, "W": 0.5}):
        idle, live = examine(stages, microbatches, "zb-h1", costs=costs)
        what = f"ZB-H1, {stages} stages, {microbatches} micro-batches"
        checks.number(
            idle,
            (stages - 1) * (costs["F"] + costs["B"] - costs["W"]),
            atol=1e-9,
            what=f"{what}: the idle time",
        )
        assert max(live) <= stages, (
            f"{what}: {live} are alive at most; {stages} suffice on each rank"
        )
for stages, microbatches in ((2, 1), (3, 2), (5, 2), (4, 3)):  # too few to fill it: no worse
    idle, live = examine(stages, microbatches, "zb-h1")
    assert idle <= 3 * (stages - 1), f"{stages} stages, {microbatches} micro-batches: {idle} idle"
    assert max(live) <= microbatches
checks.raises(ValueError, pipeline_schedule, 2, 4, "dualpipe")
checks.raises(ValueError, pipeline_schedule, 2, 4, "GPipe", because="kinds are in small letters")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: your four schedules of 4 ranks and 8 micro-batches
SHADES = {"F": "#9ecae9", "BW": plot.COLORS[1], "B": plot.COLORS[1], "W": plot.COLORS[3]}


def gantt(
    ax,
    lines: list[list[tuple]],
    title: str,
) -> None:
    """A row for each rank; boxes for passes, hatched where a rank idles."""
    total = max(line[-1][2] for line in lines)
    for rank, line in enumerate(lines):
        idle = {"facecolor": "white", "edgecolor": "#bbbbbb", "hatch": "////", "linewidth": 0}
        ax.broken_barh([(0, total)], (rank - 0.4, 0.8), **idle)
        for (kind, microbatch, chunk), start, end in line:
            ax.broken_barh(
                [(start, end - start)],
                (rank - 0.4, 0.8),
                facecolor=SHADES[kind],
                edgecolor="black" if chunk else "#777777",
                linewidth=1.2 if chunk else 0.5,
            )
            ax.text((start + end) / 2, rank, microbatch, ha="center", va="center", fontsize=7)
    busy = sum(end - start for _, start, end in lines[0])
    ax.set(yticks=range(len(lines)), ylabel="rank", xlim=(0, total), title=title)
    ax.invert_yaxis()
    ax.grid(False)
    ax.text(
        1.005,
        0.5,
        f"idle:\n{total - busy:g} of {total:g}\nlive:\n"
        + " ".join(str(most_live([step for step, _, _ in line])) for line in lines),
        transform=ax.transAxes,
        fontsize=8,
        va="center",
    )


fig, axes = plot.plt.subplots(4, 1, figsize=(10, 7.6), sharex=True)
for ax, (kind, title) in zip(
    axes,
    {
        "gpipe": "GPipe",
        "1f1b": "1F1B",
        "interleaved": "interleaved, 2 chunks of half the length (the second in a thick frame)",
        "zb-h1": "ZB-H1",
    }.items(),
    strict=True,
):
    half = 0.5 if kind == "interleaved" else 1.0
    costs = {name: half * slots for name, slots in COSTS.items()}
    gantt(ax, timeline(pipeline_schedule(4, 8, kind), costs), title)
    ax.set_xlim(0, 33)
axes[-1].set_xlabel("time (forward passes of a stage)")
plot.caption(
    fig,
    "Blue: forward. Orange: backward, both gradients or that of the inputs. Green: gradients of "
    "the weights. Hatched: the bubble. Right of each: idle time, and the most micro-batches (of "
    "chunks where interleaved, so two count as one) that ranks 0 to 3 hold.",
)
plot.plt.show()

# %% [markdown]
# Compare the second row with the fourth: the bubble at the left is the same (no micro-batch has
# come yet), the one in the middle is shorter (nobody waits for a W), the one at the right is filled
# with green. GPipe and 1F1B end at the same time; what differs is written at their right.

# %% tags=["experiment"]
print("slots in all (4 ranks, 16 micro-batches) if a message takes")
print(f"{'':12}" + "".join(f"{message:8g}" for message in (0, 0.1, 0.25, 0.5)))
for kind in ("gpipe", "1f1b", "interleaved", "zb-h1"):
    half = 0.5 if kind == "interleaved" else 1.0
    costs = {name: half * slots for name, slots in COSTS.items()}
    order = pipeline_schedule(4, 16, kind)
    totals = [
        max(line[-1][2] for line in timeline(order, costs, message))
        for message in (0, 0.1, 0.25, 0.5)
    ]
    print(f"{kind:12}" + "".join(f"{total:8.4g}" for total in totals))

# %% [markdown]
# Messages make a difference: 1F1B waits for each of them, there and back, where GPipe waits at both
# ends only. Interleaving works farther ahead (twice the distance to the last rank, where once would
# do if messages were free), so that most messages arrive before they are needed.

# %% tags=["experiment", "figure"]
# Figure: the bubble and the memory, over the number of micro-batches
counts = [4, 8, 16, 32, 64]
idle_share, held = {}, {}
for kind in ("gpipe", "1f1b", "interleaved", "zb-h1"):
    idle_share[kind], held[kind] = [], []
    for count in counts:
        order = pipeline_schedule(4, count, kind)
        total = max(line[-1][2] for line in timeline(order))
        chunks = 2 if kind == "interleaved" else 1
        idle_share[kind].append(1 - 3 * count * chunks / total)
        held[kind].append(max(map(most_live, order)) / chunks)
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 3.3))
for ax, lines, ylabel in (
    (axes[0], idle_share, "bubble (share of the total)"),
    (axes[1], held, "activations held, in micro-batches"),
):
    plot.curves(
        counts, lines, xlabel="micro-batches", ylabel=ylabel, logx=True, logy=lines is held, ax=ax
    )
    ax.set_xticks(counts, counts)
axes[1].set_yticks(counts, counts)
axes[1].minorticks_off()
plot.caption(
    fig,
    "4 ranks, counted from your schedules; interleaved with 2 chunks. Left: GPipe and 1F1B "
    "coincide. Right: only GPipe's memory goes on growing with the number of micro-batches (on the "
    "rank that holds most).",
)
plot.plt.show()

# %% [markdown]
# ### A pipeline of real processes
#
# Now run one. Each rank has its stage and its row of the schedule, and does one pass after another:
#
# - **F**: take the micro-batch (rank 0) or receive the activation from the previous rank, run the
#   stage, send the output to the next rank. The last rank computes the loss instead.
# - **BW**: receive the gradient of the output from the next rank (the last rank begins at the
#   loss), go backward through the stage, send the gradient of the *input* to the previous rank.
#
# A graph of autograd ends at a process's border. What arrives is a new leaf: it needs
# `requires_grad_()`, so that after the backward pass its `.grad` is what the previous rank awaits.
#
# Two neighbors who both send first wait for each other for ever. In 1F1B that happens at once: rank
# 0 sends an activation while rank 1 sends a gradient. So a rank does not wait for what it sends: it
# goes on, and keeps the tensor alive until it has arrived.


# %% exercise="run_pipeline" minutes=30 difficulty=3 path="more"
def run_pipeline(
    stage: nn.Module,
    order: Sequence[tuple[str, int, int]],
    inputs: Sequence[Tensor] | None,
    targets: Sequence[Tensor] | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    received: Tensor | None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | None:
    """One rank's part of a training step: all its passes of a pipeline of `group`'s ranks.

    stage: this rank's layers. order: this rank's passes ("F" | "BW", microbatch, 0), in the order
    in which they are to be done; neighbors do their F passes in one order of micro-batches, and
    their BW passes in one order. inputs: on the first rank, a tensor for each micro-batch (int64 or
    float); None elsewhere. targets: on the last rank, a tensor for each micro-batch; None
    elsewhere. loss: (output of the last stage, target) → scalar. received: a tensor of the shape
    and dtype in which this rank receives an activation (its values and strides mean nothing); None
    on the first rank. group: all ranks if None. At least two ranks take part.

    Afterwards each parameter's .grad has grown (from None: to it) by its gradient of the mean loss,
    the mean over the micro-batches. Returns that mean on the last rank, a tensor without a graph;
    None on the others. Inputs stay unchanged and get no gradient.

    Activations go from rank to rank, gradients back, and nothing else is sent. After the backward
    pass of a micro-batch its graph is gone: a rank holds as many as `order` asks for.
    """
    ### BEGIN SOLUTION
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    microbatches = sum(kind == "F" for kind, _, _ in order)
    live: dict[int, tuple] = {}  # micro-batch → input, output, the output's message
    losses: list[Tensor] = []
    sent: list[tuple] = []  # the latest gradient and its message

    def send(tensor: Tensor, to: int) -> tuple[dist.Work, Tensor]:
        tensor = tensor.detach().contiguous()
        return dist.isend(tensor, group=group, group_dst=to), tensor  # it lives until it has left

    def receive(shape: torch.Size, dtype: torch.dtype, source: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, group=group, group_src=source)
        return tensor

    def forward(i: int) -> None:
        if rank == 0:
            x = inputs[i].detach()
        else:
            x = receive(received.shape, received.dtype, rank - 1).requires_grad_()
        y = stage(x)
        if rank == last:
            y = loss(y, targets[i]) / microbatches
            losses.append(y.detach())
            live[i] = x, y, None
        else:
            live[i] = x, y, send(y, rank + 1)

    def backward(i: int) -> None:
        x, y, message = live.pop(i)
        if rank == last:
            y.backward()
        else:
            y.backward(receive(y.shape, y.dtype, rank + 1))
            message[0].wait()  # it has arrived: its gradient came back
        if rank:
            while sent:
                sent.pop()[0].wait()
            sent.append(send(x.grad, rank - 1))

    for kind, i, _ in order:
        forward(i) if kind == "F" else backward(i)
    for message, _ in sent:
        message.wait()
    return torch.stack(losses).sum() if rank == last else None
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: nothing happens until the time is over</summary>
#
# `dist.send` waits for the other side. `work = dist.isend(tensor, group=group, group_dst=…)` does
# not; call `work.wait()` later. Keep the tensor until then: freed memory would be overwritten.
# </details>
#
# <details><summary>Hint: gradients are m times too large</summary>
#
# The mean over micro-batches is a division by their number, and it has to happen before the
# backward pass. How many there are, `order` tells every rank.
# </details>
#
# <details><summary>Hint: "Tensors must be contiguous"</summary>
#
# A stage may return a view in other strides, and `torch.empty_like` copies strides. Send
# `.contiguous()`, and receive into `torch.empty(shape, dtype=…)`.
# </details>
#
# <details><summary>Hint: too many graphs are alive</summary>
#
# A graph lives as long as anything refers to an output. `dict.pop` takes a micro-batch out.
# </details>


# %% tags=["support"]
# Support: stages that note what they do, orders to run, and the same step in one process
class Noted(torch.autograd.Function):
    """The identity. Notes its passes, and how many graphs with it are alive."""

    @staticmethod
    def forward(ctx, x: Tensor, notes: dict) -> Tensor:
        ctx.notes, ctx.token = notes, Token()
        notes["passes"].append("F")
        notes["alive"].add(ctx.token)
        notes["most"] = max(notes["most"], len(notes["alive"]))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.notes["passes"].append("BW")
        return gradient, None


class Token:
    pass


class Part(nn.Module):
    """Stage i of a pipeline. Takes tokens (batch, seq), or activations (batch, seq, 4 + i)."""

    def __init__(self, i: int, stages: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4) if i == 0 else None
        self.linear = nn.Linear(4 + i, 11 if i == stages - 1 else 5 + i)
        self.notes = {"passes": [], "alive": weakref.WeakSet(), "most": 0}

    def forward(self, x: Tensor) -> Tensor:
        x = Noted.apply(x if self.embed is None else self.embed(x), self.notes)
        return torch.tanh(self.linear(x.transpose(0, 1))).transpose(0, 1)  # not contiguous


def make_parts(seed: int, stages: int, dtype: torch.dtype) -> list[Part]:
    torch.manual_seed(seed)
    return [Part(i, stages).to(dtype) for i in range(stages)]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@checks.measured
def pipeline_steps(
    run: Callable,
    order: list,
    stages: int,
    at: int,
    steps: list[tuple],
    dtype: torch.dtype = torch.float64,
    groups: tuple | None = None,
) -> dict:
    """Steps of stage `at`, each (inputs, targets), without zero_grad between them."""
    stage = make_parts(7, stages, dtype)[at]
    group = {"group": group_of(groups)} if groups else {}
    losses = []
    for inputs, targets in steps:
        received = torch.empty(inputs[0].shape[1], inputs[0].shape[0], 4 + at, dtype=dtype)
        losses.append(
            run(
                stage,
                order,
                inputs if at == 0 else None,
                targets if at == stages - 1 else None,
                token_loss,
                received.transpose(0, 1) if at else None,
                **group,
            )
        )
    none_in = [name for name, p in stage.named_parameters() if p.grad is None]
    return {
        "losses": losses,
        "gradients": {n: p.grad for n, p in stage.named_parameters()},
        "none_in": none_in,
        "passes": stage.notes["passes"],
        "most": stage.notes["most"],
    }


def one_process(stages: int, steps: list[tuple], dtype: torch.dtype) -> tuple[list, list[dict]]:
    """Losses of each step and gradients of each stage, of the parts one after another."""
    parts = make_parts(7, stages, dtype)
    losses = []
    for inputs, targets in steps:
        each = [
            token_loss(nn.Sequential(*parts)(x), y) for x, y in zip(inputs, targets, strict=True)
        ]
        losses.append(sum(each) / len(each))
        losses[-1].backward()
    gradients = [{n: p.grad for n, p in part.named_parameters()} for part in parts]
    return [value.detach() for value in losses], gradients


def compare_steps(results: list[dict], steps: list[tuple], dtype: torch.dtype) -> None:
    """results[i] is of stage i; `steps` are done again in one process."""
    losses, gradients = one_process(len(results), steps, dtype)
    microbatches = len(steps[0][0])
    for at, result in enumerate(results):
        last = at == len(gradients) - 1
        for loss, due in zip(result["losses"], losses, strict=True):
            if not last:
                assert loss is None, "only the last rank returns a loss, the others None"
                continue
            checks.kind(loss, Tensor, what="the last rank's loss")
            assert not loss.requires_grad, "the loss is asked for without a graph: detach it"
            checks.close(loss, due, what="the mean loss", dtype=due.dtype)
        assert not result["none_in"], f"stage {at}: {result['none_in'][0]} has got no gradient"
        for name, due in gradients[at].items():
            checks.close(
                result["gradients"][name],
                due,
                what=f"the gradient of stage {at}'s {name}",
                dtype=due.dtype,
                mistakes={"the sum over micro-batches, not their mean": due * microbatches},
            )


def draw_steps(steps: int, microbatches: int, g: torch.Generator) -> list[tuple]:
    draw = torch.randint(11, (steps, 2, microbatches, 2, 3), generator=g)
    return [(list(inputs), list(targets)) for inputs, targets in draw]


def ordered(text: str) -> list[tuple]:
    """Passes as text: a letter in upper case is a forward pass, in lower case its backward pass."""
    return [("F" if c.isupper() else "BW", ord(c.upper()) - ord("A"), 0) for c in text]


@checks.measured
def float_step(run: Callable, at: int, layers: list[tuple], inputs: list, targets: list) -> dict:
    """A step of linear stages, whose inputs are floats that want a gradient."""
    stage = nn.Linear(*layers[at][0].shape[::-1]).double()
    stage.load_state_dict(dict(zip(("weight", "bias"), layers[at], strict=True)))
    inputs = [x.clone().requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in inputs]
    order = ordered("ABab")
    received = torch.empty(len(inputs[0]), layers[at][0].shape[1], dtype=torch.float64)
    last = at == len(layers) - 1
    given = (stage, order, None if at else inputs, targets if last else None, F.mse_loss)
    run(*given, received if at else None)
    return {
        "weight": stage.weight.grad,
        "got gradients": any(x.grad is not None for x in inputs),
        "been changed": not all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)),
    }


# %% check="run_pipeline" points=2
steps = draw_steps(1, 3, torch.Generator().manual_seed(0))
orders = [ordered("ABaCbc"), ordered("AaBbCc")]  # rank 0: F0 F1 BW0 F2 BW1 BW2
results = launch(
    lambda rank: pipeline_steps(run_pipeline, orders[rank], 2, rank, steps, torch.float32),
    2,
    timeout=checks.PATIENCE,
)
compare_steps(results, steps, torch.float32)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
cases = [
    (["ABCaDbcd", "ABaCbDcd", "AaBbCcDd"], draw_steps(2, 4, g), torch.float64),  # 1F1B, two steps
    (["ABCcba"] * 3, draw_steps(1, 3, g), torch.float64),  # GPipe, backward in reverse order
    (["BAba", "BAba", "BbAa"], draw_steps(1, 2, g), torch.float32),
    (["Aa"] * 3, draw_steps(1, 1, g), torch.float64),
]
sizes = ((4, 3), (4, 4), (2, 4))
layers = [(torch.randn(n, k, generator=g), torch.randn(n, generator=g)) for n, k in sizes]
layers = [(weight.double(), bias.double()) for weight, bias in layers]
inputs = [torch.randn(5, 3, generator=g).double() for _ in range(2)]
targets = [torch.randn(5, 2, generator=g).double() for _ in range(2)]


def run_case(rank: int, case: tuple | None) -> dict:
    if case is None:
        return float_step(run_pipeline, rank, layers, inputs, targets)
    texts, steps, dtype = case
    return pipeline_steps(run_pipeline, ordered(texts[rank]), 3, rank, steps, dtype)


*of_cases, of_floats = checks.on_ranks(3, run_case, [*cases, None])
for (_, *due), results in zip(cases, of_cases, strict=True):
    compare_steps(results, *due)
weights = [layer[0].clone().requires_grad_() for layer in layers]
x = torch.cat(inputs)
for weight, (_, bias) in zip(weights, layers, strict=True):
    x = F.linear(x, weight, bias)
F.mse_loss(x, torch.cat(targets)).backward()
for rank, result in enumerate(of_floats):
    checks.close(result["weight"], weights[rank].grad, what=f"the gradient of stage {rank}")
    for what in ("been changed", "got gradients"):
        assert not result[what], f"the inputs have {what}; they should stay as they are"
### END HIDDEN TESTS

# %% check="run_pipeline" points=1
g = checks.generator(2)
cases = [
    (["ABCaDbEcFdGeHfgh", "ABaCbDcEdFeGfHgh", "AaBbCcDdEeFfGgHh"], draw_steps(1, 8, g)),
    (["ABCDEabcde"] * 3, draw_steps(1, 5, g)),
]


def note_case(rank: int, case: tuple) -> dict:
    texts, steps = case
    return pipeline_steps(run_pipeline, ordered(texts[rank]), 3, rank, steps)


noted = checks.on_ranks(3, note_case, cases)
for (texts, _), results in zip(cases, noted, strict=True):
    for rank, result in enumerate(results):
        due = ordered(texts[rank])
        passes = " ".join(kind for kind, _, _ in due)
        assert " ".join(result["passes"]) == passes, (
            f"rank {rank} is asked for the passes {passes}; yours does {' '.join(result['passes'])}"
        )
        # One more than asked for: a variable may still name the last output.
        assert result["most"] <= most_live(due) + 1, (
            f"rank {rank} holds {result['most']} graphs at once, {most_live(due)} are asked for: "
            "who still refers to the outputs of micro-batches that are done?"
        )
### BEGIN HIDDEN TESTS
for (_, steps), results in zip(cases, noted, strict=True):
    compare_steps(results, steps, torch.float64)
### END HIDDEN TESTS

# %% check="run_pipeline" points=1
g = checks.generator(3)
pairs = ((0, 2), (1, 3))  # two pipelines of two stages, each with its own data
data = [draw_steps(1, 3, g), draw_steps(1, 3, g)]
orders = [ordered("ABaCbc"), ordered("AaBbCc")]


def run_in_pairs(rank: int) -> dict:
    of, at = rank % 2, rank // 2
    return pipeline_steps(run_pipeline, orders[at], 2, at, data[of], torch.float32, pairs)


results = launch(run_in_pairs, 4, timeout=checks.PATIENCE)
for of, members in enumerate(pairs):
    compare_steps([results[rank] for rank in members], data[of], torch.float32)
### BEGIN HIDDEN TESTS
for result in results:
    assert len(result["passes"]) == 6, "a rank does other passes than its own"
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: a pipeline of three processes, measured
class Slow(nn.Module):
    """A stage that takes 10 ms forward and 20 ms backward, and notes when."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.times: list[tuple] = []

    def forward(self, x: Tensor) -> Tensor:
        return Wait.apply(self.linear(x), self.times)


class Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, times: list) -> Tensor:
        ctx.times, start = times, time.monotonic()
        time.sleep(0.01)
        times.append(("F", start, time.monotonic()))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        start = time.monotonic()
        time.sleep(0.02)
        ctx.times.append(("BW", start, time.monotonic()))
        return gradient, None


def timed(rank: int, orders: list) -> list[tuple]:
    torch.manual_seed(rank)
    stage, batch = Slow(), [torch.randn(2, 8) for _ in range(6)]
    given = (batch if rank == 0 else None, batch if rank == 2 else None)
    received = None if rank == 0 else torch.empty(2, 8)
    for _ in range(2):  # the first time, neighbors are connected and autograd's thread begins
        stage.times.clear()
        dist.barrier()
        run_pipeline(stage, orders[rank], *given, F.mse_loss, received)
    return [
        (step, start, end) for step, (_, start, end) in zip(orders[rank], stage.times, strict=True)
    ]


fig, axes = plot.plt.subplots(2, 1, figsize=(10, 3.8), sharex=True)
longest = 0
for ax, kind in zip(axes, ("gpipe", "1f1b"), strict=True):
    lines = launch(timed, 3, pipeline_schedule(3, 6, kind))
    begin = min(line[0][1] for line in lines)
    lines = [
        [
            (step, round(1e3 * (start - begin)), round(1e3 * (end - begin)))
            for step, start, end in line
        ]
        for line in lines
    ]
    gantt(ax, lines, {"gpipe": "GPipe", "1f1b": "1F1B"}[kind])
    total, busy = max(line[-1][2] for line in lines), 6 * 30
    longest = max(longest, total)
    print(
        f"{kind:6} {total} ms; bubble {total / busy - 1:.2f} of the ideal, (p - 1)/m = {2 / 6:.2f}"
    )
axes[0].set_xlim(0, longest)
axes[-1].set_xlabel("milliseconds")
plot.caption(
    fig,
    "Your run_pipeline in three processes that talk through gloo; a stage sleeps 10 ms forward and "
    "20 ms backward. The bubble is as computed, plus what messages and a busy machine cost.",
)
plot.plt.show()

# %% [markdown]
# ## Long context {#long-context}
#
# With a million tokens even one layer's activations of one example are too large. **Context
# parallelism** cuts the sequence everywhere, for the whole model. Norms and MLPs take each token
# alone; so does the loss, if targets and positions are made before the cut. Each rank has all
# weights and some of the tokens, so gradients of weights are summed over the group, as in data
# parallelism. Attention is another matter: every query needs all keys before it. There are two ways
# to give it to them.
#
# - **All-to-all** (Ulysses): for the time of attention exchange *a part of the sequence, all heads*
#   for *the whole sequence, a part of the heads*. Attention itself stays as it is.
# - **Ring**: queries stay where they are; blocks of keys and values go round.
#
# ### All-to-all
#
# The collective under the first of them, and under experts later: each rank has something else for
# each other rank. `dist.all_to_all_single(output, input, output_sizes, input_sizes)` sends rows;
# how many come in is what a rank can't know. So the sizes go first, in a small all-to-all of their
# own.
#
# Sending is a permutation of all rows of all ranks, so its backward pass is the inverse
# permutation: gradients take the same way back, with sizes exchanged.


# %% exercise="exchange" minutes=20 difficulty=2 path="more"
def exchange(
    rows: Tensor, counts: list[int], group: dist.ProcessGroup | None = None
) -> tuple[Tensor, list[int]]:
    """Sends each rank its rows.

    rows: (n, …), of any dtype and strides; n differs from rank to rank and may be 0. counts: how
    many rows go to each rank of `group`, in order: the first counts[0] to rank 0, and so on. They
    sum to n; ValueError otherwise, or where there are not as many as ranks.
    Returns (received, received_counts): the rows for this rank (m, …), contiguous, those of rank 0
    first; and how many came from each. `exchange(received, received_counts)` sends all back:
    it is the exact inverse. Gradients of floating-point rows take the same way back.

    Sizes are sent first. Apart from them, a rank sends and receives no row that is not for it.
    """
    ### BEGIN SOLUTION
    if len(counts) != dist.get_world_size(group) or sum(counts) != len(rows):
        raise ValueError(f"counts {counts} do not divide {len(rows)} rows among the ranks")
    sizes = torch.tensor(counts)
    received_sizes = torch.empty_like(sizes)
    dist.all_to_all_single(received_sizes, sizes, group=group)
    received_counts = received_sizes.tolist()
    return _Exchange.apply(rows, counts, received_counts, group), received_counts
    ### END SOLUTION


# Here is room for your classes of torch.autograd.Function.
### BEGIN SOLUTION
def moved(rows: Tensor, give: list[int], take: list[int], group) -> Tensor:
    received = rows.new_empty(sum(take), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), take, give, group=group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, give, take, group):
        ctx.way = take, give, group
        return moved(rows, give, take, group)

    @staticmethod
    def backward(ctx, gradient):
        return moved(gradient, *ctx.way), None, None, None


### END SOLUTION

# %% [markdown]
# <details><summary>Hint: sizes</summary>
#
# An all-to-all of `torch.tensor(counts)`, one number for each rank, gives each rank how many it
# will get from each.
# </details>
#
# <details><summary>Hint: backward</summary>
#
# The same `all_to_all_single` with the two lists exchanged. The sizes are known by then.
# </details>


# %% tags=["support"]
# Support: rows sent and sent back on one rank
def total_sent(log: list) -> int:
    return sum(elements for _, elements in log)


@checks.measured
def exchange_rows(send: Callable, rank: int, case: tuple) -> dict:
    """case: rows of each rank, counts of each rank, groups."""
    all_rows, all_counts, members = case
    group = group_of(members)
    rows, counts = all_rows[rank].detach(), list(all_counts[rank])
    before = rows.clone()
    if rows.is_floating_point():
        rows.requires_grad_()
    with checks.communication() as log:
        received, came = send(rows, counts, group)
    result = {"received": received.detach().clone(), "counts": list(came), "log": list(log)}
    result["contiguous"] = received.is_contiguous()
    result["back"] = send(received.detach(), list(came), group)[0].detach()
    if rows.is_floating_point():
        assert received.requires_grad, "what is received carries no gradient"
        weights = torch.arange(received.numel()).view(received.shape).to(rows.dtype) + 100 * rank
        with checks.communication() as log:
            received.backward(weights)
        result["gradient"], result["backward"] = rows.grad, list(log)
    assert torch.equal(rows.detach(), before), "rows were changed in place"
    assert counts == list(all_counts[rank]), "counts were changed in place"
    return result


def compare_exchange(send: Callable, ranks: int, *cases: tuple, also=None) -> None:
    found = checks.on_ranks(ranks, lambda rank, case: exchange_rows(send, rank, case), cases, also)
    for (rows, counts, members), results in zip(cases, found, strict=True):
        for rank, result in enumerate(results):
            mine = mates(rank, ranks, members)
            r = mine.index(rank)
            due = [rows[s].split(list(counts[s]))[r] for s in mine]
            where = f"on rank {rank}, counts {counts}"
            assert result["counts"] == [len(part) for part in due], (
                f"received_counts {where} are {result['counts']}, they should be "
                f"{[len(part) for part in due]}"
            )
            checks.close(
                result["received"], torch.cat(due), what=f"the rows received {where}", rtol=0,
                dtype=rows[rank].dtype,
            )  # fmt: skip
            assert result["contiguous"], "received rows are asked for contiguous"
            checks.close(result["back"], rows[rank], what=f"the rows sent back {where}", rtol=0)
            width = rows[rank][:1].numel() if len(rows[rank]) else torch.cat(due)[:1].numel()
            most = max(len(rows[rank]), sum(map(len, due))) * width
            spent = total_sent(result["log"])
            assert spent <= most + 4 * ranks, (
                f"rank {rank} moves {spent} numbers; its rows going and coming are at most {most}, "
                "and sizes are few. Who needs rows that are not for them?"
            )
            if "gradient" not in result:
                continue
            sizes = [[len(part) for part in rows[s].split(list(counts[s]))] for s in mine]
            gradient = []
            for t, owner in enumerate(mine):  # what came back from each owner, in order
                first = sum(sizes[s][t] for s in range(r))
                total = sum(sizes[s][t] for s in range(len(mine)))
                shape = (total, *rows[rank].shape[1:])
                weights = torch.arange(total * max(width, 1)).view(shape) + 100 * owner
                gradient.append(weights[first : first + sizes[r][t]])
            checks.close(
                result["gradient"],
                torch.cat(gradient).to(rows[rank].dtype),
                what=f"the gradient of rows {where}",
                dtype=rows[rank].dtype,
            )
            spent = total_sent(result["backward"])
            assert spent <= most + 4 * ranks, f"rank {rank} moves {spent} numbers backward"


# %% check="exchange" points=3
rows = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0]])]
compare_exchange(exchange, 2, (rows, [[1, 2], [2, 0]], ()))
### BEGIN HIDDEN TESTS
g = checks.generator(7)


def draw_exchange(shape: tuple, sizes: list, members: tuple = (), dtype=torch.float64) -> tuple:
    rows = [torch.randint(-99, 99, (sum(c), *shape), generator=g).to(dtype) for c in sizes]
    return rows, sizes, members


flat = draw_exchange((2, 3), [[3, 0, 2], [1, 4, 0], [2, 2, 2]])
flat[0][1] = flat[0][1].flip(0).transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous


def wrong_counts_and_a_sum(rank: int) -> None:
    checks.raises(ValueError, exchange, torch.ones(3, 1), [1, 1, 0])
    checks.raises(ValueError, exchange, torch.ones(3, 1), [3])
    leaf = torch.ones(3, 2, requires_grad=True)
    exchange(leaf, [1, 1, 1])[0].sum().backward()  # the gradient that comes is one number, expanded
    checks.close(leaf.grad, torch.ones(3, 2), what="the gradient of a sum")


compare_exchange(
    exchange,
    3,
    flat,
    draw_exchange((), [[0, 0, 0], [5, 1, 3], [0, 7, 0]], dtype=torch.float32),  # nothing to send
    draw_exchange((4,), [[8, 0, 0], [3, 0, 0], [1, 0, 0]], dtype=torch.bfloat16),  # all to rank 0
    draw_exchange((2,), [[2, 1, 3], [0, 3, 3], [2, 4, 0]], dtype=torch.int64),
    draw_exchange((3,), [[1, 4], [2], [5, 0]], ((0, 2), (1,))),
    also=wrong_counts_and_a_sum,
)


### END HIDDEN TESTS

# %% [markdown]
# ### Ulysses
#
# A rank has (batch, heads, own, head_dim): all heads of its tokens. Rank $s$ is to have heads
# $sh/p$ to $(s+1)h/p-1$ of all tokens. So a row is one token with one rank's share of the heads,
# and that share decides where it goes. Rows arrive in the order of ranks, which is the order of the
# sequence.
#
# A rank sends and receives a $p$-th of $q$, $k$, $v$ and the output: with more ranks and the same
# sequence the bytes *fall*. An all-gather of $k$ and $v$ would not. The price: at most as many
# ranks as heads, and KV heads that are fewer than ranks have to be replicated.


# %% exercise="ulysses_attention" minutes=20 difficulty=2 path="more"
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Attention over a sequence that is cut among the ranks of `group`, by all-to-alls (exchange).

    q: (batch, heads, own, head_dim), k and v: (batch, kv_heads, own, head_dim): the queries, keys
    and values of this rank's consecutive part of the sequence; rank 0 has the first. `own` may
    differ from rank to rank. The number of ranks divides heads, ValueError otherwise; kv_heads
    divides heads. k and v may have fewer heads than q: `attend` handles that. Where the ranks do
    not divide kv_heads, each KV head is repeated heads/kv_heads times (repeat_interleave) first.
    attend(q, k, v) is called once, with this rank's heads (rank r: the r-th part of them) and
    the whole sequence.
    Returns what it gives for this rank's queries, all heads: (batch, heads, own, head_dim).
    Gradients flow to all ranks' q, k and v.
    """
    ### BEGIN SOLUTION
    ranks, heads, own = dist.get_world_size(group), q.shape[1], q.shape[2]
    if heads % ranks:
        raise ValueError(f"{heads} heads cannot be divided among {ranks} ranks")
    if k.shape[1] % ranks:
        k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))

    def to_heads(x: Tensor) -> tuple[Tensor, list[int]]:
        rows = x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        received, lengths = exchange(rows, [own] * ranks, group)
        return received.permute(1, 2, 0, 3), lengths  # (batch, heads / ranks, seq, head_dim)

    (q, lengths), (k, _), (v, _) = to_heads(q), to_heads(k), to_heads(v)
    rows = attend(q, k, v).permute(2, 0, 1, 3)
    received, _ = exchange(rows, lengths, group)
    return received.unflatten(0, (ranks, own)).permute(2, 0, 3, 1, 4).flatten(1, 2)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: axes</summary>
#
# Split heads into (ranks, heads/ranks): `x.unflatten(1, (ranks, -1))`. `exchange` wants rows of
# shape (ranks·own, …), ranks first, then tokens: permute, then flatten those two.
# </details>
#
# <details><summary>Hint: the way back</summary>
#
# Rows are tokens, and the first `lengths[0]` belong to rank 0. What returns is (ranks·own, batch,
# heads/ranks, head_dim), and the ranks are parts of the heads.
# </details>


# %% tags=["support"]
# Support: attention with a cut sequence, on one rank
def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in one process, with KV heads repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


@checks.measured
def attention_here(attend: Callable, rank: int, case: tuple) -> dict:
    """case: q, k, v of the whole sequence, cotangent, lengths of the parts in a group, groups."""
    q, k, v, dy, lengths, members = case
    group = group_of(members)
    lengths = lengths if dist.get_world_size(group) > 1 else [q.shape[2]]
    mine = [x.split(lengths, dim=2)[dist.get_rank(group)] for x in (q, k, v, dy)]
    q, k, v = (x.detach().requires_grad_() for x in mine[:3])
    before = [x.detach().clone() for x in (q, k, v)]
    heads: list[tuple] = []

    def counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads.append((*q.shape, k.shape[2]))
        return full_attention(q, k, v)

    with checks.communication() as log:
        out = attend(q, k, v, counting, group)
    assert out.requires_grad, "the result carries no gradient"
    value = out.detach().clone()
    out.backward(mine[3])
    for name, x, was in zip("qkv", (q, k, v), before, strict=True):
        assert torch.equal(x.detach(), was), f"{name} was changed in place"
    return {
        "out": value,
        "gradients": [x.grad for x in (q, k, v)],
        "heads": heads,
        "log": list(log),
    }


def compare_attention(attend: Callable, ranks: int, *cases: tuple, also=None) -> None:
    found = checks.on_ranks(
        ranks, lambda rank, case: attention_here(attend, rank, case), cases, also
    )
    for (q, k, v, dy, parts, members), results in zip(cases, found, strict=True):
        leaves = [wide(x) for x in (q, k, v)]
        out = full_attention(*leaves)
        out.backward(dy.double())
        for rank, result in enumerate(results):
            mine = mates(rank, ranks, members)
            r, p = mine.index(rank), len(mine)
            lengths = parts if p > 1 else [q.shape[2]]
            shape = (q.shape[0], q.shape[1] // p, q.shape[2], q.shape[3], q.shape[2])
            assert result["heads"] == [shape], (
                f"attend is called with q's shape and k's length {result['heads']}; one call with "
                f"{shape} is asked for: all {q.shape[2]} tokens, a part of the heads"
            )
            what = f"attention on rank {rank}, parts of {lengths} tokens"
            checks.close(
                result["out"],
                out.split(lengths, dim=2)[r].to(q.dtype),
                what=what,
                dtype=q.dtype,
                rtol=3e-5 if q.dtype == torch.float32 else None,
            )
            for name, gradient, leaf in zip("qkv", result["gradients"], leaves, strict=True):
                assert gradient is not None, f"no gradient reaches {name} on rank {rank}"
                checks.close(
                    gradient,
                    leaf.grad.split(lengths, dim=2)[r].to(q.dtype),
                    what=f"the gradient of {name}, {what}",
                    dtype=q.dtype,
                    rtol=3e-5 if q.dtype == torch.float32 else None,
                )
            kv = k.numel() if k.shape[1] % p == 0 else q.numel()
            most = 2 * (q.numel() + kv) * max(max(lengths) / sum(lengths), 1 / p) + 16 * p
            assert total_sent(result["log"]) <= most, (
                f"rank {rank} moves {total_sent(result['log'])} numbers, {most:.0f} are enough: "
                "each rank needs its own heads only"
            )


def draw_attention(
    shape: tuple, kv_heads: int, lengths: list, g: torch.Generator, members=(), dtype=torch.float64
) -> tuple:
    """shape: (batch, heads, head_dim)."""
    batch, heads, width = shape
    sizes = [heads, kv_heads, kv_heads, heads]
    q, k, v, dy = (torch.randn(batch, sum(lengths), h, width, generator=g) for h in sizes)
    return *(x.to(dtype).transpose(1, 2) for x in (q, k, v, dy)), lengths, members


# %% check="ulysses_attention" points=3
g = checks.generator(8)
compare_attention(ulysses_attention, 2, draw_attention((1, 2, 3), 2, [2, 2], g))
### BEGIN HIDDEN TESTS
cases = [
    draw_attention((2, 6, 3), 3, [3, 3, 3], g),
    draw_attention((1, 3, 2), 3, [4, 0, 2], g, dtype=torch.float32),  # a rank without a token
    draw_attention((2, 6, 2), 2, [1, 2, 4], g),  # fewer KV heads than ranks
    draw_attention((2, 4, 3), 1, [2, 3], g, ((0, 2), (1,))),
]


def too_few_heads(rank: int) -> None:
    q = torch.ones(1, 4, 2, 2)
    checks.raises(ValueError, ulysses_attention, q, q, q, full_attention)


compare_attention(ulysses_attention, 3, *cases, also=too_few_heads)
### END HIDDEN TESTS

# %% [markdown]
# ### Ring attention
#
# Queries stay. In step $i$ rank $r$ works on the keys and values of rank $r-i$, while it hands them
# on to rank $r+1$: $p-1$ messages, and never more than two foreign blocks in memory. What a query
# has seen so far is merged with what it sees next by an online softmax (lesson 29 builds
# FlashAttention on it): begin with a maximum $m=-\infty$, a sum $\ell=0$ and an unnormalized output
# $o=0$; for the scores $s_j$ of the keys $j$ of the next block,
#
# $$ m' = \max(m, \max_j s_j),\quad \ell' = \ell e^{m-m'} + \sum_j e^{s_j-m'},\quad
# o' = o\,e^{m-m'} + \sum_j e^{s_j-m'} v_j, $$
#
# and divide at the end: $o/\ell$. The result does not depend on the order of the blocks.
#
# The causal mask makes almost half of this work unnecessary, and what is left uneven. With
# consecutive parts (**contiguous**) rank 0 needs its own block only, rank $p-1$ all $p$; since all
# wait for the slowest, skipping saves no time. The **zigzag** layout cuts the sequence into $2p$
# chunks and gives rank $r$ the chunks $r$ and $2p-1-r$, an early and a late one: all have the same
# work.


# %%
def chunks_of(rank: int, ranks: int, layout: str) -> list[int]:
    """Which chunks of the sequence a rank has, in order: of `ranks` chunks, or of 2·ranks."""
    if layout == "contiguous":
        return [rank]
    if layout == "zigzag":
        return [rank, 2 * ranks - 1 - rank]
    raise ValueError(f"layout is contiguous or zigzag, not {layout!r}")


def lay_out(x: Tensor, ranks: int, layout: str) -> list[Tensor]:
    """Each rank's part of a sequence (batch, heads, seq, head_dim)."""
    chunks = x.chunk(len(chunks_of(0, ranks, layout)) * ranks, dim=2)
    places = [chunks_of(rank, ranks, layout) for rank in range(ranks)]
    return [torch.cat([chunks[i] for i in mine], dim=2) for mine in places]


class Products(TorchDispatchMode):
    """Inside the block: `total`, the multiply-adds of matrix products and fused attention."""

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in ("mm", "bmm", "baddbmm", "addmm", "mv"):
            inner = args[1 if "add" in name else 0].shape[-1]
            self.total += out.numel() * inner
        elif "attention" in name and "backward" not in name:
            self.total += 2 * args[0].numel() * args[1].shape[-2]
        return out


# %% exercise="ring_attention" minutes=35 difficulty=3 path="more"
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None = None,
    layout: str = "contiguous",
) -> Tensor:
    """Causal attention over a cut sequence; keys and values go round the ranks of `group`.

    q: (batch, heads, own, head_dim), k and v: (batch, kv_heads, own, head_dim), kv_heads divides
    heads; float32 or float64, any strides, `own` the same on all ranks: this rank's chunks, as
    `chunks_of(rank, ranks, layout)` numbers them, one after another. ValueError for an unknown
    layout, or an odd `own` in zigzag.
    Returns (batch, heads, own, head_dim) in q's dtype: what attention over the whole sequence,
    scaled by head_dim^−½, gives for this rank's queries. No gradient is asked for, inputs stay.

    Blocks go by messages (isend, irecv …) to the next rank of the group, at most ranks − 1 times k
    and v, as they are (KV heads not repeated). A chunk of queries is not multiplied with a chunk of
    keys that are all later; the chunks of the own block may be multiplied all at once.
    """
    ### BEGIN SOLUTION
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = chunks_of(rank, ranks, layout)
    if q.shape[2] % len(mine):
        raise ValueError(f"{q.shape[2]} tokens can't be cut into two chunks")
    queries = (q * q.shape[-1] ** -0.5).chunk(len(mine), dim=2)
    state = [
        [
            x.new_full((*x.shape[:3], 1), -torch.inf),
            x.new_zeros(*x.shape[:3], 1),
            torch.zeros_like(x),
        ]
        for x in queries
    ]
    block = torch.stack([k, v])  # contiguous: it is sent as it is
    for step in range(ranks):
        if step < ranks - 1:
            coming = torch.empty_like(block)
            sending = dist.isend(block, group=group, group_dst=(rank + 1) % ranks)
            receiving = dist.irecv(coming, group=group, group_src=(rank - 1) % ranks)
        theirs = chunks_of((rank - step) % ranks, ranks, layout)
        for number, pair in zip(theirs, block.chunk(len(theirs), dim=3), strict=True):
            keys, values = pair.repeat_interleave(q.shape[1] // k.shape[1], dim=2)
            for i, own in enumerate(mine):
                if number > own:
                    continue
                scores = queries[i] @ keys.mT
                if number == own:
                    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(later, -torch.inf)
                top, total, out = state[i]
                new = torch.maximum(top, scores.amax(-1, keepdim=True))
                weights, shrink = (scores - new).exp(), (top - new).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                state[i] = [new, total, out * shrink + weights @ values]
        if step < ranks - 1:
            sending.wait(), receiving.wait()
            block = coming
    return torch.cat([out / total for _, total, out in state], dim=2)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three cases</summary>
#
# Compare chunk numbers: keys' number above the queries': skip; equal: the usual triangle; below:
# no mask at all.
# </details>
#
# <details><summary>Hint: everything hangs</summary>
#
# `isend` and `irecv` return at once; start both, compute, then `wait()` for both. And don't write
# into a block that is still being sent.
# </details>
#
# <details><summary>Hint: k and v in one message</summary>
#
# `torch.stack([k, v])` is contiguous and travels as one.
# </details>


# %% tags=["support"]
# Support: ring attention on one rank
@checks.measured
def ring_here(attend: Callable, rank: int, case: tuple) -> dict:
    """case: q, k, v of the whole sequence, layout, groups."""
    *whole, layout, members = case
    group = group_of(members)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = [lay_out(x, ranks, layout)[rank] for x in whole]
    mine = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in mine]  # not contiguous
    before = [x.clone() for x in mine]
    with checks.communication() as log, Products() as products:
        out = attend(*mine, group, layout)
    for name, x, was in zip("qkv", mine, before, strict=True):
        assert torch.equal(x, was), f"{name} was changed in place"
    return {"out": out.detach(), "log": list(log), "work": products.total}


def compare_rings(attend: Callable, ranks: int, *cases: tuple, also=None) -> None:
    found = checks.on_ranks(ranks, lambda rank, case: ring_here(attend, rank, case), cases, also)
    for (q, k, v, layout, members), results in zip(cases, found, strict=True):
        whole = full_attention(q.double(), k.double(), v.double())
        for rank, result in enumerate(results):
            mine = mates(rank, ranks, members)
            r, p = mine.index(rank), len(mine)
            ours = [lay_out(x.double(), p, layout)[r] for x in (q, k, v)]
            what = f"ring attention, {layout}, on rank {r} of {p}"
            checks.close(
                result["out"],
                lay_out(whole, p, layout)[r].to(q.dtype),
                what=what,
                dtype=q.dtype,
                rtol=2e-5 if q.dtype == torch.float32 else None,
                mistakes={
                    "attention to this rank's own block only": full_attention(*ours).to(q.dtype)
                }
                if p > 1
                else {},
            )
            most = (p - 1) * (k.numel() + v.numel()) // p
            assert set(kinds(result["log"])) <= {"message"}, (
                f"{what}: {sorted(set(kinds(result['log'])))} are called; messages are asked for"
            )
            assert total_sent(result["log"]) <= most, (
                f"{what} sends {total_sent(result['log'])} numbers; (ranks − 1) times its k and v "
                f"are {most}"
            )
            work, allowed = result["work"], ring_work(q, r, p, layout)
            assert allowed / 4 < work <= allowed, (
                f"{what}: {work} multiply-adds in matrix products; {allowed} are enough if chunks "
                "of keys that are all later are skipped"
            )


def ring_work(q: Tensor, rank: int, ranks: int, layout: str) -> int:
    """Multiply-adds of a rank for qKᵀ and the product with V, its own block as a whole."""
    chunks = [chunks_of(r, ranks, layout) for r in range(ranks)]
    pairs = [
        i >= j or other == rank
        for other in range(ranks)
        for i in chunks[rank]
        for j in chunks[other]
    ]
    size = q.shape[2] // (ranks * len(chunks[0]))
    return 2 * sum(pairs) * size * size * q.shape[0] * q.shape[1] * q.shape[3]


def draw_ring(
    shape: tuple, kv_heads: int, layout: str, g: torch.Generator, members=(), dtype=torch.float64
) -> tuple:
    batch, heads, seq, width = shape
    q, k, v = (
        torch.randn(batch, h, seq, width, generator=g).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    return 2 * q, k, v, layout, members


# %% check="ring_attention" points=3
g = checks.generator(9)
compare_rings(ring_attention, 2, draw_ring((1, 2, 6, 3), 2, "contiguous", g))
### BEGIN HIDDEN TESTS
late = draw_ring((1, 1, 12, 4), 1, "contiguous", g)
late[1][:, :, 8:] *= 1000  # the last block's scores dwarf all others
compare_rings(
    ring_attention,
    3,
    draw_ring((2, 4, 9, 3), 2, "contiguous", g),
    late,
    draw_ring((2, 2, 3, 5), 1, "contiguous", g, dtype=torch.float32),
    draw_ring((1, 2, 4, 3), 1, "contiguous", g, ((0, 2), (1,))),
)
### END HIDDEN TESTS

# %% check="ring_attention" points=3
g = checks.generator(10)
compare_rings(ring_attention, 2, draw_ring((1, 2, 8, 3), 1, "zigzag", g))
### BEGIN HIDDEN TESTS
early = draw_ring((2, 1, 18, 4), 1, "zigzag", g)
early[1][:, :, :3] *= 1000  # the first chunk's scores dwarf all others


def wrong_layouts(rank: int) -> None:
    q = torch.ones(1, 1, 3, 2)
    checks.raises(ValueError, ring_attention, q, q, q, None, "spiral")
    checks.raises(ValueError, ring_attention, q, q, q, None, "zigzag")


compare_rings(
    ring_attention,
    3,
    draw_ring((2, 4, 12, 3), 2, "zigzag", g),
    early,
    draw_ring((1, 2, 6, 5), 2, "zigzag", g, dtype=torch.float32),
    draw_ring((2, 2, 8, 3), 1, "zigzag", g, ((0, 2), (1,))),
    also=wrong_layouts,
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: which rank works on which scores, contiguous and zigzag
fig, axes = plot.plt.subplots(1, 3, figsize=(11, 3.3), width_ratios=(1, 1, 1.15))
seq, p = 32, 4
for ax, layout in zip(axes, ("contiguous", "zigzag"), strict=False):
    owner = torch.empty(seq)
    for rank, mine in enumerate(lay_out(torch.arange(seq).view(1, 1, seq, 1), p, layout)):
        owner[mine.flatten()] = rank
    picture = owner[:, None].expand(seq, seq).clone()
    picture[torch.ones(seq, seq, dtype=torch.bool).triu(1)] = torch.nan
    ax.imshow(picture, cmap="cividis", vmin=0, vmax=p - 1)
    for rank in range(p):
        for chunk in (
            owner.eq(rank).nonzero().flatten().split(seq // p if layout == "contiguous" else 4)
        ):
            at, color = chunk.float().mean(), "black" if rank > 1 else "white"
            ax.text(0.5, at, str(rank), color=color, va="center", fontsize=9)
    ax.grid(False)
    ax.set(title=layout, xlabel="key", ylabel="query")
for i, layout in enumerate(("contiguous", "zigzag")):

    def work(rank: int, layout: str = layout) -> int:
        q = lay_out(torch.ones(1, 1, 64, 8), p, layout)[rank]
        with Products() as products:
            ring_attention(q, q, q, None, layout)
        return products.total

    counts = [count / (2 * 64 * 64 * 8) for count in launch(work, p)]
    axes[2].bar(
        [r + (i - 0.5) * 0.38 for r in range(p)],
        counts,
        width=0.36,
        color=plot.COLORS[i],
        hatch=("", "//")[i],
        edgecolor="white",
        label=layout,
    )
axes[2].set(xlabel="rank", xticks=range(p), ylabel="share of both full products", title="work")
axes[2].legend()
plot.caption(
    fig,
    "Left and middle: the rank (number, shade) that computes a row of scores. Right: multiply-adds "
    "counted in your ring_attention on 4 processes. A step takes as long as its slowest rank.",
)
plot.plt.show()

# %% [markdown]
# For training, the ring turns once more: with $m$, $\ell$ and the output saved, each rank can
# compute the gradient of its queries and, for the block that is passing, its share of $\bar k$ and
# $\bar v$; these travel along with the block, collect a share at each stop, and arrive home after
# $p$ steps. Twice the bytes of the forward pass and more, and still hidden behind computation if
# blocks are long enough: a block of $c$ tokens costs $O(c^2)$ to compute and $O(c)$ to send.

# %% [markdown]
# ## Experts {#experts}
#
# A mixture of experts (lesson 11) has many MLPs, of which a token visits a few (2 of 8 in Mixtral,
# 8 of 256 in DeepSeek-V3). They are the obvious thing to cut: rank $r$ keeps the $r$-th part of the
# **experts**, tokens travel to them and back. Two all-to-alls forward, two backward; each moves as
# many rows as there are tokens times experts visited, whatever the number of experts is.
#
# The splits are as uneven as the router's taste. A rank may get nothing; all may want one expert.
# (Hence capacity limits and balancing losses, lesson 11.) And rows must come back to exactly where
# they came from: sort by expert, send, sort by expert again (what arrives is sorted by sender
# first), compute, and undo all of it.


# %% exercise="expert_all_to_all" minutes=30 difficulty=3 path="more"
def expert_all_to_all(
    tokens: Tensor, assignment: Tensor, experts: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Sends each token to the rank of its expert.

    tokens: (n, width), this rank's; n differs from rank to rank and may be 0. assignment: (n,)
    int64, the expert of each, from 0 to experts − 1; −1: no expert, not sent, its output is zeros
    (for several experts a token, repeat it first). experts: how many there are on all ranks
    together; each rank has experts/ranks consecutive ones, rank 0 the first. ValueError if the
    ranks do not divide them.
    Returns (received, counts, combine):
      received (m, width): the tokens of this rank's experts, from all ranks; sorted by expert, then
        by the rank they come from, then by their place there.
      counts (experts/ranks,) int64: how many each of this rank's experts has.
      combine(outputs): sends rows (m, any width), in the order of received, back to where their
        tokens came from: (n, that width), zeros for tokens of no expert. May be called often, by
        all ranks equally often, also those without rows.
    Gradients flow through received, and through combine. Uses exchange: no token goes to
    a rank that does not need it.
    """
    ### BEGIN SOLUTION
    ranks = dist.get_world_size(group)
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be divided among {ranks} ranks")
    order = assignment.argsort(stable=True)
    order = order[(assignment < 0).sum() :]  # tokens of no expert come first
    chosen = assignment.clamp(min=0).bincount(weights=(assignment >= 0).double(), minlength=experts)
    sizes = chosen.long().view(ranks, -1)  # rank, its expert
    arrived, senders = exchange(tokens[order], sizes.sum(1).tolist(), group)
    theirs, _ = exchange(sizes, [1] * ranks, group)  # sender, own expert
    local = torch.arange(experts // ranks).repeat(ranks).repeat_interleave(theirs.flatten())
    by_expert = local.argsort(stable=True)

    def combine(outputs: Tensor) -> Tensor:
        by_sender = torch.zeros_like(outputs).index_copy(0, by_expert, outputs)
        back, _ = exchange(by_sender, senders, group)
        return back.new_zeros(len(tokens), *back.shape[1:]).index_copy(0, order, back)

    return arrived[by_expert], theirs.sum(0), combine
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order of sending</summary>
#
# `assignment.argsort(stable=True)` sorts tokens by expert, and so by rank; −1 comes first and is
# cut off. `bincount(minlength=experts)` counts them.
# </details>
#
# <details><summary>Hint: which expert does an arrived row belong to</summary>
#
# Send the counts for each expert, too: they are (ranks, experts/ranks) numbers, a row for each
# rank, and `exchange` carries integers.
# </details>
#
# <details><summary>Hint: undo a permutation</summary>
#
# If `b = a[order]`, then `a = zeros.index_copy(0, order, b)`, and gradients flow through both.
# </details>


# %% tags=["support"]
# Support: a mixture of experts on one rank, and in one process
@checks.measured
def experts_here(send: Callable, rank: int, case: tuple) -> dict:
    """case: tokens and assignments of each rank, (experts, width, out) weights, groups."""
    tokens, assignments, weights, members = case
    group = group_of(members)
    ranks, r = dist.get_world_size(group), dist.get_rank(group)
    leaf, assignment = tokens[rank].detach().requires_grad_(), assignments[rank].clone()
    before = leaf.detach().clone()
    with checks.communication() as log:
        received, counts, combine = send(leaf, assignment, len(weights), group)
        spent = total_sent(log)
    assert isinstance(counts, Tensor), "counts are asked for as a tensor of int64"
    assert int(counts.sum()) == len(received), (
        f"counts {counts.tolist()} do not sum to the {len(received)} tokens received"
    )
    own = weights.chunk(ranks)[r].clone().requires_grad_()
    parts = received.split(counts.tolist())
    outputs = torch.cat([torch.tanh(x @ w) for x, w in zip(parts, own, strict=True)])
    y = combine(outputs)
    again = combine(outputs.detach() * 2).detach()
    value = y.detach().clone()
    assert y.requires_grad, "what combine returns carries no gradient"
    y.backward(torch.ones_like(y) * (rank + 1))
    assert torch.equal(leaf.detach(), before), "tokens were changed in place"
    assert torch.equal(assignment, assignments[rank]), "assignment was changed in place"
    return {
        "received": received.detach(),
        "counts": counts,
        "y": value,
        "again": again,
        "dx": leaf.grad,
        "dw": own.grad,
        "spent": spent,
    }


def compare_experts(send: Callable, ranks: int, *cases: tuple, also=None) -> None:
    found = checks.on_ranks(ranks, lambda rank, case: experts_here(send, rank, case), cases, also)
    for (tokens, assignments, weights, members), results in zip(cases, found, strict=True):
        dtype, experts = weights.dtype, len(weights)
        for members_ in members or (tuple(range(ranks)),):
            matrices = wide(weights)
            leaves = {r: wide(tokens[r]) for r in members_}
            outputs = {}
            for r, x in leaves.items():  # one process, all experts for all tokens
                y = torch.tanh(torch.einsum("nd,edo->neo", x, matrices))
                chosen = F.one_hot(assignments[r] + 1, experts + 1)[:, 1:].double()
                outputs[r] = (y * chosen[..., None]).sum(1)
            sum((y * (r + 1)).sum() for r, y in outputs.items()).backward()
            each = experts // len(members_)
            for place, rank in enumerate(members_):
                result = results[rank]
                own = range(place * each, (place + 1) * each)
                due = [[tokens[r][assignments[r] == e] for r in members_] for e in own]
                counts = torch.tensor([sum(map(len, rows)) for rows in due])
                where = f"on rank {rank}, assignments {[a.tolist() for a in assignments]}"
                checks.close(result["counts"], counts, what=f"counts {where}", dtype=torch.int64)
                checks.close(
                    result["received"],
                    torch.cat([x for rows in due for x in rows]),
                    what=f"the tokens received {where}",
                    hint="Sorted by expert, then by the rank they come from.",
                    rtol=0,
                    dtype=dtype,
                )
                for name, got, expected in (
                    ("the output", result["y"], outputs[rank]),
                    (
                        "what a second combine, of outputs doubled, gives",
                        result["again"],
                        2 * outputs[rank],
                    ),
                    ("the gradient of tokens", result["dx"], leaves[rank].grad),
                    (
                        "the gradient of this rank's experts",
                        result["dw"],
                        matrices.grad[own.start : own.stop],
                    ),
                ):
                    assert got is not None, f"{name} is missing {where}"
                    checks.close(
                        got,
                        expected.detach().to(dtype),
                        what=f"{name} {where}",
                        dtype=dtype,
                        atol=1e-5 if dtype == torch.float32 else 1e-12,
                    )
                width = tokens[rank].shape[1]
                most = max(len(tokens[rank]), int(counts.sum())) * width + 8 * ranks * experts
                assert result["spent"] <= most, (
                    f"rank {rank} moves {result['spent']} numbers to send its tokens; {most} are "
                    "enough"
                )


def draw_experts(
    sizes: list[int], experts: int, g: torch.Generator, members=(), dtype=torch.float64, width=3
) -> tuple:
    tokens = [torch.randn(width, n, generator=g).to(dtype).T for n in sizes]
    assignments = [torch.randint(-1, experts, (n,), generator=g) for n in sizes]
    return tokens, assignments, torch.randn(experts, width, 2, generator=g).to(dtype), members


# %% check="expert_all_to_all" points=3
tokens = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0]])]
wanted = [torch.tensor([1, 0, 1]), torch.tensor([0, -1])]
compare_experts(expert_all_to_all, 2, (tokens, wanted, torch.tensor([[[0.1]], [[0.2]]]), ()))
### BEGIN HIDDEN TESTS
g = checks.generator(11)
cases = [
    draw_experts([9, 4, 6], 6, g, width=20),
    draw_experts([0, 7, 2], 3, g, dtype=torch.float32),  # a rank without tokens
    draw_experts([3, 2, 4], 6, g),
    draw_experts([5, 3, 6], 4, g, ((0, 2), (1,))),
    draw_experts([2, 2, 2], 3, g),
]
for assignment in cases[2][1]:
    assignment.fill_(4)  # all want one expert
for assignment in cases[4][1]:
    assignment.fill_(-1)  # nobody wants any


def too_few_experts(rank: int) -> None:
    tokens, assignment = torch.ones(2, 1), torch.tensor([0, 1])
    checks.raises(ValueError, expert_all_to_all, tokens, assignment, 4)


compare_experts(expert_all_to_all, 3, *cases, also=too_few_experts)
### END HIDDEN TESTS

# %% [markdown]
# ## Planning {#planning}
#
# A large job uses all of it at once: $\text{gpus} = \text{dp}\cdot\text{tp}\cdot\text{pp}$. Each
# of `dp` replicas is a pipeline of `pp` stages, and each stage is spread over `tp` GPUs. Which
# numbers? Each way of cutting has its price:
#
# | | cuts | sends, for each GPU and step | at a price |
# |---|---|---|---|
# | dp | the batch | the gradients of its part of the model, once | no memory is saved |
# | tp | each layer | activations, four times in each layer and micro-batch | needs fast links |
# | pp | between layers | activations, at the border of a stage | the bubble |
#
# GPUs of one **node** (a machine, often 8) are joined by links several times as fast as the network
# between nodes. So tensor parallelism stays inside a node, and the rest goes between them.
#
# What follows is a model of costs, with what matters to first order and nothing else. A layer
# keeps 34 bytes for each number of its input (in 16 bits, a GELU MLP of 4 widths, dropout, and
# FlashAttention; sequence parallelism divides them by `tp`). It leaves aside embeddings, ZeRO,
# recomputation, and messages that hide behind computation. Real planners have longer formulas and
# the same structure: enumerate, throw out what does not fit, take the cheapest.


# %%
@dataclass(frozen=True)
class Job:
    """A model, its batch, and the machines."""

    layers: int
    width: int
    heads: int
    seq: int  # tokens of a sequence
    batch: int  # sequences in a step, over all GPUs; a micro-batch is one of them
    node: int = 8  # GPUs of a machine
    slow: float = 9.0  # a byte between machines takes as long as so many inside one
    bubble: float = 0.25  # the largest bubble that is accepted, as a share of the ideal time


SMALL = Job(layers=24, width=2048, heads=16, seq=2048, batch=512)  # 1.2 billion parameters
LARGE = Job(layers=80, width=8192, heads=64, seq=4096, batch=1024)  # 64 billion


# %% exercise="step_costs" minutes=15 difficulty=2
def step_costs(job: Job, dp: int, tp: int, pp: int) -> dict[str, float]:
    """What one GPU holds and sends in a training step; bytes, but for "bubble".

    With params = 12 · layers · width², micro = batch / dp (the micro-batches of a pipeline) and
    here = layers / pp (the layers of a stage); activations and gradients are sent in bfloat16, 2
    bytes a number; an all-reduce of n bytes among p costs each of them 2(p − 1)/p · n.

    "memory": 16 bytes for each of its params / (tp · pp) parameters (weights, gradients, Adam), and
              the activations of its layers: a layer keeps 34 · seq · width / tp bytes of a
              micro-batch, of which min(micro, pp) are alive (1F1B on the first rank).
    "bubble": (pp − 1) / micro, the bubble's share of the ideal time.
    "tp":     in each of its layers and for each micro-batch, four all-reduces of seq · width
              numbers among tp GPUs: two forward, two backward.
    "pp":     for each micro-batch, its share 1/tp of seq · width numbers forward and as many back;
              0 if pp is 1.
    "dp":     an all-reduce among dp GPUs of the gradients of its parameters.
    "weighted": what is compared: "tp" + slow · ("pp" + "dp"); where all dp · tp · pp GPUs are in
              one node, "tp" + "pp" + "dp".
    """
    ### BEGIN SOLUTION
    micro, here = job.batch / dp, job.layers / pp
    params = 12 * job.layers * job.width**2 / (tp * pp)
    numbers = job.seq * job.width
    costs = {
        "memory": 16 * params + min(micro, pp) * here * 34 * numbers / tp,
        "bubble": (pp - 1) / micro,
        "tp": micro * here * 4 * 2 * (tp - 1) / tp * 2 * numbers,
        "pp": micro * 2 * 2 * numbers / tp if pp > 1 else 0.0,
        "dp": 2 * (dp - 1) / dp * 2 * params,
    }
    slow = job.slow if dp * tp * pp > job.node else 1.0
    return {**costs, "weighted": costs["tp"] + slow * (costs["pp"] + costs["dp"])}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: whose parameters, whose layers</summary>
#
# A GPU has `layers / pp` layers, and of each a `tp`-th. Parameters are divided by both, layers and
# micro-batches each by one, and an all-reduce's tensor by none: all `tp` GPUs add up the whole
# activation.
# </details>

# %% check="step_costs" points=2
costs = step_costs(SMALL, dp=4, tp=2, pp=4)
checks.number(costs["memory"], 4.1272e9, to=0.001, what='"memory", in bytes')
checks.number(costs["bubble"], 3 / 128, to=1e-6, what='"bubble"', hint="128 micro-batches")
checks.number(
    costs["tp"],
    25.77e9,
    to=0.001,
    what='"tp", in bytes',
    mistakes={"two all-reduces": 12.885e9, "all layers": 103.08e9, "numbers, not bytes": 12.885e9},
)
checks.number(costs["pp"], 1.0737e9, to=0.001, what='"pp", in bytes')
checks.number(costs["dp"], 0.45298e9, to=0.001, what='"dp", in bytes')
checks.number(costs["weighted"], 39.51e9, to=0.001, what='"weighted"', hint="32 GPUs, 4 nodes")
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for dp, tp, pp in ((1, 1, 1), (1, 8, 1), (2, 1, 1), (1, 1, 4), (2, 2, 2), (6, 2, 3), (1, 4, 6)):
    numbers = torch.randint(1, 9, (3,), generator=g).tolist()
    job = Job(
        layers=12 * numbers[0],
        width=64 * numbers[1],
        heads=8,
        seq=100 * numbers[2],
        batch=12,
        node=8,
        slow=float(2 + 5 * torch.rand((), generator=g)),
    )
    costs = step_costs(job, dp, tp, pp)
    activation = 2 * job.seq * job.width  # bytes, of one micro-batch
    own = 12 * job.layers * job.width * job.width // (tp * pp)  # parameters
    micro, here = job.batch // dp, job.layers // pp
    ring = {p: sum(2 / p for _ in range(p - 1)) for p in (1, dp, tp)}
    due = {
        "memory": 16 * own + 17 * activation * here * min(micro, pp) / tp,
        "bubble": (pp - 1) / micro,
        "tp": sum(4 * ring[tp] * activation for _ in range(micro * here)),
        "pp": 2 * micro * activation / tp if pp > 1 else 0.0,
        "dp": ring[dp] * own * 2,
    }
    factor = 1.0 if dp * tp * pp <= 8 else job.slow
    due["weighted"] = due["tp"] + (due["pp"] + due["dp"]) * factor
    assert set(costs) == set(due), f"the keys are {', '.join(due)}; yours {', '.join(costs)}"
    for name, value in due.items():
        what = f'"{name}" of dp {dp}, tp {tp}, pp {pp}'
        checks.number(costs[name], value, to=1e-9, what=what)
### END HIDDEN TESTS


# %% exercise="plan_parallelism" minutes=15 difficulty=2
def plan_parallelism(config: Job, gpus: int, memory: float) -> tuple[int, int, int]:
    """(dp, tp, pp) that fits with the least communication: the least "weighted" of `step_costs`.

    config: the job. gpus: all are used, dp · tp · pp = gpus. memory: bytes of a GPU.
    What fits: tp divides heads and node; pp divides layers; dp divides batch; "memory" is at most
    `memory`, "bubble" at most config.bubble. Where several have the least, any of them.
    Raises ValueError where nothing fits.
    """
    ### BEGIN SOLUTION
    best, least = None, float("inf")
    for tp in range(1, config.node + 1):
        for pp in range(1, config.layers + 1):
            dp, rest = divmod(gpus, tp * pp)
            if rest or config.heads % tp or config.node % tp:
                continue
            if not dp or config.layers % pp or config.batch % dp:
                continue
            costs = step_costs(config, dp, tp, pp)
            if costs["memory"] > memory or costs["bubble"] > config.bubble:
                continue
            if costs["weighted"] < least:
                best, least = (dp, tp, pp), costs["weighted"]
    if best is None:
        raise ValueError(f"no dp · tp · pp = {gpus} fits into {memory:.3g} bytes a GPU")
    return best
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all of them</summary>
#
# There are few candidates: `tp` is at most `node`, `pp` at most `layers`, and `dp` is what is left.
# Go through all, skip what breaks a rule, keep the best.
# </details>


# %% tags=["support"]
# Support: all plans that fit, by brute force
def fitting_plans(job: Job, gpus: int, memory: float) -> dict[tuple[int, int, int], float]:
    """Each plan that fits, with its weighted communication: formulas of the docstring again."""
    plans = {}
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for dp in divisors:
        for tp in divisors:
            if (gpus // dp) % tp:
                continue
            pp = gpus // dp // tp
            whole = all(
                n % by == 0
                for n, by in ((job.heads, tp), (job.node, tp), (job.layers, pp), (job.batch, dp))
            )
            if not whole:
                continue
            micro, here, each = job.batch // dp, job.layers // pp, job.seq * job.width
            own = 12 * job.layers * job.width**2 / tp / pp
            if (pp - 1) / micro > job.bubble:
                continue
            if 16 * own + 34 * each / tp * here * min(pp, micro) > memory:
                continue
            inside = 16 * micro * here * each * (tp - 1) / tp
            between = 4 * own * (dp - 1) / dp + (4 * each * micro / tp if pp > 1 else 0)
            plans[dp, tp, pp] = inside + between * (job.slow if gpus > job.node else 1)
    return plans


def compare_plan(job: Job, gpus: int, memory: float) -> None:
    plan = tuple(plan_parallelism(job, gpus, memory))
    what = f"{gpus} GPUs of {memory / 1e9:.3g} GB for {job}"
    plans = fitting_plans(job, gpus, memory)
    best = min(plans, key=plans.get)
    assert plan in plans, f"{what}: {plan} breaks a rule of the docstring; {best} does not"
    assert plans[plan] <= plans[best] * (1 + 1e-9), (
        f"{what}: {plan} sends {plans[plan] / plans[best]:.3g} times as much as {best}"
    )


# %% check="plan_parallelism" points=1
plan = tuple(plan_parallelism(LARGE, 512, 80e9))
assert plan == (16, 2, 16), f"the large job on 512 GPUs of 80 GB: (16, 2, 16), not {plan}"
compare_plan(SMALL, 64, 80e9)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
tried = 0
while tried < 30:
    draw = torch.rand(8, generator=g).tolist()
    job = Job(
        layers=(12, 24, 30, 80)[int(4 * draw[0])],
        width=(1024, 4096, 8192)[int(3 * draw[1])],
        heads=(8, 12, 20, 64)[int(4 * draw[2])],
        seq=(512, 4096, 32768)[int(3 * draw[3])],
        batch=(96, 512, 640)[int(3 * draw[4])],
        node=(4, 8, 8)[int(3 * draw[5])],
        slow=1 + 20 * draw[6],
        bubble=(0.05, 0.25, 1.0)[int(3 * draw[7])],
    )
    gpus = (4, 8, 48, 64, 240, 512)[int(6 * torch.rand((), generator=g))]
    memory = (24e9, 80e9, 141e9)[int(3 * torch.rand((), generator=g))]
    if fitting_plans(job, gpus, memory):
        compare_plan(job, gpus, memory)
        tried += 1
### END HIDDEN TESTS

# %% check="plan_parallelism" points=1
checks.raises(ValueError, plan_parallelism, LARGE, 8, 80e9, because="1 TB on 8 GPUs of 80 GB")
### BEGIN HIDDEN TESTS
for job, gpus, memory in (
    (SMALL, 7, 80e9),  # 7 divides nothing of it
    (SMALL, 1, 19e9),  # 16 bytes a parameter are 19.3 GB
    (replace(LARGE, bubble=0.0), 64, 80e9),  # no pipeline, and 8 GPUs are too few for a replica
    (replace(LARGE, heads=3), 16, 141e9),  # no tensor parallelism
):
    assert not fitting_plans(job, gpus, memory)
    checks.raises(ValueError, plan_parallelism, job, gpus, memory, because="nothing fits")
# At the edge: exactly what the best plan needs still fits.
plans = fitting_plans(LARGE, 512, 80e9)
dp, tp, pp = min(plans, key=plans.get)
need = 16 * 12 * 80 * 8192**2 / tp / pp + 34 * 4096 * 8192 / tp * 80 // pp * min(pp, 1024 // dp)
compare_plan(LARGE, 512, need * (1 + 1e-9))
edge = Job(layers=8, width=1024, heads=8, seq=64, batch=8, bubble=0.375)
compare_plan(edge, 4, 0.5e9)  # a bubble of 3/8 is allowed
# tp = 3 would send less, and does not divide a node of 8.
thirds = Job(layers=24, width=8192, heads=12, seq=4096, batch=512, node=8, slow=9, bubble=1.0)
compare_plan(thirds, 48, 24e9)
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: what each plan for the large job sends, and your choice
MEMORY = 80e9
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 4.2))
for ax, (title, job, gpus) in zip(
    axes,
    (("64 billion parameters, 512 GPUs", LARGE, 512), ("1.2 billion, 128 GPUs", SMALL, 128)),
    strict=True,
):
    plans = {}
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8, 16):
            dp = gpus // (tp * pp)
            if job.layers % pp == 0 and job.batch % dp == 0:
                plans[dp, tp, pp] = step_costs(job, dp, tp, pp)
    chosen = plan_parallelism(job, gpus, MEMORY)
    plans = dict(sorted(plans.items(), key=lambda item: item[1]["weighted"]))
    at = range(len(plans))
    left = [0.0] * len(plans)
    for i, (name, factor) in enumerate((("tp", 1.0), ("pp", job.slow), ("dp", job.slow))):
        widths = [factor * costs[name] / 1e9 for costs in plans.values()]
        ax.barh(at, widths, left=left, color=plot.COLORS[i], hatch=("", "//", "")[i], label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, (plan, costs) in enumerate(plans.items()):
        fits = costs["memory"] <= MEMORY and costs["bubble"] <= job.bubble
        why = "your plan" if plan == chosen else ""
        if not fits:
            why = f"{costs['memory'] / 1e9:.0f} GB" if costs["memory"] > MEMORY else "bubble"
        ax.text(left[row], row, f" {why}", va="center", fontsize=7, weight="bold" if fits else None)
    names = [f"{dp} · {tp} · {pp}" for dp, tp, pp in plans]
    ax.set_yticks(list(at), names, fontsize=7)
    ax.set(xlabel="weighted GB sent by a GPU in a step", ylabel="dp · tp · pp", title=title)
    ax.margins(x=0.15)
    ax.invert_yaxis()
axes[0].legend()
plot.caption(
    fig,
    "From your step_costs; bytes between nodes count 9 times. Right of a bar: why a plan does not "
    "fit (its memory, above 80 GB, or its bubble, above 25 percent). Cutting along one direction "
    "alone is dear: data parallelism sends whole gradients, tensor parallelism every activation.",
)
plot.plt.show()

# %% tags=["experiment"]
print("GPUs   memory   1.2 billion parameters   64 billion (dp, tp, pp)")
for gpus in (64, 512, 2048):
    for memory in (40e9, 80e9, 141e9):
        found = []
        for job in (SMALL, LARGE):
            try:
                found.append(str(plan_parallelism(job, gpus, memory)))
            except ValueError:
                found.append("does not fit")
        print(f"{gpus:4} {memory / 1e9:5.0f} GB   {found[0]:22}   {found[1]}")

# %% [markdown]
# From 40 to 80 GB the large model's `tp` falls from 4 to 2 on 64 and on 512 GPUs; 141 GB saves
# pipeline stages on 64 and changes nothing on the others. With 2,048 GPUs and the same batch it is
# 8, at any memory: `dp` may grow only until micro-batches are too few to fill a
# pipeline. What the model leaves aside shifts the choice: messages that hide behind computation
# favor `dp`, ZeRO makes it thrifty, and small matrices compute slowly, which speaks against a large
# `tp`. What stays: tensor parallelism inside a node, pipelines and data parallelism between nodes.

# %% [markdown]
# ## Experiment: what a block costs on the wire {#experiment}
#
# **Question.** Two ranks, one Transformer block, and a batch of two sequences. *Data parallel*
# gives each rank one sequence and all-reduces gradients. *Tensor parallel* gives both ranks both
# sequences and half of each matrix. Which sends more?
#
# A block of width $w$ has about $12w^2$ weights ($4w^2$ in attention, $8w^2$ in the MLP). Data
# parallelism all-reduces as many gradients, whatever the batch. Tensor parallelism all-reduces $nw$
# activations four times for $n$ tokens, whatever the weights.
#
# **Before you run it, write down**: at which $n$ are the two equal, for $w = 64$? Does the sequence
# parallel block send more than the tensor parallel one? Which of the three keeps the fewest numbers
# for its backward pass at $n = 1024$? And in milliseconds, on this machine?
#
# The block below is written once. `enter` and `leave` are what stands before the column-parallel
# and after the row-parallel matrices: nothing, your $f$ and $g$, or your $\bar f$ and $\bar g$.
# `enter` is called once for queries, keys and values: three column-parallel layers would each
# all-reduce the gradient of the same input.


# %% tags=["experiment"]
HEADS = 4


def matrices(width: int) -> dict[str, nn.Linear]:
    """A block's dense matrices, the same on all ranks."""
    torch.manual_seed(0)
    sizes = dict.fromkeys("qkvo", (width, width)) | {"up": (width, 4 * width)}
    sizes["down"] = (4 * width, width)
    return {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}


def block(x: Tensor, w: dict[str, Tensor], enter: Callable, leave: Callable) -> Tensor:
    """x (batch, seq, width), or this rank's part of the sequence."""
    h = enter(F.rms_norm(x, x.shape[-1:]))
    width = x.shape[-1] // HEADS
    q, k, v = (F.linear(h, w[name]).unflatten(-1, (-1, width)).transpose(1, 2) for name in "qkv")
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + leave(F.linear(attended, w["o"]))
    h = enter(F.rms_norm(x, x.shape[-1:]))
    return x + leave(F.linear(F.gelu(F.linear(h, w["up"])), w["down"]))


def as_it_is(x: Tensor) -> Tensor:
    return x


WAYS = {
    "data": (as_it_is, as_it_is),
    "tensor": (copy_to_ranks, sum_over_ranks),
    "tensor + sequence": (gather_sequence, scatter_sum),
}


def on_the_wire(log: list, ranks: int) -> float:
    """Elements that a rank sends: an all-reduce costs twice a gather or a reduce-scatter."""
    share = (ranks - 1) / ranks
    return sum((2 if kind == "all-reduce" else 1) * share * size for kind, size in log)


def block_step(rank: int, way: str, width: int, tokens: int) -> dict:
    """Forward and backward pass of a batch of two sequences; all-reduced gradients for "data"."""
    dense = matrices(width)
    make = dict.fromkeys(("q", "k", "v", "up"), ColumnParallelLinear)
    make |= dict.fromkeys(("o", "down"), RowParallelLinear)
    layers = dense if way == "data" else {name: make[name](dense[name]) for name in dense}
    w = {name: layer.weight for name, layer in layers.items()}
    x = torch.randn(2, tokens // 2, width, generator=torch.Generator().manual_seed(1))
    x = {"data": x[rank : rank + 1], "tensor": x, "tensor + sequence": x.chunk(2, 1)[rank]}[way]
    x.requires_grad_()  # as if another block came before
    weights = {p.untyped_storage().data_ptr() for p in w.values()}
    kept: dict[int, int] = {}  # by where it lies: what several operations keep counts once

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    best = float("inf")
    for _ in range(3):
        dist.barrier()
        begin = time.perf_counter()
        kept.clear()
        with checks.communication() as log, saved_tensors_hooks(keep, lambda t: t):
            loss = block(x, w, *WAYS[way]).square().sum() / 2
        with checks.communication() as backward:
            loss.backward()
            if way == "data":
                dist.all_reduce(torch.cat([p.grad.flatten() for p in w.values()]))
        best = min(best, time.perf_counter() - begin)
        log += backward
    held = sum(size for place, size in kept.items() if place not in weights)
    return {"loss": loss.item(), "sent": on_the_wire(log, 2), "ms": 1e3 * best, "kept": held}


runs = {}
for tokens in (64, 256, 1024):
    print(f"{tokens} tokens, width 64: loss, numbers sent, milliseconds, numbers kept for backward")
    for way in WAYS:
        results = launch(block_step, 2, way, 64, tokens)
        run_ = runs[way, 64, tokens] = results[0]
        loss = run_["loss"] if way == "tensor" else sum(r["loss"] for r in results)
        print(f"  {way:18}{loss:10.3f} {run_['sent']:10,.0f} {run_['ms']:7.1f} {run_['kept']:10,}")

# %% [markdown]
# The losses agree: three ways to cut, one computation. Data and tensor parallelism send the same at
# $12w^2 = 4nw$, that is $n=3w$ tokens, here 192: below it tensor parallelism sends less. Here $n$
# is what one group works on in a step: for the large job on 512 GPUs 262,144 tokens, over ten times
# $3w = 24{,}576$. There tensor parallelism sends far more, and what it sends is needed *at once*,
# while gradients travel behind the backward pass. That is why it stays inside a machine. Sequence
# parallelism sends what tensor parallelism does, and keeps less; least of all keeps data
# parallelism, whose ranks see half of the tokens each. (Here the gathered $h$ is kept whole;
# Megatron keeps a part and gathers once more.) Milliseconds, between processes that share a few
# cores, say little beyond that: for tensors this small they show mostly latency, and how busy the
# cores are.

# %% tags=["experiment", "figure"]
# Figure: numbers sent for each layer by strategy, against the width
STRATEGIES = {  # (width, tokens) → numbers that a rank sends for a layer and step, on many ranks
    "data: 2 · 12w²": lambda w, n: 24 * w * w,
    "FSDP: 3 · 12w²": lambda w, n: 36 * w * w,
    "tensor: 8nw": lambda w, n: 8 * n * w,
    "experts, 2 a token: 8nw": lambda w, n: 8 * n * w,
    "ring, 8 times fewer KV heads: 3nw/4": lambda w, n: (2 + 4) * n * w / 8,
    "pipeline, 8 layers a stage: nw/4": lambda w, n: 2 * n * w / 8,
}
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8))
widths = (32, 64, 128)
for i, (way, line) in enumerate(zip(WAYS, (0, 2, None), strict=True)):
    counts = [
        (runs.get((way, w, 256)) or launch(block_step, 2, way, w, 256)[0])["sent"] for w in widths
    ]
    axes[0].plot(widths, counts, "osD"[i], color=plot.COLORS[i], markersize=9 - 2 * i, label=way)
    if line is not None:
        law = [*STRATEGIES.values()][line]
        axes[0].plot(widths, [law(w, 256) / 2 for w in widths], "-", color=plot.COLORS[i])
axes[0].axvline(256 / 3, color="#888888", linestyle=":")
axes[0].set(
    xscale="log", yscale="log", xlabel="width w", ylabel="numbers sent by a rank of 2",
    title="counted, 256 tokens",
)  # fmt: skip
axes[0].set_xticks(widths, widths)
axes[0].set_yticks([2e4, 5e4, 1e5, 2e5], ["20,000", "50,000", "100,000", "200,000"])
axes[0].minorticks_off()
axes[0].legend(fontsize=8)
large = [2.0**k for k in range(9, 16)]
plot.curves(
    large,
    {name: [law(w, 2**18) for w in large] for name, law in STRATEGIES.items()},
    logx=True,
    logy=True,
    xlabel="width w",
    ylabel="numbers for a layer and step",
    title="262,144 tokens a replica",
    ax=axes[1],
)
axes[1].legend(fontsize=7)
plot.caption(
    fig,
    "Left: dots are counted in the processes above, lines the formulas at right, halved for two "
    "ranks; dotted: n = 3w. Right: what follows weights (data, FSDP) grows with w², what follows "
    "tokens (all others) with nw. Tensor and expert lines coincide, where each rank sends the "
    "experts n tokens of its own.",
)
plot.plt.show()

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number or a choice are graded, one by one.


# %% exercise="questions" minutes=10 difficulty=1 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers, numbers to 1 percent.

    "reduces": all-reduces of activations in one training step of a Transformer with 32 blocks,
               tensor parallel, without sequence parallelism or recomputation; blocks alone.
    "wire":    tensor parallel with 8 ranks, width 8192, a micro-batch of 4096 tokens in bfloat16:
               how many MB (10⁶ bytes) does each rank send for one all-reduce of activations on a
               ring?
    "zigzag":  causal ring attention on 8 ranks, contiguous, where the work of a step is a whole
               block or none: how many times as much does the busiest rank compute as the average?
    "norm":    tensor and sequence parallel on 4 ranks. What do the gradients of an RMSNorm's
               weight, after the backward pass, need before the optimizer's step?
               "a"  nothing   "b"  a sum over the group   "c"  a mean over the group
               "d"  a gather along the sequence
    "bubble":  GPipe with 8 stages and 32 micro-batches: the bubble as a share of the total time.
    "chunks":  8 ranks, 16 micro-batches, interleaved with 4 chunks a rank: the bubble as a share of
               the ideal time.
    "live":    1F1B, 8 stages, 64 micro-batches: how many micro-batches does rank 2 (counted from 0)
               hold at most?
    "node":    which kind of parallelism belongs inside a node: "dp", "tp" or "pp"?
    """
    ### BEGIN SOLUTION
    return {
        "reduces": 4 * 32,
        "wire": 2 * 7 / 8 * 4096 * 8192 * 2 / 1e6,
        "zigzag": 8 / 4.5,
        "norm": "b",
        "bubble": 7 / (32 + 7),
        "chunks": 7 / (4 * 16),
        "live": 6,
        "node": "tp",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["reduces"]
checks.kind(answer, int, what="reduces")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    128,
    to=0,
    what="reduces",
    hint="Attention and MLP each have f and g",
    mistakes={"the forward pass alone": 64, "attention or MLP alone": 64},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["wire"]
checks.kind(answer, float, what="wire")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    117.44,
    what="wire",
    hint="The tensor is 4096 × 8192; a ring sends 2(p − 1)/p of it",
    mistakes={"one half of the ring": 58.72, "the tensor": 67.11, "float32": 234.88},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["zigzag"]
checks.kind(answer, float, what="zigzag")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.7778,
    what="zigzag",
    hint="Rank r works on r + 1 blocks",
    mistakes={"the busiest over the idlest": 8.0, "the busiest over half": 2.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["norm"]
assert answer in ("a", "b", "c", "d"), f"norm is one of 'a', 'b', 'c', 'd'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "b", "Which tokens has each rank's norm seen, and whose loss is it?"
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bubble"]
checks.kind(answer, float, what="bubble")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.17949,
    what="bubble",
    hint="How many passes fit into the total time, and how many are done?",
    mistakes={"the share of the ideal time": 0.21875, "p in place of p - 1": 0.2},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["chunks"]
checks.kind(answer, float, what="chunks")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.109375,
    what="chunks",
    hint="The bubble has as many passes as before; how long is a pass?",
    mistakes={"one chunk": 0.4375, "32 stages": 31 / 16},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["live"]
checks.kind(answer, int, what="live")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    6,
    to=0,
    what="live",
    hint="How many forward passes come ahead of its first backward pass?",
    mistakes={"GPipe's": 64, "those ahead, without the one in turn": 5, "the first rank's": 8},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["node"]
assert answer in ("dp", "tp", "pp"), f"node is 'dp', 'tp' or 'pp'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "tp", "Which sends most, and can't go on until it has arrived?"
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** A tensor-parallel model trains; its loss falls, but more slowly than that of
# the dense model, and the ranks' copies of the norm weights drift apart. What would you look for?

# %% [markdown] answer="drift"
# Copies that drift get different gradients. The forward pass is right, or the loss would not fall,
# so look at the backward pass: the all-reduce of $f$ is missing somewhere, and each rank's norm
# gets its own columns' share of the gradient. (Or with sequence parallelism: nobody sums the
# norms' gradients.) Compare one step with one process in float64, parameter by parameter: those
# behind the first missing all-reduce agree, those before it do not. Other causes of drift: dropout
# inside the cut regions wants different seeds on the ranks, outside of them the same; a bias
# before the reduce; clipping by each rank's own norm.

# %% [markdown]
# **Open question 2.** A context of a million tokens on 64 GPUs, a model with 64 heads and 8 KV
# heads. Ulysses or ring?

# %% [markdown] answer="long-context"
# Ulysses alone stops at 64 ranks, and replicates KV heads beyond 8: each rank then receives one
# query head and a KV head that seven others have, too. Its bytes fall with the ranks, but an
# all-to-all crosses the slow network between machines, and nothing hides it: attention waits for
# all of it. The ring sends 7/8 less than it would without grouped heads, to a neighbor, behind
# computation whose size is quadratic in the block: 16,000 tokens a rank hide it well. So:
# all-to-all over the 8 GPUs of a machine (one KV head each), a zigzag ring between the 8 machines.
# Short examples packed into the context want their mask known to the skipping, or the balance is
# gone.

# %% [markdown]
# **Open question 3.** A model has a first stage with a large embedding and a last stage with the
# vocabulary's logits and the loss. Layers are dealt out evenly. What does the schedule look like,
# and what can be done?

# %% [markdown] answer="uneven-stages"
# A pipeline moves at the pace of its slowest stage: all others idle in every micro-batch, not only
# at both ends, and more micro-batches don't help. With a vocabulary of 128,000 and a width of 4096
# the logits cost as much as two or three layers, so the last stage gets as many layers fewer. The
# embedding costs memory but hardly time; it may move its stage's optimizer state over the limit,
# where 1F1B holds the most activations already (p micro-batches). Remedies: count the logits as
# layers when dealing out, cut the vocabulary among all stages (each computes a part of the loss),
# recompute activations on the first stages only. Tied embeddings need their gradients added up
# between the first and the last stage.

# %% [markdown]
# ## References, and what to read in them
#
# - **Shoeybi et al. 2019**, *Megatron-LM: Training Multi-Billion Parameter Language Models Using
#   Model Parallelism*, arXiv:1909.08053. Section 3: $f$, $g$, and the loss over a cut vocabulary.
# - **Korthikanti et al. 2022**, *Reducing Activation Recomputation in Large Transformer Models*,
#   arXiv:2205.05198. Section 4: sequence parallelism, and the 34 bytes that a layer keeps for each
#   number.
# - **Huang et al. 2018**, *GPipe: Efficient Training of Giant Neural Networks using Pipeline
#   Parallelism*, arXiv:1811.06965. Section 2: micro-batches, and the bubble.
# - **Narayanan et al. 2021**, *Efficient Large-Scale Language Model Training on GPU Clusters Using
#   Megatron-LM*, arXiv:2104.04473. Section 2.2: 1F1B and interleaving; section 3: how dp, tp and pp
#   are chosen.
# - **Qi et al. 2024**, *Zero Bubble Pipeline Parallelism*, arXiv:2401.10241. Section 2: ZB-H1 and
#   its memory; ZB-H2, which takes almost twice the memory and closes the bubble if F, B and W take
#   equally long.
# - **Jacobs et al. 2023**, *DeepSpeed Ulysses: System Optimizations for Enabling Training of
#   Extreme Long Sequence Transformer Models*, arXiv:2309.14509. Section 3.
# - **Liu et al. 2023**, *Ring Attention with Blockwise Transformers for Near-Infinite
#   Context*, arXiv:2310.01889. Section 3: when a block hides its message.
# - **Brandon et al. 2023**, *Striped Attention: Faster Ring Attention for Causal Transformers*,
#   arXiv:2311.09431. The imbalance; it deals out single tokens where zigzag deals chunks.
# - **Lepikhin et al. 2020**, *GShard: Scaling Giant Models with Conditional Computation and
#   Automatic Sharding*, arXiv:2006.16668. Sections 2 and 3: experts, capacity, all-to-all.
#
# In production: Megatron-LM's `megatron/core/tensor_parallel/` (`mappings.py`, `layers.py`,
# `cross_entropy.py`), `megatron/core/pipeline_parallel/schedules.py` and
# `megatron/core/transformer/moe/token_dispatcher.py`; PyTorch's
# `torch/distributed/tensor/parallel/` and `torch/distributed/pipelining/schedules.py`.
