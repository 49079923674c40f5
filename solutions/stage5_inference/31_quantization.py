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
#       A model's weights in 8, 4 and 3 bits: rounding, SmoothQuant, GPTQ, AWQ, rotations, training
#       with rounded weights, and a Triton kernel that multiplies with packed 4-bit weights.
#     gpu: "The kernel at full size, beside cuBLAS in bfloat16 and PyTorch's own int4 product."
# ---

# %% [markdown]
# ## The problem: every token reads every weight
#
# To write one token, a model reads all of its weights once. A model of 70 billion parameters in
# bfloat16 is 140 GB; at 4.8 TB/s, the memory speed of an H200, that takes 29 milliseconds, and
# nothing that happens in the arithmetic units makes it faster. (Lesson 28 derives this: decode is
# limited by bytes, not by FLOPs.) The weights also fill its 141 GB: nothing else fits beside them.
#
# In 4 bits the same weights are 35 GB and a bit: they leave room, and are read in a quarter of
# the time. The arithmetic may stay as it is. A kernel loads four bits, turns them into a bfloat16
# number in a register, and multiplies.
#
# What four bits cost is the subject of this lesson. Sixteen levels have to stand for all the
# weights that share a scale. The nearest level is off by up to half a step, and an output adds up
# as many of these errors as it has inputs. The methods differ in where they put the levels, and in
# what they do about the error once it is made.

# %% [markdown]
# ## Core ideas
#
# - **Quantization** stores a number as a small whole number, its **code**, and a **scale** that
#   many numbers share. Few numbers to a scale (a **group**) mean small steps and many scales.
# - Weights are easy: they are known beforehand and spread evenly. Activations are hard: some
#   channels are far larger than the rest (**outliers**), and a shared scale follows the largest.
# - Three answers to outliers: keep them in full precision (LLM.int8), move them into the weights
#   (SmoothQuant), turn the coordinates until there are none (rotations).
# - Round-to-nearest minimizes, for given scales, the error of each weight. What matters is that of
#   the *output*. GPTQ lets later weights make up for the errors of earlier ones; AWQ protects the
#   weights that meet large inputs.
# - Where all of that is not enough, train with rounded weights (**quantization-aware training**).
#
# "W4A16" means weights in 4 bits, activations in 16; "W8A8" both in 8.
#
# | symbol | in code | is |
# |---|---|---|
# | $W$ | `weight`, `w` | a matrix `(rows, columns)`, as in `nn.Linear`: the product is $XW^\top$ |
# | $X$ | `x` | inputs `(tokens, columns)` |
# | $b$ | `bits` | bits of a code |
# | $\Delta$, $z$ | `scale`, `zero` | size of a step; the code that means 0 |
# | $\hat w$ | | a weight as it is read back |

# %%
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile, tl, triton
from llm40.kernels import autotuned
from torch import Tensor, nn

plt = plot.plt
torch.set_num_threads(1)  # small matrices: a second thread would cost more than it brings


# %% tags=["support"]
# Support: normal numbers on the CPU, and rounding by hand: one number at a time, in Python
def normal(*shape: int, **options) -> Tensor:
    """As checks.randn, on the CPU, with a GPU too."""
    return checks.randn(*shape, **options).cpu()


def ranges(shape: tuple[int, int], group) -> list[list[list[tuple[int, int]]]]:
    """The places (row, column) that share a scale: [row of scales][column of scales][place]."""
    rows, columns = shape
    if group == "tensor":
        return [[[(i, j) for i in range(rows) for j in range(columns)]]]
    size = columns if group == "channel" else group
    return [
        [[(i, j) for j in range(start, start + size)] for start in range(0, columns, size)]
        for i in range(rows)
    ]


def by_hand(w: Tensor, bits: int, group, symmetric: bool = False):
    """(codes, scale, zero, tie) of a matrix, float64; tie: the number lies between two codes."""
    values = w.double().tolist()
    cut = ranges(tuple(w.shape), group)
    codes, tie = torch.zeros(w.shape, dtype=torch.long), torch.zeros(w.shape, dtype=torch.bool)
    scale = torch.zeros(len(cut), len(cut[0]), dtype=torch.float64)
    zero = torch.zeros(len(cut), len(cut[0]), dtype=torch.long)
    for a, line in enumerate(cut):
        for b, places in enumerate(line):
            held = [values[i][j] for i, j in places]
            if symmetric:
                top = 2 ** (bits - 1) - 1
                step, z, least = max(map(abs, held)) / top, 0, -top
            else:
                top, least = 2**bits - 1, 0
                step = (max(*held, 0.0) - min(*held, 0.0)) / top
                z = 0 if step == 0 else round(-min(*held, 0.0) / step)
                if step and abs(abs(-min(*held, 0.0) / step - z) - 0.5) < 1e-4:
                    tie[[i for i, _ in places], [j for _, j in places]] = True
            step = step or 1.0
            scale[a, b], zero[a, b] = step, z
            for (i, j), value in zip(places, held, strict=True):
                codes[i, j] = min(max(round(value / step) + z, least), top)
                tie[i, j] |= abs(abs(value / step - round(value / step)) - 0.5) < 1e-4
    return codes, scale, zero, tie


def spread(t: Tensor, w: Tensor) -> Tensor:
    """Scales or zero points, repeated to the shape of the matrix w."""
    rows, columns = (n // m for n, m in zip(w.shape, t.shape, strict=True))
    return t.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def read_back(w: Tensor, bits: int, group, symmetric: bool = False) -> Tensor:
    """What becomes of a matrix, float64: each number goes to the nearest of its range's levels."""
    size = {"tensor": w.numel(), "channel": w.shape[1]}.get(group, group)
    cut = w.double().reshape(-1, size, 1)
    low, high = cut.amin(1, keepdim=True).clamp(max=0), cut.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        levels = torch.linspace(-1, 1, 2**bits - 1, dtype=torch.float64) * high
    else:
        step = (high - low).clamp(min=1e-300) / (2**bits - 1)
        levels = (torch.arange(2**bits) - torch.round(-low / step)) * step
    nearest = (cut - levels).abs().argmin(-1, keepdim=True)
    return torch.take_along_dim(levels, nearest, -1).reshape(w.shape)


# %% [markdown]
# ## Rounding with a zero {#affine}
#
# A group of weights spans $[\text{low}, \text{high}]$. **Affine** (asymmetric) quantization lays
# $2^b$ levels over it, $\Delta$ apart:
#
# $$\Delta = \frac{\text{high} - \text{low}}{2^b - 1}, \qquad
# z = \mathrm{round}\Big(\frac{-\text{low}}{\Delta}\Big), \qquad
# c = \mathrm{round}\Big(\frac{w}{\Delta}\Big) + z, \qquad \hat w = \Delta\,(c - z).$$
#
# The **zero point** $z$ is a code, a whole number, so that $w = 0$ comes back as exactly 0. That
# matters: zeros are special (padding, pruned weights, a ReLU's outputs), and a zero that comes back
# as 0.01 adds the same small error to every sum it takes part in. For $z$ to be one of the codes,
# the range must contain 0; so take $\text{low} = \min(0, \min w)$ and $\text{high} = \max(0, \max
# w)$.
#
# **The error is at most $\Delta/2$.** Inside, because $w/\Delta$ is rounded to the nearest whole
# number. At the ends one has to look: rounding $z$ shifts the levels by up to half a step. With
# $-\text{low}/\Delta = z + \delta$, $|\delta| \le \frac12$, the levels run from $\text{low} +
# \delta\Delta$ to $\text{high} + \delta\Delta$. The end that sticks out does so by $|\delta|\Delta
# \le \Delta/2$ and rounds to the last level (in a tie past it: hence the clamp). So the bound holds
# there too.
#
# **Who shares a scale?** All numbers of the matrix (*per tensor*), a row (*per channel*: a row of
# `nn.Linear.weight` makes one output channel), or $G$ consecutive numbers of a row (*per group*).
# Scales must not vary along the summed axis within one integer product, but a kernel that
# dequantizes before it multiplies may have as many groups as it likes.

# %% [markdown]
# ### Exercise · Codes, scale, zero point


# %% exercise="affine" minutes=18 difficulty=2
def quantize_affine(
    w: Tensor, bits: int, group: str | int = "channel"
) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as codes, scales and zero points.

    w: (rows, columns), any floating format, finite, magnitudes up to 1e30 and, where not 0, at
        least 1e-30; unchanged. bits: 1 to 8.
    group: which numbers share a range. "tensor": all. "channel": those of a row. A whole number:
        so many consecutive numbers of a row. ValueError where that is below 1 or does not divide
        columns.

    Returns (codes, scale, zero). codes: like w, uint8, from 0 to 2**bits − 1. scale and zero: one
    for each range: (1, 1) for "tensor", (rows, 1) for "channel", (rows, columns // group)
    otherwise; scale float32 (float64 for float64 w), zero uint8.

    In a range, low is its smallest number or 0, high its largest or 0, whichever is further out;
    scale = (high − low) / (2**bits − 1), zero = round(−low / scale), and a code is round(w / scale)
    + zero, clamped to what codes can be. round is torch.round. Computed in float32 (float64 for
    float64 w). A range of zeros has scale 1 and zero 0.

    bits=2, the row (−1, 0, 0.5, 2): scale 1, zero 1, codes 0, 1, 1, 3 (0.5 is rounded to even).
    """
    ### BEGIN SOLUTION
    rows, columns = w.shape
    if isinstance(group, int) and (group < 1 or columns % group):
        raise ValueError(f"groups of {group} do not fill rows of {columns}")
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    size = {"tensor": (1, 1, -1), "channel": (rows, 1, columns)}.get(group, (rows, -1, group))
    cut = wide.reshape(size)
    low, high = cut.amin(-1, keepdim=True).clamp(max=0), cut.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, 1, scale)
    zero = torch.round(-low / scale)
    codes = (torch.round(cut / scale) + zero).clamp(0, 2**bits - 1)
    return codes.reshape(w.shape).to(torch.uint8), scale[..., 0], zero[..., 0].to(torch.uint8)
    ### END SOLUTION


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The numbers that codes stand for, scale · (code − zero), in scale's format.

    codes: (rows, columns), uint8 or int8. scale: (1, 1), (rows, 1) or (rows, n) with n dividing
    columns: then each scale holds for columns / n consecutive codes of its row. zero: uint8, of
    scale's shape; None means 0. Nothing is changed.
    """
    ### BEGIN SOLUTION
    cut = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    if zero is not None:
        cut = cut - zero[..., None].to(scale.dtype)
    return (cut * scale[..., None]).flatten(1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three groupings, one code</summary>
#
# Make the numbers that share a range the last axis: `reshape(1, 1, -1)` for the tensor,
# `reshape(rows, -1, group)` otherwise. Then minimum and maximum go over the last axis, with
# `keepdim=True`, and everything broadcasts.
# </details>
#
# <details><summary>Hint: 3 − 5 = 254</summary>
#
# Codes are uint8, which has no negative numbers. Convert before you subtract.
# </details>

# %% check="affine" points=2
w = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [0.0, 3.0, 6.0, 2.0]])
codes, scale, zero = checks.parts(quantize_affine(w, bits=2), "codes", "scale", "zero")
checks.close(scale, torch.tensor([[1.0], [2.0]]), what="scale", dtype=torch.float32)
checks.close(zero, torch.tensor([[1], [0]], dtype=torch.uint8), what="zero", dtype=torch.uint8)
checks.close(
    codes,
    torch.tensor([[0, 1, 1, 3], [0, 2, 3, 1]], dtype=torch.uint8),
    what="codes",
    dtype=torch.uint8,
    hint="3 / 2 lies in the middle, and torch.round takes the even code, 2.",
)
checks.close(
    dequantize(codes, scale, zero),
    torch.tensor([[-1.0, 0.0, 0.0, 2.0], [0.0, 4.0, 6.0, 2.0]]),
    what="dequantize",
    dtype=torch.float32,
)
### BEGIN HIDDEN TESTS
gen = checks.generator(1)
for bits, group in [(8, "tensor"), (4, "channel"), (3, 8), (1, 4), (2, 1), (5, 24), (8, 6)]:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        w = normal(5, 24, generator=gen, scale=3.0).to(dtype)
        w[1] += 2  # one row far from 0, on its right
        w[2] = -w[2].abs() - 5  # one that is negative throughout
        w[3] *= 1e-3
        w = w.T.contiguous().T  # not contiguous
        with checks.unchanged(w=w):
            codes, scale, zero = checks.parts(
                quantize_affine(w, bits, group), "codes", "scale", "zero"
            )
        right, step, z, tie = by_hand(w, bits, group)
        where = f"{bits} bits, group {group!r}, w in {dtype}."
        kept = torch.promote_types(dtype, torch.float32)
        checks.close(scale, step.to(kept), what="scale", dtype=kept, hint=where)
        assert codes.dtype == zero.dtype == torch.uint8, "codes and zero are uint8"
        assert codes.shape == w.shape, f"codes have shape {tuple(codes.shape)}, w {tuple(w.shape)}"
        wrong = (codes.long() - right).abs() * ~tie
        assert not wrong.any(), (
            f"{int((wrong > 0).sum())} of {wrong.numel()} codes are wrong, the first at "
            f"{wrong.nonzero()[0].tolist()}. {where} Is all of it computed in {kept}?"
        )
        checks.close(spread(zero, w)[~tie].long(), spread(z, w)[~tie], what="zero", hint=where)
        with checks.unchanged(codes=codes, scale=scale, zero=zero):
            back = dequantize(codes, scale, zero)
        checks.close(
            back,
            spread(scale, w) * (codes.long() - spread(zero, w).long()),
            what="dequantize",
            dtype=kept,
            hint=where,
        )
        # The law of the section: off by half a step at most.
        off = (back.double() - w.double()).abs() / spread(step, w)
        assert float(off.max()) <= 0.5005, (
            f"a number is off by {float(off.max()):.3f} steps; half a step is the most. {where}"
        )
### END HIDDEN TESTS

# %% check="affine" points=1
# Groups of two: each row has two ranges. Zeros stay zeros.
w = torch.tensor([[0.0, 3.0, -30.0, 0.0], [0.0, 0.0, 5.0, 5.0]])
codes, scale, zero = quantize_affine(w, 2, group=2)
checks.close(scale, torch.tensor([[1.0, 10.0], [1.0, 5 / 3]]), what="scale in groups of two")
checks.close(zero.long(), torch.tensor([[0, 3], [0, 0]]), what="zero in groups of two")
checks.close(dequantize(codes, scale, zero), w, what="dequantize in groups of two")
### BEGIN HIDDEN TESTS
for group, size in (("tensor", (1, 1)), ("channel", (3, 1)), (4, (3, 2)), (1, (3, 8))):
    zeros = torch.zeros(3, 8)
    codes, scale, zero = quantize_affine(zeros, 4, group)
    checks.close(scale, torch.ones(size), what=f"scale of zeros, group {group!r}")
    checks.close(zero.long(), torch.zeros(size).long(), what="zero of zeros")
    checks.close(dequantize(codes, scale, zero), zeros, what="zeros")
gen = checks.generator(2)
for bits in (1, 2, 3, 5, 8):
    for center in (-40.0, -3.0, 0.3, 7.0, 1000.0):
        w = normal(4, 16, generator=gen) + center
        w[:, 3], w[:, 9] = 0.0, -0.0
        for group in ("tensor", "channel", 8):
            found = dequantize(*quantize_affine(w, bits, group))
            assert not found[:, [3, 9]].any(), (
                f"0 comes back as {float(found[:, 3].abs().max()):.3g} ({bits} bits, numbers "
                f"around {center:g}): the zero point is a whole number, and 0 lies in the range"
            )
for tiny in (1e-30, 1e30):
    w = normal(2, 8, generator=gen).clamp(0.1) * tiny
    found = dequantize(*quantize_affine(w, 8))
    checks.close(found, read_back(w, 8, "channel"), what=f"numbers near {tiny:g}", rtol=1e-2)
for bits in (1, 2, 3, 4, 8):  # a range that lies evenly around 0: its zero point is a tie
    top = (2**bits - 1) / 2
    w = torch.tensor([[-top, 0.0, top, 0.25 * top]])
    codes, scale, zero = quantize_affine(w, bits)
    right, step, z, _ = by_hand(w, bits, "channel")
    where = f"the row {w[0].tolist()} in {bits} bits: {top} / 1 + {int(z)} passes the last code"
    checks.close(codes.long(), right, what="codes", hint=where)
    checks.close(zero.long(), z, what="zero", hint=where)
constant = torch.full((2, 6), 0.7)
found = dequantize(*quantize_affine(-constant, 3))
checks.close(found, -constant, what="a range of equal numbers")
for wrong in (5, 7, 8, 24, 0, -4):
    checks.raises(
        ValueError, quantize_affine, torch.ones(2, 12), 4, wrong, because=f"{wrong} of 12 columns"
    )
whole = torch.arange(256, dtype=torch.uint8).view(2, 128)
found = dequantize(whole, torch.full((2, 1), 0.5), torch.full((2, 1), 200, dtype=torch.uint8))
checks.close(found, (torch.arange(256.0).view(2, 128) - 200) / 2, what="codes below zero's code")
signed = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
for dtype in (torch.float64, torch.float16):
    found = dequantize(signed, torch.tensor([[0.5, 2.0]], dtype=dtype))
    checks.close(
        found,
        torch.tensor([[-64.0, -0.5, 0.0, 254.0]], dtype=dtype),
        what=f"int8 codes, no zero, scale in {dtype}",
        dtype=dtype,
    )
for dtype in (torch.float16, torch.bfloat16):
    step = torch.tensor([[400.0], [0.1]]).to(dtype)  # 400 · 201 passes float16's 65,504
    found = dequantize(whole, step, torch.full((2, 1), 200, dtype=torch.uint8))
    expected = (step.double() * (whole.double() - 200)).to(dtype)
    hint = "The zero point comes off the codes, before the scale multiplies."
    checks.close(found, expected, what=f"scale in {dtype}", dtype=dtype, hint=hint)
### END HIDDEN TESTS

# %% [markdown]
# ### Symmetric
#
# **Symmetric** quantization has no zero point: $c = \mathrm{round}(w/\Delta)$ with $\Delta =
# \max|w|/(2^{b-1} - 1)$. Codes run from $-127$ to $127$ in 8 bits; the pattern for $-128$ stays
# unused, so that $-w$ has the negated code of $w$. A product of two symmetric matrices needs only
# integer sums: $\sum_k \Delta_x c^x_k\,\Delta_w c^w_k = \Delta_x\Delta_w \sum_k c^x_k c^w_k$. With
# zero points three correction terms would join in.
#
# Weights of a trained layer are nearly symmetric around 0, so at 8 bits next to nothing is lost. At
# 2 bits it leaves three of four levels.
#
# ### Exercise · Without a zero point


# %% exercise="symmetric" minutes=8 difficulty=1
def quantize_symmetric(w: Tensor, bits: int, group: str | int = "channel") -> tuple[Tensor, Tensor]:
    """A matrix as signed codes and scales: `quantize_affine` without a zero point.

    w, group, the scales' shape and format, the format of the computation, and ValueError as there.
    bits: 2 to 8. Returns (codes, scale): codes like w, int8, from −q to q with q = 2**(bits−1) − 1;
    scale = max|w| / q of a range, 1 where all are 0. A code is torch.round(w / scale).

    bits=3, the row (−6, 1, 3, 5): scale 2, codes −3, 0, 2, 2 (0.5, 1.5 and 2.5 go to even).
    """
    ### BEGIN SOLUTION
    rows, columns = w.shape
    if isinstance(group, int) and (group < 1 or columns % group):
        raise ValueError(f"groups of {group} do not fill rows of {columns}")
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    size = {"tensor": (1, 1, -1), "channel": (rows, 1, columns)}.get(group, (rows, -1, group))
    cut, q = wide.reshape(size), 2 ** (bits - 1) - 1
    scale = cut.abs().amax(-1, keepdim=True) / q
    scale = torch.where(scale == 0, 1, scale)
    codes = torch.round(cut / scale).clamp(-q, q)
    return codes.reshape(w.shape).to(torch.int8), scale[..., 0]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what changes</summary>
#
# The reshaping is that of [](#affine). One number describes a range now: its largest magnitude.
# </details>

# %% check="symmetric" points=1
w = torch.tensor([[-6.0, 1.0, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
codes, scale = checks.parts(quantize_symmetric(w, bits=3), "codes", "scale")
checks.close(
    scale,
    torch.tensor([[2.0], [1.0]]),
    what="scale",
    dtype=torch.float32,
    mistakes={"2**bits − 1 steps": torch.tensor([[6 / 7], [1.0]])},
)
checks.close(
    codes,
    torch.tensor([[-3, 0, 2, 2], [0, 0, 0, 0]], dtype=torch.int8),
    what="codes",
    dtype=torch.int8,
)
### BEGIN HIDDEN TESTS
gen = checks.generator(3)
for bits, group in [(8, "tensor"), (4, "channel"), (3, 8), (2, 4), (5, 1), (8, 24)]:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        w = normal(5, 24, generator=gen, scale=3.0).to(dtype)
        w[1] += 2
        w[2] = -w[2].abs() - 5
        w = w.T.contiguous().T
        with checks.unchanged(w=w):
            codes, scale = checks.parts(quantize_symmetric(w, bits, group), "codes", "scale")
        right, step, _, tie = by_hand(w, bits, group, symmetric=True)
        where = f"{bits} bits, group {group!r}, w in {dtype}."
        kept = torch.promote_types(dtype, torch.float32)
        checks.close(scale, step.to(kept), what="scale", dtype=kept, hint=where)
        assert codes.dtype == torch.int8, f"codes are int8, yours are {codes.dtype}"
        assert codes.shape == w.shape, f"codes have shape {tuple(codes.shape)}, w {tuple(w.shape)}"
        wrong = (codes.long() - right).abs() * ~tie
        assert not wrong.any(), (
            f"{int((wrong > 0).sum())} of {wrong.numel()} codes are wrong, the first at "
            f"{wrong.nonzero()[0].tolist()}. {where}"
        )
        again, _ = quantize_symmetric(-w, bits, group)
        checks.close(again.long(), -codes.long(), what="the codes of −w", hint=where)
for wrong in (5, 8, 24, 0, -4):
    checks.raises(
        ValueError,
        quantize_symmetric,
        torch.ones(2, 12),
        4,
        wrong,
        because=f"{wrong} of 12 columns",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### What a finer scale buys
#
# The next cells take one real matrix of the course's `small` model and round it with your
# functions. **Write down first:** at 3 bits, do groups of 32 halve the error of one scale per
# matrix? And does it matter whether there is a zero point?

# %% tags=["experiment"]
small, tokenizer = models.load("small", device="cpu")
small.requires_grad_(False)
held_out, training = (
    data.split(data.documentation())[side] | data.split(data.source_code())[side] for side in (1, 0)
)


def texts(documents: dict[str, str], count: int, length: int) -> Tensor:
    """The beginnings of `count` documents, spread over all that are long enough."""
    long = [text for text in documents.values() if len(text) > 6 * length]
    chosen = [long[i * len(long) // count] for i in range(count)]
    ids = [[tokenizer.eos, *tokenizer.encode(text[: 12 * length])] for text in chosen]
    return torch.tensor([line[:length] for line in ids])


def relative(value: Tensor, exact: Tensor) -> float:
    return 100 * float((value - exact).norm() / exact.norm())


def rounded(w: Tensor, bits: int, group) -> Tensor:
    return dequantize(*quantize_affine(w, bits, group))


matrix = small.layers[2].mlp.up_proj.weight
widths = [2, 3, 4, 5, 6, 8]
errors = {
    f"{name}, {kind}": [relative(dequantize(*quantize(matrix, b, group)), matrix) for b in widths]
    for name, group in (("per tensor", "tensor"), ("per row", "channel"), ("groups of 32", 32))
    for kind, quantize in (("affine", quantize_affine), ("symmetric", quantize_symmetric))
}
print("error in % of the matrix's norm:")
for name, line in errors.items():
    print(
        f"  {name:24}", "  ".join(f"{b} bits {e:5.1f}" for b, e in zip(widths, line, strict=True))
    )

# %% tags=["experiment", "figure"]
# Figure: the levels that three kinds of scale lay over the same weights
fig, axes = plt.subplots(1, 2, figsize=(11.5, 4.2), width_ratios=[1.35, 1])
row = int(matrix.abs().amax(1).argmin())  # a quiet row, which suffers from the others most
shown = matrix[row, :64]
for base, group in ((2, "tensor"), (1, "channel"), (0, 32)):
    codes, scale, zero = quantize_affine(matrix, 3, group)
    for part in range(2 if group == 32 else 1):
        held = (row if scale.shape[0] > 1 else 0, part)
        levels = float(scale[held]) * (torch.arange(8) - int(zero[held]))
        ends = (32 * part, 32 * part + 32) if group == 32 else (0, 64)
        low, high = float(shown.min()) * 1.25, float(shown.max()) * 1.25
        for level in levels.tolist():
            if low <= level <= high:
                y = base + 0.85 * (level - low) / (high - low)
                axes[0].plot(ends, [y, y], color="#999999", linewidth=1, linestyle="-")
    back = dequantize(codes, scale, zero)[row, :64]
    for values, marker, color, size in (
        (shown, ".", plot.COLORS[2], 18),
        (back, "o", plot.COLORS[1], 14),
    ):
        heights = base + 0.85 * (values - low) / (high - low)
        filled = color if marker == "." else "none"
        axes[0].scatter(range(64), heights, s=size, marker=marker, color=filled, edgecolors=color)
axes[0].set_yticks([2.42, 1.42, 0.42], ["per tensor", "per row", "groups\nof 32"])
axes[0].set(xlabel=f"column (row {row} of the matrix)", ylim=(-0.1, 3))
axes[0].set_title("64 weights (dots) on levels of 3 bits (lines)")
axes[0].grid(False)
plot.curves(
    widths,
    errors,
    logy=True,
    xlabel="bits",
    ylabel="% error of the matrix",
    title="all of the matrix",
    ax=axes[1],
)
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Left: the quietest row of a real matrix, and where its weights (black) land (orange rings). "
    "One scale for the matrix sends all of them to 0; its own range uses the levels; two ranges "
    "of 32 fit closer still. Right: each bit halves the error. A scale for each row is worth about "
    "one bit, groups of 32 a part of a bit more, and symmetric levels lose the more the fewer "
    "there are.",
)
plt.show()

# %% [markdown]
# ## Outliers {#outliers}
#
# Now round the *inputs* too. Then the product itself can run on the GPU's integer units, at twice
# the rate of bfloat16: W8A8. Each token (a row of $X$) gets a scale, known only when the token is
# there.
#
# This works until models grow. Dettmers et al. (2022) found that from about 6.7 billion parameters
# on a few hidden channels, the same in all layers and in three of four tokens, carry values up to
# 20 times as large as the rest. With a scale that follows the outlier, 254 steps over $[-60, 60]$,
# an ordinary value of 0.2 becomes 0. The model's quality collapses.
#
# **LLM.int8** splits the sum by columns. With $O$ the columns in which some input reaches a
# threshold (6 in the paper):
#
# $$XW^\top = \underbrace{\sum_{k\in O} X_{:k}W_{:k}^\top}_{\text{floating point}} \;+\; \underbrace{\mathrm{diag}(\Delta^x)\Big(\sum_{k\notin O} C^x_{:k}\,(C^w_{:k})^\top\Big)\mathrm{diag}(\Delta^w)}_{\text{8-bit codes, sums of whole numbers}}.$$
#
# $\Delta^x$ has one scale a token, $\Delta^w$ one an output: neither varies along the summed axis,
# so both come out of the sum. In the paper 0.1 % of the columns are outliers; splitting them off
# costs time, which is why the next two methods get rid of them beforehand.

# %% [markdown]
# ### Exercise · LLM.int8, in short


# %% exercise="llm_int8" minutes=12 difficulty=2 path="more"
def llm_int8_matmul(x: Tensor, w: Tensor, threshold: float = 6.0) -> Tensor:
    """x @ w.T in 8 bits, but for the columns that hold outliers.

    x: (tokens, columns), w: (rows, columns), one floating format; unchanged. Returns (tokens,
    rows), in that format, computed in float32 at least (float64 for float64).
    A column of x with a magnitude of `threshold` or more in any token is an outlier. Its products,
    in all tokens, take x and w as they are. All other columns are rounded as by
    `quantize_symmetric` with 8 bits: each token of x with a scale from its ordinary columns alone,
    and each row of w with a scale from its whole row (w is rounded once, before x is known).
    Either kind of column may be missing.
    """
    ### BEGIN SOLUTION
    work = torch.promote_types(x.dtype, torch.float32)
    wide, weight = x.to(work), w.to(work)
    outlier = (wide.abs() >= threshold).any(dim=0)
    kept = wide[:, outlier] @ weight[:, outlier].T
    w_codes, w_scale = quantize_symmetric(weight, 8)
    x_codes, x_scale = quantize_symmetric(wide.masked_fill(outlier, 0), 8)
    sums = x_codes.to(torch.int32) @ w_codes.to(torch.int32).T
    return (kept + sums.to(work) * x_scale * w_scale.T).to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: leaving columns out</summary>
#
# A column of zeros adds nothing to a sum and nothing to a largest magnitude. Setting the outliers
# of a copy of x to 0 is enough; nothing has to be cut out.
# </details>

# %% check="llm_int8" points=2
x = torch.tensor([[1.27, 0.40, 60.0], [0.0, 2.54, -1.0]])
w = torch.tensor([[1.27, 0.0, 0.5], [0.3, -2.54, 0.0]])
y = llm_int8_matmul(x, w)
checks.close(
    y,
    torch.tensor([[1.27 * 1.27 + 30.0, 1.27 * 0.30 - 0.40 * 2.54], [-0.5, -2.54 * 2.54]]),
    what="a product with one outlier column",
    dtype=torch.float32,
    mistakes={
        "rounding the outlier with the rest": torch.tensor([[31.6, -0.9], [0.0, -6.4]]),
    },
    hint="Each number here is a whole number of steps once the outlier is out of the way.",
)


### BEGIN HIDDEN TESTS
def int8_by_hand(x, w, threshold):
    """(product in float64 with rounded x and w, w's scales from whole rows; any unclear code?)"""
    big = (x.double().abs() >= threshold).any(0)
    ordinary = x.double().clone()
    ordinary[:, big] = 0
    exact = x.double()[:, big] @ w.double()[:, big].T
    x_hat, w_hat = (read_back(t, 8, "channel", True) for t in (ordinary, w))
    unclear = any(bool(by_hand(t, 8, "channel", True)[3].any()) for t in (ordinary, w))
    return exact + x_hat @ w_hat.T, unclear


gen = checks.generator(4)
for tokens, columns, rows, threshold in [(5, 24, 7, 6.0), (3, 16, 4, 2.5), (1, 9, 1, 6.0)]:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tied = True
        while tied:  # until no number lies between two codes
            x = normal(tokens, columns, generator=gen)
            w = normal(rows, columns, generator=gen, scale=0.3)
            x[:, 3] *= 40
            x[0, 5] = -threshold  # exactly at the threshold, and negative: an outlier
            w[:, 3] *= 5  # w's range comes from the whole row
            x, w = x.to(dtype), w.to(dtype)
            expected, tied = int8_by_hand(x, w, threshold)
        with checks.unchanged(x=x, w=w):
            y = llm_int8_matmul(x, w, threshold)
        checks.close(
            y,
            expected.to(dtype),
            what="the product",
            dtype=dtype,
            rtol={torch.bfloat16: 1e-2, torch.float16: 3e-3}.get(dtype, 1e-5),
            hint=f"{tokens} tokens, {columns} columns, threshold {threshold}, {dtype}.",
        )
x, w = normal(4, 12, generator=gen), normal(3, 12, generator=gen)
checks.close(llm_int8_matmul(x, w, 0.0), x @ w.T, what="the product with outliers only")
few, _ = int8_by_hand(x, w, 100.0)
found = llm_int8_matmul(x, w, 100.0)
checks.close(found, few.float(), what="the product without outliers", rtol=1e-2)
checks.close(llm_int8_matmul(torch.zeros(2, 12), w), torch.zeros(2, 3), what="the product of zeros")
for dtype in (torch.float16, torch.bfloat16):  # 150,000 − 148,000: only the sum is rounded to half
    x, w = torch.tensor([[5.0, 8.0]]).to(dtype), torch.tensor([[30_000.0, -18_500.0]]).to(dtype)
    y, exact = llm_int8_matmul(x, w), x.double() @ w.double().T
    checks.close(y, exact.to(dtype), what=f"a product whose two parts cancel, {dtype}", rtol=1e-2)
### END HIDDEN TESTS

# %% [markdown]
# ## SmoothQuant: move them into the weights {#smoothquant}
#
# For any positive $s$, one number a column,
#
# $$XW^\top = \big(X\,\mathrm{diag}(s)^{-1}\big)\,\big(W\,\mathrm{diag}(s)\big)^\top .$$
#
# The product is the same, and the difficulty has moved: divide the loud channels of $X$, multiply
# the same columns of $W$. How far? With $m^x_j = \max_t |X_{tj}|$ and $m^w_j = \max_i |W_{ij}|$,
# SmoothQuant (Xiao et al. 2022) takes
#
# $$s_j = \frac{(m^x_j)^{\alpha}}{(m^w_j)^{1-\alpha}}, \qquad\text{so that}\qquad
# \frac{m^x_j}{s_j} = (m^x_j m^w_j)^{1-\alpha}, \qquad m^w_j s_j = (m^x_j m^w_j)^{\alpha}.$$
#
# At $\alpha = 1$ all channels of the inputs are equally loud and the weights have got everything;
# at $\alpha = 0$ the other way round. At $\alpha = \frac12$ both sides have the same range in every
# channel, $\sqrt{m^x_j m^w_j}$.
#
# It costs nothing when the model runs. The inputs come out of an RMSNorm, whose last step is to
# multiply by a gain for each channel: divide the gains by $s$, once. Everything that reads the same
# normed input (the query, key and value matrices) must share one $s$; its $m^w_j$ is the largest
# over all of them.

# %% [markdown]
# ### Exercise · The scales, and where they go


# %% exercise="smoothquant" minutes=10 difficulty=2
def smoothquant_scales(x_absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s of SmoothQuant, for all matrices that read the same inputs.

    x_absmax: (columns,), the largest magnitude of each channel of the inputs. weights: one or more
    matrices (any rows, columns). alpha: 0 to 1. All of one floating format, and so is the result;
    computed in it, or wider.
    Returns (columns,): x_absmax**alpha / w_absmax**(1 − alpha), where w_absmax is the largest
    magnitude in a column of all weights, but at least 1e-5; and no s below 1e-5. 0**0 is 1.
    """
    ### BEGIN SOLUTION
    w_absmax = torch.cat(list(weights)).abs().amax(dim=0).clamp(min=1e-5)
    return (x_absmax**alpha / w_absmax ** (1 - alpha)).clamp(min=1e-5)
    ### END SOLUTION


def smooth(gain: Tensor, weights: Sequence[Tensor], s: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gain (columns,) of an RMSNorm and the matrices (rows, columns) that read its output, with
    s (columns,) moved from the one into the others: new tensors, each in its own floating format,
    whatever s has. The function that they compute together is the same.
    """
    ### BEGIN SOLUTION
    return (gain / s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which axis</summary>
#
# s belongs to columns, the axis that is summed over. w is (rows, columns), so `w * s` scales
# columns; the largest magnitude of a column is over dim 0.
# </details>

# %% check="smoothquant" points=1
x_absmax = torch.tensor([16.0, 1.0, 4.0])
q, k = torch.tensor([[0.25, -1.0, 0.5], [0.1, 0.2, 0.3]]), torch.tensor([[-1.0, 0.5, -4.0]])
s = smoothquant_scales(x_absmax, [q, k])
checks.close(
    s,
    torch.tensor([4.0, 1.0, 1.0]),
    what="s for alpha 1/2",
    mistakes={"the first matrix only": torch.tensor([8.0, 1.0, 8.0**0.5])},
    hint="The largest magnitudes of the weights' columns are 1, 1 and 4.",
)
gain, smoothed = checks.parts(smooth(torch.tensor([2.0, 3.0, 5.0]), [q, k], s), "gain", "weights")
checks.close(gain, torch.tensor([0.5, 3.0, 5.0]), what="the gain after smooth")
checks.close(smoothed[0][0], torch.tensor([1.0, -1.0, 0.5]), what="a weight row after smooth")
### BEGIN HIDDEN TESTS
gen = checks.generator(5)
for alpha in (0.0, 0.2, 0.5, 0.85, 1.0):
    for dtype in (torch.float32, torch.float64):
        x = normal(50, 6, generator=gen).to(dtype) * torch.tensor(
            [1, 80, 0.3, 2, 5, 9], dtype=dtype
        )
        weights = [normal(rows, 6, generator=gen).to(dtype) * 0.1 for rows in (4, 2, 7)]
        gain = normal(6, generator=gen).to(dtype)
        m_x = x.abs().amax(0)
        with checks.unchanged(m_x, *weights):
            s = smoothquant_scales(m_x, weights, alpha)
        assert s.dtype == dtype, f"s is {s.dtype} for tensors of {dtype}"
        with checks.unchanged(gain, s, *weights):
            new_gain, new = smooth(gain, weights, s)
        assert new_gain.dtype == new[0].dtype == dtype, f"smooth keeps {dtype}"
        # By its definition: the ranges of both sides are powers of their product.
        both = m_x.double() * torch.cat(weights).double().abs().amax(0)
        left, right = (m_x / s).double(), torch.cat(list(new)).double().abs().amax(0)
        where = f"alpha {alpha}."
        checks.close(left, both ** (1 - alpha), what="x_absmax / s", rtol=1e-4, atol=0, hint=where)
        checks.close(right, both**alpha, what="the new w_absmax", rtol=1e-4, atol=0, hint=where)
        normed = F.rms_norm(x, (6,))
        for w, moved in zip(weights, new, strict=True):
            checks.close(
                (normed * new_gain) @ moved.T,
                (normed * gain) @ w.T,
                what="what norm and matrix compute together",
                rtol=1e-5 if dtype == torch.float32 else 1e-12,
                hint=where,
            )
for dtype in (torch.float16, torch.bfloat16):
    m_x, w = torch.tensor([16.0, 1.0, 4.0]).to(dtype), torch.tensor([[0.25, -1.0, 4.0]]).to(dtype)
    s = smoothquant_scales(m_x, [w])
    checks.close(s, torch.tensor([8.0, 1.0, 1.0]).to(dtype), what="s", dtype=dtype)
    new_gain, new = smooth(m_x, [w], s)
    checks.close(new_gain, torch.tensor([2.0, 1.0, 4.0]).to(dtype), what="the gain", dtype=dtype)
    checks.close(new[0], torch.tensor([[2.0, -1.0, 4.0]]).to(dtype), what="a matrix", dtype=dtype)
dead = torch.tensor([0.0, 4.0, 1.0])
s = smoothquant_scales(dead, [torch.tensor([[1.0, 0.0, 2.0]])], 0.5)
checks.close(
    s,
    torch.tensor([1e-5, 2 / 1e-5**0.5, 0.5**0.5]),
    what="s of a channel that is 0 in x, then of one that is 0 in w",
    rtol=1e-4,
    atol=0,
)
for alpha, expected in ((0.0, [1.0, 1e5, 0.5]), (1.0, [1e-5, 4.0, 1.0])):
    s = smoothquant_scales(dead, [torch.tensor([[1.0, 0.0, 2.0]])], alpha)
    checks.close(s, torch.tensor(expected), what=f"s of these, alpha {alpha}", rtol=1e-4, atol=0)
formats = (torch.bfloat16, torch.float32, torch.float64)
for own, of_s in ((own, of_s) for own in formats for of_s in formats if own != of_s):
    gain, w = torch.tensor([2.0, 3.0, 5.0]).to(own), torch.tensor([[0.25, -1.0, 4.0]])
    s = torch.tensor([4.0, 1.0, 0.5]).to(of_s)
    new_gain, new = smooth(gain, [w.to(own), w], s)
    where = f"The gain and a matrix in {own}, a matrix in float32, s in {of_s}."
    expected = torch.tensor([0.5, 3.0, 10.0]).to(own)
    checks.close(new_gain, expected, what="the gain", dtype=own, hint=where)
    for moved, kept in zip(new, (own, torch.float32), strict=True):
        expected = torch.tensor([[1.0, -1.0, 2.0]]).to(kept)
        checks.close(moved, expected, what="a matrix", dtype=kept, hint=where)
### END HIDDEN TESTS

# %% [markdown]
# ## GPTQ: later weights make up for earlier ones {#gptq}
#
# For given scales, rounding to nearest minimizes $\lVert \hat W - W\rVert$. The model feels $\lVert
# X(\hat W - W)^\top\rVert$. Take one row $w$ of $W$ $(n)$ and a change $d$ $(n)$ of it. The
# output's squared error is a quadratic form,
#
# $$\lVert X d\rVert^2 \propto d^\top H d, \qquad H = \tfrac{2}{T}\, X^\top X \quad (n, n),$$
#
# with $T$ tokens; $H$ is the Hessian of the mean squared error, the same for every row. If two
# inputs rise and fall together, an error in one weight can be undone in the other. **Optimal brain
# quantization** does that: round one weight, then move all the others that are still free to where
# they compensate best.
#
# **One step.** Round weight 0: $d_0 = \hat w_0 - w_0$ is fixed, the others $R$ are free. Minimize
# $d^\top H d$ over $d_R$: the gradient $2(H_{R0}d_0 + H_{RR}d_R)$ is zero at $d_R =
# -H_{RR}^{-1}H_{R0}\,d_0$. The inverse of a matrix in blocks says what that is: from $H H^{-1} =
# I$, column 0, rows $R$: $H_{R0}(H^{-1})_{00} + H_{RR}(H^{-1})_{R0} = 0$. So
#
# $$d_R = \frac{(H^{-1})_{R0}}{(H^{-1})_{00}}\; d_0 .$$
#
# **All steps.** After weight 0, weights $1 \dots n-1$ are left, and their problem has the Hessian
# $H_{FF}$, the lower right part. Its inverse is needed next, then that of a part of it, and so on:
# $n$ inversions. The step that saves them: factor $H^{-1} = U^\top U$ once, with $U$ upper
# triangular (a Cholesky factorization). Then for $F = \{i, \dots, n-1\}$
#
# $$H_{FF}^{-1} = U_{FF}^\top\, U_{FF}.$$
#
# *Proof.* $H = U^{-1}U^{-\top}$. The rows $F$ of the upper triangular $U^{-1}$ are zero outside the
# columns $F$, so $H_{FF} = (U^{-1})_{FF}\,(U^{-1})_{FF}^\top$; and $(U^{-1})_{FF} = (U_{FF})^{-1}$,
# again because $U$ is triangular. Invert. ∎ The first row of $U_{FF}^\top U_{FF}$ is
# $U_{ii}\,U_{i,F}$, and its first entry $U_{ii}^2$. So step $i$ reads
#
# $$e_i = \frac{w_i - \hat w_i}{U_{ii}}, \qquad w_j \leftarrow w_j - e_i\,U_{ij} \quad (j > i).$$

# %% [markdown]
# ### All rows at once, in blocks
#
# Every row has the same $H$, so GPTQ (Frantar et al. 2022) takes the columns of all rows in the
# same order: $e_i$ becomes a column of rows, the update an outer product. One outer product a
# column is all memory traffic and no arithmetic: each reads and writes the rest of $W$. Add up what
# a column receives in the end,
#
# $$w_j - \sum_{i<j} e_i U_{ij},$$
#
# and the order does not matter. So take a **block** of columns; inside, update column by column.
# Columns to the right of it wait, and get the whole block in one matrix product,
# $W_{:,\text{right}} \mathrel{-}= E\,U_{\text{block},\text{right}}$. *Blocked equals unblocked*, to
# rounding.

# %% [markdown]
# Three details decide whether that is true of an implementation.
#
# - **Scales.** Those of a group are taken when the group begins, from the weights *as they then
#   are*. The authors' code takes them from a copy that lacks the updates of the block so far, so
#   its results depend on the block size. Here they do not.
# - **Damping**: $H$ can be singular (fewer tokens than columns; a channel that is always 0). Add
#   one percent of its mean diagonal to the diagonal.
# - **Dead columns**: where $H_{jj} = 0$, the input never was anything but 0. The weight says
#   nothing; set it to 0, so that it does not widen its group's range.
#
# In September 2026 a GPTQ in use was found to index its buffer of errors by the column of the
# matrix in place of the column of the block (mlx-lm, issue 1878). Nothing crashed: from the second
# block on the errors went nowhere, and the codes were those of a worse method.

# %% [markdown]
# ### Exercise · GPTQ


# %% exercise="gptq" minutes=30 difficulty=3
def layer_hessian(x: Tensor) -> Tensor:
    """H = 2/tokens · xᵀx of the inputs x (tokens, columns), any floating format: float64."""
    ### BEGIN SOLUTION
    wide = x.double()
    return 2 / len(wide) * wide.T @ wide
    ### END SOLUTION


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group: int, block: int = 128, damp: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ: (codes, scale, zero) as `quantize_affine` returns them, with errors compensated.

    weight: (rows, columns), any floating format; hessian: (columns, columns), symmetric, as
        `layer_hessian` returns it, not 0; both unchanged. Everything is computed in float64; scale
        is returned in float32 (in float64 for float64 weights).
    group: columns to a scale. block: columns to a block; the last may be shorter, and a block of
        more than all columns counts as one of all. ValueError unless both are at least 1, group
        divides columns, and one of group and block (so cut) divides the other.

    First: the weights of a column whose hessian diagonal is 0 count as 0. Then damp times the mean
    of the diagonal, as given, is added to the diagonal (H is invertible by then), U is the upper
    triangle with UᵀU = H⁻¹, and the columns are taken from left to right. Where a group begins, its
    scale and zero are those that `quantize_affine` gives for its columns as they are by then. A
    column's codes are round(w / scale) + zero, clamped, and its error moves to all columns on its
    right, as above. A block changes the columns beyond it in one product; inside it the order is
    yours. The result does not depend on `block`.

    bits=2, group=3, damp=0, hessian ((2, 1.5, 0), (1.5, 2, 0), (0, 0, 2)), the row (1.4, 2.4, 3):
    scale 1, zero 0. 1.4 becomes 1; of the missing 0.4, the second weight takes over 0.3 and becomes
    2.7. Codes 1, 3, 3.
    """
    ### BEGIN SOLUTION
    rows, columns = weight.shape
    block = min(block, columns)
    if group < 1 or block < 1 or columns % group or (block % group and group % block):
        raise ValueError(f"{columns} columns, groups of {group}, blocks of {block}")
    diagonal = hessian.double().diagonal()
    w = weight.double().masked_fill(diagonal == 0, 0)
    damped = hessian.double() + damp * diagonal.mean() * torch.eye(columns).to(w)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scale, zero = w.new_empty(rows, columns // group), codes.new_empty(rows, columns // group)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = w.new_empty(rows, end - start)
        for j in range(start, end):
            g = j // group
            if j % group == 0:
                _, scale[:, g : g + 1], zero[:, g : g + 1] = quantize_affine(
                    w[:, j : j + group], bits
                )
            code = torch.round(w[:, j] / scale[:, g]) + zero[:, g]
            codes[:, j] = code.clamp(0, 2**bits - 1)
            back = (codes[:, j].double() - zero[:, g]) * scale[:, g]
            errors[:, j - start] = (w[:, j] - back) / u[j, j]
            w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
        w[:, end:] -= errors @ u[start:end, end:]
    return codes, scale.to(torch.promote_types(weight.dtype, torch.float32)), zero
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: U in two lines</summary>
#
# `torch.linalg.inv` of the damped Hessian, then `torch.linalg.cholesky(…, upper=True)`. The other
# order, a factor of H inverted, is a lower triangle and another matrix.
# </details>
#
# <details><summary>Hint: where a group's columns are up to date</summary>
#
# If block is a multiple of group, a group lies inside one block, whose columns you update at once.
# If group is a multiple of block, a group begins where a block begins, and all blocks before have
# been applied to everything on their right.
# </details>
#
# <details><summary>Hint: two kinds of index</summary>
#
# The buffer of a block's errors has a column for each column of the block: `j − start`. W and U are
# indexed by j.
# </details>


# %% tags=["support"]
# Support: GPTQ by solving a least-squares problem at every column
def gptq_by_solving(weight, hessian, bits, group, damp=0.01):
    """(codes, scale, zero) in float64, without a factorization and without updates.

    Before column j, the free columns j … are those that minimize (v − w) H (v − w)ᵀ with the
    rounded ones fixed: solved for anew, from the original weights.
    """
    n = weight.shape[1]
    diagonal = hessian.double().diagonal()
    w = weight.double().clone()
    w[:, diagonal == 0] = 0
    h = hessian.double() + damp * float(diagonal.mean()) * torch.eye(n, dtype=torch.float64)
    back = torch.zeros_like(w)
    codes = torch.zeros(w.shape, dtype=torch.long)
    scales, zeros = [], []
    for j in range(n):
        moved = (back[:, :j] - w[:, :j]) @ h[:j, j:]
        now = w[:, j:] - torch.linalg.solve(h[j:, j:], moved.T).T
        if j % group == 0:
            low = now[:, :group].amin(1).clamp(max=0)
            high = now[:, :group].amax(1).clamp(min=0)
            step = (high - low) / (2**bits - 1)
            step[step == 0] = 1
            scales.append(step)
            zeros.append(torch.round(-low / step))
        codes[:, j] = (torch.round(now[:, 0] / scales[-1]) + zeros[-1]).clamp(0, 2**bits - 1)
        back[:, j] = (codes[:, j] - zeros[-1]) * scales[-1]
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1).long()


def related(tokens: int, columns: int, generator: torch.Generator, own: float = 0.3) -> Tensor:
    """Inputs whose channels go together: mixtures of a few sources, and some noise of their own."""
    sources = normal(tokens, max(2, columns // 4), generator=generator)
    mixed = sources @ normal(sources.shape[1], columns, generator=generator)
    return mixed + own * normal(tokens, columns, generator=generator)


# %% check="gptq" points=2
h = layer_hessian(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]))
checks.close(
    h,
    torch.tensor([[20 / 3, 4 / 3], [4 / 3, 10 / 3]], dtype=torch.float64),
    what="layer_hessian",
    dtype=torch.float64,
)
h = torch.tensor([[2.0, 1.5, 0.0], [1.5, 2.0, 0.0], [0.0, 0.0, 2.0]])
codes, scale, zero = checks.parts(
    gptq(torch.tensor([[1.4, 2.4, 3.0]]), h, bits=2, group=3, block=3, damp=0.0),
    "codes",
    "scale",
    "zero",
)
checks.close(scale, torch.tensor([[1.0]]), what="scale", dtype=torch.float32)
checks.close(
    codes.long(),
    torch.tensor([[1, 3, 3]]),
    what="codes",
    mistakes={"rounding to nearest": torch.tensor([[1, 2, 3]])},
    hint="The second weight has become 2.7 when its turn comes.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(6)
for rows, columns, bits, group, block in [(3, 12, 3, 12, 12), (5, 24, 4, 8, 24), (4, 16, 2, 4, 16)]:
    w = normal(rows, columns, generator=gen, dtype=torch.float64)
    x = related(60, columns, gen).double()
    h = layer_hessian(x.float())
    checks.close(
        h,
        2 * torch.einsum("ti,tj->ij", x, x) / 60,
        what="layer_hessian",
        dtype=torch.float64,
        rtol=1e-6,
    )
    with checks.unchanged(weight=w, hessian=h):
        codes, scale, zero = gptq(w, h, bits, group, block)
    right, step, z = gptq_by_solving(w, h, bits, group)
    where = f"{columns} columns, {bits} bits, groups of {group}, one block."
    assert codes.dtype == zero.dtype == torch.uint8, "codes and zero are uint8"
    checks.close(scale, step, what="scale", dtype=torch.float64, rtol=1e-8, hint=where)
    checks.close(zero.long(), z, what="zero", hint=where)
    checks.close(codes.long(), right, what="codes", hint=where)
# Inputs that have nothing to do with each other: nothing to compensate, rounding to nearest.
w = normal(4, 8, generator=gen, dtype=torch.float64)
h = torch.diag(torch.linspace(0.5, 9, 8, dtype=torch.float64))
codes, scale, zero = gptq(w, h, 3, 4)
right, step, z, _ = by_hand(w, 3, 4)
checks.close(codes.long(), right, what="codes for a diagonal hessian", hint="U is diagonal, too.")
checks.close(zero.long(), z, what="zero for a diagonal hessian")
### END HIDDEN TESTS

# %% check="gptq" points=2
# Blocked equals unblocked: whatever the block is, the codes are the same.
gen = checks.generator(7)
w = normal(3, 16, generator=gen, dtype=torch.float64)
h = layer_hessian(related(50, 16, gen))
whole, _, _ = gptq(w, h, bits=3, group=4, block=16)
for block in (4, 8, 2, 1):
    codes, _, _ = gptq(w, h, bits=3, group=4, block=block)
    checks.close(codes, whole, what=f"codes with blocks of {block} (16 columns, groups of 4)")
### BEGIN HIDDEN TESTS
for rows, columns, bits, group in [(5, 24, 3, 8), (2, 36, 4, 12), (3, 20, 2, 20), (3, 9, 2, 1)]:
    w = normal(rows, columns, generator=gen, dtype=torch.float64)
    h = layer_hessian(related(80, columns, gen))
    right, step, z = gptq_by_solving(w, h, bits, group)
    sizes = (1, 2, 4, 8, 12, 24, 40, 128)
    blocks = [b for b in sizes if b % group == 0 or group % b == 0 or b >= columns]
    for block in blocks:
        with checks.unchanged(weight=w, hessian=h):
            codes, scale, zero = gptq(w, h, bits, group, block)
        where = f"{columns} columns, groups of {group}, blocks of {block}."
        checks.close(scale, step, what="scale", dtype=torch.float64, rtol=1e-8, hint=where)
        checks.close(zero.long(), z, what="zero", hint=where)
        checks.close(codes.long(), right, what="codes", hint=where)
    checks.raises(ValueError, gptq, w, h, bits, 7, because=f"7 of {columns} columns")
ones = torch.ones(2, 24)
checks.raises(ValueError, gptq, ones, torch.eye(24), 4, 8, 12, because="8 and 12: no multiples")
checks.raises(ValueError, gptq, ones, torch.eye(24), 4, 48, because="48 of 24 columns")
checks.raises(ValueError, gptq, ones, torch.eye(24), 4, 0, 12)
checks.raises(ValueError, gptq, ones, torch.eye(24), 4, 8, 0)
# The work: columns beyond the block are touched once a block, not once a column.
w = normal(48, 192, generator=gen, dtype=torch.float64)
h = layer_hessian(related(400, 192, gen))
with checks.moved() as work:
    gptq(w, h, 4, 16, block=16)
once_a_column = sum(3 * 48 * (192 - j) * 8 for j in range(192))
assert work.total <= 0.8 * once_a_column, (
    f"{work.total / 1e6:.1f} MB are read and written; updating the whole rest of the matrix after "
    f"each column takes {once_a_column / 1e6:.1f} MB: let the columns beyond the block wait"
)
### END HIDDEN TESTS

# %% check="gptq" points=1
# A channel that is always 0, damping, formats, and what all this is for: a smaller output error.
gen = checks.generator(8)
x = related(200, 16, gen)
x[:, 5] = 0
w = normal(6, 16, generator=gen)
w[:, 5] = 50.0
codes, scale, zero = gptq(w, layer_hessian(x), bits=3, group=8)
assert float(scale.max()) < 5, (
    f"the largest scale is {float(scale.max()):.1f}: a weight whose input is always 0 must not "
    "widen its group's range"
)
### BEGIN HIDDEN TESTS
right, step, z = gptq_by_solving(w, layer_hessian(x), 3, 8)
checks.close(scale, step.float(), what="scale with a dead column", dtype=torch.float32)
checks.close(codes.long(), right, what="codes with a dead column")
x[:, 9] *= 1e-6  # a quiet channel is not a dead one
codes, scale, zero = gptq(w, layer_hessian(x), bits=3, group=8)
right, step, z = gptq_by_solving(w, layer_hessian(x), 3, 8)
checks.close(scale, step.float(), what="scale with a quiet column", dtype=torch.float32)
checks.close(codes.long(), right, what="codes with a quiet column", hint="Dead is exactly 0.")
few = related(5, 16, gen)  # fewer tokens than columns: singular without damping
for damp in (0.01, 0.1, 1.0):
    wide = w.double()
    codes, scale, zero = gptq(wide, layer_hessian(few), 4, 8, 8, damp)
    right, step, z = gptq_by_solving(wide, layer_hessian(few), 4, 8, damp)
    checks.close(scale, step, what=f"scale, damp {damp}", rtol=1e-6, dtype=torch.float64)
    checks.close(codes.long(), right, what=f"codes, damp {damp}, five tokens")
for dtype in (torch.float16, torch.bfloat16):
    half, x = normal(4, 16, generator=gen).to(dtype), related(100, 16, gen).to(dtype)
    h = layer_hessian(x)
    checks.close(
        h, 2 * x.double().T @ x.double() / 100, what=f"layer_hessian of {dtype}", rtol=1e-9
    )
    codes, scale, zero = gptq(half, h.float(), 3, 4)
    right, step, z = gptq_by_solving(half, h.float(), 3, 4)
    checks.close(scale, step.float(), what=f"scale for {dtype}", dtype=torch.float32)
    checks.close(codes.long(), right, what=f"codes for {dtype}")
wins = []
for _ in range(4):
    x = related(300, 32, gen, own=0.1)
    w = normal(8, 32, generator=gen)
    compensated = dequantize(*gptq(w, layer_hessian(x), 3, 16))
    nearest = read_back(w, 3, 16)
    error, plain = (float((x.double() @ (v.double() - w).T).norm()) for v in (compensated, nearest))
    wins.append(error / plain)
assert sum(wins) / 4 < 0.75, (
    f"on related inputs your output error is {sum(wins) / 4:.2f} times that of rounding to "
    "nearest; below 0.75 is easy to reach"
)
### END HIDDEN TESTS

# %% [markdown]
# ## AWQ: protect the weights that meet large inputs {#awq}
#
# The error of one output is $\sum_j x_j(\hat w_j - w_j)$: a weight's error counts as much as its
# input is large. About one percent of the columns meet inputs much larger than the others. Keeping
# these in 16 bits would help, and no kernel likes it. AWQ (Lin et al. 2023) *scales* them instead.
#
# Multiply column $j$ by $s_j$ before rounding and divide after: $\hat w_j =
# \Delta'\,\mathrm{round}(w_j s_j/\Delta')/s_j$. The error of rounding is uniform on $\pm\frac12$
# whatever is rounded, so column $j$'s error is on average $\frac14\Delta'/s_j$ in place of
# $\frac14\Delta$. As long as one group's largest weight does not grow, $\Delta' \approx \Delta$,
# and the error of column $j$ is divided by $s_j$. Too large an $s_j$ makes its column the largest
# of the group, $\Delta'$ grows, and everybody else pays.
#
# So search. AWQ takes $s_j = m_j^\alpha$ with $m_j$ the mean magnitude of input channel $j$, tries
# $\alpha = 0, 0.05, \dots, 0.95$, rounds with each, and keeps the one with the smallest output
# error. $s$ is divided by $\sqrt{\max s\cdot\min s}$, which leaves most of the weights about where
# they were.
#
# $\alpha = 0$ is $s = 1$: rounding to nearest. It is one of the candidates. So on the inputs on
# which it was searched, AWQ is **never worse than rounding to nearest**. That is not a tendency but
# a law (to the rounding of $s$ itself); GPTQ has no such law. ($1/s$ ends in the norm's gain, as
# SmoothQuant's does.)

# %% [markdown]
# ### Exercise · Search


# %% exercise="awq" minutes=15 difficulty=2
def awq_search(
    weight: Tensor, x: Tensor, bits: int, group: int, grid: int = 20
) -> tuple[Tensor, float]:
    """The scales of AWQ for one matrix: (s, alpha).

    weight: (rows, columns); x: (tokens, columns), its inputs; any floating formats, both unchanged.
    Computed in float64. Candidates: alpha = i / grid for i = 0 … grid − 1. Each has scales s
    (columns,): the mean magnitude of each channel of x, to the power alpha; this power, but at
    least 1e-4, then divided by the root of (largest s · smallest s). weight · s is rounded with
    `quantize_affine`, read back, and divided by s; the candidate's error is the sum of squares of
    the change in x @ weight.T. Returns the s, float32 (float64 for float64 weights), and the alpha,
    a float, of the candidate with the smallest error; of equally good ones, the smallest alpha.

    grid=1 gives s = 1 and alpha = 0.
    """
    ### BEGIN SOLUTION
    w, x = weight.double(), x.double()
    magnitude = x.abs().mean(dim=0)
    best = None
    for i in range(grid):
        s = (magnitude ** (i / grid)).clamp(min=1e-4)
        s = s / torch.sqrt(s.max() * s.min())
        back = dequantize(*quantize_affine(w * s, bits, group)) / s
        error = float((x @ (back - w).T).square().sum())
        if best is None or error < best[0]:
            best = error, s, i / grid
    return best[1].to(torch.promote_types(weight.dtype, torch.float32)), best[2]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what is compared</summary>
#
# The output, not the weights: `x @ (back − w).T`. And `back` is divided by s again, so that it can
# be compared with w.
# </details>


# %% tags=["support"]
# Support: the error of each of AWQ's candidates
def on_a_tie(weight, x, bits, group, grid, noise) -> bool:
    """Whether a weight is midway between two codes for a candidate, so that rounding decides."""
    weight = weight.double()
    up, down = (
        awq_errors(weight * (1 + shift * noise), x, bits, group, grid)[0] for shift in (1e-6, -1e-6)
    )
    return any(abs(a / b - 1) > 1e-3 for a, b in zip(up, down, strict=True))


def awq_errors(weight, x, bits, group, grid=20) -> tuple[list[float], list[Tensor]]:
    """One squared output error and one s for each alpha, in float64."""
    w, x = weight.double(), x.double()
    errors, scales = [], []
    for alpha in (i / grid for i in range(grid)):
        s = torch.tensor([max(float(c.abs().mean()) ** alpha, 1e-4) for c in x.T]).double()
        s = s * (float(s.max()) * float(s.min())) ** -0.5
        change = (read_back(w * s, bits, group) - w * s) / s
        errors.append(float((change @ (x.T @ x) * change).sum()))
        scales.append(s)
    return errors, scales


# %% check="awq" points=2
gen = checks.generator(9)
w, x = normal(4, 8, generator=gen), normal(40, 8, generator=gen)
x[:, 2] *= 30
s, alpha = checks.parts(awq_search(w, x, bits=3, group=8, grid=1), "s", "alpha")
checks.close(s, torch.ones(8), what="s of a grid with alpha = 0 alone", dtype=torch.float32)
checks.close(alpha, 0.0, what="alpha of a grid of one")
s, alpha = awq_search(w, x, bits=3, group=8)
errors, scales = awq_errors(w, x, 3, 8)
checks.close(
    s,
    scales[round(alpha * 20)].float(),
    what="s for your alpha",
    hint="mean magnitude ** alpha, over the root of largest · smallest",
)
### BEGIN HIDDEN TESTS
for rows, columns, bits, group, grid, dtype in [
    (5, 16, 3, 16, 20, torch.float64),
    (3, 24, 4, 8, 20, torch.float32),
    (6, 16, 2, 4, 7, torch.float64),
    (4, 12, 3, 12, 40, torch.bfloat16),
    (2, 8, 5, 4, 20, torch.float16),
]:
    for loud in (25.0, 3.0):
        x = normal(30, columns, generator=gen)
        x[:, 1] *= loud
        x[:, 6] *= loud / 2
        x = x + 0.4
        x = x.to(dtype)
        w, noise = (normal(rows, columns, generator=gen) for _ in range(2))
        while on_a_tie(w := (w * 0.2).to(dtype), x, bits, group, grid, noise.double()):
            w = normal(rows, columns, generator=gen)
        with checks.unchanged(weight=w, x=x):
            s, alpha = checks.parts(awq_search(w, x, bits, group, grid), "s", "alpha")
        errors, scales = awq_errors(w, x, bits, group, grid)
        checks.kind(alpha, float, what="alpha")
        kept = torch.promote_types(dtype, torch.float32)
        where = f"{rows} × {columns}, {bits} bits, groups of {group}, grid {grid}, {dtype}."
        best = min(range(grid), key=errors.__getitem__)
        index = round(alpha * grid)
        assert index in range(grid), f"alpha is {alpha}. {where}"
        checks.close(alpha, index / grid, what="alpha, a multiple of 1 / grid", hint=where)
        assert errors[index] <= errors[best] * (1 + 1e-9), (
            f"alpha {alpha:.3f} has {errors[index] / errors[best]:.3f} times the squared output "
            f"error of alpha {best / grid:.3f}. {where}"
        )
        checks.close(s, scales[index].to(kept), what="s", dtype=kept, rtol=1e-5, hint=where)
x[:, 3] = 0.0  # a dead channel
s, alpha = awq_search(w, x, 3, 4)
errors, scales = awq_errors(w, x, 3, 4)
best = min(range(20), key=errors.__getitem__)
checks.close(errors[round(alpha * 20)], errors[best], what="the error with a dead channel")
checks.close(s, scales[round(alpha * 20)].float(), what="s with a dead channel")
for own, other in ((torch.float32, torch.float64), (torch.float64, torch.bfloat16)):
    s, alpha = awq_search(w.to(own), x.to(other), 3, 4)  # of two formats
    _, scales = awq_errors(w.to(own), x.to(other), 3, 4)
    hint = f"weight in {own}, x in {other}."
    checks.close(s, scales[round(alpha * 20)].to(own), what="s", dtype=own, rtol=1e-5, hint=hint)
whole = torch.tensor([[0.0, 3.0, -4.0, 8.0]])  # every candidate is exact where nothing is rounded
s, alpha = awq_search(torch.zeros(2, 4), whole, 4, 4)
checks.close(alpha, 0.0, what="alpha where all are equally good", hint="Then the smallest.")
### END HIDDEN TESTS

# %% check="awq" points=1
# Never worse than rounding to nearest, on any input.
gen = checks.generator(10)
for bits in (2, 3, 4):
    w, x = normal(6, 16, generator=gen), normal(25, 16, generator=gen, scale=2.0)
    s, alpha = awq_search(w, x, bits, 8)
    change = (read_back(w * s, bits, 8) / s - w) @ x.double().T
    plain = (read_back(w, bits, 8) - w) @ x.double().T
    assert float(change.norm()) <= float(plain.norm()) * (1 + 1e-5), (
        f"{bits} bits: your s has {float(change.norm() / plain.norm()):.3f} times the output error "
        "of rounding to nearest, which was among the candidates"
    )
### BEGIN HIDDEN TESTS
gains = []
for trial in range(6):
    w = normal(8, 32, generator=gen)
    x = normal(40, 32, generator=gen)
    x[:, trial::8] *= 12.0  # a few loud channels
    s, alpha = awq_search(w, x, 3, 16)
    change = (read_back(w * s, 3, 16) / s - w) @ x.double().T
    plain = (read_back(w, 3, 16) - w) @ x.double().T
    gains.append(float(change.norm() / plain.norm()))
    assert gains[-1] <= 1 + 1e-5, f"worse than rounding to nearest by {gains[-1]:.3f}"
assert sum(gains) / 6 < 0.85, (
    f"with loud channels your output error is {sum(gains) / 6:.2f} times that of rounding to "
    "nearest; below 0.85 is easy to reach"
)
### END HIDDEN TESTS

# %% [markdown]
# ## Rotations: turn until no channel is loud {#rotation}
#
# SmoothQuant stretches the axes. One can also turn them. For an orthogonal $Q$ $(n, n)$,
#
# $$XW^\top = (XQ)\,(WQ)^\top, \qquad\text{since } QQ^\top = I .$$
#
# Take for $Q$ a **Hadamard matrix** over its root: entries $\pm 1/\sqrt n$. Sylvester's are made by
# doubling,
#
# $$H_1 = (1), \qquad H_{2n} = \begin{pmatrix} H_n & H_n\\ H_n & -H_n\end{pmatrix}, \qquad H_n H_n^\top = nI .$$
#
# A lone outlier $a$ in one channel becomes $\pm a/\sqrt n$ in *all* of them. In general an output
# is a sum of $n$ inputs, and where the inputs' signs have nothing to do with a row of $H_n$ it is
# nearly normal: the largest of $n$ such numbers grows only as $\sqrt{2\ln n}$, about 3 standard
# deviations for $n = 256$. The norm of a token is unchanged, so the range shrinks. A token whose
# signs follow a row fares worse: a constant one becomes a lone outlier, $\sqrt n$ times as large.
# So QuaRot (below) also draws $n$ random signs for the residual stream, the same for all tokens.
#
# **Cost.** Doubling is also the algorithm: apply $H_n$ to both halves, then add and subtract. That
# is $\log_2 n$ steps of $n$ additions, the fast Walsh–Hadamard transform, in place of $n^2$
# multiplications. And most rotations cost nothing at all. RMSNorm divides by a token's norm, which
# $Q$ leaves alone; with its gain folded into the next matrix, it commutes with $Q$. So the whole
# residual stream can be turned once by turning the weights that write to and read from it (QuaRot,
# Ashkboos et al. 2024). Only what stands behind SwiGLU, the input of the down projection, must be
# turned as the model runs.
#
# Widths that are no power of two are turned in blocks: 704 = 11 · 64.

# %% [markdown]
# ### Exercise · The fast transform


# %% exercise="rotate" minutes=12 difficulty=2
def rotate(x: Tensor, size: int) -> Tensor:
    """x with each block of `size` consecutive numbers of its last axis multiplied by H / √size.

    x: (…, n), any floating format and layout; unchanged. H is Sylvester's Hadamard matrix of that
    size. Returns a new tensor of x's shape and format, computed in float32 (float64 for float64),
    by log2(size) rounds of additions and subtractions: no matrix, no matrix product. ValueError
    unless size is a power of two (1 is one) that divides n.

    size=2: (3, 1, 2, 2) becomes (4, 2, 4, 0) / √2.
    """
    ### BEGIN SOLUTION
    n = x.shape[-1]
    if size < 1 or size & (size - 1) or n % size:
        raise ValueError(f"blocks of {size} do not fill rows of {n}, or {size} is no power of two")
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < size:
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return (y / math.sqrt(size)).to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a round</summary>
#
# In round $r$ numbers that are $2^r$ apart meet: `unflatten(-1, (-1, 2, 2**r))` makes pairs (first
# half, second half) of an axis of two. They become sum and difference, in the same places.
# </details>

# %% check="rotate" points=2
x = torch.tensor([3.0, 1.0, 2.0, 2.0])
checks.close(
    rotate(x, 2) * math.sqrt(2), torch.tensor([4.0, 2.0, 4.0, 0.0]), what="blocks of 2, times √2"
)
checks.close(
    rotate(x, 4) * 2,
    torch.tensor([8.0, 2.0, 0.0, 2.0]),
    what="a block of 4, times 2",
    hint="Rows of H: + + + +, + − + −, + + − −, + − − +.",
)
checks.close(rotate(rotate(x, 4), 4), x, what="turned twice: H is its own inverse")
### BEGIN HIDDEN TESTS
gen = checks.generator(11)


def hadamard(n):
    """By its closed form: the sign is the parity of the ones that both indices have."""
    both = torch.arange(n)[:, None] & torch.arange(n)
    for shift in (8, 4, 2, 1):  # the parity of sixteen bits ends in the last one
        both = both ^ (both >> shift)
    return 1.0 - 2 * (both & 1).double()


for shape, size in [
    ((3, 8), 8),
    ((2, 3, 24), 8),
    ((5, 64), 64),
    ((2, 6), 1),
    ((44,), 4),
    ((0, 4), 4),
]:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = normal(*shape, generator=gen).to(dtype)
        if x.dim() == 2:
            x = x.T.contiguous().T
        with (
            checks.unchanged(x=x),
            checks.forbidden(
                "matmul", "mm", "bmm", "linear", "einsum", "tensordot", because="H is not formed"
            ),
        ):
            y = rotate(x, size)
        q = hadamard(size) / math.sqrt(size)
        expected = (x.double().unflatten(-1, (-1, size)) @ q).flatten(-2)
        where = f"shape {shape}, blocks of {size}, {dtype}."
        checks.close(y, expected.to(dtype), what="the rotated x", dtype=dtype, hint=where)
x = normal(4, 1024, generator=gen).to(torch.float16)
y = rotate(x, 1024)
exact = (x.double() @ hadamard(1024) / 32).half()
checks.close(y, exact, what="float16, blocks of 1024", dtype=torch.float16, rtol=6e-4)
big = torch.full((1, 512), 20_000.0, dtype=torch.float16)
found = rotate(big, 512)[0, 1:]
checks.close(found, torch.zeros(511).half(), what="float16 whose sums pass 65,504", atol=1.0)
found = rotate(torch.full((1, 16), 10_000.0, dtype=torch.float16), 16)[:, 0]
expected = torch.tensor([40_000.0]).half()
checks.close(found, expected, what="float16 whose sums pass 65,504 before they are divided by 4")
same = torch.ones(4)
assert rotate(same, 1) is not same, "a new tensor is asked for, with blocks of 1 too"
w, x = normal(5, 24, generator=gen), normal(7, 24, generator=gen)
checks.close(rotate(x, 8) @ rotate(w, 8).T, x @ w.T, what="the product of turned x and turned w")
with checks.allocations() as made:
    rotate(normal(2, 4096, generator=gen), 4096)
assert made.largest <= 4 * 2 * 4096, (
    f"one of your tensors has {made.largest} elements, x has 8192: no matrix H is needed"
)
for size in (3, 6, 0, -2, 16):
    checks.raises(ValueError, rotate, torch.ones(2, 24), size, because=f"24 numbers, size {size}")
checks.raises(ValueError, rotate, torch.ones(2, 8), 16, because="8 numbers, size 16")
### END HIDDEN TESTS

# %% [markdown]
# ### Where `small` is loud
#
# The input of a down projection, $\mathrm{silu}(\text{gate})\cdot\text{up}$, is a product, and
# products have long tails. The next cells feed text to the model and keep what enters every linear
# layer; the rest of the lesson uses it. Then both sides of each down projection are rounded to 4
# bits, each token and each row with one scale: as they are, after SmoothQuant, after your rotation
# in blocks of 64. **Write down first:** which of the two helps more here, and why?

# %% tags=["experiment"]
linears = {name: part for name, part in small.named_modules() if isinstance(part, nn.Linear)}
inputs: dict[str, Tensor] = {}  # of every linear layer: (tokens, columns)


def keep(name: str) -> Callable:
    return lambda part, given: inputs.__setitem__(name, given[0].flatten(0, 1))


hooks = [part.register_forward_pre_hook(keep(name)) for name, part in linears.items()]
small(texts(training, 10, 256))
for hook in hooks:
    hook.remove()


def both_rounded(x: Tensor, w: Tensor, bits: int = 4) -> Tensor:
    """x @ w.T, with one scale for each token and one for each row of w."""
    return dequantize(*quantize_symmetric(x, bits)) @ dequantize(*quantize_symmetric(w, bits)).T


ways: dict[str, list[float]] = {"as it is": [], "SmoothQuant": [], "turned": []}
for layer in small.layers:
    w = layer.mlp.down_proj.weight
    x = inputs[f"layers.{layer.self_attn.layer}.mlp.down_proj"][::8]
    exact = x @ w.T
    s = smoothquant_scales(x.abs().amax(0), [w])
    ways["as it is"].append(relative(both_rounded(x, w), exact))
    ways["SmoothQuant"].append(relative(both_rounded(x / s, w * s), exact))
    ways["turned"].append(relative(both_rounded(rotate(x, 64), rotate(w, 64)), exact))
print("error of the product in %, layer by layer, both sides in 4 bits:")
for name, line in ways.items():
    print(f"  {name:12}", "  ".join(f"{e:5.1f}" for e in line))

# %% tags=["experiment", "figure"]
# Figure: a token's loud channels before and after the turn, and what that does to the error
fig, axes = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=[1.2, 1.2, 1])
x = inputs["layers.2.mlp.down_proj"][40:120]
for ax, values, title in zip(
    axes, (x, rotate(x, 64)), ("inputs of a down projection", "the same, turned"), strict=False
):
    spread_out = values.abs() / values.square().mean(1, keepdim=True).sqrt()
    image = ax.imshow(spread_out, cmap="magma_r", aspect="auto", vmax=8, interpolation="nearest")
    ax.set(xlabel="channel", ylabel="token" if ax is axes[0] else "")
    ax.set_title(f"{title}: largest {float(spread_out.amax(1).mean()):.0f} × rms", fontsize=10)
    ax.grid(False)
fig.colorbar(image, ax=axes[1], label="magnitude / rms of the token")
for i, (name, line) in enumerate(ways.items()):
    axes[2].bar(
        [k + 0.27 * (i - 1) for k in range(7)],
        line,
        width=0.26,
        label=name,
        color=plot.COLORS[i],
        edgecolor="black",
        hatch=["", "//", ""][i],
    )
axes[2].set(xlabel="layer", ylabel="% error of the product", ylim=(0, 1.35 * max(ways["as it is"])))
axes[2].set_title("both sides in 4 bits", fontsize=10)
axes[2].legend(fontsize=8, ncols=3)
plot.caption(
    fig,
    "Left: 80 tokens; each has a few channels far above its mean size, and they are other channels "
    "from token to token. A scale for a channel cannot follow them. Middle: after the rotation no "
    "number stands out (a loud block of 64 stays a loud block), with the same norm for each token. "
    "Right: the rotation takes about half of the error away, SmoothQuant little of it.",
)
plt.show()

# %% [markdown]
# **What came out.** This model has few channels that are loud in every token, the case for which
# SmoothQuant was made (and which large models show); it has tokens with a few loud numbers, each
# time in other places. A rotation does not ask where they are.

# %% [markdown]
# ## Four bits with an exponent {#fp4}
#
# Lesson 18 built small floats and the MX formats. Their use for weights and activations in four
# bits: a code is an **E2M1** number, one of $0, \frac12, 1, 1\frac12, 2, 3, 4, 6$ with a sign. Its
# levels are denser near 0, where most weights are. What differs is the scale.
#
# - **MXFP4**: blocks of 32, the scale a power of two, $2^{\lfloor\log_2 m\rfloor - 2}$ for a
#   largest magnitude $m$. So $m$ lands in $[4, 8)$, and what is above 6 is clipped.
# - **NVFP4**: blocks of 16, the scale an E4M3 number, so that $m$ lands close to 6. E4M3 ends at
#   448 and at $2^{-9}$, so a second scale, one float32 number $t$ for the whole tensor, shifts the
#   blocks' scales into its range: $t = M/(448\cdot 6)$, with $M$ the largest magnitude of all.
#
# Newer GPUs multiply both natively.

# %% [markdown]
# ### Exercise · Two kinds of scale


# %% exercise="fp4" minutes=18 difficulty=2 path="more"
def quantize_fp4(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x in MXFP4 or NVFP4: (levels, scale), both float32; levels · scale is what is read back.

    x: (rows, columns), float32 or bfloat16, finite; unchanged. kind: "mx" (blocks of 32 along the
    last axis) or "nv" (blocks of 16); ValueError for another kind, or where the block does not
    divide columns.
    scale: (rows, columns // block). levels: like x, in ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}: x / scale
    rounded to the nearest of them, in the middle between two of them to the one whose last bit is 0
    (0, 1, 2, 4), beyond ±6 to ±6.
    "mx": scale = 2**(floor(log2(m)) − 2), m the block's largest magnitude.
    "nv": scale = t · e, t = M / (448 · 6) with M the largest magnitude of x, and e = (m / 6) / t
        rounded to E4M3 (torch.float8_e4m3fn).
    A block whose m or e is 0 has levels 0 and scale 0. No other m is below 1e-30.

    "mx", a block with m = 7: scale 1; 7 becomes 6, 2.5 becomes 2, 0.75 becomes 1.
    """
    ### BEGIN SOLUTION
    block = {"mx": 32, "nv": 16}.get(kind)
    if block is None or x.shape[1] % block:
        raise ValueError(f"{kind!r} blocks and rows of {x.shape[1]}")
    cut = x.float().unflatten(1, (-1, block))
    m = cut.abs().amax(-1, keepdim=True)
    if kind == "mx":
        scale = torch.ldexp(torch.ones_like(m), torch.frexp(m).exponent - 3)
    else:
        t = m.max() / (448 * 6)
        e = (m / 6 / t).clamp(max=448).nan_to_num(0).to(torch.float8_e4m3fn)
        scale = e.float() * t
    scale = torch.where(m == 0, 0, scale)
    size = torch.where(scale > 0, cut / scale, 0).abs().clamp(max=6)
    # Steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6: torch.round takes even multiples.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    levels = torch.copysign(torch.round(size / step) * step, cut)
    return levels.flatten(1), scale[..., 0]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: floor of a logarithm</summary>
#
# `torch.log2` rounds: for a number just below a power of two it may give that power's exponent.
# `torch.frexp` is exact: m = f · 2**e with f in [½, 1), so that floor(log2 m) = e − 1.
# </details>
#
# <details><summary>Hint: rounding to uneven levels</summary>
#
# Between two powers of two the levels are even: steps of ½ below 2, of 1 below 4, of 2 above.
# `torch.round(size / step) * step` takes the even multiple in the middle, which is the level whose
# last bit is 0.
# </details>

# %% check="fp4" points=1
x = torch.zeros(1, 32)
x[0, :8] = torch.tensor([7.0, 2.5, 0.75, -0.25, -5.0, 3.5, -1.75, 1.25])
levels, scale = checks.parts(quantize_fp4(x, "mx"), "levels", "scale")
checks.close(scale, torch.tensor([[1.0]]), what="the scale of MXFP4, m = 7", dtype=torch.float32)
checks.close(
    levels[0, :8],
    torch.tensor([6.0, 2.0, 1.0, 0.0, -4.0, 4.0, -2.0, 1.0]),
    what="levels",
    hint="2.5 lies between 2 and 3, and 2 has the even last bit; 0.75 between 0.5 and 1.",
)


### BEGIN HIDDEN TESTS
def fp4_by_hand(x, kind):
    """(levels, scale, clear) in Python's own numbers; E4M3 from the list of all its values.

    clear is False where a number lies between two: there float32 may go either way. In MXFP4,
    whose scales are powers of two, nothing is rounded on the way, and everything is clear.
    """
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    block = 32 if kind == "mx" else 16
    e4m3 = sorted(
        {m * 2.0**-9 for m in range(8)}
        | {(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
    )

    def nearest(value, values):
        """(value, is it clear): the even index of two that are equally near."""
        order = sorted(range(len(values)), key=lambda i: (abs(values[i] - value), i % 2))
        best, second = (abs(values[i] - value) for i in order[:2])
        return values[order[0]], second - best > 1e-5 * value

    levels, clear = torch.zeros(x.shape), torch.ones(x.shape, dtype=torch.bool)
    scale = torch.zeros(x.shape[0], x.shape[1] // block)
    t = float(x.abs().max()) / (448 * 6)
    for i in range(x.shape[0]):
        for b in range(scale.shape[1]):
            held = x[i, b * block : (b + 1) * block].tolist()
            m = max(map(abs, held))
            if m == 0:
                continue
            known = True
            if kind == "mx":
                s = 2.0 ** (math.floor(math.log2(m)) - 2)
            else:
                e, known = nearest(m / 6 / t, e4m3)
                s = t * e
            scale[i, b] = s
            for j, value in enumerate(held):
                k = b * block + j
                if s:
                    size, sure = nearest(min(abs(value) / s, 6.0), grid)
                    levels[i, k] = math.copysign(size, value)
                    clear[i, k] = kind == "mx" or (sure and known)
                else:
                    clear[i, k] = known
    return levels, scale, clear


gen = checks.generator(12)
for kind in ("mx", "nv"):
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(6, 64, generator=gen) * torch.tensor([1.0, 1e-3, 30, 1e4, 1e-12, 2])[:, None]
        x[5] = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).repeat(8)
        x[5, ::17], x[2, :32] = 6.0, 0.0
        if kind == "nv":
            x[3] *= 1e-3  # so that row 5's blocks have a scale of their own range
        x = x.to(dtype)
        with checks.unchanged(x=x):
            levels, scale = checks.parts(quantize_fp4(x, kind), "levels", "scale")
        right, s, clear = fp4_by_hand(x.float(), kind)
        where = f"{kind!r}, {dtype}."
        assert levels.dtype == scale.dtype == torch.float32, (
            f"levels and scale are float32. {where}"
        )
        assert scale.shape == s.shape, f"scale has shape {tuple(scale.shape)}. {where}"
        known = clear.unflatten(1, (s.shape[1], -1)).any(-1)
        checks.close(scale[known], s[known], what="scale", rtol=1e-6, atol=0, hint=where)
        checks.close(levels[clear], right[clear], what="levels", rtol=0, atol=0, hint=where)
    assert levels.shape == x.shape, f"levels have shape {tuple(levels.shape)}, x {tuple(x.shape)}"
    x = torch.zeros(2, 64)
    levels, scale = quantize_fp4(x, kind)
    checks.close(levels, x, what=f"levels of zeros, {kind!r}")
    checks.close(scale, torch.zeros(2, 2 if kind == "mx" else 4), what=f"scale of zeros, {kind!r}")
    below = [(1 - 2.0**-24) * 2.0**e for e in (-30, 1, 10)]  # the last float32 before 2**e
    for m in (1.0, 2.0**-20, 2.0**40, *below):
        x[0, 3], x[1, 40] = m, -m
        levels, scale = quantize_fp4(x, kind)
        right, s, _ = fp4_by_hand(x, kind)
        checks.close(scale, s, what=f"{kind!r}, scale of a block with m = {m}", rtol=1e-6)
        checks.close(levels, right, what=f"{kind!r}, levels of a block with m = {m}")
checks.raises(ValueError, quantize_fp4, torch.ones(2, 48), "mx")
checks.raises(ValueError, quantize_fp4, torch.ones(2, 16), "mx")
checks.raises(ValueError, quantize_fp4, torch.ones(2, 24), "nv")
checks.raises(ValueError, quantize_fp4, torch.ones(1, 32), "fp4")
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: a model in 4 and in 3 bits {#experiment}
#
# All linear layers of `small` (82 percent of its parameters; the embedding stays as it is), in
# groups of 64, which divide both 256 and 704. The inputs from above, of ten training documents, are
# the calibration set; the model is judged on other, held-out documents. NF4 is lesson 25's: sixteen
# levels at the quantiles of a normal distribution, times the largest magnitude of a block of 64.
#
# On so little text the loss is a coarse judge: small changes help some tokens and harm others, and
# the loss can even fall by luck. The divergence KL(model ‖ rounded model) of the predictions is 0
# when nothing has changed and positive otherwise; it sees every change. The table prints both.
#
# **Write down first:** of the divergence that rounding to nearest causes at 4 bits, which share do
# GPTQ and AWQ take away? And of the squared output error of the layers?

# %% tags=["experiment"]
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
     0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip
hessians = {name: layer_hessian(x) for name, x in inputs.items()}
judged = texts(held_out, 6, 256)


def predictions(weights: dict[str, Tensor], tokens: Tensor = judged) -> Tensor:
    """Log-probabilities of each next token by `small` with these weights in place of its own."""
    named = {f"{name}.weight": w for name, w in weights.items()}
    return torch.func.functional_call(small, named, (tokens[:, :-1],)).log_softmax(-1)


def divergence(before: Tensor, after: Tensor) -> float:
    """KL(before ‖ after), nats a token: 0 where the predictions are the same."""
    return float((before.exp() * (before - after)).sum(-1).mean())


def nearest(name: str, bits: int, group: str | int = 64) -> Tensor:
    return rounded(linears[name].weight, bits, group)


def with_gptq(name: str, bits: int) -> Tensor:
    return dequantize(*gptq(linears[name].weight, hessians[name], bits, 64, block=64))


def with_awq(name: str, bits: int) -> Tensor:
    w = linears[name].weight
    s, _ = awq_search(w, inputs[name][::24], bits, 64)
    return rounded(w * s, bits, 64) / s


def with_nf4(name: str, bits: int) -> Tensor:
    blocks = linears[name].weight.unflatten(1, (-1, 64))
    largest = blocks.abs().amax(-1, keepdim=True)
    level = (blocks[..., None] / largest[..., None] - NF4).abs().argmin(-1)
    return (NF4[level] * largest).flatten(1)


# Bits a weight: the codes, and a float16 scale and a zero point of as many bits for each group.
runs = {
    "INT8, per row": (nearest, 8, 8.08),
    "INT4, nearest": (nearest, 4, 4 + 20 / 64),
    "INT4, GPTQ": (with_gptq, 4, 4 + 20 / 64),
    "INT4, AWQ": (with_awq, 4, 4 + 20 / 64),
    "NF4": (with_nf4, 4, 4 + 16 / 64),
    "INT3, nearest": (nearest, 3, 3 + 19 / 64),
    "INT3, GPTQ": (with_gptq, 3, 3 + 19 / 64),
    "INT3, AWQ": (with_awq, 3, 3 + 19 / 64),
}
original = predictions({})
print(f"{'':14} bits    MB   loss    KL    output error (nearest = 1)")
size = sum(part.weight.numel() for part in linears.values()) / 8e6
loss = float(F.nll_loss(original.transpose(1, 2), judged[:, 1:]))
print(f"{'float16':14} 16.00 {16 * size:5.1f}  {loss:.3f}")
quantized, lost, output = {}, {}, {}
for name, (method, bits, width) in runs.items():
    made = {
        layer: nearest(layer, 8, "channel") if bits == 8 else method(layer, bits)
        for layer in linears
    }
    after = predictions(made)
    quantized[name], lost[name] = made, divergence(original, after)
    output[name] = sum(
        float((inputs[layer][::16] @ (w - linears[layer].weight).T).square().sum())
        for layer, w in made.items()
    )
    loss = float(F.nll_loss(after.transpose(1, 2), judged[:, 1:]))
    ratio = output[name] / output.get(f"INT{bits}, nearest", output[name])
    print(f"{name:14} {width:5.2f} {width * size:5.1f}  {loss:.3f}  {lost[name]:.4f}  {ratio:.2f}")

# %% tags=["experiment", "figure"]
# Figure: what each method loses, where GPTQ puts its error, and AWQ's search
fig, axes = plt.subplots(1, 3, figsize=(13, 3.7), width_ratios=[1.05, 1, 1])
names = [name for name in runs if name != "INT8, per row"]
for i, name in enumerate(names):
    axes[0].barh(
        i,
        lost[name],
        color=plot.COLORS[5 if "4" in name else 0],
        edgecolor="black",
        hatch={"INT4, AWQ": "..", "INT3, AWQ": "..", "NF4": "xx"}.get(
            name, "//" * ("GPTQ" in name)
        ),
    )
    axes[0].annotate(f" {lost[name]:.3f}", (lost[name], i), va="center", fontsize=8)
axes[0].set_yticks(range(len(names)), names, fontsize=8)
axes[0].invert_yaxis()
axes[0].margins(x=0.2)
axes[0].set(xlabel="KL from the model, nats a token, held out")
axes[0].set_title("what rounding costs", fontsize=10)
axes[0].grid(False, axis="y")

layer = "layers.3.mlp.gate_proj"
values, vectors = torch.linalg.eigh(hessians[layer])
for name, color, marker in (
    ("INT4, nearest", plot.COLORS[1], "."),
    ("INT4, GPTQ", plot.COLORS[0], "x"),
):
    change = (quantized[name][layer] - linears[layer].weight).double()
    energy = (change @ vectors).square().mean(0)
    axes[1].scatter(
        values, energy / float(energy.mean()), s=9, color=color, marker=marker, label=name
    )
axes[1].set(
    xscale="log",
    yscale="log",
    xlabel="eigenvalue of H: how loud the inputs are there",
    ylabel="weight error in that direction (mean = 1)",
)
axes[1].set_title("where the error lies", fontsize=10)
axes[1].legend(fontsize=8)

alphas = [i / 20 for i in range(20)]
for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.3.mlp.gate_proj"):
    w, x = linears[name].weight, inputs[name][::32]
    curve = []
    for alpha in alphas:
        s = x.abs().mean(0) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        curve.append(float((x @ (rounded(w * s, 4, 64) / s - w).T).square().sum()))
    [line] = axes[2].plot(alphas, [c / curve[0] for c in curve], label=name.removeprefix("layers."))
    low = min(range(20), key=curve.__getitem__)
    axes[2].plot(alphas[low], curve[low] / curve[0], "o", color=line.get_color())
axes[2].axhline(1, color="#888888", linewidth=1, linestyle=":")
axes[2].set(xlabel="α", ylabel="squared output error (α = 0 is 1)", ylim=(0.5, 2))
axes[2].set_title("AWQ's search, 4 bits", fontsize=10)
axes[2].legend(fontsize=7)
plot.caption(
    fig,
    "Left: light bars 4 bits, dark ones 3. Middle: the change of one matrix, taken apart along the "
    "eigenvectors of its inputs. Rounding to nearest errs alike in all directions; GPTQ errs less "
    "where the inputs are loud, and pays with more where they are quiet. Right: the output error "
    "over α for three layers, minimum marked; it can't lie above the dotted line.",
)
plt.show()

# %% [markdown]
# **What came out.** 8 bits change next to nothing. At 4 and at 3 bits GPTQ has less than half of
# the squared output error of rounding to nearest, and takes a good third or more of the divergence
# away. AWQ's output error is smaller too, but only by a few
# percent, and the predictions gain next to nothing; at 3 bits they can be further off than with
# rounding to nearest. Two reasons. AWQ's law is about a layer's output on the calibration inputs,
# not about the model. And AWQ lives on loud channels: where a layer has some, as layer 1's down
# projection, its error falls; most layers of this model have none, while models of billions of
# parameters do. NF4 needs no zero point and is a little worse than INT4 with one.
#
# ### Which matrices hurt?
#
# Round one matrix at a time, to 2 bits so that it shows, and leave the other 48 as they are.

# %% tags=["experiment"]
short = judged[:2, :161]
undisturbed = predictions({}, short)


def harm(weights: dict[str, Tensor]) -> float:
    return divergence(undisturbed, predictions(weights, short))


kinds = [name.removeprefix("layers.0.") for name in linears if name.startswith("layers.0.")]
hurt = torch.tensor(
    [
        [
            harm({name: nearest(name, 2)})
            for name in (f"layers.{layer}.{kind}" for layer in range(len(small.layers)))
        ]
        for kind in kinds
    ]
)
print(f"all matrices in 2 bits: {harm({name: nearest(name, 2) for name in linears}):.2f}")
print(f"sum of the table:       {float(hurt.sum()):.2f}")

# %% tags=["experiment", "figure"]
# Figure: the harm of rounding one matrix alone to 2 bits
ax = plot.heatmap(
    1000 * hurt,
    xlabel="layer",
    ylabel="",
    title="one matrix in 2 bits",
    unit="divergence, thousandths of a nat",
    yticks=[kind.split(".")[1] for kind in kinds],
    annotate=".0f",
)
plot.caption(
    ax.figure,
    "KL divergence of the predictions when a single matrix is rounded to nearest in groups of 64. "
    "The down projections of the first and the last layer and the last layer's values hurt most, "
    "many others hardly. Recipes give the few more bits.",
)
plt.show()

# %% [markdown]
# ## Training with rounded weights {#qat}
#
# All methods so far take a finished model. **Quantization-aware training** lets it adapt: round in
# every forward pass, compute the loss with what is left, and train. The weights that the optimizer
# moves stay in full precision, since its steps are far smaller than $\Delta$. They gather until one
# of them tips a code.
#
# The derivative of rounding is 0 almost everywhere, so the gradient would be 0. The
# **straight-through estimator** (Bengio et al. 2013) pretends that rounding is the identity:
#
# $$\hat w = Q(w) \quad\text{forward}, \qquad \frac{\partial \hat w}{\partial w} := 1 \quad\text{backward}.$$
#
# It is a biased gradient of a step function, and a fair one of the slope through its steps. In
# code, `w + (Q(w) - w).detach()` has value $Q(w)$ and gradient 1, even to the last bit: the
# difference of two numbers that are within a factor of 2 of each other has no rounding error
# (Sterbenz's lemma), and where $Q(w)$ is not within a factor of 2 of $w$, it is 0.
#
# OpenAI's gpt-oss (MXFP4) and Moonshot's Kimi K2 Thinking (INT4 in groups of 32) were shipped after
# such training, of the experts' weights.

# %% [markdown]
# ### Exercise · Round forward, pass through backward


# %% exercise="qat" minutes=15 difficulty=2
def fake_quantize(w: Tensor, bits: int, group: str | int = "channel") -> Tensor:
    """What is read back of w, with the gradient of the identity.

    w: (rows, columns), any floating format; unchanged. The value is exactly
    dequantize(*quantize_symmetric(w, bits, group)), to the last bit, in w's format; the gradient
    that arrives goes to w as it is.
    """
    ### BEGIN SOLUTION
    back = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(w.dtype)
    return back + (w - w.detach())
    ### END SOLUTION


def qat_forward(model: nn.Module, x: Tensor, bits: int, group: str | int = "channel") -> Tensor:
    """model(x), as if the weight of each nn.Linear in the model (or the model, where it is one)
    were fake_quantize(weight, bits, group): gradients reach the model's own parameters. All else
    (biases, embeddings, norms) is used as it is, an embedding that shares a layer's weight too. The
    model is not changed: not its parameters, and not its parts either.
    """
    ### BEGIN SOLUTION
    weights = {
        f"{name}.weight".lstrip("."): fake_quantize(layer.weight, bits, group)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return torch.func.functional_call(model, weights, (x,), tie_weights=False)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a zero with a gradient</summary>
#
# `w - w.detach()` is exactly 0 and has the gradient of w.
# </details>
#
# <details><summary>Hint: other weights for one call</summary>
#
# `torch.func.functional_call(model, {"0.weight": …}, (x,))` runs the model with these tensors in
# place of its own, and puts nothing into it. `named_modules` gives the names. A tensor for one of
# several parts that share a weight goes to all of them, unless `tie_weights=False`.
# </details>


# %% tags=["support"]
# Support: a small model with two linear layers, an embedding and a norm
class Small(nn.Module):
    """Tokens (batch, seq) → (batch, seq, 5)."""

    def __init__(self, generator: torch.Generator, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.up = nn.Linear(width, 24)
        self.norm = nn.LayerNorm(24)
        self.blocks = nn.ModuleList([nn.Linear(24, 5, bias=False)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks[0](self.norm(F.silu(self.up(self.embed(tokens)))))


def replaced(model: Small, bits: int, group) -> Small:
    """A copy of the model with the weights of its linear layers read back from their codes."""
    twin = Small(torch.Generator().manual_seed(0)).to(model.embed.weight.dtype)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in (twin.up, twin.blocks[0]):
            layer.weight.copy_(read_back(layer.weight.detach(), bits, group, symmetric=True))
    return twin


def descend(model: nn.Module, loss: Tensor, step: int) -> float:
    """One step against the signs of the gradient, shorter and shorter; returns the loss."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.02 * 0.97**step * gradient.sign()
    return float(loss.detach())


# %% check="qat" points=1
w = torch.tensor([[-6.0, 1.5, 3.5, 4.0]], requires_grad=True)
y = fake_quantize(w, bits=3)
checks.close(y.detach(), torch.tensor([[-6.0, 2.0, 4.0, 4.0]]), what="the value")
[grad] = torch.autograd.grad(y, w, torch.tensor([[1.0, -2.0, 3.0, 0.5]]))
checks.close(
    grad,
    torch.tensor([[1.0, -2.0, 3.0, 0.5]]),
    what="the gradient of w",
    hint="It passes through as if nothing had been rounded.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(13)
for bits, group in [(3, "channel"), (4, 8), (2, "tensor"), (8, 4)]:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        w = normal(5, 24, generator=gen, scale=0.3).to(dtype).requires_grad_()
        with checks.kept(w):
            y = fake_quantize(w, bits, group)
        where = f"{bits} bits, group {group!r}, {dtype}."
        codes, scale, _, tie = by_hand(w.detach(), bits, group, symmetric=True)
        kept = torch.promote_types(dtype, torch.float32)
        assert y.dtype == dtype, f"the value is {y.dtype} for w in {dtype}"
        expected = (codes.to(kept) * spread(scale.to(kept), w)).to(dtype)
        checks.close(y.detach()[~tie], expected[~tie], what="the value", hint=where)
        again = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(dtype)
        hint = f"to the last bit. {where}"
        checks.close(y.detach(), again, what="the value", rtol=0, atol=0, hint=hint)
        # Numbers of one code are one number, to the last bit.
        rows = (
            [y.detach()]
            if group == "tensor"
            else y.detach().reshape(-1, 24 if group == "channel" else group)
        )
        most = max(len(row.flatten().unique()) for row in rows)
        assert most <= 2**bits - 1, (
            f"a range holds {most} different numbers, not {2**bits - 1} at most. {where}"
        )
        arrives = normal(5, 24, generator=gen).to(dtype)
        [grad] = torch.autograd.grad(y, w, arrives)
        checks.close(grad, arrives, what="the gradient", dtype=dtype, hint=where)
zeros = torch.zeros(2, 4, requires_grad=True)
y = fake_quantize(zeros, 3)
checks.close(torch.autograd.grad(y.sum(), zeros)[0], torch.ones(2, 4), what="the gradient at 0")
### END HIDDEN TESTS

# %% check="qat" points=2
gen = checks.generator(14)
model, tokens = Small(gen), torch.tensor([[1, 5, 7], [0, 19, 3]])
with checks.kept(model):
    y = qat_forward(model, tokens, bits=3, group=6)
checks.close(
    y,
    replaced(model, 3, 6)(tokens),
    what="the output with weights of 3 bits",
    mistakes={"weights that are not rounded": model(tokens)},
)
### BEGIN HIDDEN TESTS
for bits, group, dtype in [
    (2, "channel", torch.float32),
    (4, 12, torch.float64),
    (3, "tensor", torch.float32),
]:
    model = Small(gen).to(dtype).train(bits == 2)
    tokens = torch.randint(0, 20, (3, 4), generator=gen)
    arrives = normal(3, 4, 5, generator=gen).to(dtype)
    model.embed.weight.grad = torch.full_like(model.embed.weight, 7.0)  # a stale one
    with checks.kept(model):
        y = qat_forward(model, tokens, bits, group)
    twin = replaced(model, bits, group)
    where = f"{bits} bits, group {group!r}, {dtype}."
    checks.close(y, twin(tokens), what="the output", dtype=dtype, rtol=1e-4, hint=where)
    # Straight through: the gradients are those of the rounded model, at its rounded weights.
    found = torch.autograd.grad(y, list(model.parameters()), arrives, allow_unused=True)
    expected = torch.autograd.grad(twin(tokens), list(twin.parameters()), arrives)
    for (name, _), g, e in zip(twin.named_parameters(), found, expected, strict=True):
        assert g is not None, f"no gradient reaches {name}. {where}"
        checks.close(g, e, what=f"the gradient of {name}", rtol=1e-3, hint=where)
lone = nn.Linear(4, 2)
seen = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
expected = F.linear(seen, read_back(lone.weight.detach(), 2, "channel", True).float(), lone.bias)
for model in (nn.Sequential(lone), lone):
    y = qat_forward(model, seen, 2)
    checks.close(y, expected, what="a model of one layer", rtol=1e-4)
# One weight for an embedding and two linear layers: rounded in the layers, and there alone.
tied = nn.Sequential(
    nn.Embedding(8, 8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8, bias=False)
).double()
tied[0].weight = tied[1].weight = tied[3].weight
with torch.no_grad():
    tied[0].weight.copy_(normal(8, 8, generator=gen))
    tied[1].bias.copy_(normal(8, generator=gen))
tokens, arrives = torch.tensor([[1, 5, 0]]), normal(1, 3, 8, generator=gen).double()
with checks.kept(tied):
    y = qat_forward(tied, tokens, 2)
table = tied[0].weight.detach().clone().requires_grad_()
up, down = (read_back(table.detach(), 2, "channel", True).requires_grad_() for _ in range(2))
expected = F.silu(table[tokens] @ up.T + tied[1].bias.detach()) @ down.T
hint = "A linear layer's weight is rounded in that layer, and nowhere else."
checks.close(y, expected, what="the output where three parts share a weight", hint=hint)
[found] = torch.autograd.grad(y, [tied[0].weight], arrives)
expected = sum(torch.autograd.grad(expected, [table, up, down], arrives))
checks.close(found, expected, what="the gradient of a weight that three parts share", hint=hint)
### END HIDDEN TESTS

# %% check="qat" points=1
# A toy, at 2 bits: training with rounded weights must end well below rounding afterwards.
gen = checks.generator(15)
tokens = torch.arange(20).view(1, 20)
goal, student = Small(gen)(tokens).detach(), Small(gen)
moved = student.up.weight.detach().clone()
losses = [
    descend(student, F.mse_loss(qat_forward(student, tokens, bits=2, group=12), goal), step)
    for step in range(40)
]
assert not torch.equal(student.up.weight, moved), "training moves the weights in full precision"
assert losses[-1] < 0.6 * losses[0], (
    f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in 40 steps: does a gradient reach "
    "the weights?"
)
### BEGIN HIDDEN TESTS
ends = []
for _ in range(3):
    goal, first, end = Small(gen)(tokens).detach(), Small(gen), {}
    for rounds in (False, True):
        model = Small(torch.Generator().manual_seed(1))
        model.load_state_dict(first.state_dict())
        for step in range(80):
            y = qat_forward(model, tokens, 2, 12) if rounds else model(tokens)
            descend(model, F.mse_loss(y, goal), step)
        end[rounds] = float(F.mse_loss(replaced(model, 2, 12)(tokens), goal).detach())
    ends.append((end[True], end[False]))
better = sum(trained < 0.75 * without for trained, without in ends)
assert better >= 2, (  # one of several hundred toys gets stuck
    f"rounded to 2 bits at the end, {better} of 3 models trained with rounded weights have a "
    "quarter less loss than those trained without: "
    + ", ".join(f"{trained:.3f} against {without:.3f}" for trained, without in ends)
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: `tiny` in 3 bits
#
# Symmetric, groups of 32: seven levels. Sixty steps on a few training documents, once with rounded
# weights, once without and rounded at the end. The second run is the control: it says what the
# sixty steps alone are worth. **Write down first:** how much of what rounding costs comes back?

# %% tags=["experiment"]
pool, test = texts(training, 200, 225), texts(held_out, 6, 300)


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


@torch.no_grad()
def tested(model: nn.Module, bits: int | None) -> float:
    seen = test[:, :-1]
    return float(nats(model(seen) if bits is None else qat_forward(model, seen, bits, 32), test))


def sixty_steps(rounds: bool, seed: int = 0) -> tuple[nn.Module, dict[int, float]]:
    """`tiny` after training; its held-out loss in 3 bits on the way, by step."""
    model, _ = models.load("tiny", device="cpu")
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    on_the_way = {}
    for step in range(60):
        if step in (0, 10, 20, 40):
            on_the_way[step] = tested(model, 3)
        optimizer.param_groups[0]["lr"] = 3e-4 * min(1.0, (60 - step) / 36)
        rows, start = torch.randint(len(pool), (4,), generator=g), int(step * 47 % 128)
        tokens = pool[rows, start : start + 97]
        seen = tokens[:, :-1]
        loss = nats(qat_forward(model, seen, 3, 32) if rounds else model(seen), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, on_the_way | {60: tested(model, 3)}


aware, with_rounding = sixty_steps(True)
plain, without = sixty_steps(False)
tiny, _ = models.load("tiny", device="cpu")
before = tested(tiny, None)
print(f"tiny, full precision:                {before:.3f}")
print(f"rounded to 3 bits:                   {with_rounding[0]:.3f}")
print(f"trained without rounding, rounded:   {without[60]:.3f}")
print(f"trained with rounding:               {with_rounding[60]:.3f}")
back = (with_rounding[0] - with_rounding[60]) / (with_rounding[0] - before)
print(f"so {100 * back:.0f} % of what rounding cost came back")

# %% tags=["experiment", "figure"]
# Figure: sixty steps with rounded weights, and how far the weights moved for it
fig, axes = plt.subplots(1, 2, figsize=(11, 3.5))
plot.curves(
    list(with_rounding),
    {
        "trained with rounding": list(with_rounding.values()),
        "trained without": list(without.values()),
    },
    xlabel="step",
    ylabel="nats a token, held out, in 3 bits",
    title="three bits, won back",
    ax=axes[0],
)
axes[0].axhline(before, color="#888888", linewidth=1, linestyle=":")
axes[0].annotate("full precision", (60, before), ha="right", va="bottom", fontsize=8)
moved, changed = [], []
for old, new in zip(tiny.modules(), aware.modules(), strict=True):
    if isinstance(old, nn.Linear):
        codes, scale = quantize_symmetric(old.weight.detach(), 3, 32)
        after, _ = quantize_symmetric(new.weight.detach(), 3, 32)
        step = scale.repeat_interleave(32, 1)
        moved.append(((new.weight - old.weight).detach() / step).flatten())
        changed.append((codes != after).flatten())
moved, changed = torch.cat(moved), torch.cat(changed)
bins = torch.linspace(-0.5, 0.5, 61)
axes[1].hist(moved, bins=bins, color=plot.COLORS[5], label="all weights")
axes[1].hist(moved[changed], bins=bins, color=plot.COLORS[2], label="whose code changed")
axes[1].set(
    xlabel="movement in sixty steps (in steps of the code, Δ)", ylabel="weights", yscale="log"
)
axes[1].set_title(f"{100 * float(changed.float().mean()):.0f} % of the codes have changed")
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Left: most of what is won comes in the first twenty steps. Right: hardly a weight has "
    "moved by half a step; the codes that changed lay near the middle between two. That "
    "is why the moving weights must be kept in full precision.",
)
plt.show()

# %% [markdown]
# **What came out.** Training with rounding brings back most of what three bits cost; the same steps
# without rounding bring back little. The first run's gain is not that it saw more text, but that
# its loss saw the levels.

# %% [markdown]
# ## Eight codes in a word {#packing}
#
# Memory has no 4-bit numbers. Eight codes share an int32 **word**: the code in bits $4i$ to $4i+3$
# (a nibble) is $(\text{word} \gg 4i)\ \&\ 15$. Two orders are in use.
#
# ```
# bits       28–31  24–27  20–23  16–19  12–15   8–11   4–7    0–3
# "gptq"        7      6      5      4      3      2      1      0      which of the eight codes
# "awq"         7      5      3      1      6      4      2      0
# ```
#
# AWQ's order looks odd and has a reason: codes 0 and 1 stand 16 bits apart, in the lower and upper
# half of the word. One mask, `0x000F000F`, cuts out both, each in the place of one half of a pair
# of float16 numbers. A few more bit operations make two float16 numbers at once, in the right
# order. A checkpoint read in the wrong order gives a model that runs and writes nonsense.

# %% [markdown]
# ### Exercise · Pack and unpack

# %%
ORDERS = {"gptq": (0, 1, 2, 3, 4, 5, 6, 7), "awq": (0, 2, 4, 6, 1, 3, 5, 7)}


# %% exercise="packing" minutes=10 difficulty=1
def pack_int4(codes: Tensor, order: str = "gptq") -> Tensor:
    """Codes from 0 to 15, eight to a word.

    codes: (…, n), uint8, any layout; unchanged. Returns (…, n // 8), int32: bits 4i to 4i + 3 of a
    word hold code number ORDERS[order][i] of its eight consecutive codes. ValueError where 8 does
    not divide n.
    "gptq": the codes 1, 0, …, 0 give the word 1; 0, 1, 0, …, 0 give 16; 0, …, 0, 8 give −2**31.
    """
    ### BEGIN SOLUTION
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape[-1]} codes do not fill words of eight")
    eights = codes.unflatten(-1, (-1, 8)).to(torch.int32)
    words = torch.zeros_like(eights[..., 0])
    for i, k in enumerate(ORDERS[order]):
        words = words | (eights[..., k] << (4 * i))
    return words
    ### END SOLUTION


def unpack_int4(words: Tensor, order: str = "gptq") -> Tensor:
    """The codes (…, 8·m), uint8, of packed words (…, m), int32: the inverse of pack_int4."""
    ### BEGIN SOLUTION
    nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1)
    back = [ORDERS[order].index(k) for k in range(8)]
    return nibbles[..., back].flatten(-2).to(torch.uint8)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: uint8 has eight bits</summary>
#
# `codes << 12` in uint8 is 0. Convert to int32 first.
# </details>
#
# <details><summary>Hint: the way back</summary>
#
# Nibble i goes to place ORDERS[order][i]. To fill place k, find the nibble i that goes there.
# </details>

# %% check="packing" points=1
codes = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 0, 8]], dtype=torch.uint8)
words = pack_int4(codes)
checks.close(
    words,
    torch.tensor([[1, 3 + 2 * 16 - 2**31]], dtype=torch.int32),
    what="two words",
    dtype=torch.int32,
    hint="Code 7 stands in the highest bits, the sign bit among them.",
)
checks.close(unpack_int4(words), codes, what="unpack_int4", dtype=torch.uint8)
ramp = torch.arange(8, dtype=torch.uint8)
checks.close(
    pack_int4(ramp, "awq"),
    torch.tensor([0x75316420], dtype=torch.int32),
    what='0, 1, … 7 in the order "awq"',
    mistakes={
        "the inverse order": torch.tensor([0x73625140], dtype=torch.int32),
        'the order "gptq"': torch.tensor([0x76543210], dtype=torch.int32),
    },
)
checks.close(unpack_int4(pack_int4(ramp, "awq"), "awq"), ramp, what='unpack_int4, "awq"')
### BEGIN HIDDEN TESTS
gen = checks.generator(16)
orders = {"gptq": [0, 1, 2, 3, 4, 5, 6, 7], "awq": [0, 2, 4, 6, 1, 3, 5, 7]}
for shape in [(3, 40), (8,), (2, 5, 16), (4, 0), (0, 8)]:
    for order, places in orders.items():
        codes = torch.randint(0, 16, shape, generator=gen).to(torch.uint8)
        if len(shape) == 2:
            codes = codes.T.contiguous().T
        with checks.unchanged(codes=codes):
            words = pack_int4(codes, order)
        plain = codes.reshape(-1, 8).tolist()
        numbers = [sum(eight[k] * 16**i for i, k in enumerate(places)) for eight in plain]
        expected = torch.tensor(
            [n - 2**32 if n >= 2**31 else n for n in numbers], dtype=torch.int32
        )
        expected = expected.reshape(*shape[:-1], shape[-1] // 8)
        where = f"shape {shape}, order {order!r}."
        checks.close(words, expected, what="the words", dtype=torch.int32, hint=where)
        with checks.unchanged(words=expected):
            found = unpack_int4(expected, order)
        checks.close(found, codes, what="unpack_int4", dtype=torch.uint8, hint=where)
checks.raises(ValueError, pack_int4, torch.zeros(2, 12, dtype=torch.uint8))
### END HIDDEN TESTS

# %% [markdown]
# ## The kernel: dequantize in registers {#kernel}
#
# To dequantize into memory and then multiply would read 4 bits and write and read 16: worse than no
# quantization. The kernel loads words, makes numbers of them in registers, and multiplies.
#
# With few tokens $M$ in a batch, a product does $2M$ FLOPs for each weight. At half a byte a weight
# that is $4M$ FLOPs a byte; an H200's bfloat16 units and memory are in balance at 206. So up to a
# batch of 50 the bytes decide, and four bits in place of sixteen can be worth nearly four times.
# Far beyond that, dequantizing is extra work and bfloat16 weights win.
#
# What the kernel does for one tile of $Y = X\hat W^\top$:
#
# 1. **A word is loaded once.** `words` $(N, K/8)$ is packed along $K$. A tile of (BLOCK_N, BLOCK_W)
#    words holds eight times as many codes.
# 2. **Nibble by nibble.** For $i = 0 \dots 7$, `(words >> 4·i) & 15` is a tile of codes of the
#    columns $k = 8\cdot\text{word} + i$. They meet every eighth column of $x$. The sum over $k$ may
#    be taken in any order, so eight small products do what one large one would.
# 3. **Its own group.** Column $k$ belongs to group $k$ // GROUP. A tile may hold several groups,
#    and a group several tiles. A scale for each word serves all its eight codes, since GROUP is a
#    multiple of 8.
# 4. **Transposed.** The weights are the *first* operand of `tl.dot`: on a Hopper GPU that one may
#    come from registers, and its 64 rows fit the tensor cores; the few tokens are the second.

# %% [markdown]
# Point 3 has a history. In 2026 kernels of two serving systems took the scale of a tile's first
# column for all of it. That is right as long as a tile lies in one group. With a larger tile
# nothing failed either: a user noticed that the model repeated tool calls and left tasks unfinished
# (vLLM, pull request 39705; the same in SGLang's FP8 kernel, with tiles set by hand, is issue
# 39626).
#
# ### Exercise · W4A16
#
# A program's pointers, the tile of sums and the store are given. Write the loop over the words.


# %% exercise="w4a16_kernel" minutes=25 difficulty=3
@triton.jit
def w4a16_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, x_row, words_row, scale_row, zero_row, y_row,
    n_tokens, n_out, n_words, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of y = x @ w.T, w = scale · (code − zero), with w in words of eight 4-bit codes.

    x: (n_tokens, K), float32 or half, K = 8 · n_words; y: (n_tokens, n_out), of x's format.
    words: (n_out, n_words), int32, order "gptq": bits 4i to 4i + 3 of word j hold the code of
        column 8j + i. scale: (n_out, K / GROUP), x's format; zero: the same, uint8, 0 to 15: column
        k belongs to group k // GROUP. GROUP is a multiple of 8 and divides K.
    Every tensor has rows of its own stride (x_row, …); numbers of a row lie side by side.

    Grid: (⌈n_out / BLOCK_N⌉, ⌈n_tokens / BLOCK_M⌉). Powers of two: BLOCK_M tokens, BLOCK_N outputs,
    BLOCK_W words, each at least 16. A tile of words may be smaller or larger than a group, and a
    group may begin inside it. w is computed in float32 and rounded to x's format; sums are float32,
    products of float32 without TF32. A program loads each of its words once (rows past the last are
    masked, not wrapped around), and nothing outside the tensors.
    """
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Where the rows begin: (BLOCK_N, 1) for the weights, (1, BLOCK_M) for the inputs.
    out_rows, token_rows = outs[:, None].to(tl.int64), tokens[None, :].to(tl.int64)
    words_ptrs, x_ptrs = words_ptr + out_rows * words_row, x_ptr + token_rows * x_row
    scale_ptrs, zero_ptrs = scale_ptr + out_rows * scale_row, zero_ptr + out_rows * zero_row

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # yᵀ: the weights are the first operand
    # The loop over tiles of words, which brings acc up to date:
    ### BEGIN SOLUTION
    for start in range(0, n_words, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        inside = at < n_words
        known = (outs < n_out)[:, None] & inside[None, :]
        words = tl.load(words_ptrs + at[None, :], mask=known, other=0)
        group = at * 8 // GROUP  # of each word: a tile may hold several
        scale = tl.load(scale_ptrs + group[None, :], mask=known, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptrs + group[None, :], mask=known, other=0).to(tl.float32)
        for i in tl.static_range(8):
            codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
            w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
            x = tl.load(
                x_ptrs + (8 * at + i)[:, None],
                mask=inside[:, None] & (tokens < n_tokens)[None, :],
                other=0.0,
            )
            acc = tl.dot(w, x, acc, input_precision="ieee")
    ### END SOLUTION

    y_ptrs = y_ptr + token_rows * y_row + outs[:, None]
    inside = (outs < n_out)[:, None] & (tokens < n_tokens)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


# %% [markdown]
# <details><summary>Hint: shapes in the loop</summary>
#
# With `at = start + tl.arange(0, BLOCK_W)`: words, scale and zero are (BLOCK_N, BLOCK_W), from
# `words_ptrs + at[None, :]`; a tile of x is (BLOCK_W, BLOCK_M), from `x_ptrs + columns[:, None]`.
# Their `tl.dot` is (BLOCK_N, BLOCK_M).
# </details>
#
# <details><summary>Hint: a loop of eight</summary>
#
# `for i in tl.static_range(8)` is unrolled, so that `i` is a constant of the compiled code.
# </details>
#
# <details><summary>Hint: a type error on a GPU that the interpreter does not show</summary>
#
# Both operands of `tl.dot` have one format: `.to(x_ptr.dtype.element_ty)` for the weights.
# </details>

# %%
# (BLOCK_N, BLOCK_W, warps, pipeline stages) to choose from; the interpreter takes the first.
CONFIGS = tuple(
    triton.Config({"BLOCK_N": n, "BLOCK_W": w}, num_warps=warps, num_stages=stages)
    for n, w, warps, stages in [
        (64, 16, 4, 4),
        (64, 32, 4, 3),
        (128, 16, 4, 4),
        (128, 32, 8, 3),
        (64, 64, 8, 2),
    ]
)


def w4a16(x, words, scale, zero, group, blocks=None, y=None):
    """x (tokens, K) times the transpose of a packed weight (rows, K): (tokens, rows).

    words (rows, K / 8), scale and zero (rows, K / group): see w4a16_kernel. blocks: (BLOCK_M,
    BLOCK_N, BLOCK_W), or None for the fastest of CONFIGS.
    """
    n_tokens, n_out, n_words = len(x), len(words), words.shape[1]
    if y is None:
        y = torch.empty(n_tokens, n_out, dtype=x.dtype, device=x.device)
    tensors = x, words, scale, zero, y
    sizes = *(t.stride(0) for t in tensors), n_tokens, n_out, n_words

    def grid(meta):
        return triton.cdiv(n_out, meta["BLOCK_N"]), triton.cdiv(n_tokens, meta["BLOCK_M"])

    if blocks is None:
        some = min(64, max(16, triton.next_power_of_2(n_tokens)))
        tuned = autotuned(w4a16_kernel, CONFIGS, ("n_out", "n_words", "GROUP"), bucket=(some,))
        tuned[grid](*tensors, *sizes, GROUP=group, BLOCK_M=some)
    else:
        tile = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_W"), blocks, strict=True))
        w4a16_kernel[grid](*tensors, *sizes, GROUP=group, **tile)
    return y


# %% tags=["support"]
# Support: packed weights at random, their product in float64, and the kernel among canaries
def packed(rows, inner, group, generator, dtype=torch.float32):
    """(words, scale, zero, w): random codes and zero points, and in float64 what they mean."""
    codes = torch.randint(0, 16, (rows, inner), generator=generator)
    zero = torch.randint(0, 16, (rows, inner // group), generator=generator)
    scale = checks.randn(rows, inner // group, generator=generator, dtype=dtype).abs() * 0.1 + 0.02
    shifts = torch.tensor([16**i for i in range(8)])
    words = (codes.view(rows, -1, 8) * shifts).sum(-1)  # as unsigned numbers
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    where = profile.device
    w = (codes - zero.repeat_interleave(group, 1)).to(where) * scale.double().repeat_interleave(
        group, 1
    )
    return words.to(where), scale, zero.to(torch.uint8).to(where), w


def among_canaries(x, words, scale, zero, group, blocks):
    """w4a16, each tensor in a buffer of its own with NaN (the largest integer) around its rows."""
    y = torch.full((len(x), len(words)), math.nan, dtype=x.dtype, device=x.device)
    tensors = {"x": x, "words": words, "scale": scale, "zero": zero, "y": y}
    with checks.buffers(**tensors, written=("y",)) as held:
        w4a16(held.x, held.words, held.scale, held.zero, group, blocks, held.y)
    return held.y.clone()


@checks.measured
def far_rows(kernel) -> tuple[set, set, list[int]]:
    """What the kernel reads and writes with rows 2³⁰ elements apart, in bytes, and where x, words,
    scale, zero and y begin. Interpreter only: no memory is touched."""
    x, y, scale = (torch.zeros(1) for _ in range(3))
    words, zero = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.uint8)
    with checks.traffic(dry=True) as seen:
        kernel[1, 1](
            x, words, scale, zero, y, *[2**30] * 5, 5, 6, 4, GROUP=16, BLOCK_M=16, BLOCK_N=16,
            BLOCK_W=16,
        )  # fmt: skip
    return set(seen.read), set(seen.written), [t.data_ptr() for t in (x, words, scale, zero, y)]


# %% check="w4a16_kernel" points=2
# One tile of 16 outputs and 16 words, so 128 columns, in groups of 32: four groups in a tile.
gen = checks.generator(17)
words, scale, zero, w = packed(16, 128, 32, gen)
x = checks.randn(3, 128, generator=gen)
with checks.launches() as launched, checks.compiled():
    y = w4a16(x, words, scale, zero, 32, blocks=(16, 16, 16))
codes = w / scale.double().repeat_interleave(32, 1) + zero.repeat_interleave(32, 1)
first = (codes - zero[:, :1]) * scale[:, :1].double()
shuffled = w.view(16, 16, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(16, 128)
checks.relative_l2(
    y,
    x.double() @ w.T,
    2e-6,
    what="y",
    mistakes={
        "leaving out the zero point": x.double()
        @ (codes * scale.double().repeat_interleave(32, 1)).T,
        "using the first group's scale and zero for the whole tile": x.double() @ first.T,
        "the order of AWQ's nibbles": x.double() @ shuffled.T,
    },
)
assert launched.programs == 1, "one tile of outputs and one of tokens are one program"
### BEGIN HIDDEN TESTS
gen = checks.generator(18)
for tokens, rows, inner, group, blocks in [
    (1, 20, 256, 64, (16, 16, 16)),  # several tiles to a sum, two groups in each
    (21, 37, 72, 24, (16, 16, 16)),  # everything ragged; groups begin inside a tile
    (5, 20, 640, 320, (16, 32, 16)),  # a group of several tiles and a half
    (33, 17, 88, 8, (32, 16, 32)),  # a scale for every word
    (2, 16, 264, 264, (16, 16, 16)),  # one group
]:
    words, scale, zero, w = packed(rows, inner, group, gen)
    x = checks.randn(tokens, inner, generator=gen)
    with (
        checks.launches() as launched,
        checks.forbidden("mm", "matmul", "bmm", "linear", "einsum"),
    ):
        y = among_canaries(x, words, scale, zero, group, blocks)
    assert launched.kernels["w4a16_kernel"] == 1, "the kernel was not launched, or more than once"
    checks.relative_l2(
        y,
        x.double() @ w.T,
        2e-6,
        what="y",
        hint=f"{tokens} tokens, {rows} outputs, K = {inner}, groups of {group}, (BLOCK_M, BLOCK_N, "
        f"BLOCK_W) = {blocks}, NaN between the rows and around the tensors.",
    )
### END HIDDEN TESTS

# %% check="w4a16_kernel" points=2
# K is no multiple of the tile: 12 words in tiles of 16. Beyond a row's end lie NaN, which no mask
# of the weights alone keeps out of a product.
gen = checks.generator(19)
words, scale, zero, w = packed(20, 96, 32, gen)
x = checks.randn(4, 96, generator=gen)
with checks.compiled():
    y = among_canaries(x, words, scale, zero, 32, (16, 16, 16))
checks.relative_l2(
    y,
    x.double() @ w.T,
    2e-6,
    what="y with a ragged tile of words",
    hint="0 · NaN is NaN: mask x too, at 8 · n_words columns.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(20)
for tokens, rows, inner, group in [(17, 20, 136, 8), (16, 20, 8, 8)]:
    words, scale, zero, w = packed(rows, inner, group, gen)
    x = checks.randn(tokens, inner, generator=gen)
    guards = [checks.guarded(t, row_pad=p) for t, p in ((x, 3), (words, 5), (scale, 1), (zero, 2))]
    target = checks.guarded(torch.zeros(tokens, rows, device=x.device), row_pad=7, what="y")
    w4a16(*(guard.tensor for guard in guards), group, (16, 16, 16), target.tensor)
    for guard in (*guards, target):
        guard.intact()
    where = f"{tokens} tokens, {rows} outputs, K = {inner}, groups of {group}."
    checks.relative_l2(target.tensor.clone(), x.double() @ w.T, 2e-6, what="y", hint=where)
    if profile.interpret:
        words, x = words.contiguous(), x.contiguous()
        with checks.traffic() as seen:
            w4a16(x, words, scale, zero, group, (16, 16, 16))
        tiles = -(-tokens // 16)
        assert seen.within(words) <= words.numel() * tiles, (
            f"{seen.within(words)} words are loaded where {words.numel() * tiles} are enough: load "
            "a tile of words once, and cut the eight codes out of it. " + where
        )
        due = x.numel() * -(-rows // 16)
        assert seen.within(x) <= due, (
            f"{seen.within(x)} numbers of x are loaded, {due} are enough. {where}"
        )
if profile.interpret:
    found, written, (x, words, scale, zero, y) = far_rows(w4a16_kernel)
    far = 2**30
    expected = {x + 4 * (m * far + k) for m in range(5) for k in range(32)}
    expected |= {words + 4 * (n * far + k) for n in range(6) for k in range(4)}
    expected |= {scale + 4 * (n * far + k) for n in range(6) for k in range(2)}
    expected |= {zero + n * far + k for n in range(6) for k in range(2)}
    hint = "Is a row 64 bits wide before it is multiplied by its stride?"
    assert found == expected, f"rows 2³⁰ elements apart: read in the wrong place. {hint}"
    expected = {y + 4 * (m * far + n) for m in range(5) for n in range(6)}
    assert written == expected, f"rows 2³⁰ elements apart: written in the wrong place. {hint}"
### END HIDDEN TESTS

# %% check="w4a16_kernel" points=1
# Half precision: weights are rounded once, and sums are float32.
gen = checks.generator(21)
words, scale, zero, w = packed(16, 256, 32, gen, dtype=torch.float16)
x = (checks.randn(4, 256, generator=gen) + 0.5).half()
with checks.compiled():
    y = w4a16(x, words, scale, zero, 32, blocks=(16, 16, 16))
assert y.dtype == torch.float16, f"y has dtype {y.dtype} for x in float16"
checks.relative_l2(y, x.double() @ w.half().double().T, 4e-4, what="y in float16")
### BEGIN HIDDEN TESTS
halves = [torch.float16] if profile.interpret else [torch.float16, torch.bfloat16]
for dtype in halves:
    words, scale, zero, w = packed(16, 2048, 128, gen, dtype=dtype)
    x = (checks.randn(2, 2048, generator=gen) * 0.1 + 1).to(dtype)
    zero.fill_(15)  # every weight is negative: partial sums grow to thousands of steps
    w = torch.zeros_like(w)
    for i in range(8):
        w[:, i::8] = ((words.double() // 1).long() >> (4 * i) & 15).double() - 15
    w = (w * scale.double().repeat_interleave(128, 1)).to(dtype).double()
    y = w4a16(x, words, scale, zero, 128, blocks=(16, 16, 32))
    assert y.dtype == dtype, f"y has dtype {y.dtype} for x in {dtype}"
    checks.relative_l2(
        y,
        x.double() @ w.T,
        4e-4 if dtype == torch.float16 else 3e-3,
        what=f"y for K = 2048 in {dtype}",
        hint="Sums are float32, and (code − zero) · scale is, before it is rounded.",
    )
    # Two groups that cancel: what is left comes from the rounding of w.
    words, scale, zero, _ = packed(16, 64, 32, gen, dtype=dtype)
    words.fill_(-1)  # all codes are 15
    zero[:, 0], zero[:, 1] = 0, 2
    scale[:, 1] = scale[:, 0] * (15 / 13)
    x = torch.ones(2, 64, dtype=dtype, device=profile.device)
    x[:, 32:] = -1
    w = ((15 - zero.double()) * scale.double()).to(dtype).double().repeat_interleave(32, 1)
    checks.relative_l2(
        w4a16(x, words, scale, zero, 32, blocks=(16, 16, 16)),
        x.double() @ w.T,
        4e-4 if dtype == torch.float16 else 3e-3,
        what=f"y of weights that cancel in {dtype}",
        hint="A weight is rounded to x's format before it is multiplied.",
    )
words, scale, zero, w = packed(16, 64, 32, gen)
x = checks.randn(2, 64, generator=gen) * 1e4
x[1] *= 1e-8
y = w4a16(x, words, scale, zero, 32, blocks=(16, 16, 16))
for i in range(2):
    checks.relative_l2(
        y[i], x[i].double() @ w.T, 2e-6, what=f"y for inputs near {1e4 if i == 0 else 1e-4:g}"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## On the hardware
#
# A layer of 8192 × 8192, as in a model of 70 billion parameters, in groups of 128. On a GPU the
# next cell measures your kernel beside cuBLAS in bfloat16 and PyTorch's own int4 product. On a CPU
# it shows the arithmetic: the time that the bytes take, and the time that the FLOPs take.


# %% tags=["experiment", "figure"]
# Figure: the time of one product, by batch: bytes, FLOPs, and on a GPU what was measured
def microseconds(tokens: int, bits: float, n: int = 8192) -> float:
    """The larger of bytes over bandwidth and FLOPs over peak, for an H200."""
    moved = n * n * bits / 8 + 2 * 2 * tokens * n
    return 1e6 * max(moved / 4.8e12, 2 * tokens * n * n / 989e12)


def measured(tokens: int, n: int = 8192, group: int = 128) -> dict[str, float]:
    """Microseconds of this lesson's kernel and its peers on this GPU."""
    g = torch.Generator("cuda").manual_seed(31)
    x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16, generator=g)
    w = torch.randn(n, n, device="cuda", dtype=torch.bfloat16, generator=g) / n**0.5
    codes, scale, zero = quantize_affine(w, 4, group)
    scale = scale.bfloat16()
    words = pack_int4(codes)
    functions = {
        "this lesson, W4A16": lambda: w4a16(x, words, scale, zero, group),
        "cuBLAS, bfloat16": lambda: x @ w.T,
    }
    try:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        tiled = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        both = torch.stack([scale, (8 - zero.bfloat16()) * scale], -1).transpose(0, 1).contiguous()
        functions["PyTorch int4"] = lambda: torch.ops.aten._weight_int4pack_mm(
            x, tiled, group, both
        )
        functions["PyTorch int4"]()
    except (AttributeError, RuntimeError) as error:  # a build or a GPU that lacks it
        functions.pop("PyTorch int4", None)
        print(f"PyTorch int4: {str(error).splitlines()[0]}")
    bench = triton.testing.do_bench
    return {name: 1e3 * bench(f, quantiles=[0.5, 0.2, 0.8])[0] for name, f in functions.items()}


on_gpu = profile.name == "gpu" and not profile.interpret
batches = [1, 4, 16, 64, 256] if on_gpu else [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
lines = {
    "bfloat16 weights, limit": [microseconds(m, 16) for m in batches],
    "4 bits, groups of 128, limit": [microseconds(m, 4 + 20 / 128) for m in batches],
}
if on_gpu:
    found = [measured(m) for m in batches]
    lines |= {name: [f[name] for f in found] for name in found[0]}
    for m, f in zip(batches, found, strict=True):
        print(f"{m:4} tokens: " + ", ".join(f"{name} {us:.1f} µs" for name, us in f.items()))
_, ax = plt.subplots(figsize=(7, 3.6))
plot.curves(
    batches,
    lines,
    ax=ax,
    logx=True,
    logy=True,
    xlabel="tokens in the batch",
    ylabel="microseconds (8192 × 8192)",
    title="one product on "
    + (torch.cuda.get_device_name() if profile.name == "gpu" else "an H200, by arithmetic"),
)
ax.set_yticks([8, 16, 32, 64], ["8", "16", "32", "64"])
ax.set_xticks(batches, [str(m) for m in batches])
ax.minorticks_off()
plot.caption(
    ax.figure,
    "Flat while the bytes decide, rising once the FLOPs do. Four bits win by the ratio of the "
    "bytes on the flat part; the lines meet where both are limited by the same FLOPs.",
)
plt.show()

# %% [markdown]
# ## Key questions
#
# ### Exercise · Short answers, by number


# %% exercise="questions" minutes=10 difficulty=2 kind="questions"
def questions() -> dict[str, float]:
    """A dictionary of eight numbers, to 1 percent.

    "nvfp4_bits":  bits a number in NVFP4, the one scale of the tensor left out.
    "int3_bits":   bits a weight: 3-bit codes in groups of 32, each with a float16 scale and a
        3-bit zero point.
    "speedup":     how many times faster a product limited by the bytes of its weights is with
        the weights of "int3_bits" than with bfloat16 weights.
    "turned":      a token of 256 numbers, one of which is 64 and all others 0, turned by a Hadamard
        matrix of 256 over its root: its largest magnitude.
    "balanced":    SmoothQuant with alpha = 1/2, a channel whose inputs reach 64 and whose weights
        reach 0.25: the range of its inputs afterwards.
    "moved":       GPTQ, two weights, H⁻¹ = ((2, −0.5), (−0.5, 1)): the first weight is rounded up
        by 0.3. By how much does the second one change (with its sign)?
    "wrong_share": a kernel takes the scale of a tile's first column for the whole tile of 128
        columns. Groups of 32, all scales different: the share of columns with a wrong scale.
    "steps":       training with rounded weights: a weight of 0.35 at a scale of 0.2 moves by 0.001
        a step towards 0. After how many steps does it reach the middle between its code and the
        next one down?
    """
    ### BEGIN SOLUTION
    int3 = 3 + (16 + 3) / 32
    return {
        "nvfp4_bits": 4 + 8 / 16,
        "int3_bits": int3,
        "speedup": 16 / int3,
        "turned": 64 / math.sqrt(256),
        "balanced": math.sqrt(64 * 0.25),
        "moved": 0.3 * -0.5 / 2,
        "wrong_share": 3 / 4,
        "steps": (0.35 - 1.5 * 0.2) / 0.001,
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["nvfp4_bits"]
checks.kind(answer, float, what="nvfp4_bits")
### BEGIN HIDDEN TESTS
checks.number(answer, 4.5, what="nvfp4_bits", hint="Sixteen codes and one scale of eight bits.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["int3_bits"]
checks.kind(answer, float, what="int3_bits")
### BEGIN HIDDEN TESTS
checks.number(answer, 115 / 32, what="int3_bits", hint="A group has a scale and a zero point.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["speedup"]
checks.kind(answer, float, what="speedup")
### BEGIN HIDDEN TESTS
checks.number(answer, 16 * 32 / 115, what="speedup", hint="The ratio of the bits a weight.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["turned"]
checks.kind(answer, float, what="turned")
### BEGIN HIDDEN TESTS
checks.number(answer, 4.0, what="turned", hint="The outlier is spread evenly; the norm stays.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["balanced"]
checks.kind(answer, float, what="balanced")
### BEGIN HIDDEN TESTS
checks.number(answer, 4.0, what="balanced", hint="s = (64 / 0.25)**0.5 = 16, and 64 / 16.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["moved"]
checks.kind(answer, float, what="moved")
### BEGIN HIDDEN TESTS
checks.number(answer, -0.075, what="moved", hint="The first column of H⁻¹ over its first entry.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["wrong_share"]
checks.kind(answer, float, what="wrong_share")
### BEGIN HIDDEN TESTS
checks.number(answer, 0.75, what="wrong_share", hint="Four groups in a tile, one of them is right.")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["steps"]
checks.kind(answer, float, what="steps")
### BEGIN HIDDEN TESTS
checks.number(answer, 50, what="steps", hint="0.35 / 0.2 = 1.75 has code 2; the middle is 1.5.")
### END HIDDEN TESTS

# %% [markdown]
# These are open; write two or three sentences each.
#
# **1.** W8A8 products take one scale for each token of $X$ and one for each row of $W$. Why not one
# for each column of $X$, which would solve the problem of loud channels at once?

# %% [markdown] answer="scale-axis"
# Columns of $X$ are what is summed over. In $\sum_k \Delta_k c^x_k c^w_k$ a scale that depends on
# $k$ does not come out of the sum, so each term would need a multiplication in floating point, and
# the integer units are of no use. Scales of tokens and rows are constant in each sum. (SmoothQuant
# puts the column's scale into the weights beforehand, which is allowed because it is done once.)

# %% [markdown]
# **2.** AWQ and SmoothQuant both multiply columns of $W$ by $s$ and divide those of $X$. What does
# each of them protect, and why is AWQ's $\alpha$ searched and SmoothQuant's mostly $\frac12$?

# %% [markdown] answer="two-scalings"
# SmoothQuant rounds both sides and makes the inputs easier at the weights' expense; half-way, both
# have the same range in each channel. AWQ rounds weights only: it makes the columns that meet large
# inputs larger, so that their rounding error is smaller in proportion. Too much of that widens the
# groups of everything else, by an amount that depends on the matrix, hence the search on real
# inputs, which is cheap because nothing is trained.

# %% [markdown]
# **3.** GPTQ more than halves the squared output error of the layers. Name two ways in which the
# model's loss may all the same not fall.

# %% [markdown] answer="layer-and-loss"
# The Hessian comes from calibration text: with few tokens or other text, errors move into
# directions that are quiet there and not elsewhere. And each layer's error is weighed alike in all
# output directions, while the loss cares for few of them; layers also get inputs that rounding
# before them has changed. (That is why implementations quantize layer by layer, with inputs from
# the layers that are already rounded.)

# %% [markdown]
# **4.** A server decodes 256 sequences at once, on a GPU like the one above. Which weights would
# you give it: 4 bits with the kernel of this lesson, or 8-bit floats with 8-bit activations?

# %% [markdown] answer="large-batches"
# At 256 tokens FLOPs decide, not bytes: dequantizing to bfloat16 makes the product no faster than
# bfloat16 weights, and a little slower. 8-bit floats on both sides run at twice the FLOPs and half
# the bytes. Four bits would still save memory, which is a reason where it is the cache that limits
# the batch.

# %% [markdown]
# ## References
#
# - Dettmers, Lewis, Belkada, Zettlemoyer 2022, *LLM.int8()*, arXiv:2208.07339: section 3 (the
#   split), section 4 (outliers that come with scale).
# - Xiao, Lin, Seznec, Wu, Demouth, Han 2022, *SmoothQuant*, arXiv:2211.10438: section 4. The
#   authors' code (`mit-han-lab/smoothquant`, `smoothquant/smooth.py`) has the floors of 1e-5.
# - Frantar, Ashkboos, Hoefler, Alistarh 2022, *GPTQ*, arXiv:2210.17323: section 4, all three steps.
#   `IST-DASLab/gptq`, `gptq.py`, takes a group's scale from weights without the block's updates,
#   and sets the Hessian of a dead column to 1 before it takes the mean for the damping.
# - Lin, Tang, Tang, Yang, Dang, Han 2023, *AWQ*, arXiv:2306.00978: section 3.2.
#   `mit-han-lab/llm-awq`, `awq/quantize/auto_scale.py`: the grid, the floor of 1e-4, the
#   normalization.
# - Ashkboos et al. 2024, *QuaRot*, arXiv:2404.00456: section 4, which rotations are free.
# - Rouhani et al. 2023, *Microscaling Data Formats for Deep Learning*, arXiv:2310.10537: the MX
#   formats.
# - NVIDIA 2025, *Pretraining Large Language Models with NVFP4*, arXiv:2509.25149: the two scales,
#   and Hadamard rotations in training.
# - Bengio, Léonard, Courville 2013, *Estimating or Propagating Gradients Through Stochastic Neurons
#   for Conditional Computation*, arXiv:1308.3432: the straight-through estimator.
# - In production: `vllm-project/vllm` (`triton_w4a16.py`, Marlin kernels),
#   `vllm-project/llm-compressor`, `pytorch/ao` (`torchao/quantization`, `prototype/mx_formats`).
