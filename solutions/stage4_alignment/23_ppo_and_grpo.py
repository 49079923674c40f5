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
#       PPO piece by piece, one loss with switches for GRPO, DAPO, Dr. GRPO, GSPO and the KL of
#       DeepSeek-V3.2, and a training loop that teaches a language model from rewards alone.
#     gpu: "Nothing more: the model of the experiment is small, and one CPU thread trains it."
# ---

# %% [markdown]
# ## The problem
#
# Lesson 22 ended with an estimator: sample an answer, score it, raise the log-probability of what
# scored well. It is unbiased and wasteful. A sample is good for *one* step, since after the step
# the policy is another one. Sampling is most of the cost, so everybody takes several steps on one
# batch of samples, and then the estimator is wrong: it averages over a policy that is gone.
#
# **PPO** (proximal policy optimization) repairs this with a ratio and a fence. The **ratio**
# corrects for the change of policy; the **fence** (clipping) removes the reward for going further
# than the correction can be trusted. **GRPO** keeps both and throws out PPO's second network, the
# one that predicts rewards: it samples several answers to the same question and compares them with
# each other.
#
# ## Core ideas
#
# Four choices make an algorithm of this family, and they do not depend on each other:
#
# | choice | question | you write |
# |---|---|---|
# | **baseline** | better than what? a learned value, or the others of a group | `gae`, `group_advantages` |
# | **ratio and clip** | how far may one batch move the policy? | `ppo_losses`, `grpo_loss` |
# | **average** | does a token count, or an answer? | `grpo_loss` |
# | **leash** | what holds the policy near the reference? | `kl_penalty` |
#
# Papers name a point in this grid and call it an algorithm. Here is the map, as settings of *one*
# function that you will have written by the end:
#
# | | advantage ÷ std | `ratio` | `clip` | `average` | `beta`, `kl` |
# |---|---|---|---|---|---|
# | **GRPO** (DeepSeekMath) | yes | `"token"` | (0.2, 0.2) | `"sequence"` | 0.04, `"k3"` |
# | **DAPO** | yes | `"token"` | (0.2, 0.28) | `"token"` | 0 |
# | **Dr. GRPO** | no | `"token"` | (0.2, 0.2) | `"constant"` | 0 |
# | **GSPO** | yes | `"sequence"` | (0.0003, 0.0004) | `"sequence"` | 0 |
# | **DeepSeek-V3.2** | no | `"token"` | (ε, ε) | `"sequence"` | β, `"k3_corrected"` |
#
# (DeepSeekMath names no ε: 0.2 is PPO's. V3.2's report names no ε and β, and masks some sequences
# besides; DAPO also draws groups again.)
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $\pi_\theta$, $\pi_{\text{old}}$, $\pi_{\text{ref}}$ | `logp`, `old_logp`, `ref_logp` | log-probabilities of the *sampled* tokens: under the policy in training, the one that is taken for the sampler, and the frozen start |
# | $\rho = \pi_\theta/\pi_{\text{old}}$ | `ratio` | importance ratio; 1 before the first step |
# | $A$ | `advantages` | how much better than expected |
# | $G$ | `group` | answers to one prompt |
# | $\varepsilon$, $\beta$ | `clip`, `beta` | width of the fence, weight of the KL |
#
# Log-probabilities and masks are `(batch, seq)`; a mask is True on tokens that the policy wrote.
# **Every function named `…loss` is minimized.** The sign is the most frequent bug of this field.

# %%
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from llm40 import checks, models, plot
from torch import Tensor, nn

# %% [markdown]
# ## Advantages from a critic {#gae}
#
# A language model's answer is an episode: the state is the text so far, an action is a token, the
# reward usually comes at the end. A **critic** $V(s)$ predicts the rewards to come. If it predicted
# well, the surprise of one step would say how good the action was:
#
# $$ \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t). $$
#
# It is biased as the critic is. The other extreme, $\sum_k \gamma^k r_{t+k} - V(s_t)$, has no such
# bias and all the noise of the future. Add up surprises and look what happens to $V$:
#
# $$ \delta_t + \gamma\delta_{t+1} + \gamma^2\delta_{t+2} + \dots = r_t + \gamma r_{t+1} + \gamma^2
# r_{t+2} + \dots - V(s_t), $$
#
# because each $+\gamma^{k}V(s_{t+k})$ of one surprise is the $-\gamma^{k}V(s_{t+k})$ of the next.
# So the sum of all surprises is the second extreme, and the first surprise alone is the first one.
# **GAE** (generalized advantage estimation) fades from one to the other: $A_t = \sum_k
# (\gamma\lambda)^k\delta_{t+k}$, which a loop from the end computes as
#
# $$ A_t = \delta_t + \gamma\lambda A_{t+1}. $$
#
# ### Two ways to end
#
# An answer that closes with its end token is **terminated**: nothing comes after it, $V(s_{t+1})$
# is 0. An answer that hits the length limit is **truncated**: the text would have gone on, and what
# it would have earned is best guessed by the critic. So bootstrap at a truncation, not at a
# termination, and let no *sum* cross either of them, since the next step of the array belongs to
# another episode. A single flag `done` cannot say which of the two it was.


# %% exercise="gae" minutes=20 difficulty=2
def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates, and the targets that the critic is trained on.

    rewards, values, next_values: (batch, time), one floating dtype, float32 or float64; time ≥ 1.
        values[:, t] is the critic's V of the state before step t, next_values[:, t] that of the
        state after it, in the same episode (where the episode goes on it equals values[:, t + 1]).
    terminated, truncated: (batch, time), bool. A row may hold several episodes one after another.
        A terminated step has no future: next_values there has no influence, not even if it is NaN.
        A truncated step has one, and next_values is its estimate. The sum over later steps stops at
        either; where a step is both, it is terminated. At the end of the array the sum stops, too,
        and the last step uses its next_values unless it is terminated.

    Returns (advantages, targets), both (batch, time) in the dtype of rewards, without a gradient;
    targets = advantages + values. Inputs are not changed.

    Example: rewards [1, 2, 3], values [10, 20, 30], next_values [20, 40, 50], gamma 0.5, lam 0.5,
    step 1 truncated, none terminated. δ = 1, 2, −2 and the advantages are 1.5, 2, −2.
    """
    ### BEGIN SOLUTION
    with torch.no_grad():
        future = torch.where(terminated, torch.zeros_like(next_values), next_values)
        delta = rewards + gamma * future - values
        goes_on = ~(terminated | truncated)
        advantages = torch.empty_like(delta)
        running = torch.zeros_like(delta[:, 0])
        for t in reversed(range(delta.shape[1])):
            carried = torch.where(goes_on[:, t], running, torch.zeros_like(running))
            running = delta[:, t] + gamma * lam * carried
            advantages[:, t] = running
        return advantages, advantages + values
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which flag stops what</summary>
#
# There are two places for a factor: before $V(s_{t+1})$ in δ, and before $A_{t+1}$ in the sum. One
# of them looks at `terminated` only.
# </details>
#
# <details><summary>Hint: NaN times 0</summary>
#
# is NaN. `torch.where` or `masked_fill` chooses, where a product does not.
# </details>


# %% tags=["support"]
# Support: advantages by the definition, and what stands where nothing should be read
def spoiled(x: Tensor, place: Tensor, g: torch.Generator) -> Tensor:
    """x with NaN at every other of these places, and at the rest with numbers that mean nothing."""
    junk = 3 * checks.randn(*x.shape, device="cpu", generator=g, dtype=x.dtype)
    odd = torch.arange(x.numel()).reshape(x.shape) % 2 == 1
    return torch.where(place, junk.masked_fill(odd, math.nan), x)


def by_sums(r, v, after, terminated, truncated, gamma, lam):
    """Advantages by the definition: for each step the sum over its own episode, in float64."""
    rows = []
    for b in range(len(r)):
        row = []
        for t in range(r.shape[1]):
            total, factor = 0.0, 1.0
            for k in range(t, r.shape[1]):
                future = 0.0 if terminated[b, k] else float(after[b, k])
                total += factor * (float(r[b, k]) + gamma * future - float(v[b, k]))
                factor *= gamma * lam
                if terminated[b, k] or truncated[b, k]:
                    break
            row.append(total)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


# %% check="gae" points=3
no = torch.zeros(1, 3, dtype=torch.bool)
cut = torch.tensor([[False, True, False]])
r, v = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
after = torch.tensor([[20.0, 40.0, 50.0]])
advantages, targets = checks.parts(
    gae(r, v, after, no, cut, 0.5, 0.5), "advantages", "targets", what="gae"
)
checks.close(
    advantages,
    torch.tensor([[1.5, 2.0, -2.0]]),
    what="the advantages of the example",
    mistakes={
        "taking a truncation for a termination": torch.tensor([[-3.5, -18.0, -2.0]]),
        "a sum that goes on into the next episode": torch.tensor([[1.375, 1.5, -2.0]]),
        "no sum: the surprises alone": torch.tensor([[1.0, 2.0, -2.0]]),
    },
)
checks.close(targets, torch.tensor([[11.5, 22.0, 28.0]]), what="the targets of the example")
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for batch, time, gamma, lam in [(1, 1, 0.9, 0.8), (3, 9, 0.95, 0.7), (2, 17, 0.5, 0.9)]:
    for dtype in (torch.float64, torch.float32):
        r, v, after = (
            checks.randn(batch, time, device="cpu", generator=g, dtype=dtype) for _ in range(3)
        )
        over = torch.rand(batch, time, generator=g)
        terminated, truncated = over < 0.25, (over > 0.15) & (over < 0.4)  # some are both
        truncated[0, 0], terminated[-1, -1] = True, True
        after = spoiled(after, terminated, g)
        want = by_sums(r, v, after, terminated, truncated, gamma, lam)
        both = (terminated | truncated) & True
        clean = after.nan_to_num()
        with checks.unchanged(
            rewards=r,
            values=v,
            next_values=after,
            terminated=terminated,
            truncated=truncated,
        ):
            got = gae(r, v, after, terminated, truncated, gamma, lam)
        got = checks.parts(got, "advantages", "targets")
        checks.close(
            got[0],
            want.to(dtype),
            what=f"advantages of {batch} × {time} steps",
            dtype=dtype,
            mistakes={
                "taking a truncation for a termination": by_sums(
                    r, v, clean, both, both, gamma, lam
                ).to(dtype),
                "taking a termination for a truncation": by_sums(
                    r, v, clean, ~both & False, both, gamma, lam
                ).to(dtype),
            },
        )
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        size = float(want.abs().max() + v.abs().max())  # an advantage and a value may cancel
        due = (want + v.double()).to(dtype)
        checks.close(got[1], due, what="targets", dtype=dtype, rtol=rtol, atol=rtol * size)
### END HIDDEN TESTS

# %% check="gae" points=2
# λ = 0 is one step; λ = 1 is all the rewards, whatever the critic says in between.
r, v = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.3, -7.0, 5.0]])
after = torch.tensor([[-7.0, 5.0, 100.0]])
end = torch.tensor([[False, False, True]])
no = torch.zeros_like(end)
_, targets = gae(r, v, after, end, no, 0.5, 1.0)
checks.close(targets, torch.tensor([[3.0, 4.0, 4.0]]), what="targets with λ = 1: the returns")
_, targets = gae(r, v, after, end, no, 0.5, 0.0)
checks.close(targets, torch.tensor([[-2.5, 4.5, 4.0]]), what="targets with λ = 0: one step")
### BEGIN HIDDEN TESTS
g = checks.generator(2)
# Laws: a policy's own values (all rewards explained) leave no advantage, for every λ; the rows of a
# batch do not touch each other; columns of another layout; no gradient.
r = checks.randn(4, 6, device="cpu", generator=g, dtype=torch.float64)
end = torch.zeros(4, 6, dtype=torch.bool)
end[:, -1] = True
v, total = torch.zeros_like(r), torch.zeros(4, dtype=torch.float64)
for t in reversed(range(6)):
    total = r[:, t] + 0.9 * total
    v[:, t] = total
after = torch.cat([v[:, 1:], torch.full((4, 1), 77.0, dtype=torch.float64)], dim=1)
for lam in (0.0, 0.35, 1.0):
    advantages, targets = gae(r, v, after, end, ~end & False, 0.9, lam)
    checks.close(
        advantages, torch.zeros_like(r), atol=1e-12, what=f"advantages of a perfect critic, λ {lam}"
    )
    checks.close(targets, v, what="its targets")
x = [checks.randn(7, 5, device="cpu", generator=g, dtype=torch.float64).T for _ in range(3)]
ends = [(torch.rand(7, 5, generator=g) < 0.3).T for _ in range(2)]
x[0].requires_grad_()
x[1].requires_grad_()
advantages, targets = gae(*x, *ends, 0.8, 0.6)
want = by_sums(*(t.detach() for t in x), *ends, 0.8, 0.6)
checks.close(advantages, want, what="advantages of a transposed array")
for part in (advantages, targets):
    assert not part.requires_grad, "advantages and targets are constants: they carry no gradient"
row = gae(*(t[1:2] for t in x), *(t[1:2] for t in ends), 0.8, 0.6)[0]
checks.close(row, advantages[1:2], what="a row by itself")
### END HIDDEN TESTS

# %% [markdown]
# ## The ratio, and its fence {#ppo}
#
# Samples came from $\pi_{\text{old}}$; we want the gradient for $\pi_\theta$. Importance sampling
# rewrites one expectation as the other: $\mathbb{E}_{\pi_\theta}[A] = \mathbb{E}_{\pi_{\text{old}}}
# [\rho A]$ with $\rho=\pi_\theta/\pi_{\text{old}}$. Its gradient is $\rho A\nabla\log\pi_\theta$,
# and at $\rho=1$ it is the estimator of lesson 22. Nothing in $\rho A$ says *stop*, though: with
# $A>0$ it rewards a ratio of 50 over one of 5. PPO maximizes a **pessimistic minimum**
#
# $$ \min\big(\rho A,\ \operatorname{clip}(\rho, 1-\varepsilon, 1+\varepsilon)\,A\big). $$
#
# The minimum is the step people skip, so go through the cases. Where the clipped term wins, it is a
# constant, and the gradient is zero:
#
# | | $\rho < 1-\varepsilon$ | $\rho > 1+\varepsilon$ |
# |---|---|---|
# | $A>0$, raise it | $\rho A$: the policy moved the wrong way; full gradient | $(1+\varepsilon)A$: far enough; **gradient 0** |
# | $A<0$, lower it | $(1-\varepsilon)A$: far enough; **gradient 0** | $\rho A$: wrong way; full gradient |
#
# With the clip alone and no minimum, a token on the wrong side would get no gradient either, and
# nothing of its own could bring it back. PPO's critic is fenced in the same manner, by one line:
# its loss is the larger of $(V-R)^2$ and the same with $V$ held within
# $V_{\text{old}}\pm\varepsilon_v$. Larger *loss* is what smaller *objective* was: pessimism again.


# %% exercise="ppo_losses" minutes=20 difficulty=2
def ppo_losses(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    value_clip: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's policy loss and value loss (both minimized), and the share of tokens that are clipped.

    All but mask: (batch, seq), one floating dtype, float32 or float64. mask: (batch, seq), bool.
    Tokens where it is False count nowhere; what stands there has no influence, not even NaN, in
    results and gradients. Each result is a mean over the True tokens of the whole batch, 0 if there
    are none.

    Policy loss: minus the mean of min(ρA, clip(ρ, 1 − clip, 1 + clip)·A), ρ = exp(logp − old_logp).
    Value loss: half the mean of max((V − R)², (V′ − R)²), where R is `targets` and V′ is `values`
        held within old_values ± value_clip.
    Clipped share: of the tokens, those whose policy gradient is 0 because of the clip: A > 0 and
        ρ > 1 + clip, or A < 0 and ρ < 1 − clip. A ratio beyond the fence on its other side does not
        count.

    Returns (policy_loss, value_loss, clipped), 0-dimensional, in the dtype of logp. Gradients flow
    to logp and values only; `clipped` has none. Inputs are not changed.

    Example: one token, ρ = 1.5, A = 2, V = 3, V_old = 1, R = 1.6: losses −2.4 and ½·1.96, share 1.
    """
    ### BEGIN SOLUTION
    old_logp, advantages, old_values, targets = (
        t.detach() for t in (old_logp, advantages, old_values, targets)
    )
    count = mask.sum().clamp(min=1)
    out = ~mask
    advantages = advantages.masked_fill(out, 0)
    ratio = (logp - old_logp).masked_fill(out, 0).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = torch.maximum(
        (values - targets).masked_fill(out, 0).square(),
        (near - targets).masked_fill(out, 0).square(),
    )
    stopped = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    share = stopped.sum().to(logp.dtype) / count
    return -surrogate.sum() / count, 0.5 * error.sum() / count, share
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: larger or smaller</summary>
#
# The policy term is an objective, so pessimism is `torch.minimum`, and the minus sign comes last.
# The value term is a loss already.
# </details>
#
# <details><summary>Hint: NaN in the padding comes back in the gradient</summary>
#
# Hiding a NaN after it went through `exp` or a square leaves 0 · NaN in the backward pass. Hide it
# before.
# </details>


# %% check="ppo_losses" points=3
# The four cases, each with one token, ε = 0.2.
def one_token(rho: float, a: float) -> tuple[float, float, float]:
    """Policy loss, its derivative by logp, clipped share, for one token."""
    logp = torch.tensor([[math.log(rho)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss, _, share = ppo_losses(
        logp, zero, zero + a, zero, zero, zero, torch.ones(1, 1, dtype=torch.bool)
    )
    (slope,) = torch.autograd.grad(loss, logp)
    return loss.item(), slope.item(), float(share)


for rho, a, loss, slope, share in [
    (1.5, 2.0, -2.4, 0.0, 1.0),
    (0.5, 2.0, -1.0, -1.0, 0.0),
    (0.5, -2.0, 1.6, 0.0, 1.0),
    (1.5, -2.0, 3.0, 3.0, 0.0),
    (1.1, 2.0, -2.2, -2.2, 0.0),
]:
    got = one_token(rho, a)
    checks.close(
        list(got),
        [loss, slope, share],
        what=f"loss, slope and clipped share at ρ = {rho}, A = {a}",
        mistakes={
            "the opposite sign": [-loss, -slope, share],
            "clipping without the minimum": [-min(max(rho, 0.8), 1.2) * a, 0.0, share],
            "the maximum instead of the minimum": [
                -max(rho * a, min(max(rho, 0.8), 1.2) * a),
                -rho * a if share else 0.0,
                share,
            ],
        },
    )
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for batch, seq, clip, scale in [
    (3, 7, 0.3, 0.5),
    (1, 1, 0.1, 1.0),
    (4, 5, 0.25, 0.15),
    (2, 9, 0.05, 0.4),
]:
    for dtype in (torch.float64, torch.float32):
        logp, old, a = (
            checks.randn(batch, seq, device="cpu", generator=g, dtype=torch.float64)
            for _ in range(3)
        )
        old = logp - scale * old
        mask = torch.rand(batch, seq, generator=g) < 0.6
        mask[0, 0] = True
        mask[-1] = batch == 1
        rho = (logp - old).exp()
        near = ((rho - 1).abs() - clip).abs() < 1e-4  # a derivative has no value at the fence
        old = torch.where(near, old + 0.01, old)
        rho = (logp - old).exp()
        n = int(mask.sum())
        want, slope, share = 0.0, torch.zeros_like(logp), 0
        for b, t in mask.nonzero().tolist():
            x, y = float(rho[b, t]), float(a[b, t])
            fenced = x > 1 + clip if y > 0 else x < 1 - clip
            bound = 1 + clip if y > 0 else 1 - clip
            want -= (bound if fenced else x) * y / n
            slope[b, t] = 0.0 if fenced else -x * y / n
            share += fenced / n
        logp, old, a = (spoiled(t.to(dtype), ~mask, g) for t in (logp, old, a))
        nothing = torch.zeros_like(logp)
        leaf = logp.clone().requires_grad_()
        frozen = old.clone().requires_grad_()
        with checks.unchanged(old_logp=old, advantages=a, mask=mask):
            loss, _, clipped = checks.parts(
                ppo_losses(leaf, frozen, a, nothing, nothing, nothing, mask, clip=clip),
                "policy_loss",
                "value_loss",
                "clipped",
            )
        checks.close(
            loss,
            torch.tensor(want, dtype=dtype),
            dtype=dtype,
            what="the policy loss",
            rtol=1e-4 if dtype == torch.float32 else None,
        )
        checks.close(
            clipped, torch.tensor(float(share), dtype=dtype), dtype=dtype, what="the clipped share"
        )
        assert not clipped.requires_grad, "the clipped share is a number to look at: no gradient"
        assert loss.requires_grad, "the policy loss carries no gradient"
        grads = torch.autograd.grad(loss, [leaf, frozen], allow_unused=True)
        checks.close(
            grads[0],
            slope.to(dtype),
            what="the gradient of logp",
            rtol=1e-4 if dtype == torch.float32 else None,
        )
        assert grads[1] is None or not bool(grads[1].any()), (
            "a gradient reaches old_logp: it is a constant, like the advantages"
        )
# Tokens so unlikely that their probabilities are 0 in their format: only their logarithms differ.
for dtype, low in ((torch.float32, -200.0), (torch.float64, -1000.0)):
    leaf = torch.tensor([[low + 0.125, low - 0.125, low + 0.5]], dtype=dtype, requires_grad=True)
    a, old = torch.tensor([[1.0, -2.0, 4.0]], dtype=dtype), torch.full((1, 3), low, dtype=dtype)
    loss, _, clipped = ppo_losses(leaf, old, a, a, a, a, torch.ones(1, 3, dtype=torch.bool))
    gains = [math.exp(0.125), -2 * math.exp(-0.125), 4 * 1.2]
    checks.close(
        loss, torch.tensor(-sum(gains) / 3, dtype=dtype), what="the policy loss, unlikely tokens"
    )
    checks.close(clipped, torch.tensor(1 / 3, dtype=dtype), what="the share, unlikely tokens")
    (slope,) = torch.autograd.grad(loss, leaf)
    checks.close(
        slope,
        torch.tensor([[-gains[0] / 3, -gains[1] / 3, 0.0]], dtype=dtype),
        what="the gradient of logp, unlikely tokens",
    )
checks.close(
    one_token(1.5, 0.0)[2], 0.0, what="the clipped share at A = 0, which nothing raises or lowers"
)
leaf = checks.randn(2, 3, device="cpu", generator=g).requires_grad_()
empty = torch.zeros(2, 3, dtype=torch.bool)
z = torch.full((2, 3), math.nan)
for part in ppo_losses(leaf, z, z, z, z, z, empty):
    checks.close(part, torch.tensor(0.0), what="a result where no token counts")
### END HIDDEN TESTS

# %% check="ppo_losses" points=2
# The value loss: V = 3, held within 1 ± 0.2; R = 1.6, so (3 − 1.6)² = 1.96 against (1.2 − 1.6)².
one = torch.ones(1, 1, dtype=torch.float64)
yes = torch.ones(1, 1, dtype=torch.bool)
_, value_loss, _ = ppo_losses(one, one, one, 3 * one, one, 1.6 * one, yes)
checks.close(
    value_loss,
    torch.tensor(0.98, dtype=torch.float64),
    what="the value loss of the example",
    mistakes={
        "the smaller of the two errors": torch.tensor(0.08, dtype=torch.float64),
        "a loss without the half": torch.tensor(1.96, dtype=torch.float64),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for batch, seq, bound in [(3, 8, 0.4), (1, 1, 0.1), (2, 5, 1.5)]:
    for dtype in (torch.float64, torch.float32):
        v, old, target = (
            checks.randn(batch, seq, device="cpu", generator=g, dtype=dtype) for _ in range(3)
        )
        mask = torch.rand(batch, seq, generator=g) < 0.7
        mask[0, 0] = True
        n, want, slope = int(mask.sum()), 0.0, torch.zeros_like(v)
        for b, t in mask.nonzero().tolist():
            x, o, y = float(v[b, t]), float(old[b, t]), float(target[b, t])
            held = min(max(x, o - bound), o + bound)
            free = abs(x - y) >= abs(held - y)
            want += 0.5 * max((x - y) ** 2, (held - y) ** 2) / n
            slope[b, t] = (x - y) / n if free else 0.0
        v, old, target = (spoiled(t, ~mask, g) for t in (v, old, target))
        leaf = v.clone().requires_grad_()
        frozen = target.clone().requires_grad_()
        zero = torch.zeros_like(v)
        with checks.unchanged(old_values=old):
            _, loss, _ = ppo_losses(zero, zero, zero, leaf, old, frozen, mask, value_clip=bound)
        checks.close(
            loss,
            torch.tensor(want, dtype=dtype),
            dtype=dtype,
            what="the value loss",
            rtol=1e-4 if dtype == torch.float32 else None,
        )
        grads = torch.autograd.grad(loss, [leaf, frozen], allow_unused=True)
        checks.close(
            grads[0],
            slope,
            what="the gradient of the values",
            rtol=1e-4 if dtype == torch.float32 else None,
        )
        assert grads[1] is None or not bool(grads[1].any()), "a gradient reaches the targets"
### END HIDDEN TESTS

# %% [markdown]
# Your loss, drawn as PPO's authors drew theirs. The curve is the objective (minus your loss), the
# dashed line what it would be without a fence.

# %% tags=["experiment", "figure"]
# Figure: the fence stands on one side only, and on which side depends on the advantage
ratios = torch.linspace(0.4, 1.6, 121, dtype=torch.float64)
fig, axes = plot.plt.subplots(1, 2, figsize=(9, 3.4))
zero, yes = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
for ax, a in zip(axes, (1.0, -1.0), strict=True):
    flat, objective = [], []
    for rho in ratios:
        leaf = rho.log().reshape(1, 1).requires_grad_()
        loss, _, _ = ppo_losses(leaf, zero, zero + a, zero, zero, zero, yes)
        objective.append(-loss.item())
        flat.append(float(torch.autograd.grad(loss, leaf)[0]) == 0.0)
    ax.plot(ratios, a * ratios, color="#999999", linestyle="--", label="ρA, no fence")
    ax.plot(ratios, objective, label="pessimistic minimum")
    start = next(i for i, f in enumerate(flat) if f)
    stop = len(flat) - next(i for i, f in enumerate(reversed(flat)) if f)
    ax.axvspan(float(ratios[start]), float(ratios[stop - 1]), color="#dddddd", zorder=0)
    middle, across = float(ratios[(start + stop) // 2]), ax.get_xaxis_transform()
    ax.text(middle, 0.45, "gradient 0", ha="center", fontsize=9, transform=across)
    ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
    ax.set(xlabel="ratio ρ (1: the policy that sampled)", ylabel="objective", xlim=(0.4, 1.6))
    ax.set_title("A = +1: raise it" if a > 0 else "A = −1: lower it")
    ax.legend(fontsize=8, loc="upper left" if a > 0 else "upper right")
plot.caption(
    fig,
    "What one token contributes, as a function of how far the policy has moved on it. In the grey "
    "part a further step in the wanted direction gains nothing. On the other side the slope is "
    "that of the unclipped line, however far the token has strayed.",
)
plot.plt.show()

# %% [markdown]
# ## A group instead of a critic {#groups}
#
# The critic is a network as large as the policy, trained beside it, and early in training it is
# wrong. For answers with *one* reward at the end there is a cheaper baseline. Sample $G$ answers to
# the same prompt, and take their mean. GRPO also divides by the deviation:
#
# $$ A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r) + \text{eps}}, $$
#
# and gives every token of answer $i$ the same $A_i$. Take four answers with rewards 0.8, 0.9, 0.5,
# 0.8. The mean is 0.75; the differences are 0.05, 0.15, −0.25, 0.05 and their squares sum to 0.09.
#
# | deviation | | advantages |
# |---|---|---|
# | population: $\sqrt{0.09/4} = 0.15$ | ÷ $G$ | ⅓, 1, −5⁄3, ⅓ |
# | sample: $\sqrt{0.09/3} = 0.1732$ | ÷ $(G-1)$ | 0.2887, 0.8660, −1.4434, 0.2887 |
#
# The paper writes only "std". `torch.std`, TRL and this lesson take the sample deviation; NumPy's
# default is the other. The two differ by a factor $\sqrt{G/(G-1)}$, the same for all prompts: Adam
# hardly notices it, unless a KL stands beside the advantages. The division itself is not harmless.
# It differs from prompt to prompt: one success in eight is stretched more than four in eight. Dr.
# GRPO leaves it out.


# %% exercise="group_advantages" minutes=10 difficulty=1
def group_advantages(rewards: Tensor, scale: str | None = "sample", eps: float = 1e-4) -> Tensor:
    """Rewards compared with those of the same group: (r − mean) / (std + eps).

    rewards: (prompts, group), a row for each prompt; floating (float32 or float64), integer or
        bool. group ≥ 2, else ValueError; prompts ≥ 1.
    scale: "sample" (the squares' sum is divided by group − 1), "population" (by group), or None: no
        division at all, and no eps. Anything else: ValueError.

    A group whose rewards are all equal gives exactly 0, for every value of the rewards and also
    where eps is 0.

    Returns (prompts, group): in the dtype of floating rewards, else float32; without a gradient.
    """
    ### BEGIN SOLUTION
    if rewards.shape[1] < 2:
        raise ValueError("a group of one has nothing to compare itself with")
    if scale not in ("sample", "population", None):
        raise ValueError(f"scale is {scale!r}: use 'sample', 'population' or None")
    r = rewards.detach() if rewards.is_floating_point() else rewards.float()
    advantages = r - r.mean(dim=1, keepdim=True)
    if scale is not None:
        correction = 1 if scale == "sample" else 0
        advantages = advantages / (r.std(dim=1, correction=correction, keepdim=True) + eps)
    equal = (r == r[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: eight times 0.1</summary>
#
# Print `x = torch.full((8,), 0.1); x - x.mean()`. A mean of equal numbers may differ from them in
# the last digit, and a division by a tiny eps makes much of it. Compare the rewards themselves.
# </details>

# %% check="group_advantages" points=3
r = torch.tensor([[0.8, 0.9, 0.5, 0.8]])
sample = torch.tensor([[0.28868, 0.86603, -1.44338, 0.28868]])
population = torch.tensor([[1 / 3, 1.0, -5 / 3, 1 / 3]])
checks.close(
    group_advantages(r, eps=0.0),
    sample,
    rtol=1e-4,
    what="advantages of 0.8, 0.9, 0.5, 0.8",
    mistakes={
        "the population deviation": population,
        "no division": r - 0.75,
        "dividing by the variance": (r - 0.75) / 0.03,
    },
)
checks.close(group_advantages(r, "population", 0.0), population, rtol=1e-4, what="population std")
checks.close(group_advantages(r, None), r - 0.75, rtol=1e-4, what="without division")
### BEGIN HIDDEN TESTS
g = checks.generator(5)
for prompts, group, eps in [(3, 5, 0.3), (1, 2, 0.05), (4, 8, 1e-4), (2, 3, 1.0)]:
    for dtype in (torch.float64, torch.float32):
        r = checks.randn(prompts, group, device="cpu", generator=g, dtype=dtype) + 3
        r = r * torch.logspace(-2, 1, prompts, dtype=dtype)[:, None]
        for scale in ("sample", "population", None):
            want = torch.zeros(prompts, group, dtype=torch.float64)
            wrong = want.clone()
            for p, row in enumerate(r.double().tolist()):
                mean = sum(row) / group
                square = sum((x - mean) ** 2 for x in row)
                std = math.sqrt(square / (group - (scale == "sample")))
                for i, x in enumerate(row):
                    want[p, i] = x - mean if scale is None else (x - mean) / (std + eps)
                    wrong[p, i] = (x - mean) / math.sqrt(std**2 + eps)
            with checks.unchanged(rewards=r):
                got = group_advantages(r, scale, eps)
            checks.close(
                got,
                want.to(dtype),
                rtol=1e-4 if dtype == torch.float32 else 1e-9,
                dtype=dtype,
                what=f"advantages of {prompts} groups of {group}, scale {scale!r}",
                mistakes={"eps inside the root": wrong.to(dtype)},
            )
x = torch.randint(0, 5, (3, 6), generator=g)
x[:, 0], x[:, 1] = 0, 4
checks.close(
    group_advantages(x),
    group_advantages(x.double()).float(),
    dtype=torch.float32,
    rtol=1e-5,
    what="advantages of whole numbers",
)
right = torch.tensor([[True, False, False, False], [True, True, False, True]])
checks.close(
    group_advantages(right, eps=0.0),
    torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.5, 0.5, -1.5, 0.5]]),
    dtype=torch.float32,
    what="advantages of True and False",
)
x = checks.randn(5, 3, device="cpu", generator=g, dtype=torch.float64).T
checks.close(
    group_advantages(x, None),
    x - x.sum(1, keepdim=True) / 5,
    what="advantages of a transposed tensor",
)
leaf = checks.randn(2, 4, device="cpu", generator=g).requires_grad_()
assert not group_advantages(leaf).requires_grad, "advantages carry no gradient"
### END HIDDEN TESTS

# %% check="group_advantages" points=1
checks.close(
    group_advantages(torch.full((2, 8), 0.1), eps=1e-8),
    torch.zeros(2, 8),
    atol=0.0,
    what="advantages of eight rewards of 0.1",
    hint="Nothing can be learned from a group without differences",
)
checks.raises(ValueError, group_advantages, torch.ones(3, 1), because="a group of one")
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for value, group in product((0.1, 0.7, -1 / 3, 1e6 / 7, 1e-7), (3, 5, 8, 11)):
    for scale in ("sample", "population", None):
        r = torch.full((3, group), value)
        r[1] = checks.randn(group, device="cpu", generator=g)
        for eps in (0.0, 1e-8):
            got = group_advantages(r, scale, eps)
            assert bool((got[[0, 2]] == 0).all()), (
                f"{group} equal rewards of {value:.4g} (scale {scale!r}, eps {eps}) give "
                f"{got[0, 0]:.3g}, not 0"
            )
            assert bool((got[1] != 0).all()), "a group with differences became 0 beside equal ones"
            alone = group_advantages(r[:1], scale, eps)  # torch.std takes another path for one row
            assert bool((alone == 0).all()), (
                f"one group of {group} equal rewards of {value:.4g} (scale {scale!r}, eps {eps}) "
                f"gives {alone[0, 0]:.3g}, not 0"
            )
close_pair = torch.tensor([[1.0, 1.0 + 1e-6]], dtype=torch.float64)
checks.close(
    group_advantages(close_pair, eps=0.0),
    torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2),
    rtol=1e-6,
    what="advantages of 1 and 1.000001",
)
for scale in ("sample", "population", None):
    checks.raises(ValueError, group_advantages, torch.ones(2, 1), scale)
checks.raises(ValueError, group_advantages, torch.ones(2, 3), "std")
### END HIDDEN TESTS

# %% [markdown]
# ## The leash: four ways to write a KL {#kl}
#
# The penalty $\beta\,\mathrm{KL}(\pi_\theta\|\pi_{\text{ref}})$ is an expectation over the policy's
# own tokens. Only sampled tokens are at hand, so every one of them gets an *estimate*. With $d =
# \log\pi_\theta(a) - \log\pi_{\text{ref}}(a)$ (Schulman's names):
#
# $$ k_1 = d, \qquad k_2 = \tfrac12 d^2, \qquad k_3 = e^{-d} + d - 1 . $$
#
# $k_1$ is the definition: $\mathbb{E}_{\pi_\theta}[d]$ is the KL. It is often negative, hence
# noisy. $k_3$ adds $e^{-d}-1 = \pi_{\text{ref}}/\pi_\theta - 1$, whose mean is $\sum_a \pi_\theta
# \frac{\pi_{\text{ref}}}{\pi_\theta} - 1 = 0$: the mean stays, and the sum is never negative,
# because $e^x \ge 1 + x$. So the *value* of $k_3$ is unbiased, and quieter near the reference. GRPO
# puts it in the loss.
#
# In a loss the value does not matter. The gradient does, and there lies a trap. The sampled token
# is held fixed when we differentiate, so what we get on average is $\mathbb{E}[\nabla k]$, and not
# $\nabla\mathbb{E}[k]$, in which the *probability of sampling* $a$ changes too. By the chain rule,
# with $\nabla d = \nabla\log\pi_\theta(a)$:
#
# - $\mathbb{E}[\nabla k_1] = \sum_a \pi_\theta(a)\nabla\log\pi_\theta(a) =
#   \nabla\sum_a\pi_\theta(a) = 0$. As a loss it does
#   nothing on policy, except noise.
# - $\mathbb{E}[\nabla k_2] = \sum_a \pi_\theta\, d\,\nabla\log\pi_\theta$, and this *is*
#   $\nabla\mathrm{KL}(\pi_\theta\|\pi_{\text{ref}})$: the product rule on $\sum\pi_\theta d$ gives
#   it plus the zero above.
# - $\mathbb{E}[\nabla k_3] = \sum_a \pi_\theta(1-\pi_{\text{ref}}/\pi_\theta)\nabla\log\pi_\theta =
#   - \sum_a\pi_{\text{ref}}\nabla\log\pi_\theta = \nabla\mathrm{KL}(\pi_{\text{ref}}\|\pi_\theta)$.
#   The *other* KL.
#
# DeepSeek-V3.2 multiplies: $\rho\,k_3$ with $\rho = \pi_\theta/\pi_{\text{old}}$, and lets the
# gradient through $\rho$. Then $\mathbb{E}_{\pi_{\text{old}}}[\rho k_3] = \sum_a \pi_\theta k_3$ is
# an exact identity in $\theta$, whatever $\pi_{\text{old}}$ is. So both sides have the same
# gradient: the right one, on policy and off.


# %% exercise="kl_penalty" minutes=10 difficulty=1
def kl_penalty(
    logp: Tensor, ref_logp: Tensor, kind: str = "k3", old_logp: Tensor | None = None
) -> Tensor:
    """One estimate of KL(π‖ref) for each sampled token, to be minimized.

    logp, ref_logp: any one shape and floating dtype (float32 or float64): log-probabilities of the
        sampled tokens under the policy and under the reference.
    kind: "k1", "k2", "k3", or "k3_corrected", which is exp(logp − old_logp) · k3 and needs
        old_logp, the log-probabilities under the policy that is taken for the sampler. ValueError
        if it is missing there, and for another kind. The first three do not look at old_logp.

    Returns a tensor of the same shape and dtype. A gradient reaches logp (with "k3_corrected"
    through both factors), never ref_logp or old_logp. Inputs are not changed.

    Example: probabilities π = 0.5, ref = 0.25, old = 0.4. d = log 2; k1 = 0.6931, k2 = 0.2402,
    k3 = 0.5 + 0.6931 − 1 = 0.1931, corrected 1.25 · 0.1931 = 0.2414.
    """
    ### BEGIN SOLUTION
    d = logp - ref_logp.detach()
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind not in ("k3", "k3_corrected"):
        raise ValueError(f"kind is {kind!r}: use 'k1', 'k2', 'k3' or 'k3_corrected'")
    k3 = torch.expm1(-d) + d
    if kind == "k3":
        return k3
    if old_logp is None:
        raise ValueError("'k3_corrected' needs old_logp")
    return (logp - old_logp.detach()).exp() * k3
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which way the exponent goes</summary>
#
# $e^{-d} = \pi_{\text{ref}}/\pi_\theta$: the reference is above. At $d = 1$ k3 is 0.37; one wrong
# sign gives 2.72 or −1.63, two give 0.72.
# </details>

# %% check="kl_penalty" points=2
pi, ref, old = (torch.tensor([p], dtype=torch.float64).log() for p in (0.5, 0.25, 0.4))
d = math.log(2)
for kind, want in {
    "k1": d,
    "k2": d * d / 2,
    "k3": d - 0.5,
    "k3_corrected": 1.25 * (d - 0.5),
}.items():
    checks.close(
        kl_penalty(pi, ref, kind, old),
        torch.tensor([want], dtype=torch.float64),
        what=f"{kind} of the example",
        mistakes={
            "k3 with the two policies exchanged": torch.tensor([1 - d], dtype=torch.float64),
            "the opposite sign": torch.tensor([-want], dtype=torch.float64),
            "the ratio upside down": torch.tensor([0.8 * (d - 0.5)], dtype=torch.float64),
        },
    )
### BEGIN HIDDEN TESTS
g = checks.generator(7)
for shape, low in [((3, 5), 0), ((1,), 0), ((2, 1, 4), 0), ((4, 2), 1000), ((0, 3), 0)]:
    for dtype in (torch.float64, torch.float32):
        x, y, z = (
            -checks.randn(*shape, device="cpu", generator=g, dtype=dtype).abs() * 2
            for _ in range(3)
        )
        x, y, z = x - low, y - low, z - low  # 1000: tokens whose probabilities underflow
        for kind in ("k1", "k2", "k3", "k3_corrected"):
            want, slope = [], []
            rows = zip(*(t.double().flatten().tolist() for t in (x, y, z)), strict=True)
            for a, b, c in rows:
                u, rho = math.exp(b - a), math.exp(a - c)
                k3 = u - 1 - (b - a)
                of = {
                    "k1": (a - b, 1.0),
                    "k2": ((a - b) ** 2 / 2, a - b),
                    "k3": (k3, 1 - u),
                    "k3_corrected": (rho * k3, rho * k3 + rho * (1 - u)),
                }[kind]
                want.append(of[0])
                slope.append(of[1])
            leaves = [t.clone().requires_grad_() for t in (x, y, z)]
            with checks.unchanged(logp=leaves[0], ref_logp=leaves[1], old_logp=leaves[2]):
                got = kl_penalty(leaves[0], leaves[1], kind, leaves[2])
            checks.close(
                got,
                torch.tensor(want, dtype=dtype).reshape(shape),
                dtype=dtype,
                atol=1e-5 if dtype == torch.float32 else 1e-12,
                what=f"{kind} of a tensor {shape}",
            )
            grads = torch.autograd.grad(got.sum(), leaves, allow_unused=True)
            assert grads[0] is not None, f"{kind}: no gradient reaches logp"
            checks.close(
                grads[0],
                torch.tensor(slope, dtype=dtype).reshape(shape),
                atol=1e-5 if dtype == torch.float32 else 1e-12,
                what=f"the gradient of {kind}",
                hint="In 'k3_corrected' both factors depend on logp",
            )
            for name, other in zip(("ref_logp", "old_logp"), grads[1:], strict=True):
                assert other is None or not bool(other.any()), f"{kind}: a gradient reaches {name}"
checks.close(kl_penalty(x + 1.0, x, "k3"), kl_penalty(x + 1.0, x), what="k3, the default")
checks.raises(ValueError, kl_penalty, pi, ref, "k3_corrected", because="old_logp is missing")
checks.raises(ValueError, kl_penalty, pi, ref, "k4", old)
### END HIDDEN TESTS

# %% [markdown]
# ### Every action, instead of samples
#
# With six actions nothing needs to be sampled: the expectation over samples is a sum over all
# actions, weighted with the probability of drawing each. That makes the four claims checkable to
# sixteen digits.


# %% exercise="kl_by_enumeration" minutes=12 difficulty=2
def kl_by_enumeration(
    logits: Tensor, ref_logits: Tensor, kind: str, old_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a KL estimate and its gradient are on average, over actions drawn from the sampler.

    logits, ref_logits: (actions,), one floating dtype: π and ref are their softmax.
    kind: as in kl_penalty (which you may use).
    old_logits: (actions,), the sampler; None: the policy itself samples (π_old = π).

    Returns (value, gradient):
        value: 0-dimensional, Σ_a π_old(a) · k(a);
        gradient: (actions,), Σ_a π_old(a) · ∂k(a)/∂logits. An action that was sampled is sampled:
        its weight π_old(a) is a constant, also where the policy itself samples.
    Both without a graph, in the dtype of logits. Inputs stay as they are, and so does their .grad.
    """
    ### BEGIN SOLUTION
    leaf = logits.detach().clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    old_logp = (logits if old_logits is None else old_logits).detach().log_softmax(-1)
    average = (old_logp.exp() * kl_penalty(logp, ref_logits.log_softmax(-1), kind, old_logp)).sum()
    (gradient,) = torch.autograd.grad(average, leaf)
    return average.detach(), gradient
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a gradient without .grad</summary>
#
# Make a leaf of your own, `logits.detach().clone().requires_grad_()`, and ask
# `torch.autograd.grad(value, leaf)`. The weights come from the detached logits.
# </details>

# %% check="kl_by_enumeration" points=3
# Two actions, π = (¾, ¼), ref = (½, ½): KL(π‖ref) = log 2 − H(π) = 0.1308.
pi, ref = (
    torch.tensor([0.75, 0.25], dtype=torch.float64),
    torch.tensor([0.5, 0.5], dtype=torch.float64),
)
value, gradient = checks.parts(kl_by_enumeration(pi.log(), ref.log(), "k1"), "value", "gradient")
exact = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
checks.close(value, torch.tensor(exact, dtype=torch.float64), what="the mean of k1")
checks.close(
    gradient, torch.zeros(2, dtype=torch.float64), atol=1e-12, what="the mean gradient of k1"
)
_, gradient = kl_by_enumeration(pi.log(), ref.log(), "k3")
slope = 0.75 * 0.25 * math.log(3.0)
checks.close(
    gradient,
    torch.tensor([0.25, -0.25], dtype=torch.float64),
    what="the mean gradient of k3: π − ref",
    mistakes={
        "differentiating the weights too": torch.tensor([slope, -slope], dtype=torch.float64)
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for actions, off, shift in [(6, 0, 0), (6, 1, 0), (2, 1, 0), (11, 1, 900), (3, 0, -900)]:
    x, y, z = (
        checks.randn(actions, device="cpu", generator=g, dtype=torch.float64) + shift
        for _ in range(3)
    )
    p, q, w = ((t - t.max()).exp() / (t - t.max()).exp().sum() for t in (x, y, z))
    w = w if off else p
    d = p.log() - q.log()
    kl = (p * d).sum()
    centered = torch.eye(actions, dtype=torch.float64) - p  # ∂ log π(a) / ∂ logits, a row an action
    want = {
        "k1": ((w * d).sum(), w @ centered),
        "k2": ((w * d * d).sum() / 2, (w * d) @ centered),
        "k3": ((w * (q / p - 1 + d)).sum(), (w * (1 - q / p)) @ centered),
        "k3_corrected": (kl, p * (d - kl)),
    }
    for kind, (value, gradient) in want.items():
        leaf = x.clone().requires_grad_()
        leaf.grad = torch.full_like(x, 5.0)
        with checks.kept(logits=leaf, ref_logits=y, old_logits=z):
            got = kl_by_enumeration(leaf, y, kind, z if off else None)
        with checks.kept(logits=x, ref_logits=y):
            kl_by_enumeration(x, y, kind, z if off else None)
        sampler = "another policy" if off else "the policy"
        checks.close(got[0], value, atol=1e-12, what=f"{kind}, {actions} actions of {sampler}")
        checks.close(
            got[1],
            gradient,
            atol=1e-12,
            what=f"the mean gradient of {kind}, actions of {sampler}",
            mistakes={"the exact gradient of KL(π‖ref), not the mean over samples": p * (d - kl)},
        )
        assert not got[0].requires_grad, "the value carries no graph"
        assert not got[1].requires_grad, "the gradient carries no graph"
x, y = checks.randn(6, device="cpu", generator=g), checks.randn(6, device="cpu", generator=g)
for part in kl_by_enumeration(x, y, "k2"):
    assert part.dtype == torch.float32, f"float32 logits give float32; yours is {part.dtype}"
### END HIDDEN TESTS

# %% [markdown]
# Six actions, a policy, a reference, and a third policy that did the sampling:

# %% tags=["experiment"]
six = torch.Generator().manual_seed(3)
policy, reference, sampler = (torch.randn(6, generator=six, dtype=torch.float64) for _ in range(3))
p, q = policy.softmax(-1), reference.softmax(-1)
forward = p * ((p / q).log() - (p * (p / q).log()).sum())  # ∇KL(π‖ref) by the logits
backward = p - q  # ∇KL(ref‖π)
print(
    f"KL(π‖ref) = {(p * (p / q).log()).sum():.4f},  KL(ref‖π) = {(q * (q / p).log()).sum():.4f}\n"
)
print("                value   distance of the mean gradient from ∇KL(π‖ref)   ∇KL(ref‖π)")
bars = {}
for kind in ("k1", "k2", "k3", "k3_corrected"):
    for name, other in (("on policy", None), ("off policy", sampler)):
        value, bars[kind, name] = kl_by_enumeration(policy, reference, kind, other)
        far = [float((bars[kind, name] - truth).norm()) for truth in (forward, backward)]
        print(f"{kind:12s} {name:10s} {value:7.4f} {far[0]:30.1e} {far[1]:20.1e}")

# %% tags=["experiment", "figure"]
# Figure: which gradient each estimate gives, action by action
fig, axes = plot.plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True)
shades = {
    "k1": "#bbbbbb",
    "k2": plot.COLORS[5],
    "k3": plot.COLORS[1],
    "k3_corrected": plot.COLORS[0],
}
for ax, name in zip(axes, ("on policy", "off policy"), strict=True):
    for j, (kind, color) in enumerate(shades.items()):
        ax.bar(torch.arange(6) + 0.2 * (j - 1.5), bars[kind, name], 0.19, color=color, label=kind)
    for a in range(6):
        ax.hlines(float(forward[a]), a - 0.42, a + 0.42, color="black", linewidth=1.4)
        ax.hlines(
            float(backward[a]), a - 0.42, a + 0.42, color="black", linewidth=1.4, linestyle=":"
        )
    ax.set(xlabel="action", xticks=range(6))
    ax.set_title(f"actions drawn {name}")
axes[0].set_ylabel("mean gradient by the logit, nats")
axes[0].plot([], [], color="black", label="∇KL(π‖ref), wanted")
axes[0].plot([], [], color="black", linestyle=":", label="∇KL(ref‖π)")
axes[0].legend(fontsize=8, ncol=2)
plot.caption(
    fig,
    "Left: the policy itself samples. k2 and the corrected k3 end on the solid lines, k3 on the "
    "dotted ones, k1 at zero. Right: another policy samples, and only the corrected k3 still ends "
    "on a line.",
)
plot.plt.show()

# %% [markdown]
# k3 pulls towards the reference, too, so GRPO's leash holds. But near a token that the policy has
# almost given up ($\pi_\theta\ll\pi_{\text{ref}}$) its pull is $1-\pi_{\text{ref}}/\pi_\theta$,
# without bound: one such token can outweigh a batch. That, and not elegance, is why V3.2 changed
# it.

# %% [markdown]
# ## One loss for the family {#loss}
#
# Now the pieces meet. The loss of a token is
#
# $$ \ell_{b,t} = -\min\big(\rho A_b,\ \operatorname{clip}(\rho, 1-\varepsilon_{\text{low}},
# 1+\varepsilon_{\text{high}})A_b\big)\,w_{b,t} + \beta\,k_{b,t} . $$
#
# **Two fences.** DAPO raises only the upper one. A token of probability 0.01 is rewarded up to
# 0.012 under $\varepsilon = 0.2$; one of 0.9 up to 1. The upper fence, DAPO's authors argue, is
# what keeps rare tokens rare, and entropy falls.
#
# **One ratio or many.** The reward belongs to the whole answer. GSPO takes one ratio for it, the
# geometric mean of its tokens' ratios, $s_b = \exp\big(\frac1{n_b}\sum_t \log\rho_{b,t}\big)$, and
# clips whole answers. A mean of many log-ratios hardly moves, so its fences are tiny.
#
# **Three averages.** With $n_b$ tokens in answer $b$:
#
# | `average` | $L$ | a token of answer $b$ weighs |
# |---|---|---|
# | `"sequence"` | mean over answers of the mean over tokens | $1/(B\,n_b)$ |
# | `"token"` | mean over all tokens | $1/\sum_b n_b$ |
# | `"constant"` | sum over all tokens ÷ ($B$ · longest possible) | $1/(B\,n_{\max})$ |
#
# With the first, a wrong answer of 1000 tokens is punished ten times less *per token* than one of
# 100: an incentive to be wrong at length. Whoever sees answers grow should look here first.


# %% exercise="grpo_loss" minutes=30 difficulty=3
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    average: str = "sequence",
    max_length: int | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    weights: Tensor | None = None,
) -> Tensor:
    """The policy loss of the GRPO family, minimized; every keyword is a choice of its own.

    logp, old_logp, ref_logp, weights: (batch, seq), one floating dtype (float32 or float64).
    advantages: (batch,), in the same dtype, one for each answer, of any sign.
    mask: (batch, seq), bool: True on tokens that the policy wrote. What stands at other places of
        any tensor has no influence, not even NaN, on the loss and on its gradient. The True tokens
        may stand anywhere in a row.
    ratio: "token": ρ = exp(logp − old_logp) of each token; "sequence": all tokens of an answer have
        the ratio exp(mean of logp − old_logp over its True tokens).
    clip: (low, high): the ratio is held within 1 − low … 1 + high in the clipped term.
    average: of the tokens' losses: "sequence": mean over the True tokens of each answer, then mean
        over all answers of the batch (one without tokens counts as 0, and is counted); "token":
        mean over all True tokens of the batch; "constant": sum divided by batch · max_length.
    beta, kl, ref_logp: beta · kl_penalty(…, kl) is added to each token's loss. kl is any kind of
        kl_penalty; the correction in "k3_corrected" is always the token's own ρ, not clipped. With
        beta = 0 nothing is added, and ref_logp is not needed and not looked at.
    weights: multiply the tokens' clipped surrogate, not their KL. None: 1.

    ValueError: another `ratio` or `average`; "constant" without max_length; beta ≠ 0 without
    ref_logp.

    Returns a 0-dimensional tensor in the dtype of logp; 0 where no token counts. A gradient reaches
    logp only. Inputs are not changed.

    Example: answers of 2 and 1 tokens, ρ = [[1.5, 1], [0.5, –]], A = [1, −2]. Tokens' losses
    [[−1.2, −1], [1.6, –]]; "sequence" (−1.1 + 1.6)/2 = 0.25, "token" −0.6/3 = −0.2, "constant" with
    max_length 4: −0.6/8 = −0.075.
    """
    ### BEGIN SOLUTION
    if ratio not in ("token", "sequence") or average not in ("sequence", "token", "constant"):
        raise ValueError(f"no ratio {ratio!r} or no average {average!r}")
    if average == "constant" and max_length is None:
        raise ValueError("average='constant' needs max_length")
    if beta != 0 and ref_logp is None:
        raise ValueError("a KL needs ref_logp")
    out, lengths = ~mask, mask.sum(dim=1)
    logp = logp.masked_fill(out, 0)
    old_logp = old_logp.detach().masked_fill(out, 0)
    log_ratio = logp - old_logp
    if ratio == "sequence":
        log_ratio = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].expand_as(logp)
    rho, a = log_ratio.exp(), advantages.detach()[:, None]
    loss = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)
    if weights is not None:
        loss = loss * weights.detach().masked_fill(out, 0)
    if beta != 0:
        loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)
    loss = loss.masked_fill(out, 0)
    if average == "sequence":
        return (loss.sum(dim=1) / lengths.clamp(min=1)).mean()
    if average == "token":
        return loss.sum() / lengths.sum().clamp(min=1)
    return loss.sum() / (loss.shape[0] * max_length)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: an order that works</summary>
#
# Clean the padding; log-ratio, of tokens or of the sequence; surrogate `(batch, seq)`; weights; KL;
# padding to 0; average. Only the second and the last step depend on a switch.
# </details>
#
# <details><summary>Hint: the gradient of a sequence's ratio</summary>
#
# needs nothing special: the mean is part of the graph. The padding must be 0 *before* the mean.
# </details>


# %% tags=["support"]
# Support: the same loss by loops over plain numbers, and batches to try it on
def looped(logp, old, a, mask, ratio="token", clip=(0.2, 0.2), average="sequence",
           max_length=None, ref=None, beta=0.0, kl="k3", weights=None):  # fmt: skip
    """The loss as a 0-dimensional float64 tensor, token by token; gradients flow to logp."""
    rows, total, count = [], 0.0, 0
    for b in range(len(logp)):
        places = [t for t in range(logp.shape[1]) if mask[b, t]]
        gaps = [logp[b, t] - old[b, t] for t in places]
        row = 0.0 * logp[b, 0] if not places else 0.0
        for t, gap in zip(places, gaps, strict=True):
            rho = torch.exp(sum(gaps) / len(gaps) if ratio == "sequence" else gap)
            x, lower, upper = rho.item(), 1 - clip[0], 1 + clip[1]
            if a[b] > 0:
                term = rho * a[b] if x <= upper else upper * a[b] + 0.0 * rho
            else:
                term = rho * a[b] if x >= lower else lower * a[b] + 0.0 * rho
            loss = -term * (1.0 if weights is None else weights[b, t])
            if beta:
                d = logp[b, t] - ref[b, t]
                estimate = {"k1": d, "k2": d * d / 2}.get(kl, torch.exp(-d) + d - 1)
                loss = loss + beta * estimate * (torch.exp(gap) if kl == "k3_corrected" else 1.0)
            row = row + loss
        total, count = total + row, count + len(places)
        rows.append(row / max(len(places), 1))
    if average == "sequence":
        return sum(rows) / len(rows)
    return total / (max(count, 1) if average == "token" else len(logp) * max_length)


def answers(batch: int, seq: int, g: torch.Generator, spread: float = 0.3) -> dict[str, Tensor]:
    """Log-probabilities in float64, with rows of unequal lengths, and holes."""
    old = -checks.randn(batch, seq, device="cpu", generator=g, dtype=torch.float64).abs() - 0.1
    gap = checks.randn(batch, seq, device="cpu", generator=g, dtype=torch.float64) * spread
    mask = torch.rand(batch, seq, generator=g) < 0.7
    lengths = torch.randint(1, seq + 1, (batch,), generator=g)
    mask &= torch.arange(seq) < lengths[:, None]
    mask[torch.arange(batch), lengths - 1] = True
    return {
        "logp": old + gap,
        "old": old,
        "ref": old + 0.5 * checks.randn(batch, seq, device="cpu", generator=g, dtype=torch.float64),
        "weights": torch.rand(batch, seq, generator=g, dtype=torch.float64) + 0.2,
        "a": checks.randn(batch, device="cpu", generator=g, dtype=torch.float64),
        "mask": mask,
    }


def judge(x: dict, dtype: torch.dtype, what: str, mistakes: dict | None = None, **settings) -> None:
    """grpo_loss and its gradient against the loops; padding full of junk, inputs left alone."""
    used = ("ref", "weights")
    given = {k: x[k] for k in used if k in settings}
    others = {k: v for k, v in settings.items() if k not in used}
    leaf = x["logp"].clone().requires_grad_()
    want = looped(leaf, x["old"], x["a"], x["mask"], **given, **others)
    (slope,) = torch.autograd.grad(want, leaf)
    wrong = {
        m: looped(*(x[k] for k in ("logp", "old", "a", "mask")), **{**given, **others, **change})
        for m, change in (mistakes or {}).items()
    }
    junk, padding = checks.generator(19), ~x["mask"]
    dirty = {k: spoiled(v, padding, junk) for k, v in x.items() if k not in ("a", "mask")}
    mine = {k: v.to(dtype).requires_grad_() for k, v in dirty.items()}
    a = x["a"].to(dtype).requires_grad_()
    named = {"ref_logp" if k == "ref" else k: mine[k] for k in given}
    with checks.unchanged(logp=mine["logp"], old_logp=mine["old"], advantages=a, mask=x["mask"]):
        got = grpo_loss(mine["logp"], mine["old"], a, x["mask"], **named, **others)
    loose = 2e-5 if dtype == torch.float32 else 1e-10
    checks.close(
        got,
        want.to(dtype),
        dtype=dtype,
        rtol=loose,
        atol=loose,
        what=f"the loss, {what}",
        mistakes={m: v.to(dtype) for m, v in wrong.items()},
    )
    assert got.requires_grad, f"the loss carries no gradient, {what}"
    inputs = [mine["logp"], a, *(mine[k] for k in ("old", "ref", "weights"))]
    grads = torch.autograd.grad(got, inputs, allow_unused=True)
    assert grads[0] is not None, f"no gradient reaches logp, {what}"
    checks.close(
        grads[0], slope.to(dtype), rtol=loose, atol=loose, what=f"the gradient of logp, {what}"
    )
    for name, other in zip(
        ("advantages", "old_logp", "ref_logp", "weights"), grads[1:], strict=True
    ):
        assert other is None or not bool(other.nan_to_num().any()), f"a gradient reaches {name}"


# The docstring's example, answers of 2 and 1 tokens: logp, old_logp, advantages, mask
EXAMPLE = (
    torch.tensor([[1.5, 1.0], [0.5, 1.0]], dtype=torch.float64).log(),
    torch.zeros(2, 2, dtype=torch.float64),
    torch.tensor([1.0, -2.0], dtype=torch.float64),
    torch.tensor([[True, True], [True, False]]),
)
AVERAGES = {"sequence": 0.25, "token": -0.2, "constant": -0.075}


# %% check="grpo_loss" points=3
for average, want in AVERAGES.items():
    others = {f"average={k!r}": torch.tensor(v, dtype=torch.float64) for k, v in AVERAGES.items()}
    others.pop(f"average={average!r}")
    checks.close(
        grpo_loss(*EXAMPLE, average=average, max_length=4),
        torch.tensor(want, dtype=torch.float64),
        what=f"the loss of the example, average={average!r}",
        mistakes=others | {"the opposite sign": torch.tensor(-want, dtype=torch.float64)},
    )
### BEGIN HIDDEN TESTS
g = checks.generator(9)
for batch, seq in [(4, 7), (1, 1), (3, 5), (6, 2)]:
    for dtype in (torch.float64, torch.float32):
        x = answers(batch, seq, g)
        for average in ("sequence", "token", "constant"):
            changes = {f"average={k!r}": {"average": k} for k in AVERAGES if k != average}
            judge(
                x,
                dtype,
                f"{batch} × {seq}, average={average!r}",
                changes if batch > 1 else None,
                average=average,
                max_length=seq + 3,
            )
x = answers(3, 6, g)
x["mask"][1] = False  # an answer without tokens is counted, as 0
for average in AVERAGES:
    judge(x, torch.float64, f"one empty answer, average={average!r}", average=average, max_length=9)
leaf = x["logp"].clone().requires_grad_()
nothing = torch.zeros(3, 6, dtype=torch.bool)
for average in AVERAGES:
    loss = grpo_loss(leaf, x["old"], x["a"], nothing, average=average, max_length=6)
    checks.close(loss, torch.tensor(0.0, dtype=torch.float64), what="the loss without tokens")
x = answers(3, 4, g)
unlikely = {k: x[k] - 1000 for k in ("logp", "old", "ref")}  # their probabilities underflow
for level in ("token", "sequence"):
    settings = {"ratio": level, "ref": True, "beta": 0.2, "kl": "k3_corrected"}
    judge(x | unlikely, torch.float64, f"unlikely tokens, ratio {level!r}", **settings)
x = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in x.items()}
judge(x, torch.float64, "columns one after another in memory", average="token")
for wrong in ({"average": "mean"}, {"ratio": "tokens"}, {"average": "constant"}, {"beta": 0.1}):
    checks.raises(ValueError, grpo_loss, x["logp"], x["old"], x["a"], x["mask"], **wrong)
### END HIDDEN TESTS

# %% check="grpo_loss" points=3
# DAPO's upper fence, then GSPO's ratio: √(1.5 · 1) for the first answer, 0.5 for the second.
checks.close(
    grpo_loss(*EXAMPLE, clip=(0.2, 0.4), average="token"),
    torch.tensor((-1.4 - 1 + 1.6) / 3, dtype=torch.float64),
    what="the loss of the example with clip (0.2, 0.4)",
    mistakes={"low and high exchanged": torch.tensor((-1.2 - 1 + 1.2) / 3, dtype=torch.float64)},
)
root = math.sqrt(1.5)
checks.close(
    grpo_loss(*EXAMPLE, ratio="sequence", clip=(0.6, 0.6)),
    torch.tensor((-root + 1.0) / 2, dtype=torch.float64),
    what="the loss of the example with one ratio a sequence",
    mistakes={
        "the arithmetic mean of ratios": torch.tensor((-1.25 + 1) / 2, dtype=torch.float64),
        "the product of ratios": torch.tensor((-1.5 + 1) / 2, dtype=torch.float64),
        "ratios of tokens": torch.tensor((-1.25 + 1.0) / 2, dtype=torch.float64),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for batch, seq in [(5, 6), (1, 4), (3, 1)]:
    for clip in ((0.1, 0.5), (0.45, 0.05)):
        for average in AVERAGES:
            x = answers(batch, seq, g)
            settings = {"clip": clip, "average": average, "max_length": 2 * seq}
            judge(x, torch.float64, f"clip {clip}", None, **settings)
            x = answers(batch, seq, g, spread=0.9)
            settings["ratio"] = "sequence"
            changes = {"ratios of tokens": {"ratio": "token"}} if seq > 1 and batch > 1 else None
            judge(x, torch.float64, f"one ratio a sequence, clip {clip}", changes, **settings)
# Law: before the first step all ratios are 1, and the two levels have one gradient (average by
# sequence).
x = answers(4, 5, g)
grads = []
for level in ("token", "sequence"):
    leaf = x["old"].clone().requires_grad_()
    loss = grpo_loss(leaf, x["old"], x["a"], x["mask"], ratio=level)
    grads += torch.autograd.grad(loss, leaf)
checks.close(grads[0], grads[1], what="gradients of both ratios before the first step")
### END HIDDEN TESTS

# %% check="grpo_loss" points=2
# The KL: one token, ρ = 1.25, A = 0, π/ref = 2, β = 0.5.
one = torch.ones(1, 1, dtype=torch.bool)
pi, ref, old = (torch.tensor([[p]], dtype=torch.float64).log() for p in (0.5, 0.25, 0.4))
k3 = math.log(2) - 0.5
for kind, want in {"k3": 0.5 * k3, "k3_corrected": 0.625 * k3}.items():
    checks.close(
        grpo_loss(pi, old, torch.zeros(1).double(), one, ref_logp=ref, beta=0.5, kl=kind),
        torch.tensor(want, dtype=torch.float64),
        what=f"a loss that is only KL, {kind}",
        mistakes={"the opposite sign": torch.tensor(-want, dtype=torch.float64)},
    )
### BEGIN HIDDEN TESTS
g = checks.generator(11)
for batch, seq in [(4, 6), (2, 3)]:
    for kind in ("k1", "k2", "k3", "k3_corrected"):
        for level, average in (("token", "token"), ("sequence", "sequence"), ("token", "constant")):
            x = answers(batch, seq, g)
            settings = {
                "ratio": level,
                "average": average,
                "max_length": 5,
                "beta": 0.3,
                "kl": kind,
            }
            changes = {"no KL": {"beta": 0.0}, "another kl": {"kl": "k2" if kind != "k2" else "k3"}}
            judge(x, torch.float64, f"{kind}, ratio {level!r}", changes, ref=True, **settings)
            changes = {"weighing the KL too, or not at all,": {"weights": None}}
            judge(x, torch.float64, "weights and KL", changes, ref=True, weights=True, **settings)
x = answers(3, 5, g)
judge(x, torch.float32, "weights", {"no weights": {"weights": None}}, weights=True)
checks.close(
    grpo_loss(x["logp"], x["old"], x["a"], x["mask"], ref_logp=x["ref"] * math.nan),
    looped(x["logp"], x["old"], x["a"], x["mask"]),
    what="the loss with beta = 0, where the reference is not looked at",
)
### END HIDDEN TESTS

# %% [markdown]
# What the three averages do to long and short answers, asked of your function: eight answers, the
# lengths 2 to 256, all equally wrong. How hard does the loss push on one token of each?

# %% tags=["experiment", "figure"]
# Figure: the push on one token of a wrong answer, by the answer's length
lengths = 2 ** torch.arange(1, 9)
written = torch.arange(256) < lengths[:, None]
fig, ax = plot.plt.subplots(figsize=(6.6, 3.8))
for average, marker in zip(("sequence", "token", "constant"), "os^", strict=True):
    leaf = torch.zeros(8, 256, dtype=torch.float64, requires_grad=True)
    loss = grpo_loss(
        leaf, leaf.detach(), -torch.ones(8).double(), written, average=average, max_length=256
    )
    (push,) = torch.autograd.grad(loss, leaf)
    ax.plot(lengths, push[:, 0], marker=marker, label=f"average={average!r}")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set(xlabel="tokens in the wrong answer", ylabel="gradient on one of its tokens")
ax.legend(fontsize=8)
plot.caption(
    fig,
    "With an average by sequence a wrong answer of 256 tokens is pushed down 128 times less, token "
    "for token, than one of 2. The other two push all tokens alike; 'token' by a number that "
    "depends on the batch, 'constant' by one that does not.",
)
plot.plt.show()

# %% [markdown]
# ## From logits to log-probabilities, at the right temperature {#temperature}
#
# Samples are drawn from softmax(logits / T). The loss needs log-probabilities of *that*
# distribution. Whoever samples at T = 0.7 and computes the loss from plain logits has a
# $\pi_{\text{old}}$ that never sampled anything: the ratio starts at 1 all the same (both sides are
# wrong alike), nothing fails, and the gradient is that of another policy.


# %% exercise="response_logps" minutes=8 difficulty=1
def response_logps(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of each token after the first, under softmax(logits / temperature).

    logits: (batch, seq, vocab), any floating dtype; logits[:, i] predict tokens[:, i + 1].
    tokens: (batch, seq), int64, seq ≥ 1. temperature > 0, else ValueError.

    Returns (batch, seq − 1): [:, i] belongs to tokens[:, i + 1]. Computed and returned in float32
    for half-precision logits, else in the dtype of the logits. Gradients flow to the logits.
    """
    ### BEGIN SOLUTION
    if temperature <= 0:
        raise ValueError("greedy decoding is no distribution: the temperature must be positive")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: before or after the softmax</summary>
#
# The temperature divides logits. Divided log-probabilities do not sum to 1.
# </details>

# %% check="response_logps" points=2
logits = torch.tensor([[[math.log(4.0), 0.0], [0.0, 0.0], [9.0, 1.0]]])
checks.close(
    response_logps(logits, torch.tensor([[1, 0, 1]]), 2.0),
    torch.tensor([[math.log(2 / 3), math.log(1 / 2)]]),
    what="log-probabilities at temperature 2: odds of 4 become odds of 2",
    mistakes={
        "ignoring the temperature": torch.tensor([[math.log(0.8), math.log(0.5)]]),
        "dividing after the softmax": torch.tensor([[math.log(0.8) / 2, math.log(0.5) / 2]]),
        "multiplying": torch.tensor([[math.log(16 / 17), math.log(0.5)]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for batch, seq, vocab, temperature in [
    (2, 5, 7, 0.7),
    (3, 2, 4, 1.0),
    (1, 1, 3, 0.5),
    (2, 4, 5, 1.6),
]:
    tokens = torch.randint(0, vocab, (batch, seq), generator=g)
    base = checks.randn(batch, seq, vocab, device="cpu", generator=g) * 3
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = base.to(dtype)
        want = torch.zeros(batch, seq - 1, dtype=torch.float64)
        for b in range(batch):
            for i in range(seq - 1):
                row = x[b, i].double() / temperature
                want[b, i] = row[tokens[b, i + 1]] - torch.logsumexp(row, 0)
        out = torch.float64 if dtype == torch.float64 else torch.float32
        with checks.unchanged(logits=x, tokens=tokens):
            got = response_logps(x, tokens, temperature)
        checks.close(
            got, want.to(out), dtype=out, rtol=1e-5, what=f"log-probabilities of {dtype} logits"
        )
tokens = torch.randint(0, 5, (2, 6), generator=g)
checks.gradients(
    lambda x: response_logps(x, tokens, 0.6),
    lambda x: (
        -F.cross_entropy(
            x[:, :-1].flatten(0, 1) / 0.6, tokens[:, 1:].flatten(), reduction="none"
        ).unflatten(0, (2, 5))
    ),
    checks.randn(2, 6, 5, device="cpu", generator=g),
    names=("the logits",),
)
big = checks.randn(2, 4, 6, device="cpu", generator=g) * 500
tokens = torch.randint(0, 6, (2, 4), generator=g)
want = torch.log_softmax(big.double() / 0.3, -1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
checks.close(
    response_logps(big, tokens, 0.3), want.float(), what="log-probabilities of large logits"
)
for temperature in (0.0, -1.0):
    checks.raises(ValueError, response_logps, big, tokens, temperature)
### END HIDDEN TESTS

# %% [markdown]
# ## The sampler is not the trainer {#mismatch}
#
# Large runs sample with one program (vLLM, SGLang, perhaps in FP8) and train with another. The
# weights are equal, the log-probabilities are not: other kernels, other orders of sums, and in a
# mixture of experts now and then another expert. So there are *three* policies: $\pi_\theta$, the
# trainer's $\pi_{\text{old}}$, and the sampler's $\mu$. PPO's ratio corrects from old to now; the
# step from $\mu$ to old wants its own weight, $\pi_{\text{old}}/\mu$.
#
# Weights that may be huge ruin an average, so they are **truncated**: $\min(\pi_{\text{old}}/\mu,
# C)$. Truncation only ever makes a weight smaller, a bias, in exchange for a bounded variance. The
# mean weight without a cap is no thermometer: under $\mu$ its expectation is 1 for near policies
# and far ones. The spread of the weights is one, and so is the mean of the truncated ones, which
# falls below 1.


# %% exercise="sampler_weights" minutes=12 difficulty=2 path="more"
def sampler_weights(
    old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, cap: float = 2.0, level: str = "token"
) -> Tensor:
    """Truncated importance weights from the sampler's policy to the trainer's.

    old_logp, sampler_logp: (batch, seq), one floating dtype (float32 or float64): the same tokens'
        log-probabilities by the trainer and by the sampler, finite at True tokens, however
        unlikely these are. mask: (batch, seq), bool. cap > 0.
    level: "token": min(π_old/μ, cap) of each token. "sequence": the ratio of the whole answer, that
        is the product over its True tokens, truncated by cap, at each of its tokens. Otherwise
        ValueError.

    Returns (batch, seq), in the dtype of old_logp, without a gradient; 0 where the mask is False,
    whatever stands there (NaN, too). A log-ratio of any size gives a finite weight. Not changed:
    the inputs.

    Example: π_old = (0.6, 0.2), μ = (0.2, 0.4), cap 2: tokens (2, 0.5), sequence (1.5, 1.5).
    """
    ### BEGIN SOLUTION
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}: use 'token' or 'sequence'")
    log_ratio = (old_logp.detach() - sampler_logp.detach()).masked_fill(~mask, 0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 0)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a product of ratios</summary>
#
# is the exponential of a sum of differences. Truncate last: a product of truncated ratios is
# something else.
# </details>

# %% check="sampler_weights" points=2
old, mu = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.2, 0.4]]).log()
yes = torch.ones(1, 2, dtype=torch.bool)
checks.close(
    sampler_weights(old, mu, yes),
    torch.tensor([[2.0, 0.5]]),
    what="weights of the example's tokens",
    mistakes={
        "the ratio upside down": torch.tensor([[1 / 3, 2.0]]),
        "no cap": torch.tensor([[3.0, 0.5]]),
    },
)
checks.close(
    sampler_weights(old, mu, yes, level="sequence"),
    torch.tensor([[1.5, 1.5]]),
    what="the example's weight of the answer",
    mistakes={
        "a product of truncated ratios": torch.tensor([[1.0, 1.0]]),
        "the geometric mean": torch.full((1, 2), 1.5**0.5),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(13)
for batch, seq, cap in [(3, 6, 1.3), (1, 1, 2.0), (4, 3, 0.8), (2, 9, 50.0)]:
    for dtype in (torch.float64, torch.float32):
        x, y = (
            -checks.randn(batch, seq, device="cpu", generator=g, dtype=dtype).abs()
            for _ in range(2)
        )
        mask = torch.rand(batch, seq, generator=g) < 0.6
        mask[0, -1] = True
        by_token, by_answer = torch.zeros(2, batch, seq, dtype=torch.float64)
        for b in range(batch):
            places = mask[b].nonzero().flatten().tolist()
            whole = math.prod(math.exp(float(x[b, t]) - float(y[b, t])) for t in places)
            for t in places:
                by_token[b, t] = min(math.exp(float(x[b, t]) - float(y[b, t])), cap)
                by_answer[b, t] = min(whole, cap)
        x, y = (spoiled(t, ~mask, g).requires_grad_() for t in (x, y))
        for level, want in (("token", by_token), ("sequence", by_answer)):
            with checks.unchanged(old_logp=x, sampler_logp=y, mask=mask):
                got = sampler_weights(x, y, mask, cap, level)
            checks.close(
                got,
                want.to(dtype),
                dtype=dtype,
                rtol=3e-5 if dtype == torch.float32 else 1e-9,
                what=f"weights, level {level!r}, cap {cap}",
            )
            assert not got.requires_grad, "the weights are constants: no gradient"
far = torch.full((2, 4), -0.1)
mask = torch.ones(2, 4, dtype=torch.bool)
for level in ("token", "sequence"):
    checks.close(
        sampler_weights(far, far - 300, mask, 3.0, level),
        torch.full((2, 4), 3.0),
        what="weights of a log-ratio of 300",
    )
    checks.close(
        sampler_weights(far - 300, far, mask, 3.0, level),
        torch.zeros(2, 4),
        what="weights of a log-ratio of −300",
    )
# Tokens that are unlikely by both: their probabilities underflow, their ratios do not.
for dtype, low in ((torch.float32, -200.0), (torch.float64, -1000.0)):
    y = torch.full((1, 3), low, dtype=dtype)
    x = y + torch.tensor([0.5, -0.25, 2.0], dtype=dtype)
    for level, want in (("token", [math.exp(0.5), math.exp(-0.25), 3.0]), ("sequence", [3.0] * 3)):
        got = sampler_weights(x, y, torch.ones(1, 3, dtype=torch.bool), 3.0, level)
        checks.close(
            got, torch.tensor([want], dtype=dtype), what=f"weights of unlikely tokens, {level!r}"
        )
# A huge ratio and a tiny one make an ordinary product.
x = torch.tensor([[-0.5, -800.5, -1.0]])
y = torch.tensor([[-800.5, -0.5, -1.25]])
checks.close(
    sampler_weights(x, y, torch.ones(1, 3, dtype=torch.bool), 3.0, "sequence"),
    torch.full((1, 3), math.exp(0.25)),
    rtol=1e-4,
    what="the weight of an answer with log-ratios of 800, −800 and 0.25",
)
checks.raises(ValueError, sampler_weights, far, far, mask, 2.0, "batch")
# Law: without a cap the sampler's mean weight is 1, over all its actions.
p, q = (
    checks.randn(7, device="cpu", generator=g, dtype=torch.float64).log_softmax(0)[:, None]
    for _ in range(2)
)
w = sampler_weights(p, q, torch.ones(7, 1, dtype=torch.bool), cap=1e9)
checks.close(
    (q.exp() * w).sum(),
    torch.tensor(1.0, dtype=torch.float64),
    what="the mean weight without a cap",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Groups that teach nothing {#dynamic}
#
# If all answers of a group are right, or all wrong, every advantage is 0. Unless there is a KL, the
# group was sampled for nothing. With a success rate $p$ and independent answers, a group of $G$ has
# differences with probability
#
# $$ q = 1 - p^G - (1-p)^G . $$
#
# For $G = 8$ that is 0.992 at $p=½$, and 0.077 at $p=0.99$: a policy that gets good starves, and
# the batch that is left shrinks without anyone being told. DAPO's **dynamic sampling** draws again
# until the batch is full of groups with differences. On average it needs $1/q$ draws for each.
#
# The most frequent way to get groups without differences is a bug: one seed for all samples of a
# group. All answers are then identical, all advantages 0, and nothing raises an error.


# %% exercise="dynamic_sampling" minutes=12 difficulty=2 path="more"
def dynamic_sampling(
    draw: Callable[[int], Tensor], wanted: int, max_rounds: int
) -> tuple[Tensor, int]:
    """Draws groups until `wanted` of them have differences between their rewards.

    draw(count): the rewards (count, group) of `count` ≥ 1 fresh groups, all of one dtype. Draws are
        expensive: each round asks for exactly as many groups as are still missing, and there is no
        round when none is missing. The tensor that it returns stays unchanged.
    wanted ≥ 1; max_rounds ≥ 1: at most so many rounds, whatever has come together by then.

    Returns (kept, drawn): the rewards (found, group) of the groups with at least two different
    rewards, in the order in which they were drawn, in the dtype of the draws, found ≤ wanted (it
    may be 0); and the number of groups drawn in all, an int.
    """
    ### BEGIN SOLUTION
    kept, drawn, found = [], 0, 0
    for _ in range(max_rounds):
        rewards = draw(wanted - found)
        drawn += len(rewards)
        kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
        found += len(kept[-1])
        if found == wanted:
            break
    return torch.cat(kept), drawn
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which groups have differences</summary>
#
# Compare each reward with the first of its group. A standard deviation of equal floats need not be
# 0 (you met eight times 0.1).
# </details>


# %% tags=["support"]
# Support: a source of groups that notes what it was asked for
class Source:
    """draw(count) hands out the rows of a table, one after another."""

    def __init__(self, table: Tensor):
        self.table, self.at, self.asked = table, 0, []

    def __call__(self, count: int) -> Tensor:
        self.asked.append(int(count))
        assert count >= 1, f"draw({count}): a round asks for at least one group"
        self.at += count
        assert self.at <= len(self.table), f"{self.at} groups were drawn: is there an end to it?"
        return self.table[self.at - count : self.at].clone()


# %% check="dynamic_sampling" points=2
table = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 0.5]])
source = Source(table)
kept, drawn = checks.parts(dynamic_sampling(source, 3, 10), "kept", "drawn")
checks.close(kept, table[[1, 3, 5]], what="the groups with differences, of six")
checks.close(drawn, 6, what="the number of groups drawn")
assert source.asked == [3, 2, 1], (
    f"rounds of 3, 2 and 1 are asked for; yours asked for {source.asked}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for wanted, rounds, group, share in [
    (4, 50, 3, 0.4),
    (1, 30, 2, 0.3),
    (5, 2, 4, 0.3),
    (3, 1, 5, 0.0),
    (6, 40, 8, 0.9),
    (2, 3, 3, 0.0),
    (1, 60, 11, 0.1),  # groups that come alone: torch.std takes another path for one row
]:
    for dtype in (torch.float32, torch.float64):
        table = checks.randn(400, group, device="cpu", generator=g, dtype=dtype)
        dull = torch.rand(400, generator=g) >= share
        table[dull] = torch.rand(int(dull.sum()), 1, generator=g).to(dtype)
        alone = ~dull & (torch.rand(400, generator=g) < 0.5)  # one answer of the group differs
        place = torch.randint(0, group, (400,), generator=g)
        table[alone] = F.one_hot(place[alone], group).to(dtype)
        at, found, asked = 0, [], []
        for _ in range(rounds):
            missing = wanted - len(found)
            if not missing:
                break
            asked.append(missing)
            found += [i for i in range(at, at + missing) if not dull[i]]
            at += missing
        source = Source(table)
        kept, drawn = dynamic_sampling(source, wanted, rounds)
        checks.close(kept, table[found], dtype=dtype, what=f"the groups kept, {wanted} wanted")
        checks.close(drawn, at, what="the number of groups drawn")
        assert source.asked == asked, f"rounds of {asked} are asked for; yours: {source.asked}"
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: a policy that gets good starves, and how many draws feed it
rates = torch.linspace(0.02, 0.98, 25)
g = torch.Generator().manual_seed(0)
fig, axes = plot.plt.subplots(1, 2, figsize=(9.4, 3.4))
for size, marker in zip((4, 8, 32), "os^", strict=True):
    informative, cost = [], []
    for p in rates.tolist():
        answered = (torch.rand(400, size, generator=g) < p).float()
        advantages = group_advantages(answered)
        informative.append(float((advantages != 0).any(1).float().mean()))
        kept, drawn = dynamic_sampling(
            lambda n, p=p, size=size: (torch.rand(n, size, generator=g) < p).float(), 200, 200
        )
        cost.append(drawn / len(kept))
    law = 1 - rates**size - (1 - rates) ** size
    axes[0].plot(rates, law, color="#999999", linewidth=1, linestyle="-")
    axes[0].plot(rates, informative, marker, markersize=4, label=f"G = {size}")
    axes[1].plot(rates, 1 / law, color="#999999", linewidth=1, linestyle="-")
    axes[1].plot(rates, cost, marker, markersize=4, label=f"G = {size}")
axes[0].set(xlabel="success rate p", ylabel="groups with a gradient, share", ylim=(0, 1.05))
axes[1].set(xlabel="success rate p", ylabel="groups drawn for one that is kept", yscale="log")
axes[0].legend(fontsize=8, loc="lower center")
plot.caption(
    fig,
    "Marks: groups of random successes through your two functions; grey lines: q and 1/q. Larger "
    "groups widen the range in which a question teaches, and cost more answers a question.",
)
plot.plt.show()

# %% [markdown]
# ## What it all weighs {#memory}
#
# A model in training with Adam in mixed precision holds 16 bytes a parameter: weights and gradient
# in bfloat16 (2 + 2), a float32 copy and two moments (4 + 4 + 4). A frozen one holds 2. PPO trains
# two and freezes two.


# %% exercise="rl_memory" minutes=6 difficulty=1 path="more"
def rl_memory(
    policy: float, critic: float = 0, reference: float = 0, reward: float = 0, devices: int = 1
) -> float:
    """Bytes on each device for the models of an RL run, sharded evenly over all devices.

    policy, critic: parameters of the models in training, 16 bytes each. reference, reward: of the
    frozen ones, 2 bytes each. 0: there is no such model. No activations, no cache. The result is
    all bytes divided by devices, not rounded.

    Example: 10 parameters of each, on 2 devices: (160 + 160 + 20 + 20)/2 = 180 bytes.
    """
    ### BEGIN SOLUTION
    return (16 * (policy + critic) + 2 * (reference + reward)) / devices
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: who is in training</summary>
#
# The policy and the critic. The reference never changes; that is its purpose.
# </details>

# %% check="rl_memory" points=1
checks.number(
    rl_memory(10, 10, 10, 10, 2), 180.0, to=1e-9, what="ten parameters of each, on 2 devices"
)
### BEGIN HIDDEN TESTS
for got, want, what in [
    (rl_memory(671e9, 671e9, 671e9, 671e9), 24.156e12, "PPO at 671 B"),
    (rl_memory(671e9, reference=671e9), 12.078e12, "GRPO with a rule for a reward at 671 B"),
    (rl_memory(671e9), 10.736e12, "the same without a reference"),
    (rl_memory(7e9, 1e9, 7e9, 3e9, 64), 2.3125e9, "a small critic and reward model on 64 devices"),
    (rl_memory(3e9, 5e9, 7e9, 11e9, 3), (128e9 + 36e9) / 3, "four sizes on 3 devices"),
    (rl_memory(7, 5, 3, 2, 4), 50.5, "sizes that do not divide by the devices"),
    (rl_memory(1, devices=64), 0.25, "one parameter on 64 devices"),
]:
    checks.number(got, want, to=1e-9, what=what)
### END HIDDEN TESTS

# %% tags=["experiment"]
size = 671e9
for name, total in {
    "PPO: policy, critic, reference, reward model": rl_memory(size, size, size, size),
    "GRPO, a rule for a reward": rl_memory(size, reference=size),
    "GRPO without a reference": rl_memory(size),
}.items():
    print(f"{name:46s}{total / 1e12:6.1f} TB, {total / 80e9:5.0f} GPUs of 80 GB for this alone")

# %% [markdown]
# ## Training {#training}
#
# Now the loop. Given is what turns prompts into a batch: each prompt `group` times, sampled
# together and so with different draws, padded on the right. A causal model needs no attention mask
# for padding on the right: no real token sees it.


# %%
@dataclass
class Rollout:
    tokens: Tensor  # (prompts · group, seq), int64: prompt, answer, padding
    mask: Tensor  # (prompts · group, seq − 1), bool: [:, i] is True if tokens[:, i + 1] was written
    answers: list[list[int]]  # the written tokens, the answers to one prompt one after another


def padded(rows: list[list[int]], pad: int = 0) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def rollout(
    model: nn.Module,
    prompts: list[list[int]],
    group: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    stop: int = 0,
) -> Rollout:
    """`group` sampled answers to each prompt. An answer ends with `stop` or at max_new_tokens."""
    repeated = [list(prompt) for prompt in prompts for _ in range(group)]
    answers = models.generate(model, repeated, max_new_tokens, temperature, stop, generator)
    tokens = padded([p + a for p, a in zip(repeated, answers, strict=True)])
    mask = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.bool)
    for row, p, a in zip(mask, repeated, answers, strict=True):
        row[len(p) - 1 : len(p) + len(a) - 1] = True
    return Rollout(tokens, mask, answers)


# %% exercise="grpo_train" minutes=30 difficulty=3
def grpo_train(
    model: nn.Module,
    reference: nn.Module | None,
    prompts: list[list[int]],
    reward: Callable[[int, list[int]], float],
    *,
    steps: int,
    batch: int,
    group: int,
    max_new_tokens: int,
    lr: float,
    generator: torch.Generator,
    beta: float = 0.0,
    temperature: float = 1.0,
    updates: int = 1,
    stop: int = 0,
) -> list[dict[str, float]]:
    """Trains `model` in place with GRPO, and returns a record of each step.

    The models have no dropout. batch ≤ len(prompts), group ≥ 2, updates ≥ 1. Rewards that differ do
    so in float32, too.

    The optimizer is torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), made once.
    Each of the `steps`:

    1. draws torch.randperm(len(prompts), generator=generator)[:batch], the numbers of its prompts;
    2. calls rollout(model, these prompts, group, max_new_tokens, temperature, generator, stop);
       nothing else draws from the generator;
    3. scores every answer: reward(number of the prompt in `prompts`, answer);
    4. takes group_advantages with its defaults; grpo_loss wants them in the dtype of old_logp;
    5. takes old_logp by response_logps at `temperature`, before any update, and ref_logp likewise
       from `reference` (if there is one), both without a graph;
    6. does `updates` updates on this batch: grpo_loss with its defaults (clip 0.2, average
       "sequence", "k3" with beta), gradients of this loss alone clipped to a total norm of 1.0
       (torch.nn.utils.clip_grad_norm_), optimizer step.

    Record of a step, floats: "reward", the mean over its answers; "informative", the share of its
    groups with differences; "entropy", minus the mean of old_logp over written tokens; "length",
    the mean number of written tokens; "kl", the mean of kl_penalty(old_logp, ref_logp) over written
    tokens, 0.0 without a reference.

    reference None: there is none. beta ≠ 0 without a reference: ValueError. Whether model and
    reference are in training mode stays as it is; the reference does not change and gets no
    gradient; gradients that lie in the model from before do not count. Returns [] for steps =
    0, and then the model is unchanged.
    """
    ### BEGIN SOLUTION
    if beta != 0 and reference is None:
        raise ValueError("a KL needs a reference")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    records = []
    for _ in range(steps):
        picks = torch.randperm(len(prompts), generator=generator)[:batch].tolist()
        chosen = [prompts[i] for i in picks]
        rolled = rollout(model, chosen, group, max_new_tokens, temperature, generator, stop)
        tokens, mask = rolled.tokens, rolled.mask
        scores = [reward(picks[n // group], answer) for n, answer in enumerate(rolled.answers)]
        rewards = torch.tensor(scores, dtype=torch.float32).reshape(len(picks), group)
        advantages = group_advantages(rewards).flatten()
        with torch.no_grad():
            old_logp = response_logps(model(tokens), tokens, temperature)
            ref_logp = None
            if reference is not None:
                ref_logp = response_logps(reference(tokens), tokens, temperature)
        advantages = advantages.to(old_logp.dtype)
        for _ in range(updates):
            logp = response_logps(model(tokens), tokens, temperature)
            loss = grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, beta=beta)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
        kl = 0.0 if ref_logp is None else float(kl_penalty(old_logp, ref_logp)[mask].mean())
        records.append(
            {
                "reward": float(rewards.mean()),
                "informative": float((rewards != rewards[:, :1]).any(dim=1).float().mean()),
                "entropy": -float(old_logp[mask].mean()),
                "length": float(mask.sum(dim=1).float().mean()),
                "kl": kl,
            }
        )
    return records
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: whose answer is it</summary>
#
# Answers lie group after group: answer n belongs to prompt `picks[n // group]`, so the rewards
# reshape to (prompts, group), and the advantages flatten back in the same order.
# </details>
#
# <details><summary>Hint: the reward does not rise</summary>
#
# Look at the record. "informative" 0: the rewards do not differ, or belong to other prompts.
# Reward falls: a sign. Entropy falls at once to 0: is the learning rate too high, or old_logp
# computed after the update?
# </details>


# %% tags=["support"]
# Support: a very small language model, and a task that it learns in a second
def toy(salt: int) -> nn.Module:
    """2,480 parameters, eight tokens, random weights, in evaluation mode."""
    shape = {"vocab_size": 8, "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    model = models.Llama(models.Config(**shape, mlp_size=32))
    source = checks.generator(salt)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=source) * 0.1)
    return model.eval()


TOY_PROMPTS = [[token] for token in range(2, 8)]
TOY_SETTINGS = {"batch": 6, "group": 8, "max_new_tokens": 2, "lr": 0.03}


def next_in_circle(number: int, answer: list[int]) -> float:
    """1 for an answer that begins with the token after the prompt's: 3 after 2, …, 2 after 7."""
    return float(answer[0] == 2 + (number + 1) % 6)


def with_length(number: int, answer: list[int]) -> float:
    """Longer answers of larger tokens get more, and some prompts more than others."""
    return len(answer) + 0.25 * sum(answer) * (1 + number % 3)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# %% check="grpo_train" points=3
model, before = toy(20), weights_of(toy(20))
record = grpo_train(
    model,
    None,
    TOY_PROMPTS,
    next_in_circle,
    steps=40,
    generator=checks.generator(21),
    **TOY_SETTINGS,
)
assert isinstance(record, list), "a list of records is asked for"
assert len(record) == 40, f"40 steps have 40 records; yours are {len(record)}"
keys = {"reward", "informative", "entropy", "length", "kl"}
assert set(record[0]) == keys, f"a record has the keys {sorted(keys)}; yours {sorted(record[0])}"
assert all(type(v) is float for row in record for v in row.values()), "records hold floats"
assert not torch.equal(weights_of(model), before), "the model was not trained: no weight changed"
late = sum(row["reward"] for row in record[-5:]) / 5
assert sum(row["informative"] for row in record[:5]) > 0, "no early group has differences"
assert late > 0.4, (
    f"the mean reward of the last five steps is {late:.2f}; it began at {record[0]['reward']:.2f} "
    f"and should pass 0.4"
)


### BEGIN HIDDEN TESTS
# Judged by the check's own rollouts: the policy answers all six prompts, and another task too.
def solved(model: nn.Module, task: Callable) -> float:
    answers = models.generate(model, TOY_PROMPTS * 20, 2, 1.0, 0, checks.generator(22))
    return sum(task(i % 6, a) for i, a in enumerate(answers)) / len(answers)


def graded(number: int, answer: list[int]) -> float:
    """Prompts with rewards of other sizes: a hundredth, and a hundred and more."""
    return (answer[0] == 7 - number) * 10.0 ** (number % 2 * 4 - 2) + number


checks_out = solved(model, next_in_circle)
assert checks_out > 0.4, f"the trained policy is right in {checks_out:.0%} of its answers"
other = toy(23)
grpo_train(
    other, None, TOY_PROMPTS, graded, steps=40, generator=checks.generator(24), **TOY_SETTINGS
)
share = solved(other, lambda i, a: float(a[0] == 7 - i))
assert share > 0.35, (
    f"with rewards that differ from prompt to prompt the policy is right in {share:.0%}: is each "
    f"reward compared with its own group?"
)
### END HIDDEN TESTS


# %% check="grpo_train" points=3
# One step, done again by hand: what it scores, what it records, and where the weights go.
def one_step(model, reference, salt, task, batch, group, longest, temperature, beta):
    """The first step's record, and the gradient of its loss, by other means than grpo_train."""
    g = checks.generator(salt)
    picks = torch.randperm(6, generator=g)[:batch].tolist()
    rolled = rollout(model, [TOY_PROMPTS[i] for i in picks], group, longest, temperature, g, 0)
    r = torch.tensor([task(picks[n // group], a) for n, a in enumerate(rolled.answers)])
    r = r.double().reshape(batch, group)
    a = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).flatten()

    def logps(model):
        x = model(rolled.tokens)[:, :-1].double() / temperature
        return torch.log_softmax(x, -1).gather(-1, rolled.tokens[:, 1:, None])[..., 0]

    m = rolled.mask
    logp, ref = logps(model), logps(reference).detach()
    d = ref - logp
    token = -(logp - logp.detach()).exp() * a[:, None] + beta * (d.exp() - d - 1)
    loss = ((token * m).sum(1) / m.sum(1)).mean()
    gradient = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])
    logp = logp.detach()
    return gradient, {
        "reward": float(r.mean()),
        "informative": float((r.std(1) > 1e-9).double().mean()),
        "entropy": -float(logp[m].mean()),
        "length": float(m.sum() / len(m)),
        "kl": float(((ref - logp).exp() - (ref - logp) - 1)[m].mean()),
    }


def first_step(salt, batch, group, longest, temperature, beta):
    reference, model = toy(salt + 100), toy(salt)
    gradient, want = one_step(
        toy(salt), reference, salt, with_length, batch, group, longest, temperature, beta
    )
    for p in [*model.parameters(), *reference.parameters()]:
        p.grad = torch.full_like(p, 3.0)  # left over from something else
    before = weights_of(model)
    with checks.kept(reference=reference), checks.kept(model=model, values=False):
        got = grpo_train(
            model, reference=reference, prompts=TOY_PROMPTS, reward=with_length, steps=1,
            batch=batch, group=group, max_new_tokens=longest, lr=1e-3,
            generator=checks.generator(salt), beta=beta, temperature=temperature,
        )  # fmt: skip
    return gradient, want, got[0], weights_of(model) - before


gradient, want, got, moved = first_step(30, 3, 5, 4, 1.0, 0.0)
for key, value in want.items():
    checks.close(got[key], value, rtol=1e-4, atol=1e-5, what=f"{key} of the first step")
# Adam's first step is lr against the sign of the gradient, wherever the gradient is not tiny.
clear = gradient.abs() > 0.02 * gradient.abs().max()
agree = float((moved[clear].sign() == -gradient[clear].sign()).double().mean())
assert agree > 0.97, (
    f"the first step goes against the gradient of GRPO's loss in {agree:.0%} of the larger "
    f"coordinates: all of them should{' (the sign is the opposite)' if agree < 0.03 else ''}"
)
### BEGIN HIDDEN TESTS
for salt, batch, group, longest, temperature, beta in [
    (31, 2, 4, 3, 0.6, 0.0),
    (32, 6, 3, 5, 1.5, 0.0),
    (33, 1, 6, 4, 1.0, 400.0),
    (34, 4, 2, 1, 0.8, 30.0),
]:
    gradient, want, got, moved = first_step(salt, batch, group, longest, temperature, beta)
    for key, value in want.items():
        checks.close(
            got[key], value, rtol=1e-4, atol=1e-5, what=f"{key} at temperature {temperature}"
        )
    clear = gradient.abs() > 0.02 * gradient.abs().max()
    agree = float((moved[clear].sign() == -gradient[clear].sign()).double().mean())
    assert agree > 0.97, (
        f"at temperature {temperature} and beta {beta} the step opposes the loss's gradient in "
        f"{agree:.0%} of the larger coordinates"
    )
    checks.close(
        moved[clear].abs(),
        torch.full_like(moved[clear], 1e-3),
        rtol=0.05,
        what="the step's size, lr",
    )
### END HIDDEN TESTS

# %% check="grpo_train" points=2
model = toy(40)
assert (
    grpo_train(
        model,
        None,
        TOY_PROMPTS,
        next_in_circle,
        steps=0,
        generator=checks.generator(41),
        **TOY_SETTINGS,
    )
    == []
), "no steps have no records"
checks.raises(
    ValueError, grpo_train, model, None, TOY_PROMPTS, next_in_circle,
    steps=1, generator=checks.generator(41), beta=0.1, **TOY_SETTINGS,
)  # fmt: skip
checks.close(weights_of(model), weights_of(toy(40)), atol=0.0, what="the untouched model")


### BEGIN HIDDEN TESTS
# Several updates a batch: weights go further, samples are drawn once, and the fence holds. Prompts
# are asked for by their own numbers, and the generator decides alone.
def run(updates: int, salt: int = 42, seed: int = 0, lr: float = 0.02):
    seen = []

    def noting(number: int, answer: list[int]) -> float:
        seen.append((number, tuple(answer)))
        return next_in_circle(number, answer)

    torch.manual_seed(seed)
    model = toy(43).train()
    record = grpo_train(
        model, None, TOY_PROMPTS, noting, steps=3, batch=2, group=4, max_new_tokens=2, lr=lr,
        generator=checks.generator(salt), updates=updates,
    )  # fmt: skip
    assert model.training, "the model was in training mode before, and is not after"
    return seen, weights_of(model), record


once, few, many = run(1), run(3), run(3, seed=9)
assert len(once[0]) == len(few[0]) == 24, "3 steps of 2 prompts and 4 answers have 24 rewards"
assert once[0][:8] == few[0][:8], "the first batch does not depend on the number of updates"
apart = "two runs with generators of one seed differ: is everything drawn from `generator`?"
assert few[0] == many[0], apart
assert torch.equal(few[1], many[1]), apart
assert run(1, salt=44)[0] != once[0], "another generator draws the same"
assert len({number for number, _ in once[0][:8]}) == 2, "the first step has 2 different prompts"


# The whole run done again: weights after some steps of several updates, in float64.
def again(salt, steps, updates, lr, beta, temperature, fresh=False, chained=False, free=False):
    """(the way of the weights, how near a ratio came to the fence) in the same run, its loss and
    its optimizer written out. The last arguments make mistakes: an optimizer made anew, ratios to
    the last update, no clipping of the norm.
    """
    model, reference, g = toy(salt).double(), toy(salt + 1).double(), checks.generator(salt)
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
    origin, count, margin = weights_of(model), 0, math.inf
    for _ in range(steps):
        picks = torch.randperm(6, generator=g)[:3].tolist()
        rolled = rollout(model, [TOY_PROMPTS[i] for i in picks], 4, 3, temperature, g, 0)
        r = torch.tensor([with_length(picks[n // 4], a) for n, a in enumerate(rolled.answers)])
        r = r.double().reshape(3, 4)
        a = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).reshape(-1, 1)
        a, m = a.masked_fill((r.std(1) < 1e-9).repeat_interleave(4)[:, None], 0), rolled.mask

        def logps(net, tokens=rolled.tokens):
            x = torch.log_softmax(net(tokens)[:, :-1] / temperature, -1)
            return x.gather(-1, tokens[:, 1:, None])[..., 0]

        old, ref = logps(model).detach(), logps(reference).detach()
        if fresh:
            first, second = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
            count = 0
        for _ in range(updates):
            new = logps(model)
            rho = (new - (new.detach() if chained else old)).exp()
            clipped = torch.where(a > 0, rho.clamp(max=1.2), rho.clamp(min=0.8))
            margin = min(margin, float(((rho.detach() - 1).abs() - 0.2).abs()[m].min()))
            token = -clipped * a + beta * ((ref - new).exp() - (ref - new) - 1)
            grads = torch.autograd.grad(((token * m).sum(1) / m.sum(1)).mean(), parameters)
            norm = sum(float(x.square().sum()) for x in grads) ** 0.5
            count += 1
            with torch.no_grad():
                for i, (p, x) in enumerate(zip(parameters, grads, strict=True)):
                    x = x if free or norm < 1 else x / norm
                    first[i] = 0.9 * first[i] + 0.1 * x
                    second[i] = 0.999 * second[i] + 0.001 * x * x
                    root = (second[i] / (1 - 0.999**count)).sqrt() + 1e-8
                    p -= lr * first[i] / (1 - 0.9**count) / root
    return weights_of(model) - origin, margin


for salt, steps, updates, lr, beta, temperature in [
    (50, 2, 4, 0.01, 0.0, 1.0),
    (52, 3, 2, 0.005, 40.0, 0.8),
    (54, 4, 1, 0.02, 0.5, 1.3),
]:
    # Where a ratio stands on the fence, rounding decides its gradient: another run is taken.
    due, margin = again(salt, steps, updates, lr, beta, temperature)
    while margin < 1e-5:
        salt += 6
        due, margin = again(salt, steps, updates, lr, beta, temperature)
    model = toy(salt).double()
    grpo_train(
        model, toy(salt + 1).double(), TOY_PROMPTS, with_length, steps=steps, batch=3, group=4,
        max_new_tokens=3, lr=lr,
        generator=checks.generator(salt), beta=beta,
        temperature=temperature, updates=updates,
    )  # fmt: skip
    run_again = (salt, steps, updates, lr, beta, temperature)
    origin = weights_of(toy(salt).double())
    checks.relative_l2(
        weights_of(model) - origin,
        due,
        1e-3,
        what=f"how far {steps} steps of {updates} updates moved the weights",
        mistakes={
            "an optimizer made anew in each step": again(*run_again, fresh=True)[0],
            "the ratio to the last update": again(*run_again, chained=True)[0],
            "no clipping of the gradient's norm": again(*run_again, free=True)[0],
        },
    )
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: rewards alone {#experiment}
#
# **Question.** A model was shown examples, and gets less than half of new cases right. How far do
# rewards alone take it, without one further example?
#
# The task, in the manner of the text that `tiny` knows: after `reversed("abc") = "` it should write
# `cba"`. Three different letters of eight make 336 words; 84 are held out. It is harder than it
# looks, because the model sees tokens: `abc` is one, `bda` two, and pieces of the answer are cut
# elsewhere than those of the question.
#
# First, finetuning on examples, as in lesson 21, stopped early on purpose.

# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # the matrices are small: a second thread would cost more than it gives
model, tokenizer = models.load("tiny", device="cpu")
words = ["".join(w) for w in product("abcdefgh", repeat=3) if len(set(w)) == 3]
random.Random(0).shuffle(words)
held_out, train_words = words[:84], words[84:]
STOP = tokenizer.encode('"')[0]


def question(word: str) -> list[int]:
    return [tokenizer.eos, *tokenizer.encode(f'reversed("{word}") = "')]


def right(word: str, answer: list[int]) -> float:
    return float(tokenizer.decode(answer) == word[::-1] + '"')


def accuracy(model: nn.Module) -> float:
    """Greedy answers to the held-out words, share right."""
    answers = models.generate(model, [question(w) for w in held_out], 5, 0.0, STOP)
    return sum(map(right, held_out, answers)) / len(held_out)


def finetune(model: nn.Module, steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_RATE, weight_decay=0.0)
    for _ in range(steps):
        chosen = [train_words[i] for i in torch.randperm(len(train_words), generator=g)[:32]]
        asked = [question(w) for w in chosen]
        rows = [q + tokenizer.encode(w[::-1] + '"') for q, w in zip(asked, chosen, strict=True)]
        tokens = padded(rows)
        mask = torch.zeros(len(rows), tokens.shape[1] - 1, dtype=torch.bool)
        for m, q, row in zip(mask, asked, rows, strict=True):
            m[len(q) - 1 : len(row) - 1] = True
        loss = -response_logps(model(tokens), tokens)[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


SFT_RATE, SFT_STEPS, RL_RATE, RL_STEPS = 1e-3, 80, 3e-4, 50
untrained = accuracy(model)
finetune(model, SFT_STEPS, seed=0)
start = copy.deepcopy(model)
finetuned = accuracy(model)
print(f"held-out words right: {untrained:.0%} as shipped, {finetuned:.0%} after finetuning")

# %% [markdown]
# **Write down before you run on:** which accuracy on held-out words after 50 steps of your GRPO, 16
# words with 8 answers each? What happens to the entropy? To the length of answers? There is no KL
# in the loss: how far from the start will the policy go, in nats a token?

# %% tags=["experiment"]
record = grpo_train(
    model,
    start,
    [question(w) for w in train_words],
    lambda number, answer: right(train_words[number], answer),
    steps=RL_STEPS,
    batch=16,
    group=8,
    max_new_tokens=5,
    lr=RL_RATE,
    generator=torch.Generator().manual_seed(0),
    stop=STOP,
)
torch.set_num_threads(threads)
rewarded = accuracy(model)
answered = RL_STEPS * 16 * 8
print(f"held-out words right: {finetuned:.0%} before, {rewarded:.0%} after {answered} answers")
for word, answer in zip(
    held_out[:6],
    models.generate(model, [question(w) for w in held_out[:6]], 5, 0.0, STOP),
    strict=True,
):
    print(f"  {word} → {tokenizer.decode(answer):8s}{'' if right(word, answer) else ' wrong'}")

# %% tags=["experiment", "figure"]
# Figure: reward, starving groups, entropy, length and distance during your run
fig, axes = plot.plt.subplots(1, 4, figsize=(12.5, 3.1))
steps = list(range(1, len(record) + 1))
axes[0].plot(
    steps, [row["reward"] for row in record], color="#bbbbbb", linestyle="-", label="reward"
)
axes[0].plot(
    steps[4:-4],
    plot.smooth([row["reward"] for row in record]),
    color=plot.COLORS[0],
    linestyle="-",
    label="smoothed",
)
axes[0].plot(
    steps[4:-4],
    plot.smooth([row["informative"] for row in record]),
    color=plot.COLORS[1],
    linestyle="--",
    label="groups with\na gradient",
)
axes[0].scatter(
    [1, len(steps)],
    [finetuned, rewarded],
    color="black",
    marker="D",
    s=28,
    zorder=3,
    label="held out, greedy",
)
axes[0].set(ylim=(0, 1.02), ylabel="share")
axes[0].set_title("reward")
axes[0].legend(fontsize=7)
for ax, key, unit in zip(
    axes[1:], ("entropy", "kl", "length"), ("nats a token", "nats a token", "tokens"), strict=True
):
    ax.plot(steps, [row[key] for row in record], color=plot.COLORS[0], linestyle="-")
    ax.set(ylabel=unit)
    ax.set_title({"kl": "KL to the start (k3)"}.get(key, key))
axes[3].set_ylim(0, 5.2)
for ax in axes:
    ax.set_xlabel("step")
plot.caption(
    fig,
    f"{len(record)} steps of 128 sampled answers. Reward is what the policy got for samples at "
    f"temperature 1 on training words; diamonds are greedy answers to words that it never saw.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Rewards alone teach. No step saw a right answer that the policy had not written
# itself, and words that it was never asked do better, too. We ran five seeds. How much the examples
# had taught differed widely from seed to seed. The rewards added more than a seventh of all
# held-out words in each of them, and in each more than a quarter of these words stayed wrong.
#
# *Entropy* falls to less than half: a policy that is paid for one answer stops writing others. *The
# share of groups with a gradient* behaved differently from seed to seed. Where the start was good
# it fell; where it was poor, words that began to succeed now and then made up for those that always
# did. The share can be 0 long before every word is right: words that are always wrong teach as
# little as those that are always right.
#
# *Length* moves by less than a token, since the task fixes it: nothing here grows as R1's answers
# did.
#
# *The KL* grows without being asked for, and ends below a nat a token. On-policy gradients change
# what is sampled, and little else. Many recipes of 2025 leave the leash off, DAPO and Dr. GRPO
# among them.
#
# *Training words against held-out ones.* At the end, samples at temperature 1 earn more on training
# words than greedy answers get right on held-out ones, in each of the five seeds. 252 words are
# few, and each was asked several times: part of the gain is memory.

# %% [markdown]
# ## Key questions {#questions}
#
# Asked in interviews. Those with a number or a choice are graded, one by one.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | str]:
    """Short answers, numbers to 1 percent.

    "stretch":   one of eight answers is right (reward 1, the others 0). GRPO's advantage of the
                 right one, sample deviation, eps 0?
    "fence":     ε = 0.2, A = −1, ρ = 1.4, one token. The derivative of PPO's policy loss (which is
                 minimized) by this token's log-probability?
    "length":    average="sequence". Two answers of one batch are wrong with the same advantage,
                 before the first update; one has 1000 tokens, the other 100. A token of the long
                 one gets how many times the push on a token of the short one?
    "draws":     success rate 0.9, groups of 8, independent answers. How many groups does dynamic
                 sampling draw for each that it keeps, on average?
    "estimate":  as a loss, on tokens of the policy's own: which estimate has, on average, the
                 gradient of KL(ref‖π): "k1", "k2", "k3" or "k3_corrected"?
    "cut":       an answer is cut by the length limit after 3 tokens. All rewards are 0, the critic
                 says 0.2, 0.4, 0.5 before the tokens and 0.6 after the last; γ = λ = 1. The
                 critic's target for the first state?
    """
    ### BEGIN SOLUTION
    return {
        "stretch": (7 / 8) / math.sqrt(1 / 8),
        "fence": 1.4,
        "length": 0.1,
        "draws": 1 / (1 - 0.9**8 - 0.1**8),
        "estimate": "k3",
        "cut": 0.6,
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["stretch"]
checks.kind(answer, float, what="stretch")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2.474874,
    what="stretch",
    hint="The squares of the differences sum to 7/8, and are divided by 7",
    mistakes={"the population deviation": 2.645751, "no division": 0.875},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["fence"]
checks.kind(answer, float, what="fence")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.4,
    what="fence",
    hint="The token should become less likely and has become more likely: which term is smaller?",
    mistakes={
        "a clipped gradient": 0.0,
        "the objective's derivative": -1.4,
        "the clipped ratio": 1.2,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["length"]
checks.kind(answer, float, what="length")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.1,
    what="length",
    hint="Each answer's tokens share one weight of 1/B",
    mistakes={"the inverse": 10.0, "an average over tokens": 1.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["draws"]
checks.kind(answer, float, what="draws")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.755829,
    what="draws",
    hint="A group is useless when all are right, or none",
    mistakes={"the share that is kept": 0.569533, "groups with a right answer": 1.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["estimate"]
assert answer in ("k1", "k2", "k3", "k3_corrected"), f"yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "k3", "Run the table of six actions again, and read its last column."
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["cut"]
checks.kind(answer, float, what="cut")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.6,
    what="cut",
    hint="With γ = λ = 1 the surprises telescope; what is left of the critic at a truncation?",
    mistakes={"a termination": 0.0, "the advantage": 0.4, "one step": 0.4},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** With `updates=1`, `beta=0` and the average by sequence the value of GRPO's
# loss is 0 at every step, up to rounding. Yet the policy learns. Why, and what would you plot
# instead of the loss?

# %% [markdown] answer="zero-loss"
# Before the first update all ratios are 1, so the loss of an answer is minus its advantage, and the
# advantages of a group sum to 0 (with the average by sequence exactly; with the others up to
# lengths). The *gradient* is $-\sum_b A_b \nabla\log\pi$, which is not 0: value and gradient of a
# surrogate have nothing to do with each other. Only a KL term, or a second update on the same
# batch, makes the value move. So plot what the loss stands for: mean reward, on training and
# held-out prompts, the share of groups with differences, entropy, length, KL to the start, the
# clipped share, and the norm of the gradient, which tells a dead run from a finished one.

# %% [markdown]
# **Open question 2.** Why can GRPO do without a critic, and for which tasks would you take one
# back?

# %% [markdown] answer="critic"
# A baseline only has to be independent of the answer's own randomness and near its expected reward.
# For one prompt with one reward at the end, the mean of several answers is an unbiased estimate of
# exactly that, and language models allow what robots do not: to start again from the same state as
# often as one likes. (GRPO's mean includes the answer itself, which scales the gradient by (G −
# 1)/G; the leave-one-out baseline of lesson 22 does not.) What a group cannot do is say *which
# token* of an answer was good: all get the same advantage. With rewards on the way (tools, long
# agent runs of hundreds of steps), with prompts that can be run once only, or where answers are so
# expensive that G = 8 is too many, a critic earns its memory, since it assigns credit within one
# episode and learns from all prompts together.

# %% [markdown]
# **Open question 3.** The share of groups with a gradient falls from 0.6 to 0.1 while the reward
# rises. Name two remedies and their price.

# %% [markdown] answer="starving"
# Dynamic sampling draws until the batch is full: the gradient keeps its size, the cost of a step
# grows as 1/q, and easy prompts are silently dropped from the distribution that is trained on. A
# curriculum takes harder prompts: cheap, but somebody has to have them. Larger groups find the rare
# failure, at G times the answers for a prompt. Raising the sampling temperature makes answers
# differ again, but the policy that is trained is then that of the higher temperature. Doing nothing
# is a remedy, too, if the reward is near its maximum: a small gradient is then the right answer,
# and dividing by the deviation would magnify what is left, noise and label errors included.

# %% [markdown]
# ## References, and what to read in them
#
# - **Schulman et al. 2015**, *High-Dimensional Continuous Control Using Generalized Advantage
#   Estimation*, arXiv:1506.02438. Section 3: the telescoping sum and what γ and λ each trade.
# - **Schulman et al. 2017**, *Proximal Policy Optimization Algorithms*, arXiv:1707.06347. Section 3
#   and figure 1, which you drew. The clipped value loss is not in it; it comes from the authors'
#   code.
# - **Shao et al. 2024**, *DeepSeekMath*, arXiv:2402.03300. Section 4.1: GRPO, with k3 in the loss.
# - **DeepSeek-AI 2025**, *DeepSeek-R1*, arXiv:2501.12948. GRPO with rules as rewards; the curves of
#   growing answers.
# - **Yu et al. 2025**, *DAPO*, arXiv:2503.14476. Section 3: the upper fence, dynamic sampling, the
#   average over tokens, each with its curve.
# - **Liu et al. 2025**, *Understanding R1-Zero-Like Training*, arXiv:2503.20783. Section 3: the two
#   biases that Dr. GRPO takes out.
# - **Zheng et al. 2025**, *Group Sequence Policy Optimization*, arXiv:2507.18071. Section 4, and
#   5.1 for the tiny fences.
# - **DeepSeek-AI 2025**, *DeepSeek-V3.2*, arXiv:2512.02556. The section on scaling GRPO: the
#   corrected KL, masked sequences, and what else kept a large run stable.
# - **Tang and Munos 2025**, *On a Few Pitfalls in KL Divergence Gradient Estimation for RL*,
#   arXiv:2506.09477. The gradients of your table.
#
# In production: `GRPOTrainer._compute_loss` in Hugging Face TRL (`loss_type`,
# `importance_sampling_level`, `use_bias_correction_kl` are your switches; there the correction
# follows the level of the ratio, here it is the token's own); `verl/trainer/ppo/core_algos.py` in
# verl (`compute_gae_advantage_return`, `agg_loss`); `LigerFusedLinearGRPOFunction` in Liger-Kernel,
# which never holds all logits at once. TRL's token-level mean divides by the tokens of the whole
# generation batch over all devices, and so does DAPO's. Where rewards come from is lesson 22, the
# same goal without sampling is lesson 24, and long reasoning by these means is lesson 40.
