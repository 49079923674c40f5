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
#       Five ways to tell a model where a token stands, rotary positions with a cache, one GPU
#       kernel that turns queries and keys, and a race between the five beyond the length they were
#       trained on.
#     gpu: >-
#       The rotary kernel runs in Triton's interpreter on a CPU; on a GPU its bandwidth is measured
#       against eager PyTorch and torch.compile.
# ---

# %% [markdown]
# ## The problem
#
# *The dog bit the man. The man bit the dog.* Five words, the same five, and two different stories.
# What tells them apart is order, and the part of a Transformer that relates words to one another is
# blind to it.
#
# That part is **attention**, the subject of the next lesson. All that this one needs: every token
# $i$ has a **query** $q_i$, a **key** $k_i$ and a **value** $v_i$, three vectors of width $d$
# computed from the token alone. Token $i$ gives token $j$ the **score**
#
# $$ s_{ij} = \frac{q_i \cdot k_j}{\sqrt d}, $$
#
# turns its scores into weights that sum to 1 with a softmax over $j$, and receives the weighted
# mean of the values. In a **causal** model it sees only $j \le i$. Now shuffle the tokens that it
# sees: the same scores appear in another order, the same mean comes out. A mean does not know who
# came first. **Attention treats what it sees as a set.**
#
# So position has to be put in, and there are three places to put it.
#
# | where | how | who does it |
# |---|---|---|
# | into the token's vector | add a vector that belongs to position $p$ | sinusoidal (2017), learned tables (BERT, GPT-2) |
# | into the score | add a number, or a product, that depends on the distance $i - j$ | T5, ALiBi, DeBERTa |
# | into queries and keys | turn them by an angle proportional to the position | **RoPE**: LLaMA, Qwen, Mistral, DeepSeek and most others today |
#
# You will build all of them, write the last one as a GPU kernel, and then ask the question that
# separates them: **trained on texts of length $L$, what does the model do at $4L$?**
#
# ### Shapes used throughout
#
# | symbol | meaning | in code |
# |---|---|---|
# | $B$, $S$ | sequences in the batch, tokens in each | `batch`, `seq` |
# | $H$, $H_k$ | heads of queries; heads of keys (often fewer: several query heads share one) | `heads`, `k_heads` |
# | $d$ | width of what is spoken of: a token vector, or one head's query or key | `dim`, `head_dim` |
# | $p$, $m$, $n$ | positions, counted from 0 | |
# | $\omega_i$ | the angle, in radians a token, at which pair $i$ of features turns | `frequency` |

# %%
import math

import torch
import torch.nn.functional as F
from llm40 import checks, profile
from torch import Tensor, nn

if profile.has_triton:
    import triton
    import triton.language as tl
else:

    class WithoutTriton:
        """macOS and Windows: kernels can be defined, and whatever would launch one says what is
        missing.
        """

        constexpr = int

        def jit(self, kernel):
            return kernel

        def __getattr__(self, name):
            raise RuntimeError(
                "Triton exists for Linux only: do this exercise on Linux, in WSL2 or on a GPU "
                "machine. The other exercises of this lesson work here."
            )

    triton = tl = WithoutTriton()

# %% [markdown]
# ## From token to vector
#
# The tokenizer (lesson 07) hands over integers. Token 4711 is not "more" than token 4710, so the
# number itself is useless; each token gets a row of a matrix $E$ of shape $(V, d)$, and the row is
# learned. Looking up row $t$ is the product of a one-hot vector with $E$, without the
# multiplications.
#
# At the other end the model has a vector $x$ of width $d$ and must score all $V$ tokens. The
# natural score of token $t$ is how well $x$ points along its vector: $x\cdot E_t$, for all tokens
# at once $xE^\top$. Using the same matrix at both ends is called **tying** (Press and Wolf 2016).
# It saves $V\cdot d$ parameters (39 of 163 million in GPT-2 small), and what is learned about a
# token as an output serves it as an input.
#
# Tying raises a question of scale, and its answer is the $\sqrt d$ of the 2017 paper.
#
# - **As output.** Let $x$ have components of variance 1, as after a normalization. Then
#   $x\cdot E_t$ is a sum of $d$ terms and has variance $d\cdot\operatorname{Var}[E_{tc}]$. For
#   logits of variance 1 the entries of $E$ must have variance $1/d$.
# - **As input.** Then a row of $E$ has length about 1 whatever $d$ is: its $d$ components are of
#   size $1/\sqrt d$. The position's vector that is about to be added has components of size about
#   0.7. At $d = 512$ the token would be 16 times fainter than its address.
#
# Multiply the input by $\sqrt d$, and both are of size 1.
#
# ### Exercise · A tied embedding


# %% exercise="tied_embedding" minutes=10 difficulty=1
class TiedEmbedding(nn.Module):
    """One matrix that turns tokens into vectors at the input and vectors into token scores at the
    output.

    Its only parameter is `weight`, (vocab_size, dim), drawn from a normal distribution of mean 0
    and variance 1 / dim.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
        ### END SOLUTION

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers of any shape (…) → (…, dim): each token's row of the matrix, times √dim, in
        the dtype of weight."""
        ### BEGIN SOLUTION
        return self.weight[ids] * math.sqrt(self.weight.shape[1])
        ### END SOLUTION

    def logits(self, x: Tensor) -> Tensor:
        """x: (…, dim) → (…, vocab_size): the dot product of x with each token's row, not scaled."""
        ### BEGIN SOLUTION
        return x @ self.weight.T
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a parameter</summary>
#
# <code>nn.Parameter(tensor)</code>, assigned to <code>self.weight</code>, is found by optimizers. A
# tensor indexed with a tensor of integers gives the rows, in the shape of the integers.
# </details>

# %% check="tied_embedding" points=1
embedding = TiedEmbedding(3, 4)
names = {name: tuple(p.shape) for name, p in embedding.named_parameters()}
assert names == {"weight": (3, 4)}, (
    f"the only parameter should be weight, of shape (3, 4); yours are {names}"
)
with torch.no_grad():
    embedding.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 2, 3, 4]]))
checks.close(
    embedding(torch.tensor([2, 0])),
    torch.tensor([[2.0, 4, 6, 8], [2, 0, 0, 0]]),
    what="the vectors of tokens 2 and 0",
    mistakes={
        "leaving out √dim": torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0]]),
        "multiplying by dim, not by its root": torch.tensor([[4.0, 8, 12, 16], [4, 0, 0, 0]]),
    },
)
checks.close(
    embedding.logits(torch.tensor([1.0, 1, 1, 1])),
    torch.tensor([1.0, 1, 10]),
    what="the logits of (1, 1, 1, 1)",
    mistakes={"scaling the logits by √dim as well": torch.tensor([2.0, 2, 20])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for vocab, dim, shape in [
    (7, 5, (2, 3)),
    (11, 1, (4,)),
    (5, 9, ()),
    (6, 3, (2, 1, 4)),
    (4, 6, (0,)),
]:
    embedding = TiedEmbedding(vocab, dim).double()
    ids = torch.randint(0, vocab, shape, generator=g)
    with checks.unchanged(ids=ids):
        checks.close(
            embedding(ids),
            F.embedding(ids, embedding.weight) * dim**0.5,
            what=f"the vectors of ids of shape {shape}",
            dtype=torch.float64,
        )
    x = torch.randn(*shape, dim, generator=g, dtype=torch.float64)
    with checks.kept(embedding):
        logits = embedding.logits(x)
    checks.close(
        logits,
        F.linear(x, embedding.weight),
        what=f"the logits of x of shape {tuple(x.shape)}",
        dtype=torch.float64,
    )
for dtype in (torch.float16, torch.bfloat16):
    embedding = TiedEmbedding(6, 5).to(dtype)
    for result in (
        embedding(torch.tensor([3, 1])),
        embedding.logits(torch.ones(2, 5, dtype=dtype)),
    ):
        assert result.dtype == dtype, f"a weight in {dtype} gives {result.dtype}: keep its format"
# Both uses teach the one matrix: its gradient is the sum of two, and a token that occurs twice
# counts twice.
embedding = TiedEmbedding(6, 3).double()
ids = torch.tensor([4, 1, 4, 0])
target = torch.randn(4, 6, generator=g, dtype=torch.float64)
(embedding.logits(embedding(ids).tanh()) * target).sum().backward()
weight = embedding.weight.detach().clone().requires_grad_()
one_hot = F.one_hot(ids, 6).double()
(((one_hot @ weight * 3**0.5).tanh() @ weight.T) * target).sum().backward()
checks.close(
    embedding.weight.grad, weight.grad, what="the gradient of weight through both of its uses"
)
### END HIDDEN TESTS

# %% check="tied_embedding" points=1
torch.manual_seed(checks.seed())
embedding = TiedEmbedding(1000, 64)
checks.drawn(
    embedding.weight.detach(),
    std=1 / 8,
    what="the entries of weight at dim 64, where their variance is 1/dim,",
)
### BEGIN HIDDEN TESTS
for vocab, dim in [(4000, 16), (500, 256)]:
    embedding = TiedEmbedding(vocab, dim)
    with torch.no_grad():
        scaled = embedding.weight.detach() * dim**0.5
        what = f"the entries of weight times √dim, at dim {dim}"
        checks.drawn(scaled, mean=0.0, std=1.0, what=what)
        # A normal distribution has 4.6 % of its entries beyond two deviations, a uniform one none.
        beyond = (scaled.abs() > 2).double()
        checks.drawn(
            beyond,
            mean=0.0455,
            what=f"the share of {what} beyond ±2",
            hint="The entries are drawn from a normal distribution",
            mistakes={"a uniform distribution of the same variance": 0.0},
        )
        # What the two scales are for: inputs and logits of variance 1.
        vectors = embedding(torch.arange(vocab))
        checks.drawn(vectors, std=1.0, what=f"the input vectors at dim {dim}")
### END HIDDEN TESTS

# %% [markdown]
# ## Into the vector: clocks {#clocks}
#
# Give every position $p$ a vector $\mathrm{PE}(p)$ of width $d$ and add it to the token's. Which
# vectors? Three wishes:
#
# 1. **bounded**: position 10,000 must not drown the token. This rules out the number $p$ itself;
# 2. **any length**: no table that ends;
# 3. **distance should be easy**: "the token 3 back" is what grammar is made of. A linear layer
#    should be able to turn the code of $p$ into that of $p + k$, with one matrix $M_k$ that serves
#    for every $p$: $\mathrm{PE}(p + k) = M_k\,\mathrm{PE}(p)$.
#
# The third wish nearly decides the matter. Shifting by $k$ and then by $l$ is shifting by $k + l$,
# so $M_k = M_1^k$: all of them are powers of one matrix. An eigenvalue of $M_1$ larger than 1 in
# size blows up with $k$, one smaller than 1 dies out, so that far positions all look alike; what is
# left are eigenvalues *on* the unit circle. For a real matrix they come in pairs $e^{\pm i\omega}$,
# and a pair acts on a plane as a **rotation by $\omega$**. In the right basis, then,
# $\mathrm{PE}(p)$ is a set of clock hands, each turning at its own speed:
#
# $$ \mathrm{PE}(p)_{2i} = \sin(p\,\omega_i), \qquad \mathrm{PE}(p)_{2i+1} = \cos(p\,\omega_i), \qquad \omega_i = 10000^{-2i/d}, \qquad i = 0 \dots \lceil d/2\rceil - 1 . $$
#
# The speeds are free. Vaswani et al. chose a geometric series, as the hands of a clock do (seconds,
# minutes, hours): $\omega_0 = 1$ turns once in $2\pi \approx 6.3$ tokens, the slowest once in
# almost $2\pi\cdot 10000 \approx 63{,}000$. Fast hands tell neighbors apart, slow ones tell the
# beginning of a book from its end.
#
# Two consequences for even $d$, by $\cos(a - b) = \cos a\cos b + \sin a\sin b$:
#
# $$ \mathrm{PE}(m)\cdot \mathrm{PE}(n) = \sum_i \cos\bigl((m - n)\,\omega_i\bigr), \qquad \lVert \mathrm{PE}(p)\rVert^2 = d/2 . $$
#
# Similarity of two addresses depends on their distance alone, and every address is equally long.
#
# **A matter of precision.** In float32 a number near $10^5$ is known to $0.004$. Multiply a
# position of that size by a rounded frequency and the angle is off by as much: half a percent of a
# radian. With bfloat16 it begins at a few hundred tokens, and long-context training has been caught
# by it (Wang et al. 2024). The angles here are computed in float64 and only the sines are rounded.
#
# ### Exercise · Sinusoids


# %% exercise="sinusoidal_encoding" minutes=15 difficulty=1
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    """The position vectors of Vaswani et al.: (length, dim), float32.

    Row p, column 2i is sin(p · ω_i), column 2i + 1 is cos(p · ω_i), with ω_i = 10000^(−2i / dim).
    Where dim is odd the last column is a sine without its cosine, and the exponent still divides by
    dim. Angles are computed in float64, so that row 100,000 is as exact as row 1.
    """
    ### BEGIN SOLUTION
    # one frequency for each pair: (⌈dim/2⌉,)
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    # side by side, pair after pair
    encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return encoding[:, :dim].float()  # an odd dim lacks the last cosine
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one frequency for two columns</summary>
#
# Columns 0 and 1 share $\omega_0$, columns 2 and 3 share $\omega_1$. <code>torch.arange(0, dim,
# 2)</code> is already $2i$.
# </details>
#
# <details><summary>Hint: interleaving</summary>
#
# Slices with a step can be assigned to: <code>table[:, 0::2] = …</code>. When dim is odd,
# <code>table[:, 1::2]</code> is one column narrower.
# </details>

# %% check="sinusoidal_encoding" points=2
table = sinusoidal_encoding(3, 4)  # frequencies 1 and 10000^(−2/4) = 0.01
expected = torch.tensor(
    [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
)
checks.close(
    table,
    expected,
    what="sinusoidal_encoding(3, 4)",
    dtype=torch.float32,
    mistakes={
        "the exponent i/dim for 2i/dim": torch.tensor(
            [[math.sin(p), math.cos(p), math.sin(p / 10), math.cos(p / 10)] for p in range(3)]
        ),
        "all sines first, then all cosines": expected[:, [0, 2, 1, 3]],
        "cosine before sine": expected[:, [1, 0, 3, 2]],
        "counting positions from 1": torch.tensor(
            [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(1, 4)]
        ),
    },
)
### BEGIN HIDDEN TESTS
for length, dim in [(1, 2), (7, 6), (40, 16), (5, 64), (300, 10), (0, 4)]:
    expected = torch.tensor(
        [
            [
                (math.cos if c % 2 else math.sin)(p / 10000 ** ((c - c % 2) / dim))
                for c in range(dim)
            ]
            for p in range(length)
        ],
        dtype=torch.float64,
    )
    checks.close(
        sinusoidal_encoding(length, dim),
        expected.reshape(length, dim),
        what=f"sinusoidal_encoding({length}, {dim})",
        dtype=torch.float32,
    )
# Law: shifting by k is one rotation, the same for every p.
for dim, k in [(8, 3), (20, 17)]:
    table = sinusoidal_encoding(60, dim).double()
    shift = torch.block_diag(
        *(
            torch.tensor(
                [[math.cos(k * w), math.sin(k * w)], [-math.sin(k * w), math.cos(k * w)]],
                dtype=torch.float64,
            )
            for w in (10000 ** (-2 * i / dim) for i in range(dim // 2))
        )
    )
    checks.close(
        table[k:],
        table[:-k] @ shift.T,
        rtol=1e-6,
        what=f"PE(p + {k}) against PE(p), rotated",
        hint="dim " + str(dim),
    )
    similar = table @ table.T
    checks.close(
        similar[1:, 1:],
        similar[:-1, :-1],
        rtol=1e-6,
        what="PE(m + 1)·PE(n + 1) against PE(m)·PE(n)",
    )
### END HIDDEN TESTS

# %% check="sinusoidal_encoding" points=1
table = sinusoidal_encoding(2, 3)
checks.close(
    table[1],
    torch.tensor([math.sin(1), math.cos(1), math.sin(10000 ** (-2 / 3))]),
    what="row 1 with dim 3",
    hint="An odd dim ends with a sine",
    mistakes={
        "dividing by dim + 1": torch.tensor([math.sin(1), math.cos(1), math.sin(0.01)]),
        "dividing by dim − 1": torch.tensor([math.sin(1), math.cos(1), math.sin(1e-4)]),
    },
)
### BEGIN HIDDEN TESTS
for length, dim in [(4, 1), (9, 5), (33, 7), (2, 63)]:
    expected = torch.tensor(
        [
            [
                (math.cos if c % 2 else math.sin)(p / 10000 ** ((c - c % 2) / dim))
                for c in range(dim)
            ]
            for p in range(length)
        ],
        dtype=torch.float64,
    )
    checks.close(
        sinusoidal_encoding(length, dim),
        expected,
        what=f"sinusoidal_encoding({length}, {dim})",
        dtype=torch.float32,
    )
### END HIDDEN TESTS

# %% check="sinusoidal_encoding" points=1
table = sinusoidal_encoding(100_001, 12)
exact = [f(100_000 * 10000 ** (-2 * i / 12)) for i in range(6) for f in (math.sin, math.cos)]
checks.close(
    table[100_000],
    torch.tensor(exact, dtype=torch.float64),
    what="row 100,000",
    hint="Compute the angles in float64: float32 does not hold them",
    dtype=torch.float32,
)
### BEGIN HIDDEN TESTS
table = sinusoidal_encoding(60_000, 9)
for p in (59_999, 48_611, 31_337):
    exact = [(math.cos if c % 2 else math.sin)(p / 10000 ** ((c - c % 2) / 9)) for c in range(9)]
    checks.close(
        table[p],
        torch.tensor(exact, dtype=torch.float64),
        what=f"row {p:,}",
        hint="Compute the angles in float64",
    )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: the addresses, and how alike two of them are
from llm40 import plot

plt = plot.plt
table = sinusoidal_encoding(128, 64)
fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.25, 1])
plot.heatmap(
    table.T,
    xlabel="position p",
    ylabel="column (even: sine, odd: cosine)",
    title="sinusoidal_encoding(128, 64)",
    unit="value",
    center=0,
    vmin=-1,
    vmax=1,
    ax=axes[0],
)
axes[0].set_aspect("auto")
for p, color, dash in (
    (20, plot.COLORS[0], "-"),
    (64, plot.COLORS[1], "--"),
    (100, plot.COLORS[2], "-."),
):
    axes[1].plot(plot.array(table @ table[p]), color=color, linestyle=dash, label=f"n = {p}")
axes[1].set(xlabel="position m", ylabel="PE(m) · PE(n)", ylim=(9, 37))
axes[1].set_title("similarity of two addresses")
axes[1].legend(loc="upper center", ncols=3)
plot.caption(
    fig,
    "Left: every pair of rows is a clock hand; the upper ones run fast, the lower ones have "
    "hardly moved after 128 tokens. Right: one curve, shifted. It peaks at 32 = d/2 where the "
    "addresses coincide, falls within a few tokens and wobbles on: similarity depends on the "
    "distance and on nothing else.",
)
plt.show()

# %% [markdown]
# **Learned tables.** BERT and GPT-2 throw the formula away and learn a matrix $(L, d)$, one row a
# position. It is as good within $L$, and beyond $L$ there is no row at all.
#
# **What adding does to a score.** With $x_i$ the token and $p_i$ its position's vector, and
# $W_Q, W_K$ the matrices that make queries and keys,
#
# $$ q_i\cdot k_j = (x_i + p_i)^\top W_Q^\top W_K (x_j + p_j) =
# \underbrace{x_i^\top A\, x_j}_{\text{content–content}} +
# \underbrace{x_i^\top A\, p_j}_{\text{content–position}} +
# \underbrace{p_i^\top A\, x_j}_{\text{position–content}} +
# \underbrace{p_i^\top A\, p_j}_{\text{position–position}}, \qquad A = W_Q^\top W_K . $$
#
# One matrix $A$ must serve four purposes, and what the model wanted, a function of $i - j$, it has
# to extract from absolute addresses. The relative methods begin here: keep the terms one wants and
# write $i - j$ into them directly.
#
# ## Into the score: distance
#
# ### T5: one number for each distance
#
# Shaw et al. (2018) gave each distance a learned vector. T5 (Raffel et al. 2019) reduces it to the
# least there can be, one learned **number** for each distance and head, added to the score:
# $s_{ij} = q_i\cdot k_j + b^{(h)}_{\text{bucket}(j - i)}$. (T5 also leaves out the $1/\sqrt d$, and
# puts it into the initialization.) No $p_i$ is added to anything.
#
# There are infinitely many distances and few of the far ones occur often. Whether a token is 1 or 2
# back matters; whether it is 101 or 102 back does not. So distances share **buckets**: the near
# ones have one each, the far ones share logarithmically larger ones, and everything beyond
# `max_distance` shares the last.
#
# Let $r = j - i$, key minus query. For a decoder only $r \le 0$ occurs; set $n = \max(-r, 0)$ and
# let $N$ = `buckets`. For an encoder, which looks both ways, each direction gets $N$ = `buckets`/2,
# with $n = \lvert r\rvert$, and buckets of keys *after* the query ($r > 0$) come after all the
# others. With $N_e = \lfloor N/2\rfloor$ exact buckets,
#
# $$ \text{bucket}(n) = \begin{cases} n & n < N_e \\ \min\Bigl(N - 1,\; N_e + \Bigl\lfloor (N - N_e)\,\dfrac{\ln(n / N_e)}{\ln(\text{max\_distance} / N_e)}\Bigr\rfloor\Bigr) & n \ge N_e \end{cases} $$
#
# Read the fraction as "how far along the way from $N_e$ to `max_distance`, on a logarithmic scale";
# it is 1 at `max_distance`, where the formula would give $N$, and the minimum brings it back.
#
# ### Exercise · T5's buckets


# %% exercise="t5_relative_bucket" minutes=20 difficulty=2
def t5_relative_bucket(rel: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each relative position, int64, in the shape of `rel`.

    rel: integers of any shape, key position − query position. Not changed.
    bidirectional: True for an encoder: keys after the query (rel > 0) use the upper half of the
    buckets, the others (rel = 0 among them) the lower half. False for a decoder: all buckets for
    rel ≤ 0; where rel > 0, bucket 0.
    buckets: how many there are, at least 2 for each direction (even, if bidirectional).
    max_distance: from here on all share the last bucket of their half. It is larger than the number
    of exact buckets: half of those of a direction, rounded down, hold one distance each; the others
    widen logarithmically. Both conditions are the caller's: nothing need be raised.
    """
    ### BEGIN SOLUTION
    first = torch.zeros_like(rel, dtype=torch.int64)
    if bidirectional:
        buckets //= 2
        first = (rel > 0) * buckets
        distance = rel.abs()
    else:
        distance = (-rel).clamp(min=0)
    exact = buckets // 2
    # The logarithm of 0 is taken nowhere: distances below `exact` go another way.
    way = torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact)
    far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance.long(), far)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two kinds of distance in one tensor</summary>
#
# Compute both the near and the far answer for every element, and let <code>torch.where</code>
# choose. The far formula must merely not fail for near distances: what is the logarithm of 0?
# </details>
#
# <details><summary>Hint: encoder and decoder</summary>
#
# Bring both to a distance ≥ 0 and a number of buckets for it. What remains is the same; the upper
# half is an offset added at the end.
# </details>

# %% check="t5_relative_bucket" points=2
rel = torch.tensor([2, 0, -1, -3, -4, -5, -6, -8, -11, -12, -16, -40])
# 8 buckets up to distance 16 for a decoder: 0 … 3 exact, then 4–5, 6–7, 8–11, and 12 and more (by
# the formula: the borders are 4 · 4^(j/4)).
checks.close(
    t5_relative_bucket(rel, False, 8, 16),
    torch.tensor([0, 0, 1, 3, 4, 4, 5, 6, 6, 7, 7, 7]),
    what="the buckets of a decoder",
    hint=f"for the relative positions {rel.tolist()}",
    mistakes={
        "taking rel as query − key": torch.tensor([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        "leaving out the minimum": torch.tensor([0, 0, 1, 3, 4, 4, 5, 6, 6, 7, 8, 10]),
    },
)


### BEGIN HIDDEN TESTS
def table(buckets, max_distance):
    """Bucket of each distance 0 … 512 for one direction, in whole numbers: n ≥ e·(m/e)^(j/w) is n^w
    · e^j ≥ m^j · e^w.
    """
    e, w = buckets // 2, buckets - buckets // 2
    return torch.tensor(
        [
            n if n < e else e + max(j for j in range(w) if n**w * e**j >= max_distance**j * e**w)
            for n in range(513)
        ]
    )


rel = torch.arange(-512, 513)
for buckets, max_distance in [(32, 128), (16, 100), (7, 50), (2, 10), (3, 2), (8, 5), (20, 300)]:
    down = table(buckets, max_distance)
    expected = torch.where(rel > 0, 0, down[rel.abs()])
    hint = f"{buckets} buckets up to distance {max_distance}"
    with checks.unchanged(rel=rel):
        got = t5_relative_bucket(rel, False, buckets, max_distance)
    checks.close(
        got,
        expected,
        what="the buckets of a decoder for rel = −512 … 512",
        hint=hint,
        dtype=torch.int64,
        mistakes={"taking rel as query − key": expected.flip(0)},
    )
square = torch.arange(5)[None, :] - torch.arange(9)[:, None]  # (queries, keys), as a model needs it
checks.close(
    t5_relative_bucket(square, False, 8, 20),
    table(8, 20)[(-square).clamp(min=0)],
    what="the buckets of a (9, 5) matrix",
)
checks.close(
    t5_relative_bucket(square.int(), False, 8, 20),
    table(8, 20)[(-square).clamp(min=0)],
    what="the buckets of int32 positions",
    dtype=torch.int64,
)
### END HIDDEN TESTS

# %% check="t5_relative_bucket" points=2
rel = torch.tensor([-20, -2, -1, 0, 1, 2, 20])
checks.close(
    t5_relative_bucket(rel, True, 8, 16),
    torch.tensor([3, 2, 1, 0, 5, 6, 7]),
    what="the buckets of an encoder",
    hint=f"for the relative positions {rel.tolist()}, 8 buckets: 4 for each direction",
    mistakes={
        "swapping the two halves": torch.tensor([7, 6, 5, 0, 1, 2, 3]),
        "putting rel = 0 into the upper half": torch.tensor([3, 2, 1, 4, 5, 6, 7]),
        "using all buckets for each direction": torch.tensor([7, 2, 1, 0, 9, 10, 15]),
    },
)


### BEGIN HIDDEN TESTS
def table(buckets, max_distance):
    """Bucket of each distance 0 … 512 for one direction, in whole numbers: n ≥ e·(m/e)^(j/w) is n^w
    · e^j ≥ m^j · e^w.
    """
    e, w = buckets // 2, buckets - buckets // 2
    return torch.tensor(
        [
            n if n < e else e + max(j for j in range(w) if n**w * e**j >= max_distance**j * e**w)
            for n in range(513)
        ]
    )


rel = torch.arange(-512, 513)
for buckets, max_distance in [(32, 128), (16, 100), (12, 77), (4, 9), (6, 2), (64, 500)]:
    expected = table(buckets // 2, max_distance)[rel.abs()] + (rel > 0) * (buckets // 2)
    with checks.unchanged(rel=rel):
        got = t5_relative_bucket(rel, True, buckets, max_distance)
    checks.close(
        got,
        expected,
        what="the buckets of an encoder for rel = −512 … 512",
        hint=f"{buckets} buckets up to distance {max_distance}",
        dtype=torch.int64,
    )
    assert (
        int(t5_relative_bucket(torch.tensor([-(10**6), 10**6]), True, buckets, max_distance).max())
        == buckets - 1
    ), "a distance of a million belongs to the last bucket of its half"
# Law: the two directions are alike, half the buckets apart.
near = torch.arange(1, 400)
checks.close(
    t5_relative_bucket(near, True, 32, 128) - t5_relative_bucket(-near, True, 32, 128),
    torch.full_like(near, 16),
    what="bucket(r) − bucket(−r) for r > 0",
)
### END HIDDEN TESTS

# %% [markdown]
# ### ALiBi: no parameters at all
#
# **ALiBi** (Press et al. 2021) asks for less still: let the score fall linearly with the distance,
# $s_{ij} = q_i\cdot k_j/\sqrt d - m_h\,(i - j)$, each head $h$ with a fixed **slope** $m_h > 0$.
# After the softmax a distance of $n$ costs a factor $e^{-m_h n}$: a head with $m = \frac12$ has a
# window of a few tokens, one with $m = \frac1{256}$ of several hundred. Nothing is learned, and
# nothing about a distance of 5,000 is new to a model that was trained up to 500: the factor goes on
# falling. That is the whole argument for its title, *train short, test long*.
#
# The slopes are a geometric series. For $H$ a power of two: $m_h = 2^{-8h/H}$, $h = 1 \dots H$; for
# 8 heads $\frac12, \frac14, \dots, \frac1{256}$. For other $H$ the paper's code takes the slopes of
# the largest power of two below, $P$, and fills up from those of $2P$ heads, taking every other
# one, the first, the third and so on. The first of these is steeper than all others, the next ones
# lie half-way between them: for 12 heads $\frac12 \dots \frac1{256}$ and then $2^{-1/2}, 2^{-3/2},
# 2^{-5/2}, 2^{-7/2}$. Trained models depend on this order.
#
# ### Exercise · ALiBi


# %% exercise="alibi_bias" minutes=20 difficulty=2
def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head, (heads,), float32, all positive; any heads ≥ 1.

    With P the largest power of two ≤ heads: first the P slopes 2^(−8h / P), h = 1 … P; then as many
    as are missing from the slopes of 2P heads, in their order: the first, the third, the fifth …
    """
    ### BEGIN SOLUTION
    power = 1 << (heads.bit_length() - 1)
    own = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return torch.tensor(own + finer[: heads - power])
    ### END SOLUTION


def alibi_bias(heads: int, length: int) -> Tensor:
    """What is added to the scores of a causal model: (heads, length, length), float32; row = query
    i, column = key j.

    −slope · (i − j) where j ≤ i, and −∞ where j > i, so that it is the causal mask as well.
    """
    ### BEGIN SOLUTION
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    bias = -alibi_slopes(heads)[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the largest power of two</summary>
#
# <code>2 ** math.floor(math.log2(heads))</code>, or <code>heads.bit_length()</code>.
# </details>

# %% check="alibi_bias" points=2
checks.close(
    alibi_slopes(4),
    torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]),
    what="the slopes of 4 heads",
    dtype=torch.float32,
)
checks.close(
    alibi_slopes(3),
    torch.tensor([1 / 16, 1 / 256, 1 / 4]),
    what="the slopes of 3 heads",
    hint="2 heads have 1/16 and 1/256; of 4 heads' slopes (1/4, 1/16, 1/64, 1/256) take the first",
    mistakes={
        "using the formula for powers of two, 2^(−8h/3),": 2 ** (-8 * torch.arange(1.0, 4) / 3),
        "sorting them": torch.tensor([1 / 4, 1 / 16, 1 / 256]),
    },
)
### BEGIN HIDDEN TESTS
r = 2**-0.5
published = {
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    12: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, r, r / 2, r / 4, r / 8],
    16: [x for n in range(8) for x in (r / 2**n, 0.5 / 2**n)],
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
    5: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2],
}
for heads, slopes in published.items():
    expected = torch.tensor(slopes)
    checks.close(
        alibi_slopes(heads),
        expected,
        what=f"the slopes of {heads} heads",
        dtype=torch.float32,
        mistakes={
            "the formula for powers of two": 2 ** (-8 * torch.arange(1.0, heads + 1) / heads),
            "sorting them": expected.sort(descending=True).values,
        },
    )
for heads in (7, 20, 40, 112):  # BLOOM has 112
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,), f"alibi_slopes({heads}) has shape {tuple(slopes.shape)}"
    assert len(slopes[slopes > 0].unique()) == heads, (
        f"{heads} heads need {heads} different positive slopes"
    )
    power = 2 ** int(math.log2(heads))
    checks.close(
        slopes[:power], alibi_slopes(power), what=f"the first {power} slopes of {heads} heads"
    )
    checks.close(
        slopes[power:],
        alibi_slopes(2 * power)[0::2][: heads - power],
        what=f"the last {heads - power} slopes of {heads} heads",
    )
### END HIDDEN TESTS

# %% check="alibi_bias" points=2
bias = alibi_bias(2, 3)
inf = math.inf
expected = (
    torch.tensor([[[0, -inf, -inf], [-1, 0, -inf], [-2, -1, 0]]])
    * torch.tensor([1 / 16, 1 / 256])[:, None, None]
)
checks.close(
    bias,
    expected,
    what="alibi_bias(2, 3)",
    dtype=torch.float32,
    hint="Row i is a query, column j a key: a key further back is punished more",
    mistakes={
        "rewarding distance": torch.where(expected.isinf(), expected, -expected),
        "leaving the future visible": -torch.tensor([[0.0, -1, -2], [1, 0, -1], [2, 1, 0]])
        * torch.tensor([1 / 16, 1 / 256])[:, None, None],
        "rows and columns exchanged": expected.mT,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for heads, length in [(1, 1), (8, 5), (12, 33), (3, 17)]:
    bias = alibi_bias(heads, length)
    assert bias.shape == (heads, length, length), (
        f"alibi_bias({heads}, {length}) has shape {tuple(bias.shape)}"
    )
    # Law: softmax ignores what is added to a whole row, so +slope · j with a causal mask (as BLOOM
    # computes it) gives the same weights.
    scores = torch.randn(heads, length, length, generator=g, dtype=torch.float64)
    future = torch.ones(length, length).triu(1).bool()
    slopes = torch.tensor(
        [bias[h, 1, 0] if length > 1 else 0.0 for h in range(heads)], dtype=torch.float64
    ).abs()
    if length > 1:
        checks.close(
            slopes,
            alibi_slopes(heads).double(),
            rtol=1e-6,
            what="the bias of the previous token, per head",
        )
    expected = (
        (scores + slopes[:, None, None] * torch.arange(length))
        .masked_fill(future, -inf)
        .softmax(-1)
    )
    checks.close(
        (scores + bias.double()).softmax(-1),
        expected,
        rtol=1e-5,
        what=f"the weights with {heads} heads, {length} tokens",
        hint="They should be those of scores + slope · j under a causal mask",
    )
away = 699 - torch.arange(700.0)
checks.close(
    alibi_bias(2, 700)[:, -1],
    -torch.tensor([[1 / 16], [1 / 256]]) * away,
    what="the bias of the last of 700 tokens",
)
# Law: a longer bias continues a shorter one, and depends on the distance alone.
checks.close(
    alibi_bias(6, 20)[:, :9, :9],
    alibi_bias(6, 9),
    what="the first 9 rows and columns of alibi_bias(6, 20)",
)
checks.close(
    alibi_bias(6, 20)[:, 5:, 5:],
    alibi_bias(6, 15),
    what="alibi_bias(6, 20) without its first 5 rows and columns",
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: what T5 and ALiBi do with a distance
distance = torch.arange(0, 257)
fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
for name, bidirectional, color, dash in (
    ("decoder", False, plot.COLORS[0], "-"),
    ("encoder, keys before", True, plot.COLORS[1], "--"),
):
    axes[0].step(
        distance,
        t5_relative_bucket(-distance, bidirectional, 32, 128),
        where="post",
        color=color,
        linestyle=dash,
        label=name,
    )
axes[0].step(
    distance,
    t5_relative_bucket(distance, True, 32, 128),
    where="post",
    color=plot.COLORS[2],
    linestyle="-.",
    label="encoder, keys after",
)
axes[0].set(
    xlabel="distance (tokens)",
    ylabel="bucket",
    ylim=(-1, 33),
    xscale="symlog",
    xlim=(0, 256),
    xticks=[0, 1, 4, 16, 64, 256],
    xticklabels=[0, 1, 4, 16, 64, 256],
)
axes[0].set_title("T5: 32 buckets, max_distance 128")
axes[0].legend(fontsize=8)
shown = {h: alibi_bias(8, 257)[h, 256].flip(0) for h in (0, 2, 4, 7)}
for (h, bias), color, dash in zip(shown.items(), plot.COLORS, plot.DASHES, strict=False):
    axes[1].plot(
        distance,
        plot.array(bias.exp()),
        color=color,
        linestyle=dash,
        label=f"head {h + 1}: slope 1/{2 ** (h + 1)}",
    )
axes[1].set(xlabel="distance (tokens)", ylabel="factor on the weight, exp(bias)", ylim=(0, 1.05))
axes[1].set_title("ALiBi: 8 heads, 8 horizons")
axes[1].legend(fontsize=8)
for heads, color, marker, size in (
    (8, plot.COLORS[0], "o", 9),
    (12, plot.COLORS[1], "s", 5),
    (16, plot.COLORS[2], "x", 5),
):
    axes[2].plot(
        range(1, heads + 1),
        plot.array(alibi_slopes(heads)),
        marker,
        color=color,
        markersize=size,
        markerfacecolor="none",
        label=f"{heads} heads",
    )
axes[2].set_yscale("log", base=2)
axes[2].set(xlabel="head", ylabel="slope", xticks=[1, 4, 8, 12, 16])
axes[2].set_title("slopes, in the order of the heads")
axes[2].legend(fontsize=8)
plot.caption(
    fig,
    "Left: exact buckets near the token, then steps that are equally wide on a logarithmic axis; "
    "everything from about 100 on is one bucket. Middle: the weight that a key of equal content "
    "keeps. Head 1 sees a few tokens, head 8 hundreds. Right: 12 heads have the 8 slopes of 8 "
    "heads, and then four more: one above them, three between.",
)
plt.show()

# %% [markdown]
# ### DeBERTa: the cross terms
#
# T5 and ALiBi keep the content–content term and one number for position–position. DeBERTa (He et
# al. 2020) argues that the two in the middle are the interesting ones: *"deep" attends to the word
# right after it* is content to position, and *"learning" is attended to by the word right before
# it* is position to content. It writes both with learned vectors for **relative** positions, and
# drops position–position, which says nothing about the words.
#
# Relative positions run from $-k$ to $k - 1$, with everything beyond clipped; with $k$ = `span`
# there are $2k$ of them:
#
# $$ \delta(i, j) = \mathrm{clip}(i - j + k,\; 0,\; 2k - 1) . $$
#
# Let $Q^c, K^c$ $(S, d)$ be the queries and keys of the tokens and $Q^r, K^r$ $(2k, d)$ those of
# the relative positions, one row each, made by projections of their own. Then
#
# $$ s_{ij} = \frac{1}{\sqrt{3d}}\Bigl( \underbrace{Q^c_i\cdot K^c_j}_{c\to c} \;+\; \underbrace{Q^c_i\cdot K^r_{\delta(i,j)}}_{c\to p} \;+\; \underbrace{K^c_j\cdot Q^r_{\delta(j,i)}}_{p\to c} \Bigr) . $$
#
# Mind the last index. Whose vector it is decides whose position comes first: the query $i$ meets
# the relative position of $j$ as seen from $i$, which is $\delta(i, j)$; the key $j$ meets that of
# $i$ as seen **from $j$**, which is $\delta(j, i)$. The factor is $\sqrt{3d}$ because three
# independent sums of $d$ terms have three times the variance of one, and the standard deviation of
# the whole is $\sqrt{3d}$.
#
# This is the paper's convention and the one to follow here. The released code (Microsoft's, as its
# issue 162 notes, and Hugging Face's, as this course's conformance test shows) looks up $\delta(i,
# j)$ in the third term as well. A model that is trained either way learns its own rows (the two
# mirror each other, but for the clipped ends); whoever loads a checkpoint into the other convention
# finds out.
#
# Written naively the middle term gathers a $(S, S, d)$ tensor of vectors. Multiply first, gather
# afterwards: $Q^c {K^r}^\top$ is $(S, 2k)$, all that a token can ever ask of a relative position,
# and from each row one picks the entry for every $j$.
#
# ### Exercise · Disentangled scores


# %% exercise="disentangled_scores" minutes=30 difficulty=3 path="more"
def disentangled_scores(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """DeBERTa's scores before the softmax, (batch, heads, seq, seq): row = query i, column = key j.

    q, k: (batch, heads, seq, d), queries and keys of the tokens. pos_q, pos_k: (heads, 2·span, d),
    queries and keys of the relative positions; row r stands for a distance of r − span, and
    distances are clipped to 0 … 2·span − 1 as rows.

        score[i, j] = (q_i · k_j + q_i · pos_k[δ(i, j)] + k_j · pos_q[δ(j, i)]) / √(3d)
        δ(a, b) = clip(a − b + span, 0, 2·span − 1)

    Inputs are not changed, gradients flow to all four. No tensor with both two seq axes and a d
    axis is made: the largest has batch · heads · seq · max(seq, 2·span, d) elements.
    """
    ### BEGIN SOLUTION
    batch, heads, seq, d = q.shape
    span = pos_k.shape[1] // 2
    position = torch.arange(seq, device=q.device)
    # (seq, seq): δ(i, j)
    delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
    index = delta.expand(batch, heads, seq, seq)
    content = q @ k.mT
    # Row i: its products with all relative positions, one picked for each j.
    to_position = (q @ pos_k.mT).gather(-1, index)
    # The same for the keys: row j, entry δ(j, i) for each i. Transposed, it stands where it
    # belongs.
    from_position = (k @ pos_q.mT).gather(-1, index).mT
    return (content + to_position + from_position) / math.sqrt(3 * d)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: picking one entry per column</summary>
#
# <code>t.gather(-1, index)[…, i, j]</code> is <code>t[…, i, index[…, i, j]]</code>.
# <code>index</code> must have the leading axes of <code>t</code>; <code>expand</code> gives them
# without a copy.
# </details>
#
# <details><summary>Hint: the third term</summary>
#
# Do for the keys what you did for the queries. You then have a matrix whose row is a key $j$ and
# whose column is the other token, $i$. Which index matrix do rows $j$ and columns $i$ need, and
# what must be done at the end?
# </details>

# %% check="disentangled_scores" points=2
# Two tokens, d = 1, span 1: row 0 of pos_k and pos_q stands for a distance of −1 or less, row 1 for
# 0 or more.
q, k = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1), torch.tensor([3.0, 5.0]).view(1, 1, 2, 1)
pos_k, pos_q = (
    torch.tensor([10.0, 100.0]).view(1, 2, 1),
    torch.tensor([1000.0, 10000.0]).view(1, 2, 1),
)
cc, cp, pc = (
    torch.tensor([[3.0, 5], [6, 10]]),
    torch.tensor([[100.0, 10], [200, 200]]),
    torch.tensor([[30000.0, 50000], [3000, 50000]]),
)
checks.close(
    disentangled_scores(q, k, pos_q, pos_k)[0, 0] * 3**0.5,
    cc + cp + pc,
    what="√3 times the scores of two tokens",
    hint=f"content–content {cc.tolist()}, content–position {cp.tolist()}, position–content "
    f"{pc.tolist()}",
    mistakes={
        "dividing by √d, not by √(3d)": (cc + cp + pc) * 3**0.5,
        "dividing by 3√d": (cc + cp + pc) / 3**0.5,
        "δ(i, j) in the third term, where δ(j, i) belongs": cc
        + cp
        + torch.tensor([[30000.0, 5000], [30000, 50000]]),
        "pos_q and pos_k exchanged": cc
        + torch.tensor([[10000.0, 1000], [20000, 20000]])
        + torch.tensor([[300.0, 500], [30, 500]]),
        "δ(j, i) in the second term, where δ(i, j) belongs": cc
        + torch.tensor([[100.0, 100], [20, 200]])
        + pc,
        "leaving out position–content": cc + cp,
        "leaving out content–position": cc + pc,
    },
)


### BEGIN HIDDEN TESTS
def by_loops(q, k, pos_q, pos_k):
    """The definition, one score at a time, in float64; each of the three terms by itself."""
    q, k, pos_q, pos_k = (t.double() for t in (q, k, pos_q, pos_k))
    (batch, heads, seq, d), rows = q.shape, pos_k.shape[1]
    terms = torch.zeros(3, batch, heads, seq, seq, dtype=torch.float64)
    for i in range(seq):
        for j in range(seq):
            there, back = (min(max(n + rows // 2, 0), rows - 1) for n in (i - j, j - i))
            for t, (a, b) in enumerate(
                (
                    (q[:, :, i], k[:, :, j]),
                    (q[:, :, i], pos_k[:, there]),
                    (k[:, :, j], pos_q[:, back]),
                )
            ):
                terms[t, :, :, i, j] = (a * b).sum(-1)
    return terms / (3 * d) ** 0.5


g = checks.generator(5)
for batch, heads, seq, d, span in [
    (2, 3, 7, 5, 3),
    (1, 1, 1, 4, 2),
    (1, 2, 9, 1, 1),
    (2, 1, 4, 6, 8),
    (1, 4, 12, 3, 5),
]:
    q, k = (torch.randn(batch, heads, seq, d, generator=g) for _ in range(2))
    pos_q, pos_k = (torch.randn(heads, 2 * span, d, generator=g) for _ in range(2))
    with checks.unchanged(q=q, k=k, pos_q=pos_q, pos_k=pos_k):
        scores = disentangled_scores(q, k, pos_q, pos_k)
    terms = by_loops(q, k, pos_q, pos_k)
    checks.close(
        scores,
        terms.sum(0),
        what=f"the scores, batch {batch}, {heads} heads, {seq} tokens, d {d}, span {span}",
        dtype=torch.float32,
        atol=2e-6,  # three terms may cancel
        mistakes={
            "dividing by √d, not by √(3d)": terms.sum(0) * 3**0.5,
            "leaving out position–content": terms[0] + terms[1],
            "leaving out content–position": terms[0] + terms[2],
            "the third term with its rows and columns exchanged": terms[0] + terms[1] + terms[2].mT,
        },
    )
### END HIDDEN TESTS

# %% check="disentangled_scores" points=2
g = checks.generator(6)
q, k = (torch.randn(2, 2, 24, 32, generator=g) for _ in range(2))
pos_q, pos_k = (torch.randn(2, 16, 32, generator=g) for _ in range(2))
with checks.allocations() as made:
    disentangled_scores(q, k, pos_q, pos_k)
assert 0 < made.largest <= 2 * 2 * 24 * 32, (
    f"a tensor of {made.largest:,} elements is made; (batch, heads, seq, seq, d) would have "
    f"{2 * 2 * 24 * 24 * 32:,}. Multiply first, gather afterwards"
)
### BEGIN HIDDEN TESTS
q, k = (torch.randn(1, 3, 40, 8, generator=g) for _ in range(2))
pos_q, pos_k = (torch.randn(3, 6, 8, generator=g) for _ in range(2))
with checks.allocations() as made:
    disentangled_scores(q, k, pos_q, pos_k)
assert 0 < made.largest <= 3 * 40 * 40, (
    f"the largest tensor made has {made.largest:,} elements, more than the scores themselves "
    f"({3 * 40 * 40:,})"
)
# Gradients, against the same sums formed with one-hot matrices.
q, k = (torch.randn(2, 2, 5, 3, generator=g, dtype=torch.float64) for _ in range(2))
pos_q, pos_k = (torch.randn(2, 6, 3, generator=g, dtype=torch.float64) for _ in range(2))
place = torch.arange(5)
pick = F.one_hot((place[:, None] - place + 3).clamp(0, 5), 6).double()  # (i, j, row)


def dense(q, k, pos_q, pos_k):
    to = torch.einsum("bhid,hrd,ijr->bhij", q, pos_k, pick)
    back = torch.einsum("bhjd,hrd,jir->bhij", k, pos_q, pick)
    return (torch.einsum("bhid,bhjd->bhij", q, k) + to + back) / 3


checks.gradients(disentangled_scores, dense, q, k, pos_q, pos_k, names=("q", "k", "pos_q", "pos_k"))
# Law: without relative positions it is attention's score, at 1/√3 of its size.
zero = torch.zeros(2, 6, 3, dtype=torch.float64)
checks.close(
    disentangled_scores(q, k, zero, zero), q @ k.mT / 3, what="the scores where pos_q = pos_k = 0"
)
### END HIDDEN TESTS

# %% [markdown]
# ## Into queries and keys: rotation
#
# Can the score itself be made to depend on content and distance only, with no table and no extra
# term? Look for a map $f(x, p)$, applied to queries and keys alike, with
#
# $$ f(q, m)\cdot f(k, n) = g(q, k, m - n) \quad\text{for all } q, k, m, n. $$
#
# Let $f$ be linear in $x$: $f(x, p) = R_p\,x$ with a $(d, d)$ matrix for every position, and
# $R_0 = I$ (position 0 changes nothing). Then
#
# - at $m = n = p$ the score may not depend on $p$, so $(R_p q)\cdot(R_p k) = q\cdot k$ for all
#   $q, k$: **$R_p$ keeps lengths and angles; it is a rotation**;
# - in general $R_m^\top R_n$ depends on $n - m$ alone, and at $m = 0$ it is $R_n$. So
#   $R_m^\top R_n = R_{n - m}$, which gives $R_{m + n} = R_m R_n$ and hence **$R_p = R_1^p$: one
#   rotation, applied $p$ times.**
#
# Every rotation of $d$ dimensions ($d$ even, reflections left aside) is, in a suitable basis, $d/2$
# rotations of planes by angles $\omega_0, \dots, \omega_{d/2-1}$. The basis is no restriction,
# since $q = W_Q x$ and $k = W_K x$ come out of learned matrices that can take it in. What is left
# is this: **cut the $d$ features into pairs and turn pair $i$ by the angle $p\,\omega_i$.** That is
# rotary position embedding, **RoPE** (Su et al. 2021), and up to the choice of speeds it is the
# *only* linear answer. The speeds are those of [](#clocks), $\omega_i = \text{base}^{-2i/d}$ with
# base 10,000 (LLaMA-3 takes 500,000).
#
# A pair $(x_1, x_2)$ is a complex number $z = x_1 + \mathrm i x_2$, and turning by $\varphi$ is
# multiplication by $e^{\mathrm i\varphi}$:
#
# $$ x_1' = x_1\cos\varphi - x_2\sin\varphi, \qquad x_2' = x_2\cos\varphi + x_1\sin\varphi . $$
#
# With $z_q = |z_q|\,e^{\mathrm i\alpha}$ and $z_k = |z_k|\,e^{\mathrm i\beta}$, the dot product of
# two turned pairs is
# $\operatorname{Re}\bigl(z_q e^{\mathrm i m\omega}\;\overline{z_k e^{\mathrm i n\omega}}\bigr)$, so
# over all pairs
#
# $$ f(q, m)\cdot f(k, n) = \sum_{i=0}^{d/2-1} |z_{q,i}|\,|z_{k,i}|\,\cos\bigl(\alpha_i - \beta_i + (m - n)\,\omega_i\bigr). $$
#
# Everything can be read off this line. The absolute positions have canceled. A head that wants the
# previous token sets $\alpha_i - \beta_i = -\omega_i$ in the fast pairs, so that all cosines are 1
# at $m - n = 1$. A head that wants content, wherever it stands, uses the slow pairs, which hardly
# turn. And **values are not turned**: what is handed over does not depend on where it stood.
#
# ### Which features form a pair: two layouts
#
# | layout | pairs | used by |
# |---|---|---|
# | **interleaved** | $(x_0, x_1), (x_2, x_3), \dots$ | the paper, GPT-J, LLaMA's original code |
# | **half-split** | $(x_0, x_{d/2}), (x_1, x_{d/2+1}), \dots$ | GPT-NeoX, Hugging Face's LLaMA, most kernels |
#
# They are the same up to a permutation of the features, which $W_Q$ and $W_K$ absorb: neither is
# better in quality. But a checkpoint trained with one and run with the other produces fluent
# nonsense. Half-split is easier on hardware, since each half is a run of memory, and is what you
# write. Conversion comes after.
#
# **Partial rotation.** Nothing says that all features must turn. GPT-NeoX turns the first quarter
# of each head; the rest carries content only, without any position.
#
# ### Exercise · The table of angles


# %% exercise="rope_cache" minutes=10 difficulty=1
def rope_cache(length: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles p · ω_i for positions p = 0 … length − 1, each (length, dim/2),
    float32.

    ω_i = base^(−2i / dim), i = 0 … dim/2 − 1: one column for each pair of features. dim is even
    (else ValueError). Angles are computed in float64 and only their cosines and sines are rounded.
    """
    ### BEGIN SOLUTION
    if dim % 2:
        raise ValueError(f"{dim} features do not form pairs")
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: in which format</summary>
#
# `torch.arange` of integers gives int64, divided by a number it gives float32: ask for
# `dtype=torch.float64` where the numbers are made.
# </details>

# %% check="rope_cache" points=2
result = rope_cache(3, 4, base=100.0)  # frequencies 1 and 100^(−2/4) = 0.1
assert isinstance(result, tuple), (
    f"return a pair (cos, sin); yours is of type {type(result).__name__}"
)
angles = torch.tensor([[0.0, 0], [1, 0.1], [2, 0.2]], dtype=torch.float64)
for name, mine, f in zip(("cos", "sin"), result, (torch.cos, torch.sin), strict=True):
    checks.close(
        mine,
        f(angles),
        what=f"{name} of rope_cache(3, 4, base=100)",
        dtype=torch.float32,
        hint="One column for each pair",
        mistakes={
            "the exponent i/dim for 2i/dim": f(
                torch.tensor([[0.0, 0], [1, 10**-0.5], [2, 2 * 10**-0.5]])
            ),
            "counting positions from 1": f(angles + angles[1]),
            "frequencies that grow": f(torch.tensor([[0.0, 0], [1, 10], [2, 20]])),
        },
    )
### BEGIN HIDDEN TESTS
for length, dim, base in [
    (1, 2, 10_000.0),
    (7, 6, 10_000.0),
    (33, 64, 500_000.0),
    (5, 128, 10_000.0),
    (20, 10, 3.0),
    (0, 4, 10.0),
]:
    exact = torch.tensor(
        [[p * base ** (-2 * i / dim) for i in range(dim // 2)] for p in range(length)],
        dtype=torch.float64,
    ).reshape(length, dim // 2)
    for name, mine, f in zip(
        ("cos", "sin"), rope_cache(length, dim, base), (torch.cos, torch.sin), strict=True
    ):
        checks.close(
            mine,
            f(exact),
            what=f"{name} of rope_cache({length}, {dim}, {base:g})",
            dtype=torch.float32,
        )
checks.close(
    rope_cache(9, 8)[1],
    rope_cache(9, 8, 10_000.0)[1],
    what="rope_cache without a base against base 10,000",
)
for length, dim in [(100_001, 12), (60_000, 22)]:
    exact = torch.tensor(
        [(length - 1) * 10_000 ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64
    )
    for name, mine, f in zip(
        ("cos", "sin"), rope_cache(length, dim), (torch.cos, torch.sin), strict=True
    ):
        checks.close(
            mine[-1],
            f(exact),
            what=f"{name} at position {length - 1:,}",
            hint="Compute the angles in float64: float32 does not hold them",
        )
checks.raises(ValueError, rope_cache, 4, 5, because="5 features do not form pairs")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: how far each pair turns, in 12 tokens and in 200
cos, sin = rope_cache(200, 16)
fig = plt.figure(figsize=(11, 5.2))
grid = fig.add_gridspec(2, 4, height_ratios=[1, 0.85])
for column, pair in enumerate((0, 2, 4, 7)):
    ax = fig.add_subplot(grid[0, column])
    turn = torch.linspace(0, 2 * math.pi, 200)
    ax.plot(
        plot.array(turn.cos()), plot.array(turn.sin()), color="#bbbbbb", linestyle="-", linewidth=1
    )
    steps = 13
    ax.scatter(
        plot.array(cos[:steps, pair]),
        plot.array(sin[:steps, pair]),
        c=range(steps),
        cmap="Greys",
        edgecolor="black",
        linewidth=0.5,
        s=42,
        zorder=3,
    )
    ax.annotate("0", (1, 0), textcoords="offset points", xytext=(7, -3), fontsize=8)
    ax.annotate(
        str(steps - 1),
        (float(cos[steps - 1, pair]), float(sin[steps - 1, pair])),
        textcoords="offset points",
        xytext=(
            14 * float(cos[steps - 1, pair]) - 5,
            14 * float(sin[steps - 1, pair]) + (9 if pair > 2 else -3),
        ),
        fontsize=8,
    )
    period = 2 * math.pi * 10_000 ** (2 * pair / 16)
    ax.set(
        aspect="equal",
        xlim=(-1.35, 1.35),
        ylim=(-1.35, 1.35),
        xticks=[-1, 0, 1],
        yticks=[-1, 0, 1],
        xlabel="first feature",
    )
    ax.set_title(
        f"pair {pair}: a turn in {period:,.0f}" + (" tokens" if column == 0 else ""), fontsize=10
    )
    if column == 0:
        ax.set_ylabel("second feature")
ax = fig.add_subplot(grid[1, :])
for pair, color, dash in zip((0, 2, 4, 7), plot.COLORS, plot.DASHES, strict=False):
    ax.plot(
        plot.array(cos[:, pair]), color=color, linestyle=dash, label=f"pair {pair}", linewidth=1.4
    )
ax.set(xlabel="position p (tokens)", ylabel="first feature, cos(p·ω)")
ax.set_ylim(-1.1, 1.75)
ax.legend(ncols=4, loc="upper left")
plot.caption(
    fig,
    "Where the pair (1, 0) is turned to at positions 0 … 12 (dark is later), for a head of 16 "
    "features. Pair 0 has gone round almost twice, pair 2 a fifth of the way, pairs 4 and 7 have "
    "hardly left. Within 200 tokens the last two never complete a turn: angles that come only "
    "after a longer text are angles that a model trained on 200 tokens has never met.",
)
plt.show()

# %% [markdown]
# ### Exercise · Turning
#
# The positions are **absolute**. When text is generated one token at a time, the new query has
# position 1,000, not 0, although it is alone in its tensor: that is what `start` is for. Mixing
# this up costs nothing at training time and everything afterwards.


# %% exercise="apply_rope" minutes=20 difficulty=2
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
    """x with the pairs (x[i], x[i + r/2]) of its first r features turned by their position's angle:
    the half-split layout.

    x: (…, seq, head_dim), any leading axes and strides; its rows stand at positions start …
    start + seq − 1.
    cos, sin: (length, r/2) from rope_cache, r ≤ head_dim. Features from r on pass through
    unchanged, bit for bit. ValueError if start + seq > length: there are no angles for the last
    rows.
    Returns a new tensor in x's shape and dtype. float16 and bfloat16 are turned in float32 and
    rounded once; float64 stays float64. x is not changed, gradients flow to x.
    """
    ### BEGIN SOLUTION
    seq, half = x.shape[-2], cos.shape[1]
    if start + seq > cos.shape[0]:
        raise ValueError(
            f"positions {start} … {start + seq - 1} are asked for, but the table ends at "
            f"{cos.shape[0] - 1}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    # (seq, r/2): broadcasts to the left
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(wide), second.to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the sizes</summary>
#
# <code>cos</code> has r/2 columns. The first r/2 features of x are the first components of the
# pairs, the next r/2 the second ones. <code>(seq, r/2)</code> broadcasts against <code>(…, seq,
# r/2)</code> by itself.
# </details>
#
# <details><summary>Hint: a table that is too short</summary>
#
# A slice beyond the end of a tensor is shorter and raises nothing. A slice of one row even
# broadcasts, and every token gets the same angle.
# </details>

# %% check="apply_rope" points=2
# Angles picked by hand: position 0 does not turn, position 1 turns pair 0 by 90° and pair 1 by
# 180°.
cos, sin = torch.tensor([[1.0, 1], [0, -1]]), torch.tensor([[0.0, 0], [1, 0]])
x = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]])  # the pairs are (1, 3) and (2, 4)
checks.close(
    apply_rope(x, cos, sin),
    torch.tensor([[1.0, 2, 3, 4], [-3, -2, 1, -4]]),
    what="two rows of (1, 2, 3, 4)",
    hint="A quarter turn takes (1, 3) to (−3, 1)",
    mistakes={
        "the interleaved layout, pairs (1, 2) and (3, 4),": torch.tensor(
            [[1.0, 2, 3, 4], [-2, 1, -3, -4]]
        ),
        "turning the other way": torch.tensor([[1.0, 2, 3, 4], [3, -2, -1, -4]]),
        "adding where one subtracts, which changes lengths,": torch.tensor(
            [[1.0, 2, 3, 4], [3, -2, 1, -4]]
        ),
    },
)
checks.close(
    apply_rope(torch.tensor([[1.0, 2, 3, 4, 5, 6]]), cos, sin, start=1),
    torch.tensor([[-3.0, -2, 1, -4, 5, 6]]),
    what="one row at position 1 with two features more than the table turns",
    hint="start=1: the row stands at position 1. Features 4 and 5 pass through",
)


### BEGIN HIDDEN TESTS
def turned(x, cos, sin, start=0):
    """The same in complex numbers of float64."""
    half, seq = cos.shape[1], x.shape[-2]
    z = (
        torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
        * torch.complex(cos.double(), sin.double())[start : start + seq]
    )
    return torch.cat([z.real, z.imag, x[..., 2 * half :].double()], -1)


g = checks.generator(8)
for lead, seq, head_dim, rotary, start in [
    ((), 5, 8, 8, 0),
    ((2,), 1, 2, 2, 0),
    ((2, 3), 7, 16, 4, 0),
    ((1, 2), 4, 10, 6, 9),
    ((3, 1), 2, 6, 6, 38),
    ((2, 2), 3, 12, 2, 1),
]:
    cos, sin = rope_cache(40, rotary, 100.0)
    x = torch.randn(*lead, seq, head_dim, generator=g)
    with checks.unchanged(x=x, cos=cos, sin=sin):
        y = apply_rope(x, cos, sin, start)
    pairs = (
        torch.complex(x[..., :rotary:2].double(), x[..., 1:rotary:2].double())
        * torch.complex(cos, sin)[start : start + seq]
    )
    checks.close(
        y,
        turned(x, cos, sin, start),
        what=f"x {tuple(x.shape)} with {rotary} features turned, from position {start}",
        dtype=torch.float32,
        mistakes={
            "the interleaved layout": torch.cat(
                [torch.view_as_real(pairs).flatten(-2), x[..., rotary:].double()], -1
            ),
            "turning the other way": turned(x, cos, -sin, start),
            "counting positions from 0 whatever start is": turned(x, cos, sin),
            "leaving out start's row, one too far": turned(x, cos, sin, min(start + 1, 40 - seq)),
        },
    )
    assert torch.equal(y[..., rotary:], x[..., rotary:]), (
        f"features {rotary} … {head_dim - 1} should pass through unchanged, bit for bit"
    )
cos, sin = rope_cache(12, 6)
x = torch.randn(2, 9, 3, 6, generator=g).transpose(1, 2)  # a view, as a model makes it
checks.close(apply_rope(x, cos, sin), turned(x, cos, sin), what="x as a transposed view")
checks.raises(
    ValueError,
    apply_rope,
    torch.zeros(3, 4),
    *rope_cache(2, 4),
    because="The table has 2 positions, x has 3 rows",
)
checks.raises(
    ValueError,
    apply_rope,
    torch.zeros(2, 3, 4),
    *rope_cache(1, 4),
    because="The table has 1 position, x has 3 rows: it would broadcast",
)
checks.raises(
    ValueError,
    apply_rope,
    torch.zeros(2, 4),
    *rope_cache(8, 4),
    7,
    because="Positions 7 and 8 are asked for, and the table ends at 7",
)
### END HIDDEN TESTS

# %% check="apply_rope" points=2
# What it is for: the product of a query and a key depends on their distance, and lengths stay.
g = checks.generator(9)
cos, sin = rope_cache(50, 8, 100.0)
q, k = (torch.randn(8, generator=g, dtype=torch.float64).expand(50, 8) for _ in range(2))
q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)  # one query and one key, at every position
scores = q @ k.T
checks.close(scores[7:, 7:], scores[:-7, :-7], rtol=1e-5, what="q·k with both moved by 7 positions")
assert float((scores[0] - scores[0, 0]).abs().max()) > 1e-3, (
    "q·k is the same at every distance: nothing is turned"
)
### BEGIN HIDDEN TESTS
for head_dim, rotary, base in [(16, 16, 10_000.0), (12, 6, 500.0)]:
    cos, sin = rope_cache(300, rotary, base)
    cos, sin = cos.double(), sin.double()
    q, k = (torch.randn(3, 1, head_dim, generator=g, dtype=torch.float64) for _ in range(2))
    for m, n, shift in [(5, 0, 1), (0, 9, 120), (100, 100, 77), (40, 3, 250)]:
        here = (apply_rope(q, cos, sin, m) * apply_rope(k, cos, sin, n)).sum(-1)
        there = (apply_rope(q, cos, sin, m + shift) * apply_rope(k, cos, sin, n + shift)).sum(-1)
        limit = 1e-6 * float(q.norm() * k.norm())  # the table is float32, whatever the rest is
        checks.close(
            there, here, rtol=0, atol=limit, what=f"q·k at positions {m} and {n}, moved by {shift}"
        )
    x = torch.randn(2, 200, head_dim, generator=g, dtype=torch.float64)
    checks.close(
        apply_rope(x, cos, sin, 60).norm(dim=-1),
        x.norm(dim=-1),
        rtol=1e-6,
        what="the lengths after turning",
        dtype=torch.float64,
    )
    # The whole from a table is its parts, each with its start.
    parts = torch.cat(
        [apply_rope(x[:, a:b], cos, sin, a) for a, b in ((0, 1), (1, 64), (64, 200))], 1
    )
    checks.close(
        parts, apply_rope(x, cos, sin), what="three pieces with their starts, against the whole"
    )
### END HIDDEN TESTS

# %% check="apply_rope" points=1
cos, sin = rope_cache(9, 6, 50.0)
x = torch.randn(2, 9, 6, generator=checks.generator(10)).half()
y = apply_rope(x, cos, sin)
assert getattr(y, "dtype", None) == torch.float16, (
    f"float16 in, float16 out; yours is {getattr(y, 'dtype', None)}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
cos, sin = rope_cache(40, 64, 10_000.0)
for dtype, unit in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
    x = torch.randn(3, 40, 64, generator=g).to(dtype)
    z = torch.complex(*(h.double() for h in x.chunk(2, -1))) * torch.complex(
        cos.double(), sin.double()
    )
    exact = torch.cat([z.real, z.imag], -1)
    y = apply_rope(x, cos, sin)
    assert y.dtype == dtype, f"{dtype} in, {dtype} out; yours is {y.dtype}"
    # Rounded once: half a unit in the last place, and a little for float32 before it.
    checks.close(
        y,
        exact,
        rtol=1.001 * unit,
        atol=1e-5,
        what=f"x in {dtype}",
        hint="Turn in float32 and round once, at the end",
    )
x = torch.randn(2, 3, 5, 8, generator=g, dtype=torch.float64)
cos, sin = (t.double() for t in rope_cache(20, 6, 30.0))


def exact(x):
    z = torch.complex(x[..., :3], x[..., 3:6]) * torch.complex(cos, sin)[4:9]
    return torch.cat([z.real, z.imag, x[..., 6:]], -1)


odd = torch.tensor([1.0] * 6 + [-0.0, math.inf]).expand(5, 8)
passed = apply_rope(odd, *rope_cache(20, 6, 30.0))[:, 6:].contiguous().view(torch.int32)
checks.close(
    passed,
    odd[:, 6:].contiguous().view(torch.int32),
    what="the bits of −0 and ∞ in features that pass through",
)
checks.gradients(lambda x: apply_rope(x, cos, sin, 4), exact, x, names=("x",))
checks.close(apply_rope(x, cos, sin, 4), exact(x), what="x in float64", dtype=torch.float64)
### END HIDDEN TESTS

# %% [markdown]
# ### Does the score decay with the distance?
#
# Su et al. prove a bound. Write the score as
# $\operatorname{Re}\sum_i h_i e^{\mathrm i\Delta\omega_i}$ with $h_i = z_{q,i}\overline{z_{k,i}}$
# and $\Delta = m - n$, let $S_j = \sum_{i<j} e^{\mathrm i\Delta\omega_i}$, and sum by parts (with
# $h_{d/2} = 0$):
#
# $$ \Bigl|\sum_i h_i\,e^{\mathrm i\Delta\omega_i}\Bigr| = \Bigl|\sum_i S_{i+1}(h_{i+1} - h_i)\Bigr| \le \max_i |h_{i+1} - h_i|\;\sum_i |S_{i+1}| . $$
#
# The last sum falls with $\Delta$, and "RoPE decays with distance" became a textbook sentence. But
# it is the *bound* that falls. **Predict**, before you run the next cell: for a query and a key
# that are equal, what does the score do from distance 0 to 4,000? And for a query and a key that
# are independent random vectors?

# %% tags=["experiment"]
cos, sin = rope_cache(4096, 128)
ones = torch.ones(1, 128)
aligned = (apply_rope(ones.expand(4096, 128), cos, sin) @ ones.T)[
    :, 0
] / 128  # the query at every distance from the key at 0
gen = torch.Generator().manual_seed(0)
random = torch.stack(
    [
        (
            apply_rope(torch.randn(1, 128, generator=gen).expand(4096, 128), cos, sin)
            @ torch.randn(128, generator=gen)
        )
        / 128**0.5
        for _ in range(300)
    ]
)
partial = torch.complex(cos, sin).cumsum(1).abs().mean(1)  # the mean of |S_j| over j

# %% tags=["experiment", "figure"]
# Figure: does RoPE's score fall with the distance? The bound and two cases
fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
axes[0].plot(plot.array(partial / partial[0]))
axes[0].set(ylabel="mean |S|, as a share of distance 0")
axes[0].set_title("the bound")
axes[1].plot(plot.array(aligned), linewidth=0.6)
axes[1].set(ylabel="score, as a share of distance 0")
axes[1].set_title("query = key, all features 1")
low, high = torch.quantile(random, torch.tensor([0.1, 0.9]), dim=0)
axes[2].fill_between(
    range(4096),
    plot.array(low),
    plot.array(high),
    alpha=0.25,
    linewidth=0,
    color=plot.COLORS[0],
    label="10 to 90 % of 300 pairs",
)
axes[2].plot(
    plot.array(random[0]), color=plot.COLORS[2], linestyle="-", linewidth=0.6, label="one of them"
)
axes[2].set(ylabel="score q·k / √d")
axes[2].set_title("query and key random")
axes[2].set_ylim(-2.4, 4)
axes[2].legend(loc="upper left", fontsize=8)
for ax in axes:
    ax.set(
        xlabel="distance (tokens)",
        xscale="symlog",
        xlim=(0, 4096),
        xticks=[0, 1, 10, 100, 1000],
        xticklabels=["0", "1", "10", "100", "1,000"],
    )
plot.caption(
    fig,
    "Head of 128 features, base 10,000. The bound falls to a third within 100 tokens; from there "
    "on only its mean falls, its peaks do not. The score of a query with an equal key (middle) "
    "falls with wobbles: all cosines are 1 at distance 0 and fall out of step, the fast pairs "
    "first. For random queries and keys (right) there is nothing to fall out of step: "
    "the spread is the same at every distance.",
)
plt.show()

# %% [markdown]
# So decay is no law of RoPE. It happens to queries and keys whose pairs were in step at distance 0;
# a model that wants to look far away can arrange its phases so that they come into step there
# (Barbero et al. 2024 prove it for any distance, and do not find the decay at work in Gemma).
# ALiBi's decay, in contrast, is built in.
#
# ### Exercise · From one layout to the other
#
# LLaMA's original checkpoints are interleaved; Hugging Face's code is half-split. The conversion
# happens in the *weights*, once. Row $c$ of head $h$'s $W_Q$ makes feature $c$ of the query, so the
# rows have to be put in the order in which the half-split code expects its features: first the
# first members of all pairs, then the second members. Queries and keys get the same permutation, so
# that no dot product changes; values and output projection stay.


# %% exercise="interleaved_to_half" minutes=15 difficulty=2
def interleaved_to_half(w: Tensor, rotary_dim: int | None = None) -> Tensor:
    """A query or key projection trained with the interleaved layout, its rows ordered for
    half-split code.

    w: (heads, head_dim, …): for each head the rows that make its features; the trailing axes are
    d_model for a weight, none for a bias. rotary_dim: how many features turn, even, from 0 to
    head_dim; None means all. The others keep their place. Returns a new tensor of the same shape
    and dtype; w is not changed.
    """
    ### BEGIN SOLUTION
    head_dim = w.shape[1]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    order = torch.arange(head_dim)
    order[:rotary_dim] = torch.cat([order[0:rotary_dim:2], order[1:rotary_dim:2]])
    return w[:, order.to(w.device)]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which direction?</summary>
#
# New row 1 should be what was the first member of pair 1: old row 2. With 6 features the new order
# begins 0, 2, 4.
# </details>

# %% [markdown]
# Here is the paper's layout, to compare with. Nothing in your conversion needs it.


# %%
def interleaved_rope(x: Tensor, base: float = 10_000.0) -> Tensor:
    """(…, seq, dim) turned in the interleaved layout from position 0, all features, in float64."""
    seq, dim = x.shape[-2:]
    angle = torch.arange(seq).double()[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


# %% check="interleaved_to_half" points=2
w = torch.arange(12.0).view(2, 6)  # a bias: 2 heads of 6 features
checks.close(
    interleaved_to_half(w),
    torch.tensor([[0.0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]]),
    what="the new order of 2 heads of 6 features",
    mistakes={
        "the conversion in the other direction": torch.tensor(
            [[0.0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
        ),
        "treating both heads as one of 12 features": torch.tensor(
            [[0.0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for heads, head_dim, d_model, seq in [(1, 2, 3, 4), (2, 8, 5, 9), (3, 6, 18, 30), (4, 14, 7, 2)]:
    w_q, w_k = (
        torch.randn(heads, head_dim, d_model, generator=g, dtype=torch.float64) for _ in range(2)
    )
    b_q = torch.randn(heads, head_dim, generator=g, dtype=torch.float64)
    x = torch.randn(seq, d_model, generator=g, dtype=torch.float64)
    with checks.unchanged(w=w_q):
        half_q = interleaved_to_half(w_q)
    # Law: half-split rotation after the conversion scores as interleaved rotation did before it.
    q, k = interleaved_rope(x @ w_q.mT + b_q[:, None]), interleaved_rope(x @ w_k.mT)
    angle = torch.arange(seq).double()[:, None] * 10_000 ** (
        -torch.arange(0, head_dim, 2).double() / head_dim
    )
    halves = []
    for t in (x @ half_q.mT + interleaved_to_half(b_q)[:, None], x @ interleaved_to_half(w_k).mT):
        z = torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        halves.append(torch.cat([z.real, z.imag], -1))
    checks.close(
        halves[0] @ halves[1].mT,
        q @ k.mT,
        what=f"the scores of {heads} heads of {head_dim} features after the conversion",
    )
    pairs = torch.stack([w_q[:, 0::2], w_q[:, 1::2]], 1).flatten(1, 2)
    checks.close(half_q, pairs, what=f"the rows of {heads} heads of {head_dim}")
### END HIDDEN TESTS

# %% check="interleaved_to_half" points=1
checks.close(
    interleaved_to_half(torch.arange(8.0).view(1, 8), rotary_dim=6),
    torch.tensor([[0.0, 2, 4, 1, 3, 5, 6, 7]]),
    what="8 features of which 6 turn",
    mistakes={"moving all features": torch.tensor([[0.0, 2, 4, 6, 1, 3, 5, 7]])},
)
### BEGIN HIDDEN TESTS
w = torch.randn(3, 10, 4, generator=checks.generator(13))
checks.close(
    interleaved_to_half(w, 4),
    w[:, [0, 2, 1, 3, 4, 5, 6, 7, 8, 9]],
    what="10 features of which 4 turn",
)
checks.close(interleaved_to_half(w, 2), w, what="10 features of which 2 turn")
checks.close(
    interleaved_to_half(w, 0),
    w,
    what="10 features of which none turn",
    mistakes={"taking a rotary_dim of 0 for None": interleaved_to_half(w)},
)
checks.close(
    interleaved_to_half(w, 10), interleaved_to_half(w), what="rotary_dim = head_dim against None"
)
for turned in (0, 2, 6):
    before, converted = w.clone(), interleaved_to_half(w, turned)
    converted += 1
    assert torch.equal(w, before), "the result shares memory with w: return a new tensor"
checks.keeps_dtype(lambda w: interleaved_to_half(w, 6), w, what="the ordered projection")
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · With a cache
#
# A model that writes text keeps the keys and values of everything so far and computes them only for
# what is new (the **KV cache**). With RoPE a key is turned when it is made, by its own absolute
# position, and never again: the query's turn does the rest. Five mistakes are popular here, and
# the outputs for a whole text at once show only the first: turning the values too, starting every
# piece at position 0, turning cached keys a second time, caching keys that were not turned, and a
# causal mask that lines up the first query with the first key rather than the last with the last.
#
# PyTorch's `F.scaled_dot_product_attention(q, k, v, attn_mask=…, enable_gqa=True)` does the rest:
# it scales by $1/\sqrt d$, takes a boolean mask (True = may be seen), and with `enable_gqa` lets
# several query heads share a head of keys and values. The next lesson builds it.


# %% exercise="rotary_attention" minutes=20 difficulty=2
def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention of the newest tokens to themselves and to everything before them, with
    rotary positions.

    q: (batch, heads, new, head_dim), k and v: (batch, k_heads, new, head_dim), not turned yet;
    heads is a multiple of k_heads.
    cos, sin: as in apply_rope, long enough. past: (keys, values) of the `seen` tokens before, as
    this function returned them, each (batch, k_heads, seen, head_dim), or None at the beginning.
    The new tokens stand at seen … seen + new − 1.

    Returns (out, (keys, values)): out (batch, heads, new, head_dim), and the keys (turned) and
    values (not turned) of all seen + new tokens, all in the dtype of q. Inputs are not changed,
    gradients flow to q, k and v.
    """
    ### BEGIN SOLUTION
    seen, new = 0 if past is None else past[0].shape[-2], q.shape[-2]
    q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
    # the last query sees the last key
    visible = torch.ones(new, seen + new, dtype=torch.bool, device=q.device).tril(seen)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True), (k, v)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the mask</summary>
#
# New query number $i$ stands at position seen + $i$ and sees keys 0 … seen + $i$.
# <code>torch.Tensor.tril</code> takes a diagonal. (<code>is_causal=True</code> lines up the first
# query with the first key, which is right only at the beginning.)
# </details>

# %% check="rotary_attention" points=2
g = checks.generator(14)
cos, sin = rope_cache(16, 4, 20.0)
q, k, v = (torch.randn(1, 1, 6, 4, generator=g) for _ in range(3))
result = rotary_attention(q, k, v, cos, sin)
assert isinstance(result, tuple), (
    f"return (out, (keys, values)); yours is of type {type(result).__name__}"
)
assert isinstance(result[1], tuple), "return (out, (keys, values)): the second is a pair as well"
out, (keys, values) = result
checks.close(
    out[:, :, 0],
    v[:, :, 0],
    what="the output of the first token",
    hint="It sees only itself, so its output is its own value, which is not turned",
)
checks.close(values, v, what="the values kept", hint="Values are not turned")
checks.close(
    keys,
    apply_rope(k, cos, sin),
    what="the keys kept",
    hint="Keys are kept turned",
    mistakes={"keeping them unturned": k},
)


### BEGIN HIDDEN TESTS
def brute_force(q, k, v, cos, sin):
    """One query at a time, one head at a time, in float64 and complex numbers."""
    half, group = cos.shape[1], q.shape[1] // k.shape[1]
    turn = torch.complex(cos.double(), sin.double())

    def turned(x):
        z = (
            torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
            * turn[: x.shape[-2]]
        )
        return torch.cat([z.real, z.imag, x[..., 2 * half :].double()], -1)

    q, k, v, out = turned(q), turned(k), v.double(), torch.zeros_like(q, dtype=torch.float64)
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            score = (k[:, h // group, : i + 1] @ q[:, h, i, :, None])[..., 0] / q.shape[-1] ** 0.5
            out[:, h, i] = (score.softmax(-1)[:, None] @ v[:, h // group, : i + 1])[:, 0]
    return out


for batch, heads, k_heads, seq, head_dim, rotary in [
    (2, 2, 2, 7, 8, 8),
    (1, 6, 2, 5, 6, 6),
    (2, 4, 1, 9, 8, 4),
    (1, 3, 3, 1, 4, 2),
]:
    cos, sin = rope_cache(20, rotary, 30.0)
    q = torch.randn(batch, heads, seq, head_dim, generator=g)
    k, v = (torch.randn(batch, k_heads, seq, head_dim, generator=g) for _ in range(2))
    with checks.unchanged(q=q, k=k, v=v, cos=cos, sin=sin):
        out, _ = rotary_attention(q, k, v, cos, sin)
    checks.close(
        out,
        brute_force(q, k, v, cos, sin),
        what=f"the output of {heads} heads over {k_heads}, {seq} tokens",
        mistakes={
            "not turning anything": brute_force(
                q, k, v, torch.ones_like(cos), torch.zeros_like(sin)
            )
        },
    )
### END HIDDEN TESTS

# %% check="rotary_attention" points=3
# Piece by piece, as a model writes, against all at once.
g = checks.generator(15)
cos, sin = rope_cache(16, 4, 20.0)
q, k, v = (torch.randn(1, 2, 5, 4, generator=g) for _ in range(3))
whole, _ = rotary_attention(q, k, v, cos, sin)
_, past = rotary_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], cos, sin)
last, _ = rotary_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], cos, sin, past)
checks.close(
    last,
    whole[:, :, 4:],
    what="the fifth token's output, with four in the cache",
    hint="Position 4, four keys before it that are already turned",
)


### BEGIN HIDDEN TESTS
def brute_force(q, k, v, cos, sin):
    """One query at a time, one head at a time, in float64 and complex numbers."""
    half, group = cos.shape[1], q.shape[1] // k.shape[1]
    turn = torch.complex(cos.double(), sin.double())

    def turned(x):
        z = (
            torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
            * turn[: x.shape[-2]]
        )
        return torch.cat([z.real, z.imag, x[..., 2 * half :].double()], -1)

    q, k, v, out = turned(q), turned(k), v.double(), torch.zeros_like(q, dtype=torch.float64)
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            score = (k[:, h // group, : i + 1] @ q[:, h, i, :, None])[..., 0] / q.shape[-1] ** 0.5
            out[:, h, i] = (score.softmax(-1)[:, None] @ v[:, h // group, : i + 1])[:, 0]
    return out


def attend(q, k, v, cos, sin):
    """The same with rotation matrices: what gradients are compared with."""
    seq, half = q.shape[-2], cos.shape[1]
    turn = torch.eye(q.shape[-1], dtype=torch.float64).repeat(seq, 1, 1)
    for i in range(half):
        turn[:, i, i] = turn[:, half + i, half + i] = cos[:seq, i].double()
        turn[:, half + i, i], turn[:, i, half + i] = sin[:seq, i].double(), -sin[:seq, i].double()
    q, k = (torch.einsum("sab,...sb->...sa", turn, t) for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


for heads, k_heads, head_dim, rotary, pieces in [
    (2, 2, 8, 8, (1, 1, 1, 1)),
    (4, 2, 6, 4, (5, 3, 1, 4)),
    (3, 1, 4, 4, (2, 6)),
]:
    seq = sum(pieces)
    cos, sin = rope_cache(seq, rotary, 30.0)
    q = torch.randn(2, heads, seq, head_dim, generator=g)
    k, v = (torch.randn(2, k_heads, seq, head_dim, generator=g) for _ in range(2))
    past, outs, at = None, [], 0
    for n in pieces:
        before = () if past is None else past
        with checks.unchanged(*before):
            out, past = rotary_attention(*(t[:, :, at : at + n] for t in (q, k, v)), cos, sin, past)
        outs.append(out)
        at += n
        assert past[0].shape == past[1].shape == (2, k_heads, at, head_dim), (
            f"after {at} tokens the cache should hold (2, {k_heads}, {at}, {head_dim}); yours "
            f"holds {tuple(past[0].shape)} and {tuple(past[1].shape)}"
        )
    checks.close(
        torch.cat(outs, 2),
        brute_force(q, k, v, cos, sin),
        what=f"{heads} heads over {k_heads}, pieces of {', '.join(map(str, pieces))} tokens",
    )
    checks.close(past[1], v, what="the values in the cache at the end")
cos, sin = rope_cache(6, 4, 30.0)
inputs = [torch.randn(1, h, 3, 4, generator=g) for h in (4, 2, 2)]
checks.keeps_dtype(
    lambda q, k, v: rotary_attention(q, k, v, cos, sin, rotary_attention(q, k, v, cos, sin)[1]),
    *inputs,
    what="the output, or what is kept,",
)
checks.gradients(
    lambda q, k, v: rotary_attention(q, k, v, cos, sin)[0],
    lambda q, k, v: attend(q, k, v, cos, sin),
    *(t.double() for t in inputs),
    names=("q", "k", "v"),
    rtol=1e-6,
)
### END HIDDEN TESTS

# %% [markdown]
# ### A real model, moved
#
# The smaller of the course's own models (`llm40.models`) is a LLaMA with rotary positions. If the
# argument above is right, its predictions for a text cannot change when *all* positions are moved
# by 1,000. They must change when the same text is torn apart, its second half moved on by 1,000.
# Nothing is trained here.

# %% tags=["experiment"]
from llm40 import data, models

model, tokenizer = models.load("tiny", device="cpu")
ids = torch.tensor([tokenizer.encode(data.documentation()["for"])[:200]])
place = torch.arange(200)
with torch.no_grad():
    here, moved, torn = (
        model(ids, positions=p)[0] for p in (place, place + 1000, place + 1000 * (place >= 100))
    )
losses = {
    name: F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    for name, logits in (
        ("as it is", here),
        ("all positions + 1,000", moved),
        ("second half + 1,000", torn),
    )
}
print(
    "largest change of a logit, everything moved by 1,000: "
    f"{float((moved - here).abs().max()):.1e} (logits reach {float(here.abs().max()):.0f})"
)
for name, loss in losses.items():
    print(
        f"{name:22} loss on tokens 1 to 99: {float(loss[:99].mean()):.3f} nats, on tokens 100 to "
        f"199: {float(loss[99:].mean()):.3f}"
    )

# %% [markdown]
# ## One launch for queries and keys
#
# Turning costs three operations for every number, and for every number two bytes must be read and
# two written (bfloat16). An H200 does some 14 float32 operations (outside its matrix units) in the
# time that one byte takes, and this is less than one a byte: like lesson 03's gate, this is a
# question of moving each number **once**. Step by step in PyTorch it is moved many times: the
# halves are multiplied by cosines into one temporary, by sines into another, subtracted into a
# third, concatenated into a fourth, all of it twice, for $q$ and for $k$, each launch on its own.
#
# The fused kernel, in Triton. (Lesson 03 introduces Triton; in brief: a kernel is launched as a
# **grid** of **programs**; each reads its number with `tl.program_id`, computes the addresses of a
# **block** of elements with `tl.arange`, whose size is a power of two known at compile time, and
# loads and stores it. Lanes beyond the edge must be switched off by a **mask**, or they touch
# somebody else's memory.)
#
# - **One program for each token.** All heads of a token stand at the same position and turn by the
#   same angles, so cosines and sines are read once a token, not once a head: for LLaMA-3-8B's 32
#   query and 8 key heads, once instead of 40 times.
# - **Queries and keys in one launch.** They share angles, and a launch costs some microseconds, in
#   which an H200 moves ten megabytes and more.
# - **Layout (batch, seq, heads, head_dim)**: what the projections produce, without a transposition.
#   Often $q$ and $k$ are slices of one fused projection, so each comes with its own strides for
#   batch, sequence and heads; only the features of a head lie side by side.
# - **The backward pass is the same kernel.** $y = R_p x$ with $R_p$ a rotation, so
#   $dx = R_p^\top dy = R_{-p}\,dy$: the gradient is turned back. Change the sign of the sine.
#   Nothing of $q$ and $k$ needs to be kept.
#
# A block of a token's heads is two-dimensional: `head` as a column `(BLOCK_H, 1)` and `pair` as a
# row `(1, BLOCK_HALF)` broadcast to a tile of addresses. Neither 12 query heads nor 3 pairs are
# powers of two, so both edges need the mask.
#
# The number of a token times its stride passes $2^{31}$ at sizes that exist (a million tokens of
# 4,096 numbers): convert program numbers, and the heads' numbers too, to 64 bits before you
# multiply, `.to(tl.int64)`.
#
# The launcher, and the function that autograd sees, are given:


# %%
def features_together(x: Tensor) -> Tensor:
    """x itself where the features of a head lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fused_rope(q, k, cos, sin, start=0, backward=False, out=None):
    """(q, k) turned, in one launch. q: (batch, seq, heads, head_dim), k: (batch, seq, k_heads,
    head_dim), any strides.

    cos, sin: (length, r/2) float32, r ≤ head_dim; tokens stand at start, start + 1, …; with
    `backward` they are turned back. Returns new tensors; `out`, a pair like (q, k), is written to
    if given.
    """
    q, k, cos, sin = features_together(q), features_together(k), cos.contiguous(), sin.contiguous()
    (batch, seq, q_heads, head_dim), k_heads, half = q.shape, k.shape[2], cos.shape[1]
    if start + seq > len(cos):
        raise ValueError(
            f"positions up to {start + seq - 1} are asked for, but the table ends at {len(cos) - 1}"
        )
    block = triton.next_power_of_2  # of 0 it is 0
    q_out, k_out = (
        (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
        if out is None
        else out
    )
    rope_kernel[seq, batch](
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        start,
        half,
        head_dim,
        q_heads,
        k_heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        BACKWARD=backward,
        BLOCK_Q=block(q_heads),
        BLOCK_K=block(k_heads),
        BLOCK_HALF=block(half),
        BLOCK_REST=block(head_dim - 2 * half),
        num_warps=4,  # 128 threads a token
    )
    return q_out, k_out


class FusedRoPE(torch.autograd.Function):
    """FusedRoPE.apply(q, k, cos, sin, start): fused_rope with a gradient. Keeps the table, and
    nothing of q and k.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin, start):
        ctx.save_for_backward(cos, sin)
        ctx.start = start
        return fused_rope(q, k, cos, sin, start)

    @staticmethod
    def backward(ctx, dq, dk):
        return *fused_rope(dq, dk, *ctx.saved_tensors, ctx.start, backward=True), None, None, None


# %% tags=["support"]
# Support: which addresses the kernel reads and writes with rows 2³⁰ elements apart
@checks.measured
def far_apart(kernel, inner: tuple, outer: tuple):
    """What the kernel reads and writes, in bytes, with these strides (batch, seq, heads) of inputs
    and outputs, and where q, k, q_out, k_out, cos and sin begin. Interpreter only: no memory is
    touched."""
    q, k, q_out, k_out = (torch.zeros(1) for _ in range(4))
    cos, sin = torch.zeros(4, 2), torch.zeros(4, 2)
    with checks.traffic(dry=True) as seen:
        kernel[3, 3](
            q, k, q_out, k_out, cos, sin, 1, 2, 5, 3, 1, *inner * 2, *outer * 2, BACKWARD=False,
            BLOCK_Q=4, BLOCK_K=1, BLOCK_HALF=2, BLOCK_REST=1,
        )  # fmt: skip
    return set(seen.read), set(seen.written), [t.data_ptr() for t in (q, k, q_out, k_out, cos, sin)]


# %% [markdown]
# ### Exercise · The kernel
#
# Two functions: `rotate_heads` turns all heads of one token, whose angles it is handed;
# `rope_kernel` is the program, which finds its token, loads the angles and calls `rotate_heads`
# twice.


# %% exercise="rope_kernel" minutes=50 difficulty=3 path="more"
@triton.jit
def rotate_heads(
    x_ptr, out_ptr, x_head, out_head, cos, sin, heads, half, head_dim, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token: pairs (x[i], x[i + half]), i < half, turned; features from 2·half on
    copied.

    x_ptr, out_ptr: the token's first head; heads are x_head and out_head elements apart (2³¹ and
    more occur), the head_dim features of one lie side by side.
    cos, sin: (BLOCK_HALF,) float32, already loaded; only the first `half` are of use.
    BLOCK_H ≥ heads, BLOCK_HALF ≥ half, BLOCK_REST ≥ head_dim − 2·half: powers of two, BLOCK_REST =
    0 where nothing is left.
    """
    ### BEGIN SOLUTION
    head = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < heads) & (pair < half)  # neither count need be a power of two
    first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
    cos, sin = cos[None, :], sin[None, :]  # the same for all heads
    tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
    tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)
    if BLOCK_REST > 0:  # decided when the kernel is compiled
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < heads) & (rest < head_dim)
        tl.store(
            out_ptr + head * out_head + rest,
            tl.load(x_ptr + head * x_head + rest, mask=inside),
            mask=inside,
        )
    ### END SOLUTION


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, start, half, head_dim, q_heads,
    k_heads, q_batch, q_seq, q_head, k_batch, k_seq, k_head, q_out_batch, q_out_seq, q_out_head,
    k_out_batch, k_out_seq, k_out_head, BACKWARD: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One token: its queries and its keys turned by the angles of its position, or turned back
    where BACKWARD.

    Grid: (seq, batch); program (s, b) has token s of sequence b, at position start + s.
    q, q_out: (batch, seq, q_heads, head_dim), k, k_out: (batch, seq, k_heads, head_dim), float32 or
    half, each with its own strides q_batch, q_seq, q_head …; offsets beyond 2³¹ work. cos, sin:
    (length, half) float32, contiguous. Every element of q, k and of the token's row of cos and sin
    is read once, every element of the outputs written once. Computed in float32, rounded once.
    """
    ### BEGIN SOLUTION
    # 64 bits: s · stride passes 2³¹
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    row = (start + s) * half
    # once, for all heads of q and of k
    cos = tl.load(cos_ptr + row + pair, mask=pair < half, other=0.0)
    sin = tl.load(sin_ptr + row + pair, mask=pair < half, other=0.0)
    if BACKWARD:  # R_pᵀ = R_{−p}
        sin = -sin
    rotate_heads(
        q_ptr + b * q_batch + s * q_seq,
        q_out_ptr + b * q_out_batch + s * q_out_seq,
        q_head,
        q_out_head,
        cos,
        sin,
        q_heads,
        half,
        head_dim,
        BLOCK_Q,
        BLOCK_HALF,
        BLOCK_REST,
    )
    rotate_heads(
        k_ptr + b * k_batch + s * k_seq,
        k_out_ptr + b * k_out_batch + s * k_out_seq,
        k_head,
        k_out_head,
        cos,
        sin,
        k_heads,
        half,
        head_dim,
        BLOCK_K,
        BLOCK_HALF,
        BLOCK_REST,
    )
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order of things</summary>
#
# In <code>rope_kernel</code>: program numbers → position's row in the table → cos and sin of
# <code>tl.arange(0, BLOCK_HALF)</code> with a mask → sign → pointer to the token's first head in
# each of the four tensors → two calls. In <code>rotate_heads</code>: head and pair, mask, two
# loads, two stores; and the features that pass through.
# </details>
#
# <details><summary>Hint: from a vector to a tile</summary>
#
# <code>cos[None, :]</code> makes the vector a row that broadcasts against the tile.
# </details>
#
# <details><summary>Hint: what passes through</summary>
#
# <code>BLOCK_REST</code> is known when the kernel is compiled, so <code>if BLOCK_REST > 0:</code>
# is decided then; <code>tl.arange(0, 0)</code> would be an error.
# </details>

# %% check="rope_kernel" points=3
# Angles picked by hand: position 0 does not turn, position 1 turns pair 0 by 90° and pair 1 by
# 180°. Two query heads, one key head.
cos = torch.tensor([[1.0, 1], [0, -1]], device=profile.device)
sin = torch.tensor([[0.0, 0], [1, 0]], device=profile.device)
q = (
    torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], device=profile.device)
    .view(1, 1, 2, 4)
    .repeat(1, 2, 1, 1)
)  # (batch 1, seq 2, heads 2, head_dim 4)
k = 10 * q[:, :, :1]
# What no program writes stays NaN; and a GPU's compiler takes the kernel, too.
with checks.compiled(), checks.launches() as launched, checks.guarded_allocations():
    q_out, k_out = fused_rope(q, k, cos, sin)
assert (launched.count, launched.programs) == (1, 2), (
    f"{launched.count} launches and {launched.programs} programs; one launch of two programs, one "
    "a token, is expected."
)
turned = torch.tensor([[-3.0, -2, 1, -4], [-7, -6, 5, -8]])
checks.close(q_out[0, 0], q[0, 0], what="the queries at position 0, which do not turn,")
checks.close(
    q_out[0, 1],
    turned,
    what="the queries at position 1",
    mistakes={
        "the interleaved layout": torch.tensor([[-2.0, 1, -3, -4], [-6, 5, -7, -8]]),
        "turning the other way": torch.tensor([[3.0, -2, -1, -4], [7, -6, -5, -8]]),
        "not turning": q[0, 1],
        "adding where one subtracts": torch.tensor([[3.0, -2, 1, -4], [7, -6, 5, -8]]),
    },
)
checks.close(k_out[0, 1], 10 * turned[:1], what="the key at position 1")


### BEGIN HIDDEN TESTS
def exact(x, cos, sin, start=0):
    """(batch, seq, heads, head_dim) turned, in complex numbers of float64."""
    half = cos.shape[1]
    z = (
        torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
        * torch.complex(cos.double(), sin.double())[start : start + x.shape[1], None]
    )
    return torch.cat([z.real, z.imag, x[..., 2 * half :].double()], -1)


gen = checks.generator(20)
for batch, seq, q_heads, k_heads, head_dim, rotary, start in [
    (2, 3, 4, 2, 8, 8, 0),
    (1, 5, 3, 1, 6, 6, 2),
    (2, 1, 6, 6, 10, 4, 7),
    (3, 2, 5, 5, 2, 2, 0),
    (1, 2, 8, 2, 16, 12, 40),
    (2, 2, 1, 1, 7, 2, 1),
    (1, 1, 32, 8, 128, 128, 30),
]:
    cos, sin = (t.to(profile.device) for t in rope_cache(60, rotary, 50.0))
    q = checks.randn(batch, seq, q_heads, head_dim, generator=gen)
    k = checks.randn(batch, seq, k_heads, head_dim, generator=gen)
    with (
        checks.launches() as launched,
        checks.unchanged(q=q, k=k, cos=cos, sin=sin),
        checks.guarded_allocations(),
    ):
        found = fused_rope(q, k, cos, sin, start)
    assert launched.kernels["rope_kernel"] == launched.count == 1, (
        f"{launched.count} launches, of {dict(launched.kernels)}: one of rope_kernel is expected."
    )
    where = (
        f"batch {batch}, {seq} tokens from position {start}, {q_heads} heads over {k_heads}, "
        f"{rotary} of {head_dim} features turned. What is not written is NaN."
    )
    for name, x, y in zip(("q", "k"), (q, k), found, strict=True):
        checks.relative_l2(
            y.clone(),
            exact(x, cos, sin, start),
            2e-6,
            what=f"{name} turned",
            hint=where,
            mistakes={
                "counting positions from 0 whatever start is": exact(x, cos, sin),
                "turning the other way": exact(x, cos, -sin, start),
                "using the first token's angles for all": torch.cat(
                    [exact(x[:, s : s + 1], cos, sin, start) for s in range(seq)], 1
                ),
                "taking the first sequence for all": exact(x[:1].expand_as(x), cos, sin, start),
            },
        )
        assert torch.equal(y[..., rotary:], x[..., rotary:]), (
            f"{name}: features {rotary} … {head_dim - 1} should pass through unchanged, bit for "
            f"bit. {where}"
        )
half = [checks.randn(2, 4, h, 12, generator=gen, dtype=torch.float16) for h in (3, 2)]
cos, sin = (t.to(profile.device) for t in rope_cache(4, 12, 50.0))
with checks.compiled():
    found = fused_rope(*half, cos, sin)
for name, x, y in zip(("q", "k"), half, found, strict=True):
    assert y.dtype == torch.float16
    wanted = exact(x, cos, sin)
    # the error of rounding once, at the end
    once = float((wanted.half().double() - wanted).norm() / wanted.norm())
    checks.relative_l2(
        y,
        wanted,
        1.1 * once,
        what=f"{name} in float16",
        hint="Compute in float32; the store rounds.",
    )
### END HIDDEN TESTS

# %% check="rope_kernel" points=3
# Slices of one fused projection, whose rows are (2 + 1 + 1) heads of 6 features apart; NaN lies
# around everything, canaries around the outputs.
gen = checks.generator(21)
cos, sin = (t.to(profile.device) for t in rope_cache(8, 4, 50.0))
fused = checks.guarded(checks.randn(2, 3, 4, 6, generator=gen), what="the projection")
q, k, _ = fused.tensor.split([2, 1, 1], dim=2)
outs = [
    checks.guarded(
        torch.full((2, 3, h, 6), math.nan, device=profile.device), row_pad=pad, what=name
    )
    for h, pad, name in ((2, 3, "q_out"), (1, 5, "k_out"))
]
with checks.compiled():
    fused_rope(q, k, cos, sin, out=[o.tensor for o in outs])
for x, o in zip((q, k), outs, strict=True):
    o.intact()
    z = (
        torch.complex(x[..., :2].double(), x[..., 2:4].double())
        * torch.complex(cos.double(), sin.double())[:3, None]
    )
    checks.relative_l2(
        o.tensor.clone(),
        torch.cat([z.real, z.imag, x[..., 4:].double()], -1),
        2e-6,
        what=f"{o.what} in a padded buffer",
        hint="Each of the four tensors has its own strides for batch, sequence and heads.",
    )
### BEGIN HIDDEN TESTS
for batch, seq, q_heads, k_heads, head_dim, rotary, start in [
    (2, 3, 3, 1, 6, 6, 0),
    (3, 2, 5, 2, 10, 6, 3),
    (1, 4, 7, 7, 18, 2, 1),
    (2, 2, 4, 4, 8, 8, 5),
]:
    table = [
        checks.guarded(t.to(profile.device), what=name)
        for t, name in zip(rope_cache(start + seq, rotary, 50.0), ("cos", "sin"), strict=True)
    ]
    cos, sin = (t.tensor for t in table)
    inputs = [
        checks.guarded(
            checks.randn(batch, seq + more, h, head_dim, generator=gen), row_pad=pad, what=name
        )
        for h, pad, more, name in ((q_heads, 7, 2, "q"), (k_heads, 2, 0, "k"))
    ]
    # queries from the middle of longer sequences: the batch stride is its own
    given = inputs[0].tensor[:, 1:-1], inputs[1].tensor
    # One output as (batch, heads, seq, head_dim) in memory, as attention may want it, one in padded
    # rows.
    q_out = checks.guarded(
        torch.full((batch, q_heads, seq, head_dim), math.nan, device=profile.device),
        row_pad=1,
        what="q_out",
    )
    k_out = checks.guarded(
        torch.full((batch, seq, k_heads, head_dim), math.nan, device=profile.device),
        row_pad=9,
        what="k_out",
    )
    views = (q_out.tensor.transpose(1, 2), k_out.tensor)
    with checks.unchanged(*(i.tensor for i in inputs)):
        fused_rope(*given, cos, sin, start, out=views)
    for buffer in (*inputs, *table, q_out, k_out):
        buffer.intact()
    half = rotary // 2
    for name, x, y in zip(("q", "k"), given, views, strict=True):
        z = (
            torch.complex(x[..., :half].double(), x[..., half:rotary].double())
            * torch.complex(cos.double(), sin.double())[start : start + seq, None]
        )
        checks.relative_l2(
            y.clone(),
            torch.cat([z.real, z.imag, x[..., rotary:].double()], -1),
            2e-6,
            what=f"{name} turned, everything in padded buffers",
            hint=f"batch {batch}, {seq} tokens, {q_heads} heads over {k_heads}, {rotary} of "
            f"{head_dim} features turned. Loads beyond an edge meet NaN here.",
        )
if profile.interpret:
    # Strides of about 2³⁰ elements, no memory touched: is every address where it should be?
    # (batch, seq, heads) of inputs, outputs
    inner, outer = (2**30, 2**30 + 64, 7), (2**30 + 1000, 2**30, 2**30 + 2000)
    found, stored, (q, k, q_out, k_out, *angles) = far_apart(rope_kernel, inner, outer)
    read, written = (
        {
            start + 4 * (b * by[0] + s * by[1] + h * by[2] + c)
            for start, heads in pair
            for b in range(3)
            for s in range(3)
            for h in range(heads)
            for c in range(5)
        }
        for pair, by in ((((q, 3), (k, 1)), inner), (((q_out, 3), (k_out, 1)), outer))
    )
    read |= {start + 4 * (2 * (s + 1) + c) for start in angles for s in range(3) for c in range(2)}
    assert found == read, (
        "tokens 2³⁰ elements apart are not read where they lie. Are the program numbers 64 bits "
        "wide before they are multiplied?"
    )
    assert stored == written, (
        "tokens and heads 2³⁰ elements apart are not written where they belong. Are their numbers "
        "64 bits wide before they are multiplied?"
    )
### END HIDDEN TESTS

# %% check="rope_kernel" points=2
# The gradient is turned back: by −90° and 180° at position 1.
cos = torch.tensor([[1.0, 1], [0, -1]], device=profile.device)
sin = torch.tensor([[0.0, 0], [1, 0]], device=profile.device)
q, k = (torch.ones(1, 2, h, 4, device=profile.device, requires_grad=True) for h in (2, 1))
dy = torch.tensor([1.0, 2, 3, 4], device=profile.device)
with checks.guarded_allocations():
    q_out, k_out = FusedRoPE.apply(q, k, cos, sin, 0)
    dq, dk = torch.autograd.grad((q_out * dy).sum() + (k_out * dy).sum(), (q, k))
for name, gradient in (("dq", dq), ("dk", dk)):
    checks.close(
        gradient[0, 1, 0],
        torch.tensor([3.0, -2, -1, -4]),
        what=f"{name} at position 1 for a gradient of (1, 2, 3, 4)",
        hint="The transpose of a rotation is the rotation by the negative angle",
        mistakes={
            "turning the gradient forward": torch.tensor([-3.0, -2, 1, -4]),
            "handing the gradient on unturned": dy,
        },
    )


### BEGIN HIDDEN TESTS
def exact(x, cos, sin, start):
    half = cos.shape[1]
    z = (
        torch.complex(x[..., :half], x[..., half : 2 * half])
        * torch.complex(cos.double(), sin.double())[start : start + x.shape[1], None]
    )
    return torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)


gen = checks.generator(22)
for batch, seq, q_heads, k_heads, head_dim, rotary, start in [
    (2, 3, 4, 2, 8, 8, 0),
    (1, 2, 3, 1, 10, 6, 5),
    (2, 2, 5, 5, 6, 2, 1),
]:
    cos, sin = (t.to(profile.device) for t in rope_cache(12, rotary, 50.0))
    leaves = [
        checks.randn(batch, seq, h, head_dim, generator=gen).requires_grad_()
        for h in (q_heads, k_heads)
    ]
    arriving = [
        checks.randn(batch, h, seq, head_dim, generator=gen).transpose(1, 2)
        for h in (q_heads, k_heads)
    ]  # as attention sends it back
    with checks.compiled(), checks.launches() as launched, checks.guarded_allocations():
        found = torch.autograd.grad(FusedRoPE.apply(*leaves, cos, sin, start), leaves, arriving)
    assert launched.count == 2, (
        f"forward and backward are one launch each; {launched.count} were counted."
    )
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(
        [exact(x, cos, sin, start) for x in wide], wide, [t.double() for t in arriving]
    )
    forward = [exact(t.double(), cos, sin, start) for t in arriving]
    for name, mine, theirs, wrong in zip(("dq", "dk"), found, wanted, forward, strict=True):
        checks.relative_l2(
            mine.clone(),
            theirs,
            2e-6,
            what=name,
            hint=f"{q_heads} heads over {k_heads}, {rotary} of {head_dim} features turned, from "
            f"position {start}.",
            mistakes={"turning the gradient forward": wrong},
        )
    # Law: there and back is where one was.
    with checks.guarded_allocations():
        back = fused_rope(
            *fused_rope(*(t.detach() for t in leaves), cos, sin, start),
            cos,
            sin,
            start,
            backward=True,
        )
    for mine, x in zip(back, leaves, strict=True):
        checks.relative_l2(mine.clone(), x.detach().double(), 2e-6, what="turned and turned back")
### END HIDDEN TESTS

# %% check="rope_kernel" points=2
# Each number moves once, and the angles once a token, not once a head.
gen = checks.generator(23)
cos, sin = (t.to(profile.device) for t in rope_cache(5, 6, 50.0))
q, k = (checks.randn(2, 3, h, 8, generator=gen) for h in (4, 2))
with checks.compiled(), checks.traffic() as moved, checks.launches() as launched:
    q_out, k_out = fused_rope(q, k, cos, sin)
assert launched.count == 1, f"{launched.count} launches; queries and keys share one."
checks.relative_l2(
    q_out.norm(dim=-1),
    q.norm(dim=-1).double(),
    2e-6,
    what="the queries' lengths",
    hint="A rotation keeps them.",
)
if moved is not None:
    angles = moved.loaded - q.numel() - k.numel()
    checks.close(
        angles,
        2 * 18,
        what="the number of elements of cos and sin read for 6 tokens of 3 pairs",
        hint="Load the angles in rope_kernel, once for all heads of q and k; each element of q "
        "and k once",
        mistakes={
            "loading them for each head": 2 * 18 * 6,
            "loading them once for q and once for k": 2 * 36,
        },
    )
    ### BEGIN HIDDEN TESTS
    checks.close(
        moved.stored,
        q.numel() + k.numel(),
        what="the number of elements written",
        hint="Each once",
    )
    for batch, seq, q_heads, k_heads, head_dim, rotary in [(1, 2, 3, 3, 6, 6), (2, 2, 5, 1, 12, 2)]:
        cos, sin = (t.to(profile.device) for t in rope_cache(9, rotary, 50.0))
        q, k = (checks.randn(batch, seq, h, head_dim, generator=gen) for h in (q_heads, k_heads))
        with checks.traffic() as moved:
            fused_rope(q, k, cos, sin, 4, backward=True)
        needed = q.numel() + k.numel() + batch * seq * rotary
        checks.close(moved.loaded, needed, what="the number of elements of q, k, cos and sin read")
        checks.close(moved.stored, q.numel() + k.numel(), what="the number of elements written")
### END HIDDEN TESTS

# %% [markdown]
# ### On the hardware
#
# On a GPU the next cells measure the shape of a LLaMA-3-8B layer, 8,192 tokens with 32 query and 8
# key heads of 128 features in bfloat16, beside three peers in the same run: a plain **copy** of the
# same bytes, which is the limit; your `apply_rope` in **eager** PyTorch; and the same through
# **`torch.compile`**. The goal for a kernel of this kind is 1.1 times `torch.compile`. On a CPU
# they count the bytes of every operation of your `apply_rope` and say what it would cost.

# %% tags=["experiment"]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS, Q_HEADS, K_HEADS, HEAD_DIM = 8192, 32, 8, 128
must_move = (
    2 * 2 * TOKENS * (Q_HEADS + K_HEADS) * HEAD_DIM + 2 * 4 * TOKENS * HEAD_DIM // 2
)  # q, k in and out; cos, sin in


def eager(q, k, cos, sin):
    """Both through apply_rope, which has the sequence before the features: transposed views, no
    copies.
    """
    return tuple(apply_rope(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k))


class BytesMoved(TorchDispatchMode):
    """The bytes that every operation of PyTorch that makes a new tensor reads and writes."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        made = [
            t
            for t in tree_leaves(out)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        if made:
            self.steps.append(sum(t.numel() * t.element_size() for t in inputs + made))
        return out


if profile.name == "gpu" and not profile.interpret:
    cos, sin = (t.to("cuda") for t in rope_cache(TOKENS, HEAD_DIM, 500_000.0))
    q, k = (
        torch.randn(1, TOKENS, h, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (Q_HEADS, K_HEADS)
    )
    both = torch.randn(TOKENS * (Q_HEADS + K_HEADS) * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    target, arriving = torch.empty_like(both), [torch.randn_like(t) for t in (q, k)]
    functions = {
        "your kernel": lambda *t: FusedRoPE.apply(*t, 0),
        "torch.compile": torch.compile(eager),
        "eager": eager,
    }
    found = {
        "copy": [triton.testing.do_bench(lambda: target.copy_(both), quantiles=[0.5, 0.2, 0.8])] * 2
    }
    for name, function in functions.items():
        try:
            out = function(q, k, cos, sin)
        except RuntimeError as error:  # a compiler that is not set up on this machine
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        found[name] = [
            triton.testing.do_bench(f, quantiles=[0.5, 0.2, 0.8])
            for f in (
                lambda f=function: f(q, k, cos, sin),
                lambda o=out: torch.autograd.grad(o, (q, k), arriving, retain_graph=True),
            )
        ]
else:
    few = 64  # tokens: bytes are proportional to them
    cos, sin = rope_cache(few, HEAD_DIM, 500_000.0)
    with BytesMoved() as counted:
        eager(
            *(torch.ones(1, few, h, HEAD_DIM, dtype=torch.bfloat16) for h in (Q_HEADS, K_HEADS)),
            cos,
            sin,
        )
    megabytes = [size * TOKENS / few / 1e6 for size in counted.steps]
    total = sum(megabytes)

# %% tags=["experiment", "figure"]
# Figure: your kernel beside its peers, or on a CPU what each operation must move
if profile.name == "gpu" and not profile.interpret:
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    for i, (ax, direction) in enumerate(zip(axes, ("forward", "backward"), strict=True)):
        for j, (name, times) in enumerate(found.items()):
            moved = 2 * both.numel() * 2 if name == "copy" else must_move
            median, fast, slow = (moved / t / 1e9 for t in times[i])
            ax.bar(
                name,
                median,
                yerr=[[median - slow], [fast - median]],
                color=plot.COLORS[j],
                capsize=3,
            )
            print(f"{direction:8} {name:14} {times[i][0] * 1e3:7.1f} µs, {median:.2f} TB/s")
        ax.set_title(direction)
    axes[0].set_ylabel("TB/s of the bytes that must move")
    plot.caption(
        fig,
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton "
        f"{triton.__version__}; {TOKENS} tokens, {Q_HEADS}/{K_HEADS} heads of {HEAD_DIM}, "
        "bfloat16. Median; whiskers: 20 and 80 % quantiles.",
    )
else:
    fig, ax = plt.subplots(figsize=(10, 2.6))
    ax.barh(1, must_move / 1e6, color=plot.COLORS[5], edgecolor="black", height=0.55)
    ax.text(
        must_move / 1e6 + 0.01 * total,
        1,
        f"{must_move / 1e6:.0f} MB: {must_move / 4.8e12 * 1e6:.0f} µs",
        va="center",
        fontsize=9,
    )
    left = 0.0
    for i, size in enumerate(megabytes):
        ax.barh(
            0,
            size,
            left=left,
            color=plot.COLORS[5] if i % 2 else "white",
            edgecolor="black",
            height=0.55,
            linewidth=0.7,
        )
        left += size
    ax.text(
        left + 0.01 * total,
        0,
        f"{total:,.0f} MB: {total / 4.8e6 * 1e6:.0f} µs",
        va="center",
        fontsize=9,
    )
    ax.set(xlabel="megabytes read and written", xlim=(0, 1.22 * total), ylim=(-0.5, 1.5))
    ax.set_yticks([1, 0], ["one kernel", f"your apply_rope,\n{len(megabytes)} operations"])
    ax.grid(False, axis="y")
    plot.caption(
        fig,
        f"{TOKENS:,} tokens, {Q_HEADS}/{K_HEADS} heads of {HEAD_DIM}, bfloat16. Every box of the "
        f"lower bar is one operation, counted as it ran on {few} tokens. The times are "
        "arithmetic, not a measurement: these bytes at the 4.8 TB/s of an H200.",
    )
plt.show()

# %% [markdown]
# ## Experiment: train short, test long
#
# **Question.** The same small decoder, two layers of four heads, is trained to predict the next
# byte of Python's documentation from windows of $L = 64$ bytes, five times: with no positions,
# learned ones, sinusoidal ones, ALiBi and RoPE. Same data, same order, same initialization, same
# number of steps. Then each reads held-out windows of $4L = 256$ bytes. How large is the loss at
# each position?
#
# **Predict first**, in writing: the order of the five within $L$, and for each of them what the
# curve does beyond $L$. Does RoPE, which depends on distances only, know what to do at distance 100
# when it was trained up to 63? And can a model without positions learn anything that depends on
# order?

# %% tags=["experiment"]
LENGTH, LONG, WIDTH, HEADS, LAYERS = 64, 256, 64, 4, 2
KINDS = ("none", "learned", "sinusoidal", "ALiBi", "RoPE")


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, with whatever turns queries and keys or is added to the
    scores.
    """

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, table, bias):
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        )
        if table is not None:
            q, k = apply_rope(q, *table), apply_rope(k, *table)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, kind, vocabulary):
        super().__init__()
        self.embedding = TiedEmbedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.position = self.table = self.bias = None
        if kind == "learned":
            self.position = nn.Parameter(
                torch.randn(LONG, WIDTH) * 0.3
            )  # rows from LENGTH on never meet a gradient
        elif kind == "sinusoidal":
            self.position = sinusoidal_encoding(LONG, WIDTH).to(profile.device)
        elif kind == "ALiBi":
            self.bias = alibi_bias(HEADS, LONG).to(profile.device)
        elif kind == "RoPE":
            self.table = [t.to(profile.device) for t in rope_cache(LONG, WIDTH // HEADS)]

    def forward(self, ids):
        seq = ids.shape[1]
        x = self.embedding(ids)
        if self.position is not None:
            x = x + self.position[:seq]
        bias = None if self.bias is None else self.bias[:, :seq, :seq]
        for layer in self.layers:
            x = layer(x, self.table, bias)
        return self.embedding.logits(self.norm(x))


def train(kind, text, vocabulary, steps=320, batch=14, seed=0):
    """A trained decoder; batches depend on the seed alone, so all kinds see the same."""
    torch.manual_seed(seed)
    model = Decoder(kind, vocabulary).to(profile.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        first = torch.randint(len(text) - LENGTH, (batch, 1), generator=gen)
        window = text[first + torch.arange(LENGTH + 1)].to(profile.device)
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def loss_by_position(model, windows):
    """Mean loss in nats at each position, (LONG,), over held-out windows (count, LONG + 1)."""
    losses = [
        F.cross_entropy(model(w[:, :-1]).transpose(1, 2), w[:, 1:], reduction="none")
        for w in windows.to(profile.device).split(64)
    ]
    return torch.cat(losses).mean(0).cpu()


documents, held_out = data.split(data.deduplicate(data.documentation()), 0.1)
documents = data.scrub(documents, held_out)
text, fresh = (
    torch.tensor(list("\n\n".join(part.values()).encode())) for part in (documents, held_out)
)
letters = torch.cat([text, fresh]).unique()  # the bytes that occur, numbered
text, fresh = torch.searchsorted(letters, text), torch.searchsorted(letters, fresh)
starts = torch.randint(len(fresh) - LONG, (144, 1), generator=torch.Generator().manual_seed(1))
windows = fresh[starts + torch.arange(LONG + 1)]
curves, trained = {}, {}
for kind in KINDS:
    trained[kind] = train(kind, text, len(letters))
    curves[kind] = loss_by_position(trained[kind], windows)
spans = {"1–16": (0, 16), "17–64": (16, 64), "65–128": (64, 128), "129–256": (128, 256)}
print("loss in nats a byte, at positions " + "".join(f"{name:>10}" for name in spans))
for kind in KINDS:
    print(
        f"{kind:34}"
        + "".join(f"{float(curves[kind][a:b].mean()):10.2f}" for a, b in spans.values())
    )

# %% tags=["experiment", "figure"]
# Figure: the loss of five kinds of position, within L and beyond
fig, axes = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[1.5, 1])
smooth = {
    kind: curve.unfold(0, 16, 4).mean(-1) for kind, curve in curves.items()
}  # mean of 16 positions, every 4
place = torch.arange(LONG).float().unfold(0, 16, 4).mean(-1)
plot.curves(
    place,
    smooth,
    xlabel="position in the window (bytes)",
    ylabel="loss (nats a byte), mean of 16 positions",
    title="trained on 64 bytes, read on 256",
    ax=axes[0],
)
axes[0].axvline(LENGTH, color="#888888", linestyle=":", linewidth=1.2)
axes[0].annotate(
    "L", (LENGTH, axes[0].get_ylim()[1]), textcoords="offset points", xytext=(4, -12), fontsize=9
)
x = torch.arange(len(KINDS))
inside, outside = (
    [float(curves[kind][a:b].mean()) for kind in KINDS] for a, b in ((16, 64), (128, 256))
)
axes[1].vlines(x, inside, outside, color="#999999", linewidth=1.5)
axes[1].plot(x, inside, "o", color=plot.COLORS[0], markersize=8, label="positions 17 to 64")
axes[1].plot(
    x,
    outside,
    "D",
    color=plot.COLORS[1],
    markeredgecolor="black",
    markersize=7,
    label="positions 129 to 256",
)
axes[1].set(
    xticks=x,
    xticklabels=KINDS,
    xlim=(-0.5, len(KINDS) - 0.5),
    ylabel="loss (nats a byte)",
    ylim=(min(inside) - 0.1, max(outside) + 0.25),
)
axes[1].set_title("inside and far outside")
axes[1].legend(loc="upper left", fontsize=8)
plot.caption(
    fig,
    "Held-out documentation, 144 windows; what moves all curves alike is the text. RoPE is best "
    "within the length it was trained on and behind the model without positions far beyond it; "
    "ALiBi goes on as if nothing had happened. Sinusoidal positions jump at L. The learned table "
    "did nothing for this model: its curve is that of no positions.",
)
plt.show()

# %% [markdown]
# **What came out.** Run it with other seeds, too: the order within $L$ and the shapes beyond it
# stay, the second decimal does not.
#
# - **Within $L$**, RoPE learns by far the fastest. ALiBi is second. Sinusoidal addresses help
#   little, and a learned table not at all in 320 steps. (The 2017 paper, after a full training,
#   found the two equally good.)
# - **No positions** is not hopeless: a causal mask lets a token find out how much stands before it,
#   since a mean over three values differs from one over fifty (Kazemnejad et al. 2023). It is poor
#   here all the same.
# - **Beyond $L$**, ALiBi's loss does not change. Sinusoidal jumps at once: the addresses are new,
#   and nothing that was learned about the old ones applies. RoPE holds for some fifty tokens and
#   ends up worse than no positions at all. *Relative* is not the same as *extrapolating*. Heads
#   here have 16 features; pair 3 makes a turn in 199 tokens, so within 64 it never passes 115°. At
#   distance 110 it stands beyond 180°, on a side where no key stood in training.
#
# That last sentence is a hypothesis, and it can be tested without any training. If new
# **distances** are the trouble and not new **positions**, then a RoPE model that may look back only
# 63 tokens must do well at any position, and a sinusoidal model must not be helped by that.
# Predict, then run.

# %% tags=["experiment"]
place = torch.arange(LONG)
near = (place[:, None] >= place) & (
    place[:, None] - place < LENGTH
)  # each token sees itself and the 63 before it
limited = {}
for kind in ("RoPE", "sinusoidal"):
    trained[kind].bias = near[None].to(profile.device)
    limited[kind] = loss_by_position(trained[kind], windows)
    trained[kind].bias = None
    print(
        f"{kind:11} at positions 129 to 256: {float(curves[kind][128:].mean()):.2f} seeing "
        f"everything, {float(limited[kind][128:].mean()):.2f} seeing the last {LENGTH}"
    )

# %% tags=["experiment", "figure"]
# Figure: new positions, or new distances? Two models that may look back 63
fig, ax = plt.subplots(figsize=(7.5, 3.7))
middle = torch.arange(LONG).float().unfold(0, 16, 4).mean(-1)
for kind, color in (("RoPE", plot.COLORS[0]), ("sinusoidal", plot.COLORS[6])):
    ax.plot(
        plot.array(middle),
        plot.array(smooth[kind]),
        color=color,
        linestyle="--",
        label=f"{kind}, sees everything",
    )
    ax.plot(
        plot.array(middle),
        plot.array(limited[kind].unfold(0, 16, 4).mean(-1)),
        color=color,
        linestyle="-",
        label=f"{kind}, sees the last {LENGTH}",
    )
ax.axvline(LENGTH, color="#888888", linestyle=":", linewidth=1.2)
ax.set(xlabel="position in the window (bytes)", ylabel="loss (nats a byte), mean of 16 positions")
ax.set_title("new positions, or new distances?")
ax.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.42))
plot.caption(
    fig,
    "The same two trained models. With distances kept to those of training, RoPE's loss stays "
    "where it was, at positions it never saw. The sinusoidal model is lost either way: what it "
    "never saw are the addresses.",
)
plt.show()

# %% [markdown]
# So it is the distances. Two remedies follow: keep distances short (sliding windows, lesson 10), or
# squeeze the angles of a long text into the range that was trained (position interpolation,
# NTK-aware bases, YaRN: lesson 26).
#
# ## Key questions
#
# ### Exercise · Short answers


# %% exercise="position_numbers" minutes=15 difficulty=2 kind="questions"
def position_numbers() -> dict[str, float | str]:
    """A dictionary of eight answers; numbers to 1 percent.

    "slowest":     RoPE, head_dim 128, base 10,000: after how many tokens has the slowest pair made
        a full turn?
    "unturned":    the same head: how many of its 64 pairs do not complete a turn within 4,096
        tokens?
    "t5":          learned numbers in T5-base's relative bias: 32 buckets, 12 heads, one table
        shared by all layers of the encoder.
    "alibi":       a head with slope 1/16: after how many tokens has the weight of a key of equal
        content fallen to half?
    "tied":        vocabulary 128,256, width 4,096: parameters saved by tying input and output
        embeddings.
    "kernel_us":   turning q and k of 8,192 tokens, 32 and 8 heads of 128 features in bfloat16, at
                   4.8 TB/s: microseconds at the least, cosines and sines neglected.
    "saved":       what must be kept of q and k for the backward pass of RoPE: "both", "the turned
        ones" or "nothing"?
    "cache":       the first 1,000 tokens are dropped from a RoPE model's KV cache and the rest is
                   kept. Must the remaining keys be turned again for the products q·k to stay what
                   they were: "yes" or "no"?
    """
    ### BEGIN SOLUTION
    period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]
    return {
        "slowest": period[-1],
        "unturned": sum(p > 4096 for p in period),
        "t5": 32 * 12,
        "alibi": math.log(2) * 16,
        "tied": 128_256 * 4096,
        "kernel_us": 2 * 2 * 8192 * (32 + 8) * 128 / 4.8e12 * 1e6,
        "saved": "nothing",
        "cache": "no",
    }
    ### END SOLUTION


# %% check="position_numbers" points=2
answers = position_numbers()
checks.close(
    float(answers["t5"]), 384.0, rtol=0.01, what="t5", hint="One number for each bucket and head"
)
### BEGIN HIDDEN TESTS
checks.close(
    float(answers["slowest"]),
    54_410.1,
    rtol=0.01,
    what="slowest",
    hint="Its frequency is 10000^(−126/128)",
    mistakes={
        "taking 10000 itself for the last frequency": 62_831.9,
        "forgetting 2π": 8_659.6,
        "the exponent i/d": 2 * math.pi * 10_000 ** (63 / 128),
    },
)
cos, sin = rope_cache(4097, 128)
first_turn = ((sin[1:] >= 0) & (sin[:-1] < 0)).any(0)  # the sine comes up through 0: once round
checks.close(
    float(answers["unturned"]),
    float((~first_turn).sum()),
    rtol=0,
    atol=0.01,
    what="unturned",
    hint="A full turn takes 2π/ω tokens",
)
checks.close(
    float(answers["alibi"]),
    11.09,
    rtol=0.01,
    what="alibi",
    hint="The factor is e^(−distance/16)",
    mistakes={"a factor of 2 a step": 16.0, "falling to 1/e": 16.0},
)
### END HIDDEN TESTS

# %% check="position_numbers" points=2
answers = position_numbers()
checks.close(
    float(answers["tied"]),
    525_336_576.0,
    rtol=0.01,
    what="tied",
    hint="One matrix (vocabulary, width) instead of two",
)
### BEGIN HIDDEN TESTS
checks.close(
    float(answers["kernel_us"]),
    34.95,
    rtol=0.01,
    what="kernel_us",
    hint="Two bytes in and two out for each number of q and k",
    mistakes={"counting only the reads": 17.48, "queries only": 27.96, "four bytes a number": 69.9},
)
assert answers["saved"] == "nothing", (
    "saved: the gradient is dy turned back. Which of x and y appear in R₋ₚ dy?"
)
assert answers["cache"] == "no", (
    "cache: a product depends on m − n. Does that change when earlier keys are gone?"
)
### END HIDDEN TESTS

# %% [markdown]
# The others are open; write two or three sentences each.
#
# **1.** RoPE turns queries and keys in every layer, sinusoidal positions are added once, at the
# bottom. What does each mean for the values?

# %% [markdown] answer="values-and-positions"
# An added position travels in the residual stream: every layer's values carry it along, mixed with
# the content, and later layers can read where a token stood (or have to learn to ignore it). RoPE
# touches queries and keys only, so what is handed over is free of position, and a layer knows about
# order only through the weights. To pass on *where* something stood, a RoPE model must build that
# information itself.

# %% [markdown]
# **2.** A colleague doubles the base of RoPE from 10,000 to 20,000 in a trained model and finds
# that short texts get slightly worse and long ones better. Why both?

# %% [markdown] answer="larger-base"
# All but the fastest pair turn more slowly. For long texts, angles that had been beyond the trained
# range come back into it, in the slow pairs above all. For short ones each distance now has other
# angles than in training: nearly the same in the fast pairs, up to half in the slow ones, so heads
# that had tuned their phases are a little off. A short finetuning mends it; lesson 26 makes a
# method of this (NTK-aware scaling, and bases of 500,000 from the start).

# %% [markdown]
# **3.** Your model's conversion from interleaved to half-split forgot the biases of the query
# projection. Every unit test of the weights passes. What would you see?

# %% [markdown] answer="forgotten-bias"
# The bias stands in the old order and meets keys whose features stand in the new one, so every
# score gets a wrong term, (bias)·(key), at distance 0 as well, and turned at other pairs' speeds
# elsewhere. How much it hurts depends on how large the biases are: LLaMA has none, and nothing is
# seen; Qwen2 has them in queries, keys and values. A test that catches it: scores of the two
# versions for random inputs at several positions, with biases that are not zero, as the check of
# [](#interleaved_to_half) does.

# %% [markdown]
# **4.** ALiBi extrapolates and RoPE does not; yet most models since 2022 use RoPE. Give two
# reasons.

# %% [markdown] answer="why-rope-won"
# Within the training length RoPE is better, as here, and a model is bought for that. And ALiBi
# "extrapolates" by ignoring what is far away: its loss stays flat because the text beyond a head's
# horizon hardly counts, so a long context brings little. With RoPE a head can look anywhere, and
# the missing range can be added later by a short finetuning at a larger base. A third reason is
# practical: RoPE leaves the score matrix alone, so any attention kernel works unchanged.

# %% [markdown]
# ## References, and what to read in them
#
# - **Vaswani et al. 2017**, *Attention Is All You Need*,
#   [arXiv:1706.03762](https://arxiv.org/abs/1706.03762). Sections 3.4 (tying and √d) and 3.5
#   (sinusoids; table 3, row E: learned ones do as well).
# - **Press and Wolf 2016**, *Using the Output Embedding to Improve Language Models*,
#   [arXiv:1608.05859](https://arxiv.org/abs/1608.05859). What tying does to the gradient of the
#   shared matrix.
# - **Shaw, Uszkoreit, Vaswani 2018**, *Self-Attention with Relative Position Representations*,
#   [arXiv:1803.02155](https://arxiv.org/abs/1803.02155). Section 3: learned vectors for clipped
#   distances, the beginning of the relative line.
# - **Raffel et al. 2019**, T5, [arXiv:1910.10683](https://arxiv.org/abs/1910.10683). Section 2.1,
#   one paragraph on the buckets.
# - **He et al. 2020**, DeBERTa, [arXiv:2006.03654](https://arxiv.org/abs/2006.03654). Section 3.1,
#   and algorithm 1 for the efficient form.
# - **Su et al. 2021**, RoFormer, [arXiv:2104.09864](https://arxiv.org/abs/2104.09864). Section 3.2,
#   with the derivation in 3.4.1 and the bound in 3.4.3.
# - **Press, Smith, Lewis 2021**, ALiBi, [arXiv:2108.12409](https://arxiv.org/abs/2108.12409).
#   Figure 1, and section 3 on the slopes.
# - **Kazemnejad et al. 2023**, *The Impact of Positional Encoding on Length Generalization in
#   Transformers*, [arXiv:2305.19466](https://arxiv.org/abs/2305.19466). Models without positions,
#   and how they count.
# - **Barbero et al. 2024**, *Round and Round We Go! What makes Rotary Positional Encodings
#   useful?*, [arXiv:2410.06205](https://arxiv.org/abs/2410.06205). Decay is not what RoPE is for:
#   fast pairs make positional heads, slow pairs carry content.
# - **Wang et al. 2024**, *When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context
#   Training*, [arXiv:2411.13476](https://arxiv.org/abs/2411.13476). What rounding does to the
#   relative property.
#
# In production: Hugging Face transformers, `models/llama/modeling_llama.py`
# (`LlamaRotaryEmbedding`, `apply_rotary_pos_emb`; half-split) and the weight conversion script
# beside it (`permute`), `models/t5/modeling_t5.py` (`_relative_position_bucket`),
# `models/deberta_v2/modeling_deberta_v2.py`, `models/bloom/modeling_bloom.py` (ALiBi). Kernels:
# `linkedin/Liger-Kernel` (`src/liger_kernel/ops/rope.py`), `Dao-AILab/flash-attention`
# (`flash_attn/ops/triton/rotary.py`), vLLM's `csrc/pos_encoding_kernels.cu`.
