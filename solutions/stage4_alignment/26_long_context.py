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
#       Every way to run a model of 512 tokens on 2,048: interpolation, NTK, YaRN, LongRoPE and its
#       search, a cache for endless streams, a test of recall by length and depth, and finetuning.
#     gpu: >-
#       32,768 tokens in one pass with a flash kernel. On a CPU the section does the arithmetic.
# ---

# %% [markdown]
# ## The problem
#
# A model was trained on texts of 512 tokens. You hand it 2,048. No shape is wrong, no error is
# raised, and soon after token 512 it writes nonsense.
#
# A training text of four times the length costs more than four times as much, for the attention
# grows with the square, and long documents are rare. So the trade trains short and
# extends late: change how positions are told to the model, then finetune a little, or not at all.
# LLaMA 3, Qwen, DeepSeek and gpt-oss reach their advertised lengths in this way.
#
# ## Core ideas
#
# **What breaks.** Rotary positions (lesson 08) turn pair $i$ of each query and key by $n\,\omega_i$
# at position $n$. The score of a query at $m$ and a key at $n$ depends on the angles
# $(m-n)\,\omega_i$. Fast pairs went around many times in training and know every angle. Slow pairs
# never finished a turn: beyond the trained length their angles are new, and the network after them
# has never had to make sense of these scores.
#
# **What helps.** Turn slow pairs more slowly, so that a long text covers only angles that were
# seen. The methods differ in *which* pairs are slowed, and by how much:
#
# | method | pair $i$ turns by | slows |
# |---|---|---|
# | **position interpolation**, PI | $n\,\omega_i/s$ | every pair alike |
# | **NTK-aware** scaling | $n\,\omega_i$ with a larger base | none of the fastest, all of the slowest |
# | **dynamic NTK** | the same, base by the current length | as much as this text needs |
# | **YaRN** | a ramp between $\omega_i$ and $\omega_i/s$ | by the turns made in training |
# | **LongRoPE** | $n\,\omega_i/\lambda_i$ | as a search finds best |
# | **partial RoPE** | $n\,\omega_i$ or not at all | the slow pairs to a stop |
#
# The other road leaves the length as it is: a **streaming cache** keeps the first few tokens and a
# window of the last ones, and counts positions inside the cache.
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $d$ | `dim` | the head's dimension; $d/2$ pairs turn |
# | $b$ | `base` | RoPE's base, 10,000 in our models |
# | $\omega_i = b^{-2i/d}$ | `frequencies[i]` | radians a token, $i = 0 \dots d/2-1$, fastest first |
# | $L$ | `trained` | longest sequence of the training |
# | $s$ | `scale` | wanted length over $L$, at least 1 |
#
# Frequencies are float64 here. At position 100,000 float32 angles are off by up to some thousandths
# of a radian; libraries accept that, a check at nine digits does not.

# %%
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from llm40.models.llama import Cache, Config, Llama, rotate
from torch import Tensor, nn


def rope_frequencies(dim: int, base: float = 10_000.0) -> Tensor:
    """ω: (dim/2,), float64, radians a token, the fastest first."""
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def logits_with(
    model: Llama, tokens: Tensor, angles: Tensor, factor: float = 1.0, cache: Cache | None = None
) -> Tensor:
    """Logits (batch, seq, vocab) of a model whose pairs are turned by `angles` (seq, head_dim/2).

    cos and sin, and with them queries and keys, are multiplied by `factor`. With a cache, `tokens`
    are only the new ones: all of a text at first, then one at a time.
    """
    device = tokens.device
    cos, sin = ((factor * f(angles)).float().to(device)[None, None] for f in (torch.cos, torch.sin))
    x = model.embed_tokens(tokens)
    for block in model.layers:
        x = block(x, cos, sin, None, cache)
    return F.linear(model.norm(x), model.embed_tokens.weight)


def angles_of(frequencies: Tensor, length: int, start: int = 0) -> Tensor:
    """n · ω for n = start … start + length − 1: (length, pairs)."""
    return torch.arange(start, start + length, dtype=frequencies.dtype)[:, None] * frequencies


# %% [markdown]
# ## Turns
#
# In training, pair $i$ turns $r_i = L\,\omega_i / 2\pi$ times. For our models, $d = 32$ and $L =
# 512$: the fastest pair goes around 81 times, the slowest one-seventieth of a turn in all. The cell
# counts them; the pairs under 1 are the ones that meet new angles when the text gets longer.

# %%
turns = 512 * rope_frequencies(32) / (2 * math.pi)
print("turns in 512 tokens:", " ".join(f"{r:.3g}" for r in turns.tolist()))
print(f"pairs that never finish one: {int((turns < 1).sum())} of {len(turns)}")

# %% [markdown]
# ## Interpolation
#
# The most direct repair: squeeze the positions. Token $n$ of the long text is placed at $n/s$, so
# that 2,048 tokens lie between 0 and 512. Angles that were never seen are gone. Scores between
# trained positions cannot swing far: Chen et al. bound an attention score there, and the bound is
# at least 600 times smaller than the one beyond them.
#
# Since angle = position × frequency, dividing positions is dividing frequencies.


# %% exercise="position_interpolation" minutes=5 difficulty=1
def position_interpolation(frequencies: Tensor, scale: float) -> Tensor:
    """The frequencies with which a text of scale·L tokens covers the angles of L tokens.

    frequencies: (pairs,), any floating format; not changed. scale: at least 1, else ValueError.
    Returns (pairs,), a new tensor of the same format: [1.0, 0.1] with scale 4 gives [0.25, 0.025].
    """
    ### BEGIN SOLUTION
    if scale < 1:
        raise ValueError(f"scale is {scale}: it cannot be below 1")
    return frequencies / scale
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: positions or frequencies?</summary>
#
# The angle of pair i at position n/s is (n/s)·ω_i = n·(ω_i/s). Both give the same angles.
# </details>

# %% check="position_interpolation" points=1
w = torch.tensor([1.0, 0.1])
checks.close(
    position_interpolation(w, 4.0),
    torch.tensor([0.25, 0.025]),
    what="frequencies 1 and 0.1, four times as long",
    mistakes={"multiplying by the scale": 4 * w, "leaving the fastest alone": w * w.new([1, 0.25])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for dim, scale in [(2, 1.0), (32, 1.5), (64, 8.0), (128, 31.0)]:
    w = rope_frequencies(dim, 500.0)
    with checks.unchanged(frequencies=w):
        slow = position_interpolation(w, scale)
    assert slow is not w, f"scale {scale:g} gives the argument itself: return a new tensor."
    # Law: position s·n has the angles that n had.
    n = torch.rand(7, 1, generator=g, dtype=torch.float64) * 100
    checks.close(scale * n * slow, n * w, what=f"angles at {scale:g} times the position")
checks.keeps_dtype(
    lambda w: position_interpolation(w, 3.0),
    rope_frequencies(12),
    reference=lambda w: w / 3,
    what="the frequencies",
)
for bad in (0.5, 0.0, -2.0):
    checks.raises(ValueError, position_interpolation, w, bad, because=f"scale is {bad}")
### END HIDDEN TESTS

# %% [markdown]
# ## NTK-aware scaling
#
# PI has a price. Neighbors used to differ by 1 radian in the fastest pair, now by a quarter. The
# heads that look one token back do it with the fast pairs, and these had no problem: they knew
# every angle already.
#
# The name comes from the theory of the *neural tangent kernel*: a network whose inputs are
# low-frequency features learns fine detail badly (Tancik et al. 2020), so keep the high
# frequencies. The recipe was first posted by a user, bloc97, on Reddit in 2023. Change the base: $b
# \to b'$ such that the *slowest* pair is interpolated in full.
#
# The slowest pair has $i = d/2-1$, so $2i/d = (d-2)/d$. Ask for $b'^{-(d-2)/d} = b^{-(d-2)/d}/s$.
# Raise both sides to the power $-d/(d-2)$:
#
# $$ b' = b \cdot s^{\,d/(d-2)}. $$
#
# The fastest pair, $b'^{\,0} = 1$, stays. Pair $i$ is slowed by $s^{2i/(d-2)}$, between 1 and $s$.


# %% exercise="ntk_aware_base" minutes=10 difficulty=1
def ntk_aware_base(base: float, dim: int, scale: float) -> float:
    """The base with which the slowest pair turns `scale` times as slowly as with `base`.

    dim: the head's dimension, even and at least 4 (with one pair there is no slowest beside the
    fastest), else ValueError; scale: at least 1, else ValueError. Returns a number:
    ntk_aware_base(10_000.0, 4, 4.0) is 160,000: the frequencies 1 and 0.01 become 1 and 0.0025.
    """
    ### BEGIN SOLUTION
    if dim < 4 or dim % 2 or scale < 1:
        raise ValueError(f"dim {dim} must be even and at least 4, scale {scale} at least 1")
    return base * scale ** (dim / (dim - 2))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which power is the slowest pair's?</summary>
#
# Frequencies are base^(−2i/dim) for i = 0 … dim/2 − 1: the last exponent is −(dim − 2)/dim, not −1.
# </details>

# %% check="ntk_aware_base" points=1
checks.number(
    ntk_aware_base(10_000.0, 4, 4.0),
    160_000.0,
    to=1e-9,
    what="the base for dim 4, scale 4",
    mistakes={
        "base times scale": 40_000.0,
        "the exponent upside down, (d − 2)/d,": 20_000.0,
    },
)
### BEGIN HIDDEN TESTS
for base, dim, scale in [(10_000.0, 6, 2.0), (500.0, 32, 4.0), (1e6, 128, 16.0), (77.0, 4, 1.0)]:
    before, after = (
        rope_frequencies(dim, base),
        rope_frequencies(dim, ntk_aware_base(base, dim, scale)),
    )
    checks.close(
        after[-1], before[-1] / scale, what=f"the slowest of {dim // 2} pairs, scale {scale:g}"
    )
    # Law: each pair is slowed by the same ratio more than the one before it.
    slowed = (before / after).log()
    checks.close(
        slowed,
        torch.linspace(0, math.log(scale), dim // 2, dtype=torch.float64),
        atol=1e-9,
        what="the logarithms of the factors, from 0 to log(scale) in even steps",
    )
for bad in ((100.0, 2, 2.0), (100.0, 5, 2.0), (100.0, 8, 0.9)):
    checks.raises(ValueError, ntk_aware_base, *bad, because=f"base, dim, scale are {bad}")
### END HIDDEN TESTS

# %% [markdown]
# ## Dynamic NTK
#
# A scale of 4 also slows the pairs of a text of 100 tokens, which needed no help. **Dynamic NTK**
# takes the scale from the text at hand: none up to $L$, then as much as the current length needs.
# With `factor` $a$ (the original post's $\alpha$; 1 in the YaRN paper) the scale at length $l$ is
#
# $$ s(l) = \frac{a\,l}{L} - (a - 1), \qquad s(L) = 1, $$
#
# so that it begins at 1 without a jump and rises $a$ times as fast as the length.
#
# While a model writes, the length grows with each token, and the base with it. Keys that were
# cached rotated are then wrong: they were turned with an older base, and scores against them depend
# on more than the distance. For scores that depend on it alone one must cache keys unrotated and
# turn all of them at each step, or fix the base once, for the longest length expected. (Unrotated
# keys and values, too, come from the second layer on out of states that older bases shaped.)
# transformers keeps rotated keys and changes the base while it goes on: its cached and uncached
# results differ beyond $L$.


# %% exercise="dynamic_ntk" minutes=10 difficulty=1
def dynamic_ntk(dim: int, base: float, length: int, trained: int, factor: float = 1.0) -> Tensor:
    """The frequencies for a text of `length` tokens: (dim/2,), float64.

    Up to `trained` tokens those of `base`; beyond, those of the NTK-aware base for the scale
    factor · length/trained − (factor − 1). dim is even and at least 4. Does not need your
    `ntk_aware_base`, but may use it.
    dynamic_ntk(4, 10_000.0, 1024, 512) is [1, 0.005]; with factor 2.0 it is [1, 0.01/3].
    """
    ### BEGIN SOLUTION
    scale = max(1.0, factor * length / trained - (factor - 1))
    return rope_frequencies(dim, base * scale ** (dim / (dim - 2)))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: shorter than the trained length</summary>
#
# The formula's scale falls under 1 there, and would speed the pairs up. Take the larger of it and
# 1.
# </details>

# %% check="dynamic_ntk" points=2
for factor, slow in ((1.0, 0.005), (2.0, 0.01 / 3)):
    checks.close(
        dynamic_ntk(4, 10_000.0, 1024, 512, factor),
        torch.tensor([1.0, slow], dtype=torch.float64),
        what=f"twice the trained length, factor {factor:g}",
        mistakes={
            "interpolating every pair": torch.tensor([slow * 100, slow], dtype=torch.float64)
        },
    )
### BEGIN HIDDEN TESTS
for dim, base, trained, factor in [(6, 900.0, 100, 1.0), (32, 1e4, 512, 4.0), (64, 5e5, 33, 2.5)]:
    plain = rope_frequencies(dim, base)
    for length in (1, trained // 2, trained):
        checks.close(
            dynamic_ntk(dim, base, length, trained, factor),
            plain,
            what=f"{length} tokens after training on {trained}",
            dtype=torch.float64,
            hint="Up to the trained length nothing changes",
        )
    for length in (trained + 1, 2 * trained, 7 * trained + 3):
        found = dynamic_ntk(dim, base, length, trained, factor)
        scale = 1 + factor * (length - trained) / trained
        pairs = torch.arange(dim // 2, dtype=torch.float64)
        checks.close(
            found,
            plain / torch.exp(pairs / (dim // 2 - 1) * math.log(scale)),
            what=f"{length} tokens after training on {trained}, factor {factor:g}",
            dtype=torch.float64,
            mistakes={
                "ignoring the factor": plain / (length / trained) ** (pairs / (dim // 2 - 1)),
                "the factor as the scale": plain / factor ** (pairs / (dim // 2 - 1)),
                "factor · length / trained": plain
                / (factor * length / trained) ** (pairs / (dim // 2 - 1)),
            },
        )
checks.close(
    dynamic_ntk(8, 50.0, 30, 10), dynamic_ntk(8, 50.0, 30, 10, 1.0), what="the default factor"
)
### END HIDDEN TESTS

# %% [markdown]
# ## YaRN
#
# NTK-aware scaling slows every pair but the fastest, and the slowest alone gets its full $s$: pairs
# just before it, which never finished a turn either, are slowed by less than $s$ and still leave
# the trained range. Hence the practice of asking for more than one needs, 8 for 4.
#
# **YaRN** (Peng et al. 2023) decides by turns. A pair that made more than $\beta_\text{fast} = 32$
# in training stays; one that made fewer than $\beta_\text{slow} = 1$ is interpolated in full;
# between lies a ramp. With $\gamma$ from 1 to 0,
#
# $$ \omega_i' = \gamma_i\,\omega_i + (1 - \gamma_i)\,\omega_i/s . $$
#
# **Two ramps.** The paper's is linear in the turns $r_i = L\omega_i/2\pi$:
#
# $$ \gamma_i = \mathrm{clamp}\!\left(\frac{r_i - \beta_\text{slow}}{\beta_\text{fast} - \beta_\text{slow}}, 0, 1\right). $$
#
# The authors' code, and transformers after it, is linear in the *index*. Solve $r_i = \beta$ for
# $i$:
#
# $$ i(\beta) = \frac{d\,\ln\!\big(L/(2\pi\beta)\big)}{2\ln b}, \qquad \gamma_i = 1 - \mathrm{clamp}\!\left(\frac{i - \text{low}}{\text{high} - \text{low}}, 0, 1\right), $$
#
# with low $= \lfloor i(\beta_\text{fast})\rfloor$ and high $= \lceil i(\beta_\text{slow})\rceil$
# (gpt-oss does not round), low at least 0, high at most $d-1$, an odd bound for an index that ends
# at $d/2-1$. Turns fall exponentially with the index, so the two are far apart: for these models up
# to 1.7-fold. Published models were made with the code's; it is the default below.

# %% [markdown]
# **The temperature.** In a longer text each query meets more keys, and the softmax spreads: with
# $k$ times as many keys of the same distribution its entropy grows by $\ln k$. YaRN sharpens it:
# logits are divided by a temperature $t$ with $\sqrt{1/t} = 0.1 \ln s + 1$, a fit to LLaMA models.
# The trick is where: multiply cos and sin by $\sqrt{1/t}$. Queries *and* keys get it, so each logit
# is multiplied by its *square*, and attention kernels need no change. For $s = 4$: 1.139 on each,
# 1.296 on the logits.


# %% exercise="yarn_frequencies" minutes=30 difficulty=2
def yarn_frequencies(
    dim: int,
    base: float,
    scale: float,
    trained: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "index",
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """YaRN's frequencies (dim/2,), float64, and its factor on cos and sin.

    ramp "index": linear in the pair's index between low = i(beta_fast) and high = i(beta_slow);
        with `truncate` low is rounded down and high up; then low is at least 0 and high at most
        dim − 1; where high equals low, 0.001 is added to high (in no check is it below low). Pairs
        up to low keep their frequency, pairs from high on have it divided by scale.
    ramp "rotations": linear in the turns r = trained·ω/2π between beta_slow (divided by scale) and
        beta_fast (kept), which is larger; `truncate` means nothing.
    The factor is 0.1·ln(scale) + 1, for both. ValueError for another ramp or a scale below 1.

    yarn_frequencies(8, 10_000.0, 4.0, 512): low = 0, high = 2, frequencies [1, 0.0625, 0.0025,
    0.00025], and the factor 1.1386.
    """
    ### BEGIN SOLUTION
    if ramp not in ("index", "rotations") or scale < 1:
        raise ValueError(f"ramp {ramp!r} is index or rotations, scale {scale} at least 1")
    plain = rope_frequencies(dim, base)
    if ramp == "rotations":
        made = trained * plain / (2 * math.pi)
        keep = ((made - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    else:
        low, high = (
            dim * math.log(trained / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (beta_fast, beta_slow)
        )
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(dim // 2, dtype=torch.float64)
        keep = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scale, 0.1 * math.log(scale) + 1
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which end of the ramp is which?</summary>
#
# Many turns = small index = fast = kept. `beta_fast` is the larger number of turns and gives the
# *smaller* index.
# </details>
#
# <details><summary>Hint: the bounds</summary>
#
# low can be negative (no pair made 32 turns), high larger than the last index (every pair made
# one). Clamp the two ends first, the ramp afterwards.
# </details>

# %% check="yarn_frequencies" points=3
w, _ = checks.parts(yarn_frequencies(8, 10_000.0, 4.0, 512), "frequencies", "factor")
checks.close(
    w,
    torch.tensor([1, 0.0625, 0.0025, 0.00025], dtype=torch.float64),
    what="the frequencies of yarn_frequencies(8, 10_000, 4, 512)",
    mistakes={
        "interpolating all": rope_frequencies(8) / 4,
        "the ramp turned around": rope_frequencies(8)
        * torch.tensor([0.25, 0.625, 1, 1], dtype=torch.float64),
    },
)
### BEGIN HIDDEN TESTS


def index_of(beta, dim, base, trained):
    """The fractional index at which a pair makes `beta` turns, by bisection."""
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        if trained * base ** (-2 * middle / dim) / (2 * math.pi) > beta:
            low = middle
        else:
            high = middle
    return low


def expected_yarn(dim, base, scale, trained, fast, slow, truncate):
    low, high = index_of(fast, dim, base, trained), index_of(slow, dim, base, trained)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if high == low else 0
    found = []
    for i, w in enumerate(rope_frequencies(dim, base).tolist()):
        share = 0 if i <= low else 1 if i >= high else (i - low) / (high - low)  # of interpolation
        found.append((1 - share) * w + share * w / scale)
    return torch.tensor(found, dtype=torch.float64)


for dim, base, scale, trained, fast, slow in [
    (32, 10_000.0, 4.0, 512, 32.0, 1.0),
    (128, 10_000.0, 16.0, 4096, 32.0, 1.0),
    (64, 150_000.0, 32.0, 4096, 32.0, 1.0),
    (64, 10_000.0, 2.0, 64, 20.0, 2.0),  # no pair makes 20 turns: low is clamped
    (16, 4.0, 3.0, 400, 8.0, 1.5),  # every pair makes them: high is clamped at dim − 1
    (8, 10_000.0, 1.0, 512, 32.0, 1.0),
]:
    for truncate in (True, False):
        w, _ = yarn_frequencies(dim, base, scale, trained, fast, slow, truncate=truncate)
        checks.close(
            w,
            expected_yarn(dim, base, scale, trained, fast, slow, truncate),
            atol=0,
            rtol=1e-7,
            what=f"dim {dim}, base {base:g}, scale {scale:g}, L {trained}, betas {fast:g} and "
            f"{slow:g}, truncate={truncate}",
            dtype=torch.float64,
            mistakes={
                "rounding, or not, against `truncate`": expected_yarn(
                    dim, base, scale, trained, fast, slow, not truncate
                ),
            },
        )
checks.close(
    yarn_frequencies(32, 10_000.0, 4.0, 512)[0],
    yarn_frequencies(32, 10_000.0, 4.0, 512, 32.0, 1.0, "index", True)[0],
    what="the defaults",
)
w, _ = yarn_frequencies(8, 10.0, 4.0, 20, 3.2, 3.1)  # floor and ceil of nearly the same index
checks.close(
    w, expected_yarn(8, 10.0, 4.0, 20, 3.2, 3.1, True), atol=0, rtol=1e-7, what="a steep ramp"
)
w, _ = yarn_frequencies(8, 10_000.0, 4.0, 5)  # both ends are clamped to 0
checks.close(
    w,
    torch.tensor([1.0, 0.025, 0.0025, 0.00025], dtype=torch.float64),
    what="dim 8, L 5, where high equals low",
)
for bad in ({"ramp": "linear"}, {"scale": 0.5}):
    checks.raises(
        ValueError, yarn_frequencies, **({"dim": 8, "base": 10.0, "scale": 2.0, "trained": 9} | bad)
    )
### END HIDDEN TESTS

# %% check="yarn_frequencies" points=2
# The paper's ramp: turns 81, 8.1, 0.81, 0.081; the second is (8.1 − 1)/31 of the way.
w, factor = checks.parts(
    yarn_frequencies(8, 10_000.0, 4.0, 512, ramp="rotations"), "frequencies", "factor"
)
keep = (51.2 / (2 * math.pi) - 1) / 31
checks.close(
    w,
    torch.tensor([1, 0.1 * keep + 0.025 * (1 - keep), 0.0025, 0.00025], dtype=torch.float64),
    what="the frequencies with the ramp in rotations",
)
checks.number(
    factor,
    0.1 * math.log(4) + 1,
    to=1e-9,
    what="the factor on cos and sin",
    mistakes={
        "the factor on logits, its square,": (0.1 * math.log(4) + 1) ** 2,
        "the temperature": (0.1 * math.log(4) + 1) ** -2,
        "log2": 1.2,
    },
)
### BEGIN HIDDEN TESTS
for dim, base, scale, trained, fast, slow in [
    (32, 10_000.0, 4.0, 512, 32.0, 1.0),
    (128, 10_000.0, 8.0, 4096, 30.0, 2.0),
    (16, 3.0, 3.0, 400, 8.0, 1.5),
    (16, 100.0, 5.0, 20, 32.0, 1.0),
]:
    w, factor = yarn_frequencies(dim, base, scale, trained, fast, slow, ramp="rotations")
    expected = []
    for i in range(dim // 2):
        speed = math.exp(-2 * i / dim * math.log(base))
        circles = trained * speed / math.tau
        if circles >= fast:
            expected.append(speed)
        elif circles <= slow:
            expected.append(speed / scale)
        else:
            part = (circles - slow) / (fast - slow)
            expected.append(speed * (part + (1 - part) / scale))
    checks.close(
        w,
        torch.tensor(expected, dtype=torch.float64),
        atol=0,
        what=f"ramp in rotations, dim {dim}, scale {scale:g}, L {trained}",
        dtype=torch.float64,
    )
    checks.number(factor, math.log(scale) / 10 + 1, to=1e-9, what=f"the factor for {scale:g}")
    checks.number(yarn_frequencies(dim, base, scale, trained)[1], math.log(scale) / 10 + 1, to=1e-9)
checks.number(yarn_frequencies(8, 100.0, 1.0, 64)[1], 1.0, to=1e-12, what="the factor for scale 1")
### END HIDDEN TESTS

# %% [markdown]
# ## Not turning at all
#
# The slow pairs are the trouble: so why turn them? A head can use them for *what* is said instead
# of *where*. **Partial RoPE** turns a share of the pairs and leaves the rest still. Older models
# turn a head's first dimensions: GPT-NeoX a quarter, Phi-2 two fifths. Gemma 4's global layers take
# the fastest quarter of the pairs, with their full-width spacing and the base $10^6$; some layers
# elsewhere (Kimi Linear) have no positions at all, **NoPE**. Those models were trained so. Ours was
# not, and the experiment shows what it makes of it.


# %% exercise="partial_rope" minutes=5 difficulty=1 path="more"
def partial_rope(frequencies: Tensor, share: float) -> Tensor:
    """The frequencies with only the fastest `share` of the pairs turning; the others are 0.

    frequencies: (pairs,), descending, any floating format; not changed. share: between 0 and 1,
    else ValueError; ⌊share · pairs⌋ pairs turn, the product as Python rounds it. Returns (pairs,),
    a new tensor of the same format: [1, 0.1, 0.01, 0.001] with 0.5 gives [1, 0.1, 0, 0].
    """
    ### BEGIN SOLUTION
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: it is between 0 and 1")
    turning = torch.arange(len(frequencies), device=frequencies.device) < int(
        share * len(frequencies)
    )
    return torch.where(turning, frequencies, 0)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: none, and all</summary>
#
# A slice such as `[-0:]` is everything, not nothing. Write what you keep, not what you drop.
# </details>

# %% check="partial_rope" points=1
w = torch.tensor([1, 0.1, 0.01, 0.001])
checks.close(
    partial_rope(w, 0.5),
    torch.tensor([1, 0.1, 0, 0]),
    what="half of four pairs",
    mistakes={
        "keeping the slow ones": torch.tensor([0, 0, 0.01, 0.001]),
        "every other pair": torch.tensor([1, 0, 0.01, 0]),
    },
)
### BEGIN HIDDEN TESTS
for pairs, share, kept in [
    (16, 0.25, 4),
    (10, 0.37, 3),
    (100, 0.29, 28),  # 28.999999999999996
    (7, 0.5, 3),
    (5, 0.0, 0),
    (5, 1.0, 5),
    (1, 0.9, 0),
]:
    w = rope_frequencies(2 * pairs, 300.0)
    expected = torch.tensor([x if i < kept else 0.0 for i, x in enumerate(w.tolist())]).double()
    for i in range(kept):
        expected[i] = w[i]
    with checks.unchanged(frequencies=w):
        found = partial_rope(w, share)
    checks.close(found, expected, what=f"{share:g} of {pairs} pairs", dtype=w.dtype)
    assert found is not w, f"share {share:g} gives the argument itself: return a new tensor."
checks.keeps_dtype(lambda w: partial_rope(w, 0.5), rope_frequencies(12), what="the frequencies")
for bad in (-0.1, 1.5):
    checks.raises(ValueError, partial_rope, w, bad, because=f"share is {bad}")
### END HIDDEN TESTS

# %% [markdown]
# ## LongRoPE
#
# Why trust a formula? **LongRoPE** (Ding et al. 2024) gives each pair its own factor $\lambda_i$
# and searches. A rule keeps the search small: factors do not decrease from fast to slow pairs. And
# the authors found that the first few tokens $\hat n$ of a text, on which many heads of large
# models lean, are better left where they were:
#
# $$ \text{angle}_i(n) = \begin{cases} n\,\omega_i & n < \hat n \\ n\,\omega_i/\lambda_i & \text{else.}\end{cases} $$
#
# Read it twice: at $\hat n$ the position jumps *back*. With $\hat n = 8$ and $\lambda = 4$, token 8
# stands where token 2 does. And scores between the two groups no longer depend on the distance
# alone. The paper states it so; transformers has the factors and no $\hat n$.


# %% exercise="longrope_rescale" minutes=15 difficulty=2 path="more"
def longrope_rescale(
    frequencies: Tensor, positions: Tensor, factors: Tensor, keep: int = 0
) -> Tensor:
    """The angle of each pair at each position: (seq, pairs), float64.

    frequencies: (pairs,). positions: (seq,), whole or fractional, in any order. factors: (pairs,),
    each at least 1 and not less than the one before. Positions below `keep` turn with the plain
    frequencies, the others with frequencies / factors. Inputs, of any number format, are not
    changed. ValueError for factors of another length, below 1, or decreasing.

    Frequencies [1, 0.1], positions [1, 2, 3], factors [1, 4], keep 2: [[1, 0.1], [2, 0.05],
    [3, 0.075]].
    """
    ### BEGIN SOLUTION
    if factors.shape != frequencies.shape:
        raise ValueError(f"{len(factors)} factors for {len(frequencies)} pairs")
    if bool((factors < 1).any()) or bool((factors[1:] < factors[:-1]).any()):
        raise ValueError("factors are at least 1 and do not decrease")
    plain = positions.double()[:, None] * frequencies.double()
    return torch.where(positions[:, None] < keep, plain, plain / factors.double())
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: position or place?</summary>
#
# `keep` is compared with the position itself: in a decoding step `positions` is [1700], and its
# place in the tensor is 0.
# </details>

# %% check="longrope_rescale" points=2
checks.close(
    longrope_rescale(
        torch.tensor([1.0, 0.1]), torch.tensor([1, 2, 3]), torch.tensor([1.0, 4.0]), 2
    ),
    torch.tensor([[1, 0.1], [2, 0.05], [3, 0.075]], dtype=torch.float64),
    rtol=1e-6,
    what="the angles of three positions",
    mistakes={
        "multiplying by the factors": torch.tensor([[1, 0.1], [2, 0.8], [3, 1.2]]).double(),
        "keeping two positions, where only 1 is below `keep`,": torch.tensor(
            [[1, 0.1], [2, 0.2], [3, 0.075]]
        ).double(),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for pairs, keep in [(4, 0), (16, 5), (1, 3), (7, 400)]:
    w = rope_frequencies(2 * pairs, 800.0)
    factors = 1 + torch.rand(pairs, generator=g, dtype=torch.float64).cumsum(0)
    positions = torch.randint(0, 900, (11,), generator=g)  # in no order
    positions[3], positions[7] = keep, max(0, keep - 1)
    with checks.unchanged(frequencies=w, positions=positions, factors=factors):
        found = longrope_rescale(w, positions, factors, keep)
    expected = [
        [
            n * x / (1.0 if n < keep else f)
            for x, f in zip(w.tolist(), factors.tolist(), strict=True)
        ]
        for n in positions.tolist()
    ]
    checks.close(
        found,
        torch.tensor(expected, dtype=torch.float64),
        what=f"angles of {pairs} pairs, keep {keep}",
        dtype=torch.float64,
    )
checks.close(
    longrope_rescale(w, positions, factors),
    positions.double()[:, None] * w / factors,
    what="the default, which keeps nothing",
)
# Each input in a format of its own: what is computed in float64 loses nothing that they hold.
half, single, double = torch.bfloat16, torch.float32, torch.float64
for formats in [(half, torch.int64, single), (single, double, half), (double, single, half)]:
    kinds = ", ".join(str(kind).removeprefix("torch.") for kind in formats)
    w = rope_frequencies(14, 800.0).to(formats[0])
    positions = torch.rand(9, generator=g, dtype=double) * 60_000
    positions[:3] = torch.tensor([4.5, 5.25, 40_001.5])
    positions = positions.to(formats[1])
    factors = (1 + torch.rand(7, generator=g, dtype=double).cumsum(0)).to(formats[2])
    with checks.unchanged(frequencies=w, positions=positions, factors=factors):
        found = longrope_rescale(w, positions, factors, 5)
    n, slowed = positions.double()[:, None], factors.double().expand(9, 7)
    checks.close(
        found,
        n * w.double() / torch.where(n < 5, 1.0, slowed),
        atol=0,
        what=f"angles of frequencies, positions, factors in {kinds}",
        dtype=double,
    )
w, positions = rope_frequencies(14, 800.0), torch.arange(9)
one = torch.ones(7)
for factors in (one[:6], one * 0.99, torch.tensor([1.0, 2, 3, 2.9, 4, 5, 6])):
    checks.raises(
        ValueError, longrope_rescale, w, positions, factors, because=f"{factors.tolist()}"
    )
checks.close(
    longrope_rescale(w, positions, one), positions.double()[:, None] * w, what="factors of 1"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Searching
#
# The search sees the model only through `evaluate(factors)`, a loss on long texts: no gradient, and
# a space of 16 dimensions (64 in LLaMA). LongRoPE's **evolutionary search** starts from the
# formulas of this lesson, keeps the best candidates as parents, and makes children in two ways: a
# **mutation** changes some factors of one parent, a **crossover** takes each factor from one of
# two. The space is small only because children must obey the constraints $1 \le \lambda_0 \le \dots
# \le \lambda_{d/2-1} \le 1.25\,s$. A child that breaks them is repaired or drawn again before
# anything is spent on it: an evaluation costs a pass over long texts, a draw costs nothing.


# %% exercise="longrope_search" minutes=35 difficulty=3 path="more"
def longrope_search(
    evaluate: Callable[[Tensor], float],
    seeds: Sequence[Tensor],
    scale: float,
    generations: int,
    children: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """The best factors that an evolutionary search finds, and their loss.

    evaluate(factors) gives the loss of (pairs,) float64 factors; less is better. It is called for
    each of `seeds` (one or more, of any floating format, each within the constraints) in their
    order, then for `children` new candidates in each of `generations` generations, and never else.
    Every candidate obeys 1 ≤ factors[0] ≤ factors[1] ≤ … ≤ 1.25 · scale. Parents of a generation
    are the best of all evaluated before that generation, from the seeds on; a child's loss means
    nothing to the children of its own generation. How many parents (a handful), and how children
    are made of them, is yours; a child is near its parents (steps of a tenth or two in the
    logarithm do well).
    Returns the best candidate evaluated, (pairs,) float64, and its loss; with 0 generations the
    best seed. All draws are from `generator`; seeds are not changed.

    On a smooth loss of 8 pairs, 30 generations of 8 children halve the distance to the optimum in
    the logarithm, and more. A search that draws each child anew from the whole space does not.
    """
    ### BEGIN SOLUTION
    known = [(float(evaluate(seed.double().clone())), seed.double().clone()) for seed in seeds]
    for _ in range(generations):
        parents = [factors for _, factors in sorted(known, key=lambda pair: pair[0])[:4]]

        def pick(parents=parents) -> Tensor:
            return parents[int(torch.randint(len(parents), (), generator=generator))]

        for child in range(children):
            logs = pick().log()
            chosen = torch.rand(len(logs), generator=generator) < 0.5
            if child % 3 == 2:
                logs = torch.where(chosen, logs, pick().log())
            else:
                noise = torch.randn(len(logs), generator=generator, dtype=torch.float64)
                size = 0.3 * 0.5 ** float(4 * torch.rand((), generator=generator))
                logs = logs + chosen * size * noise
            factors = logs.exp().clamp(1, 1.25 * scale).sort().values
            known.append((float(evaluate(factors.clone())), factors))
    loss, factors = min(known, key=lambda pair: pair[0])
    return factors, loss
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: repairing a child</summary>
#
# Clamp to the two ends, then sort, or take the running maximum (`torch.cummax`). Both give a child
# near the one that was broken.
# </details>
#
# <details><summary>Hint: it stops getting better</summary>
#
# Steps of one size are too large at the end or too small at the beginning. Draw the size as well.
# </details>


# %% tags=["support"]
# Support: a loss that keeps a record of what it was asked
class Recorded:
    """The mean square distance of the logarithms from a target's; keeps a record of its calls."""

    def __init__(self, target: Tensor, scale: float):
        self.target, self.scale, self.asked, self.losses = target, scale, [], []

    def __call__(self, factors: Tensor) -> float:
        checks.kind(factors, Tensor, what="what evaluate is given")
        given = tuple(factors.shape), factors.dtype
        asked = tuple(self.target.shape), torch.float64
        assert given == asked, f"evaluate is given {given}; it takes {asked}."
        inside = 1 <= float(factors.min()) <= float(factors.max()) <= 1.25 * self.scale + 1e-9
        assert inside, "a candidate leaves the interval from 1 to 1.25 · scale."
        assert bool((factors[1:] >= factors[:-1]).all()), "a candidate's factors decrease."
        self.asked.append(factors.detach().clone())
        self.losses.append(float((factors.log() - self.target.log()).square().mean()))
        return self.losses[-1]


# %% check="longrope_search" points=2
target = torch.tensor([1.0, 1.1, 2.0, 3.5], dtype=torch.float64)
starts = [torch.full((4,), 4.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
record = Recorded(target, 4.0)
found, loss = checks.parts(
    longrope_search(record, starts, 4.0, 2, 5, checks.generator(3)), "factors", "loss"
)
checks.close(len(record.asked), 12, what="evaluations for 2 seeds and 2 × 5 children")
checks.close(loss, min(record.losses), what="the loss, beside the least that evaluate gave")
### BEGIN HIDDEN TESTS
for salt, (pairs, scale, generations, children) in enumerate(
    [(6, 4.0, 0, 5), (5, 8.0, 3, 4), (1, 2.0, 4, 1)]
):
    g = checks.generator(20 + salt)
    target = 1 + (scale - 1) * torch.rand(pairs, generator=g, dtype=torch.float64).sort().values
    starts = [torch.full((pairs,), s, dtype=torch.float64) for s in (scale, 1.0, 1.25 * scale)]
    starts[1] = starts[1].float()
    record = Recorded(target, scale)
    with checks.unchanged(*starts):
        found, loss = longrope_search(record, starts, scale, generations, children, g)
    checks.close(len(record.asked), 3 + generations * children, what="the number of evaluations")
    for start, asked in zip(starts, record.asked, strict=False):
        checks.close(asked, start, what="the first candidates, beside the seeds")
    best = min(range(len(record.losses)), key=record.losses.__getitem__)
    checks.close(found, record.asked[best], what="the factors, beside the best evaluated")
    checks.close(loss, record.losses[best], what="their loss", rtol=1e-9, atol=1e-15)
    distinct = len({tuple(f.tolist()) for f in record.asked})
    assert pairs == 1 or distinct > len(record.asked) // 2, (
        "most candidates are the same: children must differ from their parents."
    )
starts = [torch.full((40,), s, dtype=torch.float64) for s in (2.0, 3.0)]
target = torch.linspace(1, 4, 40, dtype=torch.float64)
checks.uses_generator(
    lambda g: longrope_search(Recorded(target, 4.0), starts, 4.0, 3, 4, g)[0],
    what="longrope_search",
)


def worse(factors: Tensor) -> float:
    """The seed is the best there is: no child may be preferred, nor a loss of a child reported."""
    return 0.0 if bool((factors == 2.0).all()) else 1.0


found, loss = longrope_search(
    worse, [torch.full((3,), 2.0).double()], 2.0, 2, 3, checks.generator(5)
)
checks.close(found, torch.full((3,), 2.0).double(), what="a seed that no child beats")
checks.close(loss, 0.0, what="its loss")
### END HIDDEN TESTS

# %% check="longrope_search" points=2
target = torch.tensor([1.0, 1.1, 1.3, 1.8, 2.5, 3.1, 3.9, 4.4], dtype=torch.float64)
starts = [torch.full((8,), 4.0, dtype=torch.float64), 4 ** (torch.arange(8).double() / 7)]
record = Recorded(target, 4.0)
_, loss = longrope_search(record, starts, 4.0, 30, 8, checks.generator(4))
first = min(record.losses[:2])
assert loss < first / 4, (
    f"30 generations of 8 bring the loss from {first:.4f} to {loss:.4f}: half the distance is a "
    f"quarter of the loss. Are the parents the best of all so far, and the children near them?"
)
### BEGIN HIDDEN TESTS
ratios = []
for salt in range(3):
    g = checks.generator(50 + salt)
    scale = (4.0, 8.0, 3.0)[salt]
    steps = torch.rand(8, generator=g, dtype=torch.float64) ** 2
    target = (math.log(scale) * steps.cumsum(0) / steps.sum()).exp()
    starts = [torch.full((8,), scale, dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
    record = Recorded(target, scale)
    found, loss = longrope_search(record, starts, scale, 30, 8, g)
    ratios.append(loss / min(record.losses[:2]))
    apart = [
        min(float((f.log() - p.log()).square().mean()) for p in record.asked[: 2 + 8 * (i // 8)])
        for i, f in enumerate(record.asked[2:])
    ]
    assert sorted(apart)[len(apart) // 2] < 0.05 * math.log(scale) ** 2, (
        "half of the children are far from all that was evaluated before them."
    )
assert sorted(ratios)[1] < 0.25, (
    f"of three searches, the middle one leaves {sorted(ratios)[1]:.2f} of the best seed's loss; "
    f"0.25 is asked for."
)


def asked_with(losses: list[float], generations: int, children: int, seed: int) -> Tensor:
    """What a search asks, (calls, 12), where call k gives the loss number k, whatever it asks."""
    asked, given = [], iter(losses)

    def evaluate(factors: Tensor) -> float:
        asked.append(factors.detach().clone())
        return next(given)

    start = torch.full((12,), 2.0, dtype=torch.float64)
    longrope_search(evaluate, [start], 4.0, generations, children, checks.generator(seed))
    return torch.stack(asked)


# A generation is made before it is judged: other losses of the last one change no candidate of it.
scripted = torch.rand(1 + 3 * 5, generator=g).tolist()
checks.close(
    asked_with([*scripted[:11], -1.0, *scripted[12:]], 3, 5, 60),
    asked_with([*scripted[:11], 2.0, *scripted[12:]], 3, 5, 60),
    what="the last generation's candidates, where its first child has another loss,",
    hint="Parents are the best of those evaluated before the generation",
)
# The best stays a parent: where no child ever beats the seed, children are still near it.
logs = asked_with([0.0] + [1.0] * 600, 60, 10, 61)[1:].log()
apart = (logs - math.log(2)).square().mean(1).sqrt()
assert float(apart[-200:].min()) < float(apart[:10].mean()), (
    f"no child beats the seed; after 60 generations they are {float(apart[-200:].min()):.2f} and "
    f"more away from it, {float(apart[:10].mean()):.2f} in the first: is the best still a parent?"
)
### END HIDDEN TESTS

# %% [markdown]
# ## A cache for endless text
#
# A chat that never ends cannot keep every key. Keep a window of the last ones, then? In most large
# models that breaks the moment the very first token leaves. Xiao et al. 2023 found why: softmax
# weights must sum to 1 even when a head has nothing to look for, so heads learn to leave the rest
# on a token that is always there, the first. It is an **attention sink**. If it holds 0.9 of the
# sum, then without it every other weight is multiplied by $1/(1-0.9) = 10$.
#
# **StreamingLLM** keeps the first few tokens for good (4 do) beside the window. The second half of
# the idea is about positions: count them *inside the cache*. If it holds at most $L$ tokens, no
# position leaves the trained range, whatever the length of the text. So keys are cached *unrotated*
# and turned at every step by the place where they now stand.


# %% exercise="streaming_cache" minutes=30 difficulty=3
class StreamingCache:
    """Keys and values of the first `sinks` tokens and of the last `window` ones, layer by layer.

    StreamingCache(sinks, window, frequencies): sinks ≥ 0, window ≥ 1, else ValueError; frequencies
    (head_dim/2,), float64.

    attend(layer, q, k, v): one new token for one layer; a token meets layers 0, 1, … in turn.
        q (batch, heads, 1, head_dim); k and v (batch, kv_heads, 1, head_dim), all unrotated; heads
        is a multiple of kv_heads, and head h reads kv head h // (heads//kv_heads).
        The new token is added and, where more than sinks + window are then held, the oldest that is
        no sink is dropped. Keys are turned by their place in the cache, 0, 1, …, the query by the
        last place. Pairs are (x[j], x[j + head_dim/2]), as in `rotate`. Returns softmax attention
        over all that is held, scale 1/√head_dim: (batch, heads, 1, head_dim), q's format.
        Arguments are not changed.
    keys, values: lists with a tensor per layer, (batch, kv_heads, held, head_dim), keys unrotated.
    len(cache): how many tokens are held, 0 before the first; those of layer 0.
    """

    ### BEGIN SOLUTION
    def __init__(self, sinks: int, window: int, frequencies: Tensor):
        if sinks < 0 or window < 1:
            raise ValueError(f"{sinks} sinks and a window of {window}: at least 0 and 1")
        self.sinks, self.window, self.frequencies = sinks, window, frequencies
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __len__(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def _kept(self, old: Tensor | None, new: Tensor) -> Tensor:
        held = new if old is None else torch.cat([old, new], dim=2)
        if held.shape[2] <= self.sinks + self.window:
            return held
        return torch.cat([held[:, :, : self.sinks], held[:, :, -self.window :]], dim=2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for store, new in ((self.keys, k), (self.values, v)):
            if layer == len(store):
                store.append(self._kept(None, new))
            else:
                store[layer] = self._kept(store[layer], new)
        keys, values = self.keys[layer], self.values[layer]
        angles = angles_of(self.frequencies, keys.shape[2]).to(q.device)
        cos, sin = angles.cos()[None, None], angles.sin()[None, None]
        keys, q = rotate(keys, cos, sin), rotate(q, cos[:, :, -1:], sin[:, :, -1:])
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a window with the new token in it</summary>
#
# Add first, drop afterwards: the window's last token is the new one. With sinks = 0 a slice `[:0]`
# is empty, as it should be.
# </details>
#
# <details><summary>Hint: turning once too often</summary>
#
# What is stored must not be turned. Turn a copy of all keys in each step and forget it.
# </details>


# %%
def stream(model: Llama, tokens: Tensor, cache) -> Tensor:
    """Logits (batch, vocab) after one token (batch, 1), with a cache that attends."""
    x = model.embed_tokens(tokens)
    for layer, block in enumerate(model.layers):
        h, attention = block.input_layernorm(x), block.self_attn
        q, k, v = (
            projection(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.o_proj(cache.attend(layer, q, k, v).transpose(1, 2).flatten(-2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return F.linear(model.norm(x), model.embed_tokens.weight)[:, -1]


# %% tags=["support"]
# Support: the same attention from a full history, pair by pair in float64
def streamed(history: list, sinks: int, window: int, w: Tensor, places: str = "cache") -> Tensor:
    """The newest token's attention; history is a list of (q, k, v) of one layer, oldest first."""
    count = len(history)
    held = [i for i in range(count) if i < sinks or i >= count - window]
    q, group = history[-1][0].double(), history[-1][0].shape[1] // history[-1][1].shape[1]
    place = list(range(len(held))) if places == "cache" else held

    def turned(x: Tensor, n: int) -> Tensor:
        z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(
            1j * n * w.double().to(x.device)
        )
        return torch.cat([z.real, z.imag], dim=-1)

    keys = [turned(history[i][1], n) for i, n in zip(held, place, strict=True)]
    keys = torch.cat(keys, dim=2).repeat_interleave(group, dim=1)
    values = torch.cat([history[i][2].double() for i in held], dim=2)
    values = values.repeat_interleave(group, dim=1)
    scores = (turned(q, place[-1]) * keys).sum(-1) / q.shape[-1] ** 0.5  # (batch, heads, held)
    return (scores.softmax(-1)[..., None] * values).sum(2, keepdim=True)


# %% check="streaming_cache" points=2
g = checks.generator(7)
cache = StreamingCache(2, 3, rope_frequencies(4, 100.0))
checks.close(len(cache), 0, what="the length of an empty cache")
for number in range(8):
    k = torch.full((1, 1, 1, 4), float(number))
    cache.attend(0, k, k, k)
    checks.close(len(cache), min(number + 1, 5), what=f"tokens held after {number + 1}")
checks.close(
    cache.keys[0][0, 0, :, 0],
    torch.tensor([0.0, 1, 5, 6, 7]),
    what="the tokens held after 0 … 7 with 2 sinks and a window of 3",
    mistakes={"no sinks": torch.tensor([3.0, 4, 5, 6, 7])},
)
### BEGIN HIDDEN TESTS
for sinks, window, heads, kv_heads, dim, batch, dtype in [
    (2, 3, 4, 2, 6, 2, torch.float64),
    (0, 4, 3, 1, 4, 1, torch.float64),
    (1, 1, 2, 2, 2, 3, torch.float32),
    (4, 6, 6, 2, 8, 2, torch.float32),
]:
    w = rope_frequencies(dim, 50.0)
    cache, histories = StreamingCache(sinks, window, w), [[], []]
    for number in range(sinks + window + 9):
        for layer in (0, 1):
            shapes = [(batch, h, 1, dim) for h in (heads, kv_heads, kv_heads)]
            q, k, v = (checks.randn(*s, generator=g, dtype=dtype, scale=1.5) for s in shapes)
            if number % 2:  # views with strides of their own
                q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
            histories[layer].append((q, k, v))
            with checks.unchanged(q=q, k=k, v=v):
                out = cache.attend(layer, q, k, v)
            arguments = histories[layer], sinks, window, w
            checks.close(
                out,
                streamed(*arguments).to(dtype),
                what=f"token {number} of layer {layer}, {sinks} sinks, window {window}",
                dtype=dtype,
                rtol=1e-9 if dtype == torch.float64 else 2e-5,
                mistakes={
                    "positions in the text": streamed(*arguments, "text").to(dtype),
                    "a window that counts the sinks": streamed(
                        histories[layer], sinks, max(1, window - sinks), w
                    ).to(dtype),
                    "a window without the new token": streamed(
                        histories[layer], sinks, window + 1, w
                    ).to(dtype),
                },
            )
    held = [i for i in range(number + 1) if i < sinks or i > number - window]
    for layer in (0, 1):
        for name, part in (("keys", 1), ("values", 2)):
            checks.close(
                getattr(cache, name)[layer],
                torch.cat([histories[layer][i][part] for i in held], dim=2),
                what=f"{name} of layer {layer}, as they came",
            )
for bad in ((-1, 4), (2, 0)):
    checks.raises(ValueError, StreamingCache, *bad, w, because=f"sinks and window are {bad}")
### END HIDDEN TESTS

# %% check="streaming_cache" points=2
torch.manual_seed(checks.seed())
toy = Llama(Config(vocab_size=30, hidden_size=24, layers=2, heads=3, kv_heads=1, mlp_size=32))
toy, w = toy.to(profile.device), rope_frequencies(8)
text = torch.randint(0, 30, (2, 12), generator=checks.generator(8)).to(profile.device)
cache = StreamingCache(3, 20, w)
with torch.no_grad():
    steps = torch.stack([stream(toy, text[:, i : i + 1], cache) for i in range(12)], dim=1)
    whole = logits_with(toy, text, angles_of(w, 12))
checks.close(steps, whole, atol=1e-5, what="12 tokens that all fit, beside one pass over them")
### BEGIN HIDDEN TESTS
# 100 times the window: held tokens stay bounded, results finite, and those of two caches that have
# seen other tokens in between, but hold the same, are the same.
sinks, window, dim = 2, 4, 8
long, g = StreamingCache(sinks, window, w), checks.generator(9)
history = []
for number in range(100 * window):
    q, k, v = (checks.randn(2, h, 1, dim, generator=g) for h in (2, 1, 1))
    history.append((q, k, v))
    out = long.attend(0, q, k, v)
    assert long.keys[0].shape[2] == long.values[0].shape[2] == min(number + 1, sinks + window)
    assert bool(torch.isfinite(out).all()), f"token {number}: the result is not finite."
short = StreamingCache(sinks, window, w)
for q, k, v in history[:sinks] + history[-window:]:
    again = short.attend(0, q, k, v)
checks.close(
    out,
    again,
    what="after 400 tokens, beside a cache that saw only the 6 that are held",
    hint="Places in the cache, not in the text",
)
# Only what is held counts: NaN that has left the cache leaves no trace.
cache = StreamingCache(1, 2, w)
for number in range(6):
    q, k, v = (checks.randn(1, h, 1, dim, generator=g) for h in (2, 1, 1))
    if number == 2:
        k, v = k * math.nan, v * math.nan
    out = cache.attend(0, q, k, v)
assert bool(torch.isfinite(out).all()), "a token that was dropped still counts."
### END HIDDEN TESTS

# %% [markdown]
# ## Can it find anything?
#
# A loss that stays low in a long text proves little: the last 200 tokens predict the next one well
# enough. The **passkey** test (Mohtashami and Jaggi 2023) asks for what cannot be guessed: a
# number, said once somewhere in a long text, asked for at its end. Its result is a grid of *length*
# by *depth*, the share of the text before the number.


# %%
TELL = "\nThe passkey is {0}. Remember it: {0} is the passkey.\n"
ASK = "\nWhat is the passkey? The passkey is"


@dataclass(frozen=True)
class Passkey:
    """A prompt of `length` tokens with a key at `depth` of its text, and what should follow it."""

    length: int
    depth: float
    key: str
    prompt: list[int]
    answer: list[int]


# %% exercise="passkey_examples" minutes=20 difficulty=2
def passkey_examples(
    encode: Callable[[str], list[int]],
    filler: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    generator: torch.Generator,
    bos: int = 0,
) -> list[Passkey]:
    """One example for each length and depth, lengths outside, depths inside.

    A prompt is [bos, *before, *told, *after, *asked], exactly `length` tokens: told is
    encode(TELL.format(key)), asked encode(ASK); before and after together are consecutive tokens of
    `filler` (or none), of which before holds the first ⌊depth · count⌋, the product as Python
    rounds it. The answer is encode(f" {key}.").
    Each example draws, from `generator` and nothing else, a key of five digits, each digit 0 … 9
    alike (leading zeros too), and where in `filler` its text begins, all places alike at which it
    fits. ValueError where a prompt leaves no room for told and asked, where filler is too
    short, or for a depth outside 0 … 1. `filler` is not changed.
    """
    ### BEGIN SOLUTION
    examples = []
    for length in lengths:
        for depth in depths:
            key = "".join(map(str, torch.randint(10, (5,), generator=generator).tolist()))
            told, asked = encode(TELL.format(key)), encode(ASK)
            count = length - 1 - len(told) - len(asked)
            if count < 0 or count > len(filler) or not 0 <= depth <= 1:
                raise ValueError(f"length {length}, depth {depth}: {count} tokens of filler")
            start = int(torch.randint(len(filler) - count + 1, (), generator=generator))
            text = list(filler[start : start + count])
            cut = math.floor(depth * count)
            prompt = [bos, *text[:cut], *told, *text[cut:], *asked]
            examples.append(Passkey(length, depth, key, prompt, encode(f" {key}.")))
    return examples
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the exact length</summary>
#
# Count what is not filler first: the beginning, the told sentence, the question. How many tokens a
# key takes depends on the key, so count after you have drawn it.
# </details>


# %% tags=["support"]
# Support: a tokenizer of characters, beginning at 200
def characters(text: str) -> list[int]:
    """Each character's code + 200, but "00", which is one token."""
    return [1000 if c == "\0" else ord(c) + 200 for c in text.replace("00", "\0")]


# %% check="passkey_examples" points=2
filler = list(range(100, 190))
made = passkey_examples(characters, filler, [120, 150], [0.0, 0.5, 1.0], checks.generator(11))
checks.close(len(made), 6, what="the number of examples")
for example, (length, depth) in zip(
    made, [(n, d) for n in (120, 150) for d in (0.0, 0.5, 1.0)], strict=True
):
    checks.close(
        (example.length, example.depth), (length, depth), what="length and depth, in order"
    )
    checks.close(len(example.prompt), length, what=f"the tokens of a prompt of {length}")
    checks.close(example.answer, characters(f" {example.key}."), what="the answer")
### BEGIN HIDDEN TESTS
keys, starts, ranks = [], [], []
for salt, (bos, depths, lengths) in enumerate(
    [(0, [0.1, 0.5, 0.93], [101, 140, 163]), (7, [0.0, 1.0], [95, 170])] * 12
):
    filler = [5000 + 3 * i for i in range(90 + salt)]
    copy = list(filler)
    made = passkey_examples(characters, filler, lengths, depths, checks.generator(30 + salt), bos)
    assert filler == copy, "filler was changed in place."
    grid = [(n, d) for n in lengths for d in depths]
    for example, (length, depth) in zip(made, grid, strict=True):
        digits_only = set(example.key) <= set("0123456789")
        assert digits_only, f"a key is five digits; yours is {example.key!r}"
        checks.close(len(example.key), 5, what="the digits of a key")
        told, asked = characters(TELL.format(example.key)), characters(ASK)
        text = [t for t in example.prompt if t >= 5000]
        count = length - 1 - len(told) - len(asked)
        checks.close(len(example.prompt), length, what=f"the tokens of a prompt of {length}")
        checks.close(len(text), count, what="tokens of filler")
        if count:
            first = (text[0] - 5000) // 3
            checks.close(text, filler[first : first + count], what="the filler, consecutive")
            if len(filler) - count > 5:
                starts.append(first / (len(filler) - count))
        cut = int(depth * count)
        checks.close(
            example.prompt,
            [bos, *text[:cut], *told, *text[cut:], *asked],
            what=f"the prompt at depth {depth}",
        )
        checks.close(example.answer, characters(f" {example.key}."), what="the answer")
        checks.close((example.length, example.depth), (length, depth), what="length and depth")
        keys.append(example.key)
assert len(set(keys)) > 0.9 * len(keys), "examples share their keys: draw one for each."
digits = torch.tensor([int(c) for key in keys for c in key]).double()
checks.drawn(digits, mean=4.5, std=math.sqrt(8.25), kurtosis=1.8, what="the digits of the keys")
assert any(key[0] == "0" for key in keys), "no key begins with 0: all digits are alike."
drawn = {int(digit) for digit in digits}
assert len(drawn) == 10, f"in {len(digits)} digits of keys only {sorted(drawn)} occur."
checks.drawn(torch.tensor(starts).double(), mean=0.5, what="where the filler begins, from 0 to 1")
checks.uses_generator(
    lambda g: [
        int(e.key)
        for e in passkey_examples(characters, range(5000, 5300), [140] * 5, [0.1, 0.4], g)
    ],
    what="passkey_examples",
)


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


full = 1 + len(codes(TELL.format("12345"))) + len(codes(ASK))
filler = [5000, 5001, 5002, 5003]
made = passkey_examples(codes, filler, [full + 2] * 120, [0.5], checks.generator(70))
first = torch.tensor([t for e in made for t in e.prompt if t >= 5000][::2]) - 5000
places = sorted(set(first.tolist()))
assert places == [0, 1, 2], (
    f"in 120 draws 2 tokens of 4 begin at {places}: they fit at 0, 1 and 2, the last place too."
)
checks.drawn(first.double(), mean=1.0, std=math.sqrt(2 / 3), kurtosis=1.5, what="these places")
(bare,) = passkey_examples(codes, filler, [full], [0.5], checks.generator(71), 3)
checks.close(
    bare.prompt, [3, *codes(TELL.format(bare.key)), *codes(ASK)], what="a prompt without filler"
)
short = 1 + len(characters(TELL.format("12345"))) + len(characters(ASK)) - 6
for lengths, depths, filler in [
    ([short], [0.5], range(300)),
    ([300], [0.5], range(100)),
    ([200], [1.2], range(300)),
    ([200], [-0.1], range(300)),
]:
    checks.raises(
        ValueError, passkey_examples, characters, filler, lengths, depths, checks.generator(1)
    )
### END HIDDEN TESTS

# %% [markdown]
# A key counts when all of it is right: four digits of five are a failure. What a model writes
# *after* the answer is not asked for.


# %% exercise="passkey_accuracy" minutes=10 difficulty=1
def passkey_accuracy(
    write: Callable[[list[int], int], list[int]], examples: Sequence[Passkey]
) -> dict[tuple[int, float], float]:
    """The share of keys found, for each (length, depth) that occurs among the examples.

    write(prompt, count) gives the tokens that a model writes after a prompt, at most `count`, fewer
    where it stops. It is asked once for each example, for as many tokens as its answer has. Right
    is what equals the answer in full. Prompts are not changed; `write` may change the list that it
    is given. No examples: {}.
    """
    ### BEGIN SOLUTION
    found: dict[tuple[int, float], list[bool]] = {}
    for example in examples:
        written = list(write(list(example.prompt), len(example.answer)))
        found.setdefault((example.length, example.depth), []).append(written == example.answer)
    return {cell: sum(right) / len(right) for cell, right in found.items()}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: cells with several examples</summary>
#
# Collect True and False by cell first, divide at the end.
# </details>


# %% tags=["support"]
# Support: a scripted model
class Reader:
    """Writes the key that it reads in the last `sight` characters of a prompt, else 11111.

    `sloppy` gets the last digit wrong; `curt` stops after two tokens; it notes what it was asked.
    """

    def __init__(self, sight: int, sloppy: bool = False, curt: bool = False):
        self.sight, self.sloppy, self.curt, self.asked = sight, sloppy, curt, []

    def __call__(self, prompt: list[int], count: int) -> list[int]:
        self.asked.append((list(prompt), count))
        text = "".join(
            "00" if t == 1000 else chr(t - 200) for t in prompt[-self.sight :] if t >= 200
        )
        _, told, rest = text.partition("The passkey is ")
        key = rest[:5] if told and rest[:5].isdigit() else "11111"
        if self.sloppy:
            key = key[:4] + str((int(key[4]) + 1) % 10)
        written = characters(f" {key}. And so on")[:count]
        prompt.clear()  # what it is given is its own
        return written[:2] if self.curt else written


def example_of(length: int, depth: float, key: str) -> Passkey:
    told, asked = characters(TELL.format(key)), characters(ASK)
    count = length - 1 - len(told) - len(asked)
    cut = int(depth * count)
    prompt = [0, *[250] * cut, *told, *[250] * (count - cut), *asked]
    return Passkey(length, depth, key, prompt, characters(f" {key}."))


# %% check="passkey_accuracy" points=2
grid = [example_of(n, d, k) for n in (150, 400) for d in (0.1, 0.9) for k in ("31415", "00271")]
checks.close(
    sorted(passkey_accuracy(Reader(160), grid).items())
    == [
        ((150, 0.1), 1.0),
        ((150, 0.9), 1.0),
        ((400, 0.1), 0.0),
        ((400, 0.9), 1.0),
    ],
    True,
    what="whether a model that sees 160 tokens finds all but those at the start of 400",
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
several = [  # "00" is one token: answers of one cell differ in their number of tokens
    example_of(n, d, f"{int(torch.randint(111, 999, (), generator=g)):03d}" + ("00", "17")[i % 2])
    for n, d, times in ((130, 0.2, 3), (260, 0.0, 1), (260, 0.75, 4))
    for i in range(times)
]
mixed = several[::2] + several[1::2]  # cells are not in one piece
before = [(list(e.prompt), list(e.answer)) for e in mixed]
for reader, expected in (
    (Reader(1000), {(130, 0.2): 1.0, (260, 0.0): 1.0, (260, 0.75): 1.0}),
    (Reader(135), {(130, 0.2): 1.0, (260, 0.0): 0.0, (260, 0.75): 1.0}),
    (Reader(1000, sloppy=True), {(130, 0.2): 0.0, (260, 0.0): 0.0, (260, 0.75): 0.0}),
    (Reader(1000, curt=True), {(130, 0.2): 0.0, (260, 0.0): 0.0, (260, 0.75): 0.0}),
):
    found = passkey_accuracy(reader, mixed)
    checks.kind(found, dict, what="the result")
    checks.close(len(found), 3, what="the number of cells")
    for cell, share in expected.items():
        assert cell in found, f"the cell {cell} is missing."
        checks.number(found[cell], share, to=1e-9, atol=1e-12, what=f"the share of cell {cell}")
    checks.close(len(reader.asked), len(mixed), what="how often the model was asked")
    for (prompt, count), (asked, answer) in zip(reader.asked, before, strict=True):
        checks.close(prompt, asked, what="a prompt, as the model gets it")
        checks.close(count, len(answer), what="the tokens asked for")
assert [(e.prompt, e.answer) for e in mixed] == before, "an example was changed in place."
turn = iter([True, False, True, True])


def sometimes(prompt: list[int], count: int) -> list[int]:
    return Reader(1000, sloppy=not next(turn))(prompt, count)


found = passkey_accuracy(sometimes, [e for e in several if e.depth == 0.75])
checks.number(found[260, 0.75], 0.75, to=1e-9, what="three of four")
assert passkey_accuracy(Reader(9), []) == {}, "no examples give no cells."
### END HIDDEN TESTS

# %% [markdown]
# ## Finetuning at the new length
#
# Every method above is a starting point. What published models do next is short: a few hundred to a
# thousand steps on long texts with the new frequencies, and PI was proposed for just that. Two
# habits keep it harmless: short texts stay in the mixture, so that short prompts do not suffer, and
# the rate begins small, for the first gradients of a squeezed model are large.


# %% exercise="finetune_longer" minutes=25 difficulty=2 path="more"
def finetune_longer(
    model: Llama,
    frequencies: Tensor,
    factor: float,
    batches: Sequence[Tensor],
    lr: float,
    warmup: int = 4,
) -> list[float]:
    """Trains `model` in place with new frequencies, a step for each batch; the losses.

    batches: (batch, length + 1) token ids each, of any lengths. A step's loss is the mean negative
    log-likelihood, in nats, of tokens 1 … length, by logits_with(model, tokens before,
    angles_of(frequencies, length), factor).
    AdamW with betas (0.9, 0.95), eps 1e-8 and no weight decay; step n = 1, 2, … takes the rate
    lr · min(1, n/warmup); the gradient is clipped to a norm of 1 over all parameters.
    Parameters that require no gradient stay as they are; gradients from before do not count, and
    none are left (each .grad is None). Training mode stays as it was.
    warmup is at least 1, and some parameter requires a gradient.
    Returns each step's loss before its update, as numbers; [] for no batches.
    """
    ### BEGIN SOLUTION
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        angles = angles_of(frequencies, batch.shape[1] - 1)
        logits = logits_with(model, batch[:, :-1], angles, factor)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / warmup)
        optimizer.step()
        losses.append(float(loss.detach()))
    for parameter in model.parameters():  # the frozen ones too
        parameter.grad = None
    return losses
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order of a step</summary>
#
# Clear gradients, loss, backward, clip, set the rate, step. The rate of step 1 is lr/warmup, not 0.
# </details>


# %% tags=["support"]
# Support: a toy of 6,000 parameters, its task, and its training written out
def toy_model(salt: int) -> Llama:
    torch.manual_seed(1000 * checks.seed() + salt)
    config = Config(vocab_size=12, hidden_size=32, layers=1, heads=2, kv_heads=1, mlp_size=32)
    return Llama(config).to(profile.device)


def periodic(count: int, length: int, generator: torch.Generator, period: int = 5) -> Tensor:
    """Rows (length + 1,) of five random tokens, repeated: all but the first five can be known."""
    first = torch.randint(0, 12, (count, period), generator=generator)
    return first.repeat(1, length // period + 2)[:, : length + 1].to(profile.device)


def written_out(model, frequencies, factor, batches, lr, warmup, clip=1.0, warm=True):
    """Losses, and parameters by name, of AdamW as its paper has it; `model` stays as it was."""
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    m, v = ({n: torch.zeros_like(values[n]) for n in names} for _ in range(2))
    losses = []
    for step, batch in enumerate(batches, start=1):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in values.items()}
        angles = angles_of(frequencies, batch.shape[1] - 1)
        cos, sin = (factor * f(angles).to(batch.device)[None, None] for f in (torch.cos, torch.sin))
        twin = Llama(model.config).to(batch.device)

        def run(tokens, leaves=leaves, twin=twin, cos=cos, sin=sin):
            def forward(tokens):
                x = twin.embed_tokens(tokens)
                for block in twin.layers:
                    x = block(x, cos.float(), sin.float(), None, None)
                return twin.norm(x) @ leaves["embed_tokens.weight"].T

            twin.forward = forward
            return torch.func.functional_call(twin, leaves, (tokens,))

        p = run(batch[:, :-1]).log_softmax(-1)
        loss = -p.gather(-1, batch[:, 1:, None]).mean()
        gradients = torch.autograd.grad(loss, [leaves[n] for n in names])
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        rate = lr * min(1.0, step / warmup) if warm else lr
        for n, g in zip(names, gradients, strict=True):
            g = g * min(1.0, clip / float(norm))
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.95 * v[n] + 0.05 * g * g
            direction = m[n] / (1 - 0.9**step) / ((v[n] / (1 - 0.95**step)).sqrt() + 1e-8)
            values[n] = values[n] - rate * direction
        losses.append(float(loss.detach()))
    return losses, values


# %% check="finetune_longer" points=3
g, model, w = checks.generator(13), toy_model(1), rope_frequencies(16) / 3
batches = [periodic(2, length, g) for length in (9, 24, 13, 30, 8)]
expected, values = written_out(model, w, 1.2, batches, 3e-3, 4)
losses = finetune_longer(model, w, 1.2, batches, 3e-3)
checks.close(losses, expected, rtol=1e-4, what="the losses of five steps")
### BEGIN HIDDEN TESTS
for name, parameter in model.named_parameters():
    checks.close(parameter, values[name], atol=3e-5, rtol=0, what=f"{name} after five steps")
for salt, (factor, lr, warmup, scale) in enumerate(
    [(1.0, 1e-3, 1, 1.0), (1.3, 5e-3, 9, 6.0), (0.8, 2e-3, 2, 3.0)]
):
    model, w = toy_model(20 + salt), rope_frequencies(16, 200.0) / scale
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # gradients above 1, so that clipping shows
    frozen = model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    for parameter in model.parameters():  # the frozen one too: it was frozen after a backward pass
        parameter.grad = torch.full_like(parameter, 0.3)
    model.train(salt == 1)
    batches = [periodic(3, length, g, period=4 + salt) for length in (11, 7, 19, 26, 5, 16)]
    copies = [b.clone() for b in batches]
    expected, values = written_out(model, w, factor, batches, lr, warmup)
    losses = finetune_longer(model, w, factor, batches, lr, warmup)
    checks.kind(losses, list, what="the losses")
    checks.close(losses, expected, rtol=3e-4, what=f"the losses of six steps, warmup {warmup}")
    for name, parameter in model.named_parameters():
        checks.close(
            parameter, values[name], atol=0.03 * lr, rtol=0, what=f"{name} after six steps"
        )
        assert parameter.grad is None, f"{name} keeps a gradient."
    checks.close(frozen, before, rtol=0, atol=0, what="a parameter that requires no gradient")
    assert not frozen.requires_grad, "a frozen parameter requires gradients afterwards."
    assert model.training == (salt == 1), "the model's training mode is not as it was."
    for batch, copy in zip(batches, copies, strict=True):
        checks.close(batch, copy, what="a batch afterwards")
with checks.kept(model):
    assert finetune_longer(model, w, 1.0, [], 1e-3) == [], "no batches, no losses."
### END HIDDEN TESTS

# %% check="finetune_longer" points=2
# The toy learns to repeat at length 24; PI for 48 breaks it; finetuning mends it, at both lengths.
g, model, w = checks.generator(14), toy_model(2), rope_frequencies(16)
finetune_longer(model, w, 1.0, [periodic(16, 24, g) for _ in range(150)], 1e-2)
long, short = periodic(16, 48, g), periodic(64, 24, g)


def repeat_loss(tokens: Tensor, frequencies: Tensor) -> float:
    """Nats of the tokens that can be known, without the first repeat."""
    with torch.no_grad():
        logits = logits_with(model, tokens[:, :-1], angles_of(frequencies, tokens.shape[1] - 1))
    return float(F.cross_entropy(logits[:, 9:].flatten(0, 1), tokens[:, 10:].flatten()))


before = repeat_loss(short, w), repeat_loss(long, w / 2)
assert before[0] < 0.8, f"150 steps at length 24 leave {before[0]:.2f} nats; 0.8 is asked for."
finetune_longer(model, w / 2, 1.0, [periodic(16, 24 if i % 2 else 48, g) for i in range(200)], 1e-2)
after = repeat_loss(short, w / 2), repeat_loss(long, w / 2)
assert after[0] < 1.8, f"finetuning leaves {after[0]:.2f} nats at length 24; 1.8 is asked for."
assert after[1] < 0.65 * before[1], (
    f"finetuning brings the loss at length 48 from {before[1]:.2f} to {after[1]:.2f} nats; less "
    "than 0.65 of it is asked for."
)
### BEGIN HIDDEN TESTS
assert before[1] > 1.2, (
    f"PI alone leaves {before[1]:.2f} nats at length 48: it should break the toy."
)
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: four times the length
#
# **Question.** `small` was trained on 512 tokens. What does each method make of 2,048, without any
# training? And which of them can still find a passkey?
#
# **Prediction.** Before you run on, write down:
#
# 1. PI keeps every angle within the trained range. Is its loss below that of the plain model,
#    beyond 512? And within 512, where the plain model needs no help?
# 2. Where along the text does NTK-aware scaling with $s = 4$ give out first, and why there?
# 3. Half of the pairs never finish a turn in training. Can they be stopped (partial RoPE, share
#    one half) at no cost?
#
# The first figure shows what each method does to each pair: the factor by which it is slowed.

# %% tags=["experiment"]
SCALE, TRAINED, LONG = 4.0, 512, 2048
w = rope_frequencies(32)
yarn_w, yarn_factor = yarn_frequencies(32, 10_000.0, SCALE, TRAINED)
methods = {  # frequencies, and the factor on cos and sin
    "plain": (w, 1.0),
    "PI": (position_interpolation(w, SCALE), 1.0),
    "NTK-aware": (rope_frequencies(32, ntk_aware_base(10_000.0, 32, SCALE)), 1.0),
    "YaRN": (yarn_w, yarn_factor),
    "partial, half": (partial_rope(w, 0.5), 1.0),
}

# %% tags=["experiment", "figure"]
# Figure: how much each method slows each pair
fig, ax = plot.plt.subplots(figsize=(8, 3.8))
shown = {name: methods[name][0] for name in ("PI", "NTK-aware", "YaRN")}
shown["YaRN, the paper's ramp"] = yarn_frequencies(32, 10_000.0, SCALE, TRAINED, ramp="rotations")[
    0
]
plot.curves(
    range(16),
    {name: w / f for name, f in shown.items()},
    xlabel="pair, the fastest first",
    ylabel="slowed by a factor of",
    title=f"Scale {SCALE:g}: who is slowed",
    ax=ax,
)
finished = int((TRAINED * w / math.tau >= 1).sum())
ax.axvspan(finished - 0.5, 15.5, color="#eeeeee", zorder=0)
ax.text(finished - 0.3, 1.05, "no full turn in training", fontsize=9)
ax.legend(loc="lower right")
plot.caption(
    fig,
    "On the shade are the pairs that never finish a turn in 512 tokens. NTK-aware scaling gives "
    "only the last of them its full factor of 4; YaRN gives it to all, and leaves the fastest two "
    "alone. The paper's ramp slows the pairs in the middle more than its authors' code does.",
)
plot.plt.show()

# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # at this size two threads are slower
small, tokenizer = models.load("small")
training, held_out = data.split(data.source_code())
documents = [tokenizer.encode(held_out[name]) for name in sorted(held_out)]
documents = [ids for ids in documents if len(ids) >= LONG]
rows = torch.tensor([[tokenizer.eos, *ids[:LONG]] for ids in documents]).to(profile.device)


@torch.inference_mode()
def token_losses(model: Llama, rows: Tensor, angles: Tensor, factor: float = 1.0) -> Tensor:
    """Nats of each token but the first: (rows, length)."""
    found = []
    for row in rows:
        logits = logits_with(model, row[None, :-1], angles[: len(row) - 1], factor)[0]
        found.append(F.cross_entropy(logits, row[1:], reduction="none").float().cpu())
    return torch.stack(found)


losses = {
    name: token_losses(small, rows[:2], angles_of(f, LONG), factor)
    for name, (f, factor) in methods.items()
}
for name, nats in losses.items():
    blocks = nats.view(len(nats), -1, 256).mean((0, 2))
    print(f"{name:14}", " ".join(f"{b:.2f}" for b in blocks.tolist()), f"  mean {nats.mean():.3f}")

# %% tags=["experiment", "figure"]
# Figure: where each method gives out, without any training
fig, ax = plot.plt.subplots(figsize=(9, 4.6))
plot.curves(
    torch.arange(128, LONG + 1, 256),
    {name: nats.view(len(nats), -1, 256).mean((0, 2)) for name, nats in losses.items()},
    xlabel="position in the text (means of 256 tokens)",
    ylabel="loss (nats a token)",
    title=f"A model of 512 tokens on {LONG:,}",
    ax=ax,
)
ax.axvline(TRAINED, color="#888888", linewidth=1)
ax.text(TRAINED + 12, ax.get_ylim()[0] + 0.06, "trained to here", fontsize=9, color="#555555")
ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
plot.caption(
    fig,
    f"`small`, {len(losses['plain'])} held-out files of Python. Plain positions fail "
    "beyond 512. PI fails everywhere, even where nothing was wrong. NTK-aware scaling holds "
    "until its under-slowed pairs leave what they know; YaRN stays near its level.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** *PI* is the worst of all within 512 tokens: it changed the step from one token
# to the next, on which every layer had learned to rely. This is no verdict on PI as published,
# which is finetuned; the last experiment comes back to it. *NTK-aware* scaling fails in the last
# blocks: pairs 8 to 14 are slowed by less than 4 and reach new angles one after the other. *YaRN*
# pays a little within 512 and stays near its level to the end. *Partial RoPE* is worse than plain
# already *inside* the trained range: the slow pairs did carry something. Pairs can stand still only
# in a model that was trained so.
#
# Two files are few, and blocks differ by what the files say there. Compare lines within a block,
# not blocks within a line.

# %% [markdown]
# ### The passkey, by length and depth
#
# `small` was trained to copy from its context (its card says how) and finds nearly every passkey
# within 512 tokens. Your `passkey_examples` and `passkey_accuracy` ask it at 400, 800 and 1,600
# tokens.

# %% tags=["experiment"]
filler = [token for ids in documents for token in ids]


def writer(
    model: Llama, frequencies: Tensor, factor: float
) -> Callable[[list[int], int], list[int]]:
    """write(prompt, count) by the likeliest token, with these frequencies from first to last."""

    @torch.inference_mode()
    def write(prompt: list[int], count: int) -> list[int]:
        cache, new, written = Cache(), list(prompt), []
        while len(written) < count:
            angles = angles_of(frequencies, len(new), len(cache))
            tokens = torch.tensor([new], device=profile.device)
            logits = logits_with(model, tokens, angles, factor, cache)
            new = [int(logits[0, -1].argmax())]
            written += new
        return written

    return write


lengths, depths = [400, 800, 1600], [0.1, 0.5, 0.9]
examples = passkey_examples(
    tokenizer.encode, filler, lengths, depths, torch.Generator().manual_seed(3), tokenizer.eos
)
grids = {}
for name in ("plain", "NTK-aware", "YaRN"):
    found = passkey_accuracy(writer(small, *methods[name]), examples)
    grids[name] = torch.tensor([[found[length, depth] for length in lengths] for depth in depths])
    print(
        f"{name:10}",
        {length: int(n) for length, n in zip(lengths, grids[name].sum(0), strict=True)},
    )

# %% tags=["experiment", "figure"]
# Figure: is the passkey found? By length and depth
fig, axes = plot.plt.subplots(1, 3, figsize=(9, 2.9), sharey=True)
for ax, (name, grid) in zip(axes, grids.items(), strict=True):
    ax.imshow(1 - grid, cmap="Greys", vmin=-0.25, vmax=1.6)
    for y in range(3):
        for x in range(3):
            word, color = ("found", "black") if grid[y, x] else ("lost", "white")
            ax.text(x, y, word, ha="center", va="center", fontsize=9, color=color)
    ax.set(xticks=range(3), xticklabels=lengths, yticks=range(3), xlabel="length (tokens)")
    ax.set_yticklabels([f"{depth:.0%}" for depth in depths])
    ax.set_title(name)
    ax.grid(False)
axes[0].set_ylabel("depth of the key")
plot.caption(
    fig,
    "One example in each cell, so read columns, not cells. Beyond 512 tokens the plain model finds "
    "nothing at any depth, although the key that stands at 90 % is near the question: new angles "
    "on far keys drown near ones. Scaled, `small` looks back farther than it was trained to.",
)
plot.plt.show()

# %% [markdown]
# With plain positions and 1,600 tokens, even the key at 90 % is lost. It stands about 170 tokens
# away, a distance that `small` masters within 512; but the same head scores more than a thousand
# other keys at angles that it never saw, and they drown it.
#
# In five draws of keys and places, plain positions found every key at 400 tokens and none beyond;
# at 1,600 NTK-aware scaling never found more than one of three, YaRN never fewer than two. YaRN had
# a price: at 400 tokens, where nothing was wrong, two of the five draws lost two of three keys. A
# low loss and a found key are two things, and both belong in a report.

# %% [markdown]
# ### A search on `tiny`
#
# Twenty-seven evaluations on one file are what a lesson can spend; the paper spends days. `tiny`
# starts from PI, NTK-aware scaling and YaRN (frequencies only). What the search finds is judged on
# two files that it has not seen.

# %% tags=["experiment"]
tiny, _ = models.load("tiny")
seeds = [w / methods[name][0] for name in ("PI", "NTK-aware", "YaRN")]
seeds = [f.clamp(min=1).cummax(0).values for f in seeds]  # equal factors may differ by a rounding


def long_loss(factors: Tensor, files: Tensor = rows[:1]) -> float:
    angles = longrope_rescale(w, torch.arange(LONG), factors)
    return float(token_losses(tiny, files, angles).mean())


best, best_loss = longrope_search(long_loss, seeds, SCALE, 3, 8, torch.Generator().manual_seed(0))
print("factors found:", " ".join(f"{f:.2f}" for f in best.tolist()))
print(f"on the search's file: YaRN {long_loss(seeds[2]):.3f}, found {best_loss:.3f}")
for name, factors in {"PI": seeds[0], "YaRN": seeds[2], "found": best}.items():
    print(f"on two other files: {name:6} {long_loss(factors, rows[2:4]):.3f}")

# %% [markdown]
# The search cannot end above its best seed on its own file: that is no finding. The other files
# are, and there its gain on YaRN is within a few hundredths of a nat, and not certain: of five
# seeds of the generator, with one generation more, four ended ahead of YaRN on other files and one
# behind it. All were far ahead of uniform PI. At this scale a good formula leaves little to find.
# The paper reports its large gains at scales from 8 to 512, where the formulas fail.

# %% [markdown]
# ### A stream, with sinks and without
#
# First, have our models a sink at all? The mean weight that each of their heads gives to the first
# token, from queries 100 on. Then `tiny` reads 700 tokens of each of eight files, one by one: with
# a window of 128; with 4 sinks and 124; and with everything kept, at positions up to 700.

# %% tags=["experiment"]
from llm40.models.heads import attention_weights

even = float((1 / torch.arange(101.0, 513)).mean())
for name, model in (("tiny", tiny), ("small", small)):
    weights = attention_weights(model, rows[:2, :512])  # (layers, batch, heads, seq, seq)
    on_first = weights[:, :, :, 100:, 0].mean((1, 3)).flatten()
    print(
        f"{name} on the first token: mean {on_first.mean():.4f}, "
        f"largest head {on_first.max():.3f}, even {even:.4f}"
    )
streams, held = {"all kept": token_losses(tiny, rows[:8, :701], angles_of(w, 700))}, {}
for name, sinks, window in (("window of 128", 0, 128), ("4 sinks and 124", 4, 124)):
    cache, steps = StreamingCache(sinks, window, w), []
    with torch.inference_mode():
        for i in range(700):
            logits = stream(tiny, rows[:8, i : i + 1], cache)
            steps.append(F.cross_entropy(logits, rows[:8, i + 1], reduction="none").cpu())
    streams[name], held[name] = torch.stack(steps, dim=1), len(cache)
print("tokens held at the end:", held)
for name, nats in streams.items():
    print(
        f"{name:16} tokens 128–512: {nats[:, 128:512].mean():.3f}, "
        f"beyond: {nats[:, 512:].mean():.3f}"
    )

# %% tags=["experiment", "figure"]
# Figure: no sink in these models, and none is missed
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 3))
axes[0].bar(range(len(on_first)), on_first.cpu().sort(descending=True).values, color=plot.COLORS[0])
axes[0].axhline(even, color="black", linestyle=":", linewidth=1.2)
axes[0].set(xlabel="heads of `small`, sorted", ylabel="weight on the first token", ylim=(0, 1))
axes[0].set_title("One head with a little")
plot.curves(
    torch.arange(50, 700, 100),
    {name: nats.view(len(nats), 7, 100).mean((0, 2)) for name, nats in streams.items()},
    xlabel="token of the stream (means of 100)",
    ylabel="loss of `tiny` (nats)",
    title="With sinks and without: one line",
    ax=axes[1],
)
axes[1].axvline(TRAINED, color="#888888", linewidth=1)
place = axes[1].get_xaxis_transform()  # x in tokens, y a share of the axis
axes[1].text(
    TRAINED + 5, 0.97, "trained to here", transform=place, va="top", fontsize=9, color="#555555"
)
plot.caption(
    fig,
    "Left: a head with a sink as in LLaMA would reach 0.5 and more; dotted, an even spread. Right: "
    "the two streaming lines lie on each other, and hold 128 tokens to the end. With everything "
    "kept the loss is lower inside the trained range, for it sees more, and rises beyond it.",
)
plot.plt.show()

# %% [markdown]
# StreamingLLM's collapse does not show here: a model without a sink loses nothing with its first
# tokens. Sinks grow in longer training, in larger models. Nor does the stream remember: a passkey
# that has left the window is gone, however long the text that the cache survives. Its length is
# endless; its context is the window.
#
# gpt-oss gives each head a learned logit that joins the softmax's denominator and has no value: a
# sink that takes no place in the cache.

# %% [markdown]
# ### A bonus: a few steps of finetuning
#
# Do a few steps mend what the figures show broken? `tiny` gets eight steps, long texts and short
# ones in turn, from the files it was trained on: once with PI, once with NTK-aware scaling. It is
# judged on two held-out files. Write down first which of the two you would take to production.

# %% tags=["experiment"]
text = [tokenizer.encode(training[name]) for name in sorted(training)[40:60]]
pool = torch.tensor([token for ids in text for token in [tokenizer.eos, *ids]])
pool = pool[: 8 * (LONG + 1)].view(8, LONG + 1).to(profile.device)
batches = [row[None] if i % 2 == 0 else row[:LONG].view(4, -1) for i, row in enumerate(pool)]
for name in ("PI", "NTK-aware"):
    model, _ = models.load("tiny")  # as shipped, each time
    for steps in (0, len(batches)):
        finetune_longer(model, methods[name][0], 1.0, batches[:steps], lr=1e-3)
        nats = token_losses(model, rows[:2], angles_of(methods[name][0], LONG))
        print(
            f"{name:9} after {steps} steps: within 512 {nats[:, :512].mean():.2f}, "
            f"beyond {nats[:, 512:].mean():.2f}"
        )
torch.set_num_threads(threads)

# %% [markdown]
# With other training files, five draws of them, the direction was the same each time: beyond 512
# both gain a fifth to a third of a nat in eight steps. NTK-aware scaling's failing last blocks are
# mended; within 512 it pays about a tenth at most. PI gains at both ends and stays far behind, for
# eight steps are not the thousand of its paper: it has to learn neighbors anew. A method that
# starts near the old model needs less training. YaRN's authors claim just that for it: a tenth of
# the tokens and two fifths of the steps of earlier methods.

# %% [markdown]
# ## On a GPU: 32,768 tokens in one pass
#
# The roadmap's project: a context of 32K. What stands in the way is not the cache but the matrix of
# scores, which a flash kernel (lesson 29) never stores. The cell does the arithmetic for `small`;
# on a GPU it also runs the pass, in bfloat16, with PyTorch's flash attention and nothing else
# allowed, and prints time, memory and loss by position, plain and with YaRN at scale 64. We had no
# GPU to run that branch on: its numbers are yours. Expect no good loss at 64 times the trained
# length without finetuning; what is shown is that it fits.

# %% tags=["experiment"]
REACH = 32_768
config = small.config
cache_bytes = config.layers * 2 * config.kv_heads * config.head_dim * 2 * REACH
score_bytes = config.heads * REACH**2 * 2
attention_flops = config.layers * 2 * REACH**2 * config.hidden_size  # q·k and w·v, half masked
linear_flops = 2 * sum(p.numel() for p in small.parameters()) * REACH
print(f"cache in 16 bits: {cache_bytes / 2**20:.0f} MiB for all {config.layers} layers")
print(f"scores in 16 bits, if they were stored: {score_bytes / 2**30:.0f} GiB for one layer")
print(
    f"attention {attention_flops / 1e12:.2f} TFLOP, "
    f"all products with weights {linear_flops / 1e12:.2f}"
)
if profile.name == "gpu":
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half, _ = models.load("small")
    half = half.to(torch.bfloat16)
    text = torch.tensor([([tokenizer.eos, *filler] * 9)[: REACH + 1]], device=profile.device)
    choices = {
        "plain": (w, 1.0),
        "YaRN, scale 64": yarn_frequencies(32, 10_000.0, REACH / TRAINED, TRAINED),
    }
    for name, (frequencies, factor) in choices.items():
        angles = angles_of(frequencies, REACH).to(profile.device)
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            logits_with(half, text[:, :-1], angles, factor)  # the first pass loads kernels
            start.record()
            logits = logits_with(half, text[:, :-1], angles, factor)
            end.record()
        torch.cuda.synchronize()
        nats = torch.cat(
            [
                F.cross_entropy(a.float(), b, reduction="none")
                for a, b in zip(logits[0].split(4096), text[0, 1:].split(4096), strict=True)
            ]
        )
        print(
            f"{name}: {start.elapsed_time(end):.1f} ms, "
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
        )
        print(
            "  nats by blocks of 4,096:",
            " ".join(f"{b:.2f}" for b in nats.view(-1, 4096).mean(1).tolist()),
        )

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number or a choice are
# graded, one by one.


# %% exercise="questions" minutes=15 difficulty=2 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers; numbers to 1 permille, whole numbers exactly.

    "logits":    by which factor does YaRN multiply attention logits at scale 16?
    "cache":     a model of 32 layers, 8 key-value heads of dimension 128: how many GiB is the cache
                 of 131,072 tokens in 16-bit numbers, keys and values?
    "unturned":  head dimension 128, base 10,000, trained on 4,096 tokens: how many of the 64 pairs
                 never finish a turn in training? (a whole number)
    "recompute": dynamic NTK, and the text grows beyond the trained length. What in a cache of
                 rotated keys and of values must be made anew, for scores that depend on
                 distance alone: "keys", "values", "both", "neither"?
    "place":     StreamingLLM with 4 sinks and a window of 1,020. The millionth token arrives: at
                 which position (from 0) is its query turned? (a whole number)
    "sink":      the first token holds 0.8 of a head's attention, and is dropped from the cache. By
                 which factor do the other weights of that head grow?
    """
    ### BEGIN SOLUTION
    return {
        "logits": (0.1 * math.log(16) + 1) ** 2,
        "cache": 131_072 * 2 * 32 * 8 * 128 * 2 / 2**30,
        "unturned": int((4096 * rope_frequencies(128) < math.tau).sum()),
        "recompute": "keys",
        "place": 4 + 1020 - 1,
        "sink": 1 / (1 - 0.8),
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["logits"]
checks.kind(answer, float, what="logits")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.63140,
    to=1e-3,
    what="logits",
    hint="Both the query and the key carry the factor",
    mistakes={"the factor on cos and sin": 1.27726, "the temperature t": 0.61297},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["cache"]
checks.kind(answer, float, what="cache")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    16.0,
    to=1e-3,
    what="cache",
    mistakes={"keys alone": 8.0, "float32": 32.0, "gigabytes": 17.179869},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["unturned"]
checks.kind(answer, int, what="unturned")
### BEGIN HIDDEN TESTS
# 10,000^(i/64) > 4096/2π = 651.9 from i = 45.03 on: i = 46 … 63.
checks.number(
    answer,
    18,
    to=0,
    what="unturned",
    hint="A turn is 2π radians",
    mistakes={"radians for turns": 6, "pairs that do": 46},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["recompute"]
assert answer in ("keys", "values", "both", "neither"), f"yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "keys", "What of a cached token depends on the base that it was turned with?"
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["place"]
checks.kind(answer, int, what="place")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1023,
    to=0,
    what="place",
    hint="Positions are places in the cache, from 0",
    mistakes={
        "the number of tokens held": 1024,
        "the position in the text": 999_999,
        "the window's": 1019,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["sink"]
checks.kind(answer, float, what="sink")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    5.0,
    to=1e-3,
    what="sink",
    mistakes={"1/0.8": 1.25, "1 + 0.8": 1.8, "the growth alone": 4.0},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** A vendor says: a million tokens of context, passkey found at every depth.
# Name two things that this does not show, and how you would measure them.

# %% [markdown] answer="vendor"
# A passkey is one odd sentence in unrelated text, and asks for a copy. It shows neither that
# several facts can be combined (several needles, chains of assignments, counts over the whole text:
# RULER's tasks) nor that a fact is found whose words are not those of the question. It says nothing
# about plain quality either: compare the loss of the *same* tokens with 2K, 32K and a million
# tokens before them; a model that uses its context gets better with more of it. And measure short
# prompts before and after the extension, since that is what most requests are.

# %% [markdown]
# **Open question 2.** You serve a model with YaRN at scale 4 for all requests. Most are shorter
# than the trained length. What do you lose, and what would switching by length cost?

# %% [markdown] answer="static"
# Short requests pay the small rise that the first blocks of the figure show: slowed pairs,
# sharpened softmax. Switching to plain frequencies for short requests removes it, but a
# conversation that grows across the boundary has its keys rotated in the old way: cache unrotated
# keys, or run the prompt again at the switch. Prefix caches must not be shared across the two, and
# batches need a table of cos and sin for each request. That is why many servers apply one static
# scale, and model cards advise to switch it on only where long texts are expected.

# %% [markdown]
# ## References
#
# - **Chen et al. 2023**, *Extending Context Window of Large Language Models via Positional
#   Interpolation*, arXiv:2306.15595. Section 2.3 for the bound, 3 for how few steps suffice.
# - **Peng et al. 2023**, *YaRN: Efficient Context Window Extension of Large Language Models*,
#   arXiv:2309.00071. Section 3 has NTK-aware, by parts and dynamic scaling in one notation; compare
#   its ramp with the code.
# - **Ding et al. 2024**, *LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens*,
#   arXiv:2402.13753. Section 2.2 for the findings, 3.2 and algorithm 1 for the search.
# - **Xiao et al. 2023**, *Efficient Streaming Language Models with Attention Sinks*,
#   arXiv:2309.17453. Section 3.1 for why the first token, 3.2 for positions in the cache.
# - **Mohtashami and Jaggi 2023**, *Landmark Attention: Random-Access Infinite Context Length for
#   Transformers*, arXiv:2305.16300. Its passkey prompt.
# - **Tancik et al. 2020**, *Fourier Features Let Networks Learn High Frequency Functions in Low
#   Dimensional Domains*, arXiv:2006.10739. Where the name NTK comes from.
# - **Hsieh et al. 2024**, *RULER: What's the Real Context Size of Your Long-Context Language
#   Models?*, arXiv:2404.06654. What passkeys do not show.
#
# In production: Hugging Face transformers, `modeling_rope_utils.py` (`linear`, `dynamic`, `yarn`,
# `longrope`, `llama3`, `proportional`), whose tables multiply cos and sin by `attention_factor`;
# mit-han-lab/streaming-llm, `streaming_llm/kv_cache.py`; jquesnelle/yarn; microsoft/LongRoPE,
# `evolution/`. KV caches are lesson 28, flash attention lesson 29.
