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
#       Losses that let a small model learn from a large one: soft labels with a temperature, the
#       two KL divergences and what lies between, stored top-k probabilities, and on-policy
#       distillation, which you hold against its true gradient by enumeration.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# A large model knows something; a small one is cheap to run. **Distillation** trains the small one,
# the student, on what the large one, the teacher, would say. It is how most small models of today
# are made, and how a model gets back what finetuning took from it.
#
# A text gives one token per position as a target: a **hard label**. A teacher gives a whole
# distribution: which other tokens would have done, and how well. That raises three questions, and
# each has more than one answer. How is the distance of two distributions measured? How much of the
# teacher's distribution must be stored? And on whose text: the data's, or the student's own?
#
# ## Core ideas
#
# **Soft labels.** A teacher's probabilities carry far more than one token's index. A temperature
# brings the small ones out, and its square keeps the gradient's size.
#
# **A KL has a direction.** KL(teacher‖student), the **forward KL**, punishes a student that leaves
# out what the teacher does. KL(student‖teacher), the **reverse KL**, punishes one that does what
# the teacher doesn't. A student too small to match its teacher ends in different places.
#
# **What is cut off still counts.** Stored teachers keep the k likeliest tokens. The rest is one
# more outcome, "anything else", with a probability of its own.
#
# **On-policy.** A student trained on good text never sees its own mistakes. So let it write, and
# let the teacher judge each token. This is reinforcement learning with a reward per token,
# $\log p_T-\log p_S$, and no reward model. The center of this lesson is what its gradient is, and
# is not.
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $z$, $z^T$ | `student`, `teacher` | logits, (batch, seq, vocab) |
# | $q$, $p$ | | the student's and the teacher's probabilities of the next token |
# | $\tau$ | `temperature` | logits are divided by it |
# | $\beta$ | `beta` | 0 is forward, 1 is reverse KL |
# | $\gamma$ | `discount` | weight of the next token's reward in this one's return |
#
# In this lesson logits are aligned with what they predict: `student[b, i]` is the distribution of
# the token `labels[b, i]`. All losses are minimized, in nats, and means over the tokens that count
# in the whole batch: PyTorch's `batchmean` divides by rows instead, so that the loss grows with
# their length.

# %%
import copy
import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from torch import Tensor, nn

IGNORE = -100  # the label of a token that does not count


def wide(x: Tensor) -> Tensor:
    """Half precision as float32; other formats as they are. For logits, before any softmax."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# %% [markdown]
# ## Soft labels and their temperature {#soft}
#
# Hinton, Vinyals and Dean train the student on a sum of two losses: cross-entropy with the true
# label, and the divergence between teacher and student when a temperature $\tau$ softens both:
#
# $$ L = \alpha\,\tau^2\, \mathrm{KL}\big(p^\tau \,\|\, q^\tau\big) + (1-\alpha)\,(-\log q_y),
# \qquad q^\tau = \operatorname{softmax}(z/\tau). $$
#
# Where does $\tau^2$ come from? The gradient of a cross-entropy by its logits is the difference of
# probabilities, and the chain rule through $z/\tau$ adds one factor:
#
# $$ \frac{\partial}{\partial z_i}\mathrm{KL}(p^\tau\|q^\tau) = \frac{1}{\tau}\,(q_i^\tau -
# p_i^\tau). $$
#
# The second factor hides in the difference. For large $\tau$, with $V$ tokens and $e^x\approx 1+x$,
# $q_i^\tau \approx \frac{1}{V}\big(1 + (z_i - \bar z)/\tau\big)$, so the difference shrinks as
# $1/\tau$, too:
#
# $$ \tau^2\,\frac{\partial}{\partial z_i}\mathrm{KL} \;\longrightarrow\;
# \frac{1}{V}\Big((z_i-\bar z) - (z^T_i-\bar z^T)\Big). $$
#
# With $\tau^2$ a high temperature no longer makes the soft part's gradient vanish next to the hard
# part's. And the limit says what such a temperature does: it matches *logits*, by least squares,
# the unlikely tokens' as much as the likely ones'. Note that the hard loss has no temperature.


# %% exercise="distillation_loss" minutes=15 difficulty=1
def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> Tensor:
    """alpha·τ²·KL(teacher‖student at temperature τ) + (1 − alpha)·cross-entropy at temperature 1.

    student, teacher: (batch, seq, vocab) logits of one dtype: float32 or float64, or bfloat16,
        which is computed with in float32 (the result is float32 then).
    labels: (batch, seq), int64, aligned with the logits. Where a label is −100 (IGNORE) the token
        counts in neither part: its logits have no influence, not even NaN, in value and gradient.
    temperature: above 0. alpha: from 0 to 1.

    Both parts are means over the tokens that count, of the whole batch; if there are none the
    result is 0, and so is its gradient. Returns a 0-dimensional tensor. Gradients flow to student
    only. Inputs are not changed.

    Example: one token, two words, student logits [0, 0], teacher logits [ln 3, 0], label 0,
    alpha 0.5. Temperature 1: ½·0.1308 + ½·0.6931 = 0.4120. Temperature 2: ½·4·0.03634 + ½·0.6931 =
    0.4193.
    """
    ### BEGIN SOLUTION
    counts = labels != IGNORE
    n = counts.sum().clamp(min=1)
    z, z_teacher = wide(student[counts]), wide(teacher[counts]).detach()
    log_q = (z / temperature).log_softmax(-1)
    log_p = (z_teacher / temperature).log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum() / n
    hard = F.cross_entropy(z, labels[counts], reduction="sum") / n
    return alpha * temperature**2 * soft + (1 - alpha) * hard
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: NaN in tokens that do not count</summary>
#
# A product with 0 keeps NaN. `student[counts]` with a bool tensor takes the tokens that count, as
# one axis: (n, vocab).
# </details>
#
# <details><summary>Hint: no token at all</summary>
#
# A mean over nothing is NaN. A sum over nothing is 0, and divided by `max(n, 1)` it stays 0.
# </details>


# %% tags=["support"]
# Support: divergences by plain loops in float64
def softmax64(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def kl64(p: np.ndarray, q: np.ndarray) -> float:
    """Sum of p·log(p/q), in nats; an outcome with p = 0 adds nothing."""
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True) if a > 0)


def mean_over(student: Tensor, teacher: Tensor, mask: Tensor, per_token, tau: float = 1.0) -> float:
    """The mean of per_token(q, p) over the True tokens, by loops."""
    found = [
        per_token(softmax64(s.detach().double().numpy() / tau), softmax64(t.double().numpy() / tau))
        for s, t, m in zip(
            student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), strict=True
        )
        if m
    ]
    return sum(found) / max(len(found), 1)


def logits_pair(
    g: torch.Generator, batch: int, seq: int, vocab: int, dtype=torch.float64, scale: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, mask): rows of unequal length, on the right side and on the left."""
    student = checks.randn(batch, seq, vocab, generator=g, dtype=dtype, scale=scale)
    teacher = checks.randn(batch, seq, vocab, generator=g, dtype=dtype, scale=scale)
    mask = torch.rand(batch, seq, generator=g) < 0.6
    mask[0, 0] = True
    if batch > 1 and seq > 1:
        mask[-1], mask[0] = False, True
        mask[-1, -1] = True  # 1 token in one row, all in another
    return student, teacher, mask


def no_influence(loss: Tensor, student: Tensor, counts: Tensor) -> None:
    """The gradient is finite, and 0 at tokens that do not count, whose logits are NaN."""
    assert loss.requires_grad, "no gradient reaches the student: the result has no graph"
    (slope,) = torch.autograd.grad(loss, student)
    assert not slope[~counts].any(), (
        "the gradient is not 0 at tokens that do not count, where the logits are NaN: hide such "
        "logits before the softmax; a product of 0 and NaN is NaN, in the gradient, too"
    )
    assert torch.isfinite(slope).all(), "the gradient is not finite at tokens that count"


def log64(x: Tensor) -> Tensor:
    """Log-probabilities by the definition, in float64."""
    x = x.double()
    return x - x.exp().sum(-1, keepdim=True).log()


# %% check="distillation_loss" points=2
z = torch.zeros(1, 1, 2, dtype=torch.float64)
z_teacher = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
label = torch.tensor([[0]])
for tau, soft in [(1.0, 0.1308121), (2.0, 4 * 0.03634078)]:
    checks.close(
        distillation_loss(z, z_teacher, label, tau, 0.5),
        0.5 * soft + 0.5 * math.log(2),
        rtol=1e-5,
        what=f"the loss of the example at temperature {tau:g}",
        mistakes={
            "no τ²": 0.5 * soft / tau**2 + 0.5 * math.log(2),
            "τ in place of τ²": 0.5 * soft / tau + 0.5 * math.log(2),
            "KL(student‖teacher)": 0.5 * 0.1438410 + 0.5 * math.log(2),
            "exchanged weights, alpha on the hard part": 0.5 * math.log(2) + 0.25 * soft,
        },
    )
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for batch, seq, vocab, tau, alpha in [
    (3, 5, 7, 2.0, 0.3),
    (2, 4, 3, 0.5, 0.8),
    (1, 1, 5, 3.0, 1.0),
    (2, 6, 4, 1.5, 0.0),
]:
    for dtype in (torch.float64, torch.float32):
        s, t, mask = logits_pair(g, batch, seq, vocab, dtype)
        labels = torch.randint(vocab, (batch, seq), generator=g).masked_fill(~mask, IGNORE)
        soft = mean_over(s, t, mask, lambda q, p: kl64(p, q), tau)
        wrong = mean_over(s, t, mask, lambda q, p: kl64(q, p), tau)
        chosen = log64(s).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        hard = float(-chosen[mask].mean())
        want = alpha * tau**2 * soft + (1 - alpha) * hard
        padded_s, padded_t = (x.masked_fill(~mask[..., None], math.nan) for x in (s, t))
        padded_s.requires_grad_()
        with checks.unchanged(student=padded_s, teacher=padded_t, labels=labels):
            got = distillation_loss(padded_s, padded_t, labels, tau, alpha)
        checks.close(
            got,
            torch.tensor(want, dtype=dtype),
            what=f"the loss of {batch} × {seq} tokens, τ {tau:g}, alpha {alpha:g}",
            dtype=dtype,
            rtol=1e-9 if dtype == torch.float64 else 2e-5,
            atol=1e-15 if dtype == torch.float64 else 1e-6,  # logarithms that nearly cancel
            mistakes={
                "KL(student‖teacher)": alpha * tau**2 * wrong + (1 - alpha) * hard,
                "alpha on the hard part": (1 - alpha) * tau**2 * soft + alpha * hard,
                "a sum that is divided by rows": want * float(mask.sum()) / batch,
                "a sum that is divided by all tokens": want * float(mask.sum()) / mask.numel(),
            },
        )
        no_influence(got, padded_s, mask)
# The gradient at a high temperature is that of least squares between centered logits, over V.
s, t, mask = logits_pair(g, 2, 3, 6)
s.requires_grad_()
t.requires_grad_()
labels = torch.zeros(2, 3, dtype=torch.int64).masked_fill(~mask, IGNORE)
loss = distillation_loss(s, t, labels, 1e5, 1.0)
loss.backward()
assert t.grad is None or not t.grad.any(), "the teacher is constant: no gradient reaches it"
centered = (s - t).detach() - (s - t).detach().mean(-1, keepdim=True)
checks.close(
    s.grad,
    centered.masked_fill(~mask[..., None], 0) / 6 / mask.sum(),
    rtol=1e-3,
    what="the gradient at temperature 100,000",
    hint="See the limit above the exercise",
)
### END HIDDEN TESTS

# %% check="distillation_loss" points=1
big = torch.tensor([[[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]]])
same = distillation_loss(big, big.clone(), torch.tensor([[0, 1]]), 2.0, 1.0)
checks.close(same, 0.0, atol=1e-6, what="the soft loss of a student that equals its teacher")
### BEGIN HIDDEN TESTS
g = checks.generator(2)
none = torch.full((2, 3), IGNORE)
s = torch.full((2, 3, 4), math.nan, requires_grad=True)
loss = distillation_loss(s, checks.randn(2, 3, 4, generator=g), none, 2.0, 0.4)
checks.close(loss, 0.0, what="the loss where no token counts")
loss.backward()
assert not s.grad.any(), "where no token counts the gradient is 0"
extreme = torch.tensor([[[1000.0, 0.0], [0.0, 1000.0]]], requires_grad=True)
loss = distillation_loss(extreme, torch.zeros(1, 2, 2), torch.tensor([[1, IGNORE]]), 1.0, 0.5)
checks.close(loss, 0.5 * (500 - math.log(2)) + 500, rtol=1e-5, what="logits of 1000")
(slope,) = torch.autograd.grad(loss, extreme)
checks.close(slope, torch.tensor([[[0.75, -0.75], [0.0, 0.0]]]), what="the gradient there")
s, t, mask = logits_pair(g, 2, 5, 9, torch.float32, scale=6.0)
labels = torch.randint(9, (2, 5), generator=g)
s, t = s.bfloat16(), t.bfloat16()
checks.close(
    distillation_loss(s, t, labels, 3.0, 0.5),  # a quotient by 3 would be rounded
    distillation_loss(s.double(), t.double(), labels, 3.0, 0.5).float(),
    dtype=torch.float32,
    rtol=2e-5,
    what="the loss of bfloat16 logits",
)
s, t = (checks.randn(9, 5, 2, generator=g, dtype=torch.float64).permute(2, 1, 0) for _ in range(2))
checks.gradients(
    lambda x: distillation_loss(x, t, labels, 3.0, 0.7),
    lambda x: (
        0.7 * 9 * ((log64(t / 3).exp() * (log64(t / 3) - log64(x / 3))).sum() / 10)
        - 0.3 * log64(x).gather(-1, labels[..., None]).mean()
    ),
    s,
    names=["student"],
)
### END HIDDEN TESTS

# %% [markdown]
# ## The two directions {#directions}
#
# $$ \text{forward: } \mathrm{KL}(p\|q) = \sum_v p_v \log\frac{p_v}{q_v}, \qquad
# \text{reverse: } \mathrm{KL}(q\|p) = \sum_v q_v \log\frac{q_v}{p_v}. $$
#
# "Forward" always means that the expectation is the teacher's. Where the teacher has mass and the
# student none, $\log(p/q)$ is huge: forward KL makes the student *cover*. Where the student has
# mass and the teacher none, $\log(q/p)$ is huge: reverse KL makes it *retreat*, and one mode of two
# will do.
#
# The gradients tell the same. For the forward KL it is $q_i - p_i$, as for any cross-entropy. For
# the reverse KL, with $\partial q_v/\partial z_i = q_v(\mathbb{1}[v=i]-q_i)$,
#
# $$ \frac{\partial}{\partial z_i} \sum_v q_v\log\frac{q_v}{p_v}
# = \sum_v \frac{\partial q_v}{\partial z_i}\Big(\log\frac{q_v}{p_v}+1\Big)
# = q_i\Big(\log\frac{q_i}{p_i} - \mathrm{KL}(q\|p)\Big). $$
#
# The +1 drops out because probabilities keep their sum. The factor $q_i$ in front matters: a token
# that the student never says gets no gradient, however much the teacher likes it.


# %% exercise="token_kl" minutes=12 difficulty=1
def token_kl(student: Tensor, teacher: Tensor, mask: Tensor, reverse: bool = False) -> Tensor:
    """Mean KL per token: KL(teacher‖student), or with reverse=True KL(student‖teacher).

    student, teacher: (batch, seq, vocab) logits of one dtype: float32 or float64, or bfloat16,
        which is computed with in float32 (the result is float32 then).
    mask: (batch, seq), bool. Tokens where it is False have no influence, not even NaN, in value and
        gradient. The mean is over the True tokens of the whole batch; 0 if there are none.

    Logits up to ±1e30 give a finite result. Returns a 0-dimensional tensor. Gradients flow to
    student only. Inputs are not changed.

    Example: student logits [0, 0], teacher logits [ln 3, 0]: forward 0.1308, reverse 0.1438.
    """
    ### BEGIN SOLUTION
    log_q = wide(student[mask]).log_softmax(-1)
    log_p = wide(teacher[mask]).detach().log_softmax(-1)
    if reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: infinite at logits of 1000</summary>
#
# `softmax(...).log()` gives −∞ where the probability rounds to 0. `log_softmax` does not.
# </details>

# %% check="token_kl" points=1
z = torch.zeros(1, 1, 2, dtype=torch.float64)
z_teacher = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
one = torch.ones(1, 1, dtype=torch.bool)
forward, backward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(4 / 3)
checks.close(
    token_kl(z, z_teacher, one),
    forward,
    what="the forward KL of the example",
    mistakes={"the reverse KL": backward, "the opposite sign": -forward},
)
checks.close(
    token_kl(z, z_teacher, one, reverse=True),
    backward,
    what="the reverse KL of the example",
    mistakes={"the forward KL": forward, "the opposite sign": -backward},
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for batch, seq, vocab in [(3, 4, 6), (1, 1, 2), (2, 7, 5), (4, 2, 1)]:
    for dtype in (torch.float64, torch.float32):
        s, t, mask = logits_pair(g, batch, seq, vocab, dtype)
        for reverse in (False, True):
            want = mean_over(
                s, t, mask, (lambda q, p: kl64(q, p)) if reverse else (lambda q, p: kl64(p, q))
            )
            padded = [x.masked_fill(~mask[..., None], math.nan) for x in (s, t)]
            padded[0].requires_grad_()
            with checks.unchanged(student=padded[0], teacher=padded[1], mask=mask):
                got = token_kl(*padded, mask, reverse)
            checks.close(
                got,
                torch.tensor(want, dtype=dtype),
                what=f"{'reverse' if reverse else 'forward'} KL of {batch} × {seq} tokens",
                dtype=dtype,
                rtol=1e-9 if dtype == torch.float64 else 1e-5,
                atol=1e-12 if dtype == torch.float64 else 1e-6,
                mistakes={
                    "batchmean: a sum divided by rows": want * float(mask.sum()) / batch,
                    "a sum divided by all tokens": want * float(mask.sum()) / mask.numel(),
                    "a mean over the vocabulary": want / vocab,
                }
                if vocab > 1
                else {},
            )
            no_influence(got, padded[0], mask)
### END HIDDEN TESTS

# %% check="token_kl" points=1
# The gradients, as derived above.
z = torch.tensor([[[1.0, 0.0, -1.0]]], dtype=torch.float64, requires_grad=True)
z_teacher = torch.tensor([[[0.0, 0.5, 0.0]]], dtype=torch.float64)
(slope,) = torch.autograd.grad(token_kl(z, z_teacher, torch.ones(1, 1, dtype=torch.bool)), z)
checks.close(
    slope, z.detach().softmax(-1) - z_teacher.softmax(-1), what="the gradient of the forward KL"
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
s, t, mask = logits_pair(g, 3, 5, 6)
s, t = s.transpose(0, 1).contiguous().transpose(0, 1), t.flip(-1).flip(-1)
s.requires_grad_()
t.requires_grad_()
q, p = s.detach().softmax(-1), t.detach().softmax(-1)
kl = (q * (q / p).log()).sum(-1, keepdim=True)
for reverse, want in [(False, q - p), (True, q * ((q / p).log() - kl))]:
    padded = s.masked_fill(~mask[..., None], math.nan)
    loss = token_kl(padded, t, mask, reverse)
    slopes = torch.autograd.grad(loss, [s, t], allow_unused=True)
    direction = "reverse" if reverse else "forward"
    checks.close(
        slopes[0],
        want.masked_fill(~mask[..., None], 0) / mask.sum(),
        what=f"the gradient of the {direction} KL",
    )
    assert slopes[1] is None or not slopes[1].any(), "the teacher is constant: no gradient"
    none = token_kl(padded, t, mask & False, reverse)
    checks.close(none, torch.zeros((), dtype=torch.float64), what=f"{direction} KL of no token")
    extreme = torch.tensor([[[1e4, 0.0, -1e4]]])
    flat = torch.zeros(1, 1, 3)
    both = (flat, extreme) if reverse else (extreme, flat)
    checks.close(
        token_kl(*both, torch.ones(1, 1, dtype=torch.bool), reverse),
        1e4 - math.log(3),
        rtol=1e-5,
        what=f"{direction} KL at logits of 10,000",
    )
    checks.close(
        token_kl(*both[::-1], torch.ones(1, 1, dtype=torch.bool), reverse),
        math.log(3),
        rtol=1e-5,
        what=f"{direction} KL at logits of 10,000, the other way",
    )
    half = [x.detach().bfloat16() for x in (s, t)]
    checks.close(
        token_kl(*half, mask, reverse),
        token_kl(half[0].double(), half[1].double(), mask, reverse).float(),
        dtype=torch.float32,
        rtol=2e-5,
        what=f"{direction} KL of bfloat16 logits",
    )
### END HIDDEN TESTS

# %% [markdown]
# ## Between the two: the generalized JSD {#jsd}
#
# GKD (Agarwal et al.) puts a parameter between the two, with the mixture $m=\beta p+(1-\beta)q$:
#
# $$ D_\beta = \beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m). $$
#
# It is bounded, because $m$ has mass wherever $p$ or $q$ has: at most $\log 2$ at $\beta=½$. Now
# the step people skip: what happens at the ends? At $\beta=0$ the mixture *is* $q$, and both terms
# vanish. For small $\beta$ the first term is $\beta\,\mathrm{KL}(p\|q)$ to first order, and the
# second is of order $\beta^2$ (a KL near its zero is quadratic), so
#
# $$ \frac{D_\beta}{\beta}\to\mathrm{KL}(p\|q) \ (\beta\to0), \qquad
# \frac{D_\beta}{1-\beta}\to\mathrm{KL}(q\|p) \ (\beta\to1). $$
#
# It points in the right direction at both ends, with a size that goes to 0. Libraries such as TRL
# and Liger therefore special-case β = 0 as the forward and β = 1 as the reverse KL. Their loss
# *jumps* there: where the KL is small, β = 0.01 has a hundredth of the loss at β = 0. Your function
# takes the same convention, so know it when you sweep β. (One thing to be calm about: the mixture
# contains the student, and yet its gradient adds up to nothing. Of both terms it is
# $-\sum_v\frac{\beta p_v+(1-\beta)q_v}{m_v}\nabla m_v=-\nabla\sum_v m_v=0$: a library that detaches
# $m$ is right.) And never test the value at β = ½ alone: exchanging student and teacher does not
# change it there.


# %% exercise="generalized_jsd" minutes=18 difficulty=2
def generalized_jsd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Mean generalized JSD per token, with the KL divergences at its ends.

    beta = 0: KL(teacher‖student). beta = 1: KL(student‖teacher). Between them
        β·KL(p‖m) + (1 − β)·KL(q‖m),  m = β·p + (1 − β)·q
    with p the teacher's and q the student's probabilities. Any other beta raises ValueError.

    student, teacher: (batch, seq, vocab) logits of one dtype: float32 or float64, or bfloat16,
        which is computed with in float32 (the result is float32 then).
    mask: (batch, seq), bool. Tokens where it is False have no influence, not even NaN, in value and
        gradient. The mean is over the True tokens of the whole batch; 0 if there are none.

    Logits up to ±1e30 give a finite result and gradient. Returns a 0-dimensional tensor.
    Gradients flow to student only. Inputs are not changed.

    Example: student logits [0, 0], teacher logits [ln 3, 0]. m is (0.525, 0.475) at beta 0.1, and
    the result 0.01183; at beta 0.9, 0.01275; at beta 0, 0.1308.
    """
    ### BEGIN SOLUTION
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is from 0 to 1, not {beta}")
    log_q = wide(student[mask]).log_softmax(-1)
    log_p = wide(teacher[mask]).detach().log_softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum() / mask.sum().clamp(min=1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the logarithm of a mixture</summary>
#
# $\log(\beta e^a + (1-\beta)e^b)$ is `torch.logaddexp(a + log β, b + log(1 − β))`. It never forms a
# probability that could round to 0.
# </details>
#
# <details><summary>Hint: right at ½ and wrong elsewhere</summary>
#
# β weighs the teacher, in two places: in the mixture, and before the teacher's divergence from it.
# </details>

# %% check="generalized_jsd" points=2
z = torch.zeros(1, 1, 2, dtype=torch.float64)
z_teacher = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
one = torch.ones(1, 1, dtype=torch.bool)
ends = {0.0: 0.1308121, 0.1: 0.01183068, 0.9: 0.01275243, 1.0: 0.1438410}
for beta, want in ends.items():
    checks.close(
        generalized_jsd(z, z_teacher, one, beta),
        want,
        rtol=1e-4,
        what=f"the result of the example at beta {beta:g}",
        mistakes={
            "exchanging student and teacher": ends[round(1 - beta, 1)],
            "the formula at its end, where it is 0": 0.0,
        },
    )


### BEGIN HIDDEN TESTS
def mixed(beta: float, mixture: float | None = None):
    """D_β of one token, with weights β and a mixture of another β where one is given."""

    def per_token(q: np.ndarray, p: np.ndarray) -> float:
        w = beta if mixture is None else mixture
        m = w * p + (1 - w) * q
        return beta * kl64(p, m) + (1 - beta) * kl64(q, m)

    return per_token


g = checks.generator(5)
for beta in (0.1, 0.9, 0.35, 0.5):
    for dtype in (torch.float64, torch.float32):
        s, t, mask = logits_pair(g, 3, 5, 6, dtype)
        want = mean_over(s, t, mask, mixed(beta))
        wrong = {
            "exchanging student and teacher": mean_over(t, s, mask, mixed(beta)),
            "a mixture with exchanged weights": mean_over(s, t, mask, mixed(beta, 1 - beta)),
            "batchmean: a sum divided by rows": want * float(mask.sum()) / 3,
            "a sum divided by all tokens": want * float(mask.sum()) / 15,
        }
        padded = [x.masked_fill(~mask[..., None], math.nan) for x in (s, t)]
        padded[0].requires_grad_()
        with checks.unchanged(student=padded[0], teacher=padded[1], mask=mask):
            got = generalized_jsd(*padded, mask, beta)
        checks.close(
            got,
            torch.tensor(want, dtype=dtype),
            what=f"generalized JSD at beta {beta:g}",
            dtype=dtype,
            rtol=1e-9 if dtype == torch.float64 else 2e-5,
            mistakes={k: v for k, v in wrong.items() if abs(v - want) > 1e-3 * want},
        )
        no_influence(got, padded[0], mask)
for beta in (-0.1, 1.01, math.nan):
    checks.raises(ValueError, generalized_jsd, s, t, mask, beta, because=f"beta is {beta}")
### END HIDDEN TESTS

# %% check="generalized_jsd" points=2
# The limits: D_β/β near 0 and D_β/(1 − β) near 1.
s = torch.tensor([[[0.5, -1.0, 0.2], [2.0, 0.0, 1.0]]], dtype=torch.float64)
t = torch.tensor([[[1.5, 0.0, -0.3], [0.0, 0.7, 0.1]]], dtype=torch.float64)
all_count = torch.ones(1, 2, dtype=torch.bool)
checks.close(
    generalized_jsd(s, t, all_count, 1e-4) / 1e-4,
    generalized_jsd(s, t, all_count, 0.0),
    rtol=2e-3,
    what="D_β/β at β = 0.0001, against β = 0",
)


### BEGIN HIDDEN TESTS
def jsd_reference(x, t, mask, beta):
    """By probabilities, in float64, for gradients."""
    q, p = (log64(y)[mask].exp() for y in (x, t))
    if beta == 0:
        each = (p * (p / q).log()).sum(-1)
    elif beta == 1:
        each = (q * (q / p).log()).sum(-1)
    else:
        m = beta * p + (1 - beta) * q
        each = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)
    return each.mean()


g = checks.generator(6)
for beta in (0.0, 0.1, 0.9, 1.0):
    s, t, mask = logits_pair(g, 3, 4, 5)
    hidden = s.masked_fill(~mask[..., None], math.nan).requires_grad_()
    no_influence(generalized_jsd(hidden, t, mask, beta), hidden, mask)
    checks.gradients(
        lambda x, t=t, mask=mask, beta=beta: generalized_jsd(x, t, mask, beta),
        lambda x, t=t, mask=mask, beta=beta: jsd_reference(x, t, mask, beta),
        s,
        names=["student"],
    )
    teacher = t.clone().requires_grad_()
    loss = generalized_jsd(s.clone().requires_grad_(), teacher, mask, beta)
    (slope,) = torch.autograd.grad(loss, [teacher], allow_unused=True)
    assert slope is None or not slope.any(), "the teacher is constant: no gradient reaches it"
    checks.close(
        generalized_jsd(hidden.detach(), t, mask & False, beta),
        torch.zeros((), dtype=torch.float64),
        what="the result where no token counts",
    )
    half = [x.bfloat16() for x in (s, t)]
    checks.close(
        generalized_jsd(*half, mask, beta),
        jsd_reference(half[0], half[1], mask, beta).float(),
        dtype=torch.float32,
        rtol=3e-5,
        what="the result of bfloat16 logits",
    )
# Two students without a common token: every bound is met, nothing overflows.
one = torch.ones(1, 1, dtype=torch.bool)
far = torch.tensor([[[500.0, -500.0, -500.0]]], requires_grad=True)
away = torch.tensor([[[-500.0, 500.0, -500.0]]])
for beta in (0.1, 0.7):
    loss = generalized_jsd(far, away, one, beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    checks.close(loss, bound, rtol=1e-5, what=f"the bound at beta {beta}, logits of 500")
    (slope,) = torch.autograd.grad(loss, far)
    assert torch.isfinite(slope).all(), "the gradient is not finite at logits of 500"
### END HIDDEN TESTS

# %% [markdown]
# ## What a student too small does {#modes}
#
# Now let a student meet a teacher that it can't match. The teacher is a mixture of two bumps on a
# grid of 121 points, which play the tokens of a vocabulary. The student is a single bump with a
# center and a width. Your loss fits it, for five values of β. Before you run it: where will the
# student sit at β = 0, and where at β = 1? How much mass does each put into the valley?

# %% tags=["experiment"]
grid = torch.linspace(-6, 6, 121)
two_bumps = torch.log(
    0.6 * torch.exp(-((grid + 2.0) ** 2) / 0.8) + 0.4 * torch.exp(-((grid - 2.0) ** 2) / 0.8) + 1e-9
)
once = torch.ones(1, 1, dtype=torch.bool)
fitted = {}
for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
    bump = torch.tensor([-1.5, -0.5], requires_grad=True)  # center, logarithm of the width
    optimizer = torch.optim.Adam([bump], lr=0.05)
    for _ in range(250):
        z = -((grid - bump[0]) ** 2) / (2 * (2 * bump[1]).exp())
        loss = generalized_jsd(z[None, None], two_bumps[None, None], once, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fitted[beta] = z.detach().softmax(-1)
    valley = float(fitted[beta][grid.abs() < 0.8].sum())
    print(
        f"β {beta:3}: center {bump[0].item():+.2f}, width {bump[1].exp().item():.2f}, "
        f"mass in the valley {valley:.1%}"
    )

# %% tags=["experiment", "figure"]
# Figure: a single bump fitted to two, by five divergences
fig, axes = plot.plt.subplots(1, 5, figsize=(11, 2.5), sharey=True)
for ax, (beta, q) in zip(axes, fitted.items(), strict=True):
    ax.fill_between(grid, two_bumps.softmax(-1), color="#cccccc", label="teacher")
    ax.plot(grid, q, color=plot.COLORS[0], label="student")
    ax.set_title({0.0: "β = 0, forward", 1.0: "β = 1, reverse"}.get(beta, f"β = {beta:g}"))
    ax.set_xlabel("grid point")
axes[0].set_ylabel("probability")
axes[0].legend(fontsize=8, loc="upper right")
plot.caption(
    fig,
    "The teacher (grey) has two modes. Forward KL covers both, with its center where the teacher "
    "says little. Reverse KL takes one mode and leaves the other. So do the β near it.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** A bump with the forward KL has the teacher's mean and variance (set the
# gradients by center and width to zero, and moments match), so its peak stands between the modes. A
# language model in that place writes fluent mixtures of two answers. The reverse KL commits to one
# mode. Which one depends on where it began, and the other is gone for good: with no mass there, the
# factor $q_i$ in its gradient is 0. In between, the JSD has both kinds of minima, and which of them
# a run finds depends on its beginning too: this one began as a narrow bump on the left. Change
# `bump` and see which β give in.
#
# ## Storing a teacher: the top k and the rest {#topk}
#
# A teacher's logits for a billion tokens of text with a vocabulary of 100,000 fill 200 terabytes at
# two bytes each. So its k likeliest tokens are stored, as pairs of log-probability and id. What
# becomes of the rest?
#
# Renormalizing the k to a sum of 1, for teacher and student, forgets how much was outside. At k = 1
# both are the certain outcome and the loss is 0, whatever the student thinks. The honest way is to
# treat the rest as one more outcome, with $p_\star = 1-\sum_{v\in K}p_v$ and $q_\star$ alike:
#
# $$ \mathrm{KL}_k = \sum_{v\in K} p_v\log\frac{p_v}{q_v} + p_\star\log\frac{p_\star}{q_\star}. $$
#
# Merging outcomes can only lose information (the log-sum inequality: $\sum a_i\log\frac{a_i}{b_i}
# \ge (\sum a_i)\log\frac{\sum a_i}{\sum b_i}$), so $\mathrm{KL}_k$ never falls as k grows (each set
# holds the one before) up to the full KL, and stays a divergence: it is zero where the student is
# right about the k. Within the tail the student is free.
#
# One thing can go wrong in numbers. $q_\star$ as $1-\sum q_v$ is 0 in float32 as soon as the
# student is sure, and its logarithm −∞. Sum what is *in* the tail instead.


# %% exercise="top_k_kl" minutes=20 difficulty=2
def top_k_kl(student: Tensor, top_logp: Tensor, top_index: Tensor, mask: Tensor) -> Tensor:
    """Mean KL(teacher‖student) per token over k + 1 outcomes: the teacher's top k, and the rest.

    student: (batch, seq, vocab) logits, float32 or float64.
    top_logp: (batch, seq, k), the teacher's log-probabilities of k tokens, 1 ≤ k ≤ vocab, finite
        where mask is True, in any floating dtype: they may have been stored in float16, and are
        computed with in the dtype of student. Their probabilities may, by rounding, add up to a
        little more than 1; the rest is 0 then, and adds nothing.
    top_index: (batch, seq, k), int64, which tokens they are: different ones, in any order, and ids
        of the vocabulary even where mask is False.
    mask: (batch, seq), bool. Tokens where it is False have no influence, not even NaN, in value and
        gradient. The mean is over the True tokens of the whole batch; 0 if there are none.

    With k = vocab there is no rest, and the result is the KL of the k outcomes. Nothing is
    renormalized. Logits up to ±1e30 give a finite result and gradient, also where the student's
    tail rounds to 0 next to 1. Returns a 0-dimensional tensor in the dtype of student. Gradients
    flow to student only. Inputs are not changed.

    Example: teacher (½, ¼, ¼), student (¼, ¼, ½), k = 1: ½·ln 2 + ½·ln(½/¾) = 0.1438; the KL over
    all three is 0.1733.
    """
    ### BEGIN SOLUTION
    log_q = student[mask].log_softmax(-1)
    log_p = top_logp[mask].detach().to(student.dtype)
    index = top_index[mask]
    loss = (log_p.exp() * (log_p - log_q.gather(-1, index))).sum()
    if index.shape[-1] < log_q.shape[-1]:
        p_rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
        log_q_rest = log_q.scatter(-1, index, -math.inf).logsumexp(-1)
        loss = loss + (torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest).sum()
    return loss / mask.sum().clamp(min=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the student's tail without a subtraction</summary>
#
# Put −∞ in the place of the k tokens (`scatter` with `top_index`) and take `logsumexp` of what is
# left.
# </details>
#
# <details><summary>Hint: 0 · log 0</summary>
#
# `torch.xlogy(x, y)` is x·log y with 0 where x is 0.
# </details>

# %% check="top_k_kl" points=2
teacher = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64)
z = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64).log()
one = torch.ones(1, 1, dtype=torch.bool)
index = torch.tensor([[[0]]])
checks.close(
    top_k_kl(z, teacher[..., :1].log(), index, one),
    0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    what="the example",
    mistakes={
        "leaving out the rest": 0.5 * math.log(2),
        "renormalizing the k": 0.0,
        "renormalizing the teacher's k only": math.log(4),
        "the KL over all tokens": 0.25 * math.log(2),
    },
)


### BEGIN HIDDEN TESTS
def buckets(x: Tensor, logp: Tensor, index: Tensor, mask: Tensor) -> float:
    """By loops: the k outcomes and the rest."""
    found = []
    for b, i in mask.nonzero().tolist():
        q, kept = softmax64(x[b, i].detach().double().numpy()), index[b, i].tolist()
        p = [math.exp(v) for v in logp[b, i].double().tolist()]
        rest = [v for j, v in enumerate(q) if j not in kept]
        other = [max(1 - sum(p), 0.0)] if rest else []
        found.append(kl64([*p, *other], [*(q[j] for j in kept), *([sum(rest)] if rest else [])]))
    return sum(found) / max(len(found), 1)


g = checks.generator(7)
for batch, seq, vocab, k in [(3, 4, 7, 3), (2, 3, 5, 1), (2, 5, 6, 5), (1, 1, 4, 4), (3, 2, 9, 9)]:
    for dtype, stored in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
    ]:
        s, t, mask = logits_pair(g, batch, seq, vocab, dtype)
        logp, index = t.log_softmax(-1).topk(k)
        shuffled = torch.randperm(k, generator=g)
        logp, index = logp[..., shuffled].to(stored), index[..., shuffled]
        want = buckets(s, logp, index, mask)
        padded = s.masked_fill(~mask[..., None], math.nan).requires_grad_()
        stored_p = logp.masked_fill(~mask[..., None], math.nan)
        with checks.unchanged(student=padded, top_logp=stored_p, top_index=index, mask=mask):
            got = top_k_kl(padded, stored_p, index, mask)
        checks.close(
            got,
            torch.tensor(want, dtype=dtype),
            what=f"k {k} of {vocab}, {stored} stored",
            dtype=dtype,
            rtol=1e-9 if dtype == torch.float64 else 3e-5,
            atol=1e-12 if dtype == torch.float64 else 2e-6,
            hint="The rest is one more outcome",
        )
        no_influence(got, padded, mask)
### END HIDDEN TESTS

# %% check="top_k_kl" points=2
# A student that is sure of the teacher's first token.
one = torch.ones(1, 1, dtype=torch.bool)
sure = torch.tensor([[[40.0, 0.0, 0.0]]])
got = top_k_kl(sure, torch.tensor([[[0.5]]]).log(), torch.tensor([[[0]]]), one)
# q* is 2·exp(−40), next to 1 nothing in float32
checks.close(
    got,
    0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(2) + 40),
    rtol=1e-4,
    what="the loss of a student whose tail is exp(−40)",
    hint="1 − 1 is 0: add up the tail itself",
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)
s, t, mask = logits_pair(g, 3, 4, 8)
whole = mean_over(s, t, mask, lambda q, p: kl64(p, q))
last = 0.0
q, p = s.softmax(-1), t.softmax(-1)
for k in range(1, 9):
    logp, index = t.log_softmax(-1).topk(k)
    leaf, teacher = s.clone().requires_grad_(), logp.clone().requires_grad_()
    loss = top_k_kl(leaf, teacher, index, mask)
    value = loss.item()
    assert value >= last - 1e-12, f"the loss grows with k; yours falls at k = {k}"
    last = value
    slope, none = torch.autograd.grad(loss, [leaf, teacher], allow_unused=True)
    assert none is None or not none.any(), "the teacher is constant: no gradient reaches it"
    kept = torch.zeros_like(s).scatter(-1, index, 1.0).bool()
    q_rest = q.masked_fill(kept, 0).sum(-1, keepdim=True)
    p_rest = p.masked_fill(kept, 0).sum(-1, keepdim=True)
    share = torch.where(kept, p, q * p_rest / q_rest.clamp(min=1e-300))
    want = (q - share).masked_fill(~mask[..., None], 0) / mask.sum()
    checks.close(slope, want, what=f"the gradient with k = {k} of 8", rtol=1e-7)
checks.close(last, whole, rtol=1e-9, what="k = vocab, against the full KL")
logp, index = t.log_softmax(-1).topk(3)
none = top_k_kl(s * math.nan, logp * math.nan, index, mask & False)
checks.close(none, torch.zeros((), dtype=torch.float64), what="the loss where no token counts")
# A sum above 1 has no rest: Σ p·log(p/q) over the k, whose gradient is q·Σp − p.
wave = torch.tensor([[[0.3, 0.1, -0.4]]], requires_grad=True)
index = torch.tensor([[[2, 0]]])
for second in (0.301, 0.31):
    over = torch.tensor([[[0.7, second]]], dtype=torch.float64).log().half()
    p, q = over.double().exp(), wave.detach().double().softmax(-1)
    assert p.sum() > 1
    loss = top_k_kl(wave, over, index, one)
    (slope,) = torch.autograd.grad(loss, wave)
    want = (p * (p.log() - q.gather(-1, index).log())).sum()
    name = f"stored probabilities that add up to {float(p.sum()):.4f}"
    checks.close(loss, want.float(), rtol=3e-5, what=f"the loss of {name}", hint="No rest then")
    want = q * p.sum() - torch.zeros_like(q).scatter(-1, index, p)
    checks.close(slope, want.float(), rtol=3e-5, atol=1e-6, what=f"the gradient of {name}")
far = torch.tensor([[[900.0, 0.0, -900.0]]], requires_grad=True)
loss = top_k_kl(far, torch.tensor([[[0.25]]]).log(), torch.tensor([[[0]]]), one)
(slope,) = torch.autograd.grad(loss, far)
checks.close(
    loss, 0.25 * math.log(0.25) + 0.75 * (math.log(0.75) + 900), rtol=1e-5, what="logits of 900"
)
checks.close(slope, torch.tensor([[[0.75, -0.75, 0.0]]]), what="the gradient there")
far = torch.tensor([[[1e6, 0.0, -1e6]]])
loss = top_k_kl(far, torch.tensor([[[0.25]]]).log(), torch.tensor([[[0]]]), one)
checks.close(loss, 0.75e6, rtol=1e-5, what="logits of a million: a tail that no constant is below")
### END HIDDEN TESTS

# %% [markdown]
# How large a k does a real teacher need? Below, `small` is the teacher and `tiny` the student, on
# held-out text. Your loss is computed for growing k, next to what is left when the k are
# renormalized. Write down the k at which nine tenths of the full KL are seen.

# %% tags=["experiment"]
TRAINING, HELD_OUT = [], []
for name, documents in (("prose", data.documentation()), ("code", data.source_code())):
    parts = data.split(data.deduplicate(documents) if name == "prose" else documents)
    for target, part in zip((TRAINING, HELD_OUT), parts, strict=True):
        target.append([text for text in part.values() if len(text) > 800])
small, tokenizer = models.load("small")
tiny, _ = models.load("tiny")
END = tokenizer.special["<|end|>"]
threads = torch.get_num_threads()
torch.set_num_threads(1)
texts = [tokenizer.encode(text[:900])[:96] for group in HELD_OUT for text in group[:6]]
tokens = torch.tensor([[tokenizer.eos, *ids] for ids in texts if len(ids) == 96])
tokens = tokens.to(profile.device)
with torch.no_grad():
    z, z_teacher = tiny(tokens), small(tokens)
counted = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
full = float(token_kl(z, z_teacher, counted))
ks, with_rest, renormalized = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), [], []
for k in ks:
    logp, index = z_teacher.log_softmax(-1).topk(k)
    with_rest.append(float(top_k_kl(z, logp, index, counted)))
    renormalized.append(float(token_kl(z.gather(-1, index), logp, counted)))
torch.set_num_threads(threads)
print(f"full KL {full:.3f} nats a token")
print("k         " + "".join(f"{k:7}" for k in ks))
print("with rest " + "".join(f"{x / full:7.0%}" for x in with_rest))
print("renormal. " + "".join(f"{x / full:7.0%}" for x in renormalized))

# %% tags=["experiment", "figure"]
# Figure: how much of the divergence the top k see
fig, ax = plot.plt.subplots(figsize=(7, 3.4))
ax.semilogx(ks, with_rest, marker="o", label="top k and the rest", base=2)
ax.semilogx(ks, renormalized, marker="s", label="top k, renormalized", base=2)
ax.axhline(full, color="#777777", linewidth=1, linestyle=":", label="all 4096 tokens")
ax.set(xlabel="k", ylabel="KL, nats a token", xticks=ks, xticklabels=[str(k) for k in ks])
ax.set_ylim(0)
ax.legend()
plot.caption(
    fig,
    "Teacher small, student tiny, held-out text. With the rest as one outcome the KL rises to the "
    "full one from below. Renormalized it begins at 0, blind to how much mass is outside.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Half of the divergence is seen with a handful of tokens and the rest as one
# outcome, because much of the disagreement is about the first choices and about how sure to be.
# The other half comes slowly: nine tenths take more than a hundred tokens. Renormalizing hides the
# part about being sure, all of it at k = 1. The unlikely tokens are also what a *high temperature*
# would teach, so a stored top k and $\tau=4$ do not go together.
#
# ## On-policy: the student writes, the teacher reads {#on-policy}
#
# A student that was trained on good text has, at inference, its own text before it. After the first
# odd token it is where training never was. The remedy is old in imitation learning: let the student
# act, and ask the expert about the states *it* reaches. In GKD the student samples a continuation
# $x$, and the loss is a divergence between the two distributions at each of its positions. With the
# reverse KL:
#
# $$ L(x) = \frac1n\sum_{t=1}^n \mathrm{KL}\big(q(\cdot|x_{<t})\,\|\,p(\cdot|x_{<t})\big). $$
#
# Gradients flow through the distributions, and not through the sampling: $x$ is data. One call of
# the teacher reads all tokens at once; it writes nothing, which makes it cheap.


# %% exercise="on_policy_loss" minutes=20 difficulty=2
def on_policy_loss(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Tensor,
    new_tokens: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One batch of GKD with the reverse KL: (loss, tokens).

    student, teacher: model(tokens) gives logits (batch, seq, vocab) of the token after each of
        `tokens` (batch, seq), int64.
    prompts: (batch, length), int64, length ≥ 1, without padding.

    tokens: (batch, length + new_tokens), int64: the prompts, then what the student writes, each
        token drawn from its softmax at temperature 1 with `generator` (on the device of prompts).
    loss: the mean, over the rows and their new tokens, of KL(student‖teacher) between both models'
        distributions of that token, given all before it, over the whole vocabulary. If new_tokens
        is 0 it is 0, with a gradient of 0. Nothing is counted at the prompt's own tokens, nor after
        the last one.

    The loss has a gradient by the student's parameters, none by the teacher's, and none through the
    sampling: tokens are data. No optimizer steps; no parameter, .grad or training mode changes, and
    the prompts stay as they are.
    """
    ### BEGIN SOLUTION
    tokens = prompts
    with torch.no_grad():
        for _ in range(new_tokens):
            probabilities = wide(student(tokens)[:, -1]).softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
        z_teacher = teacher(tokens)[:, prompts.shape[1] - 1 : -1]
    log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)
    log_p = wide(z_teacher).log_softmax(-1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1)
    return each.sum() / max(each.numel(), 1), tokens.clone()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which positions</summary>
#
# The logits at position `length − 1`, the prompt's last token, say how the first new token was
# drawn. The logits at the last position predict a token that nobody wrote.
# </details>
#
# <details><summary>Hint: gradients twice</summary>
#
# Sample under `torch.no_grad()`, then call the student once more on the finished text, with a
# graph.
# </details>


# %% tags=["support"]
# Support: a table of logits that acts as a model
class Table(nn.Module):
    """The next token's logits by position and last token: a row of a table, and nothing else."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = nn.Parameter(values)  # (positions, vocab, vocab)
        self.part = nn.Identity()  # has a training mode of its own

    def forward(self, tokens: Tensor) -> Tensor:
        return self.part(self.values[torch.arange(tokens.shape[1]), tokens])


def tables(salt: int, positions: int, vocab: int, scale: float = 1.2) -> tuple[Table, Table]:
    g = checks.generator(salt)
    return tuple(
        Table(checks.randn(positions, vocab, vocab, generator=g, dtype=torch.float64, scale=scale))
        for _ in range(2)
    )


# %% check="on_policy_loss" points=2
student, teacher = tables(20, 8, 5)
prompts = torch.tensor([[0, 1, 2], [4, 3, 3]])
loss, tokens = checks.parts(
    on_policy_loss(student, teacher, prompts, 4, checks.generator(21)), "loss", "tokens"
)
assert tuple(tokens.shape) == (2, 7), (
    f"3 tokens of the prompt and 4 new ones are 7; yours have shape {tuple(tokens.shape)}"
)
assert torch.equal(tokens[:, :3], prompts), "the tokens begin with the prompts"
log_q, log_p = (log64(m(tokens).detach()) for m in (student, teacher))
each = (log_q.exp() * (log_q - log_p)).sum(-1)
checks.close(
    loss,
    each[:, 2:6].mean(),
    what="the loss of your tokens",
    mistakes={
        "counting one position too late": each[:, 3:7].mean(),
        "counting the prompt": each[:, :6].mean(),
        "counting all positions": each.mean(),
        "a sum over tokens": each[:, 2:6].sum() / 2,
        "KL(teacher‖student)": (log_p.exp() * (log_p - log_q)).sum(-1)[:, 2:6].mean(),
    },
)
### BEGIN HIDDEN TESTS
for salt, rows, length, new in [(22, 3, 1, 3), (23, 4, 2, 1), (24, 1, 3, 5), (25, 2, 2, 0)]:
    student, teacher = tables(salt, length + new + 1, 4)
    g = checks.generator(salt + 100)
    prompts = torch.randint(4, (rows, length), generator=g)
    stale = torch.ones_like(student.values)
    student.values.grad = stale.clone()
    # Each of the modes, with a part that has the other one.
    student.train(salt % 2 == 0).part.train(salt % 2 == 1)
    teacher.train(salt < 24).part.train(salt >= 24)
    with checks.unchanged(prompts=prompts), checks.kept(student=student, teacher=teacher):
        loss, tokens = checks.parts(
            on_policy_loss(student, teacher, prompts, new, g), "loss", "tokens"
        )
    assert tokens.shape == (rows, length + new), "the shape of the tokens"
    assert torch.equal(tokens[:, :length], prompts), "the tokens begin with the prompts"
    checks.kind(tokens, Tensor, what="the tokens")
    assert tokens.dtype == torch.int64, "tokens are int64"
    # Value and gradient, from tables of the check's own.
    own = student.values.detach().clone().requires_grad_()
    where = torch.arange(length - 1, length + new - 1)
    log_q = log64(own[where, tokens[:, where]])
    log_p = log64(teacher.values.detach()[where, tokens[:, where]])
    want = (log_q.exp() * (log_q - log_p)).sum() / max(rows * new, 1)
    checks.close(loss, want.detach(), what=f"the loss of {rows} rows, {new} new tokens")
    (slope,) = torch.autograd.grad(want, own)
    student.values.grad = None
    loss.backward()
    checks.close(
        student.values.grad,
        slope,
        what="the gradient by the student's parameters",
        hint="Through the distributions at the new tokens, and not through the sampling",
    )
    assert teacher.values.grad is None, "a gradient reached the teacher"
### END HIDDEN TESTS

# %% check="on_policy_loss" points=1
# The student writes, not the teacher, and at temperature 1.
student, teacher = tables(26, 4, 3)
_, tokens = on_policy_loss(
    student, teacher, torch.zeros(2000, 1, dtype=torch.int64), 1, checks.generator(27)
)
q = student.values[0, 0].softmax(-1).detach()
checks.drawn(
    (tokens[:, 1] == 0).double(),
    mean=float(q[0]),
    what="how often token 0 is written first",
)
### BEGIN HIDDEN TESTS
checks.uses_generator(
    lambda g: on_policy_loss(student, teacher, torch.zeros(60, 1, dtype=torch.int64), 2, g)[1]
)
for salt in (28, 29):
    student, teacher = tables(salt, 4, 3)
    prompts = torch.randint(3, (4000, 1), generator=checks.generator(salt))
    _, tokens = on_policy_loss(student, teacher, prompts, 3, checks.generator(salt + 1))
    chance = student.values.detach().softmax(-1)
    for step in range(3):
        for before in range(3):
            after = tokens[tokens[:, step] == before, step + 1]
            for token in range(3):
                share = float(chance[step, before, token])
                if len(after) * min(share, 1 - share) < 100:
                    continue
                checks.drawn(
                    (after == token).double(),
                    mean=share,
                    what=f"how often {token} follows {before} at step {step}",
                    mistakes={
                        "the teacher's distribution": float(
                            teacher.values.detach().softmax(-1)[step, before, token]
                        )
                    },
                )
### END HIDDEN TESTS

# %% [markdown]
# ## A reward for every token {#reward}
#
# **On-policy distillation** is the same thing, seen from reinforcement learning: the student's own
# samples, and a reward for each of their tokens. The objective of the student as a policy is the
# divergence of whole continuations:
#
# $$ J = \mathrm{KL}(q\|p) = \mathbb{E}_{x\sim q}\Big[\sum_t \big(\log q(x_t|x_{<t}) - \log
# p(x_t|x_{<t})\big)\Big]. $$
#
# Minimizing it is maximizing an expected return, with the reward $r_t=\log p(x_t|x_{<t})-\log
# q(x_t|x_{<t})$ for each token: positive where the teacher would rather have said it than the
# student. No reward model, no verifier, no waiting for the end of the answer. Now its gradient.
# Differentiate the expectation, with $\nabla q = q\nabla\log q$, and the reward in it, whose own
# gradient has the expectation $-\mathbb{E}[\nabla\log q(x)] = -\nabla\sum_x q(x) = 0$:
#
# $$ \nabla J = -\,\mathbb{E}\Big[\sum_t \nabla\log q(x_t|x_{<t}) \sum_k r_k\Big]. $$
#
# A reward before step t is known before $x_t$ is drawn, so it multiplies an expectation of
# $\nabla\log q(x_t|x_{<t})$, which is 0. What remains is the **return-to-go** $A_t=\sum_{k\ge
# t}r_k$, the advantage with discount 1. Now set the discount to 0, as Thinking Machines do:
# $A_t=r_t$. Sum over $x_t$ for a fixed past, and you get
#
# $$ -\sum_{x_t} q\,\nabla\log q\; r_t = \sum_{x_t} \nabla q\,\log\frac{q}{p}
# = \nabla\,\mathrm{KL}\big(q(\cdot|x_{<t})\|p(\cdot|x_{<t})\big) \quad\text{with the past held
# fixed.} $$
#
# Summed over t and divided by the n tokens this is GKD's gradient. With every loss a mean over
# them:
#
# | | sees | expected gradient |
# |---|---|---|
# | `on_policy_loss` (GKD, full vocabulary) | all of $q$ and $p$ at each position | partial: the past is data |
# | reward of the sampled token, discount 0 | one number a token | the same, with more noise |
# | reward of the sampled token, discount 1 | one number a token | $\nabla J/n$, with still more noise |
#
# What the partial gradient leaves out is that $x_t$ decides where the student will be judged next.
# The true one also steers to places where agreement is easy. Often nobody wants that: an early stop
# is a fine way to avoid disagreement. That the partial gradient works well is no accident of
# tuning: if the student can match its teacher, both vanish at the same point, $q=p$.
#
# The loss is that of lesson 23 with $\rho=q/q_{\text{old}}$ and no clip: $-\rho A$, whose gradient
# at $\rho=1$ is $-A\nabla\log q$. The reward takes the log-probabilities of the policy that wrote
# the text, and is a constant.


# %% exercise="dense_reward_loss" minutes=18 difficulty=2
def dense_reward_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor, discount: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Policy loss (minimized) with the reward log p_T − log p_S of each token: (loss, advantages).

    logp, old_logp, teacher_logp: (batch, seq), log-probabilities of the sampled tokens under the
        student as it is, the student that sampled them, and the teacher; one dtype, float32 or
        float64.
    mask: (batch, seq), bool, True on the student's tokens, which are consecutive in each row, with
        any number of False before and after them (all may be False). Where it is False nothing has
        an influence, not even NaN, in results and gradient.
    discount: from 0 to 1, in rows of any length.

    reward r = teacher_logp − old_logp. advantages: (batch, seq), A_t = r_t + discount·A_{t+1}
        within the row's True tokens, 0 elsewhere; no gradient.
    loss: minus the mean of ρ·A over the True tokens of the whole batch, ρ = exp(logp − old_logp),
        unclipped; 0 if there are none; 0-dimensional, with a gradient to logp only.

    Inputs are not changed.

    Example: rewards [1, −2, 4], ρ = [1, 1, 2], discount ½: advantages [1, 0, 4], loss −3.
    """
    ### BEGIN SOLUTION
    old_logp, teacher_logp = old_logp.detach(), teacher_logp.detach()
    reward = (teacher_logp - old_logp).masked_fill(~mask, 0)
    columns, running = [], torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        running = reward[:, t] + discount * running
        columns.append(running)
    advantages = torch.stack(columns[::-1], dim=1).masked_fill(~mask, 0)
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    return -(ratio * advantages).sum() / mask.sum().clamp(min=1), advantages
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the sum from the end</summary>
#
# Begin at the last column with 0. Where the mask is False the reward is 0; before the student's
# first token the sum would go on, so hide the advantages too.
# </details>


# %% tags=["support"]
# Support: a batch of log-probabilities, and returns by their definition
def logp_batch(g: torch.Generator, batch: int, seq: int, dtype) -> list[Tensor]:
    """[logp, old_logp, teacher_logp, mask]: rows that begin and end anywhere."""
    old = -3 * torch.rand(batch, seq, generator=g, dtype=dtype) - 0.1
    near = old + 0.3 * checks.randn(batch, seq, generator=g, dtype=dtype)
    teacher = -3 * torch.rand(batch, seq, generator=g, dtype=dtype)
    start = torch.randint(0, seq, (batch, 1), generator=g)
    length = torch.randint(1, seq + 1, (batch, 1), generator=g)
    steps = torch.arange(seq)
    return [near, old, teacher, (steps >= start) & (steps < start + length)]


def returns64(old: Tensor, teacher: Tensor, mask: Tensor, discount: float) -> Tensor:
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        for k in range(t, mask.shape[1]):
            if mask[b, k]:
                out[b, t] += discount ** (k - t) * (float(teacher[b, k]) - float(old[b, k]))
    return out


# %% check="dense_reward_loss" points=2
old = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
reward = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
now = old + torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64).log()
every = torch.ones(1, 3, dtype=torch.bool)
loss, advantages = checks.parts(
    dense_reward_loss(now, old, old + reward, every, 0.5), "loss", "advantages"
)
checks.close(
    advantages,
    torch.tensor([[1.0, 0.0, 4.0]], dtype=torch.float64),
    what="the advantages of the example",
    mistakes={
        "the opposite sign": torch.tensor([[-1.0, 0.0, -4.0]], dtype=torch.float64),
        "a sum over the past": torch.tensor([[1.0, -1.5, 3.25]], dtype=torch.float64),
        "no discounted future": reward,
        "rewards with the newer student": reward - (now - old),
    },
)
checks.close(
    loss, -3.0, what="the loss of the example", mistakes={"the opposite sign": 3.0, "a sum": -9.0}
)
### BEGIN HIDDEN TESTS
g = checks.generator(40)
for batch, seq, discount in [(4, 7, 0.0), (3, 5, 1.0), (1, 1, 0.3), (5, 6, 0.7)]:
    for dtype in (torch.float64, torch.float32):
        logp, old, teacher, mask = logp_batch(g, batch, seq, dtype)
        want = returns64(old, teacher, mask, discount)
        ratio = (logp.double() - old.double()).exp()
        count = int(mask.sum())
        total = -(ratio * want).sum()
        padded = [x.masked_fill(~mask, math.nan) for x in (logp, old, teacher)]
        for x in padded:
            x.requires_grad_()
        with checks.unchanged(*padded, mask=mask):
            got = dense_reward_loss(*padded, mask, discount)
        loss, advantages = checks.parts(got, "loss", "advantages")
        loose = 1e-9 if dtype == torch.float64 else 2e-5
        checks.close(
            advantages,
            want.to(dtype),
            what=f"advantages at discount {discount:g}",
            dtype=dtype,
            rtol=loose,
        )
        assert not advantages.requires_grad, "advantages are constants"
        checks.close(
            loss,
            (total / count).to(dtype),
            what=f"the loss at discount {discount:g}",
            dtype=dtype,
            rtol=loose,
            atol=loose,
            mistakes={"a mean over all of the array": (total / mask.numel()).to(dtype)}
            if count < mask.numel()
            else {},
        )
        slopes = torch.autograd.grad(loss, padded, allow_unused=True)
        checks.close(
            slopes[0],
            (-(ratio * want) / count).to(dtype),
            what="the gradient by logp",
            rtol=loose,
        )
        for slope in slopes[1:]:
            assert slope is None or not slope.any(), "the reward is a constant: a gradient to logp"
### END HIDDEN TESTS

# %% check="dense_reward_loss" points=1
# By default there is no discounted future, and at ρ = 1 the gradient is −A, a token's share of it.
logp = torch.tensor([[-1.0, -1.0], [-0.5, -2.0]], requires_grad=True)
teacher = torch.tensor([[-2.0, -0.5], [-0.5, -1.0]])
mask = torch.tensor([[True, True], [False, True]])
loss, advantages = dense_reward_loss(logp, logp.detach(), teacher, mask)
checks.close(advantages, torch.tensor([[-1.0, 0.5], [0.0, 1.0]]), what="advantages, by default")
(slope,) = torch.autograd.grad(loss, logp)
checks.close(slope, torch.tensor([[1.0, -0.5], [0.0, -1.0]]) / 3, what="the gradient by logp")
### BEGIN HIDDEN TESTS
# The same tensor as logp and old_logp, which every first step has.
same, _ = dense_reward_loss(logp, logp, teacher, mask)
(slope,) = torch.autograd.grad(same, logp)
checks.close(
    slope,
    torch.tensor([[1.0, -0.5], [0.0, -1.0]]) / 3,
    what="the gradient where logp is also old_logp",
    hint="old_logp is a constant",
)
for discount in (0.0, 0.5):
    gone = [x.detach() * math.nan for x in (logp, logp, teacher)]
    none, advantages = dense_reward_loss(*gone, mask & False, discount)
    checks.close(none, 0.0, what="the loss without tokens")
    assert not advantages.any(), "advantages without tokens are 0"
g = checks.generator(41)
# Long rows, in which powers of the discount round to 0. A reward of 1: a geometric sum.
mask = torch.ones(2, 400, dtype=torch.bool)
mask[:, :3] = mask[0, 390:] = False
ahead = mask.flip(1).cumsum(1).flip(1).double()  # tokens from here to the end
for discount in (0.01, 0.5, 0.99):
    for dtype in (torch.float64, torch.float32):
        zero = torch.zeros(2, 400, dtype=dtype)
        want = ((1 - discount**ahead) / (1 - discount)).masked_fill(~mask, 0)
        loss, advantages = dense_reward_loss(zero, zero, zero + 1, mask, discount)
        loose = 1e-9 if dtype == torch.float64 else 1e-4
        what = f"of 400 columns, discount {discount:g}"
        checks.close(advantages, want.to(dtype), rtol=loose, what=f"advantages {what}")
        checks.close(loss, -want.to(dtype)[mask].mean(), rtol=loose, what=f"the loss {what}")
logp, old, teacher, mask = (x.T.contiguous().T for x in logp_batch(g, 6, 4, torch.float64))
got = dense_reward_loss(logp, old, teacher, mask, 0.9)[1]
checks.close(got, returns64(old, teacher, mask, 0.9), what="advantages of another layout")
row = dense_reward_loss(logp[2:3], old[2:3], teacher[2:3], mask[2:3], 0.9)[1]
checks.close(row, got[2:3], what="a row by itself")
### END HIDDEN TESTS

# %% [markdown]
# What does such a reward look like? `tiny` goes on from a prompt, and `small` reads it. Your
# function gives the advantage of each token with discount 0.

# %% tags=["experiment"]
prompt = [tokenizer.eos, *tokenizer.encode("The sorted() function returns a new list")]
source = torch.Generator(profile.device).manual_seed(3)
(reply,) = models.generate(tiny, [prompt], 48, 1.0, None, source)
ids = torch.tensor([prompt + reply], device=profile.device)
with torch.no_grad():
    logp, teacher_logp = (
        model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        for model in (tiny, small)
    )
written = torch.arange(ids.shape[1] - 1, device=ids.device)[None] >= len(prompt) - 1
_, rewards = dense_reward_loss(logp, logp, teacher_logp, written)
rewards = rewards[0, len(prompt) - 1 :].tolist()
pieces = [tokenizer.decode([token]) for token in reply]
order = sorted(range(len(reply)), key=lambda i: rewards[i])
print(f"mean reward {sum(rewards) / len(rewards):+.2f} nats a token")
print("blamed: ", ", ".join(f"{pieces[i]!r} {rewards[i]:+.1f}" for i in order[:4]))
print("praised:", ", ".join(f"{pieces[i]!r} {rewards[i]:+.1f}" for i in order[:-4:-1]))

# %% tags=["experiment", "figure"]
# Figure: what tiny wrote, colored by the reward of each token
fig, ax = plot.plt.subplots(figsize=(11, 1.7))
norm = plot.plt.Normalize(-4, 4)
colors = plot.plt.get_cmap("PuOr")
column, line = 0, 0
for piece, value in zip(pieces, rewards, strict=True):
    shown = piece.rstrip(" ").replace("\n", "⏎").replace("$", r"\$") or "␣"
    if column + len(shown) > 108:
        column, line = 0, line + 1
    ax.text(
        column,
        -line,
        shown,
        family="DejaVu Sans Mono",
        fontsize=9,
        va="center",
        bbox={"facecolor": colors(norm(value)), "edgecolor": "none", "pad": 2},
        color="white" if abs(value) > 2.6 else "black",
    )
    column += len(shown) + 0.9
ax.set(xlim=(0, 110), ylim=(-line - 0.7, 0.7))
ax.axis("off")
bar = fig.colorbar(plot.plt.cm.ScalarMappable(norm, colors), ax=ax, shrink=0.9)
bar.set_label("reward, nats")
plot.caption(
    fig,
    "Dark brown: the student said it and the teacher would not have. Purple: the teacher would "
    "have said it rather than the student. Blame outweighs praise: the expected reward is minus a "
    "KL, and so never above 0.",
)
plot.plt.show()

# %% [markdown]
# ## By enumeration: which gradient is it? {#enumeration}
#
# An expectation over continuations can be computed exactly where there are few of them. Take two
# words and three steps: eight continuations. The student is a table of logits by step and previous
# word. You compute the gradient of $J$, and the expected gradient of your policy loss, by going
# through all of them. No sampling, no noise: either they are equal or they are not.


# %% exercise="enumerated_gradients" minutes=25 difficulty=3
def enumerated_gradients(
    student: Tensor, teacher: Tensor, discount: float
) -> tuple[Tensor, Tensor]:
    """(true gradient of the sequence KL, expected gradient of the policy loss).

    student, teacher: (steps, vocab, vocab), float32 or float64 logits: [t, a, b] for word b at step
        t after word a. Before step 0 stands word 0, so the other rows of step 0 have no influence.
    A continuation x is one word for each step; there are vocab ** steps of them, with probability
    q(x) = product over t of q_t(x_t | x_{t−1}) under the student, p(x) under the teacher.

    true: the gradient by `student` of J = Σ_x q(x)·(log q(x) − log p(x)).
    policy: Σ_x q(x)·g(x), where g(x) is the gradient by `student` of
        −Σ_t A_t·log q_t(x_t | x_{t−1}), with A_t = r_t + discount·A_{t+1} constant,
        r_t = log p_t(x_t | x_{t−1}) − log q_t(x_t | x_{t−1}). A sum over steps, not a mean.

    Both have the shape and dtype of student, and no graph; under torch.no_grad() they are the same.
    student and teacher are not changed, their .grad included.

    Example: steps 1, vocab 2, student zeros, teacher[0, 0] = [ln 3, 0]: both gradients are
    [−0.2747, 0.2747] in row 0, and 0 in row 1.
    """
    ### BEGIN SOLUTION
    steps, vocab, _ = student.shape
    z = student.detach().clone().requires_grad_()
    with torch.enable_grad():
        log_q, log_p = z.log_softmax(-1), teacher.detach().log_softmax(-1)
        exact, surrogate = torch.zeros_like(z).sum(), torch.zeros_like(z).sum()
        for words in itertools.product(range(vocab), repeat=steps):
            t, before = list(range(steps)), [0, *words[:-1]]
            mine, theirs = log_q[t, before, list(words)], log_p[t, before, list(words)]
            chance = mine.sum().exp()
            exact = exact + chance * (mine.sum() - theirs.sum())
            advantage = (theirs - mine).detach()
            for i in reversed(range(steps - 1)):
                advantage[i] += discount * advantage[i + 1]
            surrogate = surrogate - chance.detach() * (advantage * mine).sum()
        (true,) = torch.autograd.grad(exact, z, retain_graph=True)
        (policy,) = torch.autograd.grad(surrogate, z)
    return true, policy
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two scalars, two gradients</summary>
#
# Sum up two scalars over all continuations: in one q(x) has a graph, in the other it is a weight
# and detached, as is $A$. `torch.autograd.grad` gives each gradient without touching `.grad`.
# </details>
#
# <details><summary>Hint: all continuations</summary>
#
# `itertools.product(range(vocab), repeat=steps)`. The word before step t is `(0, *words)[t]`.
# </details>


# %% tags=["support"]
# Support: both gradients by the chain rule over steps, without going through continuations
def chained(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of J, gradient with the past held fixed), in float64."""
    z = student.detach().double().clone().requires_grad_()
    log_q, log_p = log64(z), log64(teacher.detach())
    reach = torch.zeros(z.shape[1], dtype=torch.float64)
    reach[0] = 1
    whole, fixed = 0.0, 0.0
    for t in range(z.shape[0]):
        each = (log_q[t].exp() * (log_q[t] - log_p[t])).sum(-1)
        whole = whole + reach @ each
        fixed = fixed + reach.detach() @ each
        reach = reach @ log_q[t].exp()
    return tuple(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (whole, fixed))


# %% check="enumerated_gradients" points=2
z = torch.zeros(1, 2, 2, dtype=torch.float64)
z_teacher = torch.tensor([[[math.log(3), 0.0], [0.0, 5.0]]], dtype=torch.float64)
true, policy = checks.parts(enumerated_gradients(z, z_teacher, 0.0), "true", "policy")
row = 0.5 * (math.log(2 / 3) - 0.5 * math.log(4 / 3))
want = torch.tensor([[[row, -row], [0.0, 0.0]]], dtype=torch.float64)
checks.close(true, want, what="the true gradient of the example", mistakes={"the sign": -want})
checks.close(
    policy, want, what="the policy's gradient of the example", mistakes={"the sign": -want}
)
### BEGIN HIDDEN TESTS
g = checks.generator(50)
for steps, vocab in [(3, 2), (2, 3), (1, 4), (4, 2), (3, 1)]:
    for dtype in (torch.float64, torch.float32):
        s, t = (
            checks.randn(steps, vocab, vocab, generator=g, dtype=dtype, scale=1.3) for _ in range(2)
        )
        whole, fixed = (x.to(dtype) for x in chained(s, t))
        loose = 1e-9 if dtype == torch.float64 else 1e-4
        s.requires_grad_()
        s.grad = torch.ones_like(s)
        for discount, expected, name in [
            (1.0, whole, "return-to-go, discount 1"),
            (0.0, fixed, "discount 0"),
        ]:
            with checks.unchanged(student=s, teacher=t):
                got = checks.parts(enumerated_gradients(s, t, discount), "true", "policy")
            same = s.grad is not None and torch.equal(s.grad, torch.ones_like(s))
            assert same, "the .grad of student was changed"
            small_noise = 1e-12 if dtype == torch.float64 else 1e-5
            mistakes = {"the true gradient": whole} if expected is fixed else {}
            for value, right, what, wrong in [
                (got[0], whole, "the true gradient", {"one with the past held fixed": fixed}),
                (got[1], expected, f"the policy's gradient, {name}", mistakes),
            ]:
                limit = max(loose * float(right.abs().max()), small_noise)
                checks.close(
                    value,
                    right,
                    what=f"{what}, {vocab} words × {steps} steps",
                    dtype=dtype,
                    rtol=0.0,
                    atol=limit,
                    mistakes=wrong if float((whole - fixed).abs().max()) > 20 * limit else {},
                )
                assert not value.requires_grad, f"{what} carries no graph"
### END HIDDEN TESTS

# %% check="enumerated_gradients" points=1
# In between, the policy's gradient is a polynomial in the discount: at ½ with two steps, the mean.
z = torch.tensor([[[0.3, -0.4], [0.0, 0.0]], [[1.0, 0.0], [-0.5, 0.7]]], dtype=torch.float64)
z_teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.4, 0.0]]], dtype=torch.float64)
ends = [enumerated_gradients(z, z_teacher, d)[1] for d in (0.0, 0.5, 1.0)]
checks.close(ends[1], (ends[0] + ends[2]) / 2, what="two steps, discount ½", atol=1e-12)
assert (ends[0] - ends[2]).abs().max() > 1e-3, "with two steps the discount has an influence"


### BEGIN HIDDEN TESTS
def by_returns(student: Tensor, teacher: Tensor, discount: float) -> Tensor:
    """The policy's gradient, from the expected return after each word, in float64."""
    log_q, log_p = log64(student.detach()), log64(teacher.detach())
    q, out = log_q.exp(), torch.zeros(student.shape, dtype=torch.float64)
    later = torch.zeros(q.shape[1], dtype=torch.float64)
    for t in reversed(range(len(q))):
        worth = log_p[t] - log_q[t] + discount * later  # of each word, after each word
        later = (q[t] * worth).sum(-1)
        out[t] = q[t] * (later[:, None] - worth)
    reach = torch.zeros(q.shape[1], dtype=torch.float64)
    reach[0] = 1
    for t in range(len(q)):
        out[t] *= reach[:, None]
        reach = reach @ q[t]
    return out


g = checks.generator(51)
s, t = (checks.randn(3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
with torch.no_grad():
    values = [enumerated_gradients(s, t, d)[1] for d in (0.0, 0.5, 1.0, 0.25)]
a, c = values[0], 2 * (values[2] + values[0] - 2 * values[1])
b = values[2] - a - c
checks.close(
    values[3], a + b / 4 + c / 16, what="three steps, discount ¼", rtol=1e-8, hint="A_t = r_t + γA"
)
whole, fixed = chained(s, t)
checks.close(values[2], whole, what="discount 1", rtol=1e-9)
checks.close(values[0], fixed, what="discount 0", rtol=1e-9)
for steps, vocab, discount in [(3, 2, 0.5), (4, 2, 0.9), (3, 3, 0.3)]:
    a, b = (checks.randn(steps, vocab, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    checks.close(
        enumerated_gradients(a, b, discount)[1],
        by_returns(a, b, discount),
        rtol=1e-8,
        atol=1e-12,
        what=f"the policy's gradient, {vocab} words × {steps} steps, discount {discount}",
        hint="A_t = r_t + discount·A_{t+1}: two steps ahead the discount counts twice",
    )
for part in enumerated_gradients(s, s.clone(), 0.5):
    checks.close(part, torch.zeros_like(s), atol=1e-12, what="the gradient where student = teacher")
### END HIDDEN TESTS

# %% [markdown]
# Look at them side by side. With two words the gradient of a row has one free number, the
# difference of its two logits.

# %% tags=["experiment"]
g = torch.Generator().manual_seed(10)
s, t = (1.5 * torch.randn(3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
true, partial = enumerated_gradients(s, t, 0.0)
_, togo = enumerated_gradients(s, t, 1.0)
states = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
rows = {
    name: [float(x[i, a, 0] - x[i, a, 1]) for i, a in states]
    for name, x in (("true", true), ("return-to-go, γ = 1", togo), ("γ = 0, and GKD", partial))
}
print(
    f"largest difference to the true gradient: γ = 1 {float((togo - true).abs().max()):.1e}, ",
    end="",
)
print(f"γ = 0 {float((partial - true).abs().max()):.3f}")
cosine = F.cosine_similarity(partial.flatten(), true.flatten(), dim=0)
print(f"cosine of γ = 0 with the true gradient: {float(cosine):.2f}")

# %% tags=["experiment", "figure"]
# Figure: three gradients, state by state
fig, ax = plot.plt.subplots(figsize=(8, 3.2))
for i, (name, values) in enumerate(rows.items()):
    ax.bar(
        np.arange(5) + 0.27 * (i - 1),
        values,
        0.25,
        label=name,
        color=plot.COLORS[i],
        edgecolor="black",
        linewidth=0.6,
        hatch=("", "//", "..")[i],
    )
ax.axhline(0, color="black", linewidth=0.8)
ax.set_xticks(
    range(5), ["first step" if i == 0 else f"step {i + 1} after {'ab'[a]}" for i, a in states]
)
ax.set_ylabel("gradient, logit of a minus b")
ax.legend()
plot.caption(
    fig,
    "Two words, three steps, random tables. The return-to-go gives the true gradient exactly. With "
    "discount 0 the last step is right, since it has no future; earlier steps differ.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** The return-to-go reproduces the true gradient to rounding; discount 0 does not,
# and it isn't meant to. At the last step they agree, since nothing comes after it.
#
# ## Experiment: winning back what finetuning cost {#recovery}
#
# Lesson 21 finetuned `tiny` on small tasks and saw it forget how text goes on. Its teacher can be
# the larger `small`, which never was finetuned. But `small` can't do the tasks, so a student that
# listens to it alone unlearns them. Hence two teachers, chosen by the prompt: `small` for text,
# and for tasks a frozen copy of the finetuned model itself. (DeepSeek-V4 merges more than ten
# specialists into one student on-policy, with the reverse KL over the full vocabulary.)
#
# **Question.** With the same number of steps and of tokens, which signal wins back more: the
# text's own tokens, the teacher's probabilities on that text, or the teacher's judgment of the
# student's writing? The last comes in two kinds, a reward for the sampled token and the KL over the
# full vocabulary, and a fifth run takes half of its steps with the teacher's probabilities, then
# half with that KL. All runs see the same prompts from the training text, and they are judged by
# three numbers: bits per byte of held-out text, exact match of held-out tasks, and the reverse
# KL from `small` on what the student itself writes.
#
# Write down an order for each of the first and the third number.

# %% tags=["experiment"]
LETTERS = "abcdefghij"
PROMPT, NEW, BATCH, STEPS = 8, 16, 12, 22  # tokens of a prompt, tokens after it, rows, steps


def chat_ids(question: str, answer: str) -> list[int]:
    """Prompt and reply; the reply is the last three tokens."""
    reply = [*tokenizer.encode(answer), END]
    assert len(reply) == 3
    return tokenizer.chat([{"role": "user", "content": question}]) + reply


pairs = [("Reverse", f" {b} {a}", a, b) for a in LETTERS for b in LETTERS]
pairs += [("Sort", f" {min(a, b)} {max(a, b)}", a, b) for a in LETTERS for b in LETTERS]
random.Random(0).shuffle(pairs)
TASKS = [chat_ids(f"{task}: {a} {b}", answer) for task, answer, a, b in pairs]
TASKS, HELD_TASKS = TASKS[40:], TASKS[:40]
HELD_TEXT = [text[:600] for group in HELD_OUT for text in group[:8]]


def task_batch(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, device=profile.device)  # all of these have one length


def passages(seed: int, count: int) -> Tensor:
    draw, out = random.Random(seed), []
    while len(out) < count:
        ids = tokenizer.encode(draw.choice(draw.choice(TRAINING))[:4000])
        if len(ids) > PROMPT + NEW:
            start = draw.randrange(len(ids) - PROMPT - NEW)
            out.append(ids[start : start + PROMPT + NEW])
    return torch.tensor(out, device=profile.device)


@torch.no_grad()
def judged(model: nn.Module) -> tuple[float, float, float]:
    """(bits per byte of held-out text, exact match of held-out tasks, reverse KL on own text)."""
    nats = 0.0
    for text in HELD_TEXT:
        ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(text)]], device=profile.device)
        nats += float(F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum"))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in HELD_TEXT)
    written = models.generate(model, [row[:-3] for row in HELD_TASKS], 4, stop=END)
    exact = sum(w == row[-3:] for w, row in zip(written, HELD_TASKS, strict=True)) / len(HELD_TASKS)
    source = torch.Generator(profile.device).manual_seed(7)
    own, _ = on_policy_loss(model, small, passages(99, 32)[:, :PROMPT], NEW, source)
    return bits, exact, float(own)


def steps_of(model: nn.Module, steps: int, rate: float):
    """A loop's optimizer: yields, and steps on what `model` got as gradients since."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        yield step
        optimizer.step()


def finetuned(seed: int) -> nn.Module:
    """`tiny` after 72 steps on the tasks, and nothing else."""
    model, _ = models.load("tiny")
    g = torch.Generator().manual_seed(seed)
    for _ in steps_of(model, 72, 2e-3):
        ids = task_batch([TASKS[i] for i in torch.randint(len(TASKS), (16,), generator=g)])
        z = model(ids)[:, -4:-1]
        distillation_loss(z, z.detach(), ids[:, -3:], alpha=0.0).backward()
    return model


def signal(how: str, student: nn.Module, teacher: nn.Module, ids: Tensor, new: int, g) -> Tensor:
    """One of the four losses, on the last `new` tokens of `ids` or on what is written there."""
    prompts = ids[:, :-new]
    if how == "on-policy, full":
        return on_policy_loss(student, teacher, prompts, new, g)[0]
    if how == "on-policy, sampled":
        written = models.generate(student, prompts.tolist(), new, 1.0, None, g)
        ids = torch.cat([prompts, torch.tensor(written, device=ids.device)], dim=1)
    z, targets = student(ids)[:, -new - 1 : -1], ids[:, -new:]
    with torch.no_grad():
        z_teacher = z if how == "hard labels" else teacher(ids)[:, -new - 1 : -1]
    if how == "hard labels":
        return distillation_loss(z, z_teacher, targets, alpha=0.0)
    mask = torch.ones_like(targets, dtype=torch.bool)
    if how == "teacher's logits":
        return token_kl(z, z_teacher, mask)
    logp, teacher_logp = (
        x.log_softmax(-1).gather(-1, targets[..., None])[..., 0] for x in (z, z_teacher)
    )
    return dense_reward_loss(logp, logp.detach(), teacher_logp, mask, discount=0.0)[0]


def recovered(start: nn.Module, how: str, seed: int) -> nn.Module:
    """The finetuned model after STEPS steps with two teachers."""
    model, text = copy.deepcopy(start), passages(seed, 400)
    g = torch.Generator(profile.device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    for step in steps_of(model, STEPS, 2e-3):
        rows = text[torch.randint(len(text), (BATCH,), generator=order)]
        ids = task_batch([TASKS[i] for i in torch.randint(len(TASKS), (BATCH,), generator=order)])
        now = how
        if how == "logits, then on-policy":
            now = "teacher's logits" if step < STEPS // 2 else "on-policy, full"
        loss = signal(now, model, small, rows, NEW, g) + signal(now, model, start, ids, 3, g)
        loss.backward()
    return model


WAYS = ("hard labels", "teacher's logits", "on-policy, sampled", "on-policy, full")
WAYS += ("logits, then on-policy",)


def recovery(seed: int) -> dict[str, tuple[float, float, float]]:
    torch.set_num_threads(1)  # matrices this small are not worth sharing
    start = finetuned(seed)
    found = {"tiny": judged(tiny), "finetuned": judged(start)}
    for how in WAYS:
        found[how] = judged(recovered(start, how, seed))
    torch.set_num_threads(threads)
    return found


outcome = recovery(0)
print("                          bits per byte   exact match   KL on own text")
for name, (bits, exact, own) in outcome.items():
    print(f"{name:26}{bits:13.2f}{exact:14.0%}{own:17.2f}")

# %% tags=["experiment", "figure"]
# Figure: what is won back, and what is kept
fig, axes = plot.plt.subplots(1, 3, figsize=(11, 3.1), sharey=True)
names = list(outcome)
for j, (ax, label) in enumerate(
    zip(
        axes,
        ("bits per byte, held-out text", "share exact, held-out tasks", "nats a token, own text"),
        strict=True,
    )
):
    for y, name in enumerate(names):
        color = plot.COLORS[2] if y < 2 else plot.COLORS[0] if y < 4 else plot.COLORS[1]
        marker = "os^"[0 if y < 2 else 1 if y < 4 else 2]
        ax.plot(outcome[name][j], y, marker, color=color, ms=8, clip_on=False)
        ax.hlines(y, 0, outcome[name][j], color=color, linewidth=1, linestyle=":")
    ax.set(xlabel=label, xlim=0)
axes[0].set_yticks(range(len(names)), names)
axes[0].invert_yaxis()
plot.caption(
    fig,
    "Above: tiny before and after finetuning (circles). Squares learn on the data's text, "
    "triangles (also) on their own. Left and right, smaller is better; in the middle, larger.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** (What is said here held for each of five seeds, where nothing else is said.)
# Every signal wins back most of the text, within two dozen steps. On held-out text the teacher's
# probabilities beat the text's own tokens, as soft labels should, and on-policy learning alone is
# behind both: the damaged student writes rubbish at first, and the teacher's opinion of rubbish
# teaches little about good text. That measure favors those who trained on such text, too.
#
# On what the student itself writes the order is another. On-policy learning with the full
# vocabulary beats the hard labels there, in most seeds the teacher's probabilities too, in spite of
# its bad start. Half of each is the best of all, by a clear margin, and on held-out text about as
# good as the teacher's probabilities alone. Qwen3's recipe for its small models has that order:
# off-policy first, until the student reaches states worth judging, then on-policy.
#
# The sampled reward has the same expected gradient as the full vocabulary, and is last everywhere,
# the tasks included. Twelve rows are a small batch for it. The rewards of a damaged student are
# mostly far below 0, and without a baseline each token that was drawn is pushed down, whichever it
# was. (The right baseline is known here: with discount 0 the expected reward is minus the KL of
# that position. Subtracting it changes no expectation, since $\mathbb{E}[\nabla\log q]=0$.) With
# long answers, large batches and a student near its teacher the noise matters less, and the reward
# needs only one number per token from the teacher.
#
# With every other signal at least two thirds of the held-out tasks stay right, although most of a
# step's tokens are text: the frozen copy, as a second teacher, holds them.

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number or a choice are
# graded, one by one.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers; numbers to 1 percent.

    "temperature": distillation without τ². In the limit of high temperatures, by which number is
                   the soft part's gradient divided when the temperature is made 4 times as high?
    "end":         the formula β·KL(p‖m) + (1 − β)·KL(q‖m), without special cases, at β = 1, for any
                   p and q: its value.
    "tail":        k = 1. The teacher gives its likeliest token 0.6, the student gives that token
                   0.3. The loss with the rest as one outcome, in nats.
    "storage":     vocabulary 65,536. All logits in float16, against k = 32 pairs of a float16
                   and an id in 2 bytes: how many times as many bytes?
    "valley":      a single bump is fitted to a mixture of two far bumps. Which KL puts its center
                   between them: "forward" or "reverse"?
    "partial":     GKD with the reverse KL over the full vocabulary has the expected gradient of the
                   policy loss with which discount?
    """
    ### BEGIN SOLUTION
    return {
        "temperature": 16.0,
        "end": 0.0,
        "tail": 0.6 * math.log(2) + 0.4 * math.log(4 / 7),
        "storage": 65536 * 2 / (32 * 4),
        "valley": "forward",
        "partial": 0.0,
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["temperature"]
checks.kind(answer, float, what="temperature")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    16.0,
    what="temperature",
    hint="One factor 1/τ from the chain rule, another from the difference of probabilities",
    mistakes={"one of the two factors": 4.0, "the inverse": 1 / 16},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["end"]
checks.kind(answer, float, what="end")
### BEGIN HIDDEN TESTS
checks.number(answer, 0.0, atol=1e-9, what="end", hint="At β = 1 the mixture m is p")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["tail"]
checks.kind(answer, float, what="tail")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.1920419,
    what="tail",
    hint="Two outcomes: 0.6 and 0.4 against 0.3 and 0.7",
    mistakes={"without the rest": 0.4158883, "the reverse KL": 0.1837869},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["storage"]
checks.kind(answer, float, what="storage")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1024.0,
    what="storage",
    hint="131,072 bytes a token against 128",
    mistakes={"without the ids": 2048.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["valley"]
assert answer in ("forward", "reverse"), f"'forward' or 'reverse'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "forward", "Which of them is infinite where the student leaves a mode out?"
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["partial"]
checks.kind(answer, float, what="partial")
### BEGIN HIDDEN TESTS
checks.number(
    answer, 0.0, atol=1e-9, what="partial", hint="The past is data: no later reward is credited"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** On-policy distillation and reinforcement learning with a reward at the end
# both train on the student's own samples. Why does the former need so many fewer samples? And what
# can it never do?

# %% [markdown] answer="dense-reward"
# A reward at the end says one number about hundreds of tokens, and every token's gradient carries
# the noise of all others. The teacher says for each token by how much it would have been likelier
# or less likely, so credit needs no averaging over samples; with the full vocabulary even tokens
# that were not drawn are judged. In exchange the student can only become its teacher: the loss is
# zero at q = p, whether or not the teacher is right. A verifier's reward knows no such ceiling.
# Common practice puts both in order: reinforcement learning makes a teacher good, distillation
# makes students of it.

# %% [markdown]
# **Open question 2.** Your on-policy run has a falling loss, and the student's answers grow shorter
# and duller. What may be going on, and what would you look at?

# %% [markdown] answer="short-answers"
# Reverse KL rewards leaving things out. A student that says little, repeats itself, or stops early
# meets few states where the teacher disagrees; with return-to-go (discount 1) this is even in the
# true gradient, because each further token costs some KL. Look at the lengths, at the entropy of
# the student's distribution, at distinct samples for one prompt, and at the forward KL on held-out
# text, which rises when modes are dropped. Remedies are a divergence between the two (β below 1), a
# share of data that is not the student's, and a normalization that does not pay for short answers:
# a mean per token over the batch, rather than a sum per answer.

# %% [markdown]
# **Open question 3.** Teacher and student have different tokenizers. Which of this lesson's losses
# still work, and what would you do?

# %% [markdown] answer="tokenizers"
# None that compares distributions over the vocabulary or the log-probability of one token: the ids
# mean different strings and the positions do not match. What always works is text: let the teacher
# write, and train on it with hard labels (sequence-level distillation). One can also compare at
# common boundaries: the log-probability of a span of bytes under either model is a sum of its
# tokens' ones, which gives a reward for each span. Others sort both distributions by probability
# and compare their shapes, which forgets which token is which.

# %% [markdown]
# ## References, and what to read in them
#
# - **Hinton et al. 2015**, *Distilling the Knowledge in a Neural Network*, arXiv:1503.02531.
#   Section 2 for the temperature, τ² and the limit of matching logits.
# - **Kim and Rush 2016**, *Sequence-Level Knowledge Distillation*, arXiv:1606.07947. Section 3:
#   word-level against sequence-level, where the teacher's own output is the data.
# - **Sanh et al. 2019**, *DistilBERT, a distilled version of BERT*, arXiv:1910.01108. Sections 2
#   and 3: a student initialized from its teacher's layers, and a third loss, between hidden states.
# - **Gu et al. 2023**, *MiniLLM: Knowledge Distillation of Large Language Models*,
#   arXiv:2306.08543. Section 2 derives the gradient of the sequence-level reverse KL,
#   and splits it into this step's part and the return-to-go.
# - **Agarwal et al. 2023**, *On-Policy Distillation of Language Models: Learning from
#   Self-Generated Mistakes*, arXiv:2306.13649. Section 3 for GKD, the generalized JSD, and
#   why they do not differentiate through sampling.
# - **Yang et al. 2025**, *Qwen3 Technical Report*, arXiv:2505.09388. The part on strong-to-weak
#   distillation: off-policy, then on-policy, against reinforcement learning at a tenth of its cost.
# - **DeepSeek-AI 2026**, *DeepSeek-V4: Towards Highly Efficient Million-Token Context
#   Intelligence*, arXiv:2606.19348. The part on post-training: specialists, merged by on-policy
#   distillation.
# - **Lu and Thinking Machines Lab 2025**, *On-Policy Distillation*, a blog post. Reverse KL as a
#   reward per token with discount 0, and a lost behavior that is won back.
#
# In production: TRL's `GKDTrainer` (its `generalized_jsd_loss` special-cases β = 0 and β = 1, and
# so departs from the paper's formula, as this lesson does) and Liger-Kernel's
# `LigerFusedLinearJSDLoss`, which never holds all logits at once and has a temperature but no τ².
# The policy loss with clips and groups is lesson 23; the finetuning whose cost was won back here is
# lesson 21; the KL estimators for sampled tokens are lesson 22.
