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
#       The feed-forward layer read as a memory, and a mixture of experts from router to grouped
#       GEMM: a small language model whose experts you watch filling, starving and dividing the
#       work.
#     gpu: >-
#       Your grouped GEMM at the size of a real model, measured beside a loop of torch.mm and
#       PyTorch's own grouped product.
# ---

# %% [markdown]
# ## The problem
#
# About two thirds of a Transformer's parameters, embeddings aside, are not attention. They sit in
# the **feed-forward network** (FFN) of each layer, and they are where most of what the model
# *knows* is kept. A model that is to know more needs more of them. But each token passes through
# every one of them: twice the memory costs twice the arithmetic, at every token, in training and
# ever after, although a line of Python has no use for what the model knows about treaties.
#
# A **mixture of experts** (MoE) breaks that link. It keeps many feed-forward networks, the
# **experts**, and a small **router** that sends each token to a few of them. What the model stores
# grows with the number of experts; what a token costs grows only with the few it visits.
# DeepSeek-V3 holds 671 billion parameters and uses 37 billion for a token.
#
# Three things then go wrong, and most of this lesson is about them:
#
# 1. **The experts are used unequally.** An expert that is chosen often is trained often, gets
#    better, and is chosen more often still. Others starve.
# 2. **The work is ragged.** Expert 3 has 700 tokens, expert 4 has none, and a GPU wants rectangles.
# 3. **The choice is discrete.** Which expert a token goes to is an integer, and integers have no
#    gradient.
#
# ### Shapes used throughout
#
# | symbol | meaning | in code |
# |---|---|---|
# | $T$ | tokens of a batch, all sequences laid end to end | `tokens` |
# | $d$ | width of a token vector | `dim` |
# | $h$ | hidden width of an FFN, or of one expert | `hidden` |
# | $N$ | number of (routed) experts | `num_experts` |
# | $k$ | experts that each token visits | `k` |
#
# The router's logits are $(T, N)$; its decision is a pair of tables $(T, k)$, **indices** (which
# experts) and **weights** (how much each one counts).

# %%
import itertools
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile, tl, triton
from llm40.kernels import autotuned
from llm40.models import Tokenizer
from torch import Tensor, nn

# %% [markdown]
# ## The FFN is a memory {#memory}
#
# The FFN is **position-wise**: it works on each token's vector $x$ of shape $(d,)$ alone, with the
# same matrices at every position. Attention moves information between tokens; the FFN thinks about
# one. Written with rows,
#
# $$\mathrm{FFN}(x) = \sum_{i=1}^{h} m_i(x)\, v_i, \qquad m_i(x) = \mathrm{act}(k_i\cdot x),$$
#
# with **keys** $k_i$, the rows of $W_{in}$ $(h, d)$, and **values** $v_i$, the columns of $W_{out}$
# $(d, h)$. It is the same two matrix products as always, only read differently: $h$ memory cells,
# each with a pattern that it looks for and a vector that it adds to the stream when it has found
# it. Set beside attention, $\sum_j \mathrm{softmax}_j(k_j\cdot q)\,v_j$, two things differ. The
# keys and values here are *parameters*, the same for every text: knowledge, not context. And the
# coefficients $m_i$ do not compete: nothing makes them sum to one, any number of cells may fire
# (Geva et al. 2021).
#
# The **gated** FFN of lesson 03 gives each cell a second pattern $g_i$ that must agree before it
# fires,
#
# $$m_i(x) = \mathrm{SiLU}(g_i\cdot x)\;(k_i\cdot x), \qquad W_{gate}: (h, d).$$
#
# **Counting.** The plain layer has $2dh$ parameters, with the customary $h = 4d$ that is $8d^2$.
# The gated one has $3dh$. They are equal for $h = \tfrac83 d$: the odd factor in every LLaMA-like
# configuration. Attention with full heads has four matrices $(d, d)$, $4d^2$. So the FFN is $8d^2$
# of $12d^2$: the two thirds at the top of this page.
#
# And now the observation on which everything rests: **for any one token most cells stay silent.**
# You will see it in the figure below. We compute $h$ coefficients to use a few. If we knew
# beforehand which *block* of cells a token needs, we could leave out the rest.


# %% exercise="feed_forward" minutes=10 difficulty=1
def feed_forward(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The FFN as a memory of `hidden` cells: (out, coefficients).

    x: (…, dim); keys: (hidden, dim), one pattern a row; values: (hidden, dim), what each cell adds;
    gates: (hidden, dim) or None. Coefficients (…, hidden): relu(kᵢ·x) without gates,
    silu(gᵢ·x)·(kᵢ·x) with them, finite for gᵢ·x of any size. out (…, dim): the sum of the values,
    each multiplied by its coefficient. Both have x's dtype, and gradients flow through both. F.relu
    and F.silu may be used. Inputs are not changed.
    """
    ### BEGIN SOLUTION
    match = x @ keys.T
    coefficients = F.relu(match) if gates is None else F.silu(x @ gates.T) * match
    return coefficients @ values, coefficients
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one product for all cells</summary>
#
# $k_i\cdot x$ for every $i$ is one matrix product of `x` with the keys, transposed. The sum over
# cells is another, with the values as they are.
# </details>

# %% check="feed_forward" points=1
x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
# The keys look for the first feature, the second, and the absence of both.
keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
values = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
out, coefficients = checks.parts(feed_forward(x, keys, values), "out", "coefficients")
checks.close(
    coefficients,
    torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
    what="the coefficients of three cells for two tokens",
    mistakes={
        "no activation": x @ keys.T,
        "a softmax over the cells, as in attention,": (x @ keys.T).softmax(-1),
    },
)
checks.close(
    out,
    torch.tensor([[10.0, 0.0], [0.0, 20.0]]),
    what="out",
    mistakes={"no activation": x @ keys.T @ values},
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for shape, dim, hidden in [((7,), 5, 11), ((2, 3), 4, 1), ((), 6, 9), ((3, 1, 2), 1, 4)]:
    x, keys, values = (
        checks.randn(*s, generator=g, dtype=torch.float64)
        for s in ((*shape, dim), (hidden, dim), (hidden, dim))
    )
    two = nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False)
    ).to(x)
    with torch.no_grad():
        two[0].weight.copy_(keys)
        two[2].weight.copy_(values.T)
    with checks.unchanged(x=x, keys=keys, values=values):
        out, coefficients = feed_forward(x, keys, values)
    checks.close(
        coefficients,
        two[1](two[0](x)),
        what=f"the coefficients, x {tuple(x.shape)}, {hidden} cells",
    )
    checks.close(
        out, two(x), what=f"out against two nn.Linear with a ReLU between, x {tuple(x.shape)}"
    )
# Law: a position-wise layer does not care about the order of positions, and no token sees another.
x = checks.randn(2, 6, dim, generator=g, dtype=torch.float64)
order = torch.randperm(6, generator=g)
checks.close(
    feed_forward(x[:, order], keys, values)[0],
    feed_forward(x, keys, values)[0][:, order],
    what="out for permuted positions",
)
checks.gradients(
    lambda *t: feed_forward(*t)[0],
    lambda x, k, v: F.relu(x @ k.T) @ v,
    x,
    keys,
    values,
    names=("x", "keys", "values"),
)
### END HIDDEN TESTS

# %% check="feed_forward" points=1
x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
keys, gates = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
values = torch.tensor([[1.0, -1.0]]).double()
gated = 2 * 3 / (1 + math.exp(-3))


def one(value):
    return torch.tensor([[value]], dtype=torch.float64)


out, coefficients = feed_forward(x, keys, values, gates)
checks.close(
    coefficients,
    one(gated),
    what="the coefficient of a gated cell with g·x = 3 and k·x = 2",
    mistakes={
        "the activation on k·x, not on g·x,": one(3 * 2 / (1 + math.exp(-2))),
        "ignoring the gate": one(2.0),
        "a sum instead of a product": one(3 / (1 + math.exp(-3)) + 2),
        "a ReLU on the gate": one(6.0),
    },
)
checks.close(
    out, torch.tensor([[gated, -gated]], dtype=torch.float64), what="out of the gated cell"
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for shape, dim, hidden in [((5,), 3, 8), ((2, 1), 7, 2), ((), 4, 4)]:
    x, keys, values, gates = (
        checks.randn(*s, generator=g, dtype=torch.float64)
        for s in ((*shape, dim), *[(hidden, dim)] * 3)
    )
    up, gate = (F.linear(x, w) for w in (keys, gates))
    expected = up * gate / (1 + (-gate).exp())
    with checks.unchanged(x=x, keys=keys, values=values, gates=gates):
        out, coefficients = feed_forward(x, keys, values, gates)
    checks.close(
        coefficients,
        expected,
        what=f"the gated coefficients, x {tuple(x.shape)}",
        mistakes={"the roles of keys and gates exchanged": gate * F.silu(up)},
    )
    checks.close(
        out, torch.einsum("...h,hd->...d", expected, values), what=f"out, gated, x {tuple(x.shape)}"
    )
checks.gradients(
    lambda *t: feed_forward(*t)[0],
    lambda x, k, v, g: (x @ k.T * F.silu(x @ g.T)) @ v,
    checks.randn(3, dim, generator=g, dtype=torch.float64),
    keys,
    values,
    gates,
    names=("x", "keys", "values", "gates"),
)
checks.gradients(
    lambda x, g: feed_forward(x, keys, values, g)[1],
    lambda x, g: x @ keys.T * F.silu(x @ g.T),
    checks.randn(3, dim, generator=g, dtype=torch.float64),
    gates,
    names=("x", "gates"),
)
checks.keeps_dtype(feed_forward, x, keys, values, gates, what="a result")
# Large numbers: silu(1000) = 1000 and silu(−1000) = 0, in float32 too.
far = torch.tensor([[1000.0], [-1000.0]], device=profile.device)
unit = torch.ones(1, 1, device=profile.device)
checks.close(
    feed_forward(far, unit, unit, unit)[1],
    torch.tensor([[1e6], [0.0]]),
    what="the coefficients for g·x = k·x = ±1000",
    hint="The exponential of 1000 overflows",
)
# Law: two memories side by side add up. (This is why several shared experts can be one wide one.)
halves = [feed_forward(x, keys[s], values[s], gates[s])[0] for s in (slice(0, 1), slice(1, None))]
checks.close(
    feed_forward(x, keys, values, gates)[0],
    halves[0] + halves[1],
    what="out of all cells against the sum over two blocks of cells",
)
### END HIDDEN TESTS

# %% [markdown]
# Now look inside a trained model. `llm40.models` ships a small one, trained on Python's
# documentation and source code; its FFNs are gated, and your function reads them: the keys are
# `up_proj`, the gates `gate_proj`, the values `down_proj`, transposed. The figure names, for the
# cells that fire most strongly, the tokens that the value vector promotes: those with the largest
# product of their embedding, which is also the model's head, with the value.

# %% tags=["experiment"]
small, tokenizer = models.load("small")
small = small.to(profile.device).eval()
sentence = (
    "The for statement is used to iterate over the elements of a sequence "
    "(such as a string, tuple or list)."
)
pieces = tokenizer.encode(sentence)
layer = 3 * len(small.layers) // 4
found = {}
hook = small.layers[layer].mlp.register_forward_pre_hook(
    lambda module, args: found.update(x=args[0].detach())
)
with torch.no_grad():
    small(torch.tensor([pieces], device=profile.device))
    mlp = small.layers[layer].mlp
    _, fired = feed_forward(
        found["x"][0], mlp.up_proj.weight, mlp.down_proj.weight.T, mlp.gate_proj.weight
    )
    # What a cell really adds: its coefficient times the length of its value.
    size = fired.abs() * mlp.down_proj.weight.norm(dim=0)
    promoted = small.embed_tokens.weight @ mlp.down_proj.weight  # (vocabulary, cells)
hook.remove()
size = size[1:]  # the first token, which sees nothing, is a case of its own
# Each token's strongest tenth of the cells, and how much of it two tokens share.
strong = torch.zeros_like(size).scatter(1, size.topk(size.shape[1] // 10).indices, 1.0)
common = strong @ strong.T / strong.sum(1)
common = float((common.sum() - common.diagonal().sum()) / (len(size) * (len(size) - 1)))

# %% tags=["experiment", "figure"]
# Figure: which cells fire at which token, and how many matter
cells = size.amax(0).topk(14).indices
order = size[:, cells].argmax(0).argsort()
cells = cells[order]


def words(scores: Tensor, count: int = 3) -> str:
    """The tokens with the highest scores, blanks and line feeds made visible."""
    return " ".join(
        repr(tokenizer.decode([i]))[1:-1].replace(" ", "␣")
        for i in scores.topk(count).indices.tolist()
    )


signs = fired[1:, cells].gather(0, size[:, cells].argmax(0)[None])[0].sign()
labels = [f"{int(c)}: {words(s * promoted[:, c])}" for c, s in zip(cells, signs, strict=True)]
fig, axes = plot.plt.subplots(1, 2, figsize=(12.5, 4.8), gridspec_kw={"width_ratios": [2.6, 1]})
plot.heatmap(
    size[:, cells].T,
    xlabel="token",
    ylabel="cell: tokens that it promotes",
    title=f"what cells of layer {layer} add",
    unit="length of what is added",
    xticks=[tokenizer.decode([i]) for i in pieces[1:]],
    yticks=labels,
    ax=axes[0],
)
share = size.sort(dim=1, descending=True).values.square().cumsum(1)
share = (share / share[:, -1:]).median(0).values.cpu()
axes[1].plot(torch.arange(1, len(share) + 1) / len(share) * 100, share * 100)
axes[1].set(
    xlabel="cells, strongest first (% of all)",
    ylabel="share of the squared size (%)",
    xlim=(0, 100),
    ylim=(0, 102),
)
axes[1].set_title("how many cells matter")
ninety = int((share < 0.9).sum() + 1)
axes[1].axvline(100 * ninety / len(share), color="#888888", linestyle=":", linewidth=1.2)
axes[1].annotate(
    f"90 % in {100 * ninety / len(share):.0f} % of the cells",
    (100 * ninety / len(share), 30),
    textcoords="offset points",
    xytext=(5, 0),
    fontsize=9,
)
plot.caption(
    fig,
    f"Left: of {len(share)} cells, the 14 that add most anywhere in the sentence; most of them "
    "are dark at a few tokens only. Right: the median token gets 90 % of the (squared) "
    f"size from {100 * ninety / len(share):.0f} % of the cells. Two tokens have "
    f"{100 * common:.0f} % of their strongest tenth in common (by chance: 10 %).",
)
plot.plt.show()

# %% [markdown]
# ## Routing: which experts, and how much of each
#
# Cut the memory into blocks, the **experts** $E_1 \dots E_N$, each a small gated FFN, and let a
# router choose $k$ of them for a token:
#
# $$ s = \mathrm{score}(W_r x) \in \mathbb{R}^N, \qquad \mathcal{T} = \text{the } k \text{ largest of } s, \qquad y = \sum_{i\in\mathcal{T}} g_i\,E_i(x), $$
#
# with $W_r$ of shape $(N, d)$: one vector an expert, which points at the tokens it wants. Three
# choices make up a router.
#
# - **Scoring.** Softmax over all experts (Switch, and Mixtral as published in code): scores
#   compete and sum to 1.
#   Sigmoid of each logit (DeepSeek-V3): scores are independent, and a bias can be added to one
#   without moving the others.
# - **Renormalizing.** The **gate values** $g_i$ are either the scores themselves, $g_i = s_i$, or
#   the scores divided by their sum over the chosen, $g_i = s_i/\sum_{j\in\mathcal T}s_j$.
# - **What is scored, and what is chosen, need not be the same.** [](#bias) adds a bias to the
#   scores *for choosing only*. Your function has a place for it from the start.
#
# **How does the router learn,** when the choice has no gradient? Through the gate value. With
# $\ell$ the loss and $\delta = \partial\ell/\partial y$ the gradient of shape $(d,)$ that arrives
# at the output,
#
# $$ \frac{\partial \ell}{\partial g_i} = \delta\cdot E_i(x). $$
#
# If what expert $i$ adds points along $-\delta$, it helps, its gate value rises, and with it the
# logit. Only chosen experts are ever judged: an expert that is not chosen hears nothing of what it
# could have done.
#
# Two consequences. With softmax before the choice and renormalizing, the result is a softmax over
# the *chosen logits alone*, because the common denominator cancels:
#
# $$ \frac{s_i}{\sum_{j\in\mathcal T}s_j} = \frac{e^{z_i}/Z}{\sum_{j\in\mathcal T} e^{z_j}/Z} = \frac{e^{z_i}}{\sum_{j\in\mathcal T}e^{z_j}} ,$$
#
# so Mixtral, which computes one, and papers that write the other agree. And with $k = 1$,
# renormalizing makes $g = 1$ whatever the logits: **the router gets no gradient at all.** Switch,
# with $k = 1$, must not renormalize.
#
# **Ties** happen: padding tokens are all alike, and in half precision equal logits are common.
# PyTorch's `topk` promises no order among equals. A router on which two machines, or two runs,
# disagree is a bug that takes days to find, so ties go to the expert with the lower number.


# %% exercise="top_k_router" minutes=20 difficulty=2
def top_k_router(
    logits: Tensor,
    k: int,
    renormalize: bool = True,
    scoring: str = "softmax",
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token, and their gate values: (weights, indices), each (tokens, k).

    logits: (tokens, num_experts), any floating dtype; scores are computed in float32 (float64 for
        float64 logits).
    k: from 1 to num_experts, else ValueError.
    scoring: "softmax" over all experts, or "sigmoid" of each logit; anything else is a ValueError.
    bias: None, (num_experts,) or (tokens, num_experts); added to the scores to choose by, and to
        nothing else. It may hold −inf, for all experts of a token too.

    indices: int64, the k experts with the largest score (+ bias), best first; among equal scores
        the lower number first. Only the scores count: logits of 100 and 200 have equal sigmoids.
    weights: their scores, without the bias, in the dtype of the scores; with `renormalize` divided
        by their sum over the k, however small it is; a sum of exactly 0 does not occur. Gradients
        flow to logits.
    """
    ### BEGIN SOLUTION
    experts = logits.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}: it must be from 1 to the number of experts, {experts}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if scoring == "softmax":
        scores = logits.softmax(-1)
    elif scoring == "sigmoid":
        scores = logits.sigmoid()
    else:
        raise ValueError(f'scoring is {scoring!r}: it can be "softmax" or "sigmoid"')
    choose_by = scores if bias is None else scores + bias
    # A stable sort keeps equals in their order, the lower expert first; topk promises nothing.
    indices = choose_by.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, indices
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: equal scores</summary>
#
# `torch.sort` has an argument that keeps equals in the order in which they came.
# </details>
#
# <details><summary>Hint: score and choice</summary>
#
# Sort one tensor, take indices from it, and `gather` the weights from another.
# </details>
#
# <details><summary>Hint: before or after</summary>
#
# Without renormalizing, softmax runs over **all** experts and the chosen weights sum to less
# than 1. A softmax over the chosen logits is another function.
# </details>

# %% check="top_k_router" points=2
logits = torch.log(torch.tensor([[1.0, 5.0, 2.0, 2.0]]))  # softmax: 0.1, 0.5, 0.2, 0.2
weights, indices = checks.parts(top_k_router(logits, 2), "weights", "indices")
checks.close(
    indices,
    torch.tensor([[1, 2]]),
    what="the two experts chosen",
    hint="Experts 2 and 3 tie: the lower number goes first",
    mistakes={
        "ties broken toward the higher number": torch.tensor([[1, 3]]),
        "choosing the smallest": torch.tensor([[0, 2]]),
    },
)
checks.close(
    weights,
    torch.tensor([[5 / 7, 2 / 7]]),
    what="the weights, renormalized",
    mistakes={
        "not renormalizing": torch.tensor([[0.5, 0.2]]),
        "uniform weights": torch.tensor([[0.5, 0.5]]),
        "a softmax of the chosen probabilities": torch.tensor([[0.5, 0.2]]).softmax(-1),
    },
)
checks.close(
    top_k_router(logits, 2, renormalize=False)[0],
    torch.tensor([[0.5, 0.2]]),
    what="the weights with renormalize=False",
    mistakes={"a softmax over the chosen logits only": torch.tensor([[5 / 7, 2 / 7]])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for tokens, experts, k in [(1, 1, 1), (9, 8, 2), (5, 3, 3), (40, 16, 1), (7, 33, 6)]:
    logits = checks.randn(tokens, experts, generator=g, dtype=torch.float64, scale=2.0)
    order = torch.tensor(
        [
            sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:k]
            for row in logits.tolist()
        ],
        device=logits.device,
    )
    chosen = torch.distributions.Categorical(logits=logits).probs.gather(1, order)
    for renormalize in (True, False):
        with checks.unchanged(logits=logits):
            weights, indices = top_k_router(logits, k, renormalize)
        what = f"{tokens} tokens, {experts} experts, k = {k}, renormalize={renormalize}"
        checks.close(indices, order, what=f"the indices for {what}")
        assert indices.dtype == torch.int64, f"indices should be int64, yours are {indices.dtype}"
        # Renormalized softmax is the softmax over the chosen logits alone.
        alone = logits.gather(1, order).softmax(-1)
        checks.close(
            weights,
            alone if renormalize else chosen,
            what=f"the weights for {what}",
            dtype=torch.float64,
            mistakes={
                "the opposite setting of renormalize": chosen if renormalize else alone,
                "uniform weights": torch.full_like(chosen, 1 / k),
            },
        )
# Ties: padding tokens are all alike. Float16 logits on a coarse grid tie often.
_, indices = top_k_router(torch.zeros(3, 70), 5)
checks.close(indices, torch.arange(5).expand(3, 5), what="the choice among 70 equal experts")
for half in (torch.float16, torch.bfloat16):
    coarse = torch.randn(30, 40, generator=g).round().to(profile.device, half)
    order = torch.tensor(
        [sorted(range(40), key=lambda e, row=row: (-row[e], e))[:6] for row in coarse.tolist()],
        device=coarse.device,
    )
    weights, indices = top_k_router(coarse, 6)
    checks.close(indices, order, what=f"the indices of {half} logits with many ties")
    checks.close(
        weights,
        coarse.double().gather(1, order).softmax(-1),
        what=f"the weights of {half} logits",
        dtype=torch.float32,
        rtol=1e-5,
        hint="Scores are computed in float32",
    )
# Scores that differ by a thousandth of a millionth are no ties: here a later expert is the better.
near = torch.zeros(2, 9, dtype=torch.float64, device=profile.device)
near[0, 7], near[1, 3], near[1, 8] = 1e-9, 1e-9, 2e-9
checks.close(
    top_k_router(near, 3)[1],
    torch.tensor([[7, 0, 1], [8, 3, 0]]),
    what="the choice among scores that nearly tie",
    hint="Only equal scores go by their number",
)
extreme = torch.tensor([[1e4, -1e4, 9.999e3]], device=profile.device)
checks.close(
    top_k_router(extreme, 2)[0],
    torch.tensor([[1.0, math.exp(-1)]]).to(extreme) / (1 + math.exp(-1)),
    what="the weights for logits of ±10000",
    rtol=1e-3,
)
for bad in (0, 4, -1):
    checks.raises(
        ValueError, top_k_router, torch.zeros(2, 3), bad, because=f"k = {bad} of 3 experts"
    )
# The router learns through the weights, and for k = 1 only if they are not renormalized.
logits = checks.randn(6, 5, generator=g, dtype=torch.float64)
order = logits.topk(2).indices
checks.gradients(
    lambda z: top_k_router(z, 2, False)[0],
    lambda z: z.softmax(-1).gather(1, order),
    logits,
    names=("logits",),
)
checks.gradients(
    lambda z: top_k_router(z, 2, True)[0],
    lambda z: z.gather(1, order).softmax(-1),
    logits,
    names=("logits",),
)
### END HIDDEN TESTS

# %% check="top_k_router" points=1
logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0)]])  # sigmoid: 0.5, 0.75, 0.25
weights, indices = top_k_router(logits, 2, False, "sigmoid")
checks.close(indices, torch.tensor([[1, 0]]), what="the two experts with the largest sigmoid")
checks.close(
    weights,
    torch.tensor([[0.75, 0.5]]),
    what="the weights with sigmoid scoring, not renormalized",
    mistakes={
        "softmax scoring": logits.softmax(-1)[:, [1, 0]],
        "the logits themselves": logits[:, [1, 0]],
    },
)
checks.close(
    top_k_router(logits, 2, True, "sigmoid")[0],
    torch.tensor([[0.6, 0.4]]),
    what="the weights with sigmoid scoring, renormalized",
    mistakes={
        "a softmax over the sigmoids": torch.tensor([[0.75, 0.5]]).softmax(-1),
        "not renormalizing": torch.tensor([[0.75, 0.5]]),
        "a softmax over the chosen logits": logits[:, [1, 0]].softmax(-1),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for tokens, experts, k in [(8, 6, 2), (3, 64, 8), (5, 4, 1)]:
    logits = checks.randn(tokens, experts, generator=g, dtype=torch.float64, scale=2.0)
    order = logits.argsort(-1, descending=True)[:, :k]
    odds = logits.gather(1, order).exp()
    score = odds / (1 + odds)
    for renormalize in (True, False):
        weights, indices = top_k_router(logits, k, renormalize, "sigmoid")
        checks.close(indices, order, what=f"sigmoid indices, {experts} experts, k = {k}")
        checks.close(
            weights,
            score / score.sum(-1, keepdim=True) if renormalize else score,
            what=f"sigmoid weights, {experts} experts, k = {k}, renormalize={renormalize}",
        )
checks.gradients(
    lambda z: top_k_router(z, k, False, "sigmoid")[0],
    lambda z: torch.sigmoid(z.gather(1, order)),
    logits,
    names=("logits",),
)
# Sigmoids of 100, 200 and 300 are all 1 in float32, softmaxes of far smaller logits all 0.
saturated = torch.tensor([[0.0, 100.0, 300.0, 200.0, 5.0]], device=profile.device)
checks.close(
    top_k_router(saturated, 3, scoring="sigmoid")[1],
    torch.tensor([[1, 2, 3]]),
    what="the choice among sigmoids that are all 1",
    hint="It is the scores that tie, not the logits",
)
checks.close(
    top_k_router(torch.tensor([[-300.0, -200.0, 0.0]], device=profile.device), 3)[1],
    torch.tensor([[2, 0, 1]]),
    what="the choice among softmaxes that are 0",
    hint="It is the scores that tie, not the logits",
)
for best in (-30.0, -80.0):  # scores of 1e-13, and of 1e-35
    faint = torch.tensor([[best, best - 1, best - 2]], device=profile.device)
    checks.close(
        top_k_router(faint, 2, scoring="sigmoid")[0],
        torch.tensor([[1.0, math.exp(-1)]]).to(faint) / (1 + math.exp(-1)),
        what=f"the weights for sigmoids of {math.exp(best):.0e}, renormalized",
        hint="Their sum is small, and it is what they are divided by",
    )
for word in ("", "relu", None):
    checks.raises(
        ValueError, top_k_router, torch.zeros(2, 3), 1, True, word, because=f"scoring={word!r}"
    )
### END HIDDEN TESTS

# %% check="top_k_router" points=2
logits = torch.log(torch.tensor([[5.0, 3.0, 1.0, 1.0]]))  # softmax: 0.5, 0.3, 0.1, 0.1
bias = torch.tensor([0.0, -0.25, 0.3, 0.0])  # to choose by: 0.5, 0.05, 0.4, 0.1
weights, indices = top_k_router(logits, 2, False, bias=bias)
checks.close(
    indices,
    torch.tensor([[0, 2]]),
    what="the experts chosen with a bias",
    mistakes={
        "ignoring the bias, or adding it to the logits and not to the scores,": torch.tensor(
            [[0, 1]]
        )
    },
)
checks.close(
    weights,
    torch.tensor([[0.5, 0.1]]),
    what="their weights",
    hint="The bias moves the choice and nothing else",
    mistakes={
        "weights that contain the bias": torch.tensor([[0.5, 0.4]]),
        "adding the bias to the logits": (logits + bias).softmax(-1)[:, [0, 2]],
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
for scoring in ("softmax", "sigmoid"):
    logits = checks.randn(50, 12, generator=g, dtype=torch.float64)
    bias = checks.randn(12, generator=g, dtype=torch.float64, scale=0.3)
    score = (
        torch.distributions.Categorical(logits=logits).probs
        if scoring == "softmax"
        else logits.sigmoid()
    )
    order = (score + bias).argsort(-1, descending=True)[:, :3]
    chosen = score.gather(1, order)
    with checks.unchanged(bias=bias):
        weights, indices = top_k_router(logits, 3, True, scoring, bias)
    checks.close(indices, order, what=f"the indices with a bias, {scoring}")
    biased = (score + bias).gather(1, order)
    checks.close(
        weights,
        chosen / chosen.sum(-1, keepdim=True),
        what=f"the weights with a bias, {scoring}",
        mistakes={"weights that contain the bias": biased / biased.sum(-1, keepdim=True)},
    )
    # Some experts forbidden to some tokens.
    forbidden = torch.zeros(50, 12, dtype=torch.float64, device=logits.device).masked_fill(
        torch.rand(50, 12, generator=g).to(logits.device) < 0.5, -math.inf
    )
    forbidden[:, :3] = 0
    weights, indices = top_k_router(logits, 3, True, scoring, forbidden)
    assert bool((forbidden.gather(1, indices) == 0).all()), (
        "an expert with a bias of −inf was chosen"
    )
    checks.close(
        weights.sum(-1),
        torch.ones(50).double(),
        what="the sum of the weights where experts are forbidden",
    )
    # Fewer experts left than are chosen: k different ones, those of −inf last, by their number.
    closed = torch.full((12,), -math.inf, dtype=torch.float64, device=logits.device)
    closed[7] = 0.0
    weights, indices = top_k_router(logits, 4, False, scoring, closed)
    checks.close(
        indices,
        torch.tensor([[7, 0, 1, 2]]).expand(50, 4),
        what=f"the indices where a bias of −inf leaves one expert of twelve, {scoring}",
        hint="A score of −inf is still one to choose by, and equal ones go by their number",
    )
    checks.close(
        weights,
        score[:, [7, 0, 1, 2]],
        what=f"the weights where a bias of −inf leaves one expert of twelve, {scoring}",
        hint="They are the scores without the bias: do not subtract −inf again",
    )
# Gradients are untouched: none reaches the bias, those of the logits are as without it.
bias = bias.clone().requires_grad_()
leaf = logits.clone().requires_grad_()
weights, _ = top_k_router(leaf, 3, False, "sigmoid", bias)
slope = torch.autograd.grad(weights.sum(), (leaf, bias), allow_unused=True)
assert slope[1] is None or not bool(slope[1].any()), (
    "a gradient reaches the bias: it should only move the choice"
)
order = (logits.sigmoid() + bias.detach()).argsort(-1, descending=True)[:, :3]
expected = torch.zeros_like(logits).scatter(1, order, logits.sigmoid() * (1 - logits.sigmoid()))
checks.close(
    slope[0],
    torch.where(
        torch.zeros_like(logits).scatter(1, order, 1.0) > 0,
        logits.sigmoid() * (1 - logits.sigmoid()),
        0.0,
    ),
    what="the gradient of the logits with a bias",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Dispatch: tokens to experts and back
#
# Written down token by token, an MoE layer is a double loop: for each token, for each of its $k$
# experts, run the expert on one vector. That is $Tk$ products of a matrix with a *vector*, and each
# of them reads an expert's whole weights to use them once. The opposite extreme, every expert on
# every token and multiply by zero, has rectangles and does $N/k$ times the work.
#
# The way between turns the loop round: **per expert, all of its tokens at once.** A token and one
# of its choices is an **assignment**; there are $Tk$ of them, numbered $a = t\,k + j$ for token
# $t$, choice $j$. So assignment $a$ belongs to token $a \,//\, k$, and that division is the whole
# of the bookkeeping:
#
# ```
# token        0  0  1  1  2  2  3  3        k = 2
# assignment   0  1  2  3  4  5  6  7
# expert       2  0  2  1  0  2  2  1        indices, read row by row
#
# sort by expert (stable):
# expert       0  0 | 1  1 | 2  2  2  2      group sizes 2, 2, 4: the experts' shares of the work
# assignment   1  4 | 3  7 | 0  2  5  6
# token        0  2 | 1  3 | 0  1  2  3      which rows of x to fetch; token 0 is fetched twice
# ```
#
# 1. **Gather** the rows of $x$ in sorted order: $(Tk, d)$.
# 2. **Compute**: each expert one product on its slice. Three experts, three products, however many
#    tokens.
# 3. **Combine**: multiply each result by its gate value and *add* it to its token's row. Two
#    experts write to the same row, so this is an addition: an assignment `out[token] = …` keeps
#    whichever came last.
#
# An expert without tokens is not called, and that must not shift the ones after it. And an
# assignment may be missing altogether: [](#capacity) drops some, and marks them with the index −1.
# Such a choice contributes nothing, and the token is carried by the residual connection around the
# layer, $x + \mathrm{MoE}(x)$.
#
# Given is the expert.


# %%
class Expert(nn.Module):
    """A gated FFN without biases: down(silu(gate x) ⊙ up x), (…, dim) → (…, dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


# %% tags=["support"]
# Support: the double loop, experts that note their rows, and a counter of numbers read by Python


class Watched:
    """An expert that notes how many rows each call brings."""

    def __init__(self, expert):
        self.expert, self.rows = expert, []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.expert(x)


def token_by_token(x: Tensor, weights: Tensor, indices: Tensor, experts) -> Tensor:
    """The double loop over tokens and choices."""
    rows = []
    for vector, gates, chosen in zip(
        x.reshape(-1, x.shape[-1]), weights, indices.tolist(), strict=True
    ):
        row = torch.zeros_like(vector)
        for gate, e in zip(gates, chosen, strict=True):
            if e >= 0:
                row = row + gate.to(row) * experts[e](vector[None])[0]
        rows.append(row)
    return torch.stack(rows).view(x.shape)


@checks.measured
class ReadByPython(torch.overrides.TorchFunctionMode):
    """Counts the numbers that leave tensors for Python, which is what a loop over tokens needs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "__iter__", "unbind", "__array__"):
            self.count += args[0].numel()
        elif name in ("item", "__int__", "__float__", "__bool__", "__index__"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def some_experts(count: int, dim: int, generator: torch.Generator) -> nn.ModuleList:
    """Experts in float64, with random weights that differ."""
    experts = nn.ModuleList(Expert(dim, 3) for _ in range(count)).double().to(profile.device)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


# %% exercise="moe_forward" minutes=35 difficulty=3
def moe_forward(x: Tensor, router, experts) -> Tensor:
    """A mixture of experts, no residual connection: Σ over choices of gate value · expert(token).

    x: (…, dim).
    router: called once, with all tokens as (tokens, dim); returns (weights, indices), each
        (tokens, k). indices are from 0 to len(experts) − 1, in any order, those of a token all
        different, or −1 for a choice that was dropped: it contributes nothing, no expert sees it,
        and the other weights stay as they are.
    experts: a sequence of functions (n, dim) → (n, dim). Each one is called once, with the rows of
        all its tokens and no others; one without tokens is not called.

    Returns x's shape and dtype (where x is coarser than the weights, products may be rounded to it
    before they are added); a token none of whose choices is left gets 0. Apart from the experts no
    Python loop runs over tokens or assignments. Gradients flow to x, the weights and the experts,
    wherever a choice is left.
    """
    ### BEGIN SOLUTION
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    k = indices.shape[1]
    chosen = indices.reshape(-1)
    order = chosen.argsort(stable=True)  # assignments, expert by expert; those dropped come first
    dropped, *sizes = torch.bincount(chosen + 1, minlength=len(experts) + 1).tolist()
    order = order[dropped:]
    token = order // k
    groups = tokens[token].split(sizes)
    results = [expert(group) for expert, group in zip(experts, groups, strict=True) if len(group)]
    out = torch.zeros_like(tokens)
    if results:
        gated = torch.cat(results) * weights.reshape(-1)[order, None]
        out = out.index_add(0, token, gated.to(out.dtype))
    return out.view(x.shape)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: group sizes</summary>
#
# `torch.bincount(…, minlength=…)` counts how often each expert occurs, zeros included, and refuses
# negative numbers. One `.tolist()` of $N$ sizes is all that Python has to know; `Tensor.split`
# takes such a list.
# </details>
#
# <details><summary>Hint: the gate values come out wrong</summary>
#
# After sorting, row $i$ of the results belongs to assignment `order[i]`. Its gate value is at that
# place of the flattened weights; its token is that number divided by $k$.
# </details>
#
# <details><summary>Hint: adding to rows that repeat</summary>
#
# `out[token] += rows` reads, adds and writes back: where `token` repeats, the last one wins.
# `index_add` adds them all.
# </details>

# %% check="moe_forward" points=2
# Expert e multiplies by 10^e, so that the digits of a result say who was there.
x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
tens = [lambda t, e=e: t * 10**e for e in range(3)]
table = torch.tensor([[2, 0], [2, 1], [0, 2]])
gates = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
by_hand = torch.tensor([[102.0], [340.0], [605.0]]) * x
checks.close(
    moe_forward(x, lambda t: (gates, table), tens),
    by_hand,
    what="the result of three experts, 10⁰, 10¹ and 10² times the token,",
    mistakes={
        "all weights equal to 1": torch.tensor([[101.0], [110.0], [101.0]]) * x,
        "the gate values applied twice": torch.tensor([[104.0], [916.0], [3625.0]]) * x,
        "gate values left in the unsorted order": torch.tensor([[401.0], [530.0], [602.0]]) * x,
        "writing where it should add": torch.tensor([[100.0], [300.0], [600.0]]) * x,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for tokens, count, k, dim in [
    (9, 4, 2, 5),
    (1, 3, 3, 2),
    (30, 5, 1, 3),
    (17, 8, 3, 4),
    (6, 1, 1, 3),
]:
    experts = some_experts(count, dim, g)
    x = checks.randn(tokens, dim, generator=g, dtype=torch.float64)
    indices = torch.rand(tokens, count, generator=g).argsort(1)[:, :k].to(x.device)
    weights = torch.rand(tokens, k, generator=g).double().to(x.device)
    with checks.unchanged(x=x, weights=weights, indices=indices):
        out = moe_forward(x, lambda t, w=weights, i=indices: (w, i), experts)
    flat, rows = indices.reshape(-1), torch.arange(tokens * k, device=x.device)
    checks.close(
        out,
        token_by_token(x, weights, indices, experts),
        what=f"the result for {tokens} tokens, {count} experts, k = {k}",
        dtype=torch.float64,
        mistakes={
            "the gate values applied twice": token_by_token(x, weights**2, indices, experts),
            "all weights equal to 1/k": token_by_token(
                x, torch.full_like(weights, 1 / k), indices, experts
            ),
        },
    )
# Experts without tokens, first, in the middle and last, must not shift the others; and leading axes
# are kept.
experts = some_experts(6, 4, g)
x = checks.randn(2, 5, 4, generator=g, dtype=torch.float64).transpose(0, 1)
for used in ([1, 3, 4], [0, 5], [5], [2]):
    indices = torch.tensor(used)[torch.randint(len(used), (10, 1), generator=g)].to(x.device)
    weights = torch.rand(10, 1, generator=g).double().to(x.device)
    out = moe_forward(x, lambda t, w=weights, i=indices: (w, i), experts)
    checks.close(
        out,
        token_by_token(x, weights, indices, experts),
        what=f"the result where only the experts {used} have tokens",
        hint="Does an expert without tokens shift those after it?",
    )
# Float32 tokens with float32 weights, float16 tokens with float32 weights (a router's are).
for dtype in (torch.float32, torch.float16):
    x = checks.randn(7, 4, generator=g, dtype=dtype)
    indices, weights = (
        torch.tensor([[1, 0]] * 4 + [[0, 1]] * 3, device=x.device),
        torch.rand(7, 2, generator=g).to(x.device),
    )
    halves = [lambda t: t * 0.5, lambda t: -t]
    out = moe_forward(x, lambda t, w=weights, i=indices: (w, i), halves)
    checks.close(
        out,
        token_by_token(x.double(), weights.double(), indices, halves).to(dtype),
        what=f"the result for {dtype} tokens",
        dtype=dtype,
        rtol=2e-3 if dtype == torch.float16 else None,
    )
### END HIDDEN TESTS

# %% check="moe_forward" points=2
# Work, counted: each expert is called once with all its tokens, one without tokens not at all.
watched = [Watched(lambda t: t) for _ in range(4)]
indices = torch.tensor([[0, 3], [3, 0], [3, 1], [0, 3], [3, 0]])
moe_forward(torch.ones(5, 2), lambda t: (torch.ones(5, 2), indices), watched)
found = [expert.rows for expert in watched]
assert found == [[4], [1], [], [5]], (
    f"rows given to the four experts, call by call: {found}; expected [[4], [1], [], [5]]"
    + (
        ": every expert sees every token, which costs N/k times the work"
        if all(sum(r) >= 5 for r in found)
        else ""
    )
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
experts = some_experts(4, 6, g)
made = {}
for tokens in (16, 400):
    x = checks.randn(tokens // 8, 8, 6, generator=g, dtype=torch.float64)
    indices = torch.stack([torch.arange(tokens) % 4, (torch.arange(tokens) + 1) % 4], 1).to(
        x.device
    )
    weights = torch.rand(tokens, 2, generator=g).double().to(x.device)
    watched = [Watched(expert) for expert in experts]
    asked = []
    with checks.allocations() as memory, ReadByPython() as read:
        moe_forward(
            x,
            lambda t, w=weights, i=indices, a=asked: (a.append(tuple(t.shape)), (w, i))[1],
            watched,
        )
    assert asked == [(tokens, 6)], (
        f"the router should be called once, with ({tokens}, 6); it got {asked}"
    )
    assert [expert.rows for expert in watched] == [[tokens // 2]] * 4, (
        "each expert should be called once, with exactly its own tokens"
    )
    made[tokens] = sum(memory.shapes.values())
    assert read.count < 64, (
        f"{read.count} numbers were handed to Python for {tokens} tokens and 4 experts: is there "
        f"a loop over tokens?"
    )
assert made[400] <= made[16] + 4, (
    f"{made[16]} tensors are made for 16 tokens, {made[400]} for 400: is there a loop over tokens?"
)
### END HIDDEN TESTS

# %% check="moe_forward" points=2
# Dropped choices carry the index −1.
x = torch.tensor([[1.0], [2.0], [3.0]])
table = torch.tensor([[1, -1], [-1, -1], [0, 1]])
out = moe_forward(
    x, lambda t: (torch.full((3, 2), 0.5), table), [lambda t: t * 10, lambda t: t * 100]
)
checks.close(
    out,
    torch.tensor([[50.0], [0.0], [165.0]]),
    what="the result with dropped choices",
    hint="A choice of −1 contributes nothing; the other keeps its weight",
    mistakes={
        "taking −1 for the last expert": torch.tensor([[100.0], [200.0], [165.0]]),
        "giving the remaining choice the whole weight": torch.tensor([[100.0], [0.0], [165.0]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
experts = some_experts(5, 4, g)
x = checks.randn(3, 7, 4, generator=g, dtype=torch.float64)
indices = torch.rand(21, 5, generator=g).argsort(1)[:, :3].to(x.device)
indices = indices.masked_fill((torch.rand(21, 3, generator=g) < 0.4).to(x.device), -1)
indices[4] = -1
weights = torch.rand(21, 3, generator=g).double().to(x.device)
exact = token_by_token(x, weights, indices, experts)
checks.close(
    moe_forward(x, lambda t: (weights, indices), experts),
    exact,
    what="the result where 40 % of the choices are dropped",
)
watched = [Watched(expert) for expert in experts]
moe_forward(x, lambda t: (weights, indices), watched)
found = [expert.rows for expert in watched]
asked = [[n] if (n := int((indices == e).sum())) else [] for e in range(5)]
assert found == asked, (
    f"rows given to the five experts, call by call: {found}; without the choices that were dropped "
    f"they are {asked}."
)
watched = [Watched(expert) for expert in experts]
nothing = moe_forward(x, lambda t: (weights, torch.full_like(indices, -1)), watched)
checks.close(nothing, torch.zeros_like(x), what="the result where everything is dropped")
assert not any(expert.rows for expert in watched), (
    "everything is dropped, and an expert is called all the same."
)
checks.close(
    moe_forward(x[0, 0], lambda t: (weights[:1], indices[:1]), experts),
    exact[0, 0],
    what="the result for one token of shape (dim,)",
)
# Law: without capacity a token's result does not depend on its neighbors in the batch.
matrix = checks.randn(5, 4, generator=g, dtype=torch.float64)


def linear_router(t):
    top = (t @ matrix.T).softmax(-1).topk(2)
    return top.values, top.indices


whole = moe_forward(x, linear_router, experts)
for b, s in [(0, 0), (1, 3), (2, 6)]:
    checks.close(
        moe_forward(x[b, s][None], linear_router, experts)[0],
        whole[b, s],
        what="a token on its own against the same token in a batch",
    )
checks.close(
    moe_forward(x.flip(0), linear_router, experts).flip(0),
    whole,
    what="the result of a batch in reverse order",
)
# Gradients: to the tokens, to the gate values, to the experts that were used.
checks.gradients(
    lambda t, w: moe_forward(t, lambda _: (w, indices), experts),
    lambda t, w: token_by_token(t, w, indices, experts),
    x,
    weights,
    names=("x", "weights"),
)
first = experts[0].up.weight
actual, expected = (
    torch.autograd.grad(f.square().sum(), first)[0]
    for f in (moe_forward(x, lambda t: (weights, indices), experts), exact)
)
checks.close(actual, expected, what="the gradient of an expert's weights")
### END HIDDEN TESTS

# %% [markdown]
# The sort as a picture, for a real sentence. The router is not trained: its logits are a fixed
# random matrix times the model's embeddings, so equal tokens go to equal experts, and nothing else
# can be read from the choice.

# %% tags=["experiment", "figure"]
# Figure: tokens sorted by expert
line = "for name in names: print(name, len(name))"
pieces = tokenizer.encode(line)
with torch.no_grad():
    logits = small.embed_tokens.weight[pieces] @ torch.randn(
        small.config.hidden_size, 4, generator=torch.Generator().manual_seed(1)
    ).to(profile.device)
    _, picked = top_k_router(logits * 3, 2)
chosen = picked.reshape(-1).cpu()
order = chosen.argsort(stable=True).tolist()
fig, ax = plot.plt.subplots(figsize=(12, 3.9))
width = 2 * len(pieces)
for place, assignment in enumerate(order):
    expert = int(chosen[assignment])
    token, choice = divmod(assignment, 2)
    ax.plot(
        [2 * token + choice, place],
        [1.86, 1.16],
        color=plot.COLORS[expert],
        linestyle=plot.DASHES[expert],
        linewidth=1.1,
    )
    ax.annotate(
        tokenizer.decode([pieces[token]]).replace(" ", "␣"),
        (place, 1.12),
        ha="center",
        va="top",
        fontsize=8,
        rotation=90,
    )
for token, piece in enumerate(pieces):
    ax.annotate(
        tokenizer.decode([piece]).replace(" ", "␣"),
        (2 * token + 0.5, 1.93),
        ha="center",
        va="bottom",
        fontsize=10,
    )
edge = 0
for expert, size in enumerate(chosen.bincount(minlength=4).tolist()):
    ax.add_patch(
        plot.plt.Rectangle(
            (edge - 0.45, 0.55),
            max(size - 0.1, 0.05),
            0.25,
            facecolor=plot.COLORS[expert],
            alpha=0.25,
            edgecolor="black",
        )
    )
    ax.annotate(
        f"expert {expert}: one product, {size} rows",
        (edge - 0.45 + size / 2, 0.675),
        ha="center",
        va="center",
        fontsize=8.5,
    )
    edge += size
ax.set(xlim=(-1, width), ylim=(0.5, 2.1))
ax.axis("off")
ax.set_title(
    "Each token goes to two experts; sorted by expert, each expert's tokens lie side by side"
)
plot.caption(
    fig,
    "Top: the tokens of a line of Python, two lines from each. Middle: the rows fetched, in "
    "sorted order. Bottom: one product for each expert. The groups are uneven: that is the "
    "ragged work of a grouped GEMM.",
)
plot.plt.show()

# %% [markdown]
# ## Balance by a loss {#balance}
#
# Nothing in the task asks for balance, and there is a feedback that works against it: the expert
# that is chosen learns. Two quantities describe how even the routing of a batch is, each of shape
# $(N,)$:
#
# $$ f_i = \frac{1}{Tk}\,\#\{\text{assignments to expert } i\}, \qquad P_i = \frac1T\sum_{t=1}^{T} p_{ti}, $$
#
# what was *done* and what was *meant*: $f$ is counted and has no gradient, $P$ is the mean of the
# router's probabilities $p$ $(T, N)$ and has one. Both sum to 1. Switch's **load-balancing loss**
# lets the first steer the second:
#
# $$ \mathcal{L}_{bal} = \alpha\, N \sum_{i=1}^{N} f_i\,P_i. $$
#
# Why this product? Treat $f$ as the constant that it is for autograd, and use
# $\partial p_{ti}/\partial z_{tj} = p_{ti}(\delta_{ij} - p_{tj})$, the softmax Jacobian of lesson
# 05:
#
# $$ \frac{\partial \mathcal{L}_{bal}}{\partial z_{tj}} = \frac{\alpha N}{T}\sum_i f_i\,p_{ti}(\delta_{ij}-p_{tj}) = \frac{\alpha N}{T}\; p_{tj}\Bigl(f_j - \sum_i f_i\,p_{ti}\Bigr). $$
#
# In brackets: the load of expert $j$, minus the load that token $t$ expects to meet. Experts more
# loaded than that are pushed down, less loaded ones up, each in proportion to the probability that
# the token gives them anyway. And when all $f_i$ are equal the bracket is 0: **a balanced router is
# left alone**, however sharp its decisions.
#
# The factor $N$ fixes the scale. With $f_i = 1/N$ for all experts,
# $\sum_i f_iP_i = \frac1N\sum_i P_i = \frac1N$, so $\mathcal L_{bal} = \alpha$ for any number of
# experts. If, with $k = 1$, one expert gets everything with certainty, $f_1 = P_1 = 1$ and
# $\mathcal L_{bal} = \alpha N$; with larger $k$, $f_1 = \frac1k$ and it is $\alpha N/k$. (Between
# them 1 is not a strict lower bound: where $f$ and $P$ disagree the sum can fall below it. Where
# experts that are more loaded also have more probability, it cannot.)
#
# Conventions differ. Here $f$ is a share of all $Tk$ assignments. Hugging Face's Mixtral divides by
# $T$ only, so that its loss is $k$ times ours.
#
# The **router z-loss** (ST-MoE, Zoph et al. 2022) is about numbers, not about balance. Logits may
# grow without bound as the router becomes sure, and in bfloat16, with 8 bits of precision, a logit
# near 100 is rounded by up to $\tfrac14$: a probability is off by a factor $e^{1/4}$. The loss
# keeps the **log-sum-exp** near 0,
#
# $$ \mathcal{L}_z = \frac1T\sum_t \Bigl(\log\sum_i e^{z_{ti}}\Bigr)^2, \qquad \frac{\partial\mathcal L_z}{\partial z_{ti}} = \frac2T\, p_{ti}\,\log\sum_j e^{z_{tj}}. $$
#
# Softmax does not notice a constant added to all logits; the z-loss does, and that is its purpose.


# %% exercise="balance_losses" minutes=15 difficulty=2
def load_balancing_loss(probs: Tensor, indices: Tensor, alpha: float = 1.0) -> Tensor:
    """Switch's auxiliary loss, α N Σ f·P, a scalar.

    It is α where the load is uniform, and α N / k where all tokens choose the same expert with
    probability 1.

    probs: (tokens, num_experts), float32 or float64, the router's probabilities for all experts,
        rows summing to 1. The loss has their dtype.
    indices: (tokens, k), int64, the experts chosen.

    f: share of all tokens·k assignments, counted from indices; an expert that was not chosen has
        f = 0.
    P: mean of probs over tokens. The gradient reaches probs through P only.
    """
    ### BEGIN SOLUTION
    num_experts = probs.shape[-1]
    f = torch.bincount(indices.reshape(-1), minlength=num_experts).to(probs) / indices.numel()
    return alpha * num_experts * (f * probs.mean(0)).sum()
    ### END SOLUTION


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (log Σᵢ exp(logitᵢ))², a float32 scalar (float64 for float64 logits).

    logits: (tokens, num_experts), any floating dtype, of any size: computed in float32 at least,
        without overflow.
    """
    ### BEGIN SOLUTION
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.logsumexp(-1).square().mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which of the two has the gradient</summary>
#
# Counting integers gives a tensor without a graph: nothing has to be detached. If you find yourself
# detaching `probs`, no gradient is left at all.
# </details>
#
# <details><summary>Hint: overflow</summary>
#
# $e^{100}$ does not fit into float32. `torch.logsumexp` takes the maximum out first.
# </details>

# %% check="balance_losses" points=2
probs = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64
)
indices = torch.tensor([[0], [0], [1], [0]])  # f = 3/4, 1/4, 0;  P = 0.5, 0.25, 0.25
checks.close(
    load_balancing_loss(probs, indices),
    3 * (0.75 * 0.5 + 0.25 * 0.25),
    what="the loss of four tokens on three experts",
    mistakes={
        "leaving out the factor N": 0.75 * 0.5 + 0.25 * 0.25,
        "loads taken from the probabilities": 3 * (0.5**2 + 2 * 0.25**2),
        "a mean over experts instead of a sum": 0.75 * 0.5 + 0.25 * 0.25,
        "counts instead of shares": 12 * (0.75 * 0.5 + 0.25 * 0.25),
    },
)
checks.close(
    load_balancing_loss(probs, indices, alpha=0.01),
    0.03 * (0.75 * 0.5 + 0.25 * 0.25),
    what="the loss with α = 0.01",
)
### BEGIN HIDDEN TESTS
g = checks.generator(20)
for experts, k in [(2, 1), (8, 2), (64, 8), (5, 5)]:
    # Closed form: equal loads give 1 whatever the probabilities, equal probabilities give 1
    # whatever the loads.
    tokens = 4 * experts
    p = torch.rand(tokens, experts, generator=g).double().softmax(-1)
    even = (torch.arange(tokens)[:, None] + torch.arange(k)) % experts
    checks.close(
        load_balancing_loss(p, even),
        1.0,
        what=f"the loss of a uniform load, {experts} experts, k = {k}",
        mistakes={
            "dividing the counts by the tokens, not by the assignments,": float(k),
            "leaving out the factor N": 1 / experts,
        },
    )
    uneven = torch.rand(tokens, experts, generator=g).argsort(1)[:, :k]
    checks.close(
        load_balancing_loss(torch.full_like(p, 1 / experts), uneven),
        1.0,
        what=f"the loss of uniform probabilities, {experts} experts, k = {k}",
    )
    by_pairs = (
        sum(
            float(p[:, e].mean()) * sum(e in row for row in uneven.tolist()) for e in range(experts)
        )
        * experts
        / (tokens * k)
    )
    checks.close(
        load_balancing_loss(p, uneven, alpha=0.3),
        0.3 * by_pairs,
        what=f"the loss for {experts} experts, k = {k}, α = 0.3",
        dtype=torch.float64,
    )
collapsed = torch.zeros(6, 16).double()
collapsed[:, 0] = 1  # the last experts are never chosen: are they counted?
checks.close(
    load_balancing_loss(collapsed, torch.zeros(6, 1, dtype=torch.int64)),
    16.0,
    what="the loss of a collapsed router of 16 experts",
    mistakes={"counting only the experts that were chosen": 1.0},
)
checks.close(
    load_balancing_loss(torch.full((3, 4), 0.25), torch.zeros(3, 2, dtype=torch.int64)),
    1.0,
    what="the loss in float32",
    dtype=torch.float32,
)
### END HIDDEN TESTS

# %% check="balance_losses" points=1
z = torch.log(
    torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3]], dtype=torch.float64)
).requires_grad_()
loss = load_balancing_loss(z.softmax(-1), torch.tensor([[0], [0]]))
assert getattr(loss, "requires_grad", False), (
    "the loss carries no gradient: P, the mean of the probabilities, should"
)
(slope,) = torch.autograd.grad(loss, z)
assert float(slope[0, 0]) > 0 > float(slope[0, 1]), (
    "expert 0 has all the load: gradient descent must lower its logit and raise the others"
)
### BEGIN HIDDEN TESTS
# The formula of the text: α N/T · p (f − Σ f p), from counted f, for random routers.
g = checks.generator(21)
for tokens, experts, k in [(7, 4, 1), (12, 9, 3)]:
    z = torch.randn(tokens, experts, generator=g, dtype=torch.float64).requires_grad_()
    indices = torch.rand(tokens, experts, generator=g).argsort(1)[:, :k]
    p = z.detach().exp() / z.detach().exp().sum(-1, keepdim=True)
    f = torch.tensor(
        [sum(e in row for row in indices.tolist()) for e in range(experts)]
    ).double() / (tokens * k)
    (slope,) = torch.autograd.grad(load_balancing_loss(z.softmax(-1), indices, 0.5), z)
    checks.close(
        slope,
        0.5 * experts / tokens * p * (f - (p * f).sum(-1, keepdim=True)),
        what="the gradient in the logits",
        atol=1e-12,
        mistakes={
            "a differentiable f (loads taken from the probabilities)": torch.autograd.grad(
                0.5 * experts * z.softmax(-1).mean(0).square().sum(), z
            )[0]
        },
    )
even = (torch.arange(8)[:, None] + torch.arange(2)) % 4
z = torch.randn(8, 4, generator=g, dtype=torch.float64).requires_grad_()
checks.close(
    torch.autograd.grad(load_balancing_loss(z.softmax(-1), even), z)[0],
    torch.zeros(8, 4).double(),
    what="the gradient where the load is uniform",
    atol=1e-12,
)
### END HIDDEN TESTS

# %% check="balance_losses" points=1
checks.close(
    router_z_loss(torch.zeros(3, 8)),
    math.log(8) ** 2,
    what="the z-loss of equal logits of 0",
    rtol=1e-6,
    mistakes={
        "not squaring": math.log(8),
        "a sum over tokens instead of a mean": 3 * math.log(8) ** 2,
    },
)
checks.close(
    router_z_loss(torch.tensor([[-math.log(2.0), -math.log(2.0)]])),
    0.0,
    what="the z-loss of logits whose exponentials sum to 1",
    atol=1e-10,
)
### BEGIN HIDDEN TESTS
g = checks.generator(22)
for tokens, experts in [(1, 2), (9, 5), (4, 64)]:
    logits = torch.randn(tokens, experts, generator=g, dtype=torch.float64) * 3
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / tokens
    checks.close(
        router_z_loss(logits),
        expected,
        what=f"the z-loss, {tokens} tokens, {experts} experts",
        mistakes={
            "the mean of the squared logits": logits.square().mean(),
            "the square of the mean": logits.logsumexp(-1).mean().square(),
        },
    )
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(router_z_loss(leaf), leaf)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    checks.close(
        slope,
        2 / tokens * p * logits.exp().sum(-1, keepdim=True).log(),
        what="the gradient of the z-loss",
        atol=1e-10,
    )
checks.close(
    router_z_loss(torch.tensor([[1000.0, 1000.0]])),
    (1000 + math.log(2)) ** 2,
    what="the z-loss of logits of 1000",
    rtol=1e-5,
)
for half in (torch.float16, torch.bfloat16):  # its square does not fit into float16
    checks.close(
        router_z_loss(torch.full((2, 4), 300.0).to(half)),
        torch.tensor((300 + math.log(4)) ** 2),
        what=f"the z-loss of {half} logits of 300",
        rtol=1e-5,
        dtype=torch.float32,
    )
### END HIDDEN TESTS

# %% [markdown]
# ## Capacity: rectangles, at a price {#capacity}
#
# Hardware that wants fixed shapes (TPUs, and any system that reserves buffers to send tokens
# between machines) gives each expert room for a fixed number of tokens, its **capacity**
#
# $$ C = \Bigl\lceil \text{capacity factor}\cdot\frac{Tk}{N}\Bigr\rceil . $$
#
# A factor of 1 is enough if the load is perfectly even. What does not fit is **dropped**: the
# choice is struck out, and a token all of whose choices are dropped passes through the layer on the
# residual connection alone, unchanged.
#
# Who is dropped is a decision. GShard and its successors serve **all first choices before any
# second choice**, and within one rank, the tokens in their order. A first choice matters more (its
# gate value is the largest), and a token should not lose it to somebody's second.
#
# ```
# capacity 2        token 0: 0 1     token 1: 0 1     token 2: 0 1     token 3: 1 0
# first choices     token 0 → 0 ✓    token 1 → 0 ✓    token 2 → 0 ✗    token 3 → 1 ✓
# second choices    token 0 → 1 ✓    token 1 → 1 ✗    token 2 → 1 ✗    token 3 → 0 ✗   (2 lost both)
# ```
#
# Two costs come with it. With capacity, a token's result **depends on its neighbors** in the batch,
# which makes results hard to reproduce. And look at token 1: it lost its second choice to token
# *3's first*, a token that stands later in the text. In a language model that is a leak from the
# future. This is one reason why today's decoders (Mixtral, DeepSeek, Qwen) drop nothing and use
# grouped products of uneven size instead, and why balance is sought by other means.


# %% exercise="apply_capacity" minutes=25 difficulty=2
def apply_capacity(indices: Tensor, capacity: int) -> Tensor:
    """The choices that fit: indices with every choice beyond its expert's capacity set to −1.

    indices: (tokens, k), int64; the experts of a token in the order of its preference, each from 0
        up, or −1 (already dropped, takes no room).
    capacity: ≥ 0.

    Served first are all first choices, in the order of the tokens, then all second choices, and so
    on; each expert takes the first `capacity` of those that come to it. Returns a new tensor of
    the same shape and dtype. No Python loop over tokens.
    """
    ### BEGIN SOLUTION
    tokens, k = indices.shape
    queue = indices.T.reshape(-1)  # all first choices, then all second ones
    ordered, order = queue.sort(stable=True)
    # Place in the expert's own queue: how far from the first entry of the same expert.
    place = torch.arange(len(queue), device=queue.device) - torch.searchsorted(ordered, ordered)
    kept = torch.empty_like(queue)
    kept[order] = ordered.masked_fill(place >= capacity, -1)
    return kept.view(k, tokens).T.contiguous()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the queue</summary>
#
# Read the table column by column and you have the order of serving: what does
# `indices.T.reshape(-1)` give?
# </details>
#
# <details><summary>Hint: a place in a queue, without a loop</summary>
#
# Two ways. One-hot rows and a `cumsum` down the queue count how many came before to the same
# expert. Or a stable sort puts each expert's queue side by side, and the place is the distance from
# its beginning.
# </details>

# %% check="apply_capacity" points=2
table = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
with checks.unchanged(indices=table):
    kept = apply_capacity(table, 2)
checks.close(
    kept,
    torch.tensor([[0, 1], [0, -1], [-1, -1], [1, -1]]),
    what="the choices kept with room for two",
    mistakes={
        "serving token by token, both choices at once,": torch.tensor(
            [[0, 1], [0, 1], [-1, -1], [-1, -1]]
        ),
        "keeping the last instead of the first": torch.tensor([[-1, -1], [-1, 1], [0, 1], [-1, 0]]),
        "dropping all choices of a token that lost one": torch.tensor(
            [[0, 1], [-1, -1], [-1, -1], [-1, -1]]
        ),
        "room for one more than the capacity": torch.tensor([[0, 1], [0, 1], [0, -1], [1, -1]]),
    },
)
### BEGIN HIDDEN TESTS
cases = [
    ([[0], [1], [0], [0], [1]], 1, [[0], [1], [-1], [-1], [-1]]),
    ([[2, 0], [2, 1], [0, 2]], 1, [[2, -1], [-1, 1], [0, -1]]),
    ([[1, 0], [0, 1], [1, 0]], 3, [[1, 0], [0, 1], [1, 0]]),
    ([[3, 1], [1, 3]], 0, [[-1, -1], [-1, -1]]),
    ([[-1, 0], [0, -1], [-1, -1], [0, 1]], 2, [[-1, -1], [0, -1], [-1, -1], [0, 1]]),
]
for given, capacity, expected in cases:
    checks.close(
        apply_capacity(torch.tensor(given), capacity),
        torch.tensor(expected),
        what=f"apply_capacity({given}, {capacity})",
    )
g = checks.generator(30)
for tokens, experts, k, capacity in [
    (50, 8, 2, 9),
    (33, 5, 3, 7),
    (64, 16, 1, 2),
    (1, 4, 4, 1),
    (40, 3, 2, 100),
    (200, 4, 2, 60),
]:
    indices = (torch.rand(tokens, experts, generator=g) ** (1 + torch.arange(experts))).argsort(1)[
        :, :k
    ]
    room, expected = [capacity] * experts, torch.full_like(indices, -1)
    for choice in range(k):
        for token in range(tokens):
            e = int(indices[token, choice])
            if room[e] > 0:
                room[e] -= 1
                expected[token, choice] = e
    given = indices.T.contiguous().T  # the same table, stored column by column
    with checks.unchanged(indices=given), ReadByPython() as read:
        kept = apply_capacity(given, capacity)
    checks.close(
        kept,
        expected,
        what=f"the choices kept, {tokens} tokens, {experts} experts, k = {k}, capacity {capacity}",
        dtype=torch.int64,
    )
    assert read.count < 50, (
        f"{read.count} numbers were handed to Python for {tokens} tokens: is there a loop over "
        f"tokens?"
    )
# Law: the first n tokens' first choices do not depend on later tokens; all that is lost is lost to
# a full expert.
load = torch.bincount(indices.reshape(-1), minlength=experts)
checks.close(
    torch.bincount(kept[kept >= 0], minlength=experts),
    load.clamp(max=capacity),
    what="the load of each expert after dropping",
)
checks.close(
    apply_capacity(indices[:20], 4)[:, 0],
    apply_capacity(indices, 4)[:20, 0],
    what="the first choices of the first 20 tokens, with and without the tokens behind them",
)
### END HIDDEN TESTS

# %% check="apply_capacity" points=1
# Together with an MoE layer (PyTorch's own parts here): dropped tokens pass through the residual
# connection unchanged.
x = torch.tensor([[1.0], [2.0], [3.0]])
kept = apply_capacity(torch.tensor([[0], [0], [0]]), 1)
checks.close(
    x + torch.where(kept >= 0, 10 * x, 0.0),
    torch.tensor([[11.0], [2.0], [3.0]]),
    what="x + MoE(x) with room for one token",
    mistakes={
        "dropping nothing": 11 * x,
        "keeping the last token": torch.tensor([[1.0], [2.0], [33.0]]),
    },
)
### BEGIN HIDDEN TESTS
# Earlier tokens win among first choices; a later token's first choice beats an earlier one's
# second.
a = apply_capacity(torch.tensor([[0, 1], [0, 1]]), 1)
b = apply_capacity(torch.tensor([[0, 1], [1, 0]]), 1)
checks.close(
    a, torch.tensor([[0, 1], [-1, -1]]), what="two tokens with equal wishes and room for one"
)
checks.close(
    b,
    torch.tensor([[0, -1], [1, -1]]),
    what="two tokens that want each other's second choice",
    hint="All first choices are served before any second choice",
    mistakes={"serving token by token": torch.tensor([[0, 1], [-1, -1]])},
)
checks.close(
    apply_capacity(torch.zeros(0, 2, dtype=torch.int64), 3),
    torch.zeros(0, 2, dtype=torch.int64),
    what="no tokens at all",
)
checks.close(
    apply_capacity(torch.tensor([[5, 900]]), 1),
    torch.tensor([[5, 900]]),
    what="experts with large numbers",
)
### END HIDDEN TESTS

# %% [markdown]
# ## DeepSeekMoE: finer experts, and some for everyone
#
# Mixtral chooses 2 of 8 large experts: $\binom82 = 28$ possible combinations. Cut each expert into
# four, and choose four times as many: 8 of 32. Parameters and arithmetic are the same, since $N h$
# and $k h$ are, but there are now $\binom{32}{8} = 10{,}518{,}300$ combinations. A token can be
# served by what it needs, and an expert can be about one thing. These are **fine-grained experts**
# (Dai et al. 2024).
#
# The second idea: some knowledge is needed by every token, and if only routed experts exist, each
# of them must learn it again. So a few experts are **shared**: every token goes through them, no
# router, no gate value. What is common collects there and the routed experts are free to differ. By
# the law of [](#memory), memories side by side add up, so $S$ shared experts of width $h$ *are* one
# FFN of width $Sh$:
#
# $$ \mathrm{MoE}(x) = \underbrace{E_{shared}(x)}_{\text{width } Sh} + \sum_{i\in\mathcal T} g_i\,E_i(x). $$
#
# **Counting.** With gated experts, per layer,
#
# $$ \text{total} = Nd + 3dh\,(N + S), \qquad \text{active} = Nd + 3dh\,(k + S). $$
#
# The router looks at all experts, so its $Nd$ parameters are always active. What the total decides
# is memory; what the active count decides is arithmetic.


# %% exercise="deepseek_moe" minutes=25 difficulty=2
class DeepSeekMoE(nn.Module):
    """Routed experts, k for each token, and shared ones for all tokens; no residual connection.

    Attributes:
    router: nn.Linear(dim, num_experts) without bias.
    experts: nn.ModuleList of num_experts Expert(dim, hidden).
    shared: Expert(dim, shared · hidden), or None where shared is 0.
    bias: a buffer of num_experts zeros, in the state_dict, made in float32 (`.double()` converts it
        with the rest); it moves the choice of the router (moved by update_bias) and is no
        parameter.
    k: how many experts a token visits, an int. Nothing else has parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        shared: int = 1,
        scoring: str = "softmax",
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.k, self.scoring, self.renormalize = k, scoring, renormalize
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(num_experts))
        self.shared = Expert(dim, shared * hidden) if shared else None
        self.register_buffer("bias", torch.zeros(num_experts))
        ### END SOLUTION

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, dim) → (out (…, dim), logits (tokens, num_experts), indices (tokens, k)).

        x has the dtype of the parameters, float32 or float64, and so have out and the logits.
        """
        ### BEGIN SOLUTION
        logits = self.router(x.reshape(-1, x.shape[-1]))
        weights, indices = top_k_router(logits, self.k, self.renormalize, self.scoring, self.bias)
        out = moe_forward(x, lambda tokens: (weights, indices), self.experts)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, logits, indices
        ### END SOLUTION

    def parameter_counts(self) -> tuple[int, int]:
        """(total, active): all parameters, and those that one token uses, the router's included."""
        ### BEGIN SOLUTION
        total = sum(p.numel() for p in self.parameters())
        per_expert = sum(p.numel() for p in self.experts[0].parameters())
        return total, total - (len(self.experts) - self.k) * per_expert
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: logits and the router of moe_forward</summary>
#
# `moe_forward` wants a function of the tokens. You have computed the weights and indices already:
# hand it a function that ignores its argument and returns them.
# </details>
#
# <details><summary>Hint: a buffer</summary>
#
# `register_buffer` makes a tensor that moves to the GPU and into checkpoints with the module and
# that no optimizer sees.
# </details>


# %% tags=["support"]
# Support: a module with random parameters


def randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module in float64 on the profile's device, every parameter drawn at random."""
    module = module.double().to(profile.device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )
    return module


# %% check="deepseek_moe" points=2
moe = DeepSeekMoE(dim=6, hidden=4, num_experts=5, k=2, shared=2)
shapes = {name: tuple(p.shape) for name, p in moe.named_parameters()}
expected = {"router.weight": (5, 6)} | {
    f"{where}.{name}.weight": (6, width) if name == "down" else (width, 6)
    for where, width in [*((f"experts.{e}", 4) for e in range(5)), ("shared", 8)]
    for name in ("gate", "up", "down")
}
assert shapes == expected, f"the parameters should be {expected}; yours are {shapes}"
assert "bias" in dict(moe.named_buffers()), "bias should be a buffer: register_buffer"
checks.close(moe.bias, torch.zeros(5), what="the bias of a new layer", dtype=torch.float32)
checks.close(getattr(moe, "k", None), 2, what="the attribute k")
counts = checks.parts(moe.parameter_counts(), "total", "active", what="parameter_counts")
checks.close(
    torch.tensor(counts),
    torch.tensor([30 + 7 * 72, 30 + 4 * 72]),
    what="(total, active)",
    mistakes={
        "an active count without the router": torch.tensor([30 + 7 * 72, 4 * 72]),
        "an active count without the shared experts": torch.tensor([30 + 7 * 72, 30 + 2 * 72]),
        "counting one shared expert, not two": torch.tensor([30 + 6 * 72, 30 + 3 * 72]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(40)
for dim, hidden, experts, k, shared in [
    (4, 3, 6, 2, 1),
    (5, 2, 3, 3, 0),
    (8, 1, 9, 4, 3),
    (3, 4, 1, 1, 1),
]:
    # Active is what a single token touches: the parameters that its result sends a gradient to.
    moe = randomized(DeepSeekMoE(dim, hidden, experts, k, shared), g)
    moe(checks.randn(1, dim, generator=g, dtype=torch.float64))[0].sum().backward()
    reached = sum(p.numel() for p in moe.parameters() if p.grad is not None)
    what = f"dim {dim}, hidden {hidden}, {experts} experts, k = {k}, {shared} shared"
    checks.close(
        torch.tensor(moe.parameter_counts()),
        torch.tensor([experts * dim + 3 * dim * hidden * (experts + shared), reached]),
        what=f"(total, active) for {what}",
    )
    assert reached == experts * dim + 3 * dim * hidden * (k + shared), (
        f"one token should use {k} routed and {shared} shared experts, and the router; {what}"
    )
    assert (moe.shared is None) == (shared == 0), (
        "shared should be None where there are no shared experts"
    )
### END HIDDEN TESTS

# %% check="deepseek_moe" points=2
# Equal logits: experts 0 and 1 are chosen, at one half each; and the shared expert, whole.
g = checks.generator(41)
moe = randomized(DeepSeekMoE(4, 3, 3, 2, shared=1), g)
with torch.no_grad():
    moe.router.weight.zero_()
x = checks.randn(2, 5, 4, generator=g, dtype=torch.float64)
out, logits, indices = checks.parts(moe(x), "out", "logits", "indices", what="forward")
both = (moe.experts[0](x) + moe.experts[1](x)) / 2
checks.close(indices, torch.tensor([[0, 1]]).expand(10, 2), what="the indices for equal logits")
checks.close(
    out,
    both + moe.shared(x),
    what="out for equal logits",
    mistakes={
        "leaving out the shared expert": both,
        "a gate value for the shared expert": both + moe.shared(x) / 2,
        "adding x (the residual connection is not part of the layer)": both + moe.shared(x) + x,
        "averaging routed and shared": (both + moe.shared(x)) / 2,
    },
)
checks.close(logits, torch.zeros(10, 3).double(), what="the logits")
### BEGIN HIDDEN TESTS
for dim, hidden, experts, k, shared, scoring, renormalize in [
    (5, 3, 7, 3, 2, "softmax", True),
    (4, 2, 4, 1, 1, "softmax", False),
    (6, 3, 5, 2, 0, "sigmoid", True),
    (4, 3, 6, 2, 1, "sigmoid", False),
]:
    moe = randomized(DeepSeekMoE(dim, hidden, experts, k, shared, scoring, renormalize), g)
    x = checks.randn(3, 4, dim, generator=g, dtype=torch.float64)
    for with_bias in (False, True):
        if with_bias:
            moe.bias.copy_(torch.rand(experts, generator=g) * 0.5)
        with checks.unchanged(x=x):
            out, logits, indices = moe(x)
        z = x.reshape(-1, dim) @ moe.router.weight.detach().T
        score = (
            z.exp() / z.exp().sum(-1, keepdim=True)
            if scoring == "softmax"
            else 1 / (1 + (-z).exp())
        )
        order = (score + moe.bias).argsort(-1, descending=True)[:, :k]
        gate = score.gather(1, order)
        gate = gate / gate.sum(-1, keepdim=True) if renormalize else gate
        expected = token_by_token(x, gate, order, moe.experts) + (moe.shared(x) if shared else 0)
        what = (
            f"{experts} experts, k = {k}, {shared} shared, {scoring}, renormalize={renormalize}, "
            f"{'a' if with_bias else 'no'} bias"
        )
        checks.close(logits, z, what=f"the logits, {what}", dtype=torch.float64)
        checks.close(
            indices, order, what=f"the indices, {what}", hint="The bias buffer moves the choice"
        )
        checks.close(out, expected, what=f"out, {what}", dtype=torch.float64)
# Every part learns, the router through the gate values; the bias is no parameter.
moe = randomized(DeepSeekMoE(4, 3, 3, 2), g)
moe(checks.randn(40, 4, generator=g, dtype=torch.float64))[0].square().sum().backward()
checks.close(moe.k, 2, what="the attribute k")
one = checks.randn(4, generator=g, dtype=torch.float64)
checks.close(moe(one)[0], moe(one[None])[0][0], what="out for one token of shape (dim,)")
silent = [name for name, p in moe.named_parameters() if p.grad is None or not p.grad.any()]
assert not silent, f"no gradient reaches {', '.join(silent)}"
assert "bias" in moe.state_dict(), "the bias belongs to checkpoints: a persistent buffer"
assert not isinstance(moe.bias, nn.Parameter), (
    "the bias belongs to checkpoints and not to the optimizer: a buffer"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Groups: staying on a few machines
#
# DeepSeek-V3's 256 experts of a layer lie on eight machines, in groups of 32. A token whose 8
# experts lie on 8 machines must be sent over the network eight times. So its choice is made in two
# steps: the four best *groups* first, and then the 8 best experts inside them. A group is judged by
# the sum of its **two best** scores (with the bias).
#
# Your router can do the second step already: a bias of −∞ forbids an expert, and a bias may differ
# from token to token.


# %% exercise="group_limit" minutes=10 difficulty=2 path="more"
def group_limit(scores: Tensor, groups: int, keep: int) -> Tensor:
    """Which experts each token may choose when only its best `keep` of `groups` groups are open.

    Returns (tokens, num_experts), bool.
    scores: (tokens, num_experts), bias included; group j holds num_experts / groups consecutive
    experts, at least two. A group is worth the sum of its two largest scores. Scores are finite,
    and no two groups are worth the same. keep is from 1 to groups, not checked. ValueError if
    num_experts is not a multiple of groups.
    """
    ### BEGIN SOLUTION
    experts = scores.shape[-1]
    if experts % groups:
        raise ValueError(f"{experts} experts cannot be dealt out evenly to {groups} groups")
    size = experts // groups
    worth = scores.unflatten(-1, (groups, size)).topk(2, dim=-1).values.sum(-1)
    closed = torch.zeros_like(worth, dtype=torch.bool)
    open_groups = closed.scatter(-1, worth.topk(keep, dim=-1).indices, True)
    return open_groups.repeat_interleave(size, dim=-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: groups as an axis</summary>
#
# `unflatten` the experts into `(groups, size)`; the group is then an axis like any other. At the
# end every group's answer is repeated for its members.
# </details>

# %% check="group_limit" points=1
scores = torch.tensor([[0.9, 0.1, 0.5, 0.6, 0.2, 0.3]])  # groups of two: worth 1.0, 1.1, 0.5
checks.close(
    group_limit(scores, 3, 1),
    torch.tensor([[False, False, True, True, False, False]]),
    what="the experts open with the best of three groups",
    mistakes={
        "judging a group by its best score alone": torch.tensor(
            [[True, True, False, False, False, False]]
        )
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(45)
for tokens, experts, groups, keep in [
    (9, 12, 3, 2),
    (1, 8, 4, 4),
    (20, 32, 8, 4),
    (5, 10, 1, 1),
    (7, 12, 6, 2),
]:
    scores = checks.randn(tokens, experts, generator=g)
    size = experts // groups
    expected = torch.zeros(tokens, experts, dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        worth = [sum(sorted(row[j * size : (j + 1) * size])[-2:]) for j in range(groups)]
        for j in sorted(range(groups), key=lambda j, w=worth: -w[j])[:keep]:
            expected[t, j * size : (j + 1) * size] = True
    with checks.unchanged(scores=scores):
        allowed = group_limit(scores, groups, keep)
    checks.close(
        allowed,
        expected,
        what=f"the experts open, {experts} experts in {groups} groups, {keep} kept",
    )
checks.raises(ValueError, group_limit, torch.zeros(1, 10), 3, 1, because="10 experts in 3 groups")
### END HIDDEN TESTS

# %% [markdown]
# ## Balance without a loss {#bias}
#
# The auxiliary loss pulls on the same weights as the task. With a small $\alpha$ it does not
# balance; with a large one its gradient, which knows nothing of language, spoils the model. Wang et
# al. (2024) take the balance out of the gradient altogether. Each expert gets a **bias** $b_i$,
# which is added to its score when the $k$ best are chosen *and only then*. After each step the load
# is counted, and the bias of every overloaded expert is lowered, of every underloaded one raised,
# by a fixed **rate** $u$:
#
# $$ b_i \leftarrow b_i + u\cdot\mathrm{sign}\bigl(\bar c - c_i\bigr), \qquad c_i = \#\{\text{assignments to } i\}, \quad \bar c = \tfrac1N\textstyle\sum_j c_j . $$
#
# That is a controller, not an optimizer: a thermostat that turns the heating on or off without
# asking how far the temperature is from its goal. The sign makes the step independent of the batch
# size; the price is that it never comes to rest and swings around balance in steps of $u$. The gate
# values contain no bias, so a token that was talked into an expert that suits it less also gives it
# less weight (unless $k = 1$ is renormalized), and no gradient comes from the balance at all.
#
# Why does it converge? Raise $b_i$ while everything else stays, and more tokens choose $i$: the
# load is a rising function of its own bias. So an error has a definite sign, and a small step
# against it makes it smaller.


# %% exercise="update_bias" minutes=10 difficulty=1
def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias for the next step: down by `rate` for overloaded experts, up for underloaded ones.

    bias: (num_experts,), floating.
    load: (num_experts,), how many assignments each got, integers or floats.

    An expert at the mean load keeps its bias: exactly at it where loads are counts; for loads that
    are rounded themselves (shares), rounding may decide. Returns a new tensor of bias's shape and
    dtype without a gradient history.
    """
    ### BEGIN SOLUTION
    load = load.detach().double()
    return bias.detach() + rate * (load.mean() - load).sign().to(bias.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: direction</summary>
#
# Say it in words first: too many tokens, so it should be chosen less, so its bias goes down.
# </details>

# %% check="update_bias" points=1
bias = torch.tensor([0.5, 0.0, 0.0, -0.5])
load = torch.tensor([10, 2, 6, 6])  # the mean is 6
with checks.unchanged(bias=bias, load=load):
    after = update_bias(bias, load, 0.1)
checks.close(
    after,
    torch.tensor([0.4, 0.1, 0.0, -0.5]),
    what="the bias after a step",
    mistakes={
        "the wrong sign: overloaded experts are made more attractive": torch.tensor(
            [0.6, -0.1, 0.0, -0.5]
        ),
        "a step in proportion to the excess": bias + 0.1 * (6 - load),
        "forgetting the old bias": torch.tensor([-0.1, 0.1, 0.0, 0.0]),
        "a step in proportion to the excess share": bias + 0.1 * (6 - load) / 6,
    },
)
### BEGIN HIDDEN TESTS
checks.close(
    update_bias(torch.zeros(3), torch.tensor([4, 4, 4]), 0.5),
    torch.zeros(3),
    what="the bias where the load is even",
)
checks.close(
    update_bias(torch.zeros(4), torch.tensor([1000, 0, 0, 0]), 0.01),
    torch.tensor([-0.01, 0.01, 0.01, 0.01]),
    what="the bias where one expert has everything",
    mistakes={"comparing with the median, not the mean": torch.tensor([-0.01, 0.0, 0.0, 0.0])},
)
checks.close(
    update_bias(torch.zeros(3), torch.tensor([7, 8, 6]), 0.5),
    torch.tensor([0.0, -0.5, 0.5]),
    what="the bias for loads one off the mean",
)
checks.close(
    update_bias(torch.zeros(4), torch.tensor([1, 2, 2, 1]), 0.5),
    torch.tensor([0.5, -0.5, -0.5, 0.5]),
    what="the bias for loads around a mean of 1.5",
)
checks.close(
    update_bias(torch.zeros(3, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3]), 0.5).sign(),
    torch.tensor([1.0, -1.0, 1.0]).double(),
    what="the direction for loads given as shares",
)
leaf = torch.zeros(2, requires_grad=True)
after = update_bias(leaf, torch.tensor([1, 3]), 0.1)
assert not after.requires_grad, "the new bias carries a gradient history: it is not to be trained"
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    checks.close(
        update_bias(torch.ones(3, dtype=dtype), torch.tensor([5, 1, 3]), 0.25),
        torch.tensor([0.75, 1.25, 1.0], dtype=dtype),
        what=f"the bias in {dtype}",
        dtype=dtype,
    )
# Counts of a long run: neighbors of 2²⁴ are one number in float32.
checks.close(
    update_bias(torch.zeros(3), torch.tensor([2**24, 2**24 + 1, 2**24 + 2]), 0.5),
    torch.tensor([0.5, 0.0, -0.5]),
    what="the bias for loads of 2²⁴, one off the mean",
)
### END HIDDEN TESTS

# %% check="update_bias" points=2
# A simulation: experts of very different popularity, a new batch each step, 2 of 8 chosen by
# sigmoid score plus bias.
g = checks.generator(50)
popularity = torch.linspace(-1.5, 1.5, 8)
bias = torch.zeros(8)
loads = []
for _ in range(100):
    scores = torch.sigmoid(torch.randn(512, 8, generator=g) + popularity)
    chosen = (scores + bias).topk(2).indices
    loads.append(torch.bincount(chosen.flatten(), minlength=8))
    bias = update_bias(bias, loads[-1], 0.02)
    checks.close(torch.tensor(bias.shape), torch.tensor([8]), what="the bias's shape")
first, last = loads[0].double() / 128, torch.stack(loads[-40:]).double().mean(0) / 128
assert float(last.max()) < 1.15, (
    f"the busiest expert has {float(last.max()):.2f} times the mean load after 100 steps (it "
    f"began with {float(first.max()):.2f}); it should be near 1"
)
### BEGIN HIDDEN TESTS
for count, k, spread, rate in [(16, 1, 1.0, 0.02), (12, 4, 2.0, 0.04)]:
    popularity = torch.linspace(-spread, spread, count)[torch.randperm(count, generator=g)]
    bias, loads = torch.zeros(count), []
    for _ in range(100):
        scores = torch.sigmoid(torch.randn(512, count, generator=g) + popularity)
        chosen = (scores + bias).topk(k).indices
        loads.append(torch.bincount(chosen.flatten(), minlength=count))
        bias = update_bias(bias, loads[-1], rate)
    mean = 512 * k / count
    last = torch.stack(loads[-40:]).double().mean(0) / mean
    assert float(last.max()) < 1.2, (
        f"{count} experts, k = {k}: the busiest has {float(last.max()):.2f} times the mean load "
        f"after 100 steps"
    )
    assert float(last.min()) > 0.8, (
        f"{count} experts, k = {k}: the idlest has {float(last.min()):.2f} times the mean load "
        f"after 100 steps"
    )
    assert float(bias.abs().max()) <= 100 * rate + 1e-4, (
        "no bias can move further than the rate in a step"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: sixteen experts learn to read
#
# A language model of two blocks reads Python's documentation and source code, in tokens of a small
# vocabulary made for it. Each block's FFN is your `DeepSeekMoE` with 16 experts of width 64, one of
# them per token ($k = 1$, as in Switch, so not renormalized; nothing shared, to see routing alone).
# It is trained three times from the same start on the same batches:
#
# - **nothing**: the language loss alone;
# - **auxiliary loss**: plus your `load_balancing_loss` with $\alpha = 0.01$;
# - **bias**: your `update_bias` after every step, rate 0.003, no other loss.
#
# The yardstick is a **dense** model with the same *active* parameters: one FFN of width 64.
#
# **Write down before you run it:** in which runs will experts die? Which of the four has the lowest
# loss on held-out text, and is the gap between dense and MoE larger than that between balanced and
# unbalanced?

# %% tags=["experiment"]
DIM, HIDDEN, EXPERTS, LENGTH, BATCH, STEPS = 64, 64, 16, 64, 16, profile.pick(cpu=160, gpu=600)


def first_characters(documents: dict[str, str], count: int) -> str:
    """The documents in the order of their names, joined, up to `count` characters."""
    return "\n".join(documents[name] for name in sorted(documents))[:count]


splits = [
    data.split(documents)
    for documents in (data.deduplicate(data.documentation()), data.source_code())
]
training_texts = [first_characters(train, 300_000) for train, _ in splits]  # prose, then code
held_out_texts = [first_characters(held_out, 30_000) for _, held_out in splits]
small_tokenizer = Tokenizer.train(training_texts, vocab_size=512)
training_ids, held_out_ids = (
    [torch.tensor(small_tokenizer.encode(text)) for text in texts]
    for texts in (training_texts, held_out_texts)
)


class Dense(nn.Module):
    """The yardstick: one FFN for all tokens, with the interface of DeepSeekMoE."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.ffn = Expert(dim, hidden)

    def forward(self, x):
        return self.ffn(x), None, None


class Block(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.ffn = ffn

    def forward(self, x):
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, 4, -1))  # 4 heads
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        )
        y, logits, indices = self.ffn(self.norm_2(x))
        return x + y, logits, indices


class LanguageModel(nn.Module):
    """Tokens (batch, seq) → logits (batch, seq, 512), and each block's (router logits, indices)."""

    def __init__(self, make_ffn) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(512, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(Block(make_ffn()) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, 512, bias=False)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, tokens):
        x, routing = self.token(tokens) + self.position.weight[: tokens.shape[1]], []
        for block in self.blocks:
            x, logits, indices = block(x)
            routing.append((logits, indices))
        return self.head(self.norm(x)), routing


def windows(ids, count, generator):
    """Windows of LENGTH + 1 tokens, half of them prose, half code."""
    starts = [
        torch.randint(len(part) - LENGTH - 1, (count // 2,), generator=generator) for part in ids
    ]
    return torch.cat(
        [part[s[:, None] + torch.arange(LENGTH + 1)] for part, s in zip(ids, starts, strict=True)]
    ).to(profile.device)


def next_token_loss(logits, tokens):
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(how: str, seed: int = 0):
    """(model, loss at every step, load (steps, blocks, experts) as a multiple of the mean)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LanguageModel(
        lambda: (
            Dense(DIM, HIDDEN)
            if how == "dense"
            else DeepSeekMoE(DIM, HIDDEN, EXPERTS, 1, shared=0, renormalize=False)
        )
    ).to(profile.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    losses, loads = [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / STEPS)
        tokens = windows(training_ids, BATCH, generator)
        logits, routing = model(tokens[:, :-1])
        loss = total = next_token_loss(logits, tokens)
        if how == "auxiliary loss":
            total = loss + sum(
                load_balancing_loss(router_logits.softmax(-1), indices, alpha=0.01)
                for router_logits, indices in routing
            )
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if how != "dense":
            load = torch.stack(
                [torch.bincount(indices.flatten(), minlength=EXPERTS) for _, indices in routing]
            )
            loads.append(load.cpu() / load.float().mean().cpu())
            if how == "bias":
                for block, counted in zip(model.blocks, load, strict=True):
                    block.ffn.bias.copy_(update_bias(block.ffn.bias, counted, 0.003))
    return model.eval(), losses, torch.stack(loads) if loads else None


METHODS = ("nothing", "auxiliary loss", "bias")
threads = torch.get_num_threads()
torch.set_num_threads(1)  # many small products: a second thread costs more than it helps
runs = {how: train(how) for how in ("dense", *METHODS)}
torch.set_num_threads(threads)
examined = windows(held_out_ids, 256, torch.Generator().manual_seed(99))
with torch.no_grad():
    results = {how: model(examined[:, :-1]) for how, (model, _, _) in runs.items()}
held_out_loss = {
    how: float(next_token_loss(logits, examined)) for how, (logits, _) in results.items()
}


# %% tags=["experiment", "figure"]
# Figure: the losses of four runs, while training and on held-out text
def smooth(values: list[float], width: int = 15) -> Tensor:
    return torch.tensor(values).unfold(0, width, 1).mean(-1)


fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 3.8), gridspec_kw={"width_ratios": [1.5, 1]})
start = 40
plot.curves(
    range(start, STEPS - 14),
    {how: smooth(losses)[start:] for how, (_, losses, _) in runs.items()},
    xlabel="step",
    ylabel="training loss (nats per token)",
    title="loss",
    ax=axes[0],
)
axes[1].plot(list(held_out_loss.values()), range(4), "o", linestyle="none", color="black")
for i, value in enumerate(held_out_loss.values()):
    axes[1].annotate(
        f"{value:.3f}",
        (value, i),
        textcoords="offset points",
        xytext=(0, 7),
        ha="center",
        fontsize=9,
    )
axes[1].set_yticks(range(4), list(held_out_loss))
axes[1].set(xlabel="held-out loss (nats per token)", ylim=(3.5, -0.7))
axes[1].margins(x=0.15)
axes[1].set_title("after training")
plot.caption(
    fig,
    "Left: mean over 15 steps, the first 40 steps left out. Right: 256 windows of text that none "
    "of them has read. All four use the same number of parameters for a token (but for the "
    "router).",
)
plot.plt.show()
counts = runs["bias"][0].blocks[0].ffn.parameter_counts()
print(
    f"per MoE layer {counts[0]:,} parameters, {counts[1]:,} active; dense layer "
    f"{sum(p.numel() for p in runs['dense'][0].blocks[0].ffn.parameters()):,}"
)

# %% [markdown]
# Where did the tokens go? Each row is an expert, each column a moment of the training; dark means
# many tokens. Rows are sorted by the load at the end.

# %% tags=["experiment", "figure"]
# Figure: the load of each expert while training
fig, axes = plot.plt.subplots(2, 3, figsize=(13, 6.2), sharex=True)
columns = STEPS // 3  # narrow enough to be drawn without white lines
for column, how in enumerate(METHODS):
    load = (
        runs[how][2][: columns * 3].unflatten(0, (columns, 3)).mean(1)
    )  # (moments, blocks, experts)
    for row in range(2):
        ax, experts = axes[row, column], load[-8:, row].mean(0).argsort(descending=True)
        plot.heatmap(
            load[:, row, experts].T,
            xlabel="step" if row else "",
            ylabel="expert, busiest first" if column == 0 else "",
            title=f"{how}, layer {row + 1}",
            vmin=0,
            vmax=4,
            unit="load / mean",
            xticks=[3 * i if i % 10 == 0 else "" for i in range(columns)],
            yticks=[""] * EXPERTS,
            colorbar=column == 2,
            ax=ax,
        )
        ax.set_aspect("auto")
        ax.tick_params(axis="x", rotation=0)
end = {how: runs[how][2][-30:].mean(0) for how in METHODS}  # (blocks, experts)
plot.caption(
    fig,
    "Load of each expert, mean of 3 steps; the scale ends at 4 times the mean. At the end, in "
    "layer 2: "
    + "; ".join(
        f"{how}: busiest expert {float(end[how][1].max()):.1f} times the mean, "
        f"{int((end[how][1] < 0.1).sum())} of 16 below a tenth of it"
        for how in METHODS
    )
    + ".",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Without help the router of the second layer settles within some twenty steps on
# a few experts, one of which takes more than half of all tokens, and leaves ten of sixteen nearly
# without work for the rest of the training: the feedback of [](#balance). The auxiliary loss keeps
# nearly all experts at work and leaves a visible unevenness (how much depends on $\alpha$). The run
# with the bias collapses at first just the same: a step of 0.003 is small beside the scores, and
# the controller needs some fifty steps to lift the starved experts over the threshold. Then the
# load is nearly even, and stays so.
#
# And the loss? Three seeds of this run gave, held out, 4.34, 4.31, 4.35 for dense, 4.31, 4.24, 4.27
# with nothing, 4.25, 4.21, 4.27 with the auxiliary loss and 4.27, 4.21, 4.28 with the bias. Every
# MoE beats the dense model of the same active size on every seed, by 0.03 to 0.10 nats. Balance is
# worth 0.03 to 0.06 on two of the seeds; on the third the collapsed model is as good as the
# balanced ones. So a collapsed MoE is not a broken one; it is little more than a dense model with
# unused memory. What *cannot* be seen at this size is the claim of Wang et al. that the bias beats
# the auxiliary loss: by these figures the auxiliary loss is ahead by 0.00 to 0.02, on three seeds
# and with one setting of each, which settles nothing.
#
# ### What is dropped, if there is a limit
#
# The routing of the held-out text, through your `apply_capacity`.

# %% tags=["experiment", "figure"]
# Figure: dropped choices against the capacity factor
factors = [2 ** (i / 4) for i in range(-4, 17)]
dropped = {}
for how in METHODS:
    indices = results[how][1][1][1].cpu()  # layer 2: (tokens, 1)
    capacities = [math.ceil(factor * indices.numel() / EXPERTS) for factor in factors]
    dropped[how] = [
        100 * float((apply_capacity(indices, capacity) < 0).float().mean())
        for capacity in capacities
    ]
ax = plot.curves(
    factors,
    dropped,
    xlabel="capacity factor",
    ylabel="dropped choices (%)",
    logx=True,
    title="what a fixed room for each expert costs",
)
ax.axvline(1, color="#888888", linestyle=":", linewidth=1.2)
ax.set_xticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
at = factors.index(2**0.25)
plot.caption(
    ax.figure,
    f"Layer 2, {indices.numel():,} held-out tokens. At a factor of 1.19, "
    + ", ".join(f"{how}: {dropped[how][at]:.0f} % dropped" for how in METHODS)
    + ". The factor at which nothing is dropped is the load of the busiest expert over the mean, "
    "and the buffers are that much larger than the work.",
)
plot.plt.show()

# %% [markdown]
# ### What do experts specialize in?
#
# For the most frequent tokens of the held-out text: of all occurrences of a token, which share went
# to which expert?

# %% tags=["experiment", "figure"]
# Figure: which tokens go to which expert
tokens = examined[:, :-1].flatten().cpu()
frequent = torch.bincount(tokens, minlength=512).topk(34).indices
code = torch.arange(len(examined)) >= len(examined) // 2  # the second half of the windows is code
code = code.repeat_interleave(LENGTH)
shares = []  # for each layer: (512 tokens, experts), how often they met
for _, indices in results["bias"][1]:
    met = torch.zeros(512, EXPERTS)
    met.index_put_((tokens, indices[:, 0].cpu()), torch.ones(len(tokens)), accumulate=True)
    shares.append(met)
fig, axes = plot.plt.subplots(2, 1, figsize=(12.5, 9))
for layer, (ax, met) in enumerate(zip(axes, shares, strict=True)):
    table = met[frequent] / met[frequent].sum(1, keepdim=True)
    experts = table.T[:, table.max(1).values.argsort(descending=True)].argmax(1).argsort()
    columns = sorted(
        range(len(frequent)),
        key=lambda c, t=table[:, experts]: (int(t[c].argmax()), -float(t[c].max())),
    )
    names = [
        repr(small_tokenizer.decode([i]))[1:-1].replace(" ", "␣")
        for i in frequent[columns].tolist()
    ]
    plot.heatmap(
        table[columns][:, experts].T,
        xlabel="token",
        ylabel="expert",
        title=f"layer {layer + 1}",
        unit="share of the token's occurrences",
        vmin=0,
        vmax=1,
        xticks=names,
        yticks=experts.tolist(),
        ax=ax,
    )
purity = [float(met.max(1).values.sum() / met.sum()) for met in shares]
kind = [
    torch.stack(
        [torch.bincount(indices[:, 0].cpu()[code == c], minlength=EXPERTS) for c in (False, True)]
    ).float()
    for _, indices in results["bias"][1]
]
lean = [float(k.max(0).values.sum() / k.sum()) for k in kind]
plot.caption(
    fig,
    "The model balanced by bias. Each column sums to 1. Guessing a token's expert from the token "
    f"alone is right in {100 * purity[0]:.0f} % of the cases in layer 1 and {100 * purity[1]:.0f} "
    f"% in layer 2 (by chance: about {100 / EXPERTS:.0f} %). Guessing prose or code from the "
    f"expert is right in {100 * lean[0]:.0f} and {100 * lean[1]:.0f} % (by chance: 50 %).",
)
plot.plt.show()
for expert in range(EXPERTS):
    met = shares[1]
    often = (
        torch.where(met.sum(1) >= 8, met[:, expert] / met.sum(1).clamp(min=1), 0)
        .topk(7)
        .indices.tolist()
    )
    print(
        f"layer 2, expert {expert:2}: "
        + "  ".join(repr(small_tokenizer.decode([i]))[1:-1].replace(" ", "␣") for i in often)
    )

# %% [markdown]
# **Experts are specialists for tokens, not for subjects.** In the first layer the token alone
# nearly settles the choice: what the router sees there is the embedding, and the little that one
# layer of attention has added. In the second, context counts for more. Do not expect an expert for
# documentation and one for code: as far as an expert prefers one of them, it is mostly because it
# prefers tokens that are frequent there. The authors of Mixtral looked for experts by subject
# (mathematics, biology, philosophy) and found none to speak of; what they saw was syntax, such as
# the blanks that indent Python.
#
# ### Parameters held, parameters used
#
# The FFNs of published models, counted by your `parameter_counts` (on the meta device, where
# tensors have shapes and no memory). Attention and embeddings are left out.

# %% tags=["experiment", "figure"]
# Figure: parameters held and used by published models
# name: (layers with experts, dim, hidden, experts, k, shared), from the published configurations
PUBLISHED = {
    "Mixtral 8x7B": (32, 4096, 14336, 8, 2, 0),
    "Mixtral 8x22B": (56, 6144, 16384, 8, 2, 0),
    "Phi-3.5-MoE": (32, 4096, 6400, 16, 2, 0),
    "DeepSeekMoE 16B": (27, 2048, 1408, 64, 6, 2),
    "DeepSeek-V3": (58, 7168, 2048, 256, 8, 1),
    "Qwen3-30B-A3B": (48, 2048, 768, 128, 8, 0),
    "gpt-oss-120b": (36, 2880, 2880, 128, 4, 0),
}
DENSE = {"Llama-2-7B": (32, 4096, 11008), "Llama-3-70B": (80, 8192, 28672)}
LABELS = {"Mixtral 8x7B": (6, -11), "Phi-3.5-MoE": (-42, 7), "Qwen3-30B-A3B": (-30, 7)}  # points
fig, ax = plot.plt.subplots(figsize=(7.6, 4.8))
for name, (layers, *sizes) in PUBLISHED.items():
    with torch.device("meta"):
        total, active = (layers * n / 1e9 for n in DeepSeekMoE(*sizes).parameter_counts())
    ax.plot(active, total, "o", color=plot.COLORS[0], linestyle="none")
    ax.annotate(
        f"{name}: {sizes[3]} of {sizes[2]}{f' + {sizes[4]}' if sizes[4] else ''}",
        (active, total),
        textcoords="offset points",
        xytext=LABELS.get(name, (6, 4)),
        fontsize=8,
    )
for name, (layers, dim, hidden) in DENSE.items():
    held = layers * 3 * dim * hidden / 1e9
    ax.plot(held, held, "s", color="black", markerfacecolor="white", linestyle="none")
    ax.annotate(name, (held, held), textcoords="offset points", xytext=(6, -11), fontsize=8)
for ratio in (1, 4, 16, 64):
    ax.plot([0.7, 90], [0.7 * ratio, 90 * ratio], color="#999999", linestyle=":", linewidth=1)
    ax.annotate(
        "dense" if ratio == 1 else f"{ratio} ×",
        (0.75, 0.75 * ratio),
        textcoords="offset points",
        xytext=(0, 4),
        fontsize=8,
        color="#555555",
        rotation=27,
    )
ax.set(
    xscale="log",
    yscale="log",
    xlim=(0.7, 150),
    ylim=(0.7, 2000),
    xlabel="FFN parameters used for a token (billions)",
    ylabel="FFN parameters held (billions)",
)
ax.set_title("memory against arithmetic")
plot.caption(
    fig,
    "“8 of 256 + 1”: 8 routed experts of 256, and a shared one. Dotted lines: total over active. "
    "Mixtral held 4 times what it used, others of its time 8; finer experts have taken that to 16, "
    "28 and 32 times (Qwen3, DeepSeek-V3, gpt-oss).",
)
plot.plt.show()

# %% [markdown]
# ## Grouped GEMM: many products of uneven size in one launch
#
# `moe_forward` calls one product per expert. For DeepSeek-V3 that is 256 products for each of the
# three matrices, most of them small: a launch costs some microseconds, each product ends with a
# ragged tile, and while its last tiles run, most of the GPU waits. A **grouped GEMM** (general
# matrix multiply) does all of them in one launch:
#
# $$ \mathrm{out}[r] = W_e\, x[r] \quad\text{for the rows } r \text{ of group } e, \qquad x: (M, K),\; W: (E, N, K),\; \mathrm{out}: (M, N), $$
#
# where the rows of $x$ are sorted by expert and group $e$ has $m_e$ of them, $\sum_e m_e = M$. Each
# $W_e$ is stored as `nn.Linear` stores it, out × in.
#
# A program of a Triton kernel computes one tile of the output, BLOCK_M rows by BLOCK_N columns, by
# walking along $K$. The one new question: **which rows, and whose weights?** A tile must not
# straddle two groups, because one `tl.dot` uses one weight matrix. So each group is cut into its
# own tiles, $\lceil m_e/\mathrm{BLOCK\_M}\rceil$ of them, the last one partly empty; an empty group
# has none:
#
# ```
# sizes     5  0  9  3          BLOCK_M = 4
# tiles     2  0  3  1          6 in all, although 17 rows would fit into 5
# tile      0  1 | 2  3  4 | 5
# expert    0  0 | 2  2  2 | 3
# rows     0-3 4 | 5-8 9-12 13 | 14-16
# ```
#
# A program knows only its number. It finds the rest from the sizes, all in registers: with $c_e$
# the number of tiles in groups $0 \dots e$ (a cumulative sum),
#
# - its **expert** is the number of groups that end at or before it:
#   $\#\{e : c_e \le \text{tile}\}$. Empty groups are counted too, so none is needed as a special
#   case;
# - its **place** in the group is the tile number minus the tiles before the group;
# - its **first row** is the sum of the sizes before the group, plus place times BLOCK_M.
#
# Nobody asks the CPU anything: sizes are made on the GPU by the router and read there. But the
# launch must say how many programs there are. At most $\lfloor M/\mathrm{BLOCK\_M}\rfloor + E$
# tiles can be needed (why?), so that many are launched and the surplus return at once.
#
# The programs of one row tile lie next to each other, so that the rows of $x$ they share come from
# the cache, and a group's row tiles follow each other and share its weights.


# %% exercise="grouped_gemm" minutes=35 difficulty=3 path="more"
@triton.jit
def grouped_gemm_kernel(
    x_ptr, w_ptr, sizes_ptr, out_ptr, n_rows, n_groups, n_cols, n_inner, x_row, w_group, w_col,
    out_row, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out[r] = w[e] @ x[r] for the rows r of group e.

    x:     (n_rows, n_inner), rows sorted by group, x_row apart.
    w:     (n_groups, n_cols, n_inner), groups w_group apart, their rows w_col apart.
    out:   (n_rows, n_cols), rows out_row apart. Elements of a row lie side by side in all three,
           which share one dtype. Sums are in float32, and float32 factors are taken as they are,
           not as TF32 (`input_precision` of tl.dot). Each may hold more than 2³¹ elements.
    sizes: (n_groups,) int32, rows of each group, zeros allowed; rows of x beyond their sum belong
           to nobody, and their out is not written.

    Grid: (⌊n_rows / BLOCK_M⌋ + n_groups) · ⌈n_cols / BLOCK_N⌉ programs; program p computes columns
    tile p mod ⌈n_cols / BLOCK_N⌉ of row tile p // ⌈n_cols / BLOCK_N⌉. A row tile belongs to one
    group; an empty group has none. Programs without a row tile write nothing. Every element of a
    group's rows of out is written once, nothing outside the tensors is read. GROUPS: n_groups,
    rounded up to a power of two.
    """
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    lanes = tl.arange(0, GROUPS)
    sizes = tl.load(sizes_ptr + lanes, mask=lanes < n_groups, other=0)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Yours, from these sizes or by loads of your own: this tile's group; the group's size and its
    # first row in x; the row in the group at which this tile begins. A tile that no group needs
    # keeps the group n_groups.
    group, size, first, begin = n_groups, 0, 0, 0
    ### BEGIN SOLUTION
    tiles = tl.cdiv(sizes, BLOCK_M)
    # The number of groups whose tiles end at or before this one.
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = lanes < group
    size = tl.sum(tl.where(lanes == group, sizes, 0), 0)
    first = tl.sum(tl.where(before, sizes, 0), 0)
    begin = (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M
    ### END SOLUTION
    if group >= n_groups:  # a surplus program
        return
    within = begin + tl.arange(0, BLOCK_M)
    rows = (first + within).to(tl.int64)
    inside = (within < size)[:, None] & (cols < n_cols)[None, :]

    # Rows and columns beyond the edge read the last valid one, so that the loop needs no mask for
    # them; they are not stored.
    safe_rows, safe_cols = tl.minimum(rows, n_rows - 1), tl.minimum(cols, n_cols - 1)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + safe_rows[:, None] * x_row + inner[None, :]
    w_ptr += group.to(tl.int64) * w_group
    w_ptrs = w_ptr + safe_cols[None, :].to(tl.int64) * w_col + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Yours: the sum along K, BLOCK_K at a time.
    ### BEGIN SOLUTION
    full = n_inner // BLOCK_K * BLOCK_K
    for _ in range(0, full, BLOCK_K):  # whole blocks of K need no mask
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if full < n_inner:  # the rest of K: zeros beyond the edge add nothing
        x = tl.load(x_ptrs, mask=inner[None, :] < n_inner - full, other=0.0)
        w = tl.load(w_ptrs, mask=inner[:, None] < n_inner - full, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    ### END SOLUTION
    tl.store(
        out_ptr + rows[:, None] * out_row + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


# %% [markdown]
# <details><summary>Hint: sizes in registers</summary>
#
# `lanes = tl.arange(0, GROUPS)` with GROUPS the next power of two; load the sizes with a
# mask, 0 for lanes beyond the last group. `tl.cdiv`, `tl.cumsum(…, 0)` and
# `tl.sum(tl.where(…), 0)` do the rest.
# </details>
#
# <details><summary>Hint: one group, from a vector of sizes</summary>
#
# A sum over `tl.where(lanes == group, sizes, 0)` picks one number out of a vector; with
# `lanes < group` it adds up those before.
# </details>
#
# <details><summary>Hint: right for small K, wrong for large</summary>
#
# The pointers must move on by BLOCK_K in each round, and the columns beyond K count as 0 in both
# operands.
# </details>

# %% [markdown]
# The launcher is given. The autotuner measures a few tiles and keeps the fastest; float32, which
# has no tensor cores at full precision, and the interpreter get one small tile; and the checks give
# blocks of their own.

# %%
CONFIGS = tuple(
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (64, 256, 64, 4, 4),
        (128, 128, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (16, 128, 128, 4, 4),
    )
)


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    sizes: Tensor,
    blocks: tuple[int, int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out[r] = w[e] @ x[r] for the rows r of group e.

    x (rows, K) sorted by group, w (groups, N, K), sizes (groups,) → (rows, N).
    blocks: (BLOCK_M, BLOCK_N, BLOCK_K), powers of two from 16 up; None: the fastest of CONFIGS on a
        GPU, or (64, 64, 32) for float32; (64, 64, 64) in the interpreter.
    """
    x, w = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, w))
    (rows, inner), (groups, cols, _) = x.shape, w.shape
    out = torch.empty(rows, cols, dtype=x.dtype, device=x.device) if out is None else out
    if not rows:
        return out

    def grid(meta):
        return ((rows // meta["BLOCK_M"] + groups) * triton.cdiv(cols, meta["BLOCK_N"]),)

    strides = x.stride(0), w.stride(0), w.stride(1), out.stride(0)
    arguments = x, w, sizes.to(torch.int32), out, rows, groups, cols, inner, *strides
    padded = triton.next_power_of_2(groups)
    if blocks is None and not profile.interpret and x.dtype != torch.float32:
        tuned = autotuned(grouped_gemm_kernel, CONFIGS, ("n_groups", "n_cols", "n_inner"))
        tuned[grid](*arguments, GROUPS=padded)
    else:  # float32 has no tensor cores at full precision: small tiles
        m, n, k = blocks or ((64, 64, 64) if profile.interpret else (64, 64, 32))
        tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        grouped_gemm_kernel[grid(tile)](*arguments, GROUPS=padded, **tile)
    return out


# %% tags=["support"]
# Support: the grouped product in float64, and where a kernel reads and writes


def loop_over_groups(x: Tensor, w: Tensor, sizes) -> Tensor:
    """One product a group, in float64."""
    parts = x[: int(sum(sizes))].double().split(list(sizes))
    return torch.cat([part @ matrix.double().T for part, matrix in zip(parts, w, strict=True)])


@dataclass
class Touched:
    read: set  # addresses in bytes
    written: Counter  # and how often


@checks.measured
@contextmanager
def touched(only: Tensor | None = None):
    """What kernels read and write inside the block, in the interpreter; None on a GPU."""
    if not profile.interpret or not profile.has_triton:
        yield None
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen = Touched(set(), Counter())
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def allowed(ptrs, mask):
        if only is None:
            return mask
        begin = only.data_ptr()
        near = (ptrs.data >= begin) & (ptrs.data < begin + only.numel() * only.element_size())
        return TensorHandle(mask.data & near, mask.dtype)

    def noting_load(self, ptrs, mask, *rest):
        seen.read.update(ptrs.data[mask.data].tolist())
        return load(self, ptrs, allowed(ptrs, mask), *rest)

    def noting_store(self, ptrs, value, mask, *rest):
        seen.written.update(ptrs.data[mask.data].tolist())
        return store(self, ptrs, value, allowed(ptrs, mask), *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", noting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", noting_store),
    ):
        yield seen


@checks.measured
def far_apart(kernel, far: int):
    """What the kernel reads and writes, in bytes, and where x, w and out begin.

    Rows of x and out and the weights of a group lie `far` elements apart. Interpreter only: nothing
    but the sizes is really there.
    """
    x, w, out = (torch.zeros(1) for _ in range(3))
    sizes = torch.tensor([1, 0, 1, 2], dtype=torch.int32)
    with touched(only=sizes) as seen:
        kernel[(4,)](
            x, w, sizes, out, 4, 4, 3, 5, far, far, 5, far, GROUPS=4, BLOCK_M=16, BLOCK_N=16,
            BLOCK_K=16,
        )  # fmt: skip
    found = {a for a in seen.read if not sizes.data_ptr() <= a < sizes.data_ptr() + 16}
    return found, set(seen.written), [t.data_ptr() for t in (x, w, out)]


def addresses(start: int, rows, row: int, cols: int) -> set:
    """Bytes at which the float32 elements of these rows begin."""
    return {start + 4 * (r * row + c) for r in rows for c in range(cols)}


# %% check="grouped_gemm" points=2
# Four groups of 5, 0, 9 and 3 rows in tiles of 16: three tiles.
g = checks.generator(60)
sizes = [5, 0, 9, 3]
x, w = checks.randn(17, 16, generator=g), checks.randn(4, 16, 16, generator=g)
given = torch.tensor(sizes, device=x.device)
# What no program writes stays NaN.
with checks.launches() as launched, checks.guarded_allocations(), checks.compiled():
    out = grouped_gemm(x, w, given, blocks=(16, 16, 16))
assert launched.kernels["grouped_gemm_kernel"] == 1, (
    f"one launch for all groups is expected; {launched.count} were made"
)
checks.relative_l2(
    out,
    loop_over_groups(x, w, sizes),
    2e-6,
    what="the product of four groups",
    hint="Elements that no program wrote are NaN here.",
    mistakes={
        "using the first group's weights throughout": loop_over_groups(x, w[:1], [17]),
        "skipping the empty group's weights": loop_over_groups(x, w[[0, 1, 1, 2]], sizes),
        "the weights not transposed": loop_over_groups(x, w.mT, sizes),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(61)
for sizes, inner, cols, blocks in [
    ([16, 32, 16], 32, 32, (16, 16, 16)),
    ([1], 5, 3, (16, 16, 16)),
    ([0, 0, 20, 0, 7, 0], 40, 24, (16, 16, 32)),
    ([33, 1, 0, 15], 17, 50, (32, 16, 16)),
    ([2, 30, 17, 0, 0, 1, 4, 0, 9], 48, 20, (16, 32, 16)),
    ([0, 40], 16, 16, (16, 16, 16)),
    ([40, 0], 16, 33, (16, 16, 16)),
]:
    x, w = (
        checks.randn(sum(sizes), inner, generator=g),
        checks.randn(len(sizes), cols, inner, generator=g),
    )
    where = f"groups of {sizes} rows, K = {inner}, N = {cols}, blocks {blocks}."
    given = torch.tensor(sizes, device=x.device)
    with (
        checks.launches() as launched,
        checks.unchanged(x=x, w=w, sizes=given),
        checks.forbidden("mm", "matmul", "bmm", "linear", "einsum"),
        checks.guarded_allocations(),
    ):
        out = grouped_gemm(x, w, given, blocks=blocks)
    assert launched.kernels["grouped_gemm_kernel"] == 1, (
        "the kernel was not launched, or more than once"
    )
    checks.relative_l2(
        out.clone(), loop_over_groups(x, w, sizes), 2e-6, what="the grouped product", hint=where
    )
# Law: one group is an ordinary product; equal groups are a batched one.
x, w = checks.randn(48, 20, generator=g), checks.randn(3, 24, 20, generator=g)
checks.relative_l2(
    grouped_gemm(x, w[:1], torch.tensor([48], device=x.device), blocks=(16, 16, 16)),
    x.double() @ w[0].double().T,
    2e-6,
    what="one group",
)
checks.relative_l2(
    grouped_gemm(x, w, torch.tensor([16] * 3, device=x.device), blocks=(32, 32, 32)),
    torch.bmm(x.double().view(3, 16, 20), w.double().mT).flatten(0, 1),
    2e-6,
    what="three equal groups",
)
half = [t.half() for t in (x, w)]
out = grouped_gemm(*half, torch.tensor([7, 0, 41], device=x.device), blocks=(16, 16, 16))
assert out.dtype == torch.float16
checks.relative_l2(
    out, loop_over_groups(*half, [7, 0, 41]), 1e-3, what="the grouped product in float16"
)
deep = [checks.randn(*shape, generator=g).half() + 0.5 for shape in ((16, 1500), (1, 16, 1500))]
checks.relative_l2(
    grouped_gemm(*deep, torch.tensor([16], device=x.device), blocks=(16, 16, 64)),
    loop_over_groups(*deep, [16]),
    5e-4,
    what="a float16 product with K = 1500",
    hint="Sum in float32.",
)
# Two blocks of K whose products all but cancel, so that a rounding of each would be what is left.
a, rest = checks.randn(16, 64, generator=g), checks.randn(16, 64, generator=g, scale=0.05)
w = checks.randn(1, 16, 64, generator=g).half().repeat(1, 1, 2)
x = torch.cat([a, rest - a], dim=1).half()
checks.relative_l2(
    grouped_gemm(x, w, torch.tensor([16], device=x.device), blocks=(16, 16, 64)),
    loop_over_groups(x, w, [16]),
    1e-3,
    what="a float16 product of blocks that nearly cancel",
    hint="Each block's product stays float32 until all are added.",
)
### END HIDDEN TESTS

# %% check="grouped_gemm" points=2
# Nothing may be written outside a group's rows: those beyond the last group belong to nobody, and
# around the buffer lie canaries.
g = checks.generator(62)
x, w = checks.randn(12, 16, generator=g), checks.randn(2, 10, 16, generator=g)
out = checks.guarded(torch.zeros(12, 10, device=x.device), row_pad=6, what="out")
with checks.compiled():
    grouped_gemm(x, w, torch.tensor([4, 5], device=x.device), blocks=(16, 16, 16), out=out.tensor)
out.intact()
checks.relative_l2(
    out.tensor[:9].clone(),
    loop_over_groups(x, w, [4, 5]),
    2e-6,
    what="out in a padded buffer",
    hint="Its rows are out_row apart.",
)
assert not bool(out.tensor[9:].any()), (
    "rows 9 to 11 belong to no group, and were written: is the store masked at the end of the "
    "group?"
)
### BEGIN HIDDEN TESTS
for sizes, inner, cols, blocks in [
    ([3, 0, 18, 1], 9, 21, (16, 16, 16)),
    ([1, 1, 1], 20, 16, (32, 16, 16)),
    ([0, 7], 33, 5, (16, 32, 16)),
]:
    rows = sum(sizes)
    x = checks.guarded(checks.randn(rows, inner, generator=g), row_pad=7, what="x")
    w = checks.guarded(checks.randn(len(sizes), cols, inner, generator=g), row_pad=3, what="w")
    out = checks.guarded(torch.zeros(rows, cols, device=profile.device), row_pad=11, what="out")
    with touched() as seen:
        grouped_gemm(
            x.tensor,
            w.tensor,
            torch.tensor(sizes, device=profile.device),
            blocks=blocks,
            out=out.tensor,
        )
    for buffer in (x, w, out):
        buffer.intact()
    checks.relative_l2(
        out.tensor.clone(),
        loop_over_groups(x.tensor, w.tensor, sizes),
        2e-6,
        what=f"out for groups of {sizes} rows, everything in padded buffers",
        hint="Beyond a row's end lie NaN; x, w and out each have a row stride of their own.",
    )
    if seen is not None:
        expected = addresses(min(seen.written), range(rows), out.tensor.stride(0), cols)
        assert set(seen.written) == expected, "a program writes outside out"
        twice = sum(count > 1 for count in seen.written.values())
        assert not twice, (
            f"{twice} of {len(expected)} elements are written more than once (groups of {sizes} "
            f"rows): the rows beyond a group's end belong to the next group, "
            "whose program runs at the same time. Is the store masked at the end of the group?"
        )
### END HIDDEN TESTS

# %% check="grouped_gemm" points=1
# Many groups, few rows: surplus programs write nothing, and no program computes for an empty group.
g = checks.generator(63)
sizes = [0] * 40
sizes[3], sizes[17], sizes[39] = 2, 1, 3
x, w = checks.randn(6, 16, generator=g), checks.randn(40, 16, 16, generator=g)
with touched() as seen, checks.compiled():
    out = grouped_gemm(x, w, torch.tensor(sizes, device=x.device), blocks=(16, 16, 16))
checks.relative_l2(out, loop_over_groups(x, w, sizes), 2e-6, what="40 groups, 37 of them empty")
if seen is not None:
    needed = 3 * w[0].numel() + x.numel() + len(sizes)
    assert len(seen.read) <= needed, (
        f"{len(seen.read)} numbers are read; the weights of the three groups that have rows, "
        f"x and the sizes are {needed}"
    )
### BEGIN HIDDEN TESTS
if profile.interpret:
    # Rows of x and out and the weights of a group 2³⁰ elements apart, as in a model of hundreds of
    # billions of parameters; only the sizes are really there.
    far = 2**30
    found, written, (x, w, out) = far_apart(grouped_gemm_kernel, far)
    expected = addresses(x, range(4), far, 5)
    expected |= {
        w + 4 * (e * far + n * 5 + k) for e in (0, 2, 3) for n in range(3) for k in range(5)
    }
    assert written == addresses(out, range(4), far, 3), (
        "rows of out 2³⁰ elements apart: written in the wrong place. Is the row 64 bits wide "
        "before it is multiplied?"
    )
    assert found == expected, (
        "rows and weights 2³⁰ elements apart: read in the wrong place. Are the row and the group "
        "64 bits wide before they are multiplied?"
    )
else:
    sizes = [700, 0, 1, 3000, 128, 129]
    x, w = (
        checks.randn(sum(sizes), 520, generator=g, dtype=torch.bfloat16),
        checks.randn(6, 264, 520, generator=g, dtype=torch.bfloat16),
    )
    checks.relative_l2(
        grouped_gemm(x, w, torch.tensor(sizes, device=x.device)),
        loop_over_groups(x, w, sizes),
        5e-3,
        what="the grouped product in bfloat16, tuned",
    )
### END HIDDEN TESTS

# %% [markdown]
# With it, the routed part of an MoE layer takes three launches however many experts there are. Here
# on one of the trained models' layers, against your `moe_forward`.


# %% tags=["experiment"]
def moe_grouped(x: Tensor, weights: Tensor, indices: Tensor, experts: nn.ModuleList) -> Tensor:
    """moe_forward for gated FFNs of one size: one grouped product each for gate, up and down."""
    order = indices.reshape(-1).argsort(stable=True)
    sizes = torch.bincount(indices.reshape(-1), minlength=len(experts))
    gate, up, down = (
        torch.stack([getattr(expert, name).weight for expert in experts])
        for name in ("gate", "up", "down")
    )
    rows = x[order // indices.shape[1]]
    hidden = F.silu(grouped_gemm(rows, gate, sizes)) * grouped_gemm(rows, up, sizes)
    return torch.zeros_like(x).index_add(
        0,
        order // indices.shape[1],
        grouped_gemm(hidden, down, sizes) * weights.reshape(-1)[order, None],
    )


if profile.has_triton:
    layer = runs["nothing"][0].blocks[1].ffn  # trained without balance: uneven groups
    vectors = checks.randn(96, DIM, generator=checks.generator(70))
    with torch.no_grad():
        weights, indices = top_k_router(layer.router(vectors), 2)
        one_by_one = moe_forward(vectors, lambda tokens: (weights, indices), layer.experts)
        with checks.launches() as launched:
            at_once = moe_grouped(vectors, weights, indices, layer.experts)
    print(
        f"group sizes {torch.bincount(indices.flatten(), minlength=EXPERTS).tolist()}: "
        f"{launched.count} launches of {launched.programs} programs in all, "
        f"where a loop makes {3 * len(indices.unique())} products"
    )
    print(
        f"largest difference from moe_forward {float((at_once - one_by_one).abs().max()):.1e}, of "
        f"values up to {float(one_by_one.abs().max()):.2f}"
    )

# %% [markdown]
# ### On the hardware
#
# The size to measure at: the gate-and-up product of Qwen3-30B-A3B, 128 experts, $d = 2048$, two
# matrices of width 768 side by side ($N = 1536$), 8 experts a token, 32,768 tokens: $M = 262{,}144$
# rows.
#
# Is that product limited by arithmetic or by memory? It does $2MKN$ floating-point operations and
# moves, in bfloat16, $2(MK + MN)$ bytes of activations and $2 E_{used} KN$ bytes of weights, of
# those experts that are used. With $T$ tokens routed evenly at random, an expert stays unused with
# probability $(1 - k/E)^T$, so
#
# $$ E_{used} = E\,\bigl(1 - (1 - k/E)^T\bigr). $$
#
# This is the catch of MoE when *generating* text. One token reads 8 experts of 128, as promised.
# Sixty-four tokens of 64 users, each needing 8, read nearly all of them: four rows for each expert,
# and a matrix read from memory to multiply four vectors.

# %% tags=["experiment"]
PEAK, BANDWIDTH = 989e12, 4.8e12  # H200: dense bfloat16 FLOP/s, bytes/s, from its data sheet
GROUPS, TOP, INNER, WIDE = 128, 8, 2048, 1536


def intensity(tokens: int) -> float:
    """FLOP per byte of the grouped product for `tokens` tokens, routed evenly at random."""
    rows, used = tokens * TOP, GROUPS * (1 - (1 - TOP / GROUPS) ** tokens)
    return 2 * rows * INNER * WIDE / (2 * (rows * (INNER + WIDE) + used * INNER * WIDE))


def measure_grouped() -> dict[str, list[float]]:
    """{implementation: (median, low, high) in TFLOP/s}: 32,768 tokens, uneven groups, bfloat16."""
    generator = torch.Generator().manual_seed(11)
    popularity = torch.randn(GROUPS, generator=generator) * 0.5
    _, indices = top_k_router(torch.randn(32_768, GROUPS, generator=generator) + popularity, TOP)
    sizes = torch.bincount(indices.flatten(), minlength=GROUPS)
    x = torch.randn(int(sizes.sum()), INNER, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(GROUPS, WIDE, INNER, device="cuda", dtype=torch.bfloat16) / INNER**0.5
    ends, listed, sizes = (
        sizes.cumsum(0).to("cuda", torch.int32),
        sizes.tolist(),
        sizes.to("cuda", torch.int32),
    )
    whole = torch.empty(len(x), WIDE, device="cuda", dtype=torch.bfloat16)

    def loop():
        for part, matrix, target in zip(x.split(listed), w, whole.split(listed), strict=True):
            torch.mm(part, matrix.T, out=target)

    peers = {
        "yours": lambda: grouped_gemm(x, w, sizes),
        "loop of torch.mm": loop,
        "F.grouped_mm": lambda: F.grouped_mm(x, w.mT, offs=ends),
    }
    speed = {}
    for name, function in peers.items():
        median, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        speed[name] = [2 * len(x) * INNER * WIDE / ms / 1e9 for ms in (median, high, low)]
    return speed


# %% tags=["experiment", "figure"]
# Figure: your kernel beside its peers, or on a CPU the roofline's arithmetic
if profile.name == "gpu" and not profile.interpret:
    speed = measure_grouped()
    fig, ax = plot.plt.subplots(figsize=(6.5, 3.2))
    for i, (name, (median, low, high)) in enumerate(speed.items()):
        ax.bar(
            name, median, color=plot.COLORS[i], yerr=[[median - low], [high - median]], capsize=3
        )
        print(f"{name:18} {median:.0f} TFLOP/s")
    ax.set_ylabel("TFLOP/s")
    plot.caption(
        fig,
        f"{torch.cuda.get_device_name()}: 262,144 rows in 128 uneven groups, 2048 → 1536, "
        "bfloat16. Median, 20 and 80 % quantiles.",
    )
else:
    points = {
        f"{tokens:,} token{'s' if tokens > 1 else ''}": (intensity(tokens), None)
        for tokens in (1, 64, 1024, 32_768)
    }
    ax = plot.roofline(
        points,
        peak=PEAK,
        bandwidth=BANDWIDTH,
        title="a grouped product of 128 experts on an H200: arithmetic, no measurement",
    )
    rows = 32_768 * TOP
    plot.caption(
        ax.figure,
        "Hollow: the most that the arithmetic intensity allows. At 32,768 tokens "
        f"{2 * rows * INNER * WIDE / 1e12:.2f} TFLOP take "
        f"{2 * rows * INNER * WIDE / PEAK * 1e3:.1f} ms at the peak. At 64 tokens the "
        f"{GROUPS * (1 - (1 - TOP / GROUPS) ** 64):.0f} experts in use are "
        f"{2 * 125.9 * INNER * WIDE / 1e6:.0f} MB to read, "
        f"{2 * 125.9 * INNER * WIDE / BANDWIDTH * 1e6:.0f} µs, for work of "
        f"{2 * 64 * TOP * INNER * WIDE / PEAK * 1e6:.1f} µs.",
    )
plot.plt.show()

# %% [markdown]
# `benchmarks/11_ffn_and_moe.py` repeats this with the versions and errors on record. For a sense of
# scale: reading one expert's gate and up, 6.3 MB, takes 1.3 µs at full bandwidth, less than
# launching a kernel for it.
#
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number or a choice are
# graded.


# %% exercise="moe_numbers" minutes=12 difficulty=2 kind="questions"
def moe_numbers() -> dict[str, float | str]:
    """Four short answers; numbers to 1 percent.

    "unused":  Mixtral 8x7B: 32 layers, dim 4096, gated experts of width 14336, 8 of them per layer,
               2 per token. How many billions of expert parameters (routers left out) does a token
               NOT use?
    "uniform": 64 experts, k = 1, α = 1. The router is certain (probability 1) of its choice for
               every token, and the choices are spread evenly. The load-balancing loss?
    "decode":  Mixtral's 8 experts, 2 different ones per token. A server generates for 8 users at
               once, one token each, routed evenly at random and independently. How many of a
               layer's 8 experts must be read from memory, on average?
    "leak":    a decoder with an MoE layer; where there is a capacity, it is a fixed number. In
               which of these can a LATER token of the text change an earlier token's output?
               "a" top-2 routing without capacity; "b" top-1 routing with capacity, tokens served
               in their order; "c" top-2 routing with capacity, all first choices served before any
               second choice; "d" top-2 routing with a bias that is updated between batches.
    """
    ### BEGIN SOLUTION
    return {
        "unused": 32 * (8 - 2) * 3 * 4096 * 14336 / 1e9,
        "uniform": 1.0,
        "decode": 8 * (1 - (1 - 2 / 8) ** 8),
        "leak": "c",
    }
    ### END SOLUTION


# %% check="moe_numbers" points=1
answer = moe_numbers()["unused"]
checks.kind(answer, float, what="unused")
### BEGIN HIDDEN TESTS
matrices = [
    nn.Linear(4096, 14336, bias=False, device="meta"),
    nn.Linear(4096, 14336, bias=False, device="meta"),
    nn.Linear(14336, 4096, bias=False, device="meta"),
]
each = sum(p.numel() for m in matrices for p in m.parameters()) / 1e9
checks.number(
    answer,
    32 * 6 * each,
    what="unused",
    hint="Three matrices an expert; six experts of eight are left out, in each layer",
    mistakes={
        "two matrices an expert": 32 * 6 * each * 2 / 3,
        "counting those that are used": 32 * 2 * each,
        "counting all": 32 * 8 * each,
        "one layer": 6 * each,
    },
)
### END HIDDEN TESTS

# %% check="moe_numbers" points=1
answer = moe_numbers()["uniform"]
checks.kind(answer, float, what="uniform")
### BEGIN HIDDEN TESTS
even = torch.eye(64, dtype=torch.float64)
checks.number(
    answer,
    64 * float((even.mean(0) * even.mean(0)).sum()),
    what="uniform",
    hint="f and P are means over the batch: what are they here?",
    mistakes={"one expert for all": 64.0, "the missing factor N": 1 / 64},
)
### END HIDDEN TESTS

# %% check="moe_numbers" points=1
answer = moe_numbers()["decode"]
checks.kind(answer, float, what="decode")
### BEGIN HIDDEN TESTS
# By brute force: the distribution of the number of experts in use, token by token, over all pairs.
state = {frozenset(): 1.0}
pairs = list(itertools.combinations(range(8), 2))
for _ in range(8):
    after = Counter()
    for used, probability in state.items():
        for pair in pairs:
            after[used.union(pair)] += probability / len(pairs)
    state = after
exact = sum(len(used) * probability for used, probability in state.items())
checks.number(
    answer,
    exact,
    to=0.005,  # drawing with repetition is off by 1.9 percent
    what="decode",
    hint="An expert stays unread if each of the 8 tokens passes it by",
    mistakes={
        "two, as for one token": 2.0,
        "all of them": 8.0,
        "choosing one expert per token": 8 * (1 - (7 / 8) ** 8),
        "drawing 16 times with repetition": 8 * (1 - (7 / 8) ** 16),
    },
)
### END HIDDEN TESTS

# %% check="moe_numbers" points=1
answer = moe_numbers()["leak"]
assert answer in ("a", "b", "c", "d"), f"leak: one of 'a' to 'd'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert str(answer) == "c", (
    "leak: ask for each, whose decision must be known before token t is finished? Only its own (a, "
    "and d, whose bias is fixed during a batch), those of earlier tokens (b), or those of later "
    "ones too?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** A router with $k = 1$ multiplies the expert's result by the gate value. A
# colleague finds that the gate values are near 0.1, "which wastes nine tenths of the expert", and
# renormalizes them to 1. What happens to training?

# %% [markdown] answer="renormalize-one"
# The gate value becomes the constant 1, so the gradient of the loss in the router's logits is
# exactly zero: the only path from the task to the router ran through that factor. The router keeps
# its initial weights (or follows the auxiliary loss alone, which knows nothing of language), so
# tokens are assigned by a random, fixed rule. Experts still learn, and the loss falls, so nothing
# looks broken. The expert was not wasting anything either: its last matrix learns to be ten times
# larger. With $k \ge 2$ renormalizing is harmless, because the ratio of the gate values still
# carries a gradient.

# %% [markdown]
# **Open question 2.** Sigmoid scores with a selection bias, as in DeepSeek-V3, and softmax scores
# with an auxiliary loss both balance the load. Where does each of them disturb the language
# modeling, and how would you measure it?

# %% [markdown] answer="bias-or-loss"
# The auxiliary loss adds a gradient to the router's weights and, through its input, to everything
# below: with large α the router sends tokens where there is room rather than where they are served
# best, and features that the router reads are bent. The bias has no gradient; its harm is in the
# forward pass: a token on the margin goes to an expert whose score is not the largest. Its gate
# value says so, being computed without the bias. The bias also reacts late (it follows the last
# batch) and swings by its rate. To measure: several α and several rates, several seeds each, and
# draw held-out loss against the remaining imbalance (busiest expert over mean). A method is better
# if its curve lies below the other's; comparing one α with one rate says little.

# %% [markdown]
# **Open question 3.** Why does nobody simply make the softmax soft and let every token use all
# experts with small weights?

# %% [markdown] answer="why-sparse"
# Because it would cost what a dense FFN of the total size costs: every expert's weights multiply
# every token. The whole gain is that the other experts are *not computed*. (Soft mixtures exist:
# Soft MoE gives each expert a weighted average of tokens instead, which keeps the cost, but an
# average over positions mixes the future into the past and does not suit a decoder.)

# %% [markdown]
# ## References, and what to read in them
#
# - **Shazeer et al. 2017**, *Outrageously Large Neural Networks*,
#   [arXiv:1701.06538](https://arxiv.org/abs/1701.06538). Section 2: noisy top-k gating; section 4
#   and appendix A: the feedback that starves experts, and the first balance losses.
# - **Lepikhin et al. 2020**, *GShard*, [arXiv:2006.16668](https://arxiv.org/abs/2006.16668).
#   Algorithm 1: capacity, and first choices before second ones.
# - **Fedus, Zoph and Shazeer 2021**, *Switch Transformers*,
#   [arXiv:2101.03961](https://arxiv.org/abs/2101.03961). Section 2.2: capacity factor and the loss
#   of equations (4) to (6).
# - **Zoph et al. 2022**, *ST-MoE*, [arXiv:2202.08906](https://arxiv.org/abs/2202.08906). Section 3:
#   the router z-loss; section 7: what experts specialize in.
# - **Jiang et al. 2024**, *Mixtral of Experts*,
#   [arXiv:2401.04088](https://arxiv.org/abs/2401.04088). Section 5: specialists for syntax, not for
#   subjects.
# - **Dai et al. 2024**, *DeepSeekMoE*, [arXiv:2401.06066](https://arxiv.org/abs/2401.06066).
#   Section 3: fine-grained and shared experts, with the counting of combinations.
# - **Wang et al. 2024**, *Auxiliary-Loss-Free Load Balancing*,
#   [arXiv:2408.15664](https://arxiv.org/abs/2408.15664). Algorithm 1 is `update_bias`; the paper
#   also explains how routing in which experts choose their tokens leaks the future. **DeepSeek-AI
#   2024**, *DeepSeek-V3*, [arXiv:2412.19437](https://arxiv.org/abs/2412.19437), section 2.1.2, uses
#   it at full size with groups.
# - **Geva et al. 2021**, *Transformer Feed-Forward Layers Are Key-Value Memories*,
#   [arXiv:2012.14913](https://arxiv.org/abs/2012.14913). Sections 2 and 3: keys as patterns.
#   **Shazeer 2020**, *GLU Variants Improve Transformer*,
#   [arXiv:2002.05202](https://arxiv.org/abs/2002.05202), is lesson 03's.
# - **Gale et al. 2022**, *MegaBlocks*, [arXiv:2211.15841](https://arxiv.org/abs/2211.15841).
#   Section 4: dropless MoE as products of uneven blocks.
#
# In production: Hugging Face transformers, `models/mixtral/modeling_mixtral.py` and
# `models/deepseek_v3/modeling_deepseek_v3.py`; PyTorch's `torch.nn.functional.grouped_mm`; vLLM's
# `fused_moe` (a Triton kernel with a table of tiles in place of your search); expert parallelism,
# with the experts of a layer on many machines, is lesson 20.
