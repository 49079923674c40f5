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
#       Every usual way of making one model out of several without training: averages and soups,
#       slerp, task vectors, TIES, DARE, Fisher weights, and the relabeling of hidden units that
#       says why any of it works.
#     gpu: "Nothing more: every cell runs on a CPU."
# ---

# %% [markdown]
# ## The problem
#
# A base model has been finetuned twice, by two teams, on two skills. Each result has one skill and
# not the other. Training once more on both data sets would do, but one of them is private, and
# nobody kept the optimizer. What is left is two files of numbers with the same names and shapes.
#
# Add them up, name by name, and divide by two. For two networks that were trained from two random
# starts the result is ruined. For two that were finetuned from the *same* start it often works, and
# many models on public leaderboards were made that way, in minutes, on a laptop without a GPU.
#
# ## Core ideas
#
# **Merging** computes the weights of one model from the weights of several. No data is needed, or
# only a little to choose a coefficient; the result costs as much to run as one member, unlike an
# ensemble, which runs them all.
#
# | family | what it combines | in this lesson |
# |---|---|---|
# | **averages** | weights | `average`, `greedy_soup`, `slerp`, `fisher_merge` |
# | **task arithmetic** | differences from a common base | `task_vector`, `ties_merge`, `dare` |
# | **alignment** | weights, after hidden units were relabeled | `match_units`, `permute_hidden` |
#
# **Everything rests on one condition**: on the way from one model to the other the loss must not
# rise much. Models that can be joined so by a straight line are **linearly mode connected**. You
# will measure the hill between them, its **loss barrier**, before you trust a merge.

# %% [markdown]
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $\theta$ | `state` | all weights of a model: a dictionary, name → tensor (`state_dict()`) |
# | $\theta_0$ | `base` | the weights that finetuning began with |
# | $\tau = \theta - \theta_0$ | `vector` | a task vector: a dictionary too |
# | $t$, $\lambda$ | `t`, `scale` | place on a path, factor of a task vector |
# | $n$ | | number of weights, all tensors taken together |
#
# A state is treated as one long vector that happens to be stored in pieces. Functions return new
# states and change none that they are given.

# %%
import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import permutations

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

State = dict[str, Tensor]

# %% [markdown]
# ## Averaging weights {#averaging-weights}
#
# Why should a mean of weights be any good? Take several results $\theta_i = \theta^* + \epsilon_i$
# of noisy training around one minimum $\theta^*$, where the loss is nearly quadratic with Hessian
# $H$ of shape $(n, n)$. The $\epsilon_i$ are independent, with mean 0 and covariance $\Sigma$ of
# shape $(n, n)$. One result costs on average
#
# $$\mathbb E\,L(\theta_i) - L(\theta^*) = \tfrac12\,\mathbb E\,\epsilon_i^\top H \epsilon_i
# = \tfrac12\,\mathbb E\,\mathrm{tr}(H\epsilon_i\epsilon_i^\top) = \tfrac12\,\mathrm{tr}(H\Sigma).$$
#
# The middle step is the one that is skipped: a number is its own trace, and a trace lets its
# factors go round. For the mean of $K$ results the covariance is $\Sigma/K$: the mixed terms
# $\mathbb E\,\epsilon_i\epsilon_j^\top$ vanish. So the excess loss falls by the factor $K$, as if
# the learning rate had been lowered at the end of training. That is why averages of late
# checkpoints stand in for a decay ([](#late-checkpoints)).
#
# In code there are four traps. Names may differ. A shape `(1,)` broadcasts silently against `(4,)`.
# Half precision should be summed in float32 and rounded once. And a counter such as
# `num_batches_tracked` has no mean.


# %% exercise="average" minutes=18 difficulty=2
def average(states: Sequence[State], weights: Sequence[float] | None = None) -> State:
    """The weighted mean of states, name by name: Σ wᵢ·stateᵢ / Σ wᵢ.

    states: one or more dictionaries, name → tensor. A name has the same shape in every state, and
        the same dtype (nothing to check), which is the result's too.
    weights: one number for each state, which need not sum to 1 and may be negative; None = all
        alike.

    Floating-point tensors: computed in float32 at least (float64 for float64) and rounded once.
    With weights ≥ 0, values near the largest of their format must not overflow on the way. The
    result requires no gradient, whatever the states do.
    All others (integer, bool): must be equal in all states; the result holds their value.
    Two names that are tied, that is, hold one tensor (the same `data_ptr()`, shape and strides) in
    every state, hold one tensor in the result too, not two equal ones.

    Names are in the order of the first state; the others may have another order. ValueError: no
    states; the names differ; the shapes of a name differ; integers differ; as many weights as
    states are not given; the weights sum to 0 exactly. States are not changed.

    Worked number: [2, 4] with weight 3 and [6, 0] with weight 1 give [3, 3].
    """
    ### BEGIN SOLUTION
    if not states:
        raise ValueError("there is no state to average")
    weights = [1.0] * len(states) if weights is None else [float(w) for w in weights]
    if len(weights) != len(states) or math.fsum(weights) == 0:
        raise ValueError("as many weights as states are needed, and their sum must not be 0")
    shares = [w / math.fsum(weights) for w in weights]
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError("the states have different names")
    merged, seen = {}, {}
    for name, first in states[0].items():
        tensors = [state[name].detach() for state in states]
        if any(tensor.shape != first.shape for tensor in tensors):
            raise ValueError(f"{name} has different shapes")
        if not first.is_floating_point():
            if any(not torch.equal(tensor, first) for tensor in tensors):
                raise ValueError(f"{name} holds integers that differ: they have no mean")
            merged[name] = first.clone()
            continue
        where = (first.shape, *((tensor.data_ptr(), tensor.stride()) for tensor in tensors))
        if where not in seen:
            wide = torch.promote_types(first.dtype, torch.float32)
            terms = (share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))
            seen[where] = sum(terms).to(first.dtype)
        merged[name] = seen[where]
    return merged
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: overflow</summary>
#
# Two numbers of 3e38 have a mean in float32, but their sum is infinite. In which order do you add
# and divide?
# </details>
#
# <details><summary>Hint: tied weights</summary>
#
# Keep a dictionary from "where the tensors of this name begin, in every state" to the result that
# was made of them.
# </details>

# %% check="average" points=2
a = {"w": torch.tensor([2.0, 4.0]), "steps": torch.tensor(7)}
b = {"steps": torch.tensor(7), "w": torch.tensor([6.0, 0.0])}
merged = average([a, b], [3.0, 1.0])
checks.kind(merged, dict, what="the result")
assert list(merged) == ["w", "steps"], (
    "the result is a dictionary with the names w and steps, in the order of the first state"
)
checks.close(
    merged["w"],
    torch.tensor([3.0, 3.0]),
    what="[2, 4] with weight 3 and [6, 0] with weight 1",
    mistakes={
        "weights that are not divided by their sum": torch.tensor([12.0, 12.0]),
        "ignoring the weights": torch.tensor([4.0, 2.0]),
        "the weights in the other order": torch.tensor([5.0, 1.0]),
    },
)
checks.close(merged["steps"], torch.tensor(7), what="an integer that is the same in both states")
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for count, weights in [
    (1, None),
    (2, None),
    (3, [0.5, 2.0, 1.5]),
    (4, [3, -1, 1, 2]),
    (1, [4.0]),
    (2, [-3.0, 1.0]),
]:
    states = [
        {
            "a.weight": checks.randn(5, 3, device="cpu", generator=g),
            "a.bias": checks.randn(1, device="cpu", generator=g).double(),
            "empty": torch.zeros(0, 4),
            "scalar": checks.randn(1, device="cpu", generator=g)[0],
            "t": checks.randn(4, 6, device="cpu", generator=g).t(),
            "mask": torch.tensor([True, False]),
        }
        for _ in range(count)
    ]
    w = torch.ones(count) if weights is None else torch.tensor(weights)
    w = w.double() / w.double().sum()
    # A state whose names come in another order.
    given = [dict(reversed(s.items())) if i else s for i, s in enumerate(states)]
    named = {f"{n} of state {i}": t for i, s in enumerate(states) for n, t in s.items()}
    with checks.kept(**named):
        merged = average(given, weights)
    assert list(merged) == list(states[0]), "the names are those of the first state, in its order"
    for name, first in states[0].items():
        if first.dtype == torch.bool:
            checks.close(merged[name], first, what=f"{name}, which is of dtype bool")
            continue
        stacked = torch.stack([s[name].double() for s in states])
        expected = torch.tensordot(w, stacked, dims=1)
        checks.close(
            merged[name],
            expected,
            what=f"{name} of {count} states with weights {weights}",
            dtype=first.dtype,
            mistakes={"an equal mean": stacked.mean(0)} if count > 1 else None,
        )
checks.keeps_dtype(
    lambda x, y, z: average([{"w": x}, {"w": y}, {"w": z}], [1.0, 2.0, 4.0])["w"],
    *(checks.randn(40, device="cpu", generator=g) for _ in range(3)),
    reference=lambda x, y, z: (x + 2 * y + 4 * z) / 7,
    rtol={torch.bfloat16: 4e-3, torch.float16: 5e-4},
    what="the mean of three states",
)
# Rounded once: summed in bfloat16, the small member of many is lost.
many = [{"w": (1 + torch.rand(30, generator=g)).bfloat16()} for _ in range(100)]
checks.close(
    average(many)["w"],
    torch.stack([s["w"].double() for s in many]).mean(0),
    what="the mean of 100 bfloat16 states",
    dtype=torch.bfloat16,
    rtol=4e-3,
    hint="Sum in float32, round at the end",
)
large = [{"w": torch.tensor([3e38, -3e38, 3e38])}, {"w": torch.tensor([2e38, -1e38, -3e38])}]
checks.close(
    average(large)["w"],
    torch.tensor([2.5e38, -2e38, 0.0]),
    what="a mean of values near 3e38",
    hint="Their sum overflows: divide first",
)
leaf = torch.ones(3, requires_grad=True)
out = average([{"w": leaf}, {"w": torch.zeros(3)}])["w"]
assert not out.requires_grad, "the result carries a gradient's graph: detach the states"
### END HIDDEN TESTS

# %% check="average" points=2
a, b = {"w": torch.ones(2)}, {"v": torch.ones(2)}
checks.raises(ValueError, average, [a, b], because="The names are w and v")
one, two = torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -5.0])
tied = average([{"embed": one, "head": one}, {"embed": two, "head": two}])
checks.close(tied["head"], torch.zeros(2), what="a mean of a tied head")
### BEGIN HIDDEN TESTS
one = {"w": torch.ones(4), "n": torch.tensor([3])}
for other, why in [
    ({"w": torch.ones(4)}, "A name is missing in the second state"),
    ({**one, "more": torch.ones(1)}, "The second state has a name more"),
    ({"w": torch.ones(1), "n": torch.tensor([3])}, "Shapes (4,) and (1,) differ"),
    ({"w": torch.ones(2, 2), "n": torch.tensor([3])}, "Shapes (4,) and (2, 2) differ"),
    ({"w": torch.ones(4), "n": torch.tensor([4])}, "Integers 3 and 4 differ"),
]:
    checks.raises(ValueError, average, [one, other], because=why)
    checks.raises(ValueError, average, [one, one, other], because=f"{why}, in a third state")
checks.raises(ValueError, average, [], because="There is no state")
for weights in ([1.0], [1.0, 1.0, 1.0], [1.0, -1.0], [0, 0]):
    checks.raises(ValueError, average, [one, one], weights, because=f"The weights are {weights}")
g = checks.generator(2)
embeds = [torch.randn(5, 3, generator=g) for _ in range(3)]
states = [{"embed": e, "norm": e.sum(0), "head": e} for e in embeds]
out = average(states, [1.0, 2.0, 5.0])
assert out["embed"] is out["head"], (
    "embed and head are one tensor in every state, and two in the result: tied weights are merged "
    "once"
)
checks.close(
    out["head"], (embeds[0] + 2 * embeds[1] + 5 * embeds[2]) / 8, what="the mean of a tied head"
)
# A square matrix and its transposed view: one address and shape, and two tensors.
square = torch.randn(3, 3, generator=g)
turned = average([{"w": square, "t": square.T}])
checks.close(turned["t"], square.T, what="a matrix that is another's transposed view")
# Tied in the first state only: their means differ.
loose = average([{"embed": embeds[0], "head": embeds[0]}, {"embed": embeds[1], "head": embeds[2]}])
checks.close(
    loose["head"],
    (embeds[0] + embeds[2]) / 2,
    what="the mean of a head that is tied in the first state only",
    mistakes={"the mean of the embeddings": (embeds[0] + embeds[1]) / 2},
)
checks.close(loose["embed"], (embeds[0] + embeds[1]) / 2, what="the mean of its embedding")
### END HIDDEN TESTS

# %% [markdown]
# ## A soup of finetuned models
#
# Somebody has finetuned the same base ten times, with other learning rates and seeds, to keep the
# best one. The other nine need not be thrown away. The **uniform soup** averages all ten; one bad
# member spoils it. The **greedy soup** (Wortsman et al. 2022) tastes first: sort the members by
# their own held-out score, start with the best, and put each of the others in if the average is
# then *not worse*. So the soup is at least as good as its best member, on the data used for
# tasting.
#
# The comparison is ≥, and this matters: with an accuracy on few examples ties are common, and a
# member that changes nothing on them still lowers the variance.


# %% exercise="greedy_soup" minutes=12 difficulty=1
def greedy_soup(
    states: Sequence[State], evaluate: Callable[[State], float]
) -> tuple[State, list[int]]:
    """The greedy soup of states, and the indices of its members in the order they came in.

    evaluate: gives a state's score on held-out data; higher is better.

    Each state is scored once by itself. They are tried from the best to the worst; of equal scores
    the one that comes first in `states` goes first. The first is in. Each later one is in if the
    score of the plain mean (all weights alike) of the members and it is greater than or equal to
    the score of the members' mean. `evaluate` is called 2·len(states) − 1 times. ValueError where
    there are no states. A soup of one member may be that state itself. You may call `average`.

    Worked number: weights 0, 1 and 4, score −(w − 1.5)²: tried in the order 1, 0, 2. Members are
    1 (score −0.25); 0 makes a mean of 0.5 and is refused; 4 makes 2.5 and is refused (−1).
    """
    ### BEGIN SOLUTION
    if not states:
        raise ValueError("there is no state to make a soup of")
    scores = [evaluate(state) for state in states]
    order = sorted(range(len(states)), key=lambda i: -scores[i])
    members, best = order[:1], scores[order[0]]
    for i in order[1:]:
        score = evaluate(average([states[j] for j in [*members, i]]))
        if score >= best:
            members, best = [*members, i], score
    return average([states[j] for j in members]), members
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what is averaged</summary>
#
# The mean of three members is not the mean of the third and the mean of the first two. Keep a list
# of members and average it anew.
# </details>

# %% check="greedy_soup" points=2
soup, members = checks.parts(
    greedy_soup(
        [{"w": torch.tensor([w])} for w in (0.0, 1.0, 4.0)],
        lambda state: -((float(state["w"]) - 1.5) ** 2),
    ),
    "soup",
    "members",
)
checks.close(members, [1], what="the members of the soup of 0, 1 and 4 around 1.5")
checks.close(soup["w"], torch.tensor([1.0]), what="its weight")
# Scored in whole steps, the mean of 2 and 3 is as good as 2 alone, and so 3 comes in.
soup, members = greedy_soup(
    [{"w": torch.tensor([w])} for w in (3.0, 2.0)],
    lambda state: -abs(int(float(state["w"])) - 2),
)
checks.close(members, [1, 0], what="the members, of which the second makes the soup not worse")
checks.close(soup["w"], torch.tensor([2.5]), what="its weight")
### BEGIN HIDDEN TESTS
g = checks.generator(3)
kept = refused = 0
for size in (1, 2, 3, 5, 8, 8, 8):
    values = [int(v) for v in torch.randint(-12, 13, (size,), generator=g)]
    if size == 5:
        values = [4, 4, -4, 20, 1]  # equal scores: which comes first?
    seen = []

    def taste(state, seen=seen):
        seen.append(float(state["w"][1]))
        return -abs(round(8 * seen[-1]) - 4) // 4  # coarse, so that scores tie

    def score(values):  # the same of whole numbers, exactly
        mean = Fraction(sum(values), len(values))
        return -abs(round(8 * float(mean)) - 4) // 4

    states = [{"w": torch.tensor([0.0, float(v), 1.0])} for v in values]
    soup, members = checks.parts(greedy_soup(states, taste), "soup", "members")
    assert len(seen) == 2 * size - 1, (
        f"evaluate is called {len(seen)} times for {size} states, not {2 * size - 1}"
    )
    expected = []
    for _, i in sorted((-score([v]), i) for i, v in enumerate(values)):
        before = [values[j] for j in expected]
        if not expected or score([*before, values[i]]) >= score(before):
            expected.append(i)
            kept += 1
        else:
            refused += 1
    checks.close(members, expected, what=f"the members of the soup of {values}")
    mean = sum(values[i] for i in expected) / len(expected)
    checks.close(
        soup["w"],
        torch.tensor([0.0, mean, 1.0]),
        what=f"the soup of {values}",
        mistakes={"the last state added": torch.tensor([0.0, float(values[expected[-1]]), 1.0])},
    )
checks.raises(ValueError, greedy_soup, [], lambda s: 0.0, because="There are no states")
### END HIDDEN TESTS

# %% [markdown]
# ## Slerp: around, not through
#
# A mean of two vectors of one length is shorter than they are, unless they are parallel: at an
# angle of 90° two unit vectors have a mean of length 0.71. **Slerp**, spherical linear
# interpolation, goes along the arc instead.
#
# Let $u, v$ be the directions (unit vectors) of $a$ and $b$, at an angle $\theta$. The plane that
# they span has the orthonormal basis $u$ and $w = (v - u\cos\theta)/\sin\theta$. A turn of $u$ by
# $t\theta$ towards $v$ is $u\cos t\theta + w\sin t\theta$. Put $w$ in and collect $u$:
#
# $$\Big(\cos t\theta - \frac{\sin t\theta\cos\theta}{\sin\theta}\Big)u +
# \frac{\sin t\theta}{\sin\theta}\,v
# = \frac{\sin\big((1-t)\theta\big)}{\sin\theta}\,u + \frac{\sin t\theta}{\sin\theta}\,v,$$
#
# by $\sin\theta\cos t\theta - \cos\theta\sin t\theta = \sin(\theta - t\theta)$. The norm goes its
# own way, linearly: $(1-t)\|a\| + t\|b\|$.
#
# mergekit's widely used `slerp` applies the two sine weights to $a$ and $b$ *themselves*. With
# equal norms that is the same. With norms 1 and 3 at 90°, $t = ½$ gives (0.71, 2.12): the longer
# one pulls, and 72° of the 90° are turned. We turn directions. Near $\theta = 0$ and $180°$ the
# formula is 0/0, and both fall back to the straight line.


# %% exercise="slerp" minutes=15 difficulty=2
def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The vector at the share t of the way from a to b: directions on the arc, norms in proportion.

    a, b: one shape, any number of axes, read as one flat vector each; t from 0 to 1.

    Returns ((1 − t)·‖a‖ + t·‖b‖) · [sin((1 − t)·θ)·u + sin(t·θ)·v] / sin θ with u = a/‖a‖,
    v = b/‖b‖ and θ the angle between them, from 0 to π. Where ‖a‖ or ‖b‖ is 0, or |cos θ| > 0.9995
    (nearly parallel or nearly opposite): (1 − t)·a + t·b.
    Shape and dtype of a. Computed in float64 whatever the dtype, so that norms do not overflow or
    underflow (entries of 1e30 and 1e−30 in float32 are fine). Inputs are not changed.

    Worked number: slerp([1, 0], [0, 3], 0.5) = [√2, √2]: norm 2, at 45°.
    """
    ### BEGIN SOLUTION
    wide_a, wide_b = a.double(), b.double()
    norm_a, norm_b = wide_a.norm(), wide_b.norm()
    line = (1 - t) * wide_a + t * wide_b
    if norm_a == 0 or norm_b == 0:
        return line.to(a.dtype)
    u, v = wide_a / norm_a, wide_b / norm_b
    cosine = (u * v).sum()
    if cosine.abs() > 0.9995:
        return line.to(a.dtype)
    angle = cosine.acos()
    direction = (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()
    return (((1 - t) * norm_a + t * norm_b) * direction).to(a.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one vector, not many rows</summary>
#
# A matrix has one norm here, that of all its entries, and one angle with the other matrix.
# `(u * v).sum()` is the cosine whatever the shape.
# </details>

# %% check="slerp" points=2
half = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), 0.5)
checks.close(
    half,
    torch.tensor([2**0.5, 2**0.5]),
    what="slerp([1, 0], [0, 3], 0.5)",
    mistakes={
        "the sine weights on a and b themselves": torch.tensor([0.5**0.5, 3 * 0.5**0.5]),
        "the straight line": torch.tensor([0.5, 1.5]),
        "a result of norm 1": torch.tensor([0.5**0.5, 0.5**0.5]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)


def turned(a, b, t):
    """By the matrix exponential of a rotation in the plane of a and b, in float64."""
    u, v = (a / a.norm()).flatten(), (b / b.norm()).flatten()
    w = v - (v @ u) * u
    w = w / w.norm()
    angle = torch.atan2(v @ w, v @ u)
    turn = torch.linalg.matrix_exp(t * angle * (torch.outer(w, u) - torch.outer(u, w)))
    return (((1 - t) * a.norm() + t * b.norm()) * (turn @ u)).view(a.shape)


for shape, scale, t in [
    ((7,), 1.0, 0.3),
    ((4, 5), 0.2, 0.8),
    ((2, 3, 4), 5.0, 0.0),
    ((3, 1), 2.0, 1.0),
    ((6, 2), 30.0, 0.45),
]:
    a = checks.randn(*shape, device="cpu", generator=g, dtype=torch.float64)
    b = checks.randn(*shape, device="cpu", generator=g, dtype=torch.float64, scale=scale)
    if shape == (4, 5):
        a = a.t().contiguous().t()
    if scale == 30.0:
        b = b - 9 * a  # often an obtuse angle
    with checks.kept(a=a, b=b):
        out = slerp(a, b, t)
    u, v = a / a.norm(), b / b.norm()
    angle = (u * v).sum().acos()
    near, far = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    wrong = {
        "t of the way from b to a": turned(b, a, t),
        "the straight line": (1 - t) * a + t * b,
        "the sine weights on a and b themselves": near * a + far * b,
        "a result of norm 1": near * u + far * v,
    }
    checks.close(
        out,
        turned(a, b, t),
        what=f"slerp of shape {shape} at t = {t}",
        dtype=torch.float64,
        rtol=1e-8,
        mistakes=wrong if 0 < t < 1 else None,
    )
checks.keeps_dtype(
    lambda x, y: slerp(x, y, 0.25),
    checks.randn(9, 4, device="cpu", generator=g),
    checks.randn(9, 4, device="cpu", generator=g, scale=2.0),
    reference=lambda x, y: turned(x, y, 0.25),
    rtol={torch.float64: 1e-8, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    what="slerp",
)
for size in (1e30, 1e-30):
    a, b = checks.randn(5, device="cpu", generator=g), checks.randn(5, device="cpu", generator=g)
    checks.close(
        slerp(a * size, b * size, 0.3),
        (turned(a.double(), b.double(), 0.3) * size).float(),
        what=f"slerp of entries around {size:g}",
        rtol=1e-4,
        hint="The square of such a number leaves the range of float32",
    )
### END HIDDEN TESTS

# %% check="slerp" points=1
a = torch.tensor([1.0, 2.0])
checks.close(slerp(a, 3 * a, 0.5), 2 * a, what="slerp of a and 3·a, which are parallel")
checks.close(slerp(a, -3 * a, 0.75), -2 * a, what="slerp of a and −3·a, which are opposite")
checks.close(slerp(a, 0 * a, 0.25), 0.75 * a, what="slerp of a and 0")
### BEGIN HIDDEN TESTS
for cosine, straight in [(0.9990, False), (0.99945, False), (0.99955, True), (0.9999, True)]:
    for sign in (1.0, -1.0):
        a = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
        b = torch.tensor([sign * cosine, 0.0, math.sqrt(1 - cosine**2)], dtype=torch.float64)
        angle, t = math.acos(sign * cosine), 0.4
        norm = 0.6 * 3 + 0.4
        arc = [norm * math.cos(t * angle), 0.0, norm * math.sin(t * angle)]
        line = [(0.6 * 3 + 0.4 * sign * cosine), 0.0, 0.4 * float(b[2])]
        right, wrong = (line, arc) if straight else (arc, line)
        checks.close(
            slerp(a, b, t),
            torch.tensor(right, dtype=torch.float64),
            what=f"slerp at a cosine of {sign * cosine}",
            rtol=1e-8,
            mistakes={"the arc" if straight else "the straight line": torch.tensor(wrong).double()},
            hint="The straight line is for |cos θ| > 0.9995 alone",
        )
zero, b = torch.zeros(2, 3), torch.arange(6.0).view(2, 3)
checks.close(slerp(zero, b, 0.25), 0.25 * b, what="slerp of 0 and b")
checks.close(slerp(zero, zero, 0.25), zero, what="slerp of 0 and 0")
same = checks.randn(50, device="cpu", generator=checks.generator(5))
checks.close(
    slerp(same, same, 0.7),
    same,
    what="slerp of a and a",
    hint="acos of a cosine that rounding made larger than 1 is NaN",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Task vectors
#
# Finetuning moves the weights by $\tau = \theta - \theta_0$. Ilharco et al. (2022) treat this
# **task vector** as a thing of its own: add it for a skill, subtract it to take a skill away, add
# two for two skills.
#
# $$ f(x;\theta_0 + \lambda_1\tau_1 + \lambda_2\tau_2) \approx f(x;\theta_0)
# + \lambda_1 \nabla_\theta f \cdot \tau_1 + \lambda_2 \nabla_\theta f \cdot \tau_2 $$
#
# To first order contributions add up, and $\nabla_\theta f(x;\theta_0)\cdot\tau_2 = 0$ on inputs
# $x$ of task 1 is what "the skills do not disturb each other" means. The more the higher orders
# count, the less of this holds: hence a small $\lambda$, chosen on held-out data. A mean of the
# two models is the special case $\lambda_1 = \lambda_2 = ½$.
#
# A trap in half precision: $\tau$ is small beside $\theta$. Rounded to bfloat16 it does not give
# $\theta$ back, so keep it in float32.


# %% exercise="task_vectors" minutes=12 difficulty=1
def task_vector(base: State, tuned: State) -> State:
    """tuned − base for each floating-point tensor of `base`, by name.

    Names of `base` in its order, without those of other dtypes (integers must be equal in both).
    Computed and returned in float32 for float16 and bfloat16, else in the dtype of `base`. No
    gradient is required. ValueError: names or the shapes of a name differ, or integers do. States
    are not changed.
    """
    ### BEGIN SOLUTION
    if base.keys() != tuned.keys():
        raise ValueError("the states have different names")
    vector = {}
    for name, tensor in base.items():
        if tensor.shape != tuned[name].shape:
            raise ValueError(f"{name} has different shapes")
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            vector[name] = tuned[name].detach().to(wide) - tensor.detach().to(wide)
        elif not torch.equal(tensor, tuned[name]):
            raise ValueError(f"{name} holds integers that differ")
    return vector
    ### END SOLUTION


def apply_task_vectors(base: State, vectors: Sequence[State], scales: Sequence[float]) -> State:
    """base + Σ scaleᵢ·vectorᵢ, name by name.

    vectors: as `task_vector` makes them, perhaps with fewer names. A name that is not in a vector
    gets nothing from it; what gets nothing is copied, to memory of its own. Every name of a vector
    is in `base`, else ValueError; also where there are not as many scales as vectors.
    Computed in the dtype of `base`, float32 at least, and rounded once to that dtype. No gradient
    is required. Arguments are not changed.

    Worked number: base [1, 1], vectors [2, 0] and [0, 4] with scales 0.5 and −1: [2, −3].
    """
    ### BEGIN SOLUTION
    if len(vectors) != len(scales):
        raise ValueError("as many scales as vectors are needed")
    if any(vector.keys() - base.keys() for vector in vectors):
        raise ValueError("a vector has a name that the base lacks")
    merged = {}
    for name, tensor in base.items():
        moves = [(s, v[name].detach()) for s, v in zip(scales, vectors, strict=True) if name in v]
        total = tensor.detach().clone()
        if moves:
            total = total.to(torch.promote_types(tensor.dtype, torch.float32))
            for scale, move in moves:
                total = total + scale * move.to(total.dtype)
        merged[name] = total.to(tensor.dtype)
    return merged
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: bfloat16</summary>
#
# A bfloat16 number keeps 8 bits of its digits. Widen base and tuned *before* you subtract, and
# narrow once, after all has been added.
# </details>

# %% tags=["support"]
# Support: which tensors of a merged model lie in the memory of the base


@checks.measured
def memory_of_base(apply: Callable, base: State, vectors: Sequence[State]) -> list[str]:
    merged = apply(base, vectors, [1.0] * len(vectors))
    taken = {tensor.untyped_storage().data_ptr() for tensor in base.values()}
    return [n for n, tensor in merged.items() if tensor.untyped_storage().data_ptr() in taken]


# %% check="task_vectors" points=2
base = {"w": torch.tensor([1.0, 1.0]), "steps": torch.tensor(3)}
tuned = {"w": torch.tensor([3.0, 1.0]), "steps": torch.tensor(3)}
vector = task_vector(base, tuned)
assert list(vector) == ["w"], "a task vector holds the floating-point tensors, here w alone"
checks.close(
    vector["w"],
    torch.tensor([2.0, 0.0]),
    what="the task vector from [1, 1] to [3, 1]",
    mistakes={"base − tuned": torch.tensor([-2.0, 0.0])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
base = {
    "a": checks.randn(4, 3, device="cpu", generator=g),
    "b": checks.randn(1, device="cpu", generator=g).double(),
    "h": checks.randn(5, device="cpu", generator=g).bfloat16(),
    "f": checks.randn(6, device="cpu", generator=g).half().requires_grad_(),
    "none": torch.zeros(0),
    "n": torch.tensor([[4]]),
}
tuned = {
    name: t.detach() + 0.37 * torch.randn(t.shape, generator=g).to(t.dtype)
    for name, t in reversed(base.items())
    if t.is_floating_point()
} | {"n": torch.tensor([[4]])}
given = {f"{k} of the base": v for k, v in base.items()}
with checks.kept(**given, **{f"{k} of the tuned state": v for k, v in tuned.items()}):
    vector = task_vector(base, tuned)
assert list(vector) == ["a", "b", "h", "f", "none"], "names and their order are those of the base"
for name, move in vector.items():
    checks.close(
        move,
        tuned[name].double() - base[name].double(),
        what=f"the task vector's {name}, of {base[name].dtype}",
        dtype=torch.float64 if name == "b" else torch.float32,
    )
    assert not move.requires_grad, f"{name} requires a gradient"
one = {"w": torch.ones(4), "n": torch.tensor([3])}
for other in (
    {"w": torch.ones(4)},
    {**one, "v": torch.ones(1)},
    {"w": torch.ones(1), "n": torch.tensor([3])},
    {"w": torch.ones(4), "n": torch.tensor([5])},
):
    checks.raises(ValueError, task_vector, one, other, because="The states do not fit each other")
    if "v" not in other and len(other) == 2:
        checks.raises(ValueError, task_vector, other, one, because="They do not fit each other")
### END HIDDEN TESTS

# %% check="task_vectors" points=2
base = {"w": torch.tensor([1.0, 1.0]), "steps": torch.tensor(3)}
vectors = [{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}]
out = apply_task_vectors(base, vectors, [0.5, -1.0])
checks.close(out["w"], torch.tensor([2.0, -3.0]), what="[1, 1] + ½·[2, 0] − [0, 4]")
checks.close(out["steps"], torch.tensor(3), what="what no vector moves")
### BEGIN HIDDEN TESTS
g = checks.generator(7)
base = {
    "a": checks.randn(4, 3, device="cpu", generator=g),
    "b": checks.randn(2, device="cpu", generator=g).double(),
    "h": checks.randn(50, device="cpu", generator=g).bfloat16(),
    "n": torch.tensor([[4]]),
    "still": checks.randn(3, device="cpu", generator=g).half().requires_grad_(),
}
moves = [
    {
        "a": checks.randn(4, 3, device="cpu", generator=g),
        "h": checks.randn(50, device="cpu", generator=g, scale=0.01),
    },
    {
        "b": checks.randn(2, device="cpu", generator=g),
        "h": checks.randn(50, device="cpu", generator=g, scale=0.01),
    },
    {
        "h": checks.randn(50, device="cpu", generator=g, scale=0.01),
        "a": checks.randn(4, 3, device="cpu", generator=g),
    },
]
scales = [0.7, -1.3, 0.25]
given = {f"{k} of vector {i}": v for i, m in enumerate(moves) for k, v in m.items()}
with checks.kept(**given, **{f"{k} of the base": v for k, v in base.items()}):
    out = apply_task_vectors(base, moves, scales)
assert list(out) == list(base), "names and their order are those of the base"
for name, tensor in base.items():
    expected = tensor.detach().double()
    for scale, move in zip(scales, moves, strict=True):
        expected = expected + scale * move[name].double() if name in move else expected
    checks.close(
        out[name],
        expected if name in "ab" else expected.to(tensor.dtype),
        what=f"{name} of the base with three vectors",
        dtype=tensor.dtype,
        rtol=4e-3 if name == "h" else None,
    )
    assert not out[name].requires_grad, f"{name} requires a gradient"
# Many small moves, each of which bfloat16 would lose.
small = {"w": torch.full((3,), 2.0**-10)}
out = apply_task_vectors({"w": torch.ones(3, dtype=torch.bfloat16)}, [small] * 64, [1.0] * 64)
checks.close(
    out["w"].float(),
    torch.full((3,), 1.0625),
    what="1 and 64 moves of 1/1024, in bfloat16",
    rtol=1e-6,
    hint="Add in float32, round once",
)
nothing = apply_task_vectors(base, [], [])
checks.close(nothing["a"], base["a"], what="the base with no vectors")
lent = memory_of_base(apply_task_vectors, base, [{"b": moves[1]["b"]}])
assert not lent, (
    f"{', '.join(lent)}: no vector moves this, and the result holds the base's own memory, so that "
    f"who trains the merged model changes the base: copy it"
)
# Law: the task vector takes the base to the tuned state and back, bit for bit in bfloat16.
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    start = {"w": checks.randn(200, device="cpu", generator=g).to(dtype)}
    end = {"w": (start["w"].float() + 0.1 * checks.randn(200, device="cpu", generator=g)).to(dtype)}
    move = {"w": end["w"].float() - start["w"].float()}
    there = apply_task_vectors(start, [move], [1.0])
    back = apply_task_vectors(there, [move], [-1.0])
    for state, target in ((there, end), (back, start)):
        checks.close(
            state["w"].float(), target["w"].float(), what=f"base ± vector in {dtype}", rtol=1e-6
        )
checks.raises(
    ValueError,
    apply_task_vectors,
    {"w": torch.ones(1)},
    [{"v": torch.ones(1)}],
    [1.0],
    because="The base has no v",
)
for scales in ([], [1.0], [1.0, 1.0, 1.0]):
    checks.raises(
        ValueError,
        apply_task_vectors,
        base,
        moves[:2],
        scales,
        because=f"There are 2 vectors and {len(scales)} scales",
    )
### END HIDDEN TESTS

# %% [markdown]
# ## TIES: trim, elect, merge
#
# In a sum of task vectors two things go wrong. Most entries of a task vector are small and hardly
# matter to its own skill, but they pull the others' entries towards 0 in a mean. And where two
# vectors have *different signs*, a mean cancels what both needed. **TIES** (Yadav et al. 2023)
# answers in three steps.
#
# 1. **Trim.** Of each task vector keep the share `density` of the entries that are largest in
#    magnitude, over all tensors together; set the rest to 0.
# 2. **Elect.** For each entry the sign of the *sum* of the trimmed values: the side with more mass
#    wins, not that with more votes.
# 3. **Merge.** The mean of those values alone that have the elected sign. Zeros do not count, not
#    in the number divided by either.
#
# (Where the sum is 0, the authors' code takes the sign that most entries of the whole vector have.
# We take +. In floating point a sum of exactly 0 is rare, but for entries that are all trimmed.)

# %% [markdown]
# | entry | 0 | 1 | 2 | 3 | 4 | 5 |
# |---|--:|--:|--:|--:|--:|--:|
# | vector A | 6 | −2 | 0.5 | 3 | 0.1 | −5 |
# | vector B | 2 | 4 | −4 | 0.3 | 0.2 | 1 |
# | A trimmed to ½ | 6 | | | 3 | | −5 |
# | B trimmed to ½ | 2 | 4 | −4 | | | |
# | elected | + | + | − | + | + | − |
# | merged | 4 | 4 | −4 | 3 | 0 | −5 |
#
# A plain mean would give 4, 1, −1.75, 1.65, 0.15 and −2: where only one of the two had something to
# say, half of it is gone. mergekit trims each tensor by itself; then a tensor that finetuning left
# almost alone keeps as many entries as one that it turned over.


# %% exercise="ties_merge" minutes=25 difficulty=3
def ties_merge(vectors: Sequence[State], density: float) -> State:
    """One task vector of several, by TIES. No scale is applied: `apply_task_vectors` does that.

    vectors: task vectors with the same names (perhaps in another order) and shapes, floating point.
    density: the share of entries kept, above 0, at most 1.

    Trim: of the n entries of a vector, all its tensors together, those stay whose magnitude is at
        least that of the k-th largest, k = max(1, round(density·n)). Where several are equal to it,
        all of them stay.
    Elect: the sign of the sum of the trimmed values; + where the sum is 0.
    Merge: the mean of the trimmed values that are not 0 and have the elected sign; 0 where there is
        none.

    The result has the names of the first vector in its order, shapes and dtypes likewise; computed
    in float32 at least. No gradient is required. ValueError: no vectors; a density outside (0, 1].
    Vectors are not changed.

    Worked number: the table above.
    """
    ### BEGIN SOLUTION
    if not vectors or not 0 < density <= 1:
        raise ValueError("vectors are needed, and a density above 0 and at most 1")
    trimmed = []
    for vector in vectors:
        flat = torch.cat([vector[name].detach().flatten() for name in vectors[0]])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        k = max(1, round(density * flat.numel()))
        limit = flat.abs().kthvalue(flat.numel() - k + 1).values
        trimmed.append(torch.where(flat.abs() >= limit, flat, 0.0))
    values = torch.stack(trimmed)  # (vectors, n)
    sign = torch.where(values.sum(0) < 0, -1.0, 1.0).to(values.dtype)
    agree = values * sign > 0
    mean = torch.where(agree, values, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    parts = mean.split([tensor.numel() for tensor in vectors[0].values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for part, (name, tensor) in zip(parts, vectors[0].items(), strict=True)
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: from a dictionary to one vector and back</summary>
#
# `torch.cat` of the flattened tensors, in the order of the *first* vector's names; afterwards
# `split` with the numbers of elements, and `view`.
# </details>
#
# <details><summary>Hint: the mean</summary>
#
# Per entry: which of the stacked values have the elected sign? Sum those, and divide by how many
# they are, but by no less than 1.
# </details>

# %% check="ties_merge" points=3
a = {"x": torch.tensor([6.0, -2.0, 0.5, 3.0]), "y": torch.tensor([[0.1, -5.0]])}
b = {"x": torch.tensor([2.0, 4.0, -4.0, 0.3]), "y": torch.tensor([[0.2, 1.0]])}
merged = ties_merge([a, b], 0.5)
checks.close(
    merged["x"],
    torch.tensor([4.0, 4.0, -4.0, 3.0]),
    what="entries 0 to 3 of the table",
    mistakes={
        "zeros counted in the mean": torch.tensor([4.0, 2.0, -2.0, 1.5]),
        "no trimming": torch.tensor([4.0, 4.0, -4.0, 1.65]),
        "trimming each tensor by itself": torch.tensor([6.0, 4.0, -4.0, 3.0]),
        "a sum in place of a mean": torch.tensor([8.0, 4.0, -4.0, 3.0]),
    },
)
checks.close(
    merged["y"],
    torch.tensor([[0.0, -5.0]]),
    what="entries 4 and 5 of the table",
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)


def by_entry(vectors, density):
    """TIES entry by entry, in plain numbers: {(name, index): value}."""
    rows = []
    for vector in vectors:
        row = {(m, i): float(x) for m in vector for i, x in enumerate(vector[m].flatten().tolist())}
        k = max(1, round(density * len(row)))
        limit = sorted(map(abs, row.values()), reverse=True)[k - 1]
        rows.append({key: x if abs(x) >= limit else 0.0 for key, x in row.items()})
    merged = {}
    for key in rows[0]:
        column = [row[key] for row in rows]
        side = [x for x in column if (x < 0 if sum(column) < 0 else x > 0)]
        merged[key] = sum(side) / len(side) if side else 0.0
    return merged


for count, density, dtype in [
    (2, 0.3, torch.float32),
    (3, 0.55, torch.float64),
    (5, 0.2, torch.float32),
    (4, 1.0, torch.float64),
    (1, 0.4, torch.float32),
    (3, 0.01, torch.float32),
]:
    vectors = [
        {
            "big": (checks.randn(4, 5, device="cpu", generator=g) * (1 + 2 * i)).to(dtype).t(),
            "small": (0.3 * checks.randn(7, device="cpu", generator=g) * (1 + 2 * i)).to(dtype),
            "none": torch.zeros(0, 2, dtype=dtype),
            "one": checks.randn(1, device="cpu", generator=g)[0].to(dtype),
        }
        for i in range(count)
    ]
    given = [dict(reversed(v.items())) if i % 2 else v for i, v in enumerate(vectors)]
    named = {f"{n} of vector {i}": t for i, v in enumerate(vectors) for n, t in v.items()}
    with checks.kept(**named):
        merged = ties_merge(given, density)
    assert list(merged) == list(vectors[0]), "names and their order are those of the first vector"
    expected = by_entry(vectors, density)
    for name, tensor in vectors[0].items():
        values = [expected[name, i] for i in range(tensor.numel())]
        checks.close(
            merged[name],
            torch.tensor(values, dtype=dtype).view(tensor.shape),
            what=f"{name} of {count} vectors at density {density}",
            dtype=dtype,
        )
# More mass on one side, more votes on the other; equal mass; equal magnitudes at the limit.
column = [[5.0, 1.0, 0.0], [-2.0, -1.0, 0.0], [-2.0, 0.0, 0.0]]
merged = ties_merge([{"w": torch.tensor(row)} for row in column], 1.0)["w"]
checks.close(
    merged,
    torch.tensor([5.0, 1.0, 0.0]),
    what="the columns (5, −2, −2), (1, −1, 0) and (0, 0, 0)",
    mistakes={
        "the sign of most votes": torch.tensor([-2.0, 1.0, 0.0]),
        "no side where the sum is 0": torch.tensor([5.0, 0.0, 0.0]),
    },
)
equal = {"w": torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0])}
checks.close(
    ties_merge([equal], 0.4)["w"],
    torch.tensor([3.0, -2.0, 2.0, 2.0, 0.0]),
    what="[3, −2, 2, 2, 1] trimmed to 2 entries, of which the second is met by three",
)
half = [
    {"w": checks.randn(33, device="cpu", generator=g).bfloat16().requires_grad_()} for _ in range(3)
]
merged = ties_merge(half, 0.5)["w"]
assert not merged.requires_grad, "the result carries a gradient's graph: detach the vectors"
values = list(by_entry(half, 0.5).values())
checks.close(
    merged,
    torch.tensor(values).bfloat16(),
    what="three bfloat16 vectors",
    dtype=torch.bfloat16,
    rtol=4e-3,
)
checks.raises(ValueError, ties_merge, [], 0.5, because="There are no vectors")
for density in (0.0, -0.2, 1.5):
    checks.raises(ValueError, ties_merge, [equal], density, because=f"The density is {density}")
### END HIDDEN TESTS

# %% [markdown]
# ## DARE: drop and rescale
#
# How many entries of a task vector does a skill need? Yu et al. (2023) ask by experiment: set each
# entry to 0 with probability $p$, and divide those that stay by $1 - p$. With $m \sim$
# Bernoulli$(1-p)$,
#
# $$\mathbb E\Big[\frac{m\,\delta}{1-p}\Big] = \delta, \qquad
# \mathrm{Var}\Big[\frac{m\,\delta}{1-p}\Big] = \frac{\delta^2}{(1-p)^2}\,p(1-p)
# = \frac{p}{1-p}\,\delta^2.$$
#
# The expectation is untouched, and so is each layer's output on average, a sum over many entries.
# The noise is $p/(1-p)$: 1 at $p = ½$, 9 at 0.9, 99 at 0.99. Two sparse vectors seldom meet in one
# entry, which is the point when they are added. This is dropout, on weights, once.
#
# mergekit's rescaling is another: it keeps each tensor's L1 norm, $\sum|\delta|$, exactly as it
# was, so that its factor depends on the draw.


# %% exercise="dare" minutes=10 difficulty=1
def dare(vector: State, p: float, generator: torch.Generator) -> State:
    """Each entry is dropped (0) with probability p, independently; what stays is divided by 1 − p.

    vector: a task vector, floating-point tensors on the CPU. p: at least 0, below 1; ValueError
    elsewhere. The probability is p in every dtype, for p near 1 too. All random numbers come from
    `generator`. Names, shapes and dtypes stay; no gradient is required; `vector` is not changed. At
    p = 0 the values are those of `vector`. An entry that is dropped is 0 whatever it was (inf too).

    Worked number: at p = 0.75 an entry of 3 becomes 0 or 12.
    """
    ### BEGIN SOLUTION
    if not 0 <= p < 1:
        raise ValueError("p is at least 0 and below 1")
    sparse = {}
    for name, tensor in vector.items():
        dropped = torch.rand(tensor.shape, generator=generator) < p
        sparse[name] = (tensor.detach() / (1 - p)).masked_fill(dropped, 0.0)
    return sparse
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which probability</summary>
#
# `torch.rand` is below p with probability p: those are the dropped ones. What stays is 1 − p of
# all; dividing by p is the usual slip, and at p = ½ nobody sees it.
# </details>

# %% check="dare" points=2
sparse = dare({"w": torch.full((1000,), 3.0)}, 0.75, torch.Generator().manual_seed(0))["w"]
values = sorted(set(sparse.tolist()))
checks.close(
    values,
    [0.0, 12.0],
    what="the values that 3 becomes at p = 0.75",
    mistakes={"dividing by p": [0.0, 4.0], "no rescaling": [0.0, 3.0]},
)
share = float((sparse != 0).double().mean())
assert abs(share - 0.25) < 0.06, f"a quarter of the entries stays at p = 0.75; yours: {share:.0%}"
### BEGIN HIDDEN TESTS
g = checks.generator(9)
for p in (0.0, 0.1, 0.6, 0.9, 0.99):
    vector = {
        "a": checks.randn(200, 300, device="cpu", generator=g).t(),
        "b": checks.randn(40_000, device="cpu", generator=g, dtype=torch.float64) + 2.0,
        "none": torch.zeros(0, 3),
        "one": torch.tensor(5.0),
    }
    with checks.kept(**vector):
        sparse = dare(vector, p, g)
    assert list(sparse) == list(vector), "names and their order stay"
    for name, tensor in vector.items():
        out = sparse[name]
        checks.kind(out, Tensor, what=name)
        assert out.shape == tensor.shape, f"{name} has shape {tuple(out.shape)}"
        stays = out != 0
        checks.close(
            out,
            torch.where(stays, tensor / (1 - p), 0.0),
            what=f"{name} at p = {p}",
            dtype=tensor.dtype,
        )
        if tensor.numel() > 1000 and p:
            checks.drawn(
                stays.double(),
                mean=1 - p,
                what=f"the share of {name} that stays at p = {p}",
                mistakes={"keeping with probability p": p},
            )
    if 0 < p < 0.95:
        rows = (sparse["a"] != 0).double()
        for axis in (0, 1):  # independent: along an axis the number kept varies as a binomial does
            size = rows.shape[axis]
            spread = float(rows.sum(axis).var())
            assert 0.5 < spread / (size * p * (1 - p)) < 1.7, (
                f"entries are not dropped independently: along an axis of {size} the number that "
                f"stays has a variance of {spread:.1f}, a binomial one is {size * p * (1 - p):.1f}"
            )
twins = dare({"x": torch.ones(300), "y": torch.ones(300)}, 0.5, g)
assert not torch.equal(twins["x"], twins["y"]), "two tensors of one shape are dropped alike"
# The number that stays is drawn too: over many calls it varies as a binomial does.
counts = torch.stack([(dare({"w": torch.ones(40)}, 0.3, g)["w"] != 0).sum() for _ in range(200)])
spread = float(counts.double().var())
assert 3.4 < spread < 16, (
    f"the number of 40 entries that stay has a variance of {spread:.1f} over 200 calls at p = 0.3; "
    f"independent draws give 8.4"
)
checks.uses_generator(lambda source: dare({"w": torch.ones(100)}, 0.4, source), what="dare")
checks.keeps_dtype(
    lambda x: dare({"w": x}, 0.5, checks.generator(10))["w"] != 0, torch.ones(64), what="dare"
)
for dtype in (torch.float16, torch.bfloat16):
    out = dare({"w": torch.full((64,), 3.0, dtype=dtype).requires_grad_()}, 0.75, g)["w"]
    assert out.dtype == dtype, f"entries of {dtype} become {out.dtype}"
    assert not out.requires_grad, "the result carries a gradient's graph"
    checks.close(out.float(), torch.where(out != 0, 12.0, 0.0), what=f"3 at p = 0.75 in {dtype}")
    out = dare({"w": torch.ones(1_000_000, dtype=dtype)}, 0.9999, g)["w"]
    checks.drawn(
        (out != 0).double(),
        mean=1e-4,
        std=1e-2,
        kurtosis=1e4,
        what=f"the share of {dtype} entries that stays at p = 0.9999",
        hint="Random numbers drawn in half precision have too few steps between 0 and 1",
    )
wild = dare({"w": torch.full((100,), math.inf)}, 0.5, g)["w"]
assert not wild.isnan().any(), "an infinite entry that is dropped becomes NaN: 0·inf; mask instead"
for p in (1.0, -0.1, 1.5):
    checks.raises(ValueError, dare, {"w": torch.ones(2)}, p, g, because=f"p is {p}")
### END HIDDEN TESTS

# %% [markdown]
# ## The hill between two models
#
# Walk in a straight line from $\theta_a$ to $\theta_b$ and measure the loss $L(t)$ at
# $(1-t)\theta_a + t\theta_b$. If one end is worse than the other, some of what you see is a plain
# slope. The **barrier** takes it off (Entezari et al. 2021; Frankle et al. 2020 take off the mean
# of the two ends):
#
# $$ \max_{t}\; L(t) - \big[(1-t)\,L(0) + t\,L(1)\big]. $$
#
# It is 0 if $L$ is convex along the way, by the very definition of convexity, and never below 0,
# as $t = 0$ counts. Where the barrier is high a mean fails. The converse does not hold: without a
# barrier a mean is no worse than the chord, which can be bad enough.


# %% exercise="loss_barrier" minutes=12 difficulty=2
def loss_barrier(
    a: State, b: State, evaluate: Callable[[State], float], points: int = 11
) -> tuple[float, Tensor]:
    """The loss barrier on the straight line from a to b, and the losses along it.

    evaluate: the loss of a state, lower is better. It is called once for each of `points` ≥ 2
    places t = i / (points − 1), i = 0, 1, …, in this order, with the state (1 − t)·a + t·b.

    Returns (barrier, losses): a float, the largest over the places of
    L(t) − [(1 − t)·L(a) + t·L(b)], and a tensor (points,), float64. ValueError for fewer than 2
    points. States are not changed. You may call `average`.

    Worked number: one weight, a = 0, b = 2, losses 1, 4 and 3 at weights 0, 1 and 2: with 3 points
    the barrier is 4 − 2 = 2.
    """
    ### BEGIN SOLUTION
    if points < 2:
        raise ValueError("two points at least: the ends")
    places = torch.linspace(0, 1, points, dtype=torch.float64)
    losses = torch.tensor(
        [evaluate(average([a, b], [1 - t, t])) for t in places.tolist()], dtype=torch.float64
    )
    chord = (1 - places) * losses[0] + places * losses[-1]
    return float((losses - chord).max()), losses
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the slope</summary>
#
# Subtract from each loss the value of the straight line between the *losses* of the two ends, at
# the same t. Neither the larger end alone nor their mean will do, except at ½.
# </details>

# %% check="loss_barrier" points=2
a, b = {"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}
table = {0.0: 1.0, 1.0: 4.0, 2.0: 3.0}
barrier, losses = checks.parts(
    loss_barrier(a, b, lambda s: table[round(float(s["w"]), 4)], points=3), "barrier", "losses"
)
checks.close(losses, torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64), what="the losses")
checks.close(
    barrier,
    2.0,
    what="the barrier of the losses 1, 4, 3",
    mistakes={"the rise above the higher end": 1.0, "the rise above the lower end": 3.0},
)
### BEGIN HIDDEN TESTS
g = checks.generator(11)
for points in (2, 3, 6, 11, 20):
    start, end = (
        checks.randn(5, device="cpu", generator=g),
        checks.randn(5, device="cpu", generator=g),
    )
    a = {"u": start[:2], "n": torch.tensor(4), "v": start[2:].view(3, 1)}
    b = {"v": end[2:].view(3, 1), "u": end[:2], "n": torch.tensor(4)}
    bump = float(torch.rand((), generator=g)) * 2 + 0.5
    seen = []

    def bumpy(state, seen=seen, bump=bump, start=start, end=end):
        """2 + 3·t^3 + a bump around t = 0.2, of the state alone."""
        place = torch.cat([state["u"], state["v"].flatten()])
        t = float((place - start) @ (end - start) / (end - start).square().sum())
        seen.append(t)
        return 2 + 3 * t**3 + bump * math.exp(-(((t - 0.2) / 0.15) ** 2))

    given = {f"{k} of a": v for k, v in a.items()} | {f"{k} of b": v for k, v in b.items()}
    with checks.kept(**given):
        result = loss_barrier(a, b, bumpy, points=points)
    barrier, losses = checks.parts(result, "barrier", "losses")
    t = [i / (points - 1) for i in range(points)]
    checks.close(seen, t, what="the places where evaluate is called", rtol=1e-4, atol=1e-5)
    each = [2 + 3 * x**3 + bump * math.exp(-(((x - 0.2) / 0.15) ** 2)) for x in t]
    checks.close(
        losses,
        torch.tensor(each, dtype=torch.float64),
        what="the losses",
        rtol=1e-4,
        dtype=torch.float64,
    )
    rise = [x - ((1 - s) * each[0] + s * each[-1]) for s, x in zip(t, each, strict=True)]
    checks.kind(barrier, float, what="the barrier")
    checks.close(
        barrier,
        max(rise),
        what=f"the barrier with {points} points",
        rtol=1e-3,
        atol=1e-4,
        mistakes={
            "the rise above the higher end": max(each) - max(each[0], each[-1]),
            "the rise above the mean of the ends": max(each) - (each[0] + each[-1]) / 2,
            "the rise at the middle": rise[points // 2],
            "the chord in the other direction": max(
                x - (s * each[0] + (1 - s) * each[-1]) for s, x in zip(t, each, strict=True)
            ),
        }
        if points > 3
        else None,
    )
convex = loss_barrier(
    {"w": torch.tensor([-1.0])}, {"w": torch.tensor([5.0])}, lambda s: float(s["w"]) ** 2
)
checks.close(convex[0], 0.0, what="the barrier of a convex loss", atol=1e-9)
checks.close(len(convex[1]), 11, what="the number of losses, where points is left out")
for points in (1, 0):
    checks.raises(ValueError, loss_barrier, a, b, lambda s: 0.0, points, because="Too few points")
### END HIDDEN TESTS

# %% [markdown]
# ## Why a mean of strangers fails: hidden units have no names
#
# Take a network with one hidden layer of $h$ units, and exchange two units: their rows of the first
# weight matrix, their biases, and their columns of the second. Not one output changes, because a
# sum has no order. So such a network, if its units all differ, exists in at least $h!$ copies: for
# $h = 32$ more than $10^{35}$, most of them far apart.
#
# Two trainings from different starts end in different copies. Their mean mixes a unit that finds a
# loop with one that finds a stroke. Two finetunings from *one* start stay in the same copy, and
# this, above all, is why merging finetuned models works.
#
# The mess can be undone. Run both networks on the same inputs, and ask which unit of $b$ fires when
# unit $i$ of $a$ does. With $C_{ij}$ the correlation of unit $i$ of $a$ with unit $j$ of $b$, we
# look for the order $\pi$, each unit used once, with the largest $\sum_i C_{i\pi(i)}$: an
# **assignment problem**, solved exactly in $O(h^3)$ by the Hungarian method
# (`linear_sum_assignment`, which minimizes unless told otherwise). Greedy choices are not enough:
# two units of $a$ may have the same favorite. This is Git Re-Basin's activation matching (Ainsworth
# et al. 2022).


# %% exercise="match_units" minutes=20 difficulty=2
def match_units(a: Tensor, b: Tensor) -> Tensor:
    """For each hidden unit of network a, the unit of network b that takes its part.

    a, b: (examples, h), activations of the hidden units of two networks on the same examples;
    examples ≥ 2. Returns `order`, (h,), int64, on the CPU: each of 0 … h − 1 once, such that the
    sum over i of the Pearson correlation between a[:, i] and b[:, order[i]] is as large as
    possible. A unit that never varies correlates 0 with everything. Computed in float64; the means
    of units are not 0, and their scales differ. Inputs are not changed.

    Worked number: with x, y, z uncorrelated, a = [x, y, z] and b = [5·z, 3·x + 1, y − 2] (columns)
    give [1, 2, 0].
    """

    ### BEGIN SOLUTION
    def standard(x: Tensor) -> Tensor:
        x = x.detach().double()
        x = x - x[:1]  # a unit that never varies is exactly 0 now
        x = x - x.mean(0)
        norm = x.norm(dim=0)
        return x / norm.clamp(min=torch.finfo(torch.float64).tiny)

    correlation = standard(a).T @ standard(b)  # (h of a, h of b)
    _, order = linear_sum_assignment(correlation.numpy(), maximize=True)
    return torch.as_tensor(order, dtype=torch.int64)
    ### END SOLUTION


def permute_hidden(state: State, order: Tensor) -> State:
    """The same network with its hidden units in another order: unit i of the result is unit
    order[i] of `state`.

    state: {"0.weight": (h, inputs), "0.bias": (h,), "2.weight": (outputs, h), "2.bias":
    (outputs,)}, as of nn.Sequential(nn.Linear, an activation, nn.Linear). order: (h,), int64.
    Returns a new state with the same names in the same order; `state` is not changed.
    """
    ### BEGIN SOLUTION
    return {
        "0.weight": state["0.weight"][order],
        "0.bias": state["0.bias"][order],
        "2.weight": state["2.weight"][:, order],
        "2.bias": state["2.bias"].clone(),
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: correlations of all pairs at once</summary>
#
# Take each column's mean off and divide it by its norm. Then `a.T @ b` holds all the correlations.
# A column of zeros stays one if you divide by a tiny number instead of 0. But the mean of many 0.1s
# need not be 0.1, even in float64: take each column's first value off first, and what never varies
# is exactly 0.
# </details>
#
# <details><summary>Hint: the order or its inverse</summary>
#
# `linear_sum_assignment` returns rows and columns; with rows 0, 1, 2, … the columns are the partner
# of each row. `weight[order]` puts row order[i] at place i.
# </details>

# %% check="match_units" points=2
x, y = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
z = x * y
a, b = torch.stack([x, y, z], 1), torch.stack([5 * z, 3 * x + 1, y - 2], 1)
checks.close(
    match_units(a, b),
    torch.tensor([1, 2, 0]),
    what="the partners of x, y, z among 5·z, 3·x + 1, y − 2",
    mistakes={"the inverse order": torch.tensor([2, 0, 1])},
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for h, n in [(1, 2), (2, 5), (5, 9), (6, 40), (6, 7)]:
    for _ in range(4):
        a = checks.randn(n, h, device="cpu", generator=g) * (0.2 + torch.arange(h)) + 3.0
        b = (
            checks.randn(n, h, device="cpu", generator=g) * (1.0 + torch.arange(h).flip(0) ** 2)
            - 40.0
        )
        b[:, 0] = b[:, 0] + 2 * a[:, -1] - a[:, 0]
        if h == 6:  # two units of a have one favorite
            a[:, 1] = a[:, 2] + 0.05 * a[:, 1]
            b[:, 4] = a[:, 2] + 0.02 * a[:, 0]
        with checks.kept(a=a, b=b):
            order = match_units(a, b)
        checks.kind(order, Tensor, what="the order")
        checks.close(
            order.sort().values, torch.arange(h), what="the order, sorted", dtype=torch.int64
        )
        both = torch.corrcoef(torch.cat([a, b], 1).double().T).view(2 * h, 2 * h)[:h, h:]
        total = [sum(float(both[i, j]) for i, j in enumerate(p)) for p in permutations(range(h))]
        reached = sum(float(both[i, j]) for i, j in enumerate(order.tolist()))
        assert reached >= max(total) - 1e-6, (
            f"the correlations of the {h} pairs sum to {reached:.4f}; the best of all "
            f"{len(total)} orders reaches {max(total):.4f}"
        )
# Planted orders of many units, whose inverse differs; a unit that never fires.
for h in (3, 17, 64):
    plant = torch.randperm(h, generator=g).roll(1)
    a = checks.randn(200, h, device="cpu", generator=g).relu()
    b = (a * (1 + torch.arange(h)) + 100.0)[:, plant.argsort()]
    b = b + 0.01 * checks.randn(200, h, device="cpu", generator=g)
    checks.close(
        match_units(a.half() if h == 3 else a, b),
        plant,
        what=f"a planted order of {h} units",
        mistakes={"the inverse order": plant.argsort()},
    )
a = checks.randn(30, 4, device="cpu", generator=g, dtype=torch.float64)
a[:, 1] = 7.0
b = a[:, [3, 0, 1, 2]] * 1e-3
order = match_units(a.requires_grad_(), b)
checks.close(order, torch.tensor([1, 2, 3, 0]), what="an order with a unit that never varies")
# Two that never vary are strangers like any others, whatever rounding leaves of them.
x = torch.linspace(-1, 1, 38, dtype=torch.float64)
still = torch.full_like(x, 0.1)
checks.close(
    match_units(torch.stack([x, still], 1), torch.stack([still, x**2 - 0.6 * x], 1)),
    torch.tensor([0, 1]),  # the other order would pair opposites, at −0.75
    what="an order where one unit of each network is 0.1 on all examples",
    hint="The mean of many 0.1s need not be 0.1, and what is left correlates with nothing",
)
### END HIDDEN TESTS

# %% check="match_units" points=2
state = {
    "0.weight": torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]),
    "0.bias": torch.tensor([10.0, 20.0, 30.0]),
    "2.weight": torch.tensor([[100.0, 200.0, 300.0]]),
    "2.bias": torch.tensor([5.0]),
}
moved = permute_hidden(state, torch.tensor([1, 2, 0]))
checks.close(
    moved["0.bias"], torch.tensor([20.0, 30.0, 10.0]), what="the biases in order [1, 2, 0]"
)
checks.close(moved["2.weight"], torch.tensor([[200.0, 300.0, 100.0]]), what="the second weight")
### BEGIN HIDDEN TESTS
g = checks.generator(13)
for inputs, h, outputs in [(3, 4, 2), (5, 1, 1), (2, 9, 9), (7, 7, 7)]:
    order = torch.randperm(h, generator=g)
    x = checks.randn(11, inputs, device="cpu", generator=g, dtype=torch.float64)
    state = {
        "0.weight": checks.randn(h, inputs, device="cpu", generator=g, dtype=torch.float64),
        "0.bias": checks.randn(h, device="cpu", generator=g, dtype=torch.float64),
        "2.weight": checks.randn(outputs, h, device="cpu", generator=g, dtype=torch.float64),
        "2.bias": checks.randn(outputs, device="cpu", generator=g, dtype=torch.float64),
    }
    with checks.kept(order=order, **state):
        moved = permute_hidden(state, order)
    assert list(moved) == list(state), "names and their order stay"

    def hidden(s, x=x):
        return (x @ s["0.weight"].T + s["0.bias"]).tanh()

    checks.close(hidden(moved), hidden(state)[:, order], what="the hidden units in their new order")
    checks.close(
        hidden(moved) @ moved["2.weight"].T + moved["2.bias"],
        hidden(state) @ state["2.weight"].T + state["2.bias"],
        what="the outputs",
        hint="The columns of the second weight move with the rows of the first",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### The repair, measured
#
# Two networks learn the digits from two random starts. The figure shows the way from one to the
# other, and the way to the same second network with its units in another order. Two more lines are
# the exact case: the second end is a relabeled copy of the first, and the repair undoes that
# entirely.

# %% tags=["experiment"]
images, labels = data.digits()
images = images.flatten(1)
train_x, train_y, test_x, test_y = images[:1400], labels[:1400], images[1400:], labels[1400:]


def mlp(seed: int) -> nn.Sequential:
    """64 → 32 → 10, trained on 1,400 digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(train_x), train_y).backward()
        optimizer.step()
    return net


@torch.no_grad()
def digits_loss(state: State) -> float:
    """Held-out loss, nats a digit."""
    logits = torch.func.functional_call(nets[0], state, (test_x,))
    return float(F.cross_entropy(logits, test_y))


nets = [mlp(0), mlp(1)]
first, second = (net.state_dict() for net in nets)
with torch.no_grad():
    order = match_units(nets[0][:2](train_x), nets[1][:2](train_x))
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    copied = permute_hidden(first, shuffle)
    hidden = F.gelu(train_x @ copied["0.weight"].T + copied["0.bias"])
    undo = match_units(nets[0][:2](train_x), hidden)
ways = {
    "another training": second,
    "another training, units matched": permute_hidden(second, order),
    "relabeled copy of the first": copied,
    "relabeled copy, units matched": permute_hidden(copied, undo),
}
barriers = {name: loss_barrier(first, end, digits_loss, points=21) for name, end in ways.items()}
for name, (barrier, _) in barriers.items():
    print(f"{name:<34} barrier {barrier:.3f} nats")
restored = permute_hidden(copied, undo)
exact = all(torch.equal(restored[n], t) for n, t in first.items())
print("the relabeled copy is restored bit for bit:", exact)

# %% tags=["experiment", "figure"]
# Figure: the hill between two networks, before and after their units are matched
ax = plot.curves(
    torch.linspace(0, 1, 21),
    {name: losses for name, (_, losses) in barriers.items()},
    xlabel="t: share of the second network",
    ylabel="held-out loss (nats a digit)",
    title="Units without names",
)
ax.set_ylim(bottom=0)
plot.caption(
    ax.figure,
    "Straight lines between two networks of 32 hidden units. The relabeled copy computes the same "
    "function as the first network, and yet the middle of the way is worse than both ends until "
    "the units are matched; then the line is flat. Two different trainings are brought nearly "
    "together.",
)
plot.plt.show()

# %% [markdown]
# The copy is restored bit for bit, and its barrier is gone. The second training is not the first in
# disguise: it has found partly other units, and no order makes them the same. Most of its barrier
# goes, and a little stays; so it did with five pairs of random starts. Ainsworth et al. find the
# same for wide networks, and that narrow ones, and those early in training, keep more of it.

# %% [markdown]
# ## Fisher weights
#
# A mean treats every weight of every model alike. But a model may care much about one weight and
# not about another: its loss rises steeply or hardly. Near its end $\theta_i$ write that as a
# quadratic with a diagonal curvature $F_i$, of the shape of $\theta_i$ and ≥ 0, and minimize the
# sum entry by entry:
#
# $$ \frac{d}{d\theta}\sum_i \tfrac12 F_i\,(\theta - \theta_i)^2 = \sum_i F_i(\theta - \theta_i) = 0
# \quad\Rightarrow\quad \theta = \frac{\sum_i F_i\,\theta_i}{\sum_i F_i}. $$
#
# Matena and Raffel (2021) take the diagonal of the **Fisher information** for $F$: the mean over
# examples of the squared gradient of the log-likelihood. It is a square of something small: 1e−12
# is usual and 1e−20 no rarity, so an `eps` of 1e−8 in the denominator would decide everything.


# %% exercise="fisher_merge" minutes=15 difficulty=2 path="more"
def fisher_merge(states: Sequence[State], fishers: Sequence[State]) -> State:
    """Σ Fᵢ·stateᵢ / Σ Fᵢ, entry by entry.

    states: one or more, with the same names and shapes, floating point. fishers: one for each, with
    the names and shapes of the states, entries finite and ≥ 0, of any floating-point dtype.
    ValueError where there are not as many fishers as states, or none.

    Where all Fᵢ of an entry are 0: the plain mean. Only the proportions of the Fᵢ of an entry
    count: no eps, and no overflow for Fᵢ from 1e−38 to 1e38. Computed in float64;
    dtype, names and their order are those of the first state. Arguments are not changed; no
    gradient is required.

    Worked number: weights 1 and 5 with Fisher values 3 and 1: (3 + 5) / 4 = 2.
    """
    ### BEGIN SOLUTION
    if not states or len(states) != len(fishers):
        raise ValueError("as many fishers as states are needed")
    merged = {}
    for name, first in states[0].items():
        theta = torch.stack([state[name].detach().double() for state in states])
        weight = torch.stack([fisher[name].detach().double() for fisher in fishers])
        total = weight.sum(0)
        known = (weight * theta).sum(0) / torch.where(total > 0, total, 1.0)
        merged[name] = torch.where(total > 0, known, theta.mean(0)).to(first.dtype)
    return merged
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: 0/0</summary>
#
# Divide by 1 where the sum is 0, and choose afterwards with `torch.where`. Adding a small number to
# the sum changes every entry whose curvature is as small.
# </details>

# %% check="fisher_merge" points=2
states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 4.0])}]
fishers = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]
checks.close(
    fisher_merge(states, fishers)["w"],
    torch.tensor([2.0, 3.0]),
    what="weights 1 and 5 with Fisher values 3 and 1; 2 and 4 with none",
    mistakes={
        "0 where no model cares": torch.tensor([2.0, 0.0]),
        "the plain mean": torch.tensor([3.0, 3.0]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for count in (1, 2, 4):
    states = [
        {
            "m": checks.randn(3, 5, device="cpu", generator=g),
            "v": checks.randn(4, device="cpu", generator=g).double(),
            "h": checks.randn(6, device="cpu", generator=g).bfloat16(),
        }
        for _ in range(count)
    ]
    fishers = [
        {
            "h": checks.randn(6, device="cpu", generator=g) ** 2,
            "v": checks.randn(4, device="cpu", generator=g) ** 2,
            "m": checks.randn(3, 5, device="cpu", generator=g) ** 4,
        }
        for _ in range(count)
    ]
    for i, fisher in enumerate(fishers):
        fisher["m"][i % 3] = 0.0
        fisher["m"][:, 4] = 0.0
    named = {f"{n} of state {i}": t for i, s in enumerate(states) for n, t in s.items()}
    named |= {f"{n} of fisher {i}": t for i, s in enumerate(fishers) for n, t in s.items()}
    with checks.kept(**named):
        merged = fisher_merge(states, fishers)
    assert list(merged) == ["m", "v", "h"], "names and their order are those of the first state"
    for name, tensor in merged.items():
        theta = torch.stack([s[name].double() for s in states])
        weight = torch.stack([f[name].double() for f in fishers])
        none = weight.sum(0) == 0
        # The bottom of Σ ½·F·(θ − θᵢ)² by one Newton step from 0: slope over curvature.
        root = torch.zeros_like(theta[0], requires_grad=True)
        cost = (0.5 * weight * (root - theta) ** 2).sum()
        (slope,) = torch.autograd.grad(cost, root)
        expected = torch.where(none, theta.mean(0), -slope / weight.sum(0).masked_fill(none, 1.0))
        checks.close(
            tensor.double(),
            expected,
            what=f"{name} of {count} states",
            rtol={"m": 1e-5, "v": 1e-9, "h": 4e-3}[name],
        )
        assert tensor.dtype == states[0][name].dtype, f"{name} has dtype {tensor.dtype}"
# Law: only the proportions count.
states = [{"w": checks.randn(50, device="cpu", generator=g, scale=10.0)} for _ in range(3)]
share = [torch.rand(50, generator=g) + 0.1 for _ in range(3)]
expected = sum(f.double() * s["w"].double() for f, s in zip(share, states, strict=True))
expected = expected / sum(f.double() for f in share)
for scale in (1e-37, 1e-20, 1e-8, 9e37):
    checks.close(
        fisher_merge(states, [{"w": f * scale} for f in share])["w"],
        expected,
        what=f"states with Fisher values around {scale:g}",
        dtype=torch.float32,
        hint="Only the proportions count, and products beyond 3e38 need float64",
    )
leaf = {"w": torch.ones(2, requires_grad=True)}
assert not fisher_merge([leaf], [{"w": torch.ones(2)}])["w"].requires_grad, (
    "the result carries a gradient's graph"
)
checks.raises(ValueError, fisher_merge, states, fishers[:1], because="3 states, 1 Fisher")
checks.raises(ValueError, fisher_merge, [], [], because="There are no states")
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: two skills, one model
#
# `tiny` is finetuned twice, apart: once to write four letters in upper case (`upper: c a f e =` is
# followed by `C A F E`), once to find the largest of four digits (`max: 3 1 6 0 =`, by `6`). For
# comparison a third run learns both from the start, with as many steps and as many examples a step,
# which is what merging wants to do without. Scores are exact answers on held-out prompts.
#
# **Before you run it, write down**: Which of the two skills survives in the plain mean? Will the
# sum of the task vectors ($\lambda = 1$ each) be better or worse than the mean ($\lambda = ½$
# each)? Does TIES help when there are only two vectors?

# %% tags=["experiment"]
base_model, tokenizer = models.load("tiny", device="cpu")
base = base_model.state_dict()
SKILLS = {
    "upper": ("abcdefgh", lambda chars: [c.upper() for c in chars]),
    "max": ("01234567", lambda chars: [max(chars)]),
}


FOLDS = {"testing": [0], "choosing": [1], "training": [2, 3, 4, 5, 6, 7]}  # no prompt is in two


def examples(
    skill: str, count: int, g: torch.Generator, fold: str = "training"
) -> tuple[Tensor, int]:
    """Tokens (count, seq) of prompts with their answers, and how many tokens an answer has."""
    alphabet, solve = SKILLS[skill]
    rows, draws = [], torch.randint(len(alphabet), (16 * count, 4), generator=g)
    mine = torch.isin((draws @ torch.tensor([1, 3, 5, 7])) % 8, torch.tensor(FOLDS[fold]))
    for picks in draws[mine][:count].tolist():
        chars = [alphabet[i] for i in picks]
        prompt, answer = (
            tokenizer.encode(start + "".join(f" {c}" for c in part) + end)
            for start, part, end in ((f"{skill}:", chars, " ="), ("", solve(chars), ""))
        )
        rows.append([tokenizer.eos, *prompt, *answer])
    return torch.tensor(rows), len(answer)


def answer_loss(model: nn.Module, tokens: Tensor, size: int) -> Tensor:
    logits = model(tokens[:, :-1])[:, -size:]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, -size:].flatten())


def finetune(skills: list[str], steps: int = 80, seed: int = 0) -> State:
    """The weights after some seconds of AdamW on 32 examples a step, shared among the skills."""
    model, g = copy.deepcopy(base_model).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            5e-4 * min(1, (step + 1) / 10) * max(0.05, 1 - step / steps)
        )
        batches = [examples(skill, 32 // len(skills), g) for skill in skills]
        optimizer.zero_grad()
        sum(answer_loss(model, *batch) for batch in batches).backward()
        optimizer.step()
    return model.state_dict()


threads = torch.get_num_threads()
torch.set_num_threads(1)  # the model is too small for more
try:
    upper, largest = finetune(["upper"]), finetune(["max"])
    joint = finetune(["upper", "max"])
finally:
    torch.set_num_threads(threads)
g = torch.Generator().manual_seed(99)
choosing, testing = (
    {skill: examples(skill, 128, g, fold) for skill in SKILLS} for fold in ("choosing", "testing")
)


@torch.no_grad()
def measure(state: State, sets: dict = testing) -> tuple[dict[str, float], dict[str, float]]:
    """For each skill: the share of exact answers, and the loss in nats a token."""
    right, nats = {}, {}
    for skill, (tokens, size) in sets.items():
        logits = torch.func.functional_call(base_model, state, (tokens[:, :-1],))[:, -size:]
        right[skill] = float((logits.argmax(-1) == tokens[:, -size:]).all(-1).double().mean())
        nats[skill] = float(F.cross_entropy(logits.flatten(0, 1), tokens[:, -size:].flatten()))
    return right, nats


print(f"{'exact answers':<24}" + "".join(f"{skill:>8}" for skill in SKILLS))
trained = {"base": base, "finetuned on upper": upper, "finetuned on max": largest, "on both": joint}
for name, state in trained.items():
    print(f"{name:<24}" + "".join(f"{share:>8.0%}" for share in measure(state)[0].values()))

# %% [markdown]
# Each finetuned model has its skill and lacks the other. Now every merge of the lesson. Where a
# method has a scale $\lambda$, it is chosen on other prompts (`choosing`) than those that judge,
# the same for both vectors; the value is printed. `fisher` needs a Fisher diagonal: squared
# gradients of single examples, with the true answers ("empirical" Fisher).

# %% tags=["experiment"]
move_upper, move_max = task_vector(base, upper), task_vector(base, largest)
moves = [move_upper, move_max]


def fisher_of(state: State, skill: str) -> State:
    """The mean over 32 examples of the squared gradient of the log-likelihood of the answer."""
    model = copy.deepcopy(base_model)
    model.load_state_dict(state)
    tokens, size = examples(skill, 32, torch.Generator().manual_seed(5))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in tokens.split(1):
        model.zero_grad()
        (size * answer_loss(model, row, size)).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / len(tokens)
    return total


def with_best_scale(vectors: list[State]) -> tuple[State, float]:
    """Base + λ · Σ vectors for the λ that gives the best worse skill on `choosing`."""

    def worse_skill(scale):
        right, nats = measure(apply_task_vectors(base, vectors, [scale] * len(vectors)), choosing)
        return min(right.values()), -sum(nats.values())

    scale = max((0.5, 0.75, 1.0, 1.5, 2.0, 3.0), key=worse_skill)
    return apply_task_vectors(base, vectors, [scale] * len(vectors)), scale


def flat(state: State) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def unflat(vector: Tensor) -> State:
    parts = vector.split([tensor.numel() for tensor in base.values()])
    return {n: p.view(t.shape) for p, (n, t) in zip(parts, base.items(), strict=True)}


coin = torch.Generator().manual_seed(7)
arc = unflat(slerp(flat(move_upper), flat(move_max), 0.5))
merges = {
    "mean": (average([upper, largest]), None),
    "slerp of the weights": (unflat(slerp(flat(upper), flat(largest), 0.5)), None),
    "slerp of the vectors": (apply_task_vectors(base, [arc], [1.0]), None),
    "fisher": (
        fisher_merge([upper, largest], [fisher_of(upper, "upper"), fisher_of(largest, "max")]),
        None,
    ),
    "sum of vectors": with_best_scale(moves),
    "TIES, density 0.2": with_best_scale([ties_merge(moves, 0.2)]),
    "TIES, density 0.8": with_best_scale([ties_merge(moves, 0.8)]),
    "DARE, p = 0.5": with_best_scale([dare(move, 0.5, coin) for move in moves]),
    "DARE, p = 0.9": with_best_scale([dare(move, 0.9, coin) for move in moves]),
}
scores = {name: measure(state)[0] for name, (state, _) in merges.items()}
print(f"{'exact answers':<24}{'upper':>8}{'max':>8}{'λ':>8}")
for name, right in scores.items():
    scale = merges[name][1]
    shown = "" if scale is None else f"{scale:.2f}"
    print(f"{name:<24}{right['upper']:>8.0%}{right['max']:>8.0%}{shown:>8}")
cosine = F.cosine_similarity(flat(move_upper), flat(move_max), dim=0)
both = F.cosine_similarity(flat(upper), flat(largest), dim=0)
print(f"\ncosine of the task vectors {cosine:.3f}, of the weights {both:.4f}")
clash = (flat(move_upper) * flat(move_max) < 0).double().mean()
print(f"entries whose signs differ: {clash:.0%}")
for skill, move in zip(SKILLS, moves, strict=True):
    top = flat(ties_merge([move], 0.2)).square().sum() / flat(move).square().sum()
    print(f"share of the squared norm in the largest fifth of the entries, {skill}: {top:.0%}")

# %% tags=["experiment", "figure"]
# Figure: what every merge keeps of the two skills
fig, ax = plot.plt.subplots(figsize=(7.2, 4.4))
dots = {name: measure(state)[0] for name, state in trained.items()} | scores
square = {"color": plot.COLORS[1], "markersize": 9, "fillstyle": "none", "markeredgewidth": 2.2}
names = sorted(dots, key=lambda n: (n not in trained, min(dots[n].values()), n))
for y, name in enumerate(names):
    low, high = dots[name]["upper"], dots[name]["max"]
    ax.plot([low, high], [y, y], color="#bbbbbb", linestyle="-", linewidth=3, zorder=1)
    ax.plot(low, y, "o", color=plot.COLORS[0], markersize=8, label="upper" if not y else None)
    ax.plot(high, y, "s", label="max" if not y else None, **square)
ax.axhline(len(trained) - 0.5, color="#555555", linestyle=":", linewidth=1)
ax.set_yticks(range(len(names)), names)
ax.set(xlabel="share of exact answers on 128 held-out prompts", xlim=(-0.03, 1.03))
ax.set_title("Two skills in one model")
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plot.caption(
    fig,
    "Below the dotted line: trained models. Above: merges, the best at the top. A merge is as good "
    "as the left one of its two marks. Methods with a scale had it chosen on other prompts.",
)
plot.plt.show()

# %% [markdown]
# A mean goes only half of each way. The next figure shows the whole plane through the base and the
# two models: every point is $\theta_0 + \lambda_1\tau_1 + \lambda_2\tau_2$. The straight way
# between the two models, on the left, is the diagonal of that plane.

# %% tags=["experiment", "figure"]
# Figure: the loss between two finetuned models, and in the plane through them and their base
fig, (left, right) = plot.plt.subplots(1, 2, figsize=(11.4, 4.2))
half = {skill: (tokens[:64], size) for skill, (tokens, size) in testing.items()}
along = {}
for skill in SKILLS:
    barrier, losses = loss_barrier(
        upper, largest, lambda s, k=skill: measure(s, half)[1][k], points=11
    )
    along[f"{skill} (barrier {barrier:.2f})"] = losses
mean_loss = lambda s: sum(measure(s, half)[1].values()) / 2
barrier, losses = loss_barrier(upper, largest, mean_loss, points=11)
along[f"mean of both (barrier {barrier:.2f})"] = losses
plot.curves(
    torch.linspace(0, 1, 11),
    along,
    xlabel="t: share of the model finetuned on max",
    ylabel="loss (nats a token of the answer)",
    title="From one model to the other",
    ax=left,
)
axis = torch.linspace(-0.25, 1.75, 9)
grid = torch.tensor(
    [[mean_loss(apply_task_vectors(base, moves, [float(x), float(y)])) for x in axis] for y in axis]
)
levels = [0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
color = plot.plt.matplotlib.colors.BoundaryNorm(levels, 256, extend="both")
filled = right.contourf(axis, axis, grid, levels=levels, cmap="Greys", norm=color, extend="both")
fig.colorbar(filled, ax=right, label="mean loss of both skills (nats)")
lines = right.contour(axis, axis, grid, levels=levels, colors="#666666", linewidths=0.6)
right.plot([1, 0], [0, 1], color=plot.COLORS[1], linestyle="-", linewidth=1.5)
for x, y, name in [
    (0, 0, "base"),
    (1, 0, "upper"),
    (0, 1, "max"),
    (0.5, 0.5, "mean"),
    (1, 1, "sum"),
]:
    right.plot(x, y, "o", color=plot.COLORS[1], markeredgecolor="black", markersize=7)
    right.annotate(
        name,
        (x, y),
        textcoords="offset points",
        xytext=(7, 6),
        fontsize=9,
        bbox={
            "boxstyle": "round,pad=0.15",
            "facecolor": "white",
            "edgecolor": "none",
            "alpha": 0.8,
        },
    )
right.set(xlabel="λ of upper", ylabel="λ of max", aspect="equal")
right.set_title("The plane of the two task vectors")
right.grid(False)
plot.caption(
    fig,
    "Left: the ends are bad at the other skill; what counts is how far the lines lie under the "
    "chord between the ends, or above it. Right: dark is bad. The mean lies on the straight way "
    "(the line), the sum beyond it.",
)
plot.plt.show()

# %% [markdown]
# **What came out**, in all of five seeds of the finetunings. (A quarter of `max` comes with the
# base: it names one of the four digits.)
#
# - *The mean* keeps `max` whole and loses most of `upper`, which at half of its way has hardly
#   begun. An average over both scores would hide that.
# - *The sum* keeps nearly all of both; the model trained on both is hardly ahead.
# - *Slerp of the weights* is the mean: the weights are so nearly parallel that the arc is a line.
#   Slerp of the *task vectors*, which are nearly orthogonal, keeps their norm: about 0.7 of each
#   in place of 0.5. That is what makes it better, not the arc.
# - *TIES* at density 0.8 comes close to the sum and is not ahead of it. At 0.2, the paper's
#   usual choice, it loses a good part of `upper` and all that finetuning brought to `max`, at the
#   best of the scales tried. The lines below the table say why: the largest fifth of the entries
#   holds about three fifths of the squared norm, less than it would of normal numbers (65 %). A
#   short finetuning with Adam moves all entries about equally far; there is no small part that is
#   the skill.

# %% [markdown]
# - *DARE* with $p$ = 0.5 costs little. With 0.9 the noise is nine times the square of
#   the entries, and more of `upper` is lost, how much by the luck of the draw. Yu et al. drop
#   nine entries in ten and more, in models ten thousand times as large, where each output is a
#   sum over many more entries.
# - *Fisher* weights take sides by the size of the gradients, and squared gradients of two tasks
#   are not on one scale: `upper` is kept and most of `max` is lost.
#
# No barrier shows anywhere: each loss along the line stays under its chord, as it should between
# two finetunings of one base. That alone does not make the mean a good merge. The plane shows where
# one is: around the sum, beyond the line.

# %% [markdown]
# ## Late checkpoints in place of a decay {#late-checkpoints}
#
# At the end of pretraining the learning rate falls, and the loss falls with it. Do averages of
# checkpoints at the *full* rate give the same, for nothing? `tiny` ships with three of them, 50
# steps apart, from before its decay. The final `tiny` saw more text too, so it has two advantages.
#
# **Write down**: is the mean better than each of the three? How much of the way to the final model
# does it go?

# %% tags=["experiment"]
held_out = data.split(data.documentation())[1]
ids = [i for text in held_out.values() for i in [tokenizer.eos, *tokenizer.encode(text)]]
windows = torch.tensor(ids[: 20 * 257]).view(20, 257)


@torch.no_grad()
def text_loss(state: State) -> float:
    """Nats a token on held-out documentation."""
    logits = torch.func.functional_call(base_model, state, (windows[:, :-1],))
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


late = {name: models.load(name, device="cpu")[0].state_dict() for name in models.CHECKPOINTS}
soup, members = greedy_soup(list(late.values()), lambda state: -text_loss(state))
results = {name.removeprefix("tiny-"): text_loss(state) for name, state in late.items()}
results |= {
    "mean of the three": text_loss(average(list(late.values()))),
    "greedy soup": text_loss(soup),
    "final, after the decay": text_loss(base),
}
for name, nats in results.items():
    print(f"{name:<24} {nats:.3f} nats a token")
print("the soup's members, in order:", [list(late)[i].removeprefix("tiny-") for i in members])
last, mean, final = (results[n] for n in ("step560", "mean of the three", "final, after the decay"))
share = (last - mean) / (last - final)
print(f"the mean goes {share:.0%} of the way from step 560 to the final model")

# %% [markdown]
# The mean is better than each of the three, and it covers most of the way from the last of them to
# the final model, for no training at all. The three see one valley from three sides, as in the
# derivation of [](#averaging-weights): were their noise independent, two thirds of their excess
# would be gone. The greedy soup takes all three in. This is one run of pretraining, judged on 20
# windows of text; Li et al. report the same for models of up to more than a hundred billion
# parameters, and use the mean to predict what a decay would give.

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number are graded, one by one.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | int]:
    """Short answers; numbers to 1 percent, whole numbers exactly.

    "noise":   four checkpoints around one minimum, with independent noise. Each has an excess loss
               of 0.08 nats on average. That of their mean, in nats?
    "lerp":    two weight vectors of norm 1 at an angle of 60°. The norm of their plain mean?
    "dare":    the variance of an entry of 0.5 after DARE with p = 0.8?
    "ties":    the trimmed values of one entry in six vectors are 3, −1, −1, −1.5, 0 and 1. What
               does TIES merge them into?
    "copies":  a network has two hidden layers of 5 and of 3 units, all of them different. In how
               many orders of its units does it compute the same function? (a whole number)
    "barrier": the losses at t = 0, ¼, ½, ¾ and 1 are 1.0, 2.0, 2.2, 2.6 and 3.0. The barrier?
    """
    ### BEGIN SOLUTION
    return {
        "noise": 0.08 / 4,
        "lerp": math.cos(math.radians(30)),
        "dare": 0.8 / 0.2 * 0.5**2,
        "ties": (3 + 1) / 2,
        "copies": math.factorial(5) * math.factorial(3),
        "barrier": 2.0 - (0.75 * 1.0 + 0.25 * 3.0),
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["noise"]
checks.kind(answer, float, what="noise")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.02,
    what="noise",
    hint="The covariance of a mean of K is that of one over K",
    mistakes={"a noise that falls as the root": 0.04, "no gain": 0.08},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["lerp"]
checks.kind(answer, float, what="lerp")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    math.sqrt(0.75),
    what="lerp",
    hint="‖a + b‖² = 2 + 2·cos 60°",
    mistakes={"slerp's": 1.0, "the cosine of the whole angle": 0.5, "a right angle": 0.5**0.5},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["dare"]
checks.kind(answer, float, what="dare")
### BEGIN HIDDEN TESTS
outcomes = [(0.2, 0.5 / 0.2), (0.8, 0.0)]
checks.number(
    answer,
    sum(chance * value**2 for chance, value in outcomes) - 0.25,
    what="dare",
    hint="With probability 0.2 the entry is 2.5, else 0",
    mistakes={"the second moment": 1.25, "p and 1 − p exchanged": 0.0625, "the factor alone": 4.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["ties"]
checks.kind(answer, float, what="ties")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2.0,
    what="ties",
    hint="The sum decides the sign, and only its side is averaged",
    mistakes={
        "the side of most votes": -3.5 / 3,
        "zeros counted": 4 / 6,
        "a sum": 4.0,
        "the mean": 0.5 / 6,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["copies"]
checks.kind(answer, int, what="copies")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    720,
    to=0,
    what="copies",
    hint="The layers' orders are chosen independently",
    mistakes={"a sum": 126, "all eight units together": 40320, "one layer": 120},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["barrier"]
checks.kind(answer, float, what="barrier")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.5,
    what="barrier",
    hint="Take off the straight line from 1.0 to 3.0 at each place",
    mistakes={"the middle": 0.2, "the rise above the mean of the ends": 1.0, "nothing": 0.0},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Two teams finetuned with LoRA (lesson 25): each has factors $A_i$ and $B_i$
# and adds $B_iA_i$ to a weight. May you average the $A$s and the $B$s? What do you do instead?

# %% [markdown] answer="lora"
# No: ½(B₁ + B₂) · ½(A₁ + A₂) = ¼(B₁A₁ + B₂A₂ + B₁A₂ + B₂A₁). Half of it is cross terms that no
# training has seen, and the wanted part has half its size. Nor do the factors have names: B·M and
# M⁻¹·A give the same product for every invertible M, a worse freedom than exchanged units. Merge
# the products, which are task vectors: ½(B₁A₁ + B₂A₂) has up to twice the rank. It is kept exactly
# by stacking the factors, ½[B₁ B₂]·[A₁; A₂], or approximately, at the old rank, by a truncated
# singular value decomposition.

# %% [markdown]
# **Open question 2.** A merge of six models tops a public leaderboard. Its authors tried 400
# settings of scales and densities and published the best. What do you want to know before you
# believe it, and what would you measure?

# %% [markdown] answer="leaderboard"
# On which data the settings were chosen. The best of 400 noisy scores is high by luck alone: with n
# questions one score has a standard error of about ½/√n, and the largest of 400 draws lies three of
# these above the mean. If the leaderboard's questions did the choosing, its score is a training
# score. So ask for a score on questions that took no part, with its interval, beside that of the
# best single member chosen with the same care. Also, whether a member has seen the benchmark: a
# merge inherits contamination silently. And what was not measured: a merge may lose abilities (long
# context, refusals, the end-of-turn token) that no score of the board covers.

# %% [markdown]
# **Open question 3.** Your merge of a chat model and a code model writes good code and does not
# stop at the end of its answer. Where do you look?

# %% [markdown] answer="stops"
# At what both have and have differently. Are tokenizer, special tokens and chat template the same?
# If one team added tokens, rows of the embedding belong to different tokens, or exist in one model
# only and are a mean with untrained noise. An end token that one model never wrote has a task
# vector of 0 there, so a mean halves the other's. Then walk the path: the share of answers that
# end, against λ, on a few prompts of each kind. If it falls off between the models, take embedding
# and head from the chat model, or give those two tensors a scale of their own.

# %% [markdown]
# ## References
#
# - **Wortsman et al. 2022**, *Model soups*, arXiv:2203.05482. Uniform and greedy soups. How close a
#   soup comes to an ensemble follows from how flat the loss is and how sure the predictions are.
# - **Ilharco et al. 2022**, *Editing Models with Task Arithmetic*, arXiv:2212.04089. Sections 3 and
#   4: negation and addition; and the cosines between task vectors, most of them near 0.
# - **Yadav et al. 2023**, *TIES-Merging*, arXiv:2306.01708. The figures of what interferes,
#   algorithm 1, and the ablation of the three steps.
# - **Yu et al. 2023**, *Language Models are Super Mario*, arXiv:2311.03099. DARE, and up to which
#   drop rate finetuned models of several sizes go along.
# - **Matena and Raffel 2021**, *Merging Models with Fisher-Weighted Averaging*, arXiv:2111.09832.
#   Merging as the maximum of a product of Gaussian posteriors; a plain mean makes them all alike.
# - **Frankle et al. 2020**, *Linear Mode Connectivity and the Lottery Ticket Hypothesis*,
#   arXiv:1912.05671. How early in training two runs come to share a valley.
# - **Entezari et al. 2021**, *The Role of Permutation Invariance in Linear Mode Connectivity of
#   Neural Networks*, arXiv:2110.06296. The barrier above the chord, and the conjecture that units
#   in the right order leave none.
# - **Ainsworth et al. 2022**, *Git Re-Basin*, arXiv:2209.04836. The three ways to match units,
#   barriers against width and training time, and a counterexample to the single valley.
# - **Izmailov et al. 2018**, *Averaging Weights Leads to Wider Optima and Better Generalization*,
#   arXiv:1803.05407. Averages along one training run.
# - **Li et al. 2025**, *Model Merging in Pre-training of Large Language Models*, arXiv:2505.12082.
#   Late checkpoints at a constant rate in place of a decay, at scale.
#
# In production: PyTorch, `torch.optim.swa_utils`, `AveragedModel`; Hugging Face PEFT,
# `add_weighted_adapter` with `combination_type` "ties" or "dare_linear"; arcee-ai/mergekit,
# `mergekit/merge_methods` (its slerp, trimming and rescaling differ from ours as told above).
