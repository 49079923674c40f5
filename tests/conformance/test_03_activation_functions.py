"""Lesson 03: activations and gated layers against PyTorch and transformers, its Triton kernels against float64.

The kernels run in Triton's interpreter here, over a sweep of shapes; on a machine with a GPU the same tests run there.
As a script (`python test_03_activation_functions.py`) the file compiles them for a Hopper GPU, which takes no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm40 import profile

pytestmark = pytest.mark.xdist_group("conformance-03")
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")
FLOAT64, FLOAT32, FLOAT16 = 1e-14, 2e-6, 1e-3
KERNELS = ("stamp_kernel", "swiglu_forward_kernel", "swiglu_backward_kernel")
SHAPES = [
    (1, 1, 16),
    (1, 31, 32),
    (1, 32, 32),
    (1, 33, 32),
    (5, 7, 8),
    (2, 100, 16),
    (3, 130, 64),
    (17, 3, 2),
    (2, 257, None),
]  # rows, columns, block
HALF = pytest.param(torch.float16, FLOAT16, id="float16")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


def test_activations(reference, agrees) -> None:
    from transformers.activations import ACT2FN

    lesson = reference("03")
    x, grad = 4 * normal(4, 501, seed=1), normal(4, 501, seed=2)
    agrees("gelu", "torch", lesson.gelu(x), F.gelu(x), FLOAT64)
    agrees("gelu, tanh", "torch", lesson.gelu(x, "tanh"), F.gelu(x, approximate="tanh"), FLOAT64)
    agrees("gelu, tanh", "transformers gelu_new", lesson.gelu(x, "tanh"), ACT2FN["gelu_new"](x), FLOAT64)
    agrees("silu", "torch", lesson.silu(x), F.silu(x), FLOAT64)
    agrees(
        "silu_backward",
        "torch's aten.silu_backward",
        lesson.silu_backward(x, grad),
        torch.ops.aten.silu_backward(grad, x),
        FLOAT64,
    )


def test_gated_layers_are_llamas(reference, agrees) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    lesson = reference("03")
    assert lesson.gated_hidden_size(4096) == LlamaConfig().intermediate_size
    x = normal(2, 5, 24, seed=3)
    for name, ours, act in (("SwiGLU", lesson.SwiGLU, "silu"), ("GeGLU", lesson.GeGLU, "gelu")):
        config = LlamaConfig(hidden_size=24, intermediate_size=40, hidden_act=act, num_attention_heads=2)
        theirs = LlamaMLP(config).double()
        mine = ours(24, 40).double()
        names = {"w1.weight": "gate_proj.weight", "w2.weight": "down_proj.weight", "w3.weight": "up_proj.weight"}
        mine.load_state_dict({a: theirs.state_dict()[b] for a, b in names.items()})
        agrees(name, "transformers LlamaMLP", mine(x), theirs(x), FLOAT64)


def test_classifier_is_a_stack_of_linear_layers(reference, agrees) -> None:
    model = reference("03").MLPClassifier(hidden=20, activation=torch.tanh).double().eval()
    a, b, c = model.layers
    plain = nn.Sequential(nn.Flatten(), a, nn.Tanh(), b, nn.Tanh(), c)
    x = normal(6, 8, 8, seed=4)
    agrees("MLPClassifier", "nn.Sequential", model(x), plain(x), FLOAT64)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_dropout_has_the_moments_of_torchs(reference, p) -> None:
    """Mean and variance over a million elements, for ours and for F.dropout: both within five standard errors."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    x = torch.ones(1_000_000)
    for out in (reference("03").dropout(x, p, True, generator), F.dropout(x, p)):
        variance = p / (1 - p)
        assert abs(float(out.double().mean()) - 1) < 5 * (variance / 1e6) ** 0.5
        kept = float((out > 0).double().mean())
        assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
        torch.testing.assert_close(out.max(), torch.tensor(1 / (1 - p)))


@needs_triton
@pytest.mark.parametrize(("dtype", "limit"), [pytest.param(torch.float32, FLOAT32, id="float32"), HALF])
def test_kernels(reference, dtype, limit) -> None:
    lesson = reference("03")
    for seed, (rows, n_cols, block) in enumerate(SHAPES):
        both = normal(rows, 2 * n_cols, seed=seed, dtype=dtype).to(profile.device)
        gate, up = both.chunk(2, dim=-1)  # rows twice as far apart as they are long
        grad = normal(n_cols, rows, seed=100 + seed, dtype=dtype).to(profile.device).T
        leaves = [t.detach().double().requires_grad_() for t in (gate, up)]
        exact = F.silu(leaves[0]) * leaves[1]
        expected = torch.autograd.grad(exact, leaves, grad.double())
        out = lesson.fused_swiglu_forward(gate, up, block=block)
        found = lesson.fused_swiglu_backward(grad, gate, up, block=block)
        for what, mine, theirs in zip(("out", "dgate", "dup"), (out, *found), (exact.detach(), *expected), strict=True):
            assert mine.dtype == dtype
            assert relative(mine, theirs) <= limit, f"{what}, {rows} × {n_cols}, block {block}"


@needs_triton
def test_result_does_not_depend_on_the_block(reference) -> None:
    lesson = reference("03")
    gate, up = (normal(3, 77, seed=seed, dtype=torch.float32).to(profile.device) for seed in (6, 7))
    first = lesson.fused_swiglu_forward(gate, up, block=8)
    for block in (16, 64, 128, None):
        assert torch.equal(lesson.fused_swiglu_forward(gate, up, block=block), first)


@needs_triton
@pytest.mark.skipif(profile.name == "gpu", reason="the kernels run on the GPU itself")
def test_kernels_compile_for_a_gpu() -> None:
    """What the interpreter forgives the compiler does not."""
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel in KERNELS:
        assert f"{kernel}: compiled" in done.stdout, done.stdout


def compile_for_hopper() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # after llm40, before the kernels are decorated
    sys.path.insert(0, str(Path(__file__).parent))
    import triton
    from conftest import _reference
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    lesson = _reference("03")
    for name in KERNELS:
        kernel = getattr(lesson, name)
        signature = {a: "*bf16" if a.endswith("_ptr") else "i32" for a in kernel.arg_names} | {"BLOCK": "constexpr"}
        source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 2048})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert "st.global" in compiled.asm["ptx"]
        print(f"{name}: compiled")


if __name__ == "__main__":
    compile_for_hopper()
