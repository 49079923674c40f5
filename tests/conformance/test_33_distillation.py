"""Lesson 33 against Liger-Kernel's JSD, PyTorch's distributions, and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

LIGER = "liger-kernel LigerFusedLinearJSDFunction.distillation_loss_fn"
FUSED = "liger-kernel LigerFusedLinearJSDLoss"


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("33")


@pytest.fixture(scope="module")
def liger(lesson):
    """Liger's JSD module. It imports Triton, which the lesson's `llm40` has to see first."""
    from liger_kernel.chunked_loss import jsd_loss

    return jsd_loss


def batch(seed: int, rows: int = 3, seq: int = 7, vocab: int = 11) -> tuple[torch.Tensor, ...]:
    """(student, teacher, labels, mask) in float64, with ignored labels where the mask is False."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, seq, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(rows, seq, generator=g) < 0.6
    labels = torch.randint(vocab, (rows, seq), generator=g).masked_fill(~mask, -100)
    return student, teacher, labels, mask


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalized_jsd(lesson, liger, agrees, beta):
    """Value and gradient, ends included. Liger gives a sum over tokens."""
    for seed in (1, 2):
        student, teacher, labels, mask = batch(seed)
        mine, theirs = (student.clone().requires_grad_() for _ in range(2))
        loss = lesson.generalized_jsd(mine, teacher, mask, beta)
        expected = liger.LigerFusedLinearJSDFunction.distillation_loss_fn(
            theirs.flatten(0, 1), teacher.flatten(0, 1), beta, target=labels.flatten()
        )
        expected = expected / mask.sum()
        agrees(f"generalized_jsd, β {beta}", LIGER, loss, expected, 1e-12)
        (a,), (b,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs)
        agrees(f"gradient of generalized_jsd, β {beta}", LIGER, a, b, 1e-11)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.0, 0.3), (4.0, 0.9)])
def test_distillation_loss(lesson, liger, agrees, temperature, alpha):
    """Against Liger's fused loss, whose soft part has no τ² and whose hard part has the temperature."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(10, 6, generator=g)
    teacher_hidden = torch.randn(10, 9, generator=g)
    weight, teacher_weight = torch.randn(13, 6, generator=g), torch.randn(13, 9, generator=g)
    labels = torch.randint(13, (10,), generator=g)
    labels[[2, 7]] = -100
    fused = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=temperature, compiled=False
    )
    soft = fused(hidden, weight, teacher_hidden, teacher_weight, labels)
    student, teacher = (hidden @ weight.T)[None], (teacher_hidden @ teacher_weight.T)[None]
    got = lesson.distillation_loss(student, teacher, labels[None], temperature, alpha)
    hard = F.cross_entropy(student[0], labels)
    agrees(
        f"distillation_loss, τ {temperature:g}, alpha {alpha}",
        FUSED,
        got,
        alpha * temperature**2 * soft + (1 - alpha) * hard,
        1e-5,
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_token_kl(lesson, agrees, reverse):
    student, teacher, _, mask = batch(3)
    q, p = Categorical(logits=student[mask]), Categorical(logits=teacher[mask])
    expected = kl_divergence(q, p) if reverse else kl_divergence(p, q)
    got = lesson.token_kl(student, teacher, mask, reverse)
    agrees(f"token_kl, reverse={reverse}", "torch.distributions.kl_divergence", got, expected.mean(), 1e-12)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_top_k_kl(lesson, agrees, k):
    """Against the KL of two categorical distributions of k + 1 outcomes."""
    student, teacher, _, mask = batch(4)
    logp, index = teacher.log_softmax(-1).topk(k)

    def outcomes(x: torch.Tensor) -> Categorical:
        kept = x.softmax(-1).gather(-1, index)
        rest = (1 - kept.sum(-1, keepdim=True)).clamp(min=0)
        return Categorical(probs=torch.cat([kept, rest], -1)[mask][:, : 11 if k == 11 else None])

    expected = kl_divergence(outcomes(teacher), outcomes(student)).mean()
    got = lesson.top_k_kl(student, logp, index, mask)
    agrees(f"top_k_kl, k {k}", "torch.distributions.kl_divergence", got, expected, 1e-9)


def test_dense_reward_loss(lesson, agrees):
    """Discount 1 is a reversed cumulative sum; the loss at ρ = 1 is REINFORCE's."""
    g = torch.Generator().manual_seed(6)
    logp, teacher = (-torch.rand(4, 6, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [4]])
    logp.requires_grad_()
    loss, advantages = lesson.dense_reward_loss(logp, logp.detach(), teacher, mask, 1.0)
    reward = ((teacher - logp) * mask).detach()
    expected = reward.flip(1).cumsum(1).flip(1) * mask
    agrees("advantages, discount 1", "torch.cumsum", advantages, expected, 1e-12)
    (a,) = torch.autograd.grad(loss, logp)
    (b,) = torch.autograd.grad(-(expected * logp).sum() / mask.sum(), logp)
    agrees("gradient of dense_reward_loss", "a plain sum", a, b, 1e-12)


def test_gradient_of_sequence_kl(lesson, agrees):
    """The true gradient by central differences of the KL between two tables of all continuations."""
    g = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))

    def joint(z: torch.Tensor) -> torch.Tensor:
        q = z.softmax(-1)
        return torch.einsum("a,ab,bc->abc", q[0, 0], q[1], q[2]).flatten()

    def divergence(z: torch.Tensor) -> float:
        return kl_divergence(Categorical(probs=joint(z)), Categorical(probs=joint(teacher))).item()

    expected, step = torch.zeros_like(student), 1e-5
    for i in range(student.numel()):
        shift = torch.zeros_like(student)
        shift.view(-1)[i] = step
        expected.view(-1)[i] = (divergence(student + shift) - divergence(student - shift)) / (2 * step)
    true, policy = lesson.enumerated_gradients(student, teacher, 1.0)
    agrees("the true gradient", "central differences of Categorical's KL", true, expected, 1e-7)
    agrees("the policy's gradient, discount 1", "central differences of Categorical's KL", policy, expected, 1e-7)
    assert not math.isclose(lesson.enumerated_gradients(student, teacher, 0.0)[1].norm(), true.norm(), rel_tol=1e-3)


def test_on_policy_loss(lesson, agrees):
    """Two shipped models: the loss on the tokens it drew, by PyTorch's distributions."""
    tiny, tokenizer = lesson.models.load("tiny")
    small, _ = lesson.models.load("small")
    ids = tokenizer.encode("Return a copy of the list, sorted by")[:6]
    prompts = torch.tensor([[tokenizer.eos, *ids], [tokenizer.eos, *ids[::-1]]], device=lesson.profile.device)
    g = torch.Generator(lesson.profile.device).manual_seed(8)
    loss, tokens = lesson.on_policy_loss(tiny, small, prompts, 9, g)
    with torch.no_grad():
        q, p = (Categorical(logits=m(tokens).double()[:, len(ids) : -1]) for m in (tiny, small))
    agrees("on_policy_loss", "torch.distributions.kl_divergence", loss, kl_divergence(q, p).mean(), 1e-5)
