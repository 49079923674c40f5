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
#       Training on several machines at once, in real processes: the ring all-reduce, data
#       parallelism with buckets that overlap the backward pass, an optimizer and a model cut into
#       shards (ZeRO, FSDP), Muon among ranks, and DiLoCo.
#     gpu: >-
#       Where there are several: all-reduces over NCCL, beside those over gloo. All else is
#       processes that talk through gloo, on any machine.
# ---

# %% [markdown]
# ## The problem
#
# A model of 7.5 billion parameters, trained with Adam in mixed precision, needs 120 GB before it
# has seen a token: weights, gradients, master weights, two moments. A common GPU holds 80. And if
# it did fit, one GPU would take years. So the work is shared out, and two questions appear that a
# single process never asked:
#
# - **What does each rank compute?** In *data parallel* training every rank has the whole model and
#   a part of the batch. In *sharded* training (ZeRO, FSDP) every rank still computes with the
#   whole model on a part of the batch, but *stores* only a part of it. (Cutting the computation of
#   one example apart is lesson 20.)
# - **What do the ranks tell each other, and when?** A gradient has as many numbers as the model. If
#   sharing it takes longer than computing it, a second machine is worth nothing, unless the two
#   overlap.
#
# There is a law that makes all of this testable: **p ranks must do what one process would
# do with the whole batch, up to rounding.** Nearly every check of this lesson compares with that
# one process.
#
# And there is a new kind of fault. A wrong gradient shows in the loss; a rank that waits for a
# message that nobody sends shows *nothing*. So the checks here run with a time limit, and tell
# where each rank was when it ran out.

# %%
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from llm40 import checks, plot, toys
from llm40.distributed import launch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# %% [markdown]
# ## Collectives {#collectives}
#
# A job is `ranks` processes that run the same program. Each knows its **rank**, from 0 to
# $p-1$, and nothing else distinguishes them. They share no memory; they send messages. The
# messages come in a few fixed patterns, the **collectives**, and *every* rank of the group has to
# call each of them, in the same order:
#
# | collective | before, on rank $r$ | after, on rank $r$ |
# |---|---|---|
# | **broadcast** from 0 | $x_r$ | $x_0$ |
# | **reduce** to 0 | $x_r$ | $\sum_i x_i$ on rank 0 |
# | **all-reduce** | $x_r$ | $\sum_i x_i$ |
# | **all-gather** | part $s_r$ | $s_0, s_1, \dots, s_{p-1}$ one after another |
# | **reduce-scatter** | $x_r$, in $p$ parts | part $r$ of $\sum_i x_i$ |
#
# The last three carry most of the lesson, and one equation connects them:
# **all-reduce = reduce-scatter, then all-gather.** Data parallel training calls the left side; ZeRO
# puts the optimizer's step between the two halves on the right.
#
# `launch(function, 4)` of the course's library runs `function(rank)` in four processes of this
# machine and returns their four results. They are *forked*: each begins as a copy of this notebook,
# so it knows your functions and variables, and what it changes stays in it. They talk through
# **gloo**, a library for CPUs; on GPUs the same calls go to NCCL. One rank is a job, too: all that
# you write works there, with nobody to talk to.


# %% tags=["experiment"]
def tour(rank: int) -> dict[str, list]:
    mine = torch.tensor([1.0, 10.0, 100.0]) * (rank + 1)
    total = mine.clone()
    dist.all_reduce(total)
    gathered = [torch.empty(3) for _ in range(3)]
    dist.all_gather(gathered, mine)
    part = torch.empty(1)
    dist.reduce_scatter(part, list(mine.chunk(3)))
    return {"mine": mine.tolist(), "all_reduce": total.tolist(), "reduce_scatter": part.tolist()}


for rank, seen in enumerate(launch(tour, 3)):
    print(f"rank {rank}:", ", ".join(f"{name} {value}" for name, value in seen.items()))

# %% [markdown]
# Helpers for later: an all-gather and a reduce-scatter of flat tensors. Both ask for parts of equal
# length, so what is cut is padded before.


# %%
import torch._dynamo  # optimizers load it when first used: once here, not in every rank again


def all_gather(shard: Tensor) -> Tensor:
    """Every rank's `shard` (size,), one after another: (ranks · size,), the same on all ranks."""
    ranks = dist.get_world_size()
    full = shard.new_empty(ranks * len(shard))
    dist.all_gather(list(full.split(len(shard))), shard.contiguous())
    return full


def reduce_scatter(full: Tensor) -> Tensor:
    """This rank's part of the sum of all ranks' `full` (ranks · size,): (size,)."""
    ranks = dist.get_world_size()
    mine = full.new_empty(len(full) // ranks)
    dist.reduce_scatter(mine, list(full.split(len(mine))))
    return mine


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors' elements in one vector, a copy, padded with zeros to a multiple of the ranks."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    return F.pad(flat, (0, -len(flat) % dist.get_world_size()))


def own_part(flat: Tensor) -> Tensor:
    """This rank's part of a padded vector: a view."""
    return flat.chunk(dist.get_world_size())[dist.get_rank()]


# %% [markdown]
# `with checks.communication() as log:` writes down what a rank asks of its process groups, as pairs
# of a kind ("message", "all-reduce", …) and the elements of the whole tensor, for figures and
# checks.


# %% tags=["support"]
# Support: what a rank has sent, groups, and vectors to compare
def elements_sent(log: list[tuple[str, int]], ranks: int) -> float:
    """What the operations of a log cost one rank on a ring, in elements."""
    share = (ranks - 1) / ranks
    costs = {"reduce-scatter": share, "all-gather": share, "gather": share, "all-reduce": 2 * share}
    return sum(costs.get(kind, 1.0) * elements for kind, elements in log)


@checks.measured
def group_of(*members: tuple[int, ...]) -> object:
    """Groups of these ranks; the one that this rank is in. Every rank has to call it."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    mine = [i for i, ranks in enumerate(members) if dist.get_rank() in ranks]
    return groups[mine[0]]


def same_on_all(results: list[Tensor], what: str) -> None:
    """Every rank has bit for bit what rank 0 has."""
    for rank, result in enumerate(results):
        assert torch.equal(result, results[0]), (
            f"{what}: rank {rank} has something else than rank 0. In which rank's arithmetic was "
            "each number added up?"
        )


# %% [markdown]
# ## The ring {#ring}
#
# How is a sum over ranks formed? The plain way: everybody sends all $n$ numbers to rank 0, which
# adds and sends the result back. Rank 0 then moves $2(p-1)n$ numbers while the others wait: twice
# the ranks, twice the time.
#
# The ring cuts the tensor into $p$ chunks, and every rank only ever talks to its neighbors: it
# sends to rank $r+1$ and receives from rank $r-1$ (modulo $p$).
#
# **Reduce-scatter**, $p-1$ steps. In step $s = 0, \dots, p-2$ rank $r$ sends chunk $r-s$ (modulo
# $p$) and adds what it receives to its chunk $r-s-1$. A chunk travels round the ring and picks up
# one rank's share at each stop; after $p-1$ steps it is complete, and it is complete on rank $r$
# for chunk $r+1$.
#
# **All-gather**, $p-1$ steps. The complete chunks go round once more, now copied instead of added:
# in step $s$ rank $r$ sends chunk $r+1-s$ and overwrites its chunk $r-s$.
#
# $$ \text{sent by each rank} \;=\; \underbrace{(p-1)\frac np}_{\text{reduce-scatter}}
# + \underbrace{(p-1)\frac np}_{\text{all-gather}} \;=\; 2\,\frac{p-1}{p}\,n \;<\; 2n . $$
#
# **The cost per rank hardly depends on the number of ranks.** All links are busy all the time, and
# no rank is special. The star sends as much in total, but rank 0 sends half of it. No algorithm in
# which only ranks add makes its busiest one send less (Patarasuk and Yuan prove it); switches that
# add, such as NVIDIA's SHARP, can.
#
# Since chunk $i$ is added up along one path and then copied, all ranks end with the same bits. That
# matters: models that differ in the last bit drift apart.


# %% exercise="ring_all_reduce" minutes=25 difficulty=2
def ring_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of `tensor` over the ranks of `group`, by messages between neighbors on a ring.

    tensor: any shape, strides and dtype; the same shape on all ranks. Its number of elements need
    not be a multiple of theirs: chunks are those of `torch.tensor_split` of the flat tensor, and
    some may be empty. It stays unchanged.
    group: the ranks that take part (all ranks of the job if None). Neighbors are neighbors in the
    group: `dist.get_rank(group)`, `dist.get_world_size(group)`.
    Returns a new contiguous tensor of tensor's shape and dtype, on all ranks the same bit for bit.

    Messages go by dist.send, isend, recv, irecv or batch_isend_irecv; no collective is called. Each
    rank sends 2(ranks − 1) chunks, one in each step.
    """
    ### BEGIN SOLUTION
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    chunks = total.view(-1).tensor_split(ranks)
    received = torch.empty_like(chunks[0])  # the first chunk is the longest

    def pass_on(give: int, into: Tensor) -> None:
        sending = dist.isend(chunks[give % ranks], group=group, group_dst=(rank + 1) % ranks)
        dist.recv(into, group=group, group_src=(rank - 1) % ranks)
        sending.wait()

    for step in range(ranks - 1):
        chunk = chunks[(rank - step - 1) % ranks]
        pass_on(rank - step, received[: len(chunk)])
        chunk += received[: len(chunk)]
    for step in range(ranks - 1):
        pass_on(rank + 1 - step, chunks[(rank - step) % ranks])
    return total
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: nothing happens until the time is over</summary>
#
# `dist.send` may wait until the other side receives. If all ranks begin with `send`, nobody
# receives. `work = dist.isend(…)` returns at once; receive, and then `work.wait()`.
# </details>
#
# <details><summary>Hint: neighbors in a group</summary>
#
# `dst` and `src` are ranks of the job, `group_dst` and `group_src` ranks in the group:
# `dist.isend(chunk, group=group, group_dst=…)`.
# </details>
#
# <details><summary>Hint: a tensor that is not contiguous</summary>
#
# Only contiguous memory can be sent. Work on a flat, contiguous copy; its chunks are views, so that
# adding to a chunk changes the copy.
# </details>

# %% check="ring_all_reduce" points=2
inputs = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
results = launch(lambda rank: ring_all_reduce(inputs[rank]), 2, timeout=checks.PATIENCE)
for rank, result in enumerate(results):
    checks.close(
        result,
        torch.tensor([11.0, 22.0, 33.0, 44.0]),
        what=f"ring_all_reduce on rank {rank} of 2",
        mistakes={"its own tensor": inputs[rank], "the mean of the ranks": inputs.mean(0)},
    )
### BEGIN HIDDEN TESTS
g = checks.generator(1)
cases = [
    torch.randn(3, 4, 7, generator=g),
    torch.randn(3, 2, generator=g),  # fewer elements than ranks
    torch.randn(3, 5, 1, 2, generator=g),
    torch.randint(-99, 99, (3, 11), generator=g),
    torch.randn(3, generator=g).double(),  # a tensor without axes
    torch.randn(3, 0, 3, generator=g),
    torch.randn(3, 7, 5, generator=g).mT,  # not contiguous
    (torch.randn(3, 10, generator=g) * 8).round().bfloat16(),
]


def reduce_one(rank: int, case: Tensor) -> Tensor:
    with checks.unchanged(tensor=case[rank]):
        return ring_all_reduce(case[rank])


for case, results in zip(cases, checks.on_ranks(3, reduce_one, cases), strict=True):
    for rank, result in enumerate(results):
        checks.kind(result, Tensor, what=f"ring_all_reduce on rank {rank} of 3")
        checks.close(
            result,
            case.double().sum(0).to(case.dtype),
            what=f"ring_all_reduce of shape {tuple(case.shape[1:])} on rank {rank} of 3",
            dtype=case.dtype,
            hint="" if case[0].numel() % 3 == 0 else "3 ranks do not divide its elements.",
        )
        assert result.is_contiguous(), "the result is asked for contiguous"
    same_on_all(results, "ring_all_reduce")
### END HIDDEN TESTS

# %% check="ring_all_reduce" points=2
numbers = torch.arange(12.0)


def count_messages(rank: int, tensor: Tensor) -> tuple[list, Tensor]:
    with checks.communication() as log:
        result = ring_all_reduce(tensor[rank])
    return list(log), result


for rank, (log, result) in enumerate(
    checks.on_ranks(3, count_messages, [numbers.expand(3, 12)])[0]
):
    checks.close(result, 3 * numbers, what=f"the sum on rank {rank} of 3")
    others = [name for name, _ in log if name != "message"]
    assert not others, (
        f"rank {rank} calls {others[0]}: only messages between two ranks are asked for"
    )
    sent = sum(size for _, size in log)
    checks.number(
        sent,
        16,
        to=0,
        what=f"the numbers that rank {rank} of 3 sends for a tensor of 12",
        hint="2(p − 1) chunks of a third each",
        mistakes={"sending the whole tensor in every step": 48, "one half of the ring": 8},
    )
### BEGIN HIDDEN TESTS
g = checks.generator(2)
tensors = [torch.randn(ranks, size, generator=g) for ranks, size in ((4, 100), (4, 11), (1, 5))]
counted = checks.on_ranks(4, count_messages, tensors[:2]) + checks.on_ranks(
    1, count_messages, tensors[2:]
)
for tensor, logs in zip(tensors, counted, strict=True):
    ranks, size = tensor.shape
    for rank, (log, result) in enumerate(logs):
        checks.close(result, tensor.double().sum(0).float(), what=f"the sum on rank {rank}")
        assert all(name == "message" for name, _ in log), (
            "only messages between two ranks are asked for"
        )
        sizes = [size for _, size in log]
        longest = -(-size // ranks)
        assert len(sizes) == 2 * (ranks - 1), (
            f"rank {rank} of {ranks} sends {len(sizes)} messages, 2(p − 1) are asked for"
        )
        assert max(sizes, default=0) <= longest, (
            f"rank {rank} of {ranks} sends messages of {sizes} numbers for a tensor of {size}; "
            f"2(p − 1) messages are asked for, of at most {longest}"
        )
    total = sum(size for log, _ in logs for _, size in log)
    checks.number(
        total, 2 * (ranks - 1) * size, to=0, what="the numbers that all ranks send together"
    )
### END HIDDEN TESTS

# %% check="ring_all_reduce" points=1
pairs = torch.tensor([1.0, 10.0, 100.0, 1000.0])


def reduce_in_pairs(rank: int) -> Tensor:
    """Ranks 0 and 2 are one group, 1 and 3 the other."""
    return ring_all_reduce(pairs[rank : rank + 1], group_of((0, 2), (1, 3)))


for rank, result in enumerate(launch(reduce_in_pairs, 4, timeout=checks.PATIENCE)):
    checks.close(
        result,
        torch.tensor([101.0 if rank % 2 == 0 else 1010.0]),
        what=f"the sum in the group of rank {rank}",
        mistakes={
            "all four ranks together": pairs.sum()[None],
            "its own number": pairs[rank : rank + 1],
        },
    )
### BEGIN HIDDEN TESTS
g = checks.generator(3)
tensor = torch.randn(3, 2, 5, generator=g)
groups = ((0, 2), (1,))


def reduce_in_groups(rank: int) -> Tensor:
    mine = tensor[rank]
    result = ring_all_reduce(mine, group_of(*groups))
    assert result is not mine, "a new tensor is asked for, in a group of one rank, too"
    return result


results = launch(reduce_in_groups, 3, timeout=checks.PATIENCE)
for members in groups:
    for rank in members:
        checks.close(
            results[rank],
            tensor[list(members)].double().sum(0).float(),
            what=f"the sum on rank {rank} of the group {members}",
        )
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: what each rank sends, all to one and on the ring
def star_all_reduce(tensor: Tensor) -> Tensor:
    """All send to rank 0, which adds and sends back."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = tensor.clone()
    if rank:
        dist.send(total, 0)
        dist.recv(total, 0)
        return total
    for other in range(1, ranks):
        part = torch.empty_like(total)
        dist.recv(part, other)
        total += part
    for other in range(1, ranks):
        dist.send(total, other)
    return total


ALGORITHMS = {"all to rank 0 and back": star_all_reduce, "your ring": ring_all_reduce}


def sent(rank: int) -> list[int]:
    """The numbers that this rank sends, with each algorithm."""
    sums = []
    for reduce in ALGORITHMS.values():
        with checks.communication() as log:
            reduce(torch.ones(1200))
        sums.append(sum(size for _, size in log))
    return sums


fig, axes = plot.plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for i, ranks in enumerate((2, 3, 5)):
    for ax, title, counts in zip(
        axes, ALGORITHMS, zip(*launch(sent, ranks), strict=True), strict=True
    ):
        at = [rank + (i - 1) * 0.27 for rank in range(ranks)]
        ax.bar(
            at,
            [count / 1200 for count in counts],
            width=0.25,
            color=plot.COLORS[i],
            hatch=("", "//", "..")[i],
            edgecolor="white",
            label=f"{ranks} ranks",
        )
        ax.set(xlabel="rank", title=title, xticks=range(5))
axes[0].set_ylabel("numbers sent, in tensors")
axes[0].axhline(2, color="#888888", linestyle=":", linewidth=1)
axes[1].axhline(2, color="#888888", linestyle=":", linewidth=1)
axes[1].legend()
plot.caption(
    fig,
    "Counted in real processes, for a tensor of 1,200 numbers. Left: rank 0 sends more with every "
    "rank that joins. Right: all send alike, and never twice the tensor (dotted).",
)
plot.plt.show()

# %% [markdown]
# ## What a message costs {#cost}
#
# A message of $m$ bytes takes about $\alpha + m/\beta$: a **latency** $\alpha$ that does not depend
# on its size, and its bytes over the **bandwidth** $\beta$. With it, algorithms can be compared
# before they are built. Let $n$ be the bytes of the whole tensor.
#
# - **Star.** Rank 0 receives $p-1$ messages of $n$ bytes one after another, and sends as many:
#   $2(p-1)(\alpha + n/\beta)$.
# - **Tree.** Pairs add up, then pairs of pairs: $\lceil\log_2 p\rceil$ rounds up and as many down,
#   each one message of $n$ bytes: $2\lceil\log_2 p\rceil(\alpha + n/\beta)$.
# - **Ring.** $2(p-1)$ steps of $n/p$ bytes: $2(p-1)\bigl(\alpha + \tfrac{n}{p\beta}\bigr)$.
#
# The ring is best for large tensors and bad for small ones: among 1,000 ranks it pays the latency
# 1,998 times. That is one reason why gradients are sent in **buckets** of many parameters and not
# one by one, and why NCCL changes to trees for small messages.


# %% exercise="communication_time" minutes=8 difficulty=1
def communication_time(
    size: float, ranks: int, latency: float, bandwidth: float, algorithm: str = "ring"
) -> float:
    """Seconds that an all-reduce takes, by the model above.

    size: bytes of the whole tensor; an empty one is sent all the same, as messages of 0 bytes.
    ranks: 1 or more; a single one has nothing to send: 0. latency: seconds a message. bandwidth:
    bytes a second. algorithm: "ring", "tree" or "star"; ValueError for any other, however many
    ranks there are.
    """
    ### BEGIN SOLUTION
    if algorithm == "ring":
        return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)
    if algorithm not in ("tree", "star"):
        raise ValueError(f"algorithm is ring, tree or star, not {algorithm!r}")
    messages = math.ceil(math.log2(ranks)) if algorithm == "tree" else ranks - 1
    return 2 * messages * (latency + size / bandwidth)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: rounds of a tree</summary>
#
# Five ranks need three rounds, as eight do: the smallest $k$ with $2^k \ge p$.
# </details>

# %% check="communication_time" points=1
checks.number(
    communication_time(8e6, 4, 1e-3, 1e9), 0.018, what="8 MB, 4 ranks on a ring, 1 ms, 1 GB/s"
)
checks.number(communication_time(8e6, 1, 1e-3, 1e9), 0.0, to=0, what="a single rank's time")
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for ranks in (2, 3, 7, 64):
    size, latency = float(torch.rand((), generator=g)) * 1e9, float(torch.rand((), generator=g))
    both = 2 * (ranks - 1)
    checks.number(
        communication_time(size, ranks, latency, 3e8, algorithm="ring"),
        both * latency + both / ranks * size / 3e8,
        to=1e-9,
        what=f"the ring's time for {ranks} ranks",
        mistakes={
            "sending the whole tensor in each step": both * (latency + size / 3e8),
            "paying the latency once": latency + both / ranks * size / 3e8,
            "only one half of the ring": (ranks - 1) * (latency + size / ranks / 3e8),
        },
    )
    checks.number(
        communication_time(0, ranks, latency, 3e8),
        both * latency,
        to=1e-9,
        what=f"the ring's time for an empty tensor and {ranks} ranks",
        hint="Messages of no bytes cost their latency.",
    )
### END HIDDEN TESTS

# %% check="communication_time" points=1
checks.number(communication_time(1e6, 5, 1e-3, 1e9, "tree"), 0.012, what="1 MB, 5 ranks in a tree")
checks.number(communication_time(1e6, 5, 1e-3, 1e9, "star"), 0.016, what="1 MB, 5 ranks in a star")
### BEGIN HIDDEN TESTS
for ranks, rounds in ((1, 0), (2, 1), (3, 2), (4, 2), (8, 3), (9, 4), (1000, 10)):
    for algorithm, messages in (("tree", rounds), ("star", ranks - 1)):
        checks.number(
            communication_time(3e7, ranks, 0.07, 2e8, algorithm=algorithm),
            2 * messages * (0.07 + 0.15),
            to=1e-9,
            what=f"the {algorithm}'s time for {ranks} ranks",
        )
        checks.number(
            communication_time(0.0, ranks, 0.07, 2e8, algorithm),
            2 * messages * 0.07,
            to=1e-9,
            what=f"the {algorithm}'s time for an empty tensor and {ranks} ranks",
        )
checks.raises(ValueError, communication_time, 1.0, 2, 1.0, 1.0, "bus")
checks.raises(ValueError, communication_time, 1.0, 1, 1.0, 1.0, "bus")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: ring, tree and star for small and large tensors, few and many ranks
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 3.4))
sizes = [2.0**k for k in range(10, 33, 2)]
plot.curves(
    sizes,
    {
        name: [1e3 * communication_time(size, 64, 1e-5, 5e10, name) for size in sizes]
        for name in ("ring", "tree", "star")
    },
    logx=True,
    logy=True,
    xlabel="bytes of the tensor",
    ylabel="milliseconds",
    title="64 ranks",
    ax=axes[0],
)
many = [2**k for k in range(1, 11)]
plot.curves(
    many,
    {
        f"{name}, {label}": [1e3 * communication_time(size, p, 1e-5, 5e10, name) for p in many]
        for label, size in (("1 GB", 1e9), ("64 KB", 65536.0))
        for name in ("ring", "tree")
    },
    logx=True,
    logy=True,
    xlabel="ranks",
    ylabel="milliseconds",
    title="more and more ranks",
    ax=axes[1],
)
plot.caption(
    fig,
    "From your formula, with 10 µs and 50 GB/s, about a fast network between machines. Large "
    "tensors: from 2 to 1,024 ranks the ring's time triples and the tree's grows tenfold. Small "
    "ones: only latencies count, and the tree has fewer.",
)
plot.plt.show()

# %% [markdown]
# ## Data parallel {#data-parallel}
#
# Every rank holds the same parameters $\theta$ and gets its own part of the batch. Let rank $r$
# have $n_r$ labeled tokens with losses $\ell_{r,i}(\theta)$, and $N=\sum_r n_r$. The loss of the
# whole batch is the mean over all tokens, and differentiation is linear:
#
# $$ L = \frac1N \sum_{r}\sum_{i=1}^{n_r} \ell_{r,i}, \qquad
# \nabla L = \sum_r \frac{n_r}{N}\,\nabla L_r, \qquad L_r = \frac1{n_r}\sum_i \ell_{r,i} . $$
#
# So one all-reduce of the gradients is enough, and each rank can then take the same optimizer step.
# But look at the weights. PyTorch's DDP and FSDP **average** by default: they compute
# $\tfrac1p\sum_r \nabla L_r$. That equals $\nabla L$ only if all $n_r$ are the same.
#
# Texts are padded, prompts are masked, so the $n_r$ differ. With 900 labels here and 100 there, the
# plain mean gives each of the 100 tokens nine times the weight of the others. Nothing crashes, the
# loss falls; it is the loss of another problem. (The same mistake with accumulated micro-batches
# was in a widely used training library until autumn 2024.)
#
# The remedy is on the loss's side: $\tfrac1p\sum_r \nabla\bigl(p\tfrac{n_r}{N} L_r\bigr) = \nabla
# L$. Each rank multiplies what it has, the *sum* of its losses, by $p/N$, and the averaging that
# comes later does the rest.


# %% exercise="global_mean_loss" minutes=12 difficulty=2
def global_mean_loss(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """This rank's loss such that the mean of all ranks' gradients is that of the global token mean.

    logits: (…, classes) float; targets: (…) int64, of which those equal to `ignore_index` are no
    labels. Shapes and numbers of labels may differ from rank to rank; a rank may have none.
    Returns a scalar of logits' dtype that carries gradients. The mean over ranks of what they
    return is the mean cross-entropy over the labels of all ranks (0 if there is not one). A rank
    without labels returns 0 and gradients of 0, with a graph like the others'.
    """
    ### BEGIN SOLUTION
    labels = (targets != ignore_index).sum()
    dist.all_reduce(labels)
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return losses * dist.get_world_size() / labels.clamp(min=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what has to be communicated</summary>
#
# One number: how many labels there are. It carries no gradient, so it can be all-reduced as it is.
# </details>
#
# <details><summary>Hint: a rank without labels gives NaN</summary>
#
# A mean over nothing is 0/0. A sum over nothing is 0, and its gradient is 0.
# </details>

# %% check="global_mean_loss" points=2
targets = [torch.tensor([0, 1, 0]), torch.tensor([1, -100, -100])]


def loss_here(rank: int) -> float:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    logits[:, 1] += 3.0 * rank  # rank 1 has one label, and a small loss for it
    return global_mean_loss(logits, targets[rank]).item()


first, second = launch(loss_here, 2, timeout=checks.PATIENCE)
easy = math.log(1 + math.exp(-3.0))
checks.close(
    (first + second) / 2,
    (3 * math.log(2) + easy) / 4,
    what="the mean of what two ranks return, with 3 labels and 1",
    rtol=1e-5,
    mistakes={"the mean of the ranks' own means": (math.log(2) + easy) / 2},
)
checks.close(first, 3 * math.log(2) / 2, what="what rank 0 returns: 2/4 of its sum", rtol=1e-5)
### BEGIN HIDDEN TESTS
g = checks.generator(5)


def loss_and_gradient(rank: int, case: tuple) -> tuple[Tensor, Tensor]:
    logits, targets, ignored = case
    leaf = logits[rank].clone().requires_grad_()
    with checks.unchanged(targets=targets[rank]):
        loss = global_mean_loss(leaf, targets[rank], ignore_index=ignored)
    assert loss.requires_grad, f"the loss of rank {rank} carries no gradient"
    loss.backward()
    return loss.detach(), leaf.grad


cases = []
for ignored, dtype in ((-100, torch.float64), (2, torch.float32)):
    logits = [torch.randn(2, 1 + 2 * r, 5, generator=g).to(dtype) for r in range(3)]
    targets = [torch.randint(0, 5, (2, 1 + 2 * r), generator=g) for r in range(3)]
    for r in range(3):
        targets[r][:, r::2] = ignored  # rank 0 loses all that it has
    cases.append((logits, targets, ignored))
cases.append(([torch.randn(3, 4, generator=g)] * 3, [torch.full((3,), -100)] * 3, -100))
*labeled, nobody = checks.on_ranks(3, loss_and_gradient, cases)
alone = ([torch.randn(2, 2, 3, generator=g)], [torch.tensor([[1, -100], [0, 2]])], -100)
cases[-1:] = [alone]
labeled += checks.on_ranks(1, loss_and_gradient, [alone])
for (logits, targets, ignored), results in zip(cases, labeled, strict=True):
    dtype, ranks = logits[0].dtype, len(logits)
    leaves = [x.double().requires_grad_() for x in logits]
    whole = F.cross_entropy(
        torch.cat([x.flatten(0, 1) for x in leaves]),
        torch.cat([t.flatten() for t in targets]),
        ignore_index=ignored,
    )
    whole.backward()
    checks.close(
        torch.stack([loss for loss, _ in results]).mean(),
        whole.to(dtype),
        what=f"the mean of the losses over the ranks, of which there are {ranks}",
        dtype=dtype,
    )
    for rank, (_, gradient) in enumerate(results):
        checks.close(
            gradient,
            (ranks * leaves[rank].grad).to(dtype),
            what=f"the gradient of rank {rank}'s logits, where labels are unequal in number",
        )
for loss, gradient in nobody:
    checks.close(loss, torch.tensor(0.0), what="the loss where no rank has a label")
    checks.close(gradient, torch.zeros(3, 4), what="the gradient where no rank has a label")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: how far the mean of means is from the gradient of the batch
torch.manual_seed(0)
probe = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
tokens, answers = torch.randint(0, 50, (2, 1000))


def gradient_of(loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*probe.parameters()])])


counts = [500, 600, 700, 800, 900, 990]


def averaged_gradients(rank: int, first: int) -> list[Tensor]:
    """The mean over two ranks, of which rank 0 has the first labels: mean of means, then yours."""
    mine = slice(0, first) if rank == 0 else slice(first, 1000)
    found = []
    for loss in (F.cross_entropy, global_mean_loss):
        gradient = gradient_of(loss(probe(tokens[mine]), answers[mine])) / 2
        dist.all_reduce(gradient)
        found.append(gradient)
    return found


whole = gradient_of(F.cross_entropy(probe(tokens), answers))
errors = {"mean of the ranks' means": [], "your global mean": []}
for gradients in launch(lambda rank: [averaged_gradients(rank, n) for n in counts], 2)[0]:
    for values, gradient in zip(errors.values(), gradients, strict=True):
        values.append(float((gradient - whole).norm() / whole.norm()) + 1e-9)
ax = plot.curves(
    [count / 10 for count in counts],
    errors,
    logy=True,
    xlabel="% of the 1,000 labels that rank 0 has",
    ylabel="‖error‖ / ‖gradient‖",
    title="two ranks with unequal numbers of labels",
)
plot.caption(
    ax.figure,
    "The gradient after averaging, against that of one process. With equal shares both are right "
    "to rounding. With 9 labels in 10 on one rank the error of the usual average is about "
    "as long as the gradient itself.",
)
plot.plt.show()

# %% [markdown]
# ## Buckets, and hiding the wire {#buckets}
#
# Backward passes run from the last layer to the first. The gradient of the last layer is ready
# when most of the work is still to come: it can be on its way while the rest is computed. That is
# **overlap**, and it is what makes data parallelism nearly free.
#
# One message per parameter would pay the latency hundreds of times; one message for all would have
# nothing left to overlap with. So parameters are collected in **buckets** of some megabytes
# (PyTorch: 25 MiB, the first 1 MiB), *last parameter first*, since that is about the order in which
# gradients come.


# %% exercise="make_buckets" minutes=8 difficulty=1
def make_buckets(parameters: list[Tensor], limit: int) -> list[list[int]]:
    """Which parameters travel together.

    parameters: as model.parameters() gives them; those with requires_grad=False are left out.
    limit: bytes. Parameters are taken from the last to the first. A bucket ends where the next
    parameter would make it larger than `limit`, or is of another dtype; a parameter larger than
    `limit` is a bucket of its own.
    Returns lists of indices into `parameters`, in that order: [[4, 3], [2], [1, 0]].
    """
    ### BEGIN SOLUTION
    buckets: list[list[int]] = []
    room, dtype = 0, None
    for i in reversed(range(len(parameters))):
        p = parameters[i]
        if not p.requires_grad:
            continue
        size = p.numel() * p.element_size()
        if not buckets or size > room or p.dtype != dtype:
            buckets.append([])
            room, dtype = limit, p.dtype
        buckets[-1].append(i)
        room -= size
    return buckets
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: bytes</summary>
#
# `p.numel() * p.element_size()`; a bfloat16 number has 2 of them.
# </details>
#
# <details><summary>Hint: empty buckets</summary>
#
# A new bucket is begun when there is a parameter to put into it, not when the last one is full.
# </details>

# %% check="make_buckets" points=1
sizes = [4, 4, 2, 3, 1]
result = make_buckets([nn.Parameter(torch.zeros(n)) for n in sizes], limit=16)
assert result == [[4, 3], [2], [1], [0]], (
    f"parameters of {sizes} float32 numbers, 16 bytes a bucket: [[4, 3], [2], [1], [0]] is asked "
    f"for, yours is {result}"
)


### BEGIN HIDDEN TESTS
def sized(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]


cases = [
    (sized(1, 1, 1, 1), 8, [[3, 2], [1, 0]]),
    (sized(5, 1, 9, 1, 1), 8, [[4, 3], [2], [1], [0]]),
    (sized(2, 2), 1, [[1], [0]]),
    (sized(3, 3, dtype=torch.bfloat16), 12, [[1, 0]]),
    (sized(3), 100, [[0]]),
    (sized(1, 2, 1, 2), 10_000, [[3, 2, 1, 0]]),
    ([], 8, []),
    (sized(1, 1) + sized(1, 1, dtype=torch.float64) + sized(1), 1000, [[4], [3, 2], [1, 0]]),
]
for parameters, limit, expected in cases:
    before = [p.detach().clone() for p in parameters]
    result = make_buckets(parameters, limit)
    kept = len(parameters) == len(before) and all(map(torch.equal, parameters, before))
    assert kept, "the parameters were changed: they are only looked at"
    named = [f"{p.numel()}×{str(p.dtype).removeprefix('torch.')}" for p in parameters]
    assert result == expected, (
        f"parameters {named}, {limit} bytes a bucket: {expected} is asked for, yours is {result}"
    )
some = sized(1, 1, 1, 1)
some[0].requires_grad_(False), some[2].requires_grad_(False)
result = make_buckets(some, 8)
assert result == [[3, 1]], f"parameters 0 and 2 need no gradient: [[3, 1]], yours is {result}"
### END HIDDEN TESTS

# %% [markdown]
# Now the wrapper. PyTorch calls a hook when a parameter's gradient is complete
# (`p.register_post_accumulate_grad_hook(f)`, called as `f(p)`). When the last gradient of a bucket
# is there, its all-reduce starts, with `async_op=True`: the call returns a handle at once, and gloo
# works in a thread of its own while the backward pass goes on.
#
# Two traps:
#
# - **Order.** Collectives are matched by the order in which they are called. On one rank bucket 2
#   may be full before bucket 1, on another after: gloo mixes them in silence if they are equally
#   large, and aborts if not. So bucket $b$ starts when all before it have.
# - **Unused parameters.** A batch that takes one branch gives the other no gradient: its bucket is
#   never full, the other ranks wait for ever. So after the backward pass, `finish()` starts what is
#   left, with zeros for what is missing. A gradient that is missing *everywhere* must stay `None`:
#   with a zero in its place, an optimizer would go on decaying a weight that nobody uses.


# %% exercise="data_parallel" minutes=30 difficulty=2
class DataParallel(nn.Module):
    """A module that is trained on all ranks at once.

        model = DataParallel(module, bucket_bytes=25 * 2**20)
        loss_of(model(batch)).backward()
        model.finish()                      # now every .grad is the mean over the ranks

    At the beginning all parameters and buffers become those of rank 0. The call passes on all
    arguments. After `finish()`, the .grad of each parameter that requires one is the mean over
    ranks of what it was after the backward pass, where a missing one (None) counts as zeros; it is
    None where it was missing on all ranks. There is one backward pass for each `finish()`, before
    which every .grad is None, and any number of such pairs; ranks may use different parameters.

    Buckets are those of make_buckets([*module.parameters()], bucket_bytes), and each is reduced by
    one dist.all_reduce(…, async_op=True), called during the backward pass, as soon as its gradients
    and all buckets before it are there. What could not be started then, is started in `finish()`,
    which may call one small collective more for each bucket: never one for each parameter. (What
    tells which gradients are there may ride in the bucket, or be that collective.) A mean that
    happens to be zero is a gradient like any other. Parameters are contiguous, of any
    floating-point dtype. `ready` and `start` are optional; the call and `finish()` are asked for.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = 25 * 2**20) -> None:
        super().__init__()
        self.module = module
        ### BEGIN SOLUTION
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor, 0)
        parameters = [*module.parameters()]
        self.buckets = [
            [parameters[i] for i in bucket] for bucket in make_buckets(parameters, bucket_bytes)
        ]
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(lambda p, number=number: self.ready(number))
        self.missing = [len(bucket) for bucket in self.buckets]
        self.started: list[tuple] = []
        ### END SOLUTION

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def ready(self, number: int) -> None:
        """For a hook: one more gradient of bucket `number` is there."""
        ### BEGIN SOLUTION
        self.missing[number] -= 1
        while len(self.started) < len(self.buckets) and not self.missing[len(self.started)]:
            self.start()
        ### END SOLUTION

    def start(self) -> None:
        """Sends the next bucket on its way."""
        ### BEGIN SOLUTION
        bucket = self.buckets[len(self.started)]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        there = parts[0].new_tensor([p.grad is not None for p in bucket])
        flat = torch.cat([part.flatten() for part in parts] + [there])
        self.started.append((flat, dist.all_reduce(flat, async_op=True)))
        ### END SOLUTION

    @torch.no_grad()
    def finish(self) -> None:
        ### BEGIN SOLUTION
        while len(self.started) < len(self.buckets):
            self.start()
        for bucket, (flat, work) in zip(self.buckets, self.started, strict=True):
            work.wait()
            *parts, used = flat.split([p.numel() for p in bucket] + [len(bucket)])
            for p, part, count in zip(bucket, parts, used, strict=True):
                if count:
                    p.grad = part.view_as(p) / dist.get_world_size()
        self.missing = [len(bucket) for bucket in self.buckets]
        self.started.clear()
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what to count</summary>
#
# For each bucket, how many gradients are still missing; and how many buckets have been started. In
# the hook: count down, then start buckets for as long as the *next* one misses nothing.
# </details>
#
# <details><summary>Hint: all hooks do the same bucket</summary>
#
# A lambda in a loop sees the loop variable as it is when called: after the loop, the last one. Bind
# it: `lambda p, number=number: …`.
# </details>
#
# <details><summary>Hint: missing everywhere</summary>
#
# A rank cannot know alone. Send along a 1 for each gradient that is there; after the sum, 0 says
# that nobody had it.
# </details>
#
# <details><summary>Hint: the second step is wrong</summary>
#
# `finish()` leaves everything as the next backward pass needs it: counters, started buckets.
# </details>


# %% tags=["support"]
# Support: a module with branches, and training steps on one rank
class Branches(nn.Module):
    """Two ways through: `left` (way 0), `right` (way 1), both (way 2), both with `right` times zero
    (way 3). `shared` is used twice, `never` not at all, `frozen` is not trained, and `scale` is a
    buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.left = nn.Linear(6, 5)
        self.never = nn.Linear(3, 3)
        self.right = nn.Linear(6, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11)
        self.register_buffer("scale", torch.rand(1) + 0.5)

    def forward(self, tokens: Tensor, *, way: int) -> Tensor:
        x = self.embed(tokens)
        weight = 0.0 if way == 3 else 1.0
        x = (self.left(x) if way != 1 else 0) + (weight * self.right(x) if way else 0)
        x = self.shared(torch.tanh(self.shared(self.frozen(x)))) * self.scale
        return self.head(x)


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }


@checks.measured
def parallel_steps(wrap: Callable, seed: int, bucket_bytes: int, steps: list[tuple]) -> dict:
    """What training on one rank gives: rank r begins with its own parameters, of seed + r.

    steps: (tokens, targets, way) of this rank.
    """
    torch.manual_seed(seed + dist.get_rank())
    module = Branches().double()
    model = wrap(module, bucket_bytes)
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    gradients, calls = [], []
    for tokens, targets, way in steps:
        module.zero_grad()
        with checks.communication() as log:
            F.cross_entropy(model(tokens, way=way), targets).backward()
            model.finish()
        gradients.append(gradients_of(module))
        calls.append(len(log))
    return {"state": state, "gradients": gradients, "calls": calls}


def expected_gradients(seed: int, steps: list[list[tuple]]) -> tuple[dict, list[dict]]:
    """The same from one process: state of rank 0, and for each step the mean over ranks."""
    torch.manual_seed(seed)
    module = Branches().double()
    means = []
    for step in zip(*steps, strict=True):
        found = []
        for tokens, targets, way in step:
            module.zero_grad()
            F.cross_entropy(module(tokens, way=way), targets).backward()
            found.append(gradients_of(module))
        means.append({})
        for name, p in module.named_parameters():
            there = [g[name] for g in found if g[name] is not None]
            mean = sum(there) / len(step) if there else None
            means[-1][name] = torch.zeros_like(p) if there and mean is None else mean
    return module.state_dict(), means


def train_branches(wrap: Callable, *cases: tuple[int, int, list[list[tuple]]]) -> list[list[dict]]:
    """Cases of (seed, bucket_bytes, [rank][step]), each against one process."""

    def train(rank: int, case: tuple) -> dict:
        seed, bucket_bytes, steps = case
        return parallel_steps(wrap, seed, bucket_bytes, steps[rank])

    found = checks.on_ranks(len(cases[0][2]), train, cases)
    for (seed, _, steps), results in zip(cases, found, strict=True):
        compare_gradients(results, seed, steps)
    return found


def compare_gradients(results: list[dict], seed: int, steps: list[list[tuple]]) -> None:
    state, means = expected_gradients(seed, steps)
    for rank, result in enumerate(results):
        for name, value in state.items():
            checks.close(
                result["state"][name],
                value,
                what=f"{name} on rank {rank} at the beginning",
                hint="All ranks begin with what rank 0 has.",
                rtol=0,
                atol=0,
            )
    for rank, result in enumerate(results):
        for step, (got, due) in enumerate(zip(result["gradients"], means, strict=True)):
            ways = [mine[step][2] for mine in steps]
            where = f"the gradient of {name_of(ways)}"
            for name, expected in due.items():
                if expected is None:
                    assert got[name] is None, (
                        f"{name}.grad is a tensor on rank {rank} in step {step}; no rank has "
                        "a gradient for it: it stays None"
                    )
                    continue
                assert got[name] is not None, (
                    f"{name}.grad is None on rank {rank} in step {step}, but another rank has a "
                    "gradient: the mean counts zeros for the missing ones"
                )
                own = expected * len(results)
                checks.close(
                    got[name],
                    expected,
                    what=f"{where}, {name}, on rank {rank} in step {step}",
                    mistakes={"the sum over the ranks, not their mean": own},
                )


def name_of(ways: list[int]) -> str:
    names = "left", "right", "both", "both with zero weight on the right"
    return f"a batch in which the ranks go {' and '.join(names[way] for way in ways)}"


def draw_steps(ranks: int, ways: list[tuple[int, ...]], g: torch.Generator) -> list[list[tuple]]:
    """For each rank its (tokens, targets, way), one for each of `ways`."""
    return [
        [
            (
                torch.randint(0, 11, (3, 2), generator=g).flatten(),
                torch.randint(0, 11, (6,), generator=g),
                way[r],
            )
            for way in ways
        ]
        for r in range(ranks)
    ]


# %% check="data_parallel" points=3
g = checks.generator(6)
results = train_branches(DataParallel, (7, 400, draw_steps(2, [(2, 2), (2, 2)], g)))
### BEGIN HIDDEN TESTS
results = train_branches(DataParallel, (72, 400, draw_steps(1, [(2,), (0,)], g)))
ways = [(2, 2), (3, 3), (0, 0), (2, 2)]
sizes = 1, 10_000
_, in_one = train_branches(DataParallel, *[(70, size, draw_steps(2, ways, g)) for size in sizes])
for calls in (result["calls"] for result in in_one):
    assert max(calls) <= 2, (
        f"one bucket holds all gradients, and a step calls {max(calls)} collectives: at most an "
        "all-reduce and a small one more are asked for"
    )
### END HIDDEN TESTS

# %% check="data_parallel" points=2
g = checks.generator(7)
results = train_branches(DataParallel, (3, 200, draw_steps(2, [(0, 1)], g)))
### BEGIN HIDDEN TESTS
ways = [(0, 1, 2), (1, 2, 0), (0, 3, 0), (1, 1, 1), (2, 2, 2)]
results = train_branches(
    DataParallel, *[(30 + size, size, draw_steps(3, ways, g)) for size in (1, 520)]
)
### END HIDDEN TESTS


# %% tags=["support"]
# Support: when gradients come and when buckets leave
@checks.measured
def bucket_events(wrap: Callable, layers: int, width: int, bucket_bytes: int) -> list[tuple]:
    """In order: ("gradient", layer) when a layer's weight gets one, ("reduce", elements, async_op)
    when an all-reduce is called, and ("finish",).
    """
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    model = wrap(module, bucket_bytes)
    events: list[tuple] = []
    for i, layer in enumerate(module):
        layer.weight.register_hook(lambda g, i=i: events.append(("gradient", i)))
    reduce = dist.all_reduce

    def noting(tensor, *args, **kwargs):
        asynchronous = bool(kwargs.get("async_op", args[2] if len(args) > 2 else False))
        events.append(("reduce", tensor.numel(), asynchronous))
        return reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", noting):
        model(torch.ones(2, width)).sum().backward()
        events.append(("finish",))
        model.finish()
    return events


# %% check="data_parallel" points=2
def events_here(rank: int, case: tuple) -> list[tuple]:
    return bucket_events(DataParallel, *case)


events = checks.on_ranks(2, events_here, [(4, 8, 4 * 64)])[0][0]
early = events[: events.index(("finish",))]
reduced = [event for event in early if event[0] == "reduce"]
assert len(reduced) >= 3, (
    f"of 4 buckets {len(reduced)} are reduced before the backward pass is over; each leaves when "
    "its gradients are there, by dist.all_reduce"
)
assert all(event[2] for event in reduced), (
    "an all-reduce in a hook without async_op=True stops the pass"
)
first = events.index(reduced[0])
assert events.index(("gradient", 0)) > first, (
    "the first bucket leaves only after the gradient of the first layer has come: nothing overlaps"
)
### BEGIN HIDDEN TESTS
plans = [(6, 2), (5, 1), (4, 4)]
found = checks.on_ranks(2, events_here, [(layers, 6, each * 4 * 36) for layers, each in plans])
for (layers, per_bucket), (_, events) in zip(plans, found, strict=True):
    large = [i for i, event in enumerate(events) if event[0] == "reduce" and event[1] >= 36]
    assert len(large) == layers // per_bucket, (
        f"{layers} layers, {per_bucket} to a bucket: {len(large)} all-reduces carry gradients, "
        f"{layers // per_bucket} are asked for"
    )
    end = events.index(("finish",))
    for number in range(layers // per_bucket):
        last = layers - (number + 1) * per_bucket  # the layer whose gradient completes the bucket
        place = large[number]
        assert events.index(("gradient", last)) < place < end, (
            f"bucket {number} does not leave when the gradient of layer {last} is there"
        )
        if last:
            assert place < events.index(("gradient", last - 1)), (
                f"bucket {number} is complete with layer {last}, and leaves only later"
            )
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: a backward pass, and what is on the wire meanwhile
def timeline(bucket_bytes: int) -> tuple[list[float], list[list[float]]]:
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(640, 640, bias=False) for _ in range(8)])
    model = DataParallel(module, bucket_bytes)
    ready: list[float] = []
    wire: list[list[float]] = []
    reduce = dist.all_reduce

    def noting(tensor, *args, **kwargs):
        span = [time.perf_counter() - begin, math.nan]
        wire.append(span)
        work = reduce(tensor, *args, **kwargs)
        work.get_future().then(lambda _: span.__setitem__(1, time.perf_counter() - begin))
        return work

    for layer in module:
        layer.weight.register_hook(lambda g: ready.append(time.perf_counter() - begin))
    batch = torch.randn(512, 640)
    with mock.patch.object(dist, "all_reduce", noting):
        for _ in range(3):  # the last one counts
            ready.clear(), wire.clear()
            loss = model(batch).square().mean()
            dist.barrier()
            begin = time.perf_counter()
            loss.backward()
            done = time.perf_counter() - begin
            model.finish()
    time.sleep(0.05)
    return [*ready, done], wire


sizes = {"a bucket for two layers": 2 * 4 * 640**2, "one bucket for all": 2**30}
timelines = launch(lambda rank: [timeline(size) for size in sizes.values()], 2)[0]
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 2.9), sharex=True)
for ax, title, (ready, wire) in zip(axes, sizes, timelines, strict=True):
    for i, (start, stop) in enumerate(zip([0.0, *ready], ready, strict=False)):
        ax.barh(
            1,
            1e3 * (stop - start),
            left=1e3 * start,
            color=plot.COLORS[0],
            alpha=0.5 + 0.4 * (i % 2),
        )
    for start, stop in wire:
        ax.barh(
            0,
            1e3 * (stop - start),
            left=1e3 * start,
            color=plot.COLORS[1],
            hatch="//",
            edgecolor="k",
            alpha=0.7,
        )
    ax.set(
        yticks=[0, 1], yticklabels=["all-reduce", "backward"], xlabel="milliseconds", title=title
    )
plot.caption(
    fig,
    "One rank of two, in real time. Above: the gradients of eight layers as they come, the last "
    "first. Below: your buckets on their way; bars overlap where a bucket waits for the "
    "one before. Two processes and gloo's threads share this machine's cores, so the pass itself "
    "is slowed; on GPUs the wire has hardware of its own.",
)
plot.plt.show()

# %% [markdown]
# ## ZeRO: who keeps what {#zero}
#
# Data parallel ranks are wasteful in one respect: they all hold the same thing. For each parameter
# in mixed precision with Adam: 2 bytes of weight, 2 of gradient, and 12 of optimizer state (a
# float32 master weight and two moments, 4 each). 16 bytes, $p$ times over.
#
# ZeRO (for *zero redundancy*) keeps each byte once among the $p$ ranks, in three stages:
#
# | stage | cut into $p$ shards | bytes for each parameter and rank |
# |---|---|---|
# | 0 (data parallel) | nothing | $2+2+12$ |
# | 1 | optimizer state | $2+2+\tfrac{12}p$ |
# | 2 | and gradients | $2+\tfrac{2+12}p$ |
# | 3 (FSDP) | and weights | $\tfrac{2+2+12}p$ |
#
# Stages 1 and 2 cost nothing more on the wire than data parallel (stage 2, where gradients are not
# accumulated over micro-batches: each would be scattered). An all-reduce is a reduce-scatter and an
# all-gather; ZeRO stops after the first half, when rank $r$ has shard $r$ of the mean gradient. It
# updates shard $r$ of the parameters, with shard $r$ of the moments, and the all-gather then
# carries *parameters* in place of gradients. Stage 3 gathers weights for the forward and again for
# the backward pass: $3\tfrac{p-1}p n$ in place of $2\tfrac{p-1}p n$.


# %% exercise="zero_memory" minutes=6 difficulty=1
def zero_memory(parameters: float, ranks: int, stage: int) -> float:
    """Bytes on each rank for weights, gradients and optimizer state, as in the table above.

    stage: 0, 1, 2 or 3; ValueError for any other.
    """
    ### BEGIN SOLUTION
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage is 0, 1, 2 or 3, not {stage!r}")
    per_parameter = 0.0
    for first_stage, size in ((3, 2), (2, 2), (1, 12)):  # weights, gradients, optimizer state
        per_parameter += size / ranks if stage >= first_stage else size
    return parameters * per_parameter
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three terms</summary>
#
# Weights, gradients, state: each is divided by the ranks from a certain stage on.
# </details>

# %% check="zero_memory" points=1
for stage, expected in enumerate((120e9, 31.4e9, 16.6e9, 1.875e9)):
    checks.number(
        zero_memory(7.5e9, 64, stage),
        expected,
        to=0.005,
        what=f"bytes of 7.5 billion parameters on 64 ranks in stage {stage}",
    )
### BEGIN HIDDEN TESTS
for ranks in (1, 3, 8):
    for stage, bytes_each in enumerate((16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks)):
        checks.number(
            zero_memory(1.3e6, ranks, stage),
            1.3e6 * bytes_each,
            to=1e-9,
            what=f"bytes of 1.3 million parameters on {ranks} ranks in stage {stage}",
        )
checks.raises(ValueError, zero_memory, 1e6, 2, 4)
checks.raises(ValueError, zero_memory, 1e6, 2, -1)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: what a rank holds, by stage and number of ranks
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 3.4))
stages = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
for i, size in enumerate((7.5e9, 70e9)):
    values = [zero_memory(size, 64, stage) / 1e9 for stage in range(4)]
    at = [stage + (i - 0.5) * 0.38 for stage in range(4)]
    axes[0].bar(
        at,
        values,
        width=0.36,
        color=plot.COLORS[i],
        hatch=("", "//")[i],
        edgecolor="white",
        label=f"{size / 1e9:g} billion parameters",
    )
    for x, value in zip(at, values, strict=True):
        axes[0].annotate(
            f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
            (x, value),
            ha="center",
            va="bottom",
            fontsize=8,
        )
axes[0].axhline(80, color="#888888", linestyle=":")
axes[0].set(yscale="log", ylabel="GB a rank", xticks=range(4), xticklabels=stages, title="64 ranks")
axes[0].legend(fontsize=8)
ranks = [2**k for k in range(11)]
plot.curves(
    ranks,
    {name: [zero_memory(70e9, p, stage) / 1e9 for p in ranks] for stage, name in enumerate(stages)},
    logx=True,
    logy=True,
    xlabel="ranks",
    ylabel="GB a rank",
    title="70 billion parameters",
    ax=axes[1],
)
axes[1].axhline(80, color="#888888", linestyle=":")
plot.caption(
    fig,
    "From your formula; dotted: a GPU of 80 GB. Stages 1 and 2 run into a floor, the weights (and "
    "gradients) that every rank still has whole; only stage 3 falls as long as ranks are added. "
    "Activations come on top.",
)
plot.plt.show()

# %% [markdown]
# Now the optimizer. All parameters are laid out in one long vector, in their order, padded with
# zeros to a multiple of the ranks, and cut into equal shards, with no regard for where one
# parameter ends and the next begins. Adam does not mind: it treats every element alone.


# %% exercise="zero_optimizer" minutes=25 difficulty=2
class ZeroOptimizer:
    """AdamW whose state is cut into shards (ZeRO, stage 1), for float32 parameters.

    parameters: the same on all ranks, contiguous. step() takes each rank's own .grad (None counts
    as zeros), updates with the mean over ranks, and leaves all ranks with equal parameters: those
    that torch.optim.AdamW(parameters, lr, betas, eps, weight_decay) would have after the same steps
    with the mean gradients. What is in .grad afterwards is left open. `lr` is an attribute that may
    be changed between steps.

    Of n elements in p ranks each rank holds moments for its shard only. Between steps it holds, in
    all tensors beside the parameters and their .grad, at most 4⌈n/p⌉ + 100 elements. A step costs a
    rank no more traffic than an all-reduce of the gradients, padded.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        ### BEGIN SOLUTION
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.exp_avg = torch.zeros_like(own_part(flatten(self.parameters)))
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.steps = 0
        ### END SOLUTION

    @torch.no_grad()
    def step(self) -> None:
        ### BEGIN SOLUTION
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradient = reduce_scatter(flatten(gradients)) / dist.get_world_size()
        shard = own_part(flatten(self.parameters))
        self.steps += 1
        beta1, beta2 = self.betas
        self.exp_avg.lerp_(gradient, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean = self.exp_avg / (1 - beta1**self.steps)
        root = (self.exp_avg_sq / (1 - beta2**self.steps)).sqrt() + self.eps
        shard.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * mean / root)
        full = all_gather(shard)
        sizes = [p.numel() for p in self.parameters]
        for p, new in zip(self.parameters, full[: sum(sizes)].split(sizes), strict=True):
            p.copy_(new.view_as(p))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order of a step</summary>
#
# `flatten` the gradients; `reduce_scatter`, divided by the ranks; AdamW on `own_part` of the
# flattened parameters; `all_gather`; cut off the padding and copy back.
# </details>
#
# <details><summary>Hint: too much is held</summary>
#
# A flat copy of all parameters kept from step to step is as large as what you wanted to save. Make
# it in `step()`, or let the parameters be views of it.
# </details>
#
# <details><summary>Hint: AdamW</summary>
#
# Decay first, $\theta \leftarrow (1-\eta\lambda)\theta$; then $\theta \leftarrow \theta - \eta\,
# \hat m/(\sqrt{\hat v}+\epsilon)$ with $\hat m = m/(1-\beta_1^t)$, $\hat v = v/(1-\beta_2^t)$.
# </details>


# %% tags=["support"]
# Support: optimizer steps on one rank, with given gradients
@checks.measured
def optimizer_steps(
    make: Callable, start: list[Tensor], gradients: list[list], options: dict, rates: dict
) -> dict:
    """Steps from `start` with gradients[step] of this rank; rates[step] is a new lr before it.

    Returns the parameters after each step, the elements held besides, and each step's log.
    """
    parameters = [nn.Parameter(t.clone()) for t in start]
    optimizer = make(iter(parameters), **options)  # as model.parameters(): it can be walked once
    after, logs = [], []
    for step, mine in enumerate(gradients):
        for p, g in zip(parameters, mine, strict=True):
            p.grad = None if g is None else g.clone()
        if step in rates:
            optimizer.lr = rates[step]
        with checks.communication() as log:
            optimizer.step()
        logs.append(list(log))
        after.append([p.detach().clone() for p in parameters])
    for p in parameters:
        p.grad = None
    return {"after": after, "held": checks.held_elements(optimizer, parameters), "logs": logs}


def mean_gradients(gradients: list[list[list]], start: list[Tensor]) -> list[list[Tensor]]:
    """Over ranks: gradients[rank][step][i], where None is zeros, to [step][i]."""
    return [
        [
            sum(torch.zeros_like(p) if mine[i] is None else mine[i] for mine in step) / len(step)
            for i, p in enumerate(start)
        ]
        for step in zip(*gradients, strict=True)
    ]


def draw_gradients(ranks: int, steps: int, start: list[Tensor], g: torch.Generator) -> list:
    return [
        [[torch.randn(p.shape, generator=g) for p in start] for _ in range(steps)]
        for _ in range(ranks)
    ]


def run_optimizers(make: Callable, *cases: tuple) -> list[list[dict]]:
    """Cases of (start, gradients[rank][step], options, rates), all on equally many ranks."""

    def run(rank: int, case: tuple) -> dict:
        start, gradients, options, rates = case
        return optimizer_steps(make, start, gradients[rank], options, rates)

    return checks.on_ranks(len(cases[0][1]), run, cases)


def run_optimizer(make: Callable, start: list[Tensor], gradients: list, options: dict) -> list:
    return run_optimizers(make, (start, gradients, options, {}))[0]


def adamw(
    start: list[Tensor], means: list[list[Tensor]], options: dict, rates: dict | None = None
) -> list[list[Tensor]]:
    """PyTorch's AdamW with these gradients, in float64."""
    parameters = [nn.Parameter(t.double()) for t in start]
    optimizer = torch.optim.AdamW(parameters, **options)
    after = []
    for step, gradients in enumerate(means):
        if rates and step in rates:
            optimizer.param_groups[0]["lr"] = rates[step]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.double()
        optimizer.step()
        after.append([p.detach().float() for p in parameters])
    return after


def compare_steps(results: list[dict], expected: list[list[Tensor]], who: str, **usual) -> None:
    for rank, result in enumerate(results):
        for step, (got, due) in enumerate(zip(result["after"], expected, strict=True)):
            for i, (value, target) in enumerate(zip(got, due, strict=True)):
                checks.close(
                    value,
                    target,
                    what=f"parameter {i} on rank {rank} after step {step + 1} of {who}",
                    rtol=2e-5,
                    atol=2e-5,
                    mistakes={
                        name.replace("_", " "): other[step][i] for name, other in usual.items()
                    },
                )


# %% check="zero_optimizer" points=2
g = checks.generator(8)
start = [torch.randn(3, 2, generator=g), torch.randn(2, generator=g)]
gradients = draw_gradients(2, 2, start, g)
options = {"lr": 0.1}
results = run_optimizer(ZeroOptimizer, start, gradients, options)
compare_steps(
    results,
    adamw(start, mean_gradients(gradients, start), options),
    "ZeroOptimizer",
    the_gradients_of_rank_0_alone=adamw(start, gradients[0], options),
)
### BEGIN HIDDEN TESTS
options = {"lr": 0.03, "betas": (0.7, 0.95), "eps": 1e-2, "weight_decay": 0.3}
start, alone = [torch.randn(3, generator=g)], [[[torch.ones(3)]]]
compare_steps(
    run_optimizer(ZeroOptimizer, start, alone, options),
    adamw(start, alone[0], options),
    "ZeroOptimizer on a single rank",
)
cases = []
for shapes in ([(3, 5), (7,), (), (2, 1, 3)], [(1,), (1,)], [(4, 4)]):
    start = [torch.randn(shape, generator=g) for shape in shapes]
    gradients = draw_gradients(3, 4, start, g)
    for step in range(4):  # parameter 0 gets nothing on rank 0, and nothing at all in step 2
        for rank in range(3):
            if rank == 0 or step == 2:
                gradients[rank][step][0] = None
    cases.append((start, gradients, options, {2: 0.2}))
for (start, gradients, _, rates), results in zip(
    cases, run_optimizers(ZeroOptimizer, *cases), strict=True
):
    means = mean_gradients(gradients, start)
    compare_steps(results, adamw(start, means, options, rates), "ZeroOptimizer on 3 ranks")
    for step in range(4):
        for i in range(len(start)):
            same_on_all([result["after"][step][i] for result in results], f"parameter {i}")
### END HIDDEN TESTS

# %% check="zero_optimizer" points=2
start = [torch.ones(40, 30), torch.ones(40)]
gradients = [[[torch.ones(40, 30), torch.ones(40)]] * 2 for _ in range(4)]
results = run_optimizer(ZeroOptimizer, start, gradients, {"lr": 0.1})
for rank, result in enumerate(results):
    assert result["held"] <= 4 * 310 + 100, (
        f"rank {rank} of 4 holds {result['held']} elements besides 1240 parameters; moments for "
        "its quarter are 620"
    )
    traffic = elements_sent(result["logs"][-1], 4)
    assert traffic <= 2 * 0.75 * 1240 + 50, (
        f"on a ring a step would send {traffic:.0f} elements from each rank, an all-reduce 1860"
    )
    checks.close(
        result["after"][-1][0],
        adamw(start, gradients[0], {"lr": 0.1})[-1][0],
        what="the parameters",
    )
### BEGIN HIDDEN TESTS
g = checks.generator(9)
start = [torch.randn(500, generator=g), torch.randn(11, 7, generator=g)]
gradients = draw_gradients(2, 3, start, g)
results = run_optimizer(ZeroOptimizer, start, gradients, {"lr": 0.1})
compare_steps(results, adamw(start, mean_gradients(gradients, start), {"lr": 0.1}), "ZeroOptimizer")
for rank, result in enumerate(results):
    assert result["held"] > 2 * 280, f"rank {rank} keeps no moments between steps"
    for log in result["logs"]:
        traffic = elements_sent(log, 2)
        assert traffic <= 578 + 50, f"a step sends {traffic:.0f} elements from each rank"
### END HIDDEN TESTS

# %% [markdown]
# ## Whole matrices: Muon among ranks {#muon}
#
# Cutting by elements works since Adam looks at one element at a time. **Muon** (lesson 06) does
# not: it replaces the momentum of a matrix by the nearest orthogonal one, and the nearest to half a
# matrix is not half of the nearest to the whole. So whole matrices are dealt out: each has one
# **owner**, which keeps its momentum, orthogonalizes, and broadcasts the result. The models shipped
# with this course were trained with Muon, on one machine.
#
# Then the memory is only as well balanced as the deal. Finding the best deal is NP-hard; the old
# rule *largest first, each to the rank that has least so far* has a largest load of at most a third
# above the best.


# %% exercise="assign_owners" minutes=6 difficulty=1 path="more"
def assign_owners(sizes: list[int], ranks: int) -> list[int]:
    """The rank that owns each of these matrices.

    Matrices are dealt out from the largest to the smallest (equal ones in the order of the list),
    each to the rank whose sizes add up to least so far (the lowest of several).
    """
    ### BEGIN SOLUTION
    owners, load = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: an order that keeps equal ones in place</summary>
#
# Python's `sorted` is stable: sort the indices by minus their size.
# </details>

# %% check="assign_owners" points=1
result = assign_owners([2, 7, 4, 4], 2)
assert result == [0, 0, 1, 1], (
    f"sizes 2, 7, 4, 4 for two ranks: 7 to rank 0, both 4 to rank 1, then 2 to rank 0, which has "
    f"less: [0, 0, 1, 1]; yours is {result}"
)
### BEGIN HIDDEN TESTS
for sizes, ranks, expected in (
    ([5, 5, 5], 3, [0, 1, 2]),
    ([1, 2, 3, 4, 5, 6], 3, [0, 1, 2, 2, 1, 0]),
    ([3, 3, 2, 2, 2], 2, [0, 1, 0, 1, 0]),
    ([10, 1, 1, 1], 2, [0, 1, 1, 1]),
    ([], 4, []),
    ([4, 9], 1, [0, 0]),
    ([1, 8, 1, 8, 2], 4, [3, 0, 3, 1, 2]),
    ([6, 5, 4, 2, 1, 1], 2, [0, 1, 1, 0, 0, 0]),  # the last finds 9 and 9, of two and of three
):
    result = assign_owners(list(sizes), ranks)
    assert result == expected, f"sizes {sizes} for {ranks} ranks: {expected}; yours is {result}"
g = checks.generator(19)
for ranks in (2, 3, 5):
    sizes = torch.randint(1, 6, (16,), generator=g).tolist()
    result = assign_owners(list(sizes), ranks)
    for i, size in enumerate(sizes):  # the rule itself, for the loads that the answer has made
        load = [0] * ranks
        for j, owner in enumerate(result):
            load[owner] += sizes[j] if (-sizes[j], j) < (-size, i) else 0
        assert result[i] == load.index(min(load)), (
            f"sizes {sizes} for {ranks} ranks: matrix {i} finds loads {load} and goes to rank "
            f"{result[i]}; the lowest of those with least is asked for"
        )
### END HIDDEN TESTS


# %%
def orthogonalize(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns: five Newton–Schulz steps."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


# %% exercise="zero_muon" minutes=20 difficulty=2 path="more"
class ZeroMuon:
    """Muon whose matrices are owned by ranks.

    matrices: 2-D float32 parameters, the same on all ranks, contiguous. Owners are those of
    assign_owners by the numbers of elements. In step(), with g the mean over ranks of a matrix's
    .grad (None counts as zeros: weights decay all the same), its owner computes

        momentum ← μ·momentum + (1 − μ)·g              (zeros at the beginning)
        direction = orthogonalize((1 − μ)·g + μ·momentum)
        matrix ← (1 − lr·weight_decay)·matrix − lr·0.2·√max(rows, columns)·direction

    and all ranks get the result, the same bit for bit. A rank holds momentum for its own matrices
    only: between steps, in all tensors beside the matrices and their .grad, no more elements than
    those have, plus 100. `lr` is an attribute that may be changed between steps.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        ### BEGIN SOLUTION
        self.matrices = list(matrices)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.owners = assign_owners([m.numel() for m in self.matrices], dist.get_world_size())
        rank = dist.get_rank()
        self.buffers = {
            i: torch.zeros_like(m) for i, m in enumerate(self.matrices) if self.owners[i] == rank
        }
        ### END SOLUTION

    @torch.no_grad()
    def step(self) -> None:
        ### BEGIN SOLUTION
        for i, (matrix, owner) in enumerate(zip(self.matrices, self.owners, strict=True)):
            g = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad.clone()
            dist.reduce(g, owner)
            if i in self.buffers:
                g /= dist.get_world_size()
                self.buffers[i].lerp_(g, 1 - self.momentum)
                direction = orthogonalize(g.lerp(self.buffers[i], self.momentum))
                matrix.mul_(1 - self.lr * self.weight_decay)
                matrix.sub_(self.lr * 0.2 * math.sqrt(max(matrix.shape)) * direction)
            dist.broadcast(matrix, owner)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which collectives</summary>
#
# The gradient is needed by the owner alone: `dist.reduce(tensor, owner)` adds up there (elsewhere
# the tensor is scratch afterwards). The result goes out by `dist.broadcast(matrix, owner)`. All
# ranks call both, for all matrices, in one order.
# </details>


# %% tags=["support"]
# Support: Muon in one process
def muon(
    start: list[Tensor],
    means: list[list[Tensor]],
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    rates: dict | None = None,
) -> list[list[Tensor]]:
    matrices = [t.double() for t in start]
    buffers = [torch.zeros_like(m) for m in matrices]
    after = []
    for step, gradients in enumerate(means):
        lr = (rates or {}).get(step, lr)
        for i, gradient in enumerate(gradients):
            g = gradient.double()
            buffers[i] = momentum * buffers[i] + (1 - momentum) * g
            direction = orthogonalize((1 - momentum) * g + momentum * buffers[i])
            scale = 0.2 * math.sqrt(max(g.shape))
            matrices[i] = (1 - lr * weight_decay) * matrices[i] - lr * scale * direction
        after.append([m.float() for m in matrices])
    return after


# %% check="zero_muon" points=2
g = checks.generator(10)
start = [
    torch.randn(4, 3, generator=g),
    torch.randn(2, 5, generator=g),
    torch.randn(3, 3, generator=g),
]
gradients = draw_gradients(2, 2, start, g)
results = run_optimizer(ZeroMuon, start, gradients, {"lr": 0.1})
compare_steps(results, muon(start, mean_gradients(gradients, start), lr=0.1), "ZeroMuon")
### BEGIN HIDDEN TESTS
options = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.5}
start, alone = [torch.randn(3, 2, generator=g)], [[[torch.ones(3, 2)]]]
compare_steps(
    run_optimizer(ZeroMuon, start, alone, options),
    muon(start, alone[0], **options),
    "ZeroMuon on a single rank",
)
cases = []
for shapes in ([(6, 4), (4, 6), (5, 5), (1, 7), (3, 2), (8, 8)], [(4, 4)]):
    start = [torch.randn(shape, generator=g) for shape in shapes]
    gradients = draw_gradients(3, 3, start, g)
    gradients[0][1][0] = None
    for rank in range(3):
        gradients[rank][2][-1] = None
    cases.append((start, gradients, options, {2: 0.3}))
for (start, gradients, _, rates), results in zip(
    cases, run_optimizers(ZeroMuon, *cases), strict=True
):
    means = mean_gradients(gradients, start)
    compare_steps(results, muon(start, means, **options, rates=rates), "ZeroMuon on 3 ranks")
    for step in range(3):
        for i in range(len(start)):
            same_on_all([result["after"][step][i] for result in results], f"matrix {i}")
### END HIDDEN TESTS

# %% check="zero_muon" points=1
start = [torch.eye(20), torch.eye(20), torch.eye(10)]
gradients = [[[torch.eye(20), torch.eye(20), torch.eye(10)]] for _ in range(2)]
results = run_optimizer(ZeroMuon, start, gradients, {})
for rank, (result, own) in enumerate(zip(results, (500, 400), strict=True)):
    assert result["held"] <= own + 100, (
        f"rank {rank} owns matrices of {own} elements and holds {result['held']} besides"
    )
    checks.close(
        result["after"][-1][0], muon(start, gradients[0])[-1][0], what="the first matrix", rtol=2e-5
    )
### BEGIN HIDDEN TESTS
g = checks.generator(11)
shapes = [(8, 6), (30, 10), (12, 12), (9, 9), (10, 30)]
start = [torch.randn(shape, generator=g) for shape in shapes]
gradients = draw_gradients(2, 2, start, g)
results = run_optimizer(ZeroMuon, start, gradients, {})
compare_steps(results, muon(start, mean_gradients(gradients, start)), "ZeroMuon")
for rank, (result, own) in enumerate(zip(results, (300 + 144, 300 + 81 + 48), strict=True)):
    assert own <= result["held"] <= own + 100, (
        f"rank {rank} owns matrices of {own} elements, and holds {result['held']} besides"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## FSDP: nobody has the model {#fsdp}
#
# In stage 3 (PyTorch's name: **fully sharded data parallel**, FSDP) a rank has a $p$-th of each
# layer's weights and nothing else. Just before a layer runs, its weights are gathered; just after,
# they are freed. The backward pass needs them once more, since $\partial L/\partial x =
# \partial L/\partial y\; W$, so they are gathered again. The gradient $\partial L/\partial W$,
# whole on each rank for its part of the batch, goes into a reduce-scatter at once, and a rank keeps
# the shard that belongs to its weights.
#
# Here *one* layer is whole at a time, out of all of them; with prefetching, two.
#
# $$ \text{forward:}\; W=\text{gather}(w_r),\; y = xW^\top + b \qquad
# \text{backward:}\; W=\text{gather}(w_r),\; \bar x = \bar y W,\;
# \bar w_r = \tfrac1p\,\text{reduce-scatter}\bigl([\bar y^\top x,\ \textstyle\sum_i \bar y_i]\bigr)
# $$
#
# with $i$ over rows; $w_r$ is a shard of $W$ and $b$ together.
#
# Autograd must not get hold of $W$: `F.linear(x, W)` would keep it until the backward pass, and the
# memory would be that of an unsharded model. So the layer is an `autograd.Function` of its own,
# which keeps $x$ and the shard. The optimizer needs no change: it sees a parameter that happens to
# be a shard, and its moments are sharded of themselves.


# %% exercise="fully_sharded_linear" minutes=30 difficulty=3
class ShardedProduct(torch.autograd.Function):
    """y = x Wᵀ + b of gathered W and b. Yours to write as you like; only the layer is asked for."""

    @staticmethod
    def forward(ctx, x: Tensor, shard: Tensor, shape: torch.Size, has_bias: bool) -> Tensor:
        ### BEGIN SOLUTION
        ctx.save_for_backward(x, shard)
        ctx.shape, ctx.has_bias = shape, has_bias
        flat = all_gather(shard)
        bias = flat[shape.numel() :][: shape[0]] if has_bias else None
        return F.linear(x, flat[: shape.numel()].view(shape), bias)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ### BEGIN SOLUTION
        x, shard = ctx.saved_tensors
        size = ctx.shape.numel()
        dx = dy @ all_gather(shard)[:size].view(ctx.shape)
        gradient = dy.new_zeros(len(shard) * dist.get_world_size())
        dy, x = dy.reshape(-1, ctx.shape[0]), x.reshape(-1, ctx.shape[1])
        torch.mm(dy.T, x, out=gradient[:size].view(ctx.shape))
        if ctx.has_bias:
            gradient[size : size + ctx.shape[0]] = dy.sum(0)
        return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
        ### END SOLUTION


class FullyShardedLinear(nn.Module):
    """A linear layer of which each rank stores a shard.

    linear: an nn.Linear, float32, the same on all ranks, with or without bias; it is not kept.
    The rows of its weight and then its bias are one flat vector of n elements, padded with zeros to
    p·⌈n/p⌉. The only parameter is `shard`, (⌈n/p⌉,): rank r's part of it.

    forward(x), x (…, in_features), gives (…, out_features). The gradient of `shard` is the mean
    over the ranks of the gradients of their losses, and that of x is that of this rank's loss.
    Return both from `backward`; do not write to `.grad`, nor change what backward is given.
    Gathered weights are freed after the forward pass, and gathered once more in the
    backward pass: between the two nothing as large as the weight is alive, and during each no more
    than 3 tensors of the padded vector's size at a time.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        parts = [p for p in (linear.weight, linear.bias) if p is not None]
        self.shape, self.has_bias = linear.weight.shape, linear.bias is not None
        self.shard = nn.Parameter(own_part(flatten(parts)).clone())
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return ShardedProduct.apply(x, self.shard, self.shape, self.has_bias)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: an autograd.Function</summary>
#
# `forward(ctx, x, shard, …)` keeps tensors with `ctx.save_for_backward(x, shard)`; inside it no
# graph is made, so that gathered weights die with its local variables. `backward(ctx, dy)` returns
# one gradient for each argument of `forward`, None for those that are no tensors.
# </details>
#
# <details><summary>Hint: more than two axes</summary>
#
# The weight's gradient sums over everything but the last axis: `dy.reshape(-1, out)` and
# `x.reshape(-1, in)`, then $\bar y^\top x$.
# </details>
#
# <details><summary>Hint: four at a time</summary>
#
# `flatten([weight_gradient, bias_gradient])` makes one or two copies more. Release the gathered
# weight before the gradient is made (no name may point at it), or write the gradient into one
# vector that is already padded.
# </details>


# %%
class LiveElements(TorchDispatchMode):
    """Inside the block: elements of the tensors made there that are still alive.

    `now` and `most`, and `history` after every operation. Tensors of less than `smallest` elements
    do not count, nor do views. Where more than `most_asked` are alive, gloo's threads are given
    time to let go of what they have sent, so that only what others hold is counted.
    """

    def __init__(self, smallest: int = 1, most_asked: float = math.inf) -> None:
        super().__init__()
        self.smallest, self.most_asked, self.history = smallest, most_asked, []
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @property
    def now(self) -> int:
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        return sum(size for _, size in self.alive.values())

    def settled(self, asked: float = 0) -> int:
        """`now`, once no more than `asked` are alive, or after a second."""
        for _ in range(200):
            if self.now <= asked:
                break
            time.sleep(0.005)
        return self.now

    @property
    def most(self) -> int:
        return max(self.history, default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            size = storage.nbytes() // t.element_size()
            if storage._cdata not in known and size >= self.smallest:
                self.alive[storage._cdata] = StorageWeakRef(storage), size
        del given, args, kwargs
        self.history.append(self.settled(self.most_asked))
        if self.history[-1] > self.most_asked:
            self.most_asked = math.inf  # it has waited once, and that is enough
        return out


# %% tags=["support"]
# Support: sharded layers on one rank, and the same in one process
def watch_gradient(shard: nn.Parameter) -> list:
    """Puts 1 into .grad, as if of a pass before. The list gets what autograd hands on to it."""
    seen: list = []
    shard.register_hook(seen.append)
    shard.grad = torch.ones_like(shard)
    return seen


def gradient_from(shard: nn.Parameter, seen: list) -> Tensor | str:
    """The gradient that backward returned for a watched shard, or what is wrong with it."""
    if len(seen) != 1 or not isinstance(seen[0], Tensor):
        return "backward returns none to autograd"
    if not torch.allclose(shard.grad, 1 + seen[0], rtol=1e-6, atol=1e-6):
        return "it is not what was added to shard.grad, which held 1 before; autograd adds it"
    return seen[0]


@checks.measured
def sharded_layers(kind: Callable, layers: list[tuple], x: Tensor, cotangent: Tensor) -> dict:
    """Runs linear layers of (weight, bias) with tanh between them, on one rank's x.

    Returns the output, gradients, shards, and the elements in large tensors that were alive.
    """
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(*weight.shape[::-1], bias=bias is not None)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        modules.append(kind(linear))
    del linear
    x, given = x.clone().requires_grad_(), cotangent.clone()
    shards = [module.shard for module in modules]
    arrived = [watch_gradient(shard) for shard in shards]
    # Tensors of small layers do not count: outputs are as large as weights there.
    smallest = max(1000, min(weight.numel() for weight, _ in layers))
    padded = max(flat_of(layer, dist.get_world_size()).numel() for layer in layers)
    with LiveElements(smallest, 3 * padded) as live:
        y = x
        for i, module in enumerate(modules):
            y = module(torch.tanh(y) if i else y)
        forward, between = live.most, live.settled()
        y.backward(given)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "shards": [[p.detach().clone() for p in module.parameters()] for module in modules],
        "gradients": [gradient_from(*each) for each in zip(shards, arrived, strict=True)],
        "dy kept": torch.equal(given, cotangent),
        "held": checks.held_elements(modules),
        "forward": forward,
        "between": between,
        "most": live.most,
    }


KEPT = "backward changed the gradient that it is given in place; others may need it, too"


def flat_of(layer: tuple, ranks: int) -> Tensor:
    """A layer's weight and bias as one padded vector, in `ranks` rows."""
    flat = torch.cat([t.flatten() for t in layer if t is not None])
    return F.pad(flat, (0, -len(flat) % ranks)).view(ranks, -1)


def draw_layers(widths: list[int], g: torch.Generator, bias: bool = True) -> list[tuple]:
    return [
        (torch.randn(b, a, generator=g) / a**0.5, torch.randn(b, generator=g) if bias else None)
        for a, b in pairwise(widths)
    ]


def check_layers(kind: Callable, g: torch.Generator, *cases: tuple[list, list]) -> list[list]:
    """Cases of (layers, each rank's x), against one process in float64."""
    drawn = []
    for layers, xs in cases:
        out = layers[-1][0].shape[0]
        drawn.append((layers, xs, [torch.randn(*x.shape[:-1], out, generator=g) for x in xs]))

    def run(rank: int, case: tuple) -> dict:
        layers, xs, cotangents = case
        return sharded_layers(kind, layers, xs[rank], cotangents[rank])

    found = checks.on_ranks(len(cases[0][1]), run, drawn)
    for case, results in zip(drawn, found, strict=True):
        compare_layers(results, *case)
    return found


def compare_layers(results: list[dict], layers: list, xs: list[Tensor], cotangents: list) -> None:
    ranks = len(xs)
    wide = [
        tuple(None if t is None else t.double().requires_grad_() for t in layer) for layer in layers
    ]
    for rank, result in enumerate(results):
        x = xs[rank].double().requires_grad_()
        y = x
        for i, layer in enumerate(wide):
            y = F.linear(torch.tanh(y) if i else y, *layer)
        y.backward(cotangents[rank].double())
        checks.close(
            result["y"], y.float(), what=f"the output on rank {rank}", rtol=3e-5, atol=3e-5
        )
        assert result["dx"] is not None, f"no gradient reaches x on rank {rank}"
        assert result["dy kept"], KEPT
        checks.close(
            result["dx"],
            x.grad.float(),
            what=f"the gradient of x on rank {rank}",
            rtol=3e-5,
            atol=3e-5,
            mistakes={"dividing it by the ranks, too": x.grad.float() / ranks},
        )
    for number, (layer, (weight, bias)) in enumerate(zip(layers, wide, strict=True)):
        parts = flat_of(layer, ranks)
        due = flat_of((weight.grad, None if bias is None else bias.grad), ranks).float() / ranks
        for rank, result in enumerate(results):
            mine = result["shards"][number]
            assert len(mine) == 1, f"one parameter is asked for, `shard`; yours are {len(mine)}"
            checks.close(
                mine[0], parts[rank], what=f"layer {number}'s shard on rank {rank}", rtol=0
            )
            gradient = result["gradients"][number]
            where = f"the gradient of layer {number}'s shard on rank {rank}"
            assert not isinstance(gradient, str), f"{where}: {gradient}"
            checks.close(
                gradient,
                due[rank],
                what=where,
                rtol=3e-5,
                atol=3e-5,
                mistakes={"the sum over ranks": due[rank] * ranks},
            )


# %% check="fully_sharded_linear" points=3
g = checks.generator(12)
xs = [torch.randn(2, 3, generator=g) for _ in range(2)]
results = check_layers(FullyShardedLinear, g, (draw_layers([3, 4], g), xs))
### BEGIN HIDDEN TESTS
alone = check_layers(FullyShardedLinear, g, (draw_layers([3, 4], g), xs[:1]))
cases = []
for widths, shape, bias in (
    ([4, 5, 3], (2, 3), True),
    ([3, 2], (5,), False),
    ([6, 1, 6], (2, 1, 3), True),
    ([2, 1], (), True),
):
    xs = [torch.randn(*shape, widths[0], generator=g) for _ in range(3)]
    cases.append((draw_layers(widths, g, bias), xs))
uneven = [torch.randn(1 + 3 * r, 4, generator=g) for r in range(3)]
results = check_layers(FullyShardedLinear, g, *cases, (draw_layers([4, 3], g), uneven))
### END HIDDEN TESTS

# %% check="fully_sharded_linear" points=2
g = checks.generator(13)
size = 64 * 64 + 64
xs = [torch.randn(2, 64, generator=g) for _ in range(2)]
results = check_layers(FullyShardedLinear, g, (draw_layers([64] * 7, g), xs))[0]
for rank, result in enumerate(results):
    assert result["held"] <= 6 * size / 2 + 100, (
        f"between steps rank {rank} of 2 holds {result['held'] / size:.1f} layers' weights, of 6 "
        "layers; half of each is 3"
    )
    assert result["between"] < size, (
        f"after the forward pass {result['between'] / size:.1f} gathered layers are still alive: "
        "does autograd keep the weight?"
    )
### BEGIN HIDDEN TESTS
for result in results:
    assert min(result["forward"], result["most"]) >= 64 * 64, "no weight is gathered"
    assert result["forward"] <= 3 * size, (
        f"in the forward pass {result['forward'] / size:.1f} tensors of a layer's size are alive "
        "at a time; three are asked for"
    )
    assert result["most"] <= 3 * size, (
        f"in the backward pass {result['most'] / size:.1f} tensors of a layer's size are alive at "
        "a time; three are asked for"
    )
### END HIDDEN TESTS

# %% [markdown]
# ### Any module
#
# For a whole Transformer block the backward formulas cannot be written by hand. They need not be:
# run the block without a graph in the forward pass and keep only its input. In the backward pass
# gather the weights again, *run it once more*, this time with a graph, and ask autograd. That is
# activation checkpointing (lesson 18), and it comes with sharding almost by itself: both throw away
# what can be had again.
#
# `torch.func.functional_call(module, {name: tensor}, inputs)` runs a module with other tensors in
# the place of its parameters. So one skeleton of a module is enough, whose own parameters are on
# the device `meta`: a shape, and no memory.


# %% exercise="sharded_module" minutes=40 difficulty=3 path="more"
class RunTwice(torch.autograd.Function):
    """A module's output, computed anew for the backward pass. Yours to write as you like, too."""

    @staticmethod
    def forward(ctx, owner: "ShardedModule", shard: Tensor, *inputs: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        ctx.owner = owner
        ctx.save_for_backward(shard, *inputs)
        return owner.run(all_gather(shard), inputs)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        ### BEGIN SOLUTION
        shard, *inputs = ctx.saved_tensors
        flat = all_gather(shard).requires_grad_()
        needs = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with torch.enable_grad():
            y = ctx.owner.run(flat, inputs)
        asked = [flat] + [t for t in inputs if t.requires_grad]
        gradient, *rest = torch.autograd.grad(y, asked, dy, materialize_grads=True)
        del y, flat, asked
        mine = reduce_scatter(gradient) / dist.get_world_size()
        return None, mine, *[rest.pop(0) if n else None for n in needs]
        ### END SOLUTION


class ShardedModule(nn.Module):
    """Any module, of which each rank stores a shard, and whose activations are computed twice.

    module: float32 parameters, the same on all ranks, all of them trained and none used under two
    names; no buffers, no randomness. It may be taken apart. forward(*inputs) takes tensors and
    gives one tensor, as the module does. The parameters in the order of module.parameters(), each
    flattened, are one vector of n elements, padded with zeros to p·⌈n/p⌉. The only parameter is
    `shard`, (⌈n/p⌉,), rank r's part. Its gradient is the mean over ranks (zeros for a parameter
    that is not used); floating-point inputs that require gradients get their own. Return
    them from `backward`; do not write to `.grad`, nor change what backward is given.

    Between the passes nothing is kept but the inputs and the output: no gathered weights, no
    activations from inside.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.shard = nn.Parameter(own_part(flatten(module.parameters())).clone())
        self.skeleton = (module.to("meta"),)  # in a tuple: its parameters are not this module's
        ### END SOLUTION

    def run(self, flat: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The module's output with parameters that are views of `flat`."""
        ### BEGIN SOLUTION
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = flat[: sum(sizes)].split(sizes)
        views = {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        return torch.func.functional_call(self.skeleton[0], views, tuple(inputs))
        ### END SOLUTION

    def forward(self, *inputs: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return RunTwice.apply(self, self.shard, *inputs)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: nothing is differentiated a second time</summary>
#
# `backward` runs without a graph. `with torch.enable_grad():` around the second run, on *detached*
# inputs that require gradients, and then `torch.autograd.grad(y, […], dy)`.
# </details>
#
# <details><summary>Hint: one leaf instead of many</summary>
#
# Let the gathered flat vector require a gradient, and make the parameters views of it. Its gradient
# is then flat and padded already.
# </details>
#
# <details><summary>Hint: the skeleton's parameters show up</summary>
#
# `self.module = module` registers it, with all its parameters. A tuple or a list hides it:
# `self.skeleton = (module.to("meta"),)`.
# </details>


# %% tags=["support"]
# Support: a block for any purpose, and its training on one rank and in one process
class Mixer(nn.Module):
    """(batch, width) and a second input to (batch, width); `spare` is used only if `which` is 1.

    6·width·(width + 1) + 1 parameters: neither 2 nor 3 ranks divide them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.spare = nn.Parameter(torch.randn(width))
        self.gain = nn.Parameter(torch.rand(()) + 0.5)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, scale: Tensor, which: Tensor) -> Tensor:
        h = self.down(F.gelu(self.up(self.norm(x)))) * scale * self.gain
        return x + (h * self.spare if which.item() else h)


def make_mixers(seed: int, width: int, depth: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [Mixer(width) for _ in range(depth)]


@checks.measured
def sharded_training(
    kind: Callable, seed: int, width: int, depth: int, batches: list[tuple], smallest: int
) -> dict:
    """Some steps of SGD on one rank, each with its (x, scale, which)."""
    modules = [kind(mixer) for mixer in make_mixers(seed, width, depth)]
    parameters = [p for module in modules for p in module.parameters()]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    outputs, gradients, kept = [], [], True
    for x, scale, which in batches:
        x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
        arrived = [watch_gradient(p) for p in parameters]
        with LiveElements(smallest) as live:
            y = x
            for module in modules:
                y = module(y, scale, which)
            between = live.settled()
            dy = 2 * y.detach()  # as of y.square().sum()
            y.backward(dy)
        kept = kept and torch.equal(dy, 2 * y.detach())
        outputs.append((y.detach(), x.grad, scale.grad))
        gradients.append([gradient_from(*each) for each in zip(parameters, arrived, strict=True)])
        for p in parameters:
            p.grad.sub_(1)
        optimizer.step()
    return {
        "start": start,
        "after": [p.detach() for p in parameters],
        "outputs": outputs,
        "gradients": gradients,
        "dy kept": kept,
        "between": between,
        "most": live.most,
        "held": checks.held_elements(modules),
    }


def check_training(kind: Callable, *cases: tuple[int, int, int, list[list]]) -> list[list]:
    """Cases of (seed, width, depth, batches[rank][step])."""

    def run(rank: int, case: tuple) -> dict:
        seed, width, depth, batches = case
        return sharded_training(
            kind, seed, width, depth, batches[rank], max(1000, 3 * width * width)
        )

    found = checks.on_ranks(len(cases[0][3]), run, cases)
    for case, results in zip(cases, found, strict=True):
        compare_training(results, *case)
    return found


def compare_training(results: list, seed: int, width: int, depth: int, batches: list) -> None:
    ranks = len(batches)
    modules = make_mixers(seed, width, depth)

    def in_rows(tensors: Iterable[Tensor]) -> Tensor:
        flat = torch.cat([t.detach().flatten() for t in tensors])
        return F.pad(flat, (0, -len(flat) % ranks)).view(ranks, -1)

    assert all(result["dy kept"] for result in results), KEPT
    for number, module in enumerate(modules):
        for rank, rows in enumerate(in_rows(module.parameters())):
            assert len(results[rank]["start"]) == depth, (
                "one parameter a module is asked for, `shard`"
            )
            checks.close(
                results[rank]["start"][number], rows, what=f"the shard of rank {rank}", rtol=0
            )
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.01, momentum=0.9)
    for step in range(len(batches[0])):
        optimizer.zero_grad()
        for rank in range(ranks):
            x, scale, which = batches[rank][step]
            x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
            y = x
            for module in modules:
                y = module(y, scale, which)
            (y.square().sum() / ranks).backward()
            got = results[rank]["outputs"][step]
            due = (y.detach(), x.grad * ranks, scale.grad * ranks)
            for what, one, other in zip(
                ("output", "gradient of x", "gradient of scale"), got, due, strict=True
            ):
                assert one is not None, f"no {what} on rank {rank}"
                checks.close(one, other, what=f"the {what} on rank {rank}, step {step}", rtol=2e-4)
        for number, module in enumerate(modules):
            rows = in_rows(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
            )
            for rank in range(ranks):
                gradient = results[rank]["gradients"][step][number]
                where = f"the gradient of module {number}'s shard on rank {rank}, step {step}"
                assert not isinstance(gradient, str), f"{where}: {gradient}"
                checks.close(
                    gradient,
                    rows[rank],
                    what=where,
                    rtol=2e-4,
                    mistakes={"the sum over ranks": rows[rank] * ranks},
                )
        optimizer.step()


def draw_batches(
    ranks: int, steps: int, rows: int, width: int, g: torch.Generator, ways=(1,)
) -> list:
    return [
        [
            (
                torch.randn(rows, width, generator=g),
                torch.rand(width, generator=g) + 0.5,
                torch.tensor(ways[(rank + step) % len(ways)]),
            )
            for step in range(steps)
        ]
        for rank in range(ranks)
    ]


# %% check="sharded_module" points=3
g = checks.generator(14)
results = check_training(ShardedModule, (1, 3, 1, draw_batches(2, 1, 2, 3, g)))
### BEGIN HIDDEN TESTS
alone = check_training(ShardedModule, (4, 2, 1, draw_batches(1, 1, 2, 2, g)))
results = check_training(
    ShardedModule,
    (2, 4, 2, draw_batches(3, 3, 2, 4, g, ways=(1, 0))),
    (3, 2, 1, draw_batches(3, 1, 1, 2, g, ways=(0,))),
)
### END HIDDEN TESTS

# %% check="sharded_module" points=2
g = checks.generator(15)
one = sum(p.numel() for p in Mixer(24).parameters())
results = check_training(ShardedModule, (5, 24, 5, draw_batches(2, 1, 30, 24, g)))[0]
for rank, result in enumerate(results):
    assert result["held"] <= 5 * one / 2 + 100, (
        f"between steps rank {rank} of 2 holds {result['held'] / one:.1f} modules' parameters, of "
        "5; half of each is 2.5"
    )
    assert result["between"] < 3 * 24 * 24, (
        f"after the forward pass {result['between']} elements in large tensors are alive: weights "
        "or activations that could be had again"
    )
### BEGIN HIDDEN TESTS
for rank, result in enumerate(results):
    limit = 6 * one + 8 * 30 * 72
    assert one / 2 < result["most"] <= limit, (
        f"at most {result['most']} elements are alive on rank {rank}; a module has {one} parameters"
    )
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: elements alive during a forward and a backward pass
def memory_trace(rank: int, shard: Callable | None) -> list[int]:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256) for _ in range(6)]
    if shard is not None:
        layers = [shard(layer) for layer in layers]
    with LiveElements(256 * 64) as live:
        y = torch.randn(4, 256)
        for layer in layers:
            y = torch.tanh(layer(y))
        y.square().sum().backward()
    resident = sum(p.numel() for layer in layers for p in layer.parameters())
    return [resident + now for now in live.history]


class Gathered(nn.Module):
    """Shards that are gathered in plain sight of autograd, which keeps the weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shard = nn.Parameter(
            linear.weight.detach().flatten().chunk(dist.get_world_size())[dist.get_rank()].clone()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, all_gather(self.shard).view(256, 256).requires_grad_())


traces = {
    "not sharded": launch(memory_trace, 1, None)[0],
    "sharded, autograd keeps weights": launch(memory_trace, 4, Gathered)[0],
    "FullyShardedLinear": launch(memory_trace, 4, FullyShardedLinear)[0],
}
fig, ax = plot.plt.subplots(figsize=(7.5, 3.4))
for name, trace in traces.items():
    at = [100 * i / (len(trace) - 1) for i in range(len(trace))]
    ax.step(at, [elements / 256**2 for elements in trace], label=name, where="post")
ax.set(
    xlabel="% of the operations of a forward and a backward pass",
    ylabel="elements, in layers",
    ylim=(0, 14),
)
ax.legend()
plot.caption(
    fig,
    "Weights and gradients of six layers, counted in real processes: parameters stored plus large "
    "tensors alive. Without shards: six layers, and six gradients at the end. Four ranks: a "
    "quarter of six is 1.5, and of six gradients again 1.5 at the end. On top come, for a moment, "
    "one layer's whole weights and, in the backward pass, its whole gradient; where autograd gets "
    "hold of the weights, they stay.",
)
plot.plt.show()

# %% [markdown]
# ## With a library {#libraries}
#
# PyTorch's own is `fully_shard` (FSDP2). It alters a module in place: parameters become `DTensor`s,
# shards that know the whole; hooks gather before the module runs and free afterwards. **What you
# call it on decides what is whole at a time.** Called on the model alone, it makes one group of all
# parameters, which is gathered at the beginning: all weights are whole while it runs. So it is
# called on each block first, and last on the model, which gets what is left (embedding, head).

# %%
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


# %% exercise="fsdp_wrap" minutes=8 difficulty=1 path="more"
def fsdp_wrap(model: nn.Module) -> nn.Module:
    """Shards a model over all ranks with PyTorch's FSDP2, and returns it.

    model: has `blocks`, an nn.ModuleList. Each block is a group of its own (its parameters are
    gathered and freed together), and everything else in the model is one more. The mesh has one
    axis, on the CPU: init_device_mesh("cpu", (ranks,)).
    """
    ### BEGIN SOLUTION
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order</summary>
#
# `fully_shard(module, mesh=mesh)` takes what inside the module is not sharded yet: blocks first.
# </details>


# %% tags=["support"]
# Support: a small model, sharded by PyTorch
def small_model(depth: int) -> nn.Module:
    torch.manual_seed(3)
    return toys.ByteModel(8, [toys.Block(8, toys.Attention(8, 2)) for _ in range(depth)])


@checks.measured
def fsdp_training(wrap: Callable, depth: int, batches: list[Tensor]) -> dict:
    model = wrap(small_model(depth))
    groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    parts = {
        name: type(p) is DTensor and p.to_local().numel() for name, p in model.named_parameters()
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for windows in batches:
        optimizer.zero_grad()
        toys.next_byte_loss(model, windows).backward()
        optimizer.step()
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }
    together = {}  # for each group, what is whole while it is gathered
    for name in groups:
        group = model.get_submodule(name)
        group.unshard()
        together[name] = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        group.reshard()
    return {"groups": groups, "together": together, "parts": parts, "whole": whole}


# %% check="fsdp_wrap" points=1
g = checks.generator(16)
windows = torch.randint(0, 256, (2, 2, 3, 6), generator=g)  # (rank, step, batch, seq + 1)
results = launch(
    lambda rank: fsdp_training(fsdp_wrap, 2, list(windows[rank])), 2, timeout=3 * checks.PATIENCE
)
for result in results:
    assert sorted(result["groups"]) == ["", "blocks.0", "blocks.1"], (
        f"sharded are {sorted(result['groups']) or 'no modules'}; "
        "each block and the model ('') are asked for"
    )
    for name in ("blocks.0", "blocks.1"):
        others = sorted(n for n in result["together"][name] if not n.startswith(name))
        assert not others, f"gathered with {name} is {others[0]}; each block is a group of its own"
### BEGIN HIDDEN TESTS
model = small_model(2)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(2):
    optimizer.zero_grad()
    toys.next_byte_loss(model, windows[:, step].flatten(0, 1)).backward()
    optimizer.step()
for name, p in model.named_parameters():
    for result in results:
        checks.close(result["whole"][name], p.detach(), what=f"{name} after two steps", rtol=1e-4)
    there = [result["parts"][name] for result in results]
    assert sum(there) == p.numel(), (
        f"the ranks hold {sum(there)} elements of {name}, of {p.numel()}"
    )
### END HIDDEN TESTS

# %% [markdown]
# **DeepSpeed**, where ZeRO comes from, is told what to do by a dictionary (or a JSON file). Its
# batch has three sizes, and they must agree, or it refuses to start:
#
# $$ \texttt{train\_batch\_size} = \texttt{train\_micro\_batch\_size\_per\_gpu} \times
# \texttt{gradient\_accumulation\_steps} \times \text{ranks}. $$


# %% exercise="deepspeed_config" minutes=8 difficulty=1 path="more"
def deepspeed_config(
    stage: int,
    micro_batch: int,
    accumulation: int,
    ranks: int,
    clip: float = 1.0,
    offload: bool = False,
) -> dict:
    """A configuration for DeepSpeed, of plain values that JSON can hold.

    It has these keys, and may have others:
      "train_batch_size", "train_micro_batch_size_per_gpu" (micro_batch) and
      "gradient_accumulation_steps" (accumulation), whole numbers that agree
      "gradient_clipping": clip
      "bf16": {"enabled": True}
      "zero_optimization": {"stage": stage}; with offload, optimizer state goes to the CPU's memory:
      "offload_optimizer": {"device": "cpu"} beside "stage", which asks for stage 1, 2 or 3; without
      offload there is no such key
    ValueError for a stage other than 0 to 3, and for offload in stage 0.
    """
    ### BEGIN SOLUTION
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage is 0, 1, 2 or 3, not {stage!r}")
    if offload and stage == 0:
        raise ValueError("in stage 0 the optimizer's state is not DeepSpeed's to move")
    zero: dict = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": micro_batch * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the global batch</summary>
#
# It counts the examples of one optimizer step, on all ranks, over all accumulated micro-batches.
# </details>

# %% check="deepspeed_config" points=1
config = deepspeed_config(2, 4, 8, 16)
checks.kind(config, dict, what="deepspeed_config(2, 4, 8, 16)")
assert config.get("train_batch_size") == 512, (
    "16 ranks with 8 micro-batches of 4 make a batch of 512; your train_batch_size is "
    f"{config.get('train_batch_size')}"
)
assert config.get("zero_optimization", {}).get("stage") == 2, "zero_optimization holds the stage"
### BEGIN HIDDEN TESTS
for stage, micro, accumulation, ranks, clip, offload in (
    (0, 1, 1, 1, 0.5, False),
    (1, 3, 5, 7, 1.0, True),
    (2, 2, 1, 6, 2.0, False),
    (3, 8, 4, 3, 0.1, True),
):
    config = deepspeed_config(stage, micro, accumulation, ranks, clip=clip, offload=offload)
    config = json.loads(json.dumps(config))
    for key, value in {
        "train_batch_size": micro * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
    }.items():
        checks.number(config.get(key), value, to=0, what=key)
    enabled = config.get("bf16", {}).get("enabled")
    assert enabled is True, f'"bf16" is {{"enabled": True}}; yours has {enabled!r}'
    zero = config["zero_optimization"]
    checks.number(zero.get("stage"), stage, to=0, what='the "stage" in "zero_optimization"')
    moved = zero.get("offload_optimizer", {}).get("device", "nowhere")
    assert moved == ("cpu" if offload else "nowhere"), (
        f"with offload={offload} the state goes to {moved!r}"
    )
    assert offload or "offload_optimizer" not in zero, "without offload there is no such key"
checks.raises(ValueError, deepspeed_config, 4, 1, 1, 1)
checks.raises(ValueError, deepspeed_config, 0, 1, 1, 1, offload=True)
### END HIDDEN TESTS

# %% [markdown]
# ## DiLoCo: talk every H steps {#diloco}
#
# In all methods above, the ranks communicate in every step. Between machines in one hall that is
# fine; between halls it is not. **DiLoCo** lets every rank train for $H$ steps on its own data with
# its own optimizer (the **inner** one), and then treats the distance traveled as a gradient:
#
# $$ \Delta = \tfrac1p\sum_r (\theta_{\text{start}} - \theta_r), \qquad
# v \leftarrow \mu v + \Delta, \qquad
# \theta_{\text{start}} \leftarrow \theta_{\text{start}} - \eta\,(\Delta + \mu v) . $$
#
# The **outer** step is SGD with Nesterov momentum; all ranks then go on from the new
# $\theta_{\text{start}}$. With $\eta = 1$ and $\mu = 0$ it is plain averaging of models. Traffic
# falls by a factor of $H$; inner optimizer state is never sent. It is *not* the law of this lesson
# any more: $p$ ranks do something else than one process would.


# %% exercise="diloco" minutes=15 difficulty=2 path="more"
class DiLoCo:
    """The outer optimizer.

    parameters: float32, contiguous, the same on all ranks when it is made: that is the first start.
    step() is called after each inner step and acts only on every `every`-th call. Then, for each
    parameter θ with its start and velocity v (zeros at the beginning):

        Δ = mean over ranks of (start − θ)
        v ← momentum·v + Δ
        start ← start − lr·(Δ + momentum·v),   θ ← start

    An `every`-th call all-reduces each element once; other calls send nothing.
    """

    def __init__(
        self, parameters: Iterable[Tensor], every: int, lr: float = 0.7, momentum: float = 0.9
    ) -> None:
        ### BEGIN SOLUTION
        self.parameters = list(parameters)
        self.every, self.lr, self.momentum, self.calls = every, lr, momentum, 0
        self.start = [p.detach().clone() for p in self.parameters]
        self.velocity = [torch.zeros_like(p) for p in self.start]
        ### END SOLUTION

    @torch.no_grad()
    def step(self) -> None:
        ### BEGIN SOLUTION
        self.calls += 1
        if self.calls % self.every:
            return
        for p, start, velocity in zip(self.parameters, self.start, self.velocity, strict=True):
            delta = start - p
            dist.all_reduce(delta)
            delta /= dist.get_world_size()
            velocity.mul_(self.momentum).add_(delta)
            start.sub_(self.lr * (delta + self.momentum * velocity))
            p.copy_(start)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the start must not move along</summary>
#
# `p.detach()` shares its memory with `p`. The start is a copy, at the beginning and after every
# outer step.
# </details>


# %% tags=["support"]
# Support: inner steps that are given, on one rank; and outer steps by PyTorch in one process
@checks.measured
def outer_steps(
    make: Callable, start: list[Tensor], moves: list[list[Tensor]], options: dict
) -> dict:
    """moves[step] is added to the parameters, then comes step(): parameters and logs."""
    parameters = [nn.Parameter(t.clone()) for t in start]
    outer = make(iter(parameters), **options)
    after, logs = [], []
    for step in moves:
        with torch.no_grad():
            for p, move in zip(parameters, step, strict=True):
                p.add_(move)
        with checks.communication() as log:
            outer.step()
        logs.append(list(log))
        after.append([p.detach().clone() for p in parameters])
    return {"after": after, "logs": logs}


def check_outer(make: Callable, *cases: tuple[list, list, dict]) -> list[list[dict]]:
    """Cases of (start, moves[rank][step], options)."""

    def run(rank: int, case: tuple) -> dict:
        start, moves, options = case
        return outer_steps(make, start, moves[rank], options)

    found = checks.on_ranks(len(cases[0][1]), run, cases)
    for (start, moves, options), results in zip(cases, found, strict=True):
        compare_outer(results, start, moves, **options)
    return found


def compare_outer(
    results: list[dict], start: list, moves: list, every: int, lr: float, momentum: float
) -> None:
    shared = [t.double().requires_grad_() for t in start]
    outer = torch.optim.SGD(shared, lr=lr, momentum=momentum, nesterov=momentum > 0)
    models = [[t.double() for t in start] for _ in moves]
    for step in range(len(moves[0])):
        for model, mine in zip(models, moves, strict=True):
            for i, move in enumerate(mine[step]):
                model[i] = model[i] + move.double()
        if (step + 1) % every == 0:
            for i, p in enumerate(shared):
                p.grad = sum(p.detach() - model[i] for model in models) / len(models)
            outer.step()
            models = [[p.detach().clone() for p in shared] for _ in models]
        for rank, result in enumerate(results):
            for i, value in enumerate(result["after"][step]):
                checks.close(
                    value,
                    models[rank][i].float(),
                    what=f"parameter {i} on rank {rank} after call {step + 1}, with every={every}",
                    rtol=2e-5,
                    atol=2e-5,
                )


# %% check="diloco" points=2
start = [torch.tensor([1.0, 2.0])]
moves = [[[torch.tensor([-1.0, 0.0])]] * 2, [[torch.tensor([0.0, -2.0])]] * 2]
results = check_outer(DiLoCo, (start, moves, {"every": 2, "lr": 1.0, "momentum": 0.0}))
### BEGIN HIDDEN TESTS
g = checks.generator(17)
start, options = [torch.randn(3, generator=g)], {"every": 2, "lr": 0.6, "momentum": 0.5}
alone = check_outer(DiLoCo, (start, draw_gradients(1, 4, start, g), options))
cases = []
for every, lr, momentum, calls in ((1, 0.7, 0.9, 4), (3, 0.5, 0.8, 10), (2, 1.3, 0.4, 5)):
    start = [torch.randn(3, 2, generator=g), torch.randn((), generator=g)]
    options = {"every": every, "lr": lr, "momentum": momentum}
    cases.append((start, draw_gradients(3, calls, start, g), options))
results = check_outer(DiLoCo, *cases)
### END HIDDEN TESTS

# %% check="diloco" points=1
start = [torch.zeros(30), torch.zeros(4, 3)]
moves = [[[torch.ones(30), torch.ones(4, 3)]] * 4] * 2
results = check_outer(DiLoCo, (start, moves, {"every": 4, "lr": 0.5, "momentum": 0.5}))[0]
for result in results:
    sent = [elements_sent(log, 2) for log in result["logs"]]
    assert sent[:3] == [0, 0, 0], f"in calls 1 to 3 of 4 a rank sends {sent[:3]} elements"
    assert 0 < sent[3] <= 42, (
        f"in call 4 a rank of 2 sends {sent[3]:g} elements; an all-reduce of 42 sends 42"
    )
### BEGIN HIDDEN TESTS
g = checks.generator(18)
start = [torch.randn(7, 9, generator=g)]
options = {"every": 3, "lr": 0.6, "momentum": 0.7}
results = check_outer(DiLoCo, (start, draw_gradients(2, 7, start, g), options))[0]
for result in results:
    for call, log in enumerate(result["logs"], 1):
        sent = elements_sent(log, 2)
        due = 0 if call % 3 else 63
        assert sent <= due + 1e-6, f"in call {call} a rank sends {sent:g} elements"
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: what does silence cost? {#experiment}
#
# Two ranks train a small model on the bytes of Python's documentation, each on windows of its own,
# with AdamW, five ways: they never talk; they average gradients in every step; DiLoCo with $H = 5$;
# with $H = 25$; and models averaged every 5 steps (DiLoCo with $\eta = 1$, $\mu = 0$). All see the
# same data and take the same number of inner steps.
#
# **Before you run it, write down** the order of the five by their loss on held-out text, and how
# far you expect $H = 25$, with a 25th of the traffic, to be from gradients in every step.

# %% tags=["experiment"]
STEPS = 100


def draw_windows(text: Tensor, steps: int, batch: int, seed: int) -> Tensor:
    """(steps, batch, 65) bytes of the text, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    return text[torch.randint(len(text) - 64, (steps, batch, 1), generator=g) + torch.arange(65)]


text = toys.documentation_bytes(held_out=False)
held_out = draw_windows(toys.documentation_bytes(held_out=True), 1, 32, seed=99)[0]


WAYS: dict[str, dict] = {
    "never": {},
    "gradients, every step": {},
    "DiLoCo, H = 5": {"every": 5},
    "DiLoCo, H = 25": {"every": 25},
    "models averaged, H = 5": {"every": 5, "lr": 1.0, "momentum": 0.0},
}


def train(rank: int, how: str, seed: int) -> dict:
    """`how` is a key of WAYS."""
    torch.manual_seed(seed)
    blocks = [toys.Block(48, toys.Attention(48, 4)) for _ in range(2)]
    model = toys.ByteModel(48, blocks, context=64)
    parallel = DataParallel(model) if how == "gradients, every step" else None
    outer = DiLoCo(model.parameters(), **WAYS[how]) if WAYS[how] else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses, sent = [], 0.0
    for step, windows in enumerate(draw_windows(text, STEPS, 8, 10 * seed + rank)):
        loss = toys.next_byte_loss(parallel or model, windows)
        optimizer.zero_grad()
        with checks.communication() as log:
            loss.backward()
            if parallel:
                parallel.finish()
            optimizer.step()
            if outer:
                outer.step()
        sent += sum(elements for name, elements in log) * 4  # bytes; 2(p − 1)/p is 1 for two ranks
        if step % 25 == 24:
            with torch.no_grad():
                losses.append(toys.next_byte_loss(model, held_out).item())
    return {"losses": losses, "MB": sent / 1e6}


runs = launch(lambda rank: {how: train(rank, how, seed=0) for how in WAYS}, 2, timeout=120)[0]
for how, run in runs.items():
    print(f"{how:24} held-out loss {run['losses'][-1]:.3f} nats a byte   sent {run['MB']:6.2f} MB")

# %% tags=["experiment", "figure"]
# Figure: held-out loss over steps, and over bytes sent
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 3.3), sharey=True)
at = [25 * (i + 1) for i in range(STEPS // 25)]
plot.curves(
    at,
    {how: run["losses"] for how, run in runs.items()},
    xlabel="inner steps",
    ylabel="held-out loss (nats a byte)",
    ax=axes[0],
)
aside = ((6, 5), (6, -11), (6, 5), (-12, -13), (6, 5))
for i, (how, run) in enumerate(runs.items()):
    end = max(run["MB"], 0.1), run["losses"][-1]
    axes[1].plot(*end, "osD^v"[i], color=plot.COLORS[i], markersize=8)
    axes[1].annotate(how, end, xytext=aside[i], textcoords="offset points", fontsize=8)
axes[1].margins(y=0.2)
axes[1].set(xscale="log", xlabel="MB sent by a rank (never: none, drawn at 0.1)", xlim=(0.06, 2000))
plot.caption(
    fig,
    "One seed. Right: the ends of the curves on the left, over what they cost on the wire.",
)
plot.plt.show()

# %% [markdown]
# What to make of it, over the seeds that were tried: gradients in every step are best or next to
# it, but at this size and after 100 steps even ranks that never talk are not far behind. DiLoCo
# with $H = 25$ lies among them for a 25th of the traffic. With $H = 5$ it is *worst*, worse than
# silence, while averaging just as often is not. The likely cause is the outer momentum: if
# successive $\Delta$ point the same way, $\mu = 0.9$ with $\eta = 0.7$ makes the twentieth step
# $6\Delta$ long, and the fourth, where $H = 25$ ends, $3\Delta$. The paper found its $\eta$ and
# $\mu$ with $H$ in the hundreds, and they belong to it.

# %% [markdown]
# ## On the hardware {#hardware}
#
# The model of [](#cost) has two numbers. The next cell measures all-reduces of many sizes between
# processes of this machine and fits $t \approx a + n/b$ (on a ring $a = 2(p-1)\alpha$ and $b =
# p\beta/(2(p-1))$), with $a$ from the smallest time and
# $b$ from the largest tensor. On a machine of several GPUs it measures the same over NCCL, with one
# process for each GPU: they can't be forked from a notebook, since a process forked from one that
# has used CUDA can't use it, so `torchrun` starts them from a file, as it does on a cluster.

# %%
SCRIPT = """
import json, os, sys, time
import torch, torch.distributed as dist

backend, *sizes = sys.argv[1:]
rank = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
wait = torch.cuda.synchronize if backend == "nccl" else lambda: None
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend)
best = []
for size in map(int, sizes):
    tensor, times = torch.zeros(size, device=device), []
    for _ in range(12):
        dist.barrier(), wait()
        begin = time.perf_counter()
        dist.all_reduce(tensor), wait()
        times.append(time.perf_counter() - begin)
    best.append(min(times))
if rank == 0:
    print(json.dumps(best))
dist.destroy_process_group()
"""


def run_script(backend: str, ranks: int, sizes: list[int]) -> list[float]:
    """Seconds of an all-reduce of each of these numbers of float32, among processes of torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measure.py"
        file.write_text(SCRIPT)
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        run += [f"--nproc-per-node={ranks}", str(file), backend, *map(str, sizes)]
        said = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout
    return json.loads(said.strip().splitlines()[-1])


# %% tags=["experiment", "figure"]
# Figure: measured all-reduces, and the model with two numbers
def measure(rank: int, sizes: list[int]) -> list[float]:
    """Seconds of an all-reduce of each of these numbers of float32: the least of several."""
    best = []
    for size in sizes:
        tensor, times = torch.zeros(size), []
        for _ in range(12):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - begin)
        best.append(min(times))
    return best


sizes = [2**k for k in range(4, 22, 2)]
measured = {f"gloo, {ranks} ranks": launch(measure, ranks, sizes)[0] for ranks in (2, 4)}
if torch.cuda.device_count() > 1:
    gpus = torch.cuda.device_count()
    measured[f"NCCL, {gpus} GPUs"] = run_script("nccl", gpus, sizes)
fig, ax = plot.plt.subplots(figsize=(6.5, 3.5))
for i, (name, times) in enumerate(measured.items()):
    fixed = min(times)
    rate = 4 * sizes[-1] / max(times[-1] - fixed, 1e-9)
    at, color = [4 * n for n in sizes], plot.COLORS[i]
    ax.plot(at, [1e3 * t for t in times], "osD"[i], color=color, label=name)
    ax.plot(at, [1e3 * (fixed + n / rate) for n in at], "-", linewidth=1, color=color)
    print(f"{name}: a = {1e6 * fixed:.0f} µs, b = {rate / 1e9:.2f} GB/s")
ax.set(xscale="log", yscale="log", xlabel="bytes", ylabel="milliseconds")
ax.set_title("all-reduce on this machine")
ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
plot.caption(
    fig,
    "Dots: measured. Lines: a + n/b through the smallest time and the largest tensor. On the left "
    "the size does not matter: that is what buckets are for. gloo's ranks share this machine's "
    "memory and cores, so more of them are slower here than the ring's formula says.",
)
plot.plt.show()

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number or a choice are graded, one by one.


# %% exercise="questions" minutes=10 difficulty=1 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers, numbers to 1 percent.

    "ring":   8 ranks all-reduce gradients of 14 GB on a ring. How many GB does each rank send?
    "stage":  a model of 30 billion parameters, Adam in mixed precision (16 bytes a parameter), 16
              GPUs of 80 GB (10⁹ bytes). The lowest ZeRO stage whose weights, gradients and state
              fit, leaving activations aside: 0, 1, 2 or 3.
    "tokens": rank 0 has 300 labels with a mean loss of 2.0, rank 1 has 100 with a mean of 4.0.
              Averaging the gradients of these means minimizes the mean of the two means. By how
              much is its value larger than the global token mean (the difference)?
    "fsdp":   how many times as many bytes does FSDP (stage 3) send as data parallel training, per
              step, if weights are gathered for the forward and again for the backward pass?
    "hang":   a rank skips a branch of the model in one batch, and the job hangs. Why?
              "a"  its gradients are NaN, and gloo waits for finite numbers
              "b"  the others wait in an all-reduce for a bucket that this rank never starts
              "c"  its parameters are no longer those of the others, which the next step notices
              "d"  it is ahead of the others, and its messages are lost
    """
    ### BEGIN SOLUTION
    return {
        "ring": 2 * 7 / 8 * 14,
        "stage": 3,  # 142.5, then 86.25, then 30 GB
        "tokens": (2.0 + 4.0) / 2 - (300 * 2.0 + 100 * 4.0) / 400,
        "fsdp": 1.5,
        "hang": "b",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["ring"]
checks.kind(answer, float, what="ring")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    24.5,
    what="ring",
    hint="Two halves, each of seven steps with an eighth",
    mistakes={"one half of the ring": 12.25, "twice the tensor": 28.0, "seven times all": 98.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["stage"]
checks.kind(answer, int, what="stage")
### BEGIN HIDDEN TESTS
assert answer == 3, "Compute 4 + 12/16 and 2 + 14/16 bytes for each of 30 billion parameters."
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["tokens"]
checks.kind(answer, float, what="tokens")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.5,
    what="tokens",
    hint="What is the mean of the two means, and what is the mean over 400 labels?",
    mistakes={
        "the mean of means itself": 3.0,
        "the global mean itself": 2.5,
        "the wrong sign": -0.5,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["fsdp"]
checks.kind(answer, float, what="fsdp")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.5,
    what="fsdp",
    hint="An all-gather and a reduce-scatter are each half of an all-reduce; count them",
    mistakes={"three times": 3.0, "one gather": 1.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["hang"]
assert answer in ("a", "b", "c", "d"), f"hang is one of 'a', 'b', 'c', 'd'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "b", "Who calls which collective? A collective ends when all ranks have called it."
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** With 1,024 GPUs and a global batch that must not grow, data parallelism alone
# gets worse and worse. Why, and what else is there?

# %% [markdown] answer="limits"
# With a fixed batch each rank's share of tokens shrinks with the ranks, and with it the computation
# that communication can hide behind; the bytes on the wire stay $2n$ a step. At some point the step
# is as long as the all-reduce (and with thousands of ring steps, as its latency), and one example a
# rank is the end anyway. One can cut the model instead of the batch (tensor, pipeline, sequence
# parallel, lesson 20), shard inside a machine and replicate between them (hybrid sharding), send
# fewer bytes (half-precision gradients), or send less often (DiLoCo). The batch itself may grow up
# to the critical batch size (lesson 17), not beyond.

# %% [markdown]
# **Open question 2.** In a sharded run somebody clips gradients by their norm, by calling the usual
# function on each rank's own gradients. What goes wrong, and what is right?

# %% [markdown] answer="clipping"
# Each rank sees the norm of its own shard, a part of the whole, and the parts differ: ranks clip by
# different factors, and together the update no longer points along the gradient; most steps are
# clipped too little. Right: square sums are added over all ranks (an all-reduce of one number), the
# root is the global norm, and all multiply by the same factor. The same holds for any statistic of
# a whole: norms for logging, a check for infinities in loss scaling, the norm in Muon.

# %% [markdown]
# **Open question 3.** A run of 512 GPUs differs in the third digit of the loss from the same run on
# 256 with the same global batch. Is something broken?

# %% [markdown] answer="same-law"
# Not necessarily. Sums over ranks are rounded in another order, in bfloat16 visibly, and training
# amplifies it: after some hundred steps two runs are different samples of the same process. But the
# *first* step must agree to rounding. So compare the gradient of one step, in float32: if it
# differs by a factor, look for means of means, for data that two ranks share, for dropout with the
# same seed everywhere. Then look at the loss again.

# %% [markdown]
# ## References, and what to read in them
#
# - **Patarasuk and Yuan 2009**, *Bandwidth Optimal All-reduce Algorithms for Clusters of
#   Workstations*, Journal of Parallel and Distributed Computing 69. The ring, and why no algorithm
#   sends less.
# - **Li et al. 2020**, *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*,
#   arXiv:2006.15704. Section 3.2: buckets, their order, unused parameters.
# - **Rajbhandari et al. 2019**, *ZeRO: Memory Optimizations Toward Training Trillion Parameter
#   Models*, arXiv:1910.02054. Figure 1 is your `zero_memory`; section 7 counts the communication.
# - **Zhao et al. 2023**, *PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel*,
#   arXiv:2304.11277. Section 3: flat parameters, what is gathered when, and prefetching.
# - **Liu et al. 2025**, *Muon is Scalable for LLM Training*, arXiv:2502.16982. Section 2.3: another
#   way to distribute Muon: gather each matrix, keep your shard.
# - **Douillard et al. 2023**, *DiLoCo: Distributed Low-Communication Training of Language Models*,
#   arXiv:2311.08105. Algorithm 1; the outer optimizers that were tried.
#
# In production: PyTorch's `torch/nn/parallel/distributed.py` and
# `torch/csrc/distributed/c10d/reducer.cpp` (buckets), `torch/distributed/optim/` (ZeRO-1),
# `torch/distributed/fsdp/_fully_shard/` (FSDP2); DeepSpeed's `deepspeed/runtime/zero/`; NCCL for
# rings and trees on GPUs. Cutting the computation itself is lesson 20; FP8 and loss scaling are
# lesson 18.
