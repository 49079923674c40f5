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
#       Attention whose memory has one size at any length: three orders of multiplication, decay,
#       the delta rule, the chunked forms that train it, and its kernel in Triton.
#     gpu: "Your chunk kernel beside FlashAttention, by length, with the crossover drawn."
# ---

# %% [markdown]
# ## The problem: a memory that grows with every token
#
# A decoder with softmax attention keeps the key and the value of every token it has read. Token
# 100,000 reads 100,000 keys. The cache fills the GPU's memory (lesson 28), and training costs a
# square: every query meets every key.
#
# A recurrent network has neither problem. Its state has one size; a token reads it, changes it, and
# is gone. What it lacked was a way to train in parallel, and a memory worth the name.
#
# **Linear attention** is both at once. Written one way it is attention, one matrix product for the
# whole sequence. Written another way it is a recurrent network whose state is a *matrix*. The two
# ways give the same numbers, since they are one product with its brackets moved.
#
# The price: $d_k \times d_v$ numbers cannot hold everything. This lesson is about what to write
# into them, what to erase, and how to compute it fast.

# %% [markdown]
# ## Core ideas
#
# - Three orders of one product: `linear_attention_parallel` (all pairs of tokens), `_recurrent`
#   (one state, token by token) and `_chunked` (pairs inside a chunk, a state between chunks).
# - **Decay**: the state fades a little with each token, so that old entries make room. By a fixed
#   number for each head (RetNet), or by numbers that the token chooses (GLA, Mamba-2).
# - **Delta rule**: before a value is written, what the state already says under this key is
#   erased (DeltaNet). Writing becomes *replacing*.
# - Both together: **Gated DeltaNet** (Qwen3-Next) and **Kimi Delta Attention**, KDA (Kimi Linear).
#
# | symbol | in code | is |
# |---|---|---|
# | $q_t, k_t$ | `q`, `k` | query and key of token $t$: $d_k$ numbers |
# | $v_t$ | `v` | its value: $d_v$ numbers |
# | $S_t$ | `state` | the memory after token $t$: $d_k \times d_v$ |
# | $\ln \alpha_t$ | `log_decay` | what is left of the memory, as a logarithm, at most 0: one number a head, or $d_k$ |
# | $\beta_t$ | `beta` | how much of the old entry is replaced, from 0 to 1 |
# | $C$ | `chunk` | tokens in a chunk |
#
# `q` and `k` are `(batch, heads, seq, d_k)`, `v` and the output `(batch, heads, seq, d_v)`, states
# `(batch, heads, d_k, d_v)`. Decays and β have a number for each token, `(batch, heads, seq, 1)`;
# decays of each channel are `(batch, heads, seq, d_k)`.
#
# *No function here scales by $1/\sqrt{d_k}$ or normalizes a key.* Libraries do both inside;
# here the caller does, where it matters.

# %%
import math
import time

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile, tl, triton
from llm40.kernels import autotuned
from llm40.models.llama import angles, rotate
from torch import Tensor, nn

plt = plot.plt

# %% [markdown]
# Sums over many tokens need more than half precision. Every function below computes in float32 (in
# float64 for float64 inputs), returns its output in the dtype of `v`, and its state in the format
# in which it was computed. Inputs may differ in format, but float64 comes for all or for none. They
# are not changed, and all their numbers and all products $q_t\cdot k_j$ are finite in that format.
# Three helpers do the bookkeeping, and one draws tokens to try things on.


# %%
def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the format of sums: float32, or float64 where they are float64."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def chunks(size: int, *tensors: Tensor):
    """Slices of `size` tokens of tensors (batch, heads, seq, …), together; the last may be short.

    for q_c, k_c in chunks(64, q, k): …
    """
    return zip(*(t.split(size, dim=2) for t in tensors), strict=True)


def empty_state(k: Tensor, v: Tensor) -> Tensor:
    """Zeros, (batch, heads, d_k, d_v), in the format of k."""
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def drawn(generator, batch, heads, seq, d_k, d_v, dtype=torch.float32):
    """q, k, v at random, k of length 1, none of them contiguous in memory."""
    shapes = ((batch, seq, heads, n) for n in (d_k, d_k, d_v))
    q, k, v = (checks.randn(*shape, generator=generator).transpose(1, 2) for shape in shapes)
    return q.to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype)


# %% tags=["support"]
# Support: what each token wrote, through all later tokens, in float64
def unrolled(q, k, v, log_decay=None, beta=None, state=None):
    """(o, last state) by the definition, in float64, each write followed on its own.

    A later token multiplies what was written by its matrix (I − β k kᵀ) Diag(α). What arrives at
    token t is the sum, over all tokens up to t, of a product of matrices and a write.
    """
    q, k, v = q.double(), k.double(), v.double()
    one = torch.eye(k.shape[-1], dtype=torch.float64, device=k.device)
    matrices = one.expand(*k.shape, -1)
    if log_decay is not None:
        matrices = matrices * log_decay.double().exp()[..., None, :]
    if beta is not None:
        outer = torch.einsum("bhti,bhtj->bhtij", beta.double() * k, k)
        matrices, v = (one - outer) @ matrices, beta.double() * v
    writes = torch.einsum("bhti,bhtj->bhtij", k, v)
    outputs, total = [], writes[:, :, 0]
    for t in range(k.shape[2]):
        way, total = one.expand(*k.shape[:2], -1, -1), torch.zeros_like(writes[:, :, 0])
        for j in range(t, -1, -1):
            total = total + way @ writes[:, :, j]
            way = way @ matrices[:, :, j]
        if state is not None:
            total = total + way @ state.double()
        outputs.append((q[:, :, t, None] @ total)[:, :, 0])
    return torch.stack(outputs, dim=2), total


def mixed_formats(function, exact, q, k, v, *more):
    """o has v's dtype where q and k have another; nothing else is rounded to it, so the state is
    exact."""
    for keys, values in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        given = (q.to(keys), k.to(keys), v.to(values), *more)
        what = f"for q and k in {keys}, v in {values}"
        o, state = checks.parts(function(*given), "o", "state")
        due, last = exact(*given)
        checks.close(o, due.to(values), dtype=values, what=f"o {what}")
        checks.close(state, last.float(), what=f"the state {what}")


def rounded_once(function):
    """o where later tokens take back what earlier ones wrote: one key, so o is a sum of values."""
    one = torch.tensor([1.0, 0.0, 0.0], device=profile.device).expand(1, 1, 150, 3)
    first = (2 + 2 * torch.rand(1, 1, 75, 2, generator=checks.generator(26))).to(profile.device)
    v = torch.cat([first, -first.flip(2)], 2).bfloat16()  # sums of up to 300, exact in float32
    found = function(one.bfloat16(), one.bfloat16(), v)[:, :, :-1]
    due = v.double().cumsum(2)[:, :, :-1].bfloat16()
    hint = "Nothing is rounded before all is added."
    what = "o of values that cancel, in bfloat16"
    checks.close(found, due, what=what, hint=hint, rtol=0.01, atol=0)


def large_later(function, exact, q, k, v):
    """Tokens before others whose values are ten million times as large."""
    v = torch.cat([v[:, :, :7], 1e7 * v[:, :, 7:]], 2)
    hint = "A later token must not be added, not even to be taken away again."
    what = "o of 7 tokens before very large ones"
    o, due = function(q, k, v)[:, :, :7], exact(q, k, v)[:, :, :7]
    checks.close(o, due.float(), what=what, hint=hint)


# %% [markdown]
# ## One product, three orders
#
# Softmax attention weighs the value of token $j$ by $e^{q_t\cdot k_j}$ and divides by the sum of
# the weights. Leave out the exponential, and for now the division:
#
# $$o_t = \sum_{j \le t} (q_t\cdot k_j)\, v_j, \qquad O = \big(QK^\top \circ M\big)\,V,$$
#
# with $M$ the causal mask of ones and zeros. This is the **parallel form**: a matrix of all pairs,
# $(n, n)$ for $n$ tokens, as in attention, and $2n^2(d_k + d_v)$ FLOPs.
#
# The exponential stood between $QK^\top$ and $V$ and fixed the order. Now nothing stands between
# them but the mask, which zeroes pairs.
#
# ### Exercise · All pairs at once


# %% exercise="linear_attention_parallel" minutes=4 difficulty=1
def linear_attention_parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention from the matrix of all pairs: o_t = Σ_{j ≤ t} (q_t·k_j) v_j.

    q, k: (batch, heads, seq, d_k); v: (batch, heads, seq, d_v), floating formats that may differ
    (float64: all or none), seq ≥ 1. No softmax, no scale, no division. Computed in float32 or finer
    (float64 for float64 inputs), where all q_t·k_j are finite, and rounded once. Returns (batch,
    heads, seq, d_v) in v's dtype. Inputs are not changed; gradients flow.
    """
    ### BEGIN SOLUTION
    dtype = v.dtype
    q, k, v = wide(q, k, v)
    return ((q @ k.mT).tril() @ v).to(dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the mask</summary>
#
# A pair with $j > t$ counts 0, not −∞: there is no softmax. `tril` of a batch of matrices acts on
# the last two axes.
# </details>

# %% check="linear_attention_parallel" points=1
q = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
k = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
v = torch.tensor([[[[1.0], [10.0]]]])
checks.close(
    linear_attention_parallel(q, k, v),
    torch.tensor([[[[1.0], [51.0]]]]),
    what="o of two tokens (1·1, then 1·1 + 5·10)",
    mistakes={
        "no causal mask": torch.tensor([[[[31.0], [51.0]]]]),
        "a token that doesn't see itself": torch.tensor([[[[0.0], [1.0]]]]),
        "the scale 1/√d_k": torch.tensor([[[[1.0], [51.0]]]]) / math.sqrt(2),
        "a softmax": F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0),
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(1)
for shape in [(2, 3, 17, 5, 4), (1, 2, 1, 3, 7), (3, 1, 30, 1, 1), (2, 2, 9, 8, 8)]:
    q, k, v = drawn(gen, *shape)
    k = 1.3 * k  # keys of any length
    with checks.unchanged(q=q, k=k, v=v), checks.forbidden("softmax"):
        o = linear_attention_parallel(q, k, v)
    checks.close(o, unrolled(q, k, v)[0].float(), what="o", hint=f"Shape {shape}.")
q, k, v = drawn(gen, 2, 2, 11, 6, 5)
checks.keeps_dtype(
    linear_attention_parallel, q, k, v, reference=lambda *t: unrolled(*t)[0], what="o"
)
for keys, values in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
    given = (q.to(keys), k.to(keys), v.to(values))
    what = f"o for q and k in {keys}, v in {values}"
    due = unrolled(*given)[0].to(values)
    checks.close(linear_attention_parallel(*given), due, dtype=values, what=what)
large_later(linear_attention_parallel, lambda *t: unrolled(*t)[0], q, k, v)
rounded_once(linear_attention_parallel)
checks.gradients(linear_attention_parallel, lambda *t: unrolled(*t)[0], q, k, v, names="qkv")
# Scores beyond float16's largest number, 65,504; the output is within.
large = torch.full((1, 1, 3, 2), 300.0, dtype=torch.float16, device=profile.device)
values = torch.full((1, 1, 3, 1), 0.01, dtype=torch.float16, device=profile.device)
checks.close(
    linear_attention_parallel(large, large, values),
    unrolled(large, large, values)[0].half(),
    what="o where scores overflow half precision",
    hint="Widen the inputs first, round the output last.",
)
### END HIDDEN TESTS

# %% [markdown]
# ### The same, token by token
#
# Write the dot product as a matrix product, $q_t\cdot k_j = q_t^\top k_j$, and move the brackets:
#
# $$o_t^\top = \sum_{j\le t} (q_t^\top k_j)\,v_j^\top = q_t^\top S_t, \qquad S_t = \sum_{j\le t} k_j v_j^\top = S_{t-1} + k_t v_t^\top .$$
#
# The sum does not depend on the query, so it can be kept: $S_t$ is a $d_k\times d_v$ matrix, and
# the past is nothing else. This is the **recurrent form**. A token costs $4 d_k d_v$ FLOPs, after
# ten tokens or after a million.
#
# Read $S$ as a memory. Writing adds the outer product of a key and a value. Reading with a query
# that equals a key returns that key's value, plus the others' values, each weighted by how much its
# key looks like the query.
#
# ### Exercise · One state


# %% exercise="linear_attention_recurrent" minutes=7 difficulty=1
def linear_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with one state, one token after the other.

    q, k: (batch, heads, seq, d_k); v: (batch, heads, seq, d_v), floating formats that may differ
        (float64: all or none), seq ≥ 1.
    state: (batch, heads, d_k, d_v), what earlier tokens left, in float32 (float64 for float64
        inputs); None: nothing. No input is changed.

    Returns (o, state): o (batch, heads, seq, d_v) in v's dtype, rounded once, where token t reads
    the state that holds its own write; and the state after the last token, float32 (float64 for
    float64 inputs). No tensor of more elements than the largest of the inputs, o and the state.
    """
    ### BEGIN SOLUTION
    dtype = v.dtype
    q, k, v = wide(q, k, v)
    state = empty_state(k, v) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(q[:, :, t, None, :] @ state)
    return torch.cat(outputs, dim=2).to(dtype), state
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: an outer product of a batch</summary>
#
# `k[:, :, t, :, None]` is (batch, heads, d_k, 1) and `v[:, :, t, None, :]` is (batch, heads, 1,
# d_v). Their product broadcasts to (batch, heads, d_k, d_v).
# </details>
#
# <details><summary>Hint: the caller's state</summary>
#
# `state += …` would write into the tensor that the caller still holds.
# </details>

# %% check="linear_attention_recurrent" points=1
q = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
k = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
v = torch.tensor([[[[1.0], [10.0]]]])
o, state = checks.parts(linear_attention_recurrent(q, k, v), "o", "state")
checks.close(
    o,
    torch.tensor([[[[1.0], [51.0]]]]),
    what="o of two tokens",
    mistakes={"reading before the token has written": torch.tensor([[[[0.0], [1.0]]]])},
)
checks.close(state, torch.tensor([[[[31.0], [20.0]]]]), what="the state, 1·(1, 0) + 10·(3, 2)")
### BEGIN HIDDEN TESTS
gen = checks.generator(2)
for shape in [(2, 3, 17, 5, 4), (1, 2, 1, 3, 7), (3, 1, 12, 1, 2)]:
    q, k, v = drawn(gen, *shape)
    k = 1.3 * k  # keys of any length
    before = checks.randn(*shape[:2], *shape[3:], generator=gen)
    for start in (None, before):
        with checks.unchanged(q=q, k=k, v=v, state=before):
            o, state = linear_attention_recurrent(q, k, v, start)
        exact, last = unrolled(q, k, v, state=start)
        hint = f"Shape {shape}, {'no state' if start is None else 'a state'} given."
        checks.close(o, exact.float(), what="o", hint=hint)
        checks.close(state, last.float(), what="the state", hint=hint)
# In two parts, the second with the first one's state: as if in one.
q, k, v = drawn(gen, 2, 2, 20, 6, 5)
whole, last = linear_attention_recurrent(q, k, v)
first, state = linear_attention_recurrent(q[:, :, :13], k[:, :, :13], v[:, :, :13])
second, state = linear_attention_recurrent(q[:, :, 13:], k[:, :, 13:], v[:, :, 13:], state)
checks.close(torch.cat([first, second], 2), whole, what="o in two parts")
checks.close(state, last, what="the state in two parts")
checks.keeps_dtype(
    lambda *t: linear_attention_recurrent(*t)[0],
    q, k, v, reference=lambda *t: unrolled(*t)[0], what="o",
)  # fmt: skip
for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
    given = [t.to(dtype) for t in (q, k, v)]
    start = checks.randn(2, 2, 6, 5, generator=gen, dtype=kept)
    for begin in (None, start):
        state = linear_attention_recurrent(*given, begin)[1]
        exact = unrolled(*given, state=begin)[1].to(kept)
        checks.close(state, exact, dtype=kept, what=f"the state of {dtype} inputs")
mixed_formats(linear_attention_recurrent, unrolled, q, k, v)
rounded_once(lambda *t: linear_attention_recurrent(*t)[0])
checks.gradients(
    lambda q, k, v, s: linear_attention_recurrent(q, k, v, s)[0],
    lambda q, k, v, s: unrolled(q, k, v, state=s)[0],
    q, k, v, checks.randn(2, 2, 6, 5, generator=gen), names=("q", "k", "v", "state"),
)  # fmt: skip
### END HIDDEN TESTS

# %% check="linear_attention_recurrent" points=1
gen = checks.generator(3)
q, k, v = drawn(gen, 1, 2, 64, 4, 4)
with checks.allocations() as made:
    o, state = linear_attention_recurrent(q, k, v)
checks.close(o, linear_attention_recurrent(q.double(), k.double(), v.double())[0].float())
assert made.largest <= 2 * 64 * 4, (
    f"one of your tensors has {made.largest} elements; q has 512, a state 32, all pairs 8192, the "
    f"states of all tokens 2048"
)
### BEGIN HIDDEN TESTS
q, k, v = drawn(gen, 2, 1, 100, 3, 3)
with checks.allocations() as made:
    o, state = linear_attention_recurrent(q, k, v)
exact, last = unrolled(q, k, v)
checks.close(o, exact.float(), what="o of 100 tokens")
checks.close(state, last.float(), what="the state after 100 tokens")
assert made.largest <= 2 * 100 * 3, f"one of your tensors has {made.largest} elements; q has 600"
# Few tokens, a large state: not even some of the states at once.
q, k, v = drawn(gen, 1, 2, 9, 16, 16)
with checks.allocations() as made:
    linear_attention_recurrent(q, k, v)
assert made.largest <= 2 * 16 * 16, (
    f"one of your tensors has {made.largest} elements; q has 288, a state 512"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Chunks
#
# Neither form trains well. The parallel one costs a square. The recurrent one makes $n$ small steps
# one after another, each too small for a tensor core, and its state travels to memory and back at
# every step.
#
# The **chunked form** cuts the sequence into chunks of $C$ tokens and uses each form where it is
# good. $S$ is now the state *before* the chunk, and $Q, K, V$ are the chunk's rows:
#
# $$O = \underbrace{Q S}_{\text{earlier chunks}} + \underbrace{(QK^\top\circ M)\,V}_{\text{inside}},
# \qquad S \leftarrow S + K^\top V .$$
#
# All are products of matrices. The steps one after another are $n/C$; the FLOPs are
# $2n(C\,d_k + C\,d_v + 2d_k d_v)$, linear in the length. $C = 1$ is the recurrent form, $C = n$
# the parallel one.
#
# ### Exercise · Pairs inside, a state between


# %% exercise="linear_attention_chunked" minutes=15 difficulty=2
def linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal linear attention, `chunk` tokens at a time.

    Arguments and results as in `linear_attention_recurrent`. chunk ≥ 1; the last chunk may be
    shorter, and one chunk may hold the whole sequence. Up to rounding, results do not depend on it.

    Work is counted, for n chunks: at most 25·n + 25 operations of PyTorch that make a tensor, and
    no tensor of more elements than the largest of these: an input, n + 1 states, the pairs of
    tokens inside all chunks. A short last chunk may be padded: it counts as a full one.
    """
    ### BEGIN SOLUTION
    dtype = v.dtype
    q, k, v = wide(q, k, v)
    state = empty_state(k, v) if state is None else state
    outputs = []
    for q_c, k_c, v_c in chunks(chunk, q, k, v):
        outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
        state = state + k_c.mT @ v_c
    return torch.cat(outputs, dim=2).to(dtype), state
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order inside the loop</summary>
#
# The chunk reads the state that earlier chunks left. Its own tokens reach it through the masked
# pairs, and only afterwards through the state.
# </details>

# %% check="linear_attention_chunked" points=1
gen = checks.generator(4)
q, k, v = drawn(gen, 1, 1, 5, 2, 1)
o, state = checks.parts(linear_attention_chunked(q, k, v, 2), "o", "state")
pairs = q @ k.mT
same = torch.arange(5, device=q.device) // 2
checks.close(
    o,
    pairs.tril() @ v,
    what="o of 5 tokens in chunks of 2",
    mistakes={
        "dropping the state between chunks": (pairs.tril() * (same[:, None] == same)) @ v,
        "no mask inside a chunk": (pairs * (same[:, None] >= same)) @ v,
        "adding the chunk to the state before it is read": (
            (pairs * (same[:, None] >= same)) + (pairs.tril() * (same[:, None] == same))
        )
        @ v,
    },
)
checks.close(state, k.mT @ v, what="the state")
### BEGIN HIDDEN TESTS
gen = checks.generator(5)
for shape, chunk in [((2, 3, 17, 5, 4), 4), ((1, 2, 1, 3, 7), 3), ((2, 2, 12, 4, 6), 6),
                     ((2, 1, 9, 3, 3), 1), ((1, 3, 10, 2, 5), 50)]:  # fmt: skip
    q, k, v = drawn(gen, *shape)
    k = 1.3 * k  # keys of any length
    before = checks.randn(*shape[:2], *shape[3:], generator=gen)
    for start in (None, before):
        with checks.unchanged(q=q, k=k, v=v, state=before):
            o, state = linear_attention_chunked(q, k, v, chunk, start)
        exact, last = unrolled(q, k, v, state=start)
        hint = f"Shape {shape}, chunks of {chunk}, {'no' if start is None else 'a'} state given."
        checks.close(o, exact.float(), what="o", hint=hint)
        checks.close(state, last.float(), what="the state", hint=hint)
q, k, v = drawn(gen, 2, 2, 14, 6, 5)
checks.keeps_dtype(
    lambda *t: linear_attention_chunked(*t, 4)[0],
    q, k, v, reference=lambda *t: unrolled(*t)[0], what="o",
)  # fmt: skip
for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
    given = [t.to(dtype) for t in (q, k, v)]
    start = checks.randn(2, 2, 6, 5, generator=gen, dtype=kept)
    for begin in (None, start):
        state = linear_attention_chunked(*given, 5, begin)[1]
        exact = unrolled(*given, state=begin)[1].to(kept)
        checks.close(state, exact, dtype=kept, what=f"the state of {dtype} inputs")
mixed_formats(lambda *t: linear_attention_chunked(*t, 4), unrolled, q, k, v)
for chunk in (5, 14):
    given = (lambda *t, c=chunk: linear_attention_chunked(*t, c)[0], lambda *t: unrolled(*t)[0])
    large_later(*given, q, k, v)
rounded_once(lambda *t: linear_attention_chunked(*t, 100)[0])
checks.gradients(
    lambda q, k, v, s: linear_attention_chunked(q, k, v, 4, s)[0],
    lambda q, k, v, s: unrolled(q, k, v, state=s)[0],
    q, k, v, checks.randn(2, 2, 6, 5, generator=gen), names=("q", "k", "v", "state"),
)  # fmt: skip
### END HIDDEN TESTS

# %% check="linear_attention_chunked" points=1
gen = checks.generator(6)
q, k, v = drawn(gen, 1, 1, 96, 8, 8)
with checks.allocations() as made:
    o, _ = linear_attention_chunked(q, k, v, 16)
checks.relative_l2(o, linear_attention_parallel(q.double(), k.double(), v.double()), 2e-6)
operations = sum(made.shapes.values())
assert operations <= 25 * 6 + 25, f"{operations} tensors are made for 6 chunks; 175 may be"
limit = 6 * 16 * 16
assert made.largest <= limit, (
    f"one of your tensors has {made.largest} elements; the pairs of tokens inside 6 chunks are "
    f"{limit}, all pairs are {96 * 96}"
)
### BEGIN HIDDEN TESTS
q, k, v = drawn(gen, 2, 2, 64, 4, 6)
exact, last = linear_attention_parallel(q.double(), k.double(), v.double()), k.mT @ v
for chunk, n in ((8, 8), (10, 7), (32, 2)):
    with checks.allocations() as made:
        o, state = linear_attention_chunked(q, k, v, chunk)
    checks.relative_l2(o, exact, 2e-6, what=f"o in chunks of {chunk}")
    checks.close(state, last, what=f"the state, chunks of {chunk}")
    operations = sum(made.shapes.values())
    assert operations <= 25 * n + 25, f"{operations} tensors are made for {n} chunks"
    limit = 4 * max(n * chunk * chunk, n * chunk * 6, (n + 1) * 4 * 6)
    assert made.largest <= limit, f"a tensor has {made.largest} elements; {limit} are enough"
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: which chunk is best?
#
# 2,048 tokens, heads of 64, one thread. Before you run the next cell, write down: how does the time
# of `linear_attention_chunked` change as the chunk grows from 1 (the recurrent form) to 2,048 (the
# parallel one)? Where is it smallest, and is that where the FLOPs are fewest?

# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)
q, k, v = drawn(checks.generator(7), 1, 2, 2048, 64, 64)
sizes = [1, 4, 16, 32, 64, 128, 256, 512, 2048]
chunk_flops, chunk_seconds = [], []
for size in sizes:
    with checks.flops() as counted:
        linear_attention_chunked(q, k, v, size)
    chunk_flops.append(counted.total / 1e6)
    runs = []
    for _ in range(1 if size < 8 else 3):
        profile.synchronize()
        began = time.process_time()
        linear_attention_chunked(q, k, v, size)
        profile.synchronize()
        runs.append(time.process_time() - began)
    chunk_seconds.append(1e3 * min(runs))
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: FLOPs, steps and time of one function, from recurrent to parallel
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.6))
plot.curves(
    sizes,
    {
        "millions of FLOPs, counted": chunk_flops,
        "steps one after another": [2048 / size for size in sizes],
    },
    xlabel="chunk (tokens)",
    ylabel="count",
    title="work and steps",
    logx=True,
    logy=True,
    ax=axes[0],
)
axes[1].plot(sizes, chunk_seconds, marker="o", color=plot.COLORS[0])
axes[1].set_xscale("log", base=2)
axes[1].set(xlabel="chunk (tokens)", ylabel="milliseconds, 2 heads, one thread", ylim=(0, None))
axes[1].set_title("time")
plot.caption(
    fig,
    "Left end: the recurrent form, right end: the parallel form, and all points the same result. "
    "Small chunks pay for steps, large ones for pairs of tokens.",
)
plt.show()
best = sizes[min(range(len(sizes)), key=lambda i: chunk_seconds[i])]
print(f"fastest here: chunks of {best}; fewest FLOPs: chunks of 1")

# %% [markdown]
# **What came out.** The fewest FLOPs are at the left end, and the time is far from its best there:
# steps, not arithmetic, are paid for. Up to $C \approx d_k$ the pairs inside a chunk cost no more
# than the products with the state, so larger chunks are nearly free; beyond that the square begins.
# On a GPU it is the same with other constants, and chunks of 64 or 128 are usual.

# %% [markdown]
# ## What is kept: bytes of a state against bytes of a cache
#
# Decoding is limited by the bytes that each step reads (lesson 28). Per layer, a KV cache holds
# $2 H_{kv} D\, n$ numbers after $n$ tokens; a state holds $H\, d_k\, d_v$, always. The state is
# read *and written* at each token, and is usually kept in float32, since it sums over the whole
# text; the cache is kept in two bytes.
#
# So there is a length below which the cache is the smaller one. With $H$ heads of size $D$ each
# (none shared) and 2 against 4 bytes, $2HDn\cdot 2 = HD^2\cdot 4$: $n = D$ tokens. Sharing
# key–value heads moves it up. Every head has a state of its own, so grouped queries save nothing
# here.
#
# (Real layers keep a little more: the last three inputs of a short convolution over $q$, $k$ and
# $v$. It is left out.)
#
# ### Exercise · Which is smaller?


# %% exercise="state_bytes" minutes=7 difficulty=1
def state_bytes(
    layers: int,
    heads: int,
    d_k: int,
    d_v: int,
    kv_heads: int,
    head_dim: int,
    state_number: int = 4,
    cache_number: int = 2,
) -> tuple[int, int, int]:
    """Memory of one text in two models of `layers` layers: (state, token, tokens).

    state: bytes of the states of the linear one, whose layers have `heads` states of (d_k, d_v)
        numbers of `state_number` bytes.
    token: bytes by which the KV cache of the other one grows with each token: a key and a value of
        `head_dim` numbers of `cache_number` bytes for each of `kv_heads` in each layer.
    tokens: the smallest number of tokens whose cache takes more bytes than the states.

    All whole numbers. `small`, the course's own model, with a state for each of its 8 heads of 32:
    state_bytes(7, 8, 32, 32, 2, 32) is (229376, 1792, 129), as 128 tokens take the same.
    """
    ### BEGIN SOLUTION
    state = layers * heads * d_k * d_v * state_number
    token = layers * kv_heads * 2 * head_dim * cache_number
    return state, token, state // token + 1
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: more, not as many</summary>
#
# Where the state is a whole number of tokens, that number of tokens takes as much, not more.
# </details>

# %% check="state_bytes" points=1
state, token, tokens = checks.parts(
    state_bytes(7, 8, 32, 32, 2, 32), "state", "token", "tokens", what="state_bytes"
)
checks.close(
    state,
    229376,
    what="state",
    mistakes={"states for the key–value heads only": 57344, "counting numbers": 57344},
)
checks.close(token, 1792, what="token", mistakes={"keys without values": 896})
checks.close(tokens, 129, what="tokens", mistakes={"as many bytes, not more": 128})
### BEGIN HIDDEN TESTS
for layers, heads, d_k, d_v, kv_heads, head_dim, wide_number, number in [
    (36, 32, 128, 128, 2, 256, 4, 2), (3, 4, 16, 48, 1, 24, 2, 1), (2, 3, 5, 7, 2, 9, 4, 2),
    (1, 1, 1, 1, 8, 64, 2, 2), (5, 16, 64, 256, 16, 64, 4, 4),
]:  # fmt: skip
    answer = state_bytes(
        layers, heads, d_k, d_v, kv_heads, head_dim, state_number=wide_number, cache_number=number
    )
    parts = checks.parts(answer, "state", "token", "tokens", what="state_bytes")
    for part, what in zip(parts, ("state", "token", "tokens"), strict=True):
        checks.kind(part, int, what=what)
    formats = {1: torch.int8, 2: torch.float16, 4: torch.float32}
    held = torch.empty(layers, heads, d_k, d_v, dtype=formats[wide_number], device="meta").nbytes
    entry = torch.empty(layers, 2, kv_heads, head_dim, dtype=formats[number], device="meta").nbytes
    needed = next(n for n in range(1, 10**6) if n * entry > held)
    where = f"{layers} layers, {heads} states of {d_k} × {d_v}, {kv_heads} × {head_dim} cached."
    for part, due, what in zip(parts, (held, entry, needed), ("state", "token", "tokens"),
                               strict=True):  # fmt: skip
        checks.close(part, due, what=what, hint=where)
checks.close(
    state_bytes(36, 32, 128, 128, 2, 256),
    [36 * 32 * 2**14 * 4, 36 * 2**11, 36 * 32 * 2**16 // (36 * 2**11) + 1],
    what="(state, token, tokens) of 36 layers with the usual formats",
)
many = state_bytes(1, 128, 256, 512, 1, 1, state_number=4, cache_number=1)[2]
assert many == 2**25 + 1, f"tokens: {2**25:,} take as many bytes here, so {2**25 + 1:,} take more"
### END HIDDEN TESTS

# %% tags=["experiment"]
# Eight heads of 64, one new token: attention over n cached tokens, and one step of a state.
threads = torch.get_num_threads()
torch.set_num_threads(1)
lengths = [2**i for i in range(8, 16)]
gen = checks.generator(8)
milliseconds = {"attention over a cache": [], "one step of a state": []}
for n in lengths:
    k, v = (torch.randn(1, 8, n, 64, generator=gen) for _ in range(2))
    q, state = torch.randn(1, 8, 1, 64, generator=gen), torch.randn(1, 8, 64, 64, generator=gen)
    functions = (
        lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        lambda q=q, s=state: linear_attention_recurrent(q, q, q, s),
    )
    for times, function in zip(milliseconds.values(), functions, strict=True):
        runs = []
        for _ in range(6):
            began = time.process_time()
            function()
            runs.append(1e3 * (time.process_time() - began))
        times.append(min(runs))
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: bytes kept and time of one token, by the length of the text
# layers, states a layer, d_k, d_v, key–value heads, head size
sizes_of = {
    "small (this course)": (7, 8, 32, 32, 2, 32),
    "Qwen3-Next, 48 layers": (48, 32, 128, 128, 2, 256),
    "Llama 3 8B, 32 layers": (32, 32, 128, 128, 8, 128),
}
fig, axes = plt.subplots(1, 2, figsize=(11, 3.9))
grid = [2**i for i in range(4, 21)]
for i, (name, sizes_) in enumerate(sizes_of.items()):
    state, token, tokens = state_bytes(*sizes_)
    axes[0].plot(grid, [token * n / 1e6 for n in grid], color=plot.COLORS[i], label=name)
    axes[0].plot(grid, [state / 1e6] * len(grid), color=plot.COLORS[i], linestyle=":")
    axes[0].plot(tokens, state / 1e6, "o", color=plot.COLORS[i])
    axes[0].annotate(
        f"{tokens:,}", (tokens, state / 1e6), textcoords="offset points", xytext=(6, -11),
        fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip
axes[0].set(xscale="log", yscale="log", xlabel="tokens of one text", ylabel="MB of one text")
axes[0].set_title("a cache in every layer (rising), a state in every layer (dotted)", fontsize=10)
axes[0].legend(fontsize=8)
plot.curves(
    lengths,
    milliseconds,
    xlabel="tokens before this one",
    ylabel="milliseconds, 8 heads of 64, one thread",
    title="one more token",
    logx=True,
    logy=True,
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: from the marked length on the state is smaller. Each model is imagined twice, with "
    "attention in all layers and with states in all; the real Qwen3-Next has a state in three "
    "layers of four. Right: the state's step does not know how long the text is.",
)
plt.show()

# %% [markdown]
# ## What a state can hold
#
# Reading with the key of token $i$ gives
#
# $$S^\top k_i = \|k_i\|^2 v_i + \sum_{j\ne i} (k_j\cdot k_i)\, v_j .$$
#
# With keys of length 1 the first term is the value itself. The second is **interference**. It
# vanishes if the keys are orthogonal, and in $d_k$ dimensions at most $d_k$ keys are. For keys of
# random directions, $k_j\cdot k_i$ has mean 0 and variance $1/d_k$ (lesson 01). So if all values
# have the same length, the expected square of the error, relative to the value, is $(n-1)/d_k$:
# with $n = d_k + 1$ entries the noise is as large as the answer.
#
# A softmax has this problem much less: $e^{k_i\cdot q}$ lets the best match tower over the rest.
# That is what was given away with the exponential.
#
# Two remedies follow, and each is a term in an update rule: *forget* what is old, and *erase*
# before writing. A third is to bring the exponential back.

# %% [markdown]
# ## The exponential as a dot product
#
# Katharopoulos et al. (2020) wrote attention as
# $o_t = \sum_j \phi(q_t)\cdot\phi(k_j)\, v_j \big/ \sum_j \phi(q_t)\cdot\phi(k_j)$, with features
# $\phi \ge 0$ of each query and each key; theirs is $\mathrm{elu}(x) + 1$. The three orders hold as
# they are, with $\phi(q)$ and $\phi(k)$ for $q$ and $k$. The denominator is the same sum with the
# value 1, so a column of ones beside the values gives it.
#
# Is there a $\phi$ for which $\phi(q)\cdot\phi(k) = e^{q\cdot k/\sqrt{d}}$? With infinitely many
# features, yes. **Performer** (Choromanski et al. 2020) draws some of them. Let $x = q/d^{1/4}$ and
# $y = k/d^{1/4}$, and $w \sim N(0, I)$. A Gaussian's exponential has mean
# $E\,e^{w\cdot z} = e^{\|z\|^2/2}$, so with $z = x + y$:
#
# $$E\Big[e^{w\cdot x - \|x\|^2/2}\; e^{w\cdot y - \|y\|^2/2}\Big]
# = e^{\|x+y\|^2/2 - \|x\|^2/2 - \|y\|^2/2} = e^{x\cdot y}.$$
#
# The mean over $m$ draws of $w$ is a dot product of $m$ positive features. It estimates the
# *kernel* without bias; the normalized output, a quotient, is biased.
#
# ### Exercise · Positive features, in five lines


# %% exercise="positive_features" minutes=8 difficulty=2 path="more"
def positive_features(x: Tensor, projection: Tensor) -> Tensor:
    """Performer's features: φ(q)·φ(k) estimates exp(q·k/√d) without bias.

    x: (..., d), queries or keys, float32 or float64. projection: (m, d), rows drawn from N(0, I),
    in x's dtype. Returns (..., m), positive, in x's dtype: entry r is exp(w_r·y − ‖y‖²/2)/√m, where
    w_r is row r and y = x/d^(1/4). Nothing else is subtracted from the exponents. Where w_r·y and
    ‖y‖² are finite in x's dtype, an entry is finite if its exponential is, whatever the others are.
    """
    ### BEGIN SOLUTION
    y = x / x.shape[-1] ** 0.25
    exponents = y @ projection.mT - y.square().sum(-1, keepdim=True) / 2
    return exponents.exp() / math.sqrt(projection.shape[0])
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where the root of the root comes from</summary>
#
# The scale 1/√d of the scores is shared between query and key: each takes its root.
# </details>

# %% check="positive_features" points=1
x, w = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 5.0, 0.0, 0.0], [0.0] * 4])
y = math.sqrt(2.0)  # 2/4^(1/4)
due = torch.tensor([[math.exp(y - 1), math.exp(-1.0)]]) / math.sqrt(2)
checks.close(
    positive_features(x, w),
    due,
    what="two features of x = (2, 0, 0, 0)",
    mistakes={
        "no 1/√m": due * math.sqrt(2),
        "1/m in each": due / math.sqrt(2),
        "x not scaled": torch.tensor([[math.exp(0.0), math.exp(-2.0)]]) / math.sqrt(2),
        "x divided by √d": torch.tensor([[math.exp(0.5), math.exp(-0.5)]]) / math.sqrt(2),
        "leaving out −‖y‖²/2": due * math.e,
    },
)
### BEGIN HIDDEN TESTS
import numpy as np

# The mean over all of a Gaussian's draws, as an exact sum: Gauss and Hermite's 40 points in each
# dimension. Each point is a row of the projection, its weight stands beside it.
points, weights = np.polynomial.hermite_e.hermegauss(40)
points, weights = torch.tensor(points), torch.tensor(weights) / math.sqrt(2 * math.pi)
gen = checks.generator(9)
for d in (1, 2):
    rows = torch.cartesian_prod(*[points] * d).view(-1, d)
    weight = torch.cartesian_prod(*[weights] * d).view(-1, d).prod(-1)
    q, k = (torch.randn(3, 4, d, generator=gen, dtype=torch.float64) for _ in range(2))
    with checks.unchanged(q=q, k=k, rows=rows):
        f, g = positive_features(q, rows), positive_features(k, rows)
    estimate = len(rows) * torch.einsum("abr,acr,r->abc", f, g, weight)
    checks.close(
        estimate, (q @ k.mT / math.sqrt(d)).exp(), dtype=torch.float64,
        what=f"the mean of φ(q)·φ(k) over all draws, d = {d}",
    )  # fmt: skip
# Long queries: e^(w·y) and e^(‖y‖²/2) are infinite in float32, their quotient is e^-18 to e^18.
x = 60 * F.normalize(torch.randn(3, 16, generator=gen), dim=-1)
y = x.double() / 2
rows = torch.tensor([14.4, 15.0, 15.6])[:, None] * F.normalize(x, dim=-1)
exponents = (rows.double() * y).sum(-1) - 450
beside = torch.cat([rows, 18.4 / 15 * rows])  # exponents of about 80 to 124: some are infinite
checks.close(
    positive_features(x, beside)[:, :3].diagonal(), (exponents.exp() / math.sqrt(6)).float(),
    what="features of a long query", rtol=1e-3, atol=0,
    hint="Subtract first, then take the exponential.",
)  # fmt: skip
q, k = (torch.randn(5, 16, generator=gen) / 2 for _ in range(2))
rows = torch.randn(200_000, 16, generator=gen)
estimate = (positive_features(q, rows) * positive_features(k, rows)).sum(-1)
exact = ((q * k).sum(-1) / 4).exp()
spread = (((q + k).square().sum(-1) / 4).exp() / len(rows)).sqrt()
assert bool(((estimate / exact - 1).abs() < 6 * spread).all()), "φ(q)·φ(k) is not exp(q·k/√d)"
for dtype in (torch.float32, torch.float64):
    found = positive_features(q.to(dtype), rows[:7].to(dtype))
    assert found.dtype == dtype, f"the result is in {found.dtype} for x in {dtype}"
    assert found.shape == (5, 7), f"7 features of 5 tokens have shape {tuple(found.shape)}"
    assert bool((found > 0).all()), "the features are positive"
checks.gradients(
    lambda x: positive_features(x, rows[:7].to(x.dtype)),
    lambda x: (x @ rows[:7].double().mT / 2 - (x * x).sum(-1, keepdim=True) / 8).exp() / 7**0.5,
    q,
    names=("x",),
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: can `small`'s attention be had this way?
#
# With $z = x + y$ the estimate of one kernel value has the relative variance $(e^{\|z\|^2} -
# 1)/m$ (take $E\,e^{2w\cdot z} = e^{2\|z\|^2}$ and divide by the mean's square). So the error of
# one value falls as $1/\sqrt m$, from a start that grows exponentially with the *size* of queries
# and keys.
#
# The next cell takes the real queries, keys and values of one layer of `small`, its text a page of
# held-out documentation, and replaces the softmax by features; then the same with queries and keys
# a half and a quarter of their size. Write down first: with 1,024 features for heads of 32, is the
# output of the real heads within 10 percent?


# %% tags=["experiment"]
def heads_of(model, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, heads, seq, head_dim) of one layer, q and k rotated, key–value heads repeated."""
    attention, caught = model.layers[layer].self_attn, []
    hook = attention.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
        hook.remove()
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            p(caught[0]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for p in projections
        )
    turn = angles(torch.arange(tokens.shape[1]), model.config)
    group = q.shape[1] // k.shape[1]
    k, v = rotate(k, *turn).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return rotate(q, *turn), k, v


small, tokenizer = models.load("small", device="cpu")
_, held_out = data.split(data.deduplicate(data.documentation()))
page = tokenizer.encode("\n".join(held_out.values()))[:255]
tokens = torch.tensor([[tokenizer.eos, *page]])
q, k, v = heads_of(small.eval(), tokens, layer=3)
gen = checks.generator(10)
feature_counts = [16, 64, 256, 1024, 4096]
feature_errors = {}
for share, name in ((1.0, "real heads"), (0.5, "half the size"), (0.25, "a quarter of it")):
    x, y = share * q, share * k
    exact = F.scaled_dot_product_attention(x, y, v, is_causal=True)
    errors = []
    for m in feature_counts:
        rows = torch.randn(m, 32, generator=gen)
        f, g = positive_features(x, rows), positive_features(y, rows)
        top = linear_attention_parallel(f, g, torch.cat([v, torch.ones_like(v[..., :1])], -1))
        difference = top[..., :-1] / top[..., -1:] - exact
        errors.append((difference.norm(dim=(-1, -2)) / exact.norm(dim=(-1, -2)))[0])
    feature_errors[name] = torch.stack(errors)
    size = float(((x + y).square().sum(-1) / math.sqrt(32)).median())
    print(f"{name:16} ‖x + y‖² {size:6.2f} (median of a token's own pair); error with 1,024 "
          f"features: {feature_errors[name][3].median():.2f}, median of 8 heads")  # fmt: skip

# %% tags=["experiment", "figure"]
# Figure: how far Performer's output is from attention's, on real heads and on smaller ones
fig, ax = plt.subplots(figsize=(6.6, 3.7))
plot.curves(
    feature_counts,
    {name: errors.median(-1).values for name, errors in feature_errors.items()},
    bands={
        name: (errors.min(-1).values, errors.max(-1).values)
        for name, errors in feature_errors.items()
    },
    xlabel="features m",
    ylabel="relative error of the output",
    logx=True,
    logy=True,
    ax=ax,
)
plot.caption(
    fig,
    "Line: median of the 8 heads of layer 3 of small; band: all of them. Small queries and keys "
    "gain from more features. At their real size the result is no better than answering 0, which "
    "has an error of 1.",
)
plt.show()

# %% [markdown]
# **What came out.** The softmax of a trained model is sharp, and sharp means a large $\|z\|^2$,
# which the number of features would have to follow exponentially. The features work where attention
# is nearly uniform, where they are needed least. So most later models dropped the kernel view:
# $\phi$ became the identity, a SiLU or a normalization, the denominator was replaced by a norm on
# the output, and the effort moved to the *update of the state*.

# %% [markdown]
# ## One update, six models {#update}
#
# **Forgetting.** Multiply the state by $\alpha_t \le 1$ before writing:
# $S_t = \mathrm{Diag}(\alpha_t)\,S_{t-1} + k_t v_t^\top$. With one number a head this fades the
# whole state; with $d_k$ numbers each row, which is each channel of the keys, at its own rate.
#
# **Erasing.** Ask the state what it has under the key, and write only what is missing:
#
# $$S_t = S' + \beta_t\, k_t\,\big(v_t - S'^\top k_t\big)^\top, \qquad S' = \mathrm{Diag}(\alpha_t)\,S_{t-1}.$$
#
# This is the **delta rule** (Widrow and Hoff 1960; as fast weights, Schlag et al. 2021), and it
# is a step of gradient descent: $\tfrac12\|S^\top k - v\|^2$ has the gradient $k\,(S^\top k -
# v)^\top$, and $\beta$ is the learning rate. With $\|k\| = 1$ and $\beta = 1$ the old value is
# gone and the new one is read back exactly; with $\beta = 0$ nothing happens.

# %% [markdown]
# Multiply out:
#
# $$S_t = \big(I - \beta_t k_t k_t^\top\big)\,\mathrm{Diag}(\alpha_t)\,S_{t-1} + \beta_t\, k_t v_t^\top .$$
#
# The first matrix has the eigenvalue $1 - \beta\|k\|^2$ along $k$ and 1 across it: keys of length 1
# and $\beta \in (0, 1)$ keep it in $(0, 1)$, and the state cannot grow from it.
#
# The order is a convention that matters: *the decay comes first*, then the erasure reads the
# faded state. Decays are handed over as logarithms, for a reason that chunks will show.
#
# ### Exercise · The update


# %% exercise="state_update" minutes=12 difficulty=2
def state_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: fade, erase, write, then read. Returns (o, state), the state after the token.

    state: (batch, heads, d_k, d_v), float32 or float64.
    q, k: (batch, heads, d_k); v: (batch, heads, d_v). These, log_decay and beta may be in any
        floating formats. No input is changed.
    log_decay: ln α, (batch, heads, 1) for the whole state or (batch, heads, d_k) for its rows;
        None: nothing fades.
    beta: (batch, heads, 1). With S' for the state after fading, the new state is
        S' + β k (v − S'ᵀk)ᵀ. None: nothing is erased, and it is S' + k vᵀ.

    Computed in the state's dtype, and the new state is in it. o = (new state)ᵀ q: (batch, heads,
    d_v), in v's dtype. Keys are taken as they are; their length need not be 1.

    A state of zeros, k = q = (1, 0), twice, v = 1 and then 3: without beta o is 1 and then 4; with
    β = 1 it is 1 and 3; with β = 0.5 it is 0.5 and 1.75.
    """
    ### BEGIN SOLUTION
    dtype = v.dtype
    q, k, v = (t.to(state.dtype) for t in (q, k, v))
    if log_decay is not None:
        state = state * log_decay.to(state.dtype).exp()[..., None]
    if beta is not None:
        held = (k[..., None, :] @ state).squeeze(-2)
        v = beta.to(state.dtype) * (v - held)
    state = state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2).to(dtype), state
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: both kinds of decay in one line</summary>
#
# `log_decay.exp()[..., None]` is (batch, heads, 1, 1) or (batch, heads, d_k, 1). Both broadcast
# against the state's rows.
# </details>
#
# <details><summary>Hint: one write</summary>
#
# With β the state gets `k` times `β · (v − what it holds under k)`; without, `k` times `v`. Only
# the value differs.
# </details>

# %% check="state_update" points=1
# One head with keys of 2 and values of 1: the state is a column.
empty = torch.zeros(1, 1, 2, 1)
e, one = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 1)
for beta, first, second, usual in (
    (None, 1.0, 4.0, {}),
    (1.0, 1.0, 3.0, {"adding without erasing": 4.0, "erasing without writing": 0.0}),
    (0.5, 0.5, 1.75, {"β on the new value only": 1.5}),
):
    b = None if beta is None else beta * one
    o, state = checks.parts(state_update(empty, e, e, one, beta=b), "o", "state")
    checks.close(o, first * one, what=f"the first o with β = {beta}")
    o, state = state_update(state, e, e, 3 * one, beta=b)
    mistakes = {name: value * one for name, value in usual.items()}
    checks.close(o, second * one, what=f"the second o with β = {beta}", mistakes=mistakes)
held = torch.tensor([[[[4.0], [8.0]]]])
halves = torch.tensor([[[0.5, 0.25]]]).log()
o, state = state_update(held, e, e, one, log_decay=halves, beta=0.5 * one)
checks.close(
    state,
    torch.tensor([[[[1.5], [2.0]]]]),
    what="(4, 8) with decays ½ and ¼, then v = 1 under (1, 0) with β = ½",
    mistakes={
        "erasing and writing before the decay": torch.tensor([[[[1.25], [2.0]]]]),
        "comparing v with the state before it faded": torch.tensor([[[[0.5], [2.0]]]]),
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(11)
batch, heads, d_k, d_v = 2, 3, 5, 4
head = torch.arange(heads, dtype=torch.float64)
number = F.logsigmoid(checks.randn(batch, heads, 1, generator=gen))
channels = F.logsigmoid(checks.randn(batch, heads, d_k, generator=gen))
betas = torch.sigmoid(checks.randn(batch, heads, 1, generator=gen))
fixed = torch.log1p(-(2.0 ** (-5 - head))).float()[None, :, None].expand(batch, -1, 1)
fixed = fixed.to(profile.device)
SETTINGS = {
    "linear attention": (None, None),
    "RetNet": (fixed, None),
    "GLA": (channels, None),
    "DeltaNet": (None, betas),
    "Gated DeltaNet": (number, betas),
    "KDA": (channels, betas),
}
for name, (log_decay, beta) in SETTINGS.items():
    for length in (1.0, 1.4):  # keys of length 1, and longer
        state = checks.randn(batch, heads, d_k, d_v, generator=gen)
        q, k, v = (t[:, :, 0] for t in drawn(gen, batch, heads, 1, d_k, d_v))
        k = length * k
        given = [t for t in (state, q, k, v, log_decay, beta) if t is not None]
        with checks.unchanged(*given):
            o, new = state_update(state, q, k, v, log_decay=log_decay, beta=beta)
        row = [None if t is None else t[:, :, None] for t in (q, k, v, log_decay, beta)]
        exact, last = unrolled(*row, state=state)
        checks.close(new, last.float(), what=f"the state of {name}")
        checks.close(o, exact[:, :, 0].float(), what=f"o of {name}")
# A square state: rows fade, not columns.
state = checks.randn(1, 2, 4, 4, generator=gen)
k, v = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
k, v = k.to(profile.device), v.to(profile.device)
decay = F.logsigmoid(checks.randn(1, 2, 4, generator=gen))
_, new = state_update(state, k, k, v, log_decay=decay)
checks.close(
    new, (decay.double().exp()[..., None] * state).float(), what="a square state that only fades",
    mistakes={"fading columns, not rows": decay.exp()[..., None, :] * state},
)  # fmt: skip
### END HIDDEN TESTS

# %% check="state_update" points=1
# With β = 1 and a key of length 1 the value is read back exactly, whatever was there.
gen = checks.generator(12)
state = checks.randn(2, 2, 6, 3, generator=gen, scale=10.0)
q, k, v = (t[:, :, 0] for t in drawn(gen, 2, 2, 1, 6, 3))
ones = torch.ones(2, 2, 1, device=profile.device)
o, new = state_update(state, k, k, v, beta=ones)
checks.close(o, v, what="o for q = k after a write with β = 1", rtol=1e-4)
across = q - (q * k).sum(-1, keepdim=True) * k
checks.close(
    (across[..., None, :] @ new)[..., 0, :],
    (across[..., None, :] @ state)[..., 0, :],
    what="what is stored across the key",
    hint="Only the part of the state along k may change.",
    rtol=1e-4,
)
### BEGIN HIDDEN TESTS
# β = 0 writes nothing; β = 2 reflects.
kept = state_update(state, k, k, v, beta=0 * ones)[1]
checks.close(kept, state, what="the state after a write with β = 0")
o, _ = state_update(state, k, k, 0 * v, beta=2 * ones)
held = (k[..., None, :] @ state)[..., 0, :]
checks.close(o, -held, what="o for q = k after writing 0 with β = 2", rtol=1e-4)
# A key of zeros changes nothing, with β and without.
for beta in (None, 0.7 * ones):
    new = state_update(state, q, 0 * k, v, beta=beta)[1]
    checks.close(new, state, what="the state after a key of zeros")
# Formats: the state keeps its own, o has v's.
decay, beta = -ones / 3, ones / 3
for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                    (torch.float64, torch.float64), (torch.float32, torch.float64)):  # fmt: skip
    given = [t.to(dtype) for t in (q, k, v, decay, beta)]
    o, new = state_update(state.to(kept), *given)
    row = [t[:, :, None] for t in given]
    exact, last = unrolled(*row, state=state.to(kept))
    checks.close(new, last.to(kept), dtype=kept, what=f"the state, tokens in {dtype}")
    checks.close(o, exact[:, :, 0].to(dtype), dtype=dtype, what=f"o in {dtype}")
for formats in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
    token, gates = (q, k, v), (decay, beta)
    given = [t.to(to) for part, to in zip((token, gates), formats, strict=True) for t in part]
    last = unrolled(*(t[:, :, None] for t in given), state=state)[1]
    what = f"the state, tokens in {formats[0]}, log-decays and β in {formats[1]}"
    checks.close(state_update(state, *given)[1], last.float(), dtype=torch.float32, what=what)
o, new = state_update(state, *(t.double() for t in (q, k, v, decay, beta)))
exact, last = unrolled(*(t[:, :, None] for t in (q, k, v, decay, beta)), state=state)
checks.close(new, last.float(), dtype=torch.float32, what="a float32 state, tokens in float64")
checks.close(o, exact[:, :, 0], dtype=torch.float64, rtol=1e-5, what="o of tokens in float64")


def one_token(*t):
    exact, last = unrolled(*(x[:, :, None] for x in t), state)
    return exact[:, :, 0], last


mixed_formats(lambda *t: state_update(state, *t), one_token, q, k, v, decay, beta)
checks.gradients(
    lambda s, q, k, v, g, b: state_update(s, q, k, v, g, b)[0],
    lambda s, q, k, v, g, b: unrolled(*(t[:, :, None] for t in (q, k, v, g, b)), s)[0][:, :, 0],
    state, q, k, v, decay, beta, names=("state", "q", "k", "v", "log_decay", "beta"),
)  # fmt: skip
### END HIDDEN TESTS

# %% [markdown]
# You have written six published models at once. They differ in what they hand over:
#
# | model | decay | erase |
# |---|---|---|
# | linear attention (2020) | – | – |
# | **RetNet** (2023) | fixed, a number for each head: $1 - 2^{-5-h}$ | – |
# | **GLA** (2023) | from the token, $d_k$ numbers | – |
# | **DeltaNet** (2021, 2024) | – | $\beta$ from the token |
# | **Gated DeltaNet** (2024): Qwen3-Next | from the token, a number for each head | $\beta$ from the token |
# | **KDA** (2025): Kimi Linear | from the token, $d_k$ numbers | $\beta$ from the token |
#
# **Retention** is RetNet's word for its part. A decay from the token is a function of the token's
# hidden state, as queries and keys are: $\ln\alpha = -e^{a}\,\mathrm{softplus}(W x + b)$ with a
# learned $a$ for each head in Qwen3-Next; Mamba-2, which erases nothing, has the same decay.

# %% [markdown]
# ### Experiment: real keys in one state
#
# The state of a head of `small` would be 32 × 32. The next cell writes 255 tokens of the page
# into it, each with its real key (of the same layer, brought to length 1) and its real value.
# Then it asks for all of them again, each by its own key, and compares with what was written.
# Beside it, the same values under keys of random directions.
#
# Write down first. Under random keys, adding alone should have a relative error of
# $\sqrt{(n-1)/d_k} \approx 2.8$ at any age. Is it more or less with real keys? And with the delta
# rule, which of the 255 entries can still be read?


# %% tags=["experiment"]
def read_back(k: Tensor, v: Tensor, log_decay: float = 0.0, beta: float | None = None) -> Tensor:
    """Relative error of each entry's value after all are written, (heads, seq), oldest first."""
    state, one = empty_state(k, v), torch.ones(*k.shape[:2], 1)
    for t in range(k.shape[2]):
        gate = None if beta is None else beta * one
        state = state_update(state, k[:, :, t], k[:, :, t], v[:, :, t], log_decay * one, gate)[1]
    return ((k @ state - v).norm(dim=-1) / v.norm(dim=-1))[0]


_, k, v = heads_of(small, tokens, layer=3)
real_k, real_v = F.normalize(k[:, ::4], dim=-1)[:, :, 1:], v[:, ::4, 1:]
chance = torch.randn(real_k.shape, generator=checks.generator(13))
random_k = F.normalize(chance, dim=-1)
rules = {
    "added": {},
    "added, state fading by 2 %": {"log_decay": math.log(0.98)},
    "delta rule, β = 0.9": {"beta": 0.9},
    "both": {"log_decay": math.log(0.98), "beta": 0.9},
}
errors = {
    name: {rule: read_back(keys, real_v, **rules[rule]).median(0).values for rule in rules}
    for name, keys in (("random keys", random_k), ("real keys", real_k))
}
for name, keys in (("random", random_k), ("real", real_k)):
    cosines = (keys @ keys.mT).flatten(-2).abs().median(-1).values[0].tolist()
    first, second = cosines
    print(f"{name} keys: median |cosine| of two, in each of two heads: {first:.2f}, {second:.2f}")
for name, lines in errors.items():
    for rule, error in lines.items():
        newest, oldest = error[-16:].median(), error[:128].median()
        print(f"{name}, {rule:28} error of the last 16: {newest:5.2f}, of the first 128: "
              f"{oldest:5.2f}")  # fmt: skip

# %% tags=["experiment", "figure"]
# Figure: what can still be read, by the age of the entry
fig, axes = plt.subplots(1, 3, figsize=(14, 3.9), width_ratios=[1, 1, 0.9])
for ax, (name, lines) in zip(axes, errors.items(), strict=False):
    smooth = {rule: plot.smooth(error.flip(0), 9) for rule, error in lines.items()}
    plot.curves(
        torch.arange(1, 1 + len(smooth["added"])),
        smooth,
        xlabel="age of the entry (tokens ago)",
        ylabel="relative error of the value read" if ax is axes[0] else "",
        title=name,
        logx=True,
        logy=True,
        ax=ax,
    )
    ax.axhline(1, color="#888888", linewidth=1, linestyle=":")
    ax.set_ylim(0.2, 60)
    ax.legend(fontsize=8, loc="upper right")
axes[1].get_legend().remove()
plot.heatmap(
    (real_k @ real_k.mT)[0, 0, :48, :48],
    xlabel="token",
    ylabel="token",
    title="cosines of real keys, head 0",
    unit="cosine",
    center=0,
    vmin=-1,
    vmax=1,
    xticks=[i if i % 8 == 0 else "" for i in range(48)],
    yticks=[i if i % 8 == 0 else "" for i in range(48)],
    ax=axes[2],
)
plot.caption(
    fig,
    "Left and middle: median of the two key–value heads, means of 9 neighbors; the dotted line is "
    "what answering 0 would give. Right: real keys look alike, most of all neighbors.",
)
plt.show()

# %% [markdown]
# **What came out.** Under random keys the law holds: adding alone gives noise about 2.6 times the
# value, at any age, and the delta rule keeps the newest dozen entries readable, at the expense
# of old ones. Decay does a part of that.
#
# Under the real keys adding is several times worse, and even the delta rule reads its newest
# entries hardly better than an answer of 0. The keys of this softmax model look alike, as the
# heat map shows. A softmax can live with that: it needs *differences* of scores only, and what
# all keys share cancels in the quotient. A state cannot. So a model with states must learn keys
# for it, and cannot take over those of a softmax model as they are.

# %% [markdown]
# ## Chunks that fade
#
# Training needs the chunked form of all six models of [](#update). First decay alone. Let
# $c_i = \sum_{m\le i}\ln\alpha_m$ be the sum of the log-decays from the chunk's first token to
# token $i$, *inclusive*. What token $j$ wrote fades with each later token, so at token $i$ it is
# down by $e^{c_i - c_j}$; what was there before the chunk by $e^{c_i}$:
#
# $$o_i = S^\top (q_i\circ e^{c_i}) + \sum_{j\le i} A_{ij}\, v_j, \qquad
# A_{ij} = \sum_d q_{id}\, k_{jd}\, e^{c_{id} - c_{jd}},$$
# $$S \leftarrow \mathrm{Diag}(e^{c_C})\, S + \sum_j (k_j\circ e^{c_C - c_j})\, v_j^\top .$$

# %% [markdown]
# **The trap.** $A$ looks like a product of two matrices, $q_i\circ e^{c_i}$ and
# $k_j\circ e^{-c_j}$. But $e^{-c_j}$ grows without bound while $e^{c_i}$ vanishes. With
# $\alpha = 0.5$ the one is infinite in float32 from token 128 on and the other 0 from token 150 on;
# their product is NaN. Subtract first, then take the exponential: for $j\le i$ every exponent is at
# most 0 and nothing can overflow. That is why decays travel as logarithms.
#
# The difference has a price too. Near −4,000 float32 numbers lie $2.4\cdot 10^{-4}$ apart, and a
# decay taken from two such sums is no more exact. So $c$ starts anew in each chunk: one fast
# stretch must not blur all that comes later.
#
# For $j > i$ the difference is positive, and its exponential may be infinite. Masking afterwards
# hides that from the result and not from the gradient, where it comes back as $0\cdot\infty$. Mask
# the exponent.
#
# ### Exercise · Scores that fade


# %% exercise="decayed_scores" minutes=15 difficulty=2
def decayed_scores(a: Tensor, b: Tensor, log_decay: Tensor) -> Tensor:
    """Dot products of a chunk's tokens, faded by the tokens that lie between them.

    a, b: (..., C, d), the rows of one chunk. log_decay: ln α, from −300 to 0, (..., C, 1), one
    number for all channels, or (..., C, d). float32 or float64.

    Returns (..., C, C) in their dtype. Entry (i, j), for j ≤ i, is Σ_d a_id b_jd Π α_md with the
    product over m = j+1 … i (empty, so 1, for i = j). For j > i it is exactly 0.

    No result and no gradient is NaN or infinite for ordinary a and b, at any C; sums of thousands
    may cost digits in float32 (an entry may be off by 10⁻³ of itself). Where there is one decay
    for all channels no tensor of more than (..., C, C) elements is made, or than a itself;
    otherwise none of more than (..., C, C, d).
    No loop over tokens is needed: at most 30 operations of PyTorch that make a tensor, at any C.
    """
    ### BEGIN SOLUTION
    sums = log_decay.cumsum(-2)
    above = torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).triu(1)
    exponents = sums[..., :, None, :] - sums[..., None, :, :]
    faded = exponents.masked_fill(above[..., None], -math.inf).exp()
    if log_decay.shape[-1] == 1:
        return (a @ b.mT) * faded[..., 0]
    return (a[..., :, None, :] * b[..., None, :, :] * faded).sum(-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all differences of a vector of sums</summary>
#
# `sums[..., :, None, :] - sums[..., None, :, :]` is (..., C, C, 1) or (..., C, C, d): row i, column
# j.
# </details>
#
# <details><summary>Hint: which tokens fade what</summary>
#
# Token j's own decay acts on what was there before it, not on its own write. So neighbors i = j + 1
# differ by α_i, and the diagonal by nothing.
# </details>

# %% check="decayed_scores" points=1
ones = torch.ones(1, 3, 1)
found = decayed_scores(ones, ones, torch.tensor([[[0.5], [0.25], [0.1]]]).log())
checks.close(
    found,
    torch.tensor([[[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [0.025, 0.1, 1.0]]]),
    what="scores of three ones with decays ½, ¼ and 0.1",
    mistakes={
        "a token's decay acting on its own write": torch.tensor(
            [[[0.5, 0.0, 0.0], [0.125, 0.25, 0.0], [0.0125, 0.025, 0.1]]]
        ),
        "fading by the earlier token's decay, not the later one's": torch.tensor(
            [[[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.125, 0.25, 1.0]]]
        ),
        "no mask": torch.tensor([[[1.0, 4.0, 40.0], [0.25, 1.0, 10.0], [0.025, 0.1, 1.0]]]),
    },
)


### BEGIN HIDDEN TESTS
def pair_by_pair(a, b, log_decay):
    """In float64, each product of decays on its own."""
    a, b, alpha = a.double(), b.double(), log_decay.double().exp().expand(a.shape)
    rows = a.shape[-2]
    found = torch.zeros(*a.shape[:-1], rows, dtype=torch.float64, device=a.device)
    for i in range(rows):
        for j in range(i + 1):
            between = alpha[..., j + 1 : i + 1, :].prod(-2)
            found[..., i, j] = (a[..., i, :] * b[..., j, :] * between).sum(-1)
    return found


gen = checks.generator(14)
for lead, rows, d in [((2, 3), 9, 5), ((2,), 1, 4), ((), 6, 3), ((2, 1, 2), 7, 1)]:
    a, b = (checks.randn(*lead, d, rows, generator=gen).mT for _ in range(2))
    for channels in (1, d):
        log_decay = F.logsigmoid(checks.randn(*lead, rows, channels, generator=gen))
        with checks.unchanged(a=a, b=b, log_decay=log_decay):
            found = decayed_scores(a, b, log_decay)
        hint = f"a of {tuple(a.shape)}, decays of {tuple(log_decay.shape)}."
        checks.close(found, pair_by_pair(a, b, log_decay).float(), what="scores", hint=hint)
        if rows > 1:
            assert bool((found.triu(1) == 0).all()), "entries with j > i are exactly 0"
for channels in (1, 5):
    a, b = (checks.randn(2, 8, 5, generator=gen) for _ in range(2))
    log_decay = F.logsigmoid(checks.randn(2, 8, channels, generator=gen))
    names = ("a", "b", "log_decay")
    checks.gradients(decayed_scores, pair_by_pair, a, b, log_decay, names=names)
    given, dtypes = (a, b, log_decay), (torch.float64, torch.float32)
    checks.keeps_dtype(decayed_scores, *given, reference=pair_by_pair, dtypes=dtypes)
### END HIDDEN TESTS

# %% check="decayed_scores" points=1
# Decays of e^-3 a token over 64 tokens: e^192 does not exist in float32.
gen = checks.generator(15)
a, b = (checks.randn(1, 64, 4, generator=gen) for _ in range(2))
found = decayed_scores(a, b, torch.full((1, 64, 1), -3.0, device=profile.device))
near = torch.arange(64, device=a.device)
near = (near[:, None] - near).double()
checks.close(
    found,
    ((a @ b.mT).double() * torch.exp(-3 * near).where(near >= 0, 0.0)).float(),
    what="scores that fade by e^-3 a token",
    hint="Take the exponential of differences, never of a sum alone.",
)
leaf = a.clone().requires_grad_()
log_decay = torch.full((1, 64, 1), -3.0, device=profile.device, requires_grad=True)
decayed_scores(leaf, b, log_decay).sum().backward()
for name, t in (("a", leaf), ("log_decay", log_decay)):
    assert bool(t.grad.isfinite().all()), (
        f"the gradient of {name} is not finite: mask the exponents, with -inf, and not the results"
    )


### BEGIN HIDDEN TESTS
def row_by_row(a, b, log_decay):
    """In float64: what is left of each write at token i is what was left, once more faded."""
    a, b, alpha = a.double(), b.double(), log_decay.double().exp().expand(a.shape)
    left, found = torch.zeros_like(b), []
    for i in range(a.shape[-2]):
        left = left * alpha[..., i : i + 1, :]
        left[..., i, :] = b[..., i, :]
        found.append((left * a[..., i : i + 1, :]).sum(-1))
    return torch.stack(found, -2)


for channels in (1, 4):
    for fastest in (-0.01, -20.0, -300.0):
        log_decay = fastest * torch.rand(1, 64, channels, generator=gen).to(profile.device)
        given = [t.clone().requires_grad_() for t in (a, b, log_decay)]
        found = decayed_scores(*given)
        exact = row_by_row(a, b, log_decay)
        hint = f"Log-decays down to {fastest:g}, {channels} a token."
        # A difference of sums of thousands has an error of about 1e-3 in float32.
        limit = 1e-5 if fastest > -1 else 1e-3
        checks.close(found, exact.float(), what="scores", hint=hint, rtol=limit)
        gradients = torch.autograd.grad(found.sum(), given)
        for name, g in zip(("a", "b", "log_decay"), gradients, strict=True):
            assert bool(g.isfinite().all()), f"the gradient of {name} is not finite. {hint}"
# 400 tokens of e^-300: sums of 120,000, where only a token's own pair is left.
for channels in (1, 4):
    given = [checks.randn(1, 400, 4, generator=gen).requires_grad_() for _ in range(2)]
    given += [torch.full((1, 400, channels), -300.0, device=a.device, requires_grad=True)]
    found = decayed_scores(*given)
    due = (given[0] * given[1]).sum(-1).diag_embed()
    hint = "All log-decays are −300. What you add to mask a pair must outweigh any sum: -inf does."
    checks.close(found, due, what="scores of 400 tokens", hint=hint)
    gradients = torch.autograd.grad(found.sum(), given)
    assert all(bool(g.isfinite().all()) for g in gradients), f"a gradient is not finite. {hint}"
a, b = (checks.randn(3, 40, 8, generator=gen) for _ in range(2))
for channels in (1, 8):
    log_decay = F.logsigmoid(checks.randn(3, 40, channels, generator=gen))
    with checks.allocations() as made:
        found = decayed_scores(a, b, log_decay)
    checks.close(found, row_by_row(a, b, log_decay).float(), what="scores of 40 tokens")
    operations = sum(made.shapes.values())
    assert operations <= 30, f"{operations} tensors are made for 40 tokens; 30 may be"
    limit = 3 * 40 * 40 * channels
    assert made.largest <= limit, (
        f"one of your tensors has {made.largest} elements with decays of {channels} a token; "
        f"{limit} are enough"
    )
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · The chunked form with decay


# %% exercise="gated_linear_attention" minutes=12 difficulty=2
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    chunk: int,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose state fades, `chunk` tokens at a time.

    q, k: (batch, heads, seq, d_k); v: (batch, heads, seq, d_v), seq ≥ 1.
    log_decay: ln α, from −30 to 0, (batch, heads, seq, 1) or (batch, heads, seq, d_k). Token t
        first fades the state by its α, then writes, then reads. Floating formats may differ
        (float64: all or none).
    chunk ≥ 1; the last chunk may be shorter, and one may hold the whole sequence.
    state: (batch, heads, d_k, d_v), float32 (float64 for float64 inputs), not changed; None: zeros.

    Returns (o, state), o in v's dtype, rounded once, the state in float32 (float64 for float64
    inputs), as `state_update` would give them token by token. Fast decays make nothing NaN or
    infinite, and cost later chunks no digits. Work is counted, for n chunks: at most 45·n + 45
    operations of PyTorch that make a tensor, and no tensor of more elements than the largest of
    these: an input, n + 1 states, the pairs of tokens inside all chunks (times d_k where each
    channel has a decay). A short last chunk may be padded: it counts as a full one.
    """
    ### BEGIN SOLUTION
    dtype = v.dtype
    q, k, v, log_decay = wide(q, k, v, log_decay)
    state = empty_state(k, v) if state is None else state
    outputs = []
    for q_c, k_c, v_c, g_c in chunks(chunk, q, k, v, log_decay):
        sums = g_c.cumsum(-2)
        last = sums[..., -1:, :]
        outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ v_c)
        state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
    return torch.cat(outputs, dim=2).to(dtype), state
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three places where something fades</summary>
#
# Queries, on their way to the old state: by $e^{c_i}$. Keys, on their way into the new one: by what
# is still to come, $e^{c_C - c_j}$. The old state: by $e^{c_C}$, a row vector that must become a
# column to meet the state's rows.
# </details>

# %% check="gated_linear_attention" points=1
one = torch.ones(1, 1, 3, 1)
o, state = checks.parts(gated_linear_attention(one, one, one, (one / 2).log(), 2), "o", "state")
checks.close(
    o,
    torch.tensor([[[[1.0], [1.5], [1.75]]]]),
    what="three ones that fade by a half, in chunks of 2",
    mistakes={
        "dropping the state between chunks": torch.tensor([[[[1.0], [1.5], [1.0]]]]),
        "a state that doesn't fade on its way to the chunk": torch.tensor(
            [[[[1.0], [1.5], [2.5]]]]
        ),
    },
)
checks.close(state, torch.tensor([[[[1.75]]]]), what="the state")
### BEGIN HIDDEN TESTS
gen = checks.generator(16)
for shape, chunk in [((2, 3, 17, 5, 4), 4), ((1, 2, 1, 3, 7), 3), ((2, 2, 12, 4, 4), 6),
                     ((2, 1, 9, 3, 5), 1), ((1, 3, 10, 2, 5), 50)]:  # fmt: skip
    q, k, v = drawn(gen, *shape)
    k = 1.3 * k  # keys of any length
    before = checks.randn(*shape[:2], *shape[3:], generator=gen)
    for channels in (1, shape[3]):
        log_decay = F.logsigmoid(checks.randn(*shape[:3], channels, generator=gen))
        for start in (None, before):
            with checks.unchanged(q=q, k=k, v=v, log_decay=log_decay, state=before):
                o, state = gated_linear_attention(q, k, v, log_decay, chunk, start)
            exact, last = unrolled(q, k, v, log_decay, state=start)
            hint = (
                f"Shape {shape}, {channels} decays a token, chunks of {chunk}, "
                f"{'no' if start is None else 'a'} state given."
            )
            checks.close(o, exact.float(), what="o", hint=hint)
            checks.close(state, last.float(), what="the state", hint=hint)
# RetNet: one fixed number for each head, as a matrix of powers.
heads, seq = 4, 40
gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64, device=profile.device))
q, k, v = drawn(gen, 2, heads, seq, 6, 6)
apart = torch.arange(seq, device=profile.device)
apart = apart[:, None] - apart
powers = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp(min=0), 0.0)
log_decay = gamma.log().float()[None, :, None, None].expand(2, -1, seq, 1)
o, _ = gated_linear_attention(q, k, v, log_decay, 16)
exact = (q.double() @ k.double().mT * powers) @ v.double()
checks.close(o, exact.float(), what="retention with a decay for each head")
# Formats, gradients.
log_decay = F.logsigmoid(checks.randn(2, heads, seq, 6, generator=gen))[:, :, :11]
q, k, v = (t[:, :, :11] for t in (q, k, v))
checks.keeps_dtype(
    lambda *t: gated_linear_attention(*t, 4)[0],
    q, k, v, log_decay, reference=lambda *t: unrolled(*t)[0], what="o",
)  # fmt: skip
for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
    given = [t.to(dtype) for t in (q, k, v, log_decay)]
    start = checks.randn(2, heads, 6, 6, generator=gen, dtype=kept)
    for begin in (None, start):
        state = gated_linear_attention(*given, 5, begin)[1]
        exact = unrolled(*given, state=begin)[1].to(kept)
        checks.close(state, exact, dtype=kept, what=f"the state of {dtype} inputs")
mixed_formats(lambda *t: gated_linear_attention(*t, 4), unrolled, q, k, v, log_decay)
rounded_once(lambda *t: gated_linear_attention(*t, torch.zeros_like(t[2][..., :1]), 100)[0])
checks.gradients(
    lambda q, k, v, g, s: gated_linear_attention(q, k, v, g, 4, s)[0],
    lambda q, k, v, g, s: unrolled(q, k, v, g, state=s)[0],
    q, k, v, log_decay, checks.randn(2, heads, 6, 6, generator=gen),
    names=("q", "k", "v", "log_decay", "state"),
)  # fmt: skip
### END HIDDEN TESTS

# %% check="gated_linear_attention" points=1
# Nothing overflows where a chunk fades by e^-192, and chunks do the work.
gen = checks.generator(17)
q, k, v = drawn(gen, 1, 2, 256, 4, 4)
log_decay = torch.full((1, 2, 256, 1), -3.0, device=profile.device)
with checks.allocations() as made:
    o, state = gated_linear_attention(q, k, v, log_decay, 64)
assert bool(o.isfinite().all() and state.isfinite().all()), "o or the state is not finite"
recent = unrolled(*(t[:, :, -12:] for t in (q, k, v, log_decay)))
checks.close(o[:, :, -1], recent[0][:, :, -1].float(), what="the last o, from the last 12 tokens")
checks.close(state, recent[1].float(), what="the state, from the last 12 tokens")
operations = sum(made.shapes.values())
assert operations <= 45 * 4 + 45, f"{operations} tensors are made for 4 chunks; 225 may be"
assert made.largest <= 2 * 4 * 64**2, (
    f"one of your tensors has {made.largest} elements; the pairs inside 4 chunks of 2 heads are "
    f"{2 * 4 * 64**2}, all pairs {2 * 256**2}"
)
### BEGIN HIDDEN TESTS
for channels, fastest in ((1, -30.0), (4, -30.0), (4, -0.2)):
    log_decay = fastest * torch.rand(1, 2, 256, channels, generator=gen).to(profile.device)
    results = []
    for chunk, n in ((128, 2), (32, 8), (10, 26)):
        with checks.allocations() as made:
            results.append(gated_linear_attention(q, k, v, log_decay, chunk))
        operations = sum(made.shapes.values())
        assert operations <= 45 * n + 45, f"{operations} tensors are made for {n} chunks"
        limit = 2 * max(n * chunk**2 * channels, (n + 1) * 4 * 4, n * chunk * 4)
        assert made.largest <= limit, f"a tensor has {made.largest} elements; {limit} are enough"
    exact = gated_linear_attention(q.double(), k.double(), v.double(), log_decay.double(), 1)
    for o, state in results:
        hint = f"Log-decays down to {fastest:g}, {channels} a token."
        limit = 1e-5 if fastest > -1 else 1e-3  # differences of large sums, in float32
        checks.relative_l2(o, exact[0], limit, what="o", hint=hint)
        checks.relative_l2(state, exact[1], limit, what="the state", hint=hint)
# A fast stretch, then slow chunks, which it must not blur.
for channels in (1, 4):
    slow = -0.2 * torch.rand(1, 2, 64, channels, generator=gen).to(profile.device)
    late = torch.cat([torch.full((1, 2, 192, channels), -30.0, device=slow.device), slow], 2)
    o, state = gated_linear_attention(q, k, v, late, 32)
    exact, last = unrolled(*(t[:, :, 191:] for t in (q, k, v, late)))  # earlier ones are gone
    hint = f"{channels} log-decays a token: 192 of −30, then slow ones. Where do your sums start?"
    checks.relative_l2(o[:, :, 192:], exact[:, :, 1:], 1e-5, what="o", hint=hint)
    checks.relative_l2(state, last, 1e-5, what="the state", hint=hint)
leaves = [t.clone().requires_grad_() for t in (q, k, v, log_decay * 100)]
gradients = torch.autograd.grad(gated_linear_attention(*leaves, 64)[0].sum(), leaves)
assert all(bool(g.isfinite().all()) for g in gradients), "a gradient is not finite"
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: how long RetNet's heads remember, and where the quotient of exponentials fails
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.7))
distance = torch.arange(0, 4097, dtype=torch.float64)
plot.curves(
    distance[1:],
    {f"head {h}": (1 - 2.0 ** (-5 - h)) ** distance[1:] for h in (0, 2, 4, 6)},
    xlabel="distance (tokens)",
    ylabel="what is left of a write",
    title="RetNet's fixed decays",
    logx=True,
    ax=axes[0],
)
lengths = [8, 16, 32, 64, 128, 256, 512, 1024]
mistakes = {"difference first": [], "quotient of exponentials": []}
for n in lengths:
    a, b = (torch.randn(1, n, 8, generator=checks.generator(18)) for _ in range(2))
    g = torch.full((1, n, 1), math.log(0.8))
    exact = decayed_scores(a.double(), b.double(), g.double())
    c = g.cumsum(-2)
    quotient = ((a * c.exp()) @ (b * (-c).exp()).mT).tril()
    for line, found in zip(mistakes.values(), (decayed_scores(a, b, g), quotient), strict=True):
        error = float((found - exact).norm() / exact.norm())
        line.append(error if math.isfinite(error) else math.nan)
plot.curves(
    lengths,
    mistakes,
    xlabel="chunk (tokens), decay 0.8 a token",
    ylabel="relative error in float32",
    title="the same scores in two ways",
    logx=True,
    logy=True,
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: every head has a horizon of its own, from tens of tokens to thousands. Right: where the "
    "dashed line ends the quotient is NaN or infinite.",
)
plt.show()

# %% [markdown]
# A decay for each channel costs the $(C, C, d_k)$ numbers of all differences, and no product of
# matrices does that. GLA and KDA cut the chunk into blocks of 16 and measure each block's exponents
# from its own start: between blocks both factors are then at most 1, so a matrix product will do,
# and only the blocks on the diagonal take all differences. Up to rounding the results are the same,
# and tensor cores do most of the work.

# %% [markdown]
# ## Chunks that erase
#
# The delta rule looks sequential: what is written depends on what the state holds, and that on
# the write before. Give the thing that is written a name: $u_i = \beta_i(v_i - \text{held}_i)$,
# so that the state is a plain sum of $k_j u_j^\top$, faded. With $u$ for $v$, everything of the
# last section holds. What is held under $k_i$ just before its write is then
#
# $$\text{held}_i = S^\top(k_i\circ e^{c_i}) + \sum_{j<i} A_{ij}\,u_j,
# \qquad A_{ij} = \sum_d k_{id}k_{jd}\,e^{c_{id}-c_{jd}},$$
#
# with $S$ the state before the chunk. Put it in and collect the $u$: row $i$ reads $u_i +
# \beta_i\sum_{j<i}A_{ij}u_j = \beta_i\,(v_i - S^\top(k_i\circ e^{c_i}))$. For the whole chunk,
# with $\tilde K$ the rows $k_i\circ e^{c_i}$ and $L$ the part of $A$ below the diagonal,
#
# $$\big(I + \mathrm{Diag}(\beta)\,L\big)\,U' = \mathrm{Diag}(\beta)\,\big(V - \tilde K S\big).$$
#
# The matrix is lower triangular with ones on its diagonal: one `solve_triangular` of size $C$ for
# all that was $C$ steps.

# %% tags=["experiment", "figure"]
# Figure: the matrix that is solved with, and its inverse, for 32 real tokens
betas = torch.full((32, 1), 0.9)
lower = betas * decayed_scores(real_k[0, 0, :32], real_k[0, 0, :32], 0 * betas).tril(-1)
inverse = torch.linalg.inv(torch.eye(32) + lower) @ torch.diag(betas[:, 0])
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.9))
for ax, matrix, title in zip(
    axes,
    (torch.eye(32) + lower, inverse),
    ("I + Diag(β) L", "T, its inverse · Diag(β)"),
    strict=True,
):
    plot.heatmap(
        matrix,
        xlabel="token j",
        ylabel="token i",
        title=title,
        center=0,
        vmin=-1,
        vmax=1,
        xticks=[i if i % 8 == 0 else "" for i in range(32)],
        yticks=[i if i % 8 == 0 else "" for i in range(32)],
        ax=ax,
    )
plot.caption(
    fig,
    "Left: keys of a page of documentation look alike, so the entries below the diagonal are large "
    "and positive. Right: what a token writes is its own value minus, mostly, that of the token "
    "just before it, in whose write older values have been subtracted already.",
)
plt.show()

# %% [markdown]
# The right-hand side depends on $S$ linearly, so solve *twice without S*: once for $V$, once for
# $\tilde K$. With $T = (I + \mathrm{Diag}(\beta) L)^{-1}\mathrm{Diag}(\beta)$,
#
# $$U = T\,V, \qquad W = T\,\tilde K, \qquad U' = U - W S .$$
#
# $U$ and $W$ of *all* chunks can be computed at once, before any state is known; the steps one
# after another are products of matrices only. This is the **WY form** (Bischof and Van Loan 1987,
# for products of Householder matrices, which are $I - \beta k k^\top$ with $\beta\|k\|^2 = 2$; it
# holds for any $\beta$).
#
# ### Exercise · The two factors


# %% exercise="wy_factors" minutes=20 difficulty=3
def wy_factors(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """(W, U) of one chunk: what its tokens write is U − W·S, whatever state S it begins with.

    k: (..., C, d_k), of any length; v: (..., C, d_v); beta: from 0 to 1, (..., C, 1); log_decay:
    ln α, from −30 to 0, (..., C, 1) or (..., C, d_k). float32 or float64, all alike, C ≥ 1.

    Token i first fades the state by α_i. The state then holds h under k_i; the token writes k_i uᵀ
    with u = β_i (v_i − h). Row i of U − W·S is this u, for the state S before the chunk's first
    token. W: (..., C, d_k); U: (..., C, d_v), in the inputs' dtype; fast decays make nothing NaN or
    infinite. No loop over tokens is needed: at most 40 operations of PyTorch that make a tensor for
    64 tokens.

    Two tokens with the same key (1, 0), β = 1 and then 0.5, no decay, v = 2 and then 6: W is (1, 0)
    and (0, 0); U is 2 and 2.
    """
    ### BEGIN SOLUTION
    system = beta * decayed_scores(k, k, log_decay)
    right = beta * torch.cat([k * log_decay.cumsum(-2).exp(), v], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved.split([k.shape[-1], v.shape[-1]], dim=-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the diagonal and what is above it</summary>
#
# `torch.linalg.solve_triangular(A, B, upper=False, unitriangular=True)` solves $AX = B$ and looks
# only at what lies below A's diagonal; it takes ones for the diagonal.
# </details>
#
# <details><summary>Hint: β stands in two places</summary>
#
# Row i of the equation has β_i in front of both sides' sums: in the matrix, and in the right-hand
# side.
# </details>
#
# <details><summary>Hint: both at once</summary>
#
# The same matrix, two right-hand sides: put them side by side and split the solution.
# </details>

# %% check="wy_factors" points=1
k = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
v, beta = torch.tensor([[2.0], [6.0]]), torch.tensor([[1.0], [0.5]])
w, u = checks.parts(wy_factors(k, v, beta, torch.zeros(2, 1)), "W", "U", what="wy_factors")
checks.close(
    w,
    torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    what="W of two tokens with one key",
    mistakes={"leaving out the solve": beta * k},
)
checks.close(
    u,
    torch.tensor([[2.0], [2.0]]),
    what="U of two tokens with one key",
    mistakes={
        "leaving out the solve": beta * v,
        "β in the matrix only": torch.tensor([[2.0], [5.0]]),
        "β on the right only": torch.tensor([[2.0], [1.0]]),
        "adding what is held": torch.tensor([[2.0], [4.0]]),
    },
)
w, u = wy_factors(k, v, beta, torch.tensor([[0.5], [0.25]]).log())
checks.close(w, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), what="W with decays ½ and ¼")
checks.close(
    u,
    torch.tensor([[2.0], [2.75]]),
    what="U with decays ½ and ¼",
    mistakes={"decays of the matrix left out": torch.tensor([[2.0], [2.0]])},
)


### BEGIN HIDDEN TESTS
def written(k, v, beta, log_decay, state):
    """What each token writes, one after the other, in float64."""
    k, v, beta, log_decay, state = (t.double() for t in (k, v, beta, log_decay, state))
    rows = []
    for i in range(k.shape[-2]):
        state = state * log_decay[..., i, :, None].exp()
        held = torch.einsum("...dv,...d->...v", state, k[..., i, :])
        rows.append(beta[..., i, :] * (v[..., i, :] - held))
        state = state + torch.einsum("...d,...v->...dv", k[..., i, :], rows[-1])
    return torch.stack(rows, -2)


gen = checks.generator(19)
for lead, rows, d_k, d_v in [((2, 3), 9, 5, 4), ((2,), 1, 4, 3), ((), 6, 3, 7),
                             ((2, 1, 2), 16, 8, 2)]:  # fmt: skip
    k = 1.3 * F.normalize(checks.randn(*lead, d_k, rows, generator=gen).mT, dim=-1)
    v = checks.randn(*lead, d_v, rows, generator=gen).mT
    beta = torch.sigmoid(checks.randn(*lead, rows, 1, generator=gen))
    for channels in (1, d_k):
        log_decay = F.logsigmoid(checks.randn(*lead, rows, channels, generator=gen))
        with checks.unchanged(k=k, v=v, beta=beta, log_decay=log_decay):
            w, u = wy_factors(k, v, beta, log_decay)
        hint = f"k of {tuple(k.shape)}, decays of {tuple(log_decay.shape)}."
        for scale in (0.0, 1.0, 5.0):
            state = checks.randn(*lead, d_k, d_v, generator=gen, scale=scale)
            exact = written(k, v, beta, log_decay, state)
            checks.close(u - w @ state, exact.float(), what="U − W·S", hint=hint)
wide_k, wide_v = k.double(), v.double()
w, u = wy_factors(wide_k, wide_v, beta.double(), log_decay.double())
state = checks.randn(*lead, d_k, d_v, generator=gen, dtype=torch.float64)
exact = written(wide_k, wide_v, beta, log_decay, state)
checks.close(u - w @ state, exact, dtype=torch.float64, what="U − W·S in float64")
checks.gradients(
    lambda k, v, b, g: torch.cat(wy_factors(k, v, b, g), -1),
    lambda k, v, b, g: torch.cat([
        -torch.cat([written(k, 0 * v[..., :1], b, g, column[:, None].expand(*lead, -1, -1))
                    for column in torch.eye(d_k, dtype=torch.float64, device=k.device)], -1),
        written(k, v, b, g, k.new_zeros(*lead, d_k, d_v))], -1),
    k, v, beta, log_decay, names=("k", "v", "beta", "log_decay"),
)  # fmt: skip
# Strong decays, and the count of operations.
for channels in (1, 8):
    k = F.normalize(checks.randn(2, 64, 8, generator=gen), dim=-1)
    v, beta = checks.randn(2, 64, 3, generator=gen), torch.ones(2, 64, 1, device=k.device)
    log_decay = -20 * torch.rand(2, 64, channels, generator=gen).to(k.device)
    with checks.allocations() as made:
        w, u = wy_factors(k, v, beta, log_decay)
    state = checks.randn(2, 8, 3, generator=gen)
    exact = written(k, v, beta, log_decay, state)
    checks.close(u - w @ state, exact.float(), what="U − W·S with fast decays", rtol=3e-4)
    operations = sum(made.shapes.values())
    assert operations <= 40, f"{operations} tensors are made for 64 tokens; 40 may be"
# 150 tokens of almost one key that fade by a half each: chains of more than 128 of them count.
k = F.normalize(1 + 0.1 * checks.randn(1, 150, 8, generator=gen), dim=-1)
v, half = checks.randn(1, 150, 3, generator=gen), torch.full((1, 150, 1), 0.5, device=k.device)
w, u = wy_factors(k, v, 2 * half, half.log())
exact = written(k, v, 2 * half, half.log(), state[:1])
checks.close(u - w @ state[:1], exact.float(), what="U − W·S of 150 tokens", rtol=3e-4)
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · The chunked delta rule
#
# Token by token this is `delta_rule_recurrent`, which you have already: `state_update` in a loop.


# %%
def delta_rule_recurrent(q, k, v, beta, log_decay=None, state=None):
    """(o, state) by `state_update`, one token after the other; arguments as in the exercise."""
    state = empty_state(*wide(k, v)) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        decay = None if log_decay is None else log_decay[:, :, t]
        token = (x[:, :, t] for x in (q, k, v))
        o, state = state_update(state, *token, decay, beta[:, :, t])
        outputs.append(o)
    return torch.stack(outputs, dim=2), state


# %% exercise="delta_rule_chunked" minutes=15 difficulty=2
def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    chunk: int,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule, with decay or without, `chunk` tokens at a time: DeltaNet, Gated DeltaNet and
    KDA.

    q, k: (batch, heads, seq, d_k); v: (batch, heads, seq, d_v); beta: (batch, heads, seq, 1),
        from 0 to 1. Floating formats may differ (float64: all or none), seq ≥ 1. Keys are taken as
        they are.
    log_decay: ln α, from −30 to 0, (batch, heads, seq, 1) or (batch, heads, seq, d_k); None:
        nothing fades.
    chunk ≥ 1; the last chunk may be shorter, and one may hold the whole sequence.
    state: (batch, heads, d_k, d_v), float32 (float64 for float64 inputs), not changed; None: zeros.

    Returns (o, state), o in v's dtype, rounded once, the state in float32 (float64 for float64
    inputs), as `state_update` would give them token by token. Fast decays make nothing NaN or
    infinite, and cost later chunks no digits. Work is counted, for n chunks: at most 75·n + 75
    operations of PyTorch that make a tensor, and no tensor of more elements than the largest of
    these: 2·d_k + d_v numbers for each token, n + 1 states, the pairs of tokens inside all chunks
    (times d_k where each channel has a decay). A short last chunk may be padded: it counts as a
    full one.
    """
    ### BEGIN SOLUTION
    dtype = v.dtype
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    q, k, v, beta, log_decay = wide(q, k, v, beta, log_decay)
    state = empty_state(k, v) if state is None else state
    outputs = []
    for q_c, k_c, v_c, b_c, g_c in chunks(chunk, q, k, v, beta, log_decay):
        w, u = wy_factors(k_c, v_c, b_c, g_c)
        written_c = u - w @ state
        sums = g_c.cumsum(-2)
        last = sums[..., -1:, :]
        outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ written_c)
        state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ written_c
    return torch.cat(outputs, dim=2).to(dtype), state
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one line more</summary>
#
# With $U - WS$ in place of the values, the rest of the loop is that of
# [](#gated_linear_attention).
# </details>

# %% check="delta_rule_chunked" points=1
# Three tokens with one key, in chunks of 2: each replaces what was there.
e, one = torch.tensor([[[[1.0, 0.0]] * 3]]), torch.ones(1, 1, 3, 1)
v = torch.tensor([[[[2.0], [6.0], [5.0]]]])
o, state = checks.parts(delta_rule_chunked(e, e, v, one, 2), "o", "state")
checks.close(
    o,
    v,
    what="o of three writes under one key, β = 1",
    mistakes={
        "adding, not replacing": v.cumsum(2),
        "erasing inside a chunk only": torch.tensor([[[[2.0], [6.0], [11.0]]]]),
        "erasing what earlier chunks wrote only": torch.tensor([[[[2.0], [8.0], [5.0]]]]),
    },
)
checks.close(state, torch.tensor([[[[5.0], [0.0]]]]), what="the state")
### BEGIN HIDDEN TESTS
gen = checks.generator(20)
for shape, chunk in [((2, 3, 17, 5, 4), 4), ((1, 2, 1, 3, 7), 3), ((2, 2, 12, 4, 4), 6),
                     ((2, 1, 9, 3, 5), 1), ((1, 3, 10, 2, 5), 50)]:  # fmt: skip
    q, k, v = drawn(gen, *shape)
    k = 1.3 * k  # keys of any length
    before = checks.randn(*shape[:2], *shape[3:], generator=gen)
    beta = torch.sigmoid(checks.randn(*shape[:3], 1, generator=gen))
    for channels in (None, 1, shape[3]):
        log_decay = None
        if channels:
            log_decay = F.logsigmoid(checks.randn(*shape[:3], channels, generator=gen))
        for start in (None, before):
            given = [t for t in (q, k, v, beta, log_decay, start) if t is not None]
            with checks.unchanged(*given):
                o, state = delta_rule_chunked(q, k, v, beta, chunk, log_decay, start)
            exact, last = unrolled(q, k, v, log_decay, beta, start)
            hint = (
                f"Shape {shape}, {channels or 'no'} decays a token, chunks of {chunk}, "
                f"{'no' if start is None else 'a'} state given."
            )
            checks.close(o, exact.float(), what="o", hint=hint)
            checks.close(state, last.float(), what="the state", hint=hint)
q, k, v = drawn(gen, 2, 2, 11, 6, 5)
beta = torch.sigmoid(checks.randn(2, 2, 11, 1, generator=gen))
log_decay = F.logsigmoid(checks.randn(2, 2, 11, 6, generator=gen))
checks.keeps_dtype(
    lambda q, k, v, b, g: delta_rule_chunked(q, k, v, b, 4, g)[0],
    q, k, v, beta, log_decay, what="o",
    reference=lambda q, k, v, b, g: unrolled(q, k, v, g, b)[0],
)  # fmt: skip
for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
    q_, k_, v_, b_, g_ = (t.to(dtype) for t in (q, k, v, beta, log_decay))
    start = checks.randn(2, 2, 6, 5, generator=gen, dtype=kept)
    for decay, begin in ((g_, None), (None, None), (g_, start)):
        state = delta_rule_chunked(q_, k_, v_, b_, 5, decay, begin)[1]
        exact = unrolled(q_, k_, v_, decay, b_, begin)[1].to(kept)
        checks.close(state, exact, dtype=kept, what=f"the state of {dtype} inputs")
mixed_formats(
    lambda q, k, v, b, g: delta_rule_chunked(q, k, v, b, 4, g),
    lambda q, k, v, b, g: unrolled(q, k, v, g, b),
    q, k, v, beta, log_decay,
)  # fmt: skip
# Small values replace large ones under one key: o is v, rounded once.
one = torch.zeros(1, 1, 100, 4, device=profile.device)
one[..., 0] = 1
large = 100 + 100 * torch.rand(1, 1, 50, 3, generator=gen)
turned = torch.cat([large, large / 200], 2).to(profile.device).bfloat16()
o, _ = delta_rule_chunked(one.bfloat16(), one.bfloat16(), turned, one[..., :1], 50)
hint = "Nothing is rounded before all is added."
checks.close(o, turned, what="o of small values after large ones", hint=hint, rtol=0.01, atol=0)
checks.gradients(
    lambda q, k, v, b, g, s: delta_rule_chunked(q, k, v, b, 4, g, s)[0],
    lambda q, k, v, b, g, s: unrolled(q, k, v, g, b, s)[0],
    q, k, v, beta, log_decay, checks.randn(2, 2, 6, 5, generator=gen),
    names=("q", "k", "v", "beta", "log_decay", "state"),
)  # fmt: skip
### END HIDDEN TESTS

# %% check="delta_rule_chunked" points=1
# More entries than the state can hold, keys of length 1: it stays as large as its values.
gen = checks.generator(21)
q, k, v = drawn(gen, 1, 2, 256, 4, 4)
beta = torch.sigmoid(checks.randn(1, 2, 256, 1, generator=gen))
with checks.allocations() as made:
    o, state = delta_rule_chunked(q, k, v, beta, 64)
assert float(state.norm(dim=(-1, -2)).max()) < float(v.norm(dim=-1).max()) * 4, "the state grows"
operations = sum(made.shapes.values())
assert operations <= 75 * 4 + 75, f"{operations} tensors are made for 4 chunks; 375 may be"
assert made.largest <= 2 * 4 * 64**2, (
    f"one of your tensors has {made.largest} elements; the pairs inside 4 chunks of 2 heads are "
    f"{2 * 4 * 64**2}, all pairs {2 * 256**2}"
)
whole = delta_rule_chunked(q, k, v, beta, 256)
checks.close(o, whole[0], what="o in chunks of 64, beside one chunk", rtol=1e-4)
checks.close(state, whole[1], what="the state in chunks of 64, beside one chunk", rtol=1e-4)
### BEGIN HIDDEN TESTS
for channels, fastest in ((None, 0.0), (1, -20.0), (4, -20.0), (4, -0.2)):
    log_decay = None
    if channels:
        log_decay = fastest * torch.rand(1, 2, 256, channels, generator=gen).to(profile.device)
    doubled = [None if t is None else t.double() for t in (q, k, v, log_decay, beta)]
    state, rows = torch.zeros(1, 2, 4, 4, dtype=torch.float64, device=q.device), []
    for t in range(256):  # by matrices, in float64
        token_q, token_k, token_v = (x[:, :, t] for x in doubled[:3])
        if channels:
            state = state * doubled[3][:, :, t].exp()[..., None]
        outer = torch.einsum("bhi,bhj->bhij", token_k, token_k)
        b = doubled[4][:, :, t, :, None]
        state = state - b * outer @ state + b * torch.einsum("bhi,bhj->bhij", token_k, token_v)
        rows.append(torch.einsum("bhi,bhij->bhj", token_q, state))
    for chunk, n in ((100, 3), (32, 8)):
        with checks.allocations() as made:
            o, last = delta_rule_chunked(q, k, v, beta, chunk, log_decay)
        operations = sum(made.shapes.values())
        assert operations <= 75 * n + 75, f"{operations} tensors are made for {n} chunks"
        limit = 2 * max(n * chunk**2 * (channels or 1), (n + 1) * 4 * 4, n * chunk * 12)
        assert made.largest <= limit, f"a tensor has {made.largest} elements; {limit} are enough"
        hint = f"{channels or 'No'} decays a token, down to {fastest:g}, chunks of {chunk}."
        checks.relative_l2(o, torch.stack(rows, 2), 1e-4, what="o", hint=hint)
        checks.relative_l2(last, state, 1e-4, what="the state", hint=hint)
# A fast stretch, then slow chunks, which it must not blur.
for channels in (1, 4):
    slow = -0.2 * torch.rand(1, 2, 64, channels, generator=gen).to(profile.device)
    late = torch.cat([torch.full((1, 2, 192, channels), -30.0, device=slow.device), slow], 2)
    o, last = delta_rule_chunked(q, k, v, beta, 32, late)
    rows, state = unrolled(*(t[:, :, 191:] for t in (q, k, v, late, beta)))  # earlier: gone
    hint = f"{channels} log-decays a token: 192 of −30, then slow ones. Where do your sums start?"
    checks.relative_l2(o[:, :, 192:], rows[:, :, 1:], 1e-5, what="o", hint=hint)
    checks.relative_l2(last, state, 1e-5, what="the state", hint=hint)
q, k, v, log_decay = q[:, :, :64], k[:, :, :64], v[:, :, :64], -20 * torch.ones_like(k[:, :, :64])
leaves = [t.clone().requires_grad_() for t in (q, k, v, beta[:, :, :64], log_decay)]
o, _ = delta_rule_chunked(*leaves[:4], 64, leaves[4])
gradients = torch.autograd.grad(o.sum(), leaves)
assert all(bool(g.isfinite().all()) for g in gradients), "a gradient is not finite"
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: recall against the size of the state
#
# **Multi-query associative recall** (Arora et al. 2023) asks for what a memory is for. A sequence
# tells pairs of a key and a value, and then asks for the values of all keys in another order. Here
# there are 16 keys, and half of them are told *again* later, with a new value; the last one
# counts.
#
# One layer, one head, four ways to remember: softmax attention (with a learned slope over distance,
# so that it can tell late from early), adding, adding with a decay from the token, the delta rule.
# Queries and keys have $d_k$ = 8, 16 or 32 numbers, values 32, so that a state has
# $32\,d_k$ numbers. Keys see the token before them, as the short convolution of real layers lets
# them.
#
# Write down first: (1) which of the four need more than $d_k = 8$ to get nearly all keys right that
# were told once? (2) How much can adding get right at most, however large its state, of the keys
# that were told twice?


# %% tags=["experiment"]
def recall_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, answers, twice): 16 of 32 keys, told, half of them again, then all asked for.

    tokens (size, 64): keys are 0 … 31, values 32 … 63; answers (size, 16), 0 … 31, of the last 16
    tokens; twice (size, 16): whether that key was told again.
    """
    keys = torch.rand(size, 32, generator=generator).argsort(-1)[:, :16]
    values = torch.randint(32, (size, 24), generator=generator)
    told = torch.stack([torch.cat([keys, keys[:, :8]], 1), 32 + values], -1).flatten(1)
    order = torch.rand(size, 16, generator=generator).argsort(-1)
    last = torch.cat([values[:, 16:], values[:, 8:16]], 1)
    tokens = torch.cat([told, keys.gather(1, order)], 1)
    return tokens, last.gather(1, order), order < 8


class OneLayer(nn.Module):
    """Tokens to the logits of the values asked for, through one memory of `d_k` × 32."""

    def __init__(self, memory: str, d_k: int, width: int = 32) -> None:
        super().__init__()
        self.memory, self.embedding = memory, nn.Embedding(64, width)
        self.to_q, self.to_k = (nn.Linear(width, d_k, bias=False) for _ in range(2))
        self.to_v, self.to_gate = nn.Linear(width, width, bias=False), nn.Linear(width, 1)
        self.mix, self.slope = nn.Parameter(torch.full((2,), 0.5)), nn.Parameter(torch.zeros(()))
        self.out = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 32, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        earlier = F.pad(x, (0, 0, 1, -1))
        q, k, v = self.to_q(x), self.to_k(self.mix[0] * x + self.mix[1] * earlier), self.to_v(x)
        q, k, v, gate = (t[:, None] for t in (q, k, v, self.to_gate(x)))
        if self.memory == "softmax":
            place = torch.arange(tokens.shape[1], dtype=x.dtype)
            apart = place - place[:, None]
            bias = (self.slope * apart).masked_fill(apart > 0, -math.inf)
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            if self.memory == "added":
                read = linear_attention_parallel(q, k, v)
            elif self.memory == "added, fading":
                read, _ = gated_linear_attention(q, k, v, F.logsigmoid(gate + 3), 64)
            else:
                read, _ = delta_rule_chunked(q, k, v, gate.sigmoid(), 64)
        return self.out(read[:, 0, -16:])


def trained_recall(memory: str, d_k: int, steps: int = 150, seed: int = 0) -> tuple[float, float]:
    """The share right after training, of keys told once and of keys told twice."""
    torch.manual_seed(seed)
    model, generator = OneLayer(memory, d_k), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(steps):
        tokens, answers, _ = recall_batch(32, generator)
        optimizer.param_groups[0]["lr"] = 0.01 * min((step + 1) / 20, 1, 2 - 2 * step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).transpose(1, 2), answers).backward()
        optimizer.step()
    with torch.no_grad():
        tokens, answers, twice = recall_batch(500, generator)
        right = (model(tokens).argmax(-1) == answers).float()
    return float(right[~twice].mean()), float(right[twice].mean())


threads = torch.get_num_threads()
torch.set_num_threads(1)
recall = {
    memory: {d_k: trained_recall(memory, d_k) for d_k in sizes}
    for memory, sizes in (
        ("softmax", (8, 32)),
        ("added", (8, 16, 32)),
        ("added, fading", (8, 16, 32)),
        ("delta rule", (8, 16, 32)),
    )
}
torch.set_num_threads(threads)
for memory, found in recall.items():
    for d_k, (once, twice) in found.items():
        print(f"{memory:14} d_k {d_k:2}: told once {once:4.0%}, told twice {twice:4.0%}")

# %% tags=["experiment", "figure"]
# Figure: recall against the numbers that are kept, for keys told once and told twice
fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
for panel, ax in enumerate(axes):
    for i, (memory, found) in enumerate(recall.items()):
        # A cache keeps a key and a value of each of the 48 tokens told.
        kept = [48 * (d + 32) if memory == "softmax" else 32 * d for d in found]
        ax.plot(
            kept,
            [100 * pair[panel] for pair in found.values()],
            marker="o^sD"[i],
            color=plot.COLORS[i],
            linestyle=plot.DASHES[i],
            label=memory,
        )
    ax.set_xscale("log", base=2)
    ax.set(xlabel="numbers kept when the questions come", ylim=(0, 105))
    ax.set_title(("keys told once", "keys told again with a new value")[panel])
axes[0].set_ylabel("right answers (%)")
axes[0].axhline(100 / 32, color="#888888", linewidth=1, linestyle=":")
axes[1].axhline(50, color="#888888", linewidth=1, linestyle=":")
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Dotted: guessing a value (left), guessing between a key's two values (right). The cache is "
    "always right and always larger. A state needs room for 16 keys, and a rule that forgets.",
)
plt.show()

# %% [markdown]
# **What came out.** Softmax needs no more than 8 numbers to tell 16 keys apart, since it keeps them
# all. The states need room: at $d_k = 8$ all three make many mistakes, with 32 adding and the delta
# rule make few. (The fading state has to learn when *not* to fade, and not every seed gets
# there in 150 steps.) For keys told once the delta rule has at most a small advantage over adding.
#
# The keys told twice separate them. Adding keeps both values of a key and cannot say which came
# later: about half right, with any state. Fading helps, as the later value is the stronger one. The
# delta rule replaces, and needs no more room for it. What a rule can *forget on purpose* counts as
# much as the size of the state.

# %% [markdown]
# ## The kernel: a state that never leaves the chip
#
# In PyTorch each chunk is some twenty operations, and the state goes out to memory and back between
# them. A kernel keeps it in registers. One program owns one head's state and walks over the
# sequence; for each chunk it loads $q$, $k$, $v$ once, and it stores the chunk's output.
#
# How many programs? Batch × heads are 32 for the shape that we publish (2 × 16), and an H200 has
# 132 multiprocessors. But the columns of $v$, and with them those of the state and of $o$, never
# meet: $S^\top q$ and $k v^\top$ work on each column alone. So a program takes `BLOCK_V` columns,
# and with 32 of 128 there are four times as many programs. They load the same $q$ and $k$, which
# after the first of them come from the L2 cache.

# %% [markdown]
# The chunk's arithmetic is yours already, with three things to mind:
#
# 1. **`tl.dot` wants two operands of one dtype.** In half precision cast the second operand of each
#    product; sums are float32. For float32, `input_precision="ieee"`. (On a CPU the interpreter's
#    bfloat16 is wrong: the checks use float32 and float16.)
# 2. **exp2.** Multiply the log-decays by $\log_2 e$ once, and use `tl.exp2` throughout.
# 3. **The last chunk.** It hangs over the end. What lies there loads as 0: a key of 0 writes
#    nothing, and a log-decay of 0 fades nothing. The state after it is right without a mask.
#
# Here the decay is one number a head and token, as in RetNet and Mamba-2; zeros give plain linear
# attention. Loads and stores are given.


# %%
@triton.jit
def load_rows(
    ptr, start, seq, row_stride, first, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows start … start + ROWS and columns first … first + COLUMNS of one head's (seq, WIDTH)
    matrix; 0 outside of it."""
    rows, columns = tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    inside = (start + rows < seq) & (columns < WIDTH)
    corner = ptr + tl.cast(start, tl.int64) * row_stride  # 64 bits for the part that can be large
    return tl.load(corner + rows * row_stride + columns, mask=inside, other=0.0)


@triton.jit
def store_rows(
    ptr, tile, start, seq, row_stride, first, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile (ROWS, COLUMNS) to the same place, in the matrix's own dtype; nothing outside."""
    rows, columns = tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    inside = (start + rows < seq) & (columns < WIDTH)
    corner = ptr + tl.cast(start, tl.int64) * row_stride
    tl.store(corner + rows * row_stride + columns, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_numbers(ptr, start, seq, ROWS: tl.constexpr):
    """Numbers start … start + ROWS of one head's (seq,), its log-decays; 0 beyond the end."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(ptr + rows, mask=rows < seq, other=0.0)


# %% [markdown]
# ### Exercise · The chunk kernel


# %% exercise="chunk_kernel" minutes=30 difficulty=3
@triton.jit
def chunk_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, o_ptr, begin_ptr, end_ptr, q_batch, q_head, q_row, k_batch, k_head,
    k_row, v_batch, v_head, v_row, o_batch, o_head, o_row, seq, D_K: tl.constexpr,
    D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of one head of gated linear attention, chunk after chunk.

    q, k: (batch, heads, seq, D_K); v, o: (batch, heads, seq, D_V), one dtype, any strides (x_batch,
        x_head, x_row), each tensor its own; last axis contiguous.
    g: log-decays (natural, from −30 to 0), (batch, heads, seq) float32, contiguous.
    begin, end: the state before the first token and after the last, (batch, heads, D_K, D_V)
        float32, contiguous; begin is not changed.

    Grid: (⌈D_V / BLOCK_V⌉, heads, batch). CHUNK, BLOCK_V and BLOCK_K ≥ D_K are powers of two, at
    least 16; seq ≥ 1. Sums, decays and the state in float32, the operands of a product in the
    inputs' dtype, and of float32 without TF32; fast decays make nothing NaN or infinite, and cost
    later chunks no digits. Each program loads each row of q and k, its columns of v and each
    log-decay once, and nothing outside the tensors.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * BLOCK_V  # this program's first column of v, of o and of the state
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    o_ptr += batch * o_batch + head * o_head
    number = batch * tl.num_programs(1) + head
    g_ptr += number * seq
    place = number * D_K * D_V
    state = load_rows(begin_ptr + place, 0, D_K, D_V, first, D_V, BLOCK_K, BLOCK_V)
    # The loop over chunks, which stores o and leaves in `state` what the last token leaves. Rows of
    # q and k: load_rows(q_ptr, start, seq, q_row, 0, D_K, CHUNK, BLOCK_K); of v and o: from column
    # `first`, D_V wide, BLOCK_V columns.
    ### BEGIN SOLUTION
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    for start in range(0, seq, CHUNK):
        q = load_rows(q_ptr, start, seq, q_row, 0, D_K, CHUNK, BLOCK_K)
        k = load_rows(k_ptr, start, seq, k_row, 0, D_K, CHUNK, BLOCK_K)
        v = load_rows(v_ptr, start, seq, v_row, first, D_V, CHUNK, BLOCK_V)
        g = load_numbers(g_ptr, start, seq, CHUNK) * 1.4426950408889634
        sums, total = tl.cumsum(g, 0), tl.sum(g, 0)  # inclusive, in units of log2

        # Pairs inside the chunk, faded by the difference of sums; -inf for the future.
        faded = tl.exp2(tl.where(i >= j, sums[:, None] - sums[None, :], float("-inf")))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * faded
        # What earlier chunks left, read by queries that have seen it fade.
        o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums)[:, None]
        o = tl.dot(scores.to(v.dtype), v, o, input_precision="ieee")
        store_rows(o_ptr, o, start, seq, o_row, first, D_V, CHUNK, BLOCK_V)

        # Each key fades by what is still to come of the chunk, the old state by all of it.
        k = (k * tl.exp2(total - sums)[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")
    ### END SOLUTION
    store_rows(end_ptr + place, state, 0, D_K, D_V, first, D_V, BLOCK_K, BLOCK_V)


# %% [markdown]
# <details><summary>Hint: sums inside a tile</summary>
#
# `tl.cumsum(g, 0)` is inclusive, and `tl.sum(g, 0)` is its last value, up to rounding. `sums[:,
# None] - sums[None, :]` is the (CHUNK, CHUNK) tile of differences, and `tl.where(mask, difference,
# float("-inf"))` before `tl.exp2` is the mask.
# </details>
#
# <details><summary>Hint: the order of the two uses of the state</summary>
#
# The chunk reads the state before it changes it.
# </details>
#
# <details><summary>Hint: a type error on a GPU that the interpreter does not show</summary>
#
# `state` starts as float32 and must stay so: `tl.dot(…, acc)` with a float32 accumulator does. A
# half-precision key times a float32 decay is float32: cast it back before the product.
# </details>

# %%
# (CHUNK, BLOCK_V, warps, pipeline stages) to choose from; the interpreter takes the first.
CONFIGS = tuple(
    triton.Config({"CHUNK": chunk, "BLOCK_V": block}, num_warps=warps, num_stages=stages)
    for chunk, block, warps, stages in (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 3),
    )
)  # fmt: skip


def rows_contiguous(*tensors):
    """The kernel takes any strides but the last."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def chunk_attention(q, k, v, log_decay, state=None, blocks=None, out=None, end=None):
    """(o, state): gated linear attention by the kernel, one decay a head and token.

    q, k: (batch, heads, seq, d_k); v, o: (batch, heads, seq, d_v). log_decay: (batch, heads, seq)
    float32. state: (batch, heads, d_k, d_v) float32, None: zeros. blocks: (CHUNK, BLOCK_V), or the
    fastest of CONFIGS.
    """
    q, k, v = rows_contiguous(q, k, v)
    batch, heads, seq, d_k = q.shape
    d_v = v.shape[-1]
    o = torch.empty_like(v) if out is None else out
    shape, kind = (batch, heads, d_k, d_v), {"dtype": torch.float32, "device": q.device}
    begin = torch.zeros(shape, **kind) if state is None else state.contiguous()
    end = torch.empty(shape, **kind) if end is None else end
    strides = [stride for t in (q, k, v, o) for stride in t.stride()[:3]]
    arguments = (q, k, v, log_decay.contiguous(), o, begin, end, *strides, seq)
    known = {"D_K": d_k, "D_V": d_v, "BLOCK_K": max(16, triton.next_power_of_2(d_k))}

    def grid(meta):
        return triton.cdiv(d_v, meta["BLOCK_V"]), heads, batch

    if blocks is None and q.dtype == torch.float32 and not profile.interpret:
        blocks = 32, 32  # without tensor cores, large tiles do not fit in registers
    if blocks is None:
        kernel = autotuned(chunk_kernel, CONFIGS, ("D_K", "D_V"))
        kernel[grid](*arguments, **known)
    else:
        chunk_kernel[grid](*arguments, **known, CHUNK=blocks[0], BLOCK_V=blocks[1])
    return o, end


# %% tags=["support"]
# Support: all pairs with their decays in float64, and the kernel among canaries
def all_pairs(q, k, v, log_decay, state=None):
    """(o, last state) in float64 from the matrix of all pairs; log_decay (batch, heads, seq)."""
    q, k, v, log_decay = (t.double() for t in (q, k, v, log_decay))
    left, row = [], torch.zeros_like(log_decay)
    for i, alpha in enumerate(log_decay.exp().unbind(-1)):  # what is left of each write at token i
        row = row * alpha[..., None]
        row[..., i] = 1
        left.append(row)
    left = torch.stack(left, -2)
    scores = (q @ k.mT) * left
    o = scores @ v
    last = (k * left[:, :, -1, :, None]).mT @ v
    if state is not None:
        so_far = log_decay.cumsum(-1).exp()
        o = o + (q * so_far[..., None]) @ state.double()
        last = last + so_far[..., -1, None, None] * state.double()
    return o, last


def kernel_among_canaries(q, k, v, log_decay, state, blocks):
    """(o, end) of chunk_attention, each tensor with strides of its own and NaN around its rows."""
    o, end = torch.full_like(v, math.nan), torch.full_like(state, math.nan)
    tensors = {"q": q, "k": k, "v": v, "g": log_decay, "o": o, "begin": state, "end": end}
    options = {"written": ("o", "end"), "contiguous": ("g", "begin", "end")}
    with checks.buffers(**tensors, **options) as held:
        chunk_attention(held.q, held.k, held.v, held.g, held.begin, blocks, held.o, held.end)
    return held.o.clone(), held.end.clone()


# %% check="chunk_kernel" points=2
# One chunk of 16 tokens, one program; the kernel also has to compile for a GPU.
gen = checks.generator(22)
q, k, v = drawn(gen, 1, 1, 16, 16, 16)
g = -0.3 * torch.rand(1, 1, 16, generator=gen).to(profile.device)
with checks.launches() as launched, checks.compiled():
    o, state = chunk_attention(q, k, v, g, blocks=(16, 16))
exact, last = all_pairs(q, k, v, g)
checks.relative_l2(
    o,
    exact,
    2e-6,
    what="o of one chunk",
    mistakes={
        "no decay": linear_attention_parallel(q.double(), k.double(), v.double()),
        "exp2 without log2(e)": all_pairs(q, k, v, g * math.log(2))[0],
        "a decay that acts on the token's own write": all_pairs(q, k * g.exp()[..., None], v, g)[0],
    },
)
checks.relative_l2(
    state,
    last,
    2e-6,
    what="the state after one chunk",
    mistakes={
        "keys that don't fade": k.double().mT @ v.double(),
        "keys that fade by their own decay too": all_pairs(q, k * g.exp()[..., None], v, g)[1],
    },
)
assert launched.kernels["chunk_kernel"] == 1, "the kernel was not launched"
assert launched.programs == 1, "16 columns of one head are one program"
### BEGIN HIDDEN TESTS
for shape, blocks in [((2, 3, 32, 16, 16), (32, 16)), ((1, 2, 16, 32, 48), (16, 32))]:
    q, k, v = drawn(gen, *shape)
    g = -0.3 * torch.rand(*shape[:3], generator=gen).to(profile.device)
    with (
        checks.launches() as launched,
        checks.forbidden("matmul", "bmm", "einsum", "cumsum", because="the kernel does it"),
    ):
        o, state = chunk_attention(q, k, v, g, blocks=blocks)
    assert launched.kernels["chunk_kernel"] == 1, "the kernel was not launched"
    exact, last = all_pairs(q, k, v, g)
    hint = f"Shape {shape}, CHUNK, BLOCK_V = {blocks}."
    checks.relative_l2(o, exact, 2e-6, what="o of one chunk", hint=hint)
    checks.relative_l2(state, last, 2e-6, what="the state after one chunk", hint=hint)
### END HIDDEN TESTS

# %% check="chunk_kernel" points=2
# Three chunks: the state is carried from one to the next.
gen = checks.generator(23)
q, k, v = drawn(gen, 1, 2, 48, 16, 16)
g = -0.1 * torch.rand(1, 2, 48, generator=gen).to(profile.device)
with checks.compiled():
    o, state = chunk_attention(q, k, v, g, blocks=(16, 16))
exact, last = all_pairs(q, k, v, g)
alone = [all_pairs(*(t[:, :, i : i + 16] for t in (q, k, v, g))) for i in (0, 16, 32)]
checks.relative_l2(
    o,
    exact,
    2e-6,
    what="o of three chunks",
    mistakes={"dropping the state between chunks": torch.cat([a[0] for a in alone], 2)},
)
checks.relative_l2(
    state,
    last,
    2e-6,
    what="the state after three chunks",
    mistakes={"the last chunk's writes only": alone[-1][1], "no decay": k.double().mT @ v.double()},
)
### BEGIN HIDDEN TESTS
for shape, blocks, given in [
    ((2, 1, 35, 20, 24), (16, 16), True),
    ((1, 2, 40, 9, 40), (32, 16), False),
    ((1, 2, 1, 16, 16), (16, 16), True),
    ((1, 1, 33, 33, 5), (16, 32), True),
    ((2, 2, 18, 16, 7), (16, 16), False),
]:
    q, k, v = drawn(gen, *shape)
    g = -0.2 * torch.rand(*shape[:3], generator=gen).to(profile.device)
    start = checks.randn(*shape[:2], *shape[3:], generator=gen) if given else None
    o, state = chunk_attention(q, k, v, g, start, blocks)
    exact, last = all_pairs(q, k, v, g, start)
    hint = f"Shape {shape}, CHUNK, BLOCK_V = {blocks}, {'a' if given else 'no'} state given."
    checks.relative_l2(o, exact, 2e-6, what="o", hint=hint)
    checks.relative_l2(state, last, 2e-6, what="the state", hint=hint)
# In two launches, the second with the first one's state.
q, k, v = drawn(gen, 2, 1, 50, 16, 16)
g = -0.2 * torch.rand(2, 1, 50, generator=gen).to(profile.device)
first, state = chunk_attention(*(t[:, :, :19] for t in (q, k, v, g)), blocks=(16, 16))
second, state = chunk_attention(*(t[:, :, 19:] for t in (q, k, v, g)), state, (16, 16))
exact, last = all_pairs(q, k, v, g)
checks.relative_l2(torch.cat([first, second], 2), exact, 2e-6, what="o in two launches")
checks.relative_l2(state, last, 2e-6, what="the state in two launches")
### END HIDDEN TESTS

# %% check="chunk_kernel" points=2
# Each tensor has strides of its own here, and NaN between its rows and around it: nothing may be
# written or read there.
gen = checks.generator(24)
q, k, v = drawn(gen, 1, 2, 21, 16, 16)
g = -0.2 * torch.rand(1, 2, 21, generator=gen).to(profile.device)
start = checks.randn(1, 2, 16, 16, generator=gen)
with checks.compiled():
    o, state = kernel_among_canaries(q, k, v, g, start, (16, 16))
exact, last = all_pairs(q, k, v, g, start)
hint = "Each tensor has its own row stride; q and k are D_K wide, v and o D_V, from `first` on."
checks.relative_l2(o, exact, 2e-6, what="o in padded buffers", hint=hint)
checks.relative_l2(state, last, 2e-6, what="the state in padded buffers", hint=hint)
### BEGIN HIDDEN TESTS
for shape, blocks in [((2, 1, 21, 24, 33), (16, 16)), ((2, 3, 20, 9, 17), (32, 32))]:
    batch, heads, seq, d_k, d_v = shape
    q, k, v = drawn(gen, *shape)
    g = -0.2 * torch.rand(batch, heads, seq, generator=gen).to(profile.device)
    start = checks.randn(batch, heads, d_k, d_v, generator=gen)
    with checks.traffic() as moved, checks.launches() as launched:
        o, state = kernel_among_canaries(q, k, v, g, start, blocks)
    exact, last = all_pairs(q, k, v, g, start)
    hint = f"Shape {shape}, CHUNK, BLOCK_V = {blocks}."
    checks.relative_l2(o, exact, 2e-6, what="o in padded buffers", hint=hint)
    checks.relative_l2(state, last, 2e-6, what="the state in padded buffers", hint=hint)
    programs = -(-d_v // blocks[1])
    assert launched.programs == programs * heads * batch, f"{launched.programs} programs"
    due = batch * heads * (programs * seq * (2 * d_k + 1) + seq * d_v + d_k * d_v)
    assert moved is None or moved.loaded <= due, (
        f"{moved.loaded:,} elements are loaded where {due:,} are enough: each row of q and k and "
        f"each log-decay once in each program, each column of v in one. {hint}"
    )
    out = batch * heads * (seq * d_v + d_k * d_v)
    stored = out if moved is None else moved.stored
    assert stored <= out, f"{stored:,} elements are stored, not {out:,}"
### END HIDDEN TESTS

# %% check="chunk_kernel" points=2
# Fast decays, where quotients of exponentials overflow, and half precision.
gen = checks.generator(25)
q, k, v = drawn(gen, 1, 1, 96, 16, 16)
g = torch.full((1, 1, 96), -4.0, device=profile.device)
o, state = chunk_attention(q, k, v, g, blocks=(64, 16))
exact, last = all_pairs(q, k, v, g)
hint = "Take exp2 of differences of sums: e^256 does not exist in float32."
checks.relative_l2(o, exact, 3e-4, what="o that fades by e^-4 a token", hint=hint)
checks.relative_l2(state, last, 3e-4, what="the state that fades by e^-4 a token", hint=hint)
with checks.compiled():
    o, state = chunk_attention(q.half(), k.half(), v.half(), g / 40, blocks=(32, 16))
assert o.dtype == torch.float16
assert state.dtype == torch.float32
exact, last = all_pairs(q.half(), k.half(), v.half(), g / 40)
checks.relative_l2(o, exact, 1e-3, what="o in float16")
checks.relative_l2(state, last, 1e-3, what="the state in float16")
### BEGIN HIDDEN TESTS
for fastest in (-30.0, -1.0, 0.0):
    g = fastest * torch.rand(1, 1, 96, generator=gen).to(profile.device)
    o, state = chunk_attention(q, k, v, g, blocks=(64, 16))
    exact, last = all_pairs(q, k, v, g)
    limit = {-30.0: 2e-3, -1.0: 1e-4, 0.0: 2e-6}[fastest]
    hint = f"Log-decays down to {fastest:g}."
    checks.relative_l2(o, exact, limit, what="o", hint=hint)
    checks.relative_l2(state, last, limit, what="the state", hint=hint)
# Two fast chunks, then a slow one, which they must not blur.
g = -0.2 * torch.rand(1, 1, 96, generator=gen).to(profile.device)
g[..., :64] = -30
o, state = chunk_attention(q, k, v, g, blocks=(32, 16))
exact, last = all_pairs(q, k, v, g)
hint = "Log-decays of −30 for 64 tokens, then slow ones. Where do your sums start?"
checks.relative_l2(o[:, :, 64:], exact[:, :, 64:], 1e-5, what="o", hint=hint)
checks.relative_l2(state, last, 1e-5, what="the state", hint=hint)
# 15 chunks without decay: in float32 nothing is lost, rounded after each chunk it drifts.
q, k, v = drawn(gen, 1, 1, 240, 16, 16, torch.float16)
v = (v.float() + 3).half()
g = torch.zeros(1, 1, 240, device=profile.device)
o, state = chunk_attention(q, k, v, g, blocks=(16, 16))
exact, last = all_pairs(q, k, v, g)
hint = "The state stays float32 in the loop."
checks.relative_l2(state, last, 2e-5, what="the state after 15 chunks in float16", hint=hint)
checks.relative_l2(o, exact, 1e-3, what="o over 15 chunks in float16")
# Several blocks of columns and a head dimension that is no power of two, in float16.
q, k, v = drawn(gen, 1, 2, 40, 24, 40, torch.float16)
g = -0.1 * torch.rand(1, 2, 40, generator=gen).to(profile.device)
before = checks.randn(1, 2, 24, 40, generator=gen)
o, state = chunk_attention(q, k, v, g, before, (16, 16))
exact, last = all_pairs(q, k, v, g, before)
checks.relative_l2(o, exact, 1e-3, what="o of several blocks in float16")
checks.relative_l2(state, last, 1e-3, what="the state of several blocks in float16")
### END HIDDEN TESTS

# %% [markdown]
# ## On the hardware
#
# Causal attention over $n$ tokens costs $2nD$ FLOPs a token and head, what the mask hides left
# out; a chunk kernel $2C(d_k + d_v) + 4d_kd_v$, whatever $n$ is (and the scores once more for
# each further block of columns). Somewhere the lines cross. On a GPU the next cell measures
# where: your kernel beside PyTorch's FlashAttention-2, in bfloat16, two texts, 16 heads of 128.
# On a CPU it draws the limits of an H200, arithmetic and bytes, for the same shapes: arithmetic,
# not a measurement.


# %% tags=["experiment"]
def kernel_seconds(S: int, D: int = 128, heads: int = 16, batch: int = 2) -> tuple[float, float]:
    """(attention, chunk kernel) on this GPU: seconds for batch × S tokens, medians."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(batch, S, heads, D, **options).transpose(1, 2) for _ in range(3))
    g = torch.full((batch, heads, S), -0.01, device="cuda")
    q = q / math.sqrt(D)

    def attend():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    functions = (attend, lambda: chunk_attention(q, k, v, g))
    return tuple(triton.testing.do_bench(f, return_mode="median") / 1e3 for f in functions)


def limit_seconds(
    S: int, D: int = 128, heads: int = 16, batch: int = 2, chunk: int = 64, block_v: int = 32
) -> tuple[float, float]:
    """(attention, chunk kernel) on an H200 at best: the slower of its arithmetic and its bytes."""
    rows = batch * heads * S
    moved = rows * 4 * D * 2 / 4.8e12  # q, k, v and o once, two bytes a number
    # Each block of columns computes the scores again.
    pairs = 2 * chunk * D * (D // block_v) + 2 * chunk * D
    flops = rows * 2 * S * D, rows * (pairs + 4 * D * D)
    return max(flops[0] / 989e12, moved), max(flops[1] / 989e12, moved)


measured = profile.name == "gpu" and not profile.interpret
lengths = [2**i for i in range(8, 16)]
seconds = [kernel_seconds(S) if measured else limit_seconds(S) for S in lengths]
attention_ns, chunk_ns = (
    [1e9 * pair[i] / (2 * S) for pair, S in zip(seconds, lengths, strict=True)] for i in (0, 1)
)

# %% tags=["experiment", "figure"]
# Figure: time of a token in attention and in the chunk kernel, by the length of the text
fig, ax = plt.subplots(figsize=(6.8, 3.8))
plot.curves(
    lengths,
    {"FlashAttention-2" if measured else "attention, limit": attention_ns,
     "your chunk kernel" if measured else "chunk kernel, limit": chunk_ns},
    xlabel="sequence length S (tokens)",
    ylabel="nanoseconds a token, 16 heads of 128",
    title="measured on this GPU" if measured else "arithmetic for an H200, not measured",
    logx=True,
    logy=True,
    ax=ax,
)  # fmt: skip
faster = [a > c for a, c in zip(attention_ns, chunk_ns, strict=True)]
crossing = faster.index(True) if True in faster else None
if crossing is not None:
    ax.axvline(lengths[crossing], color="#888888", linewidth=1, linestyle=":")
    ax.annotate(
        f"from {lengths[crossing]:,} on\nthe state is faster",
        (lengths[crossing], max(attention_ns) / 3), fontsize=8, textcoords="offset points",
        xytext=(5, 0),
    )  # fmt: skip
plot.caption(
    fig,
    "A token's attention grows with the text before it; a token's share of the chunk kernel does "
    "not. Where both are flat, memory traffic is the limit.",
)
plt.show()

# %% [markdown]
# Yours goes forward only; training needs the gradient too, by a kernel that walks back over the
# chunks. Production kernels compute the states of all chunks in one kernel and the outputs in
# another, so that chunks run in parallel too (two passes over memory for more programs). For the
# delta rule they invert the small triangular matrices in blocks of 16, on tensor cores.

# %% [markdown]
# ## Key questions
#
# ### Exercise · Short answers, by number
#
# One value a question; write an expression, or the number itself.


# %% exercise="linear_numbers" minutes=8 difficulty=2 kind="questions"
def linear_numbers() -> dict[str, float]:
    """A dictionary of seven answers, numbers to 1 percent.

    "overwrite":  a key of length 1 is written twice, first with the value 8, then with 2, by the
        delta rule with β = 0.75, into an empty state. What is read under it?
    "noise":      257 entries with values of one length, added under keys of random directions and
        length 1, d_k = 64: the expected root mean square error of an entry that is read with its
        own key, divided by the length of its value.
    "half_life":  head h = 3 of RetNet: after how many tokens is half of a write left?
    "overflow":   decay 0.9 a token: the smallest number of tokens n for which e^(−c_n) is beyond
        float32's largest number, 3.4e38.
    "eigenvalue": β = 1.5, a key of length 1, no decay: by what is the state multiplied along k?
    "pairs":      d_k = d_v = 64 and chunks of 256: FLOPs a token of the chunked form, divided by
        those of the recurrent form.
    "hybrid":     Qwen3-Next has 36 layers with 32 states of 128 × 128 in float32, and 12 layers of
        attention with 2 key–value heads of 256 in bfloat16. At how many tokens does the cache take
        as many bytes as the states?
    """
    ### BEGIN SOLUTION
    return {
        "overwrite": 0.25 * (0.75 * 8) + 0.75 * 2,
        "noise": math.sqrt(256 / 64),
        "half_life": math.log(2) / -math.log(1 - 2**-8),
        "overflow": math.ceil(math.log(3.4e38) / -math.log(0.9)),
        "eigenvalue": 1 - 1.5,
        "pairs": (2 * 256 * 128 + 4 * 64 * 64) / (4 * 64 * 64),
        "hybrid": 36 * 32 * 128 * 128 * 4 / (12 * 2 * 2 * 256 * 2),
    }
    ### END SOLUTION


# %% check="linear_numbers" points=1
answer = linear_numbers()["overwrite"]
checks.kind(answer, float, what="overwrite")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    3.0,
    what="overwrite",
    hint="The first write leaves 0.75 · 8; the second moves it to 2 by three quarters of the way.",
)
### END HIDDEN TESTS

# %% check="linear_numbers" points=1
answer = linear_numbers()["noise"]
checks.kind(answer, float, what="noise")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2.0,
    what="noise",
    hint="Each of the 256 other keys adds a variance of 1/d_k. The root is asked for.",
)
### END HIDDEN TESTS

# %% check="linear_numbers" points=1
answer = linear_numbers()["half_life"]
checks.kind(answer, float, what="half_life")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    177.098,
    what="half_life",
    hint="Which power of two belongs to h = 3? Then solve γ^n = ½.",
)
### END HIDDEN TESTS

# %% check="linear_numbers" points=1
answer = linear_numbers()["overflow"]
checks.kind(answer, float, what="overflow")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    843,
    what="overflow",
    hint="c_n is n times the logarithm of the decay.",
)
### END HIDDEN TESTS

# %% check="linear_numbers" points=1
answer = linear_numbers()["eigenvalue"]
checks.kind(answer, float, what="eigenvalue")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    -0.5,
    what="eigenvalue",
    hint="Multiply (I − β k kᵀ) with k.",
)
### END HIDDEN TESTS

# %% check="linear_numbers" points=1
answer = linear_numbers()["pairs"]
checks.kind(answer, float, what="pairs")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    5.0,
    what="pairs",
    hint="Pairs inside the chunk cost 2C(d_k + d_v); reading and writing the state 4·d_k·d_v.",
)
### END HIDDEN TESTS

# %% check="linear_numbers" points=1
answer = linear_numbers()["hybrid"]
checks.kind(answer, float, what="hybrid")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    3072,
    what="hybrid",
    hint="Bytes of all states, divided by the bytes that one token adds to the cache.",
)
### END HIDDEN TESTS

# %% [markdown]
# The others are open; write two or three sentences each.
#
# **1.** Softmax attention without a cache limit and a linear layer have the same parameters. What
# can the first do that no state of fixed size can, and what does that say about models that keep a
# few layers of full attention?

# %% [markdown] answer="why-hybrid"
# It can copy: any of $n$ earlier tokens can be singled out exactly, because all of them are kept. A
# state of $d_k d_v$ numbers holds a bounded number of bits, so for long enough texts some recall
# must fail, whatever the update rule. A few attention layers give exact recall, and the linear
# layers in between carry the rest at a constant cost; Qwen3-Next and Kimi Linear keep one layer of
# four.

# %% [markdown]
# **2.** Why do the fast models train in chunks of 64 or 128, when the recurrent form has the fewest
# FLOPs?

# %% [markdown] answer="why-chunks"
# The recurrent form makes outer products and matrix–vector products, which have no use for tensor
# cores, moves the state for every token, and makes n dependent steps. Chunks turn all of it into
# products of matrices with sides of 64 to 128, and n/C steps. Up to C about d the extra pairs cost
# no more than the products with the state.

# %% [markdown]
# **3.** What changes if β may go up to 2? Think of the eigenvalue along the key.

# %% [markdown] answer="negative-eigenvalues"
# The eigenvalue 1 − β‖k‖² then reaches −1: the state's entry under the key can be reflected, not
# only shrunk. A state that is turned over at each 1 of a bit string knows the parity of any length,
# which no product of positive factors can (Grazzi et al. 2024). Lesson 36 does it.

# %% [markdown]
# **4.** Qwen3-Next normalizes queries and keys to length 1. What would go wrong in the delta rule
# without, and why does plain linear attention not need it?

# %% [markdown] answer="why-normalize"
# Along a key the state is multiplied by 1 − β‖k‖². For ‖k‖² above 2/β its absolute value is larger
# than 1, and repeated writes under like keys make the state grow exponentially. Adding multiplies
# the state by 1 at most, so it grows by a sum, never by a product.

# %% [markdown]
# ## References
#
# - **Katharopoulos, Vyas, Pappas, Fleuret 2020**, *Transformers are RNNs: Fast Autoregressive
#   Transformers with Linear Attention*, arXiv:2006.16236: section 3, features and the recurrence.
# - **Choromanski et al. 2020**, *Rethinking Attention with Performers*, arXiv:2009.14794: section
#   2.3, positive features; lemma 1 is the identity above. Its orthogonal draws are left out here.
# - **Schlag, Irie, Schmidhuber 2021**, *Linear Transformers Are Secretly Fast Weight Programmers*,
#   arXiv:2102.11174: sections 3 and 4, capacity and the delta rule.
# - **Sun et al. 2023**, *Retentive Network: A Successor to Transformer for Large Language Models*,
#   arXiv:2307.08621: section 2, the three forms. It also rotates queries and keys, and normalizes
#   the output by group.
# - **Arora et al. 2023**, *Zoology: Measuring and Improving Recall in Efficient Language Models*,
#   arXiv:2312.04927: sections 3 and 4, multi-query associative recall.
# - **Yang, Wang, Shen, Panda, Kim 2023**, *Gated Linear Attention Transformers with
#   Hardware-Efficient Training*, arXiv:2312.06635: section 4, chunks, and blocks inside them.
# - **Yang, Wang, Zhang, Shen, Kim 2024**, *Parallelizing Linear Transformers with the Delta Rule
#   over Sequence Length*, arXiv:2406.06484: section 3, the WY form.
# - **Grazzi et al. 2024**, *Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues*,
#   arXiv:2411.12537: β up to 2.
# - **Yang, Kautz, Hatamizadeh 2024**, *Gated Delta Networks: Improving Mamba2 with Delta Rule*,
#   arXiv:2412.06464: section 3. In its last chunked formula read the mask with the decays for the
#   mask of ones (`NVlabs/GatedDeltaNet`, issue 15).
# - **Kimi Team 2025**, *Kimi Linear: An Expressive, Efficient Attention Architecture*,
#   arXiv:2510.26692: section 3, the decay of each channel.
# - In production: `fla-org/flash-linear-attention` (`fla/ops`, with a `naive.py` beside each
#   kernel), transformers' `qwen3_next` and `kimi_linear`. All scale q by $1/\sqrt{d_k}$ inside if
#   not told otherwise, and those of the delta rule can normalize q and k.
