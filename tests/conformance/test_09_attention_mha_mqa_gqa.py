"""Lesson 09 against PyTorch and Hugging Face transformers, in float64, with the same weights and inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

TOLERANCE = 1e-12


@pytest.fixture
def lesson(reference):
    return reference("09")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask(*shape: int, seed: int) -> torch.Tensor:
    """About half of the pairs visible, and at least one in each row: where PyTorch's result is defined."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (5, 5), (3, 9), (8, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_scaled_dot_product(lesson, agrees, q_len, k_len, masked):
    q, k, v = normal(2, 3, q_len, 15, seed=1), normal(2, 3, k_len, 15, seed=2), normal(2, 3, k_len, 7, seed=3)
    mask = some_mask(2, 1, q_len, k_len, seed=4) if masked else None
    out, _ = lesson.scaled_dot_product_attention(q, k, v, mask)
    what = "scaled_dot_product_attention" + (", masked" if masked else "")
    agrees(what, "F.scaled_dot_product_attention", out, F.scaled_dot_product_attention(q, k, v, mask), TOLERANCE)


def test_causal_mask(lesson, agrees):
    q, k, v = (normal(2, 3, 6, 8, seed=seed) for seed in (1, 2, 3))
    out, _ = lesson.scaled_dot_product_attention(q, k, v, lesson.causal_mask(6, 6))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    agrees("causal_mask", "F.scaled_dot_product_attention, is_causal", out, expected, TOLERANCE)


def test_causal_mask_with_a_cache(lesson, agrees):
    from torch.nn.attention.bias import causal_lower_right

    mask = lesson.causal_mask(3, 8)
    q, k, v = normal(1, 2, 3, 8, seed=1), normal(1, 2, 8, 8, seed=2), normal(1, 2, 8, 8, seed=3)
    expected = F.scaled_dot_product_attention(q, k, v, causal_lower_right(3, 8)._materialize())
    out, _ = lesson.scaled_dot_product_attention(q, k, v, mask)
    agrees("causal_mask, q_len < k_len", "torch.nn.attention.bias.causal_lower_right", out, expected, TOLERANCE)


@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention(lesson, agrees, cross):
    torch.manual_seed(0)
    mine = lesson.MultiHeadAttention(24, 4).double()
    theirs = nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for p in mine.parameters():
            p.copy_(torch.randn_like(p) / 5)
        theirs.in_proj_weight.copy_(torch.cat([mine.q_proj.weight, mine.k_proj.weight, mine.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([mine.q_proj.bias, mine.k_proj.bias, mine.v_proj.bias]))
    theirs.out_proj.load_state_dict(mine.out_proj.state_dict())
    x = normal(3, 5, 24, seed=1)
    context = normal(3, 7, 24, seed=2) if cross else x
    lengths = torch.tensor([context.shape[1], 2, 4])
    mask = lesson.padding_mask(lengths, context.shape[1])
    out, weights = mine(x, context if cross else None, mask)
    hidden = ~mask[:, 0, 0]  # nn.MultiheadAttention: True = padding
    expected, expected_weights = theirs(x, context, context, key_padding_mask=hidden, average_attn_weights=False)
    kind = "cross-attention" if cross else "self-attention"
    agrees(f"MultiHeadAttention, {kind}", "nn.MultiheadAttention", out, expected, TOLERANCE)
    agrees(f"MultiHeadAttention, {kind}, weights", "nn.MultiheadAttention", weights, expected_weights, TOLERANCE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 1)])
def test_grouped_query(lesson, agrees, heads, kv_heads):
    q, k, v = normal(2, heads, 4, 16, seed=1), normal(2, kv_heads, 9, 16, seed=2), normal(2, kv_heads, 9, 16, seed=3)
    mask = some_mask(4, 9, seed=4)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    out = lesson.grouped_query_attention(q, k, v, mask)
    agrees("grouped_query_attention", "F.scaled_dot_product_attention, enable_gqa", out, expected, TOLERANCE)


def llama_attention(heads: int, kv_heads: int, head_dim: int) -> nn.Module:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return llama.LlamaAttention(config, layer_idx=0).double().eval()


@torch.no_grad()
def test_grouped_query_in_llama(lesson, agrees):
    """transformers' Llama attention layer with rotation angle 0, so that positions play no part."""
    heads, kv_heads, head_dim, seq = 6, 2, 8, 7
    layer = llama_attention(heads, kv_heads, head_dim)
    x = normal(2, seq, heads * head_dim, seed=1)
    causal = lesson.causal_mask(seq, seq)
    no_rotation = torch.ones(2, seq, head_dim).double(), torch.zeros(2, seq, head_dim).double()
    additive = torch.zeros(2, 1, seq, seq).double().masked_fill(~causal, -torch.inf)
    expected = layer(x, position_embeddings=no_rotation, attention_mask=additive)[0]

    q, k, v = (p(x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = layer.o_proj(lesson.grouped_query_attention(q, k, v, causal).transpose(1, 2).flatten(-2))
    # transformers takes the softmax in float32, whatever the weights are.
    agrees("grouped_query_attention", "transformers LlamaAttention, 6 heads over 2", out, expected, 1e-6)


@torch.no_grad()
def test_pooled_heads_in_llama(lesson, agrees):
    """An MHA layer whose heads are alike within each group, and the GQA layer made from it by mean pooling."""
    heads, groups, head_dim, seq = 6, 3, 8, 5
    full, grouped = llama_attention(heads, heads, head_dim), llama_attention(heads, groups, head_dim)
    grouped.q_proj.load_state_dict(full.q_proj.state_dict())
    grouped.o_proj.load_state_dict(full.o_proj.state_dict())
    for name in ("k_proj", "v_proj"):
        alike = normal(groups, head_dim, heads * head_dim, seed=len(name)).repeat_interleave(heads // groups, 0)
        getattr(full, name).weight.copy_(alike.flatten(0, 1))
        getattr(grouped, name).weight.copy_(lesson.mha_to_gqa(alike, groups).flatten(0, 1))
    x = normal(1, seq, heads * head_dim, seed=2)
    no_rotation = torch.ones(1, seq, head_dim).double(), torch.zeros(1, seq, head_dim).double()
    expected = full(x, position_embeddings=no_rotation, attention_mask=None)[0]
    out = grouped(x, position_embeddings=no_rotation, attention_mask=None)[0]
    agrees("mha_to_gqa", "transformers LlamaAttention, 6 heads against 3 groups", out, expected, TOLERANCE)


def test_cache_bytes(lesson, agrees):
    """The bytes that transformers' cache holds for a small Llama, counted in the tensors themselves."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=10,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(2, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    mine = lesson.kv_cache_bytes(lesson.AttentionConfig(layers=3, heads=6, kv_heads=2, head_dim=8), 2, 5, 4)
    agrees("kv_cache_bytes", "transformers DynamicCache", torch.tensor(mine), torch.tensor(held), 0.0)


def test_entropy(lesson, agrees):
    weights = normal(3, 4, 5, 6, seed=1).softmax(-1)
    expected = torch.distributions.Categorical(probs=weights).entropy().mean((0, 2))
    entropy = lesson.attention_entropy(weights)
    agrees("attention_entropy", "torch.distributions.Categorical", entropy, expected, TOLERANCE)
