"""What a language model of a project must do: text back, causal, good at held-out text; sparse, or far-sighted."""

import math
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llm40.models import load, load_tokenizer
from llm40.models.baselines import KneserNey
from llm40.models.corpus import corpus
from llm40.models.evaluate import token_losses

PROVIDES = '''\
CONTEXT = 512                # how many tokens the model reads at once

def load():
    """(model, tokenizer), trained. model is an nn.Module: model(tokens (batch, n) int64) -> logits (batch, n,
    vocabulary). tokenizer.encode(text) -> list of ids, .decode(ids) -> text, .eos is the id before a document."""
'''
DECODES = """
# model.step(tokens (batch, n), cache) -> (logits (batch, n, vocabulary), cache): the next n tokens of a text; cache is
# None at its start, then what step returned: tensors in lists, tuples and dictionaries.
LAYERS, HEADS, HEAD_DIM = 4, 8, 32
"""
WRITES = '''
def write(model, tokens, count):
    """The `count` ids that the model writes after `tokens`, a list of ids, taking the likeliest each time."""
'''
PARAMETERS = (140e6, 190e6)
PASSKEYS = 6
REACH = 32_768


@cache
def _loaded(project: ModuleType) -> tuple[nn.Module, object]:
    model, tokenizer = project.load()
    return model.eval(), tokenizer


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@cache
def _held_out() -> dict[str, str]:
    """Documentation that the course's models were not trained on, either."""
    return {name: text for name, text in corpus()[1].items() if name.startswith("documentation")}


def _held_out_tokens(tokenizer: object, count: int) -> list[int]:
    ids = [id for text in _held_out().values() for id in tokenizer.encode(text)]
    return [tokenizer.eos, *(ids * (count // len(ids) + 1))[: count - 1]]


def _bits_per_byte(nats: float) -> float:
    return nats / math.log(2) / sum(len(text.encode()) for text in _held_out().values())


def _of_model(model: nn.Module, tokenizer: object, context: int) -> float:
    encoded = [tokenizer.encode(text) for text in _held_out().values()]
    return _bits_per_byte(sum(token_losses(model, ids, tokenizer.eos, context).sum() for ids in encoded))


@cache
def _of_ngrams() -> float:
    tokenizer = load_tokenizer()
    ngrams = KneserNey(tokenizer.encode_batch(list(corpus()[0].values())))
    encoded = [tokenizer.encode(text) for text in _held_out().values()]
    return _bits_per_byte(-sum(np.log(ngrams.probabilities(ids)).sum() for ids in encoded))


def gives_text_back(project: ModuleType) -> str:
    """The tokenizer gives every text back that it was given."""
    _, tokenizer = _loaded(project)
    texts = [*_held_out().values(), "", " two  spaces, \ttabs\n\n", "李雷 and Zoë: naïve, 東京 🙂", "\u0000\u200b"]
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        assert back == text, (
            f"From character {at} of a text, {text[at : at + 20]!r} came back as {back[at : at + 20]!r}."
        )
    return f"{len(texts)} texts."


@torch.inference_mode()
def is_causal(project: ModuleType) -> str:
    """A prediction does not depend on what comes after it."""
    model, tokenizer = _loaded(project)
    tokens = torch.tensor([_held_out_tokens(tokenizer, min(project.CONTEXT, 128))], device=_device(model))
    logits, largest = model(tokens).float(), 0.0
    for place in (1, tokens.shape[1] // 2, tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % logits.shape[-1]
        moved = (model(changed).float() - logits).abs().amax(-1)[0]
        largest = max(largest, float(moved[:place].max()))
        assert largest <= 1e-3, f"Another token at {place} moves the logits before it by {largest:.2g}."
        assert moved[place] > 1e-3, f"Another token at {place} changes nothing, not even the logits at {place}."
    return f"The logits before a changed token move by {largest:.1g}."


def beats_ngrams(project: ModuleType) -> str:
    """On held-out text it needs fewer bits than a Kneser–Ney 5-gram."""
    bits, limit = _of_model(*_loaded(project), project.CONTEXT), _of_ngrams()
    assert bits < limit, f"It needs {bits:.3f} bits a byte, the 5-gram {limit:.3f}."
    return f"{bits:.3f} bits a byte against {limit:.3f}."


def has_160_million(project: ModuleType) -> str:
    """It has about 160 million parameters."""
    model, _ = _loaded(project)
    count = sum(parameter.numel() for parameter in model.parameters())
    low, high = PARAMETERS
    assert low <= count <= high, f"It has {count / 1e6:.1f} million; {low / 1e6:.0f} to {high / 1e6:.0f} are meant."
    return f"{count / 1e6:.1f} million."


def beats_small(project: ModuleType) -> str:
    """On held-out text it needs fewer bits than the course's own model of six million parameters."""
    small, tokenizer = load("small")
    limit = _of_model(small, tokenizer, small.config.context)
    bits = _of_model(*_loaded(project), project.CONTEXT)
    assert bits < limit, f"It needs {bits:.3f} bits a byte, `small` {limit:.3f}."
    return f"{bits:.3f} bits a byte against {limit:.3f}."


# --- decoding -------------------------------------------------------------------------------------------------------


def _cache_bytes(cache: object) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(cache) if isinstance(leaf, Tensor))


@torch.inference_mode()
def decodes_alike(project: ModuleType) -> str:
    """Token by token with a cache, it says what it says at once."""
    model, tokenizer = _loaded(project)
    tokens = torch.tensor([_held_out_tokens(tokenizer, 48)], device=_device(model))
    first, cache = model.step(tokens[:, :17], None)
    rows = [first]
    for place in range(17, tokens.shape[1]):
        logits, cache = model.step(tokens[:, place : place + 1], cache)
        rows.append(logits)
    apart = float((torch.cat(rows, dim=1).float() - model(tokens).float()).abs().max())
    assert apart <= 1e-2, f"The logits differ by {apart:.2g}."
    return f"The logits differ by {apart:.1g}."


@torch.inference_mode()
def has_a_small_cache(project: ModuleType) -> str:
    """A token takes at most a quarter of the cache that all heads' keys and values would take."""
    model, tokenizer = _loaded(project)
    tokens = torch.tensor([_held_out_tokens(tokenizer, 96)], device=_device(model))
    sizes = [_cache_bytes(model.step(tokens[:, :count], None)[1]) for count in (32, 96)]
    grown = (sizes[1] - sizes[0]) / 64
    width = next(model.parameters()).element_size()
    whole = 2 * project.LAYERS * project.HEADS * project.HEAD_DIM * width
    assert sizes[1] > 0, "The cache holds no tensor."
    assert grown <= whole / 4, f"It takes {grown:.0f} bytes, a quarter of all keys and values is {whole / 4:.0f}."
    return f"{grown:.0f} of {whole} bytes."


def _touched(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """For each parameter of two axes or more, which of its numbers the logits of `tokens` depend on."""
    model.zero_grad()
    with torch.enable_grad():
        model(tokens).float().square().sum().backward()
    grads = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.dim() > 1]
    touched = [torch.zeros_like(p, dtype=torch.bool) if grad is None else grad != 0 for p, grad in grads]
    model.zero_grad()
    return touched


def is_sparse(project: ModuleType) -> str:
    """A token uses at most half of the weights, and the text uses nearly all of them."""
    model, tokenizer = _loaded(project)
    tokens = torch.tensor([_held_out_tokens(tokenizer, 24 * 64)], device=_device(model)).view(24, 64)
    vocabulary = model(tokens[:1, :1]).shape[-1]
    # Tables with a row per token are left out: one token reads one row of them.
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    counted = [vocabulary not in weight.shape for weight in weights]
    total = sum(weight.numel() for weight, yes in zip(weights, counted, strict=True) if yes)
    one, ever = 0.0, [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    for row in tokens:
        alone = _touched(model, row[None, -1:])
        one = max(one, sum(int(hit.sum()) for hit, yes in zip(alone, counted, strict=True) if yes) / total)
        for seen, hit in zip(ever, _touched(model, row[None]), strict=True):
            seen |= hit
    share = sum(int(seen.sum()) for seen, yes in zip(ever, counted, strict=True) if yes) / total
    assert one <= 0.5, f"A token uses {one:.0%} of the weights."
    assert share >= 0.95, f"{len(tokens)} windows of text use {share:.0%} of the weights: some experts are idle."
    return f"A token {one:.0%}, the text {share:.0%}."


# --- far away -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def reads_far(project: ModuleType) -> str:
    """At 32,768 tokens it predicts no worse than at 4,096."""
    model, tokenizer = _loaded(project)
    assert project.CONTEXT >= REACH, f"CONTEXT is {project.CONTEXT:,}."
    text = "\n".join(text for name, text in corpus()[1].items() if name.startswith("source"))
    tokens = torch.tensor([tokenizer.eos, *tokenizer.encode(text)[:REACH]], device=_device(model))
    assert len(tokens) == REACH + 1, f"The held-out text has only {len(tokens):,} tokens of this tokenizer."
    last = tokens[-257:]  # the same tokens are predicted after little and after much
    losses = [_last_loss(model, tokens[-257 - before : -257], last) for before in (4096 - 256, REACH - 256)]
    near, far = (float(np.mean(loss)) for loss in losses)
    assert far <= near + 0.05, f"A token costs {far:.3f} nats there, {near:.3f} after 4,096."
    return f"{far:.3f} nats a token against {near:.3f}."


def _last_loss(model: nn.Module, before: Tensor, last: Tensor) -> np.ndarray:
    logits = model(torch.cat([before, last])[None, :-1])[0, -(len(last) - 1) :].float()
    return nn.functional.cross_entropy(logits, last[1:], reduction="none").cpu().numpy()


@torch.inference_mode()
def finds_passkeys(project: ModuleType) -> str:
    """It repeats a number told once, wherever it stands in 32,768 tokens."""
    model, tokenizer = _loaded(project)
    rng = np.random.default_rng(7)
    missed = []
    for example in range(PASSKEYS):
        depth, key = (0.05, 0.5, 0.9)[example % 3], "".join(map(str, rng.integers(10, size=5)))
        told = tokenizer.encode(f"\nThe passkey is {key}. Remember it: {key} is the passkey.\n")
        asked = tokenizer.encode("\nWhat is the passkey? The passkey is")
        prose = _held_out_tokens(tokenizer, REACH - len(told) - len(asked) - 16)
        cut = int(depth * len(prose))
        written = project.write(model, [*prose[:cut], *told, *prose[cut:], *asked], 8)
        if not tokenizer.decode(list(written)).strip().startswith(key):
            missed.append(f"{depth:.0%}")
    assert len(missed) <= 1, f"It missed {len(missed)} of {PASSKEYS}: at {', '.join(missed)} of the text."
    return f"{PASSKEYS - len(missed)} of {PASSKEYS}."
