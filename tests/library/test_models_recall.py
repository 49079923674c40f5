"""Documents that ask a model to look back: what they are, and how they are counted and judged."""

import numpy as np
import pytest
import torch

from llm40.models import Config, Llama, load_tokenizer
from llm40.models import recall as recall_documents
from llm40.models.corpus import Windows
from llm40.models.heads import attention_weights, head_scores
from llm40.models.llama import angles
from llm40.models.recall import DISTANCES, Mixture, Recall, copied, draw_passkey, draw_word, held_out

CONTEXT = 512
MICRO = Config(vocab_size=4096, hidden_size=16, layers=2, heads=4, kv_heads=2, mlp_size=24, context=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def text(tokenizer):
    lines = (f"value_{i} = {i * i}\nif value_{i} > {i}:\n    print('line', {i})\n" for i in range(600))
    return Windows({"source/a": "".join(lines), "source/b": "Some prose about nothing. " * 40}, tokenizer, CONTEXT, 1)


@pytest.fixture(scope="module")
def recall(text, tokenizer):
    return Recall(text.documents, tokenizer, CONTEXT)


def test_windows_depend_on_seed_and_index_alone(text, tokenizer, recall):
    again = Recall(text.documents, tokenizer, CONTEXT)
    for index in (5, 0, 3):
        for one, two in zip(recall.window(index), again.window(index), strict=True):
            assert np.array_equal(one, two)
    assert not np.array_equal(recall.window(0)[0], recall.window(1)[0])
    assert not np.array_equal(recall.window(0)[0], Recall(text.documents, tokenizer, CONTEXT, seed=1).window(0)[0])


def test_windows_are_full_and_mostly_counted(recall, tokenizer):
    shares = []
    for index in range(100):
        tokens, counted = recall.window(index)
        assert tokens.shape == counted.shape == (CONTEXT + 1,)
        assert tokens.dtype == np.int64
        assert counted.dtype == bool
        assert tokens[0] == tokenizer.eos
        assert tokens.min() >= 0
        assert tokens.max() < 4096
        shares.append(counted.mean())
    assert 0.5 < np.mean(shares) < 0.8
    assert max(shares) < 1


def first_seen_at(tokens: np.ndarray) -> dict[tuple[int, int], int]:
    pairs = {}
    for i in range(len(tokens) - 1):
        pairs.setdefault((tokens[i], tokens[i + 1]), i)
    return pairs


def test_what_is_counted_in_strings_has_stood_before(recall):
    for seed in range(60):
        tokens, counted = recall.strings(np.random.default_rng(seed), 200 + seed)
        assert len(tokens) == len(counted) == 200 + seed
        assert tokens.min() >= 16  # no special token
        pairs = first_seen_at(tokens)
        for i in np.flatnonzero(counted):
            assert pairs[tokens[i - 1], tokens[i]] < i - 1 or tokens[:i].tolist().count(tokens[i]) > 0


def test_repeats_lie_at_every_distance(recall):
    """How far back the last occurrence of a counted pair of tokens is, in 400 windows of strings."""
    distances = np.zeros(CONTEXT, dtype=int)
    for seed in range(400):
        tokens, counted = recall.strings(np.random.default_rng(seed), CONTEXT)
        last = {}
        for i in range(1, len(tokens)):
            pair = tokens[i - 1], tokens[i]
            if counted[i] and pair in last:
                distances[i - last[pair]] += 1
            last[pair] = i
    for start in range(2, 480, 40):
        assert distances[start : start + 40].sum() > 50, start


def test_no_piece_is_as_long_as_the_evaluations(recall, monkeypatch):
    drawn = []
    draw = lambda n: drawn.append(n) or np.arange(16, 16 + n)
    for seed in range(2000):
        recall._repeated(np.random.default_rng(seed), CONTEXT, draw)
    assert not set(drawn) & set(DISTANCES)
    assert {31, 33} <= set(drawn)
    assert max(drawn) > 240


def test_spans_are_real_text(recall, text):
    prose = np.concatenate(text.documents).tolist()
    joined = " ".join(map(str, prose))
    tokens, counted = recall.spans(np.random.default_rng(3), 300)
    new = tokens[~counted]
    assert " ".join(map(str, new[:2])) in joined


def test_pairs_ask_for_what_was_listed(recall, tokenizer):
    for seed in range(20):
        tokens, counted = recall.pairs(np.random.default_rng(seed), 300)
        lines = tokenizer.decode(tokens).split("\n")[:-1]
        said = {}
        asked = 0
        for line in lines:
            key, *value = line.split(next(joint for joint in recall_documents._JOINTS if joint in line))
            assert not held_out(key)
            asked += key in said
            assert said.setdefault(key, value) == value
        assert asked >= 2
        assert counted.sum() >= 4 * asked / 2
    first = int(np.argmax(counted))
    value = tokenizer.decode(tokens[first : first + int(np.argmin(counted[first:]))])
    assert value in tokenizer.decode(tokens[:first])


def test_passkeys_are_told_then_asked_for(recall, tokenizer):
    for seed in range(20):
        tokens, counted = recall.passkey(np.random.default_rng(seed), 400)
        assert abs(len(tokens) - 400) < 3
        answers = [
            part
            for part, known in zip(*_runs(tokens, counted), strict=True)
            if known and (word := tokenizer.decode(part)).startswith(" ") and word[1:-1].isdigit() and word[-1] == "."
        ]
        assert 1 <= len(answers) <= 3
        for answer in answers:
            key = tokenizer.decode(answer)[1:-1]
            assert not held_out(key)
            assert tokenizer.decode(tokens).count(key) >= 2


def _runs(tokens, counted):
    cuts = np.flatnonzero(np.diff(counted)) + 1
    return np.split(tokens, cuts), [part[0] for part in np.split(counted, cuts)]


def test_held_out_keys_are_a_tenth_and_never_drawn():
    rng = np.random.default_rng(0)
    assert np.mean([held_out(str(i)) for i in range(5000)]) == pytest.approx(0.1, abs=0.02)
    for evaluation in (False, True):
        assert all(held_out(draw_passkey(rng, 5, evaluation)) == evaluation for _ in range(50))
        assert all(held_out(draw_word(rng, evaluation)) == evaluation for _ in range(50))


# --- among text


@pytest.mark.parametrize(("share", "batch"), [(0.0, 4), (0.4, 8), (0.1, 4), (1.0, 2)])
def test_mixture_holds_its_share_and_every_window_in_order(text, recall, share, batch):
    mixture = Mixture(text, recall, batch, share)
    steps, of_text, of_recall = 13, 0, 0
    for step in range(steps):
        windows, counted = mixture.batch_of(step)
        assert windows.shape == counted.shape == (batch, CONTEXT + 1)
        for window, row in zip(windows, counted, strict=True):
            if row.all():
                assert np.array_equal(window, text[of_text][0])
                of_text += 1
            else:
                assert np.array_equal(window, recall.window(of_recall)[0])
                of_recall += 1
    assert of_recall == int(steps * batch * share)
    again = Mixture(text, recall, batch, share).batch_of(7)[0]
    assert np.array_equal(again, mixture.batch_of(7)[0])


def test_mixture_refuses_what_it_cannot_be(text, recall, tokenizer):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mixture(text, recall, 4, 1.5)


# --- judging


class Copier(torch.nn.Module):
    """Guesses the token after the last earlier occurrence of the present one: a perfect induction head."""

    def __init__(self):
        super().__init__()
        self.config, self.embed_tokens = MICRO, torch.nn.Embedding(4096, 1)

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 4096)
        for row, sequence in enumerate(tokens.tolist()):
            last = {}
            for i, token in enumerate(sequence):
                if token in last and last[token] + 1 <= i:
                    logits[row, i, sequence[last[token] + 1]] = 1
                last[token] = i
        return logits


def test_copies_are_counted():
    found = copied(Copier(), examples=2)
    assert found.keys() == {f"copied at {distance}" for distance in DISTANCES}
    assert all(share > 0.9 for share in found.values())  # a token that stands twice in a string misleads it
    torch.manual_seed(0)
    assert all(share < 0.05 for share in copied(Llama(MICRO).eval(), examples=2).values())
    assert copied(Copier(), examples=1, seed=1) == copied(Copier(), examples=1, seed=1)


@torch.inference_mode()
def test_attention_weights_are_those_of_the_model():
    torch.manual_seed(1)
    model = Llama(MICRO).eval()
    for parameter in model.parameters():
        parameter.mul_(8) if parameter.dim() == 2 else None
    tokens = torch.randint(16, 4096, (2, 20))
    weights = attention_weights(model, tokens)
    assert weights.shape == (2, 2, 4, 20, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4, 20))
    assert weights.triu(1).max() == 0
    # From them and the values, the first layer's output follows.
    block = model.layers[0]
    x = block.input_layernorm(model.embed_tokens(tokens))
    v = block.self_attn.v_proj(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, dim=1)
    expected = block.self_attn.o_proj((weights[0] @ v).transpose(1, 2).flatten(-2))
    cos, sin = angles(torch.arange(20), MICRO)
    torch.testing.assert_close(block.self_attn(x, cos, sin, None, None), expected, atol=1e-4, rtol=1e-4)


def test_head_scores_of_perfect_heads():
    tokens = torch.cat([torch.arange(20, 26), torch.arange(20, 26)])[None]
    previous, induction, sink = torch.zeros(3, 12, 12)
    previous[range(1, 12), range(11)] = 1
    induction[range(6, 12), range(1, 7)] = 1
    sink[:, 0] = 1
    scores = head_scores(torch.stack([previous, induction, sink])[None, None], tokens)
    for index, name in enumerate(("previous_token", "induction", "sink")):
        assert scores[name].shape == (1, 3)
        assert scores[name][0, index] == 1
    assert scores["sink"][0, 1] == 0
