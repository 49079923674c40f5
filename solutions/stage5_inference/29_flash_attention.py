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
#       Exact attention that never writes the S × S matrix: online softmax, tiling, and forward and
#       backward kernels in Triton behind one autograd function.
#     gpu: >-
#       The same kernels at full size: TFLOP/s, forward and backward, beside FlashAttention-2 and
#       cuDNN, the two kernels behind PyTorch's SDPA, for 1k to 32k tokens.
# ---

# %% [markdown]
# ## The problem: the matrix is not hard to compute, it is hard to carry
#
# One attention head takes `q`, `k`, `v`, each $(S, D)$, and returns
# $O = \mathrm{softmax}(QK^\top/\sqrt D)\,V$, again $(S, D)$. Written the usual way it makes two
# matrices on the way, the scores and the weights, each $(S, S)$. At $S = 8192$ and $D = 64$ the
# inputs and the output together hold 2.1 million numbers; the two matrices hold 134 million. They
# go out to the GPU's main memory (**HBM**) and come back: scores written, read by the softmax,
# weights written, read by the second product.
#
# An H100 computes 989 TFLOP/s in half precision on its tensor cores and moves 3.35 TB/s. So it can
# do 295 FLOPs in the time of moving one byte. Anything that does fewer per byte waits for memory.
# Count them: two products cost $4S^2D$ FLOPs, and moving two matrices out and back costs $4S^2$
# numbers of two bytes, so $4S^2D/8S^2 = D/2 = 32$ FLOPs per byte. The tensor cores idle nine tenths
# of the time. Fewer FLOPs would not help; **fewer bytes** would.
#
# The idea that solves it, **FlashAttention** (Dao et al. 2022): cut $Q$, $K$, $V$ into tiles that
# fit in the fast memory beside the arithmetic units (**SRAM**, about 200 KB for each of an H100's
# 132 streaming multiprocessors), finish everything about a tile there, and write only the output.
# The result is exact; no approximation is made.
#
# One thing stands in the way. A softmax needs the maximum and the sum of its whole row before it
# can produce its first value, and a tile holds only a piece of the row. The first third of this
# lesson removes that obstacle, the second cuts attention into tiles and counts what that saves, the
# third puts it on the hardware.

# %%
import contextlib
import itertools
import math
import time

import torch
import torch.nn.functional as F
from llm40 import checks, data, plot, profile, tl, triton
from llm40.kernels import autotuned
from torch import Tensor, nn

plt = plot.plt


# %% tags=["support"]
# Support: attention as the definition says, in float64
def brute_force(q, k, v, causal=False):
    """Attention as the definition says, in float64, for the checks: output and log-sum-exp.

    q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, k_len, head_dim). Causal means
    aligned to the end: the last query sees every key. A row that sees no key gives 0 and a
    log-sum-exp of -inf.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        q_len, k_len = scores.shape[-2:]
        seen = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None]) @ v, lse


def low_scores(v):
    """q, k, v of 16 columns where key j has the score -2³⁰ - 256 j, exactly, whatever the query."""
    q, k = torch.zeros_like(v), torch.zeros_like(v)
    q[..., 0] = -(2**16)
    k[..., 0] = 2**16 + torch.arange(v.shape[-2], device=v.device) / 64
    return q, k, v


def last_key_towers(q, k):
    """The last key's score is huge, but 0 for the last query, which alone may look at it."""
    q, k = q.abs(), k.clone()
    q[:, :, -1], k[:, :, -1] = 0, 1e30
    return q, k


# %% [markdown]
# ## Softmax in one pass
#
# A stable softmax of a row $x \in \mathbb R^n$ needs two numbers, $m = \max_j x_j$ and
# $\ell = \sum_j e^{x_j - m}$; then $\mathrm{softmax}(x)_j = e^{x_j - m}/\ell$. Subtracting $m$
# keeps every exponent at or below zero, so nothing overflows. Computed naively, $\ell$ can only
# start when $m$ is known: two passes over the row.
#
# Milakov and Gimelshein (2018) need one. Suppose the first part of the row gave $(m, \ell)$, and a
# block $b$ follows. Set $m' = \max(m, \max_j b_j)$. The old sum was taken relative to $m$; relative
# to $m'$ it is
#
# $$\sum_{j\ \text{old}} e^{x_j - m'} = \sum_{j\ \text{old}} e^{x_j - m}\, e^{m - m'}
# = \ell\, e^{m - m'}, \qquad\text{so}\qquad
# \ell' = \ell\, e^{m - m'} + \sum_j e^{b_j - m'} .$$
#
# One multiplication repairs everything summed so far, because $m$ enters every term as the same
# factor. This is **online softmax**. The factor $e^{m-m'}$ is at most 1, so the repair cannot
# overflow either.
#
# Masking makes one edge case. A masked score is $-\infty$. While everything seen so far is masked,
# $m' = -\infty$ and $m - m' = -\infty + \infty$ is NaN, although the right answer is clear: nothing
# has been summed. Subtract 0 in place of $m'$ there: $e^{-\infty - 0} = 0$.

# %% [markdown]
# ### Exercise · The running maximum and the running sum


# %% exercise="online_softmax" minutes=10 difficulty=1
def online_softmax(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The two numbers that make a softmax, from one pass over the last axis.

    x: (..., n) float32 or float64; entries may be -inf. block: how many columns are looked at
    together (the last block may be shorter). Returns (m, l), each (...), in x's dtype: m the
    maximum and l = Σ exp(x − m), so that softmax(x) = exp(x − m) / l; l keeps all its digits,
    however large |m| is. Where a row is -inf throughout, m = -inf and l = 0.

    No tensor of more than (..., block) elements is made, and x is not changed.
    """
    ### BEGIN SOLUTION
    m = x.new_full(x.shape[:-1], -math.inf)
    l = x.new_zeros(x.shape[:-1])
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        m_new = torch.maximum(m, part.amax(dim=-1))
        shift = m_new.masked_fill(m_new == -math.inf, 0)
        l = l * torch.exp(m - shift) + torch.exp(part - shift[..., None]).sum(dim=-1)
        m = m_new
    return m, l
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where do I start?</summary>
#
# With the statistics of an empty row: the maximum of nothing is −∞, the sum of nothing is 0. Then
# every block, the first too, takes the same step.
# </details>
#
# <details><summary>Hint: NaN</summary>
#
# Compute the shift once per block, `shift = m_new` with −∞ replaced by 0 (`masked_fill`), and use
# it in both exponents.
# </details>

# %% check="online_softmax" points=1
x = torch.tensor([[1.0, 3.0, 2.0, 5.0, 4.0]])
m, l = checks.parts(online_softmax(x, block=2), "m", "l", what="online_softmax")
stale = torch.exp(x[0, :2] - 3).sum() + torch.exp(x[0, 2:] - 5).sum()
checks.close(m, [5.0], what="the maximum m", dtype=torch.float32)
checks.close(
    l,
    torch.exp(x - 5).sum(-1),
    dtype=torch.float32,
    what="the sum l",
    hint="When the maximum rises from m to m', multiply l by exp(m − m').",
    mistakes={"keeping the old sum when the maximum rises": stale[None]},
)
checks.close(
    torch.exp(x - m[..., None]) / l[..., None], torch.softmax(x, -1), what="exp(x − m) / l"
)
### BEGIN HIDDEN TESTS
gen = checks.generator(1)
for n, block in [(1, 4), (17, 5), (64, 16), (33, 1), (20, 50)]:
    x = checks.randn(2, 3, n, generator=gen, scale=20.0)
    with checks.unchanged(x):
        m, l = online_softmax(x, block)
    exact = x.double()
    where = f"Row length {n}, block {block}."
    largest = exact.amax(-1, keepdim=True)
    checks.close(m, largest[..., 0], dtype=torch.float32, what="m", hint=where)
    expected = torch.exp(exact - largest).sum(-1)
    checks.close(l, expected, dtype=torch.float32, what="l", hint=where)
checks.keeps_dtype(
    lambda x: online_softmax(x, 8),
    checks.randn(4, 40, generator=gen),
    reference=lambda x: (x.amax(-1), torch.exp(x - x.amax(-1, keepdim=True)).sum(-1)),
    dtypes=(torch.float64, torch.float32),
    what="(m, l)",
)
x = checks.randn(4, 40, generator=gen, dtype=torch.float64)
results = [online_softmax(x, block)[1] for block in (1, 3, 8, 40)]
for l in results[1:]:
    checks.close(l, results[0], dtype=torch.float64, what="l with another block size")
### END HIDDEN TESTS

# %% check="online_softmax" points=1
x = torch.tensor([[-math.inf, -math.inf, 1.0, 2.0], [-math.inf] * 4])
m, l = online_softmax(x, block=2)
checks.close(m, [2.0, -math.inf], what="m of rows that begin with a masked block")
checks.close(
    l,
    [1 + math.exp(-1), 0.0],
    what="l of rows that begin with a masked block",
    hint="−inf − (−inf) is NaN: while the maximum is −inf, subtract 0.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(2)
x = checks.randn(50, 24, generator=gen, scale=20.0)
x[checks.randn(50, 24, generator=gen) > 0.3] = -math.inf
x[7] = -math.inf
x[:, :4][checks.randn(50, 4, generator=gen) > -1] = -math.inf
m, l = online_softmax(x, 4)
exact_m = x.double().amax(-1)
shift = exact_m.masked_fill(exact_m == -math.inf, 0)
checks.close(m, exact_m, what="m of masked rows")
checks.close(l, torch.exp(x.double() - shift[:, None]).sum(-1), what="l of masked rows")
for dtype, far in ((torch.float32, -(2.0**17)), (torch.float64, -(2.0**30))):  # far below zero
    m, l = online_softmax(torch.full((2, 5), far, dtype=dtype), 2)
    checks.close(m, torch.full((2,), far, dtype=dtype), what=f"m of a row of {far:g}")
    hint = "m + log(l) has no digits left for l here: carry m and l apart."
    checks.close(l, torch.full((2,), 5, dtype=dtype), what=f"l of a row of {far:g}", hint=hint)
x = checks.randn(2, 3, 4096, generator=gen).transpose(0, 1)  # no view as (6, 4096) exists
with checks.allocations() as made:
    m, _ = online_softmax(x, 32)
checks.close(m, x.amax(-1), what="m of a long row")
assert made.largest <= 6 * 32, (
    f"one of your tensors has {made.largest} elements; with 6 rows and a block of 32 the largest "
    f"may have 192: "
    "look at one block at a time, and only once"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Any split, any order
#
# Nothing ties the step above to going from left to right. Attention also needs the weighted sum of
# values, so carry a third quantity. A **partial result** over a set $A$ of keys, for one query with
# scores $x_j$ and values $v_j \in \mathbb R^D$, is
#
# $$m_A = \max_{j\in A} x_j, \qquad \ell_A = \sum_{j\in A} e^{x_j - m_A}, \qquad o_A = \sum_{j\in A} e^{x_j - m_A}\, v_j \in \mathbb R^D ,$$
#
# and the attention output over $A$ is $o_A/\ell_A$. Define the **merge** of two partial results:
#
# $$m = \max(m_A, m_B), \quad \ell = \ell_A e^{m_A - m} + \ell_B e^{m_B - m}, \quad o = o_A e^{m_A - m} + o_B e^{m_B - m}.$$
#
# **Claim.** Merge is commutative and associative, and $(-\infty, 0, 0)$ is its neutral element.
# **Proof.** Map a partial result to $\Phi(m, \ell, o) = (e^m \ell,\; e^m o)$. Multiply the merge's
# second and third equations by $e^m$: they read $\Phi(a \oplus b) = \Phi(a) + \Phi(b)$. Addition is
# commutative and associative, and so is the maximum. Both sides of
# $(a \oplus b) \oplus c = a \oplus (b \oplus c)$ therefore have the same $m$ and the same $\Phi$;
# for a finite $m$, $\Phi$ determines $\ell$ and $o$, since $e^m > 0$; for $m = -\infty$ the result
# is empty, and both are 0. The neutral element has $\Phi = 0$. ∎
#
# So keys may be cut anywhere, handled by different processors, and merged in any order.
# FlashAttention merges serially inside one program; Flash-Decoding (lesson 30) merges across
# programs; ring attention across machines. The same three lines each time. $\Phi$ is also the
# reason not to store $e^m\ell$ itself: it overflows, while $(m, \ell, o)$ is the same number with
# its exponent kept apart.
#
# ### Exercise · Merge


# %% exercise="merge_partials" minutes=5 difficulty=1
def merge_partials(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The partial result over two disjoint sets of keys, from those over each.

    a and b are (m, l, o), float32 or float64: m and l (...), o (..., head_dim) not yet divided by
    l. Either may be empty in some rows (m = -inf, l = 0, o = 0); merging two empty ones gives an
    empty one. Returns (m, l, o), l and o with all their digits, however large |m| is, and changes
    no input.
    """
    ### BEGIN SOLUTION
    (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
    m = torch.maximum(m_a, m_b)
    shift = m.masked_fill(m == -math.inf, 0)
    w_a, w_b = torch.exp(m_a - shift), torch.exp(m_b - shift)
    return m, l_a * w_a + l_b * w_b, o_a * w_a[..., None] + o_b * w_b[..., None]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: both empty</summary>
#
# The shift of [](#online_softmax) again: the larger maximum, and 0 where that is −∞.
# </details>

# %% check="merge_partials" points=1
# Two keys with scores 1 and 3, and values (1, 0) and (0, 1): each alone has l = 1.
a = (torch.tensor(1.0), torch.tensor(1.0), torch.tensor([1.0, 0.0]))
b = (torch.tensor(3.0), torch.tensor(1.0), torch.tensor([0.0, 1.0]))
m, l, o = merge_partials(a, b)
checks.close(m, 3.0, what="m")
checks.close(
    l,
    1 + math.exp(-2),
    what="l",
    mistakes={
        "adding the sums as they are": 2.0,
        "the factor exp(m − m_a) upside down": 1 + math.exp(2),
    },
)
checks.close(
    o / l,
    torch.softmax(torch.tensor([1.0, 3.0]), 0),
    what="o / l",
    hint="o takes the same factor as l.",
)


### BEGIN HIDDEN TESTS
def partial_of(scores, values):
    """By definition, in float64."""
    m = (
        scores.double().amax(-1)
        if scores.shape[-1]
        else scores.double().new_full(scores.shape[:-1], -math.inf)
    )
    weights = torch.exp(scores.double() - m.masked_fill(m == -math.inf, 0)[..., None])
    return m, weights.sum(-1), weights @ values.double()


gen = checks.generator(3)
for scale, far in ((1.0, 0.0), (60.0, 0.0), (1000.0, 0.0), (60.0, -(2.0**30))):
    # Scores that float32 holds too: near -2³⁰ they are multiples of 64.
    scores = (checks.randn(2, 3, 30, generator=gen, scale=scale) + far).double()
    values = checks.randn(2, 30, 5, generator=gen, dtype=torch.float64)
    scores[0, 1, :11] = -math.inf  # the first part of this row sees nothing
    scores[1, 2] = -math.inf  # this row sees nothing at all
    whole = partial_of(scores, values)
    parts = [
        partial_of(scores[..., i:j], values[:, i:j])
        for i, j in ((0, 11), (11, 12), (12, 12), (12, 30))
    ]
    orders = {
        "left to right": [0, 1, 2, 3],
        "right to left": [3, 2, 1, 0],
        "the empty part first": [2, 0, 3, 1],
    }
    for name, order in orders.items():
        merged = parts[order[0]]
        for i in order[1:]:
            with checks.unchanged(*merged, *parts[i]):
                merged = merge_partials(merged, parts[i])
        for actual, expected, what in zip(merged, whole, "mlo", strict=True):
            checks.close(
                actual,
                expected,
                what=f"{what} of four parts, {name}",
                hint=f"Scores of scale {scale:g} about {far:g}.",
            )
    short = [tuple(t.float() for t in part) for part in parts]
    with checks.unchanged(*short[0], *short[3]):
        merged = merge_partials(short[0], short[3])
    for actual, expected, what in zip(
        merged, merge_partials(parts[0], parts[3]), "mlo", strict=True
    ):
        checks.close(actual, expected, dtype=torch.float32, what=f"{what} of parts in float32")
    tree = merge_partials(merge_partials(parts[0], parts[3]), merge_partials(parts[2], parts[1]))
    for actual, expected, what in zip(tree, whole, "mlo", strict=True):
        checks.close(actual, expected, what=f"{what}, merged as a tree")
### END HIDDEN TESTS

# %% tags=["experiment"]
# One query over 96 keys whose scores drift upwards, so that the maximum keeps rising.
gen = checks.generator(4)
n, block = 96, 16
scores = torch.randn(n, generator=gen) * 1.5 + torch.linspace(-2, 4, n)
values = torch.stack([torch.sin(torch.arange(n) / 9), torch.cos(torch.arange(n) / 15)], dim=1)
exact = torch.softmax(scores, 0) @ values

state = (torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(2))
history = []
for start in range(0, n, block):
    part, part_values = scores[start : start + block], values[start : start + block]
    m, l = online_softmax(part, block)
    merged = merge_partials(state, (m, l, torch.exp(part - m) @ part_values))
    history.append((state[0], *merged))
    state = merged

# %% tags=["experiment", "figure"]
# Figure: how the sums so far shrink each time the maximum rises
fig, axes = plt.subplots(1, 3, figsize=(11, 3.1))
steps = range(1, len(history) + 1)
axes[0].bar(
    range(n),
    scores,
    width=1.0,
    color=[plot.COLORS[5] if (j // block) % 2 else "#b9d9ec" for j in range(n)],
)
axes[0].step(
    [block * (s - 1) for s in steps] + [n],
    [float(h[1]) for h in history] + [float(history[-1][1])],
    where="post",
    color=plot.COLORS[2],
    label="running maximum m",
)
axes[0].set(xlabel="key (shade: block of 16)", ylabel="score")
axes[0].set_title("scores and running maximum")
axes[0].legend(loc="lower right")
axes[1].bar(steps, [float(torch.exp(h[0] - h[1])) for h in history], color=plot.COLORS[1])
axes[1].set(xlabel="block", ylabel="factor exp(m − m′)", ylim=(0, 1.05))
axes[1].set_title("what is left of the old sum")
for i, name in enumerate(("first", "second")):
    axes[2].plot(
        steps, [float(h[3][i] / h[2]) for h in history], marker="o", label=f"{name} component"
    )
    axes[2].axhline(float(exact[i]), color="#888888", linewidth=1, linestyle=":")
axes[2].set(xlabel="block", ylabel="o / l")
axes[2].set_title("output so far (dotted: exact)")
axes[2].legend()
plot.caption(
    fig,
    "Each time the maximum rises, the old sum shrinks by exp(m − m′) and the new block counts for "
    "more. After the last block the estimate is the exact output; before it, the estimate is exact "
    "attention over the keys seen so far.",
)
plt.show()

# %% [markdown]
# ## Tiling
#
# Cut the queries into tiles of $B_q$ rows and the keys into tiles of $B_k$. One program owns one
# query tile. It keeps $q$ $(B_q, D)$, the running $m, \ell$ $(B_q)$ and the accumulator $o$
# $(B_q, D)$ on chip, and walks over the key tiles:
#
# 1. load $k$, $v$ $(B_k, D)$; compute $s = q k^\top/\sqrt D$, $(B_q, B_k)$, on chip;
# 2. one step of online softmax: $m' = \max(m, \mathrm{rowmax}(s))$, $p = e^{s - m'}$,
#    $\alpha = e^{m - m'}$;
# 3. $\ell \leftarrow \alpha\ell + \mathrm{rowsum}(p)$, and $o \leftarrow \alpha\, o + p\,v$.
#
# At the end write $o/\ell$, and the **log-sum-exp** $L = m + \ln \ell$, one number a row. With it
# the backward pass can make any weight again in one step, $p_{ij} = e^{s_{ij} - L_i}$: dividing by
# $\ell$ and subtracting $m$ at once. One division per row, at the end, is version 2's choice;
# version 1 divided after every tile.
#
# **Causal masks.** With $S_q$ queries and $S_k$ keys the last query sits at the last key (decoding
# with a cache needs that), so query $i$ sees key $j$ when $j \le i + S_k - S_q$. A query tile that
# starts at row $a$ has last row $a + B_q - 1$, so it visits keys
# $0 \dots \min(S_k,\; a + B_q + S_k - S_q) - 1$ and no more. With many tiles and
# $S_q = S_k$, half of them lie above the diagonal and are never touched: a factor of two in time.
# (The tempting bound "as many key tiles as my own index + 1" is right only for $B_q = B_k$ and
# $S_q = S_k$.)

# %% [markdown]
# ### Exercise · Tiled attention in PyTorch
#
# The whole algorithm, with PyTorch's operations on slices. It is slow in Python; its use is that
# you can print anything in it, and that the kernel later is the same lines.


# %% exercise="tiled_attention" minutes=25 difficulty=2
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Exact attention, one (block_q, block_k) tile of scores at a time.

    q: (batch, heads, q_len, head_dim); k, v: (batch, heads, k_len, head_dim). Scores are scaled by
        1/√head_dim. Lengths need not be multiples of the blocks.
    causal: query i sees keys j ≤ i + k_len − q_len.

    Returns (o, lse): o like q, and lse (batch, heads, q_len), the natural log-sum-exp of each row's
    scaled scores, float32 (float64 for float64 inputs). A row that sees no key gives o = 0 and lse
    = -inf. For half-precision inputs scores, weights, products and sums are float32.

    No tensor larger than q, k or a tile of scores is made; tiles that the causal mask hides whole
    are not visited.
    """
    ### BEGIN SOLUTION
    q_len, k_len, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    shift = k_len - q_len
    work = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=work, device=q.device)
    for i in range(0, q_len, block_q):
        q_tile = q[:, :, i : i + block_q].to(work) / math.sqrt(head_dim)
        rows = torch.arange(i, i + q_tile.shape[2], device=q.device)
        m = torch.full(q_tile.shape[:-1], -math.inf, dtype=work, device=q.device)
        l, acc = torch.zeros_like(m), torch.zeros_like(q_tile)
        end = min(k_len, i + q_tile.shape[2] + shift) if causal else k_len
        for j in range(0, end, block_k):
            k_tile, v_tile = k[:, :, j : j + block_k].to(work), v[:, :, j : j + block_k].to(work)
            s = q_tile @ k_tile.mT
            if causal:
                keys = torch.arange(j, j + k_tile.shape[2], device=q.device)
                s = s.masked_fill(keys > rows[:, None] + shift, -math.inf)
            m_new = torch.maximum(m, s.amax(dim=-1))
            base = m_new.masked_fill(m_new == -math.inf, 0)
            p = torch.exp(s - base[..., None])
            alpha = torch.exp(m - base)
            l = alpha * l + p.sum(dim=-1)
            acc = alpha[..., None] * acc + p @ v_tile
            m = m_new
        o[:, :, i : i + block_q] = acc / l.masked_fill(l == 0, 1)[..., None]
        lse[:, :, i : i + block_q] = m + torch.log(l)
    return o, lse
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the shape of the loops</summary>
#
# Outer loop over query tiles, inner loop over key tiles, all batches and heads at once: a slice is
# `q[:, :, i:i + block_q]`, and the scores of a tile are (batch, heads, block_q, block_k).
# </details>
#
# <details><summary>Hint: where does the inner loop end?</summary>
#
# The last row of the query tile is `min(i + block_q, q_len) − 1`. Which is the last key it sees?
# </details>
#
# <details><summary>Hint: rows that see nothing</summary>
#
# With more queries than keys the first rows see no key. They need the same care as in
# [](#online_softmax), and a division by l that is not 0/0.
# </details>

# %% check="tiled_attention" points=2
gen = checks.generator(5)
q, k, v = (checks.randn(1, 2, 12, 8, generator=gen) for _ in range(3))
o, lse = tiled_attention(q, k, v, block_q=4, block_k=4)
exact, exact_lse = brute_force(q, k, v)
no_scale, _ = brute_force(q * math.sqrt(8), k, v)
checks.close(o, exact, what="the output", mistakes={"leaving out the scale 1/√head_dim": no_scale})
checks.close(
    lse, exact_lse, what="lse", mistakes={"the logarithm in base 2": exact_lse / math.log(2)}
)
### BEGIN HIDDEN TESTS
gen = checks.generator(6)
for q_len, k_len, block_q, block_k in [
    (37, 53, 16, 8),
    (53, 37, 8, 16),
    (1, 20, 16, 16),
    (20, 1, 4, 4),
    (30, 30, 64, 7),
]:
    q = checks.randn(2, q_len, 3, 20, generator=gen).transpose(1, 2)  # not contiguous
    k, v = (checks.randn(2, 3, k_len, 20, generator=gen, scale=s) for s in (1.0, 3.0))
    with checks.forbidden("scaled_dot_product_attention"), checks.unchanged(q=q, k=k, v=v):
        o, lse = tiled_attention(q, k, v, block_q, block_k)
    exact, exact_lse = brute_force(q, k, v)
    where = f"{q_len} queries, {k_len} keys, tiles {block_q} × {block_k}."
    checks.relative_l2(o, exact, 2e-6, what="the output", hint=where)
    checks.close(lse, exact_lse, what="lse", hint=where)
wide = [checks.randn(1, 2, n, 16, generator=gen) for n in (24, 40, 40)]
for dtype, limit in ((torch.float16, 4e-4), (torch.bfloat16, 3e-3), (torch.float64, 1e-12)):
    q, k, v = (t.to(dtype) for t in wide)
    o, lse = tiled_attention(q, k, v, 8, 8)
    exact, exact_lse = brute_force(q, k, v)
    assert o.dtype == dtype, f"o has dtype {o.dtype} for inputs of {dtype}"
    hint = "Half precision is widened to float32, and rounded once at the end."
    checks.relative_l2(o, exact, limit, what=f"the output in {dtype}", hint=hint)
    kept = torch.promote_types(dtype, torch.float32)
    checks.close(lse, exact_lse, dtype=kept, what=f"lse of inputs in {dtype}", hint=hint)
    # Equal weights, and tiles of values near +300 and -300, whose sums cancel.
    v = 10 * v + torch.where(torch.arange(40, device=v.device)[:, None] // 8 % 2 == 0, 300, -300)
    v[:, :, 32:] -= 300
    o, _ = tiled_attention(0 * q, k, v, 8, 8)
    exact = brute_force(0 * q, k, v)[0]
    checks.relative_l2(o, exact, limit, what=f"o in {dtype}, tiles that cancel", hint=hint)
### END HIDDEN TESTS

# %% check="tiled_attention" points=2
gen = checks.generator(7)
q, k, v = (checks.randn(1, 1, n, 8, generator=gen) for n in (6, 10, 10))
o, _ = tiled_attention(q, k, v, block_q=4, block_k=2, causal=True)
seen = torch.ones(6, 10, dtype=torch.bool, device=q.device).tril(0)
from_the_start = torch.softmax((q @ k.mT / math.sqrt(8)).masked_fill(~seen, -math.inf), -1) @ v
checks.close(
    o,
    brute_force(q, k, v, causal=True)[0],
    what="causal attention of 6 queries over 10 keys",
    mistakes={
        "aligning the mask to the start (query 0 sees key 0 only)": from_the_start,
        "no causal mask": brute_force(q, k, v)[0],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(8)
for q_len, k_len, block_q, block_k in [
    (37, 37, 16, 4),
    (37, 37, 4, 16),
    (19, 50, 8, 8),
    (50, 19, 8, 16),
    (1, 33, 8, 8),
]:
    q, k, v = (checks.randn(2, 2, n, 12, generator=gen) for n in (q_len, k_len, k_len))
    o, lse = tiled_attention(q, k, v, block_q, block_k, causal=True)
    exact, exact_lse = brute_force(q, k, v, causal=True)
    where = f"Causal, {q_len} queries, {k_len} keys, tiles {block_q} × {block_k}."
    checks.relative_l2(o, exact, 2e-6, what="the output", hint=where)
    checks.close(lse, exact_lse, what="lse", hint=where)
for scale in (8.0, -1.0):  # scores up to ±60 and beyond; then all of them near −200
    if scale > 0:
        q, k = (checks.randn(1, 2, 40, 16, generator=gen, scale=s) for s in (scale, 2.0))
    else:
        q = torch.full((1, 2, 40, 16), -20.0, device=profile.device)
        k = checks.randn(1, 2, 40, 16, generator=gen, scale=0.05) + 2.5
    v = checks.randn(1, 2, 40, 16, generator=gen)
    o, lse = tiled_attention(q, k, v, 16, 8, causal=True)
    exact, exact_lse = brute_force(q, k, v, causal=True)
    checks.relative_l2(
        o, exact, 5e-5, what="the output", hint="Scores of wide range: carry the running maximum."
    )
    checks.close(lse, exact_lse, what="lse of a wide range of scores")
# Scores of +60 in the first key tile, -60 in the second.
q = torch.full((1, 1, 8, 16), 6.0, device=profile.device)
k, v = (checks.randn(1, 1, 32, 16, generator=gen, scale=s) for s in (0.05, 1.0))
k += torch.where(torch.arange(32, device=k.device)[:, None] < 16, 2.5, -2.5)
checks.relative_l2(
    tiled_attention(q, k, v, 8, 16)[0],
    brute_force(q, k, v)[0],
    5e-5,
    what="the output with one key tile at +60 and one at -60",
    hint="Is the running maximum the maximum of the old one and the tile's?",
)
# Exact scores of -2³⁰ and less: no finite number stands for -inf.
q, k, v = low_scores(checks.randn(1, 1, 24, 16, generator=gen))
o, lse = tiled_attention(q, k, v, 16, 8)
exact, exact_lse = brute_force(q, k, v)
checks.relative_l2(o, exact, 1e-2, what="the output of scores below -2³⁰")
checks.close(lse, exact_lse, what="lse of scores below -2³⁰")
# Hidden keys whose scores tower over those that are seen.
q, k, v = (checks.randn(1, 2, n, 16, generator=gen) for n in (20, 20, 20))
q, k = q.abs(), torch.where(torch.arange(20, device=k.device)[:, None] % 5 == 4, k.abs() * 200, k)
q[:, :, -1], k[:, :, -1] = 0, 1e30  # only the last query sees the last key, with a score of 0
o, lse = tiled_attention(q, k, v, 8, 5, causal=True)
exact, exact_lse = brute_force(q, k, v, causal=True)
hint = "A hidden key counts nothing, whatever its score: set it to -inf before the maximum."
checks.relative_l2(o, exact, 5e-5, what="the output where hidden keys have huge scores", hint=hint)
checks.close(lse, exact_lse, what="lse where hidden keys have huge scores", hint=hint)
### END HIDDEN TESTS

# %% check="tiled_attention" points=2
# Memory and work: never an S × S matrix, never a tile above the diagonal.
gen = checks.generator(9)
q, k, v = (checks.randn(1, 1, 64, 8, generator=gen) for _ in range(3))
with checks.allocations() as made:
    o, _ = tiled_attention(q, k, v, 16, 16)
checks.relative_l2(o, brute_force(q, k, v)[0], 2e-6, what="the output")
assert made.largest <= 64 * 8, (
    f"one of your tensors has {made.largest} elements; S × S is {64 * 64}, a tile of scores is "
    f"{16 * 16}"
)


### BEGIN HIDDEN TESTS
def visited_tiles(q_len, k_len, block_q, block_k):
    """How many tiles hold at least one pair that a causal query may look at, by enumeration."""
    seen = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
    return sum(
        bool(seen[i : i + block_q, j : j + block_k].any())
        for i in range(0, q_len, block_q)
        for j in range(0, k_len, block_k)
    )


for q_len, k_len, block_q, block_k, causal in [
    (64, 64, 16, 32, True),
    (64, 64, 32, 16, True),
    (32, 64, 16, 16, True),
    (128, 64, 64, 32, False),
]:
    gen = checks.generator(10)
    q, k, v = (checks.randn(2, 2, n, 8, generator=gen) for n in (q_len, k_len, k_len))
    with checks.allocations() as made, checks.flops() as counter:
        o, _ = tiled_attention(q, k, v, block_q, block_k, causal)
    checks.relative_l2(o, brute_force(q, k, v, causal)[0], 2e-6, what="the output")
    limit = 4 * max(block_q * block_k, q_len * 8, k_len * 8)
    assert made.largest <= limit, (
        f"one of your tensors has {made.largest} elements; the largest of q, k and a tile of "
        f"scores has {limit}"
    )
    every = (q_len // block_q) * (k_len // block_k)
    tiles = visited_tiles(q_len, k_len, block_q, block_k) if causal else every
    flops, needed = counter.total, 4 * 4 * block_q * block_k * 8 * tiles
    assert flops <= needed, (
        f"{flops} FLOPs in matrix products where {tiles} tiles need {needed}: "
        "does the loop over the keys end at the last key that this query tile sees?"
    )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: which tiles a query tile visits, in order, and how its output closes in
gen = checks.generator(11)
q, k, v = (checks.randn(1, 1, 96, 32, generator=gen) for _ in range(3))
block, owner = 16, 4  # the fifth query tile, rows 64 to 79
rows = slice(owner * block, (owner + 1) * block)
exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
exact = exact[:, :, rows]


def draw_tile(ax, row, column, **style):
    ax.add_patch(
        plt.Rectangle(
            (column * block, row * block),
            block,
            block,
            **({"edgecolor": "#999999", "linewidth": 0.6} | style),
        )
    )


fig, axes = plt.subplots(1, 6, figsize=(13.5, 2.7), width_ratios=[1, 1, 1, 1, 1, 1.15])
for frame, ax in enumerate(axes[:5]):
    for row in range(6):
        for column in range(row + 1):
            draw_tile(
                ax,
                row,
                column,
                facecolor="#e8e8e8" if column < row else "white",
                hatch="" if column < row else "////",
            )
    for column in range(frame):
        draw_tile(ax, owner, column, facecolor=plot.COLORS[5])
    draw_tile(
        ax,
        owner,
        frame,
        facecolor=plot.COLORS[1],
        edgecolor="black",
        linewidth=2,
        hatch="////" if frame == owner else "",
        zorder=3,
    )
    ax.set(
        xlim=(0, 96),
        ylim=(96, 0),
        aspect="equal",
        xticks=range(0, 97, 32),
        yticks=range(0, 97, 32),
        xlabel="key",
        ylabel="query" if frame == 0 else "",
    )
    ax.set_title(f"step {frame + 1}", fontsize=10)
    ax.grid(False)
errors = []
for j in range(1, owner + 2):  # your function, given only the keys of the first j tiles
    o, _ = tiled_attention(
        q[:, :, rows],
        k[:, :, : j * block],
        v[:, :, : j * block],
        block,
        block,
        causal=j == owner + 1,
    )
    errors.append(float((o - exact).norm() / exact.norm()))
axes[5].plot(range(1, owner + 2), errors, marker="o", color=plot.COLORS[0])
axes[5].annotate(
    f"{errors[-1]:.0e}",
    (owner + 1, errors[-1]),
    textcoords="offset points",
    xytext=(-16, 3),
    ha="right",
    fontsize=8,
)
axes[5].set(
    xlabel="step",
    ylabel="relative error of o / l",
    xticks=range(1, owner + 2),
    ylim=(0, None),
    box_aspect=1,
)
axes[5].set_title("output so far", fontsize=10)
plot.caption(
    fig,
    "One program's work, from left to right: query tile 4 (rows 64 to 79) meets key tiles 0 to 4 "
    "and stops; what lies to the right, above the diagonal, is never loaded. Orange is on chip "
    "now; of the blue tiles only (m, l, o) is left. Hatched tiles cross the diagonal and need a "
    "mask, one in each row of tiles. Far right: after each step o / l is exact attention over the "
    "keys seen so far, and only after the last one, to rounding, the output.",
)
plt.show()

# %% [markdown]
# ## How many bytes?
#
# Count what crosses between HBM and the chip for one head of length $S$, in numbers. The standard
# way, three operations one after another:
#
# | operation | read | written |
# |---|---|---|
# | scores $= QK^\top$ | $2SD$ | $S^2$ |
# | weights $=$ softmax(scores) | $S^2$ | $S^2$ |
# | $O =$ weights $V$ | $S^2 + SD$ | $SD$ |
#
# In all $4SD + 4S^2$: **Θ(S²)** when $S \gg D$. (This is kind to the standard way; a softmax that
# reads its row twice, a mask, a dropout add more.)
#
# The tiled way reads $Q$ once, writes $O$ once, and reads all of $K$ and $V$ once **for each query
# tile**: $2SD + 2SD\lceil S/B\rceil$ numbers, and $S$ log-sum-exps in float32. How large can the
# tile be? The chip must hold the query tile, the key tile, the value tile and the accumulator, each
# $B\times D$ (the small vectors aside, and the tile of scores in registers): with $M$ numbers of
# fast memory, $4BD \le M$, so $B = \lfloor M/4D\rfloor$. Put it in:
#
# $$2SD\cdot\frac{S}{B} = \frac{8 S^2 D^2}{M} = \Theta\!\left(\frac{S^2D^2}{M}\right).$$
#
# The same $S^2$; the gain is the factor $D^2/M$. With $D = 64$ and 100 KB, $M = 51{,}200$ numbers:
# $8 \cdot 64^2 / 51200 = 0.64$ against 4. Dao et al. prove that no exact algorithm does better for
# all $M$ between $D$ and $SD$. With a causal mask flash skips half of its reads of $K$ and $V$.
#
# ### Exercise · Count them


# %% exercise="hbm_bytes" minutes=10 difficulty=1
def hbm_bytes(S: int, D: int, M: int, kind: str) -> int:
    """Bytes that cross between HBM and the chip in one head's forward attention, in half precision
    (2 bytes a number).

    S: sequence length, of queries and of keys, not 0; D: head dimension; M: fast memory of one
    multiprocessor, in bytes. kind "standard": scores, softmax and output as three operations, each
    reading its inputs from and writing its output to HBM. kind "flash": square tiles of B rows, the
    largest B for which four (B, D) tiles fit in M, but at most S. Q is read once, K and V once for
    each query tile, O written once, and one float32 log-sum-exp (4 bytes) a row. Raises ValueError
    for another kind, and for "flash" where M cannot hold tiles of one row.
    """
    ### BEGIN SOLUTION
    if kind == "standard":
        return 2 * (4 * S * D + 4 * S * S)
    if kind == "flash":
        tile = min(S, M // (2 * 4 * D))
        if tile < 1:
            raise ValueError(f"{M} bytes cannot hold four tiles of one row of {D} numbers")
        query_tiles = -(-S // tile)
        return 2 * (2 * S * D + 2 * S * D * query_tiles) + 4 * S
    raise ValueError(f"kind is {kind!r}: it can be 'standard' or 'flash'")
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: units, and the last tile</summary>
#
# M is in bytes, the tiles are of two-byte numbers. The last query tile may be short; it still reads
# all of K and V.
# </details>

# %% check="hbm_bytes" points=1
# Eight rows of two numbers: Q, K, V and O hold 16 numbers each, a matrix of scores 64. 64 bytes
# hold four tiles of 4 rows.
checks.close(
    hbm_bytes(8, 2, 64, "standard"),
    2 * (4 * 16 + 4 * 64),
    what="the standard traffic",
    mistakes={
        "counting numbers, not bytes": 4 * 16 + 4 * 64,
        "forgetting that the softmax reads and writes": 2 * (4 * 16 + 2 * 64),
    },
)
checks.close(
    hbm_bytes(8, 2, 64, "flash"),
    2 * (16 + 2 * 2 * 16 + 16) + 4 * 8,
    what="flash's traffic: two query tiles, each reads K and V",
    mistakes={
        "reading K and V once": 2 * 4 * 16 + 32,
        "taking M for a number of elements": 2 * 4 * 16 + 32,
    },
)


### BEGIN HIDDEN TESTS
def count_standard(S, D):
    """What three operations of PyTorch read and write in half precision."""
    q, k, v = (torch.zeros(S, D, dtype=torch.float16) for _ in range(3))
    with checks.moved() as work:
        torch.softmax(q @ k.T, dim=-1) @ v
    return work.total


def count_flash(S, D, M):
    rows = next((b for b in range(S, 0, -1) if 4 * b * D * 2 <= M), None)
    total = 0
    for start in range(0, S, rows):
        q = torch.zeros(S, D)[start : start + rows]
        total += 2 * q.numel() * 2 + 4 * len(q)  # q in, o out, lse out
        for key_start in range(0, S, rows):
            total += 2 * torch.zeros(S, D)[key_start : key_start + rows].numel() * 2
    return total


for S, D, M in [
    (100, 16, 1000),
    (64, 8, 512),
    (37, 5, 10_000),
    (200, 32, 100_000),
    (129, 64, 16_384),
    (10, 4, 32),
]:
    checks.close(
        hbm_bytes(S, D, M, "standard"),
        count_standard(S, D),
        what=f"standard traffic for S={S}, D={D}",
    )
    checks.close(
        hbm_bytes(S, D, M, "flash"),
        count_flash(S, D, M),
        what=f"flash's traffic for S={S}, D={D}, M={M}",
    )
checks.raises(
    ValueError,
    hbm_bytes,
    8,
    64,
    511,
    "flash",
    because="511 bytes cannot hold four rows of 64 half-precision numbers.",
)
checks.raises(ValueError, hbm_bytes, 8, 64, 4096, "paged", because="There is no such kind.")
checks.close(
    hbm_bytes(8, 64, 511, "standard"), count_standard(8, 64), what="the standard way needs no tiles"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: does tiling always move less?
#
# Before you run the next cell, write down: with 100 KB of fast memory, how many times less does
# flash move at $S = 8192$ for $D = 64$, for $D = 128$ and for $D = 256$? And is there a head
# dimension at which it moves *more*?

# %% tags=["experiment", "figure"]
# Figure: how much less flash moves, by sequence length and by head dimension
lengths = [2**p for p in range(7, 17)]
M = 100 * 1024
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.6))
plot.curves(
    lengths,
    {
        "standard": [hbm_bytes(S, 64, M, "standard") / 1e6 for S in lengths],
        "flash, 50 KB": [hbm_bytes(S, 64, M // 2, "flash") / 1e6 for S in lengths],
        "flash, 100 KB": [hbm_bytes(S, 64, M, "flash") / 1e6 for S in lengths],
        "flash, 200 KB": [hbm_bytes(S, 64, 2 * M, "flash") / 1e6 for S in lengths],
    },
    xlabel="sequence length S (tokens)",
    ylabel="HBM traffic (MB per head)",
    title="traffic, D = 64",
    logx=True,
    logy=True,
    ax=axes[0],
)
dims = [32, 48, 64, 96, 128, 160, 192, 224, 256]
plot.curves(
    dims,
    {
        f"S = {S:,}": [hbm_bytes(S, D, M, "standard") / hbm_bytes(S, D, M, "flash") for D in dims]
        for S in (1024, 8192)
    },
    xlabel="head dimension D",
    ylabel="standard / flash",
    title="how many times less",
    ax=axes[1],
)
axes[1].axhline(1, color="#888888", linewidth=1, linestyle=":")
axes[1].set_yscale("log", base=2)
axes[1].set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["½", "1", "2", "4", "8", "16", "32"])
plot.caption(
    fig,
    "Left: both grow as S², so the lines are parallel once a head no longer fits in one tile; more "
    "fast memory shifts flash's line down. Right: the advantage falls as 1/D²; below the dotted "
    "line tiling moves more bytes than the S × S matrices would.",
)
plt.show()
for D in (64, 128, 256):
    print(
        f"S = 8192, D = {D:3}: standard moves "
        f"{hbm_bytes(8192, D, M, 'standard') / hbm_bytes(8192, D, M, 'flash'):4.1f} times flash's "
        f"bytes"
    )

# %% [markdown]
# **What came out.** The advantage is $4/(8D^2/M) = M/2D^2$, with $M$ in numbers: about 6 at
# $D = 64$, 1.6 at 128, and *below one* from $D \approx 160$ on. The theorem promises less traffic
# only while $D^2 \ll M$. Real kernels escape in two ways: their tiles need not be square (only the
# number of query tiles matters, so a tall query tile with thin key tiles halves the traffic), and
# most of the K and V reads of different query tiles hit the L2 cache, 50 MB on an H100. Still, it
# is why kernels for $D = 256$ are slower, and the memory for the matrices is saved at any $D$.
#
# The figure below counts that memory: the numbers that PyTorch's operations newly make, for the
# standard way and for your tiles. It needs no GPU to be true.


# %% tags=["experiment"]
def standard_attention(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


def median_seconds(function, *inputs, repeats=3):
    times = []
    for _ in range(repeats):
        profile.synchronize()
        began = time.perf_counter()
        function(*inputs)
        profile.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


lengths = [128, 256, 512, 1024, 2048]
largest = {"standard": [], "tiled, 128 × 128": []}
milliseconds = {"standard": [], "tiled, 128 × 128": []}
for S in lengths:
    gen = checks.generator(12)
    q, k, v = (checks.randn(1, 1, S, 64, generator=gen) for _ in range(3))
    for name, function in (
        ("standard", standard_attention),
        ("tiled, 128 × 128", lambda q, k, v: tiled_attention(q, k, v, 128, 128)),
    ):
        with checks.allocations() as made:
            function(q, k, v)
        largest[name].append(made.largest)
        milliseconds[name].append(median_seconds(function, q, k, v) * 1e3)

# %% tags=["experiment", "figure"]
# Figure: the largest tensor and the time, standard and tiled
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.4))
plot.curves(
    lengths,
    largest,
    xlabel="sequence length S (tokens)",
    ylabel="elements of the largest tensor",
    title="memory, counted",
    logx=True,
    logy=True,
    ax=axes[0],
)
plot.curves(
    lengths,
    milliseconds,
    xlabel="sequence length S (tokens)",
    ylabel="milliseconds (one head, median of 3)",
    title=f"time in PyTorch on this {'GPU' if profile.name == 'gpu' else 'CPU'}",
    logx=True,
    logy=True,
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: the standard way's largest tensor is S × S; the tiled one's is a tile of 128 × 128, "
    "then the output, S × 64. Right: from Python every tile pays for a dozen small operations, so "
    "short sequences lose; long ones may gain a little, once S × S leaves the cache. The full gain "
    "takes one kernel for the whole loop.",
)
plt.show()

# %% [markdown]
# ## How a Triton program looks
#
# The loop has to run inside **one** kernel, or the tiles travel to HBM between its operations. A
# Triton kernel is a Python function that describes one **program**: what one block of GPU threads
# does with one tile. A launch `kernel[grid](arguments)` starts the whole grid of programs, up to
# three axes; each finds its place with `tl.program_id(axis)`. Inside:
#
# - **Pointers and offsets.** A tensor argument arrives as the address of its first element; strides
#   are ordinary arguments. `ptr + offsets` with a tile of integers is a tile of addresses;
#   `tl.load` fetches them, `tl.store` writes them.
# - **Masks.** A tile's sides are powers of two, tensors' are not. Lanes outside must be masked, or
#   they read and overwrite whatever lies there; `other=` is what a masked lane reads.
# - **Compile-time constants** are marked `tl.constexpr`: tile sizes, flags. An `if` on one is
#   decided when the kernel is compiled, and `tl.static_range` is unrolled.
# - **`tl.dot(a, b, acc)`** runs on the tensor cores: `a @ b + acc`, both operands of one dtype,
#   accumulated in float32. Every side must be at least 16. For float32 operands
#   `input_precision="ieee"` asks for real float32; the default rounds them to TF32, ten bits of
#   mantissa.
# - **Types must not change in a loop**: a variable that goes round a run-time loop keeps its shape
#   and dtype.
#
# Three functions show all of it. `load_tile` is given to you and used in every kernel below;
# `load_row_numbers` is its little sister, for the backward pass.
# `delta_kernel` is a complete kernel: row by row the sum of $O\circ dO$, which the backward pass
# will need. Read both before you go on.


# %%
@triton.jit
def load_tile(
    ptr, start, n_rows, row_stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows start … start + ROWS of one head's (n_rows, HEAD_DIM) matrix, as a (ROWS, BLOCK_D) tile;
    0 outside the matrix.

    EDGE says that the tile may reach beyond n_rows; without it that mask, and its cost, are left
    out.
    """
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    # The 64-bit part is one number for the tile: 2³¹ elements are 524,288 tokens of 4,096. Offsets
    # inside a tile fit in 32 bits.
    ptrs = ptr + tl.cast(start, tl.int64) * row_stride + rows * row_stride + cols
    if EDGE:
        tile = tl.load(ptrs, mask=(start + rows < n_rows) & (cols < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:  # a head dimension of 80 in a tile of 128
        tile = tl.load(ptrs, mask=cols < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_row_numbers(ptr, start, n_rows, ROWS: tl.constexpr, EDGE: tl.constexpr):
    """Numbers start … start + ROWS of one head's (n_rows,), its lse or its delta. EDGE as above."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(ptr + rows, mask=rows < n_rows, other=0.0) if EDGE else tl.load(ptr + rows)


@triton.jit
def delta_kernel(
    o_ptr, do_ptr, delta_ptr, o_batch, o_head, o_row, do_batch, do_head, do_row, q_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """o, do: (batch, heads, q_len, HEAD_DIM); delta: (batch, heads, q_len), contiguous."""
    # Which tile of rows, of which head, of which batch element.
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_m = tile * BLOCK_M
    o_ptr += batch * o_batch + head * o_head
    do_ptr += batch * do_batch + head * do_head
    o = load_tile(o_ptr, start_m, q_len, o_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_ptr, start_m, q_len, do_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    # Half-precision products would round before the sum: float32 first.
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    # The last tile may hang over the end: its lanes beyond q_len would overwrite the next head.
    rows = start_m + tl.arange(0, BLOCK_M)
    delta_ptr += (batch * tl.num_programs(0) + head) * q_len
    tl.store(delta_ptr + rows, delta, mask=rows < q_len)


def tile_width(head_dim):
    """The power of two that holds a row, and at least the 16 that tl.dot asks for."""
    return max(16, triton.next_power_of_2(head_dim))


def rows_contiguous(*tensors):
    """The kernels take any strides but the last: an expanded gradient, for one, is copied."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def flash_delta(o, do):
    """delta = rowsum(o ∘ do), (batch, heads, q_len) float32."""
    o, do = rows_contiguous(o, do)
    batch, heads, q_len, head_dim = o.shape
    delta = torch.empty(batch, heads, q_len, dtype=torch.float32, device=o.device)
    strides = (*o.stride()[:3], *do.stride()[:3])
    grid = heads, triton.cdiv(q_len, 64), batch
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": tile_width(head_dim), "BLOCK_M": 64}
    delta_kernel[grid](o, do, delta, *strides, q_len, **shape)
    return delta


# %% tags=["experiment"]
# One launch, checked: 2 × 3 × ⌈70/64⌉ = 12 programs.
gen = checks.generator(13)
o, do = (checks.randn(2, 3, 70, 20, generator=gen) for _ in range(2))
with checks.launches() as launched:
    delta = flash_delta(o, do)
checks.close(delta, (o * do).sum(-1))
where = (
    "in the interpreter: NumPy, program by program"
    if profile.interpret
    else "compiled for this GPU"
)
print(f"{launched.count} launch, {launched.programs} programs; {where}")

# %% [markdown]
# On a machine without a GPU the same kernels run in Triton's **interpreter**, program by program in
# NumPy. That is enough to prove them right, and far too slow to measure. Two differences matter: it
# checks no bounds (nor does a GPU), and its bfloat16 is wrong, so the checks use float32 and
# float16, and bfloat16 on a GPU only.
#
# ## The forward kernel
#
# The lines of `tiled_attention`, and six things that make them fast:
#
# 1. **exp2, not exp.** The GPU's special function unit computes $2^x$; $e^x$ is a multiplication
#    and then $2^x$. Fold $\log_2 e$ into the scale once: with $c = \log_2 e/\sqrt D$,
#    $e^{s/\sqrt D - m} = 2^{cs - m\log_2 e}$. Keep $m$ in those units, take the row maximum of the
#    *raw* $s$, and $2^{cs - m}$ is one fused multiply-add and one exp2 an element. The log-sum-exp
#    comes out **in base 2**, $L_2 = m + \log_2\ell = L\log_2 e$; store that.
# 2. **Split the loop.** Only tiles on the causal diagonal, and the last ragged one, need a mask.
#    Run the loop twice: over full tiles without any mask, then over the edge with it. With
#    `for EDGE in tl.static_range(2)` around the loop its body is written once and compiled twice.
# 3. **`acc = tl.dot(p, v, acc)`** accumulates inside the tensor cores; `acc += tl.dot(p, v)` may
#    cost an addition.
# 4. **Heavy rows first.** Causal programs differ in work: the last query tile visits all keys, the
#    first one tile. Programs start, as a rule, in order of their id, the first axis of the grid
#    running fastest. So the heads are the first axis, and the tiles, turned round, the second: the
#    last tiles of all heads start first, and the short ones fill the gaps at the end. The few tiles
#    of a head that run at the same time walk over its keys together, and share them in the L2
#    cache.
# 5. **64-bit offsets** where a batch or a row is multiplied by its stride; `load_tile` does the
#    rows.
# 6. **Grouped heads by index**: query head `h` reads key-value head `h // group`. Nothing is
#    repeated in memory.
#
# The grid is (heads, query tiles, batch): thousands of independent programs. Version 1's grid was
# (heads, batch) only.
#
# ### Exercise · The forward kernel
#
# The launcher after it is given: it makes the outputs, passes the strides, and chooses the tile
# sizes. So are a program's pointers, masks and stores, where points 4 to 6 are dealt with. Write
# what lies between: the bounds of the two loops, and one step of online softmax in them.


# %% exercise="flash_forward_kernel" minutes=35 difficulty=3
@triton.jit
def flash_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row, group, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: o = softmax(scale · q kᵀ) v, and the log-sum-exp in base 2.

    q, o: (batch, heads, q_len, HEAD_DIM); k, v: (batch, heads / group, k_len, HEAD_DIM); one dtype,
        any strides (x_batch, x_head, x_row), each tensor its own; last axis contiguous.
    lse: (batch, heads, q_len) float32, contiguous: log2 Σ_j exp(scale · q·k_j).
    group: query head h reads key-value head h // group.
    CAUSAL: query i sees keys j ≤ i + k_len − q_len; a row that sees none gives o = 0, lse = -inf.

    Grid: (heads, ⌈q_len / BLOCK_M⌉, batch). BLOCK_M rows of queries, BLOCK_N of keys, powers of
    two, at least 16; BLOCK_D = tile_width(HEAD_DIM). Sums in float32, products of float32 without
    TF32. Each program loads what it needs once, and nothing outside the tensors; no key tile above
    the causal diagonal.
    """
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if CAUSAL:  # the heavy rows first
        tile = tl.num_programs(1) - 1 - tile
    start_m = tile * BLOCK_M
    rows, cols = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += batch * q_batch + head * q_head
    q = load_tile(q_ptr, start_m, q_len, q_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    # Grouped heads: consecutive query heads share one key-value head.
    k_ptr += batch * k_batch + (head // group) * k_head
    v_ptr += batch * v_batch + (head // group) * v_head

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # running maximum, in units of log2
    l = tl.zeros((BLOCK_M,), tl.float32)  # running sum
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # The loops over key tiles, which bring m, l and acc up to date:
    ### BEGIN SOLUTION
    # Keys before `full` are seen by every row of the tile; keys from `end` on by none.
    shift = k_len - q_len
    full, end = k_len, k_len
    if CAUSAL:
        full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
        end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
    full = full // BLOCK_N * BLOCK_N

    scale_log2 = scale * 1.4426950408889634  # log2(e): exp2 is the instruction, exp is not
    for EDGE in tl.static_range(2):  # first whole tiles without masks, then the edge with them
        if EDGE:
            lo, hi = full, end
        else:
            lo, hi = 0, full
        for start_n in range(lo, hi, BLOCK_N):
            k = load_tile(k_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if EDGE:
                keys = start_n + tl.arange(0, BLOCK_N)
                seen = keys[None, :] < k_len
                if CAUSAL:
                    seen = seen & (keys[None, :] <= rows[:, None] + shift)
                s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1) * scale_log2)
            base = m_new
            if EDGE:  # a row that has seen nothing yet: -inf - -inf is NaN
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * scale_log2 - base[:, None])  # one fused multiply-add, one exp2
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, axis=1)
            v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
    ### END SOLUTION

    # One division per row, here; rows that saw nothing have l = 0.
    some = l > 0
    l = tl.where(some, l, 1.0)
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    lse = tl.where(some, m + tl.log2(l), float("-inf"))
    o_ptr += batch * o_batch + head * o_head
    o_ptrs = o_ptr + rows[:, None].to(tl.int64) * o_row + cols[None, :]
    tl.store(o_ptrs, o, mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM))
    lse_ptr += (batch * tl.num_programs(0) + head) * q_len
    tl.store(lse_ptr + rows, lse, mask=rows < q_len)


# %% [markdown]
# <details><summary>Hint: the two bounds</summary>
#
# Let `shift = k_len − q_len`. Keys before `start_m + shift + 1` are seen by every row of the tile;
# keys from `start_m + BLOCK_M + shift` on by none. The first, rounded down to whole key tiles, ends
# the loop without masks; the second ends the other. Clamp both to 0 … k_len. Without `CAUSAL`, both
# are k_len before the rounding.
# </details>
#
# <details><summary>Hint: masks in the edge loop</summary>
#
# A key beyond `k_len` loads as 0, and a score of 0 is not "no key": set the score to −inf. Rows
# beyond q_len compute nonsense and are not stored.
# </details>
#
# <details><summary>Hint: a type error on a GPU that the interpreter does not show</summary>
#
# `p` is float32; `tl.dot` wants both operands alike: `p.to(v.dtype)`, which rounds the weights, as
# `tiled_attention` did not. m, l and acc start as float32 and stay so.
# </details>

# %%
# (BLOCK_M, BLOCK_N, warps, pipeline stages) to choose from. The autotuner measures them once for
# each head dimension and bucket of lengths, and keeps the fastest; what asks for more shared memory
# than there is, it leaves out. The interpreter takes the first.
CONFIGS = {
    "forward": [
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 2),
    ],
    "dq": [(128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
    "dkdv": [(64, 128, 8, 2), (64, 64, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2)],
}


def configurations(name):
    return tuple(
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in CONFIGS[name]
    )


TUNED = {name: configurations(name) for name in CONFIGS}


def launch(kernel, name, grid, q, k, *arguments, blocks=None, **constants):
    """Launch with the given tile sizes (BLOCK_M, BLOCK_N), or with the fastest of CONFIGS[name]."""
    if blocks is None and q.dtype == torch.float32 and not profile.interpret:
        blocks = 32, 32  # without tensor cores, large tiles do not fit in registers
    if blocks is None:
        # Lengths up to the same powers of two share a measurement: a new one each would cost more
        # than it gains when every batch has another length.
        lengths = tuple(triton.next_power_of_2(t.shape[2]) for t in (q, k))
        kernel = autotuned(kernel, TUNED[name], ("HEAD_DIM", "CAUSAL"), bucket=lengths)
        kernel[grid](q, k, *arguments, **constants)
    else:
        kernel[grid](q, k, *arguments, BLOCK_M=blocks[0], BLOCK_N=blocks[1], **constants)


def outer_strides(*tensors):
    """Batch, head and row stride of each tensor, one after the other."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def sizes(q, k):
    """What all kernels take after the strides: group, q_len, k_len, scale."""
    return q.shape[1] // k.shape[1], q.shape[2], k.shape[2], 1 / math.sqrt(q.shape[3])


def constants(q, causal):
    return {"HEAD_DIM": q.shape[3], "BLOCK_D": tile_width(q.shape[3]), "CAUSAL": causal}


def flash_forward(q, k, v, causal=False, blocks=None, out=None, lse=None):
    """(o, lse): o like q (batch, heads, q_len, head_dim), lse (batch, heads, q_len) in base 2; k, v
    may have fewer heads.
    """
    q, k, v = rows_contiguous(q, k, v)
    batch, heads, q_len, _ = q.shape
    o = torch.empty_like(q) if out is None else out
    if lse is None:
        lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    tensors, strides = (q, k, v, o, lse), outer_strides(q, k, v, o)

    def grid(meta):
        return heads, triton.cdiv(q_len, meta["BLOCK_M"]), batch

    kernel, known = flash_forward_kernel, constants(q, causal)
    launch(kernel, "forward", grid, *tensors, *strides, *sizes(q, k), blocks=blocks, **known)
    return o, lse


# %% tags=["support"]
# Support: the forward kernel among canaries, each tensor with strides of its own
# Half precision, and how many times float16's error it may have: bfloat16, which the interpreter
# computes wrongly, has three bits fewer.
HALVES = {torch.float16: 1} if profile.interpret else {torch.float16: 1, torch.bfloat16: 8}


def forward_among_canaries(q, k, v, causal=False, blocks=(16, 16)):
    """(o, lse) of flash_forward."""
    o, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device=q.device)
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    with checks.buffers(**tensors, written=("o", "lse"), contiguous=("lse",)) as held:
        flash_forward(held.q, held.k, held.v, causal, blocks, held.o, held.lse)
    return held.o.clone(), held.lse.clone()


def expect_loads(moved, due, what):
    """No more elements were loaded than there are to load (None: not counted on a GPU)."""
    assert moved is None or moved.loaded <= due, (
        f"{what}: {moved.loaded:,} elements are loaded, where {due:,} are enough: each tile once, "
        f"nothing beyond q_len, k_len and HEAD_DIM, no tile that the causal mask hides. Is a load "
        f"not masked?"
    )


# %% check="flash_forward_kernel" points=2
# One query tile and two key tiles of one head; the kernel also has to compile for a GPU.
gen = checks.generator(14)
q, k, v = (checks.randn(1, 1, n, 16, generator=gen) for n in (16, 32, 32))
with checks.launches() as launched, checks.compiled():
    o, lse = flash_forward(q, k, v, blocks=(16, 16))
exact, exact_lse = brute_force(q, k, v)
first_tile, _ = brute_force(q, k[:, :, :16], v[:, :, :16])
checks.relative_l2(
    o,
    exact,
    2e-6,
    what="o",
    mistakes={
        "looking at the first key tile only": first_tile,
        "leaving out the scale": brute_force(q * 4, k, v)[0],
        "exp2 without log2(e) in the scale": brute_force(q * math.log(2), k, v)[0],
    },
)
checks.relative_l2(
    lse,
    exact_lse / math.log(2),
    2e-6,
    what="lse",
    hint="In base 2: m + log2(l).",
    mistakes={"the natural logarithm": exact_lse},
)
assert launched.programs == 1, "one tile of 16 queries is one program"
### BEGIN HIDDEN TESTS
gen = checks.generator(15)
for heads, kv_heads, q_len, k_len, head_dim, blocks in [
    (4, 2, 21, 45, 24, (32, 16)),
    (2, 1, 20, 37, 16, (16, 32)),
    (3, 1, 1, 33, 40, (16, 16)),
]:
    # Ragged lengths, more than one batch, grouped heads.
    shapes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    q, k, v = (checks.randn(2, h, n, head_dim, generator=gen) for h, n in shapes)
    with (
        checks.launches() as launched,
        checks.forbidden("scaled_dot_product_attention", "softmax"),
    ):
        o, lse = forward_among_canaries(q, k, v, blocks=blocks)
    assert launched.kernels["flash_forward_kernel"] == 1, "the kernel was not launched"
    exact, exact_lse = brute_force(q, k, v)
    where = (
        f"{heads} heads on {kv_heads}, {q_len} queries, {k_len} keys, head_dim {head_dim}, tiles "
        f"{blocks}."
    )
    repeated = (t.repeat(1, heads // kv_heads, 1, 1) for t in (k, v))
    checks.relative_l2(
        o,
        exact,
        2e-6,
        what="o",
        hint=where,
        mistakes={"taking key-value head h % kv_heads": brute_force(q, *repeated)[0]},
    )
    checks.relative_l2(lse, exact_lse / math.log(2), 2e-6, what="lse", hint=where)
### END HIDDEN TESTS

# %% check="flash_forward_kernel" points=2
# Causal, with more keys than queries: the mask is aligned to the end.
gen = checks.generator(16)
q, k, v = (checks.randn(1, 1, n, 16, generator=gen) for n in (20, 40, 40))
with checks.compiled():
    o, lse = flash_forward(q, k, v, causal=True, blocks=(16, 16))
from_the_start = brute_force(q, k[:, :, :20], v[:, :, :20], causal=True)[0]
checks.relative_l2(
    o,
    brute_force(q, k, v, causal=True)[0],
    2e-6,
    what="o, causal",
    mistakes={
        "no causal mask": brute_force(q, k, v)[0],
        "aligning the mask to the start": from_the_start,
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(17)
for q_len, k_len, blocks in [
    (50, 50, (32, 16)),
    (40, 40, (16, 32)),
    (40, 41, (16, 16)),  # the last row of a query tile sees a key that begins a tile
    (19, 50, (16, 16)),
    (50, 19, (16, 16)),
]:
    shapes = ((2, q_len), (1, k_len), (1, k_len))
    q, k, v = (checks.randn(1, h, n, 16, generator=gen) for h, n in shapes)
    if k_len == 40:
        q, k = last_key_towers(q, k)
    o, lse = forward_among_canaries(q, k, v, causal=True, blocks=blocks)
    exact, exact_lse = brute_force(q, k, v, causal=True)
    where = f"Causal, {q_len} queries, {k_len} keys, BLOCK_M, BLOCK_N = {blocks}."
    checks.relative_l2(o, exact, 5e-6, what="o", hint=where)
    seeing = exact_lse.isfinite()
    checks.relative_l2(lse[seeing], exact_lse[seeing] / math.log(2), 2e-6, what="lse", hint=where)
    assert bool((lse[~seeing] == -math.inf).all()), "a row that sees no key has lse = -inf"
# Values above the first tile's diagonal are poisoned: a program that skips them never meets the
# poison, since 0 · NaN is NaN.
q, k, v = (checks.randn(1, 1, 64, 16, generator=gen) for _ in range(3))
v[:, :, 16:] = math.nan
o, _ = flash_forward(q, k, v, causal=True, blocks=(16, 16))
checks.relative_l2(
    o[:, :, :16],
    brute_force(q[:, :, :16], k[:, :, :16], v[:, :, :16], causal=True)[0],
    2e-6,
    what="the first query tile, with NaN in all values that it must not load",
    hint="Key tiles above the diagonal are not to be loaded: where does the loop end?",
)
### END HIDDEN TESTS

# %% check="flash_forward_kernel" points=2
# Scores from about -60 to 60: the running maximum has to carry from tile to tile.
gen = checks.generator(18)
q, k, v = (checks.randn(1, 2, 32, 16, generator=gen, scale=s) for s in (8.0, 2.0, 1.0))
with checks.compiled():
    o, lse = flash_forward(q, k, v, blocks=(32, 16))
checks.relative_l2(
    o,
    brute_force(q, k, v)[0],
    5e-5,
    what="o for scores of wide range",
    hint="Is every tile's maximum merged with the running one, and are l and acc rescaled by "
    "exp2(m_old − m_new)?",
)
### BEGIN HIDDEN TESTS
for spread, center in ((0.05, -200.0), (3.0, 0.0), (0.05, 200.0)):
    # All scores near -200 (their exponentials vanish without the right maximum, and a padded key's
    # 0 towers over them), wide, near +200.
    k = checks.randn(1, 2, 37, 16, generator=gen, scale=spread) + (2.5 if center else 0.0)
    q = checks.randn(1, 2, 20, 16, generator=gen, scale=8.0)
    q = torch.full_like(q, center / 10) if center else q
    v = checks.randn(1, 2, 37, 16, generator=gen)
    causal = center == 0
    o, lse = flash_forward(q, k, v, causal=causal, blocks=(32, 16))
    exact, exact_lse = brute_force(q, k, v, causal=causal)
    where = f"All scores near {center:g}, 37 keys in tiles of 16."
    checks.relative_l2(o, exact, 1e-4, what="o", hint=where)
    checks.relative_l2(lse, exact_lse / math.log(2), 2e-6, what="lse", hint=where)
q, k, v = low_scores(checks.randn(1, 1, 24, 16, generator=gen))
o, lse = flash_forward(q, k, v, blocks=(16, 16))
exact, exact_lse = brute_force(q, k, v)
checks.relative_l2(o, exact, 1e-2, what="o of scores below -2³⁰")
checks.relative_l2(lse, exact_lse / math.log(2), 2e-6, what="lse of scores below -2³⁰")
# Scores of +60 in the first key tile, -60 in the second: relative to the second's own maximum the
# first would overflow.
q = torch.full((1, 1, 16, 16), 6.0, device=profile.device)
k, v = (checks.randn(1, 1, 32, 16, generator=gen, scale=s) for s in (0.05, 1.0))
k += torch.where(torch.arange(32, device=k.device)[:, None] < 16, 2.5, -2.5)
checks.relative_l2(
    flash_forward(q, k, v, blocks=(16, 16))[0],
    brute_force(q, k, v)[0],
    5e-5,
    what="o with one key tile at +60 and one at -60",
    hint="Is the running maximum the maximum of the old one and the tile's?",
)
# Many small tiles and values with a mean: sums in half precision lose them.
q, k, v = (checks.randn(1, 1, n, 16, generator=gen) for n in (16, 400, 400))
v += 5
for dtype, limit in ((torch.float32, 2e-6), *((half, 4e-4 * n) for half, n in HALVES.items())):
    given = [t.to(dtype) for t in (q, k, v)]
    o, lse = flash_forward(*given, blocks=(16, 16))
    exact, exact_lse = brute_force(*given)
    assert o.dtype == dtype, f"o has dtype {o.dtype} for inputs in {dtype}"
    hint = "Sums are float32, whatever the inputs are."
    checks.relative_l2(o, exact, limit, what=f"o over 25 key tiles in {dtype}", hint=hint)
    checks.relative_l2(lse, exact_lse / math.log(2), 2e-6, what=f"lse in {dtype}", hint=hint)
### END HIDDEN TESTS

# %% check="flash_forward_kernel" points=2
# Each tensor has strides of its own here, and NaN between its rows and around it: nothing may be
# written or read there.
gen = checks.generator(19)
q, k, v = (checks.randn(1, 2, n, 20, generator=gen) for n in (19, 21, 21))
o, lse = forward_among_canaries(q, k, v)
checks.relative_l2(
    o,
    brute_force(q, k, v)[0],
    2e-6,
    what="o in padded buffers",
    hint="Rows are o_row apart, not HEAD_DIM or BLOCK_D; v has strides of its own.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(20)
for q_len, k_len, head_dim, causal in [(17, 30, 24, False), (33, 33, 9, True)]:
    q, k, v = (checks.randn(2, 2, n, head_dim, generator=gen) for n in (q_len, k_len, k_len))
    # The first check compiles the kernel without a causal mask.
    with checks.traffic() as moved, checks.compiled() if causal else contextlib.nullcontext():
        o, lse = forward_among_canaries(q, k, v, causal, (16, 32))
    exact, exact_lse = brute_force(q, k, v, causal=causal)
    checks.relative_l2(
        o,
        exact,
        2e-6,
        what="o, inputs and output in padded buffers",
        hint="Loads beyond a row or beyond the sequence meet NaN here: mask them.",
    )
    checks.relative_l2(lse, exact_lse / math.log(2), 2e-6, what="lse")
    # Of causal key tiles of 32, the first two query tiles visit one, the last both.
    visits = [30, 30] if not causal else [32, 32, 33]
    due = 4 * head_dim * (q_len + 2 * sum(visits))
    expect_loads(moved, due, f"{q_len} queries, {k_len} keys, causal: {causal}")
### END HIDDEN TESTS

# %% [markdown]
# ## Backward, without the matrix either
#
# Write $P = \mathrm{softmax}(S)$ row by row, with $S = QK^\top/\sqrt D$, $O = PV$, and let $dO$
# $(S_q, D)$ be the gradient that arrives. The two products give
#
# $$dV = P^\top dO \quad (S_k, D), \qquad dP = dO\,V^\top \quad (S_q, S_k).$$
#
# Through one row of the softmax: $p_j = e^{s_j - L}$ with $L = \ln\sum_k e^{s_k}$ and
# $\partial L/\partial s_k = p_k$, so $\partial p_j/\partial s_k = p_j(\delta_{jk} - p_k)$ (here
# $\delta_{jk}$ is Kronecker's), and
#
# $$ds_k = \sum_j dp_j\, p_j(\delta_{jk} - p_k) = p_k\Big(dp_k - \sum_j p_j\,dp_j\Big) .$$
#
# The sum runs over the whole row of keys: a second reduction that tiles do not have. But look at
# it:
#
# $$\sum_j p_j\, dp_j = \sum_j p_j \sum_d dO_{d} V_{jd} = \sum_d dO_{d} \sum_j p_j V_{jd} = \sum_d dO_{d}\, O_{d} .$$
#
# It is $\boldsymbol\delta = \mathrm{rowsum}(dO \circ O)$ $(S_q)$: one number per row, from two
# $(S_q, D)$ matrices that are there before the first tile. That is what `delta_kernel` computes.
# Then $dS = P\circ(dP - \delta)$ tile by tile, and since $S$ is $QK^\top$ times $1/\sqrt D$,
#
# $$dQ = dS\,K/\sqrt D, \qquad dK = dS^\top Q/\sqrt D .$$
#
# $P$ was never stored. It is made again, $p_{ij} = e^{s_{ij} - L_i}$, from $q$, $k$ and the
# log-sum-exp: 5 products per tile against the forward's 2, so the backward costs 2.5 times the
# forward. That is more FLOPs than storing $P$ would cost, and faster, since the bytes are what is
# scarce.
#
# ### Exercise · Backward in PyTorch


# %% exercise="attention_backward_tiled" minutes=20 difficulty=2
def attention_backward_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    block_q: int,
    block_k: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention for q, k and v, one (block_q, block_k) tile at a time.

    q, o, do: (batch, heads, q_len, head_dim); k, v: (batch, heads, k_len, head_dim); lse: (batch,
        heads, q_len), natural, as `tiled_attention` returns it (-inf for a row that saw no key: it
        has no gradient). float32 or float64.
    Scale 1/√head_dim and causal mask as there; a hidden key counts nothing, whatever its score.

    Returns (dq, dk, dv), like q, k, v. No tensor larger than q, k or a tile of scores is made;
    hidden tiles are not visited.
    """
    ### BEGIN SOLUTION
    q_len, k_len = q.shape[-2], k.shape[-2]
    shift, scale = k_len - q_len, 1 / math.sqrt(q.shape[-1])
    delta = (o * do).sum(dim=-1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, q_len, block_q):
        queries = slice(i, min(i + block_q, q_len))
        end = min(k_len, queries.stop + shift) if causal else k_len
        for j in range(0, end, block_k):
            keys = slice(j, min(j + block_k, k_len))
            s = q[:, :, queries] @ k[:, :, keys].mT * scale
            if causal:
                row = torch.arange(i, queries.stop, device=q.device)
                key = torch.arange(j, keys.stop, device=q.device)
                s = s.masked_fill(key > row[:, None] + shift, -math.inf)
            rows = lse[:, :, queries]
            p = torch.exp(s - rows.masked_fill(rows == -math.inf, 0)[..., None])
            dp = do[:, :, queries] @ v[:, :, keys].mT
            ds = p * (dp - delta[:, :, queries, None]) * scale
            dv[:, :, keys] += p.mT @ do[:, :, queries]
            dk[:, :, keys] += ds.mT @ q[:, :, queries]
            dq[:, :, queries] += ds @ k[:, :, keys]
    return dq, dk, dv
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where to add what</summary>
#
# Each tile gives a share of dq (to its queries), of dk and of dv (to its keys). Start all three as
# zeros and add into slices.
# </details>
#
# <details><summary>Hint: no maximum, no rescaling</summary>
#
# lse already knows the whole row: `p = exp(s − lse)` is the final weight. Only a row with lse = −∞
# needs the usual care.
# </details>


# %% tags=["support"]
# Support: exact gradients, by autograd in float64
def exact_gradients(q, k, v, do, causal=False):
    """By autograd through `brute_force`, in float64: (dq, dk, dv, o, lse, delta) for the checks."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    o, lse = brute_force(*leaves, causal=causal)
    dq, dk, dv = torch.autograd.grad(o, leaves, do.double())
    return dq, dk, dv, o.detach(), lse.detach(), (o.detach() * do.double()).sum(-1)


# %% check="attention_backward_tiled" points=2
gen = checks.generator(21)
q, k, v, do = (checks.randn(1, 1, 8, 4, generator=gen, dtype=torch.float64) for _ in range(4))
*expected, o, lse, delta = exact_gradients(q, k, v, do)
actual = attention_backward_tiled(q, k, v, o, lse, do, 4, 4)
p, dp = torch.exp(q @ k.mT / 2 - lse[..., None]), do @ v.mT
no_delta = p * dp / 2
ds = p * (dp - delta[..., None])
mistakes = [
    {
        "leaving out δ": no_delta @ k,
        "leaving out the scale": ds @ k,
        "applying the scale twice": ds @ k / 4,
    },
    {
        "leaving out δ": no_delta.mT @ q,
        "leaving out the scale": ds.mT @ q,
        "applying the scale twice": ds.mT @ q / 4,
    },
    {},
]
for name, a, e, usual in zip(("dq", "dk", "dv"), actual, expected, mistakes, strict=True):
    checks.close(a, e, what=name, mistakes=usual)
### BEGIN HIDDEN TESTS
gen = checks.generator(22)
for q_len, k_len, block_q, block_k, causal in [
    (21, 34, 8, 5, False),
    (34, 21, 5, 8, False),
    (1, 9, 4, 4, False),
    (9, 1, 4, 4, True),
]:
    q, k, v, do = (checks.randn(2, 3, n, 7, generator=gen) for n in (q_len, k_len, k_len, q_len))
    do = do.transpose(-1, -2).contiguous().transpose(-1, -2)
    *expected, o, lse, _ = exact_gradients(q, k, v, do, causal)
    o, lse = o.float(), lse.float()
    with (
        checks.unchanged(q, k, v, o, lse, do),
        checks.forbidden("scaled_dot_product_attention", "backward", "grad"),
    ):
        actual = attention_backward_tiled(q, k, v, o, lse, do, block_q, block_k, causal)
    for name, a, e in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        # One gradient of a lone key's softmax is exactly zero: measure against the size of the
        # terms it is a difference of.
        checks.close(
            a,
            e,
            what=name,
            rtol=1e-5,
            atol=1e-5,
            hint=f"{q_len} queries, {k_len} keys, tiles {block_q} × {block_k}.",
        )
### END HIDDEN TESTS

# %% check="attention_backward_tiled" points=2
gen = checks.generator(23)
q, k, v, do = (checks.randn(1, 1, n, 4, generator=gen, dtype=torch.float64) for n in (5, 8, 8, 5))
*expected, o, lse, _ = exact_gradients(q, k, v, do, causal=True)
for name, a, e in zip(
    ("dq", "dk", "dv"),
    attention_backward_tiled(q, k, v, o, lse, do, 2, 4, causal=True),
    expected,
    strict=True,
):
    checks.close(a, e, what=f"{name}, causal")
### BEGIN HIDDEN TESTS
gen = checks.generator(24)
for q_len, k_len, block_q, block_k, scale in [
    (37, 37, 16, 4, 1.0),
    (37, 37, 4, 16, 4.0),
    (16, 17, 8, 8, 1.0),
    (15, 40, 8, 8, 1.0),
    (40, 15, 8, 8, 1.0),
]:
    shapes = ((q_len, scale), (k_len, scale), (k_len, 1), (q_len, 1))
    q, k, v, do = (checks.randn(2, 2, n, 8, generator=gen, scale=s) for n, s in shapes)
    exact = exact_gradients(q, k, v, do, causal=True)
    given = (q, k, v, exact[3].float(), exact[4].float(), do)
    with checks.flops() as counter:
        actual = attention_backward_tiled(*given, block_q, block_k, causal=True)
    for name, a, e in zip(("dq", "dk", "dv"), actual, exact[:3], strict=True):
        checks.relative_l2(
            a,
            e,
            2e-5,
            what=name,
            hint=f"Causal, {q_len} queries, {k_len} keys, tiles {block_q} × {block_k}.",
        )
    seen = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
    tiles = [
        seen[i : i + block_q, j : j + block_k]
        for i in range(0, q_len, block_q)
        for j in range(0, k_len, block_k)
    ]
    pairs = sum(tile.numel() for tile in tiles if tile.any())
    # Less than one tile more, since δ may be a product too.
    needed, spare = (10 * 4 * 8 * n for n in (pairs, block_q * block_k))
    assert counter.total < needed + spare, (
        f"{counter.total} FLOPs in matrix products; five for each tile that is seen are {needed}: "
        "are hidden tiles visited?"
    )
# Hidden keys whose scores tower over those that are seen: their exponentials are infinite.
q, k, v, do = (checks.randn(1, 2, 20, 8, generator=gen) for _ in range(4))
k = torch.where(torch.arange(20, device=k.device)[:, None] % 5 == 4, 90.0, k)
q, k = last_key_towers(q, k)
do[:, :, -1] = 0
exact = exact_gradients(q, k, v, do, causal=True)
given = (q, k, v, exact[3].float(), exact[4].float(), do)
actual = attention_backward_tiled(*given, 8, 5, causal=True)
for name, a, e in zip(("dq", "dk", "dv"), actual, exact[:3], strict=True):
    hint = "A hidden key's weight is 0: set its score to -inf, since inf · 0 is NaN."
    checks.relative_l2(a, e, 1e-4, what=f"{name} where hidden scores are huge", hint=hint)
q, k, v, do = (checks.randn(1, 2, 256, 8, generator=gen) for _ in range(4))
exact = exact_gradients(q, k, v, do)
with checks.allocations() as made:
    actual = attention_backward_tiled(q, k, v, exact[3].float(), exact[4].float(), do, 32, 16)
for name, a, e in zip(("dq", "dk", "dv"), actual, exact[:3], strict=True):
    checks.relative_l2(a, e, 5e-6, what=name)
assert made.largest <= 2 * 256 * 8, (
    f"one of your tensors has {made.largest} elements; q has {2 * 256 * 8}, S × S would be "
    f"{2 * 256 * 256}"
)
### END HIDDEN TESTS

# %% [markdown]
# ## Two backward kernels
#
# $dQ$ sums over keys, $dK$ and $dV$ over queries. One program cannot own both sums.
# FlashAttention-2 lets a program own a key tile and adds its share of $dQ$ with atomic operations:
# five products a tile, but sums whose order, and so whose last bits, change from run to run. We
# take two kernels, each owning what it writes: $s$ and $dP$ are computed twice, seven products in
# place of five, and every run gives the same bits. The second kernel, for $dK$ and $dV$, owns a
# **key** tile and walks over the queries that see it.
#
# Three details:
#
# - The stored log-sum-exp is in base 2, so $p = 2^{cs - L_2}$ with the same $c = \log_2 e/\sqrt D$.
#   Mixing bases is the classic silent error.
# - Multiply by $1/\sqrt D$ once, on the finished sum: $B \times D$ multiplications, not
#   $B_q \times B_k$ per tile.
# - **Keys not to be seen.** Rows beyond the end load as 0, so their products add nothing, unless
#   $p$ overflows: a padded key's score is 0, and $2^{0 - L_2}$ is infinite when the row's real
#   scores are all low ($L < -89$). So is $p$ of a key above the diagonal with a huge score. Then
#   $\infty \cdot 0$ is NaN. Choose with `where`; trust neither the zero nor a product with a mask.
#   (In the kernel of dk and dv a padded key's $p$ reaches only its own rows, which are not stored.)
#
# ### Exercise · dq


# %% exercise="flash_dq_kernel" minutes=10 difficulty=3
@triton.jit
def flash_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    group, q_len, k_len, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile of one head of dq = scale · (p ∘ (do vᵀ − delta)) k, with p made again from
    lse.

    q, do, dq: (batch, heads, q_len, HEAD_DIM); k, v: (batch, heads / group, k_len, HEAD_DIM); lse
    (base 2) and delta: (batch, heads, q_len) float32, contiguous. Masks, strides, grouping, grid,
    formats and loads as in `flash_forward_kernel`. A row that sees no key (lse = -inf) has dq = 0.
    """
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if CAUSAL:  # the heavy rows first
        tile = tl.num_programs(1) - 1 - tile
    start_m = tile * BLOCK_M
    rows, cols = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += batch * q_batch + head * q_head
    q = load_tile(q_ptr, start_m, q_len, q_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    do_ptr += batch * do_batch + head * do_head
    do = load_tile(do_ptr, start_m, q_len, do_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    row_offset = (batch * tl.num_programs(0) + head) * q_len
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
    delta = tl.load(delta_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
    k_ptr += batch * k_batch + (head // group) * k_head
    v_ptr += batch * v_batch + (head // group) * v_head

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # The loops over key tiles, which add up dq, not scaled yet:
    ### BEGIN SOLUTION
    shift = k_len - q_len
    full, end = k_len, k_len
    if CAUSAL:
        full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
        end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
    full = full // BLOCK_N * BLOCK_N

    scale_log2 = scale * 1.4426950408889634
    for EDGE in tl.static_range(2):
        if EDGE:
            lo, hi = full, end
        else:
            lo, hi = 0, full
        for start_n in range(lo, hi, BLOCK_N):
            k = load_tile(k_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
            if EDGE:  # a padded key's score of 0 would overflow where lse is very negative
                keys = start_n + tl.arange(0, BLOCK_N)
                seen = keys[None, :] < k_len
                if CAUSAL:
                    seen = seen & (keys[None, :] <= rows[:, None] + shift)
                s = tl.where(seen, s, float("-inf"))
            p = tl.exp2(s)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    ### END SOLUTION

    # The scale once, on the sum.
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    dq_ptr += batch * dq_batch + head * dq_head
    dq_ptrs = dq_ptr + rows[:, None].to(tl.int64) * dq_row + cols[None, :]
    tl.store(dq_ptrs, dq, mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM))


# %% [markdown]
# <details><summary>Hint: the same loops</summary>
#
# The same two bounds and the same two loops as in the forward kernel, without m, l and rescaling.
# `lse` is known before the first tile, so `p` is final as soon as it is computed. Where a row sees
# no key, lse is −inf, and a score of −inf less that is NaN: mask after the subtraction.
# </details>


# %%
def flash_dq(q, k, v, do, lse, delta, causal=False, blocks=None, out=None):
    """dq like q; lse (base 2) and delta (batch, heads, q_len) float32."""
    q, k, v, do = rows_contiguous(q, k, v, do)
    batch, heads, q_len, _ = q.shape
    dq = torch.empty_like(q) if out is None else out
    tensors = (q, k, v, do, lse.contiguous(), delta.contiguous(), dq)
    strides, known = outer_strides(q, k, v, do, dq), constants(q, causal)

    def grid(meta):
        return heads, triton.cdiv(q_len, meta["BLOCK_M"]), batch

    launch(flash_dq_kernel, "dq", grid, *tensors, *strides, *sizes(q, k), blocks=blocks, **known)
    return dq


# %% tags=["support"]
# Support: what the backward kernels are given, the exact gradients, and the kernels among canaries
def kernel_inputs(q, k, v, do, causal=False):
    """lse in base 2 and delta, in float32, and the exact gradients (dq, dk, dv), from float64."""
    *gradients, _, lse, delta = exact_gradients(q, k, v, do, causal)
    return (lse / math.log(2)).float(), delta.float(), gradients


def dq_among_canaries(q, k, v, do, lse, delta, causal=False, blocks=(16, 16)):
    """dq of flash_dq, each tensor with strides of its own."""
    tensors = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}
    tensors["dq"] = torch.full_like(q, math.nan)
    with checks.buffers(**tensors, written=("dq",), contiguous=("lse", "delta")) as held:
        flash_dq(held.q, held.k, held.v, held.do, held.lse, held.delta, causal, blocks, held.dq)
    return held.dq.clone()


def dkdv_among_canaries(q, k, v, do, lse, delta, causal=False, blocks=(16, 16)):
    """(dk, dv) of flash_dkdv, each tensor with strides of its own."""
    tensors = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}
    tensors |= {"dk": torch.full_like(k, math.nan), "dv": torch.full_like(v, math.nan)}
    with checks.buffers(**tensors, written=("dk", "dv"), contiguous=("lse", "delta")) as held:
        given = (held.q, held.k, held.v, held.do, held.lse, held.delta)
        flash_dkdv(*given, causal, blocks, (held.dk, held.dv))
    return held.dk.clone(), held.dv.clone()


# %% check="flash_dq_kernel" points=2
gen = checks.generator(25)
q, k, v, do = (checks.randn(1, 1, n, 16, generator=gen) for n in (16, 32, 32, 16))
lse, delta, (expected, _, _) = kernel_inputs(q, k, v, do)
with checks.launches() as launched, checks.compiled():
    dq = flash_dq(q, k, v, do, lse, delta, blocks=(16, 16))
s = (q @ k.mT / 4).double()
p, dp = torch.exp2(s / math.log(2) - lse[..., None]), (do @ v.mT).double()
ds = p * (dp - delta[..., None])
base_e = torch.exp(s - lse[..., None]) * (dp - delta[..., None])
checks.relative_l2(
    dq,
    expected,
    5e-6,
    what="dq",
    mistakes={
        "leaving out δ": (p * dp) @ k.double() / 4,
        "leaving out the scale": ds @ k.double(),
        "the scale twice": ds @ k.double() / 16,
        "taking the base-2 lse for a natural one": base_e @ k.double() / 4,
    },
)
assert launched.programs == 1, "one tile of 16 queries is one program"
### BEGIN HIDDEN TESTS
gen = checks.generator(26)
for q_len, k_len, head_dim, blocks, causal in [
    (21, 37, 24, (32, 16), False),
    (50, 50, 16, (32, 16), True),
    (40, 40, 16, (16, 32), True),
    (40, 41, 16, (16, 16), True),  # the last row of a query tile sees a key that begins a tile
    (19, 40, 20, (16, 16), True),
    (40, 19, 16, (16, 16), True),
]:
    batch, heads, kv_heads = (2, 4, 2) if not causal else (1, 2, 1)
    q, do = (checks.randn(batch, heads, q_len, head_dim, generator=gen) for _ in range(2))
    k, v = (checks.randn(batch, kv_heads, k_len, head_dim, generator=gen) for _ in range(2))
    if k_len == 50:
        q, k = last_key_towers(q, k)
        do[:, :, -1] = 0
    lse, delta, (expected, _, _) = kernel_inputs(q, k, v, do, causal)
    with checks.launches() as launched:
        dq = dq_among_canaries(q, k, v, do, lse, delta, causal, blocks)
    assert launched.kernels["flash_dq_kernel"] == 1, "the kernel was not launched"
    where = (
        f"{heads} heads on {kv_heads}, {q_len} queries, {k_len} keys, tiles {blocks}, causal: "
        f"{causal}."
    )
    checks.relative_l2(dq, expected, 3e-6, what="dq", hint=where)
for (dtype, coarser), (wide, n) in itertools.product(HALVES.items(), ((1, 800), (16, 16))):
    half = [checks.randn(1, 1, rows, 16, generator=gen) for rows in (16, n, n, 16)]
    half = [(t * size).to(dtype) for t, size in zip(half, (wide, 1, 1, 1), strict=True)]
    lse, delta, (expected, _, _) = kernel_inputs(*half)
    dq = flash_dq(*half, lse, delta, blocks=(16, 16))
    assert dq.dtype == dtype, f"dq has dtype {dq.dtype} for inputs in {dtype}"
    hint = "Scores and sums are float32."
    checks.relative_l2(dq, expected, 1e-3 * coarser, what=f"dq in {dtype}", hint=hint)
### END HIDDEN TESTS

# %% check="flash_dq_kernel" points=1
# A ragged head among canaries, and scores near -200, where a padded key would overflow.
gen = checks.generator(27)
q = torch.full((1, 2, 17, 20), -200 / (2.5 * math.sqrt(20)), device=profile.device)
k = checks.randn(1, 2, 21, 20, generator=gen, scale=0.05) + 2.5
v, do = checks.randn(1, 2, 21, 20, generator=gen), checks.randn(1, 2, 17, 20, generator=gen)
lse, delta, (expected, _, _) = kernel_inputs(q, k, v, do)
dq = dq_among_canaries(q, k, v, do, lse, delta)
assert bool(dq.isfinite().all()), (
    "dq has values that are not finite: is p masked beyond the last key?"
)
### BEGIN HIDDEN TESTS
# lse near -288 in float32 leaves p six digits, and k's mean of 2.5 cancels in ds k: twenty times
# more than its spread of 0.05.
checks.relative_l2(dq, expected, 2e-3, what="dq for scores near -200")
q, k, v, do = (checks.randn(2, 1, n, 9, generator=gen) for n in (18, 33, 33, 18))
for causal in (False, True):
    lse, delta, (expected, _, _) = kernel_inputs(q, k, v, do, causal)
    # The first check compiles the kernel without a causal mask.
    with checks.traffic() as moved, checks.compiled() if causal else contextlib.nullcontext():
        dq = dq_among_canaries(q, k, v, do, lse, delta, causal, (16, 32))
    checks.relative_l2(dq, expected, 3e-6, what="dq, everything in padded buffers")
    # Of causal key tiles of 32, the first query tile visits one, the second both.
    visits = [33, 33] if not causal else [32, 33]
    due = 2 * (18 * (2 * 9 + 2) + sum(visits) * 2 * 9)
    expect_loads(moved, due, f"18 queries, 33 keys, causal: {causal}")
# Values above the first tile's diagonal are poisoned.
q, k, v, do = (checks.randn(1, 1, 48, 16, generator=gen) for _ in range(4))
lse, delta, (expected, _, _) = kernel_inputs(q, k, v, do, causal=True)
v[:, :, 16:] = math.nan
dq = flash_dq(q, k, v, do, lse, delta, causal=True, blocks=(16, 16))
checks.relative_l2(
    dq[:, :, :16],
    expected[:, :, :16],
    3e-6,
    what="dq of the first query tile, with NaN in all values that it must not load",
)
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · dk and dv
#
# A program owns BLOCK_N keys of one **key-value** head, and adds up over all query heads of the
# group: with grouped heads the gradient of a shared key is the sum over those who share it. Inside
# a program that sum costs nothing; forgetting it leaves the gradient of one head.
#
# Work with the transposed tile, $p^\top = 2^{c\,k q^\top - L_2}$, $(B_k, B_q)$: then both sums,
# $dV \mathrel{+}= p^\top dO$ and $dK \mathrel{+}= dS^\top q$, are dots without a transposition of
# what was just computed.


# %% exercise="flash_dkdv_kernel" minutes=20 difficulty=3
@triton.jit
def flash_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_batch, q_head, q_row,
    k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row, dk_batch,
    dk_head, dk_row, dv_batch, dv_head, dv_row, group, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One key tile of one key-value head: dv = pᵀ do and dk = scale · dsᵀ q, summed over the
    group's query heads.

    q, do: (batch, heads, q_len, HEAD_DIM); k, v, dk, dv: (batch, heads / group, k_len, HEAD_DIM);
        lse (base 2) and delta: (batch, heads, q_len) float32, contiguous. Strides and formats as
        above.
    Grid: (heads / group, ⌈k_len / BLOCK_N⌉, batch). A row that sees no key (lse = -inf) adds 0.

    Each program loads what it needs once, and nothing outside the tensors; no query tile above the
    causal diagonal.
    """
    kv_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_n = tile * BLOCK_N  # the first key tiles are the heavy ones: they come first already
    keys, cols = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_ptr += batch * k_batch + kv_head * k_head
    k = load_tile(k_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_ptr += batch * v_batch + kv_head * v_head
    v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    # From here head h is h · q_head, h · do_head, or h · q_len numbers of lse and delta, away.
    q_ptr += batch * q_batch
    do_ptr += batch * do_batch
    lse_ptr += batch * tl.num_programs(0) * group * q_len
    delta_ptr += batch * tl.num_programs(0) * group * q_len

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # The loops over the group's heads and their query tiles, which add up dv, and dk, not scaled:
    ### BEGIN SOLUTION
    # Queries before `first` see nothing of this tile; from `full` on they see all of it, and from
    # `tail` on a tile of queries is ragged.
    shift = k_len - q_len
    first, full = 0, 0
    if CAUSAL:
        first = tl.minimum(tl.maximum(start_n - shift, 0), q_len) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
        full = tl.minimum(full, tl.cdiv(q_len, BLOCK_M) * BLOCK_M)
    tail = tl.maximum(full, q_len // BLOCK_M * BLOCK_M)

    scale_log2 = scale * 1.4426950408889634
    for head in range(kv_head * group, kv_head * group + group):  # everyone who shares these keys
        head_q, head_do = q_ptr + head * q_head, do_ptr + head * do_head
        head_lse, head_delta = lse_ptr + head * q_len, delta_ptr + head * q_len
        for PART in tl.static_range(3):  # the diagonal, whole tiles without any mask, the tail
            if PART == 0:
                lo, hi = first, full
            elif PART == 1:
                lo, hi = full, tail
            else:
                lo, hi = tail, q_len
            for start_m in range(lo, hi, BLOCK_M):
                q = load_tile(head_q, start_m, q_len, q_row, BLOCK_M, HEAD_DIM, BLOCK_D, PART != 1)
                do = load_tile(
                    head_do, start_m, q_len, do_row, BLOCK_M, HEAD_DIM, BLOCK_D, PART != 1
                )
                lse = load_row_numbers(head_lse, start_m, q_len, BLOCK_M, PART != 1)
                delta = load_row_numbers(head_delta, start_m, q_len, BLOCK_M, PART != 1)
                st = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :]
                if PART == 0:  # also hides rows that see nothing, whose lse is -inf
                    rows = start_m + tl.arange(0, BLOCK_M)
                    st = tl.where(keys[:, None] <= rows[None, :] + shift, st, float("-inf"))
                pt = tl.exp2(st)
                dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
                dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
                dst = pt * (dpt - delta[None, :])
                dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
    ### END SOLUTION

    inside = (keys[:, None] < k_len) & (cols[None, :] < HEAD_DIM)
    wide = keys[:, None].to(tl.int64)
    dk_ptr += batch * dk_batch + kv_head * dk_head
    dv_ptr += batch * dv_batch + kv_head * dv_head
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + wide * dk_row + cols[None, :], dk, mask=inside)
    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + wide * dv_row + cols[None, :], dv, mask=inside)


# %% [markdown]
# <details><summary>Hint: which queries see this key tile?</summary>
#
# Query i sees key j when i ≥ j − shift. The first query that sees any key of the tile is `start_n −
# shift`; from `start_n + BLOCK_N − 1 − shift` on, queries see all of it. Round the first down and
# the second up to whole query tiles; clamp to 0 … q_len. Here the diagonal comes first.
# </details>
#
# <details><summary>Hint: the last query tile</summary>
#
# Load queries with `EDGE=True` in both loops, and all is right: rows that loaded as zeros add zero,
# with lse loaded as 0 too. For speed, whole tiles then get a loop of their own without that mask.
# </details>


# %%
def flash_dkdv(q, k, v, do, lse, delta, causal=False, blocks=None, out=None):
    """(dk, dv) like k and v; lse (base 2) and delta (batch, heads, q_len) float32. `out` is a pair
    of tensors to fill.
    """
    q, k, v, do = rows_contiguous(q, k, v, do)
    batch, kv_heads, k_len, _ = k.shape
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if out is None else out
    tensors = (q, k, v, do, lse.contiguous(), delta.contiguous(), dk, dv)
    strides, known = outer_strides(q, k, v, do, dk, dv), constants(q, causal)

    def grid(meta):
        return kv_heads, triton.cdiv(k_len, meta["BLOCK_N"]), batch

    kernel = flash_dkdv_kernel
    launch(kernel, "dkdv", grid, *tensors, *strides, *sizes(q, k), blocks=blocks, **known)
    return dk, dv


def flash_backward(q, k, v, o, lse, do, causal=False, blocks=None):
    """(dq, dk, dv) from what the forward pass saved; lse in base 2. Three launches."""
    given = (q, k, v, do, lse, flash_delta(o, do), causal, blocks)
    return flash_dq(*given), *flash_dkdv(*given)


# %% check="flash_dkdv_kernel" points=2
# Two query heads share one key-value head: its gradient is the sum of both.
gen = checks.generator(28)
shapes = ((2, 32), (1, 16), (1, 16), (2, 32))
q, k, v, do = (checks.randn(1, h, n, 16, generator=gen) for h, n in shapes)
lse, delta, (_, dk_exact, dv_exact) = kernel_inputs(q, k, v, do)
with checks.launches() as launched, checks.compiled():
    dk, dv = flash_dkdv(q, k, v, do, lse, delta, blocks=(16, 16))
p = torch.exp2((q @ k.mT).double() / 4 / math.log(2) - lse[..., None])
dp = do.double() @ v.double().mT
ds = p * (dp - delta[..., None])
alone = exact_gradients(q[:, :1], k, v, do[:, :1])
last = exact_gradients(q[:, 1:], k, v, do[:, 1:])
checks.relative_l2(
    dv,
    dv_exact,
    5e-6,
    what="dv",
    mistakes={
        "counting only the group's first head": alone[2],
        "keeping only the group's last head": last[2],
    },
)
checks.relative_l2(
    dk,
    dk_exact,
    5e-6,
    what="dk",
    mistakes={
        "leaving out δ": ((p * dp).mT @ q.double()).sum(1, keepdim=True) / 4,
        "leaving out the scale": dk_exact * 4,
        "the scale twice": dk_exact / 4,
        "counting only the group's first head": alone[1],
        "keeping only the group's last head": last[1],
    },
)
assert launched.programs == 1, "one tile of 16 keys of one key-value head is one program"
### BEGIN HIDDEN TESTS
gen = checks.generator(29)
for q_len, k_len, head_dim, blocks, causal in [
    (37, 21, 24, (16, 32), False),
    (50, 50, 16, (32, 16), True),
    (40, 40, 16, (16, 32), True),
    (40, 41, 16, (16, 16), True),  # the last row of a query tile sees a key that begins a tile
    (19, 40, 20, (16, 16), True),
    (40, 19, 16, (16, 16), True),
]:
    batch, heads, kv_heads = (2, 4, 2) if not causal else (1, 2, 1)
    q, do = (checks.randn(batch, heads, q_len, head_dim, generator=gen) for _ in range(2))
    k, v = (checks.randn(batch, kv_heads, k_len, head_dim, generator=gen) for _ in range(2))
    if k_len == 50:
        q, k = last_key_towers(q, k)
        do[:, :, -1] = 0
    lse, delta, (_, dk_exact, dv_exact) = kernel_inputs(q, k, v, do, causal)
    with checks.launches() as launched:
        dk, dv = dkdv_among_canaries(q, k, v, do, lse, delta, causal, blocks)
    assert launched.kernels["flash_dkdv_kernel"] == 1, "the kernel was not launched"
    where = (
        f"{heads} heads on {kv_heads}, {q_len} queries, {k_len} keys, tiles {blocks}, causal: "
        f"{causal}."
    )
    checks.relative_l2(dv, dv_exact, 3e-6, what="dv", hint=where)
    checks.relative_l2(dk, dk_exact, 3e-6, what="dk", hint=where)
for (dtype, coarser), (wide, n) in itertools.product(HALVES.items(), ((1, 800), (16, 16))):
    half = [checks.randn(1, 1, rows, 16, generator=gen) for rows in (n, 16, 16, n)]
    half = [(t * size).to(dtype) for t, size in zip(half, (wide, 1, 1, 1), strict=True)]
    lse, delta, (_, dk_exact, dv_exact) = kernel_inputs(*half)
    dk, dv = flash_dkdv(*half, lse, delta, blocks=(16, 16))
    for name, found, expected in (("dk", dk, dk_exact), ("dv", dv, dv_exact)):
        assert found.dtype == dtype, f"{name} has dtype {found.dtype} for inputs in {dtype}"
        limit, hint = 1e-3 * coarser, "Scores and sums are float32."
        checks.relative_l2(found, expected, limit, what=f"{name} in {dtype}", hint=hint)
### END HIDDEN TESTS

# %% check="flash_dkdv_kernel" points=1
# A ragged head among canaries, each tensor with strides of its own.
gen = checks.generator(30)
q, k, v, do = (checks.randn(1, 2, n, 20, generator=gen) for n in (17, 21, 21, 17))
lse, delta, (_, dk_exact, dv_exact) = kernel_inputs(q, k, v, do)
dk, dv = dkdv_among_canaries(q, k, v, do, lse, delta)
checks.relative_l2(dv, dv_exact, 3e-6, what="dv in a padded buffer")
### BEGIN HIDDEN TESTS
checks.relative_l2(dk, dk_exact, 3e-6, what="dk in a padded buffer")
shapes = ((4, 33), (2, 18), (2, 18), (4, 33))
for causal, batch in ((False, 1), (True, 2)):
    q, k, v, do = (checks.randn(batch, h, n, 9, generator=gen) for h, n in shapes)
    lse, delta, (_, dk_exact, dv_exact) = kernel_inputs(q, k, v, do, causal)
    # The first check compiles the kernel without a causal mask.
    with checks.traffic() as moved, checks.compiled() if causal else contextlib.nullcontext():
        dk, dv = dkdv_among_canaries(q, k, v, do, lse, delta, causal, (32, 16))
    what = "everything in padded buffers" + (", rows that see no key" if causal else "")
    checks.relative_l2(dk, dk_exact, 3e-6, what=f"dk, {what}")
    checks.relative_l2(dv, dv_exact, 3e-6, what=f"dv, {what}")
    # Key 0 is seen from query 15 on, key 16 from query 31 on: every program loads all queries.
    due = batch * (2 * 18 * 2 * 9 + 2 * 4 * 33 * (2 * 9 + 2))
    expect_loads(moved, due, f"33 queries, 18 keys, causal: {causal}")
# Queries above the last key tile's diagonal are poisoned: its program must not load them.
q, k, v, do = (checks.randn(1, 1, 48, 16, generator=gen) for _ in range(4))
lse, delta, (_, dk_exact, dv_exact) = kernel_inputs(q, k, v, do, causal=True)
q[:, :, :32] = math.nan
do[:, :, :32] = math.nan
dk, dv = flash_dkdv(q, k, v, do, lse, delta, causal=True, blocks=(16, 16))
checks.relative_l2(
    dk[:, :, 32:],
    dk_exact[:, :, 32:],
    3e-6,
    what="dk of the last key tile, with NaN in all queries that it must not load",
)
checks.relative_l2(
    dv[:, :, 32:],
    dv_exact[:, :, 32:],
    3e-6,
    what="dv of the last key tile, with NaN in all queries that it must not load",
)
### END HIDDEN TESTS

# %% [markdown]
# ## One function that autograd can use
#
# `torch.autograd.Function` joins the two passes: `forward(ctx, …)` computes and saves what the
# backward pass needs, `backward(ctx, grad)` returns one gradient for each argument of forward, None
# for those that have none. What to save is the point of the whole lesson: $q, k, v, o$ and $L_2$,
# $O(SD)$ numbers, where the standard way saves the $(S, S)$ weights.
#
# ### Exercise · The autograd function


# %% exercise="flash_attention" minutes=10 difficulty=2
class FlashAttention(torch.autograd.Function):
    """Attention by the kernels above: FlashAttention.apply(q, k, v, causal) → o.

    q: (batch, heads, q_len, head_dim); k, v: (batch, kv_heads, k_len, head_dim). Differentiable in
    q, k, v. Uses `flash_forward` and `flash_backward`; saves q, k, v, o and the log-sum-exp with
    ctx.save_for_backward, and no (q_len, k_len) tensor.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal):
        ### BEGIN SOLUTION
        o, lse = flash_forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal = causal
        return o
        ### END SOLUTION

    @staticmethod
    def backward(ctx, do):
        ### BEGIN SOLUTION
        q, k, v, o, lse = ctx.saved_tensors
        return *flash_backward(q, k, v, o, lse, do, ctx.causal), None
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what is not a tensor</summary>
#
# Tensors go through `ctx.save_for_backward`; a flag may be an attribute of `ctx`. It needs no
# gradient: return None in its place.
# </details>

# %% check="flash_attention" points=2
gen = checks.generator(31)
q, k, v = (checks.randn(1, h, 20, 16, generator=gen).requires_grad_() for h in (2, 1, 1))
with checks.launches() as launched, checks.forbidden("scaled_dot_product_attention"):
    o = FlashAttention.apply(q, k, v, True)
    o.sum().backward()  # the gradient that arrives is one number, expanded
for kernel in ("flash_forward_kernel", "flash_dq_kernel", "flash_dkdv_kernel"):
    assert launched.kernels[kernel] == 1, (
        f"{kernel} was launched {launched.kernels[kernel]} times, once is expected"
    )
dq, dk, dv, exact, *_ = exact_gradients(q, k, v, torch.ones_like(q), causal=True)
checks.relative_l2(o, exact, 2e-6, what="o")
for name, leaf, expected in (("dq", q, dq), ("dk", k, dk), ("dv", v, dv)):
    assert leaf.grad is not None, (
        f"{name} is missing: backward returns one gradient for each argument of forward, in their "
        f"order"
    )
    checks.relative_l2(leaf.grad, expected, 1e-5, what=name)
### BEGIN HIDDEN TESTS
gen = checks.generator(32)
for heads, kv_heads, q_len, k_len, causal in [(2, 2, 9, 30, False), (2, 1, 30, 30, True)]:
    shapes = ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    q, k, v = (checks.randn(2, n, h, 12, generator=gen).transpose(1, 2) for n, h in shapes)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    do = checks.randn(2, heads, 12, q_len, generator=gen).mT  # last axis not contiguous
    with checks.saved() as kept:
        o = FlashAttention.apply(q, k, v, causal)
    assert kept.largest <= max(q.numel(), k.numel()), (
        "a tensor larger than q or k was saved for the backward pass"
    )
    least = 2 * q.numel() + 2 * k.numel() + 2 * heads * q_len
    assert kept.elements >= least, (
        f"{kept.elements} numbers went through ctx.save_for_backward; q, k, v, o and the "
        f"log-sum-exp are {least}. What is kept elsewhere, hooks and checkpoints cannot see"
    )
    actual = torch.autograd.grad(o, (q, k, v), do)
    where = f"{heads} heads on {kv_heads}, causal: {causal}."
    checks.relative_l2(o, brute_force(q, k, v, causal)[0], 2e-6, what="o", hint=where)
    for name, a, e in zip(
        ("dq", "dk", "dv"), actual, exact_gradients(q, k, v, do, causal), strict=False
    ):
        checks.relative_l2(a, e, 5e-6, what=name, hint=where)
# Three forward passes before the first backward pass, as in a model of three layers; in each only
# one of q, k and v needs a gradient.
tensors, flags = [checks.randn(1, 1, 16, 16, generator=gen) for _ in range(3)], (True, False, True)
given = [[t.clone().requires_grad_(i == n) for i, t in enumerate(tensors)] for n in range(3)]
outputs = [
    FlashAttention.apply(*leaves, causal) for leaves, causal in zip(given, flags, strict=True)
]
for n, (o, causal) in enumerate(zip(outputs, flags, strict=True)):
    (found,) = torch.autograd.grad(o.sum(), given[n][n])
    expected = exact_gradients(*tensors, torch.ones_like(o), causal)[n]
    what = f"{('dq', 'dk', 'dv')[n]}, alone, causal: {causal}, after three forward passes"
    hint = "Keep the flag on ctx; each of q, k and v may be the only one that needs a gradient."
    checks.relative_l2(found, expected, 1e-5, what=what, hint=hint)
### END HIDDEN TESTS


# %%
class Block(nn.Module):
    """A pre-norm decoder block with grouped-query attention; `attend(q, k, v)` is exchangeable."""

    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, attend):
        batch, seq, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """Next-byte logits (batch, seq, 256) from bytes (batch, seq)."""

    def __init__(self, width, heads, kv_heads, layers, context):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens, attend):
        x = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        for block in self.blocks:
            x = block(x, attend)
        return self.head(x)


def next_byte_loss(model, tokens, attend):
    logits = model(tokens[:, :-1], attend)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_losses(attend, tokens, steps, *, width, heads, kv_heads, layers):
    """Losses of `steps` AdamW steps from the same weights over the same batches; tokens (steps,
    batch, seq + 1).
    """
    with torch.random.fork_rng():
        torch.manual_seed(40)
        model = ByteModel(width, heads, kv_heads, layers, tokens.shape[2]).to(profile.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = next_byte_loss(model, tokens[step].to(profile.device), attend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# %% check="flash_attention" points=2
# In a model of two layers: the loss and every gradient as with PyTorch's attention.
tokens = torch.randint(0, 256, (2, 25), generator=checks.generator(33)).to(profile.device)
with torch.random.fork_rng():
    torch.manual_seed(41)
    model = ByteModel(32, 2, 1, 2, 25).to(profile.device)


def loss_and_gradients(attend):
    loss = next_byte_loss(model, tokens, attend)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


with checks.launches() as launched:
    loss, gradients = loss_and_gradients(lambda q, k, v: FlashAttention.apply(q, k, v, True))
loss_due, gradients_due = loss_and_gradients(sdpa)
checks.close(loss, loss_due, rtol=1e-5, what="the loss")
for (name, _), found, due in zip(model.named_parameters(), gradients, gradients_due, strict=True):
    checks.relative_l2(found, due, 1e-4, what=f"the gradient of {name}")
### BEGIN HIDDEN TESTS
for kernel in ("flash_forward_kernel", "flash_dq_kernel", "flash_dkdv_kernel"):
    assert launched.kernels[kernel] == 2, (
        f"{kernel} was launched {launched.kernels[kernel]} times in a step of two layers"
    )
### END HIDDEN TESTS

# %% tags=["experiment"]
# The same model, weights and batches, twice: PyTorch's attention, and yours.
text = torch.tensor(list("\n".join(data.documentation().values()).encode()), dtype=torch.long)
steps, batch, seq = profile.pick(cpu=(16, 4, 64), gpu=(200, 16, 512))
starts = torch.randint(
    0, len(text) - seq - 1, (steps, batch), generator=torch.Generator().manual_seed(40)
)
tokens = torch.stack([torch.stack([text[s : s + seq + 1] for s in row]) for row in starts.tolist()])
size = profile.pick(
    cpu={"width": 32, "heads": 2, "kv_heads": 1, "layers": 1},
    gpu={"width": 256, "heads": 4, "kv_heads": 2, "layers": 4},
)
with_sdpa = training_losses(sdpa, tokens, steps, **size)
with_flash = training_losses(
    lambda q, k, v: FlashAttention.apply(q, k, v, True), tokens, steps, **size
)

# %% tags=["experiment", "figure"]
# Figure: the losses of both, and how far rounding drives them apart
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.2))
plot.curves(
    range(steps),
    {"PyTorch's SDPA": with_sdpa, "FlashAttention": with_flash},
    xlabel="step",
    ylabel="loss (nats per byte)",
    title="training loss",
    ax=axes[0],
)
axes[0].lines[0].set(linewidth=5, alpha=0.35)
axes[1].bar(
    range(steps),
    [abs(a - b) / 2**-23 for a, b in zip(with_sdpa, with_flash, strict=True)],
    color=plot.COLORS[0],
)
axes[1].set(xlabel="step", ylabel="difference (units of 2⁻²³ nats)")
axes[1].set_title("what the order of summation does")
plot.caption(
    fig,
    "Left: both lines lie on each other. Right: they differ, where they do, in the last bits of "
    "float32 (2⁻²³ is 1.2e-7): sums in another order round differently. Exact attention does not "
    "mean bit-identical attention.",
)
plt.show()

# %% [markdown]
# ## Versions 1, 2, 3: the algorithm stays, the machine is used better
#
# - **Version 1** (2022) has the idea. Its grid is (batch, heads), the outer loop runs over key
#   tiles, and the accumulator is normalized after every tile. It reached 25 to 40 percent of an
#   A100's peak.
# - **Version 2** (2023) turns the loops round, so that query tiles are independent programs (the
#   grid you launched: **parallel over the sequence**); postpones the division (fewer **non-matmul
#   FLOPs**, which an A100 runs sixteen times slower); and inside a program splits the query rows,
#   not the keys, among the warps, so that warps need not exchange partial sums through shared
#   memory. 50 to 73 percent.
# - **Version 3** (2024) is for Hopper: asynchronous copies (TMA) by a **producer warp**,
#   asynchronous matrix products (WGMMA) by **consumer** warp groups, and **overlap** of one group's
#   exponentials with the other's products; and FP8 with per-block scales. Up to 75 percent of an
#   H100.
#
# Why overlap matters can be computed. An H100 runs 989 TFLOP/s on its tensor cores but only 3.9 T
# exponentials a second, and attention needs one exponential for every $4D$ matmul FLOPs.
#
# ### Exercise · Short answers, by number
#
# One value a question; write an expression, or the number itself.


# %% exercise="version_numbers" minutes=10 difficulty=2 kind="questions"
def version_numbers() -> dict[str, float | str]:
    """A dictionary of seven answers, numbers to 1 percent.

    "v1_busy":       version 1, batch 2, 16 heads, an H100 with 132 multiprocessors: the share (0
        to 1) of them that have a program, one each.
    "v2_programs":   version 2, the same with 8192 queries in tiles of 128: how many programs are in
        the grid?
    "non_matmul":    an A100 runs 312 TFLOP/s of half-precision products and 19.5 TFLOP/s of other
        float32 work. How many matmul FLOPs fit in the time of one other?
    "divisions":     8192 keys in tiles of 128: how many times as many accumulator elements does
        version 1 normalize as version 2? (full attention)
    "warps_split":   what version 2 splits among the warps of a program: "queries" or "keys".
    "exp_share_128": version 3, head dimension 128, H100 numbers above: time of the exponentials
        divided by time of the products, forward.
    "limit_64":      head dimension 64: the TFLOP/s of matmul work that can be reached if
        exponentials and products never overlap.
    """
    ### BEGIN SOLUTION
    matmul, exponentials = 989e12, 3.9e12
    return {
        "v1_busy": 2 * 16 / 132,
        "v2_programs": 2 * 16 * 8192 // 128,
        "non_matmul": 312 / 19.5,
        "divisions": 8192 // 128,
        "warps_split": "queries",
        "exp_share_128": (1 / exponentials) / (4 * 128 / matmul),
        "limit_64": 4 * 64 / (4 * 64 / matmul + 1 / exponentials) / 1e12,
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: without overlap</summary>
#
# Times add up. Take one score: so many FLOPs at one rate, one exponential at the other.
# </details>

# %% check="version_numbers" points=1
answer = version_numbers()["v1_busy"]
checks.kind(answer, float, what="v1_busy")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    32 / 132,
    what="v1_busy",
    hint="One program for each head of each batch element.",
)
### END HIDDEN TESTS

# %% check="version_numbers" points=1
answer = version_numbers()["v2_programs"]
checks.kind(answer, float, what="v2_programs")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2048,
    what="v2_programs",
    hint="Every query tile of every head is a program.",
)
### END HIDDEN TESTS

# %% check="version_numbers" points=1
answer = version_numbers()["non_matmul"]
checks.kind(answer, float, what="non_matmul")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    16,
    what="non_matmul",
    hint="Divide the one rate by the other.",
)
### END HIDDEN TESTS

# %% check="version_numbers" points=1
answer = version_numbers()["divisions"]
checks.kind(answer, float, what="divisions")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    64,
    what="divisions",
    hint="Version 1 normalizes after every key tile, version 2 once.",
)
### END HIDDEN TESTS

# %% check="version_numbers" points=1
answer = version_numbers()["warps_split"]
assert answer in ("queries", "keys"), f"warps_split is 'queries' or 'keys'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "queries", (
    "warps_split: with the keys split, each warp holds a part of every row's sum and they must "
    "exchange them"
)
### END HIDDEN TESTS

# %% check="version_numbers" points=1
answer = version_numbers()["exp_share_128"]
checks.kind(answer, float, what="exp_share_128")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    989 / 3.9 / 512,
    what="exp_share_128",
    hint="4·D matmul FLOPs for each exponential.",
)
### END HIDDEN TESTS

# %% check="version_numbers" points=1
answer = version_numbers()["limit_64"]
checks.kind(answer, float, what="limit_64")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    989 * 256 / (256 + 989 / 3.9),
    what="limit_64",
    hint="Time for one score: 256 FLOPs at 989 TFLOP/s plus one exponential at 3.9 T/s.",
)
### END HIDDEN TESTS

# %% [markdown]
# ## On the hardware
#
# On a GPU the next cells measure your kernels beside those of PyTorch's SDPA in the same run: its
# default, FlashAttention-2, and cuDNN, which is written for this GPU. TFLOP/s are counted as
# $4S^2D$ per head forward, 2.5 times that backward, half with a causal mask. On a CPU they show the
# arithmetic instead: where on the roofline standard attention and tiled attention lie.


# %% tags=["experiment"]
def forward_flops(batch, heads, S, D, causal):
    return 4 * batch * heads * S * S * D * (0.5 if causal else 1.0)


def quantiles(function):
    """Milliseconds: median, 20 % and 80 % quantile."""
    return triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])


def measure(S, D, causal, tokens=16384, heads=16):
    """TFLOP/s of three implementations, forward and backward: {(name, direction): [median, high,
    low]}.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch = max(1, tokens // S)
    leaves = [
        torch.randn(batch, heads, S, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    q, k, v = leaves

    def torch_attention():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    results = {}
    for name, attend, backend in (
        ("this lesson", lambda: FlashAttention.apply(q, k, v, causal), None),
        ("FlashAttention-2", torch_attention, SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", torch_attention, SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(backend or SDPBackend.MATH):
            try:
                o = attend()
                do = torch.randn_like(o)  # in o's own layout: another would be copied first
                forward = quantiles(attend)
                backward = quantiles(
                    lambda o=o, do=do: torch.autograd.grad(o, leaves, do, retain_graph=True)
                )
            except RuntimeError as error:  # a back end that this build or this GPU lacks
                print(f"{name}: {str(error).splitlines()[0]}")
                continue
        flops = forward_flops(batch, heads, S, D, causal)
        results[name, "forward"] = [flops / ms / 1e9 for ms in forward]
        results[name, "backward"] = [2.5 * flops / ms / 1e9 for ms in backward]
    return results


# %% tags=["experiment", "figure"]
# Figure: your kernels beside PyTorch's, or on a CPU the roofline's arithmetic
def compare(D, lengths=(1024, 4096, 16384, 32768)):
    """A chart and a table for one head dimension."""
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.6), sharex=True, sharey=True)
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton "
        f"{triton.__version__}; bfloat16, 16 heads, 16k tokens or one sequence, D = {D}"
    )
    for column, causal in enumerate((False, True)):
        measured = {S: measure(S, D, causal) for S in lengths}
        for row, direction in enumerate(("forward", "backward")):
            ax = axes[2 * row + column]
            names = [
                n
                for n in ("this lesson", "FlashAttention-2", "SDPA cuDNN")
                if all((n, direction) in measured[S] for S in lengths)
            ]
            plot.curves(
                lengths,
                {n: [measured[S][n, direction][0] for S in lengths] for n in names},
                bands={
                    n: (
                        [measured[S][n, direction][2] for S in lengths],
                        [measured[S][n, direction][1] for S in lengths],
                    )
                    for n in names
                },
                xlabel="sequence length S (tokens)",
                ylabel="TFLOP/s" if ax is axes[0] else "",
                title=f"{direction}{', causal' if causal else ''}",
                logx=True,
                ax=ax,
            )
            for S in lengths:
                print(
                    f"{direction:8} {'causal' if causal else 'full':6} S = {S:5}: "
                    + ", ".join(f"{n} {measured[S][n, direction][0]:.0f} TFLOP/s" for n in names)
                )
    plot.caption(
        fig,
        f"D = {D}; higher is better. Band: 20 to 80 percent quantile. cuDNN is hand-written for "
        f"this GPU and overlaps exponentials with products, as version 3 does.",
    )
    plt.show()


if profile.name == "gpu" and not profile.interpret:
    compare(D=64)
    compare(D=128)
else:
    peak, bandwidth, S, M = 989e12, 3.35e12, 8192, 200 * 1024
    points = {}
    for D in (64, 128):
        for kind in ("standard", "flash"):
            points[f"{kind}, D = {D}"] = (4 * S * S * D / hbm_bytes(S, D, M, kind), None)
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.9))
    plot.roofline(
        points, peak=peak, bandwidth=bandwidth, title="roofline of an H100, S = 8192", ax=axes[0]
    )
    names, matmul, exponentials, memory = [], [], [], []
    for D in (64, 128):
        for kind in ("standard", "flash"):
            names.append(f"{kind}\nD = {D}")
            matmul.append(4 * S * S * D / peak * 1e6)
            exponentials.append(S * S / 3.9e12 * 1e6)
            memory.append(hbm_bytes(S, D, M, kind) / bandwidth * 1e6)
    for i, (name, times) in enumerate(
        {"matrix products": matmul, "exponentials": exponentials, "HBM traffic": memory}.items()
    ):
        axes[1].bar(
            [x + 0.26 * (i - 1) for x in range(len(names))],
            times,
            width=0.25,
            label=name,
            color=plot.COLORS[i],
            edgecolor="black",
            hatch=["", "//", ""][i],
        )
    axes[1].set_xticks(range(len(names)), names)
    axes[1].set(ylabel="microseconds per head, each alone")
    axes[1].set_title("which unit is the slowest")
    axes[1].set_ylim(0, 1.3 * max(memory))
    axes[1].legend(ncols=3, loc="upper center", fontsize=8)
    plot.caption(
        fig,
        "Arithmetic for square tiles in 200 KB, without any cache: not a measurement. Left: tiling "
        "moves attention up the slope, at D = 64 past the ridge. Right: at D = 64 products and "
        "exponentials then take equally long, and a kernel that runs them one after the other "
        "reaches half of the peak. At D = 128 reading K and V again would still be the slowest; "
        "taller query tiles and the L2 cache take care of that.",
    )
    plt.show()

# %% [markdown]
# ## Key questions
#
# Short answers by number were [](#version_numbers). These are open; write two or three sentences
# each.
#
# **1.** FlashAttention's backward pass computes the scores again, and more FLOPs. Why is it faster
# all the same?

# %% [markdown] answer="why-recompute"
# Because the standard backward is bound by reading the stored $S\times S$ weights and writing their
# gradient, at about 32 FLOPs per byte where the GPU could do 295. Computing a tile of scores again
# from q and k that are on chip anyway costs one more product per tile (five in place of four) and
# saves the $\Theta(S^2)$ traffic, and the $\Theta(S^2)$ memory between the passes.

# %% [markdown]
# **2.** Where does the proof that merge is associative use that the results are *not* yet divided
# by $\ell$? What would have to be carried if they were?

# %% [markdown] answer="merge-normalized"
# $\Phi$ adds because $o$ is a plain sum relative to $m$. A normalized output $\bar o = o/\ell$ is
# an average, and averages add only with their weights: one carries the pair $(L, \bar o)$ with
# $L = m + \ln\ell$, and merges $\bar o = \bar o_A e^{L_A - L} + \bar o_B e^{L_B - L}$,
# $L = \ln(e^{L_A} + e^{L_B})$. Two quantities in place of three, at the price of a division for
# each part; that is what Flash-Decoding and ring attention pass between programs and machines.

# %% [markdown]
# **3.** Does FlashAttention make attention linear in the sequence length? In time, in memory, in
# traffic?

# %% [markdown] answer="is-it-linear"
# Only in memory: $O(SD)$ in place of $O(S^2)$. Time stays $\Theta(S^2D)$ FLOPs, and traffic
# $\Theta(S^2D^2/M)$, quadratic with a smaller constant.

# %% [markdown]
# **4.** One sequence, one token to decode, 32k keys in the cache. Why does the grid of this lesson
# serve that badly, and what would you change?

# %% [markdown] answer="decode-grid"
# With q_len = 1 there is one query tile a head: 32 programs for 132 multiprocessors, each walking
# 32k keys alone, with one useful row of 16 or more in each product. Split the keys among programs
# and merge their partial results by $(m, \ell, o)$ (Flash-Decoding), and pack the query heads that
# share a key-value head into the rows of the tile. Lesson 30 builds it.

# %% [markdown]
# ## References
#
# - Milakov, Gimelshein 2018, *Online normalizer calculation for softmax*, arXiv:1805.02867: section
#   3, the recurrence.
# - Rabe, Staats 2021, *Self-attention Does Not Need O(n²) Memory*, arXiv:2112.05682: the same in
#   JAX, for memory rather than speed.
# - Dao, Fu, Ermon, Rudra, Ré 2022, *FlashAttention*, arXiv:2205.14135: section 3 and appendix B
#   (backward), theorem 2 and proposition 3 (traffic and its lower bound).
# - Dao 2023, *FlashAttention-2*, arXiv:2307.08691: section 3, loop order, parallelism, warps.
# - Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao 2024, *FlashAttention-3*, arXiv:2407.08608: section
#   3.1 and 3.2, producer and consumer warps, overlap.
# - In production: `Dao-AILab/flash-attention` (`csrc/flash_attn`, `hopper`), `triton-lang/triton`
#   (`python/tutorials/06-fused-attention.py`), PyTorch's `torch.nn.attention.flex_attention`,
#   `NVIDIA/cudnn-frontend`.
