"""The acceptance tests of the eight projects: each step accepts a project that does what it asks, and no other."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm40 import data, models, projects
from llm40.projects import attention, engine, language, pictures, words


def make_project(**names: object) -> ModuleType:
    project = ModuleType("project")
    project.__dict__.update(names)
    return project


def refused(step: projects.Step, project: ModuleType, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        step(project)


# --- the files, and how they are read ---------------------------------------------------------------------------


def test_projects_are_eight_and_every_step_says_what_it_asks():
    assert [project.number for project in projects.PROJECTS] == list(range(1, 9))
    assert all(
        step.__doc__ and step.__doc__.split("\n")[0].endswith(".") for p in projects.PROJECTS for step in p.steps
    )


def test_what_lies_beside_a_project_can_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "李雷 work"
    folder.mkdir()
    (folder / "backwards.py").write_text("def turn(word):\n    return word[::-1]\n", encoding="utf-8")
    text = (
        "from backwards import turn\n\nbefore = list\n\ndef after(words):\n    return [turn(word) for word in words]\n"
    )
    (folder / "5_reasoning.py").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    said = []
    assert projects.accept(projects.PROJECTS[4], folder / "5_reasoning.py", said.append)
    assert "100% of 200 are right." in said[-3]
    assert said[-1] == "accepted"


def test_a_project_with_an_error_is_not_accepted_and_its_line_is_shown(tmp_path):
    path = tmp_path / "5_reasoning.py"
    said = []
    path.write_text("def before(words:\n", encoding="utf-8")
    assert not projects.accept(projects.PROJECTS[4], path, said.append)
    assert "SyntaxError" in said[-1]
    path.write_text("def before(words):\n    return words\n\n\ndef after(words):\n    return 1 / 0\n", encoding="utf-8")
    assert not projects.accept(projects.PROJECTS[4], path, said.append)
    assert "return 1 / 0" in said[-2]
    assert said[-1] == "not accepted yet: 0 of 2 steps"


# --- language models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


def make_language_model(model, tokenizer, **names) -> ModuleType:
    return make_project(load=lambda: (model, tokenizer), CONTEXT=512, **names)


class Wrapped(nn.Module):
    """`model` with its logits changed."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, tokens):
        return self.change(self.model(tokens), tokens)


def test_the_shipped_model_passes_as_a_mini_gpt(tiny):
    project = make_language_model(*tiny)
    assert "9 texts" in language.gives_text_back(project)
    language.is_causal(project)
    assert "1.4" in language.beats_ngrams(project)


def test_a_tokenizer_that_loses_spaces(tiny):
    model, tokenizer = tiny
    loses = SimpleNamespace(encode=tokenizer.encode, decode=lambda ids: tokenizer.decode(ids).strip(), eos=0)
    refused(language.gives_text_back, make_language_model(model, loses), "came back as")


def test_a_model_that_sees_the_future_and_one_that_sees_nothing(tiny):
    model, tokenizer = tiny
    ahead = Wrapped(model, lambda logits, _: logits + 0.1 * logits.mean(1, keepdim=True))
    refused(language.is_causal, make_language_model(ahead, tokenizer), "moves the logits before it")
    blind = Wrapped(model, lambda logits, _: torch.zeros_like(logits))
    refused(language.is_causal, make_language_model(blind, tokenizer), "changes nothing")


def test_a_model_that_is_no_better_than_ngrams(tiny):
    model, tokenizer = tiny
    cold = Wrapped(model, lambda logits, _: logits / 4)
    refused(language.beats_ngrams, make_language_model(cold, tokenizer), "It needs .* the 5-gram 1.7")


def test_the_size_of_llama_160m():
    right = nn.Embedding(160_000, 1_000, device="meta")
    assert "160.0 million" in language.has_160_million(make_language_model(right, None))
    wrong = nn.Embedding(6_000, 1_000, device="meta")
    refused(language.has_160_million, make_language_model(wrong, None), "6.0 million")


def test_better_than_small_are_two_models_together(tiny):
    small, tokenizer = models.load("small")
    both = Wrapped(
        small, lambda logits, tokens: torch.logaddexp(logits.log_softmax(-1) + 1, tiny[0](tokens).log_softmax(-1))
    )
    language.beats_small(make_language_model(both, tokenizer))
    refused(language.beats_small, make_language_model(*tiny), "`small` 1.2")


# --- a sparse model with a latent cache -------------------------------------------------------------------------


class Sparse(nn.Module):
    """One layer: attention from a shared latent of four numbers a token, and the best of eight experts."""

    def __init__(self, vocabulary: int, width: int = 32, latent: int = 4, keeps: str = "latent", routed: str = "one"):
        super().__init__()
        torch.manual_seed(0)
        self.keeps, self.routed = keeps, routed
        self.embed = nn.Embedding(vocabulary, width)
        self.down, self.up = nn.Linear(width, latent), nn.Linear(latent, 2 * width)
        self.router = nn.Linear(width, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(8, width, width) / width**0.5)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.step(tokens, None)[0]

    def step(self, tokens, cache):
        x = self.embed(tokens)
        latent = self.down(x)
        latent = latent if cache is None else torch.cat([cache["latent"], latent], dim=1)
        k, v = self.up(latent).chunk(2, dim=-1)
        seen = torch.ones(len(x[0]), len(k[0]), dtype=torch.bool).tril(len(k[0]) - len(x[0]))
        x = x + F.scaled_dot_product_attention(x, k, v, attn_mask=seen)
        scores = self.router(x) if self.routed != "always the first" else self.router(x) - 1e4 * torch.arange(8)
        gates = scores.softmax(-1)
        if self.routed != "all":
            gates = gates * F.one_hot(gates.argmax(-1), 8)
        x = x + torch.stack([self.one(x, expert) * gates[..., expert, None] for expert in range(8)]).sum(0)
        kept = {"latent": latent, "more": (k, v)} if self.keeps == "all" else {"latent": latent}
        return self.head(x), kept

    def one(self, x, expert):
        return (x @ self.experts[expert]).relu()


def make_sparse(tiny, **options) -> ModuleType:
    tokenizer = tiny[1]
    sparse = Sparse(tokenizer.vocab_size, **options)
    return make_language_model(sparse, tokenizer, LAYERS=1, HEADS=1, HEAD_DIM=32)


def test_a_sparse_model_is_accepted_but_for_its_bits(tiny):
    project = make_sparse(tiny)
    for step in (language.is_causal, language.decodes_alike, language.has_a_small_cache, language.is_sparse):
        step(project)
    refused(language.beats_ngrams, project, "bits a byte")


def test_sparse_models_that_are_not(tiny):
    refused(language.has_a_small_cache, make_sparse(tiny, keeps="all"), "a quarter of all keys and values is 64")
    refused(language.is_sparse, make_sparse(tiny, routed="all"), "A token uses")
    refused(language.is_sparse, make_sparse(tiny, routed="always the first"), "experts are idle")


def test_a_cache_that_forgets(tiny):
    project = make_sparse(tiny)
    model, _ = project.load()
    step = model.step
    model.step = lambda tokens, cache: step(tokens, cache and {"latent": cache["latent"][:, -8:]})
    refused(language.decodes_alike, project, "The logits differ")


# --- far away ---------------------------------------------------------------------------------------------------


class Bigrams(nn.Module):
    """Logits of the token before alone; from `until` on, noise."""

    def __init__(self, vocabulary: int, until: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.until = nn.Embedding(vocabulary, 4), nn.Linear(4, vocabulary), until

    def forward(self, tokens):
        logits = self.b(self.a(tokens))
        if self.until and logits.shape[1] > self.until:
            logits[:, self.until :] += 3 * torch.randn_like(logits[:, self.until :])
        return logits


def make_far(tiny, until: int | None = None, window: int | None = None) -> ModuleType:
    tokenizer = tiny[1]

    def write(model, tokens, count):
        text = tokenizer.decode(tokens[-window:] if window else tokens)
        at = text.find("The passkey is ")
        return tokenizer.encode(" " + text[at + 15 : at + 20] if at >= 0 else " nothing")[:count]

    project = make_language_model(Bigrams(tokenizer.vocab_size, until), tokenizer, write=write)
    project.CONTEXT = language.REACH
    return project


def test_a_long_context(tiny):
    project = make_far(tiny)
    language.reads_far(project)
    assert "6 of 6" in language.finds_passkeys(project)


def test_contexts_that_are_short(tiny):
    refused(language.reads_far, make_far(tiny, until=20_000), "A token costs")
    refused(language.reads_far, make_language_model(*tiny), "CONTEXT is 512")
    refused(language.finds_passkeys, make_far(tiny, window=8_192), "missed 4 of 6")


# --- attention --------------------------------------------------------------------------------------------------


def test_attention_that_is_exact_and_dense_is_no_flash_attention():
    def dense(q, k, v, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    project = make_project(attention=dense)
    attention.is_exact(project)
    attention.has_gradients(project)
    refused(attention.is_a_kernel, project, "launches 0 kernels")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v: (q, k.roll(1, 1), v), "causal"),  # other heads' keys
        (lambda q, k, v: (2 * q, k, v), "is off by"),
    ],
)
def test_attention_that_is_wrong(change, sentence):
    def wrong(q, k, v, causal):
        return F.scaled_dot_product_attention(*change(q, k, v), is_causal=causal, enable_gqa=True)

    refused(attention.is_exact, make_project(attention=wrong), sentence)


def test_attention_that_stores_all_scores():
    def dense(q, k, v, causal):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    refused(attention.stores_no_scores, make_project(attention=dense), "256 × 256")


# --- words and pictures -----------------------------------------------------------------------------------------


def reverse_some(share: float):
    def answer(asked):
        return [word[::-1] if place % 100 < 100 * share else word for place, word in enumerate(asked)]

    return answer


def test_reasoning():
    assert "80%" in words.reverses(make_project(after=reverse_some(0.8)))
    refused(words.reverses, make_project(after=reverse_some(0.5)), "50% of 200 are right")
    refused(words.reverses, make_project(after=lambda asked: ["a"]), "1 answers to 200 words")
    words.has_learned(make_project(before=reverse_some(0.6), after=reverse_some(0.8)))
    refused(words.has_learned, make_project(before=reverse_some(0.79), after=reverse_some(0.8)), "by luck")
    refused(words.has_learned, make_project(before=reverse_some(0.8), after=reverse_some(0.6)), "by luck")


def answer_by_neighbor(images, question):
    """Nearest of the 1,500 training images; a blank one gets no digit."""
    seen, labels = (t[: pictures.TRAINING] for t in data.digits())
    nearest = labels[torch.cdist(images.flatten(1), seen.flatten(1)).argmin(1)].tolist()
    blank = (images.flatten(1).sum(1) == 0).tolist()
    if question == "Is the digit even?":
        return ["yes" if digit % 2 == 0 else "no" for digit in nearest]
    if question == "Is the digit greater than four?":
        return ["Yes." if digit > 4 else "No." for digit in nearest]
    return [
        "Nothing." if empty else f"A hand-written {pictures.NAMES[d]}." for d, empty in zip(nearest, blank, strict=True)
    ]


def test_vision_and_language():
    project = make_project(answer=answer_by_neighbor)
    for step in projects.PROJECTS[5].steps:
        step(project)


def test_captions_that_do_not_look():
    labels = data.digits()[1][pictures.TRAINING :].tolist()
    by_place = make_project(answer=lambda images, question: [pictures.NAMES[d] for d in labels[: len(images)]])
    pictures.names_digits(by_place)
    refused(pictures.looks, by_place, "when others are beside it")
    refused(pictures.answers_questions, by_place, "answers to 'Is the digit even")
    all_names = make_project(answer=lambda images, question: [" ".join(pictures.NAMES)] * len(images))
    refused(pictures.names_digits, all_names, "0% of")


# --- an engine --------------------------------------------------------------------------------------------------

SERVER = """
import asyncio
import json
import time

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

FAULT = {fault!r}
app = FastAPI()
alone = asyncio.Lock()
asked = 0


class Message(BaseModel):
    role: str
    content: str


class Question(BaseModel):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1 if FAULT != "takes anything" else -9)
    temperature: float = 1.0
    stream: bool = False


@app.get("/v1/models")
def list_models():
    return {{"object": "list", "data": [{{"id": "words", "object": "model", "created": 0, "owned_by": "us"}}]}}


@app.post("/v1/chat/completions")
async def complete(question: Question):
    global asked
    asked += 1
    text = question.messages[-1].content
    words = [f"{{ord(text[i * 7 % len(text)])}} " for i in range(question.max_tokens)]
    if FAULT == "mixes requests" and asked > 30:
        words[0] = f"{{asked}} "
    if FAULT == "takes turns":
        async with alone:
            await asyncio.sleep(0.02 * len(words))
            time.sleep(0.01 * len(words))
    else:
        await asyncio.sleep(0.01 * len(words))
    head = {{"id": "1", "created": 0, "model": "words"}}
    if not question.stream:
        usage = {{"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}}
        said = {{"role": "assistant", "content": "".join(words)}}
        choice = {{"index": 0, "message": said, "finish_reason": "length"}}
        return head | {{"object": "chat.completion", "choices": [choice], "usage": usage}}

    async def stream():
        pieces = ["".join(words)] if FAULT == "streams at the end" else words
        for place, piece in enumerate([*pieces, None]):
            await asyncio.sleep(0.005)
            delta = {{"content": piece}} if piece else {{}}
            choice = {{"index": 0, "delta": delta, "finish_reason": None if piece else "length"}}
            yield f"data: {{json.dumps(head | {{'object': 'chat.completion.chunk', 'choices': [choice]}})}}\\n\\n"
        yield "data: [DONE]\\n\\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


def serve(host, port):
    if FAULT == "never starts":
        raise SystemExit(3)
    uvicorn.run(app, host=host, port=port, log_level="error")
"""


def write_engine(folder, fault: str = "") -> ModuleType:
    path = folder / "8_inference_engine.py"
    path.write_text(SERVER.format(fault=fault), encoding="utf-8")
    return projects.read_project(path)


def test_an_engine(tmp_path):
    project = write_engine(tmp_path)
    for step in projects.PROJECTS[7].steps:
        step(project)


@pytest.mark.parametrize(
    ("step", "fault", "sentence"),
    [
        (engine.answers, "never starts", "exit code 3"),
        (engine.streams, "streams at the end", "one piece"),
        (engine.batches_alike, "mixes requests", "differ"),
        (engine.refuses, "takes anything", "A negative max_tokens was accepted"),
        (engine.batches_faster, "takes turns", "One after the other"),
    ],
)
def test_engines_with_a_fault(tmp_path, step, fault, sentence):
    refused(step, write_engine(tmp_path, fault), sentence)
