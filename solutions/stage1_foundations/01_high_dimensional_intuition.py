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
#       Six small tools (cosines, power iteration, low rank, effective rank, random projection,
#       randomized SVD) and, with them, what a trained network's weights look like inside.
#     gpu: "Nothing more: every cell takes seconds on a CPU."
# ---

# %% [markdown]
# ## Core ideas
#
# A model never sees a word or a picture. It sees a list of numbers: 64 for a small image of a
# digit, a few thousand for a token inside a language model. Such a list is a **vector**, a point in
# a space of that many dimensions, and whatever the model does with it is geometry. The trouble is
# that we learned geometry on paper, and in hundreds of dimensions paper misleads. Five facts carry
# most of this course:
#
# 1. **Likeness is an angle.** Two vectors that point the same way mean the same thing, however long
#    they are.
# 2. **Random directions are nearly perpendicular.** In 1,000 dimensions almost any two of them are,
#    within five degrees or so. That is why thousands of features fit into one vector without
#    disturbing each other.
# 3. **Dot products grow with the dimension**, like $\sqrt d$. Attention divides by exactly that.
# 4. **A matrix stretches space along perpendicular axes**, and often only a few of them matter.
#    That is **low rank**, and why a finetuned copy of a large model can fit into a few megabytes.
# 5. **Distances survive a random projection.** Throw 3,000 coordinates onto 300 random directions:
#    lengths and distances change by a few percent.
#
# You will build a tool for each, try it on handwritten digits, on the text of Python's own
# documentation and on a photograph, and at the end open a trained network and look at its weights.
#
# **What you need**: Python and school calculus. Everything about vectors, matrices and chance is
# derived here.
#
# ### Notation
#
# The same in all forty lessons; [the notation page](../notation.ipynb) lists all of it.
#
# | written | means |
# |---|---|
# | `(N, D)` | a shape: a tensor of `N` rows and `D` columns. A set of `N` vectors of `D` dimensions is stored one vector a row |
# | $d$ | the dimension of one vector. In attention it is `head_dim`, in the papers $d_k$ |
# | $x \cdot y$, $\lVert x \rVert$ | dot product $\sum_i x_i y_i$; length $\sqrt{x \cdot x}$ |
# | $W^\top$, `w.T` | the transpose: rows become columns. `w.mT` does it to the last two axes of a batch |
# | `x @ y` | matrix product: `(N, D) @ (D, M)` is `(N, M)` |
# | $\mathbb E$, $\operatorname{Var}$ | expectation (the average over chance) and variance |
# | $\lambda_i$, $\sigma_i$ | eigenvalues; singular values, sorted so that $\sigma_1$ is the largest |
# | `generator` | a `torch.Generator`: all chance comes from it, so that the same seed gives the same numbers |

# %%
import math

import matplotlib.pyplot as plt
import torch
from llm40 import checks, data, plot
from torch import Tensor

# %% [markdown]
# ## Where is the volume?
#
# A first surprise, with nothing but school geometry. Peel a ball: how much of it is peel? A ball of
# radius $\rho$ in $d$ dimensions has a volume proportional to $\rho^d$ (two dimensions: area
# $\propto \rho^2$; three: volume $\propto \rho^3$), since each of its $d$ extents grows with
# $\rho$. So what lies inside a slightly smaller ball shrinks with every dimension that is added.


# %% exercise="share_near_surface" minutes=5 difficulty=1
def share_near_surface(d: int, thickness: float) -> float:
    """The share of the volume of a d-dimensional ball of radius 1 that lies at most `thickness`
    from its surface.

    d ≥ 1, 0 ≤ thickness ≤ 1; between 0 and 1.
    """
    ### BEGIN SOLUTION
    return 1 - (1 - thickness) ** d
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what is left</summary>
#
# What is not near the surface is a ball too. What is its radius?
# </details>

# %% check="share_near_surface" points=1
checks.number(
    share_near_surface(2, 0.5),
    0.75,
    what="the share of a disk in the outer half of its radius",
    mistakes={
        "a share of the radius, not of the volume,": 0.5,
        "the share of the inner part": 0.25,
    },
)
### BEGIN HIDDEN TESTS
for d in (1, 3, 17, 50, 768):
    for thickness in (0.0, 0.004, 0.01, 0.3, 1.0):
        radius = torch.linspace(1 - thickness, 1, 200_001, dtype=torch.float64)
        shell = torch.trapezoid(d * radius ** (d - 1), radius)  # the density of the distance
        checks.close(
            share_near_surface(d, thickness),
            shell.item(),
            rtol=1e-5,
            atol=1e-9,
            what=f"the share at d = {d}, thickness {thickness}",
        )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: how much of a ball lies in its peel, by dimension
dimensions = [2**i for i in range(13)]
fig, ax = plt.subplots(figsize=(7.5, 3.6))
shares = {
    f"{100 * thickness:g} % of the radius": [share_near_surface(d, thickness) for d in dimensions]
    for thickness in (0.1, 0.01, 0.001)
}
plot.curves(
    dimensions,
    shares,
    xlabel="dimension d",
    ylabel="share of the volume",
    title="how much of a ball is peel",
    ax=ax,
)
ax.set_xscale("log", base=2)
plot.caption(
    fig,
    "In a thousand dimensions a peel of one percent of the radius holds all but "
    f"{1 - share_near_surface(1000, 0.01):.5f} of the ball. A point drawn from it at random lies "
    "at the rim, never near the center: what tells such points apart is their direction.",
)
plt.show()

# %% [markdown]
# ## Likeness is an angle
#
# Take two vectors $a$ and $b$ and the triangle between their tips. Its third side is $a - b$, and
# multiplying out gives
#
# $$\lVert a - b\rVert^2 = \lVert a\rVert^2 + \lVert b\rVert^2 - 2\,a\cdot b .$$
#
# The law of cosines from school says the same with $2\lVert a\rVert\lVert b\rVert\cos\theta$ in the
# last place. So
#
# $$a \cdot b = \lVert a\rVert\,\lVert b\rVert\cos\theta, \qquad \cos\theta = \frac{a\cdot b}{\lVert a\rVert\,\lVert b\rVert} .$$
#
# Three dimensions or three thousand: two vectors always lie in one plane, so the angle always makes
# sense. Its cosine, the **cosine similarity**, is 1 for the same direction, 0 for perpendicular
# vectors, −1 for opposite ones, and it does not change when a vector gets longer. A page twice as
# long says the same thing twice; its word counts point the same way.
#
# A matrix product is nothing but many dot products at once: entry $(i, j)$ of `x @ y.T` is row $i$
# of `x` with row $j$ of `y`. With `x` of shape `(N, D)` and `y` of shape `(M, D)` all $N \cdot M$
# of them take one call, and no tensor of shape `(N, M, D)` has to exist.


# %% exercise="cosine_similarity_matrix" minutes=15 difficulty=1
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    """The cosine of the angle between every row of x and every row of y.

    x: (N, D) and y: (M, D), both float32 or both float64. Returns (N, M) in that format.

    - The length of a row does not matter from 1e-15 to 1e15, where a float32 holds its square.
    - A row of zeros has no direction: its cosines are 0, never NaN.
    - No tensor larger than x, y and the result is made; x and y are not changed.
    """
    ### BEGIN SOLUTION
    x_length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (N, 1)
    y_length = torch.linalg.vector_norm(y, dim=1, keepdim=True)  # (M, 1)
    # A zero row divided by 1 stays a zero row. Adding a small eps instead would bend the angle of
    # every short row.
    x_unit = x / torch.where(x_length == 0, 1, x_length)
    y_unit = y / torch.where(y_length == 0, 1, y_length)
    return x_unit @ y_unit.T
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: how to get the lengths of all rows</summary>
#
# `torch.linalg.vector_norm(x, dim=1, keepdim=True)` has shape `(N, 1)`, so that dividing `x` of
# shape `(N, D)` by it divides each row by its own length.
# </details>
#
# <details><summary>Hint: NaN in the result</summary>
#
# 0 / 0 is NaN. Look for the rows of length zero first, and divide them by something harmless.
# `torch.where(condition, a, b)` chooses element by element. A small number added to every length
# also avoids NaN, but is wrong for short rows.
# </details>

# %% check="cosine_similarity_matrix" points=2
x = torch.tensor([[3.0, 4.0], [-5.0, 12.0]])  # of lengths 5 and 13
y = torch.tensor([[4.0, 3.0], [-3.0, -4.0], [0.0, 2.0]])
checks.close(
    cosine_similarity_matrix(x, y),
    torch.tensor([[0.96, -1.0, 0.8], [16 / 65, -33 / 65, 12 / 13]]),
    what="the matrix of cosines",
    mistakes={
        "the dot product, without dividing by the lengths,": torch.tensor(
            [[24.0, -25.0, 8.0], [16.0, -33.0, 24.0]]
        ),
        "dividing by the length of x only": torch.tensor(
            [[4.8, -5.0, 1.6], [16 / 13, -33 / 13, 24 / 13]]
        ),
        "dividing by the length of y only": torch.tensor([[4.8, -5.0, 4.0], [3.2, -6.6, 12.0]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for n, m, dim, dtype in [
    (1, 1, 1, torch.float32),
    (7, 1, 5, torch.float32),
    (1, 9, 3, torch.float64),
    (13, 11, 64, torch.float32),
    (5, 5, 2, torch.float64),
]:
    x = torch.randn(n, dim, generator=g, dtype=dtype)
    y = torch.randn(m, dim, generator=g, dtype=dtype)
    expected = torch.nn.functional.cosine_similarity(x.double()[:, None], y.double()[None], dim=-1)
    with checks.unchanged(x=x, y=y), checks.forbidden("cosine_similarity"):
        result = cosine_similarity_matrix(x, y)
    checks.close(
        result,
        expected.to(dtype),
        what=f"the cosines of {n} rows with {m} rows in {dim} dimensions",
        dtype=dtype,
        mistakes={
            "the dot product without dividing": x @ y.T,
            "normalizing columns, not rows,": (x / x.norm(dim=0)) @ (y / y.norm(dim=0)).T,
        },
    )
    # rows that are not next to each other in memory
    strided = cosine_similarity_matrix(torch.stack((x, -x), dim=2)[:, :, 0], y.T.contiguous().T)
    checks.close(strided, expected.to(dtype), what="the cosines of a non-contiguous view")
### END HIDDEN TESTS

# %% check="cosine_similarity_matrix" points=1
x, y = torch.tensor([[1e-9, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
checks.close(
    cosine_similarity_matrix(x, y),
    torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    what="the cosines of a row of length 1e-9 and of a row of zeros",
    hint="Only a row of exactly zero length has no direction.",
    mistakes={
        "dividing a row of zeros by its length, 0 / 0,": torch.tensor(
            [[1.0, math.nan], [math.nan, math.nan]]
        ),
        "adding 1e-8 to the product of the lengths": torch.tensor([[2 / 12, 0.0], [0.0, 0.0]]),
        "adding 1e-8 to each length": torch.tensor([[1 / 11, 0.0], [0.0, 0.0]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
x, y = torch.randn(6, 17, generator=g), torch.randn(4, 17, generator=g)
expected = torch.nn.functional.cosine_similarity(
    x.double()[:, None], y.double()[None], dim=-1
).float()
for scale in (1e-15, 1e-6, 1e15):
    for a, b, name in ((x * scale, y, "x"), (x, y * scale, "y"), (x * scale, y * scale, "x and y")):
        checks.close(
            cosine_similarity_matrix(a, b),
            expected,
            what=f"with {name} scaled by {scale:g} the cosines",
        )
x[2], y[0], expected[2], expected[:, 0] = 0.0, 0.0, 0.0, 0.0
checks.close(
    cosine_similarity_matrix(x, y), expected, what="with a zero row in x and in y the cosines"
)
checks.close(
    cosine_similarity_matrix(torch.zeros(3, 4), torch.zeros(2, 4)),
    torch.zeros(3, 2),
    what="the cosines of nothing but zeros",
)
### END HIDDEN TESTS

# %% check="cosine_similarity_matrix" points=1
# The whole comparison is one matrix product: nothing of size N·M·D is needed.
x, y = torch.ones(60, 50), torch.ones(40, 50)
with checks.allocations() as made:
    cosine_similarity_matrix(x, y)
assert made.largest <= 3000, (
    f"a tensor of {made.largest:,} elements was made; x has 3,000, y 2,000, the result 2,400. "
    "Which operation broadcasts to (N, M, D)?"
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
x, y = torch.randn(90, 33, generator=g), torch.randn(70, 33, generator=g)
with checks.allocations() as made:
    result = cosine_similarity_matrix(x, y)
assert made.largest <= 90 * 70, (
    f"a tensor of {made.largest:,} elements was made; the largest one needed has {90 * 70:,}."
)
checks.close(
    result[89, 69],
    torch.nn.functional.cosine_similarity(x[89].double(), y[69].double(), dim=0).float(),
    what="the last cosine",
    atol=1e-6,
)


def by_angle(x, y):  # the law of cosines, for the gradient
    distance = ((x[:, None] - y[None]) ** 2).sum(-1)
    a, b = (x * x).sum(-1)[:, None], (y * y).sum(-1)[None]
    return (a + b - distance) / (2 * (a * b).sqrt())


checks.gradients(cosine_similarity_matrix, by_angle, x[:5], y[:4], names=("x", "y"), rtol=1e-4)
### END HIDDEN TESTS

# %% [markdown]
# Now use it. First on text: each topic of Python's language reference becomes a vector with one
# coordinate for each word that occurs anywhere in it, and $\log(1 + \text{count})$ as its value
# (the logarithm, because a tenth *the* says less than the first *iterator*). No meaning is put in.
# See what comes out.

# %% tags=["experiment"]
import re
from collections import Counter


def word_vectors(texts: dict[str, str]) -> tuple[list[str], Tensor]:
    """The names of the texts, and log(1 + count) of every word in each of them: (texts, words)."""
    names = {text: name for name, text in texts.items()}  # a text that stands under two names, once
    counts = [Counter(re.findall(r"[a-z_]+", text.lower())) for text in names]
    column = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    vectors = torch.zeros(len(names), len(column))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, column[word]] = math.log1p(times)
    return list(names.values()), vectors


topics, pages = word_vectors(data.documentation())
print(
    f"{pages.shape[0]} pages, {pages.shape[1]:,} words; {100 * (pages == 0).float().mean():.0f} % "
    "of the coordinates are zero"
)

page_cosines = cosine_similarity_matrix(pages, pages)
for topic in ("lambda", "integers", "dict", "import", "while"):
    nearest = page_cosines[topics.index(topic)].argsort(descending=True)[1:4]
    print(
        f"{topic:>9} is nearest to",
        ", ".join(f"{topics[i]} ({page_cosines[topics.index(topic), i]:.2f})" for i in nearest),
    )

# %% tags=["experiment", "figure"]
# Figure: pages that speak of the same things point the same way
statements, numbers = "while for if break continue", "integers floating imaginary numbers"
others = "dict typesmapping lists lambda function class"
shown = [name for name in f"{statements} {numbers} {others}".split() if name in topics]
rows = [topics.index(name) for name in shown]
ax = plot.heatmap(
    page_cosines[rows][:, rows],
    xlabel="topic",
    ylabel="topic",
    xticks=shown,
    yticks=shown,
    vmin=0,
    vmax=1,
    unit="cosine similarity",
    title="Pages that speak of the same things point the same way",
)
plot.caption(
    ax.figure,
    "Cosines of word counts. Dark blocks are topics that share their vocabulary: the statements of "
    "control flow (top left), the literals for numbers (middle).",
)
plt.show()

# %% [markdown]
# Then on pictures: 1,797 handwritten digits of 8×8 pixels, each read as a vector of 64 numbers.
# Which other digits lie in the direction nearest to its own?

# %% tags=["experiment"]
images, labels = data.digits()
pixels = images.flatten(1)  # (1797, 64)
digit_cosines = cosine_similarity_matrix(pixels, pixels)
digit_cosines.fill_diagonal_(-1)  # nobody is their own neighbor
agree = (labels[digit_cosines.argmax(1)] == labels).float().mean()

# %% tags=["experiment", "figure"]
# Figure: the six nearest directions to four of the digits
queries = [int((labels == digit).nonzero()[7]) for digit in (0, 3, 4, 8)]
fig, axes = plt.subplots(len(queries), 7, figsize=(6.6, 4.6))
for row, query in zip(axes, queries, strict=True):
    neighbors = digit_cosines[query].topk(6)
    for ax, index, cosine in zip(
        row, [query, *neighbors.indices], [None, *neighbors.values], strict=True
    ):
        ax.imshow(images[index], cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(
            "query" if cosine is None else f"{cosine:.3f}",
            fontsize=9,
            loc="center",
            fontweight="normal",
        )
        for side in ax.spines.values():
            side.set_visible(cosine is None)
            side.set_linewidth(2)
fig.suptitle(
    "The six nearest directions to a digit, with their cosines",
    x=0.01,
    ha="left",
    fontweight="bold",
    fontsize=11,
)
plot.caption(
    fig,
    "No training at all: the digit whose direction is nearest carries the same label in "
    f"{100 * agree:.1f} % of the 1,797 cases.",
)
plt.show()

# %% [markdown]
# ## Chance in many dimensions {#chance}
#
# What does an angle of 60° mean? On paper, not much: two random arrows are that close or closer a
# third of the time. To know what it means in $d$ dimensions we need two rules about chance. The
# **expectation** $\mathbb E[X]$ is the average over many draws, the **variance**
# $\operatorname{Var}[X] = \mathbb E[(X - \mathbb E[X])^2] = \mathbb E[X^2] - \mathbb E[X]^2$ the
# average squared distance from it; its root, the standard deviation, says how far from the average
# to expect a draw. Then
#
# - expectations add, always: $\mathbb E[X + Y] = \mathbb E[X] + \mathbb E[Y]$;
# - for **independent** $X$ and $Y$ products factor, $\mathbb E[XY] = \mathbb E[X]\,\mathbb E[Y]$,
#   and therefore variances add:
#   $\operatorname{Var}[X + Y] = \operatorname{Var}[X] + \operatorname{Var}[Y]$, because the cross
#   term $2\,\mathbb E[(X - \mathbb E X)(Y - \mathbb E Y)]$ is a product of two zeros.
#
# Now let $q$ and $k$ have $d$ independent coordinates each, with expectation 0 and variance 1. One
# term of the dot product has
#
# $$\mathbb E[q_i k_i] = \mathbb E[q_i]\,\mathbb E[k_i] = 0, \qquad
#   \operatorname{Var}[q_i k_i] = \mathbb E[q_i^2 k_i^2] - 0^2 = \mathbb E[q_i^2]\,\mathbb E[k_i^2]
# = 1 ,$$
#
# and $q \cdot k$ is a sum of $d$ such terms, so
#
# $$\mathbb E[q\cdot k] = 0, \qquad \operatorname{Var}[q \cdot k] = d, \qquad
#   \operatorname{Var}\!\left[\frac{q\cdot k}{\sqrt d}\right] = \frac{d}{(\sqrt d)^2} = 1 .$$
#
# Dividing by $c$ divides a variance by $c^2$: that is why it is the root, and not $d$, that brings
# the scores back to variance 1. This line is the whole reason for the $1/\sqrt{d_k}$ of attention.
# The 2017 paper gives it in a footnote.
#
# The lengths concentrate as well. $\lVert q \rVert^2$ is a sum of $d$ terms of expectation 1, so it
# is about $d$; for normal coordinates its variance is $2d$, so $\lVert q\rVert$ is $\sqrt d$ give
# or take $1/\sqrt 2$, in *any* dimension from ten or so on. Random points live on a thin shell. And
# with both lengths near $\sqrt d$,
#
# $$\cos\theta = \frac{q \cdot k}{\lVert q\rVert\,\lVert k\rVert} \approx \frac{q\cdot k}{d}
#   \quad\text{has standard deviation}\quad \frac{\sqrt d}{d} = \frac{1}{\sqrt d} .$$
#
# At $d = 1000$ that is 0.03, an angle of 90° give or take 1.8°. There 60° is no accident: it lies
# sixteen standard deviations out.


# %% exercise="score_statistics" minutes=15 difficulty=1
def score_statistics(
    d: int, n: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    """How large the dot products of random vectors are, measured.

    Draws n pairs of vectors q and k whose d coordinates are independent standard normal numbers,
    all from `generator` (the global random state of PyTorch is neither used nor changed), and looks
    at their n dot products q·k.

    Returns four numbers: mean and variance of q·k, then mean and variance of q·k / √d for the same
    pairs. The variances are the unbiased ones (divide by n - 1; PyTorch's default). d >= 1, n >= 2.
    """
    ### BEGIN SOLUTION
    q = torch.randn(n, d, generator=generator)
    k = torch.randn(n, d, generator=generator)
    scores = (q * k).sum(dim=1)  # (n,): pair i with pair i; q @ k.T would be all n² of them
    scaled = scores / math.sqrt(d)
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: pairs, not all with all</summary>
#
# `q` and `k` have shape `(n, d)`. Pair $i$ is row $i$ of each: multiply element by element and sum
# over the coordinates.
# </details>
#
# <details><summary>Hint: the same seed must give the same numbers</summary>
#
# `torch.randn(n, d, generator=generator)` draws from the generator you were given.
# </details>

# %% check="score_statistics" points=2
measured = score_statistics(100, 10_000, checks.generator())
assert isinstance(measured, tuple), (
    "a tuple of four numbers is asked for: mean, variance, scaled mean, scaled variance."
)
assert len(measured) == 4, (
    f"four numbers are asked for: mean, variance, scaled mean, scaled variance; yours are "
    f"{len(measured)}."
)
mean, variance, scaled_mean, scaled_variance = map(float, measured)
assert abs(mean) < 0.6, (
    f"the mean of 10,000 dot products in 100 dimensions should be near 0; yours is {mean:.2f}."
)
assert 90 < variance < 110, (
    f"the variance of q·k at d = 100 should be near 100; yours is {variance:.2f}."
    + (" That is the standard deviation." if 9 < variance < 11 else "")
)
assert 0.9 < scaled_variance < 1.1, (
    f"the variance of q·k / √d should be near 1; yours is {scaled_variance:.4f}."
    + (" That is what dividing by d instead of √d gives." if scaled_variance < 0.02 else "")
)
### BEGIN HIDDEN TESTS
# Five standard errors: of the mean √(d/n), of the variance √((2d² + 6d)/n), from the fourth moment
# 3d² + 6d of q·k.
n = 20_000
for d in (1, 3, 64, 200):
    out = score_statistics(d, n, checks.generator(10 + d))
    mean, variance, scaled_mean, scaled_variance = map(float, out)
    assert abs(mean) < 5 * math.sqrt(d / n), (
        f"d = {d}: the mean of q·k is {mean:.3g}, it should be 0 up to sampling error."
    )
    error = 5 * math.sqrt((2 * d * d + 6 * d) / n)
    assert abs(variance - d) < error, (
        f"d = {d}: the variance of q·k is {variance:.4g}; it should be {d} ± {error:.2g}."
    )
    checks.close(
        scaled_mean,
        torch.tensor(mean / math.sqrt(d)).double(),
        rtol=1e-3,
        atol=1e-4,
        what=f"d = {d}: the mean of q·k / √d",
        hint="The scaled scores are those of the same pairs.",
    )
    checks.close(
        scaled_variance,
        torch.tensor(variance / d).double(),
        rtol=1e-4,
        what=f"d = {d}: the variance of q·k / √d",
        hint="The scaled scores are those of the same pairs.",
        mistakes={"dividing by d": variance / d**2} if d > 1 else None,
    )
### END HIDDEN TESTS

# %% check="score_statistics" points=1
first = score_statistics(8, 50, checks.generator(5))
assert first == score_statistics(8, 50, checks.generator(5)), (
    "the same seed gives other numbers: do all draws come from `generator`?"
)
assert first != score_statistics(8, 50, checks.generator(6)), (
    "another seed gives the same numbers: are they drawn at all?"
)
### BEGIN HIDDEN TESTS
checks.uses_generator(lambda g: score_statistics(8, 50, g), what="score_statistics")
g, d = checks.generator(20), 16
means = torch.tensor([float(score_statistics(d, 50, g)[0]) for _ in range(400)])
# The mean of n scores scatters by √(d/n): 20 % is more than five standard errors of 400
# repetitions.
expected = math.sqrt(d / 50)
assert abs(means.std().item() / expected - 1) < 0.2, (
    f"over 400 repetitions the mean of 50 scores scatters by {means.std().item():.3f}; for "
    f"independent pairs it is {expected:.3f}."
)
few = torch.tensor([float(score_statistics(d, 5, g)[1]) for _ in range(2500)])
assert abs(few.mean().item() / d - 1) < 0.1, (
    f"over 2,500 repetitions the variance of 5 scores is {few.mean().item():.2f} on average, it "
    f"should be {d}."
    + (
        " This is what dividing by n instead of n - 1 gives."
        if abs(few.mean().item() / d - 0.8) < 0.1
        else ""
    )
)
# In one dimension a product of two normal numbers has kurtosis 9, of two uniform ones 3.24: the
# variance of 5 products scatters by 1.30 and by 0.74.
few = torch.tensor([float(score_statistics(1, 5, g)[1]) for _ in range(2500)])
assert few.std().item() > 0.95, (
    f"d = 1: over 2,500 repetitions the variance of 5 scores scatters by {few.std().item():.2f}; "
    "for normal coordinates it is about 1.3. Are they drawn from a normal distribution?"
)
### END HIDDEN TESTS

# %% [markdown]
# Two pictures from these functions. First the angles between all pairs of 400 random vectors, for
# $d = 2$, 10, 100 and 1000. Where on paper every angle is as likely as any other, in many
# dimensions only one is left. The thin lines are the exact density, proportional to
# $\sin^{d-2}\theta$: a factor $\sin\theta$ for each further dimension, because there is that much
# more room at the equator than at the poles.
#
# Then the digits. Their 64 pixels are not independent (neighbors are dark together), so their
# directions have less room than 64 random coordinates would have. How much less can be read off the
# spread of their angles.


# %% tags=["experiment"]
def pair_angles(vectors: Tensor) -> Tensor:
    """The angles in degrees between all pairs of rows."""
    cosines = cosine_similarity_matrix(vectors, vectors)
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return cosines[first, second].clamp(-1, 1).acos().rad2deg()


centered = pixels - pixels.mean(0)
digit_angles = pair_angles(centered)
equivalent = 1 / digit_angles.deg2rad().cos().var().item()  # d random directions spread by 1/√d

# %% tags=["experiment", "figure"]
# Figure: angles of random vectors crowd at 90°, those of digits spread
g = torch.Generator().manual_seed(0)
fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.7))
theta = torch.linspace(0.5, 179.5, 2000)
for d, color, dash in zip((2, 10, 100, 1000), plot.COLORS, plot.DASHES, strict=False):
    left.hist(
        pair_angles(torch.randn(400, d, generator=g)).numpy(),
        bins=torch.arange(0, 181, 2 if d < 1000 else 1).numpy(),
        density=True,
        histtype="step",
        linewidth=1.8,
        color=color,
        linestyle=dash,
        label=f"d = {d}",
    )
    log_density = (d - 2) * theta.deg2rad().sin().log()
    density = (log_density - log_density.logsumexp(0)).exp() / (theta[1] - theta[0])
    left.plot(theta, density, color="#888888", linewidth=0.7, linestyle="-")
left.set(
    xlabel="angle between two random vectors (degrees)",
    ylabel="density (per degree)",
    xticks=range(0, 181, 30),
)
left.set_title("In many dimensions nearly all angles are 90°")
left.legend()

bins = torch.arange(0, 181, 3).numpy()
right.hist(
    digit_angles.numpy(),
    bins=bins,
    density=True,
    color="#bbbbbb",
    label="digits, their mean taken away",
)
for d, color, dash in ((64, plot.COLORS[0], "-"), (round(equivalent), plot.COLORS[1], "--")):
    right.hist(
        pair_angles(torch.randn(800, d, generator=g)).numpy(),
        bins=bins,
        density=True,
        histtype="step",
        linewidth=1.8,
        color=color,
        linestyle=dash,
        label=f"random, d = {d}",
    )
right.set(
    xlabel="angle between two digits (degrees)",
    ylabel="density (per degree)",
    xticks=range(0, 181, 30),
)
right.set_title(f"64 pixels, as wide as {round(equivalent)} random directions")
right.legend(loc="upper left", fontsize=8)
right.set_ylim(0, 0.085)
plot.caption(
    fig,
    "Left: 79,800 pairs for each d; thin grey lines: the exact density. The spread nears 57°/√d. "
    f"Right: the angles between digits spread as those of {equivalent:.1f} independent coordinates "
    "would, with a longer tail of small angles: two digits of one kind.",
)
plt.show()

# %% [markdown]
# Now the scores. Attention (lesson 09) turns the scores of one query against many keys into weights
# that sum to 1 with the **softmax**, $w_j = e^{s_j} / \sum_i e^{s_i}$. The exponential makes
# differences into ratios: a lead of 1 is a factor of 2.7, a lead of 20 a factor of half a billion.
# Before you run the cell: with 64 random keys, no key deserves more than the others. What share
# will the largest weight have at $d = 1024$, with and without the $\sqrt d$?

# %% tags=["experiment"]
dims = [2**i for i in range(0, 11)]
g = torch.Generator().manual_seed(1)
measured = torch.tensor([score_statistics(d, 2000, g) for d in dims])
largest = {"q·k": [], "q·k / √d": []}
for d in dims:
    q, keys = torch.randn(200, 1, d, generator=g), torch.randn(200, 64, d, generator=g)
    scores = (q * keys).sum(-1)  # (200 queries, 64 keys)
    largest["q·k"].append(scores.softmax(-1).amax(-1).mean())
    largest["q·k / √d"].append((scores / math.sqrt(d)).softmax(-1).amax(-1).mean())
print(
    f"d = 1024: the largest weight is {largest['q·k'][-1]:.2f} unscaled, "
    f"{largest['q·k / √d'][-1]:.2f} scaled"
)

# %% tags=["experiment", "figure"]
# Figure: scores and the largest softmax weight, with and without √d
fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6))
plot.curves(
    dims,
    {
        "q·k, measured": measured[:, 1].sqrt(),
        "√d": [math.sqrt(d) for d in dims],
        "q·k / √d, measured": measured[:, 3].sqrt(),
    },
    xlabel="dimension d",
    ylabel="standard deviation of the scores",
    title="Dot products grow like √d",
    logx=True,
    logy=True,
    ax=left,
)
plot.curves(
    dims,
    largest,
    xlabel="dimension d",
    ylabel="largest of 64 softmax weights",
    logx=True,
    title="and the softmax sees only one key",
    ax=right,
)
right.axhline(1 / 64, color="#888888", linewidth=1, linestyle=":")
right.annotate(
    "1/64: all alike",
    (1, 1 / 64),
    xytext=(0, 4),
    textcoords="offset points",
    fontsize=8,
    color="#555555",
)
right.set_ylim(0, 1)
plot.caption(
    fig,
    "Random queries and keys. Unscaled, the largest weight rises towards 1 although no key is "
    "better than another; divided by √d it does not depend on the dimension.",
)
plt.show()

# %% [markdown]
# ## What a matrix does: power iteration {#power-iteration}
#
# A matrix $A$ of shape `(n, n)` maps a vector $v$ to $Av$. Most vectors are turned. A direction
# that is only stretched,
#
# $$A q = \lambda q, \qquad q \neq 0,$$
#
# is an **eigenvector**, and $\lambda$, its **eigenvalue**, is the stretch (negative: flipped). For
# a **symmetric** matrix, $A = A^\top$, everything is as nice as it can be: there are $n$
# eigenvectors $q_1, \dots, q_n$, perpendicular to each other, and they can be taken of length 1.
# They are a system of axes in which $A$ only stretches. In matrices, with the $q_i$ as the columns
# of $Q$, $A = Q \Lambda Q^\top$ with $Q^\top Q = I$ and the eigenvalues on the diagonal of
# $\Lambda$.
#
# Why perpendicular?
# $\lambda_1\,(q_1\cdot q_2) = (Aq_1)\cdot q_2 = q_1 \cdot (A q_2) = \lambda_2\,(q_1\cdot q_2)$,
# where the middle step is symmetry. If $\lambda_1 \neq \lambda_2$, only $q_1\cdot q_2 = 0$ is left.
#
# The oldest way to find the largest one is to apply $A$ again and again. Write any start in these
# axes, $v = \sum_i c_i q_i$. After $s$ applications
#
# $$A^s v = \sum_i c_i \lambda_i^s q_i = \lambda_1^s\Big(c_1 q_1 + \sum_{i>1} c_i \Big(\frac{\lambda_i}{\lambda_1}\Big)^{\!s} q_i\Big) .$$
#
# With $|\lambda_1| > |\lambda_2| \ge \dots$ every ratio is below 1 and its power dies: what is left
# points along $q_1$. Only $c_1 \neq 0$ is needed, which a random start gives. The length
# $|\lambda_1|^s$ explodes or vanishes meanwhile, so each step divides by it.
#
# The eigenvalue comes from the **Rayleigh quotient** $v\cdot Av / v\cdot v$, which is $\lambda$
# when $v$ is an eigenvector. It knows the sign; the length $\lVert Av\rVert$ does not. And it is
# better than $v$ itself: put $v = q_1 + \delta$ with a small perpendicular $\delta$ and the terms
# linear in $\delta$ vanish, so that an error of $10^{-3}$ in $v$ is one of about $10^{-6}$ in
# $\lambda$.


# %% exercise="power_iteration" minutes=25 difficulty=2
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The eigenvalue of largest absolute value of a symmetric matrix, and its eigenvector.

    a: (n, n), symmetric, n >= 1, float32 or float64; steps >= 1. Starts from the n standard normal
    numbers `torch.randn(n, generator=generator, dtype=a.dtype)` and multiplies by `a` and
    normalizes to length 1 `steps` times.

    Returns (eigenvalue, eigenvector) in the format of `a`: a tensor of shape () and one of shape
    (n,) and length 1. The eigenvalue is the Rayleigh quotient of the vector returned; it is
    negative where the dominant eigenvalue is. For the zero matrix it is 0, with some vector of
    length 1. `a` is not changed.
    """
    ### BEGIN SOLUTION
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    v = v / v.norm()
    for _ in range(steps):
        product = a @ v
        length = product.norm()
        if length == 0:  # v is mapped to zero: it is an eigenvector, of eigenvalue 0
            break
        v = product / length
    return v @ a @ v, v
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the numbers overflow</summary>
#
# Divide by the length in every step, not only at the end: $|\lambda|^{500}$ does not fit into a
# float32.
# </details>
#
# <details><summary>Hint: the sign is wrong</summary>
#
# When $\lambda_1 < 0$ the vector flips at every step. The length of $Av$ cannot tell; $v \cdot Av$
# can.
# </details>

# %% check="power_iteration" points=2
a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # stretches (1, 1) by 3 and (1, -1) by 1
value, vector = power_iteration(a, 30, checks.generator())
checks.close(value, torch.tensor(3.0), what="the dominant eigenvalue of [[2, 1], [1, 2]]")
checks.close(
    vector.abs(),
    torch.tensor([0.5, 0.5]).sqrt(),
    what="the eigenvector, up to its sign",
    mistakes={"a vector that is not normalized": torch.tensor([1.0, 1.0])},
)
value, _ = power_iteration(-a, 30, checks.generator())
checks.close(
    value,
    torch.tensor(-3.0),
    what="the dominant eigenvalue of the negative matrix",
    mistakes={"the length of Av, which has no sign,": torch.tensor(3.0)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(30)
library = ("linalg_eigh", "linalg_eig", "linalg_svd", "linalg_eigvalsh", "matrix_power", "lobpcg")
for n, ratio, sign, dtype in [
    (1, 0.5, 1, torch.float64),
    (2, 0.3, -1, torch.float64),
    (9, 0.6, 1, torch.float32),
    (40, 0.7, -1, torch.float64),
    (40, -0.8, 1, torch.float32),
]:
    # Known axes from a QR decomposition, known eigenvalues: the dominant one ±2.5, the next |ratio|
    # times that.
    axes = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    values = torch.rand(n, generator=g, dtype=torch.float64) * 0.2
    values[0] = 1.0
    if n > 1:
        values[1] = ratio
    a = (2.5 * sign * axes * values) @ axes.T
    a = ((a + a.T) / 2).to(dtype)
    reference = torch.linalg.eigh(a.double())
    top = reference.eigenvalues.abs().argmax()
    with checks.unchanged(a=a), checks.forbidden(*library):
        value, vector = power_iteration(a, 200, checks.generator(31))
    rtol = 1e-8 if dtype == torch.float64 else 1e-5
    checks.close(
        value,
        reference.eigenvalues[top].to(dtype),
        rtol=rtol,
        dtype=dtype,
        what=f"the dominant eigenvalue at n = {n}",
        mistakes={
            "the absolute value of the eigenvalue": reference.eigenvalues[top].abs().to(dtype)
        },
    )
    assert tuple(vector.shape) == (n,), (
        f"the shape of the eigenvector is {tuple(vector.shape)}, it should be {(n,)}."
    )
    alignment = (vector.double() @ reference.eigenvectors[:, top]).abs()
    checks.close(
        alignment,
        torch.tensor(1.0).double(),
        rtol=max(rtol, 1e-6),
        what=f"n = {n}: |cosine| with the eigenvector of torch.linalg.eigh",
    )
    checks.close(
        vector.norm(), torch.tensor(1.0).to(dtype), rtol=1e-5, what="the length of the eigenvector"
    )
### END HIDDEN TESTS

# %% check="power_iteration" points=1
# After few steps it is not there yet, and the formula above says exactly where it is.
a = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
start, unit = torch.randn(3, generator=checks.generator(32)), torch.nn.functional.normalize
checks.close(
    power_iteration(a, 2, checks.generator(32))[1],
    unit(torch.tensor([16.0, 4.0, 1.0]) * start, dim=0),  # two steps: c_i λ_i²
    what="the vector after 2 steps",
    hint="Is the start the one in the docstring, and are there exactly `steps` products?",
    mistakes={
        "one step too few": unit(torch.tensor([4.0, 2.0, 1.0]) * start, dim=0),
        "one step too many": unit(torch.tensor([64.0, 8.0, 1.0]) * start, dim=0),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(33)
for n, steps in ((5, 1), (12, 3), (40, 6)):  # from 16 on, float32 draws other numbers than float64
    b = torch.randn(n, n, generator=g, dtype=torch.float64)
    a = b + b.T
    values, axes = torch.linalg.eigh(a)
    start = torch.randn(n, generator=checks.generator(34), dtype=torch.float64)
    expected = axes @ (values**steps * (axes.T @ start))  # A^s v in the eigenvectors' axes
    expected = expected / expected.norm()
    value, vector = power_iteration(a, steps, checks.generator(34))
    checks.close(vector, expected, what=f"n = {n}: the vector after {steps} steps")
    quotient = (values * (axes.T @ expected) ** 2).sum()
    checks.close(
        value,
        quotient,
        atol=1e-9 * float(values.abs().max()),
        what=f"n = {n}: the Rayleigh quotient of the vector after {steps} steps",
        mistakes={
            "the length of A v": (a @ expected).norm(),
            "the quotient of the vector before the last step": (
                values ** (2 * steps - 1) * (axes.T @ start) ** 2
            ).sum()
            / (values ** (2 * steps - 2) * (axes.T @ start) ** 2).sum(),
        },
    )
    strided = torch.stack((a, a + 1), dim=-1)[..., 0]
    again = power_iteration(strided, steps, checks.generator(34))
    checks.close(again[1], expected, what=f"n = {n}: the vector for a non-contiguous view of a")
checks.uses_generator(lambda g: power_iteration(a, 1, g), what="power_iteration")
### END HIDDEN TESTS

# %% check="power_iteration" points=1
value, vector = power_iteration(torch.zeros(3, 3), 5, checks.generator())
checks.close(value, torch.tensor(0.0), what="the eigenvalue of the zero matrix")
checks.close(vector.norm(), torch.tensor(1.0), what="the length of the vector for the zero matrix")
### BEGIN HIDDEN TESTS
# Large and small eigenvalues, many steps: neither overflow nor underflow.
for scale, dtype in (
    (1e3, torch.float32),
    (1e-3, torch.float32),
    (1e-12, torch.float32),
    (1e-40, torch.float64),
):
    a = scale * torch.tensor([[1.0, 0.0], [0.0, -3.0]], dtype=dtype)
    value, vector = power_iteration(a, 400, checks.generator(35))
    checks.close(
        value,
        torch.tensor(-3.0 * scale, dtype=dtype),
        what=f"the eigenvalue of a matrix scaled by {scale:g} after 400 steps",
        hint="Is the vector normalized at every step, and is only a zero taken for zero?",
    )
# Eigenvalue 2 along (0, 0, 1, -1), 1 along (1, 1, 1, 1): a fixed start of ones, or the first axis,
# misses the first.
a = torch.zeros(4, 4)
a[2:, 2:] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
value, vector = power_iteration(a + 0.25 * torch.ones(4, 4), 60, checks.generator(36))
checks.close(
    value,
    torch.tensor(2.0),
    what="the dominant eigenvalue where its axis is perpendicular to (1, 1, 1, 1)",
    hint="Does the start come from the generator?",
)
# A repeated eigenvalue: the vector is not unique, but A v = λ v holds.
axes = torch.linalg.qr(torch.randn(6, 6, generator=checks.generator(37))).Q
a = axes @ torch.diag(torch.tensor([-2.0, -2.0, 1.0, 0.5, 0.0, 0.0])) @ axes.T
value, vector = power_iteration((a + a.T) / 2, 80, checks.generator(38))
checks.close(value, torch.tensor(-2.0), what="a repeated dominant eigenvalue")
checks.close(
    (a + a.T) / 2 @ vector, -2 * vector, rtol=1e-4, what="A v where the eigenvalue is repeated"
)
### END HIDDEN TESTS

# %% [markdown]
# A use on real data. The **covariance** of the digits is the (64, 64) matrix
# $C = X_c^\top X_c / (N - 1)$, where $X_c$ holds the digits with their mean taken away. It is
# symmetric, and $u \cdot C u$ is the variance of the digits along a direction $u$ of length 1. So
# its dominant eigenvector is the direction in which digits differ most, the first **principal
# component**; and being a vector of 64 pixels, it is a picture.

# %% tags=["experiment"]
covariance = centered.T @ centered / (len(centered) - 1)
steps = list(range(1, 202, 4))
runs = [power_iteration(covariance, s, torch.Generator().manual_seed(3)) for s in steps]
spectrum, axes_ = torch.linalg.eigh(covariance.double())
value_error = [abs(value.item() / spectrum[-1].item() - 1) + 1e-16 for value, _ in runs]
top_axis = axes_[:, -1]
angle_error = [
    (vector.double() - (vector.double() @ top_axis) * top_axis).norm().item() for _, vector in runs
]
ratio = (spectrum[-2] / spectrum[-1]).item()

# %% tags=["experiment", "figure"]
# Figure: a circle becomes an ellipse, and each step shrinks the rest
stretch = torch.tensor([[1.3, 0.45], [0.45, 0.8]])
circle = torch.stack(
    [torch.linspace(0, 2 * math.pi, 200).cos(), torch.linspace(0, 2 * math.pi, 200).sin()]
)
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11.4, 3.6), width_ratios=(1.1, 1.5, 0.8))
left.plot(*circle, color="#999999", linewidth=1, linestyle="-")
left.plot(*(stretch @ circle), color=plot.COLORS[0], linestyle="-")
start = torch.randn(2, generator=torch.Generator().manual_seed(8))
path = [start / start.norm()] + [
    power_iteration(stretch, s, torch.Generator().manual_seed(8))[1] for s in (1, 2, 12)
]
for vector, name, shade in zip(
    path,
    ("start", "1 step", "2 steps", "12 steps"),
    ("#bbbbbb", "#909090", "#606060", "#000000"),
    strict=True,
):
    left.annotate(
        "",
        vector.tolist(),
        (0, 0),
        arrowprops={"arrowstyle": "-|>", "color": shade, "linewidth": 1.6},
    )
    left.annotate(
        name,
        (1.08 * vector).tolist(),
        fontsize=8,
        ha="left" if vector[0] > 0 else "right",
        va="center",
        color="black",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )
left.set_aspect("equal")
left.set(xlabel="$v_1$", ylabel="$v_2$", xlim=(-2.1, 2.1), ylim=(-1.5, 1.5))
left.set_title("A circle becomes an ellipse")
plot.curves(
    steps,
    {
        "sine of the angle to $q_1$": angle_error,
        "relative error of $\\lambda_1$": value_error,
        "$(\\lambda_2/\\lambda_1)^s$": [max(ratio**s, 1e-9) for s in steps],
    },
    xlabel="steps s",
    ylabel="error",
    logy=True,
    title="Each step shrinks the rest",
    ax=middle,
)
middle.set_ylim(3e-9, 3)
right.imshow(runs[-1][1].reshape(8, 8), cmap=plot.DIVERGING, vmin=-0.4, vmax=0.4)
right.set(xticks=[], yticks=[])
right.grid(False)
right.set_title(
    f"$q_1$ of the digits:\n{100 * runs[-1][0] / covariance.trace():.0f} % of their variance"
)
plot.caption(
    fig,
    "Left: repeated products turn any start (grey) towards the long axis (black). Middle: on the "
    f"covariance of the digits, where λ₂/λ₁ = {ratio:.2f}, the angle follows the ratio's power and "
    "the eigenvalue its square, down to float32's precision. Right: the direction in which digits "
    "differ most.",
)
plt.show()

# %% [markdown]
# ## Any matrix: singular values and low rank {#low-rank}
#
# A weight matrix $W$ of shape `(m, n)` is neither square nor symmetric, but $W^\top W$ is both.
# Take its eigenvectors $v_1, v_2, \dots$ (shape `(n,)` each) with eigenvalues sorted downwards. The
# eigenvalues are not negative, because $v_i\cdot W^\top W v_i = \lVert W v_i\rVert^2 = \lambda_i$;
# call $\sigma_i = \sqrt{\lambda_i}$ the **singular values**. The images $W v_i$ have these lengths,
# and they are perpendicular as well:
# $W v_i \cdot W v_j = v_i\cdot W^\top W v_j = \lambda_j\, v_i \cdot v_j = 0$. With
# $u_i = W v_i / \sigma_i$ (where $\sigma_i = 0$, any further perpendicular direction does) that
# reads $W v_i = \sigma_i u_i$, which is the **singular value decomposition**
#
# $$W = U \Sigma V^\top = \sum_{i=1}^{\min(m,n)} \sigma_i\, u_i v_i^\top .$$
#
# Every matrix turns one set of perpendicular axes into another and stretches in between. Cut the
# sum after $r$ terms and you have a matrix of **rank** $r$: all it can produce is a combination of
# $r$ directions. It is stored as two thin factors, $r(m + n)$ numbers instead of $mn$.
#
# **No other matrix of rank $r$ is closer to $W$** (Eckart and Young, 1936). Distance is measured by
# the Frobenius norm, $\lVert W\rVert_F^2 = \sum_{ij} W_{ij}^2 = \sum_i \sigma_i^2$. The proof fits
# here. Let $B$ have rank $r$, and let the $r$ columns of $P$, shape `(n, r)`, be perpendicular
# directions of length 1 that span its rows. Row by row, the best that can be done inside that span
# is the projection, so
# $\lVert W - B\rVert_F^2 \ge \lVert W - WPP^\top\rVert_F^2
# = \lVert W\rVert_F^2 - \lVert WP\rVert_F^2$
# by Pythagoras. Now
#
# $$\lVert WP\rVert_F^2 = \sum_i \sigma_i^2\, \lVert P^\top v_i\rVert^2 = \sum_i \sigma_i^2\, t_i, \qquad 0 \le t_i \le 1,\quad \sum_i t_i \le r :$$
#
# each $t_i$ is the squared length of a projection of a vector of length 1, and together they are at
# most $\lVert P\rVert_F^2 = r$. We have a budget of $r$ to spend on the $\sigma_i^2$, at most 1 on
# each. The most it can buy is the $r$ largest. So the error is at least
#
# $$\lVert W - B\rVert_F^2 \;\ge\; \sum_{i > r} \sigma_i^2 ,$$
#
# and cutting the sum after $r$ terms reaches it.


# %% exercise="low_rank_approximation" minutes=20 difficulty=2
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by one of rank at most `rank`, as two factors.

    w: (m, n), float32 or float64. Returns a: (m, rank) and b: (rank, n) in that format, such that
    no matrix of this rank is closer to w than `a @ b` in the Frobenius norm, to the rounding of
    w's largest σ (eigenvectors of wᵀw are coarser). How σ is shared between a and b is free.

    The two own rank · (m + n) numbers of memory and no more: neither may be a view of a larger
    tensor, which would keep that tensor alive. `torch.linalg.svd` may be used. `w` is not changed.
    Raises ValueError unless 1 <= rank <= min(m, n).
    """
    ### BEGIN SOLUTION
    if not 1 <= rank <= min(w.shape):
        raise ValueError(
            f"rank is {rank}; for a matrix of shape {tuple(w.shape)} it can be 1 to {min(w.shape)}"
        )
    # (m, p), (p,), (p, n) with p = min(m, n)
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    a = u[:, :rank] * sigma[:rank]  # a product is new memory
    b = vh[:rank].clone()  # a slice is a view of all of vh
    return a, b
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what torch.linalg.svd returns</summary>
#
# `u, sigma, vh = torch.linalg.svd(w, full_matrices=False)`: the $u_i$ are the *columns* of `u`, the
# $v_i$ the *rows* of `vh` (the h stands for the conjugate transpose: it is already transposed), and
# `sigma` is sorted downwards. Multiplying `(m, r) * (r,)` scales the columns.
# </details>
#
# <details><summary>Hint: memory</summary>
#
# `vh[:rank]` shows a part of `vh` and keeps all of it. `.clone()` copies what is shown. The same
# holds when such a slice is saved to a file.
# </details>

# %% check="low_rank_approximation" points=2
w = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])  # σ = 3 and 2
a, b = low_rank_approximation(w, 1)
assert tuple(a.shape) == (2, 1), f"the shape of a is {tuple(a.shape)}, it should be {(2, 1)}."
assert tuple(b.shape) == (1, 3), f"the shape of b is {tuple(b.shape)}, it should be {(1, 3)}."
checks.close(
    a @ b,
    torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    what="a @ b",
    mistakes={
        "keeping the smallest singular value": torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]),
        "leaving out the singular value": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        "multiplying the singular value into both factors": torch.tensor(
            [[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(40)
for m, n, rank, dtype in [
    (1, 1, 1, torch.float64),
    (1, 7, 1, torch.float32),
    (6, 1, 1, torch.float64),
    (9, 4, 3, torch.float64),
    (5, 12, 2, torch.float64),
    (30, 17, 16, torch.float32),
    (8, 8, 8, torch.float64),
    (23, 40, 5, torch.float32),
]:
    # Random axes, singular values 3, 2.1, 1.47, …: between neighbors there is a gap, so that the
    # best answer is unique.
    u, v = (
        torch.linalg.qr(torch.randn(side, min(m, n), generator=g, dtype=torch.float64)).Q
        for side in (m, n)
    )
    w = ((u * 3 * 0.7 ** torch.arange(min(m, n))) @ v.T).to(dtype)
    with checks.unchanged(w=w):
        a, b = low_rank_approximation(w, rank)
    assert tuple(a.shape) == (m, rank), (
        f"the shape of a for a matrix ({m}, {n}) is {tuple(a.shape)}, it should be {(m, rank)}."
    )
    assert tuple(b.shape) == (rank, n), (
        f"the shape of b for a matrix ({m}, {n}) is {tuple(b.shape)}, it should be {(rank, n)}."
    )
    assert a.dtype == b.dtype == dtype, f"the factors should have the format of w, {dtype}."
    # The rows of w projected onto the eigenvectors of wᵀw of the largest eigenvalues: no SVD
    # involved.
    top = torch.linalg.eigh(w.double().T @ w.double()).eigenvectors[:, -rank:]
    best = w.double() @ top @ top.T
    checks.close(
        a @ b,
        best.to(dtype),
        rtol=1e-9 if dtype == torch.float64 else 2e-5,
        what=f"a @ b at shape ({m}, {n}) and rank {rank}",
    )
    left_over = torch.linalg.svdvals(w.double())[rank:].square().sum()
    error = (w.double() - a.double() @ b.double()).square().sum()
    checks.close(
        error,
        left_over,
        rtol=1e-5,
        atol=1e-9 * float(w.square().sum()),
        what=f"the squared error at shape ({m}, {n}), rank {rank}",
    )
# Small singular values: their squares are lost beside the largest, and eigenvectors of wᵀw with
# them.
for sigma, dtype in (
    ([1, 1e-2, 2e-5, 2e-6], torch.float32),
    ([1, 1e-6, 1e-10, 1e-13], torch.float64),
):
    u, v = (
        torch.linalg.qr(torch.randn(n, 4, generator=g, dtype=torch.float64)).Q for n in (20, 12)
    )
    w = ((u * torch.tensor(sigma, dtype=torch.float64)) @ v.T).to(dtype)
    a, b = low_rank_approximation(w, 3)
    error = float((w.double() - a.double() @ b.double()).norm())
    assert error < 3 * sigma[3], (
        f"singular values {sigma}, rank 3: the error is {error:.1e}, the best is {sigma[3]:.0e}"
    )
# A view whose rows are not next to each other, and a matrix of lower rank than asked for.
w = torch.randn(14, 20, generator=g)[::2, ::3]
a, b = low_rank_approximation(w, 3)
checks.close(
    (w - a @ b).square().sum().double(),
    torch.linalg.svdvals(w.double())[3:].square().sum(),
    rtol=1e-4,
    what="the squared error for a view",
)
w = torch.outer(torch.arange(5.0), torch.arange(4.0))
a, b = low_rank_approximation(w, 3)
checks.close(a @ b, w, what="a @ b for a matrix of rank 1 at rank 3")
### END HIDDEN TESTS

# %% check="low_rank_approximation" points=1
a, b = low_rank_approximation(torch.ones(50, 40), 2)
owned = a.untyped_storage().nbytes() // 4, b.untyped_storage().nbytes() // 4
assert owned == (100, 80), (
    f"a and b should own 100 and 80 numbers; they keep {owned[0]} and {owned[1]} alive: a slice "
    f"is a view "
    "of the whole tensor."
)
### BEGIN HIDDEN TESTS
for shape, rank in (((12, 30), 1), ((30, 12), 5), ((9, 9), 8)):
    a, b = low_rank_approximation(
        torch.randn(*shape, generator=checks.generator(41), dtype=torch.float64), rank
    )
    kept = a.untyped_storage().nbytes() // 8 + b.untyped_storage().nbytes() // 8
    assert kept == rank * sum(shape), (
        f"at shape {shape} and rank {rank} the factors keep {kept} numbers, not "
        f"{rank * sum(shape)}."
    )
    checks.close(torch.linalg.matrix_rank(a @ b), torch.tensor(rank), what="the rank of a @ b")
### END HIDDEN TESTS

# %% check="low_rank_approximation" points=1
checks.raises(
    ValueError, low_rank_approximation, torch.ones(3, 5), 0, because="Rank 0 leaves nothing."
)
### BEGIN HIDDEN TESTS
checks.raises(
    ValueError,
    low_rank_approximation,
    torch.ones(3, 5),
    4,
    because="A (3, 5) matrix has rank 3 at most.",
)
checks.raises(
    ValueError,
    low_rank_approximation,
    torch.ones(5, 3),
    4,
    because="A (5, 3) matrix has rank 3 at most.",
)
checks.raises(
    ValueError,
    low_rank_approximation,
    torch.ones(5, 3),
    -1,
    because="A negative rank would slice from the end.",
)
a, b = low_rank_approximation(torch.eye(3), 3)
checks.close(a @ b, torch.eye(3), what="a @ b at full rank")
noise = torch.randn(60, 40, generator=checks.generator(49), dtype=torch.float64)
a, b = low_rank_approximation(noise, 5)
checks.close(
    (noise - a @ b).norm(),
    torch.linalg.svdvals(noise)[5:].norm(),
    what="the error of rank 5 for a matrix whose singular values fall slowly",
)
### END HIDDEN TESTS

# %% [markdown]
# ### How many directions does a matrix use?
#
# The rank is a poor answer: a little noise makes every matrix of full rank. Roy and Vetterli (2007)
# count softly. Divide the singular values by their sum, $p_i = \sigma_i / \sum_j \sigma_j$: shares
# that sum to 1. Their **entropy**
#
# $$H = -\sum_i p_i \ln p_i$$
#
# is 0 when one share has everything and $\ln n$ when all $n$ are equal. (Lesson 05 derives entropy
# properly; here only these two ends matter.) So $e^H$ is 1 in the first case, $n$ in the second,
# and something between otherwise: the **effective rank**. A share of zero adds nothing, because
# $p \ln p \to 0$ as $p \to 0$, though a computer says `0 * -inf` is NaN.


# %% exercise="effective_rank" minutes=15 difficulty=1
def effective_rank(w: Tensor) -> Tensor:
    """The effective rank of a matrix: e to the entropy of its normalized singular values.

    w: (m, n), float32 or float64. Returns a tensor of shape () in that format, between 1 and min(m,
    n); 0 for a matrix of zeros. Singular values of exactly 0 add nothing to the entropy. `w` is not
    changed.
    """
    ### BEGIN SOLUTION
    sigma = torch.linalg.svdvals(w)
    total = sigma.sum()
    if total == 0:
        return total
    share = sigma / total
    share = share[share > 0]
    return torch.exp(-(share * share.log()).sum())
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: NaN for a matrix with zero singular values</summary>
#
# Keep only the shares above zero (`share[share > 0]`) before you take the logarithm, or use
# `torch.special.entr`, which knows that $0 \ln 0$ is 0.
# </details>

# %% check="effective_rank" points=2
checks.close(
    effective_rank(torch.eye(6)),
    torch.tensor(6.0),
    what="the effective rank of the (6, 6) identity",
    mistakes={
        "the entropy without the exponential": torch.tensor(6.0).log(),
        "an entropy in bits": torch.tensor(6.0).log2().exp(),
        "the sign of the entropy left out": torch.tensor(1 / 6),
    },
)
checks.close(
    effective_rank(torch.outer(torch.arange(1.0, 4), torch.arange(1.0, 6))),
    torch.tensor(1.0),
    rtol=1e-4,
    what="the effective rank of a matrix of rank 1",
)
checks.close(
    effective_rank(torch.diag(torch.tensor([3.0, 1.0]))),
    4 / 3**0.75,
    rtol=1e-5,
    what="the effective rank of diag(3, 1)",
    mistakes={"squaring the singular values": 1.384145, "1 / Σp², the participation ratio,": 1.6},
)
### BEGIN HIDDEN TESTS
g = checks.generator(50)
for m, n, dtype in [
    (1, 1, torch.float32),
    (1, 8, torch.float64),
    (8, 3, torch.float64),
    (5, 9, torch.float64),
    (31, 20, torch.float32),
]:
    # Known singular values between random axes; the closed form of e^H is Π p_i^(-p_i).
    count = min(m, n)
    sigma = torch.rand(count, generator=g, dtype=torch.float64) + 0.01
    u = torch.linalg.qr(torch.randn(m, count, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, count, generator=g, dtype=torch.float64)).Q
    share = sigma / sigma.sum()
    expected = (share**-share).prod().to(dtype)
    w = ((u * sigma) @ v.T).to(dtype)
    rtol = 1e-8 if dtype == torch.float64 else 1e-5
    with checks.unchanged(w=w):
        result = effective_rank(w)
    checks.close(
        result,
        expected,
        rtol=rtol,
        dtype=dtype,
        what=f"the effective rank at shape ({m}, {n})",
        mistakes={
            "squaring the singular values": torch.special.entr(sigma**2 / (sigma**2).sum())
            .sum()
            .exp()
            .to(dtype)
        },
    )
    for factor in (1e-15, -1e10):
        checks.close(
            effective_rank(w * factor),
            expected,
            rtol=10 * rtol,
            what=f"the effective rank of the matrix times {factor:g}",
            hint="It depends on the shares only.",
        )
    checks.close(
        effective_rank(w.T), expected, rtol=rtol, what="the effective rank of the transpose"
    )
### END HIDDEN TESTS

# %% check="effective_rank" points=1
checks.close(
    effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0]))),
    torch.tensor(2.0),
    what="the effective rank of diag(2, 2, 0)",
    hint="0 · log 0 counts as 0.",
)
checks.close(
    effective_rank(torch.zeros(2, 3)), torch.tensor(0.0), what="the effective rank of zeros"
)
### BEGIN HIDDEN TESTS
for keep in (1, 3, 7):
    values = torch.zeros(9, dtype=torch.float64)
    values[:keep] = 0.5
    w = torch.diag(values)[torch.randperm(9, generator=checks.generator(51))]
    checks.close(
        effective_rank(w),
        torch.tensor(float(keep)).double(),
        what=f"the effective rank with {keep} equal singular values of 9",
    )
# One large singular value and a hundred of a ten-thousandth: together they count.
values = torch.tensor([1.0] + [1e-4] * 100, dtype=torch.float64)
checks.close(
    effective_rank(torch.diag(values)),
    torch.distributions.Categorical(probs=values).entropy().exp(),
    what="the effective rank with a tail of small singular values",
)
checks.close(
    effective_rank(torch.zeros(4, 1, dtype=torch.float64)),
    torch.tensor(0.0).double(),
    dtype=torch.float64,
    what="the effective rank of a column of zeros",
)
### END HIDDEN TESTS

# %% [markdown]
# A photograph is a matrix too: 427 rows of 640 grey values. Below it is rebuilt from its first
# terms. For comparison, the same pixels in random order: the same numbers, the same
# $\lVert W\rVert_F$, but no structure. Which of the two compresses?

# %% tags=["experiment"]
photo = data.pictures()["china"].mean(0)  # (427, 640), grey
order = torch.randperm(photo.numel(), generator=torch.Generator().manual_seed(4))
shuffled = photo.flatten()[order].view_as(photo)

# %% tags=["experiment", "figure"]
# Figure: a photograph of two, ten and forty terms
ranks = (2, 10, 40)
fig, axes = plt.subplots(1, 4, figsize=(11.4, 2.25))
for ax, rank in zip(axes, (*ranks, None), strict=True):
    if rank is None:
        image, title = photo, f"original, {photo.numel():,} numbers"
    else:
        a, b = low_rank_approximation(photo, rank)
        image, title = (
            a @ b,
            f"rank {rank}: {100 * (a.numel() + b.numel()) / photo.numel():.0f} % of the numbers",
        )
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])
plot.caption(
    fig,
    "Two terms give a tartan: every row of the picture is a mixture of the same two rows. Ten give "
    "the building, forty its windows; fine, irregular detail such as leaves comes last.",
)
plt.show()

# %% tags=["experiment", "figure"]
# Figure: the spectrum of a photograph and of the same pixels, shuffled
fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.4))
energy = {}
for name, matrix, style in (
    ("photograph", photo, "-"),
    ("the same pixels, shuffled", shuffled, "--"),
):
    sigma = torch.linalg.svdvals(matrix)
    label = f"{name} (effective rank {effective_rank(matrix):.0f})"
    left.plot(range(1, len(sigma) + 1), sigma, linestyle=style, label=label)
    energy[name] = (1 - sigma.square().cumsum(0) / sigma.square().sum()).clamp_min(1e-9).sqrt()
left.set(xscale="log", yscale="log", xlabel="index i", ylabel="singular value $\\sigma_i$")
left.set_title("Structure is a falling spectrum")
left.legend(fontsize=8)
plot.curves(
    range(1, len(sigma)),
    {name: values[:-1] for name, values in energy.items()},
    xlabel="rank r",
    ylabel="$\\|W - W_r\\|_F \\; / \\; \\|W\\|_F$",
    title="Error of the best rank-r approximation",
    ax=right,
)
right.set_ylim(0)
plot.caption(
    fig,
    "The first singular value of both comes from the mean brightness. After it the photograph's "
    "fall off quickly and the shuffled pixels' stay flat: low rank is a matter of arrangement.",
)
plt.show()

# %% [markdown]
# ## Distances survive a random projection {#projections}
#
# To find the eigenvectors we had to look at the data. Now a projection that does not look at all.
# Draw a matrix $R$ of shape `(D, k)` with independent normal entries of mean 0 and variance $1/k$,
# and map a vector $x$ of $D$ numbers to $y = xR$, which has $k$. One coordinate is
# $y_j = \sum_i x_i R_{ij}$; by the rules of [](#chance) its mean is 0 and its variance
# $\sum_i x_i^2 / k = \lVert x\rVert^2 / k$. So
#
# $$\mathbb E\,\lVert y\rVert^2 = \sum_{j=1}^k \mathbb E[y_j^2] = k \cdot \frac{\lVert x\rVert^2}{k} = \lVert x\rVert^2 .$$
#
# The squared length is right on average. By how much is one draw off? $\lVert y\rVert^2$ is a sum
# of $k$ independent squares of normal numbers, each of variance $2(\lVert x\rVert^2/k)^2$, so
# $\operatorname{Var}\lVert y\rVert^2 = 2\lVert x\rVert^4 / k$ and the relative error is
# $\sqrt{2/k}$. **The dimension $D$ does not appear.** The projection is linear, so what holds for a
# vector holds for the difference of two: distances are kept to $\sqrt{2/k}$ as well, for one pair.
#
# For all pairs of $N$ points at once the tail matters: the chance that one squared length is off by
# more than a share $\varepsilon$ is at most $2 e^{-k(\varepsilon^2/2 - \varepsilon^3/3)/2}$
# (Dasgupta and Gupta 2003). There are fewer than $N^2/2$ pairs, so some pair fails with a chance of
# at most $N^2 e^{-k(\varepsilon^2/2 - \varepsilon^3/3)/2}$. Setting this to $\delta$ gives the
# lemma of **Johnson and Lindenstrauss**:
#
# $$k \;\ge\; \frac{2\,(2\ln N + \ln (1/\delta))}{\varepsilon^2/2 - \varepsilon^3/3}
#   \quad\Longrightarrow\quad \text{all distances squared within } 1 \pm \varepsilon
#   \text{ with probability } 1 - \delta .$$
#
# A thousand times more points cost only a summand: the number of points enters through its
# logarithm.


# %% exercise="johnson_lindenstrauss" minutes=20 difficulty=2
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Projects every row of x onto the same k random directions, keeping squared lengths in
    expectation.

    x: (N, D), float32 or float64. Returns (N, k) in that format. k >= 1; it may exceed D. The map
    is linear, the same for all rows, and drawn from `generator` alone. For every fixed row,
    averaged over draws, the squared length of its image is the squared length of the row, with a
    variance of at most 2/k times the fourth power of the length. `x` is not changed.
    """
    ### BEGIN SOLUTION
    directions = torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype) / math.sqrt(k)
    return x @ directions
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the scale</summary>
#
# Entries of variance $1/k$ are standard normal numbers divided by $\sqrt k$.
# </details>
#
# <details><summary>Hint: "the distances are not kept"</summary>
#
# Only a map that is the same for all rows keeps distances *between* rows: draw one matrix of shape
# `(D, k)`.
# </details>

# %% check="johnson_lindenstrauss" points=2
x = torch.zeros(2, 300)
x[0, 0], x[1] = 5.0, 1.0
g = checks.generator(60)
ratios = torch.stack(
    [johnson_lindenstrauss(x, 50, g).square().sum(1) / x.square().sum(1) for _ in range(200)]
)  # (200, 2)
for row, name in enumerate(("a vector with one coordinate", "a vector of ones")):
    average = float(ratios[:, row].mean())
    assert tuple(ratios.shape) == (200, 2), (
        f"the number of images is {tuple(ratios.shape)}, it should be {(200, 2)}."
    )
    known = {
        50.0: "not scaling the directions",
        50 / 300: "dividing by √D instead of √k",
        1 / 50: "dividing by k instead of √k",
    }
    mistake = next(
        (
            f" This is what {text} gives."
            for value, text in known.items()
            if abs(average / value - 1) < 0.1
        ),
        "",
    )
    assert 0.9 < average < 1.1, (
        f"the squared length of {name} is multiplied by {average:.3g} on average, it should be by "
        f"1.{mistake}"
    )
### BEGIN HIDDEN TESTS
# Mean and variance of ‖y‖²/‖x‖² over 600 draws; limits more than five standard errors away.
g = checks.generator(61)
for d, k, dtype in (
    (40, 8, torch.float32),
    (7, 20, torch.float64),
    (1, 3, torch.float32),
    (200, 32, torch.float32),
):
    x = torch.randn(3, d, generator=g, dtype=dtype) * torch.tensor(
        [[1e-3], [1.0], [40.0]], dtype=dtype
    )
    x[2] = 0.0
    x[2, d // 2] = -3.0  # all of it in one coordinate
    with checks.unchanged(x=x):
        out = torch.stack([johnson_lindenstrauss(x, k, g) for _ in range(600)])
    assert tuple(out.shape) == (600, 3, k), (
        f"the shape of 600 projections is {tuple(out.shape)}, it should be {(600, 3, k)}."
    )
    assert out.dtype == dtype, (
        f"the result has dtype {out.dtype}, it should have that of x, {dtype}."
    )
    ratio = out.square().sum(-1) / x.square().sum(-1)
    deviation = (ratio.mean(0) - 1).abs().max().item()
    assert deviation < 5.5 * math.sqrt(2 / k / 600), (
        f"D = {d}, k = {k}: squared lengths change by {deviation:+.3f} on average."
    )
    limit = 2 / k * (1 + 6 * math.sqrt((2 + 12 / k) / 600))
    assert ratio.var(0).max().item() < limit, (
        f"D = {d}, k = {k}: the variance of ‖y‖²/‖x‖² is {ratio.var(0).max().item():.3f}, 2/k is "
        f"{2 / k:.3f}. Are the k directions "
        "independent, and does each see all the coordinates?"
    )
### END HIDDEN TESTS

# %% check="johnson_lindenstrauss" points=1
x = torch.randn(4, 30, generator=checks.generator(62))
y = johnson_lindenstrauss(x, 10, checks.generator(63))
assert tuple(y.shape) == (4, 10), (
    f"the shape of the projection is {tuple(y.shape)}, it should be {(4, 10)}."
)
checks.close(
    johnson_lindenstrauss(2 * x, 10, checks.generator(63)),
    2 * y,
    what="the projection of 2x",
    hint="The map is linear.",
)
### BEGIN HIDDEN TESTS
g = checks.generator(64)
x = torch.randn(5, 400, generator=g, dtype=torch.float64)
weights = torch.randn(3, 5, generator=g, dtype=torch.float64)
y = johnson_lindenstrauss(x, 60, checks.generator(65))
checks.close(
    johnson_lindenstrauss(weights @ x, 60, checks.generator(65)),
    weights @ y,
    rtol=1e-8,
    what="the projection of combinations of the rows",
    hint="All rows go through one and the same matrix.",
)
checks.close(
    johnson_lindenstrauss(x.flip(0), 60, checks.generator(65)),
    y.flip(0),
    what="the projection of the rows in another order",
)
checks.uses_generator(lambda g: johnson_lindenstrauss(x, 60, g), what="johnson_lindenstrauss")
checks.close(
    johnson_lindenstrauss(x.T.contiguous().T, 60, checks.generator(65)),
    y,
    what="the projection of a non-contiguous view",
)
# What it is for: all distances among 30 points of 2,000 dimensions, within the lemma's bound
# (chance of failing 1e-9).
points, k = torch.randn(30, 2000, generator=g), 800
before, after = (
    torch.pdist(points),
    torch.pdist(johnson_lindenstrauss(points, k, checks.generator(67))),
)
worst = ((after / before) ** 2 - 1).abs().max().item()
epsilon = next(
    e / 1000
    for e in range(1, 1000)
    if k * ((e / 1000) ** 2 / 2 - (e / 1000) ** 3 / 3) / 2 >= math.log(30**2 / 1e-9)
)
assert worst < epsilon, (
    f"with k = {k} a squared distance changes by {100 * worst:.0f} %; the bound is "
    f"{100 * epsilon:.0f} %."
)
### END HIDDEN TESTS

# %% [markdown]
# The pages of documentation have 3,360 coordinates or so, one for each word. How many random
# directions do they need?

# %% tags=["experiment"]
before = torch.pdist(pages).square()
count, failing = len(pages), 0.05
ks = [2**i for i in range(3, 12)]
g = torch.Generator().manual_seed(5)
typical, worst, promised = [], [], []
epsilons = torch.arange(0.001, 1, 0.001)
for k in ks:
    errors = torch.stack(
        [torch.pdist(johnson_lindenstrauss(pages, k, g)).square() / before - 1 for _ in range(5)]
    )
    typical.append(errors.square().mean().sqrt().item())
    worst.append(errors.abs().amax(1).mean().item())
    needed = 2 * (2 * math.log(count) + math.log(1 / failing)) / k
    enough = epsilons[epsilons**2 / 2 - epsilons**3 / 3 >= needed]
    promised.append(enough[0].item() if len(enough) else math.nan)

# %% tags=["experiment", "figure"]
# Figure: the error of a distance, by the number of random directions
ax = plot.curves(
    ks,
    {
        "typical pair (root mean square)": typical,
        "√(2/k)": [math.sqrt(2 / k) for k in ks],
        "worst pair": worst,
        "the lemma's ε, with probability 95 %": promised,
    },
    xlabel="number of random directions k",
    ylabel="relative error of squared distances",
    logx=True,
    logy=True,
    title=f"{len(before):,} distances between {count} pages, D = {pages.shape[1]:,}",
)
ax.figure.set_size_inches(7.2, 4)
plot.caption(
    ax.figure,
    "The typical error is √(2/k), as derived, whatever D is. The worst of all pairs stays below "
    "the lemma's promise, which says nothing for k under about "
    f"{2 * (2 * math.log(count) + math.log(1 / failing)) * 6:.0f}.",
)
plt.show()

# %% tags=["experiment"]
projected = johnson_lindenstrauss(pages, 300, torch.Generator().manual_seed(6))
for topic in ("lambda", "integers", "dict", "import", "while"):
    row = topics.index(topic)
    names = [
        topics[cosine_similarity_matrix(m, m)[row].argsort(descending=True)[1]]
        for m in (pages, projected)
    ]
    print(
        f"{topic:>9}: nearest page {names[0]!r} in {pages.shape[1]:,} dimensions, {names[1]!r} in "
        "300"
    )

# %% [markdown]
# ### All of it together: an SVD that only glances at the matrix
#
# `torch.linalg.svd` of a 4096×4096 weight matrix computes 4,096 singular values, of which you may
# want 16, at a cost that grows with the cube of the size. You now own three ideas that together are
# the way it is done in practice (Halko, Martinsson and Tropp, 2009; `torch.svd_lowrank`,
# scikit-learn's `randomized_svd`):
#
# 1. **Random directions** ([](#projections)). Multiply $W$, shape `(m, n)`, by a random $\Omega$ of
#    shape `(n, l)` with $l$ a little larger than $r$. Each column of $W\Omega$ is a random mixture
#    of the columns of $W$, in which the directions with large $\sigma_i$ are strong. So $W\Omega$,
#    shape `(m, l)`, most likely spans nearly the same space as the first $r$ of the $u_i$.
# 2. **Power iteration** ([](#power-iteration)), on $l$ vectors at once: $W (W^\top (W \Omega))$
#    multiplies the mixture by $\sigma_i^2$ once more, and the weak directions fade. Made
#    perpendicular (a QR decomposition) after each product, so that they do not all collapse onto
#    $u_1$.
# 3. **Low rank** ([](#low-rank)). With $Q$, shape `(m, l)`, an orthonormal basis of that space,
#    $W \approx Q (Q^\top W)$, and $Q^\top W$ is a small matrix of shape `(l, n)`, whose exact SVD
#    is cheap.


# %% exercise="randomized_low_rank" minutes=40 difficulty=3 path="more"
def randomized_low_rank(
    w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
) -> tuple[Tensor, Tensor]:
    """Nearly the best approximation of rank `rank`, without decomposing the whole matrix.

    w: (m, n), float32 or float64; 1 <= rank <= min(m, n). The random directions are
    Ω = torch.randn(n, l, generator=generator, dtype=w.dtype), l = min(rank + oversample, m, n);
    `passes` >= 0 is the number of power iterations with w wᵀ.

    Returns a: (m, rank) and b: (rank, n) in the format of w. With Q an orthonormal basis of the
    columns of (w wᵀ)^passes w Ω, a @ b is the best approximation of rank `rank` of Q Qᵀ w. Where
    l = min(m, n), that is the best one of w itself.

    Besides w, no tensor has more than l · max(m, n) elements. `torch.linalg.qr` and, of a matrix
    with a side l, `torch.linalg.svd` may be used. `w` is not changed.
    """
    ### BEGIN SOLUTION
    m, n = w.shape
    directions = min(rank + oversample, m, n)
    omega = torch.randn(n, directions, generator=generator, dtype=w.dtype)
    q = torch.linalg.qr(w @ omega).Q  # (m, l)
    for _ in range(passes):
        # Orthonormal after every product: otherwise all columns turn towards u_1 and float32 loses
        # the others.
        q = torch.linalg.qr(w.T @ q).Q  # (n, l)
        q = torch.linalg.qr(w @ q).Q  # (m, l)
    u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)  # of (l, n), not of (m, n)
    return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the shapes, in order</summary>
#
# Ω `(n, l)` → w Ω `(m, l)` → Q `(m, l)` → per pass: wᵀ Q `(n, l)` → its Q `(n, l)` → w times that
# `(m, l)` → its Q `(m, l)`. Then Qᵀ w is `(l, n)`, its SVD has u of `(l, l)`, and Q u is `(m, l)`
# again.
# </details>
#
# <details><summary>Hint: it is good on small matrices and bad on large ones</summary>
#
# Is there a QR after *each* product? After $w w^\top w$ without one, a direction with
# $\sigma_i = 0.01\,\sigma_1$ is weaker by a factor of a million, which is all the precision float32
# has.
# </details>

# %% check="randomized_low_rank" points=2
g = checks.generator(70)
w = torch.randn(40, 3, generator=g) @ torch.randn(3, 60, generator=g)  # rank 3
a, b = randomized_low_rank(w, 3, checks.generator(72))
assert tuple(a.shape) == (40, 3), f"the shape of a is {tuple(a.shape)}, it should be {(40, 3)}."
assert tuple(b.shape) == (3, 60), f"the shape of b is {tuple(b.shape)}, it should be {(3, 60)}."
checks.close(
    a @ b,
    w,
    rtol=1e-4,
    what="a @ b for a matrix of rank 3",
    hint="Random directions find all of a matrix of low rank.",
)


### BEGIN HIDDEN TESTS
def decaying(m, n, g, power, dtype=torch.float64):
    """A random matrix with singular values i^-power."""
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=g, dtype=torch.float64)).Q
    return ((u * torch.arange(1, p + 1, dtype=torch.float64) ** -power) @ v.T).to(dtype)


g = checks.generator(73)
for m, n, rank, dtype in (
    (80, 50, 5, torch.float64),
    (50, 120, 10, torch.float32),
    (120, 120, 1, torch.float64),
):
    w = decaying(m, n, g, 1.0, dtype)
    with checks.unchanged(w=w), checks.forbidden("svd_lowrank", "pca_lowrank"):
        a, b = randomized_low_rank(w, rank, g)
    assert a.dtype == b.dtype == dtype, f"the factors should have the format of w, {dtype}."
    best = torch.linalg.svdvals(w.double())[rank:].square().sum().sqrt().item()
    error = (w.double() - a.double() @ b.double()).norm().item()
    assert error < 1.02 * best, (
        f"({m}, {n}), rank {rank}, two passes: the error is {error / best:.3f} times the best "
        f"possible one; "
        "under 1.02 is expected."
    )
    assert (a.shape, b.shape) == ((m, rank), (rank, n)), (
        f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}, not {(m, rank)} and "
        f"{(rank, n)}."
    )
# As many directions as the matrix has: exact. Small shapes and a view.
for m, n, rank in ((4, 9, 2), (9, 4, 4), (1, 5, 1), (7, 1, 1)):
    w = torch.randn(2 * m, n, generator=g, dtype=torch.float64)[::2]
    a, b = randomized_low_rank(w, rank, g)
    top = torch.linalg.eigh(w.T @ w).eigenvectors[:, -rank:]
    checks.close(
        a @ b,
        w @ top @ top.T,
        rtol=1e-7,
        what=f"a @ b at shape ({m}, {n}), rank {rank}, where l = min(m, n)",
    )
### END HIDDEN TESTS

# %% check="randomized_low_rank" points=1
# The point of it: no work on the whole matrix.
w = torch.ones(200, 150)
with checks.allocations() as made:
    randomized_low_rank(w, 2, checks.generator(74), oversample=3)
assert made.largest <= 5 * 200, (
    f"a tensor of {made.largest:,} elements was made; with l = 5 directions none needs more than "
    f"1,000. "
    "Is the whole matrix decomposed, or multiplied by its transpose?"
)
### BEGIN HIDDEN TESTS
g = checks.generator(75)
for m, n, rank, oversample in (
    (300, 90, 4, 2),
    (90, 300, 1, 0),
    (160, 160, 3, 5),
    (6, 200, 5, 8),  # l is the shorter side here
    (200, 6, 5, 8),
):
    limit = min(rank + oversample, m, n) * max(m, n)
    w = torch.randn(m, n, generator=g)
    with checks.allocations() as made:
        a, b = randomized_low_rank(w, rank, g, oversample=oversample, passes=1)
    assert made.largest <= limit, (
        f"({m}, {n}), rank {rank}, oversample {oversample}: a tensor of {made.largest:,} elements "
        f"was made, {limit:,} are enough."
    )
    share = 1 - ((w - a @ b).square().sum() / w.square().sum()).item()
    assert (
        share > 0.5 * (torch.linalg.svdvals(w)[:rank].square().sum() / w.square().sum()).item()
    ), (
        "a @ b holds less than half of what the best factors of this rank hold: is the projection "
        "onto Q complete?"
    )
### END HIDDEN TESTS

# %% check="randomized_low_rank" points=2
# Power iterations must help where the spectrum is flat, and must not destroy what is weak.
w = torch.diag(torch.linspace(1.0, 0.5, 60))
errors = []
for passes in (0, 6):
    a, b = randomized_low_rank(w, 5, checks.generator(76), passes=passes)
    errors.append((w - a @ b).norm().item())
assert errors[1] < errors[0], (
    f"six passes give an error of {errors[1]:.4f}, none gives {errors[0]:.4f}: are the passes used?"
)
### BEGIN HIDDEN TESTS
g = checks.generator(77)
# The definition, word for word, where a flat spectrum lets float64 follow the powers.
for m, n, rank, oversample, passes in (
    (30, 24, 4, 2, 0),
    (24, 30, 4, 2, 1),
    (30, 30, 3, 0, 2),
    (20, 30, 1, 3, 3),
):
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=g, dtype=torch.float64)).Q
    w = (u * torch.linspace(2.0, 0.5, p, dtype=torch.float64)) @ v.T
    omega = torch.randn(n, rank + oversample, generator=checks.generator(78), dtype=torch.float64)
    spans = [torch.linalg.matrix_power(w @ w.T, s) @ w @ omega for s in range(passes + 2)]
    best = []
    for span in spans:
        projected = span @ torch.linalg.pinv(span) @ w  # Q Qᵀ w without a Q
        top = torch.linalg.eigh(projected.T @ projected).eigenvectors[:, -rank:]
        best.append(projected @ top @ top.T)
    a, b = randomized_low_rank(w, rank, checks.generator(78), oversample=oversample, passes=passes)
    checks.close(
        a @ b,
        best[passes],
        rtol=1e-7,
        what=f"a @ b at shape ({m}, {n}), rank {rank}, oversample {oversample}, passes {passes}",
        hint="Is Ω the one in the docstring?",
        mistakes={
            "one pass too many": best[passes + 1],
            **({"one pass too few": best[passes - 1]} if passes else {}),
        },
    )
checks.uses_generator(lambda g: randomized_low_rank(w, 1, g), what="randomized_low_rank")
# Singular values over four orders of magnitude in float32: without orthonormalizing, the small ones
# drown.
p, rank = 50, 12
u, v = (torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64)).Q for _ in range(2))
sigma = 10.0 ** -torch.linspace(0, 16, p, dtype=torch.float64)
w = ((u * sigma) @ v.T).float()
a, b = randomized_low_rank(w, rank, g, passes=4)
checks.close(
    torch.linalg.svdvals(a.double() @ b.double())[:rank],
    sigma[:rank],
    rtol=2e-2,
    atol=1e-6,
    what="the singular values of a @ b, from 1 down to 2.5e-4, in float32",
    hint="Is there a QR after every product?",
)
### END HIDDEN TESTS

# %% tags=["experiment"]
import time


def relative_error(matrix: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return ((matrix - factors[0] @ factors[1]).norm() / matrix.norm()).item()


start = time.perf_counter()
best = relative_error(photo, low_rank_approximation(photo, 20))
print(
    f"exact SVD           error {100 * best:.2f} %   {1000 * (time.perf_counter() - start):5.0f} ms"
)
for passes in (0, 1, 2, 4):
    start = time.perf_counter()
    error = relative_error(
        photo, randomized_low_rank(photo, 20, torch.Generator().manual_seed(7), passes=passes)
    )
    print(
        f"28 directions, {passes} passes error {100 * error:.2f} %   "
        f"{1000 * (time.perf_counter() - start):5.0f} ms"
    )

# %% [markdown]
# ## Experiment: what is in a trained weight matrix?
#
# The next cell trains a small network to read the digits: 64 pixels → 256 → 256 → 10 classes. How
# training works is the matter of lessons 02 to 06; here we only want one thing from it, the weight
# matrix $W$ in the middle, of shape `(256, 256)`, before and after. It starts as random numbers
# $W_0$; training changes it by $\Delta W = W - W_0$.
#
# **Predict before you run.** The trained network reads about 96 % of digits that it has never seen.
# Replace $W$ by its best approximation of rank $r$ and test again.
#
# 1. What is the smallest $r$, of 256, with which it is still within one point of its accuracy?
# 2. What is the effective rank of $W$ after training: nearer to 10, 100 or 200? Of $\Delta W$?
#
# Write your numbers into the cell; they will be drawn into the figure.

# %% tags=["experiment"]
predicted_rank = None  # your answer to question 1
predicted_effective_rank = None  # your answer to question 2, for W


# %% tags=["experiment"]
def train_digits_network(
    seed: int, epochs: int = 15, width: int = 256
) -> tuple[torch.nn.Sequential, Tensor, Tensor]:
    """A small trained network, its middle weight matrix before training, and the indices of the
    digits it never saw.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=g)
    training, unseen = order[:1400], order[1400:]
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw from the global state
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(64, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, 10),
        )
    before = network[2].weight.detach().clone()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training), generator=g)].split(64):
            loss = torch.nn.functional.cross_entropy(network(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network, before, unseen


@torch.no_grad()
def accuracy_with(network: torch.nn.Sequential, weight: Tensor, digits: Tensor) -> float:
    """The share of these digits that the network reads with this matrix in its middle."""
    hidden = network[1](network[0](pixels[digits]))
    hidden = network[3](hidden @ weight.T + network[2].bias)
    return (network[4](hidden).argmax(1) == labels[digits]).float().mean().item()


network, w_before, unseen = train_digits_network(seed=0)
w_after = network[2].weight.detach()
change = w_after - w_before
full_accuracy = accuracy_with(network, w_after, unseen)

ranks = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 64, 128, 256]
accuracies: dict[str, list[float]] = {
    "$W$ cut to rank r": [],
    "$W_0$ + $\\Delta W$ cut to rank r": [],
    "$W_0$ cut to rank r": [],
}
for rank in ranks:
    for name, weight in zip(
        accuracies,
        (
            torch.matmul(*low_rank_approximation(w_after, rank)),
            w_before + torch.matmul(*low_rank_approximation(change, rank)),
            torch.matmul(*low_rank_approximation(w_before, rank)),
        ),
        strict=True,
    ):
        accuracies[name].append(100 * accuracy_with(network, weight, unseen))
enough = next(
    rank
    for rank, accuracy in zip(ranks, accuracies["$W$ cut to rank r"], strict=True)
    if accuracy >= 100 * full_accuracy - 1
)
a, b = low_rank_approximation(w_after, enough)
print(f"rank {enough}: {a.numel() + b.numel():,} numbers instead of {w_after.numel():,}")

# %% tags=["experiment", "figure"]
# Figure: singular values before and after training, and how many are needed
fig, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4))
for (name, matrix), color, dash in zip(
    {
        "$W_0$, before training": w_before,
        "$W$, after": w_after,
        "$\\Delta W$, the change": change,
    }.items(),
    plot.COLORS,
    plot.DASHES,
    strict=False,
):
    left.plot(
        range(1, 257),
        torch.linalg.svdvals(matrix),
        color=color,
        linestyle=dash,
        label=f"{name}: effective rank {effective_rank(matrix):.0f}",
    )
left.axvline(10, ymin=0.2, color="#aaaaaa", linewidth=1, linestyle=":")  # not through the legend
left.annotate(
    "10 classes", (10, 6), xytext=(4, 0), textcoords="offset points", fontsize=8, color="#555555"
)
if predicted_effective_rank:
    left.axvline(
        predicted_effective_rank,
        color="#888888",
        linewidth=1,
        label=f"you predicted {predicted_effective_rank} for $W$",
    )
left.set(
    xscale="log",
    yscale="log",
    xlabel="index i",
    ylabel="singular value $\\sigma_i$",
    ylim=(0.01, 8),
)
left.set_title("Ten directions stand out")
left.legend(fontsize=8, loc="lower left")
plot.curves(
    ranks,
    accuracies,
    xlabel="rank r of 256",
    ylabel="accuracy on unseen digits (%)",
    logx=True,
    title="and ten are all it needs",
    ax=right,
)
if predicted_rank:
    right.axvline(
        predicted_rank, color="#888888", linewidth=1, linestyle="-", label="your prediction"
    )
right.legend(fontsize=8)
plot.caption(
    fig,
    f"Left: training lifts ten singular values out of the random rest. Right: rank {enough} of 256 "
    f"gives back the accuracy of {100 * full_accuracy:.1f} % within a point; the untrained middle "
    f"matrix in the trained network reaches {accuracies['$W_0$ cut to rank r'][-1]:.0f} %.",
)
plt.show()

# %% [markdown]
# **What came out.** The random start has no preferred directions: its singular values run from 1.1
# down to almost 0 without a step. Training adds about ten large ones, as many as there are classes,
# and these carry what was learned. Cut to rank 9 or 10, the network reads as well as before, from 7
# or 8 % of the numbers. $W_0$ plus the first ten terms of $\Delta W$ does the same. That finetuning
# is a change of low rank is the hypothesis behind **LoRA** (lesson 25).
#
# And the honest part: the effective rank does not say so. It falls only from about 206 to about
# 172, because 246 small singular values, which do nothing for the task, still have most of the sum.
# It measures how the spectrum is spread, not how much of it is needed. Nor is the accuracy bound to
# rise with the rank: you may see a term that brings the matrix nearer to $W$ and the network
# further from the right answers. A spectrum says what can be cut at a small error *in the matrix*;
# what can be cut at a small error *in the task* must be measured in the task. (And rank 10 here
# says nothing about a language model: ten classes is what there is to tell apart.)

# %% [markdown]
# ## Key questions
#
# The first three have numbers for answers, which go into the function below them. The last two are
# for your own words.
#
# **Q1 · How many nearly perpendicular directions?** Exactly perpendicular, $d$ fit into $d$
# dimensions. How many, if a cosine up to $\varepsilon$ in absolute value is allowed? Take random
# vectors of $\pm 1/\sqrt d$. The cosine of two is an average of $d$ random signs, and Hoeffding's
# inequality bounds the chance that it is beyond $\varepsilon$ by $2e^{-d\varepsilon^2/2}$. Among
# $N$ vectors are fewer than $N^2/2$ pairs, so the expected number of bad pairs is below
# $N^2 e^{-d\varepsilon^2/2}$. As long as that is at most 1, some draw has no bad pair at all: such
# a set of $N$ exists. How large may $N$ be? (And do not offer less than $d$.)
#
# **Q2 · When does low rank pay?** A matrix of shape `(m, n)` is stored as two factors of rank $r$.
# What is the largest $r$ for which the factors hold fewer numbers than the matrix? (For a square
# matrix: is it all of $n$, half, or a quarter?)
#
# **Q3 · The variance of a score.** In a real model the keys are not centered. Let the coordinates
# be independent, those of $q$ with mean 0 and standard deviation `q_std`, those of $k$ with mean
# `k_mean` and standard deviation `k_std`. What is the variance of $q\cdot k$? For $d = 128$ and
# both of variance 1 and mean 0 it should be 128.


# %% exercise="key_questions" minutes=20 difficulty=2 kind="questions"
def key_questions() -> dict[str, float]:
    """Short answers: numbers, to half a percent; whole numbers where things are counted.

    "directions":     Q1, d = 4096 and ε = 0.1: the largest real number N that the argument gives.
    "few_directions": Q1, the same for d = 64 and ε = 0.1.
    "saving_rank":    Q2, shape (4096, 4096): the largest r that holds strictly fewer numbers.
    "wide_rank":      Q2, the same for shape (100, 3).
    "score_variance": Q3, d = 64, q_std = 0.5, k_std = 3 and k_mean = 4.
    """
    ### BEGIN SOLUTION
    return {
        "directions": math.exp(4096 * 0.1**2 / 4),
        "few_directions": 64,  # exp(64 · 0.1² / 4) is 1.17: the axes are more
        "saving_rank": (4096 * 4096 - 1) // (4096 + 4096),
        "wide_rank": (100 * 3 - 1) // (100 + 3),
        # Var[q_i k_i] = E[q_i²] E[k_i²] - 0², and E[k_i²] is variance plus squared mean.
        "score_variance": 64 * 0.5**2 * (3**2 + 4**2),
    }
    ### END SOLUTION


# %% check="key_questions" points=1
answer = key_questions()["directions"]
### BEGIN HIDDEN TESTS
low, high = 0.0, 200.0  # bisection for ln N in 2 ln N − dε²/2 = 0
for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if 2 * middle - 4096 * 0.01 / 2 <= 0 else (low, middle)
checks.number(
    answer,
    math.exp(low),
    to=0.005,
    what="directions",
    mistakes={"counting vectors instead of pairs": math.exp(20.48), "the number of axes": 4096},
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = key_questions()["few_directions"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    64,
    to=0.005,
    what="few_directions",
    hint="The axes themselves are perpendicular.",
    mistakes={"the bound, which is less than the axes themselves,": math.exp(0.16)},
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
saving, wide = (key_questions()[key] for key in ("saving_rank", "wide_rank"))
### BEGIN HIDDEN TESTS
for answer, m, n, what in ((saving, 4096, 4096, "saving_rank"), (wide, 100, 3, "wide_rank")):
    expected = max(r for r in range(min(m, n) + 1) if r * (m + n) < m * n)
    checks.number(
        answer,
        expected,
        to=0,
        what=what,
        hint="Count the numbers of both factors.",
        mistakes={"the rank at which both are equal": expected + 1, "the full rank": min(m, n)},
    )
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = key_questions()["score_variance"]
### BEGIN HIDDEN TESTS
# Coordinates that are mean ± std with equal chance have exactly these means and deviations.
products = torch.tensor([0.5 * (4 + 3), 0.5 * (4 - 3), -0.5 * (4 + 3), -0.5 * (4 - 3)])
checks.number(
    answer,
    64 * products.var(correction=0).item(),
    to=0.005,
    what="score_variance",
    mistakes={
        "taking the shift to change nothing": 144,
        "adding the mean instead of its square": 208,
        "the standard deviation": 20,
        "adding the squared mean of k outside the product": 1168,
    },
)
### END HIDDEN TESTS

# %% [markdown]
# **Q4 · Why divide by $\sqrt d$ and not by $d$?** And what if nothing is divided? Say what the
# softmax sees in each case.

# %% [markdown] answer="why-sqrt"
# For independent coordinates of variance 1 the scores have standard deviation $\sqrt d$. Divided by
# $\sqrt d$ they have standard deviation 1 at any $d$: the softmax can prefer one key to another and
# still changes smoothly. Undivided they are of size $\sqrt{128} \approx 11$ at $d = 128$;
# differences of that size become ratios of $e^{11}$, one key takes all the weight at random, and
# the gradient through the softmax nearly vanishes, so training cannot repair it. Divided by $d$
# they have standard deviation $1/\sqrt d$, all weights are near $1/n$, and the query's preference
# can show only where $q$ and $k$ are far from independent. (When they are perfectly aligned,
# $q\cdot k$ is of order $d$: some parametrizations of very wide models divide by $d$ for that
# reason.)

# %% [markdown]
# **Q5 · Someone tells you that a layer "has rank 512 and cannot be compressed": the matrix is
# 512×512 and no singular value is zero.** Which two measurements would you ask for, and what would
# each tell you?

# %% [markdown] answer="rank-claim"
# The spectrum, not the rank: noise alone gives full rank. Eckart and Young turn the singular values
# into the exact error of the best rank-$r$ approximation, so one look shows whether they fall off,
# and the effective rank sums it up in one number. Second, the loss of the *task* with the layer cut
# to rank $r$, for several $r$: inputs do not use all directions equally, and an error in the matrix
# where no input goes costs nothing. In the experiment above the effective rank was about 172 of 256
# while rank 9 or 10 did the task. The reverse also happens: small singular values that a rare but
# important input needs.

# %% [markdown]
# ## References
#
# - Eckart & Young 1936, *The approximation of one matrix by another of lower rank*,
#   Psychometrika 1. The theorem of [](#low-rank).
# - Johnson & Lindenstrauss 1984, *Extensions of Lipschitz mappings into a Hilbert space*; Dasgupta
#   & Gupta 2003, *An elementary proof of a theorem of Johnson and Lindenstrauss*, Random Structures
#   & Algorithms 22: two pages that give the bound used here.
# - Roy & Vetterli 2007, *The effective rank*, EUSIPCO. Sections 2 and 3.
# - Halko, Martinsson & Tropp 2009, *Finding structure with randomness*, arXiv:0909.4061. Section 1
#   is a tour; algorithm 4.4 is the one you wrote.
# - Vaswani et al. 2017, *Attention Is All You Need*, arXiv:1706.03762. Section 3.2.1 and its
#   footnote 4: the variance of $q\cdot k$.
# - Hu et al. 2021, *LoRA*, arXiv:2106.09685. Section 7: how low the rank of a change can be.
# - Elhage et al. 2022, *Toy Models of Superposition*, arXiv:2209.10652. What models do with all
#   those nearly perpendicular directions.
#
# In production code: `torch.svd_lowrank` (`torch/_lowrank.py`),
# `sklearn.utils.extmath.randomized_svd`, `sklearn.random_projection`; random rotations in
# quantization and low-rank gradients in GaLore use the same two ideas.
