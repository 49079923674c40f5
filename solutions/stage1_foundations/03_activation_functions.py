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
#       GELU and SiLU with their derivatives, dropout, a classifier of handwritten digits, the gated
#       feed-forward layer of today's models, and your first two GPU kernels, which compute that
#       gate in one pass over memory.
#     gpu: >-
#       The bandwidth of your fused kernels, measured beside eager PyTorch, torch.compile and a
#       plain copy.
# ---

# %% [markdown]
# ## Core ideas
#
# A linear layer turns a vector $x$ of shape $(D,)$ into $Wx + b$. Put another linear layer behind
# it, and you get $W_2(W_1x + b_1) + b_2 = (W_2W_1)x + (W_2b_1 + b_2)$: one linear layer again, with
# a different matrix. A hundred of them in a row can draw nothing but a straight boundary. What
# makes depth worth having is a function between the layers that **bends**: applied to each number
# on its own, with no parameters. It is called the **activation function**.
#
# Which bend hardly seems to matter, since almost any will do in theory. In practice it decides
# whether a deep network can be trained at all, because the gradient that travels back is multiplied
# by the bend's *derivative* at every layer (lesson 02). The history of activation functions is a
# series of answers to what goes wrong there:
#
# - **sigmoid** and **tanh** flatten out on both sides. A unit that is far out has a derivative near
#   zero: it is **saturated**, and what lies before it stops learning.
# - **ReLU**, $\max(0, x)$, has derivative 1 on the whole right side. On the left it is 0, and a
#   unit that is on the left for every input gets no gradient: it is **dead**.
# - **GELU** and **SiLU** (also called Swish) follow ReLU on the far sides and are smooth in
#   between, so that a unit a little to the left still has a gradient.
# - **Gated units** (GLU, SwiGLU, GeGLU) no longer bend a number by itself: one projection of the
#   input decides *how much* of another passes. LLaMA, Qwen, Mistral and DeepSeek models all use
#   SwiGLU.
#
# You build these, see each claim on real activations, train a classifier with them, and then write
# the gate as a GPU kernel: the first of the course. It is a good first kernel because it does
# almost no arithmetic. All its time goes into moving numbers, and moving them once rather than
# twice is the whole art.

# %%
import functools
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from llm40 import checks, data, plot, profile
from llm40.kernels import autotuned, tl, triton
from matplotlib.patches import Rectangle
from torch import Tensor, nn

# %% [markdown]
# ## GELU: a mask that depends on the number itself
#
# ReLU multiplies $x$ by 1 if it is positive and by 0 if not. Make that decision softer: multiply
# $x$ by the **probability** that a standard normal number $Z$ lies below it. A large $x$ is kept
# nearly always, a very negative one nearly never:
#
# $$\mathrm{GELU}(x) = x \cdot P(Z \le x) = x\,\Phi(x) = \tfrac{x}{2}\Bigl(1 + \operatorname{erf}\bigl(x/\sqrt 2\bigr)\Bigr).$$
#
# The $\sqrt 2$ is where the two conventions meet:
# $\operatorname{erf}(t) = \frac{2}{\sqrt\pi}\int_0^t e^{-s^2}ds$ belongs to a normal distribution
# of variance $\tfrac12$, and $\Phi$ to variance 1.
#
# $\operatorname{erf}$ used to be slow on accelerators, so GPT-2 was trained with an approximation,
# and its weights still want it:
#
# $$\mathrm{GELU}_{\tanh}(x) = \tfrac{x}{2}\Bigl(1 + \tanh\bigl(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\bigr)\Bigr).$$
#
# The first factor makes the slope at 0 agree ($\Phi'(0) = 1/\sqrt{2\pi}$), the cubic term was
# fitted. The two differ by at most 0.0005: little, but a model converted with the wrong one shows
# it in every logit.


# %% exercise="gelu" minutes=12 difficulty=1
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit of each element.

    x: any shape, floating. approximate: "none" for the exact form (torch.erf), "tanh" for the
    approximation above; anything else raises ValueError. Returns a tensor of x's shape and dtype,
    through which gradients flow. PyTorch's own gelu is not used.
    """
    ### BEGIN SOLUTION
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f'approximate is {approximate!r}: it can be "none" or "tanh"')
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the last digits</summary>
#
# Python's numbers are exact enough: `math.sqrt(2)`, `math.sqrt(2 / math.pi)`. Typed-in decimals
# such as 0.797 are not.
# </details>

# %% check="gelu" points=2
numbers = functools.partial(torch.tensor, dtype=torch.float64)
checks.close(
    gelu(numbers([-1.0, 0.0, 0.5, 2.0])),
    numbers([-0.15865525, 0.0, 0.34573123, 1.95449974]),
    rtol=1e-6,
    what="gelu at -1, 0, 0.5 and 2",
    hint="x times the probability that a standard normal number is below x.",
    mistakes={
        "erf(x), without dividing by √2,": numbers([-0.07864960, 0, 0.38012497, 1.99532226]),
        "the sigmoid approximation": numbers([-0.15420423, 0, 0.35038844, 1.93565862]),
        "the tanh form": numbers([-0.15880801, 0, 0.34571401, 1.95459769]),
        "the probability, without the factor x,": numbers(
            [0.15865525, 0.5, 0.69146246, 0.97724987]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
far = torch.tensor([-30.0, -8.0, -5.5, -1e-3, 0.0, 1e-3, 5.5, 30.0], dtype=torch.float64)
for values in (
    far,
    torch.randn(3, 5, generator=g, dtype=torch.float64).T,
    torch.tensor(-0.7, dtype=torch.float64),
):
    exact = torch.tensor(
        [t * 0.5 * math.erfc(-t / math.sqrt(2)) for t in values.flatten().tolist()],
        dtype=torch.float64,
    ).view(values.shape)
    with checks.unchanged(x=values), checks.forbidden("gelu"):
        result = gelu(values)
    checks.close(result, exact, dtype=torch.float64, atol=1e-14, what="gelu, from -30 to 30")
checks.keeps_dtype(gelu, 3 * torch.randn(4, 1, 7, generator=g), reference=F.gelu, what="gelu")
checks.gradients(gelu, F.gelu, torch.randn(11, generator=g, dtype=torch.float64), names=["x"])
### END HIDDEN TESTS

# %% check="gelu" points=1
x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
numbers = functools.partial(torch.tensor, dtype=torch.float64)
checks.close(
    gelu(x, approximate="tanh"),
    numbers([-0.15880801, 0.34571401, 1.95459769]),
    rtol=1e-7,
    what='gelu with approximate="tanh" at -1, 0.5 and 2',
    mistakes={
        "the exact form": numbers([-0.15865525, 0.34573123, 1.95449974]),
        "2/π in place of its root": numbers([-0.20913084, 0.32779879, 1.90532360]),
        "√2/π in place of √(2/π)": numbers([-0.28078442, 0.30593629, 1.78617881]),
        "leaving out the cubic term": numbers([-0.16857377, 0.34476089, 1.92102920]),
    },
)
checks.raises(ValueError, gelu, x, "sigmoid", because='Only "none" and "tanh" are known.')
### BEGIN HIDDEN TESTS
g = checks.generator(2)
far = torch.tensor([-30.0, -6.0, -1e-3, 0.0, 6.0, 30.0], dtype=torch.float64)
for values in (far, 2 * torch.randn(6, 3, generator=g, dtype=torch.float64)):
    with checks.unchanged(x=values), checks.forbidden("gelu"):
        result = gelu(values, "tanh")
    checks.close(
        result,
        F.gelu(values, approximate="tanh"),
        dtype=torch.float64,
        what="the tanh form, from -30 to 30",
    )
checks.keeps_dtype(
    lambda t: gelu(t, "tanh"),
    values,
    reference=lambda t: F.gelu(t, approximate="tanh"),
    what="the tanh form",
)
checks.gradients(
    lambda t: gelu(t, "tanh"),
    lambda t: F.gelu(t, approximate="tanh"),
    torch.randn(11, generator=g, dtype=torch.float64),
)
for word in ("", "erf", None):
    checks.raises(ValueError, gelu, far, word)
for form in ("none", "tanh"):
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(zero, form).sum(), zero)
    half = torch.tensor([0.5], dtype=torch.float64)
    checks.close(slope, half, what=f'the slope at exactly 0, approximate="{form}"')
### END HIDDEN TESTS

# %% [markdown]
# ## SiLU, and its derivative by hand {#silu}
#
# Replace the normal distribution's $\Phi$ by the **logistic function**
# $\sigma(x) = 1/(1 + e^{-x})$, the sigmoid, and you have SiLU:
#
# $$\mathrm{SiLU}(x) = x\,\sigma(x).$$
#
# It was proposed several times under several names; an automated search over formulas found it
# again and called it **Swish**. For its derivative we need that of $\sigma$. Write
# $\sigma = (1 + e^{-x})^{-1}$ and differentiate:
#
# $$\sigma' = \frac{e^{-x}}{(1+e^{-x})^2} = \frac{1}{1+e^{-x}}\cdot\frac{e^{-x}}{1+e^{-x}} = \sigma\,(1-\sigma),$$
#
# at most $\tfrac14$, at $x = 0$. That quarter is the trouble with deep sigmoid networks: twenty
# layers multiply the gradient by at most $4^{-20} \approx 10^{-12}$. With the product rule,
#
# $$\mathrm{SiLU}'(x) = \sigma + x\,\sigma(1-\sigma) = \sigma\,\bigl(1 + x(1-\sigma)\bigr).$$
#
# Two things about it. It can be **negative**: SiLU falls to $-0.278$ at $x \approx -1.28$ and then
# climbs back to 0. And it is computed **from the input alone**: nothing but $x$ has to be kept for
# the backward pass. Your GPU kernel will use both formulas as they stand.
#
# On a computer one more thing matters. $e^{-x}$ overflows in float32 below $x = -88.7$.
# $x/(1+e^{-x})$ survives that ($-100/\infty = -0$), but its automatic derivative is
# $\infty/\infty^2$, which is NaN, and $x\,e^x/(1+e^x)$ is NaN at $+100$ already. `torch.sigmoid` is
# right everywhere.


# %% exercise="silu" minutes=20 difficulty=1
def silu(x: Tensor) -> Tensor:
    """x σ(x) of each element; x of any shape, floating. Finite for every finite x, in value and in
    gradient. Not PyTorch's silu.
    """
    ### BEGIN SOLUTION
    return x * torch.sigmoid(x)
    ### END SOLUTION


def silu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the loss in x, where `grad` (x's shape) is the gradient in silu(x): the
    formula above, without autograd.

    Right, and finite, for every finite x, however large.
    """
    ### BEGIN SOLUTION
    s = torch.sigmoid(x)
    return grad * s * (1 + x * (1 - s))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what grad is</summary>
#
# The chain rule multiplies: the gradient that arrives, times the derivative, element by element.
# Where the loss is the sum of all results, `grad` is all ones.
# </details>

# %% check="silu" points=2
numbers = functools.partial(torch.tensor, dtype=torch.float64)
checks.close(
    silu(numbers([-2.0, 0.0, 1.0, 3.0])),
    numbers([-0.23840584, 0.0, 0.73105858, 2.85772238]),
    rtol=1e-7,
    what="silu at -2, 0, 1 and 3",
    mistakes={
        "σ(x), without the factor x,": numbers([0.11920292, 0.5, 0.73105858, 0.95257413]),
        "x σ(-x)": numbers([-1.76159416, 0.0, 0.26894142, 0.14227762]),
        "GELU's sigmoid approximation": numbers([-0.06434138, 0.0, 0.84579577, 2.98192869]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for values in (
    4 * torch.randn(5, 3, generator=g, dtype=torch.float64).T,
    torch.tensor(1.5, dtype=torch.float64),
    torch.randn(2, 1, 6, generator=g, dtype=torch.float64),
):
    exact = torch.tensor(
        [t / (1 + math.exp(-t)) for t in values.flatten().tolist()], dtype=torch.float64
    ).view(values.shape)
    with checks.unchanged(x=values), checks.forbidden("silu"):
        result = silu(values)
    checks.close(result, exact, dtype=torch.float64, what="silu")
    checks.close(
        silu(values.half()),
        F.silu(values.half().double()).half(),
        dtype=torch.float16,
        what="silu in float16",
    )
extreme = torch.tensor([-1e4, -200.0, -89.0, -30.0, 30.0, 89.0, 200.0, 1e4], requires_grad=True)
result = silu(extreme)
checks.close(
    result,
    F.silu(extreme.double()).float(),
    what="silu from -10000 to 10000",
    hint="Where does an exponential overflow?",
)
(slope,) = torch.autograd.grad(result.sum(), extreme)
checks.close(
    slope,
    (extreme > 0).float(),
    what="the gradient of silu far out, where it is 0 on the left and 1 on the right,",
    hint="Where does an exponential overflow?",
)
checks.gradients(silu, F.silu, torch.randn(9, generator=g, dtype=torch.float64), names=["x"])
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    limit = torch.finfo(dtype).max
    ends = torch.tensor([-limit, -90.0, -20.0, -12.0, -10.0, 12.0, limit], dtype=dtype)
    leaf, exact = ends.clone().requires_grad_(), ends.double().requires_grad_()
    result = silu(leaf)
    (slope,) = torch.autograd.grad(result.sum(), leaf)
    (expected,) = torch.autograd.grad(F.silu(exact).sum(), exact)
    assert torch.isfinite(result).all(), (
        f"silu is not finite far out in {dtype}: {result.tolist()}."
    )
    checks.close(
        slope,
        expected.to(dtype),
        what=f"the gradient of silu far out in {dtype}",
        hint="Where does an exponential overflow? In float16 that is at 11 already.",
    )
### END HIDDEN TESTS

# %% check="silu" points=2
x = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
slopes = torch.tensor([-0.08810411, 0.5, 1.09078425], dtype=torch.float64)
numbers = functools.partial(torch.tensor, dtype=torch.float64)
checks.close(
    silu_backward(x, torch.ones_like(x)),
    slopes,
    rtol=1e-7,
    what="the derivative of silu at -3, 0 and 2",
    mistakes={
        "σ alone, without the product rule's second term,": numbers([0.04742587, 0.5, 0.88079708]),
        "the derivative of σ": numbers([0.04517666, 0.25, 0.10499359]),
        "the second term alone": numbers([-0.13552998, 0.0, 0.20998717]),
        "one σ missing": numbers([-2.81029651, 0.5, 1.11920292]),
    },
)
checks.close(
    silu_backward(x, numbers([1.0, 10.0, -2.0])),
    numbers([-0.08810411, 5.0, -2.18156850]),
    rtol=1e-7,
    what="the gradient for a grad of 1, 10 and -2",
    mistakes={"forgetting the gradient that arrives": slopes},
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for shape in [(7,), (3, 1, 4), ()]:
    values, grad = (torch.randn(shape, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    leaf = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.silu(leaf), leaf, grad)
    with (
        checks.unchanged(x=values, grad=grad),
        checks.forbidden("silu", "silu_backward"),
        checks.forbidden(
            "torch.autograd.grad", "torch.enable_grad", because="the formula is what is asked for"
        ),
        torch.no_grad(),
    ):
        result = silu_backward(values, grad)
    checks.close(result, expected, dtype=torch.float64, what="the gradient of silu")
checks.keeps_dtype(silu_backward, *torch.randn(2, 9, generator=g), what="the gradient of silu")
values, grad = torch.randn(2, 40, generator=g)  # one number alone may be near the zero of the slope
checks.close(
    silu_backward(values, grad),
    torch.ops.aten.silu_backward(grad.double(), values.double()),
    what="the gradient of silu in float32",
)
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    limit = torch.finfo(dtype).max
    ends = torch.tensor([-limit, -90.0, -12.0, 12.0, 90.0, limit], dtype=dtype)
    result = silu_backward(ends, torch.full_like(ends, 3.0))
    assert torch.isfinite(result).all(), (
        f"silu_backward is not finite far out in {dtype}: {result.tolist()}."
    )
    assert float(result[-1]) == 3.0, (
        f"silu's slope at {limit:.2g} is 1, and 3 times it 3; yours is {float(result[-1])}"
    )
extreme = torch.tensor([-1e4, -200.0, -89.0, 89.0, 200.0, 1e4])
checks.close(
    silu_backward(extreme, torch.full_like(extreme, 3.0)),
    3 * (extreme > 0).float(),
    what="3 times the derivative far out, where it is 0 on the left and 1 on the right,",
)
### END HIDDEN TESTS

# %% [markdown]
# The whole family, each with its derivative. Yours are GELU and SiLU; their derivatives come from
# autograd and from `silu_backward`.

# %% tags=["experiment"]
x = torch.linspace(-5, 5, 401, dtype=torch.float64)
family = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": gelu,
    "SiLU": silu,
}


def derivative(f, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf).sum(), leaf)[0]


# %% tags=["experiment", "figure"]
# Figure: five activations, and where almost no gradient flows back
fig, axes = plt.subplots(1, 5, figsize=(12, 2.9), sharex=True, sharey=True)
for ax, (name, f) in zip(axes, family.items(), strict=True):
    slope = silu_backward(x, torch.ones_like(x)) if name == "SiLU" else derivative(f, x)
    flat = (slope.abs() < 0.02).float()[None]
    # zones of at least 0.5, not where the slope crosses 0
    flat = F.max_pool1d(-F.max_pool1d(-flat, 21, 1, 10), 21, 1, 10)[0] > 0
    ax.axhline(0, color="#999999", linewidth=0.8, linestyle="-")
    ax.fill_between(x, -1.15, 2.2, where=flat, color="#e3e3e3", linewidth=0)
    ax.plot(x, f(x), color=plot.COLORS[0], linestyle="-", label="value")
    ax.plot(x, slope, color=plot.COLORS[1], linestyle="--", label="derivative")
    ax.set(ylim=(-1.15, 2.2), xlabel="x")
    ax.set_title(name)
axes[0].set_ylabel("value, derivative")
axes[0].legend(loc="upper left", fontsize=8)
plot.caption(
    fig,
    "Grey: the derivative is below 0.02, almost nothing flows back. Sigmoid and tanh have such a "
    "zone on both sides, ReLU on its whole left side. GELU and SiLU keep a band of gradient, "
    "partly negative, left of zero.",
)
plt.show()

# %% [markdown]
# Now a network twenty layers deep with each of them. Real digits go in, the weights are random
# (variance $1/D$, so that a linear network would keep the signal's size). Two things are measured
# at every layer: how much the units' values still *differ from one picture to another*, and the
# size of the gradient that comes back from a random direction at the top.

# %% tags=["experiment"]
images = data.digits()[0].flatten(1)[:150].double()
images = (images - images.mean(0)) / (images.std(0) + 0.1)
depth, width = 20, 200


def through_layers(f):
    """(spread between pictures, gradient norm per picture) at each of the layers."""
    gen = torch.Generator().manual_seed(3)
    h, values = images, []
    for layer in range(depth):
        weight = torch.randn(h.shape[1], width, generator=gen, dtype=torch.float64)
        weight = weight / math.sqrt(h.shape[1])
        h = f((h @ weight).requires_grad_() if layer == 0 else h @ weight)
        h.retain_grad()
        values.append(h)
    (h * torch.randn(width, generator=gen, dtype=torch.float64)).sum().backward()
    return [float(v.detach().std(0).mean()) for v in values], [
        float(v.grad.norm(dim=1).mean()) for v in values
    ]


measured = {name: through_layers(f) for name, f in family.items()}
print(
    "gradient at layer 1 over that at layer 20: "
    + ", ".join(
        f"{name} {gradient[0] / gradient[-1]:.0e}" for name, (_, gradient) in measured.items()
    )
)

# %% tags=["experiment", "figure"]
# Figure: what twenty layers leave of pictures and of the gradient
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.6))
layers = range(1, depth + 1)
plot.curves(
    layers,
    {name: spread for name, (spread, _) in measured.items()},
    xlabel="layer",
    ylabel="standard deviation between pictures",
    title="forward: what still tells pictures apart",
    logy=True,
    ax=axes[0],
)
plot.curves(
    layers,
    {name: gradient for name, (_, gradient) in measured.items()},
    xlabel="layer",
    ylabel="gradient norm",
    title="backward: what arrives at each layer",
    logy=True,
    ax=axes[1],
)
axes[1].get_legend().remove()
for ax in axes:
    ax.set_xticks([1, 5, 10, 15, 20])
plot.caption(
    fig,
    "Through sigmoid layers all pictures soon look the same, and the gradient (right, read from "
    "layer 20 to 1) loses a factor of a little more than 4 at each. GELU and SiLU are close to x/2 "
    "for small x and lose a factor of 2, ReLU about 1.4, tanh little. Such factors can be made "
    "good by larger weights (lesson 13); larger weights help a sigmoid only until its units "
    "saturate.",
)
plt.show()

# %% [markdown]
# ## Dropout
#
# A network with more parameters than it needs can learn its training pictures by heart. **Dropout**
# makes that hard: at every training step each unit is set to zero with probability $p$, on its own,
# so that no unit can rely on one particular other. When the network is used, all units are there.
#
# That changes the size of the signal. Let $m \in \{0, 1\}$ be the mask with $P(m = 1) = 1 - p$.
# Then $E[m x] = (1 - p)\,x$, smaller than the $x$ of evaluation. **Inverted dropout** puts that
# right during training, where it costs nothing later: keep $m\,x/(1 - p)$. Mean and variance of one
# element are
#
# $$E\Bigl[\frac{m x}{1-p}\Bigr] = x, \qquad \mathrm{Var}\Bigl[\frac{m x}{1-p}\Bigr] = \frac{x^2\,(1-p)\,p}{(1-p)^2} = x^2\,\frac{p}{1-p}.$$
#
# At $p = 1$ nothing is left to scale up, and the right answer is zero rather than $0/0$.


# %% exercise="dropout" minutes=15 difficulty=1
def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Inverted dropout: each element is zero with probability p, independently, and multiplied by
    1/(1 - p) otherwise.

    x: any shape, floating. p outside 0 … 1: ValueError, also when not training. Not training, or
    p = 0: returns x. p = 1: zeros, through which a gradient of zero flows. All chance comes from
    `generator` (None: PyTorch's default one); PyTorch's dropout is not used.
    """
    ### BEGIN SOLUTION
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}: a probability lies between 0 and 1")
    if not training or p == 0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * keep * scale
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a mask with probability p</summary>
#
# `torch.rand(shape, generator=…)` is uniform in [0, 1): it is below `p` with probability `p`.
# </details>

# %% check="dropout" points=2
x = torch.ones(10_000)
out = dropout(x, 0.2, generator=checks.generator(5))
assert isinstance(out, Tensor), f"dropout returned {out!r}, it should be a tensor."
kept = float((out != 0).float().mean())
assert abs(kept - 0.8) < 0.03, (
    f"{kept:.0%} of the elements are kept with p = 0.2; p is the probability of dropping one."
)
checks.close(
    out[out != 0][:1],
    torch.tensor([1.25]),
    what="an element of 1 that was kept, with p = 0.2,",
    mistakes={
        "leaving out the factor 1/(1 - p)": torch.tensor([1.0]),
        "dividing by p": torch.tensor([5.0]),
        "multiplying by 1 - p": torch.tensor([0.8]),
    },
)
### BEGIN HIDDEN TESTS
for p in (0.1, 0.5, 0.9):
    # Means within 6 standard deviations; a mask shared along an axis would make the means along the
    # others vary far more.
    shape = (60, 50, 20)
    gen = checks.generator(6)
    with checks.forbidden(
        "dropout", "dropout_", "alpha_dropout", "native_dropout", "feature_dropout"
    ):
        out = dropout(torch.ones(shape), p, True, gen)
    variance = p / (1 - p)
    values = set(out.unique().tolist())
    assert len(values) == 2, (
        f"p = {p}: with every x = 1 the results are 0 or 1/(1 - p); yours has {len(values)} "
        f"different values."
    )
    checks.close(out.max(), torch.tensor(1 / (1 - p)), what=f"the largest value, p = {p}")
    checks.close(out.min(), torch.tensor(0.0), what=f"the smallest value, p = {p}")
    assert abs(float(out.mean()) - 1) < 6 * math.sqrt(variance / out.numel()), (
        f"p = {p}: the mean is {float(out.mean()):.4f}, it should be 1."
    )
    for axis in range(3):
        ratio = float(out.mean(axis).var()) * shape[axis] / variance
        assert 0.7 < ratio < 1.4, (
            f"p = {p}: elements along axis {axis} are not dropped independently of each other."
        )
    checks.close(
        dropout(torch.ones(shape), p, True, checks.generator(6)),
        out,
        what="the same generator's second result",
    )
    assert not torch.equal(dropout(torch.ones(shape), p, True, gen), out), (
        "the next call drops the same elements again."
    )
g = checks.generator(7)
x = torch.randn(8, 6, generator=g).T
with checks.unchanged(x=x):
    out = dropout(x, 0.3, True, g)
kept = out != 0
checks.close(out[kept], x[kept] / 0.7, what="the elements that were kept")
checks.uses_generator(lambda g: dropout(torch.ones(64), 0.5, True, g), what="dropout")
torch.manual_seed(checks.seed())
first = dropout(x, 0.3)
torch.manual_seed(checks.seed())
checks.close(dropout(x, 0.3), first, what="the result after the same torch.manual_seed")
assert not torch.equal(dropout(torch.ones(64)), dropout(torch.ones(64))), (
    "without a generator two calls drop the same elements"
)
leaf = x.clone().requires_grad_()
(slope,) = torch.autograd.grad(dropout(leaf, 0.3, True, checks.generator(8)).sum(), leaf)
checks.close(
    slope,
    dropout(torch.ones_like(x), 0.3, True, checks.generator(8)),
    what="the gradient of dropout, which is 0 or 1/(1 - p),",
)
checks.keeps_dtype(lambda t: dropout(t, 0.5, True, g), torch.ones(64), what="dropout")
### END HIDDEN TESTS

# %% check="dropout" points=1
x = torch.tensor([1.0, -2.0, 3.0])
checks.close(
    dropout(x, 0.5, training=False),
    x,
    what="dropout when not training",
    mistakes={"scaling there too": 2 * x, "classical dropout": 0.5 * x},
)
checks.close(dropout(x, 1.0), torch.zeros(3), what="dropout with p = 1")
checks.raises(ValueError, dropout, x, 1.5, because="p is a probability.")
### BEGIN HIDDEN TESTS
g = checks.generator(9)
x = torch.randn(3, 1, 5, generator=g)
for p in (0.0, 0.4, 1.0):
    checks.close(dropout(x, p, False, g), x, rtol=0.0, what=f"dropout when not training, p = {p}")
checks.close(dropout(x, 0.0, True, g), x, rtol=0.0, what="dropout with p = 0")
zeros = {int((dropout(torch.ones(1000), 0.5, True, g) == 0).sum()) for _ in range(20)}
assert len(zeros) > 1, "independent elements do not always drop out in the same number"
leaf = x.clone().requires_grad_()
out = dropout(leaf, 1.0, True, g)
checks.close(out, torch.zeros_like(x), what="dropout with p = 1")
(slope,) = torch.autograd.grad(out.sum(), leaf)
checks.close(slope, torch.zeros_like(x), what="the gradient of dropout with p = 1")
for p in (-0.1, 1.01, math.nan):
    checks.raises(ValueError, dropout, x, p, because="p lies between 0 and 1.")
    checks.raises(
        ValueError, dropout, x, p, False, because="A wrong p is wrong when not training, too."
    )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: a digit under dropout: single draws, and their mean
digit = data.digits()[0][4]
fig, axes = plt.subplots(2, 6, figsize=(9, 3.5))
for row, p in zip(axes, (0.2, 0.5), strict=True):
    gen = torch.Generator().manual_seed(1)
    draws = torch.stack([dropout(digit, p, generator=gen) for _ in range(400)])
    shown = [
        (digit, "as it is"),
        *((draws[i], f"draw {i + 1}, p = {p}") for i in range(3)),
        (draws[:20].mean(0), "mean of 20"),
        (draws.mean(0), "mean of 400"),
    ]
    for ax, (picture, title) in zip(row, shown, strict=True):
        ax.imshow(picture, cmap="Greys", vmin=0, vmax=2)
        ax.set_title(title, fontsize=9, fontweight="normal")
        ax.axis("off")
plot.caption(
    fig,
    "A four whose pixels are dropped, on one scale of grey from 0 to 2. What is kept is darker, by "
    "1/(1 − p); the mean over many draws is the picture itself. With p = 0.5 a draw varies more: "
    "its variance is p/(1 − p) = 1 times the square of the pixel, against 0.25.",
)
plt.show()

# %% [markdown]
# ## A classifier in plain PyTorch
#
# In lesson 02 you trained a network with your own engine. The same thing with PyTorch's parts: an
# `nn.Module` holds the parameters, `nn.Linear` is $Wx + b$, an optimizer from `torch.optim` moves
# them (lesson 06 takes it apart), and `F.cross_entropy` is the loss (lesson 05). The loop is always
# the same four lines: loss, `zero_grad()`, `backward()`, `step()`. Since `.grad` is added to,
# leaving out the second gives each step the sum of all gradients so far.
#
# `model.train()` and `model.eval()` set a flag, `self.training`, that dropout looks at. Forgetting
# `eval()` is one of the commonest bugs there are: nothing fails, the accuracy is a little worse,
# and every run gives another answer.


# %% exercise="mlp_classifier" minutes=35 difficulty=2
class MLPClassifier(nn.Module):
    """Pictures (batch, 8, 8) or (batch, 64) → logits (batch, 10), before any softmax.

    Three nn.Linear layers in the nn.ModuleList `self.layers`: 64 → hidden → hidden → 10. After the
    first and the second come `activation` (any function of a tensor), then dropout with probability
    p, in training only. PyTorch's F.dropout is fine here.
    """

    def __init__(self, hidden: int = 256, activation=F.relu, p: float = 0.3):
        super().__init__()
        ### BEGIN SOLUTION
        self.layers = nn.ModuleList(
            [nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)]
        )
        self.activation, self.p = activation, p
        ### END SOLUTION

    def forward(self, images: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = F.dropout(self.activation(layer(x)), self.p, self.training)
        return self.layers[-1](x)
        ### END SOLUTION


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int = 15,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    after_step=None,
) -> list[float]:
    """Train with torch.optim.Adam(model.parameters(), lr) and mean cross-entropy; the loss of every
    step, before that step.

    An epoch goes through all N pictures once, in a new random order drawn from
    torch.Generator().manual_seed(seed), `batch` at a time; the last batch may be smaller. The model
    is in training mode meanwhile and in evaluation mode at the end. `after_step(model)`, if given,
    is called after every step.
    """
    ### BEGIN SOLUTION
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(model)
    model.eval()
    return losses
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: batches in a random order</summary>
#
# `torch.randperm(N, generator=g)` is an order of all indices, and `.split(batch)` cuts it into
# pieces. A tensor indexed with a tensor of indices gives those rows.
# </details>
#
# <details><summary>Hint: the loss hardly falls</summary>
#
# `F.cross_entropy` takes logits and applies log-softmax itself. A softmax of yours before it
# flattens the gradient.
# </details>

# %% check="mlp_classifier" points=2
torch.manual_seed(3)
model = MLPClassifier(hidden=16, p=0.5)
shapes = [tuple(layer.weight.shape) for layer in model.layers]
assert shapes == [(16, 64), (16, 16), (10, 16)], (
    f"the weights have shapes {shapes}; 64 → hidden → hidden → 10 is asked for, with hidden = 16."
)
picture = torch.rand(5, 8, 8, generator=checks.generator(30))
first, second, third = model.layers
plain = third(F.relu(second(F.relu(first(picture.flatten(1))))))
model.eval()
checks.close(
    model(picture),
    plain,
    what="the logits in evaluation mode",
    mistakes={
        "a softmax at the end": plain.softmax(1),
        "an activation after the last layer": plain.relu(),
        "no activation after the second layer": third(second(F.relu(first(picture.flatten(1))))),
    },
)
model.train()
assert not torch.equal(model(picture), model(picture)), (
    "in training mode two calls give the same: where is dropout?"
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for hidden, name, activation in [
    (7, "tanh", torch.tanh),
    (24, "silu", F.silu),
    (5, "square", torch.square),
]:
    model = MLPClassifier(hidden, activation, p=0.4).double().eval()
    assert sum(t.numel() for t in model.parameters()) == 65 * hidden + (
        hidden + 1
    ) * hidden + 10 * (hidden + 1), "the number of parameters is off."
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 4)
    picture = torch.randn(3, 8, 8, generator=g, dtype=torch.float64)
    x = picture.reshape(3, 64)
    for layer in model.layers[:2]:
        x = activation(torch.einsum("oi,ni->no", layer.weight, x) + layer.bias)
    exact = torch.einsum("oi,ni->no", model.layers[2].weight, x) + model.layers[2].bias
    with checks.unchanged(images=picture):
        checks.close(model(picture), exact, what=f"the logits with {name}")
    checks.close(
        model(picture.flatten(1)),
        exact,
        what=f"the logits with {name}, for pictures of shape (3, 64),",
    )
    checks.gradients(
        lambda t, model=model: model(t),
        lambda t, model=model: model(t.flatten(1)),
        picture,
        names=["the pictures"],
    )
# Dropout in training: the constant 1 in every hidden unit, all-ones weights at the end. Each logit
# is the number kept, over 1 - p.
model = MLPClassifier(200, lambda t: torch.ones_like(t), p=0.25)
with torch.no_grad():
    model.layers[2].weight.fill_(1.0)
    model.layers[2].bias.zero_()
model.train()
torch.manual_seed(checks.seed())
kept = model(torch.rand(300, 64)).detach()[:, 0] * 0.75
assert abs(float(kept.mean()) / 150 - 1) < 0.05, (
    f"p = 0.25: {float(kept.mean()) / 200:.0%} of the second hidden layer's units are kept in "
    f"training."
)
# Where dropout is: what reaches the activation shows it, and what leaves the last layer.
seen = []
model = MLPClassifier(200, lambda t: (seen.append(t), torch.ones_like(t))[1], p=0.25).train()
with torch.no_grad():
    model.layers[1].weight.copy_(torch.eye(200))
    model.layers[1].bias.zero_()
    model.layers[2].weight.zero_()
    model.layers[2].bias.fill_(1.0)
picture = torch.rand(50, 64, generator=checks.generator(31))
with checks.kept(model):
    logits = model(picture)
dropped = float((seen[1] == 0).float().mean())
assert abs(dropped - 0.25) < 0.05, (
    f"p = 0.25: {dropped:.0%} of the first hidden layer's units are dropped in training."
)
checks.close(seen[1].max(), torch.tensor(4 / 3), what="a unit of 1 that was kept with p = 0.25")
first = model.layers[0]
checks.close(
    seen[0],
    F.linear(picture, first.weight, first.bias),
    what="what the first layer makes of the pictures in training",
    hint="The pictures themselves are not dropped.",
)
checks.close(
    logits,
    torch.ones(50, 10),
    what="logits of 1 in training",
    hint="After the last layer comes no dropout.",
)
### END HIDDEN TESTS

# %% check="mlp_classifier" points=2
images, labels = data.digits()
held_out = torch.arange(len(labels)) % 5 == 0
torch.manual_seed(0)
model = MLPClassifier()
losses = train(model, images[~held_out], labels[~held_out])
checks.close(
    len(losses),
    15 * 23,
    what="the number of steps: 1,437 pictures in batches of 64, fifteen times,",
)
accuracy = float((model(images[held_out]).argmax(1) == labels[held_out]).float().mean())
assert accuracy >= 0.95, (
    f"{accuracy:.1%} of the unseen digits are right; at least 95 % are asked for. "
    "Are the gradients set back before every backward pass?"
)
### BEGIN HIDDEN TESTS
# Full batches: the order does not matter, and three steps of Adam can be written out.
torch.manual_seed(checks.seed())
model = MLPClassifier(6, torch.tanh, p=0.0).double()
weights = [t.detach().clone().requires_grad_() for t in model.parameters()]
for parameter in model.parameters():  # left over from somebody's backward(): it does not count
    parameter.grad = torch.ones_like(parameter)
means, squares = [torch.zeros_like(t) for t in weights], [torch.zeros_like(t) for t in weights]
x, y = images[:90].double(), labels[:90]
expected = []
for step in range(1, 5):
    a, b, c, d, e, f = weights
    logits = torch.tanh(torch.tanh(x.flatten(1) @ a.T + b) @ c.T + d) @ e.T + f
    loss = (logits.logsumexp(1) - logits[torch.arange(90), y]).mean()
    expected.append(loss.item())
    for i, grad in enumerate(torch.autograd.grad(loss, weights)):
        means[i], squares[i] = 0.9 * means[i] + 0.1 * grad, 0.999 * squares[i] + 0.001 * grad**2
        update = (
            0.01 * means[i] / (1 - 0.9**step) / ((squares[i] / (1 - 0.999**step)).sqrt() + 1e-8)
        )
        weights[i] = (weights[i] - update).detach().requires_grad_()
calls = []
with checks.unchanged(images=x, labels=y):
    losses = train(model, x, y, epochs=4, batch=100, lr=0.01, after_step=calls.append)
checks.close(
    torch.tensor(losses, dtype=torch.float64),
    expected,
    rtol=1e-6,
    what="the losses of four steps over all pictures",
    hint="Mean cross-entropy, Adam with the given lr, and gradients set back before every "
    "backward pass.",
)
assert calls == [model] * 4, "after_step(model) is called once after every step."
assert not model.training, "the model should be in evaluation mode at the end."


class Witness(nn.Module):
    """Notes which pictures come, and whether it is being trained."""

    def __init__(self):
        super().__init__()
        self.scale, self.batches, self.modes = nn.Parameter(torch.ones(10)), [], []

    def forward(self, images):
        self.batches.append(images.flatten(1)[:, 0].int().tolist())
        self.modes.append(self.training)
        return images.flatten(1)[:, :1] * self.scale


numbered = torch.arange(10.0)[:, None, None].expand(10, 8, 8)
orders, state = [], torch.get_rng_state()
for seed in (4, 4, 5):
    witness = Witness().eval()
    train(witness, numbered, torch.arange(10), epochs=3, batch=4, seed=seed)
    assert [len(b) for b in witness.batches] == [4, 4, 2] * 3, (
        f"10 pictures in batches of 4: yours have sizes {[len(b) for b in witness.batches]}."
    )
    assert all(witness.modes), (
        "the model was not in training mode in every step: model.train() first."
    )
    epochs = [[n for b in witness.batches[i : i + 3] for n in b] for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs), (
        "an epoch goes through every picture once."
    )
    assert len({tuple(e) for e in epochs}) == 3, "every epoch should have an order of its own."
    orders.append(epochs)
assert torch.equal(torch.get_rng_state(), state), (
    "PyTorch's default generator was used or seeded: the order comes from a generator of your own."
)
assert orders[0] == orders[1], (
    "the same seed gave two different orders: draw them from a generator of your own."
)
assert orders[0] != orders[2], "two seeds gave the same order."
turn = (labels + 3) % 10  # other labels for the same pictures: the answer must follow the data
torch.manual_seed(checks.seed())
model = MLPClassifier(activation=F.gelu)
train(model, images[~held_out], turn[~held_out], seed=checks.seed())
accuracy = float((model(images[held_out]).argmax(1) == turn[held_out]).float().mean())
assert accuracy >= 0.95, (
    f"seed {checks.seed()}, GELU: {accuracy:.1%} of the unseen digits are right; at least 95 % "
    f"are asked for."
)
### END HIDDEN TESTS

# %% [markdown]
# Now see units die. A ReLU unit is **dead** when it is 0 for every training picture: then no
# picture sends it a gradient, and its own weights stop (with Adam after the steps that its moments
# still carry). All it takes is one step that pushes its bias too far down, so large learning rates
# kill. For GELU and SiLU a unit counts as dead here when its *derivative* is below 0.001 on every
# picture.

# %% tags=["experiment"]
images, labels = data.digits()
held_out = torch.arange(len(labels)) % 5 == 0
training_images, training_labels = images[~held_out], labels[~held_out]


def dead_share(model, f) -> float:
    """Share of hidden units whose derivative is below 0.001 for every training picture."""
    x, dead = training_images.flatten(1), []
    with torch.no_grad():
        for layer in model.layers[:2]:
            before = layer(x)
            with torch.enable_grad():
                slope = derivative(f, before)
            dead.append(slope.abs().amax(0) < 1e-3)
            x = f(before)
    return float(torch.cat(dead).float().mean())


dead = {}
for rate in (0.002, 0.02, 0.05):
    dead[rate] = {}
    for name, f in (("ReLU", torch.relu), ("GELU", gelu), ("SiLU", silu)):
        torch.manual_seed(1)
        model, shares, step = MLPClassifier(hidden=64, activation=f, p=0.0), [], itertools.count()

        def note(model, f=f, shares=shares, step=step):
            if next(step) % 15 == 0:
                shares.append(100 * dead_share(model, f))

        train(model, training_images, training_labels, epochs=8, lr=rate, after_step=note)
        accuracy = float((model(images[held_out]).argmax(1) == labels[held_out]).float().mean())
        dead[rate][f"{name}: {accuracy:.1%} right"] = shares

# %% tags=["experiment", "figure"]
# Figure: how many units die while the classifier trains, by learning rate
fig, axes = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True)
for ax, (rate, lines) in zip(axes, dead.items(), strict=True):
    plot.curves(
        range(1, 15 * len(shares), 15),
        lines,
        xlabel="step",
        ylabel="dead units (% of 128)" if rate == 0.002 else "",
        title=f"learning rate {rate}",
        ax=ax,
    )
    ax.set_ylim(-2, 68)
plot.caption(
    fig,
    "Dead hidden units while the classifier trains, and its accuracy on unseen digits. The larger "
    "the learning rate, the more ReLU units die in the first steps, and few come back "
    "(only units of the second layer can, when the first one moves). At the largest rate GELU "
    "loses a few, too; SiLU none. Accuracy follows only loosely: 128 units are more than digits "
    "need. What is dead is capacity paid for and not used.",
)
plt.show()

# %% [markdown]
# ## Gated units
#
# So far a unit decided by its own value how much of itself to pass. A **gated linear unit** (GLU,
# Dauphin et al. 2016) lets two projections share the work: one makes the content, the other says
# how much of it passes. For an input $x$ of shape $(\dots, D)$ and a hidden size $H$,
#
# $$\mathrm{FFN}(x) = W_2\bigl(\mathrm{act}(W_1x) \odot W_3x\bigr), \qquad W_1, W_3: (H, D),\quad W_2: (D, H),$$
#
# where $\odot$ multiplies element by element. $W_1x$ is called the **gate**, $W_3x$ **up**, and
# $W_2$ **down**. The activation names the family: $\sigma$ is GLU itself, GELU gives **GeGLU**,
# SiLU gives **SwiGLU**. None has biases in today's models.
#
# The product is what is new. With ReLU a plain layer computes a piecewise linear function; this one
# multiplies two functions of the input, so that a unit can compute something like "$a$ and $b$" or
# "$a$ times $b$" which sums and bends only approximate.
#
# Three matrices in place of two. To compare at an equal number of parameters, Shazeer cut $H$ to
# two thirds: the plain layer with the usual $H = 4D$ has $2\cdot 4D\cdot D = 8D^2$ parameters, the
# gated one $3HD$, and they are equal for $H = \tfrac83 D$. Hardware likes multiples of a power of
# two, so LLaMA rounds it up: $D = 4096$ gives $10922.67$, cut to $10922$, and up to the next
# multiple of 256: **11008**, the number you find in every LLaMA-7B configuration.


# %% exercise="gated_units" minutes=20 difficulty=2
def gated_hidden_size(dim: int, multiple_of: int = 256) -> int:
    """LLaMA's hidden size: 8/3 · dim, rounded down to an integer, then up to a multiple of
    `multiple_of`. An int.
    """
    ### BEGIN SOLUTION
    hidden = 8 * dim // 3
    return (hidden + multiple_of - 1) // multiple_of * multiple_of
    ### END SOLUTION


class SwiGLU(nn.Module):
    """w2(silu(w1 x) ⊙ w3 x): (…, dim) → (…, dim).

    w1, w3: nn.Linear dim → hidden, w2: nn.Linear hidden → dim, all without bias, as attributes of
    these names. hidden None: the size above. F.silu and F.gelu may be used.
    """

    def __init__(self, dim: int, hidden: int | None = None, multiple_of: int = 256):
        super().__init__()
        ### BEGIN SOLUTION
        hidden = gated_hidden_size(dim, multiple_of) if hidden is None else hidden
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
        ### END SOLUTION


class GeGLU(SwiGLU):
    """The same with the exact GELU in place of SiLU: w2(gelu(w1 x) ⊙ w3 x)."""

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: rounding up with integers</summary>
#
# `//` rounds down. Add one less than the divisor first, and it rounds up. `8 * dim // 3` stays an
# integer all the way.
# </details>

# %% check="gated_units" points=1
checks.close(
    gated_hidden_size(4096),
    11008,
    what="the hidden size of LLaMA-7B",
    mistakes={
        "not rounding up": 10922,
        "rounding down": 10752,
        "4 · dim, the size of a plain layer,": 16384,
    },
)
with torch.device("meta"):  # shapes only: no memory is taken
    layer = SwiGLU(4096)
count = sum(t.numel() for t in layer.parameters())
checks.close(
    count,
    3 * 4096 * 11008,
    what="the number of parameters of LLaMA-7B's feed-forward layer",
    mistakes={
        "a layer of two matrices": 2 * 4096 * 11008,
        "a layer with biases": 3 * 4096 * 11008 + 2 * 11008 + 4096,
    },
)
### BEGIN HIDDEN TESTS
for dim, published in [(5120, 13824), (6656, 17920), (8192, 22016)]:  # LLaMA 13B, 33B, 65B
    checks.close(gated_hidden_size(dim), published, what=f"the hidden size for dim {dim}")
for dim, multiple_of, expected in [
    (96, 256, 256),
    (96, 1, 256),
    (97, 1, 258),
    (100, 16, 272),
    (3, 8, 8),
    (4, 8, 16),
    (97, 2, 258),
]:
    checks.close(
        gated_hidden_size(dim, multiple_of),
        expected,
        what=f"the hidden size for dim {dim}, multiple of {multiple_of}",
    )
for kind in (SwiGLU, GeGLU):
    for layer, hidden in [(kind(6, 5), 5), (kind(12, multiple_of=10), 40), (kind(3), 256)]:
        dim = layer.w1.weight.shape[1]
        shapes = {name: tuple(t.shape) for name, t in layer.named_parameters()}
        assert shapes == {
            "w1.weight": (hidden, dim),
            "w2.weight": (dim, hidden),
            "w3.weight": (hidden, dim),
        }, f"the parameters are {shapes}."
### END HIDDEN TESTS

# %% check="gated_units" points=2
layer = SwiGLU(1, 1)
for matrix, value in ((layer.w1, 1.0), (layer.w3, 3.0), (layer.w2, 0.5)):
    nn.init.constant_(matrix.weight, value)
x = torch.tensor([[2.0]])
checks.close(
    layer(x),
    torch.tensor([[5.2847825]]),
    what="SwiGLU with w1 = 1, w3 = 3, w2 = 1/2, at x = 2",
    mistakes={
        "the activation on w3 x, not on w1 x,": torch.tensor([[5.9851643]]),
        "adding the two, not multiplying,": torch.tensor([[3.8807971]]),
        "GLU: a sigmoid for the SiLU": torch.tensor([[2.6423912]]),
        "the activation around the product": torch.tensor([[5.9999631]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
for kind, activation in [
    (SwiGLU, lambda t: t / (1 + (-t).exp())),
    (GeGLU, lambda t: t * 0.5 * torch.erfc(-t / 2**0.5)),
]:
    for shape, hidden in [((2, 3, 5), 7), ((4,), 1), ((1, 6), 11), ((2, 1, 3, 2), 4)]:
        layer = kind(shape[-1], hidden).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 2)
        x = torch.randn(shape, generator=g, dtype=torch.float64)

        def formula(t, layer=layer, activation=activation):
            gate = torch.einsum("hd,...d->...h", layer.w1.weight, t)
            return torch.einsum(
                "dh,...h->...d",
                layer.w2.weight,
                activation(gate) * torch.einsum("hd,...d->...h", layer.w3.weight, t),
            )

        name = kind.__name__
        with checks.unchanged(x=x):
            checks.close(
                layer(x),
                formula(x),
                dtype=torch.float64,
                what=f"{name} of shape {shape}, hidden {hidden}",
            )
        checks.gradients(layer, formula, x, names=["x"])
        found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        expected = torch.autograd.grad(formula(x).square().sum(), list(layer.parameters()))
        for (which, _), mine, theirs in zip(layer.named_parameters(), found, expected, strict=True):
            checks.close(mine, theirs, what=f"{name}: the gradient of {which}")
### END HIDDEN TESTS

# %% tags=["experiment"]
torch.manual_seed(0)
images, labels = data.digits()
gated = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), SwiGLU(64, 40), nn.Linear(64, 10))
train(gated, images, labels, epochs=20, lr=4e-3)
with torch.no_grad():
    gates = F.silu(gated[2].w1(gated[1](images.flatten(1))))
by_digit = torch.stack([gates[labels == digit].mean(0) for digit in range(10)])
by_digit = by_digit[:, by_digit.argmax(0).argsort()]

# %% tags=["experiment", "figure"]
# Figure: what a gate lets through, and which digits open which gates
fig, axes = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=[1, 2.4])
line = torch.linspace(-4, 4, 81)
surface = F.silu(line)[None, :] * line[:, None]
levels = axes[0].contour(
    line,
    line,
    surface,
    levels=[-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8],
    colors="#333333",
    linewidths=1,
)
axes[0].clabel(levels, fontsize=7)
axes[0].set(xlabel="gate: w1 x", ylabel="up: w3 x", aspect="equal")
axes[0].set_title("silu(gate) · up")
plot.heatmap(
    by_digit,
    xlabel="hidden unit, sorted by the digit that opens it most",
    ylabel="digit",
    title="mean of silu(gate) over the pictures of a digit",
    unit="silu(gate)",
    xticks=[""] * by_digit.shape[1],
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: on the left half the gate is nearly shut, whatever up is (the levels lie far apart); on "
    "the right, up passes in proportion to the gate. Right: the gates of your SwiGLU after "
    "training on digits. Most units open (dark) for a few digits and are shut for the others; some "
    "are open for all.",
)
plt.show()

# %% [markdown]
# ## A first GPU kernel
#
# Look at the line `F.silu(gate) * up` with a GPU's eyes. PyTorch runs it as two **kernels**, one
# after the other. The first reads `gate` from memory and writes `silu(gate)`; the second reads that
# again, reads `up`, and writes the product. **Five** tensors cross the memory bus: three read, two
# written. The arithmetic is nothing to speak of: a GPU that can do 60 operations on a float in the
# time it takes to load it waits for memory all the time. Had the first kernel not written its
# result away, **three** would do: read `gate`, read `up`, write the product. Doing several steps
# while a number is on the chip is called **fusion**.
#
# ### What a program, a block and a mask are
#
# In **Triton** you write a kernel in Python, and it is compiled for the GPU. It does not handle one
# element, as in CUDA, nor the whole tensor, as in PyTorch. It handles one **block** of elements,
# say 1,024 of them:
#
# - Launching `kernel[grid](…)` starts a **grid** of **programs**: the same function many times
#   over, in any order, at the same time as far as the GPU has room. `tl.program_id(0)` tells each
#   which one it is.
# - From its number a program computes which elements are its own:
#   `program * BLOCK + tl.arange(0, BLOCK)`. This is a vector of indices, one for each **lane** of
#   the block. Block sizes are powers of two.
# - A tensor arrives as a **pointer**, the address of its first element. `ptr + indices` are the
#   addresses of the elements; `tl.load` reads them and `tl.store` writes them. Nobody checks that
#   they belong to your tensor.
# - Tensors rarely are a multiple of the block long. The last program has lanes beyond the end, and
#   those must not read or write: that is what the **mask** is for, a vector of true and false, one
#   for each lane.
#
# Here is a whole kernel. Every program writes its own number into its elements.


# %%
@triton.jit
def stamp_kernel(out_ptr, n, BLOCK: tl.constexpr):  # constexpr: known when the kernel is compiled
    program = tl.program_id(0)
    lanes = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, program, mask=lanes < n)


# %% tags=["experiment"]
if profile.has_triton:
    n, BLOCK = 21, 8
    right, wrong = (
        torch.full((26,), -1, dtype=torch.int32, device=profile.device) for _ in range(2)
    )
    stamp_kernel[(triton.cdiv(n, BLOCK),)](right, n, BLOCK=BLOCK)
    # a mask that lets all lanes through
    stamp_kernel[(triton.cdiv(n, BLOCK),)](wrong, n + 3, BLOCK=BLOCK)
else:
    print("Triton exists for Linux only: nothing to launch here.")


# %% tags=["experiment", "figure"]
# Figure: what a launch writes, with a mask and without one
def draw_memory(ax, values, title, marked=()):
    for i, value in enumerate(values):
        untouched = value < 0
        color = "white" if untouched or i in marked else ("#d9e8f3", "#7fb3d5", "#1f5f8b")[value]
        ax.add_patch(
            Rectangle(
                (i, 0),
                1,
                1,
                facecolor=color,
                edgecolor="#777777",
                hatch="////" if i in marked else None,
                linewidth=0.8,
            )
        )
        ax.text(
            i + 0.5,
            0.5,
            "·" if untouched else value,
            ha="center",
            va="center",
            fontsize=9,
            color="white" if color == "#1f5f8b" else "black",
        )
    ax.set(xlim=(-0.3, 26.3), ylim=(-0.15, 1.15), yticks=[], xticks=[])
    ax.set_title(title, fontsize=10, fontweight="normal")
    ax.axis("off")


if profile.has_triton:
    fig, axes = plt.subplots(3, 1, figsize=(9, 3.0))
    draw_memory(
        axes[0],
        [i // BLOCK if i < 24 else -1 for i in range(26)],
        "3 programs of 8 lanes (hatched: masked)",
        marked=range(n, 24),
    )
    draw_memory(axes[1], right.tolist(), f"memory afterwards, with mask=lanes < {n}")
    draw_memory(axes[2], wrong.tolist(), "memory afterwards, without a mask")
    for ax in axes:
        ax.axvline(n, color="#D55E00", linewidth=2, linestyle="-", ymin=-0.1, ymax=1.1)
    axes[0].text(n + 0.15, 1.25, "end of the tensor", color="#D55E00", fontsize=9)
    plot.caption(
        fig,
        "A tensor of 21 elements and what happens to lie behind it, before (·) and after the "
        "launch. Three programs have 24 lanes; the last three are masked. Without the "
        "mask they overwrite somebody else's memory, and no error tells you.",
    )
    plt.show()

# %% [markdown]
# On a machine without a GPU, kernels run in Triton's **interpreter**: one program after another, in
# NumPy. It is enough to prove a kernel right and far too slow to time it.
#
# ### Rows that do not lie side by side
#
# Real tensors bring one complication. Fast implementations of LLaMA compute gate and up with *one*
# matrix product and cut the result in two: `gate, up = w13(x).chunk(2, dim=-1)`. No number moves.
# Both halves are **views**: row $r$ of `gate` begins $2H$ elements after row $r - 1$, not $H$. That
# distance is the **row stride**. So your kernel gets a two-dimensional grid, (rows, blocks in a
# row): `tl.program_id(0)` is the row, `tl.program_id(1)` the block within it, and every tensor has
# its own row stride.
#
# $\text{address of element } (r, c) = \text{pointer} + r \cdot \text{row stride} + c$. Program
# numbers and strides are 32-bit integers, and $r\cdot$stride passes $2^{31}$ at a size that real
# batches have (150,000 tokens of 14,336). Make the row number a 64-bit one first: `.to(tl.int64)`.
#
# Half-precision numbers are converted to float32 when they have been loaded (`.to(tl.float32)`) and
# back when they are stored, which `tl.store` does by itself. Arithmetic is free here, so there is
# no reason to round in between, and `tl.exp` and `tl.sigmoid`, which you will want, take no
# half precision.
#
# The launchers below are given: they make the output, flatten all leading axes into rows, and pass
# pointers and strides. `autotuned` tries the block sizes of CONFIGS on a GPU, once for each row
# length, and keeps the fastest; the interpreter takes the first.

# %%
# BLOCK, and warps of 32 GPU threads that share a program
SIZES = ((2048, 8), (1024, 4), (4096, 8), (8192, 16))
CONFIGS = tuple(triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in SIZES)


def as_rows(t):
    """(…, n_cols) as (rows, n_cols) with the last axis contiguous; a view where the strides allow
    it.
    """
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def launch(kernel, tensors, block=None):
    """kernel[rows, blocks](pointers, row strides, n_cols, BLOCK) with the block size given, or the
    fastest.
    """
    tensors = [as_rows(t) for t in tensors]
    rows, n_cols = tensors[0].shape
    arguments = (*tensors, *(t.stride(0) for t in tensors), n_cols)
    if block is None:
        autotuned(kernel, CONFIGS, ("n_cols",))[
            lambda meta: (rows, triton.cdiv(n_cols, meta["BLOCK"]))
        ](*arguments)
    else:
        kernel[rows, triton.cdiv(n_cols, block)](*arguments, BLOCK=block)


def fused_swiglu_forward(gate, up, out=None, block=None):
    """silu(gate) ⊙ up for gate, up (…, n_cols) of one shape and dtype; `out`, if given, is written
    to.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    launch(swiglu_forward_kernel, (gate, up, out), block)
    return out


def fused_swiglu_backward(grad, gate, up, dgate=None, dup=None, block=None):
    """(dgate, dup), the gradients in gate and up; `grad` is the gradient in silu(gate) ⊙ up."""
    dgate, dup = (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if t is None else t
        for t in (dgate, dup)
    )
    launch(swiglu_backward_kernel, (grad, gate, up, dgate, dup), block)
    return dgate, dup


class FusedSwiGLU(torch.autograd.Function):
    """FusedSwiGLU.apply(gate, up): lesson 02's way of giving autograd a backward pass of one's own.
    Keeps gate and up, nothing else.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return fused_swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, grad):
        return fused_swiglu_backward(grad, *ctx.saved_tensors)


# %% tags=["support"]
# Support: SwiGLU in float64, and where a kernel reads and writes when rows are 2³⁰ elements apart


def exact_swiglu(gate, up, grad=None):
    """In float64: silu(gate) ⊙ up, and with `grad` its gradients in gate and up."""
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    out = gate / (1 + (-gate).exp()) * up
    return out.detach() if grad is None else torch.autograd.grad(out, (gate, up), grad.double())


def check_far_rows(kernel, inputs, outputs):
    """Launch on tensors of 4 rows of 5, 2³⁰ elements apart, and compare the addresses; no memory is
    touched. Nothing is done where the interpreter is off.
    """
    tensors = [torch.zeros(1, device=profile.device) for _ in range(inputs + outputs)]
    with checks.traffic(dry=True) as seen:
        if seen is not None:
            kernel[4, 1](*tensors, *[2**30] * len(tensors), 5, BLOCK=8)
    if seen is None:
        return
    places = [checks.addresses(t, (4, 5), (2**30, 1)) for t in tensors]
    expected = set().union(*places[:inputs]), set().union(*places[inputs:])
    assert (set(seen.read), set(seen.written)) == expected, (
        "rows 2³⁰ elements apart: row 2 is not where it should be. Is the row number 64 bits wide "
        "before it is multiplied?"
    )


# %% [markdown]
# ### The forward kernel


# %% exercise="swiglu_forward_kernel" minutes=25 difficulty=2 path="more"
@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr
):
    """out = silu(gate) ⊙ up, for one block of one row.

    gate, up, out: (rows, n_cols), float32 or half, each with its own row stride (gate_row, …),
        elements of a row side by side.
    Grid: (rows, ⌈n_cols / BLOCK⌉). Every element is loaded once and stored once; computed in
        float32. Rows beyond 2³¹ elements work.
    """
    ### BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2³¹
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols  # the last block hangs over the end of the row
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * tl.sigmoid(gate) * up, mask=inside)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the shape of it</summary>
#
# Row, columns, mask: three lines. Two loads, one formula, one store.
# </details>
#
# <details><summary>Hint: right for one block, wrong for several</summary>
#
# The columns of block $b$ begin at $b \cdot$ BLOCK.
# </details>

# %% check="swiglu_forward_kernel" points=2
# Two rows of 6 in blocks of 4: four programs, two of them with two lanes too many.
gen = checks.generator(12)
gate, up = (checks.randn(2, 6, generator=gen) for _ in range(2))
# What no program writes stays NaN. And what the interpreter takes, a GPU may not: it compiles, too.
with checks.launches() as launched, checks.guarded_allocations(), checks.compiled():
    out = fused_swiglu_forward(gate, up, block=4)
exact = exact_swiglu(gate, up)
assert (launched.count, launched.programs) == (1, 4), (
    f"{launched.count} launches and {launched.programs} programs; one and four are expected."
)
checks.relative_l2(
    out,
    exact,
    2e-6,
    what="silu(gate) ⊙ up",
    hint="Elements that no program wrote are NaN here.",
    mistakes={
        "the activation on up, not on gate,": exact_swiglu(up, gate),
        "a sigmoid for the SiLU": gate.double().sigmoid() * up.double(),
        "silu(gate) alone": F.silu(gate.double()),
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(13)
for rows, n_cols, block in [
    (1, 1, 16),
    (3, 13, 8),
    (2, 33, 32),
    (4, 16, 16),
    (1, 100, 64),
    (2, 7, None),
]:
    gate, up = (checks.randn(rows, n_cols, generator=gen, scale=3.0) for _ in range(2))
    where = f"{rows} rows of {n_cols} in blocks of {block or 'the default size'}."
    with (
        checks.launches() as launched,
        checks.traffic() as moved,
        checks.unchanged(gate=gate, up=up),
        checks.guarded_allocations(),
    ):
        out = fused_swiglu_forward(gate, up, block=block)
    assert launched.kernels["swiglu_forward_kernel"] >= 1, "the kernel was not launched."
    checks.relative_l2(
        out.clone(), exact_swiglu(gate, up), 2e-6, what="silu(gate) ⊙ up", hint=where
    )
    if moved is not None:
        checks.close(
            moved.loaded,
            2 * gate.numel(),
            what="the number of elements read",
            hint=f"Each of gate and up once; {where}",
        )
        checks.close(
            moved.stored,
            gate.numel(),
            what="the number of elements written",
            hint=f"Each once; {where}",
        )
# More dimensions, the two halves of one projection, and a transposed tensor, which the launcher
# copies.
both = checks.randn(2, 3, 2 * 11, generator=gen)
gate, up = both.chunk(2, dim=-1)
with checks.unchanged(both=both):
    checks.relative_l2(
        fused_swiglu_forward(gate, up, block=8),
        exact_swiglu(gate, up),
        2e-6,
        what="gate and up as the two halves of one tensor",
        hint="Row r begins at r times the row stride, and every tensor has its own.",
    )
gate, up = checks.randn(9, 5, generator=gen).T, checks.randn(5, 9, generator=gen)
checks.relative_l2(
    fused_swiglu_forward(gate, up, block=4), exact_swiglu(gate, up), 2e-6, what="a transposed gate"
)
extreme = torch.tensor(
    [[-1e4, -200.0, -89.0, -20.0, 20.0, 89.0, 200.0, 1e4]], device=profile.device
)
with np.errstate(
    over="ignore"
):  # in the interpreter exp is NumPy's, which warns; 1/(1 + inf) is what we want
    out = fused_swiglu_forward(extreme, torch.ones_like(extreme), block=8)
checks.close(out, F.silu(extreme.double()).float(), what="silu(gate) far out")
half = [checks.randn(32, 50, generator=gen, dtype=torch.float16) for _ in range(2)]
with checks.compiled():
    out = fused_swiglu_forward(*half, block=64)
assert out.dtype == torch.float16
checks.relative_l2(
    out,
    exact_swiglu(*half).half(),
    1.5e-4,
    what="silu(gate) ⊙ up in float16",
    hint="Everything is computed in float32 and rounded once, at the end.",
)
### END HIDDEN TESTS

# %% check="swiglu_forward_kernel" points=2
# Nothing may be written beyond a row: the output's rows lie 3 elements further apart than they are
# long, and between them are canaries.
gen = checks.generator(14)
gate, up = (checks.randn(3, 5, generator=gen) for _ in range(2))
out = checks.guarded(torch.zeros_like(gate), row_pad=3, what="out")
with checks.compiled():
    fused_swiglu_forward(gate, up, out=out.tensor, block=4)
out.intact()
checks.relative_l2(
    out.tensor.clone(),
    exact_swiglu(gate, up),
    2e-6,
    what="out in a padded buffer",
    hint="Its rows are out_row apart.",
)
### BEGIN HIDDEN TESTS
for rows, n_cols, block in [(2, 9, 16), (3, 17, 8), (1, 31, 32)]:
    gate, up = (checks.randn(rows, n_cols, generator=gen) for _ in range(2))
    with checks.buffers(gate=gate, up=up, out=torch.zeros_like(gate), written=["out"]) as held:
        fused_swiglu_forward(held.gate, held.up, out=held.out, block=block)
        result = held.out.clone()
    checks.relative_l2(
        result,
        exact_swiglu(gate, up),
        2e-6,
        what="out, everything in padded buffers",
        hint="gate, up and out each have a row stride of their own.",
    )
if profile.interpret:
    check_far_rows(swiglu_forward_kernel, inputs=2, outputs=1)
elif torch.cuda.mem_get_info()[0] > 8e9:
    memory = torch.zeros(3 * 2**30 + 300, dtype=torch.float16, device="cuda")
    gate, up, out = (memory.as_strided((4, 50), (2**30, 1), 100 * i) for i in range(3))
    gate.copy_(torch.randn(4, 50, generator=gen))
    up.copy_(torch.randn(4, 50, generator=gen))
    fused_swiglu_forward(gate, up, out=out, block=64)
    checks.relative_l2(
        out.clone(),
        exact_swiglu(gate, up),
        1e-3,
        what="rows 2³⁰ elements apart",
        hint="Is the row number 64 bits wide before it is multiplied?",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### The backward kernel
#
# Let $s = \sigma(\text{gate})$ and $do$ be the gradient that arrives, all of shape (rows, $H$). The
# product rule, with the derivative of [](#silu):
#
# $$d\,\text{up} = do \odot \text{gate} \odot s, \qquad d\,\text{gate} = do \odot \text{up} \odot s \odot \bigl(1 + \text{gate} \odot (1 - s)\bigr).$$
#
# Autograd on `F.silu(gate) * up` runs three kernels for this: two products for the multiplication
# (each reads two tensors, writes one), then SiLU's own (reads two, writes one). Nine tensors move,
# and `silu(gate)` was kept from the forward pass. The fused kernel computes $s$ again, which costs
# nothing, reads three tensors, writes two, and keeps only gate and up.


# %% exercise="swiglu_backward_kernel" minutes=25 difficulty=2 path="more"
@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    grad_row, gate_row, up_row, dgate_row, dup_row,
    n_cols, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate and dup, for one block of one row.

    grad, gate, up, dgate, dup: (rows, n_cols), float32 or half, each with its own row stride,
        elements of a row side by side.
    Grid: (rows, ⌈n_cols / BLOCK⌉). Every element is loaded once and stored once; computed in
        float32. Rows beyond 2³¹ elements work.
    """
    ### BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_ptr + row * dgate_row + cols, grad * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dup_ptr + row * dup_row + cols, grad * gate * s, mask=inside)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where to begin</summary>
#
# With your forward kernel: the first five lines are the same but for one more load. Five tensors,
# five row strides, two stores, each with the mask.
# </details>

# %% check="swiglu_backward_kernel" points=2
gen = checks.generator(15)
grad, gate, up = (checks.randn(2, 6, generator=gen) for _ in range(3))
with checks.launches() as launched, checks.guarded_allocations(), checks.compiled():
    dgate, dup = fused_swiglu_backward(grad, gate, up, block=4)
assert (launched.count, launched.programs) == (1, 4), (
    f"{launched.count} launches and {launched.programs} programs; one and four are expected."
)
exact_dgate, exact_dup = exact_swiglu(gate, up, grad)
checks.relative_l2(
    dup, exact_dup, 2e-6, what="dup", mistakes={"swapping the two results": exact_dgate}
)
checks.relative_l2(
    dgate, exact_dgate, 2e-6, what="dgate", mistakes={"swapping the two results": exact_dup}
)
### BEGIN HIDDEN TESTS
gen = checks.generator(16)
for rows, n_cols, block in [(1, 1, 16), (3, 13, 8), (2, 33, 32), (4, 16, 16), (2, 7, None)]:
    grad, gate, up = (checks.randn(rows, n_cols, generator=gen, scale=3.0) for _ in range(3))
    if n_cols == 1:
        gate = (
            gate.abs()
        )  # the slope is 0 near −1.28, and one number has no other to be compared to
    where = f"{rows} rows of {n_cols} in blocks of {block or 'the default size'}."
    with (
        checks.launches() as launched,
        checks.traffic() as moved,
        checks.unchanged(grad=grad, gate=gate, up=up),
        checks.guarded_allocations(),
    ):
        found = fused_swiglu_backward(grad, gate, up, block=block)
    assert launched.kernels["swiglu_backward_kernel"] >= 1, "the kernel was not launched."
    exact_dgate, exact_dup = exact_swiglu(gate, up, grad)
    sigma = gate.double().sigmoid()
    checks.relative_l2(
        found[0].clone(),
        exact_dgate,
        2e-6,
        what="dgate",
        hint=where,
        mistakes={
            "leaving out the gradient that arrives": exact_dgate / grad,
            "leaving out the factor up": exact_dgate / up,
            "σ(gate) alone as SiLU's derivative": grad * up * sigma,
            "the derivative of the sigmoid": grad * up * sigma * (1 - sigma),
        },
    )
    checks.relative_l2(
        found[1].clone(),
        exact_dup,
        2e-6,
        what="dup",
        hint=where,
        mistakes={
            "leaving out the gradient that arrives": exact_dup / grad,
            "σ(gate), without the factor gate,": grad * sigma,
        },
    )
    if moved is not None:
        checks.close(
            moved.loaded,
            3 * gate.numel(),
            what="the number of elements read",
            hint=f"Each of the three inputs once; {where}",
        )
        checks.close(
            moved.stored,
            2 * gate.numel(),
            what="the number of elements written",
            hint=f"Each once; {where}",
        )
extreme = torch.tensor([[-1e4, -200.0, -89.0, 89.0, 200.0, 1e4]], device=profile.device)
with np.errstate(over="ignore"):
    dgate, dup = fused_swiglu_backward(
        torch.full_like(extreme, 2.0), extreme, torch.full_like(extreme, 3.0), block=8
    )
checks.close(
    dgate,
    6 * (extreme > 0).float(),
    what="dgate far out, where SiLU's derivative is 0 on the left and 1 on the right,",
)
checks.close(dup, 2 * extreme * (extreme > 0), atol=1e-30, what="dup far out")
half = [checks.randn(32, 50, generator=gen, dtype=torch.float16) for _ in range(3)]
with checks.compiled():
    found = fused_swiglu_backward(*half, block=64)
for name, mine, theirs in zip(
    ("dgate", "dup"), found, exact_swiglu(*half[1:], half[0]), strict=True
):
    assert mine.dtype == torch.float16
    checks.relative_l2(
        mine,
        theirs.half(),
        1.5e-4,
        what=f"{name} in float16",
        hint="Everything is computed in float32 and rounded once, at the end.",
    )
### END HIDDEN TESTS

# %% check="swiglu_backward_kernel" points=2
# The two halves of one projection, with a gradient that is one number expanded, as sum() sends it;
# then padded buffers with canaries.
gate, up = checks.randn(2, 3, 10, generator=checks.generator(17)).chunk(2, dim=-1)
one = torch.ones((), device=profile.device).expand(2, 3, 5)
with checks.guarded_allocations(), checks.compiled():
    found = fused_swiglu_backward(one, gate, up, block=4)
for name, mine, theirs in zip(("dgate", "dup"), found, exact_swiglu(gate, up, one), strict=True):
    checks.relative_l2(
        mine,
        theirs,
        2e-6,
        what=f"{name} for gate and up as the two halves of one tensor",
        hint="Each tensor has its own row stride.",
    )
gen = checks.generator(18)
grad, gate, up = (checks.randn(3, 5, generator=gen) for _ in range(3))
empty = {"dgate": torch.zeros_like(gate), "dup": torch.zeros_like(gate)}
with checks.buffers(grad=grad, gate=gate, up=up, **empty, written=list(empty)) as held:
    fused_swiglu_backward(held.grad, held.gate, held.up, held.dgate, held.dup, block=4)
    found = held.dgate.clone(), held.dup.clone()
for name, mine, theirs in zip(empty, found, exact_swiglu(gate, up, grad), strict=True):
    checks.relative_l2(
        mine,
        theirs,
        2e-6,
        what=f"{name} in a padded buffer",
        hint="Each tensor has its own row stride.",
    )
### BEGIN HIDDEN TESTS
gen = checks.generator(19)
for rows, n_cols, block in [(2, 9, 16), (3, 17, 8)]:
    grad, gate, up = (checks.randn(rows, n_cols, generator=gen) for _ in range(3))
    empty = {"dgate": torch.zeros_like(gate), "dup": torch.zeros_like(gate)}
    with checks.buffers(gate=gate, up=up, grad=grad, **empty, written=list(empty)) as held:
        fused_swiglu_backward(held.grad, held.gate, held.up, held.dgate, held.dup, block=block)
        found = held.dgate.clone(), held.dup.clone()
    for name, mine, theirs in zip(empty, found, exact_swiglu(gate, up, grad), strict=True):
        checks.relative_l2(
            mine,
            theirs,
            2e-6,
            what=f"{name}, everything in padded buffers",
            hint="Each tensor has its own row stride.",
        )
if profile.interpret:
    check_far_rows(swiglu_backward_kernel, inputs=3, outputs=2)
elif torch.cuda.mem_get_info()[0] > 8e9:
    memory = torch.zeros(3 * 2**30 + 500, dtype=torch.float16, device="cuda")
    tensors = [memory.as_strided((4, 50), (2**30, 1), 100 * i) for i in range(5)]
    for t in tensors[:3]:
        t.copy_(torch.randn(4, 50, generator=gen))
    fused_swiglu_backward(*tensors, block=64)
    for mine, theirs in zip(tensors[3:], exact_swiglu(*tensors[1:3], tensors[0]), strict=True):
        checks.relative_l2(
            mine.clone(),
            theirs,
            1e-3,
            what="rows 2³⁰ elements apart",
            hint="Is the row number 64 bits wide before it is multiplied?",
        )
### END HIDDEN TESTS

# %% [markdown]
# `FusedSwiGLU`, above, joins your two kernels into one function that autograd can use. A network
# does not notice the difference: here the same gated classifier takes the same steps twice, with
# PyTorch's operations and with your kernels.


# %% tags=["experiment"]
class FusedLayer(SwiGLU):
    def forward(self, x):
        return self.w2(FusedSwiGLU.apply(self.w1(x), self.w3(x)))


if profile.has_triton:
    images, labels = (t[:128].to(profile.device) for t in data.digits())
    losses = {}
    for name, layer in (("PyTorch", SwiGLU), ("your kernels", FusedLayer)):
        torch.manual_seed(0)
        gated = nn.Sequential(nn.Flatten(), layer(64, 40), nn.Linear(64, 10)).to(profile.device)
        losses[name] = train(gated, images, labels, epochs=4, batch=64, lr=1e-2)
        print(f"{name:13}" + "  ".join(f"{loss:.6f}" for loss in losses[name]))
    print(
        f"largest difference {max(abs(a - b) for a, b in zip(*losses.values(), strict=True)):.1e}"
    )

# %% [markdown]
# ### On the hardware
#
# On a GPU the next cells measure achieved **bandwidth**: the bytes that *must* move (3 tensors
# forward, 5 backward), over the time taken. The yardstick is a plain copy in the same run, which no
# kernel of this kind can beat; the peers are eager PyTorch and `torch.compile`, whose compiler
# finds this fusion by itself and also writes Triton. On a CPU they count the traffic of your
# kernels instead and say what it would cost.

# %% tags=["experiment"]
rows, hidden = 8192, 14336  # 8k tokens of a LLaMA-3-8B feed-forward layer
on_gpu = profile.name == "gpu" and not profile.interpret


def measure():
    """{name: (forward, backward)}, each (median, low, high) in TB/s over the bytes that must move;
    bfloat16.
    """
    gate, up, grad = (
        torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    size = 2 * rows * hidden

    def bandwidth(tensors, function):
        median, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        return [tensors * size / ms / 1e9 for ms in (median, high, low)]

    def eager(gate, up):
        return F.silu(gate) * up

    target = torch.empty_like(grad)
    results = {"copy": (bandwidth(2, lambda: target.copy_(grad)),) * 2}
    for name, function in (
        ("yours", FusedSwiGLU.apply),
        ("torch.compile", torch.compile(eager)),
        ("eager", eager),
    ):
        try:
            out = function(*leaves)
            results[name] = (
                bandwidth(3, lambda f=function: f(*leaves)),
                bandwidth(
                    5, lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True)
                ),
            )
        except RuntimeError as error:  # a compiler that is not set up on this machine
            print(f"{name}: {str(error).splitlines()[0]}")
    return results


if on_gpu:
    results = measure()
elif profile.has_triton:
    small = [torch.randn(2, 64) for _ in range(3)]
    with checks.traffic() as there:
        fused_swiglu_forward(*small[1:])
    with checks.traffic() as back:
        fused_swiglu_backward(*small)

# %% tags=["experiment", "figure"]
# Figure: the speed of your kernels on a GPU, or their traffic on a CPU
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), sharey=True)
if on_gpu:
    for i, (ax, direction) in enumerate(zip(axes, ("forward", "backward"), strict=True)):
        for j, (name, values) in enumerate(results.items()):
            median, low, high = values[i]
            ax.bar(
                name,
                median,
                color=plot.COLORS[j],
                yerr=[[median - low], [high - median]],
                capsize=3,
            )
            print(
                f"{direction:8} {name:14} {median:.2f} TB/s, {median / results['copy'][i][0]:.0%} "
                "of a copy"
            )
        ax.set_title(direction)
    axes[0].set_ylabel("TB/s, of the bytes that must move")
    plot.caption(
        fig,
        f"{torch.cuda.get_device_name()}, {rows} × {hidden}, bfloat16; higher is better. Bars: "
        "median, whiskers: 20 and 80 % quantiles.",
    )
elif profile.has_triton:
    for ax, direction, counted, eager in zip(
        axes, ("forward", "backward"), (there, back), ((3, 2), (6, 3)), strict=True
    ):
        yours = counted.loaded / 128, counted.stored / 128
        for x, (read, written) in enumerate((eager, yours)):
            ax.bar(
                x, read, color=plot.COLORS[5], edgecolor="black", label="read" if x == 0 else None
            )
            ax.bar(
                x,
                written,
                bottom=read,
                color=plot.COLORS[1],
                edgecolor="black",
                hatch="//",
                label="written" if x == 0 else None,
            )
            milliseconds = (read + written) * 2 * rows * hidden / 4.8e12 * 1e3
            ax.annotate(
                f"{read + written:.0f} tensors\n{milliseconds:.2f} ms",
                (x, read + written),
                ha="center",
                va="bottom",
                fontsize=9,
            )
        ax.set_xticks([0, 1], ["eager: one kernel a step", "yours, counted"])
        ax.set_ylim(0, 11.5)
        ax.set_title(direction)
    axes[0].set_ylabel("tensors across the memory bus")
    axes[1].legend(loc="upper right")
    plot.caption(
        fig,
        "Traffic of SwiGLU's element-wise part. The times are arithmetic, not a measurement: "
        f"{rows} × {hidden} in bfloat16 at the 4.8 TB/s of an H200's memory. Fusion saves 2 of 5 "
        "tensors forward and 4 of 9 backward; the arithmetic stays.",
    )
else:
    plt.close(fig)
    print("Triton exists for Linux only: nothing to measure or count here.")
plt.show()

# %% [markdown]
# ## Experiment: does the gate pay?
#
# **Question.** Shazeer found GeGLU and SwiGLU better than ReLU and GELU layers *of the same number
# of parameters*, and offered no explanation ("we attribute their success, as all else, to divine
# benevolence"). Does it show in a small model? A network predicts the next byte of Python's
# documentation from the 8 bytes before it: an embedding of 16 numbers a byte, one feed-forward
# layer of the kind in question on the resulting 128 numbers, and a linear layer to 256 logits.
# Hidden sizes are 512 for the plain layers and 341 for the gated ones: 131,072 and 130,944
# parameters. Four kinds, three seeds each, the same batches for all.
#
# **Predict first.** Order ReLU, GELU, GeGLU and SwiGLU by their loss on held-out text, and say how
# large you expect the gap between best and worst to be, compared with the spread between seeds.
# Write it down, then run.


# %% tags=["experiment"]
class Plain(nn.Module):
    """w2(act(w1 x)), without biases."""

    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)))


class NextByte(nn.Module):
    """Bytes (batch, 8) → logits of the next (batch, 256)."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.norm = nn.Embedding(256, 16), nn.LayerNorm(128)
        self.layer, self.head = layer, nn.Linear(128, 256)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens).flatten(1))
        return self.head(x + self.layer(x))


kinds = {
    "ReLU": lambda: Plain(128, 512, F.relu),
    "GELU": lambda: Plain(128, 512, gelu),
    "GeGLU": lambda: GeGLU(128, 341),
    "SwiGLU": lambda: SwiGLU(128, 341),
}
texts = [
    torch.tensor(list("\n".join(part.values()).encode()))
    for part in data.split(data.deduplicate(data.documentation()))
]
windows = [text.unfold(0, 9, 1) for text in texts]
steps, batch = profile.pick(cpu=(200, 128), gpu=(1000, 512))
test = windows[1][:: max(1, len(windows[1]) // 4000)].to(profile.device)
final = {}
for name, make in kinds.items():
    final[name] = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = NextByte(make()).to(profile.device)
        optimizer, order = (
            torch.optim.Adam(model.parameters(), 3e-3),
            torch.Generator().manual_seed(seed),
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            chosen = windows[0][torch.randint(len(windows[0]), (batch,), generator=order)].to(
                profile.device
            )
            optimizer.zero_grad()
            F.cross_entropy(model(chosen[:, :8]), chosen[:, 8]).backward()
            optimizer.step()
        with torch.no_grad():
            final[name].append(float(F.cross_entropy(model(test[:, :8]), test[:, 8])) / math.log(2))

means = {name: sum(losses) / 3 for name, losses in final.items()}
spread = max(max(losses) - min(losses) for losses in final.values())
print(
    ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    + f" bits per byte; best to worst {max(means.values()) - min(means.values()):.3f}, largest "
    f"spread between seeds {spread:.3f}"
)

# %% tags=["experiment", "figure"]
# Figure: feed-forward layers of equal size, three seeds of each
fig, ax = plt.subplots(figsize=(6.6, 3.2))
for i, losses in enumerate(final.values()):
    ax.plot(
        losses,
        [i] * 3,
        "o",
        linestyle="none",
        color=plot.COLORS[0],
        markerfacecolor="white",
        label="one seed" if i == 0 else None,
    )
    ax.plot(
        [sum(losses) / 3],
        [i],
        "|",
        markersize=20,
        markeredgewidth=2.5,
        linestyle="none",
        color="black",
        label="mean" if i == 0 else None,
    )
ax.set_yticks(range(4), list(final))
ax.set_ylim(3.5, -0.5)
ax.set(xlabel="held-out loss (bits per byte), lower is better")
ax.set_title("Feed-forward layers of equal size")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plot.caption(
    fig,
    f"Next byte from 8 bytes, {steps} steps of {batch}. Compare the distance between the means "
    "with the spread of the three seeds of one kind.",
)
plt.show()

# %% [markdown]
# **What came out.** On the two cores where this was written: ReLU 3.53, GELU 3.51, GeGLU 3.29,
# SwiGLU 3.30 bits per byte. Both gated layers beat both plain ones on every seed, and on average by
# 0.22 to 0.24, nearly twice the largest spread between seeds. Within each pair the difference is
# 0.02 or less, and nothing can be said about it from three seeds: the claim "SwiGLU is best" rests
# on larger studies, and there too GeGLU and SwiGLU change places. Do not take the size of the gap
# for granted either. After ten times as many steps (one seed: 2.30, 2.28, 2.21, 2.22) the gap is
# 0.08: much of what you see is that gated layers learn *faster* at first. In Shazeer's tables, with
# models trained for half a million steps, it is a few hundredths of a nat per token. The order of
# the two families stays.

# %% [markdown]
# ## Key questions


# %% exercise="key_questions" minutes=10 difficulty=1 kind="questions"
def key_questions() -> dict[str, float]:
    """Short answers: whole numbers, but for "most_gradient" (to 1 percent).

    "plain":          parameters of a plain feed-forward layer without biases, D = 128, H = 512.
    "gated":          those of a gated one, D = 4096, H = 11008.
    "fused_forward":  tensors of gate's size read plus written for silu(gate) ⊙ up, forward, in one
                      fused kernel.
    "eager_forward":  the same with one kernel a step, as eager PyTorch does it.
    "fused_backward": the fused kernel for the two gradients.
    "eager_backward": the kernels of autograd for them.
    "most_gradient":  the largest factor by which the slopes of the sigmoids of five layers together
                      can multiply a gradient, whatever their inputs are, the weights left aside.
    "programs":       how many programs a launch on 3 rows of 1025 in blocks of 1024 starts.
    """
    ### BEGIN SOLUTION
    return {
        "plain": 2 * 128 * 512,
        "gated": 3 * 4096 * 11008,
        "fused_forward": 3,
        "eager_forward": 5,
        "fused_backward": 5,
        "eager_backward": 9,
        "most_gradient": 0.25**5,
        "programs": 3 * 2,
    }
    ### END SOLUTION


# %% check="key_questions" points=1
plain, gated = (key_questions()[key] for key in ("plain", "gated"))
### BEGIN HIDDEN TESTS
checks.number(plain, 131_072, to=0, what="plain", mistakes={"three matrices": 196_608})
checks.number(gated, 135_266_304, to=0, what="gated", mistakes={"two matrices": 90_177_536})
### END HIDDEN TESTS

# %% check="key_questions" points=1
names = ("fused_forward", "eager_forward", "fused_backward", "eager_backward")
moved = {key: key_questions()[key] for key in names}
### BEGIN HIDDEN TESTS
for key, expected in zip(names, (3, 5, 5, 9), strict=True):
    checks.number(
        moved[key],
        expected,
        to=0,
        what=key,
        hint="Go through the kernels one by one: what does each read, what does each write?",
    )
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = key_questions()["most_gradient"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    4.0**-5,
    what="most_gradient",
    mistakes={"a slope of a half": 0.5**5, "adding where factors multiply": 1.25},
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
answer = key_questions()["programs"]
### BEGIN HIDDEN TESTS
checks.number(answer, 6, to=0, what="programs", mistakes={"leaving out the last block": 3})
### END HIDDEN TESTS

# %% [markdown]
# **In your own words.** Why can a dead ReLU unit in the *first* layer of a trained network never
# come back, and why may one in the *second* layer? And: large language models are pretrained almost
# without dropout. Why did it matter for the networks of 2014, and why less for these?

# %% [markdown] answer="dead-and-dropout"
# A unit's parameters move by its gradient, and that has the factor $\mathrm{ReLU}' = 0$ on every
# picture. In the first layer nothing else can help: the inputs are the pictures, and they do not
# change. In the second layer the inputs are the first layer's units, which still learn, so that
# they may one day push the unit's sum above zero. (With weight decay or momentum, parameters move
# without a gradient, too.)
#
# Dropout fights learning by heart, which takes many passes over the same few examples, as networks
# of 2014 made over 60,000 digits. A language model sees nearly every document once or a few times
# and has fewer parameters than tokens: it underfits rather than overfits, and noise on its units
# only slows it down. Where data is scarce, in finetuning (lesson 25), dropout is still used.

# %% [markdown]
# **And one more.** `torch.compile` finds the fusion of this lesson by itself. When would you still
# write the kernel by hand?

# %% [markdown] answer="why-by-hand"
# Where the compiler does not see the whole or may not change the algorithm: it will not compute
# again in the backward pass what it was told to keep (unless asked), it does not turn a softmax
# into an online softmax (lessons 05 and 29), and it does not read through a block table (lesson
# 30). For a chain of element-wise steps like this one there is little left to win, since both are
# at the speed of a copy; writing it is how one learns to.

# %% [markdown]
# ## References
#
# - **Hendrycks & Gimpel 2016**, Gaussian error linear units (GELUs), arXiv:1606.08415. Section 2:
#   the stochastic mask, the tanh form, and SiLU in passing.
# - **Ramachandran, Zoph & Le 2017**, Searching for activation functions, arXiv:1710.05941. Section
#   2 how the search was made; section 4 why a dip below zero may help.
# - **Shazeer 2020**, GLU variants improve Transformer, arXiv:2002.05202. Four pages; the tables and
#   the last sentence.
# - **Dauphin, Fan, Auli & Grangier 2016**, Language modeling with gated convolutional networks,
#   arXiv:1612.08083. Section 3: the gradient of a GLU has a path without saturation.
# - **Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov 2014**, Dropout: a simple way to
#   prevent neural networks from overfitting, JMLR 15. Sections 2 and 7.
# - **Glorot, Bordes & Bengio 2011**, Deep sparse rectifier neural networks, AISTATS. Why ReLU took
#   over.
# - In production: `huggingface/transformers` (`models/llama/modeling_llama.py`, `LlamaMLP`),
#   `linkedin/Liger-Kernel` (`ops/swiglu.py`, the same two kernels), `vllm-project/vllm`
#   (`silu_and_mul`, on the two halves of one projection); Triton's tutorials 01 (vector addition)
#   and 02 (fused softmax).
