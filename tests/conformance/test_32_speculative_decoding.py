"""Lesson 32 against transformers (its speculative sampling given the same uniforms, assisted generation, n-gram search,
a tree's mask in its LLaMA) and against closed forms and enumeration."""

import math
from itertools import product

import pytest
import torch
from twins import as_transformers

import llm40  # noqa: F401  before transformers, which imports Triton
from llm40 import models

transformers = pytest.importorskip("transformers")
SHAPE = {"vocab_size": 13, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 24}


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("32")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(g: torch.Generator, *shape: int) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-1)


def pair(seed: int) -> tuple[models.Llama, transformers.LlamaForCausalLM]:
    """The same weights, large enough that no two logits are nearly alike, in both."""
    torch.manual_seed(seed)
    ours = models.Llama(models.Config(**SHAPE))
    for parameter in ours.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs = as_transformers(ours, pad_token_id=0)
    return ours.requires_grad_(False), theirs.requires_grad_(False)


# --- verify ---


def test_same_uniforms_as_transformers(lesson, agrees, monkeypatch):
    """Its algorithm 1 takes its randomness from rand_like and multinomial: both are given ours."""
    from transformers.generation.utils import _speculative_sampling

    g, mine, theirs = generator(1), [], []
    for _ in range(300):
        gamma, vocab = 1 + int(torch.randint(0, 5, (), generator=g)), 7
        q, p = distributions(g, gamma, vocab), distributions(g, gamma + 1, vocab)
        tokens = torch.multinomial(q, 1, generator=g)[:, 0]
        u = torch.rand(gamma + 1, generator=g, dtype=torch.float64)

        def inverse(weights, num_samples, last=u[-1]):
            return (weights.cumsum(-1) <= last * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand_like", lambda x, u=u: u[:-1].reshape(x.shape))
            patch.setattr(torch, "multinomial", inverse)
            valid, _ = _speculative_sampling(tokens[None], q.log()[None], gamma, p.log()[None])
        out = lesson.verify(q, p, tokens, u)
        mine.append(torch.nn.functional.pad(out, (0, gamma + 1 - len(out)), value=-1))
        theirs.append(torch.nn.functional.pad(valid[0], (0, gamma + 1 - valid.shape[1]), value=-1))
    agrees("verify, 300 rounds", "transformers _speculative_sampling", torch.cat(mine), torch.cat(theirs), 0)


def test_one_place_by_enumeration(lesson, agrees):
    """Both uniforms' cells, exactly: what comes out has the distribution p."""
    g = generator(2)
    q, p = distributions(g, 1, 6), distributions(g, 2, 6)
    out = torch.zeros(6, dtype=torch.float64)
    residual = (p[0] - q[0]).clamp(min=0)
    ends = [0.0, *(residual.cumsum(0) / residual.sum()).tolist()]
    for token in range(6):
        edges = [0.0, min(1.0, float(p[0, token] / q[0, token])), 1.0]
        for i, j in product(range(2), range(6)):
            cell = (edges[i + 1] - edges[i]) * (ends[j + 1] - ends[j])
            u = torch.tensor([(edges[i] + edges[i + 1]) / 2, (ends[j] + ends[j + 1]) / 2], dtype=torch.float64)
            if cell > 0:
                out[int(lesson.verify(q, p, torch.tensor([token]), u)[0])] += q[0, token] * cell
    agrees("verify, distribution of one place", "the target's p", out, p[0], 1e-12)


# --- speed ---


def test_expected_tokens(lesson, agrees):
    """Against the closed form, a million simulated rounds, and the worked numbers."""
    for alpha, gamma in [(0.3, 2), (0.53, 4), (0.9, 7)]:
        closed = (1 - alpha ** (gamma + 1)) / (1 - alpha)
        ours = torch.tensor(lesson.expected_tokens(alpha, gamma), dtype=torch.float64)
        agrees("expected_tokens", "closed form", ours, torch.tensor(closed, dtype=torch.float64), 1e-12)
        kept = (torch.rand(1_000_000, gamma, generator=generator(3)) < alpha).long().cumprod(1).sum(1)
        agrees("expected_tokens", "simulation", ours, kept.double().mean() + 1, 5e-3)
    found = torch.tensor([lesson.speedup(0.53, gamma, 0.14, 0.075) for gamma in (1, 2, 3, 4)])
    agrees("speedup", "worked numbers", found, torch.tensor([1.26, 1.27, 1.19, 1.10]), 5e-3)


# --- whole texts ---


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_assisted_generation(lesson, agrees, gamma):
    (target, theirs), (draft, assistant) = pair(4), pair(5)
    draft.embed_tokens.weight.lerp_(target.embed_tokens.weight, 0.7)
    assistant.model.embed_tokens.weight.copy_(draft.embed_tokens.weight)
    prompt = [3, 1, 4, 1, 5]
    assistant.generation_config.num_assistant_tokens = gamma
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    expected = theirs.generate(torch.tensor([prompt]), assistant_model=assistant, do_sample=False, max_new_tokens=40)
    readers = lesson.Reader(target), lesson.Reader(draft)
    out, accepted = lesson.speculative_generate(*readers, prompt, 40, gamma)
    agrees("speculative_generate, greedy", "transformers assisted", torch.tensor(out), expected[0, 5:], 0)
    assert len(set(accepted)) > 1, "all rounds alike: the test shows little"


def test_sampled_text(lesson, agrees):
    """The first two tokens of many sampled texts against the target's exact joint distribution."""
    (target, _), (draft, _) = pair(6), pair(7)
    draft.embed_tokens.weight.lerp_(target.embed_tokens.weight, 0.5)
    g, counts, runs = generator(8), torch.zeros(13, 13, dtype=torch.float64), 3000
    for _ in range(runs):
        readers = (lesson.Reader(model, temperature=1.3, top_p=0.9) for model in (target, draft))
        (a, b), _ = lesson.speculative_generate(*readers, [2, 7], 2, 2, generator=g)
        counts[a, b] += 1
    first = lesson.Reader(target, 1.3, 0.9).read([2, 7])[-1].double()
    second = torch.stack([lesson.Reader(target, 1.3, 0.9).read([2, 7, a])[-1] for a in range(13)]).double()
    joint = first[:, None] * second
    assert not counts[joint == 0].any(), "a token outside the target's top-p was written"
    cells = joint > 0
    chi = ((counts - runs * joint) ** 2)[cells] / (runs * joint)[cells]
    freedom = int(cells.sum()) - 1
    assert float(chi.sum()) < freedom + 6 * math.sqrt(2 * freedom), f"chi-square {float(chi.sum()):.0f} of {freedom}"
    agrees("speculative_generate, sampled pairs", "the target's joint", counts / runs, joint, 0.2)


def test_self_speculation_on_small(lesson, agrees):
    model, tokenizer = models.load("small", device="cpu")
    mtp = models.load_mtp(device="cpu")
    prompt = [tokenizer.eos, *tokenizer.encode("class Stack:\n    def push(self, item):\n")]
    out, accepted = lesson.mtp_self_speculation(model, mtp, prompt, 40, 2)
    expected = models.generate(model, [prompt], 40, stop=None)[0]
    agrees("mtp_self_speculation", "small alone", torch.tensor(out), torch.tensor(expected), 0)
    assert sum(accepted) > len(accepted) / 2


# --- n-grams and trees ---


def test_prompt_lookup(lesson, agrees):
    """transformers takes the first match, the lesson the latest: texts in which there is one."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    g = generator(9)
    for _ in range(40):
        tokens = torch.randperm(500, generator=g)[:30].tolist()
        at, size = (int(x) for x in torch.randint(1, 12, (2,), generator=g))
        tokens += tokens[at : at + min(size, 3)]
        theirs = PromptLookupCandidateGenerator(
            num_output_tokens=4, max_matching_ngram_size=3, max_length=100, vocab_size=500
        )
        found, _ = theirs.get_candidates(torch.tensor([tokens]))
        mine = torch.tensor(lesson.prompt_lookup_draft(tokens, 4, 3))
        agrees("prompt_lookup_draft", "transformers prompt lookup", mine, found[0, len(tokens) :], 0)


def test_tree_in_transformers(lesson, agrees):
    _, theirs = pair(10)
    theirs = theirs.double()
    parents, tokens, text = [-1, -1, 0, 0, 1, 4, 2], [3, 5, 1, 7, 2, 2, 9], [4, 0, 11, 6]
    mask = lesson.tree_attention_mask(parents)
    past, nodes = len(text), len(tokens)
    seen = torch.zeros(past + nodes, past + nodes, dtype=torch.bool)
    seen[:past, :past] = torch.ones(past, past).tril().bool()
    seen[past:, :past] = True
    seen[past:, past:] = mask
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    positions = torch.cat([torch.arange(past), past + mask.sum(1) - 1])
    logits = theirs(
        torch.tensor([text + tokens]), attention_mask=added[None, None], position_ids=positions[None]
    ).logits[0, past:]
    for node in range(nodes):
        path = [tokens[n] for n in mask[node].nonzero()[:, 0].tolist()]
        alone = theirs(torch.tensor([text + path])).logits[0, -1]
        agrees("tree_attention_mask", "transformers LLaMA, path by path", logits[node], alone, 1e-6)
