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
#       Xavier, Kaiming, GPT-2 and DeepNorm initialization, µP, σReparam, and the instruments that
#       tell rank collapse from entropy collapse while a model trains.
#     gpu: "Nothing more: every cell takes seconds on a CPU."
# ---

# %% [markdown]
# ## The problem
#
# Before the first update a network is a random function, and the numbers from which it was drawn
# decide whether training can begin. Too large, and the activations grow by a factor in every layer
# until they overflow. Too small, and they fade, and the gradient with them. Between the two lies a
# scale that neither grows nor fades, and for most layers it can be written down in one line.
#
# That takes care of the first step. Three questions remain that the one line does not answer, and
# each can cost a large training run:
#
# - **Depth.** A residual network adds up what its branches return. With a hundred branches, how
#   large may each be?
# - **Width.** The best learning rate of a small model is too high for a large one. Can the
#   initialization be arranged so that it stays the same?
# - **Attention.** A softmax can fail in two opposite ways. It averages all tokens until they are
#   alike (**rank collapse**), or it looks at a single token and stops learning (**entropy
#   collapse**). How are they seen coming, and what stops them?
#
# ## The idea: follow a variance
#
# One tool answers nearly everything here: write down the **mean square** of the numbers that enter
# an operation, work out the mean square of those that leave, and choose the weights so that the two
# agree. Forward this is about activations, backward about gradients, sideways (along the width)
# about updates.
#
# You will build the instruments (variance through depth, gradient norm by layer, stable rank,
# entropy) and the remedies (five initializations, one reparametrization), and then break small
# models on purpose and repair them.
#
# ### Notation
#
# | written | in code | means |
# |---|---|---|
# | $n$, $n_\text{in}$, $n_\text{out}$ | `width`, `fan_in`, `fan_out` | numbers that enter and leave a layer |
# | $W$ | `weight` | a weight matrix `(fan_out, fan_in)`, as in PyTorch: $y = Wx$ |
# | $\sigma$ | `std` | the standard deviation of its entries; $\sigma(W)$, with a bracket, is its largest singular value |
# | $q_l$ | `measured[l]` | mean square of the activations after layer $l$ |
# | $L$ | `len(model.blocks)` | Transformer blocks; each has two residual branches |
# | $T$ | `tokens` | tokens in a sequence |
# | $r$ | `width / base` | how many times wider a model is than the one that was tuned |

# %%
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from llm40 import checks, data, plot
from torch import Tensor, nn

# %% [markdown]
# ## One layer: fan-in, fan-out, and a factor of two {#one-layer}
#
# Let $y = Wx$ with $W$ of shape $(n_\text{out}, n_\text{in})$, its entries independent of each
# other and of $x$, mean 0, variance $\sigma^2$. One output is
#
# $$ y_i = \sum_{j=1}^{n_\text{in}} W_{ij}x_j, \qquad
# \mathbb E[y_i^2] = \sum_{j,k} \mathbb E[W_{ij}W_{ik}]\,x_jx_k = \sigma^2\sum_j x_j^2
# = n_\text{in}\,\sigma^2\cdot q, \qquad q = \frac1{n_\text{in}}\sum_j x_j^2 . $$
#
# The weights are independent, so only the terms with $j=k$ survive. The inputs may depend on each
# other as they like: nothing was assumed of them. So the mean square is kept when
# $\sigma^2 = 1/n_\text{in}$. Going backward, the gradient passes through the transpose,
# $\partial\ell/\partial x = W^\top\,\partial\ell/\partial y$, whose rows have $n_\text{out}$
# entries: the same line gives $\sigma^2 = 1/n_\text{out}$. Both cannot hold unless the matrix is
# square.
#
# - **Xavier** (Glorot and Bengio 2010) takes the middle,
#   $\sigma^2 = \dfrac{2}{n_\text{in}+n_\text{out}}$.
# - **Kaiming** (He et al. 2015) chooses a side and minds the nonlinearity. If $z$ is symmetric
#   around 0, ReLU sets half of its mean square to zero,
#   $\mathbb E[\mathrm{relu}(z)^2] = \tfrac12\mathbb E[z^2]$. So the weights have to give back a
#   factor of 2: $\sigma^2 = 2/n_\text{in}$. In general $\sigma = g/\sqrt{\text{fan}}$ with a
#   **gain** $g$, here $\sqrt2$.
#
# Is it one side or the other that matters? Less than it seems. With $\sigma^2 = 2/n_\text{in}$ in
# every layer, the gradient's mean square is multiplied by $n_\text{out}/n_\text{in}$ from layer to
# layer, and these ratios telescope: over the whole network they come to the ratio of the last width
# to the first, a constant, not something that is exponential in depth.
#
# A uniform distribution on $[-a, a]$ has variance $\frac1{2a}\int_{-a}^a u^2\,du = a^2/3$. To get a
# standard deviation $\sigma$ from it, the bound has to be $a = \sqrt3\,\sigma$.
#
# A convolution with weight $(c_\text{out}, c_\text{in}, k_1, k_2)$ sums over $c_\text{in}k_1k_2$
# numbers: the fans are multiplied by the size of the kernel.


# %% tags=["support"]
# Support: whether values are normal or uniform draws, and nn.init without its Xavier and Kaiming


def expect_drawn(
    values: Tensor,
    std: float,
    kind: str = "normal",
    what: str = "the weight",
    mistakes: dict[str, float] | None = None,
) -> None:
    """`values` look like independent draws of mean 0 and this deviation, "normal" or "uniform"."""
    x = values.detach().double().flatten()
    kurtosis = {"normal": 3.0, "uniform": 1.8}[kind]
    checks.drawn(x, mean=0.0, std=std, kurtosis=kurtosis, what=what, mistakes=mistakes)
    # Of a normal distribution 8.3 % lie beyond √3 deviations, of a uniform one nothing.
    beyond = float((x.abs() > math.sqrt(3) * std * (1 + 1e-6)).double().mean())
    if kind == "uniform":
        assert beyond == 0, (
            f"{what}: {beyond:.1%} of the values lie outside ±√3·std: is the distribution uniform?"
        )
    else:
        assert beyond > 0.04, (
            f"{what}: {beyond:.1%} of the values lie beyond √3·std, of normal draws 8.3 % do."
        )
    assert x.unique().numel() > 0.9 * x.numel(), (
        f"{what}: values repeat; each entry is a draw of its own."
    )


@checks.measured
@contextmanager
def without_nn_init() -> Iterator[None]:
    """Inside the block nn.init's Xavier and Kaiming functions refuse to work."""

    def refuse(*_, **__):
        raise AssertionError("nn.init already has this function, but this exercise builds it.")

    names = [name for name in vars(nn.init) if name.startswith(("xavier", "kaiming"))]
    with mock.patch.multiple(nn.init, **dict.fromkeys(names, refuse)):
        yield


# %% exercise="fan_init" minutes=15 difficulty=1
def xavier_uniform_(
    w: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fills w in place with uniform draws of mean 0 and the deviation below; returns w.

    Standard deviation: gain · √(2 / (fan_in + fan_out)).
    w: (fan_out, fan_in), or (out, in, *kernel), where both fans are multiplied by the number of
        elements of the kernel. Fewer than two axes: ValueError. w may be a parameter: autograd does
        not record the filling, and w requires a gradient afterwards as before.

    Draws come from `generator` (None: PyTorch's own). nn.init's Xavier and Kaiming functions are
    not allowed; `w.uniform_` is.
    """
    ### BEGIN SOLUTION
    if w.dim() < 2:
        raise ValueError(f"a tensor with {w.dim()} axes has no fan-in and fan-out")
    kernel = math.prod(w.shape[2:])
    bound = gain * math.sqrt(3.0) * math.sqrt(2.0 / ((w.shape[0] + w.shape[1]) * kernel))
    with torch.no_grad():
        return w.uniform_(-bound, bound, generator=generator)
    ### END SOLUTION


def kaiming_normal_(
    w: Tensor,
    mode: str = "fan_in",
    gain: float = math.sqrt(2.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fills w in place with normal draws of mean 0 and standard deviation gain / √fan; returns w.

    fan is fan_in or fan_out, as `mode` says ("fan_in" or "fan_out"; anything else: ValueError). The
    rest as above.
    """
    ### BEGIN SOLUTION
    if w.dim() < 2:
        raise ValueError(f"a tensor with {w.dim()} axes has no fan-in and fan-out")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode is fan_in or fan_out, not {mode!r}")
    fan = w.shape[1 if mode == "fan_in" else 0] * math.prod(w.shape[2:])
    with torch.no_grad():
        return w.normal_(0.0, gain / math.sqrt(fan), generator=generator)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which axis is which?</summary>
#
# `nn.Linear(3, 5).weight` has shape `(5, 3)`: it takes 3 numbers in. A row of the matrix makes one
# output.
# </details>
#
# <details><summary>Hint: "a leaf Variable that requires grad" is used in place</summary>
#
# Filling a parameter is not a step of a computation. Tell autograd to look away.
# </details>

# %% check="fan_init" points=1
g = checks.generator(1)
w = torch.zeros(60, 240)  # 240 in, 60 out
with without_nn_init():
    result = xavier_uniform_(w, generator=g)
assert result is w, "fill the tensor that was given, and return it"
expect_drawn(
    w,
    math.sqrt(2 / 300),
    "uniform",
    "xavier_uniform_ on (60, 240)",
    mistakes={
        "a bound without the √3": math.sqrt(2 / 300 / 3),
        "fan_in alone": math.sqrt(1 / 240),
        "fan_out alone": math.sqrt(1 / 60),
        "1 instead of 2 in the numerator": math.sqrt(1 / 300),
        "the variance where the standard deviation belongs": 2 / 300,
    },
)
### BEGIN HIDDEN TESTS
for shape, fans, gain in [
    ((300, 40), 340, 1.0),
    ((30, 500), 530, 3.0),
    ((20, 10, 3, 5), 450, 0.6),
    ((1, 6000), 6001, 1.0),
    ((64, 32, 7), 672, 1.7),
]:
    w = nn.Parameter(torch.zeros(shape))
    with without_nn_init():
        result = xavier_uniform_(w, gain=gain, generator=g)
    what = f"xavier_uniform_ on {shape} with gain {gain}"
    assert result is w, f"{what}: the tensor that was given is returned"
    assert w.is_leaf, f"{what}: filling a parameter is not a step that autograd records"
    assert w.requires_grad, f"{what}: the parameter no longer requires a gradient"
    expect_drawn(
        w,
        gain * math.sqrt(2 / fans),
        "uniform",
        what,
        {
            "the gain squared": gain**2 * math.sqrt(2 / fans),
            "ignoring the gain": math.sqrt(2 / fans),
            "ignoring the kernel": gain * math.sqrt(2 / sum(shape[:2])),
            "a bound without the √3": gain * math.sqrt(2 / fans / 3),
        },
    )
checks.uses_generator(
    lambda g: xavier_uniform_(torch.zeros(9, 9), generator=g), what="xavier_uniform_"
)
frozen = torch.zeros(4, 4, dtype=torch.float64)
with checks.kept(w=frozen, values=False):
    assert xavier_uniform_(frozen).dtype == torch.float64
checks.raises(
    ValueError, xavier_uniform_, torch.zeros(7), because="a vector has no fan-in and fan-out"
)
### END HIDDEN TESTS

# %% check="fan_init" points=1
g = checks.generator(3)
w = torch.zeros(60, 240)
with without_nn_init():
    result = kaiming_normal_(w, generator=g)
assert result is w, "fill the tensor that was given, and return it"
expect_drawn(
    w,
    math.sqrt(2 / 240),
    "normal",
    "kaiming_normal_ on (60, 240)",
    mistakes={
        "fan_out": math.sqrt(2 / 60),
        "forgetting the 2 that ReLU costs": math.sqrt(1 / 240),
        "the variance where the standard deviation belongs": 2 / 240,
    },
)
### BEGIN HIDDEN TESTS
for shape, mode, fan, gain in [
    ((300, 40), "fan_out", 300, math.sqrt(2)),
    ((40, 300), "fan_in", 300, 1.0),
    ((25, 16, 3, 5), "fan_in", 240, 2.5),
    ((25, 16, 3, 5), "fan_out", 375, 0.3),
    ((1, 5000), "fan_in", 5000, math.sqrt(2)),
    ((5000, 1), "fan_out", 5000, 5 / 3),
]:
    w = nn.Parameter(torch.zeros(shape))
    with without_nn_init():
        result = kaiming_normal_(w, mode=mode, gain=gain, generator=g)
    what = f"kaiming_normal_ on {shape}, {mode}, gain {gain:.3g}"
    assert result is w, f"{what}: the tensor that was given is returned"
    assert w.is_leaf, f"{what}: filling a parameter is not a step that autograd records"
    assert w.requires_grad, f"{what}: the parameter no longer requires a gradient"
    other = (shape[0] if mode == "fan_in" else shape[1]) * math.prod(shape[2:])
    expect_drawn(
        w,
        gain / math.sqrt(fan),
        "normal",
        what,
        {
            "the other fan": gain / math.sqrt(other),
            "the gain squared": gain**2 / math.sqrt(fan),
            "√2 whatever the gain": math.sqrt(2 / fan),
            "√2 on top of the gain": gain * math.sqrt(2 / fan),
            "the variance where the standard deviation belongs": gain**2 / fan,
        },
    )
checks.uses_generator(
    lambda g: kaiming_normal_(torch.zeros(9, 9), generator=g), what="kaiming_normal_"
)
frozen = torch.zeros(4, 4)
with checks.kept(w=frozen, values=False):
    kaiming_normal_(frozen)
checks.raises(
    ValueError, kaiming_normal_, torch.zeros(7), because="a vector has no fan-in and fan-out"
)
checks.raises(
    ValueError,
    kaiming_normal_,
    torch.zeros(7, 7),
    mode="fan_avg",
    because="mode is fan_in or fan_out",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Many layers: predicted and measured
#
# Stack $L$ layers of width $n$, each with its own matrix of standard deviation $\sigma$. The line
# from [](#one-layer) is exact in expectation for a given input, and it is linear in $q$, so it can
# be chained:
#
# | layer | one step | after $L$ layers |
# |---|---|---|
# | linear: $x \leftarrow Wx$ | $q \leftarrow n\sigma^2 q$ | $(n\sigma^2)^L\,q_0$ |
# | ReLU: $x \leftarrow \mathrm{relu}(Wx)$ | ? | ? |
# | residual: $x \leftarrow x + Wx$ | ? | ? |
# | residual with pre-norm: $x \leftarrow x + W\,\mathrm{norm}(x)$ | ? | ? |
#
# Fill in the rest; the cross term $2\,x^\top Wx$ has mean 0, because $W$ has. With
# $\mathrm{norm}(x)$ each row is divided by the root of its own mean square, so what enters $W$ has
# mean square 1, whatever $q$ is.
#
# Three of these four are exponential in depth, unless one step's factor is exactly 1. At
# $n\sigma^2 = 1.1$ a hundred linear layers multiply the mean square by 14,000; at 0.9 they divide
# it by 38,000. The fourth is not, and it is the one of which today's models are made.


# %% exercise="forward_variance" minutes=20 difficulty=2
def forward_variance(
    depth: int,
    width: int,
    std: float,
    kind: str,
    x: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(predicted, measured): the mean square of a random network's activations, layer by layer.

    x: (samples, width), the input. Layer l = 1 … depth draws a matrix of its own,
    W = std · torch.randn(width, width, generator=generator, dtype=x.dtype), and maps each row x, by
    `kind`, to

        "linear"    W x
        "relu"      relu(W x)
        "residual"  x + W x
        "prenorm"   x + W norm(x),   norm(x) = x / √(mean of the squares of this row)

    measured: (depth + 1,), the mean of the squares of all entries: of x, then after each layer.
    predicted: (depth + 1,), its expectation over the weights, computed from depth, width, std, kind
    and measured[0] alone. Both float64. The layers run in x's dtype; the squares are taken in it or
    in float64.
    Any other kind: ValueError.
    """
    ### BEGIN SOLUTION
    added = width * std**2
    steps = {
        "linear": lambda q: added * q,
        "relu": lambda q: added * q / 2,
        "residual": lambda q: (1 + added) * q,
        "prenorm": lambda q: q + added,
    }
    if kind not in steps:
        raise ValueError(f"kind is one of {', '.join(steps)}, not {kind!r}")
    measured = [x.double().square().mean().item()]
    predicted = measured[:1]
    for _ in range(depth):
        w = std * torch.randn(width, width, generator=generator, dtype=x.dtype)
        if kind == "prenorm":
            x = x + (x / x.square().mean(-1, keepdim=True).sqrt()) @ w.T
        else:
            z = x @ w.T
            x = z if kind == "linear" else z.relu() if kind == "relu" else x + z
        measured.append(x.double().square().mean().item())
        predicted.append(steps[kind](predicted[-1]))
    return torch.tensor(predicted, dtype=torch.float64), torch.tensor(measured, dtype=torch.float64)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: rows and columns</summary>
#
# The samples are rows of x, so "W x for each row" is one product of the whole of x with a
# transposed matrix.
# </details>
#
# <details><summary>Hint: the prediction of the pre-norm network</summary>
#
# The branch adds the same amount in every layer. It does not depend on what is already there.
# </details>

# %% check="forward_variance" points=1
x = torch.ones(2, 50)  # mean square 1
for kind, expected in {
    "linear": [1, 2, 4, 8],
    "relu": [1, 1, 1, 1],
    "residual": [1, 3, 9, 27],
    "prenorm": [1, 3, 5, 7],
}.items():
    result = forward_variance(3, 50, 0.2, kind, x, checks.generator(4))  # width · std² = 2
    is_pair = isinstance(result, tuple) and len(result) == 2
    assert is_pair, "return a pair (predicted, measured)"
    checks.close(
        result[0],
        torch.tensor(expected, dtype=torch.float64),
        what=f'predicted for "{kind}" with width · std² = 2',
        dtype=torch.float64,
        mistakes={
            "std where std² belongs": [1.0, 10.0, 100.0, 1000.0],
            "std² without the width": [0.04**i for i in range(4)],
            "a ReLU that costs nothing": [1.0, 2.0, 4.0, 8.0],
        },
    )
### BEGIN HIDDEN TESTS
# The expectation itself, by brute force: 20,000 networks, judged at six standard errors of the
# mean.
g = checks.generator(5)
for kind, width, std in [
    ("linear", 7, 0.3),
    ("relu", 8, 0.6),
    ("residual", 6, 0.2),
    ("prenorm", 5, 0.5),
]:
    x = 1.5 * torch.randn(1, width, generator=g, dtype=torch.float64)
    state, squares = x.expand(20_000, width)[..., None], [x.square().mean().expand(20_000)]
    for _ in range(3):
        w = std * torch.randn(20_000, width, width, generator=g, dtype=torch.float64)
        size = state.square().mean(1, keepdim=True).sqrt()
        z = w @ (state / size if kind == "prenorm" else state)
        state = z.clamp(min=0) if kind == "relu" else z if kind == "linear" else state + z
        squares.append(state.square().mean((1, 2)))
    predicted = forward_variance(3, width, std, kind, x, g)[0]
    assert getattr(predicted, "shape", None) == (4,), (
        f"predicted has depth + 1 = 4 entries; yours is {predicted!r}"
    )
    for layer, values in enumerate(squares):
        error = 6 * float(values.std()) / math.sqrt(len(values)) + 1e-12
        assert abs(float(predicted[layer]) - float(values.mean())) <= error, (
            f'"{kind}", width {width}, std {std}: after {layer} layers the mean over 20,000 '
            f"random networks is {float(values.mean()):.4g} ± {error:.1g}; predicted is "
            f"{float(predicted[layer]):.4g}"
        )
# Deep and far from 1, where only a power is right.
x = torch.full((1, 16), 3.0)
for kind, power in {
    "linear": lambda l: 9 * 0.16**l,
    "relu": lambda l: 9 * 0.08**l,
    "residual": lambda l: 9 * 1.16**l,
    "prenorm": lambda l: 9 + 0.16 * l,
}.items():
    checks.close(
        forward_variance(60, 16, 0.1, kind, x, g)[0],
        torch.tensor([power(l) for l in range(61)], dtype=torch.float64),
        what=f'predicted for "{kind}", 60 layers',
        rtol=1e-9,
        atol=0.0,
    )
checks.raises(
    ValueError,
    forward_variance,
    1,
    4,
    1.0,
    "tanh",
    torch.ones(1, 4),
    because='there is no kind "tanh"',
)
### END HIDDEN TESTS

# %% check="forward_variance" points=2
# Laws. Without weights a plain layer gives 0 and a residual one passes x on; x of mean square 5.
x = torch.tensor([[1.0, -3.0], [3.0, 1.0]])
for kind, expected in {"linear": [5, 0, 0], "relu": [5, 0, 0], "residual": [5, 5, 5]}.items():
    checks.close(
        forward_variance(2, 2, 0.0, kind, x)[1],
        torch.tensor(expected, dtype=torch.float64),
        what=f'measured for "{kind}" with std = 0',
        dtype=torch.float64,
        hint="The mean of the squares, nothing taken away: of x first, then after each layer",
    )
# Twice the input gives four times the mean square of a linear network, and nothing else changes.
single, double = (
    forward_variance(3, 2, 0.7, "linear", factor * x, checks.generator(7))[1] for factor in (1, 2)
)
checks.close(double, 4 * single, what="measured for twice the input, against 4 times the measured")
### BEGIN HIDDEN TESTS
g = checks.generator(6)
x = torch.randn(4, 30, generator=g) + 0.5
with checks.unchanged(x=x):
    measured = forward_variance(1, 30, 0.2, "linear", x, checks.generator(7))[1]
w = 0.2 * torch.randn(30, 30, generator=checks.generator(7))
checks.close(
    measured,
    torch.stack([x.square().mean(), (x @ w.T).square().mean()]).double(),
    what="measured for one linear layer",
    rtol=1e-5,
    mistakes={
        "the variance, with the mean taken away,": torch.stack(
            [x.var(correction=0), (x @ w.T).var(correction=0)]
        ).double(),
        "a product with W instead of its transpose": torch.stack(
            [x.square().mean(), (x @ w).square().mean()]
        ).double(),
    },
)
for kind in ("linear", "relu", "residual", "prenorm"):
    checks.uses_generator(
        lambda g, kind=kind: forward_variance(3, 8, 0.5, kind, torch.ones(30, 8), g)[1],
        what=f'forward_variance for "{kind}"',
    )
for kind, depth, width, std, samples in [
    ("linear", 4, 9, 0.4, 3),
    ("relu", 6, 20, 0.3, 5),
    ("residual", 5, 13, 0.2, 1),
    ("prenorm", 7, 11, 0.5, 4),
    ("prenorm", 3, 1, 0.5, 2),
    ("linear", 0, 5, 1.0, 2),
]:
    x = 2 * torch.randn(samples, width, generator=g, dtype=torch.float64) + 1
    with checks.unchanged(x=x):
        measured = forward_variance(depth, width, std, kind, x, checks.generator(8))[1]
    source, rows, expected = checks.generator(8), x.clone(), [x.pow(2).mean()]
    for _ in range(depth):
        w = std * torch.randn(width, width, generator=source, dtype=torch.float64)
        new = []
        for row in rows:  # row by row
            entering = row / (row @ row / width).sqrt() if kind == "prenorm" else row
            out = torch.einsum("ij,j->i", w, entering)
            new.append(
                out
                if kind == "linear"
                else torch.where(out > 0, out, 0.0)
                if kind == "relu"
                else row + out
            )
        rows = torch.stack(new)
        expected.append(rows.pow(2).mean())
    checks.close(
        measured,
        torch.stack(expected),
        what=f'measured for "{kind}", depth {depth}, width {width}',
        dtype=torch.float64,
        rtol=1e-9,
        hint="Each layer draws its own matrix, and norm works row by row",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### See it
#
# Handwritten digits, 64 pixels each, go through random networks of width 64. **Write down first**:
# with $\sigma = \sqrt{2/n}$, which of the four kinds keep their scale over 60 layers? And how far
# will a single network be from the expectation?

# %% tags=["experiment", "figure"]
# Figure: mean square through 60 layers, predicted and measured
pixels = data.digits()[0][:200].flatten(1)
pixels = pixels / pixels.square().mean().sqrt()
g = torch.Generator().manual_seed(0)
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.9))
cases = {
    "linear, $\\sigma^2 = 1/n$": ("linear", 1 / 8),
    "ReLU, $\\sigma^2 = 1/n$ (Xavier)": ("relu", 1 / 8),
    "ReLU, $\\sigma^2 = 2/n$ (Kaiming)": ("relu", 2**0.5 / 8),
    "residual, $\\sigma^2 = 1/n$": ("residual", 1 / 8),
}
for i, (name, (kind, std)) in enumerate(cases.items()):
    for _ in range(5):
        predicted, measured = forward_variance(60, 64, std, kind, pixels, g)
        axes[0].plot(measured, color=plot.COLORS[i], linestyle="-", linewidth=0.8, alpha=0.45)
    axes[0].plot(predicted, color=plot.COLORS[i], linestyle=plot.DASHES[i], label=name)
axes[0].set(yscale="log", xlabel="layer", ylabel="mean square of the activations")
axes[0].set_title("without normalization")
axes[0].legend(fontsize=8)
for i, (name, std) in enumerate(
    {
        "$\\sigma^2 = 1/n$": 1 / 8,
        "$\\sigma^2 = 1/(60\\,n)$: GPT-2's scaling": 1 / 8 / 60**0.5,
    }.items()
):
    for _ in range(5):
        predicted, measured = forward_variance(60, 64, std, "prenorm", pixels, g)
        axes[1].plot(measured, color=plot.COLORS[i], linestyle="-", linewidth=0.8, alpha=0.45)
    axes[1].plot(predicted, color=plot.COLORS[i], linestyle=plot.DASHES[i], label=name)
axes[1].set(xlabel="layer", ylabel="mean square of the residual stream")
axes[1].set_title("residual with pre-norm")
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Thick: predicted; thin: five random networks of width 64 each. Left, logarithmic: each "
    "factor per layer becomes a power of the depth. At 1 two predictions lie on each other: "
    "Kaiming keeps the expectation of a ReLU network, but single networks wander off and mostly "
    "sink. Right, linear: behind a norm the stream grows by the same amount in each layer, and "
    "dividing σ² by the depth bounds the total.",
)
plot.plt.show()

# %% [markdown]
# Two things to keep. First, the *expectation* is kept and a single network is not: $\log q$ does a
# random walk over the layers, with steps of variance about $5/n$ for ReLU, so the typical network
# lies below the mean, and the spread is governed by depth divided by width. That, and not the
# formula, is why very deep plain networks are hard. Second, the pre-norm stream grows only
# linearly, and there the remaining question is by how much.

# %% [markdown]
# ## GPT-2: one hundred branches into one stream
#
# A pre-norm Transformer of $L$ blocks adds $2L$ branches to its residual stream: one of attention
# and one of the MLP in each block. Each ends in a projection ($W_O$ in attention, the second matrix
# of the MLP), and by the last row of the table above each adds $s^2$, the mean square of its
# output. At the end the stream has
#
# $$ q_{2L} = q_0 + 2L\,s^2 . $$
#
# Two things go wrong as $L$ grows. The stream's size depends on the depth, so the same update means
# something else in a deep model. And a late branch of size $s$ speaks into a stream of size
# $s\sqrt{2L}$. Multiply the standard deviation of each branch's *last* matrix by $1/\sqrt{2L}$ and
# the sum is $q_0 + s^2$ for every depth.
#
# This is what the GPT-2 report says in half a sentence (weights of residual layers are scaled by
# $1/\sqrt N$, with $N$ the number of residual layers), and what its descendants do: standard
# deviation 0.02 for everything, $0.02/\sqrt{2L}$ for the projections that write into the stream.
# Why 0.02? It is $1/\sqrt{n}$ at $n = 2500$, the right order for the widths of that family, 768 to
# 1600; it has been copied ever since, for other widths too. [](#width) is about what to do with the
# width properly.
#
# Here is the model of this lesson, a small GPT with a few switches for the experiments.


# %%
class Attention(nn.Module):
    """Causal multi-head self-attention; `scores` and `weights` are those of the last call."""

    def __init__(
        self, width: int, heads: int, linear: type[nn.Module] = nn.Linear, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.score_scale = heads, (width // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(width, width) for _ in range(4)
        )
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        # (batch, heads, tokens, tokens), the hidden ones too
        scores = self.q_norm(q) @ self.k_norm(k).mT * self.score_scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        self.scores, self.weights = scores.detach(), weights.detach()
        return self.out_proj((weights @ v).transpose(-3, -2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.fc_in, self.fc_out = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(F.gelu(self.fc_in(x)))


class Block(nn.Module):
    """x + f(norm(x)), or norm(alpha · x + f(x)) with post_norm, for attention, then the MLP."""

    def __init__(self, width: int, heads: int, post_norm: bool = False, **options) -> None:
        super().__init__()
        self.post_norm, self.alpha = post_norm, 1.0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, **options)
        self.mlp = MLP(width, options.get("linear", nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            x = norm(self.alpha * x + branch(x)) if self.post_norm else x + branch(norm(x))
        return x


class GPT(nn.Module):
    """tokens (batch, seq), int64 → logits (batch, seq, vocab)."""

    def __init__(
        self, vocab: int, width: int, layers: int = 2, heads: int = 4, context: int = 64, **options
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, **options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.logit_scale = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.logit_scale * self.head(self.norm(x))


# %% exercise="gpt2_init" minutes=20 difficulty=2
def gpt2_init(
    model: nn.Module, std: float = 0.02, generator: torch.Generator | None = None
) -> None:
    """Initializes a GPT in place, as GPT-2's descendants do; L = len(model.blocks).

    Weights of every nn.Linear and nn.Embedding: normal, mean 0, standard deviation std; but std /
    √(2L) for the two projections of each block that write into the residual stream,
    `attention.out_proj` and `mlp.fc_out`.
    Biases of every nn.Linear: 0. Every nn.LayerNorm: weight 1, bias 0. Modules of other kinds are
    left as they are. Draws come from `generator`. Returns None.
    """
    ### BEGIN SOLUTION
    smaller = std / math.sqrt(2 * len(model.blocks))
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            writes = name.endswith(("attention.out_proj", "mlp.fc_out"))
            nn.init.normal_(module.weight, std=smaller if writes else std, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: walking through a model</summary>
#
# `model.named_modules()` yields `("blocks.0.attention.out_proj", module)` and so on; `isinstance`
# tells the kinds apart.
# </details>
#
# <details><summary>Hint: the head has no bias</summary>
#
# `nn.Linear(..., bias=False).bias` is None.
# </details>


# %% tags=["support"]
# Support: a model full of nonsense, in which shows what an initialization leaves out


def spoiled(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The model with every parameter set to nonsense."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) + 3)
    return model


# %% check="gpt2_init" points=1
g = checks.generator(10)
model = spoiled(GPT(vocab=50, width=48, layers=8), g)
gpt2_init(model, generator=g)
for block in model.blocks:
    for norm in (block.norm1, block.norm2):
        checks.close(
            norm.weight,
            torch.ones(48),
            what="a LayerNorm's weight",
            hint="A norm that starts at 0, or at random, changes what every layer sees",
        )
        checks.close(norm.bias, torch.zeros(48), what="a LayerNorm's bias")
    checks.close(block.mlp.fc_in.bias, torch.zeros(192), what="the bias of fc_in")
### BEGIN HIDDEN TESTS
for layers, width, heads, qk_norm in [(1, 32, 2, False), (3, 40, 4, True)]:
    model = spoiled(GPT(vocab=11, width=width, layers=layers, heads=heads, qk_norm=qk_norm), g)
    with checks.kept(model=model, values=False):
        gpt2_init(model, generator=g)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            expected = (
                torch.ones_like(p)
                if "norm" in name and name.endswith("weight")
                else torch.zeros_like(p)
            )
            checks.close(p, expected, what=f"{name} of a model with {layers} layers")
        assert p.is_leaf, f"{name}: filling a parameter is not a step that autograd records"
# A module of another kind keeps its values.
model = GPT(vocab=11, width=32)
model.extra = nn.PReLU()
gpt2_init(model)
checks.close(
    model.extra.weight, torch.tensor([0.25]), what="the slope of a PReLU (a module of another kind)"
)
### END HIDDEN TESTS

# %% check="gpt2_init" points=2
g = checks.generator(12)
model = spoiled(GPT(vocab=50, width=48, layers=8), g)
gpt2_init(model, generator=g)
for name in (
    "embed.weight",
    "position.weight",
    "head.weight",
    "blocks.0.attention.q_proj.weight",
    "blocks.7.mlp.fc_in.weight",
):
    expect_drawn(
        model.get_parameter(name),
        0.02,
        "normal",
        name,
        {
            "scaling every matrix, not only the last of each branch,": 0.02 / 4,
            "taking 0.02 for the variance": 0.02**0.5,
            "passing the variance as the standard deviation": 0.02**2,
        },
    )
for name in ("blocks.0.attention.out_proj.weight", "blocks.7.mlp.fc_out.weight"):
    expect_drawn(
        model.get_parameter(name),
        0.02 / 4,
        "normal",
        f"{name} with 8 layers",
        {
            "1/√L: but each block has two branches": 0.02 / 8**0.5,
            "no scaling of the residual projections": 0.02,
            "1/(2L) without the root": 0.02 / 16,
        },
    )
### BEGIN HIDDEN TESTS
for layers, width, std in [(1, 64, 0.02), (2, 48, 0.5), (12, 40, 0.006)]:
    model = spoiled(GPT(vocab=60, width=width, layers=layers, context=50), g)
    gpt2_init(model, std=std, generator=g)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            writes = ".out_proj." in name or ".fc_out." in name
            expect_drawn(
                p,
                std / math.sqrt(2 * layers) if writes else std,
                "normal",
                f"{name} with {layers} layers, std {std}",
                {
                    "1/√L": std / math.sqrt(layers),
                    "no scaling": std,
                    "1/√(2L) here too": std / math.sqrt(2 * layers),
                    "0.02 whatever std": 0.02,
                },
            )
# Everything is drawn from the generator; two blocks do not get the same numbers.
model = GPT(vocab=9, width=16, layers=2)


def redrawn(generator: torch.Generator) -> list[Tensor]:
    gpt2_init(model, generator=generator)
    return list(model.parameters())


checks.uses_generator(redrawn, what="gpt2_init")
first, second = (block.mlp.fc_in.weight for block in model.blocks)
assert not torch.equal(first, second), "two blocks have the same weights"
### END HIDDEN TESTS

# %% [markdown]
# ## The way back: gradients by layer
#
# A gradient that vanishes or explodes shows in one picture: the norm of $\partial\ell/\partial y$
# at the output $y$ of each layer. PyTorch hands you these outputs through **hooks**, functions that
# a module calls after each forward pass. A hook stays until it is removed. One that is left behind
# runs in every later step and keeps alive what it has stored; it is a common reason why a notebook
# grows slower and runs out of memory.


# %% exercise="gradient_norms" minutes=25 difficulty=2
def gradient_norms(
    model: nn.Module, loss: Callable[[], Tensor], kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> dict[str, float]:
    """{module's name: ‖∂loss/∂output‖}: the norm of the gradient at the output of each layer.

    loss: a function without arguments that runs the model and returns a scalar that requires a
    gradient. It is called once.

    One entry for every module of model.named_modules() that is an instance of one of `kinds`, with
    these names and in this order: the model itself counts, under "", and without such modules the
    result is {}. Such a module returns one tensor, which requires a gradient and which nothing
    changes in place afterwards (no nn.ReLU(inplace=True) follows). A module that is called several
    times in the run has the root of the sum of the squares over all its calls; one that is not
    called, or on which the loss does not depend, has 0.0.

    The model is left as it was, also when loss() raises: no hooks of ours, parameters and their
    .grad untouched.
    """
    ### BEGIN SOLUTION
    added = {name: [] for name, module in model.named_modules() if isinstance(module, kinds)}

    def add_zero(zeros: list[Tensor], output: Tensor) -> Tensor:
        # The gradient at a zero that is added to the output is the gradient at the output, whatever
        # happens to the sum, and whether or not anything before it has a graph.
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    handles = []
    try:
        for name, zeros in added.items():
            hook = lambda module, inputs, output, zeros=zeros: add_zero(zeros, output)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    leaves = [(name, zero) for name, zeros in added.items() for zero in zeros]
    gradients = ()
    if leaves and value.requires_grad:
        gradients = torch.autograd.grad(value, [zero for _, zero in leaves], allow_unused=True)
    squares = dict.fromkeys(added, 0.0)
    for (name, _), gradient in zip(leaves, gradients, strict=False):
        if gradient is not None:
            squares[name] += float(gradient.double().square().sum())
    return {name: math.sqrt(square) for name, square in squares.items()}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all hooks see the same name</summary>
#
# A function made in a loop looks its variables up when it is called, and by then the loop is at its
# end. A default argument, `lambda module, inputs, output, name=name: …`, is fixed when the function
# is made.
# </details>
#
# <details><summary>Hint: leaving .grad alone</summary>
#
# `loss.backward()` adds to the .grad of every parameter. `torch.autograd.grad(loss, tensors)`
# returns gradients and stores none; `allow_unused=True` gives None for those that the loss does not
# need.
# </details>
#
# <details><summary>Hint: also when loss() raises</summary>
#
# `try: … finally: …`
# </details>


# %% check="gradient_norms" points=2
model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
with torch.no_grad():
    model[0].weight.copy_(torch.eye(2))
    model[1].weight.copy_(torch.tensor([[3.0, 4.0]]))
x = torch.ones(1, 2)
with checks.kept(model=model):  # no hook stays, no .grad is filled
    norms = gradient_norms(model, lambda: 2 * model(x).sum())
checks.kind(norms, dict, what="gradient_norms")
assert list(norms) == ["0", "1"], (
    f"the keys should be the names of the two layers, ['0', '1']; yours are {list(norms)}"
)
checks.close(
    torch.tensor([norms["0"], norms["1"]]),
    torch.tensor([10.0, 2.0]),
    what="the norms at the outputs of layers 0 and 1",
    rtol=1e-6,
    mistakes={
        "the gradient at each layer's input": torch.tensor([10.0, 10.0]),
        "the gradient of the weight": torch.tensor([math.sqrt(200), math.sqrt(8)]),
        "the square of the norm": torch.tensor([100.0, 4.0]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(20)
for layers, width, heads, post_norm in [(1, 8, 2, False), (3, 12, 3, True), (2, 16, 1, False)]:
    model = spoiled(
        GPT(vocab=7, width=width, layers=layers, heads=heads, post_norm=post_norm), g
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.15)
    tokens = torch.randint(0, 7, (3, 5), generator=g)
    loss = lambda model=model, tokens=tokens: F.cross_entropy(
        model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()
    )
    for kinds in [(nn.Linear,), (Block, nn.Embedding), (nn.LayerNorm,)]:
        norms = gradient_norms(model, loss, kinds)
        names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        assert list(norms) == names, f"the keys are {list(norms)}, not {names}"
        # Independent: the derivative with respect to something added to the output, one module at a
        # time.
        for name in names:
            module, added = model.get_submodule(name), []

            def add_nothing(module, inputs, output, added=added):
                added.append(torch.zeros_like(output, requires_grad=True))
                return output + added[0]

            handle = module.register_forward_hook(add_nothing)
            value = loss()
            handle.remove()
            # The table of positions is not called, its weight is read.
            expected = float(torch.autograd.grad(value, added)[0].norm()) if added else 0.0
            checks.close(norms[name], expected, what=f"the norm at {name}", rtol=1e-9)
### END HIDDEN TESTS

# %% check="gradient_norms" points=1
model = nn.ModuleDict(
    {"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3), "aside": nn.Linear(3, 3)}
)
x = torch.ones(2, 3)


def run():
    model["aside"](x)  # called, but the loss does not depend on it
    return model["used"](x).sum()


norms = gradient_norms(model, run)
assert {name: round(value, 4) for name, value in norms.items()} == {
    "used": round(math.sqrt(6), 4),
    "unused": 0.0,
    "aside": 0.0,
}, f"used: √6, unused and aside: 0.0 are expected; yours are {norms}"
### BEGIN HIDDEN TESTS
# The same module twice.
g = checks.generator(21)
shared = nn.Linear(4, 4).double()
model, x = nn.Sequential(shared), torch.randn(5, 4, generator=g, dtype=torch.float64)


def twice():
    global first, second
    first = shared(x)
    second = shared(first.tanh())
    return second.pow(2).sum()


value = twice()
parts = torch.autograd.grad(value, [first, second])
checks.close(
    gradient_norms(model, twice)["0"],
    float(torch.cat(parts).norm()),
    what="the norm at a module that is called twice",
    rtol=1e-9,
    mistakes={
        "the last call alone": float(parts[1].norm()),
        "the first call alone": float(parts[0].norm()),
        "the norm of the sum of the gradients": float((parts[0] + parts[1]).norm()),
        "the sum of the norms": float(parts[0].norm() + parts[1].norm()),
    },
)
# The model itself is one of its modules; of a kind that it lacks there is no entry.
checks.close(
    gradient_norms(shared, lambda: 3 * shared(x).sum()).get("", 0.0),
    3 * math.sqrt(20),
    what='the norm at a model that is a layer itself, under ""',
)
found = gradient_norms(shared, lambda: shared(x).sum(), (nn.Embedding,))
assert found == {}, f"a model without a module of the kinds gives {{}}; yours gives {found!r}"
# What was there stays: gradients, hooks, values, frozen parameters.
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
model[0].weight.requires_grad_(False)
seen = []
model[0].register_forward_hook(lambda *_: seen.append(1))
model(x).sum().backward()
calls = []
with checks.kept(model=model):
    norms = gradient_norms(model, lambda: calls.append(1) or model(x).exp().mean())
assert len(calls) == 1, f"loss was called {len(calls)} times, not once"
assert norms["0"] > 0, (
    "a frozen weight does not stop the gradient at the layer's output: its bias still learns"
)


def fails():
    model(x)
    raise KeyError("a mistake in the loss")


with checks.kept(model=model):  # also after an error no hook may stay
    checks.raises(
        KeyError, gradient_norms, model, fails, because="the error of loss() is the caller's to see"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## DeepNorm: a hundred layers with post-norm
#
# Post-norm, $x \leftarrow \mathrm{LN}(x + f(x))$, is the original Transformer. Where it trains it
# is often reported to end better than pre-norm, and deep stacks of it do not train. **DeepNorm**
# (Wang et al. 2022) repairs it with two constants:
#
# $$ x \leftarrow \mathrm{LN}(\alpha\,x + f(x)), \qquad \text{the matrices of } f \text{ initialized smaller by a factor } \beta . $$
#
# How large must they be? Look at how much one update changes the output of the whole network. Let a
# branch be two matrices in a row, $f(x) = W_2W_1x$ (in attention: $W_OW_V$, the softmax only takes
# averages), each $\beta$ times an initialization that keeps the scale, and let every norm divide by
# about $\alpha$, the size of what dominates.
#
# 1. Moving $W_2$ by $\delta$ times a matrix that keeps the scale changes the branch by
#    $\beta\,\delta$, since $W_1x$ has size $\beta$; the norm turns this into $\beta\delta/\alpha$.
#    For $W_1$ the same.
# 2. How far a gradient step moves it: the gradient of $W_2$ is, by the same factors, of size
#    $\beta/\alpha$, so $\delta = \eta\,\beta/\alpha$. A step therefore changes the output by
#    $\eta\,\beta^2/\alpha^2$ for each matrix.
# 3. There are $2L$ branches with two matrices each. Their changes pull the same way, down the loss,
#    and add up: $\eta \cdot 4L\,\beta^2/\alpha^2$.
#
# For the change to be $\eta$, whatever the depth, $\alpha^2 = 4L\,\beta^2$. The paper splits this
# evenly between the two: for a stack of $L$ layers that is only an encoder or only a decoder
#
# $$ \alpha = (2L)^{1/4}, \qquad \beta = (8L)^{-1/4} . $$
#
# (The argument is the paper's in spirit; theirs is a bound, with the constants worked out.) The
# base initialization is Xavier's *normal* one, standard deviation
# $g\sqrt{2/(n_\text{in}+n_\text{out})}$, with gain $g = \beta$ for the values, the output
# projection and both matrices of the MLP. Queries and keys keep gain 1: they decide where the
# softmax looks, not how much comes through.


# %% exercise="deepnorm" minutes=15 difficulty=2 path="more"
def deepnorm_constants(layers: int) -> tuple[float, float]:
    """(alpha, beta) of DeepNorm for a decoder-only stack of layers (each: attention and MLP)."""
    ### BEGIN SOLUTION
    return (2 * layers) ** 0.25, (8 * layers) ** -0.25
    ### END SOLUTION


def deepnorm_init(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Prepares a GPT made with post_norm=True for DeepNorm, in place. Returns None.

    Sets `block.alpha` of each of model.blocks to alpha. Weights of the nn.Linear modules inside the
    blocks: Xavier normal, mean 0, standard deviation gain · √(2 / (fan_in + fan_out)), with gain
    beta for v_proj, out_proj, fc_in and fc_out, and gain 1 for q_proj and k_proj; their biases 0.
    Everything outside the blocks, and the norms, are left as they are.
    """
    ### BEGIN SOLUTION
    alpha, beta = deepnorm_constants(len(model.blocks))
    for block in model.blocks:
        block.alpha = alpha
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                gain = 1.0 if name.endswith(("q_proj", "k_proj")) else beta
                nn.init.xavier_normal_(module.weight, gain=gain, generator=generator)
                nn.init.zeros_(module.bias)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: PyTorch's own</summary>
#
# From [](#one-layer) on you may use `nn.init`; `xavier_normal_` has a `gain`.
# </details>

# %% check="deepnorm" points=1
result = checks.parts(deepnorm_constants(8), "alpha", "beta")
checks.close(
    torch.tensor(result, dtype=torch.float64),
    [2.0, 8**-0.5],
    what="alpha and beta for 8 layers",
    rtol=1e-6,
    mistakes={
        "square roots for fourth roots": [4.0, 0.125],
        "beta that grows with depth": [2.0, 8**0.5],
        "the two exchanged": [8**-0.5, 2.0],
        "counting layers where branches are meant": [8**0.25, 8**-0.5],
    },
)
### BEGIN HIDDEN TESTS
for layers in (1, 2, 18, 100, 1000):
    alpha, beta = deepnorm_constants(layers)
    checks.close(alpha**4, 2.0 * layers, what=f"alpha⁴ for {layers} layers", rtol=1e-6)
    checks.close(
        alpha / beta,
        2 * math.sqrt(layers),
        what=f"alpha / beta for {layers} layers",
        rtol=1e-6,
        hint="α² = 4 L β²",
    )
### END HIDDEN TESTS

# %% check="deepnorm" points=1
g = checks.generator(30)
model = spoiled(GPT(vocab=20, width=40, layers=2, post_norm=True), g)  # L = 2: α = √2, β = 1/2
deepnorm_init(model, generator=g)
assert all(abs(getattr(block, "alpha", 0) - 2**0.5) < 1e-6 for block in model.blocks), (
    f"block.alpha should be √2 for 2 layers; yours is {model.blocks[0].alpha}"
)
for name, gain in {"attention.q_proj": 1.0, "attention.v_proj": 0.5, "mlp.fc_in": 0.5}.items():
    weight = model.blocks[1].get_submodule(name).weight
    fans = sum(weight.shape)
    expect_drawn(
        weight,
        gain * math.sqrt(2 / fans),
        "normal",
        f"{name} with 2 layers",
        {
            "gain 1 for all": math.sqrt(2 / fans),
            "gain β for all": 0.5 * math.sqrt(2 / fans),
            "the gain squared": gain**2 * math.sqrt(2 / fans),
            "fan_in alone": gain / math.sqrt(weight.shape[1]),
            "multiplying by α": gain * 2 / math.sqrt(fans),
        },
    )
### BEGIN HIDDEN TESTS
for layers, width in [(1, 48), (6, 40)]:
    model = spoiled(GPT(vocab=20, width=width, layers=layers, post_norm=True), g)
    outside = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if not name.startswith("blocks.") or "norm" in name
    }
    deepnorm_init(model, generator=g)
    beta = (1 / (8 * layers)) ** 0.25
    for name, p in model.named_parameters():
        if name in outside:
            checks.close(
                p, outside[name], what=f"{name} (DeepNorm leaves it alone)", rtol=0, atol=0
            )
        elif p.dim() == 1:
            checks.close(p, torch.zeros_like(p), what=name)
        else:
            gain = 1.0 if "q_proj" in name or "k_proj" in name else beta
            expect_drawn(
                p,
                gain * math.sqrt(2 / (p.shape[0] + p.shape[1])),
                "normal",
                f"{name} with {layers} layers",
            )
    assert all(abs(block.alpha - (2 * layers) ** 0.25) < 1e-6 for block in model.blocks), (
        f"block.alpha for {layers} layers"
    )
model = GPT(vocab=9, width=16, layers=2, post_norm=True)


def redrawn(generator: torch.Generator) -> list[Tensor]:
    deepnorm_init(model, generator=generator)
    return list(model.blocks.parameters())


with checks.kept(model=model, values=False):
    checks.uses_generator(redrawn, what="deepnorm_init")
### END HIDDEN TESTS

# %% [markdown]
# ### See both
#
# Real text from Python's documentation, character by character, through stacks of 4 to 64 layers,
# untrained. Left: your `gradient_norms` at the output of each block of a 32-layer stack. Right: how
# far one small gradient step on all matrices moves the logits, against depth. **Write down first**:
# which curve on the right is flat, if the derivation holds? And GPT-2's scaling, does it bound the
# *update* as it bounds the stream?

# %% tags=["experiment"]
text = "\n".join(data.documentation().values())
alphabet = sorted(set(text))
ids = torch.tensor([{c: i for i, c in enumerate(alphabet)}[c] for c in text])


def windows(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces of the text and, for each character, the next one: both (batch, length)."""
    starts = torch.randint(len(ids) - length - 1, (batch, 1), generator=generator)
    pieces = ids[starts + torch.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def text_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def stack(kind: str, layers: int) -> nn.Module:
    """An untrained model of one of three kinds, all with the same embedding."""
    torch.manual_seed(0)
    model = GPT(len(alphabet), 32, layers, context=24, post_norm=kind != "pre-norm, GPT-2")
    gpt2_init(model)
    nn.init.normal_(model.embed.weight)
    if kind == "post-norm, DeepNorm":
        deepnorm_init(model)
    elif kind == "post-norm, Xavier":
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
    return model


kinds = ("post-norm, Xavier", "post-norm, DeepNorm", "pre-norm, GPT-2")
x, y = windows(4, 24, torch.Generator().manual_seed(0))
by_layer, moved = {}, {kind: [] for kind in kinds}
depths = [4, 8, 16, 32, 64]
for kind in kinds:
    for layers in depths:
        model = stack(kind, layers)
        if layers == 32:
            norms = gradient_norms(model, lambda model=model: text_loss(model, x, y), (Block,))
            by_layer[kind] = list(norms.values())
        before = model(x)
        loss = F.cross_entropy(before.flatten(0, 1), y.flatten())
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        step = torch.autograd.grad(loss, matrices)
        with torch.no_grad():
            for p, gradient in zip(matrices, step, strict=True):
                p -= 1e-3 * gradient
            moved[kind].append(float((model(x) - before).square().mean().sqrt()) / 1e-3)

# %% tags=["experiment", "figure"]
# Figure: the gradient by layer, and how far one step moves the logits
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.9))
plot.curves(
    range(1, 33),
    by_layer,
    logy=True,
    xlabel="block (1 = next to the input)",
    ylabel="‖∂loss/∂output‖",
    title="gradient by layer, 32 layers",
    ax=axes[0],
)
plot.curves(
    depths,
    moved,
    logx=True,
    logy=True,
    xlabel="layers",
    ylabel="change of the logits / learning rate (rms)",
    title="what one gradient step does",
    ax=axes[1],
)
axes[1].get_legend().remove()
plot.caption(
    fig,
    "Untrained stacks of width 32. Left: DeepNorm and pre-norm pass the gradient through "
    "unchanged; in plain post-norm it wanders by a factor of several. Right: the change of the "
    "logits by one step of gradient descent on the matrices of the blocks. With DeepNorm it does "
    "not depend on the depth.",
)
plot.plt.show()
for kind in kinds:
    print(
        f"{kind:20s} change of the logits / learning rate at 4 layers {moved[kind][0]:.2g}, at 64 "
        f"layers {moved[kind][-1]:.2g}"
    )

# %% [markdown]
# The flat curve is the derivation come true, over a factor of 16 in depth. Pre-norm's grows about
# in proportion to the depth: GPT-2's factor makes the branch *small*, but a step on the last matrix
# of a branch, whose input is not small, is as effective as ever, and there are $2L$ of them. It
# starts so much lower that no harm is done at this depth. Plain post-norm grows by a factor of tens
# to hundreds (it depends much on the seed), and this is what warm-up has to hide.
#
# Biases and norms were left out of the step. They are not initialized smaller by anything, so their
# share of the change grows with depth in all three stacks.

# %% [markdown]
# ## Width: µP {#width}
#
# Tune the learning rate at width 256, train at width 8192 with the same rate, and the run is likely
# to diverge. The initialization is not at fault, it kept every mean square. The *updates* did not.
#
# Take a hidden layer $y = Wx$ with $n$ inputs of size about 1. Adam divides the gradient by its own
# size, so each entry of $W$ moves by about $\eta$: $\Delta W_{ij} = -\eta\,\mathrm{sign}(g_{ij})$
# to a first approximation. For one example the gradient is an outer product,
# $g_{ij} = \delta_i x_j$, and then
#
# $$ (\Delta W\,x)_i = -\eta\sum_{j=1}^n \mathrm{sign}(\delta_i)\,\mathrm{sign}(x_j)\,x_j = -\eta\,\mathrm{sign}(\delta_i)\sum_{j=1}^n |x_j| \;\propto\; \eta\,n . $$
#
# At initialization $W$ knows nothing of $x$, its $n$ terms have random signs, and their sum grows
# like $\sqrt n$; this is what $\sigma = 1/\sqrt n$ undoes. The update is *made from* $x$, its terms
# all have the same sign, and their sum grows like $n$. So a learning rate must fall like $1/n$
# where an initialization falls like $1/\sqrt n$. This is the whole secret of **µP**, the maximal
# update parametrization (Yang et al. 2022): look at every kind of parameter and ask over how many
# inputs its update is summed.
#
# - **Hidden matrices** (both sides grow with the width): $\sigma \propto 1/\sqrt n$, Adam's rate
#   $\propto 1/n$.
# - **Input matrices and embeddings** (only the output side grows): an output sums over a fixed
#   number of inputs. Nothing depends on $n$.
# - **Vectors** (biases, the gains of norms): one parameter for each feature, no sum at all. Nothing
#   depends on $n$.
# - **The output matrix** (only the input side grows): logits sum over $n$ aligned terms, so update
#   *and* weights must be worth $1/n$. One can shrink its rate and its standard deviation by $1/n$;
#   or leave both alone and multiply the logits by $1/n$. The second is easier to implement, and it
#   goes together with tied embeddings, since the matrix itself is then treated like an input. At
#   initialization the terms are not yet aligned and the logits shrink like $1/\sqrt n$; that is
#   harmless, and after a few steps it is over.
# - **Attention scores** $q\cdot k$ (when heads get wider): after some training queries and keys are
#   correlated, and their product is a sum of $d_k$ terms of one sign. So $1/d_k$, not
#   $1/\sqrt{d_k}$ (lesson 09 has the case of random ones).
#
# Relative to a base model, in which everything is as you like it, with $r = $ width / base:
#
# | kind | standard deviation | Adam's learning rate | forward multiplier |
# |---|---|---|---|
# | input, vector | 1 | 1 | 1 |
# | hidden | ? | ? | 1 |
# | output | 1 | 1 | ? |
# | attention scores (on top of $1/\sqrt{d_k}$) | – | – | ? |
#
# (This is Table 8 of the paper, relative to a base model, and what the package `mup` implements.
# Other tables look different and are the same network: multiplying a weight by $c$ forward is the
# same as multiplying its standard deviation and, under Adam, its learning rate by $c$.)


# %%
class Multipliers(NamedTuple):
    """By what a kind of parameter is multiplied, relative to the base model."""

    init: float  # its standard deviation at initialization
    lr: float  # Adam's learning rate
    forward: float  # what it contributes to the forward pass


# %% exercise="mup_scale" minutes=15 difficulty=2 path="more"
def mup_scale(width: int, base: int) -> dict[str, Multipliers]:
    """µP for Adam: this width's multipliers, relative to a base model in which all are 1.

    Keys: "input", "vector", "hidden", "output", "attention". Of the equivalent forms it is the one
    in which only hidden matrices change their standard deviation and their learning rate;
    "attention" is the multiplier of the scores when heads get wider and not more numerous, on top
    of 1/√head_dim (it has no parameters: init and lr are 1). width and base are positive and in any
    order.
    """
    ### BEGIN SOLUTION
    ratio = width / base
    return {
        "input": Multipliers(1.0, 1.0, 1.0),
        "vector": Multipliers(1.0, 1.0, 1.0),
        "hidden": Multipliers(ratio**-0.5, 1 / ratio, 1.0),
        "output": Multipliers(1.0, 1.0, 1 / ratio),
        "attention": Multipliers(1.0, 1.0, ratio**-0.5),
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: attention</summary>
#
# The total should fall like 1/head_dim, and a factor of 1/√head_dim is there already. Four times
# the width is four times the head_dim.
# </details>


# %% tags=["support"]
# Support: a network from a table of multipliers, and how far a few updates move it


def mup_network(
    table: dict[str, Multipliers], width: int, base: int, generator: torch.Generator
) -> tuple[list[Tensor], list[dict], Callable]:
    """(parameters, groups for Adam, forward) of a network with two hidden matrices."""
    shapes = {
        "input": (width, 64),
        "hidden": (width, width),
        "hidden 2": (width, width),
        "output": (10, width),
        "vector": (width,),
    }
    base_std = {
        "input": 1 / 8,
        "hidden": (2 / base) ** 0.5,
        "hidden 2": (2 / base) ** 0.5,
        "output": base**-0.5,
        "vector": 0.0,
    }
    params = {
        name: (
            base_std[name] * table[name.split()[0]].init * torch.randn(*shape, generator=generator)
        ).requires_grad_()
        for name, shape in shapes.items()
    }
    groups = [{"params": [p], "lr": 0.01 * table[name.split()[0]].lr} for name, p in params.items()]

    def forward(x: Tensor) -> dict[str, Tensor]:
        first = F.relu(
            x @ params["input"].T * table["input"].forward
            + params["vector"] * table["vector"].forward
        )
        second = F.relu(first @ params["hidden"].T * table["hidden"].forward)
        third = F.relu(second @ params["hidden 2"].T * table["hidden"].forward)
        return {
            "layer 1": first,
            "layer 2": second,
            "layer 3": third,
            "logits": third @ params["output"].T * table["output"].forward,
        }

    return list(params.values()), groups, forward


def changes(
    params: list[Tensor],
    groups: list[dict],
    forward: Callable,
    generator: torch.Generator,
    steps: int = 4,
) -> dict[str, float]:
    """How far a few updates of Adam move each layer's activations (rms): a coordinate check."""
    x, y = (
        torch.randn(32, 64, generator=generator),
        torch.randint(0, 10, (32,), generator=generator),
    )
    optimizer = torch.optim.Adam(groups)
    with torch.no_grad():
        before = forward(x)
    for _ in range(steps):
        for p, gradient in zip(
            params,
            torch.autograd.grad(F.cross_entropy(forward(x)["logits"], y), params),
            strict=True,
        ):
            p.grad = gradient
        optimizer.step()
    with torch.no_grad():
        after = forward(x)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


# %% check="mup_scale" points=1
table = mup_scale(1024, 256)  # r = 4
assert isinstance(table, dict), f"a dict is asked for; yours is {table!r}"
assert set(table) == {"input", "vector", "hidden", "output", "attention"}, (
    f"five keys are expected; yours: {list(table)}"
)
assert all(isinstance(row, tuple) and len(row) == 3 for row in table.values()), (
    "each value is Multipliers(init, lr, forward)"
)
checks.close(
    torch.tensor(table["hidden"]),
    [0.5, 0.25, 1.0],
    what='"hidden" at four times the width: (init, lr, forward)',
    rtol=1e-6,
    mistakes={
        "width / base upside down": torch.tensor([2.0, 4.0, 1.0]),
        "1/√r for the learning rate": torch.tensor([0.5, 0.5, 1.0]),
        "1/r for the standard deviation": torch.tensor([0.25, 0.25, 1.0]),
        "dividing by the width, not by width / base": torch.tensor([1024**-0.5, 1 / 1024, 1.0]),
    },
)
checks.close(
    torch.tensor(table["vector"]),
    [1.0, 1.0, 1.0],
    what='"vector": (init, lr, forward)',
    rtol=1e-6,
    hint="No sum over the width enters the update of a bias",
)
### BEGIN HIDDEN TESTS
for width, base in [(64, 64), (256, 64), (1024, 64), (96, 128), (768, 32)]:
    table, r = mup_scale(width, base), width / base
    for kind, init, lr, forward in [
        ("input", 1, 1, 1),
        ("vector", 1, 1, 1),
        ("hidden", r**-0.5, 1 / r, 1),
        ("output", 1, 1, 1 / r),
        ("attention", 1, 1, r**-0.5),
    ]:
        checks.close(
            torch.tensor(table[kind], dtype=torch.float64),
            torch.tensor([init, lr, forward], dtype=torch.float64),
            what=f'"{kind}" at width {width}, base {base}: (init, lr, forward)',
            rtol=1e-9,
        )
### END HIDDEN TESTS

# %% check="mup_scale" points=2
# The law itself: four updates of Adam change the activations by as much at width 1024 as at
# width 64.
moved = {}
for width in (64, 1024):
    moved[width] = changes(
        *mup_network(mup_scale(width, 64), width, 64, checks.generator(40)), checks.generator(45)
    )
for name, narrow in moved[64].items():
    ratio = moved[1024][name] / narrow
    assert 0.4 < ratio < 2.5, (
        f"coordinate check: four updates move {name} {ratio:.2g} times as far at width 1024 as at "
        f"width 64. The same change is wanted; "
        + (
            "what makes it grow, the learning rate of the hidden matrices or the output's "
            "multiplier?"
            if ratio > 1
            else "what shrinks that should not?"
        )
    )
### BEGIN HIDDEN TESTS
for base in (32, 128):
    moved = {}
    for width in (base, 4 * base):
        sizes = [
            changes(
                *mup_network(mup_scale(width, base), width, base, checks.generator(41 + i)),
                checks.generator(46 + i),
            )
            for i in range(3)
        ]
        moved[width] = {name: sum(size[name] for size in sizes) / 3 for name in sizes[0]}
    for name, narrow in moved[base].items():
        ratio = moved[4 * base][name] / narrow
        assert 0.55 < ratio < 1.8, (
            f"coordinate check: {name} is moved {ratio:.2g} times as far at width {4 * base} as "
            f"at width {base}"
        )
# Queries and keys after training: products of correlated vectors.
g = checks.generator(44)
sizes = []
for head_dim in (16, 1024):
    q = torch.randn(500, head_dim, generator=g)
    k = 0.5 * q + torch.randn(500, head_dim, generator=g)
    sizes.append(
        float((q * k).sum(1).mean()) / head_dim**0.5 * mup_scale(head_dim, 16)["attention"].forward
    )
assert 0.7 < sizes[1] / sizes[0] < 1.4, (
    f"scores of correlated queries and keys are {sizes[1] / sizes[0]:.2g} times as large at "
    f"head_dim 1024 as at 16: the multiplier should keep them"
)
### END HIDDEN TESTS

# %% [markdown]
# Now a whole Transformer. What has to be told apart are the **kinds** of its parameters, and here
# is the trap: the embedding and the head have the same two sizes, vocabulary and width, and one is
# an input matrix, the other an output matrix. An embedding selects a row. It sums over nothing.


# %% exercise="mup_setup" minutes=35 difficulty=3 path="more"
def mup_setup(
    model: nn.Module,
    base: int,
    lr: float,
    std: float = 0.02,
    generator: torch.Generator | None = None,
) -> list[dict]:
    """Puts a GPT of any width into µP, relative to one of width `base`; returns Adam's groups.

    The width is model.embed.embedding_dim; both models have the same number of heads, which is
    block.attention.heads. All matrices are weights of nn.Linear or nn.Embedding, and no two modules
    share one (the head is not tied to the embedding). In the base model every matrix has standard
    deviation std and learning rate lr. In this one, with the multipliers of mup_scale:
    - normal draws of mean 0 for all weights of nn.Linear and nn.Embedding (embed, position), of
      their kind's standard deviation; biases of nn.Linear 0; every nn.LayerNorm weight 1, bias 0;
    - model.logit_scale is the output's multiplier;
    - score_scale of each block's attention is head_dim^(−1/2) times the multiplier of the scores.
      It is set, not multiplied: a second call gives the same model.

    Returns a list of dicts {"params": [...], "lr": ...}, in which every parameter stands once, for
    torch.optim.Adam. Draws from `generator`.
    """
    ### BEGIN SOLUTION
    width = model.embed.embedding_dim
    table = mup_scale(width, base)
    members = {kind: [] for kind in ("input", "vector", "hidden", "output")}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            members["vector"] += [module.weight, module.bias]
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            kind = "output" if name == "head" else "hidden"
            kind = "input" if isinstance(module, nn.Embedding) else kind
            nn.init.normal_(module.weight, std=std * table[kind].init, generator=generator)
            members[kind].append(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
                members["vector"].append(module.bias)
        elif isinstance(module, Attention):
            module.score_scale = (width // module.heads) ** -0.5 * table["attention"].forward
    model.logit_scale = table["output"].forward
    return [{"params": params, "lr": lr * table[kind].lr} for kind, params in members.items()]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a list of kinds</summary>
#
# Embeddings: input. The head: output. All other linear weights: hidden. Everything with one axis:
# vector.
# </details>


# %% tags=["support"]
# Support: each parameter's learning rate


def rate_of(model: nn.Module, groups: list[dict]) -> dict[str, float]:
    """{parameter's name: its learning rate}; an error where one is missing or stands twice."""
    names = {id(p): name for name, p in model.named_parameters()}
    rates: dict[str, float] = {}
    for group in groups:
        for p in group["params"]:
            assert id(p) in names, "the groups hold a tensor that is not a parameter of the model"
            assert names[id(p)] not in rates, (
                f"{names[id(p)]} stands in the groups twice: it would be updated twice"
            )
            rates[names[id(p)]] = group["lr"]
    missing = [name for name in names.values() if name not in rates]
    assert not missing, (
        f"{len(missing)} parameters are in no group and would not be trained, the first is "
        f"{missing[0]}"
    )
    return rates


# %%
def moved_by_training(
    model: nn.Module, groups: list[dict], tokens: Tensor, steps: int = 4
) -> dict[str, float]:
    """How far `steps` updates of Adam move a GPT's stream, scores and logits (rms)."""

    def look() -> dict[str, Tensor]:
        kept = {}
        handle = model.norm.register_forward_pre_hook(
            lambda module, inputs: kept.update(stream=inputs[0].detach())
        )
        with torch.no_grad():
            kept["logits"] = model(tokens)
        handle.remove()
        kept["scores"] = model.blocks[-1].attention.scores
        return kept

    before = look()
    optimizer = torch.optim.Adam(groups)
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = look()
    return {
        name: float((after[name] - before[name]).square().mean().sqrt())
        for name in ("stream", "scores", "logits")
    }


# %% check="mup_setup" points=2
g = checks.generator(50)
model = GPT(vocab=20, width=128, layers=1)  # four times the base
rates = rate_of(model, mup_setup(model, base=32, lr=0.01, generator=g))
for name, expected in {
    "blocks.0.mlp.fc_in.weight": 0.0025,
    "blocks.0.attention.q_proj.weight": 0.0025,
    "blocks.0.mlp.fc_in.bias": 0.01,
    "norm.weight": 0.01,
    "embed.weight": 0.01,
    "head.weight": 0.01,
}.items():
    assert abs(rates[name] / expected - 1) < 1e-6, (
        f"the learning rate of {name} should be {expected}; yours is {rates[name]:.4g}. What kind "
        f"of parameter is it?"
    )
checks.close(
    model.logit_scale,
    0.25,
    what="logit_scale at four times the width",
    rtol=1e-6,
    mistakes={"no output multiplier": 1.0, "1/√r": 0.5, "r upside down": 4.0},
)
checks.close(
    model.blocks[0].attention.score_scale,
    32**-0.5 / 2,
    what="score_scale with head_dim 32",
    rtol=1e-6,
    mistakes={
        "1/√head_dim without µP": 32**-0.5,
        "1/head_dim, whatever the base": 1 / 32,
        "1/r on top of 1/√head_dim": 32**-0.5 / 4,
    },
)
### BEGIN HIDDEN TESTS
for width, base, layers, heads in [(64, 64, 1, 4), (32, 128, 2, 2), (96, 32, 3, 8), (48, 24, 1, 1)]:
    model, r = GPT(20, width, layers, heads, qk_norm=layers == 2), width / base
    for _ in range(2):  # a second call changes nothing
        rates = rate_of(model, mup_setup(model, base=base, lr=0.3, generator=g))
    for name, rate in rates.items():
        hidden = name.startswith("blocks.") and model.get_parameter(name).dim() == 2
        checks.close(
            rate,
            0.3 / r if hidden else 0.3,
            what=f"the learning rate of {name} at width {width}, base {base}",
            rtol=1e-9,
        )
    checks.close(
        model.logit_scale, 1 / r, what=f"logit_scale at width {width}, base {base}", rtol=1e-9
    )
    for block in model.blocks:
        checks.close(
            block.attention.score_scale,
            (width // heads) ** -0.5 * r**-0.5,
            what=f"score_scale at width {width}, base {base}, {heads} heads",
            rtol=1e-9,
        )
### END HIDDEN TESTS

# %% check="mup_setup" points=1
g = checks.generator(53)
model = spoiled(GPT(vocab=60, width=128, layers=1), g)
mup_setup(model, base=32, lr=0.01, std=0.1, generator=g)
for name, expected in {
    "blocks.0.mlp.fc_in.weight": 0.05,
    "embed.weight": 0.1,
    "head.weight": 0.1,
}.items():
    expect_drawn(
        model.get_parameter(name),
        expected,
        "normal",
        f"{name} at four times the base",
        {"std / r": 0.025, "std at every width": 0.1, "std / √r here too": 0.05, "std · √r": 0.2},
    )
### BEGIN HIDDEN TESTS
for width, base, std in [(48, 192, 0.02), (80, 20, 0.3)]:
    model = spoiled(GPT(vocab=60, width=width, layers=2), g)
    mup_setup(model, base=base, lr=1.0, std=std, generator=g)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expect_drawn(
                p,
                std * (base / width) ** 0.5 if name.startswith("blocks.") else std,
                "normal",
                f"{name} at width {width}, base {base}",
            )
        else:
            checks.close(
                p,
                torch.ones_like(p)
                if "norm" in name and name.endswith("weight")
                else torch.zeros_like(p),
                what=f"{name} at width {width}",
            )
model = GPT(vocab=9, width=16, layers=2)


def redrawn(generator: torch.Generator) -> list[Tensor]:
    mup_setup(model, base=8, lr=1.0, generator=generator)
    return list(model.parameters())


with checks.kept(model=model, values=False):
    checks.uses_generator(redrawn, what="mup_setup")
### END HIDDEN TESTS

# %% check="mup_setup" points=2
tokens = torch.randint(0, 20, (2, 12), generator=checks.generator(51))
moved = {}
for width in (64, 256):
    model = GPT(vocab=20, width=width, layers=1)
    moved[width] = moved_by_training(
        model, mup_setup(model, base=64, lr=0.01, std=1 / 8, generator=checks.generator(52)), tokens
    )
for name, narrow in moved[64].items():
    ratio = moved[256][name] / narrow
    assert 0.4 < ratio < 2.5, (
        f"coordinate check: four updates move the {name} {ratio:.2g} times as far at width 256 as "
        f"at width 64; the same change is wanted"
    )
### BEGIN HIDDEN TESTS
moved[1024] = moved_by_training(
    model := GPT(vocab=20, width=1024, layers=1),
    mup_setup(model, base=64, lr=0.01, std=1 / 8, generator=checks.generator(52)),
    tokens,
)
for name, narrow in moved[64].items():
    ratio = moved[1024][name] / narrow
    assert 0.4 < ratio < 2.5, (
        f"coordinate check: four updates move the {name} {ratio:.2g} times as far at width 1024 "
        f"as at width 64; the same change is wanted"
    )
### END HIDDEN TESTS

# %% [markdown]
# ### Coordinate check
#
# This is how a µP implementation is tested in practice: train a few steps at several widths and
# plot the size of what changed. Flat is right. On the left is the **standard parametrization**
# (SP): standard deviation $1/\sqrt n$ for every linear layer and one learning rate for all.


# %% tags=["experiment"]
def standard_setup(model: nn.Module, lr: float, generator: torch.Generator) -> list[dict]:
    """Standard parametrization: standard deviation 1/√n for every linear layer, one learning rate
    for all.
    """
    mup_setup(model, base=model.embed.embedding_dim, lr=lr, std=1 / 8, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    return [{"params": list(model.parameters()), "lr": lr}]


widths = [64, 128, 256, 512, 1024]
tokens = windows(2, 12, torch.Generator().manual_seed(1))[0]
sizes = {"standard": {}, "µP, base 64": {}}
for width in widths:
    for name in sizes:
        g = torch.Generator().manual_seed(2)
        model = GPT(len(alphabet), width, layers=1)
        groups = (
            standard_setup(model, 0.01, g)
            if name == "standard"
            else mup_setup(model, 64, 0.01, std=1 / 8, generator=g)
        )
        for what, value in moved_by_training(model, groups, tokens).items():
            sizes[name].setdefault(what, []).append(value)

# %% tags=["experiment", "figure"]
# Figure: what four updates change, by width, in both parametrizations
fig, axes = plot.plt.subplots(1, 2, figsize=(10.4, 3.7), sharey=True)
for ax, (name, lines) in zip(axes, sizes.items(), strict=True):
    plot.curves(
        widths,
        lines,
        logx=True,
        logy=True,
        xlabel="width",
        ylabel="change after 4 updates (rms)",
        title=name,
        ax=ax,
    )
axes[1].set_ylabel("")
axes[1].get_legend().remove()
plot.caption(
    fig,
    "A one-block GPT on text, four updates of Adam with learning rate 0.01. Left: the wider the "
    "model, the larger the change that the same learning rate makes. Right: flat, or nearly, from "
    "64 to 1024.",
)
plot.plt.show()

# %% [markdown]
# ### Does the learning rate transfer?
#
# A language model of the oldest kind (Bengio et al. 2003): the last eight characters are embedded,
# joined, and passed through three layers to predict the next. It has all four kinds of parameters,
# and it is small enough to train it 54 times here. Three widths, nine learning rates, both
# parametrizations, on Python's documentation.
#
# **Write down first**: from width 32 to 512, by what factor does the best learning rate fall in the
# standard parametrization? Which of the two models of width 512 ends lower, each at its own best
# rate?


# %% tags=["experiment"]
def train_mlp(
    width: int,
    lr: float,
    table: dict[str, Multipliers],
    base: int,
    steps: int = 60,
    batch: int = 64,
) -> float:
    """The mean loss over the last third of a short training run; base: the width whose
    initialization the table refers to.
    """
    g = torch.Generator().manual_seed(0)

    def matrix(kind: str, rows: int, columns: int, std: float) -> Tensor:
        return (std * table[kind].init * torch.randn(rows, columns, generator=g)).requires_grad_()

    embed, first = matrix("input", len(alphabet), 16, 1.0), matrix("input", width, 128, 128**-0.5)
    hidden = [matrix("hidden", width, width, (2 / base) ** 0.5) for _ in range(2)]
    head = matrix("output", len(alphabet), width, base**-0.5)
    biases = [torch.zeros(width, requires_grad=True) for _ in range(3)]
    groups = [("input", [embed, first]), ("hidden", hidden), ("output", [head]), ("vector", biases)]
    optimizer = torch.optim.Adam(
        [{"params": params, "lr": lr * table[kind].lr} for kind, params in groups],
        betas=(0.9, 0.95),
    )
    losses = []
    for _ in range(steps):
        pieces = ids[torch.randint(len(ids) - 9, (batch, 1), generator=g) + torch.arange(9)]
        x = embed[pieces[:, :8]].flatten(1)
        for weight, bias in zip([first, *hidden], biases, strict=True):
            x = F.relu(F.linear(x, weight, bias))
        loss = F.cross_entropy(table["output"].forward * (x @ head.T), pieces[:, 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-steps // 3 :]) / (steps // 3)


widths, rates = [32, 128, 512], [2.0**k for k in range(-11, -2)]
final = {"standard parametrization": {}, "µP, base 32": {}}
for width in widths:
    final["standard parametrization"][f"width {width}"] = [
        train_mlp(width, lr, mup_scale(width, width), width) for lr in rates
    ]
    final["µP, base 32"][f"width {width}"] = [
        train_mlp(width, lr, mup_scale(width, 32), 32) for lr in rates
    ]

# %% tags=["experiment", "figure"]
# Figure: which learning rate is best, by width, in both parametrizations
fig, axes = plot.plt.subplots(1, 2, figsize=(10.4, 3.8), sharey=True)
for ax, (name, lines) in zip(axes, final.items(), strict=True):
    plot.curves(
        rates,
        lines,
        logx=True,
        xlabel="learning rate",
        ylabel="loss (nats a character)",
        title=name,
        ax=ax,
    )
    for i, losses in enumerate(lines.values()):
        best = min(range(len(rates)), key=losses.__getitem__)
        ax.plot(rates[best], losses[best], "o", color=plot.COLORS[i], markersize=7)
axes[0].set_ylim(2.6, 3.9)
axes[1].set_ylabel("")
plot.caption(
    fig,
    "Loss over the last 20 of 60 updates against the learning rate; a dot marks the best. Left: "
    "the wider, the further left. Right: the dots stand (nearly) above each other, and at every "
    "learning rate wider is better or about as good.",
)
plot.plt.show()
for name, lines in final.items():
    print(
        name + ":",
        ", ".join(
            f"{width} best at "
            f"2^{int(math.log2(rates[min(range(len(rates)), key=losses.__getitem__)]))} with "
            f"{min(losses):.2f}"
            for width, losses in lines.items()
        ),
    )

# %% [markdown] answer="predict-transfer"
# In the standard parametrization the best rate falls by about a factor of 4 over a factor of 16 in
# width, less than the 16 that the hidden matrices alone would need: the embedding and the biases,
# which want the old rate, pull against it, so one rate for all is a compromise that suits nobody.
# That is the likely reason why the wide µP model also ends lower than the wide standard model at
# its best rate, and does not merely spare you the search.

# %% [markdown]
# What transfers, and what does not: the optimum over *width*, for a fixed depth, batch size and
# number of steps. Change one of these and the rate has to be found again, or other rules have to be
# added. How much of the benefit at scale comes from which part of the table is still being sorted
# out: Kalra and Barkeshli (2026, arXiv:2605.21486) report that with AdamW most of it comes from the
# larger learning rate that µP leaves to the embedding.

# %% [markdown]
# ## Two ways for attention to fail {#failures}
#
# Softmax attention takes averages. If a row spreads its weight evenly, all tokens receive the same
# average and become alike. If a row puts all weight on one key, its softmax has no slope, and
# nothing more is learned there. The first is **rank collapse**, the second **entropy collapse**.
# Giorlandino and Goldt (2025) treat them as the two ends of one scale, the variance of queries and
# keys at initialization, with the usable range between. Two instruments tell where a model stands.
#
# **Stable rank.** Let $X$, $(T, d)$, hold the token vectors as rows, with singular values
# $s_1 \ge s_2 \ge \dots$ The rank counts those that are not 0, and rounding makes it $\min(T,d)$
# always. The stable rank weighs them:
#
# $$ \operatorname{sr}(X) = \frac{\lVert X\rVert_F^2}{\lVert X\rVert_2^2} = \frac{\sum_i s_i^2}{s_1^2}, \qquad 1 \le \operatorname{sr}(X) \le \operatorname{rank}(X). $$
#
# It is 1 when all tokens lie on one line through 0, and $k$ when $k$ directions are equally strong.
# Close to 1 it is blunt (it says 1.0000 for a thousandth as for a millionth), so a second number
# tells how far the tokens are from being *the same* vector $\bar x$, their mean:
#
# $$ \operatorname{spread}(X) = \frac{\lVert X - \mathbf 1\bar x^\top\rVert_F}{\lVert X\rVert_F}. $$
#
# **Entropy** of a row of weights $w$: $H = -\sum_j w_j\log w_j$, between 0 (one key) and $\log T$
# (all alike), in nats.
#
# What does a random softmax give? Let the $T$ scores of a row be normal with standard deviation
# $s$. For large $T$ sums over keys become means, and
#
# $$ \log\sum_j e^{s_j} \approx \log T + \tfrac{s^2}2,
# \qquad \sum_j w_js_j \approx \frac{\mathbb E[z\,e^{z}]}{\mathbb E[e^{z}]} = s^2, \qquad
# H = \log\sum_je^{s_j} - \sum_jw_js_j \;\approx\; \log T - \tfrac{s^2}{2}. $$
#
# The mean of $e^z$ for normal $z$ is $e^{s^2/2}$, and differentiating it with respect to a factor
# in the exponent gives the second. So entropy falls with the *square* of the spread of the scores,
# and reaches 0 at $s^* = \sqrt{2\log T}$: 3.7 for a thousand keys. There the approximation ends (a
# mean over $T$ numbers does not see what is rarer than one in $T$); physicists know the point as
# the freezing of the **random energy model**, which is the parallel that the paper draws.


# %% exercise="token_rank" minutes=20 difficulty=2
def token_rank(x: Tensor) -> Tensor:
    """The stable rank ‖X‖_F² / ‖X‖₂² of the last two axes: x (…, tokens, dim) → (…).

    A zero matrix has 0. The result does not depend on the scale of x, however small or large.
    float16 and bfloat16 are computed in float32 and give float32; otherwise the dtype of x.
    """
    ### BEGIN SOLUTION
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    s = torch.linalg.svdvals(x)
    top = s[..., :1]
    # Divided before squared: 1e-30² is 0 in float32.
    return (s / torch.where(top > 0, top, 1.0)).square().sum(-1)
    ### END SOLUTION


def token_spread(x: Tensor) -> Tensor:
    """How far the tokens are from being all the same: ‖X − 1 x̄ᵀ‖_F / ‖X‖_F.

    x (…, tokens, dim) → (…). x̄ is the mean over the tokens. 0 for equal tokens and for a zero
    matrix. Scales and dtypes as in token_rank.
    """
    ### BEGIN SOLUTION
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    size = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(size > 0, size, 1.0)
    apart = torch.linalg.matrix_norm(x - x.mean(-2, keepdim=True))
    whole = torch.linalg.matrix_norm(x)
    return apart / torch.where(whole > 0, whole, 1.0)
    ### END SOLUTION


def attention_entropy(weights: Tensor) -> Tensor:
    """The entropy of each row of attention weights in nats: weights (…, q_len, k_len) → (…, q_len).

    A weight of 0 contributes 0. float16 and bfloat16 are computed in float32 and give float32;
    otherwise the dtype of weights.
    """
    ### BEGIN SOLUTION
    weights = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
    return torch.special.entr(weights).sum(-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the norms</summary>
#
# Both are functions of the singular values (`torch.linalg.svdvals`, largest first).
# </details>
#
# <details><summary>Hint: 0 · log 0</summary>
#
# In floating point it is 0 · (−∞) = NaN. `torch.special.entr` and `torch.xlogy` know the limit.
# </details>

# %% check="token_rank" points=1
x = torch.diag(torch.tensor([4.0, 2.0, 2.0]))  # 24 / 16
checks.close(
    token_rank(x),
    torch.tensor(1.5),
    what="the stable rank of diag(4, 2, 2)",
    mistakes={
        "σ₁ not squared": torch.tensor(6.0),
        "the number of singular values that are not 0": torch.tensor(3.0),
        "the sum of the singular values over the largest": torch.tensor(2.0),
    },
)
checks.close(
    token_rank(torch.zeros(2, 3)), torch.tensor(0.0), what="the stable rank of a zero matrix"
)
### BEGIN HIDDEN TESTS
g = checks.generator(60)
for tokens, dim, batch in [(5, 9, ()), (8, 3, (2,)), (1, 6, (3,)), (7, 7, (2, 2)), (4, 1, ())]:
    r = min(tokens, dim)
    s = torch.rand(*batch, r, generator=g, dtype=torch.float64) + 0.05
    u = torch.linalg.qr(torch.randn(*batch, tokens, tokens, generator=g, dtype=torch.float64))[0][
        ..., :r
    ]
    v = torch.linalg.qr(torch.randn(*batch, dim, dim, generator=g, dtype=torch.float64))[0][..., :r]
    x = (u * s[..., None, :]) @ v.mT
    expected = s.pow(2).sum(-1) / s.amax(-1).pow(2)
    with checks.unchanged(x=x):
        checks.close(
            token_rank(x),
            expected,
            what=f"the stable rank of {tuple(x.shape)}",
            dtype=torch.float64,
            mistakes={
                "σ₁ not squared": s.pow(2).sum(-1) / s.amax(-1),
                "torch.linalg.matrix_rank": torch.linalg.matrix_rank(x).double(),
            },
        )
    checks.close(
        token_rank(x.float() * 1e-30),
        expected.float(),
        what="the stable rank of a matrix around 1e-30",
        rtol=1e-4,
        dtype=torch.float32,
    )
    checks.close(
        token_rank(x.float() * 1e30),
        expected.float(),
        what="the stable rank of a matrix around 1e30",
        rtol=1e-4,
    )
    checks.close(
        token_rank(x.half()),
        expected.float(),
        what="the stable rank of a float16 matrix",
        rtol=2e-2,
        dtype=torch.float32,
    )
checks.close(
    token_rank(torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])),
    torch.tensor([0.0, 1.0]),
    what="a zero matrix and one of equal tokens in a batch",
)
### END HIDDEN TESTS

# %% check="token_rank" points=1
g = checks.generator(61)
x = torch.tensor([[3.0, 1.0], [3.0, -1.0]])  # mean (3, 0), ±1 around it
checks.close(
    token_spread(x),
    torch.tensor(0.1**0.5),
    what="the spread of two tokens",
    mistakes={
        "the square": torch.tensor(0.1),
        "the mean over the features": torch.tensor((12 / 20) ** 0.5),
        "dividing by the norm of the mean": torch.tensor(1 / 3),
    },
)
### BEGIN HIDDEN TESTS
for tokens, dim, batch in [(5, 9, ()), (8, 3, (2,)), (7, 7, (2, 2)), (2, 1, (3,))]:
    x = torch.randn(*batch, tokens, dim, generator=g, dtype=torch.float64) + 0.7
    mean = torch.full((tokens, tokens), 1 / tokens, dtype=torch.float64)
    away = torch.linalg.norm(
        (torch.eye(tokens).double() - mean) @ x, dim=(-2, -1)
    ) / torch.linalg.norm(x, dim=(-2, -1))
    with checks.unchanged(x=x):
        checks.close(
            token_spread(x), away, what=f"the spread of {tuple(x.shape)}", dtype=torch.float64
        )
    checks.close(
        token_spread(x.float() * 1e-30),
        away.float(),
        what="the spread of a matrix around 1e-30",
        rtol=1e-4,
    )
    checks.close(
        token_spread(x.bfloat16()),
        away.float(),
        what="the spread in bfloat16",
        rtol=5e-2,
        dtype=torch.float32,
    )
checks.close(
    token_spread(torch.ones(2, 4, 3)), torch.zeros(2), what="the spread of equal tokens", atol=1e-6
)
checks.close(token_spread(torch.zeros(4, 3)), torch.tensor(0.0), what="the spread of a zero matrix")
# Tokens that are nearly equal: what they have in common is 10,000 times what sets them apart.
common = torch.randn(1, 8, generator=g, dtype=torch.float64)
x = common + 1e-4 * torch.randn(7, 8, generator=g, dtype=torch.float64)
due = torch.linalg.matrix_norm(x - x.mean(0)) / torch.linalg.matrix_norm(x)
hint = "A difference of squares has no digits left."
checks.close(token_spread(x), due, what="the spread of nearly equal tokens", hint=hint)
checks.close(token_spread(x.float()), due.float(), what="the same in float32", rtol=1e-2, hint=hint)
### END HIDDEN TESTS

# %% check="token_rank" points=1
g = checks.generator(62)
weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
entropy = attention_entropy(weights)
assert isinstance(entropy, Tensor), f"a tensor is asked for; yours is {entropy!r}"
assert not entropy.isnan().any(), "NaN: 0 · log 0 is NaN in floating point, its limit is 0"
checks.close(
    entropy,
    torch.tensor([math.log(2), math.log(4), 0.0]),
    what="the entropy of three rows",
    mistakes={
        "bits, not nats": torch.tensor([1.0, 2.0, 0.0]),
        "dividing by log k_len": torch.tensor([0.5, 1.0, 0.0]),
        "leaving out the minus": -torch.tensor([math.log(2), math.log(4), 0.0]),
    },
)
### BEGIN HIDDEN TESTS
for shape in [(3, 4), (2, 3, 5, 7), (1, 1, 1), (2, 0, 3), (6, 2, 50)]:
    weights = (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-1)
    expected = (
        torch.distributions.Categorical(probs=weights).entropy()
        if weights.numel()
        else torch.zeros(shape[:-1], dtype=torch.float64)
    )
    with checks.unchanged(weights=weights):
        checks.close(
            attention_entropy(weights),
            expected,
            what=f"the entropy of weights {shape}",
            rtol=1e-6,
            atol=1e-9,
        )
causal = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
checks.close(
    attention_entropy(causal),
    torch.arange(1, 7).log(),
    what="the entropy of even causal weights",
    atol=1e-6,
)
sharp = torch.tensor([[1.0, 1e-7, 0.0]])
checks.close(
    attention_entropy(sharp),
    torch.tensor([1.612e-6]),
    what="the entropy of a nearly decided row",
    rtol=1e-2,
    atol=0.0,
    hint="An epsilon inside the logarithm, or a clamp, is larger than what is measured here",
)
half = (2 * torch.randn(3, 40, generator=g)).softmax(-1).half()
checks.close(
    attention_entropy(half),
    torch.distributions.Categorical(probs=half.float()).entropy(),
    what="the entropy of float16 weights",
    dtype=torch.float32,
    rtol=2e-3,
)
### END HIDDEN TESTS

# %% [markdown]
# ### Rank collapse: how fast?
#
# Take attention alone, no residual, no MLP: $X' = P(X)\,X\,W_V^\top$ with
# $P = \mathrm{softmax}(X M X^\top)$, $M = W_Q^\top W_K/\sqrt{d}$. Write each token as the mean plus
# what is its own, $x_i = c + r_i$ with $r_i$ of size $\varepsilon$. The score of query $i$ and key
# $j$ is
#
# $$ (c+r_i)^\top M (c + r_j) = \underbrace{c^\top Mc + r_i^\top Mc}_{\text{same for all keys: no effect}} + \underbrace{c^\top M r_j}_{\text{same for all queries}} + \underbrace{r_i^\top M r_j}_{\varepsilon^2}. $$
#
# The first part drops out of the softmax. The second gives all queries the *same* weights, so by
# itself it makes all outputs equal. Only the third tells queries apart: $P$ differs from row to row
# by $O(\varepsilon^2)$. These weights are applied to tokens that differ by $\varepsilon$ (their
# common part passes through unchanged, because the rows of $P$ sum to 1). So
#
# $$ \varepsilon \;\longrightarrow\; \text{const}\cdot\varepsilon^3 \;\longrightarrow\; \text{const}\cdot\varepsilon^9 \;\longrightarrow\; \cdots \;\longrightarrow\; \text{const}\cdot\varepsilon^{3^L}: $$
#
# the number of zeros triples with every layer. This is the *doubly exponential* rate of Dong et al.
# (2021), who prove it as a bound. A residual connection, $X' = X + \dots$, keeps $\varepsilon$
# itself in the sum, and the argument no longer applies. An MLP works on each token for itself; it
# can stretch differences by a factor, but a factor against a third power loses.
#
# float64 resolves $10^{-16}$, which is three layers. The cell below carries $c$ and the $r_i$
# separately, and computes $P - \bar P$ with `expm1`, so that differences of $10^{-200}$ keep their
# digits.
#
# **Write down first**: of the four stacks (attention alone, with MLP, with residual, with both),
# which collapse within 12 layers? And does the residual alone suffice?


# %% tags=["experiment"]
def exact_layer(
    c: Tensor, r: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor
) -> tuple[Tensor, Tensor]:
    """One layer of pure attention on tokens c + r_i, mean and differences kept apart: c (d,), r
    (tokens, d).
    """
    m = w_q.T @ w_k / len(c) ** 0.5
    same = (r @ (m.T @ c)).softmax(0)  # the weights that all queries share, (tokens,)
    differs = torch.expm1(r @ m @ r.T)  # (queries, keys)
    total = differs @ same
    apart = (
        same * (differs - total[:, None]) / (1 + total[:, None])
    ) @ r  # Σ_j (P_ij − same_j) r_j
    return w_v @ (c + same @ r + apart.mean(0)), (apart - apart.mean(0)) @ w_v.T


def plain_layer(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    return ((x @ w_q.T) @ (x @ w_k.T).T / x.shape[1] ** 0.5).softmax(-1) @ x @ w_v.T


g = torch.Generator().manual_seed(0)
d, sentence = 64, ids[1000:1040]
x0 = (
    torch.randn(len(alphabet), d, generator=g).double()[sentence]
    + 0.5 * torch.randn(40, d, generator=g).double()
)  # characters and positions
x0 = F.layer_norm(x0, (d,))
curves = {
    name: [float(token_spread(x0))]
    for name in ("attention alone", "… exactly", "with MLP", "with residual", "with both")
}
ranks = {name: [float(token_rank(x0))] for name in curves if name != "… exactly"}
state, c = dict.fromkeys(ranks, x0), x0.mean(0)
r = x0 - c
for _ in range(12):
    w_q, w_k, w_v = (torch.randn(d, d, generator=g).double() / d**0.5 for _ in range(3))
    w_1, w_2 = (
        torch.randn(4 * d, d, generator=g).double() / d**0.5,
        torch.randn(d, 4 * d, generator=g).double() / (2 * d) ** 0.5,
    )
    mlp = lambda x, w_1=w_1, w_2=w_2: (x @ w_1.T).relu() @ w_2.T
    c, r = exact_layer(c, r, w_q, w_k, w_v)
    largest = r.abs().max().clamp(min=1e-300)  # divided out first: the square of 1e-193 is 0
    apart = largest * (r / largest).norm()
    curves["… exactly"].append(float(apart / (apart.square() + len(r) * c.square().sum()).sqrt()))
    for name, x in state.items():
        y = plain_layer(
            F.layer_norm(x, (d,)) if "residual" in name or "both" in name else x, w_q, w_k, w_v
        )
        if name == "with both":
            y = x + y
            y = y + mlp(F.layer_norm(y, (d,)))
        state[name] = (
            y
            if name in ("attention alone", "with both")
            else mlp(y)
            if name == "with MLP"
            else x + y
        )
        curves[name].append(float(token_spread(state[name])))
        ranks[name].append(float(token_rank(state[name])))

# %% tags=["experiment", "figure"]
# Figure: which stacks make all tokens alike, layer by layer
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.9))
plot.curves(
    range(13),
    curves,
    logy=True,
    xlabel="layer",
    ylabel="spread of the tokens",
    title="distance from equal tokens",
    ax=axes[0],
)
axes[0].set_ylim(1e-60, 1e4)
exact = curves.pop("… exactly")
for name, i in zip(curves, (0, 2, 3, 4), strict=True):  # the colors of the left
    axes[1].plot(ranks[name], color=plot.COLORS[i], linestyle=plot.DASHES[i], label=name)
axes[1].set(xlabel="layer", ylabel="stable rank", ylim=(0, None))
axes[1].set_title("stable rank of the token vectors")
axes[1].legend()
plot.caption(
    fig,
    "40 characters of the documentation through random layers of width 64 in float64. Left: "
    "attention alone triples its number of zeros per layer, with or without an MLP (second line: "
    "computed so that small differences keep their digits; the plain computation ends in "
    "rounding). With a residual the tokens stay apart, although (right) they drift toward a common "
    "direction.",
)
plot.plt.show()
zeros = [
    f"{math.floor(-math.log10(value))}" if value > 0 else "more than float64 can hold"
    for value in exact[1:8]
]
print("attention alone, zeros after the decimal point, layers 1 to 7:", ", ".join(zeros))
print(
    "after 12 layers:",
    "; ".join(
        f"{name}: spread {values[-1]:.2g}, stable rank {ranks[name][-1]:.2f}"
        for name, values in curves.items()
    ),
)

# %% [markdown]
# The residual alone suffices to keep the tokens apart, and the MLP alone does not: it slows nothing
# down that could be seen here. What the residual does not prevent is a slow loss of stable rank,
# because every layer adds to all tokens nearly the same average. Trained models have this common
# direction too; their norms and MLPs learn to live with it.

# %% [markdown]
# ### Between the two failures
#
# Now turn up the size of the scores: $W_Q$ and $W_K$ are multiplied so that the scores of the first
# layer have standard deviation $s$. The layers are attention alone, with a norm before it. **Write
# down first**: at which $s$ will the entropy be gone, with 256 tokens? And do the tokens of a stack
# without residuals stay apart there?

# %% tags=["experiment"]
g = torch.Generator().manual_seed(1)
seq, d, draws = 256, 64, 6
scale = torch.logspace(-2, 6, 25, base=2)
x0 = F.layer_norm(
    torch.randn(len(alphabet), d, generator=g)[ids[5000 : 5000 + seq]]
    + torch.randn(seq, d, generator=g),
    (d,),
)
matrices = [
    [torch.randn(draws, d, d, generator=g) / d**0.5 for _ in range(3)] for _ in range(4)
]  # several stacks side by side
normal_scores = torch.randn(300, seq, generator=g)
entropies = {
    "first layer, measured": [],
    "independent normal scores": [],
    "$\\log T - s^2/2$": (math.log(seq) - scale**2 / 2).clamp(min=0),
}
spreads = {"1 layer": [], "4 layers": [], "4 layers with residual": []}
for s in scale.tolist():
    entropies["independent normal scores"].append(
        float(attention_entropy((s * normal_scores).softmax(-1)).mean())
    )
    for residual in (0.0, 1.0):
        x = x0.expand(draws, seq, d)
        for layer, (w_q, w_k, w_v) in enumerate(matrices):
            y = F.layer_norm(x, (d,))
            weights = (s * (y @ w_q.mT) @ (y @ w_k.mT).mT / d**0.5).softmax(-1)
            x = residual * x + weights @ y @ w_v.mT
            if layer == 0 and residual == 0:
                entropies["first layer, measured"].append(float(attention_entropy(weights).mean()))
                spreads["1 layer"].append(float(token_spread(x).mean()))
        spreads["4 layers with residual" if residual else "4 layers"].append(
            float(token_spread(x).mean())
        )

# %% tags=["experiment", "figure"]
# Figure: entropy and the spread of the tokens, by the size of the scores
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8))
for ax, lines, ylabel, title in (
    (axes[0], entropies, "entropy (nats)", "entropy"),
    (axes[1], spreads, "spread of the tokens", "distance from equal tokens"),
):
    plot.curves(
        scale,
        lines,
        logx=True,
        xlabel="standard deviation of the scores, $s$",
        ylabel=ylabel,
        title=title,
        ax=ax,
    )
    ax.axvline(math.sqrt(2 * math.log(seq)), color="#888888", linewidth=1, linestyle=":")
plot.caption(
    fig,
    "256 characters, untrained attention layers; means over six stacks; the dotted line is "
    "$\\sqrt{2\\log T}$. Small scores: every row is an average, and without a residual the tokens "
    "collapse. Large scores: the entropy is gone, and a stack of four layers keeps its tokens "
    "apart. A residual makes the left end usable.",
)
plot.plt.show()

# %% [markdown]
# The approximation holds up to $s \approx 1.5$ and then falls too fast; 256 keys are far from
# infinitely many. A real layer has still more entropy than independent scores, because its queries
# differ in length: some rows are sharper than $s$ says and some flatter.
#
# So the two failures do share one scale, and without a residual there is nothing between them for a
# deep stack: by the time the tokens of four layers survive, the entropy is on its way down. In
# deeper stacks even the right end fails. With 12 layers the tokens merge again at most values of
# $s$ (try it), because hard attention sends several queries to the same key, and what has become
# equal stays equal. It is the residual that opens the region in which one can train.

# %% [markdown]
# ## σReparam: a bound on the scores
#
# Entropy falls with the square of the scores' size, and the scores are
# $x^\top W_Q^\top W_K x/\sqrt{d_k}$: at most
# $\sigma(W_Q)\,\sigma(W_K)\,\lVert x\rVert^2/\sqrt{d_k}$, with $\sigma(\cdot)$ the **spectral
# norm**, the largest singular value. Adam moves every entry of an $n\times n$ matrix by $\eta$, all
# in agreement with the data, so a single step may raise its spectral norm by $\eta n$ ([](#width)
# again). Two matrices grow, their product grows quadratically, and the softmax freezes.
#
# **σReparam** (Zhai et al. 2023) takes the spectral norm out of the weights' hands and makes it a
# parameter of its own:
#
# $$ \widehat W = \frac{\gamma}{\sigma(W)}\,W, \qquad \sigma(\widehat W) = \gamma, \text{ a learned scalar, 1 at first.} $$
#
# One step changes $\gamma$ by $\eta$, whatever the width. How is $\sigma(W)$ found at every step,
# without a decomposition? By one step of **power iteration**, starting from the vectors of the step
# before:
#
# $$ u \leftarrow \frac{Wv}{\lVert Wv\rVert}, \qquad v \leftarrow \frac{W^\top u}{\lVert W^\top u\rVert}, \qquad \sigma(W) \approx u^\top W v . $$
#
# Every pair multiplies the share of the second singular direction by $(s_2/s_1)^2$; as the weights
# move slowly, the estimate keeps up. $u$ and $v$ are not learned: they are **buffers**, saved with
# the model, and no gradient passes through their update. Nor is one missing:
# $\sigma$ is the maximum of $u^\top W v$ over unit vectors, and there the derivative is 0 in every
# direction in which these can turn. What remains of the estimate is
# $\partial\sigma/\partial W = uv^\top$ (that of the norm itself, once $u$ and $v$ have converged),
# so with $G = \partial\ell/\partial\widehat W$
#
# $$ \frac{\partial \ell}{\partial\gamma} = \frac{\langle G, W\rangle}{\sigma}, \qquad
# \frac{\partial \ell}{\partial W} =
# \frac\gamma\sigma\Big(G - \frac{\langle G, W\rangle}{\sigma}\,uv^\top\Big). $$
#
# The second term is the part of the gradient that would only scale the leading direction, and it is
# taken out. Whoever detaches $\sigma$ loses this term, and has the gradient of another function
# than the one that is computed.


# %% exercise="sigma_reparam" minutes=30 difficulty=3
class SigmaReparamLinear(nn.Module):
    """A linear layer y = Ŵ x + b, Ŵ = (γ / σ) W; σ estimates the largest singular value of W.

    Parameters: weight (out_features, in_features) and bias (out_features,), both drawn as nn.Linear
    draws them (bias=False: bias is None), and gamma, a scalar of shape (), 1 at first.
    Buffers, saved in the state_dict: u (out_features,) and v (in_features,), vectors of length 1;
    at first random, or nearer to the singular vectors (after some steps of power iteration, or
    those of a decomposition).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        plain = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.gamma = nn.Parameter(torch.ones(()))
        self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(in_features), dim=0))
        for _ in range(15):
            self.power_iteration()
        ### END SOLUTION

    @torch.no_grad()
    def power_iteration(self) -> None:
        """u ← W v, then v ← Wᵀ u with the new u, each divided by its length. No gradient."""
        ### BEGIN SOLUTION
        self.u = F.normalize(self.weight @ self.v, dim=0)
        self.v = F.normalize(self.weight.mT @ self.u, dim=0)
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in_features) → (…, out_features).

        In training mode one step of power iteration comes first; in evaluation mode u and v stay as
        they are. In both σ = uᵀ W v, through which gradients reach W; u and v count as constants.
        Two forward passes before one backward pass work.
        """
        ### BEGIN SOLUTION
        if self.training:
            self.power_iteration()
        sigma = self.u @ self.weight @ self.v
        return F.linear(x, self.gamma / sigma * self.weight, self.bias)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: buffers</summary>
#
# `self.register_buffer("u", tensor)` makes `self.u` part of the module: it moves with `.to(...)`
# and is saved, and no optimizer sees it. It can be assigned anew.
# </details>
#
# <details><summary>Hint: "one of the variables needed … modified by an inplace operation"</summary>
#
# The graph of the first pass remembers u and v. `self.u.copy_(...)` changes them under its feet; a
# new tensor does not.
# </details>


# %% tags=["support"]
# Support: what a layer multiplies by, and a layer with given singular values


def effective_weight(layer: nn.Module) -> Tensor:
    """(out_features, in_features), from the outputs on the unit vectors: one forward pass."""
    out = layer(torch.eye(layer.weight.shape[1], dtype=layer.weight.dtype))
    return (out - layer.bias if layer.bias is not None else out).detach().T


def sigma_layer(
    singular: list[float], rows: int, columns: int, generator: torch.Generator, bias: bool = True
) -> nn.Module:
    """Your layer in float64, its weight with these singular values, all else random."""
    layer = SigmaReparamLinear(columns, rows, bias).double()
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0][
            :, : len(singular)
        ]
        for n in (rows, columns)
    )
    with torch.no_grad():
        layer.weight.copy_((u * torch.tensor(singular, dtype=torch.float64)) @ v.T)
    layer.u = F.normalize(torch.randn(rows, generator=generator, dtype=torch.float64), dim=0)
    layer.v = F.normalize(torch.randn(columns, generator=generator, dtype=torch.float64), dim=0)
    return layer


# %% check="sigma_reparam" points=2
layer = SigmaReparamLinear(3, 2)
found = {name: tuple(p.shape) for name, p in layer.named_parameters()}
assert found == {"weight": (2, 3), "bias": (2,), "gamma": ()}, (
    f"the parameters should be weight (2, 3), bias (2,) and gamma (); yours are {found}"
)
assert {name: tuple(b.shape) for name, b in layer.named_buffers()} == {"u": (2,), "v": (3,)}, (
    "u (2,) and v (3,) should be buffers"
)
assert layer.gamma.item() == 1.0, f"gamma is 1 at first; yours is {layer.gamma.item()}"
layer = sigma_layer([4.0, 1.0], 2, 3, checks.generator(70), bias=False)
for _ in range(30):  # the second direction is down to (1/16)^30
    layer(torch.ones(1, 3, dtype=torch.float64))
top = float(torch.linalg.matrix_norm(effective_weight(layer.eval()), 2))
told = {
    "the weight divided by its Frobenius norm": 4 / 17**0.5,
    "the weight as it is": 4.0,
    "u or v not normalized": 0.0,
}
named = next(
    (f" This is what {name} gives." for name, value in told.items() if abs(top - value) < 1e-4), ""
)
assert abs(top - 1) < 1e-6, (
    f"after 30 steps the effective weight's spectral norm should be γ = 1; yours is "
    f"{top:.4g}.{named}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(71)
for rows, columns, gamma, bias, singular in [
    (5, 8, 0.3, True, [5.0, 2.0, 1.9, 0.1]),
    (8, 3, 2.5, False, [0.02, 0.01, 0.001]),
    (1, 6, 1.0, True, [3.0]),
    (6, 1, 4.0, False, [0.5]),
    (7, 7, 1.0, True, [100.0, 30.0, 30.0, 30.0, 2.0]),
]:
    layer = sigma_layer(singular, rows, columns, g, bias)
    assert (layer.bias is not None) == bias, "bias=False means no bias"
    with torch.no_grad():
        layer.gamma.fill_(gamma)
    weight = layer.weight.detach().clone()
    for _ in range(60):
        layer(torch.zeros(1, columns, dtype=torch.float64))
    checks.close(
        layer.weight,
        weight,
        what="weight after forward passes",
        rtol=0,
        atol=0,
        hint="The parameter stays, only what is multiplied by is scaled",
    )
    expected = gamma / max(singular) * weight
    checks.close(
        effective_weight(layer.eval()),
        expected,
        what=f"the effective weight {rows}×{columns} after 60 steps, γ = {gamma}",
        rtol=1e-6,
        mistakes={
            "ignoring γ": expected / gamma,
            "dividing by the Frobenius norm": gamma * weight / weight.norm(),
            "W without scaling": weight,
        },
    )
    x = torch.randn(2, 3, columns, generator=g, dtype=torch.float64)
    checks.close(
        layer(x),
        x @ expected.T + (layer.bias if bias else 0),
        what="the output for an input of three axes",
        rtol=1e-6,
    )
plain = SigmaReparamLinear(400, 100)
for name in ("weight", "bias"):
    expect_drawn(
        plain.get_parameter(name),
        1 / math.sqrt(3 * 400),
        "uniform",
        f"the initial {name}, as nn.Linear draws it,",
    )
for name in ("u", "v"):
    checks.close(
        float(plain.get_buffer(name).norm()), 1.0, what=f"the length of {name} at first", rtol=1e-4
    )
### END HIDDEN TESTS

# %% check="sigma_reparam" points=2
g = checks.generator(72)
layer = sigma_layer([2.0, 1.0], 2, 2, g)
u0, v0 = layer.u.clone(), layer.v.clone()
layer.eval()(torch.ones(1, 2, dtype=torch.float64))
stays = torch.equal(layer.u, u0) and torch.equal(layer.v, v0)
assert stays, (
    "in evaluation mode the buffers must stay: a model that is only looked at would change"
)
layer.train()(torch.ones(1, 2, dtype=torch.float64))
w = layer.weight.detach()
u1 = w @ v0 / (w @ v0).norm()
checks.close(
    layer.u,
    u1,
    what="u after one forward pass in training mode",
    mistakes={"no step at all": u0, "u not normalized": w @ v0},
)
checks.close(
    layer.v,
    w.T @ u1 / (w.T @ u1).norm(),
    what="v after one forward pass",
    mistakes={
        "v made from the old u": F.normalize(w.T @ u0, dim=0),
        "no step at all": v0,
        "v not normalized": w.T @ u1,
    },
)
### BEGIN HIDDEN TESTS
for rows, columns, bias in [(4, 7, True), (6, 2, False), (3, 3, True)]:
    layer = sigma_layer([3.0, 2.5], rows, columns, g, bias) if min(rows, columns) > 1 else None
    u, v, w = layer.u.clone(), layer.v.clone(), layer.weight.detach().clone()
    x = torch.randn(5, columns, generator=g, dtype=torch.float64)
    for step in range(3):  # exactly one step for each call
        out = layer(x)
        u = w @ v / (w @ v).norm()
        v = w.T @ u / (w.T @ u).norm()
        checks.close(layer.u, u, what=f"u after {step + 1} calls")
        checks.close(layer.v, v, what=f"v after {step + 1} calls")
        # Not converged yet: σ is uᵀ W v with the new vectors, not the true norm.
        checks.close(
            out,
            x @ w.T / (u @ w @ v) + (layer.bias if bias else 0),
            what=f"the output of call {step + 1}",
        )
        with_graph = layer.u.requires_grad or layer.v.requires_grad
        assert not with_graph, "u and v carry a graph: the memory of all past steps stays alive"
    # Power iteration by hand, and evaluation with vectors that have not converged.
    layer.u, layer.v = F.normalize(u + 0.5, dim=0), F.normalize(v - 0.3, dim=0)
    checks.close(
        layer.eval()(x),
        x @ w.T / (layer.u @ w @ layer.v) + (layer.bias if bias else 0),
        what="the output in evaluation mode with vectors that have not converged",
        hint="σ = uᵀ W v in evaluation mode too",
    )
    v = layer.v.clone()
    layer.power_iteration()
    u = w @ v / (w @ v).norm()
    checks.close(layer.u, u, what="u after power_iteration()")
    checks.close(layer.v, w.T @ u / (w.T @ u).norm(), what="v after power_iteration()")
    out, again = layer.eval()(x), layer(x)
    checks.close(again, out, what="a second pass in evaluation mode", rtol=0, atol=0)
    twin = SigmaReparamLinear(columns, rows, bias).double().eval()
    twin.load_state_dict(layer.state_dict())
    checks.close(twin(x), out, what="the output after the state_dict was loaded into a new layer")
### END HIDDEN TESTS

# %% check="sigma_reparam" points=2
g = checks.generator(73)
layer = sigma_layer([3.0, 1.0], 2, 2, g, bias=False)
for _ in range(40):
    layer(torch.ones(1, 2, dtype=torch.float64))
layer.eval()(torch.eye(2, dtype=torch.float64)).sum().backward()
assert layer.gamma.grad is not None, (
    "no gradient reaches gamma: it is a parameter, used without detaching"
)
checks.close(
    layer.gamma.grad,
    layer.weight.detach().sum() / 3,
    what="the gradient of γ",
    rtol=1e-6,
    mistakes={"leaving out the division by σ": layer.weight.detach().sum()},
)
inner = float((layer.weight.grad * layer.weight.detach()).sum())
assert abs(inner) < 1e-9, (
    f"scaling W does not change Ŵ, so the gradient of W must be at a right angle to W; yours has "
    f"an inner product of {inner:.3g} with it. Is σ detached?"
)
### BEGIN HIDDEN TESTS
for rows, columns, gamma in [(4, 6, 0.7), (5, 3, 1.8)]:
    layer = sigma_layer([3.0, 2.0, 0.5], rows, columns, g)
    with torch.no_grad():
        layer.gamma.fill_(gamma)
    x, pull = (torch.randn(7, n, generator=g, dtype=torch.float64) for n in (columns, rows))
    w = layer.weight.detach().clone().requires_grad_()
    scalar = torch.tensor(gamma, dtype=torch.float64, requires_grad=True)
    # One step from given vectors, far from converged: here a gradient through u and v would show.
    u = F.normalize(w.detach() @ layer.v, dim=0)
    v = F.normalize(w.detach().T @ u, dim=0)

    def expected_output(w, scalar, u=u, v=v, x=x):
        return x @ (scalar / (u @ w @ v) * w).T

    expected = torch.autograd.grad((expected_output(w, scalar) * pull).sum(), [w, scalar])
    through = torch.autograd.grad(
        (expected_output(w, scalar, u=(lambda a: a / a.norm())(w @ layer.v)) * pull).sum(), w
    )[0]
    detached = torch.autograd.grad((x @ (gamma / (u @ w @ v).item() * w).T * pull).sum(), w)[0]
    (layer(x) * pull).sum().backward()
    checks.close(
        layer.weight.grad,
        expected[0],
        what="the gradient of the weight after one step",
        rtol=1e-8,
        mistakes={"a detached σ": detached, "a gradient through the power iteration": through},
    )
    checks.close(layer.gamma.grad, expected[1], what="the gradient of γ after one step", rtol=1e-8)
    checks.close(layer.bias.grad, pull.sum(0), what="the gradient of the bias", rtol=1e-8)
# Two passes, then one backward pass; and the input's gradient.
layer = sigma_layer([3.0, 2.0], 4, 5, g)
x = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)
first = layer(x)
second = layer(x.detach())
try:
    (first.sum() + second.sum()).backward()
except RuntimeError as error:
    raise AssertionError(
        f"two forward passes before a backward pass fail: {str(error)[:90]}…"
    ) from None
reached = x.grad is not None and bool((x.grad != 0).any())
assert reached, "no gradient reaches the input"
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: provoke entropy collapse, and cure it
#
# A GPT of three blocks on Python's documentation, Adam, 120 updates. First at a sensible learning
# rate, then at ten times that, then at ten times with each of three remedies:
#
# - **warm-up** over the first 40 updates;
# - **QK-norm**: a LayerNorm on each head's queries and keys, so that a score is, at first, a cosine
#   of centered vectors times $\sqrt{d_k}$ (later with learned gains and biases);
# - **σReparam** in every linear layer of the blocks.
#
# The entropy of each causal row is divided by the largest possible (the logarithm of the number of
# visible keys), so 1 means even and 0 means decided.
#
# **Write down first**: which of the three keep the entropy up? And does the loss follow the
# entropy?


# %% tags=["experiment"]
def relative_entropy(model: nn.Module) -> float:
    """Entropy of all rows with two or more visible keys, relative to its maximum; mean over heads
    and blocks.
    """
    visible = torch.arange(1, 33).log()[1:]
    rows = torch.stack(
        [attention_entropy(block.attention.weights)[..., 1:] for block in model.blocks]
    )
    return float((rows / visible).mean())


def train_gpt(lr: float, warmup: int = 0, steps: int = 120, **options) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = GPT(len(alphabet), 64, layers=3, context=32, **options)
    gpt2_init(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    g, log = torch.Generator().manual_seed(1), {"loss": [], "entropy": [], "gradient": []}
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / max(1, warmup))
        loss = text_loss(model, *windows(12, 32, g))
        optimizer.zero_grad()
        loss.backward()
        gradients = [
            p.grad
            for name, p in model.named_parameters()
            if ("q_proj" in name or "k_proj" in name) and p.dim() == 2
        ]
        optimizer.step()
        for what, value in (
            ("loss", loss.item()),
            ("entropy", relative_entropy(model)),
            ("gradient", float(torch.cat(gradients).norm())),
        ):
            log[what].append(value)
    return log


runs = {
    "lr 0.002": train_gpt(0.002),
    "lr 0.02": train_gpt(0.02),
    "… warm-up": train_gpt(0.02, warmup=40),
    "… QK-norm": train_gpt(0.02, qk_norm=True),
    "… σReparam": train_gpt(0.02, linear=SigmaReparamLinear),
}


# %% tags=["experiment", "figure"]
# Figure: what keeps the entropy up, and whether the loss follows
def smooth(values: list[float], width: int = 9) -> Tensor:
    return torch.tensor(values).unfold(0, width, 1).mean(1)


frequency = torch.bincount(ids).double() / len(ids)
plateau = float(torch.special.entr(frequency).sum())
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4))
plot.curves(
    range(1, 121),
    {name: log["entropy"] for name, log in runs.items()},
    xlabel="update",
    ylabel="entropy / its maximum",
    title="attention entropy",
    ax=axes[0],
)
axes[0].set_ylim(0, 1.05)
plot.curves(
    range(5, 117),
    {name: smooth(log["loss"]) for name, log in runs.items()},
    xlabel="update",
    ylabel="loss (nats a character, mean of 9)",
    title="loss",
    ax=axes[1],
)
axes[1].get_legend().remove()
axes[1].axhline(plateau, color="#888888", linewidth=1, linestyle=":")
axes[1].annotate("thin gray line: character frequencies only", (117, 3.95), fontsize=8, ha="right")
axes[1].set_ylim(2.4, 4.2)
plot.caption(
    fig,
    "A GPT of width 64 on text. The high learning rate drives the entropy down within a few dozen "
    "updates. Warm-up delays that; QK-norm and σReparam prevent it. Of the four runs at the high "
    "rate only σReparam ends as low as the run at the low one.",
)
plot.plt.show()
for name, log in runs.items():
    print(
        f"{name:12s} entropy {log['entropy'][-1]:.2f}, loss {sum(log['loss'][-15:]) / 15:.2f}, "
        f"gradient of the query and key matrices {sum(log['gradient'][-15:]) / 15:.3f}"
    )

# %% [markdown]
# The entropy behaves as the paper says. At ten times the sensible rate it falls to a quarter of its
# maximum or much less, and stays there: heads that look at one or two keys each, whichever won
# early. Warm-up buys time and little more, since the rate after it is the same. QK-norm and
# σReparam hold the entropy up.
#
# The loss does not simply follow. σReparam at the high rate ends as low as the plain model at the
# sensible one, so the collapse could be prevented *and* training saved. QK-norm prevents the
# collapse too and ends no better than the run without protection: at this rate the other matrices
# are thrown about as well, and it does nothing for them. So at this size low entropy goes with bad
# training and is not the whole cause of it. Two things that larger models show do not happen here:
# nothing diverges (pre-norm and 120 updates are forgiving), and nobody would call warm-up a cure.
# Three seeds agreed on every sentence of these two paragraphs; the order of the bad runs among each
# other changed.
#
# ## Key questions
#
# Those with a number or a choice are graded.


# %% exercise="init_numbers" minutes=16 difficulty=2 kind="questions"
def init_numbers() -> dict[str, float | str]:
    """Six short answers.

    "leaky":     leaky ReLU with slope 0.5 for negative numbers. Which gain keeps the mean square
                 through a layer of fan-in scaling (std = gain / √fan_in)? To 0.1 percent.
    "depth":     a ReLU network of 40 equally wide layers, initialized with Xavier by mistake. By
                 what number is the mean square of the activations multiplied from the input to the
                 last layer, in expectation? To 1 percent.
    "mup_lr":    Adam's best learning rate at width 256 is 0.004, the standard deviation of the
                 hidden matrices there 0.06. Which learning rate do the hidden matrices get at width
                 4096 under µP? To 0.1 percent.
    "mup_std":   and which standard deviation? To 0.1 percent.
    "entropy":   a row of attention over 1024 keys, its scores independent and normal with standard
                 deviation 1.5. Roughly which entropy (in nats) do you expect? To 2 percent.
    "diagnosis": in a training run the loss has stopped falling. In the upper layers the token
                 vectors of a sentence have stable rank 1.01 and spread 0.02; the attention entropy
                 is at 99 % of its maximum. What happened, and what is worth a try? "a" entropy
                 collapse: a lower learning rate, warm-up or σReparam; "b" rank collapse: a stronger
                 residual path, or larger initial queries and keys; "c" vanishing gradients in the
                 embedding: a larger learning rate for the embedding.
    """
    ### BEGIN SOLUTION
    return {
        "leaky": math.sqrt(2 / (1 + 0.5**2)),
        "depth": 0.5**40,
        "mup_lr": 0.004 / 16,
        "mup_std": 0.06 / 4,
        "entropy": math.log(1024) - 1.5**2 / 2,
        "diagnosis": "b",
    }
    ### END SOLUTION


# %% check="init_numbers" points=1
answer = init_numbers()["leaky"]
checks.kind(answer, float, what="leaky")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    nn.init.calculate_gain("leaky_relu", 0.5),
    to=1e-3,
    what="leaky",
    hint="Half of the mean square passes whole; what becomes of the other half?",
    mistakes={
        "ReLU's": math.sqrt(2),
        "the square of the gain": 1.6,
        "a slope that is not squared": math.sqrt(2 / 1.5),
    },
)
### END HIDDEN TESTS

# %% check="init_numbers" points=1
answer = init_numbers()["depth"]
checks.kind(answer, float, what="depth")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    9.094947e-13,
    what="depth",
    hint="Equal widths: Xavier's variance is 1/n. What does each ReLU cost?",
    mistakes={
        "the root mean square": 0.5**20,
        "a ReLU that costs nothing": 1.0,
        "the reciprocal": 2.0**40,
    },
)
### END HIDDEN TESTS

# %% check="init_numbers" points=1
answer = init_numbers()["mup_lr"]
checks.kind(answer, float, what="mup_lr")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2.5e-4,
    to=1e-3,
    what="mup_lr",
    hint="The update is a sum of aligned terms",
    mistakes={"1/√r": 0.001, "the rate unchanged": 0.004},
)
### END HIDDEN TESTS

# %% check="init_numbers" points=1
answer = init_numbers()["mup_std"]
checks.kind(answer, float, what="mup_std")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.015,
    to=1e-3,
    what="mup_std",
    hint="The initial weights are not aligned with anything",
    mistakes={"1/r": 0.00375, "the deviation unchanged": 0.06},
)
### END HIDDEN TESTS

# %% check="init_numbers" points=1
answer = init_numbers()["entropy"]
checks.kind(answer, float, what="entropy")
### BEGIN HIDDEN TESTS
rows = (1.5 * torch.randn(4000, 1024, generator=checks.generator(80))).softmax(-1)
measured = float(torch.distributions.Categorical(probs=rows).entropy().mean())
checks.number(
    answer,
    measured,
    to=0.02,
    what="entropy",
    hint="log T less half of a variance",
    mistakes={
        "evenly spread weights": math.log(1024),
        "the variance, not half of it": math.log(1024) - 2.25,
        "half of the standard deviation": math.log(1024) - 0.75,
        "bits": (math.log(1024) - 1.125) / math.log(2),
    },
)
### END HIDDEN TESTS

# %% check="init_numbers" points=1
answer = init_numbers()["diagnosis"]
assert answer in ("a", "b", "c"), f"diagnosis: one of 'a', 'b', 'c'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert str(answer) == "b", (
    "diagnosis: entropy near its maximum means rows that average all tokens; and averages are "
    "alike. Which of the two failures is that?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** All biases start at 0, and nothing breaks. Why may all weights of a matrix
# not start at 0 as well? And why may the *last* matrix of a residual branch?

# %% [markdown] answer="why-not-zero"
# If all rows of a matrix are equal, its outputs are equal, receive equal gradients, and stay equal:
# the layer has one feature for ever. With all of them 0 and a zero matrix above, not even that
# moves, since each gradient contains the other factor. A bias breaks no symmetry and needs none,
# because the weights have done it. The last matrix of a branch multiplies features that already
# differ, so its rows' gradients are not zero; they differ from row to row because what reaches the
# rows from above differs. The branch starts as nothing and grows at the first step (the idea of
# zero-initialized residuals; Fixup, ReZero). Only the matrices before it have no gradient in that
# first step.

# %% [markdown]
# **Open question 2.** A team tunes the learning rate under µP at width 256 with 2,000 steps and
# trains at width 4096 with 200,000 steps. The run is worse than with an old hand-tuned rate. Is µP
# refuted?

# %% [markdown] answer="what-mup-promises"
# No. µP promises that the optimum does not move with the width, for the rest unchanged. Number of
# steps, batch size, depth, weight decay and the schedule all changed or interact: with a hundred
# times the steps the best peak rate usually falls, and weight decay acts over lr · steps. Ask for
# the proxy to be tuned at the real number of steps, or with a known rule for it; for a coordinate
# check at width 4096; whether the widths compared are large enough (256 may be too narrow, the
# theory is about a limit); and whether attention scores, tied embeddings and output multiplier were
# really done, since one forgotten piece is enough.

# %% [markdown]
# ## References, and what to read in them
#
# - **Glorot and Bengio 2010**, *Understanding the difficulty of training deep feedforward neural
#   networks* (AISTATS). Section 4.2: the two conditions and their compromise.
# - **He et al. 2015**, *Delving Deep into Rectifiers*,
#   [arXiv:1502.01852](https://arxiv.org/abs/1502.01852). Section 2.2: the factor of 2, forward and
#   backward.
# - **Radford et al. 2019**, *Language Models are Unsupervised Multitask Learners*. Section 2.3 has
#   the scaling of residual layers in one sentence.
# - **Wang et al. 2022**, *DeepNet*, [arXiv:2203.00555](https://arxiv.org/abs/2203.00555). The
#   constants, and why it is the update that has to be bounded.
# - **Yang et al. 2022**, *Tensor Programs V*, [arXiv:2203.03466](https://arxiv.org/abs/2203.03466).
#   Start with the tables and the section on coordinate checking. The package `mup`
#   (github.com/microsoft/mup, `mup/optim.py`) tells the kinds apart by how many axes of a parameter
#   grow.
# - **Dong, Cordonnier and Loukas 2021**, *Attention is not all you need: pure attention loses rank
#   doubly exponentially with depth*, [arXiv:2103.03404](https://arxiv.org/abs/2103.03404).
# - **Zhai et al. 2023**, *Stabilizing Transformer Training by Preventing Attention Entropy
#   Collapse*, [arXiv:2303.06296](https://arxiv.org/abs/2303.06296); code at
#   github.com/apple/ml-sigma-reparam, whose vision layers start γ at the matrix's own spectral norm
#   and not at 1.
# - **Giorlandino and Goldt 2025**, *Two failure modes of deep transformers and how to avoid them: a
#   unified theory of signal propagation at initialisation*,
#   [arXiv:2505.24333](https://arxiv.org/abs/2505.24333). The random energy model, and trainability
#   diagrams for whole architectures.
# - **Chen and Luo 2025**, *From Condensation to Rank Collapse: A Two-Stage Analysis of Transformer
#   Training Dynamics*, [arXiv:2510.06954](https://arxiv.org/abs/2510.06954). What training does to
#   very small weights: the matrices outside of the softmax grow first and condense, then queries
#   and keys move and approach rank one. (There it is weight matrices that lose rank, here tokens.)
# - **Kalra and Barkeshli 2026**, *Quantifying Hyperparameter Transfer and the Importance of
#   Embedding Layer Learning Rate*, [arXiv:2605.21486](https://arxiv.org/abs/2605.21486). A reason
#   to take no table on faith.
#
# In production: `torch/nn/init.py`; `torch.nn.utils.parametrizations.spectral_norm` (your power
# iteration, without γ); Hugging Face transformers, `_init_weights` in
# `models/gpt2/modeling_gpt2.py`; QK-norm in its `qwen3` and `olmo2` models.
