"""How the small models are made and judged, on models of a few thousand parameters."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from llm40.models import MTP, Cache, Config, Llama, load_tokenizer, scaling
from llm40.models.baselines import KneserNey, xz_bytes
from llm40.models.corpus import Windows, corpus
from llm40.models.evaluate import bits_per_byte, replace_part, token_losses
from llm40.models.mtp import Ahead
from llm40.models.train import Muon, Options, accumulate, learning_rate_factor, loss_of, make_optimizers, train

MICRO = Config(vocab_size=4096, hidden_size=16, layers=2, heads=2, kv_heads=1, mlp_size=24, context=16)
DOCUMENTS = {
    f"source/{i}": "".join(f"value_{i} = {j}\nprint(value_{i}, {i * j + j})\n" for j in range(12)) for i in range(12)
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


# --- corpus


def test_corpus_is_split_by_document():
    training, held_out = corpus()
    assert training.keys().isdisjoint(held_out)
    assert "documentation/assert" in held_out
    for text in held_out.values():
        assert text not in training.values()


def test_windows_are_the_documents(tokenizer):
    windows = Windows(DOCUMENTS, tokenizer, context=16, batch=4)
    total = sum(len(tokenizer.encode(text)) + 1 for text in DOCUMENTS.values())
    assert windows.tokens_per_epoch == total
    seen = np.concatenate([windows[step] for step in range(windows.steps_per_epoch)])
    assert seen.shape[1] == 17
    assert len(np.unique(seen, axis=0)) == len(seen)  # no window twice in an epoch
    assert 0 in seen  # <|endoftext|>
    texts = "<|endoftext|>".join([*DOCUMENTS.values(), ""])
    within = [row for row in seen if 0 not in row]
    assert within
    assert all(tokenizer.decode(row) in texts for row in within)


def test_windows_depend_on_seed_and_step_alone(tokenizer):
    one, two = Windows(DOCUMENTS, tokenizer, 16, 4), Windows(DOCUMENTS, tokenizer, 16, 4)
    steps = range(one.steps_per_epoch + 5)
    forward = [one[step].copy() for step in steps]
    backward = [two[step].copy() for step in reversed(steps)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(forward[0], forward[one.steps_per_epoch])  # another order in the next epoch
    assert not np.array_equal(forward[0], Windows(DOCUMENTS, tokenizer, 16, 4, seed=1)[0])
    with pytest.raises(ValueError, match="do not fill"):
        Windows(DOCUMENTS, tokenizer, 16, 1000)


# --- training


def test_schedule_warms_up_stays_and_decays():
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert learning_rate_factor(10_000, None, 10) == 1.0


def test_muon_is_pytorchs_in_float32():
    torch.manual_seed(0)
    for shape in ((20, 8), (8, 20), (16, 16)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        start = ours.detach().clone()
        one = Muon([ours], lr=0.1, weight_decay=0.1)
        other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            one.step(), other.step()
        # PyTorch rounds to bfloat16 between the steps: alike, not equal.
        moved = (ours - start).norm()
        assert (ours - theirs).norm() < 0.03 * moved
        assert moved > 0.5


def test_loss_and_gradient_are_means_over_counted_tokens():
    """Whatever the micro-batches, of which one counts nothing."""
    torch.manual_seed(0)
    model = Llama(MICRO)
    windows, counted = torch.randint(1, 4096, (5, 17)), torch.rand(5, 17) < 0.4
    counted[2:4] = False
    log_p = model(windows[:, :-1]).log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    expected = -log_p[counted[:, 1:]].mean()
    assert loss_of(model, windows, counted, "float32").item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with ThreadPoolExecutor(2) as pool:
        for micro_batch in (1, 2, 5):
            loss = accumulate(model, windows, counted, Options(micro_batch=micro_batch), pool)
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def run(folder, tokenizer, steps, **options):
    torch.manual_seed(0)
    model = Llama(MICRO)
    windows = Windows(DOCUMENTS, tokenizer, 16, 4)
    choices = Options(**{"steps": steps, "batch": 4, "warmup": 5, "evaluate_every": 10, **options})
    records = train(model, windows, Windows(DOCUMENTS, tokenizer, 16, 4, seed=9), choices, folder, "micro")
    return model.state_dict(), records


def test_training_lowers_the_loss(tmp_path, tokenizer):
    _, records = run(tmp_path, tokenizer, 60)
    assert records[0]["loss"] == pytest.approx(math.log(4096), abs=0.3)
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert records[-1]["held_out"] < 0.75 * records[0]["loss"]
    assert len((tmp_path / "micro.jsonl").read_text().splitlines()) == 60


def test_resumed_training_is_the_same_bit_for_bit(tmp_path, tokenizer):
    straight, records = run(tmp_path / "straight", tokenizer, 30)
    # Killed without warning after 15 checkpoints, then started again: by what it left on the disk, not by its memory.
    script = f"""
import os
from pathlib import Path
import test_models_training as t
from llm40.models import train
write, count = Path.replace, 0
def counting(*arguments):
    global count
    write(*arguments)
    count += 1
    if count == 15:
        os._exit(7)
Path.replace = counting
t.run(Path({str(tmp_path / "resumed")!r}), t.load_tokenizer(), 30, checkpoint_every=0)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    resumed, again = run(tmp_path / "resumed", tokenizer, 30)
    assert torch.load(tmp_path / "resumed" / "micro.pt")["step"] == 30
    assert again == records
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_pause_changes_nothing(tmp_path, tokenizer):
    straight, _ = run(tmp_path / "straight", tokenizer, 20)
    _, records = run(tmp_path / "paused", tokenizer, None, minutes=60, until=9)
    assert len(records) == 9
    paused, _ = run(tmp_path / "paused", tokenizer, 20)
    assert all(torch.equal(straight[name], paused[name]) for name in straight)


def test_budget_in_minutes_ends_with_a_decay(tmp_path, tokenizer):
    _, records = run(tmp_path, tokenizer, None, minutes=0.15)
    rates = [record["learning_rate"] for record in records]
    peak = rates.index(max(rates))
    falling = [rate for rate in rates[peak:] if rate < max(rates)]
    n = len(falling)  # however many steps this machine managed: a straight line that reaches 0 after the last of them
    assert n >= 1
    assert falling == rates[-n:]
    assert falling == pytest.approx([max(rates) * (n - i) / (n + 1) for i in range(n)])
    assert n == pytest.approx(len(rates) / 5, rel=0.3, abs=2)


def test_kept_weights_are_those_of_their_step(tmp_path, tokenizer):
    run(tmp_path / "kept", tokenizer, 12, keep=(6, 9))
    run(tmp_path / "paused", tokenizer, 12, until=9)
    kept = safetensors.torch.load_file(tmp_path / "kept" / "micro-step9.safetensors")
    state = torch.load(tmp_path / "paused" / "micro.pt")["model"]
    assert all(torch.equal(kept[name], tensor.half()) for name, tensor in state.items())
    assert (tmp_path / "kept" / "micro-step6.safetensors").exists()


# --- multi-token prediction


def test_a_trunk_is_left_alone_when_its_mtp_block_is_trained():
    torch.manual_seed(0)
    trunk, block = Llama(MICRO), MTP(MICRO)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    ahead = Ahead(trunk, block)
    assert {id(p) for p in ahead.parameters()} == {id(p) for p in block.parameters()}
    options = Options(learning_rate=0.02)
    optimizers = make_optimizers(ahead, options)
    windows = torch.randint(1, 4096, (2, 17))
    losses = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(30):
            losses.append(accumulate(ahead, windows, torch.ones(2, 17, dtype=torch.bool), options, pool))
            for optimizer in optimizers:
                optimizer.step()
    assert losses[-1] < losses[0] - 0.3  # a small head, never trained, allows no more
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


@torch.inference_mode()
def test_mtp_sees_the_trunk_up_to_one_token_and_the_next():
    torch.manual_seed(0)
    trunk, block = Llama(MICRO).eval(), MTP(MICRO).eval()
    tokens = torch.randint(1, 4096, (1, 12))
    logits = Ahead(trunk, block)(tokens)
    expected = block(trunk.hidden(tokens[:, :-1]), trunk.embed_tokens(tokens[:, 1:]))
    # Ahead begins one token earlier, with zeros: the block sees one position more, and the rest moved by one.
    alone = Ahead(trunk, block).hidden(tokens)
    assert logits.shape == (1, 12, 4096)
    assert expected.shape == (1, 11, 16)
    changed = tokens.clone()
    changed[0, 7] += 1
    difference = (Ahead(trunk, block).hidden(changed) - alone).abs().amax(-1)[0]
    assert difference[:7].max() == 0
    assert difference[7] > 0  # token 7 itself is the block's own
    cache, parts = Cache(), []
    hidden, embedded = trunk.hidden(tokens[:, :-1]), trunk.embed_tokens(tokens[:, 1:])
    for start, end in ((0, 4), (4, 5), (5, 11)):
        parts.append(block(hidden[:, start:end], embedded[:, start:end], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


# --- scaling


def test_the_sweep_is_forty_runs_at_five_budgets():
    runs = scaling.plan()
    assert len(runs) == 40
    assert runs[0]["parameters"] < 10_000
    assert max(run["parameters"] for run in runs) > 6e6
    for run in runs:
        assert run["flops"] == 6 * run["parameters"] * run["tokens"]
        assert min(abs(run["flops"] / budget - 1) for budget in scaling.BUDGETS) < 0.01
        assert run["tokens"] == run["steps"] * run["batch"] * scaling.CONTEXT
    model = Llama(scaling.shape(32, 3))
    assert scaling.parameters(model.config) == sum(p.numel() for p in model.layers.parameters())


# --- evaluation


def test_sliding_windows_score_each_token_once(tokenizer):
    torch.manual_seed(0)
    model = Llama(MICRO).eval()
    for length in (0, 1, 7, 8, 15, 16, 17, 24, 25, 40, 333):
        ids = torch.randint(1, 4096, (length,)).tolist()
        losses = token_losses(model, ids, eos=0, context=model.config.context)
        tokens = torch.tensor([0, *ids])
        for i in range(length):  # one token at a time; how far back the model looks is at least half a context
            start = 0 if length <= 16 or i < 16 else (i // 8 - 1) * 8
            with torch.inference_mode():
                expected = -model(tokens[None, start : i + 1])[0, -1].log_softmax(-1)[tokens[i + 1]]
            assert losses[i] == pytest.approx(expected.item(), abs=1e-4), (length, i)


def test_bits_per_byte_counts_bytes_not_characters():
    documents = {"documentation/a": "中", "source/b": "ab", "source/c": "cd"}
    nats = {"documentation/a": 3 * math.log(2), "source/b": 4 * math.log(2), "source/c": 0.0}
    assert bits_per_byte(nats, documents) == {"documentation": pytest.approx(1), "source": pytest.approx(1)}


def test_kneser_ney_is_a_distribution():
    rng = np.random.default_rng(0)
    documents = [list(map(int, rng.integers(1, 6, 50))) for _ in range(20)]
    model = KneserNey(documents, order=3, vocab_size=7)
    for history in ([], [1], [2, 3], [6, 1], [6, 6]):  # 6 was never seen
        total = sum(model.probabilities([*history, token])[-1] for token in range(7))
        assert total == pytest.approx(1, abs=1e-9)


def test_kneser_ney_against_a_plain_recursion():
    """Order 2 by the book: (c - D)/c(h) + freed(h) · p_continuation, from dictionaries."""
    rng = np.random.default_rng(1)
    documents = [list(map(int, rng.integers(1, 9, 40) // rng.integers(1, 3, 40) + 1)) for _ in range(15)]
    model = KneserNey(documents, order=2, vocab_size=10)
    bigrams = {}
    for document in documents:
        for pair in zip([0, *document], document, strict=False):
            bigrams[pair] = bigrams.get(pair, 0) + 1
    continuation = {}
    for _, word in bigrams:
        continuation[word] = continuation.get(word, 0) + 1

    def discounts(counts):
        n = [sum(c == i for c in counts.values()) for i in range(5)]
        y = n[1] / max(1, n[1] + 2 * n[2])
        return [0] + [max(0.0, i - (i + 1) * y * n[i + 1] / max(1, n[i])) for i in (1, 2, 3)]

    d1, d2 = discounts(continuation), discounts(bigrams)

    def unigram(word):
        total = sum(continuation.values())
        freed = sum(d1[min(3, c)] for c in continuation.values()) / total
        c = continuation.get(word, 0)
        return (c - d1[min(3, c)]) / total + freed / 10

    def bigram(history, word):
        followers = {w: c for (h, w), c in bigrams.items() if h == history}
        total, c = sum(followers.values()), followers.get(word, 0)
        freed = sum(d2[min(3, count)] for count in followers.values()) / total
        return (c - d2[min(3, c)]) / total + freed * unigram(word)

    for document in documents:
        expected = [bigram(h, w) for h, w in zip([0, *document], document, strict=False)]
        np.testing.assert_allclose(model.probabilities(document), expected, rtol=1e-9)


def test_kneser_ney_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        KneserNey([[1]], order=6)


def test_xz_knows_what_it_has_seen():
    text = np.random.default_rng(0).bytes(5000)
    assert 5000 < xz_bytes(text) < 5200
    assert xz_bytes(text + text) - xz_bytes(text) < 200


def test_card_parts_are_replaced():
    card = "a\n<!-- table -->\nold\n<!-- /table -->\nb\n"
    assert replace_part(card, "table", "new") == "a\n<!-- table -->\nnew\n<!-- /table -->\nb\n"
    with pytest.raises(ValueError, match="no part <!-- samples -->"):
        replace_part(card, "samples", "")
