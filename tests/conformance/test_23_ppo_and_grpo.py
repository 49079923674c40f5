"""Lesson 23 against Liger-Kernel's loss on log-probabilities, PyTorch's distributions, and plain sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

LIGER = "liger-kernel LigerFusedLinearGRPOFunction.ppo_loss_fn"
LENGTH = 12  # the longest answer that average="constant" divides by


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("23")


@pytest.fixture(scope="module")
def ppo_loss_fn(lesson):
    """Liger's loss on log-probabilities. It imports Triton, which the lesson's `llm40` has to see first."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="Triton exists for Linux only")
    return liger.LigerFusedLinearGRPOFunction.ppo_loss_fn


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, prompts: int = 3, group: int = 4, seq: int = 9) -> dict[str, torch.Tensor]:
    """Answers of unequal lengths: log-probabilities of three policies, advantages, a mask, weights; in float64."""
    g = generator(seed)
    old = -torch.rand(prompts * group, seq, generator=g, dtype=torch.float64) * 3 - 0.05
    lengths = torch.randint(1, seq + 1, (prompts * group, 1), generator=g)
    return {
        "logp": old + 0.4 * torch.randn(old.shape, generator=g, dtype=torch.float64),
        "old": old,
        "ref": old + 0.5 * torch.randn(old.shape, generator=g, dtype=torch.float64),
        "rewards": torch.rand(prompts, group, generator=g, dtype=torch.float64),
        "mask": torch.arange(seq) < lengths,
        "weights": torch.rand(old.shape, generator=g, dtype=torch.float64) + 0.3,
    }


# A row of the lesson's map: settings of grpo_loss, of Liger's loss, and of group_advantages.
MAP = {
    "GRPO": (
        {"clip": (0.2, 0.2), "average": "sequence", "beta": 0.04},
        {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.04},
        "sample",
    ),
    "DAPO": (
        {"clip": (0.2, 0.28), "average": "token"},
        {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0},
        "sample",
    ),
    "Dr. GRPO": (
        {"clip": (0.2, 0.2), "average": "constant", "max_length": LENGTH},
        {"loss_type": "dr_grpo", "max_completion_length": LENGTH, "beta": 0.0},
        None,
    ),
    "GSPO": (
        {"ratio": "sequence", "clip": (3e-4, 4e-4), "average": "sequence"},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
            "beta": 0.0,
        },
        "sample",
    ),
    "V3.2": (
        {"clip": (0.2, 0.2), "average": "sequence", "beta": 0.1, "kl": "k3_corrected"},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
        None,
    ),
    "sampler's weights, and a KL": (
        {"clip": (0.1, 0.3), "average": "token", "beta": 0.3},
        {"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.3, "beta": 0.3},
        "population",
    ),
}


@pytest.mark.parametrize("name", MAP)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_map(lesson, ppo_loss_fn, agrees, name, seed):
    """Loss and gradient of each row of the map."""
    mine, theirs, scale = MAP[name]
    x = batch(seed)
    weights = x["weights"] if name.startswith("sampler") else None
    advantages = lesson.group_advantages(x["rewards"], scale).flatten()
    leaf = x["logp"].clone().requires_grad_()
    loss = lesson.grpo_loss(leaf, x["old"], advantages, x["mask"], ref_logp=x["ref"], weights=weights, **mine)
    (gradient,) = torch.autograd.grad(loss, leaf)
    other = x["logp"].clone().requires_grad_()
    full = x["mask"].double()
    expected, _ = ppo_loss_fn(
        other,
        full,
        advantages,
        full,
        ref_per_token_logps=x["ref"],
        old_per_token_logps=x["old"],
        vllm_is_ratio=weights,
        **theirs,
    )
    (slope,) = torch.autograd.grad(expected, other)
    agrees(f"grpo_loss, {name}", LIGER, loss, expected, 1e-9)
    agrees(f"gradient of grpo_loss, {name}", LIGER, gradient, slope, 1e-9)


def test_clipped_share(lesson, ppo_loss_fn, agrees):
    """ppo_losses' clipped share is what Liger reports, and its policy loss is grpo_loss averaged over tokens."""
    x = batch(3)
    advantages = lesson.group_advantages(x["rewards"]).flatten()
    full = x["mask"].double()
    expected, metrics = ppo_loss_fn(
        x["logp"], full, advantages, full, old_per_token_logps=x["old"], loss_type="bnpo", beta=0.0
    )
    zero = torch.zeros_like(x["logp"])
    spread = advantages[:, None].expand_as(zero)
    policy, _, clipped = lesson.ppo_losses(x["logp"], x["old"], spread, zero, zero, zero, x["mask"])
    assert 0.05 < float(clipped) < 0.95
    agrees("ppo_losses, policy", LIGER, policy, expected, 1e-9)
    agrees("ppo_losses, clipped share", LIGER, clipped, metrics[-1].double(), 1e-9)


def test_liger_corrects_the_kl_of_a_sequence_otherwise(lesson, ppo_loss_fn):
    """Where the ratio is the sequence's, Liger's corrected KL takes that ratio and the lesson the token's own."""
    x = batch(4)
    full = x["mask"].double()
    zero = torch.zeros(len(full), dtype=torch.float64)
    theirs, _ = ppo_loss_fn(
        x["logp"],
        full,
        zero,
        full,
        ref_per_token_logps=x["ref"],
        old_per_token_logps=x["old"],
        loss_type="grpo",
        importance_sampling_level="sequence",
        beta=1.0,
        use_bias_correction_kl=True,
    )
    mine = lesson.grpo_loss(
        x["logp"], x["old"], zero, x["mask"], ratio="sequence", ref_logp=x["ref"], beta=1.0, kl="k3_corrected"
    )
    assert not math.isclose(float(mine), float(theirs), rel_tol=1e-3)


@pytest.mark.parametrize("actions", [6, 17])
def test_kl_by_enumeration(lesson, agrees, actions):
    """The claims of the table: values and gradients of both KLs, by torch.distributions and autograd."""
    g = generator(actions)
    logits, ref, sampler = (torch.randn(actions, generator=g, dtype=torch.float64) for _ in range(3))
    leaf = logits.clone().requires_grad_()
    pi, q = Categorical(logits=leaf), Categorical(logits=ref)
    forward, backward = kl_divergence(pi, q), kl_divergence(q, pi)
    (to_ref,) = torch.autograd.grad(forward, leaf, retain_graph=True)
    (from_ref,) = torch.autograd.grad(backward, leaf)
    peer = "torch.distributions kl_divergence"
    for kind, other, value, gradient in [
        ("k1", None, forward, torch.zeros_like(logits)),
        ("k2", None, None, to_ref),
        ("k3", None, forward, from_ref),
        ("k3_corrected", None, forward, to_ref),
        ("k3_corrected", sampler, forward, to_ref),
    ]:
        got = lesson.kl_by_enumeration(logits, ref, kind, other)
        name = f"kl_by_enumeration, {kind}{' off policy' if other is not None else ''}"
        if value is not None:
            agrees(name, peer, got[0], value, 1e-12)
        agrees(f"{name}, gradient", peer, got[1], gradient, 1e-12)


def test_gae_and_returns(lesson, agrees):
    """λ = 1 without ends: discounted sums by a linear solve; and λ in between by the matrix (1 − γλ shift)⁻¹."""
    g = generator(5)
    rewards, values = (torch.randn(4, 30, generator=g, dtype=torch.float64) for _ in range(2))
    last = torch.randn(4, 1, generator=g, dtype=torch.float64)
    after = torch.cat([values[:, 1:], last], dim=1)
    no = torch.zeros(4, 30, dtype=torch.bool)
    for gamma, lam in ((0.97, 1.0), (0.99, 0.95), (1.0, 0.3)):
        shift = torch.eye(30, dtype=torch.float64) - gamma * lam * torch.diag(torch.ones(29, dtype=torch.float64), 1)
        delta = rewards + gamma * after - values
        expected = torch.linalg.solve(shift, delta.T).T
        agrees(
            "gae", "torch.linalg.solve of the recursion", lesson.gae(rewards, values, after, no, no, gamma, lam)[0],
            expected, 1e-10,
        )  # fmt: skip


def test_group_advantages_of_the_task(lesson, agrees):
    """Rewards 0.8, 0.9, 0.5, 0.8 with both deviations, in numbers worked by hand."""
    r = torch.tensor([[0.8, 0.9, 0.5, 0.8]], dtype=torch.float64)
    population = torch.tensor([[1 / 3, 1, -5 / 3, 1 / 3]], dtype=torch.float64)
    agrees("group_advantages, population", "by hand", lesson.group_advantages(r, "population", 0.0), population, 1e-12)
    agrees("group_advantages, sample", "by hand", lesson.group_advantages(r, eps=0.0), population * 0.75**0.5, 1e-12)
    normal = F.layer_norm(r, (4,), eps=0.0)
    agrees("group_advantages, population", "F.layer_norm", lesson.group_advantages(r, "population", 0.0), normal, 1e-12)


def test_response_logps_of_what_generate_draws(lesson, agrees):
    """transformers' log-softmax after its temperature warper is the distribution that is sampled."""
    from transformers import TemperatureLogitsWarper

    logits = 3 * torch.randn(3, 7, 11, generator=generator(6), dtype=torch.float64)
    tokens = torch.randint(0, 11, (3, 7), generator=generator(7))
    warped = TemperatureLogitsWarper(0.7)(None, logits[:, :-1]).log_softmax(-1)
    expected = warped.gather(-1, tokens[:, 1:, None])[..., 0]
    agrees(
        "response_logps", "transformers TemperatureLogitsWarper", lesson.response_logps(logits, tokens, 0.7),
        expected, 1e-12,
    )  # fmt: skip
