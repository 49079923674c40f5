"""Lesson 26 against transformers' rope functions, whole rotary modules, and its attention against a LLaMA layer."""

import pytest
import torch
from torch import Tensor
from twins import as_transformers

from llm40.models.llama import Config, Llama

# transformers computes frequencies in float32.
FLOAT32 = 1e-6


@pytest.fixture
def lesson(reference):
    return reference("26")


def of_transformers(kind: str, dim: int, base: float, trained: int, seq: int | None = None, **more) -> tuple:
    """(frequencies, factor on cos and sin) of a LLaMA config with two heads of `dim`."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {"rope_type": kind, "rope_theta": base, **more}
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=trained,
        rope_parameters=parameters,
    )
    return rope.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq)


@pytest.mark.parametrize(("dim", "base"), [(32, 10_000.0), (128, 500_000.0), (8, 100.0)])
@pytest.mark.parametrize("scale", [1.0, 4.0, 10.0])
def test_interpolation(lesson, agrees, dim, base, scale):
    theirs, factor = of_transformers("linear", dim, base, 512, factor=scale)
    assert factor == 1.0
    mine = lesson.position_interpolation(lesson.rope_frequencies(dim, base), scale)
    plain = lesson.rope_frequencies(dim, base)  # each pair counts alike: compare by how much it is slowed
    agrees("position_interpolation", "transformers, linear", mine / plain, theirs / plain, FLOAT32)


@pytest.mark.parametrize(("dim", "base", "trained"), [(32, 10_000.0, 512), (128, 10_000.0, 4096), (64, 5e5, 100)])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("times", [0.5, 1.0, 1.3, 4.0, 20.0])
def test_dynamic(lesson, agrees, dim, base, trained, factor, times):
    length = int(times * trained)
    theirs, _ = of_transformers("dynamic", dim, base, trained, length, factor=factor)
    mine = lesson.dynamic_ntk(dim, base, length, trained, factor)
    plain = lesson.rope_frequencies(dim, base)
    agrees("dynamic_ntk", "transformers, dynamic", mine / plain, theirs / plain, FLOAT32)


@pytest.mark.parametrize(("dim", "base", "scale"), [(32, 10_000.0, 4.0), (128, 1e6, 16.0), (4, 10.0, 1.5)])
def test_ntk(lesson, agrees, dim, base, scale):
    """transformers has NTK-aware scaling within its dynamic kind: at `scale` times the trained length."""
    theirs, _ = of_transformers("dynamic", dim, base, 1000, int(1000 * scale), factor=1.0)
    mine = lesson.rope_frequencies(dim, lesson.ntk_aware_base(base, dim, scale))
    plain = lesson.rope_frequencies(dim, base)
    agrees("ntk_aware_base", "transformers, dynamic at that length", mine / plain, theirs / plain, FLOAT32)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("dim", "base", "scale", "trained", "fast", "slow"),
    [
        (32, 10_000.0, 4.0, 512, 32.0, 1.0),
        (128, 10_000.0, 16.0, 4096, 32.0, 1.0),
        (64, 150_000.0, 32.0, 4096, 32.0, 1.0),  # gpt-oss, which sets truncate to False
        (64, 10_000.0, 40.0, 4096, 32.0, 1.0),  # DeepSeek-V3
        (128, 1e6, 4.0, 32_768, 32.0, 1.0),  # Qwen
        (64, 10_000.0, 2.0, 64, 20.0, 2.0),
        (16, 4.0, 3.0, 400, 8.0, 1.5),
        (8, 10_000.0, 4.0, 5, 32.0, 1.0),
        (8, 10_000.0, 1.0, 512, 32.0, 1.0),
    ],
)
def test_yarn(lesson, agrees, dim, base, scale, trained, fast, slow, truncate):
    theirs, factor = of_transformers(
        "yarn",
        dim,
        base,
        trained,
        factor=scale,
        original_max_position_embeddings=trained,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )
    mine, own = lesson.yarn_frequencies(dim, base, scale, trained, fast, slow, truncate=truncate)
    plain = lesson.rope_frequencies(dim, base)
    agrees("yarn, frequencies", "transformers, yarn", mine / plain, theirs / plain, FLOAT32)
    agrees("yarn, factor", "transformers, yarn", torch.tensor(own), torch.tensor(float(factor)), 1e-12)


@pytest.mark.parametrize(("dim", "share"), [(32, 0.25), (256, 0.25), (64, 0.5), (16, 1.0)])
def test_partial(lesson, agrees, dim, share):
    """Gemma 4's "proportional" kind."""
    theirs, _ = of_transformers("proportional", dim, 1e6, 512, partial_rotary_factor=share)
    mine = lesson.partial_rope(lesson.rope_frequencies(dim, 1e6), share)
    plain = lesson.rope_frequencies(dim, 1e6)
    agrees("partial_rope", "transformers, proportional", mine / plain, theirs / plain, FLOAT32)


@pytest.mark.parametrize("dim", [8, 32, 96])
def test_longrope(lesson, agrees, dim):
    """The factors; transformers keeps no first tokens."""
    factors = 1 + torch.rand(dim // 2, generator=torch.Generator().manual_seed(dim), dtype=torch.float64).cumsum(0)
    theirs, _ = of_transformers(
        "longrope",
        dim,
        10_000.0,
        512,
        2048,
        factor=4.0,
        original_max_position_embeddings=512,
        long_factor=factors.tolist(),
        short_factor=[1.0] * (dim // 2),
    )
    positions = torch.arange(0, 2048, 7)
    mine = lesson.longrope_rescale(lesson.rope_frequencies(dim), positions, factors)
    plain = lesson.rope_frequencies(dim)
    agrees("longrope_rescale", "transformers, longrope", mine / plain, positions[:, None] * theirs / plain, FLOAT32)


def twin(length: int, parameters: dict) -> tuple[Llama, "torch.nn.Module"]:
    """A small random model of the course's, and transformers' with the same weights and those rope parameters."""
    torch.manual_seed(5)
    config = Config(vocab_size=60, hidden_size=64, layers=3, heads=4, kv_heads=2, mlp_size=96, context=length)
    mine = Llama(config).eval()
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)  # so that attention is far from even
    return mine, as_transformers(mine, rope_parameters=parameters)


@torch.no_grad()
def test_whole_model_with_yarn(lesson, agrees):
    """Logits of a whole model, which shows that the factor is on queries and keys both."""
    mine, theirs = twin(
        32,
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    )
    tokens = torch.randint(0, 60, (2, 128), generator=torch.Generator().manual_seed(6))
    frequencies, factor = lesson.yarn_frequencies(16, 10_000.0, 4.0, 32)
    logits = lesson.logits_with(mine, tokens, lesson.angles_of(frequencies, 128), factor)
    agrees("yarn in a whole model", "transformers LlamaForCausalLM, yarn", logits, theirs(tokens).logits, 2e-5)


@torch.no_grad()
def test_streaming(lesson, agrees):
    """One layer: the last token's logits after a long stream are those of a fresh text of the tokens held.

    In a model of one layer keys depend on their own tokens alone, so what is held is all that counts; transformers is
    given the held tokens as a text.
    """
    torch.manual_seed(7)
    config = Config(vocab_size=50, hidden_size=48, layers=1, heads=4, kv_heads=2, mlp_size=64)
    mine = Llama(config).eval()
    theirs = as_transformers(mine)
    tokens = torch.randint(0, 50, (3, 70), generator=torch.Generator().manual_seed(8))
    cache = lesson.StreamingCache(4, 12, lesson.rope_frequencies(12))
    for i in range(70):
        logits: Tensor = lesson.stream(mine, tokens[:, i : i + 1], cache)
        held = torch.cat([tokens[:, : min(4, i + 1)], tokens[:, max(4, i - 11) : i + 1]], dim=1)
        agrees(
            "StreamingCache, each token of a stream",
            "transformers LlamaForCausalLM on the tokens held",
            logits,
            theirs(held).logits[:, -1],
            2e-5,
        )
