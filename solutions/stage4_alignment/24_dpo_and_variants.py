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
#       Alignment without a reward model and without sampling in the loop: DPO from its derivation
#       to its training loop, IPO, SimPO, ORPO and KTO with their own normalizations, and the place
#       where the probability goes when both answers of a pair lose it.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# Somebody saw two answers to a prompt and said which one is better. RLHF makes three stages of such
# data: fit a reward model, sample from the policy, push the samples by the reward. Each stage has
# its own model in memory and its own way to fail.
#
# The whole detour ends at one distribution, and that distribution can be written down in closed
# form. **Direct preference optimization** (DPO) turns the formula around: if the policy determines
# the reward under which it would be optimal, fit *that* reward to the preferences. What remains is
# a classification loss on the log-probabilities of two answers.
#
# ## Core ideas
#
# **The policy is the reward model.** How much more likely an answer has become than under the
# frozen reference, times β, is its **implicit reward**. Training makes the implicit reward of the
# chosen answer larger than that of the rejected one.
#
# **A loss of differences says nothing about levels.** The loss falls as long as the gap grows. Both
# log-probabilities may fall meanwhile, and often do. The probability then goes to answers that
# nobody has seen: **likelihood displacement**.
#
# **The variants differ in three decisions:** what a response's score is, how the gap is
# penalized, and what holds the policy in place.
#
# | loss | score of a response | penalty on the gap | held by | data |
# |---|---|---|---|---|
# | DPO | β · summed log-ratio to the reference | −log σ | reference | pairs |
# | IPO | log-ratio, summed or a mean over tokens | squared distance to 1/(2τ) | reference | pairs |
# | SimPO | β · mean log-probability of a token | −log σ, after a margin γ | nothing | pairs |
# | ORPO | log-odds of the probability per token (geometric mean) | −log σ, plus the chosen answer's NLL | the NLL | pairs |
# | KTO | β · (log-ratio − a reference point z₀) | 1 − σ | reference | single answers, good or bad |

# %% [markdown]
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $x$; $y_w$, $y_l$ | prompt; chosen, rejected | a prompt; the answer that won, the one that lost |
# | $\pi$, $\pi_{ref}$ | policy, ref | the model in training, the frozen one |
# | $\log\pi(y\mid x)$ | `policy_chosen`, … | log-probability of a whole response: `(batch,)` |
# | $\lvert y\rvert$ | `chosen_length`, … | counted tokens of a response: `(batch,)` |
# | $\hat r(x, y)$ | rewards | implicit reward β log(π/π_ref): `(batch,)` |
#
# Every function below with `loss` in its name is minimized. All logarithms are natural.

# %%
import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from torch import Tensor, nn

IGNORE = -100  # the label of a token that does not count


def rectangle(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each (batch, seq), of prompts with their responses, padded on the right.

    Labels are the response's tokens in their places and IGNORE on prompt and padding. Nothing is
    appended: a response that ends has its end token as its last.
    """
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    tokens = [row + [0] * (width - len(row)) for row in rows]
    labels = [
        [IGNORE] * len(p) + r + [IGNORE] * (width - len(p) - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    return torch.tensor(tokens, device=profile.device), torch.tensor(labels, device=profile.device)


# %% [markdown]
# ## The log-probability of a response
#
# Everything starts from $\log\pi(y\mid x) = \sum_t \log\pi(y_t\mid x, y_{<t})$, a sum over the
# tokens of the response. Three boundaries decide what the number is, and two programs that draw
# them differently report different losses for the same model:
#
# - the prompt does not count: both answers share it, and nobody chose it;
# - padding does not count;
# - the **end token** counts. It is the decision to stop. Without it, an answer that rambles on is
#   never told from one that ends.


# %% exercise="sequence_logprob" minutes=15 difficulty=1
def sequence_logprob(logits: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """The log-probability of each response: the sum over its tokens, or their mean.

    logits: (batch, seq, vocab), floating; logits[:, i] predict the token at i + 1.
    labels: (batch, seq), int64: a token's id where it belongs to the response, IGNORE (−100) on
        prompt and padding, which may stand on either side. They are not shifted yet. Only IGNORE
        leaves a token out: the end token counts like any other, also where its id is 0.
    average: divide each row by its number of counted tokens.

    The token at position 0 has no prediction and never counts. A row in which nothing counts gives
    0, summed or averaged. A token that does not count has no influence, not even through a logit of
    −inf.

    Returns (batch,): float32 for half-precision logits, whose softmax is taken in float32, else the
    dtype of the logits. Inputs are not changed.

    Worked: a response of two tokens that have probability 1/2 and 1/4 gives −2.0794 (= −ln 8), on
    average −1.0397.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = labels[:, 1:]
    counted = targets != IGNORE
    log_p = logits[:, :-1].to(wide).log_softmax(-1)
    each = log_p.gather(-1, targets.masked_fill(~counted, 0)[..., None])[..., 0]
    total = each.masked_fill(~counted, 0.0).sum(-1)  # 0 · −inf would be NaN
    return total / counted.sum(-1).clamp(min=1) if average else total
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: gather raises an error</summary>
#
# −100 is no index. Put any valid id in its place before you gather, and drop what you read there.
# </details>
#
# <details><summary>Hint: NaN in a row with an impossible token</summary>
#
# A mask that multiplies makes 0 · −inf. `masked_fill` and `torch.where` replace instead.
# </details>

# %% check="sequence_logprob" points=2
# A prompt of one token, a response of two with probabilities 1/2 and 1/4; and one with 1/8.
p = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]], [[0.125, 0.875], [0.3, 0.7], [0.6, 0.4]]])
labels = torch.tensor([[IGNORE, 0, 1], [IGNORE, 0, IGNORE]])
checks.close(
    sequence_logprob(p.log(), labels),
    torch.tensor([-math.log(8), -math.log(8)]),
    what="the summed log-probabilities of two responses",
    mistakes={
        "padding that counts": torch.tensor([-math.log(8), -math.log(8) + math.log(0.3)]),
        "the mean over the counted tokens": torch.tensor([-math.log(8) / 2, -math.log(8)]),
        "no shift: logits i compared with label i": torch.tensor(
            [math.log(0.75 * 0.1), math.log(0.3)]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)


def by_loops(logits, labels, average=False):
    """Row by row, token by token, in float64."""
    sums = []
    for row, targets in zip(logits.double(), labels.tolist(), strict=True):
        terms = [row[i].log_softmax(-1)[t] for i, t in enumerate(targets[1:]) if t != IGNORE]
        total = torch.stack(terms).sum() if terms else row.new_zeros(())
        sums.append(total / max(len(terms), 1) if average else total)
    return torch.stack(sums)


def ragged(batch, seq, vocab, lefts=True):
    """Labels whose responses begin and end in another place in each row."""
    labels = torch.full((batch, seq), IGNORE)
    for b in range(batch):
        start = int(torch.randint(1 if lefts else 0, seq, (1,), generator=g))
        stop = int(torch.randint(start + 1, seq + 1, (1,), generator=g))
        labels[b, start:stop] = torch.randint(0, vocab, (stop - start,), generator=g)
    return labels.to(profile.device)


for batch, seq, vocab, lefts in [
    (1, 2, 3, True),
    (5, 9, 7, True),
    (4, 6, 2, False),
    (7, 3, 5, False),
]:
    logits = checks.randn(batch, seq, vocab, generator=g, scale=2.0)
    labels = ragged(batch, seq, vocab, lefts)
    labels[0, -1] = 0  # an end token whose id is 0
    expected = by_loops(logits, labels)
    with checks.unchanged(logits=logits, labels=labels):
        result = sequence_logprob(logits, labels)
    ends = labels.clone()
    ends[labels == 0] = IGNORE
    checks.close(
        result,
        expected,
        what=f"the summed log-probabilities of {batch} × {seq} labels",
        atol=1e-6,  # a probability near 1 has a logarithm of few digits
        dtype=torch.float32,
        mistakes={
            "id 0 taken for padding": by_loops(logits, ends),
            "the mean": by_loops(logits, labels, True),
        },
    )
    checks.close(
        sequence_logprob(logits.double(), labels), expected, what="in float64", dtype=torch.float64
    )
# Views whose strides are their own, and half precision.
logits = checks.randn(6, 11, 4, generator=g, scale=3.0).transpose(0, 2)[:, ::2]
labels = ragged(6, 4, 6).t()[:, ::1].t()[:4, :4]
logits = logits[:, :4, :]
checks.close(
    sequence_logprob(logits, labels), by_loops(logits, labels), what="with views as inputs"
)
for dtype in (torch.float16, torch.bfloat16):
    half = checks.randn(3, 6, 40, generator=g, scale=3.0).to(dtype)
    labels = ragged(3, 6, 40)
    checks.close(
        sequence_logprob(half, labels),
        by_loops(half, labels),
        what=f"with logits in {dtype}",
        dtype=torch.float32,
        hint="Widen the logits before the softmax",
    )
big = checks.randn(3, 5, 6, generator=g, scale=500.0)
labels = ragged(3, 5, 6)
checks.close(
    sequence_logprob(big, labels),
    by_loops(big, labels),
    what="with large logits",
    atol=1e-3,  # a rounding of differences of a thousand
    hint="log_softmax, not the log of softmax",
)
labels = ragged(4, 7, 5)
logits = checks.randn(4, 7, 5, generator=g)
checks.gradients(
    lambda x: sequence_logprob(x, labels),
    lambda x: by_loops(x, labels),
    logits,
    names=("the logits",),
)
### END HIDDEN TESTS

# %% check="sequence_logprob" points=1
p = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]], [[0.125, 0.875], [0.3, 0.7], [0.6, 0.4]]])
labels = torch.tensor([[IGNORE, 0, 1], [IGNORE, 0, IGNORE]])
checks.close(
    sequence_logprob(p.log(), labels, average=True),
    torch.tensor([-math.log(8) / 2, -math.log(8)]),
    what="the averages of responses of 2 and 1 tokens",
    mistakes={
        "dividing by all predictions": torch.tensor([-math.log(8) / 2, -math.log(8) / 2]),
        "dividing by the padded length": torch.tensor([-math.log(8) / 3, -math.log(8) / 3]),
        "ignoring `average`": torch.tensor([-math.log(8), -math.log(8)]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
logits = checks.randn(5, 8, 6, generator=g, scale=2.0)
labels = torch.full((5, 8), IGNORE)
for b, (start, stop) in enumerate([(1, 3), (4, 8), (0, 5), (7, 8), (2, 2)]):
    labels[b, start:stop] = torch.randint(0, 6, (stop - start,), generator=g)
labels = labels.to(logits.device)
each = F.cross_entropy(
    logits[:, :-1].double().transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
)
count = (labels[:, 1:] != IGNORE).sum(1)
expected = -each.sum(1) / count.clamp(min=1)
checks.close(
    sequence_logprob(logits, labels, average=True),
    expected,
    what="the averages of rows of 2, 4, 4, 1 and 0 counted tokens",
    hint="A label at position 0 has no prediction: it counts neither above nor below the line",
    mistakes={
        "counting the label at position 0": -each.sum(1) / (labels != IGNORE).sum(1).clamp(min=1)
    },
)
checks.close(sequence_logprob(logits, labels)[4], torch.zeros(()), what="the sum of an empty row")
checks.close(
    sequence_logprob(logits[:, :1], labels[:, :1]),
    torch.zeros(5),
    what="the sums where there is one position only",
)
# A logit of −inf that nobody asks for changes nothing, forward or backward.
logits = checks.randn(2, 4, 3, generator=g)
labels = torch.tensor([[IGNORE, IGNORE, 2, IGNORE], [IGNORE, 1, 2, IGNORE]], device=logits.device)
expected = sequence_logprob(logits, labels)
logits[:, 2, 0] = -torch.inf
logits[0, 0, 0] = -torch.inf
logits.requires_grad_()
result = sequence_logprob(logits, labels)
checks.close(result, expected.detach(), what="with −inf at tokens that do not count")
result.sum().backward()
assert torch.isfinite(logits.grad).all(), (
    "the gradient is NaN where a token that does not count has a logit of −inf: replace, don't "
    "multiply."
)
### END HIDDEN TESTS

# %% [markdown]
# ## From the optimum to a loss
#
# **Step 1: the optimum.** For one prompt, RLHF maximizes
#
# $$ J(\pi) = \sum_y \pi(y)\,r(y) - \beta\sum_y \pi(y)\log\frac{\pi(y)}{\pi_{ref}(y)}. $$
#
# Write $r(y) = \beta\log e^{r(y)/\beta}$ and pull it into the logarithm:
#
# $$ J(\pi) = -\beta\sum_y\pi(y)\log\frac{\pi(y)}{\pi_{ref}(y)\,e^{r(y)/\beta}}
#    = \beta\log Z - \beta\,\mathrm{KL}(\pi\,\Vert\,\pi^*),\qquad
#    \pi^*(y) = \frac{\pi_{ref}(y)\,e^{r(y)/\beta}}{Z}, $$
#
# with $Z = \sum_y \pi_{ref}(y)e^{r(y)/\beta}$. No calculus: a KL is at least 0, so $\pi^*$ is the
# best and $\beta\log Z$ is what it reaches. For a language model $Z$ is a sum over all texts; on a
# finite set you can compute it.


# %% exercise="optimal_policy" minutes=12 difficulty=1
def optimal_policy(ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The policy that maximizes E[reward] − beta · KL(policy ‖ ref), for each row of answers.

    ref: (..., answers), probabilities, each row sums to 1; entries may be 0 and then stay 0.
    reward: (..., answers), the same shape and dtype (float32 or float64), finite.
    beta: > 0, else ValueError. reward / beta may be far beyond what exp can take, of either sign.

    Returns probabilities of the shape and dtype of ref. Inputs are not changed.

    Worked: ref (0.5, 0.25, 0.25), reward (0, ln 2, ln 4), beta 1 give weights 0.5, 0.5, 1, hence
    (0.25, 0.25, 0.5).
    """
    ### BEGIN SOLUTION
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be positive")
    reward = reward.masked_fill(ref == 0, -torch.inf)  # what ref excludes stays impossible
    reward = reward - reward.amax(-1, keepdim=True)
    return (ref.log() + reward / beta).softmax(-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: exp overflows</summary>
#
# Work with logarithms until the last step. `softmax` subtracts the largest before it exponentiates,
# and it divides by Z. Where reward / beta reaches 10⁶, float32 rounds the sum with log ref to
# steps of 1/16: subtract the row's largest reward that ref allows before you divide by beta.
# </details>

# %% check="optimal_policy" points=2
ref = torch.tensor([0.5, 0.25, 0.25])
reward = torch.tensor([0.0, math.log(2), math.log(4)])
checks.close(
    optimal_policy(ref, reward, 1.0),
    torch.tensor([0.25, 0.25, 0.5]),
    what="the optimal policy",
    mistakes={
        "the reference left out": torch.tensor([1 / 7, 2 / 7, 4 / 7]),
        "weights that are not normalized": torch.tensor([0.5, 0.5, 1.0]),
    },
)
checks.close(
    optimal_policy(ref, reward, 0.5),
    torch.tensor([0.5, 1.0, 4.0]) / 5.5,
    what="the optimal policy with β = 0.5",
    mistakes={
        "multiplying the reward by β": torch.tensor([0.5, 0.25 * 2**0.5, 0.5]) / (1 + 0.25 * 2**0.5)
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)


def objective(policy, ref, reward, beta):
    """E[reward] − β KL in float64, one number a row; 0 · log 0 is 0."""
    policy, ref, reward = policy.double(), ref.double(), reward.double()
    divergence = torch.where(policy > 0, policy * (policy / ref).log(), 0.0).sum(-1)
    return (policy * reward).sum(-1) - beta * divergence


for shape, beta in [((7,), 0.7), ((3, 5), 0.1), ((2, 3, 4), 2.5), ((2, 1), 0.3)]:
    ref = checks.randn(*shape, generator=g, dtype=torch.float64).softmax(-1)
    reward = checks.randn(*shape, generator=g, dtype=torch.float64)
    with checks.unchanged(ref=ref, reward=reward):
        policy = optimal_policy(ref, reward, beta)
    weights = ref * (reward / beta).exp()
    checks.close(
        policy, weights / weights.sum(-1, keepdim=True), what=f"shape {shape}", dtype=torch.float64
    )
    # The law: it reaches β log Z, and no other policy does.
    best = objective(policy, ref, reward, beta)
    checks.close(best, beta * weights.sum(-1).log(), what="the objective at the optimum")
    if shape[-1] > 1:
        other = (policy.log() + 0.3 * checks.randn(*shape, generator=g).double()).softmax(-1)
        assert bool((objective(other, ref, reward, beta) <= best + 1e-12).all()), (
            f"shape {shape}: another policy reaches more of the objective than yours."
        )
    checks.close(
        optimal_policy(ref.float(), reward.float(), beta), policy.float(), dtype=torch.float32
    )
ref = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.3, 0.7]])
reward = torch.tensor([[1.0, 90.0, -1.0], [500.0, -200.0, -201.0]])
policy = optimal_policy(ref, reward, 0.5)
e4, e2 = math.exp(-4), math.exp(-2)
expected = torch.tensor(
    [[1 / (1 + e4), 0.0, e4 / (1 + e4)], [0.0, 0.3 / (0.3 + 0.7 * e2), 0.7 * e2 / (0.3 + 0.7 * e2)]]
)
checks.close(
    policy,
    expected,
    what="the optimal policy where the reference has zeros",
    hint="What the reference never says, an infinite KL forbids",
)
checks.close(
    optimal_policy(ref, 10 * reward, 0.001).sum(-1),
    torch.ones(2),
    what="the sums with rewards / β of a million",
    hint="exp overflows at 89 in float32",
)
for beta in (0.0, -0.1):
    checks.raises(ValueError, optimal_policy, ref, reward, beta, because="β must be positive")
### END HIDDEN TESTS

# %% [markdown]
# **Step 2: turn it around.** Solve the formula of $\pi^*$ for the reward:
#
# $$ r(x, y) = \beta\log\frac{\pi^*(y\mid x)}{\pi_{ref}(y\mid x)} + \beta\log Z(x). $$
#
# Every policy that can give what the reference can, and nothing else, is thus optimal for *some*
# reward, which it names itself. The step that people skip: $Z(x)$ cannot be computed, but no answer
# $y$ occurs in it. In the Bradley–Terry model $p(y_w \succ y_l) = \sigma(r(x,y_w) - r(x,y_l))$ only
# the difference of two answers to one prompt counts, and $Z(x)$ leaves.
#
# **Step 3: fit it.** Put $\pi$ for $\pi^*$ and take the negative log-likelihood:
#
# $$ L_{DPO} = -\log\sigma(h),\qquad h = \hat r(x, y_w) - \hat r(x, y_l),\qquad
#    \hat r(x,y) = \beta\log\frac{\pi(y\mid x)}{\pi_{ref}(y\mid x)}. $$
#
# **Noisy labels.** If a share ε of the labels is flipped, $-\log\sigma(h)$ drives the $h$ of a pair
# that has one label, be it clean or flipped, to infinity, as far as $h$ is free. **cDPO** mixes the
# two labels: $(1-\varepsilon)(-\log\sigma(h)) + \varepsilon(-\log\sigma(-h))$, whose minimum is
# finite, where $\sigma(h) = 1-\varepsilon$. **Robust DPO** subtracts instead:
# $[(1-\varepsilon)(-\log\sigma(h)) - \varepsilon(-\log\sigma(-h))]/(1-2\varepsilon)$. Over flips
# its expectation is the clean loss, so it is unbiased, and it has no finite minimum. Both go by the
# name "label smoothing" in libraries. This lesson takes cDPO.


# %% exercise="dpo_loss" minutes=20 difficulty=2
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO's loss, minimized, with cDPO's label smoothing, and the implicit rewards.

    policy_chosen, policy_rejected, ref_chosen, ref_rejected: (batch,), float32 or float64, summed
        log-probabilities; batch ≥ 1. The reference's are constants: no gradient goes back to them.
    label_smoothing: ε, 0 ≤ ε < 0.5: the weight of the opposite label.

    Returns (loss, chosen_rewards, rejected_rewards): the mean over the batch, 0-dimensional; and
    β(log π − log π_ref), (batch,) each, for reports: they carry no gradient. All in the dtype of
    the inputs. An h of 1e4 of either sign gives a finite loss and gradient.

    Worked: policy −12 and −15, reference −13 and −14, β = 0.1: rewards 0.1 and −0.1, loss 0.59814
    (−log σ(0.2)); with ε = 0.1 it is 0.61814.
    """
    ### BEGIN SOLUTION
    chosen = beta * (policy_chosen - ref_chosen.detach())
    rejected = beta * (policy_rejected - ref_rejected.detach())
    h = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses.mean(), chosen.detach(), rejected.detach()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: infinite losses</summary>
#
# σ(−200) is 0 in float32 and its logarithm −inf. `F.logsigmoid` never forms σ.
# </details>
#
# <details><summary>Hint: which sign belongs where</summary>
#
# At the start policy and reference are equal: both rewards are 0 and the loss is ln 2, whatever β
# and ε are. When the chosen answer gets likelier, the loss must fall.
# </details>

# %% check="dpo_loss" points=2
given = [torch.tensor([v]) for v in (-12.0, -15.0, -13.0, -14.0)]
loss, chosen, rejected = checks.parts(
    dpo_loss(*given, beta=0.1), "loss", "chosen_rewards", "rejected_rewards"
)
checks.close(
    loss,
    torch.tensor(0.5981388),
    what="the loss of one pair",
    mistakes={
        "chosen and rejected, or policy and reference, exchanged": torch.tensor(0.7981388),
        "the reference left out": torch.tensor(0.5543552),
        "β left out": torch.tensor(0.1269280),
    },
)
checks.close(chosen, torch.tensor([0.1]), what="the chosen answer's implicit reward")
checks.close(rejected, torch.tensor([-0.1]), what="the rejected answer's implicit reward")
### BEGIN HIDDEN TESTS
g = checks.generator(4)


def exact(pc, pr, rc, rr, beta, eps=0.0):
    """By the definition, in float64: log(1 + e^−h) and log(1 + e^h)."""
    h = beta * ((pc.double() - rc.double()) - (pr.double() - rr.double()))
    up, down = torch.logaddexp(torch.zeros_like(h), -h), torch.logaddexp(torch.zeros_like(h), h)
    return ((1 - eps) * up + eps * down).mean()


for batch, beta in [(1, 0.1), (4, 0.7), (9, 2.0)]:
    given = [-20 * torch.rand(batch, generator=g).to(profile.device) for _ in range(4)]
    with checks.unchanged(*given):
        loss, chosen, rejected = checks.parts(
            dpo_loss(*given, beta=beta), "loss", "chosen_rewards", "rejected_rewards"
        )
    pc, pr, rc, rr = given
    checks.close(
        loss,
        exact(*given, beta),
        what=f"the loss of {batch} pairs, β = {beta}",
        dtype=torch.float32,
        mistakes={
            "the sum over the batch": batch * exact(*given, beta),
            "ignoring β": exact(*given, 0.1),
        },
    )
    checks.close(chosen, beta * (pc - rc).double(), what="chosen rewards", dtype=torch.float32)
    checks.close(rejected, beta * (pr - rr).double(), what="rejected rewards", dtype=torch.float32)
given = [t.double().requires_grad_() for t in given]
loss, chosen, rejected = dpo_loss(*given, beta=0.3)
checks.close(loss, exact(*given, 0.3), what="the loss in float64", dtype=torch.float64)
assert not any(t.requires_grad for t in (chosen, rejected)), "the rewards carry a gradient."
# The gradient is ∓β σ(r̂_l − r̂_w) / batch, and nothing reaches the reference.
loss.backward()
weight = 0.3 * torch.sigmoid(rejected - chosen) / 9
checks.close(given[0].grad, -weight, what="the gradient of the chosen log-probability")
checks.close(given[1].grad, weight, what="the gradient of the rejected log-probability")
for label, t in (("chosen", given[2]), ("rejected", given[3])):
    assert t.grad is None or not bool(t.grad.any()), (
        f"a gradient reaches the reference's {label} log-probability: detach it."
    )
### END HIDDEN TESTS

# %% check="dpo_loss" points=2
given = [torch.tensor([v]) for v in (-12.0, -15.0, -13.0, -14.0)]
checks.close(
    dpo_loss(*given, beta=0.1, label_smoothing=0.1)[0],
    torch.tensor(0.6181388),
    what="cDPO's loss with ε = 0.1",
    mistakes={
        "robust DPO": torch.tensor(0.5731388),
        "no smoothing": torch.tensor(0.5981388),
        "ε and 1 − ε exchanged": torch.tensor(0.7781388),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
for eps in (0.05, 0.3, 0.49):
    given = [-9 * torch.rand(6, generator=g, dtype=torch.float64) for _ in range(4)]
    pc, pr, rc, rr = given
    h = 1.5 * (pc - rc - pr + rr)
    expected = F.binary_cross_entropy_with_logits(h, torch.full_like(h, 1 - eps))
    checks.close(
        dpo_loss(*given, beta=1.5, label_smoothing=eps)[0],
        expected,
        what=f"cDPO with ε = {eps}, against cross-entropy with soft labels",
        mistakes={
            "robust DPO": ((1 - eps) * F.softplus(-h).mean() - eps * F.softplus(h).mean())
            / (1 - 2 * eps)
        },
    )
# Gaps that no exponential survives.
far = [torch.tensor(v) for v in ([0.0, -1e4], [-1e4, 0.0], [0.0, 0.0], [0.0, 0.0])]
far[0].requires_grad_()
for eps, expected in ((0.0, 5e3), (0.2, 5e3)):
    loss = dpo_loss(*far, beta=1.0, label_smoothing=eps)[0]
    checks.close(loss, torch.tensor(expected), what="the loss with gaps of ±10,000")
    (gradient,) = torch.autograd.grad(loss, far[0])
    checks.close(
        gradient,
        torch.tensor([0.5 * eps, -0.5 * (1 - eps)]),
        what="the gradient with gaps of ±10,000",
    )
# The smoothed loss is flat exactly where σ(h) = 1 − ε.
at = torch.tensor([math.log(0.8 / 0.2) / 0.4], dtype=torch.float64, requires_grad=True)
zero = torch.zeros(1, dtype=torch.float64)
(slope,) = torch.autograd.grad(dpo_loss(at, zero, zero, zero, 0.4, 0.2)[0], at)
checks.close(slope, zero, atol=1e-12, what="the slope where σ(h) = 1 − ε")
### END HIDDEN TESTS

# %% [markdown]
# The four penalties as functions of the gap $h$, drawn with your `dpo_loss` (robust DPO put
# together from two of its values) and IPO's square. On the right is the weight with which a pair
# still pushes, $-dL/dh$.

# %% tags=["experiment", "figure"]
# Figure: four penalties and the push that is left
h = torch.linspace(-6, 8, 281, requires_grad=True)
none = torch.zeros(1)
eps, tau = 0.1, 0.25


def one(gap: Tensor, smoothing: float) -> Tensor:
    return dpo_loss(gap[None], none, none, none, 1.0, smoothing)[0]


def robust(gap: Tensor) -> Tensor:
    return ((1 - eps) * one(gap, 0.0) - eps * one(-gap, 0.0)) / (1 - 2 * eps)


penalties = {
    "DPO": lambda x: one(x, 0.0),
    f"cDPO, ε = {eps}": lambda x: one(x, eps),
    f"robust DPO, ε = {eps}": robust,
    f"IPO ÷ 8, τ = {tau}": lambda x: (x - 1 / (2 * tau)) ** 2 / 8,
}
losses = {name: torch.stack([f(x) for x in h]) for name, f in penalties.items()}
pushes = {name: -torch.autograd.grad(y.sum(), h)[0] for name, y in losses.items()}
fig, axes = plot.plt.subplots(1, 2, figsize=(10.5, 3.7))
plot.curves(h, losses, xlabel="gap h", ylabel="loss (nats)", title="Penalty", ax=axes[0])
plot.curves(h, pushes, xlabel="gap h", ylabel="−dL/dh", title="Push", ax=axes[1])
axes[0].set_ylim(-1.2, 6)
axes[1].set_ylim(-1.1, 1.6)
axes[1].axhline(0, color="#555555", linewidth=0.9, linestyle="-")
axes[1].get_legend().remove()
plot.caption(
    fig,
    "DPO's push fades and never ends; robust DPO's stays, at ε/(1 − 2ε), and its loss falls below "
    "0, as an unbiased estimate may. cDPO's turns where σ(h) = 1 − ε, IPO's at its target 1/(2τ), "
    "here 2: beyond it the gap is pulled back.",
)
plot.plt.show()

# %% [markdown]
# ## Where the probability goes
#
# The gradient of $-\log\sigma(h)$ is
#
# $$ -\,\beta\,\sigma(\hat r_l - \hat r_w)\;\big[\nabla\log\pi(y_w) - \nabla\log\pi(y_l)\big]: $$
#
# a direction, and a weight that is large where the implicit rewards have the pair the wrong way
# round. (The weight has a β in front that is often dropped. Adam does not notice, but for its
# `eps`; everything that compares gradients does.)
#
# It reads as "raise the chosen, lower the rejected". What happens is something else once answers
# share parameters. Take the smallest model that shares: answer $y$ has fixed features $\phi_y$, and
# $\pi = \mathrm{softmax}(\Phi\theta)$. Then $\nabla_\theta\log\pi(y) = \phi_y - \bar\phi$ with
# $\bar\phi = \sum_k\pi_k\phi_k$. In the direction the mean cancels: $d = \phi_w - \phi_l$. A step
# of gradient descent therefore changes every answer's log-probability at the rate
#
# $$ \frac{d\log\pi(y)}{dt} = \beta\,\sigma(\hat r_l - \hat r_w)\,\big(\phi_y - \bar\phi\big)\cdot d. $$
#
# The *gap* grows, at the rate $\propto \lVert d\rVert^2$. The chosen answer itself rises only if
# its features lie further along $d$ than the average answer's. If the two answers of a pair are
# alike, $d$ is short and points anywhere, and a third answer may lie further along it than either.


# %% exercise="logprob_rates" minutes=20 difficulty=2
def logprob_rates(
    features: Tensor, theta: Tensor, ref_logp: Tensor, chosen: int, rejected: int, beta: float = 0.1
) -> Tensor:
    """How fast each answer's log-probability changes when theta follows DPO's gradient downhill.

    features: (answers, d), floating; theta: (d,): the policy is softmax(features @ theta).
    ref_logp: (answers,): the reference's log-probabilities, whatever they come from.
    chosen, rejected: the pair, two different indices.

    Returns (answers,): d log π(y)/dt for every answer y, where dθ/dt = −∇_θ of the DPO loss (no
    smoothing) of this one pair. In the dtype of the features; inputs are not changed, and nothing
    is recorded for autograd in the result.

    Worked: features (1, 0.2), (1, 0), (−1, 2), theta 0, a uniform reference, answer 0 over answer
    1, β = 1: the weight is 0.5, d = (0, 0.2), and the rates are −0.05333, −0.07333, 0.12667. Both
    answers of the pair fall.
    """
    ### BEGIN SOLUTION
    log_p = (features @ theta).log_softmax(0)
    reward = beta * (log_p - ref_logp)
    weight = beta * torch.sigmoid(reward[rejected] - reward[chosen])
    along = features @ (features[chosen] - features[rejected])
    return (weight * (along - log_p.exp() @ along)).detach()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three products</summary>
#
# Project all features on d first: one number for each answer. The mean under the policy of these
# numbers is what is subtracted.
# </details>
#
# <details><summary>Hint: the weight</summary>
#
# It depends on implicit rewards, β(log π − log π_ref), not on log-probabilities alone, and on the
# order rejected − chosen: a pair that is already right pushes little.
# </details>

# %% check="logprob_rates" points=2
features = torch.tensor([[1.0, 0.2], [1.0, 0.0], [-1.0, 2.0]])
uniform = torch.full((3,), -math.log(3))
rates = torch.tensor([-0.16 / 3, -0.22 / 3, 0.38 / 3])
checks.close(
    logprob_rates(features, torch.zeros(2), uniform, 0, 1, beta=1.0),
    rates,
    what="the rates of three answers",
    mistakes={
        "logits, not log-probabilities (the mean is not subtracted)": torch.tensor(
            [0.02, 0.0, 0.2]
        ),
        "chosen and rejected exchanged": -rates,
        "a weight of 1": 2 * rates,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for answers, d, beta in [(3, 2, 0.1), (6, 3, 1.7), (2, 5, 0.4), (9, 1, 3.0)]:
    features = checks.randn(answers, d, generator=g, dtype=torch.float64)
    theta = checks.randn(d, generator=g, dtype=torch.float64)
    ref = checks.randn(answers, generator=g, dtype=torch.float64).log_softmax(0)
    chosen, rejected = torch.randperm(answers, generator=g)[:2].tolist()

    leaf = theta.clone().requires_grad_()
    log_ratio = (features @ leaf).log_softmax(0) - ref
    loss = F.softplus(-beta * (log_ratio[chosen] - log_ratio[rejected]))
    (slope,) = torch.autograd.grad(loss, leaf)
    # The directional derivative along −slope, by the whole Jacobian.
    jacobian = torch.autograd.functional.jacobian(
        lambda t, features=features: (features @ t).log_softmax(0), theta
    )
    expected = -jacobian @ slope
    with checks.unchanged(features=features, theta=theta, ref_logp=ref):
        rates = logprob_rates(features, theta, ref, chosen, rejected, beta)
    log_p = (features @ theta).log_softmax(0)
    right = torch.sigmoid(beta * ((log_p - ref)[rejected] - (log_p - ref)[chosen]))
    without = torch.sigmoid(beta * (log_p[rejected] - log_p[chosen]))
    checks.close(
        rates,
        expected,
        what=f"{answers} answers with {d} features, β = {beta}",
        rtol=1e-8,
        dtype=torch.float64,
        mistakes={
            "the weight without β": expected / beta,
            "a weight with σ(r̂_w − r̂_l)": expected * (1 - right) / right,
            "a weight that leaves the reference out": expected * without / right,
            "a weight of β": expected / right,
        },
    )
    # Laws: probabilities still sum to 1; the gap grows.
    checks.close(
        (log_p.exp() * rates).sum(), torch.zeros(()).double(), atol=1e-9, what="Σ π · rate"
    )
    assert rates[chosen] > rates[rejected], "the gap between chosen and rejected must grow."
half = [t.float() for t in (features, theta, ref)]
half[1].requires_grad_()
result = logprob_rates(*half, chosen, rejected, beta)
checks.close(result, expected.float(), what="the rates in float32", rtol=1e-4, dtype=torch.float32)
assert not result.requires_grad, "the rates carry a graph: detach them."
# One answer's own parameter each (a table): the chosen one rises, the rejected falls, the rest too
# by their mass alone.
table = torch.eye(4, dtype=torch.float64)
theta = torch.tensor([0.5, 0.1, -0.4, 0.2], dtype=torch.float64)
p = theta.softmax(0)
rates = logprob_rates(table, theta, theta.log_softmax(0), 2, 0, 1.0)
expected = torch.tensor([-1.0, 0.0, 1.0, 0.0], dtype=torch.float64) + p[0] - p[2]
checks.close(rates, 0.5 * expected, what="the rates where each answer has its own parameter")
### END HIDDEN TESTS

# %% [markdown]
# Two sets of three answers, one pair in each, followed to the end. On the left the answers of the
# pair are far apart in feature space. On the right they are nearly the same, like "No" and "Never".

# %% tags=["experiment", "figure"]
# Figure: where the probability of three answers goes
corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
cases = {
    "Unlike answers": torch.tensor([[1.0, 0.2], [-1.0, 0.0], [-0.2, 0.9]]),
    "Nearly the same answer": torch.tensor([[1.0, 0.2], [1.0, 0.0], [-1.0, 2.0]]),
}
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4.5))
for ax, (title, features) in zip(axes, cases.items(), strict=True):
    ax.fill(*corners.T, facecolor="#f4f4f4", edgecolor="#555555", linewidth=1)
    for start in ([0.45, 0.35, 0.2], [0.2, 0.7, 0.1], [0.7, 0.1, 0.2], [1 / 3, 1 / 3, 1 / 3]):
        ref = torch.tensor(start).log()
        path = [ref]
        for _ in range(1500):
            log_p = path[-1]  # the θ that gives these three probabilities, then a small step
            theta = torch.linalg.solve(features[:2] - features[2], log_p[:2] - log_p[2])
            rates = logprob_rates(features, theta, ref, 0, 1, beta=1.0)
            path.append((log_p + 0.03 / rates.abs().max() * rates).log_softmax(0))
        line = torch.stack(path).exp() @ corners
        ax.plot(*line.T, color=plot.COLORS[0], linestyle="-", linewidth=1.6)
        ax.plot(*line[0], "o", color="white", markeredgecolor=plot.COLORS[0], markersize=7)
        ax.plot(*line[-1], "o", color=plot.COLORS[0], markersize=6)
    for name, (x, y), (dx, dy) in zip(
        ("chosen", "rejected", "never shown"),
        corners.tolist(),
        ((0, -22), (0, -22), (0, 10)),
        strict=True,
    ):
        ax.annotate(name, (x, y), textcoords="offset points", xytext=(dx, dy), ha="center")
    ax.set_title(title, pad=18)
    ax.set_aspect("equal")
    ax.axis("off")
plot.caption(
    fig,
    "A corner is all probability on one answer; a path leads from the reference (ring) along "
    "DPO's gradient (to the dot). Left: it goes to the chosen answer. Right: the gap grows just as "
    "well, and the probability leaves both for the answer that stood in no pair.",
)
plot.plt.show()

# %% [markdown]
# ## Preferences, and the training loop
#
# To see DPO reach $\pi^*$, preferences must come from a reward that is known. A **bandit** is
# enough: a few prompts, a few answers of one token each, and every distribution can be enumerated.
# Its policy is a table of logits. Pairs come from a policy, labels from Bradley–Terry.

# %%


def bandit(logits: Tensor) -> nn.Embedding:
    """A table of logits (prompts, answers) as a model: row p is what it thinks after token p."""
    prompts, answers = logits.shape
    model = nn.Embedding(max(prompts, answers), answers, dtype=logits.dtype)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[:prompts] = logits
    return model.to(profile.device)


def bandit_batches(prompt: Tensor, chosen: Tensor, rejected: Tensor, size: int) -> list[tuple]:
    """Batches for train_dpo: each response is one token after a prompt of one token."""
    batches = []
    parts = (t.split(size) for t in (prompt, chosen, rejected))
    for x, won, lost in zip(*parts, strict=True):
        batch = []
        for answer in (won, lost):
            batch += [
                torch.stack([x, answer], 1),
                torch.stack([torch.full_like(answer, IGNORE), answer], 1),
            ]
        batches.append(tuple(t.to(profile.device) for t in batch))
    return batches


# %% exercise="sample_preferences" minutes=12 difficulty=1
def sample_preferences(
    logp: Tensor, reward: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of different answers drawn from a policy, labeled by a reward: (prompt, chosen,
    rejected), each (count,), int64, on the CPU.

    logp: (prompts, answers), answers ≥ 2: the policy's log-probabilities; −inf where it never
        answers so. At least two answers of each prompt are possible.
    reward: (prompts, answers). count ≥ 0.
    generator: on the CPU, the only source of random draws.

    Each of the `count` draws is independent of the others: a prompt, uniformly; a first answer from
    the policy; a second from the policy without the first, renormalized; the first wins with
    probability σ(reward of the first − reward of the second), else the second does. Inputs are not
    changed.

    Worked: one prompt with probabilities (0.5, 0.3, 0.2) gives the pair of answers 0 and 1, in
    either order, with probability 0.5 · 0.3/0.5 + 0.3 · 0.5/0.7 = 0.5143.
    """
    ### BEGIN SOLUTION
    prompt = torch.randint(len(logp), (count,), generator=generator)
    p = logp.detach().cpu().exp()[prompt]
    if count == 0:
        return prompt, prompt.clone(), prompt.clone()
    first, second = torch.multinomial(p, 2, generator=generator).unbind(1)  # no replacement
    reward = reward.detach().cpu()
    wins = torch.sigmoid(reward[prompt, first] - reward[prompt, second])
    first_wins = torch.rand(count, generator=generator) < wins
    chosen, rejected = (
        torch.where(first_wins, first, second),
        torch.where(first_wins, second, first),
    )
    return prompt, chosen, rejected
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two different answers</summary>
#
# `torch.multinomial(p, 2)` draws two columns of each row without replacement, in the order of the
# draws, which is exactly the rule above. It takes a `generator`.
# </details>

# %% check="sample_preferences" points=2
g = torch.Generator().manual_seed(0)
logp = torch.tensor([[0.5, 0.3, 0.2]]).log()
prompt, chosen, rejected = checks.parts(
    sample_preferences(logp, torch.tensor([[0.0, 0.0, 30.0]]), 2000, g),
    "prompt",
    "chosen",
    "rejected",
)
assert chosen.shape == rejected.shape == prompt.shape == (2000,), "each has shape (count,)"
assert bool((chosen != rejected).all()), "an answer was paired with itself."
assert not bool((rejected == 2).any()), (
    "answer 2 has by far the highest reward and lost: is the sign of the difference right?"
)
both = ((chosen == 0) & (rejected == 1)) | ((chosen == 1) & (rejected == 0))
checks.drawn(
    both.double(),
    mean=0.3 + 0.15 / 0.7,
    what="how often answers 0 and 1 meet",
    mistakes={"uniform pairs": 1 / 3, "equal pairs dropped afterwards": 0.3 / 0.62},
)
### BEGIN HIDDEN TESTS
g = checks.generator(7)
logp = checks.randn(3, 4, generator=g, scale=1.2).log_softmax(-1)
reward = checks.randn(3, 4, generator=g, scale=1.5)
with checks.unchanged(logp=logp, reward=reward):
    prompt, chosen, rejected = sample_preferences(logp, reward, 40_000, g)
for label, t in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
    assert t.dtype == torch.int64, f"{label} has dtype {t.dtype}, not int64"
p, r = logp.double().exp(), reward.double()
checks.drawn(
    (prompt[1:] == prompt[:-1]).double(),
    mean=1 / 3,
    std=math.sqrt(2) / 3,
    kurtosis=1.5,
    what="how often the next pair has the same prompt, of three",
    mistakes={"the prompts in turn": 0.0},
)
for x in range(3):
    checks.drawn(
        (prompt == x).double(), mean=1 / 3, std=math.sqrt(2) / 3, kurtosis=1.5, what=f"prompt {x}"
    )
    for a in range(4):
        for b in range(4):
            if a == b:
                continue
            # Either order of drawing them, then a wins.
            met = p[x, a] * p[x, b] * (1 / (1 - p[x, a]) + 1 / (1 - p[x, b]))
            share = float(met * torch.sigmoid(r[x, a] - r[x, b])) / 3
            if share * 40_000 < 100:
                continue
            found = ((prompt == x) & (chosen == a) & (rejected == b)).double()
            checks.drawn(
                found,
                mean=share,
                std=math.sqrt(share * (1 - share)),
                kurtosis=1 / (share * (1 - share)) - 3,
                what=f"prompt {x}, answer {a} over {b}",
                hint="P = policy's pairs × σ(reward difference)",
            )
checks.uses_generator(
    lambda source: sample_preferences(logp, reward, 200, source), what="sample_preferences"
)
# Answer 0 is drawn first, practically always: who wins is then one fair coin, from the generator.
lopsided = torch.tensor([[1.0, 1e-7]]).log()
checks.uses_generator(
    lambda source: sample_preferences(lopsided, torch.zeros(1, 2), 200, source)[1],
    what="the judge in sample_preferences",
)
prompt, chosen, rejected = sample_preferences(logp, reward, 0, g)
assert len(prompt) == len(chosen) == len(rejected) == 0, "no pairs were asked for"
impossible = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.01, 0.99]]).log()
prompt, chosen, rejected = sample_preferences(impossible, torch.zeros(2, 3), 500, g)
for t in (chosen, rejected):
    assert not bool((t == torch.tensor([2, 0])[prompt]).any()), (
        "an answer came up that the policy never gives."
    )
### END HIDDEN TESTS

# %% [markdown]
# The loop has four forward passes a step, two of them without gradients. The reference must be a
# *copy*, frozen before the first step. A second name for the same model gives log-ratios that are 0
# for ever, and a reference that is trained along moves the zero of the rewards.
#
# `objective` makes the same loop serve every variant of the next section.


# %% exercise="train_dpo" minutes=35 difficulty=3
def train_dpo(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    lr: float,
    beta: float = 0.1,
    reference: nn.Module | None = None,
    objective: Callable[..., Tensor] | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place on pairs of responses; what it saw at each step, before that step.

    model: maps tokens (batch, seq), int64, to logits (batch, seq, vocab); it is in whatever mode
        (train or eval) the caller left it in and stays there. Parameters with requires_grad False
        stay as they are.
    batches: (chosen tokens, chosen labels, rejected tokens, rejected labels), each (batch, seq)
        with a seq of its own for chosen and rejected; labels as in `sequence_logprob`. One step of
        torch.optim.AdamW(lr=lr, weight_decay=0.0) for each, in order. A .grad that is there at the
        beginning has no influence.
    reference: what the policy is compared with; None: the model as it is at the call. It is not
        changed, and no gradient is computed for it.
    objective: None: DPO with this beta. Else a function of six tensors (batch,), called with
        (policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_length, rejected_length),
        which returns the loss, 0-dimensional: the first four are summed log-probabilities, the
        lengths the numbers of counted tokens, floating. `beta` then has no effect.

    Returns for each batch a dictionary of floats: "loss"; "chosen" and "rejected", the batch's mean
    of the policy's summed log-probabilities; "gap", the mean of (policy_chosen − ref_chosen) −
    (policy_rejected − ref_rejected), without β; "accuracy", the share of pairs whose gap is > 0. No
    batches: an empty list, and nothing changes.
    """
    ### BEGIN SOLUTION
    if reference is None:
        reference = copy.deepcopy(model)
    if objective is None:

        def objective(*given: Tensor) -> Tensor:
            return dpo_loss(*given[:4], beta=beta)[0]

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    history = []
    for tokens_w, labels_w, tokens_l, labels_l in batches:
        policy = [
            sequence_logprob(model(tokens), labels)
            for tokens, labels in ((tokens_w, labels_w), (tokens_l, labels_l))
        ]
        with torch.no_grad():
            ref = [
                sequence_logprob(reference(tokens), labels)
                for tokens, labels in ((tokens_w, labels_w), (tokens_l, labels_l))
            ]
        lengths = [
            (labels[:, 1:] != IGNORE).sum(-1).to(policy[0].dtype) for labels in (labels_w, labels_l)
        ]
        loss = objective(*policy, *ref, *lengths)
        gap = ((policy[0] - ref[0]) - (policy[1] - ref[1])).detach()
        history.append(
            {
                "loss": loss.item(),
                "chosen": policy[0].mean().item(),
                "rejected": policy[1].mean().item(),
                "gap": gap.mean().item(),
                "accuracy": (gap > 0).double().mean().item(),
            }
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the loss stays at ln 2</summary>
#
# The reference is the model itself. `copy.deepcopy` makes another one; the copy shares nothing with
# the original.
# </details>
#
# <details><summary>Hint: the first step is off when a .grad is already there</summary>
#
# `backward` adds to `.grad`. Clear it before the call, in every step, the first included.
# </details>

# %% check="train_dpo" points=3
table = torch.tensor([[0.0, 0.5, -0.5], [1.0, 0.0, 0.0]])
model = bandit(table)
x, won, lost = torch.tensor([0, 1, 0]), torch.tensor([2, 1, 1]), torch.tensor([0, 2, 0])
history = train_dpo(model, bandit_batches(x, won, lost, 3) * 20, lr=0.1, beta=0.5)
assert len(history) == 20, f"one entry for each of 20 batches; yours has {len(history)}"
missing = {"loss", "chosen", "rejected", "gap", "accuracy"} - set(history[0])
assert not missing, f"an entry lacks {sorted(missing)}"
checks.close(
    history[0]["loss"],
    math.log(2),
    what="the first loss",
    rtol=1e-6,
    hint="The policy is the reference there",
)
assert history[-1]["loss"] < 0.5 < history[0]["loss"], (
    f"the loss goes from {history[0]['loss']:.3f} to {history[-1]['loss']:.3f}: is the reference a "
    f"copy, and does a step follow each backward pass?"
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)


def by_hand(table, batches, lr, beta, reference, loss=None):
    """AdamW without decay on a table of logits, in float64, from Adam's definition."""
    table, m, v, seen = table.double().clone(), 0.0, 0.0, []
    for t, (x, won, lost) in enumerate(batches, 1):
        leaf = table.clone().requires_grad_()
        logp, ref = leaf.log_softmax(-1), reference.double().log_softmax(-1)
        four = [logp[x, won], logp[x, lost], ref[x, won], ref[x, lost]]
        gap = four[0] - four[2] - four[1] + four[3]
        value = F.softplus(-beta * gap).mean() if loss is None else loss(*four)
        (slope,) = torch.autograd.grad(value, leaf)
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        table = table - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        seen.append(
            {
                "loss": value.item(),
                "chosen": four[0].mean().item(),
                "rejected": four[1].mean().item(),
                "gap": gap.mean().item(),
            }
        )
        if bool((gap.abs() > 1e-9).all()):  # a gap of 0 rounds to either side
            seen[-1]["accuracy"] = (gap > 0).double().mean().item()
    return table, seen


for with_reference, custom in [(False, False), (True, False), (True, True)]:
    table = checks.randn(3, 5, generator=g, dtype=torch.float64)
    other = checks.randn(3, 5, generator=g, dtype=torch.float64)
    # No answer both wins and loses: gradients that cancel are noise, which Adam would enlarge.
    x, won, lost = (torch.randint(a, b, (24,), generator=g) for a, b in ((0, 3), (0, 2), (2, 5)))
    model, reference = bandit(table), bandit(other) if with_reference else None
    model.weight.grad = torch.full_like(model.weight, 3.0)  # stale
    model.eval()
    given = list(zip(x.split(6), won.split(6), lost.split(6), strict=True))
    loss = (lambda pc, pr, rc, rr, *lengths: (pc - 2 * pr + rc * pr).mean()) if custom else None
    expected, seen = by_hand(table, given, 0.05, 0.7, other if with_reference else table, loss)
    watched = [reference] if with_reference else []
    with checks.kept(*watched):
        history = train_dpo(
            model,
            bandit_batches(x, won, lost, 6),
            lr=0.05,
            beta=0.7,
            reference=reference,
            objective=loss,
        )
    how = f"{'another' if with_reference else 'no'} reference, {'an' if custom else 'no'} objective"
    assert len(history) == 4, f"four batches give four entries; yours has {len(history)}"
    for k, (mine, exact) in enumerate(zip(history, seen, strict=True)):
        for key, value in exact.items():
            checks.close(
                mine[key],
                value,
                what=f"{key} at step {k} ({how})",
                atol=1e-9,
                hint="Reported before the step; one step of AdamW without decay for each batch",
            )
    checks.close(
        model.weight.detach()[:3],
        expected,
        what=f"the table after four steps ({how})",
        rtol=1e-6,
        hint="A stale .grad must not count, nor may the reference move",
    )
    assert not model.training, "the model was in eval mode and is in training mode afterwards."
# All answers alike: the gap is exactly 0, in whatever order it is computed.
table = torch.zeros(3, 5, dtype=torch.float64)
first = train_dpo(bandit(table), bandit_batches(x, won, lost, 6), lr=0.05)[0]
checks.close(first["accuracy"], 0.0, what="accuracy where all gaps are 0", hint="A gap > 0 counts")
assert train_dpo(model, [], lr=0.1) == [], "no batches: an empty list"
### END HIDDEN TESTS

# %% check="train_dpo" points=2
# Responses of unequal lengths in one batch: what the objective is given.
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)).to(profile.device)
chosen = rectangle([[1, 2], [3], [1, 5]], [[4, 0], [5, 6, 0], [7]])
rejected = rectangle([[1, 2], [3], [1, 5]], [[5, 5, 5, 0], [0], [2, 3]])
given = []


def note(*six: Tensor) -> Tensor:
    given.append([t.detach().clone() for t in six])
    return (six[1] - six[0]).mean()


train_dpo(model, [(*chosen, *rejected)], lr=0.01, objective=note)
assert [len(six) for six in given] == [6], "the objective takes six tensors, once for a batch"
checks.close(
    given[0][4].double(),
    torch.tensor([2.0, 3.0, 1.0]).double(),
    what="chosen_length",
    hint="Counted tokens: neither prompt nor padding, and the end token (0) is one",
)
checks.close(given[0][5].double(), torch.tensor([4.0, 1.0, 2.0]).double(), what="rejected_length")
### BEGIN HIDDEN TESTS
g = checks.generator(9)
torch.manual_seed(checks.seed())
model = nn.Sequential(nn.Embedding(9, 6), nn.Dropout(0.0), nn.Linear(6, 9)).to(profile.device)
model[2].bias.requires_grad_(False)
bias, weight = model[2].bias.detach().clone(), model[2].weight.detach().clone()
reference = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).to(profile.device).eval()
model.train()
rows = []
for m, (tokens, labels) in ((m, part) for m in (model, reference) for part in (chosen, rejected)):
    with torch.no_grad():
        logp = m(tokens).log_softmax(-1)
    rows.append(
        torch.stack(
            [
                sum((logp[b, i, t] for i, t in enumerate(r[1:]) if t != IGNORE), logp.new_zeros(()))
                for b, r in enumerate(labels.tolist())
            ]
        )
    )
given.clear()
with checks.kept(reference=reference):
    train_dpo(model, [(*chosen, *rejected)], lr=0.01, reference=reference, objective=note)
for label, mine, exact in zip(
    ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), given[0], rows, strict=False
):
    checks.close(mine, exact, what=label, hint="Six arguments, in the docstring's order")
assert model.training, "the model was in training mode and is in eval mode afterwards."
assert torch.equal(model[2].bias, bias), "a frozen parameter changed."
assert not torch.equal(model[2].weight, weight), "the model did not change."
### END HIDDEN TESTS

# %% check="train_dpo" points=2
g = torch.Generator().manual_seed(1)
reward = torch.randn(3, 4, generator=g, dtype=torch.float64)
table = torch.randn(3, 4, generator=g, dtype=torch.float64)
model = bandit(table)
better = reward[:, :, None] > reward[:, None, :]  # every pair, the better answer chosen
train_dpo(model, bandit_batches(*better.nonzero().unbind(1), 6) * 20, lr=0.1, beta=1.0)
policy, ref = model.weight.detach()[:3].softmax(-1).cpu(), table.softmax(-1)
gain = ((policy - ref) * reward).sum(-1).mean()
assert gain > 0.2, f"the mean reward rises by {gain:.2f}; by 0.2 and more is expected"
### BEGIN HIDDEN TESTS
# Converges to the closed form. Each two answers of each prompt meet 64 times and win as often as
# Bradley and Terry say: what is left is the optimizer's noise, not the labels'.
g = checks.generator(10)
reward = 1.2 * torch.randn(4, 5, generator=g, dtype=torch.float64)
table = 0.7 * torch.randn(4, 5, generator=g, dtype=torch.float64)
ref = table.softmax(-1)
won, lost = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
counts = (64 * torch.sigmoid(reward[:, won] - reward[:, lost])).round().long() * (won != lost)
drawn = torch.arange(100).repeat_interleave(counts.flatten())
drawn = drawn[torch.randperm(len(drawn), generator=g)]
pairs = drawn // 25, won[drawn % 25], lost[drawn % 25]
for beta in (0.5, 2.0):
    best = (table + reward / beta).softmax(-1)
    model = bandit(table)
    history = train_dpo(model, bandit_batches(*pairs, 256) * 10, lr=0.1 / beta, beta=beta)
    policy = model.weight.detach()[:4].softmax(-1).cpu()
    distance = 0.5 * (policy - best).abs().sum(-1).mean()
    start = 0.5 * (ref - best).abs().sum(-1).mean()
    assert distance < max(0.25 * start, 0.05), (
        f"β = {beta}: total variation to the closed form is {distance:.3f}; it was {start:.3f} "
        f"before training, and should fall to a fraction. These pairs determine the policy."
    )
    divergence = (policy * (policy / ref).log()).sum(-1).mean()
    allowed = (best * (best / ref).log()).sum(-1).mean()
    assert divergence < 1.5 * allowed + 0.05, (
        f"β = {beta}: KL to the reference is {divergence:.2f}; the optimum has {allowed:.2f}"
    )
    # Win rate against the reference: how often a draw from the policy has the higher reward.
    better = (reward[:, :, None] > reward[:, None, :]).double()
    wins = torch.einsum("pa,pb,pab->p", policy, ref, better).mean()
    losses = torch.einsum("pa,pb,pba->p", policy, ref, better).mean()
    assert wins > losses, f"β = {beta}: the policy wins {wins:.2f} and loses {losses:.2f}"
    assert history[-1]["accuracy"] > 0.55, "the pairs are not learned"
### END HIDDEN TESTS

# %% [markdown]
# ### Pairs that run out
#
# The derivation promises $\pi^*$ for enough pairs, and "enough" is the catch. Take 6 prompts with
# 40 answers each and a reference that rarely gives the good ones. An answer that stood in two pairs
# and won both has no finite implicit reward: the loss falls for as long as it rises.
#
# **On-policy** pairs repair what they can. Here half of the pairs come from the reference, and the
# other half from the policy that the first half made, where the overrated answers are now frequent
# and lose. The number of pairs is the same, as are the steps and the reference of the loss. What
# came up in no pair at all stays unknown in both.

# %% tags=["experiment", "figure"]
# Figure: offline pairs against two rounds
ANSWERS, PAIRS, EPOCHS, BETA = 40, 3000, 10, 0.5


def run_rounds(rounds: int, seed: int) -> Tensor:
    """KL(policy ‖ optimal policy), the mean over prompts, before training and after each epoch."""
    g = torch.Generator().manual_seed(seed)
    reward = 1.5 * torch.randn(6, ANSWERS, generator=g)
    table = 0.8 * torch.randn(6, ANSWERS, generator=g) - 1.2 * reward  # good answers are rare
    best = optimal_policy(table.softmax(-1), reward, BETA).log()
    model, reference, distance = bandit(table), bandit(table), []

    def measure() -> Tensor:
        log_p = model.weight.detach()[:6].log_softmax(-1).cpu()
        distance.append((log_p.exp() * (log_p - best)).sum(-1).mean())
        return log_p

    log_p = measure()
    for _ in range(rounds):
        drawn = sample_preferences(log_p, reward, PAIRS // rounds, g)
        for _ in range(EPOCHS):
            batches = bandit_batches(*drawn, 250)
            train_dpo(model, batches, lr=0.1, beta=BETA, reference=reference)
            log_p = measure()
    return torch.stack(distance)


fig, ax = plot.plt.subplots(figsize=(6.8, 3.7))
for rounds, name, color in ((1, "one round, offline", 0), (2, "two rounds", 1)):
    runs = torch.stack([run_rounds(rounds, seed) for seed in range(3)])
    steps = torch.arange(runs.shape[1]) * (PAIRS // 250) / rounds
    ax.plot(steps, runs.mean(0), label=name, color=plot.COLORS[color], linestyle=plot.DASHES[color])
    ax.fill_between(steps, runs.amin(0), runs.amax(0), color=plot.COLORS[color], alpha=0.15)
ax.axvline(PAIRS // 250 * EPOCHS / 2, color="#555555", linewidth=1, linestyle=":")
ax.set(xlabel="optimizer step", ylabel="KL(π ‖ π*) (nats)", ylim=(0, None))
ax.set_title("Distance to the closed form")
ax.legend()
plot.caption(
    fig,
    "Mean and range of three seeds, the same number of pairs. Both approach the optimum at first. "
    "Then the offline policy moves its probability to answers that won their few pairs. At the "
    "dotted line the second round draws new pairs, from the policy as it is by then.",
)
plot.plt.show()

# %% [markdown]
# ## The variants
#
# **IPO** (Azar et al.) objects to the logarithm. Where all annotators agree, $p(y_w\succ y_l) = 1$,
# Bradley–Terry has no finite reward and DPO no minimum: β no longer holds anything. IPO asks for a
# finite gap of log-ratios instead, $(\,\rho_w - \rho_l - \tfrac{1}{2\tau})^2$ with
# $\rho = \log\pi/\pi_{ref}$. The paper sums over tokens; the authors later confirmed that a mean
# over tokens is meant in practice, and TRL takes the mean. The numbers are not even close: you
# write both.


# %% exercise="ipo_loss" minutes=10 difficulty=1
def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    tau: float = 0.1,
) -> Tensor:
    """IPO's loss, minimized: the mean over the batch of (gap − 1/(2 tau))², 0-dimensional.

    The first four: (batch,), summed log-probabilities, float32 or float64; the reference's are
        constants, to which no gradient goes.
    chosen_length, rejected_length: (batch,), ≥ 1, of the same dtype or int64; both or neither.
    The gap is (policy_chosen − ref_chosen) − (policy_rejected − ref_rejected); where lengths are
        given, each of the two differences is first divided by its own response's length.

    Worked: policy −12 (4 tokens) and −15 (6 tokens), reference −13 and −14, tau 0.1: the gap of
    sums is 2 and the loss 9; the gap of means is 1/4 + 1/6 and the loss 21.0069.
    """
    ### BEGIN SOLUTION
    chosen, rejected = policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()
    if chosen_length is not None:
        chosen, rejected = chosen / chosen_length, rejected / rejected_length
    return (chosen - rejected - 1 / (2 * tau)).square().mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the mean of what?</summary>
#
# Each response has its own length. Divide its log-ratio by it before the two are subtracted.
# </details>

# %% check="ipo_loss" points=2
given = [torch.tensor([v]) for v in (-12.0, -15.0, -13.0, -14.0)]
lengths = [torch.tensor([4.0]), torch.tensor([6.0])]
checks.close(
    ipo_loss(*given, tau=0.1),
    torch.tensor(9.0),
    what="IPO's loss with sums",
    mistakes={
        "a target of 1/τ": torch.tensor(64.0),
        "a target of τ/2": torch.tensor(1.95**2),
        "chosen and rejected exchanged": torch.tensor(49.0),
    },
)
checks.close(
    ipo_loss(*given, *lengths, tau=0.1),
    torch.tensor((1 / 4 + 1 / 6 - 5) ** 2),
    what="IPO's loss with means",
    mistakes={
        "lengths ignored": torch.tensor(9.0),
        "one length for both": torch.tensor((2 / 4 - 5) ** 2),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
for batch, tau in [(1, 0.1), (5, 0.6), (8, 2.0)]:
    given = [-20 * torch.rand(batch, generator=g).to(profile.device) for _ in range(4)]
    lengths = [torch.randint(1, 30, (batch,), generator=g).to(profile.device) for _ in range(2)]
    pc, pr, rc, rr = (t.double() for t in given)
    n, m = (t.double() for t in lengths)
    sums = ((pc - rc - pr + rr) - 0.5 / tau).square().mean()
    means = ((pc - rc) / n - (pr - rr) / m - 0.5 / tau).square().mean()
    with checks.unchanged(*given, *lengths):
        checks.close(  # near the target a gap of about 20 has lost its last digits
            ipo_loss(*given, tau=tau), sums, what=f"{batch} sums", atol=1e-5, dtype=torch.float32
        )
        result = ipo_loss(*given, *lengths, tau=tau)
    checks.close(
        result,
        means,
        what=f"{batch} means, τ = {tau}",
        atol=1e-5,
        dtype=torch.float32,
        mistakes={
            "lengths exchanged": ((pc - rc) / m - (pr - rr) / n - 0.5 / tau).square().mean(),
            "the sum over the batch": batch * means,
            "a target divided by a length too": ((pc - rc) / n - (pr - rr) / m - 0.5 / (tau * n))
            .square()
            .mean(),
        },
    )
checks.keeps_dtype(
    lambda *four: ipo_loss(*four, *lengths, tau=0.7), *given, dtypes=(torch.float64, torch.float32)
)
leaves = [t.double().requires_grad_() for t in given]
ipo_loss(*leaves, *lengths, tau=2.0).backward()
pull = 2 * ((pc - rc) / n - (pr - rr) / m - 0.25) / 8
checks.close(leaves[0].grad, pull / n, what="the gradient of the chosen log-probability")
checks.close(leaves[1].grad, -pull / m, what="the gradient of the rejected log-probability")
for t in leaves[2:]:
    assert t.grad is None or not bool(t.grad.any()), "a gradient reaches the reference: detach it."
### END HIDDEN TESTS

# %% [markdown]
# **SimPO** (Meng et al.) leaves the reference out. What a decoder maximizes is roughly the mean
# log-probability of a token; so take that as the score, and ask for a margin γ:
#
# $$ L = -\log\sigma\Big(\frac{\beta}{\lvert y_w\rvert}\log\pi(y_w) -
#    \frac{\beta}{\lvert y_l\rvert}\log\pi(y_l) - \gamma\Big). $$
#
# One model is in memory in place of two, and long answers no longer collect reward by their length.
# Nothing holds the policy but a small learning rate. (TRL computes β(Δ − γ/β), which is the same,
# and adds the chosen answer's NLL unless its weight is set to 0.)


# %% exercise="simpo_loss" minutes=8 difficulty=1
def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """SimPO's loss, minimized: the mean over the batch, 0-dimensional, without an NLL term.

    policy_chosen, policy_rejected: (batch,), summed log-probabilities, float32 or float64.
    chosen_length, rejected_length: (batch,), ≥ 1, of the same dtype or int64.
    gamma: the margin; it is not multiplied by beta.
    A score gap of 1e4 of either sign gives a finite loss. The result has the dtype of the inputs.

    Worked: −12 over 4 tokens and −15 over 6, β = 2, γ = 1: 2 · (−3 + 2.5) − 1 = −2, loss 2.12693.
    """
    ### BEGIN SOLUTION
    gap = policy_chosen / chosen_length - policy_rejected / rejected_length
    return -F.logsigmoid(beta * gap - gamma).mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the sign of the margin</summary>
#
# The margin makes the task harder: at equal scores the loss is above ln 2.
# </details>

# %% check="simpo_loss" points=2
given = [torch.tensor([v]) for v in (-12.0, -15.0, 4.0, 6.0)]
checks.close(
    simpo_loss(*given, beta=2.0, gamma=1.0),
    torch.tensor(2.1269280),
    what="SimPO's loss",
    mistakes={
        "a margin with the wrong sign": torch.tensor(math.log(2)),
        "a margin times β": torch.tensor(math.log1p(math.exp(3))),
        "sums, not means": torch.tensor(math.log1p(math.exp(-5))),
        "the chosen answer's NLL added": torch.tensor(5.1269280),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for batch, beta, gamma in [(1, 2.0, 0.3), (6, 0.7, 1.6), (9, 10.0, 0.0)]:
    pc, pr = (-30 * torch.rand(batch, generator=g).to(profile.device) for _ in range(2))
    n, m = (torch.randint(1, 25, (batch,), generator=g).to(profile.device) for _ in range(2))
    h = beta * (pc.double() / n - pr.double() / m) - gamma
    other = beta * (pc.double() / m - pr.double() / n) - gamma
    with checks.unchanged(pc, pr, n, m):
        result = simpo_loss(pc, pr, n, m, beta=beta, gamma=gamma)
    checks.close(
        result,
        torch.logaddexp(torch.zeros_like(h), -h).mean(),
        what=f"{batch} pairs, β = {beta}, γ = {gamma}",
        dtype=torch.float32,
        mistakes={
            "lengths exchanged": torch.logaddexp(torch.zeros_like(h), -other).mean(),
            "the sum over the batch": torch.logaddexp(torch.zeros_like(h), -h).sum(),
        },
    )
checks.gradients(
    lambda a, b: simpo_loss(a, b, n, m, 1.5, 0.5),
    lambda a, b: F.softplus(-(1.5 * (a / n - b / m) - 0.5)).mean(),
    pc,
    pr,
    names=("policy_chosen", "policy_rejected"),
)
far = [torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0])]
checks.close(
    simpo_loss(*far, torch.ones(2), torch.ones(2), 1.0, 0.0),
    torch.tensor(5e3),
    what="the loss with score gaps of ±10,000",
    dtype=torch.float32,
)
checks.keeps_dtype(
    lambda a, b: simpo_loss(a, b, n, m), pc, pr, dtypes=(torch.float64, torch.float32)
)
### END HIDDEN TESTS

# %% [markdown]
# **ORPO** (Hong et al.) merges finetuning and preferences: the NLL of the chosen answer teaches the
# format and holds the policy, and a small penalty compares *odds*,
# $\mathrm{odds}(y) = P/(1-P)$ with $\log P = \tfrac{1}{\lvert y\rvert}\log\pi(y)$:
#
# $$ L = -\tfrac{1}{\lvert y_w\rvert}\log\pi(y_w)\; -\; \lambda\log\sigma\Big(\log
#    \frac{\mathrm{odds}(y_w)}{\mathrm{odds}(y_l)}\Big). $$
#
# $\log(1-P)$ from $x = \log P$ is the numerical step. $\log(1 - e^x)$ loses all its digits for $x$
# near 0, where $e^x$ rounds to 1. Two formulas cover both ends: $\log(-\mathrm{expm1}(x))$ near 0
# and $\mathrm{log1p}(-e^x)$ far from it, exchanged at $x = -\ln 2$ (Mächler). In the paper the NLL
# is the response's; TRL takes prompt and response, and library code averages it over the batch's
# tokens, not response by response.


# %% exercise="orpo_loss" minutes=20 difficulty=2 path="more"
def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, elementwise, in the dtype of x (float32 or float64).

    As precise as the dtype allows from x = −1e-30 to x = −1e4 (where it rounds to 0, which may
    carry a minus sign); the derivative −eˣ/(1 − eˣ) is finite in that range too. Worked:
    log1mexp(−ln 4) = log(3/4) = −0.28768.
    """
    ### BEGIN SOLUTION
    near = x > -math.log(2)
    # Each formula sees only what it is good for: else the gradient of the other could be NaN.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
    ### END SOLUTION


def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    weight: float = 0.1,
) -> Tensor:
    """ORPO's loss, minimized, as in the paper: the mean over the batch of NLL + weight · penalty.

    policy_chosen, policy_rejected: (batch,), summed log-probabilities of responses, each < 0,
        float32 or float64. chosen_length, rejected_length: (batch,), ≥ 1, same dtype or int64.
    NLL: minus the chosen response's log-probability divided by its length.
    penalty: −log σ(log odds of the chosen − log odds of the rejected): the odds of the probability
        whose logarithm is the mean log-probability of a token.

    Returns a 0-dimensional tensor in the dtype of the inputs.

    Worked: −12 over 4 tokens and −15 over 6: log odds −2.94893 and −2.41435, penalty 0.99574,
    NLL 3; with weight 0.1 the loss is 3.09957.
    """
    ### BEGIN SOLUTION
    chosen, rejected = policy_chosen / chosen_length, policy_rejected / rejected_length
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return (-chosen - weight * F.logsigmoid(log_odds)).mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: NaN gradients from torch.where</summary>
#
# `where` computes both sides, and an infinite derivative of the side that is not taken times 0 is
# NaN. Replace the arguments before the functions see them.
# </details>

# %% check="orpo_loss" points=2
checks.close(
    log1mexp(torch.tensor([-math.log(4.0), -1e-8, -20.0])),
    torch.tensor([math.log(0.75), math.log(1e-8), -math.exp(-20.0)]),
    what="log1mexp at −ln 4, −1e-8 and −20",
    rtol=1e-5,
    atol=0,
)
### BEGIN HIDDEN TESTS
g = checks.generator(13)
for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    x = -torch.logspace(-30, 1.9, 400, dtype=torch.float64).to(dtype)
    x = torch.cat([x, torch.tensor([-0.6931, -0.6932, -0.69314718, -50.0], dtype=dtype)])
    wide = x.double()
    # In float64: −expm1 is exact where x is small, and log1p where eˣ is.
    exact = torch.where(wide > -0.5, (-wide.expm1()).log(), (-wide.exp()).log1p())
    leaf = x.clone().requires_grad_()
    with checks.unchanged(x=x):
        log1mexp(x)
    result = log1mexp(leaf)
    checks.close(
        result, exact.to(dtype), what=f"log1mexp in {dtype}", rtol=rtol, atol=1e-36, dtype=dtype
    )
    (slope,) = torch.autograd.grad(result.sum(), leaf)
    checks.close(
        slope,
        (wide.exp() / wide.expm1()).to(dtype),
        what=f"the derivative of log1mexp in {dtype}",
        rtol=rtol,
        atol=1e-30,
    )
far = torch.tensor([-1e4, -200.0, -104.0], requires_grad=True)
result = log1mexp(far)
assert bool((result.abs() <= 1e-30).all()), "log1mexp far from 0 is 0"
result.sum().backward()
assert torch.isfinite(far.grad).all(), "the derivative far from 0 is not finite"
### END HIDDEN TESTS

# %% check="orpo_loss" points=2
given = [torch.tensor([v]) for v in (-12.0, -15.0, 4.0, 6.0)]
penalty = 0.9957422
checks.close(
    orpo_loss(*given, weight=0.1),
    torch.tensor(3 + 0.1 * penalty),
    what="ORPO's loss",
    mistakes={
        "no NLL": torch.tensor(0.1 * penalty),
        "the NLL summed, not averaged": torch.tensor(12 + 0.1 * penalty),
        "probabilities in place of odds": torch.tensor(3 + 0.1 * math.log1p(math.exp(0.5))),
        "odds of the whole response": torch.tensor(3 + 0.1 * math.log1p(math.exp(-3))),
        "chosen and rejected exchanged": torch.tensor(3 + 0.1 * (penalty - 0.5345799)),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)


def by_odds(pc, pr, n, m, weight):
    """With P and 1 − P themselves, in float64: the probabilities here are far from 0 and 1."""
    p, q = (pc.double() / n).exp(), (pr.double() / m).exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    return (-p.log() - weight * (ratio / (1 + ratio)).log()).mean()


for batch, weight in [(1, 0.1), (5, 1.0), (8, 0.0), (7, 3.0)]:
    n, m = (torch.randint(1, 25, (batch,), generator=g).to(profile.device) for _ in range(2))
    pc, pr = (-(0.05 + 4 * torch.rand(batch, generator=g).to(profile.device)) * k for k in (n, m))
    with checks.unchanged(pc, pr, n, m):
        result = orpo_loss(pc, pr, n, m, weight=weight)
    checks.close(
        result,
        by_odds(pc, pr, n, m, weight),
        what=f"{batch} pairs, weight {weight}",
        dtype=torch.float32,
        mistakes={
            "the NLL over the batch's tokens, as library code has it": by_odds(pc, pr, n, m, weight)
            + (pc.double() / n).mean()
            - pc.double().sum() / n.sum(),
            "the sum over the batch": batch * by_odds(pc, pr, n, m, weight),
        },
    )
checks.gradients(
    lambda a, b: orpo_loss(a, b, n, m, 0.4),
    lambda a, b: by_odds(a, b, n, m, 0.4),
    pc,
    pr,
    names=("policy_chosen", "policy_rejected"),
)
checks.keeps_dtype(
    lambda a, b: orpo_loss(a, b, n, m), pc, pr, dtypes=(torch.float64, torch.float32)
)
# Nearly certain and nearly impossible responses in one batch.
pc = torch.tensor([-1e-6, -900.0], requires_grad=True)
pr = torch.tensor([-900.0, -1e-6], requires_grad=True)
loss = orpo_loss(pc, pr, torch.ones(2), torch.ones(2), 1.0)
odds = 900.0 - math.log(1e-6)
checks.close(
    loss, torch.tensor((900.0 + odds) / 2), what="the loss at the ends", dtype=torch.float32
)
loss.backward()
assert torch.isfinite(torch.cat([pc.grad, pr.grad])).all(), (
    "the gradient of nearly certain responses is not finite."
)
### END HIDDEN TESTS

# %% [markdown]
# **KTO** (Ethayarajh et al.) needs no pairs: each answer carries a thumb up or down. Prospect
# theory says that people judge gains and losses from a reference point. Here it is the policy's
# divergence from the reference,
#
# $$ v = \begin{cases}\lambda_D\,\sigma(\beta(\rho - z_0)) & y \text{ desirable}\\
#    \lambda_U\,\sigma(\beta(z_0 - \rho)) & y \text{ undesirable}\end{cases},\qquad
#    L = \mathbb{E}[\lambda_y - v],\qquad z_0 \approx \mathrm{KL}(\pi\,\Vert\,\pi_{ref}). $$
#
# The KL is estimated without sampling. Each prompt of the batch is paired with *another* prompt's
# answer, and $z_0$ is the mean of $\log\pi/\pi_{ref}$ over these mismatched pairs. A KL is never
# negative, and this estimate may be: below 0 it is taken as 0.
# Three details are where implementations went wrong. $z_0$ carries no gradient. Answers move by one
# place, in a cycle: a reversed batch of odd size leaves the middle prompt with its own answer. And
# the batch has at least two prompts.


# %% exercise="kto_loss" minutes=25 difficulty=3 path="more"
def mismatched(
    prompts: list[list[int]], responses: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The same prompts, each with the response of the one before it: prompt i gets response i − 1,
    prompt 0 the last. Returns new lists (prompts, responses); the arguments stay as they are.

    Raises ValueError for fewer than two prompts, or unequal numbers.
    """
    ### BEGIN SOLUTION
    if len(prompts) < 2 or len(prompts) != len(responses):
        raise ValueError("as many responses as prompts, and two or more")
    return list(prompts), [responses[-1], *responses[:-1]]
    ### END SOLUTION


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    policy_mismatched: Tensor,
    ref_mismatched: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """KTO's loss, minimized, and the reference point: (loss, z0), both 0-dimensional.

    policy, ref: (batch,), summed log-probabilities, float32 or float64, of responses that
        desirable, (batch,), bool, judges. All may be of one kind.
    policy_mismatched, ref_mismatched: (others,), others ≥ 1: those of the mismatched pairs.
    z0: max(0, mean of policy_mismatched − ref_mismatched); no gradient goes through it.
    loss: the mean over the batch of weight · (1 − σ(±beta (policy − ref − z0))), with + and
        desirable_weight where desirable, − and undesirable_weight elsewhere. No gradient goes to
        ref.

    Worked: policy −12 and −15, ref −13 and −14, z0 = 0.5, β = 0.1: a desirable first answer costs
    0.48750, an undesirable second one 0.46257; the loss is their mean, 0.47504.
    """
    ### BEGIN SOLUTION
    z0 = (policy_mismatched - ref_mismatched).detach().mean().clamp(min=0)
    value = beta * (policy - ref.detach() - z0)
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-value),  # 1 − σ(v) = σ(−v)
        undesirable_weight * torch.sigmoid(value),
    )
    return losses.mean(), z0
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the sign for an undesirable answer</summary>
#
# The whole bracket changes its sign, z₀ included: the answer has a high value when its log-ratio
# is *below* the reference point.
# </details>
#
# <details><summary>Hint: where max goes</summary>
#
# One mean over the batch first, then the maximum with 0. A maximum per pair is larger wherever the
# pairs' signs differ.
# </details>

# %% check="kto_loss" points=1
prompts, responses = [[1], [2, 2], [3]], [[10], [20], [30, 31]]
pairs = checks.parts(mismatched(prompts, responses), "prompts", "responses")
assert pairs[0] == prompts, "the prompts stay in their order"
assert pairs[1] == [[30, 31], [10], [20]], (
    f"prompt i gets response i − 1: [[30, 31], [10], [20]]; yours are {pairs[1]}"
)
### BEGIN HIDDEN TESTS
for size in (2, 3, 4, 7):
    prompts = [[100 + i] * (i % 3 + 1) for i in range(size)]
    responses = [[200 + i, i] for i in range(size)]
    kept = copy.deepcopy((prompts, responses))
    new_prompts, new_responses = mismatched(prompts, responses)
    assert (prompts, responses) == kept, "the arguments changed: build new lists"
    assert new_prompts == prompts, "the prompts stay in their order"
    for i in range(size):
        assert new_responses[i] != responses[i], f"of {size}: prompt {i} kept its own response"
        assert new_responses[i] == responses[(i - 1) % size], (
            f"of {size}: prompt {i} gets {i - 1}'s"
        )
for bad in ([[1]], []):
    checks.raises(ValueError, mismatched, bad, bad, because="no other response to pair with")
checks.raises(ValueError, mismatched, [[1], [2], [3]], [[1], [2]], because="unequal numbers")
### END HIDDEN TESTS

# %% check="kto_loss" points=3
policy, ref = torch.tensor([-12.0, -15.0]), torch.tensor([-13.0, -14.0])
desirable = torch.tensor([True, False])
others = torch.tensor([-6.0, -9.0]), torch.tensor([-8.0, -8.0])  # log-ratios 2 and −1
loss, z0 = checks.parts(kto_loss(policy, ref, desirable, *others, beta=0.1), "loss", "z0")
checks.close(
    z0, torch.tensor(0.5), what="z0", mistakes={"a maximum for each pair": torch.tensor(1.0)}
)
checks.close(
    loss,
    torch.tensor((0.4875026 + 0.4625702) / 2),
    what="KTO's loss",
    mistakes={
        "no reference point": torch.tensor(0.4750208),
        "the value, not 1 − value,": torch.tensor(1 - 0.4750364),
        "z₀ with the wrong sign for the undesirable answer": torch.tensor(0.4875026),
        "log σ, as in DPO,": torch.tensor(0.6447085),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(15)


def by_cases(policy, ref, desirable, z0, beta, up, down):
    """One answer after the other, in float64, by the definition λ − v."""
    losses = []
    for rho, good in zip((policy - ref).double(), desirable.tolist(), strict=True):
        if good:
            losses.append(up - up / (1 + torch.exp(-beta * (rho - z0))))
        else:
            losses.append(down - down / (1 + torch.exp(-beta * (z0 - rho))))
    return torch.stack(losses).mean()


for batch, others, beta, up, down, shift in [
    (1, 3, 0.1, 1.0, 1.0, 1.0),
    (6, 6, 0.5, 1.3, 0.7, 2.0),
    (5, 4, 2.0, 0.4, 1.5, -3.0),  # a negative mean: z0 is 0
    (4, 2, 0.3, 2.0, 1.0, 0.5),
]:
    policy, ref = (-4 * torch.rand(batch, generator=g).to(profile.device) for _ in range(2))
    desirable = torch.arange(batch) % 3 != 1
    if batch == 4:
        desirable[:] = False
    desirable = desirable.to(profile.device)
    pair = [-4 * torch.rand(others, generator=g).to(profile.device) for _ in range(2)]
    pair[0] = pair[0] - pair[0].mean() + pair[1].mean() + shift
    expected_z0 = max(0.0, float((pair[0].double() - pair[1].double()).mean()))
    with checks.unchanged(policy, ref, desirable, *pair):
        loss, z0 = kto_loss(policy, ref, desirable, *pair, beta, up, down)
    checks.close(z0, torch.tensor(expected_z0), what=f"z0, mean {shift}", atol=1e-6)
    args = (policy, ref, desirable)
    checks.close(
        loss,
        by_cases(*args, expected_z0, beta, up, down),
        what=f"{batch} answers, β = {beta}, weights {up} and {down}",
        dtype=torch.float32,
        mistakes={
            "weights exchanged": by_cases(*args, expected_z0, beta, down, up),
            "weights ignored": by_cases(*args, expected_z0, beta, 1.0, 1.0),
            "z₀ not clamped at 0": by_cases(*args, shift, beta, up, down),
            "the wrong sign": by_cases(policy, ref, ~desirable, expected_z0, beta, up, down),
        },
    )
leaves = [t.double().requires_grad_() for t in (policy, ref, pair[0] + 1.0, pair[1])]
mixed = torch.tensor([True, False, False, True], device=policy.device)
loss, z0 = kto_loss(leaves[0], leaves[1], mixed, leaves[2], leaves[3], 0.3, 2.0, 1.0)
assert not z0.requires_grad, "z0 carries a graph: detach it."
checks.keeps_dtype(
    lambda *four: kto_loss(four[0], four[1], mixed, four[2], four[3]),
    *(t.detach() for t in leaves),
    dtypes=(torch.float64, torch.float32),
)
loss.backward()
s = torch.sigmoid(0.3 * (leaves[0] - leaves[1] - z0)).detach()
slope = 0.3 * s * (1 - s) * torch.where(mixed, -2.0, 1.0).double() / 4
checks.close(leaves[0].grad, slope, what="the gradient of the policy's log-probabilities")
for label, t in zip(("ref", "policy_mismatched", "ref_mismatched"), leaves[1:], strict=True):
    assert t.grad is None or not bool(t.grad.any()), f"a gradient reaches {label}: detach it."
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: a real model learns to prefer prose
#
# `tiny` continues Python's documentation and its source, and often mixes the two: after the
# beginning of a sentence come brackets, quotes, line breaks. The true reward here is the share of a
# response's characters that are letters or spaces. Nothing but labels made from it reaches the
# training: pairs of samples, labeled by Bradley–Terry.
#
# **Question.** DPO raises the chosen answers above the rejected ones. Where are the chosen answers'
# log-probabilities afterwards: above or below where they began? And is the policy better or worse
# for it on held-out prompts? Write your prediction down, with a reason, before you run.

# %% tags=["experiment"]
your_prediction = "the mean log-probability of the chosen answers rises / falls, because …"

NEW = 12  # tokens in a response, at most
base, tokenizer = models.load("tiny")
base.requires_grad_(False)
documents = data.split(data.deduplicate(data.documentation()))


def openings(texts: dict[str, str]) -> list[list[int]]:
    """The first nine tokens of each longer sentence, after the token that begins a document."""
    sentences = [s for text in texts.values() for s in " ".join(text.split()).split(". ")]
    encoded = tokenizer.encode_batch([s for s in sentences if s[:1].isupper()])
    return [[tokenizer.eos, *ids[:9]] for ids in encoded if len(ids) > 20]


def prose(response: list[int]) -> float:
    """The share of letters and spaces: the true reward, which training never sees."""
    text = tokenizer.decode(response, special=False)
    return sum(c.isalpha() or c == " " for c in text) / max(len(text), 1)


def sample(model: nn.Module, prompts: list[list[int]], g: torch.Generator) -> list[list[int]]:
    return models.generate(model, prompts, NEW, temperature=1.0, generator=g)


def make_pairs(prompts: list[list[int]], g: torch.Generator, size: int = 32) -> list[tuple]:
    """Batches for train_dpo: two samples of the base model for each prompt, and a noisy judge."""
    first, second = sample(base, prompts, g), sample(base, prompts, g)
    gap = torch.tensor([prose(a) - prose(b) for a, b in zip(first, second, strict=True)])
    wins = torch.rand(len(gap), generator=g, device=g.device).cpu() < torch.sigmoid(20 * gap)
    chosen = [a if w else b for a, b, w in zip(first, second, wins, strict=True)]
    rejected = [b if w else a for a, b, w in zip(first, second, wins, strict=True)]
    parts = [slice(k, k + size) for k in range(0, len(prompts), size)]
    return [(*rectangle(prompts[k], chosen[k]), *rectangle(prompts[k], rejected[k])) for k in parts]


@torch.no_grad()
def judge(model: nn.Module, prompts: list[list[int]]) -> tuple[float, float, list[list[int]]]:
    """(true reward, estimated KL to the base model in nats a response, responses)."""
    responses = sample(model, prompts, torch.Generator(profile.device).manual_seed(7))
    tokens, labels = rectangle(prompts, responses)
    kl = sequence_logprob(model(tokens), labels) - sequence_logprob(base(tokens), labels)
    return sum(map(prose, responses)) / len(responses), float(kl.mean()), responses


def tune(batches: list[tuple], **options) -> tuple[nn.Module, list[dict]]:
    model = copy.deepcopy(base).requires_grad_(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from threads
    history = train_dpo(model, batches * 4, lr=5e-4, reference=base, **options)
    torch.set_num_threads(threads)
    return model, history


generator = torch.Generator(profile.device).manual_seed(0)
prompts, held_out = openings(documents[0]), openings(documents[1])
order = torch.randperm(len(prompts), generator=generator, device=profile.device)[:128].tolist()
pairs = make_pairs([prompts[i] for i in order], generator)
tuned, history = tune(pairs, beta=0.1)

before, after = judge(base, held_out), judge(tuned, held_out)
print(f"{len(held_out)} held-out prompts    base    DPO")
print(f"letters and spaces     {before[0]:7.1%} {after[0]:6.1%}")
print(f"KL to the base (nats)  {before[1]:7.1f} {after[1]:6.1f}\n")
for k in range(3):
    print("prompt", repr(tokenizer.decode(held_out[k][1:])))
    for name, (_, _, responses) in (("base", before), ("DPO", after)):
        print(f"  {name:>4}", repr(tokenizer.decode(responses[k])))

# %% tags=["experiment", "figure"]
# Figure: log-probabilities and gap over training
with torch.no_grad():
    start = {
        key: [float(sequence_logprob(base(batch[k]), batch[k + 1]).mean()) for batch in pairs]
        for key, k in (("chosen", 0), ("rejected", 2))
    }
moved = {
    key: [entry[key] - start[key][step % len(pairs)] for step, entry in enumerate(history)]
    for key in start
}
fig, axes = plot.plt.subplots(1, 2, figsize=(10.5, 3.7))
steps = range(1, len(history) + 1)
plot.curves(
    steps,
    moved,
    xlabel="optimizer step",
    ylabel="change of log π (nats)",
    title="What becomes of each",
    ax=axes[0],
)
axes[0].axhline(0, color="#555555", linewidth=0.9, linestyle="-")
plot.curves(
    steps,
    {"gap": [entry["gap"] for entry in history]},
    xlabel="optimizer step",
    ylabel="log-ratio gap (nats)",
    title="What the loss sees",
    ax=axes[1],
)
axes[1].axhline(0, color="#555555", linewidth=0.9, linestyle="-")
plot.caption(
    fig,
    "The training pairs, batch by batch, read four times; left against the base model's level for "
    "the same batch. The gap grows. The rejected responses fall, and the chosen ones with them.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** Both fall, in each of the five seeds that we tried, and the true reward rises:
# the probability that both lose goes to other responses, which have more letters than before. By
# that measure the displacement is benign. Nothing in the loss knew: in the right triangle above the
# same loss sent it to an answer that nobody had judged. A training log shows a growing gap in both
# cases. Samples tell them apart.
#
# So read the samples. The reward asked for letters and spaces, and got them; a run of spaces is
# perfect, too. Few of the lines are sentences, and the KL says how far the model has gone from what
# it knew. β is the price of going far. The next table raises it, and has other objectives, too:
# the same pairs, steps and learning rate for each.

# %% tags=["experiment"]
objectives = {
    "DPO, β = 0.1": None,  # the run above
    "DPO, β = 0.5": lambda *six: dpo_loss(*six[:4], beta=0.5)[0],
    "IPO, means, τ = 0.5": lambda *six: ipo_loss(*six, tau=0.5),
    "SimPO, β = 2, γ = 1": lambda *six: simpo_loss(*six[:2], *six[4:], beta=2.0, gamma=1.0),
    "ORPO, λ = 1": lambda *six: orpo_loss(*six[:2], *six[4:], weight=1.0),
}


@torch.no_grad()
def changes(model: nn.Module) -> tuple[float, float]:
    """How much the mean log-probability of all chosen and all rejected responses has changed."""
    moved = []
    for k in (0, 2):
        parts = [
            sequence_logprob(model(batch[k]), batch[k + 1])
            - sequence_logprob(base(batch[k]), batch[k + 1])
            for batch in pairs
        ]
        moved.append(float(torch.cat(parts).mean()))
    return tuple(moved)


outcome = {}
print(f"{'':20} chosen  rejected  letters     KL")
for name, objective in objectives.items():
    model = tuned if objective is None else tune(pairs, objective=objective)[0]
    reward, kl, _ = judge(model, held_out)
    outcome[name] = (*changes(model), reward, kl)
    print("{:20} {:+6.1f}  {:+8.1f}  {:7.1%} {:6.1f}".format(name, *outcome[name]))

# %% tags=["experiment", "figure"]
# Figure: five objectives on one set of pairs
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1.25, 1])
for row, (name, (chosen, rejected, reward, kl)) in enumerate(outcome.items()):
    axes[0].plot([rejected, chosen], [row, row], color="#999999", linestyle="-", zorder=1)
    axes[0].plot(rejected, row, "X", color=plot.COLORS[6], markersize=8)
    axes[0].plot(chosen, row, "o", color=plot.COLORS[0], markersize=8)
    axes[1].plot(kl, reward, "o", color=plot.COLORS[0], markersize=7)
    axes[1].annotate(
        name.replace(", β =", "") if name.startswith("DPO") else name.split(",")[0],
        (kl, reward),
        textcoords="offset points",
        xytext=(0, 8),
        ha="center",
        fontsize=8,
    )
axes[0].axvline(0, color="#555555", linewidth=1, linestyle="-")
axes[0].set(yticks=range(len(outcome)), yticklabels=list(outcome), xlabel="change of log π (nats)")
axes[0].invert_yaxis()
axes[0].set_title("Chosen (dot) and rejected (cross)")
axes[1].plot(0, before[0], "s", color="black", markersize=7)
axes[1].annotate("base", (0, before[0]), textcoords="offset points", xytext=(8, -4), fontsize=8)
axes[1].yaxis.set_major_formatter("{x:.0%}")
axes[1].margins(x=0.12, y=0.15)
axes[1].set(xlabel="KL to the base (nats a response)", ylabel="letters and spaces")
axes[1].set_title("Reward and its price")
plot.caption(
    fig,
    "One seed. Left: a response right of the line has become likelier than under the base model. "
    "Right: up is what was asked for, right is what it cost, both on held-out prompts.",
)
plot.plt.show()

# %% [markdown]
# **What came out**, in the same direction for each of the five seeds that we tried. Every objective
# raises the true reward. ORPO makes the chosen responses likelier, since their NLL is in its loss;
# it goes least far from the base model, and gains least. SimPO goes furthest, with nothing to
# hold it, and its chosen responses fall most. A larger β keeps DPO closer.
#
# What did *not* repeat is the order by reward of the rest: a larger KL did not reliably buy more.
# And nothing was tuned: β, τ, γ and λ are on scales of their own, and all runs have one learning
# rate. The picture shows what the losses pull at, not which is best.

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number or a choice are graded, one by one.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers; numbers to 1 percent.

    "weight":  a pair has implicit rewards r̂_w = −0.5 and r̂_l = 1.5 at β = 0.2. By which factor
               does DPO's gradient descent multiply ∇log π(y_w) − ∇log π(y_l) for this pair?
    "robust":  policy −10 (chosen) and −16 (rejected), reference −13 and −15, β = 0.1, ε = 0.2: the
               loss of robust DPO.
    "stop":    cDPO with ε = 0.2 and β = 0.5: at which gap of log-ratios, (log π − log π_ref) of the
               chosen minus that of the rejected, does a pair stop pushing?
    "memory":  a policy of 7e9 parameters is trained. How many GiB (2^30 bytes) of bfloat16 weights
               does SimPO not hold that DPO does?
    "cancels": why may DPO ignore Z(x)? "small" (it is near 1), "prompt" (it depends on the prompt
               alone) or "constant" (it is the same for all prompts).
    """
    ### BEGIN SOLUTION
    margin = 0.4  # the implicit rewards are 0.3 and −0.1
    up, down = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
    return {
        "weight": 0.2 / (1 + math.exp(-2.0)),
        "robust": (0.8 * up - 0.2 * down) / 0.6,
        "stop": math.log(0.8 / 0.2) / 0.5,
        "memory": 7e9 * 2 / 2**30,
        "cancels": "prompt",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["weight"]
checks.kind(answer, float, what="weight")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.2 / (1 + math.exp(-2.0)),
    what="weight",
    hint="β σ(r̂_l − r̂_w); the rewards contain their β already",
    mistakes={
        "σ without β": 1 / (1 + math.exp(-2.0)),
        "σ(r̂_w − r̂_l)": 0.2 / (1 + math.exp(2.0)),
        "a second β inside": 0.2 / (1 + math.exp(-0.4)),
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["robust"]
checks.kind(answer, float, what="robust")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.3796819,
    what="robust",
    hint="[(1 − ε)·(−log σ(h)) − ε·(−log σ(−h))] / (1 − 2ε) with h = 0.4",
    mistakes={"cDPO": 0.5930153, "DPO": 0.5130153, "no division": 0.2278092},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["stop"]
checks.kind(answer, float, what="stop")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2 * math.log(4),
    what="stop",
    hint="σ(h) = 1 − ε, and h is β times the gap of log-ratios",
    mistakes={"h itself": math.log(4), "times β": 0.5 * math.log(4)},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["memory"]
checks.kind(answer, float, what="memory")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    7e9 * 2 / 2**30,
    what="memory",
    hint="One frozen copy, two bytes a parameter",
    mistakes={"GB": 14.0, "float32": 7e9 * 4 / 2**30, "a reward model too": 7e9 * 4 / 2**30},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["cancels"]
choices = ("small", "prompt", "constant")
assert answer in choices, f"cancels is one of {choices}; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "prompt", (
    "Write the difference of two rewards of the same prompt: which terms are equal, and would they "
    "be if the answers belonged to different prompts?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Your training log shows a falling loss, accuracy 0.97, and the chosen
# log-probability 20 nats lower than at the start. Is the run broken? What do you look at next?

# %% [markdown] answer="log-falls"
# The log alone does not say. The loss sees the gap only, and both levels may fall. Some fall is
# expected, since the chosen answers of offline data are samples whose details nobody asked for.
# Look at samples on held-out prompts, with the true reward or a judge, and at the KL to the
# reference. If the mass went to good answers, the displacement is benign. If not: look for pairs
# whose two answers are nearly alike (an edit distance, or the inner product of hidden states, as
# Razin et al. do), drop them, raise β, lower the learning rate, add the chosen answer's NLL, or
# draw pairs from the current policy.

# %% [markdown]
# **Open question 2.** When is DPO the wrong tool, and PPO or GRPO the right one?

# %% [markdown] answer="dpo-or-rl"
# When the reward can be computed at training time (a unit test, a proof checker): then samples of
# the current policy can be scored without end, and a fixed set of pairs throws that away. When the
# policy must go far from the reference: offline pairs say little about answers that the reference
# hardly gives, as the bandit showed. And when credit must reach single steps. DPO is right when
# there are pairs, judged by people, that cannot be made again: it is one supervised run, with two
# models in memory and no sampling. Rounds of on-policy pairs lie between.

# %% [markdown]
# **Open question 3.** Two answers of a pair have 20 and 200 tokens. How do DPO, IPO with means and
# SimPO treat the length, and what does each reward?

# %% [markdown] answer="length"
# DPO sums log-ratios: a long answer has more tokens over which a small change of each adds up, so
# its implicit reward moves more, and a policy trained on data whose chosen answers are longer grows
# longer still. IPO with means and SimPO divide by the length; a token of the short answer then
# moves the score ten times as much as one of the long answer. SimPO compares with no reference, so
# text that is easy to predict (repetition) has a high score by itself; the margin and the data must
# outweigh that.

# %% [markdown]
# ## References
#
# - **Rafailov et al. 2023**, *Direct Preference Optimization: Your Language Model is Secretly a
#   Reward Model*, arXiv:2305.18290. Section 4 and appendix A.1 for the derivation; section 5 for
#   which rewards a policy can name.
# - **Azar et al. 2023**, *A General Theoretical Paradigm to Understand Learning from Human
#   Preferences*, arXiv:2310.12036. Section 4.2: why DPO overfits certain preferences; section 5 for
#   IPO.
# - **Meng et al. 2024**, *SimPO: Simple Preference Optimization with a Reference-Free Reward*,
#   arXiv:2405.14734. Section 2, and the ablation of length normalization.
# - **Hong et al. 2024**, *ORPO: Monolithic Preference Optimization without Reference Model*,
#   arXiv:2403.07691. Section 4 for the loss and its gradient.
# - **Ethayarajh et al. 2024**, *KTO: Model Alignment as Prospect Theoretic Optimization*,
#   arXiv:2402.01306. Section 4 for the loss and the estimate of z₀.
# - **Razin et al. 2024**, *Unintentional Unalignment: Likelihood Displacement in Direct Preference
#   Optimization*, arXiv:2410.08847. Section 3 for the example of one token, section 4 for what
#   causes it.
# - **Chowdhury et al. 2024**, *Provably Robust DPO: Aligning Language Models with Noisy Feedback*,
#   arXiv:2403.00409. For the loss that is unbiased under flipped labels.
# - **Mitchell 2023**, *A note on DPO with noisy preferences & relationship to IPO*. cDPO, by
#   one of DPO's authors.
# - **Mächler 2012**, *Accurately Computing log(1 − exp(−|a|))*, the vignette of R's package Rmpfr:
#   where the two formulas change places.
#
# In production: huggingface/trl, `trl/trainer/dpo_trainer.py` (its IPO takes means; its robust loss
# has the minus sign) and `trl/trainer/kto_trainer.py`; linkedin/Liger-Kernel,
# `liger_kernel/chunked_loss`, which never holds the logits of a whole batch and takes
# `log1p(-exp(x))` in ORPO where you switch formulas. Its DPO has no cDPO. The reward model that DPO
# does without is lesson 22, the sampling loop is lesson 23.
