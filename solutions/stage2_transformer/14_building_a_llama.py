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
#       A whole LLaMA: the model, its weights from anyone's file, a sampler, batched generation with
#       a cache, and a training run that can be interrupted without a trace.
#     gpu: >-
#       LLaMA-160M trained in bfloat16 with torch.compile, with tokens per second and MFU. On a CPU
#       the same section does the arithmetic.
# ---

# %% [markdown]
# ## The problem
#
# You have built the parts: norms, rotary positions, attention with shared heads, gated layers,
# optimizers. A model is not the sum of them. It is the sum and **the agreements between them**:
# that the queries of step 500 are turned by the angle of position 500 and not of position 0, that a
# padded prompt gives the same text as a bare one, that the file of weights you were handed means
# what your code thinks it means, that a run stopped by a power cut ends in the same bits as one
# that was not.
#
# None of these agreements raises an error when it is broken. The model trains, the loss falls, the
# text looks almost right. This lesson assembles a LLaMA from an empty cell and tests every
# agreement as you make it.
#
# ```
#   tokens ─▶ embedding ─▶ [ norm ─ attention ─ + ─ norm ─ SwiGLU ─ + ] × layers ─▶ norm ─┐
#      ▲                             ▲   │                                                ▼
#      │                             └───┘ cache                                         head
#      └── token ◀─ sample ◀─ logits ◀──────────── one token at a time ───────────────────┘
# ```
#
# ## Core ideas
#
# **The architecture is small.** LLaMA (Touvron et al. 2023) is the decoder of 2017 with four
# replacements, each of which you know: **RMSNorm** before each branch in place of LayerNorm after
# it, **rotary positions** inside attention in place of vectors added to the embedding, **SwiGLU**
# in place of ReLU, and, from the larger models of the second generation on, **grouped-query
# attention**. No biases anywhere. The model fits on a page. Most of what was released since,
# Mistral, Qwen, Gemma, differs from it in a few lines.
#
# **A cache is an equation.** A forward pass over $n$ tokens, and one over the first $m$ followed by
# one over the other $n - m$ with the keys and values of the first kept, must give the same logits.
# Position, mask and cache are three counts of the same thing, and generation is right exactly when
# they agree.
#
# **A checkpoint is a state.** Training is a map from one state to the next, $s_{t+1} = f(s_t)$.
# Whatever the map reads belongs to the state: weights, the optimizer's moments, the step that sets
# the learning rate, and the random numbers that choose the next batch. Leave one out and the
# resumed run is another run.
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $d$ | `hidden_size` | width of the residual stream |
# | $F$ | `mlp_size` | inner width of the gated layer |
# | $L$, $V$ | `layers`, `vocab_size` | number of blocks, of tokens in the vocabulary |
# | $H$, $H_{kv}$, $d_h$ | `heads`, `kv_heads`, `head_dim` | query heads, heads of keys and values, width of one: $d_h = d/H$ |
# | $T$ | `seq` | tokens in one sequence |
# | $N$ | | number of parameters |
#
# ## The configuration
#
# Everything that two people must agree on before they can exchange weights, in one frozen object.
# It is given; every later cell reads it.

# %%
import copy
import io
import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from llm40.models import Cache
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    mlp_size: int  # SwiGLU's inner width
    layers: int
    heads: int
    kv_heads: int  # each is shared by heads // kv_heads consecutive query heads
    tied: bool = False  # the embedding's matrix is the head's too
    rope_theta: float = 10_000.0
    eps: float = 1e-5  # inside RMSNorm's root

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.hidden_size} features, {self.heads} heads and {self.kv_heads} key-value "
                f"heads do not fit together"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


# %% [markdown]
# ## RMSNorm
#
# The norm of lesson 04, as a module. For a token's vector $x$ of $d$ features,
#
# $$ y_c = w_c\,\frac{x_c}{\sqrt{\frac1d\sum_{j} x_j^2 + \varepsilon}}, \qquad w \text{ of shape } (d). $$
#
# No mean is subtracted, and $\varepsilon$ stands **inside** the root. With activations of size 1
# nobody notices where it stands; in the first layers of a trained model features have the size of
# the embedding's weights, around 0.02, and $\varepsilon = 10^{-5}$ beside $0.02^2 = 4\cdot10^{-4}$
# is no longer nothing. Squares of float16 numbers beyond 255 overflow, so the mean is taken in
# float32.


# %% exercise="rms_norm" minutes=6 difficulty=1
class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last axis.

    dim: size of that axis. Parameter: `weight` (dim), ones at first; nothing else.
    forward(x): x (…, dim) of any floating format → the same shape and format, whatever the weight's
    format is. Computed in float32 for half-precision inputs (float64 stays float64); the result is
    cast back before or after it is multiplied by the weight, as you like. PyTorch's own rms_norm is
    not allowed here.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * root * self.weight).to(x.dtype)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which format is wide enough?</summary>
#
# `torch.promote_types(x.dtype, torch.float32)` is float32 for both half-precision formats and
# float64 for float64.
# </details>


# %% check="rms_norm" points=1
norm = RMSNorm(2, eps=1.0)
with torch.no_grad():
    norm.weight.copy_(torch.tensor([1.0, 10.0]))
x = torch.tensor([[1.0, 2.0]]) * 2**0.5  # mean square 5, plus eps is 6
root = 6**0.5
with checks.forbidden("rms_norm"):
    y = norm(x)
checks.close(
    y,
    torch.tensor([[1.0, 20.0]]) * 2**0.5 / root,
    what="RMSNorm with eps = 1",
    mistakes={
        "eps outside the root": torch.tensor([[1.0, 20.0]]) * 2**0.5 / (5**0.5 + 1),
        "the sum of squares in place of the mean": torch.tensor([[1.0, 20.0]]) * 2**0.5 / 11**0.5,
        "no weight": torch.tensor([[1.0, 2.0]]) * 2**0.5 / root,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for shape, scale, dtype in [
    ((3, 5, 7), 1.0, torch.float32),
    ((2, 1), 1e-3, torch.float64),
    ((4, 64), 1e-3, torch.float32),
    ((1, 2, 3, 33), 40.0, torch.float64),
]:
    norm = RMSNorm(shape[-1], eps=1e-5).to(dtype).to(profile.device)
    assert [name for name, _ in norm.named_parameters()] == ["weight"], (
        "RMSNorm has one parameter, `weight`"
    )
    checks.close(norm.weight, torch.ones(shape[-1], dtype=dtype), what="the weight at first")
    with torch.no_grad():
        norm.weight.copy_(checks.randn(shape[-1], generator=g))
    x = checks.randn(*shape, generator=g, dtype=dtype, scale=scale) + scale / 2  # not centered
    with checks.unchanged(x=x), checks.forbidden("rms_norm"):
        y = norm(x)
    w = norm.weight.double()
    checks.close(
        y,
        F.rms_norm(x.double(), shape[-1:], w, 1e-5),
        what=f"RMSNorm of {shape} of size {scale:g}",
        dtype=dtype,
        mistakes={
            "eps outside the root": w
            * x.double()
            / (x.double().square().mean(-1, keepdim=True).sqrt() + 1e-5),
            "no eps": w * x.double() / x.double().square().mean(-1, keepdim=True).sqrt(),
            "subtracting the mean first": F.layer_norm(x.double(), shape[-1:], w, None, 1e-5),
        },
    )
### END HIDDEN TESTS

# %% check="rms_norm" points=1
norm = RMSNorm(4).half()
y = norm(torch.tensor([[300.0, -300.0, 300.0, -300.0]]).half())
checks.close(
    y,
    torch.tensor([[1.0, -1.0, 1.0, -1.0]]).half(),
    what="RMSNorm of ±300 in float16",
    dtype=torch.float16,
    hint="300² is beyond float16's 65504: take the mean of the squares in float32",
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for scale in (200.0, 1e-4):  # the squares are infinite in float16, or 0
    checks.keeps_dtype(
        lambda x: RMSNorm(32).to(x.device, x.dtype)(x),
        checks.randn(50, 32, generator=g, scale=scale),
        reference=lambda x: F.rms_norm(x, (32,), None, 1e-5),
        rtol={torch.float16: 5e-4, torch.bfloat16: 4e-3},
        what=f"RMSNorm of inputs of size {scale:g}",
        hint="Half precision is widened to float32 and rounded once, at the end",
    )
for dtype in (torch.float16, torch.bfloat16, torch.float64):
    y = RMSNorm(6).to(profile.device)(checks.randn(3, 6, generator=g).to(dtype))
    assert y.dtype == dtype, (
        f"x is {dtype}, the weight float32; the result is {y.dtype}, not {dtype}"
    )
x = checks.randn(2, 5, 6, generator=g, dtype=torch.float64)
w = checks.randn(6, generator=g, dtype=torch.float64)


def normed(x, w):
    return torch.func.functional_call(RMSNorm(6).double().to(x.device), {"weight": w}, x)


checks.gradients(normed, lambda x, w: F.rms_norm(x, (6,), w, 1e-5), x, w, names=("x", "the weight"))
### END HIDDEN TESTS

# %% [markdown]
# ## Rotary positions {#rotary-positions}
#
# A query at position $p$ is turned, pair of features by pair of features, by the angle
# $p\,\omega_i$ with $\omega_i = \theta^{-2i/d_h}$, $i = 0 \dots d_h/2 - 1$. In LLaMA's layout, as
# Hugging Face stores it, pair $i$ is $(x_i, x_{i + d_h/2})$: the **half-split** layout. Read the
# pair as the complex number $z_i = x_i + \mathrm i\,x_{i+d_h/2}$, and the turn is
# $z_i e^{\mathrm i p\omega_i}$.
#
# The score of a query at $p$ with a key at $p'$ is
#
# $$ \sum_i \operatorname{Re}\big(
# z_i e^{\mathrm ip\omega_i}\,\overline{u_i e^{\mathrm ip'\omega_i}}\big)
# = \sum_i \operatorname{Re}\big(z_i\overline{u_i}\,e^{\mathrm i(p-p')\omega_i}\big) : $$
#
# it depends on $p - p'$ alone. Two consequences carry the rest of the lesson.
#
# - **Keys are cached after the turn.** A key's angle never changes again, so it is turned once,
#   when it is made.
# - **All positions of a sequence may be shifted together.** A prompt that was moved to the right by
#   padding may start at position 7 as well as at 0. It may *not* have a gap in the middle.
#
# One detail of precision. At position 100,000 the fastest pair has turned by 100,000 radians, and
# float32, with 24 bits, knows such a number to within about 0.004. The angle is therefore formed in
# float64; only cosine and sine are rounded.


# %% exercise="rotary" minutes=12 difficulty=2
def rotary_angles(
    positions: Tensor, head_dim: int, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position · theta^(−2i/head_dim) for i = 0 … head_dim/2 − 1, formed in float64
    and returned in it.

    positions (seq,), integers or not → each (seq, head_dim/2);
    positions (batch, seq)            → each (batch, 1, seq, head_dim/2), which broadcasts over the
    heads. On the device of `positions`.
    """
    ### BEGIN SOLUTION
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * theta ** (-pairs / head_dim)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()
    ### END SOLUTION


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + head_dim/2]) by its angle, counter-clockwise.

    x (batch, heads, seq, head_dim); cos and sin broadcast to (batch, heads, seq, head_dim/2), in
    any floating format. Computed in float32 for half-precision x (float64 stays float64); returned
    in the format of x, which is not changed.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the layout</summary>
#
# `chunk(2, dim=-1)` gives all first partners and all second partners. `x[..., 0::2]` and
# `x[..., 1::2]` would be the interleaved layout of RoFormer and of Meta's own files, which needs
# other weights.
# </details>

# %% check="rotary" points=1
result = rotary_angles(torch.tensor([0, 3]), 4, theta=100.0)
cos, sin = checks.parts(result, "cos", "sin", what="rotary_angles")
# The two frequencies are 100^0 = 1 and 100^(-2/4) = 0.1.
turns = torch.tensor([[0.0, 0.0], [3.0, 0.3]], dtype=torch.float64)
checks.close(
    cos,
    turns.cos(),
    what="the cosines",
    mistakes={
        "exponents of i/head_dim, not 2i/head_dim,": (turns * torch.tensor([1.0, 10**0.5])).cos(),
        "counting positions from 1": (turns / 3 + torch.tensor([1.0, 0.1])).cos(),
    },
)
checks.close(sin, turns.sin(), what="the sines")
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for shape, head_dim, theta in [
    ((5,), 2, 10_000.0),
    ((1,), 8, 500_000.0),
    ((7,), 64, 10_000.0),
    ((3, 4), 16, 1e6),
    ((1, 1), 6, 10.0),
]:
    positions = torch.randint(0, 3000, shape, generator=g).to(profile.device)
    with checks.unchanged(positions=positions):
        cos, sin = rotary_angles(positions, head_dim, theta)
    turned = [
        [math.fmod(p * theta ** (-2 * i / head_dim), 2 * math.pi) for i in range(head_dim // 2)]
        for p in positions.flatten().tolist()
    ]
    expected = torch.tensor(turned, dtype=torch.float64).view(*shape, head_dim // 2)
    expected = expected[:, None] if len(shape) == 2 else expected
    what = f"of positions {tuple(shape)}, head_dim {head_dim}, theta {theta:g}"
    checks.close(cos, expected.cos(), what=f"the cosines {what}", dtype=torch.float64)
    checks.close(sin, expected.sin(), what=f"the sines {what}", dtype=torch.float64)
far = torch.tensor([131_071])
checks.close(
    rotary_angles(far, 4)[0],
    [[math.cos(131_071), math.cos(1310.71)]],
    what="the cosines at position 131,071",
    hint="In float32 the angle itself is off by some thousandths",
)
checks.close(
    rotary_angles(torch.tensor([0.5, 2.25]), 2)[1],
    [[math.sin(0.5)], [math.sin(2.25)]],
    what="the sines of fractional positions",
)
for part in rotary_angles(torch.arange(3, device="meta"), 8):
    assert part.device.type == "meta", (
        f"for positions on the device meta the angles are on {part.device}: make them where "
        f"`positions` is"
    )
### END HIDDEN TESTS

# %% check="rotary" points=2
x = torch.tensor([1.0, 2.0, 30.0, 40.0]).view(1, 1, 1, 4)
quarter = torch.zeros(1, 2), torch.ones(1, 2)  # cos 0, sin 1: a quarter turn
checks.close(
    apply_rotary(x, *quarter),
    torch.tensor([-30.0, -40.0, 1.0, 2.0]).view(1, 1, 1, 4),
    what="a quarter turn of (1, 2, 30, 40)",
    mistakes={
        "the interleaved layout, pairs (x[0], x[1]) and (x[2], x[3]),": torch.tensor(
            [-2.0, 1.0, -40.0, 30.0]
        ).view(1, 1, 1, 4),
        "turning clockwise": torch.tensor([30.0, 40.0, -1.0, -2.0]).view(1, 1, 1, 4),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)


def by_complex_numbers(x, angle):
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([z.real, z.imag], dim=-1)


for batch, heads, seq, head_dim, per_row in [
    (1, 1, 1, 2, False),
    (2, 3, 5, 8, False),
    (3, 2, 4, 6, True),
    (2, 1, 7, 64, True),
]:
    x = checks.randn(batch, seq, heads, head_dim, generator=g)
    x = x.transpose(1, 2)  # a view, as a model makes it
    shape = (*((batch, 1) if per_row else ()), seq, head_dim // 2)
    angle = checks.randn(*shape, generator=g, dtype=torch.float64, scale=3.0)
    with checks.unchanged(x=x):
        y = apply_rotary(x, angle.cos(), angle.sin())
    checks.close(
        y, by_complex_numbers(x, angle), what=f"x {tuple(x.shape)} turned", dtype=torch.float32
    )
    y = apply_rotary(x.double(), angle.cos(), angle.sin())
    checks.close(
        y, by_complex_numbers(x, angle), what=f"x {tuple(x.shape)} in float64", dtype=torch.float64
    )
    checks.close(y.norm(dim=-1), x.double().norm(dim=-1), what="the length of a turned vector")
angle = checks.randn(5, 8, generator=g, dtype=torch.float64)
x = checks.randn(20, 2, 5, 16, generator=g)
checks.keeps_dtype(
    lambda x: apply_rotary(x, angle.cos(), angle.sin()),
    x,
    reference=lambda x: by_complex_numbers(x, angle),
    rtol={torch.float16: 5e-4, torch.bfloat16: 4e-3},
    what="x turned",
    hint="Half precision is widened to float32 and rounded once, at the end",
)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = x.double().chunk(2, -1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    with checks.unchanged(x=x, cos=cos, sin=sin):
        y = apply_rotary(x, cos, sin)
    checks.close(y, expected, what=f"x turned, cos and sin in {dtype}", dtype=torch.float32)
x = checks.randn(1, 2, 5, 16, generator=g, dtype=torch.float64)
checks.gradients(
    lambda x: apply_rotary(x, angle.cos(), angle.sin()),
    lambda x: by_complex_numbers(x, angle),
    x,
    names=("x",),
)
### END HIDDEN TESTS

# %% [markdown]
# ## Attention, with a cache
#
# Lesson 09's grouped-query attention, on PyTorch's `F.scaled_dot_product_attention`, plus a
# **cache** of keys and values. `Cache` comes with the course; it is fifteen lines:
#
# - `len(cache)` is the number of tokens in it (0 at first);
# - `k, v = cache.extend(layer, k, v)` appends the new tokens' keys and values,
#   `(batch, kv_heads, new, head_dim)` each, to those of a layer, and returns all of that layer's.
#
# Three kinds of call reach this module, and the mask must be right in each:
#
# | call | queries | keys | may see |
# |---|---|---|---|
# | training, or a prompt | $T$ | $T$ | the lower triangle |
# | one more token | 1 | $m + 1$ | everything |
# | several more tokens: the user's next message, a draft to verify | $n$ | $m + n$ | the lower triangle, **aligned to the last key** |
#
# PyTorch's `is_causal=True` means the triangle aligned to the *first* key. In the first row that is
# the same, in the second it hides all but one key, and in the third the newest tokens see little
# more than the conversation's beginning. It never complains.


# %% exercise="attention" minutes=25 difficulty=3
class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and an optional cache.

    Parameters, and nothing else: the weights of `q` (heads·head_dim, hidden_size), `k` and `v`
    (kv_heads·head_dim, hidden_size) and `o` (hidden_size, heads·head_dim), linear layers without
    biases. Head h owns the rows h·head_dim … (h+1)·head_dim − 1 of its projection; query head h
    uses key-value head h // (heads // kv_heads). Weights are the softmax of q·k / √head_dim.
    layer: which layer of a cache is this one's.
    """

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        ### END SOLUTION

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x (batch, seq, hidden_size) → the same shape.

        cos, sin: the angles of x's own positions, as `apply_rotary` takes them; queries and keys
            are turned.
        cache: holds the tokens before x; their turned keys and values come first, and x's are
            appended to it.
        mask: bool, broadcastable to (batch, heads, seq, cached + seq), True = may attend; it alone
            decides, with one query too, and lets each query see something. None is causal: x's
            tokens are the last of cached + seq, each sees itself and all before it.
        """
        ### BEGIN SOLUTION
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )  # (batch, heads, seq, head_dim)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:  # is_causal would align to the first key
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).flatten(-2))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: shared heads</summary>
#
# `enable_gqa=True` shares heads inside PyTorch. By hand, keys are repeated so that neighbors are
# alike: heads 0, 0, 1, 1. That is `repeat_interleave`; `repeat` gives 0, 1, 0, 1.
# </details>
#
# <details><summary>Hint: the third kind of call</summary>
#
# Build the mask yourself whenever there are several queries and more keys than queries.
# `torch.Tensor.tril` takes the diagonal at which to stop.
# </details>

# %% check="attention" points=2
config = LlamaConfig(vocab_size=5, hidden_size=8, mlp_size=8, layers=1, heads=4, kv_heads=2)
layer = Attention(config)
shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
assert shapes == {"q.weight": (8, 8), "k.weight": (4, 8), "v.weight": (4, 8), "o.weight": (8, 8)}, (
    f"the parameters should be q.weight, k.weight, v.weight and o.weight; yours are {shapes}"
)
unturned = torch.ones(3, 1), torch.zeros(3, 1)
with torch.no_grad():
    layer.q.weight.zero_()  # every score 0: plain averages of what may be seen
    layer.v.weight.copy_(torch.eye(8)[:4])  # key-value head 0: features 0 and 1; head 1: 2 and 3
    layer.o.weight.copy_(torch.eye(8))
    out = layer(torch.arange(24.0).view(1, 3, 8), *unturned)
checks.close(
    out[0, :, 0],
    torch.tensor([0.0, 4.0, 8.0]),
    what="averages of feature 0 over what each token may see",
    hint="Token t averages tokens 0 … t",
    mistakes={"no causal mask": torch.full((3,), 8.0)},
)
checks.close(
    out[0, 0],
    torch.tensor([0.0, 1, 0, 1, 2, 3, 2, 3]),
    what="what query heads 0 … 3 bring back for token 0",
    mistakes={
        "query head h using key-value head h % kv_heads (not repeat_interleave)": torch.tensor(
            [0.0, 1, 2, 3, 0, 1, 2, 3]
        )
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)


@torch.no_grad()
def one_at_a_time(layer, config, x, angle, visible, swap=False):
    """Head by head, query by query, in complex numbers; visible: (batch, heads, seq, seq)."""
    w = {name: p.double() for name, p in layer.named_parameters()}
    half, size = config.head_dim // 2, config.head_dim

    def turned(t, p):
        z = torch.complex(t[:half], t[half:]) * torch.polar(torch.ones_like(angle[p]), angle[p])
        return torch.cat([z.real, z.imag])

    out = torch.zeros(*x.shape[:2], config.heads * size, dtype=torch.float64, device=x.device)
    for b in range(x.shape[0]):
        for h in range(config.heads):
            shared = h % config.kv_heads if swap else h * config.kv_heads // config.heads
            rows, shared = (slice(n * size, (n + 1) * size) for n in (h, shared))
            keys = torch.stack(
                [turned(w["k.weight"][shared] @ t, p) for p, t in enumerate(x[b].double())]
            )
            for p, t in enumerate(x[b].double()):
                score = keys @ turned(w["q.weight"][rows] @ t, p) / size**0.5
                weight = score.masked_fill(~visible[b, h, p], -torch.inf).softmax(-1)
                out[b, p, rows] = weight @ (x[b].double() @ w["v.weight"][shared].T)
    return out @ w["o.weight"].T


for batch, seq, hidden, heads, kv_heads, mask_shape in [
    (2, 5, 12, 2, 2, (2, 1, 5, 5)),
    (2, 6, 24, 6, 2, (6, 6)),  # broadcast over batch and heads
    (3, 4, 8, 4, 1, (4, 4, 4)),  # each head sees something else
    (2, 3, 8, 2, 2, (2, 2, 3, 3)),
    (1, 1, 16, 2, 1, (1, 1)),
]:
    config = LlamaConfig(2, hidden, 2, 1, heads, kv_heads)
    layer = Attention(config).double().to(profile.device)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(checks.randn(*p.shape, generator=g, dtype=torch.float64, scale=hidden**-0.5))
        layer.q.weight.mul_(3)
    x = checks.randn(batch, seq, hidden, generator=g, dtype=torch.float64)
    angle = checks.randn(seq, config.head_dim // 2, generator=g, dtype=torch.float64, scale=2.0)
    own = torch.eye(seq, dtype=torch.bool, device=x.device)
    lower = torch.ones_like(own).tril().expand(batch, heads, -1, -1)
    with checks.unchanged(x=x):
        out = layer(x, angle.cos(), angle.sin())
    what = f"x {tuple(x.shape)}, {heads} heads over {kv_heads}"
    checks.close(
        out,
        one_at_a_time(layer, config, x, angle, lower),
        what=f"the output for {what}",
        mistakes={
            "no causal mask": one_at_a_time(layer, config, x, angle, torch.ones_like(lower)),
            "query head h using key-value head h % kv_heads (not repeat_interleave)": one_at_a_time(
                layer, config, x, angle, lower, swap=True
            ),
            "no rotation": one_at_a_time(layer, config, x, torch.zeros_like(angle), lower),
        },
    )
    visible = (torch.rand(mask_shape, generator=g) < 0.5).to(x.device) | own
    with checks.unchanged(mask=visible):
        out = layer(x, angle.cos(), angle.sin(), visible)
    everywhere = visible.expand(batch, heads, seq, seq)
    checks.close(
        out,
        one_at_a_time(layer, config, x, angle, everywhere),
        what=f"the output under a mask {mask_shape}, {what}",
        mistakes={"ignoring the mask": one_at_a_time(layer, config, x, angle, lower)},
    )
# Gradients arrive at every weight.
layer(x.clone().requires_grad_(), angle.cos(), angle.sin()).square().sum().backward()
assert all(p.grad is not None for name, p in layer.named_parameters()), (
    "a projection gets no gradient: is part of the computation detached?"
)
### END HIDDEN TESTS

# %% check="attention" points=3
config = LlamaConfig(vocab_size=5, hidden_size=8, mlp_size=8, layers=1, heads=2, kv_heads=1)
layer = Attention(config).double().to(profile.device)
x = checks.randn(1, 4, 8, generator=checks.generator(6), dtype=torch.float64)
angle = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.01])).double().to(x.device)
with torch.no_grad():
    whole = layer(x, angle.cos(), angle.sin())
    cache = Cache()
    first = layer(x[:, :3], angle[:3].cos(), angle[:3].sin(), cache=cache)
    assert len(cache) == 3, f"after three tokens the cache holds {len(cache)}: is it extended?"
    last = layer(x[:, 3:], angle[3:].cos(), angle[3:].sin(), cache=cache)
checks.close(first, whole[:, :3], what="the first three tokens through an empty cache")
checks.close(
    last,
    whole[:, 3:],
    what="the fourth token after three in the cache",
    mistakes={
        "one query seeing only the first key (is_causal)": layer.o(
            layer.v(x[:, :1]).repeat(1, 1, 2)
        ).detach()
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(7)
for heads, kv_heads, pieces in [
    (4, 2, [1, 1, 1, 1, 1]),
    (4, 4, [3, 4]),
    (6, 1, [1, 5, 1, 3]),
    (2, 1, [2, 2, 2]),
]:
    config = LlamaConfig(2, 24, 2, 1, heads, kv_heads)
    layer = Attention(config, layer=0).double().to(profile.device)
    x = checks.randn(2, sum(pieces), 24, generator=g, dtype=torch.float64)
    angle = checks.randn(sum(pieces), config.head_dim // 2, generator=g, dtype=torch.float64)
    with torch.no_grad():
        layer.q.weight.mul_(6)
        whole = layer(x, angle.cos(), angle.sin())
        cache, at, parts = Cache(), 0, []
        for size in pieces:
            these = slice(at, at + size)
            parts.append(layer(x[:, these], angle[these].cos(), angle[these].sin(), cache=cache))
            at += size
            held = cache.layers[0]
            assert held[0].shape == held[1].shape == (2, kv_heads, at, config.head_dim), (
                f"the cache holds keys {tuple(held[0].shape)}; (batch, kv_heads, tokens, "
                f"head_dim) is {(2, kv_heads, at, config.head_dim)}"
            )
    checks.close(
        torch.cat(parts, 1),
        whole,
        what=f"tokens in pieces of {pieces} against all at once",
        hint="Several new tokens after a cache: each sees the whole cache, itself, and the new "
        "ones before it",
    )
# A second layer of the same cache.
cache = Cache()
with torch.no_grad():
    a, b = (Attention(config, layer=i).double().to(profile.device) for i in (0, 1))
    for part in (slice(0, 4), slice(4, 6)):
        a(x[:, part], angle[part].cos(), angle[part].sin(), cache=cache)
        out = b(x[:, part], angle[part].cos(), angle[part].sin(), cache=cache)
    checks.close(
        out,
        b(x, angle.cos(), angle.sin())[:, 4:],
        what="the second layer's output with a cache shared by two",
    )
    # An explicit mask counts with a cache, too, for several queries and for one.
    for new in (2, 1):
        cache, hidden = Cache(), torch.ones(2, 1, new, 4 + new, dtype=torch.bool, device=x.device)
        hidden[:, :, :, 1:4] = False
        these = slice(4, 4 + new)
        a(x[:, :4], angle[:4].cos(), angle[:4].sin(), cache=cache)
        out = a(x[:, these], angle[these].cos(), angle[these].sin(), hidden, cache)
        only = [0, *range(4, 4 + new)]
        seen = torch.ones(1 + new, 1 + new, dtype=torch.bool, device=x.device)
        checks.close(
            out,
            a(x[:, only], angle[only].cos(), angle[only].sin(), seen)[:, 1:],
            what=f"{new} tokens after a cache of four, of which a mask shows one",
        )
### END HIDDEN TESTS

# %% [markdown]
# ## The gated layer and the block
#
# SwiGLU, with $W_g, W_u$ of shape $(F, d)$ and $W_d$ $(d, F)$:
# $\;\mathrm{mlp}(x) = W_d\big(\mathrm{silu}(W_g x) \odot W_u x\big)$. Gate and up have the same
# shape, so a file that swaps them loads without complaint.
#
# The block reads the stream through a norm and **adds** to it. The stream itself is never
# normalized on its way through:
#
# $$ x \leftarrow x + \mathrm{attention}(\mathrm{norm}_1(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{norm}_2(x)). $$


# %% exercise="block" minutes=12 difficulty=1
class MLP(nn.Module):
    """SwiGLU. Parameters: the weights of `gate`, `up` (mlp_size, hidden_size) and `down`
    (hidden_size, mlp_size).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        """x (…, hidden_size) → the same shape."""
        ### BEGIN SOLUTION
        return self.down(F.silu(self.gate(x)) * self.up(x))
        ### END SOLUTION


class Block(nn.Module):
    """One layer. Children: `attention_norm`, `attention`, `mlp_norm`, `mlp`; the norms have the
    config's eps, the attention has the block's `layer`.
    """

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)
        ### END SOLUTION

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x (batch, seq, hidden_size) → the same shape; the other arguments are attention's."""
        ### BEGIN SOLUTION
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what the second branch reads</summary>
#
# The gated layer reads the stream as it is *after* attention has added to it. And a block that is
# to find its own keys in the cache has to tell its attention which layer it is.
# </details>


# %% check="block" points=1
config = LlamaConfig(vocab_size=2, hidden_size=2, mlp_size=1, layers=1, heads=1, kv_heads=1)
mlp = MLP(config)
with torch.no_grad():
    mlp.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
    mlp.up.weight.copy_(torch.tensor([[0.0, 1.0]]))
    mlp.down.weight.copy_(torch.tensor([[1.0], [2.0]]))
    y = mlp(torch.tensor([2.0, -3.0]))
silu_of = [z / (1 + math.exp(-z)) for z in (2.0, -3.0)]
checks.close(
    y,
    torch.tensor([-3 * silu_of[0], -6 * silu_of[0]]),
    what="MLP([2, -3])",
    mistakes={
        "silu on the up branch in place of the gate": torch.tensor(
            [2 * silu_of[1], 4 * silu_of[1]]
        ),
        "no up branch": torch.tensor([silu_of[0], 2 * silu_of[0]]),
        "no silu": torch.tensor([-6.0, -12.0]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for hidden, inner, shape in [(4, 7, (2, 3, 4)), (6, 2, (6,)), (2, 33, (1, 1, 2))]:
    mlp = MLP(LlamaConfig(2, hidden, inner, 1, 1, 1)).double().to(profile.device)
    shapes = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
    assert shapes == {
        "gate.weight": (inner, hidden),
        "up.weight": (inner, hidden),
        "down.weight": (hidden, inner),
    }, f"the MLP's parameters are {shapes}"
    x = checks.randn(*shape, generator=g, dtype=torch.float64, scale=3.0)
    with checks.unchanged(x=x):
        assert mlp(x).requires_grad, "no gradient reaches the MLP's weights"
    gate, up, down = (p.detach() for p in (mlp.gate.weight, mlp.up.weight, mlp.down.weight))
    a, b = torch.einsum("fd,...d->...f", gate, x), torch.einsum("fd,...d->...f", up, x)
    checks.close(
        mlp(x),
        torch.einsum("df,...f->...d", down, a * b / (1 + torch.exp(-a))),
        what=f"the MLP of x {shape}",
        mistakes={
            "silu on the up branch in place of the gate": torch.einsum(
                "df,...f->...d", down, a * b / (1 + torch.exp(-b))
            ),
            "GELU in place of SiLU": torch.einsum("df,...f->...d", down, F.gelu(a) * b),
        },
    )
### END HIDDEN TESTS

# %% check="block" points=2
config = LlamaConfig(vocab_size=2, hidden_size=4, mlp_size=3, layers=1, heads=1, kv_heads=1)
block = Block(config)
children = [name for name, _ in block.named_children()]
assert sorted(children) == ["attention", "attention_norm", "mlp", "mlp_norm"], (
    f"the block's children should be attention_norm, attention, mlp_norm and mlp; yours are "
    f"{children}"
)
with torch.no_grad():
    block.attention.o.weight.zero_()
    block.mlp.down.weight.zero_()
    x = torch.tensor([[[3.0, -5.0, 7.0, 0.5]]])
    checks.close(
        block(x, torch.ones(1, 2), torch.zeros(1, 2)),
        x,
        what="a block whose branches add nothing",
        hint="The stream passes through unchanged: norms belong on the branches",
    )
### BEGIN HIDDEN TESTS
g = checks.generator(9)
config = LlamaConfig(
    vocab_size=2, hidden_size=12, mlp_size=10, layers=1, heads=3, kv_heads=1, eps=0.3
)
block = Block(config).double().to(profile.device)
with torch.no_grad():
    for p in block.parameters():
        p.copy_(checks.randn(*p.shape, generator=g, dtype=torch.float64, scale=0.6))
x = checks.randn(2, 5, 12, generator=g, dtype=torch.float64)
angle = checks.randn(5, 2, generator=g, dtype=torch.float64)
w = {name: p.detach() for name, p in block.named_parameters()}


@torch.no_grad()
def by_hand(x, parallel=False, post=False, eps=0.3, swapped=False):
    """PyTorch's parts around the attention layer that the block itself holds."""
    first, second = ("attention_norm.weight", "mlp_norm.weight")[:: -1 if swapped else 1]

    def norm(t, name):
        return F.rms_norm(t, (12,), w[name], eps)

    def mlp(t):
        gate, up, down = (w[f"mlp.{name}.weight"].T for name in ("gate", "up", "down"))
        return (F.silu(t @ gate) * (t @ up)) @ down

    if post:
        y = norm(x + block.attention(x, angle.cos(), angle.sin()), first)
        return norm(y + mlp(y), second)
    y = x + block.attention(norm(x, first), angle.cos(), angle.sin())
    return y + mlp(norm(x if parallel else y, second))


with checks.unchanged(x=x):
    out = block(x, angle.cos(), angle.sin())
out.sum().backward()
idle = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()]
assert not idle, f"no gradient reaches {idle[0]} of the block"
out = out.detach()
checks.close(
    out,
    by_hand(x),
    what="the block",
    mistakes={
        "both branches reading the same stream": by_hand(x, parallel=True),
        "norms after the sums (post-norm)": by_hand(x, post=True),
        "ignoring config.eps": by_hand(x, eps=1e-5),
        "the two norms exchanged": by_hand(x, swapped=True),
    },
)
# The cache and the mask reach the attention.
cache = Cache()
with torch.no_grad():
    block(x[:, :2], angle[:2].cos(), angle[:2].sin(), cache=cache)
    checks.close(
        block(x[:, 2:], angle[2:].cos(), angle[2:].sin(), cache=cache),
        out[:, 2:],
        what="three tokens after two in the cache",
    )
    alone = torch.eye(5, dtype=torch.bool, device=x.device)
    one = torch.cat(
        [block(x[:, i : i + 1], angle[i : i + 1].cos(), angle[i : i + 1].sin()) for i in range(5)],
        1,
    )
    checks.close(
        block(x, angle.cos(), angle.sin(), alone), one, what="five tokens that see only themselves"
    )
    # Each layer finds its own keys in a cache that they share.
    blocks = [Block(config, layer).double().to(profile.device) for layer in (0, 1)]
    first = blocks[0](x, angle.cos(), angle.sin())
    expected, cache = blocks[1](first, angle.cos(), angle.sin()), Cache()
    for part in (slice(0, 3), slice(3, 5)):
        turn = angle[part].cos(), angle[part].sin()
        out = blocks[0](x[:, part], *turn, cache=cache)
        out = blocks[1](out, *turn, cache=cache)
    checks.close(
        out,
        expected[:, 3:],
        what="the output of blocks 0 and 1 with one cache",
        hint="Does the attention know its block's `layer`?",
    )
### END HIDDEN TESTS

# %% [markdown]
# ## The model {#model}
#
# Embedding, blocks, a last norm, a head. Three things are decided here.
#
# **The last norm.** Every block adds to the stream and none ever rescales it, so after $L$ blocks
# its size is whatever the sum came to. The head needs a fixed scale to read from: without the last
# norm a model computes, trains, and is worse.
#
# **Tying.** A tied head uses the embedding's matrix $E$ $(V, d)$ once more:
# $\mathrm{logits} = E\,\mathrm{norm}(x)$. It is *one* parameter with two uses, whose gradient is
# the sum of both; a copy made at the start would drift apart at the first step. Tying saves $Vd$
# parameters: 15 % of LLaMA-160M, 0.4 % of a 70B model with the same vocabulary. Small models tie,
# large ones mostly do not.
#
# **Padding.** Prompts of unequal length are made a rectangle by padding on the **left**, so that
# every row's next token comes from its last column:
#
# ```
#   tokens           attention_mask        positions (by default)
#   ·  ·  the  cat   0  0  1  1            0  1  2  3
#   a  dog  sat  on  1  1  1  1            0  1  2  3
# ```
#
# Padding must be invisible as a *key*. As a query it may see what it likes, since nobody reads its
# output, with one exception: a row of a softmax that sees nothing is 0/0, and a NaN times a weight
# of 0 is NaN. (Some kernels give 0 for such a row, others NaN.) So **every token sees itself**.
# That the upper row starts at position 2 does no harm: [](#rotary-positions) showed that only
# differences of positions count.
#
# The given `initialize` is lesson 13's: normal weights of standard deviation 0.02, smaller by
# $\sqrt{2L}$ where a branch ends, so that $2L$ additions to the stream do not make it grow.


# %%
def initialize(model: nn.Module, layers: int, std: float = 0.02) -> None:
    """GPT-2's initialization of every matrix; the norms stay at ones."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            ends_branch = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * layers) if ends_branch else std)


# %% exercise="llama" minutes=30 difficulty=3
class Llama(nn.Module):
    """The decoder. Children, in this order: `embed` (nn.Embedding), `blocks` (nn.ModuleList of
    Block), `norm` (RMSNorm), and `head` (nn.Linear without a bias), which a tied model lacks: its
    state has no head.weight. `self.config` is kept.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        ### BEGIN SOLUTION
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        if not config.tied:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        ### END SOLUTION
        initialize(self, config.layers)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """tokens (batch, seq), int64 → logits (batch, seq, vocab_size) of the token after each.

        cache: the tokens before these, `cached` of them; it is extended by these.
        attention_mask: (batch, cached + seq), bool, False = padding, which no other token sees.
            Every token sees itself, so that the logits are finite everywhere; what those of padding
            are is left open. None = no padding.
        positions: (seq,) or (batch, seq), of these tokens; None = cached, cached + 1, …
        """
        ### BEGIN SOLUTION
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        if positions is None:
            positions = columns[past:]
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            queries = columns[past:, None]
            real = attention_mask[:, None, None, :].bool()
            mask = (columns <= queries) & real | (columns == queries)  # (batch, 1, seq, past + seq)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which position is next?</summary>
#
# `len(cache)` before the blocks run. Inside the loop it grows with the first block.
# </details>
#
# <details><summary>Hint: three masks in one</summary>
#
# Write each as a comparison that broadcasts: not later `(seq, keys)`, real `(batch, 1, 1, keys)`,
# itself `(seq, keys)`. A token sees a key that is (not later and real) or itself.
# </details>

# %% check="llama" points=2
config = LlamaConfig(vocab_size=11, hidden_size=8, mlp_size=12, layers=2, heads=2, kv_heads=1)
model = Llama(config)
names = [name for name, _ in model.named_children()]
assert names == ["embed", "blocks", "norm", "head"], (
    f"the children should be embed, blocks, norm, head; yours are {names}"
)
assert "head.weight" not in Llama(LlamaConfig(11, 8, 12, 2, 2, 1, tied=True)).state_dict(), (
    "a tied model has no head of its own"
)
tokens = torch.tensor([[1, 2, 3, 4]])
logits, changed = model(tokens), model(torch.tensor([[1, 2, 3, 9]]))
checks.close(
    changed[:, :3],
    logits[:, :3],
    what="the logits of the first three tokens after the fourth was changed",
    hint="A token must not see what comes after it",
)
assert logits.shape == (1, 4, 11), (
    f"logits are (batch, seq, vocab_size) = (1, 4, 11); yours are {tuple(logits.shape)}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)


@torch.no_grad()
def plainly(w, config, tokens, last_norm=True, rotation=1.0, final_only=False):
    """The logits of one sequence (seq,), in float64 and complex numbers, from a dict of weights."""

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * w[name]

    seq, half = len(tokens), config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half).double() / half)
    angle = torch.outer(torch.arange(seq).double() * rotation, frequencies)
    turn = torch.polar(torch.ones_like(angle), angle)
    later = torch.full((seq, seq), -torch.inf, dtype=torch.float64).triu(1)
    x = w["embed.weight"][tokens]
    for i in range(config.layers):
        name = f"blocks.{i}."
        h = norm(x, name + "attention_norm.weight")
        heads = []
        for j in range(config.heads):
            kv = j // (config.heads // config.kv_heads)
            q, k, v = (
                h @ w[f"{name}attention.{p}.weight"][n * 2 * half : (n + 1) * 2 * half].T
                for p, n in (("q", j), ("k", kv), ("v", kv))
            )
            q, k = (torch.complex(t[:, :half], t[:, half:]) * turn for t in (q, k))
            score = (q @ k.conj().T).real / math.sqrt(2 * half)
            heads.append((score + later).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[name + "attention.o.weight"].T
        h = norm(x, name + "mlp_norm.weight")
        gate, up = (h @ w[f"{name}mlp.{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[name + "mlp.down.weight"].T
    x = norm(x, "norm.weight") if last_norm else x
    return x @ w["embed.weight" if config.tied else "head.weight"].T


for heads, kv_heads, layers, tied, seq in [
    (4, 2, 2, False, 6),
    (2, 2, 1, True, 1),
    (6, 1, 3, True, 5),
    (1, 1, 1, False, 4),
]:
    config = LlamaConfig(13, 24, 20, layers, heads, kv_heads, tied, rope_theta=50.0, eps=0.01)
    model = Llama(config).double().to(profile.device)
    shared = (24 // heads * kv_heads, 24)
    inside = {"attention_norm": (24,), "mlp_norm": (24,)}
    inside |= {f"attention.{p}": shared if p in "kv" else (24, 24) for p in "qkvo"}
    inside |= {"mlp.gate": (20, 24), "mlp.up": (20, 24), "mlp.down": (24, 20)}
    shapes = {"embed.weight": (13, 24), "norm.weight": (24,)}
    shapes |= {} if tied else {"head.weight": (13, 24)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in inside.items()}
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert found == shapes, f"the state should hold {shapes}; yours holds {found}"
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(checks.randn(*p.shape, generator=g, dtype=torch.float64, scale=0.5))
    w = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    tokens = torch.randint(0, 13, (3, seq), generator=g)
    logits = model(tokens.to(profile.device)).cpu()
    expected = torch.stack([plainly(w, config, row) for row in tokens])
    checks.close(
        logits,
        expected,
        what=f"the logits of {layers} layers, {heads} heads over {kv_heads}, "
        f"{'tied' if tied else 'untied'}, {seq} tokens",
        rtol=1e-8,
        mistakes={
            "no norm before the head": torch.stack(
                [plainly(w, config, row, last_norm=False) for row in tokens]
            ),
            "no rotation": torch.stack([plainly(w, config, row, rotation=0.0) for row in tokens]),
        },
    )
# What initialize expects of the names, and that one matrix serves twice.
torch.manual_seed(0)
tied = Llama(LlamaConfig(97, 32, 64, 2, 2, 1, tied=True))
spread = {name: float(p.detach().std()) for name, p in tied.named_parameters() if p.dim() == 2}
assert all(
    abs(std / (0.01 if name.endswith(("o.weight", "down.weight")) else 0.02) - 1) < 0.2
    for name, std in spread.items()
), f"the initialization's standard deviations are off: {spread}"
tied(torch.tensor([[1, 2]]))[0, 1, 5].backward()
assert bool(tied.embed.weight.grad[[1, 5]].any(1).all()), (
    "a tied matrix gets gradients from both of its uses"
)
### END HIDDEN TESTS

# %% check="llama" points=3
config = LlamaConfig(vocab_size=11, hidden_size=8, mlp_size=12, layers=2, heads=2, kv_heads=1)
model = Llama(config).double()
tokens = torch.tensor([[1, 2, 3, 4, 5]])
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=checks.generator(11), dtype=torch.float64))
    whole, cache = model(tokens), Cache()
    first = model(tokens[:, :2], cache)
    parts = torch.cat([first, model(tokens[:, 2:], cache)], 1)
checks.close(
    parts,
    whole,
    what="the logits of two tokens, then three more with the cache",
    hint="Positions, mask and cache must agree: the third token stands at position 2",
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
shape = {"vocab_size": 19, "hidden_size": 32, "mlp_size": 24, "layers": 3, "heads": 4}
shape |= {"kv_heads": 2, "rope_theta": 30.0, "eps": 1e-3}
theirs = models.Llama(models.Config(**shape)).double().to(profile.device)
ours = Llama(LlamaConfig(**shape, tied=True)).double().to(profile.device)
parts = {"embed.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}
for i in range(3):
    for mine, other in [
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        *((f"attention.{p}", f"self_attn.{p}_proj") for p in "qkvo"),
        *((f"mlp.{p}", f"mlp.{p}_proj") for p in ("gate", "up", "down")),
    ]:
        parts[f"blocks.{i}.{mine}.weight"] = f"layers.{i}.{other}.weight"
with torch.no_grad():
    for p in theirs.parameters():
        p.copy_(checks.randn(*p.shape, generator=g, dtype=torch.float64, scale=0.5))
ours.load_state_dict({mine: theirs.state_dict()[other] for mine, other in parts.items()})
# Below, 1e-5 and not 1e-9: the course's model has angles in float32.
tokens = torch.randint(0, 19, (3, 9), generator=g).to(profile.device)
with torch.no_grad():
    whole = theirs(tokens)
    for pieces in ([9], [1] * 9, [4, 5], [3, 1, 3, 2]):
        cache, at, outs = Cache(), 0, []
        for size in pieces:
            outs.append(ours(tokens[:, at : at + size], cache))
            at += size
            assert len(cache) == at, f"after {at} tokens the cache holds {len(cache)}"
        checks.close(
            torch.cat(outs, 1),
            whole,
            what=f"the logits of nine tokens in pieces of {pieces}",
            rtol=1e-5,
        )
    # Positions given: shifted together they change nothing, with a gap they do.
    checks.close(
        ours(tokens, positions=torch.arange(9, device=tokens.device) + 400),
        whole,
        what="the logits with all positions 400 further on",
        rtol=1e-5,
    )
    gap = torch.tensor([[*range(9)], [*range(5, 14)], [0, 1, 4, 5, 6, 9, 10, 11, 30]])
    gap = gap.to(tokens.device)
    for pieces in ([9], [4, 5], [8, 1]):
        cache, at, outs = Cache(), 0, []
        for size in pieces:
            these = slice(at, at + size)
            with checks.kept(model=ours, tokens=tokens, positions=gap):
                outs.append(ours(tokens[:, these], cache, positions=gap[:, these]))
            at += size
        checks.close(
            torch.cat(outs, 1),
            theirs(tokens, positions=gap),
            what=f"the logits with positions for each row, in pieces of {pieces}",
            rtol=1e-5,
            hint="Positions that are given are these tokens' own, whatever the cache holds",
            mistakes={"ignoring the positions": whole},
        )
    # Whatever the format of the weights is, the logits have it.
    for dtype in (torch.float16, torch.bfloat16):
        logits = Llama(LlamaConfig(**shape)).to(profile.device, dtype)(tokens)
        assert logits.dtype == dtype, f"a model in {dtype} has logits in {logits.dtype}"
### END HIDDEN TESTS

# %% check="llama" points=2
config = LlamaConfig(vocab_size=11, hidden_size=8, mlp_size=12, layers=2, heads=2, kv_heads=1)
model = Llama(config).double()
real = torch.tensor([[False, False, True, True]])
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=checks.generator(13), dtype=torch.float64))
    padded = model(torch.tensor([[0, 0, 7, 3]]), attention_mask=real)
    bare = model(torch.tensor([[7, 3]]))
assert torch.isfinite(padded).all(), (
    "padding made NaN: a token that sees nothing has a softmax of 0/0. Let every token see itself"
)
checks.close(
    padded[:, 2:],
    bare,
    what="the logits of (7, 3) behind two tokens of padding",
    mistakes={"attending to the padding": model(torch.tensor([[0, 0, 7, 3]])).detach()[:, 2:]},
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for tied, lengths, more in [
    (True, [5, 2, 1], [1, 1]),
    (False, [3, 6], [2, 1, 3]),
    (False, [1, 4, 4, 2], []),
]:
    config = LlamaConfig(17, 16, 12, 2, 4, 2, tied=tied, rope_theta=20.0)
    model = Llama(config).double().to(profile.device)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(checks.randn(*p.shape, generator=g, dtype=torch.float64, scale=0.6))
    longest, total = max(lengths), max(lengths) + sum(more)
    tokens = torch.randint(0, 17, (len(lengths), total), generator=g).to(profile.device)
    real = torch.tensor(
        [[column >= longest - n for column in range(total)] for n in lengths], device=tokens.device
    )
    cache, at, outs = Cache(), 0, []
    with torch.no_grad():
        for size in [longest, *more]:
            with checks.unchanged(tokens=tokens, attention_mask=real):
                outs.append(model(tokens[:, at : at + size], cache, real[:, : at + size]))
            at += size
        logits = torch.cat(outs, 1)
        assert torch.isfinite(logits).all(), "the logits are not finite where there is padding"
        for row, n in enumerate(lengths):
            checks.close(
                logits[row, longest - n :],
                model(tokens[row : row + 1, longest - n :])[0],
                what=f"row {row} of a batch of lengths {lengths}, then {more} more tokens, "
                f"against the row alone",
                hint="Is padding hidden from the later tokens too, that come with a cache?",
            )
        # Padding in the middle, with positions that leave no gap: the same as without it.
        middle = torch.ones(1, 6, dtype=torch.bool, device=tokens.device)
        middle[0, 2:4] = False
        some = torch.randint(0, 17, (1, 6), generator=g).to(tokens.device)
        places = torch.tensor([[0, 1, 1, 1, 2, 3]], device=tokens.device)
        kept = [0, 1, 4, 5]
        checks.close(
            model(some, attention_mask=middle),
            model(some, attention_mask=middle, positions=torch.arange(6, device=tokens.device)),
            what="tokens with padding in their middle, whose positions count it",
        )
        checks.close(
            model(some, attention_mask=middle, positions=places)[:, kept],
            model(some[:, kept]),
            what="four tokens with padding in their middle",
        )
### END HIDDEN TESTS

# %% [markdown]
# ## LLaMA-160M
#
# The smallest of Meta's first LLaMAs has seven billion parameters. Miao et al. (2023) trained two
# far smaller ones, of 160 and of 68 million, as draft models for speculative decoding (lesson 32).
# Count the first of them before you build it. With $d_{kv} = H_{kv}d_h$,
#
# $$ N = \underbrace{Vd\,(2 - [\text{tied}])}_{\text{vocabulary}} + L\,\big(\underbrace{2d^2 + 2d\,d_{kv}}_{\text{attention}} + \underbrace{3dF}_{\text{SwiGLU}} + \underbrace{2d}_{\text{norms}}\big) + d . $$
#
# A model on the **meta device** has shapes and no numbers: it is built in milliseconds, whatever
# its size.

# %% exercise="llama_160m" minutes=4 difficulty=1 path="more"
# LLAMA_160M, a LlamaConfig under this name: width 768, SwiGLU 3072, 12 layers, 12 heads, none of
# them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
### BEGIN SOLUTION
LLAMA_160M = LlamaConfig(
    vocab_size=32_000, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6
)
### END SOLUTION

# %% [markdown]
# <details><summary>Hint: nothing shared</summary>
#
# Where no keys and values are shared, every query head has its own: as many `kv_heads` as `heads`.
# </details>

# %% check="llama_160m" points=1
assert isinstance(LLAMA_160M, LlamaConfig), f"LLAMA_160M is a LlamaConfig; yours is {LLAMA_160M!r}"
count = LLAMA_160M.vocab_size * LLAMA_160M.hidden_size * (1 if LLAMA_160M.tied else 2)
assert count == 49_152_000, (
    f"embedding and head hold 2 · 32,000 · 768 = 49,152,000 parameters; from your config it would "
    f"be {count:,}"
)
### BEGIN HIDDEN TESTS
found = {name: getattr(LLAMA_160M, name) for name in ("hidden_size", "mlp_size", "layers")}
found |= {name: getattr(LLAMA_160M, name) for name in ("heads", "kv_heads", "eps", "rope_theta")}
asked = {"hidden_size": 768, "mlp_size": 3072, "layers": 12, "heads": 12, "kv_heads": 12}
asked |= {"eps": 1e-6, "rope_theta": 10_000.0}
wrong = {name: value for name, value in found.items() if value != asked[name]}
assert not wrong, f"of your LLAMA_160M these are not what was asked for: {wrong}"
### END HIDDEN TESTS

# %% check="llama_160m" points=1
with torch.device("meta"):
    model = Llama(LLAMA_160M)
total = sum(p.numel() for p in model.parameters())
assert total == 162_417_408, (
    f"on the meta device your Llama(LLAMA_160M) has {total:,} parameters, not 162,417,408"
)
### BEGIN HIDDEN TESTS
assert len(model.state_dict()) == 111, (
    f"12 layers of 9 tensors, and 3 more, are 111; your state has {len(model.state_dict())}"
)
assert not list(model.buffers()), (
    "nothing but parameters belongs in the state: rotary angles are computed, not stored"
)
with torch.device("meta"):
    tied = Llama(LlamaConfig(32_000, 768, 3072, 12, 12, 4, tied=True, eps=1e-6))
total = sum(p.numel() for p in tied.parameters())
assert total == 162_417_408 - 32_000 * 768 - 12 * 2 * 768 * 512, (
    f"tied and with 4 key-value heads it has 128,404,224 parameters; yours has {total:,}"
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: where the parameters of six models are
published = {
    "course's small": LlamaConfig(4096, 256, 704, 7, 8, 2, tied=True),
    "LLaMA-160M": LLAMA_160M,
    "Llama-3.2-1B": LlamaConfig(128_256, 2048, 8192, 16, 32, 8, tied=True),
    "LLaMA-7B": LlamaConfig(32_000, 4096, 11_008, 32, 32, 32),
    "Llama-3-8B": LlamaConfig(128_256, 4096, 14_336, 32, 32, 8),
    "Llama-2-70B": LlamaConfig(32_000, 8192, 28_672, 80, 64, 8),
}
kinds = {"vocabulary": ("embed", "head"), "attention": ("attention.",), "SwiGLU": ("mlp.",)}
shares, labels = {kind: [] for kind in kinds}, []
for name, config in published.items():
    with torch.device("meta"):
        sizes = {key: p.numel() for key, p in Llama(config).named_parameters()}
    total = sum(sizes.values())
    labels.append(f"{name}\n{total:,}")
    for kind, words in kinds.items():
        part = sum(n for key, n in sizes.items() if any(word in key for word in words))
        shares[kind].append(100 * part / total)

fig, ax = plot.plt.subplots(figsize=(8.5, 3.6))
left = [0.0] * len(labels)
for (kind, values), color, hatch in zip(
    shares.items(), plot.COLORS[:3], ("", "//", ""), strict=True
):
    bars = ax.barh(
        labels, values, left=left, color=color, hatch=hatch, edgecolor="white", label=kind
    )
    ax.bar_label(
        bars,
        [f"{v:.0f}" if v > 3 else "" for v in values],
        label_type="center",
        fontsize=8,
        color="black" if hatch else "white",
    )
    left = [a + b for a, b in zip(left, values, strict=True)]
ax.invert_yaxis()
ax.set(xlabel="share of the parameters (%)", xlim=(0, 100))
ax.set_title("where the parameters are", pad=24)
ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 0.99))
plot.caption(
    fig,
    "Your own Llama, built on the meta device from published configurations; norms are "
    "too few to be seen. The same vocabulary of 32,000 takes 30 % of LLaMA-160M's parameters, "
    "4 % of LLaMA-7B's and less than 1 % of Llama-2-70B's.",
)
plot.plt.show()

# %% [markdown]
# ## Other people's weights
#
# A file of weights is a dict of names and tensors. Hugging Face's Llama calls them thus; yours are
# in the second column.
#
# | Hugging Face | here |
# |---|---|
# | `model.embed_tokens.weight` | `embed.weight` |
# | `model.layers.3.input_layernorm.weight` | `blocks.3.attention_norm.weight` |
# | `model.layers.3.self_attn.q_proj.weight`, `k_proj`, `v_proj`, `o_proj` | `blocks.3.attention.q.weight`, `k`, `v`, `o` |
# | `model.layers.3.post_attention_layernorm.weight` | `blocks.3.mlp_norm.weight` |
# | `model.layers.3.mlp.gate_proj.weight`, `up_proj`, `down_proj` | `blocks.3.mlp.gate.weight`, `up`, `down` |
# | `model.norm.weight` | `norm.weight` |
# | `lm_head.weight` | `head.weight` |
#
# (`post_attention_layernorm` stands *before* the gated layer, and after attention. The name has
# confused everyone once.)
#
# The shapes are the same, and so is the rotary layout: both are half-split. Meta's original files
# are interleaved, and converting those permutes the rows of $W_q$ and $W_k$ (lesson 08).
#
# The names are easy. The judgment is in what does **not** fit, and it must be loud: a tensor that
# is missing leaves random numbers in the model, one that is left over belongs to a model you did
# not build. Two leftovers are harmless, and known: `….rotary_emb.inv_freq`, a table of frequencies
# that old files carry; and the `lm_head.weight` of a tied model, where it is the embedding once
# more. *If* it is: a different matrix under that name means that the model was not tied.


# %% exercise="rename_state_dict" minutes=20 difficulty=2
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Hugging Face's names → this lesson's. The tensors themselves are passed on, not copied.

    The result has exactly the names of Llama(config).state_dict(). Names ending in
    "rotary_emb.inv_freq" are passed over, and so is the lm_head.weight of a tied config if it
    equals the embedding in every number; a ValueError says so if it does not.
    ValueError if names are missing or unexpected (a tied file with a head and no embedding lacks
    the embedding): its message contains all of them, as they are called in hf_state. hf_state is
    not changed.
    """
    ### BEGIN SOLUTION
    given = {
        name: tensor
        for name, tensor in hf_state.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError(
            "lm_head.weight differs from model.embed_tokens.weight: this model is not tied"
        )
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(
            f"missing: {', '.join(missing) or 'nothing'}; unexpected: "
            f"{', '.join(unexpected) or 'nothing'}"
        )
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    """{Hugging Face's name: ours} of every tensor of a model."""
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {
            f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight"
            for theirs, ours in inside.items()
        }
    return names
    ### END SOLUTION


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """This lesson's names → Hugging Face's: the inverse. A tied model has no lm_head.weight.

    ValueError if names are missing or unexpected, with all of them, as they are called in `state`.
    """
    ### BEGIN SOLUTION
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(
            f"missing: {', '.join(missing) or 'nothing'}; unexpected: "
            f"{', '.join(unexpected) or 'nothing'}"
        )
    return {theirs: state[ours] for ours, theirs in names.items()}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: replacing text, or making a table?</summary>
#
# A chain of `str.replace` renames whatever it happens to meet ("norm" is in five names, "attention"
# in "post_attention_layernorm"). A table of all names that a config implies gives both directions,
# and missing and unexpected fall out as two set differences.
# </details>

# %% check="rename_state_dict" points=2
config = LlamaConfig(vocab_size=6, hidden_size=4, mlp_size=5, layers=1, heads=2, kv_heads=1)
due_in_layer = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
due_names = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
due_names |= {
    f"model.layers.0.{theirs}.weight": f"blocks.0.{ours}.weight"
    for theirs, ours in due_in_layer.items()
}
small_file = {name: torch.tensor([float(i)]) for i, name in enumerate(due_names)}
result = rename_state_dict(small_file, config)
assert isinstance(result, dict), f"a dict is asked for; yours is {type(result).__name__}"
wrong = {
    theirs: ours for theirs, ours in due_names.items() if result.get(ours) is not small_file[theirs]
}
assert not wrong, f"these tensors did not arrive under their names: {wrong}"
assert set(result) == set(due_names.values()), (
    f"names too many: {set(result) - set(due_names.values())}"
)
round_trip = to_hugging_face(result, config)
assert isinstance(round_trip, dict), (
    f"to_hugging_face returns a dict; yours is {type(round_trip).__name__}"
)
assert set(round_trip) == set(small_file), "to_hugging_face should give the same names back"
### BEGIN HIDDEN TESTS
for layers, tied in [(1, True), (3, False), (12, False), (11, True)]:
    config = LlamaConfig(
        vocab_size=6, hidden_size=4, mlp_size=5, layers=layers, heads=2, kv_heads=1, tied=tied
    )
    due_names = {"model.embed_tokens.weight": "embed.weight"}
    due_names |= {"model.norm.weight": "norm.weight"}
    due_names |= {} if tied else {"lm_head.weight": "head.weight"}
    for i in range(layers):
        due_names |= {
            f"model.layers.{i}.{theirs}.weight": f"blocks.{i}.{ours}.weight"
            for theirs, ours in due_in_layer.items()
        }
    whole_file = {name: torch.tensor([float(i)]) for i, name in enumerate(due_names)}
    before = dict(whole_file)
    result = rename_state_dict(whole_file, config)
    assert [(name, id(t)) for name, t in whole_file.items()] == [
        (name, id(t)) for name, t in before.items()
    ], "hf_state was changed: work on a copy of the dict"
    assert set(result) == set(due_names.values()), (
        f"{layers} layers, {'tied' if tied else 'untied'}: the names differ by "
        f"{set(result) ^ set(due_names.values())}"
    )
    wrong = [theirs for theirs, ours in due_names.items() if result[ours] is not whole_file[theirs]]
    assert not wrong, f"{layers} layers: {wrong} went elsewhere"
    before = dict(result)
    round_trip = to_hugging_face(result, config)
    assert list(result) == list(before), "to_hugging_face changed its argument"
    assert {name: id(t) for name, t in round_trip.items()} == {
        name: id(t) for name, t in whole_file.items()
    }, f"{layers} layers: the way back is not the inverse"
### END HIDDEN TESTS

# %% check="rename_state_dict" points=2
config = LlamaConfig(vocab_size=6, hidden_size=4, mlp_size=5, layers=2, heads=2, kv_heads=1)
due_names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
for i in range(2):
    due_names += [
        f"model.layers.{i}.{part}.weight"
        for part in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
whole_file = {name: torch.ones(1) for name in due_names}
rename_state_dict(whole_file, config)  # this one is whole
lacking = {name: t for name, t in whole_file.items() if name != "model.layers.1.mlp.up_proj.weight"}
checks.raises(
    ValueError,
    rename_state_dict,
    lacking,
    config,
    because="a tensor is missing",
    mentions="model.layers.1.mlp.up_proj.weight",
)
checks.raises(
    ValueError,
    rename_state_dict,
    whole_file | {"model.layers.2.mlp.up_proj.weight": torch.ones(1)},
    config,
    because="the file has a layer more than the config",
    mentions="model.layers.2.mlp.up_proj.weight",
)
### BEGIN HIDDEN TESTS
both = lacking | {
    "model.layers.0.self_attn.q_proj.bias": torch.ones(1),
    "score.weight": torch.ones(1),
}
both.pop("model.norm.weight")
for name in (
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "score.weight",
    "model.norm.weight",
):
    checks.raises(
        ValueError,
        rename_state_dict,
        both,
        config,
        because="names are missing and unexpected at once: list all of them",
        mentions=name,
    )
checks.raises(
    ValueError,
    rename_state_dict,
    {},
    config,
    because="everything is missing",
    mentions="lm_head.weight",
)
no_head = {name: t for name, t in whole_file.items() if name != "lm_head.weight"}
checks.raises(
    ValueError,
    rename_state_dict,
    no_head,
    config,
    because="an untied model needs its head",
    mentions="lm_head.weight",
)
# What is known to be harmless.
frequencies = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
for old in (frequencies, ["model.rotary_emb.inv_freq"], ["rotary_emb.inv_freq"]):
    result = rename_state_dict(whole_file | {name: torch.ones(1) for name in old}, config)
    assert len(result) == len(whole_file), f"{old} are no weights; yours are {sorted(result)}"
for name in ("model.rotary_emb.scale", "model.rotary_emb.inv_freq.weight", "inv_freq"):
    checks.raises(
        ValueError,
        rename_state_dict,
        whole_file | {name: torch.ones(1)},
        config,
        because="only names that end in rotary_emb.inv_freq are passed over",
        mentions=name,
    )
tied = LlamaConfig(
    vocab_size=6, hidden_size=4, mlp_size=5, layers=2, heads=2, kv_heads=1, tied=True
)
same = rename_state_dict(whole_file, tied)
assert set(same) == set(rename_state_dict(whole_file, config)) - {"head.weight"}, (
    "a tied model's lm_head.weight is its embedding: pass over it"
)
assert len(rename_state_dict(no_head, tied)) == len(no_head), (
    "a tied model's file may lack lm_head.weight"
)
checks.raises(
    ValueError,
    rename_state_dict,
    whole_file | {"lm_head.weight": torch.zeros(1)},
    tied,
    because="this head is another matrix than the embedding: the model is not tied",
)
checks.raises(
    ValueError,
    rename_state_dict,
    whole_file | {"lm_head.weight": torch.ones(1) + 1e-6},
    tied,
    because="this head differs from the embedding by a millionth: the model is not tied",
)
checks.raises(
    ValueError,
    rename_state_dict,
    {name: t for name, t in whole_file.items() if name != "model.embed_tokens.weight"},
    tied,
    because="a tied model's file has a head and lacks the embedding",
    mentions="model.embed_tokens.weight",
)
ours = rename_state_dict(whole_file, config)
lacking = {name: t for name, t in ours.items() if name != "blocks.0.mlp.gate.weight"}
for name in ("blocks.0.mlp.gate.weight", "extra.weight"):
    checks.raises(
        ValueError,
        to_hugging_face,
        lacking | {"extra.weight": torch.ones(1)},
        config,
        because="a tensor is missing and another unexpected: list both",
        mentions=name,
    )
checks.raises(
    ValueError,
    to_hugging_face,
    ours | {"extra.weight": torch.ones(1)},
    config,
    because="a tensor is unexpected",
    mentions="extra.weight",
)
checks.raises(
    ValueError,
    to_hugging_face,
    ours,
    tied,
    because="a tied model has no head",
    mentions="head.weight",
)
### END HIDDEN TESTS

# %% [markdown]
# ### A trained model in your code
#
# The course ships a model of six million parameters that was trained on Python's documentation and
# library. Its tensors are named as in Hugging Face's `LlamaModel`, so your function can take them.
# If every agreement holds, your model and the course's give the same logits for any text, up to
# rounding.

# %% tags=["experiment"]
theirs, tokenizer = models.load("small")
c = theirs.config
shape = (c.vocab_size, c.hidden_size, c.mlp_size, c.layers, c.heads, c.kv_heads)
small = LlamaConfig(*shape, tied=True, rope_theta=c.rope_theta, eps=c.eps)
hf_state = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
pretrained = Llama(small).to(profile.device).eval()
pretrained.load_state_dict(rename_state_dict(hf_state, small))

text = "The for statement is used to iterate over the elements of a sequence (such as a string"
tokens = torch.tensor([[tokenizer.eos, *tokenizer.encode(text)]], device=profile.device)
with torch.no_grad():
    mine, reference = pretrained(tokens), theirs(tokens)
print(
    f"{tokens.shape[1]} tokens, logits up to {float(reference.abs().max()):.1f}; "
    f"largest difference {float((mine - reference).abs().max()):.1e}"
)
best = mine[0, -1].softmax(-1).topk(5)
likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
print(
    "after “…such as a string”: "
    + ", ".join(f"{tokenizer.decode([i])!r} {100 * p:.0f} %" for i, p in likely)
)

# %% [markdown]
# ## From logits to a token
#
# The model gives a score to each of $V$ tokens. Drawing from the plain softmax takes, every so
# often, one of thousands of tokens that are each nearly impossible and together are not; a text
# derails at the first of them. So the distribution is sharpened and its tail cut. With logits
# $\ell$, and in this order (Hugging Face's):
#
# 1. **Temperature** $\tau$: $p_i \propto e^{\ell_i/\tau}$. Below 1 sharper, above 1 flatter; as
#    $\tau\to0$ all weight goes to the largest, which is called greedy.
# 2. **Top-k**: the $k$ likeliest stay.
# 3. **Top-p**: the fewest likeliest tokens whose probabilities sum to at least $p$ stay. The token
#    that **crosses** the threshold stays too; otherwise a token of probability 0.95 would be
#    dropped at $p = 0.9$, and nothing would be left.
# 4. **Min-p**: tokens with at least the share $m$ of the likeliest one's probability stay,
#    $p_i \ge m\,\max_j p_j$.
#
# After each step what is left is renormalized, and each looks at what the one before left, so the
# order matters. Take probabilities ½, ¼, ¼. Top-p of 0.7 keeps two tokens, since ½ + ¼ passes it.
# After $\tau = \tfrac12$ they are $\tfrac23, \tfrac16, \tfrac16$, and two are needed still; after
# $\tau = \tfrac13$ they are $\tfrac45, \tfrac1{10}, \tfrac1{10}$ and one is enough.
#
# Min-p alone is indifferent to what was cut before it. Dividing by the maximum removes the
# normalization:
#
# $$ \frac{p_i}{\max_j p_j} = e^{(\ell_i - \ell_{\max})/\tau} \ge m \quad\Longleftrightarrow\quad \ell_i \ge \ell_{\max} + \tau\ln m , $$
#
# a plain threshold below the best logit, which needs neither a softmax nor a sort. It adapts: a
# sure model leaves few tokens above it, an unsure one many.


# %% exercise="sample" minutes=20 difficulty=2
def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits divided by the temperature, with −inf for the tokens that the filters drop.
    Temperature first, then top-k, top-p and min-p, each on what the one before left, renormalized.
    None leaves a filter out.

    logits (…, vocab), any floating format, may hold −inf; unchanged. Returns float32 (float64 for
    float64), same shape. top_k ≥ 1: the k largest stay, all of them if there are fewer; of equal
    ones at the edge all stay. 0 < top_p ≤ 1: the fewest likeliest tokens whose probabilities sum to
    at least top_p stay; at least one. 0 ≤ min_p ≤ 1: those with at least min_p times the largest
    probability stay.
    ValueError for anything outside these bounds, and for a temperature that is not positive.
    """
    ### BEGIN SOLUTION
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], not {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p  # what the likelier tokens sum to
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
    ### END SOLUTION


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row: logits (batch, vocab) → (batch,), int64.

    Drawn from the softmax of filter_logits(…) with `generator` (None = PyTorch's default).
    Temperature 0 is greedy: the largest logit, the first of equal ones, whatever the filters say
    (whether invalid ones are refused is left open); nothing is drawn. ValueError below 0.
    """
    ### BEGIN SOLUTION
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: back from the sorted order</summary>
#
# `sort` returns values and the order. `zeros.scatter(-1, order, x_sorted)` puts sorted things back
# where they came from.
# </details>
#
# <details><summary>Hint: the token that crosses</summary>
#
# Ask for each token: what do the *likelier* ones sum to without me? If that is already $p$ or more,
# I am not needed.
# </details>

# %% check="sample" points=2
logits = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log()
gone = -torch.inf
kept = filter_logits(logits, top_k=2)
checks.close(
    kept,
    torch.tensor([logits[0], logits[1], gone, gone], dtype=torch.float64),
    what="probabilities 0.5, 0.25, 0.15, 0.1 with top_k = 2",
    mistakes={
        "keeping one fewer": torch.tensor([logits[0], gone, gone, gone], dtype=torch.float64),
        "keeping one more": torch.tensor([*logits[:3], gone], dtype=torch.float64),
    },
)
kept = filter_logits(logits, top_p=0.7)
checks.close(
    kept,
    torch.tensor([logits[0], logits[1], gone, gone], dtype=torch.float64),
    what="the same with top_p = 0.7",
    mistakes={
        "dropping the token that crosses the threshold": torch.tensor(
            [logits[0], gone, gone, gone], dtype=torch.float64
        ),
        "ignoring top_p": logits,
    },
)
kept = filter_logits(logits, min_p=0.25)
checks.close(
    kept,
    torch.tensor([*logits[:3], gone], dtype=torch.float64),
    what="the same with min_p = 0.25",
    hint="0.25 times the largest probability is 0.125",
    mistakes={
        "min_p as a probability, not as a share of the largest": torch.tensor(
            [logits[0], logits[1], gone, gone], dtype=torch.float64
        )
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(20)


def expected_logits(row, temperature, top_k, top_p, min_p):
    """The specification, token by token, in Python's floats."""
    scaled = [l / temperature for l in row]
    alive = set(range(len(row)))

    def p(i):
        top = max(scaled[j] for j in alive)
        return math.exp(scaled[i] - top) / sum(math.exp(scaled[j] - top) for j in alive)

    if top_k is not None:
        edge = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        alive = {i for i in alive if row[i] >= edge}
    if top_p is not None and top_p < 1:
        share, total, keep = {i: p(i) for i in alive}, 0.0, set()
        for i in sorted(alive, key=lambda i: -row[i]):
            if total < top_p:
                keep.add(i)
            total += share[i]
        alive = keep
    if min_p is not None:
        largest = max(p(i) for i in alive)
        alive = {i for i in alive if p(i) >= min_p * largest}
    return [scaled[i] if i in alive else -math.inf for i in range(len(row))]


settings = [(0.5, None, None, None), (1.3, 6, 0.77, 0.21), (0.8, 5, 0.93, 0.07)]
settings += [(2.0, 3, None, None), (1.0, 1, None, None), (1.0, 500, None, None)]
settings += [(t, None, p, None) for t, p in [(0.4, 0.83), (2.5, 0.83), (1.0, 1.0), (1.0, 1e-6)]]
settings += [(t, None, None, m) for t, m in [(0.6, 0.13), (1.7, 0.13), (1.0, 0.0), (1.0, 1.0)]]
for shape in [(23,), (4, 17), (2, 3, 9), (3, 1)]:
    for temperature, top_k, top_p, min_p in settings:
        logits = checks.randn(*shape, generator=g, dtype=torch.float64, scale=2.0)
        with checks.unchanged(logits=logits):
            found = filter_logits(logits, temperature, top_k, top_p, min_p)
        rows = [
            expected_logits(row, temperature, top_k, top_p, min_p)
            for row in logits.reshape(-1, shape[-1]).tolist()
        ]
        checks.close(
            found,
            torch.tensor(rows, dtype=torch.float64).view(shape),
            what=f"logits {shape} with temperature {temperature}, top_k {top_k}, top_p {top_p}, "
            f"min_p {min_p}",
            dtype=torch.float64,
            hint="Temperature first, then top-k, top-p, min-p, each on what is left, renormalized",
        )
# An order of filters shows here: top-p before temperature would keep three, before top-k two.
ordered = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
checks.close(
    filter_logits(ordered, temperature=0.5, top_p=0.8).isfinite(),
    torch.tensor([True, True, False, False]),
    what="which of 0.4, 0.3, 0.2, 0.1 stay at temperature 0.5, top_p 0.8",
    mistakes={"top-p before the temperature": torch.tensor([True, True, True, False])},
)
checks.close(
    filter_logits(ordered, top_k=3, top_p=0.75).isfinite(),
    torch.tensor([True, True, False, False]),
    what="which of 0.4, 0.3, 0.2, 0.1 stay with top_k 3, top_p 0.75",
    hint="Among the three that top-k leaves, the first two hold 0.7/0.9 = 0.78",
    mistakes={
        "top-p on probabilities that are not renormalized": torch.tensor([True, True, True, False])
    },
)
# Ties at the edge of top-k, −inf on the way in, half precision.
checks.close(
    filter_logits(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), top_k=2),
    torch.tensor([gone, 3.0, 2.0, 2.0, gone]),
    what="logits 1, 3, 2, 2, 0 with top_k = 2",
    hint="Of equal ones at the edge all stay",
)
checks.close(
    filter_logits(torch.tensor([gone, 1.0, gone, 0.0]), top_k=3, top_p=0.9, min_p=0.1),
    torch.tensor([gone, 1.0, gone, 0.0]),
    what="logits with −inf",
)
for dtype in (torch.float16, torch.bfloat16):
    logits = checks.randn(4, 33, generator=g, scale=3.0).to(dtype)
    checks.close(
        filter_logits(logits, temperature=0.7),
        logits.double() / 0.7,
        what=f"logits in {dtype} at temperature 0.7",
        dtype=torch.float32,
        hint="Half precision is widened to float32 before anything is computed",
    )
# A threshold that is met exactly: 1/2 + 1/2, and three quarters.
for shape, top_p, left in [((2,), 0.5, 1), ((4,), 0.75, 3), ((3, 8), 0.125, 1), ((8,), 0.5, 4)]:
    found = filter_logits(torch.zeros(shape), top_p=top_p).isfinite().sum(-1)
    checks.close(
        found,
        torch.full(shape[:-1], left),
        what=f"the number of {shape[-1]} equal tokens that stay with top_p = {top_p}",
        hint="The fewest tokens whose probabilities sum to at least top_p",
    )
### END HIDDEN TESTS

# %% check="sample" points=1
checks.raises(
    ValueError,
    filter_logits,
    torch.zeros(3),
    temperature=0.0,
    because="a temperature of 0 cannot divide",
)
checks.raises(
    ValueError, filter_logits, torch.zeros(3), top_p=0.0, because="top_p = 0 keeps nothing"
)
greedy = sample(torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]]), temperature=0.0)
checks.close(
    greedy, torch.tensor([1, 0]), what="temperature 0: the largest logit, the first of equal ones"
)
### BEGIN HIDDEN TESTS
for setting in (
    {"temperature": -1.0},
    {"top_k": 0},
    {"top_k": -3},
    {"top_p": 1.5},
    {"top_p": -0.1},
    {"min_p": -0.2},
    {"min_p": 1.1},
):
    checks.raises(
        ValueError, filter_logits, torch.zeros(3), **setting, because=f"{setting} is out of bounds"
    )
checks.raises(
    ValueError,
    sample,
    torch.zeros(1, 3),
    temperature=-0.5,
    because="a temperature below 0 would prefer the least likely",
)
g = checks.generator(21)
logits = checks.randn(50, 31, generator=g)
for temperature in (0.0, 0.7):
    with checks.unchanged(logits=logits):
        sample(logits, temperature, top_k=5, top_p=0.9, min_p=0.01)
checks.close(
    sample(logits, temperature=0.0, top_k=3, top_p=0.5, min_p=0.5),
    logits.double().max(-1).indices,
    what="greedy tokens of 50 rows",
)
checks.close(
    sample(logits.half(), temperature=0.0, generator=None),
    logits.half().float().max(-1).indices,
    what="greedy tokens of float16 logits",
)
checks.close(
    sample(logits, temperature=1.0, top_k=1),
    logits.argmax(-1),
    what="top_k = 1, which leaves one token",
)
checks.close(
    sample(logits, temperature=1e-6),
    logits.argmax(-1),
    what="a temperature of a millionth, which leaves one token",
)
source = torch.Generator(profile.device).manual_seed(1)
before = source.get_state()
sample(logits, temperature=0.0, generator=source)
assert torch.equal(source.get_state(), before), "at temperature 0 nothing is drawn"
### END HIDDEN TESTS

# %% check="sample" points=2
p = torch.tensor([0.5, 0.25, 0.15, 0.1])
draws = sample(p.log().expand(20_000, 4), generator=checks.generator(22))
assert (draws.shape, draws.dtype) == ((20_000,), torch.int64), (
    f"one int64 token for each row is asked for; yours are {tuple(draws.shape)}, {draws.dtype}"
)
share = draws.bincount(minlength=4) / 20_000
assert (share - p).abs().max() < 0.025, (
    f"of 20,000 draws from 0.5, 0.25, 0.15, 0.1 yours fall into shares "
    f"{[round(s, 3) for s in share.tolist()]}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(23)
count = 40_000
for temperature, top_k, top_p, min_p in [
    (1.0, None, None, None),
    (0.6, None, None, None),
    (1.5, 4, None, None),
    (0.7, None, 0.75, None),
    (1.4, None, None, 0.2),
    (1.2, 7, 0.9, 0.05),
]:
    row = torch.randn(12, generator=g, dtype=torch.float64)
    # The expected distribution, token by token.
    order = sorted(range(12), key=lambda i: -float(row[i]))
    weight = {i: math.exp(float(row[i]) / temperature) for i in order[:top_k]}
    if top_p is not None:
        total, seen = sum(weight.values()), 0.0
        for i in order[:top_k]:
            inside = weight.pop(i)
            if seen < top_p * total:
                weight[i] = inside
            seen += inside
    if min_p is not None:
        weight = {i: w for i, w in weight.items() if w >= min_p * max(weight.values())}
    rows = row.float().to(profile.device).expand(count, 12)
    seed = int(torch.randint(2**31, (), generator=g))
    source = torch.Generator(profile.device).manual_seed(seed)
    draws = sample(rows, temperature, top_k, top_p, min_p, source)
    found = draws.cpu().bincount(minlength=12)
    for i in range(12):
        p = weight.get(i, 0.0) / sum(weight.values())
        spread = 6 * math.sqrt(count * p * (1 - p))  # passed once in 500 million
        assert abs(int(found[i]) - count * p) <= spread + 1e-9, (
            f"with temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p} a token "
            f"of probability {p:.4f} is drawn {int(found[i])} times in {count:,}, expected "
            f"{count * p:.0f} ± {spread:.0f}"
        )
# The generator, and rows that are drawn apart from each other.
flat = torch.zeros(2000, 50, device=profile.device)
if profile.device.type == "cpu":
    checks.uses_generator(lambda source: sample(flat[:100], generator=source), what="sample")
a = sample(flat, generator=torch.Generator(profile.device).manual_seed(1))
assert len(a.unique()) > 40, "all rows get the same token: each is drawn for itself"
### END HIDDEN TESTS

# %% [markdown]
# ### What the filters leave
#
# Two places where the trained model has to go on: after a common word of prose, where much may
# follow, and after the opening of a method, where hardly more than one thing does. Before you run
# it: which of the filters can keep very different numbers of tokens at the two places, which
# cannot?

# %% tags=["experiment", "figure"]
# Figure: what each filter leaves of two distributions
openings = {"in prose": "Note that the", "in code": "class Queue:\n    def __init__("}
cuts = {
    "top_k = 20": {"top_k": 20},
    "top_p = 0.9": {"top_p": 0.9},
    "min_p = 0.1": {"min_p": 0.1},
    "temperature 0.5, top_p = 0.9": {"temperature": 0.5, "top_p": 0.9},
}
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
for ax, (title, text) in zip(axes, openings.items(), strict=True):
    tokens = torch.tensor([[tokenizer.eos, *tokenizer.encode(text)]], device=profile.device)
    with torch.no_grad():
        logits = pretrained(tokens)[0, -1].float().cpu()
    p = logits.softmax(-1).sort(descending=True).values
    ax.plot(range(1, len(p) + 1), p, color="#555555", linestyle="-", linewidth=1.2)
    for i, (name, cut) in enumerate(cuts.items()):
        kept = int(filter_logits(logits, **cut).isfinite().sum())
        ax.plot(
            kept,
            p[kept - 1],
            marker="osD^"[i],
            color=plot.COLORS[i],
            linestyle="none",
            markersize=8,
            label=f"{name}: {kept} left, {100 * float(p[:kept].sum()):.0f} % of the probability",
        )
    ax.set(xscale="log", yscale="log", xlabel="rank of the token", ylim=(1e-8, 100))
    ax.set_yticks([10.0**-n for n in range(0, 9, 2)])
    ax.set_title(f"{title}: “{text.splitlines()[-1].strip()}”")
    ax.legend(fontsize=8, loc="upper right")
axes[0].set_ylabel("probability")
plot.caption(
    fig,
    "Next-token probabilities of the trained model by rank, before any filter, and the last token "
    "that each filter keeps. Top-k keeps 20 tokens at both places; top-p and min-p keep what the "
    "model's own certainty leaves. Sharpening first makes the same top-p keep fewer, or as few.",
)
plot.plt.show()

# %% [markdown]
# ## Generation
#
# One forward pass over the whole prompt (**prefill**), then one token at a time (**decode**), with
# the cache so that a step costs one token's work and not the whole text's. For $n$ new tokens after
# a prompt of $m$ that is $m + n - 1$ tokens through the model in place of
# $\sum_{i=0}^{n-1}(m+i) \approx nm + n^2/2$.
#
# In a batch, prompts have unequal lengths and texts end at different times. Padding goes to the
# left and is masked **in every later step too**: the cache remembers its keys. A row that has
# written its end-of-sequence token is carried along until the others are done, and what it is fed
# then does not matter, since rows do not see one another.


# %% exercise="generate" minutes=25 difficulty=3
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, without the prompt: a list of plain ids each.

    model(tokens, cache=…, attention_mask=…, positions=…) is called as Llama is. prompts: one list
    of ids or more, of any lengths, unchanged; ValueError if one is empty. A text ends with the
    token `eos`, which is its last (None: with none), or after max_new_tokens ≥ 0 (0 writes nothing,
    and whether the model is called then is left open); each row for itself. Tokens come from
    `sample`; with temperature 0 a row does not depend on what else is in the batch.
    All rows go through the model together: one call for the prompts and one for each further token,
    of which only the new tokens are passed in; no call after the last row has ended. No gradients
    are recorded.
    """
    ### BEGIN SOLUTION
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(rows, dtype=torch.long, device=device)
    real = torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None]
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: positions</summary>
#
# Leave them to the model: it counts columns, padding included, and only differences matter. If you
# pass them yourself, so that every prompt begins at 0, then pass them in every later step as well,
# or the first new token jumps ahead by the padding.
# </details>
#
# <details><summary>Hint: the mask grows</summary>
#
# `attention_mask` covers the cache and the new tokens: after each step it gets one more column of
# True.
# </details>


# %% check="generate" points=2
class Counting(nn.Module):
    """Not a language model: it says that after token t comes t + 1 (mod 10), and notes how it was
    called.
    """

    def __init__(self):
        super().__init__()
        self.nothing, self.calls = nn.Parameter(torch.zeros(1)), []

    def forward(self, tokens, cache=None, attention_mask=None, positions=None):
        self.calls.append(tuple(tokens.shape))
        if cache is not None:
            cache.extend(0, *2 * [torch.zeros(len(tokens), 1, tokens.shape[1], 2)])
        return F.one_hot((tokens + 1) % 10, 10) * 5.0 + self.nothing


counting = Counting()
texts = generate(counting, [[3], [1, 5, 6]], 5, eos=9)
assert isinstance(texts, list), f"one list of ids for each prompt is asked for; yours is {texts!r}"
assert texts[0][:1] != [3], "the prompt is not part of the result"
assert texts == [[4, 5, 6, 7, 8], [7, 8, 9]], (
    f"after [3] and [1, 5, 6] come 4 5 6 7 8 and 7 8 9, where eos ends it; yours are {texts}"
)
assert counting.calls == [(2, 3)] + 4 * [(2, 1)], (
    f"the model should be called with the prompts (2, 3) and then with one new token a row (2, "
    f"1), four times; yours: {counting.calls}"
)
### BEGIN HIDDEN TESTS
counting = Counting()
assert generate(counting, [[7], [8], [6, 7]], 50, eos=9) == [[8, 9], [9], [8, 9]], (
    "rows end each at their own eos"
)
assert len(counting.calls) == 2, (
    f"all rows have ended after two calls; yours made {len(counting.calls)}"
)
assert generate(Counting(), [[0]], 12) == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]], (
    "without eos a text ends after max_new_tokens"
)
assert generate(Counting(), [[9, 9]], 3, eos=9) == [[0, 1, 2]], (
    "an eos inside the prompt ends nothing"
)
assert generate(Counting(), [[1], [2]], 0) == [[], []], "max_new_tokens = 0 writes nothing"
assert generate(Counting(), [[8, 9], [1]], 1, eos=0) == [[0], [2]], (
    "token 0 may be eos, and padding must not end anything"
)
texts = generate(Counting(), [[8], [5, 9], [1, 2, 6]], 4, eos=0)
assert texts == [[9, 0], [0], [7, 8, 9, 0]], (
    f"after 8, 9 and 6 come 9 0, 0 and 7 8 9 0, where eos = 0 ends each; yours are {texts}"
)
assert all(type(i) is int for text in texts for i in text), "ids are plain numbers of Python"
given = [[3], [1, 5, 6]]
generate(Counting(), given, 3)
assert given == [[3], [1, 5, 6]], f"the prompts were changed to {given}"
for wrong in ([[]], [[1], []]):
    checks.raises(ValueError, generate, Counting(), wrong, 3, because="a prompt is empty")
grads = []


class Watching(Counting):
    def forward(self, tokens, cache=None, attention_mask=None, positions=None):
        grads.append(torch.is_grad_enabled())
        return super().forward(tokens, cache)


generate(Watching(), [[1]], 2)
assert not any(grads), "gradients are recorded: memory grows with every token"
assert torch.is_grad_enabled(), "gradients stay switched off after generate"
### END HIDDEN TESTS


# %% check="generate" points=3
def random_model(salt: int) -> nn.Module:
    """The course's Llama with large random weights, so that its choices depend on all it sees."""
    shape = {"vocab_size": 40, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2}
    model = models.Llama(models.Config(**shape, mlp_size=48, rope_theta=20.0)).double()
    with torch.no_grad():
        for p in model.parameters():
            source = checks.generator(salt)
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64) * 0.5)
    return model.to(profile.device)


@torch.no_grad()
def without_cache(model: nn.Module, prompt: list[int], count: int, eos=None) -> list[int]:
    """Greedy, token by token, the whole text through the model each time."""
    text = list(prompt)
    while len(text) < len(prompt) + count and text[len(prompt) :][-1:] != [eos]:
        text.append(int(model(torch.tensor([text], device=profile.device))[0, -1].argmax()))
    return text[len(prompt) :]


model = random_model(30)
prompts = [[5, 6, 7, 8], [9], [10, 11]]
alone = [without_cache(model, prompt, 6) for prompt in prompts]
texts = generate(model, prompts[:1], 6)
assert texts == alone[:1], f"one prompt: {texts[0]}, but without a cache {alone[0]}"
texts = generate(model, prompts, 6)
assert texts == alone, (
    f"three prompts of unequal length give {texts}, each alone and without a cache {alone}. Is "
    f"the padding seen, or a position off?"
)
### BEGIN HIDDEN TESTS
g = checks.generator(31)
tested = 0
for salt in range(32, 40):
    if tested == 3:
        break
    model = random_model(salt)
    lengths = [int(n) for n in torch.randint(1, 12, (5,), generator=g)]
    prompts = [torch.randint(0, 40, (n,), generator=g).tolist() for n in lengths]
    alone = [without_cache(model, prompt, 9) for prompt in prompts]
    if len({tuple(text) for text in alone}) == 1:  # a model that always writes the same
        continue
    tested += 1
    with checks.kept(model):
        texts = generate(model, prompts, 9)
    assert texts == alone, (
        f"prompts of lengths {lengths} in one batch give {texts}, each alone and without a cache "
        f"{alone}"
    )
    eos = alone[0][4]  # ends the first row in the middle, others perhaps
    alone = [without_cache(model, prompt, 9, eos) for prompt in prompts]
    texts = generate(model, prompts, 9, eos=eos)
    assert texts == alone, f"with eos = {eos}: {texts}, each alone {alone}"
    assert generate(model, prompts[::-1], 9, eos=eos) == alone[::-1], (
        "the order of the prompts changes what is written"
    )
long, short = torch.randint(0, 40, (60,), generator=g).tolist(), [7]
assert generate(model, [short, long], 5) == [without_cache(model, p, 5) for p in (short, long)], (
    "prompts of 1 and 60 tokens in one batch"
)
### END HIDDEN TESTS


# %% check="generate" points=1
class Fixed(nn.Module):
    """The same distribution over four tokens, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())

    def forward(self, tokens, cache=None, attention_mask=None, positions=None):
        return self.logits.expand(*tokens.shape, 4)


texts = generate(Fixed(), [[0]] * 3000, 2, temperature=1.0, generator=checks.generator(35))
share = torch.tensor(texts).flatten().bincount(minlength=4) / 6000
assert (share - torch.tensor([0.4, 0.3, 0.2, 0.1])).abs().max() < 0.04, (
    f"of 6000 tokens drawn from 0.4, 0.3, 0.2, 0.1 yours fall into shares "
    f"{[round(s, 3) for s in share.tolist()]}"
)
### BEGIN HIDDEN TESTS
for setting, expected in [
    ({"temperature": 0.5}, [16, 9, 4, 1]),
    ({"temperature": 1.0, "top_k": 2}, [4, 3, 0, 0]),
    ({"temperature": 1.0, "top_p": 0.8}, [4, 3, 2, 0]),
    ({"temperature": 1.0, "min_p": 0.6}, [4, 3, 0, 0]),
]:
    texts = generate(Fixed(), [[0]] * 4000, 2, **setting, generator=checks.generator(36))
    share = torch.tensor(texts).flatten().bincount(minlength=4) / 8000
    expected = torch.tensor(expected) / sum(expected)
    bound = 6 * (expected * (1 - expected) / 8000).sqrt() + 1e-9
    assert bool(((share - expected).abs() <= bound).all()), (
        f"with {setting} the shares should be {[round(s, 3) for s in expected.tolist()]}; yours "
        f"are {[round(s, 3) for s in share.tolist()]}"
    )
(text,) = generate(Fixed(), [[0]], 60, temperature=1.0, generator=checks.generator(37))
assert len(set(text)) > 1, f"60 tokens drawn from 0.4, 0.3, 0.2, 0.1 are all {text[0]}"
checks.uses_generator(
    lambda source: generate(Fixed(), [[0], [1, 2]], 40, temperature=1.0, generator=source),
    what="generate",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Training
#
# The loop is lesson 06's: AdamW, warm-up and cosine, clipping. Two decisions remain, and a
# property.
#
# **What decays.** Weight decay pulls a parameter towards 0. For a matrix inside the blocks that is
# a mild and useful prior. For a norm's weight 0 is a bad place: it is a scale that wants to stay
# near 1, and decay switches features off. For an embedding it is worse. A row of the input
# embedding gets a gradient only when its token occurs, and would decay at *every* step: a token
# that comes once in 10,000 steps loses $1 - (1 - \eta\lambda)^{10000}$ of its row in between, 26 %
# at $\eta\lambda = 3\cdot10^{-5}$. So norms and embeddings form a group without decay. An untied
# head is an ordinary matrix and decays; a tied one is the embedding and does not.
#
# **When the rate is highest.** Steps count from 0. With $w$ steps of warm-up of $S$ in all,
#
# $$ \eta_t = \begin{cases} \eta\,(t+1)/w & t < w, \\[2pt] \eta_{\min} + \tfrac12(\eta - \eta_{\min})\Big(1 + \cos\pi\,\dfrac{t - (w-1)}{S - w}\Big) & t \ge w, \end{cases} $$
#
# so that the first step already learns something, step $w - 1$ is the peak and step $S - 1$, the
# last, runs at $\eta_{\min}$.


# %%
@dataclass(frozen=True)
class TrainOptions:
    steps: int = 200  # of the whole run, whatever part of it is done at a time
    batch: int = 8
    context: int = 64  # tokens in a window, of which each predicts the next
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    warmup: int = 20  # from 1 to steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # the largest norm of all gradients together
    seed: int = 0  # of the order of the data


# %% exercise="optimizer" minutes=15 difficulty=2 path="more"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for torch.optim.AdamW: {"params": [...], "weight_decay": weight_decay}, then the
    same with 0.0.

    Without decay: every parameter of an nn.Embedding, also where a head shares it, and everything
    with fewer than two axes (norms, biases, scalars). All others decay. Each parameter is in one
    group, once; frozen ones (requires_grad False) in none.
    """
    ### BEGIN SOLUTION
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    embeddings = {id(table.weight) for table in tables}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():  # a shared parameter comes once
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups
    ### END SOLUTION


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of a step, counted from 0: see the formula above. With warmup equal to steps the
    rate only rises.
    """
    ### BEGIN SOLUTION
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a parameter that two modules share</summary>
#
# `model.parameters()` gives it once, and `model.modules()` finds every embedding. What tells you
# that two names stand for one tensor is `is`, or `id`; comparing values with `==` or `in` does not.
# </details>


# %% check="optimizer" points=1
shape = models.Config(vocab_size=7, hidden_size=8, layers=1, heads=2, kv_heads=1, mlp_size=6)
tied = models.Llama(shape)
found_groups = parameter_groups(tied, 0.1)
assert isinstance(found_groups, list), (
    f"a list of two groups is asked for; yours is {type(found_groups).__name__}"
)
assert [group["weight_decay"] for group in found_groups] == [0.1, 0.0], (
    f"the groups decay by 0.1 and 0.0; yours by {[group['weight_decay'] for group in found_groups]}"
)
names = {id(p): name for name, p in tied.named_parameters()}
still = sorted(names[id(p)] for p in found_groups[1]["params"])
assert still == [
    "embed_tokens.weight",
    "layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight",
    "norm.weight",
], f"without decay should be the embedding and three norms; yours are {still}"


### BEGIN HIDDEN TESTS
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(4, 3, bias=False)  # shares with an embedding that comes after it
        self.token, self.place = nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.before.weight = self.place.weight
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False), nn.Conv1d(4, 4, 1)
        )
        self.tied = nn.Linear(4, 5, bias=True)
        self.tied.weight = self.token.weight
        self.untied = nn.Linear(4, 5, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))  # no axes at all
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


odd = Odd()
found_groups = parameter_groups(odd, 0.3)
still = {"token.weight", "before.weight", "body.0.bias", "body.1.weight", "body.1.bias"}
still |= {"body.3.bias", "tied.bias", "scale"}
expected = [{"body.0.weight", "body.2.weight", "body.3.weight", "untied.weight"}, still]
names = {id(p): name for name, p in odd.named_parameters()}
for group, wanted, decay in zip(found_groups, expected, (0.3, 0.0), strict=True):
    found = [names[id(p)] for p in group["params"]]
    assert group["weight_decay"] == decay, (
        f"the groups' decay should be 0.3 and 0.0, yours is "
        f"{[group['weight_decay'] for group in found_groups]}"
    )
    assert len(found) == len(set(found)), f"a parameter is in the group twice: {sorted(found)}"
    assert set(found) == wanted, (
        f"the group with decay {decay} should hold {sorted(wanted)}; yours holds {sorted(found)}"
    )
# AdamW refuses a parameter that two groups hold.
optimizer = torch.optim.AdamW(found_groups, lr=1e-3)
### END HIDDEN TESTS

# %% check="optimizer" points=1
options = TrainOptions(steps=12, warmup=4, learning_rate=0.8, min_learning_rate=0.2)
rates = [learning_rate(step, options) for step in range(12)]
checks.close(
    rates[0],
    0.2,
    what="the rate of step 0",
    hint="A quarter of the peak: one of four warm-up steps",
    mistakes={"starting from 0": 0.0},
)
checks.close(
    rates[3],
    0.8,
    what="the rate of step 3, the last of the warm-up",
    mistakes={"reaching the peak a step late": 0.6},
)
checks.close(rates[7], 0.5, what="the rate of step 7, half-way down")
checks.close(
    rates[11], 0.2, what="the rate of the last step", hint="Step S − 1 runs at the lowest rate"
)
### BEGIN HIDDEN TESTS
for steps, warmup, high, low in [
    (100, 1, 1e-3, 0.0),
    (10, 9, 3e-4, 3e-5),
    (2, 1, 1.0, 0.1),
    (57, 13, 6e-4, 6e-5),
]:
    options = TrainOptions(steps=steps, warmup=warmup, learning_rate=high, min_learning_rate=low)
    expected = [high * (step + 1) / warmup for step in range(warmup)]
    for step in range(warmup, steps):  # (1 + cos 2x) / 2 is cos² x
        share = math.cos(math.pi / 2 * (step - warmup + 1) / (steps - warmup)) ** 2
        expected.append(low + (high - low) * share)
    checks.close(
        torch.tensor([learning_rate(step, options) for step in range(steps)], dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        what=f"the rates of {steps} steps with {warmup} of warm-up",
    )
options = TrainOptions(steps=5, warmup=5, learning_rate=1.0)
checks.close(learning_rate(4, options), 1.0, what="the last rate where warm-up is the whole run")
### END HIDDEN TESTS

# %% [markdown]
# ### The run, and its state
#
# **Exact resume.** Training is a map $s_{t+1} = f(s_t)$, and a run is resumed exactly if and only
# if the checkpoint holds all that $f$ reads: the weights and buffers; Adam's two moments and its
# own count of steps; the step, which sets the learning rate; and the two streams of random numbers,
# the one that picks the windows and PyTorch's default one, from which dropout draws. "Exactly" is
# meant to the last bit, which is what makes it testable: floating-point addition is deterministic
# if it is done in the same order, so on the same machine, with as many threads, a resumed run has
# no excuse for a difference in the seventh digit. (On a GPU some kernels add in any order; then
# equality holds only with `torch.use_deterministic_algorithms`.)
#
# Why care? The classic symptom of a forgotten piece is a bump of the loss at each restart, which on
# a cluster means several a day. And a bug at step 90,000 can be studied only if step 89,900 can be
# played again.
#
# One trap is Python's. `model.state_dict()` holds the live tensors, not copies. A checkpoint made
# of it changes while training goes on.


# %% exercise="train" minutes=45 difficulty=3 path="more"
def train(
    model: nn.Module,
    tokens: Tensor,
    options: TrainOptions,
    checkpoint: dict | None = None,
    until: int | None = None,
) -> tuple[list[float], dict]:
    """Trains `model` in place on `tokens` (n,), int64, n > context; returns (the loss of each step
    done, a checkpoint). `model` is handed in in training mode.

    Step t, counted from 0: `batch` windows of context + 1 tokens begin anywhere in `tokens`, every
    place equally likely, drawn from a torch.Generator of options.seed; the loss is the mean
    cross-entropy of model(windows[:, :-1]), logits (batch, context, vocab), with the token that
    follows each. Gradients are set to zero, whatever they were; computed; clipped so that the norm
    of all together is at most options.clip; and AdamW steps (parameter_groups, options.betas, eps
    1e-8) at learning_rate(t, options). Tokens may live on another device than the model.

    Without `checkpoint` the run starts at step 0 with the model as it is. With one, made by an
    earlier call, the model (all of its state_dict, buffers too), the optimizer, the step, the order
    of the data and PyTorch's default random numbers are set to what they were, and the run goes on
    as if it had never stopped: the same bits. It ends after step `until` − 1, or with
    options.steps; where the checkpoint is there already, or beyond, no step is done and its own
    step stays.

    The checkpoint holds only tensors, numbers, text, dicts and lists, so that torch.load(…,
    weights_only=True) reads it back; it does not change when training goes on.
    """
    ### BEGIN SOLUTION
    device = next(model.parameters()).device
    groups = parameter_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)  # (batch, context + 1)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {
        "step": max(start, end),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "order": order.get_state(),
        "random": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where may a window begin?</summary>
#
# A window has context + 1 tokens, so the last place is n − context − 1; `torch.randint`'s upper end
# is exclusive.
# </details>
#
# <details><summary>Hint: random numbers have a state</summary>
#
# `generator.get_state()` and `set_state` for your own, `torch.get_rng_state()` and
# `torch.set_rng_state` for the default one. Both are tensors, and can be saved.
# </details>
#
# <details><summary>Hint: the loss is right, the resumed weights differ</summary>
#
# Compare after one resumed step, not after ten. Did the optimizer get its state *after* it was made
# for the same parameters? Does the first resumed step use the rate of its own number? Is what you
# loaded still what you saved (`copy.deepcopy`)?
# </details>


# %% tags=["support"]
# Support: a small model for the checks of train
def small_model(salt: int, scale: float = 0.5, vocab: int = 20) -> nn.Module:
    """What the checks train: the course's Llama with random weights, in float64."""
    shape = {"vocab_size": vocab, "hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1}
    model = models.Llama(models.Config(**shape, mlp_size=24)).double()
    with torch.no_grad():
        for p in model.parameters():
            source = checks.generator(salt)
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64) * scale)
    return model.to(profile.device)


# %% check="train" points=3
def one_window(
    model: nn.Module,
    tokens: Tensor,
    options: TrainOptions,
    clip: str = "before",
    decay: str = "matrices",
    shift: int = 0,
    accumulate: bool = False,
) -> Tensor:
    """All parameters after training on the only window there is, by AdamW's formulas. The last
    arguments make mistakes.
    """
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
    kept = [torch.zeros_like(p) for p in parameters]
    embeddings = [id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)]
    for t in range(options.steps):
        logits = model(tokens[None, :-1])
        loss = (logits.logsumexp(-1) - logits.gather(-1, tokens[None, 1:, None])[..., 0]).mean()
        grads = [
            k + g if accumulate else g
            for g, k in zip(torch.autograd.grad(loss, parameters), kept, strict=True)
        ]
        kept = grads
        norm = sum(float(g.square().sum()) for g in grads) ** 0.5
        if clip == "before" and norm > options.clip:
            grads = [g * options.clip / norm for g in grads]
        if clip == "each":
            grads = [g * min(1.0, options.clip / float(g.norm())) for g in grads]
        at, w, end = t + shift, options.warmup, options.steps
        high, low = options.learning_rate, options.min_learning_rate
        if at < w:
            lr = high * (at + 1) / w
        else:
            lr = low + (high - low) * math.cos(math.pi / 2 * (at + 1 - w) / (end - w)) ** 2
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, grads, strict=True)):
                matrix = p.dim() > 1 and id(p) not in embeddings
                if decay == "all" or (decay == "matrices" and matrix):
                    p.mul_(1 - lr * options.weight_decay)
                a, b = options.betas
                first[i] = a * first[i] + (1 - a) * g
                second[i] = b * second[i] + (1 - b) * g * g
                root = (second[i] / (1 - b ** (t + 1))).sqrt()
                p.sub_(lr * (first[i] / (1 - a ** (t + 1))) / (root + 1e-8))
    return torch.cat([p.detach().flatten() for p in parameters])


# With context + 1 tokens there is one window, whatever the order of the data.
only = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5], device=profile.device)
options = TrainOptions(
    steps=5,
    batch=2,
    context=8,
    warmup=2,
    learning_rate=0.05,
    min_learning_rate=0.005,
    weight_decay=1.0,
    clip=0.5,
)
model = small_model(40)
losses, _ = train(model, only, options)
assert isinstance(losses, list), (
    f"train returns a list of losses and a checkpoint; the first is {losses!r}"
)
assert len(losses) == 5, f"five steps have five losses; yours are {losses}"
assert all(type(loss) is float for loss in losses), (
    "losses are plain numbers (loss.item()): a tensor keeps its whole graph in memory"
)
with torch.no_grad():
    fresh = small_model(40)
    first = F.cross_entropy(fresh(only[None, :-1])[0], only[1:])
checks.close(
    losses[0],
    float(first),
    what="the loss of the first step",
    rtol=1e-7,
    mistakes={
        "predicting the token itself": float(
            F.cross_entropy(fresh(only[None, :-1]).detach()[0], only[:-1])
        )
    },
)
found = torch.cat([p.detach().flatten() for p in model.parameters()])
checks.close(
    found,
    one_window(small_model(40), only, options),
    what="the parameters after five steps on one window",
    rtol=1e-6,
    mistakes={
        "no clipping, or clipping after the step,": one_window(
            small_model(40), only, options, clip="none"
        ),
        "clipping each tensor by itself": one_window(small_model(40), only, options, clip="each"),
        "decay on norms and embeddings too": one_window(
            small_model(40), only, options, decay="all"
        ),
        "no decay": one_window(small_model(40), only, options, decay="none"),
        "a schedule that is one step ahead": one_window(small_model(40), only, options, shift=1),
        "gradients that are never set to zero": one_window(
            small_model(40), only, options, accumulate=True
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(41)
runs = [  # steps, batch, context, warm-up; rates, decay, clipping, betas
    (9, 3, 5, 4, 0.02, 0.001, 0.5, 0.3, (0.8, 0.9)),
    (4, 1, 11, 1, 0.01, 0.01, 0.1, 1e9, (0.9, 0.95)),
    (6, 2, 3, 6, 0.03, 0.003, 2.0, 0.05, (0.9, 0.99)),
]
for salt, (steps, batch, context, warmup, high, low, decay, clip, betas) in enumerate(runs, 42):
    options = TrainOptions(steps, batch, context, high, low, warmup, decay, betas, clip)
    only = torch.randint(0, 20, (options.context + 1,), generator=g).to(profile.device)
    model = small_model(salt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # left over from something else: it must not count
    with checks.unchanged(tokens=only):
        train(model, only, options)
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    checks.close(
        found,
        one_window(small_model(salt), only, options),
        what=f"the parameters after {options.steps} steps on one window",
        rtol=1e-6,
        mistakes={
            "no clipping, or clipping after the step,": one_window(
                small_model(salt), only, options, clip="none"
            ),
            "decay on norms and embeddings too": one_window(
                small_model(salt), only, options, decay="all"
            ),
        },
    )
### END HIDDEN TESTS


# %% check="train" points=1
class Noting(nn.Module):
    """Notes what it is given; its logits are the same everywhere."""

    def __init__(self, vocab):
        super().__init__()
        self.logits, self.seen = nn.Parameter(torch.zeros(vocab)), []

    def forward(self, tokens):
        self.seen.append(tokens.clone().cpu())
        return self.logits.expand(*tokens.shape, -1)


noting = Noting(50)
train(noting, torch.arange(50), TrainOptions(steps=3, batch=4, context=6, warmup=1))
assert [tuple(seen.shape) for seen in noting.seen] == 3 * [(4, 6)], (
    f"each step gives the model (batch, context) = (4, 6) tokens; yours: "
    f"{[tuple(s.shape) for s in noting.seen]}"
)
seen = torch.cat(noting.seen)
assert bool((seen.diff(dim=1) == 1).all()), "a window is a run of neighboring tokens"
assert len(seen[:, 0].unique()) > 3, (
    f"windows begin anywhere; yours begin at {sorted(seen[:, 0].tolist())}"
)
### BEGIN HIDDEN TESTS
noting = Noting(9)
train(noting, torch.arange(9), TrainOptions(steps=100, batch=30, context=4, warmup=1))
begins = torch.cat(noting.seen)[:, 0].bincount(minlength=9)
assert (begins > 0).tolist() == 5 * [True] + 4 * [False], (
    f"of nine tokens, windows of 4 + 1 begin at 0 … 4; yours begin {begins.tolist()} times at 0, "
    f"1, …"
)
spread = 6 * math.sqrt(3000 * 0.2 * 0.8)
assert bool(((begins[:5] - 600).abs() < spread).all()), (
    f"every place is equally likely: 600 ± {spread:.0f} of 3000 each; yours {begins[:5].tolist()}"
)
orders = []
for seed in (1, 1, 2):
    noting = Noting(50)
    torch.manual_seed(len(orders))
    train(noting, torch.arange(50), TrainOptions(steps=5, batch=4, context=6, warmup=1, seed=seed))
    orders.append(torch.cat(noting.seen)[:, 0].tolist())
assert orders[0] == orders[1], (
    "with one seed in the options the windows differ from run to run: draw them from a generator "
    "of your own"
)
assert orders[0] != orders[2], "options.seed does not change the order of the data"
### END HIDDEN TESTS


# %% check="train" points=3
class WithDropout(nn.Module):
    """A model that draws random numbers of its own, and has a buffer: the mean of what it saw."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(30, 8), nn.Dropout(0.3)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 30)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, tokens):
        x = self.drop(self.embed(tokens))
        self.mean = self.mean.lerp(x.detach().mean((0, 1)), 0.2)
        return self.head(self.norm(x - self.mean))


def fresh_model(salt: int) -> nn.Module:
    torch.manual_seed(salt)
    return WithDropout().to(profile.device)


text = torch.randint(0, 30, (200,), generator=checks.generator(45))
options = TrainOptions(steps=8, batch=3, context=5, warmup=2)
torch.manual_seed(7)
whole = fresh_model(1)
losses, _ = train(whole, text, options)

begun = fresh_model(1)
before, checkpoint = train(begun, text, options, until=3)
assert isinstance(checkpoint, dict), (
    f"the second result is the checkpoint, a dict; yours is {type(checkpoint).__name__}"
)
file = io.BytesIO()
torch.save(checkpoint, file)
file.seek(0)
try:
    stored = torch.load(file, weights_only=True)
except Exception as error:
    raise AssertionError(
        f"torch.load(…, weights_only=True) cannot read your checkpoint back "
        f"({type(error).__name__}): keep tensors, numbers, text, dicts and lists in it, no objects."
    ) from None
torch.rand(5)  # another process has drawn other numbers,
resumed = fresh_model(2)  # and begins with another model
after, _ = train(resumed, text, options, stored)
assert (len(before), len(after)) == (3, 5), (
    f"three steps until 3, and five more: yours did {len(before)} and {len(after)}"
)
assert before + after == losses, (
    f"the losses of a run stopped after step 3 and resumed are {before + after}, uninterrupted "
    f"{losses}"
)
assert all(
    torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
), (
    "the resumed run ends in other weights than the uninterrupted one: what does the checkpoint "
    "not hold?"
)
### BEGIN HIDDEN TESTS
usual = TrainOptions(10, 2, 7, learning_rate=0.02, warmup=3, weight_decay=0.3, clip=0.2)
for salt, stops in [(46, [1]), (47, [5, 6]), (48, [2, 4, 9]), (49, [0, 10])]:
    options = replace(usual, seed=salt)
    makers = (
        (fresh_model, lambda s: small_model(s, 0.2, 30)) if salt in (46, 48) else (fresh_model,)
    )
    for make in makers:
        torch.manual_seed(salt)
        whole = make(salt)
        torch.manual_seed(99)
        losses, _ = train(whole, text, options)
        model = make(salt)
        torch.manual_seed(99)
        done, checkpoint = [], None
        for stop in [*stops, None]:
            some, checkpoint = train(model, text, options, checkpoint, until=stop)
            done += some
            assert len(done) == min(10 if stop is None else stop, 10), (
                f"until={stop} ends the run after {stop} steps in all, whatever it began with; "
                f"yours has done {len(done)}"
            )
            file = io.BytesIO()
            torch.save(checkpoint, file)
            model = make(salt + 1000)  # draws random numbers, and has other weights
            file.seek(0)
            checkpoint = torch.load(file, weights_only=True)
        last = make(salt)
        nothing, _ = train(last, text, options, checkpoint)
        assert nothing == [], f"a finished run has no steps left; yours did {len(nothing)}"
        what = f"a {type(whole).__name__} stopped at {stops}"
        differ = [i for i, (a, b) in enumerate(zip(done, losses, strict=False)) if a != b]
        assert done == losses, f"{what}: the losses part at step {[*differ, 'the end'][0]}"
        assert all(
            torch.equal(a, b) for a, b in zip(last.parameters(), whole.parameters(), strict=True)
        ), f"{what}: the weights at the end differ"
# A checkpoint that was kept while training went on, and used twice.
options = TrainOptions(steps=9, batch=2, context=7, warmup=3)
torch.manual_seed(5)
model = fresh_model(3)
_, kept = train(model, text, options, until=4)
rest, _ = train(model, text, options, kept)
for again in (1, 2):
    other = fresh_model(50 + again)
    torch.rand(again)
    once_more, _ = train(other, text, options, kept)
    assert once_more == rest, (
        "the checkpoint changed while training went on: it holds the live tensors of the model or "
        "the optimizer"
    )
    assert all(
        torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True)
    ), "the second run from one checkpoint ends elsewhere"
# A checkpoint that is beyond `until` already: nothing is done, and nothing undone.
nothing, still = train(fresh_model(60), text, options, kept, until=2)
assert nothing == [], f"step 4 is beyond until=2, yet {len(nothing)} steps were done"
once_more, _ = train(fresh_model(61), text, options, still)
assert once_more == rest, (
    "after a call with nothing to do its checkpoint goes on elsewhere: is the step still 4?"
)
### END HIDDEN TESTS


# %% check="train" points=2
def documentation_tokens() -> Tensor:
    """Python's documentation as bytes below 128: (about 500,000,), int64."""
    text = "\n".join(data.documentation().values()).encode("ascii", "ignore")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class Recurrent(nn.Module):
    """Any model that predicts the next token will do: this one reads with a GRU."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 64), nn.Linear(64, 128)
        self.read = nn.GRU(64, 64, batch_first=True)

    def forward(self, tokens):
        return self.head(self.read(self.embed(tokens))[0])


text = documentation_tokens()
torch.manual_seed(0)
options = TrainOptions(80, 16, 32, learning_rate=1e-2, min_learning_rate=1e-3, warmup=8)
losses, _ = train(Recurrent().to(profile.device), text, options)
last = sum(losses[-10:]) / 10
assert 4.5 < losses[0] < 5.5, (
    f"the first loss of a fresh model is near ln 128 = 4.85; yours is {losses[0]:.2f}"
)
assert last < 2.7, (
    f"after 80 steps on the documentation the loss should be well below 3.24 nats, that of a "
    f"model which knows only how frequent letters are; yours is {last:.2f}"
)
### BEGIN HIDDEN TESTS
torch.manual_seed(checks.seed())
trained = Recurrent().to(profile.device)
losses, _ = train(trained, text, replace(options, seed=checks.seed() % 1000))
# What the trained model is worth is measured here, on places of the check's own choosing.
places = torch.linspace(0, len(text) - 66, 60).long()[:, None] + torch.arange(65)
windows = text[places].to(profile.device)
with torch.no_grad():
    score = F.nll_loss(
        trained(windows[:, :-1]).double().log_softmax(-1).flatten(0, 1), windows[:, 1:].flatten()
    )
assert score < 2.7, (
    f"another beginning ends with a loss of {score:.2f} nats all over the documentation; less "
    f"than 2.7 is asked for"
)
assert abs(score - sum(losses[-10:]) / 10) < 0.5, (
    f"the losses that train reports end at {sum(losses[-10:]) / 10:.2f}, but the model has "
    f"{score:.2f}"
)
### END HIDDEN TESTS

# %% [markdown]
# ### First, overfit one batch
#
# The oldest test of a training loop, and still the best minute you can spend: a model with more
# parameters than a batch has tokens must drive that batch's loss to 0. Before the first update the
# loss must be $\ln V$, since a fresh model knows nothing and should claim nothing. If the first
# number is wrong, the head or the initialization is; if the curve stalls, gradients do not reach
# something; and if it falls to 0 *at once*, the model sees the answer.
#
# Below, your `Llama` meets a single window. The dashed curve is the same model with the causal mask
# left out: every token sees its successor, which is the answer. Which of the two do you expect to
# fall faster, and by how much? Will this test tell you that the second is broken?


# %% tags=["experiment"]
class Peeking(nn.Module):
    """A Llama whose tokens see the whole window: an attention mask that is not causal."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        m = self.model
        cos, sin = rotary_angles(
            torch.arange(tokens.shape[1], device=tokens.device), m.config.head_dim
        )
        x, everything = (
            m.embed(tokens),
            torch.ones(1, tokens.shape[1], dtype=torch.bool, device=tokens.device),
        )
        for block in m.blocks:
            x = block(x, cos, sin, everything)
        return m.norm(x) @ m.embed.weight.T


training, apart = data.split(data.deduplicate(data.documentation()), held_out=0.1)
corpus, unseen = (
    torch.tensor([i for text in part.values() for i in [*tokenizer.encode(text), tokenizer.eos]])
    for part in (data.scrub(training, apart), apart)
)
tiny = LlamaConfig(
    tokenizer.vocab_size, hidden_size=96, mlp_size=256, layers=2, heads=6, kv_heads=2, tied=True
)
memorize = TrainOptions(
    steps=70,
    batch=1,
    context=64,
    warmup=5,
    learning_rate=4e-3,
    min_learning_rate=4e-4,
    weight_decay=0.0,
)
memory = {}
for name, wrap in (("causal", lambda m: m), ("no causal mask", Peeking)):
    torch.manual_seed(0)
    losses, _ = train(wrap(Llama(tiny)).to(profile.device), corpus[1000:1065], memorize)
    memory[name] = losses

# %% tags=["experiment", "figure"]
# Figure: one window learned by heart, with the causal mask and without
ax = plot.curves(
    range(1, 71),
    memory,
    xlabel="step",
    ylabel="loss (nats per token)",
    logy=True,
    title="one window of 64 tokens, again and again",
)
blank = math.log(tokenizer.vocab_size)
ax.axhline(blank, color="#888888", linewidth=1, linestyle=":")
ax.annotate(
    "ln V: no knowledge", (45, blank), textcoords="offset points", xytext=(0, 5), fontsize=8
)
plot.caption(
    ax.figure,
    "Both begin at ln V, as a model must that knows nothing, and go towards 0 side by side. The "
    "broken model, which could copy its answers, gains nothing from it here.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** The loop passes its test: gradients reach everything, and the loss of a window
# seen often goes to 0. But the test is blind to a leak. One window can be learned by heart with or
# without its answers in view, and a loss of 0 looks the same. What finds the leak is the law that
# [](#model) checked, *a changed token must not change what came before it*, or a loss on text seen
# once that is too good for the size of the model. A test says what it was made to say; know what
# that is.
#
# ### How many FLOPs, and how many of them are used
#
# Training speed in tokens per second says little about the code: a larger model is slower. **MFU**,
# model FLOPs utilization (Chowdhery et al. 2022), divides what the model *needs* by what the
# machine *could*:
#
# $$ \mathrm{MFU} = \frac{\text{tokens per second}\times\text{FLOPs per token}}{\text{peak FLOP/s}} . $$
#
# The need, for one token in a sequence of $T$: every weight of a matrix product meets the token
# once, a multiplication and an addition, 2 FLOPs. An embedding is a look-up and costs none; the
# head is a product, tied or not. In attention each of the $H$ heads takes $T$ scores of width $d_h$
# and a weighted sum of $T$ values: $2\cdot 2\,T d_h H = 4Td$. The backward pass needs a product for
# the gradient of each weight and one for that of each input, twice the forward pass:
#
# $$ \mathrm{FLOPs\ per\ token} = 3\,\big[\,2\,N_{\text{products}} + 4LTd\,\big] = 6N_{\text{products}} + 12LTd . $$
#
# This is the convention of the PaLM paper: the full square of scores, although a causal kernel may
# skip half of it; no norms, no softmax; and nothing for work done twice, such as recomputed
# activations. That is what makes it *model* FLOPs.


# %% exercise="flops" minutes=8 difficulty=1 path="more"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    """FLOPs of training on one token, forward and backward, in sequences of `seq` tokens:
    6·N_products + 12·L·T·d.
    """
    ### BEGIN SOLUTION
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    layer = 2 * d * d + 2 * d * kv + 3 * d * config.mlp_size
    products = config.layers * layer + d * config.vocab_size
    return 6 * products + 12 * config.layers * seq * d
    ### END SOLUTION


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    """The share, 0 to 1, of a machine of `peak` FLOP/s that this training speed uses."""
    ### BEGIN SOLUTION
    return tokens_per_second * flops_per_token(config, seq) / peak
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which weights take part in a product?</summary>
#
# Those of the projections, of the gated layer and of the head, tied or not. The look-up in the
# embedding and the norms' weights do not.
# </details>


# %% check="flops" points=1
config = LlamaConfig(vocab_size=10, hidden_size=4, mlp_size=6, layers=1, heads=2, kv_heads=1)
found = flops_per_token(config, 3)
checks.close(
    found,
    6 * (16 + 8 + 8 + 16 + 72 + 40) + 12 * 3 * 4,
    what="FLOPs per token of a model of one layer",
    hint="q 16, k 8, v 8, o 16, SwiGLU 72, head 40 weights",
    mistakes={
        "counting the embedding as a product": 6 * 200 + 144,
        "the forward pass alone": 2 * 160 + 48,
        "leaving out attention's own products": 6 * 160,
        "leaving out the head": 6 * 120 + 144,
    },
)
### BEGIN HIDDEN TESTS
for hidden, inner, layers, heads, kv_heads, vocab, seq in [
    (16, 24, 2, 4, 2, 30, 9),
    (12, 5, 3, 2, 2, 7, 1),
    (8, 16, 1, 4, 1, 11, 20),
]:
    shape = {"vocab_size": vocab, "hidden_size": hidden, "layers": layers, "heads": heads}
    built = models.Llama(models.Config(**shape, kv_heads=kv_heads, mlp_size=inner))
    weights = sum(m.weight.numel() for m in built.modules() if isinstance(m, nn.Linear))
    weights += built.embed_tokens.weight.numel()  # the head, which is tied to it
    # Scores (seq, d_h) × (d_h, seq) and weights (seq, seq) × (seq, d_h), head by head.
    attention = layers * heads * 2 * (2 * seq * (hidden // heads) * seq)
    expected = 3 * (2 * weights * seq + attention) // seq
    for tied in (True, False):
        found = flops_per_token(
            LlamaConfig(vocab, hidden, inner, layers, heads, kv_heads, tied=tied), seq
        )
        checks.close(
            found,
            expected,
            what=f"FLOPs per token of {seq}, {layers} layers, {'tied' if tied else 'untied'}",
        )
### END HIDDEN TESTS

# %% check="flops" points=1
config = LlamaConfig(vocab_size=10, hidden_size=4, mlp_size=6, layers=1, heads=2, kv_heads=1)
# Its 1,104 FLOPs for each token of 3 are a tenth of the machine's in a second.
found = mfu(5.0, config, 3, 11_040.0)
checks.close(
    found,
    0.5,
    what="MFU of 5 tokens per second on 11,040 FLOP/s",
    mistakes={"a percentage": 50.0, "the upside-down ratio": 2.0, "the forward pass alone": 1 / 6},
)
### BEGIN HIDDEN TESTS
published = LlamaConfig(32_000, 768, 3072, 12, 12, 12)
for speed, seq, peak in [(1e6, 1024, 989e12), (3.5e4, 2048, 312e12)]:
    in_products = 162_417_408 - 32_000 * 768 - 25 * 768  # all but the embedding and 25 norms
    need = 6 * in_products + 12 * 12 * seq * 768
    checks.close(
        mfu(speed, published, seq, peak),
        speed * need / peak,
        what=f"MFU of LLaMA-160M at {speed:,.0f} tokens per second, sequences of {seq}, on "
        f"{peak / 1e12:.0f} TFLOP/s",
        rtol=1e-9,
    )
### END HIDDEN TESTS

# %% [markdown]
# ### Then, train on text
#
# The documentation of Python in the tokens of the course's tokenizer; a tenth of its documents are
# held out, and what else repeats them. `train` stops three times to let the model write, and goes
# on from its checkpoint. Write down your guesses: how far does the loss fall in 300 steps, hardly
# more than one pass? What does the model learn first, spelling, grammar or sense? And what share of
# this machine's arithmetic does the loop reach?
#
# The peak that MFU needs is measured in the same cell, by the fastest of several products of two
# large matrices.


# %% tags=["experiment"]
def measured_peak(
    dtype: torch.dtype = torch.float32, size: int = profile.pick(1536, 8192)
) -> float:
    """FLOP/s of the best of some products of two (size, size) matrices on the profile's device."""
    a, b = (torch.randn(size, size, device=profile.device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(8):
        profile.synchronize()
        began = time.perf_counter()
        a @ b
        profile.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


mini = LlamaConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=96, mlp_size=264, layers=2, heads=4, kv_heads=2
)
options = TrainOptions(
    steps=300, batch=6, context=64, warmup=15, learning_rate=2e-3, min_learning_rate=2e-4
)
places = torch.linspace(0, len(unseen) - 66, 48).long()[:, None] + torch.arange(65)
held_out = unseen[places].to(profile.device)  # (48, 65)


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    return float(F.cross_entropy(model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten()))


torch.manual_seed(0)
model = Llama(mini).to(profile.device)
prompts = ["The for statement", "If the object", "A class definition"]
encoded = [[tokenizer.eos, *tokenizer.encode(text)] for text in prompts]
losses, judged, written, checkpoint, seconds = [], [], [], None, 0.0
for until in (0, 20, 90, 300):
    began = time.perf_counter()
    some, checkpoint = train(model, corpus, options, checkpoint, until)
    profile.synchronize()
    seconds += time.perf_counter() - began
    losses += some
    judged.append((until, held_out_loss(model)))
    texts = generate(
        model,
        encoded,
        24,
        eos=tokenizer.eos,
        temperature=0.7,
        top_p=0.9,
        generator=torch.Generator(profile.device).manual_seed(1),
    )
    written.append(texts)
    print(f"--- after {until} steps, held-out loss {judged[-1][1]:.2f}")
    for prompt, text in zip(prompts, texts, strict=True):
        print(" ", repr(prompt + tokenizer.decode(text)))

speed, peak = len(losses) * options.batch * options.context / seconds, measured_peak()
used = mfu(speed, mini, options.context, peak)
need = flops_per_token(mini, options.context)
print(
    f"{speed:,.0f} tokens/s × {need / 1e6:.1f} MFLOP = {speed * need / 1e9:.0f} of "
    f"{peak / 1e9:.0f} GFLOP/s: MFU {100 * used:.0f} %"
)

# %% tags=["experiment", "figure"]
# Figure: the losses and the learning rate of the run
counts = corpus.bincount(minlength=tokenizer.vocab_size).double()
frequencies = (counts + 0.5) / (counts + 0.5).sum()
knows_frequencies = -float(frequencies.log()[held_out[:, 1:].flatten().cpu()].mean())
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8), gridspec_kw={"width_ratios": [1.7, 1]})
axes[0].plot(
    range(1, len(losses) + 1),
    losses,
    color=plot.COLORS[0],
    linewidth=1,
    label="training, each step",
)
axes[0].plot(
    *zip(*judged, strict=True), marker="o", color=plot.COLORS[1], linestyle="--", label="held out"
)
for value, name in (
    (math.log(tokenizer.vocab_size), "ln V"),
    (knows_frequencies, "token frequencies alone"),
):
    axes[0].axhline(value, color="#888888", linewidth=1, linestyle=":")
    axes[0].annotate(
        name,
        (options.steps, value),
        ha="right",
        textcoords="offset points",
        xytext=(0, 4),
        fontsize=8,
    )
axes[0].set(xlabel="step", ylabel="loss (nats per token)")
axes[0].set_title("training")
axes[0].legend(loc="upper center")
axes[1].plot(
    [learning_rate(step, options) for step in range(options.steps)],
    color=plot.COLORS[2],
    linestyle="-",
)
axes[1].set(xlabel="step", ylabel="learning rate")
axes[1].set_title("schedule")
plot.caption(
    fig,
    "Left: within some 30 steps the model knows how frequent each token is, the lower dotted line, "
    "and stays there a while before it uses what comes before. The loss on held-out documents ends "
    "above the training loss.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Frequencies first: after a few steps the model writes the words it has seen
# most often, in no order. Then the surface: line ends, quotes, rows of dashes, the indentation of a
# code block. Then pieces of two or three words that go together. Sense does not come: this run read
# a hundred thousand tokens, LLaMA-7B a trillion. The printed MFU is that of a small model in a
# Python loop: products of a few hundred rows, and between them norms, softmax, the optimizer and
# Python itself, which count as time and not as FLOPs. If something else keeps the cores busy, it
# falls further; the peak was measured for one long product.
#
# ## On the hardware: LLaMA-160M
#
# On a GPU the next cell trains `LLAMA_160M` with your `train`: bfloat16 autocast, `torch.compile`,
# PyTorch's fused attention, sequences of 1,024 tokens, and reports tokens per second and MFU
# against a large bfloat16 product measured in the same cell. The text is the documentation again,
# well over a hundred passes over it: enough to watch the speed and to see the loss fall, not to
# make a good model. `python -m benchmarks.14_building_a_llama` does it for longer, on the library's
# source code too, and writes its figures to a file.
#
# On a CPU the cell does the arithmetic instead. Two numbers are worth knowing by heart. **Memory**:
# mixed precision keeps for each parameter a float32 weight, its gradient and Adam's two moments, 16
# bytes, whatever the batch. **Time**: $6N$ FLOPs a token and 20 tokens a parameter (lesson 17) make
# $120N^2$ FLOPs in all, on a machine that delivers peak × MFU.


# %% tags=["experiment"]
class Autocast(nn.Module):
    """A compiled model whose products run in bfloat16; `train` needs no other change."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.compiled = model, torch.compile(model, dynamic=False)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return self.compiled(tokens).float()  # the loss in float32


if profile.device.type == "cuda":
    run = TrainOptions(
        steps=400, batch=32, context=1024, warmup=40, learning_rate=6e-4, min_learning_rate=6e-5
    )
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    large = Autocast(Llama(LLAMA_160M).to(profile.device))
    losses, checkpoint = train(large, corpus, run, until=20)  # compiles
    profile.synchronize()
    began = time.perf_counter()
    more, _ = train(large, corpus, run, checkpoint)
    profile.synchronize()
    seconds = time.perf_counter() - began
    speed = len(more) * run.batch * run.context / seconds
    peak = measured_peak(torch.bfloat16)
    used = [100 * mfu(speed, LLAMA_160M, run.context, top) for top in (peak, 989e12)]
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: {speed:,.0f} tokens/s for "
        f"{seconds:.0f} s\n"
        f"MFU {used[0]:.0f} % of {peak / 1e12:.0f} TFLOP/s in a large product, {used[1]:.0f} % of "
        f"an H100's 989"
    )
else:
    need, parameters = flops_per_token(LLAMA_160M, 1024), 162_417_408
    attention = 12 * LLAMA_160M.layers * 1024 * LLAMA_160M.hidden_size
    print(
        f"LLaMA-160M, sequences of 1,024: {need / 1e6:.0f} MFLOP per token, "
        f"{100 * attention / need:.0f} % of it attention's own products; weights, gradients and "
        f"AdamW: {16 * parameters / 2**30:.1f} GiB"
    )
    machines = {"this CPU, float32": peak, "A100, bfloat16": 312e12, "H100, bfloat16": 989e12}
    shares = [0.05 * i for i in range(1, 15)]
    total = 20 * parameters * need
    hours = {
        name: [total / (top * share) / 3600 for share in shares] for name, top in machines.items()
    }

# %% tags=["experiment", "figure"]
# Figure: the loss on this GPU, or on a CPU the hours that a whole training takes
if profile.device.type == "cuda":
    ax = plot.curves(
        range(1, 401),
        {"loss": losses + more},
        xlabel="step of 32,768 tokens",
        ylabel="loss (nats per token)",
        title="LLaMA-160M on the documentation",
    )
    plot.caption(
        ax.figure, "Passes over a small text: the fall at the end is memory, not understanding."
    )
    plot.plt.show()
else:
    ax = plot.curves(
        [100 * share for share in shares], hours, logy=True, xlabel="MFU (%)", ylabel="hours"
    )
    for value, name in ((24, "a day"), (24 * 30, "a month")):
        ax.axhline(value, color="#888888", linewidth=1, linestyle=":")
        ax.annotate(
            name, (70, value), ha="right", textcoords="offset points", xytext=(0, 3), fontsize=8
        )
    ax.set_title("LLaMA-160M on 3.2 billion tokens", pad=22)
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 0.99), fontsize=8)
    plot.caption(
        ax.figure,
        "Arithmetic, not a measurement: 20 tokens for each parameter, the peak of this CPU as "
        "measured above, those of the GPUs from their data sheets.",
    )
    plot.plt.show()

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number or a choice are graded, one by one.


# %% exercise="questions" minutes=12 difficulty=1 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers; numbers to 1 percent, whole numbers exactly.

    "top_p":   the next token's probabilities are 0.5, 0.3, 0.15 and 0.05. With temperature 0.5 and
               then top_p = 0.7, with which probability is the second token drawn?
    "prefill": a prompt of 500 tokens, 100 new ones, greedy: how many more tokens go through the
               model without a cache (the whole text anew for each token) than with one? The last
               new token is not fed back. (a whole number)
    "mfu":     LLaMA-160M (162,417,408 parameters; the exercise above has its shape) trains at
               400,000 tokens per second in sequences of 1,024 on a GPU of 989 TFLOP/s. What is its
               MFU, in percent? FLOPs per token: 6·N_products + 12·L·T·d; you may use what you
               built.
    "padding": a rotary model, prompts padded on the left and masked, positions counted by columns,
               so that a short prompt begins at position 7. Against the same prompt alone its logits
               are "a" the same up to rounding; "b" different, and worse the more padding there is;
               "c" the same for the prompt, different for the tokens generated after it.
    """
    ### BEGIN SOLUTION
    sharpened = [p**2 for p in (0.5, 0.3, 0.15, 0.05)]  # the first has 0.685 of the sum, below 0.7
    products = 162_417_408 - 32_000 * 768 - 25 * 768
    return {
        "top_p": sharpened[1] / (sharpened[0] + sharpened[1]),
        "prefill": sum(500 + i for i in range(100)) - (500 + 99),
        "mfu": 100 * 400_000 * (6 * products + 12 * 12 * 1024 * 768) / 989e12,
        "padding": "a",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["top_p"]
checks.kind(answer, float, what="top_p")
### BEGIN HIDDEN TESTS
p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
warm = (p.log() / 0.5).softmax(-1)
checks.number(
    answer,
    float(warm[1] / warm[:2].sum()),
    what="top_p",
    hint="The temperature first: p^(1/τ), renormalized. Then: how many tokens does 0.7 need?",
    mistakes={
        "leaving out the temperature": 0.375,
        "not renormalizing after the cut": float(warm[1]),
        "dropping the token that crosses the threshold": 0.0,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["prefill"]
checks.kind(answer, int, what="prefill")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    100 * 500 + 99 * 100 // 2 - 599,
    to=0,
    what="prefill",
    hint="The first new token needs 500 in both; the second 501, or 1",
    mistakes={
        "what goes through without a cache": 54_950,
        "feeding the last token back": sum(range(500, 601)) - 600,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["mfu"]
checks.kind(answer, float, what="mfu")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    38.0,
    what="mfu",
    hint="In percent. Products: all parameters but the embedding and the norms",
    mistakes={
        "leaving out attention's own products": 33.44,
        "counting the embedding as a product": 43.99,
        "a share in place of percent": 0.38,
        "the forward pass alone": 12.67,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["padding"]
assert answer in ("a", "b", "c"), f"padding is one of 'a', 'b', 'c'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "a", (
    "Scores depend on differences of positions. Which differences does a shift of the whole row "
    "change? (With learned absolute positions the answer would be another.)"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** A colleague resumes a run. The loss jumps by 0.3 and needs two hundred steps
# to come back. The weights were loaded correctly. What are your suspects, and how do you tell them
# apart without waiting two hundred steps each time?

# %% [markdown] answer="bump-after-resume"
# A jump *at* the first resumed step cannot come from the optimizer, which has not acted yet: the
# loss is a function of weights and data, so suspect the data (an order begun anew shows text seen
# often, usually a *lower* loss; another tokenizer or another shard, a higher one), dropout or
# evaluation mode, or weights that were not those of that step (an averaged copy, a rounding to
# bfloat16). A jump over the *following* steps is the optimizer: moments of zero make Adam's first
# updates large and noisy (its second moment has seen one gradient, so every parameter moves by the
# full rate), a step counter of zero begins the warm-up again or skips it. To tell: train ten steps
# past a checkpoint, keep losses and gradient norms, resume from the checkpoint, and compare number
# by number. The first quantity that differs, loss of the first step, gradient norm, loss of the
# second, names the piece.

# %% [markdown]
# **Open question 2.** Someone loads a published model into their own code. All names and shapes
# fit, nothing is missing or unexpected, and the text is fluent for a dozen tokens and then falls
# apart. What could it be?

# %% [markdown] answer="fluent-then-nonsense"
# Things without a tensor of their own, or of equal shape. The base of the rotary angles (10,000 or
# 500,000) or a scaling of them: near tokens are hardly affected, far ones are. The rotary layout,
# half-split or interleaved, which has the same shapes. Positions that start at 0 in every decoding
# step. A cache whose mask is aligned to the first key. The eps of the norms, gate and up exchanged,
# or a tied head usually spoil the first token already. A long text scored in one pass with known
# logits, token by token, tells where the difference begins; the same text through the cache tells
# whether it is the cache.

# %% [markdown]
# ## References, and what to read in them
#
# - **Touvron et al. 2023**, *LLaMA*, [arXiv:2302.13971](https://arxiv.org/abs/2302.13971). Section
#   2.2 is the architecture in half a page, 2.3 the optimizer. *Llama 2*,
#   [arXiv:2307.09288](https://arxiv.org/abs/2307.09288), adds grouped queries.
# - **Chowdhery et al. 2022**, *PaLM*, [arXiv:2204.02311](https://arxiv.org/abs/2204.02311).
#   Appendix B defines MFU and counts the FLOPs.
# - **Holtzman et al. 2019**, *The Curious Case of Neural Text Degeneration*,
#   [arXiv:1904.09751](https://arxiv.org/abs/1904.09751). Why the tail is cut, and top-p. **Nguyen
#   et al. 2024**, *Min-p*, [arXiv:2407.01082](https://arxiv.org/abs/2407.01082).
# - **Press and Wolf 2016**, *Using the Output Embedding to Improve Language Models*,
#   [arXiv:1608.05859](https://arxiv.org/abs/1608.05859). Tied heads.
# - **Miao et al. 2023**, *SpecInfer*, [arXiv:2305.09781](https://arxiv.org/abs/2305.09781). Where a
#   model of 160 million parameters is useful.
# - **Loshchilov and Hutter 2017**, *Decoupled Weight Decay Regularization*,
#   [arXiv:1711.05101](https://arxiv.org/abs/1711.05101).
#
# In production: Hugging Face transformers, `models/llama/modeling_llama.py` (the whole model) and
# `generation/logits_process.py` (the filters, as "warpers"); karpathy/nanoGPT, `model.py`
# (`configure_optimizers`, `estimate_mfu`) and `train.py`; Meta's `meta-llama/llama`,
# `llama/model.py`, with interleaved rotary pairs and a head of its own.
