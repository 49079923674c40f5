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
#       State-space models from the differential equation to Mamba-2: discretization, convolution
#       and recurrence, the selective scan in parallel, in Triton and as matrix products, and a
#       block that decodes with a state of fixed size.
#     gpu: >-
#       The two scan kernels at full size: the gated scan beside a plain copy, and the fused
#       selective scan beside what the GPU's exponential units allow.
# ---

# %% [markdown]
# ## The problem: a memory that does not grow
#
# Attention keeps every token it has read. Its cache grows with each one, and so does the work of
# the next. Lesson 35 replaced the cache by a matrix of fixed size and asked which rule should
# update it. This lesson reaches the same place from another side, control theory, where people have
# fed a signal into a state of fixed size since the 1960s:
#
# $$h'(t) = A\,h(t) + B\,u(t), \qquad y(t) = C\,h(t).$$
#
# $u$ is the signal that comes in, $h \in \mathbb R^N$ the **state**, $y$ what comes out. Whoever
# holds $h$ knows everything about the past that the future can use. A **state-space model** (SSM)
# is a neural network layer made of many such systems.

# %% [markdown]
# ## Core ideas
#
# **One system, three ways to compute it.** Sampled in time it is a recurrence: one cheap step per
# token, which is what decoding wants. If $A$, $B$, $C$ never change, it is a convolution, which
# training can compute all at once. If they do change, it is a scan, and a scan runs in parallel
# too. Which way to take is a matter of hardware; the function is the same.
#
# **Selection.** A system that never changes treats every token alike. It cannot ignore one. Mamba
# (Gu, Dao 2023) lets $B$, $C$ and the step $\Delta$ depend on the token: a large step overwrites
# the state, a small one passes by. The convolution is lost, and the scan is why that is affordable.
#
# **A recurrence is a matrix.** Write out what one token adds to every later output and you get a
# lower triangular matrix, $y = Mu$, which looks like masked attention without a softmax. Mamba-2
# (Dao, Gu 2024) computes it in blocks by matrix products: attention inside a block, a state between
# blocks.
#
# **What a decay cannot do.** All of Mamba's $A$ are negative: its states fade. A state that fades
# cannot count to two: [](#decay) proves it, and mends it by letting the state turn.

# %% [markdown]
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $L$ | `length` | tokens in a sequence, counted by $t$ |
# | $D$ | `channels` | signals, each with a system of its own |
# | $N$ | `A.shape[-1]` | numbers of state per channel |
# | $\Delta$ | `dt` | the step: how much time passes between two tokens |
# | $\bar A, \bar B$ | `A_bar`, `B_bar` | the system after sampling |
#
# $A$ is diagonal throughout, so that a state is $N$ separate numbers, each with its own $A_n$.
# Sequences are `(batch, length, channels)`.

# %%
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile, tl, triton
from llm40.kernels import autotuned
from llm40.models.heads import attention_weights, head_scores
from torch import Tensor, nn

plt = plot.plt
Pair = tuple[Tensor, Tensor]


# %% tags=["support"]
# Support: the definitions as loops over time, in float64
def uniform(*shape, generator, low=0.0, high=1.0, dtype=torch.float32):
    """Uniform numbers, drawn on the CPU and moved to the profile's device."""
    drawn = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return (low + (high - low) * drawn).to(dtype).to(profile.device)


def fixed_loop(u, A_bar, B_bar, C, state=None):
    """(y, state) of a system that never changes: token by token."""
    u, A_bar, B_bar, C = (t.double() for t in (u, A_bar, B_bar, C))
    h = torch.zeros_like(A_bar.expand(u.shape[0], -1, -1)) if state is None else state.double()
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        h = A_bar * h + B_bar * u[:, t, :, None]
        y[:, t] = (C * h).sum(-1)
    return y, h


def selective_loop(u, dt, A, B, C, D=None, state=None, hold=False):
    """(y, state) of the selective scan; with `hold` B̄ is that of the zero-order hold."""
    u, dt, A, B, C = (t.double() for t in (u, dt, A, B, C))
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state.double()
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        step = dt[:, t, :, None]
        weight = torch.expm1(step * A) / A if hold else step
        h = torch.exp(step * A) * h + weight * B[:, t, None] * u[:, t, :, None]
        y[:, t] = (C[:, t, None] * h).sum(-1) + (0 if D is None else D.double() * u[:, t])
    return y, h


def selective_inputs(batch, length, channels, N, generator, dtype=torch.float32):
    """u, dt, A, B, C, D, state: rows, channels and tokens all unlike, u and dt not contiguous."""
    u = checks.randn(batch, channels, length, generator=generator, dtype=dtype).mT
    dt = uniform(batch, channels, length, generator=generator, high=1.5, dtype=dtype).mT
    A = -uniform(channels, N, generator=generator, low=0.05, high=3.0, dtype=dtype)
    B, C = (checks.randn(batch, length, N, generator=generator, dtype=dtype) for _ in range(2))
    D = checks.randn(channels, generator=generator, dtype=dtype)
    return u, dt, A, B, C, D, checks.randn(batch, channels, N, generator=generator, dtype=dtype)


def heads_loop(u, dt, A, B, C, D=None, state=None):
    """(y, state) of Mamba-2's recurrence: u (batch, length, heads, head_dim), see ssd_chunked."""
    u, dt, A, B, C = (t.double() for t in (u, dt, A, B, C))
    B, C = (t.repeat_interleave(u.shape[2] // t.shape[2], dim=2) for t in (B, C))
    h = u.new_zeros(*u.shape[:1], *u.shape[2:], B.shape[-1]) if state is None else state.double()
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        new = dt[:, t, :, None, None] * u[:, t, :, :, None] * B[:, t, :, None]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + new
        y[:, t] = (C[:, t, :, None] * h).sum(-1)
        if D is not None:
            y[:, t] += D.double()[:, None] * u[:, t]
    return y, h


def ssd_inputs(batch, length, heads, head_dim, groups, N, generator, dtype=torch.float32):
    """u, dt, A, B, C, D, state of Mamba-2; u and dt are not contiguous."""
    u = checks.randn(heads, batch, length, head_dim, generator=generator, dtype=dtype)
    dt = uniform(batch, heads, length, generator=generator, high=1.5, dtype=dtype).mT
    A = -uniform(heads, generator=generator, low=0.05, high=2.0, dtype=dtype)
    B, C = (
        checks.randn(batch, length, groups, N, generator=generator, dtype=dtype) for _ in range(2)
    )
    D = checks.randn(heads, generator=generator, dtype=dtype)
    state = checks.randn(batch, heads, head_dim, N, generator=generator, dtype=dtype)
    return u.permute(1, 2, 0, 3), dt, A, B, C, D, state


# %% [markdown]
# ## From a differential equation to a recurrence
#
# Text has no time between its tokens, so the layer invents one: token $t$ lasts for $\Delta_t$.
# Hold the input at $u_t$ during that step, the **zero-order hold** (ZOH), and solve exactly.
# Multiply $h' = Ah + Bu_t$ by $e^{-As}$: the left side becomes the derivative of $e^{-As}h(s)$, and
#
# $$h(s + \Delta) = e^{\Delta A} h(s) + \int_0^{\Delta} e^{(\Delta - r)A}\,dr\; B\,u_t .$$
#
# For a diagonal $A$ every component is alone, and the integral is $(e^{\Delta A_n} - 1)/A_n$. So
#
# $$h_t = \bar A\, h_{t-1} + \bar B\, u_t, \qquad \bar A = e^{\Delta A}, \qquad
# \bar B = \frac{e^{\Delta A} - 1}{A}\, B. $$
#
# **The limit.** With $z = \Delta A$ the input's factor is $\Delta\,\varphi(z)\,B$, where
# $\varphi(z) = (e^z - 1)/z = 1 + z/2 + \dots$ tends to 1 as $z \to 0$: a system that does not decay
# adds up what comes in. A computer sees $0/0$ there, and close to it $1.0000001 - 1$, of which one
# digit is left.

# %% [markdown]
# **Euler.** Setting $\varphi = 1$ everywhere gives $\bar B = \Delta B$. The Mamba paper writes ZOH;
# its code computes $e^{\Delta A}$ and $\Delta B$, and so does everybody who loads its weights. At
# $\Delta|A| = 1$ the two differ by more than a third.

# %% [markdown]
# ### Exercise · Hold the input for a step


# %% exercise="discretize_zoh" minutes=10 difficulty=1
def discretize_zoh(A: Tensor, B: Tensor, dt: Tensor) -> Pair:
    """Ā and B̄ of a diagonal system whose input is held for a step of dt.

    A and B: float32 or float64, or complex of these; dt ≥ 0: real, of the same precision. The three
    broadcast against each other. Nothing is changed.

    Returns (A_bar, B_bar): A_bar = exp(dt·A), of the common shape of A and dt, and
    B_bar = (exp(dt·A) − 1)/A · B, of the common shape of all three; where A or dt is 0, that is
    dt·B. Complex where A or B is complex (A_bar: where A is), in the precision given. For real A
    B_bar is right to a relative 1e-5 in float32 (1e-12 in float64) for every |dt·A| from 0 on, 1e-8
    too. Gradients reach all three; where A = 0, that of A need only be finite.
    """
    ### BEGIN SOLUTION
    z = dt * A
    still = z == 0
    # The division is kept away from 0 before it happens: torch.where alone hands on a NaN gradient.
    phi = torch.where(still, 1.0, torch.expm1(z) / torch.where(still, 1.0, z))
    return torch.exp(z), dt * phi * B
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: digits near zero</summary>
#
# `torch.expm1(z)` computes $e^z - 1$ without forming $e^z$ first, for complex numbers too.
# </details>
#
# <details><summary>Hint: a gradient that is NaN although the value is right</summary>
#
# `torch.where(z == 0, 1, f(z))` differentiates `f` at 0 all the same, and 0 · NaN is NaN. Put
# something harmless in place of 0 *inside* `f`, with another `torch.where`.
# </details>

# %% check="discretize_zoh" points=2
A = torch.tensor([-10.0, -1.0, 0.0])
A_bar, B_bar = checks.parts(
    discretize_zoh(A, torch.ones(3), torch.tensor(0.1)), "A_bar", "B_bar", what="discretize_zoh"
)
checks.close(A_bar, [math.exp(-1), math.exp(-0.1), 1.0], what="A_bar for dt = 0.1")
checks.close(
    B_bar,
    [0.0632121, 0.0951626, 0.1],
    rtol=1e-5,
    what="B_bar for A = −10, −1 and 0, B = 1, dt = 0.1",
    hint="At A = 0 the quotient has a limit.",
    mistakes={
        "Euler's rule": [0.1, 0.1, 0.1],
        "dividing by dt·A": [0.632121, 0.951626, 1.0],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(1)


def by_matrix_exponential(A, B, dt):
    """Both at once: exp(dt [[A, B], [0, 0]]) holds Ā and B̄ in its first row."""
    wide = torch.complex128 if A.is_complex() or B.is_complex() else torch.float64
    A, B, dt = (t.to(wide) for t in torch.broadcast_tensors(A, B, dt))
    blocks = torch.stack([torch.stack([A, B], -1), torch.zeros_like(torch.stack([A, B], -1))], -2)
    whole = torch.linalg.matrix_exp(blocks * dt[..., None, None])
    return whole[..., 0, 0], whole[..., 0, 1]


for dtype in (torch.float32, torch.float64):
    A = -uniform(3, 1, 4, generator=gen, low=0.1, high=9.0, dtype=dtype)
    A[1, 0, 2] = 0.0
    B = checks.randn(4, generator=gen, dtype=dtype)
    dt = uniform(5, 1, generator=gen, low=0.01, high=2.0, dtype=dtype)
    dt[3] = 0.0
    with checks.unchanged(A=A, B=B, dt=dt):
        A_bar, B_bar = discretize_zoh(A, B, dt)
    exact_A, exact_B = by_matrix_exponential(A, B, dt)
    checks.close(A_bar, exact_A, dtype=dtype, what=f"A_bar in {dtype}", atol=0)
    checks.close(B_bar, exact_B, dtype=dtype, what=f"B_bar in {dtype}", atol=1e-12)
A = torch.complex(A[..., 0], checks.randn(3, 1, generator=gen, scale=4.0, dtype=torch.float64))
for kind, wide in ((torch.complex64, torch.float32), (torch.complex128, torch.float64)):
    A_bar, B_bar = discretize_zoh(A.to(kind), B.to(kind), dt.to(wide)[:4, 0])
    exact_A, exact_B = by_matrix_exponential(A.to(kind), B.to(kind), dt.to(wide)[:4, 0])
    limit = 1e-5 if kind == torch.complex64 else 1e-9
    for found, exact, what in ((A_bar, exact_A, "A_bar"), (B_bar, exact_B, "B_bar")):
        assert found.dtype == kind, f"{what} of complex inputs has dtype {found.dtype}, not {kind}"
        for part in ("real", "imag"):
            checks.close(
                getattr(found, part).contiguous(),
                getattr(exact, part).to(wide),
                rtol=limit,
                what=f"the {part} part of {what}",
            )
mixed = discretize_zoh(A.real.contiguous(), torch.stack([A, -A]), dt[:3])
assert not mixed[0].is_complex(), "A_bar is complex only where A is"
assert mixed[0].shape == (3, 1), f"A_bar has the shape of A and dt; yours is {mixed[0].shape}"
assert mixed[1].shape == (2, 3, 1), f"B_bar has the shape of all three; yours is {mixed[1].shape}"
assert mixed[1].is_complex(), "B_bar is complex where B is"
exact = by_matrix_exponential(A.real.contiguous(), torch.stack([A, -A]), dt[:3])
checks.close(mixed[0], exact[0][0].real.contiguous(), what="A_bar of a real A, a complex B")
checks.close(
    torch.view_as_real(mixed[1]),
    torch.view_as_real(exact[1]),
    what="B_bar of a real A and a complex B",
)
turned = discretize_zoh(A, B[:1], dt[:3])
exact = by_matrix_exponential(A, B[:1], dt[:3])
for found, due, what in zip(turned, exact, ("A_bar", "B_bar"), strict=True):
    checks.close(
        torch.view_as_real(found),
        torch.view_as_real(due),
        what=f"{what} of a complex A and a real B",
    )
### END HIDDEN TESTS

# %% check="discretize_zoh" points=1
# A thousand times slower each: B_bar tends to dt·B, and keeps its digits.
A = -torch.tensor([1.0, 1e-3, 1e-6, 1e-9])
_, B_bar = discretize_zoh(A, torch.ones(4), torch.tensor(0.01))
checks.close(
    B_bar,
    0.01 * (1 + 0.01 * A / 2 + (0.01 * A) ** 2 / 6),
    rtol=1e-5,
    atol=0,
    what="B_bar as A tends to 0",
    hint="exp(z) − 1 has no digits left when z is 1e-8.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(2)
for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    A = -(10.0 ** uniform(60, generator=gen, low=-9, high=3, dtype=torch.float64)).to(dtype)
    dt = (10.0 ** uniform(60, generator=gen, low=-3, high=0, dtype=torch.float64)).to(dtype)
    B = checks.randn(60, generator=gen, dtype=dtype)
    z = dt.double() * A.double()
    series = sum(z**k / math.factorial(k + 1) for k in range(8))
    phi = torch.where(z.abs() < 1e-2, series, (torch.exp(z) - 1) / z)
    checks.close(
        discretize_zoh(A, B, dt)[1],
        (dt.double() * phi * B.double()).to(dtype),
        rtol=rtol,
        atol=0,
        dtype=dtype,
        what=f"B_bar over nine decades of A, {dtype}",
    )
A = -uniform(4, 3, generator=gen, low=0.5, high=3.0)
B, dt = checks.randn(4, 3, generator=gen), uniform(4, 1, generator=gen, low=0.3, high=1.0)
checks.gradients(
    lambda A, B, dt: torch.cat(discretize_zoh(A, B, dt)),
    lambda A, B, dt: torch.cat([(dt * A).exp(), ((dt * A).exp() - 1) / A * B]),
    A,
    B,
    dt,
    names=("A", "B", "dt"),
    rtol=1e-4,
)
A = torch.zeros(3, device=profile.device, requires_grad=True)
B = torch.tensor([1.0, -2.0, 3.0], device=profile.device, requires_grad=True)
dt = torch.tensor(0.5, device=profile.device, requires_grad=True)
found = torch.autograd.grad(discretize_zoh(A, B, dt)[1].sum(), (A, B, dt))
for gradient, what in zip(found, ("A", "B", "dt"), strict=True):
    assert bool(gradient.isfinite().all()), f"the gradient of {what} is not finite where A = 0"
checks.close(found[1], [0.5] * 3, what="the gradient of B where A = 0")
checks.close(found[2], 2.0, what="the gradient of dt where A = 0")
### END HIDDEN TESTS

# %% [markdown]
# Three rules are compared below on one system, $h' = -h + u$, fed with a line of pixels from a
# photograph. The third, with an exact decay, takes the input at both ends of a step, half and half
# (**exponential-trapezoidal**):
# $h_t = e^{\Delta A}h_{t-1} + \tfrac{\Delta}{2}\big(e^{\Delta A}Bu_{t-1} + Bu_t\big)$. Mamba-3
# (2026) lets each token choose the two shares. Before you run it: halving the step should divide
# the error of a first-order rule by two. By how much that of the third?

# %% tags=["experiment", "figure"]
# Figure: how wrong each rule is, and what a step's size does to the input's weight
signal = data.pictures()["china"].mean(0)[213].double()  # one row of pixels, 640 of them
signal = (signal - signal.mean()) / signal.std()
smooth = F.conv1d(F.pad(signal[None, None], (20, 20), "replicate"), torch.ones(1, 1, 41).double())
smooth = smooth[0, 0] / 41
fine = 640 * 8 + 1  # the "continuous" signal: 8 points between two pixels
times = torch.linspace(0, 20, fine, dtype=torch.float64)
at = torch.linspace(0, 639, fine, dtype=torch.float64)
lower = at.floor().clamp(max=638).long()
u_fine = torch.lerp(smooth[lower], smooth[lower + 1], at - lower)


def follow(u, dt, rule):
    """h at every sample for h' = −h + u from h = 0."""
    decay, weight = (
        float(t) for t in discretize_zoh(torch.tensor(-1.0).double(), torch.ones(()).double(), dt)
    )
    h, out = 0.0, [0.0]
    for before, now in zip(u[:-1].tolist(), u[1:].tolist(), strict=True):
        new = {
            "zero-order hold": weight * now,
            "Euler (Mamba's code)": float(dt) * now,
            "trapezoidal": float(dt) / 2 * (decay * before + now),
        }[rule]
        h = decay * h + new
        out.append(h)
    return torch.tensor(out, dtype=torch.float64)


rules = ["zero-order hold", "Euler (Mamba's code)", "trapezoidal"]
exact = follow(u_fine, times[1], rules[2])
strides = [8, 16, 32, 64, 128, 256, 512]
errors = {rule: [] for rule in rules}
for stride in strides:
    for rule in rules:
        found = follow(u_fine[::stride], times[1] * stride, rule)
        errors[rule].append(float((found - exact[::stride]).norm() / exact[::stride].norm()))
steps = [float(times[1] * stride) for stride in strides]
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6))
z = torch.linspace(0, 5, 200).double()
_, hold = discretize_zoh(-z, torch.ones(()).double(), torch.ones(()).double())
plot.curves(
    z,
    {"zero-order hold": hold, "Euler": torch.ones_like(z)},
    xlabel="Δ|A|",
    ylabel="B̄ / (Δ B)",
    title="the input's weight",
    ax=axes[0],
)
axes[0].axhline(0, color="#999999", linewidth=0.8)
plot.curves(
    steps,
    errors,
    xlabel="step Δ, for A = −1",
    ylabel="relative error",
    title="following a line of pixels",
    logx=True,
    logy=True,
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: held input fades within its own step, Euler's does not. Right: against the finest "
    "trapezoidal rule. The first two are of first order, the third of second, until a step is as "
    "long as what it follows.",
)
plt.show()
for rule in rules:
    print(
        f"{rule:22} halving Δ = 0.125 divides the error by {errors[rule][2] / errors[rule][1]:.2f}"
    )

# %% [markdown]
# **A step is a gate.** Take $A = -1$, $B = 1$ and $\Delta = \mathrm{softplus}(x) = \ln(1 + e^x)$.
# Then $\bar A = e^{-\Delta} = 1/(1 + e^x) = 1 - \sigma(x)$ and, by ZOH, $\bar B = 1 - \bar A
# = \sigma(x)$:
#
# $$h_t = \big(1 - \sigma(x)\big)\,h_{t-1} + \sigma(x)\,u_t .$$
#
# That is the update gate of a GRU. It was found by discretizing a differential equation, and it is
# why Mamba passes $\Delta$ through a softplus. With Euler's $\bar B = \Delta$ the two weights no
# longer sum to 1, and a huge step makes the state huge.
#
# ## One system, computed twice
#
# Let $\bar A$, $\bar B$, $C$ be the same at every token: the system is **linear and
# time-invariant** (LTI). Unroll the recurrence from $h_0 = 0$:
#
# $$y_t = \sum_{k=0}^{t} \underbrace{\textstyle\sum_n C_n \bar A_n^{\,k}\bar B_n}_{K_k}\; u_{t-k}.$$
#
# $K$ is a filter of $L$ numbers per channel, and $y = K * u$ a causal convolution. S4 trained that
# way: $K$ once, then every output at once. At decoding time the same weights run as a recurrence.
#
# ### Exercise · Token by token


# %% exercise="ssm_recurrence" minutes=10 difficulty=1
def ssm_recurrence(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor | None = None
) -> Pair:
    """The outputs of a fixed diagonal system, and the state it ends in.

    u: (batch, length, channels), length ≥ 1. A_bar, B_bar, C: (channels, N). state: (batch,
    channels, N), the state before the first token; None: zeros. All are real and of one dtype,
    float32 or float64; nothing is changed.

    For each token first the state, h = A_bar·h + B_bar·u, then the output Σ_n C·h. Returns (y,
    state): (batch, length, channels) and (batch, channels, N), in the dtype of u.
    """
    ### BEGIN SOLUTION
    h = u.new_zeros(u.shape[0], *A_bar.shape) if state is None else state
    outputs = []
    for u_t in u.unbind(1):
        h = A_bar * h + B_bar * u_t[..., None]
        outputs.append((C * h).sum(-1))
    return torch.stack(outputs, 1), h
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one more axis</summary>
#
# `u[:, t]` is (batch, channels), the state (batch, channels, N). `[..., None]` gives the first a
# last axis of size 1.
# </details>

# %% check="ssm_recurrence" points=1
# One channel, two states that halve and stay; the input is a 1 and then nothing.
u = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1)
A_bar, B_bar, C = (torch.tensor([pair]) for pair in ([0.5, 1.0], [1.0, 2.0], [4.0, 10.0]))
y, state = checks.parts(ssm_recurrence(u, A_bar, B_bar, C), "y", "state", what="ssm_recurrence")
checks.close(
    y[0, :, 0],
    [24.0, 22.0, 21.0],
    what="y",
    hint="The output reads the state that has already taken in the token.",
    mistakes={
        "reading the state before the token is in": [0.0, 24.0, 22.0],
        "leaving out C": [3.0, 2.5, 2.25],
    },
)
checks.close(state[0, 0], [0.25, 2.0], what="the last state")
### BEGIN HIDDEN TESTS
gen = checks.generator(3)
for batch, length, channels, N, dtype in [
    (2, 9, 3, 4, torch.float32),
    (3, 1, 2, 1, torch.float64),
    (1, 30, 1, 5, torch.float64),
]:
    u = checks.randn(length, batch, channels, generator=gen, dtype=dtype).transpose(0, 1)
    A_bar = uniform(channels, N, generator=gen, low=-1, high=1, dtype=dtype)
    B_bar, C = (checks.randn(channels, N, generator=gen, dtype=dtype) for _ in range(2))
    start = checks.randn(batch, channels, N, generator=gen, dtype=dtype)
    for state in (None, start):
        with checks.unchanged(u=u, A_bar=A_bar, B_bar=B_bar, C=C, state=start):
            y, last = ssm_recurrence(u, A_bar, B_bar, C, state)
        exact = fixed_loop(u, A_bar, B_bar, C, state)
        where = f"{length} tokens, {'no' if state is None else 'a'} state given."
        checks.close(y, exact[0], dtype=dtype, what="y", hint=where)
        checks.close(last, exact[1], dtype=dtype, what="the last state", hint=where)
    # Law: cut anywhere, the state carries everything over.
    cut = length // 2
    if cut:
        first, between = ssm_recurrence(u[:, :cut], A_bar, B_bar, C, start)
        second, last = ssm_recurrence(u[:, cut:], A_bar, B_bar, C, between)
        checks.close(torch.cat([first, second], 1), y, dtype=dtype, what="y in two pieces")
checks.gradients(
    lambda *t: ssm_recurrence(*t)[0], lambda *t: fixed_loop(*t)[0], u, A_bar, B_bar, C, start
)
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · The filter


# %% exercise="ssm_kernel" minutes=8 difficulty=1
def ssm_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """What a fixed system answers to a 1 followed by zeros: K[d, k] = Σ_n C·A_bar^k·B_bar.

    A_bar, B_bar, C: (channels, N), real, float32 or float64; A_bar may be negative or 0 (0⁰ is 1).
    length ≥ 1. Returns (channels, length) in their dtype. No loop over k: at most 40 tensors are
    made (views do not count), whatever the length.
    """
    ### BEGIN SOLUTION
    k = torch.arange(length, device=A_bar.device)
    powers = A_bar[..., None] ** k  # (channels, N, length)
    return ((C * B_bar)[..., None] * powers).sum(1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all powers at once</summary>
#
# A tensor with a last axis of size 1, raised to `torch.arange(length)`, broadcasts. A logarithm
# would need a positive base.
# </details>

# %% check="ssm_kernel" points=1
# The system of the recurrence's visible check: its answer to a 1 is its kernel.
A_bar, B_bar, C = (torch.tensor([pair]) for pair in ([0.5, 1.0], [1.0, 2.0], [4.0, 10.0]))
checks.close(
    ssm_kernel(A_bar, B_bar, C, 4),
    [[24.0, 22.0, 21.0, 20.5]],
    what="the kernel",
    mistakes={"beginning with the first power": [[22.0, 21.0, 20.5, 20.25]]},
)
### BEGIN HIDDEN TESTS
gen = checks.generator(4)
for channels, N, length, dtype in [
    (3, 4, 12, torch.float32),
    (1, 1, 1, torch.float64),
    (2, 3, 33, torch.float64),
]:
    A_bar = uniform(channels, N, generator=gen, low=-1, high=1, dtype=dtype)
    A_bar[0, 0] = 0.0
    B_bar, C = (checks.randn(channels, N, generator=gen, dtype=dtype) for _ in range(2))
    impulse = torch.zeros(1, length, channels, device=profile.device)
    impulse[:, 0] = 1.0
    with checks.unchanged(A_bar=A_bar, B_bar=B_bar, C=C):
        K = ssm_kernel(A_bar, B_bar, C, length)
    exact, _ = fixed_loop(impulse, A_bar, B_bar, C)
    checks.close(K, exact[0].T, dtype=dtype, what=f"a kernel of {length} taps, {channels} channels")
with checks.allocations() as made:
    ssm_kernel(A_bar, B_bar, C, 600)
assert sum(made.shapes.values()) <= 40, (
    f"{sum(made.shapes.values())} tensors are made for 600 taps; 40 are allowed: compute all "
    "powers together"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Causal convolution by FFT
#
# A convolution of $L$ numbers with $L$ numbers costs $L^2$ products, or three Fourier transforms:
# transform both, multiply, transform back. $O(L \log L)$.
#
# The transform believes that a signal repeats for ever. With $L$ points the filter's tail reaches
# round the end into the beginning, and the first output hears the last input: the future. Zeros
# leave room. The full convolution of $L$ with $K$ numbers has $L + K - 1$ of them, so that as many
# points suffice, $2L$ in the usual case; the first $L$ are the causal part.
#
# ### Exercise · The same system at once


# %% exercise="ssm_convolution" minutes=10 difficulty=2
def ssm_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """The causal convolution y[:, t, d] = Σ_k kernel[d, k] · u[:, t − k, d], by FFT.

    u: (batch, length, channels), length ≥ 1; what comes before its first token is 0. kernel:
    (channels, taps), shorter or longer than u or as long. Both float32 or both float64. Returns y
    of u's shape and dtype; nothing is changed.

    O(length · log length): no convolution of PyTorch's, no tensor of more than 4·(length + taps)
    numbers (real or complex) per row of the batch and channel.
    """
    ### BEGIN SOLUTION
    points = u.shape[1] + kernel.shape[1] - 1
    product = torch.fft.rfft(u, points, dim=1) * torch.fft.rfft(kernel.T, points, dim=0)
    return torch.fft.irfft(product, points, dim=1)[:, : u.shape[1]]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which functions</summary>
#
# `torch.fft.rfft(x, n, dim)` pads with zeros to n points. Give `torch.fft.irfft` the same n: it
# cannot guess whether n was odd.
# </details>

# %% check="ssm_convolution" points=2
u = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)
kernel = torch.tensor([[1.0, 0.5, 0.25, 0.0]])
checks.close(
    ssm_convolution(u, kernel)[0, :, 0],
    [1.0, 2.5, 4.25, 6.0],
    what="y",
    mistakes={
        "a transform of L points, which goes round in a circle": [3.75, 3.5, 4.25, 6.0],
        "a correlation: the filter turned round": [2.75, 4.5, 5.0, 4.0],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(5)
for batch, length, channels, taps, dtype in [
    (2, 16, 3, 16, torch.float32),
    (3, 7, 2, 7, torch.float64),
    (1, 1, 2, 1, torch.float64),
    (2, 9, 1, 4, torch.float32),
    (2, 5, 2, 11, torch.float64),
]:
    u = checks.randn(length, batch, channels, generator=gen, dtype=dtype).transpose(0, 1)
    kernel = checks.randn(channels, taps, generator=gen, dtype=dtype)
    with (
        checks.unchanged(u=u, kernel=kernel),
        checks.forbidden("conv1d", "convolution", because="the transform is the point"),
    ):
        y = ssm_convolution(u, kernel)
    exact = torch.zeros_like(u, dtype=torch.float64)
    for t in range(length):
        for k in range(min(t + 1, taps)):
            exact[:, t] += kernel[:, k].double() * u[:, t - k].double()
    where = f"{length} tokens, {taps} taps."
    checks.close(y, exact, dtype=dtype, what="y", hint=where)
checks.gradients(
    ssm_convolution,
    lambda u, kernel: torch.stack(
        [sum(kernel[:, k] * u[:, t - k] for k in range(min(t + 1, 11))) for t in range(u.shape[1])],
        1,
    ),
    u,
    kernel,
)
u, kernel = checks.randn(2, 600, 2, generator=gen), checks.randn(2, 600, generator=gen)
with checks.allocations() as made:
    y = ssm_convolution(u, kernel)
assert made.largest <= 4 * 1200 * 4, (
    f"a tensor of {made.largest} numbers is made for 600 tokens, 600 taps and 4 rows: "
    f"{4 * 4 * 1200} are allowed"
)
# Law: the future has no say.
later = u.clone()
later[:, 300:] += 100.0
checks.close(
    ssm_convolution(later, kernel)[:, :300],
    y[:, :300],
    rtol=1e-3,
    what="y before a change of the input",
    hint="The end of the signal reaches its beginning: with how many points do you transform?",
)
# Law: the convolution is the recurrence.
A_bar = uniform(3, 4, generator=gen, low=-1, high=1, dtype=torch.float64)
B_bar, C = (checks.randn(3, 4, generator=gen, dtype=torch.float64) for _ in range(2))
u = checks.randn(2, 21, 3, generator=gen, dtype=torch.float64)
taps = torch.stack([(C * A_bar**k * B_bar).sum(1) for k in range(21)], 1)
checks.close(
    ssm_convolution(u, taps), fixed_loop(u, A_bar, B_bar, C)[0], what="y against the recurrence"
)
### END HIDDEN TESTS

# %% [markdown]
# The same row of pixels goes through three systems below, with $A = -1$ and $\Delta$ of 1, 0.1 and
# 0.01. $1/(\Delta|A|)$ is how many tokens a state remembers. Mamba starts with $A_n = -n$ for
# $n = 1 \dots N$ and steps from 0.001 to 0.1, so that some states see a few tokens and others a
# thousand.

# %% tags=["experiment", "figure"]
# Figure: a filter for each step, and what it leaves of a line of pixels
dts = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
A_bar, B_bar = discretize_zoh(
    torch.full((3, 1), -1.0).double(), torch.ones(1).double(), dts[:, None]
)
K = ssm_kernel(A_bar, B_bar, torch.ones(3, 1).double(), 640)
line = signal[None, :, None].expand(1, 640, 3)
y = ssm_convolution(line, K)[0]
again, _ = ssm_recurrence(line, A_bar, B_bar, torch.ones(3, 1).double())
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1, 2])
names = [f"Δ = {float(d):g}" for d in dts]
plot.curves(
    range(1, 201),
    {name: K[i, :200] / K[i, 0] for i, name in enumerate(names)},
    xlabel="lag + 1 (tokens)",
    ylabel="weight, relative to the newest",
    title="the filter K",
    logx=True,
    ax=axes[0],
)
axes[0].get_legend().remove()
axes[1].plot(signal, color="#bbbbbb", linewidth=0.8, linestyle="-", label="pixels")
for i, name in enumerate(names):
    axes[1].plot(y[:, i], label=name)
axes[1].set(xlabel="pixel", ylabel="brightness, standardized")
axes[1].set_title("one row of a photograph, filtered")
axes[1].legend(ncols=4, fontsize=8, loc="upper center")
axes[1].set_ylim(-2.6, 3.4)
plot.caption(
    fig,
    "A small step remembers long and reacts slowly. By convolution and by recurrence alike: the "
    f"largest difference of the two is {float((y - again[0]).abs().max()):.0e}.",
)
plt.show()

# %% [markdown]
# ## What should a state remember? HiPPO
#
# A fading sum is one choice of memory. **HiPPO** (Gu et al. 2020) asks for the best: at every time
# $t$, let the state hold the coefficients of the polynomial that fits the *whole* past
# $u|_{[0,t]}$ best. With the Legendre polynomials $P_n$, scaled to be orthonormal on $[0, 1]$,
# $\phi_n(s) = \sqrt{2n+1}\,P_n(2s - 1)$, that is
#
# $$c_n(t) = \int_0^1 u(ts)\,\phi_n(s)\,ds .$$

# %% [markdown]
# Differentiate: $t\,c_n' = \int_0^1 ts\,u'(ts)\,\phi_n\,ds$, and by parts, since
# $\tfrac{d}{ds}u(ts) = t\,u'(ts)$,
#
# $$t\,c_n' = \big[s\,\phi_n u(ts)\big]_0^1 - \int_0^1 u(ts)\,(\phi_n + s\,\phi_n')\,ds
# = \sqrt{2n+1}\;u(t) - \int_0^1 u(ts)\,(\phi_n + s\,\phi_n')\,ds ,$$
#
# because $P_n(1) = 1$. What is left to know is $s\,\phi_n'$. With $x = 2s - 1$,
# $s\,\tfrac{d}{ds} = (x + 1)\tfrac{d}{dx}$, and two identities of Legendre's polynomials,
# $x P_n' = n P_n + P_{n-1}'$ and $P_{k+1}' - P_{k-1}' = (2k+1) P_k$, the second summed up, give
#
# $$(x + 1)P_n' = n P_n + P_{n-1}' + P_n' = n P_n + \sum_{k<n} (2k + 1) P_k .$$
#
# So the integral is $(n + 1)\,c_n + \sqrt{2n+1}\sum_{k<n}\sqrt{2k+1}\;c_k$. Nothing but the
# coefficients is needed: they obey $t\,c' = A\,c + B\,u$, **HiPPO-LegS**, with
#
# $$A_{nk} = -\begin{cases}\sqrt{(2n+1)(2k+1)} & n > k\\ n + 1 & n = k\\ 0 & n < k,\end{cases}
# \qquad B_n = \sqrt{2n+1}.$$

# %% [markdown]
# **Two readings.** HiPPO keeps the factor $1/t$: its memory stretches with the past. S4 takes the
# same matrix and drops the factor, which makes the system time-invariant and turns the polynomials
# into ones that fade (Gu et al. 2022). Mamba, as S4D's real variant, keeps the diagonal alone,
# $-1, -2, \dots, -N$.
#
# ### Exercise · The matrix


# %% exercise="hippo_legs" minutes=10 difficulty=1 path="more"
def hippo_legs(n: int) -> Pair:
    """HiPPO-LegS for n ≥ 1 coefficients: (A, B) with t·c' = A·c + B·u, as derived above.

    A: (n, n), B: (n,), both float64, on the CPU. The sign is that of a stable system: the diagonal
    of A is −1, −2, …, −n. For n = 2: A = [[−1, 0], [−√3, −2]], B = [1, √3].
    """
    ### BEGIN SOLUTION
    B = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    diagonal = torch.arange(1, n + 1, dtype=torch.float64).diag()
    return -(torch.outer(B, B).tril(-1) + diagonal), B
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: an outer product</summary>
#
# Below the diagonal $A_{nk} = -B_n B_k$. `tril(-1)` keeps what lies below it.
# </details>

# %% check="hippo_legs" points=1
A, B = checks.parts(hippo_legs(2), "A", "B", what="hippo_legs")
checks.close(
    A,
    [[-1.0, 0.0], [-math.sqrt(3), -2.0]],
    dtype=torch.float64,
    what="A for n = 2",
    mistakes={
        "the opposite sign": [[1.0, 0.0], [math.sqrt(3), 2.0]],
        "the upper triangle": [[-1.0, -math.sqrt(3)], [0.0, -2.0]],
    },
)
checks.close(B, [1.0, math.sqrt(3)], dtype=torch.float64, what="B for n = 2")
### BEGIN HIDDEN TESTS
# Law: for u(t) = t^j the coefficients at t = 1 are integrals, and t·c' = j·c. By quadrature.
nodes, weights = (torch.tensor(t) for t in np.polynomial.legendre.leggauss(40))
for n in (1, 2, 3, 5, 9):
    A, B = hippo_legs(n)
    shapes = tuple(A.shape), tuple(B.shape)
    assert shapes == ((n, n), (n,)), f"for n = {n} the shapes are {shapes}"
    assert A.dtype == B.dtype == torch.float64, "A and B are float64"
    phi = torch.stack(
        [
            torch.tensor(np.polynomial.legendre.legval(nodes.numpy(), [0] * m + [1]))
            * math.sqrt(2 * m + 1)
            for m in range(n)
        ]
    )
    s = (nodes + 1) / 2
    j = torch.arange(2 * n + 1, dtype=torch.float64)
    c = (phi * weights / 2) @ (s[:, None] ** j)  # (n, 2n + 1): the coefficients of every power
    checks.close(
        A @ c + B[:, None],
        j * c,
        dtype=torch.float64,
        what=f"A·c + B·u(1) for u = 1, t, t², …, n = {n}",
        hint="It should be c' at t = 1.",
    )
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: the matrix, and a line of pixels out of a few coefficients
def remember(u, n):
    """HiPPO-LegS along u (length,), by the bilinear rule: the n coefficients at the end."""
    A, B = hippo_legs(n)
    c, one = torch.zeros(n).double(), torch.eye(n).double()
    for t, now in enumerate(u.tolist(), 1):
        half = A / (2 * t)
        before = c + half @ c
        c = torch.linalg.solve_triangular(one - half, (before + B * now / t)[:, None], upper=False)[
            :, 0
        ]
    return c


def recall(c, points):
    """The polynomial with coefficients c at `points` places from the first token to the last."""
    scale = np.sqrt(2 * np.arange(len(c)) + 1)
    return np.polynomial.legendre.legval(np.linspace(-1, 1, points), c.numpy() * scale)


fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1, 2.4])
plot.heatmap(
    -hippo_legs(16)[0], xlabel="reads coefficient k", ylabel="of coefficient n",
    title="−A, 16 × 16", unit="−A", xticks=[k if k % 5 == 0 else "" for k in range(16)],
    yticks=[k if k % 5 == 0 else "" for k in range(16)], ax=axes[0],
)  # fmt: skip
axes[1].plot(signal, color="#bbbbbb", linewidth=0.8, linestyle="-", label="pixels")
left = {}
for n in (8, 32, 96):
    recalled = recall(remember(signal, n), 640)
    left[n] = float(np.linalg.norm(recalled - signal.numpy()) / signal.norm())
    axes[1].plot(recalled, label=f"{n} numbers")
axes[1].set(xlabel="pixel", ylabel="brightness, standardized", ylim=(-2.6, 3.4))
axes[1].set_title("what a state of so many numbers remembers of 640")
axes[1].legend(ncols=4, fontsize=8, loc="upper center")
plot.caption(
    fig,
    "The state was updated token by token and asked at the last pixel only. Relative error: "
    + ", ".join(f"{n} numbers {e:.2f}" for n, e in left.items())
    + ". Far past and near past are remembered alike: LegS fades nothing.",
)
plt.show()

# %% [markdown]
# ## Selection
#
# A fixed filter gives the token $k$ steps back the weight $K_k$, whatever that token is. It can
# copy what stood five places ago. It cannot copy *the last number*, wherever that was.
#
# Mamba makes three of the four parameters functions of the token, by linear maps of its features:
#
# | | shape | what the token decides with it |
# |---|---|---|
# | $\Delta_t$ | (batch, length, channels) | how much to forget, and how much of itself to write |
# | $B_t$ | (batch, length, $N$) | where in the state to write |
# | $C_t$ | (batch, length, $N$) | where to read |
# | $A$ | (channels, $N$) | nothing: but only $\Delta_t A$ counts |

# %% [markdown]
# For each channel $d$ and each of its $N$ numbers, with Euler's $\bar B$ as in Mamba's code,
#
# $$h_t = e^{\Delta_t A}\,h_{t-1} + \Delta_t B_t\,u_t, \qquad y_t = C_t\cdot h_t + D\,u_t .$$
#
# $B_t$ and $C_t$ are shared by all channels, as one key and one query are shared by the components
# of a value in linear attention: $D \times N$ numbers of state, $B_t$ the key, $C_t$ the query,
# $\Delta_t u_t$ the value. $D u_t$ is a path past the state: one learned number per channel, for
# which the papers use the letter $D$ once more.
#
# ### Exercise · The selective scan


# %% exercise="selective_scan" minutes=15 difficulty=2
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
) -> Pair:
    """Mamba's recurrence: h = exp(dt·A)·h + dt·B·u, y = Σ_n C·h + D·u, for every token in turn.

    u, dt: (batch, length, channels), length ≥ 1, dt ≥ 0. A: (channels, N). B, C: (batch, length,
    N), shared by the channels. D: (channels,), or None for no such term. state: (batch, channels,
    N), the state before the first token; None: zeros. Nothing is changed. The floating formats may
    differ from tensor to tensor.

    Returns (y, state): y (batch, length, channels) in the dtype of u, and the state after the last
    token (batch, channels, N). All is computed in float64 where u is float64, else in float32, and
    the state is returned so. Gradients reach every input.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(u.dtype, torch.float32)
    x, dt, A, B, C = (t.to(wide) for t in (u, dt, A, B, C))
    decay = torch.exp(dt[..., None] * A)  # (batch, length, channels, N)
    new = (dt * x)[..., None] * B[:, :, None]
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state.to(wide)
    states = []
    for decay_t, new_t in zip(decay.unbind(1), new.unbind(1), strict=True):
        h = decay_t * h + new_t
        states.append(h)
    y = torch.einsum("bldn,bln->bld", torch.stack(states, 1), C)
    if D is not None:
        y = y + D.to(wide) * x
    return y.to(u.dtype), h
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: four axes</summary>
#
# A decay for each token, channel and number of state: `dt[..., None] * A` is (batch, length,
# channels, N). $B$ has no channels, so its axis for them has size 1.
# </details>
#
# <details><summary>Hint: formats</summary>
#
# `torch.promote_types(u.dtype, torch.float32)` is float32 for half precision and float64 for
# float64. Convert once at the start, and y at the end.
# </details>

# %% check="selective_scan" points=2
# One channel, one number of state: steps of ln 2 halve it, a step of 0 leaves everything as it was.
half = math.log(2)
u = torch.tensor([1.0, 5.0, 1.0]).view(1, 3, 1)
dt = torch.tensor([half, 0.0, half]).view(1, 3, 1)
A, B, C = torch.tensor([[-1.0]]), torch.ones(1, 3, 1), torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1)
y, state = checks.parts(
    selective_scan(u, dt, A, B, C, torch.tensor([10.0])), "y", "state", what="selective_scan"
)
checks.close(
    y[0, :, 0],
    [half + 10, half + 50, 3 * half + 10],
    what="y",
    hint="The second token has a step of 0: it writes nothing, and nothing fades.",
    mistakes={
        "the zero-order hold for B": [0.5 + 10, 0.5 + 50, 1.5 + 10],
        "leaving out D": [half, half, 3 * half],
        "a decay of dt·A, without exp": [half + 10, 50, 2 * half + 10],
    },
)
checks.close(state[0, 0, 0], 1.5 * half, what="the last state")
### BEGIN HIDDEN TESTS
gen = checks.generator(6)


for shape, dtype in [
    ((2, 6, 1, 5), torch.float32),
    ((3, 1, 2, 1), torch.float64),
    ((1, 25, 4, 3), torch.float64),
    ((2, 9, 3, 4), torch.float32),
]:
    inputs = selective_inputs(*shape, gen, dtype)
    names = dict(zip(("u", "dt", "A", "B", "C", "D", "state"), inputs, strict=True))
    with checks.unchanged(**names):
        y, last = selective_scan(*inputs)
    exact, exact_last = selective_loop(*inputs)
    where = f"(batch, length, channels, N) = {shape}."
    held = selective_loop(*inputs, hold=True)[0]
    checks.close(
        y, exact, dtype=dtype, what="y", hint=where, mistakes={"the zero-order hold for B": held}
    )
    checks.close(last, exact_last, dtype=dtype, what="the last state", hint=where)
    y, last = selective_scan(*inputs[:5])
    checks.close(y, selective_loop(*inputs[:5])[0], dtype=dtype, what="y without D and state")
    y, last = selective_scan(*inputs[:5], state=inputs[6])
    exact, exact_last = selective_loop(*inputs[:5], state=inputs[6])
    checks.close(y, exact, dtype=dtype, what="y without D, from a state")
    checks.close(last, exact_last, dtype=dtype, what="the last state without D")
checks.gradients(
    lambda *t: torch.cat([part.flatten() for part in selective_scan(*t)]),
    lambda *t: torch.cat([part.flatten() for part in selective_loop(*t)]),
    *inputs,
    names=("u", "dt", "A", "B", "C", "D", "state"),
    rtol=1e-4,
)
### END HIDDEN TESTS

# %% check="selective_scan" points=1
# Half precision comes in and goes out; between, a thousand small steps are added up.
u = torch.ones(1, 1000, 1, dtype=torch.float16)
dt = torch.full((1, 1000, 1), 1e-3)
ones = torch.ones(1, 1000, 1)
y, state = selective_scan(u, dt, torch.tensor([[0.0]]), ones, ones)
assert y.dtype == torch.float16, f"y has dtype {y.dtype}; u is torch.float16"
checks.close(
    state, [[[1.0]]], dtype=torch.float32, what="the state after 1000 steps of 0.001", rtol=1e-4
)
### BEGIN HIDDEN TESTS
gen = checks.generator(7)
inputs = selective_inputs(2, 40, 3, 4, gen)
for dtype in (torch.float16, torch.bfloat16):
    half_inputs = [t.to(dtype) for t in inputs]
    y, last = selective_scan(*half_inputs)
    exact, exact_last = selective_loop(*half_inputs)
    assert y.dtype == dtype, f"y has dtype {y.dtype} for u of {dtype}"
    checks.close(y, exact.to(dtype), what=f"y in {dtype}", dtype=dtype)
    checks.close(last, exact_last, what=f"the state for {dtype}", dtype=torch.float32)
# Formats of their own: u decides. A state in float64 does not make the rest so.
u, dt, A, B, C, D, state = inputs
y, last = selective_scan(u.to(torch.bfloat16), dt, A, B, C, D, state.double())
assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32), (
    f"for u in bfloat16 y has dtype {y.dtype}, the state {last.dtype}: bfloat16 and float32"
)
_, last = selective_scan(u, dt.double(), A.double(), B.double(), C.double(), D, state)
assert last.dtype == torch.float32, f"u in float32, all else in float64: the state is {last.dtype}"
y, last = selective_scan(u.double(), dt, A, B, C, D, state)
exact, exact_last = selective_loop(u, dt, A, B, C, D, state)
checks.close(y, exact, dtype=torch.float64, what="y for u in float64, the rest in float32")
checks.close(last, exact_last, dtype=torch.float64, what="its state")
# Enormous steps forget everything before them and overflow nothing.
dt = dt.clone()
dt[:, 20] = 1e4
y, _ = selective_scan(u, dt, A, B, C, D, state)
exact, _ = selective_loop(u, dt, A, B, C, D, state)
checks.close(y[:, :20], exact[:, :20], what="y before a step of 10,000")
checks.close(y[:, 20:], exact[:, 20:], what="y from a step of 10,000 on")
### END HIDDEN TESTS

# %% [markdown]
# ## A recurrence in parallel
#
# Token $t$ needs $h_{t-1}$, so a loop of $L$ steps seems to be the end of it. It is not, because
# what a step does to the state can be combined with what the next one does *before* any state is
# known. A step is the map $h \mapsto a h + b$; write it as a pair $(a, b)$. The step $(a_1, b_1)$
# and after it $(a_2, b_2)$ give
#
# $$h \mapsto a_2(a_1 h + b_1) + b_2, \qquad\text{so}\qquad
# (a_2, b_2)\circ(a_1, b_1) = (a_2 a_1,\; a_2 b_1 + b_2).$$
#
# Composition of maps is **associative**: it does not matter which neighbors are combined first. It
# does not commute: the order must be kept. All $L$ prefixes of an associative operation are a
# **scan**, and it takes $2\log_2 L$ rounds with about $2L$ combinations (Ladner, Fischer 1980;
# Blelloch 1990).
#
# ### Exercise · Two steps as one


# %% exercise="compose" minutes=5 difficulty=1
def compose(first: Pair, second: Pair) -> Pair:
    """The step (a, b), meaning h → a·h + b, that does `first` and after it `second`.

    first, second: (a, b), tensors that broadcast, of any dtype, complex too. Returns (a, b), of
    which h → a·h + b is the whole; their shapes broadcast to the common one. Changes no input.
    """
    ### BEGIN SOLUTION
    (a_1, b_1), (a_2, b_2) = first, second
    return a_2 * a_1, a_2 * b_1 + b_2
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order</summary>
#
# Put the first step's result, $a_1 h + b_1$, into the second, and sort by $h$.
# </details>

# %% check="compose" points=1
# First halve and add 1, then treble and add 10.
first, second = ((torch.tensor(0.5), torch.tensor(1.0)), (torch.tensor(3.0), torch.tensor(10.0)))
a, b = checks.parts(compose(first, second), "a", "b", what="compose")
checks.close(a, 1.5, what="a")
checks.close(
    b,
    13.0,
    what="b",
    mistakes={"the second step before the first": 6.0, "adding what both add": 11.0},
)
### BEGIN HIDDEN TESTS
gen = checks.generator(8)
for dtype in (torch.float32, torch.float64, torch.complex128):
    steps = [
        tuple(torch.randn(2, 3, generator=gen, dtype=dtype).to(profile.device) for _ in range(2))
        for _ in range(3)
    ]
    h = torch.randn(2, 3, generator=gen, dtype=dtype).to(profile.device)
    with checks.unchanged(*steps[0], *steps[1]):
        a, b = compose(steps[0], steps[1])
    after = steps[1][0] * (steps[0][0] * h + steps[0][1]) + steps[1][1]
    assert a.dtype == b.dtype == dtype, f"a and b have dtype {dtype} when the steps do"
    gap = float((a * h + b - after).abs().max())
    assert gap < 1e-5, f"the composed step and the two steps differ by {gap:.1e} on a random state"
    left = compose(compose(steps[0], steps[1]), steps[2])
    right = compose(steps[0], compose(steps[1], steps[2]))
    for x, y in zip(left, right, strict=True):
        assert float((x - y).abs().max()) < 1e-5, "compose is not associative"
a, b = compose(
    (torch.full((4, 1), 2.0), torch.ones(4, 3)), (torch.full((1, 3), 3.0), torch.ones(3))
)
checks.close(b, torch.full((4, 3), 4.0), what="b of steps that broadcast")
### END HIDDEN TESTS

# %% [markdown]
# ### Combine few, wait for few
#
# The simplest parallel scan (Hillis, Steele 1986) combines every element with the one 1 before it,
# then 2 before, then 4: $\log_2 L$ rounds, but $L\log_2 L$ combinations. The **work-efficient** one
# does less by thinking of half the problem:
#
# 1. combine neighbors, $(x_0 x_1), (x_2 x_3), \dots$: half as many elements;
# 2. scan those, by the same method. Result $i$ is the prefix that ends at $x_{2i+1}$;
# 3. the prefixes that end at $x_2, x_4, \dots$ lack one element: one combination each.
#
# Work: $W(L) \approx L + W(L/2) \le 2L$. Rounds: two for each halving.
#
# ### Exercise · The scan


# %% exercise="associative_scan" minutes=20 difficulty=3
def associative_scan(
    combine: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]],
    elements: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """All prefixes of an associative operation, work-efficient.

    elements: a tuple of tensors with the same first axis, length ≥ 1: element t is what they hold
    at index t. combine(first, second): takes two such tuples of equal length m ≥ 1 and returns the
    m combinations, of the same dtypes, first the earlier; associative, need not commute. Result t
    is element 0 combined with 1, with 2, … with t, as a tuple of tensors like `elements`, which at
    length 1 may be these. Works for every length; changes no input.

    Together the calls of combine get at most 3·length pairs, and there are at most
    2·⌈log₂ length⌉ + 2 calls: none where length is 1.
    """
    ### BEGIN SOLUTION
    length = elements[0].shape[0]
    if length == 1:
        return elements
    evens, odds = (tuple(t[start : length - 1 + start : 2] for t in elements) for start in (0, 1))
    at_odds = associative_scan(combine, combine(evens, odds))  # prefixes ending at 1, 3, 5, …
    results = tuple(r.new_empty(length, *r.shape[1:]) for r in at_odds)
    for out, t, r in zip(results, elements, at_odds, strict=True):
        out[0], out[1::2] = t[0], r
    if length > 2:
        before = tuple(r[: (length - 1) // 2] for r in at_odds)
        at_evens = combine(before, tuple(t[2::2] for t in elements))
        for out, r in zip(results, at_evens, strict=True):
            out[2::2] = r
    return results
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: slices</summary>
#
# `t[0:length-1:2]` and `t[1::2]` are the two halves of the pairs, of equal size for every length;
# an odd length leaves one element out, and step 3 takes care of it.
# </details>
#
# <details><summary>Hint: putting it together</summary>
#
# Make an empty result and fill it in slices: index 0 from the elements, `[1::2]` from the scan of
# the pairs, `[2::2]` from step 3. With two elements, step 3 has nothing to do.
# </details>

# %% check="associative_scan" points=2
# Strings would do; here an element is an interval, and combining must join neighbors.
joined = []


def join(first, second):
    assert bool((first[1] + 1 == second[0]).all()), (
        f"combine was called with parts that are no neighbors, or in the wrong order: one ends at "
        f"{first[1].tolist()}, the other begins at {second[0].tolist()}"
    )
    joined.append(len(first[0]))
    return first[0], second[1]


places = torch.arange(11)
begin, end = checks.parts(
    associative_scan(join, (places, places)), "begin", "end", what="associative_scan"
)
checks.close(begin, torch.zeros(11, dtype=torch.int64), what="where the prefixes begin")
checks.close(end, places, what="where the prefixes end")
assert sum(joined) <= 33, f"{sum(joined)} pairs are combined; 33 are allowed for 11 elements"
assert len(joined) <= 10, f"combine is called {len(joined)} times; 10 are allowed for 11 elements"
### BEGIN HIDDEN TESTS
gen = checks.generator(9)
pairs = []


def chained(first, second):
    """2 × 2 matrices: the later one on the left."""
    pairs.append(len(first[0]))
    return (second[0] @ first[0],)


def stepped(first, second):
    pairs.append(len(first[0]))
    return first[0] * second[0], second[0] * first[1] + second[1]


for length in (1, 2, 3, 4, 5, 8, 13, 16, 31, 100):
    matrices = checks.randn(length, 2, 2, generator=gen, dtype=torch.float64)
    with checks.unchanged(matrices):
        [found] = associative_scan(chained, (matrices,))
    expected = [matrices[0]]
    for t in range(1, length):
        expected.append(matrices[t] @ expected[-1])
    expected = torch.stack(expected)
    size = expected.abs().amax((1, 2), keepdim=True).clamp(min=1e-200)
    checks.close(
        found / size, expected / size, what=f"prefix products of {length} matrices",
        dtype=torch.float64,
    )  # fmt: skip
    a = uniform(length, 3, 1, generator=gen, low=-1)
    b = checks.randn(length, 3, 2, generator=gen)
    with checks.unchanged(a, b):
        _, found = associative_scan(stepped, (a, b))
    h, expected = torch.zeros(3, 2).to(b).double(), []
    for t in range(length):
        h = a[t].double() * h + b[t].double()
        expected.append(h)
    checks.close(found, torch.stack(expected), dtype=torch.float32, what=f"states, length {length}")
for length in (1, 2, 7, 64, 1000, 1023, 1025):
    pairs.clear()
    ones = torch.ones(length, dtype=torch.float64)
    associative_scan(stepped, (ones, ones))
    calls = 0 if length == 1 else 2 * math.ceil(math.log2(length)) + 2
    assert sum(pairs) <= 3 * length, (
        f"length {length}: {sum(pairs)} pairs are combined; {3 * length} are allowed"
    )
    assert len(pairs) <= calls, (
        f"length {length}: combine is called {len(pairs)} times; {calls} are allowed"
    )
    assert 0 not in pairs, f"length {length}: combine is called with no pair"
a, b = (
    uniform(21, 2, generator=gen, dtype=torch.float64),
    checks.randn(21, 2, generator=gen).double(),
)


def loop(a, b):
    h, out = torch.zeros_like(b[0]), []
    for t in range(len(b)):
        h = a[t] * h + b[t]
        out.append(h)
    return torch.stack(out)


checks.gradients(lambda a, b: associative_scan(stepped, (a, b))[1], loop, a, b, names=("a", "b"))
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: which stretches of 32 tokens your scan combines, round by round
rounds = []


def watched(first, second):
    rounds.append((first[0].tolist(), second[1].tolist()))
    return first[0], second[1]


places = torch.arange(32)
associative_scan(watched, (places, places))
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1.7, 1])
for i, (begins, ends) in enumerate(rounds):
    for k, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        axes[0].barh(
            i + 0.36 * (k % 2) - 0.18, end - begin + 1, left=begin, height=0.3,
            color=plot.COLORS[0 if len(ends) != 1 else 1], edgecolor="white",
        )  # fmt: skip
axes[0].set(xlabel="token", ylabel="round", xlim=(0, 32))
axes[0].invert_yaxis()
axes[0].set_title("stretches that each round produces")
lengths, pairs, calls = [2**k for k in range(1, 13)], [], []
for length in lengths:
    rounds.clear()
    places = torch.arange(length)
    associative_scan(watched, (places, places))
    pairs.append(sum(len(ends) for _, ends in rounds))
    calls.append(len(rounds))
plot.curves(
    lengths,
    {
        "yours: combinations": pairs,
        "Hillis–Steele": [n * math.log2(n) - n + 1 for n in lengths],
        "yours: rounds": calls,
        "a loop: rounds": [n - 1 for n in lengths],
    },
    xlabel="tokens",
    ylabel="count",
    title="work and waiting",
    logx=True,
    logy=True,
    ax=axes[1],
)
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Left: first neighbors, then pairs of pairs, down to one; then the prefixes in between are "
    "filled in (orange: a round of one combination). Right: twice the loop's combinations buy a "
    "waiting time that is logarithmic.",
)
plt.show()

# %% [markdown]
# ## On the hardware: two scan kernels
#
# `torch` scans by making tensors; a kernel keeps the pairs in registers. Triton has the operation
# built in: `tl.associative_scan((a, b), axis, combine)` scans a tile along an axis with a jitted
# function of four scalars, `combine(a_1, b_1, a_2, b_2)`, the earlier element first. The
# threads of a warp hand each other what they have, in a logarithmic number of rounds.
#
# A tile has a limited width, so a program walks along its rows in tiles and hands the state on. The
# scan of a tile gives pairs $(a, b)$ for "from the tile's start to here"; with $h$ before the tile,
# the state at each place is $a h + b$, and the last column of that is the next tile's $h$, the
# **carry**.

# %% [markdown]
# **What it should cost.** A gated scan reads $a$ and $b$ and writes $h$, with two multiplications
# for each combination: memory is the limit, and a copy of as many bytes the yardstick. On a CPU the
# kernels run in Triton's interpreter, which takes tens of microseconds for *each element* of a
# scan, so the checks are small.
#
# ### Exercise · The gated scan
#
# A program's rows, pointers and first carry are given. Write the combination, and the loop.


# %% exercise="scan_kernel" minutes=25 difficulty=3 path="more"
@triton.jit
def compose_steps(a_1, b_1, a_2, b_2):
    """`compose` for Triton: the step (a_1, b_1), and after it (a_2, b_2)."""
    ### BEGIN SOLUTION
    return a_2 * a_1, a_2 * b_1 + b_2
    ### END SOLUTION


@triton.jit
def scan_kernel(
    a_ptr, b_ptr, h_ptr, a_row, b_row, h_row, rows, length, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """h[r, t] = a[r, t]·h[r, t − 1] + b[r, t] along each row, with h = 0 before its first element.

    a, b, h: (rows, length), last axis contiguous, any row strides (a_row, …), each tensor its own;
    rows may lie more than 2³¹ elements apart. float32 or half precision, each its own format; the
    scan itself in float32.

    Grid: (⌈rows / BLOCK_R⌉,). A program takes BLOCK_R rows, in tiles of BLOCK_T columns (both are
    powers of two; length is any). Each element of a and b is read once, each of h written once, and
    nothing outside the tensors is touched.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_T)
    a_ptrs = a_ptr + row[:, None] * a_row + col[None, :]
    b_ptrs = b_ptr + row[:, None] * b_row + col[None, :]
    h_ptrs = h_ptr + row[:, None] * h_row + col[None, :]
    carry = tl.zeros((BLOCK_R,), tl.float32)  # the state before the tile
    for start in range(0, length, BLOCK_T):
        ### BEGIN SOLUTION
        inside = (row[:, None] < rows) & (start + col[None, :] < length)
        a = tl.load(a_ptrs + start, mask=inside, other=1.0).to(tl.float32)
        b = tl.load(b_ptrs + start, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.associative_scan((a, b), 1, compose_steps)
        h = a * carry[:, None] + b
        tl.store(h_ptrs + start, h, mask=inside)
        # A tile's column can't be indexed: blank out the others, and sum.
        carry = tl.sum(tl.where(col[None, :] == BLOCK_T - 1, h, 0.0), axis=1)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: masks</summary>
#
# A lane belongs to the tensors where its row is below `rows` *and* its column, `start + col`, below
# `length`. What a masked lane loads does not matter: it stands behind all real ones, and is not
# stored.
# </details>
#
# <details><summary>Hint: the last column</summary>
#
# `h[:, -1]` does not exist in Triton. Set all columns but the last to 0 and sum over the axis.
# </details>

# %%
# (rows, columns, warps) to choose from; the autotuner measures them once for each bucket of
# lengths. The interpreter takes small tiles, since it pays for each of their elements.
SCAN_CONFIGS = tuple(
    triton.Config({"BLOCK_R": r, "BLOCK_T": t}, num_warps=warps)
    for r, t, warps in ((1, 1024, 4), (1, 2048, 8), (1, 4096, 8), (1, 512, 4), (2, 1024, 8))
)


def rows_of(t: Tensor) -> Tensor:
    """(…, length) as rows with a contiguous last axis; copied only where strides forbid a view."""
    t = t.flatten(0, -2) if t.dim() > 1 else t[None]
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def gated_scan(
    a: Tensor, b: Tensor, blocks: tuple[int, int] | None = None, out: Tensor | None = None
) -> Tensor:
    """h_t = a_t·h_(t−1) + b_t along the last axis of a and b, both (…, length), by scan_kernel."""
    h = torch.empty_like(b, memory_format=torch.contiguous_format) if out is None else out
    flat = [rows_of(t) for t in (a, b, h)]
    rows, length = flat[2].shape
    arguments = (*flat, *(t.stride(0) for t in flat), rows, length)
    if blocks is None and profile.interpret:
        blocks = 4, 16
    if blocks is None:
        tuned = autotuned(scan_kernel, SCAN_CONFIGS, (), (triton.next_power_of_2(length),))
        tuned[lambda meta: (triton.cdiv(rows, meta["BLOCK_R"]),)](*arguments)
    else:
        scan_kernel[(triton.cdiv(rows, blocks[0]),)](
            *arguments, BLOCK_R=blocks[0], BLOCK_T=blocks[1]
        )
    return h


# %% tags=["support"]
# Support: the gated scan in float64, its kernel among canaries, and on rows far apart
def gated_loop(a, b):
    """h in float64."""
    h, out = torch.zeros_like(b[..., 0], dtype=torch.float64), []
    for t in range(b.shape[-1]):
        h = a[..., t].double() * h + b[..., t].double()
        out.append(h)
    return torch.stack(out, -1)


def gated_among_canaries(a, b, blocks):
    """h of gated_scan; every row of a, b and h lies between NaN, each at strides of its own."""
    with checks.buffers(a=a, b=b, h=torch.full_like(b, math.nan), written=("h",)) as held:
        gated_scan(held.a, held.b, blocks, held.h)
    return held.h.clone()


HALF_PRECISION = (torch.float16,) if profile.interpret else (torch.float16, torch.bfloat16)


# %% check="scan_kernel" points=2
# Two rows, one tile: no carry yet. The kernel also has to compile for a GPU.
gen = checks.generator(10)
a, b = uniform(2, 16, generator=gen, low=0.5), checks.randn(2, 16, generator=gen)
with checks.launches() as launched, checks.compiled():
    h = gated_scan(a, b, blocks=(2, 16))
expected = gated_loop(a, b)
turned = torch.zeros_like(expected)
for t in range(16):  # b_1·a_2 + b_2 with the roles of the steps exchanged
    turned[:, t] = b[:, t].double() * (a[:, :t].double().prod(-1)) + (turned[:, t - 1] if t else 0)
checks.relative_l2(
    h,
    expected,
    2e-6,
    what="h",
    mistakes={
        "composing in the opposite order": turned,
        "a sum without decays": b.double().cumsum(-1),
        "storing the products of a": a.double().cumprod(-1),
    },
)
assert launched.programs == 1, "2 rows in tiles of 2 are one program"
### BEGIN HIDDEN TESTS
gen = checks.generator(11)
for rows, length, blocks in [(5, 16, (4, 16)), (3, 11, (2, 16)), (1, 1, (1, 8)), (2, 7, (1, 8))]:
    a, b = uniform(rows, length, generator=gen, low=-1), checks.randn(rows, length, generator=gen)
    with checks.launches() as launched, checks.compiled(), checks.traffic() as moved:
        h = gated_among_canaries(a, b, blocks)
    where = f"{rows} rows of {length} in one tile of {blocks}."
    assert launched.kernels["scan_kernel"] == 1, "the kernel was not launched"
    checks.relative_l2(h, gated_loop(a, b), 2e-6, what="h", hint=where)
    if moved is not None:
        assert (moved.loaded, moved.stored) == (2 * a.numel(), a.numel()), (
            f"{where} {moved.loaded} elements are read and {moved.stored} written; there are "
            f"{2 * a.numel()} to read and {a.numel()} to write"
        )
### END HIDDEN TESTS

# %% check="scan_kernel" points=2
# One row of three tiles: what the first tile ends with, the others begin with.
gen = checks.generator(12)
a, b = uniform(1, 24, generator=gen, low=0.7), checks.randn(1, 24, generator=gen)
with checks.compiled():
    h = gated_scan(a, b, blocks=(1, 8))
alone = torch.cat([gated_loop(a[:, i : i + 8], b[:, i : i + 8]) for i in (0, 8, 16)], 1)
held, late = torch.zeros(1, device=b.device, dtype=torch.float64), []
for i in (0, 8, 16):
    late.append(alone[:, i : i + 8] + held[:, None])
    held = late[-1][:, -1]
checks.relative_l2(
    h,
    gated_loop(a, b),
    2e-6,
    what="h over three tiles",
    mistakes={
        "dropping the carry between tiles": alone,
        "adding the carry without its decay": torch.cat(late, 1),
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(13)
for rows, length, blocks in [(3, 21, (2, 8)), (2, 40, (4, 8)), (1, 33, (1, 16))]:
    a, b = uniform(rows, length, generator=gen, low=-1), checks.randn(rows, length, generator=gen)
    with checks.compiled(), checks.traffic() as moved:
        h = gated_among_canaries(a, b, blocks)
    where = f"{rows} rows of {length} in tiles of {blocks}."
    checks.relative_l2(h, gated_loop(a, b), 2e-6, what="h", hint=where)
    if moved is not None:
        assert (moved.loaded, moved.stored) == (2 * a.numel(), a.numel()), (
            f"{where} {moved.loaded} elements are read and {moved.stored} written; there are "
            f"{2 * a.numel()} to read and {a.numel()} to write"
        )
# States that grow, and decays of 0 and 1.
a = torch.tensor([[1.0] * 20, [0.0] * 20, [1.5] * 20], device=profile.device)
a[1, 3] = 1.0
b = uniform(3, 20, generator=gen, low=0.5)  # of one sign: nothing cancels
checks.relative_l2(
    gated_among_canaries(a, b, (2, 8)), gated_loop(a, b), 2e-6, what="h for decays of 1, 0 and 1.5"
)
for dtype in HALF_PRECISION:
    a = uniform(2, 40, generator=gen, low=0.9).to(dtype)
    b = checks.randn(2, 40, generator=gen).to(dtype)
    exact = gated_loop(a, b)
    with checks.compiled():
        h = gated_among_canaries(a, b, (2, 16))
    rounding = float((exact.to(dtype).double() - exact).norm() / exact.norm())
    checks.relative_l2(
        h, exact, 1.2 * rounding, what=f"h in {dtype}", hint="Scan in float32, round at the end."
    )
    h = torch.empty(2, 40, device=profile.device)
    gated_scan(a, b.float(), (2, 16), h)
    checks.relative_l2(h, gated_loop(a, b), 2e-6, what=f"h in float32 for a in {dtype}")
    # From 2/eps on the format has even numbers only: a sum of ones stands still in it.
    a, b = (torch.ones(2, 40, dtype=dtype, device=profile.device) for _ in range(2))
    b[:, 0] = 2 / torch.finfo(dtype).eps
    checks.close(
        gated_among_canaries(a, b, (2, 16)), gated_loop(a, b).to(dtype), rtol=1e-4, atol=0,
        what=f"ones added up in {dtype}", hint="From tile to tile, too, the state is float32.",
    )  # fmt: skip
# Rows 2³⁰ elements apart: only addresses are compared, no memory is touched.
tensors = [torch.zeros(1, device=profile.device) for _ in range(3)]
with checks.traffic(dry=True) as seen:
    if seen is not None:
        scan_kernel[(2,)](*tensors, *[2**30] * 3, 4, 5, BLOCK_R=2, BLOCK_T=4)
if seen is not None:
    places = [checks.addresses(t, (4, 5), (2**30, 1)) for t in tensors]
    found, due = (set(seen.read), set(seen.written)), (places[0] | places[1], places[2])
    assert found == due, "rows 2³⁰ elements apart: row 2 is not where it should be"
### END HIDDEN TESTS

# %% [markdown]
# ### Why Mamba needs a kernel of its own
#
# With $a$ and $b$ as tensors the selective scan moves far more than it must: `decay`, `new` and all
# states are (batch, length, channels, $N$), $N$ times its input, and are read and written again.
# Mamba's kernel reads $u$, $\Delta$, $B$ and $C$, makes $a$ and $b$ **on chip**, scans, multiplies
# by $C$, and writes $y$. The states never leave the registers; the backward pass computes them
# again.
#
# What is left is arithmetic: one exponential for each token, channel and number of state. An H200
# runs about four trillion of them a second, fewer than its memory can feed now that so little
# moves. So the exponential units are the limit, not the memory: `exp2` with $\log_2 e$ folded into
# $A$ once, and each exponential computed once.

# %% [markdown]
# **Where the scanned axis goes.** Triton hands the last axes of a tile to the threads first; what
# they leave over lies in each thread's registers. The gated scan's rows are contiguous in time, so
# time is spread over the threads, and its scan exchanges values between them: cheap beside memory.
# Here it would cost more than the exponentials. So a tile is (BLOCK_T tokens, BLOCK_N states,
# BLOCK_D channels): channels fill the threads, a thread holds all tokens of its tile, and its scan
# is a few multiply-adds in registers.
#
# ### Exercise · The fused selective scan


# %% exercise="selective_scan_kernel" minutes=30 difficulty=3 path="more"
@triton.jit
def selective_scan_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, u_batch, u_row, dt_batch, dt_row, B_batch,
    B_row, C_batch, C_row, y_batch, y_row, channels, states, length, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mamba's recurrence, fused: h = exp(dt·A)·h + dt·B·u, y = Σ_n C·h + D·u, from h = 0.

    u, dt, y: (batch, length, channels); B, C: (batch, length, states); last axis contiguous, batch
    and row strides (u_batch, u_row, …) each tensor's own. float32 or half precision, each its own
    format. A: (channels, states) and D: (channels,), float32, contiguous.

    Grid: (⌈channels / BLOCK_D⌉, batch). A program takes BLOCK_D channels with all their states,
    BLOCK_N ≥ states, and walks along time in tiles of BLOCK_T; all three are powers of two. Each
    program reads its part of every tensor once, and nothing outside it. Arithmetic in float32.
    """
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    d_in, n_in = d[None, :] < channels, n[None, :] < states
    times = t[:, None].to(tl.int64)
    u_ptrs = u_ptr + batch * u_batch + times * u_row + d[None, :]
    dt_ptrs = dt_ptr + batch * dt_batch + times * dt_row + d[None, :]
    y_ptrs = y_ptr + batch * y_batch + times * y_row + d[None, :]
    B_ptrs = B_ptr + batch * B_batch + times * B_row + n[None, :]
    C_ptrs = C_ptr + batch * C_batch + times * C_row + n[None, :]
    A_ptrs = A_ptr + d[None, :] * states + n[:, None]  # (BLOCK_N, BLOCK_D), turned round
    A = tl.load(A_ptrs, mask=d_in & (n[:, None] < states), other=0.0)
    A = A * 1.4426950408889634  # log2(e): exp(x) is exp2(x · log2 e)
    D = tl.load(D_ptr + d, mask=d < channels, other=0.0)
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # the states before the tile
    for start in range(0, length, BLOCK_T):
        now = start + t[:, None] < length
        ### BEGIN SOLUTION
        u = tl.load(u_ptrs, mask=now & d_in, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptrs, mask=now & d_in, other=0.0).to(tl.float32)
        B = tl.load(B_ptrs, mask=now & n_in, other=0.0).to(tl.float32)
        C = tl.load(C_ptrs, mask=now & n_in, other=0.0).to(tl.float32)
        a = tl.exp2(dt[:, None, :] * A[None, :, :])  # (BLOCK_T, BLOCK_N, BLOCK_D)
        b = (dt * u)[:, None, :] * B[:, :, None]
        # The tile's first step takes the states before it in; so the scan's own a are not needed.
        b = tl.where(t[:, None, None] == 0, a * h[None, :, :] + b, b)
        _, states_now = tl.associative_scan((a, b), 0, compose_steps)
        y = tl.sum(states_now * C[:, :, None], axis=1) + D[None, :] * u
        tl.store(y_ptrs, y, mask=now & d_in)
        h = tl.sum(tl.where(t[:, None, None] == BLOCK_T - 1, states_now, 0.0), axis=0)
        ### END SOLUTION
        u_ptrs += BLOCK_T * u_row
        dt_ptrs += BLOCK_T * dt_row
        y_ptrs += BLOCK_T * y_row
        B_ptrs += BLOCK_T * B_row
        C_ptrs += BLOCK_T * C_row


# %% [markdown]
# <details><summary>Hint: three axes</summary>
#
# `dt` is (BLOCK_T, BLOCK_D) and `A` (BLOCK_N, BLOCK_D): `dt[:, None, :] * A[None, :, :]`. The scan
# runs along axis 0, the sum over the states along axis 1, the carry's sum along axis 0.
# </details>
#
# <details><summary>Hint: the last, ragged tile</summary>
#
# A step of 0 leaves the state as it is and writes nothing. Load `dt` as 0 where a lane is masked.
# </details>
#
# <details><summary>Hint: the state before the tile</summary>
#
# After the scan, as in [](#scan_kernel): a·h + b. Or before it, into the tile's first step alone,
# which saves a multiplication for each element, since the products of a are then not used.
# </details>

# %%
SELECTIVE_CONFIGS = tuple(
    triton.Config({"BLOCK_D": d, "BLOCK_T": t}, num_warps=warps)
    for d, t, warps in ((32, 16, 4), (32, 8, 4), (64, 8, 4), (32, 8, 2), (32, 4, 1), (16, 16, 4))
)


def fused_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    blocks: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y (batch, length, channels) for u and dt of that shape and B, C (batch, length, N)."""
    u, dt, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (u, dt, B, C))
    A, D = A.float().contiguous(), D.float().contiguous()
    batch, length, channels = u.shape
    y = torch.empty_like(u, memory_format=torch.contiguous_format) if out is None else out
    strides = [stride for t in (u, dt, B, C, y) for stride in t.stride()[:2]]
    arguments = (u, dt, A, B, C, D, y, *strides, channels, A.shape[1], length)
    width = triton.next_power_of_2(A.shape[1])
    if blocks is None and profile.interpret:
        blocks = 2, 16
    if blocks is None:
        bucket = (triton.next_power_of_2(length),)
        tuned = autotuned(selective_scan_kernel, SELECTIVE_CONFIGS, ("BLOCK_N",), bucket)
        grid = lambda meta: (triton.cdiv(channels, meta["BLOCK_D"]), batch)
        tuned[grid](*arguments, BLOCK_N=width)
    else:
        selective_scan_kernel[triton.cdiv(channels, blocks[0]), batch](
            *arguments, BLOCK_D=blocks[0], BLOCK_N=width, BLOCK_T=blocks[1]
        )
    return y


# %% tags=["support"]
# Support: inputs of the fused kernel, the kernel among canaries, and what it may read
def kernel_inputs(batch, channels, states, length, generator, dtype=torch.float32):
    """u, dt, A, B, C, D; A and D stay in float32."""
    u, dt, A, B, C, D, _ = selective_inputs(batch, length, channels, states, generator)
    u, dt, B, C = (t.contiguous().to(dtype) for t in (u, dt, B, C))
    return u, dt, A, B, C, D


def fused_among_canaries(u, dt, A, B, C, D, blocks):
    """y of fused_selective_scan; all but A and D at strides of their own, NaN between the rows."""
    names = {"u": u, "dt": dt, "B": B, "C": C, "y": torch.full_like(u, math.nan), "A": A, "D": D}
    with checks.buffers(**names, written=("y",), contiguous=("A", "D")) as held:
        fused_selective_scan(held.u, held.dt, held.A, held.B, held.C, held.D, blocks, held.y)
    return held.y.clone()


def expect_moves(moved, batch, channels, states, length, blocks, where):
    """Each program reads its part once (None: not counted on a GPU), and y is written once."""
    if moved is None:
        return
    programs = batch * -(-channels // blocks[0])
    due = batch * channels * (2 * length + states + 1) + 2 * programs * states * length
    assert moved.loaded <= due, (
        f"{where} {moved.loaded} elements are read, where {due} are enough: each once, and "
        "none outside the tensors. Is a load not masked?"
    )
    assert moved.stored == batch * channels * length, (
        f"{where} {moved.stored} elements are written; y has {batch * channels * length}"
    )


# %% check="selective_scan_kernel" points=2
# One channel with two states, one tile.
gen = checks.generator(14)
inputs = kernel_inputs(1, 1, 2, 8, gen)
with checks.launches() as launched, checks.compiled():
    y = fused_selective_scan(*inputs, blocks=(1, 8))
u, dt, A, B, C, D = inputs
checks.relative_l2(
    y,
    selective_loop(*inputs)[0],
    2e-6,
    what="y",
    mistakes={
        "leaving out D": selective_loop(u, dt, A, B, C)[0],
        "leaving out the step before B": selective_loop(u / dt, dt, A, B, C)[0] + D * u,
        "exp2 of dt·A, without log2(e)": selective_loop(u, dt, A * math.log(2), B, C, D)[0],
    },
)
assert launched.programs == 1, "one channel of one sequence is one program"
### BEGIN HIDDEN TESTS
gen = checks.generator(15)
for batch, channels, states, length, blocks in [(2, 3, 3, 8, (2, 8)), (1, 2, 4, 5, (2, 8))]:
    inputs = kernel_inputs(batch, channels, states, length, gen)
    with checks.launches() as launched, checks.compiled(), checks.traffic() as moved:
        y = fused_among_canaries(*inputs, blocks)
    assert launched.kernels["selective_scan_kernel"] == 1, "the kernel was not launched"
    where = f"(batch, channels, states, length) = {(batch, channels, states, length)}, one tile."
    checks.relative_l2(y, selective_loop(*inputs)[0], 2e-6, what="y", hint=where)
    expect_moves(moved, batch, channels, states, length, blocks, where)
### END HIDDEN TESTS

# %% check="selective_scan_kernel" points=2
# Two channels with different decays, three tiles, the last of them ragged.
gen = checks.generator(16)
inputs = kernel_inputs(1, 2, 2, 21, gen)
with checks.compiled():
    y = fused_selective_scan(*inputs, blocks=(2, 8))
u, dt, A, B, C, D = inputs
parts = [
    selective_loop(*(t[:, i : i + 8] for t in (u, dt)), A, *(t[:, i : i + 8] for t in (B, C)), D)
    for i in (0, 8, 16)
]
checks.relative_l2(
    y,
    selective_loop(*inputs)[0],
    2e-6,
    what="y over three tiles",
    mistakes={
        "dropping the carry between tiles": torch.cat([y for y, _ in parts], 1),
        "the first channel's decays for all": selective_loop(u, dt, A[:1].expand(2, -1), B, C, D)[
            0
        ],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(17)
for batch, channels, states, length, blocks in [(2, 3, 3, 19, (2, 8)), (1, 5, 1, 18, (4, 16))]:
    inputs = kernel_inputs(batch, channels, states, length, gen)
    with checks.compiled(), checks.traffic() as moved:
        y = fused_among_canaries(*inputs, blocks)
    where = f"(batch, channels, states, length) = {(batch, channels, states, length)}, {blocks}."
    checks.relative_l2(y, selective_loop(*inputs)[0], 2e-6, what="y", hint=where)
    expect_moves(moved, batch, channels, states, length, blocks, where)
for dtype in HALF_PRECISION:
    inputs = kernel_inputs(1, 2, 2, 21, gen, dtype)
    exact = selective_loop(*inputs)[0]
    with checks.compiled():
        y = fused_among_canaries(*inputs, (2, 16))
    rounding = float((exact.to(dtype).double() - exact).norm() / exact.norm())
    checks.relative_l2(
        y, exact, 1.2 * rounding, what=f"y in {dtype}", hint="Load, then .to(tl.float32)."
    )
    u, dt, A, B, C, D = inputs
    mixed = u, dt.float(), A, B.float(), C, D
    y = fused_selective_scan(*mixed, (2, 8), torch.empty_like(dt, dtype=torch.float32))
    exact, _ = selective_loop(*mixed)
    checks.relative_l2(y, exact, 2e-6, what=f"y in float32 for u and C in {dtype}")
    # From 2/eps on the format has even numbers only: a sum of ones stands still in it.
    u, dt, B, C = (torch.ones(1, 40, 1, dtype=dtype, device=profile.device) for _ in range(4))
    u[:, 0] = 2 / torch.finfo(dtype).eps
    A, D = torch.zeros(1, 1, device=profile.device), torch.zeros(1, device=profile.device)
    checks.close(
        fused_among_canaries(u, dt, A, B, C, D, (1, 16)),
        selective_loop(u, dt, A, B, C, D)[0].to(dtype), rtol=1e-4, atol=0,
        what=f"ones added up in {dtype}", hint="From tile to tile, too, the states are float32.",
    )  # fmt: skip
### END HIDDEN TESTS

# %% [markdown]
# On a GPU the next cell measures both kernels: the gated scan against a plain copy, scored by the
# bytes that must move, and the fused scan against the rate of exponentials, beside the same scan
# with its states in memory. On a CPU it counts bytes and exponentials instead.


# %% tags=["experiment"]
def bytes_in_memory(batch, length, channels, N, size=4):
    """HBM bytes of the selective scan step by step in tensors, and fused."""
    states = batch * length * channels * N * size
    thin = batch * length * channels * size
    shared = batch * length * N * size
    steps = {
        "decay = exp(Δ A)": thin + states,
        "new = Δ u B": 2 * thin + shared + states,
        "the scan": 3 * states,
        "y = C · h + D u": states + shared + 2 * thin,
    }
    return steps, 3 * thin + 2 * shared


batch, length, channels, N = 8, 2048, 2048, 16
exponentials, rate, bandwidth = batch * length * channels * N, 3.9e12, 4.8e12  # an H200's


def measure_scans():
    """[(name, seconds, what it reaches)] on this GPU."""

    def seconds(function):
        return triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])[0] / 1e3

    shape = (8, 1536, 4096)
    a, b, h = (torch.rand(shape, device="cuda") for _ in range(3))
    size = a.numel() * 4
    copy, ours = seconds(lambda: h.copy_(a)), seconds(lambda: gated_scan(a, b, out=h))
    rows = [
        ("copy", copy, f"{2 * size / copy / 1e12:.2f} TB/s"),
        ("gated scan", ours, f"{3 * size / ours / 1e12:.2f} TB/s"),
    ]
    u = torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)
    dt = torch.rand_like(u)
    A = -torch.arange(1.0, N + 1, device="cuda").expand(channels, N).contiguous()
    B, C = (torch.randn(batch, length, N, device="cuda", dtype=u.dtype) for _ in range(2))
    D = torch.ones(channels, device="cuda")
    ours = seconds(lambda: fused_selective_scan(u, dt, A, B, C, D))
    share = exponentials / rate / ours
    return [*rows, ("fused selective scan", ours, f"{share:.2f} of the exponentials' rate")]


if profile.name == "gpu" and not profile.interpret:
    for name, took, reached in measure_scans():
        print(f"{name:21} {took * 1e6:8.0f} µs, {reached}")

# %% tags=["experiment", "figure"]
# Figure: what the fused kernel does not move
steps, fused = bytes_in_memory(batch, length, channels, N)
fig, ax = plt.subplots(figsize=(10, 2.6))
left = 0.0
for i, (name, size) in enumerate(steps.items()):
    ax.barh(1, size / 1e9, left=left, height=0.55, color="#d8ecf8" if i % 2 else "white",
            edgecolor="black")  # fmt: skip
    ax.text(left + size / 2e9, 1, name.replace(" = ", "\n= "), ha="center", va="center", fontsize=8)
    left += size / 1e9
ax.barh(0, fused / 1e9, height=0.55, color=plot.COLORS[1], edgecolor="black")
ax.text(fused / 1e9 + 0.1, 0, f"{fused / 1e9:.2f} GB", va="center", fontsize=9)
ax.set_yticks([1, 0], ["in tensors", "fused"])
ax.set(xlabel="GB that go through the GPU's memory")
ax.set_title(
    f"the selective scan, {batch} × {length} tokens, {channels} channels, N = {N}, float32"
)
plot.caption(
    fig,
    f"Arithmetic, not a measurement: {left / (fused / 1e9):.0f} times the bytes. At "
    f"{bandwidth / 1e12:.1f} TB/s the fused kernel's take {fused / bandwidth * 1e6:.0f} µs; its "
    f"{exponentials / 1e9:.2f} billion exponentials take {exponentials / rate * 1e6:.0f} µs at "
    f"{rate / 1e12:.1f} T/s. They are the limit.",
)
plt.show()

# %% [markdown]
# ## Mamba-2: the recurrence is a matrix
#
# Unroll the selective scan as the fixed one was unrolled. What token $j$ adds to output $i \ge j$
# has been written with $B_j$, has decayed at every step after $j$, and is read with $C_i$. For one
# channel, with one decay for all its states:
#
# $$y = M u, \qquad M_{ij} = (C_i \cdot B_j)\; e^{\Delta_{j+1}A + \dots + \Delta_i A}\;\Delta_j
# \quad (i \ge j), \qquad M_{ij} = 0 \quad (i < j).$$
#
# Read $C_i$ as a query, $B_j$ as a key and $\Delta_j u_j$ as a value: this is causal linear
# attention whose mask, in place of ones, holds products of decays. Dao and Gu (2024) call it
# **state space duality** (SSD): the recurrence and the masked product are two orders of computing
# one thing.

# %% [markdown]
# **Mamba-2** simplifies for its sake. A head has `head_dim` channels that share one $\Delta_t$ and
# one number $A < 0$; $B$ and $C$ are shared by groups of heads. A state is a matrix (head_dim,
# $N$), and $N$ may grow from 16 to 128, because matrix products do the work.
#
# **The mask** needs the sums $\Delta_{j+1}A + \dots + \Delta_i A$ of all segments. The difference
# of two cumulative sums gives them, and loses its digits where one step was huge: $-10000.3 -
# (-10000)$ in float32 is $-0.2998$. Worse, a full reset, $-\infty$, makes it NaN. Instead put the
# terms into a matrix, blank out those that do not belong to the segment, and sum down the columns.
#
# ### Exercise · Sums over all segments


# %% exercise="segment_sums" minutes=8 difficulty=2
def segment_sums(log_a: Tensor) -> Tensor:
    """All sums of consecutive terms: S[i, j] = log_a[j + 1] + … + log_a[i].

    log_a: (…, length), length ≥ 1, float32 or float64, ≤ 0, may be −inf. Returns (…, length,
    length) in its dtype: 0 on the diagonal (an empty sum), −inf above it. Every segment is summed
    by itself: no difference of longer sums, so that a huge term, or −inf, spoils no segment that it
    is not in. Changes nothing.
    """
    ### BEGIN SOLUTION
    length = log_a.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=log_a.device)
    terms = log_a[..., :, None].expand(*log_a.shape, length)  # [k, j] = log_a[k], for every j
    sums = terms.masked_fill(~ones.tril(-1), 0).cumsum(-2)  # of the terms j < k ≤ i
    return sums.masked_fill(~ones.tril(), -math.inf)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the matrix of terms</summary>
#
# Let column $j$ hold log_a[k] at row $k > j$ and 0 elsewhere. Its cumulative sum down the rows is
# column $j$ of the result, where $i \ge j$.
# </details>

# %% check="segment_sums" points=1
inf = math.inf
S = segment_sums(torch.tensor([-1.0, -2.0, -4.0]))
checks.close(
    S,
    [[0.0, -inf, -inf], [-2.0, 0.0, -inf], [-6.0, -4.0, 0.0]],
    what="the sums",
    mistakes={
        "counting term j too": [[-1.0, -inf, -inf], [-3.0, -2.0, -inf], [-7.0, -6.0, -4.0]],
        "leaving 0 above the diagonal": [[0.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [-6.0, -4.0, 0.0]],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(18)
for shape, dtype in [((2, 3, 7), torch.float32), ((1,), torch.float64), ((4, 12), torch.float64)]:
    log_a = (
        -checks.randn(*shape[::-1], generator=gen, dtype=dtype)
        .abs()
        .permute(*reversed(range(len(shape))))
    )
    with checks.unchanged(log_a=log_a):
        S = segment_sums(log_a)
    n = shape[-1]
    expected = torch.full((*shape, n), -inf, dtype=torch.float64, device=log_a.device)
    for i in range(n):
        for j in range(i + 1):
            expected[..., i, j] = log_a[..., j + 1 : i + 1].double().sum(-1)
    checks.close(S.exp(), expected.exp(), dtype=dtype, what=f"exp of the sums, shape {shape}")
    below = torch.ones(n, n, dtype=torch.bool, device=log_a.device).tril()
    checks.close(S[..., below], expected[..., below], dtype=dtype, what="the sums", atol=1e-6)
    assert bool((S[..., ~below] == -inf).all()), "above the diagonal all is −inf"
log_a = -checks.randn(5, generator=gen).abs()
gradient_of = lambda S: S.exp() * torch.arange(25.0).view(5, 5).to(S)
checks.gradients(
    lambda x: gradient_of(segment_sums(x)),
    lambda x: gradient_of(
        torch.stack(
            [
                torch.stack(
                    [x[j + 1 : i + 1].sum() if j <= i else x.new_tensor(-inf) for j in range(5)]
                )
                for i in range(5)
            ]
        )
    ),
    log_a,
)
### END HIDDEN TESTS

# %% check="segment_sums" points=1
# A step that forgets everything stands between small ones.
inf = math.inf
S = segment_sums(torch.tensor([-0.5, -1e5, -0.25, -0.125]))
checks.close(
    S[3, 1],
    -0.375,
    what="the sum over the two steps after a huge one",
    hint="A difference of cumulative sums loses the digits of what is small.",
)
### BEGIN HIDDEN TESTS
S = segment_sums(torch.tensor([[-0.5, -inf, -0.25, -0.125, -inf], [-inf, -1.0, -2.0, -3.0, -4.0]]))
assert not bool(S.isnan().any()), "a step of −inf makes sums of other segments NaN"
checks.close(S[0, 3, 1], -0.375, what="the sum over the two steps after −inf")
checks.close(S[0, 3, 0], -inf, what="a segment with −inf in it")
checks.close(S[1, 4], [-10.0, -9.0, -7.0, -4.0, 0.0], what="sums after a first step of −inf")
gen = checks.generator(19)
log_a = -uniform(60, generator=gen, high=0.1)
log_a[10] = -3e6
S = segment_sums(log_a)
checks.close(
    S[59, 10:], [*log_a.double().flip(0).cumsum(0).flip(0)[11:].tolist(), 0.0], rtol=1e-5,
    what="the sums from a huge step on",
)  # fmt: skip
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · The matrix that looks like attention


# %% exercise="ssd_matrix" minutes=7 difficulty=1
def ssd_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Mamba-2's recurrence as a matrix for each head: y = M·u, without the term D·u.

    dt: (batch, length, heads), ≥ 0. A: (heads,), ≤ 0. B, C: (batch, length, groups, N); groups
    divides heads, and consecutive heads share a group, as query heads share a key head. All float32
    or all float64. Returns M, (batch, heads, length, length), with M[i, j] = (C_i·B_j) ·
    exp(A·(dt_(j+1) + … + dt_i)) · dt_j for j ≤ i, and 0 above the diagonal. A step dt of 10,000
    spoils no segment that it is not in. Changes nothing.
    """
    ### BEGIN SOLUTION
    each = dt.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(each, dim=2).transpose(1, 2) for t in (B, C))
    decays = segment_sums((dt * A).transpose(1, 2)).exp()
    return (C @ B.mT) * decays * dt.transpose(1, 2)[:, :, None]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three factors</summary>
#
# Scores $CB^\top$ for each head, the exponential of [](#segment_sums) of dt·A, and dt of the
# *column*. `repeat_interleave` gives every head its group.
# </details>

# %% check="ssd_matrix" points=1
# One head, N = 1, B = C = 1; a step of ln 2 halves.
half = math.log(2)
dt = torch.tensor([half, 2 * half, half]).view(1, 3, 1)
ones = torch.ones(1, 3, 1, 1)
M = ssd_matrix(dt, torch.tensor([-1.0]), ones, ones)
checks.close(
    M[0, 0] / half,
    [[1.0, 0.0, 0.0], [0.25, 2.0, 0.0], [0.125, 1.0, 1.0]],
    what="M / ln 2",
    mistakes={
        "dt of the row, not of the column": [[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.125, 0.5, 1.0]],
        "leaving out dt": [
            [1 / half, 0.0, 0.0],
            [0.25 / half, 1 / half, 0.0],
            [0.125 / half, 0.5 / half, 1 / half],
        ],
        "a token decaying in its own step": [
            [0.5, 0.0, 0.0],
            [0.125, 0.5, 0.0],
            [0.0625, 0.25, 0.5],
        ],
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(20)


def by_impulses(dt, A, B, C):
    """M, whose column j is what the recurrence answers to a 1 at token j."""
    batch, length, heads = dt.shape
    one = torch.eye(length, dtype=torch.float64, device=dt.device)
    columns = [
        heads_loop(one[j].view(1, length, 1, 1).expand(batch, length, heads, 1), dt, A, B, C)[0]
        for j in range(length)
    ]
    return torch.stack([c[..., 0].mT for c in columns], -1)


for shape, dtype in [
    ((2, 7, 4, 3, 2, 5), torch.float32),
    ((1, 1, 2, 1, 1, 3), torch.float64),
    ((3, 10, 3, 2, 3, 2), torch.float64),
]:
    u, dt, A, B, C, D, _ = ssd_inputs(*shape, gen, dtype)
    with checks.unchanged(dt=dt, A=A, B=B, C=C):
        M = ssd_matrix(dt, A, B, C)
    where = f"(batch, length, heads, –, groups, N) = {shape}."
    checks.close(M, by_impulses(dt, A, B, C), dtype=dtype, what="M", hint=where)
    # Steps that forget everything: exp(−sum), which belongs to no segment, would be infinite.
    dt = dt.clone()
    dt[:, dt.shape[1] // 2 :: 3] = 3e4
    size = dt.transpose(1, 2)[:, :, None]  # M's columns have it as a factor
    checks.close(
        ssd_matrix(dt, A, B, C) / size, by_impulses(dt, A, B, C) / size, dtype=dtype,
        what="M[i, j] / dt_j with steps of 30,000", hint=where,
    )  # fmt: skip
# Law: without decay and with steps of 1 it is linear attention, as causal as ever.
u, dt, A, B, C, D, _ = ssd_inputs(2, 6, 2, 3, 1, 4, gen, torch.float64)
M = ssd_matrix(torch.ones_like(dt), 0 * A, B, C)
scores = torch.einsum("bign,bjgn->bgij", C, B).tril()
checks.close(M, scores.expand(2, 2, 6, 6), dtype=torch.float64, what="M for A = 0 and dt = 1")
### END HIDDEN TESTS

# %% [markdown]
# ### Between a matrix and a loop
#
# The matrix costs $L^2$, the loop is made of tiny steps. Cut the sequence into chunks of $Q$ tokens
# and take each where it is better (you met this in lesson 35; here the decay depends on the token):
#
# 1. **inside** a chunk, $M$'s diagonal block: $Q \times Q$, products of matrices;
# 2. a chunk's **own state**: what its tokens leave at its end, the sum of
#    $e^{S_{Q-1,j}}\Delta_j u_j B_j^\top$ over its tokens $j$;
# 3. **between** chunks, a loop of $L/Q$ steps: state ← (decay of the whole chunk)·state + own
#    state;
# 4. what the state before the chunk **adds** to output $i$: it has decayed by
#    $e^{\Delta_0 A + \dots + \Delta_i A}$ and is read with $C_i$.
#
# Per token that is $O(Q)$ for step 1 and $O(N)$ for the others. Mamba-2 takes $Q$ = 256 or so, of
# the order of $N$. A sequence that is no multiple of $Q$ is filled up with steps of 0, which change
# nothing.
#
# ### Exercise · In chunks


# %% exercise="ssd_chunked" minutes=20 difficulty=3
def ssd_chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk: int,
    D: Tensor | None = None,
    state: Tensor | None = None,
) -> Pair:
    """Mamba-2's recurrence in chunks: H = exp(dt·A)·H + dt·u Bᵀ, y = H·C + D·u.

    u: (batch, length, heads, head_dim), length ≥ 1. dt: (batch, length, heads), ≥ 0. A: (heads,),
    ≤ 0. B, C: (batch, length, groups, N), shared as in ssd_matrix. chunk ≥ 1: any, also above
    length or no divisor of it. D: (heads,) or None. state: (batch, heads, head_dim, N) before the
    first token; None: zeros. Nothing is changed.

    Returns (y, state): y (batch, length, heads, head_dim) in the dtype of u; the state after the
    last token. Computed, and the state returned, in float64 where u is float64, else in float32.

    The result does not depend on chunk. A step dt of 10,000 costs no digits of what follows it. No
    loop over tokens: at most 60 + 60·⌈length/chunk⌉ tensors are made (views do not count). With
    chunk ≥ head_dim none has more than twice batch · heads · P · max(chunk, head_dim, N) numbers,
    where P is length, rounded up to a multiple of chunk.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(u.dtype, torch.float32)
    batch, length, heads, head_dim = u.shape
    count = -(-length // chunk)
    x, dt, A, B, C = (t.to(wide) for t in (u, dt, A, B, C))
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))

    def chunks(t: Tensor) -> Tensor:
        """(batch, length, heads, …) → (batch, heads, count, chunk, …), filled up with zeros."""
        t = F.pad(t.transpose(1, 2).flatten(3), (0, 0, 0, count * chunk - length))
        return t.unflatten(2, (count, chunk))

    values, keys, queries = chunks(dt[..., None] * x), chunks(B), chunks(C)
    log_a = chunks((dt * A)[..., None])[..., 0]  # (batch, heads, count, chunk)
    decays = segment_sums(log_a).exp()
    y = (queries @ keys.mT * decays) @ values
    own = (values * decays[..., -1, :, None]).mT @ keys  # (batch, heads, count, head_dim, N)
    since = log_a.cumsum(-1).exp()  # from the chunk's start up to and with each token
    H = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if state is None else state.to(wide)
    before = []
    for c in range(count):
        before.append(H)
        H = since[:, :, c, -1, None, None] * H + own[:, :, c]
    y = y + since[..., None] * (queries @ torch.stack(before, 2).mT)
    y = y.flatten(2, 3)[:, :, :length].transpose(1, 2)
    if D is not None:
        y = y + D.to(wide)[:, None] * x
    return y.to(u.dtype), H
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one layout for all</summary>
#
# Bring everything to (batch, heads, chunks, chunk, …). Then steps 1, 2 and 4 are `@` over the last
# two axes, with $\Delta_j u_j$ as values. F.pad fills up with zeros; what is padded is dt·u, dt·A,
# B and C.
# </details>
#
# <details><summary>Hint: the decays of steps 2, 3 and 4</summary>
#
# Step 2's are the last row of the block's decay matrix. Step 4's are the exponential of the plain
# cumulative sum of dt·A in the chunk, its own token included, and step 3's the last of those: sums
# from the start need no difference.
# </details>

# %% check="ssd_chunked" points=2
# Four tokens in chunks of two: the second chunk reads what the first has left.
half = math.log(2)
u, ones = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1), torch.ones(1, 4, 1, 1)
dt, A = torch.full((1, 4, 1), half), torch.tensor([-1.0])
y, state = checks.parts(
    ssd_chunked(u, dt, A, ones, ones, chunk=2), "y", "state", what="ssd_chunked"
)
checks.close(
    y[0, :, 0, 0] / half,
    [1.0, 2.5, 4.25, 6.125],
    what="y / ln 2",
    mistakes={
        "forgetting the chunk before": [1.0, 2.5, 3.0, 5.5],
        "reading the chunk before without its decay": [1.0, 2.5, 5.5, 8.0],
        "a decay too few: the token's own step is missing": [1.0, 2.5, 5.5, 6.75],
    },
)
checks.close(state[0, 0, 0, 0], 6.125 * half, what="the last state")
### BEGIN HIDDEN TESTS
gen = checks.generator(21)
for shape, chunk, dtype in [
    ((2, 12, 4, 3, 2, 5), 4, torch.float32),
    ((1, 13, 2, 1, 1, 3), 5, torch.float64),
    ((3, 7, 3, 2, 3, 2), 1, torch.float64),
    ((2, 6, 6, 4, 2, 2), 32, torch.float64),
    ((1, 1, 1, 2, 1, 1), 3, torch.float32),
]:
    u, dt, A, B, C, D, start = ssd_inputs(*shape, gen, dtype)
    where = f"(batch, length, heads, head_dim, groups, N) = {shape}, chunk {chunk}."
    named = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "state": start}
    with checks.unchanged(**named):
        y, last = ssd_chunked(u, dt, A, B, C, chunk, D, start)
    exact, exact_last = heads_loop(u, dt, A, B, C, D, start)
    checks.close(y, exact, dtype=dtype, what="y", hint=where)
    checks.close(last, exact_last, dtype=dtype, what="the last state", hint=where)
    y, last = ssd_chunked(u, dt, A, B, C, chunk)
    exact, exact_last = heads_loop(u, dt, A, B, C)
    checks.close(y, exact, dtype=dtype, what="y without D and state", hint=where)
    checks.close(last, exact_last, dtype=dtype, what="its last state", hint=where)
u, dt, A, B, C, D, start = ssd_inputs(2, 9, 2, 2, 1, 3, gen)
checks.gradients(
    lambda u, dt, A, B, C, D, H: torch.cat(
        [t.flatten() for t in ssd_chunked(u, dt, A, B, C, 4, D, H)]
    ),
    lambda *t: torch.cat([part.flatten() for part in heads_loop(*t)]),
    u, dt, A, B, C, D, start,
    names=("u", "dt", "A", "B", "C", "D", "state"),
    rtol=1e-4,
)  # fmt: skip
### END HIDDEN TESTS

# %% check="ssd_chunked" points=2
# The work is that of chunks: not of all pairs of tokens, and not of one token after another.
u, ones = torch.ones(1, 64, 1, 2), torch.ones(1, 64, 1, 2)
with checks.allocations() as made:
    ssd_chunked(u, torch.ones(1, 64, 1), torch.tensor([-1.0]), ones, ones, chunk=16)
assert made.largest <= 2 * 64 * 16, (
    f"a tensor of {made.largest} numbers is made; for 64 tokens in chunks of 16 2048 are allowed"
)
assert sum(made.shapes.values()) <= 60 + 60 * 4, (
    f"{sum(made.shapes.values())} tensors are made; for 4 chunks 300 are allowed"
)
### BEGIN HIDDEN TESTS
gen = checks.generator(22)
for length, chunk, N in ((256, 16, 4), (256, 128, 4), (128, 8, 32), (509, 64, 4), (254, 65, 4)):
    u, dt, A, B, C, D, start = ssd_inputs(2, length, 2, 8, 2, N, gen)
    with checks.allocations() as made:
        ssd_chunked(u, dt, A, B, C, chunk, D, start)
    chunks = math.ceil(length / chunk)
    bound = 2 * 2 * 2 * chunks * chunk * max(chunk, 8, N)
    assert made.largest <= bound, (
        f"length {length}, chunk {chunk}, N = {N}: a tensor of {made.largest} numbers is made, "
        f"{bound} are allowed"
    )
    count = sum(made.shapes.values())
    assert count <= 60 + 60 * chunks, (
        f"length {length}, chunk {chunk}: {count} tensors are made, {60 + 60 * chunks} allowed; "
        "is there a loop over tokens?"
    )
for dtype in (torch.float16, torch.bfloat16):
    half_inputs = [t.to(dtype) for t in ssd_inputs(2, 30, 2, 3, 1, 4, gen)]
    u, dt, A, B, C, D, start = half_inputs
    y, last = ssd_chunked(u, dt, A, B, C, 8, D, start)
    exact, exact_last = heads_loop(*half_inputs)
    assert y.dtype == dtype, f"y has dtype {y.dtype} for u of {dtype}"
    checks.close(y, exact.to(dtype), what=f"y in {dtype}", dtype=dtype)
    checks.close(last, exact_last, what=f"the state for {dtype}", dtype=torch.float32)
    _, last = ssd_chunked(u, dt, 0 * A, B, C, 8, D, start)
    _, exact_last = heads_loop(u, dt, 0 * A, B, C, D, start)
    what = f"the state for {dtype}, A = 0"
    checks.close(last, exact_last, what=what, dtype=torch.float32, hint="Float32 between chunks.")
u, dt, A, B, C, D, start = ssd_inputs(2, 30, 2, 3, 1, 4, gen)
_, last = ssd_chunked(u, dt.double(), A.double(), B.double(), C.double(), 8, D, start)
assert last.dtype == torch.float32, f"u in float32, all else in float64: the state is {last.dtype}"
y, last = ssd_chunked(u.double(), dt, A, B, C, 8, D, start)
exact, exact_last = heads_loop(u, dt, A, B, C, D, start)
checks.close(y, exact, dtype=torch.float64, what="y for u in float64, the rest in float32")
checks.close(last, exact_last, dtype=torch.float64, what="its state")
# Resets: steps that decay by exp(−10,000) and more, in the middle of a chunk.
u, dt, A, B, C, D, start = ssd_inputs(1, 24, 2, 3, 1, 4, gen)
dt[:, 5], dt[:, 14, 1] = 3e4, 1e5
y, last = ssd_chunked(u, dt, A, B, C, 8, D, start)
exact, exact_last = heads_loop(u, dt, A, B, C, D, start)
checks.close(
    y, exact, dtype=torch.float32, rtol=2e-5, atol=2e-5 * float(exact[:, 15:].abs().max()) / 1e2,
    what="y with two huge steps", hint="Sum each segment by itself.",
)  # fmt: skip
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: Mamba-2's matrix, its two factors, and its chunks
gen = torch.Generator().manual_seed(3)
length, N = 32, 4
dt = 0.25 * torch.rand(1, length, 1, generator=gen)
dt[0, 13] = 6.0  # a token that overwrites the state
B, C = (torch.randn(1, length, 1, N, generator=gen) for _ in range(2))
A = torch.tensor([-1.0])
M = ssd_matrix(dt, A, B, C)[0, 0]
decays = segment_sums(dt[0, :, 0] * A).exp()
u = torch.randn(1, length, 1, 1, generator=gen)
y, _ = ssd_chunked(u, dt, A, B, C, chunk=8)
fig, axes = plt.subplots(1, 3, figsize=(12, 3.9))
every = [i if i % 8 == 0 else "" for i in range(length)]
for ax, matrix, title in (
    (axes[0], decays, "decays from j to i"),
    (axes[1], (C[0, :, 0] @ B[0, :, 0].mT).tril(), "scores C·B, causal"),
    (axes[2], M, "M, in chunks of 8"),
):
    plot.heatmap(
        matrix.clamp(-2, 2), xlabel="token j that wrote", ylabel="token i that reads", title=title,
        unit="", center=0, vmin=-2, vmax=2, xticks=every, yticks=every, colorbar=ax is axes[2],
        ax=ax,
    )  # fmt: skip
for edge in range(8, length, 8):
    axes[2].plot([0, edge], [edge, edge], color="black", linewidth=1, linestyle="-")
    axes[2].plot([edge, edge], [edge, length], color="black", linewidth=1, linestyle="-")
gap = float((y[0, :, 0, 0] - M @ u[0, :, 0, 0]).abs().max())
plot.caption(
    fig,
    "Token 13 has a large step: nothing from before it is read after it. Blocks on the diagonal "
    f"are computed as they stand, all others through a state of {N} numbers. Chunks and matrix "
    f"agree to {gap:.0e}. Values beyond ±2 are drawn as ±2.",
)
plt.show()

# %% [markdown]
# ### How large a state would attention need?
#
# Cut a sequence before token $c$. Whatever the tokens before say to those after passes through the
# state at the cut: the block $M_{i \ge c,\, j < c}$ is a product of a matrix with $N$ columns (how
# the state is read) and one with $N$ rows (how it was written). Its rank is at most $N$. Matrices
# with that property at every cut are called **semiseparable**, and every one of them is some linear
# recurrence with $N$ numbers of state, though its $A_t$ need not be diagonal.
#
# Turn it round: given any causal matrix, attention weights for example, the singular values of its
# block say how well *any* linear state of $N$ numbers could do. The best approximation of rank $N$
# keeps the $N$ largest; its error is the root of the sum of the squares of the rest (Eckart and
# Young).
#
# ### Exercise · The state at a cut


# %% exercise="state_needed" minutes=8 difficulty=2 path="more"
def state_needed(M: Tensor, cut: int, tolerance: float) -> int:
    """The fewest numbers of state with which a linear recurrence could do what M does at a cut.

    M: (length, length), causal, any floating dtype. 1 ≤ cut < length: the block is rows from `cut`
    on, columns before it. Returns the smallest N ≥ 0 for which some matrix of rank N differs from
    the block by at most tolerance · (the block's Frobenius norm), in that norm. 0 for a block of
    zeros. 0 ≤ tolerance ≤ 1; at 1, 0 is right; at 0, singular values below 1e-12 of the largest are
    0. Between, an error that equals the limit to rounding may count either way. Computed in
    float64; a plain int; M is not changed.
    """
    ### BEGIN SOLUTION
    values = torch.linalg.svdvals(M[cut:, :cut].double())
    values = values.masked_fill(values < 1e-12 * values.max(), 0)
    squares = values.square()
    rest = F.pad(squares.flip(0).cumsum(0).flip(0), (0, 1))  # rest[N]: what N of them leave out
    return int((rest > tolerance**2 * squares.sum() * (1 + 1e-12)).sum())
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what is left out</summary>
#
# `torch.linalg.svdvals` sorts from large to small. Keeping N of them leaves an error of the root of
# the sum of the squares from index N on. Count the N for which that is too much.
# </details>

# %% check="state_needed" points=1
# A block with singular values 3 and 4: from 3/5 of its norm on one number is enough.
M = torch.zeros(4, 4)
M[2, 0], M[3, 1], M[1, 0] = 3.0, 4.0, 7.0
found = {tolerance: state_needed(M, 2, tolerance) for tolerance in (0.0, 0.5, 0.7, 1.0)}
checks.kind(found[0.5], int, what="the number of states")
for tolerance, expected in {0.0: 2, 0.5: 2, 0.7: 1, 1.0: 0}.items():
    checks.close(found[tolerance], expected, what=f"the state for a tolerance of {tolerance}")
### BEGIN HIDDEN TESTS
gen = checks.generator(23)
for length, cut, sizes in [(9, 4, [5.0, 2.0, 1.0, 0.5]), (12, 3, [1.0, 1.0, 0.1]), (6, 5, [2.0])]:
    rows, columns = length - cut, cut
    k = len(sizes)
    left, right = (
        torch.linalg.qr(torch.randn(n, k, generator=gen, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    sigma = torch.tensor(sizes, dtype=torch.float64)
    M = torch.randn(length, length, generator=gen, dtype=torch.float64).tril()
    M[cut:, :cut] = (left * sigma) @ right.mT
    M = M.to(profile.device)
    total = math.sqrt(sum(s * s for s in sizes))
    for N in range(k + 1):
        error = math.sqrt(sum(s * s for s in sizes[N:])) / total
        with checks.unchanged(M=M):
            enough = state_needed(M, cut, min(error * 1.001, 1.0))
        checks.close(enough, N, what=f"the state for a tolerance that {N} numbers just meet")
        if N:
            before = math.sqrt(sum(s * s for s in sizes[N - 1 :])) / total
            checks.close(
                state_needed(M, cut, before * 0.999), N, what=f"the state where {N - 1} is too few"
            )
    checks.close(state_needed(M, cut, 0.0), k, what="the state for a tolerance of 0")
checks.close(state_needed(torch.eye(5, dtype=torch.bfloat16), 2, 0.1), 0, what="a block of zeros")
# Whole numbers, so that the product has rank 3 exactly, in any format that holds them.
left, right = (torch.randint(-3, 4, shape, generator=gen) for shape in ((9, 3), (3, 8)))
left[:3], right[:, :3] = torch.eye(3, dtype=torch.int64), torch.eye(3, dtype=torch.int64)
M = torch.zeros(17, 17)
M[8:, :8] = (left @ right).float()
for dtype in (torch.float32, torch.bfloat16):
    found = state_needed(M.to(dtype), 8, 0.0)
    checks.close(found, 3, what=f"the state for a block of rank 3 in {dtype}", hint="In float64.")
# Law: Mamba-2's matrix with N numbers of state needs N, at every cut.
u, dt, A, B, C, D, _ = ssd_inputs(1, 16, 1, 1, 1, 3, gen, torch.float64)
scores = torch.einsum("bign,bjgn->bgij", C, B)[0, 0]
decay = torch.exp((dt[0, :, 0] * A).cumsum(0))
M = (scores * decay[:, None] / decay * dt[0, :, 0]).tril()
for cut in (1, 2, 3, 8, 13, 15):
    expected = min(3, cut, 16 - cut)
    for size in (1.0, 1e-7, 1e7):
        found = state_needed(size * M, cut, 0.0)
        checks.close(found, expected, what=f"the state of {size:g} times Mamba-2's M, cut {cut}")
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment: how large a state would `small` need?
#
# Take the attention weights of the shipped model `small`, all its heads, on two texts of 256
# tokens: a piece of held-out documentation, and 128 random tokens said twice. Cut both in the
# middle and ask, for every head, how many numbers of state a recurrence would need to reproduce the
# block within 10 %.
#
# Write down first: on which text is the largest number larger, and by about what factor? One of the
# heads looks at the previous token, another finds the place where the current token stood before
# (an **induction** head, lesson 09). What does each of them need?

# %% tags=["experiment"]
small, tokenizer = models.load("small", device="cpu")
held_out = data.split(data.deduplicate(data.documentation()))[1]
article = tokenizer.encode(max(held_out.values(), key=len))[:256]
random = torch.randint(300, 4000, (128,), generator=torch.Generator().manual_seed(36))
texts = {"documentation": torch.tensor(article), "random, said twice": random.repeat(2)}
threads = torch.get_num_threads()
torch.set_num_threads(1)
weights = {name: attention_weights(small, tokens[None])[:, 0] for name, tokens in texts.items()}
torch.set_num_threads(threads)
needed = {
    name: torch.tensor([[state_needed(head, 128, 0.1) for head in layer] for layer in w])
    for name, w in weights.items()
}
twice = texts["random, said twice"][None]
scores = head_scores(weights["random, said twice"][:, None], twice)
heads = {
    what: divmod(int(scores[what].flatten().argmax()), scores[what].shape[1])
    for what in ("previous_token", "induction")
}
for name, counts in needed.items():
    each = ", ".join(
        f"{what.replace('_', ' ')} head {layer}.{head}: {int(counts[layer, head])}"
        for what, (layer, head) in heads.items()
    )
    print(
        f"{name:19} median {int(counts.flatten().median()):3}, largest {int(counts.max()):3} "
        f"numbers of state; {each}"
    )

# %% tags=["experiment", "figure"]
# Figure: the best that a state of N numbers could do for each head of `small`
fig, axes = plt.subplots(1, 2, figsize=(11, 3.5), sharey=True)
for ax, (name, w) in zip(axes, weights.items(), strict=True):
    for layer in w:
        for head in layer:
            squares = torch.linalg.svdvals(head[128:, :128].double()).square()
            error = (squares.flip(0).cumsum(0).flip(0) / squares.sum()).sqrt()
            ax.plot(range(128), error, color="#bbbbbb", linewidth=0.6, linestyle="-")
    for i, (what, (layer, head)) in enumerate(heads.items()):
        squares = torch.linalg.svdvals(w[layer, head][128:, :128].double()).square()
        error = (squares.flip(0).cumsum(0).flip(0) / squares.sum()).sqrt()
        ax.plot(range(128), error, color=plot.COLORS[i], linestyle=["-", "--"][i],
                label=f"{what.replace('_', ' ')} ({layer}.{head})")  # fmt: skip
    ax.axhline(0.1, color="#777777", linewidth=1, linestyle=":")
    ax.set(xlabel="numbers of state N", ylim=(0.005, 1.3), yscale="log")
    ax.set_title(f"{name}, cut at token 128")
axes[0].set_ylabel("smallest relative error")
axes[0].legend(fontsize=8)
plot.caption(
    fig,
    "Each grey line is one of the heads of `small`. What a head's block needs at the cut depends "
    "on the text: to copy a string, a state has to hold all of it.",
)
plt.show()

# %% [markdown]
# **What came out.** The head that looks at the previous token sends next to nothing across the cut:
# one weight, that of token 127 for token 128. The induction head needs a state of about the length
# of the string. Each of its queries looks at another key, so that the block is nearly a shifted
# unit matrix, all of whose singular values are alike, and leaving out any is as bad as any other.
# Real text repeats less, and the same head gets by with half as much or less.
#
# A recurrence may of course write something cleverer into its state than attention weights. But for
# copying at will the bound stands in any form: a state of fixed size holds a fixed number of
# tokens. It is the reason for the hybrids of lesson 37.

# %% [markdown]
# ## The block
#
# Mamba puts the scan into one kind of block and stacks it, with RMSNorm before and a residual path
# around each; there is no attention and no MLP. A block widens its input to `d_inner` = 2 · d_model
# channels, twice: one half goes through the system, the other is a **gate**.
#
# $$x \xrightarrow{\text{in\_proj}} (u, z), \quad
# u \to \mathrm{SiLU}(\text{conv}(u)), \quad
# y = \text{scan}(u, \Delta, A, B, C, D), \quad
# \text{out\_proj}\big(y \odot \mathrm{SiLU}(z)\big).$$
#
# The convolution is short (4 tokens), causal and one filter per channel: a token sees its neighbors
# before it decides what to do with the state. $\Delta$, $B$ and $C$ come from the $u$ behind it.
# $\Delta$ goes through a bottleneck of `dt_rank` features, and its bias is set so that the steps
# start between 0.001 and 0.1.
#
# **Decoding.** A block's memory is two tensors: the last `d_conv` − 1 inputs of the convolution,
# and the state. Nothing else, at token 10 as at token 1,000,000.
#
# ### Exercise · The Mamba block


# %% exercise="mamba_block" minutes=25 difficulty=3
class MambaBlock(nn.Module):
    """Mamba's block, from (batch, length, d_model) to the same.

    The parameters, made below, have the names and shapes of the published code. A = −exp(A_log).
    The memory of a block is a pair (conv, h): conv (batch, d_inner, d_conv − 1), the newest inputs
    of the convolution, the last one last; h (batch, d_inner, d_state), the state of the scan. None
    stands for the memory before the first token: zeros.

    x, the parameters and conv are all float32, or all float64; so is h, and the results. No method
    changes a tensor that it is given, nor a parameter.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner, self.dt_rank = expand * d_model, dt_rank or math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)  # first u, then z
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-1, 1).mul_(self.dt_rank**-0.5)
            dt = 10.0 ** torch.empty(self.d_inner).uniform_(-3, -1)  # 0.001 to 0.1
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dt, B, C) of u (…, d_inner): (…, d_inner), (…, d_state) and (…, d_state).

        x_proj gives dt_rank features, then B, then C; dt = softplus(dt_proj(features)), right to a
        relative 1e-5 where its argument is −30 or 150, too.
        """
        ### BEGIN SOLUTION
        features, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.softplus(self.dt_proj(features)), B, C
        ### END SOLUTION

    def forward(self, x: Tensor, memory: Pair | None = None) -> tuple[Tensor, Pair]:
        """(y, memory) for x (batch, length, d_model), length ≥ 1, of any length against d_conv.

        y has the shape of x. The memory given is that before x, the one returned that after it, so
        that a sequence may come in pieces.
        """
        ### BEGIN SOLUTION
        u, z = self.in_proj(x).chunk(2, dim=-1)
        conv, h = (None, None) if memory is None else memory
        if conv is None:
            conv = u.new_zeros(u.shape[0], self.d_inner, self.d_conv - 1)
        window = torch.cat([conv, u.mT], dim=-1)  # (batch, d_inner, d_conv − 1 + length)
        u = F.silu(self.conv1d(window)).mT
        dt, B, C = self.select(u)
        y, h = selective_scan(u, dt, -torch.exp(self.A_log), B, C, self.D, h)
        conv = window[..., window.shape[-1] - (self.d_conv - 1) :].contiguous()  # not the whole
        return self.out_proj(y * F.silu(z)), (conv, h)
        ### END SOLUTION

    def step(self, x: Tensor, memory: Pair | None = None) -> tuple[Tensor, Pair]:
        """(y, memory) for one token, x (batch, d_model): what forward would give for it.

        Its work and memory do not depend on how many tokens came before: no tensor of more than
        batch · d_inner · max(2 · d_state, d_conv, dt_rank) numbers is made.
        """
        ### BEGIN SOLUTION
        u, z = self.in_proj(x).chunk(2, dim=-1)
        conv, h = (None, None) if memory is None else memory
        if conv is None:
            conv = u.new_zeros(len(u), self.d_inner, self.d_conv - 1)
            h = u.new_zeros(len(u), self.d_inner, self.d_state)
        window = torch.cat([conv, u[..., None]], dim=-1)
        u = F.silu((window * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)
        dt, B, C = self.select(u)
        h = torch.exp(dt[..., None] * -torch.exp(self.A_log)) * h + (dt * u)[..., None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + self.D * u
        return self.out_proj(y * F.silu(z)), (window[..., 1:], h)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the convolution's memory</summary>
#
# Put conv in front of the new inputs, along time. A convolution without padding over that gives
# exactly as many outputs as there are new inputs, and its last d_conv − 1 columns are the new
# memory, also when there are fewer new inputs than that.
# </details>
#
# <details><summary>Hint: which way is time?</summary>
#
# `nn.Conv1d` wants (batch, channels, length), everything else (batch, length, channels): `.mT` goes
# from one to the other.
# </details>
#
# <details><summary>Hint: step</summary>
#
# It is forward for a length of 1, so that calling it is one solution. Written out, the convolution
# is a product of its window with the filter and a sum, and the scan one line.
# </details>


# %% tags=["support"]
# Support: a Mamba block with random parameters, and what it computes, in float64 and by loops
def random_block(generator, d_model, dtype=torch.float32, **sizes):
    """No two channels are alike in it."""
    block = MambaBlock(d_model, **sizes).to(profile.device, dtype)
    values = {}
    for name, p in block.state_dict().items():
        scale = 0.5 if name in ("A_log", "D") else 1 / math.sqrt(p.shape[-1]) if p.dim() > 1 else 1
        values[name] = checks.randn(*p.shape, generator=generator, dtype=dtype, scale=scale)
    values["D"] = values["D"] + 1
    block.load_state_dict(values)
    return block


def block_loop(values, x, d_state, memory=None, hold=False):
    """(y, conv, h) from a block's state_dict, for x (batch, length, d_model)."""
    p = {name: t.double() for name, t in values.items()}
    d_inner, _, taps = p["conv1d.weight"].shape
    rank = p["dt_proj.weight"].shape[1]
    u, z = (x.double() @ p["in_proj.weight"].mT).split(d_inner, dim=-1)
    conv, h = (None, None) if memory is None else memory
    conv = u.new_zeros(len(u), d_inner, taps - 1) if conv is None else conv.double()
    window = torch.cat([conv.mT, u], 1)  # (batch, taps − 1 + length, d_inner)
    u = (
        sum(window[:, k : k + x.shape[1]] * p["conv1d.weight"][:, 0, k] for k in range(taps))
        + p["conv1d.bias"]
    )
    u = u * u.sigmoid()
    features, B, C = (u @ p["x_proj.weight"].mT).split([rank, d_state, d_state], dim=-1)
    dt = torch.log1p(torch.exp(features @ p["dt_proj.weight"].mT + p["dt_proj.bias"]))
    y, h = selective_loop(u, dt, -torch.exp(p["A_log"]), B, C, p["D"], h, hold)
    y = (y * z * z.sigmoid()) @ p["out_proj.weight"].mT
    return y, window[:, x.shape[1] :].mT, h


# %% check="mamba_block" points=2
# A small block on six tokens, against the same in loops.
gen = checks.generator(24)
block = random_block(gen, 3, d_state=2, d_conv=3)
values = {name: t.clone() for name, t in block.state_dict().items()}
x = checks.randn(2, 6, 3, generator=gen)
y, memory = checks.parts(block(x), "y", "memory", what="forward")
conv, h = checks.parts(memory, "conv", "h", what="the memory")


def with_change(**changed):
    """y of the same block with other weights: what a usual mistake amounts to."""
    return block_loop(values | {k.replace("__", "."): v for k, v in changed.items()}, x, 2)[0]


in_proj, x_proj, taps = (values[k] for k in ("in_proj.weight", "x_proj.weight", "conv1d.weight"))
expected, expected_conv, expected_h = block_loop(values, x, 2)
checks.close(
    y,
    expected,
    what="y",
    mistakes={
        "exchanging u and z": with_change(in_proj__weight=in_proj.roll(6, 0)),
        "exchanging B and C": with_change(
            x_proj__weight=torch.cat([x_proj[:1], x_proj[3:], x_proj[1:3]])
        ),
        "leaving out the convolution's bias": with_change(conv1d__bias=values["conv1d.bias"] * 0),
        "a filter turned round": with_change(conv1d__weight=taps.flip(-1)),
        "leaving out the bias of dt_proj": with_change(dt_proj__bias=values["dt_proj.bias"] * 0),
        "the zero-order hold in the scan": block_loop(values, x, 2, hold=True)[0],
    },
)
checks.close(
    conv, expected_conv, what="conv", hint="The last d_conv − 1 inputs, before the filter."
)
checks.close(h, expected_h, what="h")
### BEGIN HIDDEN TESTS
gen = checks.generator(25)
for batch, length, d_model, sizes, dtype in [
    (2, 9, 4, {"d_state": 3, "d_conv": 4, "expand": 3}, torch.float32),
    (3, 2, 5, {"d_state": 2, "d_conv": 5, "dt_rank": 3}, torch.float64),
    (1, 1, 2, {"d_state": 1, "d_conv": 2, "expand": 1}, torch.float64),
    (2, 5, 3, {"d_state": 4, "d_conv": 1}, torch.float64),
    (1, 7, 20, {}, torch.float64),
]:
    block = random_block(gen, d_model, dtype, **sizes)
    values = {name: t.clone() for name, t in block.state_dict().items()}
    x = checks.randn(length, batch, d_model, generator=gen, dtype=dtype).transpose(0, 1)
    with checks.kept(x, block=block):
        y, (conv, h) = block(x)
    expected, expected_conv, expected_h = block_loop(values, x, sizes.get("d_state", 16))
    where = f"(batch, length, d_model) = {(batch, length, d_model)}, {sizes}."
    checks.close(y, expected, dtype=dtype, what="y", hint=where)
    checks.close(conv, expected_conv, dtype=dtype, what="conv", hint=where)
    checks.close(h, expected_h, dtype=dtype, what="h", hint=where)
    dt, B, C = block.select(checks.randn(2, block.d_inner, generator=gen, dtype=dtype))
    assert bool((dt > 0).all()), "dt is a softplus: above 0"
    assert B.shape == C.shape == (2, block.d_state), (
        "select takes (…, d_inner) with any number of axes before it, one too"
    )
block = random_block(gen, 3, d_state=2, d_conv=3)
leaves = {k: t.double().requires_grad_() for k, t in block.state_dict().items()}
x = checks.randn(2, 6, 3, generator=gen)
names = [name for name, _ in block.named_parameters()]
cotangent = checks.randn(2, 6, 3, generator=gen)
found = torch.autograd.grad(
    (block(x)[0] * cotangent).sum(), list(block.parameters()), allow_unused=True
)
due = torch.autograd.grad(
    (block_loop(leaves, x, 2)[0] * cotangent).sum(), [leaves[name] for name in names]
)
for name, mine, right in zip(names, found, due, strict=True):
    assert mine is not None, f"no gradient reaches {name}"
    checks.close(mine, right, what=f"the gradient of {name}", rtol=1e-4)
# Steps from e^(−30) to 150: exp of an argument overflows, or is lost in a 1.
bias = torch.tensor([-30.0, -18.0, -1.0, 19.0, 95.0, 150.0], device=profile.device)
changed = {"dt_proj.bias": bias, "dt_proj.weight": 0 * block.state_dict()["dt_proj.weight"]}
block.load_state_dict(block.state_dict() | changed)
dt, _, _ = block.select(checks.randn(2, 6, generator=gen))
checks.close(
    dt, bias.double().exp().log1p().expand(2, 6), dtype=torch.float32, rtol=1e-5, atol=0,
    what=f"dt, the softplus of {bias.tolist()}",
)  # fmt: skip
found = torch.autograd.grad(dt.sum(), list(block.parameters()), allow_unused=True)
checks.close(
    found[names.index("dt_proj.bias")], 2 * bias.double().sigmoid(), dtype=torch.float32,
    rtol=1e-5, atol=0, what=f"the gradient of dt for {bias.tolist()}",
)  # fmt: skip
expected = block_loop(block.state_dict(), x, 2)
y, memory = block(x)
checks.close(y, expected[0], what="y with steps from e^(−30) to 150")
checks.close(memory[1], expected[2], what="h with steps from e^(−30) to 150")
memory, outputs = None, []
for token in x.unbind(1):
    y, memory = block.step(token, memory)
    outputs.append(y)
checks.close(torch.stack(outputs, 1), expected[0], what="y of such steps, token by token")
### END HIDDEN TESTS

# %% check="mamba_block" points=2
# A sequence in two pieces, the second shorter than the filter.
gen = checks.generator(26)
block = random_block(gen, 3, d_state=2, d_conv=4)
x = checks.randn(2, 7, 3, generator=gen)
whole, _ = block(x)
first, memory = block(x[:, :5])
second, _ = block(x[:, 5:], memory)
checks.close(
    torch.cat([first, second], 1),
    whole.detach(),
    what="y in two pieces",
    hint="conv is put before the new inputs, and h goes into the scan.",
)
### BEGIN HIDDEN TESTS
gen = checks.generator(27)
for cuts, sizes in [
    ((1, 1, 5, 2, 1), {"d_state": 3, "d_conv": 4}),
    ((4, 1, 3), {"d_state": 2, "d_conv": 6, "expand": 1}),
    ((2, 2, 2), {"d_state": 2, "d_conv": 1}),
]:
    block = random_block(gen, 3, torch.float64, **sizes)
    x = checks.randn(2, sum(cuts), 3, generator=gen, dtype=torch.float64)
    whole, (whole_conv, whole_h) = block(x)
    expected, _, _ = block_loop(block.state_dict(), x, sizes["d_state"])
    checks.close(whole, expected, dtype=torch.float64, what="y in one piece")
    memory, pieces = None, []
    for piece in x.split(cuts, 1):
        if memory is not None:
            with checks.unchanged(conv=memory[0], h=memory[1], x=piece):
                y, memory = block(piece, memory)
        else:
            y, memory = block(piece)
        pieces.append(y)
    where = f"pieces of {cuts}, {sizes}."
    checks.close(torch.cat(pieces, 1), whole.detach(), what="y in pieces", hint=where)
    checks.close(memory[0], whole_conv.detach(), what="conv after the last piece", hint=where)
    checks.close(memory[1], whole_h.detach(), what="h after the last piece", hint=where)
    # From a memory that no sequence has made.
    memory = tuple(checks.randn(*m.shape, generator=gen, dtype=torch.float64) for m in memory)
    y, (conv, h) = block(x, memory)
    expected = block_loop(block.state_dict(), x, sizes["d_state"], memory)
    for mine, right, what in zip((y, conv, h), expected, ("y", "conv", "h"), strict=True):
        checks.close(mine, right, what=f"{what} from a random memory", hint=where)
### END HIDDEN TESTS

# %% check="mamba_block" points=2
# Token by token, the block gives what it gives for the whole.
gen = checks.generator(28)
block = random_block(gen, 3, d_state=2, d_conv=3)
x = checks.randn(2, 5, 3, generator=gen)
expected, _, _ = block_loop(block.state_dict(), x, 2)
memory, outputs = None, []
for token in x.unbind(1):
    y, memory = checks.parts(block.step(token, memory), "y", "memory", what="step")
    outputs.append(y)
checks.close(torch.stack(outputs, 1), expected, what="y token by token")
### BEGIN HIDDEN TESTS
gen = checks.generator(29)
for batch, d_model, sizes, dtype in [
    (3, 4, {"d_state": 3, "d_conv": 4, "expand": 3, "dt_rank": 2}, torch.float64),
    (1, 2, {"d_state": 1, "d_conv": 1}, torch.float64),
    (2, 3, {"d_state": 5, "d_conv": 2}, torch.float32),
]:
    block = random_block(gen, d_model, dtype, **sizes)
    values = block.state_dict()
    x = checks.randn(batch, 9, d_model, generator=gen, dtype=dtype)
    prefix, memory = block(x[:, :4])
    expected, expected_conv, expected_h = block_loop(values, x, sizes["d_state"])
    for t in range(4, 9):
        with checks.kept(x, block=block), checks.unchanged(conv=memory[0], h=memory[1]):
            y, memory = block.step(x[:, t], memory)
        assert y.shape == (batch, d_model), f"y of step is (batch, d_model), not {tuple(y.shape)}"
        checks.close(y, expected[:, t], dtype=dtype, what=f"y of step after {t} tokens of forward")
    checks.close(memory[0], expected_conv, dtype=dtype, what="conv after the steps")
    checks.close(memory[1], expected_h, dtype=dtype, what="h after the steps")
    longer, _ = block(x[:, 4:], block(x[:, :4])[1])
    checks.close(longer, expected[:, 4:], dtype=dtype, what="forward after forward")
    y, (conv, h) = block.step(x[:, 0], None)
    checks.close(y, expected[:, 0], dtype=dtype, what="the first step")
    assert conv.shape == (batch, block.d_inner, block.d_conv - 1), "conv after the first step"
# Gradients go through steps as through the whole.
block = random_block(gen, 3, torch.float64, d_state=2, d_conv=2)
x = checks.randn(2, 3, 3, generator=gen, dtype=torch.float64)


def by_steps(x):
    outputs, memory = [], None
    for token in x.unbind(1):
        y, memory = block.step(token, memory)
        outputs.append(y)
    return torch.stack(outputs, 1)


values = {name: t.clone() for name, t in block.state_dict().items()}
checks.gradients(by_steps, lambda x: block_loop(values, x, 2)[0], x, names=("x",))
block = random_block(gen, 8, d_state=4)
x = checks.randn(2, 40, 8, generator=gen)
_, memory = block(x)
with checks.allocations() as made:
    block.step(x[:, 0], memory)
bound = 2 * 16 * max(2 * 4, 4, 1)
assert made.largest <= bound, (
    f"step made a tensor of {made.largest} numbers; {bound} are allowed for 2 rows, 16 channels "
    "and 4 numbers of state"
)
### END HIDDEN TESTS

# %% [markdown]
# **What decoding carries.** The block's memory is fixed; a KV cache grows. Below: the cache that
# `small` really keeps for a text, next to the memory of a Mamba model of its width and twice as
# many blocks (a Mamba block has no MLP beside it, so that models of equal size have about twice as
# many).

# %% tags=["experiment"]
cache = models.Cache()
with torch.inference_mode():
    small(texts["documentation"][None], cache)
kept = sum(t.numel() for layer in cache.layers for t in layer)
config = small.config
mamba = MambaBlock(config.hidden_size)
with torch.inference_mode():
    _, memory = mamba(torch.zeros(1, 3, config.hidden_size))
state = 2 * config.layers * sum(t.numel() for t in memory)
per_token = kept // 256
print(f"`small`: {per_token} numbers of cache per token, {kept:,} after 256 tokens")
print(f"Mamba, {2 * config.layers} blocks of width {config.hidden_size}: {state:,} numbers, always")
print(f"as much as the cache of {state / per_token:.0f} tokens")

# %% [markdown]
# ## Experiment: what selection buys
#
# **The task.** Three symbols out of eight, then the word "now" three times: say the symbols, in
# order. In the first version they stand at the beginning, always in the same three places, followed
# by blanks. In the second they are **scattered** among the blanks, at places that differ from
# sequence to sequence. In the third, **induction**, random symbols are read; one of them
# stands behind a mark, and when the mark comes again, that symbol is asked for.
#
# **The contestants** have one block of the same shape and one layer of it each: your Mamba block,
# and one in which a *free filter* stands in place of the scan: a learned number for every lag and
# channel. Whatever a system that never changes can compute, for any $N$, such a filter can.
#
# **Write down** for each task who will solve it: neither, one (which?), or both. About induction
# think twice: in both blocks a short convolution and a SiLU come before the filter or scan.

# %% tags=["experiment"]
PLACES, ITEMS, SYMBOLS = 16, 3, 8
BLANK, NOW = 0, SYMBOLS + 1  # symbols are 1 … 8


def make_copying(batch, generator, scattered):
    """(tokens, answers): blanks with three symbols, then "now" three times."""
    answers = torch.randint(1, SYMBOLS + 1, (batch, ITEMS), generator=generator)
    places = torch.arange(ITEMS).expand(batch, -1)
    if scattered:
        places = torch.rand(batch, PLACES, generator=generator).topk(ITEMS).indices.sort().values
    tokens = torch.full((batch, PLACES + ITEMS), BLANK)
    tokens[:, PLACES:] = NOW
    return tokens.scatter(1, places, answers), answers


def make_induction(batch, generator):
    """(tokens, answers): random symbols with a mark among them, and the mark again."""
    tokens = torch.randint(1, SYMBOLS + 1, (batch, PLACES + 1), generator=generator)
    place = torch.randint(0, PLACES - 2, (batch, 1), generator=generator)
    tokens.scatter_(1, place, NOW)
    tokens[:, -1] = NOW
    return tokens, tokens.gather(1, place + 1)


TASKS = {
    "fixed places": lambda batch, g: make_copying(batch, g, False),
    "scattered": lambda batch, g: make_copying(batch, g, True),
    "induction": make_induction,
}


class FilterBlock(nn.Module):
    """Mamba's block with a free filter in place of the scan."""

    def __init__(self, d_model, taps=PLACES + ITEMS, d_conv=4):
        super().__init__()
        d_inner = 2 * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.filter = nn.Parameter(torch.randn(d_inner, taps) * taps**-0.5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x):
        inner, gate = self.in_proj(x).chunk(2, dim=-1)
        inner = F.silu(self.conv1d(inner.mT)[..., : x.shape[1]]).mT
        return self.out_proj((inner + ssm_convolution(inner, self.filter)) * F.silu(gate)), None


class Copier(nn.Module):
    """Embedding, x + block(norm(x)), norm, head."""

    def __init__(self, block, width=32):
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS + 2, width)
        self.norm, self.block, self.last_norm = nn.RMSNorm(width), block, nn.RMSNorm(width)
        self.head = nn.Linear(width, SYMBOLS + 2, bias=False)

    def forward(self, tokens):
        x = self.symbols(tokens)
        return self.head(self.last_norm(x + self.block(self.norm(x))[0]))


def train_copier(kind, make, steps, seed):
    """A model, and the share of answers that are right on 512 new sequences."""
    torch.manual_seed(seed)
    model = Copier(MambaBlock(32, d_state=8) if kind == "selective" else FilterBlock(32))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )
    for _ in range(steps):
        tokens, answers = make(32, generator)
        surprise = F.cross_entropy(model(tokens)[:, -answers.shape[1] :].transpose(1, 2), answers)
        optimizer.zero_grad()
        surprise.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
    tokens, answers = make(512, generator)
    with torch.inference_mode():
        said = model(tokens)[:, -answers.shape[1] :].argmax(-1)
    return model, float((said == answers).float().mean())


STEPS = 250
threads = torch.get_num_threads()
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
solved, trained = {}, {}
for task, make in TASKS.items():
    for kind in ("fixed filter", "selective"):
        trained[task, kind], solved[task, kind] = train_copier(kind, make, STEPS, seed=0)
torch.set_num_threads(threads)
_, answers = make_copying(4096, torch.Generator().manual_seed(1), True)
shuffled = answers.gather(1, torch.rand(answers.shape).argsort(1))
for task in TASKS:
    print(
        f"{task:13} "
        + ", ".join(f"{kind} {solved[task, kind]:.1%}" for kind in ("fixed filter", "selective"))
    )
print(f"the right symbols in random order: {float((shuffled == answers).float().mean()):.1%}")

# %% tags=["experiment", "figure"]
# Figure: who solves what, and where the selective block takes its large steps
model = trained["scattered", "selective"]
tokens, answers = make_copying(1, torch.Generator().manual_seed(7), scattered=True)
seen = []
model.block.select, select = (lambda u: seen.append(select(u)) or seen[-1]), model.block.select
with torch.inference_mode():
    model(tokens)
del model.block.select
dt = seen[0][0][0].T  # (channels, tokens)
symbols = torch.isin(tokens[0], answers[0]).nonzero()[:, 0]
# The convolution looks back: a symbol may show one to three tokens later. At which distance most?
contrast = torch.stack([dt[:, symbols + lag].mean(1) - dt[:, :PLACES].mean(1) for lag in range(4)])
lag = int(contrast.clamp(min=0).sum(1).argmax())
order = contrast[lag].argsort(descending=True)
fig, axes = plt.subplots(1, 2, figsize=(12, 3.8), width_ratios=[1, 1.6])
for i, kind in enumerate(("fixed filter", "selective")):
    axes[0].bar(
        [x + 0.4 * i - 0.2 for x in range(3)], [100 * solved[task, kind] for task in TASKS],
        width=0.38, label=kind, color=plot.COLORS[i], edgecolor="black", hatch=["", "//"][i],
    )  # fmt: skip
axes[0].axhline(100 / SYMBOLS, color="#777777", linewidth=1, linestyle=":")
axes[0].set_xticks(range(3), TASKS)
axes[0].set(ylabel="answers right (%)", ylim=(0, 119))
axes[0].legend(ncols=2, loc="upper center", fontsize=8)
axes[0].set_title("one block, three tasks")
plot.heatmap(
    dt[order], xlabel="token (· is a blank, N is “now”)", ylabel="channel",
    title="steps Δ of the scattered task's block", unit="Δ", yticks=[""] * len(dt),
    xticks=["·" if t == BLANK else "N" if t == NOW else str(int(t)) for t in tokens[0]],
    ax=axes[1],
)  # fmt: skip
axes[1].set_aspect("auto")
axes[1].tick_params(axis="x", rotation=0)
plot.caption(
    fig,
    "Left: dotted is guessing. Right: one sequence; a row is a channel, sorted by how much larger "
    f"its steps are {lag} tokens after the symbols than elsewhere. The upper ones write there and "
    "keep still between.",
)
plt.show()

# %% [markdown]
# **What came out.** At fixed places the filter is perfect: it learns one delay for each place. The
# scattered symbols are beyond it: it weighs what it has seen by distance alone, and the distances
# differ from sequence to sequence. It does better than naming the right symbols in random order,
# and much worse than the selective block, which was far ahead in each of the five seeds tried for
# this page, though not perfect after so few steps.
#
# Induction is the honest surprise. The textbook task for selection is solved in good part by the
# block without any: the short convolution puts the mark and the symbol behind it side by side, and
# the SiLU can make a feature of the pair that is 0 for all others. That *is* a selection, before
# the filter. What a filter cannot do is to let one token decide how long another is kept.
#
# The steps are large a few tokens *after* a symbol, as far as the convolution looks back.

# %% [markdown]
# ## What a decay cannot do {#decay}
#
# Read bits and say, after each, whether the ones so far are odd in number: **parity**, one bit of
# memory. A two-state machine does it. Mamba, of any size, does not, once the input is long enough.
#
# **One layer, by counting.** Feed ones only. Every token is alike, so each state obeys $h_t = a
# h_{t-1} + b$ with one fixed $a = e^{\Delta A}$, strictly between 0 and 1. Then $h_t = h_* +
# \alpha\, a^t$, and what one channel reads, before `out_proj`, is $y_t = c_0 + \sum_{n=1}^N c_n
# a_n^t$. How often can it cross a threshold? Claim: at most $N$ times. A sum of $k$ terms $c_n
# a_n^t$ with different positive bases has at most $k - 1$ zeros, unless it is 0 throughout. For one
# term that is clear. For $k$ terms divide by $a_1^t$: the zeros stay, and one term is constant now.
# Between two zeros the derivative has one (Rolle), and the derivative has $k - 1$ terms, thus at
# most $k - 2$ zeros. ∎ With the constant less the threshold as one more term, of base 1, that makes
# $N$. Parity of ones crosses at every token.
#
# **Any depth, by convergence.** On ones every state converges; so what the layer hands on does, and
# what the next does with it. In the end the output stands still, and at finite precision it stops
# moving altogether (Sarrof et al. 2024; Grazzi et al. 2025).

# %% tags=["experiment", "figure"]
# Figure: the best that positive decays can do for parity
T = 24
t = torch.arange(T, dtype=torch.float64)
parity_of_ones = torch.where(t % 2 == 0, 1.0, 0.0).double()  # after the first token: odd
grid = torch.linspace(0.02, 0.99, 33, dtype=torch.float64)


def best_decays(N):
    """A least-squares fit by a constant and N decays of the grid, added one by one: (T,)."""
    columns, best = [torch.ones(T).double()], None
    for _ in range(N):
        trials = []
        for a in grid:
            basis = torch.stack([*columns, a**t], 1)
            found = torch.linalg.lstsq(basis, parity_of_ones[:, None], driver="gelsd").solution
            trials.append((float((basis @ found)[:, 0].dist(parity_of_ones)), a, basis @ found))
        _, a, best = min(trials, key=lambda trial: trial[0])
        columns.append(a**t)
    return best[:, 0]


fits = {N: best_decays(N) for N in (2, 4, 8)}
fig, ax = plt.subplots(figsize=(8, 3.3))
ax.plot(t + 1, parity_of_ones, "o", color="#999999", markersize=4, label="parity", zorder=4)
for N, fit in fits.items():
    ax.plot(t + 1, fit, label=f"{N} decays")
    crossings = int(((fit[1:] > 0.5) != (fit[:-1] > 0.5)).sum())
    print(f"{N} positive decays, reading ones: {crossings} crossings of ½ in {T} tokens")
ax.axhline(0.5, color="#777777", linewidth=1, linestyle=":")
ax.set(xlabel="ones read", ylabel="output", ylim=(-0.35, 1.6))
ax.set_title("positive decays: at most N crossings")
ax.legend(ncols=4, fontsize=8, loc="upper center")
plot.caption(
    fig,
    "A sum of N decays and a constant, fitted to parity by least squares. Whatever its "
    "coefficients, it crosses ½ at most N times; then it stands still.",
)
plt.show()

# %% [markdown]
# **A state that turns.** Let $a$ be negative or complex: $h_t = e^{i\theta_t} h_{t-1}$ with
# $\theta_t = \pi$ for a one and 0 for a zero. The state points left or right, and its real part is
# $(-1)^{\text{ones}}$, at any length, untrained. Turning by $2\pi/m$ counts modulo $m$.
#
# **Complex numbers are not needed.** Let $\Phi_t = \theta_1 + \dots + \theta_t$ and look at the
# state from a frame that turns along, $g_t = e^{-i\Phi_t} h_t$. From
# $h_t = r_t e^{i\theta_t} h_{t-1} + b_t$ follows
#
# $$g_t = r_t\, g_{t-1} + e^{-i\Phi_t}\, b_t, \qquad h_t = e^{i\Phi_t} g_t .$$
#
# The decays are real again: any scan of this lesson will do, for the real and the imaginary part
# alike. What is written is turned by $-\Phi_j$, what is read by $\Phi_i$; only the difference
# counts. That is rotary position embedding (lesson 08) with angles that the tokens choose, and how
# Mamba-3 computes its complex states.
#
# ### Exercise · A state that turns


# %% exercise="turning_scan" minutes=15 difficulty=2 path="more"
def turning_scan(
    decay: Tensor,
    angle: Tensor,
    b: Tensor,
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor | None = None,
) -> Tensor:
    """All states of h_t = decay_t · e^(i·angle_t) · h_(t−1) + b_t, by a scan of real numbers.

    decay, angle: (batch, length, N), real, float32 or float64. b: (batch, length, N), complex of
    that precision, or real. start: (batch, N) before the first token, complex or real; None: zeros.

    scan(a, x, first) is given: for real a and x (batch, length, N) and first (batch, N), all of the
    dtype of decay, it returns all states of g_t = a_t · g_(t−1) + x_t from g = first, (batch,
    length, N). It is called twice, with `decay` as a, and nothing else goes from token to token but
    the sum of the angles.

    Returns h (batch, length, N), complex64 for float32, complex128 for float64. Changes nothing.
    """
    ### BEGIN SOLUTION
    phase = angle.cumsum(1)
    turn = torch.polar(torch.ones_like(phase), phase)  # e^(iΦ)
    x = b * turn.conj()
    first = torch.zeros_like(turn[:, 0]) if start is None else start.to(turn.dtype)
    real = scan(decay, x.real.contiguous(), first.real.contiguous())
    imag = scan(decay, x.imag.contiguous(), first.imag.contiguous())
    return torch.complex(real, imag) * turn
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the frame</summary>
#
# $\Phi$ is `angle.cumsum(1)`, $e^{i\Phi}$ `torch.polar(ones, Φ)`, and its inverse the conjugate.
# Before the first token nothing has turned: `start` goes in as it is.
# </details>


# %% check="turning_scan" points=2
# Parity: the state starts at 1, each one turns it by π, nothing is ever added.
def real_scan(a, x, first):
    g, out = first, []
    for t in range(a.shape[1]):
        g = a[:, t] * g + x[:, t]
        out.append(g)
    return torch.stack(out, 1)


bits = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).view(1, 6, 1)
h = turning_scan(
    torch.ones(1, 6, 1), math.pi * bits, torch.zeros(1, 6, 1), real_scan, torch.ones(1, 1)
)
checks.kind(h, Tensor, what="the states")
assert h.dtype == torch.complex64, f"the states have dtype {h.dtype}, not torch.complex64"
checks.close(
    h.real[0, :, 0].contiguous(),
    [-1.0, -1.0, 1.0, -1.0, -1.0, 1.0],
    what="the real part of the state",
    hint="−1 where the ones so far are odd in number.",
    mistakes={
        "turning by each angle alone, not by their sum": [-1.0, 1.0, -1.0, -1.0, 1.0, -1.0],
        "leaving out the start": [0.0] * 6,
    },
)
### BEGIN HIDDEN TESTS
gen = checks.generator(30)


def complex_randn(*shape, generator, dtype):
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.randn(*shape, generator=generator, dtype=kind).to(profile.device)


used = []


def watched_scan(a, x, first):
    used.append((a.clone(), x.dtype, first.dtype, tuple(first.shape)))
    return real_scan(a, x, first)


for batch, length, N, dtype in [
    (2, 9, 3, torch.float64),
    (3, 1, 1, torch.float64),
    (1, 20, 2, torch.float32),
]:
    decay = uniform(batch, length, N, generator=gen, low=0.2, dtype=dtype)
    angle = checks.randn(length, batch, N, generator=gen, dtype=dtype, scale=2.0).transpose(0, 1)
    written = complex_randn(batch, length, N, generator=gen, dtype=dtype)
    start = complex_randn(batch, N, generator=gen, dtype=dtype)
    for b, first in ((written, start), (written.real.contiguous(), None), (written, start.real)):
        used.clear()
        with checks.unchanged(decay=decay, angle=angle, b=b):
            h = turning_scan(decay, angle, b, watched_scan, first)
        g = torch.zeros_like(start) if first is None else first
        expected = []
        for t in range(length):
            factor = decay[:, t].double() * torch.exp(1j * angle[:, t].double())
            g = factor * g + b[:, t]
            expected.append(g)
        expected = torch.stack(expected, 1)
        assert h.dtype == start.dtype, f"h has dtype {h.dtype}, not {start.dtype}"
        checks.close(
            torch.view_as_real(h.contiguous()),
            torch.view_as_real(expected).to(dtype),
            what=f"real and imaginary parts of h, (batch, length, N) = {(batch, length, N)}",
        )
        assert len(used) == 2, f"scan is called {len(used)} times, not twice"
        for a, x_dtype, first_dtype, shape in used:
            checks.close(a, decay, dtype=dtype, what="what scan gets as its decays")
            assert x_dtype == first_dtype == dtype, (
                f"scan gets x of {x_dtype} and first of {first_dtype}; {dtype} is asked for"
            )
            assert shape == (batch, N), f"scan gets first of shape {shape}, not {(batch, N)}"
# Law: parity at a length of 3000, and counting modulo 5, exactly.
bits = (torch.rand(1, 3000, 1, generator=gen) < 0.5).double()
one = torch.ones(1, 1).double()
for modulus in (2, 5):
    h = turning_scan(torch.ones_like(bits), 2 * math.pi / modulus * bits, 0 * bits, real_scan, one)
    counted = (torch.angle(h[0, :, 0]) / (2 * math.pi / modulus)).round() % modulus
    checks.close(counted, bits[0, :, 0].cumsum(0) % modulus, what=f"ones modulo {modulus}")
### END HIDDEN TESTS


# %% tags=["experiment", "figure"]
# Figure: one state that turns, on random bits
def scan_by_tree(a, x, first):
    """g_t = a_t · g_(t−1) + x_t from g = first, by your associative_scan."""
    x = torch.cat([x[:, :1] + a[:, :1] * first[:, None], x[:, 1:]], 1)
    return associative_scan(compose, (a.transpose(0, 1), x.transpose(0, 1)))[1].transpose(0, 1)


bits = (torch.rand(48, generator=torch.Generator().manual_seed(2)) < 0.4).double()
one, none = torch.ones(1, 48, 1).double(), torch.zeros(1, 48, 1).double()
h = turning_scan(one, math.pi * bits.view(1, -1, 1), none, scan_by_tree, one[:, 0])[0, :, 0]
right = int(((h.real < 0) == (bits.cumsum(0) % 2 == 1)).sum())
fig, ax = plt.subplots(figsize=(8, 3))
ax.step(range(1, 49), h.real, where="mid", linestyle="-")
ax.plot((bits.nonzero() + 1)[:, 0], [-1.35] * int(bits.sum()), "|", color="black", markersize=9)
ax.set(xlabel="bits read (a stroke is a one)", ylabel="real part of the state", ylim=(-1.6, 1.4))
ax.set_title("one state, turned by π at each one")
plot.caption(
    fig,
    f"No training: {right} of 48 answers are right, and at no length does it end. Below 0 the ones "
    "so far are odd in number.",
)
plt.show()

# %% [markdown]
# ## Key questions
#
# ### Exercise · Short answers, by number
#
# One value a question; write an expression, or the number itself.


# %% exercise="ssm_numbers" minutes=8 difficulty=2 kind="questions"
def ssm_numbers() -> dict[str, float | str]:
    """A dictionary of seven answers, numbers to 1 percent.

    "zoh":        the zero-order hold's B̄ for A = −2, B = 3 and a step of 0.5.
    "half_life":  A = −1 and a step of 0.001 at every token: after how many tokens is half of what a
        token wrote forgotten?
    "pass_by":    the step with which a token leaves the state as it is: "small" or "large".
    "state":      Mamba with 64 blocks, d_model 2560, expand 2, d_state 16, d_conv 4: bytes, at 2
        per number, of all that decoding one sequence keeps (states, and d_conv − 1 inputs of each
        convolution).
    "tokens":     a transformer with 32 layers, 8 key-value heads of 128, 2 bytes a number: with
        how many tokens is its KV cache as large as that?
    "more_work":  the scan of Hillis and Steele over 4096 elements combines L·log₂L − L + 1 pairs.
        How many times as many is that as the 2L − log₂L − 2 pairs of a work-efficient scan?
    "crossings":  16 positive decays and a constant read a sequence of ones. How often, at most,
        does their output cross a threshold?
    """
    ### BEGIN SOLUTION
    state = 64 * 5120 * (16 + 3) * 2
    return {
        "zoh": 3 * (1 - math.exp(-1)) / 2,
        "half_life": math.log(2) / 0.001,
        "pass_by": "small",
        "state": state,
        "tokens": state / (32 * 8 * 128 * 2 * 2),
        "more_work": (4096 * 12 - 4095) / (2 * 4096 - 12 - 2),
        "crossings": 16,
    }
    ### END SOLUTION


# %% check="ssm_numbers" points=1
answer = ssm_numbers()["zoh"]
checks.kind(answer, float, what="zoh")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.948181,
    what="zoh",
    hint="(e^(ΔA) − 1)/A · B.",
    mistakes={"Euler's rule": 1.5, "dividing by ΔA": 1.896362},
)
### END HIDDEN TESTS

# %% check="ssm_numbers" points=1
answer = ssm_numbers()["half_life"]
checks.kind(answer, float, what="half_life")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    693.147,
    what="half_life",
    hint="Every token multiplies it by e^(−0.001).",
    mistakes={"the time to a share of 1/e": 1000.0},
)
### END HIDDEN TESTS

# %% check="ssm_numbers" points=1
answer = ssm_numbers()["pass_by"]
assert answer in ("small", "large"), f"pass_by is 'small' or 'large'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "small", "pass_by: what are e^(ΔA) and Δ·B for that step?"
### END HIDDEN TESTS

# %% check="ssm_numbers" points=1
answer = ssm_numbers()["state"]
checks.kind(answer, float, what="state")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    12_451_840,
    what="state",
    hint="5120 channels a block, each with its state and its part of the convolution.",
    mistakes={
        "the states alone": 10_485_760.0,
        "d_model channels in place of d_inner": 6_225_920.0,
        "four inputs of the convolution": 13_107_200.0,
        "numbers, not bytes": 6_225_920.0,
    },
)
### END HIDDEN TESTS

# %% check="ssm_numbers" points=1
answer = ssm_numbers()["tokens"]
checks.kind(answer, float, what="tokens")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    95.0,
    what="tokens",
    hint="A token's keys and values take 32 · 8 · 128 · 2 numbers.",
    mistakes={"counting keys only": 190.0},
)
### END HIDDEN TESTS

# %% check="ssm_numbers" points=1
answer = ssm_numbers()["more_work"]
checks.kind(answer, float, what="more_work")
### BEGIN HIDDEN TESTS
checks.number(answer, 5.50954, what="more_work", hint="45,057 pairs against …")
### END HIDDEN TESTS

# %% check="ssm_numbers" points=1
answer = ssm_numbers()["crossings"]
checks.kind(answer, float, what="crossings")
### BEGIN HIDDEN TESTS
checks.number(
    answer, 16, what="crossings", hint="How many terms has the sum, the threshold included?"
)
### END HIDDEN TESTS

# %% [markdown]
# Three more are open; write two or three sentences each.
#
# **1.** Mamba gave up the convolution, with which S4 trained. What made that affordable, and what
# did Mamba-2 give up in turn?

# %% [markdown] answer="trades"
# A selective system has no fixed filter, but its steps compose associatively, so a scan runs in
# parallel with twice the work of a loop; and a fused kernel keeps the states, $N$ times the size of
# inputs and outputs, on chip. The scan uses no matrix products and so leaves tensor cores idle.
# Mamba-2 gives a whole head one decay in place of one for each channel and state. Then the
# recurrence is a masked product of matrices, in chunks, and $N$ can be 64 or 128 in place of 16.

# %% [markdown]
# **2.** Write the backward pass of the gated scan $h_t = a_t h_{t-1} + b_t$, given
# $\bar h_t = \partial \ell/\partial h_t$ from outside. Which kernel computes it?

# %% [markdown] answer="backward-scan"
# Let $\delta_t$ be the whole gradient of $h_t$: $\delta_t = \bar h_t + a_{t+1}\delta_{t+1}$. That
# is a gated scan from right to left, with the decays shifted by one. Then $\partial\ell/\partial
# b_t = \delta_t$ and $\partial\ell/\partial a_t = \delta_t h_{t-1}$. The same kernel does it on
# reversed rows; $h$ is needed again, kept or computed anew.

# %% [markdown]
# **3.** An induction head has to find a token's earlier occurrence and say what came next. What
# limits how well a Mamba model does that in a long text, and why does a handful of attention layers
# in a stack of Mamba blocks help so much?

# %% [markdown] answer="why-hybrids"
# The state at any cut must hold every pair (token, successor) that may be asked for later: a block
# of rank $N$ per channel group cannot do more than about $N$ such associations, however they are
# written, while the text's number of pairs grows. Attention keeps all of them and finds one by
# content. A few such layers are enough for the look-ups, and the fixed states do the rest at
# constant cost: the hybrids of lesson 37.

# %% [markdown]
# ## References
#
# - Gu, Dao, Ermon, Rudra, Ré 2020, *HiPPO: Recurrent Memory with Optimal Polynomial Projections*,
#   arXiv:2008.07669: section 2, the projections; section 3, LegS.
# - Gu, Goel, Ré 2021, *Efficiently Modeling Long Sequences with Structured State Spaces* (S4),
#   arXiv:2111.00396: section 2, the three views of one system.
# - Gu, Gupta, Goel, Ré 2022, *On the Parameterization and Initialization of Diagonal State Space
#   Models* (S4D), arXiv:2206.11893: why the diagonal is enough.
# - Gu, Johnson, Timalsina, Rudra, Ré 2022, *How to Train Your HiPPO*, arXiv:2206.12037: what the
#   matrix means without its factor 1/t.
# - Gu, Dao 2023, *Mamba*, arXiv:2312.00752: section 3, selection and the scan; theorem 1, the gate.
# - Dao, Gu 2024, *Transformers are SSMs* (Mamba-2), arXiv:2405.21060: sections 3 to 6, duality and
#   the algorithm in chunks.
# - Lahoti, Li, Chen and others 2026, *Mamba-3*, arXiv:2603.15569: the trapezoidal rule, and complex
#   states as rotary embedding.
# - Martin, Cundy 2018, *Parallelizing Linear Recurrent Neural Nets Over Sequence Length*,
#   arXiv:1709.04057; Hillis, Steele 1986, *Data Parallel Algorithms*; and Blelloch 1990, *Prefix
#   Sums and Their Applications*: the scan.
# - Merrill, Petty, Sabharwal 2024, *The Illusion of State in State-Space Models*, arXiv:2404.08819;
#   Sarrof, Veitsman, Hahn 2024, *The Expressive Capacity of State Space Models*, arXiv:2405.17394;
#   Grazzi and others 2025, *Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues*,
#   arXiv:2411.12537: what decays cannot do.
# - In production: `state-spaces/mamba` (`mamba_ssm/ops`, `mamba_ssm/modules`), transformers'
#   `models/mamba` and `models/mamba2`, whose slow paths are plain PyTorch, and `triton-lang/triton`
#   for `tl.associative_scan`.
