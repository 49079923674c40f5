"""Lesson 14 against Hugging Face transformers: the same weights, both ways, logits, generation, and the samplers."""

import pytest
import torch

import llm40  # noqa: F401  before transformers, which imports Triton

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-11
SHAPES = [(4, 4, False), (4, 2, True), (6, 1, False), (2, 2, True)]  # heads, kv_heads, tied


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("14")


def hugging_face(config) -> transformers.LlamaForCausalLM:
    """transformers' model of one of our configurations, with its own random weights."""
    torch.manual_seed(14)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
            initializer_range=0.2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


class Angles(torch.nn.Module):
    """transformers' rotary embedding with its angles in float64."""

    def __init__(self, theta: float, head_dim: int):
        super().__init__()
        self.frequencies = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * torch.tensor(2 * self.frequencies, dtype=torch.float64)
        return angles.cos(), angles.sin()


def all_float64(model: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """The model in float64, also where transformers computes in float32 whatever the weights are: norms and angles."""
    config = model.config
    model.model.rotary_emb = Angles(config.rope_parameters["rope_theta"], config.head_dim)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model.double()


def pair(lesson, heads: int, kv_heads: int, tied: bool, dtype: torch.dtype = torch.float64):
    """(ours, theirs) with the same weights, theirs loaded into ours."""
    config = lesson.LlamaConfig(101, 48, 72, 3, heads, kv_heads, tied=tied, rope_theta=500.0, eps=1e-5)
    theirs, ours = hugging_face(config), lesson.Llama(config).to(dtype)
    theirs = all_float64(theirs) if dtype == torch.float64 else theirs
    ours.load_state_dict(lesson.rename_state_dict(theirs.state_dict(), config))
    return ours.eval(), theirs


def ids(*shape: int, vocab: int = 101, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits(lesson, agrees, heads, kv_heads, tied, dtype):
    ours, theirs = pair(lesson, heads, kv_heads, tied, dtype)
    tokens = ids(2, 60)
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE if dtype == torch.float64 else 2e-5
    agrees(f"Llama, {name}", "transformers LlamaForCausalLM", ours(tokens), theirs(tokens).logits, tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), SHAPES)
def test_logits_with_a_cache(lesson, agrees, heads, kv_heads, tied):
    ours, theirs = pair(lesson, heads, kv_heads, tied)
    tokens, cache, their_cache, at = ids(2, 30), lesson.Cache(), transformers.DynamicCache(config=theirs.config), 0
    for size in (12, 1, 1, 9, 7):
        new = tokens[:, at : at + size]
        expected = theirs(new, past_key_values=their_cache, use_cache=True).logits
        agrees("Llama with a cache", "transformers, DynamicCache", ours(new, cache), expected, TOLERANCE)
        at += size
    for layer, (k, v) in zip(their_cache.layers, cache.layers, strict=True):
        agrees("the cached keys", "transformers, DynamicCache", k, layer.keys, TOLERANCE)
        agrees("the cached values", "transformers, DynamicCache", v, layer.values, TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), SHAPES)
def test_padding_and_positions(lesson, agrees, heads, kv_heads, tied):
    ours, theirs = pair(lesson, heads, kv_heads, tied)
    tokens, real = ids(3, 11), torch.ones(3, 11, dtype=torch.bool)
    real[0, :4] = real[1, :9] = False
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=real.long(), position_ids=positions).logits[real]
    what, against = "Llama, padded on the left", "transformers, attention_mask, position_ids"
    agrees(what, against, ours(tokens, None, real, positions)[real], expected, TOLERANCE)
    # Each row shifted by its padding: only differences of positions count.
    agrees(what + ", positions by column", against, ours(tokens, None, real)[real], expected, TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), SHAPES)
def test_our_weights_in_theirs(lesson, agrees, heads, kv_heads, tied):
    config = lesson.LlamaConfig(101, 48, 72, 3, heads, kv_heads, tied=tied, rope_theta=500.0)
    torch.manual_seed(3)
    ours, theirs = lesson.Llama(config).double().eval(), all_float64(hugging_face(config))
    for p in ours.parameters():
        p.add_(torch.randn_like(p) / 5)
    missing, unexpected = theirs.load_state_dict(lesson.to_hugging_face(ours.state_dict(), config), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    theirs.tie_weights()
    tokens = ids(2, 40)
    agrees("to_hugging_face", "transformers LlamaForCausalLM", ours(tokens), theirs(tokens).logits, TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_by_transformers(lesson, tmp_path, tied):
    """The file that transformers writes, which for a tied model lacks the head, has exactly the expected names."""
    import safetensors.torch

    config = lesson.LlamaConfig(101, 48, 72, 3, 4, 2, tied=tied)
    theirs = hugging_face(config)
    theirs.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    ours = lesson.Llama(config)
    ours.load_state_dict(lesson.rename_state_dict(state, config))
    assert set(lesson.to_hugging_face(ours.state_dict(), config)) == set(state)


def test_llama_160m(lesson, agrees):
    """Names, shapes and the count, on the meta device, where no number is made."""
    with torch.device("meta"):
        ours, theirs = lesson.Llama(lesson.LLAMA_160M), hugging_face(lesson.LLAMA_160M)
    renamed = lesson.rename_state_dict(theirs.state_dict(), lesson.LLAMA_160M)
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in ours.state_dict().items()}
    back = lesson.to_hugging_face(ours.state_dict(), lesson.LLAMA_160M)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in theirs.state_dict().items()}
    count, expected = (torch.tensor(sum(p.numel() for p in model.parameters())) for model in (ours, theirs))
    assert count == 162_417_408
    agrees("LLAMA_160M, parameters", "transformers, meta device", count, expected, 0.0)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), SHAPES)
def test_greedy_generation(lesson, agrees, heads, kv_heads, tied):
    ours, theirs = pair(lesson, heads, kv_heads, tied)
    prompts = [ids(n, seed=n).tolist() for n in (7, 2, 12)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, longest:]
    written = torch.tensor(lesson.generate(ours, prompts, 20))
    agrees("generate, greedy", "transformers generate", written, expected, 0.0)
    eos = int(expected[0, 8])
    theirs.generation_config.eos_token_id = eos
    stopped = theirs.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, longest:].tolist()
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in stopped]
    assert lesson.generate(ours, prompts, 20, eos=eos) == cut


SETTINGS = [
    (0.7, None, None, None),
    (1.8, None, None, None),
    (1.0, 5, None, None),
    (1.0, 1000, None, None),
    (1.0, None, 0.8, None),
    (1.0, None, 0.05, None),
    (1.0, None, None, 0.1),
    (1.0, None, None, 0.9),
    (0.6, 20, 0.9, 0.05),
    (1.5, 8, 0.6, 0.2),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_filters(lesson, agrees, temperature, top_k, top_p, min_p):
    """Which tokens stay, and their logits, in the order in which transformers' generate applies the filters."""
    logits = 3 * torch.randn(200, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    process = transformers.generation.logits_process
    expected = process.TemperatureLogitsWarper(temperature)(None, logits)
    expected = expected if top_k is None else process.TopKLogitsWarper(top_k)(None, expected)
    expected = expected if top_p is None else process.TopPLogitsWarper(top_p)(None, expected)
    expected = expected if min_p is None else process.MinPLogitsWarper(min_p)(None, expected)
    found = lesson.filter_logits(logits, temperature, top_k, top_p, min_p)
    kept = expected.isfinite()
    agrees("filter_logits, tokens kept", "transformers' logits warpers", found.isfinite().double(), kept.double(), 0.0)
    agrees("filter_logits, their logits", "transformers' logits warpers", found[kept], expected[kept], 1e-15)
    drawn = lesson.sample(logits, temperature, top_k, top_p, min_p, torch.Generator().manual_seed(3))
    assert bool(kept.gather(1, drawn[:, None]).all())


def test_order_of_the_filters(lesson):
    """transformers' generate builds its list of warpers in the order that the lesson states."""
    model = hugging_face(lesson.LlamaConfig(11, 8, 8, 1, 2, 1))
    config = transformers.GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    names = [type(p).__name__ for p in model._get_logits_processor(config, input_ids_seq_length=1, logits_processor=[])]
    wanted = ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]
    assert [name for name in names if name in wanted] == wanted


def test_learning_rate(lesson, agrees):
    """transformers' cosine schedule, whose first step has a rate of 0: ours is the same, one step earlier."""
    from transformers.optimization import get_cosine_schedule_with_warmup

    options = lesson.TrainOptions(steps=50, warmup=10, learning_rate=1.0, min_learning_rate=0.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=50)
    theirs = []
    for _ in range(51):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = torch.tensor([lesson.learning_rate(step, options) for step in range(50)], dtype=torch.float64)
    expected = torch.tensor(theirs[1:], dtype=torch.float64)
    agrees("learning_rate", "transformers cosine schedule, next step", ours, expected, 1e-12)
