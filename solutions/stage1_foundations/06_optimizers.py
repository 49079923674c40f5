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
#       SGD, Adam, AdamW, Lion and Muon as pure functions, the schedules, clipping and accumulation
#       around them, and a training loop made of all of it.
#     gpu: "Nothing more: every cell takes seconds on a CPU."
# ---

# %% [markdown]
# ## Core ideas
#
# Back-propagation hands you a gradient: the direction in which the loss rises fastest, at this
# point, for this batch. An **optimizer** decides what to do with it. The obvious rule, a small step
# against the gradient, trains a language model badly, and each of this lesson's algorithms answers
# one reason why:
#
# 1. **Directions differ in curvature.** The step that the steepest direction can bear is far too
#    short for the flat ones. **Momentum** lets steps in a steady direction add up.
# 2. **Parameters differ in scale.** The weights of a rare word see a gradient thousands of times
#    smaller than those of a common one. **Adam** measures each parameter's gradient and divides by
#    its size; **Lion** keeps only the sign.
# 3. **Weights grow.** Pulling them back toward zero through the gradient breaks inside Adam;
#    **AdamW** pulls on the weights themselves.
# 4. **A weight is part of a matrix.** A matrix stretches space along its singular directions, and
#    the gradient's few large ones drown the rest. **Muon** gives all of them the same length.
#
# Around the rule stands what every large training run has: a **schedule** for the learning rate
# with **warm-up**, **clipping** of the gradient's norm, and **accumulation** of gradients when the
# batch does not fit into memory.
#
# ### Notation
#
# | written | in code | means |
# |---|---|---|
# | $\theta$ | `param` | a parameter: a tensor of any shape |
# | $g_t$ | `grad` | its gradient at update $t$, of the same shape. Updates are counted from $t = 1$ |
# | $\eta$ | `lr` | the learning rate |
# | $\mu$, $\beta_1$, $\beta_2$ | `momentum`, `betas` | how much of an average is kept from one update to the next |
# | $\lambda$ | `weight_decay` | the strength of the pull toward zero |
# | $m_t$, $v_t$ | `exp_avg`, `exp_avg_sq` | running averages of $g$ and $g^2$ |
#
# Every optimizer here is a **pure function**: it takes a parameter, its gradient and the
# optimizer's memory (the **state**, a dict, empty before the first update), and returns a new
# parameter and a new state. Nothing is changed in place, so that an update can be repeated,
# compared and plotted. The new parameter and what the state holds of its size have the parameter's
# shape and format. Names in the state are those of `torch.optim` where it has the optimizer.

# %%
import math
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from llm40 import checks, data, plot
from torch import Tensor, nn


def follow(step: Callable, param: Tensor, grads: Sequence[Tensor], **settings) -> list[Tensor]:
    """The parameter after each update, when `step` meets these gradients one after the other. A
    list as lr is a schedule: one learning rate for each.
    """
    state, path = {}, []
    for t, grad in enumerate(grads):
        rate = {"lr": settings["lr"][t]} if isinstance(settings.get("lr"), list) else {}
        result = step(param, grad, state, **(settings | rate))
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise AssertionError(
                "an optimizer returns two things, the new parameter and the new state (a dict)."
            )
        param, state = result
        path.append(param)
    return path


# %% tags=["support"]
# Support: the same updates by torch.optim, and what every update here promises
def follow_torch(
    optimizer: type, param: Tensor, grads: Sequence[Tensor], **settings
) -> list[Tensor]:
    """The parameter after each update of a class of torch.optim; lr as in `follow`."""
    theta = nn.Parameter(param.clone())
    rates = settings.get("lr")
    first = {"lr": rates[0]} if isinstance(rates, list) else {}
    rule, path = optimizer([theta], **(settings | first)), []
    for t, grad in enumerate(grads):
        if isinstance(rates, list):
            rule.param_groups[0]["lr"] = rates[t]
        theta.grad = grad.clone()
        rule.step()
        path.append(theta.detach().clone())
    return path


RATES = [0.3, 0.1, 0.2, 0.0, 0.4, 0.05, 0.3, 0.02, 0.1, 0.2]  # a schedule, no two neighbors alike


def expect_path(
    actual: list[Tensor],
    expected: list[Tensor],
    what: str,
    mistakes: dict | None = None,
    **tolerance,
) -> None:
    """Two paths agree after the first update and after the last."""
    for t in (0, len(expected) - 1):
        checks.close(
            actual[t],
            expected[t],
            what=f"{what}: the parameter after {t + 1} of {len(expected)} updates",
            mistakes={name: path[t] for name, path in (mistakes or {}).items()},
            **tolerance,
        )


def expect_pure(
    step: Callable, param: Tensor, grads: Sequence[Tensor], *buffers: str, **settings
) -> None:
    """An update changes none of what it was given, and keeps what its docstring names: `buffers`,
    of the parameter's shape and format, and nothing else of that size.
    """
    with checks.unchanged(param=param, grad=grads[0]):
        middle, state = step(param, grads[0], {}, **settings)
    for name in buffers:
        assert name in state, f"the state has no {name!r}, only {', '.join(map(repr, state))}."
        checks.kind(state[name], Tensor, what=f"state[{name!r}]")
        assert state[name].shape == param.shape, (
            f"state[{name!r}] has shape {tuple(state[name].shape)}, the parameter has "
            f"{tuple(param.shape)}."
        )
    kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    with checks.unchanged(
        param=middle, grad=grads[1], **{f"state[{name!r}]": value for name, value in kept.items()}
    ):
        once, _ = step(middle, grads[1], state, **settings)
    again, _ = step(middle, grads[1], state, **settings)
    checks.close(
        again,
        once,
        what="the same update made twice from the same state",
        rtol=0,
        atol=0,
        hint="The state that came in was changed: return a new dict.",
    )
    size = sum(value.numel() for value in kept.values())
    assert size <= len(buffers) * param.numel() + 1, (
        f"the state holds {size / param.numel():.1f} numbers a parameter; {len(buffers)} are "
        "enough. In a model of billions of parameters each of them is gigabytes."
    )
    checks.keeps_dtype(
        lambda p, grad, again: step(p, again, step(p, grad, {}, **settings)[1], **settings),
        param,
        grads[0],
        grads[1],
        what="the new parameter or an average",
    )


def expect_count(step: Callable, updates: int = 3) -> None:
    """The state counts its updates."""
    state = {}
    for t in range(1, updates + 1):
        _, state = step(torch.ones(2), torch.ones(2), state)
        assert "step" in state, f"the state has no 'step', only {', '.join(map(repr, state))}."
        checks.number(state["step"], t, to=0, what=f"state['step'] after {t} of the updates")


# %% [markdown]
# ## Gradient descent and momentum {#gradient-descent}
#
# Near a minimum every smooth loss looks like a bowl, $\tfrac12\theta^\top H\theta$ with a symmetric
# $H$. Turn the axes to the eigenvectors of $H$ and the bowl falls apart into independent
# directions, each with its own **curvature** $\lambda_i > 0$. In one of them the gradient is
# $\lambda_i\theta$, so a step of gradient descent is
#
# $$\theta_{t+1} = \theta_t - \eta\,\lambda_i\,\theta_t = (1 - \eta\lambda_i)\,\theta_t .$$
#
# It converges if $|1 - \eta\lambda_i| < 1$, that is $\eta < 2/\lambda_i$, for **every** $i$: the
# steepest direction limits the learning rate. In the flattest one the error then shrinks only by a
# factor $1 - \eta\lambda_{\min}$ each step. With the best
# $\eta = 2/(\lambda_{\min} + \lambda_{\max})$ both ends shrink by $\frac{\kappa - 1}{\kappa + 1}$,
# where $\kappa = \lambda_{\max}/\lambda_{\min}$ is the **condition number**. For $\kappa = 1000$
# halving the error takes about 350 steps.
#
# **Momentum** gives the parameter a velocity, the buffer $b$:
#
# $$b_t = \mu\,b_{t-1} + g_t, \qquad \theta_t = \theta_{t-1} - \eta\,b_t, \qquad b_0 = 0 .$$
#
# Why it helps takes two sums. A gradient that stays $g$ makes
# $b \to g\,(1 + \mu + \mu^2 + \dots) = g/(1-\mu)$: ten times as fast for $\mu = 0.9$. A gradient
# that flips its sign each step makes $b \to \pm g\,(1 - \mu + \mu^2 - \dots) = \pm g/(1+\mu)$:
# about half. Steady directions speed up, oscillation is damped, and the best rate goes from
# $\frac{\kappa-1}{\kappa+1}$ to $\frac{\sqrt\kappa-1}{\sqrt\kappa+1}$ (Polyak 1964): 11 steps
# instead of 350.
#
# **Nesterov's** variant looks ahead: it moves along $g_t + \mu\,b_t$, the velocity as it will be if
# the next gradient resembles this one.


# %% exercise="sgd_momentum_step" minutes=10 difficulty=1
def sgd_momentum_step(
    param: Tensor,
    grad: Tensor,
    state: dict,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, dict]:
    """One update of stochastic gradient descent with momentum, as torch.optim.SGD makes it.

    param, grad: tensors of one shape, any shape. state: {} before the first update, later what the
    previous call returned. Returns (new param, new state); the state's "momentum_buffer" has the
    shape of param.

    - weight_decay · param is added to the gradient before anything else (the gradient of an L2
      penalty).
    - The buffer starts at zero: b = momentum · b + gradient. The step goes along b, or with
      nesterov along gradient + momentum · b, with the new b.
    - Nothing that is passed in is changed, neither tensors nor the dict.
    """
    ### BEGIN SOLUTION
    grad = grad + weight_decay * param
    buffer = momentum * state.get("momentum_buffer", torch.zeros_like(param)) + grad
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * direction, {"momentum_buffer": buffer}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the first update</summary>
#
# The state is empty then. `state.get("momentum_buffer", …)` takes a value to use where there is
# none.
# </details>
#
# <details><summary>Hint: something was changed in place</summary>
#
# `buffer += grad`, `buffer.mul_(…)` and `state[…] = …` write into what the caller still holds.
# `a = a * b` makes a new tensor, `{"momentum_buffer": buffer}` a new dict.
# </details>

# %% check="sgd_momentum_step" points=2
# f(θ) = θ²/2 has the gradient θ. From θ = 1 with lr 0.1 and momentum 0.5: the buffer is 1, then
# 0.5·1 + 0.9 = 1.4.
path = follow(
    sgd_momentum_step,
    torch.tensor([1.0]),
    [torch.tensor([1.0]), torch.tensor([0.9])],
    lr=0.1,
    momentum=0.5,
)
checks.close(
    path[0],
    torch.tensor([0.9]),
    what="the parameter after the first update",
    mistakes={
        "a step up the slope": [1.1],
        "an average, (1 − momentum)·grad, instead of a sum": [0.95],
    },
)
checks.close(
    path[1],
    torch.tensor([0.76]),
    what="the parameter after the second update",
    mistakes={"forgetting the buffer": [0.81], "Nesterov's direction": [0.74]},
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for shape, settings in [
    ((5,), {"momentum": 0.9}),
    ((3, 1, 4), {"momentum": 0.5}),
    ((), {"momentum": 0.0}),
    ((1, 7), {"momentum": 0.99}),
]:
    param = torch.randn(shape, generator=g, dtype=torch.float64)
    grads = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(10)]
    average = follow(
        lambda p, d, s, lr, momentum: (
            p - lr * (b := momentum * s.get("b", 0) + (1 - momentum) * d),
            {"b": b},
        ),
        param,
        grads,
        lr=0.3,
        **settings,
    )
    expect_path(
        follow(sgd_momentum_step, param, grads, lr=0.3, **settings),
        follow_torch(torch.optim.SGD, param, grads, lr=0.3, **settings),
        f"shape {shape}, {settings}",
        mistakes={"an average, (1 − momentum)·grad, instead of a sum": average},
    )
param = torch.randn(6, 4, generator=g).T  # not contiguous, float32
grads = [torch.randn(6, 4, generator=g).T for _ in range(10)]
expect_path(
    follow(sgd_momentum_step, param, grads, lr=0.1),
    follow_torch(torch.optim.SGD, param, grads, lr=0.1, momentum=0.9),
    "a transposed view in float32",
    dtype=torch.float32,
)
### END HIDDEN TESTS

# %% check="sgd_momentum_step" points=1
path = follow(
    sgd_momentum_step,
    torch.tensor([1.0]),
    [torch.tensor([1.0])],
    lr=0.1,
    momentum=0.5,
    nesterov=True,
)
checks.close(
    path[0],
    torch.tensor([0.85]),
    what="the parameter after one update with nesterov",
    mistakes={"momentum without Nesterov, or with the buffer from before this update,": [0.9]},
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
param = torch.randn(4, 3, generator=g, dtype=torch.float64)
grads = [torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(10)]
for nesterov in (False, True):
    for weight_decay, lr in ((0.0, 0.2), (0.3, 0.2), (0.1, RATES)):
        settings = {"lr": lr, "momentum": 0.8, "weight_decay": weight_decay, "nesterov": nesterov}
        decoupled = [
            p - 0
            for p in follow_torch(torch.optim.SGD, param, grads, **(settings | {"weight_decay": 0}))
        ]
        expect_path(
            follow(sgd_momentum_step, param, grads, **settings),
            follow_torch(torch.optim.SGD, param, grads, **settings),
            f"nesterov={nesterov}, weight_decay={weight_decay}",
            mistakes={"no weight decay": decoupled},
        )
### END HIDDEN TESTS

# %% check="sgd_momentum_step" points=1
expect_pure(
    sgd_momentum_step,
    torch.ones(3),
    [torch.ones(3), 2 * torch.ones(3)],
    "momentum_buffer",
    lr=0.1,
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for settings in ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}):
    expect_pure(
        sgd_momentum_step,
        torch.randn(5, 2, generator=g),
        [torch.randn(5, 2, generator=g) for _ in range(2)],
        "momentum_buffer",
        lr=0.1,
        **settings,
    )
# the law of the sums: a steady gradient of 1 drives the parameter at lr / (1 − momentum)
path = follow(
    sgd_momentum_step,
    torch.zeros(1, dtype=torch.float64),
    [torch.ones(1, dtype=torch.float64)] * 400,
    lr=0.01,
    momentum=0.9,
)
checks.close(
    path[-2] - path[-1],
    torch.tensor([0.1], dtype=torch.float64),
    what="the speed under a steady gradient",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Adam: every parameter its own scale
#
# **Adam** keeps two running averages for each parameter,
#
# $$m_t = \beta_1 m_{t-1} + (1-\beta_1)\,g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2, \qquad m_0 = v_0 = 0,$$
#
# and steps along $m/\sqrt v$: the mean gradient in units of its own typical size. Where gradients
# agree, the ratio is near ±1; where they are noise around zero, it is small. A parameter whose
# gradients are all 1,000 times smaller moves just as fast.
#
# **Bias correction.** Both averages start at zero, so early on they are too small. By how much?
# Unroll the recursion:
#
# $$m_t = (1-\beta_1)\sum_{s=1}^{t}\beta_1^{\,t-s}\,g_s .$$
#
# If the gradients have a common mean $\bar g$, then
# $\mathbb E[m_t] = \bar g\,(1-\beta_1)\sum_{s=1}^t\beta_1^{\,t-s} = \bar g\,(1-\beta_1^{\,t})$, a
# geometric sum. So divide by $1-\beta_1^{\,t}$, and $v_t$ by $1-\beta_2^{\,t}$:
#
# $$\hat m_t = \frac{m_t}{1-\beta_1^{\,t}}, \qquad \hat v_t = \frac{v_t}{1-\beta_2^{\,t}}, \qquad
# \theta_t = \theta_{t-1} - \eta\,\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} .$$
#
# At $t = 1$ this is $\hat m_1/\sqrt{\hat v_1} = g_1/|g_1|$: **the first update moves every
# parameter by the full learning rate**, however small its gradient, on the evidence of one batch.
# Remember this when it comes to warm-up. Without the correction it would be
# $\frac{0.1}{\sqrt{0.001}} \approx 3.2$ times as much: $v$ starts further from its goal than $m$.
#
# $\epsilon$ (usually 1e-8) stands **outside** the root. It keeps 0/0 away, and below it gradients
# count as zero.


# %% exercise="adam_step" minutes=20 difficulty=2
def adam_step(
    param: Tensor,
    grad: Tensor,
    state: dict,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, dict]:
    """One update of Adam (Kingma & Ba, Algorithm 1), as torch.optim.Adam makes it.

    param, grad: tensors of one shape. state: {} before the first update. Returns (new param, new
    state) with "step" (the number of updates made, an int), "exp_avg" and "exp_avg_sq".

    - weight_decay · param is added to the gradient first: the L2 penalty of the original, not
      AdamW's.
    - Both averages are corrected for their start at zero; eps is added to the root.
    - Both averages are kept as they are, before the correction.
    - Nothing that is passed in is changed.
    """
    ### BEGIN SOLUTION
    beta1, beta2 = betas
    t = state.get("step", 0) + 1
    grad = grad + weight_decay * param
    exp_avg = beta1 * state.get("exp_avg", torch.zeros_like(param)) + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - beta2) * grad**2
    mean = exp_avg / (1 - beta1**t)
    size = (exp_avg_sq / (1 - beta2**t)).sqrt()
    return param - lr * mean / (size + eps), {
        "step": t,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which t</summary>
#
# The first update is $t = 1$: with $t = 0$ the correction would divide by $1 - \beta^0 = 0$. Count
# first, then correct.
# </details>
#
# <details><summary>Hint: what goes into the state</summary>
#
# The averages as they are, before the correction. The corrected ones are made anew in each update.
# </details>

# %% check="adam_step" points=2
param, grad = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1e-3, -0.5, 2000.0])
path = follow(adam_step, param, [grad, grad], lr=0.1)
checks.close(
    path[0],
    torch.tensor([0.9, 1.1, 0.9]),
    what="the parameter after the first update",
    rtol=2e-5,
    hint="The first step is the learning rate itself, whatever the size of the gradient.",
    mistakes={
        "no bias correction": param - 0.1 * grad.sign() * 0.1 / 0.001**0.5,
        "bias correction of v only": param - 0.1 * grad.sign() * 0.1,
        "bias correction of m only": param - 0.1 * grad.sign() / 0.001**0.5,
        "no root over v": param - 0.1 / grad,
    },
)
checks.close(
    path[1],
    torch.tensor([0.8, 1.2, 0.8]),
    what="the parameter after the second, equal gradient",
    rtol=3e-5,
    hint="Is step counted, and are the uncorrected averages what you keep?",
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for shape, settings in [
    ((6,), {}),
    ((2, 1, 5), {"betas": (0.8, 0.95), "lr": 0.03}),
    ((), {"betas": (0.0, 0.9)}),
    ((1,), {"lr": 1.0}),
    ((5,), {"lr": RATES}),
]:
    param = torch.randn(shape, generator=g, dtype=torch.float64)
    powers = [10.0 ** torch.randint(-3, 4, shape, generator=g) for _ in range(10)]
    grads = [power * torch.randn(shape, generator=g, dtype=torch.float64) for power in powers]
    expect_path(
        follow(adam_step, param, grads, **settings),
        follow_torch(torch.optim.Adam, param, grads, **settings),
        f"shape {shape}, {settings or 'defaults'}",
    )
param, grads = (
    torch.randn(5, 3, generator=g).T,
    [torch.randn(5, 3, generator=g).T for _ in range(10)],
)
expect_path(
    follow(adam_step, param, grads, lr=0.01),
    follow_torch(torch.optim.Adam, param, grads, lr=0.01),
    "a view in float32",
    dtype=torch.float32,
)
### END HIDDEN TESTS

# %% check="adam_step" points=1
# Where gradients are as small as eps, eps decides: with g = eps the first step is half the learning
# rate.
path = follow(adam_step, torch.tensor([1.0]), [torch.tensor([1e-8])], lr=0.1)
early = 1e-8 / (1e-8 + 1e-8 / 0.001**0.5)  # eps, and only then the correction of v
checks.close(
    path[0],
    torch.tensor([0.95]),
    what="the first update for a gradient of 1e-8",
    mistakes={
        "eps inside the root": [1 - 0.1 * 1e-8 / (1e-16 + 1e-8) ** 0.5],
        "no eps": [0.9],
        "eps added before the bias correction": [1 - 0.1 * early],
    },
)
checks.close(
    follow(adam_step, torch.tensor([1.0]), [torch.tensor([0.0])])[0],
    torch.tensor([1.0]),
    what="the update for a gradient of zero",
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
param = torch.randn(7, generator=g, dtype=torch.float64)
for scale, eps in [(1e-8, 1e-8), (1e-3, 1e-3), (1e-9, 1e-6)]:
    grads = [torch.randn(7, generator=g, dtype=torch.float64) * scale for _ in range(10)]
    expect_path(
        follow(adam_step, param, grads, eps=eps, lr=0.1),
        follow_torch(torch.optim.Adam, param, grads, eps=eps, lr=0.1),
        f"gradients of about {scale:g} with eps {eps:g}",
        rtol=1e-7,
    )
### END HIDDEN TESTS

# %% check="adam_step" points=1
expect_pure(adam_step, torch.ones(3), [torch.ones(3), 2 * torch.ones(3)], "exp_avg", "exp_avg_sq")
expect_count(adam_step)
path = follow(adam_step, torch.tensor([1.0]), [torch.tensor([0.0])], lr=0.1, weight_decay=0.01)
checks.close(
    path[0],
    torch.tensor([0.9]),
    what="one update with weight decay and no gradient",
    hint="Adam's own weight decay goes through the gradient, so it is divided by its size like "
    "everything else.",
    mistakes={"AdamW's decay": [0.999], "no weight decay": [1.0]},
    rtol=2e-5,
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
param = torch.randn(4, 3, generator=g, dtype=torch.float64)
grads = [torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(10)]
settings = {"lr": 0.02, "weight_decay": 0.3}
expect_path(
    follow(adam_step, param, grads, **settings),
    follow_torch(torch.optim.Adam, param, grads, **settings),
    "with weight decay",
    mistakes={
        "AdamW's decay": follow_torch(torch.optim.AdamW, param, grads, **settings),
        "no weight decay": follow_torch(torch.optim.Adam, param, grads, lr=0.02),
    },
)
expect_pure(adam_step, param, grads, "exp_avg", "exp_avg_sq", weight_decay=0.1)
### END HIDDEN TESTS

# %% [markdown]
# ### See it: two landscapes
#
# Two functions of two parameters. The first is the bowl of [](#gradient-descent), fifty times as
# steep in one direction as in the other. The second is Rosenbrock's: a curved valley with a nearly
# flat floor, whose minimum lies at (1, 1).
#
# **Write down first**: which rule goes straight for the bowl's minimum from the far corner, and
# which one zigzags? Which of them reaches Rosenbrock's minimum in 300 updates?

# %% [markdown] answer="predict-paths"
# On the bowl plain gradient descent zigzags in the steep direction while it creeps along the flat
# one. Momentum zigzags at first too, but the swings cancel and the creeping adds up. Adam divides
# both coordinates by their size, so that it leaves the corner along the diagonal, as if the bowl
# were round, and then circles. On Rosenbrock's function plain gradient descent finds the valley at
# once and then hardly moves, because the learning rate that the steep walls allow is far too small
# for the floor; momentum and Adam travel along it. In 300 updates none arrives; momentum comes
# closest.


# %% tags=["experiment"]
def bowl(theta):
    return 0.5 * (theta[..., 0] ** 2 + 50 * theta[..., 1] ** 2)


def rosenbrock(theta):
    return (1 - theta[..., 0]) ** 2 + 100 * (theta[..., 1] - theta[..., 0] ** 2) ** 2


def descend(step, function, start, updates, **settings):
    """The path from `start`, (updates + 1, 2), and the value of the function along it."""
    theta, state, path = torch.tensor(start, dtype=torch.float64), {}, []
    for _ in range(updates + 1):
        path.append(theta)
        grad = torch.func.grad(function)(theta)
        theta, state = step(theta, grad, state, **settings)
    return torch.stack(path), function(torch.stack(path))


def rules(momentum):
    return {
        "gradient descent": (sgd_momentum_step, {"momentum": 0.0}),
        f"momentum {momentum}": (sgd_momentum_step, {"momentum": momentum}),
        "Adam": (adam_step, {}),
    }


# function, start, updates, momentum, learning rates, the frame, the minimum
scenes = [
    (bowl, (-3.5, 1.5), 40, 0.6, (0.038, 0.04, 0.3), (-4, 4), (-2.2, 2.2), (0.0, 0.0)),
    (rosenbrock, (-1.2, 1.0), 300, 0.9, (0.0012, 0.0008, 0.1), (-2, 2), (-0.8, 2.6), (1.0, 1.0)),
]

# %% tags=["experiment", "figure"]
# Figure: three rules' paths over a bowl and through Rosenbrock's valley
fig, axes = plt.subplots(2, 3, figsize=(9.4, 5.4), sharex="row", sharey="row")
for row, (function, start, updates, momentum, rates, xs, ys, goal) in zip(
    axes, scenes, strict=True
):
    x, y = torch.meshgrid(torch.linspace(*xs, 161), torch.linspace(*ys, 161), indexing="xy")
    height = function(torch.stack((x, y), dim=-1))
    for ax, (name, (step, settings)), rate in zip(row, rules(momentum).items(), rates, strict=True):
        path, value = descend(step, function, start, updates, lr=rate, **settings)
        ax.contour(
            x, y, height, levels=[0.1 * 3**i for i in range(9)], colors="#bbbbbb", linewidths=0.7
        )
        ax.plot(
            path[:, 0], path[:, 1], "-", color=plot.COLORS[0], marker=".", markersize=3, linewidth=1
        )
        ax.plot(*start, "o", color="black", markersize=5)
        ax.plot(*goal, "*", color=plot.COLORS[6], markersize=12)
        ax.set(title=f"{name}, lr {rate:g}", xlim=xs, ylim=ys)
        ax.text(
            0.02,
            0.03,
            f"after {updates} updates: {value[-1]:.1e}",
            transform=ax.transAxes,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        ax.grid(False)
for ax in axes[:, 0]:
    ax.set_ylabel("second parameter")
for ax in axes[1]:
    ax.set_xlabel("first parameter")
plot.caption(
    fig,
    "Paths from the black dot toward the minimum (star) across lines of equal loss. Top: a bowl "
    "with curvatures 1 and 50. Bottom: Rosenbrock's valley. The number in each corner is the loss "
    "at the end.",
)
plt.show()

# %% [markdown]
# Momentum 0.6 is close to the best for a bowl of condition number 50, and it shows. Adam does not
# win here. It leaves the corner as if the bowl were round, but its average of the gradients carries
# it past the minimum, and it circles; meanwhile $v$ still holds the first, large gradients and
# keeps the later steps short. Two parameters whose curvatures one can look up are not what Adam is
# for. The next picture is.

# %% [markdown]
# ### Why Adam wins on text
#
# Words follow a heavy-tailed law: a few are everywhere, most are rare. A softmax over words gets a
# gradient for each word in proportion to how often it occurs, so that gradient descent learns *the*
# long before it has moved *iterator* at all. Adam divides the frequency out (Kunstner et al. 2024,
# arXiv:2402.19449). The smallest language model shows it: one table $W$ of `(words, words)`, whose
# row for a word gives the logits of the next one, trained on all word pairs of Python's
# documentation at once. Without batches there is no noise either, so nothing but the word
# frequencies is left to explain the difference.

# %% tags=["experiment"]
import re
from collections import Counter
from itertools import pairwise

words = re.findall(r"[a-z_]+|[^\sa-z]", "\n".join(data.documentation().values()).lower())
common = [word for word, _ in Counter(words).most_common(500)]
number = {word: i for i, word in enumerate(common)}
pairs = Counter((number[a], number[b]) for a, b in pairwise(words) if a in number and b in number)
index = torch.tensor(list(pairs))
joint = torch.zeros(500, 500).index_put_(
    (index[:, 0], index[:, 1]), torch.tensor([float(n) for n in pairs.values()])
)
joint /= joint.sum()  # joint[a, b]: the share of the pairs (a, b)
first, second = joint.sum(1, keepdim=True), joint.sum(0)


parts = (slice(10), slice(10, 100), slice(100, 500))


def train_table(step, updates=50, **settings):
    """Cross-entropy in nats by group of next words (most frequent 10, next 90, last 400) after
    every update.
    """
    table, state, history = torch.zeros(500, 500), {}, []
    for _ in range(updates + 1):
        log_p = table.log_softmax(1)
        by_word = -(joint * log_p).sum(0)  # each next word's share of the loss
        history.append([(by_word[part].sum() / second[part].sum()).item() for part in parts])
        table, state = step(
            table, log_p.exp() * first - joint, state, **settings
        )  # softmax minus target, weighted
    return torch.tensor(history)


# For each rule the best of a few learning rates by its loss on all words.
groups = ("10 most frequent words", "next 90", "last 400")
weights = torch.stack([second[part].sum() for part in parts])
contestants = {
    "momentum": (sgd_momentum_step, (30.0, 100.0, 200.0)),
    "Adam": (adam_step, (0.3, 1.0, 3.0)),
}
chosen = {}
for name, (step, rates) in contestants.items():
    runs = {rate: train_table(step, lr=rate) for rate in rates}
    chosen[name] = min(runs.items(), key=lambda run: float(run[1][-1] @ weights))

# %% tags=["experiment", "figure"]
# Figure: what each rule has learned after 50 updates, by word frequency
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.5), sharey=True)
for ax, (name, (rate, best)) in zip(axes, chosen.items(), strict=True):
    plot.curves(
        range(len(best)),
        dict(zip(groups, best.T, strict=True)),
        xlabel="update",
        ylabel="cross-entropy (nats)",
        title=f"{name}, lr {rate:g}: {float(best[-1] @ weights):.2f} nats in all",
        ax=ax,
    )
axes[1].set_ylabel("")
axes[0].get_legend().remove()
plot.caption(
    fig,
    "Next-word loss by how frequent the next word is. Both rules learn the frequent words; what "
    "momentum has not learned after 50 updates is the rare ones. Best of three learning rates "
    "each.",
)
plt.show()

# %% [markdown]
# ## AdamW: decay that is not divided away
#
# **Weight decay** pulls every weight toward zero, so that only what the data keeps asking for stays
# large. For plain gradient descent two ways are the same: add $\tfrac\lambda2\lVert\theta\rVert^2$
# to the loss (**L2**), whose gradient is $\lambda\theta$, or shrink $\theta$ by the factor
# $1-\eta\lambda$ in every update. In Adam they part. With L2 the pull goes through the averages:
#
# $$\theta_t = \theta_{t-1} - \eta\,\frac{\widehat{(g + \lambda\theta)}}{\sqrt{\hat v_t}+\epsilon},$$
#
# and is divided by $\sqrt{\hat v}$, the size of that weight's gradients. A weight with large
# gradients is hardly decayed at all; one without gradients is pulled at the full speed of the
# learning rate, however small $\lambda$ is (the check of `adam_step` showed it). **AdamW** takes
# the decay out of the gradient, so that it is **decoupled** and the same for all:
#
# $$\theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\,\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} .$$
#
# $\lambda$ is multiplied by $\eta$, so that decay follows the schedule. (Loshchilov and Hutter
# write a separate factor for the schedule; PyTorch, and so everybody, multiplies by the learning
# rate.)


# %% exercise="adamw_step" minutes=10 difficulty=1
def adamw_step(
    param: Tensor,
    grad: Tensor,
    state: dict,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, dict]:
    """One update of AdamW (Loshchilov & Hutter), as torch.optim.AdamW makes it.

    As adam_step, but param shrinks by the factor 1 − lr · weight_decay, and neither the averages
    nor their ratio see the decay. The state has the same three names. You may call your adam_step.
    """
    ### BEGIN SOLUTION
    return adam_step((1 - lr * weight_decay) * param, grad, state, lr, betas, eps)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: in terms of Adam</summary>
#
# Adam's update depends on the gradients alone when its own `weight_decay` is 0. What is left to do
# is to move the parameter from which it starts.
# </details>

# %% check="adamw_step" points=2
param, grad = torch.tensor([2.0, -2.0]), torch.tensor([4.0, 0.0])
path = follow(adamw_step, param, [grad], lr=0.1, weight_decay=0.5)
checks.close(
    path[0],
    torch.tensor([1.8, -1.9]),
    what="the parameter after one update",
    mistakes={
        "Adam's L2 decay": follow_torch(torch.optim.Adam, param, [grad], lr=0.1, weight_decay=0.5)[
            0
        ],
        "decay without the factor lr": [0.9, -1.0],
        "no decay": [1.9, -2.0],
        "decay after the update instead of before": [1.805, -1.9],
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(7)
for shape, settings in [
    ((6,), {}),
    ((3, 1, 2), {"betas": (0.9, 0.95), "lr": 0.03, "weight_decay": 0.1}),
    ((), {"weight_decay": 0.0}),
    ((4, 5), {"lr": 0.5, "weight_decay": 1.0, "eps": 1e-3}),
    ((5,), {"lr": RATES, "weight_decay": 0.3}),
]:
    param = torch.randn(shape, generator=g, dtype=torch.float64) * 3
    grads = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(10)]
    expect_path(
        follow(adamw_step, param, grads, **settings),
        follow_torch(torch.optim.AdamW, param, grads, **settings),
        f"shape {shape}, {settings or 'defaults'}",
        mistakes={
            "Adam's L2 decay": follow_torch(
                torch.optim.Adam, param, grads, **({"weight_decay": 0.01} | settings)
            )
        },
    )
param, grads = (
    torch.randn(5, 3, generator=g).T,
    [torch.randn(5, 3, generator=g).T for _ in range(10)],
)
expect_path(
    follow(adamw_step, param, grads, lr=0.01),
    follow_torch(torch.optim.AdamW, param, grads, lr=0.01),
    "a view in float32",
    dtype=torch.float32,
)
### END HIDDEN TESTS

# %% check="adamw_step" points=1
expect_pure(adamw_step, torch.ones(3), [torch.ones(3), 2 * torch.ones(3)], "exp_avg", "exp_avg_sq")
expect_count(adamw_step)
### BEGIN HIDDEN TESTS
g = checks.generator(8)
param, grads = (
    torch.randn(9, generator=g, dtype=torch.float64),
    [torch.zeros(9, dtype=torch.float64)] * 50,
)
# without gradients the decay is exactly (1 − lr·λ)^t
checks.close(
    follow(adamw_step, param, grads, lr=0.1, weight_decay=0.2)[-1],
    param * 0.98**50,
    what="50 updates of pure decay",
)
# the gradients' part does not depend on the parameter: between two runs only the decay is seen
grads = [torch.randn(9, generator=g, dtype=torch.float64) for _ in range(6)]
for decay, share in ((0.0, 1.0), (0.5, (1 - 0.1 * 0.5) ** 6)):
    there, back = (
        follow(adamw_step, start, grads, lr=0.1, weight_decay=decay)[-1]
        for start in (param, -param)
    )
    checks.close(
        there - back,
        2 * share * param,
        what=f"what is left between runs from θ and −θ with decay {decay}",
    )
expect_pure(adamw_step, param, grads, "exp_avg", "exp_avg_sq", weight_decay=0.5)
### END HIDDEN TESTS

# %% tags=["experiment"]
# Weights of 1 under gradients that are pure noise, of 25 sizes from 1e-4 to 10: nothing asks them
# to stay.
sizes = torch.logspace(-4, 1, 25)
lr, decay, updates = 1e-3, 0.1, 1000
noise = torch.Generator().manual_seed(0)
left = {}
for name, step in (("Adam with L2", adam_step), ("AdamW", adamw_step)):
    theta, state = torch.ones(200, 25), {}
    for _ in range(updates):
        grad = sizes * torch.randn(200, 25, generator=noise)
        theta, state = step(theta, grad, state, lr=lr, weight_decay=decay)
    left[name] = theta.mean(0)

# %% tags=["experiment", "figure"]
# Figure: what is left of a weight of 1, by the size of its gradients
ax = plot.curves(
    sizes,
    left,
    xlabel="size of the weight's gradients (standard deviation)",
    ylabel="what is left of a weight of 1",
    title="L2 inside Adam decays only the weights with small gradients",
)
ax.set_xscale("log")
ax.axhline((1 - lr * decay) ** updates, color="#888888", linewidth=1, linestyle=":")
ax.annotate(
    f"$(1 - \\eta\\lambda)^{{{updates}}}$ = {(1 - lr * decay) ** updates:.3f}",
    (sizes[0], (1 - lr * decay) ** updates),
    textcoords="offset points",
    xytext=(0, -13),
    fontsize=8,
    color="#555555",
)
plot.caption(
    ax.figure,
    f"After {updates:,} updates with lr {lr:g} and weight decay {decay:g}; mean of 200 weights. "
    "AdamW leaves the same share of every weight. With L2 inside Adam the decay depends on the "
    "gradients that divide it.",
)
plt.show()

# %% [markdown]
# ## Lion: only the sign
#
# If Adam's step is about ±1 anyway, why keep $v$? **Lion** was found by a search over programs, and
# what it found is short:
#
# $$c_t = \beta_1 m_{t-1} + (1-\beta_1)\,g_t, \qquad
# \theta_t = \theta_{t-1} - \eta\,\big(\operatorname{sign}(c_t) + \lambda\,\theta_{t-1}\big), \qquad
# m_t = \beta_2 m_{t-1} + (1-\beta_2)\,g_t .$$
#
# One buffer instead of two: half of Adam's memory. Two different averages come from it: the step
# looks at the fresh gradient with weight $1-\beta_1 = 0.1$, the memory takes it in with
# $1-\beta_2 = 0.01$ only. Every coordinate with $c \ne 0$ moves by $\eta$ (and what decay adds),
# noise or not, so Lion wants a learning rate 3 to 10 times smaller than AdamW, and a weight decay
# as many times larger, because their product is what shrinks the weights.


# %% exercise="lion_step" minutes=10 difficulty=1 path="more"
def lion_step(
    param: Tensor,
    grad: Tensor,
    state: dict,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> tuple[Tensor, dict]:
    """One update of Lion (Chen et al. 2023, Algorithm 2), with decoupled weight decay.

    Returns (new param, new state); the state holds one tensor, "exp_avg", zero before the first
    update. The step uses the average from before this update, interpolated with the gradient by
    betas[0]; the average itself moves by betas[1]. The sign of 0 is 0. Nothing that is passed in is
    changed.
    """
    ### BEGIN SOLUTION
    beta1, beta2 = betas
    exp_avg = state.get("exp_avg", torch.zeros_like(param))
    direction = torch.sign(beta1 * exp_avg + (1 - beta1) * grad)
    new = param - lr * (direction + weight_decay * param)
    return new, {"exp_avg": beta2 * exp_avg + (1 - beta2) * grad}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two averages from one buffer</summary>
#
# The average that the step looks at is used once and forgotten. What goes into the state is made
# from the old average again, with the other beta.
# </details>

# %% check="lion_step" points=2
# By hand, betas (0.5, 0.75). First gradient 4: c = 0.5·0 + 0.5·4 > 0, and m = 0.25·4 = 1.
# Second gradient −1: c = 0.5·1 − 0.5·1 = 0, no move. With −2 or −4: c < 0, back up.
grads = [torch.tensor([4.0, 4.0, 4.0]), torch.tensor([-1.0, -2.0, -4.0])]
path = follow(lion_step, torch.zeros(3), grads, lr=0.1, betas=(0.5, 0.75))
checks.close(
    path[0],
    torch.tensor([-0.1, -0.1, -0.1]),
    what="the parameter after the first update",
    mistakes={
        "the gradient's size left in": [-0.2, -0.2, -0.2],
        "a step up the slope": [0.1, 0.1, 0.1],
    },
)
checks.close(
    path[1],
    torch.tensor([-0.1, 0.0, 0.0]),
    what="the parameter after the second update",
    mistakes={
        "the sign of the gradient alone": [0.0, 0.0, 0.0],
        "betas the other way round": [-0.2, -0.2, -0.2],
        "the sign of the average after this update": [-0.2, -0.2, 0.0],
        "keeping the step's average (betas[0]) as memory": [-0.2, -0.1, 0.0],
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(9)


def unrolled_lion(param, grads, lr, betas, weight_decay):
    """The averages written as sums over all gradients so far, instead of a recursion."""
    path = []
    for t, grad in enumerate(grads):
        average = sum(
            ((1 - betas[1]) * betas[1] ** (t - 1 - s) * grads[s] for s in range(t)),
            torch.zeros_like(grad),
        )
        rate = lr[t] if isinstance(lr, list) else lr
        param = (1 - rate * weight_decay) * param - rate * (
            betas[0] * average + (1 - betas[0]) * grad
        ).sign()
        path.append(param)
    return path


for shape, settings in [
    ((50,), {"betas": (0.9, 0.99), "lr": 0.01, "weight_decay": 0.0}),
    ((3, 1, 20), {"betas": (0.95, 0.98), "lr": 0.1, "weight_decay": 0.3}),
    ((), {"betas": (0.3, 0.8), "lr": 1.0, "weight_decay": 0.1}),
    ((30,), {"betas": (0.8, 0.9), "lr": RATES, "weight_decay": 0.2}),
]:
    param = torch.randn(shape, generator=g, dtype=torch.float64)
    grads = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(10)]
    path = follow(lion_step, param, grads, **settings)
    swapped = unrolled_lion(param, grads, **(settings | {"betas": settings["betas"][::-1]}))
    expect_path(
        path,
        unrolled_lion(param, grads, **settings),
        f"shape {shape}, {settings}",
        mistakes={"betas the other way round": swapped},
    )
param, grads = (
    torch.randn(5, 30, generator=g).T,
    [torch.randn(5, 30, generator=g).T for _ in range(10)],
)
expect_path(
    follow(lion_step, param, grads, lr=0.1),
    unrolled_lion(param, grads, 0.1, (0.9, 0.99), 0.0),
    "the defaults, a view in float32",
    dtype=torch.float32,
)
### END HIDDEN TESTS

# %% check="lion_step" points=1
expect_pure(lion_step, torch.ones(3), [torch.ones(3), 2 * torch.ones(3)], "exp_avg")
checks.close(
    follow(lion_step, torch.tensor([1.0]), [torch.tensor([0.0])], lr=0.1, weight_decay=0.5)[0],
    torch.tensor([0.95]),
    what="an update with decay and no gradient",
    mistakes={"decay inside the sign": [0.9], "no decay": [1.0]},
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
param = torch.randn(40, generator=g, dtype=torch.float64)
grads = [torch.randn(40, generator=g, dtype=torch.float64) for _ in range(5)]
expect_pure(lion_step, param, grads, "exp_avg", weight_decay=0.1)
path = follow(lion_step, param, grads, lr=0.03, weight_decay=0.2)
scaled = follow(lion_step, param, [1000 * grad for grad in grads], lr=0.03, weight_decay=0.2)
checks.close(scaled[-1], path[-1], what="the path under gradients 1,000 times as large")
moved = torch.stack(follow(lion_step, param, grads, lr=0.03)).diff(dim=0).abs()
checks.close(moved, torch.full_like(moved, 0.03), what="the length of every coordinate's step")
### END HIDDEN TESTS

# %% [markdown]
# ## Muon: all directions of a matrix alike
#
# **What is the steepest direction?** It depends on how a step's length is measured. Let $G$ be the
# gradient of a matrix of weights, and look for the step $\Delta$ of length
# $\lVert\Delta\rVert \le \eta$ that lowers the loss most, to first order: minimize
# $\langle G, \Delta\rangle = \sum_{ij}G_{ij}\Delta_{ij}$.
#
# | length of a step | best step | rule |
# |---|---|---|
# | the root of all entries squared and summed (Euclid's) | $-\eta\,G/\lVert G\rVert$ | normalized gradient descent |
# | the largest entry | $-\eta\operatorname{sign}(G)$: each entry goes to its own limit | Lion, Adam (nearly) |
# | the largest singular value | $-\eta\,UV^\top$, where $G = U\Sigma V^\top$ | **Muon** |
#
# The last row takes one line. With the singular values $\sigma_i$ and unit vectors $u_i$, $v_i$ of
# $G$, $\langle G, \Delta\rangle = \sum_i\sigma_i\,u_i^\top\Delta v_i \ge -\sum_i\sigma_i\,\eta$,
# because a matrix whose largest singular value is $\eta$ makes no unit vector longer than $\eta$.
# And $\Delta = -\eta\,UV^\top$ reaches that bound. The largest singular value is how much a matrix
# can stretch its input, so this limits what a step can do to the layer's output; and **all singular
# values of the step are equal**, where those of the gradient fall off over orders of magnitude.
#
# $UV^\top$ is called the **orthogonalized** gradient. A singular value decomposition costs too much
# in every update. **Newton–Schulz** needs matrix products only. Take an odd polynomial
# $p(x) = ax + bx^3 + cx^5$ and apply it to a matrix as $aX + b\,XX^\top X + c\,(XX^\top)^2X$. Put
# $X = U\Sigma V^\top$ in: $XX^\top X = U\Sigma^3V^\top$, and so
#
# $$aX + b\,(XX^\top)X + c\,(XX^\top)^2X = U\,p(\Sigma)\,V^\top .$$
#
# The polynomial acts on each singular value alone. Repeat it, and every value in $(0, 1]$ should
# move to 1. With $(a, b, c) = (\tfrac{15}{8}, -\tfrac{10}{8}, \tfrac38)$ it does, in the
# end exactly, but slowly: a value of 0.001 grows by only 15/8 at first. Jordan's choice
#
# $$(a, b, c) = (3.4445,\; -4.7750,\; 2.0315)$$
#
# gives up on exactness for speed. Since $a + b + c = 0.701$, not even 1 stays 1. But five rounds
# carry everything above 0.0015 into about $[0.68, 1.21]$, and training does not notice the
# difference. To start inside $(0, 1]$, divide by
# $\lVert G\rVert_F = \sqrt{\sum_i \sigma_i^2} \ge \sigma_1$.
#
# Production code runs this in bfloat16; here the format of the input is kept, so that you can see
# the mathematics.


# %% exercise="newton_schulz" minutes=25 difficulty=2 path="more"
def newton_schulz(g: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearly orthogonalizes a matrix by Newton–Schulz with Jordan's quintic coefficients (3.4445,
    −4.7750, 2.0315).

    g: (rows, cols). Returns (rows, cols) in g's format: U p(…p(Σ / ‖g‖_F)…) Vᵀ, the polynomial
    applied `steps` times, where U Σ Vᵀ = g.

    - The Frobenius norm counts as at least eps, so that a matrix of zeros gives zeros (adding eps
      to it is fine too). What is 10⁵ times smaller than eps stays small.
    - Matrix products only; no square matrix larger than (min(rows, cols), min(rows, cols)) is made.
    - g is not changed.
    """
    ### BEGIN SOLUTION
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + eps)
    tall = g.shape[0] > g.shape[1]
    if tall:
        x = x.T  # then x @ x.T is the small one of the two square matrices
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which product is small</summary>
#
# For a tall matrix $XX^\top$ is `(rows, rows)`, the large one. Transposing swaps $U$ and $V$ and
# leaves the singular values: work on $X^\top$ and transpose the result.
# </details>
#
# <details><summary>Hint: values that explode</summary>
#
# Outside $[0, 1]$ the fifth power wins. Was the matrix divided by its norm, and by the norm of all
# entries, not row by row?
# </details>

# %% check="newton_schulz" points=2
# A diagonal matrix is its own singular value decomposition: 3 and 4 become p(0.6) and p(0.8) after
# one round.
p = lambda x: 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
exact = lambda x: 15 / 8 * x - 10 / 8 * x**3 + 3 / 8 * x**5
checks.close(
    newton_schulz(torch.diag(torch.tensor([3.0, 4.0])), steps=1),
    torch.diag(torch.tensor([p(0.6), p(0.8)])),
    what="one round on diag(3, 4)",
    atol=1e-5,
    mistakes={
        "not dividing by the norm": torch.diag(torch.tensor([p(3.0), p(4.0)])),
        "dividing by the largest singular value": torch.diag(torch.tensor([p(0.75), p(1.0)])),
        "dividing by the squared norm": torch.diag(torch.tensor([p(0.12), p(0.16)])),
        "the coefficients of the exact quintic": torch.diag(torch.tensor([exact(0.6), exact(0.8)])),
    },
)
checks.close(
    newton_schulz(torch.diag(torch.tensor([3.0, 4.0]))),
    torch.diag(torch.tensor([p(p(p(p(p(0.6))))), p(p(p(p(p(0.8)))))])),
    what="five rounds on diag(3, 4)",
    atol=1e-5,
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
for rows, cols, steps in [
    (4, 4, 5),
    (3, 8, 5),
    (8, 3, 5),
    (1, 6, 5),
    (6, 1, 3),
    (1, 1, 1),
    (16, 15, 2),
    (5, 7, 0),
]:
    matrix = 30 * torch.randn(rows, cols, generator=g, dtype=torch.float64)
    if rows == cols == 1:
        matrix += 30 * matrix.sign()  # far above what is added to the norm
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / torch.linalg.vector_norm(matrix)
    after = [s]
    for _ in range(steps + 1):
        after.append(p(after[-1]))
    with (
        checks.unchanged(g=matrix),
        checks.forbidden(
            "linalg_svd",
            "svd",
            "_linalg_svd",
            "linalg_eigh",
            "_linalg_eigh",
            "linalg_qr",
            "linalg_pinv",
            "linalg_svdvals",
            because="Newton–Schulz needs matrix products only",
        ),
    ):
        result = newton_schulz(matrix, steps=steps)
    checks.close(
        result,
        u * after[steps] @ vt,
        what=f"{steps} rounds on a matrix {(rows, cols)}",
        rtol=1e-6,
        dtype=torch.float64,
        mistakes={
            "one round more": u * after[steps + 1] @ vt,
            "one round less": u * after[max(0, steps - 1)] @ vt,
            "the exact U Vᵀ": u @ vt,
            "the matrix divided by its norm": matrix / matrix.norm(),
        },
    )
view = torch.randn(9, 5, generator=g).T
checks.close(
    newton_schulz(view),
    newton_schulz(view.double()).float(),
    what="a transposed view in float32",
    rtol=1e-4,
    dtype=torch.float32,
)
checks.close(
    newton_schulz(view.contiguous()),
    newton_schulz(view.contiguous().T).T,
    what="the transpose of a transpose",
    rtol=1e-4,
)
### END HIDDEN TESTS

# %% check="newton_schulz" points=1
# Five hundred rows and two columns: the square matrix of the rows would have 250,000 elements, that
# of the columns 4.
with checks.allocations() as made:
    newton_schulz(torch.ones(500, 2))
assert made.largest <= 1000, (
    f"a tensor of {made.largest:,} elements was made; the matrix has 1,000. Which side should be "
    "multiplied out?"
)
checks.close(newton_schulz(torch.zeros(3, 2)), torch.zeros(3, 2), what="the result for zeros")
### BEGIN HIDDEN TESTS
for shape in ((700, 3), (3, 700)):
    with checks.allocations() as made:
        newton_schulz(torch.randn(shape, generator=checks.generator(12)))
    assert made.largest <= 2100, (
        f"for {shape} a tensor of {made.largest:,} elements was made; the matrix has 2,100."
    )
checks.close(newton_schulz(torch.zeros(1, 5)), torch.zeros(1, 5), what="the result for zeros")
small = 1e-9 * torch.randn(3, 4, generator=checks.generator(12), dtype=torch.float64)
for eps in (1e-3, 10.0):
    checks.close(
        newton_schulz(small, 2, eps),
        small / eps * 3.4445**2,
        what=f"two rounds on a matrix of about 1e-9 with eps {eps:g}",
        rtol=1e-5,
        mistakes={"an eps of 1e-7, whatever was asked for,": small / 1e-7 * 3.4445**2},
    )
checks.keeps_dtype(newton_schulz, torch.randn(4, 6, generator=checks.generator(28)))
### END HIDDEN TESTS

# %% check="newton_schulz" points=1
# Singular values from 1 to 50, so that 5 rounds must bring each of them near 1, and turn no
# direction.
u, _, vt = torch.linalg.svd(
    torch.randn(12, 7, generator=checks.generator(13), dtype=torch.float64), full_matrices=False
)
inner = (
    u.T @ newton_schulz(u * torch.linspace(1, 50, 7) @ vt) @ vt.T
)  # diagonal, if the directions are kept
assert bool(((inner.diag() > 0.68) & (inner.diag() < 1.21)).all()), (
    f"the singular values lie in [{inner.diag().min():.2f}, {inner.diag().max():.2f}]; five rounds "
    "bring them into [0.68, 1.21]."
)
checks.close(
    inner - inner.diag().diag(),
    torch.zeros(7, 7),
    what="the part that turns one singular direction into another",
    atol=1e-6,
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for rows, cols in ((20, 20), (6, 30), (30, 6)):
    u, _, vt = torch.linalg.svd(
        torch.randn(rows, cols, generator=g, dtype=torch.float64), full_matrices=False
    )
    k = min(rows, cols)
    # two orders of magnitude, as in real gradients
    spectrum = torch.logspace(0, -2, k, dtype=torch.float64)
    # the size of the gradient does not matter
    for scale in (1e-3, 1.0, 1e4):
        result = newton_schulz((scale * u * spectrum @ vt).float()).double()
        inner = u.T @ result @ vt.T
        assert bool(((inner.diag() > 0.68) & (inner.diag() < 1.21)).all()), (
            f"{(rows, cols)}, scale {scale:g}: singular values in [{inner.diag().min():.3f}, "
            f"{inner.diag().max():.3f}], not in [0.68, 1.21]."
        )
        distance = torch.linalg.matrix_norm(result - u @ vt, ord=2)
        assert distance < 0.32, (
            f"{(rows, cols)}: the result less U Vᵀ has a singular value of {distance:.3f}; 0.32 is "
            "the bound."
        )
    spectrum[k // 2 :] = 0  # rank k / 2: zero stays zero
    values = torch.linalg.svdvals(newton_schulz(u * spectrum @ vt))
    checks.close(
        values[k // 2 :],
        torch.zeros(k - k // 2, dtype=torch.float64),
        what="the singular values of directions without gradient",
        atol=1e-9,
    )
### END HIDDEN TESTS

# %% tags=["experiment"]
# A real gradient: an untrained network on handwritten digits.
images, labels = data.digits()
pixels = images.flatten(1) - images.flatten(1).mean(0)
torch.manual_seed(0)
network = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
F.cross_entropy(network(pixels[:256]), labels[:256]).backward()
gradient = network[2].weight.grad  # (128, 128)


def becomes(value, steps):
    """What a singular value becomes; a second one fills the matrix's norm up to 1."""
    matrix = torch.diag(torch.tensor([value, math.sqrt(1 - value**2)], dtype=torch.float64))
    return newton_schulz(matrix, steps)[0, 0].item()


x = torch.logspace(-4, -0.001, 120, dtype=torch.float64).tolist()
rounds = {
    f"{steps} round{'s' * (steps > 1)}": [becomes(value, steps) for value in x]
    for steps in (1, 3, 5)
}
spectra = {
    "gradient / its norm": torch.linalg.svdvals(gradient / gradient.norm()),
    "after 5 rounds": torch.linalg.svdvals(newton_schulz(gradient)),
}

# %% tags=["experiment", "figure"]
# Figure: what the rounds do to one singular value, and to a real gradient
fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
plot.curves(
    x,
    rounds,
    xlabel="singular value before (share of the norm)",
    ylabel="after",
    ax=axes[0],
    title="What the rounds do to one singular value",
)
axes[0].set_xscale("log")
axes[0].axhspan(0.68, 1.21, color="#dddddd", zorder=0)
plot.curves(
    range(1, 129),
    spectra,
    xlabel="singular value, by size",
    ylabel="its size",
    logy=True,
    ax=axes[1],
    title="A real gradient's 128 singular values",
)
axes[1].set_ylim(1e-5, 3)
plot.caption(
    fig,
    "Left: the gray band is [0.68, 1.21]; five rounds lift everything above 0.0015 nearly into it. "
    "Right: the gradient of a 128×128 layer. A few directions hold most of it; after five rounds "
    "those of sensible size are alike, the rest is noise that stays small.",
)
plt.show()

# %% [markdown]
# ### The whole update, and two conventions
#
# **Muon** (MomentUm Orthogonalized by Newton–Schulz) puts momentum before the orthogonalization and
# decoupled decay after it:
#
# $$b_t = \mu\,b_{t-1} + (1-\mu)\,g_t, \qquad \tilde g_t = (1-\mu)\,g_t
# + \mu\,b_t \ \text{(Nesterov)}, \qquad
# \theta_t = (1-\eta\lambda)\,\theta_{t-1} - \eta\,s\,\mathrm{NS}(\tilde g_t) .$$
#
# Papers and code differ in two places, and a learning rate means nothing until you know in which
# way.
#
# **The buffer**: Jordan's code and PyTorch's average, $\mu b + (1-\mu)g$; the formulas in PyTorch's
# documentation, and Moonlight's code, sum, $\mu b + g$. The sum is the average times
# $\frac{1}{1-\mu}$, in $b$ and in $\tilde g$ alike, and Newton–Schulz divides by the norm: the
# updates are equal.
#
# **The scale** $s$, for a weight of `(rows, cols)`, that is (output, input) features in PyTorch:
#
# | who | `adjust_lr_fn` of `torch.optim.Muon` | $s$ |
# |---|---|---|
# | Jordan et al. 2024, and PyTorch's default | `"original"` | $\sqrt{\max(1, \text{rows}/\text{cols})}$ |
# | Liu et al. 2025 (Moonlight) | `"match_rms_adamw"` | $0.2\,\sqrt{\max(\text{rows}, \text{cols})}$ |
#
# Where does the second come from? $UV^\top$ has $k = \min(\text{rows}, \text{cols})$ singular
# values of 1, so its squared entries sum to $k$ and their root mean square is
# $\sqrt{k/(\text{rows}\cdot\text{cols})} = 1/\sqrt{\max(\text{rows}, \text{cols})}$. Moonlight
# multiplies this away and puts 0.2 in its place, about what AdamW's updates have, so that AdamW's
# learning rate and decay can be kept. Jordan's scale is about stretch, not entries: a layer with
# more outputs than inputs may stretch its input by √(rows/cols). It needs its own learning rate,
# about 0.02.
#
# **This lesson takes PyTorch's default, `"original"`**, and knows the other by its name. In both,
# $s$ multiplies the step only, never the decay.
#
# Muon is for matrices that multiply activations: hidden layers. Embeddings, the output layer,
# biases and gains stay with AdamW.


# %% exercise="muon_step" minutes=20 difficulty=2 path="more"
def muon_step(
    param: Tensor,
    grad: Tensor,
    state: dict,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    adjust_lr_fn: str = "original",
    orthogonalize: Callable[[Tensor], Tensor] = newton_schulz,
) -> tuple[Tensor, dict]:
    """One update of Muon, as torch.optim.Muon makes it.

    param, grad: (rows, cols). Returns (new param, new state); the state holds one tensor,
    "momentum_buffer", zero before the first update.

    - Momentum and Nesterov's look-ahead as in the formulas above; without nesterov the step goes
      along the buffer.
    - What is added to param is −lr · s · orthogonalize(…), with s by adjust_lr_fn: "original" or
      "match_rms_adamw".
    - Decoupled decay: param shrinks by 1 − lr · weight_decay, without s.
    - Raises ValueError for a param that is not a matrix, and for another adjust_lr_fn; the message
      names what it got.
    """
    ### BEGIN SOLUTION
    if param.dim() != 2:
        raise ValueError(
            f"Muon is for matrices; this parameter has shape {tuple(param.shape)}: use AdamW for it"
        )
    rows, cols = param.shape
    scales = {
        "original": math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
    }
    if adjust_lr_fn not in scales:
        raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}: it can be {' or '.join(scales)}")
    buffer = (
        momentum * state.get("momentum_buffer", torch.zeros_like(param)) + (1 - momentum) * grad
    )
    direction = momentum * buffer + (1 - momentum) * grad if nesterov else buffer
    new = (1 - lr * weight_decay) * param - lr * scales[adjust_lr_fn] * orthogonalize(direction)
    return new, {"momentum_buffer": buffer}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the first update</summary>
#
# At $t = 1$ the buffer is $(1-\mu)g$ and the look-ahead a multiple of $g$: after orthogonalization
# the momentum makes no difference. From the second update on it does.
# </details>

# %% check="muon_step" points=2
# A column's only singular value is its length, so that orthogonalizing divides by it: (3, 4)
# becomes (0.6, 0.8), and s = √2.
unit = lambda matrix: matrix / matrix.norm()
path = follow(
    muon_step, torch.zeros(2, 1), [torch.tensor([[3.0], [4.0]])], lr=0.1, orthogonalize=unit
)
checks.close(
    path[0],
    torch.tensor([[-0.06], [-0.08]]) * math.sqrt(2),
    what="a column after the first update",
    mistakes={
        "no scale": torch.tensor([[-0.06], [-0.08]]),
        "cols / rows": torch.tensor([[-0.06], [-0.08]]) / math.sqrt(2),
        "rows / cols without the root": torch.tensor([[-0.12], [-0.16]]),
        "the other scale, match_rms_adamw,": torch.tensor([[-0.06], [-0.08]]) * 0.2 * math.sqrt(2),
    },
)
path = follow(
    muon_step,
    torch.zeros(1, 2),
    [torch.tensor([[3.0, 4.0]])],
    lr=0.1,
    orthogonalize=unit,
    adjust_lr_fn="match_rms_adamw",
)
checks.close(
    path[0],
    torch.tensor([[-0.06, -0.08]]) * 0.2 * math.sqrt(2),
    what="a row after the first update with match_rms_adamw",
    mistakes={
        "the scale of original": torch.tensor([[-0.06, -0.08]]),
        "min(rows, cols) in place of max": torch.tensor([[-0.06, -0.08]]) * 0.2,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(15)


def polar(matrix):
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


for rows, cols in ((4, 3), (3, 5), (6, 1), (1, 4), (5, 5)):
    grad, param = torch.randn(2, rows, cols, generator=g, dtype=torch.float64).unbind()
    k = min(rows, cols)
    for name in ("original", "match_rms_adamw"):
        [new] = follow(muon_step, param, [grad], lr=0.3, adjust_lr_fn=name, orthogonalize=polar)
        # the law that each scale was made for, from the step alone
        stretch, rms = (
            torch.linalg.svdvals(param - new) / 0.3,
            (param - new).square().mean().sqrt() / 0.3,
        )
        if name == "original":
            checks.close(
                stretch,
                torch.full((k,), max(1.0, rows / cols) ** 0.5, dtype=torch.float64),
                what=f"{(rows, cols)}: the step's singular values over lr",
            )
        else:
            checks.close(
                rms,
                torch.tensor(0.2, dtype=torch.float64),
                what=f"{(rows, cols)}: the step's root mean square over lr",
            )
        checks.close(
            param - new,
            polar(grad) * stretch[0] * 0.3,
            what=f"{(rows, cols)}, {name}: the step",
            mistakes={"no scale": polar(grad) * 0.3},
        )
### END HIDDEN TESTS

# %% check="muon_step" points=2
same = lambda matrix: matrix  # leaves momentum and decay to look at
path = follow(
    muon_step,
    torch.ones(1, 1),
    [torch.tensor([[1.0]]), torch.tensor([[-1.0]])],
    lr=1.0,
    momentum=0.5,
    orthogonalize=same,
)
checks.close(
    path[0],
    torch.tensor([[0.25]]),
    what="after the first update, with orthogonalize left out",
    mistakes={
        "no Nesterov": [[0.5]],
        "a sum (momentum · b + grad) in place of an average": [[-0.5]],
    },
)
checks.close(
    path[1], torch.tensor([[0.875]]), what="after the second update, with orthogonalize left out"
)
decayed = follow(
    muon_step, torch.ones(4, 1), [torch.zeros(4, 1)], lr=0.1, weight_decay=0.5, orthogonalize=same
)
checks.close(
    decayed[0],
    torch.full((4, 1), 0.95),
    what="an update with decay and no gradient",
    mistakes={
        "decay times the scale of the step": torch.full((4, 1), 0.9),
        "no decay": torch.ones(4, 1),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(16)


def polar(matrix):
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def with_sums(param, grads, lr, momentum, weight_decay, nesterov, scale):
    """Moonlight's form: the buffer a sum over all gradients, which orthogonalization makes equal to
    the average.
    """
    path = []
    for t in range(len(grads)):
        buffer = sum(momentum ** (t - s) * grads[s] for s in range(t + 1))
        direction = grads[t] + momentum * buffer if nesterov else buffer
        rate = lr[t] if isinstance(lr, list) else lr
        param = param - rate * weight_decay * param - rate * scale * polar(direction)
        path.append(param)
    return path


for (rows, cols), nesterov, lr in (
    ((4, 3), True, 0.1),
    ((3, 5), True, RATES),
    ((4, 3), False, RATES),
    ((2, 6), False, 0.1),
):
    param = torch.randn(cols, rows, generator=g, dtype=torch.float64).T
    grads = [torch.randn(rows, cols, generator=g, dtype=torch.float64) for _ in range(8)]
    for name, scale in (
        ("original", max(1, rows / cols) ** 0.5),
        ("match_rms_adamw", 0.2 * max(rows, cols) ** 0.5),
    ):
        settings = {"lr": lr, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
        expect_path(
            follow(muon_step, param, grads, adjust_lr_fn=name, orthogonalize=polar, **settings),
            with_sums(param, grads, scale=scale, **settings),
            f"{(rows, cols)}, nesterov={nesterov}, {name}",
            mistakes={
                "the other choice for nesterov": with_sums(
                    param, grads, scale=scale, **(settings | {"nesterov": not nesterov})
                ),
                "no weight decay": with_sums(
                    param, grads, scale=scale, **(settings | {"weight_decay": 0})
                ),
            },
        )
expect_pure(
    muon_step,
    torch.randn(3, 2, generator=g),
    [torch.randn(3, 2, generator=g) for _ in range(2)],
    "momentum_buffer",
    weight_decay=0.1,
    orthogonalize=lambda matrix: matrix / matrix.norm(),  # exists in half precision
)
# the defaults are Jordan's: PyTorch's own lr is 1e-3, its weight_decay 0.1
param = torch.zeros(3, 2, dtype=torch.float64)
grads = [torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(5)]
expect_path(
    follow(muon_step, param, grads, orthogonalize=polar),
    with_sums(param, grads, 0.02, 0.95, 0.0, True, 1.5**0.5),
    "the defaults",
)
### END HIDDEN TESTS

# %% check="muon_step" points=1
checks.raises(
    ValueError,
    muon_step,
    torch.ones(3),
    torch.ones(3),
    {},
    orthogonalize=lambda matrix: matrix,
    because="A bias is no matrix.",
)
### BEGIN HIDDEN TESTS
checks.raises(
    ValueError,
    muon_step,
    torch.ones(2, 3, 5),
    torch.ones(2, 3, 5),
    {},
    orthogonalize=lambda matrix: matrix,
    mentions="5",
)
checks.raises(
    ValueError,
    muon_step,
    torch.ones(2, 3),
    torch.ones(2, 3),
    {},
    adjust_lr_fn="moonlight",
    orthogonalize=lambda matrix: matrix,
    mentions="moonlight",
)
# by default the step is orthogonalized by newton_schulz: gradients of any size give the same step,
# near U Vᵀ
grad = torch.randn(6, 4, generator=checks.generator(17), dtype=torch.float64) * 1e3
u, _, vt = torch.linalg.svd(grad, full_matrices=False)
[step] = follow(muon_step, torch.zeros_like(grad), [grad], lr=1.0)
[small] = follow(muon_step, torch.zeros_like(grad), [grad / 100], lr=1.0)
checks.close(small, step, what="the step for a gradient 100 times smaller", rtol=1e-4)
inner = -(u.T @ step @ vt.T).diag() / 1.5**0.5
assert bool(((inner > 0.68) & (inner < 1.21)).all()), (
    f"by default the step's singular values lie in [{inner.min():.2f}, {inner.max():.2f}] · lr · "
    "s, not in [0.68, 1.21]: is it orthogonalized?"
)
### END HIDDEN TESTS

# %% tags=["experiment"]
# How large is an update's average entry, for the shapes of a small transformer's matrices?
shapes = [(512, 512), (1024, 256), (256, 1024), (256, 64), (64, 256), (64, 64)]
random = torch.Generator().manual_seed(0)
rms = {}
for name in ("original", "match_rms_adamw"):
    rms[name] = []
    for shape in shapes:
        grad = torch.randn(shape, generator=random)
        [new] = follow(muon_step, torch.zeros(shape), [grad], lr=1.0, adjust_lr_fn=name)
        rms[name].append(float(new.square().mean().sqrt()))

# %% tags=["experiment", "figure"]
# Figure: the same learning rate, two very different updates
fig, ax = plt.subplots(figsize=(7.4, 3.3))
for i, (name, marker) in enumerate((("original", "o"), ("match_rms_adamw", "s"))):
    ax.plot(
        range(len(shapes)),
        rms[name],
        marker,
        color=plot.COLORS[i],
        linestyle="",
        markersize=8,
        label=name,
    )
ax.axhline(0.2, color="#888888", linestyle=":", linewidth=1)
ax.set(
    xticks=range(len(shapes)),
    xticklabels=[f"{r}×{c}" for r, c in shapes],
    xlabel="rows × cols of the weight",
    ylabel="root mean square of update / lr",
    ylim=(0, 0.27),
)
ax.set_title("The same learning rate, two very different updates")
ax.legend(loc="upper right", ncols=2)
plot.caption(
    fig,
    "One Muon update of a random gradient. match_rms_adamw keeps its entries just under 0.2 (the "
    "dotted line) for every shape, because Newton–Schulz leaves singular values a little below 1 "
    "on average; original does not, and wants a learning rate of its own.",
)
plt.show()

# %% [markdown]
# ## Clipping the gradient
#
# Now and then a batch gives a gradient ten times as long as usual, and one update undoes a hundred.
# **Clipping by global norm** takes the gradients of all parameters as one long vector of length
# $\lVert g\rVert = \sqrt{\sum_i\lVert g_i\rVert^2}$ and shortens it to `max_norm` if it is longer.
# Every part is multiplied by the same number, so its direction stays. Clipping each tensor, or each
# entry, alone would turn it.
#
# The norm *before* clipping is the most useful curve of a training run: it rises before the loss
# does. And a norm that is NaN or infinite must stop the run: multiplied by `max_norm / nan`, every
# gradient becomes NaN, and after the next update the whole model is.


# %% exercise="clip_grad_norm" minutes=15 difficulty=2
def clip_grad_norm(params, max_norm: float) -> Tensor:
    """Scales the gradients of params in place so that their global norm is at most max_norm;
    returns the norm before that.

    params: an iterable of parameters, possibly a generator such as model.parameters(). Those whose
    grad is None are left out; no gradient at all has norm 0.

    - Returns a 0-dimensional float32 (or float64) tensor. The norm is computed in float32 at least:
      the squares of half-precision gradients overflow.
    - Gradients whose norm is max_norm or less keep their values exactly. Longer ones get the norm
      max_norm (to 1e-5; PyTorch's own adds 1e-6 to the norm by which it divides).
    - If the norm is not finite, raises RuntimeError and leaves all gradients as they are.
    """
    ### BEGIN SOLUTION
    grads = [
        p.grad for p in params if p.grad is not None
    ]  # a list: a generator can be walked through only once
    if not grads:
        return torch.tensor(0.0)
    # The norm of the norms: no copy of all gradients is needed.
    norms = [
        torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in grads
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if not torch.isfinite(total):
        raise RuntimeError(
            f"the gradients' norm is {total.item()}: look for the batch or the operation that made "
            "it"
        )
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return total
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: in place</summary>
#
# `p.grad = p.grad * c` works as well, but makes a second copy of every gradient. `p.grad.mul_(c)`
# does not.
# </details>
#
# <details><summary>Hint: nothing is clipped</summary>
#
# A generator is empty after the first loop over it. Collect the gradients into a list first.
# </details>


# %% check="clip_grad_norm" points=2
def with_grads(*grads):
    """Parameters that have these gradients (None: none yet)."""
    params = [
        nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(2))
        for grad in grads
    ]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    return params


params = with_grads(torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]]))
norm = clip_grad_norm(iter(params), max_norm=1.0)
checks.close(
    norm,
    torch.tensor(5.0),
    what="the norm before clipping",
    mistakes={
        "the norm after clipping": 1.0,
        "the sum of the norms": 7.0,
        "the sum of squares, without the root,": 25.0,
        "the largest of the norms": 4.0,
    },
)
checks.close(
    params[0].grad,
    torch.tensor([0.6, 0.0]),
    what="the first gradient after clipping",
    mistakes={"clipping each tensor alone": [1.0, 0.0], "nothing": [3.0, 0.0]},
)
checks.close(
    params[2].grad,
    torch.tensor([[0.8]]),
    what="the last gradient after clipping",
    mistakes={"clipping each tensor alone": [[1.0]]},
)


### BEGIN HIDDEN TESTS
def with_grads(*grads):
    params = [
        nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(2))
        for grad in grads
    ]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    return params


g = checks.generator(18)
for max_norm in (0.1, 2.5, 100.0):
    grads = [
        torch.randn(5, generator=g),
        None,
        torch.randn(3, 1, 4, generator=g),
        torch.randn((), generator=g),
        torch.randn(6, 4, generator=g).T,
    ]
    ours, theirs = with_grads(*grads), with_grads(*grads)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    with checks.forbidden(
        "clip_grad_norm_", "_clip_grads_with_norm_", "clip_grads_with_norm_", "get_total_norm"
    ):
        checks.close(
            clip_grad_norm((p for p in ours), max_norm),
            expected,
            what=f"the norm before clipping to {max_norm:g}",
        )
    for i, (a, b, grad) in enumerate(zip(ours, theirs, grads, strict=True)):
        if grad is None:
            assert a.grad is None, "a parameter without a gradient was given one."
        elif max_norm == 100.0:
            checks.close(
                a.grad,
                grad,
                what=f"gradient {i}, short enough already,",
                rtol=0,
                atol=0,
                mistakes={"always scaling to max_norm": grad * max_norm / expected},
            )
        else:
            checks.close(
                a.grad,
                b.grad,
                what=f"gradient {i} clipped to {max_norm:g}",
                mistakes={
                    "clipping each tensor alone": grad * min(1, max_norm / float(grad.norm()))
                },
            )
checks.close(clip_grad_norm([], 1.0), torch.tensor(0.0), what="the norm of no gradients")
checks.close(
    clip_grad_norm(with_grads(None, None), 1.0), torch.tensor(0.0), what="the norm of no gradients"
)
zero = with_grads(torch.zeros(3))
checks.close(clip_grad_norm(zero, 1.0), torch.tensor(0.0), what="the norm of zeros")
checks.close(zero[0].grad, torch.zeros(3), what="a gradient of zeros")
# as long as allowed, and not longer: 5 = √(3² + 4²) without rounding
exact = with_grads(torch.tensor([3.0]), torch.tensor([0.0, 4.0]))
clip_grad_norm(exact, 5.0)
for param, grad in zip(exact, ([3.0], [0.0, 4.0]), strict=True):
    checks.close(
        param.grad,
        torch.tensor(grad),
        what="a gradient, where the norm is max_norm exactly,",
        rtol=0,
        atol=0,
        hint="The norm is no longer than max_norm: nothing is scaled.",
    )
nothing = with_grads(torch.tensor([3.0, 4.0]))
clip_grad_norm(nothing, 0.0)
checks.close(nothing[0].grad, torch.zeros(2), what="a gradient clipped to a norm of 0")
### END HIDDEN TESTS

# %% check="clip_grad_norm" points=1
params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
params[0].grad, params[1].grad = torch.tensor([1.0, 2.0]), torch.tensor([math.nan])
checks.raises(
    RuntimeError,
    clip_grad_norm,
    params,
    1.0,
    because="A NaN would spread to every parameter in the next update.",
)
checks.close(
    params[0].grad,
    torch.tensor([1.0, 2.0]),
    what="the other gradient after the error",
    rtol=0,
    atol=0,
)
### BEGIN HIDDEN TESTS
for bad in (math.nan, math.inf, -math.inf):
    for where in (0, 1):
        params = [
            nn.Parameter(torch.zeros(3, dtype=torch.float64)),
            nn.Parameter(torch.zeros(2, dtype=torch.float64)),
        ]
        grads = [
            torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64),
            torch.tensor([1.0, 5.0], dtype=torch.float64),
        ]
        grads[where][1] = bad
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        checks.raises(RuntimeError, clip_grad_norm, params, 1e9, because=f"One gradient is {bad}.")
        for param, grad in zip(params, grads, strict=True):
            checks.close(param.grad, grad, what="a gradient after the error", rtol=0, atol=0)
### END HIDDEN TESTS

# %% check="clip_grad_norm" points=1
# 10,000 half-precision gradients of 3: the sum of squares, 90,000, is beyond float16's largest
# number, 65,504. The norm is 300.
half = nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
half.grad = torch.full((10_000,), 3.0, dtype=torch.float16)
checks.close(
    clip_grad_norm([half], 30.0),
    torch.tensor(300.0),
    what="the norm of half-precision gradients",
    hint="Square and sum in float32.",
)
checks.close(
    half.grad,
    torch.full((10_000,), 0.3, dtype=torch.float16),
    what="the clipped half-precision gradient",
)
### BEGIN HIDDEN TESTS
g = checks.generator(19)
half, whole = nn.Parameter(torch.zeros(500, dtype=torch.float16)), nn.Parameter(torch.zeros(7))
half.grad, whole.grad = (400 * torch.randn(500, generator=g)).half(), torch.randn(7, generator=g)
expected = math.hypot(float(half.grad.double().norm()), float(whole.grad.double().norm()))
before, kept = half.grad.double().clone(), whole.grad
norm = clip_grad_norm([half, whole], 100.0)
assert norm.dtype in (torch.float32, torch.float64), f"the norm has the format {norm.dtype}"
checks.close(norm.float(), torch.tensor(expected), what="the norm of gradients of two formats")
checks.close(
    half.grad,
    (before * 100 / expected).half(),
    what="the half-precision gradient",
    dtype=torch.float16,
)
for dtype in (torch.bfloat16, torch.float64):
    other = nn.Parameter(torch.zeros(5000, dtype=dtype))
    other.grad = torch.full((5000,), 3.0, dtype=dtype)
    checks.close(
        clip_grad_norm(iter([other]), 24.0),
        torch.tensor(3 * math.sqrt(5000)),
        what=f"the norm of 5,000 gradients of 3 in {dtype}",
        rtol=1e-5,
    )
    checks.close(
        other.grad,
        torch.full((5000,), 24 / math.sqrt(5000), dtype=dtype),
        what=f"the clipped gradient in {dtype}",
        dtype=dtype,
        rtol=8e-3 if dtype == torch.bfloat16 else 1e-5,
    )
assert whole.grad is kept, (
    "the gradient tensor was replaced: scale it in place, a second copy of all gradients takes the "
    "memory of a second model."
)
### END HIDDEN TESTS

# %% [markdown]
# ## The learning rate over time
#
# **Warm-up** raises the learning rate from 0 to its peak over the first hundreds or thousands of
# updates. Adam's first updates go at full speed on the evidence of very few gradients, in a network
# whose activations are still those of its initialization; small steps at first cost little and
# prevent damage from which a run does not recover.
#
# Then it has to come down: with a constant learning rate the noise of the batches keeps the weights
# jumping around the minimum. **Cosine decay** comes down along half a cosine,
#
# $$\eta(t) = \eta_{\min} + \tfrac12(\eta - \eta_{\min})\Big(1 + \cos\pi\,\frac{t - T_w}{T - T_w}\Big), \qquad T_w \le t \le T,$$
#
# and has to know the last update $T$ from the first day. **Warmup–stable–decay** (WSD) stays at the
# peak as long as one likes and comes down in a short last phase, a tenth or so of the run, in which
# the loss falls sharply. One can then go on from the checkpoint before the decay.
#
# $t$ counts updates from 1, as in Adam. At $t = T_w$ the rate is exactly the peak and at $t = T$
# exactly the minimum. (Schedulers that count from 0 spend the first update on a learning rate of
# 0.)


# %% exercise="schedules" minutes=15 difficulty=1
def warmup_cosine(
    step: int, lr: float, warmup_steps: int, total_steps: int, min_lr: float = 0.0
) -> float:
    """The learning rate of update `step`: linear from 0 (at step 0) to lr (at warmup_steps), then
    half a cosine to min_lr (at total_steps), and min_lr after that.

    warmup_steps = 0 means none: step 0 has lr. Where warmup_steps = total_steps (0 too), that step
    has min_lr. Raises ValueError if warmup_steps > total_steps.
    """
    ### BEGIN SOLUTION
    if warmup_steps > total_steps:
        raise ValueError(f"{warmup_steps} steps of warm-up do not fit into {total_steps} steps")
    if step < warmup_steps:
        return lr * step / warmup_steps
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))
    ### END SOLUTION


def warmup_stable_decay(
    step: int, lr: float, warmup_steps: int, decay_steps: int, total_steps: int, min_lr: float = 0.0
) -> float:
    """The learning rate of update `step`: linear from 0 to lr over warmup_steps, lr until
    decay_steps before the end, then linear from lr to min_lr (at total_steps), and min_lr after
    that.

    decay_steps = 0 means that lr holds until total_steps, where it drops to min_lr. Raises
    ValueError if warmup_steps + decay_steps > total_steps.
    """
    ### BEGIN SOLUTION
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"{warmup_steps} + {decay_steps} steps of warm-up and decay do not fit into "
            f"{total_steps}"
        )
    if step < warmup_steps:
        return lr * step / warmup_steps
    if step >= total_steps:
        return min_lr
    if step <= total_steps - decay_steps:
        return lr
    return min_lr + (lr - min_lr) * (total_steps - step) / decay_steps
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: division by zero</summary>
#
# With `warmup_steps = 0` no step is smaller than it, with `total_steps` reached nothing is left to
# decay: ask for these cases before the formulas that divide.
# </details>

# %% check="schedules" points=2
for step, expected in [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)]:
    checks.close(
        warmup_cosine(step, lr=1.0, warmup_steps=10, total_steps=110, min_lr=0.1),
        expected,
        what=f"warmup_cosine at step {step}",
    )
### BEGIN HIDDEN TESTS
for step in (1, 5, 45, 60, 110):
    checks.close(
        warmup_cosine(step, lr=1.0, warmup_steps=10, total_steps=110, min_lr=0.1),
        step / 10 if step < 10 else 0.1 + 0.9 * math.cos(math.pi * (step - 10) / 200) ** 2,
        what=f"warmup_cosine at step {step}",
        mistakes={
            "a step too many in the warm-up, (step + 1) / warmup_steps,": (step + 1) / 10,
            "min_lr forgotten": 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)),
            "the cosine counted from step 0": 0.1 + 0.45 * (1 + math.cos(math.pi * step / 110)),
        },
    )
g = checks.generator(20)
for warmup, total in [(0, 7), (1, 2), (3, 3), (13, 100), (0, 1), (0, 0)]:
    lr, low = 0.2 + torch.rand((), generator=g).item(), 0.1 * torch.rand((), generator=g).item()
    rates = [warmup_cosine(step, lr, warmup, total, low) for step in range(total + 3)]
    assert all(isinstance(rate, float) for rate in rates), "a learning rate is a float."
    for step, rate in enumerate(rates):
        # the cosine through its half-angle form, and piece by piece
        after = (step - warmup) / max(1, total - warmup)
        falling = low if step >= total else low + (lr - low) * math.cos(math.pi * after / 2) ** 2
        expected = lr * step / warmup if step < warmup else falling
        checks.close(
            rate, expected, what=f"warmup_cosine at step {step} (warm-up {warmup}, total {total})"
        )
checks.raises(
    ValueError,
    warmup_cosine,
    1,
    1.0,
    11,
    10,
    because="Eleven steps of warm-up do not fit into ten.",
)
### END HIDDEN TESTS

# %% check="schedules" points=2
for step, expected in [
    (0, 0.0),
    (5, 0.5),
    (10, 1.0),
    (50, 1.0),
    (90, 1.0),
    (91, 0.91),
    (95, 0.55),
    (100, 0.1),
    (200, 0.1),
]:
    checks.close(
        warmup_stable_decay(
            step, lr=1.0, warmup_steps=10, decay_steps=10, total_steps=100, min_lr=0.1
        ),
        expected,
        what=f"warmup_stable_decay at step {step}",
    )
### BEGIN HIDDEN TESTS
checks.close(
    warmup_stable_decay(92, lr=1.0, warmup_steps=10, decay_steps=10, total_steps=100, min_lr=0.1),
    0.82,
    what="warmup_stable_decay at step 92",
    mistakes={
        "decay that begins where the warm-up ends": 1 - 0.9 * 82 / 90,
        "decay that begins a step too early": 1 - 0.09 * 3,
        "min_lr forgotten": 0.8,
    },
)
g = checks.generator(21)
shapes = [
    (0, 4, 9),
    (3, 0, 8),
    (2, 5, 7),
    (10, 30, 100),
    (0, 0, 3),
    (0, 5, 5),
    (3, 0, 3),
    (0, 0, 0),
]
for warmup, decay, total in shapes:
    lr, low = 0.2 + torch.rand((), generator=g).item(), 0.1 * torch.rand((), generator=g).item()
    # the three corners of the polygon, joined by straight lines
    for step in range(total + 3):
        rising = step / warmup if warmup and step < warmup else 1.0
        falling = min(1.0, max(0.0, (total - step) / decay)) if decay else float(step < total)
        expected = lr * rising if step < warmup else low + (lr - low) * falling
        assert isinstance(warmup_stable_decay(step, lr, warmup, decay, total, low), float), (
            "a learning rate is a float."
        )
        checks.close(
            warmup_stable_decay(step, lr, warmup, decay, total, low),
            expected,
            what=f"warmup_stable_decay at step {step} (warm-up {warmup}, decay {decay}, total "
            f"{total})",
        )
checks.raises(
    ValueError,
    warmup_stable_decay,
    1,
    1.0,
    6,
    5,
    10,
    because="Six steps of warm-up and five of decay do not fit into ten.",
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: two schedules with the same peak
steps = range(1001)
ax = plot.curves(
    steps,
    {
        "cosine": [warmup_cosine(t, 1e-3, 100, 1000, 1e-4) for t in steps],
        "warmup–stable–decay": [warmup_stable_decay(t, 1e-3, 100, 200, 1000, 1e-4) for t in steps],
    },
    xlabel="update",
    ylabel="learning rate",
    title="Two schedules with the same peak",
)
ax.set_ylim(0, 1.15e-3)
ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
plot.caption(
    ax.figure,
    "Both rise for 100 updates. The cosine has to know from the start that there will be 1,000; "
    "the other one decides at 800, and has spent more of the run at its peak.",
)
plt.show()

# %% [markdown]
# ## A batch larger than memory
#
# Large models want batches of millions of tokens; a device holds the activations of a few thousand.
# Since the gradient of a sum is the sum of the gradients, the batch can be cut into
# **micro-batches**, each with its own forward and backward pass, while `p.grad` adds up. Memory is
# that of one micro-batch.
#
# The trap is the mean. The loss of a batch is the mean over its **tokens**, and micro-batches have
# different numbers of them: sequences differ in length, and padding (target −100) does not count.
# With $n_i$ tokens in micro-batch $i$ and their losses summing to $S_i$,
#
# $$\underbrace{\frac{\sum_i S_i}{\sum_i n_i}}_{\text{right}} \;\ne\; \underbrace{\frac1k\sum_{i=1}^k\frac{S_i}{n_i}}_{\text{the mean of the means}}$$
#
# unless all $n_i$ are equal. The mean of the means gives each token of a short micro-batch more
# weight than one of a long one. Widely used training libraries took it until October 2024, when it
# was noticed that accumulation changed the loss curve.


# %% exercise="accumulate_gradients" minutes=20 difficulty=2
def accumulate_gradients(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]]) -> float:
    """Leaves in every p.grad the gradient of the mean cross-entropy over all tokens of all
    micro-batches; returns that mean.

    micro_batches: a list of (inputs, targets); model(inputs) gives logits of shape (*targets.shape,
    classes). A target of −100 does not count. A micro-batch may have any number of targets that
    count, also none.

    - What p.grad held before does not matter. A parameter that no loss depends on, or that is
      frozen (requires_grad is False), is left with None or a gradient of zero.
    - The model is otherwise left as it is: its values, requires_grad, train or eval.
    - The activations of only one micro-batch are held at a time.
    - Raises ValueError if no target counts at all.
    """
    ### BEGIN SOLUTION
    tokens = sum(int((targets != -100).sum()) for _, targets in micro_batches)
    if tokens == 0:
        raise ValueError("there is no target to learn from: all are -100")
    model.zero_grad(set_to_none=True)
    total = 0.0
    for inputs, targets in micro_batches:
        loss = (
            F.cross_entropy(
                model(inputs).flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            / tokens
        )
        loss.backward()
        total += loss.item()
    return total
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: sum, then divide</summary>
#
# `F.cross_entropy(…, reduction="sum")` leaves out the targets that are −100 and sums the rest.
# Count the tokens of all micro-batches before the first backward pass, or divide every `p.grad` at
# the end.
# </details>
#
# <details><summary>Hint: memory</summary>
#
# A graph lives until its `backward()` or until nothing refers to it. Adding the losses up and
# calling `backward()` once keeps all of them.
# </details>


# %% check="accumulate_gradients" points=2
def whole_batch(model, micro_batches):
    """The gradients and the loss of all micro-batches (with inputs of one width) as one batch."""
    logits = torch.cat([model(inputs).flatten(0, -2) for inputs, _ in micro_batches])
    loss = F.cross_entropy(
        logits, torch.cat([targets.flatten() for _, targets in micro_batches]), ignore_index=-100
    )
    return torch.autograd.grad(loss, list(model.parameters())), loss.item()


torch.manual_seed(0)
model = nn.Linear(3, 2)
micro_batches = [
    (torch.ones(4, 3), torch.tensor([0, 0, 0, 1])),
    (-torch.ones(1, 3), torch.tensor([1])),
]
[weight, bias], loss = whole_batch(model, micro_batches)
apart = [whole_batch(model, [micro_batch]) for micro_batch in micro_batches]
checks.close(
    accumulate_gradients(model, micro_batches),
    loss,
    what="the mean loss over 4 + 1 tokens",
    rtol=1e-5,
    mistakes={
        "the mean of the two means": sum(part[1] for part in apart) / 2,
        "the sum of the means": sum(part[1] for part in apart),
        "the sum over the tokens": 5 * loss,
        "the last micro-batch's loss alone": apart[1][1],
    },
)
checks.close(
    model.weight.grad,
    weight,
    what="the gradient of the weight",
    hint="Weigh each micro-batch by its number of tokens.",
    mistakes={
        "the mean of the two means": (apart[0][0][0] + apart[1][0][0]) / 2,
        "the sum of the means": apart[0][0][0] + apart[1][0][0],
        "the sum over the tokens": 5 * weight,
        "the last micro-batch alone": apart[1][0][0],
    },
)
accumulate_gradients(model, micro_batches)
checks.close(
    model.weight.grad,
    weight,
    what="the gradient of the weight at a second call",
    mistakes={"adding to the gradients of the first call": 2 * weight},
)


### BEGIN HIDDEN TESTS
def whole_batch(model, micro_batches):
    logits = torch.cat([model(inputs).flatten(0, -2) for inputs, _ in micro_batches])
    loss = F.cross_entropy(
        logits, torch.cat([targets.flatten() for _, targets in micro_batches]), ignore_index=-100
    )
    return torch.autograd.grad(loss, list(model.parameters())), loss.item()


g = checks.generator(22)
for sizes in ([5], [1, 7, 3], [2, 2, 2, 2], [1, 16]):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    batches = [
        (
            torch.randn(n, 3, 4, generator=g, dtype=torch.float64),
            torch.randint(6, (n, 3), generator=g),
        )
        for n in sizes
    ]
    for i, (_, targets) in enumerate(batches):
        targets.view(-1)[: 2 * i] = -100  # the more, the later: unequal shares of padding
    expected, loss = whole_batch(model, batches)
    for p in model.parameters():
        p.grad = torch.full_like(p, 5.0)
    model.eval()
    with (
        checks.kept(model=model, values=False),
        checks.unchanged(*model.parameters(), *[tensor for batch in batches for tensor in batch]),
    ):
        mean = accumulate_gradients(model, batches)
    checks.kind(mean, float, what="the mean loss")
    checks.close(mean, loss, what=f"the mean loss over micro-batches of {sizes} sequences")
    counts = [int((targets != -100).sum()) for _, targets in batches]
    each = [whole_batch(model, [batch])[0] for batch, n in zip(batches, counts, strict=True) if n]
    rows = [len(targets) for (_, targets), n in zip(batches, counts, strict=True) if n]
    for i, p in enumerate(model.parameters()):
        by_rows = sum(part[i] * n for part, n in zip(each, rows, strict=True)) / sum(rows)
        checks.close(
            p.grad,
            expected[i],
            what=f"gradient {i} with micro-batches of {sizes} sequences and {counts} tokens",
            mistakes={
                "the mean of the means": sum(part[i] for part in each) / len(each),
                "weighing by sequences, padding included,": by_rows,
            },
        )
batches.append((torch.randn(2, 3, 4, generator=g, dtype=torch.float64), torch.full((2, 3), -100)))
checks.close(
    accumulate_gradients(model, batches),
    loss,
    what="the mean loss with a micro-batch of padding only",
)
checks.close(
    next(model.parameters()).grad, expected[0], what="a gradient with a micro-batch of padding only"
)
# plain (inputs, targets) without a sequence axis
flat = [
    (torch.randn(n, 4, generator=g).double(), torch.randint(6, (n,), generator=g)) for n in (1, 4)
]
expected, loss = whole_batch(model, flat)
accumulate_gradients(model, flat)
checks.close(next(model.parameters()).grad, expected[0], what="a gradient without a sequence axis")
# one parameter that is not used, and one that is frozen; both hold an old gradient
model = nn.Linear(4, 6).double()
model.spare, model.bias.requires_grad = nn.Parameter(torch.ones(2)), False
model.spare.grad, model.bias.grad = torch.ones(2), torch.ones(6).double()
logits = torch.cat([model(inputs) for inputs, _ in flat])
loss = F.cross_entropy(logits, torch.cat([targets for _, targets in flat]))
[expected] = torch.autograd.grad(loss, [model.weight])
checks.close(
    accumulate_gradients(model, flat), loss.item(), what="the mean loss with a frozen bias"
)
checks.close(model.weight.grad, expected, what="the gradient beside a frozen bias")
for what, grad in (("nothing uses", model.spare.grad), ("is frozen", model.bias.grad)):
    assert grad is None or not grad.any(), (
        f"a parameter that {what} has a gradient: what p.grad held before does not matter."
    )
assert not model.bias.requires_grad, "the frozen bias requires gradients now: leave it frozen."
### END HIDDEN TESTS

# %% check="accumulate_gradients" points=1
checks.raises(
    ValueError,
    accumulate_gradients,
    nn.Linear(3, 2),
    [(torch.ones(2, 3), torch.tensor([-100, -100]))],
    because="0 / 0 would be NaN, and spread.",
)
### BEGIN HIDDEN TESTS
checks.raises(ValueError, accumulate_gradients, nn.Linear(3, 2), [], because="There is no target.")


def most_alive(micro_batches):
    """How many elements that the forward pass saves for the backward pass are alive at once."""
    with checks.saved() as kept:
        accumulate_gradients(
            nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 4)), micro_batches
        )
    return kept.most


g = checks.generator(23)
batch = lambda: (torch.randn(6, 5, generator=g), torch.randint(4, (6,), generator=g))
one, eight = most_alive([batch()]), most_alive([batch() for _ in range(8)])
assert one > 0, "no activation was saved: was backward called?"
assert eight <= 1.5 * one, (
    f"with 8 micro-batches {eight:,} saved numbers were alive at once, with one {one:,}: call "
    "backward for each micro-batch, so that its graph is freed before the next."
)
### END HIDDEN TESTS

# %% [markdown]
# ## All of it: a training loop
#
# What remains is to put the pieces in order. One more rule belongs here: **weight decay is for
# matrices**. Gains of normalization layers, biases and other vectors set a scale or an offset;
# pulled to zero they switch features off without limiting anything. So parameters of two and more
# dimensions decay and the others do not. In PyTorch these are two parameter groups.
#
# From here on you may use PyTorch's own parts, as every later lesson does: `torch.optim.AdamW`,
# `nn.utils.clip_grad_norm_`. Or yours.


# %% exercise="train" minutes=35 difficulty=3
def train(
    model: nn.Module,
    batches: list[list[tuple[Tensor, Tensor]]],
    lr: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.1,
    max_norm: float = 1.0,
) -> dict[str, list[float]]:
    """Trains the model with AdamW, one update for each entry of `batches`.

    batches: for every update the list of its micro-batches (inputs, targets), as in
        accumulate_gradients.

    Update t = 1, 2, …, T = len(batches):
    1. the gradient of the mean loss over all tokens of the update's micro-batches;
    2. clipped to a global norm of max_norm;
    3. AdamW with betas (0.9, 0.95), eps 1e-8 and the learning rate of warmup_cosine(t, lr,
       warmup_steps, T); weight_decay for parameters of two or more dimensions, none for the others.

    Returns {"loss": …, "grad_norm": …, "lr": …}, each a list of T floats: the mean loss before the
    update, the norm before clipping, the learning rate used. Gradients that the model holds at the
    start do not count. Raises RuntimeError if a gradient is
    not finite, before the model is changed by it.
    """
    ### BEGIN SOLUTION
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    history = {"loss": [], "grad_norm": [], "lr": []}
    for t, micro_batches in enumerate(batches, start=1):
        rate = warmup_cosine(t, lr, warmup_steps, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        history["loss"].append(accumulate_gradients(model, micro_batches))
        norm = nn.utils.clip_grad_norm_(params, max_norm, error_if_nonfinite=True)
        history["grad_norm"].append(norm.item())
        history["lr"].append(rate)
        optimizer.step()
    return history
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a schedule with torch.optim</summary>
#
# The optimizer reads `group["lr"]` from each entry of `optimizer.param_groups` at every step. Set
# it there before `step()`.
# </details>
#
# <details><summary>Hint: a group without parameters</summary>
#
# A model without vectors gives an empty list for its group, and AdamW takes it.
# </details>

# %% check="train" points=2
model = nn.Linear(1, 2)
with torch.no_grad():
    model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    model.bias.copy_(torch.tensor([1.0, 1.0]))
# Both logits are 1 for input 0, so the loss is ln 2, no gradient reaches the weight, and the bias
# meets (−0.5, 0.5), of norm 0.71.
history = train(
    model,
    [[(torch.zeros(1, 1), torch.tensor([0]))]] * 2,
    lr=0.1,
    warmup_steps=1,
    weight_decay=0.5,
    max_norm=10.0,
)
assert isinstance(history, dict), "train returns a dict of three lists: loss, grad_norm and lr."
checks.close(history["loss"][0], math.log(2), what="the first loss", rtol=1e-5)
checks.close(history["grad_norm"][0], math.sqrt(0.5), what="the first gradient's norm", rtol=1e-5)
checks.close(
    torch.tensor(history["lr"]),
    [0.1, 0.0],
    what="the learning rates with one step of warm-up of two",
    atol=1e-9,
    mistakes={"updates counted from 0": [0.0, 0.1]},
)
checks.close(
    model.weight,
    torch.tensor([[0.95], [-0.95]]),
    what="the weight, which only decay moves,",
    mistakes={
        "L2 decay inside the gradient": torch.tensor([[0.9], [-0.9]]),
        "no decay": torch.tensor([[1.0], [-1.0]]),
    },
)
checks.close(
    model.bias,
    torch.tensor([1.1, 0.9]),
    what="the bias",
    mistakes={"decaying the bias too": [1.05, 0.85]},
)
### BEGIN HIDDEN TESTS
g = checks.generator(24)


class Scale(nn.Module):
    """Multiplies by a parameter of three dimensions, which decays as matrices do."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x):
        return x * self.weight


for warmup, max_norm, size in [(0, 1e9, 1.0), (3, 0.05, 1.0), (6, 1.0, 5.0)]:
    make = lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), Scale(6), nn.Linear(6, 5)
    ).double()
    trained, peer_model = make(), make()
    with torch.no_grad():
        for p, q in zip(trained.parameters(), peer_model.parameters(), strict=True):
            q.copy_(p.copy_(torch.randn(p.shape, generator=g)))
            p.grad = torch.ones_like(p)  # of an earlier run: it does not count
    batches = [
        [
            (
                size * torch.randn(n, 2, 4, generator=g, dtype=torch.float64),
                torch.randint(-1, 5, (n, 2), generator=g),
            )
            for n in (1, 4, 2)
        ]
        for _ in range(12)
    ]
    for micro_batches in batches:
        for _, targets in micro_batches:
            targets[targets == -1] = -100  # every sixth token is padding
        micro_batches[1][1][0, 0] = 3  # and one certainly counts
    history = train(
        trained, batches, lr=0.02, warmup_steps=warmup, weight_decay=0.3, max_norm=max_norm
    )
    # the same from PyTorch's parts, each update's micro-batches joined into one batch
    first, norm, _, scale, last = peer_model
    decayed = [first.weight, scale.weight, last.weight]
    free = [first.bias, norm.weight, norm.bias, last.bias]
    peer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": free, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.95),
    )
    expected = {"loss": [], "grad_norm": [], "lr": []}
    for t, micro_batches in enumerate(batches, start=1):
        rate = 0.02 * (
            t / warmup if t < warmup else math.cos(math.pi / 2 * (t - warmup) / (12 - warmup)) ** 2
        )
        for group in peer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(
            peer_model(torch.cat([x for x, _ in micro_batches])).flatten(0, 1),
            torch.cat([y for _, y in micro_batches]).flatten(),
        )
        peer.zero_grad()
        loss.backward()
        expected["loss"].append(loss.item())
        expected["grad_norm"].append(
            nn.utils.clip_grad_norm_(peer_model.parameters(), max_norm).item()
        )
        expected["lr"].append(rate)
        peer.step()
    for name in expected:
        checks.kind(history[name], list, what=f"history[{name!r}]")
        for value in history[name]:
            checks.kind(value, float, what=f"an entry of history[{name!r}]")
        checks.close(
            torch.tensor(history[name], dtype=torch.float64),
            expected[name],
            what=f"history[{name!r}] with warmup_steps={warmup}, max_norm={max_norm:g}",
            rtol=1e-5,
            atol=1e-7,
        )
    for i, (p, q) in enumerate(zip(trained.parameters(), peer_model.parameters(), strict=True)):
        checks.close(
            p,
            q,
            what=f"parameter {i} {tuple(p.shape)} after 12 updates with warmup_steps={warmup}, "
            f"max_norm={max_norm:g}",
            rtol=1e-5,
        )
### END HIDDEN TESTS

# %% check="train" points=1
model = nn.Linear(2, 2)
before = model.weight.detach().clone()
checks.raises(
    RuntimeError,
    train,
    model,
    [[(torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))]],
    lr=0.1,
    because="The gradient is NaN.",
)
checks.close(model.weight, before, what="the weight after the error", rtol=0, atol=0)
### BEGIN HIDDEN TESTS
model = nn.Linear(2, 2)
good, bad = (
    (torch.tensor([[0.5, 1.0]]), torch.tensor([1])),
    (torch.tensor([[math.inf, 1.0]]), torch.tensor([0])),
)
checks.raises(
    RuntimeError,
    train,
    model,
    [[good], [good, bad]],
    lr=0.1,
    because="The gradient of the second update is not finite.",
)
finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
assert finite, "a gradient that is not finite changed the model."
### END HIDDEN TESTS


# %% check="train" points=2
# Real data: 1,797 handwritten digits, of which 397 are held out. 100 updates with two unequal
# micro-batches each.
def digits_accuracy(seed):
    images, labels = data.digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    pixels, labels = images.flatten(1)[order], labels[order]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    picks = torch.randint(1400, (100, 128), generator=torch.Generator().manual_seed(seed + 1))
    batches = [
        [(pixels[p[:100]], labels[p[:100]]), (pixels[p[100:]], labels[p[100:]])] for p in picks
    ]
    history = train(model, batches, lr=0.02, warmup_steps=5)
    assert len(history["loss"]) == 100, (
        f"100 updates were asked for, the history has {len(history['loss'])}."
    )
    return (model(pixels[1400:]).argmax(1) == labels[1400:]).float().mean().item()


accuracy = digits_accuracy(0)
assert accuracy >= 0.88, (
    f"{100 * accuracy:.1f} % of the held-out digits are right; a working loop gets above 93 %."
)
### BEGIN HIDDEN TESTS
accuracy = digits_accuracy(checks.seed() + 1)
assert accuracy >= 0.88, (
    f"with another seed {100 * accuracy:.1f} % are right; a working loop gets above 93 %."
)
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: does warm-up pay?
#
# The network below predicts the next byte of Python's documentation. It is a small Transformer in
# its original form of 2017, which is known to be hard to train. What is inside comes in stage 2;
# for now it is a box with about 200,000 parameters that maps bytes to logits, trained by your
# `adamw_step` and your `warmup_cosine`.
#
# Three learning rates (0.001, 0.005 and 0.01), each with no warm-up and with 40 updates of it, 120
# updates of 320 bytes each, one seed.
#
# **Write down first**: at which of the three does warm-up help, at which does it do harm, and at
# which does it make no difference?

# %% [markdown] answer="predict-warmup"
# Warm-up costs updates: at the small learning rate nothing threatens, so the run with it is behind.
# At the middle one it decides: without it the run is thrown onto a plateau. At the largest both end
# there, because a rate that is too high for the network stays too high after the warm-up. Warm-up
# raises the largest learning rate that works; it makes no learning rate safe.


# %% tags=["experiment"]
class ByteModel(nn.Module):
    """A post-norm Transformer (Vaswani et al. 2017) over bytes: (batch, seq) → logits (batch, seq,
    256).
    """

    def __init__(self, dim=48, layers=6, length=32):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, dim), nn.Embedding(length, dim)
        block = lambda: nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(dim, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, ids):
        hidden = self.bytes(ids) + self.positions.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden)


text = torch.tensor(list("\n".join(data.documentation().values()).encode()))
frequency = torch.bincount(text, minlength=256) / len(text)
# the loss of knowing nothing but how frequent each byte is
plateau = float(-(frequency * frequency.clamp_min(1e-12).log()).sum())


def train_bytes(lr, warmup_steps, updates=120, seed=0):
    torch.manual_seed(seed)
    model = ByteModel()
    params, state = list(model.parameters()), {}
    picks, losses = torch.Generator().manual_seed(seed + 1), []
    for t in range(1, updates + 1):
        starts = torch.randint(len(text) - 33, (10, 1), generator=picks)
        window = text[starts + torch.arange(33)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        grads = torch.autograd.grad(loss, params)
        # the start of a run ten times as long
        rate = warmup_cosine(t, lr, warmup_steps, 10 * updates)
        # AdamW works element by element: all parameters can be one long vector.
        theta, flat = (
            nn.utils.parameters_to_vector(tensors).detach() for tensors in (params, grads)
        )
        theta, state = adamw_step(theta, flat, state, lr=rate)
        nn.utils.vector_to_parameters(theta, params)
        losses.append(loss.item())
    return losses


trained = {}
for rate in (0.001, 0.005, 0.01):
    runs = {
        name: train_bytes(rate, warmup)
        for name, warmup in (("no warm-up", 0), ("40 updates of warm-up", 40))
    }
    print(
        f"lr {rate:g}: "
        + ", ".join(f"{name} {sum(losses[-15:]) / 15:.2f}" for name, losses in runs.items()),
        "nats over the last 15 updates",
    )
    trained[rate] = runs


# %% tags=["experiment", "figure"]
# Figure: the start of a run with and without warm-up, at three peaks
def smooth(values, width=9):
    return torch.tensor(values).unfold(0, width, 1).mean(1)


fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.3), sharey=True)
for ax, (rate, runs) in zip(axes, trained.items(), strict=True):
    plot.curves(
        range(9, 121),
        {name: smooth(losses) for name, losses in runs.items()},
        xlabel="update",
        ylabel="",
        title=f"peak lr {rate:g}",
        ax=ax,
    )
    ax.axhline(plateau, color="#888888", linewidth=1, linestyle=":")
    ax.set_ylim(2.3, 5.6)
axes[0].set_ylabel("loss (nats a byte, mean of 9)")
axes[2].annotate(
    "byte frequencies only",
    (120, plateau),
    textcoords="offset points",
    xytext=(0, -14),
    fontsize=8,
    color="#555555",
    ha="right",
)
plot.caption(
    fig,
    "Next-byte loss of a 6-layer post-norm Transformer. The dotted line is what knowing the "
    "frequency of each byte gives: a run that stays on it has learned nothing of the order of "
    "bytes.",
)
plt.show()

# %% [markdown]
# What you see is one seed and 120 updates of a tiny network. Over four seeds the loss at 0.005 ends
# between 3.15 and 3.35 without warm-up and between 2.74 and 3.14 with it; in one of the four the
# two end level. Two things to take away. Warm-up is no improvement by itself: where the learning
# rate is safe, it is a delay. And the plateau is not divergence: nothing is NaN, the loss has even
# fallen, and still the large first updates have moved the network to where it hardly learns. The
# other cure, moving the normalization, is in lesson 04.
#
# ### A race on real data
#
# Four rules on handwritten digits, each with the best of three learning rates. Muon moves the first
# two matrices; the biases and the output layer go with AdamW. (Its authors give AdamW the input
# layer too.)

# %% tags=["experiment"]
held_out = torch.arange(len(pixels)) % 5 == 0
training = (~held_out).nonzero()[:, 0]


def race(rule, rate, updates=60, seed=0):
    """The held-out loss before every fourth update and after the last, and the held-out accuracy at
    the end.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    params, states = list(model.parameters()), [{} for _ in model.parameters()]
    picks, losses = torch.Generator().manual_seed(seed), []
    for t in range(1, updates + 2):
        if t % 4 == 1:
            with torch.no_grad():
                logits = model(pixels[held_out])
            losses.append(F.cross_entropy(logits, labels[held_out]).item())
        batch = training[torch.randint(len(training), (128,), generator=picks)]
        loss = F.cross_entropy(model(pixels[batch]), labels[batch])
        scale = warmup_cosine(t, 1.0, 5, updates)
        for i, (param, grad) in enumerate(
            zip(params, torch.autograd.grad(loss, params), strict=True)
        ):
            if rule is muon_step and (param.dim() < 2 or param is params[-2]):
                new, states[i] = adamw_step(param.detach(), grad, states[i], lr=0.01 * scale)
            else:
                new, states[i] = rule(param.detach(), grad, states[i], lr=rate * scale)
            param.data.copy_(new)
    return losses, (logits.argmax(1) == labels[held_out]).float().mean().item()


entries = {
    "momentum": (sgd_momentum_step, (0.1, 0.3, 1.0)),
    "AdamW": (adamw_step, (0.01, 0.03, 0.1)),
    "Lion": (lion_step, (0.003, 0.01, 0.03)),
    "Muon": (muon_step, (0.02, 0.06, 0.2)),
}
curves = {}
for name, (rule, rates) in entries.items():
    rate, (losses, accuracy) = min(
        ((rate, race(rule, rate)) for rate in rates), key=lambda run: run[1][0][-1]
    )
    curves[f"{name}, lr {rate:g} ({100 * accuracy:.1f} %)"] = losses

# %% tags=["experiment", "figure"]
# Figure: four rules on handwritten digits
ax = plot.curves(
    range(0, 61, 4),
    curves,
    xlabel="update",
    ylabel="held-out loss (nats)",
    logy=True,
    title="Four rules on handwritten digits",
)
plot.caption(
    ax.figure,
    "Best of three learning rates each, by the last loss; in brackets the share of 360 held-out "
    "digits that are right. One seed on an easy problem: all of them arrive, and the order at the "
    "end is no ranking. What differs is the way there.",
)
plt.show()

# %% [markdown]
# ## Key questions
#
# The kind asked in an interview. The first four are graded, a point each; write the last three in
# your own words.
#
# 1. **How large may the learning rate be?** [](#gradient-descent) found $\eta < 2/\lambda$ for
#    gradient descent on a bowl of curvature $\lambda$. And with momentum? Write one update as a
#    map of $(\theta_{t-1}, \theta_t)$ to $(\theta_t, \theta_{t+1})$, and ask when an error that
#    flips its sign each time, $\theta_t = (-1)^t$, neither grows nor shrinks.
# 2. **What does an optimizer cost?** A model of 7 billion parameters is trained with all numbers in
#    float32.
# 3. **Who notices a factor of 1,000?** Someone sums the loss over 1,000 tokens instead of averaging
#    it: every gradient is 1,000 times as large, in every update. For which rules does the path of
#    the parameters stay the same (but for $\epsilon$ and rounding)? The weights start at random;
#    decay, where there is some, keeps its strength.
# 4. **Two papers, one learning rate.** A colleague trains with Muon in Jordan's convention
#    (`"original"`) and reports a learning rate. You use Moonlight's (`"match_rms_adamw"`). Both
#    conventions are in [](#muon_step).


# %% exercise="key_questions" minutes=20 difficulty=2 kind="questions"
def largest_stable_lr(curvature: float, momentum: float) -> float:
    """The learning rate below which sgd_momentum_step (without nesterov) converges on f(θ) =
    curvature · θ² / 2, above which it diverges.

    curvature > 0 and 0 ≤ momentum < 1.
    """
    ### BEGIN SOLUTION
    # θ_{t+1} = θ_t − lr·λ·θ_t + μ·(θ_t − θ_{t−1}). With θ_t = (−1)^t: −1 = 1 − lr·λ + 2μ.
    return 2 * (1 + momentum) / curvature
    ### END SOLUTION


def state_bytes(parameters: int, optimizer: str) -> int:
    """Bytes of optimizer state (no weights, no gradients, no counters) for so many float32
    parameters.

    optimizer: "sgd" (without momentum), "momentum", "adamw", "lion" or "muon" (all parameters in
        matrices).
    """
    ### BEGIN SOLUTION
    return 4 * parameters * {"sgd": 0, "momentum": 1, "adamw": 2, "lion": 1, "muon": 1}[optimizer]
    ### END SOLUTION


def unchanged_by_loss_scale() -> set[str]:
    """Those of the rules below whose path does not change when all gradients are multiplied by
    1,000.

    "sgd": plain gradient descent. "momentum": with momentum 0.9. "clipped_sgd": plain, clipped to a
    norm far below that of any gradient. "adam": Adam without decay. "adam_l2": Adam with
    weight_decay 0.1. "adamw": AdamW with weight_decay 0.1. "muon": Muon with weight_decay 0.1.
    """
    ### BEGIN SOLUTION
    # adam_l2: the pull λθ is added to a gradient 1,000 times as large, so that nearly nothing of it
    # is left.
    return {"clipped_sgd", "adam", "adamw", "muon"}
    ### END SOLUTION


def equivalent_lr(lr: float, rows: int, cols: int) -> float:
    """The learning rate that, with adjust_lr_fn="match_rms_adamw", makes the step of lr with
    "original" for a weight (rows, cols)."""
    ### BEGIN SOLUTION
    return lr * math.sqrt(max(1, rows / cols)) / (0.2 * math.sqrt(max(rows, cols)))
    ### END SOLUTION


# %% check="key_questions" points=1
checks.close(largest_stable_lr(4.0, 0.0), 0.5, what="the limit without momentum for curvature 4")
### BEGIN HIDDEN TESTS
g = checks.generator(25)
for momentum in (0.0, 0.3, 0.9, float(torch.rand((), generator=g)) * 0.9):
    curvature = float(torch.rand((), generator=g)) * 10 + 0.1
    limit = largest_stable_lr(curvature, momentum)
    for factor, stable in ((0.98, True), (1.02, False)):
        theta, velocity = 1.0, 0.0
        for _ in range(4000):
            velocity = momentum * velocity + curvature * theta
            theta -= factor * limit * velocity
            if abs(theta) > 1e6:
                break
        does = "does not converge" if stable else "still converges"
        assert (abs(theta) < 1e-3) == stable, (
            f"curvature {curvature:.2f}, momentum {momentum:.2f}: with {factor} times your limit "
            f"{limit:.4g} the run {does}."
        )
### END HIDDEN TESTS

# %% check="key_questions" points=1
checks.close(
    state_bytes(1000, "momentum"),
    4000,
    what="momentum's state for 1,000 parameters",
    mistakes={"counting numbers, not bytes": 1000, "counting the weights too": 8000},
)
### BEGIN HIDDEN TESTS
from torch import optim

makers = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": optim.AdamW,
    "muon": optim.Muon,
}
for name, make in makers.items():
    weight = nn.Parameter(torch.ones(25, 40))
    weight.grad = torch.ones(25, 40)
    rule = make([weight])
    rule.step()
    measured = sum(
        value.nbytes
        for value in rule.state[weight].values()
        if isinstance(value, Tensor) and value.dim()
    )
    checks.close(
        state_bytes(1000, name), measured, what=f"the state of {name} for 1,000 parameters"
    )
    checks.close(
        state_bytes(7_000_000_000, name),
        measured * 7_000_000,
        what=f"the state of {name} for 7 billion parameters",
    )
checks.close(
    state_bytes(7_000_000_000, "lion"),
    28_000_000_000,
    what="the state of lion for 7 billion parameters",
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
chosen = unchanged_by_loss_scale()
assert isinstance(chosen, set), (
    f"return a set of names, such as {{'sgd', 'momentum'}}; yours is {chosen!r}."
)
assert chosen <= {"sgd", "momentum", "clipped_sgd", "adam", "adam_l2", "adamw", "muon"}, (
    f"a name in {chosen} is not in the list."
)
### BEGIN HIDDEN TESTS
from torch import optim

g = checks.generator(26)
start, grads = torch.randn(6, 4, generator=g), [torch.randn(6, 4, generator=g) for _ in range(20)]
makers = {
    "sgd": (optim.SGD, {"lr": 0.01}),
    "momentum": (optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "clipped_sgd": (optim.SGD, {"lr": 0.01}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam_l2": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "muon": (optim.Muon, {"lr": 0.01, "weight_decay": 0.1}),
}
unchanged = set()
for name, (rule, settings) in makers.items():
    paths = []
    for factor in (1, 1000):
        scaled = [factor * grad for grad in grads]
        if name == "clipped_sgd":
            scaled = [grad * 0.01 / grad.norm() for grad in scaled]
        paths.append(follow_torch(rule, start, scaled, **settings)[-1])
    moved = (paths[0] - start).norm()
    if (paths[0] - paths[1]).norm() < 0.02 * moved:  # PyTorch's Muon works in bfloat16
        unchanged.add(name)
wrong = chosen ^ unchanged
assert not wrong, (
    f"{len(wrong)} of the seven names are on the wrong side. Write the update with 1000·g in place "
    "of g: what cancels?"
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
checks.close(
    equivalent_lr(0.02, 100, 100),
    0.01,
    what="the learning rate for a 100×100 weight",
    mistakes={"the inverse factor": 0.04},
)
### BEGIN HIDDEN TESTS
g = checks.generator(27)
for rows, cols in ((16, 4), (4, 16), (9, 9), (1, 7)):
    grad, lr = torch.randn(rows, cols, generator=g), 0.02 + 0.1 * float(torch.rand((), generator=g))
    start = torch.zeros(rows, cols)
    [theirs] = follow_torch(torch.optim.Muon, start, [grad], lr=lr, weight_decay=0.0)
    [ours] = follow_torch(
        torch.optim.Muon,
        start,
        [grad],
        lr=equivalent_lr(lr, rows, cols),
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    checks.close(
        ours,
        theirs,
        what=f"the update of a {rows}×{cols} weight with your learning rate, beside the "
        f"colleague's,",
        rtol=1e-5,
    )
### END HIDDEN TESTS

# %% [markdown]
# **Why does training with Adam begin with warm-up?**

# %% [markdown] answer="why-warm-up"
# The first updates of Adam are as long as any (the first is exactly ±lr in every coordinate), but
# rest on very few gradients: $\hat v$ after one batch is that batch's $g^2$, so that its ratio with
# $\hat m$ says nothing about noise. At the same time an untrained network is far from where its
# curvature is moderate; in post-norm Transformers the gradients near the output are large at
# initialization (Xiong et al. 2020). Small first steps let the averages fill and the network move
# to flatter ground. Pre-norm and a smaller learning rate need less of it.

# %% [markdown]
# **Why do biases and the gains of normalization layers get no weight decay?**

# %% [markdown] answer="why-no-decay"
# Decay limits how strongly a layer can react to its input, and that is the matrices' doing. A gain
# has its natural value at 1, not at 0, and a bias is an offset: pulled to zero they distort the
# function and limit nothing, since the next matrix can undo the scale. Matrices before a
# normalization are a special case: their scale does not change the output, so decay there acts only
# through the effective learning rate.

# %% [markdown]
# **Adam beats gradient descent on language by far and on images hardly. Why?**

# %% [markdown] answer="why-adam-on-text"
# Words are distributed with a heavy tail. The gradient of a rare word's logits is as small as its
# frequency, so gradient descent with a learning rate that the frequent words can bear does not
# learn the rare ones in any reasonable time, and much of the loss lies there. Dividing by the
# gradient's size removes the frequency. Image classes are about equally frequent; made unequal on
# purpose, they show the same gap (Kunstner et al. 2024).

# %% [markdown]
# ## References
#
# - **Kingma & Ba 2014**, Adam, arXiv:1412.6980. Algorithm 1 and section 3, the bias correction.
# - **Loshchilov & Hutter 2017**, Decoupled Weight Decay Regularization, arXiv:1711.05101. Section
#   2: why L2 and decay differ.
# - **Chen et al. 2023**, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675. Section
#   3: what the search found, and how to set its learning rate.
# - **Jordan et al. 2024**, Muon: An optimizer for hidden layers in neural networks,
#   kellerjordan.github.io/posts/muon. How the coefficients were chosen.
# - **Bernstein & Newhouse 2024**, Old Optimizer, New Norm: An Anthology, arXiv:2409.20325.
#   Optimizers as steepest descent under different norms.
# - **Liu et al. 2025**, Muon is Scalable for LLM Training, arXiv:2502.16982. Section 2.2: weight
#   decay and the scale 0.2.
# - **Hu et al. 2024**, MiniCPM, arXiv:2404.06395. Section 4: warmup–stable–decay.
# - **Xiong et al. 2020**, On Layer Normalization in the Transformer Architecture, arXiv:2002.04745.
#   Why post-norm needs warm-up.
# - **Kunstner et al. 2024**, Heavy-Tailed Class Imbalance and Why Adam Outperforms Gradient Descent
#   on Language Models, arXiv:2402.19449.
# - **In production**: `torch/optim/adamw.py` and `torch/optim/_muon.py` in pytorch/pytorch;
#   `muon.py` in KellerJordan/Muon; `get_cosine_schedule_with_warmup` and `get_wsd_schedule` in
#   huggingface/transformers (`optimization.py`); `num_items_in_batch` in its `Trainer`, the fix for
#   unequal micro-batches.
