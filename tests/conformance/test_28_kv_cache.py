"""Lesson 28 against transformers' dynamic, static and sliding caches, its Llama, and PyTorch's FLOP counter.

KIVI is not among them: transformers' quantized cache groups keys and values alike by default, unlike the paper.
"""

import pytest
import torch
from twins import as_transformers

from llm40 import models

transformers = pytest.importorskip("transformers")
cache_utils = pytest.importorskip("transformers.cache_utils")


@pytest.fixture
def lesson(reference):
    return reference("28")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair():
    """The course's Llama and Hugging Face's, with the same random weights, in float64."""
    config = models.Config(vocab_size=50, hidden_size=32, layers=3, heads=4, kv_heads=2, mlp_size=48, context=64)
    mine = models.Llama(config).eval()
    g = generator(0)
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.25)
    mine = mine.double()
    return mine, as_transformers(mine, attn_implementation="eager", pad_token_id=0)


def tokens_of(size: int, g: torch.Generator) -> list[torch.Tensor]:
    """Keys and values of `size` new tokens of three rows, two heads."""
    return [torch.randn(3, 2, size, 5, generator=g) for _ in range(2)]


def test_dynamic_cache(lesson, agrees):
    """Append, crop and reorder, bit for bit, where all rows have the same length. Their crop takes what to remove."""
    g = generator(1)
    mine, theirs = lesson.KVCache(2, 3, 2, 16, 5), cache_utils.DynamicCache()
    for turn, size in enumerate((4, 1, 3, 1, 2)):
        for layer in range(2):
            k, v = tokens_of(size, g)
            for found, right in zip(mine.append(layer, k, v), theirs.update(k, v, layer), strict=True):
                agrees("KVCache.append", "transformers DynamicCache", found, right, 0)
        if turn % 2:
            length = theirs.get_seq_length()
            theirs.crop(-2)
            mine.crop(length - 2)
            assert mine.lengths.tolist() == [[theirs.get_seq_length()] * 3] * 2
        rows = torch.randint(0, 3, (3,), generator=g)
        mine.reorder(rows)
        theirs.batch_select_indices(rows)
        n = theirs.get_seq_length()
        for layer in range(2):
            name = "KVCache.crop, reorder"
            agrees(name, "transformers DynamicCache", mine.k[layer, :, :, :n], theirs.layers[layer].keys, 0)
            agrees(name, "transformers DynamicCache", mine.v[layer, :, :, :n], theirs.layers[layer].values, 0)


def test_static_cache(lesson, agrees):
    """The whole reserved memory, bit for bit, and the same addresses from beginning to end."""
    g = generator(2)
    mine, theirs = lesson.KVCache(1, 3, 2, 9, 5), cache_utils.StaticLayer(max_cache_len=9)
    address = mine.k.data_ptr()
    for size in (3, 1, 1, 4):
        k, v = tokens_of(size, g)
        mine.append(0, k, v)
        keys, values = theirs.update(k, v)
        agrees("KVCache: reserved memory", "transformers StaticLayer", mine.k[0], keys, 0)
        agrees("KVCache: reserved memory", "transformers StaticLayer", mine.v[0], values, 0)
        assert mine.k.data_ptr() == address
        keys, _ = mine.append(0, k[:, :, :0], v[:, :, :0])
        assert keys.data_ptr() == address
    with pytest.raises(OverflowError, match="capacity"):
        mine.append(0, *tokens_of(1, g))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 1, 1, 2), (2, 5)])
def test_logits(lesson, agrees, pair, sizes):
    """The model with the lesson's cache against Hugging Face's with its dynamic cache, in the same steps."""
    mine, theirs = pair
    text = torch.randint(0, 50, (2, sum(sizes)), generator=generator(3))
    cache, other = lesson.KVCache(3, 2, 2, 7, 8, dtype=torch.float64), cache_utils.DynamicCache()
    for part in text.split(sizes, dim=1):
        right = theirs(part, past_key_values=other, use_cache=True).logits
        agrees("step with KVCache", "transformers Llama, DynamicCache", lesson.step(mine, part, cache), right, 1e-5)
    for layer in range(3):
        agrees("cached keys", "transformers Llama, DynamicCache", cache.k[layer], other.layers[layer].keys, 1e-5)


def test_generation(lesson, pair):
    """A batch of prompts of unequal lengths, token for token as Hugging Face continues each alone."""
    mine, theirs = pair
    g = generator(4)
    prompts = [torch.randint(1, 50, (n,), generator=g).tolist() for n in (5, 1, 8, 3)]
    cache = lesson.KVCache(3, 4, 2, 8 + 11, 8, dtype=torch.float64)
    written = lesson.generate_with_cache(lambda t, c, n: lesson.step(mine, t, c, n), cache, prompts, 12)
    for row, prompt in zip(written, prompts, strict=True):
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert row == text[0, len(prompt) :].tolist()
    assert cache.lengths.tolist() == [[len(p) + 11 for p in prompts]] * 3


def kept_bytes(config, tokens: int) -> int:
    """Bytes of the tensors in transformers' static cache for one text that fills it."""
    cache = cache_utils.StaticCache(config, max_cache_len=tokens)
    total = 0
    for i, layer in enumerate(cache.layers):
        own = config.per_layer_config[i] if config.model_type == "gemma4_text" else config
        heads, size = own.num_key_value_heads, own.head_dim
        new = torch.zeros(1, heads, 1, size, dtype=torch.bfloat16)
        layer.update(new, new)
        total += layer.keys.nbytes + layer.values.nbytes
    return total


@pytest.mark.parametrize("tokens", [10, 128, 700, 3000])
def test_cache_bytes(lesson, agrees, tokens):
    """Layouts of published configurations, as large as transformers' static caches, windows included."""
    layer = lesson.LayerCache
    peers = {
        "gpt-oss": (transformers.GptOssConfig(), lesson.LAYOUTS["gpt-oss-120b"]),
        "Llama 3 8B": (
            transformers.LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
            lesson.LAYOUTS["Llama 3 8B (GQA)"],
        ),
        "Gemma 3, its default": (
            transformers.Gemma3TextConfig(sliding_window=100),
            lesson.every(6, 26, layer(4, 256, window=100), layer(4, 256)),
        ),
        "Gemma 4 26B-A4B": (
            transformers.Gemma4TextConfig(
                num_hidden_layers=30,
                num_key_value_heads=8,
                num_global_key_value_heads=2,
                sliding_window=1024,
                attention_k_eq_v=True,
            ),
            lesson.LAYOUTS["Gemma 4 26B-A4B"],
        ),
    }
    for name, (config, layout) in peers.items():
        agrees(
            f"cache_bytes, {name}",
            "transformers StaticCache, sliding layers",
            torch.tensor(lesson.cache_bytes(layout, [tokens])),
            torch.tensor(kept_bytes(config, tokens)),
            0,
        )


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_flops(lesson, agrees, pair, batch):
    """Decode against PyTorch's counter, step by step; prefill too, of which the counter knows no causal mask."""
    from torch.utils.flop_counter import FlopCounterMode

    _, theirs = pair
    matrices = [p for name, p in theirs.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    size = lesson.ModelSize(sum(p.numel() for p in matrices) + 50 * 32, 3, 4, 2, 8)  # the tied head
    cache = cache_utils.DynamicCache()
    for cached, new, phase in ((0, 6, "prefill"), (6, 1, "decode"), (7, 1, "decode")):
        text = torch.randint(0, 50, (batch, new), generator=generator(5))
        with FlopCounterMode(display=False) as counter:
            theirs(text, past_key_values=cache, use_cache=True)
        flops, moved, _ = lesson.arithmetic_intensity(size, batch, cached or new, phase)
        unmasked = batch * 4 * 8 * 4 * 3 * (new * new - new * (new + 1) // 2) if new > 1 else 0
        agrees(
            f"arithmetic_intensity: FLOPs, {phase}",
            "PyTorch's FLOP counter, transformers Llama",
            torch.tensor(flops + unmasked).double(),
            torch.tensor(counter.get_total_flops()).double(),
            2e-3,
        )
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert moved == 2 * (size.parameters + held)


@torch.no_grad()
def test_accumulated_attention(lesson, agrees, pair):
    """A prompt and three decode steps: the scores are the column sums of transformers' attention weights."""
    _, theirs = pair
    text = torch.randint(0, 50, (2, 9), generator=generator(6))
    whole = theirs(text, output_attentions=True).attentions
    cache, scores = cache_utils.DynamicCache(), [None] * 3
    for part in text.split((6, 1, 1, 1), dim=1):
        weights = theirs(part, past_key_values=cache, use_cache=True, output_attentions=True).attentions
        scores = [lesson.accumulate_attention(w, 2, s) for w, s in zip(weights, scores, strict=True)]
    for found, attention in zip(scores, whole, strict=True):
        right = attention.view(2, 2, 2, 9, 9).sum(dim=(2, 3))
        agrees("accumulate_attention", "transformers' attention weights", found, right, 1e-6)
