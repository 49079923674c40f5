"""Lesson 35: linear attention, decays and the delta rule against transformers' qwen3_next and kimi_linear and against
flash-linear-attention's naive references; the chunk kernel over shapes against float64.

fla's package wants a GPU, so its `naive.py` files are loaded by path: they need torch and einops. Most of them compute
in float32 whatever they are given, as transformers' functions do. All but linear attention's scale q by 1/√d_k.
"""

import importlib.util
import inspect
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm40 import profile

pytestmark = pytest.mark.xdist_group("conformance-35")
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")
SHAPES = [(2, 3, 128, 16, 24), (1, 2, 64, 32, 8)]  # batch, heads, seq, d_k, d_v; some of fla's want whole chunks of 64


def naive(name: str) -> ModuleType:
    """fla/ops/<name>/naive.py, without its package."""
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("fla-core is not installed")
    [folder] = package.submodule_search_locations
    path = Path(folder) / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of transformers as it stands in its source; what it is wrapped in calls fla's kernels where fla is."""
    hidden = sys.modules.setdefault("fla", None) is None  # so that fla, which would look for a GPU, is not imported
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    finally:
        if hidden:
            del sys.modules["fla"]
    return inspect.unwrap(getattr(found, name))


def tokens(batch, heads, seq, d_k, d_v, seed=0) -> dict[str, Tensor]:
    """q, k (of length 1), v, one log-decay a token, one for each channel, β, a state: on the CPU, float32."""
    g = torch.Generator().manual_seed(seed)
    lead = (batch, heads, seq)
    return {
        "q": torch.randn(*lead, d_k, generator=g),
        "k": F.normalize(torch.randn(*lead, d_k, generator=g), dim=-1),
        "v": torch.randn(*lead, d_v, generator=g),
        "number": F.logsigmoid(torch.randn(*lead, 1, generator=g) + 2),
        "channels": F.logsigmoid(torch.randn(*lead, d_k, generator=g) + 2),
        "beta": torch.sigmoid(torch.randn(*lead, 1, generator=g)),
        "state": torch.randn(batch, heads, d_k, d_v, generator=g),
    }


def swapped(*tensors: Tensor) -> list[Tensor]:
    """(batch, heads, seq, …) to (batch, seq, heads, …), and back."""
    return [t.transpose(1, 2) for t in tensors]


@pytest.fixture
def lesson(reference):
    return reference("35")


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention(shape, lesson, agrees) -> None:
    t, fla = tokens(*shape), naive("linear_attn")
    q, k, v = t["q"], t["k"], t["v"]
    theirs, last = fla.naive_recurrent_linear_attn(
        *swapped(q, k, v), scale=1.0, initial_state=t["state"], output_final_state=True
    )
    for name, (o, state) in {
        "recurrent": lesson.linear_attention_recurrent(q, k, v, t["state"]),
        "chunked": lesson.linear_attention_chunked(q, k, v, 24, t["state"]),
    }.items():
        agrees(f"35 linear attention, {name}", "fla naive_recurrent_linear_attn", *swapped(o), theirs, tolerance=1e-5)
        agrees(f"35 linear attention, {name}, state", "fla naive_recurrent_linear_attn", state, last, tolerance=1e-5)
    theirs = fla.naive_chunk_linear_attn(*swapped(q, k, v), scale=1.0)
    o = lesson.linear_attention_parallel(q, k, v)
    agrees("35 linear attention, parallel", "fla naive_chunk_linear_attn", *swapped(o), theirs, tolerance=1e-5)
    # The denominator of 2020: one more value of 1.
    positive_q, positive_k = F.elu(q) + 1, F.elu(k) + 1
    theirs, _ = fla.naive_recurrent_linear_attn(*swapped(positive_q, positive_k, v), scale=1.0, normalize=True)
    both = lesson.linear_attention_parallel(positive_q, positive_k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    ours = both[..., :-1] / both[..., -1:]
    agrees(
        "35 with a column of ones", "fla naive_recurrent_linear_attn, normalize", *swapped(ours), theirs, tolerance=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_retention(shape, lesson, agrees) -> None:
    t = tokens(*shape)
    heads, d_k = shape[1], shape[3]
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(heads).double()))).float()
    log_decay = decay[None, :, None, None].expand(*t["number"].shape)
    q = t["q"] / math.sqrt(d_k)
    o, _ = lesson.gated_linear_attention(q, t["k"], t["v"], log_decay, 24)
    theirs = naive("retention").naive_retention(t["q"], t["k"], t["v"])
    agrees("35 gated, RetNet's decays", "fla naive_retention", o, theirs, tolerance=1e-5)


@pytest.mark.parametrize("chunk", [1, 24, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape, chunk, lesson, agrees) -> None:
    t, d_k = tokens(*shape), shape[3]
    q, k, v = t["q"] / math.sqrt(d_k), t["k"], t["v"]
    options = {"initial_state": t["state"], "output_final_state": True}
    theirs, last = naive("gla").naive_recurrent_gla(*swapped(t["q"], k, v, t["channels"]), **options)
    o, state = lesson.gated_linear_attention(q, k, v, t["channels"], chunk, t["state"])
    agrees("35 gated, a decay of each channel", "fla naive_recurrent_gla", *swapped(o), theirs, tolerance=1e-5)
    agrees("35 gated, a decay of each channel, state", "fla naive_recurrent_gla", state, last, tolerance=1e-5)
    simple, number = naive("simple_gla"), t["number"][..., 0]
    o, state = lesson.gated_linear_attention(q, k, v, t["number"], chunk, t["state"])
    for theirs in ("naive_recurrent_simple_gla", "naive_chunk_simple_gla"):
        expected, last = getattr(simple, theirs)(*swapped(t["q"], k, v, number), **options)
        agrees("35 gated, one decay", f"fla {theirs}", *swapped(o), expected, tolerance=1e-5)
        agrees("35 gated, one decay, state", f"fla {theirs}", state, last, tolerance=1e-5)
    expected, _ = simple.naive_parallel_simple_gla(*swapped(t["q"], k, v, number))
    o, _ = lesson.gated_linear_attention(q, k, v, t["number"], chunk)
    agrees("35 gated, one decay", "fla naive_parallel_simple_gla", *swapped(o), expected, tolerance=1e-5)


@pytest.mark.parametrize("chunk", [1, 24, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_delta_rule(shape, chunk, lesson, agrees) -> None:
    t, fla = tokens(*shape), naive("delta_rule")
    q, k, v, beta = t["q"] / math.sqrt(shape[3]), t["k"], t["v"], t["beta"]
    o, state = lesson.delta_rule_chunked(q, k, v, beta, chunk, state=t["state"])
    theirs, last = fla.delta_rule_recurrence(t["q"], k, v, beta[..., 0], initial_state=t["state"])
    agrees("35 delta rule", "fla delta_rule_recurrence", o, theirs, tolerance=1e-5)
    agrees("35 delta rule, state", "fla delta_rule_recurrence", state, last, tolerance=1e-5)
    o, state = lesson.delta_rule_chunked(q, k, v, beta, chunk)
    theirs, last = fla.delta_rule_chunkwise(t["q"], k, v, beta[..., 0])
    agrees("35 delta rule", "fla delta_rule_chunkwise", o, theirs, tolerance=1e-5)
    agrees("35 delta rule, state", "fla delta_rule_chunkwise", state, last, tolerance=1e-5)


def gated_delta_peers(t: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(o, state) of each, (batch, seq, heads, d_v), from a state."""
    fla = naive("gated_delta_rule")
    steps, chunked = (plain("qwen3_next", f"torch_{form}_gated_delta_rule") for form in ("recurrent", "chunk"))
    q, k, v, g, beta = swapped(t["q"], t["k"], t["v"], t["number"][..., 0], t["beta"][..., 0])
    options = {"initial_state": t["state"].clone(), "output_final_state": True}
    return {
        "transformers qwen3_next, recurrent": steps(q, k, v, g, beta, **options),
        "transformers qwen3_next, chunk": chunked(q, k, v, g, beta, **options),
        "fla naive_recurrent_gated_delta_rule": fla.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **options),
        "fla naive_chunk_gated_delta_rule": fla.naive_chunk_gated_delta_rule(q, k, v, g, beta, **options),
    }


def channel_peers(t: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    fla = naive("kda")
    steps, chunked = (plain("kimi_linear", f"{form}_kimi_delta_attention") for form in ("recurrent", "chunk"))
    q, k, v, g, beta = swapped(t["q"], t["k"], t["v"], t["channels"], t["beta"][..., 0])
    options = {"initial_state": t["state"].clone(), "output_final_state": True}
    return {
        "transformers kimi_linear, recurrent": steps(q, k, v, g, beta, **options),
        "transformers kimi_linear, chunk": chunked(q, k, v, g, beta, **options),
        "fla naive_recurrent_kda": fla.naive_recurrent_kda(q, k, v, g, beta, **options),
        "fla naive_chunk_kda": fla.naive_chunk_kda(q, k, v, g, beta, **options),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("what", "decays", "peers"),
    [("Gated DeltaNet", "number", gated_delta_peers), ("KDA", "channels", channel_peers)],
)
def test_gated_delta_rule(what, decays, peers, shape, lesson, agrees) -> None:
    t = tokens(*shape)
    q = t["q"] / math.sqrt(shape[3])
    arguments = (q, t["k"], t["v"], t["beta"])
    ours = {f"{what} in chunks": lesson.delta_rule_chunked(*arguments, 24, t[decays], t["state"])}
    ours[f"{what} by state_update"] = lesson.delta_rule_recurrent(*arguments, t[decays], t["state"])
    for peer, (expected, last) in peers(t).items():
        for name, (o, state) in ours.items():
            agrees(f"35 {name}", peer, *swapped(o), expected, tolerance=1e-5)
            agrees(f"35 {name}, state", peer, state, last, tolerance=1e-5)


def test_keys_normalized_inside(lesson, agrees) -> None:
    """Qwen3-Next lets its function normalize queries and keys; the lesson's caller does it."""
    chunked = plain("qwen3_next", "torch_chunk_gated_delta_rule")
    t = tokens(2, 2, 100, 16, 16)
    raw_q, raw_k = 3 * t["q"], 2 * torch.randn(t["k"].shape, generator=torch.Generator().manual_seed(1))
    q, k, v, g, beta = swapped(raw_q, raw_k, t["v"], t["number"][..., 0], t["beta"][..., 0])
    expected, _ = chunked(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
    ours, _ = lesson.delta_rule_chunked(
        F.normalize(raw_q, dim=-1) / 4, F.normalize(raw_k, dim=-1), t["v"], t["beta"], 32, t["number"]
    )
    agrees(
        "35 Gated DeltaNet, keys normalized",
        "transformers qwen3_next, l2norm",
        *swapped(ours),
        expected,
        tolerance=1e-5,
    )


def test_recall_of_the_whole_family_in_float64(lesson, agrees) -> None:
    """Chunks against steps, where nothing is lost to rounding."""
    t = {name: value.double() for name, value in tokens(2, 3, 77, 16, 24).items()}
    for name, decay in (("no decay", None), ("one decay", t["number"]), ("a decay of each channel", t["channels"])):
        arguments = (t["q"], t["k"], t["v"], t["beta"])
        o, state = lesson.delta_rule_chunked(*arguments, 16, decay, t["state"])
        steps, last = lesson.delta_rule_recurrent(*arguments, decay, t["state"])
        agrees(f"35 delta rule in chunks, {name}", "state_update in float64", o, steps, tolerance=1e-12)
        agrees(f"35 delta rule in chunks, {name}, state", "state_update in float64", state, last, tolerance=1e-12)


def test_performer_against_softmax(lesson, agrees) -> None:
    """With 400,000 features the estimated kernel of small queries and keys is near the exact one."""
    g = torch.Generator().manual_seed(2)
    q, k = (torch.randn(6, 16, generator=g) / 2 for _ in range(2))
    rows = torch.randn(400_000, 16, generator=g)
    estimate = lesson.positive_features(q, rows) @ lesson.positive_features(k, rows).mT
    agrees("35 positive features", "exp(q·k/√d)", estimate, (q @ k.mT / 4).exp(), tolerance=0.03)


def sweep() -> list[tuple]:
    """40 shapes of the kernel: batch, heads, seq, d_k, d_v, blocks."""
    draw = random.Random(35)
    lengths = [1, 2, 15, 16, 17, 31, 33, 48, 50, 64, 65, 90] * 4
    return [
        (draw.choice([1, 2]), draw.choice([1, 2, 3]), seq, draw.choice([5, 16, 24, 32, 40]),
         draw.choice([7, 16, 33, 48]), draw.choice([(16, 16), (32, 16), (16, 32), (64, 16)]))
        for seq in lengths[:40]
    ]  # fmt: skip


def exact(q, k, v, g, state) -> tuple[Tensor, Tensor]:
    """(o, last state) in float64 from all pairs."""
    q, k, v, g, state = (t.double() for t in (q, k, v, g, state))
    c = g.cumsum(-1)
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    faded = (c[..., :, None] - c[..., None, :]).masked_fill(~later, -math.inf).exp()
    o = (q @ k.mT * faded) @ v + (q * c.exp()[..., None]) @ state
    return o, (k * faded[..., -1, :, None]).mT @ v + c[..., -1, None, None].exp() * state


@needs_triton
@pytest.mark.parametrize("case", sweep(), ids=lambda case: "-".join(map(str, case[:5])) + f"-{case[5][0]}x{case[5][1]}")
def test_kernel_over_shapes(case, lesson, agrees) -> None:
    *shape, blocks = case
    t = {name: value.to(profile.device) for name, value in tokens(*shape, seed=sum(shape)).items()}
    g = t["number"][..., 0] / 4
    o, state = lesson.chunk_attention(t["q"], t["k"], t["v"], g, t["state"], blocks)
    expected, last = exact(t["q"], t["k"], t["v"], g, t["state"])
    for what, actual, due in (("o", o, expected), ("state", state, last)):
        agrees(f"35 chunk kernel, {what}", "float64, all pairs", actual, due, tolerance=1e-5)
        error = float((actual.double() - due).norm() / due.norm())
        assert error <= 2e-6, f"{what}: relative L2 {error:.1e}"


@needs_triton
@pytest.mark.skipif(profile.name == "gpu", reason="the kernel runs on the GPU itself")
def test_kernel_compiles_for_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tensor cores") == 2, done.stdout
    assert "no tensor cores" not in done.stdout, done.stdout


def compile_for_hopper() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # after llm40, before the kernel is decorated
    sys.path.insert(0, str(Path(__file__).parent))
    import triton
    from conftest import _reference
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _reference("35").chunk_kernel
    for dtype in ("bf16", "fp16"):
        constants = {"D_K": 128, "D_V": 128, "BLOCK_K": 128, "BLOCK_V": 32, "CHUNK": 64}
        wide = ("g_ptr", "begin_ptr", "end_ptr")
        signature = {
            name: "constexpr" if name in constants
            else "*fp32" if name in wide
            else f"*{dtype}" if name.endswith("_ptr")
            else "i32"
            for name in kernel.arg_names
        }  # fmt: skip
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
        print(f"chunk_kernel {dtype}: {'tensor cores' if 'wgmma.mma_async' in made.asm['ptx'] else 'no tensor cores'}")


if __name__ == "__main__":
    compile_for_hopper()
