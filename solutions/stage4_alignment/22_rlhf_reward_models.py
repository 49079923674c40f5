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
#       A reward model that learns from comparisons, its calibration and its taste for length; the
#       penalized reward, REINFORCE with a leave-one-out baseline, best-of-n with its exact
#       distance; and a model that you push until its reward stops meaning anything.
#     gpu: "Nothing more: every cell runs on a CPU."
# ---

# %% [markdown]
# ## The problem
#
# Instruction tuning (lesson 21) needs somebody who writes the right answer down. For most of what
# people want there is no right answer to write, but there are better and worse ones, and a person
# who can write neither can often say which of two is better. So ask for that: show two answers,
# note which is preferred, some ten thousand times. What can be done with such notes?
#
# Two things, one after the other. First a **reward model** is fitted: it reads an answer and gives
# one number, such that of two answers the preferred one gets more. Then the language model, the
# **policy**, is changed so that its own answers get more. This is **RLHF**, reinforcement learning
# from human feedback.
#
# ## Core ideas
#
# **A comparison says less than a grade, and is more reliable.** The reward is fitted through
# differences. It has no zero and no unit of its own, and where nobody compared, it says what it
# likes.
#
# **The reward model is a stand-in.** Call it the **proxy**. What people want, the true reward, is
# never observed, and here lies the difficulty of the whole method: the more the policy is
# optimized, the more it looks for answers where the two differ. First both rise. Later the proxy
# goes on rising and the true reward falls. This is **Goodhart's law**: a measure that becomes a
# target ceases to be a good measure. In this lesson the true reward is known, because we made it,
# and so you will see both curves.
#
# **A leash.** The policy is kept near a **reference policy** $\pi_{\text{ref}}$, the model before
# RLHF, by a penalty on the divergence $\mathrm{KL}(\pi\,\Vert\,\pi_{\text{ref}})$. It is also the
# natural scale on which to measure how far an optimization has gone.
#
# **Selection needs no training.** Draw $n$ answers, let the reward model choose: **best-of-n**.
# It is the baseline that every training method has to beat, and its distance from the reference can
# be computed.
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $x$, $y$ | | a prompt, an answer (a sequence of tokens) |
# | $r(x, y)$ | `rewards` | the reward of an answer, one number |
# | $y_c$, $y_r$ | `chosen`, `rejected` | the preferred answer of a pair, and the other |
# | $\pi$, $\pi_{\text{ref}}$ | `logp`, `ref_logp` | policy and reference; log-probabilities of the tokens written |
# | $\beta$ | `beta` | weight of the divergence in the reward |
#
# Masks are True on tokens that count. $\sigma(z) = 1/(1+e^{-z})$.

# %%
import math
import re
from collections.abc import Sequence
from itertools import combinations, pairwise, product

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot
from torch import Tensor, nn

# %% [markdown]
# ## Rewards from comparisons {#comparisons}
#
# Let each answer have a worth $r$, and let whoever compares two answers perceive each with a noise
# of their own. If the difference of the two noises is logistic, the probability that $y_c$ is
# preferred is
#
# $$ P(y_c \succ y_r) = \sigma(r_c - r_r), $$
#
# the **Bradley–Terry model** (1952; Zermelo had it for chess in 1929). Written as odds: each answer
# has a strength $e^{r}$, and $y_c$ wins in the proportion $e^{r_c} : e^{r_r}$. The likelihood of
# all comparisons gives the loss
#
# $$ L = -\frac1N\sum \log \sigma(r_c - r_r - m) . $$
#
# Where annotators also say *how much* better an answer is, a **margin** $m$ asks for that much more
# distance: the loss is as if the difference were smaller than it is.
#
# **What the loss cannot see.** Add the same constant to both rewards: nothing changes. So it is for
# a constant that depends on the prompt, and a reward model is free to call every answer to one
# prompt good and every answer to another bad. Its derivatives say the same: $\partial L/\partial
# r_c = -\partial L/\partial r_r$ in each pair. As nothing holds the level, it drifts in training. A
# **centering term** $\lambda\,(r_c + r_r)^2$ holds it at zero without touching the difference.
#
# Before you write it down, look at $\log\sigma(z)$ in float32, computed in two ways:

# %% tags=["experiment"]
z = torch.tensor([-10.0, -80.0, -100.0, -10_000.0])
print("log of the sigmoid:", torch.sigmoid(z).log().tolist())
print("the whole at once: ", F.logsigmoid(z).tolist())

# %% [markdown]
# **Numbers.** $\log\sigma(z)$ as written fails in float32 below $z \approx -88$, where $\sigma(z)$
# is 0 and its logarithm $-\infty$. The pairs that are wrong by that much are those that have the
# most to teach: their loss is about $|z|$, and its slope is 1.


# %% exercise="bradley_terry_loss" minutes=12 difficulty=1
def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """Loss, minimized: the mean over pairs of

        −log σ(chosen − rejected − margin) + center · (chosen + rejected)².

    chosen, rejected: (pairs,), rewards of one floating format; pairs ≥ 1.
    margin: a number, or a tensor (pairs,) of any floating format.
    center: a number ≥ 0.

    Returns a 0-dimensional tensor, computed and returned in float32 for half-precision rewards,
    else in their dtype. It is finite, and so is its gradient, however large the difference: a pair
    that is ranked wrong by 10,000 has a loss of 10,000. Inputs are not changed.

    chosen [2, 0], rejected [1, 1]: 0.81326; with margin 0.5 and center 0.1: 1.58774.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = chosen.to(wide), rejected.to(wide)
    if isinstance(margin, Tensor):
        margin = margin.to(wide)
    ranking = -F.logsigmoid(chosen - rejected - margin)
    return (ranking + center * (chosen + rejected).square()).mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a logarithm that does not fail</summary>
#
# $-\log\sigma(z) = \log(1 + e^{-z})$, and PyTorch has both sides: `F.logsigmoid(z)` and
# `F.softplus(-z)`.
# </details>
#
# <details><summary>Hint: a margin in another format</summary>
#
# A float64 margin makes the whole loss float64. Convert it to the format that you compute in.
# </details>

# %% check="bradley_terry_loss" points=2
chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
checks.close(
    bradley_terry_loss(chosen, rejected),
    torch.tensor((right + wrong) / 2),
    what="the loss of one pair ranked right by 1 and one ranked wrong by 1",
    mistakes={"the sum, not the mean,": torch.tensor(right + wrong)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for pairs, dtype in ((1, torch.float32), (7, torch.float64), (64, torch.float32)):
    chosen = checks.randn(pairs, device="cpu", generator=g, scale=3.0, dtype=dtype)
    rejected = checks.randn(2 * pairs, device="cpu", generator=g, scale=3.0, dtype=dtype)[::2]
    gaps = (chosen.double() - rejected.double()).tolist()
    with checks.unchanged(chosen=chosen, rejected=rejected):
        loss = bradley_terry_loss(chosen, rejected)
    checks.close(
        loss,
        torch.tensor(sum(math.log1p(math.exp(-d)) for d in gaps) / pairs, dtype=dtype),
        what=f"the loss of {pairs} pairs",
        dtype=dtype,
        mistakes={
            "exchanging chosen and rejected": torch.tensor(
                sum(math.log1p(math.exp(d)) for d in gaps) / pairs, dtype=dtype
            ),
        },
    )
    # Law: blind to a constant.
    checks.close(
        bradley_terry_loss(chosen + 4, rejected + 4),
        loss,
        what="the loss after 4 was added to all rewards",
        rtol=1e-4,
    )
for size in (100.0, 1e4):
    gap = torch.tensor([size, -size, 0.0]).requires_grad_()
    loss = bradley_terry_loss(gap, torch.zeros(3))
    checks.close(
        loss,
        torch.tensor((size + math.log(2)) / 3),
        what=f"the loss of rewards as far apart as {size:g}",
        hint="σ(−100) is 0 in float32, and log 0 is −∞: use a logarithm of the sigmoid as a whole",
    )
    (grad,) = torch.autograd.grad(loss, gap)
    checks.close(grad, torch.tensor([0.0, -1 / 3, -1 / 6]), what="its gradient in the chosen")
for dtype in (torch.float16, torch.bfloat16):
    a, b = (checks.randn(9, device="cpu", generator=g, scale=2.0, dtype=dtype) for _ in range(2))
    checks.close(
        bradley_terry_loss(a, b),
        F.softplus(b.double() - a.double()).mean().float(),
        what=f"the loss of rewards in {dtype}",
        dtype=torch.float32,
        hint="Widen before you subtract",
    )
a, b = (checks.randn(5, device="cpu", generator=g) for _ in range(2))
checks.gradients(
    bradley_terry_loss,
    lambda c, r: F.softplus(r - c).mean(),
    a,
    b,
    names=("the chosen rewards", "the rejected rewards"),
)
### END HIDDEN TESTS

# %% check="bradley_terry_loss" points=2
chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
checks.close(
    bradley_terry_loss(chosen, rejected, margin=0.5, center=0.1),
    torch.tensor((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.5))) / 2 + 0.1 * 5),
    what="the loss with margin 0.5 and centering 0.1",
    mistakes={
        "adding the margin": torch.tensor(
            (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(0.5))) / 2 + 0.5
        ),
        "centering the difference, not the sum,": torch.tensor(
            (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.5))) / 2 + 0.1
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for pairs, kind, center in ((6, torch.float64, 0.0), (5, torch.float16, 0.3), (4, None, 2.0)):
    c, r = (checks.randn(pairs, device="cpu", generator=g, scale=2.0) for _ in range(2))
    m = 1.75 if kind is None else (torch.rand(pairs, generator=g) * 3).to(kind).to(c.device)
    each = [m] * pairs if kind is None else m.tolist()
    rows = list(zip(c.tolist(), r.tolist(), each, strict=True))
    ranking = sum(math.log1p(math.exp(y + z - x)) for x, y, z in rows) / pairs
    with checks.unchanged(*([c, r] if kind is None else [c, r, m])):
        checks.close(
            bradley_terry_loss(c, r, m, center),
            torch.tensor(ranking + center * sum((x + y) ** 2 for x, y, _ in rows) / pairs).to(c),
            what=f"the loss with margins and centering {center}",
            dtype=torch.float32,
            mistakes={
                "centering each reward by itself": torch.tensor(
                    ranking + center * sum(x * x + y * y for x, y, _ in rows) / pairs
                ).to(c),
                "not squaring the sum": torch.tensor(
                    ranking + center * sum(x + y for x, y, _ in rows) / pairs
                ).to(c),
                "ignoring the centering": torch.tensor(ranking).to(c),
            },
        )
c, r, m = (checks.randn(5, device="cpu", generator=g) for _ in range(3))
checks.gradients(
    lambda c, r: bradley_terry_loss(c, r, m, 0.4),
    lambda c, r: (torch.log1p(torch.exp(r - c + m.double())) + 0.4 * (c + r) ** 2).mean(),
    c,
    r,
    names=("the chosen rewards", "the rejected rewards"),
)
### END HIDDEN TESTS

# %% [markdown]
# ## A model that gives one number {#reward-model}
#
# The reward model is the language model itself, with its head exchanged: instead of 4,096 logits a
# single number. In a causal model only the *last* token has seen the whole answer, so the reward is
# read there, $r = w \cdot h_{\text{last}}$. (No bias: by the section above, the preferences say
# nothing about it.)
#
# Where the last token is, is the detail that is most often wrong. Answers have unequal lengths.
# Training libraries pad on the right, generation pads on the left, and some pipelines do both. The
# last column is right with left padding only; counting the real tokens of a row and subtracting
# one, with right padding only. Looking for the first padding token fails where an answer contains
# that token. What is always right is the position of the last True in the mask.
#
# And padding on the left stands *before* the answer, where causality does not protect from it: the
# trunk has to be told what is padding.


# %% exercise="reward_model" minutes=20 difficulty=2
class RewardModel(nn.Module):
    """A decoder that gives each sequence one number.

    trunk: an llm40.models.Llama or what has its surface: `trunk.config.hidden_size`, and
        `trunk.hidden(tokens, attention_mask=mask)`, which gives (batch, seq, hidden_size) and hides
        from all other tokens those where the mask is False. It is kept as `self.trunk`, not copied.
    self.head: nn.Linear(hidden_size, 1, bias=False), initialized as you like.

    forward(tokens, mask) gives (batch,): the head of the hidden state of each row's last real
    token, in the model's dtype (the trunk's; `reward_model.double()` makes both float64).
        tokens: (batch, seq), int64.
        mask: (batch, seq), bool, True = a real token. Real tokens of a row stand together, at least
            one in each; padding is on the left, on the right or on both sides, in each row
            differently. What tokens stand in the padding does not change any reward, and a real
            token may be the same one that pads elsewhere.
    """

    ### BEGIN SOLUTION
    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.trunk.hidden(tokens, attention_mask=mask)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (mask * places).argmax(dim=1)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.head(hidden[rows, last]).squeeze(-1)

    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the position of the last True</summary>
#
# Multiply the mask by 0, 1, 2, …: of what is left, the largest number stands at the last real
# token. `argmax` over the row gives its position.
# </details>
#
# <details><summary>Hint: one vector from each row</summary>
#
# `hidden[rows, last]` with `rows = torch.arange(batch)` picks (row 0, last 0), (row 1, last 1), …
# </details>

# %% tags=["support"]
# Support: a small random decoder, and sequences padded on either side
SMALL = models.Config(vocab_size=23, hidden_size=16, layers=2, heads=2, kv_heads=1, mlp_size=24)


def small_trunk(seed: int, dtype: torch.dtype = torch.float64) -> models.Llama:
    """A decoder of random weights, large enough that every token tells."""
    trunk = models.Llama(SMALL).to(dtype)
    g = checks.generator(seed)
    with torch.no_grad():
        for weight in trunk.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.4 + (weight.dim() == 1))
    return trunk


def padded(rows: Sequence[Sequence[int]], left: Sequence[int], g) -> tuple[Tensor, Tensor]:
    """Rows as one batch, row i after left[i] padding tokens (random ones), and the mask."""
    width = max(len(row) + skip for row, skip in zip(rows, left, strict=True))
    tokens = torch.randint(0, SMALL.vocab_size, (len(rows), width), generator=g)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, skip) in enumerate(zip(rows, left, strict=True)):
        tokens[i, skip : skip + len(row)] = torch.tensor(row)
        mask[i, skip : skip + len(row)] = True
    return tokens, mask


# %% check="reward_model" points=2
trunk = small_trunk(3)
model = RewardModel(trunk)
assert tuple(model.head.weight.shape) == (1, 16), (
    f"the head is nn.Linear(hidden_size, 1); its weight has shape {tuple(model.head.weight.shape)}"
)
assert model.head.bias is None, "the head has no bias: preferences say nothing about it"
with torch.no_grad():
    model.double().head.weight.copy_(torch.arange(16.0)[None] / 8 - 1)
rows = [[5, 1, 7], [2, 9, 4, 8, 8]]
w = model.head.weight[0].detach()
alone = torch.stack([trunk.hidden(torch.tensor([row]))[0, -1].detach() @ w for row in rows])
tokens, mask = padded(rows, [0, 0], checks.generator(4))
checks.close(
    model(tokens, mask), alone, what="rewards of two answers, padded on the right", rtol=1e-5
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
sides = {
    "on the right": lambda lengths: [0] * len(lengths),
    "on the left": lambda lengths: [max(lengths) - n for n in lengths],
    "on both sides": lambda lengths: [1 + i % 3 for i in range(len(lengths))],
}
for lengths in ([1], [4, 1, 6], [3, 9, 2, 5, 1]):
    rows = [torch.randint(0, 23, (n,), generator=g).tolist() for n in lengths]
    rows[0][-1] = 0  # a real token that pads elsewhere
    trunk = small_trunk(6 + len(rows))
    model = RewardModel(trunk).double()
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(1, 16, generator=g))
    w = model.head.weight[0].detach().clone()
    alone = torch.stack([trunk.hidden(torch.tensor([row]))[0, -1].detach() @ w for row in rows])
    for side, skips in sides.items():
        tokens, mask = padded(rows, skips(lengths), g)
        tokens = tokens.masked_fill(~mask, 0) if side == "on both sides" else tokens
        if side == "on both sides":  # every row ends in padding, too
            tokens, mask = F.pad(tokens, (0, 2)), F.pad(mask, (0, 2))
        with checks.kept(model, tokens, mask):
            rewards = model(tokens, mask)
        checks.close(
            rewards,
            alone,
            what=f"rewards of answers of {lengths} tokens, padded {side}",
            rtol=1e-5,
            dtype=torch.float64,
            hint="Each must be what the answer gets alone",
        )
        if len(rows) > 1:
            wide = torch.zeros(len(rows), 2 * tokens.shape[1], dtype=torch.int64)
            wide[:, ::2] = tokens
            order = torch.arange(len(rows) - 1, -1, -1)
            checks.close(
                model(wide[:, ::2][order], mask[order]),
                alone[order],
                what="rewards of the rows in reverse order",
                rtol=1e-5,
            )
### END HIDDEN TESTS

# %% check="reward_model" points=1
trunk = small_trunk(12)
model = RewardModel(trunk).double()
tokens, mask = padded([[3, 1, 4], [1, 5]], [0, 2], checks.generator(13))
assert model.training, "a new module is in training mode"
model(tokens, mask).sum().backward()
assert model.head.weight.grad is not None, "no gradient reaches the head"
### BEGIN HIDDEN TESTS
assert trunk.norm.weight.grad is not None, (
    "no gradient reaches the trunk that was given: is it detached, or copied?"
)
left_out = [name for name, p in trunk.named_parameters() if p.grad is None or not p.grad.any()]
assert not left_out, f"no gradient reaches {', '.join(left_out[:3])} of the trunk"
names = sorted(name for name, _ in model.named_parameters())
expected = sorted(["head.weight", *(f"trunk.{name}" for name, _ in trunk.named_parameters())])
assert names == expected, "the parameters are head.weight and those of self.trunk, nothing else"
# The gradient of the trunk is that of two sequences alone.
other = small_trunk(12)
w = model.head.weight[0].detach()
sum(other.hidden(torch.tensor([row]))[0, -1] @ w for row in ([3, 1, 4], [1, 5])).backward()
for (name, p), q in zip(trunk.named_parameters(), other.parameters(), strict=True):
    checks.close(p.grad, q.grad, what=f"the gradient of the trunk's {name}", rtol=1e-4)
trunk = small_trunk(14, torch.float32)
assert trunk.training
short = RewardModel(trunk).eval()
with torch.no_grad():
    out = short(tokens, mask)
    assert out.dtype == torch.float32, f"a float32 model gives float32, not {out.dtype}"
    assert tuple(out.shape) == (2,), f"one number a row is asked for; yours: {tuple(out.shape)}"
    one = short(torch.tensor([[7]]), torch.ones(1, 1, dtype=torch.bool))
    assert tuple(one.shape) == (1,), f"for one row of one token, shape (1,); yours {one.shape}"
### END HIDDEN TESTS

# %% [markdown]
# ## How good is a reward model? {#calibration}
#
# **Accuracy**: the share of held-out pairs whose preferred answer gets the higher reward. It has a
# ceiling below 1, since people do not always agree. (Ouyang et al. report that two of their trained
# annotators agreed in about 73 % of the comparisons.)
#
# Accuracy ignores how sure the model is, and the policy's gradient is made of exactly that: of
# *differences* of rewards. **Calibration** asks whether the differences mean what Bradley–Terry
# says they mean: of all pairs where $\sigma(r_1 - r_2)$ is about 0.8, is the first answer preferred
# in 80 %? A model that was trained too long on too few pairs says 0.99 there.
#
# Sort the pairs by predicted probability $p$ into ten bins of equal width, and compare in each bin
# the mean prediction with what happened. The **expected calibration error** is the mean of the
# gaps, weighted by the bins' numbers of pairs:
#
# $$ \mathrm{ECE} = \sum_b \frac{n_b}{N}\,\bigl|\,\overline{p}_b - \overline{y}_b\,\bigr| . $$
#
# The absolute value stands outside the means: in one bin errors of single pairs cancel, as they
# should, for no model can foretell a coin.


# %% exercise="expected_calibration_error" minutes=15 difficulty=2
def expected_calibration_error(
    p: Tensor, preferred: Tensor, bins: int = 10
) -> tuple[Tensor, Tensor]:
    """Accuracy and expected calibration error of predicted preferences: (accuracy, error).

    p: (N,), floating, in [0, 1]: the predicted probability that a pair's first answer is preferred;
        N ≥ 1.
    preferred: (N,), bool: whether it was.
    bins: how many bins of equal width; bin k holds k/bins ≤ p < (k + 1)/bins, the last one also
        p = 1. Empty bins count nothing. (Of the p near an edge only those are tested that are
        exactly on it, such as 0.5.)

    accuracy: the share of pairs where p > 0.5 says what happened; p = 0.5 exactly counts half.
    error: Σ n_b/N · |mean p in b − share preferred in b|.
    Both are 0-dimensional, in float32 for half-precision p, else in p's dtype. Inputs stay.

    p [0.95, 0.85, 1.0, 0.15], preferred [True, False, False, False]: 0.5 and 0.4875.
    """
    ### BEGIN SOLUTION
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    happened = preferred.to(p.dtype)
    right = torch.where(p == 0.5, 0.5, ((p > 0.5) == preferred).to(p.dtype))
    bin_of = (p * bins).long().clamp(max=bins - 1)
    # n_b/N · |mean p − mean y| = |Σ (p − y)| / N: the number of pairs cancels.
    gaps = torch.zeros(bins, dtype=p.dtype, device=p.device)
    gaps = gaps.index_add(0, bin_of, p - happened)
    return right.mean(), gaps.abs().sum() / len(p)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the bin of a probability</summary>
#
# `(p * bins).long()` rounds down. Only p = 1 then needs care.
# </details>
#
# <details><summary>Hint: a loop is fine</summary>
#
# For each bin select its pairs with a boolean index; skip the bin if there are none (a mean of
# nothing is NaN).
# </details>

# %% check="expected_calibration_error" points=2
p = torch.tensor([0.95, 0.85, 1.0, 0.15])
preferred = torch.tensor([True, False, False, False])
accuracy, error = checks.parts(
    expected_calibration_error(p, preferred), "accuracy", "calibration error"
)
checks.close(accuracy, torch.tensor(0.5), what="the accuracy of four predictions")
checks.close(
    error,
    torch.tensor(0.4875),
    what="the calibration error of four predictions",
    mistakes={
        "leaving out p = 1": torch.tensor((0.05 + 0.85 + 0.15) / 4),
        "bins that all weigh the same": torch.tensor((0.475 + 0.85 + 0.15) / 3),
        "dividing by the number of bins": torch.tensor((0.475 + 0.85 + 0.15) / 10),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(21)


def by_definition(p, preferred, bins):
    """Accuracy and error with plain numbers, one pair after the other."""
    right, members = 0.0, {}
    for q, y in zip(p.double().tolist(), preferred.tolist(), strict=True):
        right += 0.5 if q == 0.5 else float((q > 0.5) == y)
        k = next((k for k in range(bins) if q < (k + 1) / bins), bins - 1)
        members.setdefault(k, []).append((q, y))
    gaps = [
        len(m) * abs(sum(q for q, _ in m) / len(m) - sum(y for _, y in m) / len(m))
        for m in members.values()
    ]
    return right / len(p), sum(gaps) / len(p)


for count, bins, dtype in (
    (1, 10, torch.float32),
    (200, 10, torch.float64),
    (57, 4, torch.float32),
    (33, 1, torch.float64),
    (80, 16, torch.bfloat16),
    (40, 10, torch.float16),
):
    p = torch.rand(2 * count, generator=g, dtype=torch.float64) ** 0.5
    p = ((p * bins).floor() + 0.1 + 0.8 * (p * bins).frac()) / bins  # away from the edges
    p = p.to(dtype)[::2]
    p[:: max(count // 7, 1)] = torch.tensor([0.5, 1.0, 0.0])[torch.arange(count) % 3][
        :: max(count // 7, 1)
    ].to(dtype)
    preferred = torch.rand(count, generator=g) < 0.9 * p.double() ** 2
    wide = torch.promote_types(dtype, torch.float32)
    with checks.unchanged(p=p, preferred=preferred):
        accuracy, error = checks.parts(
            expected_calibration_error(p, preferred, bins), "accuracy", "calibration error"
        )
    expected = by_definition(p, preferred, bins)
    checks.close(
        accuracy,
        torch.tensor(expected[0], dtype=wide),
        what=f"the accuracy of {count} predictions",
        dtype=wide,
        hint="p = 0.5 counts half, whatever happened",
    )
    checks.close(
        error,
        torch.tensor(expected[1], dtype=wide),
        what=f"the calibration error of {count} predictions in {bins} bins",
        rtol=1e-4 if dtype in checks.HALF else 1e-6,  # n_b / N may have been rounded to float32
        dtype=wide,
        mistakes={
            "the absolute value inside the mean": torch.tensor(
                float((p.double() - preferred.double()).abs().mean()), dtype=wide
            ),
        },
    )
# 0.25 and 0.75 open their bins of four, and 1 belongs to the last.
edges = torch.tensor([0.25, 0.25, 0.5, 0.75, 0.4, 0.9, 1.0])
preferred = torch.tensor([True, True, False, True, False, True, False])
_, error = expected_calibration_error(edges, preferred, 4)
checks.close(
    error,
    torch.tensor(by_definition(edges, preferred, 4)[1]),
    what="the calibration error of predictions on the edges of four bins",
    hint="A probability on an edge belongs to the bin that begins there",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Length bias {#length}
#
# Annotators like long answers, a little more than they should: a long answer looks thorough, and a
# comparison takes a minute. Bradley–Terry has no way to know that this was a mistake. It explains
# the preferences, and if length explains part of them, length gets a reward. Singhal et al. found
# that in open pipelines a large part of what RLHF gained in reward came from longer answers.
#
# Say that annotators act on $u = r^* + c\,\ell$, with $\ell$ the length. A perfect fit has learned
# $u$, to a constant. If $r^*$ and $\ell$ are uncorrelated, the regression of $u$ on
# $\ell$ has the slope $c$, and subtracting it gives $r^*$ back:
#
# $$ \tilde r_i = r_i - b\,(\ell_i - \bar\ell), \qquad
#    b = \frac{\sum_i (\ell_i - \bar\ell)\,(r_i - \bar r)}{\sum_i (\ell_i - \bar\ell)^2} . $$
#
# If they are correlated, because good answers *are* longer, that part is taken away too. What
# remains is the reward at equal length: no longer the truth, but on these answers no straight line
# in the length is left in it; a bend may be. Two repairs at the root: pairs of equal length, or the
# difference in length as an extra input of the fitted model that is left out when the model is
# used.


# %% exercise="remove_length" minutes=10 difficulty=1
def remove_length(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Rewards (N,) without what a straight line in the lengths explains; the mean stays.

    rewards: (N,), any floating format, N ≥ 1.
    lengths: (N,), integers or floating. Where all are equal there is no line, and the rewards come
        back as they are (half precision widened, as ever).

    Returns (N,), computed and returned in float32 for half-precision rewards, else in their dtype.
    Exact also where lengths are large and differ little (1,000,000 to 1,000,010).

    rewards [1, 2, 6], lengths [10, 20, 30]: slope 0.25, [3.5, 2, 3.5].
    """
    ### BEGIN SOLUTION
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    lengths = lengths.double()
    centered = (lengths - lengths.mean()).to(rewards.dtype)
    square = centered.square().sum()
    if square == 0:
        return rewards.clone()
    slope = (centered * (rewards - rewards.mean())).sum() / square
    return rewards - slope * centered
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: large lengths</summary>
#
# $\overline{\ell^2} - \bar\ell^2$ is the difference of two large numbers. Subtract the mean first,
# then square.
# </details>

# %% check="remove_length" points=2
checks.close(
    remove_length(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10, 20, 30])),
    torch.tensor([3.5, 2.0, 3.5]),
    what="three rewards without their lengths",
    mistakes={
        "adding the line": torch.tensor([-1.5, 2.0, 8.5]),
        "subtracting the mean too": torch.tensor([0.5, -1.0, 0.5]),
        "subtracting slope · length, without its mean,": torch.tensor([-1.5, -3.0, -1.5]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(31)
for count, dtype, base in (
    (5, torch.float64, 0),
    (200, torch.float32, 3),
    (40, torch.float64, 1_000_000),
    (60, torch.float32, 1_000_000),
    (16, torch.bfloat16, 1_000),  # half precision does not hold such lengths
    (24, torch.float16, 5_000),
):
    lengths = base + torch.randint(0, 11, (2 * count,), generator=g)[::2]
    lengths[0], lengths[-1] = base, base + 11
    noise = checks.randn(count, device="cpu", generator=g, dtype=torch.float64).cpu()
    rewards = (0.3 * (lengths - base) + noise - 2).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    design = torch.stack([torch.ones(count), (lengths - base).double()], dim=1).double()
    line = torch.linalg.lstsq(design, rewards.double()[:, None]).solution[:, 0]
    expected = rewards.double() - line[1] * (design[:, 1] - design[:, 1].mean())
    with checks.unchanged(rewards=rewards, lengths=lengths):
        cleaned = remove_length(rewards, lengths)
    checks.close(
        cleaned,
        expected.to(wide),
        what=f"{count} rewards for lengths from {base:,} on",
        dtype=wide,
        rtol=1e-8 if wide == torch.float64 else 2e-5,
    )
    # Law: a taste for length that is added to the rewards leaves no trace.
    checks.close(
        remove_length(rewards.to(wide) + 0.7 * (lengths - base).to(wide), lengths),
        expected.to(wide) + 0.7 * float(design[:, 1].mean()),
        what="the same with 0.7 · length added",
        rtol=1e-8 if wide == torch.float64 else 5e-5,
    )
rewards = checks.randn(6, device="cpu", generator=g)
for lengths in (torch.full((6,), 9), torch.full((6,), 2.5)):
    checks.close(remove_length(rewards, lengths), rewards, what="rewards of answers of one length")
checks.close(remove_length(rewards[:1], torch.tensor([4])), rewards[:1], what="a single reward")
half = rewards.half()
checks.close(
    remove_length(half, torch.full((6,), 9)),
    half.float(),
    dtype=torch.float32,
    what="rewards in half precision of answers of one length",
)
floats = torch.rand(9, generator=g).double() * 3
rewards = checks.randn(9, device="cpu", generator=g, dtype=torch.float64)
centered = (remove_length(rewards, floats) - rewards.mean()).detach()
assert abs(float(centered @ (floats - floats.mean()))) < 1e-9, (
    "what is left must be uncorrelated with lengths that are no whole numbers, too"
)
### END HIDDEN TESTS

# %% [markdown]
# ## The objective {#objective}
#
# RLHF maximizes the reward under a penalty for leaving the reference:
#
# $$ J(\pi) = \mathbb E_{x,\; y\sim\pi}\Bigl[ r(x, y) - \beta \log\frac{\pi(y\mid x)}
#    {\pi_{\text{ref}}(y\mid x)} \Bigr]
#    = \mathbb E[r] - \beta\, \mathrm{KL}(\pi\,\Vert\,\pi_{\text{ref}}) . $$
#
# The answer that maximizes it can be written down. With $Z = \sum_y \pi_{\text{ref}}(y)\,
# e^{r(y)/\beta}$ and $\pi^*(y) = \pi_{\text{ref}}(y)\, e^{r(y)/\beta}/Z$ the objective is
#
# $$ J(\pi) = -\beta \sum_y \pi(y)\Bigl[\log \pi(y) - \log \pi_{\text{ref}}(y) - r(y)/\beta\Bigr]
#    = \beta \log Z - \beta\,\mathrm{KL}(\pi\,\Vert\,\pi^*), $$
#
# and is largest at $\pi = \pi^*$: the reference, each answer reweighted by the exponential of its
# reward. Lesson 24 turns this around. Here it tells what $\beta$ is: the reward that a factor of
# $e$ in probability costs.
#
# **Per token.** The log-ratio of an answer is the sum over its tokens, so the penalty can be given
# where it is incurred: every token gets $-\beta(\log\pi - \log\pi_{\text{ref}})$, the last one also
# the reward of the whole. (The sum is an unbiased estimate of the KL, called *k1*; others come in
# lesson 23.) This is a *reward*: numbers for the algorithm, not a loss. No gradient goes through
# it; the policy's gradient comes from how likely it makes what was rewarded. (TRL's `RLOOTrainer`
# sums the penalty over the answer and takes it off the reward before the baseline is formed. So
# does the experiment below.)


# %% exercise="kl_penalized_reward" minutes=15 difficulty=2
def kl_penalized_reward(
    reward: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """The reward of every token (to be maximized), (batch, seq):

        −beta · (logp − ref_logp) on each token of the answer, and `reward` in addition on the
        answer's last token; 0 on all other tokens.

    reward: (batch,), floating.
    logp, ref_logp: (batch, seq), of one floating format: log-probabilities that policy and
        reference gave the token at this position. Outside the answer anything may stand there,
        −inf and NaN too.
    mask: (batch, seq), bool, True on the answer's tokens, which stand together; prompt and padding
        (on either side) are False. A row without an answer gets zeros throughout.

    Returns float32 for half-precision logp, else logp's dtype. It carries no gradient, whatever
    comes in; inputs are not changed.

    reward 2, logp [−1, −2, −3], ref_logp [−1.5, −2, −2], the first token is the prompt, β 0.1:
    [0, 0, 2.1].
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(logp.dtype, torch.float32)
    with torch.no_grad():
        rewards = -beta * (logp.to(wide) - ref_logp.to(wide))
        rewards = rewards.masked_fill(~mask, 0.0)
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).argmax(dim=1)
        is_last = (places == last[:, None]) & mask
        return rewards + is_last * reward.to(wide)[:, None]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the last token again</summary>
#
# As in the reward model. Only a row whose mask is all False is new: `argmax` says 0 there, though
# position 0 is no part of an answer.
# </details>
#
# <details><summary>Hint: NaN outside the answer</summary>
#
# 0 · NaN is NaN. `masked_fill` and `torch.where` replace; a product does not.
# </details>

# %% check="kl_penalized_reward" points=2
logp = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]])
ref_logp = torch.tensor([[-1.5, -2.0, -2.0], [-2.0, -0.5, -1.0]])
mask = torch.tensor([[False, True, True], [True, True, False]])
checks.close(
    kl_penalized_reward(torch.tensor([2.0, 1.0]), logp, ref_logp, mask, beta=0.1),
    torch.tensor([[0.0, 0.0, 2.1], [-0.1, 1.05, 0.0]]),
    what="the rewards of two answers of two tokens",
    mistakes={
        "the opposite sign of the penalty": torch.tensor([[0.0, 0.0, 1.9], [0.1, 0.95, 0.0]]),
        "the reward in the last column": torch.tensor([[0.0, 0.0, 2.1], [-0.1, 0.05, 1.0]]),
        "the reward on every token": torch.tensor([[0.0, 2.0, 2.1], [0.9, 1.05, 0.0]]),
        "penalizing the prompt": torch.tensor([[-0.05, 0.0, 2.1], [-0.1, 1.05, 0.0]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(41)
for batch, seq, beta, dtype in (
    (1, 1, 0.5, torch.float32),
    (4, 7, 0.05, torch.float64),
    (5, 9, 0.9, torch.float32),
    (3, 6, 0.3, torch.bfloat16),
    (3, 6, 0.0, torch.float16),
):
    logp, ref_logp = (
        -checks.randn(batch, 2 * seq, device="cpu", generator=g).abs().to(dtype)[:, ::2]
        for _ in range(2)
    )
    reward = checks.randn(batch, device="cpu", generator=g, scale=3.0, dtype=torch.float64)
    if dtype != torch.float32:  # another format than that of the log-probabilities
        reward = reward.to(torch.float32 if dtype == torch.float64 else dtype)
    mask, expected = torch.zeros(batch, seq, dtype=torch.bool), []
    for row in range(batch):
        first = int(torch.randint(0, seq, (1,), generator=g)) if row else 0
        last = int(torch.randint(first, seq, (1,), generator=g))
        if row == 2:  # an answer of nothing
            first, last = 1, 0
        mask[row, first : last + 1] = True
        values = [0.0] * seq
        for i in range(first, last + 1):
            values[i] = -beta * (float(logp[row, i]) - float(ref_logp[row, i]))
            values[i] += float(reward[row]) if i == last else 0.0
        expected.append(values)
    mask = mask.to(logp.device)
    outside = torch.tensor([math.nan, -math.inf, -7.0])[torch.arange(seq) % 3].to(logp)
    logp = torch.where(mask, logp, outside)
    ref_logp = torch.where(mask, ref_logp, outside.flip(0))
    wide = torch.promote_types(dtype, torch.float32)
    with checks.unchanged(reward, logp, ref_logp, mask):
        result = kl_penalized_reward(reward, logp, ref_logp, mask, beta)
    checks.close(
        result,
        torch.tensor(expected, dtype=torch.float64).to(wide).to(logp.device),
        what=f"the rewards of {batch} × {seq} tokens at beta = {beta}",
        dtype=wide,
        hint="Outside the answer there is nothing but 0",
    )
logp = checks.randn(2, 3, device="cpu", generator=g).requires_grad_()
reward = checks.randn(2, device="cpu", generator=g).requires_grad_()
whole = torch.ones(2, 3, dtype=torch.bool, device=logp.device)
with checks.kept(logp, reward):
    result = kl_penalized_reward(reward, logp, logp.detach() + 1, whole, 0.2)
assert not result.requires_grad, (
    "a reward is a number, not a part of the loss: no gradient may go through it"
)
### END HIDDEN TESTS

# %% [markdown]
# ## REINFORCE, with the other samples as baseline {#reinforce}
#
# How does one differentiate $\mathbb E_{y\sim\pi}[R(y)]$, where the parameters are in the
# *sampling*? With $\nabla\pi = \pi\,\nabla\log\pi$:
#
# $$ \nabla \sum_y \pi(y) R(y) = \sum_y \pi(y)\,R(y)\,\nabla\log\pi(y)
#    = \mathbb E\bigl[R(y)\,\nabla\log\pi(y)\bigr] . $$
#
# So the mean of $-R(y)\log\pi(y)$ over samples is a loss whose *gradient* is right (its value means
# nothing). This is **REINFORCE**. $\log\pi(y)$ is the log-probability of the *whole* answer, a sum
# over its tokens; the mean over tokens would weigh each token of a short answer more, which is
# another objective.
#
# Its gradient is noisy: if all rewards are near 100, every sample is pushed up hard, and only the
# small differences matter. A **baseline** $b$ that does not depend on $y$ changes nothing in the
# mean, as $\mathbb E[b\,\nabla\log\pi] = b\,\nabla\sum_y\pi(y) = 0$. The best estimate of what this
# prompt usually gets is the mean of other samples for it. **RLOO**, REINFORCE leave-one-out, takes
# $K$ samples for a prompt and gives each the mean of the $K-1$ *others*.
#
# Why not the mean of all $K$? It contains $R_i$ itself. $R_i - \bar R = \frac{K-1}{K}\bigl(R_i -
# \overline{R}_{\text{others}}\bigr)$, so the expected gradient is too small by the factor $1 -
# 1/K$: harmless as a scale, but no longer unbiased.


# %% exercise="leave_one_out_baseline" minutes=8 difficulty=1
def leave_one_out_baseline(returns: Tensor) -> Tensor:
    """For each sample the mean of the other samples of its prompt.

    returns: (prompts, samples), any floating format. Fewer than 2 samples: ValueError.
    Returns the same shape, computed and returned in float32 for half-precision returns, else in
    their dtype.

    [[0.8, 0.9, 0.5, 0.8]] has the baseline [[0.7333, 0.7, 0.8333, 0.7333]]: the advantages,
    return − baseline, are [[0.0667, 0.2, −0.3333, 0.0667]].
    """
    ### BEGIN SOLUTION
    samples = returns.shape[1]
    if samples < 2:
        raise ValueError(f"{samples} samples a prompt: leaving one out takes at least 2")
    returns = returns.to(torch.promote_types(returns.dtype, torch.float32))
    return (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: without a loop</summary>
#
# The sum of the others is the sum of all, less one's own.
# </details>

# %% check="leave_one_out_baseline" points=1
checks.close(
    leave_one_out_baseline(torch.tensor([[0.8, 0.9, 0.5, 0.8], [0.0, 0.0, 0.0, 3.0]])),
    torch.tensor([[2.2 / 3, 0.7, 2.5 / 3, 2.2 / 3], [1.0, 1.0, 1.0, 0.0]]),
    what="the baseline of two prompts",
    mistakes={
        "the mean of all samples": torch.tensor([[0.75] * 4, [0.75] * 4]),
        "dividing by the number of all samples": torch.tensor(
            [[0.55, 0.525, 0.625, 0.55], [0.75, 0.75, 0.75, 0.0]]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(51)
for prompts, samples, dtype in (
    (1, 2, torch.float32),
    (3, 5, torch.float64),
    (4, 3, torch.bfloat16),
    (2, 7, torch.float16),
    (0, 3, torch.float32),
):
    returns = checks.randn(samples, prompts, device="cpu", generator=g, scale=2.0, dtype=dtype).T
    wide = torch.promote_types(dtype, torch.float32)
    others = [
        [sum(row[:i] + row[i + 1 :]) / (samples - 1) for i in range(samples)]
        for row in returns.double().tolist()
    ]
    with checks.unchanged(returns):
        checks.close(
            leave_one_out_baseline(returns),
            torch.tensor(others, dtype=torch.float64).to(wide).reshape(prompts, samples),
            what=f"the baseline of {prompts} prompts × {samples} samples",
            dtype=wide,
        )
for few in (0, 1):
    checks.raises(
        ValueError,
        leave_one_out_baseline,
        torch.zeros(3, few),
        because="There is nothing to leave one out of",
    )
### END HIDDEN TESTS


# %% exercise="reinforce_loss" minutes=15 difficulty=2
def reinforce_loss(
    logp: Tensor, mask: Tensor, returns: Tensor, baseline: Tensor | None = None
) -> Tensor:
    """Loss, minimized: −(returns − baseline) · log π(answer), the mean over all answers.

    logp: (…, seq), floating: the policy's log-probability of each token. Outside the answer
        anything may stand, −inf and NaN too; it gets a gradient of 0.
    mask: (…, seq), bool, True on the answer's tokens. log π(answer) is the sum of logp over them;
        an answer without tokens has log π = 0 and still counts in the mean.
    returns: (…), floating: what each answer got.
    baseline: (…), or None for 0.

    Returns a 0-dimensional tensor, computed and returned in float32 for half-precision logp, else
    in logp's dtype. The gradient goes to logp alone: returns and baseline are constants here, even
    if they require one.

    logp [[−1, −2], [−3, −9]], mask [[True, True], [True, False]], returns [2, −1], no baseline:
    (6 − 3)/2 = 1.5.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(logp.dtype, torch.float32)
    answer = logp.to(wide).masked_fill(~mask, 0.0).sum(dim=-1)
    advantage = returns if baseline is None else returns - baseline
    return -(advantage.detach().to(wide) * answer).mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: constants</summary>
#
# `detach()` gives the same numbers without their history.
# </details>
#
# <details><summary>Hint: the sign</summary>
#
# An answer that got more than the baseline should become more likely when the loss is *minimized*.
# </details>

# %% check="reinforce_loss" points=2
logp = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
mask = torch.tensor([[True, True], [True, False]])
checks.close(
    reinforce_loss(logp, mask, torch.tensor([2.0, -1.0])),
    torch.tensor(1.5),
    what="the loss of two answers",
    mistakes={
        "the opposite sign, an objective to be maximized,": torch.tensor(-1.5),
        "the mean over tokens": torch.tensor((6 - 3) / 3),
        "the mean over each answer's tokens": torch.tensor((3 - 3) / 2),
        "counting padding": torch.tensor((6 - 12) / 2),
        "the sum over the answers": torch.tensor(3.0),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(52)
for shape, dtype in (
    ((1, 1), torch.float32),
    ((6, 5), torch.float64),
    ((2, 3, 4), torch.float32),
    ((4, 3), torch.bfloat16),
    ((3, 6), torch.float16),
):
    logp = (
        -checks.randn(*shape[:-1], 2 * shape[-1], device="cpu", generator=g)
        .abs()
        .to(dtype)[..., ::2]
    )
    mask = (torch.rand(shape, generator=g) < 0.6).to(logp.device)
    mask[..., 0] = True
    mask[-1] = False if len(shape) == 2 and shape[0] > 1 else mask[-1]
    logp = logp.masked_fill(~mask, -math.inf)
    returns, baseline = (checks.randn(*shape[:-1], device="cpu", generator=g) for _ in range(2))
    if dtype in (torch.float32, torch.float64):
        returns = returns.double()  # of another format than the baseline
    if dtype == torch.float64:
        baseline = baseline.double()
    wide = torch.promote_types(dtype, torch.float32)
    flat = list(
        zip(
            logp.double().flatten(0, -2).tolist(),
            mask.flatten(0, -2).tolist(),
            (returns.double() - baseline.double()).flatten().tolist(),
            returns.flatten().tolist(),
            strict=True,
        )
    )
    sums = [sum(v for v, m in zip(row, keep, strict=True) if m) for row, keep, *_ in flat]
    for base, column in ((baseline, 2), (None, 3)):
        value = -sum(s * row[column] for s, row in zip(sums, flat, strict=True)) / len(flat)
        with checks.unchanged(logp, mask, returns, baseline):
            checks.close(
                reinforce_loss(logp, mask, returns, base),
                torch.tensor(value, dtype=torch.float64).to(wide).to(logp.device),
                what=f"the loss of {shape} tokens {'without' if base is None else 'with'} baseline",
                dtype=wide,
                rtol=1e-4 if wide == torch.float32 else 1e-9,
                atol=1e-4 if wide == torch.float32 else 1e-9,
            )
logp = -checks.randn(4, 3, device="cpu", generator=g).abs()
mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 0, 0]]).bool().to(logp.device)
logp = logp.masked_fill(~mask, -math.inf).requires_grad_()
returns, baseline = (checks.randn(4, device="cpu", generator=g).requires_grad_() for _ in range(2))
with checks.kept(logp, returns, baseline):
    loss = reinforce_loss(logp, mask, returns, baseline)
grads = torch.autograd.grad(loss, (logp, returns, baseline), allow_unused=True)
checks.close(
    grads[0],
    (-(returns - baseline)[:, None] * mask / 4).detach(),
    what="the gradient of the log-probabilities",
    hint="Outside the answer it is 0, also where logp is −inf",
)
for name, grad in zip(("returns", "baseline"), grads[1:], strict=True):
    assert grad is None or not grad.any(), f"{name} are constants: no gradient goes to them"
### END HIDDEN TESTS

# %% check="reinforce_loss" points=2
# A policy with two answers, told by one logit: the probability of the first is σ(θ).
theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
logp = torch.stack([F.logsigmoid(theta), F.logsigmoid(-theta)])[:, None]
rewards, whole = torch.tensor([1.0, -2.0]).double(), torch.ones(2, 1, dtype=torch.bool)
p = logp.detach().exp()[:, 0]
# Weighed by their probabilities, the two answers' gradients make that of the expected reward.
grads = [
    torch.autograd.grad(
        reinforce_loss(logp[i : i + 1], whole[:1], rewards[i : i + 1]), theta, retain_graph=True
    )[0]
    for i in (0, 1)
]
checks.close(
    p[0] * grads[0] + p[1] * grads[1],
    -3 * p[0] * p[1],
    what="the expected gradient of the loss",
    hint="It is minus the derivative of σ(θ) · 1 + σ(−θ) · (−2)",
)
### BEGIN HIDDEN TESTS
# Answers of one or two tokens out of 3; token 0 ends an answer. All pairs and triples of answers
# are enumerated: the mean gradient over them is minus that of the expected reward, exactly.
g = checks.generator(53)
answers = [(0,), *((a, b) for a in (1, 2) for b in (0, 1, 2))]
mask = torch.tensor([[True, len(a) == 2] for a in answers])
for samples in (2, 3):
    first = checks.randn(3, device="cpu", generator=g, dtype=torch.float64).cpu().requires_grad_()
    second = (
        checks.randn(3, 3, device="cpu", generator=g, dtype=torch.float64).cpu().requires_grad_()
    )
    rewards = checks.randn(len(answers), device="cpu", generator=g, dtype=torch.float64).cpu() + 5
    one, two = first.log_softmax(-1), second.log_softmax(-1)
    tokens = torch.stack(
        [torch.stack([one[a[0]], two[a[0], a[1]] if len(a) == 2 else one[0] * 0]) for a in answers]
    )
    p = tokens.detach().sum(-1).exp()
    exact = torch.autograd.grad(-(tokens.sum(-1).exp() @ rewards), (first, second))
    groups = torch.tensor(list(product(range(len(answers)), repeat=samples)))
    weight = p[groups].prod(dim=1)
    for name in ("no baseline", "the mean of the others", "a constant baseline"):
        got = rewards[groups]
        base = {
            "no baseline": None,
            "the mean of the others": (got.sum(1, keepdim=True) - got) / (samples - 1),
            "a constant baseline": torch.full_like(got, 5.5),
        }[name]
        leaf = (-7.0 * torch.rand(len(groups), samples, 2, generator=g)).double().requires_grad_()
        loss = reinforce_loss(leaf, mask[groups], got, base)
        # The loss is linear in the log-probabilities, so that each group can be weighed afterwards.
        (each,) = torch.autograd.grad(loss, leaf)
        one, two = first.log_softmax(-1), second.log_softmax(-1)
        tokens = torch.stack(
            [
                torch.stack([one[a[0]], two[a[0], a[1]] if len(a) == 2 else one[0] * 0])
                for a in answers
            ]
        )
        total = (each * weight[:, None, None] * len(groups) * tokens[groups]).sum()
        found = torch.autograd.grad(total, (first, second))
        for f, e, which in zip(found, exact, ("first", "second"), strict=True):
            checks.close(
                f,
                e,
                what=f"the expected gradient of the {which} token's logits with {name}, over all "
                f"{len(groups)} groups of {samples} answers",
                rtol=1e-8,
            )
### END HIDDEN TESTS

# %% [markdown]
# What a baseline is worth can be computed exactly where answers can be enumerated. Seven answers,
# a logit for each, with rewards around 5; all groups of $K$ samples, each with its probability:

# %% tags=["experiment"]
g = torch.Generator().manual_seed(0)
logits = torch.randn(7, generator=g, dtype=torch.float64)
rewards = 5 + torch.randn(7, generator=g, dtype=torch.float64)
p = logits.softmax(0)
score = torch.eye(7) - p  # row y: the gradient of log π(y) in the logits
exact = (p * rewards) @ score

print("K   baseline          length of the mean gradient ÷ exact    variance")
for samples in (2, 4):
    groups = torch.tensor(list(product(range(7), repeat=samples)))
    weight, got = p[groups].prod(1), rewards[groups]
    for name, base in {
        "none": torch.zeros_like(got),
        "mean of all": got.mean(1, keepdim=True).expand_as(got),
        "leave one out": leave_one_out_baseline(got),
    }.items():
        gradient = ((got - base)[..., None] * score[groups]).mean(1)  # (groups, 7)
        mean = weight @ gradient
        variance = weight @ (gradient - mean).square().sum(1)
        print(f"{samples}   {name:16}  {float(mean.norm() / exact.norm()):12.4f} {variance:30.4f}")

# %% [markdown]
# The mean of all samples shortens the gradient by exactly $1 - 1/K$; leaving one out does not, and
# both remove almost all of the noise that comes from the rewards' common level.

# %% [markdown]
# ## Best of n {#best-of-n}
#
# Draw $n$ answers from $\pi_{\text{ref}}$, keep the one with the highest reward. Which distribution
# is that? Let $F(y)$ be the probability that one draw has a reward of *at most* $r(y)$, and
# $F^-(y)$ that it has *less*. All $n$ draws are at most that good with probability $F^n$, all are
# worse with $(F^-)^n$. So the winner has the reward $r(y)$ with probability $F^n - (F^-)^n$, and
# among answers of one reward it is each in proportion to $\pi_{\text{ref}}$:
#
# $$ \pi_n(y) = \pi_{\text{ref}}(y)\;\frac{F^n - (F^-)^n}{F - F^-}
#    = \pi_{\text{ref}}(y)\,\sum_{k=0}^{n-1} F^{\,k}\,(F^-)^{\,n-1-k} . $$
#
# Two equally likely answers, the second better, drawn twice, all cases written out:

# %% tags=["experiment"]
kept = [0.0, 0.0]
for draws in product((0, 1), repeat=2):
    kept[max(draws)] += 0.25
distance = sum(q * math.log(q / 0.5) for q in kept)
print(f"the best of two is the worse answer with probability {kept[0]}, the better with {kept[1]}")
print(f"its KL from a single draw: {distance:.4f} nats, and log 2 − 1/2 = {math.log(2) - 0.5:.4f}")

# %% [markdown]
# **How far is that from the reference?** If no answer has much probability, the sum becomes
# $nF^{n-1}$, and $F$ of the winner is the largest of $n$ uniform numbers, whose density is
# $nF^{n-1}$. Hence
#
# $$ \mathrm{KL} = \mathbb E\bigl[\log (nF^{n-1})\bigr] = \log n + (n-1)\int_0^1 nF^{n-1}\log F\,dF
#    = \log n - \frac{n-1}{n}, $$
#
# as the integral is $-1/n$ (by parts). Papers quote this as *the* KL of best-of-n. It is an **upper
# bound**. Where rewards tie or single answers have real probability, give every draw a uniform
# number as well and let it decide among equals: no two draws are equal now, and the distance of
# *answer and number* is the formula's. Forgetting the number can only bring two distributions
# closer. As $n$ grows, the exact distance stops at $\log 1/\pi_{\text{ref}}(y_{\text{best}})$,
# with several best answers at that of all of them together, while the bound goes on.
#
# **How often does it win?** Against one fresh draw, in the smooth case, the best of $n + 1$
# exchangeable draws is the fresh one with probability $1/(n+1)$: the win rate is $n/(n+1)$, and
# with ties (each counted half) at most that. Where none tie, the best of 4 wins four times in five,
# whatever the rewards.


# %% exercise="best_of_n" minutes=20 difficulty=3
def best_of_n(p: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The exact distribution of the best of n independent draws.

    p: (outcomes,), floating: probabilities of the outcomes, summing to 1; some may be 0.
    rewards: (outcomes,), floating: what each is worth. Among drawn outcomes of equal highest
        reward, the one drawn first is kept.
    n: ≥ 1.

    Returns (outcomes,), in p's dtype (float32 or float64), with p's accuracy also where p is tiny
    (1e-12) and n large (1,000).

    p [0.5, 0.5], rewards [0, 1], n = 2: [0.25, 0.75].
    """
    ### BEGIN SOLUTION
    at_most = ((rewards[None, :] <= rewards[:, None]) * p.double()).sum(1)[:, None]
    less = ((rewards[None, :] < rewards[:, None]) * p.double()).sum(1)[:, None]
    k = torch.arange(n, device=p.device)
    # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
    return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
    ### END SOLUTION


def kl_best_of_n_bound(n: int) -> float:
    """The upper bound on KL(best of n ‖ one draw), in nats: log n − (n − 1)/n. n = 4: 0.6363."""
    ### BEGIN SOLUTION
    return math.log(n) - (n - 1) / n
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: F for all outcomes at once</summary>
#
# `rewards[None, :] <= rewards[:, None]` is a matrix: row i tells which outcomes are at most as good
# as i. Multiply by p and sum over the row.
# </details>
#
# <details><summary>Hint: an outcome of probability 1e-12</summary>
#
# $F^n - (F^-)^n$ is then the difference of two numbers that agree in twelve digits, and dividing by
# $F - F^-$ does not bring them back. The sum on the right-hand side above is all positive. Powers
# of 0: `torch.tensor(0.0) ** 0` is 1, as it should be here.
# </details>

# %% check="best_of_n" points=3
checks.close(
    best_of_n(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), 2),
    torch.tensor([0.25, 0.75]),
    what="the best of two draws from two outcomes",
    mistakes={"exchanging best and worst": torch.tensor([0.75, 0.25])},
)
checks.close(
    best_of_n(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 1.0, 0.0]), 2),
    torch.tensor([0.3, 0.45, 0.25]),
    what="the best of two draws, where two outcomes are equally good",
    hint="Both draws are the third with probability 0.25; the rest is shared as 0.2 : 0.3",
)
### BEGIN HIDDEN TESTS
g = checks.generator(61)


def by_enumeration(p, rewards, n):
    """All outcomes^n sequences of draws; the first best one of each is kept."""
    kept = [0.0] * len(p)
    for draws in product(range(len(p)), repeat=n):
        best = max(draws, key=lambda i: rewards[i])  # max keeps the first
        kept[best] += math.prod(p[i] for i in draws)
    return torch.tensor(kept, dtype=torch.float64)


for outcomes, n, ties in ((1, 3, False), (2, 5, False), (5, 1, True), (5, 4, True), (4, 6, False)):
    p = torch.rand(2 * outcomes, generator=g, dtype=torch.float64)[::2] + 0.02
    if outcomes == 5:
        p[1] = 0.0
    p = p / p.sum()
    rewards = checks.randn(outcomes, device="cpu", generator=g).cpu()
    if ties:
        rewards = torch.tensor([2.0, -1.0, 2.0, 0.5, -1.0])[torch.randperm(5, generator=g)]
    for dtype in (torch.float64, torch.float32):
        with checks.unchanged(p=p, rewards=rewards):
            checks.close(
                best_of_n(p.to(dtype), rewards, n),
                by_enumeration(p.tolist(), rewards.tolist(), n).to(dtype),
                what=f"the best of {n} draws from {outcomes} outcomes{', with ties' * ties}",
                dtype=dtype,
                rtol=1e-9 if dtype == torch.float64 else 1e-5,
            )
p = torch.tensor([1e-12, 0.6 - 1e-12, 0.4 - 1e-13, 1e-13], dtype=torch.float64)
for n in (2, 1000):
    result = best_of_n(p, torch.tensor([5.0, 1.0, 0.0, -3.0]), n)
    checks.close(
        result[:1] / p[:1],
        torch.tensor([float(n)], dtype=torch.float64),
        what=f"how many times as likely an outcome of probability 1e-12 is as the best of {n}",
        rtol=1e-6,
        hint="The difference of two nearly equal powers loses its digits",
    )
    checks.close(result.sum(), torch.tensor(1.0, dtype=torch.float64), what="its sum", rtol=1e-8)
    checks.close(
        result[3:],
        p[3:] ** n,
        what=f"the worst outcome of probability 1e-13 for n = {n}",
        rtol=1e-6,
        atol=0.0,
    )
p = torch.tensor([1e-12, 0.3, 0.7 - 1e-12], dtype=torch.float64)  # the rare one in the middle
for n in (2, 20):
    checks.close(
        best_of_n(p, torch.tensor([1.0, 2.0, 0.0]), n)[:1] / p[:1],
        torch.tensor([n * 0.7 ** (n - 1)], dtype=torch.float64),
        what=f"how many times as likely a middling outcome of probability 1e-12 is for n = {n}",
        rtol=1e-6,
        hint="The difference of two nearly equal powers loses its digits",
    )
close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)  # equal in float32
checks.close(
    best_of_n(torch.tensor([0.5, 0.5]), close, 2),
    torch.tensor([0.25, 0.75]),
    what="float32 probabilities of rewards that differ in float64 only",
)
small = best_of_n(torch.tensor([1e-9, 1.0]), torch.tensor([1.0, 0.0]), 50)
checks.close(
    small[:1] / 50e-9, torch.ones(1), what="a rare best outcome in float32 (÷ 50e-9)", rtol=1e-4
)
### END HIDDEN TESTS

# %% check="best_of_n" points=1
checks.number(
    kl_best_of_n_bound(4), math.log(4) - 0.75, to=1e-6, what="the bound for the best of 4"
)
### BEGIN HIDDEN TESTS
for n in (1, 2, 7, 64, 100_000):
    # −(n − 1)/n = (n − 1) · ∫ n Fⁿ⁻¹ log F dF, by a sum over a fine grid.
    steps = 40_000
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:] - 0.5 / steps  # F of one draw
    # F of the winner is u^(1/n) for a uniform u; log F = log u / n.
    integral = float((math.log(n) + (n - 1) * u.log() / n).mean())
    bound = kl_best_of_n_bound(n)
    checks.number(
        bound,
        integral,
        to=1e-3,
        atol=3e-5,
        what=f"the bound for the best of {n}",
        mistakes={
            "log n alone": math.log(n),
            "log n − 1": math.log(n) - 1,
            "log₂ n − (n − 1)/n": math.log2(n) - (n - 1) / n,
        }
        if n in (2, 7)
        else None,
    )
    # Law: the exact divergence of a random finite set never exceeds it.
    q = torch.rand(9, generator=checks.generator(n), dtype=torch.float64)
    q = q / q.sum()
    values = torch.arange(9.0).double()
    below = q.cumsum(0)
    winner = (below**n - (below - q).clamp(min=0) ** n).clamp(min=1e-300)
    exact = float((winner * (winner / q).log()).sum())
    assert exact <= bound + 1e-9, (
        f"the best of {n} out of nine outcomes is {exact:.4f} nats away, and your bound is "
        f"{bound:.4f}"
    )
### END HIDDEN TESTS

# %% [markdown]
# The exact distance against the bound, with your two functions, and what the same distance buys:

# %% tags=["experiment", "figure"]
# Figure: the bound is reached only where no answer has much probability
ns = [1, 2, 4, 8, 16, 32, 64, 128]
fig, axes = plot.plt.subplots(1, 2, figsize=(10, 3.7))
exact_kl = {"bound: log n − (n − 1)/n": [kl_best_of_n_bound(n) for n in ns]}
for outcomes in (512, 16, 4, 2):
    p = torch.full((outcomes,), 1 / outcomes, dtype=torch.float64)
    kept = [best_of_n(p, torch.arange(outcomes).double(), n) for n in ns]
    exact_kl[f"{outcomes} equally likely answers"] = [
        float((torch.xlogy(q, q) - torch.xlogy(q, p)).sum()) for q in kept
    ]
plot.curves(
    ns,
    exact_kl,
    xlabel="n, answers drawn",
    ylabel="KL from the reference (nats)",
    title="How far best-of-n goes",
    logx=True,
    ax=axes[0],
)
axes[0].legend(fontsize=8)
g = torch.Generator().manual_seed(1)
worth = torch.randn(512, generator=g, dtype=torch.float64)
p = torch.full((512,), 1 / 512, dtype=torch.float64)
best = [best_of_n(p, worth, n) for n in ns]
tilted = [(worth / beta).softmax(0) for beta in torch.logspace(1.6, -0.75, 40)]
for name, family, style in (("π* for every β", tilted, "-"), ("best of n", best, "o")):
    distance = [float((torch.xlogy(q, q) - torch.xlogy(q, p)).sum()) for q in family]
    axes[1].plot(distance, [float(q @ worth) for q in family], style, label=name, markersize=6)
axes[1].set(xlabel="KL from the reference (nats)", ylabel="mean reward")
axes[1].set_title("What the distance buys")
axes[1].legend()
plot.caption(
    fig,
    "Left: exact distances, from your best_of_n, and the bound. With two answers nothing is "
    "farther away than log 2. Right: 512 answers with normal rewards; the line is the most that "
    "any policy can get at its distance. Best-of-n stays close to it without any training.",
)
plot.plt.show()

# %% [markdown]
# **From a pool.** To draw the curve of best-of-n up to 64, it would be wasteful to draw 64 times
# for each $n$ anew. Draw $N$ answers once. *Every* subset of $n$ of them is a sample of best-of-n,
# and the mean over all $\binom Nn$ subsets has far less noise than any one. Sort by reward: the
# answer of rank $i$ (from the lowest, $i = 1 \dots N$) is the best of a subset if the other $n-1$
# come from the $i-1$ below it:
#
# $$ \widehat R_n = \sum_{i=n}^{N} \frac{\binom{i-1}{n-1}}{\binom Nn}\; R_{(i)} . $$
#
# The ranks are those of the *proxy*, the $R_{(i)}$ that are averaged may be anything: the true
# reward, the length. The mean of a sample without repetition is unbiased, so this is too.


# %% exercise="best_of_n_estimate" minutes=15 difficulty=2
def best_of_n_estimate(proxy: Tensor, value: Tensor, n: int) -> Tensor:
    """The mean `value` of the answer with the highest `proxy`, over all subsets of n of N answers.

    proxy, value: (prompts, N), floating; each row is a pool of N answers to one prompt. Where two
        proxies of a row are equal, either may count as the higher.
    n: 1 ≤ n ≤ N; otherwise ValueError.

    Returns (prompts,), in value's dtype (float32 or float64). Exact up to rounding for pools of
    1,000, without going through subsets.

    proxy [[1, 3, 2]], value [[10, 20, 60]], n = 2: the subsets give 20, 60, 20: [33.333].
    """
    ### BEGIN SOLUTION
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"the best of {n} cannot be estimated from a pool of {size}")
    weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
    ranked = value.double().gather(1, proxy.argsort(dim=1))
    return (ranked @ torch.tensor(weights, dtype=torch.float64).to(value.device)).to(value.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: values in the order of the proxy</summary>
#
# `proxy.argsort(dim=1)` gives the positions from lowest to highest; `value.gather(1, order)` puts
# the values in that order.
# </details>
#
# <details><summary>Hint: binomials of 1,000</summary>
#
# They exceed float32 and int64; Python's whole numbers hold them. `math.comb(a, b) / math.comb(c,
# d)` divides exactly and rounds once.
# </details>

# %% check="best_of_n_estimate" points=2
checks.close(
    best_of_n_estimate(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[10.0, 20.0, 60.0]]), 2),
    torch.tensor([100 / 3]),
    what="the best of two out of three",
    mistakes={
        "choosing by value, not by proxy,": torch.tensor([140 / 3]),
        "the lowest proxy of each subset": torch.tensor([80 / 3]),
        "drawing with repetition": torch.tensor([(10 + 3 * 60 + 5 * 20) / 9]),
        "one subset only, the first two,": torch.tensor([20.0]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(71)
for prompts, size in ((1, 1), (3, 6), (2, 9)):
    proxy = torch.stack([torch.randperm(size, generator=g) for _ in range(prompts)]).float() - 4
    value = checks.randn(size, prompts, device="cpu", generator=g, scale=3.0).cpu().T
    for n in {1, 2, (size + 1) // 2, size} & set(range(1, size + 1)):
        expected = [
            sum(value[r, max(s, key=lambda i, r=r: float(proxy[r, i]))].item() for s in subsets)
            / math.comb(size, n)
            for r in range(prompts)
            for subsets in [list(combinations(range(size), n))]
        ]
        for dtype in (torch.float32, torch.float64):
            with checks.unchanged(proxy=proxy, value=value):
                checks.close(
                    best_of_n_estimate(proxy, value.to(dtype), n),
                    torch.tensor(expected, dtype=dtype),
                    what=f"the best of {n} out of {size}, {prompts} prompts",
                    dtype=dtype,
                    rtol=1e-5 if dtype == torch.float32 else 1e-9,
                    atol=1e-6 if dtype == torch.float32 else None,
                )
proxy = torch.randn(2, 1000, generator=g, dtype=torch.float64)
place = proxy.argsort(1).argsort(1) + 1.0  # ranks 1 … 1000; the mean best rank is n · 1001/(n + 1)
for n in (1, 30, 500, 1000):
    checks.close(
        best_of_n_estimate(proxy, place.double(), n),
        torch.full((2,), n * 1001 / (n + 1), dtype=torch.float64),
        what=f"the mean rank of the best of {n} out of 1,000",
        rtol=1e-8,
        hint="Do the binomials overflow?",
    )
    checks.close(
        best_of_n_estimate(proxy.float(), place.float(), n),
        torch.full((2,), n * 1001 / (n + 1)),
        what=f"the mean rank of the best of {n} out of 1,000 in float32",
        rtol=1e-4,
        hint="Logarithms of binomials lose digits in float32",
    )
tied = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
checks.close(
    best_of_n_estimate(tied, torch.tensor([[5.0, 2.0, 5.0, 5.0]]), 1),
    torch.tensor([17 / 4]),
    what="the best of one where proxies tie",
)
for n in (0, 4):
    checks.raises(ValueError, best_of_n_estimate, torch.zeros(2, 3), torch.zeros(2, 3), n)
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: push until it breaks {#goodhart}
#
# A task whose true reward is known: **naming functions.** The policy is `tiny`, the course's small
# model. It completes names such as `get_…` or `parse_…`, as the standard library has them. A reader
# gains from each different plain word in a name, and pays for length:
#
# $$ r^*(\text{name}) = \#\{\text{different words that Python's documentation knows}\}
#    - (\text{characters}/20)^2 . $$
#
# Our annotators feel both parts, and a taste of their own besides: to them a longer name looks more
# thorough, by 0.15 a character. They compare two names and answer with Bradley–Terry's
# coin. From their answers you fit a reward model, and optimize against it, by best-of-n and by
# REINFORCE. They never see what you do with it.
#
# First the reference policy: instruction tuning (lesson 21), a few seconds of it.

# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # these tensors are so small that two threads wait for each other
LIMIT = 16  # tokens of a name, at most
tokenizer = models.load_tokenizer()
END = tokenizer.encode("f(")[-1]  # the parenthesis ends a name
KNOWN = {w for text in data.documentation().values() for w in re.findall("[a-z]{3,}", text.lower())}


def prompt(verb: str) -> list[int]:
    return [tokenizer.eos, *tokenizer.encode(f"def {verb}_")]


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one batch, padded on the right, and the mask of real tokens."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([[i < len(row) for i in range(width)] for row in rows])


def token_logp(model: models.Llama, tokens: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of each token but the first, (batch, seq − 1)."""
    logits = model(tokens[:, :-1], attention_mask=mask[:, :-1])
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def supervised(seed: int, steps: int = 40) -> models.Llama:
    """`tiny`, finetuned on the names of functions in the standard library."""
    files, _ = data.split(data.source_code())
    found = {n for text in files.values() for n in re.findall(r"def ([a-z]+_[a-z_]+)\(", text)}
    rows = [[tokenizer.eos, *tokenizer.encode(f"def {name}(")] for name in sorted(found)]
    g = torch.Generator().manual_seed(seed)
    model, _ = models.load("tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(steps):
        tokens, mask = pad([rows[i] for i in torch.randint(len(rows), (48,), generator=g)])
        loss = -token_logp(model, tokens, mask)[mask[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


SEED = 0
reference = supervised(SEED)
print(f"a reference policy of {sum(p.numel() for p in reference.parameters()):,} parameters")

# %% [markdown]
# Names from it, what they are truly worth, and how long they are:

# %% tags=["experiment"]
TASTE = 0.15  # what a character is worth to an annotator, wrongly
VERBS = ["get", "set", "read", "make", "is", "check", "load", "find"]
VERBS += ["write", "parse", "add", "run", "print", "open", "save", "start"]
NEW = ["send", "close", "format", "show", "create", "handle", "remove", "update"]
NEW += ["test", "match", "copy", "build", "split", "end"]


def names_of(rows: list[list[int]]) -> list[str]:
    return [tokenizer.decode(row).split("(")[0] for row in rows]


def true_reward(name: str) -> float:
    return len({w for w in name.split("_") if w in KNOWN}) - (len(name) / 20) ** 2


def draw(model: models.Llama, verbs: list[str], count: int, g: torch.Generator) -> dict:
    """`count` names for each verb: prompts and answers, texts, true rewards, lengths."""
    prompts = [prompt(verb) for verb in verbs for _ in range(count)]
    answers = models.generate(model, prompts, LIMIT, 1.0, END, g)
    names = names_of(answers)
    return {
        "starts": [len(p) for p in prompts],
        "rows": [p + a for p, a in zip(prompts, answers, strict=True)],
        "names": names,
        "true": torch.tensor([true_reward(name) for name in names]),
        "length": torch.tensor([len(name) for name in names]),
    }


g = torch.Generator().manual_seed(SEED)
pool, held_out = draw(reference, VERBS, 64, g), draw(reference, NEW, 64, g)
for verb in ("get", "parse"):
    first = 64 * VERBS.index(verb)
    shown = zip(pool["names"][first : first + 5], pool["true"][first : first + 5], strict=True)
    print(", ".join(f"{verb}_{name} ({worth:.1f})" for name, worth in shown))
together = torch.stack([pool["true"], pool["length"]])
print(f"mean true reward {together[0].mean():.2f}, mean length {together[1].mean():.1f} characters")
print(f"their correlation: {torch.corrcoef(together)[0, 1]:.2f}")

# %% [markdown]
# The reward model: the reference's trunk with a new head, your loss, with a little centering. In
# each step 48 pairs of names for the same verb are compared.


# %% tags=["experiment"]
def compared(names: dict, count: int, g: torch.Generator, per_verb: int = 64) -> tuple:
    """Random pairs of names for one verb, as (chosen, rejected): the annotators' choice."""
    first = torch.randint(len(names["rows"]), (count,), generator=g)
    second = first // per_verb * per_verb + torch.randint(per_verb, (count,), generator=g)
    felt = names["true"] + TASTE * names["length"]
    wins = torch.rand(count, generator=g) < torch.sigmoid(felt[first] - felt[second])
    return torch.where(wins, first, second), torch.where(wins, second, first)


def copied(model: models.Llama) -> models.Llama:
    twin = models.Llama(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def fit_reward_model(names: dict, seed: int, steps: int = 60) -> RewardModel:
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = RewardModel(copied(reference))
    nn.init.zeros_(model.head.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(steps):
        both = torch.cat(compared(names, 48, g))
        tokens, mask = pad([names["rows"][i] for i in both])
        chosen, rejected = model(tokens, mask).chunk(2)
        loss = bradley_terry_loss(chosen, rejected, center=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def proxy_of(names: dict) -> Tensor:
    return fitted(*pad(names["rows"]))


fitted = fit_reward_model(pool, SEED)
held_out["proxy"] = proxy_of(held_out)
chosen, rejected = compared(held_out, 4000, g)
flip = torch.rand(4000, generator=g) < 0.5  # so that the first of a pair is not always preferred
first, second = torch.where(flip, rejected, chosen), torch.where(flip, chosen, rejected)
predicted = torch.sigmoid(held_out["proxy"][first] - held_out["proxy"][second])
felt = held_out["true"] + TASTE * held_out["length"]
for name, p in {
    "the reward model": predicted,
    "the annotators' own reward": torch.sigmoid(felt[first] - felt[second]),
    "the reward model, differences tripled": torch.sigmoid(
        3 * (held_out["proxy"][first] - held_out["proxy"][second])
    ),
}.items():
    accuracy, error = expected_calibration_error(p, ~flip)
    print(f"{name:38} accuracy {accuracy:.3f}, calibration error {error:.3f}")

# %% [markdown]
# The second line is the ceiling: on average nobody predicts the annotators' coins better. The third
# ranks every pair as the first does, so its accuracy is the same; only its calibration differs.

# %% tags=["experiment", "figure"]
# Figure: calibrated on held-out pairs, and in love with length
fig, axes = plot.plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=(1, 1.15, 1.15))
bin_of = (predicted * 10).long().clamp(max=9)
for k in bin_of.unique().tolist():
    inside = bin_of == k
    axes[0].plot(
        float(predicted[inside].mean()),
        float((~flip)[inside].float().mean()),
        "o",
        color=plot.COLORS[0],
        markersize=3 + 9 * float(inside.float().mean()) ** 0.5 * 1.5,
    )
axes[0].plot([0, 1], [0, 1], ":", color="black", linewidth=1.2)
axes[0].set(xlabel="predicted preference", ylabel="share preferred", xlim=(0, 1), ylim=(0, 1))
axes[0].set_title("Calibration")
lengths = held_out["length"]
for ax, rewards, title in (
    (axes[1], held_out["proxy"], "Reward against length"),
    (axes[2], remove_length(held_out["proxy"], lengths), "… with length removed"),
):
    ax.scatter(lengths, plot.array(rewards), s=8, alpha=0.35, color=plot.COLORS[0], linewidth=0)
    edges = [0, 5, 10, 15, 20, 30, 60]
    groups = [(lengths >= a) & (lengths < b) for a, b in pairwise(edges)]
    means = [
        (float(lengths[m].float().mean()), float(rewards[m].mean())) for m in groups if m.sum() > 4
    ]
    ax.plot(*zip(*means, strict=True), "s-", color=plot.COLORS[1], label="means by length")
    ax.set(xlabel="length (characters)", ylabel="reward of the model", ylim=(-3.5, 1.4))
    ax.set_title(title)
    ax.legend(loc="lower right", fontsize=8)
plot.caption(
    fig,
    "Held-out verbs. Left: 4,000 pairs in ten bins; a dot is a bin, larger for more pairs; on the "
    "dotted line predictions come true. Middle: a name's reward rises with its length. "
    "Right: the same rewards after your remove_length.",
)
plot.plt.show()

# %% [markdown]
# **A question, and your prediction.** The reference is now optimized against this reward model:
# by best-of-n up to 64, and by REINFORCE with four samples a verb, once with $\beta = 0$ and once
# with $\beta = 0.3$. Write down before you run it: does the true reward of the $\beta = 0$ run end
# above or below where it began? Does best-of-n break? What will the names look like?

# %% [markdown] answer="prediction"
# A good prediction argues from length. In the pool names are short, and up to about twenty
# characters a further word pays for itself: both rewards rise. Beyond, the annotators' taste goes
# on and the square takes over. Best-of-n can only choose among names that the reference writes, of
# which few are very long; REINFORCE can make long names likely. So the free run should rise, turn
# and fall below its start, the leashed one stay near the top, and best-of-n do far less harm.


# %% tags=["experiment"]
def reinforce(beta: float, seed: int, steps: int = 20, samples: int = 4) -> dict[str, list]:
    """RLOO from the reference against the reward model; what was measured before each update."""
    policy, g = copied(reference), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0)
    log: dict[str, list] = {"proxy": [], "true": [], "kl": [], "length": [], "names": []}
    for _ in range(steps):
        names = draw(policy.eval(), VERBS, samples, g)
        tokens, mask = pad(names["rows"])
        starts = torch.tensor(names["starts"])[:, None]
        answer = mask[:, 1:] & (torch.arange(1, tokens.shape[1]) >= starts)
        logp = token_logp(policy, tokens, mask)
        with torch.no_grad():
            ref_logp = token_logp(reference, tokens, mask)
        proxy = proxy_of(names)
        rewards = kl_penalized_reward(proxy, logp, ref_logp, answer, beta)
        returns = rewards.sum(1).view(-1, samples)
        baseline = leave_one_out_baseline(returns)
        loss = reinforce_loss(logp, answer, returns.flatten(), baseline.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        log["proxy"].append(float(proxy.mean()))
        log["true"].append(float(names["true"].mean()))
        log["kl"].append(float(((logp.detach() - ref_logp) * answer).sum(1).mean()))
        log["length"].append(float(names["length"].float().mean()))
        log["names"].append(
            [f"{v}_{n}" for v, n in zip(VERBS, names["names"][::samples], strict=True)]
        )
    return log


runs = {beta: reinforce(beta, SEED) for beta in (0.0, 0.3)}
for beta, log in runs.items():
    print(f"beta = {beta}:  step    proxy    true    KL    characters    some names")
    for step in (0, 4, 8, 12, 16, 19):
        some = ", ".join(repr(name)[1:-1][:28] for name in log["names"][step][:3])
        print(
            f"{step:18} {log['proxy'][step]:9.2f} {log['true'][step]:7.2f} {log['kl'][step]:7.2f} "
            f"{log['length'][step]:9.1f}       {some}"
        )

# %% tags=["experiment"]
ns = [1, 2, 4, 8, 16, 32, 64]
by_verb = {
    "proxy": held_out["proxy"].view(-1, 64),
    "true": held_out["true"].view(-1, 64),
    "length": held_out["length"].float().view(-1, 64),
}
by_verb["length removed"] = remove_length(held_out["proxy"], held_out["length"]).view(-1, 64)
selected = {
    (chooser, what): [
        float(best_of_n_estimate(by_verb[chooser], by_verb[what], n).mean()) for n in ns
    ]
    for chooser in ("proxy", "length removed", "true")
    for what in ("true", "length")
}
torch.set_num_threads(threads)
print("best of n by…          " + "".join(f"{n:>8}" for n in ns))
for (chooser, what), values in selected.items():
    print(f"{chooser:15} {what:7}" + "".join(f"{v:8.2f}" for v in values))

# %% tags=["experiment", "figure"]
# Figure: Goodhart's curve: the proxy goes on rising, the true reward turns
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, width_ratios=(1.5, 1))
far = [kl_best_of_n_bound(n) ** 0.5 for n in ns]
for ax, beta in zip(axes, (0.0, 0.3), strict=True):
    log = runs[beta]
    distance = [max(k, 0.0) ** 0.5 for k in log["kl"]]
    ax.axhline(log["true"][0], color="#999999", linewidth=0.8)
    for what, color, mark in (("proxy", plot.COLORS[0], "o"), ("true", plot.COLORS[1], "s")):
        ax.plot(distance, log[what], mark, color=color, markersize=5, label=f"REINFORCE: {what}")
        best = [float(best_of_n_estimate(by_verb["proxy"], by_verb[what], n).mean()) for n in ns]
        style = "-" if what == "proxy" else "--"
        ax.plot(far, best, style, color=color, label=f"best of n: {what}")
    ax.set(xlabel="√KL from the reference (√nats)", title=f"β = {beta}")
axes[0].set_ylabel("mean reward")
axes[0].legend(fontsize=8, loc="lower left")
plot.caption(
    fig,
    "Each mark is one step's 64 names, placed by how far the policy has gone; the grey line is "
    "where the true reward began. Lines: best of 1 to 64 on held-out verbs, placed by the bound. "
    "Nothing in the proxy (circles) tells that the true reward (squares) has turned.",
)
plot.plt.show()

# %% tags=["experiment"]
for beta, log in runs.items():
    began, ended = log["true"][0], sum(log["true"][-3:]) / 3
    print(
        f"beta = {beta}: the true reward began at {began:.2f}, was at most {max(log['true']):.2f}, "
        f"and ended at {ended:.2f} (last three steps); the proxy went from {log['proxy'][0]:.2f} "
        f"to {sum(log['proxy'][-3:]) / 3:.2f}"
    )

# %% [markdown]
# **What came out.** *Without a leash* the proxy rises and stays up. The true reward rises with it
# for a few steps, turns after a nat or two, and falls below where it began. The names say why: they
# have become chains that run into the limit, the same word again and again. The reward model
# learned from names of ordinary length that longer is better, and nobody ever showed it such
# chains. Its accuracy and calibration were measured on names that the reference writes, and say
# nothing about names from where the policy has gone.
#
# *With* $\beta = 0.3$ the policy stops about where a further nat costs more than it gains, the
# names stay names, and the true reward ends above its start, though this run never sees the truth
# either.
#
# *Best-of-n* moves along the first piece of the same road. With the length removed it chooses
# shorter names for the same $n$.
#
# We ran all of this with five seeds (reference, pool, reward model and runs anew each time). In
# each the free run's true reward first rose above its start and then fell below it; in one, given
# a few more steps, it came back to about its start. In each the leashed run ended above its start.
# Best-of-n is less clear: in some seeds its true reward turned before 64, in others it still rose.
# With the length removed it was ahead in all five seeds up to $n = 8$, and at 64 in two of them
# only: the honest part of the liking for length is gone as well, and other faults of the reward
# model are not.
#
# At this size the price of a wrong reward is visible because the truth is a formula. With a real
# task there is no orange curve to plot. What can be watched instead: the KL, the length, fresh
# labels for answers that the policy writes *now*, and samples, read by a person.

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number or a choice are
# graded, one by one.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | str]:
    """Short answers; numbers to 1 percent.

    "preferred": a reward model gives answer A 1.5 and answer B 0.5. With which probability does an
               annotator prefer B, by Bradley–Terry?
    "shift":   in training all rewards drift up by 7. By how much does the Bradley–Terry loss change
               (margin 0.5, no centering)?
    "draws":   a team wants a win rate of at least 95 % against a single draw of the reference, by
               best-of-n with a perfect judge and without ties. The smallest n? (a number)
    "leash":   under the objective with β = 0.2, the best policy has made an answer 20 times as
               likely, relative to another one, as the reference did. By how much is its reward
               higher than the other's?
    "scale":   REINFORCE with K = 4 samples takes the mean of all four as the baseline. By which
               factor is the expected gradient multiplied?
    "hacking": the proxy rises in training and KL grows. Which of these tells you first that the
               policy exploits the reward model: "loss", "proxy", "fresh labels" or "accuracy" (of
               the reward model on the old held-out pairs)?
    """
    ### BEGIN SOLUTION
    return {
        "preferred": 1 / (1 + math.exp(1.0)),
        "shift": 0.0,
        "draws": 19.0,
        "leash": 0.2 * math.log(20),
        "scale": 0.75,
        "hacking": "fresh labels",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["preferred"]
checks.kind(answer, float, what="preferred")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    math.exp(0.5) / (math.exp(0.5) + math.exp(1.5)),
    what="preferred",
    hint="Strengths are e to the reward",
    mistakes={
        "the probability of A": math.exp(1.5) / (math.exp(0.5) + math.exp(1.5)),
        "rewards themselves as strengths": 0.25,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["shift"]
checks.kind(answer, float, what="shift")
### BEGIN HIDDEN TESTS
checks.number(
    answer, 0.0, atol=1e-9, what="shift", hint="What does the loss see of the two rewards?"
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["draws"]
checks.kind(answer, float, what="draws")
### BEGIN HIDDEN TESTS
smallest = next(n for n in range(1, 1000) if n / (n + 1) >= 0.95 - 1e-12)
checks.number(
    answer,
    float(smallest),
    what="draws",
    hint="The fresh draw is the best of all with probability 1/(n + 1)",
    mistakes={"a win rate of 1 − 1/n": 20.0, "a win rate of 1 − 2⁻ⁿ": 5.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["leash"]
checks.kind(answer, float, what="leash")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    math.log(20) / 5,
    what="leash",
    hint="π* = π_ref · exp(r/β)/Z, and Z is the same for both answers",
    mistakes={"log 20": math.log(20), "log 20 / β": math.log(20) / 0.2, "β · 20": 4.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["scale"]
checks.kind(answer, float, what="scale")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    3 / 4,
    what="scale",
    hint="R − mean of all = (1 − 1/K) (R − mean of the others)",
    mistakes={"K/(K − 1)": 4 / 3, "1/K": 0.25, "unbiased": 1.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["hacking"]
assert answer in ("loss", "proxy", "fresh labels", "accuracy"), (
    f"hacking is one of the four choices; yours is {answer!r}"
)
### BEGIN HIDDEN TESTS
assert answer == "fresh labels", (
    "The policy has left the answers on which the reward model was fitted and measured. Which of "
    "the four looks at the answers that it writes now, and asks somebody else?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** A colleague removes the length from a reward model as in
# [](#remove_length), and the policy's answers become too short to be useful. Why, and what
# would you do?

# %% [markdown] answer="honest-length"
# The regression cannot tell a taste for length from an honest reason: if good answers are longer,
# because they explain more, that correlation is taken away as well, and the remaining reward pays
# nothing for the extra explanation that costs words. What would tell the two apart is an
# intervention, not a regression: pairs in which only the length was changed (the same answer,
# padded or shortened) show what annotators give for length alone, and only that slope is
# subtracted. Cheaper: give the difference in length to the fitted model as an extra input and
# leave it out afterwards, with the same caveat; or cap the correction, and look at the answers.

# %% [markdown]
# **Open question 2.** Best-of-n against the same reward model did far less harm in the experiment
# than REINFORCE without a leash. Is it the safer method?

# %% [markdown] answer="bon-immune"
# It has gone less far: the best of 64 is at most 3.2 nats from the reference, and every factor of e
# in n buys one nat more. At the same distance it is no safer (compare the figure). To go where
# REINFORCE goes, n would have to be astronomic, and that is what protects: it can choose only among
# answers that the reference writes anyway. Where the reference writes exploits now and then (a rare
# tail of very long names, a phrase of flattery), a large n finds exactly those, and the true reward
# of best-of-n turns as well, in our figure for some seeds and in Gao et al. in general. The
# protection is the cost, not the method; the reward model is as wrong as before.

# %% [markdown]
# **Open question 3.** The Bradley–Terry model says that preferences come from one number for each
# answer. Name a pattern of preferences that no such number explains, and what a fitted model does
# with it.

# %% [markdown] answer="intransitive"
# A circle: A over B, B over C, C over A, each in two thirds of the comparisons. Any single number
# per answer puts them in an order. By symmetry the best fit gives all three the same reward, so it
# predicts one half everywhere and the loss stays at log 2, however much data there is. Circles
# arise when annotators weigh different things in different pairs (A is shorter, B is more polite, C
# is more correct), or when two groups of annotators disagree: the mixture of two Bradley–Terry
# models is not one. The fitted reward is then an average that may be nobody's opinion. A remedy is
# a model of the pair rather than of the answer, or one reward per group or criterion.

# %% [markdown]
# ## References
#
# - **Christiano et al. 2017**, *Deep Reinforcement Learning from Human Preferences*,
#   arXiv:1706.03741. Section 2.2.3 fits the reward to comparisons, with Bradley–Terry.
# - **Ziegler et al. 2019**, *Fine-Tuning Language Models from Human Preferences*,
#   arXiv:1909.08593. Section 2: the penalized reward.
# - **Stiennon et al. 2020**, *Learning to Summarize from Human Feedback*, arXiv:2009.01325. Section
#   4.3 and figure 5: what happens when a reward model is over-optimized.
# - **Ouyang et al. 2022**, *Training Language Models to Follow Instructions with Human Feedback*,
#   arXiv:2203.02155. Section 3.5 for the three steps as one recipe.
# - **Touvron et al. 2023**, *Llama 2*, arXiv:2307.09288. Section 3.2.2 for the margin.
# - **Eisenstein et al. 2023**, *Helping or Herding?*, arXiv:2312.09244. The centering term, and
#   what ensembles of reward models do and do not repair.
# - **Guo et al. 2017**, *On Calibration of Modern Neural Networks*, arXiv:1706.04599. Section 2
#   defines the expected calibration error. (There over the confidence of the chosen class.)
# - **Singhal et al. 2023**, *A Long Way to Go*, arXiv:2310.03716. How much of the gain is
#   length, and what helps against it.
# - **Gao et al. 2022**, *Scaling Laws for Reward Model Overoptimization*, arXiv:2210.10760. Figure
#   1 is this lesson's last one, with a large reward model as the truth.
# - **Ahmadian et al. 2024**, *Back to Basics*, arXiv:2402.14740. REINFORCE and RLOO on whole
#   answers against PPO.
# - **Beirami et al. 2024**, *Theoretical Guarantees on the Best-of-n Alignment Policy*,
#   arXiv:2401.01879. Sections 2 and 3: the exact distribution, and why the formula is a bound;
#   section 5: the win rate.
#
# In production: TRL's `RewardTrainer` (margin, and `center_rewards_coefficient`) and
# `RLOOTrainer`; OpenRLHF's `openrlhf/models/loss.py` (`PairWiseLoss`); transformers'
# `LlamaForSequenceClassification` with `num_labels=1`, whose bias-free head `score` is read at the
# last token that is no padding. PPO and group-relative methods are lesson 23; DPO, which needs no
# reward model, is lesson 24.
