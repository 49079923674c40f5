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
#       LayerNorm, RMSNorm, BatchNorm and QK-Norm, the two ways to wire a norm into a residual
#       network, and RMSNorm as Triton kernels, forward and backward.
#     gpu: >-
#       The RMSNorm kernels at full size: bandwidth beside a plain copy, F.rms_norm and
#       torch.compile.
# ---

# %% [markdown]
# ## Core ideas
#
# A deep network is a long chain of maps. Let each of them lengthen its input by a tenth: after a
# hundred layers the numbers are $1.1^{100} \approx 14{,}000$ times as large. Let each shorten it by
# a tenth, and $0.00003$ is left. Gradients go back through the same chain and meet the same
# factors. No learning rate suits a layer whose gradient is a million times that of its neighbor.
#
# Careful initial weights hold the scale at the first step only; training then moves them.
# **Normalization** puts the scale back at every step, by computation: measure how large a group of
# numbers is, and divide by that. The measured factor is part of the graph, so the gradient knows
# about it.
#
# What the members of this family differ in is the group over which they measure. Activations come
# as rows, one token (or example) a row, one feature a column, shape $(N, D)$:
#
# | | measured over | removes the mean | needs the rest of the batch |
# |---|---|---|---|
# | **BatchNorm** | a column: one feature, all examples | yes | yes |
# | **LayerNorm** | a row: one token, all features | yes | no |
# | **RMSNorm** | a row | no | no |
# | **QK-Norm** | a piece of a row: one attention head's query or key | as RMSNorm | no |
#
# A language model generates one token at a time for one user: nothing may depend on the rest of a
# batch. That leaves the rows. You will write all four, derive the backward pass, find out where in
# a residual network the norm belongs, and end with the kernels that a model of today runs twice in
# every layer.

# %%
import math

import torch
import torch.nn.functional as F
from llm40 import checks, profile
from llm40.kernels import tl, triton
from torch import Tensor, nn

# %% [markdown]
# ## Over the features of one token
#
# Take one token's features $x \in \mathbb R^D$. **LayerNorm** (Ba et al. 2016) computes their mean
# and variance,
#
# $$\mu = \frac1D\sum_{i=1}^D x_i, \qquad \sigma^2 = \frac1D\sum_{i=1}^D (x_i - \mu)^2, \qquad
# y = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \odot w + b ,$$
#
# with a learned **gain** $w$ and **bias** $b$, both $(D,)$, which start at 1 and 0 and give back
# what the division may have taken away. The variance divides by $D$, not $D-1$: these are not
# samples from which to guess something, they are all the features there are.
#
# Three details decide whether an implementation survives contact with real numbers.
#
# - **ε is inside the root.** It keeps a row of equal features, $\sigma = 0$, from dividing by zero,
#   and the root from having an infinite slope there. At $\sigma = 1$ nobody sees where it stands.
#   At $\sigma = 10^{-3}$ and $\varepsilon = 10^{-6}$ the two terms are equal: the output shrinks by
#   $\sqrt 2$. With $\sigma + \varepsilon$ in the denominator it would shrink by a thousandth. A
#   model trained with one and run with the other is a different model.
# - **Half precision does not hold squares.** float16 ends at 65,504, so the square of 256 is
#   already infinite. Compute in float32, and round once, at the end.
# - **Subtract first, then square.** $\sigma^2 = \overline{x^2} - \mu^2$ is the same formula on
#   paper. With $\mu = 1000$ and $\sigma = 1$ it takes the difference of two numbers near $10^6$,
#   each rounded to about $0.06$ in float32, to find a 1.
#
# ### Exercise · LayerNorm


# %% exercise="layer_norm" minutes=10 difficulty=1
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias, with mean and variance over the last axis.

    x: (..., D), any floating format and any strides. weight, bias: (D,) or None, which stands for 1
    and for 0. Returns (..., D) in x's dtype. float16 and bfloat16 are computed in float32; float64
    stays float64. x is not changed, and gradients flow through mean and variance. The variance is
    a mean: it divides by D, not by D − 1. Without PyTorch's own layer norm.
    """
    ### BEGIN SOLUTION
    wide = x if x.dtype == torch.float64 else x.float()
    centered = wide - wide.mean(dim=-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: shapes</summary>
#
# Statistics keep their axis, with size 1 (<code>keepdim=True</code>), so that they broadcast
# against x.
# </details>
# <details><summary>Hint: a variance that is a little too large</summary>
#
# <code>torch.var</code> divides by D − 1 unless you say <code>correction=0</code>.
# </details>

# %% check="layer_norm" points=2
# Mean 2.5, variance 1.25.
x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=profile.device)
centered = x.double() - 2.5
checks.close(
    layer_norm(x),
    centered / math.sqrt(1.25 + 1e-5),
    what="layer_norm of (1, 2, 3, 4)",
    mistakes={
        "dividing by D − 1": centered / math.sqrt(5 / 3 + 1e-5),
        "keeping the mean": x.double() / math.sqrt(7.5 + 1e-5),
        "removing the mean, but dividing by the root mean square of x": centered
        / math.sqrt(7.5 + 1e-5),
    },
)
small = 1e-3 * x
checks.close(
    layer_norm(small),
    1e-3 * centered / math.sqrt(1.25e-6 + 1e-5),
    what="layer_norm of the same, a thousandth of the size",
    mistakes={
        "eps outside the root": 1e-3 * centered / (math.sqrt(1.25e-6) + 1e-5),
        "leaving eps out": centered / math.sqrt(1.25),
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(1)
for shape, scale, eps in [
    ((5,), 1.0, 1e-5),
    ((2, 3, 7), 3.0, 1e-5),
    ((4, 1), 1.0, 1e-5),
    ((1, 1, 33), 1e-3, 1e-6),
    ((3, 50), 1e-3, 1e-5),
    ((3, 50), 1e4, 1e-3),
]:
    x = checks.randn(*shape, generator=gen, scale=scale)
    weight, bias = (checks.randn(shape[-1], generator=gen) for _ in range(2))
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        with (
            checks.unchanged(x=x, weight=weight, bias=bias),
            checks.forbidden("layer_norm", "group_norm", "batch_norm", "instance_norm"),
        ):
            y = layer_norm(x, w, b, eps)
        exact = F.layer_norm(
            x.double(), shape[-1:], *(None if t is None else t.double() for t in (w, b)), eps
        )
        checks.close(
            y,
            exact,
            dtype=torch.float32,
            what="layer_norm",
            hint=f"Shape {shape}, scale {scale:g}, eps {eps:g}.",
        )
x = checks.randn(6, 4, 10, generator=gen, dtype=torch.float64).transpose(0, 2)[::2]
checks.close(
    layer_norm(x),
    F.layer_norm(x, x.shape[-1:]),
    dtype=torch.float64,
    what="layer_norm of a float64 view that is not contiguous",
)
parameters = checks.randn(2, 70, generator=gen)
checks.keeps_dtype(
    layer_norm,
    checks.randn(5, 70, generator=gen, scale=3.0),
    *parameters,
    reference=lambda x, w, b: F.layer_norm(x, (70,), w, b),
    what="layer_norm",
)
x = checks.randn(20, 70, generator=gen, scale=3.0)
for dtype, limit in ((torch.float16, 2e-4), (torch.bfloat16, 1.5e-3)):
    half = x.to(dtype)
    y = layer_norm(half, *parameters)
    assert y.dtype == dtype, f"{dtype} with a float32 weight and bias gave {y.dtype}."
    checks.relative_l2(
        y,
        F.layer_norm(half.double(), (70,), *parameters.double()).to(dtype),
        limit,
        what=f"layer_norm of {dtype} with a float32 weight and bias",
        hint="Everything is computed in float32 and rounded once, at the end.",
    )
checks.gradients(
    layer_norm,
    lambda x, w, b: F.layer_norm(x, (9,), w, b),
    checks.randn(2, 3, 9, generator=gen),
    checks.randn(9, generator=gen),
    checks.randn(9, generator=gen),
    names=["x", "weight", "bias"],
    mistakes={
        "a detached mean": lambda x, w, b: (
            (x - x.mean(-1, keepdim=True).detach())
            / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            * w
            + b
        )
    },
)
### END HIDDEN TESTS

# %% check="layer_norm" points=1
# Squares of 300 are beyond float16.
x = torch.tensor([[300.0, -300.0, 300.0, -300.0]], dtype=torch.float16, device=profile.device)
checks.close(
    layer_norm(x),
    [[1.0, -1.0, 1.0, -1.0]],
    dtype=torch.float16,
    what="layer_norm of ±300 in float16",
    hint="Compute in float32, return x's dtype.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(2)
for scale in (1e-2, 1.0, 500.0):
    x = checks.randn(5, 70, generator=gen, scale=scale, dtype=torch.float16)
    weight = checks.randn(70, generator=gen, dtype=torch.float16)
    y = layer_norm(x, weight)
    checks.close(
        y,
        F.layer_norm(x.double(), (70,), weight.double()),
        dtype=torch.float16,
        what=f"layer_norm in float16, scale {scale:g}",
    )
x = 1000 + checks.randn(40, 64, generator=gen)
checks.close(
    layer_norm(x),
    F.layer_norm(x.double(), (64,)),
    rtol=1e-3,
    what="layer_norm of features near 1000",
    hint="The mean of squares minus the square of the mean loses all digits here: subtract first, "
    "then square.",
)
### END HIDDEN TESTS

# %% [markdown]
# **RMSNorm** (Zhang and Sennrich 2019) leaves the mean alone and divides by the **root mean
# square**:
#
# $$\mathrm{rms}(x) = \sqrt{\frac1D\sum_i x_i^2 + \varepsilon}, \qquad y = \frac{x}{\mathrm{rms}(x)} \odot w .$$
#
# One statistic in place of two, one learned vector in place of two. After the division,
# $\lVert y\rVert = \sqrt D$ (for $w = 1$ and negligible $\varepsilon$): RMSNorm keeps the direction
# of $x$ and sets its length. Every LLaMA, Qwen, Mistral, Gemma and DeepSeek language model uses it.
#
# ### Exercise · RMSNorm


# %% exercise="rms_norm" minutes=5 difficulty=1
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / √(mean of x² + eps) · weight, over the last axis.

    x: (..., D), any floating format and any strides. weight: (D,), or None for 1. Returns (..., D)
    in x's dtype. float16 and bfloat16 are computed in float32; float64 stays float64. A row of
    zeros gives zeros (where eps > 0). x is not changed. Without PyTorch's own RMS or layer norm.
    """
    ### BEGIN SOLUTION
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: half as much as before</summary>
#
# It is your layer_norm without the subtraction and without the bias. The mean square is not the
# square of the mean: square first.
# </details>

# %% check="rms_norm" points=2
# Mean of squares 12.5.
x = torch.tensor([[3.0, -4.0]], device=profile.device)
checks.close(
    rms_norm(x),
    x.double() / math.sqrt(12.5),
    what="rms_norm of (3, −4)",
    mistakes={
        "dividing by the length, not by the root mean square": x / 5,
        "dividing by the standard deviation": x / 3.5,
        "a LayerNorm": torch.tensor([[1.0, -1.0]]),
    },
)
small = 1e-3 * x / math.sqrt(12.5)
checks.close(
    rms_norm(small),
    1e3 * small / math.sqrt(2),
    what="rms_norm of a row whose root mean square is 0.001, with eps = 1e-6",
    mistakes={"eps outside the root": 1e3 * small / 1.001, "leaving eps out": 1e3 * small},
)
### BEGIN HIDDEN TESTS
gen = checks.generator(3)
for shape, scale, eps in [
    ((5,), 1.0, 1e-6),
    ((2, 3, 7), 3.0, 1e-5),
    ((4, 1), 1.0, 1e-6),
    ((1, 1, 33), 1e-3, 1e-6),
    ((3, 50), 1e4, 1e-2),
]:
    x, weight = (
        checks.randn(*shape, generator=gen, scale=scale),
        checks.randn(shape[-1], generator=gen),
    )
    for w in (weight, None):
        with checks.unchanged(x=x, weight=weight), checks.forbidden("rms_norm", "layer_norm"):
            y = rms_norm(x, w, eps)
        exact = F.rms_norm(x.double(), shape[-1:], None if w is None else w.double(), eps)
        checks.close(
            y,
            exact,
            dtype=torch.float32,
            what="rms_norm",
            hint=f"Shape {shape}, scale {scale:g}, eps {eps:g}.",
        )
x = checks.randn(6, 4, 10, generator=gen, dtype=torch.float64).transpose(0, 2)[::2]
checks.close(
    rms_norm(x),
    F.rms_norm(x, x.shape[-1:], eps=1e-6),
    dtype=torch.float64,
    what="rms_norm of a float64 view that is not contiguous",
)
weight = checks.randn(70, generator=gen)
checks.keeps_dtype(
    rms_norm,
    checks.randn(5, 70, generator=gen, scale=3.0),
    weight,
    reference=lambda x, w: F.rms_norm(x, (70,), w, 1e-6),
    what="rms_norm",
)
x = checks.randn(20, 70, generator=gen, scale=3.0)
for dtype, limit in ((torch.float16, 2e-4), (torch.bfloat16, 1.5e-3)):
    half = x.to(dtype)
    for w in (weight, weight.to(dtype)):
        y = rms_norm(half, w)
        assert y.dtype == dtype, f"{dtype} with a weight of {w.dtype} gave {y.dtype}."
        checks.relative_l2(
            y,
            F.rms_norm(half.double(), (70,), w.double(), 1e-6).to(dtype),
            limit,
            what=f"rms_norm of {dtype} with a weight of {w.dtype}",
            hint="The gain is multiplied in float32, and the product is rounded once.",
        )
checks.gradients(
    rms_norm,
    lambda x, w: F.rms_norm(x, (9,), w, 1e-6),
    checks.randn(2, 3, 9, generator=gen),
    checks.randn(9, generator=gen),
    names=["x", "weight"],
)
### END HIDDEN TESTS

# %% check="rms_norm" points=1
x = torch.tensor(
    [[300.0, -300.0, 300.0, -300.0], [0.0] * 4], dtype=torch.float16, device=profile.device
)
checks.close(
    rms_norm(x),
    [[1.0, -1.0, 1.0, -1.0], [0.0] * 4],
    dtype=torch.float16,
    what="rms_norm of ±300 and of zeros, in float16",
    hint="Compute in float32, return x's dtype.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(4)
for scale in (1e-2, 1.0, 500.0):
    x, weight = (
        checks.randn(5, 70, generator=gen, scale=scale, dtype=torch.float16),
        checks.randn(70, generator=gen, dtype=torch.float16),
    )
    checks.close(
        rms_norm(x, weight),
        F.rms_norm(x.double(), (70,), weight.double(), 1e-6),
        dtype=torch.float16,
        what=f"rms_norm in float16, scale {scale:g}",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### What a norm cannot see
#
# A photograph shows what each of them throws away. Cut it into patches of 8 × 8 pixels; the 192
# color values of a patch are one row $x$. A shadow multiplies a row by a constant; haze *also adds*
# a constant to all its values. For negligible $\varepsilon$,
#
# $$\mathrm{RMSNorm}(a x) = \mathrm{RMSNorm}(x), \qquad \mathrm{LayerNorm}(a x + c\,\mathbf 1) = \mathrm{LayerNorm}(x),$$
#
# for $a > 0$ and any $c$, where $\mathbf 1 = (1, \dots, 1)$. The first forgets contrast, the second
# contrast and brightness.
# Before you run the cell: at which of the two lines drawn into the photograph will each norm still
# show a border?

# %% tags=["experiment"]
import matplotlib.pyplot as plt
from llm40 import data, plot

photo = data.pictures()["china"][:, :424, :].to(profile.device)
photo[:, :, 216:432] *= 0.4  # a shadow over the middle
photo[:, :, 432:] = 0.4 * photo[:, :, 432:] + 0.5  # haze over the right


def by_patches(norm):
    """The norm of every 8 × 8 patch, put back in its place."""
    # (rows, columns, 3, 8, 8)
    patches = photo.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).permute(1, 3, 0, 2, 4)
    normed = norm(patches.flatten(2)).view_as(patches)
    return normed.permute(2, 0, 3, 1, 4).reshape(photo.shape)


# %% tags=["experiment", "figure"]
# Figure: a shadow and haze, as each norm lets them be seen
fig, axes = plt.subplots(1, 3, figsize=(11, 2.9))
for ax, (title, image) in zip(
    axes,
    {
        "the photograph, with shadow and haze": photo,
        "RMSNorm of every patch": 0.45 * by_patches(rms_norm),
        "LayerNorm of every patch": 0.5 + 0.2 * by_patches(layer_norm),
    }.items(),
    strict=True,
):
    ax.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu())
    for x_line in (216, 432):
        ax.axvline(x_line, color="white", linewidth=0.8, linestyle=":")
    ax.set_title(title)
    ax.axis("off")
plot.caption(
    fig,
    "Between the dotted lines lies a shadow, to the right of them haze. RMSNorm cannot see the "
    "shadow, but sees the haze, which flattens every patch; LayerNorm sees neither. It also makes "
    "bold color of the faint unevenness of the sky: once the mean is gone, nothing else is left to "
    "measure by.",
)
plt.show()

# %% [markdown]
# ### Why the mean could be dropped
#
# Subtracting the mean is a projection. With the unit vector $u = \mathbf 1/\sqrt D$, the mean is
# $\mu = (x \cdot u)/\sqrt D$, so $x - \mu\mathbf 1 = x - (x\cdot u)\,u$: LayerNorm removes the
# component of $x$ along one fixed direction, then does what RMSNorm does with the rest. In three
# dimensions RMSNorm lands on a sphere, LayerNorm on a circle of it.
#
# How much is lost in that direction? The share of the squared length is $\mu^2/\overline{x^2}$. A
# direction means nothing to a random vector, and each of the $D$ orthogonal directions gets an
# equal share, on average $1/D$: a third in the picture, a 4,096th in a model. One direction of
# thousands; and if it did disturb, the next weight matrix could learn to ignore it. Nothing speaks
# for paying a second reduction over every row and a second learned vector to remove it, and nothing
# was lost when it went. The right panel measures the share for digits behind a random layer.

# %% tags=["experiment"]
points = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor(
    [1.0, 1.6, 0.7]
)
images, _ = data.digits()
widths = [2**p for p in range(2, 13)]
gen = torch.Generator().manual_seed(2)
shares = []
for width in widths:
    thirty_layers = torch.randn(30, 64, width, generator=gen)
    hidden = images.flatten(1)[:50] @ thirty_layers
    shares.append(float((hidden.mean(-1).square() / hidden.square().mean(-1)).mean()))

# %% tags=["experiment", "figure"]
# Figure: the mean is one direction, and holds 1/D of the squared length
fig = plt.figure(figsize=(11, 3.7))
for place, (title, cloud) in enumerate(
    {"x": points, "on the sphere, on the circle": None}.items(), 1
):
    ax = fig.add_subplot(1, 3, place, projection="3d")
    if cloud is not None:
        ax.scatter(*cloud.T, s=5, color="#555555")
        ax.quiver(-2, -2, -2, 4, 4, 4, color="black", arrow_length_ratio=0.08, linewidth=1)
        ax.text(2.2, 2.2, 2.2, "(1, 1, 1)", fontsize=9)
    else:
        ax.scatter(*rms_norm(points).T, s=4, color=plot.COLORS[5], label="RMSNorm")
        ax.scatter(*layer_norm(points).T, s=4, color="black", label="LayerNorm")
        ax.legend(loc="upper left", fontsize=8)
    ax.set_title(title)
    ax.set_box_aspect((1, 1, 1))
    ax.view_init(elev=15, azim=-25)
    ax.locator_params(nbins=4)
    ax.tick_params(labelsize=7, pad=-2)
ax = fig.add_subplot(1, 3, 3)
plot.curves(
    widths,
    {"measured": shares, "1/D": [1 / w for w in widths]},
    xlabel="width D",
    ylabel="share of the squared length",
    title="what the mean holds",
    logx=True,
    logy=True,
    ax=ax,
)
plot.caption(
    fig,
    "Left: a cloud of points and the direction of the mean. Middle: RMSNorm keeps the direction of "
    "every point, LayerNorm first removes the component along (1, 1, 1), which leaves a circle. "
    "Right: the share of the squared length that LayerNorm removes, for real digits behind random "
    "layers, falls as 1/D.",
)
plt.show()

# %% [markdown]
# ## Over the batch
#
# **BatchNorm** (Ioffe and Szegedy 2015) came first, and normalizes columns: each feature over the
# examples of the batch. That makes two functions of one layer. In training it uses the batch's own
# mean and variance; for later use it keeps **running** estimates of both, exponential moving
# averages with **momentum** $\beta$,
#
# $$\hat\mu \leftarrow (1-\beta)\,\hat\mu + \beta\,\mu_{\text{batch}}, \qquad
# \hat\sigma^2 \leftarrow (1-\beta)\,\hat\sigma^2 + \beta\,\frac{n}{n-1}\,\sigma^2_{\text{batch}},$$
#
# and in evaluation it uses those. The factor $n/(n-1)$ is there because a batch's variance is taken
# around the batch's own mean, which lies closer to its examples than the true one: on average it is
# too small by $(n-1)/n$. Normalizing the batch itself needs no such correction, guessing the
# population does. So one forward pass uses *both* variances: divide by $n$ to normalize, by $n-1$
# to remember.
#
# ### Exercise · BatchNorm


# %% exercise="batch_norm" minutes=20 difficulty=2
class BatchNorm1d(nn.Module):
    """Batch normalization of (N, D): each feature over the N examples, then weight and bias.

    Training: the batch's mean and (biased) variance, with eps inside the root; running_mean and
    running_var move by `momentum` toward the batch's mean and *unbiased* variance, once per call. A
    single example has no variance: ValueError, and nothing moves.
    Evaluation: the running estimates, which stay as they are; N may be 1.
    Returns (N, D). x is not changed. Without PyTorch's own batch or instance norm.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        if self.training:
            n = len(x)
            if n < 2:
                raise ValueError(
                    "one example has no variance: train with batches of two and more, or call "
                    "eval() first"
                )
            mean, variance = x.mean(dim=0), x.var(dim=0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the running estimates are no part of the graph</summary>
#
# They remember, they do not learn: update them under `torch.no_grad()`, in place (`lerp_` is one
# way), or each step would drag all earlier graphs along. The batch's own statistics are part of the
# graph.
# </details>

# %% check="batch_norm" points=2
# One feature, two examples: mean 2, variance 1 (divided by n) or 2 (by n − 1).
norm = BatchNorm1d(1).to(profile.device)
x = torch.tensor([[1.0], [3.0]], device=profile.device)
checks.close(
    norm(x),
    [[-1.0], [1.0]],
    rtol=1e-4,
    what="BatchNorm1d of the batch (1, 3)",
    mistakes={
        "normalizing by the unbiased variance": [[-0.70711], [0.70711]],
        "normalizing rows, not columns": [[0.0], [0.0]],
    },
)
checks.close(
    norm.running_mean,
    [0.2],
    what="running_mean after one batch, from 0 with momentum 0.1",
    mistakes={"the weights of old and new exchanged": [1.8]},
)
checks.close(
    norm.running_var,
    [0.9 + 0.1 * 2],
    what="running_var after one batch, from 1 with momentum 0.1",
    mistakes={
        "remembering the biased variance": [1.0],
        "the weights of old and new exchanged": [1.9],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(5)
for features, sizes, momentum, eps in [
    (7, (5, 2, 9), 0.1, 1e-5),
    (1, (3, 8), 0.3, 1e-3),
    (4, (6, 6, 6, 6), 0.01, 1e-5),
]:
    # In float64: two examples that happen to lie close together leave few digits in float32.
    mine = BatchNorm1d(features, eps=eps, momentum=momentum).double().to(profile.device)
    peer = nn.BatchNorm1d(
        features, eps=eps, momentum=momentum, dtype=torch.float64, device=profile.device
    )
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(mine, name).copy_(checks.randn(features, generator=gen))
            getattr(peer, name).copy_(getattr(mine, name))
    for n in sizes:
        x = (3 * checks.randn(n, features, generator=gen, dtype=torch.float64) + 2).requires_grad_()
        exact = x.detach().clone().requires_grad_()
        with checks.unchanged(x=x), checks.forbidden("batch_norm", "instance_norm"):
            y = mine(x)
        expected = peer(exact)
        what = f"of a batch of {n} with {features} features"
        checks.close(y, expected, rtol=1e-7, what=f"BatchNorm1d {what}")
        for name in ("running_mean", "running_var"):
            checks.close(
                getattr(mine, name),
                getattr(peer, name),
                rtol=1e-7,
                what=f"{name} after a batch of {n}",
            )
        cotangent = checks.randn(n, features, generator=gen, dtype=torch.float64)
        actual = torch.autograd.grad(y, (x, mine.weight, mine.bias), cotangent)
        wanted = torch.autograd.grad(expected, (exact, peer.weight, peer.bias), cotangent)
        for name, a, e in zip(("x", "weight", "bias"), actual, wanted, strict=True):
            checks.close(
                a,
                e,
                rtol=1e-6,
                what=f"the gradient of {name}, {what}",
                hint="The batch's mean and variance depend on x too.",
            )
### END HIDDEN TESTS

# %% check="batch_norm" points=1
norm = BatchNorm1d(2).to(profile.device).eval()
x = torch.tensor([[1.0, -3.0]], device=profile.device)
checks.close(
    norm(x),
    x / math.sqrt(1 + 1e-5),
    what="one example in evaluation, with running estimates 0 and 1",
)
checks.raises(ValueError, norm.train(), x, because="In training, one example has no variance.")
### BEGIN HIDDEN TESTS
gen = checks.generator(6)
norm = BatchNorm1d(3).to(profile.device)
norm((2 * checks.randn(8, 3, generator=gen) + 1).requires_grad_())
for name in ("running_mean", "running_var"):
    assert not getattr(norm, name).requires_grad, (
        f"{name} carries a graph: update it under no_grad()."
    )
kept = [norm.running_mean.clone(), norm.running_var.clone()]
checks.raises(
    ValueError,
    norm,
    checks.randn(1, 3, generator=gen),
    because="In training, one example has no variance.",
)
norm.eval()
x = checks.randn(11, 3, generator=gen)
y = norm(x)
exact = (x.double() - kept[0].double()) / (kept[1].double() + 1e-5).sqrt()
checks.close(y, exact, what="evaluation", hint="The running estimates, not the batch's.")
checks.close(norm(x[4:5]), y[4:5], what="an example alone, in evaluation, as in its batch")
checks.close(
    torch.stack([norm.running_mean, norm.running_var]),
    torch.stack(kept),
    rtol=0,
    what="the running estimates after evaluation and after an error",
)
### END HIDDEN TESTS

# %% tags=["experiment"]
gen = torch.Generator().manual_seed(3)
images, _ = data.digits()
hidden = (images.flatten(1) @ torch.randn(64, 64, generator=gen) / 4).to(profile.device)
sizes = [2**p for p in range(1, 10)]
spread = {"BatchNorm": [], "LayerNorm": []}
norm = BatchNorm1d(64).to(profile.device)
for n in sizes:
    draws = {"BatchNorm": [], "LayerNorm": []}
    for _ in range(40):
        company = torch.cat(
            [hidden[:1], hidden[torch.randint(1, len(hidden), (n - 1,), generator=gen)]]
        )
        draws["BatchNorm"].append(norm(company)[0].detach())
        draws["LayerNorm"].append(layer_norm(company)[0])
    for name, rows in draws.items():
        spread[name].append(float(torch.stack(rows).std(dim=0).mean()))

drift = {}
for momentum in (0.5, 0.1, 0.01):
    norm = BatchNorm1d(64, momentum=momentum).to(profile.device)
    drift[f"momentum {momentum}"] = []
    for _ in range(150):
        norm(hidden[torch.randint(len(hidden), (16,), generator=gen)])
        drift[f"momentum {momentum}"].append(
            float((norm.running_mean - hidden.mean(0)).abs().mean())
        )

# %% tags=["experiment", "figure"]
# Figure: BatchNorm: one digit in changing company, and running estimates
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.4))
plot.curves(
    sizes,
    spread,
    xlabel="batch size n",
    ylabel="standard deviation of an output",
    title="one digit, in changing company",
    logx=True,
    ax=axes[0],
)
plot.curves(
    range(150),
    drift,
    xlabel="training step (batches of 16)",
    ylabel="mean |running mean − true mean|",
    title="what evaluation will use",
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: the output of one and the same digit depends on who else is in its batch, the more the "
    "smaller the batch; LayerNorm's does not. Right: running estimates that follow quickly stay "
    "noisy, calm ones arrive late. Training and evaluation compute different functions.",
)
plt.show()

# %% [markdown]
# **What came out.** In training a BatchNorm layer adds noise that depends on the batch, which can
# act as a mild regularizer for images; but a batch of two sequences, a batch spread over many
# machines, or a single user in production break it. LayerNorm and RMSNorm compute the same function
# everywhere.
#
# ## The backward pass of RMSNorm
#
# Training pays for every norm a second time, going back. Autograd would do it with half a dozen
# small operations, each reading and writing the whole tensor; a kernel does it in one, if you know
# the formula.
#
# Write $r = (\overline{x^2} + \varepsilon)^{-1/2}$, so that $y_i = w_i\, r\, x_i$. The factor $r$
# depends on every $x_j$:
#
# $$\frac{\partial r}{\partial x_j}
# = -\tfrac12\bigl(\overline{x^2}+\varepsilon\bigr)^{-3/2}\cdot\frac{2x_j}{D} = -\frac{r^3 x_j}{D},
# \qquad\text{hence}\qquad \frac{\partial y_i}{\partial x_j}
# = w_i\Bigl(r\,\delta_{ij} - \frac{r^3 x_i x_j}{D}\Bigr),$$
#
# with $\delta_{ij} = 1$ for $i = j$, else 0. Multiply by the arriving gradient `dy` and sum over
# $i$. With $g = dy \odot w$ and the normalized row $\hat x = r x$,
#
# $$dx_j = \sum_i dy_i\, w_i\Bigl(r\,\delta_{ij} - \frac{r^3x_ix_j}{D}\Bigr) = r\Bigl(g_j - \hat x_j\cdot\frac1D\sum_i g_i\hat x_i\Bigr).$$
#
# Read it as a projection: from $g$ its component along $\hat x$ is taken away ($\hat x/\sqrt D$ has
# length 1), and the rest is divided by the row's size. Along $x$ itself the output does not change,
# so nothing can be gained there. The gain is shared by all rows, so its gradient is a sum over
# them:
#
# $$dw_j = \sum_{\text{rows}} dy_j\,\hat x_j .$$
#
# ### Exercise · By hand


# %% exercise="rms_norm_backward" minutes=20 difficulty=2
def rms_norm_backward(x: Tensor, w: Tensor, dy: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(dx, dw), the gradients of RMSNorm y = x / √(mean of x² + eps) · w, without autograd.

    x, dy: (..., D), w: (D,); all float32 or all float64, any strides. Returns dx (..., D) and dw
    (D,), in the same format. The inputs are not changed, and no tensor has more elements than x.
    """
    ### BEGIN SOLUTION
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    normed = x * r
    g = dy * w
    dx = r * (g - normed * (g * normed).mean(dim=-1, keepdim=True))
    dw = (dy * normed).sum(dim=tuple(range(x.dim() - 1))) if x.dim() > 1 else dy * normed
    return dx, dw
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: dw of a tensor with several leading axes</summary>
#
# Every axis but the last is summed: bring the product into the shape (rows, D) first,
# <code>reshape(-1, D)</code>.
# </details>

# %% check="rms_norm_backward" points=2
# eps = 0 and a root mean square of 5: r = 1/5, normed = (1.4, 0.2).
x = torch.tensor([[7.0, 1.0]], device=profile.device)
w, dy = (
    torch.tensor([2.0, 1.0], device=profile.device),
    torch.tensor([[1.0, 0.0]], device=profile.device),
)
dx, dw = rms_norm_backward(x, w, dy, eps=0.0)
checks.close(
    dx,
    [[0.2 * (2 - 1.4 * 1.4), -0.2 * 0.2 * 1.4]],
    what="dx",
    hint="r · (g − normed · mean(g · normed)), with g = dy · w.",
    mistakes={
        "treating the root mean square as a constant": [[0.4, 0.0]],
        "summing over the row where the mean belongs": [[0.2 * (2 - 1.4 * 2.8), -0.2 * 0.2 * 2.8]],
        "forgetting the gain w in dx": [[0.2 * (1 - 1.4 * 0.7), -0.2 * 0.2 * 0.7]],
    },
)
checks.close(
    dw,
    [1.4, 0.0],
    what="dw",
    mistakes={
        "dy · x, with x not normalized": [7.0, 0.0],
        "dy alone": [1.0, 0.0],
        "dy · y": [2.8, 0.0],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(7)
for shape, scale, eps in [
    ((6,), 1.0, 1e-6),
    ((3, 1), 1.0, 1e-2),
    ((2, 3, 9), 5.0, 1e-6),
    ((4, 33), 1e-3, 1e-6),
    ((2, 1, 3, 5), 0.1, 1e-3),
]:
    x = checks.randn(*shape, generator=gen, dtype=torch.float64, scale=scale)
    w, dy = (checks.randn(*s, generator=gen, dtype=torch.float64) for s in (shape[-1:], shape))
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(F.rms_norm(leaves[0], shape[-1:], leaves[1], eps), leaves, dy)
    with checks.unchanged(x=x, w=w, dy=dy):
        dx, dw = rms_norm_backward(x, w, dy, eps)
    for name, a, e in (("dx", dx, expected[0]), ("dw", dw, expected[1])):
        checks.close(
            a,
            e,
            dtype=torch.float64,
            what=name,
            hint=f"Shape {shape}, scale {scale:g}, eps {eps:g}.",
        )
x, dy = (checks.randn(7, 4, generator=gen, dtype=torch.float64).T for _ in range(2))
w = checks.randn(7, generator=gen, dtype=torch.float64)
dx, dw = rms_norm_backward(x, w, dy, eps=0.0)
checks.close(
    (dx * x).sum(-1),
    torch.zeros(4, dtype=torch.float64),
    atol=1e-12,
    what="dx · x, row by row, with eps = 0",
    hint="No gradient along x: its length does not matter.",
)
again, _ = rms_norm_backward(10 * x, w, dy, eps=0.0)
checks.close(
    again, dx / 10, what="dx for rows ten times as long", hint="It shrinks with the length."
)
### END HIDDEN TESTS

# %% check="rms_norm_backward" points=1
x, w, dy = torch.ones(2, 3, 4), torch.ones(4), torch.ones(2, 3, 4)
with checks.saved() as kept, checks.allocations() as made:
    dx, dw = rms_norm_backward(x, w, dy)
checks.close(
    dx,
    torch.zeros(2, 3, 4),
    atol=1e-5,
    what="dx of rows of ones with dy = 1",
    hint="dy points along x.",
)
checks.close(dw, 6 * torch.ones(4), what="dw of six rows of ones")
assert not kept.elements, "autograd is at work inside rms_norm_backward: write the formula."
### BEGIN HIDDEN TESTS
gen = checks.generator(8)
x, w, dy = (checks.randn(*shape, generator=gen) for shape in ((3, 11, 40), (40,), (3, 11, 40)))
with (
    checks.allocations() as made,
    checks.forbidden("rms_norm", "rms_norm_backward", because="the formula is what is asked for"),
):
    dx, dw = rms_norm_backward(x, w, dy)
assert made.largest <= x.numel(), (
    f"one of your tensors has {made.largest} elements, x has {x.numel()}: the Jacobian need not "
    f"be formed."
)
leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
expected = torch.autograd.grad(F.rms_norm(leaves[0], (40,), leaves[1], 1e-6), leaves, dy.double())
checks.relative_l2(dx, expected[0], 2e-6, what="dx in float32")
checks.relative_l2(dw, expected[1], 2e-6, what="dw in float32")
### END HIDDEN TESTS

# %% [markdown]
# The projection has a consequence for training. For negligible $\varepsilon$, whatever is only ever
# seen through a norm gets a gradient at right angles to itself, so each plain gradient step makes
# it *longer* (Pythagoras), and the longer it is, the smaller its next gradient:
# $dx \propto 1/\lVert x\rVert$. The effective learning rate anneals itself, and weight decay, which
# shortens, is what holds against it. The cell below lets one point move under $-dx$; the loss
# rewards pointing to the right.

# %% tags=["experiment"]
angles = torch.arange(16) * (2 * math.pi / 16)
grid = torch.cat(
    [radius * torch.stack([angles.cos(), angles.sin()], dim=-1) for radius in (0.8, 1.4, 2.0, 2.6)]
)
target = torch.tensor([1.0, 0.0])
downhill = -rms_norm_backward(grid, torch.ones(2), (-target).expand(len(grid), 2), eps=0.0)[0]

lengths = {}
for rate in (0.1, 0.5, 2.0):
    point, lengths[f"learning rate {rate}"] = torch.tensor([-0.3, 0.1]), []
    for _ in range(60):
        lengths[f"learning rate {rate}"].append(float(point.norm()))
        point = point - rate * rms_norm_backward(point, torch.ones(2), -target, eps=0.0)[0]

# %% tags=["experiment", "figure"]
# Figure: steps along the tangent lead outward: length only grows
fig, axes = plt.subplots(1, 2, figsize=(10.5, 4), width_ratios=[1, 1.25])
axes[0].quiver(
    *grid.T, *downhill.T, angles="xy", scale_units="xy", scale=3, width=0.005, color=plot.COLORS[0]
)
axes[0].add_patch(plt.Circle((0, 0), math.sqrt(2), fill=False, linestyle=":", color="black"))
axes[0].set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xlabel="x₁", ylabel="x₂")
axes[0].set_title("−dx for a loss that wants x to point right")
plot.curves(
    range(60),
    lengths,
    xlabel="gradient step",
    ylabel="length of x",
    title="length only grows",
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: the gradient runs along circles, never toward the center or away from it, and is weaker "
    "farther out; the dotted circle is where RMSNorm puts every point. Right: steps along the "
    "tangent lead outward. The largest learning rate jumps farthest out and then hardly moves.",
)
plt.show()

# %% [markdown]
# ## Queries and keys
#
# Attention (lesson 09) lets a token look at others: its **query** $q \in \mathbb R^{d}$ is compared
# with the **key** $k \in \mathbb R^{d}$ of every token by a dot product, and the softmax of these
# **scores** says how much to look where. All that this exercise needs is that there is one score
# for each query and key, in each of several independent **heads**: `q` $(B, H, n_q, d)$ and `k`
# $(B, H, n_k, d)$ make scores $(B, H, n_q, n_k)$.
#
# A dot product is a cosine times two lengths,
# $q \cdot k = \lVert q\rVert \lVert k\rVert \cos\theta$, and nothing bounds the lengths. In large
# models they grow during training until one weight is 1 and the others 0; such a softmax has no
# gradient, and training breaks down. Dehghani et al. (2023) met this at 8 billion parameters, and
# put a LayerNorm on queries and keys. Henry et al. (2020) had divided them by their lengths, head
# by head, and scaled the product by one learned number. With one for each head this is
#
# $$s_{ij} = \gamma_h\, \frac{q_i}{\lVert q_i\rVert}\cdot\frac{k_j}{\lVert k_j\rVert} = \gamma_h \cos\theta_{ij}, \qquad |s_{ij}| \le |\gamma_h| ,$$
#
# with the learned gain $\gamma_h$ in place of the usual $1/\sqrt d$. Models of today use RMSNorm
# for it, head by head (Qwen3, Gemma 3); OLMo 2 normalizes the whole width, before it is split into
# heads. Head by head it is the same up to constants: an RMSNorm row has the length $\sqrt d$, so
# with unit gains and the scale $1/\sqrt d$ the score is $\sqrt d\cos\theta$: $\gamma = \sqrt d$.
#
# ### Exercise · QK-Norm


# %% exercise="qk_norm" minutes=10 difficulty=2
def qk_norm_attention_scores(q: Tensor, k: Tensor, gain: Tensor) -> Tensor:
    """gain · cos(angle between query and key), for every query and key of every head.

    q: (batch, heads, q_len, head_dim), k: (batch, heads, k_len, head_dim), gain: (heads,) of any
    sign. Returns (batch, heads, q_len, k_len) in q's dtype. Lengths and products are computed in
    float32 for half inputs. A query or key of length 0 has scores 0, not NaN. Inputs are not
    changed.
    """

    ### BEGIN SOLUTION
    def direction(t: Tensor) -> Tensor:
        wide = t if t.dtype == torch.float64 else t.float()
        return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)

    return (gain[:, None, None] * (direction(q) @ direction(k).mT)).to(q.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one gain for each head</summary>
#
# The scores are (batch, heads, q_len, k_len); <code>gain[:, None, None]</code> is (heads, 1, 1) and
# meets the right axis.
# </details>

# %% check="qk_norm" points=2
q = torch.tensor([3.0, 4.0], device=profile.device).view(1, 1, 1, 2)
k = torch.tensor([[10.0, 0.0], [0.0, -0.1], [0.0, 0.0]], device=profile.device).view(1, 1, 3, 2)
checks.close(
    qk_norm_attention_scores(q, k, torch.tensor([5.0], device=profile.device)),
    [[[[3.0, -4.0, 0.0]]]],
    what="the scores of one query and three keys",
    mistakes={
        "normalizing the query only": [[[[30.0, -0.4, 0.0]]]],
        "normalizing the key only": [[[[15.0, -20.0, 0.0]]]],
        "dividing by √head_dim as well": [[[[3 / 2**0.5, -4 / 2**0.5, 0.0]]]],
        "no gain": [[[[0.6, -0.8, 0.0]]]],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(9)
for batch, heads, q_len, k_len, dim in [
    (2, 3, 4, 4, 8),
    (1, 1, 1, 5, 1),
    (3, 2, 2, 7, 5),
    (2, 4, 4, 2, 3),
]:
    q = checks.randn(batch, q_len, heads, dim, generator=gen, scale=30.0).transpose(1, 2)
    k = checks.randn(batch, k_len, heads, dim, generator=gen, scale=0.01).transpose(1, 2)
    gain = checks.randn(heads, generator=gen, scale=4.0)
    with checks.unchanged(q=q, k=k, gain=gain):
        scores = qk_norm_attention_scores(q, k, gain)
    exact = (
        F.normalize(q.double(), dim=-1)
        @ F.normalize(k.double(), dim=-1).mT
        * gain.double().view(1, heads, 1, 1)
    )
    where = f"{batch} batches, {heads} heads, {q_len} queries, {k_len} keys."
    checks.close(
        scores,
        exact,
        dtype=torch.float32,
        what="the scores",
        hint=where,
        mistakes={
            "normalizing over all heads together": (
                F.normalize(q.double().transpose(1, 2).flatten(2), dim=-1)
                .view(batch, q_len, heads, dim)
                .transpose(1, 2)
                @ F.normalize(k.double().transpose(1, 2).flatten(2), dim=-1)
                .view(batch, k_len, heads, dim)
                .transpose(1, 2)
                .mT
            )
            * gain.double().view(1, heads, 1, 1)
        },
    )
    bound = gain.abs().view(1, heads, 1, 1) * (1 + 1e-5)
    assert bool((scores.abs() <= bound).all()), (
        "a score is larger than its head's gain: is every query and key divided by its length?"
    )
checks.gradients(
    qk_norm_attention_scores,
    lambda q, k, g: F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) * g[:, None, None],
    checks.randn(2, 3, 4, 6, generator=gen),
    checks.randn(2, 3, 5, 6, generator=gen),
    checks.randn(3, generator=gen),
    names=["q", "k", "gain"],
    rtol=1e-4,
    atol=1e-5,
)


def cosines(q, k, gain):
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * gain[:, None, None]


q, k = (checks.randn(2, 3, n, 16, generator=gen, scale=20.0) for n in (9, 12))
gain = checks.randn(3, generator=gen, scale=4.0)
checks.keeps_dtype(qk_norm_attention_scores, q, k, gain, reference=cosines, what="the scores")
for dtype, limit in ((torch.float16, 2e-4), (torch.bfloat16, 1.5e-3)):
    half = q.to(dtype), k.to(dtype)
    scores = qk_norm_attention_scores(*half, gain)
    assert scores.dtype == dtype, f"{dtype} with a float32 gain gave {scores.dtype}."
    checks.relative_l2(
        scores,
        cosines(*(t.double() for t in half), gain.double()).to(dtype),
        limit,
        what=f"the scores of {dtype} with a float32 gain",
        hint="Lengths and products are computed in float32 and rounded once.",
    )
### END HIDDEN TESTS

# %% check="qk_norm" points=1
q = torch.full((1, 2, 1, 4), 400.0, dtype=torch.float16, device=profile.device)
scores = qk_norm_attention_scores(
    q, -q, torch.tensor([1.0, 8.0], dtype=torch.float16, device=profile.device)
)
checks.close(
    scores,
    [[[[-1.0]], [[-8.0]]]],
    dtype=torch.float16,
    what="opposite vectors in float16",
    hint="Squares of 400 are beyond float16.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(10)
q, k = (checks.randn(2, 3, n, 16, generator=gen, scale=200.0, dtype=torch.float16) for n in (3, 6))
gain = torch.tensor([1.0, 0.5, 4.0], dtype=torch.float16, device=profile.device)
exact = (
    F.normalize(q.double(), dim=-1)
    @ F.normalize(k.double(), dim=-1).mT
    * gain.double()[:, None, None]
)
checks.close(
    qk_norm_attention_scores(q, k, gain), exact, dtype=torch.float16, what="the scores in float16"
)
q[0, 1, 2] = 0
assert bool((qk_norm_attention_scores(q, k, gain)[0, 1, 2] == 0).all()), (
    "a query of length 0 has scores 0."
)
k[1, 2, 4] = 0
assert bool((qk_norm_attention_scores(q, k, gain)[1, 2, :, 4] == 0).all()), (
    "a key of length 0 has scores 0."
)
### END HIDDEN TESTS

# %% tags=["experiment"]
gen = torch.Generator().manual_seed(4)
q, k = (torch.randn(1, 1, n, 64, generator=gen).to(profile.device) for n in (64, 256))
# √64: what RMSNorm on both and the scale 1/√64 give
gain = torch.tensor([8.0], device=profile.device)
scales = [2 ** (i / 2) for i in range(-2, 9)]
largest, entropy = ({"q · k / √d": [], "QK-Norm, γ = √d": []} for _ in range(2))
for scale in scales:
    for name, scores in (
        ("q · k / √d", scale * q @ (scale * k).mT / 8),
        ("QK-Norm, γ = √d", qk_norm_attention_scores(scale * q, scale * k, gain)),
    ):
        weights = torch.softmax(scores, dim=-1)
        largest[name].append(float(scores.abs().max()))
        entropy[name].append(float(torch.special.entr(weights).sum(-1).mean()))

# %% tags=["experiment", "figure"]
# Figure: scores and entropy as q and k grow, with and without the norm
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.3))
plot.curves(
    scales,
    largest,
    xlabel="size of the entries of q and k",
    ylabel="largest |score|",
    title="scores",
    logx=True,
    logy=True,
    ax=axes[0],
)
plot.curves(
    scales,
    entropy,
    xlabel="size of the entries of q and k",
    ylabel="entropy of the weights (nats)",
    title="how many keys are looked at",
    logx=True,
    ax=axes[1],
)
axes[1].axhline(math.log(256), color="#888888", linewidth=1, linestyle=":")
axes[1].annotate(
    "all 256 keys alike",
    (16, math.log(256) + 0.05),
    fontsize=8,
    ha="right",
    va="bottom",
    color="#555555",
)
plot.caption(
    fig,
    "Without the norm the scores grow with the square of the size, and the softmax over 256 keys "
    "narrows to one of them (entropy 0), where its gradient vanishes. With it, size does not "
    "matter.",
)
plt.show()

# %% [markdown]
# ## Where the norm goes
#
# Since 2015 deep networks have been built from **residual connections**: a layer does not replace
# $x$, it adds to it, $x + f(x)$. The derivative of that is $I + f'$, and the $I$ is a road on which
# gradients travel past every layer without meeting a factor. A norm can stand on that road or
# beside it.
#
# $$\text{Post-Norm (2017):}\quad x_{l+1} = \mathrm{norm}\bigl(x_l + f_l(x_l)\bigr) \qquad\qquad
# \text{Pre-Norm:}\quad x_{l+1} = x_l + f_l\bigl(\mathrm{norm}(x_l)\bigr)$$
#
# **Pre-Norm leaves the road free.** Unrolled, $x_L = x_0 + \sum_l f_l(\cdot)$: the **residual
# stream** is a sum to which every layer contributes. If the contributions have variance 1 and are
# independent, the stream's variance is $1 + L$ and its size grows as $\sqrt{1+L}$; each layer's
# norm divides by that, which damps the gradient of deep layers by $1/\sqrt{l}$, gently. The growing
# stream is normalized once more at the very end.
#
# **Post-Norm puts a division on it.** With $x$ and $f(x)$ of variance 1 and independent, their sum
# has variance 2, and the norm divides by $\sqrt 2$, every time. What the embedding contributed is,
# after $L$ sublayers, $2^{-L/2}$ of its size, or $2^{-L}$ of the squared length: the stream
# forgets. Its size, in return, is 1 everywhere.
#
# ### Exercise · Two blocks


# %% exercise="residual_blocks" minutes=8 difficulty=1
class PreNormBlock(nn.Module):
    """x + sublayer(norm(x)). What follows x in the call is handed on to the sublayer (an attention
    mask, say).
    """

    def __init__(self, norm: nn.Module, sublayer: nn.Module):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., D) → (..., D). norm and sublayer are called once each; x is not changed."""
        ### BEGIN SOLUTION
        return x + self.sublayer(self.norm(x), *args, **kwargs)
        ### END SOLUTION


class PostNormBlock(nn.Module):
    """norm(x + sublayer(x)), as in the Transformer of 2017. What follows x in the call is handed on
    to the sublayer.
    """

    def __init__(self, norm: nn.Module, sublayer: nn.Module):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., D) → (..., D). norm and sublayer are called once each; x is not changed."""
        ### BEGIN SOLUTION
        return self.norm(x + self.sublayer(x, *args, **kwargs))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: arguments that are not yours</summary>
#
# `*args` and `**kwargs` hold whatever followed x in the call. Written the same way in a call, they
# are handed on: `f(x, *args, **kwargs)`.
# </details>


# %% check="residual_blocks" points=1
# A norm that halves and a sublayer that adds (1, 0): every wiring gives another number.
class Halve(nn.Module):
    def forward(self, x):
        return x / 2


class Plus(nn.Module):
    def forward(self, x, amount=1.0):
        return x + torch.tensor([amount, 0.0], dtype=x.dtype, device=x.device)


x = torch.tensor([[4.0, 8.0]], device=profile.device)
with checks.unchanged(x=x):
    y = PreNormBlock(Halve(), Plus())(x)
checks.close(
    y,
    [[7.0, 12.0]],
    what="PreNormBlock: (4, 8) + ((2, 4) + (1, 0))",
    mistakes={
        "norm(x + sublayer(x)), a Post-Norm": [[4.5, 8.0]],
        "x + norm(sublayer(x))": [[6.5, 12.0]],
        "norm(x) + sublayer(norm(x))": [[5.0, 8.0]],
        "no residual connection": [[3.0, 4.0]],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(11)
checks.close(
    PreNormBlock(Halve(), Plus())(x, amount=3.0),
    [[9.0, 12.0]],
    what="PreNormBlock, called with an argument for the sublayer",
)
checks.close(
    PreNormBlock(Halve(), Plus())(x, 3.0),
    [[9.0, 12.0]],
    what="PreNormBlock, called with an argument for the sublayer that has no name",
)
norm, linear = nn.LayerNorm(6).to(profile.device), nn.Linear(6, 6, bias=False).to(profile.device)
with torch.no_grad():
    for t in (norm.weight, norm.bias, linear.weight):
        t.copy_(checks.randn(*t.shape, generator=gen))
x = checks.randn(2, 5, 6, generator=gen, scale=3.0)
block = PreNormBlock(norm, linear)
with checks.unchanged(x=x), checks.kept(block):
    y = block(x)
checks.close(
    y,
    x.double()
    + F.layer_norm(x.double(), (6,), norm.weight.double(), norm.bias.double())
    @ linear.weight.double().T,
    rtol=5e-5,
    what="PreNormBlock with a linear sublayer",
)
with torch.no_grad():
    linear.weight.zero_()
leaf = x.clone().requires_grad_()
y = block(block(block(leaf)))
checks.close(
    y,
    x,
    rtol=0,
    what="three PreNormBlocks whose sublayer gives 0",
    hint="The residual road must be free.",
)
checks.close(
    torch.autograd.grad(y, leaf, 2 * x)[0], 2 * x, rtol=0, what="the gradient through them"
)
calls = []


class Noted(nn.Module):
    """Returns its input itself, and tells that it was called."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        calls.append(self.name)
        return x


with checks.unchanged(x=x):
    y = PreNormBlock(Noted("norm"), Noted("sublayer"))(x)
checks.close(
    y, 2 * x, rtol=0, what="PreNormBlock with a norm and a sublayer that return their input"
)
assert sorted(calls) == ["norm", "sublayer"], (
    f"norm and sublayer are called once each; yours calls {', '.join(calls)}"
)
### END HIDDEN TESTS


# %% check="residual_blocks" points=1
class Halve(nn.Module):
    def forward(self, x):
        return x / 2


class Plus(nn.Module):
    def forward(self, x, amount=1.0):
        return x + torch.tensor([amount, 0.0], dtype=x.dtype, device=x.device)


x = torch.tensor([[4.0, 8.0]], device=profile.device)
with checks.unchanged(x=x):
    y = PostNormBlock(Halve(), Plus())(x)
checks.close(
    y,
    [[4.5, 8.0]],
    what="PostNormBlock: half of (4, 8) + ((4, 8) + (1, 0))",
    mistakes={
        "x + sublayer(norm(x)), a Pre-Norm": [[7.0, 12.0]],
        "x + norm(sublayer(x))": [[6.5, 12.0]],
        "norm(x) + sublayer(x)": [[7.0, 12.0]],
        "no residual connection": [[2.5, 4.0]],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(12)
checks.close(
    PostNormBlock(Halve(), Plus())(x, amount=3.0),
    [[5.5, 8.0]],
    what="PostNormBlock, called with an argument for the sublayer",
)
checks.close(
    PostNormBlock(Halve(), Plus())(x, 3.0),
    [[5.5, 8.0]],
    what="PostNormBlock, called with an argument for the sublayer that has no name",
)
norm, linear = nn.LayerNorm(6).to(profile.device), nn.Linear(6, 6, bias=False).to(profile.device)
with torch.no_grad():
    for t in (norm.weight, norm.bias, linear.weight):
        t.copy_(checks.randn(*t.shape, generator=gen))
x = checks.randn(2, 5, 6, generator=gen, scale=3.0)
with checks.unchanged(x=x):
    y = PostNormBlock(norm, linear)(x)
checks.close(
    y,
    F.layer_norm(
        x.double() @ (torch.eye(6, device=x.device) + linear.weight).double().T,
        (6,),
        norm.weight.double(),
        norm.bias.double(),
    ),
    rtol=5e-5,
    what="PostNormBlock with a linear sublayer",
)
assert y.requires_grad, (
    "no gradient reaches the sublayer's weights: PostNormBlock's result is cut off"
)
calls = []


class Noted(nn.Module):
    """Returns its input itself, and tells that it was called."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        calls.append(self.name)
        return x


with checks.unchanged(x=x):
    y = PostNormBlock(Noted("norm"), Noted("sublayer"))(x)
checks.close(
    y, 2 * x, rtol=0, what="PostNormBlock with a norm and a sublayer that return their input"
)
assert sorted(calls) == ["norm", "sublayer"], (
    f"norm and sublayer are called once each; yours calls {', '.join(calls)}"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: training without warm-up
#
# The recipe of 2017 raised the learning rate slowly over thousands of steps (**warm-up**, lesson
# 06), and Post-Norm models did not train without. Xiong et al. (2020) traced that to large
# gradients near the output at initialization, and showed that Pre-Norm needs no warm-up.
#
# Test it. The model below reads 48 bytes of Python's documentation and predicts each next byte; its
# sublayers alternate between attention (a box for now) and a two-layer network, and Adam runs at a
# constant $3\cdot10^{-3}$. **Write down before you run it:** of Post-Norm with LayerNorm, Post-Norm
# with warm-up, Pre-Norm with LayerNorm and Pre-Norm with RMSNorm, which train at depth 4? Which at
# depth 12? Do the gradients at initialization tell?


# %% tags=["experiment"]
class Attention(nn.Module):
    """Causal attention with two heads, as lesson 09 builds it."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class ByteModel(nn.Module):
    def __init__(self, make_block, make_norm, depth, width, seq):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(seq, width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(make_block(make_norm(width), Attention(width)))
            mlp = nn.Sequential(
                nn.Linear(width, 4 * width, bias=False),
                nn.GELU(),
                nn.Linear(4 * width, width, bias=False),
            )
            self.blocks.append(make_block(make_norm(width), mlp))
        self.last_norm = make_norm(width) if make_block is PreNormBlock else nn.Identity()
        self.head = nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward(self, tokens):
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last_norm(x))


KINDS = {
    "Post-Norm": (PostNormBlock, nn.LayerNorm, 0.0),
    "Post-Norm, warm-up": (PostNormBlock, nn.LayerNorm, 0.2),
    "Pre-Norm": (PreNormBlock, nn.LayerNorm, 0.0),
    "Pre-RMSNorm": (PreNormBlock, nn.RMSNorm, 0.0),
}
text = torch.tensor(list("\n".join(data.documentation().values()).encode()), device=profile.device)
steps, batch, width, seq = profile.pick(cpu=(80, 4, 32, 48), gpu=(600, 32, 128, 128))
starts = torch.randint(
    0, len(text) - seq - 1, (steps, batch, 1), generator=torch.Generator().manual_seed(50)
).to(profile.device)
batches = text[starts + torch.arange(seq + 1, device=profile.device)]


def byte_loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def layer_gradients(model):
    """The gradient norm of every two-layer network's last matrix, from the bottom up."""
    gradients = torch.autograd.grad(
        byte_loss(model, batches[0]), [block.sublayer[2].weight for block in model.blocks[1::2]]
    )
    return [float(g.norm()) for g in gradients]


@torch.no_grad()
def likeness(model):
    """After every layer: the mean cosine between the hidden states of different positions."""
    x, found = model.bytes(batches[0, :, :-1]) + model.places.weight, []
    for block in model.blocks:
        x = block(x)
        rows = F.normalize(x.flatten(0, 1), dim=-1)
        found.append(float(((rows @ rows.T).sum() - len(rows)) / (len(rows) * (len(rows) - 1))))
    return found[1::2]


def train(kind, depth):
    """(losses, gradient norms of every layer at initialization, those of the first layer at every
    step, the trained model).
    """
    make_block, make_norm, warm_up = KINDS[kind]
    torch.manual_seed(0)
    model = ByteModel(make_block, make_norm, depth, width, seq).to(profile.device)
    optimizer = torch.optim.Adam(model.parameters())
    losses, first_layer, at_start = [], [], layer_gradients(model)
    for step, tokens in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 3e-3 * (
            min(1, (step + 1) / (warm_up * steps)) if warm_up else 1
        )
        loss = byte_loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        first_layer.append(model.blocks[1].sublayer[2].weight.grad.norm())
    return torch.stack(losses).cpu(), at_start, torch.stack(first_layer), model


counts = torch.bincount(text, minlength=256).double()
unigram = float(
    torch.special.entr(counts / counts.sum()).sum()
)  # nats a byte for one who knows only how frequent each byte is
runs = {depth: {kind: train(kind, depth) for kind in KINDS} for depth in (4, 12)}

# %% tags=["experiment", "figure"]
# Figure: training without warm-up, at depth 4 and at depth 12
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.5), sharey=True)
for ax, (depth, kinds) in zip(axes, runs.items(), strict=True):
    smooth = {kind: losses.unfold(0, 20, 1).mean(-1) for kind, (losses, *_) in kinds.items()}
    plot.curves(
        range(19, steps),
        smooth,
        xlabel="step",
        ylabel="loss (nats per byte)" if depth == 4 else "",
        title=f"depth {depth}",
        ax=ax,
    )
    ax.axhline(unigram, color="#888888", linewidth=1, linestyle=":")
    ax.annotate(
        "byte frequencies alone", (19, unigram - 0.02), fontsize=8, va="top", color="#555555"
    )
plot.caption(
    fig,
    "Training loss, mean of the last twenty steps, Adam at 0.003. At depth 4 all four learn. At "
    "depth 12 both Post-Norm models stay where knowing how frequent each byte is would put them, "
    "while the two Pre-Norm curves lie on each other.",
)
plt.show()

# %% tags=["experiment", "figure"]
# Figure: gradients by layer and by step, and how alike positions become
fig, axes = plt.subplots(1, 3, figsize=(13, 3.5))
shown = ("Post-Norm", "Pre-Norm", "Pre-RMSNorm")
plot.curves(
    range(1, 13),
    {kind: runs[12][kind][1] for kind in shown},
    xlabel="layer (12 is next to the output)",
    ylabel="gradient norm of a weight matrix",
    title="at initialization, by layer",
    logy=True,
    ax=axes[0],
)
axes[0].set_ylim(0.05, 20)
plot.curves(
    range(steps),
    {kind: runs[12][kind][2] for kind in shown},
    xlabel="step",
    ylabel="gradient norm of a weight matrix",
    title="the first layer, during training",
    logy=True,
    ax=axes[1],
)
plot.curves(
    range(1, 13),
    {kind: likeness(runs[12][kind][3]) for kind in shown},
    xlabel="layer",
    ylabel="mean cosine between positions",
    title="likeness of positions, at the end",
    ax=axes[2],
)
plot.caption(
    fig,
    "Depth 12. Left: at initialization no layer stands out; Post-Norm's gradients are up to three "
    "times as large. Middle: within some ten steps what reaches Post-Norm's first layer "
    "falls by orders of magnitude. Right: at the end its last layer has nearly the same hidden "
    "state at every position, whatever stands there.",
)
plt.show()

# %% tags=["experiment"]
trained = runs[12]["Pre-Norm"][3]
with torch.no_grad():
    x = trained.bytes(batches[0, :, :-1]) + trained.places.weight
    for block in trained.blocks:
        x = block(x)
print(
    f"The trained Pre-Norm stream: root mean square {float(x.square().mean().sqrt()):.1f} at the "
    f"end; the mean holds {float((x.mean(-1).square() / x.square().mean(-1)).mean()):.1%} "
    f"of a row's squared length, 1/D = {1 / width:.1%}"
)

# %% [markdown]
# **What came out, and what did not.** At depth 12 Post-Norm fails, as reported: on seven of eight
# seeds tried as you see it here, on the eighth later. The reason usually given, gradients that are
# out of proportion at initialization, hardly shows at this size: in the left panel no layer stands
# out. The damage is done by the first updates. Adam moves every weight by about the learning rate
# however small its gradient. One reading of the right panel: the sublayers soon add the same vector
# to every position, and since each norm halves the share of what was there before, a dozen layers
# later all positions look alike. Then nothing but byte frequencies can be predicted, and no
# gradient that reaches the lower layers says otherwise. Nor did warm-up over a fifth of this short
# run help; it postponed the collapse. The thousands of steps of the real recipe are beyond this
# experiment's budget. And LayerNorm against RMSNorm makes no difference that one could see.

# %% [markdown]
# ## One kernel
#
# RMSNorm does four FLOP for each number it reads. An H200 moves 4.8 TB/s and computes 67 TFLOP/s in
# float32, 14 FLOP for every byte: a norm is nowhere near the arithmetic limit, it costs what moving
# its input and output costs. The best possible time is that of a copy. Your PyTorch function is far
# from it, because each of its operations carries a whole tensor out to memory and back; the next
# cell counts.

# %% tags=["experiment"]
x, weight = torch.ones(64, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
with checks.moved() as work:
    rms_norm(x, weight)
per_number = [(name, size / x.numel()) for name, size in work.steps if size / x.numel() > 0.2]

# %% tags=["experiment", "figure"]
# Figure: bytes moved for each number, by operations and by one kernel
fig, ax = plt.subplots(figsize=(9, 2.3))
for row, pieces in enumerate(([("read x", 2.0), ("write y", 2.0)], per_number)):
    left = 0.0
    for i, (name, size) in enumerate(pieces):
        ax.barh(
            row,
            size,
            left=left,
            color=plot.COLORS[5] if i % 2 else "white",
            edgecolor="black",
            height=0.55,
        )
        if size > 3:
            ax.text(
                left + size / 2,
                row,
                name.replace("to_copy", "cast"),
                ha="center",
                va="center",
                fontsize=8,
            )
        left += size
    ax.text(
        left + 0.3,
        row,
        f"{left:.0f} bytes" if row else "4 bytes: read x, write y",
        va="center",
        fontsize=9,
    )
ax.set_yticks([0, 1], ["one kernel", "your rms_norm,\noperation by operation"])
ax.set(xlabel="bytes moved for each number, bfloat16 in and out", xlim=(0, 1.1 * left))
ax.grid(False, axis="y")
plot.caption(
    fig,
    "Every box is what one operation reads and writes for each element of x. Between the two "
    "casts everything is float32, twice as wide as x.",
)
plt.show()

# %% [markdown]
# A Triton kernel (lesson 03: a grid of **programs**, each with a **block** of numbers and a
# **mask** for those beyond the edge) gives each row to one program. The row is loaded once, stays
# in registers while its mean square is found, and is scaled and stored. A block's size must be a
# power of two, so the launcher takes the next one above $D$, up to 32,768; a row of 5,120 in a
# block of 8,192 leaves 3,072 lanes idle, and those must do no harm:
#
# - they must not **read**: what lies behind a row belongs to someone else. `mask=` with `other=0.0`
#   makes them zeros, which a sum of squares does not notice;
# - they must not **count**: the mean divides by $D$, not by the block;
# - they must not **write**.
#
# Rows need not lie end to end: `x` may be a slice of something wider, so that its rows are `x_row`
# numbers apart, more than `n_cols`. And a tensor of $2^{31}$ numbers is no rarity (half a million
# tokens of 4,096): the row's number times the stride must be computed in 64 bits.
#
# Besides $y$ the kernel stores $r = 1/\mathrm{rms}$, one float32 a row, which the backward pass
# would otherwise have to find again.
#
# ### Exercise · The forward kernel


# %% exercise="rms_norm_kernel" minutes=25 difficulty=3 path="more"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    """One row of y = x · r · w with r = 1 / √(mean of x² + eps); the row's number is the program's,
    and r is stored too.

    x, y: rows of n_cols numbers, x_row and y_row apart (at least n_cols), each row contiguous. w:
    (n_cols,), contiguous. r: (rows,) float32, contiguous. x, w and y may be float32, float16 or
    bfloat16; everything is computed in float32 and rounded once, into y.
    Grid: (rows,). BLOCK: a power of two ≥ n_cols. Nothing outside the row is read or written.
    """
    ### BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row · stride passes 2³¹
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    # The only time the row is read. Lanes beyond it are 0, which adds nothing to the sum.
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the steps</summary>
#
# Program number → offset of the row; columns `tl.arange(0, BLOCK)` and their mask; load and
# convert, `.to(tl.float32)`; `tl.sum`; store r; load w; store y.
# </details>
#
# <details><summary>Hint: 64 bits, and the dtype of y</summary>
#
# `tl.program_id(0).to(tl.int64)`. `tl.store` converts to the type that the pointer points to.
# </details>


# %%
def block_and_warps(n_cols):
    """The block that holds a row, and 32 threads (a warp) for each 512 of its numbers, between 4
    and 32 warps.
    """
    if n_cols > 32768:
        raise ValueError(
            f"rows of {n_cols} numbers do not fit into the registers of one program: at most 32768"
        )
    block = triton.next_power_of_2(n_cols)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 32)}


def triton_rms_norm(x, w, eps=1e-6, y=None, r=None):
    """(y, r) for x (rows, n_cols), whose rows are contiguous, and w (n_cols,): y like x, r (rows,)
    float32.
    """
    rows, n_cols = x.shape
    y = torch.empty_like(x) if y is None else y
    r = torch.empty(rows, dtype=torch.float32, device=x.device) if r is None else r
    rms_norm_kernel[(rows,)](
        x, w, y, r, x.stride(0), y.stride(0), n_cols, eps, **block_and_warps(n_cols)
    )
    return y, r


# %% tags=["support"]
# Support: RMSNorm in float64, and which addresses a kernel may read and write


def exact_rms_norm(x, w, eps=1e-6):
    """(y, r) in float64, by definition."""
    r = (x.double().square().mean(-1) + eps) ** -0.5
    return x.double() * r[:, None] * w.double(), r


def exact_gradients(x, w, dy, eps=1e-6):
    """(r in float32, dx, dw), from autograd in float64."""
    leaves = [x.detach().double().requires_grad_(), w.detach().double().requires_grad_()]
    y = F.rms_norm(leaves[0], x.shape[-1:], leaves[1], eps)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return exact_rms_norm(x, w, eps)[1].float(), *gradients


def check_addresses(seen, read, written):
    """What `checks.traffic` saw lies in these tensors; (tensor, shape, strides) for a layout."""
    if seen is None:  # a GPU
        return
    for verb, found, places in (("read", seen.read, read), ("written", seen.written, written)):
        layouts = [place if isinstance(place, tuple) else (place,) for place in places]
        allowed = set().union(*(checks.addresses(*layout) for layout in layouts))
        outside = set(found) - allowed
        assert not outside, (
            f"{len(outside)} addresses outside the rows are {verb}: every load and store needs its "
            "mask, and a row's number times its stride 64 bits."
        )
        assert allowed <= set(found), f"{len(allowed - set(found))} elements are never {verb}."


# %% check="rms_norm_kernel" points=2
# Two rows of eight: the block is as long as the row.
x = torch.tensor(
    [[1.0, 2, 3, 4, 5, 6, 7, 8], [-1.0, 1, -1, 1, -1, 1, -1, 3]], device=profile.device
)
w = torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2], device=profile.device)
with checks.launches() as launched, checks.guarded_allocations(), checks.compiled():
    y, r = triton_rms_norm(x, w)
exact, exact_r = exact_rms_norm(x, w)
checks.relative_l2(
    y,
    exact,
    2e-6,
    what="y",
    hint="x · r · w, in float32.",
    mistakes={
        "forgetting w": exact / w,
        "dividing by the length, not by the root mean square": exact / math.sqrt(8),
        "dividing by the mean square, without the root": exact * exact_r[:, None],
        "writing the first row's values everywhere": exact[:1].expand(2, 8),
    },
)
checks.relative_l2(
    r,
    exact_r,
    2e-6,
    what="r",
    hint="r = 1 / √(mean of x² + eps), for each row.",
    mistakes={"storing the root mean square itself": 1 / exact_r},
)
assert launched.programs == 2, "two rows are two programs."
### BEGIN HIDDEN TESTS
gen = checks.generator(13)
for rows, n_cols in [(3, 13), (2, 1), (1, 100), (5, 257)]:
    x, w = checks.randn(rows, n_cols, generator=gen, scale=3.0), checks.randn(n_cols, generator=gen)
    with (
        checks.launches() as launched,
        checks.guarded_allocations(),
        checks.unchanged(x=x, w=w),
        checks.forbidden("rms_norm"),
    ):
        y, r = triton_rms_norm(x, w, 1e-12)  # eps has a check of its own
    assert launched.kernels["rms_norm_kernel"] == 1, "the kernel was not launched"
    exact, exact_r = exact_rms_norm(x, w, 1e-12)
    block = triton.next_power_of_2(n_cols)
    by_block = (x.double().square().sum(-1, keepdim=True) / block + 1e-12) ** -0.5
    where = f"{rows} rows of {n_cols}, in a block of {block}."
    checks.relative_l2(
        y,
        exact,
        2e-6,
        what="y",
        hint=where,
        mistakes={
            "dividing the sum of squares by the block, not by the row's length": x.double()
            * by_block
            * w
        },
    )
    checks.relative_l2(
        r, exact_r, 2e-6, what="r", hint=where, mistakes={"dividing by the block": by_block[:, 0]}
    )
### END HIDDEN TESTS

# %% check="rms_norm_kernel" points=2
# Five numbers a row in a block of eight, NaN around everything: whoever reads or writes beyond a
# row meets it.
x = checks.guarded(checks.randn(3, 5, generator=checks.generator(14)), row_pad=2, what="x")
w = checks.guarded(torch.ones(5, device=profile.device), what="w")
y = checks.guarded(torch.zeros(3, 5, device=profile.device), row_pad=4, what="y")
with checks.compiled():
    triton_rms_norm(x.tensor, w.tensor, y=y.tensor)
y.intact()
checks.relative_l2(
    y.tensor,
    exact_rms_norm(x.tensor, w.tensor)[0],
    2e-6,
    what="y for rows that lie apart, with NaN between them",
    hint="Rows of x are x_row apart and those of y are y_row apart; lanes beyond n_cols read and "
    "write nothing.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(15)
for rows, n_cols, x_pad, y_pad in [(4, 9, 23, 0), (3, 33, 0, 31), (2, 65, 70, 1), (3, 16, 5, 9)]:
    x = checks.guarded(checks.randn(rows, n_cols, generator=gen), row_pad=x_pad, what="x")
    w = checks.guarded(checks.randn(n_cols, generator=gen), what="w")
    y = checks.guarded(
        torch.full((rows, n_cols), math.nan, device=profile.device), row_pad=y_pad, what="y"
    )
    r = checks.guarded(torch.full((rows,), math.nan, device=profile.device), what="r")
    with checks.unchanged(x=x.tensor, w=w.tensor), checks.traffic() as seen:
        triton_rms_norm(x.tensor, w.tensor, y=y.tensor, r=r.tensor)
    check_addresses(seen, (x.tensor, w.tensor), (y.tensor, r.tensor))
    for buffer in (x, w, y, r):
        buffer.intact()
    exact, exact_r = exact_rms_norm(x.tensor, w.tensor)
    where = (
        f"{rows} rows of {n_cols}, {x_pad} numbers between the rows of x and {y_pad} between "
        f"those of y."
    )
    checks.relative_l2(y.tensor, exact, 2e-6, what="y", hint=where)
    checks.relative_l2(r.tensor, exact_r, 2e-6, what="r", hint=where)
if profile.interpret:  # rows 2³⁰ numbers apart; no memory is touched
    x, w, y, r = torch.zeros(4, 1)
    with checks.traffic(dry=True) as seen:
        rms_norm_kernel[(4,)](x, w, y, r, 2**30, 2**30, 5, 1e-6, BLOCK=8)
    far = (4, 5), (2**30, 1)
    check_addresses(seen, ((x, *far), (w, (5,), (1,))), ((y, *far), (r, (4,), (1,))))
### END HIDDEN TESTS

# %% check="rms_norm_kernel" points=1
# Rows whose root mean square is 0.001, with eps = 1e-6: the size where it shows where eps stands.
x, w = torch.full((1, 16), 1e-3, device=profile.device), torch.ones(16, device=profile.device)
with checks.guarded_allocations():
    y, _ = triton_rms_norm(x, w)
checks.close(
    y,
    torch.full((1, 16), 1 / math.sqrt(2)),
    what="y of a row of 0.001",
    mistakes={
        "eps outside the root": torch.full((1, 16), 1 / 1.001),
        "leaving eps out": torch.ones(1, 16),
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(16)
for scale, eps in [(1e-3, 1e-6), (1e-3, 1e-5), (1e-5, 1e-6), (0.0, 1e-6), (1e6, 1e-6)]:
    x, w = checks.randn(3, 45, generator=gen, scale=scale), checks.randn(45, generator=gen)
    with checks.guarded_allocations():
        y, r = triton_rms_norm(x, w, eps)
    exact, exact_r = exact_rms_norm(x, w, eps)
    checks.relative_l2(y, exact, 2e-6, what="y", hint=f"Amplitude {scale:g}, eps {eps:g}.")
    checks.relative_l2(r, exact_r, 2e-6, what="r", hint=f"Amplitude {scale:g}, eps {eps:g}.")
# float16: rounded once, and squares of 500 do not overflow.
for scale in (0.1, 500.0):
    x = checks.randn(16, 77, generator=gen, scale=scale, dtype=torch.float16)
    w = checks.randn(77, generator=gen, dtype=torch.float16)
    exact, _ = exact_rms_norm(x, w)
    with checks.guarded_allocations(), checks.compiled():
        y, _ = triton_rms_norm(x, w)
    checks.relative_l2(
        y,
        exact.half(),
        2e-4,
        what="y in float16",
        hint=f"Amplitude {scale:g}: convert to float32 before squaring, and round once, at the "
        f"store.",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### Backward: two outputs that sum in different directions
#
# $dx$ is a row's own affair, like the forward pass. $dw$ sums over *all* rows, and rows belong to
# different programs. Three ways:
#
# 1. **Atomic additions** to one buffer: right, but the order in which programs arrive changes from
#    run to run, float32 sums depend on their order, and so two runs of one training job differ.
#    Also thousands of programs queue for the same addresses.
# 2. **Write $dy \odot \hat x$** out and sum it with a second kernel: one more tensor of the size of
#    $x$ to write and to read.
# 3. **Partial sums.** Start only a few programs, about as many as the GPU has processors. Program
#    $p$ of $P$ takes the rows $p, p + P, p + 2P, \dots$, keeps its own sum of $dy\odot\hat x$ in
#    registers, and writes it at the end as row $p$ of a float32 buffer $(P, D)$. Adding up these
#    $P$ rows is a small job for PyTorch. Same order, same bits, each run; and $w$ is loaded once
#    for a program rather than once for a row.
#
# We take the third.

# %% tags=["experiment", "figure"]
# Figure: eleven rows, three programs, three partial sums
rows, width, programs = 11, 18, 3
owner = torch.arange(rows) % programs
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.9), width_ratios=[1, 1, 1])
for ax, (title, values) in zip(
    axes,
    {
        "rows of dy ⊙ x̂": owner,
        "partial sums (P, D)": torch.arange(programs),
        "dw (D,)": torch.tensor([-1]),
    }.items(),
    strict=True,
):
    for place, p in enumerate(values.tolist()):
        color, hatch = (
            ("#eeeeee", "") if p < 0 else (plot.COLORS[(5, 1, 0)[p]], ("", "//", "..")[p])
        )
        ax.barh(
            place, width, height=0.8, color=color, edgecolor="black", linewidth=0.6, hatch=hatch
        )
        ax.text(
            width / 2,
            place,
            "sum of all" if p < 0 else f"program {p}",
            ha="center",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
        )
    ax.set(ylim=(rows - 0.4, -0.6), xlim=(0, width), xlabel="feature", yticks=range(len(values)))
    ax.set_title(title)
    ax.grid(False)
axes[0].set_ylabel("row")
plot.caption(
    fig,
    "Eleven rows for three programs. Each walks down its rows, adding up in registers; three "
    "partial sums reach memory, and one small sum ends it. The last round is ragged: program 2 has "
    "a row fewer.",
)
plt.show()

# %% [markdown]
# ### Exercise · The backward kernel


# %% exercise="rms_norm_backward_kernel" minutes=30 difficulty=3 path="more"
@triton.jit
def rms_norm_backward_kernel(
    x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr,
    x_row, dy_row, dx_row, partial_row,
    n_rows, n_cols, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of rows p, p + P, p + 2P, … for program p of P, and as row p of `partial` their sum of dy
    · x · r.

    x, dy, dx: n_rows rows of n_cols numbers, x_row, dy_row and dx_row apart, each row contiguous.
    w: (n_cols,), r: (n_rows,) float32 from the forward pass, both contiguous. partial: (P, n_cols)
    float32, rows partial_row apart; a program that has no rows writes zeros.
    dx = r · (g − x̂ · mean(g · x̂)) with g = dy · w and x̂ = x · r. Everything is computed in
    float32. Grid: (P,), any P ≥ 1. BLOCK: a power of two ≥ n_cols. Nothing outside the rows is read
    or written; no atomic operations.
    """
    ### BEGIN SOLUTION
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    # once for all rows of this program
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, n_rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + wide_row)
        normed = x * r
        g = dy * w
        # Masked lanes are 0 in both factors; the mean divides by the row's length, not by the
        # block.
        along = tl.sum(g * normed, axis=0) / n_cols
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the loop</summary>
#
# `for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):` is a loop that Triton compiles.
# Its number is 32 bits wide: `tl.cast(row, tl.int64)` before you multiply by a stride. The sum
# starts as `tl.zeros((BLOCK,), tl.float32)` before it and keeps that type.
# </details>
#
# <details><summary>Hint: more programs than rows</summary>
#
# A program without rows still owns a row of the buffer, and must write its zeros there: leave the
# store outside of the loop.
# </details>


# %%
def triton_rms_norm_backward(x, w, r, dy, programs=None, dx=None, partial=None):
    """(dx, dw) for x, dy (rows, n_cols), whose rows are contiguous; dx like x, dw like w.
    `programs`: how many share the rows.
    """
    rows, n_cols = x.shape
    if programs is None:  # two for each processor: one computes while the other waits for its row
        gpu = None if profile.interpret else torch.cuda.get_device_properties(x.device)
        programs = min(rows, 2 * gpu.multi_processor_count if gpu else 4)
    dx = torch.empty_like(x) if dx is None else dx
    if partial is None:
        partial = torch.empty(programs, n_cols, dtype=torch.float32, device=x.device)
    strides = [t.stride(0) for t in (x, dy, dx, partial)]
    rms_norm_backward_kernel[(programs,)](
        x, w, r, dy, dx, partial, *strides, rows, n_cols, **block_and_warps(n_cols)
    )
    return dx, partial.sum(dim=0).to(w.dtype)


class TritonRMSNorm(torch.autograd.Function):
    """Both kernels behind one function of PyTorch: TritonRMSNorm.apply(x, w, eps) for x (..., D)
    and w (D,).
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, r = triton_rms_norm(rows, w.contiguous(), eps)
        ctx.save_for_backward(rows, w, r)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, w, r = ctx.saved_tensors
        dx, dw = triton_rms_norm_backward(
            rows, w.contiguous(), r, dy.reshape(rows.shape).contiguous()
        )
        return dx.view(dy.shape), dw, None


# %% check="rms_norm_backward_kernel" points=2
# Three rows of eight, shared by two programs: program 0 has rows 0 and 2.
gen = checks.generator(17)
x, dy, w = (
    checks.randn(3, 8, generator=gen),
    checks.randn(3, 8, generator=gen),
    checks.randn(8, generator=gen),
)
r, exact_dx, exact_dw = exact_gradients(x, w, dy)
with checks.launches() as launched, checks.guarded_allocations(), checks.compiled():
    dx, dw = triton_rms_norm_backward(x, w, r, dy, programs=2)
g, normed = (dy * w).double(), x.double() * r[:, None].double()
checks.relative_l2(
    dx,
    exact_dx,
    2e-6,
    what="dx",
    mistakes={
        "treating r as a constant": g * r[:, None],
        "a sum where the mean belongs": r[:, None]
        * (g - normed * (g * normed).sum(-1, keepdim=True)),
        "forgetting w": r[:, None] * (dy - normed * (dy * normed).mean(-1, keepdim=True)),
        "leaving out the outer factor r": exact_dx / r[:, None],
    },
)
shares = dy.double() * normed
checks.relative_l2(
    dw,
    exact_dw,
    2e-6,
    what="dw, the sum of the partial sums",
    mistakes={
        "multiplying by w as well": (shares * w).sum(0),
        "x in place of x · r": (dy * x).double().sum(0),
        "summing dy alone": dy.double().sum(0),
        "keeping only each program's last row": shares[1:].sum(0),
        "keeping only each program's first row": shares[:2].sum(0),
    },
)
assert launched.programs == 2, "two programs were asked for"
### BEGIN HIDDEN TESTS
gen = checks.generator(18)
for rows, n_cols, programs in [(5, 13, 2), (1, 1, 1), (7, 33, 3), (2, 20, 5), (4, 100, 4)]:
    x, dy, w = (
        checks.randn(rows, n_cols, generator=gen, scale=2.0),
        checks.randn(rows, n_cols, generator=gen),
        checks.randn(n_cols, generator=gen),
    )
    r, exact_dx, exact_dw = exact_gradients(x, w, dy, 1e-5)
    with (
        checks.launches() as launched,
        checks.guarded_allocations(),
        checks.unchanged(x=x, dy=dy, w=w, r=r),
        checks.forbidden("rms_norm"),
    ):
        dx, dw = triton_rms_norm_backward(x, w, r, dy, programs=programs)
    assert launched.kernels["rms_norm_backward_kernel"] == 1, "the kernel was not launched"
    where = f"{rows} rows of {n_cols} for {programs} programs."
    g, normed = (dy * w).double(), x.double() * r[:, None].double()
    by_block = (g * normed).sum(-1, keepdim=True) / triton.next_power_of_2(n_cols)
    if n_cols == 1:  # dx is 0 up to eps: judge it by what it is the rest of, r · g
        scale = float((r[:, None] * g).norm())
        assert bool(((dx - exact_dx).abs() <= 1e-5 * scale).all()), (
            f"dx is wrong for rows of one number: {dx.tolist()}"
        )
    else:
        checks.relative_l2(
            dx,
            exact_dx,
            2e-6,
            what="dx",
            hint=where,
            mistakes={
                "dividing by the block, not by the row's length": r[:, None]
                * (g - normed * by_block)
            },
        )
    checks.relative_l2(dw, exact_dw, 2e-6, what="dw", hint=where)
### END HIDDEN TESTS

# %% check="rms_norm_backward_kernel" points=2
# Rows that lie apart, NaN around everything, and a third program that has no row at all.
gen = checks.generator(19)
x, dy = (
    checks.guarded(checks.randn(2, 5, generator=gen), row_pad=pad, what=name)
    for name, pad in (("x", 2), ("dy", 6))
)
w = checks.guarded(checks.randn(5, generator=gen), what="w")
dx = checks.guarded(torch.zeros(2, 5, device=profile.device), row_pad=3, what="dx")
partial = checks.guarded(
    torch.full((3, 5), math.nan, device=profile.device),
    row_pad=7,
    what="the buffer of partial sums",
)
r, exact_dx, exact_dw = exact_gradients(x.tensor, w.tensor, dy.tensor)
with checks.compiled():
    _, dw = triton_rms_norm_backward(
        x.tensor, w.tensor, r, dy.tensor, programs=3, dx=dx.tensor, partial=partial.tensor
    )
dx.intact()
partial.intact()
checks.relative_l2(
    dx.tensor,
    exact_dx,
    2e-6,
    what="dx for rows that lie apart, with NaN between them",
    hint="Every matrix has its own distance between rows.",
)
checks.close(
    partial.tensor[2],
    torch.zeros(5),
    what="the partial sum of a program without rows",
    hint="It writes zeros: the buffer was not cleared for it.",
)
checks.relative_l2(dw, exact_dw, 2e-6, what="dw")
### BEGIN HIDDEN TESTS
gen = checks.generator(20)
for rows, n_cols, programs, pads in [
    (5, 9, 2, (23, 0, 7, 1)),
    (3, 33, 3, (0, 31, 2, 31)),
    (6, 16, 4, (5, 9, 0, 3)),
    (4, 65, 1, (1, 2, 70, 5)),
]:
    x, dy, dx, partial = (
        checks.guarded(checks.randn(n, n_cols, generator=gen), row_pad=pad, what=name)
        for name, n, pad in zip(
            ("x", "dy", "dx", "partial"), (rows, rows, rows, programs), pads, strict=True
        )
    )
    w = checks.guarded(checks.randn(n_cols, generator=gen), what="w")
    r, exact_dx, exact_dw = exact_gradients(x.tensor, w.tensor, dy.tensor)
    r = checks.guarded(r, what="r")
    with (
        checks.unchanged(x=x.tensor, dy=dy.tensor, w=w.tensor, r=r.tensor),
        checks.traffic() as seen,
    ):
        _, dw = triton_rms_norm_backward(
            x.tensor, w.tensor, r.tensor, dy.tensor, programs, dx.tensor, partial.tensor
        )
    check_addresses(seen, (x.tensor, dy.tensor, w.tensor, r.tensor), (dx.tensor, partial.tensor))
    for buffer in (x, dy, dx, partial, w, r):
        buffer.intact()
    where = (
        f"{rows} rows of {n_cols} for {programs} programs; {pads} numbers between the rows of x, "
        f"dy, dx and partial."
    )
    checks.relative_l2(dx.tensor, exact_dx, 2e-6, what="dx", hint=where)
    checks.relative_l2(dw, exact_dw, 2e-6, what="dw", hint=where)
    of_program = torch.stack(
        [(dy.tensor * x.tensor * r.tensor[:, None])[p::programs].sum(0) for p in range(programs)]
    )
    checks.close(
        partial.tensor,
        of_program,
        what="the partial sums",
        hint=f"Program p takes rows p, p + P, …: {where}",
    )
if profile.interpret:  # rows 2³⁰ numbers apart; no memory is touched
    x, w, r, dy, dx, partial = torch.zeros(6, 1)
    with checks.traffic(dry=True) as seen:
        rms_norm_backward_kernel[(3,)](x, w, r, dy, dx, partial, *[2**30] * 4, 4, 5, BLOCK=8)
    far = (4, 5), (2**30, 1)
    check_addresses(
        seen,
        ((x, *far), (dy, *far), (w, (5,), (1,)), (r, (4,), (1,))),
        ((dx, *far), (partial, (3, 5), (2**30, 1))),
    )
### END HIDDEN TESTS

# %% check="rms_norm_backward_kernel" points=1
# Both kernels behind one function of PyTorch.
gen = checks.generator(21)
x, w = (
    checks.randn(2, 3, 11, generator=gen).requires_grad_(),
    checks.randn(11, generator=gen).requires_grad_(),
)
dy = checks.randn(2, 3, 11, generator=gen)
with checks.guarded_allocations():
    dx, dw = torch.autograd.grad(TritonRMSNorm.apply(x, w, 1e-6), (x, w), dy)
_, exact_dx, exact_dw = exact_gradients(x.view(6, 11), w, dy.view(6, 11))
checks.relative_l2(dx.view(6, 11), exact_dx, 2e-6, what="dx of TritonRMSNorm")
checks.relative_l2(dw, exact_dw, 2e-6, what="dw of TritonRMSNorm")
### BEGIN HIDDEN TESTS
for scale in (1e-3, 300.0):
    leaves = [
        checks.randn(9, 77, generator=gen, scale=scale, dtype=torch.float16).requires_grad_(),
        checks.randn(77, generator=gen, dtype=torch.float16).requires_grad_(),
    ]
    dy = checks.randn(9, 77, generator=gen, scale=1e-2 * scale, dtype=torch.float16)
    _, *exact = exact_gradients(*leaves, dy)
    with checks.guarded_allocations(), checks.compiled():
        actual = torch.autograd.grad(TritonRMSNorm.apply(*leaves, 1e-6), leaves, dy)
    for name, a, e, limit in zip(("dx", "dw"), actual, exact, (2e-4, 3e-4), strict=True):
        checks.relative_l2(
            a,
            e.half(),
            limit,
            what=f"{name} in float16",
            hint=f"Amplitude {scale:g}: everything is computed in float32 and rounded once.",
        )
### END HIDDEN TESTS

# %% [markdown]
# ## On the hardware
#
# On a GPU the next cells measure both kernels beside a plain copy of the same size, PyTorch's
# `F.rms_norm`, and `torch.compile` of it. The bar to reach is the copy: forward moves 4 bytes for
# each bfloat16 number, as a copy does, and backward 6 (reads $x$ and $dy$, writes $dx$). On a CPU
# they draw the arithmetic instead, for the numbers of an H200.


# %% tags=["experiment"]
def bandwidth(function, moved):
    """GB/s: median, 20 % and 80 % quantile of the time."""
    milliseconds = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
    return [moved / t / 1e6 for t in milliseconds]


def measure(rows, width):
    """{(name, direction): GB/s} for bfloat16 rows."""
    x, dy, y = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    w = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()  # else the compiled function is told to expect any width
    compiled = torch.compile(lambda x, w: F.rms_norm(x, (width,), w, 1e-6))
    found = {
        ("copy", "forward"): bandwidth(lambda: y.copy_(x), 4 * x.numel()),
        ("this lesson", "forward"): bandwidth(lambda: triton_rms_norm(x, w, y=y), 4 * x.numel()),
        ("F.rms_norm", "forward"): bandwidth(
            lambda: F.rms_norm(x, (width,), w, 1e-6), 4 * x.numel()
        ),
        ("torch.compile", "forward"): bandwidth(lambda: compiled(x, w), 4 * x.numel()),
    }
    leaves = [x.requires_grad_(), w.requires_grad_()]
    found["copy", "backward"] = found["copy", "forward"]
    for name, function in (
        ("this lesson", TritonRMSNorm.apply),
        ("F.rms_norm", lambda x, w, eps: F.rms_norm(x, (width,), w, eps)),
        ("torch.compile", lambda x, w, eps: compiled(x, w)),
    ):
        out = function(x, w, 1e-6)
        found[name, "backward"] = bandwidth(
            lambda out=out: torch.autograd.grad(out, leaves, dy, retain_graph=True), 6 * x.numel()
        )
    return found


if profile.name == "gpu" and not profile.interpret:
    widths = [1024, 2048, 4096, 8192, 16384]
    measured = {width: measure(8192, width) for width in widths}
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton "
        f"{triton.__version__}; bfloat16, 8192 rows; GB/s, median"
    )

# %% tags=["experiment", "figure"]
# Figure: the speed of your kernels on a GPU, or what the bytes alone cost
if profile.name == "gpu" and not profile.interpret:
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    names = ["copy", "this lesson", "F.rms_norm", "torch.compile"]
    for ax, direction in zip(axes, ("forward", "backward"), strict=True):
        plot.curves(
            widths,
            {n: [measured[width][n, direction][0] for width in widths] for n in names},
            bands={
                n: (
                    [measured[width][n, direction][2] for width in widths],
                    [measured[width][n, direction][1] for width in widths],
                )
                for n in names
            },
            xlabel="row length D",
            ylabel="GB/s" if direction == "forward" else "",
            title=direction,
            logx=True,
            ax=ax,
        )
        for width in widths:
            print(
                f"{direction:8} D = {width:5}: "
                + ", ".join(f"{n} {measured[width][n, direction][0]:.0f}" for n in names)
            )
    plot.caption(
        fig,
        "Useful bytes per second, higher is better; the copy is the limit. Band: 20 to 80 percent "
        "quantile.",
    )
else:
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.7))
    plot.roofline(
        {
            "RMSNorm, one kernel": (4 / 4, None),
            "RMSNorm, by operations": (4 / sum(size for _, size in per_number), None),
            "4096³ product": (4096 / 3, None),
        },
        peak=989e12,
        bandwidth=4.8e12,
        title="roofline of an H200, bfloat16",
        ax=axes[0],
    )
    widths = [1024, 2048, 4096, 8192, 16384]
    microseconds = {
        name: [8192 * width * moved / 4.8e12 * 1e6 for width in widths]
        for name, moved in (
            ("your rms_norm, by operations", sum(size for _, size in per_number)),
            ("backward kernel", 6),
            ("forward kernel, or a copy", 4),
        )
    }
    plot.curves(
        widths,
        microseconds,
        xlabel="row length D",
        ylabel="microseconds, at least",
        title="8192 rows, at 4.8 TB/s",
        logx=True,
        logy=True,
        ax=axes[1],
    )
    plot.caption(
        fig,
        "Arithmetic, not a measurement. Left: a norm has 1 FLOP for each byte and lies on the "
        "slope, two orders of magnitude below the ridge; no faster arithmetic would help. Right: "
        "what the bytes alone cost.",
    )
plt.show()

# %% [markdown]
# ## Key questions
#
# ### Exercise · Short answers


# %% exercise="norm_numbers" minutes=10 difficulty=2 kind="questions"
def norm_numbers() -> dict[str, float | str]:
    """A dictionary of seven answers; numbers to 1 percent.

    "saved":      by how many learned numbers is an RMSNorm smaller than a LayerNorm with gain and
                  bias, D = 4096?
    "shift":      which norm of a row, "layer" or "rms", is unchanged when a constant is added to
                  all of its features?
    "small":      the root mean square of RMSNorm's output (gain 1, eps = 1e-6) for a row of root
                  mean square 0.001.
    "qk_bound":   RMSNorm with gain 1 on queries and keys, head_dim 128, scores divided by √128:
                  the largest possible score.
    "stream":     a Pre-Norm stream starts at root mean square 1, and 48 sublayers each add an
                  independent contribution of root mean square 1: its root mean square at the end.
    "post_share": 48 Post-Norm sublayers, each contribution independent and as large as the stream
                  it meets: the share (0 to 1) of the final squared length that comes from the
                  embedding.
    "traffic_us": RMSNorm forward for 8192 rows of 8192 bfloat16 numbers at 4.8 TB/s: microseconds
                  at the least, w and r neglected.
    """
    ### BEGIN SOLUTION
    return {
        "saved": 4096,
        "shift": "layer",
        "small": 1e-3 / math.sqrt(1e-6 + 1e-6),
        "qk_bound": math.sqrt(128),
        "stream": math.sqrt(1 + 48),
        "post_share": 0.5**48,
        "traffic_us": 8192 * 8192 * (2 + 2) / 4.8e12 * 1e6,
    }
    ### END SOLUTION


# %% check="norm_numbers" points=1
answer = norm_numbers()["shift"]
### BEGIN HIDDEN TESTS
checks.kind(answer, str, what="shift")
assert answer == "layer", "shift: one of the two subtracts the mean first."
### END HIDDEN TESTS

# %% check="norm_numbers" points=1
answer = norm_numbers()["saved"]
### BEGIN HIDDEN TESTS
checks.number(answer, 4096, what="saved", hint="LayerNorm has a gain and a bias, RMSNorm a gain.")
### END HIDDEN TESTS

# %% check="norm_numbers" points=1
answer = norm_numbers()["small"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.5**0.5,
    what="small",
    hint="The mean square is 1e-6, and eps is 1e-6 as well.",
    mistakes={"neglecting eps": 1.0, "eps outside the root": 0.999},
)
### END HIDDEN TESTS

# %% check="norm_numbers" points=1
answer = norm_numbers()["qk_bound"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    128**0.5,
    what="qk_bound",
    hint="Both have the length √128 after the norm.",
    mistakes={"not dividing": 128, "vectors of length 1": 0.08839},
)
### END HIDDEN TESTS

# %% check="norm_numbers" points=1
answer = norm_numbers()["stream"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    7,
    what="stream",
    hint="Variances add.",
    mistakes={
        "adding sizes, not variances,": 49,
        "forgetting what was there at the start": 48**0.5,
    },
)
### END HIDDEN TESTS

# %% check="norm_numbers" points=1
answer = norm_numbers()["post_share"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2.0**-48,
    what="post_share",
    hint="Each norm halves the squared length of what was there.",
    mistakes={"the share of the length": 2.0**-24, "Pre-Norm's share": 1 / 49},
)
### END HIDDEN TESTS

# %% check="norm_numbers" points=1
answer = norm_numbers()["traffic_us"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    55.924,
    what="traffic_us",
    hint="Two bytes in and two out for each number.",
    mistakes={"counting only the reads": 27.962, "counting numbers, not bytes": 13.981},
)
### END HIDDEN TESTS

# %% [markdown]
# The others are open; write two or three sentences each.
#
# **1.** Why do language models normalize rows and not columns, although BatchNorm made deep image
# networks trainable?

# %% [markdown] answer="rows-not-columns"
# A row's statistics belong to the token alone: training and generation compute the same function, a
# batch of one works, sequences of different lengths need no care, and a token's output cannot
# depend on other users' text or, through the statistics of later positions, on its own future.
# BatchNorm's running estimates would also have to fit a distribution of tokens that shifts with
# position and text.

# %% [markdown]
# **2.** A row is scaled by 10. What happens to RMSNorm's output, and to the gradient with respect
# to the row? What does that mean for the weights of a layer that stands just before a norm?

# %% [markdown] answer="scale-invariance"
# The output stays (ε aside), the gradient is divided by 10. Weights just before a norm can be
# scaled without changing anything, so their gradient is at right angles to them; plain steps
# lengthen them and longer weights get smaller gradients: the effective learning rate falls by
# itself. Weight decay shortens them again, and the balance of both sets the effective rate.

# %% [markdown]
# **3.** Pre-Norm trains more easily. What is its price, and how do current models pay less of it?

# %% [markdown] answer="price-of-pre-norm"
# The stream grows with depth, so the contribution of a deep layer is small beside what is already
# there, and deep layers tend to change little (one can often remove some). Remedies: down-scaled
# initialization of the output projections, a norm on the sublayer's output as well (Gemma 2 and 3)
# or instead (OLMo 2), or residual branches with learned scales. The extra norm at the end is needed
# because the stream's size is whatever the layers made of it.

# %% [markdown]
# **4.** Why does the backward kernel not add its share of $dw$ into one buffer with atomic
# additions?

# %% [markdown] answer="no-atomics"
# Floating-point addition is not associative and the order of atomic additions is not fixed, so $dw$
# would differ in its last bits between runs, and with it everything trained from there on.
# Thousands of programs would also contend for the same $D$ addresses. Partial sums cost a buffer of
# $P \times D$ float32, some percent of the traffic, and are the same each time.

# %% [markdown]
# ## References
#
# - Ioffe, Szegedy 2015, *Batch Normalization*, arXiv:1502.03167: section 3, and section 3.1 for
#   what inference uses.
# - Ba, Kiros, Hinton 2016, *Layer Normalization*, arXiv:1607.06450: section 5.1, the table of what
#   each norm is invariant to.
# - Zhang, Sennrich 2019, *Root Mean Square Layer Normalization*, arXiv:1910.07467: section 4, why
#   re-scaling and not re-centering matters.
# - Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture*, arXiv:2002.04745:
#   figure 1 and section 3.
# - Henry, Dachapally, Pawar, Chen 2020, *Query-Key Normalization for Transformers*,
#   arXiv:2010.04245: section 2.
# - Dehghani et al. 2023, *Scaling Vision Transformers to 22 Billion Parameters*, arXiv:2302.05442:
#   section 2, QK normalization, and the figure of the diverging run.
# - In production: PyTorch's `torch.nn.RMSNorm` and `torch.nn.functional.rms_norm`;
#   `linkedin/Liger-Kernel` (`src/liger_kernel/ops/rms_norm.py`); `Dao-AILab/flash-attention`
#   (`flash_attn/ops/triton/layer_norm.py`); Hugging Face `transformers`,
#   `models/qwen3/modeling_qwen3.py`, for RMSNorm on queries and keys.
