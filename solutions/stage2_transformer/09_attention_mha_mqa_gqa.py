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
#       Scaled dot-product, multi-head and grouped-query attention; a small model whose induction
#       head you find yourself, and the same circuit set by hand.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# *The keys that the old man had left on the kitchen table **were** gone.* To write "were" and not
# "was", a model has to know that "keys", eleven words back, is plural. A recurrent network carries
# that fact in one vector through ten updates, each of which has other things to remember. A
# convolution sees it once enough layers are stacked. In both, the distance between two words
# decides how hard it is to relate them.
#
# **Attention** makes every distance one step. Each position asks a question, every position answers
# how well it fits, and the asker takes a weighted average of what the others offer.
#
# ## The idea: a dictionary that can be differentiated
#
# A Python dictionary compares your query with its keys and returns the value of the one that is
# equal. Nothing in that can be learned by gradient descent: a key matches or it does not. Attention
# softens each of the three steps.
#
# | | dictionary | attention |
# |---|---|---|
# | compare | `query == key` | a **score** $s_j = q\cdot k_j$, large where query and key point the same way |
# | choose | the one that is equal | a **weight** for each key, $w = \mathrm{softmax}(s)$: positive, summing to 1 |
# | return | its value | the average $\sum_j w_j v_j$ |
#
# **Query**, **key** and **value** are three linear views of the same token vector: what I look for,
# how I want to be found, and what I hand over once found. They differ because these differ. A verb
# looks for its subject, and no verb wants to be found by verbs.
#
# ### Shapes used throughout
#
# | symbol | meaning | in code |
# |---|---|---|
# | $B$ | sequences in the batch | `batch` |
# | $H$, $H_{kv}$ | query heads, and heads of keys and values | `heads`, `kv_heads` |
# | $L_q$, $L_k$ | number of queries, number of keys | `q_len`, `k_len` |
# | $d$ | width of a token vector | `d_model` |
# | $d_k$, $d_v$ | width of a query or key, of a value; in most models both are $d/H$ | `head_dim` |
#
# Queries are `(batch, heads, q_len, head_dim)`, keys and values
# `(batch, kv_heads, k_len, head_dim)`, scores and weights `(batch, heads, q_len, k_len)`: **a row
# of the weights is a query, and a row sums to 1.**

# %%
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm40 import checks, data, plot, profile
from torch import Tensor, nn

# %% [markdown]
# ## The mathematics: why $\sqrt{d_k}$
#
# For one query $q$ of shape $(d_k)$, keys $K$ of shape $(L_k, d_k)$ and values $V$ of shape
# $(L_k, d_v)$,
#
# $$ s = \frac{K q}{\sqrt{d_k}} \in \mathbb{R}^{L_k}, \qquad w_j = \frac{e^{s_j}}{\sum_l e^{s_l}},
# \qquad
# o = V^\top w \in \mathbb{R}^{d_v}. $$
#
# Everything but the $\sqrt{d_k}$ is the soft dictionary. The root comes from two facts, one about
# dot products and one about softmax.
#
# **1. How large is a dot product?** Let the $2 d_k$ components of $q$ and $k$ be independent with
# mean 0 and variance 1, which is what a sensible initialization gives. Then
#
# $$ \mathbb{E}[q\cdot k] = \sum_{c=1}^{d_k} \mathbb{E}[q_c]\,\mathbb{E}[k_c] = 0, \qquad
# \operatorname{Var}[q\cdot k] = \sum_{c=1}^{d_k} \operatorname{Var}[q_c k_c]
# = \sum_{c=1}^{d_k} \mathbb{E}[q_c^2]\,\mathbb{E}[k_c^2] = d_k . $$
#
# The variances add because the terms are independent; the variance of a product is the product of
# the second moments because the means are 0. So scores spread by $\sqrt{d_k}$: by 8 at $d_k = 64$,
# by 11 at $d_k = 128$. Dividing by $\sqrt{d_k}$ brings the spread back to 1 whatever the width.
# Dividing by $d_k$ would bring it to $1/\sqrt{d_k}$, which shrinks as the model grows.
#
# **2. Why does the spread matter?** Because the gradient reaches $q$ and $k$ only through the
# softmax. Differentiate $\log w_j = s_j - \log\sum_l e^{s_l}$:
#
# $$ \frac{\partial w_j}{\partial s_l} = w_j\,(\delta_{jl} - w_l), \qquad
# J = \operatorname{diag}(w) - w w^\top \in \mathbb{R}^{L_k \times L_k}. $$
#
# Every entry of $J$ has a factor $w_j(1-w_j)$ or $w_j w_l$. Let one weight go to 1 and all of them
# vanish: **a softmax that has decided cannot be taught.** With two keys, $w_1 = \sigma(s_1 - s_2)$,
# and its slope is $\frac14$ at a tie but about $e^{-|s_1-s_2|}$ away from it. Unscaled scores at
# $d_k = 64$ differ by a normal number of standard deviation $8\sqrt2 \approx 11$; half of the pairs
# are more than 7.6 apart, where the slope is below $e^{-7.6} = 0.0005$: frozen on whichever key
# happened to win at initialization. (With more keys the best two lie closer together, and the
# damage sets in at a larger width: you will measure it.)
#
# The other extreme is as useless. With spread near 0 every weight is $1/L_k$, and a head that
# averages everything has chosen nothing.
#
# *What the argument does not say.* It is about initialization. Training makes queries and keys
# agree, and then $q\cdot k$ can grow like $d_k$, not $\sqrt{d_k}$: this is why µP (lesson 13)
# divides by $d_k$ after all, and why some models normalize queries and keys (QK-norm).

# %% [markdown]
# ## Masks: what may be seen
#
# Two kinds of key must stay invisible: those in the future, when the model is to predict it
# (**causal mask**), and those that are padding, put there only to make a batch rectangular
# (**padding mask**). A mask is boolean, **True = may attend**, as in PyTorch's
# `scaled_dot_product_attention`. (`nn.MultiheadAttention` means the opposite. Both have been the
# cause of many lost weeks.)
#
# A warm-up. The one subtle point: when text is generated, one new query meets a long cache of keys.
# The last query is then the newest token, so **the last query lines up with the last key**:
#
# ```
# q_len = 2, k_len = 5        key 0  1  2  3  4
# query 0 (position 3)            1  1  1  1  0
# query 1 (position 4)            1  1  1  1  1
# ```


# %% exercise="masks" minutes=10 difficulty=1
def causal_mask(q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see when the queries are the last `q_len` of `k_len` positions.

    Returns (q_len, k_len), bool, True = may attend: query i stands at position i + (k_len − q_len)
    and sees the keys up to and including its own position. Where q_len > k_len the first queries
    stand before every key and see none. The mask is on `device`; None is PyTorch's default.
    """
    ### BEGIN SOLUTION
    queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    keys = torch.arange(k_len, device=device)[None, :]
    return keys <= queries
    ### END SOLUTION


def padding_mask(lengths: Tensor, k_len: int) -> Tensor:
    """Which keys are real: sequence b has lengths[b] tokens, padded on the right to k_len.

    lengths: (batch,), integers from 0 to k_len. Returns (batch, 1, 1, k_len), bool, True = may
    attend, on the device of `lengths`: the two axes of size 1 broadcast over heads and queries.
    """
    ### BEGIN SOLUTION
    keys = torch.arange(k_len, device=lengths.device)
    return (keys < lengths[:, None])[:, None, None, :]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a table without a loop</summary>
#
# Comparing a column `(q_len, 1)` with a row `(1, k_len)` broadcasts to `(q_len, k_len)`: one line
# says "key position ≤ query position" for all pairs.
# </details>
#
# <details><summary>Hint: <code>tril</code></summary>
#
# `torch.tril` has an argument that shifts its diagonal. Which shift makes the last row full?
# </details>


# %% tags=["support"]
# Support: where a mask is made when PyTorch's default device is "meta"
@checks.measured
def device_by_default(make_mask) -> str:
    with torch.device("meta"):
        return make_mask(2, 2).device.type


# %% check="masks" points=1
mask = causal_mask(2, 5)
assert getattr(mask, "dtype", None) == torch.bool, (
    "causal_mask must return a boolean tensor, True = may attend"
)
checks.close(
    mask,
    torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool(),
    what="causal_mask(2, 5)",
    hint="The last query is the newest token and sees every key",
    mistakes={
        "a mask aligned to the first key": torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool(),
        "a mask where True means hidden": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool(),
        "hiding a token from itself": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool(),
    },
)
### BEGIN HIDDEN TESTS
for q_len, k_len in [(1, 1), (1, 7), (4, 4), (3, 8), (7, 7), (5, 2), (6, 1)]:
    expected = torch.tensor([[j <= i + k_len - q_len for j in range(k_len)] for i in range(q_len)])
    checks.close(causal_mask(q_len, k_len), expected, what=f"causal_mask({q_len}, {k_len})")
# Law: a decoding step with a cache sees what the last row of the whole sees.
checks.close(
    causal_mask(3, 9),
    causal_mask(9, 9)[-3:],
    what="the last 3 rows of causal_mask(9, 9) against causal_mask(3, 9)",
)
for device in (profile.device, torch.device("meta")):
    made = causal_mask(2, 2, device=device).device
    assert made.type == device.type, (
        f"causal_mask ignores its device: {device} is asked for, the mask is on {made}"
    )
assert device_by_default(causal_mask) == "meta", (
    "without a device the mask is on PyTorch's default device, whatever was chosen for that"
)
### END HIDDEN TESTS

# %% check="masks" points=1
mask = padding_mask(torch.tensor([2, 3]), 3)
assert getattr(mask, "dtype", None) == torch.bool, (
    "padding_mask must return a boolean tensor, True = may attend"
)
checks.close(
    mask,
    torch.tensor([[[[1, 1, 0]]], [[[1, 1, 1]]]]).bool(),
    what="padding_mask([2, 3], 3)",
    mistakes={
        "a mask where True means padding": torch.tensor([[[[0, 0, 1]]], [[[0, 0, 0]]]]).bool()
    },
)
### BEGIN HIDDEN TESTS
for lengths, k_len in [([0, 4, 1], 4), ([5], 9), ([1], 1), ([0], 2), ([3, 0, 7, 7], 7)]:
    expected = torch.tensor([[[[j < n for j in range(k_len)]]] for n in lengths])
    given = torch.tensor(lengths)
    with checks.unchanged(lengths=given):
        checks.close(padding_mask(given, k_len), expected, what=f"padding_mask({lengths}, {k_len})")
checks.close(
    padding_mask(torch.tensor([2], dtype=torch.int32), 3),
    torch.tensor([[[[True, True, False]]]]),
    what="padding_mask with int32 lengths",
)
lengths = torch.tensor([2, 3], device=profile.device)
made = padding_mask(lengths, 3).device
assert made == lengths.device, (
    f"the lengths are on {lengths.device}, the mask of padding_mask is on {made}"
)
### END HIDDEN TESTS

# %% [markdown]
# ## Scaled dot-product attention
#
# Now the thing itself. Two details separate an implementation that works from one that almost does.
#
# **A row with nothing to attend.** A padded query, or a sequence of length 0 in a batch, may see no
# key at all. Softmax over an empty set is 0/0. Left alone it gives NaN, and one NaN in a batch
# makes the whole gradient NaN, and one step later the parameters. The useful convention: no key, no
# contribution; the weights and the output are 0, and so is the gradient.
#
# **Range.** float16 ends at 65504. With $d_k = 128$ a product $q\cdot k$ of activations around 25
# is already beyond it, although the score after the division would be a harmless 7000. Divide
# *before* multiplying.


# %% tags=["support"]
# Support: PyTorch's attention in float64, which the checks compare yours with
def pytorch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's attention in float64: what the checks compare yours with. Rows without a key
    give 0.
    """
    q, k, v = q.double(), k.double(), v.double()
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    empty = ~mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, scale=scale).masked_fill(
        empty, 0.0
    )


def pytorch_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Its weights: with the identity for values, the output is the weights."""
    identity = torch.eye(k.shape[-2], dtype=torch.float64, device=k.device).expand(
        *k.shape[:-1], -1
    )
    return pytorch_attention(q, k, identity, mask, scale)


# %% exercise="sdpa" minutes=20 difficulty=2
def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √d_k) v, in plain tensor operations.

    q: (…, q_len, d_k), k: (…, k_len, d_k), v: (…, k_len, d_v); any number of leading axes, the same
    for all three.
    mask: bool, broadcastable to (…, q_len, k_len), True = may attend; None = everything is visible.

    Returns (out, weights): out (…, q_len, d_v), weights (…, q_len, k_len), both in the dtype of q.
    - Weights are exactly 0 where the mask is False, however low the visible scores are.
    - A row whose mask is False everywhere has weights 0 and out 0, and passes back gradients of 0:
      no NaN in either direction.
    - Scores of any size give finite results; in float16 the product is formed so that it stays in
      range as long as the scaled score does.
    - Inputs are not changed.

    PyTorch's own scaled_dot_product_attention is not allowed here.
    """
    ### BEGIN SOLUTION
    # Scaled before the product: float16 ends at 65504.
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # The lowest finite number, not −inf: a row of them has a softmax, which the last line
        # sets to 0.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    return weights @ v, weights
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which axis?</summary>
#
# Scores are (queries, keys). Each *query* distributes a weight of 1 over the *keys*. Which `dim` is
# that?
# </details>
#
# <details><summary>Hint: how to hide a key</summary>
#
# A weight of 0 after softmax means a score of −∞ before it. `masked_fill` keeps the original tensor
# unchanged and has a gradient of 0 where it fills. Mind whose True is whose: `masked_fill` fills
# where *its* mask is True.
# </details>
#
# <details><summary>Hint: NaN in a row without keys</summary>
#
# If every score is −∞, softmax subtracts the maximum and computes −∞ − (−∞). Either avoid the −∞,
# or repair the row afterwards; then look at the gradient too. On the way back through the softmax
# `0 × NaN` is NaN; the `masked_fill` before it stops that, an added −∞ does not.
# </details>

# %% check="sdpa" points=2
q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])  # one query, d_k = 4: √d_k = 2
# scores log 3 and 0 after the division
k = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0], [0.0, 9.0, 9.0, 9.0]])
v = torch.tensor([[4.0, 0.0, 1.0], [0.0, 8.0, 1.0]])
with checks.forbidden("scaled_dot_product_attention"):
    result = scaled_dot_product_attention(q, k, v)
out, weights = checks.parts(result, "out", "weights")
total = float(weights.sum())
assert abs(total - 1) < 1e-5, (
    f"the weights of one query must sum to 1 over the keys; yours sum to {total:.4g}: over which "
    "axis is your softmax?"
)
checks.close(
    weights,
    torch.tensor([[0.75, 0.25]]),
    what="the weights",
    mistakes={
        "no scaling": torch.tensor([[0.9, 0.1]]),
        "dividing by d_k, not by its root": torch.tensor([[0.633975, 0.366025]]),
    },
)
checks.close(out, torch.tensor([[3.0, 2.0, 1.0]]), what="the output")
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for lead, q_len, k_len, d_k, d_v in [
    ((), 3, 5, 8, 4),
    ((2,), 1, 9, 16, 16),
    ((2, 3), 7, 7, 5, 3),
    ((1, 4), 4, 1, 1, 2),
    ((2, 2), 9, 4, 64, 8),
]:
    q = checks.randn(*lead, q_len, d_k, generator=g)
    k = checks.randn(*lead, k_len, d_k, generator=g)
    v = checks.randn(*lead, k_len, d_v, generator=g)
    with checks.unchanged(q=q, k=k, v=v), checks.forbidden("scaled_dot_product_attention"):
        out, weights = scaled_dot_product_attention(q, k, v)
    shapes = f"with q {tuple(q.shape)} and k {tuple(k.shape)}"
    checks.close(
        weights,
        pytorch_weights(q, k),
        what=f"the weights {shapes}",
        dtype=torch.float32,
        mistakes={
            "no scaling": pytorch_weights(q, k, scale=1.0),
            "dividing by d_k, not by its root": pytorch_weights(q, k, scale=1 / d_k),
            "a softmax over the queries": (q.double() @ k.double().mT / d_k**0.5).softmax(-2),
        },
    )
    checks.close(out, pytorch_attention(q, k, v), what=f"the output {shapes}", dtype=torch.float32)
# Views as a model makes them: (batch, seq, heads, dim) transposed, so not contiguous.
q, k, v = (
    checks.randn(2, n, 3, 8, generator=g, dtype=torch.float64).transpose(1, 2) for n in (4, 6, 6)
)
checks.close(
    scaled_dot_product_attention(q, k, v)[0],
    pytorch_attention(q, k, v),
    what="the output for transposed views",
)
# Law: the order of the keys does not matter as long as keys and values move together.
order = torch.tensor([3, 1, 5, 0, 4, 2], device=q.device)
checks.close(
    scaled_dot_product_attention(q, k[..., order, :], v[..., order, :])[0],
    scaled_dot_product_attention(q, k, v)[0],
    what="the output after keys and values were permuted together",
)
### END HIDDEN TESTS

# %% check="sdpa" points=2
q = k = torch.eye(3)
v = torch.tensor([[1.0], [2.0], [3.0]])
only_first = torch.tensor([True, False, False])  # (k_len,): broadcasts to every query
out, weights = scaled_dot_product_attention(q, k, v, only_first)
checks.close(
    out,
    torch.ones(3, 1),
    what="the output where only key 0 is visible",
    mistakes={
        "using the mask the other way round": pytorch_attention(q, k, v, ~only_first.expand(3, 3))
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
batch, heads, q_len, k_len, dim = 2, 3, 5, 7, 8
q = checks.randn(batch, heads, q_len, dim, generator=g)
k = checks.randn(batch, heads, k_len, dim, generator=g)
v = checks.randn(batch, heads, k_len, 6, generator=g)
for shape in [
    (q_len, k_len),
    (batch, 1, 1, k_len),
    (batch, 1, q_len, k_len),
    (1, heads, q_len, 1),
    (batch, heads, q_len, k_len),
]:
    mask = (torch.rand(shape, generator=g) < 0.6).to(q.device)
    mask[..., 0] = True
    full = mask.expand(batch, heads, q_len, k_len)
    with (
        checks.unchanged(q=q, k=k, v=v, mask=mask),
        checks.forbidden("scaled_dot_product_attention"),
    ):
        out, weights = scaled_dot_product_attention(q, k, v, mask)
    what = f"with a mask of shape {shape}"
    checks.close(
        weights,
        pytorch_weights(q, k, full),
        what=f"the weights {what}",
        mistakes={
            "using the mask the other way round": pytorch_weights(q, k, ~full),
            "hiding keys after softmax, without normalizing again": pytorch_weights(q, k) * full,
            "ignoring the mask": pytorch_weights(q, k),
        },
    )
    checks.close(out, pytorch_attention(q, k, v, full), what=f"the output {what}")
    assert not weights[~full].any(), "weights must be exactly 0 where the mask is False"
# Law: what is masked cannot matter, even when it is enormous.
causal = torch.ones(k_len, k_len, dtype=torch.bool, device=q.device).tril()
x = checks.randn(k_len, dim, generator=g)
changed = x.clone()
changed[4:] = 1e4
checks.close(
    scaled_dot_product_attention(changed, changed, changed, causal)[0][:4],
    scaled_dot_product_attention(x, x, x, causal)[0][:4],
    what="outputs 0 to 3 under a causal mask after tokens 4 to 6 were changed",
)
# Law: what is hidden has no weight, even where every visible score lies far below 0.
low = torch.tensor([[-3e5], [-2e5], [1.0]], dtype=torch.float64, device=q.device)
first_two = torch.tensor([True, True, False], device=q.device)
for dtype, factor in ((torch.float64, 1.0), (torch.float32, 1.0), (torch.float16, 0.1)):
    out, weights = scaled_dot_product_attention(
        torch.ones(1, 1, dtype=dtype, device=q.device),
        (low * factor).to(dtype),
        low.sign().to(dtype),
        first_two,
    )
    what = f"where the visible scores are {-3e5 * factor:g} and {-2e5 * factor:g}, in {dtype},"
    wanted = torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype, device=q.device)
    checks.close(weights, wanted, what=f"the weights {what}", dtype=dtype)
    checks.close(out, -torch.ones_like(out), what=f"the output {what}", dtype=dtype)
### END HIDDEN TESTS

# %% check="sdpa" points=2
q = torch.ones(2, 4, requires_grad=True)
k = v = torch.ones(3, 4)
nothing_for_row_1 = torch.tensor([[True, True, False], [False, False, False]])
out, weights = scaled_dot_product_attention(q, k, v, nothing_for_row_1)
assert not torch.isnan(weights).any(), (
    "a row without any visible key gives NaN weights: softmax over −inf everywhere is 0/0"
)
checks.close(
    out[1],
    torch.zeros(4),
    what="the output of a row without any visible key",
    mistakes={"the average of all values, hidden ones included": torch.ones(4)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
q = checks.randn(2, 2, 5, 8, generator=g)
k = checks.randn(2, 2, 6, 8, generator=g)
v = checks.randn(2, 2, 6, 4, generator=g)
mask = (torch.rand(2, 1, 5, 6, generator=g) < 0.5).to(q.device)
mask[0, 0, 1] = mask[1] = False  # one empty row, and one whole empty sequence
for dtype in (torch.float32, torch.float64, torch.float16):
    out, weights = scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    empty = ~mask.any(-1).expand(2, 2, 5)
    checks.close(
        weights[empty], torch.zeros_like(weights[empty]), what=f"weights of empty rows in {dtype}"
    )
    checks.close(out[empty], torch.zeros_like(out[empty]), what=f"output of empty rows in {dtype}")


def output(q, k, v, mask=mask):
    return scaled_dot_product_attention(q, k, v, mask)[0]


checks.gradients(
    output,
    lambda q, k, v: pytorch_attention(q, k, v, mask),
    q,
    k,
    v,
    names=("q", "k", "v"),
    rtol=1e-4,
    hint="Rows without a visible key must pass back 0",
)
hidden_from_all = torch.zeros(5, 6, dtype=torch.bool, device=q.device)
with checks.unchanged(mask=hidden_from_all):
    scaled_dot_product_attention(q, k, v, hidden_from_all)
checks.gradients(
    lambda q, k, v: output(q, k, v, hidden_from_all),
    lambda q, k, v: 0 * (q.sum() + k.sum() + v.sum()) * q[..., :4],
    q,
    k,
    v,
    names=("q", "k", "v"),
    hint="With nothing visible at all, every gradient is 0",
)
# The weights are an output as well: entropy penalties and the like differentiate them.
checks.gradients(
    lambda q, k: scaled_dot_product_attention(q, k, v, mask)[1],
    lambda q, k: pytorch_weights(q, k, mask),
    q,
    k,
    names=("q (through the weights)", "k (through the weights)"),
    rtol=1e-4,
)
### END HIDDEN TESTS

# %% check="sdpa" points=1
g = checks.generator(4)
q, k, v = (checks.randn(1, 2, 5, 128, generator=g, scale=25.0).half() for _ in range(3))
out, weights = scaled_dot_product_attention(q, q, v)
assert out.dtype == weights.dtype == torch.float16, f"float16 in, float16 out; yours is {out.dtype}"
assert torch.isfinite(out).all(), (
    "in float16 q·k passes 65504 and becomes inf before it is divided: scale q first"
)
### BEGIN HIDDEN TESTS
# Every q·q here is beyond 65504 before the division; the largest score wins by far, so the result
# is exact.
checks.close(
    weights, pytorch_weights(q, q), what="float16 weights of large inputs", dtype=torch.float16
)
checks.close(
    out, pytorch_attention(q, q, v), what="float16 output of large inputs", dtype=torch.float16
)
half = [checks.randn(2, 3, 6, 32, generator=g, scale=0.3).half() for _ in range(3)]
checks.close(
    scaled_dot_product_attention(*half)[0],
    pytorch_attention(*half),
    what="the float16 output",
    rtol=2e-3,
    dtype=torch.float16,
)
checks.keeps_dtype(
    lambda *inputs: scaled_dot_product_attention(*inputs),
    *(0.3 * checks.randn(2, 3, 5, 8, generator=g) for _ in range(3)),
    reference=lambda q, k, v: (pytorch_attention(q, k, v), pytorch_weights(q, k)),
    rtol={torch.float16: 3e-3, torch.bfloat16: 2e-2},
    what="the output or the weights",
)
for scale in (1e3, 1e5):  # softmax without subtracting the maximum gives NaN here
    q, k, v = (checks.randn(4, 16, generator=g, dtype=torch.float64) for _ in range(3))
    out, weights = scaled_dot_product_attention(q * scale, k, v)
    checks.close(
        weights, pytorch_weights(q * scale, k), what=f"the weights of scores around {scale:.0e}"
    )
    checks.close(
        out, pytorch_attention(q * scale, k, v), what=f"the output for scores around {scale:.0e}"
    )
### END HIDDEN TESTS

# %% [markdown]
# ### What it does on a sentence
#
# No training yet. The vectors below come from counting: two words of Python's own documentation are
# close where they keep the same company (positive pointwise mutual information of words up to four
# apart, then an SVD to 48 dimensions). With $q = k = v = $ these vectors, attention looks for words
# of related use. A word would always find itself first, so the diagonal is masked. The same vectors
# go through your function twice, once free to look both ways and once with your causal mask as
# well.


# %% tags=["experiment"]
def word_vectors(
    vocabulary: int = 1200, width: int = 48, window: int = 4
) -> tuple[dict[str, int], Tensor]:
    """Words of the documentation by frequency, and a vector (vocabulary, width) for each, of mean
    square 1.
    """
    words = re.findall(r"[a-z_]+|[.,;:()]", "\n".join(data.documentation().values()).lower())
    index = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocabulary))}
    ids = torch.tensor([index.get(word, -1) for word in words])
    counts = torch.zeros(vocabulary * vocabulary)
    for distance in range(1, window + 1):
        left, right = ids[:-distance], ids[distance:]
        known = (left >= 0) & (right >= 0)
        counts += torch.bincount(left[known] * vocabulary + right[known], minlength=vocabulary**2)
    counts = counts.view(vocabulary, vocabulary)
    together = (counts + counts.T) / (2 * counts.sum())
    alone = together.sum(1)
    information = torch.log(together / (alone[:, None] * alone)).clamp(min=0).nan_to_num(0)
    torch.manual_seed(0)
    u, s, _ = torch.svd_lowrank(information, q=width)
    vectors = u * s.sqrt()
    return index, vectors / vectors.pow(2).mean(1, keepdim=True).sqrt()


text = (
    "note that functions created with lambda expressions cannot contain statements or annotations"
)
sentence = text.split()
index, vectors = word_vectors()
x = vectors[[index[word] for word in sentence]]  # (12, 48)
others = ~torch.eye(len(sentence), dtype=torch.bool)
_, both_ways = scaled_dot_product_attention(x, x, x, others)
_, causal = scaled_dot_product_attention(
    x, x, x, others & causal_mask(len(sentence), len(sentence))
)

# %% tags=["experiment", "figure"]
# Figure: a sentence's weights, looking both ways and with a causal mask
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 5))
plot.attention(both_ways, sentence, title="bidirectional (BERT)", colorbar=False, ax=axes[0])
plot.attention(causal, sentence, title="causal (GPT)", ax=axes[1])
plot.caption(
    fig,
    "A sentence of the documentation. Left: every row sums to 1, and words find their relatives "
    "on both sides: “lambda” and “expressions” each other, “statements” the “expressions”, "
    "“functions” the “lambda”. Right: the upper triangle is gone, its weight shared out among the "
    "words already read. The first row sees nothing, and is 0.",
)
plot.plt.show()

# %% [markdown]
# ### Saturation, measured
#
# Write down before you run the next cell: if the division is left out, what happens to the gradient
# through the softmax as $d_k$ goes from 4 to 1024? And what if one divides by $d_k$?
#
# The cell draws random queries and 64 keys with unit variance and passes them through *your*
# function. Multiplying $q$ by $\sqrt{d_k}$ cancels your scaling, dividing it by $\sqrt{d_k}$ turns
# it into $1/d_k$. The size of the gradient is the norm of the Jacobian
# $\lVert \operatorname{diag}(w) - ww^\top\rVert_F = \sqrt{\sum_j w_j^2 - 2\sum_j w_j^3
# + (\sum_j w_j^2)^2}$
# of each row.


# %% tags=["experiment"]
def jacobian_norm(w: Tensor) -> Tensor:
    """‖diag(w) − w wᵀ‖ (Frobenius) of every row: w (…, k_len) → (…)."""
    square, cube = w.pow(2).sum(-1), w.pow(3).sum(-1)
    return (square - 2 * cube + square.pow(2)).clamp(min=0).sqrt()


g = torch.Generator().manual_seed(0)
dims = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
lines = {name: [] for name in ("divided by $\\sqrt{d_k}$", "not divided", "divided by $d_k$")}
bands = {name: ([], []) for name in lines}
certainty = {name: [] for name in lines}
for dim in dims:
    q, k = torch.randn(1000, dim, generator=g), torch.randn(64, dim, generator=g)
    for name, factor in zip(lines, (1.0, dim**0.5, dim**-0.5), strict=True):
        _, w = scaled_dot_product_attention(
            (q * factor).double(), k.double(), torch.zeros(64, 1).double()
        )
        low, middle, high = torch.quantile(jacobian_norm(w), torch.tensor([0.1, 0.5, 0.9]).double())
        lines[name].append(float(middle))
        bands[name][0].append(float(low))
        bands[name][1].append(float(high))
        certainty[name].append(float(w.amax(-1).mean()))

# %% tags=["experiment", "figure"]
# Figure: what the gradient must pass, and how decided a row is
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8))
axes[0].set_ylim(1e-6, 1)
plot.curves(
    dims,
    lines,
    bands=bands,
    logx=True,
    logy=True,
    xlabel="width of a query, $d_k$",
    ylabel="‖∂w / ∂s‖ of a row",
    title="what the gradient must pass",
    ax=axes[0],
)
plot.curves(
    dims,
    certainty,
    logx=True,
    logy=True,
    xlabel="width of a query, $d_k$",
    ylabel="largest weight of a row (mean)",
    title="how decided a row is",
    ax=axes[1],
)
axes[1].axhline(1 / 64, color="#888888", linewidth=1, linestyle=":")
axes[1].set_ylim(0.01, 1.2)
axes[1].get_legend().remove()  # the left one serves both
axes[1].annotate(
    "uniform: 1/64", (4, 1 / 64), textcoords="offset points", xytext=(0, -11), fontsize=8
)
plot.caption(
    fig,
    "64 random keys, 1000 random queries; line: median row, shade: 10 to 90 % of the rows. "
    "Undivided, rows are decided before training begins: beyond $d_k$ = 64 the gradient of the "
    "median row falls by orders of magnitude, that of the lowest tenth long before. Divided by "
    "$d_k$, every row tends to the plain average. Only the root keeps both independent of the "
    "width.",
)
plot.plt.show()

# %% [markdown]
# ## Many heads
#
# One softmax yields one average. A token that needs the previous word *and* the subject of the
# sentence can give each half its weight and receive a blur of the two. So the width $d$ is cut into
# $H$ **heads** of $d_k = d/H$; each has its own queries, keys and values, each attends on its own,
# and a last matrix $W_O$ mixes what they bring back:
#
# $$ \mathrm{head}_h = \mathrm{attention}(XW_Q^{(h)}, CW_K^{(h)}, CW_V^{(h)}), \qquad
# Y = [\mathrm{head}_1;\dots;\mathrm{head}_H]\,W_O, $$
#
# with $X$ $(L_q, d)$, $C$ $(L_k, d)$, each $W^{(h)}$ $(d, d_k)$ and $W_O$ $(d, d)$. In
# **self-attention** $C = X$. In **cross-attention** the queries come from one sequence and the keys
# and values from another: a translation asks about its source.
#
# Parameters and arithmetic do not depend on $H$: $H$ matrices $(d, d/H)$ side by side are one
# $(d, d)$. Only the number of $L_q \times L_k$ maps grows. Cutting and pasting is therefore a
# matter of views:
#
# ```
# (batch, seq, d_model) → view → (batch, seq, heads, head_dim)
#     → transpose → (batch, heads, seq, head_dim)
# ```
#
# The transpose is not decoration. A `view` straight to `(batch, heads, seq, head_dim)` has the
# right shape and the wrong content: it cuts the *sequence* into `heads` pieces.
#
# Separate projections are used here because they are easy to read; production code often fuses them
# into one matrix $(d, 3d)$, which is one larger product instead of three.


# %% exercise="mha" minutes=25 difficulty=2
class MultiHeadAttention(nn.Module):
    """Multi-head self- or cross-attention of "Attention Is All You Need", with PyTorch's biases.

    d_model: width of the token vectors, a multiple of `heads` (else ValueError). Head h owns the
    features h·head_dim … (h+1)·head_dim − 1 of the projected queries, keys and values, and the same
    features of what enters the output projection.
    Parameters: q_proj, k_proj, v_proj, out_proj, each nn.Linear(d_model, d_model) with a bias, and
    nothing else.
    """

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        if d_model % heads:
            raise ValueError(f"d_model {d_model} is not a multiple of heads {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        ### END SOLUTION

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: (batch, q_len, d_model) asks; context: (batch, k_len, d_model) is asked, None = x
        itself.

        mask: bool, broadcastable to (batch, heads, q_len, k_len), True = may attend.
        Returns (out, weights): (batch, q_len, d_model) and (batch, heads, q_len, k_len).
        """
        ### BEGIN SOLUTION
        context = x if context is None else context

        def split(t: Tensor) -> Tensor:  # (batch, seq, d_model) → (batch, heads, seq, head_dim)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out, weights = scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(context)), split(self.v_proj(context)), mask
        )
        return self.out_proj(out.transpose(1, 2).flatten(-2)), weights
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: back together</summary>
#
# After attention the tensor is `(batch, heads, seq, head_dim)`. Undo the transpose first, then join
# the last two axes. A transposed tensor cannot be `view`ed; `reshape` or `flatten` copy where they
# must.
# </details>
#
# <details><summary>Hint: what of the mask?</summary>
#
# Your `scaled_dot_product_attention` takes masks that broadcast: hand it on as it is.
# </details>


# %% tags=["support"]
# Support: modules with random weights, and PyTorch's own with the same ones
def pytorch_twin(mine: nn.Module, d_model: int, heads: int) -> nn.MultiheadAttention:
    """nn.MultiheadAttention with the weights of `mine`: the same function by another author."""
    twin = nn.MultiheadAttention(d_model, heads, batch_first=True).to(mine.q_proj.weight)
    projections = (mine.q_proj, mine.k_proj, mine.v_proj)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        twin.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        twin.out_proj.weight.copy_(mine.out_proj.weight)
        twin.out_proj.bias.copy_(mine.out_proj.bias)
    return twin


def random_attention(d_model: int, heads: int, generator: torch.Generator) -> nn.Module:
    """Your module in float64 on the profile's device, every parameter (biases too) random."""
    mine = MultiHeadAttention(d_model, heads).double().to(profile.device)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_model**0.5)
    return mine


# %% check="mha" points=1
mine = MultiHeadAttention(12, 3)
shapes = {name: tuple(p.shape) for name, p in mine.named_parameters()}
expected = {
    f"{name}_proj.{kind}": (12, 12) if kind == "weight" else (12,)
    for name in ("q", "k", "v", "out")
    for kind in ("weight", "bias")
}
assert shapes == expected, f"the parameters should be {expected}; yours are {shapes}"
out, weights = checks.parts(mine(torch.zeros(2, 5, 12)), "out", "weights", what="forward")
assert out.shape == (2, 5, 12), (
    f"out has shape {tuple(out.shape)}, not (batch, q_len, d_model) = (2, 5, 12)"
)
assert weights.shape == (2, 3, 5, 5), (
    f"weights have shape {tuple(weights.shape)}, not (batch, heads, q_len, k_len) = (2, 3, 5, 5)"
)
### BEGIN HIDDEN TESTS
checks.raises(
    ValueError, MultiHeadAttention, 10, 3, because="10 features cannot be cut into 3 equal heads"
)
# With keys all alike every weight is 1/k_len, and with identity projections the output is the mean
# of the context.
mine = MultiHeadAttention(6, 2).double()
with torch.no_grad():
    for p in mine.parameters():
        p.copy_(torch.eye(6) if p.dim() == 2 else torch.zeros(6))
    mine.k_proj.weight.zero_()
context = torch.randn(2, 4, 6, generator=checks.generator(10)).double()
out, weights = mine(torch.zeros(2, 3, 6).double(), context)
checks.close(
    weights, torch.full((2, 2, 3, 4), 0.25).double(), what="the weights where all keys are alike"
)
checks.close(
    out, context.mean(1, keepdim=True).expand(2, 3, 6), what="the output where all keys are alike"
)
### END HIDDEN TESTS

# %% check="mha" points=3
g = checks.generator(11)
mine = random_attention(8, 2, g)
twin = pytorch_twin(mine, 8, 2)
x = checks.randn(1, 3, 8, generator=g, dtype=torch.float64)
with checks.forbidden("scaled_dot_product_attention", "multi_head_attention_forward"):
    out, weights = mine(x)
expected, expected_weights = twin(x, x, x, average_attn_weights=False)
checks.close(
    weights,
    expected_weights,
    what="the weights of 2 heads",
    hint="Is the head axis split off the features, then moved before the sequence?",
)
checks.close(out, expected, what="the output of 2 heads")
### BEGIN HIDDEN TESTS
for d_model, heads, batch, q_len, k_len, cross in [
    (12, 3, 2, 5, 5, False),
    (12, 12, 1, 4, 4, False),
    (10, 2, 2, 4, 4, True),
    (10, 1, 3, 1, 6, True),
    (16, 4, 2, 7, 3, True),
    (6, 2, 2, 2, 1, True),
]:
    mine = random_attention(d_model, heads, g)
    twin = pytorch_twin(mine, d_model, heads)
    x = checks.randn(batch, q_len, d_model, generator=g, dtype=torch.float64)
    context = checks.randn(batch, k_len, d_model, generator=g, dtype=torch.float64) if cross else x
    with (
        checks.unchanged(x=x, context=context),
        checks.forbidden("scaled_dot_product_attention", "multi_head_attention_forward"),
    ):
        out, weights = mine(x, context) if cross else mine(x)
    expected, expected_weights = twin(x, context, context, average_attn_weights=False)
    what = (
        f"with d_model {d_model}, {heads} heads, q_len {q_len}, k_len "
        f"{k_len}{', a context' if cross else ''}"
    )
    one_head = pytorch_weights(mine.q_proj(x), mine.k_proj(context))[:, None].expand_as(
        expected_weights
    )
    cut = [
        t.reshape(batch, heads, -1, d_model // heads)
        for t in (mine.q_proj(x), mine.k_proj(context))
    ]
    mistakes = {
        "one head over all features": one_head,
        "a view to (batch, heads, seq, head_dim), which cuts the sequence": pytorch_weights(*cut),
    }
    if cross and q_len == k_len:
        mistakes["ignoring the context"] = twin(x, x, x, average_attn_weights=False)[1]
    checks.close(weights, expected_weights, what=f"the weights {what}", mistakes=mistakes)
    separate = pytorch_attention(
        *(
            p(t).unflatten(-1, (heads, -1)).transpose(1, 2)
            for p, t in ((mine.q_proj, x), (mine.k_proj, context), (mine.v_proj, context))
        )
    )
    checks.close(
        out,
        expected,
        what=f"the output {what}",
        mistakes={
            "joining the heads without transposing back": mine.out_proj(
                separate.reshape(batch, q_len, d_model)
            ),
            "leaving out the output projection": separate.transpose(1, 2).flatten(-2),
        },
    )
# Law: permuting the batch permutes the output.
x = checks.randn(3, 4, 6, generator=g, dtype=torch.float64)
checks.close(mine(x[[2, 0, 1]])[0], mine(x)[0][[2, 0, 1]], what="the output of a permuted batch")
### END HIDDEN TESTS

# %% check="mha" points=2
g = checks.generator(12)
mine = random_attention(8, 2, g)
x = checks.randn(1, 4, 8, generator=g, dtype=torch.float64)
causal = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril()
changed = x.clone()
changed[:, 3] += 1
checks.close(
    mine(changed, mask=causal)[0][:, :3],
    mine(x, mask=causal)[0][:, :3],
    what="outputs 0 to 2 under a causal mask after token 3 was changed",
    hint="Does the mask reach the attention?",
)
### BEGIN HIDDEN TESTS
d_model, heads, batch, q_len, k_len = 12, 3, 2, 4, 6
mine = random_attention(d_model, heads, g)
twin = pytorch_twin(mine, d_model, heads)
x = checks.randn(batch, q_len, d_model, generator=g, dtype=torch.float64)
context = checks.randn(batch, k_len, d_model, generator=g, dtype=torch.float64)
for shape in [
    (q_len, k_len),
    (heads, q_len, k_len),
    (batch, 1, 1, k_len),
    (batch, heads, q_len, k_len),
]:
    mask = (torch.rand(shape, generator=g) < 0.6).to(x.device)
    mask[..., 0] = True
    # nn.MultiheadAttention: True = hidden
    hidden = ~mask.expand(batch, heads, q_len, k_len).reshape(batch * heads, q_len, k_len)
    expected, expected_weights = twin(
        x, context, context, attn_mask=hidden, average_attn_weights=False
    )
    out, weights = mine(x, context, mask)
    checks.close(weights, expected_weights, what=f"the weights with a mask of shape {shape}")
    checks.close(out, expected, what=f"the output with a mask of shape {shape}")
only_first = torch.zeros(q_len, k_len, dtype=torch.bool, device=x.device)
only_first[0, :2] = True  # query 0 sees two keys, the others nothing
with checks.unchanged(mask=only_first):
    out, _ = mine(x, context, only_first)
checks.close(
    out[:, 1:],
    mine.out_proj.bias.expand(batch, q_len - 1, d_model),
    what="the output of queries that see nothing",
)
out.pow(2).sum().backward()
for name, parameter in mine.named_parameters():
    assert parameter.grad is not None, f"no gradient reaches {name}"
    assert torch.isfinite(parameter.grad).all(), (
        f"the gradient of {name} is not finite where a query sees nothing"
    )
checks.gradients(
    lambda x, c: mine(x, c)[0], lambda x, c: twin(x, c, c)[0], x, context, names=("x", "context")
)
### END HIDDEN TESTS

# %% [markdown]
# ## What decoding costs: the KV cache
#
# A decoder writes one token at a time. The keys and values of the tokens before it do not change,
# so they are kept: the **KV cache**. Each step then computes one query and reads the *whole* cache,
# and the cache, not the arithmetic, sets both the memory and the time. Per token of context it
# holds a key and a value, in every layer, for every key-value head.
#
# **Multi-query attention** (MQA, Shazeer 2019) keeps $H$ query heads and lets all of them share a
# single head of keys and values: the cache shrinks by $H$, and quality suffers somewhat.
# **Grouped-query attention** (GQA, Ainslie 2023) is the middle: $H_{kv}$ key-value heads, each
# shared by a group of $H/H_{kv}$ query heads. $H_{kv}=H$ is MHA, $H_{kv}=1$ is MQA.


# %%
@dataclass(frozen=True)
class AttentionConfig:
    """What the cache depends on, and the number of query heads, which it does not."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


LLAMA_2_7B = AttentionConfig(layers=32, heads=32, kv_heads=32, head_dim=128)
LLAMA_2_70B = AttentionConfig(layers=80, heads=64, kv_heads=8, head_dim=128)
LLAMA_3_8B = AttentionConfig(layers=32, heads=32, kv_heads=8, head_dim=128)


# %% exercise="kv_cache_bytes" minutes=5 difficulty=1
def kv_cache_bytes(
    config: AttentionConfig, batch: int, seq: int, bytes_per_element: int = 2
) -> int:
    """Bytes of the keys and values that a decoder keeps for `batch` sequences of `seq` tokens.

    bytes_per_element: 2 for bfloat16.
    """
    ### BEGIN SOLUTION
    per_token = 2 * config.layers * config.kv_heads * config.head_dim  # 2: a key and a value
    return per_token * batch * seq * bytes_per_element
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what is stored</summary>
#
# Queries are used once and forgotten. Count the numbers that one token leaves behind in one layer,
# then multiply by what there is more of.
# </details>

# %% check="kv_cache_bytes" points=1
checks.close(
    kv_cache_bytes(LLAMA_2_7B, batch=1, seq=1),
    524_288,
    what="Llama-2-7B, bytes per token",
    hint="It is 512 KiB: a key and a value of 128 numbers of 2 bytes, for 32 heads in 32 layers",
    mistakes={"counting keys or values but not both": 262_144, "leaving out the layers": 16_384},
)
### BEGIN HIDDEN TESTS
KIB, GIB = 2**10, 2**30
checks.close(
    kv_cache_bytes(LLAMA_2_70B, 1, 1),
    320 * KIB,
    what="Llama-2-70B, bytes per token",
    mistakes={
        "counting query heads instead of key-value heads": 2560 * KIB,
        "leaving out the factor 2": 160 * KIB,
    },
)
checks.close(kv_cache_bytes(LLAMA_3_8B, 1, 1), 128 * KIB, what="Llama-3-8B, bytes per token")
checks.close(
    kv_cache_bytes(LLAMA_2_7B, 8, 4096), 16 * GIB, what="Llama-2-7B, 8 sequences of 4096 tokens"
)
checks.close(kv_cache_bytes(LLAMA_3_8B, 1, 131_072), 16 * GIB, what="Llama-3-8B, 131072 tokens")
checks.close(
    kv_cache_bytes(LLAMA_3_8B, 1, 131_072, bytes_per_element=1),
    8 * GIB,
    what="Llama-3-8B, 131072 tokens, 8-bit cache",
)
checks.close(
    kv_cache_bytes(AttentionConfig(3, 10, 1, 7), 5, 11),
    4620,
    what="an MQA model (3 layers, 10 heads of 7), 5 sequences of 11 tokens",
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: Llama-2-70B's cache under three kinds of attention
contexts = [2**n for n in range(10, 18)]
variants = {"MHA, 64 KV heads": 64, "GQA, 8 KV heads (as built)": 8, "MQA, 1 KV head": 1}
gib = {
    name: [kv_cache_bytes(AttentionConfig(80, 64, kv_heads, 128), 1, n) / 2**30 for n in contexts]
    for name, kv_heads in variants.items()
}
ax = plot.curves(
    contexts,
    gib,
    logx=True,
    logy=True,
    xlabel="context (tokens)",
    ylabel="KV cache of one sequence (GiB)",
    title="Llama-2-70B's cache under three kinds of attention",
)
ax.axhline(80, color="#888888", linewidth=1, linestyle=":")
ax.annotate(
    "memory of one 80 GiB accelerator",
    (contexts[0], 80),
    textcoords="offset points",
    xytext=(0, -12),
    fontsize=8,
)
plot.caption(
    ax.figure,
    "bfloat16, computed by your function. With 64 key-value heads a single sequence of 32k tokens "
    "would fill an accelerator, without the weights; 8 heads fit eight such sequences in the same "
    "space.",
)
plot.plt.show()

# %% [markdown]
# ## Grouped-query attention without the repeat
#
# The tempting implementation repeats each key-value head `group` times and calls MHA. It is
# correct, and in memory traffic it undoes the whole point: the repeated copy is as large as the
# cache that was saved. Broadcasting does not help by itself either. `torch.matmul` of
# `(batch, kv_heads, group, q_len, head_dim)` with `(batch, kv_heads, 1, head_dim, k_len)` *does*
# make the copy, inside, where you do not see it.
#
# The product needs no copy if it is asked for differently: the queries of one group all meet the
# same keys. Which of the axes of $q$ may they then be counted as?


# %% exercise="gqa" minutes=25 difficulty=3
def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in which groups of consecutive query heads share a head of keys and values.

    q: (batch, heads, q_len, head_dim); k: (batch, kv_heads, k_len, head_dim);
    v: (batch, kv_heads, k_len, d_v). heads is a multiple of kv_heads (else ValueError); query head
    h uses key-value head h // (heads // kv_heads).
    mask: bool, broadcastable to (batch, heads, q_len, k_len), True = may attend; rows that see
    nothing give 0. As in scaled_dot_product_attention, hidden keys have a weight of exactly 0, and
    scores of any size give finite results, in float16 too.

    Returns (batch, heads, q_len, d_v) in the dtype of q. Nothing of the size of k repeated for
    every query head is ever made, not even by a broadcasting product. PyTorch's own
    scaled_dot_product_attention is not allowed here.
    """
    ### BEGIN SOLUTION
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot be shared out over {kv_heads} key-value heads"
        )
    # The queries of a group meet the same keys, so they count as further rows:
    # (batch, kv_heads, group·q_len, head_dim).
    stacked = (q / math.sqrt(head_dim)).reshape(batch, kv_heads, -1, head_dim)
    scores = (stacked @ k.transpose(-2, -1)).view(batch, heads, q_len, k_len)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    out = weights.view(batch, kv_heads, -1, k_len) @ v
    return out.view(batch, heads, q_len, -1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the axis</summary>
#
# A key neither knows nor cares from which head a query came. `group` query heads of `q_len` rows
# each are `group · q_len` rows of one matrix.
# </details>
#
# <details><summary>Hint: the mask</summary>
#
# It is given for `heads`, not for groups. Bring the scores back to `(batch, heads, q_len, k_len)`
# before you use it; that is a view.
# </details>

# %% check="gqa" points=2
q = torch.zeros(1, 4, 1, 2)  # 4 query heads that attend evenly
k = torch.zeros(1, 2, 3, 2)
# key-value head 0 averages to 2, head 1 to 20
v = torch.tensor([[[[1.0], [2.0], [3.0]], [[10.0], [20.0], [30.0]]]])
checks.close(
    grouped_query_attention(q, k, v).flatten(),
    torch.tensor([2.0, 2.0, 20.0, 20.0]),
    what="the output of the 4 query heads",
    hint="Query head h belongs to key-value head h // (heads // kv_heads)",
    mistakes={
        "dealing the query heads out in turn, h % kv_heads,": torch.tensor([2.0, 20.0, 2.0, 20.0])
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(20)
for batch, heads, kv_heads, q_len, k_len, dim, d_v in [
    (2, 4, 2, 5, 5, 8, 8),
    (1, 6, 1, 1, 9, 16, 4),
    (2, 6, 3, 3, 7, 5, 6),
    (1, 3, 3, 4, 2, 8, 8),
    (3, 8, 2, 1, 1, 4, 1),
]:
    q = checks.randn(batch, heads, q_len, dim, generator=g)
    k = checks.randn(batch, kv_heads, k_len, dim, generator=g)
    v = checks.randn(batch, kv_heads, k_len, d_v, generator=g)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    with checks.unchanged(q=q, k=k, v=v), checks.forbidden("scaled_dot_product_attention"):
        out = grouped_query_attention(q, k, v)
    group = heads // kv_heads
    in_turn = torch.arange(heads, device=q.device) % kv_heads
    checks.close(
        out,
        expected,
        what=f"the output for {heads} heads over {kv_heads}, q_len {q_len}, k_len {k_len}",
        dtype=torch.float32,
        mistakes={
            "dealing the query heads out in turn, h % kv_heads,": pytorch_attention(
                q, k[:, in_turn], v[:, in_turn]
            ),
            "no scaling": pytorch_attention(
                q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), scale=1.0
            ),
        },
    )
q = checks.randn(2, 5, 6, 8, generator=g).transpose(1, 2)  # views as a model makes them
k, v = (checks.randn(2, 9, 2, 8, generator=g).transpose(1, 2) for _ in range(2))
checks.close(
    grouped_query_attention(q, k, v),
    F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True),
    what="the output for transposed views",
)
checks.raises(
    ValueError,
    grouped_query_attention,
    torch.zeros(1, 5, 1, 2),
    torch.zeros(1, 2, 1, 2),
    torch.zeros(1, 2, 1, 2),
    because="5 query heads cannot be shared out over 2",
)
### END HIDDEN TESTS

# %% check="gqa" points=2
g = checks.generator(21)
q = checks.randn(1, 4, 3, 8, generator=g, dtype=torch.float64)
k, v = (checks.randn(1, 2, 3, 8, generator=g, dtype=torch.float64) for _ in range(2))
causal = torch.ones(3, 3, dtype=torch.bool, device=q.device).tril()
checks.close(
    grouped_query_attention(q, k, v, causal)[:, :, 0],
    v[:, :, 0].repeat_interleave(2, 1),
    what="the first query under a causal mask",
    hint="It sees only key 0, so its output is the value of key 0, in every head",
)
### BEGIN HIDDEN TESTS
batch, heads, kv_heads, q_len, k_len = 2, 6, 2, 3, 5
q = checks.randn(batch, heads, q_len, 8, generator=g)
k, v = (checks.randn(batch, kv_heads, k_len, 8, generator=g) for _ in range(2))
wide_k, wide_v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
for shape in [
    (q_len, k_len),
    (batch, 1, 1, k_len),
    (1, heads, q_len, k_len),
    (batch, heads, q_len, k_len),
]:
    mask = (torch.rand(shape, generator=g) < 0.6).to(q.device)
    mask[..., -1, :] = False  # the last query sees nothing
    full = mask.expand(batch, heads, q_len, k_len)
    with checks.unchanged(mask=mask):
        out = grouped_query_attention(q, k, v, mask)
    checks.close(
        out,
        pytorch_attention(q, wide_k, wide_v, full),
        what=f"the output with a mask of shape {shape}",
    )
bfloat = [t.bfloat16() for t in (q, k, v)]
checks.close(
    grouped_query_attention(*bfloat),
    F.scaled_dot_product_attention(*(t.double() for t in bfloat), enable_gqa=True),
    what="the bfloat16 output",
    rtol=2e-2,
    dtype=torch.bfloat16,
)
checks.gradients(
    lambda q, k, v: grouped_query_attention(q, k, v, mask),
    lambda q, k, v: pytorch_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), full
    ),
    q,
    k,
    v,
    names=("q", "k", "v"),
    rtol=1e-4,
)
# Hidden keys have no weight, even where every visible score lies far below 0.
low = torch.tensor([-3e5, -2e5, 1.0], device=q.device).view(1, 1, 3, 1).double()
out = grouped_query_attention(
    torch.ones(1, 2, 1, 1, dtype=torch.float64, device=q.device),
    low,
    low.sign(),
    torch.tensor([True, True, False], device=q.device),
)
checks.close(out, -torch.ones_like(out), what="the output where all visible scores are low")
for scale in (1e3, 1e5):
    far = [t.double() for t in (q * scale, k, v)]
    checks.close(
        grouped_query_attention(*far),
        pytorch_attention(far[0], wide_k, wide_v),
        what=f"the output for scores around {scale:.0e}",
    )
large = [checks.randn(1, n, 5, 128, generator=g, scale=25.0).half() for n in (4, 2)]
large[0] = large[1].repeat_interleave(2, 1)  # every q·q is beyond 65504 before the division
checks.close(
    grouped_query_attention(large[0], large[1], large[1]),
    pytorch_attention(large[0], large[0], large[0]),
    what="the float16 output of large inputs",
    dtype=torch.float16,
)
half = [t.half() * 0.3 for t in (q, k, v)]
checks.close(
    grouped_query_attention(*half),
    F.scaled_dot_product_attention(*(t.double() for t in half), enable_gqa=True),
    what="the float16 output",
    rtol=2e-3,
    dtype=torch.float16,
)
# Law: as many key-value heads as query heads is MHA.
checks.close(
    grouped_query_attention(q, wide_k, wide_v),
    pytorch_attention(q, wide_k, wide_v),
    what="kv_heads = heads against MHA",
)
### END HIDDEN TESTS

# %% check="gqa" points=3
g = checks.generator(22)
q = checks.randn(1, 8, 1, 32, generator=g)  # one new query, a cache of 64 tokens
k, v = (checks.randn(1, 2, 64, 32, generator=g) for _ in range(2))
with checks.allocations() as made:
    grouped_query_attention(q, k, v)
assert made.largest < 4 * k.numel(), (
    f"a tensor of {made.largest} elements was made: K, repeated for every query head, has "
    f"{4 * k.numel()}"
)
### BEGIN HIDDEN TESTS
q = checks.randn(2, 12, 1, 32, generator=g)
k, v = (checks.randn(2, 3, 96, 32, generator=g) for _ in range(2))
expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
for given_k, given_v in (
    (k, v),
    (
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v.transpose(1, 2).contiguous().transpose(1, 2),
    ),
):
    for mask in (None, torch.ones(1, 96, dtype=torch.bool, device=q.device)):
        with checks.allocations() as made:
            out = grouped_query_attention(q, given_k, given_v, mask)
        checks.close(out, expected, what="the output of a decoding step")
        # One plain copy of K and one of V are forgiven; the repeat would be four times as much for
        # each.
        assert made.largest <= k.numel(), (
            f"the largest tensor made has {made.largest} elements; K, unrepeated, has {k.numel()}"
        )
        assert made.total < 4 * k.numel(), (
            f"{made.total} elements are made in all, as many as K repeated for every query head "
            f"({4 * k.numel()})"
        )
### END HIDDEN TESTS

# %% [markdown]
# ### From an MHA checkpoint to GQA
#
# A model trained with MHA need not be trained again. Ainslie et al. turn it into GQA by replacing
# the key heads of each group by their **mean**, the same for values, and training for another 5 %
# of the original steps. The mean beats keeping the first head of the group, and both beat a fresh
# start: it is the point closest (in squared error) to all the heads that it replaces.


# %% exercise="mha_to_gqa" minutes=5 difficulty=2
def mha_to_gqa(w_k: Tensor, groups: int) -> Tensor:
    """The key (or value) projection of a GQA model with `groups` key-value heads, mean-pooled from
    that of an MHA model.

    w_k: (heads, head_dim, d_model). Group j is made of the consecutive heads that query heads of
    group j will use. Returns (groups, head_dim, d_model), in the dtype of w_k. ValueError if heads
    is not a multiple of groups.
    """
    ### BEGIN SOLUTION
    heads = w_k.shape[0]
    if heads % groups:
        raise ValueError(f"{heads} heads cannot be pooled into {groups} equal groups")
    return w_k.unflatten(0, (groups, heads // groups)).mean(1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which heads</summary>
#
# With 6 heads and 2 groups the first group is made of heads 0, 1, 2. Cut the first axis in two, and
# average over the part that counts inside a group.
# </details>

# %% check="mha_to_gqa" points=2
w = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(4, 1, 1)
checks.close(
    mha_to_gqa(w, 2),
    torch.tensor([2.0, 20.0]).view(2, 1, 1),
    what="4 heads pooled into 2",
    mistakes={
        "pooling every second head": torch.tensor([5.5, 16.5]).view(2, 1, 1),
        "summing instead of averaging": torch.tensor([4.0, 40.0]).view(2, 1, 1),
        "keeping the first head of each group": torch.tensor([1.0, 10.0]).view(2, 1, 1),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(30)
for heads, groups, head_dim, d_model in [
    (8, 2, 3, 24),
    (6, 3, 4, 5),
    (5, 1, 2, 10),
    (4, 4, 7, 3),
    (12, 2, 1, 12),
]:
    w = checks.randn(heads, head_dim, d_model, generator=g)
    pool = torch.kron(torch.eye(groups), torch.ones(1, heads // groups)).to(w)  # (groups, heads)
    pool = pool / (heads // groups)
    with checks.unchanged(w_k=w):
        pooled = mha_to_gqa(w, groups)
    checks.close(
        pooled,
        torch.einsum("gh,hdm->gdm", pool, w),
        what=f"{heads} heads pooled into {groups}",
        dtype=torch.float32,
    )
# Law: where the heads of a group are already alike, the GQA model is the MHA model.
shared = checks.randn(2, 4, 8, generator=g, dtype=torch.float64)
w = shared.repeat_interleave(3, 0)
x = checks.randn(5, 8, generator=g, dtype=torch.float64)
q = checks.randn(1, 6, 5, 4, generator=g, dtype=torch.float64)
mha_k, gqa_k = (
    torch.einsum("sm,hdm->hsd", x, w)[None],
    torch.einsum("sm,hdm->hsd", x, mha_to_gqa(w, 2))[None],
)
checks.close(
    F.scaled_dot_product_attention(q, gqa_k, gqa_k, enable_gqa=True),
    F.scaled_dot_product_attention(q, mha_k, mha_k),
    what="the output of the converted model, where the heads of each group were alike",
)
checks.raises(
    ValueError,
    mha_to_gqa,
    torch.zeros(6, 1, 1),
    4,
    because="6 heads cannot be pooled into 4 groups",
)
checks.keeps_dtype(lambda w: mha_to_gqa(w, 2), w, reference=lambda w: w.reshape(2, 3, 4, 8).mean(1))
checks.gradients(
    lambda w: mha_to_gqa(w, 2), lambda w: w.reshape(2, 3, 4, 8).mean(1), w, names=("w_k",)
)
### END HIDDEN TESTS

# %% [markdown]
# ## Reading attention maps
#
# A trained model has hundreds of maps. Two numbers per head sort them.
#
# **Entropy** says how sharply a head looks: $\mathcal H(w) = -\sum_j w_j \log w_j$, in nats. It is
# 0 when one key takes everything and $\log n$ when $n$ keys share alike, so $e^{\mathcal H}$ is
# "the number of keys looked at". Where $w_j = 0$ the term is 0, its limit.
#
# **Pattern scores** say where a head looks. Three patterns turn up in nearly every language model:
#
# - a **previous-token head** looks one position back;
# - a **sink** parks its weight on the first token. Softmax must sum to 1 even when a head has
#   nothing to say, and the first token is visible to all (lesson 10 shows what happens when it is
#   dropped);
# - an **induction head** looks at the token *after* an earlier occurrence of the current one. At
#   the second "Harry" it looks at what followed the first. If it then copies what it sees, the
#   model continues "… Harry" with "Potter", without ever having learned the name.


# %% exercise="attention_entropy" minutes=10 difficulty=1
def attention_entropy(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of each head's rows, in nats.

    weights: (batch, heads, q_len, k_len), rows summing to 1 over the visible keys.
    mask: bool, broadcastable to weights, True = may attend. Whatever stands in weights at hidden
    positions (0, or a leftover such as NaN) is ignored, and rows that see nothing do not count in
    the mean. 0·log 0 = 0.

    Returns (heads,), in the dtype of weights: the mean over the rows of all sequences that see
    something; 0 for a head without any such row.
    """
    ### BEGIN SOLUTION
    visible = (
        torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    )
    terms = torch.special.entr(weights.masked_fill(~visible, 0.0))  # −w log w, 0 at 0
    rows = terms.sum(-1)
    counted = visible.any(-1)  # (batch, heads, q_len)
    return rows.sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: NaN that should not count</summary>
#
# `NaN × 0` is NaN: hidden positions must be replaced before anything is computed from them.
# `torch.special` has a function for −w log w that knows its limit at 0.
# </details>
#
# <details><summary>Hint: which rows count</summary>
#
# Two sums per head, over sequences and queries: of the entropies, and of the rows that see
# something.
# </details>

# %% check="attention_entropy" points=2
# 1 sequence, 2 heads, 1 query, 4 keys
weights = torch.tensor([[[[0.25, 0.25, 0.25, 0.25]], [[0.0, 1.0, 0.0, 0.0]]]])
checks.close(
    attention_entropy(weights),
    torch.tensor([math.log(4), 0.0]),
    what="the entropy of a uniform and of a decided head",
    hint="0·log 0 counts as 0",
    mistakes={
        "the entropy in bits, not in nats,": torch.tensor([2.0, 0.0]),
        "the entropy with the sign forgotten": torch.tensor([-math.log(4), 0.0]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(40)
for n in (1, 2, 7, 50):
    checks.close(
        attention_entropy(torch.full((2, 3, 4, n), 1 / n, dtype=torch.float64)),
        torch.full((3,), math.log(n), dtype=torch.float64),
        what=f"uniform over {n} keys",
        atol=1e-12,
    )
p = torch.rand(3, 4, 5, 6, generator=g).double().softmax(-1)
with checks.unchanged(weights=p):
    entropy = attention_entropy(p)
checks.close(
    entropy,
    torch.distributions.Categorical(probs=p).entropy().mean((0, 2)),
    what="the entropy of random rows",
    mistakes={
        "a sum over rows instead of their mean": torch.distributions.Categorical(probs=p)
        .entropy()
        .sum((0, 2))
    },
)
# Law: splitting each key into two halves adds log 2.
checks.close(
    attention_entropy(torch.cat([p, p], -1) / 2),
    attention_entropy(p) + math.log(2),
    what="the entropy after each key was split in two",
)
decided = torch.eye(5)[None, None].expand(2, 3, 5, 5)
checks.close(attention_entropy(decided), torch.zeros(3), what="one-hot rows", atol=1e-7)
### END HIDDEN TESTS

# %% check="attention_entropy" points=1
weights = torch.tensor([[[[0.5, 0.5, math.nan], [math.nan, math.nan, math.nan]]]])
mask = torch.tensor([[True, True, False], [False, False, False]])
checks.close(
    attention_entropy(weights, mask),
    torch.tensor([math.log(2)]),
    what="the entropy with one hidden key and one empty row",
    hint="Hidden positions are ignored, whatever stands there; the empty row does not count in "
    "the mean",
    mistakes={"counting the empty row in the mean": torch.tensor([math.log(2) / 2])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(41)
logits = torch.randn(3, 2, 6, 6, generator=g).double()
causal = torch.ones(6, 6, dtype=torch.bool).tril()
lengths = torch.tensor([6, 3, 0])
real = torch.arange(6) < lengths[:, None]
# (3, 1, 6, 6): padded keys and padded queries out
mask = causal & real[:, None, None, :] & real[:, None, :, None]
weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)  # NaN in the empty rows
rows = [
    [
        torch.distributions.Categorical(probs=weights[b, h, i, : i + 1]).entropy()
        for b in range(3)
        for i in range(int(lengths[b]))
    ]
    for h in range(2)
]
checks.close(
    attention_entropy(weights, mask),
    torch.stack([torch.stack(r).mean() for r in rows]),
    what="the entropy of a padded causal batch",
)
leftover = torch.where(mask, weights, torch.rand(weights.shape, generator=g).double())
checks.close(
    attention_entropy(leftover, mask),
    attention_entropy(weights, mask),
    what="the entropy where hidden positions hold leftovers",
)
checks.close(
    attention_entropy(weights, torch.zeros(6, 6, dtype=torch.bool)),
    torch.zeros(2).double(),
    what="the entropy with everything hidden",
)
one_head_blind = mask.expand(3, 2, 6, 6).clone()
one_head_blind[:, 1] = False
checks.close(
    attention_entropy(weights, one_head_blind)[1], 0.0, what="the entropy of a head without a row"
)
# Heads of unequal numbers of rows: each has its own mean.
unequal = mask.expand(3, 2, 6, 6).clone()
unequal[0, 1, 2:] = False
counted = [i for i in range(6) if i < 2], list(range(3))
few = [
    torch.distributions.Categorical(probs=weights[b, 1, i, : i + 1]).entropy()
    for b in range(2)
    for i in counted[b]
]
checks.close(
    attention_entropy(weights, unequal)[1],
    torch.stack(few).mean(),
    what="the entropy of a head that sees fewer rows than another",
)
checks.keeps_dtype(attention_entropy, logits.softmax(-1), what="the entropy")
checks.gradients(
    lambda w: attention_entropy(w, mask),
    lambda w: torch.special.entr(w.masked_fill(~mask, 0.0)).sum((0, 2, 3)) / mask.any(-1).sum(),
    leftover,
    names=("weights",),
)
### END HIDDEN TESTS


# %% exercise="head_scores" minutes=15 difficulty=2
def head_scores(weights: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """How much each head behaves like three known patterns, each from 0 to 1.

    weights: (batch, heads, seq, seq) of causal self-attention, seq ≥ 2; tokens: (batch, seq),
    integers. Returns three tensors (heads,) in the dtype of weights, averages of weights over the
    batch and the queries named here:

    "previous_token": weight on position i − 1, over the queries i ≥ 1.
    "sink":           weight on position 0, over the queries i ≥ 1.
    "induction":      total weight on all positions j + 1 where j < i and tokens[j] == tokens[i],
                      over those queries i that have at least one such j; 0 if there is none in the
                      batch.
    """
    ### BEGIN SOLUTION
    seq = tokens.shape[1]
    # (batch, i, j): j < i holds the same token
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after = F.pad(earlier, (1, 0))[..., :seq]  # the same, moved to key j + 1
    repeated = earlier.any(-1)[:, None]  # (batch, 1, i)
    found = (weights * after[:, None]).sum(-1) * repeated  # (batch, heads, i)
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "sink": weights[:, :, 1:, 0].mean((0, 2)),
        "induction": found.sum((0, 2)) / repeated.sum().clamp(min=1),
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the induction mask</summary>
#
# Start with a boolean `(batch, i, j)` that says "the token at j equals the token at i, and j < i".
# The keys to look at are one further to the right. Test it by hand on the tokens `5 6 5 5`: for the
# query at position 3 it must be True at the keys 1 and 3.
# </details>

# %% check="head_scores" points=1
# 1 sequence, 1 head, 3 tokens
weights = torch.tensor([[[[1.0, 0, 0], [0.3, 0.7, 0], [0.2, 0.5, 0.3]]]])
scores = head_scores(weights, torch.tensor([[7, 8, 9]]))
checks.close(
    scores["previous_token"],
    torch.tensor([0.4]),
    what="the previous-token score",
    hint="(0.3 + 0.5) / 2: query 0 has no previous token",
    mistakes={
        "looking at the next token": torch.tensor([0.0]),
        "counting query 0 in the mean": torch.tensor([0.8 / 3]),
    },
)
checks.close(
    scores["sink"],
    torch.tensor([0.25]),
    what="the sink score",
    hint="(0.3 + 0.2) / 2: query 0 sees nothing but position 0",
    mistakes={"counting query 0 in the mean": torch.tensor([0.5])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(50)
for batch, heads, seq in [(1, 1, 2), (3, 2, 7), (2, 4, 12)]:
    weights = torch.rand(batch, heads, seq, seq, generator=g).double().tril()
    weights = weights / weights.sum(-1, keepdim=True)
    tokens = torch.randint(0, 5, (batch, seq), generator=g)
    with checks.unchanged(weights=weights, tokens=tokens):
        scores = head_scores(weights, tokens)
    pairs = [(b, i) for b in range(batch) for i in range(1, seq)]
    checks.close(
        scores["previous_token"],
        torch.stack(
            [sum(weights[b, h, i, i - 1] for b, i in pairs) / len(pairs) for h in range(heads)]
        ),
        what=f"the previous-token score of {heads} heads",
    )
    checks.close(
        scores["sink"],
        torch.stack(
            [sum(weights[b, h, i, 0] for b, i in pairs) / len(pairs) for h in range(heads)]
        ),
        what=f"the sink score of {heads} heads",
    )
### END HIDDEN TESTS

# %% check="head_scores" points=2
tokens = torch.tensor([[5, 6, 5, 5]])  # query 2 should look at key 1; query 3 at keys 1 and 3
weights = torch.tensor(
    [[[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.6, 0.3, 0], [0.1, 0.2, 0.4, 0.3]]]]
)
checks.close(
    head_scores(weights, tokens)["induction"],
    torch.tensor([0.55]),
    what="the induction score of 5 6 5 5",
    hint="Query 2 finds 0.6, query 3 finds 0.2 + 0.3",
    mistakes={
        "looking at the earlier token itself, not at what follows it,": torch.tensor([0.3]),
        "counting only the latest occurrence": torch.tensor([0.45]),
        "counting only the first occurrence": torch.tensor([0.4]),
        "averaging over all queries": torch.tensor([0.275]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(51)
for batch, heads, seq, vocab in [(1, 1, 5, 2), (3, 2, 9, 4), (2, 3, 16, 6), (4, 1, 6, 1)]:
    weights = torch.rand(batch, heads, seq, seq, generator=g).double().tril()
    weights = weights / weights.sum(-1, keepdim=True)
    tokens = torch.randint(0, vocab, (batch, seq), generator=g)
    total, count = torch.zeros(heads).double(), 0
    for b in range(batch):
        for i in range(seq):
            places = [j + 1 for j in range(i) if tokens[b, j] == tokens[b, i]]
            if places:
                total += weights[b, :, i, places].sum(-1)
                count += 1
    checks.close(
        head_scores(weights, tokens)["induction"],
        total / max(count, 1),
        what=f"the induction score, {seq} tokens of {vocab}",
    )
no_repeat = torch.arange(6).repeat(2, 1)
checks.close(
    head_scores(torch.full((2, 3, 6, 6), 1 / 6), no_repeat)["induction"],
    torch.zeros(3),
    what="the induction score where no token repeats",
)
# One sequence repeats often, the other hardly: queries count alike, sequences do not.
weights = torch.rand(2, 2, 7, 7, generator=g).double().tril()
tokens = torch.tensor([[3, 3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5, 0]])
found = weights[0, :, 1:, 1:].sum((1, 2)) + weights[1, :, 6, 1]
checks.close(
    head_scores(weights, tokens)["induction"],
    found / 7,
    what="the induction score where one sequence has six repeats and the other one",
    mistakes={
        "a mean over sequences of their means": (
            weights[0, :, 1:, 1:].sum((1, 2)) / 6 + weights[1, :, 6, 1]
        )
        / 2
    },
)
checks.keeps_dtype(lambda w: list(head_scores(w, tokens).values()), weights, what="a score")
# A query that gives its targets nothing is one of those averaged over.
blind = torch.eye(7).expand(1, 2, 7, 7).clone()
blind[0, 0, 6] = torch.tensor([0.0, 0.5, 0, 0, 0, 0, 0.5])
checks.close(
    head_scores(blind, torch.tensor([[4, 1, 2, 1, 3, 5, 4]]))["induction"],
    torch.tensor([0.25, 0.0]),
    what="the induction score where one of two repeats gives its targets no weight",
    mistakes={"counting only the queries that look at their targets": torch.tensor([0.5, 0.0])},
)
# A head that is made of nothing but induction has a score of 1.
block = torch.randperm(8, generator=g)
tokens = torch.cat([block, block])[None]
perfect = torch.eye(16)
perfect[8:] = 0
perfect[torch.arange(8, 16), torch.arange(1, 9)] = 1
checks.close(
    head_scores(perfect[None, None], tokens)["induction"],
    torch.ones(1),
    what="the induction score of a perfect induction head",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: a model learns to look things up
#
# The task (Olsson et al. 2022): a random block of distinct tokens is repeated until the sequence is
# full. Each sequence has a new block of a new length, so there is nothing to remember from one to
# the next, and counting positions does not help. Only one strategy works: find where the current
# token stood before, and copy what came after.
#
# Two models, of attention layers and nothing else — no MLP, no normalization — built from your
# `MultiHeadAttention`. One has two layers of 4 heads, the other one layer of 8: the same number of
# heads. **Write down before you run it:** which of them learns the task, does the loss fall
# gradually, and which heads will do what?

# %% tags=["experiment"]
VOCAB, LENGTH, WIDTH = 32, 32, 64


def repeated_blocks(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (batch, LENGTH), and True (batch, LENGTH − 1) where the next token follows from what
    was seen.
    """
    period = torch.randint(LENGTH // 4, LENGTH // 2 + 1, (batch, 1), generator=generator)
    # distinct tokens in random order
    blocks = torch.rand(batch, VOCAB, generator=generator).argsort(1)
    tokens = blocks.gather(1, torch.arange(LENGTH) % period)
    return tokens.to(profile.device), (torch.arange(1, LENGTH) > period).to(profile.device)


class AttentionOnly(nn.Module):
    """Token and position embeddings, residual attention layers, a linear read-out."""

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(MultiHeadAttention(WIDTH, heads) for _ in range(layers))
        self.unembed = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.token(tokens) + self.position.weight
        maps = []
        mask = causal_mask(LENGTH, LENGTH, device=tokens.device)
        for layer in self.layers:
            out, weights = layer(x, mask=mask)
            x = x + out
            maps.append(weights)
        return self.unembed(x), maps


def predictable(logits: Tensor, tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy where the next token follows from what was seen."""
    guess, target = logits[:, :-1][known], tokens[:, 1:][known]
    return F.cross_entropy(guess, target), (guess.argmax(-1) == target).float().mean()


def train(
    layers: int, heads: int, steps: int = 300, seed: int = 9
) -> tuple[nn.Module, list[float]]:
    """A trained model and its loss at every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = AttentionOnly(layers, heads).to(profile.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, 20)
    losses = []
    for _ in range(steps):
        tokens, known = repeated_blocks(32, generator)
        loss, _ = predictable(model(tokens)[0], tokens, known)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    return model, losses


two_layers, loss_two = train(layers=2, heads=4)
one_layer, loss_one = train(layers=1, heads=8)

# %% tags=["experiment", "figure"]
# Figure: the same number of heads, in series and in parallel
ax = plot.curves(
    range(len(loss_two)),
    {"two layers of 4 heads": loss_two, "one layer of 8 heads": loss_one},
    xlabel="training step",
    ylabel="loss on predictable tokens (nats)",
    title="the same number of heads, in series and in parallel",
)
ax.set_ylim(bottom=0)
ax.axhline(math.log(VOCAB), color="#888888", linewidth=1, linestyle=":")
ax.annotate(
    f"guessing: log {VOCAB}",
    (len(loss_two), math.log(VOCAB)),
    textcoords="offset points",
    xytext=(-4, -12),
    ha="right",
    fontsize=8,
)
plot.caption(
    ax.figure,
    "The fall is sudden: neither half of the circuit is of use without the other. One layer "
    "cannot do it, with any number of heads: to be found as “the token after Harry”, a position "
    "must first have looked at its neighbor.",
)
plot.plt.show()

# %% [markdown]
# Now find out who does it. Your `head_scores` and `attention_entropy`, for every head of the
# trained model, on fresh sequences. Scores describe; to see whether a head is *needed*, remove it:
# set its columns of the output projection to 0 and measure the accuracy again. To see whether it is
# *enough*, remove the other heads of its layer.

# %% tags=["experiment"]
tokens, known = repeated_blocks(64, torch.Generator().manual_seed(1234))
names, rows, without, alone = [], [], [], []


@torch.no_grad()
def accuracy_with(layer: int, heads: list[int]) -> float:
    """Accuracy of the two-layer model with only these heads of a layer connected, in percent."""
    projection = two_layers.layers[layer].out_proj.weight
    whole = projection.clone()
    kept = torch.zeros(4, device=projection.device)
    kept[heads] = 1
    projection.mul_(kept.repeat_interleave(WIDTH // 4))  # column c belongs to head c // head_dim
    accuracy = predictable(two_layers(tokens)[0], tokens, known)[1]
    projection.copy_(whole)
    return 100 * float(accuracy)


with torch.no_grad():
    maps = two_layers(tokens)[1]
    accuracy_one = 100 * float(predictable(one_layer(tokens)[0], tokens, known)[1])
for layer, weights in enumerate(maps):
    scores = head_scores(weights, tokens)
    entropy = attention_entropy(weights, causal_mask(LENGTH, LENGTH, device=tokens.device))
    for head in range(4):
        names.append(f"{layer + 1}.{head + 1}")
        rows.append(
            [float(scores[name][head]) for name in ("previous_token", "induction", "sink")]
            + [float(entropy[head].exp())]
        )
        without.append(accuracy_with(layer, [h for h in range(4) if h != head]))
        alone.append(accuracy_with(layer, [head]))

table = torch.tensor(rows)  # (8 heads, 4 numbers)
whole = accuracy_with(0, [0, 1, 2, 3])
print(
    f"accuracy on predictable tokens: two layers {whole:.1f} %, one layer {accuracy_one:.1f} %, "
    f"guessing {100 / VOCAB:.1f} %"
)
print(
    f"most like a previous-token head: {names[int(table[:, 0].argmax())]}; most like an induction "
    f"head: {names[int(table[:, 1].argmax())]}; largest sink score of any head: "
    f"{float(table[:, 2].max()):.2f}"
)
print(
    "keys looked at, exp(entropy): "
    + ", ".join(f"{name}: {float(n):.1f}" for name, n in zip(names, table[:, 3], strict=True))
)

# %% tags=["experiment", "figure"]
# Figure: what the heads look at, and what the model can do without
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4.2), gridspec_kw={"width_ratios": [1, 1.6]})
plot.heatmap(
    table[:, :3],
    xlabel="score",
    ylabel="layer.head",
    title="what the heads look at",
    unit="weight",
    vmin=0,
    vmax=1,
    annotate=".2f",
    xticks=["previous", "induction", "sink"],
    yticks=names,
    ax=axes[0],
)
place = torch.arange(8)
axes[1].bar(place - 0.2, without, width=0.38, color=plot.COLORS[0], label="this head removed")
axes[1].bar(
    place + 0.2,
    alone,
    width=0.38,
    color=plot.COLORS[1],
    hatch="//",
    edgecolor="white",
    label="only this head of its layer left",
)
axes[1].axhline(whole, color="#555555", linestyle=":", linewidth=1.2)
axes[1].set(
    xlabel="layer.head",
    ylabel="accuracy (%)",
    ylim=(0, 125),
    yticks=range(0, 101, 20),
    xticks=place,
    xticklabels=names,
)
axes[1].set_title("what the model can do without")
axes[1].legend(loc="upper left", ncols=2)
axes[1].grid(axis="x", visible=False)
plot.caption(
    fig,
    "Layer 1 looks back by one, layer 2 does induction (a head that looks at everything alike "
    "would score about 0.07). Dotted: the whole model. Heads share their job: most can be removed "
    "without loss. No head is a sink here.",
)
plot.plt.show()

# %% tags=["experiment", "figure"]
# Figure: all heads of the trained model on one sequence
# the first sequence: (8 heads, seq, seq)
all_maps = torch.cat([weights[0] for weights in maps]).cpu()
labels = [
    f"head {names[i]}: "
    + (f"previous {table[i, 0]:.2f}" if i < 4 else f"induction {table[i, 1]:.2f}")
    for i in range(8)
]
fig = plot.heads(all_maps, titles=labels, columns=4, size=2.5)
period = int(known[0].int().argmax())
plot.caption(
    fig,
    f"All heads of the trained model on one sequence, whose block of {period} tokens repeats. "
    "Layer 1 (top): the previous token, a diagonal just below the main one. It stops half-way. "
    f"Layer 2 (bottom): a diagonal that begins at query {period} and lies {period - 1} below the "
    "main one, the token after the last occurrence, and its repeats.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Two layers pass 99 % within 300 steps, after a slow start of some 80, in every
# one of the five seeds tried; one layer stays below 25 %. The induction heads score close to 1. The
# best previous-token head scores only about a half, and the maps say why: its diagonal is nearly
# perfect down to about query 15 and then stops. No block here is longer than 16, so the first
# occurrence of a token always lies in the first 16 positions, and a key further on never needs to
# know its predecessor. The model learned exactly as much as the data asked for, and a score
# averaged over all queries hid it. **Look at the map before you believe the number.**
#
# What did *not* come out as in the textbook picture: one head per job. Several heads do the same
# work, so that removing one costs little. A map is evidence for a mechanism; removal is better
# evidence; neither is proof, because what is removed may be taken over by another head. Sinks do
# not appear: in a model this small, with a loss counted only where there is something to copy, a
# head is rarely left with nothing to say.
#
# ## The circuit, set by hand
#
# If you understand a circuit you can build it. In this last exercise nothing is trained: you write
# down the matrices of two attention layers of one head each, so that the model continues repeated
# text.
#
# The residual stream of every position holds three fields side by side, $d = 2V + T$ numbers for a
# vocabulary of $V$ and at most $T$ positions:
#
# | field | columns | content at the start |
# |---|---|---|
# | token | $0 \dots V-1$ | one-hot: which token stands here |
# | position | $V \dots V+T-1$ | one-hot: where we are |
# | previous | $V+T \dots 2V+T-1$ | zeros: free for the first layer to write in |
#
# A layer computes
# $x \leftarrow x + \mathrm{softmax}(\text{causal}(xW_q (xW_k)^\top / \sqrt{d_h}))\, xW_v W_o$, as
# `run_circuit` does below. The prediction is the largest entry of the *token* field at the end.
#
# The product $W_q W_k^\top$ decides **where** a head looks, $W_v W_o$ decides **what** it moves and
# where it writes. They can be designed apart from one another; that is the whole method (Elhage et
# al. 2021 call them the QK and the OV circuit).


# %%
def run_circuit(
    layers: list[dict[str, Tensor]], tokens: Tensor, vocab_size: int, length: int
) -> tuple[Tensor, list[Tensor]]:
    """Runs attention layers of one head on tokens (batch, seq), seq ≤ length, in float64.

    Each layer has "q", "k", "v" of shape (d, width) and "o" of shape (width, d), d = 2·vocab_size +
    length; widths are free. Returns the token field (batch, seq, vocab_size) and each layer's
    weights (batch, seq, seq).
    """
    d, seq = 2 * vocab_size + length, tokens.shape[1]
    x = torch.zeros(*tokens.shape, d, dtype=torch.float64)
    x[..., :vocab_size] = F.one_hot(tokens, vocab_size)
    x[..., vocab_size : vocab_size + length] = torch.eye(length)[:seq]
    maps = []
    for number, layer in enumerate(layers, 1):
        for name, tensor in layer.items():
            expected = f"(width, {d})" if name == "o" else f"({d}, width)"
            if tensor.dim() != 2 or tensor.shape[1 if name == "o" else 0] != d:
                raise ValueError(
                    f"layer {number}: {name!r} has shape {tuple(tensor.shape)}, it should be "
                    f"{expected}"
                )
        q, k, v = (x @ layer[name].double() for name in ("q", "k", "v"))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(
            ~torch.ones(seq, seq, dtype=torch.bool).tril(), -torch.inf
        ).softmax(-1)
        x = x + weights @ v @ layer["o"].double()
        maps.append(weights)
    return x[..., :vocab_size], maps


# %% exercise="induction_weights" minutes=50 difficulty=3 path="more"
def induction_weights(vocab_size: int, length: int) -> list[dict[str, Tensor]]:
    """Two attention layers, each {"q", "k", "v", "o"} as `run_circuit` takes them, that continue
    repeated text.

    Layer 1: every position i ≥ 1 puts at least 0.99 of its weight on position i − 1, and writes
    which token stands there into the "previous" field.

    Layer 2: every position whose token occurred before puts at least 0.99 of its weight on the
    positions right after those occurrences, and the token found there becomes the largest entry of
    its token field.

    It must hold for every sequence of up to `length` tokens in which each occurrence of a token is
    followed by the same one, wherever the repeated piece begins, at position 0 too. What is
    predicted for a token seen for the first time is left open.
    """
    ### BEGIN SOLUTION
    d = 2 * vocab_size + length
    token, position, previous = (
        slice(0, vocab_size),
        slice(vocab_size, vocab_size + length),
        slice(vocab_size + length, d),
    )
    sharp = 30.0  # a match scores 30 more than anything else: e⁻³⁰ is left for the rest

    def matrix(columns: int) -> Tensor:
        return torch.zeros(d, columns, dtype=torch.float64)

    # Layer 1. The query says "I am at i"; the key of position j says "I am wanted by j + 1".
    q1, k1, v1, o1 = (
        matrix(length),
        matrix(length),
        matrix(vocab_size),
        matrix(vocab_size).T.clone(),
    )
    q1[position] = sharp * math.sqrt(length) * torch.eye(length, dtype=torch.float64)
    k1[position] = torch.eye(length, dtype=torch.float64).roll(1, dims=1)
    v1[token] = torch.eye(vocab_size, dtype=torch.float64)
    o1[:, previous] = torch.eye(vocab_size, dtype=torch.float64)

    # Layer 2. The query says "my token is t"; the key says "before me stood t".
    q2, k2, v2, o2 = (
        matrix(vocab_size),
        matrix(vocab_size),
        matrix(vocab_size),
        matrix(vocab_size).T.clone(),
    )
    q2[token] = sharp * math.sqrt(vocab_size) * torch.eye(vocab_size, dtype=torch.float64)
    k2[previous] = torch.eye(vocab_size, dtype=torch.float64)
    # Position 0 has no predecessor, but its softmax had to look somewhere: at itself. Take back the
    # false claim.
    k2[vocab_size] = -1.0
    v2[token] = torch.eye(vocab_size, dtype=torch.float64)
    # louder than the token that stands there already
    o2[:, token] = 2 * torch.eye(vocab_size, dtype=torch.float64)
    return [{"q": q1, "k": k1, "v": v1, "o": o1}, {"q": q2, "k": k2, "v": v2, "o": o2}]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: layer 1</summary>
#
# The score between positions $i$ and $j$ is a bilinear form of two one-hot vectors: it *is* an
# entry of $W_qW_k^\top$. Which $(T, T)$ matrix has a large number where $i = j+1$ and 0 elsewhere?
# One of the two factors can be the identity.
# </details>
#
# <details><summary>Hint: sharp enough</summary>
#
# A match must score higher than all others together. With a lead of $c$ after the division by
# $\sqrt{d_h}$, each of the other keys keeps $e^{-c}$ of the winner's weight.
# </details>
#
# <details><summary>Hint: right almost everywhere, wrong on the first token's return</summary>
#
# Print layer 2's weights for the tokens `3 1 4 3`. The last row should look at position 1, and half
# of its weight is at position 0. What did layer 1 write there, and why? The position field can be
# read in layer 2 as well.
# </details>
#
# <details><summary>Hint: the prediction is the current token</summary>
#
# The token field is not empty when layer 2 writes to it: the current token stands there with a 1.
# </details>

# %% check="induction_weights" points=2
layers = induction_weights(5, 6)
tokens = torch.tensor([[3, 1, 4, 1]])
_, maps = run_circuit(layers[:1], tokens, 5, 6)
behind = maps[0].diagonal(-1, -2, -1)
assert bool((behind >= 0.99).all()), (
    f"layer 1: the weights on the previous token are {[round(w, 3) for w in behind[0].tolist()]}, "
    "they should be at least 0.99"
)
### BEGIN HIDDEN TESTS
g = checks.generator(60)
for vocab_size, length, seq in [(2, 2, 2), (7, 9, 9), (30, 40, 40), (12, 25, 11), (3, 64, 64)]:
    tokens = torch.randint(0, vocab_size, (4, seq), generator=g)
    _, maps = run_circuit(induction_weights(vocab_size, length)[:1], tokens, vocab_size, length)
    behind = maps[0].diagonal(-1, -2, -1)
    assert float(behind.min()) >= 0.99, (
        f"layer 1 with vocabulary {vocab_size}, length {length}: the least weight on the previous "
        f"token is {float(behind.min()):.3f}"
    )
### END HIDDEN TESTS

# %% check="induction_weights" points=4
tokens = torch.tensor([[2, 3, 1, 4, 3, 1]])
logits, maps = run_circuit(induction_weights(5, 6), tokens, 5, 6)
look = maps[1][0]
assert float(look[4, 2]) >= 0.99, (
    "layer 2: at the second 3 the weight should be on position 2, after the first 3; yours there "
    f"is {float(look[4, 2]):.3f}"
)
assert int(logits[0, 4].argmax()) == 1, (
    f"after 2 3 1 4 3 comes 1; predicted is {int(logits[0, 4].argmax())}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(61)
for vocab_size, length, seq, period in [
    (4, 8, 8, 4),
    (9, 20, 20, 7),
    (30, 60, 59, 23),
    (30, 70, 61, 1),
    (16, 40, 40, 3),
    (5, 11, 6, 5),
    (2, 9, 9, 2),
    (12, 12, 2, 1),
    (90, 180, 180, 90),
]:
    circuit = induction_weights(vocab_size, length)
    block = torch.rand(5, vocab_size, generator=g).argsort(1)[:, :period]
    tokens = block[:, torch.arange(seq) % period]
    logits, maps = run_circuit(circuit, tokens, vocab_size, length)
    what = (
        f"a block of {period} tokens, repeated to {seq} (vocabulary {vocab_size}, length {length})"
    )
    for i in range(period, seq):
        right = float(
            maps[1][:, i, [j + 1 for j in range(i) if (i - j) % period == 0]].sum(-1).min()
        )
        assert right >= 0.99, (
            f"{what}: query {i} has only {right:.3f} of its weight after the earlier occurrences "
            "of its token"
            + (
                ": position 0 has no predecessor; what does layer 1 leave there?"
                if i % period == 0
                else ""
            )
        )
    known = logits[:, period:-1].argmax(-1)
    checks.close(known, tokens[:, period + 1 :], what=f"the predicted tokens for {what}")
# A piece that repeats inside other text, beginning at position 0 or later.
for start in (0, 3):
    names = torch.randperm(20, generator=g)
    piece, before, between = names[:4], names[4 : 4 + start], names[8:14]
    tokens = torch.cat([before, piece, between, piece])[None]
    logits, _ = run_circuit(induction_weights(20, 24), tokens, 20, 24)
    checks.close(
        logits[0, -4:-1].argmax(-1),
        piece[1:],
        what=f"a piece that begins at position {start} and returns six tokens later",
    )
### END HIDDEN TESTS

# %% tags=["experiment"]
text = ["the", "cat", "sat", "on", "a", "mat", ".", "the", "cat", "sat", "on"]
words = sorted(set(text))
ids = torch.tensor([[words.index(word) for word in text]])
logits, built = run_circuit(induction_weights(len(words), len(text)), ids, len(words), len(text))

# %% tags=["experiment", "figure"]
# Figure: your circuit's two layers on a sentence, with no training
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4.8))
plot.attention(built[0][0], text, title="layer 1: previous token", colorbar=False, ax=axes[0])
plot.attention(built[1][0], text, title="layer 2: induction", ax=axes[1])
plot.caption(
    fig,
    "The circuit with no training. In layer 2, words seen before point at what followed them; the "
    f"last row looks at “a”, and the prediction is “{words[int(logits[0, -1].argmax())]}”. Words "
    "seen for the first time find no match: their weight is spread over what is there.",
)
plot.plt.show()

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number or a choice are
# graded, a point each; return the value.


# %% exercise="key_questions" minutes=18 difficulty=2 kind="questions"
def question_scale() -> float:
    """Queries have independent components of mean 0 and standard deviation 3, keys of mean 0 and
    standard deviation 0.5, d_k = 64. By which number must q·k be divided to have standard deviation
    1?
    """
    ### BEGIN SOLUTION
    return math.sqrt(64) * 3 * 0.5
    ### END SOLUTION


def question_saturation() -> float:
    """One query, two keys, d_k = 64. How many times smaller is the derivative of the first weight
    with respect to the first score when the scores are 8 and 0 (without the division by √d_k) than
    when they are 1 and 0 (the same query and keys with it)? Give the ratio, larger than 1, to 1 %.
    """

    ### BEGIN SOLUTION
    def slope(gap: float) -> float:
        w = 1 / (1 + math.exp(-gap))
        return w * (1 - w)

    return slope(1.0) / slope(8.0)
    ### END SOLUTION


def question_mask() -> int:
    """A chat model has 1000 tokens in its cache and receives 24 new ones at once. How many True
    entries has the causal mask of this step, (24, 1024)?
    """
    ### BEGIN SOLUTION
    return sum(1000 + i + 1 for i in range(24))
    ### END SOLUTION


def question_intensity() -> float:
    """A model with 64 query heads and 8 key-value heads decodes one token of one sequence against a
    long bfloat16 cache. In its attention products (q kᵀ and w v; a multiplication and an addition
    are 2 FLOPs), how many FLOPs does it do per byte of cache that it reads once?
    """
    ### BEGIN SOLUTION
    heads, kv_heads, bytes_per_element = 64, 8, 2
    flops = 2 * 2 * heads  # per token of the cache and feature: two products, 2 FLOPs each
    read = 2 * kv_heads * bytes_per_element  # per token of the cache and feature: a key and a value
    return flops / read
    ### END SOLUTION


def question_order() -> str:
    """Self-attention without positions and without a mask. The input tokens are permuted. The
    outputs are

    "a" the same, in the same order;  "b" the same vectors, permuted likewise;  "c" different
    vectors.
    """
    ### BEGIN SOLUTION
    return "b"
    ### END SOLUTION


# %% check="key_questions" points=1
answer = question_scale()
checks.kind(answer, float)
### BEGIN HIDDEN TESTS
checks.close(
    float(answer),
    12.0,
    what="the number to divide by",
    hint="Repeat the derivation with 𝔼[q²] = 9 and 𝔼[k²] = 0.25",
    mistakes={"the variance, not the standard deviation,": 144.0, "assuming unit variances": 8.0},
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = question_saturation()
checks.kind(answer, float)
### BEGIN HIDDEN TESTS
s = torch.tensor([[8.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
s.softmax(-1)[:, 0].sum().backward()
checks.close(
    float(answer),
    float(s.grad[1, 0] / s.grad[0, 0]),
    what="the ratio of the derivatives",
    rtol=0.01,
    hint="∂w₁/∂s₁ = w₁(1 − w₁), with w₁ = 1 / (1 + e^(s₂ − s₁))",
    mistakes={"the upside-down ratio": float(s.grad[0, 0] / s.grad[1, 0]), "e⁸ / e": math.exp(7)},
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = question_mask()
checks.kind(answer, int)
### BEGIN HIDDEN TESTS
visible = torch.ones(24, 1024).tril(1000)
checks.close(
    answer,
    int(visible.sum()),
    what="the number of visible pairs",
    hint="The first of the new tokens sees the 1000 before it, and itself",
    mistakes={
        "a mask aligned to the first key": 300,
        "everything visible": 24 * 1024,
        "hiding a token from itself": int(visible.sum()) - 24,
    },
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = question_intensity()
checks.kind(answer, float)
### BEGIN HIDDEN TESTS
checks.close(
    float(answer),
    8.0,
    what="FLOPs per byte",
    hint="Count both for one token of the cache and one feature of the head; everything else "
    "cancels",
    mistakes={
        "one FLOP for a multiplication and an addition together": 4.0,
        "elements instead of bytes": 16.0,
        "the answer for MHA": 1.0,
    },
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = question_order()
assert answer in ("a", "b", "c"), f"the answer is one of 'a', 'b', 'c'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert str(answer) == "b", (
    "Write out Σ_j w_ij v_j for a permuted input: a sum does not mind the order of its terms, and "
    "query i is at a new place. This is why lesson 08 came first."
)
### END HIDDEN TESTS

# %% [markdown]
# An accelerator of the H100's or H200's arithmetic (989 TFLOP/s in bfloat16) does about 300 FLOPs
# in the time in which an H100's memory (3.35 TB/s) delivers one byte, and about 200 with an H200's
# (4.8 TB/s). At 1 FLOP per byte (MHA) or 8 (GQA) decoding waits for memory; sharing key-value heads
# buys time as well as space.

# %% [markdown]
# **Open question 1.** GQA shares keys and values among query heads. Why not share queries among
# key-value heads instead: the products are the same size?

# %% [markdown] answer="why-share-kv"
# The query of a token is used once, in the step in which the token is processed, and then thrown
# away. Its keys and values are used in every later step, so they are stored and read again each
# time. Sharing them saves cache and bandwidth; sharing queries would save a little arithmetic in a
# step that waits for memory anyway, and would cost the variety of questions that the heads ask,
# which is where most of their diversity is.

# %% [markdown]
# **Open question 2.** A colleague shows a map in which the word "not" receives a large weight and
# concludes that the model has understood the negation. What would you ask for?

# %% [markdown] answer="what-maps-show"
# A weight says from where a head reads, not what it reads or whether anything downstream uses it.
# The value vector may be nearly zero (that is how sinks work), $W_O$ may write into directions that
# nobody reads, and after a few layers a position holds information from many tokens, so "not" need
# not be about "not". Ask for an intervention: remove the head, or exchange the token's value for
# that of another sentence, and measure the change of the prediction; compare with removing a random
# head. Ask for more than one sentence, and for heads that were not picked by hand.

# %% [markdown]
# ## References, and what to read in them
#
# - **Vaswani et al. 2017**, *Attention Is All You Need*,
#   [arXiv:1706.03762](https://arxiv.org/abs/1706.03762). Section 3.2 is this lesson; footnote 4 is
#   the argument about the variance, in one line.
# - **Shazeer 2019**, *Fast Transformer Decoding*,
#   [arXiv:1911.02150](https://arxiv.org/abs/1911.02150). Sections 2.4 and 3: the ratio of memory
#   reads to arithmetic that makes MQA necessary.
# - **Ainslie et al. 2023**, *GQA*, [arXiv:2305.13245](https://arxiv.org/abs/2305.13245). Section 2
#   (mean-pooled checkpoints) and the figures on the number of groups.
# - **Olsson et al. 2022**, *In-context Learning and Induction Heads*,
#   [arXiv:2209.11895](https://arxiv.org/abs/2209.11895). The phase change and the prefix-matching
#   score; the six lines of argument are a model of careful evidence.
# - **Elhage et al. 2021**, *A Mathematical Framework for Transformer Circuits*
#   (transformer-circuits.pub). QK and OV circuits, and why one layer cannot do induction.
# - **Jain and Wallace 2019**, *Attention is not Explanation*,
#   [arXiv:1902.10186](https://arxiv.org/abs/1902.10186), and **Wiegreffe and Pinter 2019**,
#   *Attention is not not Explanation*, [arXiv:1908.04626](https://arxiv.org/abs/1908.04626). Read
#   both, in this order.
#
# In production: PyTorch's `torch.nn.functional.scaled_dot_product_attention` (its docstring is a
# readable reference implementation; `enable_gqa`), `torch/nn/modules/activation.py` for
# `nn.MultiheadAttention`; Hugging Face transformers, `models/llama/modeling_llama.py`
# (`LlamaAttention`; `repeat_kv` is the repeat that you avoided); vLLM's paged attention (lesson
# 30). How the product itself is computed without ever holding the $L_q \times L_k$ weights is
# lesson 29, FlashAttention.
