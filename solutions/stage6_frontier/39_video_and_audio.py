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
#       Whisper's spectrograms, CTC, the codebooks that make sound into tokens, space–time
#       attention, a small diffusion Transformer that draws digits by flow matching, and diffusion
#       for text.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# A second of speech is 16,000 numbers, a second of film some tens of millions. A Transformer wants
# a few hundred vectors, and a language model wants tokens. This lesson is about the way from one to
# the other, and about two ways back that don't go token by token from left to right.
#
# ## Core ideas
#
# **Listen in frames.** An ear hears frequencies, not samples. A **spectrogram** cuts the sound into
# short overlapping frames and asks each for its frequencies; the **mel scale** gives low
# frequencies more room, as the ear does.
#
# **Don't ask where.** A transcript says which sounds were spoken, not when. **CTC** sums the
# probability of every possible alignment, exactly, in the time of a table.
#
# **Make it discrete.** A **codebook** replaces each vector by the index of its nearest entry. A
# second codebook for what the first left over, a third for what is left then: that is how a codec
# turns speech into tokens for a language model.
#
# **Split space and time.** A video has too many patches for all to see all. Attention inside each
# frame, then along each place, costs a fraction and still connects everything.
#
# **Transport noise.** **Flow matching** learns a velocity field that carries noise to data. It is
# trained on straight lines; the paths of its flow bend, but little: tens of steps follow them. The
# network is a Transformer whose norms are steered by the time and the label.
#
# **Mask instead of noise.** For text the noise is a mask. **Masked diffusion** trains on any share
# of masks at once, and fills many places in one pass.
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $N$, $H$ | `n_fft`, `hop` | samples in a frame, samples from one frame to the next |
# | $T$, $S$ | `time`, `space` | frames, places in a frame |
# | $\varnothing$ | `blank` | CTC's symbol for "nothing new" |
# | $e_k$ | `codebook[k]` | entry $k$ of a codebook, (dim,) |
# | $t$ | `t` | in flow matching 0 is noise, 1 is data; in masked diffusion the share of masks |
#
# Sounds are float tensors (…, samples) at 16 kHz. Random draws come from a `torch.Generator` that
# is handed in.

# %%
import itertools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from llm40 import checks, data, plot, profile
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # samples a second: Whisper's, and enough for speech

# %% [markdown]
# ## From samples to frames {#frames}
#
# The sounds of this lesson are made here. A tone and a chirp (a tone that climbs) are sines. A
# vowel is a source and a filter: the vocal cords send pulses at the **pitch**, and the mouth
# resonates at two or three frequencies, the **formants**, that make an "ee" differ from an "oo".
# The formants below are those of Peterson and Barney's 33 men.

# %%
FORMANTS = {  # Hz; the vowels of heed, head, hod, hawed, who'd
    "i": (270, 2290, 3010),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}
VOWELS = "".join(FORMANTS)


def tone(frequency: float, seconds: float) -> Tensor:
    """A sine of amplitude 0.5: (samples,)."""
    return chirp(frequency, frequency, seconds)


def chirp(low: float, high: float, seconds: float) -> Tensor:
    """A tone that climbs evenly from `low` to `high` Hz: (samples,)."""
    t = torch.arange(round(seconds * SAMPLE_RATE), dtype=torch.float64) / SAMPLE_RATE
    return 0.5 * torch.sin(2 * math.pi * (low * t + (high - low) * t**2 / (2 * seconds))).float()


def vowel(name: str, pitch: float, seconds: float, size: float = 1.0) -> Tensor:
    """Pulses at `pitch` Hz through the formants of a vowel, times `size` (above 1 is a smaller
    mouth, which resonates higher): (samples,)."""
    samples = round(seconds * SAMPLE_RATE)
    pulses = torch.zeros(samples)
    pulses[torch.arange(0, samples, SAMPLE_RATE / pitch).long()] = 1.0
    f = torch.linspace(0, SAMPLE_RATE / 2, samples // 2 + 1)
    response = 1 / (1 + f / 400)  # the pulses of vocal cords are round
    for formant, width in zip(FORMANTS[name], (80, 100, 140), strict=True):
        ratio = f / (size * formant)
        response = response / (1 - ratio**2 + 1j * ratio * width / (size * formant))
    sound = torch.fft.irfft(torch.fft.rfft(pulses) * response, n=samples)
    edge = (torch.arange(samples) / (0.02 * SAMPLE_RATE)).clamp(max=1)  # 20 ms in, 20 ms out
    sound = sound * edge * edge.flip(0)
    return 0.1 * sound / sound.square().mean().sqrt()


# %% [markdown]
# The **short-time Fourier transform** cuts frames of $N$ samples, one every $H$ samples, multiplies
# each by a window $w$ that fades at both ends, and takes its Fourier transform:
#
# $$ X_{k,f} = \sum_{n=0}^{N-1} w_n\; \tilde x_{fH+n}\; e^{-2\pi i\,kn/N},\qquad k=0\dots\lfloor
# N/2\rfloor . $$
#
# **Why a window?** Cutting multiplies the sound by a box, so the spectrum is smeared by the box's
# transform, whose side lobes die out as slowly as $1/k$. The Hann window, which fades to 0, has a
# main lobe twice as wide and side lobes that die out as $1/k^3$: a loud tone no longer hides a soft
# one far away.
#
# **What $N$ buys.** Bins are $f_s/N$ apart: 40 Hz at $N=400$ (25 ms). Two tones closer than about
# two bins merge, or one without a window. Twice the $N$ separates them, and blurs in time by the
# same factor. No window escapes it.
#
# Centered frames are Whisper's choice: frame $f$ is centered on sample $fH$, so the sound
# $\tilde x$ is the given one with $\lfloor N/2\rfloor$ samples added at each end, mirrored at the
# first and last sample.


# %% exercise="stft" minutes=15 difficulty=2
def stft(x: Tensor, window: Tensor, hop: int) -> Tensor:
    """The centered short-time Fourier transform: complex (..., n_fft // 2 + 1, frames).

    x: (..., samples), float32 or float64, with any number of axes before the last, also none.
    window: (n_fft,), of the dtype of x; n_fft may be odd. hop: at least 1, may exceed n_fft.

    x gets n_fft // 2 samples at each end, mirrored without repeating the end itself: … x2 x1 | x0
    x1 x2 …. ValueError where x is too short for that (samples ≤ n_fft // 2). Frame f is the n_fft
    samples from f·hop on, times the window; all frames that fit are taken:
    1 + (samples + 2·(n_fft // 2) − n_fft) // hop. Bin k is Σₙ frame[n]·exp(−2πi·k·n / n_fft),
    with n from 0 and no normalization: torch.fft.rfft. torch.stft must not be called.

    Returns complex64 for float32, complex128 for float64. Gradients flow to x; inputs are not
    changed.

    Example: x = [1, 2, 3, 4], four ones as window, hop 2. The frames are [3, 2, 1, 2],
    [1, 2, 3, 4] and [3, 4, 3, 2]; their bins 0 are 8, 10 and 12.
    """
    ### BEGIN SOLUTION
    n_fft = len(window)
    half = n_fft // 2
    if x.shape[-1] <= half:
        raise ValueError(f"{x.shape[-1]} samples cannot be mirrored by {half}")
    padded = F.pad(x.reshape(-1, x.shape[-1]), (half, half), mode="reflect")
    frames = padded.unfold(-1, n_fft, hop) * window  # (rows, frames, n_fft)
    spectrum = torch.fft.rfft(frames).mT
    return spectrum.reshape(*x.shape[:-1], *spectrum.shape[-2:])
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: frames without a loop</summary>
#
# `Tensor.unfold(dimension, size, step)` gives overlapping windows as a view.
# </details>
#
# <details><summary>Hint: mirroring</summary>
#
# `F.pad(mode="reflect")` wants two or three axes. Flatten those before the last into one, and
# restore them at the end.
# </details>

# %% check="stft" points=2
x = torch.tensor([1.0, 2.0, 3.0, 4.0])
found = stft(x, torch.ones(4), 2)
assert found.shape == (3, 3), f"4 // 2 + 1 bins by 3 frames; yours is {tuple(found.shape)}"
checks.close(
    found[0].real,
    torch.tensor([8.0, 10.0, 12.0]),
    what="bin 0 of three frames",
    hint="Each frame's samples are summed",
    mistakes={
        "padding with zeros": torch.tensor([3.0, 10.0, 7.0]),
        "repeating the end sample": torch.tensor([6.0, 10.0, 14.0]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for shape, n_fft, hop in [
    ((50,), 8, 3),
    ((2, 41), 7, 2),
    ((2, 3, 33), 16, 5),
    ((1, 20), 5, 9),
    ((3, 9), 16, 4),
]:
    for dtype in (torch.float32, torch.float64):
        x = checks.randn(*shape, generator=g, dtype=dtype)
        window = torch.rand(n_fft, generator=g).to(x) + 0.1  # of no symmetry
        with checks.unchanged(x=x, window=window), checks.forbidden("stft"):
            found = stft(x, window, hop)
        flat = x.double().reshape(-1, shape[-1])
        theirs = torch.stft(
            flat, n_fft, hop, window=window.double(), center=True, return_complex=True
        )
        theirs = theirs.reshape(*shape[:-1], *theirs.shape[-2:])
        checks.close(
            torch.view_as_real(found),
            torch.view_as_real(theirs),
            what=f"stft of {shape}, n_fft {n_fft}, hop {hop}",
            dtype=dtype,
            mistakes={
                "no window": torch.view_as_real(
                    torch.stft(
                        flat,
                        n_fft,
                        hop,
                        window=torch.ones_like(window).double(),
                        return_complex=True,
                    ).reshape(theirs.shape)
                ),
                "a window that stands the wrong way round": torch.view_as_real(
                    torch.stft(
                        flat, n_fft, hop, window=window.double().flip(0), return_complex=True
                    ).reshape(theirs.shape)
                ),
            },
        )
# A view with strides of its own.
x = checks.randn(30, 2, generator=g).T
window = torch.hann_window(8).to(x)
checks.close(
    torch.view_as_real(stft(x, window, 3)),
    torch.view_as_real(torch.stft(x.double(), 8, 3, window=window.double(), return_complex=True)),
    what="stft of a transposed view",
    dtype=torch.float32,
)
checks.raises(ValueError, stft, torch.ones(4), torch.ones(8), 2, because="4 samples, mirrored by 4")
barely = stft(torch.arange(5.0), torch.ones(8), 2)
assert barely.shape == (5, 3), f"five samples can be mirrored by 4: (5, 3); {tuple(barely.shape)}"
### END HIDDEN TESTS

# %% check="stft" points=1
# A sine of three periods in 12 samples, framed whole: all of it is in bin 3.
x = torch.sin(2 * math.pi * 3 * torch.arange(24.0) / 12)
strength = stft(x, torch.ones(12), 6)[:, 2].abs()
assert int(strength.argmax()) == 3, f"the sine's bin is 3; yours is {int(strength.argmax())}"
### BEGIN HIDDEN TESTS
g = checks.generator(2)
x = checks.randn(2, 40, generator=g)
window = torch.rand(9, generator=g).to(x)
checks.gradients(
    lambda x: torch.view_as_real(stft(x, window, 4)),
    lambda x: torch.view_as_real(torch.stft(x, 9, 4, window=window.double(), return_complex=True)),
    x,
    names=("x",),
)
# Laws: linear; a circular shift of a periodic sound turns bin k by exp(2πik·shift/n_fft).
period = checks.randn(10, generator=g, dtype=torch.float64)
long, ones = period.repeat(6), torch.ones(10).to(period)
a, b = stft(long, ones, 10), stft(long.roll(-3), ones, 10)
turn = torch.exp(0.6j * math.pi * torch.arange(6, dtype=torch.float64, device=a.device))
checks.close(
    torch.view_as_real(b[:, 2].contiguous()),
    torch.view_as_real(a[:, 2] * turn),
    what="the frames of a sound three samples later",
    hint="bin k of a periodic sound turns by exp(2πi·k·3/n_fft)",
)
### END HIDDEN TESTS

# %% [markdown]
# ## The mel scale
#
# Whisper doesn't read all 201 bins. It reads 80 (128 since large-v3) bands, narrow at the bottom
# and wide at the top. The scale is Slaney's: linear below 1000 Hz, logarithmic above,
#
# $$ \mathrm{mel}(f) = \begin{cases} f/(200/3) & f < 1000 \\ 15 + 27\,\ln(f/1000)/\ln 6.4 & f\ge
# 1000 \end{cases} $$
#
# so that 1000 Hz is mel 15 and 6400 Hz is mel 42. (Others, HTK's for one, use
# $2595\log_{10}(1+f/700)$ throughout; a model trained on one scale can't read the other.)
#
# Take $M+2$ points $f_0\dots f_{M+1}$, evenly spaced *in mel*. Band $m$ is a triangle *in Hz* that
# climbs from $f_m$ to $f_{m+1}$ and falls to $f_{m+2}$. Its peak would be 1; Slaney gives it the
# area 1 instead, by the factor $2/(f_{m+2}-f_m)$, the inverse of half the base. Without it white
# noise would look louder in the wide bands above.


# %% exercise="mel_filterbank" minutes=15 difficulty=2
def mel_filterbank(
    n_mels: int,
    n_fft: int = 400,
    sample_rate: int = 16_000,
    low: float = 0.0,
    high: float | None = None,
    area: bool = True,
) -> Tensor:
    """Triangular bands on Slaney's mel scale: float32 (n_mels, n_fft // 2 + 1).

    Column k belongs to the frequency k·sample_rate / n_fft. The n_mels + 2 corners are evenly
    spaced in mel from `low` to `high` Hz (None: sample_rate / 2), both included. Band m climbs
    linearly in Hz from 0 at corner m to 1 at corner m + 1, falls to 0 at corner m + 2, and is 0
    outside. With `area` it is multiplied by 2 / (corner m + 2 − corner m, in Hz). Computed in
    float64, returned as float32 on the CPU. n_fft is even.

    Example: mel_filterbank(41, 480, 16_000, high=6400, area=False) has its corners at the whole
    mels 0 … 42. Band 14 climbs from 933.33 Hz to 1000 Hz and falls to 1071.17 Hz. Bins are 33.33 Hz
    apart, and bins 28 to 33 hold 0, 0.5, 1, 0.53163, 0.06325, 0.
    """
    ### BEGIN SOLUTION
    step = math.log(6.4) / 27

    def to_mel(f: float) -> float:
        return 3 * f / 200 if f < 1000 else 15 + math.log(f / 1000) / step

    high = sample_rate / 2 if high is None else high
    mels = torch.linspace(to_mel(low), to_mel(high), n_mels + 2, dtype=torch.float64)
    corners = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    left, center, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rise, fall = (bins - left) / (center - left), (right - bins) / (right - center)
    bands = torch.minimum(rise, fall).clamp(min=0)
    return (bands * (2 / (right - left) if area else 1)).float()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a triangle without cases</summary>
#
# Write the climbing line and the falling line for all bins at once. The triangle is the smaller of
# the two where that is positive.
# </details>

# %% check="mel_filterbank" points=2
band = mel_filterbank(41, 480, 16_000, high=6400.0, area=False)[14]
checks.close(
    band[28:34],
    torch.tensor([0.0, 0.5, 1.0, 0.53163, 0.06325, 0.0]),
    rtol=1e-4,
    what="bins 28 to 33 of the band that peaks at 1000 Hz",
    hint="Corners 14, 15 and 16 are 933.33, 1000 and 1071.17 Hz",
)
### BEGIN HIDDEN TESTS
for n_mels, n_fft, rate, low, high, area in [
    (80, 400, 16_000, 0.0, None, True),
    (128, 400, 16_000, 0.0, None, True),
    (1, 64, 8_000, 0.0, None, True),
    (7, 512, 22_050, 300.0, 5000.0, False),
    (20, 1024, 44_100, 20.0, 18_000.0, True),
    (5, 256, 8_000, 0.0, 900.0, False),
]:
    top = rate / 2 if high is None else high
    ends = [f * 0.015 if f < 1000 else 15 + 27 * math.log(f / 1000, 6.4) for f in (low, top)]
    mels = [ends[0] + (ends[1] - ends[0]) * i / (n_mels + 1) for i in range(n_mels + 2)]
    corners = [m / 0.015 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    expected, peaks, htk = [], [], []
    for a, b, c in zip(corners, corners[1:], corners[2:], strict=False):
        peaks.append(np.interp(bins, [a, b, c], [0, 1, 0], left=0, right=0))
        expected.append(peaks[-1] * (2 / (c - a) if area else 1))
    htk = np.linspace(*(2595 * math.log10(1 + f / 700) for f in (low, top)), n_mels + 2)
    htk = 700 * (10 ** (htk / 2595) - 1)
    htk = [
        np.interp(bins, [a, b, c], [0, 1, 0], left=0, right=0) * (2 / (c - a) if area else 1)
        for a, b, c in zip(htk, htk[1:], htk[2:], strict=False)
    ]
    checks.close(
        mel_filterbank(n_mels, n_fft, rate, low, high, area),
        torch.tensor(np.array(expected), dtype=torch.float32),
        rtol=2e-7,
        what=f"{n_mels} bands of {n_fft} samples at {rate} Hz, {low:g} to {top:g} Hz, {area = }",
        dtype=torch.float32,
        mistakes={
            "HTK's scale": torch.tensor(np.array(htk), dtype=torch.float32),
            "peaks of 1": torch.tensor(np.array(peaks), dtype=torch.float32),
        },
    )
# Law: each band's area is 1, in Hz (bins 0.5 Hz apart).
areas = mel_filterbank(10, 32_000).double().sum(1) * 0.5
checks.close(areas, torch.ones(10).double(), rtol=1e-4, what="the areas of ten bands")
found = mel_filterbank(80)  # the defaults are Whisper's
assert found.shape == (80, 201), f"mel_filterbank(80) has shape {tuple(found.shape)}, not (80, 201)"
assert 0.0255 < float(found.max()) < 0.0262, "the highest weight of Whisper's 80 bands is 0.0259"
### END HIDDEN TESTS

# %% [markdown]
# ## What Whisper reads
#
# Four steps are left, each with a trap that has cost somebody a port. The window is a *periodic*
# Hann window, $w_n=\tfrac12-\tfrac12\cos(2\pi n/N)$; `scipy.signal.windows.hann` and `np.hanning`
# give the symmetric one, with $N-1$. The *power* $|X|^2$ goes through the bands, not the magnitude.
# The last frame is dropped, so that 30 s are 3000 frames and not 3001. And the logarithm (base 10,
# of at least $10^{-10}$) is cut 8 below the loudest point of the clip, then moved to about −1 … 1
# by $(x+4)/4$: 80 dB of range are kept, whatever the volume.


# %% exercise="log_mel" minutes=8 difficulty=1
def log_mel(
    x: Tensor, n_mels: int = 80, n_fft: int = 400, hop: int = 160, sample_rate: int = 16_000
) -> Tensor:
    """Whisper's features: (..., samples) → (..., n_mels, frames), in the dtype of x.

    x: float32 or float64, any number of axes before the last. Periodic Hann window of n_fft
    samples, centered frames without the last one, squared magnitudes, `mel_filterbank` from 0 to
    sample_rate / 2 with areas of 1. Then y = log10 of what is at least 1e-10; what lies more than 8
    below the largest y of *its own clip* (each row of x is a clip) is raised to that; and the
    result is (y + 4) / 4. Everything but the bands, window included, is computed in the dtype of x.
    You may use your own functions or torch.stft. x is not changed.

    Example: silence is log10(1e-10) = −10 everywhere, so −1.5.
    """
    ### BEGIN SOLUTION
    window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
    power = stft(x, window, hop)[..., :-1].abs().square()
    mel = mel_filterbank(n_mels, n_fft, sample_rate).to(x) @ power
    y = mel.clamp(min=1e-10).log10()
    y = torch.maximum(y, y.amax(dim=(-2, -1), keepdim=True) - 8)
    return (y + 4) / 4
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the loudest point of each clip</summary>
#
# `amax` takes several axes at once, and `keepdim=True` leaves them there to compare with.
# </details>

# %% check="log_mel" points=2
checks.close(log_mel(torch.zeros(800)), torch.full((80, 5), -1.5), what="silence of 800 samples")
loudest = int(log_mel(tone(1000.0, 0.2)).mean(1).argmax())
assert loudest == 26, f"a tone of 1000 Hz is loudest in band 26 of 80; yours is {loudest}"
### BEGIN HIDDEN TESTS


def by_definition(x, n_mels, n_fft, hop, rate):
    """Whisper's features of one clip, sum by sum, in float64 NumPy."""
    x = np.asarray(x, dtype=np.float64)
    half = n_fft // 2
    mirrored = [
        x[abs(i) if i < len(x) else 2 * len(x) - 2 - i] for i in range(-half, len(x) + half)
    ]
    n = np.arange(n_fft)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(half + 1), n) / n_fft)
    count = 1 + (len(mirrored) - n_fft) // hop
    frames = [np.array(mirrored[f * hop : f * hop + n_fft]) * hann for f in range(count - 1)]
    power = np.abs(waves @ np.array(frames).T) ** 2
    top = 15 + 27 * math.log(rate / 2000, 6.4) if rate >= 2000 else rate / 2 * 0.015
    mels = [top * i / (n_mels + 1) for i in range(n_mels + 2)]
    corners = [m / 0.015 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    bins = np.arange(half + 1) * rate / n_fft
    bands = [
        np.interp(bins, [a, b, c], [0, 1, 0], left=0, right=0) * 2 / (c - a)
        for a, b, c in zip(corners, corners[1:], corners[2:], strict=False)
    ]
    y = np.log10(np.maximum(np.array(bands) @ power, 1e-10))
    return (np.maximum(y, y.max() - 8) + 4) / 4


g = checks.generator(3)
for n_mels, n_fft, hop, rate in [
    (80, 400, 160, 16_000),
    (12, 128, 50, 8_000),
    (128, 512, 100, 22_050),
]:
    noise = torch.randn(2, 1000, generator=g, dtype=torch.float64)
    fade = torch.linspace(0, 12, 1000, dtype=torch.float64)
    x = torch.stack([noise[0] * 10**-fade, 1e-3 * noise[1] * (fade > 2)])  # loud, and soft
    x = x.to(profile.device)
    expected = torch.tensor(
        np.stack([by_definition(row.cpu().numpy(), n_mels, n_fft, hop, rate) for row in x])
    )
    with checks.unchanged(x=x):
        found = log_mel(x, n_mels, n_fft, hop, rate)
    checks.close(
        found,
        expected,
        rtol=5e-8,  # the bands are float32
        what=f"log_mel of two clips, {n_mels} bands, {n_fft}/{hop} at {rate} Hz",
        dtype=torch.float64,
        mistakes={
            "the loudest point of the batch": torch.maximum(
                expected * 4 - 4, (expected * 4 - 4).max() - 8
            )
            / 4
            + 1,
        },
    )
    checks.close(
        log_mel(x.float(), n_mels, n_fft, hop, rate),
        torch.tensor(
            np.stack([by_definition(r.float().cpu(), n_mels, n_fft, hop, rate) for r in x])
        ),
        rtol=1e-4,
        what="log_mel of float32",
        dtype=torch.float32,
    )
one = log_mel(x[1, :640].float())
assert one.shape == (80, 4), f"log_mel of (640,) has shape {tuple(one.shape)}, not (80, 4)"
both = log_mel(x[None, :, :640].float())
checks.close(both[0, 1], one, what="the same clip in a batch", hint="Clips don't see one another")
### END HIDDEN TESTS

# %% [markdown]
# Three sounds, seen with your functions and heard with the players below them. Above: the power of
# each bin in decibels, frequencies evenly spaced. Below: what Whisper reads.

# %% tags=["experiment", "figure"]
# Figure: three sounds, in Hz and in mel
glide = torch.cat([vowel(name, 110, 0.3) for name in "iau"])
sounds = {
    "two tones, 440 and 3000 Hz": tone(440, 0.9) + 0.3 * tone(3000, 0.9),
    "a chirp, 100 to 7000 Hz": chirp(100, 7000, 0.9),
    "vowels: heed, hod, who'd": glide,
}
fig, axes = plot.plt.subplots(2, 3, figsize=(11, 5.4), sharex=True)
for column, (name, sound) in zip(axes.T, sounds.items(), strict=True):
    power = stft(sound, torch.hann_window(400), 160).abs().square()
    decibels = 10 * power.clamp(min=1e-10).log10()
    decibels = (decibels - decibels.max()).clamp(min=-80)
    seconds = len(sound) / SAMPLE_RATE
    image = column[0].imshow(
        decibels, origin="lower", aspect="auto", cmap="Greys", extent=(0, seconds, 0, 8)
    )
    mel_image = column[1].imshow(
        log_mel(sound),
        origin="lower",
        aspect="auto",
        cmap="Greys",
        vmin=-1,
        vmax=1.5,
        extent=(0, seconds, 0, 80),
    )
    column[0].set_title(name)
    column[1].set_xlabel("time (s)")
    for ax in column:
        ax.grid(False)
axes[0, 0].set_ylabel("frequency (kHz)")
axes[1, 0].set_ylabel("mel band")
fig.colorbar(image, ax=axes[0], label="power (dB below the loudest)")
fig.colorbar(mel_image, ax=axes[1], label="Whisper's log mel")
plot.caption(
    fig,
    "In mel a steady climb bends: the first 1000 Hz take a third of the bands. The vowels' thin "
    "lines are harmonics of the pitch, 110 Hz apart, and the dark bars where they are strong are "
    "the formants. The upper bands of the mel picture no longer show single harmonics, and still "
    "show the formants.",
)
plot.plt.show()

# %% tags=["experiment"]
from IPython.display import Audio, display

for name, sound in sounds.items():
    print(name)
    display(Audio(sound.numpy(), rate=SAMPLE_RATE))

# %% [markdown]
# ## Speech without alignments: CTC {#ctc}
#
# A recording of "hello" has a few hundred frames; its transcript has five letters. Nobody writes
# down which frame belongs to which letter. **CTC** (Graves 2006) lets the network name one symbol
# per frame, out of the letters and a **blank** $\varnothing$, and defines what a path of symbols
# says: *merge equal neighbors, then delete the blanks*.
#
# $$ \text{hh}\varnothing\text{ell}\varnothing\text{lo} \to \text{hello}, \qquad \text{hheelllo}
# \to \text{helo}. $$
#
# Two equal letters in a row need a blank between them. The probability of a target $y$ is the sum
# over all paths that say it, frames being independent given the sound:
#
# $$ p(y) = \sum_{\pi\,\to\,y}\ \prod_{f=1}^{T} p_f(\pi_f). $$
#
# There are exponentially many. They all walk through the same few states: put blanks around the
# letters, $\varnothing\, y_1\, \varnothing\, y_2 \dots y_L\, \varnothing$, in all $2L+1$
# states $z_s$. In a frame a path stays, or moves on by one, or skips a blank, which it may do only
# between *different* letters. So let $\alpha_f(s)$ be the probability of all ways to be in state
# $s$ at frame $f$. Each is a way to some state at frame $f-1$, then one step, and sums distribute:
#
# $$ \alpha_f(s) = p_f(z_s)\,\big[\alpha_{f-1}(s) + \alpha_{f-1}(s-1) +
# \mathbb 1[z_s\ne\varnothing,\ z_s\ne z_{s-2}]\;\alpha_{f-1}(s-2)\big]. $$
#
# It starts in the first blank or the first letter and ends in the last letter or the last blank.
# That is $T\,(2L+1)$ sums in place of an exponential number of paths. Probabilities of hundreds of
# frames underflow, so the table holds logarithms, and + becomes logsumexp.


# %% exercise="ctc_loss_forward" minutes=25 difficulty=3
def ctc_loss_forward(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
) -> Tensor:
    """−log p(target) of each row, in nats: (batch,). A loss, minimized. Neither summed nor divided.

    log_probs: (batch, time, classes), log-probabilities, float32 or float64; the result has that
        dtype. −inf is allowed.
    targets: (batch, longest), int64. Row b's target is its first target_lengths[b] entries, none of
        them `blank`; what stands after them is anything, −1 too. A target may be empty.
    input_lengths: (batch,), from 1 to time. Later frames have no influence, not even NaN, and
        gradient 0.

    A row whose target no path says (too few frames, or all paths have probability 0) has the loss
    inf and the gradient 0. All gradients are finite, and 0 at entries of −inf. Everything is
    computed in log space: 1000 frames of probability 1e-3 don't underflow. Inputs are not changed.
    F.ctc_loss must not be called.

    Example: two frames in which blank and "a" have probability ½ each. The paths aa, a∅ and ∅a say
    "a": the loss is −log ¾ = 0.28768.
    """
    ### BEGIN SOLUTION
    never = -1e30  # a finite −inf: the gradient of logsumexp of nothing but −inf is NaN
    batch, time, _ = log_probs.shape
    longest = targets.shape[1]
    places = torch.arange(longest, device=targets.device)
    letters = targets.masked_fill(places >= target_lengths[:, None], blank)
    states = torch.full((batch, 2 * longest + 1), blank, device=targets.device)
    states[:, 1::2] = letters
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])

    inside = torch.arange(time, device=log_probs.device) < input_lengths[:, None]
    emitted = log_probs.masked_fill(~inside[..., None], 0.0).clamp(min=never)
    emitted = emitted.gather(2, states[:, None].expand(-1, time, -1))
    alpha = torch.cat([emitted[:, 0, :2], torch.full_like(emitted[:, 0, 2:], never)], dim=1)
    for f in range(1, time):
        one = F.pad(alpha, (1, 0), value=never)[:, :-1]
        two = F.pad(alpha, (2, 0), value=never)[:, :-2].masked_fill(~skips, never)
        moved = torch.stack([alpha, one, two]).logsumexp(0) + emitted[:, f]
        alpha = torch.where(inside[:, f, None], moved, alpha)

    last = 2 * target_lengths[:, None]  # the blank after the last letter
    letter = alpha.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, never)
    ends = torch.cat([alpha.gather(1, last), letter], dim=1)
    loss = -ends.logsumexp(1)
    return torch.where(loss > -never / 2, torch.inf, loss)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: rows of different lengths</summary>
#
# Compute all frames for all rows, and keep the old α where a row is already over. At the end each
# row reads its own two last states.
# </details>
#
# <details><summary>Hint: NaN in the gradient</summary>
#
# The gradient of logsumexp divides by a sum. If all its terms are exp(−inf) that is 0/0. A finite
# but hopeless number such as −1e30 has no such problem; turn it back into inf at the end.
# </details>
#
# <details><summary>Hint: two steps</summary>
#
# Shift α right by two and strike out the states that may not be reached by a skip. Which are those
# for the target "aab"?
# </details>

# %% check="ctc_loss_forward" points=2
half = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
length = torch.tensor([2])
checks.close(
    ctc_loss_forward(half, torch.tensor([[1]]), length, torch.tensor([1])),
    torch.tensor([-math.log(0.75)]),
    what='the loss of "a" in two frames',
    mistakes={
        "one of the three paths": torch.tensor([-math.log(0.25)]),
        "two of the three paths": torch.tensor([-math.log(0.5)]),
    },
)
checks.close(
    ctc_loss_forward(half, torch.tensor([[1, 1]]), length, torch.tensor([2])),
    torch.tensor([torch.inf]),
    what='the loss of "aa" in two frames',
    hint="Two equal letters need a blank between them, so three frames",
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)


def say(path, blank):
    """What a path says: equal neighbors merged, blanks deleted."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


# Brute force: every path of every row.
for classes, time, blank in [(3, 5, 0), (4, 4, 3), (3, 6, 1)]:
    log_p = checks.randn(6, time, classes, generator=g, dtype=torch.float64).log_softmax(-1)
    letters = [c for c in range(classes) if c != blank]
    a, b = letters[:2]
    goals = [(), (a,), (a, a), (a, b, a), (b, b, a), (b, a)]
    lengths = [time, time - 1, time, time - 1, time, 2]
    table = torch.full((6, 4), -1, device=log_p.device)
    for row, goal in zip(table, goals, strict=True):
        row[: len(goal)] = torch.tensor(goal, dtype=torch.long)
    expected = []
    for p, goal, n in zip(log_p.exp().tolist(), goals, lengths, strict=True):
        total = sum(
            math.prod(p[f][symbol] for f, symbol in enumerate(path))
            for path in itertools.product(range(classes), repeat=n)
            if say(path, blank) == goal
        )
        expected.append(-math.log(total) if total else math.inf)
    n, m = (torch.tensor(v, device=log_p.device) for v in (lengths, [len(v) for v in goals]))
    with (
        checks.unchanged(log_probs=log_p, targets=table),
        checks.forbidden("ctc_loss", "_ctc_loss"),
    ):
        found = ctc_loss_forward(log_p, table, n, m, blank)
    checks.close(
        found,
        torch.tensor(expected, dtype=torch.float64),
        what=f"the losses of {goals} in {lengths} frames, blank = {blank}",
        dtype=torch.float64,
        hint="by the list of all paths",
    )
# Law: what a row can say in four frames has the total probability 1.
log_p = checks.randn(1, 4, 3, generator=g, dtype=torch.float64).log_softmax(-1)
all_goals = sorted({say(path, 0) for path in itertools.product(range(3), repeat=4)})
table = torch.zeros(len(all_goals), 4, dtype=torch.long, device=log_p.device)
for row, goal in zip(table, all_goals, strict=True):
    row[: len(goal)] = torch.tensor(goal, dtype=torch.long)
n = torch.full((len(all_goals),), 4, device=log_p.device)
m = torch.tensor([len(goal) for goal in all_goals], device=log_p.device)
total = (-ctc_loss_forward(log_p.expand(len(all_goals), -1, -1), table, n, m)).exp().sum()
checks.close(total, torch.ones_like(total), what="the probabilities of all targets, summed")
### END HIDDEN TESTS

# %% check="ctc_loss_forward" points=1
long = torch.full((1, 1000, 3), math.log(1e-3))
loss = ctc_loss_forward(long, torch.tensor([[1, 2]]), torch.tensor([1000]), torch.tensor([2]))
assert torch.isfinite(loss).all(), "1000 frames of probability 1e-3 are finite in log space"
### BEGIN HIDDEN TESTS
g = checks.generator(5)
for dtype in (torch.float32, torch.float64):
    logits = checks.randn(5, 60, 7, generator=g, scale=3.0, dtype=dtype)
    table = torch.randint(1, 7, (5, 9), generator=g).to(logits.device)
    table[2, :4] = 5  # repeated letters
    n = torch.tensor([60, 31, 60, 9, 47], device=logits.device)
    m = torch.tensor([9, 5, 6, 1, 0], device=logits.device)

    def theirs(x, table=table, n=n, m=m):
        return F.ctc_loss(x.log_softmax(-1).transpose(0, 1), table, n, m, reduction="none")

    def yours(x, table=table, n=n, m=m):
        return ctc_loss_forward(x.log_softmax(-1), table, n, m)

    checks.close(
        yours(logits),
        theirs(logits.double()),
        what="the losses of 60 frames",
        dtype=dtype,
        mistakes={
            "the last frame of the batch for all rows": theirs(
                logits.double(), n=torch.full_like(n, 60)
            ),
        },
    )
    checks.gradients(yours, theirs, logits, names=("the logits",), rtol=1e-4)
# Impossible rows: the others' gradients are as without them, and their own is 0.
x = checks.randn(3, 4, 3, generator=g, dtype=torch.float64).log_softmax(-1).requires_grad_()
table = torch.tensor([[1, 1, 1], [1, 2, -1], [2, -1, -1]], device=x.device)
n, m = (torch.tensor(v, device=x.device) for v in ([4, 2, 3], [3, 2, 1]))
loss = ctc_loss_forward(x, table, n, m)
assert torch.isinf(loss).tolist() == [True, False, False], (
    f'"aaa" needs five frames: inf for row 0 and finite losses for the others; yours are {loss}'
)
(gradient,) = torch.autograd.grad(loss[1:].sum(), x)
assert bool(torch.isfinite(gradient).all()), (
    "the gradient holds NaN although all log-probabilities are finite: see the hint"
)
checks.close(gradient[0], torch.zeros_like(gradient[0]), what="the gradient of the impossible row")
checks.close(
    gradient[1, 2:], torch.zeros_like(gradient[1, 2:]), what="the gradient of frames past the end"
)
(gradient,) = torch.autograd.grad(ctc_loss_forward(x, table, n, m).sum(), x)
checks.close(
    gradient[0],
    torch.zeros_like(gradient[0]),
    what="the gradient of the impossible row, its loss in the sum",
)
# Probability 0, and NaN past the end.
x = checks.randn(2, 3, 3, generator=g, dtype=torch.float64).log_softmax(-1)
x[0, 1, 1] = -torch.inf  # no "a" in the middle
x[1, 0], x[1, 2] = torch.tensor([-torch.inf, 0.0, -torch.inf]), torch.nan
p = x.exp()
paths = p[0, 0, 1] * p[0, 1, 0] * p[0, 2, 0] + p[0, 0, 0] * p[0, 1, 0] * p[0, 2, 1]
both = p[1, 1, 1] + p[1, 1, 0]
n, m = (torch.tensor(v, device=x.device) for v in ([3, 2], [1, 1]))
one = torch.ones(2, 1, dtype=torch.long, device=x.device)
checks.close(
    ctc_loss_forward(x, one, n, m),
    -torch.stack([paths, both]).log(),
    what="the losses where some probabilities are 0 and frames past the end are NaN",
)
zero = x.clone().requires_grad_()
(gradient,) = torch.autograd.grad(ctc_loss_forward(zero, one, n, m).sum(), zero)
assert bool(torch.isfinite(gradient).all()), "log-probabilities of −inf make the gradient NaN"
at_zero = gradient[torch.isinf(x)]
checks.close(at_zero, torch.zeros_like(at_zero), what="the gradient at log-probabilities of −inf")
past = checks.randn(2, 5, 3, generator=g, dtype=torch.float64).log_softmax(-1)
past[0, 3:], past[1, 1:] = torch.nan, torch.nan
past.requires_grad_()
n, m = (torch.tensor(v, device=x.device) for v in ([3, 1], [1, 1]))
(gradient,) = torch.autograd.grad(ctc_loss_forward(past, one, n, m).sum(), past)
for row, frames in ((0, 3), (1, 1)):
    after = gradient[row, frames:]
    checks.close(
        after, torch.zeros_like(after), what="the gradient of frames past the end that hold NaN"
    )
    assert bool(torch.isfinite(gradient[row, :frames]).all()), (
        "frames past the end that hold NaN make the gradient of the others NaN"
    )
short = x[:1, :1].detach()  # one frame
checks.close(
    ctc_loss_forward(short.expand(2, 1, 3), torch.tensor([[1], [2]]).to(one), m, m),
    -short[0, 0, 1:],
    what="the losses of one letter in one frame",
)
checks.close(
    ctc_loss_forward(x[:, :2], one[:, :0], torch.full_like(m, 2), torch.zeros_like(m)),
    -x[:, :2, 0].sum(1),
    what="the losses of empty targets, (2, 0)",
)
n, m = (torch.tensor(v, device=x.device) for v in ([3, 2], [1, 1]))
x[0, :, 1] = -torch.inf
found = ctc_loss_forward(x, one, n, m)
assert float(found[0]) == math.inf, f"a letter of probability 0 has loss inf; yours is {found[0]}"
x = checks.randn(1, 4, 4, generator=g, dtype=torch.float64).log_softmax(-1)
x[0, 1, :3] = -torch.inf  # a frame in which neither the blank nor a letter of the target can be
x.requires_grad_()
found = ctc_loss_forward(x, torch.tensor([[1, 2]]).to(one), n[:1] + 1, m[:1] + 1)
assert float(found.detach()) == math.inf, (
    f"a row whose paths have probability 0 has loss inf; yours {found}"
)
(gradient,) = torch.autograd.grad(found.sum(), x)
checks.close(
    gradient,
    torch.zeros_like(gradient),
    what="the gradient of a row whose paths all have probability 0",
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: words of five vowels
#
# The network is Whisper's stem in small: two convolutions, the second with stride 2, so that the
# frame rate is halved (Whisper's 3000 frames become 1500), sinusoids for the position, and
# Transformer layers; here one, and under 30 thousand parameters. The words are random strings of
# one to five of our vowels with short gaps, at a pitch from 90 to 240 Hz, by mouths of different
# size, in noise.


# %%
class AudioEncoder(nn.Module):
    """Whisper's encoder in small: (batch, n_mels, frames) → (batch, ⌈frames / 2⌉, width)."""

    def __init__(self, n_mels: int, width: int, layers: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, F.gelu, 1e-5, True, True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).mT
        x = x + waves(torch.arange(x.shape[1], device=x.device), x.shape[2]).to(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t (any shape) at geometric rates from 1 to 1e-4: (..., width)."""
    rates = torch.exp(torch.linspace(0, -math.log(1e4), width // 2, device=t.device))
    angles = t[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def set_rate(adam: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """The learning rate: `peak`, and a fall to 0 in the last third of the steps."""
    for group in adam.param_groups:
        group["lr"] = peak * min(1.0, 3 * (steps - step) / steps)


def spoken(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of one to five vowels: sounds (count, samples), letters (count, 5) from 1 on and
    padded with 0, number of letters (count,), middle of each letter in s (count, 5)."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    sounds = torch.zeros(count, round(1.28 * SAMPLE_RATE))
    letters = torch.zeros(count, 5, dtype=torch.long)
    middles = torch.zeros(count, 5)
    sizes = torch.randint(1, 6, (count,), generator=generator)
    for row, size in enumerate(sizes.tolist()):
        pitch, mouth, start = draw(90, 240), draw(0.9, 1.15), draw(0.02, 0.1)
        for i in range(size):
            letters[row, i] = torch.randint(1, 6, (1,), generator=generator)
            seconds = draw(0.09, 0.18)
            sound = vowel(VOWELS[int(letters[row, i]) - 1], pitch, seconds, mouth)
            at = round(start * SAMPLE_RATE)
            sounds[row, at : at + len(sound)] += sound
            middles[row, i] = start + seconds / 2
            start += seconds + draw(0.02, 0.06)
    noise = torch.randn(sounds.shape, generator=generator)
    return sounds + 0.003 * noise, letters, sizes, middles


# %% [markdown]
# **Predict first.** Each vowel lasts five to nine of the encoder's frames of 20 ms. In how many
# of them will the trained network name the vowel: in most, or in one or two? CTC doesn't say.
# Write your guess down.

# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
sounds, letters, sizes, middles = spoken(400, generator)
mels = log_mel(sounds)
torch.manual_seed(0)
encoder = AudioEncoder(80, 40)
head = nn.Linear(40, 6)  # the blank and five vowels
adam = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], betas=(0.9, 0.95))
frames = torch.full((32,), 64)
ctc_curve = []
for step in range(200):
    set_rate(adam, 8e-3, step, 200)
    rows = torch.randint(0, 320, (32,), generator=generator)  # 80 are held out
    log_p = head(encoder(mels[rows])).log_softmax(-1)
    nats = ctc_loss_forward(log_p, letters[rows], frames, sizes[rows]).mean()
    adam.zero_grad()
    nats.backward()
    adam.step()
    ctc_curve.append(nats.item())


def read_out(log_p: Tensor) -> list[str]:
    """The likeliest path of each row, and what it says."""
    paths = log_p.argmax(-1).tolist()
    return ["".join(VOWELS[s - 1] for s, _ in itertools.groupby(path) if s != 0) for path in paths]


with torch.no_grad():
    log_p = head(encoder(mels[320:])).log_softmax(-1)
spelled = [
    "".join(VOWELS[c - 1] for c in row[:n])
    for row, n in zip(letters[320:].tolist(), sizes[320:], strict=True)
]
right = sum(a == b for a, b in zip(read_out(log_p), spelled, strict=True)) / len(spelled)
named = (log_p.argmax(-1) != 0).sum() / sum(map(len, spelled))
shown = max(range(80), key=lambda row: len(spelled[row]))  # a long word, for the figures
print(f"{sum(p.numel() for p in encoder.parameters()):,} parameters in the encoder")
print(f"loss {ctc_curve[0]:.2f} nats at first, {sum(ctc_curve[-10:]) / 10:.3f} at the end")
print(f"held-out words right from first to last letter: {right:.0%} of {len(spelled)}")
print(f"frames in which a vowel is named, for each vowel spoken: {named:.1f}")

# %% tags=["experiment", "figure"]
# Figure: what the network names, frame by frame
fig, (top, bottom) = plot.plt.subplots(2, 1, figsize=(9, 4.6), sharex=True)
top.imshow(mels[320 + shown], origin="lower", aspect="auto", cmap="Greys", extent=(0, 1.28, 0, 80))
top.grid(False)
top.set_ylabel("mel band")
top.set_title(f"spoken: {' '.join(spelled[shown])}")
time = (torch.arange(64) + 0.5) * 0.02
bottom.fill_between(time, log_p[shown, :, 0].exp(), color="#dddddd", step="mid", label="blank")
for i, name in enumerate(VOWELS, 1):
    bottom.plot(time, log_p[shown, :, i].exp(), label=name)
for i, name in enumerate(spelled[shown]):
    bottom.text(float(middles[320 + shown, i]), 1.04, name, ha="center", fontsize=9)
bottom.set(xlabel="time (s)", ylabel="probability", ylim=(0, 1.15), xlim=(0, 1.28))
bottom.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.25))
plot.caption(
    fig,
    "Letters above the curves stand at the middle of each spoken vowel. Nothing in the training "
    "told the network when a vowel is spoken; the loss only adds up all alignments.",
)
plot.plt.show()
torch.set_num_threads(threads)

# %% [markdown]
# **What came out.** The network found the boundaries by itself, and names each vowel in most of its
# frames: in all five seeds in five to six of them, with at most one of 80 held-out words wrong. At
# the outset it names nothing at all. Blanks everywhere are the quickest way to a small loss, and a
# good part of the training goes by before it leaves them. Large CTC recognizers look different.
# They spike: a letter in one frame, blanks around it (Zeyer et al. 2021). The loss allows both.
# Here a pause separates any two vowels and blank comes to mean silence; six times as many steps
# changed nothing about that. Whoever wants timestamps from CTC should look which of the two they
# have.

# %% [markdown]
# ## Codes: vector quantization {#codes}
#
# Language models predict tokens from a finite set. To let one speak, sound has to become tokens and
# tokens sound. An encoder turns a sound into vectors at, say, 75 a second; a **codebook** of $K$
# entries $e_k$ turns each vector into the index of the nearest; a decoder turns the entries into
# sound again. VQ-VAE (van den Oord et al. 2017) trains all three at once, past two obstacles.
#
# **The nearest entry has no gradient.** Its index is constant almost everywhere. So the backward
# pass acts as if the quantizer were not there: a **straight-through estimator** hands the gradient
# at the output to the input, unchanged. In code: $x + \mathrm{sg}(q - x)$, where sg stops the
# gradient. Its value is $q$ and its derivative by $x$ is 1. It is no true gradient, and it is good
# as long as $q$ is near $x$.
#
# **So they must stay near.** Two terms see to it: the entries move to the vectors that chose them,
# and the encoder *commits* to its entry, with a weight $\beta$ (0.25 in the paper):
#
# $$ L = \operatorname{mean}(\mathrm{sg}(x) - q)^2 + \beta\,\operatorname{mean}(x -
# \mathrm{sg}(q))^2. $$
#
# Both have the same value. They differ in who is moved.


# %% exercise="vector_quantize" minutes=15 difficulty=2
def vector_quantize(
    x: Tensor, codebook: Tensor, beta: float = 0.25
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest entry of each vector: (quantized, codes, loss).

    x: (..., dim); codebook: (entries, dim); float32 or float64, both of one dtype.

    codes: (...), int64, the index of the entry at the smallest Euclidean distance; of exactly
        equally near ones the lowest (where only rounding decides, either). Also far from the
        origin: entries 0.1 apart at a distance of 1000 are told apart in float32, so subtract
        before you square.
    quantized: like x, the chosen entries (up to a rounding of the last digits). Its gradient goes
        to x unchanged, as if quantized were x, and not to the codebook.
    loss: 0-dimensional, minimized: mean((sg(x) − q)²) + beta·mean((x − sg(q))²), with q the chosen
        entries, sg stopping the gradient, and means over all elements. The first term's gradient
        goes to the codebook only, the second's to x only.

    Inputs are not changed.

    Example: the vectors [1, 0] and [4, 4], codebook [[0, 0], [4, 2]]. Codes [0, 1]; squared errors
    1, 0, 0 and 4; with beta = 0.5 the loss is 1.25 + 0.5·1.25 = 1.875.
    """
    ### BEGIN SOLUTION
    gaps = x.detach()[..., None, :] - codebook.detach()
    codes = gaps.square().sum(-1).argmin(-1)
    q = codebook[codes]
    loss = (x.detach() - q).square().mean() + beta * (x - q.detach()).square().mean()
    return x + (q - x).detach(), codes, loss
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which gradient goes where</summary>
#
# `codebook[codes]` passes gradients to the chosen entries. Write each of the three results with
# `.detach()` on the parts whose gradient it shall not have.
# </details>

# %% check="vector_quantize" points=2
x, book = torch.tensor([[1.0, 0.0], [4.0, 4.0]]), torch.tensor([[0.0, 0.0], [4.0, 2.0]])
quantized, codes, loss = checks.parts(
    vector_quantize(x, book, 0.5), "quantized", "codes", "loss", what="vector_quantize"
)
checks.close(codes, torch.tensor([0, 1]), what="the codes of [1, 0] and [4, 4]")
checks.close(quantized, book, what="the quantized vectors")
checks.close(
    loss,
    torch.tensor(1.875),
    what="the loss with beta = 0.5",
    mistakes={
        "sums over dim in place of means": torch.tensor(3.75),
        "one term only": torch.tensor(1.25),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for shape, entries, dim, dtype, beta in [
    ((7,), 5, 3, torch.float64, 0.25),
    ((2, 40), 33, 4, torch.float32, 0.9),
    ((), 4, 2, torch.float64, 0.1),
    ((3, 2, 5), 1, 1, torch.float32, 2.0),
]:
    x = checks.randn(*shape, dim, generator=g, dtype=dtype)
    book = checks.randn(entries, dim, generator=g, dtype=dtype)
    rows, wide = x.double().reshape(-1, dim).tolist(), book.double().tolist()
    nearest = [min(range(entries), key=lambda k, r=r: math.dist(r, wide[k])) for r in rows]
    nearest = torch.tensor(nearest).reshape(shape)
    chosen = book.double().cpu()[nearest]
    error = (x.double().cpu() - chosen).square().mean()
    with checks.unchanged(x=x, codebook=book):
        quantized, codes, loss = vector_quantize(x, book, beta)
    checks.close(
        codes,
        nearest,
        what=f"the codes of {shape} vectors among {entries} entries",
        dtype=torch.int64,
    )
    last = 1e-6 if dtype == torch.float32 else 1e-14
    size = float(x.abs().max() + book.abs().max())
    checks.close(
        quantized, chosen, what="the quantized vectors", dtype=dtype, rtol=0, atol=last * size
    )
    checks.close(loss, (1 + beta) * error, what=f"the loss with {beta = }", dtype=dtype)
# Far from the origin, by more than 25 vectors (from where on torch.cdist multiplies matrices).
steps = torch.arange(40.0)[:, None] * 0.1 * torch.tensor([[1.0, 0.0, 0.0]])
book = (1000 + steps).to(profile.device)
order = torch.randperm(40, generator=g)
checks.close(
    vector_quantize(book[order], book)[1],
    order,
    what="the codes of entries 0.1 apart at a distance of 1000",
    hint="|x|² − 2x·e + |e|² loses them in float32: subtract first",
)
tied = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [5.0, 5.0]], device=profile.device)
checks.close(
    vector_quantize(torch.tensor([[1.0, 1.0], [0.0, 0.0]]).to(tied), tied)[1],
    torch.tensor([0, 0]),
    what="the codes of vectors in the middle of two entries",
    hint="Of equally near entries the lowest index counts",
)
### END HIDDEN TESTS

# %% check="vector_quantize" points=1
x = torch.tensor([[1.0, 0.0], [4.0, 4.0]], requires_grad=True)
book = torch.tensor([[0.0, 0.0], [4.0, 2.0]], requires_grad=True)
quantized, _, _ = vector_quantize(x, book)
assert quantized.requires_grad, "no gradient passes the quantizer"
(through,) = torch.autograd.grad((quantized * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum(), x)
checks.close(
    through,
    torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    what="what comes through for gradients [1, 2] and [3, 4] at the output",
)
### BEGIN HIDDEN TESTS
g = checks.generator(7)
x = checks.randn(6, 5, generator=g, dtype=torch.float64).requires_grad_()
book = checks.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
slope = checks.randn(6, 5, generator=g, dtype=torch.float64)
quantized, codes, loss = vector_quantize(x, book, 0.4)
to_x, to_book = torch.autograd.grad(
    (quantized * slope).sum(), (x, book), retain_graph=True, allow_unused=True
)
checks.close(to_x, slope, what="the gradient at x of a function of quantized")
assert to_book is None or not bool(to_book.any()), (
    "the straight-through gradient reaches the codebook too: it belongs to x alone"
)
nearest = torch.cdist(x.detach(), book.detach()).argmin(1)
chosen = book.detach()[nearest]
pull = torch.zeros_like(book).index_add(0, nearest, 2 * (chosen - x.detach()) / 30)
to_x, to_book = torch.autograd.grad(loss, (x, book), allow_unused=True)
for name, grad in (("x", to_x), ("the codebook", to_book)):
    assert grad is not None, f"the loss has no gradient at {name}"
checks.close(
    to_book,
    pull,
    what="the loss's gradient at the codebook",
    mistakes={"beta on the codebook's term": 0.4 * pull, "beta on both": 1.4 * pull},
)
checks.close(
    to_x,
    0.4 * 2 * (x.detach() - chosen) / 30,
    what="the loss's gradient at x, with beta = 0.4",
    mistakes={
        "no beta on x's term": 2 * (x.detach() - chosen) / 30,
        "nothing detached": 2.8 * (x.detach() - chosen) / 30,
    },
)
### END HIDDEN TESTS

# %% [markdown]
# ### The codebook as a moving average
#
# The first term of the loss moves an entry towards the mean of its vectors. One can go there
# directly, as k-means does: keep, for each entry, a moving count $N_k$ of the vectors that chose
# it and a moving sum $s_k$ of them, and set $e_k = s_k / N_k$. SoundStream, EnCodec and Mimi do it
# this way and drop the first term. Where nothing old is kept (a decay of 0) it is k-means' step.
#
# An entry that nobody chooses has $N_k\to 0$. So the count is smoothed, as if each entry had been
# chosen $\epsilon$ times more, and scaled back to the same total:
#
# $$ \tilde N_k = \frac{N_k + \epsilon}{\sum_j N_j + K\epsilon}\,\sum_j N_j . $$


# %% exercise="ema_codebook" minutes=12 difficulty=2 path="more"
def ema_codebook(
    counts: Tensor, sums: Tensor, x: Tensor, codes: Tensor, decay: float = 0.99, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a codebook that is a moving average: (codebook, new counts, new sums).

    counts: (entries,); sums: (entries, dim); x: (..., dim), all of one dtype, float32 or float64;
    codes: (...), int64, the entry that each vector chose.

    New counts are decay·counts + (1 − decay)·(how many vectors chose the entry), new sums
    decay·sums + (1 − decay)·(the sum of those vectors). codebook[k] is new sums[k] / smoothed[k],
    with smoothed = (new counts + eps) / (total + entries·eps) · total, total the sum of the new
    counts, which is positive. No result carries a gradient, even where x does. Inputs are not
    changed. There may be no vectors at all, x of shape (0, dim).

    Example: counts [1, 1], sums [[2], [6]], vectors [[4], [8]] with codes [0, 0], decay 0.5,
    eps 1: counts [1.5, 0.5], sums [[7], [3]], smoothed [1.25, 0.75], codebook [[5.6], [4]].
    """
    ### BEGIN SOLUTION
    entries = len(counts)
    chose = F.one_hot(codes.flatten(), entries).to(x.dtype)  # (vectors, entries)
    vectors = x.detach().reshape(-1, x.shape[-1])
    counts = decay * counts.detach() + (1 - decay) * chose.sum(0)
    sums = decay * sums.detach() + (1 - decay) * (chose.T @ vectors)
    total = counts.sum()
    smoothed = (counts + eps) / (total + entries * eps) * total
    return sums / smoothed[:, None], counts, sums
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: sums by entry</summary>
#
# A one-hot matrix of the codes, transposed, times the vectors is the sum for each entry. So does
# `index_add`.
# </details>

# %% check="ema_codebook" points=2
codebook, counts, sums = checks.parts(
    ema_codebook(
        torch.tensor([1.0, 1.0]),
        torch.tensor([[2.0], [6.0]]),
        torch.tensor([[4.0], [8.0]]),
        torch.tensor([0, 0]),
        decay=0.5,
        eps=1.0,
    ),
    "codebook",
    "counts",
    "sums",
    what="ema_codebook",
)
checks.close(counts, torch.tensor([1.5, 0.5]), what="the counts")
checks.close(sums, torch.tensor([[7.0], [3.0]]), what="the sums")
checks.close(codebook, torch.tensor([[5.6], [4.0]]), what="the codebook")
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for shape, entries, dim, decay, eps, dtype in [
    ((9,), 4, 3, 0.9, 1e-2, torch.float64),
    ((2, 5), 6, 1, 0.3, 0.5, torch.float32),
    ((0,), 3, 2, 0.7, 1e-3, torch.float64),
    ((3, 4, 2), 1, 4, 0.99, 1e-5, torch.float32),
]:
    x = checks.randn(*shape, dim, generator=g, dtype=dtype)
    codes = torch.randint(0, entries, shape, generator=g).to(x.device)
    codes[codes == 1] = 0  # nobody chooses entry 1
    counts = torch.rand(entries, generator=g).to(x) + 0.2
    sums = checks.randn(entries, dim, generator=g, dtype=dtype)
    n, m = counts.double() * decay, sums.double() * decay
    for vector, code in zip(x.reshape(-1, dim).double(), codes.flatten().tolist(), strict=True):
        n[code] += 1 - decay
        m[code] += (1 - decay) * vector
    smoothed = (n + eps) * n.sum() / (n.sum() + entries * eps)
    with checks.unchanged(counts=counts, sums=sums, x=x, codes=codes):
        found = ema_codebook(counts, sums, x, codes, decay, eps)
    for name, value, target in zip(
        ("codebook", "counts", "sums"), found, (m / smoothed[:, None], n, m), strict=True
    ):
        checks.close(value, target, what=f"{name} after {shape} vectors", dtype=dtype)
# Law: with decay 0 and next to no smoothing it is a step of k-means, which lowers the distortion.
x = checks.randn(60, 2, generator=g, dtype=torch.float64).requires_grad_()
codes = torch.arange(60, device=x.device) % 5
found = ema_codebook(torch.ones(5).to(x), torch.ones(5, 2).to(x), x, codes, 0.0, 1e-12)
means = torch.stack([x[codes == k].mean(0) for k in range(5)])
checks.close(found[0], means, what="the codebook with decay = 0", rtol=1e-8)
assert not any(value.requires_grad for value in found), "the codebook carries x's graph: detach x"
### END HIDDEN TESTS

# %% [markdown]
# ### What is left over: residual quantization
#
# One codebook for all of EnCodec's 128 dimensions, at 6 kilobits a second and 75 vectors a second,
# would spend 80 bits on a vector: $2^{80}$ entries. **Residual vector quantization** (SoundStream,
# Zeghidour et al. 2021) spends them in eight stages of 10 bits: quantize, subtract, quantize what
# is left with a second codebook, and so on. Eight times 1024 entries reach up to $2^{80}$ sums.
#
# $$ r_0 = x,\qquad c_i = \arg\min_k \lVert r_i - e^{(i)}_k\rVert,\qquad r_{i+1} = r_i -
# e^{(i)}_{c_i},\qquad \hat x = \sum_i e^{(i)}_{c_i}. $$
#
# The first $n$ codes are the codes at $n$ stages, so one stream serves several bit rates. Often one
# reads that the error falls with each stage. It can't rise where a codebook holds a zero, nor, on
# average, on the residuals on which it is a fixed point of k-means. Elsewhere even the nearest
# entry may be farther from the residual than nothing at all.


# %% exercise="residual_vector_quantize" minutes=10 difficulty=2
def residual_vector_quantize(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stage after stage, the nearest entry of what is left: (quantized, codes).

    x: (..., dim), float32 or float64. codebooks: at least one, (entries, dim) each, of the dtype of
    x; their numbers of entries may differ. codes: (..., stages), int64, the nearest entry of each
    stage's residual (ties as in `vector_quantize`). quantized: like x, the sum of the chosen
    entries. Its gradient goes to x unchanged, once, however many stages there are, and not to the
    codebooks. Inputs are not changed. You may use `vector_quantize`.

    Example: x = [10], codebooks [[0], [7]] and [[-2], [2]]: codes [1, 1], quantized [9].
    """
    ### BEGIN SOLUTION
    residual, codes = x.detach(), []
    for codebook in codebooks:
        entries, chosen, _ = vector_quantize(residual, codebook.detach())
        residual = residual - entries
        codes.append(chosen)
    total = x.detach() - residual  # the sum of the chosen entries
    return x + (total - x).detach(), torch.stack(codes, dim=-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the gradient, once</summary>
#
# Work on a detached x, and let the straight-through step come last. Count what happens if each
# stage's output passes its own gradient to x.
# </details>

# %% check="residual_vector_quantize" points=2
quantized, codes = checks.parts(
    residual_vector_quantize(
        torch.tensor([[10.0], [1.0]]),
        [torch.tensor([[0.0], [7.0]]), torch.tensor([[-2.0], [2.0]])],
    ),
    "quantized",
    "codes",
    what="residual_vector_quantize",
)
checks.close(codes, torch.tensor([[1, 1], [0, 1]]), what="the codes of 10 and of 1")
checks.close(quantized, torch.tensor([[9.0], [2.0]]), what="the quantized numbers")
### BEGIN HIDDEN TESTS
g = checks.generator(9)
for shape, dim, sizes, dtype in [
    ((6,), 3, (5, 5, 5), torch.float64),
    ((2, 4), 2, (7, 2, 3, 4), torch.float32),
    ((), 4, (3,), torch.float64),
    ((1, 30), 1, (1, 9), torch.float32),
]:
    x = checks.randn(*shape, dim, generator=g, dtype=dtype, scale=3.0)
    books = [
        checks.randn(n, dim, generator=g, dtype=dtype, scale=2.0 / (i + 1))
        for i, n in enumerate(sizes)
    ]
    rows = x.double().reshape(-1, dim).tolist()
    expected, total = [], []
    for row in rows:
        left, path = list(row), []
        for book in books:
            entries = book.double().tolist()
            path.append(min(range(len(entries)), key=lambda k: math.dist(left, entries[k])))
            left = [a - b for a, b in zip(left, entries[path[-1]], strict=True)]
        expected.append(path)
        total.append([a - b for a, b in zip(row, left, strict=True)])
    with checks.unchanged(x, *books):
        quantized, codes = residual_vector_quantize(x, books)
    checks.close(
        codes,
        torch.tensor(expected).reshape(*shape, len(sizes)),
        what=f"the codes of {shape} vectors, {sizes} entries",
        dtype=torch.int64,
        mistakes={
            "quantizing x itself at every stage": torch.stack(
                [torch.cdist(x.reshape(-1, dim), b).argmin(1).reshape(shape) for b in books], -1
            ).cpu(),
        },
    )
    checks.close(
        quantized,
        torch.tensor(total, dtype=torch.float64).reshape(*shape, dim),
        what="the sums of the chosen entries",
        dtype=dtype,
        rtol=0,
        atol=1e-5 if dtype == torch.float32 else 1e-12,
    )
    checks.close(
        residual_vector_quantize(x, books[:1])[1],
        codes[..., :1],
        what="the code at one stage",
        hint="The first codes don't depend on later stages",
    )
tied = [torch.tensor([[0.0], [2.0], [0.0]]), torch.tensor([[1.0], [-1.0], [1.0]])]
checks.close(
    residual_vector_quantize(torch.tensor([[1.0], [2.0]]), tied)[1],
    torch.tensor([[0, 0], [1, 0]]),
    what="the codes of 1 and 2, with entries that are equally near",
    hint="The lowest index counts, at every stage",
)
x = checks.randn(5, 3, generator=g, dtype=torch.float64).requires_grad_()
books = [checks.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
slope = checks.randn(5, 3, generator=g, dtype=torch.float64)
quantized, _ = residual_vector_quantize(x, books)
assert quantized.requires_grad, "no gradient passes the quantizer"
to_x, *to_books = torch.autograd.grad((quantized * slope).sum(), [x, *books], allow_unused=True)
checks.close(
    to_x,
    slope,
    what="the gradient at x",
    hint="As if the quantizer were not there",
    mistakes={"passing it once for each of the three stages": 3 * slope},
)
assert all(grad is None or not bool(grad.any()) for grad in to_books), (
    "the straight-through gradient reaches a codebook: it belongs to x alone"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: how far does each stage get?
#
# The vectors are frames of the log mel of the spoken words, 80 numbers each. Six codebooks of 32
# entries, 5 bits a stage, fitted one after the other to what the stages before leave over (entries
# start as random residuals, then move by `ema_codebook`); against six whose entries were drawn at
# random with the residuals' own mean and spread, which is where an untrained codec begins.
#
# **Predict first.** Both curves start at the spread of the frames. Does the random one fall at
# every stage, too?

# %% tags=["experiment"]
generator = torch.Generator().manual_seed(1)
loud = mels.amax(1) > mels.amax(1).quantile(0.5)  # (words, frames): without the silence
training = mels[:320].mT[loud[:320]]
training = training[torch.randperm(len(training), generator=generator)[:4000]]
center = training.mean(0)
training, held_frames = training - center, mels[320:].mT[loud[320:]] - center


def fit(x: Tensor, entries: int) -> Tensor:
    """A codebook (entries, dim) for the vectors x."""
    book = x[torch.randperm(len(x), generator=generator)[:entries]].clone()
    counts, sums = torch.ones(entries), book.clone()
    for i in range(16):
        batch = x[i % 4 :: 4]
        book, counts, sums = ema_codebook(
            counts, sums, batch, vector_quantize(batch, book)[1], decay=0.6
        )
    return book


fitted, left = [], training
for _ in range(6):
    fitted.append(fit(left, 32))
    left = left - vector_quantize(left, fitted[-1])[0]
untrained, left = [], training
for _ in range(6):
    noise = torch.randn(32, 80, generator=generator)
    untrained.append(left.mean(0) + left.std(0) * noise)
    left = left - vector_quantize(left, untrained[-1])[0]


def distortions(books: list[Tensor]) -> list[float]:
    """Share of the held-out frames' energy that is left after 0, 1, 2 … stages."""
    errors = [
        (held_frames - residual_vector_quantize(held_frames, books[:n])[0]).square().mean()
        for n in range(1, len(books) + 1)
    ]
    return [1.0, *(float(error / held_frames.square().mean()) for error in errors)]


energy = {"fitted to the residuals": distortions(fitted), "drawn at random": distortions(untrained)}
for name, shares in energy.items():
    print(f"{name:24}", "  ".join(f"{share:.3f}" for share in shares))

# %% tags=["experiment", "figure"]
# Figure: a word after one, two and six stages, and the share of energy that is left
fig, axes = plot.plt.subplot_mosaic(
    [["a", "b", "curve"], ["c", "d", "curve"]], figsize=(11, 4.4), width_ratios=[1, 1, 1.3]
)
word = mels[320 + shown].mT[:100]
for key, stages in zip("abcd", (None, 1, 2, 6), strict=True):
    if stages is None:
        picture, title = word, "the frames"
    else:
        picture = center + residual_vector_quantize(word - center, fitted[:stages])[0]
        title = f"{stages} stage{'s' * (stages > 1)}: {5 * stages} bits a frame"
    axes[key].imshow(picture.T, origin="lower", aspect="auto", cmap="Greys", vmin=-0.6, vmax=1.1)
    axes[key].set_title(title, fontsize=10)
    axes[key].grid(False)
    axes[key].set(ylabel="mel band" if key in "ac" else "", xlabel="frame" if key in "cd" else "")
plot.curves(
    range(7),
    energy,
    xlabel="stages",
    ylabel="energy left (share)",
    logy=True,
    ax=axes["curve"],
)
plot.caption(
    fig,
    "Held-out words. One stage already knows the vowel; the later ones add loudness and pitch. The "
    "random codebooks have the right mean and spread and know nothing of the shape.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** The fitted codebooks take away a share of what is left at every stage, most of
# it at the first. The random ones make it *worse* at the first stage already: in 80 dimensions the
# nearest of 32 random vectors is no nearer than the mean. Each further stage repeats the harm, as
# the residual has grown. All five seeds agree. Mimi and EnCodec fit their codebooks while the
# encoder trains, and replace entries that nobody chooses any more.

# %% [markdown]
# ### How a language model reads eight codes at once
#
# RVQ gives $K$ codes per frame, which depend on one another: the second refines the first.
# Flattened, one after the other, they cost $K$ steps a frame. Predicted all at once, they
# are drawn as if independent given the past. MusicGen (Copet et al. 2023) shifts instead: stage $k$
# is delayed by $k$ steps. In each step the model predicts one code of every stage, and has seen, of
# each frame, all coarser codes before the finer one. Cost: $T + K - 1$ steps. That is the **delay
# pattern**.


# %% exercise="delay_pattern" minutes=10 difficulty=1 path="more"
def delay_pattern(codes: Tensor, pad: int) -> Tensor:
    """Stage k shifted right by k: (batch, stages, frames) → (batch, stages, frames + stages − 1).

    codes: integers of any type, which is kept; frames may be 0. Holes are `pad` (no code, but that
    isn't checked). A new tensor: codes is neither changed nor shared.

    Example: [[[1, 2, 3], [4, 5, 6]]] with pad 0 gives [[[1, 2, 3, 0], [0, 4, 5, 6]]].
    """
    ### BEGIN SOLUTION
    batch, stages, frames = codes.shape
    delayed = codes.new_full((batch, stages, frames + stages - 1), pad)
    for k in range(stages):
        delayed[:, k, k : k + frames] = codes[:, k]
    return delayed
    ### END SOLUTION


def undo_delay(delayed: Tensor) -> Tensor:
    """The inverse: (batch, stages, steps) → (batch, stages, steps − stages + 1), whatever stands in
    the holes. A new tensor of its dtype. ValueError where there are fewer than stages − 1 steps.
    """
    ### BEGIN SOLUTION
    _, stages, steps = delayed.shape
    frames = steps - stages + 1
    if frames < 0:
        raise ValueError(f"{steps} steps cannot hold {stages} delayed stages")
    return torch.stack([delayed[:, k, k : k + frames] for k in range(stages)], dim=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one stage at a time</summary>
#
# Row k of the result holds the codes from column k on, as many as there are frames.
# </details>

# %% check="delay_pattern" points=2
delayed = delay_pattern(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), 0)
checks.close(delayed, torch.tensor([[[1, 2, 3, 0], [0, 4, 5, 6]]]), what="two stages, delayed")
checks.close(undo_delay(delayed), torch.tensor([[[1, 2, 3], [4, 5, 6]]]), what="the way back")
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for batch, stages, frames, pad, dtype in [
    (2, 4, 6, -1, torch.int64),
    (3, 1, 5, 9, torch.int32),
    (1, 8, 2, 5, torch.int16),
    (2, 3, 0, 7, torch.int64),
]:
    codes = torch.randint(0, 9, (batch, stages, frames), generator=g).to(dtype)
    steps = frames + stages - 1
    expected = torch.tensor(
        [
            [
                [int(row[k][s - k]) if 0 <= s - k < frames else pad for s in range(steps)]
                for k in range(stages)
            ]
            for row in codes.tolist()
        ],
        dtype=dtype,
    ).reshape(batch, stages, steps)
    with checks.unchanged(codes=codes):
        delayed = delay_pattern(codes, pad)
    checks.close(
        delayed, expected, what=f"{stages} stages of {frames} frames, {pad = }", dtype=dtype
    )
    noisy = torch.where(expected == pad, torch.randint(0, 9, expected.shape, generator=g), expected)
    noisy = noisy.to(dtype)
    for k in range(stages):  # codes that equal pad are codes all the same
        noisy[:, k, k : k + frames] = codes[:, k]
    with checks.unchanged(delayed=noisy):
        back = undo_delay(noisy)
    checks.close(back, codes, what="the way back, with anything in the holes", dtype=dtype)
codes = torch.randint(0, 9, (2, 1, 4), generator=g)
kept = codes.clone()
delay_pattern(codes, 0)[:] = -5
undo_delay(codes)[:] = -5
checks.close(codes, kept, what="the codes after their result was written to", hint="A new tensor")
checks.raises(ValueError, undo_delay, torch.zeros(1, 4, 2, dtype=torch.long))
checks.close(
    undo_delay(torch.zeros(1, 4, 3, dtype=torch.long)),
    torch.zeros(1, 4, 0, dtype=torch.long),
    what="four stages in three steps: no frame",
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: the codes of a word, and the order in which a language model writes them
tokens = residual_vector_quantize(word[8:22] - center, fitted[:4])[1].mT[None]
fig, axes = plot.plt.subplots(2, 1, figsize=(8.6, 3.4), sharex=True)
for ax, rows, title in (
    (axes[0], tokens[0], "as they belong together: a column is a frame"),
    (axes[1], delay_pattern(tokens, -1)[0], "delayed: a column is a step of the language model"),
):
    for k, row in enumerate(rows.tolist()):
        for s, code in enumerate(row):
            frame = s if ax is axes[0] else s - k
            shade = "white" if code < 0 else "#f0c36d" if frame == 5 else "#e8eef4"
            ax.add_patch(plot.plt.Rectangle((s, k), 1, 1, facecolor=shade, edgecolor="#999999"))
            ax.text(
                s + 0.5, k + 0.5, "·" if code < 0 else code, ha="center", va="center", fontsize=8
            )
    ax.set(xlim=(0, 17), ylim=(4, 0), yticks=[0.5, 1.5, 2.5, 3.5], yticklabels=range(1, 5))
    ax.set_ylabel("stage")
    ax.set_title(title, fontsize=10)
    ax.grid(False)
axes[1].set_xticks(torch.arange(17) + 0.5, range(17))
axes[1].set_xlabel("frame (above), step (below)")
plot.caption(
    fig,
    "Four stages of fourteen frames take 17 steps, not 56. The marked frame's codes are written in "
    "four steps, the coarse one first.",
)
plot.plt.show()

# %% [markdown]
# ## Video: space and time apart {#video}
#
# A **tubelet** is a patch with a third side: $t$ frames by $h$ by $w$ pixels, flattened and
# projected (ViViT, Arnab et al. 2021). Eight seconds at 16 frames a second, in tubelets of
# $2\times16\times16$ at $224\times224$, are $64\cdot196 = 12{,}544$ tokens. Attention among all is
# $(TS)^2$ scores. **Factorized attention** first mixes the $S$ tokens of each frame, then the $T$
# tokens at each place: $T\,S^2 + S\,T^2 = TS\,(T+S)$. Two hops connect any two tokens: first to the
# right place in one's own frame, then along time.


# %% exercise="tubelet_embed" minutes=10 difficulty=2 path="more"
def tubelet_embed(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tubelets, projected: (batch, frames // t, (height // h)·(width // w), dim).

    video: (batch, channels, frames, height, width). weight: (dim, channels, t, h, w), bias: (dim,):
    those of an nn.Conv3d whose stride is its kernel. All of one floating dtype, which the result
    has. Places are numbered row by row. ValueError where t, h or w don't divide. No convolution
    (conv3d and its like) is called: rearrange, then multiply matrices. Gradients flow to all three;
    inputs are not changed.
    """
    ### BEGIN SOLUTION
    dim, _, t, h, w = weight.shape
    batch, channels, frames, height, width = video.shape
    if frames % t or height % h or width % w:
        raise ValueError(f"tubelets {t}×{h}×{w} don't divide a video of {frames}×{height}×{width}")
    cut = video.reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
    cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)  # places first, then what is inside of one
    return cut.flatten(4).flatten(2, 3) @ weight.reshape(dim, -1).T + bias
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: eight axes</summary>
#
# Split each of the three lengths into (how many, how long), so that the video has eight axes. Then
# `permute` the three "how many" to the front, and flatten the rest in the order of the weight's
# axes.
# </details>

# %% check="tubelet_embed" points=2
# Two frames of 2 × 4 pixels, tubelets of 2 × 2 × 2: two places.
video = torch.arange(16.0).reshape(1, 1, 2, 2, 4)
found = tubelet_embed(video, torch.ones(1, 1, 2, 2, 2), torch.tensor([0.5]))
checks.close(
    found,
    torch.tensor([[[[52.5], [68.5]]]]),
    what="the sums of two tubelets, plus 0.5",
    hint="The left one holds the pixels 0, 1, 4, 5 and, a frame later, 8, 9, 12, 13",
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
for shape, kernel, dim, dtype in [
    ((2, 3, 4, 6, 4), (2, 3, 2), 5, torch.float64),
    ((1, 1, 6, 4, 9), (3, 1, 3), 2, torch.float32),
    ((3, 2, 1, 4, 4), (1, 4, 4), 7, torch.float64),
    ((2, 4, 2, 2, 6), (1, 2, 2), 1, torch.float32),
]:
    video = checks.randn(*shape, generator=g, dtype=dtype)
    weight = checks.randn(dim, shape[1], *kernel, generator=g, dtype=dtype)
    bias = checks.randn(dim, generator=g, dtype=dtype)

    def theirs(v, w, b, kernel=kernel):
        return F.conv3d(v, w, b, stride=kernel).flatten(3).permute(0, 2, 3, 1)

    with checks.unchanged(video=video, weight=weight, bias=bias):
        with checks.forbidden("conv3d", "conv2d", "conv1d", "convolution"):
            found = tubelet_embed(video, weight, bias)
        checks.close(
            found,
            theirs(video.double(), weight.double(), bias.double()),
            what=f"tubelets {kernel} of a video {shape}",
            dtype=dtype,
        )
    checks.gradients(
        tubelet_embed, theirs, video, weight, bias, names=("video", "weight", "bias"), rtol=1e-4
    )
half = [v.bfloat16() for v in (video, weight, bias)]
assert tubelet_embed(*half).dtype == torch.bfloat16, "bfloat16 in, bfloat16 out"
swapped = checks.randn(2, 4, 1, 6, 4, generator=g).transpose(3, 4)  # (2, 4, 1, 4, 6)
weight = checks.randn(3, 4, 1, 2, 3, generator=g)
checks.close(
    tubelet_embed(swapped, weight, torch.zeros(3).to(weight)),
    F.conv3d(swapped.double(), weight.double(), stride=(1, 2, 3)).flatten(3).permute(0, 2, 3, 1),
    what="the tubelets of a transposed view",
    dtype=torch.float32,
)
for shape in ((1, 1, 3, 4, 4), (1, 1, 2, 5, 4), (1, 1, 2, 4, 3)):
    checks.raises(
        ValueError, tubelet_embed, torch.zeros(shape), torch.zeros(2, 1, 2, 2, 2), torch.zeros(2)
    )
### END HIDDEN TESTS


# %% exercise="factorized_attention" minutes=15 difficulty=2 path="more"
def factorized_attention(
    x: Tensor,
    spatial: Callable[[Tensor], Tensor],
    temporal: Callable[[Tensor], Tensor],
) -> Tensor:
    """Attention in each frame, then along each place, both with a residual: like x.

    x: (batch, time, space, dim), floating. spatial and temporal map (rows, tokens, dim) to the same
    shape and let the tokens of a row see one another; rows don't. `spatial` is called once, with a
    row for each frame of each video (batch·time rows of space tokens), and its result is added
    to x. `temporal` is called once on *that* sum, with a row for each place of each video
    (batch·space rows of time tokens, in the order of time), and its result is added to the sum. In
    which order the rows stand is up to you. Gradients flow; x is not changed.
    """
    ### BEGIN SOLUTION
    batch, time, space, dim = x.shape
    x = x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)
    places = x.transpose(1, 2)  # (batch, space, time, dim)
    along = temporal(places.reshape(batch * space, time, dim)).reshape(places.shape)
    return x + along.transpose(1, 2)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: reshape is not transpose</summary>
#
# `reshape` keeps the order in memory. To let time be the second last axis, transpose first, and
# transpose back at the end.
# </details>

# %% check="factorized_attention" points=2
# One video of two frames and three places; each token a number.
x = torch.tensor([[[[1.0], [2.0], [3.0]], [[10.0], [20.0], [30.0]]]])
found = factorized_attention(x, torch.zeros_like, lambda rows: rows.cumsum(1))
checks.close(
    found,
    torch.tensor([[[[2.0], [4.0], [6.0]], [[21.0], [42.0], [63.0]]]]),
    what="a running sum along time",
    mistakes={
        "rows that mix places": torch.tensor([[[[2.0], [5.0], [6.0]], [[23.0], [50.0], [80.0]]]]),
        "no residual": torch.tensor([[[[1.0], [2.0], [3.0]], [[11.0], [22.0], [33.0]]]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for batch, time, space, dim, dtype in [
    (2, 3, 4, 6, torch.float64),
    (3, 4, 2, 2, torch.float32),
    (1, 1, 5, 4, torch.float64),
    (2, 5, 1, 3, torch.float64),
]:
    x = checks.randn(batch, time, space, dim, generator=g, dtype=dtype)
    maps = [checks.randn(3, dim, dim, generator=g, dtype=dtype, scale=0.7) for _ in range(2)]
    met = []

    def mix(rows, maps, causal=False):
        q, k, v = (rows @ m for m in maps)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def spatial(rows, maps=maps, met=met):
        met.append(("spatial", tuple(rows.shape)))
        return mix(rows, maps[0])

    def temporal(rows, maps=maps, met=met):
        met.append(("temporal", tuple(rows.shape)))
        return mix(rows, maps[1], causal=True)

    def joint(x, maps=maps, space=space):
        """Attention among all tokens of a video, with a mask: an independent way to the same."""
        flat = x.flatten(1, 2)
        frame = torch.arange(flat.shape[1], device=x.device) // space
        place = torch.arange(flat.shape[1], device=x.device) % space
        together = frame[:, None] == frame
        past = (place[:, None] == place) & (frame <= frame[:, None])
        for weights, mask in zip(maps, (together, past), strict=True):
            q, k, v = (flat @ m.to(flat) for m in weights)
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
            flat = flat + scores.softmax(-1) @ v
        return flat.reshape(x.shape)

    with checks.unchanged(x=x):
        found = factorized_attention(x, spatial, temporal)
    asked = [("spatial", (batch * time, space, dim)), ("temporal", (batch * space, time, dim))]
    assert met == asked, f"the calls should be {asked}; yours are {met}"
    checks.close(
        found,
        joint(x.double()),
        what=f"{batch} videos of {time} frames and {space} places",
        dtype=dtype,
        hint="as attention among all tokens, masked",
    )
    checks.gradients(
        lambda x, s=spatial, t=temporal: factorized_attention(x, s, t),
        joint,
        x,
        names=("x",),
        rtol=1e-4,
    )
view = checks.randn(2, 4, 3, 2, generator=g).transpose(1, 2)  # (2, 3, 4, 2)
checks.close(
    factorized_attention(view, lambda rows: rows.flip(1), lambda rows: rows.cumsum(1)),
    (view + view.flip(2)) + (view + view.flip(2)).cumsum(1),
    what="a transposed view, flipped in space and summed in time",
)
### END HIDDEN TESTS

# %% [markdown]
# A handwritten digit moves through eight frames, cut into tubelets of $2\times4\times4$. Which
# tubelets can one of them see? The gradient of its output tells.

# %% tags=["experiment", "figure"]
# Figure: what one tubelet sees, and what it costs
picture = data.digits()[0][3]
video = torch.zeros(1, 1, 8, 16, 16)
for f in range(8):
    video[0, 0, f, f : f + 8, 8 - f : 16 - f] = picture
generator = torch.Generator().manual_seed(0)
tubelets = tubelet_embed(
    video, 0.3 * torch.randn(8, 1, 2, 4, 4, generator=generator), torch.zeros(8)
)


def attend(rows: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(rows, rows, rows)


kinds = {
    "space only": (attend, torch.zeros_like),
    "time only": (torch.zeros_like, attend),
    "space, then time": (attend, attend),
}
fig = plot.plt.figure(figsize=(11, 4.6))
left, right = fig.subfigures(1, 2, width_ratios=[1.5, 1])
grid = left.subplots(3, 4)
for i, (name, (spatial, temporal)) in enumerate(kinds.items()):
    row = grid[i]
    x = tubelets.clone().requires_grad_()
    factorized_attention(x, spatial, temporal)[0, 1, 6].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 1e-9  # (time, places)
    for t, ax in enumerate(row):
        ax.imshow(video[0, 0, 2 * t], cmap="Greys", vmin=0, vmax=1.6)
        for place in range(16):
            if seen[t, place]:
                corner = (4 * (place % 4) - 0.5, 4 * (place // 4) - 0.5)
                ax.add_patch(
                    plot.plt.Rectangle(
                        corner, 4, 4, facecolor=plot.COLORS[1], alpha=0.55, edgecolor="white"
                    )
                )
        if t == 1:
            ax.add_patch(plot.plt.Rectangle((7.5, 3.5), 4, 4, fill=False, edgecolor="black", lw=2))
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        if i == 0:
            ax.set_title(f"frames {2 * t}–{2 * t + 1}", fontsize=9)
    row[0].set_ylabel(name, fontsize=9)
frames = torch.tensor([1, 2, 4, 8, 16, 32, 64])
plot.curves(
    frames,
    {
        "all with all": (frames * 196.0) ** 2,
        "space, then time": frames * 196.0 * (frames + 196),
    },
    xlabel="frames of 14 × 14 tubelets",
    ylabel="scores in one layer and head",
    logx=True,
    logy=True,
    ax=right.subplots(),
)
plot.caption(
    fig,
    "Shaded: what the framed tubelet sees in one layer. Space, then time reaches everything: "
    "every frame's tubelet at its own place has already seen its own frame.",
)
plot.plt.show()

# %% [markdown]
# ## Flow matching: from noise to data {#flow}
#
# To draw, one needs a map from noise to pictures. Nobody knows which noise belongs to which
# picture, so take any: draw noise $x_0\sim N(0, I)$ and a picture $x_1$ independently, join them by
# a straight line, and let a network learn the speed along it:
#
# $$ x_t = (1-t)\,x_0 + t\,x_1,\qquad \frac{dx_t}{dt} = x_1 - x_0,\qquad L = E\,\lVert
# v_\theta(x_t, t) - (x_1 - x_0)\rVert^2 . $$
#
# Many lines cross at $(x, t)$, and a squared error is least at the mean: $v(x,t) = E[x_1-x_0\mid
# x_t=x]$. **Why does following the mean velocity lead to the data?** Take any smooth function
# $\varphi$ of the state. By the chain rule, and by averaging first over what meets at one place,
#
# $$ \frac{d}{dt}E\,\varphi(x_t) = E\big[\nabla\varphi(x_t)\cdot(x_1-x_0)\big] =
# E\big[\nabla\varphi(x_t)\cdot v(x_t,t)\big]. $$
#
# Points that start as noise and move with $v$ obey the same equation. So at each $t$ they are
# distributed as $x_t$ is, and at $t=1$ as the data. The lines cross, the flow doesn't.


# %% exercise="flow_matching_loss" minutes=12 difficulty=2
def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    pictures: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The mean squared error of the velocity on straight paths: 0-dimensional, minimized.

    pictures: (batch, ...), the data, at t = 1; float32 or float64, which noise, times and loss
    have, too. labels: (batch,), int64, handed on as they are. For each row a noise (standard
    normal) and a time (uniform in [0, 1)) of its own, all drawn from `generator`, which is on the
    CPU. velocity(x, t, labels) is called once, with x like pictures and t of shape (batch,); its
    result is compared with pictures − noise. The mean is over all elements. Gradients flow to what
    velocity holds. pictures is not changed.
    """
    ### BEGIN SOLUTION
    noise = torch.randn(pictures.shape, generator=generator, dtype=pictures.dtype)
    noise = noise.to(pictures.device)
    t = torch.rand(len(pictures), generator=generator, dtype=pictures.dtype).to(pictures.device)
    s = t.reshape(-1, *[1] * (pictures.dim() - 1))
    predicted = velocity((1 - s) * noise + s * pictures, t, labels)
    return (predicted - (pictures - noise)).square().mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one time per row</summary>
#
# t has one axis, the pictures have more. Give t as many axes of size 1 as it takes to multiply.
# </details>

# %% check="flow_matching_loss" points=2
met = []


def standing(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A velocity of 0, which notes what it is asked."""
    met.append((x.clone(), t.clone(), labels.clone()))
    return torch.zeros_like(x)


pictures = torch.full((400, 3), 2.0, dtype=torch.float64)
loss = flow_matching_loss(standing, pictures, torch.arange(400), checks.generator(13))
(x, t, _), *_ = met
assert t.shape == (400,), f"a time for each row, (400,); yours is {tuple(t.shape)}"
drawn = (x - t[:, None] * pictures) / (1 - t[:, None])  # the noise, if x is on the line
checks.drawn(drawn, mean=0.0, std=1.0, what="the noise, solved for from x and t")
checks.close(
    loss, (pictures - drawn).square().mean(), what="the loss of a velocity of 0", rtol=1e-6
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for shape, dtype in [
    ((900, 2, 3), torch.float64),
    ((700, 5), torch.float32),
    ((2000,), torch.float64),
]:
    pictures = checks.randn(*shape, generator=g, dtype=dtype, scale=2.0) + 1.5
    labels = torch.randint(0, 10, (shape[0],), generator=g).to(pictures.device)
    met = []

    def spy(x, t, labels, met=met):
        met.append((x.clone(), t.clone(), labels.clone()))
        return 0.3 * x + t.reshape(-1, *[1] * (x.dim() - 1)) - labels.double().mean().to(x)

    source = checks.generator(15)
    with checks.unchanged(pictures=pictures, labels=labels):
        loss = flow_matching_loss(spy, pictures, labels, source)
    assert len(met) == 1, f"velocity is called once; yours is called {len(met)} times"
    x, t, handed = met[0]
    assert x.dtype == t.dtype == dtype, f"x and t are {x.dtype}, {t.dtype}; pictures are {dtype}"
    assert x.shape == shape, f"x has shape {tuple(x.shape)}, not {shape}"
    assert t.shape == (shape[0],), f"t has shape {tuple(t.shape)}, not ({shape[0]},)"
    checks.close(handed, labels, what="the labels that velocity is given")
    assert 0 <= float(t.min()) <= float(t.max()) < 1, "times are uniform in [0, 1)"
    checks.drawn(t, mean=0.5, std=1 / math.sqrt(12), kurtosis=1.8, what="the times")
    s = t.double().reshape(-1, *[1] * (len(shape) - 1))
    wide = pictures.double()
    noise = (x.double() - s * wide) / (1 - s)
    backwards = (x.double() - (1 - s) * wide) / s
    early = (s < 0.9).expand(shape)
    if (
        abs(float(noise[early].std()) - 1) > 0.2
        and abs(float(backwards[(s > 0.1).expand(shape)].std()) - 1) < 0.2
    ):
        raise AssertionError("x is noise at t = 1: here t = 0 is noise and t = 1 is data.")
    checks.drawn(noise[early], mean=0.0, std=1.0, what="the noise, solved for from x and t")
    per_row = noise.flatten(1) if len(shape) > 1 else noise[:, None]
    if per_row.shape[1] > 1:
        both = (per_row[:, 0] * per_row[:, 1])[(s < 0.9).flatten()]
        checks.drawn(both, mean=0.0, std=1.0, kurtosis=9.0, what="products of noise in one row")
    told = 0.3 * x.double() + s - labels.double().mean()
    target = wide - noise
    checks.close(
        loss,
        (told - target).square().mean(),
        what="the loss",
        rtol=1e-3 if dtype == torch.float32 else 1e-8,
        dtype=dtype,
        mistakes={
            "noise − data, the way back,": (told + target).square().mean(),
            "the data as target": (told - wide).square().mean(),
            "the noise as target": (told - noise).square().mean(),
        },
    )
checks.uses_generator(
    lambda source: flow_matching_loss(
        lambda x, t, labels: x + t[:, None], torch.ones(50, 2), torch.zeros(50).long(), source
    ),
    what="flow_matching_loss",
)
weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
pictures, labels = torch.ones(30, 2, dtype=torch.float64), torch.zeros(30, dtype=torch.long)
(slope,) = torch.autograd.grad(
    flow_matching_loss(lambda x, t, labels: weight * x, pictures, labels, checks.generator(16)),
    weight,
)
losses = [
    float(
        flow_matching_loss(lambda x, t, labels, w=w: w * x, pictures, labels, checks.generator(16))
    )
    for w in (0.7 - 1e-4, 0.7 + 1e-4)
]
checks.close(
    slope,
    torch.tensor((losses[1] - losses[0]) / 2e-4, dtype=torch.float64),
    rtol=1e-6,
    what="the gradient at a weight of the velocity, by differences",
)
### END HIDDEN TESTS

# %% [markdown]
# **An exact case.** For data $N(\mu,\sigma^2)$ everything is Gaussian, $x_t$ has mean $t\mu$
# and variance $(1-t)^2+t^2\sigma^2$, and its covariance with $x_1-x_0$ is $t\sigma^2-(1-t)$. The
# conditional mean of one Gaussian given another is linear:
#
# $$ v(x,t) = \mu + \frac{t\sigma^2-(1-t)}{(1-t)^2+t^2\sigma^2}\,(x-t\mu). $$
#
# At $t=0$ this is $\mu - x$: it points at the mean of the data, whatever the noise.
#
# To sample, start at noise and follow the velocity in small straight steps, as Euler did. The error
# of the whole way shrinks as one over the number of steps.


# %% exercise="sample_euler" minutes=8 difficulty=1
def sample_euler(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    labels: Tensor,
    steps: int,
) -> Tensor:
    """Follows the velocity from t = 0 to t = 1 in `steps` equal Euler steps: like noise.

    noise: (batch, ...), floating; labels: (batch,). velocity(x, t, labels) is called `steps` times,
    with t of shape (batch,) and the dtype of noise: 0, 1/steps, 2/steps … (steps − 1)/steps, all
    rows alike. Computed without a graph, whatever velocity holds. noise is not changed.
    """
    ### BEGIN SOLUTION
    x = noise
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
            x = x + velocity(x, t, labels) / steps
    return x
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where a step looks</summary>
#
# A step from t to t + 1/steps uses the velocity at its start.
# </details>

# %% check="sample_euler" points=2
start = torch.zeros(2, 1)
with checks.kept(noise=start):
    found = sample_euler(
        lambda x, t, labels: t[:, None] + 0 * x, start, torch.zeros(2, dtype=torch.long), 4
    )
checks.close(
    found,
    torch.full((2, 1), 0.375),
    what="four steps with the velocity t, from 0",
    hint="(0 + ¼ + ½ + ¾) / 4",
    mistakes={"t at the end of each step": torch.full((2, 1), 0.625)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(17)
for shape, steps, dtype in [
    ((3, 2), 1, torch.float64),
    ((4,), 5, torch.float32),
    ((2, 3, 2), 12, torch.float64),
    ((2,), 9, torch.float64),  # 9, 10, 49: sums of 1/steps miss 1, or arange's count is off
    ((1,), 10, torch.float64),
    ((1,), 49, torch.float64),
]:
    noise = checks.randn(*shape, generator=g, dtype=dtype)
    labels = torch.randint(0, 5, (shape[0],), generator=g).to(noise.device)
    rate = torch.tensor(0.8, requires_grad=True)
    times, handed = [], []

    def grow(x, t, labels, times=times, handed=handed, rate=rate):
        times.append(t.clone())
        handed.append(labels.clone())
        return rate.to(x) * x

    with checks.kept(noise=noise, labels=labels, rate=rate):
        found = sample_euler(grow, noise, labels, steps)
    assert len(times) == steps, (
        f"velocity is called {steps} times in {steps} steps; yours {len(times)} times (1/steps is "
        "rounded: count the steps, not the time)"
    )
    checks.close(
        found,
        noise.double() * (1 + 0.8 / steps) ** steps,
        what=f"growth at 0.8 in {steps} steps",
        dtype=dtype,
        rtol=1e-5,
    )
    assert not found.requires_grad, "the sample carries a graph: no gradient is needed here"
    asked = torch.arange(steps).double()[:, None].expand(-1, shape[0]) / steps
    checks.close(
        torch.stack(times),
        asked,
        what="the times that velocity is asked at",
        rtol=1e-6,
        dtype=dtype,
    )
    checks.close(torch.stack(handed), labels.expand(steps, -1), what="the labels handed on")


half = sample_euler(lambda x, t, labels: x * t[:, None], torch.ones(2, 1).bfloat16(), labels[:2], 2)
assert half.dtype == torch.bfloat16, f"bfloat16 noise becomes {half.dtype}: keep its dtype"


# Known transport: N(0, 1) to N(2, ½²) takes x₀ to 2 + x₀/2, and Euler's error halves with the step.
def exact(x, t, labels):
    s = t[:, None]
    return 2 + (s / 4 - (1 - s)) / ((1 - s) ** 2 + s**2 / 4) * (x - 2 * s)


noise = checks.randn(50, 1, generator=g, dtype=torch.float64)
labels = torch.zeros(50, dtype=torch.long)
errors = [
    float((sample_euler(exact, noise, labels, n) - (2 + noise / 2)).abs().max())
    for n in (1, 64, 128, 256)
]
checks.close(
    sample_euler(exact, noise, labels, 1),
    torch.full_like(noise, 2.0),
    what="one step of the Gaussian transport",
    hint="At t = 0 the velocity points at the mean",
)
for large, small in itertools.pairwise(errors[1:]):
    assert 1.8 < large / small < 2.2, (
        f"twice the steps should halve the error of the Gaussian transport; yours are {errors[1:]}"
    )
### END HIDDEN TESTS

# %% [markdown]
# In one dimension one can see it. The data are two narrow bells, at −2 and 1; the exact velocity is
# the mean of the two Gaussian ones, weighted by how likely each bell is at $(x,t)$.

# %% tags=["experiment", "figure"]
# Figure: lines that cross, a flow that doesn't, and what few steps do
bells = ((-2.0, 0.3, 0.4), (1.0, 0.5, 0.6))  # mean, deviation, share


def two_bells(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The exact velocity, for x (batch,)."""
    above, below = torch.zeros_like(x), torch.zeros_like(x)
    for mean, deviation, share in bells:
        variance = (1 - t) ** 2 + t**2 * deviation**2
        likely = share * torch.exp(-((x - t * mean) ** 2) / (2 * variance)) / variance.sqrt()
        slope = (t * deviation**2 - (1 - t)) / variance
        above += likely * (mean + slope * (x - t * mean))
        below += likely
    return above / below


generator = torch.Generator().manual_seed(3)
noise = torch.randn(4000, generator=generator, dtype=torch.float64)
bell = (torch.rand(4000, generator=generator) < 0.6).long()
mean, deviation = (torch.tensor([b[i] for b in bells]).double()[bell] for i in (0, 1))
points = mean + deviation * torch.randn(4000, generator=generator, dtype=torch.float64)
fig, axes = plot.plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1, 1, 1.1])
for a, b in zip(noise[:40], points[:40], strict=True):
    axes[0].plot([0, 1], [a, b], "-", color="#777777", linewidth=0.8)
axes[0].set_title("lines of the loss")
t = torch.linspace(0, 1, 101, dtype=torch.float64)
path, paths = noise[:40], [noise[:40]]
for now in t[:-1]:
    path = path + two_bells(path, now.expand(40), None) / 100
    paths.append(path)
axes[1].plot(t, torch.stack(paths), "-", color=plot.COLORS[0], linewidth=0.8)
axes[1].set_title("the flow they average to")
for ax in axes[:2]:
    ax.set(xlabel="t (0 noise, 1 data)", ylabel="x", ylim=(-3.3, 3.3))
edges = torch.linspace(-3.2, 3.2, 65).tolist()
for steps, dash in ((2, ":"), (4, "--"), (64, "-")):
    sample = sample_euler(two_bells, noise, bell, steps)
    axes[2].hist(
        sample,
        edges,
        density=True,
        histtype="step",
        linestyle=dash,
        linewidth=1.6,
        label=f"{steps} steps",
        color={2: "#999999", 4: plot.COLORS[1], 64: plot.COLORS[0]}[steps],
    )
axes[2].hist(points, edges, density=True, color="#dddddd", label="data")
axes[2].set(xlabel="x at t = 1", ylabel="density")
axes[2].set_title("samples")
axes[2].legend(fontsize=8)
plot.caption(
    fig,
    "Straight lines between random pairs cross; the flow cannot, and bends. With few steps the "
    "first is long, and sends everything towards the mean of the data, where there are none.",
)
plot.plt.show()

# %% [markdown]
# ### The network: a Transformer steered by time and label
#
# DiT (Peebles and Xie 2022) is a vision Transformer over patches that must be told $t$ and the
# label. It doesn't add them to the tokens. A vector $c$ (time plus label) sets the *norms*:
# LayerNorm without its own weight and bias, then a scale and a shift computed from $c$; and each
# branch gets a gate,
#
# $$ x \leftarrow x + g_1\odot\mathrm{attn}\big((1+s_1)\odot\mathrm{LN}(x)+b_1\big),\qquad x
# \leftarrow x + g_2\odot\mathrm{mlp}\big((1+s_2)\odot\mathrm{LN}(x)+b_2\big). $$
#
# All six come from one linear layer, and that layer starts at zero (adaLN-Zero). So every gate
# is 0 and each block starts as the identity, whatever its other weights. Among the ways to hand
# over $c$ that the paper compares, this one was the best and needs the least computation (though
# not the fewest parameters).


# %% exercise="dit_block" minutes=18 difficulty=2
class DiTBlock(nn.Module):
    """A Transformer block with adaLN-Zero. The parts that it has are given, by name.

    forward(x, c): x (batch, tokens, dim), c (batch, dim) → like x. `modulation`, of silu(c), gives
    6·dim numbers per row: shift, scale and gate of attention, then shift, scale and gate of
    the MLP, dim each, in this order, the same for all tokens of the row. With
    modulate(x) = LN(x)·(1 + scale) + shift, where LN is LayerNorm over dim without weight and bias,
    eps = 1e-6:
    x + gate·attention(modulate(x)), and of that sum y: y + gate·mlp(modulate(y)), each with its own
    three. Attention is full (no mask), scaled by 1/√(dim / heads): `qkv` gives queries, keys and
    values in this order, dim each, head h owning the h-th run of dim / heads of them; `proj` comes
    last. F.scaled_dot_product_attention may be used.

    A new block is the identity: weight and bias of `modulation` are zero. The other parts keep
    their usual random start. Inputs are not changed. Any floating dtype, that of the parameters.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)
        ### BEGIN SOLUTION
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        ### END SOLUTION

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        dim = x.shape[-1]
        modulated = self.modulation(F.silu(c))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulated.chunk(6, dim=-1)
        steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.qkv(steered).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(mixed)
        steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(steered)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the same for all tokens</summary>
#
# The six are (batch, dim), the tokens (batch, tokens, dim). Put an axis of size 1 in the middle.
# </details>
#
# <details><summary>Hint: heads</summary>
#
# `unflatten` splits the last axis of qkv into (3, heads, head_dim) in one go.
# </details>

# %% check="dit_block" points=1
block = DiTBlock(8, 2)
x, c = checks.randn(2, 3, 8, generator=checks.generator(18), device="cpu"), torch.ones(2, 8)
checks.close(block(x, c), x, what="a new block's output", hint="All gates start at 0")
### BEGIN HIDDEN TESTS
for start in (block.modulation.weight, block.modulation.bias):
    assert not bool(start.any()), "modulation starts at zero, weight and bias"
for name, part in (("qkv", block.qkv), ("proj", block.proj), ("mlp", block.mlp[0])):
    assert float(part.weight.detach().std()) > 0.05, f"{name} keeps its usual random start"
# At the start only the gates learn: the gradient of everything behind a gate of 0 is 0.
g = checks.generator(19)
x, c = (
    checks.randn(3, 4, 8, generator=g, device="cpu"),
    checks.randn(3, 8, generator=g, device="cpu"),
)
(block(x, c) * checks.randn(3, 4, 8, generator=g, device="cpu")).sum().backward()
rows = block.modulation.weight.grad.reshape(6, 8, 8).abs().amax((1, 2))
assert bool((rows[[2, 5]] > 1e-6).all()), (
    f"at the start gates 3 and 6 of modulation have a gradient; the largest entries are {rows}"
)
checks.close(
    rows[[0, 1, 3, 4]], torch.zeros(4), what="the gradient at scales and shifts of a new block"
)
checks.close(block.qkv.weight.grad, torch.zeros(24, 8), what="the gradient at qkv of a new block")
### END HIDDEN TESTS

# %% check="dit_block" points=2
block = DiTBlock(4, 1)
with torch.no_grad():
    block.modulation.bias[8:12] = 1.0  # the gate of attention opens
x = checks.randn(1, 3, 4, generator=checks.generator(20), device="cpu")
heard = block(x, torch.zeros(1, 4)) - x
v = block.qkv(F.layer_norm(x, (4,), eps=1e-6))[..., 8:]
alone = block(x[:, :1], torch.zeros(1, 4)) - x[:, :1]
checks.close(alone, block.proj(v[:, :1]), what="attention of one token with gate 1, c = 0")
assert not torch.allclose(heard[:, :1], alone), "with three tokens the first sees the others"
### BEGIN HIDDEN TESTS
g = checks.generator(21)


def by_definition(part, heads, x, c):
    """The block of a state_dict, row by row and head by head, in float64."""
    dim = x.shape[-1]
    part = {name: value.detach().double() for name, value in part.items()}

    def linear(name, v):
        return v @ part[f"{name}.weight"].T + part[f"{name}.bias"]

    def steer(v, shift, scale):
        centered = v - v.mean(-1, keepdim=True)
        return (
            centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale)
            + shift
        )

    rows = []
    for row, told in zip(x.double(), c.double(), strict=True):
        six = linear("modulation", told / (1 + (-told).exp())).split(dim)
        projected = linear("qkv", steer(row, six[0], six[1]))
        size, out = dim // heads, []
        for h in range(heads):
            q, k, v = (
                projected[:, i * dim + h * size : i * dim + (h + 1) * size] for i in range(3)
            )
            out.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
        row = row + six[2] * linear("proj", torch.cat(out, dim=-1))
        hidden = linear("mlp.0", steer(row, six[3], six[4]))
        hidden = (
            0.5 * hidden * (1 + (math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)).tanh())
        )
        rows.append(row + six[5] * linear("mlp.2", hidden))
    return torch.stack(rows)


for dim, heads, batch, tokens, dtype in [
    (8, 2, 3, 5, torch.float64),
    (6, 3, 2, 1, torch.float32),
    (4, 1, 2, 7, torch.float64),
]:
    torch.manual_seed(dim)
    block = DiTBlock(dim, heads).to(dtype)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(checks.randn(*p.shape, generator=g, device="cpu", scale=0.6))
    x = (
        checks.randn(batch, tokens, dim, generator=g, dtype=dtype, device="cpu") * 1e-2
    )  # eps counts
    x[-1] *= 300
    c = checks.randn(batch, dim, generator=g, dtype=dtype, device="cpu", scale=1.5)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    with checks.unchanged(x=x, c=c):
        found = block(x, c)
    checks.close(
        found,
        by_definition(state, heads, x, c),
        what=f"a block of width {dim}, {heads} heads",
        dtype=dtype,
        rtol=1e-4 if dtype == torch.float32 else 1e-9,
    )
    checks.gradients(
        lambda x, c, block=block: block(x, c),
        lambda x, c, state=state, heads=heads: by_definition(state, heads, x, c),
        x,
        c,
        names=("x", "c"),
        rtol=1e-3 if dtype == torch.float32 else 1e-8,
    )
half = DiTBlock(8, 2).bfloat16()
found = half(torch.ones(1, 2, 8).bfloat16(), torch.ones(1, 8).bfloat16())
assert found.dtype == torch.bfloat16, f"bfloat16 in, bfloat16 out; yours is {found.dtype}"
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: how many steps does a digit take?
#
# The whole network, given: $2\times2$ patches of the $8\times8$ pictures are 16 tokens, 64 wide;
# time and label make $c$; three of your blocks; a last steered norm and a projection that starts at
# zero. The data are the course's 1,797 handwritten digits, scaled to −1 … 1. A judge (a support
# vector classifier, fitted to the real digits) reads what is drawn.


# %%
class DiT(nn.Module):
    """A velocity field for pictures (batch, 8, 8), told t (batch,) and a label (batch,)."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 4)
        for part in (self.last, self.out):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        tokens = self.patch(tokens) + self.place
        c = self.time(waves(1000 * t, self.width)) + self.label(labels)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.last(F.silu(c))[:, None].chunk(2, dim=-1)
        tokens = F.layer_norm(tokens, (self.width,), eps=1e-6) * (1 + scale) + shift
        return self.out(tokens).reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 8, 8)


# %% [markdown]
# **Predict first**, for 1, 2, 4, 8 and 32 steps: which share of the pictures will the judge read as
# the digit that was asked for? And how much will pictures of one digit differ from one another,
# compared with real ones? The exact velocity at $t=0$, above, has a say in both.

# %% tags=["experiment"]
from sklearn.svm import SVC

torch.set_num_threads(1)
images, classes = data.digits()
scaled = 2 * images - 1
judge = SVC().fit(images[::2].flatten(1), classes[::2])
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
dit = DiT()
adam = torch.optim.AdamW(dit.parameters(), betas=(0.9, 0.95))
flow_curve = []
for step in range(300):
    set_rate(adam, 3e-3, step, 300)
    rows = torch.randint(0, len(scaled), (64,), generator=generator)
    error = flow_matching_loss(dit, scaled[rows], classes[rows], generator)
    adam.zero_grad()
    error.backward()
    adam.step()
    flow_curve.append(error.item())


def spread(pictures: Tensor, labels: Tensor) -> float:
    """The mean deviation of a pixel among pictures of one label."""
    return float(torch.stack([pictures[labels == k].std(0) for k in range(10)]).mean())


asked = torch.arange(300) % 10
noise = torch.randn(300, 8, 8, generator=generator)
counts = (1, 2, 4, 8, 32)
drawings = {n: sample_euler(dit, noise, asked, n) for n in counts}
real = spread(scaled, classes)
read = {
    n: (torch.tensor(judge.predict(((d + 1) / 2).flatten(1))) == asked).float().mean()
    for n, d in drawings.items()
}
varied = {n: spread(d, asked) / real for n, d in drawings.items()}
print(f"{sum(p.numel() for p in dit.parameters()):,} parameters")
known = judge.score(images[1::2].flatten(1), classes[1::2])
print(f"the judge on real digits it hasn't seen: {known:.1%}")
print(f"loss {sum(flow_curve[:10]) / 10:.2f} at first, {sum(flow_curve[-50:]) / 50:.3f} at the end")
print("steps   read as asked   spread (1 = real digits)")
for n in counts:
    print(f"{n:5}   {read[n]:13.0%}   {varied[n]:.2f}")
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: from noise to digits, and what few steps cost
fig = plot.plt.figure(figsize=(11, 4.4))
left, right = fig.subfigures(1, 2, width_ratios=[1.7, 1])
moments = (0, 8, 16, 20, 24, 28, 32)
x, strip = noise[:10], [noise[:10]]
for i in range(32):
    with torch.no_grad():
        x = x + dit(x, torch.full((10,), i / 32), asked[:10]) / 32
    strip.append(x)
rows = [(f"t = {m / 32:.2f}", strip[m]) for m in moments] + [("1 step", drawings[1][:10])]
grid = left.subplots(len(rows), 10, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
for axes, (name, pictures) in zip(grid, rows, strict=True):
    for ax, picture in zip(axes, pictures, strict=True):
        ax.imshow(picture, cmap="Greys", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
plot.curves(
    counts,
    {"read as asked": [float(read[n]) for n in counts], "spread, of real": list(varied.values())},
    xlabel="Euler steps",
    ylabel="share",
    logx=True,
    ax=right.subplots(),
)
plot.caption(
    fig,
    "Left: ten noises, asked to become 0 to 9; the last row took one step. Until t is near 0.5 the "
    "noise is louder than the picture. Right: 300 pictures for each point.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** One step draws digits that the judge reads without fail, and that are nearly
# all alike: at $t=0$ the velocity points at the mean of the data, here of the digit asked for, and
# the mean of the threes is a fine three. By the judge alone, one step would be the best sampler.
# With more steps the pictures spread until they differ as real ones do, and some of them are badly
# written. So it was in all five seeds: the more steps, the fewer were read as asked (at 32 steps
# still nine in ten), and at one step the spread was less than half of the real one. Quality
# and variety have to be measured together. The Fréchet distance of image papers does, as it
# compares the means *and* the covariances of features.

# %% [markdown]
# ## Masked diffusion: text in any order {#masked}
#
# Text has no half-noisy tokens. Its noise is the mask: at time $t$ each token is, independently,
# masked with probability $t$. A bidirectional network $p_\theta$ sees what is left and predicts all
# masked tokens at once. That is BERT (lesson 16), but for three things: what is chosen always
# becomes the mask, the share of masks is drawn anew from $(0, 1]$ for every text, and the loss is
# weighted:
#
# $$ L(x) = E_{t\sim U(0,1]}\;E_{M}\;\frac1t\sum_{i\in M}-\log p_\theta(x_i\mid x_{\setminus M}).
# $$
#
# **Why $1/t$?** Because then $L$ bounds $-\log p(x)$. Fix a set $M$ of $m$ of the $n$ places. It is
# drawn at time $t$ with probability $t^m(1-t)^{n-m}$, so in all it has the weight
#
# $$ \int_0^1 \frac1t\,t^m(1-t)^{n-m}\,dt = \frac{(m-1)!\,(n-m)!}{n!} = \frac1{m\binom nm}. $$
#
# A BERT with a fixed share of masks has no such weights, and its loss does not bound the text's
# surprise. What this one bounds, and how closely, comes after the exercise.


# %% exercise="masked_diffusion_loss" minutes=15 difficulty=2
def masked_diffusion_loss(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    t: Tensor,
    mask_id: int,
    generator: torch.Generator,
) -> Tensor:
    """LLaDA's loss in nats a token: 0-dimensional, minimized.

    tokens: (batch, length), int64, on the CPU, none of them mask_id. t: (batch,), floating, in
    (0, 1]. Each token of row b is replaced by mask_id with probability t[b], independently of all
    others; the draws come from `generator`. At t = 1 all are. model(inputs) is called once, on the
    masked tokens (batch, length), and returns logits (batch, length, vocab), any floating format;
    logits[:, i] predict the token at place i itself, there is no shift.

    The loss is Σ −log p(token) / t over the masked tokens, divided by batch·length, masked or not.
    A row without masks adds 0. Computed and returned in float32 for half-precision logits, else in
    their dtype, whatever the format of t. Gradients flow to what model holds. Inputs are not
    changed.

    Example: two rows of two tokens, t = [1, 0.5], in the second row only the first token is masked,
    and the model gives every token the probability ¼: (2·ln 4 / 1 + 1·ln 4 / 0.5) / 4 = ln 4.
    """
    ### BEGIN SOLUTION
    hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
    logits = model(tokens.masked_fill(hidden, mask_id))
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1)
    surprise = -log_p.gather(-1, tokens[..., None])[..., 0]
    return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the right divisor</summary>
#
# With t small few tokens are masked, and 1/t makes up for it. Whoever divides by the number of
# masked tokens makes up for it twice.
# </details>

# %% check="masked_diffusion_loss" points=2
seen = []


def even(inputs: Tensor) -> Tensor:
    """Probability ¼ for each of four tokens; notes what it is asked."""
    seen.append(inputs.clone())
    return torch.zeros(*inputs.shape, 4)


tokens, t = torch.tensor([[0, 1, 2, 1]] * 300), torch.full((300,), 0.25)
loss = masked_diffusion_loss(even, tokens, t, 3, checks.generator(22))
masked = seen[0] == 3
assert bool((seen[0][~masked] == tokens[~masked]).all()), "what isn't masked stays as it is"
share = float(masked.float().mean())
assert 0.17 < share < 0.33, f"at t = 0.25 a quarter is masked; yours is {share:.2f}"
checks.close(
    loss,
    torch.tensor(share / 0.25 * math.log(4)),
    what="the loss of a model that guesses",
    mistakes={
        "no 1/t": torch.tensor(share * math.log(4)),
        "dividing by the number of masked tokens": torch.tensor(math.log(4) / 0.25),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(23)
for batch, length, vocab, dtype in [
    (40, 7, 5, torch.float64),
    (3, 50, 6, torch.float32),
    (200, 1, 3, torch.float64),
    (30, 9, 4, torch.bfloat16),
    (30, 9, 4, torch.float16),
]:
    tokens = torch.randint(0, vocab - 1, (batch, length), generator=g)
    tokens[tokens == 1] = vocab - 1  # the mask's id is 1, in the middle
    t = torch.rand(batch, generator=g) * 0.9 + 0.1
    t[0] = 1.0
    t = t.double() if dtype == torch.float32 else t  # its format isn't the logits'
    bend = checks.randn(vocab, length, vocab, generator=g, device="cpu")
    seen = []

    def model(inputs, bend=bend, seen=seen, dtype=dtype):
        """Logits that depend on the token at each place and on the one before."""
        seen.append(inputs.clone())
        places = torch.arange(inputs.shape[1])
        return (bend[inputs, places] + 0.5 * bend[inputs.roll(1, 1), places]).to(dtype)

    with checks.unchanged(tokens=tokens, t=t):
        loss = masked_diffusion_loss(model, tokens, t, 1, g)
    assert len(seen) == 1, f"model is called once; yours is called {len(seen)} times"
    masked = seen[0] == 1
    assert bool((seen[0] == tokens)[~masked].all()), "what isn't masked stays as it is"
    assert bool(masked[0].all()), "at t = 1 every token is masked"
    logits = model(seen[0]).double()
    total = torch.zeros((), dtype=torch.float64)
    flat = total.clone()
    for b, i in masked.nonzero().tolist():
        nats = logits[b, i].logsumexp(0) - logits[b, i, tokens[b, i]]
        total, flat = total + nats / t[b].double(), flat + nats
    checks.close(
        loss,
        total / (batch * length),
        what=f"the loss of {batch} × {length} tokens",
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        rtol=1e-5,
        mistakes={
            "no 1/t": flat / (batch * length),
            "the mean over masked tokens": total / max(int(masked.sum()), 1),
        },
    )
rare = torch.tensor([0.1, 0.5, 0.8]).repeat_interleave(400)
seen = []
masked_diffusion_loss(
    lambda inputs: (seen.append(inputs.clone()), torch.zeros(*inputs.shape, 3))[1],
    torch.zeros(1200, 20, dtype=torch.long),
    rare,
    2,
    g,
)
masked = (seen[0] == 2).double()
for i, share in enumerate((0.1, 0.5, 0.8)):
    part = masked[400 * i : 400 * (i + 1)]
    checks.drawn(part, mean=share, std=None, what=f"the share of masks at t = {share}")
    spread = float(part.sum(1).var())
    due = 20 * share * (1 - share)
    assert 0.5 * due < spread < 1.6 * due, (
        f"the number of masks in a row of 20 has variance {spread:.1f}; tokens that are masked "
        f"independently give {due:.1f}"
    )
checks.uses_generator(
    lambda source: masked_diffusion_loss(
        lambda inputs: torch.sin(inputs.cumsum(1)[..., None] * torch.arange(1.0, 8.0)),
        torch.arange(60).reshape(3, 20) % 6,
        torch.full((3,), 0.5),
        6,
        source,
    ),
    what="masked_diffusion_loss",
)
weight = checks.randn(4, 4, generator=g, dtype=torch.float64, device="cpu").requires_grad_()
tokens, t = torch.randint(0, 3, (5, 6), generator=g), torch.full((5,), 0.7, dtype=torch.float64)
seen = []
loss = masked_diffusion_loss(
    lambda inputs: (seen.append(inputs.clone()), weight[inputs])[1], tokens, t, 3, g
)
(slope,) = torch.autograd.grad(loss, weight)
masked = seen[0] == 3
due = (weight.detach()[3].softmax(0) - F.one_hot(tokens, 4)[masked]).sum(0) / 0.7 / 30
checks.close(slope[3], due, what="the gradient at the logits of masked tokens")
checks.close(
    slope[:3], torch.zeros(3, 4).double(), what="the gradient at tokens that aren't masked"
)
calm = masked_diffusion_loss(
    lambda inputs: torch.where(inputs[..., None] == 3, 0.0, -torch.inf) + torch.zeros(4),
    tokens,
    torch.full((5,), 1e-3),
    3,
    checks.generator(24),
)
assert bool(torch.isfinite(calm)), "logits of −inf at a token that isn't masked make the loss NaN"
### END HIDDEN TESTS

# %% [markdown]
# **What the loss bounds.** Reveal the tokens of a text one at a time, in a random order. The step
# in which $m$ are hidden meets each set $M$ of that size with probability $1/\binom nm$, and
# reveals each of its places with probability $1/m$. So the weight of each $-\log p_\theta(x_i\mid
# x_{\setminus M})$ is the chance that this prediction is made, and
#
# $$ L(x) = E_{\text{order}}\sum_{k=1}^{n} -\log p_\theta(x_{o_k}\mid x_{o_1},\dots,x_{o_{k-1}})
# \;\ge\; -\log E_{\text{order}}\,p_\theta(x\mid\text{order}), $$
#
# by Jensen. The loss of masked diffusion is that of a model which writes in all orders. If its
# predictions fit together (if they are the conditionals of *one* distribution) all orders agree,
# and the bound is the log-likelihood itself.
#
# On a short text the bound needs no sampling: list all sets of places.


# %% exercise="exact_bound" minutes=18 difficulty=2 path="more"
def exact_bound(model: Callable[[Tensor], Tensor], tokens: Tensor, mask_id: int) -> Tensor:
    """The loss of masked diffusion, exactly, in nats a text: (batch,).

    tokens: (batch, length), int64, length from 1 to 10, none of them mask_id. model as in
    `masked_diffusion_loss`, its logits float32 or float64; it may be called as often as you like,
    each time on (batch, length) tokens: row b is row b of tokens, with masks.

    For each row the sum, over all non-empty sets M of places, of 1 / (m·C(length, m)) times
    Σ −log p(token i | the row with M masked) over i in M, where m is M's size. This is length times
    the expectation of `masked_diffusion_loss` of that row with t uniform. In the dtype of the
    logits. Gradients flow to what model holds. tokens is not changed.
    """
    ### BEGIN SOLUTION
    length = tokens.shape[1]
    total = 0.0
    for m in range(1, length + 1):
        for places in itertools.combinations(range(length), m):
            inputs = tokens.clone()
            inputs[:, list(places)] = mask_id
            log_p = model(inputs).log_softmax(-1)
            nats = -log_p.gather(-1, tokens[..., None])[..., 0][:, list(places)].sum(1)
            total = total + nats / (m * math.comb(length, m))
    return total
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all sets</summary>
#
# `itertools.combinations(range(length), m)` lists the sets of size m.
# </details>


# %% check="exact_bound" points=2
def guess(inputs: Tensor) -> Tensor:
    """Knows nothing: probability ½ for each of two tokens, and 0 for the mask."""
    return torch.tensor([0.0, 0.0, -torch.inf]).expand(*inputs.shape, 3)


bound = exact_bound(guess, torch.tensor([[0, 1, 1], [1, 1, 0]]), 2)
checks.close(
    bound,
    torch.full((2,), 3 * math.log(2)),
    what="the bound of a model that guesses, three tokens",
    mistakes={"nats a token": torch.full((2,), math.log(2))},
)


### BEGIN HIDDEN TESTS
def surprised(inputs: Tensor) -> Tensor:
    """As `guess` at masks; a token that it can see has probability 0."""
    return torch.zeros(*inputs.shape, 3).scatter(-1, inputs[..., None], -torch.inf)


checks.close(
    exact_bound(surprised, torch.tensor([[0, 1, 1], [1, 1, 0]]), 2),
    torch.full((2,), 3 * math.log(2)),
    what="the bound of a model that gives tokens it sees probability 0",
    hint="Places outside M do not count: 0 · ∞ is NaN, so leave them out",
)
g = checks.generator(25)


def conditionals(joint):
    """A model whose predictions are all conditionals of one distribution of three tokens."""
    size = joint.shape[0]

    def model(inputs):
        rows = []
        for row in inputs.tolist():
            p, logits = joint, []
            for place, token in enumerate(row):
                if token != size:
                    only = F.one_hot(torch.tensor(token), size).to(p)
                    p = p * only.reshape([-1 if axis == place else 1 for axis in range(3)])
            for place in range(3):
                others = [axis for axis in range(3) if axis != place]
                logits.append(p.sum(others).log())
            rows.append(F.pad(torch.stack(logits), (0, 1), value=-torch.inf))
        return torch.stack(rows)

    return model


# Where all predictions fit together, the bound is −log p itself: for all 27 texts of three tokens.
joint = torch.rand(3, 3, 3, generator=g, dtype=torch.float64) + 0.01
joint = joint / joint.sum()
texts = torch.cartesian_prod(*[torch.arange(3)] * 3)
with checks.unchanged(tokens=texts):
    found = exact_bound(conditionals(joint), texts, 3)
checks.close(
    found,
    -joint.flatten().log(),
    what="the bound of a consistent model, against −log p",
    hint="Predictions that fit together make the bound tight",
)
# A model that doesn't fit together: the mean over all orders, and above −log of their mean.
for length, vocab, dtype in [(3, 4, torch.float64), (4, 3, torch.float32), (1, 3, torch.float64)]:
    bend = checks.randn(
        vocab, length, vocab, generator=g, dtype=dtype, device="cpu"
    ).requires_grad_()
    mask_id = 1

    def model(inputs, bend=bend):
        places = torch.arange(inputs.shape[1])
        own = bend[inputs, places]
        return own + 0.7 * bend[inputs.roll(1, 1), places] * bend[inputs.roll(-1, 1), places]

    texts = torch.randint(0, vocab - 1, (4, length), generator=g)
    texts[texts == mask_id] = vocab - 1
    orders = []
    for order in itertools.permutations(range(length)):
        inputs, nats = torch.full_like(texts, mask_id), torch.zeros(4, dtype=torch.float64)
        for place in order:
            log_p = model(inputs).detach().double().log_softmax(-1)[:, place]
            nats = nats - log_p.gather(1, texts[:, place, None])[:, 0]
            inputs = inputs.clone()
            inputs[:, place] = texts[:, place]
        orders.append(nats)
    orders = torch.stack(orders)
    found = exact_bound(model, texts, mask_id)
    checks.close(
        found, orders.mean(0), what=f"the bound of {length} tokens, against all orders", dtype=dtype
    )
    if length > 1:
        (slope,) = torch.autograd.grad(found.sum(), bend)
        assert bool(slope.any()), "no gradient reaches the model"
# Against the integral over t, by Gauss and Legendre: exact for polynomials.
nodes, shares = np.polynomial.legendre.leggauss(8)
texts = torch.tensor([[0, 2, 2, 0]])
bend = checks.randn(3, 4, 3, generator=g, dtype=torch.float64, device="cpu")
total = 0.0
for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
    for hidden in itertools.product((False, True), repeat=4):
        m = sum(hidden)
        if m:
            inputs = texts.masked_fill(torch.tensor([hidden]), 1)
            log_p = bend[inputs, torch.arange(4)].log_softmax(-1)
            nats = -sum(float(log_p[0, i, texts[0, i]]) for i in range(4) if hidden[i])
            total += share * node ** (m - 1) * (1 - node) ** (4 - m) * nats
checks.close(
    exact_bound(lambda inputs: bend[inputs, torch.arange(4)], texts, 1),
    torch.tensor([total], dtype=torch.float64),
    what="the bound of four tokens, against the integral over t",
)
### END HIDDEN TESTS

# %% [markdown]
# ### Writing by unmasking
#
# Start with masks, predict all of them, keep some, mask the rest again, repeat. How many are kept
# in a step is fixed, so that after the last none is masked. Which ones? *Random* follows the
# derivation: the order is random. *Low confidence remasking*, LLaDA's better choice, keeps those
# whose drawn token was the most probable. What is kept stays.
#
# Tokens that are kept in the same step are drawn independently of one another. That is the price of
# speed: with one step, each token comes from its own marginal.


# %% exercise="sample_masked" minutes=20 difficulty=3 path="more"
def sample_masked(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask_id: int,
    steps: int,
    generator: torch.Generator,
    remasking: str = "random",
) -> Tensor:
    """Fills the masks of (batch, length) tokens in `steps` steps; what isn't masked stays.

    tokens: int64, on the CPU. Each step calls model once, on the tokens as they are by then (batch,
    length), and gets logits (batch, length, vocab), float32 or float64. For every masked place a
    token is drawn from their softmax, in which mask_id has probability 0, independently of the
    other places. A row with n masks at the outset keeps, in step s = 0, 1 …, n // steps of the
    drawn tokens, and one more where s < n % steps; all others are masked again. Kept are

    - "random": a uniformly random subset,
    - "low_confidence": those whose drawn token has the highest probability in that softmax, without
      the mask (of exactly equal ones, the leftmost),

    and any other word raises ValueError before model is called. Rows may differ in their number of
    masks, which may be 0 or below `steps`. All draws come from `generator`, on the CPU. Computed
    without a graph. Returns int64 tokens; the given ones are not changed.
    """
    ### BEGIN SOLUTION
    if remasking not in ("random", "low_confidence"):
        raise ValueError(f"remasking is 'random' or 'low_confidence', not {remasking!r}")
    tokens = tokens.clone()
    outset = (tokens == mask_id).sum(1)
    for s in range(steps):
        hidden = tokens == mask_id
        with torch.no_grad():
            logits = model(tokens).double()
        never = torch.arange(logits.shape[-1]) == mask_id
        p = logits.masked_fill(never, -torch.inf).softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(tokens.shape)
        if remasking == "random":
            rank = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
        else:
            rank = p.gather(-1, drawn[..., None])[..., 0]
        order = rank.masked_fill(~hidden, -1.0).argsort(dim=1, descending=True, stable=True)
        keep = outset // steps + (s < outset % steps)
        best = order.argsort(dim=1) < keep[:, None]  # the places of the first `keep` in each row
        tokens = torch.where(best & hidden, drawn, tokens)
    return tokens
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the best few of each row</summary>
#
# Give every masked place a number (random, or its confidence) and every other place −1. Sort each
# row. `argsort` of `argsort` is the rank of each place.
# </details>


# %% check="sample_masked" points=1
def knows(inputs: Tensor) -> Tensor:
    """Is sure that place i holds the token i."""
    return 50.0 * F.one_hot(torch.arange(inputs.shape[1]), 6).float().expand(len(inputs), -1, -1)


start = torch.tensor([[5, 5, 4, 5], [5, 3, 5, 2]])
for how in ("random", "low_confidence"):
    checks.close(
        sample_masked(knows, start, 5, 2, torch.Generator().manual_seed(0), how),
        torch.tensor([[0, 1, 4, 3], [0, 3, 2, 2]]),
        what=f"what a sure model writes, {how}",
        hint="What isn't masked stays",
    )
### BEGIN HIDDEN TESTS
g = checks.generator(26)
for how in ("random", "low_confidence"):
    for steps, masks in [(1, (4, 0)), (3, (7, 2)), (5, (5, 1)), (4, (8, 3))]:
        start = torch.randint(2, 6, (2, 8), generator=g)
        for row, n in enumerate(masks):
            start[row, torch.randperm(8, generator=g)[:n]] = 1
        seen = []

        def model(inputs, seen=seen):
            seen.append(inputs.clone())
            return torch.zeros(*inputs.shape, 6)

        with checks.unchanged(tokens=start):
            found = sample_masked(model, start, 1, steps, g, how)
        assert len(seen) == steps, f"model is called once a step, {steps} times; yours {len(seen)}"
        assert bool((found != 1).all()), "masks are left, or the mask was drawn"
        assert bool((found == start)[start != 1].all()), "what isn't masked stays"
        for before, after in itertools.pairwise([*seen, found]):
            assert bool((after == before)[before != 1].all()), "what was kept stays"
        left = torch.stack([(inputs == 1).sum(1) for inputs in seen])
        due = [
            [n - sum(n // steps + (s < n % steps) for s in range(i)) for n in masks]
            for i in range(steps)
        ]
        checks.close(
            left, torch.tensor(due), what=f"the masks left before each of {steps} steps, {how}"
        )
seen = []


def asked_in_vain(inputs):
    seen.append(inputs)
    return torch.zeros(*inputs.shape, 6)


checks.raises(
    ValueError, sample_masked, asked_in_vain, start, 1, 2, g, "high", because="no such word"
)
assert not seen, "an unknown word for `remasking` is refused before model is called"
for how in ("random", "low_confidence"):
    checks.uses_generator(
        lambda source, how=how: sample_masked(
            lambda inputs: torch.zeros(*inputs.shape, 9), torch.full((4, 30), 8), 8, 3, source, how
        ),
        what=f"sample_masked, {how}",
    )
hot = torch.zeros(6, requires_grad=True)
found = sample_masked(lambda inputs: hot.expand(*inputs.shape, 6), start, 1, 2, g)
assert found.dtype == torch.int64, f"the tokens are int64; yours are {found.dtype}"
# Low confidence: place i is even among so many tokens, so its draw has a probability of one in
# that many, whatever it is. The surest places are kept first. (Place 3 would be the least sure if
# the mask, which cannot be drawn, had its share.)
choices = torch.tensor([6, 2, 4, 1, 3])
seen = []


def steady(inputs):
    seen.append(inputs.clone())
    out = torch.where(torch.arange(8) < choices[:, None], 0.0, -torch.inf)
    out[3, 7] = 3.0
    return out.expand(len(inputs), 5, 8)


sample_masked(steady, torch.full((2, 5), 7), 7, 5, g, "low_confidence")
kept = [((a == 7) & (b != 7)).nonzero()[:, 1].tolist() for a, b in itertools.pairwise(seen)]
assert kept == [[3, 3], [1, 1], [4, 4], [2, 2]], (
    f"with chances of {choices.tolist()} to one the places 3, 1, 4, 2 are kept first; yours: {kept}"
)
seen.clear()
sample_masked(steady, torch.tensor([[7, 0, 7, 1, 7]]), 7, 3, g, "low_confidence")
kept = [int(((a == 7) & (b != 7))[0].nonzero()[0]) for a, b in itertools.pairwise(seen)]
assert kept == [4, 2], f"of the masked places 0, 2, 4 the surest first: 4, 2; yours are {kept}"
seen.clear()
sample_masked(
    lambda inputs: (seen.append(inputs.clone()), torch.zeros(*inputs.shape, 4))[1],
    torch.tensor([[3, 0, 3, 3, 3]]),
    3,
    2,
    g,
    "low_confidence",
)
kept = (seen[1] != 3)[0].nonzero()[:, 0].tolist()
assert kept == [0, 1, 2], f"of equally sure places the leftmost are kept; kept are {kept}"
### END HIDDEN TESTS


# %% check="sample_masked" points=1
def pairs(inputs: Tensor) -> Tensor:
    """The exact conditionals of two equal tokens, 0 or 1 with odds 1 : 3; 2 is the mask."""
    odds = torch.tensor([0.25, 0.75, 0.0]).log().expand(*inputs.shape, 3)
    other = inputs.flip(1)
    return torch.where((other == 2)[..., None], odds, 80.0 * F.one_hot(other, 3) - 40.0)


blank = torch.full((2000, 2), 2)
twice = sample_masked(pairs, blank, 2, 2, torch.Generator().manual_seed(0))
assert bool((twice[:, 0] == twice[:, 1]).all()), "with two steps the second token sees the first"
### BEGIN HIDDEN TESTS
g = checks.generator(27)
once = sample_masked(pairs, blank, 2, 1, g)
checks.drawn(
    (once[:, 0] == once[:, 1]).double(),
    mean=0.25**2 + 0.75**2,
    what="the share of equal tokens after one step",
    hint="Each comes from its own marginal",
)
twice = sample_masked(pairs, blank, 2, 2, g)
checks.drawn((twice[:, 0] == 1).double(), mean=0.75, what="the share of ones after two steps")
# Random: each place is as likely to be first, in each row anew.
seen = []


def watch(inputs):
    seen.append(inputs.clone())
    return (
        torch.tensor([5.0, 0.0, 0.0]).expand(*inputs.shape, 3)
        * torch.tensor([1.0, 2, 3, 4])[:, None]
    )


sample_masked(watch, torch.full((3000, 4), 2), 2, 2, g)
first = seen[1] != 2
checks.close(
    first.sum(1), torch.full((3000,), 2), what="how many are kept in the first of two steps"
)
for place in range(4):
    checks.drawn(
        first[:, place].double(), mean=0.5, what=f"how often place {place} is among the first two"
    )
checks.drawn(
    (first[:, 0] & first[:, 1]).double(),
    mean=1 / 6,
    what="how often places 0 and 1 are the first two",
)
# Low confidence asks for the probability of the token that was drawn, not of the likeliest.
seen.clear()


def two_kinds(inputs):
    seen.append(inputs.clone())
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.6, 0.25, 0.15, 0.0]])
    return p.log().expand(len(inputs), 2, 4)


found = sample_masked(two_kinds, torch.full((3000, 2), 3), 3, 2, g, "low_confidence")
left = (seen[1] != 3)[:, 0].double()
# Place 0 is kept first if its draw has a higher probability than that of place 1.
due = 0.25 * (0.5 + 0.3) + 0.15  # place 1 drew its second or its third token
checks.drawn(
    left,
    mean=due,
    what="how often the less sure place is kept first",
    hint="Its draw can be the likelier one",
)
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: dates, said twice
#
# The text: days from 1950 to 2049 in two ways, "March 5, 2024 = 2024-03-05", from the course's CLDR
# dates, cut into twelve tokens. Month, day, century and year are each said twice. So four pairs of
# tokens depend on one another as strongly as tokens can, and a line is right if both halves name
# the same existing day. The network: one bidirectional Transformer layer.
#
# **Predict first.** A line is written in 12, 6, 4, 3, 2 or 1 steps. At how many steps will half of
# the lines still be right? And which way to remask is the better one here, random or low
# confidence?


# %%
class Filler(nn.Module):
    """Predicts all places from all places: (batch, length) tokens → (batch, length, vocab)."""

    def __init__(self, vocab: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        nn.init.normal_(self.token.weight, std=0.3)
        self.place = nn.Parameter(0.3 * torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.token(tokens) + self.place)))


def pieces(text: str) -> list[str]:
    """Month names, commas and dashes, and digits in twos: a year is a century and a year in it."""
    return re.findall(r"[A-Za-z]+|\d\d?|[,=-]", text)


# %% tags=["experiment"]
import datetime

torch.set_num_threads(1)
said = [
    f"{text.split(', ', 1)[1]} = {iso}"  # without the day of the week
    for text, iso in data.dates("en", "iso", 18_000)
    if text.split(",")[0].endswith("day")
]
words = ["<mask>", *sorted({word for line in said for word in pieces(line)})]
number = {word: i for i, word in enumerate(words)}
lines = torch.tensor([[number[word] for word in pieces(line)] for line in said])
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
filler = Filler(len(words), 12)
adam = torch.optim.AdamW(filler.parameters(), betas=(0.9, 0.95))
for step in range(500):
    set_rate(adam, 1e-2, step, 500)
    batch = lines[torch.randint(0, len(lines), (64,), generator=generator)]
    # Times spread evenly over (0, 1]: the loss varies less from batch to batch.
    times = (torch.arange(64) + 1 - torch.rand((), generator=generator)) / 64
    nats = masked_diffusion_loss(filler, batch, times, 0, generator)
    adam.zero_grad()
    nats.backward()
    adam.step()


def names_one_day(row: list[int]) -> bool:
    """Whether both halves of a line name the same existing day."""
    line = [words[i] for i in row]
    text = f"{line[0]} {line[1]}, {line[3]}{line[4]} = {line[6]}{line[7]}-{line[9]}-{line[11]}"
    try:
        day = datetime.datetime.strptime(text.split(" = ")[0], "%B %d, %Y").date()
    except ValueError:
        return False
    return line[2] + line[5] + line[8] + line[10] == ",=--" and text.endswith(
        f"= {day.isoformat()}"
    )


tries = (12, 6, 4, 3, 2, 1)
agreeing = {
    how: [
        sum(
            map(
                names_one_day,
                sample_masked(filler, torch.zeros(400, 12).long(), 0, n, generator, how).tolist(),
            )
        )
        / 400
        for n in tries
    ]
    for how in ("random", "low_confidence")
}
# What no network can beat: exact predictions, random order. Two tokens that are kept in one step
# agree only by chance, Σ p² over what they can be.
twins = {"day": (1, 11), "month": (0, 9), "century": (3, 6), "year": (4, 7)}
chance = torch.stack(
    [lines[:, a].bincount().div(len(lines)).square().sum() for a, _ in twins.values()]
)
first, second = (torch.tensor([pair[i] for pair in twins.values()]) for i in (0, 1))
ranks = torch.rand(20_000, 12, generator=generator).argsort(1).argsort(1)
perfect = []
for n in tries:
    kept_in = ranks // (12 // n)  # the step that keeps each place
    together = kept_in[:, first] == kept_in[:, second]
    perfect.append(float(torch.where(together, chance, 1.0).prod(1).mean()))

# Two exact bounds: a first half that sees no second one, and a second half that sees the first.
few = lines[:100]
with torch.no_grad():
    alone = exact_bound(lambda half: filler(F.pad(half, (0, 7)))[:, :5], few[:, :5], 0).mean()
    again = exact_bound(
        lambda half: filler(torch.cat([few[:, :6], half], 1))[:, 6:], few[:, 6:], 0
    ).mean()
print(f"{len(said):,} lines of {len(words)} words; at the end {nats:.2f} nats a token")
print(f"exact bound of the first half {alone:.2f} nats; log of 36,525 days {math.log(36525):.2f}")
print(f"exact bound of the second half, the first given: {again:.3f} nats; it is known")
print("lines right in".ljust(17) + "".join(f"{n:>7}" for n in tries) + "  steps")
for name, row in {**agreeing, "exact, random": perfect}.items():
    print(f"{name:17}" + "".join(f"{share:7.1%}" for share in row))
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: one line, step by step, in both ways; and how many lines come out right
fig = plot.plt.figure(figsize=(11, 4.2))
left, right = fig.subfigures(1, 2, width_ratios=[1.6, 1])
for ax, how in zip(left.subplots(2, 1), ("random", "low_confidence"), strict=True):
    stages = []

    def noted(inputs: Tensor, stages: list = stages) -> Tensor:
        stages.append(inputs[0].tolist())
        return filler(inputs)

    source = torch.Generator().manual_seed(4)
    stages.append(sample_masked(noted, torch.zeros(1, 12).long(), 0, 6, source, how)[0].tolist())
    for y, (row, before) in enumerate(zip(stages[1:], stages, strict=False)):
        for x, (token, old) in enumerate(zip(row, before, strict=True)):
            new = token != 0 and old == 0
            shade = "#f0c36d" if new else "white" if token else "#d5d5d5"
            ax.add_patch(
                plot.plt.Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=1.5)
            )
            if token:
                ax.text(x + 0.5, y + 0.5, words[token], ha="center", va="center", fontsize=6)
    ax.set(xlim=(0, 12), ylim=(6, 0), xticks=[], yticks=torch.arange(6) + 0.5)
    ax.set_yticklabels(range(1, 7), fontsize=8)
    ax.set_ylabel("step")
    ax.set_title(how.replace("_", " ") + " remasking", fontsize=10)
    ax.grid(False)
plot.curves(
    tries,
    {**{how.replace("_", " "): row for how, row in agreeing.items()}, "exact, random": perfect},
    xlabel="steps for twelve tokens",
    ylabel="lines right (share)",
    ax=right.subplots(),
)
plot.caption(
    fig,
    "Left: tokens kept in a step are shaded. Right: 400 lines for each point; the third curve is "
    "what exact predictions would give in a random order.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Every step saved costs lines. The network's predictions are nearly exact (the
# bounds say so), so what is lost, is lost to independence: two tokens that are kept together don't
# see each other. The surprise is the low confidence. One token at a time it is the better way, two
# at a time it is hopeless. Twins are equally probable, so it keeps them *together*: both centuries,
# then both months. Confidence looks at each token alone, and what matters is the pair. In all five
# seeds it had at six steps fewer than one line in twenty right, and a random order more than half.
# In real text the most confident tokens are mostly those that the rest already decides, and LLaDA
# found low confidence the better choice.

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float]:
    """Short answers: whole numbers exactly, others to 1 percent.

    "positions": a speech model reads 12 s at 8 kHz with a hop of 80 (centered frames, the last one
        dropped), and has two convolutions (kernel 3, stride 2, padding 1). Over how many positions
        does it attend?
    "frames": the fewest frames in which CTC can say "balloon"?
    "bitrate": a codec with 12 codebooks of 2048 entries at 12.5 frames a second: kilobits (1000
        bits) a second?
    "delay": steps of a language model for 10 s of music at 50 frames a second, 4 codebooks, delay
        pattern (no start token)?
    "scores": 32 frames of 14 × 14 tubelets (each one frame thick): how many times as many attention
        scores has attention among all, compared with space, then time?
    "velocity": data N(2, ½²), noise N(0, 1), flow matching with t = 1 the data: the exact velocity
        at x = 3, t = ½?
    "weight": texts of five tokens. With which weight does the prediction of the second token, with
        exactly the first two tokens masked, enter the exact bound?
    """
    ### BEGIN SOLUTION
    t, spread = 0.5, 0.25  # the time, and the data's variance
    slope = (t * spread - (1 - t)) / ((1 - t) ** 2 + t**2 * spread)
    return {
        "positions": 12 * 8_000 / 80 / 4,
        "frames": 7 + 2,
        "bitrate": 12 * 11 * 12.5 / 1000,
        "delay": 10 * 50 + 4 - 1,
        "scores": (32 * 196) / (32 + 196),
        "velocity": 2 + slope * (3 - t * 2),
        "weight": 1 / (2 * math.comb(5, 2)),
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["positions"]
checks.kind(answer, float, what="positions")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    300.0,
    to=0,
    what="positions",
    hint="100 frames a second, then every fourth of them",
    mistakes={"the strides forgotten": 1200, "one of the strides": 600},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["frames"]
checks.kind(answer, float, what="frames")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    9.0,
    to=0,
    what="frames",
    hint="One for each letter, and one more between equal neighbors",
    mistakes={"no blanks": 7, "a blank around every letter": 15, "equal letters merged": 5},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bitrate"]
checks.kind(answer, float, what="bitrate")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.65,
    what="bitrate",
    hint="How many bits is an index among 2048?",
    mistakes={"2048 bits an index": 307.2, "one codebook": 0.1375, "bits": 1650.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["delay"]
checks.kind(answer, float, what="delay")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    503.0,
    to=0,
    what="delay",
    hint="The last codebook is three steps late",
    mistakes={"flattened": 2000, "all at once": 500, "one delay too many": 504},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["scores"]
checks.kind(answer, float, what="scores")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    (32 * 196) ** 2 / (32 * 196**2 + 196 * 32**2),
    what="scores",
    hint="(TS)² over TS² + ST²",
    mistakes={"space only": 32.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["velocity"]
checks.kind(answer, float, what="velocity")
### BEGIN HIDDEN TESTS
# 2 + (0.125 − 0.5) / (0.25 + 0.0625) · (3 − 1) = 2 − 1.2 · 2
checks.number(
    answer,
    -0.4,
    what="velocity",
    hint="Put the numbers into the formula for data N(μ, σ²); σ² is ¼",
    mistakes={
        "σ in place of its square": 2 + (0.25 - 0.5) / (0.25 + 0.125) * 2,
        "x − μ in place of x − tμ": 2 - 1.2,
        "data minus state": -1.0,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["weight"]
checks.kind(answer, float, what="weight")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.05,
    what="weight",
    hint="1 / (m·C(n, m)) with m = 2 and n = 5",
    mistakes={"1 / C(n, m)": 0.1, "1 / m": 0.5, "one set of all sizes alike": 1 / 31},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** At the start of training every gate of a DiT is 0, and the last projection is
# 0, too. Which weights have a gradient in the first step, which in the second, and why does the
# network not stay where it is?

# %% [markdown] answer="zero-start"
# In the first step only the last projection: whatever stands before it is multiplied by a zero
# weight on the way back. (Its input is not zero: patches, places and norms are there.) After that
# step the projection is no longer zero, so the gradient reaches the residual stream: the patch
# projection, the places, and the gates, whose gradient is the branch's output times what comes
# back, both nonzero. Attention, MLP, scales and shifts lie behind gates that are zero still, and
# begin one step later, and so do time and label, behind the zero weights of the modulation. A
# product of two zero factors would never move; here each zero factor's partner isn't zero when its
# turn comes.

# %% [markdown]
# **Open question 2.** A colleague trains a codec and reports that 90 % of the codebook's entries
# are never chosen. What happened, how do you see it early, and what do you do?

# %% [markdown] answer="dead-entries"
# Entries that start far from all vectors are never the nearest, get no vectors, and never move: the
# rich get richer. It shows in the entropy of the codes (its exponential, the perplexity, against
# the number of entries), from the first hundred steps on. Remedies: start the entries at vectors of
# the first batch (k-means), replace an entry whose moving count falls below a threshold by a random
# vector of the batch (SoundStream, EnCodec, Mimi), look up in fewer dimensions and on normalized
# vectors (Yu et al. 2021), or do without a learned codebook (finite scalar quantization, Mentzer et
# al. 2023). The reconstruction error alone hides it for long.

# %% [markdown]
# **Open question 3.** You have to choose between an autoregressive model and masked diffusion for
# completing code at the cursor. What speaks for each, and what would you measure?

# %% [markdown] answer="which-generator"
# Masked diffusion sees both sides of the gap without rearranging the text and can fill several
# tokens per pass. But each pass runs over the whole text, without a key-value cache in the plain
# form, so fewer passes must pay for dearer ones; tokens of one pass are independent, which breaks
# what must agree (a name and its second use); the length of the gap has to be known or guessed; and
# its loss bounds the likelihood, where a causal model has it exactly. Measure at equal latency on
# the machine that serves: the share of completions that pass tests, against the number of tokens
# kept per pass; and the same with a causal model with fill-in-the-middle and speculative decoding.

# %% [markdown]
# ## References
#
# - **Radford et al. 2022**, *Robust Speech Recognition via Large-Scale Weak Supervision*,
#   arXiv:2212.04356. Section 2.2: the features and the stem.
# - **Graves et al. 2006**, *Connectionist Temporal Classification*, ICML. Sections 3 and 4: paths
#   and the forward–backward recursion.
# - **Zeyer et al. 2021**, *Why does CTC result in peaky behavior?*, arXiv:2105.14849. When CTC
#   names a letter once, and when throughout.
# - **Peterson and Barney 1952**, *Control Methods Used in a Study of the Vowels*, JASA 24. Table II
#   has the formants.
# - **van den Oord et al. 2017**, *Neural Discrete Representation Learning*, arXiv:1711.00937.
#   Section 3.2: the three terms; appendix A.1: moving averages.
# - **Zeghidour et al. 2021**, *SoundStream*, arXiv:2107.03312, and **Défossez et al. 2022**, *High
#   Fidelity Neural Audio Compression* (EnCodec), arXiv:2210.13438. Residual quantization, and how
#   dead entries are replaced.
# - **Copet et al. 2023**, *Simple and Controllable Music Generation*, arXiv:2306.05284. Section
#   2.2: the patterns compared, the delay among them.
# - **Arnab et al. 2021**, *ViViT*, arXiv:2103.15691. Tubelets; model 3 is the factorized attention.
# - **Peebles and Xie 2022**, *Scalable Diffusion Models with Transformers*, arXiv:2212.09748.
#   Section 3.2 and figure 5: four ways to tell a block about time and label.
# - **Lipman et al. 2022**, *Flow Matching for Generative Modeling*, arXiv:2210.02747. Theorems 1
#   and 2 are the argument above; **Liu et al. 2022**, *Flow Straight and Fast*, arXiv:2209.03003,
#   has it for straight lines, and straightens them.
# - **Nie et al. 2025**, *Large Language Diffusion Models* (LLaDA), arXiv:2502.09992. Section 2 and
#   appendix A; **Sahoo et al. 2024**, *Simple and Effective Masked Diffusion Language Models*,
#   arXiv:2406.07524, derives the bound in continuous time.
#
# In production: openai/whisper, `whisper/audio.py`; Hugging Face transformers, `audio_utils.py`
# (filters), `models/encodec` and `models/mimi` (quantizers), `models/musicgen`
# (`build_delay_pattern_mask`); facebookresearch/DiT, `models.py`; ML-GSAI/LLaDA, `generate.py`. Two
# differences to know: OpenAI's code cuts at 8 below the loudest point of all it is given, so that a
# batch would share one floor, and transformers does it clip by clip, as you do; and EnCodec finds
# the nearest entry by the expanded square, |x|² − 2x·e + |e|², which is faster and less exact.
# LLaDA's `generate` keeps the surest of the likeliest tokens (at its default temperature, 0).
