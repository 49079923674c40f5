"""Lesson 22 against transformers' sequence classifier, scipy, exact enumeration and closed forms.

TRL's reward loss with margin and centering is three lines inside a trainer's method; it is written out here. Liger's
Bradley–Terry does not exist: its nearest is DPO's loss, which is Bradley–Terry on scaled log-ratios.
"""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from twins import llama_config

import llm40  # noqa: F401  before transformers, which imports Triton
from llm40 import models

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("22")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- rewards from comparisons ---


def test_bradley_terry_is_trl(lesson, agrees):
    """TRL's RewardTrainer: −logsigmoid(chosen − rejected − margin), plus the coefficient times the mean squared sum."""
    chosen, rejected = torch.randn(2, 64, generator=generator(1), dtype=torch.float64) * 3
    margin = torch.rand(64, generator=generator(2), dtype=torch.float64) * 2
    expected = -F.logsigmoid(chosen - rejected - margin).mean() + 0.01 * torch.mean((chosen + rejected) ** 2)
    agrees(
        "bradley_terry_loss, margin and centering",
        "TRL's formula, float64",
        lesson.bradley_terry_loss(chosen, rejected, margin, 0.01),
        expected,
        1e-12,
    )


def test_bradley_terry_is_logistic_regression(lesson, agrees):
    """Fitted to counts of wins: the maximum-likelihood strengths are those of Zermelo's iteration."""
    wins = torch.randint(1, 20, (5, 5), generator=generator(3)).double().fill_diagonal_(0)
    strength = torch.ones(5, dtype=torch.float64)
    for _ in range(5000):  # Zermelo 1929: each strength is its wins over what its games were worth
        games = (wins + wins.T) / (strength[:, None] + strength[None, :])
        strength = wins.sum(1) / games.fill_diagonal_(0).sum(1)
        strength = strength / strength.log().mean().exp()
    rewards = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor([(i, j) for i in range(5) for j in range(5) for _ in range(int(wins[i, j]))]).unbind(1)
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = lesson.bradley_terry_loss(rewards[first], rewards[second])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    agrees(
        "bradley_terry_loss, minimized over wins",
        "Zermelo's iteration",
        rewards.detach() - rewards.detach().mean(),
        strength.log(),
        1e-5,
    )


def test_liger_dpo_is_bradley_terry(lesson, agrees):
    """liger-kernel's DPO with zero reference log-probabilities: Bradley–Terry with rewards β · logp."""
    dpo = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    chosen, rejected = -torch.rand(2, 16, generator=generator(4), dtype=torch.float64) * 20
    zero = torch.zeros(16, dtype=torch.float64)
    out = dpo.preference_loss_fn(
        chosen, rejected, torch.zeros(32, 1), ref_chosen_logps=zero, ref_rejected_logps=zero, beta=0.3
    )
    loss = out[0] if isinstance(out, tuple) else out
    agrees(
        "bradley_terry_loss of 0.3 · logp",
        "liger-kernel DPO, reference 0",
        lesson.bradley_terry_loss(0.3 * chosen, 0.3 * rejected),
        loss,
        1e-12,
    )


# --- the model ---


def classifier(trunk: models.Llama, head: torch.Tensor) -> torch.nn.Module:
    config = llama_config(trunk.config, num_labels=1, pad_token_id=0)
    peer = transformers.LlamaForSequenceClassification(config).eval()
    state = {f"model.{name}": weight for name, weight in trunk.state_dict().items()}
    peer.load_state_dict(state | {"score.weight": head})
    return peer


@torch.no_grad()
def test_reward_model(lesson, agrees):
    """LlamaForSequenceClassification with one label and the weights of the shipped `tiny`."""
    trunk, _ = models.load("tiny")
    model = lesson.RewardModel(trunk).eval()
    model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator(5)) / 10)
    peer = classifier(trunk, model.head.weight)
    lengths = [9, 1, 14, 6]
    rows = [torch.randint(1, 4096, (n,), generator=generator(n)).tolist() for n in lengths]
    for side in ("right", "left"):
        fill = [[0] * (14 - n) for n in lengths]
        tokens = torch.tensor([r + f if side == "right" else f + r for r, f in zip(rows, fill, strict=True)])
        mask = tokens != 0
        expected = peer(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
        agrees(
            f"RewardModel, padding on the {side}",
            "transformers LlamaForSequenceClassification, tiny",
            model(tokens, mask),
            expected,
            2e-5,
        )


# --- calibration and length ---


def test_calibration(lesson, agrees):
    """NumPy's histogram of predictions: sums in ten equal bins, of which the last is closed."""
    rng = np.random.default_rng(6)
    p = np.concatenate([rng.uniform(size=500), [0.0, 1.0, 1.0]])
    y = rng.uniform(size=503) < p**2
    edges = np.linspace(0, 1, 11)
    gaps = np.histogram(p, edges, weights=p)[0] - np.histogram(p, edges, weights=y.astype(float))[0]
    accuracy, error = lesson.expected_calibration_error(torch.tensor(p), torch.tensor(y))
    agrees("expected_calibration_error", "numpy.histogram", error, torch.tensor(np.abs(gaps).sum() / 503), 1e-12)
    agrees("accuracy", "NumPy", accuracy, torch.tensor(((p > 0.5) == y).mean()), 1e-12)


def test_remove_length(lesson, agrees):
    stats = pytest.importorskip("scipy.stats")
    lengths = torch.randint(1, 60, (300,), generator=generator(7))
    rewards = torch.randn(300, generator=generator(8), dtype=torch.float64) + 0.05 * lengths
    line = stats.linregress(lengths.numpy(), rewards.numpy())
    expected = rewards - line.slope * (lengths - lengths.double().mean())
    agrees("remove_length", "scipy.stats.linregress", lesson.remove_length(rewards, lengths), expected, 1e-12)


# --- optimizing ---


def test_penalized_reward(lesson, agrees):
    """Summed over the answer it is the reward less β times k1, and its mean over all answers the exact objective."""
    beta = 0.4
    logits, ref_logits = torch.randn(2, 4, generator=generator(9), dtype=torch.float64)
    second, ref_second = torch.randn(2, 4, 4, generator=generator(10), dtype=torch.float64)
    reward = torch.randn(16, generator=generator(11), dtype=torch.float64)
    answers = torch.tensor(list(product(range(4), repeat=2)))

    def logp(one, two):
        first = one.log_softmax(-1)[answers[:, 0]]
        return torch.stack([first, two.log_softmax(-1)[answers[:, 0], answers[:, 1]]], dim=1)

    mine, theirs = logp(logits, second), logp(ref_logits, ref_second)
    whole = torch.ones(16, 2, dtype=torch.bool)
    p, q = mine.sum(1).exp(), theirs.sum(1).exp()
    objective = p @ reward - beta * (p * (p / q).log()).sum()
    rewards = lesson.kl_penalized_reward(reward, mine, theirs, whole, beta)
    agrees("kl_penalized_reward, mean return", "E[r] − β KL, enumerated", p @ rewards.sum(1), objective, 1e-12)
    best = (q.log() + reward / beta).softmax(0)  # the optimum: every answer's return is β log Z there
    logs = torch.stack([best.log(), torch.zeros(16)], dim=1)
    refs = torch.stack([q.log(), torch.zeros(16)], dim=1)
    at_best = lesson.kl_penalized_reward(reward, logs, refs, whole, beta).sum(1)
    log_z = beta * torch.logsumexp(q.log() + reward / beta, 0)
    agrees("kl_penalized_reward at the optimum", "β log Z for every answer", at_best, log_z.expand(16), 1e-12)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_rloo_is_unbiased(lesson, agrees, samples):
    """Over all groups of answers: mean gradient = that of the expected reward; with the mean of all, 1 − 1/K of it."""
    theta = torch.randn(5, generator=generator(12), dtype=torch.float64, requires_grad=True)
    reward = torch.randn(5, generator=generator(13), dtype=torch.float64) * 2 + 10
    groups = torch.tensor(list(product(range(5), repeat=samples)))
    logp = theta.log_softmax(0)
    weight = logp.detach().exp()[groups].prod(1)
    exact = torch.autograd.grad(-(logp.exp() @ reward), theta, retain_graph=True)[0]
    got = reward[groups]
    whole = torch.ones(samples, 1, dtype=torch.bool)
    for name, baseline, factor in (
        ("leave one out", lesson.leave_one_out_baseline(got), 1.0),
        ("mean of all", got.mean(1, keepdim=True).expand_as(got), 1 - 1 / samples),
        ("none", torch.zeros_like(got), 1.0),
    ):
        losses = torch.stack(
            [
                lesson.reinforce_loss(theta.log_softmax(0)[group][:, None], whole, r, b)
                for group, r, b in zip(groups, got, baseline, strict=True)
            ]
        )
        gradient = torch.autograd.grad(weight @ losses, theta)[0]
        agrees(f"reinforce_loss, baseline: {name}", "exact gradient, enumerated", gradient, factor * exact, 1e-10)


# --- best of n ---


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n(lesson, agrees, n):
    p = torch.rand(5, generator=generator(14), dtype=torch.float64).softmax(0)
    reward = torch.tensor([1.0, 3.0, 1.0, -2.0, 3.0])
    kept = torch.zeros(5, dtype=torch.float64)
    for draws in product(range(5), repeat=n):
        kept[max(draws, key=lambda i: reward[i])] += p[list(draws)].prod()
    mine = lesson.best_of_n(p, reward, n)
    agrees(f"best_of_n, n = {n}", f"all 5^{n} sequences of draws", mine, kept, 1e-12)
    exact = float((mine * (mine / p).log()).sum())
    assert exact <= lesson.kl_best_of_n_bound(n) + 1e-12
    fresh = p[None, :] * mine[:, None]
    wins = (reward[:, None] > reward[None, :]).double() + 0.5 * (reward[:, None] == reward[None, :])
    assert float((fresh * wins).sum()) <= n / (n + 1) + 1e-12


def test_bound_is_reached(lesson, agrees):
    """The published formula is a bound: two outcomes are far below it, two thousand are at it."""
    for outcomes, n, expected, tolerance in ((2, 2, 0.130812, 1e-5), (2000, 4, lesson.kl_best_of_n_bound(4), 1e-5)):
        p = torch.full((outcomes,), 1 / outcomes, dtype=torch.float64)
        mine = lesson.best_of_n(p, torch.arange(outcomes), n)
        exact = (torch.xlogy(mine, mine) - torch.xlogy(mine, p)).sum()
        agrees(f"KL of the best of {n} of {outcomes}", "closed form", exact, torch.tensor(expected), tolerance)


def test_estimate(lesson, agrees):
    proxy = torch.randn(2, 9, generator=generator(15))
    value = torch.randn(2, 9, generator=generator(16), dtype=torch.float64)
    for n in (1, 4, 9):
        expected = torch.stack(
            [
                torch.stack([v[max(s, key=lambda i, row=row: row[i])] for s in combinations(range(9), n)]).mean()
                for row, v in zip(proxy, value, strict=True)
            ]
        )
        agrees(
            f"best_of_n_estimate, n = {n}", "all subsets", lesson.best_of_n_estimate(proxy, value, n), expected, 1e-12
        )
    ranks = torch.arange(1, 401).double()[None]
    agrees(
        "best_of_n_estimate of ranks, 50 of 400",
        "n (N + 1)/(n + 1)",
        lesson.best_of_n_estimate(ranks, ranks, 50),
        torch.tensor([50 * 401 / 51], dtype=torch.float64),
        1e-10,
    )
    assert math.isclose(lesson.kl_best_of_n_bound(4), 0.6363, abs_tol=1e-4)
