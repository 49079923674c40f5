"""Lesson 16 against transformers (losses, masks, sentinels, MTP layers), exact enumeration and autograd."""

import math
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llm40  # noqa: F401  before transformers, which imports Triton

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 37, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("16")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def causal_models() -> dict[str, nn.Module]:
    torch.manual_seed(16)
    llama = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        **SMALL,
    )
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, **SMALL)
    return {
        "LlamaForCausalLM": transformers.LlamaForCausalLM(llama).eval(),
        "GPT2LMHeadModel": transformers.GPT2LMHeadModel(gpt2).eval(),
    }


# --- the causal loss ---


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_causal_loss(lesson, agrees, name):
    """Both of transformers' ways to leave out a token: a label of −100, and a pad id that is made one."""
    model = causal_models()[name]
    tokens = torch.randint(1, 37, (3, 9), generator=generator(1))
    labels = tokens.clone()
    labels[1, 5:] = lesson.IGNORE
    labels[2, :4] = lesson.IGNORE
    out = model(input_ids=tokens, labels=labels)
    agrees(
        "causal_lm_loss",
        f"transformers {name}, labels of −100",
        lesson.causal_lm_loss(out.logits, labels),
        out.loss,
        1e-6,
    )
    padded = tokens.masked_fill(labels == lesson.IGNORE, 0)
    agrees(
        "causal_lm_loss, pad = 0",
        f"transformers {name}, labels of −100",
        lesson.causal_lm_loss(out.logits, padded, 0),
        out.loss,
        1e-6,
    )
    weights = labels != lesson.IGNORE
    agrees(
        "causal_lm_loss, weights of 0 and 1",
        f"transformers {name}, labels of −100",
        lesson.causal_lm_loss(out.logits, tokens, weights=weights),
        out.loss,
        1e-6,
    )
    mine, theirs = (
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for loss in (lesson.causal_lm_loss(out.logits, labels), out.loss)
    )
    for a, b in zip(mine, theirs, strict=True):
        agrees("causal_lm_loss, gradients of all parameters", f"transformers {name}", a, b, 1e-5)


def test_accumulated(lesson, agrees):
    """transformers' num_items_in_batch: the right divisor when a batch comes in pieces."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = torch.randn(4, 7, 37, generator=generator(2), dtype=torch.float64)
    labels = torch.randint(0, 37, (4, 7), generator=generator(3))
    labels[0, 2:] = lesson.IGNORE
    count = (labels[:, 1:] != lesson.IGNORE).sum()
    pieces = sum(
        ForCausalLMLoss(logits[s], labels[s], 37, num_items_in_batch=count) for s in (slice(0, 1), slice(1, 4))
    )
    agrees(
        "causal_lm_loss",
        "transformers ForCausalLMLoss in two pieces, num_items_in_batch",
        lesson.causal_lm_loss(logits, labels),
        pieces,
        1e-6,
    )


# --- masks ---


def test_prefix_mask(lesson, agrees):
    masking = pytest.importorskip("transformers.masking_utils")
    prefix = torch.tensor([0, 1, 4, 7, 6])
    expected = masking.sdpa_mask(
        batch_size=5,
        q_length=7,
        kv_length=7,
        allow_is_causal_skip=False,
        mask_function=masking.or_masks(
            masking.causal_mask_function, lambda b, h, q, k: (q < prefix[b]) & (k < prefix[b])
        ),
    )
    agrees(
        "prefix_lm_mask",
        "transformers.masking_utils, causal or both in the prefix",
        lesson.prefix_lm_mask(prefix, 7),
        expected,
        0.0,
    )


# --- BERT ---


def test_masked_tokens(lesson, agrees):
    """The same shares as transformers' collator: what was chosen, and its three fates, over a million tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, 20)}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    tokens = torch.randint(0, 20, (1000, 1000), generator=generator(4))
    torch.manual_seed(5)
    theirs = collator.torch_mask_tokens(tokens.clone(), (tokens < 3).long())
    mine = lesson.mask_tokens(tokens, 0.3, 1, 20, generator(6), special=(0, 1, 2))

    def shares(inputs, targets):
        chosen = targets != lesson.IGNORE
        of_chosen = [
            inputs[chosen] == 1,
            inputs[chosen] == tokens[chosen],
            (inputs[chosen] != 1) & (inputs[chosen] != tokens[chosen]),
        ]
        return torch.stack([chosen.double().mean(), *(fate.double().mean() for fate in of_chosen)])

    assert torch.equal(mine[1][mine[1] != lesson.IGNORE], tokens[mine[1] != lesson.IGNORE])
    agrees(
        "mask_tokens, shares of a million tokens",
        "transformers DataCollatorForLanguageModeling",
        shares(*mine),
        shares(*theirs),
        0.004,
    )


# --- T5 ---


def by_masks(tokens: np.ndarray, hidden: np.ndarray, first: int) -> tuple[list[int], list[int]]:
    """Inputs and targets from a mask, in T5's array form: a sentinel where a run begins, its rest dropped.

    The targets are the same with the complement's runs. Their numbers agree where the text begins with a token that
    stays, as in T5 it always does; so one such token is put before both.
    """

    def squeeze(noise: np.ndarray) -> list[int]:
        begins = noise & ~np.concatenate([[False], noise[:-1]])
        numbered = np.where(begins, first + 1 - np.cumsum(begins), padded)
        return numbered[~(noise & ~begins)].tolist()

    padded, noise = np.concatenate([[-1], tokens]), np.concatenate([[False], hidden])
    return squeeze(noise)[1:], squeeze(~noise)


def test_span_corruption_from_its_mask(lesson):
    for seed in range(200):
        g = generator(seed)
        n = int(torch.randint(2, 60, (), generator=g))
        tokens = np.arange(1000, 1000 + n)
        inputs, targets = lesson.span_corruption(tokens.tolist(), 0.3, 2.5, 99, g)
        hidden = np.isin(tokens, targets)
        runs = int((hidden & ~np.concatenate([[False], hidden[:-1]])).sum())
        expected_inputs, expected_targets = by_masks(tokens, hidden, 99)
        assert inputs == expected_inputs
        # The lesson always closes the targets with a sentinel, this form where the text does not end in a run.
        assert targets == (expected_targets if not hidden[-1] else [*expected_targets, 99 - runs])


def test_t5_lengths_and_sentinels(lesson):
    """T5's published setting: 568 tokens become 512 inputs and 114 targets, end tokens included; its ids."""
    inputs, targets = lesson.span_corruption(list(range(568)), 0.15, 3.0, 32_099, generator(0))
    assert len(inputs) + 1 == 512  # their </s>
    assert len(targets) == 114  # the closing sentinel in place of their </s>
    tokenizer = transformers.T5Tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(f"<extra_id_{k}>") for k in range(100)]
    assert all(b == a - 1 for a, b in pairwise(ids))
    _, targets = lesson.span_corruption(list(range(1000, 1100)), 0.5, 2.0, ids[0], generator(1))
    assert [t for t in targets if t < 1000] == ids[:26]


def test_t5_reads_what_is_written(lesson, agrees):
    """Inputs and targets as T5 takes them: its loss is the causal loss of its decoder, which starts from a pad."""
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=60,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    ).eval()
    inputs, targets = lesson.span_corruption(list(range(1, 31)), 0.3, 2.0, 59, generator(2))
    out = t5(input_ids=torch.tensor([inputs]), labels=torch.tensor([targets]))
    logits = F.pad(out.logits, (0, 0, 0, 1))  # the last of them predicts nothing
    loss = lesson.causal_lm_loss(logits, torch.tensor([[0, *targets]]))
    agrees("span_corruption and causal_lm_loss", "transformers T5ForConditionalGeneration", loss, out.loss, 1e-6)


@pytest.mark.parametrize(("n", "rate", "mean_span"), [(9, 0.45, 2.0), (12, 0.25, 3.0), (11, 0.5, 1.7)])
def test_where_the_noise_falls(lesson, agrees, n, rate, mean_span):
    """The share of draws in which a position is hidden, against the list of all arrangements."""
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    possible = [h for h in combinations(range(n), noise) if sum(i - 1 not in h for i in h) == spans]
    exact = torch.tensor([sum(i in h for h in possible) / len(possible) for i in range(n)])
    g, seen, draws = generator(3), torch.zeros(n), 20_000
    for _ in range(draws):
        for t in lesson.span_corruption(list(range(100, 100 + n)), rate, mean_span, 50, g)[1]:
            if t >= 100:
                seen[t - 100] += 1
    agrees(
        f"span_corruption, n = {n}: where the noise falls",
        "all arrangements listed, 20,000 draws",
        seen / draws,
        exact,
        0.05,
    )


# --- fill in the middle ---


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_fill_in_the_middle(lesson, agrees, mode):
    """Against the law of the cut points: every one of the (n + 1)² pairs alike; and back to the document each time."""
    special, n, draws = lesson.Special(1, 2, 3, 4), 5, 20_000
    g, lengths = generator(4), Counter()
    for _ in range(draws):
        out = lesson.fill_in_the_middle(list(range(10, 10 + n)), 1.0, mode, special, g)
        suf, mid = out.index(2), out.index(3)
        prefix, suffix, rest = out[1:suf], out[suf + 1 : mid], out[mid + 1 : -1]
        parts = [prefix, rest, suffix]  # in SPM the prefix is empty here, and stands before the middle
        assert parts[0] + parts[1] + parts[2] == list(range(10, 10 + n))
        lengths[len(parts[2])] += 1
    exact = torch.tensor(
        [(2 * (n - m) + 1) / (n + 1) ** 2 for m in range(n + 1)]
    )  # the larger of two uniform draws is n − m
    agrees(
        f"fill_in_the_middle, {mode}: length of the suffix",
        "the larger of two uniform draws",
        torch.tensor([lengths[m] / draws for m in range(n + 1)]),
        exact,
        0.05,
    )


# --- several tokens ---


def test_parallel_heads(lesson, agrees):
    """A Llama trunk with four heads: value and all gradients against transformers' loss of each head."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    trunk = causal_models()["LlamaForCausalLM"].model.double()
    torch.manual_seed(1)
    heads = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 37)) for _ in range(4)).double()
    tokens = torch.randint(1, 37, (3, 11), generator=generator(5))
    tokens[0, 8:] = 0
    labels = tokens.masked_fill(tokens == 0, lesson.IGNORE)
    parameters = [*trunk.parameters(), *heads.parameters()]
    hidden = trunk(input_ids=tokens).last_hidden_state
    mine = lesson.parallel_mtp_loss(hidden, heads, labels)
    theirs = 0.0
    for k, head in enumerate(heads, 1):
        shifted = F.pad(labels, (0, k), value=lesson.IGNORE)[:, k:].contiguous()
        theirs = theirs + ForCausalLMLoss(head(hidden), None, 37, shift_labels=shifted)
    agrees("parallel_mtp_loss", "transformers ForCausalLMLoss, four shifts", mine, theirs, 1e-6)
    for a, b in zip(
        *(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (mine, theirs)),
        strict=True,
    ):
        if b is not None:
            agrees(
                "parallel_mtp_loss, gradients of trunk and heads",
                "transformers ForCausalLMLoss, four shifts",
                a,
                b,
                1e-5,
            )


class DeepSeekBlock(nn.Module):
    """transformers' DeepSeek-V3 decoder layer as the lesson's `block`: x → the same shape, causal."""

    def __init__(self, layer: nn.Module, rotary: nn.Module):
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def arguments(self, x: torch.Tensor) -> dict:
        places = torch.arange(x.shape[1])[None]
        hidden = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        return {"attention_mask": hidden, "position_ids": places, "position_embeddings": self.rotary(x, places)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, **self.arguments(x))


@torch.no_grad()
def test_sequential_mtp(lesson, agrees):
    """transformers' MtpLayer around DeepSeek-V3's decoder layer, three depths. There the embedding comes first."""
    layers = pytest.importorskip("transformers.modeling_layers")
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    if not hasattr(layers, "MtpLayer"):
        pytest.skip("this version of transformers has no MtpLayer")
    config = transformers.DeepseekV3Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        qk_nope_head_dim=8,
        first_k_dense_replace=9,
        attn_implementation="eager",
    )
    depth, seq = 3, 9
    torch.manual_seed(2)
    theirs = (
        nn.ModuleList(
            layers.MtpLayer(config, deepseek.DeepseekV3DecoderLayer, deepseek.DeepseekV3RMSNorm, k, use_post_norm=False)
            for k in range(depth)
        )
        .double()
        .eval()
    )
    for p in theirs.parameters():
        p.copy_(torch.randn(p.shape, generator=generator(p.numel())) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1))
    rotary = deepseek.DeepseekV3RotaryEmbedding(config)
    embed, head = nn.Embedding(37, 16).double(), nn.Linear(16, 37).double()
    blocks = iter(DeepSeekBlock(layer.mtp_block, rotary) for layer in theirs)
    mine = lesson.SequentialMTP(embed, head, 16, depth, lambda: next(blocks)).double()
    for k, layer in enumerate(theirs):
        mine.hnorm[k].weight.copy_(layer.hnorm.weight)
        mine.enorm[k].weight.copy_(layer.enorm.weight)
        mine.eh_proj[k].weight.copy_(torch.cat(layer.eh_proj.weight.chunk(2, dim=1)[::-1], dim=1))
    hidden, tokens = (
        3 * torch.randn(2, seq, 16, generator=generator(6)).double(),
        torch.randint(0, 37, (2, seq), generator=generator(7)),
    )
    state = hidden
    for k, (logits, layer) in enumerate(zip(mine(hidden, tokens), theirs, strict=True), 1):
        ahead = embed(tokens[:, k:])
        block = mine.blocks[k - 1]
        state = layer(ahead, state[:, :-1], past_key_values=None, **block.arguments(ahead))
        agrees(f"SequentialMTP, depth {k}", "transformers MtpLayer, DeepSeek-V3 block", logits, head(state), 1e-5)


def test_mtp_loss(lesson, agrees):
    """The report's sum over depths, as transformers' MtpModel shifts its labels."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    tokens = torch.randint(0, 37, (3, 8), generator=generator(8))
    tokens[2, 6:] = lesson.IGNORE
    logits = [torch.randn(3, 8 - k, 37, generator=generator(10 + k), dtype=torch.float64) for k in (1, 2, 3)]
    expected = 0.0
    for k, part in enumerate(logits, 1):
        shifted = F.pad(tokens, (0, 1), value=lesson.IGNORE)[:, k + 1 :].contiguous()
        expected = expected + ForCausalLMLoss(part, None, 37, shift_labels=shifted)
    agrees(
        "mtp_loss",
        "transformers ForCausalLMLoss, labels shifted by depth",
        lesson.mtp_loss(logits, tokens, 0.3),
        0.3 * expected / 3,
        1e-6,
    )


# --- leaks ---


def test_influence(lesson, agrees):
    """transformers' Llama and BERT as functions of their embeddings: against autograd's jacobian, and who sees whom."""
    torch.manual_seed(3)
    llama = causal_models()["LlamaForCausalLM"].model.double()
    bert = (
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=37,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
            )
        )
        .double()
        .eval()
    )
    x = torch.randn(6, 16, generator=generator(9), dtype=torch.float64)
    future = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    for name, model, leaks in (("LlamaModel", llama, []), ("BertModel", bert, future)):

        def run(x, model=model):
            return model(inputs_embeds=x[None]).last_hidden_state[0]

        jacobian = torch.autograd.functional.jacobian(run, x)
        agrees(
            "influence",
            f"torch.autograd.functional.jacobian, transformers {name}",
            lesson.influence(run, x),
            torch.linalg.vector_norm(jacobian, dim=(1, 3)),
            1e-9,
        )
        assert lesson.causality_leak(run, x) == leaks, name


def test_every_model_of_the_lesson_is_causal(lesson):
    """Changing a token, by differences and not by gradients: earlier logits stay as they are, bit for bit."""
    torch.manual_seed(4)
    trunk = lesson.Decoder(11, d_model=8, layers=2, heads=2).double()
    mtp = lesson.SequentialMTP(trunk.embed, trunk.head, 8, 2, lambda: lesson.Layer(8, 2)).double()
    tokens = torch.randint(0, 11, (1, 8), generator=generator(10))
    with torch.no_grad():
        before = [trunk(tokens), *mtp(trunk.hidden(tokens), tokens)]
        for place in range(8):
            other = tokens.clone()
            other[0, place] = (tokens[0, place] + 1) % 11
            after = [trunk(other), *mtp(trunk.hidden(other), other)]
            for k, (a, b) in enumerate(zip(before, after, strict=True)):
                early = max(place - k, 0)
                assert torch.equal(a[:, :early], b[:, :early])
                assert not torch.equal(a[:, early:], b[:, early:]) or early >= a.shape[1]


def test_floors_of_the_experiment():
    """The best possible losses that the experiment quotes, from the calendar."""
    import datetime

    days = [datetime.date(1950, 1, 1) + datetime.timedelta(days=d) for d in range(36_525)]
    assert days[-1] == datetime.date(2049, 12, 31)
    share = Counter(day.month for day in days)
    entropy = -sum(c / 36_525 * math.log(c / 36_525) for c in share.values())
    style = (1 - share[5] / 36_525) * math.log(2)
    assert round(entropy, 2) == 2.48
    assert round(style, 2) == 0.63
    assert round(math.log(36_525) + style, 1) == 11.1
