"""Lesson 08 against transformers with the same weights, and its kernel against float64 over many shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm40 import profile

EXACT = 1e-12
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")


@pytest.fixture
def lesson(reference):
    return reference("08")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def modeling(name: str):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def test_tied_embedding(lesson, agrees):
    torch.manual_seed(0)
    mine = lesson.TiedEmbedding(50, 12).double()
    ids = torch.randint(0, 50, (3, 7))
    agrees("TiedEmbedding", "F.embedding times √d", mine(ids), F.embedding(ids, mine.weight) * 12**0.5, EXACT)
    x = normal(3, 12, seed=1)
    agrees("TiedEmbedding.logits", "F.linear", mine.logits(x), F.linear(x, mine.weight), EXACT)


@pytest.mark.parametrize("dim", [6, 7, 64])
def test_sinusoids(lesson, agrees, dim):
    """RoFormer's table has the sines in its first half and the cosines in its second."""
    module = modeling("roformer").RoFormerSinusoidalPositionalEmbedding(200, dim)
    table = module.create_weight()
    table = torch.cat([lesson.sinusoidal_encoding(200, dim)[:, first::2] for first in (0, 1)], 1), table
    agrees("sinusoidal_encoding", "transformers RoFormer, columns in its order", *table, 1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (16, 100), (12, 77), (64, 500), (20, 300), (8, 5), (4, 9)]
)
def test_t5_buckets(lesson, agrees, bidirectional, buckets, max_distance):
    rel = torch.arange(-1000, 1001).view(3, -1)
    theirs = modeling("t5").T5Attention._relative_position_bucket(rel, bidirectional, buckets, max_distance)
    mine = lesson.t5_relative_bucket(rel, bidirectional, buckets, max_distance)
    agrees("t5_relative_bucket, distances to 1000", "transformers T5Attention", mine, theirs, 0.0)


@pytest.mark.parametrize("decoder", [True, False])
def test_t5_bias(lesson, agrees, decoder):
    """The bias as T5's attention makes it, from its own embedding of the buckets."""
    t5 = modeling("t5")
    config = t5.T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=decoder)
    torch.manual_seed(0)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    place = torch.arange(150)
    bucket = lesson.t5_relative_bucket(place[None, :] - place[:, None], not decoder, 32, 128)
    mine = layer.relative_attention_bias.weight[bucket].permute(2, 0, 1)[None]
    agrees(
        "T5's bias from the buckets", "transformers T5Attention.compute_bias", mine, layer.compute_bias(150, 150), 0.0
    )


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 20, 112])
def test_alibi(lesson, agrees, heads):
    """BLOOM adds slope · j under a causal mask: after the softmax the same as -slope · (i - j)."""
    length = 19
    theirs = modeling("bloom").build_alibi_tensor(torch.ones(1, length), heads, torch.float32)  # (heads, 1, length)
    agrees("alibi_slopes", "transformers BLOOM", lesson.alibi_slopes(heads), theirs[:, 0, 1], 1e-6)
    scores = normal(heads, length, length, seed=heads)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (scores + theirs.double()).masked_fill(future, -torch.inf).softmax(-1)
    agrees(
        "alibi_bias, weights",
        "transformers BLOOM",
        (scores + lesson.alibi_bias(heads, length)).softmax(-1),
        expected,
        1e-6,
    )


@pytest.mark.parametrize(("seq", "span"), [(5, 8), (13, 4), (1, 2)])
@torch.no_grad()
def test_disentangled(lesson, agrees, seq, span):
    """DeBERTa-v2's attention with both position terms, its weights copied; compared before and after the softmax.

    The released code looks up position-to-content at δ(i, j), the paper (and the lesson) at δ(j, i): the same table in
    reverse order. With one more row at each end, both clip at the same distances.
    """
    deberta = modeling("deberta_v2")
    heads, d = 3, 8
    config = deberta.DebertaV2Config(
        hidden_size=heads * d,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=False,
        position_buckets=-1,
        max_relative_positions=span,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    layer = deberta.DisentangledSelfAttention(config).double().eval()
    x, positions = normal(2, seq, heads * d, seed=2), normal(2 * span, heads * d, seed=3)

    def split(t: Tensor) -> Tensor:  # (…, rows, heads · d) → (…, heads, rows, d)
        return t.unflatten(-1, (heads, d)).transpose(-3, -2)

    q, k, v = (split(projection(x)) for projection in (layer.query_proj, layer.key_proj, layer.value_proj))
    pos_q, pos_k = split(layer.pos_query_proj(positions)), split(layer.pos_key_proj(positions))
    distance = torch.arange(2 * span + 2) - (span + 1)  # i - j of the wider table's rows for pos_k, j - i for pos_q
    rows, reverse = ((d + span).clamp(0, 2 * span - 1) for d in (distance, -distance))
    mine = lesson.disentangled_scores(q, k, pos_q[:, reverse], pos_k[:, rows])

    flat = [t.flatten(0, 1) for t in (q, k)]
    bias = layer.disentangled_attention_bias(*flat, None, positions, 3)
    theirs = flat[0] @ flat[1].mT / (3 * d) ** 0.5 + bias
    # transformers takes the root of 3d in float32.
    agrees("disentangled_scores", "transformers DeBERTa-v2, scores", mine, theirs.view(2, heads, seq, seq), 1e-6)
    out = layer(x, torch.ones(2, 1, seq, seq, dtype=torch.bool), rel_embeddings=positions)[0]
    agrees(
        "disentangled_scores",
        "transformers DeBERTa-v2, layer output",
        (mine.softmax(-1) @ v).transpose(1, 2).flatten(-2),
        out,
        1e-6,
    )


def llama_angles(module, config, positions: Tensor) -> tuple[Tensor, Tensor]:
    return module(torch.zeros(1, dtype=torch.float32), positions[None])


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("start", [0, 37])
def test_llama(lesson, agrees, base, start):
    llama = modeling("llama")
    config = llama.LlamaConfig(
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    cos, sin = llama_angles(llama.LlamaRotaryEmbedding(config), config, torch.arange(start, start + 9))
    mine = lesson.rope_cache(64, 16, base)
    for name, a, b in (("cos", mine[0], cos), ("sin", mine[1], sin)):
        agrees(f"rope_cache, {name}", "transformers LlamaRotaryEmbedding", a[start : start + 9], b[0, :, :8], 1e-5)
    q, k = normal(2, 6, 9, 16, seed=1, dtype=torch.float32), normal(2, 2, 9, 16, seed=2, dtype=torch.float32)
    for name, x, expected in zip(("q", "k"), (q, k), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        agrees(f"apply_rope, {name}", "transformers Llama", lesson.apply_rope(x, *mine, start), expected, 1e-5)


@torch.no_grad()
def test_llama_layer(lesson, agrees):
    """transformers' Llama attention layer on a whole text against rotary_attention on pieces of it."""
    llama = modeling("llama")
    config = llama.LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    torch.manual_seed(0)
    layer = llama.LlamaAttention(config, layer_idx=0).eval()
    x = normal(2, 11, 48, seed=1, dtype=torch.float32)
    place = torch.arange(11)
    causal = torch.zeros(11, 11).masked_fill(place > place[:, None], -torch.inf)[None, None]
    angles = llama_angles(llama.LlamaRotaryEmbedding(config), config, place)
    expected = layer(x, position_embeddings=angles, attention_mask=causal)[0]
    table, past, outs = lesson.rope_cache(11, 8), None, []
    for piece in x.split([4, 1, 5, 1], dim=1):
        q, k, v = (p(piece).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        out, past = lesson.rotary_attention(q, k, v, *table, past)
        outs.append(layer.o_proj(out.transpose(1, 2).flatten(-2)))
    agrees("rotary_attention, in four pieces", "transformers LlamaAttention", torch.cat(outs, 1), expected, 1e-5)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_gpt_neox(lesson, agrees, fraction):
    """Part of each head turned, in GPT-NeoX's attention layer: both compute the whole layer from the same weights."""
    neox = modeling("gpt_neox")
    config = neox.GPTNeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        attn_implementation="eager",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction},
    )
    torch.manual_seed(0)
    layer = neox.GPTNeoXAttention(config, layer_idx=0).eval()
    x, place = normal(2, 7, 64, seed=1, dtype=torch.float32), torch.arange(7)
    angles = neox.GPTNeoXRotaryEmbedding(config)(x, place[None])
    causal = torch.zeros(7, 7).masked_fill(place > place[:, None], -torch.inf)[None, None]
    with torch.no_grad():
        expected = layer(x, causal, position_embeddings=angles)[0]
        q, k, v = layer.query_key_value(x).view(2, 7, 4, 48).transpose(1, 2).chunk(3, -1)
        out, _ = lesson.rotary_attention(q, k, v, *lesson.rope_cache(7, int(16 * fraction)))
        mine = layer.dense(out.transpose(1, 2).flatten(-2))
    agrees("apply_rope, part of the head turned", "transformers GPTNeoXAttention", mine, expected, 1e-5)


@pytest.mark.parametrize("head_dim", [2, 8, 20])
def test_layouts(lesson, agrees, head_dim):
    """RoFormer is interleaved: its scores, and those of half-split rotation after the weights were reordered."""
    roformer = modeling("roformer")
    heads, width, seq = 3, 10, 13
    w_q, w_k = normal(heads, head_dim, width, seed=1), normal(heads, head_dim, width, seed=2)
    x = normal(seq, width, seed=3)
    table = roformer.RoFormerSinusoidalPositionalEmbedding(seq, head_dim).create_weight().double()[None, None]
    q, k = roformer.RoFormerSelfAttention.apply_rotary_position_embeddings(
        table, (x @ w_q.mT)[None], (x @ w_k.mT)[None]
    )
    cos, sin = (t.double() for t in lesson.rope_cache(seq, head_dim))
    mine = [lesson.apply_rope(x @ lesson.interleaved_to_half(w).mT, cos, sin) for w in (w_q, w_k)]
    agrees(
        "interleaved_to_half, scores", "transformers RoFormer, interleaved", mine[0] @ mine[1].mT, (q @ k.mT)[0], 1e-6
    )
    agrees("interleaved_rope", "transformers RoFormer", lesson.interleaved_rope(x @ w_q.mT), q[0], 1e-6)


# (batch, seq, query heads, key heads, head_dim, features turned, start)
SHAPES = [
    (1, 1, 1, 1, 2, 2, 0),
    (2, 3, 4, 2, 8, 8, 0),
    (1, 5, 3, 1, 6, 6, 2),
    (2, 1, 6, 6, 10, 4, 7),
    (3, 2, 5, 5, 2, 2, 0),
    (1, 2, 8, 2, 16, 12, 40),
    (2, 2, 1, 1, 7, 2, 1),
    (1, 3, 32, 8, 128, 128, 30),
    (1, 2, 7, 7, 80, 80, 5),
    (2, 2, 9, 3, 64, 16, 11),
    (1, 4, 12, 4, 96, 96, 0),
    (2, 2, 5, 1, 33, 20, 3),
]


def kernel_case(lesson, shape, dtype=torch.float32) -> tuple[list[Tensor], list[Tensor], int]:
    """([q, k], [cos, sin], start): q and k are slices of one projection, as a model makes them."""
    batch, seq, heads, k_heads, head_dim, rotary, start = shape
    both = normal(batch, seq, heads + 2 * k_heads, head_dim, seed=sum(shape), dtype=torch.float32).to(dtype)
    q, k, _ = both.to(profile.device).split([heads, k_heads, k_heads], dim=2)
    return [q, k], [t.to(profile.device) for t in lesson.rope_cache(start + seq + 1, rotary, 100.0)], start


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    half = cos.shape[1]
    turn = torch.complex(cos.double(), sin.double())[start : start + x.shape[1], None]
    z = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    return torch.cat([z.real, z.imag, x[..., 2 * half :].double()], -1)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_over_shapes(lesson, agrees, shape):
    """Forward and backward: relative L2 under 2e-6 in float32."""
    leaves, table, start = kernel_case(lesson, shape)
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = lesson.FusedRoPE.apply(*leaves, *table, start)
    arriving = [normal(*t.shape, seed=5, dtype=torch.float32).to(t.device) for t in out]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = [exact_rope(t, *table, start) for t in wide]
    gradients = torch.autograd.grad(out, leaves, arriving)
    expected = torch.autograd.grad(exact, wide, [t.double() for t in arriving])
    for name, a, e in (*zip(("q", "k"), out, exact, strict=True), *zip(("dq", "dk"), gradients, expected, strict=True)):
        agrees(f"Triton kernel, {name}", "complex multiplication in float64", a, e, 1e-5)
        assert float((a.detach().double() - e.detach()).norm() / e.detach().norm()) <= 2e-6, name


@needs_triton
def test_kernel_in_half_precision(lesson):
    """Each number is rounded once, so it is as near as float16 can be."""
    (q, k), table, start = kernel_case(lesson, (2, 3, 6, 2, 48, 32, 4), torch.float16)
    for x, y in zip((q, k), lesson.fused_rope(q, k, *table, start), strict=True):
        exact = exact_rope(x, *table, start)
        assert y.dtype == torch.float16
        assert float((y.double() - exact).norm()) <= 1.05 * float((exact.half().double() - exact).norm())


@needs_triton
def test_kernel_agrees_with_apply_rope(lesson, agrees):
    (q, k), table, start = kernel_case(lesson, (2, 5, 6, 2, 24, 16, 3))
    for name, x, y in zip(("q", "k"), (q, k), lesson.fused_rope(q, k, *table, start), strict=True):
        eager = lesson.apply_rope(x.transpose(1, 2), *table, start).transpose(1, 2)
        agrees(f"Triton kernel, {name}", "the lesson's apply_rope", y, eager, 1e-6)


@needs_triton
@pytest.mark.skipif(profile.name == "gpu", reason="the kernel runs on the GPU itself")
def test_kernel_compiles_for_a_gpu() -> None:
    """What the interpreter forgives (types that change in a loop) the compiler does not."""
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-4:] == [
        "bf16 forward: compiled",
        "bf16 backward: compiled",
        "fp32 forward, part: compiled",
        "fp16 backward, odd: compiled",
    ], done.stdout


def compile_for_hopper() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # after llm40, before the kernel is decorated
    sys.path.insert(0, str(Path(__file__).parent))
    import triton
    from conftest import _reference
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _reference("08").rope_kernel
    for what, dtype, backward, blocks in (
        ("forward", "bf16", False, (32, 8, 64, 0)),
        ("backward", "bf16", True, (32, 8, 64, 0)),
        ("forward, part", "fp32", False, (16, 16, 16, 64)),
        ("backward, odd", "fp16", True, (1, 1, 4, 1)),
    ):
        names = ("BLOCK_Q", "BLOCK_K", "BLOCK_HALF", "BLOCK_REST")
        constants = {"BACKWARD": backward} | dict(zip(names, blocks, strict=True))
        types = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "q_out", "k_out")} | dict.fromkeys(
            ("cos_ptr", "sin_ptr"), "*fp32"
        )
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        print(f"{dtype} {what}: compiled")


if __name__ == "__main__":
    compile_for_hopper()
