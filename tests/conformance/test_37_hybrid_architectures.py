"""Lesson 37 beside transformers (layer patterns, RG-LRU, DeepSeek-V4's settings) and fla's naive NSA."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import llm40  # noqa: F401  before transformers, which imports Triton

transformers = pytest.importorskip("transformers")
FLOAT32, FLOAT64 = 2e-6, 1e-12


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("37")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kinds(config) -> list[str]:
    return ["full" if kind in ("attention", "full_attention") else "cheap" for kind in config.layer_types]


def test_layer_patterns(lesson):
    jamba = transformers.JambaConfig()
    blocks = ["full" if kind == "attention" else "cheap" for kind in jamba.layers_block_type]
    assert blocks == lesson.layer_pattern(32, 8, 4, "cheap")
    assert kinds(transformers.Qwen3NextConfig()) == lesson.layer_pattern(48, 4, 3, "cheap")
    gemma = transformers.Gemma3TextConfig(num_hidden_layers=62)
    assert kinds(gemma) == lesson.layer_pattern(62, 6, 5, "cheap")
    recurrent = transformers.RecurrentGemmaConfig()
    cheap = ("recurrent", "linear_attention")
    found = ["recurrent" if kind in cheap else "local" for kind in recurrent.layers_block_type]
    assert found == ["local" if layer % 3 == 2 else "recurrent" for layer in range(26)]


def test_rg_lru(lesson, agrees):
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    config = transformers.RecurrentGemmaConfig(lru_width=24, num_attention_heads=3)
    theirs, ours = RecurrentGemmaRglru(config), lesson.RGLRU(24, 3)
    names = {
        "recurrent_param": "decay",
        "input_gate_weight": "input_weight",
        "input_gate_bias": "input_bias",
        "recurrent_gate_weight": "recurrence_weight",
        "recurrent_gate_bias": "recurrence_bias",
    }
    with torch.no_grad():
        for seed, (their, our) in enumerate(names.items()):
            value = drawn(*getattr(theirs, their).shape, seed=seed)
            getattr(theirs, their).copy_(value)
            getattr(ours, our).copy_(value)
    x = drawn(2, 9, 24, seed=9)
    expected = theirs(x[:, :8], torch.arange(8).expand(2, -1))
    h, state = ours(x[:, :8])
    agrees("RGLRU: states", "transformers RecurrentGemmaRglru", h, expected, FLOAT32)
    agrees("RGLRU: last state", "transformers RecurrentGemmaRglru", state, theirs.recurrent_states, FLOAT32)
    expected = theirs(x[:, 8:], torch.full((2, 1), 8))
    agrees("RGLRU: one more token", "transformers RecurrentGemmaRglru", ours(x[:, 8:], state)[0], expected, FLOAT32)


def test_deepseek_v4_counts(lesson):
    # V4-Flash: two layers with the window alone, then one entry for 4 and for 128 tokens in turn.
    config = transformers.DeepseekV4Config(compress_ratios=[0, 0, *([4, 128] * 20), 4])
    found = [config.layer_types.count(f"{kind}_attention") for kind in ("compressed_sparse", "heavily_compressed")]
    groups = lesson.MODELS["DeepSeek-V4-Flash"]
    assert [group.count for group in groups] == [config.num_hidden_layers, *found]
    assert [group.stride for group in groups[1:]] == list(config.compress_rates.values())
    assert groups[0].window == config.sliding_window
    assert [group.per_entry for group in groups] == [512, config.head_dim + config.index_head_dim, config.head_dim]


def test_states_of_qwen3_next(lesson):
    """The numbers of a linear layer's state, from the module that would hold them."""
    config = transformers.Qwen3NextConfig()
    group = lesson.MODELS["Qwen3-Next 80B"][1]
    heads, keys, values = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * keys + heads * values
    held = heads * keys * values + channels * (config.linear_conv_kernel_dim - 1)
    assert (group.count, group.state) == (kinds(config).count("cheap"), held)


@pytest.fixture(scope="module")
def naive():
    """fla's naive NSA, by path: the package around it wants a GPU."""
    pytest.importorskip("einops")
    fla = importlib.util.find_spec("fla")
    if fla is None:
        pytest.skip("fla-core is not installed")
    path = Path(fla.submodule_search_locations[0]) / "ops" / "nsa" / "naive.py"
    stand_ins = {name: types.ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling")}
    stand_ins["fla.ops.utils"].prepare_chunk_offsets = None
    stand_ins["fla.ops.utils.pooling"].mean_pooling = mean_pooling
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location("naive_nsa", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, kept in before.items():
            if kept is None:
                del sys.modules[name]
            else:
                sys.modules[name] = kept
    return module


def mean_pooling(x: torch.Tensor, size: int, *_) -> torch.Tensor:
    """Means of chunks of (batch, n, heads, d) along n; the last one may be cut off."""
    return torch.stack([part.mean(1) for part in x.split(size, dim=1)], dim=1)


@pytest.mark.filterwarnings("ignore::ImportWarning")
@pytest.mark.parametrize(("n", "block", "top"), [(47, 4, 5), (64, 8, 4), (30, 3, 3)])
def test_native_sparse_attention(lesson, agrees, naive, n, block, top):
    heads, kv_heads, d = 32, 2, 8  # fla asks for groups of 16 or more
    q, k, v = (drawn(2, n, h, d, seed=h + n) * 2 for h in (heads, kv_heads, kv_heads))
    gates = torch.rand(2, n, heads, 2, generator=torch.Generator().manual_seed(3))
    expected, indices = naive.naive_nsa(
        q, k, v, gates[..., 0], gates[..., 1], block_counts=top, block_size=block, return_block_indices=True
    )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    three = F.pad(gates, (0, 1)).transpose(1, 2)
    _, weights = lesson.compressed_attention(q, k, v, block)
    chosen = lesson.select_blocks(weights, kv_heads, block, top)
    listed = F.one_hot(indices + 1, -(-n // block) + 1).sum(3)[..., 1:].transpose(1, 2) > 0
    assert torch.equal(chosen, listed)
    ours = lesson.native_sparse_attention(q, k, v, three, block, top, 1)
    agrees("native_sparse_attention", "fla naive_nsa", ours, expected.transpose(1, 2), FLOAT32)
