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
#       Multi-head latent attention with its absorbed decoding and a Triton kernel for it; a
#       ring-buffer cache with sinks; six sparse patterns, DeepSeek's learned one among them.
#     gpu: >-
#       The MLA decode kernel at full size, 16 and 128 heads, 4k to 32k tokens, beside a plain copy
#       of the cache and PyTorch's own products.
# ---

# %% [markdown]
# ## The problem: a table that grows with every word
#
# A model of 32 layers and 32 heads of 128 reads a report of 128k tokens. To write the next word it
# looks back at a key and a value for every token, head and layer: 64 GiB, read once from end to
# end, for *one* word of *one* reader. The weights of a 7-billion model are 13 GiB. At this length
# the model is the small thing, and what it remembers is the large one.
#
# That table is $L \times 2Hd_h$ numbers in each layer, and there are two ways to make it smaller.
#
# | cut | idea | who | price |
# |---|---|---|---|
# | the **width**: fewer numbers a token | share heads (GQA, lesson 09), or store a compressed **latent** that all heads unfold (**MLA**) | Llama 3; DeepSeek-V2 and V3 | more arithmetic a byte |
# | the **length**: fewer tokens | a **window** of the latest; fixed patterns; a few tokens **chosen** for each query | Mistral; Longformer, BigBird; DeepSeek-V3.2 | what is not looked at cannot be used |
#
# The first half of this lesson is about width and ends in a kernel; the second is about length.
# They meet at the end: DeepSeek-V3.2 selects 2048 tokens, by a small learned index, out of a cache
# of latents.
#
# ### Shapes used throughout
#
# | symbol | meaning | in code | DeepSeek-V3 |
# |---|---|---|---|
# | $B$, $L$ | sequences; tokens in the cache | `batch`, `length` | |
# | $H$ | query heads | `heads` | 128 |
# | $d$ | width of a token vector $h_t$ | `d_model` | 7168 |
# | $r$, $r_q$ | width of the latent of keys and values, and of queries | `kv_rank`, `q_rank` | 512, 1536 |
# | $d_n$, $d_r$ | parts of a query or key without and with rotation | `nope_dim`, `rope_dim` | 128, 64 |
# | $d_v$ | width of a value | `v_dim` | 128 |

# %%
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm40 import checks, plot, profile, tl, triton
from torch import Tensor, nn


@dataclass(frozen=True)
class MLAConfig:
    """The sizes of multi-head latent attention."""

    d_model: int
    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    layers: int = 1


DEEPSEEK_V3 = MLAConfig(
    d_model=7168,
    heads=128,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    v_dim=128,
    layers=61,
)

# %% [markdown]
# # Part I · Width: multi-head latent attention
#
# ## One vector for all heads
#
# GQA makes the cache small by giving up heads of keys and values: of 32, it keeps 8. The query
# heads of a group must then agree on what a token offers. MLA (DeepSeek-V2, 2024) gives up none. It
# uses what linear algebra says about a stack of heads: the keys and values of all heads are *linear
# maps of one vector*, $h_t$. If a short vector $c_t$ already holds what they need, cache $c_t$ and
# unfold it on demand.
#
# $$ c_t = W^{DKV} h_t \in \mathbb R^{r}, \qquad k_{t,i} = W^{UK}_i c_t \in \mathbb R^{d_n}, \qquad v_{t,i} = W^{UV}_i c_t \in \mathbb R^{d_v}, \qquad i = 1 \dots H. $$
#
# D stands for down, U for up. This is a rank constraint on the stacked projection:
# $W^{K} = W^{UK} W^{DKV}$ has rank at most $r$ where MHA allows $\min(d, Hd_n)$. Every head still
# has keys of its own. GQA is the special case in which $W^{UK}$ only copies: $r = 2H_{kv}d_h$
# numbers, and each head's map picks one slice of them.
#
# What is stored is $c_t$, and (you will see why) a rotary key of $d_r$ numbers that all heads
# share: $r + d_r$ numbers a token and layer, whatever $H$ is.
#
# A warm-up with real sizes.


# %% exercise="mla_cache_bytes" minutes=10 difficulty=1
def mla_cache_bytes(config: MLAConfig, batch: int, seq: int, bytes_per_element: int = 2) -> int:
    """Bytes that all layers keep for `batch` sequences of `seq` tokens: per token and layer one
    latent and one shared rotary key.
    """
    ### BEGIN SOLUTION
    return batch * seq * config.layers * (config.kv_rank + config.rope_dim) * bytes_per_element
    ### END SOLUTION


def cache_comparison(
    seq: int,
    hidden: int = 4096,
    layers: int = 32,
    head_dim: int = 128,
    kv_rank: int = 512,
    rope_dim: int = 64,
) -> dict[str, float]:
    """The cache of one sequence in bfloat16, in GiB (2³⁰ bytes), under four kinds of attention.

    A model of width `hidden` has hidden // head_dim query heads. Returns {"MHA": …, "GQA-8": …,
    "MQA": …, "MLA": …}: as many key-value heads as query heads, 8 of them, 1, and a latent of
    kv_rank with a rotary key of rope_dim.
    """

    ### BEGIN SOLUTION
    def gib(numbers_per_token: int) -> float:
        return numbers_per_token * layers * seq * 2 / 2**30

    heads = hidden // head_dim
    return {
        "MHA": gib(2 * heads * head_dim),
        "GQA-8": gib(2 * 8 * head_dim),
        "MQA": gib(2 * head_dim),
        "MLA": gib(kv_rank + rope_dim),
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a key and a value?</summary>
#
# MHA stores both, so its width counts twice. Of what MLA stores, keys and values are both made: it
# counts once.
# </details>

# %% check="mla_cache_bytes" points=1
tiny = MLAConfig(
    d_model=16, heads=4, q_rank=8, kv_rank=6, nope_dim=4, rope_dim=2, v_dim=4, layers=3
)
checks.close(
    mla_cache_bytes(tiny, batch=2, seq=10),
    2 * 10 * 3 * 8 * 2,
    what="bytes for 2 sequences of 10 tokens, 3 layers, latent 6, rotary key 2",
    mistakes={
        "a rotary key for every head": 2 * 10 * 3 * (6 + 4 * 2) * 2,
        "counting the latent for keys and again for values": 2 * 10 * 3 * (12 + 2) * 2,
        "leaving out the rotary key": 2 * 10 * 3 * 6 * 2,
        "leaving out the layers": 2 * 10 * 8 * 2,
    },
)
### BEGIN HIDDEN TESTS
# 61 layers of 576 numbers of 2 bytes: 70,272 bytes a token, the figure that DeepSeek gives for V3.
checks.close(mla_cache_bytes(DEEPSEEK_V3, 1, 1), 70_272, what="DeepSeek-V3, bytes per token")
checks.close(
    mla_cache_bytes(DEEPSEEK_V3, 8, 1000, bytes_per_element=1),
    281_088_000,
    what="DeepSeek-V3, 8 sequences of 1000 tokens in 8 bits",
)
checks.close(
    mla_cache_bytes(MLAConfig(1, 99, 5, 7, 3, 4, 9, layers=2), 3, 5, 4), 1320, what="an odd layer"
)
### END HIDDEN TESTS

# %% check="mla_cache_bytes" points=1
table = cache_comparison(131_072)
assert isinstance(table, dict), "cache_comparison returns a dictionary"
assert set(table) == {"MHA", "GQA-8", "MQA", "MLA"}, (
    f"the keys are MHA, GQA-8, MQA and MLA; yours are {sorted(table)}"
)
checks.close(
    float(table["MHA"]),
    64.0,
    what="MHA at 128k tokens, width 4096, 32 layers, in GiB",
    mistakes={"counting keys or values but not both": 32.0, "GB of 10⁹ bytes": 68.719476736},
)
checks.close(
    float(table["MLA"]),
    4.5,
    what="MLA 512 + 64 at 128k tokens, in GiB",
    mistakes={"counting the latent twice": 9.0, "the latent alone": 4.0},
)
### BEGIN HIDDEN TESTS
checks.close(
    float(table["GQA-8"]),
    16.0,
    what="GQA-8 at 128k tokens, in GiB",
    mistakes={"8 query heads to a group, so 4 key-value heads": 8.0},
)
checks.close(float(table["MQA"]), 2.0, what="MQA at 128k tokens, in GiB")
for hidden, head_dim, expected in [
    (1536, 96, {"MHA": 3072, "GQA-8": 1536, "MQA": 192, "MLA": 224}),
    (960, 40, {"MHA": 1920, "GQA-8": 640, "MQA": 80, "MLA": 224}),
    (1000, 96, {"MHA": 1920, "GQA-8": 1536, "MQA": 192, "MLA": 224}),  # 10 heads, 40 numbers more
]:
    other = cache_comparison(1000, hidden, 24, head_dim, kv_rank=192, rope_dim=32)
    for name, elements in expected.items():
        checks.close(
            float(other[name]),
            elements * 24 * 1000 * 2 / 2**30,
            what=f"{name}, width {hidden} in heads of {head_dim}, 24 layers, 1000 tokens",
            hint="The number of heads is hidden // head_dim",
        )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: cache against context, for each kind of attention
contexts = [2**n for n in range(10, 21)]
tables = [cache_comparison(n) for n in contexts]
growth = {
    "MHA, 32 heads": "MHA",
    "GQA, 8 heads": "GQA-8",
    "MLA, 512 + 64": "MLA",
    "MQA, 1 head": "MQA",
}
lines = {label: [t[key] for t in tables] for label, key in growth.items()}
lines["GQA-8, window of 4096"] = [cache_comparison(min(n, 4096))["GQA-8"] for n in contexts]
fig, ax = plot.plt.subplots(figsize=(7.4, 4.2))
plot.curves(
    contexts,
    lines,
    logx=True,
    logy=True,
    xlabel="context (tokens)",
    ylabel="cache of one sequence (GiB)",
    title="width 4096, 32 layers, bfloat16",
    ax=ax,
)
ax.axhline(80, color="#888888", linewidth=1, linestyle=":")
ax.annotate(
    "memory of an 80 GiB accelerator",
    (contexts[0], 80),
    textcoords="offset points",
    xytext=(0, 4),
    fontsize=8,
)
plot.caption(
    fig,
    "Computed by your functions. Cutting the width moves a line down and leaves its slope: MLA "
    f"lies a factor of {tables[0]['MHA'] / tables[0]['MLA']:.0f} under MHA, between GQA with 8 "
    "heads and MQA. Cutting the length changes the slope: a window is flat from 4096 on.",
)
plot.plt.show()

# %% [markdown]
# ## Where the rotation gets in the way
#
# Unfolding $c_t$ into keys and values of 128 heads for every token at every step would cost more
# than it saves. It is not necessary. Write the score of head $i$ between the token $t$ and an
# earlier token $s$, with the query also made from a latent, $q_{t,i} = W^{UQ}_i c^Q_t$ (this one is
# not cached; it saves parameters and activations in training):
#
# $$ q_{t,i}^\top k_{s,i} = \left(W^{UQ}_i c^Q_t\right)^\top W^{UK}_i c_s = \Big(\underbrace{W^{UK\top}_i W^{UQ}_i}_{r \times r_q}\, c^Q_t\Big)^{\!\top} c_s. $$
#
# The matrix that would unfold the key has moved to the query: it is **absorbed**. The cached $c_s$
# is used as it lies there, as if it were one key that all heads share.
#
# Now add RoPE (lesson 08). It turns a query at position $t$ by an orthogonal matrix $R_t$ and a key
# at $s$ by $R_s$, and since $R_t^\top R_s = R_{s-t}$ only the distance remains:
#
# $$ (R_t\, W^{UQ}_i c^Q_t)^\top (R_s\, W^{UK}_i c_s) = c^{Q\top}_t\, W^{UQ\top}_i\; R_{s-t}\; W^{UK}_i\; c_s. $$
#
# The rotation sits **between** the two matrices and does not commute with them, so there is one
# product for every distance. Nothing can be absorbed, and every key must be unfolded again at every
# step.
#
# The way out is to separate the two jobs, **decoupled RoPE**: one part of the key says *what*
# (unrotated, from the latent), another, short, says *where* (rotated, and cached as it is). The
# second part, $d_r = 64$ numbers, is shared by all heads, as in MQA; queries have one of their own
# for each head:
#
# $$ q_{t,i} = [\,W^{UQ}_i c^Q_t\,;\; R_t W^{QR}_i c^Q_t\,],
# \qquad k_{s,i} = [\,W^{UK}_i c_s\,;\; R_s W^{KR} h_s\,], \qquad
# \text{score} = \frac{q_{t,i}^\top k_{s,i}}{\sqrt{d_n + d_r}} . $$
#
# Note the root. The dot product of lesson 09 has $d_n + d_r = 192$ terms, so that its variance is
# 192 if the terms are independent of variance 1. Absorbed, the same number is computed as a sum of
# $r + d_r = 576$ terms. **It is the same number**; its spread has not changed and neither has the
# scale. In code that runs in the latent space $1/\sqrt{576}$ is the tempting mistake: it makes
# every softmax too flat.
#
# Two more facts complete the layer. Both latents pass through an **RMSNorm** (lesson 04) before
# they are unfolded: the product of two matrices in a row would otherwise be free to drift in scale.
# And values carry no position, so $v_{s,i} = W^{UV}_i c_s$ needs no second part.


# %%
def rope(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Turns each pair (x[i], x[i + dim/2]) of the last axis by position · theta^(−2i/dim).

    x: (…, seq, dim), dim even; positions: (seq,), integers. Angles are computed in float64, as in
    lesson 08. The half-split layout, as in Llama; DeepSeek's checkpoints pair (x[2i], x[2i + 1]),
    which is the same model with the rows of W^QR and W^KR in another order.
    """
    half = x.shape[-1] // 2
    exponents = -torch.arange(half, device=x.device, dtype=torch.float64) / half
    angles = positions[:, None] * theta**exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# %% exercise="mla" minutes=35 difficulty=3
class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention with low-rank queries, keys and values, and a shared rotary key. The
    parameters are given; write the two methods.
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        c = self.config = config
        self.w_dq = nn.Linear(c.d_model, c.q_rank, bias=False)  # down: the latent of the queries
        self.q_norm = nn.RMSNorm(c.q_rank, eps=1e-6)
        # Up: head i has rows i·nope_dim … (i+1)·nope_dim − 1; the part to be rotated likewise.
        self.w_uq = nn.Linear(c.q_rank, c.heads * c.nope_dim, bias=False)
        self.w_qr = nn.Linear(c.q_rank, c.heads * c.rope_dim, bias=False)
        self.w_dkv = nn.Linear(c.d_model, c.kv_rank, bias=False)  # down: keys' and values' latent
        self.kv_norm = nn.RMSNorm(c.kv_rank, eps=1e-6)
        self.w_kr = nn.Linear(c.d_model, c.rope_dim, bias=False)  # one rotary key, from x itself
        self.w_uk = nn.Linear(c.kv_rank, c.heads * c.nope_dim, bias=False)
        self.w_uv = nn.Linear(c.kv_rank, c.heads * c.v_dim, bias=False)
        self.w_o = nn.Linear(c.heads * c.v_dim, c.d_model, bias=False)

    def latents(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """What a cache would hold of these tokens.

        x: (batch, seq, d_model), the tokens at positions start, start + 1, ….
        Returns c_kv (batch, seq, kv_rank), normalized, and k_rope (batch, seq, rope_dim), rotated.
        """
        ### BEGIN SOLUTION
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return self.kv_norm(self.w_dkv(x)), rope(self.w_kr(x), positions)
        ### END SOLUTION

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x: (batch, seq, d_model), at positions start, start + 1, ….

        Returns (batch, seq, d_model).

        Head i of a token's query is [W^UQ_i c_q ; rotated W^QR_i c_q] with c_q = q_norm(W^DQ x);
        its key is [W^UK_i c_kv ; k_rope], its value W^UV_i c_kv. Scores are scaled by
        1/√(nope_dim + rope_dim); a token sees itself and those before it. The heads' outputs are
        joined in order and go through W^O. PyTorch's scaled_dot_product_attention may be used.
        """
        ### BEGIN SOLUTION
        c = self.config
        c_kv, k_rope = self.latents(x, start)
        c_q = self.q_norm(self.w_dq(x))
        positions = torch.arange(start, start + x.shape[1], device=x.device)

        def heads(t: Tensor, width: int) -> Tensor:  # → (batch, heads, seq, width)
            return t.unflatten(-1, (c.heads, width)).transpose(1, 2)

        q = torch.cat(
            [heads(self.w_uq(c_q), c.nope_dim), rope(heads(self.w_qr(c_q), c.rope_dim), positions)],
            dim=-1,
        )
        k_shared = k_rope[:, None].expand(-1, c.heads, -1, -1)
        k = torch.cat([heads(self.w_uk(c_kv), c.nope_dim), k_shared], dim=-1)
        out = F.scaled_dot_product_attention(
            q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True
        )  # scales by the width of q
        return self.w_o(out.transpose(1, 2).flatten(-2))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which axis does the rotation want?</summary>
#
# `rope` needs the sequence on the axis before the last. For the queries that is after the heads
# have been moved in front of it. The rotary key has no axis of heads yet when it is rotated.
# </details>
#
# <details><summary>Hint: one rotary key, many heads</summary>
#
# `k_rope[:, None]` is (batch, 1, seq, rope_dim); `expand` gives it an axis of heads without
# copying.
# </details>
#
# <details><summary>Hint: what is normalized, what is not</summary>
#
# The norms belong to the two latents. The rotary key comes from `x` by one matrix and is not
# normalized.
# </details>


# %%
def fill_randomly(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Matrices with a spread of 1/√(inputs), norms' weights between 0.5 and 1.5."""
    wide = {"generator": generator, "dtype": torch.float64}
    with torch.no_grad():
        for p in module.parameters():
            matrix = torch.randn(p.shape, **wide) / p.shape[-1] ** 0.5
            p.copy_(matrix if p.dim() > 1 else 0.5 + torch.rand(p.shape, **wide))
    return module.to(profile.device)


# %% check="mla" points=2
g = checks.generator(1)
layer = fill_randomly(
    MultiHeadLatentAttention(
        MLAConfig(d_model=12, heads=3, q_rank=6, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=3)
    ).double(),
    g,
)
x = checks.randn(2, 4, 12, generator=g, dtype=torch.float64)
with checks.kept(layer):
    c_kv, k_rope = layer.latents(x)
flat = x @ layer.w_dkv.weight.T
normed = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_norm.weight
checks.close(c_kv, normed, what="c_kv", mistakes={"leaving out the norm of the latent": flat})
plain = x @ layer.w_kr.weight.T
angle = torch.arange(
    4, device=x.device, dtype=x.dtype
)  # rope_dim 2: one pair, turned by 1 radian a position
turned = torch.stack(
    [
        plain[..., 0] * angle.cos() - plain[..., 1] * angle.sin(),
        plain[..., 0] * angle.sin() + plain[..., 1] * angle.cos(),
    ],
    -1,
)
checks.close(k_rope, turned, what="k_rope", mistakes={"a rotary key that is not rotated": plain})
### BEGIN HIDDEN TESTS
for start, seq, rope_dim in [(0, 1, 4), (3, 5, 6), (1000, 2, 2)]:
    layer = fill_randomly(
        MultiHeadLatentAttention(MLAConfig(8, 2, 4, 6, 3, rope_dim, 5)).double(), g
    )
    x = checks.randn(3, seq, 8, generator=g, dtype=torch.float64)
    with checks.unchanged(x=x), checks.kept(layer):
        c_kv, k_rope = layer.latents(x, start)
    pairs = torch.complex(*(x @ layer.w_kr.weight.T).chunk(2, -1))
    frequency = 10_000.0 ** (
        -2 * torch.arange(rope_dim // 2, device=x.device, dtype=x.dtype) / rope_dim
    )
    phase = torch.arange(start, start + seq, device=x.device)[:, None] * frequency
    pairs = pairs * torch.polar(torch.ones_like(phase), phase)
    checks.close(
        k_rope, torch.cat([pairs.real, pairs.imag], -1), what=f"k_rope from position {start} on"
    )
    checks.close(
        c_kv,
        F.rms_norm(F.linear(x, layer.w_dkv.weight), (6,), layer.kv_norm.weight, 1e-6),
        what="c_kv",
    )
### END HIDDEN TESTS

# %% check="mla" points=2
# Queries of zero make all scores equal: each token averages the values of itself and those before
# it.
g = checks.generator(2)
layer = fill_randomly(
    MultiHeadLatentAttention(
        MLAConfig(d_model=12, heads=3, q_rank=6, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=3)
    ).double(),
    g,
)
with torch.no_grad():
    layer.w_uq.weight.zero_()
    layer.w_qr.weight.zero_()
x = checks.randn(1, 5, 12, generator=g, dtype=torch.float64)
latent = F.rms_norm(F.linear(x, layer.w_dkv.weight), (5,), layer.kv_norm.weight, 1e-6)
counts = torch.arange(1, 6, device=x.device, dtype=x.dtype)[:, None]
matrix = layer.w_o.weight @ layer.w_uv.weight  # values and output projection of all heads, in one
checks.close(
    layer(x),
    (latent.cumsum(1) / counts) @ matrix.T,
    what="the output for queries of zero",
    mistakes={
        "attention that is not causal": (latent.mean(1, keepdim=True)).expand(1, 5, 5) @ matrix.T,
        "leaving out the norm of the latent": (F.linear(x, layer.w_dkv.weight).cumsum(1) / counts)
        @ matrix.T,
    },
)


### BEGIN HIDDEN TESTS
def mla_by_hand(layer, x, start=0, scale=None, rotate_everything=False, normalize_q=True):
    """One token and one head at a time, in float64, rotating pairs as complex numbers."""
    c = layer.config
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    x = x.detach().double()

    def norm(v, weight):
        return v / (v.square().mean() + 1e-6).sqrt() * weight

    def turn(v, position):
        half = len(v) // 2
        angle = position * 10_000.0 ** (
            -2 * torch.arange(half, device=v.device, dtype=v.dtype) / len(v)
        )
        z = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            joined = []
            for i in range(c.heads):

                def up(name, width, v, i=i):
                    return w[name][i * width : (i + 1) * width] @ v

                c_q = w["w_dq.weight"] @ x[b, t]
                c_q = norm(c_q, w["q_norm.weight"]) if normalize_q else c_q
                what, where = (
                    up("w_uq.weight", c.nope_dim, c_q),
                    turn(up("w_qr.weight", c.rope_dim, c_q), start + t),
                )
                what = turn(what, start + t) if rotate_everything else what
                scores, values = [], []
                for s in range(t + 1):
                    latent = norm(w["w_dkv.weight"] @ x[b, s], w["kv_norm.weight"])
                    key = up("w_uk.weight", c.nope_dim, latent)
                    key = turn(key, start + s) if rotate_everything else key
                    scores.append(what @ key + where @ turn(w["w_kr.weight"] @ x[b, s], start + s))
                    values.append(up("w_uv.weight", c.v_dim, latent))
                weights = torch.softmax(
                    torch.stack(scores) * (scale or (c.nope_dim + c.rope_dim) ** -0.5), 0
                )
                joined.append(weights @ torch.stack(values))
            out[b, t] = w["w_o.weight"] @ torch.cat(joined)
    return out


for config, batch, seq, start in [
    (MLAConfig(12, 3, 6, 9, 4, 2, 3), 2, 5, 0),
    (MLAConfig(10, 2, 4, 16, 6, 4, 7), 1, 4, 7),
    (MLAConfig(6, 1, 3, 5, 2, 2, 2), 3, 1, 2),
]:
    layer = fill_randomly(MultiHeadLatentAttention(config).double(), g)
    x = checks.randn(batch, seq, config.d_model, generator=g, dtype=torch.float64)
    with checks.unchanged(x=x):
        out = layer(x, start)
    checks.close(
        out,
        mla_by_hand(layer, x, start),
        what=f"the output of {config.heads} heads, {seq} tokens from position {start} on",
        mistakes={
            "scaling by the latent width, 1/√(kv_rank + rope_dim),": mla_by_hand(
                layer, x, start, scale=(config.kv_rank + config.rope_dim) ** -0.5
            ),
            "scaling by 1/√nope_dim": mla_by_hand(layer, x, start, scale=config.nope_dim**-0.5),
            "rotating the whole key and query (absorption would be impossible)": mla_by_hand(
                layer, x, start, rotate_everything=True
            ),
            "leaving out the norm of the query latent": mla_by_hand(
                layer, x, start, normalize_q=False
            ),
        },
    )
single = fill_randomly(MultiHeadLatentAttention(MLAConfig(32, 4, 16, 24, 8, 4, 8)), g)
x = checks.randn(2, 9, 32, generator=g)
checks.close(
    single(x), mla_by_hand(single, x), what="the output in float32", dtype=torch.float32, rtol=2e-5
)
### END HIDDEN TESTS

# %% check="mla" points=2
# Rotation makes scores depend on distances only: the same tokens, 100 positions later, give the
# same output.
g = checks.generator(3)
layer = fill_randomly(MultiHeadLatentAttention(MLAConfig(16, 2, 8, 8, 4, 4, 6)).double(), g)
x = checks.randn(2, 6, 16, generator=g, dtype=torch.float64)
checks.close(
    layer(x, 100),
    layer(x, 0),
    what="the output 100 positions later",
    rtol=1e-8,
    hint="Are queries and keys turned by the same positions, both from start on?",
)
### BEGIN HIDDEN TESTS
changed = x.clone()
changed[:, 4] += 1
out, other = layer(x).detach(), layer(changed).detach()
checks.close(
    other[:, :4],
    out[:, :4],
    what="outputs 0 to 3 after token 4 was changed",
    hint="No token may see a later one",
)
assert float((other[:, 4:] - out[:, 4:]).abs().min()) > 0, "token 4 must reach itself and token 5"
swapped = x[:, [1, 0, 2, 3, 4, 5]]
assert float((layer(swapped).detach()[:, 5] - out[:, 5]).abs().max()) > 1e-3, (
    "exchanging tokens 0 and 1 does not change what token 5 gets: is the rotary part used?"
)
checks.close(layer(x[[1, 0]]), out[[1, 0]], what="the output of a permuted batch")
layer(x).square().sum().backward()
for name, parameter in layer.named_parameters():
    assert parameter.grad is not None, f"no gradient reaches {name}"
    assert float(parameter.grad.abs().max()) > 0, f"the gradient of {name} is 0"
### END HIDDEN TESTS

# %% [markdown]
# ## Absorption
#
# The layer above is how MLA is trained and how it reads a prompt: keys and values unfolded,
# ordinary multi-head attention with heads of 192 and 128. For decoding, unfold nothing. The score
# takes one rewriting, as derived; the output takes another. With weights $w_s$ of head $i$ over the
# cached tokens,
#
# $$ o_i = \sum_s w_s\, v_{s,i} = \sum_s w_s\, W^{UV}_i c_s = W^{UV}_i\,
# \underbrace{\sum_s w_s\, c_s}_{\bar c_i\, \in\, \mathbb R^{r}}, \qquad
# y = \sum_i W^O_i\, o_i = \sum_i \underbrace{W^O_i W^{UV}_i}_{d \times r}\, \bar c_i . $$
#
# $W^O_i$, $(d, d_v)$, are the columns of $W^O$ that meet head $i$. Averaging comes before unfolding
# because both are linear. So in the latent space MLA *is* multi-query attention: $H$ query heads of
# width $r + d_r$, **one** key head of the same width, and **one** value head which is the first $r$
# numbers of that key. The rotary numbers take part in the score and not in the value.


# %% exercise="absorb" minutes=10 difficulty=2
def absorb(w_uq: Tensor, w_uk: Tensor, w_uv: Tensor, w_o: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices that lead a query latent into the cache's latent space, and an average out.

    w_uq: (heads, nope_dim, q_rank).
    w_uk: (heads, nope_dim, kv_rank).
    w_uv: (heads, v_dim, kv_rank).
    w_o:  (d_model, heads · v_dim), as in nn.Linear.

    Returns (w_q, w_out): w_q (heads, kv_rank, q_rank), so that c_kv · (w_q[i] c_q) is the unrotated
    part of head i's score, not yet scaled; w_out (heads, d_model, kv_rank), so that the sum over
    heads of w_out[i] c̄_i is the layer's output. In the dtype of the inputs.
    """
    ### BEGIN SOLUTION
    w_q = w_uk.transpose(1, 2) @ w_uq
    w_o = w_o.unflatten(1, (w_uv.shape[0], -1)).transpose(0, 1)  # (heads, d_model, v_dim)
    return w_q, w_o @ w_uv
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which product, which way round?</summary>
#
# Write the score as a row times matrices times a column, and move the brackets. The matrix that
# lands between the latents has the cache's latent on its left.
# </details>
#
# <details><summary>Hint: cutting W^O</summary>
#
# Its columns come in runs of v_dim, one run a head: `unflatten` the second axis, then put the heads
# in front.
# </details>

# %% check="absorb" points=1
g = checks.generator(4)
w_uq, w_uk, w_uv, w_o = (
    checks.randn(*shape, generator=g, dtype=torch.float64)
    for shape in ((2, 3, 7), (2, 3, 5), (2, 4, 5), (6, 8))
)
result = absorb(w_uq, w_uk, w_uv, w_o)
assert type(result) is tuple, "absorb returns two matrices, (w_q, w_out)"
c_q, c_kv = (checks.randn(n, generator=g, dtype=torch.float64) for n in (7, 5))
checks.close(
    result[0][1] @ c_q @ c_kv,
    (w_uq[1] @ c_q) @ (w_uk[1] @ c_kv),
    what="head 1's score, q · k",
    atol=1e-9,
)
### BEGIN HIDDEN TESTS
for heads, nope, q_rank, kv_rank, v_dim, d_model in [
    (1, 1, 1, 1, 1, 1),
    (3, 4, 6, 5, 7, 11),
    (5, 2, 3, 9, 2, 10),
]:
    w_uq, w_uk, w_uv, w_o = (
        checks.randn(*shape, generator=g, dtype=torch.float64)
        for shape in (
            (heads, nope, q_rank),
            (heads, nope, kv_rank),
            (heads, v_dim, kv_rank),
            (d_model, heads * v_dim),
        )
    )
    with checks.unchanged(w_uq=w_uq, w_uk=w_uk, w_uv=w_uv, w_o=w_o):
        w_q, w_out = absorb(w_uq, w_uk, w_uv, w_o)
    what = f"{heads} heads, nope_dim {nope}, q_rank {q_rank}, kv_rank {kv_rank}"
    checks.close(
        w_q, torch.einsum("hnr,hnq->hrq", w_uk, w_uq), what=f"w_q, {what}", dtype=torch.float64
    )
checks.keeps_dtype(absorb, w_uq, w_uk, w_uv, w_o, what="a matrix of absorb")
### END HIDDEN TESTS

# %% check="absorb" points=1
averages = checks.randn(2, 5, generator=checks.generator(5), dtype=torch.float64)  # c̄ of 2 heads
w_uv, w_o = (
    checks.randn(*shape, generator=checks.generator(6 + len(shape)), dtype=torch.float64)
    for shape in ((2, 4, 5), (6, 8))
)
dummy = torch.ones(2, 3, 5, dtype=torch.float64, device=w_o.device)
_, w_out = absorb(dummy, dummy, w_uv, w_o)
joined = torch.cat([w_uv[i] @ averages[i] for i in range(2)])
interleaved = torch.stack([w_uv[i] @ averages[i] for i in range(2)], 1).flatten()
checks.close(
    (w_out @ averages[..., None]).sum(0)[:, 0],
    w_o @ joined,
    what="the layer's output from the averages of two heads",
    mistakes={"reading W^O's columns as heads dealt out in turn": w_o @ interleaved},
    hint="W^O meets the heads' values joined in order: its first v_dim columns belong to head 0",
)
### BEGIN HIDDEN TESTS
g = checks.generator(9)
for heads, v_dim, kv_rank, d_model in [(1, 3, 2, 5), (4, 3, 6, 5), (3, 7, 2, 1)]:
    w_uv, w_o = (
        checks.randn(heads, v_dim, kv_rank, generator=g, dtype=torch.float64),
        checks.randn(d_model, heads * v_dim, generator=g, dtype=torch.float64),
    )
    dummy = torch.ones(heads, 2, kv_rank, dtype=torch.float64, device=w_o.device)
    _, w_out = absorb(dummy, dummy, w_uv, w_o)
    expected = torch.stack([w_o[:, i * v_dim : (i + 1) * v_dim] @ w_uv[i] for i in range(heads)])
    checks.close(w_out, expected, what=f"w_out for {heads} heads of {v_dim}", dtype=torch.float64)
### END HIDDEN TESTS

# %% [markdown]
# *Production code keeps the factors.* Multiplied out, $W^{UK\top}_iW^{UQ}_i$ of DeepSeek-V3 has
# $512\cdot1536$ numbers a head, three times what the two factors have together, and each number
# must be read at every step. So one applies $W^{UQ}_i$ and then $W^{UK\top}_i$. What absorption
# gives is the *order* of the products, the cache last and untouched, rather than a smaller matrix.
# Multiplied out it is easier to see and to check, which is why you do it here.
#
# Now a decoding step. The new token's projections are those of `forward`; the rest happens in the
# latent space.


# %% tags=["support"]
# Support: the same step with keys and values unfolded, and random tensors for it


def unabsorbed(c_q, q_rope, cache, w_uq, w_uk, w_uv, w_o, scale=None):
    """The step with keys and values of every head, in float64; cache includes the new token."""
    c_q, q_rope, cache = (t.double() for t in (c_q, q_rope, cache))
    w_uq, w_uk, w_uv, w_o = (t.double() for t in (w_uq, w_uk, w_uv, w_o))
    rank = w_uk.shape[-1]
    heads = []
    for i in range(len(w_uk)):
        keys = torch.cat([cache[..., :rank] @ w_uk[i].T, cache[..., rank:]], -1)
        query = torch.cat([c_q @ w_uq[i].T, q_rope[:, i]], -1)
        scores = (keys @ query[..., None])[..., 0] * (scale or query.shape[-1] ** -0.5)
        heads.append((scores.softmax(-1)[:, None] @ (cache[..., :rank] @ w_uv[i].T))[:, 0])
    return torch.cat(heads, -1) @ w_o.T


def decode_case(
    batch, past, heads, q_rank, rank, nope, rope_dim, v_dim, d_model, g, dtype=torch.float32
):
    """(c_q, q_rope, entry, cache), the four unabsorbed matrices, and the two absorbed ones."""
    inputs = [
        checks.randn(*s, generator=g, dtype=dtype)
        for s in (
            (batch, q_rank),
            (batch, heads, rope_dim),
            (batch, rank + rope_dim),
            (batch, past, rank + rope_dim),
        )
    ]
    shapes = (
        (heads, nope, q_rank),
        (heads, nope, rank),
        (heads, v_dim, rank),
        (d_model, heads * v_dim),
    )
    weights = [checks.randn(*s, generator=g, dtype=dtype, scale=s[-1] ** -0.5) for s in shapes]
    w_uq, w_uk, w_uv, w_o = (w.double() for w in weights)
    w_q = torch.einsum("hnr,hnq->hrq", w_uk, w_uq)
    w_out = torch.stack([w_o[:, i * v_dim : (i + 1) * v_dim] @ w_uv[i] for i in range(heads)])
    return inputs, weights, [w_q.to(dtype), w_out.to(dtype)]


# %% exercise="decode_absorbed" minutes=20 difficulty=3
def decode_absorbed(
    c_q: Tensor,
    q_rope: Tensor,
    entry: Tensor,
    cache: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    nope_dim: int,
) -> tuple[Tensor, Tensor]:
    """One step of decoding: the new token attends to the cache and to itself, in the latent space.

    c_q:    (batch, q_rank), the new token's query latent, normalized.
    q_rope: (batch, heads, rope_dim), its queries' rotary part, rotated.
    entry:  (batch, kv_rank + rope_dim), what is to be cached of it: [c_kv ; k_rope], normalized and
        rotated.
    cache:  (batch, past, kv_rank + rope_dim), the entries of the tokens before it; past may be 0.
    w_q, w_out: the absorbed matrices, (heads, kv_rank, q_rank) and (heads, d_model, kv_rank).
    nope_dim: the width of the unabsorbed keys' unrotated part. Scores are those of the unabsorbed
        layer, its scale included.

    Returns (y, cache): y (batch, d_model) in the dtype of c_q, and the cache with the new entry
    behind the old ones, (batch, past + 1, kv_rank + rope_dim), in the cache's dtype, which may be
    coarser than that of all else; the token may see its own entry so rounded or as it came. Scores
    may be of any size. No keys or values of single heads are ever made: no tensor has more elements
    than the largest of the new cache, the scores (batch, heads, past + 1), the absorbed queries
    (batch, heads, kv_rank + rope_dim), w_q and w_out.
    """
    ### BEGIN SOLUTION
    kv_rank, rope_dim = w_q.shape[1], q_rope.shape[-1]
    cache = torch.cat([cache, entry[:, None].to(cache.dtype)], dim=1)
    entries = cache.to(c_q.dtype)
    q = torch.cat([torch.einsum("hrq,bq->bhr", w_q, c_q), q_rope], dim=-1)  # a row for each head
    scores = q @ entries.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)  # (…, heads, past + 1)
    average = scores.softmax(-1) @ entries[..., :kv_rank]  # (batch, heads, kv_rank)
    return torch.einsum("hdr,bhr->bd", w_out, average), cache
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the queries of all heads, one key head</summary>
#
# (batch, heads, width) times the transposed cache, (batch, width, past + 1), is one batched
# product: the heads are its rows.
# </details>
#
# <details><summary>Hint: kv_rank is not an argument</summary>
#
# Two of the shapes tell it. The values are that part of the cache.
# </details>

# %% check="decode_absorbed" points=3
g = checks.generator(10)
inputs, weights, absorbed = decode_case(1, 3, 2, 4, 6, 4, 2, 3, 5, g)
y, grown = decode_absorbed(*inputs, *absorbed, nope_dim=4)
whole = torch.cat([inputs[3], inputs[2][:, None]], 1)
checks.close(
    y,
    unabsorbed(*inputs[:2], whole, *weights),
    what="y, 2 heads and 3 cached tokens",
    rtol=1e-5,
    mistakes={
        "the scale 1/√(kv_rank + rope_dim)": unabsorbed(
            *inputs[:2], whole, *weights, scale=8**-0.5
        ),
        "the scale 1/√nope_dim": unabsorbed(*inputs[:2], whole, *weights, scale=4**-0.5),
        "a token that does not see itself": unabsorbed(*inputs[:2], inputs[3], *weights),
    },
)
### BEGIN HIDDEN TESTS
for sizes in [
    (1, 0, 1, 3, 4, 2, 2, 2, 3),
    (3, 7, 5, 6, 9, 4, 2, 3, 8),
    (2, 1, 4, 5, 12, 3, 4, 5, 7),
    (2, 33, 3, 4, 8, 16, 2, 4, 6),
]:
    inputs, weights, absorbed = decode_case(*sizes, g)
    nope = sizes[5]
    with checks.unchanged(*inputs, *absorbed):
        y, grown = decode_absorbed(*inputs, *absorbed, nope)
    whole = torch.cat([inputs[3], inputs[2][:, None]], 1)
    what = "batch {}, past {}, heads {}, q_rank {}, kv_rank {}, nope_dim {}, rope_dim {}".format(
        *sizes[:7]
    )
    checks.close(
        y,
        unabsorbed(*inputs[:2], whole, *weights),
        what=f"y, {what}",
        dtype=torch.float32,
        mistakes={
            "the scale 1/√(kv_rank + rope_dim)": unabsorbed(
                *inputs[:2], whole, *weights, scale=(sizes[4] + sizes[6]) ** -0.5
            )
        },
    )
inputs, weights, absorbed = decode_case(2, 6, 3, 5, 8, 4, 4, 3, 6, g)
# Scores from −200 to 200; all near 200; all near −200: in float32 e^200 overflows, e^−200 vanishes.
for spread, shift in ((40.0, 0.0), (1.0, 12.0), (1.0, -12.0)):
    c_q, q_rope, entry, cache = (t.clone() for t in inputs)
    c_q, q_rope = c_q * spread, q_rope * spread + shift
    entry[..., -4:] += abs(shift)
    cache[..., -4:] += abs(shift)
    y, _ = decode_absorbed(c_q, q_rope, entry, cache, *absorbed, 4)
    checks.close(
        y,
        unabsorbed(c_q, q_rope, torch.cat([cache, entry[:, None]], 1), *weights),
        what="y for scores of some hundreds" + (", all of one sign" if shift else ""),
        rtol=1e-3,
        hint="Does e^score overflow or vanish before it is divided by the sum?",
    )
# A cache coarser than the rest keeps its dtype, and so does the result.
for dtype, cache_dtype in [(torch.float32, torch.float16), (torch.float64, torch.float32)]:
    inputs, weights, absorbed = decode_case(2, 5, 3, 4, 6, 8, 2, 4, 7, g, dtype=dtype)
    inputs[3] = inputs[3].to(cache_dtype)
    y, grown = decode_absorbed(*inputs, *absorbed, 8)
    whole = torch.cat([inputs[3], inputs[2][:, None].to(cache_dtype)], 1)
    what = f"inputs in {dtype}, a cache in {cache_dtype}: "
    checks.close(grown, whole, what=what + "the new cache", dtype=cache_dtype, rtol=0)
    checks.close(
        y,
        unabsorbed(*inputs[:2], whole, *weights),
        what=what + "y",
        dtype=dtype,
        rtol=2e-3 if cache_dtype == torch.float16 else 1e-6,
    )
### END HIDDEN TESTS

# %% check="decode_absorbed" points=2
inputs, weights, absorbed = decode_case(2, 4, 8, 4, 6, 16, 2, 16, 5, checks.generator(11))
_, grown = decode_absorbed(*inputs, *absorbed, nope_dim=16)
checks.close(
    grown,
    torch.cat([inputs[3], inputs[2][:, None]], 1),
    what="the new cache",
    dtype=torch.float32,
    hint="It holds latents and rotary keys as they came, 8 numbers a token here: keys and values "
    "of 8 heads would be 256",
)
### BEGIN HIDDEN TESTS
batch, past, heads, rank, rope_dim, nope = 2, 63, 16, 12, 4, 32
inputs, weights, absorbed = decode_case(
    batch, past, heads, 6, rank, nope, rope_dim, 32, 20, checks.generator(12)
)
with checks.allocations() as made:
    y, grown = decode_absorbed(*inputs, *absorbed, nope)
assert grown.untyped_storage().nbytes() == 4 * batch * (past + 1) * (rank + rope_dim), (
    "the cache keeps more in memory than [c_kv ; k_rope] of each token"
)
limit = max(
    batch * (past + 1) * (rank + rope_dim),
    batch * heads * (past + 1),
    max(w.numel() for w in absorbed),
)
assert made.largest <= limit, (
    f"a tensor of {made.largest} elements was made; keys of all heads would have "
    f"{batch * heads * (past + 1) * (nope + rope_dim)}, and the cache has "
    f"{batch * (past + 1) * (rank + rope_dim)}: unfold nothing, and copy nothing for single heads"
)
# Law: decoding token by token equals the layer on the whole sequence.
heads, q_rank, rank, nope, rope_dim, v_dim, d_model, seq = 3, 5, 8, 4, 2, 6, 7, 12
inputs, weights, absorbed = decode_case(
    2,
    0,
    heads,
    q_rank,
    rank,
    nope,
    rope_dim,
    v_dim,
    d_model,
    checks.generator(13),
    dtype=torch.float64,
)
g = checks.generator(14)
latents, c_qs, q_ropes = (
    checks.randn(2, seq, *s, generator=g, dtype=torch.float64)
    for s in ((rank + rope_dim,), (q_rank,), (heads, rope_dim))
)
cache = latents[:, :0]
for t in range(seq):
    y, cache = decode_absorbed(c_qs[:, t], q_ropes[:, t], latents[:, t], cache, *absorbed, nope)
    checks.close(
        y,
        unabsorbed(c_qs[:, t], q_ropes[:, t], latents[:, : t + 1], *weights),
        what=f"y at step {t}",
        rtol=1e-8,
    )
### END HIDDEN TESTS

# %% [markdown]
# Your layer and your decoding step, put together: a sequence of 48 tokens once through `forward`,
# and once token by token with nothing but latents in the cache.

# %% tags=["experiment"]
config = MLAConfig(d_model=256, heads=8, q_rank=96, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32)
layer = fill_randomly(MultiHeadLatentAttention(config), checks.generator(15))
x = checks.randn(1, 48, config.d_model, generator=checks.generator(16))
by_head = [
    m.weight.detach().unflatten(0, (config.heads, -1)) for m in (layer.w_uq, layer.w_uk, layer.w_uv)
]
absorbed = absorb(*by_head, layer.w_o.weight.detach())
with torch.no_grad():
    at_once = layer(x)
    cache, steps = x.new_zeros(1, 0, config.kv_rank + config.rope_dim), []
    for t in range(x.shape[1]):
        c_q = layer.q_norm(layer.w_dq(x[:, t]))
        q_rope = rope(
            layer.w_qr(c_q).view(1, config.heads, 1, -1), torch.tensor([t], device=x.device)
        )[:, :, 0]
        entry = torch.cat(layer.latents(x[:, t : t + 1], start=t), -1)[:, 0]
        y, cache = decode_absorbed(c_q, q_rope, entry, cache, *absorbed, config.nope_dim)
        steps.append(y)
difference = float((torch.stack(steps, 1) - at_once).abs().max() / at_once.abs().max())
full = config.heads * (config.nope_dim + config.rope_dim + config.v_dim)
print(f"largest difference between the two: {difference:.1e} of the largest output")
print(
    f"numbers kept a token: {cache.shape[-1]}; keys and values of {config.heads} heads would be "
    f"{full}"
)

# %% [markdown]
# ## Experiment: the same cache, spent in three ways
#
# Take a small language model and give it 32 numbers of cache a token and layer, where plain MHA
# with four heads of 16 would keep 128. Three ways to spend them: MHA with heads shrunk to 4; one
# key-value head of 16 (MQA); MLA with a latent of 20 and a rotary key of 12. The fourth model is
# the plain one, with four times the cache. Same bytes of Python's documentation, same order,
# everything else alike.
#
# **Write down before you run it:** the order of the four losses. Is it settled by the width of the
# cache, or by what each head can still see?

# %% tags=["experiment"]
from llm40 import data

WIDTH, CONTEXT = 64, 64
training, held_out = data.split(data.deduplicate(data.documentation()))
text, other_text = (
    torch.tensor(list("\n".join(part.values()).encode())) for part in (training, held_out)
)


class GroupedAttention(nn.Module):
    """Plain attention with RoPE: `heads` query heads over `kv_heads`."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(WIDTH, heads * head_dim, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(WIDTH, kv_heads * head_dim, bias=False) for _ in range(2)
        )
        self.o_proj = nn.Linear(heads * head_dim, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        at = torch.arange(x.shape[1], device=x.device)
        out = F.scaled_dot_product_attention(
            rope(q, at), rope(k, at), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before, self.attention, self.between = nn.RMSNorm(WIDTH), attention, nn.RMSNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class ByteModel(nn.Module):
    """Two blocks over bytes; the embedding is also the read-out."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.Sequential(*(Block(attention()) for _ in range(2)))
        self.norm = nn.RMSNorm(WIDTH)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.4 / p.shape[-1] ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embed(tokens))), self.embed.weight)


def train_bytes(
    attention, steps: int = profile.pick(120, 1000), seed: int = 10
) -> tuple[list[float], float]:
    """Training losses, and the loss on documents kept apart; nats a byte."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ByteModel(attention).to(profile.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 20, (steps - s) / (0.4 * steps))
    )
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - CONTEXT, (16,), generator=generator)
        batch = text[starts[:, None] + torch.arange(CONTEXT + 1)].to(profile.device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    count = (len(other_text) - 1) // CONTEXT
    windows = other_text[: count * CONTEXT + 1].to(profile.device)
    with torch.no_grad():
        held = F.cross_entropy(model(windows[:-1].view(count, CONTEXT)).flatten(0, 1), windows[1:])
    return losses, held.item()


small = MLAConfig(WIDTH, heads=4, q_rank=32, kv_rank=20, nope_dim=8, rope_dim=12, v_dim=16)
variants = {
    "MHA, 4 heads of 16": (128, lambda: GroupedAttention(4, 4, 16)),
    "MHA, 4 heads of 4": (32, lambda: GroupedAttention(4, 4, 4)),
    "MQA, 1 head of 16": (32, lambda: GroupedAttention(4, 1, 16)),
    "MLA, 20 + 12": (32, lambda: MultiHeadLatentAttention(small)),
}
results = {name: train_bytes(attention) for name, (_, attention) in variants.items()}

# %% tags=["experiment", "figure"]
# Figure: what the same cache buys, spent in three ways
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.6, 1])
smooth = {
    name: torch.tensor(losses).unfold(0, 10, 5).mean(-1) for name, (losses, _) in results.items()
}
steps = torch.arange(len(next(iter(smooth.values())))) * 5 + 5
plot.curves(
    steps,
    smooth,
    xlabel="step",
    ylabel="training loss (nats per byte)",
    title="mean of 10 steps",
    ax=axes[0],
)
names = [f"{name}\n{variants[name][0]} numbers a token" for name in results]
held = [loss for _, loss in results.values()]
axes[1].barh(
    names[::-1], held[::-1], color=[plot.COLORS[i] for i in (3, 2, 1, 0)], edgecolor="black"
)
for i, loss in enumerate(held[::-1]):
    axes[1].annotate(
        f"{loss:.2f}", (loss, i), textcoords="offset points", xytext=(3, -3), fontsize=8
    )
axes[1].set(xlabel="held-out loss (nats per byte)", xlim=(min(held) - 0.2, max(held) + 0.15))
axes[1].set_title("cache and loss")
plot.caption(
    fig,
    "Four models that differ in their attention layers alone. The loss axis on the right does not "
    "begin at 0. Another seed moves each loss by about 0.05.",
)
plot.plt.show()

# %% [markdown]
# What came out, on the four seeds tried: a quarter of the cache, cut from the width of every head,
# costs 0.18 to 0.25 nats. The same quarter as a latent costs 0.03 to 0.08. (One seed with 320
# steps: 0.18 and 0.04.) So the width of the cache does not settle it; what counts is what a head
# can still compare.
#
# And the honest other half: at this size **MQA does as well as MLA**; what is between them is less
# than what another seed moves. Four small heads on simple text do not need keys of their own. The
# case for MLA over GQA and MQA comes from models with many heads and much to look up: DeepSeek-V2's
# ablations (its appendix D) find MHA clearly above GQA and MQA in a dense model of 7 billion
# parameters, and MLA above MHA in two larger mixtures of experts. You cannot see that here, and no
# toy shows it.

# %% [markdown]
# ## On the hardware: a kernel for the absorbed step
#
# Decoding usually waits for memory. MLA changes the balance. For each cached token a step reads
# $r + d_r$ numbers of two bytes and does, for each of $H$ heads, a score of $r + d_r$ terms and a
# sum of $r$ terms:
#
# $$ \text{intensity} = \frac{2H\,(r + d_r) + 2H\,r}{2\,(r + d_r)\ \text{bytes}} = \frac{H\,(2r + d_r)}{r + d_r}\ \frac{\text{FLOP}}{\text{byte}} \approx 1.9\,H . $$
#
# With 16 heads that is 30, far below the 206 at which an H200 (989 TFLOP/s, 4.8 TB/s) has as much
# arithmetic as bandwidth. With 128 heads it is 242: the same step is limited by the tensor cores.
# MHA, with numbers of two bytes too, sits at 1, whatever the number of heads.
#
# Both limits are reached only if each entry of the cache is **loaded once**: for all heads, and for
# the score and the average alike. That is what the kernel is for. PyTorch's products read the cache
# twice, and write and read the weights in between.
#
# 1. **The heads are the rows.** One query token gives one row a head. `BLOCK_H` heads fill the rows
#    of a tile of queries, so that `tl.dot` gets the 16 rows or more that it needs, and the loaded
#    latents serve all of them.
# 2. **Load once, use twice.** A tile of latents $C$, (`BLOCK_N`, $r$), makes the scores with
#    $C^\top$ and, a moment later, the average with $C$. The rotary columns are a second, narrow
#    tile that only the scores use.
# 3. **Online softmax** over the tiles. Keep, for each row, the running maximum $m$, the sum
#    $\ell = \sum_j e^{s_j - m}$ and the accumulator $a = \sum_j e^{s_j - m} c_j$. When a tile
#    raises the maximum to $m'$, everything summed so far was relative to the old one: multiply
#    $\ell$ and $a$ by $e^{m - m'}$ and go on. Lesson 29 derives this at length.
# 4. **Split the keys.** A batch of 32 and one block of heads make 32 programs, and an H200 has 132
#    multiprocessors. So each sequence's cache is cut into `splits` ranges for programs of their
#    own. A program writes the average over *its* keys and the logarithm of its sum,
#    $\lambda = m + \ln\ell$; the parts combine with weights $\mathrm{softmax}(\lambda)$, because
#    $e^{\lambda}$ is exactly the part's share of the common denominator.
# 5. **Powers of two.** The hardware's instruction is $2^x$: fold $\log_2 e$ into the scale, keep
#    $m$ and $\lambda$ in base 2.
#
# The combination is given, as a kernel to read before you write one. If Triton is new to you, begin
# with lesson 03's first kernels: a **program** is one entry of the grid; it loads tiles through
# pointers and masks, computes on them, and stores. Of your own kernel the queries' loads and the
# stores are given: you write which keys a program has, and the loop over their tiles.


# %%
@triton.jit
def combine_kernel(
    parts_ptr,
    lse_ptr,
    o_ptr,
    heads,
    splits,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One head of one sequence: the average over all keys from the averages over each split's keys.

    parts (batch, heads, splits, RANK) and lse (batch, heads, splits), float32, contiguous; o
    (batch, heads, RANK). Grid: (heads, batch). A split that saw no key has lse = -inf.
    """
    row = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    s, cols = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_R)
    lse = tl.load(lse_ptr + row * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)  # an empty sequence: -inf - -inf would be NaN
    total = tl.sum(tl.exp2(lse - top), axis=0)
    acc = tl.zeros((BLOCK_R,), tl.float32)
    for i in range(0, splits):  # one part at a time: hundreds of them would not fit in registers
        share = tl.exp2(tl.load(lse_ptr + row * splits + i) - top)
        acc += share * tl.load(
            parts_ptr + (row * splits + i) * RANK + cols, mask=cols < RANK, other=0.0
        )
    o = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + row * RANK + cols, o.to(o_ptr.dtype.element_ty), mask=cols < RANK)


# %% exercise="mla_decode_kernel" minutes=35 difficulty=3 path="more"
@triton.jit
def mla_decode_kernel(
    q_ptr, cache_ptr, lengths_ptr, parts_ptr, lse_ptr, cache_batch, cache_row, heads, splits,
    scale, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's keys, for BLOCK_H heads: average of the latents, log-sum-exp.

    q:       (batch, heads, RANK + ROPE), contiguous: absorbed queries, the rotary part last.
    cache:   (batch, capacity, RANK + ROPE), rows of [c_kv ; k_rope]; cache_batch and cache_row are
        its strides, the last axis is contiguous.
    lengths: (batch,) int32: sequence b has lengths[b] ≥ 0 entries. What lies behind them is not to
        be used.
    parts:   (batch, heads, splits, RANK) float32, contiguous: Σ_j p_j c_j / Σ_j p_j over this
        split's keys j, with p_j = exp(scale · q·[c_j ; k_j]).
    lse:     (batch, heads, splits) float32, contiguous: log2 Σ_j p_j. A split without keys stores 0
        and -inf.

    Grid: (splits, ⌈heads / BLOCK_H⌉, batch). Split s has the keys s·n … (s+1)·n − 1 below
    lengths[b], with n = ⌈lengths[b] / splits⌉ rounded up to a multiple of BLOCK_N. BLOCK_R ≥ RANK,
    BLOCK_P ≥ ROPE, BLOCK_H and BLOCK_N are powers of two, at least 16. q and cache share one dtype;
    sums are float32, and products of float32 are without TF32. The cache may be larger than 2³¹
    elements. Nothing outside the tensors is read.
    """
    split, head_block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    cols, rot = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    real = rows[:, None] < heads
    # The queries of BLOCK_H heads, in two tiles: for the latents, and for the rotary keys.
    q_rows = q_ptr + (batch * heads + rows[:, None]) * (RANK + ROPE)
    q_c = tl.load(q_rows + cols[None, :], mask=real & (cols[None, :] < RANK), other=0.0)
    q_r = tl.load(q_rows + RANK + rot[None, :], mask=real & (rot[None, :] < ROPE), other=0.0)

    length = tl.load(lengths_ptr + batch)
    cache_ptr += batch * cache_batch

    scale_log2 = scale * 1.4426950408889634  # exp(x) = exp2(x · log2 e)
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    ### BEGIN SOLUTION
    n = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N  # keys in a split: whole tiles
    start = split * n
    end = tl.minimum(start + n, length)  # below start where nothing is left: the loop does not run
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        here = keys < end
        entries = cache_ptr + keys[:, None].to(tl.int64) * cache_row
        c = tl.load(entries + cols[None, :], mask=here[:, None] & (cols[None, :] < RANK), other=0.0)
        k_r = tl.load(
            entries + RANK + rot[None, :], mask=here[:, None] & (rot[None, :] < ROPE), other=0.0
        )
        s = tl.dot(q_c, tl.trans(c), input_precision="ieee")
        s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
        s = tl.where(here[None, :], s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))  # finite: a tile's first key is a real one
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        # The same tile, as values.
        acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    ### END SOLUTION

    some = l > 0.0  # False where the split has no key
    l = tl.where(some, l, 1.0)
    out = (batch * heads + rows) * splits + split
    tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
    tl.store(
        parts_ptr + out[:, None] * RANK + cols[None, :],
        acc / l[:, None],
        mask=real & (cols[None, :] < RANK),
    )


# %% [markdown]
# <details><summary>Hint: which keys are mine?</summary>
#
# All from <code>start</code> to <code>end</code>, both computed from this sequence's own length.
# The last splits of a short sequence may begin behind its end; with <code>end</code> clamped to the
# length their loop does not run.
# </details>
# <details><summary>Hint: two products into one score</summary>
#
# <code>tl.dot(a, b, acc)</code> adds to what is there: first the latent columns, then the rotary
# ones on top. Both with <code>input_precision="ieee"</code>, so that float32 stays float32 on a
# GPU.
# </details>
# <details><summary>Hint: columns that are not there</summary>
#
# <code>BLOCK_R</code> and <code>BLOCK_P</code> are powers of two, RANK and ROPE need not be. Column
# RANK of a row is not padding: it is the first rotary number. Mask the columns of every load,
# with 0.
# </details>
# <details><summary>Hint: a split without keys</summary>
#
# m stays −∞ and l stays 0. The part to store is 0 and its lse −∞: the combination then gives it no
# share. A share for lse = 0 would be one key's.
# </details>


# %%
def tile(size):
    """The power of two that holds `size`, and at least the 16 that tl.dot asks for."""
    return max(16, triton.next_power_of_2(size))


def mla_decode(q, cache, lengths, rank, scale, splits=None, blocks=None, parts=None, lse=None):
    """Averages of latents (batch, heads, rank), in q's dtype, for one new token of each sequence.

    q (batch, heads, rank + rope_dim), cache (batch, capacity, rank + rope_dim), lengths (batch,)
    int32. `blocks` is (BLOCK_H, BLOCK_N).
    """
    batch, heads, width = q.shape
    q = q.contiguous()
    # On a GPU float32 goes without tensor cores: a tall tile does not fit in the registers.
    most_heads = 64 if profile.interpret or q.dtype != torch.float32 else 16
    block_h, block_n = blocks or (min(most_heads, tile(heads)), 32)
    head_blocks = triton.cdiv(heads, block_h)
    if splits is None:  # two programs for each multiprocessor, and no split shorter than four tiles
        device = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
        programs = 2 * device.multi_processor_count if device else 2
        most = triton.cdiv(cache.shape[1], 4 * block_n)
        splits = max(1, min(triton.cdiv(programs, batch * head_blocks), most))
    wide = {"dtype": torch.float32, "device": q.device}
    parts = torch.empty(batch, heads, splits, rank, **wide) if parts is None else parts
    lse = torch.empty(batch, heads, splits, **wide) if lse is None else lse
    strides = cache.stride(0), cache.stride(1)
    blocks = {"BLOCK_R": tile(rank), "BLOCK_P": tile(width - rank)}
    mla_decode_kernel[(splits, head_blocks, batch)](
        *(q, cache, lengths, parts, lse, *strides, heads, splits, scale),
        **{"RANK": rank, "ROPE": width - rank, "BLOCK_H": block_h, "BLOCK_N": block_n, **blocks},
        num_warps=8 if block_h > 16 else 4,
        num_stages=2,
    )
    o = torch.empty(batch, heads, rank, dtype=q.dtype, device=q.device)
    block_r, block_s = triton.next_power_of_2(rank), max(2, triton.next_power_of_2(splits))
    combine_kernel[(heads, batch)](
        *(parts, lse, o, heads, splits), RANK=rank, BLOCK_R=block_r, BLOCK_S=block_s, num_warps=4
    )
    return o


# %% tags=["support"]
# Support: the kernel's task in float64, inputs for it, and where it reads


@checks.measured
def stray_reads(kernel):
    """How many addresses the kernel reads that lie in none of its tensors, no memory being touched.

    The cache's rows are 2³⁰ elements apart. Interpreter only; None elsewhere.
    """
    heads, rank, rope_dim, capacity, splits = 3, 20, 6, 23, 2
    q = torch.zeros(2, heads, rank + rope_dim)
    cache, lengths = torch.zeros(1), torch.tensor([20, 23], dtype=torch.int32)
    parts, lse = torch.zeros(2, heads, splits, rank), torch.zeros(2, heads, splits)
    strides = (2**35, 2**30)
    with checks.traffic(only=lengths) as seen:
        if seen is None:
            return None
        kernel[(splits, 1, 2)](
            *(q, cache, lengths, parts, lse, *strides, heads, splits, 0.3),
            **{"RANK": rank, "ROPE": rope_dim, "BLOCK_R": 32, "BLOCK_P": 16},
            **{"BLOCK_H": 16, "BLOCK_N": 16},
        )
    known = checks.addresses(q) | checks.addresses(lengths)
    known |= checks.addresses(cache, (2, capacity, rank + rope_dim), (*strides, 1))
    return len(seen.read.keys() - known)


def decode_by_definition(q, cache, lengths, rank, scale):
    """The averages in float64, one sequence at a time; also each row's natural log-sum-exp.

    A sequence of length 0 gives 0 and -inf.
    """
    out, lse = [], []
    for b, n in enumerate(lengths.tolist()):
        keys = cache[b, :n].double()
        scores = q[b].double() @ keys.T * scale
        lse.append(
            scores.logsumexp(-1) if n else q.new_full((q.shape[1],), -math.inf, dtype=torch.float64)
        )
        out.append(
            scores.softmax(-1) @ keys[:, :rank]
            if n
            else q.new_zeros(q.shape[1], rank, dtype=torch.float64)
        )
    return torch.stack(out), torch.stack(lse)


def decode_inputs(batch, capacity, heads, rank, rope_dim, g, dtype=torch.float32, spread=1.0):
    q = checks.randn(batch, heads, rank + rope_dim, generator=g, scale=spread)
    return q.to(dtype), checks.randn(batch, capacity, rank + rope_dim, generator=g).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=profile.device)


# %% check="mla_decode_kernel" points=2
# One sequence of exactly two tiles of keys, one split, sizes that are powers of two.
q, cache = decode_inputs(1, 32, 4, 16, 16, checks.generator(20))
lengths, scale = int32(32), 1 / math.sqrt(24)
with checks.launches() as launched, checks.compiled():
    o = mla_decode(q, cache, lengths, 16, scale, splits=1, blocks=(16, 16))
exact, _ = decode_by_definition(q, cache, lengths, 16, scale)
assert launched.kernels["mla_decode_kernel"] == 1, "mla_decode_kernel was not launched"
checks.relative_l2(
    o,
    exact,
    2e-6,
    what="the averages of 4 heads over 32 keys",
    mistakes={
        "looking at the first tile only": decode_by_definition(q, cache, int32(16), 16, scale)[0],
        "leaving out the scale": decode_by_definition(q, cache, lengths, 16, 1.0)[0],
        "leaving out the rotary part of the score": decode_by_definition(
            q[..., :16], cache[..., :16], lengths, 16, scale
        )[0],
        "exp2 without log2(e) in the scale": decode_by_definition(
            q, cache, lengths, 16, scale * math.log(2)
        )[0],
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(21)
for heads, rank, rope_dim, lengths, splits, blocks in [
    (3, 20, 6, (1, 13, 22), 3, (16, 16)),
    (18, 33, 2, (40, 17), 2, (16, 16)),
    (5, 16, 4, (22, 0, 47), 2, (16, 32)),
]:
    batch, lengths = len(lengths), int32(*lengths)
    q, cache = decode_inputs(batch, int(lengths.max()) + 3, heads, rank, rope_dim, g)
    scale = (rank / 2 + rope_dim) ** -0.5
    exact, exact_lse = decode_by_definition(q, cache, lengths, rank, scale)
    # The cache in a padded buffer; behind each sequence's end lies NaN.
    cache_guard = checks.guarded(cache, row_pad=5, what="the cache")
    for b, n in enumerate(lengths.tolist()):
        cache_guard.tensor[b, n:] = math.nan
    parts = checks.guarded(
        torch.full((batch, heads, splits, rank), math.nan, device=q.device), what="parts"
    )
    lse = checks.guarded(torch.full((batch, heads, splits), math.nan, device=q.device), what="lse")
    with (
        checks.launches() as launched,
        checks.unchanged(q=q),
        checks.forbidden("scaled_dot_product_attention", "softmax"),
    ):
        o = mla_decode(
            q, cache_guard.tensor, lengths, rank, scale, splits, blocks, parts.tensor, lse.tensor
        )
    where = (
        f"{heads} heads, latent {rank}, rotary {rope_dim}, lengths {lengths.tolist()}, {splits} "
        f"splits, BLOCK_H, BLOCK_N = {blocks}."
    )
    assert launched.kernels["mla_decode_kernel"] == 1, "mla_decode_kernel was not launched"
    for guard in (cache_guard, parts, lse):
        guard.intact()
    checks.relative_l2(o, exact, 2e-6, what="the averages", hint=where)
    total = lse.tensor.double().mul(math.log(2)).logsumexp(-1)  # of all splits of a row together
    seeing = exact_lse.isfinite()
    checks.relative_l2(
        total[seeing], exact_lse[seeing], 2e-6, what="the log-sum-exp of all splits", hint=where
    )
stray = stray_reads(mla_decode_kernel)
assert not stray, (
    f"{stray} addresses outside the tensors are read of a cache whose rows are 2³⁰ elements apart: "
    "is every load masked, in rows and columns, and are offsets of 64 bits?"
)
### END HIDDEN TESTS

# %% check="mla_decode_kernel" points=2
# Lengths that fit no tile, three splits, and a split that gets no key at all.
q, cache = decode_inputs(3, 24, 2, 8, 4, checks.generator(22))
lengths, scale = int32(1, 13, 22), 12**-0.5
parts, lse = (torch.full(shape, math.nan, device=q.device) for shape in ((3, 2, 3, 8), (3, 2, 3)))
with checks.compiled():
    o = mla_decode(q, cache, lengths, 8, scale, splits=3, blocks=(16, 16), parts=parts, lse=lse)
exact, exact_lse = decode_by_definition(q, cache, lengths, 8, scale)
assert bool((lse[0, :, 1:] == -math.inf).all()), (
    f"a split without keys stores lse = -inf; yours has {lse[0, 0].tolist()} for a sequence of "
    f"one token and three splits"
)
checks.relative_l2(
    o,
    exact,
    2e-6,
    what="the averages for lengths 1, 13 and 22",
    hint="Every key beyond its sequence's length has weight 0",
    mistakes={
        "keys up to and including index length": decode_by_definition(
            q, cache, lengths + 1, 8, scale
        )[0],
        "using the whole capacity of the cache": decode_by_definition(
            q, cache, int32(24, 24, 24), 8, scale
        )[0],
    },
)
### BEGIN HIDDEN TESTS
# Which keys belong to which split is part of the contract: n is a multiple of BLOCK_N.
for b, n in enumerate(lengths.tolist()):
    size = 16 * math.ceil(math.ceil(n / 3) / 16)
    for s in range(3):
        keys = cache[b, s * size : min((s + 1) * size, n)]
        if len(keys):
            alone, alone_lse = decode_by_definition(
                q[b : b + 1], keys[None], int32(len(keys)), 8, scale
            )
            checks.relative_l2(
                parts[b, :, s], alone[0], 2e-6, what=f"the part of split {s} of a sequence of {n}"
            )
            checks.close(
                lse[b, :, s],
                alone_lse[0] / math.log(2),
                what=f"its lse, split {s} of a sequence of {n}",
                hint="In base 2: m + log2(l)",
                rtol=1e-5,
                atol=1e-5,
                mistakes={"the natural logarithm": alone_lse[0]},
            )
        else:
            checks.close(
                parts[b, :, s],
                torch.zeros(2, 8),
                what=f"the part of the empty split {s} of a sequence of {n}",
            )
            assert bool((lse[b, :, s] == -math.inf).all()), (
                f"the lse of an empty split is -inf (split {s} of a sequence of {n})"
            )
# Law: the number of splits and the blocks change nothing.
q, cache = decode_inputs(2, 70, 17, 12, 2, checks.generator(23))
exact, _ = decode_by_definition(q, cache, int32(70, 35), 12, 0.25)
for splits, blocks in [(1, (32, 64)), (5, (16, 16)), (2, (16, 32))]:
    checks.relative_l2(
        mla_decode(q, cache, int32(70, 35), 12, 0.25, splits, blocks),
        exact,
        2e-6,
        what=f"the averages with {splits} splits, BLOCK_H, BLOCK_N = {blocks}",
    )
### END HIDDEN TESTS

# %% check="mla_decode_kernel" points=2
# Scores between about -80 and 80: the running maximum has to carry from tile to tile.
q, cache = decode_inputs(1, 48, 2, 16, 16, checks.generator(24), spread=20.0)
lengths = int32(48)
with checks.compiled():
    o = mla_decode(q, cache, lengths, 16, 0.2, splits=1, blocks=(16, 16))
checks.relative_l2(
    o,
    decode_by_definition(q, cache, lengths, 16, 0.2)[0],
    5e-5,
    what="the averages for scores of wide range",
    hint="Is every tile's maximum merged with the running one, and are l and acc multiplied by "
    "exp2(m_old − m_new)?",
)
### BEGIN HIDDEN TESTS
g = checks.generator(25)
for shift in (-3.0, 3.0):
    # All scores near ∓200: a padded key's score of 0 would tower over them, or their exponentials
    # overflow.
    q, cache = decode_inputs(2, 37, 3, 20, 6, g, spread=0.02)
    q, cache = q + shift, cache * 0.02 + 3.0
    lengths = int32(37, 5)
    exact, _ = decode_by_definition(q, cache, lengths, 20, 0.855)
    o = mla_decode(q, cache, lengths, 20, 0.855, splits=2, blocks=(16, 16))
    checks.relative_l2(
        o, exact, 2e-6, what=f"the averages for scores near {shift * 3 * 26 * 0.855:.0f}"
    )
# A first tile near +120 and later ones near -120: relative to a later tile's own maximum the first
# would overflow.
q, cache = decode_inputs(1, 48, 2, 16, 16, g, spread=0.05)
q, cache = (
    q + 2.0,
    cache * 0.1 + torch.where(torch.arange(48, device=q.device) < 16, 2.0, -2.0)[:, None],
)
o = mla_decode(q, cache, int32(48), 16, 0.94, splits=1, blocks=(16, 16))
checks.relative_l2(
    o,
    decode_by_definition(q, cache, int32(48), 16, 0.94)[0],
    2e-5,
    what="the averages where the first tile scores 240 more than the others",
    hint="The maximum runs: it never falls from one tile to the next",
)
q, cache = decode_inputs(2, 45, 4, 24, 8, g, dtype=torch.float16)
exact, _ = decode_by_definition(q, cache, int32(45, 31), 24, 0.2)
o = mla_decode(q, cache, int32(45, 31), 24, 0.2, splits=2, blocks=(16, 16))
assert o.dtype == torch.float16, "the output has the dtype of q"
checks.relative_l2(o, exact, 1.5e-3, what="the averages in float16")
# A float16 accumulator shows in a long average: sums in float32 stay within rounding of the output.
q, cache = decode_inputs(1, 1024, 2, 16, 16, g, dtype=torch.float16, spread=0.3)
cache = (cache.float() + 4).half()
exact, exact_lse = decode_by_definition(q, cache, int32(1024), 16, 0.1)
parts, lse = torch.empty(1, 2, 1, 16, device=q.device), torch.empty(1, 2, 1, device=q.device)
mla_decode(q, cache, int32(1024), 16, 0.1, splits=1, blocks=(16, 128), parts=parts, lse=lse)
checks.relative_l2(parts[:, :, 0], exact, 3e-4, what="parts, float32, of float16 inputs")
checks.relative_l2(
    lse[:, :, 0], exact_lse / math.log(2), 1e-5, what="lse, float32, of float16 inputs"
)
### END HIDDEN TESTS

# %% [markdown]
# On a GPU the next cells measure your kernel beside three things in the same run: a plain copy of
# the cache (half of whose traffic is reading it: the kernel's time is compared with that of
# *reading*); PyTorch's batched products in the latent space; and `scaled_dot_product_attention`
# with the latent gathered as one key-value head of 576. On a CPU they show the arithmetic: where on
# the roofline the ways to decode lie.

# %% tags=["experiment"]
on_gpu = profile.name == "gpu" and not profile.interpret


def bmm_path(q, cache, lengths, rank, scale):
    """PyTorch's products in the latent space: the cache is read twice, and the scores are written
    and read.
    """
    behind = torch.arange(cache.shape[1], device=q.device) >= lengths[:, None]
    scores = (torch.bmm(q, cache.transpose(1, 2)) * scale).masked_fill(behind[:, None], -math.inf)
    return torch.bmm(scores.float().softmax(-1).to(q.dtype), cache[..., :rank])


def sdpa_path(q, cache, lengths, rank, scale):
    """One key-value head shared by all query heads; the values padded to the keys' width, as SDPA's
    kernels want it.
    """
    seen = torch.arange(cache.shape[1], device=q.device) < lengths[:, None]
    kv = cache[:, None]
    return F.scaled_dot_product_attention(
        q[:, :, None], kv, kv, attn_mask=seen[:, None, None], scale=scale, enable_gqa=True
    )[:, :, 0, :rank]


def measure_decode(heads, length, batch=32, rank=512, rope_dim=64):
    """TB/s of cache read, and TFLOP/s, by implementation: the median of do_bench."""
    q = torch.randn(batch, heads, rank + rope_dim, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(batch, length, rank + rope_dim, device="cuda", dtype=torch.bfloat16)
    target, lengths = (
        torch.empty_like(cache),
        torch.full((batch,), length, dtype=torch.int32, device="cuda"),
    )
    size, flops = (
        cache.numel() * cache.element_size(),
        2 * batch * heads * length * (2 * rank + rope_dim),
    )
    found = {}
    for name, run, share in (
        ("copy", lambda: target.copy_(cache), 2),
        ("this lesson", lambda: mla_decode(q, cache, lengths, rank, 192**-0.5), 1),
        ("bmm", lambda: bmm_path(q, cache, lengths, rank, 192**-0.5), 1),
        ("SDPA, gathered", lambda: sdpa_path(q, cache, lengths, rank, 192**-0.5), 1),
    ):
        try:
            median, low, high = triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])
        except RuntimeError as error:  # too little memory, or a back end that this build lacks
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        found[name] = share * size / median / 1e9
        print(
            f"{heads:4} heads, {length:6} tokens, {name:15} {median:8.3f} ms ({low:.3f} to "
            f"{high:.3f}), {found[name]:5.2f} TB/s"
            + ("" if name == "copy" else f", {flops / median / 1e9:5.0f} TFLOP/s")
        )
    return found


# %% tags=["experiment", "figure"]
# Figure: your kernel beside its peers, or on a CPU the arithmetic of decoding
if on_gpu:
    lengths = (4096, 8192, 16384, 32768)
    fig, axes = plot.plt.subplots(1, 2, figsize=(10.5, 3.8))
    for ax, heads in zip(axes, (16, 128), strict=True):
        rows = [measure_decode(heads, n) for n in lengths]
        names = [name for name in rows[0] if all(name in row for row in rows)]
        plot.curves(
            lengths,
            {n: [row[n] for row in rows] for n in names},
            logx=True,
            xlabel="tokens in the cache",
            ylabel="TB/s (cache read once; copy: both ways)",
            title=f"{heads} heads, batch 32",
            ax=ax,
        )
    plot.caption(
        fig,
        "bfloat16, latent 512 + 64. The copy moves each byte twice, in and out; the decoding "
        "paths are credited with one reading of the cache, however often they read it.",
    )
else:
    peak, bandwidth, L = 989e12, 4.8e12, 32768  # an H200: half-precision products, memory
    r, d_r, d_n, d_v = 512, 64, 128, 128

    def absorbed_point(heads, reads=1):
        bytes_moved = reads * 2 * (r + d_r) * L + (0 if reads == 1 else 2 * 2 * 2 * heads * L)
        return 2 * heads * (2 * r + d_r) * L / bytes_moved

    points = {
        "MHA, any number of heads": (1.0, None),
        "GQA, 8 queries a key": (8.0, None),
        "MLA absorbed, 16 heads": (absorbed_point(16), None),
        "MLA absorbed, 128 heads": (absorbed_point(128), None),
        "the same by bmm, 128": (absorbed_point(128, reads=2), None),
    }
    times = {}
    for name, heads in (
        ("absorbed, 16", 16),
        ("absorbed, 128", 128),
        ("unfolded, 16", 16),
        ("unfolded, 128", 128),
    ):
        if name.startswith("absorbed"):
            flops, moved = 2 * heads * (2 * r + d_r) * L, 2 * (r + d_r) * L
        else:  # unfold all keys and values, write them, read them
            flops = 2 * heads * (r * (d_n + d_v) + d_n + d_r + d_v) * L
            moved = (2 * (r + d_r) + 2 * 2 * heads * (d_n + d_r + d_v)) * L
        times[name] = flops / peak * 1e6, moved / bandwidth * 1e6
    fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 4.0))
    plot.roofline(
        points, peak=peak, bandwidth=bandwidth, title="one step of decoding on an H200", ax=axes[0]
    )
    x = range(len(times))
    axes[1].bar(
        [i - 0.2 for i in x],
        [t[0] for t in times.values()],
        width=0.38,
        label="arithmetic",
        color=plot.COLORS[0],
        edgecolor="black",
    )
    axes[1].bar(
        [i + 0.2 for i in x],
        [t[1] for t in times.values()],
        width=0.38,
        label="memory",
        color=plot.COLORS[1],
        edgecolor="black",
        hatch="//",
    )
    axes[1].set_xticks(list(x), list(times), fontsize=8)
    axes[1].set(yscale="log", ylabel="microseconds, each alone", xlabel="MLA, heads")
    axes[1].set_title("32k tokens, one sequence, one layer")
    axes[1].legend()
    plot.caption(
        fig,
        "Arithmetic from the data sheet, not a measurement; hollow points are the most that their "
        "intensity allows. With 128 heads the absorbed step has "
        f"{points['MLA absorbed, 128 heads'][0]:.0f} FLOP a byte and passes the ridge; with 16 it "
        f"waits for memory. Right (logarithmic): unfolding keys and values first takes more than "
        f"a hundred times the arithmetic, and as much traffic as the arithmetic has time for.",
    )
plot.plt.show()

# %% [markdown]
# # Part II · Length: windows, and what must not leave them
#
# ## A sliding window
#
# A narrower cache still grows with every token. The oldest remedy is to forget: a **sliding
# window** of $W$ tokens, so that query $i$ sees the keys $j$ with $i - W < j \le i$, itself among
# them. Cost per token is then $O(W)$, and so is the cache. A layer sees $W - 1$ tokens back; what
# it wrote there came from $W - 1$ tokens further back. Through $n$ layers information can travel
# $n(W-1)$ tokens, far more than a window. *Can*: each of the hops has to carry it on, and a model
# trained with full attention has never learned to.
#
# Masks as in lesson 09: boolean, True = may attend, the last query aligned to the last key.


# %% exercise="sliding_window_mask" minutes=5 difficulty=1
def sliding_window_mask(
    q_len: int, k_len: int, window: int, device: torch.device | None = None
) -> Tensor:
    """Which keys each of the last `q_len` of `k_len` positions sees in a causal sliding window.

    Returns (q_len, k_len), bool: query i stands at position p = i + (k_len − q_len) and sees the
    `window` keys p − window + 1 … p, itself included, as far as they exist. window ≥ 1, else
    ValueError.
    """
    ### BEGIN SOLUTION
    if window < 1:
        raise ValueError(f"a window of {window} keys would hide a token from itself")
    queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    behind = queries - torch.arange(k_len, device=device)
    return (behind >= 0) & (behind < window)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: distances</summary>
#
# A column of query positions minus a row of key positions is a table of distances. Which of them
# are in the window?
# </details>

# %% check="sliding_window_mask" points=1
mask = sliding_window_mask(4, 4, 2)
assert getattr(mask, "dtype", None) == torch.bool, "a boolean mask, True = may attend"
checks.close(
    mask,
    torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool(),
    what="sliding_window_mask(4, 4, window=2)",
    hint="A window of 2 is the token itself and the one before it",
    mistakes={
        "a window of `window` keys besides the token itself": torch.tensor(
            [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
        ).bool(),
        "a window that looks ahead too": torch.tensor(
            [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
        ).bool(),
    },
)
### BEGIN HIDDEN TESTS
for q_len, k_len, window in [
    (1, 1, 1),
    (5, 5, 1),
    (1, 9, 4),
    (3, 8, 5),
    (7, 7, 100),
    (6, 6, 3),
    (5, 2, 2),
]:
    expected = torch.tensor(
        [[0 <= i + k_len - q_len - j < window for j in range(k_len)] for i in range(q_len)]
    )
    aligned_to_start = torch.tensor(
        [[0 <= i - j < window for j in range(k_len)] for i in range(q_len)]
    )
    checks.close(
        sliding_window_mask(q_len, k_len, window),
        expected,
        what=f"sliding_window_mask({q_len}, {k_len}, {window})",
        mistakes={"a mask aligned to the first key": aligned_to_start},
    )
### END HIDDEN TESTS

# %% check="sliding_window_mask" points=1
# Law: a decoding step sees what the last row of the whole sees.
checks.close(
    sliding_window_mask(1, 6, 3),
    torch.tensor([[0, 0, 0, 1, 1, 1]]).bool(),
    what="one new query behind 5 cached keys, window 3",
    mistakes={"a mask aligned to the first key": torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()},
)
### BEGIN HIDDEN TESTS
for k_len, window in [(9, 1), (9, 4), (12, 9), (5, 7)]:
    whole = sliding_window_mask(k_len, k_len, window)
    checks.close(
        int(whole.sum()),
        sum(min(i + 1, window) for i in range(k_len)),
        what=f"the number of pairs of {k_len} tokens with a window of {window}",
    )
    for q_len in (1, 3):
        checks.close(
            sliding_window_mask(q_len, k_len, window),
            whole[-q_len:],
            what=f"the last {q_len} rows of the whole, window {window}",
        )
checks.close(
    sliding_window_mask(6, 6, 6),
    torch.ones(6, 6).tril().bool(),
    what="a window as long as the text, against the causal mask",
)
for window in (0, -1):
    checks.raises(
        ValueError, sliding_window_mask, 3, 3, window, because=f"a window of {window} sees nothing"
    )
assert sliding_window_mask(2, 2, 1, device="meta").device.type == "meta", (
    "the mask ignores its device"
)
### END HIDDEN TESTS

# %% [markdown]
# ## The sinks
#
# A window with full-attention models has a famous failure (Xiao et al. 2023). A model trained with
# full attention and then run with a window is fine until the first tokens fall out of it, and then
# its loss jumps. Not because anybody needs the first word. Softmax makes every row sum to 1, and a
# head that has nothing to say must put its weight *somewhere*; training settles on tokens that
# every position can see: the first. These are the **attention sinks**. Take the sink away and that
# weight goes to tokens that mean something, whose values are then added at full strength.
#
# The remedy is as simple: keep the first few tokens for ever, beside the window. (The other
# remedies are learned: a sink logit for each head, as in gpt-oss, or a gate on the output.)


# %% exercise="sink_mask" minutes=5 difficulty=1
def sink_mask(
    q_len: int, k_len: int, window: int, sinks: int, device: torch.device | None = None
) -> Tensor:
    """A causal sliding window together with the first `sinks` keys.

    Returns (q_len, k_len), bool: the query at position p = i + (k_len − q_len) sees key j ≤ p if
    j > p − window or j < sinks.
    """
    ### BEGIN SOLUTION
    queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    keys = torch.arange(k_len, device=device)
    return (keys <= queries) & ((keys > queries - window) | (keys < sinks))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two conditions and a third</summary>
#
# A key is visible when it is in the window or a sink, and, in both cases, not in the future.
# </details>

# %% check="sink_mask" points=1
mask = sink_mask(5, 5, window=2, sinks=1)
assert getattr(mask, "dtype", None) == torch.bool, "a boolean mask, True = may attend"
checks.close(
    mask,
    torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    ).bool(),
    what="sink_mask(5, 5, window=2, sinks=1)",
    mistakes={
        "a window without its sink": torch.eye(5).bool() | torch.diag(torch.ones(4), -1).bool()
    },
)
### BEGIN HIDDEN TESTS
for q_len, k_len, window, sinks in [
    (1, 1, 1, 4),
    (1, 12, 3, 4),
    (6, 6, 2, 4),
    (8, 8, 3, 2),
    (3, 9, 2, 0),
    (4, 4, 9, 1),
    (5, 8, 1, 3),
]:
    expected = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i in range(q_len):
        p = i + k_len - q_len
        for j in [*range(max(0, p - window + 1), p + 1), *range(min(sinks, p + 1))]:
            expected[i, j] = True
    checks.close(
        sink_mask(q_len, k_len, window, sinks),
        expected,
        what=f"sink_mask({q_len}, {k_len}, {window}, {sinks})",
        hint="Sinks are causal too: a query before position sinks − 1 does not see all of them",
    )
### END HIDDEN TESTS

# %% check="sink_mask" points=1
# A stream: far from its beginning every query sees the sinks and its window, no more and no less.
step = sink_mask(1, 1000, window=5, sinks=4)
checks.close(
    step[0].nonzero()[:, 0],
    torch.tensor([0, 1, 2, 3, 995, 996, 997, 998, 999]),
    what="the keys that token 999 sees, window 5, 4 sinks",
)
### BEGIN HIDDEN TESTS
for window, sinks in [(1, 1), (3, 4), (6, 2)]:
    whole = sink_mask(40, 40, window, sinks)
    checks.close(
        whole[sinks + window :].sum(1),
        torch.full((40 - sinks - window,), sinks + window),
        what=f"the number of keys of later queries, window {window}, {sinks} sinks",
    )
    checks.close(
        sink_mask(3, 40, window, sinks),
        whole[-3:],
        what="three new queries against the last rows of the whole",
    )
    assert not bool(whole.triu(1).any()), "no query sees a later key, not even a sink"
# Law: without sinks, or with a window as long as the text, the other mask is left.
checks.close(
    sink_mask(9, 9, 3, 0),
    torch.ones(9, 9).tril().triu(-2).bool(),
    what="no sinks, against a plain window",
)
checks.close(
    sink_mask(7, 7, 7, 2),
    torch.ones(7, 7).tril().bool(),
    what="sinks and a window as long as the text",
)
assert sink_mask(2, 2, 1, 1, device="meta").device.type == "meta", "the mask ignores its device"
### END HIDDEN TESTS

# %% [markdown]
# ## A cache that wraps
#
# With a window of $W$ there is no reason to keep more than $W$ keys. A **ring buffer** has $W$
# slots; the token at position $p$ goes to slot $p \bmod W$ and overwrites the one that has just
# left the window. Nothing moves, nothing is allocated.
#
# After wrapping the slots are no longer in order. Attention does not mind: a sum over keys has no
# order. *Positions* do matter, wherever they are used after caching: for rotary keys that are
# rotated when they are read (as StreamingLLM needs), for ALiBi, for a mask. So the buffer remembers
# the position of each slot. Sinks get slots of their own which the ring never touches.


# %% exercise="ring_buffer" minutes=25 difficulty=2 path="more"
class RingBufferCache:
    """Keys and values of the first `sinks` tokens and the latest `window` others: fixed memory."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.window, self.sinks = window, sinks
        self.k = torch.zeros(batch, kv_heads, sinks + window, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        # The position that each slot holds; −1: the slot is empty.
        self.positions = torch.full((sinks + window,), -1, dtype=torch.long, device=device)
        self.seen = 0  # tokens appended so far

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds the next tokens. k, v: (batch, kv_heads, new, head_dim), new ≥ 1, at positions seen,
        seen + 1, …; there may be more than the buffer holds.

        Position p < sinks is kept for ever. Of the others the last `window` stay. The buffers are
        written in place; no tensor larger than they or the given keys is made, and k and v
        themselves are not kept.
        """
        ### BEGIN SOLUTION
        positions = torch.arange(self.seen, self.seen + k.shape[2], device=k.device)
        self.seen += k.shape[2]
        # Of two tokens for one slot, only the later.
        kept = (positions < self.sinks) | (positions >= self.seen - self.window)
        positions = positions[kept]
        ring = self.sinks + (positions - self.sinks) % self.window
        slots = torch.where(positions < self.sinks, positions, ring)
        self.k[:, :, slots] = k[:, :, kept]
        self.v[:, :, slots] = v[:, :, kept]
        self.positions[slots] = positions
        ### END SOLUTION

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is in the buffer, empty slots left out: k and v (batch, kv_heads, n, head_dim) and
        the positions (n,) of these tokens, in any order.

        n = min(seen, sinks) + min(max(seen − sinks, 0), window).
        """
        ### BEGIN SOLUTION
        filled = min(self.seen, self.k.shape[2])  # slots fill from the front
        return self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: many tokens at once</summary>
#
# Index assignment with the same slot twice keeps one of the two writes, and which one is not
# defined. Drop the tokens that would be overwritten at once before you write.
# </details>
#
# <details><summary>Hint: sinks and the modulus</summary>
#
# The ring begins behind the sinks, and its first token is the one at position `sinks`. Which slot
# has position p, then?
# </details>
#
# <details><summary>Hint: fewer tokens than sinks</summary>
#
# Both sums in the docstring must come out right when only one token has been seen.
# </details>


# %% tags=["support"]
# Support: what a cache gives, by position


def held(cache: "RingBufferCache") -> dict[int, tuple[Tensor, Tensor]]:
    """{position: (key, value)} as the cache gives them."""
    k, v, positions = cache.read()
    assert k.shape[2] == v.shape[2] == len(positions), (
        f"read gives {k.shape[2]} keys, {v.shape[2]} values and {len(positions)} positions"
    )
    assert len(set(positions.tolist())) == len(positions), (
        f"read gives a position twice: {sorted(positions.tolist())}"
    )
    return {p: (k[:, :, i], v[:, :, i]) for i, p in enumerate(positions.tolist())}


# %% check="ring_buffer" points=2
cache = RingBufferCache(1, 1, 1, window=3, device=profile.device)
for p in range(5):  # the token at position p has key p and value 10 p
    token = torch.full((1, 1, 1, 1), float(p), device=profile.device)
    cache.append(token, 10 * token)
assert sorted(cache.read()[2].tolist()) == [2, 3, 4], (
    f"after 5 tokens a window of 3 holds positions 2, 3, 4; yours holds "
    f"{sorted(cache.read()[2].tolist())}"
)
for p, (key, value) in held(cache).items():
    assert (float(key), float(value)) == (p, 10 * p), (
        f"the slot at position {p} holds the key of position {float(key):g} and the value of "
        f"{float(value) / 10:g}"
    )


### BEGIN HIDDEN TESTS
def wanted(seen, window, sinks):
    return sorted(
        set(range(min(seen, sinks))) | set(range(max(seen - window, min(seen, sinks)), seen))
    )


g = checks.generator(30)
for batch, heads, dim, window, sinks, chunks in [
    (2, 2, 4, 5, 0, [1] * 23),
    (1, 3, 2, 4, 2, [1] * 19),
    (2, 1, 3, 1, 0, [1] * 5),
    (1, 2, 2, 3, 4, [1] * 15),
    (2, 2, 4, 4, 1, [3, 1, 4, 1, 5, 9, 2, 6]),
    (1, 1, 2, 5, 0, [17, 1, 1]),
    (1, 2, 3, 3, 2, [1, 20, 2]),
    (1, 1, 2, 4, 3, [2, 4, 1, 4]),
]:
    total = sum(chunks)
    k, v = (checks.randn(batch, heads, total, dim, generator=g) for _ in range(2))
    cache, seen = RingBufferCache(batch, heads, dim, window, sinks, device=k.device), 0
    for new in chunks:
        with checks.unchanged(k=k, v=v):
            cache.append(k[:, :, seen : seen + new], v[:, :, seen : seen + new])
        seen += new
        found = held(cache)
        what = f"window {window}, {sinks} sinks, {seen} tokens seen"
        assert sorted(found) == wanted(seen, window, sinks), (
            f"{what}: the positions should be {wanted(seen, window, sinks)}, yours are "
            f"{sorted(found)}"
        )
        for p, (key, value) in found.items():
            checks.close(key, k[:, :, p], what=f"the key of position {p} ({what})")
            checks.close(value, v[:, :, p], what=f"the value of position {p} ({what})")
### END HIDDEN TESTS

# %% check="ring_buffer" points=2
# At every step past several wraps: the ring, against a full cache under a window mask. Keys are
# rotated when they are read.
g = checks.generator(31)
window, dim, steps = 4, 8, 15
q, k, v = (checks.randn(1, 2, steps, dim, generator=g, dtype=torch.float64) for _ in range(3))
positions = torch.arange(steps, device=k.device)
cache = RingBufferCache(1, 2, dim, window, dtype=torch.float64, device=k.device)
for t in range(steps):
    cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    ring_k, ring_v, at = cache.read()
    query = rope(q[:, :, t : t + 1], positions[t : t + 1])
    out = F.scaled_dot_product_attention(query, rope(ring_k, at), ring_v)
    inside = ((positions <= t) & (positions > t - window))[None]
    full = F.scaled_dot_product_attention(query, rope(k, positions), v, attn_mask=inside)
    counted_from_zero = F.scaled_dot_product_attention(
        query, rope(ring_k, torch.arange(len(at), device=k.device)), ring_v
    )
    checks.close(
        out,
        full,
        what=f"attention over the ring at step {t}",
        mistakes={"taking the slots' numbers for positions": counted_from_zero},
        hint="Every slot must say which position it holds, also after the ring has wrapped",
    )
### BEGIN HIDDEN TESTS
for window, sinks, steps in [(3, 0, 14), (5, 2, 24), (2, 4, 16), (1, 1, 6)]:
    q, k, v = (checks.randn(2, 2, steps, dim, generator=g, dtype=torch.float64) for _ in range(3))
    positions = torch.arange(steps, device=k.device)
    cache = RingBufferCache(2, 2, dim, window, sinks, dtype=torch.float64, device=k.device)
    for t in range(steps):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        ring_k, ring_v, at = cache.read()
        query = rope(q[:, :, t : t + 1], positions[t : t + 1])
        inside = ((positions <= t) & ((positions > t - window) | (positions < sinks)))[None]
        full = F.scaled_dot_product_attention(query, rope(k, positions), v, attn_mask=inside)
        no_sinks = F.scaled_dot_product_attention(
            query,
            rope(k, positions),
            v,
            attn_mask=((positions <= t) & (positions > t - window))[None],
        )
        checks.close(
            F.scaled_dot_product_attention(query, rope(ring_k, at), ring_v),
            full,
            what=f"attention at step {t}, window {window}, {sinks} sinks",
            mistakes={"sinks that were overwritten": no_sinks},
        )
### END HIDDEN TESTS


# %% check="ring_buffer" points=1
def buffers(cache: "RingBufferCache") -> int:
    """Elements of all tensors that the cache keeps."""
    return sum(
        t.untyped_storage().nbytes() // t.element_size()
        for t in torch.utils._pytree.tree_leaves(list(vars(cache).values()))
        if isinstance(t, Tensor)
    )


cache = RingBufferCache(1, 2, 4, window=8, sinks=2, device=profile.device)
token = torch.ones(1, 2, 1, 4, device=profile.device)
before = buffers(cache)
for _ in range(40):
    cache.append(token, token)
assert cache.read()[0].shape[2] == 10, (
    f"2 sinks and a window of 8 make 10 tokens; read gives {cache.read()[0].shape[2]}"
)
assert buffers(cache) == before, (
    f"the cache kept {before} numbers when new and keeps {buffers(cache)} after 40 tokens"
)
### BEGIN HIDDEN TESTS
cache = RingBufferCache(1, 4, 16, window=32, sinks=4, device=profile.device)
own = cache.k
for new in (100, 1, 1, 50):
    k, v = (checks.randn(1, 4, new, 16, generator=checks.generator(32 + new)) for _ in range(2))
    given = k.untyped_storage().data_ptr()
    with checks.allocations() as made:
        cache.append(k, v)
    assert made.largest <= max(36, new) * 4 * 16, (
        f"append made a tensor of {made.largest} elements for {new} tokens; the buffer has "
        f"{36 * 64}"
    )
    with checks.allocations() as made:
        ring_k, _, _ = cache.read()
    assert made.largest <= 36 * 64, f"read made a tensor of {made.largest} elements"
    last_key = ring_k.clone()
    k.zero_()
    v.zero_()
    checks.close(
        cache.read()[0],
        last_key,
        what="the cached keys after the caller's tensors were changed",
        hint="Copy into the buffers; do not keep the arguments",
    )
    assert cache.k.data_ptr() == own.data_ptr(), (
        "the buffer was replaced by a new one: write into the slots"
    )
### END HIDDEN TESTS

# %% [markdown]
# # Part III · Length: patterns, and patterns that are chosen
#
# ## Fixed patterns
#
# A window cannot answer "what was the name on page one". Before 2024 the answer was a **fixed
# pattern**: a few extra pairs beside the window, chosen so that every token is within few hops of
# every other. They were made for encoders (attention in both directions), and long documents.
#
# **Longformer** (2020) has a symmetric window and **global tokens**, such as `[CLS]` or the words
# of a question: a global token sees everything, *and everything sees it*. Both directions matter.
# Only the column: all know the question, which knows nothing of the text. Only the row: the
# question has read the text and tells nobody.
#
# **BigBird** (2020) adds **random** pairs, in blocks, because hardware multiplies tiles. A random
# graph of constant degree has a diameter of $O(\log n)$: information between any two blocks needs
# few layers even without passing through a global token. (The paper's proof that such a model can
# still approximate every function of a sequence rests on the global tokens.) A pattern is part of
# the model, as weights are, so the random part is drawn once, from a seed.


# %% exercise="longformer_mask" minutes=8 difficulty=1 path="more"
def longformer_mask(
    length: int,
    window: int,
    global_tokens: list[int] | tuple[int, ...] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Longformer's pattern, in both directions (not causal).

    Returns (length, length), bool: token i sees j where |i − j| ≤ window // 2 (window is even: so
    many neighbors, and the token itself), and every pair of which at least one is a global token.
    An odd window, or one below 0, is a ValueError.
    """
    ### BEGIN SOLUTION
    if window % 2 or window < 0:
        raise ValueError(f"the window of {window} cannot be shared out evenly to both sides")
    index = torch.arange(length, device=device)
    mask = (index[:, None] - index).abs() <= window // 2
    special = torch.zeros(length, dtype=torch.bool, device=device)
    special[list(global_tokens)] = True
    return mask | special[:, None] | special
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a row and a column</summary>
#
# A vector of length `length`, True at the global tokens, broadcast once as rows and once as
# columns, gives both directions.
# </details>

# %% check="longformer_mask" points=1
mask = longformer_mask(5, 2, [0])
assert getattr(mask, "dtype", None) == torch.bool, "a boolean mask, True = may attend"
band = torch.tensor([[abs(i - j) <= 1 for j in range(5)] for i in range(5)])
column, row = band.clone(), band.clone()
column[:, 0], row[0] = True, True
checks.close(
    mask,
    column | row,
    what="longformer_mask(5, window=2, global_tokens=[0])",
    mistakes={
        "global tokens that are seen by all but see only their window": column,
        "global tokens that see all but are seen only in their window": row,
        "a causal mask": (column | row).tril(),
        "no global tokens": band,
    },
)
### BEGIN HIDDEN TESTS
for length, window, special in [
    (1, 0, []),
    (7, 0, []),
    (9, 4, []),
    (12, 2, [3, 11]),
    (8, 6, [0, 1, 2]),
    (6, 20, [5]),
    (10, 2, (4,)),
]:
    mask = longformer_mask(length, window, special)
    expected = torch.tensor(
        [
            [abs(i - j) <= window // 2 or i in special or j in special for j in range(length)]
            for i in range(length)
        ]
    )
    checks.close(mask, expected, what=f"longformer_mask({length}, {window}, {special})")
    checks.close(mask, mask.T, what="the transposed mask", hint="Who is seen by i sees i")
### END HIDDEN TESTS

# %% check="longformer_mask" points=1
checks.raises(
    ValueError, longformer_mask, 5, 3, because="a window of 3 neighbors has no two equal sides"
)
### BEGIN HIDDEN TESTS
# Count: a band of 2w + 1 diagonals, and full rows and columns for g tokens far from the ends and
# from one another.
n, w, special = 200, 6, [50, 100, 150]
count = n * (2 * w + 1) - w * (w + 1) + 3 * 2 * (n - (2 * w + 1)) - 3 * 2
checks.close(
    int(longformer_mask(n, 2 * w, special).sum()),
    count,
    what="the number of pairs in a mask of 200 tokens",
)
for two in ([2, 7], (2, 7)):
    distant = (torch.arange(9)[:, None] - torch.arange(9)).abs() > 1
    rows = torch.tensor([i in two for i in range(9)])
    checks.close(
        longformer_mask(9, 2, two),
        ~distant | rows[:, None] | rows,
        what=f"the mask of 9 tokens with the global tokens {two}, as a {type(two).__name__}",
    )
checks.raises(ValueError, longformer_mask, 5, -2, because="a window of −2 is none")
checks.raises(ValueError, longformer_mask, 5, -1, because="a window of −1 is none")
assert longformer_mask(3, 2, [1], device="meta").device.type == "meta", (
    "the mask ignores its device"
)
# Reach: with one global token any two tokens are two hops apart; with a window alone, many.
hops = longformer_mask(50, 4, [17]).double()
assert bool((hops @ hops > 0).all()), (
    "with a global token every token reaches every other in two hops"
)
alone = longformer_mask(50, 4).double()
reached = torch.linalg.matrix_power(alone, 5)[0] > 0
checks.close(
    int(reached.sum()), 11, what="the number of tokens that token 0 reaches in five hops of two"
)
### END HIDDEN TESTS


# %% exercise="bigbird_mask" minutes=20 difficulty=2 path="more"
def bigbird_mask(
    length: int,
    block: int,
    window: int,
    random_blocks: int,
    global_blocks: int,
    seed: int,
    device: torch.device | None = None,
) -> Tensor:
    """BigBird's pattern in blocks, in both directions.

    The length is a multiple of `block` (else ValueError): n = length // block blocks. Block row i
    sees, whole,
    - the blocks j with |i − j| ≤ window // 2 (window odd: 3 is the block and its two neighbors),
    - the first `global_blocks` blocks, and a row that is itself one of these sees all blocks,
    - `random_blocks` more, different, drawn uniformly from those that it does not see already; all
    of them where there are fewer. The draw depends on `seed` alone and differs from row to row;
    torch's global random state is left as it was.

    Returns (length, length), bool.
    """
    ### BEGIN SOLUTION
    if length % block:
        raise ValueError(f"{length} tokens are no whole number of blocks of {block}")
    n = length // block
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(n)
    special = index < global_blocks
    seen = ((index[:, None] - index).abs() <= window // 2) | special | special[:, None]
    # The lowest of uniform numbers are a uniform draw without repetition; blocks already seen get a
    # number above all others.
    ticket = torch.rand(n, n, generator=generator).masked_fill(seen, 2.0)
    drawn = ticket.argsort(1).argsort(1) < random_blocks
    blocks = seen | drawn
    return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1).to(device)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: without a loop</summary>
#
# Give each block of a row a random number and take the `random_blocks` lowest; blocks already seen
# get a number above all. Or loop over the rows with `torch.randperm(…, generator=…)`: at this size
# either will do.
# </details>


# %% tags=["support"]
# Support: a mask's blocks


def blocks_of(mask: Tensor, block: int) -> Tensor:
    """(n, n) bool from a mask that is made of whole blocks."""
    tiles = mask.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2).flatten(2)
    assert bool((tiles.all(-1) == tiles.any(-1)).all()), "a block is visible whole or not at all"
    return tiles.all(-1)


# %% check="bigbird_mask" points=1
mask = bigbird_mask(24, block=2, window=3, random_blocks=0, global_blocks=1, seed=0)
assert getattr(mask, "dtype", None) == torch.bool, "a boolean mask, True = may attend"
assert mask.shape == (24, 24), f"the mask is (length, length); yours is {tuple(mask.shape)}"
band = torch.tensor([[abs(i - j) <= 1 or i == 0 or j == 0 for j in range(12)] for i in range(12)])
checks.close(
    blocks_of(mask, 2),
    band,
    what="window and global blocks, nothing drawn",
    mistakes={
        "a global block that is seen by all but sees only its window": torch.tensor(
            [[abs(i - j) <= 1 or j == 0 for j in range(12)] for i in range(12)]
        ),
        "a window of 3 blocks to each side": torch.tensor(
            [[abs(i - j) <= 3 or i == 0 or j == 0 for j in range(12)] for i in range(12)]
        ),
    },
)
### BEGIN HIDDEN TESTS
for n, block, window, special in [
    (1, 4, 1, 0),
    (6, 1, 1, 0),
    (9, 3, 5, 2),
    (5, 2, 3, 0),
    (4, 2, 3, 4),
]:
    expected = torch.tensor(
        [
            [abs(i - j) <= window // 2 or i < special or j < special for j in range(n)]
            for i in range(n)
        ]
    )
    mask = bigbird_mask(n * block, block, window, 0, special, seed=checks.seed())
    checks.close(
        blocks_of(mask, block),
        expected,
        what=f"{n} blocks of {block}, window {window}, {special} global",
    )
checks.raises(
    ValueError,
    bigbird_mask,
    10,
    4,
    3,
    1,
    1,
    0,
    because="10 tokens are no whole number of blocks of 4",
)
### END HIDDEN TESTS

# %% check="bigbird_mask" points=2
first, again, other = (
    blocks_of(bigbird_mask(32, block=1, window=3, random_blocks=2, global_blocks=1, seed=s), 1)
    for s in (7, 7, 8)
)
checks.close(
    again,
    first,
    what="the mask of the same seed, made again",
    hint="The pattern is part of the model: draw from a generator of your own with this seed",
)
assert not torch.equal(first, other), "seeds 7 and 8 give the same pattern: is the seed used?"
### BEGIN HIDDEN TESTS
s = checks.seed()
for n, window, drawn, special in [
    (16, 3, 3, 1),
    (20, 1, 4, 0),
    (12, 5, 2, 2),
    (6, 3, 9, 1),
    (7, 3, 1, 0),
]:
    fixed = torch.tensor(
        [
            [abs(i - j) <= window // 2 or i < special or j < special for j in range(n)]
            for i in range(n)
        ]
    )
    seen = blocks_of(bigbird_mask(n * 2, 2, window, drawn, special, seed=s), 2)
    assert bool((seen | ~fixed).all()), "a block of the window or a global one is missing"
    more, free = (seen & ~fixed).sum(1), (~fixed).sum(1)
    checks.close(
        more,
        free.clamp(max=drawn),
        what=f"the number of blocks drawn in each row ({n} blocks, window {window}, {special} "
        f"global, {drawn} random)",
        hint="Draw from the blocks that the row does not see already, without repetition",
    )
    if special == 0 and n > 10:
        assert not torch.equal(seen, seen.T), (
            "the random part is the same in both directions: each row draws for itself"
        )
assert bigbird_mask(4, 2, 1, 1, 0, seed=0, device="meta").device.type == "meta", (
    "the mask ignores its device"
)
state = torch.get_rng_state()
masks = torch.stack(
    [blocks_of(bigbird_mask(10, 1, 1, 2, 0, seed=1000 * s + i), 1) for i in range(300)]
).double()
assert torch.equal(torch.get_rng_state(), state), (
    "torch's global random state was changed: use a torch.Generator"
)
# Each of 9 blocks with probability 2/9, 300 draws: σ = 0.024.
off = masks.mean(0)[~torch.eye(10, dtype=torch.bool)]
assert float((off - 2 / 9).abs().max()) < 0.13, (
    f"each block should be drawn in 22 % of the seeds; yours are drawn in {float(off.min()):.0%} "
    f"to {float(off.max()):.0%}"
)
powers = 2 ** torch.arange(10)
patterns = (masks - torch.eye(10)).long() @ powers  # (300, 10): each row's draw as a number
shifted = torch.stack([masks[:, i].roll(-i, 1) for i in range(10)], 1).long() @ powers
for numbers, what in ((patterns, "the same blocks"), (shifted, "blocks at the same distances")):
    # 36 draws are possible, so of 10 about 8.8 are different.
    distinct = sum(len(set(row)) for row in numbers.tolist()) / 300
    assert distinct > 6, f"different rows draw {what}: each row draws for itself"
### END HIDDEN TESTS

# %% [markdown]
# ## Choosing: DeepSeek Sparse Attention
#
# A fixed pattern has decided before it has read the text. The opposite is to let each query choose
# its $k$ keys, and the difficulty is plain: to know which keys have the highest scores one computes
# all scores, and has saved nothing.
#
# DeepSeek-V3.2 (2025) answers with a second, much cheaper attention whose only task is to rank: the
# **lightning indexer**. A few heads $H_I$ of small width, one key for all of them, no softmax, no
# values:
#
# $$ I_{t,s} = \sum_{j=1}^{H_I} w_{t,j}\; \mathrm{ReLU}\!\left(q^I_{t,j} \cdot k^I_s\right), \qquad q^I_{t,j},\, k^I_s \in \mathbb R^{d_I},\quad w_{t,j} \in \mathbb R . $$
#
# It still looks at every pair, so the cost is quadratic in the length, with a constant small enough
# not to matter for long (64 heads of 128 in 8 bits, against 128 heads of 576 absorbed). **ReLU** is
# there because it is cheap, and because it makes the sum over heads more than one dot product:
# without it $\sum_j w_j\, q_j \cdot k = (\sum_j w_j q_j)\cdot k$, and all heads collapse into one.
# The **weights** come from the query token and may be negative: a head can also speak against a
# key.
#
# Then attention, exact, over the $k$ best keys among those the query may see ($k = 2048$ in V3.2).
# All heads of a token share the selection, because all heads share the latents: the chosen rows of
# the MLA cache are gathered once, for one key-value head of width 576. The indexer is trained to
# imitate: first against the attention that it will replace (its target is the attention weights
# summed over heads; the loss is a KL divergence), then with the selection in place.


# %% exercise="lightning_indexer_scores" minutes=8 difficulty=1
def lightning_indexer_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """I[b, t, s] = Σ_j w[b, t, j] · ReLU(q[b, t, j] · k[b, s]), for all pairs (no mask, no scale).

    q: (batch, q_len, index_heads, index_dim); k: (batch, k_len, index_dim), shared by the heads; w:
    (batch, q_len, index_heads), of any sign. Returns (batch, q_len, k_len).
    """
    ### BEGIN SOLUTION
    return torch.einsum("btj,btjs->bts", w, torch.einsum("btjd,bsd->btjs", q, k).relu())
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two sums</summary>
#
# First all products of a query's heads with the keys, (batch, q_len, index_heads, k_len), and ReLU
# on them; then the heads' weighted sum.
# </details>

# %% check="lightning_indexer_scores" points=2
q = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # one query token, two heads: they look at x and y
k = torch.tensor([[[3.0, 1.0], [-2.0, 4.0]]])  # two keys
w = torch.tensor([[[1.0, -0.5]]])
checks.close(
    lightning_indexer_scores(q, k, w),
    torch.tensor([[[3.0 - 0.5, 0.0 - 2.0]]]),
    what="the scores of two keys",
    mistakes={
        "leaving out ReLU": torch.tensor([[[2.5, -4.0]]]),
        "leaving out the weights of the heads": torch.tensor([[[4.0, 4.0]]]),
        "ReLU after the sum instead of before": torch.tensor([[[2.5, 0.0]]]),
        "softmax in place of ReLU": (
            torch.softmax(torch.tensor([[3.0, -2.0], [1.0, 4.0]]), -1)
            * torch.tensor([[1.0], [-0.5]])
        ).sum(0)[None, None],
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(40)
for batch, q_len, k_len, heads, dim in [
    (1, 1, 1, 1, 1),
    (2, 5, 5, 3, 4),
    (3, 2, 7, 4, 8),
    (1, 6, 3, 1, 2),
]:
    q, k, w = (
        checks.randn(*s, generator=g, dtype=torch.float64)
        for s in ((batch, q_len, heads, dim), (batch, k_len, dim), (batch, q_len, heads))
    )
    expected = torch.zeros(batch, q_len, k_len, dtype=torch.float64, device=q.device)
    for j in range(heads):
        product = (q[:, :, j, None] * k[:, None]).sum(-1)
        expected += w[:, :, j, None] * torch.where(product > 0, product, 0.0)
    with checks.unchanged(q=q, k=k, w=w):
        checks.close(
            lightning_indexer_scores(q, k, w),
            expected,
            what=f"the scores of {q_len} queries and {k_len} keys, {heads} heads",
            dtype=torch.float64,
        )
checks.keeps_dtype(lightning_indexer_scores, q, k, w, what="the scores")
checks.gradients(
    lightning_indexer_scores,
    lambda q, k, w: sum(
        w[:, :, j, None] * (q[:, :, j] @ k.mT).clamp(min=0) for j in range(q.shape[2])
    ),
    q,
    k,
    w,
    names=("q", "k", "w"),
)
### END HIDDEN TESTS


# %% exercise="topk_sparse_attention" minutes=30 difficulty=3
def topk_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, index_scores: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Exact causal attention over the `topk` keys of each query that have the highest index scores.

    q: (batch, heads, q_len, head_dim); k: (batch, k_len, head_dim) and v: (batch, k_len, v_dim),
        shared by all heads, q_len ≤ k_len.
    index_scores: (batch, q_len, k_len), finite, of any size, not masked: they only rank. Query i
        stands at position i + (k_len − q_len) and chooses among the keys up to and including its
        own position; where it sees fewer than topk, it takes them all. topk may exceed k_len.

    Returns (out, chosen): out (batch, heads, q_len, v_dim) = softmax(q·k / √head_dim) v over the
    chosen keys, and chosen (batch, q_len, min(topk, k_len)) int64, the positions of the chosen keys
    in any order, −1 where there are fewer. Keys are gathered: nothing with heads · q_len · k_len
    elements is made.
    """
    ### BEGIN SOLUTION
    q_len, k_len = index_scores.shape[1:]
    device = q.device
    positions = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    future = torch.arange(k_len, device=device) > positions
    best, chosen = index_scores.masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
    real = best > -math.inf  # (batch, q_len, topk)

    batch = torch.arange(q.shape[0], device=device)[:, None, None]
    k_sel, v_sel = k[batch, chosen], v[batch, chosen]  # (batch, q_len, topk, head_dim or v_dim)
    scores = torch.einsum("bhtd,btnd->bhtn", q / math.sqrt(q.shape[-1]), k_sel)
    weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen.masked_fill(~real, -1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: causal before top-k</summary>
#
# A future key with a high index score must not take one of the k places. What score do you give it
# before `topk`?
# </details>
#
# <details><summary>Hint: gathering rows</summary>
#
# `k[batch, chosen]` with `batch` of shape (batch, 1, 1) and `chosen` (batch, q_len, topk) gives
# (batch, q_len, topk, head_dim).
# </details>


# %% tags=["support"]
# Support: attention under a mask, in float64


def restricted_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense attention with a mask (…, q_len, k_len); a row without a key gives 0.

    k, v: (batch, heads or 1, k_len, …).
    """
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).masked_fill(~mask, 0.0)
    return weights @ v.double()


# %% check="topk_sparse_attention" points=2
g = checks.generator(41)
q, k, v = (
    checks.randn(*s, generator=g, dtype=torch.float64) for s in ((1, 2, 4, 3), (1, 4, 3), (1, 4, 5))
)
index = torch.tensor([[[1.0, 9, 9, 9], [2, 1, 9, 9], [5, 0, 1, 9], [0, 3, 1, 2]]]).to(q)
# The 2 best that each may see.
selected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).to(q).bool()
result = topk_sparse_attention(q, k, v, index, topk=2)
assert type(result) is tuple, "return (out, chosen)"
out, chosen = result
future = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]]).to(q).bool()
everything = torch.ones(4, 4, device=q.device).tril().bool()
dense = q @ k[:, None].mT / math.sqrt(3)
whole_softmax = (dense.masked_fill(~everything, -math.inf).softmax(-1) * selected) @ v[:, None]
checks.close(
    out,
    restricted_attention(q, k[:, None], v[:, None], selected),
    what="the output",
    mistakes={
        "letting future keys take places among the topk": restricted_attention(
            q, k[:, None], v[:, None], future
        ),
        "a softmax over all visible keys, of which only the chosen are used,": whole_softmax,
        "attention that ignores the selection": restricted_attention(
            q, k[:, None], v[:, None], everything
        ),
    },
)
assert [sorted(row) for row in chosen[0].tolist()] == [[-1, 0], [0, 1], [0, 2], [1, 3]], (
    f"the chosen keys are [0], [0, 1], [0, 2], [1, 3], with −1 for an empty place; yours are "
    f"{chosen[0].tolist()}"
)
### BEGIN HIDDEN TESTS
for batch, heads, q_len, k_len, topk in [
    (2, 3, 9, 9, 4),
    (1, 2, 3, 12, 5),
    (3, 1, 1, 8, 1),
    (2, 4, 7, 7, 1),
    (1, 5, 1, 1, 3),
    (2, 2, 5, 9, 8),
]:
    q, k, v = (
        checks.randn(*s, generator=g, dtype=torch.float64)
        for s in ((batch, heads, q_len, 6), (batch, k_len, 6), (batch, k_len, 3))
    )
    index = checks.randn(batch, q_len, k_len, generator=g, dtype=torch.float64)
    with checks.unchanged(q=q, k=k, v=v, index_scores=index):
        out, chosen = topk_sparse_attention(q, k, v, index, topk)
    assert chosen.shape == (batch, q_len, min(topk, k_len)), (
        f"chosen has shape {tuple(chosen.shape)}, not {(batch, q_len, min(topk, k_len))}"
    )
    mask = torch.zeros(batch, q_len, k_len, dtype=torch.bool, device=q.device)
    for b in range(batch):
        for i in range(q_len):
            visible = index[b, i, : i + k_len - q_len + 1]
            best = sorted(range(len(visible)), key=lambda j: -float(visible[j]))[:topk]
            mask[b, i, best] = True
            yours = [j for j in chosen[b, i].tolist() if j >= 0]
            assert sorted(yours) == sorted(best), (
                f"query {i} of {q_len} over {k_len} keys, topk {topk}: the best are "
                f"{sorted(best)}, yours {sorted(yours)}"
            )
    checks.close(
        out,
        restricted_attention(q, k[:, None], v[:, None], mask[:, None]),
        what=f"the output of {q_len} queries over {k_len} keys, topk {topk}",
    )
### END HIDDEN TESTS

# %% check="topk_sparse_attention" points=2
# Law: with topk at least as large as the text, this is dense causal attention, whatever the index
# says.
g = checks.generator(42)
q, k, v = (checks.randn(*s, generator=g) for s in ((2, 3, 6, 8), (2, 6, 8), (2, 6, 8)))
index = checks.randn(2, 6, 6, generator=g)
dense = F.scaled_dot_product_attention(
    q.double(),
    k[:, None].double().expand(-1, 3, -1, -1),
    v[:, None].double().expand(-1, 3, -1, -1),
    is_causal=True,
)
checks.close(
    topk_sparse_attention(q, k, v, index, 6)[0],
    dense,
    what="the output for topk = k_len",
    dtype=torch.float32,
)
checks.close(
    topk_sparse_attention(q, k, v, index, 50)[0],
    dense,
    what="the output for topk beyond k_len",
    dtype=torch.float32,
)
### BEGIN HIDDEN TESTS
# Poison: keys and values outside the selection are NaN for the last query, and must not touch its
# output.
poisoned_k, poisoned_v = k.clone(), v.clone()
index[:, 5] = torch.tensor([9.0, -9, 8, -9, -9, 7], device=q.device)
poisoned_k[:, [1, 3, 4]], poisoned_v[:, [1, 3, 4]] = math.nan, math.nan
out, _ = topk_sparse_attention(q, poisoned_k, poisoned_v, index, 3)
only = torch.zeros(6, 6, dtype=torch.bool, device=q.device)
only[5, [0, 2, 5]] = True
checks.close(
    out[:, :, 5],
    restricted_attention(q, k[:, None], v[:, None], only)[:, :, 5],
    what="the last query's output, with NaN in the keys that it did not choose",
)
# Scores near ±200 in float32, where e^200 overflows and e^−200 vanishes; and index scores far below
# any number that might stand for −∞.
everything = torch.ones(6, 6, device=q.device).tril().bool()
for sign in (1.0, -1.0):
    far_q, far_k = q / 10 + 9 * sign, k / 10 + 8
    for topk, low in ((6, 0.0), (3, -1e12)):
        ranks = index.double() + low
        best = ranks.masked_fill(~everything, -math.inf)
        mask = (best >= best.topk(topk, -1).values[..., -1:]) & everything
        checks.close(
            topk_sparse_attention(far_q, far_k, v, ranks, topk)[0],
            restricted_attention(far_q, far_k[:, None], v[:, None], mask[:, None]),
            what=f"the output for scores near {sign * 200:.0f}, topk {topk}",
            rtol=1e-3,
            hint="Does e^score overflow or vanish before it is divided by the sum? Is what a query "
            "may not choose really the lowest?",
        )
lowest, ones = torch.full((2, 1, 6, 1), -1e6).to(v), torch.ones(2, 6, 1).to(v)
checks.close(
    topk_sparse_attention(lowest, ones, v, index, 6)[0][:, 0],
    v.double().cumsum(1) / torch.arange(1, 7, device=v.device)[:, None],
    what="the output where every score is −10⁶",
    rtol=1e-5,
    hint="An empty place has weight 0, however low the real scores are",
)
batch, heads, q_len, k_len, dim, topk = 1, 32, 64, 64, 4, 8
q, k, v = (
    checks.randn(*s, generator=g)
    for s in ((batch, heads, q_len, dim), (batch, k_len, dim), (batch, k_len, dim))
)
index = checks.randn(batch, q_len, k_len, generator=g)
with checks.allocations() as made:
    topk_sparse_attention(q, k, v, index, topk)
assert made.largest < heads * q_len * k_len // 2, (
    f"a tensor of {made.largest} elements was made; all scores would be {heads * q_len * k_len}, "
    f"those of the chosen keys {heads * q_len * topk}"
)
index = checks.randn(2, 5, 5, generator=g, dtype=torch.float64)
q, k, v = (
    checks.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 2, 5, 4), (2, 5, 4), (2, 5, 3))
)
best = index.masked_fill(torch.ones(5, 5, device=q.device).triu(1).bool(), -math.inf)
mask = (best >= best.topk(2, -1).values[..., -1:]) & best.isfinite()
checks.gradients(
    lambda q, k, v: topk_sparse_attention(q, k, v, index, 2)[0],
    lambda q, k, v: restricted_attention(q, k[:, None], v[:, None], mask[:, None]),
    q,
    k,
    v,
    names=("q", "k", "v"),
)
### END HIDDEN TESTS

# %% [markdown]
# ## A pattern for each head, in blocks
#
# Heads differ. In a trained model some look at the last few tokens only, others at the whole text
# (how many of each, the experiment below measures). Giving every head the pattern that it needs (a
# local window, global tokens, everything) saves more than one pattern for all, and keeps the
# far-sighted heads.
#
# A mask alone saves nothing: masked scores are computed and thrown away. Work is saved in
# **blocks**. Cut queries and keys into blocks of $b$; a pair of blocks in which a head's mask is
# False throughout is *not computed*. Which pairs are left is a list, different for each head, and
# the product over a list of pairs is what block-sparse kernels (FlexAttention, MInference) do. In
# PyTorch: gather the blocks of the list, one batched product, and put the pieces of each row of
# blocks together.


# %% exercise="per_head_pattern_attention" minutes=40 difficulty=3 path="more"
def per_head_pattern_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int
) -> tuple[Tensor, int]:
    """Attention under a mask for each head, computing only blocks in which something is visible.

    q: (batch, heads, q_len, head_dim); k: (batch, heads, k_len, head_dim); v: (batch, heads, k_len,
        v_dim).
    mask: (heads, q_len, k_len), bool, True = may attend; the same for all sequences. Queries and
    keys are cut into blocks of `block` from the start; the last may be shorter. Scores are scaled
    by 1/√head_dim; a query that sees nothing gets 0.

    Returns (out, computed): out (batch, heads, q_len, v_dim), and the number of (head, query block,
    key block) that were computed: those with at least one True. The products q kᵀ and w v are
    formed for these blocks and no others. PyTorch's scaled_dot_product_attention is not allowed
    here.
    """
    ### BEGIN SOLUTION
    batch, heads, q_len, head_dim = q.shape
    k_len, v_dim = v.shape[2:]
    q_pad, k_pad = -q_len % block, -k_len % block

    def blocks(t: Tensor, pad: int) -> Tensor:  # (batch, heads, blocks, block, width)
        return F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, block))

    q_blocks = blocks(q / math.sqrt(head_dim), q_pad)
    k_blocks, v_blocks = blocks(k, k_pad), blocks(v, k_pad)
    padded = F.pad(mask, (0, k_pad, 0, q_pad)).unflatten(1, (-1, block)).unflatten(3, (-1, block))
    tiles = padded.transpose(2, 3)  # (heads, rows, columns, block, block)
    # The list: `computed` pairs of blocks.
    head, row, column = tiles.flatten(3).any(-1).nonzero(as_tuple=True)
    rows = tiles.shape[1]
    owner = head * rows + row  # the row of blocks that a pair belongs to

    # (batch, computed, block, block)
    scores = q_blocks[:, head, row] @ k_blocks[:, head, column].mT
    scores = scores.masked_fill(~tiles[head, row, column], -math.inf)
    # Softmax over all pairs of a row of blocks: its maximum, then its sum.
    highest = scores.detach().amax(-1)
    top = scores.new_full((batch, heads * rows, block), -math.inf).scatter_reduce(
        1, owner[:, None].expand_as(highest), highest, "amax"
    )
    top = top.masked_fill(top == -math.inf, 0.0)
    p = torch.exp(scores - top[:, owner, :, None])
    total = p.new_zeros(batch, heads * rows, block).index_add(1, owner, p.sum(-1))
    out = p.new_zeros(batch, heads * rows, block, v_dim).index_add(
        1, owner, p @ v_blocks[:, head, column]
    )
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return out.view(batch, heads, rows * block, v_dim)[:, :, :q_len], len(owner)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the plain way</summary>
#
# Three loops, over heads, query blocks and key blocks, with `continue` where the mask's block is
# empty. Collect a query block's scores over its key blocks, concatenate, one softmax, one product
# with the concatenated values. Right, and slow in Python; good enough for all points.
# </details>
#
# <details><summary>Hint: the list at once</summary>
#
# `tiles.any(...)` over the two axes inside a block, then `nonzero(as_tuple=True)`, gives head, row
# and column of every pair to compute. Indexing with these three gathers the blocks.
# </details>
#
# <details><summary>Hint: a softmax across pieces</summary>
#
# Pieces of one row of blocks share a maximum and a sum. `index_add` sums pieces into their row;
# `scatter_reduce(…, "amax")` takes the maximum.
# </details>

# %% check="per_head_pattern_attention" points=2
g = checks.generator(50)
q, k, v = (checks.randn(1, 2, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
# Head 0 is causal, head 1 sees only itself.
mask = torch.stack([torch.ones(6, 6).tril().bool(), torch.eye(6).bool()]).to(q.device)
whole = mask.unflatten(1, (3, 2)).unflatten(3, (3, 2)).any(4).any(2)  # of each block
with checks.forbidden("scaled_dot_product_attention"):
    result = per_head_pattern_attention(q, k, v, mask, block=2)
assert type(result) is tuple, "return (out, computed)"
out, computed = result
checks.close(
    out,
    restricted_attention(q, k, v, mask),
    what="the output",
    mistakes={
        "using head 0's pattern for all": restricted_attention(q, k, v, mask[0]),
        "showing whole blocks in which only a part is visible": restricted_attention(
            q, k, v, whole.repeat_interleave(2, 1).repeat_interleave(2, 2)
        ),
    },
)
checks.close(
    computed,
    6 + 3,
    what="the number of blocks computed",
    mistakes={"computing all blocks": 18, "counting one pattern for both heads": 12},
    hint="Head 0: the diagonal and three blocks below it; head 1: the diagonal",
)
### BEGIN HIDDEN TESTS
for batch, heads, q_len, k_len, block, density in [
    (2, 3, 8, 8, 4, 0.3),
    (1, 2, 7, 11, 3, 0.1),
    (2, 1, 5, 5, 8, 0.5),
    (1, 4, 1, 9, 2, 0.2),
    (2, 2, 6, 4, 1, 0.3),
    (1, 3, 12, 12, 4, 0.02),
]:
    q, k, v = (
        checks.randn(batch, heads, n, d, generator=g, dtype=torch.float64)
        for n, d in ((q_len, 5), (k_len, 5), (k_len, 3))
    )
    mask = (torch.rand(heads, q_len, k_len, generator=g) < density).to(q.device)
    mask[0, -1, 0] = True
    expected = sum(
        bool(mask[h, i : i + block, j : j + block].any())
        for h in range(heads)
        for i in range(0, q_len, block)
        for j in range(0, k_len, block)
    )
    with (
        checks.unchanged(q=q, k=k, v=v, mask=mask),
        checks.forbidden("scaled_dot_product_attention"),
    ):
        out, computed = per_head_pattern_attention(q, k, v, mask, block)
    what = f"{heads} heads, {q_len} queries, {k_len} keys, blocks of {block}"
    checks.close(
        out,
        restricted_attention(q, k, v, mask),
        what=f"the output of {what}",
        hint="A query that sees nothing gets 0",
    )
    checks.close(computed, expected, what=f"the number of blocks computed, {what}")
q, k, v = (checks.randn(1, 2, 9, 4, generator=g, dtype=torch.float64) for _ in range(3))
mask = (torch.rand(2, 9, 9, generator=g) < 0.4).to(q.device) | torch.eye(9, device=q.device).bool()
checks.gradients(
    lambda q, k, v: per_head_pattern_attention(q, k, v, mask, 4)[0],
    lambda q, k, v: restricted_attention(q, k, v, mask),
    q,
    k,
    v,
    names=("q", "k", "v"),
)
checks.keeps_dtype(
    lambda q, k, v: per_head_pattern_attention(q, k, v, mask, 4)[0], q, k, v, what="the output"
)
# Scores from −200 to 200, near 200, near −200 and near −40,000, in float32.
q, k, v = q.float(), k.float(), v.float()
for shift in (0.0, 10.0, -10.0, -2000.0):
    far_q, far_k = (q * 15, k * 10) if not shift else (q / 10 + shift, k / 10 + 10)
    checks.close(
        per_head_pattern_attention(far_q, far_k, v, mask, 4)[0],
        restricted_attention(far_q, far_k, v, mask),
        what="the output for scores of some hundreds" + (", all of one sign" if shift else ""),
        rtol=5e-2 if abs(shift) > 100 else 1e-3,
        hint="Does e^score overflow or vanish before it is divided by the sum? What is not visible "
        "has weight 0, however low the other scores are",
    )
### END HIDDEN TESTS

# %% check="per_head_pattern_attention" points=3
# The products, counted by PyTorch: 2 · b² · head_dim FLOPs for q kᵀ of a block, 2 · b² · v_dim for
# w v.
q, k, v = (checks.randn(1, 2, 64, 8, generator=checks.generator(51 + i)) for i in range(3))
near = torch.ones(64, 64, device=q.device).tril().triu(-8).bool()
mask = torch.stack(
    [near, torch.ones(64, 64, device=q.device).tril().bool()]
)  # a window of 9, and everything
with checks.flops() as flops:
    out, computed = per_head_pattern_attention(q, k, v, mask, block=8)
checks.close(computed, 15 + 36, what="the number of blocks computed")
allowed = 51 * 2 * 8 * 8 * (8 + 8)
assert flops.total <= allowed, (
    f"the products took {flops.total:,} FLOPs; 51 blocks need {allowed:,} and all 128 take "
    f"{128 * 2 * 64 * 16:,}: "
    "are empty blocks skipped before the product, or only masked after it?"
)
assert flops.total > 0, (
    "no matrix product was made: form the scores of a block with @ (or einsum, bmm)"
)
### BEGIN HIDDEN TESTS
for seed, (batch, heads, length, block) in enumerate([(2, 3, 48, 8), (1, 4, 40, 16)]):
    g = checks.generator(60 + seed)
    q, k, v = (checks.randn(batch, heads, length, d, generator=g) for d in (8, 8, 4))
    grid = -(-length // block)
    blocks = torch.rand(heads, grid, grid, generator=g) < 0.3
    blocks[:, 0, 0] = True
    mask = (
        blocks.repeat_interleave(block, 1)
        .repeat_interleave(block, 2)[:, :length, :length]
        .to(q.device)
    )
    with checks.flops() as flops:
        out, computed = per_head_pattern_attention(q, k, v, mask, block)
    kept = int(blocks.sum())
    checks.close(computed, kept, what="the number of blocks computed")
    checks.close(
        out, restricted_attention(q, k, v, mask), what="the output", rtol=2e-5, dtype=torch.float32
    )
    allowed = batch * kept * 2 * block * block * 12
    assert 0 < flops.total <= allowed, (
        f"the products took {flops.total:,} FLOPs; {kept} blocks need {allowed:,} (all: "
        f"{batch * heads * grid**2 * 24 * block**2:,})"
    )
# Blocks that are not computed cannot be poisoned.
q, k, v = (checks.randn(1, 2, 32, 4, generator=g) for _ in range(3))
mask = torch.zeros(2, 32, 32, dtype=torch.bool, device=q.device)
mask[0, :, :8], mask[1, :, 24:] = True, True
bad_k, bad_v = k.clone(), v.clone()
for t in (bad_k, bad_v):
    t[:, 0, 8:], t[:, 1, :24] = math.nan, math.nan
checks.close(
    per_head_pattern_attention(q, bad_k, bad_v, mask, 8)[0],
    restricted_attention(q, k, v, mask),
    what="the output with NaN in the blocks that nobody sees",
    rtol=2e-5,
)
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: which pattern remembers?
#
# The recall task of lesson 09: a first token that starts every text, then a block of 8 to 40
# different tokens, repeated until the text is full (in training also shorter ones, from which it is
# learned sooner). Once the block has begun to return, the next token follows from what was seen, at
# a distance of one block. Elsewhere it is a guess among 48, worth $\ln 48 = 3.87$ nats (a little
# less for a model that keeps count of the tokens already used up): the two kinds of token are
# measured apart, as *recall* and as *calibration where there is nothing to recall*.
#
# Two layers of attention only, four query heads over **one** key-value head, as absorbed MLA has
# it. The model is trained with full attention and then runs under each pattern without further
# training, as one would run a finished model.
#
# **Write down before you run it:** how many keys does a window need for 90 % of the recall, how
# many does a choice by the true weights need, and what will a window without the first token do to
# the tokens that nobody can predict?

# %% tags=["experiment"]
SYMBOLS, LENGTH, DIM, HEADS, HEAD_DIM = 48, 64, 64, 4, 32


def recall_batch(
    size: int, generator: torch.Generator, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens (size, LENGTH), the first is 0; and True (size, LENGTH − 1) where the next one can be
    recalled.
    """
    period = torch.randint(8, 41, (size, 1), generator=generator)
    if training:  # more short blocks than long ones
        period = (4 + 37 * torch.rand(size, 1, generator=generator) ** 2).long()
    blocks = torch.rand(size, SYMBOLS, generator=generator).argsort(1) + 1
    tokens = F.pad(blocks.gather(1, torch.arange(LENGTH - 1) % period), (1, 0))
    # The block stands at 1 … period; its return is known from its second token on.
    known = torch.arange(1, LENGTH) > period + 1
    return tokens.to(profile.device), known.to(profile.device)


class RecallLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.qkv = nn.Linear(DIM, (HEADS + 2) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)

    def qkv_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (batch, HEADS, seq, HEAD_DIM); k and v (batch, seq, HEAD_DIM), for all heads."""
        parts = self.qkv(self.norm(x)).unflatten(-1, (HEADS + 2, HEAD_DIM)).transpose(1, 2)
        at = torch.arange(x.shape[1], device=x.device)
        return rope(parts[:, :HEADS], at), rope(parts[:, HEADS], at), parts[:, HEADS + 1]


class RecallModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, DIM)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.layers = nn.ModuleList(RecallLayer() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, SYMBOLS + 1, bias=False)

    def forward(self, tokens: Tensor, attend) -> Tensor:
        """attend(layer number, the layer's input, q, k, v) gives (batch, HEADS, seq, HEAD_DIM)."""
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = x + layer.out(attend(i, x, *layer.qkv_of(x)).transpose(1, 2).flatten(-2))
        return self.head(self.norm(x))


def dense(i, x, q, k, v):
    k, v = (t[:, None].expand(-1, HEADS, -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def score(model: RecallModel, attend) -> tuple[float, float]:
    """Share of the recallable tokens that are recalled (%), and the loss on the others (nats)."""
    tokens, known = recall_batch(64, torch.Generator().manual_seed(4321))
    with torch.no_grad():
        logits = model(tokens, attend)[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return 100 * float((logits.argmax(-1) == tokens[:, 1:])[known].float().mean()), float(
        losses[~known].mean()
    )


torch.manual_seed(10)
generator = torch.Generator().manual_seed(10)
recall = RecallModel().to(profile.device)
optimizer = torch.optim.AdamW(recall.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
TRAINING_STEPS = 220
rate = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda s: min(1, (s + 1) / 20, (TRAINING_STEPS - s) / (0.3 * TRAINING_STEPS))
)
curve = {"can be recalled": [], "cannot": []}
for _ in range(TRAINING_STEPS):
    tokens, known = recall_batch(32, generator, training=True)
    losses = F.cross_entropy(
        recall(tokens, dense)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    optimizer.zero_grad()
    losses.mean().backward()
    nn.utils.clip_grad_norm_(recall.parameters(), 1.0)
    optimizer.step()
    rate.step()
    curve["can be recalled"].append(float(losses[known].detach().mean()))
    curve["cannot"].append(float(losses[~known].detach().mean()))

weights_of = []  # (batch, HEADS, seq, seq) of each layer


def watch(i, x, q, k, v):
    scores = q @ k[:, None].mT / HEAD_DIM**0.5
    weights_of.append(
        scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)
    )
    return weights_of[-1] @ v[:, None]


full_recall, full_loss = score(recall, watch)
tokens, known = recall_batch(64, torch.Generator().manual_seed(4321))
first, second = weights_of
copying = F.pad(known, (0, 1), value=True)  # of each query: can its next token be recalled?
sink_mass = [
    [float(w[..., 0].mean(1)[at].mean()) for at in (copying, ~copying)] for w in (first, second)
]

# %% tags=["experiment", "figure"]
# Figure: what the model learns to recall, and the sink that it makes
period = int((~known[0]).sum()) - 1  # the first token of the return is not known either
fig, axes = plot.plt.subplots(1, 3, figsize=(13, 4), width_ratios=[1.15, 1.1, 0.9])
plot.curves(
    range(TRAINING_STEPS),
    curve,
    xlabel="training step",
    ylabel="loss (nats)",
    title="the next token …",
    ax=axes[0],
)
axes[0].axhline(math.log(SYMBOLS), color="#888888", linewidth=1, linestyle=":")
plot.heatmap(
    second[0].mean(0),
    xlabel="key position",
    ylabel="query position",
    title=f"layer 2, mean of 4 heads (block of {period})",
    unit="weight",
    vmin=0,
    vmax=1,
    ax=axes[1],
)
for layer, (yes, no) in enumerate(sink_mass):
    for at, height, name in ((-0.19, yes, "something to recall"), (0.19, no, "nothing to recall")):
        axes[2].bar(
            layer + at,
            height,
            width=0.36,
            color=plot.COLORS[5 if at < 0 else 2],
            edgecolor="black",
            label=name if layer else None,
        )
axes[2].set_xticks([0, 1], ["layer 1", "layer 2"])
axes[2].set(ylabel="weight on the first token", ylim=(0, 1))
axes[2].legend(fontsize=8, loc="upper left")
axes[2].set_title("a sink, learned")
plot.caption(
    fig,
    f"Recall {full_recall:.0f} %, loss elsewhere {full_loss:.2f} (dotted: ln 48). Layer 2 looks "
    f"at what followed the earlier copies of a token; where there is none yet it puts "
    f"{sink_mass[1][1]:.0%} of its weight on the first token, which carries nothing. Nobody asked "
    f"for a sink: softmax needs somewhere to put its 1.",
)
plot.plt.show()

# %% [markdown]
# Now the patterns. The learned choice needs an indexer for each layer, trained as in the first
# stage of DeepSeek-V3.2: the model is frozen; the target is the attention weights averaged over
# heads, $p_t$; the loss is $\mathrm{KL}(p_t \,\|\, \mathrm{softmax}(I_t))$ over the keys that $t$
# may see.


# %% tags=["experiment"]
class Indexer(nn.Module):
    """Two heads of 16 and one key for both, rotated; made of the layer's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.w = nn.Linear(DIM, 2 * 16), nn.Linear(DIM, 16), nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        q = rope(self.q(x).unflatten(-1, (2, 16)).transpose(1, 2), at).transpose(1, 2)
        return lightning_indexer_scores(q, rope(self.k(x), at), self.w(x))


torch.manual_seed(11)
indexers = nn.ModuleList(Indexer() for _ in range(2)).to(profile.device)
optimizer = torch.optim.AdamW(indexers.parameters(), lr=1e-2)
generator, divergence = torch.Generator().manual_seed(12), []
future = torch.ones(LENGTH, LENGTH, device=profile.device).triu(1).bool()
inputs = []


def remember(i, x, q, k, v):
    inputs.append(recall.layers[i].norm(x))
    return watch(i, x, q, k, v)


for _ in range(100):
    inputs.clear()
    weights_of.clear()
    with torch.no_grad():
        recall(recall_batch(16, generator)[0], remember)
    loss = 0.0
    for indexer, x, weights in zip(indexers, inputs, weights_of, strict=True):
        logged = indexer(x).masked_fill(future, -1e9).log_softmax(-1)
        target = weights.mean(1)
        loss = loss + (torch.special.xlogy(target, target) - target * logged).sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    divergence.append(loss.item())


def masked(mask: Tensor):
    def attend(i, x, q, k, v):
        return F.scaled_dot_product_attention(
            q, *(t[:, None].expand(-1, HEADS, -1, -1) for t in (k, v)), attn_mask=mask
        )

    return attend


def by_weights(n: int):
    """The n keys with the largest true weights: what a perfect indexer would choose."""

    def attend(i, x, q, k, v):
        weights = (q @ k[:, None].mT / HEAD_DIM**0.5).masked_fill(future, -math.inf).softmax(-1)
        return topk_sparse_attention(q, k, v, weights.mean(1), n)[0]

    return attend


def by_indexer(n: int):
    return lambda i, x, q, k, v: topk_sparse_attention(
        q, k, v, indexers[i](recall.layers[i].norm(x)), n
    )[0]


def at_random(n: int):
    ranks = torch.rand(1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(13)).to(
        profile.device
    )
    return lambda i, x, q, k, v: topk_sparse_attention(q, k, v, ranks.expand(len(q), -1, -1), n)[0]


budgets = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
patterns = {
    "window": lambda n: masked(sliding_window_mask(LENGTH, LENGTH, n, device=profile.device)),
    "1 sink + window": lambda n: masked(sink_mask(LENGTH, LENGTH, n - 1, 1, device=profile.device)),
    "top-k, random": at_random,
    "top-k, indexer": by_indexer,
    "top-k, true weights": by_weights,
}
found = {name: [score(recall, make(n)) for n in budgets] for name, make in patterns.items()}

# %% tags=["experiment", "figure"]
# Figure: recall and calm against the number of keys, by pattern
fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 4.2))
plot.curves(
    budgets,
    {name: [recalled for recalled, _ in rows] for name, rows in found.items()},
    logx=True,
    xlabel="keys per query",
    ylabel="recalled (%)",
    title="what can be recalled",
    ax=axes[0],
)
plot.curves(
    budgets,
    {name: [loss for _, loss in rows] for name, rows in found.items()},
    logx=True,
    xlabel="keys per query",
    ylabel="loss (nats)",
    title="what cannot: ln 48 = 3.87 is fair",
    ax=axes[1],
)
axes[0].get_legend().remove()
axes[0].lines[4].set(linewidth=5, alpha=0.4)
axes[1].lines[4].set(linewidth=5, alpha=0.4)
periods = (~known).sum(1) - 1  # of the texts of `score`
reach = [100 * float(known[periods <= n].sum() / known.sum()) for n in budgets]
axes[0].plot(budgets, reach, "x", color="#888888", label="")
four = budgets.index(4)
plot.caption(
    fig,
    f"With 4 keys: indexer {found['top-k, indexer'][four][0]:.0f} % recalled, true weights "
    f"{found['top-k, true weights'][four][0]:.0f} %, window {found['window'][four][0]:.0f} %. "
    "Crosses: the share of tokens whose block fits in the window, which is all that a window can "
    "do. Right: without the sink the model is wrong with confidence where it should shrug; one "
    "kept token repairs that, and brings back no memory.",
)
plot.plt.show()

# %% [markdown]
# The two curves answer two different questions. A **sink** repairs the model's calm: its loss on
# unpredictable tokens returns to about $\ln 48$. It recalls nothing that the window does not. A
# **choice** recalls everything with a handful of keys, because in this task one key is what
# matters. Even a *random* choice recalls more than a window of the same size, until the window
# spans whole blocks: now and then it hits a copy, wherever that lies, while a window never reaches
# beyond its edge. The indexer comes close to the true weights although it has two small heads. Do
# not carry the numbers over: real text needs more than one key, and V3.2 takes 2048.

# %% [markdown]
# ## The patterns, side by side
#
# Six masks of 64 tokens, five of them made by your functions. The last is not a rule but a choice:
# what the trained indexer of layer 2 picks on one text of the recall task.

# %% tags=["experiment", "figure"]
# Figure: six masks of 64 tokens
tokens, _ = recall_batch(1, torch.Generator().manual_seed(14))
picks = {}


def note_choice(i, x, q, k, v):
    out, picks[i] = topk_sparse_attention(q, k, v, indexers[i](recall.layers[i].norm(x)), 6)
    return out


with torch.no_grad():
    recall(tokens, note_choice)
chosen = picks[1][0].masked_fill(picks[1][0] < 0, LENGTH)  # an empty place: a column to be cut off
chosen = (
    torch.zeros(LENGTH, LENGTH + 1, device=chosen.device).scatter(1, chosen, 1)[:, :LENGTH].bool()
)
panels = {
    "causal": torch.ones(LENGTH, LENGTH).tril().bool(),
    "window of 6": sliding_window_mask(LENGTH, LENGTH, 6),
    "4 sinks, window of 6": sink_mask(LENGTH, LENGTH, 6, 4),
    "Longformer: 6, global 0 and 20": longformer_mask(LENGTH, 6, [0, 20]),
    "BigBird: blocks of 4, 2 random": bigbird_mask(
        LENGTH, block=4, window=3, random_blocks=2, global_blocks=1, seed=1
    ),
    "top 6, by the indexer": chosen,
}
fig, axes = plot.plt.subplots(2, 3, figsize=(10, 7.9), sharex=True, sharey=True)
for ax, (name, mask) in zip(axes.flat, panels.items(), strict=True):
    ax.imshow(plot.array(mask), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
    ax.set_title(f"{name} ({float(mask.float().mean()):.0%})", fontsize=9)
    ax.grid(False)
fig.supxlabel("key position", fontsize=10)
fig.supylabel("query position", fontsize=10)
plot.caption(
    fig,
    "Dark: may attend; in brackets the share of all pairs. Longformer and BigBird look both ways; "
    "a global token is a row and a column. The chosen pattern has as many keys a query as the "
    "window. It finds the sink and, from the second block on, the diagonals of the copies, "
    "wherever they are in this text.",
)
plot.plt.show()

# %% [markdown]
# ## Experiment: how far do the heads of a language model look?
#
# The course's small model, on a page of held-out documentation. For each of its heads, find the
# shortest window that, with one sink, holds 95 % of its attention on average. Then run each layer's
# attention in blocks: causal, with one window for all heads (the widest needed in that layer), and
# with a window for each head.

# %% tags=["experiment"]
from llm40 import models
from torch.overrides import TorchFunctionMode


class Recorder(TorchFunctionMode):
    """Keeps q, k, v of every call of PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append(args[:3])
        return func(*args, **(kwargs or {}))


model, tokenizer = models.load("small")
ids = tokenizer.encode(max(held_out.values(), key=len))[:384]
with torch.inference_mode(), Recorder() as recorder:
    model(torch.tensor([ids], device=profile.device))

N, TILE, SHARE = len(ids), 32, 0.95
causal = torch.ones(N, N, device=profile.device).tril().bool()
widths = sorted({min(2**n, N) for n in range(0, 10)})
needed, counts, errors = [], [], []
for q, k, v in recorder.calls:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = (
        (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~causal, -math.inf).softmax(-1)[0]
    )  # (heads, N, N)
    kept = torch.stack(
        [(weights * sink_mask(N, N, w, 1, device=q.device)).sum(-1).mean(-1) for w in widths]
    )
    window = [widths[i] for i in (kept >= SHARE).float().argmax(0).tolist()]  # of each head
    needed.append(window)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    row = []
    for lengths in ([N] * len(window), [max(window)] * len(window), window):
        mask = torch.stack([sink_mask(N, N, w, 1, device=q.device) for w in lengths])
        out, computed = per_head_pattern_attention(q, k, v, mask, TILE)
        row.append((computed, float((out - exact).norm() / exact.norm())))
    counts.append([computed for computed, _ in row])
    errors.append([error for _, error in row])

# %% tags=["experiment", "figure"]
# Figure: the window that each head needs, and the blocks that this saves
fig, axes = plot.plt.subplots(1, 2, figsize=(12, 4.2))
plot.heatmap(
    torch.tensor(needed),
    xlabel="head",
    ylabel="layer",
    title=f"window that holds {SHARE:.0%} of the attention",
    unit="tokens",
    xticks=range(1, len(needed[0]) + 1),
    yticks=range(1, len(needed) + 1),
    annotate=".0f",
    ax=axes[0],
)
x = range(1, len(counts) + 1)
names = ("causal", "widest window of the layer", "a window for each head")
for i, (name, hatch) in enumerate(zip(names, ("", "//", ""), strict=True)):
    axes[1].bar(
        [j + 0.27 * (i - 1) for j in x],
        [c[i] for c in counts],
        width=0.26,
        label=name,
        color=plot.COLORS[i],
        edgecolor="black",
        hatch=hatch,
    )
axes[1].set(
    xlabel="layer",
    ylabel=f"blocks of {TILE} × {TILE} computed",
    ylim=(0, 1.3 * max(c[0] for c in counts)),
)
axes[1].set_title(f"{N} tokens, {len(needed[0])} heads")
axes[1].legend(fontsize=8, ncols=3, loc="upper center")
totals = [sum(c[i] for c in counts) for i in range(3)]
plot.caption(
    fig,
    f"Blocks computed, of all causal ones: {totals[1] / totals[0]:.0%} with one window a layer, "
    f"{totals[2] / totals[0]:.0%} with one a head. The price: the layers' outputs are off by "
    f"{min(e[2] for e in errors):.0%} to {max(e[2] for e in errors):.0%} (relative norm). "
    f"{sum(w <= 64 for row in needed for w in row)} of {sum(map(len, needed))} heads do with 64 "
    f"tokens, {sum(w >= 256 for row in needed for w in row)} need 256 or all. Windows were chosen "
    f"among powers of two, on this page.",
)
plot.plt.show()

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number are graded.


# %% exercise="sparse_numbers" minutes=20 difficulty=3 kind="questions"
def sparse_numbers() -> dict[str, float]:
    """Five short answers; numbers to 1 percent. A multiplication and an addition are 2 FLOPs.

    "gqa_gib":    tensor parallelism over 8 GPUs gives each an eighth of the heads. The model: 32
                  layers, 32 query heads of 128, one sequence of 131,072 tokens, bfloat16. With 8
                  key-value heads, how much cache does each GPU hold, in GiB?
    "mla_gib":    the same with a latent of 512 and a rotary key of 64.
    "break_even": DeepSeek-V3's layer meets a long cache with T query tokens at once (a prompt's
                  next piece, or drafts). Unfolded: keys and values of every head are made from
                  each cached latent once, then ordinary attention. Absorbed: the latent space.
                  Count FLOPs for one cached token and one head; leave out what is done once per
                  query token. From which T on does unfolding need fewer? (a whole number, exactly)
    "reach":      Mistral 7B has 32 layers with a window of 4096 keys, the token itself among them.
                  How many positions back is the farthest token that can influence the last
                  layer's output? (a whole number, exactly)
    "dsa_factor": DeepSeek-V3.2 decodes one token at 131,072 tokens of context. Its indexer has 64
                  heads of 128; attention is absorbed MLA with 128 heads over 2048 chosen entries.
                  By which factor are its FLOPs (products of indexer and attention alone) fewer
                  than those of dense absorbed MLA?
    """
    ### BEGIN SOLUTION
    gib_of = 32 * 131_072 * 2 / 2**30  # GiB for one number per token and layer
    unfold = 2 * 512 * (128 + 128)  # k and v of a token and head, once
    plain, absorbed = 2 * (192 + 128), 2 * (576 + 512)  # for each query token: score and average
    attention, indexer = 128 * absorbed, 2 * 64 * 128  # for one entry of the cache
    return {
        "gqa_gib": 2 * 8 * 128 / 8 * gib_of,  # one key-value head to each GPU
        "mla_gib": (512 + 64) * gib_of,  # the latent belongs to all heads
        "break_even": unfold // (absorbed - plain) + 1,
        "reach": 32 * (4096 - 1),
        "dsa_factor": attention * 131_072 / (indexer * 131_072 + attention * 2048),
    }
    ### END SOLUTION


# %% check="sparse_numbers" points=1
answer = sparse_numbers()["gqa_gib"]
checks.kind(answer, float, what="gqa_gib")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2.0,
    what="gqa_gib",
    hint="Each GPU has one of the eight key-value heads",
    mistakes={"the whole cache on each GPU": 16.0, "decimal gigabytes": 2.147483648},
)
### END HIDDEN TESTS

# %% check="sparse_numbers" points=1
answer = sparse_numbers()["mla_gib"]
checks.kind(answer, float, what="mla_gib")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    4.5,
    what="mla_gib",
    hint="Which part of the latent does a GPU with 4 of the query heads need?",
    mistakes={"dividing the latent among the GPUs": 4.5 / 8, "decimal gigabytes": 4.831838208},
)
### END HIDDEN TESTS

# %% check="sparse_numbers" points=1
answer = sparse_numbers()["break_even"]
checks.kind(answer, int, what="break_even")
### BEGIN HIDDEN TESTS
cost = {t: (2 * 512 * 256 + t * 640, t * 2176) for t in range(1, 1000)}
checks.number(
    answer,
    min(t for t, (unfolded, absorbed) in cost.items() if unfolded < absorbed),
    to=0,
    what="break_even",
    hint="Absorbed: a score of 576 terms and an average of 512. Unfolded: 192 and 128, and once "
    "512 · (128 + 128) to make the key and the value",
    mistakes={"unfolding keys but not values": 86, "comparing scores alone": 342},
)
### END HIDDEN TESTS

# %% check="sparse_numbers" points=1
answer = sparse_numbers()["reach"]
checks.kind(answer, int, what="reach")


### BEGIN HIDDEN TESTS
def reach(layers, window, n=60):
    """By products of masks, for small numbers."""
    step = torch.ones(n, n).tril().triu(-(window - 1))
    paths = torch.linalg.matrix_power(step, layers)[-1] > 0
    return n - 1 - int(paths.nonzero()[0])


law = [reach(layers, window) for layers, window in ((4, 5), (3, 2), (1, 9))]
assert law == [16, 3, 8]  # layers · (window − 1)
checks.number(
    answer,
    131_040,
    to=0,
    what="reach",
    mistakes={
        "a hop of the whole window, which includes the token itself,": 32 * 4096,
        "one layer": 4095,
    },
)
### END HIDDEN TESTS

# %% check="sparse_numbers" points=1
answer = sparse_numbers()["dsa_factor"]
checks.kind(answer, float, what="dsa_factor")
### BEGIN HIDDEN TESTS
dense_flops, index_flops = 131_072 * 128 * 2 * (512 + 64 + 512), 131_072 * 64 * 128 * 2
sparse_flops = 2048 * 128 * 2 * (512 + 64 + 512)
checks.number(
    answer,
    dense_flops / (index_flops + sparse_flops),
    what="dsa_factor",
    hint="The indexer still looks at every token",
    mistakes={
        "leaving out the indexer": dense_flops / sparse_flops,
        "leaving out the average": 576 * 128 * 131_072 / (index_flops / 2 + 576 * 128 * 2048),
    },
)
### END HIDDEN TESTS

# %% [markdown]
# Two of these tell how MLA is served. A latent can't be dealt out by heads, so serving engines run
# its attention with **data** parallelism: a GPU holds whole sequences (SGLang has a switch for it;
# DeepSeek joins it with 4-way tensor parallelism: V3, section 3.4). And most of what sparse
# attention still computes is the indexer's work, which 8-bit numbers make cheaper. A pattern that
# is chosen is never free: to choose, something has to look at every token.

# %% [markdown]
# **Open question 1.** Somebody proposes to save the rotary key: rotate the *latent* $c_s$ itself
# before caching it, $R_s c_s$, and rotate the absorbed query likewise. Scores would depend on
# distances only, and nothing but $r$ numbers is stored. What goes wrong?

# %% [markdown] answer="rotate-the-latent"
# The score works: it is RoPE on a shared key of width $r$. The value does not. The same numbers are
# also averaged as values, and $\sum_s w_s R_s c_s$ mixes latents each turned by another angle; it
# cannot be turned back, because the sum has forgotten which $s$ a part came from. One could cache
# both $c_s$ and $R_s c_s$, and would store twice. (One can also undo part of it: rotate the average
# by $R_{-t}$, so that each part is turned by its *distance*. Then values carry relative positions,
# and some models do this on purpose. It is another model.) Besides, rotating all $r$ numbers gives
# every head the same frequencies in every direction of the latent; the decoupled part leaves most
# of the latent free of position.

# %% [markdown]
# **Open question 2.** A window with sinks runs over a stream of a million tokens. Which position
# does a kept key get when it is rotated, and why not its own?

# %% [markdown] answer="streaming-positions"
# Its place in the cache: the sinks 0 … 3, the window after them, the query last (StreamingLLM does
# so, which is why it caches keys unrotated). With true positions the distance from the query to a
# sink would grow to a million, far beyond anything seen in training, and the sink's score, on which
# the model relies, would be a number that it has never met. With places in the cache all distances
# stay below the size of the window. The price is that the distance to the sink is false; nobody
# reads it.

# %% [markdown]
# **Open question 3.** The indexer's loss is a KL divergence to the attention weights, and its input
# is detached from the rest of the model. Why not let the language-modeling loss train it?

# %% [markdown] answer="indexer-loss"
# No gradient of that loss reaches it. The index scores only rank; the selection is piecewise
# constant in them, so its derivative is 0 almost everywhere, and the chosen keys' weights come from
# the main attention, not from the index. The KL gives it a dense, direct target: what the attention
# itself would have weighted. Detaching its input keeps the model from bending its representations
# towards being easy to index, and lets both be trained side by side at their own rates. (A
# straight-through or a soft weighting by the index would be the alternative; it brings the index
# into the forward pass.)

# %% [markdown]
# ## References, and what to read in them
#
# - **DeepSeek-AI 2024**, *DeepSeek-V2*, [arXiv:2405.04434](https://arxiv.org/abs/2405.04434).
#   Section 2.1: MLA with all its formulas, the table of cache sizes; appendix C the whole layer,
#   appendix D the ablations against MHA and GQA.
# - **DeepSeek-AI 2024**, *DeepSeek-V3*, [arXiv:2412.19437](https://arxiv.org/abs/2412.19437).
#   Section 2.1.1, and section 3.4 on how it is served.
# - **Zhao et al. 2025**, *Insights into DeepSeek-V3*,
#   [arXiv:2505.09343](https://arxiv.org/abs/2505.09343). The cache of V3 beside that of Llama and
#   Qwen, in bytes a token, and what the hardware makes of it.
# - **DeepSeek-AI 2025**, *DeepSeek-V3.2*, [arXiv:2512.02556](https://arxiv.org/abs/2512.02556).
#   Section 2: the lightning indexer, why it runs on MLA's shared entries, its two stages of
#   training.
# - **Beltagy et al. 2020**, *Longformer*, [arXiv:2004.05150](https://arxiv.org/abs/2004.05150).
#   Section 3.1, the patterns; figure 2.
# - **Zaheer et al. 2020**, *Big Bird*, [arXiv:2007.14062](https://arxiv.org/abs/2007.14062).
#   Section 2 and figure 1; section 3 for what sparsity can and cannot express.
# - **Xiao et al. 2023**, *Efficient Streaming Language Models with Attention Sinks*,
#   [arXiv:2309.17453](https://arxiv.org/abs/2309.17453). Section 3: why windows fail, and positions
#   within the cache.
# - **Jiang et al. 2023**, *Mistral 7B*, [arXiv:2310.06825](https://arxiv.org/abs/2310.06825).
#   Section 2: window and rolling buffer.
#
# In production: Hugging Face transformers, `models/deepseek_v3/modeling_deepseek_v3.py` (MLA
# unfolded), `models/deepseek_v32` (the indexer), `cache_utils.py` (`DynamicSlidingWindowLayer`);
# DeepSeek's FlashMLA and DeepGEMM (decode and indexer kernels for Hopper); vLLM's MLA back ends,
# which carry both the unfolded path for prompts and the absorbed one for decoding; PyTorch's
# `torch.nn.attention.flex_attention` for patterns in blocks. Paged caches are lesson 30, the cache
# as a whole is lesson 28.
