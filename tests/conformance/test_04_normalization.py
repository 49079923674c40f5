"""Lesson 04 against torch.nn, transformers and float64, kernels included."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm40 import profile

needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("04")


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 4) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
    ids=str,
)
def test_row_norms_are_pytorchs(lesson, agrees, dtype, tolerance, scale):
    x, w, b = draw(3, 5, 33, scale=scale, dtype=dtype), draw(33, dtype=dtype), draw(33, dtype=dtype, seed=9)
    exact = [t.double() for t in (x, w, b)]
    name = str(dtype).removeprefix("torch.")
    agrees(
        f"04 layer_norm, {name}",
        "F.layer_norm in float64",
        lesson.layer_norm(x, w, b),
        F.layer_norm(exact[0], (33,), exact[1], exact[2]),
        tolerance,
    )
    agrees(
        f"04 rms_norm, {name}",
        "F.rms_norm in float64",
        lesson.rms_norm(x, w),
        F.rms_norm(exact[0], (33,), exact[1], 1e-6),
        tolerance,
    )


def test_rms_norm_is_llamas_and_qwens(lesson, agrees):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    x, w = draw(2, 3, 40, scale=1e-3, dtype=torch.float32), draw(40, dtype=torch.float32)
    for kind, against in ((llama.LlamaRMSNorm, "transformers, LLaMA"), (qwen.Qwen3RMSNorm, "transformers, Qwen3")):
        peer = kind(40, eps=1e-6)
        peer.weight.data.copy_(w)
        agrees("04 rms_norm, float32", against, lesson.rms_norm(x, w), peer(x), tolerance=1e-6)


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.9])
def test_batch_norm_is_pytorchs(lesson, agrees, momentum):
    mine, peer = (kind(6, momentum=momentum).double() for kind in (lesson.BatchNorm1d, nn.BatchNorm1d))
    for step, n in enumerate((2, 9, 5, 40)):
        x = draw(n, 6, scale=3.0, seed=step) + 7
        agrees("04 BatchNorm1d, training", "nn.BatchNorm1d", mine(x), peer(x), tolerance=1e-12)
    for name in ("running_mean", "running_var"):
        agrees(f"04 BatchNorm1d, {name}", "nn.BatchNorm1d", getattr(mine, name), getattr(peer, name), tolerance=1e-12)
    x = draw(1, 6)
    agrees("04 BatchNorm1d, evaluation", "nn.BatchNorm1d", mine.eval()(x), peer.eval()(x), tolerance=1e-12)


@pytest.mark.parametrize("shape", [(7,), (4, 1), (3, 5), (2, 3, 16)], ids=str)
def test_backward_by_hand(lesson, agrees, shape):
    x, w, dy = draw(*shape).requires_grad_(), draw(shape[-1]).requires_grad_(), draw(*shape, seed=8)
    actual = lesson.rms_norm_backward(x.detach(), w.detach(), dy, 1e-3)
    expected = torch.autograd.grad(nn.functional.rms_norm(x, shape[-1:], w, 1e-3), (x, w), dy)
    agrees("04 rms_norm_backward, dx", "autograd, float64", actual[0], expected[0], tolerance=1e-12)
    agrees("04 rms_norm_backward, dw", "autograd, float64", actual[1], expected[1], tolerance=1e-12)


def test_qk_norm(lesson, agrees):
    q, k, gain = draw(2, 3, 4, 8, scale=50.0), draw(2, 3, 6, 8, scale=0.02), draw(3)
    expected = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) * gain[:, None, None]
    actual = lesson.qk_norm_attention_scores(q, k, gain)
    agrees("04 qk_norm_attention_scores", "F.cosine_similarity", actual, expected, 1e-12)
    # RMSNorm on both and the scale 1/√d, as Qwen3 has it, is the gain √d.
    by_rms = lesson.rms_norm(q, eps=0.0) @ lesson.rms_norm(k, eps=0.0).mT / math.sqrt(8)
    scores = lesson.qk_norm_attention_scores(q, k, torch.full((3,), math.sqrt(8), dtype=q.dtype))
    agrees("04 qk_norm_attention_scores, gain √d", "RMSNorm on q and k", scores, by_rms, 1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_blocks_are_a_transformer_layer(lesson, agrees, norm_first):
    torch.manual_seed(4)
    peer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    for p in peer.parameters():
        nn.init.normal_(p, std=0.3)
    make = lesson.PreNormBlock if norm_first else lesson.PostNormBlock

    class SelfAttention(nn.Module):
        def forward(self, x, attn_mask=None):
            return peer.self_attn(x, x, x, attn_mask=attn_mask, need_weights=False)[0]

    mlp = nn.Sequential(peer.linear1, nn.ReLU(), peer.linear2)
    x, mask = draw(2, 5, 12), torch.ones(5, 5, dtype=torch.bool).triu(1)
    actual = make(peer.norm2, mlp)(make(peer.norm1, SelfAttention())(x, attn_mask=mask))
    agrees(f"04 {make.__name__}", "nn.TransformerEncoderLayer", actual, peer(x, src_mask=mask), tolerance=1e-12)


@needs_triton
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(
    ("rows", "n_cols", "programs"), [(3, 1000, 2), (2, 32768, 2), (1, 20001, 1), (9, 63, 4), (5, 64, 8)]
)
def test_kernels(lesson, agrees, rows, n_cols, programs, scale):
    x, dy, w = (
        draw(*shape, scale=s, dtype=torch.float32, seed=seed).to(profile.device)
        for seed, shape, s in ((1, (rows, n_cols), scale), (2, (rows, n_cols), 1.0), (3, (n_cols,), 1.0))
    )
    y, r = lesson.triton_rms_norm(x, w)
    dx, dw = lesson.triton_rms_norm_backward(x, w, r, dy, programs)
    exact_y, _ = lesson.exact_rms_norm(x, w)
    _, exact_dx, exact_dw = lesson.exact_gradients(x, w, dy)
    for what, actual, exact in (("y", y, exact_y), ("dx", dx, exact_dx), ("dw", dw, exact_dw)):
        agrees(f"04 Triton RMSNorm, {what}", "autograd, float64", actual, exact, tolerance=2e-6)


@needs_triton
def test_rows_that_are_too_long_are_refused(lesson):
    with pytest.raises(ValueError, match="32768"):
        lesson.triton_rms_norm(torch.ones(1, 32769, device=profile.device), torch.ones(32769, device=profile.device))


@needs_triton
def test_kernels_inside_a_network(lesson, agrees):
    """A view that is not contiguous goes in, an expanded gradient comes back."""
    x = draw(7, 2, 3).transpose(0, 2).float().to(profile.device).requires_grad_()
    w = draw(7).float().to(profile.device).requires_grad_()
    actual = torch.autograd.grad(lesson.TritonRMSNorm.apply(x, w, 1e-6).sum(), (x, w))
    expected = torch.autograd.grad(F.rms_norm(x.double(), (7,), w.double(), 1e-6).sum(), (x, w))
    for what, a, e in zip(("dx", "dw"), actual, expected, strict=True):
        agrees(f"04 TritonRMSNorm, {what}", "autograd, float64", a, e, tolerance=2e-6)
