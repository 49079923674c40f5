"""Lesson 29: attention and its Triton kernels against PyTorch's scaled_dot_product_attention in float64.

The kernels run in Triton's interpreter here, over a sweep of shapes; on a machine with a GPU the same tests run there.
As a script (`python test_29_flash_attention.py`) the file compiles the kernels for a Hopper GPU, which takes no GPU.
"""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm40 import profile

pytestmark = pytest.mark.xdist_group("conformance-29")
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")

FORWARD_LIMIT, BACKWARD_LIMIT = 2e-6, 3e-6  # relative L2, float32
BATCHES = [1, 2]
LENGTHS = [(1, 1), (1, 40), (16, 16), (17, 17), (31, 64), (33, 50), (48, 48), (40, 100), (65, 65), (50, 19)]
HEADS = [(1, 1), (2, 2), (4, 2), (3, 1)]
HEAD_DIMS = [8, 16, 24, 40, 64, 80, 128]
BLOCKS = [(16, 16), (32, 16), (16, 32), (64, 32), (32, 64)]


def sweep() -> list[tuple]:
    """48 cases: every length with and without the causal mask, the rest drawn so that each value occurs."""
    draw = random.Random(29)
    decks: dict[int, list] = {}

    def deal(values: list):
        deck = decks.setdefault(id(values), [])
        if not deck:
            deck += draw.sample(values, len(values))
        return deck.pop()

    lengths = (LENGTHS * 3)[:24]
    return [
        (deal(BATCHES) if q_len < 60 else 1, *deal(HEADS), q_len, k_len, deal(HEAD_DIMS), causal, deal(BLOCKS))
        for causal in (False, True)
        for q_len, k_len in lengths
    ]


def inputs(batch, heads, kv_heads, q_len, k_len, head_dim, seed=0, dtype=torch.float32) -> list[Tensor]:
    """q, k, v and the gradient of the output, the first three as views of (batch, seq, heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(q_len, heads), (k_len, kv_heads), (k_len, kv_heads), (q_len, heads)]
    tensors = [torch.randn(batch, n, h, head_dim, generator=generator).to(profile.device, dtype) for n, h in shapes]
    return [t.transpose(1, 2) for t in tensors]


def sdpa(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, dq, dk, dv) in float64. Queries that see no key are left out of SDPA, which has no answer for them: zeros."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    blind = max(0, q.shape[2] - k.shape[2]) if causal else 0
    seen = torch.ones(q.shape[2] - blind, k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[2] - seen.shape[0])
    o = F.scaled_dot_product_attention(q[:, :, blind:], k, v, attn_mask=seen, enable_gqa=True)
    o = F.pad(o, (0, 0, blind, 0))
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.double())


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


def case_id(case: tuple) -> str:
    *shape, causal, (rows, keys) = case
    return "b{}-h{}-kv{}-q{}-k{}-d{}".format(*shape) + f"-{'causal' if causal else 'full'}-{rows}x{keys}"


@needs_triton
@pytest.mark.parametrize("case", sweep(), ids=case_id)
def test_kernels_over_shapes(case, reference, agrees) -> None:
    *shape, causal, blocks = case
    lesson = reference("29")
    q, k, v, do = inputs(*shape)
    o_exact, dq_exact, dk_exact, dv_exact = sdpa(q, k, v, do, causal)
    o, lse = lesson.flash_forward(q, k, v, causal, blocks)
    dq, dk, dv = lesson.flash_backward(q, k, v, o, lse, do, causal, blocks)
    # A softmax over one key has no gradient in q and k: the exact value is 0, and nothing can be relative to it.
    lone = shape[4] == 1
    for name, actual, expected, limit in (
        ("o", o, o_exact, FORWARD_LIMIT),
        ("dv", dv, dv_exact, BACKWARD_LIMIT),
        ("dq", dq, dq_exact, BACKWARD_LIMIT),
        ("dk", dk, dk_exact, BACKWARD_LIMIT),
    ):
        if lone and name in ("dq", "dk"):
            assert float(actual.abs().max()) < 1e-5, name
            continue
        agrees(f"29 Triton kernels, {name}", "SDPA in float64", actual, expected, tolerance=1e-5)
        assert relative_l2(actual, expected) <= limit, f"{name}: relative L2 {relative_l2(actual, expected):.1e}"


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(causal, reference) -> None:
    """At most twice (forward) or three times (backward) the error of the same computation in PyTorch in float16."""
    lesson = reference("29")
    q, k, v, do = inputs(1, 2, 1, 70, 90, 64, dtype=torch.float16)
    exact = sdpa(q, k, v, do, causal)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    scores = leaves[0] @ leaves[1].repeat_interleave(2, 1).mT / math.sqrt(64)
    if causal:
        scores = scores.masked_fill(~torch.ones(70, 90, dtype=torch.bool, device=q.device).tril(20), -math.inf)
    theirs = torch.softmax(scores, -1) @ leaves[2].repeat_interleave(2, 1)
    gradients = torch.autograd.grad(theirs, leaves, do)
    o, lse = lesson.flash_forward(q, k, v, causal, (32, 32))
    ours = (o, *lesson.flash_backward(q, k, v, o, lse, do, causal, (32, 32)))
    names, factors = ("o", "dq", "dk", "dv"), (2, 3, 3, 3)
    for name, factor, a, t, e in zip(names, factors, ours, (theirs, *gradients), exact, strict=True):
        error, usual = relative_l2(a, e), relative_l2(t, e)
        assert error <= factor * usual, f"{name}: {error:.1e}, in PyTorch {usual:.1e}"


@needs_triton
def test_autograd_function(reference, agrees) -> None:
    """With the autotuner's own tile sizes, through autograd, with a gradient that is an expanded scalar."""
    lesson = reference("29")
    q, k, v, _ = inputs(1, 4, 2, 100, 100, 32)
    exact = sdpa(q, k, v, torch.ones_like(q), causal=True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = lesson.FlashAttention.apply(*leaves, True)
    o.sum().backward()
    for name, actual, expected in zip(("o", "dq", "dk", "dv"), (o, *(t.grad for t in leaves)), exact, strict=True):
        agrees(f"29 FlashAttention, {name}", "SDPA in float64", actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "k_len", "blocks"), [(64, 64, (16, 16)), (50, 77, (32, 8)), (77, 50, (8, 32)), (1, 30, (4, 4))]
)
def test_tiled(q_len, k_len, blocks, causal, reference, agrees) -> None:
    lesson = reference("29")
    q, k, v, do = inputs(2, 3, 3, q_len, k_len, 20)
    exact = sdpa(q, k, v, do, causal)
    o, lse = lesson.tiled_attention(q, k, v, *blocks, causal)
    gradients = lesson.attention_backward_tiled(q, k, v, o, lse, do, *blocks, causal)
    for name, actual, expected in zip(("o", "dq", "dk", "dv"), (o, *gradients), exact, strict=True):
        agrees(f"29 tiled in PyTorch, {name}", "SDPA in float64", actual, expected, tolerance=1e-5)


def test_hbm_bytes_follow_the_theorem(reference) -> None:
    """Θ(S²) for the standard way; 8 S²D²/M numbers for flash, M in numbers."""
    hbm_bytes = reference("29").hbm_bytes
    S, D, M = 1 << 16, 64, 128 * 1024
    assert hbm_bytes(2 * S, D, M, "standard") / hbm_bytes(S, D, M, "standard") == pytest.approx(4, rel=0.01)
    assert hbm_bytes(S, D, M, "flash") / 2 == pytest.approx(8 * S**2 * D**2 / (M / 2), rel=0.01)
    assert hbm_bytes(S, D, M, "flash") / hbm_bytes(S, D, 2 * M, "flash") == pytest.approx(2, rel=0.01)


@needs_triton
@pytest.mark.skipif(profile.name == "gpu", reason="the kernels run on the GPU itself")
def test_kernels_compile_for_a_gpu() -> None:
    """What the interpreter forgives (types that change in a loop, operands of two dtypes) the compiler does not."""
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel in ("flash_forward_kernel", "flash_dq_kernel", "flash_dkdv_kernel"):
        assert f"{kernel} bf16: tensor cores" in done.stdout, done.stdout


def compile_for_hopper() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # after llm40, before the kernels are decorated
    sys.path.insert(0, str(Path(__file__).parent))
    import triton
    from conftest import _reference
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    lesson = _reference("29")
    constants = {"HEAD_DIM": 64, "BLOCK_D": 64, "CAUSAL": True, "BLOCK_M": 64, "BLOCK_N": 64}
    for name in ("delta_kernel", "flash_forward_kernel", "flash_dq_kernel", "flash_dkdv_kernel"):
        kernel = getattr(lesson, name)
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument.endswith("_ptr"):
                signature[argument] = "*fp32" if argument in ("lse_ptr", "delta_ptr") else "*bf16"
            else:
                signature[argument] = "fp32" if argument == "scale" else "i32"
        used = {n: value for n, value in constants.items() if n in signature}
        source = ASTSource(fn=kernel, signature=signature, constexprs=used)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
        print(f"{name} bf16: {'tensor cores' if 'wgmma.mma_async' in compiled.asm['ptx'] else 'no tensor cores'}")


if __name__ == "__main__":
    compile_for_hopper()
