"""Lesson 11: routing, dispatch, balance and the grouped product against transformers and PyTorch.

The kernel runs in Triton's interpreter here, over many layouts of groups; on a machine with a GPU the same tests run
there.
As a script (`python test_11_ffn_and_moe.py`) the file compiles the kernel for a Hopper GPU, which takes no GPU.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm40 import profile

pytestmark = pytest.mark.xdist_group("conformance-11")
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)


def copy_experts(mine: nn.ModuleList, theirs: nn.Module) -> None:
    """transformers keeps all experts in two tensors, gate and up one above the other."""
    with torch.no_grad():
        for e, expert in enumerate(mine):
            gate, up = theirs.gate_up_proj[e].chunk(2)
            expert.gate.weight.copy_(gate)
            expert.up.weight.copy_(up)
            expert.down.weight.copy_(theirs.down_proj[e])


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (4, 1), (5, 5)])
def test_mixtral_block(experts, k, reference, agrees) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=24,
        intermediate_size=40,
        num_local_experts=experts,
        num_experts_per_tok=k,
        experts_implementation="eager",
    )
    theirs = MixtralSparseMoeBlock(config).eval()
    randomize(theirs, 1)
    mine = reference("11").DeepSeekMoE(24, 40, experts, k, shared=0)
    copy_experts(mine.experts, theirs.experts)
    with torch.no_grad():
        mine.router.weight.copy_(theirs.gate.weight)
    x = drawn(3, 17, 24, seed=2)
    logits, weights, indices = theirs.gate(x)
    out, my_logits, my_indices = mine(x)
    assert torch.equal(my_indices, indices)
    agrees("11 router logits", "transformers mixtral", my_logits, logits, 1e-6)
    agrees("11 top_k_router", "transformers mixtral", reference("11").top_k_router(logits, k)[0], weights, 1e-6)
    agrees("11 MoE block", "transformers mixtral", out, theirs(x), 1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balancing_loss(k, reference, agrees) -> None:
    """Theirs divides the counts by tokens, ours by assignments: a factor k."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = drawn(200, 8, seed=3).requires_grad_()
    _, indices = reference("11").top_k_router(logits, k)
    mine = reference("11").load_balancing_loss(logits.softmax(-1), indices)
    theirs = load_balancing_loss_func((logits,), 8, k)
    agrees("11 load_balancing_loss, times k", "transformers mixtral", mine * k, theirs, 1e-6)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (mine * k, theirs)]
    agrees("11 load_balancing_loss, gradient", "transformers mixtral", *slopes, 1e-5)


@pytest.mark.parametrize(("groups", "keep", "renormalize"), [(1, 1, True), (4, 2, True), (8, 4, False)])
def test_deepseek_v3_block(groups, keep, renormalize, reference, agrees) -> None:
    """Sigmoid scores, a bias that moves the choice only, groups, and shared experts beside the routed ones."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=20,
        moe_intermediate_size=12,
        n_routed_experts=32,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=groups,
        topk_group=keep,
        norm_topk_prob=renormalize,
        routed_scaling_factor=1.0,
        experts_implementation="eager",
    )
    theirs = DeepseekV3MoE(config).eval()
    randomize(theirs, 4)
    theirs.gate.e_score_correction_bias.copy_(drawn(32, seed=5) * 0.2)
    lesson = reference("11")
    mine = lesson.DeepSeekMoE(20, 12, 32, 6, shared=2, scoring="sigmoid", renormalize=renormalize)
    copy_experts(mine.experts, theirs.experts)
    with torch.no_grad():
        mine.router.weight.copy_(theirs.gate.weight)
        for name in ("gate", "up", "down"):
            getattr(mine.shared, name).weight.copy_(getattr(theirs.shared_experts, f"{name}_proj").weight)
    x = drawn(2, 30, 20, seed=6)
    logits, weights, indices = theirs.gate(x)
    # Groups are a bias of −∞ for the experts of closed groups.
    scores = logits.sigmoid() + theirs.gate.e_score_correction_bias
    closed = ~lesson.group_limit(scores, groups, keep)
    bias = theirs.gate.e_score_correction_bias.expand(len(scores), -1).masked_fill(closed, -torch.inf)
    my_weights, my_indices = lesson.top_k_router(logits, 6, renormalize, "sigmoid", bias)
    rank, my_rank = indices.argsort(-1), my_indices.argsort(-1)  # theirs come in no order
    assert torch.equal(my_indices.gather(1, my_rank), indices.gather(1, rank))
    agrees(
        "11 top_k_router, bias and groups",
        "transformers deepseek_v3",
        my_weights.gather(1, my_rank),
        weights.gather(1, rank),
        1e-6,
    )
    mine.bias = bias
    agrees("11 DeepSeekMoE, shared experts", "transformers deepseek_v3", mine(x)[0], theirs(x), 1e-5)
    assert sum(p.numel() for p in theirs.parameters()) == mine.parameter_counts()[0]


@pytest.mark.parametrize("capacity", [1, 3, 7, 100])
def test_switch_router(capacity, reference, agrees) -> None:
    """Top-1, not renormalized, capacity in the order of the tokens, counted in each sequence."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(d_model=16, d_ff=24, num_experts=4, expert_capacity=capacity, dropout_rate=0.0)
    theirs = SwitchTransformersSparseMLP(config).eval()
    randomize(theirs, 7)
    lesson, x = reference("11"), drawn(3, 20, 16, seed=8)
    with torch.no_grad():
        kept, probs, logits = theirs.router(x)
        out = theirs(x)
    experts = [theirs.experts[f"expert_{e}"] for e in range(4)]
    for b in range(3):
        weights, indices = lesson.top_k_router(logits[b], 1, renormalize=False)
        fits = lesson.apply_capacity(indices, capacity)
        expected = torch.where(kept[b].any(-1), kept[b].argmax(-1), -1)
        assert torch.equal(fits[:, 0], expected)
        agrees("11 top_k_router, k = 1", "transformers switch_transformers", weights, probs[b], 1e-6)
        mine = lesson.moe_forward(x[b], lambda _, w=weights, i=fits: (w, i), experts)
        agrees("11 moe_forward with capacity", "transformers switch_transformers", mine, out[b], 1e-5)


def test_switch_losses(reference, agrees) -> None:
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    logits = drawn(2, 50, 8, seed=9) * 3
    lesson = reference("11")
    probs = logits.softmax(-1)
    _, indices = lesson.top_k_router(logits.flatten(0, 1), 1)
    if hasattr(switch, "router_z_loss_func"):
        agrees(
            "11 router_z_loss",
            "transformers switch_transformers",
            lesson.router_z_loss(logits.flatten(0, 1)),
            switch.router_z_loss_func(logits),
            1e-6,
        )
    if hasattr(switch, "load_balancing_loss_func"):
        # Theirs is a mean over the sequences of a batch: one at a time.
        for b in range(2):
            theirs = switch.load_balancing_loss_func(probs[b : b + 1], indices.view(2, 50, 1)[b : b + 1])
            mine = lesson.load_balancing_loss(probs[b], indices.view(2, 50, 1)[b])
            agrees("11 load_balancing_loss, k = 1", "transformers switch_transformers", mine, theirs, 1e-6)


def test_feed_forward(reference, agrees) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=50, num_attention_heads=2)).double()
    x = drawn(2, 5, 16, seed=10, dtype=torch.float64)
    out, _ = reference("11").feed_forward(x, mlp.up_proj.weight, mlp.down_proj.weight.T, mlp.gate_proj.weight)
    agrees("11 feed_forward, gated", "transformers llama", out, mlp(x), 1e-12)


def test_bias_balances_a_trained_router(reference) -> None:
    """Loads even out, and the gradients of a layer do not depend on the bias where the choice does not."""
    lesson = reference("11")
    moe = lesson.DeepSeekMoE(16, 8, 8, 2, shared=0, scoring="sigmoid")
    randomize(moe, 11)
    x = drawn(2000, 16, seed=12) + 0.5
    with torch.no_grad():
        for _ in range(300):
            moe.bias.copy_(lesson.update_bias(moe.bias, torch.bincount(moe(x)[2].flatten(), minlength=8), 0.005))
        load = torch.bincount(moe(x)[2].flatten(), minlength=8)
    assert float(load.max() / load.float().mean()) < 1.1
    slopes = []
    for shift in (0.0, 0.25):  # the same for all experts: no choice changes
        moe.zero_grad()
        moe.bias += shift
        moe(x[:50])[0].square().sum().backward()
        slopes.append(moe.router.weight.grad.clone())
    assert torch.equal(*slopes)


def layouts() -> list[tuple]:
    """(sizes, K, N, blocks): 40 cases, many with empty groups, one row, all rows in one group."""
    draw = random.Random(11)
    fixed = [
        ([1], 1, 1),
        ([0, 0, 1], 3, 2),
        ([17], 16, 16),
        ([0, 64, 0], 33, 31),
        ([16, 16, 16], 16, 48),
        ([0] * 30 + [5], 20, 9),
    ]
    cases = []
    for i in range(40):
        if i < len(fixed):
            sizes, inner, cols = fixed[i]
        else:
            sizes = [draw.choice([0, 0, 1, 2, 7, 15, 16, 17, 40]) for _ in range(draw.randint(1, 12))]
            inner, cols = draw.choice([1, 8, 16, 24, 47, 64, 100]), draw.choice([1, 5, 16, 20, 33, 70])
        blocks = draw.choice([(16, 16, 16), (32, 16, 32), (16, 32, 16), (64, 64, 64)])
        cases.append((sizes if sum(sizes) else [*sizes, 3], inner, cols, blocks))
    return cases


@needs_triton
@pytest.mark.parametrize("case", layouts(), ids=lambda case: f"{len(case[0])}groups-{sum(case[0])}x{case[1]}x{case[2]}")
def test_kernel_over_layouts(case, reference, agrees) -> None:
    sizes, inner, cols, blocks = case
    x = drawn(sum(sizes), inner, seed=13).to(profile.device)
    w = drawn(len(sizes), cols, inner, seed=14).to(profile.device)
    given = torch.tensor(sizes, device=profile.device)
    out = reference("11").grouped_gemm(x, w, given, blocks=blocks)
    exact = torch.cat([part @ m.T for part, m in zip(x.double().split(sizes), w.double(), strict=True)])
    agrees("11 Triton kernel", "a loop in float64", out, exact, 1e-5)
    assert float((out.double() - exact).norm() / exact.norm()) <= 2e-6


@needs_triton
def test_kernel_against_pytorch(reference, agrees) -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    sizes = torch.tensor([24, 0, 8, 64, 0], device=profile.device)
    dtype = torch.float32 if profile.interpret else torch.bfloat16
    x, w = drawn(96, 32, seed=15).to(profile.device, dtype), drawn(5, 48, 32, seed=16).to(profile.device, dtype)
    theirs = F.grouped_mm(x, w.mT, offs=sizes.cumsum(0).to(torch.int32))
    mine = reference("11").grouped_gemm(x, w, sizes, blocks=(16, 16, 32))
    agrees("11 Triton kernel", "F.grouped_mm", mine, theirs, 1e-5 if profile.interpret else 1e-2)


@needs_triton
def test_kernel_in_half_precision(reference) -> None:
    """The error is at most twice that of PyTorch's products in float16."""
    sizes = [10, 0, 33, 5]
    x, w = drawn(48, 300, seed=17).half().to(profile.device), drawn(4, 40, 300, seed=18).half().to(profile.device)
    exact = torch.cat([part @ m.T for part, m in zip(x.double().split(sizes), w.double(), strict=True)])
    theirs = torch.cat([part @ m.T for part, m in zip(x.split(sizes), w, strict=True)])
    mine = reference("11").grouped_gemm(x, w, torch.tensor(sizes, device=x.device), blocks=(16, 16, 64))
    assert float((mine.double() - exact).norm()) <= 2 * float((theirs.double() - exact).norm())


@needs_triton
@pytest.mark.skipif(profile.name == "gpu", reason="the kernel runs on the GPU itself")
def test_kernel_compiles_for_a_gpu() -> None:
    """What the interpreter forgives (types that change in a loop, operands of two dtypes) the compiler does not."""
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["bf16: tensor cores", "fp32: compiled"], done.stdout


def compile_for_hopper() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # after llm40, before the kernel is decorated
    sys.path.insert(0, str(Path(__file__).parent))
    import triton
    from conftest import _reference
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _reference("11").grouped_gemm_kernel
    for dtype, blocks in (("bf16", (128, 128, 64)), ("fp32", (64, 64, 32))):
        constants = {"GROUPS": 128} | dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
        types = {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "sizes_ptr": "*i32"}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        print(f"{dtype}: {'tensor cores' if 'wgmma.mma_async' in compiled.asm['ptx'] else 'compiled'}")


if __name__ == "__main__":
    compile_for_hopper()
