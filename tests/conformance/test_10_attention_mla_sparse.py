"""Lesson 10 against transformers' DeepSeek-V2, V3 and V3.2, Mistral's window, Longformer and BigBird.

The same weights and inputs on both sides.

The kernel runs in Triton's interpreter here, over a sweep of shapes; on a machine with a GPU the same tests run there.
As a script (`python test_10_attention_mla_sparse.py`) the file compiles the kernels for a Hopper GPU; that takes none.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm40 import profile

pytestmark = pytest.mark.xdist_group("conformance-10")
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")

HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V_DIM, WIDTH = 3, 20, 16, 6, 8, 10, 24
FLOAT32_SOFTMAX = 1e-6  # transformers takes softmax and the angles in float32, whatever the weights are


@pytest.fixture
def lesson(reference):
    return reference("10")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deepseek(version: str, **more) -> tuple[nn.Module, nn.Module]:
    """transformers' attention layer with random weights, and its rotary embedding."""
    name = f"Deepseek{version.upper()}"
    module = pytest.importorskip(f"transformers.models.deepseek_{version}.modeling_deepseek_{version}")
    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": V_DIM,
        "num_hidden_layers": 1,
        "attn_implementation": "eager",
    }
    config = getattr(module, f"{name}Config")(**sizes, **more)
    torch.manual_seed(0)
    layer = getattr(module, f"{name}Attention")(config, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, dtype=torch.float64) / parameter.shape[-1] ** 0.5
            parameter.copy_(drawn if parameter.dim() > 1 else 1 + 0.3 * torch.randn_like(parameter))
    return layer, getattr(module, f"{name}RotaryEmbedding")(config)


def half_split(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a projection, (…, ROPE, in), from interleaved pairs to the half-split layout."""
    return torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], dim=-2)


@torch.no_grad()
def with_weights_of(lesson, theirs: nn.Module, interleaved: bool) -> nn.Module:
    """The lesson's layer with the weights of a DeepSeek layer."""
    mine = lesson.MultiHeadLatentAttention(lesson.MLAConfig(WIDTH, HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V_DIM)).double()
    reorder = half_split if interleaved else (lambda rows: rows)
    q = theirs.q_b_proj.weight.unflatten(0, (HEADS, NOPE + ROPE))
    kv = theirs.kv_b_proj.weight.unflatten(0, (HEADS, NOPE + V_DIM))
    down = theirs.kv_a_proj_with_mqa.weight
    for parameter, value in (
        (mine.w_dq.weight, theirs.q_a_proj.weight),
        (mine.q_norm.weight, theirs.q_a_layernorm.weight),
        (mine.w_uq.weight, q[:, :NOPE].flatten(0, 1)),
        (mine.w_qr.weight, reorder(q[:, NOPE:]).flatten(0, 1)),
        (mine.w_dkv.weight, down[:KV_RANK]),
        (mine.w_kr.weight, reorder(down[KV_RANK:])),
        (mine.kv_norm.weight, theirs.kv_a_layernorm.weight),
        (mine.w_uk.weight, kv[:, :NOPE].flatten(0, 1)),
        (mine.w_uv.weight, kv[:, NOPE:].flatten(0, 1)),
        (mine.w_o.weight, theirs.o_proj.weight),
    ):
        parameter.copy_(value)
    return mine


def causal_bias(seq: int) -> torch.Tensor:
    return torch.zeros(1, 1, seq, seq, dtype=torch.float64).masked_fill(torch.ones(seq, seq).triu(1).bool(), -math.inf)


def absorbed_weights(lesson, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    by_head = [m.weight.unflatten(0, (HEADS, -1)) for m in (layer.w_uq, layer.w_uk, layer.w_uv)]
    return lesson.absorb(*by_head, layer.w_o.weight)


@torch.no_grad()
@pytest.mark.parametrize(("version", "interleaved"), [("v3", True), ("v3", False), ("v2", True)])
def test_latent_attention(lesson, agrees, version, interleaved):
    theirs, rotary = deepseek(version, **({"rope_interleave": interleaved} if version == "v3" else {}))
    x, seq = normal(2, 7, WIDTH, seed=1), 7
    positions = torch.arange(seq)[None]
    expected = theirs(x, position_embeddings=rotary(x, positions), attention_mask=causal_bias(seq))[0]
    mine = with_weights_of(lesson, theirs, interleaved)
    kind = f"transformers Deepseek{version.upper()}Attention, {'interleaved' if interleaved else 'half-split'} RoPE"
    agrees("10 MultiHeadLatentAttention", kind, mine(x), expected, FLOAT32_SOFTMAX)


@torch.no_grad()
def test_absorbed_decoding(lesson, agrees):
    """Token by token with nothing but latents in the cache, against transformers' layer on the whole sequence."""
    theirs, rotary = deepseek("v3")
    x, seq = normal(2, 9, WIDTH, seed=2), 9
    expected = theirs(x, position_embeddings=rotary(x, torch.arange(seq)[None]), attention_mask=causal_bias(seq))[0]
    mine = with_weights_of(lesson, theirs, interleaved=True)
    w_q, w_out = absorbed_weights(lesson, mine)
    cache, steps = x.new_zeros(2, 0, KV_RANK + ROPE), []
    for t in range(seq):
        c_q = mine.q_norm(mine.w_dq(x[:, t]))
        q_rope = lesson.rope(mine.w_qr(c_q).view(2, HEADS, 1, ROPE), torch.tensor([t]))[:, :, 0]
        entry = torch.cat(mine.latents(x[:, t : t + 1], start=t), -1)[:, 0]
        y, cache = lesson.decode_absorbed(c_q, q_rope, entry, cache, w_q, w_out, NOPE)
        steps.append(y)
    agrees("10 decode_absorbed", "transformers DeepseekV3Attention", torch.stack(steps, 1), expected, FLOAT32_SOFTMAX)
    agrees("10 decode_absorbed", "MultiHeadLatentAttention, unabsorbed", torch.stack(steps, 1), mine(x), 1e-12)


@torch.no_grad()
def test_cache_bytes(lesson, agrees):
    """The bytes that transformers' cache holds after a DeepSeek-V3 layer has run, counted in the tensors themselves."""
    transformers = pytest.importorskip("transformers")
    theirs, rotary = deepseek("v3")
    x = normal(2, 5, WIDTH, seed=3)
    cache = transformers.DynamicCache()
    theirs(x, position_embeddings=rotary(x, torch.arange(5)[None]), attention_mask=None, past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    mine = lesson.mla_cache_bytes(lesson.MLAConfig(WIDTH, HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V_DIM), 2, 5, 8)
    agrees("10 mla_cache_bytes", "transformers DynamicCache", torch.tensor(mine), torch.tensor(held), 0.0)


@torch.no_grad()
@pytest.mark.parametrize("topk", [3, 6, 100])
def test_sparse_attention(lesson, agrees, topk):
    """The indexer's choice, and the whole layer: transformers unfolds and masks, the lesson gathers."""
    theirs, rotary = deepseek("v32", index_topk=topk, index_n_heads=4, index_head_dim=12)
    seq = 11
    x, cos_sin = normal(2, seq, WIDTH, seed=4), None
    cos_sin = rotary(x, torch.arange(seq)[None])
    mask = causal_bias(seq).expand(2, 1, seq, seq)
    expected = theirs(x, position_embeddings=cos_sin, attention_mask=mask)[0]

    mine, indexer, at = with_weights_of(lesson, theirs, interleaved=True), theirs.indexer, torch.arange(seq)
    c_q = mine.q_norm(mine.w_dq(x))

    def partly_rotated(t: torch.Tensor) -> torch.Tensor:  # (batch, heads, seq, index_head_dim): the first ROPE numbers
        return torch.cat([lesson.rope(t[..., :ROPE], at), t[..., ROPE:]], -1)

    q = partly_rotated(indexer.wq_b(c_q).unflatten(-1, (4, 12)).transpose(1, 2)).transpose(1, 2)
    k = partly_rotated(indexer.k_norm(indexer.wk(x))[:, None])[:, 0]
    scores = lesson.lightning_indexer_scores(q, k, indexer.weights_proj(x))

    c_kv, k_rope = mine.latents(x)
    w_q, w_out = absorbed_weights(lesson, mine)
    q_rope = lesson.rope(mine.w_qr(c_q).unflatten(-1, (HEADS, ROPE)).transpose(1, 2), at)
    queries = torch.cat([torch.einsum("hrq,btq->bhtr", w_q, c_q), q_rope], -1)
    queries = queries * ((KV_RANK + ROPE) / (NOPE + ROPE)) ** 0.5  # topk_sparse_attention scales by the width it sees
    entries = torch.cat([c_kv, k_rope], -1)
    average, chosen = lesson.topk_sparse_attention(queries, entries, c_kv, scores, topk)
    out = torch.einsum("hdr,bhtr->btd", w_out, average)
    agrees("10 topk_sparse_attention, absorbed", "transformers DeepseekV32Attention", out, expected, FLOAT32_SOFTMAX)

    picks = indexer(x, c_q, cos_sin, mask[:, 0], at[None])
    visible = torch.ones(seq, seq).tril().bool()
    theirs_mask = torch.zeros(2, seq, seq).scatter(2, picks.long(), 1).bool() & visible
    mine_mask = torch.zeros(2, seq, seq + 1).scatter(2, chosen.masked_fill(chosen < 0, seq), 1).bool()[..., :seq]
    agrees(
        "10 lightning_indexer_scores, the choice",
        "transformers DeepseekV32Indexer",
        mine_mask.int(),
        theirs_mask.int(),
        0.0,
    )


@pytest.mark.parametrize(("q_len", "k_len", "window"), [(7, 7, 3), (1, 9, 4), (4, 10, 5), (6, 6, 20)])
def test_sliding_window(lesson, agrees, q_len, k_len, window):
    masking = pytest.importorskip("transformers.masking_utils")
    rule = masking.sliding_window_causal_mask_function(window)
    expected = [
        [bool(rule(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(k_len)] for i in range(k_len - q_len, k_len)
    ]
    agrees(
        "10 sliding_window_mask",
        "transformers, Mistral's sliding_window_causal_mask_function",
        lesson.sliding_window_mask(q_len, k_len, window).int(),
        torch.tensor(expected).int(),
        0.0,
    )


@torch.no_grad()
def test_window_in_mistral(lesson, agrees):
    """A Mistral model token by token with its own cache, against its attention layer's weights with the ring buffer."""
    mistral = pytest.importorskip("transformers.models.mistral.modeling_mistral")
    from transformers import DynamicCache

    window, seq, dim = 4, 13, 8
    config = mistral.MistralConfig(
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=dim,
        vocab_size=11,
        intermediate_size=16,
        num_hidden_layers=1,
        sliding_window=window,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = mistral.MistralModel(config).double().eval()
    tokens = torch.randint(0, 11, (2, seq), generator=torch.Generator().manual_seed(5))
    outputs = []
    model.layers[0].self_attn.register_forward_hook(lambda module, inputs, out: outputs.append(out[0]))
    cache = DynamicCache(config=config)
    for t in range(seq):
        model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
    expected = torch.cat(outputs, 1)

    attention, x = model.layers[0].self_attn, model.layers[0].input_layernorm(model.embed_tokens(tokens))
    q, k, v = (
        p(x).unflatten(-1, (-1, dim)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    ring, steps = lesson.RingBufferCache(2, 2, dim, window, dtype=torch.float64), []
    for t in range(seq):
        ring.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        keys, values, at = ring.read()
        out = F.scaled_dot_product_attention(
            lesson.rope(q[:, :, t : t + 1], torch.tensor([t])), lesson.rope(keys, at), values, enable_gqa=True
        )
        steps.append(attention.o_proj(out.transpose(1, 2).flatten(-2)))
    agrees(
        "10 RingBufferCache",
        "transformers MistralAttention with its sliding cache",
        torch.cat(steps, 1),
        expected,
        FLOAT32_SOFTMAX,
    )


@torch.no_grad()
@pytest.mark.parametrize("special", [[], [0], [0, 9]])
def test_longformer(lesson, agrees, special):
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    seq, window = 16, 4
    config = longformer.LongformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=1,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = longformer.LongformerSelfAttention(config, layer_id=0).double().eval()
    for part in ("query", "key", "value"):  # one projection for local and global attention
        getattr(theirs, f"{part}_global").load_state_dict(getattr(theirs, part).state_dict())
    x, kind = normal(2, seq, 24, seed=6), torch.zeros(2, seq).double()
    kind[:, special] = 10_000
    expected = theirs(
        x, attention_mask=kind, is_index_masked=kind < 0, is_index_global_attn=kind > 0, is_global_attn=bool(special)
    )[0]
    q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (theirs.query, theirs.key, theirs.value))
    out = (
        F.scaled_dot_product_attention(q, k, v, lesson.longformer_mask(seq, window, special))
        .transpose(1, 2)
        .flatten(-2)
    )
    agrees(
        "10 longformer_mask",
        f"transformers LongformerSelfAttention, {len(special)} global",
        out,
        expected,
        FLOAT32_SOFTMAX,
    )


@torch.no_grad()
def test_big_bird(lesson, agrees):
    """transformers' layer, with the random blocks it drew added to the lesson's window and global blocks.

    There the last block is global besides the first, and each head draws for itself."""
    big_bird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    block, blocks, heads = 4, 12, 2
    seq = block * blocks
    config = big_bird.BigBirdConfig(
        hidden_size=16, num_attention_heads=heads, block_size=block, num_random_blocks=2, max_position_embeddings=seq
    )
    torch.manual_seed(0)
    theirs = big_bird.BigBirdBlockSparseAttention(config, seed=7).double().train()  # in evaluation it draws nothing
    drawn = []
    recorded = theirs._create_rand_mask_from_inputs
    theirs._create_rand_mask_from_inputs = lambda *args: (drawn.append(args[2]), recorded(*args))[1]
    x = normal(2, seq, 16, seed=8)
    masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, seq).double(), block)
    blocked, band, from_mask, to_mask = masks
    expected = theirs(x, band, from_mask, to_mask, blocked, blocked)[0]

    pattern = (
        lesson.bigbird_mask(seq, block, window=3, random_blocks=0, global_blocks=1, seed=0)
        .expand(heads, -1, -1)
        .clone()
    )
    pattern[:, -block:], pattern[:, :, -block:] = True, True
    for head, rows in enumerate(drawn[0][0].tolist()):
        for row, columns in enumerate(rows, start=1):
            assert len(set(columns)) == 2
            for column in columns:
                pattern[head, row * block : (row + 1) * block, column * block : (column + 1) * block] = True
    q, k, v = (p(x).unflatten(-1, (heads, 8)).transpose(1, 2) for p in (theirs.query, theirs.key, theirs.value))
    out, computed = lesson.per_head_pattern_attention(q, k, v, pattern, block)
    assert computed == int(pattern.unflatten(1, (-1, block)).unflatten(3, (-1, block)).any(4).any(2).sum())
    agrees(
        "10 bigbird_mask, per_head_pattern_attention",
        "transformers BigBirdBlockSparseAttention",
        out.transpose(1, 2).flatten(-2),
        expected,
        FLOAT32_SOFTMAX,
    )


@pytest.mark.parametrize("block", [1, 3, 8, 64])
def test_per_head_patterns(lesson, agrees, block):
    q, k, v = normal(2, 4, 19, 8, seed=9), normal(2, 4, 26, 8, seed=10), normal(2, 4, 26, 5, seed=11)
    mask = torch.rand(4, 19, 26, generator=torch.Generator().manual_seed(12)) < 0.15
    mask[..., 0] = True
    out, _ = lesson.per_head_pattern_attention(q, k, v, mask, block)
    agrees(
        "10 per_head_pattern_attention",
        "F.scaled_dot_product_attention",
        out,
        F.scaled_dot_product_attention(q, k, v, mask),
        1e-12,
    )


SHAPES = [(1, 16, 4), (3, 8, 2), (5, 20, 6), (16, 32, 16), (17, 33, 2), (33, 64, 8)]  # heads, latent, rotary
LENGTHS = [(1,), (13, 22), (16, 32, 48), (1, 0, 67), (100,)]
LAYOUTS = [(1, (16, 16)), (3, (16, 32)), (2, (32, 16)), (7, (64, 64))]  # splits, (BLOCK_H, BLOCK_N)


@needs_triton
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_over_shapes(lesson, agrees, shape, lengths):
    """120 cases: relative L2 under 2e-6 in float32, scores of moderate and of wide range."""
    heads, rank, rope_dim = shape
    device, batch = profile.device, len(lengths)
    for seed, (splits, blocks) in enumerate(LAYOUTS):
        q = normal(batch, heads, rank + rope_dim, seed=seed).float().to(device) * (1 + 4 * (seed % 2))
        cache = normal(batch, max(lengths) + 3, rank + rope_dim, seed=50 + seed).float().to(device)
        at = torch.tensor(lengths, dtype=torch.int32, device=device)
        scale = (rank / 2 + rope_dim) ** -0.5
        exact, _ = lesson.decode_by_definition(q, cache, at, rank, scale)
        cache[torch.arange(cache.shape[1], device=device) >= at[:, None]] = math.nan  # behind the end
        out = lesson.mla_decode(q, cache, at, rank, scale, splits, blocks)
        agrees("10 mla_decode_kernel", "definition in float64", out, exact, 2e-5)
        assert float((out.double() - exact).norm()) <= 2e-6 * float(exact.norm()), (shape, lengths, splits, blocks)


@needs_triton
def test_kernel_in_half_precision(lesson):
    """The error is at most twice that of PyTorch's own products in float16."""
    g = torch.Generator().manual_seed(3)
    q, cache = (torch.randn(*s, generator=g).half().to(profile.device) for s in ((2, 16, 80), (2, 200, 80)))
    lengths = torch.tensor([200, 131], dtype=torch.int32, device=profile.device)
    exact, _ = lesson.decode_by_definition(q, cache, lengths, 64, 0.15)
    behind = torch.arange(200, device=q.device) >= lengths[:, None]
    weights = (q @ cache.mT * 0.15).masked_fill(behind[:, None], -math.inf).softmax(-1)
    theirs = weights @ cache[..., :64]
    out = lesson.mla_decode(q, cache, lengths, 64, 0.15, splits=3, blocks=(16, 32))
    errors = [float((t.double() - exact).norm()) for t in (out, theirs)]
    assert errors[0] <= 2 * errors[1], errors


@needs_triton
@torch.no_grad()
def test_kernel_decodes_deepseek(lesson, agrees):
    """The kernel in the place of decode_absorbed: the last token through transformers' DeepSeek-V3."""
    theirs, rotary = deepseek("v3")
    seq = 21
    x = normal(2, seq, WIDTH, seed=13)
    expected = theirs(x, position_embeddings=rotary(x, torch.arange(seq)[None]), attention_mask=causal_bias(seq))[0][
        :, -1
    ]
    mine = with_weights_of(lesson, theirs, interleaved=True)
    w_q, w_out = absorbed_weights(lesson, mine)
    c_q = mine.q_norm(mine.w_dq(x[:, -1]))
    q_rope = lesson.rope(mine.w_qr(c_q).view(2, HEADS, 1, ROPE), torch.tensor([seq - 1]))[:, :, 0]
    q = torch.cat([torch.einsum("hrq,bq->bhr", w_q, c_q), q_rope], -1).float().to(profile.device)
    cache = torch.cat(mine.latents(x), -1).float().to(profile.device)
    lengths = torch.tensor([seq, seq], dtype=torch.int32, device=profile.device)
    average = (
        lesson.mla_decode(q, cache, lengths, KV_RANK, (NOPE + ROPE) ** -0.5, splits=2, blocks=(16, 16)).cpu().double()
    )
    agrees(
        "10 mla_decode_kernel",
        "transformers DeepseekV3Attention",
        torch.einsum("hdr,bhr->bd", w_out, average),
        expected,
        2e-6,
    )


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
    for heads in (16, 64):
        assert f"mla_decode_kernel, blocks of {heads} heads: tensor cores" in done.stdout, done.stdout
    assert "combine_kernel: compiled" in done.stdout, done.stdout


def compile_for_hopper() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # after llm40, before the kernels are decorated
    sys.path.insert(0, str(Path(__file__).parent))
    import triton
    from conftest import _reference
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    lesson = _reference("10")

    def compiled(kernel, constants: dict[str, int], warps: int):
        types = {"q_ptr": "*bf16", "cache_ptr": "*bf16", "lengths_ptr": "*i32", "o_ptr": "*bf16", "scale": "fp32"}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})

    for heads, warps in ((16, 4), (64, 8)):
        constants = {"RANK": 512, "ROPE": 64, "BLOCK_R": 512, "BLOCK_P": 64, "BLOCK_H": heads, "BLOCK_N": 32}
        result = compiled(lesson.mla_decode_kernel, constants, warps)
        cores = any(name in result.asm["ptx"] for name in ("wgmma.mma_async", "mma.sync"))
        shared = result.metadata.shared
        assert shared <= 227 * 1024, f"{shared} bytes of shared memory: more than a Hopper multiprocessor has"
        print(
            f"mla_decode_kernel, blocks of {heads} heads: {'tensor cores' if cores else 'no tensor cores'}, "
            f"{shared} bytes of shared memory"
        )
    compiled(lesson.combine_kernel, {"RANK": 512, "BLOCK_R": 512, "BLOCK_S": 256}, 4)
    print("combine_kernel: compiled")


if __name__ == "__main__":
    compile_for_hopper()
