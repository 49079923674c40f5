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
#       Every floating-point format of the trade from its bits, bit for bit as PyTorch has them;
#       loss scaling, master weights and stochastic rounding; DeepSeek-V3's FP8 product; and the
#       memory of a training run to the byte.
#     gpu: >-
#       Time and peak memory of float32, TF32 and bfloat16 training, and FP8 products beside
#       bfloat16 ones. On a CPU the section does the arithmetic.
# ---

# %% [markdown]
# ## The problem
#
# A number of 32 bits is a luxury. Cut it to 16 and everything that a GPU does with it gets cheaper:
# half the bytes to store, half to move, and matrix units that do many times as many products per
# second. Cut it to 8 and the factor doubles again. So why not do it everywhere?
#
# Because training is made of numbers of very different kinds. A weight is about 0.03. The update
# that it gets in one step is a ten-thousandth of that. The gradient of one logit may be 0.0000001,
# and the exponential of another 100,000. A short format can hold each of these, but not all of
# them, and when it cannot, nothing crashes: the update is rounded away, the gradient becomes zero,
# the sum stops growing. The loss curve goes flat, and looks like a model that has learned what it
# can.
#
# **Mixed-precision training** is the art of giving each number the format that it can live with.
# Four failures, four remedies, in the order of this lesson:
#
# | what happens | why | remedy |
# |---|---|---|
# | small updates vanish | the spacing of the format at the weight is larger than the update | **master weights** in float32, or **stochastic rounding** |
# | small gradients become 0 | the format ends at the bottom | **loss scaling**, or a format with more exponent |
# | sums stall, exponentials overflow | too few digits, too little range | **autocast**: products in half precision, the rest in float32 |
# | one outlier flattens all others | 8 bits cannot hold a tensor's whole range at once | **fine-grained scales**: one for every 128 numbers |
#
# And since memory is half of the reason for doing this, the lesson ends with a formula that tells
# the bytes of a training run before it starts.

# %%
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# %% [markdown]
# ## What a floating-point number is
#
# Scientific notation in base two. A number has a **sign**, an **exponent** that says in which
# octave it lies (between which two powers of two), and a **mantissa** that says where in the
# octave:
#
# $$ \underbrace{s}_{1\ \text{bit}}\;\underbrace{e_{E-1}\dots e_0}_{E\ \text{bits}}
# \;\underbrace{m_{M-1}\dots m_0}_{M\ \text{bits}}
# \qquad\longmapsto\qquad
# x = (-1)^s\cdot 2^{\,e-\mathrm{bias}}\cdot\Bigl(1+\frac{m}{2^M}\Bigr),
# \qquad \mathrm{bias} = 2^{E-1}-1 . $$
#
# Here $e$ and $m$ are the fields read as whole numbers. The leading 1 is not stored: in base two
# the first digit of a number that is not zero can be nothing else. Each octave is cut into $2^M$
# equal steps, so **the absolute spacing doubles from octave to octave, and the relative spacing
# stays**: exponent bits buy *range*, mantissa bits buy *precision*.
#
# Two values of the exponent field are special.
#
# - **$e = 0$: subnormal numbers.** The leading digit is 0, and the exponent is that of the octave
#   above: $x = (-1)^s\,2^{\,1-\mathrm{bias}}\cdot m/2^M$. The steps of the lowest octave go on down
#   to zero at the same width, so that there is no hole around 0, and $m=0$ is zero itself (two of
#   them, $+0$ and $-0$). Precision fades on the way: the last subnormal has one bit of it.
# - **$e$ all ones.** Here the families differ.
#
# | `special` | exponent all ones means | who |
# |---|---|---|
# | `"ieee"` | $m=0$: ±infinity; else NaN | FP32, TF32, BF16, FP16, and FP8's **E5M2** |
# | `"nan"` | ordinary numbers, except for the mantissa of all ones, which is NaN. No infinity | FP8's **E4M3** (PyTorch's `float8_e4m3fn`: *f*inite, and its *n*an is not IEEE's) |
# | `"none"` | ordinary numbers, all of them | the 4- and 6-bit formats of MX |
#
# E4M3 has 256 patterns; with IEEE's rules 14 of them would be NaN and 2 infinities, and the largest
# number 240. Giving up the infinity and all but one NaN (of each sign) buys almost an octave: the
# largest is 448. With four bits one has no pattern to spare at all.
#
# | format | sign, exponent, mantissa | largest | smallest normal | smallest | step after 1 |
# |---|---|---|---|---|---|
# | FP32 | 1, 8, 23 | 3.4·10³⁸ | 1.2·10⁻³⁸ | 1.4·10⁻⁴⁵ | 2⁻²³ |
# | TF32 | 1, 8, 10 | 3.4·10³⁸ | 1.2·10⁻³⁸ | 1.1·10⁻⁴¹ | 2⁻¹⁰ |
# | BF16 | 1, 8, 7 | 3.4·10³⁸ | 1.2·10⁻³⁸ | 9.2·10⁻⁴¹ | 2⁻⁷ |
# | FP16 | 1, 5, 10 | 65504 | 6.1·10⁻⁵ | 6.0·10⁻⁸ | 2⁻¹⁰ |
# | FP8 E5M2 | 1, 5, 2 | 57344 | 6.1·10⁻⁵ | 1.5·10⁻⁵ | 2⁻² |
# | FP8 E4M3 | 1, 4, 3 | 448 | 2⁻⁶ | 2⁻⁹ | 2⁻³ |
# | FP4 E2M1 | 1, 2, 1 | 6 | 1 | 0.5 | 2⁻¹ |
#
# Read it in pairs. **FP16 and BF16** cost the same: one has eight times the precision, the other
# the range of FP32. **TF32** is FP16's mantissa with FP32's exponent: 19 bits, stored in 32, used
# by NVIDIA's matrix units when they are handed float32 and allowed to look at less of it. **E5M2**
# is FP16 with eight mantissa bits cut off.


# %%
@dataclass(frozen=True)
class Format:
    name: str
    exponent: int
    mantissa: int
    special: str = "ieee"
    dtype: torch.dtype | None = None  # PyTorch's own, where it has one

    @property
    def layout(self) -> tuple[int, int, str]:
        """What the exercises take after their first argument: (exponent, mantissa, special)."""
        return self.exponent, self.mantissa, self.special


FP32 = Format("FP32", 8, 23, dtype=torch.float32)
TF32 = Format("TF32", 8, 10)
BF16 = Format("BF16", 8, 7, dtype=torch.bfloat16)
FP16 = Format("FP16", 5, 10, dtype=torch.float16)
E5M2 = Format("E5M2", 5, 2, dtype=torch.float8_e5m2)
E4M3 = Format("E4M3", 4, 3, "nan", dtype=torch.float8_e4m3fn)
E3M2 = Format("E3M2", 3, 2, "none")
E2M3 = Format("E2M3", 2, 3, "none")
E2M1 = Format("E2M1", 2, 1, "none")


def power_of_two(n: Tensor) -> Tensor:
    """2ⁿ in float64, exactly, for whole numbers n from −1022 to 1023 (any shape, any integers).

    A power of two has an empty mantissa: its exponent field, shifted to its place, is the whole
    number.
    """
    return ((n.long() + 1023) << 52).view(torch.float64)


# %% tags=["support"]
# Support: comparisons bit for bit
def expect_tensor(value: Tensor, what: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """`value` is a plain tensor of this dtype and shape."""
    assert type(value) is Tensor, (
        f"{what}: a tensor is asked for; yours is of type {type(value).__name__}"
    )
    assert value.dtype == dtype, f"{what} has dtype {value.dtype}, it should have {dtype}"
    assert value.shape == shape, f"{what} has shape {tuple(value.shape)}, not {tuple(shape)}"


def identical(
    actual: Tensor,
    expected: Tensor,
    inputs: Tensor,
    what: str,
    dtype: torch.dtype,
    hint: str = "",
    mistakes: dict[str, Tensor] | None = None,
) -> None:
    """Equal bit for bit, up to what is inside a NaN: values, infinities, and the sign of zero.
    `inputs` are for the message.
    """
    expect_tensor(actual, what, dtype, expected.shape)

    def differ(one: Tensor, other: Tensor) -> Tensor:
        apart = (one != other) | (one.signbit() != other.signbit())
        return apart & ~(one.isnan() & other.isnan())

    a, e = actual.detach().double(), expected.double()
    wrong = differ(a, e)
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        given, got, due = (t.flatten()[at].item() for t in (inputs, a, e))
        given = f"{given:#x}" if isinstance(given, int) else f"{given!r}"
        known = "".join(
            f"This is what {name} gives. "
            for name, value in (mistakes or {}).items()
            if not differ(a, value.double()).any()
        )
        raise AssertionError(
            f"{what}: {given} should give {due!r}, yours gives {got!r} ({int(wrong.sum())} of "
            f"{wrong.numel()} are wrong). {known}{hint}"
        )


# %% [markdown]
# The exercise is the formula above with its two exceptions. The answer comes back in float64, which
# holds every value of every format here exactly.


# %% exercise="decode_float" minutes=15 difficulty=2
def decode_float(bits: Tensor, exponent: int, mantissa: int, special: str = "ieee") -> Tensor:
    """The numbers that bit patterns stand for.

    bits: integers from 0 to 2^(1 + exponent + mantissa) − 1, any shape (an empty one too), int64:
    the sign is the highest bit, then come `exponent` bits and `mantissa` bits. exponent from 2 to
    8, mantissa from 1 to 23. The bias is 2^(exponent−1) − 1.
    special: what an exponent field of all ones means.
      "ieee"  mantissa 0 is an infinity with the pattern's sign, any other mantissa is NaN
      "nan"   only the mantissa of all ones is NaN; the others are ordinary numbers
      "none"  every pattern is an ordinary number
    Returns float64 of the same shape, exact. The pattern with only the sign bit set is −0.0.
    """
    ### BEGIN SOLUTION
    bias, ones = 2 ** (exponent - 1) - 1, 2**exponent - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & ones
    m = bits & (2**mantissa - 1)
    leading = (e > 0).double()  # subnormals have no hidden 1, and the exponent of the octave above
    value = (leading + m / 2**mantissa) * power_of_two(e.clamp(min=1) - bias)
    if special == "ieee":
        value = torch.where(e == ones, torch.where(m == 0, math.inf, math.nan), value)
    elif special == "nan":
        value = value.masked_fill((e == ones) & (m == 2**mantissa - 1), math.nan)
    return sign * value
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: taking a field out</summary>
#
# `bits >> k` drops the k lowest bits, `bits & (2**k − 1)` keeps only them. First shift the field
# down, then cut off what stands above it.
# </details>
#
# <details><summary>Hint: everything but the smallest numbers is right</summary>
#
# Two things change at $e=0$: the hidden 1 goes, *and* the exponent is $1-\mathrm{bias}$, not
# $0-\mathrm{bias}$. Otherwise the lowest octave would be skipped.
# </details>
#
# <details><summary>Hint: dtype</summary>
#
# An integer tensor divided by a Python number is float32, PyTorch's default. That is enough for 23
# bits of mantissa; multiply by float64 and the product is float64. `torch.where` with two Python
# numbers and a condition makes float32 too, in which infinity and NaN are what they are.
# </details>

# %% check="decode_float" points=2
ordinary = [0b0_0111_000, 0b0_0111_100, 0b1_1000_010, 0b0_1111_110]
around_zero = [0b0_0000_001, 0b0_0001_000, 0b1_0000_000]
result = decode_float(torch.tensor(ordinary + around_zero), 4, 3, "nan")
checks.close(
    result,
    torch.tensor([1.0, 1.5, -2.5, 448.0, 2.0**-9, 2.0**-6, 0.0], dtype=torch.float64),
    what="decode_float of seven E4M3 patterns",
    rtol=0,
    atol=0,
    dtype=torch.float64,
    mistakes={
        "a hidden 1 in subnormals too": torch.tensor(
            [1.0, 1.5, -2.5, 448.0, 1.125 * 2.0**-7, 2.0**-6, -(2.0**-7)], dtype=torch.float64
        ),
        "no hidden 1": torch.tensor(
            [0.0, 0.5, -0.5, 192.0, 2.0**-9, 0.0, 0.0], dtype=torch.float64
        ),
        "subnormals an octave too low": torch.tensor(
            [1.0, 1.5, -2.5, 448.0, 2.0**-10, 2.0**-6, 0.0], dtype=torch.float64
        ),
        "a bias of 2^(exponent−1)": torch.tensor(
            [0.5, 0.75, -1.25, 224.0, 2.0**-10, 2.0**-7, 0.0], dtype=torch.float64
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for kind, carrier in (
    (BF16, torch.int16),
    (FP16, torch.int16),
    (E5M2, torch.uint8),
    (E4M3, torch.uint8),
):
    width = 1 + kind.exponent + kind.mantissa
    bits = torch.arange(2**width)  # every pattern there is
    expected = bits.to(carrier).view(kind.dtype).float()
    with checks.unchanged(bits=bits):
        result = decode_float(bits, *kind.layout)
    finite = expected.isfinite()
    identical(
        result[finite],
        expected[finite],
        bits[finite],
        f"decode_float of {kind.name}'s finite patterns",
        torch.float64,
    )
bits = (
    torch.randint(0, 2**31, (5000,), generator=g) | torch.randint(0, 2, (5000,), generator=g) << 31
)
bits[::5] &= 0x807FFFFF  # a fifth of them subnormal
expected = bits.to(torch.int32).view(torch.float32)
finite = expected.isfinite()
identical(
    decode_float(bits, 8, 23)[finite],
    expected[finite],
    bits[finite],
    "decode_float of random FP32 patterns",
    torch.float64,
)
### END HIDDEN TESTS

# %% check="decode_float" points=1
result = decode_float(torch.tensor([0b0_11111_00, 0b1_11111_00, 0b0_11111_01]), 5, 2)
checks.close(
    result,
    torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64),
    what="E5M2's infinities and NaN",
)
result = decode_float(torch.tensor([0b0_11_1, 0b1_11_0]), 2, 1, "none")
checks.close(
    result,
    torch.tensor([6.0, -4.0], dtype=torch.float64),
    what="FP4's largest numbers: it has nothing but ordinary ones",
)
### BEGIN HIDDEN TESTS
for kind, carrier in (
    (BF16, torch.int16),
    (FP16, torch.int16),
    (E5M2, torch.uint8),
    (E4M3, torch.uint8),
):
    bits = torch.arange(2 ** (1 + kind.exponent + kind.mantissa)).view(16, -1)
    expected = bits.to(carrier).view(kind.dtype).float()
    identical(
        decode_float(bits, *kind.layout),
        expected,
        bits,
        f"decode_float of all {kind.name} patterns",
        torch.float64,
        "What does an exponent field of all ones mean in this family?",
    )
# The formats of MX, from the tables of their specification: the positive half.
listed = {
    E2M1: [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    E2M3: [i / 8 for i in range(16)]
    + [2 + i / 4 for i in range(8)]
    + [4 + i / 2 for i in range(8)],
    E3M2: [i / 16 for i in range(8)]
    + [c * 2.0**k for k in range(-1, 5) for c in (1, 1.25, 1.5, 1.75)],
}
for kind, values in listed.items():
    half = torch.tensor(values, dtype=torch.float64)
    bits = torch.arange(2 * len(half))
    identical(
        decode_float(bits, *kind.layout),
        torch.cat([half, -half]),
        bits,
        f"decode_float of all {kind.name} patterns",
        torch.float64,
    )
one = torch.tensor(0b1_11111_11111)
identical(
    decode_float(one, 5, 5, "nan"),
    torch.tensor(-math.nan),
    one,
    "decode_float of a pattern without axes",
    torch.float64,
)
identical(
    decode_float(one, 5, 5, "none"),
    torch.tensor(-(2 - 1 / 32) * 2.0**16, dtype=torch.float64),
    one,
    "decode_float of a pattern without axes",
    torch.float64,
)
# Every width of exponent: a normal number's fields, moved into a float64 pattern, are the number.
g = checks.generator(14)
for width in range(2, 9):
    for size in (int(torch.randint(1, 23, (1,), generator=g)), 23):
        fields = torch.randint(1, 2**width, (40,), generator=g)
        fields[::2] = 2**width - 1  # the octave that IEEE's rules give away; 2^128 with 8 bits
        m, sign = (torch.randint(0, 2**k, (40,), generator=g) for k in (size, 1))
        m[:4] = torch.tensor([0, 0, 2**size - 1, 2**size - 1])
        expected = ((fields + 1024 - 2 ** (width - 1)) << 52 | m << (52 - size)).view(torch.float64)
        expected = torch.where(sign == 1, -expected, expected)
        bits = (sign << width | fields) << size | m
        last = (fields == 2**width - 1) & (m == 2**size - 1)
        for special in ("none", "nan"):
            identical(
                decode_float(bits, width, size, special),
                expected.masked_fill(last, math.nan) if special == "nan" else expected,
                bits,
                f'decode_float of ({width}, {size}, "{special}")',
                torch.float64,
                "The result is float64 and exact: 2^128 is an ordinary number in it",
            )
nothing = torch.empty(0, 3, dtype=torch.int64)
identical(
    decode_float(nothing, 4, 3, "nan"),
    torch.empty(0, 3, dtype=torch.float64),
    nothing,
    "decode_float of nothing",
    torch.float64,
)
### END HIDDEN TESTS

# %% [markdown]
# ### One tenth, seven times
#
# There is no finite binary fraction that is 0.1. The next cell asks your decoder which pattern of
# each format comes closest.

# %% tags=["experiment", "figure"]
# Figure: the pattern nearest to one tenth in seven formats
fig, ax = plot.plt.subplots(figsize=(11.5, 3.4))
for row, kind in enumerate((FP32, TF32, BF16, FP16, E5M2, E4M3, E2M1)):
    if kind is FP32:  # four billion patterns are too many to try: PyTorch knows this one
        pattern = int(torch.tensor(0.1).view(torch.int32))
    else:
        values = decode_float(torch.arange(2 ** (kind.exponent + kind.mantissa)), *kind.layout)
        pattern = int((values - 0.1).abs().nan_to_num(math.inf).argmin())
    value = float(decode_float(torch.tensor([pattern]), *kind.layout))
    for i, bit in enumerate(f"{pattern:0{1 + kind.exponent + kind.mantissa}b}"):
        color = "#9a9a9a" if i == 0 else plot.COLORS[1] if i <= kind.exponent else "#d5ebf9"
        x = i - 1 - kind.exponent
        ax.add_patch(
            plot.plt.Rectangle((x, -row - 0.4), 1, 0.8, facecolor=color, edgecolor="white")
        )
        ax.text(
            x + 0.5,
            -row,
            bit,
            ha="center",
            va="center",
            fontsize=9,
            weight="bold" if bit == "1" else "normal",
        )
    ax.text(kind.mantissa + 0.4, -row, f"{value:.10g}", va="center", fontsize=9)
ax.set(xlim=(-9.2, 28), ylim=(-6.6, 0.9), xticks=[], yticks=range(0, -7, -1))
ax.set_yticklabels(["FP32", "TF32", "BF16", "FP16", "E5M2", "E4M3", "E2M1"])
for x, name in ((-9, "sign"), (-6.5, "exponent"), (10, "mantissa")):
    ax.text(x, 0.62, name, fontsize=8, color="#555555")
ax.grid(False)
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plot.caption(
    fig,
    "The nearest number to 0.1. The exponent field 123 of FP32, TF32 and BF16 means 2⁻⁴, and so "
    "does the 11 of FP16 and E5M2 with their other bias: the mantissa is the same, 1.1001100…, "
    "rounded at another place. E4M3 has one bit more for it than E5M2. FP4 has nothing between 0 "
    "and 0.5.",
)
plot.plt.show()

# %% [markdown]
# ### All the numbers there are
#
# An 8-bit format is small enough to be looked at whole. The next cell hands your decoder every
# pattern.
#
# **Write down first:** how many of E4M3's 256 patterns lie between −1 and 1?

# %% tags=["experiment", "figure"]
# Figure: every number of four formats, and the range of seven
fig, axes = plot.plt.subplots(2, 1, figsize=(10.5, 5.6), height_ratios=[1, 1.1])
for row, (kind, color) in enumerate(zip((E4M3, E5M2, E3M2, E2M1), plot.COLORS, strict=False)):
    patterns = torch.arange(2 ** (kind.exponent + kind.mantissa))
    values = decode_float(patterns, *kind.layout)
    subnormal = patterns < 2**kind.mantissa
    axes[0].vlines(
        values[~subnormal & (values <= 8)],
        -row - 0.34,
        -row + 0.34,
        color=color,
        linewidth=1.3,
        linestyle="-",
    )
    axes[0].vlines(
        values[subnormal], -row - 0.2, -row + 0.2, color="#777777", linewidth=0.9, linestyle="-"
    )
axes[0].set(yticks=range(0, -4, -1), xlim=(-0.05, 8.1), xlabel="value")
axes[0].set_yticklabels(["E4M3", "E5M2", "E3M2", "E2M1"])
axes[0].set_title("every number from 0 to 8")
axes[0].grid(False)
kinds = (FP32, TF32, BF16, FP16, E5M2, E4M3, E2M1)
for row, kind in enumerate(kinds):
    top = (
        2 ** (kind.exponent + kind.mantissa)
        - {"ieee": 2**kind.mantissa + 1, "nan": 2, "none": 1}[kind.special]
    )
    smallest, normal, largest = (
        decode_float(torch.tensor([1, 2**kind.mantissa, top]), *kind.layout).log2().tolist()
    )
    color = plot.COLORS[row % len(plot.COLORS)]
    axes[1].plot([smallest, normal], [-row, -row], color=color, linewidth=2, linestyle=(0, (1, 1)))
    axes[1].plot(
        [normal, largest],
        [-row, -row],
        color=color,
        linewidth=8,
        linestyle="-",
        solid_capstyle="butt",
    )
    axes[1].annotate(
        f"{kind.mantissa} bits of mantissa",
        (largest, -row),
        xytext=(6, -3),
        textcoords="offset points",
        fontsize=8,
    )
axes[1].set(yticks=range(0, -len(kinds), -1), xlim=(-155, 165), xlabel="log₂ of the magnitude")
axes[1].set_yticklabels([kind.name for kind in kinds])
axes[1].set_title("range")
inside = int((decode_float(torch.arange(256), *E4M3.layout).abs() <= 1).sum())
plot.caption(
    fig,
    f"Above: each octave has the same number of steps, so the numbers crowd toward zero ({inside} "
    "of E4M3's 256 patterns lie in [−1, 1]); short grey marks are subnormal, evenly spaced down to "
    "0. E4M3 is twice as fine as E5M2 wherever both are normal. Below: solid where the precision "
    "is full, dotted where it fades. FP16 is a short bar beside BF16, at the same cost.",
)
plot.plt.show()

# %% [markdown]
# ## Rounding
#
# Every result of a computation has to be put back onto the number line. **Round to nearest, ties to
# even**: take the closest representable number; if two are equally close, take the one whose last
# mantissa bit is 0. Always rounding ties up would push sums upward; to even, it goes up as often as
# down.
#
# How large is the error? Let $2^k \le |x| < 2^{k+1}$. The steps of this octave are
# $\mathrm{ulp}(x) = 2^{k-M}$ wide (*unit in the last place*), and the nearest one is at most half
# of that away:
#
# $$ |\mathrm{rd}(x) - x| \;\le\; \tfrac12\,2^{k-M} \;\le\; 2^{-(M+1)}\,|x| . $$
#
# So the relative error of a normal number is at most $u = 2^{-(M+1)}$, the **unit roundoff**: 0.4 %
# in BF16, 0.05 % in FP16, 6 % in E4M3. Below the smallest normal number the octave no longer
# shrinks, the *absolute* error stays at half of the smallest subnormal, and the relative error
# grows up to 100 %: half the smallest subnormal and everything below it becomes 0.
#
# At the top, **overflow**: first the number is rounded as if the exponent had no end. If the result
# is beyond the largest finite number,
#
# - IEEE formats give ±infinity. For FP16 this begins at 65520, half a step above 65504: the tie
#   goes to the even neighbor, which would be 65536.
# - E4M3 has no infinity. A cast that does not saturate gives NaN, one that does gives ±448. Here
#   464, the tie, goes to 448, whose mantissa 110 is even.
# - Where there is neither infinity nor NaN, only saturating is left.
#
# *What PyTorch does.* Casts to float16, bfloat16 and float8_e5m2 give infinity. The cast to
# float8_e4m3fn gave NaN above 464 up to version 2.11, and saturates (infinity too becomes 448)
# since 2.12. Whoever writes code for both clamps before the cast.
#
# ### Rounding with one division
#
# There is no need to touch bits. In the octave of $x$ the representable numbers are the multiples
# of $\mathrm{ulp}(x)$. So divide by it, round to a whole number, multiply: the division and the
# multiplication are by powers of two, and therefore exact. `torch.round` rounds ties to even, and
# `torch.frexp` tells the octave. For subnormals the octave stops shrinking: $k$ is never less than
# $1-\mathrm{bias}$.


# %% exercise="round_to_format" minutes=25 difficulty=3
def round_to_format(
    x: Tensor, exponent: int, mantissa: int, special: str = "ieee", saturate: bool = False
) -> Tensor:
    """The nearest number of a format, ties to even, for each number of x.

    x: float32 or float64, any shape (an empty one too). The format is named as in decode_float.
    Returns a new tensor of the shape and dtype of x (float32 is only used where it holds the
    format's values exactly). No gradient is asked for: the result may be detached from x.

    - Rounding happens once, from x itself: a float64 that lies a hair above a tie goes up.
    - Subnormals are kept, not flushed to 0. The sign of zero is kept, and so is that of a number
      that rounds to zero.
    - Overflow is decided after rounding with an unlimited exponent: what is then larger than the
      largest finite number becomes ±infinity ("ieee"), NaN ("nan") or ± the largest number ("none",
      and every format if `saturate`).
    - An infinity in x is such an overflow. NaN stays NaN, in every format.
    """
    ### BEGIN SOLUTION
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1  # frexp: |y| = f · 2^e with f in [½, 1)
    ulp = power_of_two(octave.clamp(1 - bias, 1023) - mantissa)
    rounded = torch.round(y / ulp) * ulp

    top = bias if special == "ieee" else bias + 1  # the exponent of the highest octave
    steps = 2 if special == "nan" else 1  # the last pattern is NaN: two steps below the next octave
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    beyond = torch.copysign(torch.full_like(y, largest if saturate else beyond), y)
    return torch.where(rounded.abs() > largest, beyond, rounded).to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which octave</summary>
#
# `torch.frexp` writes $y = f\cdot 2^e$ with $f$ between ½ and 1, so the octave of the lesson is
# $e-1$. A logarithm is itself rounded: in float32 `log2` of the number just below $2^{100}$ is 100,
# one octave too high. In FP16, BF16 and FP8 nobody notices, since a number that close to a power of
# two becomes that power in either octave. With a long mantissa, such as FP32's own 23 bits, the
# result is wrong.
# </details>
#
# <details><summary>Hint: a float64 just above a tie comes out wrong</summary>
#
# Is it converted to float32 somewhere on the way? Rounded twice, it first lands on the tie, and
# then on the even side. This is called double rounding.
# </details>
#
# <details><summary>Hint: the largest number of each family</summary>
#
# Decode by hand: 0 11110 1111111111 for FP16, 0 1111 110 for E4M3, 0 11 1 for FP4. Which octave is
# each in, and how many steps below the next power of two?
# </details>
#
# <details><summary>Hint: infinity</summary>
#
# What `frexp` says about infinity or NaN is not defined. Make sure that your ulp is a finite
# positive number whatever it says: ∞ divided by it, rounded and multiplied is still ∞.
# </details>

# %% check="round_to_format" points=2
x = torch.tensor(
    [1 + 2.0**-11, 1 + 3 * 2.0**-11, 0.1, -(2.0**-25), 1.5 * 2.0**-25, 3.3e-7], dtype=torch.float64
)
expected = torch.tensor(
    [1.0, 1 + 2.0**-9, 0.0999755859375, -0.0, 2.0**-24, 6 * 2.0**-24], dtype=torch.float64
)
with checks.unchanged(x=x):
    result = round_to_format(x, *FP16.layout)
identical(
    result,
    expected,
    x,
    "round_to_format to FP16",
    torch.float64,
    "The first two are ties, and go to the even neighbor; the last three are subnormal, multiples "
    "of 2⁻²⁴",
    mistakes={
        "rounding ties away from zero": torch.tensor(
            [1 + 2.0**-10, 1 + 2.0**-9, 0.0999755859375, -(2.0**-24), 2.0**-24, 6 * 2.0**-24],
            dtype=torch.float64,
        ),
        "cutting off": torch.tensor(
            [1.0, 1 + 2.0**-10, 0.0999755859375, -0.0, 0.0, 5 * 2.0**-24], dtype=torch.float64
        ),
        "flushing subnormals to zero": torch.tensor(
            [1.0, 1 + 2.0**-9, 0.0999755859375, -0.0, 0.0, 0.0], dtype=torch.float64
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
anything = (
    torch.randint(-(2**31), 2**31, (20000,), generator=g).to(torch.int32).view(torch.float32)
)  # any float32, subnormals, NaN and infinities too
for kind, low, high in ((BF16, -135, 127), (FP16, -27, 15), (E5M2, -19, 15), (E4M3, -12, 8)):
    octaves = torch.randint(low, high, (20000,), generator=g).double()
    x = torch.cat(
        [
            (
                torch.randn(20000, generator=g).sign()
                * (1 + torch.rand(20000, generator=g))
                * 2**octaves
            ).float(),
            torch.zeros(2),
            -torch.zeros(2),
        ]
    )
    identical(
        round_to_format(x, *kind.layout),
        x.to(kind.dtype).float(),
        x,
        f"round_to_format to {kind.name}, float32 in",
        torch.float32,
    )
    small = anything[anything.abs() < 2.0**high]
    identical(
        round_to_format(small, *kind.layout),
        small.to(kind.dtype).float(),
        small,
        f"round_to_format to {kind.name} of random bit patterns",
        torch.float32,
    )
    # Ties: the middle between any two neighbors, and the nearest float64 on either side of it.
    carrier = torch.int16 if kind.mantissa > 3 else torch.uint8
    line = torch.arange(2 ** (kind.exponent + kind.mantissa)).to(carrier).view(kind.dtype).double()
    line = line[line.isfinite()]
    if len(line) > 3000:
        start = torch.randint(0, len(line) - 1500, (1,), generator=g).item()
        line = torch.cat([line[:1500], line[start : start + 1500]]).unique()
    pairs = [(a, b) for a, b in zip(line[:-1].tolist(), line[1:].tolist(), strict=True)]
    middle = torch.tensor([(a + b) / 2 for a, b in pairs], dtype=torch.float64)
    tied = middle.float().to(kind.dtype).double()
    known = (
        middle.float().double() == middle
    )  # a middle that float32 cannot hold is no tie for PyTorch
    for sign in (1, -1):
        identical(
            round_to_format(sign * middle[known], *kind.layout),
            sign * tied[known],
            sign * middle[known],
            f"round_to_format of ties in {kind.name}",
            torch.float64,
        )
    consecutive = (
        torch.tensor([b for _, b in pairs], dtype=torch.float64),
        torch.tensor([a for a, _ in pairs], dtype=torch.float64),
    )
    neighbors = middle * (1 + 2.0**-45), middle * (1 - 2.0**-45)
    gaps = consecutive[0] - consecutive[1]
    adjacent = gaps <= 1.01 * torch.maximum(
        consecutive[1] * 2.0**-kind.mantissa, line[line > 0].min()
    )  # not across the cut between the two pieces
    for value, expected in zip(neighbors, consecutive, strict=True):
        identical(
            round_to_format(value[adjacent], *kind.layout),
            expected[adjacent],
            value[adjacent],
            f"round_to_format to {kind.name}, a hair beside a tie",
            torch.float64,
            "Is it rounded twice?",
        )
# A format that contains x's own leaves every x as it is.
every = torch.arange(2**16).to(torch.int16)
powers = (torch.arange(1, 255) << 23)[:, None] + torch.arange(-4, 5)  # 2^k, and those beside it
sign = torch.randint(0, 2, powers.shape, generator=g) << 31
powers = (powers | sign).flatten().to(torch.int32).view(torch.float32)
for kind, x in (
    (BF16, every.view(torch.bfloat16).float()),
    (FP16, every.view(torch.float16).float()),
    (FP32, powers),
    (FP32, anything),
):
    identical(
        round_to_format(x, *kind.layout),
        x,
        x,
        f"round_to_format to {kind.name} of {kind.name}'s own numbers",
        torch.float32,
        "Is the octave exact, just below a power of two as well?",
    )
### END HIDDEN TESTS

# %% check="round_to_format" points=1
x = torch.tensor([65519.0, 65520.0, -1e9, math.inf])
identical(
    round_to_format(x, *FP16.layout),
    torch.tensor([65504.0, math.inf, -math.inf, math.inf]),
    x,
    "round_to_format to FP16 at its end",
    torch.float32,
)
identical(
    round_to_format(x, *FP16.layout, saturate=True),
    torch.tensor([65504.0, 65504.0, -65504.0, 65504.0]),
    x,
    "the same with saturate",
    torch.float32,
)
x = torch.tensor([464.0, 464.1, -500.0, math.nan])
identical(
    round_to_format(x, *E4M3.layout),
    torch.tensor([448.0, math.nan, math.nan, math.nan]),
    x,
    "round_to_format to E4M3 at its end",
    torch.float32,
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
big = torch.cat(
    [
        torch.randn(3000, generator=g) * 2.0 ** torch.randint(-3, 100, (3000,), generator=g),
        torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, -3.4e38]),
    ]
)
for kind in (BF16, FP16, E5M2):
    identical(
        round_to_format(big, *kind.layout),
        big.to(kind.dtype).float(),
        big,
        f"round_to_format to {kind.name}, beyond its end",
        torch.float32,
    )
ends = {
    BF16: (2 - 2.0**-7) * 2.0**127,
    FP16: 65504.0,
    E5M2: 57344.0,
    E4M3: 448.0,
    E3M2: 28.0,
    E2M3: 7.5,
    E2M1: 6.0,
    Format("E5M5", 5, 5, "nan"): (2 - 2.0**-4) * 2.0**16,
}
for kind, largest in ends.items():
    step = 2.0 ** (math.floor(math.log2(largest)) - kind.mantissa)
    inside = torch.tensor(
        [largest, largest + 0.49 * step, -largest - 0.49 * step], dtype=torch.float64
    )
    identical(
        round_to_format(inside, *kind.layout),
        torch.tensor([largest, largest, -largest], dtype=torch.float64),
        inside,
        f"round_to_format to {kind.name}, just inside",
        torch.float64,
    )
    outside = torch.tensor([largest + 0.51 * step, 2.0**130, math.inf], dtype=torch.float64)
    full = torch.full((3,), largest, dtype=torch.float64)
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[kind.special] * torch.ones(
        3, dtype=torch.float64
    )
    for sign in (1, -1):
        identical(
            round_to_format(sign * outside, *kind.layout),
            sign * beyond,
            sign * outside,
            f"round_to_format to {kind.name}, beyond",
            torch.float64,
        )
        identical(
            round_to_format(sign * outside, *kind.layout, saturate=True),
            sign * full,
            sign * outside,
            f"round_to_format to {kind.name} with saturate",
            torch.float64,
        )
    nothing = torch.tensor([math.nan], dtype=torch.float64)
    identical(
        round_to_format(nothing, *kind.layout, saturate=True),
        nothing,
        nothing,
        "round_to_format of NaN with saturate",
        torch.float64,
    )
tie = torch.tensor([65520.0, -65520.0, 61440.0], dtype=torch.float64)
identical(
    round_to_format(tie, *FP16.layout),
    torch.tensor([math.inf, -math.inf, 61440.0], dtype=torch.float64),
    tie,
    "round_to_format of the tie at FP16's end",
    torch.float64,
)
### END HIDDEN TESTS

# %% check="round_to_format" points=2
x = torch.tensor([[0.3, -2.4], [5.1, 100.0]])
result = round_to_format(x, *E2M1.layout)
identical(
    result,
    torch.tensor([[0.5, -2.0], [6.0, 6.0]]),
    x,
    "round_to_format to FP4",
    torch.float32,
    "Its numbers are 0, ½, 1, 1½, 2, 3, 4 and 6",
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
# TF32, which PyTorch has no type for, and longer mantissas: add half of what is cut off, and a bit
# more where the last one kept is odd. Also just below powers of two, where a rounded logarithm is
# an octave too high.
below = torch.randint(1, 254, (4000,), generator=g) << 23
below -= 2 ** torch.randint(0, 9, (4000,), generator=g) * torch.randint(1, 4, (4000,), generator=g)
x = torch.cat(
    [
        torch.randn(4000, generator=g) * 10.0 ** torch.randint(-30, 30, (4000,), generator=g),
        1 + torch.arange(512) / 2**12,
        below.clamp(min=2**23).to(torch.int32).view(torch.float32),
    ]
)
raw = x.view(torch.int32)
for size in (10, 16, 19, 21, 22):
    cut = 23 - size
    identical(
        round_to_format(x, 8, size),
        ((raw + (2 ** (cut - 1) - 1) + ((raw >> cut) & 1)) & -(2**cut)).view(torch.float32),
        x,
        f"round_to_format to {'TF32' if size == 10 else f'8 bits of exponent and {size} more'}",
        torch.float32,
    )
wide = torch.randn(3000, generator=g, dtype=torch.float64) * 10.0 ** torch.randint(
    -48, 36, (3000,), generator=g
)
identical(
    round_to_format(wide, *FP32.layout),
    wide.float().double(),
    wide,
    "round_to_format to FP32, float64 in",
    torch.float64,
)
# Small formats by brute force: the nearest of all their numbers, the even pattern where two are as
# near.
for kind in (E2M1, E2M3, E3M2, Format("E3M4", 3, 4, "nan"), Format("E4M1", 4, 1, "ieee")):
    bias, size = 2 ** (kind.exponent - 1) - 1, 2**kind.mantissa
    line = [m / size * 2.0 ** (1 - bias) for m in range(size)]
    line += [
        (1 + m / size) * 2.0 ** (e - bias) for e in range(1, 2**kind.exponent) for m in range(size)
    ]
    line = torch.tensor(
        line[: {"ieee": -size, "nan": -1, "none": None}[kind.special]], dtype=torch.float64
    )
    x = (
        torch.randn(60, 5, generator=g, dtype=torch.float64)
        * line[-1]
        / 3
        * 2.0 ** torch.randint(-8, 1, (60, 5), generator=g)
    )
    x = torch.cat(
        [
            x.clamp(-float(line[-1]), float(line[-1])).flatten(),
            (line[1:] + line[:-1]) / 2,
            -(line[1:] + line[:-1]) / 2,
        ]
    ).view(-1, 2)[:, 0]  # not contiguous
    gap = (x.abs()[:, None] - line).abs()
    gap = torch.where(
        gap == gap.amin(1, keepdim=True), torch.arange(len(line)) % 2, 2
    )  # of the nearest, an even one
    identical(
        round_to_format(x, *kind.layout),
        torch.copysign(line[gap.argmin(1)], x),
        x,
        f"round_to_format to {kind.name}",
        torch.float64,
    )
point = torch.tensor(-5.0)
identical(
    round_to_format(point, *E2M1.layout),
    torch.tensor(-4.0),
    point,
    "round_to_format of a tensor without axes",
    torch.float32,
)
identical(
    round_to_format(torch.empty(0, 3), *FP16.layout),
    torch.empty(0, 3),
    torch.empty(0, 3),
    "round_to_format of nothing",
    torch.float32,
)
### END HIDDEN TESTS

# %% [markdown]
# ### The error, by magnitude
#
# For each magnitude the next cell rounds 200 numbers within a sixteenth of an octave and draws the
# largest relative error. **Write down first** what the curves of FP16 and BF16 look like from 10⁻¹⁰
# to 10¹⁰, and where they cross.

# %% tags=["experiment", "figure"]
# Figure: the largest relative error, by magnitude
g = torch.Generator().manual_seed(0)
octaves = torch.arange(-36, 36, 1 / 16, dtype=torch.float64)
x = 2 ** (octaves[:, None] + torch.rand(len(octaves), 200, generator=g, dtype=torch.float64) / 16)
fig, ax = plot.plt.subplots(figsize=(9.5, 4.2))
for i, kind in enumerate((BF16, FP16, E5M2, E4M3)):
    error = (
        ((round_to_format(x, *kind.layout) - x).abs() / x)
        .amax(1)
        .nan_to_num(math.inf)
        .clamp(max=1.6)
    )
    if kind.mantissa < 4:  # one step is wider than a sixteenth of an octave: look across it
        error = F.max_pool1d(
            error[None], 2 ** (5 - kind.mantissa) + 1, 1, 2 ** (4 - kind.mantissa)
        )[0]
    ax.plot(
        x[:, 0],
        error,
        color=plot.COLORS[i],
        linestyle=plot.DASHES[i],
        linewidth=1.3,
        label=kind.name,
    )
ax.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
ax.annotate("all of it is lost: rounded to 0", (2.0**-36, 1.08), fontsize=8, color="#555555")
ax.set(
    xscale="log",
    yscale="log",
    xlabel="magnitude of the number",
    ylabel="largest relative error",
    ylim=(6e-5, 2.4),
)
ax.set_title("what rounding costs")
ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.0))
plot.caption(
    fig,
    "Each format is a bathtub. On the floor, a saw of one tooth per octave whose height the "
    "mantissa decides; on the left the subnormals, an octave of relative precision lost per octave "
    "down, then zero; on the right the wall of overflow (errors are cut off at the top). FP16 is "
    "eight times as fine as BF16 from 6·10⁻⁵ to 65504, and BF16 has no walls in this picture.",
)
plot.plt.show()

# %% [markdown]
# ## Updates that vanish {#lost-updates}
#
# A weight $w$ in a format with $M$ bits of mantissa, and an update $\Delta$. The sum $w+\Delta$ is
# rounded to nearest: if $|\Delta| < \frac12\mathrm{ulp}(w)$, the nearest number is $w$. (Half of
# that if $w$ is a power of two and $\Delta$ points toward zero: the steps below $w$ are half as
# wide.) The update is not small, it is **gone**, and so is the next one, and the thousandth. In
# relative terms, an update is lost for certain when $|\Delta|/|w| < 2^{-(M+2)}$: below 0.2 % in
# BF16 (and, low in the octave, below 0.4 %).
#
# Is that a case that comes up? Adam moves every weight by about the learning rate, whatever the
# gradient. A weight of 0.03 in BF16 has $\mathrm{ulp} = 2^{-6-7} = 1.2\cdot10^{-4}$: once the
# learning rate is well below $6\cdot10^{-5}$, as it is late in most long runs, only a rare large
# update moves it. Adam's second moment fares no better: $0.999$ in BF16 is 1, and an average that
# decays by 0.1 % per step, in steps of 0.4 to 0.8 %, does not decay.
#
# **Stochastic rounding** is the remedy that costs no memory. Round $x$, between the neighbors
# $a < x < b$, up with a probability equal to how far it is on the way:
#
# $$ P(b) = \frac{x-a}{b-a}, \qquad \mathbb E[\mathrm{sr}(x)] = a\,\frac{b-x}{b-a} + b\,\frac{x-a}{b-a} = \frac{x\,(b-a)}{b-a} = x . $$
#
# An update of a hundredth of a step then moves the weight by a whole step in one of a hundred
# cases: right on average, at the price of noise. After $n$ updates of size $\Delta$ the noise has a
# standard deviation of at most $\sqrt{n\,\Delta\,\mathrm{ulp}}$, while the signal is $n\Delta$.
#
# For BF16 there is a beautiful way. It is the upper half of a float32: same sign, same exponent,
# the first 7 of 23 bits of mantissa. The lower 16 bits, read as a number, *are* the fraction of the
# way from the neighbor nearer to zero to the other, in units of $2^{-16}$: $(x-a)/(b-a)$ for
# positive $x$, $(b-x)/(b-a)$ for negative. So **add a random 16-bit number to the bit pattern, and
# cut off the lower half**: it carries over, away from zero, with exactly the right probability.
# This works in every octave, across octaves, for subnormals, and for negative numbers too, because
# the sign is a bit of its own.


# %% exercise="stochastic_round_bf16" minutes=15 difficulty=2
def stochastic_round_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """x rounded to one of its two neighbors in bfloat16, up or down at random, so that its mean is
    x.

    x: float32, any shape. Returns bfloat16 of the same shape. All randomness comes from
    `generator`, and every element is rounded independently of the others. The probability of the
    neighbor away from zero is exactly the lower 16 bits of x's pattern, divided by 2^16. So numbers
    that bfloat16 has are never changed. Infinities and NaN stay what they are. (A finite number
    beyond the largest bfloat16 may become infinite.)
    """
    ### BEGIN SOLUTION
    bits = x.view(torch.int32)
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    # A NaN plus noise could be anything.
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the pattern of a float</summary>
#
# `x.view(torch.int32)` looks at the same memory as whole numbers, and `.view(torch.float32)` goes
# back. To clear the lower 16 bits: `& ~0xFFFF`, or `& -65536`.
# </details>
#
# <details><summary>Hint: NaN</summary>
#
# The pattern of a NaN has an exponent of all ones and some mantissa. What does adding noise do to
# 0x7FFFFFFF? To infinity, 0x7F800000?
# </details>

# %% check="stochastic_round_bf16" points=2
g = checks.generator(5)
x = torch.full((4096,), 1 + 2.0**-9)  # a quarter of the way from 1 to the next, 1 + 2⁻⁷
with checks.unchanged(x=x):
    drawn = stochastic_round_bf16(x, g)
expect_tensor(drawn, "the result", torch.bfloat16, (4096,))
found = set(drawn.float().unique().tolist())
assert found <= {1.0, 1 + 2.0**-7}, (
    f"1 + 2⁻⁹ has the neighbors 1 and 1 + 2⁻⁷; yours also gives "
    f"{sorted(found - {1.0, 1 + 2.0**-7})[:3]}"
)
ups = int((drawn > 1).sum())
assert abs(ups - 1024) < 6 * (4096 * 0.25 * 0.75) ** 0.5, (
    f"1 + 2⁻⁹ should go up in a quarter of the cases, about 1024 of 4096; yours goes up in {ups}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
draws = 1500
grid = torch.cat(
    [
        torch.randn(150, generator=g) * 10.0 ** torch.randint(-37, 37, (150,), generator=g),
        torch.randn(40, generator=g),
        torch.randn(10, generator=g) * 1e-39,
    ]
)
grid = grid[grid.abs() < 3e38]
raw = grid.view(torch.int32)
low, high = (raw & ~0xFFFF).view(torch.float32), ((raw & ~0xFFFF) + 0x10000).view(torch.float32)
share = (raw & 0xFFFF).double() / 2**16
drawn = stochastic_round_bf16(grid.expand(draws, -1), g).float()
stray = ~((drawn == low) | (drawn == high)).all(0)
assert not stray.any(), (
    f"{grid[stray][0].item()!r} was rounded to something that is not one of its two neighbors in "
    f"bfloat16"
)
counts = (drawn == high).double().sum(0)
z = (counts - draws * share) / (draws * share * (1 - share)).sqrt().clamp(min=1)
worst = int(z.abs().argmax())
assert float(z[worst].abs()) < 6.5, (
    f"{grid[worst].item()!r} lies {float(share[worst]):.3f} of the way to the neighbor away from "
    f"zero, and goes there in {float(counts[worst] / draws):.3f} of the cases"
)
total = float((counts - draws * share).sum() / (draws * share * (1 - share)).sum().sqrt())
assert abs(total) < 5.5, (
    f"taken together, numbers go away from zero too {'often' if total > 0 else 'seldom'}: "
    f"{total:.1f} standard errors"
)
# A step of which only a 512th is done needs noise finer than that; so does one that is done but for
# a 512th.
for sign in (1, -1):
    ups = int((stochastic_round_bf16(torch.full((2**18,), 3 + sign * 2.0**-15), g) != 3).sum())
    assert abs(ups - 512) < 150, (
        f"3 {'+' if sign > 0 else '−'} 2⁻¹⁵ should leave 3 in one of 512 cases: 512 of 2¹⁸ draws; "
        f"yours in {ups}. How fine is your noise?"
    )
# The smallest share that is not 0, and the largest that is not 1: about 16 of 2²⁰ draws each.
for lower, usual in ((0x0001, 1.0), (0xFFFF, 1 + 2.0**-7)):
    x = torch.full((2**20,), 0x3F800000 + lower, dtype=torch.int32).view(torch.float32)
    other = int((stochastic_round_bf16(x, g) != usual).sum())
    assert 1 <= other <= 60, (
        f"a number whose lower 16 bits are {lower:#06x} should give something else than {usual:g} "
        f"in one of 65536 cases, about 16 of 2²⁰; yours does so in {other}. Can each of the "
        f"65536 numbers of 16 bits be drawn?"
    )
### END HIDDEN TESTS

# %% check="stochastic_round_bf16" points=1
g = checks.generator(7)
exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, math.nan, 2.0**-133])
identical(
    stochastic_round_bf16(exact, g),
    exact.bfloat16(),
    exact,
    "numbers that bfloat16 has",
    torch.bfloat16,
)
### BEGIN HIDDEN TESTS
patterns = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
patterns = patterns.expand(12, -1)  # often enough that a chance of 2⁻¹⁶ shows
identical(
    stochastic_round_bf16(patterns.float(), g),
    patterns,
    patterns.float(),
    "all the numbers of bfloat16",
    torch.bfloat16,
)
nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1]).repeat(500)
odd = nans.to(torch.int32).view(torch.float32)
assert stochastic_round_bf16(odd, g).isnan().all(), (
    "a NaN must stay NaN, whatever is in its mantissa"
)
x = torch.randn(3, 1, 50, generator=g).transpose(0, 2) * 1e-3
first = stochastic_round_bf16(x, g)
assert first.shape == x.shape, f"the result has shape {tuple(first.shape)}, not {tuple(x.shape)}"
checks.uses_generator(
    lambda source: stochastic_round_bf16(torch.full((100,), 1 + 2.0**-8), source),
    what="stochastic_round_bf16",
)
# Halfway numbers, 2¹⁴ of them: whether one goes up tells nothing of any other, near or far.
up = stochastic_round_bf16(torch.full((128, 128), 1 + 2.0**-8), g) > 1
for name, pairs in (("row", up), ("column", up.T)):
    for apart in (1, 2, 3, 4, 8, 32, 64):
        alike = float((pairs[:, apart:] == pairs[:, :-apart]).double().mean())
        spread = 6 * 0.5 / pairs[:, apart:].numel() ** 0.5
        assert abs(alike - 0.5) < spread, (
            f"elements {apart} apart in a {name} are rounded the same way in {alike:.0%} of the "
            f"cases; independent ones would be in 50 %"
        )
alike = float((up[1:] == up[:1]).double().mean())
assert abs(alike - 0.5) < 0.3, "all rows are rounded alike: every element needs noise of its own"
assert not bool((up[0] == up[64]).all()), "noise repeats itself"
assert stochastic_round_bf16(torch.tensor(0.3), g).shape == (), "a tensor without axes stays one"
### END HIDDEN TESTS

# %% [markdown]
# ### Counting to ten in BF16
#
# Add 0.001 ten thousand times, in BF16. **Write down first** where a sum that is rounded to nearest
# stops, and by how much the stochastic one will be off at 10.

# %% tags=["experiment"]
g = torch.Generator().manual_seed(0)
steps = 10_000
nearest, random = torch.zeros(()), torch.zeros(8)  # eight stochastic runs side by side
lines = torch.empty(steps, 10)
for i in range(steps):
    nearest = (nearest + 0.001).bfloat16().float()
    random = stochastic_round_bf16(random + 0.001, g).float()
    lines[i, 0], lines[i, 1:9], lines[i, 9] = nearest, random, (i + 1) * 0.001

# %% tags=["experiment", "figure"]
# Figure: where a sum in BF16 stops, and where stochastic rounding takes it
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.5, 1])
axes[0].plot(lines[:, 1:9], color=plot.COLORS[1], linestyle="-", linewidth=0.7)
axes[0].plot([], [], color=plot.COLORS[1], linestyle="-", label="stochastic rounding, eight runs")
axes[0].plot(lines[:, 9], color="black", linestyle="--", linewidth=1, label="exact")
axes[0].plot(lines[:, 0], color=plot.COLORS[0], linestyle="-", label="rounded to nearest")
axes[0].set(xlabel="additions of 0.001", ylabel="the sum")
axes[0].legend()
axes[0].set_title("a sum in BF16")
axes[1].plot(lines[:600, 1:4], linestyle="-", linewidth=0.9, color=plot.COLORS[1])
axes[1].plot(lines[:600, 9], color="black", linestyle="--", linewidth=1)
axes[1].plot(lines[:600, 0], color=plot.COLORS[0], linestyle="-")
axes[1].set(xlabel="additions of 0.001")
axes[1].set_title("its beginning")
plot.caption(
    fig,
    f"Rounded to nearest, the sum stops at {float(nearest):g}, from where on half of a step, 2⁻⁹, "
    f"is more than the addend: it has taken {int((lines[:, 0] < nearest).sum()) + 1} of ten "
    "thousand additions. On the way it is off as well: where a step is of the size of the addend, "
    "each addition counts as one step or two. Stochastic rounding ends between "
    f"{float(random.min()):.2f} and {float(random.max()):.2f}, wrong by chance but not in one "
    "direction.",
)
plot.plt.show()

# %% [markdown]
# ## Master weights
#
# The remedy of Micikevicius et al. (2017) costs memory and leaves nothing to chance. Keep a
# **master copy** of the weights in float32, where updates add up; round it to half precision after
# each update, for the next forward and backward pass:
#
# $$ g_t = \nabla L(\mathrm{rd}(w_t))\ \text{in half precision}, \qquad w_{t+1} = w_t - \eta\,\mathrm{Adam}(g_t)\ \text{in float32} . $$
#
# Many updates that are too small for half precision accumulate in the master until they amount to a
# step there. Adam's moments are float32 for the same reason: $g^2$ for $g = 10^{-4}$ is $10^{-8}$,
# zero in FP16; and $\epsilon = 10^{-8}$ is zero in FP16 as well, so that $0/(\sqrt0+\epsilon)$ is
# NaN.
#
# The account, per parameter: 2 bytes of weight, 2 of gradient, 4 of master, 4 + 4 of moments: **16
# bytes**, as many as float32 training needs (4 + 4 + 8). Mixed precision does not save memory on
# the *weights*. It saves on activations, and it saves time.
#
# (PyTorch's autocast turns it around: the model's own parameters are the float32 masters, and
# half-precision copies are made on the fly for each product. The arithmetic is the same.)


# %% tags=["support"]
# Support: MasterWeightAdam beside torch.optim.Adam, DynamicLossScaler beside GradScaler
USUAL = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def adam_beside_torch(
    make, dtype, shapes, steps, g, scales=(1.0,), sizes=(1.0,), bad=(), missing=(), **settings
):
    """`make` (your class) and torch.optim.Adam on float32 copies, side by side, on the same
    gradients: in step i multiplied by scales[i] and of the size sizes[i], with an inf or NaN in
    the steps `bad`, without one for (step, parameter) in `missing`.
    """
    settings = USUAL | settings
    start = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    mine = [nn.Parameter(t.clone()) for t in start]
    theirs = [nn.Parameter(t.float()) for t in start]
    held = [p.detach() for p in mine]  # as a model holds them: in their storage
    ours, peer = make(iter(mine), **settings), torch.optim.Adam(theirs, **settings)
    for step in range(steps):
        scale, size = scales[step % len(scales)], sizes[step % len(sizes)]
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = q.grad = None
            if (step, i) in missing:
                continue
            p.grad = (torch.randn(p.shape, generator=g) * size * scale).to(dtype)
            q.grad = p.grad.float() / scale
        before = [None if p.grad is None else p.grad.clone() for p in mine]
        if step in bad:
            old = [p.detach().clone() for p in mine]
            mine[-1].grad.view(-1)[-1] = math.nan if step % 2 else -math.inf
            result = ours.step(scale)
            assert result is False, (
                f"with an inf or NaN in a gradient step returns False; yours returned {result!r}"
            )
            for p, t in zip(mine, old, strict=True):
                assert torch.equal(p.detach(), t), (
                    "a gradient with an inf or NaN must change nothing"
                )
            continue
        assert ours.step(scale) is True, "step returns True when the update was made"
        peer.step()
        for p, t in zip(mine, before, strict=True):
            untouched = (
                p.grad is None if t is None else p.grad is not None and torch.equal(p.grad, t)
            )
            assert untouched, "p.grad must be left as it is: divide a copy, in float32"
    for p, q, m, view, t in zip(mine, theirs, ours.master, held, start, strict=True):
        checks.close(
            m,
            q.detach(),
            what=f"the master after {steps} steps ({dtype}, scales {scales}, gradients of about "
            f"{sizes})",
            rtol=2e-6,
            # Relative to where it has been: its steps, of about lr, may end near 0.
            atol=2e-6 * (float(t.abs().max()) + steps * settings["lr"]),
            dtype=torch.float32,
        )
        assert torch.equal(view, p.detach()), (
            "the parameter must be changed in place: the model holds it"
        )
        assert p.dtype == dtype, f"the parameter's dtype was {dtype}, and is {p.dtype}"
        assert torch.equal(p.detach(), m.to(dtype)), (
            "a parameter must be its master, rounded to its dtype"
        )
    masters = [m.clone() for m in ours.master]
    for p in mine:
        p.data.zero_()
    for m, before in zip(ours.master, masters, strict=True):
        assert torch.equal(m, before), "a master needs storage of its own"


def scaler_beside_torch(make, g, iterations, bad_share, early, clip, settings, kind):
    """`make` (your class) and torch.amp.GradScaler in the same loop, with the same gradients; some
    hold an inf or NaN.
    """
    start = [torch.randn(shape, generator=g) for shape in ((3,), (2, 4), (), (5,))]
    sides = []
    for kind_of_scaler in (make, lambda **s: torch.amp.GradScaler("cpu", **s)):
        params = [nn.Parameter(t.clone()) for t in start]
        groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.02}]
        optimizer = (
            torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            if kind == "sgd"
            else torch.optim.Adam(groups, lr=0.1)
        )
        sides.append((params, optimizer, kind_of_scaler(**settings)))
    for i in range(iterations):
        slopes = [torch.randn(t.shape, generator=g) for t in start]
        which = int(torch.randint(0, 3, (1,), generator=g))
        if float(torch.rand(1, generator=g)) < bad_share:
            flat = slopes[which].view(-1)
            flat[int(torch.randint(0, len(flat), (1,), generator=g))] = (
                math.nan,
                math.inf,
                -math.inf,
            )[i % 3]
        unscale_first = bool(torch.rand(1, generator=g) < early)
        for params, optimizer, scaler in sides:
            optimizer.zero_grad()
            loss = sum(
                (p * s).sum() for p, s in zip(params[:3], slopes, strict=False)
            )  # the last has no gradient
            scaler.scale(loss).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        (mine, _, ours), (theirs, _, peer) = sides
        where = (
            f"after iteration {i} (growth_interval {settings['growth_interval']}, bad gradients "
            f"in {bad_share:.0%} of the "
            f"iterations{', unscale_ called before step' if unscale_first else ''})"
        )
        assert type(ours.get_scale()) is float, (
            f"get_scale returns a float; yours is {type(ours.get_scale()).__name__}"
        )
        assert ours.get_scale() == peer.get_scale(), (
            f"the scale {where} should be {peer.get_scale():g}, yours is {ours.get_scale():g}"
        )
        for p, q in zip(mine, theirs, strict=True):
            checks.close(p.detach(), q.detach(), what=f"a parameter {where}", rtol=1e-6)


# %% exercise="master_weight_adam" minutes=20 difficulty=2
class MasterWeightAdam:
    """Adam for parameters in half precision, with everything that has to add up in float32.

    params: nn.Parameters (bfloat16, float16 or float32). Attributes: `params`, the list of them;
    `master`, a list of float32 tensors of the same shapes, at first copies of the parameters with
    storage of their own; and `lr`, which may be set to another rate between two steps.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        ### BEGIN SOLUTION
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.master = [p.detach().to(torch.float32, copy=True) for p in self.params]
        self.mean = [torch.zeros_like(m) for m in self.master]
        self.square = [torch.zeros_like(m) for m in self.master]
        self.updates = [0] * len(self.params)
        ### END SOLUTION

    def zero_grad(self) -> None:
        """Forgets all gradients (sets them to None)."""
        ### BEGIN SOLUTION
        for p in self.params:
            p.grad = None
        ### END SOLUTION

    def step(self, scale: float = 1.0) -> bool:
        """One update from the gradients in p.grad, which are `scale` times the true ones (see loss
        scaling below).

        If any gradient holds an inf or NaN, nothing at all changes, and the result is False.
        Otherwise True, and every parameter with a gradient gets Adam's update as torch.optim.Adam
        makes it (bias-corrected by that parameter's own number of updates, eps added to the root),
        computed in float32 on its master; then it is set, in place, to the master rounded to its
        dtype. Gradients are divided by `scale` in float32, and p.grad is left as it is. A parameter
        whose grad is None stays untouched, with its state.
        """
        ### BEGIN SOLUTION
        grads = [None if p.grad is None else p.grad.float() / scale for p in self.params]
        if not all(g is None or bool(g.isfinite().all()) for g in grads):
            return False
        beta1, beta2 = self.betas
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
                if g is None:
                    continue
                self.updates[i] += 1
                self.mean[i].lerp_(g, 1 - beta1)
                self.square[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                mean = self.mean[i] / (1 - beta1 ** self.updates[i])
                size = (self.square[i] / (1 - beta2 ** self.updates[i])).sqrt() + self.eps
                self.master[i].sub_(self.lr * mean / size)
                p.copy_(self.master[i])
        return True
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a copy that is one</summary>
#
# `p.float()` of a float32 tensor is that tensor itself. `p.detach().float().clone()` is a copy in
# every case.
# </details>
#
# <details><summary>Hint: writing to a parameter</summary>
#
# Inside `torch.no_grad()`, `p.copy_(t)` rounds to p's dtype and keeps the Parameter that the model
# holds. `p = t.half()` only gives a local name to something new.
# </details>
#
# <details><summary>Hint: where to divide by the scale</summary>
#
# The gradients were scaled up because they would not fit otherwise. If you divide them while they
# are float16, they do not fit again.
# </details>

# %% check="master_weight_adam" points=2
weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
optimizer = MasterWeightAdam([weight], lr=1e-3)
for _ in range(100):
    weight.grad = torch.tensor([1.0, -1.0, 0.01], dtype=torch.bfloat16)
    done = optimizer.step()
assert done is True, f"step returns True when the update was made; yours returned {done!r}"
checks.close(
    weight.detach().float(),
    torch.tensor([0.9, 1.1, 0.9]),
    what="a bfloat16 weight of 1 after 100 updates of ±0.001",
    rtol=4e-3,
    hint="Updates must add up in float32",
    mistakes={"adding each update to the half-precision weight": torch.ones(3)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    adam_beside_torch(MasterWeightAdam, dtype, [(5, 3), (7,), ()], 40, g, sizes=(1.0, 1e-2, 3.0))
    adam_beside_torch(
        MasterWeightAdam, dtype, [(4, 1, 2)], 30, g, lr=0.03, betas=(0.8, 0.95), eps=1e-3
    )
# Gradients whose squares are 0 in float16.
adam_beside_torch(MasterWeightAdam, torch.float16, [(30,)], 25, g, sizes=(3e-5,))
pair = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
optimizer = MasterWeightAdam(iter(pair), lr=0.5)
assert type(optimizer.params) is list, "the attribute `params` is a list"
assert all(p is q for p, q in zip(optimizer.params, pair, strict=True)), (
    "`params` holds the parameters themselves"
)
for rate in (0.25, 0.0, 0.125):  # Adam moves by the rate where all gradients are alike
    optimizer.lr = rate
    for p in pair:
        p.grad = torch.ones_like(p)
    optimizer.step()
checks.close(
    pair[1].detach().float(),
    torch.full((2,), 1 - 0.375),
    what="a weight after updates at the rates 0.25, 0 and 0.125",
    hint="`lr` may be set between two steps",
)
### END HIDDEN TESTS

# %% check="master_weight_adam" points=2
weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
optimizer = MasterWeightAdam([weight], lr=0.25)
# A gradient of 2⁻²⁶ that was scaled by 2¹⁶.
weight.grad = torch.tensor([2.0**-10, -(2.0**-10)], dtype=torch.float16)
assert optimizer.step(scale=2.0**16) is True, "the gradients are finite, so step returns True"
checks.close(
    weight.detach().float(),
    torch.tensor([1 - 0.25 * 0.598, 1 + 0.25 * 0.598]),
    what="the weight after a gradient of 2⁻²⁶ (comparable with eps)",
    rtol=2e-3,
    mistakes={
        "dividing by the scale in float16, where the quotient is 0": torch.ones(2),
        "not dividing by the scale": torch.tensor([0.75, 1.25]),
    },
)
weight.grad = torch.tensor([math.inf, 1.0], dtype=torch.float16)
assert optimizer.step() is False, "with an infinite gradient step returns False and changes nothing"
optimizer.zero_grad()
assert weight.grad is None, "zero_grad sets gradients to None"
### BEGIN HIDDEN TESTS
g = checks.generator(9)
adam_beside_torch(
    MasterWeightAdam,
    torch.float16,
    [(6,), (2, 5)],
    30,
    g,
    scales=(2.0**16, 2.0**12),
    sizes=(1e-7, 1e-6),
)
# Of a float32 parameter p.grad.float() is p.grad itself.
adam_beside_torch(
    MasterWeightAdam, torch.float32, [(6,), (2, 5)], 10, g, scales=(2.0**10, 3.0), bad=(4,)
)
adam_beside_torch(MasterWeightAdam, torch.bfloat16, [(6,), (2, 5)], 12, g, bad=(0, 3, 4, 9))
adam_beside_torch(
    MasterWeightAdam,
    torch.float16,
    [(6,), (2, 5), (3,)],
    12,
    g,
    bad=(5,),
    missing={(0, 0), (1, 0), (4, 1), (6, 2), (7, 2), (7, 0)},
)
linear = nn.Linear(4, 3).bfloat16()
optimizer = MasterWeightAdam(linear.parameters(), lr=0.01)
for _ in range(3):
    optimizer.zero_grad()
    assert all(p.grad is None for p in linear.parameters()), (
        "zero_grad must reach every parameter, also when params is a generator"
    )
    linear(torch.ones(2, 4, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
assert all(p.requires_grad and p.is_leaf for p in linear.parameters()), (
    "the parameters must stay leaves that require a gradient"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Four ways to train in BF16
#
# A small network learns 600 handwritten digits by heart. The same batches, the same learning rate
# falling to zero, four ways to keep the weights:
#
# - **float32**, everything;
# - **naive BF16**: weights and Adam's moments in bfloat16, as `model.bfloat16()` and a stock
#   optimizer give it;
# - **stochastic**: bfloat16 weights, your `stochastic_round_bf16` after each update, moments in
#   float32;
# - **master**: your `MasterWeightAdam`.
#
# The right panel counts the weights that an update changed. **Write down first** what that share
# will be for the naive run at the beginning and at the end.


# %% tags=["experiment"]
class BF16Adam:
    """Adam with its state in bfloat16, or in float32 with stochastic rounding of the weights."""

    def __init__(self, params, generator=None):
        self.params, self.generator, self.t = list(params), generator, 0
        keep = torch.bfloat16 if generator is None else torch.float32
        self.state = [[torch.zeros_like(p, dtype=keep) for _ in "mv"] for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        self.t += 1
        for p, (mean, square) in zip(self.params, self.state, strict=True):
            g = p.grad.to(mean.dtype)
            mean.mul_(0.9).add_(g, alpha=0.1)
            square.mul_(0.999).addcmul_(g, g, value=0.001)
            root = (square / (1 - 0.999**self.t)).sqrt() + 1e-8
            update = lr * (mean / (1 - 0.9**self.t)) / root
            if self.generator is None:
                p.sub_(update)
            else:
                p.copy_(stochastic_round_bf16(p.float() - update, self.generator))


def train_digits(kind: str, steps: int = 320, lr: float = 1e-3) -> tuple[list[float], list[float]]:
    """(loss on the 600 digits every 10 steps, share of weights changed by the step)."""
    images, labels = (t[:600] for t in data.digits())
    images = images.flatten(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10)
    )
    if kind != "float32":
        model.bfloat16()
    parameters = list(model.parameters())
    master = MasterWeightAdam(parameters, lr=lr)
    other = BF16Adam(parameters, torch.Generator().manual_seed(1) if kind == "stochastic" else None)
    draw, losses, changed = torch.Generator().manual_seed(2), [], []
    for step in range(steps):
        batch = torch.randint(0, len(images), (64,), generator=draw)
        rate = lr * (1 - step / steps)
        master.zero_grad()
        logits = model(images[batch].to(parameters[0].dtype)).float()
        F.cross_entropy(logits, labels[batch]).backward()
        before = torch.cat([p.detach().flatten() for p in parameters])
        if kind in ("float32", "master"):
            master.lr = rate
            master.step()
        else:
            other.step(rate)
        if step % 10 == 9:
            after = torch.cat([p.detach().flatten() for p in parameters])
            changed.append(float((after != before).float().mean()))
            with torch.no_grad():
                logits = model(images.to(parameters[0].dtype)).float()
                losses.append(float(F.cross_entropy(logits, labels)))
    return losses, changed


names = {
    "float32": "float32",
    "naive": "naive BF16",
    "stochastic": "BF16, stochastic rounding",
    "master": "BF16, master weights",
}
results = {name: train_digits(kind) for kind, name in names.items()}

# %% tags=["experiment", "figure"]
# Figure: four ways to keep the weights: the loss, and what an update moves
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.9))
ticks = [10 * (i + 1) for i in range(len(results["float32"][0]))]
plot.curves(
    ticks,
    {name: losses for name, (losses, _) in results.items()},
    logy=True,
    xlabel="step",
    ylabel="loss on the 600 digits (nats)",
    title="training",
    ax=axes[0],
)
plot.curves(
    ticks,
    {name: [100 * c for c in changed] for name, (_, changed) in results.items()},
    xlabel="step",
    ylabel="% of the weights changed",
    title="what an update reaches",
    ax=axes[1],
)
axes[1].get_legend().remove()
axes[1].set_ylim(0, 103)
end = "; ".join(f"{name} {losses[-1]:.4f}" for name, (losses, _) in results.items())
plot.caption(
    fig,
    f"Loss at the end: {end}. Right: in the naive run fewer and fewer weights move, first the "
    "large ones stop and, as the learning rate falls, all but those near zero. With a master the "
    "half-precision copy also changes seldom; the difference is that nothing is forgotten in "
    "between.",
)
plot.plt.show()

# %% [markdown]
# ## Loss scaling {#loss-scaling}
#
# The other end of the range. BF16's normal numbers reach as far down as float32's. FP16 stops at
# $2^{-24} = 6\cdot10^{-8}$, and gradients go below that as a matter of course: a mean over the
# tokens of a batch divides by thousands, and the gradient of a logit is the probability that the
# model gave to a wrong token. Is it much? The next cell takes a trained model of the course, four
# pieces of documentation, and looks at every gradient that the backward pass hands from layer to
# layer.


# %% tags=["experiment"]
def octave_counts(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Counts of ⌊log₂|g|⌋ from −60 to 19, of all gradients with respect to activations and of those
    of the logits.
    """
    counts = {"activations": torch.zeros(80), "logits": torch.zeros(80)}

    def count(name):
        def hook(grad):
            octave = torch.frexp(grad[grad != 0]).exponent - 1
            counts[name] += torch.bincount((octave.long() + 60).clamp(0, 79), minlength=80).cpu()

        return hook

    def watch(module, inputs, output):
        output.register_hook(count("activations"))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Linear)]
    logits = model(tokens[:, :-1])
    logits.register_hook(count("logits"))
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return counts


small, tokenizer = models.load("small")
small = small.float().to(profile.device)
for parameter in small.parameters():
    parameter.requires_grad_(True)
text = tokenizer.encode("\n".join(list(data.documentation().values())[:12]))
tokens = torch.tensor(text[: 4 * 257], device=profile.device).view(4, 257)
counts = octave_counts(small, tokens)

# %% tags=["experiment", "figure"]
# Figure: where gradients lie in FP16's range, as they are and scaled
fig, axes = plot.plt.subplots(2, 2, figsize=(11, 5.4), sharex=True, sharey="row")
lost = {}
for row, name in enumerate(("activations", "logits")):
    for column, shift in enumerate((0, 13)):
        ax, octaves = axes[row, column], torch.arange(-60, 20) + shift
        share = 100 * counts[name] / counts[name].sum()
        ax.axvspan(-70, -25, color="#d8d8d8", linewidth=0)
        ax.axvspan(-25, -14, color="#efefef", linewidth=0)
        ax.axvspan(16, 40, color="#d8d8d8", linewidth=0)
        ax.bar(
            octaves + 0.5, share, width=1, color=plot.COLORS[row], edgecolor="white", linewidth=0.3
        )
        lost[name, shift] = float(share[octaves < -25].sum())
        ax.annotate(
            f"{lost[name, shift]:.1f} %\nbecome 0", (4, 0.6 * float(share.max())), fontsize=9
        )
        ax.set(xlim=(-48, 22), ylim=(0, 1.15 * float(share.max())))
        if row == 0:
            ax.set_title("as they are" if shift == 0 else f"loss × 2$^{{{shift}}}$")
            for x, label in ((-36, "0"), (-19.5, "subnormal"), (1, "normal in FP16"), (19, "∞")):
                ax.annotate(
                    label,
                    (x, 0.98),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    va="top",
                    fontsize=8,
                    color="#555555",
                )
        else:
            ax.set_xlabel("log₂ of the gradient's magnitude")
    axes[row, 0].set_ylabel(f"% of the gradients\nof {name}")
plot.caption(
    fig,
    "The course's small model, 1,024 tokens. Dark: FP16 gives 0 or infinity; light: subnormal, "
    f"less precise. As they are, {lost['logits', 0]:.0f} % of the logits' gradients become zero, "
    "and the activations' gradients are mostly subnormal, while the upper half of FP16's range is "
    "empty. Multiplying the loss moves the whole picture to the right, without changing its shape.",
)
plot.plt.show()

# %% [markdown]
# The remedy is in the picture: shift it. Differentiation is linear, so if the **loss is multiplied
# by $S$**, every gradient of the backward pass is multiplied by $S$. Before the update, in float32,
# divide by $S$. For a power of two both are exact, as long as nothing over- or underflows.
#
# How large should $S$ be? As large as possible, until something overflows. **Dynamic loss scaling**
# finds out by trying:
#
# 1. Start high. Run forward and backward with the loss multiplied by $S$.
# 2. If any gradient is inf or NaN, **skip the update** and halve $S$. One batch is lost, which does
#    no harm.
# 3. If all went well for $N$ steps in a row (2000 is usual), double $S$.
#
# The scale hovers just below the point of overflow, follows it as gradients shrink in the course of
# training, and pays for that with one lost step in about $N$.
#
# Order matters: whoever clips gradients must divide by $S$ first, or clips a norm that is $S$ times
# too large. So the division is a step of its own, `unscale_`, which the user *may* call early.
#
# Your class has the interface of `torch.amp.GradScaler`, so that it can take its place in any loop:
#
# ```
# scaler.scale(loss).backward()
# scaler.unscale_(optimizer)          # optional
# clip_grad_norm_(parameters, 1.0)
# scaler.step(optimizer)              # skips if there was an inf or NaN
# scaler.update()
# ```


# %% exercise="dynamic_loss_scaler" minutes=25 difficulty=2
class DynamicLossScaler:
    """Dynamic loss scaling for one optimizer of float32 parameters, with the rules of
    torch.amp.GradScaler.

    growth_interval: so many updates in a row without inf or NaN multiply the scale by
    growth_factor; any inf or NaN multiplies it by backoff_factor. The count starts anew after
    either. In every iteration at least one parameter has a gradient, and `step` is called once at
    most.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        ### BEGIN SOLUTION
        self.factor, self.growth_interval = float(init_scale), growth_interval
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.good_steps = 0
        self.overflow: bool | None = None  # None: not looked at since the last update
        ### END SOLUTION

    def get_scale(self) -> float:
        """The present scale, a float."""
        ### BEGIN SOLUTION
        return self.factor
        ### END SOLUTION

    def scale(self, loss: Tensor) -> Tensor:
        """loss times the scale, differentiable."""
        ### BEGIN SOLUTION
        return loss * self.factor
        ### END SOLUTION

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients of all parameters of all of the optimizer's groups by the scale, in
        place (the tensors in p.grad stay the same objects), and remembers whether any held an inf
        or NaN. Parameters without a gradient are passed over.

        A second call before `update` raises RuntimeError: the gradients would be divided twice.
        """
        ### BEGIN SOLUTION
        if self.overflow is not None:
            raise RuntimeError("unscale_ has been called since the last update")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        self.overflow = not all(bool(g.isfinite().all()) for g in grads)
        for g in grads:
            g.mul_(1 / self.factor)
        ### END SOLUTION

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Unscales if that has not been done since the last `update`, then calls optimizer.step()
        unless an inf or NaN was found. Returns whether it was called.
        """
        ### BEGIN SOLUTION
        if self.overflow is None:
            self.unscale_(optimizer)
        if self.overflow:
            return False
        optimizer.step()
        return True
        ### END SOLUTION

    def update(self) -> None:
        """Adapts the scale to what was found, and makes ready for the next iteration.

        Raises RuntimeError if neither `unscale_` nor `step` was called since the last update: there
        is nothing to go by.
        """
        ### BEGIN SOLUTION
        if self.overflow is None:
            raise RuntimeError("no gradients have been looked at since the last update")
        if self.overflow:
            self.factor *= self.backoff_factor
            self.good_steps = 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.factor *= self.growth_factor
                self.good_steps = 0
        self.overflow = None
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three states, not two</summary>
#
# Between two updates the gradients are: not yet looked at, found good, or found bad. One attribute
# that is `None`, `False` or `True` can say all of it.
# </details>
#
# <details><summary>Hint: look before you divide</summary>
#
# An infinity divided by the scale is still one, so either order works. But look at *all* gradients:
# one bad tensor among many is enough.
# </details>

# %% check="dynamic_loss_scaler" points=2
weight = nn.Parameter(torch.tensor([1.0, 2.0]))
optimizer = torch.optim.SGD([weight], lr=0.5)
scaler = DynamicLossScaler(init_scale=8.0, growth_interval=2)
history = []
for slope in (1.0, math.inf, 1.0, 1.0, 1.0):
    optimizer.zero_grad()
    scaler.scale((weight * slope).sum()).backward()
    history.append((scaler.get_scale(), scaler.step(optimizer), weight[0].item()))
    scaler.update()
expected = [
    (8.0, True, 0.5),
    (8.0, False, 0.5),
    (4.0, True, 0.0),
    (4.0, True, -0.5),
    (8.0, True, -1.0),
]
for i, (mine, due) in enumerate(zip(history, expected, strict=True)):
    assert mine[0] == due[0], (
        f"iteration {i}: the scale should be {due[0]:g}, yours is {mine[0]!r} (the second of five "
        f"gradients is infinite, growth_interval is 2)"
    )
    assert mine[1] is due[1], (
        f"iteration {i}: step should return {due[1]}, yours returned {mine[1]!r}"
    )
    assert mine[2] == due[2], (
        f"iteration {i}: the weight should be {due[2]:g}, yours is {mine[2]:g}: is the gradient "
        f"divided by the scale, and a bad one skipped?"
    )
### BEGIN HIDDEN TESTS
g = checks.generator(10)
quarter = {"growth_factor": 4.0, "backoff_factor": 0.25}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for iterations, bad_share, early, settings, kind in (
        (40, 0.2, 0.0, {"init_scale": 1024.0, "growth_interval": 3}, "sgd"),
        (25, 0.0, 0.0, {"init_scale": 4.0, "growth_interval": 1}, "adam"),
        (60, 0.1, 0.0, {"init_scale": 2.0**14, **quarter, "growth_interval": 5}, "adam"),
        (12, 1.0, 0.0, {"init_scale": 2.0**10, "growth_interval": 2}, "sgd"),
    ):
        scaler_beside_torch(
            DynamicLossScaler, g, iterations, bad_share, early, False, settings, kind
        )
### END HIDDEN TESTS

# %% check="dynamic_loss_scaler" points=2
weight = nn.Parameter(torch.tensor([1.0, 2.0]))
optimizer, scaler = torch.optim.SGD([weight], lr=1.0), DynamicLossScaler(init_scale=2.0**10)
scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
scaler.unscale_(optimizer)
checks.close(weight.grad, torch.tensor([3.0, 4.0]), what="the gradient after unscale_")
nn.utils.clip_grad_norm_([weight], 1.0)
assert scaler.step(optimizer) is True, (
    "the gradients are finite: step calls the optimizer and returns True"
)
checks.close(
    weight.detach(),
    torch.tensor([0.4, 1.2]),
    what="the weight after unscale_, clipping to norm 1, and step",
    mistakes={"dividing by the scale twice": torch.tensor([1 - 0.6 / 1024, 2 - 0.8 / 1024])},
)
checks.raises(
    RuntimeError, scaler.unscale_, optimizer, because="The gradients would be divided a second time"
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for kind in ("sgd", "adam"):
        settings = {"init_scale": 512.0, "growth_interval": 4}
        scaler_beside_torch(DynamicLossScaler, g, 40, 0.2, 0.5, True, settings, kind)
with checks.forbidden(
    "_amp_update_scale_",
    "_amp_foreach_non_finite_check_and_unscale_",
    because="the scaler is what you build here",
):
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), DynamicLossScaler(init_scale=4.0)
    checks.raises(
        RuntimeError, scaler.update, because="Nothing was unscaled or stepped since the last update"
    )
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    checks.raises(
        RuntimeError,
        scaler.unscale_,
        optimizer,
        because="The gradients would be divided a second time",
    )
    checks.close(weight.grad, torch.ones(3), what="the gradient after the refused second unscale_")
    scaler.step(optimizer)
    scaler.update()
    checks.raises(
        RuntimeError, scaler.update, because="Nothing was unscaled or stepped since the last update"
    )
    scaler.unscale_(optimizer)  # a new iteration: allowed again
    checks.close(
        weight.grad, torch.full((3,), 0.25), what="the gradient after a new iteration's unscale_"
    )
    scaler.update()  # gradients were looked at, and the step left out: allowed
# The loss itself stays, and is scaled in its own format.
loss = torch.tensor(1 / 3)
with checks.unchanged(loss=loss):
    checks.close(
        DynamicLossScaler(init_scale=8.0).scale(loss), loss * 8, rtol=1e-6, what="8 · loss"
    )
# In place: whoever holds the gradient (a flat buffer, say) sees it divided.
weight = nn.Parameter(torch.ones(3))
weight.grad = torch.tensor([8.0, -4.0, 0.0])
held = weight.grad
DynamicLossScaler(init_scale=4.0).unscale_(torch.optim.SGD([weight], lr=1.0))
checks.close(held, torch.tensor([2.0, -1.0, 0.0]), what="the tensor that p.grad was, unscaled")
# Each number is looked at: large ones whose sum or norm overflows are finite, and no step is lost.
for values in ([3e38, 3e38, 3e38], [-3e38, -3e38, 1.0], [3e38, -3e38, 2e38]):
    weight.grad = torch.tensor(values)
    scaler = DynamicLossScaler(init_scale=2.0)
    assert scaler.step(torch.optim.SGD([weight], lr=1e-38)) is True, (
        f"gradients of {values} are finite: step calls the optimizer and returns True"
    )
assert type(DynamicLossScaler(1024).get_scale()) is float, "get_scale returns a float"
default = DynamicLossScaler()
assert default.get_scale() == 65536.0, "the scale begins at 2^16 unless told otherwise"
value = torch.tensor([0.5, -2.0], requires_grad=True)
checks.close(
    default.scale(value).detach(), torch.tensor([0.5, -2.0]) * 65536, what="scale of a loss"
)
default.scale(value).sum().backward()
checks.close(value.grad, torch.full((2,), 65536.0), what="the gradient through scale")
### END HIDDEN TESTS

# %% [markdown]
# ### FP16 with and without it
#
# The digits again, now with the products in FP16 and float32 weights, as under autocast. One step
# of a language model averages over millions of tokens, in parts that follow each other or lie on
# other GPUs: each part's loss is divided by the number of parts, and the gradients are added up. So
# here: the 600 images are one of 1,024 parts (all alike, so that one is computed and counted 1,024
# times, in float32). The gradient of a logit is then its error divided by 614,400. The scaler
# begins at $2^{32}$, too high on purpose, and its growth interval is 25.
#
# **Write down first** what the run without scaling will look like, and where the scale will be at
# the end: lower than after the first steps, or higher?


# %% tags=["experiment"]
class HalfProduct(torch.autograd.Function):
    """x Wᵀ with operands and results in FP16, forward and backward: what a matrix unit does,
    float32 sums inside.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.half(), weight.half()
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().T).half()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (grad.float() @ weight.float()).half(), (grad.float().T @ x.float()).half().float()


def train_fp16(
    scaler: DynamicLossScaler | None, half: bool = True, steps: int = 250, parts: int = 1024
) -> dict[str, list[float]]:
    images, labels = (t[:600] for t in data.digits())
    images = images.flatten(1)
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(n, m) / m**0.5) for m, n in ((64, 96), (96, 96), (96, 10))]
    # The sum over the parts: as many times the gradient of one.
    optimizer = torch.optim.SGD(weights, lr=0.3 * parts, momentum=0.9)
    log: dict[str, list[float]] = {"loss": [], "scale": [], "zeros": [], "skipped": []}
    for step in range(steps):
        optimizer.zero_grad()
        x = images
        for i, weight in enumerate(weights):
            x = HalfProduct.apply(x, weight) if half else x @ weight.T
            x = F.relu(x) if i < 2 else x
        logits = x.float()
        logits.retain_grad()
        loss = F.cross_entropy(logits, labels)
        log["loss"].append(loss.item())
        scale = 1.0 if scaler is None else scaler.get_scale()
        log["scale"].append(scale)
        if scaler is None:
            (loss / parts).backward()
            optimizer.step()
        else:
            scaler.scale(loss / parts).backward()
            if not scaler.step(optimizer):
                log["skipped"].append(step)
            scaler.update()
        seen = logits.grad.half() if half else logits.grad
        log["zeros"].append(float((seen == 0).float().mean()))
    return log


runs = {
    "float32": train_fp16(None, half=False),
    "FP16, no scaling": train_fp16(None),
    "FP16, your scaler": train_fp16(DynamicLossScaler(init_scale=2.0**32, growth_interval=25)),
}

# %% tags=["experiment", "figure"]
# Figure: training in FP16 with and without scaling, and where the scale goes
fig, axes = plot.plt.subplots(1, 3, figsize=(12.5, 3.7))
steps = range(len(runs["float32"]["loss"]))
plot.curves(
    steps,
    {name: log["loss"] for name, log in runs.items()},
    logy=True,
    xlabel="step",
    ylabel="loss (nats)",
    title="training",
    ax=axes[0],
)
plot.curves(
    steps,
    {name: [100 * z for z in log["zeros"]] for name, log in runs.items()},
    xlabel="step",
    ylabel="% of the logits' gradients that are 0",
    title="underflow",
    ax=axes[1],
)
axes[1].get_legend().remove()
scaled = runs["FP16, your scaler"]
axes[2].step(steps, scaled["scale"], where="post", color=plot.COLORS[2], linestyle="-")
axes[2].plot(
    scaled["skipped"],
    [scaled["scale"][i] for i in scaled["skipped"]],
    "x",
    color=plot.COLORS[6],
    markersize=6,
    label="update skipped",
)
axes[2].set_yscale("log", base=2)
axes[2].set(xlabel="step", ylabel="scale")
axes[2].set_title("the scale")
axes[2].legend(loc="lower right")
end = "; ".join(f"{name} {log['loss'][-1]:.1e}" for name, log in runs.items())
plot.caption(
    fig,
    f"Loss at the end: {end}. {len(scaled['skipped'])} of {len(scaled['scale'])} updates were "
    "skipped. Without scaling the gradients become exactly zero, the hard examples' among the "
    "last, and then training stands still. The scale falls from its start until nothing overflows; "
    "then the gradients shrink, and it climbs after them.",
)
plot.plt.show()

# %% [markdown]
# ## Which operation in which format
#
# Products of matrices are where the time goes, and they are forgiving: a matrix unit multiplies
# halves exactly and adds in float32, and the result is rounded once. Other operations are cheap and
# not forgiving.
#
# - **Sums and means**: an accumulator in half precision stalls, as you saw. Norms, `layer_norm`,
#   `rms_norm`, `cumsum`, losses and `softmax` contain sums.
# - **Exponentials and logarithms, powers, reciprocals** make small errors large, or leave the
#   range. The exponential turns an *absolute* error of its input into a *relative* one of its
#   output: a logit of 10 is off by up to $2^{-5}$ in BF16, and its exponential by 3 %. And $e^{12}$
#   is beyond FP16.
# - **Pointwise operations** such as `relu`, `gelu`, an addition or a dropout gain nothing from
#   float32 and do no harm in half: they take what they are given.
# - A few take **several tensors that must agree**, without being products for the matrix unit: they
#   run in the widest format among their inputs.
#
# `torch.autocast` is these four rules as a table, whose beginning is below: its entries for
# `"cuda"`, with the names of `torch` and `torch.nn.functional`. The model's weights stay float32;
# when an operation of the first list is called, its inputs are cast to half precision (weights once
# per forward pass, the copy is cached), for one of the second list to float32, for one of the third
# to the widest format among them. An operation on no list does what it does anyway: it keeps the
# format of its inputs, and where they differ, `add` and `mul` give the wider one.
#
# On a CPU the table is another, shorter one: always read the list of the device that you train on.

# %%
HALF = "linear matmul bmm addmm einsum conv2d scaled_dot_product_attention"
FLOAT32 = (
    "exp log pow reciprocal rsqrt sum prod cumsum logsumexp softmax log_softmax "
    "nll_loss mse_loss layer_norm rms_norm softplus"
)
WIDEST = "addcmul addcdiv atan2 dot index_put scatter_add tensordot"
AUTOCAST = {"half": HALF.split(), "float32": FLOAT32.split(), "widest": WIDEST.split()}

# %% [markdown]
# What does this mean for a whole block? The residual stream of a model is an addition after a
# product: which format does it have? Let a function say, for any program.


# %% exercise="autocast_formats" minutes=10 difficulty=1
def autocast_formats(
    program: list[tuple[str, str, list[str]]],
    formats: dict[str, torch.dtype],
    half: torch.dtype,
) -> dict[str, torch.dtype]:
    """The format of each result of a program that runs under torch.autocast("cuda", half).

    program: (result, operation, inputs) in the order in which they run, all of them names, such as
        ("h", "linear", ["x", "w"]). An input is a result from above or a name of `formats`. A name
        may be given again: from there on it stands for the new result.
    formats: of the tensors that there are before: float32, float16 or bfloat16. It is not changed.
    half: float16 or bfloat16, what AUTOCAST's first list casts to.

    Returns {result: format}, of the results alone, as they are at the end. Results of AUTOCAST's
    first two lists have the format to which the inputs are cast. All other operations, those of the
    third list among them, give the widest of their inputs, as torch.promote_types has it (float16
    with bfloat16 is float32).
    """
    ### BEGIN SOLUTION
    known, results = dict(formats), {}
    for result, operation, inputs in program:
        if operation in AUTOCAST["half"]:
            format = half
        elif operation in AUTOCAST["float32"]:
            format = torch.float32
        else:
            format = known[inputs[0]]
            for name in inputs[1:]:
                format = torch.promote_types(format, known[name])
        known[result] = results[result] = format
    return results
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: names that are given again</summary>
#
# Walk through the program with a dictionary of all formats known so far, a copy of `formats` at
# first: look the inputs up *before* you write the result into it.
# </details>

# %% check="autocast_formats" points=1
block = [
    ("n", "layer_norm", ["x"]),
    ("h", "linear", ["n", "w1"]),
    ("a", "gelu", ["h"]),
    ("y", "linear", ["a", "w2"]),
    ("x", "add", ["x", "y"]),
    ("loss", "log_softmax", ["y"]),
]
given = {"x": torch.float32, "w1": torch.float32, "w2": torch.float32}
found = autocast_formats(block, given, torch.bfloat16)
checks.kind(found, dict, what="autocast_formats")
short = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
expected = {"n": "float32", "h": "bfloat16", "a": "bfloat16", "y": "bfloat16"}
expected |= {"x": "float32", "loss": "float32"}
named = {name: short.get(format, repr(format)) for name, format in found.items()}
assert named == expected, (
    f"the results of a feed-forward block are {expected}: the stream x stays float32, since an "
    f"addition gives the wider of its inputs; yours are {named}"
)
### BEGIN HIDDEN TESTS
wide, half, brain = torch.float32, torch.float16, torch.bfloat16
cases = [  # (operation, formats of its inputs, result with half = float16, with bfloat16)
    *((op, [wide, half], half, brain) for op in AUTOCAST["half"]),
    *((op, [brain, brain], half, brain) for op in AUTOCAST["half"]),
    *((op, [half], wide, wide) for op in AUTOCAST["float32"]),
    *((op, [brain, half], wide, wide) for op in AUTOCAST["float32"]),
    *((op, [half, half, half], half, half) for op in AUTOCAST["widest"]),
    *((op, [half, half, wide], wide, wide) for op in AUTOCAST["widest"]),
    *((op, [brain, half], wide, wide) for op in (*AUTOCAST["widest"], "add", "maximum")),
    *((op, [brain], brain, brain) for op in ("relu", "su", "m", "mm_", "embedding", "reshape")),
    *((op, [half, half], half, half) for op in ("mul", "line", "soft", "sum_", "dropout")),
    *((op, [half, wide], wide, wide) for op in ("add", "mul", "where")),
]
for op, inputs, *results in cases:
    names = [f"t{i}" for i in range(len(inputs))]
    given = dict(zip(names, inputs, strict=True))
    before = dict(given)
    for autocast, expected in zip((half, brain), results, strict=True):
        found = autocast_formats([("out", op, names)], given, autocast)
        assert found == {"out": expected}, (
            f"{op} of {inputs} under autocast to {autocast} gives {expected}; yours: {found}"
        )
        assert given == before, f"`formats` was changed by {op}"
again = [
    ("t", "linear", ["t", "t"]),
    ("u", "add", ["t", "t"]),
    ("t", "sum", ["t"]),
    ("v", "mul", ["u", "t"]),
    ("u", "mul", ["u", "u"]),
]
found = autocast_formats(again, {"t": wide}, half)
assert found == {"t": wide, "u": half, "v": wide}, (
    f"a name that is given again stands for the new result from there on; yours: {found}"
)
assert autocast_formats([], {"t": wide}, half) == {}, "a program of no lines has no results"
### END HIDDEN TESTS

# %% [markdown]
# ## FP8: a scale for every tile {#fp8}
#
# With 8 bits a format no longer holds a tensor. E4M3 at full precision covers $2^{-6}$ to 448: 15
# octaves. So each tensor carries a **scale** $s$ in float32: store $q = \mathrm{rd}(x/s)$ with
# $s = \max|x|/448$, so that the largest number just fits, and read it as $q\cdot s$.
#
# One scale for the whole tensor has a weak spot. Language models have **outliers**: a few features
# of a few tokens are hundreds or thousands of times as large as the rest. The scale follows the
# outlier, all others are pushed down, and what gets below $2^{-6}$ in units of $s$ is subnormal,
# then zero.
#
# Two recipes for training:
#
# - **2209.05433** (Micikevicius et al. 2022, NVIDIA, Arm, Intel): E4M3 for weights and activations,
#   which need precision, **E5M2** for gradients, which need range; one scale per tensor.
# - **DeepSeek-V3** (2412.19437, section 3.3): E4M3 for everything, made possible by fine-grained
#   scales. Activations have one for each **1 × 128 tile** (a token, 128 channels), weights one for
#   each **128 × 128 block**. An outlier spoils 127 neighbors in an activation's tile and 16,383 in
#   a weight's block, not the tensor.
#
# Why these shapes? In $C = AB$ the scales must lie along the summed axis $K$ in pieces, because
# inside a piece they can be taken out of the sum:
#
# $$ C_{ij} = \sum_{k} A_{ik}B_{kj} \;\approx\; \sum_{\kappa}\;
# \underbrace{s^A_{i\kappa}\, s^B_{\kappa\,J(j)}}_{\text{one number per piece}}\;
# \underbrace{\sum_{k\in\kappa} q^A_{ik}\,q^B_{kj}}_{\text{FP8 product of 128 terms}},
# \qquad J(j) = \lfloor j/128\rfloor . $$
#
# The inner sum is a plain FP8 product for the matrix unit. The outer one is done in float32 on the
# ordinary cores, and that happens to cure a second problem: the authors found that the matrix units
# of the H800 keep only some 14 bits while accumulating FP8 products, which for $K = 4096$ gave
# errors of up to 2 %; moving each partial sum of 128 terms to float32 accumulators ends that.
#
# ```
#         A (m, k)                     B (k, n)                        scales
#   ┌──────┬──────┬───┐          ┌────────┬─────┐
#   │▬▬▬▬▬▬│▬▬▬▬▬▬│▬▬▬│  1×128   │        │     │ 128×128        A: (m, ⌈k/128⌉)
#   │▬▬▬▬▬▬│▬▬▬▬▬▬│▬▬▬│          ├────────┼─────┤                B: (⌈k/128⌉, ⌈n/128⌉)
#   │▬▬▬▬▬▬│▬▬▬▬▬▬│▬▬▬│          │        │     │
#   └──────┴──────┴───┘          └────────┴─────┘
# ```
#
# **MX formats** (2310.10537, an industry standard of 2023) carry the idea into hardware: blocks of
# **32** numbers along $K$, and a scale of 8 bits that is nothing but an exponent, a power of two
# (**E8M0**). The elements are FP8 (MXFP8), FP6 or FP4 (MXFP4): 4 + 8/32 = 4.25 bits per number. The
# scale of a block is $2^{\lfloor\log_2\max|x|\rfloor - e_\text{max}}$, where $e_\text{max}$ is the
# exponent of the element format's highest octave (8 for E4M3, 2 for FP4).


# %% exercise="blockwise_fp8_matmul" minutes=30 difficulty=3 path="more"
def quantize_blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x in FP8 with one scale for each block of shape `block`.

    x: (rows, columns), float32 or bfloat16, finite, any sizes: the last block of a row or column
        may be smaller.
    Returns (q, scales): q (rows, columns), float8_e4m3fn; scales (⌈rows/block[0]⌉,
    ⌈columns/block[1]⌉), float32. In each block the scale is max|x| / 448, computed in float32, and
    q is x / scale, computed in float32 or float64, rounded to nearest: the largest magnitude
    becomes ±448, however small it is (down to 1e-30). A block of zeros gives q = 0 and a scale that
    is finite and not 0.
    """
    ### BEGIN SOLUTION
    rows, columns = x.shape
    padded = F.pad(x.float(), (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # (R, r, C, c)
    largest = tiles.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / 448, 1.0)
    # A quotient that was rounded may leave the range by a hair.
    q = (tiles / scales[:, None, :, None]).clamp(-448, 448)
    return q.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn), scales
    ### END SOLUTION


def blockwise_fp8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as DeepSeek-V3 does it: a in FP8 with a scale for each 1 × 128 tile, b with one for
    each 128 × 128 block.

    a: (m, k), b: (k, n), float32 or bfloat16, finite, any sizes. Returns (m, n) float32. Each piece
    of 128 along k is a product of the FP8 numbers, summed in float32; the pieces are multiplied by
    their two scales, in any order, and added in float32. (PyTorch on a CPU has no product of float8
    tensors: cast them to float32, which is exact.)
    """
    ### BEGIN SOLUTION
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    for i in range(sa.shape[1]):
        piece = slice(128 * i, 128 * (i + 1))
        partial = qa[:, piece].float() @ qb[piece].float()
        out += partial * sa[:, i, None] * sb[i].repeat_interleave(128)[: b.shape[1]]
    return out
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: blocks without a loop</summary>
#
# Pad to whole blocks with zeros (they change no maximum of magnitudes), then `unflatten` each axis
# into (blocks, within): `(R, r, C, c)`. The maximum over `r` and `c` has shape `(R, C)`. Two loops
# over blocks are fine too.
# </details>
#
# <details><summary>Hint: the piece of b</summary>
#
# In piece κ, row κ of b's scales holds one number for each 128 columns. `repeat_interleave(128)`
# stretches it; the last block may be smaller.
# </details>
#
# <details><summary>Hint: nothing but zeros, or NaN</summary>
#
# 0/0 is NaN: a block of zeros needs any other scale. And since PyTorch's cast to E4M3 gave NaN
# beyond 464 before version 2.12, clamp to ±448 before you cast.
# </details>

# %% check="blockwise_fp8_matmul" points=2
x = torch.tensor([[448.0, 1.0, 0.0, 0.0, 7.0], [2.0, -896.0, 0.0, 0.0, 0.5]])
q, scales = quantize_blocks(x, (1, 2))
expect_tensor(q, "q", torch.float8_e4m3fn, (2, 5))
expect_tensor(scales, "the tensor of scales", torch.float32, (2, 3))
checks.close(
    q.float(),
    torch.tensor([[448.0, 1.0, 0.0, 0.0, 448.0], [1.0, -448.0, 0.0, 0.0, 448.0]]),
    what="q for blocks of 1 × 2",
    rtol=1e-6,
)
checks.close(
    scales[:, [0, 2]],
    torch.tensor([[1.0, 7 / 448], [2.0, 0.5 / 448]]),
    what="the scales of the first and the last block",
)
assert (scales.isfinite() & (scales > 0)).all(), (
    "scales are finite and positive, also for the block of zeros"
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for rows, columns, block, dtype in (
    (7, 300, (1, 128), torch.float32),
    (260, 130, (128, 128), torch.float32),
    (5, 9, (2, 4), torch.float32),
    (1, 1, (128, 128), torch.bfloat16),
    (130, 129, (128, 128), torch.bfloat16),
    (3, 33, (1, 32), torch.float32),
    (9, 40, (1, 32), torch.float32),
    (9, 40, (3, 16), torch.bfloat16),
):
    far = 28 if rows == 9 else 4  # the sizes of the rows, in powers of ten
    sizes = 10.0 ** torch.randint(-far, far + 1, (rows, 1), generator=g)
    x = (torch.randn(rows, columns, generator=g) * sizes).to(dtype)
    x[: rows // 3, : columns // 2] = 0
    x = x.T.contiguous().T  # not contiguous
    with checks.unchanged(x=x):
        q, scales = quantize_blocks(x, block)
    what = f"quantize_blocks of {rows} × {columns} in blocks of {block[0]} × {block[1]}"
    tall, wide = -(-rows // block[0]), -(-columns // block[1])
    expect_tensor(q, f"{what}: q", torch.float8_e4m3fn, x.shape)
    expect_tensor(scales, f"{what}: the tensor of scales", torch.float32, (tall, wide))
    assert (scales.isfinite() & (scales != 0)).all(), (
        f"{what}: every scale must be finite and not 0, also that of a block of zeros"
    )
    for i in range(tall):
        for j in range(wide):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            tile, stored, largest = (
                x[part].double(),
                q[part].double(),
                float(x[part].double().abs().max()),
            )
            if largest == 0:
                assert not stored.any(), f"{what}: a block of zeros must give zeros, not NaN"
                continue
            assert abs(float(scales[i, j]) - largest / 448) <= 1e-6 * largest / 448, (
                f"{what}: the scale of block {(i, j)} should be {largest / 448:.6g}, yours is "
                f"{float(scales[i, j]):.6g}"
            )
            scale = float(scales[i, j])
            allowed = torch.maximum(
                tile.abs() * 2.0**-4, torch.tensor(scale * 2.0**-10, dtype=torch.float64)
            ) * (1 + 1e-5)
            assert bool(((stored * scale - tile).abs() <= allowed).all()), (
                f"{what}: a number in block {(i, j)} is further from q · scale than half a step: "
                f"is it rounded to nearest, in its own block's scale?"
            )
            assert float(stored.abs().max()) == 448, (
                f"{what}: the largest magnitude of block {(i, j)} should become 448"
            )
### END HIDDEN TESTS

# %% check="blockwise_fp8_matmul" points=3
a, b = torch.ones(2, 256), torch.ones(256, 3)
a[0, 0], b[0, 0] = 448 * 2.0**10, 448.0
result = blockwise_fp8_matmul(a, b)
expect_tensor(result, "the product", torch.float32, (2, 3))
checks.close(
    result[1],
    torch.tensor([703.0, 256.0, 256.0]),
    what="row 1 of a product with outliers",
    rtol=1e-5,
    hint="Ones fit into FP8 exactly in every tile but the one with the outlier, which is in row 0",
    mistakes={"one scale for the whole of a": torch.zeros(3)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(13)
numbers = (
    torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
)  # the positive numbers of E4M3


def lossless(rows, columns, block):
    """A matrix that FP8 holds exactly, if every block has a scale of its own: E4M3's numbers times
    a power of two, ±448 among them.
    """
    x = (
        numbers[torch.randint(40, 126, (rows, columns), generator=g)]
        * torch.randn(rows, columns, generator=g).sign()
    )
    for i in range(0, rows, block[0]):
        for j in range(0, columns, block[1]):
            tile = x[i : i + block[0], j : j + block[1]]
            tile[
                int(torch.randint(0, tile.shape[0], (1,), generator=g)),
                int(torch.randint(0, tile.shape[1], (1,), generator=g)),
            ] = 448.0
            tile *= 2.0 ** int(torch.randint(-9, 10, (1,), generator=g))
    return x


for m, k, n in ((3, 300, 200), (1, 128, 1), (5, 129, 257), (2, 513, 3), (4, 5, 6), (33, 384, 128)):
    a, b = lossless(m, k, (1, 128)), lossless(k, n, (128, 128))
    if m * n == 1:
        b = b.abs() * a.T.sign()  # one sum: its terms must not cancel
    if m == 3:
        a, b = a.T.contiguous().T, b.T.contiguous().T  # other strides
    with checks.unchanged(a=a, b=b):
        result = blockwise_fp8_matmul(a, b)
    checks.close(result.isfinite().all(), torch.tensor(True), what="all results finite")
    checks.relative_l2(
        result,
        a.double() @ b.double(),
        2e-6,
        what=f"({m}, {k}) @ ({k}, {n}), made so that FP8 with these blocks loses nothing",
        hint="Scales: 1 × 128 along a row of a, 128 × 128 in b; sums in float32",
    )
for m, k, n, dtype in ((40, 700, 150, torch.float32), (17, 256, 128, torch.bfloat16)):
    a, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(dtype)
    a[:, :100] = 0
    exact = a.double() @ b.double()
    parts = []
    for x, (tall, wide) in ((a, (1, 128)), (b, (128, 128))):
        kept = torch.zeros(x.shape, dtype=torch.float64)
        for i in range(0, x.shape[0], tall):
            for j in range(0, x.shape[1], wide):
                tile = x[i : i + tall, j : j + wide].float()
                scale = tile.abs().max().clamp(min=1e-20) / 448
                kept[i : i + tall, j : j + wide] = (tile / scale).clamp(-448, 448).to(
                    torch.float8_e4m3fn
                ).double() * scale.double()
        parts.append(kept)
    result = blockwise_fp8_matmul(a, b)
    checks.relative_l2(
        result,
        parts[0] @ parts[1],
        1e-3,
        what=f"({m}, {k}) @ ({k}, {n}) of random {dtype}",
        mistakes={"a product without FP8": exact},
    )
# Outliers: a scale for each tensor loses the rows that have none.
a, b = torch.randn(24, 512, generator=g), torch.randn(512, 64, generator=g)
a[3, 7], a[11, 400] = 3e4, -2e5
result, exact = blockwise_fp8_matmul(a, b), a.double() @ b.double()
calm = [i for i in range(24) if i not in (3, 11)]
checks.relative_l2(
    result[calm],
    exact[calm],
    0.06,
    what="the rows without an outlier",
    hint="An outlier may spoil its own tile, not the tensor",
)
### END HIDDEN TESTS

# %% [markdown]
# ### How much an outlier costs
#
# Left: random matrices with one outlier of growing size in $A$, and the error in the rows that do
# not contain it. Right: real numbers, what enters the last matrix of each feed-forward layer in the
# course's small model (where outliers live), times that matrix. Besides your product there are one
# scale per tensor, the MX formats, made from your `round_to_format`, and for comparison whole
# numbers of 8 bits, which have no exponent of their own.
#
# **Write down first:** at which size of the outlier does a single scale begin to hurt, given that
# E4M3 has about 15 octaves and random numbers use five of them?


# %% tags=["experiment"]
def fake_fp8(x: Tensor, block: tuple[int, int]) -> Tensor:
    """x as quantize_blocks keeps it."""
    q, scales = quantize_blocks(x, block)
    rows = scales.repeat_interleave(block[0], 0)[: x.shape[0]]
    return q.float() * rows.repeat_interleave(block[1], 1)[:, : x.shape[1]]


def fake_mx(x: Tensor, kind: Format) -> Tensor:
    """x in an MX format: blocks of 32 along the last axis, which is a multiple of 32, and scales
    that are powers of two.
    """
    tiles = x.unflatten(-1, (-1, 32)).double()
    highest = {"E4M3": 8, "E2M1": 2}[kind.name]
    scale = power_of_two(torch.frexp(tiles.abs().amax(-1, keepdim=True)).exponent - 1 - highest)
    return (round_to_format(tiles / scale, *kind.layout, saturate=True) * scale).flatten(-2).float()


def fake_int8(x: Tensor) -> Tensor:
    """x in whole numbers from −127 to 127 with one scale."""
    scale = x.abs().max() / 127
    return (x / scale).round() * scale


def products(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {
        "INT8, one scale per tensor": fake_int8(a) @ fake_int8(b),
        "E4M3, one scale per tensor": fake_fp8(a, tuple(a.shape)) @ fake_fp8(b, tuple(b.shape)),
        "E4M3, 1×128 and 128×128 (yours)": blockwise_fp8_matmul(a, b),
        "MXFP8 (E4M3, blocks of 32)": fake_mx(a, E4M3) @ fake_mx(b.T, E4M3).T,
        "MXFP4 (E2M1, blocks of 32)": fake_mx(a, E2M1) @ fake_mx(b.T, E2M1).T,
        "BF16": (a.bfloat16() @ b.bfloat16()).float(),
    }


def relative(value: Tensor, exact: Tensor) -> float:
    return 100 * float((value - exact).norm() / exact.norm())


g = torch.Generator().manual_seed(0)
a, b = torch.randn(64, 512, generator=g), torch.randn(512, 128, generator=g)
sizes = [10.0**k for k in torch.arange(0.5, 6.6, 0.25).tolist()]
lines: dict[str, list[float]] = {}
for size in sizes:
    a[0, 5] = size
    for name, value in products(a, b).items():
        lines.setdefault(name, []).append(relative(value[1:], a[1:] @ b))

captured: dict[int, Tensor] = {}
handles = []
for i, block in enumerate(small.layers):

    def keep(module, inputs, i=i):
        captured[i] = inputs[0].detach().flatten(0, 1).cpu()

    handles.append(block.mlp.down_proj.register_forward_pre_hook(keep))
with torch.no_grad():
    small(tokens[:1, :-1])
for handle in handles:
    handle.remove()
real: dict[str, list[float]] = {}
for i, block in enumerate(small.layers):
    weight = block.mlp.down_proj.weight.detach().cpu().T
    for name, value in products(captured[i], weight).items():
        real.setdefault(name, []).append(relative(value, captured[i] @ weight))
largest = max(float(t.abs().max() / t.abs().median()) for t in captured.values())

# %% tags=["experiment", "figure"]
# Figure: the error of six products: one outlier, and a model's activations
fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 4.2))
plot.curves(
    sizes,
    lines,
    logy=True,
    xlabel="size of one outlier (the rest has standard deviation 1)",
    ylabel="% error in the other rows",
    title="one outlier",
    ax=axes[0],
)
axes[0].set_xscale("log")
plot.curves(
    range(len(small.layers)),
    real,
    logy=True,
    xlabel="layer",
    ylabel="% error of the product",
    title="down_proj of the small model",
    ax=axes[1],
)
for ax in axes:
    ax.set_ylim(0.1, 200)
axes[0].get_legend().remove()
axes[1].legend(fontsize=7.5, loc="upper center", ncols=2)
plot.caption(
    fig,
    "Relative error against float32. Left: whole numbers suffer from an outlier of 10; with an "
    "exponent in every number a single scale does as well as fine ones until the bulk of the "
    "numbers becomes subnormal, beyond 10,000, and then the error grows up to 100 %. Right: the "
    f"largest activation is up to {largest:,.0f} times the median, and a scale per tensor is not "
    "yet a catastrophe in this small model. The floor of 2–4 % is what 3 bits of mantissa cost "
    "under any scale; that of MXFP8 is higher because its scales are powers of two, and cut off "
    "what lies between 448 and 512 of them.",
)
plot.plt.show()

# %% [markdown]
# ## The memory of training {#memory}
#
# What has to be in memory at the moment when the forward pass has ended and the backward pass
# begins?
#
# 1. **Parameters**, **gradients** and **optimizer states**: bytes per parameter, 16 for Adam, in
#    float32 (4 + 4 + 8) as in mixed precision (2 + 2 + 12).
# 2. **Activations**: whatever an operation needs to compute its gradient. This depends on the
#    operations: a product needs both of its inputs, an addition nothing, a softmax its output, GELU
#    its input, LayerNorm its input and, for each token, a mean and a reciprocal standard deviation.
#
# The model of this section is a plain GPT without dropout, given below, with attention written out.
# Count for one block, in numbers per token of width $h$, with $a$ heads and sequences of $s$
# tokens:
#
# | operation | keeps | numbers per token |
# |---|---|---|
# | LayerNorm 1 | its input; mean and 1/σ | $h$; 2 |
# | $q, k, v$ projection | its input | $h$ |
# | $qk^\top$ | $q$ and $k$ | $2h$ |
# | softmax | its output | $a\,s$ |
# | weights times $v$ | the weights (already kept), $v$ | $h$ |
# | output projection | its input | $h$ |
# | LayerNorm 2 | its input; mean and 1/σ | $h$; 2 |
# | first feed-forward matrix | its input | $h$ |
# | GELU | its input | $4h$ |
# | second feed-forward matrix | its input | $4h$ |
#
# Together $16h + as$ numbers, and 4 statistics, which GPUs and autocast keep in float32 even if the
# rest is not (a `.bfloat16()` model on a CPU does not). At two bytes per number this is the formula
# of Korthikanti et al. (2022), $sbh\,(34 + 5as/h)$ bytes per layer, without its dropout:
# $32\,sbh + 2\,as^2b$. The residual additions and the scaling and masking of the scores keep
# nothing.
#
# At the end: the final LayerNorm (its input and 2 statistics), the head (its input, $h$), and the
# loss, which keeps the log-probabilities in float32: $V$ numbers of 4 bytes per token.
#
# **Activation checkpointing** (Chen et al. 2016) trades time for memory: of each block only the
# input is kept, and the backward pass runs the block again when it gets there. What remains is $h$
# numbers per token and layer, plus the inside of *one* block at a time. The price is one more
# forward pass: a third more arithmetic.
#
# **Gradient accumulation** attacks the same term from another side: activations grow with the
# tokens that are in flight at once, so run the batch in parts and add up the gradients. Add them up
# in float32: a long sum of halves stalls, as in [](#lost-updates).


# %%
@dataclass(frozen=True)
class GPTConfig:
    vocab: int
    width: int
    layers: int
    heads: int
    context: int


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        seq = x.shape[1]
        hidden = torch.full((seq, seq), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        # q, k and v: (batch, heads, seq, head_dim)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + hidden).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Learned positions, biases everywhere, no dropout; the head is the embedding's matrix. Returns
    the loss, in float32.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, targets: Tensor, checkpointing: bool = False) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            # The reentrant kind, whose saved input the hooks below can see. In your own code:
            # use_reentrant=False.
            x = checkpoint(block, x, use_reentrant=True) if checkpointing else block(x)
        logits = F.linear(self.norm(x), self.embed.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of run(), as PyTorch itself reports them.

    Counted once per storage; parameters, whole numbers (tokens) and single numbers are left out.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if t.is_floating_point() and t.dim() > 0 and address not in parameters:
            kept[address] = t  # held, so that the address is not given to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del loss
    return total


# %% exercise="training_memory" minutes=30 difficulty=3
def training_memory(
    config: GPTConfig, batch: int, seq: int, mixed: bool = True, checkpointing: bool = False
) -> dict[str, int]:
    """Bytes that training the GPT above with Adam needs, by kind. seq ≤ config.context.

    mixed: weights, gradients and activations in half precision, with MasterWeightAdam's float32
    master and moments. Otherwise everything is float32. In both, LayerNorm's two statistics per
    token and the log-probabilities are float32.

    "parameters", "gradients"   those of the model; the head is the embedding and counts once
    "optimizer"                 master (if mixed) and both moments
    "activations"               what autograd keeps from the forward pass. With checkpointing: each
                                block's input instead of its inside; the final LayerNorm, the head
                                and the loss are not checkpointed
    "recomputed"                with checkpointing, what running one block again adds while it is
                                differentiated, its input not counted twice; else 0

    Whole numbers (tokens, targets) and single numbers are not counted.
    """
    ### BEGIN SOLUTION
    h, size = config.width, 2 if mixed else 4
    tokens = batch * seq
    count = (config.vocab + config.context) * h + config.layers * (12 * h**2 + 13 * h) + 2 * h
    block = tokens * ((16 * h + config.heads * seq) * size + 4 * 4)
    end = tokens * (2 * h * size + 2 * 4 + config.vocab * 4)
    entry = tokens * h * size
    return {
        "parameters": count * size,
        "gradients": count * size,
        "optimizer": count * (12 if mixed else 8),
        "activations": config.layers * (entry if checkpointing else block) + end,
        "recomputed": block - entry if checkpointing else 0,
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the parameters of a block</summary>
#
# Four matrices: $3h^2$, $h^2$, $4h^2$, $4h^2$, each with a bias as long as its output; two
# LayerNorms with a weight and a bias of $h$. Compare with
# `sum(p.numel() for p in GPT(config).parameters())`.
# </details>
#
# <details><summary>Hint: measure</summary>
#
# `saved_bytes(lambda: model(tokens, targets), model)` is the judge. Change one size at a time and
# look at the difference: one more layer, one more head, twice the tokens. On a CPU it shows 2 bytes
# for each statistic of a `.bfloat16()` model, where the formula counts 4.
# </details>

# %% check="training_memory" points=1
config = GPTConfig(vocab=1000, width=64, layers=2, heads=4, context=32)
need = training_memory(config, batch=1, seq=16)
assert isinstance(need, dict), f"a dict is asked for; yours is {need!r}"
assert set(need) == {"parameters", "gradients", "optimizer", "activations", "recomputed"}, (
    f"the docstring has five names; yours are {sorted(need)}"
)
checks.close(
    need["parameters"],
    2 * 166_144,
    what="the bytes of this model's 166,144 parameters in half precision",
    mistakes={
        "counting the head as a matrix of its own": 2 * (166_144 + 64_000),
        "leaving out biases": 2 * (166_144 - 2 * 9 * 64),
        "leaving out the final norm": 2 * (166_144 - 128),
    },
)
checks.close(
    need["optimizer"],
    12 * 166_144,
    what="the bytes of the optimizer",
    mistakes={"leaving out the master, or moments in half precision,": 8 * 166_144},
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for _ in range(5):
    heads, layers, vocab, context = (
        int(torch.randint(low, high, (1,), generator=g))
        for low, high in ((1, 5), (1, 5), (5, 300), (4, 40))
    )
    config = GPTConfig(
        vocab, heads * int(torch.randint(2, 9, (1,), generator=g)), layers, heads, context
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(config).parameters())
    for mixed, each in ((True, (2, 2, 12)), (False, (4, 4, 8))):
        for checkpointing in (False, True):
            need = training_memory(config, 2, context, mixed=mixed, checkpointing=checkpointing)
            for name, size in zip(("parameters", "gradients", "optimizer"), each, strict=True):
                checks.close(need[name], size * count, what=f"{name} of {config}, mixed={mixed}")
### END HIDDEN TESTS

# %% check="training_memory" points=3
config = GPTConfig(vocab=50, width=32, layers=2, heads=4, context=16)
torch.manual_seed(0)
model, tokens = GPT(config), torch.zeros(3, 16, dtype=torch.long)
need, measured = (
    training_memory(config, 3, 16, mixed=False)["activations"],
    saved_bytes(lambda: model(tokens, tokens), model),
)
checks.close(
    need,
    measured,
    what="the activations of a small float32 model, against what autograd keeps",
    mistakes={
        "leaving out LayerNorm's statistics": measured - 3 * 16 * (2 * 4 + 2) * 4,
        "leaving out the log-probabilities": measured - 3 * 16 * 50 * 4,
        "leaving out the attention weights": measured - 2 * 4 * 3 * 16 * 16 * 4,
        "counting the scores and the weights": measured + 2 * 4 * 3 * 16 * 16 * 4,
    },
)
assert training_memory(config, 3, 16)["recomputed"] == 0, (
    "nothing is recomputed without checkpointing"
)
### BEGIN HIDDEN TESTS
g = checks.generator(15)
for batch, short in ((1, 0), (3, 2), (2, 0), (4, 5)):
    heads, layers, vocab, context = (
        int(torch.randint(low, high, (1,), generator=g))
        for low, high in ((1, 5), (1, 4), (5, 200), (8, 30))
    )
    config = GPTConfig(
        vocab, heads * int(torch.randint(2, 9, (1,), generator=g)), layers, heads, context
    )
    seq = context - short
    model, tokens = GPT(config), torch.randint(0, vocab, (batch, seq), generator=g)
    measured = saved_bytes(lambda model=model, tokens=tokens: model(tokens, tokens), model)
    need = training_memory(config, batch, seq, mixed=False)
    checks.close(
        need["activations"],
        measured,
        what=f"activations in float32 of {config}, batch {batch}, seq {seq}",
    )
    # In half precision a CPU may keep LayerNorm's statistics in half as well: add what they lack.
    half = model.bfloat16()
    lacking = (
        4
        - torch.native_layer_norm(
            half.norm.weight[None], half.norm.weight.shape, half.norm.weight, half.norm.bias, 1e-5
        )[1].element_size()
    )
    measured = saved_bytes(
        lambda half=half, tokens=tokens: half(tokens, tokens), half
    ) + lacking * batch * seq * (4 * layers + 2)
    checks.close(
        training_memory(config, batch, seq)["activations"],
        measured,
        what=f"activations in half precision of {config}, batch {batch}, seq {seq}",
    )
### END HIDDEN TESTS

# %% check="training_memory" points=2
config = GPTConfig(vocab=50, width=32, layers=3, heads=4, context=16)
torch.manual_seed(0)
model, tokens = GPT(config), torch.zeros(2, 16, dtype=torch.long)
need = training_memory(config, 2, 16, mixed=False, checkpointing=True)
checks.close(
    need["activations"],
    saved_bytes(lambda: model(tokens, tokens, checkpointing=True), model),
    what="the activations of a small model with checkpointing, against what autograd keeps",
)
x = torch.randn(2, 16, 32, requires_grad=True)
checks.close(
    need["recomputed"],
    saved_bytes(lambda: model.blocks[0](x), model) - x.nbytes,
    what="what running one block again adds",
    mistakes={
        "counting the block's input twice": saved_bytes(lambda: model.blocks[0](x), model),
        "all blocks at once": 3 * (saved_bytes(lambda: model.blocks[0](x), model) - x.nbytes),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(16)
for batch, short in ((1, 3), (3, 0), (2, 1)):
    heads, layers, vocab, context = (
        int(torch.randint(low, high, (1,), generator=g))
        for low, high in ((1, 5), (1, 6), (5, 200), (8, 30))
    )
    config = GPTConfig(
        vocab, heads * int(torch.randint(2, 9, (1,), generator=g)), layers, heads, context
    )
    seq = context - short
    model, tokens = GPT(config), torch.randint(0, vocab, (batch, seq), generator=g)
    x = torch.randn(batch, seq, config.width, generator=g, requires_grad=True)
    for mixed in (False, True):
        model = model.bfloat16() if mixed else model
        y = x.detach().to(torch.bfloat16 if mixed else torch.float32).requires_grad_()
        need = training_memory(config, batch, seq, mixed=mixed, checkpointing=True)
        lacking = (
            4
            - torch.native_layer_norm(y, (config.width,), model.norm.weight, model.norm.bias, 1e-5)[
                1
            ].element_size()
        )
        outside = (
            saved_bytes(
                lambda model=model, tokens=tokens: model(tokens, tokens, checkpointing=True), model
            )
            + lacking * batch * seq * 2
        )
        inside = (
            saved_bytes(lambda model=model, y=y: model.blocks[0](y), model)
            - y.nbytes
            + lacking * batch * seq * 4
        )
        checks.close(
            need["activations"],
            outside,
            what=f"activations with checkpointing of {config}, batch {batch}, seq {seq}, "
            f"mixed={mixed}",
        )
        checks.close(
            need["recomputed"],
            inside,
            what=f"recomputed of {config}, batch {batch}, seq {seq}, mixed={mixed}",
        )
### END HIDDEN TESTS

# %% [markdown]
# ### Where the memory goes
#
# GPT-2 XL, 1.5 billion parameters, one GPU, 8 sequences of 1,024 tokens. **Write down first** how
# many gigabytes its activations need in float32, and which factor half precision and checkpointing
# each save.

# %% tags=["experiment"]
xl = GPTConfig(vocab=50_257, width=1600, layers=48, heads=25, context=1024)
bars = {
    "float32": training_memory(xl, 8, 1024, mixed=False),
    "mixed": training_memory(xl, 8, 1024),
    "float32,\ncheckpointed": training_memory(xl, 8, 1024, mixed=False, checkpointing=True),
    "mixed,\ncheckpointed": training_memory(xl, 8, 1024, checkpointing=True),
    "mixed, check-\npointed, 1 × 8": training_memory(xl, 1, 1024, checkpointing=True),
}

# %% tags=["experiment", "figure"]
# Figure: where the memory of a training run goes, and what length does to it
fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 4.2), width_ratios=[1.5, 1])
below = [0.0] * len(bars)
hatches = ("", "//", "..", "", "xx")
for i, name in enumerate(("parameters", "gradients", "optimizer", "activations", "recomputed")):
    heights = [need[name] / 2**30 for need in bars.values()]
    axes[0].bar(
        list(bars),
        heights,
        bottom=below,
        color=plot.COLORS[(0, 5, 3, 1, 6)[i]],
        hatch=hatches[i],
        edgecolor="white",
        linewidth=0.5,
        label=name,
        width=0.65,
    )
    below = [low + height for low, height in zip(below, heights, strict=True)]
for i, total in enumerate(below):
    axes[0].annotate(f"{total:.0f} GiB", (i, total), ha="center", va="bottom", fontsize=9)
axes[0].axhline(80e9 / 2**30, color="#888888", linewidth=1, linestyle=":")
axes[0].annotate(
    "80 GB", (len(bars) - 0.55, 80e9 / 2**30), ha="right", va="bottom", fontsize=8, color="#555555"
)
axes[0].set(ylabel="GiB", ylim=(0, 1.1 * max(below)))
axes[0].tick_params(axis="x", labelsize=8)
axes[0].legend(fontsize=8)
axes[0].set_title("GPT-2 XL, 8 × 1,024 tokens")
lengths = [64 * 2**i for i in range(9)]
long = {
    f"{name}": [
        training_memory(GPTConfig(50_257, 1600, 48, 25, n), 1, n, **options)["activations"] / 2**30
        + training_memory(GPTConfig(50_257, 1600, 48, 25, n), 1, n, **options)["recomputed"] / 2**30
        for n in lengths
    ]
    for name, options in (("mixed", {}), ("mixed, checkpointed", {"checkpointing": True}))
}
plot.curves(
    lengths,
    long,
    logx=True,
    logy=True,
    xlabel="tokens in one sequence",
    ylabel="GiB of activations",
    title="one long sequence",
    ax=axes[1],
)
plot.caption(
    fig,
    "From your formula. Left: half precision leaves the 16 bytes per parameter as they are and "
    "about halves the activations; checkpointing all but removes them. The last bar runs the eight "
    "sequences one after the other and adds up gradients. Right: the attention weights grow with "
    "the square of the length and take over beyond some 1,000 tokens, or some 8,000 where only one "
    "block's are alive. Not keeping them at all is FlashAttention, lesson 29.",
)
plot.plt.show()

# %% [markdown]
# ## On the hardware
#
# On a GPU the next cell trains a GPT of eight layers in float32, with TF32 products, and with
# bfloat16 autocast, and measures time per step and peak memory; then, if the chip has FP8 matrix
# units (compute capability 8.9 and up), it compares an FP8 product with a bfloat16 one. On a CPU it
# does the arithmetic: what data sheets promise for each format, and how little of it remains if
# part of the step does not speed up (Amdahl's law).

# %% tags=["experiment"]
if profile.device.type == "cuda":
    wide = GPTConfig(vocab=32_000, width=2048, layers=8, heads=16, context=1024)
    torch.manual_seed(0)
    measured = {}
    for name in ("float32", "TF32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = GPT(wide).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = torch.randint(0, wide.vocab, (8, 1024), device="cuda")
        times = []
        for _ in range(8):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=name == "bfloat16"):
                loss = model(batch, batch)
            loss.backward()
            optimizer.step()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        measured[name] = (sorted(times[2:])[3], torch.cuda.max_memory_allocated() / 2**30)
        print(f"{name:9} {measured[name][0]:7.1f} ms a step   peak {measured[name][1]:5.1f} GiB")
        del model, optimizer, loss
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = {name: (8 * 1024 / ms * 1e3, gib) for name, (ms, gib) in measured.items()}
    fig, axes = plot.plt.subplots(1, 3, figsize=(12, 3.6))
    for ax, i, label in ((axes[0], 0, "tokens per second"), (axes[1], 1, "peak memory (GiB)")):
        for j, (name, values) in enumerate(rows.items()):
            ax.bar(name, values[i], color=plot.COLORS[j])
        ax.set_ylabel(label)
    if torch.cuda.get_device_capability() >= (8, 9) and profile.has_triton:
        import triton

        speed: dict[str, list[float]] = {"bfloat16": [], "FP8, one scale": []}
        sizes = [1024, 2048, 4096, 8192]
        for n in sizes:
            a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            qa, qb, one = (
                a.to(torch.float8_e4m3fn),
                b.to(torch.float8_e4m3fn).T.contiguous().T,
                torch.ones((), device="cuda"),
            )
            for name, function in (
                ("bfloat16", lambda a=a, b=b: a @ b),
                (
                    "FP8, one scale",
                    lambda qa=qa, qb=qb, one=one: torch._scaled_mm(
                        qa, qb, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
                    ),
                ),
            ):
                ms = triton.testing.do_bench(function, quantiles=[0.5])
                speed[name].append(2 * n**3 / ms / 1e9)
        plot.curves(
            sizes,
            speed,
            logx=True,
            xlabel="n, in n × n × n",
            ylabel="TFLOP/s",
            title="products",
            ax=axes[2],
        )
    else:
        axes[2].set_visible(False)
    plot.caption(
        fig,
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; {wide.layers} layers of "
        f"width {wide.width}, 8 × 1,024 tokens, attention written out; median of 6 steps.",
    )
    plot.plt.show()
else:
    peaks = {"float32 (CUDA cores)": 67, "TF32": 494, "BF16 and FP16": 989, "FP8": 1979}
    share = torch.arange(0.5, 1.0001, 0.01)
    lines = {
        f"{name}: {peak} TFLOP/s": (
            1 / (1 - share + share * peaks["float32 (CUDA cores)"] / peak)
        ).tolist()
        for name, peak in list(peaks.items())[1:]
    }
    ax = plot.curves(
        100 * share,
        lines,
        xlabel="% of the float32 step's time spent in matrix products",
        ylabel="times as fast as float32",
        title="Amdahl's law for number formats",
    )
    plot.caption(
        ax.figure,
        "Arithmetic, not a measurement: dense peaks from the data sheet of an H100 SXM, "
        "everything outside the products left as slow as it was. From BF16 to FP8 there is little "
        "to gain until nearly all of the time is in products.",
    )
    plot.plt.show()

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number or a choice are graded, one by one.


# %% exercise="questions" minutes=12 difficulty=1 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers; numbers exactly, unless said otherwise.

    "swallowed": a BF16 weight is 3.0. What is the largest update Δ ≥ 0 such that 3.0 + Δ, rounded
                 to nearest with ties to even, is still 3.0?
    "scale":     the largest gradient of a network is 0.3 in magnitude. What is the largest power of
                 two that the loss may be multiplied by so that no gradient overflows in FP16?
    "bits":      how many bits per number does DeepSeek-V3's FP8 take for activations: E4M3
                 elements, a float32 scale for each tile of 1 × 128?
    "bytes":     a model of 7 billion parameters is trained in mixed precision with Adam and float32
                 master weights. How many gigabytes (10⁹ bytes) do weights, gradients and optimizer
                 state take together, before a single activation? (to 1 percent)
    "bf16":      why is loss scaling used with FP16 and not with BF16?
                 "a"  BF16 is more precise, so small gradients are kept better
                 "b"  BF16 has the exponent range of float32, so gradients do not underflow
                 "c"  matrix units add BF16 products in float32, but FP16 products in FP16
                 "d"  BF16 training keeps float32 master weights, and FP16 training does not
    """
    ### BEGIN SOLUTION
    return {
        # 3 lies in [2, 4), in steps of 2^(1−7); half a step is a tie, and 3.0 is the even neighbor.
        "swallowed": 2.0**-7,
        "scale": 2 ** math.floor(math.log2(65504 / 0.3)),
        "bits": 8 + 32 / 128,
        "bytes": 7 * (2 + 2 + 4 + 4 + 4),
        "bf16": "b",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["swallowed"]
checks.kind(answer, float, what="swallowed")
### BEGIN HIDDEN TESTS
candidates = torch.arange(1, 4096) / 2**17
kept = float(candidates[(3 + candidates).bfloat16() == 3].max())
checks.number(
    answer,
    kept,
    to=0,
    what="swallowed",
    hint="In which octave is 3, how wide are its steps, and is 3.0 the even neighbor?",
    mistakes={"a whole step": 2.0**-6, "the step after 1": 2.0**-8},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["scale"]
checks.kind(answer, float, what="scale")
### BEGIN HIDDEN TESTS
powers = [2**k for k in range(40) if torch.tensor(0.3 * 2**k).double().half().isfinite()]
checks.number(
    answer,
    float(max(powers)),
    to=0,
    what="scale",
    hint="FP16 ends at 65504",
    mistakes={
        "the next power, which overflows,": 2 * max(powers),
        "the exponent instead of the power": 17,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bits"]
checks.kind(answer, float, what="bits")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    8.25,
    to=0,
    what="bits",
    hint="The scale is shared by 128 numbers",
    mistakes={
        "leaving out the scale": 8.0,
        "an 8-bit scale": 8 + 8 / 128,
        "a scale per block of 128 × 128": 8 + 32 / 128**2,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bytes"]
checks.kind(answer, float, what="bytes")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    112.0,
    what="bytes",
    hint="Count the bytes of one parameter: two halves and three floats",
    mistakes={
        "leaving out the master": 84.0,
        "the weights alone": 14.0,
        "leaving out the gradients": 98.0,
        "leaving out the moments": 56.0,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bf16"]
assert answer in ("a", "b", "c", "d"), f"bf16 is one of 'a', 'b', 'c', 'd'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "b", (
    "Count exponent bits, and look at the picture of ranges at the beginning. Which end of the "
    "range does a small gradient meet?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Loss scaling multiplies all gradients by the same number. When does that not
# help, and what would?

# %% [markdown] answer="one-scale"
# When the gradients of one step span more than FP16's 40 octaves, or when those of different layers
# lie so far apart that the largest overflows while the smallest still underflow: a common factor
# shifts the histogram, it does not narrow it. Then a scale per layer or per tensor helps (what FP8
# does from the start), or a format with more exponent (BF16), or a change of the network that
# brings the layers' gradients together (normalization, a better initialization).

# %% [markdown]
# **Open question 2.** In 2209.05433 activations are E4M3 and gradients E5M2; DeepSeek-V3 takes E4M3
# for both. Who is right?

# %% [markdown] answer="e4m3-or-e5m2"
# Both, for their granularity. With one scale per tensor the format itself has to hold the tensor's
# range: gradients span more octaves than E4M3's 18 (with subnormals), so they need E5M2's 32 and
# pay with a bit of precision. With a scale for each 128 numbers the range inside a tile is small,
# the scales carry the rest, and the bit is better spent on the mantissa. Range and precision are
# one budget; where the exponent is stored (per number, per block, per tensor) is a choice.

# %% [markdown]
# **Open question 3.** A colleague reports that a run in pure BF16, weights and Adam included,
# "works as well as mixed precision, in half the memory". Its loss after 1,000 steps is the same to
# three digits. What do you ask?

# %% [markdown] answer="pure-bf16"
# How it looks after the learning rate has fallen. At the beginning updates are large compared with
# the weights' spacing and BF16 loses little; the harm comes when updates fall under half a step,
# late in the run. Ask for the share of weights that change per step over time, for a run to the end
# of the schedule, for the second moment (with β₂ = 0.999 it cannot decay in BF16), and whether the
# update was rounded stochastically, which would explain success honestly. DeepSeek-V3 keeps Adam's
# moments in BF16, but master weights and gradients in float32.

# %% [markdown]
# ## References, and what to read in them
#
# - **Micikevicius et al. 2017**, *Mixed Precision Training*,
#   [arXiv:1710.03740](https://arxiv.org/abs/1710.03740). Section 3: master weights, loss scaling,
#   and accumulation in float32; figure 3 is the histogram of [](#loss-scaling).
# - **Kalamkar et al. 2019**, *A Study of BFLOAT16 for Deep Learning Training*,
#   [arXiv:1905.12322](https://arxiv.org/abs/1905.12322). That BF16 needs no loss scaling.
# - **Micikevicius et al. 2022**, *FP8 Formats for Deep Learning*,
#   [arXiv:2209.05433](https://arxiv.org/abs/2209.05433). Table 1 is E4M3 and E5M2; section 3.1 why
#   E4M3 gives up infinity.
# - **Gupta et al. 2015**, *Deep Learning with Limited Numerical Precision*,
#   [arXiv:1502.02551](https://arxiv.org/abs/1502.02551). Stochastic rounding, and what fails
#   without it.
# - **Rouhani et al. 2023**, *Microscaling Data Formats for Deep Learning*,
#   [arXiv:2310.10537](https://arxiv.org/abs/2310.10537). The MX formats, with algorithm 1 for the
#   scale.
# - **DeepSeek-AI 2024**, *DeepSeek-V3 Technical Report*,
#   [arXiv:2412.19437](https://arxiv.org/abs/2412.19437). Section 3.3, FP8 training: figure 7 is
#   your product.
# - **Chen et al. 2016**, *Training Deep Nets with Sublinear Memory Cost*,
#   [arXiv:1604.06174](https://arxiv.org/abs/1604.06174). Checkpointing.
# - **Korthikanti et al. 2022**, *Reducing Activation Recomputation in Large Transformer Models*,
#   [arXiv:2205.05198](https://arxiv.org/abs/2205.05198). Section 4.1 derives the formula of
#   [](#memory) term by term; section 5 recomputes only the cheap, large part.
#
# In production: PyTorch's `torch/amp/grad_scaler.py` (your scaler, for several optimizers and
# devices) and `aten/src/ATen/autocast_mode.h` (the lists, in full);
# `torch/headeronly/util/Float8_e4m3fn.h` (the cast, in bit operations);
# `torch/utils/checkpoint.py`; NVIDIA's Transformer Engine for FP8 recipes; DeepSeek's `DeepGEMM`
# for the product of [](#fp8) as a kernel. Storing *finished* models in few bits is lesson 31;
# spreading the 16 bytes per parameter over many GPUs is lesson 19.
