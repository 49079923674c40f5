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
#       Speculative decoding that is exact: the acceptance test and its proof, the arithmetic of its
#       speed, generation with two rolled-back caches, n-gram drafts, token trees, batches whose
#       rows accept different numbers, and a model that drafts for itself.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# A model writes one token at a time. For each it reads all of its weights, and does so little
# arithmetic with them that the processor waits for memory most of the time. Reading the weights
# once and computing *five* positions would cost hardly more. But the fifth token cannot be computed
# before the fourth is known.
#
# So guess the four. A cheap model writes a **draft**; the expensive one, the **target**, checks all
# drafted tokens in one pass, keeps the good ones and corrects the first bad one. The remarkable
# part: with the right test the text has *exactly* the distribution that the target alone would give
# it. Nothing is traded for the speed except arithmetic that lay idle.
#
# ## Core ideas
#
# **Verify in parallel.** The pass over draft tokens $x_1 \dots x_\gamma$ gives the target's
# distribution before each of them, and one after the last: $\gamma + 1$ distributions for one pass.
#
# **Accept by a ratio.** A token drawn from the draft's $q$ is kept with probability
# $\min(1, p/q)$. At the first rejection, one token is drawn from what $p$ has more than $q$, and
# the rest of the draft is thrown away. If nothing is rejected, a **bonus token** comes from the
# last distribution.
#
# **Roll back.** Both models may have cached keys and values of tokens that are not in the text.
# They must be forgotten, in each row of a batch by its own number.
#
# **Anything can draft.** A small model, the prompt itself, a head on the target. A bad draft costs
# time, never correctness.

# %% [markdown]
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $\gamma$ | `gamma` | tokens drafted in a round |
# | $q_i$, $p_i$ | `draft_probs[i]`, `target_probs[i]` | draft's and target's distribution of the token at place $i$: `(vocab,)` |
# | $\alpha$ | `alpha` | probability that a drafted token is accepted |
# | $c$ | `cost` | time of one pass of the draft over one token, in passes of the target over one token |
# | $v$ | `verify_cost` | what each further token adds to a pass of the target, in the same unit |
#
# The next cell gives you two things. `token_probs` turns logits into the distribution that is
# sampled: temperature and top-p act on *both* models, for the theorem holds for any two
# distributions, and exactness means the target's *after* these settings. Temperature 0 is the
# distribution with all mass on the likeliest token, so greedy decoding is no special case.
# `Reader` is a model with its cache: it reads tokens, and it can roll back.

# %%
import math
import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from llm40.models import MTP, Cache, Config, Llama
from llm40.models.llama import angles
from torch import Tensor


def token_probs(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """The distributions that are sampled from, of the shape of the logits: (…, vocab)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:  # keep the likeliest tokens until their sum reaches top_p
        ordered, order = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


class Reader:
    """A model and its cache."""

    def __init__(self, model: Llama, temperature: float = 0.0, top_p: float = 1.0):
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.cache = Cache()

    def __len__(self) -> int:
        """How many tokens have been read (and not rolled back)."""
        return len(self.cache)

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Tensor:
        """Appends tokens to the cache. Row i is the distribution of the token after tokens[i]:
        (len(tokens), vocab)."""
        ids = torch.tensor([tokens], device=self.model.embed_tokens.weight.device)
        return token_probs(self.model(ids, self.cache)[0], self.temperature, self.top_p)

    def rollback(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self.cache.truncate(length)


# %% [markdown]
# ## Accept, or draw from the rest
#
# Why is the result exactly $p$? Take one place. Token $x$ comes out in one of two ways.
#
# *Drafted and kept*: $q(x)\min(1, p(x)/q(x)) = \min(p(x), q(x))$.
#
# *Drawn after a rejection*: something is rejected with probability $1 - \sum_y \min(p(y), q(y))$,
# and then $x$ is drawn with probability $(p(x)-q(x))_+ \,/\, \sum_y (p(y)-q(y))_+$.
#
# The step that makes it work: $p - \min(p, q) = (p-q)_+$ in each place, and $\sum p = 1$, so
# $\sum_y (p(y)-q(y))_+ = 1 - \sum_y \min(p(y), q(y))$. The probability of a rejection is the
# normalizer of the **residual**. They cancel:
#
# $$ \Pr(x) = \min(p(x), q(x)) + (p(x) - q(x))_+ = p(x). $$
#
# For a sequence, go by induction: given that the places before are kept, place $i$ has the
# distribution $p_i$, and what stands after the first rejection is never used. The first term also
# tells the acceptance probability, $\alpha = \sum_x \min(p(x), q(x))$: one minus the
# **total variation distance** of the two.


# %% exercise="verify" minutes=30 difficulty=2
def verify(draft_probs: Tensor, target_probs: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    """What a round of speculative sampling writes: the accepted tokens, then one of the target's.

    draft_probs:  (gamma, vocab), q: row i is what tokens[i] was drawn from.
    target_probs: (gamma + 1, vocab), p: row i for the place of tokens[i], the last for the bonus.
    tokens:       (gamma,), int64; gamma may be 0.
    uniforms:     (gamma + 1,), in [0, 1).

    Token i is accepted if uniforms[i] · q(token) < p(token); the first that is not ends the draft.
    Then one token is drawn: after a rejection at i from max(p_i − q_i, 0), normalized; if all were
    accepted, from target_probs[gamma]. If that residual is empty (p_i is nowhere above q_i, which
    up to rounding means p_i = q_i), draw from p_i.

    The draw is by the inverse CDF with the last of the uniforms, u: the token x for which
    cdf(x − 1) ≤ u · total < cdf(x), where cdf is the running sum of the weights and total their
    sum. Never a token of weight 0, however close to 1 u is.

    Returns int64, (accepted + 1,). Compute in float64, whatever the dtype of the inputs, which are
    not changed.

    q = [0.5, 0.5, 0], p = [0.2, 0.3, 0.5], token 0: accepted if u₀ < 0.4, else 2 is written.
    """
    ### BEGIN SOLUTION
    p, q, u = target_probs.double(), draft_probs.double(), uniforms.double()
    weights, accepted = p[-1], len(tokens)
    for i, token in enumerate(tokens.tolist()):
        if not u[i] * q[i, token] < p[i, token]:
            residual = (p[i] - q[i]).clamp(min=0)
            weights, accepted = (residual if residual.sum() > 0 else p[i]), i
            break
    cdf = weights.cumsum(0)
    drawn = torch.searchsorted(cdf, u[-1:] * cdf[-1], right=True)
    return torch.cat([tokens[:accepted], drawn])
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the inverse CDF</summary>
#
# `torch.searchsorted(cdf, value, right=True)` is the number of entries of `cdf` that are ≤ value:
# the index of the first that is larger. Do not divide the weights by their sum; multiply u by it.
# </details>
#
# <details><summary>Hint: u close to 1</summary>
#
# Rounded to float32, a u just below 1 is 1. Then no entry of the running sum is larger than u ·
# total, and the search returns an index that does not exist. In float64 it stays below, if total is
# the sum's last entry and not subnormal, as of no distribution.
# </details>

# %% check="verify" points=2
# One drafted token. p has half of its mass where q has none.
q, p = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]])
for token, uniforms, expected in [
    (0, [0.39, 0.05], [0, 0]),  # accepted, and a bonus token from the last row
    (0, [0.39, 0.65], [0, 1]),
    (0, [0.41, 0.05], [2]),  # rejected: only token 2 has more in p than in q
    (1, [0.59, 0.95], [1, 2]),
    (1, [0.61, 0.95], [2]),
]:
    out = verify(q, p, torch.tensor([token]), torch.tensor(uniforms))
    assert out.tolist() == expected, (
        f"token {token} with uniforms {uniforms} should write {expected}; yours writes "
        f"{out.tolist()}. p/q of the token is {p[0, token] / q[0, token]:.1f}"
    )
### BEGIN HIDDEN TESTS
# The joint distribution by enumeration: all drafts, all cells of the uniforms. Both models depend
# on the whole prefix; extended by the target, the output must have the target's distribution.
g = checks.generator(1)
for vocab, gamma, zeros in [
    (3, 2, True),
    (3, 2, False),
    (2, 3, False),
    (4, 1, True),
    (5, 0, False),
]:
    prefixes = [t for n in range(gamma + 1) for t in product(range(vocab), repeat=n)]
    tables = []
    for _ in range(2):
        table = {
            t: torch.rand(vocab, generator=g, dtype=torch.float64) ** 2 + 1e-3 for t in prefixes
        }
        tables.append({t: row / row.sum() for t, row in table.items()})
    target, draft = tables
    if zeros:  # tokens that one of the two never writes
        target[()] = torch.cat([target[()][:-1], torch.zeros(1)]) / target[()][:-1].sum()
        draft[()] = torch.cat([torch.zeros(1), draft[()][1:]]) / draft[()][1:].sum()
    whole = {}
    for guess in product(range(vocab), repeat=gamma):
        q = torch.stack([draft[guess[:i]] for i in range(gamma)] or [torch.zeros(vocab)])[:gamma]
        p = torch.stack([target[guess[:i]] for i in range(gamma + 1)])
        chance = math.prod(float(q[i, t]) for i, t in enumerate(guess))
        if chance == 0:
            continue
        cuts = [[min(1.0, float(p[i, t] / q[i, t]))] for i, t in enumerate(guess)]
        rows = [p[-1], *((p[i] - q[i]).clamp(min=0) for i in range(gamma))]
        ends = [x for row in rows for x in (row.cumsum(0) / row.sum()).tolist() if row.sum() > 0]
        cuts.append([*ends, float(torch.rand((), generator=g))])
        cells = []
        for inner in cuts:
            edges = sorted({0.0, 1.0, *(min(max(x, 0.0), 1.0) for x in inner)})
            cells.append([(a, b) for a, b in pairwise(edges) if b - a > 1e-12])
        for cell in product(*cells):
            u = torch.tensor([(a + b) / 2 for a, b in cell], dtype=torch.float64)
            out = verify(q, p, torch.tensor(guess, dtype=torch.int64), u)
            assert out.dtype == torch.int64, f"int64 tokens are asked for, not {out.dtype}"
            assert out.dim() == 1, f"(accepted + 1,) tokens, yours are {tuple(out.shape)}"
            out = tuple(out.tolist())
            assert 1 <= len(out) <= gamma + 1, f"{gamma} drafts give 1 to {gamma + 1} tokens"
            whole[out] = whole.get(out, 0.0) + chance * math.prod(b - a for a, b in cell)
    wanted, found = [], []
    for text in product(range(vocab), repeat=gamma + 1):
        joint = [float(target[text[:i]][text[i]]) for i in range(gamma + 1)]
        wanted.append(math.prod(joint))
        found.append(
            sum(
                w * math.prod(joint[len(out) :])
                for out, w in whole.items()
                if text[: len(out)] == out
            )
        )
    checks.close(
        torch.tensor(found, dtype=torch.float64),
        torch.tensor(wanted, dtype=torch.float64),
        what=f"the distribution of {gamma + 1} tokens, gamma = {gamma}, {vocab} in the vocabulary",
        atol=1e-8,
        hint="It should be the target's, whatever the draft",
    )
### END HIDDEN TESTS

# %% check="verify" points=2
# p = q: everything is accepted, and the bonus token comes from the last row.
p = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
out = verify(p[:2], p, torch.tensor([0, 1]), torch.tensor([0.99, 0.999, 0.95]))
assert out.tolist() == [0, 1, 1], f"p = q accepts every token; yours writes {out.tolist()}"
### BEGIN HIDDEN TESTS
# p = q and a token that neither gives: an empty residual.
q, p = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
for u, expected in [(0.3, [0]), (0.7, [1])]:
    out = verify(q, p, torch.tensor([2]), torch.tensor([0.0, u]))
    assert out.tolist() == expected, "a rejection whose residual is empty draws from p"
# q above p by rounding alone: an empty residual too.
q = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
p = torch.tensor([[0.5, 0.5 - 2.0**-40], [0.0, 1.0]], dtype=torch.float64)
for u, expected in [(0.3, [0]), (0.7, [1])]:
    out = verify(q, p, torch.tensor([1]), torch.tensor([1 - 2.0**-53, u], dtype=torch.float64))
    assert out.tolist() == expected, "where p is nowhere above q, a rejection draws from p"
# A residual as small as 2⁻²⁸ is not an empty one.
q = torch.tensor([[0.5 + 2.0**-28, 0.5 - 2.0**-28]], dtype=torch.float64)
p = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
uniforms = torch.tensor([1 - 2.0**-30, 0.3], dtype=torch.float64)
out = verify(q, p, torch.tensor([0]), uniforms)
assert out.tolist() == [1], "however small the residual is, a rejection draws from it"
# p(token) = 0 is rejected even by u = 0.
out = verify(
    torch.tensor([[1.0, 0.0]]),
    torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    torch.tensor([0]),
    torch.tensor([0.0, 0.0]),
)
assert out.tolist() == [1], "a token that the target never writes was accepted at u = 0"
# u just below 1, weights that end in zeros, and sums that round.
for vocab in (5, 1000, 4097):
    weights = torch.rand(vocab, generator=checks.generator(vocab))
    weights[0] = weights[vocab // 2 :] = 0
    weights = weights / weights.sum()
    for u, edge in ((1 - 2.0**-53, vocab // 2 - 1), (0.0, 1)):
        out = verify(
            torch.zeros(0, vocab),
            weights[None],
            torch.zeros(0, dtype=torch.int64),
            torch.tensor([u], dtype=torch.float64),
        )
        assert out.tolist() == [edge], (
            f"u = {u} of {vocab} weights draws {out.tolist()}, not {edge}"
        )
# One-hots are greedy decoding: agreement is kept, the first difference corrected.
hot = torch.eye(6)
for draft, target in [([1, 2, 3], [1, 2, 3, 4]), ([1, 2, 3], [1, 5, 3, 4]), ([0], [3, 2])]:
    k = next((i for i, (a, b) in enumerate(zip(draft, target, strict=False)) if a != b), len(draft))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = hot[draft].to(dtype), hot[target].to(dtype), torch.tensor(draft)
        uniforms = torch.rand(len(draft) + 1, generator=checks.generator(2))
        with checks.unchanged(*args, uniforms):
            out = verify(*args, uniforms)
        assert out.tolist() == target[: k + 1], f"one-hots {draft} and {target} in {dtype}"
# Draws after a rejection do not reuse the uniform of the test: given a rejection that is large.
q = torch.tensor([[0.9, 0.1, 0.0, 0.0]])
p = torch.tensor([[0.1, 0.1, 0.4, 0.4], [1.0, 0.0, 0.0, 0.0]])
for first, last, expected in [(0.95, 0.2, [2]), (0.3, 0.8, [3]), (0.2, 0.49, [2])]:
    out = verify(q.T.contiguous().T, p, torch.tensor([0]), torch.tensor([first, last]))
    assert out.tolist() == expected, "the draw takes the last uniform, not the one of the test"
### END HIDDEN TESTS

# %% [markdown]
# Two real distributions, at one place in a text: `small` is the target, `tiny` the draft. The
# overlap of the bars is $\alpha$; what sticks out of $q$ upward is the residual.

# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # single tokens gain nothing from threads
small, tokenizer = models.load("small")
tiny, _ = models.load("tiny")
text = "def read(self, size):\n    if self.closed:\n        raise"
ids = [tokenizer.eos, *tokenizer.encode(text)]
p, q = (Reader(model, temperature=1.0).read(ids)[-1].cpu() for model in (small, tiny))
overlap = torch.minimum(p, q)
print(f"alpha = sum of min(p, q) = {overlap.sum():.3f}; 1 - total variation = ", end="")
print(f"{1 - (p - q).abs().sum() / 2:.3f}")
counts, rounds, generator = Counter(), 4000, torch.Generator().manual_seed(0)
drafted = torch.multinomial(q, rounds, replacement=True, generator=generator)
both = torch.stack([p, p])  # the second row, for the bonus token, does not matter here
for token, u in zip(drafted, torch.rand(rounds, 2, generator=generator), strict=True):
    counts[int(verify(q[None], both, token[None], u)[0])] += 1

# %% tags=["experiment", "figure"]
# Figure: target, draft, overlap and residual
shown = torch.maximum(p, q).topk(9).indices
places = torch.arange(len(shown))
fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 4.1), sharey=True)
axes[0].bar(places - 0.2, p[shown], 0.38, color=plot.COLORS[0], label="p, target")
axes[0].bar(places + 0.2, q[shown], 0.38, color="#bbbbbb", label="q, draft")
axes[1].bar(places, overlap[shown], 0.6, color="#bbbbbb", label="accepted: min(p, q)")
axes[1].bar(
    places,
    (p - q).clamp(min=0)[shown],
    0.6,
    bottom=overlap[shown],
    color=plot.COLORS[1],
    hatch="//",
    edgecolor="white",
    label="residual: p − q where positive",
)
written = torch.tensor([counts[int(t)] / rounds for t in shown])
axes[1].plot(places, written, "kD", markersize=5, label=f"written by verify, {rounds} rounds")
for ax, title in zip(axes, ("Two distributions", "What is written"), strict=True):
    labels = [repr(tokenizer.decode([int(t)])) for t in shown]
    ax.set_xticks(places, labels, rotation=55, ha="right", fontsize=8)
    ax.set(title=title)
    ax.legend(fontsize=8)
axes[0].set_ylabel("probability")
plot.caption(
    fig,
    "The token after “raise”: the nine likeliest. Right: grey and hatched add up to the target's "
    "bar, and what your function writes (diamonds) follows it.",
)
plot.plt.show()

# %% [markdown]
# ## How fast?
#
# Say that each drafted token is accepted with the same probability $\alpha$, independently of the
# others. That is an assumption, and the experiment will test it. A round writes at least $j + 1$
# tokens if the first $j$ are accepted: probability $\alpha^j$. The mean of a count is the sum of
# its tail probabilities, so a round writes on average
#
# $$ E = \sum_{j=0}^{\gamma} \alpha^j = \frac{1 - \alpha^{\gamma+1}}{1 - \alpha}. $$
#
# A round takes $\gamma$ passes of the draft and one of the target over $\gamma + 1$ tokens. The
# usual formula takes that pass to be as cheap as one over one token. On a large GPU it nearly is;
# on a CPU each further token costs a measurable $v$. In units of the target's single-token pass:
#
# $$ \text{speedup} = \frac{E}{\gamma c + 1 + \gamma v}. $$
#
# For $\alpha < 1$, $E$ saturates at $1/(1-\alpha)$, while the denominator grows without end if
# $c + v > 0$: there is a best $\gamma$.


# %% exercise="speedup" minutes=15 difficulty=1
def expected_tokens(alpha: float, gamma: int) -> float:
    """The mean number of tokens that a round writes, for 0 ≤ alpha ≤ 1 (both included), gamma ≥ 0.
    Relative precision 1e-9 for every alpha, 1 − 1e-12 too."""
    ### BEGIN SOLUTION
    return float(sum(alpha**j for j in range(gamma + 1)))
    ### END SOLUTION


def speedup(alpha: float, gamma: int, cost: float, verify_cost: float = 0.0) -> float:
    """How many times as fast as the target alone: tokens a round over the round's time, in passes
    of the target over one token. 1 for gamma = 0.

    alpha = 0.53, cost = 0.14, verify_cost = 0.075: 1.26, 1.27, 1.19, 1.10 for gamma = 1, 2, 3, 4.
    """
    ### BEGIN SOLUTION
    return expected_tokens(alpha, gamma) / (gamma * cost + 1 + gamma * verify_cost)
    ### END SOLUTION


def best_gamma(alpha: float, cost: float, verify_cost: float = 0.0, largest: int = 16) -> int:
    """The gamma in 0 … largest with the highest speedup; the smallest of several (of ties that only
    rounding decides, either). 0 where no draft pays."""
    ### BEGIN SOLUTION
    return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: alpha near 1</summary>
#
# (1 − α^(γ+1))/(1 − α) divides two small differences, and 0 by 0 at α = 1. The sum of powers has
# neither trouble.
# </details>

# %% check="speedup" points=2
found = [speedup(0.53, gamma, 0.14, 0.075) for gamma in (1, 2, 3, 4)]
checks.close(
    torch.tensor(found),
    torch.tensor([1.26, 1.27, 1.19, 1.10]),
    rtol=5e-3,
    what="the speedup at alpha = 0.53, cost = 0.14, verify_cost = 0.075",
    mistakes={"a verification that costs nothing": torch.tensor([1.34, 1.42, 1.38, 1.31])},
)
### BEGIN HIDDEN TESTS
cases = [(0.0, 3), (0.5, 4), (0.9, 7), (1.0, 5), (1 - 1e-12, 9), (0.37, 0), (0.625, 1)]
# Where the closed form loses most: the second-order term is half of float64's last bit.
for alpha, gamma in [*cases, (1 - 2.0**-27, 1), (1 - 2.0**-28, 3), (1 - 2.0**-30, 7)]:
    a = Fraction(alpha)
    # By outcomes: exactly k accepted, then one more token.
    outcomes = [(a**k * (1 - a), k + 1) for k in range(gamma)] + [(a**gamma, gamma + 1)]
    truth = sum(chance * count for chance, count in outcomes)
    checks.number(
        expected_tokens(alpha, gamma),
        float(truth),
        to=1e-9,
        what=f"expected_tokens({alpha}, {gamma})",
        mistakes={"leaving out the target's own token": float(truth) - 1},
    )
    for cost, verify_cost in [(0.0, 0.0), (0.2, 0.0), (0.05, 0.3), (1.5, 0.01)]:
        time_of = gamma * (Fraction(cost) + Fraction(verify_cost)) + 1
        checks.number(
            speedup(alpha, gamma, cost, verify_cost),
            float(truth / time_of),
            to=1e-9,
            what=f"speedup({alpha}, {gamma}, {cost}, {verify_cost})",
            mistakes={
                "verifying γ + 1 further tokens": float(truth / (time_of + Fraction(verify_cost)))
            },
        )
### END HIDDEN TESTS

# %% check="speedup" points=1
assert best_gamma(0.53, 0.14, 0.075) == 2, "two tokens are best at alpha = 0.53"
assert best_gamma(0.1, 0.2) == 0, "a draft that is wrong nine times in ten does not pay"
### BEGIN HIDDEN TESTS
for alpha in (0.0, 0.2, 0.53, 0.8, 0.95, 1.0):
    for cost, verify_cost in [(0.01, 0.0), (0.05, 0.02), (0.14, 0.075), (0.3, 0.1), (0.0, 0.011)]:
        for largest in (0, 3, 16, 40):
            # One more token pays as long as its chance is worth more than the rate so far:
            # the speedup has one peak in gamma.
            a, step = Fraction(alpha), Fraction(cost) + Fraction(verify_cost)
            best, tokens, power = 0, Fraction(1), Fraction(1)
            rate = Fraction(1)
            for gamma in range(1, largest + 1):
                power *= a
                tokens += power
                if tokens / (1 + gamma * step) > rate:
                    best, rate = gamma, tokens / (1 + gamma * step)
            answer = best_gamma(alpha, cost, verify_cost, largest)
            checks.kind(answer, int, what="best_gamma")
            assert answer == best, (
                f"best_gamma({alpha}, {cost}, {verify_cost}, {largest}) is {best}, not {answer}"
            )
for half, quarter in ((0.5, 0.0), (0.25, 0.25)):  # gamma 0 and 1 are equally fast, exactly
    assert best_gamma(0.5, half, quarter) == 0, "of several that are best, the smallest"
### END HIDDEN TESTS

# %% [markdown]
# ## Two caches, rolled back
#
# Now the loop. Think of the text as prompt plus what is written, and of each cache as a prefix of
# it. In a round, the draft reads what it has not read yet and draws a token, reads that, draws the
# next. The target reads what *it* has not read (the whole prompt at first, then the text's last
# token) and the drafted tokens, in one call. `verify` decides.
#
# Then come the mistakes. Say that $\gamma = 3$ and one token was accepted: the target has read two
# tokens that are not in the text, the draft has read one (it never read its own last token). After
# a full acceptance the draft lacks two tokens of the text instead, its own last one and the bonus.
# Nobody notices a cache that is off by one: the output stays fluent, and the acceptance falls. With
# a target whose cache is wrong, the text is no longer the target's.
#
# The state that avoids them is an invariant: **after each round, both caches hold a prefix of the
# text**. Then the next round reads `text[len(reader):]`, however long that is.


# %% exercise="speculative_generate" minutes=40 difficulty=3
def speculative_generate(
    target: Reader,
    draft: Reader,
    prompt: list[int],
    max_new_tokens: int,
    gamma: int,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """The tokens written after a prompt, distributed as if `target` had written them alone, and the
    number of drafted tokens that were accepted in each round.

    target, draft: have `read`, `rollback` and a length, as `Reader` above; both are empty at first.
        They agree on the vocabulary. Their distributions have temperature and top-p in them.
    prompt: at least one token. max_new_tokens ≥ 0: so many are written, unless `stop` comes first;
        for 0 nothing is read.
    gamma ≥ 0: a round drafts min(gamma, tokens still to write − 1), so that it never writes too
        many.
    stop: the text ends with this token, if it is written; whatever the round would write after it
        is dropped. None: there is no such token.
    generator: all draws are made with it, those of the draft and the uniforms. It is on the device
        of the distributions.

    A round calls target.read once, with every token of the text and of the draft that it has not
    read, and draft.read once for each token that it drafts (its last one it does not read). Neither
    reads a token twice unless it was rolled back. At the end of each round, the last one too,
    neither holds a token that is not in the text (a `stop` that ends it is in the text).

    Returns (tokens, accepted), lists of whole numbers; accepted counts what `verify` accepted, also
    where `stop` cuts it off.
    """
    ### BEGIN SOLUTION
    text, accepted = list(prompt), []
    end = len(prompt) + max_new_tokens
    while len(text) < end:
        count = min(gamma, end - len(text) - 1)
        drafted, qs = [], []
        for _ in range(count):
            q = draft.read((text + drafted)[len(draft) :])[-1]
            drafted.append(int(torch.multinomial(q, 1, generator=generator)))
            qs.append(q)
        p = target.read((text + drafted)[len(target) :])[-count - 1 :]
        q = torch.stack(qs) if qs else p[:0]
        uniforms = torch.rand(count + 1, generator=generator, device=p.device, dtype=torch.float64)
        tokens = torch.tensor(drafted, dtype=torch.int64, device=p.device)
        new = verify(q, p, tokens, uniforms).tolist()
        accepted.append(len(new) - 1)
        if stop in new:
            new = new[: new.index(stop) + 1]
            end = len(text) + len(new)
        text += new
        for reader in (target, draft):  # the last token was drawn, and has been read by nobody
            reader.rollback(min(len(reader), len(text) - 1))
    return text[len(prompt) :], accepted
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which rows</summary>
#
# In the first round the target reads the whole prompt. Of the distributions that come back only the
# last count + 1 are about the draft: after the text's last token, and after each drafted one.
# </details>
#
# <details><summary>Hint: how far to roll back</summary>
#
# The text's last token was drawn from a distribution. Neither model has read it (but for a `stop`
# that was drafted). So each cache holds at most all of the text but that token, and may hold less.
# </details>

# %% tags=["support"]
# Support: readers whose distributions depend on every token they hold, and a log of their calls


class Toy:
    """A reader over a random table: its distribution is a function of the whole prefix."""

    def __init__(self, table: Tensor, hot: bool = False, memory: int | None = None):
        self.table, self.hot, self.memory = table, hot, memory
        self.held, self.reads = [], []

    def __len__(self) -> int:
        return len(self.held)

    def after(self, prefix: list[int]) -> Tensor:
        state = 7
        for token in prefix if self.memory is None else prefix[len(prefix) - self.memory :]:
            state = (31 * state + token + 1) % len(self.table)
        probs = self.table[state]
        return F.one_hot(probs.argmax(), len(probs)).to(probs) if self.hot else probs

    def read(self, tokens: list[int]) -> Tensor:
        tokens = [int(t) for t in tokens]
        assert tokens, "read was called without a token"
        self.reads.append(tokens)
        rows = []
        for token in tokens:
            self.held.append(token)
            rows.append(self.after(self.held))
        return torch.stack(rows)

    def rollback(self, length: int) -> None:
        assert 0 <= length <= len(self.held), f"rollback({length}) of {len(self.held)} tokens"
        del self.held[length:]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.after(text).argmax()))
        return text[len(prompt) :]


def toy_pair(seed: int, vocab: int = 5, alike: float = 0.5, **options) -> tuple[Toy, Toy]:
    """A target and a draft that is like it in a share of the states."""
    g = checks.generator(seed)
    target, other = (
        (2.5 * torch.randn(211, vocab, generator=g, dtype=torch.float64)).softmax(-1)
        for _ in range(2)
    )
    same = torch.rand(211, 1, generator=g) < alike
    return Toy(target, **options), Toy(torch.where(same, target, other), **options)


def greedy_rounds(draft: Toy, prompt: list[int], truth: list[int], gamma: int) -> list[int]:
    """The accepted numbers, replayed from the target's finished greedy text."""
    at, rounds = 0, []
    while at < len(truth):
        size = min(gamma, len(truth) - at - 1)
        guess, kept = draft.greedy(prompt + truth[:at], size), 0
        while kept < size and guess[kept] == truth[at + kept]:
            kept += 1
        rounds.append(kept)
        at += kept + 1
    return rounds


# %% check="speculative_generate" points=3
# Greedy: the text is the target's own, token for token, whatever the draft.
for alike in (0.0, 0.6, 1.0):
    target, draft = toy_pair(1, alike=alike, hot=True)
    out, accepted = speculative_generate(target, draft, [3, 1, 4], 13, 3)
    assert out == target.greedy([3, 1, 4], 13), (
        f"the target alone writes {target.greedy([3, 1, 4], 13)}; with a draft that is like it in "
        f"{alike:.0%} of the states, yours writes {out}. Are both caches prefixes of the text?"
    )
### BEGIN HIDDEN TESTS
for case, (gamma, count, prompt, alike) in enumerate(
    [
        (1, 9, [2], 0.5),
        (2, 12, [0, 4, 4], 0.7),
        (4, 23, [1, 0], 0.8),
        (5, 3, [1, 2, 3, 4], 0.9),
        (3, 1, [2, 2], 0.5),
        (3, 0, [2, 2], 0.5),
        (0, 5, [3], 0.5),
        (3, 16, [3, 3, 3], 1.0),
    ]
):
    target, draft = toy_pair(20 + case, alike=alike, hot=True)
    given = list(prompt)
    out, accepted = speculative_generate(target, draft, given, count, gamma)
    assert given == prompt, "the prompt was changed: copy it"
    truth = target.greedy(prompt, count)
    assert list(out) == truth, f"gamma = {gamma}: {out}, the target alone {truth}"
    # The rounds, replayed from the finished text.
    at, rounds, target_reads, draft_calls = 0, [], [], 0
    target_held = 0
    while at < count:
        size = min(gamma, count - at - 1)
        guess = draft.greedy(prompt + truth[:at], size)
        kept = 0
        while kept < size and guess[kept] == truth[at + kept]:
            kept += 1
        target_reads.append((prompt + truth[:at] + guess)[target_held:])
        target_held = len(prompt) + at + kept
        draft_calls += size
        rounds.append(kept)
        at += kept + 1
    assert list(accepted) == rounds, f"accepted in each round: {rounds}, yours {accepted}"
    assert target.reads == target_reads, (
        "the target reads once a round: what it has not read of the text, and the draft. With "
        f"gamma = {gamma} that is {target_reads}; yours read {target.reads}"
    )
    assert len(draft.reads) == draft_calls, (
        f"the draft is read {draft_calls} times, once for each drafted token; yours "
        f"{len(draft.reads)} times"
    )
    assert sum(map(len, draft.reads)) <= len(prompt) + count + sum(
        min(gamma, count) - k for k in rounds
    ), "the draft reads tokens again that it has read"
    for reader in (target, draft):
        assert reader.held == (prompt + truth)[: len(reader.held)], "a cache holds another text"
### END HIDDEN TESTS

# %% check="speculative_generate" points=2
target, draft = toy_pair(2, alike=0.8, hot=True)
truth = target.greedy([1, 2], 30)
stop = truth[4]
cut = truth.index(stop) + 1
out, accepted = speculative_generate(target, draft, [1, 2], 30, 4, stop)
assert out == truth[:cut], f"{stop} ends the text {truth[:cut]}; yours is {out}"
### BEGIN HIDDEN TESTS
for seed in range(8):  # stops at every place of a round, accepted or drawn
    target, draft = toy_pair(40 + seed, vocab=9, alike=0.85, hot=True)
    truth = target.greedy([0], 24)
    for stop in sorted(set(truth))[:3]:
        target, draft = toy_pair(40 + seed, vocab=9, alike=0.85, hot=True)
        out, accepted = speculative_generate(target, draft, [0], 24, 4, stop)
        cut = truth.index(stop) + 1
        assert out == truth[:cut], f"stop = {stop} in {truth}: yours {out}"
        rounds, written = [], 0
        for kept in greedy_rounds(draft, [0], truth, 4):
            if written < cut:
                rounds.append(kept)
                written += kept + 1
        assert list(accepted) == rounds, (
            f"stop = {stop}: `verify` accepted {rounds} in the rounds, yours says {accepted}"
        )
        for reader in (target, draft):
            assert reader.held == [0, *out][: len(reader.held)], (
                f"the text ends with {stop}, and a cache still holds what was written after it"
            )
# A prompt that holds the stop token goes on.
target, draft = toy_pair(60, alike=0.5, hot=True)
truth = target.greedy([2, 4], 6)
missing = next((t for t in range(5) if t not in truth), None)
prompt = [2, 4]
out, _ = speculative_generate(target, draft, prompt, 6, 2, 99)
assert out == truth, "a stop token that is not written ends nothing"
### END HIDDEN TESTS

# %% check="speculative_generate" points=3
# Sampled: a target that always gives [0.1, 0.2, 0.7], and a draft that prefers token 0.
p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
target, draft = Toy(p[None]), Toy(q[None])
g = torch.Generator().manual_seed(checks.seed())
out, accepted = speculative_generate(target, draft, [0], 400, 2, generator=g)
share = sum(t == 2 for t in out) / len(out)
assert abs(share - 0.7) < 0.14, f"token 2 has probability 0.7; in your text it is {share:.2f}"
### BEGIN HIDDEN TESTS
for _ in range(3):  # 1,600 tokens in all: a share of 0.16 is six errors away
    target, draft = Toy(p[None]), Toy(q[None])
    out = out + speculative_generate(target, draft, [0], 400, 2, generator=g)[0]
checks.drawn(
    torch.tensor([float(t == 0) for t in out]),
    mean=0.1,
    what="token 0, of probability 0.1",
    mistakes={"the draft's distribution": 0.6, "plain p after a rejection": 0.1 + 0.06},
)
# Rounds of one draft: accepted with probability sum of min(p, q).
target, draft = Toy(p[None]), Toy(q[None])
out, accepted = speculative_generate(target, draft, [0], 500, 1, generator=g)
alpha = float(torch.minimum(p, q).sum())
checks.drawn(
    torch.tensor(accepted[:-1], dtype=torch.float64),
    mean=alpha,
    std=math.sqrt(alpha * (1 - alpha)),
    what="the share of accepted tokens",
    hint="A drafted token is drawn from q, not its likeliest",
)
# A Markov chain: the distribution depends on the token before. Rows that are shifted by one, or a
# bonus token from another row, show here.
chain = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]], dtype=torch.float64)
guess = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]], dtype=torch.float64)
place = [(31 * 7 + t + 1) % 3 for t in range(3)]
target, draft = (Toy(rows[[place.index(i) for i in range(3)]], memory=1) for rows in (chain, guess))
out, _ = speculative_generate(target, draft, [0], 700, 3, generator=g)
steps = list(zip([0, *out], out, strict=False))
for before, after in [(0, 0), (1, 2), (2, 1)]:
    row = torch.tensor([float(b == after) for a, b in steps if a == before])
    if len(row) >= 100:
        checks.drawn(row, mean=0.8, std=0.4, what=f"token {after} after token {before}")


def text_of(g: torch.Generator) -> list[int]:
    target, draft = toy_pair(3, vocab=4, alike=0.3)
    out, accepted = speculative_generate(target, draft, [1], 60, 2, generator=g)
    return torch.tensor([*out, *accepted])


checks.uses_generator(text_of, what="speculative_generate")
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: `tiny` drafts for `small`
#
# **Question.** `small` is 8.7 times as large as `tiny`. Over their own samples, at temperature 1,
# what is $\alpha$, which $\gamma$ is fastest, and how close does the formula come? It assumes that
# acceptances are independent. If they are not, are long runs of accepted tokens more frequent than
# the formula says, or less? Write your prediction down first.

# %% tags=["experiment"]
your_prediction = "alpha = …, the best gamma = …, long runs are more / less frequent, because …"

_, held_out = data.split(data.deduplicate(data.source_code()))
openings = [[tokenizer.eos, *tokenizer.encode(text)[:40]] for text in held_out.values()]
openings = [ids for ids in openings if len(ids) == 41][:4]
NEW, GAMMAS = 40, (1, 2, 4, 6)


def clock(passes: list[tuple[Llama, int]], repeats: int = 15) -> list[float]:
    """Median milliseconds of each of the passes (model, tokens) after 60 tokens. They take turns,
    as in use: each finds the processor's caches full of the others' weights."""
    readers, taken = [Reader(model, 1.0) for model, _ in passes], []
    for reader in readers:
        reader.read(openings[0] + openings[1][:19])
    for _ in range(repeats):
        for reader, (_, width) in zip(readers, passes, strict=True):
            begin = time.process_time()  # of this process: what else runs does not count
            reader.read(openings[2][:width])
            taken.append(time.process_time() - begin)
            reader.rollback(60)
    return [1000 * sorted(taken[k :: len(passes)])[repeats // 2] for k in range(len(passes))]


def timed(
    gamma: int, temperature: float, seed: int = 0
) -> tuple[float, list[list[int]], list[list[int]]]:
    """(tokens a second, texts, accepted in each round but the last) over all openings."""
    texts, rounds, begin = [], [], time.process_time()
    for k, prompt in enumerate(openings):
        readers = Reader(small, temperature), Reader(tiny, temperature)
        generator = torch.Generator(profile.device).manual_seed(100 * seed + k)
        out, accepted = speculative_generate(*readers, prompt, NEW, gamma, generator=generator)
        texts.append(out)
        rounds.append(accepted[:-1])
    return NEW * len(openings) / (time.process_time() - begin), texts, rounds


one, five, drafting = clock([(small, 1), (small, 5), (tiny, 1)])
cost, verify_cost = drafting / one, (five - one) / 4 / one
print(f"small, one token: {one:.2f} ms; c = {cost:.2f}, v = {verify_cost:.3f}\n")
timed(0, 1.0)
speeds, lengths = {}, {}
for temperature in (1.0, 0.0):
    base, plain, _ = timed(0, temperature)
    for gamma in GAMMAS:
        speed, texts, rounds = timed(gamma, temperature)
        flat = [k for accepted in rounds for k in accepted]
        # Every round that accepted k < gamma ended in a rejection: the estimate of alpha.
        alpha = sum(flat) / (sum(flat) + sum(k < gamma for k in flat))
        lengths[temperature, gamma] = flat, alpha
        speeds[temperature, gamma] = speed / base
        same = f"; the target's text: {texts == plain}" if temperature == 0 else ""
        print(
            f"T = {temperature:.0f}, gamma = {gamma}: alpha {alpha:.2f}, tokens a round "
            f"{sum(flat) / len(flat) + 1:.2f} (formula {expected_tokens(alpha, gamma):.2f}), "
            f"speed × {speed / base:.2f} (formula {speedup(alpha, gamma, cost, verify_cost):.2f})"
            + same
        )

runs = [k for seed in range(1, 3) for accepted in timed(6, 1.0, seed)[2] for k in accepted]
print("\nT = 1, gamma = 6, two more seeds: accepted, if those before in the round were:")
depth = [sum(k > d for k in runs) / max(1, sum(k >= d for k in runs)) for d in range(6)]
print("  ".join(f"{d + 1}: {share:.2f}" for d, share in enumerate(depth)))

# %% tags=["experiment", "figure"]
# Figure: speed against theory, and how long the accepted runs are
fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 4))
grid = range(0, 9)
for color, marker, temperature in ((0, "o", 1.0), (1, "s", 0.0)):
    alpha = lengths[temperature, 6][1]
    theory = [speedup(alpha, gamma, cost, verify_cost) for gamma in grid]
    free = [speedup(alpha, gamma, cost) for gamma in grid]
    label = f"T = {temperature:.0f}, α = {alpha:.2f}"
    axes[0].plot(grid, theory, "-", color=plot.COLORS[color], label=label)
    axes[0].plot(grid, free, ":", color=plot.COLORS[color])
    axes[0].plot(
        GAMMAS,
        [speeds[temperature, gamma] for gamma in GAMMAS],
        marker,
        color=plot.COLORS[color],
        label="measured",
    )
axes[0].axhline(1, color="#555555", linewidth=0.9, linestyle="-")
axes[0].set(xlabel="γ, drafted tokens a round", ylabel="speed (target alone = 1)", title="Speed")
axes[0].legend(fontsize=8, ncols=2)
flat, alpha = runs, sum(runs) / (sum(runs) + sum(k < 6 for k in runs))
counted = Counter(flat)
axes[1].bar(
    range(7), [counted[k] / len(flat) for k in range(7)], color=plot.COLORS[0], label="measured"
)
geometric = [alpha**k * (1 - alpha) for k in range(6)] + [alpha**6]
axes[1].plot(range(7), geometric, "k_", markersize=24, markeredgewidth=2, label="independent")
axes[1].set(xlabel="accepted in a round", ylabel="share of rounds", title="T = 1, γ = 6")
axes[1].legend(fontsize=9)
plot.caption(
    fig,
    "Left: lines are the formula with the measured c and v, dotted without v. Right: bars are "
    "rounds; strokes are what independent acceptances of the same α would give.",
)
plot.plt.show()

# %% [markdown]
# **What came out**, over five seeds. Greedily, the texts are the target's to the last token. At
# temperature 1 $\alpha$ is about 0.4 to 0.6: so often is a drafted token accepted if all before it
# were. Greedily it is more, for `small` falls into loops when it decodes greedily, and loops are
# easy to guess.
#
# *Speed.* The draft has about a ninth of the target's weights, and its pass takes more than a ninth
# of the time: three layers have their overhead, as sampling has. At temperature 1 that eats up all
# of what is won, or nearly: here speculation does not pay. Greedily it pays a little, or breaks
# even. The formula leaves out what `verify` itself takes, and so is mostly too high. Against that
# works another error: it takes each draft pass to be as slow as the first of a round, which finds
# the processor's caches full of the target's weights. With long drafts at temperature 1 this can
# outweigh the first. On a server, where a target's pass takes tens of milliseconds, both matter
# less.
#
# *Independence.* At $\gamma = 6$, in each seed, the second token, after an accepted first, was
# accepted more often than the first. A round begins where the one before broke off, at a hard
# place, and an accepted token says that the place is easy. Yet at temperature 1 tokens a round
# agreed with the formula to 0.05 in each seed, since its $\alpha$ is an average over all depths.
# Greedily it promises too much for $\gamma = 4$ and 6: long runs weigh most in that average.

# %% [markdown]
# ## The prompt drafts
#
# A summary quotes its document, an edited program repeats most of its lines. There the draft costs
# nothing: look for the last few tokens earlier in the text, and propose what followed them there.
# This is **prompt lookup**, also called n-gram speculation. Its $q$ has all mass on one token, so
# `verify` needs no change: a one-hot row for each proposal, accepted with probability $p(x)$.


# %% exercise="prompt_lookup_draft" minutes=15 difficulty=1
def prompt_lookup_draft(tokens: list[int], gamma: int, longest: int = 3) -> list[int]:
    """At most `gamma` tokens that followed the text's end when it stood earlier in the text.

    For n = longest, longest − 1, …, 1: if the last n tokens also stand earlier (the two may
    overlap, but the earlier one must end before the text does), the proposal is what follows the
    *latest* such place, up to gamma tokens, as many as there are. The first n with a match decides.
    No match for any n, or gamma = 0: []. n is never more than the text allows; an empty text: [].

    [1, 2, 3, 4, 1, 2, 3] with gamma = 2: [4, 1]. The text is not changed.
    """
    ### BEGIN SOLUTION
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return list(tokens[start + n : start + n + gamma])
    return []
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where to begin</summary>
#
# With `n` tokens at the end of a text of `length`, the text's own end starts at `length − n`. The
# latest start of another one is one before.
# </details>

# %% check="prompt_lookup_draft" points=2
for tokens, gamma, longest, expected in [
    ([1, 2, 3, 4, 1, 2, 3], 2, 3, [4, 1]),
    ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 3, 3, [9, 2, 3]),  # three tokens match before two
    ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 3, 2, [8, 1, 2]),  # two: the latest place
    ([5, 6, 7], 4, 3, []),
]:
    out = prompt_lookup_draft(tokens, gamma, longest)
    assert out == expected, (
        f"after {tokens} with gamma = {gamma}, longest = {longest}: {expected}, yours {out}"
    )
### BEGIN HIDDEN TESTS
for tokens, gamma, longest, expected in [
    ([], 3, 3, []),
    ([4], 3, 3, []),
    ([4, 4], 3, 3, [4]),
    ([4, 4, 4, 4], 2, 3, [4]),  # the match overlaps the end
    ([4, 4, 4, 4], 5, 1, [4]),
    ([1, 2, 1], 0, 3, []),
    ([1, 2, 1, 2, 1], 7, 3, [2, 1]),
    ([7, 1, 7, 2, 7], 1, 5, [2]),
    ([1, 2, 3, 1, 2], 9, 9, [3, 1, 2]),
]:
    given = list(tokens)
    out = prompt_lookup_draft(given, gamma, longest)
    assert given == tokens, "the text was changed"
    assert out == expected, f"{tokens}, gamma = {gamma}, longest = {longest}: yours {out}"
g = checks.generator(4)
for _ in range(60):  # by all pairs of places, scored by the length of their common past
    size, vocab = (
        int(torch.randint(1, 24, (), generator=g)),
        int(torch.randint(2, 5, (), generator=g)),
    )
    tokens = torch.randint(0, vocab, (size,), generator=g).tolist()
    longest, gamma = (int(n) for n in torch.randint(1, 6, (2,), generator=g))
    best = (0, 0)
    for place in range(1, size):
        common = 0
        while common < min(longest, place) and tokens[place - 1 - common] == tokens[-1 - common]:
            common += 1
        best = max(best, (common, place))
    expected = tokens[best[1] : best[1] + gamma] if best[0] else []
    out = prompt_lookup_draft(tokens, gamma, longest)
    assert out == expected, f"{tokens}, gamma = {gamma}, longest = {longest}: {expected}, not {out}"
### END HIDDEN TESTS

# %% [markdown]
# A draft that repeats is as good as the text is repetitive. Below, `small` continues, greedily,
# two kinds of prompt: a program that it must copy, and one that it has not seen.


# %% tags=["experiment"]
class Lookup:
    """Prompt lookup as a reader: the distribution after a text is one-hot, on the first proposal
    (or on token 0 where there is none)."""

    def __init__(self, vocab: int = 4096):
        self.held, self.vocab = [], vocab

    def __len__(self) -> int:
        return len(self.held)

    def read(self, tokens: list[int]) -> Tensor:
        self.held += tokens
        proposal = prompt_lookup_draft(self.held, 1) or [0]
        return F.one_hot(torch.tensor(proposal, device=profile.device), self.vocab).float()

    def rollback(self, length: int) -> None:
        del self.held[length:]


source = next(text for name, text in held_out.items() if len(tokenizer.encode(text)) > 400)
passage = tokenizer.encode(source)[40:160]
texts = {
    "a copy": [tokenizer.eos, *passage, *passage[:12]],
    "new text": [tokenizer.eos, *passage[:12]],
}
looked = {}
for name, prompt in texts.items():
    for kind in ("lookup", "tiny"):
        draft = Lookup() if kind == "lookup" else Reader(tiny)
        begin = time.process_time()
        out, accepted = speculative_generate(Reader(small), draft, prompt, 72, 4)
        taken = time.process_time() - begin
        begin = time.process_time()
        plain, _ = speculative_generate(Reader(small), Lookup(), prompt, 72, 0)
        looked[name, kind] = out, accepted, (time.process_time() - begin) / taken
        print(
            f"{name:>8}, {kind:>6} drafts: {sum(accepted) / len(accepted) + 1:.2f} tokens a round, "
            f"speed × {looked[name, kind][2]:.2f}, the target's text: {out == plain}"
        )

# %% tags=["experiment", "figure"]
# Figure: who wrote which token
fig, axes = plot.plt.subplots(4, 1, figsize=(12, 4.6))
for ax, ((name, kind), (out, accepted, _)) in zip(axes, looked.items(), strict=True):
    whose = [drafted for k in accepted for drafted in [1] * k + [0]][: len(out)]
    x, shown = 0.0, 0
    for token, drafted in zip(out, whose, strict=True):
        word = tokenizer.decode([token]).replace("\n", "↵").replace(" ", "␣")
        if x + len(word) > 118:
            break
        ax.text(
            x,
            0,
            word,
            family="monospace",
            fontsize=8,
            va="center",
            bbox={
                "boxstyle": "square,pad=0.25",
                "facecolor": "#d5dde5" if drafted else "white",
                "edgecolor": "#555555" if not drafted else "#d5dde5",
                "linewidth": 0.8,
            },
        )
        x += len(word) + 1.1
    ax.set(xlim=(0, 120), ylim=(-1, 1))
    ax.axis("off")
    share = sum(whose) / len(whose)
    title = f"{name}, {kind} drafts: {share:.0%} of the tokens drafted, {len(accepted)} rounds"
    ax.set_title(title, loc="left", fontsize=10)
plot.caption(
    fig,
    "The beginning of four continuations. Filled: drafted and accepted. Framed: written by the "
    "target itself. The two drafts lead to the same text.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** All drafts lead to the same text. The prompt drafts as well as `tiny` here, and
# costs next to nothing, so its speed is higher. The surprise is the new text: look at it. It
# repeats itself after a few lines, so that lookup finds its own earlier output. On text that
# neither copies nor loops, expect nothing from n-grams.

# %% [markdown]
# ## Trees of drafts
#
# A chain dies at its first wrong token. Where the draft hesitates between two, propose both: the
# drafted tokens form a tree, and the target verifies all of its paths in one pass. Each node must
# see the text, its ancestors and itself, and nothing of other branches. With such a mask the pass
# computes for each node just what it would compute for that node's path alone.
#
# Positions follow the same thought. A node's position is not its place in the list but its depth:
# siblings compete for the same place in the text. The number of nodes that a node sees tells it.


# %% exercise="tree_attention_mask" minutes=15 difficulty=2
def tree_attention_mask(parents: list[int]) -> Tensor:
    """Who sees whom among drafted tokens: (nodes, nodes), bool, on the CPU; entry (i, j) is True
    where node i sees node j, which is where j is i itself or one of its ancestors.

    parents[i] is the node that node i follows, or −1 where it follows the text. A parent stands
    before its children in the list. Several nodes may have the parent −1.

    Raises ValueError if a parent is not in −1 … i − 1.

    parents = [−1, 0, 0, 2]: node 3 sees 0, 2 and 3. No nodes: (0, 0).
    """
    ### BEGIN SOLUTION
    mask = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise ValueError(f"the parent of node {i} is {parent}: it must be in -1 … {i - 1}")
        if parent >= 0:
            mask[i] |= mask[parent]
    return mask
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: no search</summary>
#
# A node sees what its parent sees, and itself. Parents come first, so their rows are ready.
# </details>

# %% check="tree_attention_mask" points=2
checks.close(
    tree_attention_mask([-1, 0, 0, 2]),
    torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool(),
    what="the mask of a node with two children, the second of which has one",
    mistakes={
        "a causal mask": torch.ones(4, 4).tril().bool(),
        "seeing the parent but not its ancestors": torch.tensor(
            [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
        ).bool(),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
trees = [[], [-1, -1, -1], [-1, -1, 0, 1, 0, 3, 3, 6, 2]]
trees += [list(range(-1, n)) for n in (0, 1, 2, 3, 5, 8, 11)]  # chains: the last sees all
for size in (6, 17):
    trees.append([int(torch.randint(-1, i, (), generator=g)) if i else -1 for i in range(size)])
for parents in trees:
    # Independent: powers of the adjacency matrix reach all ancestors.
    step = torch.zeros(len(parents), len(parents))
    for i, parent in enumerate(parents):
        if parent >= 0:
            step[i, parent] = 1
    reach, power = torch.eye(len(parents)), torch.eye(len(parents))
    for _ in parents:
        power = power @ step
        reach += power
    given = list(parents)
    checks.close(
        tree_attention_mask(given), reach > 0, what=f"parents = {parents}", dtype=torch.bool
    )
    assert given == parents, "the list of parents was changed"
for parents in ([0], [-1, 1], [-1, 2, 0], [-2], [-1, -2], [-1, 0, 5]):
    checks.raises(ValueError, tree_attention_mask, parents, because=f"parents = {parents}")
### END HIDDEN TESTS

# %% [markdown]
# Greedy verification walks down: from the text, the child whose token is the target's choice; from
# there again; until no child fits. The choice at the end is the bonus token. With sampling, several
# candidates for one place need more care: SpecInfer (2305.09781) tries them in turn and takes the
# residual after each rejection. Medusa's *typical acceptance* takes whatever the target finds
# likely enough: faster, and no longer the target's distribution.


# %% exercise="accept_path" minutes=15 difficulty=2
def accept_path(
    parents: list[int], tokens: list[int], first: int, choices: list[int]
) -> tuple[list[int], int]:
    """Greedy verification of a tree: (the accepted nodes from the top down, the bonus token).

    parents: as in tree_attention_mask. tokens[i]: the token of node i; siblings differ.
    first: the target's choice after the text. choices[i]: its choice after node i.

    A node is accepted if its parent is (or is −1) and its token is the target's choice there. The
    bonus token is the choice at the last accepted node, or `first` if there is none. The nodes need
    not stand in any order but that a parent comes before its children.

    parents = [−1, −1, 1], tokens = [5, 7, 5], first = 7, choices = [1, 5, 2]: ([1, 2], 2).
    """
    ### BEGIN SOLUTION
    path, at, wanted = [], -1, first
    for i, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        if parent == at and token == wanted:
            path.append(i)
            at, wanted = i, choices[i]
    return path, wanted
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one pass</summary>
#
# Children come after their parents. Going through the list once, keep the last accepted node and
# the token that is wanted there.
# </details>

# %% check="accept_path" points=2
out = accept_path([-1, -1, 1], [5, 7, 5], 7, [1, 5, 2])
assert tuple(out) == ([1, 2], 2), f"7 is wanted, then 5, then 2: ([1, 2], 2); yours {out}"
out = accept_path([-1, 0], [5, 6], 4, [6, 6])
assert tuple(out) == ([], 4), f"nothing fits, the target writes its own choice 4; yours {out}"
### BEGIN HIDDEN TESTS
g = checks.generator(6)
deepest = 0
for _ in range(60):
    size = int(torch.randint(0, 14, (), generator=g))
    vocab = 3
    parents, tokens, taken = [], [], {}
    for i in range(size):
        parent = int(torch.randint(-1, i, (), generator=g)) if i else -1
        free = [t for t in range(vocab) if t not in taken.get(parent, set())]
        if not free:
            parent = i - 1
            free = list(range(vocab))
        token = free[int(torch.randint(0, len(free), (), generator=g))]
        taken.setdefault(parent, set()).add(token)
        parents.append(parent)
        tokens.append(token)
    first, *choices = torch.randint(0, vocab, (size + 1,), generator=g).tolist()
    # Independent: every root-to-node path, judged whole; the longest that fits wins.
    best = []
    for i in range(size):
        path, node = [], i
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        wanted = [first, *(choices[n] for n in path[:-1])]
        if [tokens[n] for n in path] == wanted and len(path) > len(best):
            best = path
    bonus = choices[best[-1]] if best else first
    deepest = max(deepest, len(best))
    path, token = checks.parts(accept_path(parents, tokens, first, choices), "path", "token")
    assert (list(path), token) == (best, bonus), (
        f"parents {parents}, tokens {tokens}, first {first}, choices {choices}: "
        f"({best}, {bonus}); yours ({path}, {token})"
    )
chain = accept_path([-1, 0, 1, 2], [4, 5, 6, 7], 4, [5, 6, 0, 8])
assert tuple(chain) == ([0, 1, 2], 0), "a chain is a tree: accepted up to the first difference"
# A node whose token fits by chance under a rejected parent.
stray = accept_path([-1, 0, -1, 2, 0], [1, 2, 3, 9, 9], 3, [9, 9, 9, 4, 9])
assert tuple(stray) == ([2, 3], 4), "a node is accepted only under an accepted parent"
### END HIDDEN TESTS

# %% [markdown]
# Six drafted tokens, as a chain or as a tree: which is accepted further? `tiny` proposes at
# forty places of a held-out program. The helper runs the real model over a tree; beside it the same
# logits, path by path.


# %% tags=["experiment"]
@torch.inference_mode()
def read_tree(model: Llama, cache: Cache, tokens: list[int], mask: Tensor) -> Tensor:
    """Logits (nodes, vocab) after each node of a tree that continues the cached text."""
    device = model.embed_tokens.weight.device
    past, mask = len(cache), mask.to(device)
    cos, sin = angles(past + mask.sum(-1) - 1, model.config)  # a node's depth is its position
    seen = torch.cat([mask.new_ones(len(tokens), past), mask], dim=1)
    x = model.embed_tokens(torch.tensor([tokens], device=device))
    for block in model.layers:
        x = block(x, cos, sin, seen, cache)
    return F.linear(model.norm(x), model.embed_tokens.weight)[0]


def grow(reader: Reader, after: Tensor, parents: list[int]) -> list[int]:
    """Tokens for the nodes: the k-th child of a node is the k-th likeliest token there."""
    start, tokens, children = len(reader), [], Counter()
    for parent in parents:
        path, node = [], parent
        while node >= 0:
            path.insert(0, tokens[node])
            node = parents[node]
        probs = after
        if path:
            probs = reader.read(path)[-1]
            reader.rollback(start)
        tokens.append(int(probs.topk(children[parent] + 1).indices[-1]))
        children[parent] += 1
    return tokens


shapes = {
    "chain of 6": [-1, 0, 1, 2, 3, 4],
    "2 chains of 3": [-1, -1, 0, 1, 2, 3],
    "3 on top, a chain of 3 below": [-1, -1, -1, 0, 3, 4],
    "6 on top": [-1] * 6,
}
text = [tokenizer.eos, *tokenizer.encode(source)[:200]]
reached, gap = {name: [] for name in shapes}, 0.0
reader, cache = Reader(tiny, 1.0), Cache()
for at in range(40, 200, 4):
    after = reader.read(text[len(reader) : at])[-1]
    with torch.inference_mode():
        ids = torch.tensor([text[len(cache) : at]], device=profile.device)
        first = int(small(ids, cache)[0, -1].argmax())
    for name, parents in shapes.items():
        mask = tree_attention_mask(parents)
        tokens = grow(reader, after, parents)
        logits = read_tree(small, cache, tokens, mask)
        cache.truncate(at)
        path, _ = accept_path(parents, tokens, first, logits.argmax(-1).tolist())
        reached[name].append(len(path))
        if at == 80:  # the last node's path, read alone
            alone = [tokens[n] for n in mask[-1].nonzero()[:, 0].tolist()]
            with torch.inference_mode():
                whole = small(torch.tensor([text[:at] + alone], device=profile.device))
            gap = max(gap, float((whole[0, -1] - logits[-1]).abs().max()))
print(f"largest difference of a logit, tree against path: {gap:.1e}")
for name, depths in reached.items():
    print(f"{name:>28}: {sum(depths) / len(depths) + 1:.2f} tokens a round")

# %% tags=["experiment", "figure"]
# Figure: three trees and what their nodes see
fig, axes = plot.plt.subplots(1, 3, figsize=(11.5, 4.2))
for ax, (name, parents) in zip(axes, list(shapes.items())[:3], strict=True):
    plot.heatmap(
        tree_attention_mask(parents).float(),
        xlabel="node that is seen",
        ylabel="node that sees",
        ax=ax,
        title=name,
        colorbar=False,
    )
plot.caption(
    fig,
    "Dark: seen. All nodes see the whole text besides. The chain's mask is the causal one; "
    "branches make gaps in it.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** The tree's logits are those of its paths, up to rounding. At these forty places
# all four shapes write between one and three tokens a round, and branches at the top help about as
# much as depth does: where `tiny` is wrong at the first token, its second guess is worth more than
# a fifth token that is hardly ever reached. Forty places do not settle an order. Systems choose the
# shape from measured acceptances, or grow it from the draft's own probabilities.

# %% [markdown]
# ## Rows that accept different numbers
#
# In a batch one row keeps all of its draft and the next one nothing. A cache is a rectangle, so
# cutting all rows at one length either forgets tokens that a row has kept or leaves rejected ones
# in it. Both are silent: in 2026 a published library (mlx-vlm, pull request 1155) advanced all rows
# by the whole draft; acceptance fell to a third, and texts ran into loops.
#
# The layout of `models.generate` helps: rows end at the same column, padding stands on the left,
# under a mask. Rolling back by a different number in each row is then a *shift to the right*, row
# by row, with new padding at the left. Keys may be moved freely: the rotation by their position is
# already in them, and only the mask says which column is what. (The next tokens need their
# positions given, for the length of the cache no longer tells them.)


# %% exercise="roll_back_rows" minutes=25 difficulty=2 path="more"
def roll_back_rows(
    layers: list[tuple[Tensor, Tensor]], mask: Tensor, drop: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """A cache of which each row has forgotten its own number of last tokens.

    layers: keys and values of each layer, each (batch, kv_heads, length, head_dim), all finite;
        batch ≥ 1.
    mask: (batch, length), bool: padding (False) on the left, then the row's tokens (True).
    drop: (batch,), int64: how many tokens each row forgets, from 0 to all of them.

    Returns (layers, mask) of the same form: every row's remaining tokens in their order, at the
    right end; padding on the left; the length is that of the row with most tokens left, no more (it
    may be 0). Under padding stands anything that is finite. Dtypes stay; nothing is changed in
    place, and no memory is shared with the inputs.
    """
    ### BEGIN SOLUTION
    left = mask.sum(1) - drop
    length, width = mask.shape[1], int(left.max())
    columns = torch.arange(length - width, length, device=mask.device) - drop[:, None]
    new_mask = torch.arange(width, device=mask.device) >= width - left[:, None]
    columns = columns.clamp(min=0)[:, None, :, None]

    def shifted(x: Tensor) -> Tensor:
        return x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3]))

    return [(shifted(k), shifted(v)) for k, v in layers], new_mask
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: from which column</summary>
#
# In a row that drops d, what stands in new column j of `width` comes from old column
# length − width + j − d. Where that is negative there is padding: any valid column will do.
# `gather` along the columns needs an index of the shape of its result; `expand` makes one.
# </details>

# %% tags=["support"]
# Support: whether a result lies in the memory of the inputs
from collections.abc import Callable


@checks.measured
def borrowed(roll_back: Callable, layers: list, mask: Tensor, drop: Tensor) -> bool:
    new, new_mask = roll_back(layers, mask, drop)
    given = [mask, drop, *(x for pair in layers for x in pair)]
    taken = {x.untyped_storage().data_ptr() for x in given}
    found = [new_mask, *(x for pair in new for x in pair)]
    return any(x.numel() and x.untyped_storage().data_ptr() in taken for x in found)


# %% check="roll_back_rows" points=3
# Two rows of four columns; the key of a token is its number.
k = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 5.0, 6.0, 7.0]])[:, None, :, None]
mask = torch.tensor([[True] * 4, [False, True, True, True]])
layers, out = checks.parts(
    roll_back_rows([(k, 10 * k)], mask, torch.tensor([1, 0])), "layers", "mask"
)
assert out.tolist() == [[True] * 3, [True] * 3], (
    f"three tokens are left in each row: a mask of 2 × 3, all True; yours is {out.tolist()}"
)
checks.close(
    layers[0][0][:, 0, :, 0],
    torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]),
    what="the keys when row 0 forgets one token and row 1 none",
    mistakes={
        "one offset for all rows": torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 6.0]]),
        "forgetting the first tokens": torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(7)
for batch, heads, length, dim, depth, drops, spare in [  # spare: columns of padding in every row
    (3, 2, 7, 4, 2, [0, 3, 1], 0),
    (4, 1, 9, 3, 1, [4, 4, 0, 2], 1),
    (1, 3, 5, 2, 3, [2], 0),
    (2, 2, 6, 1, 1, [0, 0], 0),
    (3, 1, 8, 2, 2, [0, 0, 0], 2),
    (2, 1, 6, 2, 1, [2, 2], 2),
    (3, 2, 4, 2, 1, [1, 4, 0], 0),
    (2, 1, 3, 2, 1, [3, 1], 0),
    (2, 1, 3, 2, 1, [3, 3], 0),
]:
    dtype = (torch.float32, torch.float64, torch.bfloat16)[batch % 3]
    pads = [0, *torch.randint(0, 3, (batch - 1,), generator=g).tolist()]
    pads = [min(spare + p, length - d) for p, d in zip(pads, drops, strict=True)]
    mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    layers = []
    for _ in range(depth):  # values whose heads and columns are exchanged in memory
        pair = torch.randn(2, batch, length, heads, dim, generator=g).to(dtype).transpose(2, 3)
        layers.append((pair[0], pair[1]))
    flat = [x for pair in layers for x in pair]
    drop = torch.tensor(drops)
    with checks.unchanged(*flat, mask=mask, drop=drop):
        new, out = checks.parts(roll_back_rows(layers, mask, drop), "layers", "mask")
    kept = [length - p - d for p, d in zip(pads, drops, strict=True)]
    width = max(kept)
    checks.close(
        out,
        torch.arange(width) >= torch.tensor([[width - n] for n in kept]),
        what=f"the mask of rows with {kept} tokens left",
        dtype=torch.bool,
    )
    assert len(new) == depth, f"{depth} layers, not {len(new)}"
    for (k, v), pair in zip(layers, new, strict=True):
        for old, x in zip((k, v), pair, strict=True):
            assert (tuple(x.shape), x.dtype) == ((batch, heads, width, dim), dtype), (
                f"keys and values are {(batch, heads, width, dim)} in {dtype}; yours are "
                f"{tuple(x.shape)} in {x.dtype}"
            )
            assert bool(x.isfinite().all()), "what stands under padding must be finite"
            for row, (p, n) in enumerate(zip(pads, kept, strict=True)):
                checks.close(
                    x[row, :, width - n :],
                    old[row, :, p : p + n],
                    what=f"row {row}, which keeps {n} tokens after {p} of padding",
                    rtol=0,
                    atol=0,
                )
    assert not borrowed(roll_back_rows, layers, mask, drop), (
        f"the result shares memory with the inputs, when the rows forget {drops}: copy it"
    )
# The law: a batch that is rolled back goes on as each row would alone.
torch.manual_seed(0)
config = Config(vocab_size=11, hidden_size=16, layers=2, heads=4, kv_heads=2, mlp_size=24)
model = Llama(config).double().requires_grad_(False)
rows, drops = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [3, 1, 4, 1, 5]], [1, 0, 3]
width = max(map(len, rows))
tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
start = torch.tensor([width - len(row) for row in rows])
cache = Cache()
model(tokens, cache, mask, (torch.arange(width) - start[:, None]).clamp(min=0))
cache.layers, mask = roll_back_rows(cache.layers, mask, torch.tensor(drops))
more = torch.tensor([[2, 10], [5, 5], [6, 0]])
positions = mask.sum(1, keepdim=True) + torch.arange(2)
logits = model(more, cache, torch.cat([mask, mask.new_ones(3, 2)], dim=1), positions)
for row, (tokens, drop) in enumerate(zip(rows, drops, strict=True)):
    alone = model(torch.tensor([tokens[: len(tokens) - drop] + more[row].tolist()]))[0, -2:]
    checks.close(logits[row], alone, what=f"row {row} of the batch, against the row alone")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: a batch of caches before and after
rows, drafted, drops = [9, 6, 8, 4], 4, torch.tensor([0, 3, 1, 4])
width = max(rows) + drafted
order = torch.arange(width)
start = torch.tensor([width - n - drafted for n in rows])
mask = order >= start[:, None]
numbers = (order - start[:, None]).float()[:, None, :, None]
((after, _),), after_mask = roll_back_rows([(numbers, numbers)], mask, drops)
fig, axes = plot.plt.subplots(1, 2, figsize=(11.5, 2.9))
for ax, held, shown, title in [
    (axes[0], numbers, mask, "after the pass of the target"),
    (axes[1], after, after_mask, "after roll_back_rows"),
]:
    for row in range(len(rows)):
        for column in range(shown.shape[1]):
            number = int(held[row, 0, column, 0])
            stale = number >= rows[row] + drafted - int(drops[row])
            face = "#eeeeee" if not shown[row, column] else plot.COLORS[1] if stale else "#9db4cc"
            ax.add_patch(plot.plt.Rectangle((column, row), 0.94, 0.9, facecolor=face))
            if shown[row, column]:
                label = f"{number}" + ("×" if stale else "")
                ax.text(column + 0.47, row + 0.47, label, ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, width), ylim=(len(rows), -0.1), xlabel="column of the cache", title=title)
    ax.set_yticks([row + 0.45 for row in range(len(rows))], [f"row {row}" for row in range(4)])
    ax.grid(visible=False)
plot.caption(
    fig,
    "Numbers: a token's place in its row. ×: drafted and rejected. Pale: padding. Afterward the "
    "rows end together again; no single cut of the left picture would do that.",
)
plot.plt.show()

# %% [markdown]
# ## A model that drafts for itself
#
# In lesson 16 a module for multi-token prediction was trained beside the trunk: from the trunk's
# last state at token $i$ and the embedding of token $i+1$ it predicts token $i+2$. Training may
# throw it away afterward. Here it is kept, as a drafter that has what no small model has: the
# trunk's own state. This is **self-speculation**.
#
# `small` has such a block, `models.load_mtp()`. Its `forward(hidden, embedded, cache)` takes pairs:
# the trunk's state at $i$, `model.hidden(tokens, cache)`, and `model.embed_tokens` of the token at
# $i+1$. The block's cache holds one entry for each pair, so it ends one token before the text.
#
# To draft a second token, feed the block its own output in place of the trunk's state, with the
# embedding of the first. Those entries are guesses on guesses and are dropped after the round: then
# the true states are known.


# %% exercise="mtp_self_speculation" minutes=40 difficulty=3 path="more"
@torch.inference_mode()
def mtp_self_speculation(
    model: Llama, mtp: MTP, prompt: list[int], max_new_tokens: int, gamma: int = 1
) -> tuple[list[int], list[int]]:
    """Greedy decoding of `model`, which drafts with its own block `mtp`.

    prompt: at least one token. max_new_tokens ≥ 0: as many are written; for 0 nothing needs to be
    read. gamma ≥ 0.

    The model reads the prompt, which gives the first token. Then come rounds: each drafts
    min(gamma, tokens still to write − 1) tokens, the model reads the text's last token and the
    draft in one call of `model.hidden`, and what agrees with its likeliest tokens is kept, followed
    by one token of its own. Logits are F.linear(hidden, model.embed_tokens.weight), for the block's
    states too.

    The block has a cache of its own. It reads every pair (state at i, embedding of token i + 1) of
    the text once (the last ones need not be read), at the end of a round or at the latest before it
    drafts; its last output gives the first drafted token.
    Each further one comes from a pair of the block's last output and the embedding of the drafted
    token before; those entries leave its cache at the end of the round.

    Returns (tokens, accepted): the model's own greedy text, and for each round (the first token is
    no round) how many drafted tokens were accepted.
    """
    ### BEGIN SOLUTION
    head, trunk, ahead = model.embed_tokens.weight, Cache(), Cache()

    def tensor(tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=head.device)

    def best(hidden: Tensor) -> list[int]:
        return F.linear(hidden, head)[0].argmax(-1).tolist()

    hidden = model.hidden(tensor(prompt), trunk)
    written, accepted = best(hidden)[-1:][:max_new_tokens], []
    following = [*prompt[1:], *written]  # the token after each state in `hidden`
    while len(written) < max_new_tokens:
        count = min(gamma, max_new_tokens - len(written) - 1)
        drafted = []
        if count:
            state = mtp(hidden, model.embed_tokens(tensor(following)), ahead)
            known = len(ahead)
            drafted += best(state)[-1:]
            while len(drafted) < count:
                state = mtp(state[:, -1:], model.embed_tokens(tensor(drafted[-1:])), ahead)
                drafted += best(state)
            ahead.truncate(known)
        hidden = model.hidden(tensor([written[-1], *drafted]), trunk)
        choices = best(hidden)
        kept = 0
        while kept < count and choices[kept] == drafted[kept]:
            kept += 1
        trunk.truncate(len(trunk) - count + kept)
        hidden, following = hidden[:, : kept + 1], choices[: kept + 1]
        written += following
        accepted.append(kept)
    return written, accepted
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what the block still has to read</summary>
#
# After a round that accepted k tokens the trunk has k + 1 new true states, and the text k + 1 new
# tokens: the token after each of those states. That is what the block reads at the beginning of the
# next round, in one call.
# </details>
#
# <details><summary>Hint: two rollbacks</summary>
#
# The trunk's cache loses the rejected tokens. The block's loses all entries that it made from its
# own output, accepted or not, for their states were not the trunk's.
# </details>

# %% tags=["support"]
# Support: a small trunk with a block, both random, and what they read
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

WIDTHS = {"vocab_size": 6, "hidden_size": 16, "heads": 4, "kv_heads": 2, "mlp_size": 24}


def toy_trunk(seed: int) -> tuple[Llama, MTP]:
    """In float64 and with large weights, so that no two logits are nearly alike. The block has the
    trunk's first layer, and the second does less, so that often several drafts are accepted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk, block = Llama(Config(layers=2, **WIDTHS)), MTP(Config(layers=2, **WIDTHS))
        for parameter in (*trunk.parameters(), *block.parameters()):
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.35)
    trunk, block = trunk.double().requires_grad_(False), block.double().requires_grad_(False)
    block.layers[0].load_state_dict(trunk.layers[0].state_dict())
    for parameter in trunk.layers[1].parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.6)
    of_state, of_token = block.projection.weight.chunk(2, dim=1)
    of_state.mul_(0.6)
    of_token.copy_(0.35 * torch.eye(len(of_token)))
    return trunk, block


@checks.measured
@contextmanager
def positions_read() -> Iterator[list[int]]:
    """How many positions each layer's attention computes inside the block, call by call."""
    read, attention = [], F.scaled_dot_product_attention

    def noting(q: Tensor, *args, **named) -> Tensor:
        read.append(q.shape[2])
        return attention(q, *args, **named)

    with mock.patch.object(F, "scaled_dot_product_attention", noting):
        yield read


@torch.no_grad()
def replay(trunk: Llama, block: MTP, prompt: list[int], text: list[int], gamma: int) -> list[int]:
    """The accepted numbers, from the finished greedy text and without a cache."""
    whole, rounds, at, weight = prompt + text, [], len(prompt) + 1, trunk.embed_tokens.weight
    while at < len(whole):
        count = min(gamma, len(whole) - at - 1)
        states = trunk.hidden(torch.tensor([whole[: at - 1]]))
        tokens = torch.tensor([whole[1:at]])
        guess = []
        for _ in range(count):
            out = block(states, trunk.embed_tokens(tokens))[:, -1:]
            guess.append(int((out[0, 0] @ weight.T).argmax()))
            states = torch.cat([states, out], dim=1)
            tokens = torch.cat([tokens, torch.tensor([[guess[-1]]])], dim=1)
        kept = 0
        while kept < count and guess[kept] == whole[at + kept]:
            kept += 1
        rounds.append(kept)
        at += kept + 1
    return rounds


# %% check="mtp_self_speculation" points=2
trunk, block = toy_trunk(1)
expected = models.generate(trunk, [[2, 5, 1]], 12, stop=None)[0]
out, accepted = mtp_self_speculation(trunk, block, [2, 5, 1], 12, 2)
assert out == expected, f"the model alone writes {expected}; with drafts yours writes {out}"
### BEGIN HIDDEN TESTS
for seed, prompt, count, gamma in [
    (2, [0], 20, 1),
    (3, [1, 1, 4], 25, 3),
    (4, [5, 3], 9, 5),
    (5, [2, 2], 0, 2),
    (6, [2, 2], 1, 2),
    (7, [4, 0, 3], 7, 0),
]:
    trunk, block = toy_trunk(seed)
    given = list(prompt)
    with checks.kept(trunk, block):
        out, accepted = mtp_self_speculation(trunk, block, given, count, gamma)
    assert given == prompt, "the prompt was changed"
    expected = models.generate(trunk, [prompt], count, stop=None)[0]
    assert list(out) == expected, f"gamma = {gamma}: {out}, the model alone {expected}"
    assert sum(accepted) + len(accepted) + (count > 0) == count, (
        f"the rounds {accepted} do not add up to {count} tokens"
    )
### END HIDDEN TESTS

# %% check="mtp_self_speculation" points=2
trunk, block = toy_trunk(8)
out, accepted = mtp_self_speculation(trunk, block, [3, 4], 16, 1)
expected = replay(trunk, block, [3, 4], models.generate(trunk, [[3, 4]], 16, stop=None)[0], 1)
assert accepted == expected, (
    f"recomputed without caches, the rounds accept {expected}; yours {accepted}. Does the block "
    "see the trunk's states, each with the embedding of the token after it?"
)
### BEGIN HIDDEN TESTS
for seed, prompt, count, gamma in [
    (9, [1, 2, 3, 4], 24, 1),
    (10, [0], 30, 2),
    (11, [5, 1], 30, 3),
    (12, [2, 4, 1], 17, 4),
    (13, [3, 3], 30, 2),
    (14, [1], 26, 3),
]:
    trunk, block = toy_trunk(seed)
    with positions_read() as read:
        _, accepted = mtp_self_speculation(trunk, block, prompt, count, gamma)
    text = models.generate(trunk, [prompt], count, stop=None)[0]
    expected = replay(trunk, block, prompt, text, gamma)
    assert list(accepted) == expected, f"gamma = {gamma}: rounds accept {expected}, not {accepted}"
    # Two layers of the trunk for the prompt and each round; the block's one for the pairs, then or
    # at the end of the round, and for each drafted token but the first.
    drafts, further, left = 0, 0, count - 1
    for kept in expected:
        size = min(gamma, left - 1)
        drafts, further, left = drafts + size, further + max(0, size - 1), left - kept - 1
    passes = 3 * (1 + len(expected)) + further
    assert len(read) <= passes, (
        f"at most {passes} layers are run in {len(expected)} rounds; yours runs {len(read)}"
    )
    positions = 2 * (len(prompt) + len(expected) + drafts) + len(prompt) + count - 1 + further
    assert sum(read) <= positions, (
        f"all layers together compute at most {positions} positions in {len(expected)} rounds; "
        f"yours compute {sum(read)}: is each token read once?"
    )
### END HIDDEN TESTS

# %% [markdown]
# **Question.** The block was trained to look one token further than the trunk. Is its second token,
# drafted from its own output, accepted less often than its first, given that the first was? And
# the third? Compare with `tiny`, which was trained for every position alike. Greedy texts loop, so
# the rounds are taken from places in held-out programs.

# %% tags=["experiment"]
your_prediction = "the block's second token is accepted more / less often than its first, because …"

mtp = models.load_mtp()
programs = [[tokenizer.eos, *tokenizer.encode(text)] for text in held_out.values()]
programs = [ids for ids in programs if len(ids) > 300][:4]
depths, firsts = {}, {"MTP block": [], "tiny": []}
for ids in programs:
    for at in range(60, 260, 10):  # the first round after 48 tokens of a program
        prompt = ids[at - 48 : at]
        firsts["MTP block"].append(mtp_self_speculation(small, mtp, prompt, 5, 3)[1][0])
        firsts["tiny"].append(speculative_generate(Reader(small), Reader(tiny), prompt, 5, 3)[1][0])
for name, kept in firsts.items():
    # Of the rounds in which all drafted tokens before were accepted.
    depths[name] = [sum(k > d for k in kept) / max(1, sum(k >= d for k in kept)) for d in range(3)]
    print(
        f"{name:>9}, gamma = 3, {len(kept)} places: {sum(kept) / len(kept) + 1:.2f} tokens a "
        f"round; accepted at depth 1, 2, 3: {', '.join(f'{c:.2f}' for c in depths[name])}"
    )
print()
whole = {}
for gamma in (0, 1, 3):
    begin = time.process_time()
    whole[gamma] = [mtp_self_speculation(small, mtp, prompt, NEW, gamma)[0] for prompt in openings]
    speed = NEW * len(openings) / (time.process_time() - begin)
    same = whole[gamma] == whole[0]
    print(f"whole texts, gamma = {gamma}: {speed:.0f} tokens/s, the model's own text: {same}")
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: acceptance by depth
fig, ax = plot.plt.subplots(figsize=(6.4, 3.6))
for offset, (name, color, hatch) in zip(
    (-0.2, 0.2), (("MTP block", plot.COLORS[0], ""), ("tiny", "#bbbbbb", "//")), strict=True
):
    bars = depths[name]
    where = [d + 1 + offset for d in range(3)]
    ax.bar(where, bars, 0.38, color=color, hatch=hatch, edgecolor="white", label=name)
    for x, value in zip(where, bars, strict=True):
        ax.text(x, value + 0.015, f"{value:.2f}", ha="center", fontsize=8)
ax.set(xlabel="drafted token of the round", ylabel="accepted, if those before it were")
ax.set(xticks=[1, 2, 3], ylim=(0, 1), title="Greedy drafts for small, γ = 3")
ax.legend(fontsize=9)
plot.caption(fig, "The first round at 80 places of four held-out programs.")
plot.plt.show()

# %% [markdown]
# **What came out**, over five groups of programs. Block and `tiny` write about equally many tokens
# a round, with the one or the other ahead; the card of the models says the same for the first
# token. The decline that the block's training leads one to expect does not show: in four of five
# groups its second token was accepted more often than its first. Two effects oppose each other.
# The block gets a worse state than it was trained with; but only places count where its first
# token was right, and those are easy. With 80 places a group, the third depth is mostly noise.
#
# The block saves the second model and its cache. In time it saves little here, for it is one layer
# of seven, with the same large head of 4,096 tokens.
#
# **What came after.** What you built is EAGLE's first step with DeepSeek's inputs. EAGLE
# (2401.15077) drafts with a small head on the target's last features, and is trained to predict the
# next *feature*. EAGLE-3 (2503.01840) drops that: it feeds in features of
# several layers, low, middle and high, predicts tokens without a loss on features, and trains the
# head on its own outputs over several steps, so that it meets in training what it meets at depth 2.

# %% [markdown]
# ## Key questions


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | int]:
    """Short answers; numbers to 1 percent, whole numbers exactly.

    "alpha":    p = [0.6, 0.3, 0.1], q = [0.2, 0.3, 0.5]. Which share of drafted tokens is accepted?
    "residual": the same p and q. What is the probability that the token drawn after a rejection is
                token 0?
    "argmax":   with the same p and q somebody drafts the likeliest token of q but tests it with
                min(1, p/q), and draws from the residual of p and q. With which probability does
                token 0 come out? (the target's is 0.6)
    "limit":    alpha = 0.8. No draft, however long, writes more tokens a round than this (mean).
    "batch":    a server decodes large batches and is limited by arithmetic, so that a verified
                token costs as much as a decoded one: v = 1, c = 0.05, alpha = 0.8. What is the best
                gamma? (a whole number)
    """
    ### BEGIN SOLUTION
    return {
        "alpha": 0.2 + 0.3 + 0.1,
        "residual": 1.0,
        "argmax": 0.8,
        "limit": 1 / (1 - 0.8),
        "batch": 0,
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["alpha"]
checks.kind(answer, float, what="alpha")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.6,
    what="alpha",
    hint="The sum of min(p, q)",
    mistakes={"the total variation": 0.4, "the mean ratio": (1 + 1 + 0.2) / 3},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["residual"]
checks.kind(answer, float, what="residual")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    1.0,
    what="residual",
    hint="Where does p have more than q?",
    mistakes={"drawing from p": 0.6, "no normalization": 0.4},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["argmax"]
checks.kind(answer, float, what="argmax")
### BEGIN HIDDEN TESTS
# Token 2 is drafted always, kept with probability 0.1 / 0.5, and else token 0 is drawn.
checks.number(
    answer,
    0.8,
    what="argmax",
    hint="Token 2 is drafted each time. How often is it kept, and what comes else?",
    mistakes={"the target's": 0.6, "the share that is kept": 0.2},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["limit"]
checks.kind(answer, float, what="limit")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    5.0,
    what="limit",
    hint="Let gamma grow in the sum of powers",
    mistakes={"without the target's own token": 4.0, "1/alpha": 1.25},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["batch"]
checks.kind(answer, int, what="batch")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0,
    to=0,
    what="batch",
    hint="Compare what one more drafted token brings, at most alpha, with what it costs, c + v",
    mistakes={"leaving out v": 8},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** A colleague uses temperature 0.7 for the target and greedy drafts, with the
# draft's softmax at temperature 1 as q. The output "looks fine". What is wrong, and what are two
# ways to repair it?

# %% [markdown] answer="greedy-drafts"
# The theorem needs x to be drawn from the q of the test. A greedy draft is drawn from a one-hot,
# so the test with the softmax keeps and resamples in the wrong proportions: tokens that the draft
# ranks second are never drafted, and the residual does not make up for it. Either draw the draft
# from its q (at any temperature), or keep it greedy and set q to the one-hot: accept with
# probability p(x), and after a rejection draw from p without x. Both are exact. The target's own
# temperature goes into p in either case. Looking does not help; a chi-square over many draws from
# one prompt does.

# %% [markdown]
# **Open question 2.** Acceptance is measured at 0.8 with the draft on the same device, and yet a
# busy server gets slower when speculation is switched on. Why, and what should it do?

# %% [markdown] answer="busy-server"
# Speculation spends arithmetic to save passes over the weights. With a large batch the pass is
# limited by arithmetic already, so that each verified token costs as much as a decoded one, and the
# rejected ones are pure loss: v tends to 1, and one drafted token brings at most α < v + c. Also,
# the draft's weights and cache take memory that would have held more requests. Servers lower γ with
# the load, or switch drafting off, and choose per request where acceptances differ.

# %% [markdown]
# **Open question 3.** Two acceptance rules: exact, and "accept if the target gives the token at
# least 0.1". The second is faster. How would you show what it costs?

# %% [markdown] answer="typical-acceptance"
# It never rejects a token that is likely enough, so its texts lean toward what the draft prefers
# among likely tokens: another distribution, somewhere between the two models. Perplexity of the
# texts under the target can even *fall*, as it does for greedy decoding, so it proves nothing. Show
# it by distribution: the frequencies of first tokens after fixed prompts against p (a chi-square),
# the entropy of samples, and the scores of a task that needs the target's ability, pass@k with
# larger k most of all, since it lives on diversity.

# %% [markdown]
# ## References, and what to read in them
#
# - **Leviathan et al. 2022**, *Fast Inference from Transformers via Speculative Decoding*,
#   [arXiv:2211.17192](https://arxiv.org/abs/2211.17192). Section 2.3 and appendix A.1 for the test
#   and its proof, 3.1 to 3.3 for α, the expected tokens and the walltime, with a free verification.
# - **Chen et al. 2023**, *Accelerating Large Language Model Decoding with Speculative Sampling*,
#   [arXiv:2302.01318](https://arxiv.org/abs/2302.01318). The same rule, found independently, with
#   Chinchilla 70B as the target.
# - **Cai et al. 2024**, *Medusa*, [arXiv:2401.10774](https://arxiv.org/abs/2401.10774). The section
#   on tree attention, and the one on typical acceptance, which gives up exactness.
# - **Miao et al. 2023**, *SpecInfer*, [arXiv:2305.09781](https://arxiv.org/abs/2305.09781). Exact
#   sampling from a tree: several candidates for one place, rejected in turn.
# - **Li et al. 2024**, *EAGLE*, [arXiv:2401.15077](https://arxiv.org/abs/2401.15077). Why a draft
#   from features needs the sampled token as well.
# - **Li et al. 2025**, *EAGLE-3*, [arXiv:2503.01840](https://arxiv.org/abs/2503.01840). Section 3:
#   several layers' features, no feature loss, training on its own drafts.
# - **Gloeckle et al. 2024**, *Better & Faster Large Language Models via Multi-token Prediction*,
#   [arXiv:2404.19737](https://arxiv.org/abs/2404.19737). The section on self-speculation.
# - **DeepSeek-AI 2024**, *DeepSeek-V3 Technical Report*,
#   [arXiv:2412.19437](https://arxiv.org/abs/2412.19437). Section 2.2 for the block, 5.4.3 for the
#   acceptance of its second token.
#
# In production: Hugging Face transformers, `generation/candidate_generator.py` (a model, n-grams)
# and `_speculative_sampling` in `generation/utils.py`, which accepts where r ≤ p/q, so that a token
# of p = 0 passes if r is exactly 0. Its n-gram search takes the *first* match of the longest
# n-gram, yours the latest. vLLM, `vllm/v1/spec_decode` (n-grams, EAGLE, MTP) and
# `vllm/v1/sample/rejection_sampler.py`.
