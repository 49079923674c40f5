"""Lesson 34 against the openai client over loopback, transformers' generation, NumPy, `re`, a queue's closed form."""

import json
import re
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llm40  # noqa: F401  before transformers, which imports Triton
from llm40 import models

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("34")


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    model, tokenizer = models.load("tiny", device="cpu")
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_engine(lesson, model, count=60, size=8, budget=32, running=6, prefixes=None):
    return lesson.Engine(model, lesson.Scheduler(lesson.Blocks(count, size, prefixes), budget, running))


# --- the parts ---


def test_percentiles(lesson, agrees):
    values = torch.rand(97, generator=generator(1), dtype=torch.float64)
    mine = torch.tensor([lesson.percentile(values.tolist(), q) for q in range(101)], dtype=torch.float64)
    theirs = np.percentile(values.numpy(), range(101), method="inverted_cdf")
    agrees("percentile", 'NumPy, method="inverted_cdf"', mine, torch.from_numpy(theirs), 0)


def test_runner(lesson, agrees, tiny):
    """Pieces of several texts in one pass, in blocks that lie anywhere, against the model's own logits."""
    g = generator(2)
    texts = [torch.randint(0, 4096, (n,), generator=g).tolist() for n in (40, 17, 1, 29)]
    runner, order = lesson.Runner(tiny.model, 30, 8), torch.randperm(30, generator=g).tolist()
    tables = [[order.pop() for _ in range(-(-len(text) // 8))] for text in texts]
    done = [0] * 4
    for cut in ([13, 17, 0, 1], [1, 0, 0, 27], [25, 0, 1, 0], [1, 0, 0, 1]):
        pieces = [(i, n) for i, n in enumerate(cut) if n]
        logits = runner([(texts[i][done[i] : done[i] + n], done[i], tables[i]) for i, n in pieces])
        for (i, n), row in zip(pieces, logits, strict=True):
            done[i] += n
            with torch.no_grad():
                expected = tiny.model(torch.tensor([texts[i][: done[i]]]))[0, -1]
            agrees("Runner, logits of tiny", "llm40.models, one text at a time", row, expected, 1e-5)
    assert done == [40, 17, 1, 29]


@pytest.mark.parametrize("prefixes", [False, True])
def test_engine_against_transformers(lesson, agrees, prefixes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = models.Config(vocab_size=41, hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_size=48)
    model = models.Llama(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=41,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    theirs.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()}, strict=False)
    theirs.tie_weights()
    model, theirs = model.double(), theirs.double()
    g = generator(4)
    prompts = [torch.randint(1, 41, (n,), generator=g).tolist() for n in (3, 11, 1, 7, 11, 20, 2, 9)]
    prompts[4] = prompts[1]  # the same again, for the prefix cache
    engine = make_engine(lesson, model, 14, 4, 9, 5, lesson.RadixCache() if prefixes else None)
    texts = {engine.submit(prompt, max_new=18): [] for prompt in prompts}
    while engine.busy:
        for number, token, _ in engine.step():
            texts[number].append(token)
    assert engine.scheduler.preemptions, "nobody was preempted: the test shows less than it should"
    for prompt, text in zip(prompts, texts.values(), strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=18, do_sample=False)[0, len(prompt) :]
        agrees("Engine, greedy", "transformers generate", torch.tensor(text), expected, 0)


def test_radix_tree(lesson, agrees):
    """A set of strings: all beginnings of all that was inserted."""
    g, cache, known, fresh = generator(5), lesson.RadixCache(), {}, 0
    lengths = [], []
    for _ in range(400):
        word = "".join("abc"[int(i)] for i in torch.randint(0, 3, (8,), generator=g))
        longest = max((n for n in range(9) if word[:n] in known or not n), default=0)
        if torch.rand((), generator=g) < 0.3:
            cache.insert(word, list(range(fresh, fresh + 8)))
            known |= {word[:n]: fresh + n - 1 for n in range(longest + 1, 9)}
            fresh += 8
        else:
            found = cache.match(word)
            assert found == [known[word[: n + 1]] for n in range(longest)]
            lengths[0].append(len(found)), lengths[1].append(longest)
    assert len(cache) == len(known)
    assert len(cache.edges()) <= 2 * 400
    agrees("RadixCache, length of matches", "a set of strings", *map(torch.tensor, lengths), 0)


def test_masks_against_re(lesson, agrees):
    """For each state, reached by a sample text: a token is allowed where some end makes the whole match."""
    pattern = re.compile(rb'\{"name": "[a-z_]{1,16}", "line": [1-9][0-9]{0,2}, "async": (true|false)\}')
    sample = b'{"name": "queue", "line": 120, "async": false}'
    ends = [sample[n:] for n in range(len(sample) + 1)] + [
        tail + b', "async": true}' for tail in (b"", b"1", b"22")
    ]  # what can follow a beginning
    ends += [
        b'a", "line": 1, "async": true}',
        b'", "line": 1, "async": true}',
        b"e}",
        b"rue}",
        b"alse}",
        b"1" + ends[-3],
    ]
    vocabulary = [bytes([i]) for i in range(256)]
    vocabulary += [sample[i:j] for i in range(0, len(sample), 3) for j in (i + 2, i + 5, i + 9)] + [b"<end>"]
    stop = len(vocabulary) - 1
    allowed, after = lesson.token_masks(lesson.RECORD, {len(lesson.RECORD) - 1}, vocabulary, stop)
    state, mine, theirs = 0, [], []
    for n in range(len(sample) + 1):
        mine.append(allowed[state].long())
        matches = [any(pattern.fullmatch(sample[:n] + token + end) for end in ends) for token in vocabulary]
        matches[stop] = n == len(sample)
        theirs.append(torch.tensor(matches).long())
        state = int(after[state, sample[n]]) if n < len(sample) else state
    agrees("token_masks along a text", "Python's re", torch.stack(mine), torch.stack(theirs), 0)


def test_constrained_output_parses(lesson, tiny):
    bytes_of = lesson.token_bytes(tiny.tokenizer)
    text = "naïve 漢字 🙂\n\tdef __init__(self):"
    assert b"".join(bytes_of[i] for i in tiny.tokenizer.encode(text)).decode() == text
    allowed, after = lesson.token_masks(lesson.RECORD, {len(lesson.RECORD) - 1}, bytes_of, tiny.tokenizer.eos)
    engine = make_engine(lesson, tiny.model, count=200, running=16)
    for seed in range(24):
        draw = lesson.Constrained(allowed, after, lesson.sampler(2.0, seed))
        engine.submit([tiny.tokenizer.eos], max_new=60, stop=tiny.tokenizer.eos, choose=draw)
    texts = {}
    while engine.busy:
        for number, token, reason in engine.step():
            texts.setdefault(number, b"")
            texts[number] += bytes_of[token]
            assert reason != "length"
    records = [json.loads(text) for text in texts.values()]
    assert len(records) == 24
    assert all(type(r["line"]) is int and type(r["async"]) is bool for r in records)


def test_queue(lesson, agrees):
    """Pollaczek and Khinchine's formula for prompts of one length, and of two."""
    for rate, lengths in ((0.6, (1.0, 1.0)), (0.5, (0.5, 1.5))):
        g, count = generator(6), 200_000
        arrivals = (-torch.rand(count, generator=g, dtype=torch.float64).log() / rate).cumsum(0)
        prompts = torch.randint(0, 2, (count,), generator=g).tolist()
        times = lesson.disaggregated(
            arrivals.tolist(), prompts, [1] * count, lengths.__getitem__, lambda p: 0.0, lambda n: 1.0
        )
        mean = torch.tensor([t[0] for t in times]).double().sub(arrivals).mean()
        service, square = sum(lengths) / 2, sum(s * s for s in lengths) / 2
        closed = service + rate * square / (2 * (1 - rate * service))
        agrees("disaggregated, mean TTFT", "Pollaczek–Khinchine", mean, torch.tensor(closed), 0.05)


# --- the client ---


def test_openai_client_over_loopback(lesson, agrees, tiny):
    before = set(threading.enumerate())
    engine = make_engine(lesson, tiny.model, count=40)
    prompts = ["def read(self, size", "The with statement", 'class A:\n    """漢字', "x"]
    with lesson.serving(lesson.make_app(engine, lesson.Texts(tiny.tokenizer), "tiny")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)
        for prompt in prompts:
            ids = [tiny.tokenizer.eos, *tiny.tokenizer.encode(prompt)]
            tokens = models.generate(tiny.model, [ids], 25, stop=tiny.tokenizer.eos)[0]
            ended = tokens[-1] == tiny.tokenizer.eos
            text = tiny.tokenizer.decode(tokens[:-1] if ended else tokens)
            asked = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 25}
            answer = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(**asked, stream=True))
            assert answer.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
            assert answer.choices[0].message.content == text
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
            reason = "stop" if ended else "length"
            assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == reason
            used = torch.tensor([answer.usage.prompt_tokens, answer.usage.completion_tokens])
            agrees(
                "endpoint, tokens used", "tokenizer and models.generate", used, torch.tensor([len(ids), len(tokens)]), 0
            )
        for fields, error, param in (
            ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
            ({"max_tokens": 10_000}, openai.BadRequestError, "messages"),
            ({"messages": [{"role": "critic", "content": "?"}]}, openai.BadRequestError, "messages.0.role"),
            ({"logprobs": True}, openai.BadRequestError, "logprobs"),
            ({"model": "huge"}, openai.NotFoundError, "model"),
        ):
            with pytest.raises(error) as raised:
                client.chat.completions.create(**asked | fields)
            assert raised.value.body["param"] == param
            assert raised.value.body["message"]
        client.close()
    assert not engine.busy
    assert len(engine.scheduler.blocks.free) == 40
    assert set(threading.enumerate()) <= before
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0


def fail_with_a_stream_open(lesson, engine, tiny) -> None:
    with lesson.serving(lesson.make_app(engine, lesson.Texts(tiny.tokenizer), "tiny")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=400, stream=True
        )
        next(iter(stream))
        raise ZeroDivisionError("a cell that fails")


def test_server_stops_after_a_failing_block(lesson, tiny):
    before, engine = set(threading.enumerate()), make_engine(lesson, tiny.model)
    with pytest.raises(ZeroDivisionError):
        fail_with_a_stream_open(lesson, engine, tiny)
    assert set(threading.enumerate()) <= before
    assert not engine.busy
    assert len(engine.scheduler.blocks.free) == 60


def test_an_app_that_cannot_start_is_told(lesson):
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="did not start"), lesson.serving(None):
        pass
    assert set(threading.enumerate()) <= before
