"""Lesson 24 against liger-kernel's static loss functions (DPO, robust DPO, ORPO, SimPO, CPO, KTO), transformers, and
closed forms where no library has the function (cDPO by two of its values, IPO, the optimal policy by enumeration)."""

import math

import pytest
import torch
import torch.nn.functional as F

import llm40  # noqa: F401  before liger_kernel, which imports Triton

pytest.importorskip("liger_kernel", reason="Triton exists for Linux only")

from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

BATCH = 7
PAIRS = torch.zeros(2 * BATCH, 3)  # liger-kernel reads the number of pairs off the targets' shape


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("24")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_probabilities(seed: int, count: int) -> list[torch.Tensor]:
    g = generator(seed)
    return [-1 - 30 * torch.rand(BATCH, generator=g, dtype=torch.float64) for _ in range(count)]


def lengths(seed: int) -> list[torch.Tensor]:
    g = generator(seed)
    return [torch.randint(1, 25, (BATCH,), generator=g).double() for _ in range(2)]


def compare(agrees, what, peer, mine, theirs, inputs, tolerance=1e-12):
    """Value and gradients of both in the same leaves."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    a, b = mine(*leaves), theirs(*leaves)
    agrees(what, peer, a, b, tolerance)
    pair = zip(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves), strict=True)
    for x, y in pair:
        agrees(f"{what}, gradients", peer, x, y, tolerance)


# --- DPO ---


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_dpo(lesson, agrees, beta):
    pc, pr, rc, rr = log_probabilities(1, 4)

    def liger(a, b):
        return LigerFusedLinearDPOFunction.preference_loss_fn(a, b, PAIRS, rc, rr, beta=beta)[0]

    compare(
        agrees, "dpo_loss", "liger-kernel DPO", lambda a, b: lesson.dpo_loss(a, b, rc, rr, beta)[0], liger, (pc, pr)
    )
    _, chosen, rejected = lesson.dpo_loss(pc, pr, rc, rr, beta)
    _, liger_chosen, liger_rejected = LigerFusedLinearDPOFunction.preference_loss_fn(pc, pr, PAIRS, rc, rr, beta=beta)
    agrees("dpo_loss, chosen rewards", "liger-kernel DPO", chosen, liger_chosen, 1e-12)
    agrees("dpo_loss, rejected rewards", "liger-kernel DPO", rejected, liger_rejected, 1e-12)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_label_smoothing(lesson, agrees, eps):
    """cDPO is liger-kernel's CPO with smoothing, on log-ratios. Robust DPO is put together from two values."""
    pc, pr, rc, rr = log_probabilities(2, 4)

    def cpo(a, b):
        ratios = a - rc, b - rr
        return LigerFusedLinearCPOFunction.preference_loss_fn(*ratios, PAIRS, beta=0.2, label_smoothing=eps)[0]

    compare(
        agrees,
        "dpo_loss, label smoothing (cDPO)",
        "liger-kernel CPO on log-ratios",
        lambda a, b: lesson.dpo_loss(a, b, rc, rr, 0.2, eps)[0],
        cpo,
        (pc, pr),
    )
    up, down = lesson.dpo_loss(pc, pr, rc, rr, 0.2)[0], lesson.dpo_loss(pr, pc, rr, rc, 0.2)[0]
    robust, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
        pc, pr, PAIRS, rc, rr, beta=0.2, loss_type="robust", label_smoothing=eps
    )
    mine = ((1 - eps) * up - eps * down) / (1 - 2 * eps)
    agrees("robust DPO from two dpo_loss", "liger-kernel DPO, robust", mine, robust, 1e-12)


def test_gradient_weight(lesson, agrees):
    """β σ(r̂_l − r̂_w), read off liger-kernel's gradient, is the weight inside logprob_rates."""
    g = generator(3)
    features, theta = torch.randn(5, 3, generator=g).double(), torch.randn(3, generator=g).double()
    ref = torch.randn(5, generator=g).double().log_softmax(0)
    leaf = theta.clone().requires_grad_()
    log_p = (features @ leaf).log_softmax(0)
    loss, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
        log_p[2:3], log_p[4:5], torch.zeros(2, 1), ref[2:3], ref[4:5], beta=0.7
    )
    (slope,) = torch.autograd.grad(loss, leaf)
    _, expected = torch.func.jvp(lambda t: (features @ t).log_softmax(0), (theta,), (-slope,))
    rates = lesson.logprob_rates(features, theta, ref, 2, 4, 0.7)
    agrees("logprob_rates", "gradient of liger-kernel DPO, forward mode", rates, expected, 1e-12)


# --- the variants ---


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.7, 1.6)])
def test_simpo(lesson, agrees, beta, gamma):
    pc, pr = log_probabilities(4, 2)
    n, m = lengths(4)
    compare(
        agrees,
        "simpo_loss",
        "liger-kernel SimPO",
        lambda a, b: lesson.simpo_loss(a, b, n, m, beta, gamma),
        lambda a, b: LigerFusedLinearSimPOFunction.preference_loss_fn(a / n, b / m, PAIRS, beta=beta, gamma=gamma)[0],
        (pc, pr),
    )


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_orpo(lesson, agrees, weight):
    """liger-kernel's penalty; the NLL is added by hand, response by response, as in the paper."""
    pc, pr = log_probabilities(5, 2)
    n, m = lengths(5)

    def liger(a, b):
        return LigerFusedLinearORPOFunction.preference_loss_fn(a / n, b / m, PAIRS, beta=weight)[0] - (a / n).mean()

    compare(
        agrees,
        "orpo_loss",
        "liger-kernel ORPO, NLL added",
        lambda a, b: lesson.orpo_loss(a, b, n, m, weight),
        liger,
        (pc, pr),
    )


def test_log1mexp(lesson, agrees):
    x = -torch.logspace(-12, 2, 200, dtype=torch.float64)
    expected = torch.tensor(
        [math.log(-math.expm1(v)) if v > -0.5 else math.log1p(-math.exp(v)) for v in x.tolist()], dtype=x.dtype
    )
    agrees("log1mexp, float64", "math.expm1, math.log1p", lesson.log1mexp(x), expected, 1e-12)
    agrees("log1mexp, float32", "math.expm1, math.log1p", lesson.log1mexp(x.float()), expected, 1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_kto(lesson, agrees, beta):
    policy, ref, *others = log_probabilities(6, 4)
    others[0] = others[0] + 4
    desirable = torch.tensor([True, False, False, True, True, False, True])
    z0 = lesson.kto_loss(policy, ref, desirable, *others, beta)[1]
    agrees("kto_loss, z0", "its definition", z0, (others[0] - others[1]).mean().clamp(min=0), 1e-12)
    assert z0 > 0
    compare(
        agrees,
        "kto_loss",
        "liger-kernel KTO, kl = z0",
        lambda a: lesson.kto_loss(a, ref, desirable, *others, beta)[0],
        lambda a: LigerFusedLinearKTOFunction.preference_loss_fn(
            a, desirable, torch.zeros(BATCH, 3), ref_log_prob_chunk=ref, beta=beta, kl=z0
        )[0],
        (policy,),
    )


def test_ipo_closed_form(lesson, agrees):
    """No library function: liger-kernel refuses IPO, which needs the lengths. Its minimum is known: gap = 1/(2τ)."""
    pc, pr, rc, rr = log_probabilities(7, 4)
    n, m = lengths(7)
    gap = (pc - rc) / n - (pr - rr) / m
    agrees(
        "ipo_loss, means",
        "mse_loss to 1/(2τ)",
        lesson.ipo_loss(pc, pr, rc, rr, n, m, 0.3),
        F.mse_loss(gap, torch.full_like(gap, 1 / 0.6)),
        1e-12,
    )
    at = pr - rr + rc + 1 / 0.6
    agrees(
        "ipo_loss, sums, at its minimum", "0", lesson.ipo_loss(at, pr, rc, rr, tau=0.3), torch.zeros(()).double(), 1e-12
    )
    with pytest.raises(NotImplementedError):
        LigerFusedLinearDPOFunction.preference_loss_fn(pc, pr, PAIRS, rc, rr, loss_type="ipo")


# --- log-probabilities, and the optimum ---


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprob(lesson, agrees, average):
    """liger-kernel takes labels that are shifted already, and hidden states: an identity for a head gives logits."""
    g = generator(8)
    logits = torch.randn(2 * BATCH, 9, 13, generator=g)
    labels = torch.randint(0, 13, (2 * BATCH, 9), generator=g)
    for row in range(2 * BATCH):
        labels[row, : row % 4] = lesson.IGNORE
        labels[row, 9 - row % 3 :] = lesson.IGNORE
    chosen, rejected, *_ = LigerFusedLinearPreferenceBase.chunk_forward(
        logits[:, :-1], torch.eye(13), labels[:, 1:], average_log_prob=average, compute_nll_loss=False
    )
    agrees(
        f"sequence_logprob{', average' if average else ''}",
        "liger-kernel chunk_forward",
        lesson.sequence_logprob(logits, labels, average),
        torch.cat([chosen, rejected]),
        1e-6,
    )


def test_optimal_policy(lesson, agrees):
    """The maximum over a fine grid of the simplex, and gradient ascent from the reference."""
    ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    reward = torch.tensor([0.0, 0.4, 1.1], dtype=torch.float64)
    best = lesson.optimal_policy(ref, reward, 0.5)
    a, b = torch.meshgrid(*[torch.linspace(0.001, 0.998, 998, dtype=torch.float64)] * 2, indexing="ij")
    grid = torch.stack([a, b, 1 - a - b], -1).flatten(0, 1)
    grid = grid[grid[:, 2] > 0.0005]
    value = (grid * reward).sum(-1) - 0.5 * (grid * (grid / ref).log()).sum(-1)
    agrees("optimal_policy", "the best of a grid of half a million", best, grid[value.argmax()], 3e-3)
    logits = ref.log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def minus_objective():
        optimizer.zero_grad()
        p = logits.softmax(0)
        loss = -(p * reward).sum() + 0.5 * (p * (p / ref).log()).sum()
        loss.backward()
        return loss

    optimizer.step(minus_objective)
    agrees("optimal_policy", "torch.optim.LBFGS on the objective", best, logits.softmax(0), 1e-6)


def test_train_dpo_step(lesson, agrees):
    """One step on a model of the course against the same step with liger-kernel's loss."""
    from llm40 import models

    config = models.Config(vocab_size=31, hidden_size=16, layers=1, heads=2, kv_heads=1, mlp_size=24)
    torch.manual_seed(0)
    model, reference = models.Llama(config), models.Llama(config)
    other = models.Llama(config)
    other.load_state_dict(model.state_dict())
    prompts = [[1, 2], [3], [4, 5, 6]]
    chosen = lesson.rectangle(prompts, [[7, 8, 0], [9], [10, 0]])
    rejected = lesson.rectangle(prompts, [[11], [12, 13, 14, 0], [15]])
    lesson.train_dpo(model, [(*chosen, *rejected)], lr=1e-3, beta=0.4, reference=reference)

    def logp(m, tokens, labels):
        each = F.cross_entropy(m(tokens)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return -each.sum(1)

    pc, pr, rc, rr = (logp(m, *part) for m in (other, reference) for part in (chosen, rejected))
    loss, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
        pc, pr, torch.zeros(6, 1), rc.detach(), rr.detach(), beta=0.4
    )
    loss.backward()
    torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0).step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        agrees("train_dpo, parameters after a step", "liger-kernel DPO and AdamW", a, b, 1e-4)
        assert a.shape == b.shape, name
