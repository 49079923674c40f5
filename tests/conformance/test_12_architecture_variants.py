"""Lesson 12 against PyTorch, Hugging Face transformers and sacreBLEU: layers, models, counts and scores."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

TOLERANCE = 1e-12

TOTALS = {
    "GPT-2": 124_439_808,
    "LLaMA-7B": 6_738_415_616,
    "Llama-2-70B": 68_976_648_192,
    "Mistral-7B": 7_241_732_096,
    "Mixtral-8x7B": 46_702_792_704,
    "DeepSeek-V3": 671_026_404_352,
}


@pytest.fixture
def lesson(reference):
    return reference("12")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(lesson, module: nn.Module) -> nn.Module:
    return lesson.randomized(module, torch.Generator().manual_seed(0)).cpu()


def test_encoder_layer(lesson, agrees):
    mine = randomized(lesson, lesson.EncoderLayer(24, 4, 40))
    twin = lesson.pytorch_layer(mine, nn.TransformerEncoderLayer, 4)
    x, real = normal(3, 7, 24, seed=1), torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    expected = twin(x, src_key_padding_mask=~real)
    agrees("EncoderLayer", "nn.TransformerEncoderLayer", mine(x, real[:, None, None])[real], expected[real], TOLERANCE)


def test_decoder_layer(lesson, agrees):
    mine = randomized(lesson, lesson.DecoderLayer(24, 4, 40))
    twin = lesson.pytorch_layer(mine, nn.TransformerDecoderLayer, 4)
    x, memory = normal(3, 5, 24, seed=1), normal(3, 7, 24, seed=2)
    causal, real = torch.ones(5, 5).tril().bool(), torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    expected = twin(x, memory, tgt_mask=~causal, memory_key_padding_mask=~real)
    agrees(
        "DecoderLayer", "nn.TransformerDecoderLayer", mine(x, memory, causal, real[:, None, None]), expected, TOLERANCE
    )


def test_whole_transformer(lesson, agrees):
    """nn.Transformer itself; its norms after both stacks, which the model of 2017 has not, are taken out."""
    mine = randomized(lesson, lesson.Transformer(31, d_model=24, heads=4, layers=3, d_ff=40))
    theirs = nn.Transformer(24, 4, 3, 3, 40, dropout=0.0, batch_first=True).double()
    theirs.encoder.norm = theirs.decoder.norm = None
    for i in range(3):
        theirs.encoder.layers[i] = lesson.pytorch_layer(mine.encoder[i], nn.TransformerEncoderLayer, 4)
        theirs.decoder.layers[i] = lesson.pytorch_layer(mine.decoder[i], nn.TransformerDecoderLayer, 4)
    source, target = (torch.randint(1, 31, (3, n), generator=torch.Generator().manual_seed(n)) for n in (8, 6))
    source[1, 3:] = 0
    table, positions = mine.embedding.weight, lesson.sinusoids(8, 24).double()
    hidden = theirs(
        F.embedding(source, table) * 24**0.5 + positions,
        F.embedding(target, table) * 24**0.5 + positions[:6],
        tgt_mask=torch.ones(6, 6).triu(1).bool(),
        src_key_padding_mask=source == 0,
        memory_key_padding_mask=source == 0,
    )
    agrees("Transformer", "nn.Transformer", mine(source, target), F.linear(hidden, table), TOLERANCE)


@torch.no_grad()
def test_bert_layer(lesson, agrees, transformers):
    """BERT's layer is the encoder layer of 2017 with GELU and another eps."""
    from transformers.models.bert.modeling_bert import BertLayer

    config = transformers.BertConfig(
        hidden_size=24,
        num_attention_heads=4,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    theirs = randomized(lesson, BertLayer(config)).eval()
    mine = lesson.EncoderLayer(24, 4, 40, activation=F.gelu).double()
    pairs = (
        (mine.self_attn.q_proj, theirs.attention.self.query),
        (mine.self_attn.k_proj, theirs.attention.self.key),
        (mine.self_attn.v_proj, theirs.attention.self.value),
        (mine.self_attn.out_proj, theirs.attention.output.dense),
        (mine.norm1, theirs.attention.output.LayerNorm),
        (mine.linear1, theirs.intermediate.dense),
        (mine.linear2, theirs.output.dense),
        (mine.norm2, theirs.output.LayerNorm),
    )
    for here, there in pairs:
        here.load_state_dict(there.state_dict())
    mine.norm1.eps = mine.norm2.eps = config.layer_norm_eps
    x, real = normal(2, 6, 24, seed=1), torch.arange(6) < torch.tensor([6, 4])[:, None]
    additive = torch.zeros(2, 1, 1, 6).double().masked_fill(~real[:, None, None], torch.finfo(torch.float64).min)
    out = theirs(x, additive)
    out = out[0] if isinstance(out, tuple) else out
    agrees("EncoderLayer with F.gelu", "transformers BertLayer", mine(x, real[:, None, None])[real], out[real], 1e-6)


@torch.no_grad()
def test_visibility_in_gpt2_and_bert(lesson, agrees, transformers):
    """Which positions of the input move which outputs, found by changing one token at a time."""
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8))
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=20
        )
    )
    tokens = torch.arange(1, 7)[None]
    for model, kind in ((gpt2.eval(), "decoder"), (bert.eval(), "encoder")):
        before = model(tokens).last_hidden_state[0]
        columns = []
        for j in range(6):
            changed = tokens.clone()
            changed[0, j] = 15
            columns.append((model(changed).last_hidden_state[0] - before).abs().amax(-1) > 1e-6)
        agrees(
            f"visibility {kind}",
            f"transformers {type(model).__name__}",
            lesson.visibility(kind, 0, 6),
            torch.stack(columns, 1),
            0.0,
        )


def small_t5(transformers) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).double().eval()


@torch.no_grad()
def test_visibility_in_t5(lesson, agrees, transformers):
    """T5's stacks see what a prefix LM over source and target sees."""
    model, source, target = small_t5(transformers), torch.arange(1, 5)[None], torch.arange(6, 9)[None]

    def states(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=source, decoder_input_ids=target, output_hidden_states=True)
        return torch.cat([out.encoder_last_hidden_state, out.decoder_hidden_states[-1]], 1)[0]

    columns = []
    for j in range(7):
        changed = [source.clone(), target.clone()]
        changed[j >= 4][0, j - 4 * (j >= 4)] = 15
        columns.append((states(*changed) - states(source, target)).abs().amax(-1) > 1e-9)
    agrees(
        "visibility prefix",
        "transformers T5, encoder and decoder",
        lesson.visibility("prefix", 4, 7),
        torch.stack(columns, 1),
        0.0,
    )


def test_teacher_forcing_and_loss_in_t5(lesson, agrees, transformers):
    """T5 shifts its labels itself; the lesson's loop shifts the target. The same inputs, and the same loss."""
    model = small_t5(transformers)
    source = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0], [9, 9, 2, 0]])
    target = torch.cat([torch.zeros(3, 1, dtype=torch.long), labels], 1)  # T5's start token is its padding
    seen = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t5 = model

        def forward(self, source: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            seen.append((source, inputs))
            return self.t5(input_ids=source, decoder_input_ids=inputs).logits

    expected_inputs = model._shift_right(labels)
    losses = lesson.train(
        Recorder(),
        source,
        target,
        steps=1,
        batch=64,
        generator=torch.Generator().manual_seed(2),
        rate_fn=lambda k: 0.0,
        loss_fn=lambda logits, labels: lesson.smoothed_loss(logits, labels, pad=0, smoothing=0.0),
    )
    rows = torch.randint(3, (64,), generator=torch.Generator().manual_seed(2))
    agrees("train, decoder inputs", "transformers T5 _shift_right", seen[0][1], expected_inputs[rows], 0.0)
    with torch.no_grad():
        theirs = model(input_ids=source[rows], labels=labels[rows].masked_fill(labels[rows] == 0, -100)).loss
    agrees("smoothed_loss, smoothing 0", "transformers T5 loss", torch.tensor(losses[0]), theirs, 1e-6)


def test_smoothed_loss(lesson, agrees):
    logits, labels = normal(3, 5, 9, seed=1), torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(2))
    labels[0, :2] = 4
    wanted = 0.8 * F.one_hot(labels, 9).double() + 0.2 / 8 * (torch.arange(9) != 4).double()
    expected = F.cross_entropy(logits[labels != 4], wanted[labels != 4])
    agrees(
        "smoothed_loss",
        "F.cross_entropy with distributions",
        lesson.smoothed_loss(logits, labels, 4, 0.2),
        expected,
        TOLERANCE,
    )


def test_beam_search(lesson, agrees, transformers):
    """transformers' beam search on a small GPT-2. Its penalty is length^α, so both search without one; its finished
    hypotheses compete with the living for places, so the beam is as wide as the space."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=6, n_positions=16, initializer_range=0.6
    )
    model = transformers.GPT2LMHeadModel(config).eval()

    def step_fn(prefixes: torch.Tensor) -> torch.Tensor:
        return model(prefixes).logits[:, -1].log_softmax(-1)

    with torch.no_grad():
        mine = lesson.beam_search(step_fn, 40, 0.0, bos=1, eos=2, max_len=3)[:5]
        theirs = model.generate(
            torch.tensor([[1]]),
            num_beams=40,
            num_return_sequences=40,
            max_new_tokens=3,
            length_penalty=0.0,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            early_stopping=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    ended = [
        (row, score)
        for row, score in zip(theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True)
        if 2 in row
    ]
    ended = [(tuple(row[1 : row.index(2) + 1]), score) for row, score in ended][:5]
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in ended]
    agrees(
        "beam_search, scores",
        "transformers generate",
        torch.tensor([s for _, s in mine]),
        torch.tensor([s for _, s in ended]),
        1e-5,
    )


@pytest.mark.parametrize("references", [1, 3])
def test_corpus_bleu(lesson, agrees, references):
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(references)
    for vocab in (3, 6, 12):
        truth = [
            [[str(rng.randrange(vocab)) for _ in range(rng.randint(4, 14))] for _ in range(references)]
            for _ in range(30)
        ]
        guesses = [
            [t if rng.random() < 0.85 else str(rng.randrange(vocab)) for t in rng.choice(several)] for several in truth
        ]
        guesses = [g[: rng.randint(max(1, len(g) - 3), len(g))] for g in guesses]
        by_reference = [[" ".join(several[i]) for several in truth] for i in range(references)]
        theirs = sacrebleu.corpus_bleu(
            [" ".join(g) for g in guesses], by_reference, tokenize="none", smooth_method="none", force=True
        )
        mine = lesson.corpus_bleu(guesses, truth)
        agrees(
            f"corpus_bleu, {references} reference(s)", "sacreBLEU", torch.tensor(mine), torch.tensor(theirs.score), 1e-6
        )


def published(transformers, config: dict):
    """transformers' configuration object of a lesson's dictionary."""
    kind = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "deepseek_v3": "DeepseekV3"}[
        config["model_type"]
    ]
    fields = {k: v for k, v in config.items() if k != "model_type"}
    return getattr(transformers, f"{kind}Config")(**fields)


def on_meta(transformers, config: dict) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(published(transformers, config))


@pytest.mark.parametrize("name", list(TOTALS))
def test_parameters_of_published_models(lesson, agrees, transformers, name):
    model = on_meta(transformers, lesson.CONFIGS[name])
    total = sum(p.numel() for p in model.parameters())
    assert total == TOTALS[name]
    mine = sum(lesson.count_parameters(lesson.CONFIGS[name]).values())
    agrees(f"count_parameters {name}", "transformers on the meta device", torch.tensor(mine), torch.tensor(total), 0.0)


@pytest.mark.parametrize("name", ["Mixtral-8x7B", "DeepSeek-V3"])
def test_active_parameters(lesson, agrees, transformers, name):
    """What the routed experts hold, found by their names, comes down to the share that a token meets."""
    config = lesson.CONFIGS[name]
    experts = config.get("num_local_experts") or config["n_routed_experts"]
    model = on_meta(transformers, config)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    active = sum(p.numel() for p in model.parameters()) - routed // experts * (experts - config["num_experts_per_tok"])
    mine = sum(lesson.count_parameters(config, active=True).values())
    agrees(
        f"count_parameters {name}, active",
        "transformers on the meta device",
        torch.tensor(mine),
        torch.tensor(active),
        0.0,
    )


def variations(lesson) -> list[dict]:
    """The published configs with other numbers, small enough to run."""
    small = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
    }
    gpt2, llama = lesson.CONFIGS["GPT-2"], lesson.CONFIGS["LLaMA-7B"]
    mixtral, deepseek = lesson.CONFIGS["Mixtral-8x7B"], lesson.CONFIGS["DeepSeek-V3"]
    mla = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 10,
        "q_lora_rank": 9,
        "kv_lora_rank": 7,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_key_value_heads": 6,
    }
    return [
        gpt2 | {"vocab_size": 41, "n_positions": 32, "n_embd": 12, "n_layer": 3, "n_head": 3},
        gpt2 | {"vocab_size": 41, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_inner": 17},
        llama | small | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        llama | small | {"num_key_value_heads": 3, "head_dim": 8},
        lesson.CONFIGS["Mistral-7B"] | small | {"num_key_value_heads": 1},
        mixtral | small | {"num_key_value_heads": 2, "num_local_experts": 5},
        deepseek | small | mla | {"n_routed_experts": 16, "num_experts_per_tok": 3},
        deepseek
        | small
        | mla
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "q_lora_rank": None},
    ]


@pytest.mark.parametrize("case", range(8))
def test_parameters_of_other_sizes(lesson, agrees, transformers, case):
    config = variations(lesson)[case]
    total = sum(p.numel() for p in on_meta(transformers, config).parameters())
    mine = sum(lesson.count_parameters(config).values())
    agrees(
        f"count_parameters, small {config['model_type']}",
        "transformers on the meta device",
        torch.tensor(mine),
        torch.tensor(total),
        0.0,
    )


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("training", [False, True])
def test_flops(lesson, agrees, transformers, case, training):
    """PyTorch's counter on transformers' dense models."""
    from torch.utils.flop_counter import FlopCounterMode

    config, batch, seq = variations(lesson)[case], 2, 11
    settings = published(transformers, config)
    settings._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    tokens = torch.randint(config["vocab_size"], (batch, seq), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens, use_cache=False).logits
        if training:
            logits.sum().backward()
    counted = counter.get_total_flops() / (batch * seq)
    mine = lesson.flops_per_token(config, seq, training)
    what = f"flops_per_token, {config['model_type']}, {'training' if training else 'forward'}"
    agrees(what, "torch.utils.flop_counter on transformers", torch.tensor(float(mine)), torch.tensor(counted), 0.0)


def test_bert_mask_rates(lesson, agrees, transformers):
    """Rates of the lesson's masking beside those of transformers' collator, over half a million tokens each."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(2000))]
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocab)})
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=1)
    tokens = torch.randint(5, len(vocab), (1000, 500), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id

    def rates(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chosen = labels != -100
        masked = (inputs[chosen] == tokenizer.mask_token_id).double().mean()
        same = (inputs[chosen] == tokens[chosen]).double().mean()
        assert not chosen[:, [0, -1]].any()
        return torch.stack([chosen.double().mean(), masked, same, 1 - masked - same])

    theirs = rates(*collator.torch_mask_tokens(tokens.clone()))
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    mine = rates(
        *lesson.bert_mask(tokens, special, tokenizer.mask_token_id, len(vocab), torch.Generator().manual_seed(1))
    )
    # Six standard deviations of the difference of two shares of 75,000 tokens.
    agrees("bert_mask, rates", "transformers data collator (sampled)", mine, theirs, 6 * (2 * 0.16 / 75_000) ** 0.5)
