"""Lesson 40 against scipy.stats (bootstrap, permutation test, hypergeometric), torch.autograd, and enumeration."""

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import product
from statistics import mode

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm40 import models

stats = pytest.importorskip("scipy.stats")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("40")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- votes and pass@k ---


def test_votes(lesson, agrees):
    """Python's own mode (the first of the tied), and a Counter of whole-numbered weights."""
    rng = random.Random(1)
    ours, theirs = [], []
    for length in range(1, 12):
        for _ in range(20):
            ballot = [rng.choice("abcd") for _ in range(length)]
            ours.append("abcd".index(lesson.majority_vote(ballot)))
            theirs.append("abcd".index(mode(ballot)))
            votes = [rng.randrange(4) for _ in ballot]
            heavy = Counter(dict.fromkeys(ballot, 0))
            for answer, weight in zip(ballot, votes, strict=True):
                heavy[answer] += weight
            ours.append("abcd".index(lesson.weighted_vote(ballot, [w / 4 for w in votes])))
            theirs.append("abcd".index(heavy.most_common(1)[0][0]))
            ours.append("abcd".index(lesson.best_of_n(ballot, votes)))
            theirs.append("abcd".index(ballot[int(np.argmax(votes))]))
    agrees("votes", "statistics.mode, Counter, argmax", torch.tensor(ours), torch.tensor(theirs), 0.0)


def test_pass_at_k(lesson, agrees):
    """One minus the hypergeometric probability of no success; HumanEval's product in NumPy."""
    cases = [
        (n, c, k) for n in (1, 2, 5, 17, 200) for c in range(0, n + 1, 1 + n // 9) for k in range(1, n + 1, 1 + n // 7)
    ]
    ours = torch.tensor([lesson.pass_at_k(*case) for case in cases], dtype=torch.float64)
    survival = torch.tensor([stats.hypergeom(n, c, k).sf(0) for n, c, k in cases], dtype=torch.float64)
    agrees("pass_at_k", "scipy.stats.hypergeom", ours, survival, 1e-10)
    product_form = [1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for n, c, k in cases]
    agrees("pass_at_k", "HumanEval's product", ours, torch.tensor(product_form, dtype=torch.float64), 1e-10)


# --- intervals and tests ---


def evaluation(seed: int, count: int, shift: float = 0.05):
    """Scores of two models, and the question of each; the questions' means, too."""
    g = generator(seed)
    each = torch.randint(1, 5, (count,), generator=g)
    questions = torch.arange(count).repeat_interleave(each)[torch.randperm(int(each.sum()), generator=g)]
    hard = torch.rand(count, generator=g, dtype=torch.float64)[questions]
    a, b = (torch.rand(len(questions), generator=g, dtype=torch.float64) * hard for _ in range(2))
    means = [torch.stack([x[questions == q].mean() for q in range(count)]) for x in (a, b + shift)]
    return a, b + shift, questions, means


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_interval(lesson, agrees, level):
    """scipy's percentile bootstrap of the questions' means, 40,000 resamples on both sides."""
    a, _, questions, (means, _) = evaluation(2, 25)
    ours = lesson.bootstrap_interval(a, questions, level, 40_000, generator(3))
    theirs = stats.bootstrap(
        (means.numpy(),), np.mean, confidence_level=level, n_resamples=40_000, method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    agrees(
        "bootstrap_interval (random)",
        "scipy.stats.bootstrap",
        torch.tensor(ours),
        torch.tensor([theirs.low, theirs.high]),
        0.01,
    )


@pytest.mark.parametrize("count", [3, 8, 12])
def test_paired_test_exact(lesson, agrees, count):
    """scipy's permutation test of paired samples goes through all 2^Q exchanges as well."""
    a, b, questions, means = evaluation(5 + count, count)
    ours = lesson.paired_test(a, b, questions, 1, generator(6))
    theirs = stats.permutation_test(
        [m.numpy() for m in means], lambda x, y: np.abs(np.sum(x - y)), permutation_type="samples",
        n_resamples=np.inf, alternative="greater",
    ).pvalue  # fmt: skip
    agrees("paired_test, exact", "scipy.stats.permutation_test", torch.tensor(ours), torch.tensor(theirs), 1e-12)


def test_paired_test_random(lesson, agrees):
    """Beyond twelve questions: scipy's random flips, 20,000 on both sides, and its rule (h + 1)/(R + 1)."""
    a, b, questions, means = evaluation(7, 30, shift=0.0)
    ours = lesson.paired_test(a, b, questions, 20_000, generator(8))
    theirs = stats.permutation_test(
        [m.numpy() for m in means], lambda x, y: np.abs(np.sum(x - y)), permutation_type="samples",
        n_resamples=20_000, alternative="greater", rng=np.random.default_rng(9),
    ).pvalue  # fmt: skip
    agrees("paired_test (random)", "scipy.stats.permutation_test", torch.tensor(ours), torch.tensor(theirs), 0.06)
    signs = lesson.paired_test(torch.ones(40), torch.zeros(40), torch.arange(40), 999, generator(9))
    agrees("paired_test, least p", "1/(R + 1)", torch.tensor(signs), torch.tensor(1 / 1000), 1e-12)


def test_paired_test_is_a_sign_test_for_single_answers(lesson, agrees):
    """With differences of −1, 0 and 1 it is the two-sided binomial (McNemar's exact) test."""
    better, worse, even = 7, 2, 3
    gaps = torch.tensor([1.0] * better + [-1.0] * worse + [0.0] * even)
    ours = lesson.paired_test(gaps.clamp(min=0), (-gaps).clamp(min=0), torch.arange(12), 1, generator(1))
    theirs = stats.binomtest(better, better + worse).pvalue
    agrees("paired_test, one answer each", "scipy.stats.binomtest", torch.tensor(ours), torch.tensor(theirs), 1e-12)


# --- the reward ---


def test_verifiable_reward(lesson, agrees):
    """Python's Fraction, on numbers written in every way that the grammar has."""
    rng, ours, theirs = random.Random(10), [], []
    for _ in range(400):
        value = Fraction(rng.randrange(-(10**7), 10**7), rng.choice((1, 1, 2, 4, 5, 8)))
        other = value if rng.random() < 0.5 else value + Fraction(1, rng.choice((1, 8, 10**6)))
        shown = rng.choice(
            [
                f"{'-' if value < 0 else ''}{abs(value.numerator) * 3}/{value.denominator * 3}",
                f"{float(value):,.3f}",
                f" +{float(value):.3f}" if value >= 0 else f"−{float(-value):.3f}\n",
            ]
        )
        text = f"so <answer>{shown}</answer>"
        ours.append(
            lesson.verifiable_reward(text, f"{'-' if other < 0 else ''}{abs(other.numerator)}/{other.denominator}")
        )
        theirs.append(float(value == other))
    assert 100 < sum(theirs) < 300
    agrees("verifiable_reward", "fractions.Fraction", torch.tensor(ours), torch.tensor(theirs), 0.0)


def test_calculator(lesson, agrees):
    """The calculator that is given to the agent, against Python's own arithmetic on fractions."""
    rng, ours, theirs = random.Random(11), [], []

    def expression(depth: int) -> str:
        if depth == 0:
            return str(rng.randrange(1, 20))
        left, right = expression(depth - 1), expression(rng.randrange(depth))
        sign = rng.choice("+-*/")
        return rng.choice((f"{left} {sign} {right}", f"({left}){sign}({right})", f"-({left} {sign} {right})"))

    while len(ours) < 200:
        text = expression(3)
        try:
            want = eval(re_fraction(text))
        except ZeroDivisionError:
            continue
        ours.append(float(Fraction(lesson.calculator(text))))
        theirs.append(float(want))
    agrees(
        "calculator", "Python", torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64), 0.0
    )


def re_fraction(text: str) -> str:
    """The expression with Fraction(...) around each number."""
    return "".join(f"Fraction({part})" if part.isdigit() else part for part in split_digits(text))


def split_digits(text: str) -> list[str]:
    parts: list[str] = []
    for character in text:
        if parts and character.isdigit() and parts[-1].isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return parts


# --- search ---


def test_mcts_finds_the_best_of_all(lesson, agrees):
    """Every way to play three numbers of Countdown, listed."""
    ours, theirs = [], []
    for numbers, target in product([(1, 3, 4), (2, 5, 9), (6, 6, 8)], (7, 24, 60)):
        game, start = lesson.Countdown(target), tuple(map(Fraction, numbers))
        ours.append(lesson.mcts(game, start, 900, 3.0, generator(target))[1])
        theirs.append(best_by_listing(game, start))
    agrees("mcts, best reward", "enumeration", torch.tensor(ours), torch.tensor(theirs), 1e-12)


def best_by_listing(game, position) -> float:
    moves = game.moves(position)
    if not moves:
        return game.reward(position)
    return max(best_by_listing(game, game.play(position, move)) for move in moves)


# --- the recipe ---


def test_weighted_step_has_the_gradient_of_grpo(lesson, agrees):
    """At a ratio of 1 the clipped objective, written out, has the gradient that the lesson's step takes."""
    torch.manual_seed(12)
    config = models.Config(vocab_size=11, hidden_size=16, layers=1, heads=2, kv_heads=1, mlp_size=24)
    model = models.Llama(config)
    examples = [
        lesson.Example([3, 4], [5, 0]),
        lesson.Example([3, 4], [6, 7, 8]),
        lesson.Example([2], [9]),
        lesson.Example([2], [1, 0]),
    ]
    advantages = torch.tensor([1.2, -1.2, 0.4, -0.4])
    before = [p.detach().clone() for p in model.parameters()]
    lesson.weighted_step(model, torch.optim.SGD(model.parameters(), lr=1.0), examples, advantages)
    taken = torch.cat([(old - new.detach()).flatten() for old, new in zip(before, model.parameters(), strict=True)])
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    objective = torch.zeros(())
    for example, advantage in zip(examples, advantages, strict=True):
        ids = torch.tensor([example.prompt + example.answer])
        logp = F.log_softmax(model(ids)[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        logp = logp[len(example.prompt) - 1 :]
        ratio = (logp - logp.detach()).exp()
        objective = objective + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(-objective / 4, list(model.parameters()))])
    gradient = gradient / max(1.0, float(gradient.norm()))
    agrees("weighted_step", "GRPO's clipped objective, by autograd", taken, gradient, 1e-4)


def test_two_state_chain(lesson, agrees):
    """The formula of budget forcing against powers of the transition matrix."""
    r, w, start = 0.2, 0.1, 0.5
    step = torch.tensor([[1 - r, r], [w, 1 - w]], dtype=torch.float64)
    state = torch.tensor([1 - start, start], dtype=torch.float64)
    powers = torch.stack([(state @ torch.linalg.matrix_power(step, m))[1] for m in range(8)])
    limit = r / (r + w)
    formula = torch.tensor([limit + (1 - r - w) ** m * (start - limit) for m in range(8)], dtype=torch.float64)
    agrees("two-state chain", "matrix powers", formula, powers, 1e-12)
    agrees('key question "wait"', "matrix powers", torch.tensor(lesson.questions()["wait"]), powers[2].float(), 1e-6)


def test_key_questions(lesson, agrees):
    answers = lesson.questions()
    want = {
        "ten": stats.hypergeom(10, 3, 5).sf(0),
        "flips": stats.binomtest(8, 9).pvalue,
        "kept": stats.binom(8, 0.25).sf(0),
        "clusters": math.sqrt(3200 / 200),
    }
    agrees(
        "key questions",
        "scipy.stats",
        torch.tensor([answers[name] for name in want]),
        torch.tensor(list(want.values()), dtype=torch.float32),
        1e-6,
    )
    tie = answers["even"] * math.sqrt(math.log(50))
    agrees(
        'key question "even"',
        "both sides of UCT",
        torch.tensor(0.6 + tie / math.sqrt(30)),
        torch.tensor(0.5 + tie / math.sqrt(20)),
        1e-6,
    )
