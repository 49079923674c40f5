# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: >-
#       A server for a language model: a scheduler that batches at every step and preempts when
#       memory runs out, an engine on paged memory, an OpenAI-compatible endpoint that streams, a
#       radix tree of shared prefixes, output that always parses, and prefill apart from decode.
#     gpu: "Nothing more: everything runs on the CPU."
# ---

# %% [markdown]
# ## The problem: many people, one model
#
# You can write text with a cache (lesson 28), keep the cache in pages (lesson 30), and draft tokens
# to save passes (lesson 32). All of that serves one request, or a batch that begins and ends
# together. Real requests come when they like. One has a prompt of twenty tokens and wants three
# hundred; the next brings ten thousand and wants a yes or a no. Some people close the window
# halfway.
#
# A batch of fixed membership serves them badly. Everybody waits until the longest text is written,
# rows that are done compute nothing useful, and whoever comes a moment late waits for the next
# batch. Yet the batch is what makes serving cheap: a decode step reads all weights once, for one
# text or for fifty.
#
# This lesson builds the part that decides *what passes through the model next*, and the parts
# around it, until a client that knows nothing of this course can talk to your server.
#
# ## Core ideas
#
# - **Continuous batching**: the batch is chosen anew at every step. A text that ends leaves at
#   once, and a waiting one takes its place.
# - **Chunked prefill**: a long prompt is cut, and each piece rides along with the decodes, so that
#   nobody's stream stops while somebody else's prompt is read.
# - **Preemption**: when memory runs out, the youngest request gives its blocks back and waits. Its
#   text is not lost: later it is computed again, as a longer prompt.
# - **Prefix cache**: requests that begin alike share what was computed for the beginning.
# - **Goodput**: requests that were fast enough, per second. It is what a server is built for.

# %% [markdown]
# ### How it fits together
#
# ```
# client ── HTTP ──▶ endpoint ── submit ──▶ scheduler ── plan ──▶ runner (model, pages)
#    ◀── data: {…} ──── (exercise) ◀─ token ── engine ◀── logits ─────┘
# ```
#
# | word | is |
# |---|---|
# | request, sequence | one text: a prompt, then what is written behind it |
# | step | one pass of the model over tokens of several sequences |
# | `computed` | how many tokens of a sequence have their keys and values in memory |
# | `pending` | the others: the whole prompt at first, one while decoding |
# | block | room for the keys and values of `size` tokens, in all layers |
# | table | the blocks of a sequence, in order |
#
# There is no "prefill phase" and no "decode phase" in the code below. A sequence has tokens, and
# some of them are computed; a step computes some more. When all are, the last one's logits give the
# next token, and one token is pending again. Decoding is a prefill of length one.

# %%
import asyncio
import codecs
import heapq
import json
import math
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Literal

import fastapi
import httpx
import openai
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from llm40 import checks, data, models, plot
from llm40.models.llama import angles, rotate
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

plt = plot.plt
torch.set_num_threads(1)  # steps as small as here: threads would wait for each other

# %% [markdown]
# ## What is fast enough?
#
# A person who reads a stream notices two things. **TTFT**, the time to first token, runs from the
# request's arrival to its first token: time in the queue and the prefill. **TPOT**, the time per
# output token, is the mean gap after that. With $n \ge 2$ tokens at times $t_1 \dots t_n$
#
# $$\mathrm{TTFT} = t_1 - t_\text{arrival}, \qquad \mathrm{TPOT} = \frac{t_n - t_1}{n - 1}.$$
#
# There are $n - 1$ gaps between $n$ tokens. A division by $n$ would count the prefill's token and
# flatter short answers.
#
# The mean over requests hides those who suffer, so one looks at **percentiles**: the 99th is the
# value that 99 percent of requests do not exceed. Between two measured values libraries
# interpolate; the **nearest-rank** percentile takes a value that somebody really had. And where
# both TTFT and TPOT must stay within limits, a server is judged by its **goodput**: requests per
# second that kept *both*. A batch twice as large can double the throughput and halve the goodput.

# %% [markdown]
# ### Exercise · Latency, percentiles, goodput


# %% exercise="latency" minutes=12 difficulty=1
def ttft(arrival: float, times: list[float]) -> float:
    """Seconds from a request's arrival to its first token; math.inf where it got none.

    times: when each of its tokens came out, in order.
    """
    ### BEGIN SOLUTION
    return times[0] - arrival if times else math.inf
    ### END SOLUTION


def tpot(times: list[float]) -> float:
    """Mean gap between tokens, (last time − first) / (tokens − 1); 0.0 for fewer than two tokens.

    Tokens at 1.0, 1.2, 1.8 s: two gaps in 0.8 s, so 0.4.
    """
    ### BEGIN SOLUTION
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    ### END SOLUTION


def percentile(values: list[float], q: int) -> float:
    """The nearest-rank percentile: the smallest of the values that at least q percent of them do
    not exceed. q is a whole number from 0 (gives the smallest value) to 100 (the largest).

    values: in any order, at least one (else ValueError); the list stays as it is.
    Of [30, 10, 20, 40] the 50th is 20 and the 51st is 30: no interpolation.
    """
    ### BEGIN SOLUTION
    if not values:
        raise ValueError("a percentile of no values")
    rank = -(-q * len(values) // 100)  # whole numbers throughout: a float would miss exact ranks
    return sorted(values)[max(rank, 1) - 1]
    ### END SOLUTION


def goodput(
    arrivals: list[float],
    times: list[list[float]],
    ttft_limit: float,
    tpot_limit: float,
    duration: float,
) -> float:
    """Requests per second that got a token and kept both limits (a limit that is met exactly is
    kept). Request i arrived at arrivals[i], its tokens came at times[i].

    duration: seconds that the measurement took, above 0 (else ValueError).
    """
    ### BEGIN SOLUTION
    if duration <= 0:
        raise ValueError(f"the measurement took {duration} s")
    good = [
        came and ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit
        for arrival, came in zip(arrivals, times, strict=True)
    ]
    return sum(map(bool, good)) / duration
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the rank</summary>
#
# Sort. The value at place r (counted from 1) is not exceeded by r of the n values. Which is the
# smallest whole r with r/n ≥ q/100? Compute it in whole numbers: `0.07 * 100` is more than 7.
# </details>

# %% check="latency" points=1
checks.number(ttft(10.0, [10.5, 11.0]), 0.5, what="ttft", to=1e-9)
checks.number(
    tpot([1.0, 1.2, 1.8]), 0.4, what="tpot", to=1e-9, mistakes={"dividing by the tokens": 0.8 / 3}
)
checks.number(tpot([3.0]), 0.0, what="tpot of one token", atol=0.0)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for n in (2, 3, 7):
    gaps = (torch.rand(n, generator=g, dtype=torch.float64) + 0.1).tolist()
    moments = torch.tensor([gaps[0] + 5, *gaps[1:]], dtype=torch.float64).cumsum(0).tolist()
    checks.number(ttft(5.0, moments), gaps[0], what=f"ttft of {n} tokens", to=1e-9)
    checks.number(tpot(moments), sum(gaps[1:]) / (n - 1), what=f"tpot of {n} tokens", to=1e-9)
assert ttft(3.0, []) == math.inf, "a request without a token has waited without end: math.inf"
for few in ([], [4.0]):
    assert tpot(few) == 0.0, (
        f"tpot of {len(few)} tokens is 0.0: there is no gap; yours: {tpot(few)}"
    )
### END HIDDEN TESTS

# %% check="latency" points=1
mine = [30.0, 10.0, 20.0, 40.0]
checks.number(percentile(mine, 50), 20.0, what="the 50th of 4", to=0)
checks.number(percentile(mine, 51), 30.0, what="the 51st of 4", to=0, mistakes={"rounding": 20.0})
assert mine == [30.0, 10.0, 20.0, 40.0], "percentile sorts its argument in place"
### BEGIN HIDDEN TESTS
for n in (1, 2, 3, 10, 100, 123, 200):
    values = torch.randn(n, generator=checks.generator(n)).double().tolist()
    if n > 2:
        values[1] = values[2]  # a tie
    for q in (0, 1, 7, 14, 28, 29, 33, 50, 55, 57, 58, 66, 67, 90, 95, 99, 100):
        enough = [v for v in values if 100 * sum(w <= v for w in values) >= q * n]
        checks.number(percentile(values, q), min(enough), what=f"percentile {q} of {n}", to=1e-12)
checks.raises(ValueError, percentile, [], 50)
### END HIDDEN TESTS

# %% check="latency" points=1
# Four requests: good; first token late; slow after it; no token. In 2 seconds.
arrivals = [0.0, 0.0, 1.0, 1.0]
moments = [[0.5, 0.6, 0.7], [1.5, 1.6], [1.2, 3.2], []]
checks.number(goodput(arrivals, moments, 1.0, 0.25, 2.0), 0.5, what="goodput", to=1e-9)
### BEGIN HIDDEN TESTS
for limits, expected in (
    ((1.5, 0.25), 1.0),  # 1.5 s is within 1.5 s
    ((1.0, 2.0), 1.0),  # a gap of 2.0 s is within 2.0 s
    ((1.49, 1.99), 0.5),
    ((2.0, 3.0), 1.5),
    ((math.inf, math.inf), 1.5),  # whoever got no token got nothing
    ((0.1, 0.05), 0.0),
):
    checks.number(
        goodput(arrivals, moments, *limits, 2.0), expected, what=f"limits {limits}", to=1e-9
    )
checks.number(goodput(arrivals, moments, 2.0, 3.0, 0.5), 6.0, what="in half a second", to=1e-9)
checks.number(goodput([], [], 1.0, 1.0, 3.0), 0.0, what="goodput of no requests", to=1e-9)
checks.number(goodput([2.0], [[2.5]], 0.5, 0.0, 1.0), 1.0, what="one token, no gap", to=1e-9)
checks.number(goodput([0.0], [[0.0]], 0.0, 0.0, 1.0), 1.0, what="a token at once", to=1e-9)
for nothing in (0.0, -1.0):
    checks.raises(ValueError, goodput, [0.0], [[1.0]], 1.0, 1.0, nothing)
### END HIDDEN TESTS

# %% [markdown]
# ## A budget of tokens
#
# A step with many tokens takes longer. Whoever waits for the next token of a stream waits for the
# whole step, and so for everybody's prompt in it. A prompt of 8,000 tokens in one step can be a
# silence of a second for all others: the **generation stall**.
#
# Sarathi-Serve (2024) puts a **token budget** on the step. First every decode gets its one token,
# for those streams must not stop. What is left of the budget goes to prompts, cut to fit. A budget
# $b$ with $d$ decodes running leaves $b - d$ tokens for prompts, so that a prompt of $p$ tokens
# takes
#
# $$\left\lceil \frac{p}{b - d} \right\rceil$$
#
# steps. A small budget bounds the gap between tokens, and delays the first one. It also reads the
# weights once more for each piece, and each piece attends to all of its predecessors' keys again.
# The budget is the knob between TPOT and TTFT.

# %% [markdown]
# ### Exercise · Chunked prefill


# %% exercise="chunked_prefill" minutes=10 difficulty=1
def chunked_prefill(pending: list[int], budget: int) -> list[int]:
    """How many tokens of each sequence pass in this step: at most `budget` in all.

    pending[i] ≥ 1 tokens of sequence i are not computed yet; the oldest sequence is first. The list
    stays as it is. budget ≥ 0.
    Those with exactly one pending token get it first, in order, as long as there is budget. What is
    left goes to the others, in order: each gets all that it needs, or what there still is.

    [1, 30, 1, 9] with a budget of 16 gives [1, 14, 1, 0]; with 40 it gives [1, 30, 1, 8].
    """
    ### BEGIN SOLUTION
    counts = [0] * len(pending)
    decodes = [i for i, tokens in enumerate(pending) if tokens == 1]
    prompts = [i for i, tokens in enumerate(pending) if tokens > 1]
    for i in decodes + prompts:
        counts[i] = min(pending[i], budget)
        budget -= counts[i]
    return counts
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two passes</summary>
#
# Walk over the list twice: once for the entries that are 1, once for the others. In both, give the
# smaller of what is needed and what is left.
# </details>

# %% check="chunked_prefill" points=1
for budget, expected in ((16, [1, 14, 1, 0]), (40, [1, 30, 1, 8]), (1, [1, 0, 0, 0])):
    counts = chunked_prefill([1, 30, 1, 9], budget)
    assert counts == expected, (
        f"with a budget of {budget} pending tokens [1, 30, 1, 9] give {expected}, yours: {counts}"
    )
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for case in range(60):
    n = int(torch.randint(0, 9, (), generator=g))
    pending = torch.randint(1, 12, (n,), generator=g).tolist()
    pending = [1 if case % 3 and torch.rand((), generator=g) < 0.5 else p for p in pending]
    budget = int(torch.randint(0, 40, (), generator=g))
    given = list(pending)
    counts = chunked_prefill(pending, budget)
    assert pending == given, "chunked_prefill changes its argument `pending`"
    # Token by token: the next one always goes to whoever is first in line.
    line = [i for i in range(n) if given[i] == 1]
    line += [i for i in range(n) if given[i] > 1 for _ in range(given[i])]
    served = line[:budget]
    expected = [served.count(i) for i in range(n)]
    assert counts == expected, f"{given} with a budget of {budget}: {expected}, yours {counts}"
# The number of steps that a prompt takes beside decodes.
for prompt, decodes, budget in ((100, 3, 13), (101, 3, 13), (1, 4, 5), (64, 0, 64)):
    left, steps = prompt, 0
    while left and steps < 200:
        left -= chunked_prefill(
            [left, *[1] * decodes] if left > 1 else [1] * (decodes + 1), budget
        )[0]
        steps += 1
    assert steps == math.ceil(prompt / (budget - decodes)), (
        f"a prompt of {prompt} beside {decodes} decodes takes {steps} steps of {budget} tokens"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## Memory: sequences and blocks
#
# Lesson 30 built the pages; here is what this lesson needs of them, in short form. A `Sequence` is
# a request on its way. `Blocks` counts: it knows which numbered blocks are free and who uses the
# others. It holds no tensors. (Its `prefixes` is `None` until [](#prefixes).)
#
# A block is taken before its tokens are computed: `admit` takes blocks for a whole waiting text,
# `grow` for the next token or the next ones of a running text, `release` gives all back. `admit`
# and `grow` say whether it worked, and take nothing where it did not.


# %%
def greedy(logits: Tensor) -> int:
    """The likeliest token: logits (vocab,)."""
    return int(logits.argmax())


class Sequence:
    """One request: its text so far, how much of it is computed, and where that is kept."""

    def __init__(
        self,
        id: int,
        prompt: list[int],
        max_new: int = 16,
        stop: int | None = None,
        choose: Callable[[Tensor], int] = greedy,
    ):
        self.id, self.max_new, self.stop, self.choose = id, max_new, stop, choose
        self.tokens = list(prompt)  # the prompt, and then what was written
        self.prompt = len(prompt)
        self.computed = 0  # the first `computed` tokens have their keys and values in memory
        self.table: list[int] = []  # the blocks in which they are

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


class Blocks:
    """`count` blocks for the keys and values of `size` tokens each: who uses which."""

    def __init__(self, count: int, size: int, prefixes=None):
        self.count, self.size, self.prefixes = count, size, prefixes
        self.free = list(range(count))
        self.users = [0] * count  # sequences that use a block, and one more if it is cached
        self.cached: set[int] = set()  # blocks that `prefixes` holds

    @property
    def available(self) -> int:
        """Blocks that could be taken: free ones, and cached ones that no sequence uses."""
        return len(self.free) + sum(self.users[block] == 1 for block in self.cached)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Makes the table long enough for the first `tokens` tokens of a sequence, if it can."""
        needed = -(-tokens // self.size) - len(sequence.table)
        if needed > self.available:
            return False
        if needed > len(self.free):
            used = {block for block in self.cached if self.users[block] > 1}
            for block in self.prefixes.evict(needed - len(self.free), used):
                self.cached.discard(block)
                self.drop(block)
        taken, self.free = self.free[: max(needed, 0)], self.free[max(needed, 0) :]
        for block in taken:
            self.users[block] += 1
        sequence.table = sequence.table + taken
        return True

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence blocks for all of its tokens; those of its beginning that are
        cached count as computed. Where there are too few blocks it gets none."""
        if self.prefixes is not None:
            # At least the last token must pass, or there would be no logits.
            found = self.prefixes.match(self.keys(sequence.tokens[:-1]))
            for block in found:
                self.users[block] += 1
            sequence.table, sequence.computed = list(found), len(found) * self.size
        if self.grow(sequence, len(sequence.tokens)):
            return True
        self.release(sequence)
        return False

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks of a sequence back; none of its tokens is computed any more."""
        if self.prefixes is not None:  # what was computed is kept for others, as long as it can be
            keys = self.keys(sequence.tokens[: sequence.computed])
            known = self.prefixes.insert(keys, sequence.table[: len(keys)])
            for block in sequence.table[known : len(keys)]:
                self.cached.add(block)
                self.users[block] += 1
        for block in sequence.table:
            self.drop(block)
        sequence.table, sequence.computed = [], 0

    def drop(self, block: int) -> None:
        self.users[block] -= 1
        if not self.users[block]:
            self.free.append(block)

    def keys(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """The tokens of each whole block."""
        last = len(tokens) - self.size + 1
        return [tuple(tokens[i : i + self.size]) for i in range(0, last, self.size)]


# %% [markdown]
# ## The scheduler
#
# Orca (2022) made the observation on which all servers have stood since: the unit of scheduling is
# not the request, it is the *iteration*. Between two steps any sequence may leave or join, because
# nothing but its own pages ties it to the others.
#
# Then there are three decisions, and the answers here are those of vLLM. *Who runs?* Whoever has
# been admitted, in order of arrival. *Who is admitted?* The first in the queue, if there is a place
# in the batch, budget, and memory for its whole text; if the first does not fit, nobody overtakes
# it. *What if a running text needs a block and there is none?* The *youngest* running sequence
# gives all of its blocks back and goes to the head of the queue.
#
# Why the youngest? Order by age is what makes **starvation** impossible. Consider the oldest
# request in the system. It is the last that would be preempted, so it is not, as long as any other
# runs; and alone it fits, for requests that could never fit are refused at the door. With a budget
# of at least one token for each place in the batch it moves at every step. It ends, the next is
# oldest, and by induction everybody ends.

# %% [markdown]
# What becomes of the text that the preempted request has written? It stays. Its tokens so far,
# prompt and answer, are the prompt of its second life; only keys and values are computed again.
# This is **recomputation**. The alternative is to copy the blocks to the host's memory and back
# (swapping). Recomputing $n$ tokens is one prefill, whose tokens are cheap beside decoded ones, and
# the client notices a pause, nothing else: no token is sent twice and none is drawn again.
#
# ### Exercise · The scheduler
#
# The scheduler decides and counts; it computes nothing. In the checks nobody else does either: they
# move `computed` on and append tokens as an engine would.


# %% exercise="scheduler" minutes=40 difficulty=3
class Scheduler:
    """Decides, step by step, which tokens of which sequences pass through the model.

    Scheduler(blocks, budget, max_running): a step passes at most `budget` tokens, and at most
    max_running sequences run at a time. ValueError unless 1 ≤ max_running ≤ budget: each running
    sequence must be able to get its token.

    Attributes: blocks, budget, max_running as given;
        waiting: the sequences that wait, the next one first (a list or deque);
        running: a list of the sequences that hold blocks, the oldest first;
        preemptions: how often a sequence was preempted so far.

    add(sequence): puts a new sequence at the end of `waiting`. ValueError if its prompt and its
        max_new new tokens together would not fit in all blocks (blocks.count · blocks.size tokens).

    finish(sequence): a sequence that runs or waits is over, or was cancelled. It leaves `running`
        or `waiting`, and its blocks are released.

    step(): the plan of the next step, a list of pairs (sequence, tokens ≥ 1). The caller moves
        `computed` on by as many, appends a token to each sequence that has none pending then, and
        calls finish(…) for those that end. step() itself changes neither tokens nor, but for
        preemption and admission, `computed`.
        1. The running sequences get tokens as chunked_prefill says. In order of age, each one that
           gets some also gets the blocks it needs for them (blocks.grow). Where there are too few,
           the youngest running sequence is preempted, again and again, until there are enough or
           the sequence itself has been preempted: the next steps may give it another chance.
           Preempted: blocks released, first in `waiting`, not in the plan; it keeps its tokens.
        2. Waiting sequences are admitted, the first one first, as long as fewer than max_running
           run, budget is left, and blocks.admit(…) takes it. Each gets as many of its pending
           tokens as the budget still holds. The first that is not taken ends the step: nobody
           overtakes. (Whoever was preempted in this step is first, and does not fit.)
        The plan lists running sequences first, then the admitted ones, both in order of age.

    Six blocks of 4 tokens, budget 8, max_running 3; A, B, C with prompts of 10, 3 and 5 tokens:
        step 1: A 8 (budget used up)        step 2: A 2, B 3, C 3 (of its 5)
        step 3: A 1, B 1, C 2               step 4: A 1, B 1; B needs a block, C is preempted
        step 5: A 1, B 1 (A takes the last block; C, of 6 tokens now, needs two)
    """

    def __init__(self, blocks: Blocks, budget: int, max_running: int):
        ### BEGIN SOLUTION
        if not 1 <= max_running <= budget:
            raise ValueError(f"{max_running} running sequences with a budget of {budget} tokens")
        self.blocks, self.budget, self.max_running = blocks, budget, max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        ### END SOLUTION

    def add(self, sequence: Sequence) -> None:
        ### BEGIN SOLUTION
        longest, room = (
            len(sequence.tokens) + sequence.max_new,
            self.blocks.count * self.blocks.size,
        )
        if longest > room:
            raise ValueError(f"{longest} tokens, prompt and answer; there is room for {room}")
        self.waiting.append(sequence)
        ### END SOLUTION

    def finish(self, sequence: Sequence) -> None:
        ### BEGIN SOLUTION
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        else:
            self.waiting.remove(sequence)
        ### END SOLUTION

    def step(self) -> list[tuple[Sequence, int]]:
        ### BEGIN SOLUTION
        plan = []
        pending = [sequence.pending for sequence in self.running]
        counts = chunked_prefill(pending, self.budget)
        for sequence, count in list(zip(self.running, counts, strict=True)):
            if sequence not in self.running:  # preempted, as are all that follow
                break
            if self.make_room(sequence, sequence.computed + count):
                plan.append((sequence, count))
        left = self.budget - sum(count for _, count in plan)
        while self.waiting and left:
            if len(self.running) == self.max_running or not self.blocks.admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            plan.append((sequence, min(sequence.pending, left)))
            left -= plan[-1][1]
        return plan

    def make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Preempts the youngest until the blocks suffice; whether the sequence still runs."""
        while not self.blocks.grow(sequence, tokens):
            youngest = self.running.pop()
            self.blocks.release(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a list that changes while you walk over it</summary>
#
# Preempting shortens `running`. Walk over a copy, and look before each sequence whether it is still
# there. Those that have been planned are older than any victim, so the plan never has to be
# corrected.
# </details>
#
# <details><summary>Hint: preempting yourself</summary>
#
# If the sequence that needs a block is the youngest itself, it is the one to go. Then there is
# nothing to grow any more: leave the loop without planning it.
# </details>
#
# <details><summary>Hint: chunks need no blocks</summary>
#
# `blocks.admit` takes blocks for the whole text, so `grow` finds enough for the pieces of a prompt.
# It is the decodes that run out: every `size` tokens each of them needs one block more.
# </details>


# %% tags=["support"]
# Support: what an engine does after a step, many steps with their states, and the rules
def compute(scheduler, plan) -> None:
    """Moves each sequence on by what the plan says; whoever has nothing pending writes a token."""
    for sequence, count in plan:
        sequence.computed += count
        if sequence.pending == 0:
            sequence.tokens = [*sequence.tokens, 100 + len(sequence.tokens)]
            if len(sequence.tokens) - sequence.prompt == sequence.max_new:
                scheduler.finish(sequence)


class Remembering(Blocks):
    """Blocks that know the first four tokens of every text, all but its last, from earlier ones."""

    def admit(self, sequence: Sequence) -> bool:
        admitted = super().admit(sequence)
        if admitted:
            sequence.computed = min(4, len(sequence.tokens) - 1)
        return admitted


def names(plan) -> list[tuple[str, int]]:
    return [("ABCDEFGHIJ"[sequence.id], count) for sequence, count in plan]


def state_of(scheduler) -> tuple:
    """Running, waiting (each: id, tokens computed, tokens in all, table), free, preemptions."""
    running, waiting = (
        [(s.id, s.computed, len(s.tokens), list(s.table)) for s in line]
        for line in (scheduler.running, scheduler.waiting)
    )
    return running, waiting, list(scheduler.blocks.free), scheduler.preemptions


@checks.measured
def play(make, options: tuple, arrivals: list, leaving: dict[int, int], steps: int) -> tuple:
    """Runs a scheduler until everybody is done: (state before, plan, state after) of each step, all
    texts in the end, and the last state. arrivals: (step, tokens of the prompt, max_new), by step;
    leaving: in which step, later than that, a sequence is cancelled."""
    count, size, budget, running = options
    scheduler = make(Blocks(count, size), budget, running)
    everyone = [Sequence(i, list(range(n)), new) for i, (_, n, new) in enumerate(arrivals)]
    log, over = [], set()
    for step in range(steps):
        for (arrives, *_), sequence in zip(arrivals, everyone, strict=True):
            if arrives == step:
                scheduler.add(sequence)
        for i in [i for i, leaves in leaving.items() if leaves == step and i not in over]:
            scheduler.finish(everyone[i])
            over.add(i)
        before = state_of(scheduler)
        plan = scheduler.step()
        log.append((before, [(s.id, tokens) for s, tokens in plan], state_of(scheduler)))
        compute(scheduler, plan)
        over |= {s.id for s in everyone if len(s.tokens) - s.prompt >= s.max_new}
        if len(over) == len(everyone):
            scheduler.step()
            break
    return log, [s.tokens for s in everyone], state_of(scheduler)


def requests(g: torch.Generator, count: int, longest: int, written: int, spread: int) -> list:
    """(step of arrival, tokens of the prompt, max_new), by step."""
    steps = torch.randint(0, spread, (count,), generator=g).sort().values.tolist()
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    news = torch.randint(1, written + 1, (count,), generator=g).tolist()
    return list(zip(steps, lengths, news, strict=True))


def drive(options: tuple, arrivals: list, leaving: dict[int, int], steps: int) -> dict:
    """Plays, and raises at the first step that breaks a rule."""
    log, texts, end = play(Scheduler, options, arrivals, leaving, steps)
    count, size, budget, places = options
    seen, over = {"preempted": 0, "chunks": 0}, set()
    for step, (before, plan, after) in enumerate(log):
        where = f"step {step}: "
        over |= {i for i, leaves in leaving.items() if leaves == step}
        present = {i for i, (arrives, *_) in enumerate(arrivals) if arrives <= step} - over
        ran, _, could, counted = before
        running, waiting, free, preemptions = after
        planned, stayed = dict(plan), [s[0] for s in running]
        ids = [s[0] for s in (*running, *waiting)]
        assert len(planned) == len(plan), where + "a sequence is planned twice"
        assert sum(planned.values()) <= budget, where + "the plan exceeds the budget"
        assert len(running) <= places, where + "more than max_running run"
        assert ids == sorted(ids), where + f"running and waiting are not in order of age: {ids}"
        assert set(ids) == present, where + "a sequence is neither running nor waiting, or both"
        assert [*planned] == [i for i in stayed if i in planned], (
            where + "the plan holds one that does not run, or is not in order of age"
        )
        length = {i: n for i, _, n, _ in (*before[0], *before[1])}
        assert {i: n for i, _, n, _ in (*running, *waiting)} == length, where + "a text changed"
        for i, computed, n, table in running:
            tokens = planned.get(i, 1)
            assert 1 <= tokens <= n - computed, where + f"{tokens} of {n - computed} pending tokens"
            assert len(table) * size >= computed + planned.get(i, 0), where + "too few blocks"
            assert tokens == n - computed or sum(planned.values()) == budget, (
                where + "budget is left, and a prompt was cut"
            )
            seen["chunks"] += tokens < n - computed
        held = [block for *_, table in running for block in table]
        assert sorted([*held, *free]) == list(range(count)), (
            where + "blocks are lost, or two sequences hold the same one"
        )
        assert not any(s[1] or s[3] for s in waiting), where + "a waiting sequence holds blocks"
        # The most of the oldest whose needs are met by free blocks and those of all the younger.
        needs = [
            max(0, math.ceil((computed + 1) / size) - len(table)) if n - computed == 1 else 0
            for _, computed, n, table in ran
        ]
        stay = max(
            m
            for m in range(len(ran) + 1)
            if sum(needs[:m]) <= len(could) + sum(len(s[3]) for s in ran[m:])
        )
        assert [s[0] for s in ran if s[0] in stayed] == [s[0] for s in ran[:stay]], (
            where + f"of {len(ran)} running sequences the {stay} oldest could stay; in your step "
            f"{sum(s[0] in stayed for s in ran)} stayed"
        )
        assert preemptions == counted + len(ran) - stay, where + "preemptions is wrong"
        for i, computed, n, _ in ran[:stay]:
            assert n - computed > 1 or planned.get(i) == 1, where + "a decode gets no token"
        if waiting and sum(planned.values()) < budget and len(running) < places:
            wants = math.ceil(waiting[0][2] / size)
            assert wants > len(free), where + "the first in line fits and was left out"
        assert not ids or ids[0] in planned, where + "the oldest request does not move"
        seen["preempted"] += len(ran) - stay
        for i, computed, n, _ in running:
            _, prompt, new = arrivals[i]
            if n - computed == planned.get(i) and n + 1 == prompt + new:
                over.add(i)
    assert len(over) == len(arrivals), (
        f"after {steps} steps {len(arrivals) - len(over)} requests are not done"
    )
    for text, (_, prompt, _) in zip(texts, arrivals, strict=True):
        expected = [*range(prompt), *range(100 + prompt, 100 + len(text))]
        assert text == expected, "a text is not its prompt and what was written"
    assert end[:2] == ([], []), "at the end somebody is still there"
    assert len(end[2]) == count, "at the end not all blocks are free"
    return seen


# %% check="scheduler" points=2
# Memory for everybody: who runs, and in which pieces.
blocks = Blocks(count=40, size=4)
scheduler = Scheduler(blocks, budget=8, max_running=3)
for who, length in enumerate((10, 3, 5, 2)):
    scheduler.add(Sequence(who, list(range(length)), max_new=3))
for number, expected in enumerate(
    (
        [("A", 8)],
        [("A", 2), ("B", 3), ("C", 3)],  # D: three run already
        [("A", 1), ("B", 1), ("C", 2)],
        [("A", 1), ("B", 1), ("C", 1)],  # A and B write their last token
        [("C", 1), ("D", 2)],
    )
):
    plan = scheduler.step()
    assert names(plan) == expected, (
        f"step {number + 1}: the plan should be {expected}, yours is {names(plan)}"
    )
    compute(scheduler, plan)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for budget, running in ((8, 3), (5, 5), (64, 4), (1, 1)):
    arrivals = requests(g, count=14, longest=30, written=9, spread=25)
    seen = drive((400, 3, budget, running), arrivals, {}, steps=900)
    assert seen["preempted"] == 0, "somebody was preempted though memory is plenty"
    assert seen["chunks"] or budget == 64, "no prompt was cut, though the budget is small"
# A full batch and an exhausted budget end admission; a place and budget open it again.
scheduler = Scheduler(Blocks(count=40, size=4), budget=4, max_running=4)
for who, length in enumerate((1, 3, 2)):
    scheduler.add(Sequence(who, list(range(length)), max_new=2))
plan = scheduler.step()
assert names(plan) == [("A", 1), ("B", 3)], "the budget is used up to the last token"
assert [s.id for s in scheduler.waiting] == [2], "with no budget left nobody is admitted"
# What admit found computed is not pending, and takes nothing of the budget.
scheduler = Scheduler(Remembering(count=40, size=4), budget=8, max_running=4)
for who, length in enumerate((9, 3, 30)):
    scheduler.add(Sequence(who, list(range(length)), max_new=2))
plan = scheduler.step()
due = [("A", 5), ("B", 1), ("C", 2)]
assert names(plan) == due, f"with 4, 2 and 4 tokens found computed: {due}, yours {names(plan)}"
### END HIDDEN TESTS

# %% check="scheduler" points=2
# The example above: memory runs out in step 4.
blocks = Blocks(count=6, size=4)
scheduler = Scheduler(blocks, budget=8, max_running=3)
for who, length in enumerate((10, 3, 5)):
    scheduler.add(Sequence(who, list(range(length)), max_new=8))
for number, expected in enumerate(
    (
        [("A", 8)],
        [("A", 2), ("B", 3), ("C", 3)],
        [("A", 1), ("B", 1), ("C", 2)],
        [("A", 1), ("B", 1)],
        [("A", 1), ("B", 1)],
    )
):
    plan = scheduler.step()
    assert names(plan) == expected, (
        f"step {number + 1}: the plan should be {expected}, yours is {names(plan)}"
    )
    compute(scheduler, plan)
assert scheduler.preemptions == 1, f"one preemption so far; yours: {scheduler.preemptions}"
(waiting,) = scheduler.waiting
assert len(waiting.tokens) == 6, "C keeps its five tokens and the one that it wrote"
### BEGIN HIDDEN TESTS
g = checks.generator(4)
total = 0
for count, size, budget, running in ((9, 4, 16, 6), (12, 2, 8, 8), (7, 5, 9, 4), (20, 1, 10, 5)):
    for _ in range(2):
        longest = count * size // 4
        arrivals = requests(g, count=12, longest=longest, written=2 * longest, spread=10)
        total += drive((count, size, budget, running), arrivals, {}, steps=3000)["preempted"]
assert total > 20, "these requests are too many for memory, and hardly anybody is preempted"
# A request that takes all blocks for itself, alone and behind others.
for arrivals in ([(0, 9, 7)], [(0, 8, 8)] * 3):
    drive((4, 4, 4, 3), arrivals, {}, steps=200)
### END HIDDEN TESTS

# %% check="scheduler" points=1
# The door, and leaving early.
checks.raises(ValueError, Scheduler, Blocks(4, 4), 3, 4, because="4 cannot all get a token of 3")
scheduler = Scheduler(Blocks(4, 4), 8, 2)
checks.raises(
    ValueError,
    scheduler.add,
    Sequence(0, [1] * 10, max_new=7),
    because="17 tokens do not fit in 16 slots, however long it waits",
)
assert not list(scheduler.waiting), "a refused sequence is not in the queue"
### BEGIN HIDDEN TESTS
checks.raises(ValueError, Scheduler, Blocks(4, 4), 3, 0)
checks.raises(ValueError, Scheduler, Blocks(4, 4), 0, 0)
Scheduler(Blocks(4, 4), 3, 3)
for count, size in ((3, 5), (5, 3)):
    blocks = Blocks(count, size)
    scheduler = Scheduler(blocks, 4, 2)
    scheduler.add(Sequence(0, [1] * 9, max_new=6))  # exactly all
    checks.raises(ValueError, scheduler.add, Sequence(1, [1] * 9, max_new=7))
    attributes = scheduler.budget, scheduler.max_running, scheduler.preemptions
    assert attributes == (4, 2, 0), f"budget, max_running, preemptions are {attributes}"
    assert scheduler.blocks is blocks, "the attribute blocks is not what was given"
g = checks.generator(5)
for _ in range(2):
    arrivals = requests(g, count=16, longest=20, written=12, spread=12)
    leaving = {
        i: arrivals[i][0] + int(torch.randint(1, 30, (), generator=g)) for i in range(0, 16, 2)
    }
    drive((14, 3, 10, 5), arrivals, leaving, steps=1500)
# The middle of the queue, and a running sequence, leave at once.
blocks = Blocks(10, 2)
scheduler, everyone = Scheduler(blocks, 6, 2), [Sequence(i, [1] * 3, 4) for i in range(5)]
for sequence in everyone:
    scheduler.add(sequence)
compute(scheduler, scheduler.step())
scheduler.finish(everyone[3])
scheduler.finish(everyone[0])
assert [s.id for s in scheduler.running] == [1], "finish() leaves a running sequence in its place"
assert [s.id for s in scheduler.waiting] == [2, 4], "finish() takes one out of the queue's middle"
assert len(blocks.free) == 8, "finish() gives the blocks back"
### END HIDDEN TESTS

# %% [markdown]
# ### What the scheduler decides, seen
#
# Ten requests of unequal lengths, on your scheduler with a place for four of them. The upper
# picture forbids admission until the batch is empty, as a **static batch** does; below it is
# yours. Nothing is computed: what is drawn are plans.


# %% tags=["experiment"]
class Static(Scheduler):
    """A batch forms once the last one is over, of all who wait then, as many as may run. Whoever
    comes later waits for the next."""

    forming = True

    def step(self) -> list[tuple[Sequence, int]]:
        self.forming = self.forming or not self.running
        if self.forming:
            plan = super().step()
            self.forming = bool(self.waiting) and len(self.running) < self.max_running
            return plan
        waiting, self.waiting = self.waiting, deque()
        plan = super().step()
        self.waiting.extend(waiting)  # preempted sequences stay before them
        return plan


def timeline(kind: type[Scheduler], lengths: list[tuple[int, int]], **options) -> list:
    """(step, who, tokens, whether they are of the prompt) of all that a scheduler plans."""
    scheduler, drawn, step = kind(Blocks(options.pop("count"), 4), **options), [], 0
    for who, (prompt, new) in enumerate(lengths):
        scheduler.add(Sequence(who, [0] * prompt, new))
    while scheduler.running or scheduler.waiting:
        for sequence, count in (plan := scheduler.step()):
            drawn.append((step, sequence.id, count, sequence.computed < sequence.prompt))
            sequence.computed += count
            if not sequence.pending:
                sequence.tokens.append(0)
        for sequence, _ in plan:
            if len(sequence.tokens) - sequence.prompt >= sequence.max_new:
                scheduler.finish(sequence)
        step += 1
    return drawn


lengths = [(12, 4), (9, 22), (20, 6), (6, 9), (14, 5), (8, 12), (24, 3), (5, 18), (10, 7), (7, 5)]
drawn = {
    "static": timeline(Static, lengths, count=60, budget=16, max_running=4),
    "continuous": timeline(Scheduler, lengths, count=60, budget=16, max_running=4),
    "continuous, with a quarter of the memory": timeline(
        Scheduler, lengths, count=15, budget=16, max_running=4
    ),
}
written = sum(new for _, new in lengths)
for name, plan in drawn.items():
    steps = 1 + max(step for step, *_ in plan)
    print(f"{name:42} {steps:3} steps, {written / steps:.2f} tokens written in a step")

# %% tags=["experiment", "figure"]
# Figure: a row is a request, a column is a step; the static batch waits for its longest text
fig, axes = plt.subplots(
    3, 1, figsize=(9.5, 7.2), sharex=True, gridspec_kw={"hspace": 0.12}, layout="constrained"
)
for ax, (name, plan) in zip(axes, drawn.items(), strict=True):
    for step, who, count, prefill in plan:
        color = plot.COLORS[0] if prefill else plot.COLORS[1]
        ax.barh(who, 1, left=step, height=0.72, color=color, edgecolor="white", linewidth=0.8)
        if prefill:
            ax.text(step + 0.5, who, count, ha="center", va="center", fontsize=6.5, color="white")
    ax.set(ylabel="request", yticks=range(len(lengths)))
    ax.set_title(name)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
for color, label in ((plot.COLORS[0], "prompt (number of tokens)"), (plot.COLORS[1], "one decode")):
    axes[0].barh(0, 0, color=color, label=label)
axes[0].legend(loc="upper right", fontsize=8)
axes[-1].set_xlabel("step")
plot.caption(
    fig,
    "Above, gaps in a batch stay empty until its longest text ends. In the middle a free place is "
    "taken in the next step. Below, memory runs out: the youngest texts stop, wait, and pass "
    "their tokens again (a second run of blue cells) when there is room.",
)
plt.show()

# %% [markdown]
# ## The engine
#
# Now the plan has to be computed. The `Runner` is lesson 30's forward pass in short form: one pass
# over pieces of any number of texts. All matrix products see one flat list of tokens, so that a
# chunk of a prompt and fifteen decodes are one matrix. Only attention needs to know which token
# belongs to whom: each piece writes its keys and values into its own blocks, and reads those of
# its own table. It returns the logits behind the *last* token of each piece.


# %%
class Runner:
    """The course's model on paged memory. `passed` counts the tokens that went through it."""

    def __init__(self, model: models.Llama, blocks: int, size: int):
        self.model, self.size, self.passed = model, size, 0
        config, weight = model.config, model.embed_tokens.weight
        shape = config.layers, 2, blocks * size, config.kv_heads, config.head_dim
        self.memory = torch.zeros(shape, dtype=weight.dtype)

    @torch.no_grad()
    def __call__(self, pieces: list[tuple[list[int], int, list[int]]]) -> Tensor:
        """Logits (len(pieces), vocab) of the token behind each piece: (tokens, how many tokens of
        the text are computed before them, table). The tokens' keys and values go into memory."""
        model, counts = self.model, [len(tokens) for tokens, _, _ in pieces]
        self.passed += sum(counts)
        slots = [  # of all tokens of each text so far
            (torch.tensor(table)[:, None] * self.size + torch.arange(self.size)).flatten()[
                : start + n
            ]
            for (_, start, table), n in zip(pieces, counts, strict=True)
        ]
        places = [torch.arange(len(s))[-n:] for s, n in zip(slots, counts, strict=True)]
        new = torch.cat([s[p] for s, p in zip(slots, places, strict=True)])
        cos, sin = angles(torch.cat(places), model.config)
        ends = torch.tensor(counts).cumsum(0) - 1  # the last token of each piece in the flat list
        ones = [i for i, n in enumerate(counts) if n == 1]  # decodes share one attention
        lengths = torch.tensor([len(slots[i]) for i in ones])
        padded = nn.utils.rnn.pad_sequence([slots[i] for i in ones], True) if ones else None
        x = model.embed_tokens(torch.tensor([token for piece, _, _ in pieces for token in piece]))
        for block, (keys, values) in zip(model.layers, self.memory, strict=True):
            attention, normed = block.self_attn, block.input_layernorm(x)
            q, k, v = (
                projection(normed).unflatten(-1, (-1, model.config.head_dim)).transpose(0, 1)[None]
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )  # (1, heads, tokens, head_dim)
            q = rotate(q, cos, sin)[0]
            keys[new], values[new] = rotate(k, cos, sin)[0].transpose(0, 1), v[0].transpose(0, 1)
            out = torch.empty_like(q)
            if ones:
                seen = torch.arange(padded.shape[1]) < lengths[:, None]  # (decodes, slots)
                out[:, ends[ones]] = F.scaled_dot_product_attention(
                    q[:, ends[ones]].transpose(0, 1)[:, :, None],
                    keys[padded].transpose(1, 2),
                    values[padded].transpose(1, 2),
                    attn_mask=seen[:, None, None],
                    enable_gqa=True,
                )[:, :, 0].transpose(0, 1)
            for end, n, own in zip(ends.tolist(), counts, slots, strict=True):
                if n > 1:
                    causal = torch.ones(n, len(own), dtype=torch.bool).tril(len(own) - n)
                    out[:, end + 1 - n : end + 1] = F.scaled_dot_product_attention(
                        q[None, :, end + 1 - n : end + 1],
                        keys[own].transpose(0, 1)[None],
                        values[own].transpose(0, 1)[None],
                        attn_mask=causal,
                        enable_gqa=True,
                    )[0]
            x = x + attention.o_proj(out.transpose(0, 1).flatten(-2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return F.linear(model.norm(x[ends]), model.embed_tokens.weight)


def sampler(temperature: float, seed: int | None = None) -> Callable[[Tensor], int]:
    """A function of logits (vocab,) that chooses a token, with random numbers of its own: what one
    request draws does not depend on who else is in the batch."""
    if temperature == 0:
        return greedy
    g = torch.Generator()
    g.manual_seed(seed) if seed is not None else g.seed()
    return lambda logits: int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=g))


# %% [markdown]
# A step of the engine is five lines of thought: ask for a plan; cut each sequence's next piece from
# its tokens; run; move `computed` on; and where a sequence has nothing pending, choose its next
# token from its logits. Where something is still pending the piece was the middle of a prompt, and
# its logits predict a token that is known already: nobody looks at them.
#
# ### Exercise · The engine


# %% exercise="engine" minutes=35 difficulty=3
class Engine:
    """A model, its paged memory, a scheduler and samplers: requests go in, tokens come out.

    Engine(model, scheduler): memory for the blocks that scheduler.blocks counts, in a Runner.
    Attributes: scheduler; runner; limit, the most tokens that a prompt and its answer may have
        together (all blocks' slots); busy, True while any request waits or runs.

    submit(prompt, max_new=16, stop=None, choose=greedy) → the request's id: a whole number that
        this engine has given to no other request. The prompt, a list of ids, is copied.
        ValueError, and no trace, if the prompt is empty, max_new < 1, or len(prompt) + max_new
        exceeds the limit.
    step() → the tokens written in one step, as a list of (id, token, reason), in the order of the
        plan. reason is None while the request goes on; "stop" if the token is its `stop` (which is
        part of the answer); else "length" if it is the last of max_new. A request with a reason is
        over: its blocks are free when step() returns. Nobody there: [], and the model is not run.
        A token is choose(logits) of the request, logits (vocab,); it is called once for each token
        that is written and never for the middle of a prompt, also if the request was preempted.
    cancel(id): the request is over, its blocks are free, and no token of it comes out any more. An
        id that is over already, or was never given, is ignored.
    """

    def __init__(self, model: models.Llama, scheduler: Scheduler):
        ### BEGIN SOLUTION
        blocks = scheduler.blocks
        self.scheduler, self.runner = scheduler, Runner(model, blocks.count, blocks.size)
        self.limit = blocks.count * blocks.size
        self.requests: dict[int, Sequence] = {}
        self.given = 0
        ### END SOLUTION

    @property
    def busy(self) -> bool:
        ### BEGIN SOLUTION
        return bool(self.requests)
        ### END SOLUTION

    def submit(
        self,
        prompt: list[int],
        max_new: int = 16,
        stop: int | None = None,
        choose: Callable[[Tensor], int] = greedy,
    ) -> int:
        ### BEGIN SOLUTION
        if not prompt or max_new < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens, {max_new} tokens wanted")
        sequence = Sequence(self.given, prompt, max_new, stop, choose)
        self.scheduler.add(sequence)
        self.requests[self.given] = sequence
        self.given += 1
        return sequence.id
        ### END SOLUTION

    def cancel(self, id: int) -> None:
        ### BEGIN SOLUTION
        if id in self.requests:
            self.scheduler.finish(self.requests.pop(id))
        ### END SOLUTION

    def step(self) -> list[tuple[int, int, str | None]]:
        ### BEGIN SOLUTION
        plan = self.scheduler.step()
        if not plan:
            return []
        logits = self.runner(
            [(s.tokens[s.computed : s.computed + n], s.computed, s.table) for s, n in plan]
        )
        events = []
        for (sequence, count), row in zip(plan, logits, strict=True):
            sequence.computed += count
            if sequence.pending:
                continue
            token, reason = sequence.choose(row), None
            sequence.tokens.append(token)
            if token == sequence.stop:
                reason = "stop"
            elif len(sequence.tokens) - sequence.prompt == sequence.max_new:
                reason = "length"
            events.append((sequence.id, token, reason))
            if reason:
                self.cancel(sequence.id)
        return events
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which piece?</summary>
#
# `computed` tokens are in memory. The plan's count says how many come next: tokens from `computed`
# to `computed + count`, the runner's `start` is `computed`. This is the same line for a prompt, a
# chunk, a decode and the second life of a preempted text.
# </details>
#
# <details><summary>Hint: ending and cancelling</summary>
#
# Both are the same for the scheduler. Keep the living requests in a dictionary by their id; whoever
# is not in it is over.
# </details>


# %% tags=["support"]
# Support: a small random model in float64, its text one at a time, and an engine around it
def random_model(seed: int) -> models.Llama:
    """Two layers, 4 heads on 2 key–value heads, 50 tokens; weights wide enough for varied text."""
    config = models.Config(
        vocab_size=50, hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_size=48, context=128
    )
    model = models.Llama(config).eval().requires_grad_(False).double()
    g = checks.generator(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.35)
    return model


def alone(model, prompt: list[int], new: int) -> list[int]:
    """Greedy text of one request by the library's model, without a cache."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def check_text(model, prompt: list[int], text: list[int], where: str = "") -> None:
    """Each token is the likeliest after all before it: one pass over the whole. Where two are
    within rounding of each other, either will do."""
    logits = model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1]
    lacks = logits.max(-1).values - logits[torch.arange(len(text)), torch.tensor(text)]
    wrong = (lacks > 1e-6 * logits.abs().max()).nonzero()[:, 0].tolist()
    assert not wrong, (
        f"{where}after {len(prompt)} tokens of a prompt and {wrong[0]} of its answer the model "
        f"alone writes {int(logits[wrong[0]].argmax())}, your engine {text[wrong[0]]}"
    )


@checks.measured
def rush(make, model, options: tuple, wanted: list, leaving: dict[int, int], steps: int) -> dict:
    """Runs an engine where the learner's code runs, until nobody is there. wanted: (step before
    which it comes, prompt, options of submit); leaving: before which step who is cancelled, by
    place in wanted. Gives ids, the events of each step, and the state at the end."""
    count, size, budget, running = options
    engine = make(model, Scheduler(Blocks(count, size), budget, running))
    ids, events, same = {}, [], True
    for step in range(steps):
        for i, (comes, prompt, how) in enumerate(wanted):
            if comes == step:
                own = list(prompt)
                ids[i] = engine.submit(own, **how)
                same = same and own == prompt
                own.append(1)  # the caller goes on with its own list
        for i, leaves in leaving.items():
            if leaves == step:
                engine.cancel(ids[i])
        if len(ids) == len(wanted) and not engine.busy:
            break
        events.append(engine.step())
    blocks = engine.scheduler.blocks
    return {
        "ids": [ids[i] for i in range(len(wanted))],
        "events": events,
        "same": same,
        "busy": engine.busy,
        "free": len(blocks.free),
        "preemptions": engine.scheduler.preemptions,
        "passed": engine.runner.passed,
    }


def rushed(model, options: tuple, wanted: list, leaving: dict[int, int], steps: int) -> tuple:
    """Texts and reasons by place in `wanted`, and the rest; what holds of every run is checked."""
    seen = rush(Engine, model, options, wanted, leaving, steps)
    ids = seen["ids"]
    assert len({*ids}) == len(ids), "two requests have the same id"
    assert seen["same"], "submit changes the prompt that it is given"
    assert seen["busy"] is False, f"after {steps} steps the engine is still busy"
    assert seen["free"] == options[0], "blocks are in use when nobody is there"
    texts, reasons = [[] for _ in ids], [None] * len(ids)
    for step, events in enumerate(seen["events"]):
        for who, token, reason in events:
            i = ids.index(who)
            assert reasons[i] is None, "a token after the end"
            assert leaving.get(i, step + 1) > step, "a token of a request that was cancelled"
            texts[i].append(token)
            reasons[i] = reason
    for i, (_, _, how) in enumerate(wanted):
        if i in leaving:
            continue
        assert len(texts[i]) == how["max_new"], "a request has not written max_new tokens"
        assert reasons[i] == "length", f"the last token of max_new has the reason {reasons[i]}"
    return texts, seen


def collect(engine, steps: int) -> dict[int, list]:
    """Steps until nobody is there: each request's [tokens …, reason]."""
    texts = {}
    for _ in range(steps):
        if not engine.busy:
            return texts
        for who, token, reason in engine.step():
            assert texts.get(who, [None])[-1] not in ("stop", "length"), "a token after the end"
            texts.setdefault(who, []).append(token)
            if reason is not None:
                texts[who].append(reason)
    raise AssertionError(f"after {steps} steps the engine is still busy")


def prompts_of(g: torch.Generator, count: int, longest: int) -> list[list[int]]:
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(0, 50, (n,), generator=g).tolist() for n in lengths]


# %% check="engine" points=2
# Every text is the one that the model writes for it alone.
model = random_model(1)
engine = Engine(model, Scheduler(Blocks(count=12, size=4), budget=6, max_running=3))
prompts = [[7, 3, 9, 1, 4, 4, 8, 2], [5], [6, 6, 1]]
ids = [engine.submit(prompt, max_new=5) for prompt in prompts]
checks.kind(ids[0], int, what="the id of a request")
texts = collect(engine, steps=60)
for who, prompt in zip(ids, prompts, strict=True):
    expected = [*alone(model, prompt, 5), "length"]
    assert texts.get(who) == expected, (
        f"after {prompt} the model alone writes {expected}, your engine {texts.get(who)}"
    )
### BEGIN HIDDEN TESTS
g = checks.generator(6)
preempted = 0
for seed, (count, size, budget, running) in enumerate(
    ((60, 4, 7, 7), (16, 3, 9, 6), (50, 1, 8, 5), (9, 5, 5, 5)), start=2
):
    model, prompts = random_model(seed), prompts_of(g, 9, 14)
    news = [
        min(n, count * size - len(prompt))
        for n, prompt in zip((9, 20, 1, 14, 6, 25, 12, 18, 3), prompts, strict=True)
    ]
    comes = [0, 0, 1, 3, 3, 4, 6, 6, 7]
    wanted = [
        (step, prompt, {"max_new": new})
        for step, prompt, new in zip(comes, prompts, news, strict=True)
    ]
    texts, seen = rushed(model, (count, size, budget, running), wanted, {}, steps=900)
    for prompt, text in zip(prompts, texts, strict=True):
        check_text(model, prompt, text, f"blocks of {size}, budget {budget}: ")
    preempted += seen["preemptions"]
    least = sum(len(prompt) + new - 1 for prompt, new in zip(prompts, news, strict=True))
    passed = seen["passed"]
    assert passed == least or (seen["preemptions"] and passed > least), (
        f"{passed} tokens passed through the model; each prompt and each written token but the "
        f"last passes once: {least}"
    )
assert preempted, "these requests are too many for memory, and nobody was preempted"
### END HIDDEN TESTS

# %% check="engine" points=1
# How a request ends, and what is refused.
model = random_model(1)
engine = Engine(model, Scheduler(Blocks(count=4, size=4), budget=8, max_running=2))
own = alone(model, [7, 3, 9], 6)
engine.submit([7, 3, 9], max_new=6, stop=own[2])
(text,) = collect(engine, steps=20).values()
end = own.index(own[2]) + 1
assert text == [*own[:end], "stop"], f"with stop={own[2]} the answer is {own[:end]}, stop; {text}"
checks.raises(ValueError, engine.submit, [], because="there is nothing to go on from")
checks.raises(ValueError, engine.submit, [1] * 10, 7, because="17 tokens, and room for 16")
assert not engine.busy, "a refused request leaves nothing behind"
### BEGIN HIDDEN TESTS
checks.number(engine.limit, 16, to=0, what="limit")
assert engine.step() == [], "without requests step gives []"
passed = engine.runner.passed
engine.step()
assert engine.runner.passed == passed, "the model was run for nobody"
checks.raises(ValueError, engine.submit, [1, 2], 0)
checks.raises(ValueError, engine.submit, [1, 2], -3)
assert (engine.busy, engine.scheduler.blocks.available) == (False, 4), "a trace is left"
who = engine.submit([1] * 10, 6)  # exactly all
assert engine.busy is True, "busy is True while a request waits"
text = collect(engine, steps=20)[who]
assert text[6:] == ["length"], "a request as long as memory is taken"
# The stop token as the very first, and as the last of max_new.
for new in (1, 2):
    engine.submit([7, 3, 9], max_new=new, stop=own[new - 1])
    (text,) = collect(engine, steps=20).values()
    if own[0] != own[1]:
        assert text == [*own[:new], "stop"], f"the stop token at place {new} of {new}: {text}"
# Token 0 is one like all others: it ends whoever has it as its stop, and nobody else.
for stop, expected in ((0, [3, 0, "stop"]), (None, [3, 0, 5, "length"]), (5, [3, 0, 5, "stop"])):
    script = iter((3, 0, 5))
    engine.submit([7], max_new=3, stop=stop, choose=lambda logits, script=script: next(script))
    (text,) = collect(engine, steps=20).values()
    assert text == expected, f"3, 0, 5 are chosen, stop is {stop}: {expected}, yours {text}"
# Events come in the order of the plan, and the blocks of a request that is over are free at once.
engine = Engine(model, Scheduler(Blocks(count=9, size=4), budget=9, max_running=3))
first, second, third = (engine.submit([5, n], max_new=2 + n) for n in (2, 0, 1))
events = engine.step()
assert [who for who, _, _ in events] == [first, second, third], "events are not in the plan's order"
assert [reason for _, _, reason in events] == [None] * 3, "no reason while a request goes on"
events = engine.step()
assert [reason for _, _, reason in events] == [None, "length", None], "the second ends first"
assert len(engine.scheduler.blocks.free) == 7, "the blocks of a finished request are still in use"
### END HIDDEN TESTS

# %% check="engine" points=1
# Leaving early.
model = random_model(2)
engine = Engine(model, Scheduler(Blocks(count=8, size=4), budget=8, max_running=2))
goes, stays, waits = (engine.submit([n, n + 1, n + 2], max_new=6) for n in (20, 10, 30))
engine.step()
engine.cancel(goes)
texts = collect(engine, steps=40)
assert goes not in texts, "a cancelled request still writes"
for who, prompt in ((stays, [10, 11, 12]), (waits, [30, 31, 32])):
    assert texts[who][-1] == "length", f"request {prompt} did not end by itself"
assert len(engine.scheduler.blocks.free) == 8, "blocks are still in use"
engine.cancel(goes)
### BEGIN HIDDEN TESTS
for who in (stays, waits, 10_000, -1):
    engine.cancel(who)  # over, or never given: nothing happens
assert (engine.busy, len(engine.scheduler.blocks.free)) == (False, 8), "blocks are in use"
g = checks.generator(7)
for _ in range(2):
    prompts = prompts_of(g, 10, 9)
    wanted = [(0, prompt, {"max_new": 12}) for prompt in prompts]
    leaving = {i: int(torch.randint(0, 30, (), generator=g)) for i in (0, 2, 3, 7, 9)}
    texts, _ = rushed(model, (10, 3, 6, 4), wanted, leaving, steps=400)
    for prompt, text in zip(prompts, texts, strict=True):
        if text:
            check_text(model, prompt, text, "beside requests that were cancelled: ")
### END HIDDEN TESTS


# %% check="engine" points=1
# Each request chooses with its own function.
def third(logits: Tensor) -> int:
    return int(logits.topk(3).indices[2])


model = random_model(3)
engine = Engine(model, Scheduler(Blocks(count=20, size=4), budget=4, max_running=2))
ids = [engine.submit([1, 2, 3, 4, 5], 1), engine.submit([1, 2, 3, 4, 5], 1, choose=third)]
texts = collect(engine, steps=20)
order = model(torch.tensor([[1, 2, 3, 4, 5]]))[0, -1].argsort(descending=True).tolist()
assert [texts[who][0] for who in ids] == [order[0], order[2]], (
    f"the likeliest token is {order[0]} and the third {order[2]}; yours: "
    f"{[texts[who][0] for who in ids]}"
)
### BEGIN HIDDEN TESTS
asked = []


def noting(name: int):
    def choose(logits: Tensor) -> int:
        assert logits.shape == (50,), f"logits of shape {tuple(logits.shape)} are not (vocab,)"
        asked.append(name)
        return (7 * name + 3 * asked.count(name)) % 50

    return choose


prompts = prompts_of(checks.generator(8), 8, 8)
wanted = [(0, p, {"max_new": 9, "choose": noting(n)}) for n, p in enumerate(prompts)]
texts, seen = rushed(model, (7, 3, 5, 5), wanted, {}, steps=600)
assert seen["preemptions"], "nobody was preempted, though memory is scarce"
for n, text in enumerate(texts):
    assert text == [(7 * n + 3 * i) % 50 for i in range(1, 10)], (
        "a request's tokens are not what its own `choose` gave, in order"
    )
    assert asked.count(n) == 9, "choose is called once for each token that is written"
### END HIDDEN TESTS

# %% [markdown]
# ## Static against continuous, with a real model
#
# **Question.** Requests for the course's `small` model arrive at random (a Poisson process: gaps
# are exponential). Prompts have 10 to 60 tokens; most answers are short and a few are long. Your
# engine runs twice on the same requests: with your scheduler, and with `Static` on top of it. At
# which load does it matter, and for which of TTFT and throughput?
#
# *Write down your prediction* before you run the cell: at low load; near the highest rate that
# your scheduler can serve; at a rate beyond it.
#
# Time is virtual: the clock moves by the CPU time that each step really takes, and jumps over gaps
# in which nobody is there. So the cell waits for nobody, and a busy computer disturbs it little.


# %% tags=["experiment"]
def replay(engine: Engine, arrivals: list[float], wanted: list[tuple[list[int], int]]):
    """Serves requests (prompt, tokens to write) that arrive at these times. The times of each one's
    tokens, and when the last was written."""
    clock, coming, times, number = 0.0, deque(enumerate(arrivals)), [[] for _ in arrivals], {}
    while coming or engine.busy:
        if not engine.busy:
            clock = max(clock, coming[0][1])
        while coming and coming[0][1] <= clock:
            i, _ = coming.popleft()
            number[engine.submit(*wanted[i])] = i
        start = time.process_time()
        events = engine.step()
        clock += time.process_time() - start
        for who, _, _ in events:
            times[number[who]].append(clock)
    return times, clock


def load(seed: int, count: int) -> tuple[list[float], list[tuple[list[int], int]]]:
    """Gaps between requests of mean 1, and (prompt, tokens to write) from real text."""
    draw, pages = random.Random(seed), list(data.documentation().values())
    gaps = [draw.expovariate(1.0) for _ in range(count)]
    wanted = []
    for _ in range(count):
        words = tokenizer.encode(draw.choice(pages)[:2000])
        new = draw.choice((4, 6, 8, 10, 12, 48))
        wanted.append(([tokenizer.eos, *words[: draw.randint(9, 59)]], new))
    return gaps, wanted


small, tokenizer = models.load("small", device="cpu")
gaps, wanted = load(seed=0, count=20)
kinds = {"continuous": Scheduler, "static": Static}
served = {name: [] for name in kinds}


def serve_all(kind: type[Scheduler], gap: float):
    arrivals, now = [], 0.0
    for each in gaps:
        now += each * gap
        arrivals.append(now)
    engine = Engine(small, kind(Blocks(count=120, size=16), budget=64, max_running=8))
    return arrivals, *replay(engine, arrivals, wanted)


replay(Engine(small, Scheduler(Blocks(20, 16), 64, 8)), [0.0] * 3, wanted[:3])  # warms up
capacity = len(wanted) / serve_all(Scheduler, 0.0)[2]  # everybody there at once
loads = (0.3, 0.7, 1.1, 3.0)
for share in loads:
    for name, kind in kinds.items():
        arrivals, times, end = serve_all(kind, 1 / (share * capacity))
        waits = [ttft(a, t) for a, t in zip(arrivals, times, strict=True)]
        served[name].append(
            {
                "ttft": percentile(waits, 50),
                "p90": percentile(waits, 90),
                "tokens": sum(map(len, times)) / end,
            }
        )
print("load     TTFT median, ms     TTFT 90th, ms      tokens per second")
print("       continuous   static   cont.    static     cont.    static")
for i, share in enumerate(loads):
    a, b = served["continuous"][i], served["static"][i]
    print(
        f"{share:4} {1e3 * a['ttft']:10.0f} {1e3 * b['ttft']:10.0f} {1e3 * a['p90']:8.0f} "
        f"{1e3 * b['p90']:9.0f} {a['tokens']:9.0f} {b['tokens']:9.0f}"
    )

# %% tags=["experiment", "figure"]
# Figure: throughput and latency as the load grows
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.9))
for name, marker in (("continuous", "o"), ("static", "s")):
    rows = served[name]
    axes[0].plot(
        [row["tokens"] for row in rows],
        [1e3 * row["p90"] for row in rows],
        marker=marker,
        label=name,
    )
    for share, row in zip(loads, rows, strict=True):
        axes[0].annotate(
            f"{share}",
            (row["tokens"], 1e3 * row["p90"]),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize=8,
        )
    axes[1].plot(loads, [1e3 * row["ttft"] for row in rows], marker=marker, label=name)
axes[0].set(yscale="log", xlabel="tokens written per second", ylabel="90th percentile of TTFT, ms")
axes[0].set_title("throughput and latency")
axes[0].legend()
axes[1].set(
    yscale="log",
    xlabel="rate of arrival, in rates that continuous batching can serve",
    ylabel="median TTFT, ms",
)
axes[1].set_title("half of all people wait longer than this")
axes[1].legend()
plot.caption(
    fig,
    "Numbers at the points are the load. The curve that lies lower and further to the right is the "
    "better server. Both turn upward where requests come faster than they are served.",
)
plt.show()

# %% [markdown]
# Read your run's numbers against your prediction. The static batch loses in two ways. Places stay
# empty once their texts are done, so it serves fewer requests a second: that shows where requests
# are many. And whoever arrives just after a batch began waits for all of it, also where the model
# is idle most of the time: that shows in the 90th percentile at the lowest load already, at which
# both write as many tokens a second. (A static server in practice also waits for a batch to *fill*.
# Ours begins with whoever is there, which flatters it.)
#
# ### What the budget buys
#
# Four texts are being written when a prompt of 400 tokens arrives. How long is the longest silence
# in the four streams, and how long does the newcomer wait, for budgets from 16 to 512 tokens?

# %% tags=["experiment"]
page = tokenizer.encode(data.documentation()["compound"][:4000])
wanted = [(page[50 * n : 50 * n + 9], 44) for n in range(4)] + [(page[300:700], 4)]
gaps_of, waited, budgets = {}, {}, (16, 32, 64, 128, 512)
for budget in budgets:
    engine = Engine(small, Scheduler(Blocks(count=60, size=16), budget, max_running=8))
    times, _ = replay(engine, [0.0] * 4 + [0.05], wanted)
    gaps_of[budget] = [(t, t - before) for before, t in zip(times[0], times[0][1:], strict=False)]
    waited[budget] = ttft(0.05, times[4])
    silence = max(gap for _, gap in gaps_of[budget])
    print(
        f"budget {budget:3}: longest silence {1e3 * silence:4.0f} ms, "
        f"the newcomer waits {1e3 * waited[budget]:4.0f} ms"
    )

# %% tags=["experiment", "figure"]
# Figure: one long silence, or many short ones
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.5), width_ratios=[1.7, 1])
for budget, marker in ((512, "o"), (64, "s"), (16, "^")):
    moments, gaps = zip(*gaps_of[budget], strict=True)
    axes[0].plot(
        moments, [1e3 * gap for gap in gaps], marker=marker, markersize=4, label=f"budget {budget}"
    )
axes[0].axvline(0.05, color="#999999", linewidth=1)
axes[0].text(
    0.047,
    axes[0].get_ylim()[1] * 0.95,
    "the prompt arrives",
    fontsize=8,
    rotation=90,
    ha="right",
    va="top",
)
axes[0].set(xlabel="seconds", ylabel="time since the token before, ms")
axes[0].set_title("a stream beside a long prompt")
axes[0].legend()
silences = [1e3 * max(gap for _, gap in gaps_of[budget]) for budget in budgets]
axes[1].plot(silences, [1e3 * waited[budget] for budget in budgets], "o-")
for budget, x in zip(budgets, silences, strict=True):
    axes[1].annotate(
        f"{budget}",
        (x, 1e3 * waited[budget]),
        textcoords="offset points",
        xytext=(5, 5),
        fontsize=8,
    )
axes[1].set(xlabel="longest silence of a stream, ms", ylabel="TTFT of the long prompt, ms")
axes[1].set_title("what the budget trades")
plot.caption(
    fig,
    "A budget that takes the whole prompt stops every stream once, for as long as its prefill "
    "takes. Small budgets spread the same work: each step is a little longer, for more steps, and "
    "the newcomer pays for it.",
)
plt.show()

# %% [markdown]
# ## The endpoint
#
# OpenAI's chat API has become the socket into which everything plugs, so servers speak it: a client
# written for one model works with yours if its address is changed. A request is a `POST` to
# `/v1/chat/completions` with JSON; the answer is one JSON object, or, with `"stream": true`,
# **server-sent events** (SSE): a response that does not end, of lines `data: …` with an empty line
# behind each.
#
# ```
# data: {"id": "chatcmpl-7", …, "choices": [{… "delta": {"role": "assistant", "content": ""} …}]}
#
# data: {"id": "chatcmpl-7", …, "choices": [{… "delta": {"content": "def"}, …}]}
#
# data: {"id": "chatcmpl-7", …, "choices": [{… "delta": {}, "finish_reason": "stop"}]}
#
# data: [DONE]
# ```
#
# Three things go wrong in servers that somebody wrote in an hour:
#
# 1. **Half characters.** A token is a run of bytes, and "漢" may be three tokens. Decoded one by
#    one they are three replacement marks. Bytes of an unfinished character must wait for the rest.
# 2. **Ghosts.** A client that hangs up must take its request with it, or the server writes for
#    nobody, and its blocks stay taken until the last token.
# 3. **Silence about mistakes.** A request that cannot be served is a 4xx with a sentence that says
#    why, in the shape that clients know: `{"error": {"message": …, "type": …, "param": …, "code":
#    …}}`. A wrong type, an unknown model, a prompt that is too long, a setting that this server
#    does not know: ignoring it would be a lie.

# %% [markdown]
# ### Given: the request, the bridge, the server
#
# An event loop must never wait for long, and an engine computes. Servers put the engine in a
# process of its own. Here one task of the loop makes a step (some milliseconds), hands out the
# tokens, and lets the loop breathe before the next. Submitting and cancelling happen between steps,
# never during one, and need no lock. That is the `Bridge`.
#
# `ChatRequest` is what a client may send. FastAPI checks a body against it and raises
# `RequestValidationError` before your function is called. `Texts` is what a server needs of a
# tokenizer. The course's models were not trained to chat: the prompt is the text of all messages
# behind each other, which the model goes on with.


# %%
class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content")
    @classmethod
    def is_text(cls, content: str) -> str:
        if any("\ud800" <= c <= "\udfff" for c in content):  # JSON can write half a character
            raise ValueError("half of a surrogate pair is no text")
        return content


class ChatRequest(BaseModel):
    """The body of a request; a field that is not listed here is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error in the shape that OpenAI's clients understand."""
    kind = "invalid_request_error"
    body = {"message": message, "type": kind, "param": param, "code": code}
    body = {k: v and v.encode("utf-8", "backslashreplace").decode() for k, v in body.items()}
    return JSONResponse({"error": body}, status_code=status)


def token_bytes(tokenizer: models.Tokenizer) -> list[bytes]:
    """The bytes of each token of a byte-level vocabulary; none for a special token."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]  # written as characters from 256 on
    byte_of = {chr(byte): byte for byte in plain}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(hidden)}
    special = set(tokenizer.special.values())
    return [
        b"" if i in special else bytes(byte_of[c] for c in tokenizer.token(i))
        for i in range(tokenizer.vocab_size)
    ]


class Texts:
    """Messages to ids; `bytes`: the bytes of each token; `stop`: the token that ends an answer."""

    def __init__(self, tokenizer: models.Tokenizer):
        self.tokenizer, self.bytes, self.stop = tokenizer, token_bytes(tokenizer), tokenizer.eos

    def prompt(self, messages: list[Message]) -> list[int]:
        """Never empty: texts begin with the token that ends one."""
        text = "".join(message.content for message in messages)
        return [self.stop, *self.tokenizer.encode(text)]


class Bridge:
    """An engine in an event loop: one task steps it and gives each request its tokens."""

    def __init__(self, engine):
        self.engine, self.queues, self.wake = engine, {}, asyncio.Event()

    @asynccontextmanager
    async def lifespan(self, app):
        """For FastAPI(lifespan=…): the task lives as long as the server."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def run(self) -> None:
        while True:
            await self.wake.wait()
            try:
                for id, token, reason in self.engine.step():
                    if id in self.queues:
                        self.queues[id].put_nowait((token, reason))
            except Exception as error:  # nobody may wait for an engine that is broken
                for queue in self.queues.values():
                    queue.put_nowait(error)
                self.wake.clear()
            if not self.engine.busy:
                self.wake.clear()
            for _ in range(4):  # the loop's other work; a cancellation takes it several rounds
                await asyncio.sleep(0)

    def open(self, prompt: list[int], **options) -> int:
        """Submits a request to the engine (options as of its `submit`); gives the request's id."""
        id = self.engine.submit(prompt, **options)
        self.queues[id] = asyncio.Queue()
        self.wake.set()
        return id

    async def next(self, id: int) -> tuple[int, str | None]:
        """Waits for the next token of a request: (token, reason)."""
        event = await self.queues[id].get()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self, id: int) -> None:
        """The request is over, whatever became of it. May be called twice."""
        self.engine.cancel(id)
        self.queues.pop(id, None)


# %% [markdown]
# ### Exercise · The endpoint
#
# How does your code learn that a client has hung up? Starlette (beneath FastAPI) cancels the task
# that iterates over your generator. At an `await` of the generator `asyncio.CancelledError` is
# raised; where it stands at a `yield` it is closed a little later, by `GeneratorExit`. Whatever
# must happen in both cases belongs in `finally`. A request that is not streamed is not
# cancelled: its function runs to its end, and so does the request.


# %% exercise="endpoint" minutes=45 difficulty=3
async def stream_chat(
    bridge: Bridge, texts: Texts, model: str, prompt: list[int], options: dict
) -> AsyncIterator[str]:
    """Answers one request as server-sent events: an async generator of strings, each "data: ", one
    line of JSON (or [DONE]), and an empty line.

    Submits the request with bridge.open(prompt, **options) when it is first asked for an event, and
    calls bridge.close(id) however it ends: by itself, by an exception, or because the client has
    hung up.

    Events: a chunk whose delta is {"role": "assistant", "content": ""}; one with {"content": text}
    for each new piece of text (never an empty one), as soon as it is there; one with the delta {}
    and the finish_reason "stop" or "length"; then [DONE].
    A chunk: {"id": "chatcmpl-" and the request's id, "object": "chat.completion.chunk", "created":
    seconds since 1970 as a whole number, "model": model, "choices": [{"index": 0, "delta": …,
    "finish_reason": None but in the last chunk}]}; id and created are the same in all of them.

    Text is that of the tokens' bytes, texts.bytes[token], read as UTF-8. Bytes of an unfinished
    character wait for the rest of it. Bytes that are no UTF-8, and a character that is unfinished
    at the end, become U+FFFD, as in bytes.decode("utf-8", "replace"). texts.stop has no text.
    """
    ### BEGIN SOLUTION
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    id = bridge.open(prompt, **options)
    created = int(time.time())

    def event(delta: dict, reason: str | None = None) -> str:
        chunk = {
            "id": f"chatcmpl-{id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }
        return f"data: {json.dumps(chunk)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        reason = None
        while reason is None:
            token, reason = await bridge.next(id)
            piece = b"" if token == texts.stop else texts.bytes[token]
            if text := decoder.decode(piece, final=reason is not None):
                yield event({"content": text})
        yield event({}, reason)
        yield "data: [DONE]\n\n"
    finally:
        bridge.close(id)
    ### END SOLUTION


def make_app(engine, texts: Texts, model: str) -> FastAPI:
    """An application with POST /v1/chat/completions, which answers a ChatRequest.

    The engine (submit, step, cancel, busy, limit as in Engine) is driven by a Bridge, whose
    lifespan is the application's.

    200: with stream, the events of stream_chat, media type text/event-stream. Without, one object
        {"id": "chatcmpl-" and the request's id, "object": "chat.completion", "created", "model",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": the whole text},
        "finish_reason": …}], "usage": {"prompt_tokens", "completion_tokens" (texts.stop counts),
        "total_tokens"}}. Text, created and model as in stream_chat; the bridge is told when it is
        over, too.
    The engine gets texts.prompt(messages), max_new=max_tokens, stop=texts.stop and
        choose=sampler(temperature, seed).
    Errors are error_response(…) with a message for people:
        400, param the offending field, for a body that is no ChatRequest (RequestValidationError):
            the field (of several, one) as in the body, by dots, such as "max_tokens" or
            "messages.0.role"; None where the body is empty, no JSON or no object. The message
            contains the field's name and what is wrong with it.
        404, param "model", code "model_not_found": another model is asked for. The message names
            both.
        400, param "messages", code "context_length_exceeded": prompt and max_tokens together exceed
            engine.limit. The message tells that limit. Nothing is submitted.
        Where the model is another one and the length is exceeded too, either answer will do.
    """
    ### BEGIN SOLUTION
    bridge = Bridge(engine)
    app = FastAPI(lifespan=bridge.lifespan)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"][1:]]  # the first says that it is the body
        field = None if first["type"] == "json_invalid" else ".".join(place) or None
        return error_response(400, f"{field or 'the body'}: {first['msg']}", field)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest):
        if body.model != model:
            message = f"there is no model {body.model!r} here, only {model!r}"
            return error_response(404, message, "model", "model_not_found")
        prompt = texts.prompt(body.messages)
        if len(prompt) + body.max_tokens > engine.limit:
            message = (
                f"the prompt's {len(prompt)} tokens and max_tokens = {body.max_tokens} exceed the "
                f"{engine.limit} tokens that fit"
            )
            return error_response(400, message, "messages", "context_length_exceeded")
        choose = sampler(body.temperature, body.seed)
        options = {"max_new": body.max_tokens, "stop": texts.stop, "choose": choose}
        if body.stream:
            events = stream_chat(bridge, texts, model, prompt, options)
            return StreamingResponse(events, media_type="text/event-stream")
        id, pieces, reason, written = bridge.open(prompt, **options), [], None, 0
        try:
            while reason is None:
                token, reason = await bridge.next(id)
                written += 1
                pieces.append(b"" if token == texts.stop else texts.bytes[token])
        finally:
            bridge.close(id)
        text = b"".join(pieces).decode("utf-8", "replace")
        return {
            "id": f"chatcmpl-{id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": reason,
                }
            ],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": written,
                "total_tokens": len(prompt) + written,
            },
        }

    return app
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: half a character</summary>
#
# `codecs.getincrementaldecoder("utf-8")("replace")` makes an object whose `decode(bytes)` gives the
# characters that are complete, U+FFFD for what is none, and keeps an end that it takes for half a
# character; `decode(bytes, final=True)` keeps nothing.
# </details>
#
# <details><summary>Hint: where does the error's field stand?</summary>
#
# `error.errors()` is a list of dictionaries with "loc", "msg" and "type". "loc" is a tuple such as
# `("body", "messages", 0, "role")`. For broken JSON the type is "json_invalid", and what follows
# "body" is a position in the text, no field.
# </details>
#
# <details><summary>Hint: handlers</summary>
#
# `@app.exception_handler(RequestValidationError)` registers a function (request, error) whose
# response is sent in place of FastAPI's own 422. Return `error_response(…)` from the route for the
# other errors: what is no model of yours is sent as it is.
# </details>

# %% [markdown]
# ### Running it
#
# uvicorn runs an application. In a notebook it gets a thread; `serving` is a block that starts the
# server, waits until it listens, and at the end, also after an error in the block, sets the
# server's own flag and waits until the thread is gone. Port 0 asks the system for a free one.


# %%
class Server:
    """A uvicorn server in a thread, at a port of this computer or at a UNIX socket (`path`)."""

    def __init__(self, app, path: str | None = None):
        place = {"uds": path} if path else {"host": "127.0.0.1", "port": 0}
        quiet = {"log_config": None, "log_level": "critical", "access_log": False}
        quiet |= {"ws": "none", "lifespan": "on", "timeout_graceful_shutdown": 2}
        self.server = uvicorn.Server(uvicorn.Config(app, **place, **quiet))
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.005)
        if not self.server.started:
            raise RuntimeError(f"the server did not start: {self.error!r}")

    def run(self) -> None:
        torch.set_num_threads(1)
        try:
            self.server.run()
        except BaseException as error:  # uvicorn ends with SystemExit if the application fails
            self.error = error

    @property
    def port(self) -> int:
        return self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def serving(app):
    """Serves an application while the block runs; gives the address."""
    server = Server(app)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.stop()


# %% tags=["support"]
# Support: an engine that reads from a script, its texts, and a server for checks
class Script:
    """An engine without a model: each request is answered by the text in its prompt, a byte a step,
    again and again; the token 0 ends it. Slow enough that a client can hang up in the middle. The
    first request has the id 0, and each one's is seven more than that of the one before."""

    limit = 4000

    def __init__(self, ends: bool, pause: float):
        self.ends, self.pause, self.log, self.living = ends, pause, [], {}

    @property
    def busy(self) -> bool:
        return bool(self.living)

    def submit(self, prompt, max_new=16, stop=None, choose=greedy) -> int:
        entry = {"prompt": list(prompt), "max_new": max_new, "stop": stop, "written": 0}
        entry["drawn"] = [choose(torch.linspace(0, 2, 9)) for _ in range(24)]
        entry["cancelled"] = 0
        self.log.append(entry)
        id = 7 * len(self.log) - 7
        self.living[id] = entry
        return id

    def cancel(self, id: int) -> None:
        if id in range(0, 7 * len(self.log), 7):
            self.log[id // 7]["cancelled"] += 1
        self.living.pop(id, None)

    def step(self) -> list:
        time.sleep(self.pause)
        events = []
        for id, entry in [*self.living.items()]:
            text = entry["prompt"]
            done = self.ends and entry["written"] == len(text)
            token = 0 if done else text[entry["written"] % len(text)]
            if token == 256:  # 0xFF, a byte that no text has: this engine breaks here
                raise RuntimeError("the engine broke")
            if token == 8:  # the bell: until the clock shows another second
                time.sleep(1.01 - time.time() % 1)
            entry["written"] += 1
            reason = "stop" if done else "length" if entry["written"] == entry["max_new"] else None
            events.append((id, token, reason))
            if reason:
                del self.living[id]
        return events


class ByteTexts:
    """Token n is the byte n - 1; 0 ends an answer."""

    bytes, stop = [b"<end>", *(bytes([i]) for i in range(256))], 0

    def prompt(self, messages) -> list[int]:
        """Content as UTF-8; a character from U+F700 on stands for one raw byte."""
        text = "".join(message.content for message in messages)
        raw = {c: [ord(c) - 0xF700] for c in text if "\uf700" <= c < "\uf800"}
        return [byte + 1 for c in text for byte in raw.get(c, c.encode())]


SERVERS: dict[str, tuple[Server, Script]] = {}


@checks.measured
def start_script(make: Callable, ends: bool, pause: float) -> str:
    """Starts a server where the learner's code runs; gives its place."""
    engine = Script(ends, pause)
    app = make(engine, ByteTexts(), "script")
    if hasattr(socket, "AF_UNIX") and sys.platform != "win32":
        path = os.path.join(tempfile.mkdtemp(prefix="llm40-"), "http")
        server = Server(app, path)
    else:
        server = Server(app)
        path = f"127.0.0.1:{server.port}"
    SERVERS[path] = server, engine
    return path


@checks.measured
def look_at(path: str) -> list[dict]:
    """What the engine of a server was asked for."""
    return SERVERS[path][1].log


@checks.measured
def stop_script(path: str) -> tuple[bool, int]:
    """Stops it: whether its thread is gone, and how many requests are still open."""
    server, engine = SERVERS.pop(path)
    server.stop()
    if os.path.exists(path):
        os.remove(path)
    if os.path.isdir(os.path.dirname(path)):
        os.rmdir(os.path.dirname(path))
    return not server.thread.is_alive(), len(engine.living)


@checks.measured
def hung_up(stream: Callable, events: int) -> tuple[int, list[dict]]:
    """Asks for so many events and then closes the generator at its yield, as Starlette does with
    one that nobody iterates over any more: how many requests were open before the first event, and
    what the engine was asked for."""
    engine, before = Script(ends=False, pause=0.0), []

    async def listen() -> None:
        bridge = Bridge(engine)
        running = asyncio.create_task(bridge.run())
        generator = stream(bridge, ByteTexts(), "script", [98, 99], {"max_new": 50})
        before.append(len(engine.log))
        for _ in range(events):
            await anext(generator)
        await generator.aclose()
        running.cancel()

    thread = threading.Thread(target=asyncio.run, args=(listen(),))  # a notebook's has a loop
    thread.start()
    thread.join()
    return before[0], engine.log


@contextmanager
def scripted(make: Callable, ends: bool = True, pause: float = 0.0):
    """A client of an application around a Script, and a function that looks at the engine."""
    path = start_script(make, ends, pause)
    try:
        with checks.reachable(path) as own:
            # Certificates take longer to load than all of these requests.
            plain = {"timeout": 10, "trust_env": False, "verify": False}
            if ":" in own and not os.path.exists(own):
                client = httpx.Client(base_url=f"http://{own}", **plain)
            else:
                transport = httpx.HTTPTransport(uds=own, verify=False, trust_env=False)
                client = httpx.Client(transport=transport, base_url="http://llm40", **plain)
            with client:
                yield client, lambda: look_at(path)
    finally:
        stop_script(path)


def ask(client: httpx.Client, content: str, **fields) -> httpx.Response:
    body = {"model": "script", "messages": [{"role": "user", "content": content}]} | fields
    return client.post("/v1/chat/completions", json=body)


def chunks_of(response: httpx.Response) -> list[dict]:
    """The JSON of a stream's events, whose form is looked at."""
    assert response.status_code == 200, f"status {response.status_code}: {response.text[:200]}"
    kind = response.headers["content-type"]
    assert kind.startswith("text/event-stream"), f"a stream of type {kind}, not text/event-stream"
    assert response.text.endswith("\n\n"), "an event ends with an empty line"
    events = response.text.removesuffix("\n\n").split("\n\n")
    for event in events:
        assert event.startswith("data: "), f"an event begins with 'data: ': {event!r}"
        assert "\n" not in event, f"an event has one line: {event!r}"
    assert events[-1] == "data: [DONE]", f"the last event is {events[-1]!r}, not data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def eventually(true: Callable[[], bool], seconds: float = 8.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# %% check="endpoint" points=2
with scripted(make_app) as (client, look):
    chunks = chunks_of(ask(client, "héllo", stream=True, max_tokens=20))
deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
assert deltas[0] == {"role": "assistant", "content": ""}, f"the first delta is {deltas[0]}"
assert deltas[-1] == {}, f"the last delta is {deltas[-1]}, not {{}}"
pieces = [delta.get("content") for delta in deltas[1:-1]]
assert pieces == ["h", "é", "l", "l", "o"], (
    f'"héllo" comes in six tokens, the "é" in two: five pieces of text; yours: {pieces}'
)
reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
assert reasons == [None] * 6 + ["stop"], f"the last chunk alone has a finish_reason: {reasons}"
### BEGIN HIDDEN TESTS
cases = [
    ("a", 9, "a", "stop"),
    ("漢字🙂 ok", 99, "漢字🙂 ok", "stop"),
    ("漢字🙂 ok", 5, "漢\ufffd", "length"),  # cut within a character
    ("x漢", 3, "x\ufffd", "length"),
    ("a\uf7ffb".replace("\uf7ff", "\uf7fe"), 9, "a\ufffdb", "stop"),  # 0xFE is no UTF-8
    ("\uf7e6\uf7bcz", 9, "\ufffdz", "stop"),  # two of three bytes, and then something else
    ('"\\\n\x00', 9, '"\\\n\x00', "stop"),
    ("abc", 3, "abc", "length"),
    ("a\ab", 9, "a\ab", "stop"),  # the clock moves on while this one lasts
]
with scripted(make_app) as (client, look):
    for content, most, text, reason in cases:
        chunks = chunks_of(ask(client, content, stream=True, max_tokens=most))
        number = f"chatcmpl-{7 * len(look()) - 7}"
        contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-1]]
        assert all(contents), f"{content!r}: a chunk without text among {contents}"
        assert "".join(contents) == text, f"{content!r}: {''.join(contents)!r} is not {text!r}"
        deltas = [{"role": "assistant", "content": ""}, *({"content": c} for c in contents), {}]
        created = chunks[0]["created"]
        checks.kind(created, int, what="created")
        assert abs(created - time.time()) < 60, f"created is {created}, it is {time.time():.0f}"
        for chunk, delta in zip(chunks, deltas, strict=True):
            last = reason if delta == {} else None
            expected = {
                "id": number,
                "object": "chat.completion.chunk",
                "created": created,
                "model": "script",
                "choices": [{"index": 0, "delta": delta, "finish_reason": last}],
            }
            assert chunk == expected, f"a chunk should be {expected}, it is {chunk}"
    log = look()
    wanted = [most for _, most, *_ in cases]
    assert [entry["max_new"] for entry in log] == wanted, "the engine is not told max_tokens"
    assert {entry["stop"] for entry in log} == {0}, "the engine is told the stop token"
    prompt = [byte + 1 for byte in "漢字🙂 ok".encode()]
    assert log[1]["prompt"] == prompt, "the prompt is texts.prompt(messages)"
# Text comes when it is there, not all at the end.
with scripted(make_app, ends=False, pause=0.01) as (client, look):
    body = {"model": "script", "messages": [{"role": "user", "content": "ab"}], "stream": True}
    body["max_tokens"] = 600
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                if choice["delta"].get("content") == "a":
                    break
        written = look()[0]["written"]
    assert written < 400, "the first piece of text came when most of the answer was written"
### END HIDDEN TESTS

# %% check="endpoint" points=1
# An answer in one piece, and how the engine is asked.
with scripted(make_app) as (client, look):
    response = ask(client, "héllo", max_tokens=20)
    assert response.status_code == 200, f"status {response.status_code}: {response.text[:200]}"
    answer = response.json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "héllo"}, answer
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13}, (
        f"six bytes in; six bytes and the stop token out; yours: {answer['usage']}"
    )
    ### BEGIN HIDDEN TESTS
    for content, most, text, reason, used in (
        ("héllo", 20, "héllo", "stop", (6, 7, 13)),
        ("漢字", 4, "漢\ufffd", "length", (6, 4, 10)),
        ("", 5, "", "stop", (0, 1, 1)),
    ):
        answer = ask(client, content, max_tokens=most).json()
        checks.kind(answer["created"], int, what="created")
        assert abs(answer["created"] - time.time()) < 60, f"created is {answer['created']}"
        expected = {
            "id": f"chatcmpl-{7 * len(look()) - 7}",
            "object": "chat.completion",
            "created": answer["created"],
            "model": "script",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": reason,
                }
            ],
            "usage": dict(
                zip(("prompt_tokens", "completion_tokens", "total_tokens"), used, strict=True)
            ),
        }
        assert answer == expected, f"the answer should be {expected}, it is {answer}"
    several = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    for stream in (False, True):
        for temperature, seed in ((0.0, 3), (0.7, 3), (0.7, 0), (2.0, 11)):
            fields = {"temperature": temperature, "seed": seed, "stream": stream}
            status = ask(client, "", messages=several, **fields).status_code
            assert status == 200, f"{fields}: status {status}"
            entry = look()[-1]
            assert entry["prompt"] == [98, 99, 100], "all messages belong to the prompt"
            assert entry["max_new"] == 16, "max_tokens is 16 where it is not given"
            choose = sampler(temperature, seed)
            expected = [choose(torch.linspace(0, 2, 9)) for _ in range(24)]
            assert entry["drawn"] == expected, "`choose` is not sampler(temperature, seed)"
    assert eventually(lambda: all(entry["cancelled"] for entry in look())), (
        "the bridge is not told that a request is over: call close"
    )
# A request waits for its turn with the others, and an engine that breaks is no endless silence.
with scripted(make_app) as (client, look):
    for stream in (True, False):
        try:
            response = ask(client, "ab\uf7ffc", stream=stream, max_tokens=9)
            assert stream or response.status_code == 500, "the engine broke, and the answer is 200"
            assert "[DONE]" not in response.text, "the engine broke, and the stream ends as if well"
        except httpx.RemoteProtocolError:
            pass  # a stream that breaks off
        assert eventually(lambda: look()[-1]["cancelled"] > 0), "close is not called after an error"
### END HIDDEN TESTS

# %% check="endpoint" points=1
# A client that hangs up takes its request with it.
with scripted(make_app, ends=False, pause=0.005) as (client, look):
    body = {"model": "script", "messages": [{"role": "user", "content": "abc"}], "stream": True}
    with client.stream(
        "POST", "/v1/chat/completions", json=body | {"max_tokens": 3000}
    ) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 6:
                break
    assert eventually(lambda: look()[0]["cancelled"] > 0), (
        "the client is gone, and after 8 seconds the engine still writes for it"
    )
    assert look()[0]["written"] < 2000, "the request was cancelled only at its end"
    ### BEGIN HIDDEN TESTS
    # Others are not disturbed.
    with client.stream(
        "POST", "/v1/chat/completions", json=body | {"max_tokens": 3000}
    ) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        answer = ask(client, "xyz", max_tokens=7).json()
        text = answer["choices"][0]["message"]["content"]
        assert text == "xyzxyzx", f"beside a stream the answer is {text!r}"
        next(lines)
    assert eventually(lambda: look()[1]["cancelled"] > 0), "the second client is gone as well"
    assert look()[2]["written"] == 7, "a request with max_tokens = 7 wrote more"
    # At once, before the first event. (A limit on `post` would not do: it is one on each read.)
    for read in (0.001, 0.01, 10):
        how = {"json": body | {"max_tokens": 3000}, "timeout": httpx.Timeout(10, read=read)}
        with suppress(httpx.ReadTimeout), client.stream("POST", "/v1/chat/completions", **how):
            pass
    assert eventually(lambda: all(entry["cancelled"] for entry in look())), (
        "a client that was gone at once left its request behind"
    )
for events in (1, 3):
    before, log = hung_up(stream_chat, events)
    assert before == 0, "the request is submitted before anybody asks for an event"
    assert [entry["cancelled"] > 0 for entry in log] == [True], (
        f"the generator is closed at its yield, after {events} events: close is not called"
    )
### END HIDDEN TESTS

# %% check="endpoint" points=1
# What cannot be served is a 4xx that says why.
with scripted(make_app) as (client, look):
    for fields, status, param in (
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"model": "gpt-oss"}, 404, "model"),
        ({"messages": [{"role": "user", "content": "a" * 3990}]}, 400, "messages"),
    ):
        response = ask(client, "abc", **fields)
        assert response.status_code == status, f"{str(fields)[:50]}: {response.status_code}"
        error = response.json()["error"]
        assert error["param"] == param, f"{str(fields)[:50]}: param {error['param']}, not {param}"
        assert error["type"] == "invalid_request_error", f"type {error['type']}"
        assert error["message"], "an error without a message"
    ### BEGIN HIDDEN TESTS
    bad = [
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "12"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": "abc"}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}, "messages.1.content"),
        ({"n": 2}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"model": 7}, "model"),
    ]
    told = set()
    for number, (fields, param) in enumerate(bad):
        response = ask(client, "abc", **({"stream": number % 2 == 0} | fields))
        assert response.status_code == 400, f"{fields}: status {response.status_code}"
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, f"the error holds {error}"
        assert error["param"] == param, f"{fields}: param {error['param']}, not {param}"
        assert param in error["message"], f"{fields}: the message does not name {param}"
        told.add(error["message"])
        assert error["code"] is None, f"{fields}: code {error['code']}, not None"
    assert len(told) > len({param for _, param in bad}), (
        "max_tokens = -5 and max_tokens = '12' get the same message: say what is wrong"
    )
    for raw in (b"{", b"", b'{"model": "script", "messages": [', b"[1, 2]", b'"abc"', b"null"):
        response = client.post(
            "/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400, f"{raw!r}: status {response.status_code}"
        assert response.json()["error"]["param"] is None, f"{raw!r}: no field is at fault"
        assert response.json()["error"]["message"], f"{raw!r}: an error without a message"
    start = b'{"model": "script", "messages": [{"role": "user", "content": "'
    for rest, param in (
        (b'\\ud800"}]}', "messages.0.content"),
        (b'a"}], "temperature": NaN}', "temperature"),
        (b'a"}], "max_tokens": 1e999}', "max_tokens"),
    ):
        response = client.post(
            "/v1/chat/completions",
            content=start + rest,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 400, f"…{rest!r}: status {response.status_code}"
        assert response.json()["error"]["param"] == param, f"…{rest!r}: {response.text}"
    odd = start + b'a"}], "\\ud800": 1}'  # a field that cannot even be named
    response = client.post(
        "/v1/chat/completions", content=odd, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, f"half a surrogate pair as a field: {response.status_code}"
    for stream in (False, True):
        response = ask(client, "a" * 3000, max_tokens=1001, stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded"), error
        assert "4000" in error["message"], f"{error['message']!r} does not tell the limit, 4000"
        response = ask(client, "abc", model="gpt-oss", stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found"), error
        assert {"gpt-oss", "script"} <= set(re.findall(r"[\w-]+", error["message"])), error
    assert not look(), "a bad request was submitted to the engine"
    assert ask(client, "a" * 3000, max_tokens=1000).status_code == 200, "exactly the limit fits"
    assert ask(client, "abc").status_code == 200, "after bad requests good ones are served"
    assert client.get("/v1/other").status_code == 404, "there is no such path"
### END HIDDEN TESTS

# %% [markdown]
# ### The real client
#
# Now the server that you built, with the model that you know, and the client that everybody uses.
# `openai.OpenAI` needs an address; a key it sends, and nobody looks at it.

# %% tags=["experiment"]
before = threading.active_count()
engine = Engine(small, Scheduler(Blocks(count=64, size=16), budget=64, max_running=8))
with serving(make_app(engine, Texts(tokenizer), "small")) as address:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20)
    hello = [{"role": "user", "content": 'def read(self, size=-1):\n    """'}]
    print("streamed:")
    for chunk in client.chat.completions.create(
        model="small", messages=hello, max_tokens=40, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="")
    print("\n\nin one piece, sampled:")
    answer = client.chat.completions.create(
        model="small", messages=hello, max_tokens=24, temperature=0.8, seed=1
    )
    print(answer.choices[0].message.content)
    print(answer.usage)
    print("\nfour at once, one of which hangs up:")
    streams = [
        client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": f"def {name}(self"}],
            max_tokens=200 if name == "leave" else 12,
            stream=True,
        )
        for name in ("close", "leave", "open", "seek")
    ]
    next(iter(streams[1]))
    streams[1].close()
    for stream in (streams[0], *streams[2:]):
        print(repr("".join(chunk.choices[0].delta.content or "" for chunk in stream)))
    print("\nrefused:")
    for fields in ({"max_tokens": 5000}, {"temperature": 3}, {"model": "large"}, {"top_p": 0.9}):
        try:
            client.chat.completions.create(**{"model": "small", "messages": hello} | fields)
        except openai.APIStatusError as error:
            print(error.status_code, error.body["message"], f"(param {error.body['param']})")
    client.close()
    while engine.busy:
        time.sleep(0.01)
    blocks, port = engine.scheduler.blocks, int(address.rpartition(":")[2])
with socket.socket() as probe:
    refused = probe.connect_ex(("127.0.0.1", port)) != 0
print(
    f"\nblocks free: {len(blocks.free)} of {blocks.count}; threads more than before: "
    f"{threading.active_count() - before}; port closed: {refused}"
)

# %% [markdown]
# The last line matters as much as the text. Nobody's blocks are left, the one who hung up
# included; no thread and no port survives the block. (The model continues text, and it is small:
# do not ask it anything.)

# %% [markdown]
# ## Prefixes that many share {#prefixes}
#
# A chat sends its whole history with every turn. An agent's thousand requests begin with the same
# page of instructions. Keys and values of a token depend on nothing but the tokens up to it, so
# equal beginnings have equal blocks. Lesson 30 finds them by hashing each block with all that comes
# before. SGLang keeps them in a **radix tree**: an edge carries a *run* of keys, and two texts
# share the path from the root to the place where they part.
#
# ```
#                      ┌─ "ane"
#        ┌─ "om" ──────┤
# ── "r" ┤             └─ "ulus"          romane, romulus, ruber, rubicon
#        └─ "ub" ─┬─ "er"
#                 └─ "icon"
# ```
#
# In a server a key is one block's tokens, `(17, 4, 99, 5)`, and its value is the block's number. A
# tree that maps sequences of *anything* is easier to think about and to check, so yours does.
# (Where requests use different adapters, the same tokens have other keys and values: then the
# adapter belongs in the key.)
#
# Finding is a walk. Inserting is a walk, and one new edge for the rest. Where the walk ends
# *within* an edge, the edge is split in two. Memory is finite, so values are evicted, and only from
# the ends: a block without those before it is worthless. Among the ends the one that was **least
# recently used** goes first. A block that a running request uses must stay, and since who uses a
# block uses all before it, whatever stands above stays too.

# %% [markdown]
# ### Exercise · The radix tree


# %% exercise="radix_cache" minutes=35 difficulty=3 path="more"
class RadixCache:
    """A map from sequences of keys to sequences of values, which shares equal beginnings.

    keys: a list, tuple or string of anything hashable. values: as many; all values that are held
    at a time are different and hashable. Both are read, not kept and not changed.

    match(keys) → the list of values of the longest beginning of `keys` that is held ([] if none).
    insert(keys, values) → how many of the keys, from the beginning, were held already. Those keep
        the values that they had; the rest is held from now on, with the values given. ValueError if
        there are not as many values as keys.
    evict(count, used=frozenset()) → a list of up to `count` values that are held no more, in the
        order in which they went. Each time, of the values at an end (no value is held behind them)
        that are not in the set `used`, the one that was least recently used goes. Fewer than
        `count` if no more can go.
    len(cache): how many values are held.
    edges() → the number of keys on each edge of the tree, in any order. No edge is empty; a run
        of keys at which nothing ends and nothing parts is one edge, not many. (Where a call of
        match or insert ended, or texts once parted, an edge may end too.)

    Used: a call of match or insert uses the values on its path, all of them at once: what match
    returns; for insert what it found and what it added. Values further along the same edge are not
    used by it.
    """

    ### BEGIN SOLUTION
    class Node:
        def __init__(self, keys, values, parent, used):
            self.keys, self.values, self.parent, self.used = keys, values, parent, used
            self.children = {}

    def __init__(self):
        self.root, self.clock = self.Node([], [], None, 0), 0

    def walk(self, keys):
        """The node at which the longest beginning that is held ends, and its length."""
        self.clock += 1
        node, done = self.root, 0
        while done < len(keys) and keys[done] in node.children:
            child, n = node.children[keys[done]], 0
            while n < min(len(child.keys), len(keys) - done) and child.keys[n] == keys[done + n]:
                n += 1
            node, done = self.split(child, n), done + n
            node.used = self.clock
        return node, done

    def split(self, node, n):
        """The node that holds the first n keys of this one's edge: it, or a new one above it."""
        if n == len(node.keys):
            return node
        upper = self.Node(node.keys[:n], node.values[:n], node.parent, node.used)
        node.parent.children[node.keys[0]] = upper
        node.keys, node.values, node.parent = node.keys[n:], node.values[n:], upper
        upper.children[node.keys[0]] = node
        return upper

    def nodes(self):
        todo = [*self.root.children.values()]
        while todo:
            yield (node := todo.pop())
            todo += node.children.values()

    ### END SOLUTION

    def match(self, keys) -> list:
        ### BEGIN SOLUTION
        node, _ = self.walk(keys)
        values = []
        while node is not self.root:
            values = node.values + values
            node = node.parent
        return values
        ### END SOLUTION

    def insert(self, keys, values) -> int:
        ### BEGIN SOLUTION
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys and {len(values)} values")
        node, done = self.walk(keys)
        if done < len(keys):
            node.children[keys[done]] = self.Node(
                list(keys[done:]), list(values[done:]), node, self.clock
            )
        return done
        ### END SOLUTION

    def evict(self, count: int, used: set = frozenset()) -> list:
        ### BEGIN SOLUTION
        evicted = []
        while len(evicted) < count:
            ends = [n for n in self.nodes() if not n.children and n.values[-1] not in used]
            if not ends:
                break
            node = min(ends, key=lambda n: n.used)
            evicted.append(node.values.pop())
            last = node.keys.pop()
            if not node.keys:  # the last key that went was its first
                del node.parent.children[last]
        return evicted
        ### END SOLUTION

    def __len__(self) -> int:
        ### BEGIN SOLUTION
        return sum(self.edges())
        ### END SOLUTION

    def edges(self) -> list[int]:
        ### BEGIN SOLUTION
        return [len(node.keys) for node in self.nodes()]
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a node</summary>
#
# Let a node own the edge that leads to it: its keys, their values, its parent, the time of its last
# use, and a dictionary from the *first* key of each child's edge to the child. No two children
# begin alike, so one look-up says where to go on.
# </details>
#
# <details><summary>Hint: split where the walk ends</summary>
#
# If only n of an edge's keys agree, put a new node above with the first n of them, and leave the
# rest, with the children, to the old one. Do it in match as well as in insert: then "used" is a
# mark on whole nodes, and insert only ever adds a child.
# </details>
#
# <details><summary>Hint: evict from the end of an edge</summary>
#
# A leaf loses its last value first. When it is empty it leaves its parent's dictionary (under the
# key that was its first: remember it in time), and the parent may have become a leaf.
# </details>


# %% tags=["support"]
# Support: the same map as a plain dictionary of all beginnings
class AllPrefixes:
    """Slow and obvious: every beginning that is held, its value, and when it was last used."""

    def __init__(self):
        self.held, self.clock = {}, 0

    def longest(self, keys) -> int:
        self.clock += 1
        n = 0
        while n < len(keys) and tuple(keys[: n + 1]) in self.held:
            n += 1
            self.held[tuple(keys[:n])][1] = self.clock
        return n

    def match(self, keys) -> list:
        return [self.held[tuple(keys[: i + 1])][0] for i in range(self.longest(keys))]

    def insert(self, keys, values) -> int:
        n = self.longest(keys)
        for i in range(n, len(keys)):
            self.held[tuple(keys[: i + 1])] = [values[i], self.clock]
        return n

    def evict(self, count: int, used: set) -> list:
        gone = []
        while len(gone) < count:
            inner = {beginning[:-1] for beginning in self.held}
            ends = [
                (when, beginning, value)
                for beginning, (value, when) in self.held.items()
                if beginning not in inner and value not in used
            ]
            if not ends:
                break
            _, beginning, value = min(ends, key=lambda end: end[0])
            del self.held[beginning]
            gone.append(value)
        return gone


# %% check="radix_cache" points=2
cache = RadixCache()
assert (cache.match("rome"), len(cache)) == ([], 0), "an empty cache holds nothing"
assert cache.insert("romane", [0, 1, 2, 3, 4, 5]) == 0, "nothing of romane was held before"
found = cache.insert("romulus", [10, 11, 12, 13, 14, 15, 16])
assert found == 3, f'"rom" of romulus is held already: insert gives 3, yours {found}'
values = cache.match("romulans")
assert values == [0, 1, 2, 13, 14], (
    f"romulans: rom from the first word, ul from the second: [0, 1, 2, 13, 14]; yours: {values}"
)
assert len(cache) == 10, f"6 + 4 values are held, yours: {len(cache)}"
### BEGIN HIDDEN TESTS
for keys, expected in (
    ("", []),
    ("r", [0]),
    ("rom", [0, 1, 2]),
    ("romane", [0, 1, 2, 3, 4, 5]),
    ("romanesque", [0, 1, 2, 3, 4, 5]),
    ("x", []),
    (["r", "o"], [0, 1]),
    (("r", "o", "x"), [0, 1]),
):
    assert cache.match(keys) == expected, f"{keys!r}: {cache.match(keys)}, not {expected}"
checks.raises(ValueError, cache.insert, "rub", [1, 2])
checks.raises(ValueError, cache.insert, "rub", [1, 2, 3, 4])
assert cache.match("rub") == [0], "a refused insert left something behind"
assert cache.insert("", []) == 0, "of no keys none was held"
g = checks.generator(9)
for letters in (2, 3):
    cache, slow, fresh = RadixCache(), AllPrefixes(), 0
    for _ in range(80):
        length = int(torch.randint(0, 9, (), generator=g))
        keys = torch.randint(0, letters, (length,), generator=g).tolist()
        if torch.rand((), generator=g) < 0.5:
            values = list(range(fresh, fresh + length))
            fresh += length
            given = list(keys), list(values)
            assert cache.insert(keys, values) == slow.insert(keys, values), f"insert({keys})"
            assert (keys, values) == given, "insert changes its arguments"
            keys.append(7), values.append(7)  # the caller goes on with its own lists
        else:
            assert cache.match(keys) == slow.match(keys), f"match({keys})"
        assert len(cache) == len(slow.held), "len is not the number of values"
# Long texts in few edges.
cache = RadixCache()
base = torch.randint(0, 1000, (300,), generator=g).tolist()
for n in range(20):
    keys = base[: 10 * n + 5] + torch.randint(1000, 2000, (50,), generator=g).tolist()
    cache.insert(keys, [(n, i) for i in range(len(keys))])
lengths = cache.edges()
assert sum(lengths) == len(cache), f"edges hold {sum(lengths)} keys, len is {len(cache)}"
assert all(lengths), "an empty edge"
assert len(lengths) <= 40, f"20 texts make {len(lengths)} edges: a run of keys is one edge"
### END HIDDEN TESTS

# %% check="radix_cache" points=2
cache = RadixCache()
cache.insert("abcd", [1, 2, 3, 4])
cache.insert("abxy", [11, 12, 13, 14])  # holds 13 and 14 behind a and b
cache.match("abc")
gone = cache.evict(3)
assert gone == [4, 14, 13], (
    f"4 was used first of all, then x and y, then a, b and c: [4, 14, 13]; yours: {gone}"
)
gone = cache.evict(5, used={2})
assert gone == [3], f"3 is an end; 2 is used, and 1 stands before it: [3]; yours: {gone}"
### BEGIN HIDDEN TESTS
assert (cache.match("abcd"), len(cache)) == ([1, 2], 2), "a and b are left"
assert cache.evict(0) == [], "evict(0) gives []"
assert cache.evict(9) == [2, 1], "2 goes, then 1 is an end"
assert (len(cache), cache.evict(1), cache.edges()) == (0, [], []), "nothing is left"
assert (cache.insert("ab", [5, 6]), cache.match("abc")) == (0, [5, 6]), "an emptied tree works"
# A call uses all of its path: what is above its end stays longer than what was used before.
for found in ("match", "insert"):
    cache = RadixCache()
    cache.insert("abc", [1, 2, 3])
    cache.match("a"), cache.match("ab")
    cache.insert("xy", [11, 12])
    cache.match("abc") if found == "match" else cache.insert("abcd", [1, 2, 3, 4])
    gone = [cache.evict(2 if found == "match" else 3, used={12}), cache.evict(2)]
    expected = [[3, 2] if found == "match" else [4, 3, 2], [12, 11]]
    assert gone == expected, f"{found} used a after x and y: {expected}, yours: {gone}"
g = checks.generator(10)
for letters, longest in ((2, 7), (3, 6), (2, 12)):
    cache, slow, fresh = RadixCache(), AllPrefixes(), 0
    for _ in range(100):
        length = int(torch.randint(0, longest, (), generator=g))
        keys = torch.randint(0, letters, (length,), generator=g).tolist()
        what = float(torch.rand((), generator=g))
        if what < 0.45:
            values = list(range(fresh, fresh + length))
            fresh += length
            assert cache.insert(keys, values) == slow.insert(keys, values), "insert after evictions"
        elif what < 0.7:
            assert cache.match(keys) == slow.match(keys), "match after evictions"
        else:
            used = {value for value, _ in slow.held.values() if torch.rand((), generator=g) < 0.15}
            count, given = int(torch.randint(0, 6, (), generator=g)), set(used)
            gone, expected = cache.evict(count, used), slow.evict(count, used)
            assert gone == expected, f"evicted {gone}, not {expected}"
            assert used == given, "evict changes the set `used`"
        assert len(cache) == len(slow.held) == sum(cache.edges()), "len after evictions"
        assert all(cache.edges()), "an empty edge is left"
### END HIDDEN TESTS

# %% check="radix_cache" points=1
# With the blocks: what one request computed, the next one begins with.
blocks = Blocks(count=8, size=4, prefixes=RadixCache())
first, second = Sequence(0, list(range(10))), Sequence(1, [*range(9), 77, 78])
assert (blocks.admit(first), first.computed) == (True, 0), "nothing is known at first"
first.computed = 10
blocks.release(first)
assert blocks.admit(second), "there is room"
assert second.computed == 8, f"two whole blocks are the same: 8 tokens; yours: {second.computed}"
### BEGIN HIDDEN TESTS
model = random_model(4)
g = checks.generator(11)
blocks = Blocks(count=12, size=3, prefixes=RadixCache())
runner, least = Runner(model, 12, 3), 0
known = set()
for turn in range(14):
    chat = torch.randint(0, 2, (int(torch.randint(1, 30, (), generator=g)),), generator=g).tolist()
    sequence = Sequence(turn, chat)
    assert blocks.admit(sequence), "memory suffices for one request at a time: evict what is cached"
    start = sequence.computed
    assert start < len(chat), "the last token must pass"
    least += len(chat) - start
    logits = runner([(chat[start:], start, sequence.table)])[0]
    expected = model(torch.tensor([chat]))[0, -1]
    checks.close(logits, expected, what="logits behind a prefix from the cache", rtol=1e-8)
    sequence.computed = len(chat)
    blocks.release(sequence)
    assert blocks.available == 12, "all blocks are free or cached"
    assert len(blocks.free) + len(blocks.prefixes) == 12, "a block is lost, or evicted and not free"
assert runner.passed == least, "the runner saw other tokens"
### END HIDDEN TESTS

# %% [markdown]
# ### What a chat saves
#
# Ten turns with the server: each sends the whole conversation so far, and the model adds twelve
# tokens. Counted are the tokens that pass through the model, with your tree and without.

# %% tags=["experiment"]
talk = "".join(data.documentation()["compound"].split("\n\n")[:40]).split(". ")
passed, texts_equal = {}, []
for name, prefixes in (("no prefix cache", None), ("radix tree", RadixCache())):
    engine = Engine(small, Scheduler(Blocks(64, 16, prefixes), budget=128, max_running=4))
    history, passed[name], answers = [tokenizer.eos], [], []
    for turn in range(10):
        history += tokenizer.encode(talk[turn] + ". ")[:25]
        already = engine.runner.passed
        engine.submit(history, max_new=12)
        while engine.busy:
            answers += [token for _, token, _ in engine.step()]
        history += answers[-12:]
        passed[name].append(engine.runner.passed - already)
    texts_equal.append(answers)
saved = 1 - sum(passed["radix tree"]) / sum(passed["no prefix cache"])
print(f"tokens through the model: {passed}")
print(f"saved: {saved:.0%}; the same answers: {texts_equal[0] == texts_equal[1]}")

# %% tags=["experiment", "figure"]
# Figure: without a prefix cache each turn pays for all turns before it
fig, ax = plt.subplots(figsize=(7.5, 3.4))
turns = torch.arange(1, 11)
ax.bar(turns - 0.2, passed["no prefix cache"], 0.4, label="no prefix cache", color=plot.COLORS[5])
ax.bar(turns + 0.2, passed["radix tree"], 0.4, label="radix tree", color=plot.COLORS[2])
ax.set(xlabel="turn of the chat", ylabel="tokens through the model", xticks=turns.tolist())
ax.grid(axis="x", visible=False)
ax.legend()
plot.caption(
    fig,
    "A turn's own tokens are the dark bars: its new text, its answer, and what does not fill a "
    "block. The light ones grow with the whole conversation.",
)
plt.show()

# %% [markdown]
# ## Output that always parses
#
# Programs that call a model want JSON, not prose about JSON. Asking politely works often. A
# **constrained decoder** makes it certain: at each step, tokens after which the text could no
# longer become a valid one get the logit $-\infty$.
#
# Which tokens are those? Let the valid texts be described by a finite **automaton** over bytes:
# from a state, each byte leads to one further state or to none. A token is a run of bytes. It is
# allowed in a state if all of its bytes can be read, one after another; where they lead is the
# state after the token. Both facts depend on the state and the token alone, so a table of states ×
# vocabulary, computed once, is all that a step needs: one row, one `masked_fill`. The stop token is
# allowed where the text is complete. JSON with free nesting needs a stack besides; the libraries
# (xgrammar, llguidance, outlines) spend their ingenuity on keeping such masks cheap for
# vocabularies of a hundred thousand tokens.
#
# Does the answer remain the model's? At each step it is the model's distribution, cut to what is
# allowed and made to sum to 1. Over the whole text that is *not* the model's distribution given
# that the text is valid, for a step does not know how likely the model thinks it is to finish
# well from here. One of the questions below puts numbers to it.

# %% [markdown]
# `machine` builds automata for texts of parts: fixed bytes, runs of so many characters of a set,
# and choices. State 0 is the first; the end is the one state without a way on.


# %%
def machine(parts: list) -> list[dict[int, int]]:
    """An automaton, {byte: next state} for each state, for a text made of these parts: bytes are
    themselves, (characters, least, most) is a run of them, a list of bytes is a choice. The bytes
    with which a part begins must not go on a run before it, and choices begin differently."""
    states: list[dict[int, int]] = [{}]  # built from the end; the last one made is the first
    for part in reversed(parts):
        end = len(states) - 1
        if isinstance(part, bytes):
            for byte in reversed(part):
                states.append({byte: len(states) - 1})
        elif isinstance(part, list):
            edges = {}
            for choice in part:
                following = end
                for byte in reversed(choice[1:]):
                    states.append({byte: following})
                    following = len(states) - 1
                edges[choice[0]] = following
            states.append(edges)
        else:
            characters, least, most = part
            for n in reversed(range(most)):
                following = end if n == most - 1 else len(states) - 1
                edges = dict(states[end]) if n >= least else {}
                states.append(edges | dict.fromkeys(characters, following))
    last = len(states) - 1
    return [{byte: last - to for byte, to in edges.items()} for edges in reversed(states)]


LETTERS, DIGITS = b"abcdefghijklmnopqrstuvwxyz_", b"0123456789"
RECORD = machine(  # such as {"name": "queue", "line": 12, "async": false}
    [
        b'{"name": "',
        (LETTERS, 1, 16),
        b'", "line": ',
        (DIGITS[1:], 1, 1),
        (DIGITS, 0, 2),
        b', "async": ',
        [b"true", b"false"],
        b"}",
    ]
)

# %% [markdown]
# ### Exercise · Token masks


# %% exercise="constrained" minutes=25 difficulty=2 path="more"
def token_masks(
    automaton: list[dict[int, int]], accepting: set[int], vocabulary: list[bytes], stop: int
) -> tuple[Tensor, Tensor]:
    """What may come in each state, and where it leads: (allowed, after).

    automaton[state][byte] is the next state; a byte that is missing leads nowhere.
    vocabulary[token] are the token's bytes.
    allowed (states, tokens), bool: whether all bytes of the token can be read from the state on,
        one after another. A token without bytes is never allowed. The token `stop`, whatever its
        bytes, is allowed in the states of `accepting` and in no other.
    after (states, tokens), int64: the state that the token leads to; the same state for `stop`; -1
        where the token is not allowed.
    The arguments stay as they are.
    """
    ### BEGIN SOLUTION
    after = torch.full((len(automaton), len(vocabulary)), -1)
    for start in range(len(automaton)):
        for token, text in enumerate(vocabulary):
            state = start if text else -1
            for byte in text:
                state = automaton[state].get(byte, -1)
                if state < 0:
                    break
            after[start, token] = state
        after[start, stop] = start if start in accepting else -1
    return after >= 0, after
    ### END SOLUTION


class Constrained:
    """A `choose` for the engine that keeps a text within an automaton.

    Constrained(allowed, after, choose=greedy): begins in state 0. A call with logits (vocab,), of
    any floating dtype, gives choose(…) of the logits with -inf for each token that the present
    state does not allow, and moves on to the state after it (choose gives one that is allowed). The
    logits stay as they are, and the masked ones have their dtype. ValueError, before choose is
    called, in a state that allows nothing.
    """

    def __init__(self, allowed: Tensor, after: Tensor, choose: Callable[[Tensor], int] = greedy):
        ### BEGIN SOLUTION
        self.allowed, self.after, self.choose, self.state = allowed, after, choose, 0
        ### END SOLUTION

    def __call__(self, logits: Tensor) -> int:
        ### BEGIN SOLUTION
        allowed = self.allowed[self.state]
        if not allowed.any():
            raise ValueError(f"state {self.state} allows no token")
        token = self.choose(torch.where(allowed, logits, -math.inf))
        self.state = int(self.after[self.state, token])
        return token
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one token</summary>
#
# Keep a current state; replace it by `automaton[state].get(byte)` for each byte; give up at the
# first None. RECORD's 61 states × 4,096 tokens are 250,000 such walks, nearly all of which end at
# their first byte.
# </details>
#
# <details><summary>Hint: minus infinity</summary>
#
# `logits.masked_fill(~allowed, -inf)` makes a new tensor. A large negative number in place of the
# infinity is a bug that waits for a logit that is larger still.
# </details>


# %% check="constrained" points=2
# Texts "ab", "abab", …: state 0 wants an a, state 1 a b, state 2 is like 0 and may be the end.
automaton = [{97: 1}, {98: 2}, {97: 1}]
vocabulary = [b"a", b"b", b"ab", b"ba", b"", b"<end>"]
allowed, after = checks.parts(token_masks(automaton, {2}, vocabulary, 5), "allowed", "after")
checks.close(
    allowed.long(),
    torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 1]]),
    what="allowed, as numbers",
    hint='"ba" can be read in state 1: its b leads to 2, and the a on to 1',
)
checks.close(
    after,
    torch.tensor([[1, -1, 2, -1, -1, -1], [-1, 2, -1, 1, -1, -1], [1, -1, 2, -1, -1, 2]]),
    what="after",
)
### BEGIN HIDDEN TESTS
assert allowed.dtype == torch.bool, f"allowed is {allowed.dtype}, not bool"
assert after.dtype == torch.int64, f"after is {after.dtype}, not int64"
g = checks.generator(12)
pattern = rb'\{"name": "[a-z_]{1,16}", "line": [1-9][0-9]{0,2}, "async": (true|false)\}'
pieces = [
    b'{"',
    b'{"name',
    b'": "',
    b'", "line": ',
    b', "async',
    b'": ',
    b"false}",
    b'": "x',
    b"}}",
]
vocabulary = [bytes([i]) for i in range(256)] + pieces + [b"", b"a" * 17, b"_" * 16, b'1", ']
vocabulary += [bytes(torch.randint(97, 123, (3,), generator=g).tolist()) for _ in range(20)]
order = torch.randperm(len(vocabulary), generator=g).tolist()
vocabulary, stop = [vocabulary[i] for i in order], order.index(257)  # its bytes could be read
given = [dict(edges) for edges in RECORD], list(vocabulary)
end = {len(RECORD) - 1}
allowed, after = token_masks(RECORD, end, vocabulary, stop)
assert (*given, end) == (RECORD, vocabulary, {len(RECORD) - 1}), "an argument was changed"
assert allowed.shape == after.shape == (len(RECORD), len(vocabulary)), "states × tokens"
assert torch.equal(allowed, after >= 0), "after is -1 exactly where a token is not allowed"
column = [s in end for s in range(len(RECORD))]
assert allowed[:, stop].tolist() == column, "stop is allowed in accepting states, and only there"
# Random walks by tokens: every text that reaches the end is what the expression describes.
for _ in range(30):
    state, text = 0, b""
    while not allowed[state, stop]:
        token = int(torch.multinomial(allowed[state].double(), 1, generator=g))
        text += vocabulary[token]
        state = int(after[state, token])
    assert re.fullmatch(pattern, text), f"{text!r} came out, and is not of the form"
    assert int(after[state, stop]) == state, "stop leads to the same state"
# And the other way: a valid text can be written in any pieces that are tokens.
for name, line in ((b"queue", b"7"), (b"a" * 16, b"120"), (b"_", b"99")):
    text = b'{"name": "' + name + b'", "line": ' + line + b', "async": false}'
    for _ in range(5):
        state, at = 0, 0
        while at < len(text):
            fits = [
                t for t, b in enumerate(vocabulary) if b and t != stop and text.startswith(b, at)
            ]
            assert all(allowed[state, t] for t in fits), f"a piece of {text!r} is not allowed"
            token = fits[int(torch.randint(0, len(fits), (), generator=g))]
            state, at = int(after[state, token]), at + len(vocabulary[token])
        assert state in end, f"{text!r} was read, and the state is not the end"
# Small automata that lead anywhere, also back to state 0; any state may be an end, any token stop.
for count in (1, 2, 3, 4) * 3:
    steps = {  # for each byte a matrix (from, to) of zeros and ones
        byte: F.one_hot(torch.randint(0, count, (count,), generator=g), count)
        * (torch.rand(count, 1, generator=g) < 0.8)
        for byte in (0, 97, 255)
    }
    automaton = [
        {byte: int(step[state].argmax()) for byte, step in steps.items() if step[state].any()}
        for state in range(count)
    ]
    lengths = torch.randint(0, 4, (12,), generator=g).tolist()
    draws = [torch.randint(0, 3, (n,), generator=g).tolist() for n in lengths]
    vocabulary = [bytes((0, 97, 255)[i] for i in draw) for draw in draws]
    stop = int(torch.randint(0, 12, (), generator=g)) if count % 2 else 0
    accepting = {s for s in range(count) if torch.rand((), generator=g) < 0.5}
    allowed, after = token_masks(automaton, accepting, vocabulary, stop)
    for token, text in enumerate(vocabulary):
        reach = torch.eye(count, dtype=torch.int64) * bool(text)
        for byte in text:
            reach = reach @ steps[byte]
        if token == stop:
            reach = torch.diag(torch.tensor([int(s in accepting) for s in range(count)]))
        leads = torch.where(reach.any(1), reach.argmax(1), -1).tolist()
        named = "stop" if token == stop else repr(text)
        assert after[:, token].tolist() == leads, (
            f"in {automaton} with ends {accepting} {named} leads from the states to {leads}, "
            f"yours: {after[:, token].tolist()}"
        )
    assert torch.equal(allowed, after >= 0), "after is -1 exactly where a token is not allowed"
### END HIDDEN TESTS

# %% check="constrained" points=1
allowed = torch.tensor([[True, False, True, False], [False, False, False, True]])
after = torch.tensor([[0, -1, 1, -1], [-1, -1, -1, 1]])
choose = Constrained(allowed, after)
logits = torch.tensor([1.0, 9.0, 2.0, 9.0])
with checks.unchanged(logits=logits):
    tokens = [choose(logits), choose(logits)]
assert tokens == [2, 3], f"token 2 in state 0, and only 3 in state 1; yours: {tokens}"
### BEGIN HIDDEN TESTS
seen = []


def last_finite(masked: Tensor) -> int:
    seen.append(masked.clone())
    return int(masked.isfinite().nonzero()[-1])


for dtype in (torch.float64, torch.float32, torch.bfloat16):
    seen.clear()
    logits = torch.tensor([-3e38, 9.0, -1e30, 5.0], dtype=dtype)
    choose, other = Constrained(allowed, after, last_finite), Constrained(allowed, after)
    with checks.unchanged(logits=logits, allowed=allowed, after=after):
        tokens = [choose(logits), choose(logits)]
        assert tokens == [2, 3], f"the last allowed tokens are 2 and 3, yours: {tokens}"
        assert other(logits) == 2, "a small logit that is allowed beats any that is not"
        assert other(torch.tensor([0.0, 0.0, -9.0, 0.0], dtype=dtype)) == 3, "state 1 allows only 3"
    assert len(seen) == 2, "choose is not the one that was given"
    infinite = -math.inf
    for masked, expected in zip(
        seen, ([-3e38, infinite, -1e30, infinite], [infinite] * 3 + [5.0]), strict=True
    ):
        checks.close(masked, torch.tensor(expected, dtype=dtype), what="masked logits", dtype=dtype)
ring = Constrained(torch.tensor([[False, True], [True, False]]), torch.tensor([[-1, 1], [0, -1]]))
tokens = [ring(torch.zeros(2)) for _ in range(5)]
assert tokens == [1, 0, 1, 0, 1], f"token 0 leads back to state 0: [1, 0, 1, 0, 1], yours {tokens}"
stuck = Constrained(torch.tensor([[True], [False]]), torch.tensor([[1], [-1]]), last_finite)
stuck(torch.zeros(1))
seen.clear()
checks.raises(ValueError, stuck, torch.zeros(1), because="state 1 allows nothing")
assert not seen, "choose was called for a state that allows nothing"
### END HIDDEN TESTS

# %% [markdown]
# ### With and without
#
# **Question.** `small` was never taught to write JSON. Of sixteen answers after a prompt that asks
# for it by example, how many parse without the mask, and how many with it? What will the names look
# like? Write down a guess.

# %% tags=["experiment"]
vocabulary = token_bytes(tokenizer)
allowed, after = token_masks(RECORD, {len(RECORD) - 1}, vocabulary, tokenizer.eos)
counts = allowed.sum(1)
print(
    f"{len(RECORD)} states; tokens allowed in a state: {int(counts.min())} to {int(counts.max())} "
    f"of {len(vocabulary)}; states that allow only one: {int((counts == 1).sum())}"
)
example = '{"name": "get_item", "line": 27, "async": false}\n'
engine = Engine(small, Scheduler(Blocks(count=120, size=16), budget=64, max_running=16))
parsed = {}
for kind in ("free", "constrained"):
    texts = {}
    for n in range(16):
        draw = sampler(0.8, seed=n)
        choose = draw if kind == "free" else Constrained(allowed, after, draw)
        prompt = [tokenizer.eos, *tokenizer.encode(f"# async def run_{n}(self):\n# {example}# ")]
        texts[engine.submit(prompt, max_new=60, stop=tokenizer.eos, choose=choose)] = []
    while engine.busy:
        for who, token, _ in engine.step():
            texts[who].append(token)
    written = [
        b"".join(vocabulary[token] for token in tokens).decode("utf-8", "replace")
        for tokens in texts.values()
    ]
    parsed[kind] = 0
    for text in written:
        with suppress(ValueError):
            value = json.loads(text)
            parsed[kind] += type(value) is dict and [*value] == ["name", "line", "async"]
    print(f"\n{kind}: {parsed[kind]} of 16 parse. The first three:")
    print(*(repr(text[:75]) for text in written[:3]), sep="\n")

# %% [markdown]
# The form is certain, the content is the model's: a mask cannot make a small model know a line
# number. States that allow a single token need no model at all. Servers write those tokens without
# a pass, or pass them all at once like a prompt ("jump-forward" decoding in SGLang).

# %% [markdown]
# ## Prefill apart from decode
#
# A prefill is limited by arithmetic, a decode by memory traffic (lesson 28), and on one device
# each disturbs the other. Chunks make the disturbance small; they do not end it. **Disaggregated**
# serving gives them different devices: one worker computes prompts and first tokens, sends the
# blocks over, and another decodes. What was scheduling becomes two queues in a row, which can be
# reasoned about.
#
# Take the first. Prompts of equal length take $D$ seconds each and arrive at random, $R$ a second.
# That is the queue that textbooks call M/D/1. Its worker is busy for a share $\rho = RD$ of the
# time. Whoever arrives at random finds the average state: the rest of the prompt at work, which is
# $D/2$ if there is one, and then $L$ whole prompts in line: $W = \rho D/2 + L D$. In a steady state
# the line holds what arrives during one wait, $L = R W$ (Little's law). So
# $W = \rho D / 2 + \rho W$, and
#
# $$\mathrm{TTFT} = D + W = D + \frac{R D^2}{2(1 - \rho)}.$$
#
# At half load a first token waits for half a prefill, at 90 percent for four and a half.

# %% [markdown]
# ### Exercise · Two workers, two queues


# %% exercise="disaggregated" minutes=25 difficulty=2 path="more"
def disaggregated(
    arrivals: list[float],
    prompts: list[int],
    outputs: list[int],
    prefill_time: Callable[[int], float],
    transfer_time: Callable[[int], float],
    step_time: Callable[[int], float],
) -> list[list[float]]:
    """When each request's tokens come out of a prefill worker and a decode worker: a list of times
    for each request, in order.

    Request i arrives at arrivals[i] ≥ 0 (ascending; of equals the first goes first), has a prompt
    of prompts[i] tokens, and writes outputs[i] ≥ 1 tokens.
    The prefill worker takes one prompt at a time, in order of arrival, for prefill_time(prompts[i])
        seconds. At the end the request's first token comes out. If it writes more, its blocks then
        travel for transfer_time(prompts[i]) seconds, beside all else, and it is ready.
    The decode worker makes one step after another. A step takes step_time(n) > 0 seconds, where
        n ≥ 1 requests take part: all that are ready when the step begins (at that moment counts)
        and are not over. At its end each of them gets a token. The next step begins at once; if
        nobody is there, as soon as the next request is ready.

    Two requests at 0 and 1, prompts 3 and 1, outputs 2 and 3, with prefill_time(p) = p,
    transfer_time 0.5, step_time(n) = n: the prompts end at 3 and 4. The first is ready at 3.5 and
    steps alone until 4.5, its end. The second is ready at 4.5 and steps until 5.5 and 6.5:
    [[3, 4.5], [4, 5.5, 6.5]].
    """
    ### BEGIN SOLUTION
    free, ready, times = 0.0, [], []
    for i, arrival in enumerate(arrivals):
        free = max(free, arrival) + prefill_time(prompts[i])
        times.append([free])
        if outputs[i] > 1:
            heapq.heappush(ready, (free + transfer_time(prompts[i]), i))
    clock, running = 0.0, []
    while ready or running:
        if not running:
            clock = max(clock, ready[0][0])
        while ready and ready[0][0] <= clock:
            running.append(heapq.heappop(ready)[1])
        clock += step_time(len(running))
        for i in running:
            times[i].append(clock)
        running = [i for i in running if len(times[i]) < outputs[i]]
    return times
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one worker after the other</summary>
#
# The decode worker never delays the prefill worker. So compute all first tokens in one loop, then
# play the decode worker's steps. A long prompt's blocks travel longer than a short one's: who is
# ready first need not be who was prefilled first.
# </details>

# %% check="disaggregated" points=2
times = disaggregated([0, 1], [3, 1], [2, 3], lambda p: p, lambda p: 0.5, lambda n: n)
checks.close(times[0], [3.0, 4.5], what="times of the first request", rtol=1e-9)
checks.close(times[1], [4.0, 5.5, 6.5], what="times of the second request", rtol=1e-9)


### BEGIN HIDDEN TESTS
def by_the_clock(arrivals, prompts, outputs, prefill, transfer, step):
    """The same in whole seconds, second by second: what ends, what is ready, what begins."""
    count, times = len(arrivals), [[] for _ in arrivals]
    line, working, prefill_end, ready, batch, step_end = [], None, 0, {}, [], 0
    for now in range(3000):
        line += [i for i in range(count) if arrivals[i] == now]
        if working is not None and prefill_end == now:
            times[working].append(float(now))
            if outputs[working] > 1:
                ready[working] = now + transfer(prompts[working])
            working = None
        if batch and step_end == now:
            for i in batch:
                times[i].append(float(now))
            batch = []
        while working is None and line:
            working = line.pop(0)
            prefill_end = now + prefill(prompts[working])
        if not batch:
            batch = [i for i, at in ready.items() if at <= now and len(times[i]) < outputs[i]]
            step_end = now + (step(len(batch)) if batch else 0)
    return times


g = checks.generator(13)
for count, spread in ((1, 1), (6, 5), (9, 60), (12, 30)):
    for _ in range(3):
        arrivals = torch.randint(0, spread, (count,), generator=g).sort().values.tolist()
        prompts = torch.randint(1, 9, (count,), generator=g).tolist()
        outputs = torch.randint(1, 7, (count,), generator=g).tolist()
        given = list(arrivals), list(prompts), list(outputs)
        costs = (lambda p: p + 1, lambda p: (3 * p) % 7, lambda n: 2 + n // 2)
        times = disaggregated(arrivals, prompts, outputs, *costs)
        assert given == (arrivals, prompts, outputs), "an argument was changed"
        expected = by_the_clock(arrivals, prompts, outputs, *costs)
        assert [len(t) for t in times] == outputs, "request i writes outputs[i] tokens"
        for i in range(count):
            checks.close(times[i], expected[i], what=f"times of request {i} of {count}", rtol=1e-9)
assert disaggregated([], [], [], *costs) == [], "no requests, no times"
### END HIDDEN TESTS

# %% check="disaggregated" points=1
# The queue of the formula, from 20,000 random arrivals.
g = checks.generator(14)
for rate, seconds in ((0.5, 1.0), (2.0, 0.35)):
    gaps = -torch.log1p(-torch.rand(20_000, generator=g, dtype=torch.float64)) / rate
    arrivals = gaps.cumsum(0).tolist()
    ones = [1] * 20_000
    times = disaggregated(
        arrivals, ones, ones, lambda p, s=seconds: s, lambda p: 0.0, lambda n: 1.0
    )
    waits = [t[0] - a for a, t in zip(arrivals, times, strict=True)]
    mean = sum(waits) / len(waits)
    assert min(waits) >= seconds - 1e-9, "a first token came before its prefill could be done"
    ### BEGIN HIDDEN TESTS
    closed = seconds + rate * seconds**2 / (2 * (1 - rate * seconds))
    checks.number(mean, closed, to=0.1, what=f"the mean TTFT at {rate} a second")
### END HIDDEN TESTS

# %% [markdown]
# ### Two machines: both for everything, or one for each?
#
# The fair comparison has the same machines. *Colocated*: two workers, each with every second
# request, each doing whole prefills first and decode steps otherwise. *Disaggregated*: yours. The
# costs are those of a model of some ten billion parameters on a large GPU, rounded: 0.2 ms for a
# token of a prompt, 20 ms and 0.2 ms for each text in a decode step, 10 ms for a transfer. Prompts
# have 200 to 1,400 tokens, answers 20 to 150. The TTFT limit is one second. The TPOT limit is 30 ms
# on the left, and 100 ms on the right.
#
# *Write down* which of the two wins on the left, which on the right, and why.


# %% tags=["experiment"]
def colocated(arrivals, prompts, outputs, prefill_time, step_time) -> list[list[float]]:
    """One worker for both: a prompt that waits goes before the next decode step."""
    clock, coming, times, running = 0.0, deque(range(len(arrivals))), [[] for _ in arrivals], []
    while coming or running:
        if not running:
            clock = max(clock, arrivals[coming[0]])
        if coming and arrivals[coming[0]] <= clock:
            now = [coming.popleft()]
            clock += prefill_time(prompts[now[0]])
            running += now
        else:
            now = running
            clock += step_time(len(running))
        for one in now:
            times[one].append(clock)
        running = [one for one in running if len(times[one]) < outputs[one]]
    return times


def prefill_cost(tokens: int) -> float:
    return 0.2e-3 * tokens


def step_cost(batch: int) -> float:
    return 20e-3 + 0.2e-3 * batch


def both(rate: float, seed: int, limits: list[float]) -> dict[str, list[float]]:
    """Goodput of 400 requests, for each TPOT limit."""
    draw, now, arrivals, prompts, outputs = random.Random(seed), 0.0, [], [], []
    for _ in range(400):
        now += draw.expovariate(rate)
        arrivals.append(now)
        prompts.append(draw.randint(200, 1400))
        outputs.append(draw.randint(20, 150))
    apart = disaggregated(arrivals, prompts, outputs, prefill_cost, lambda tokens: 10e-3, step_cost)
    together = [[] for _ in arrivals]
    for worker in (0, 1):
        together[worker::2] = colocated(
            arrivals[worker::2], prompts[worker::2], outputs[worker::2], prefill_cost, step_cost
        )
    return {
        name: [goodput(arrivals, times, 1.0, limit, now) for limit in limits]
        for name, times in (("colocated", together), ("disaggregated", apart))
    }


rates, limits = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12], [0.03, 0.1]
results = {rate: [both(rate, seed, limits) for seed in range(5)] for rate in rates}
for side, limit in enumerate(limits):
    print(f"TPOT within {1e3 * limit:.0f} ms: best goodput over all rates, by seed")
    for name in ("colocated", "disaggregated"):
        best = [max(results[rate][seed][name][side] for rate in rates) for seed in range(5)]
        print(f"  {name:14}", *(f"{value:5.1f}" for value in best))

# %% tags=["experiment", "figure"]
# Figure: goodput of two machines, shared or apart, under a strict and a loose limit
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
for side, (ax, limit) in enumerate(zip(axes, limits, strict=True)):
    for name, marker in (("colocated", "s"), ("disaggregated", "o")):
        values = [[r[name][side] for r in results[rate]] for rate in rates]
        (line,) = ax.plot(rates, [sum(v) / 5 for v in values], marker=marker, label=name)
        ax.fill_between(rates, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
    ax.plot([0, 9], [0, 9], color="#999999", linestyle=":", linewidth=1)
    ax.set(xlabel="requests that arrive per second")
    ax.set_title(f"TPOT within {1e3 * limit:.0f} ms")
axes[0].set_ylabel("goodput, requests per second")
axes[0].legend()
plot.caption(
    fig,
    "The dotted line is 'all of them'. A curve leaves it where the first requests miss a limit and "
    "falls where the queue grows without end. Lines are means of five draws, shades their range.",
)
plt.show()

# %% [markdown]
# Read both panels. A strict limit on TPOT is what colocated decodes cannot keep: every prompt that
# somebody else sends stands in their way. A loose one forgives that, and then one prefill worker
# saturates while two would not have: at 800 tokens a prompt takes 0.16 s, so a single worker ends
# at some six a second. Splitting the machines two to two or three to one moves that point, which is
# why disaggregation is for fleets, with a ratio that follows the traffic.

# %% [markdown]
# ## Key questions
#
# ### Exercise · Short answers


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | int]:
    """Short answers; numbers to 1 percent, whole numbers exactly.

    "idle":      a static batch of four writes 10, 20, 30 and 100 tokens, in 100 steps. Which share
                 of its places (row × step) is idle?
    "memory":    80 layers, 8 key–value heads of 128, two bytes a number. How many requests of 2,000
                 tokens each fit into 40 GB (40e9 bytes) in blocks of 16 tokens? (a whole number)
    "chunks":    a budget of 512 tokens, 112 requests decoding. In how many steps is a prompt of
                 4,096 tokens prefilled? (a whole number)
    "resumed":   a request with a prompt of 300 tokens is preempted after it has written 120. How
                 many tokens must pass until its next one can be chosen, without a prefix cache?
                 (a whole number)
    "queue":     prefills of 0.2 s each on one worker, 4 requests a second at random. The mean TTFT,
                 in seconds?
    "distorted": a model begins with A (0.9) or B (0.1). After A the text will be valid with
                 probability 0.1, after B always. With which probability does a *valid* text of the
                 model begin with A? (A mask that allows both begins with A in 0.9 of all texts.)
    """
    ### BEGIN SOLUTION
    return {
        "idle": 1 - (10 + 20 + 30 + 100) / 400,
        "memory": int(40e9 // (2 * 80 * 8 * 128 * 2 * 2000)),
        "chunks": math.ceil(4096 / (512 - 112)),
        "resumed": 300 + 120,
        "queue": 0.2 + 4 * 0.2**2 / (2 * (1 - 4 * 0.2)),
        "distorted": 0.9 * 0.1 / (0.9 * 0.1 + 0.1),
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["idle"]
checks.kind(answer, float, what="idle")
### BEGIN HIDDEN TESTS
checks.number(answer, 240 / 400, what="idle", mistakes={"the share that is used": 0.4})
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["memory"]
checks.kind(answer, int, what="memory")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    61,
    to=0,
    what="memory",
    hint="Keys and values, in every layer; half a request is none",
    mistakes={"keys without values": 122},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["chunks"]
checks.kind(answer, int, what="chunks")
### BEGIN HIDDEN TESTS
checks.number(
    answer, 11, to=0, what="chunks", mistakes={"as if nobody decoded": 8, "a step too few": 10}
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["resumed"]
checks.kind(answer, int, what="resumed")
### BEGIN HIDDEN TESTS
checks.number(
    answer, 420, to=0, what="resumed", mistakes={"the prompt alone": 300, "the answer alone": 120}
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["queue"]
checks.kind(answer, float, what="queue")
### BEGIN HIDDEN TESTS
checks.number(
    answer, 0.6, what="queue", mistakes={"the wait alone": 0.4, "memoryless prefills": 1.0}
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["distorted"]
checks.kind(answer, float, what="distorted")
### BEGIN HIDDEN TESTS
checks.number(answer, 9 / 19, what="distorted", mistakes={"both valid": 0.09, "the mask's": 0.9})
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Your server gives the same text at temperature 0 whoever else is in the
# batch, and the checks depend on that. On a production engine the same prompt at temperature 0
# gives many different texts in a thousand tries. What is different, and what would it take to
# promise equality?

# %% [markdown] answer="batch-invariance"
# Nothing in the mathematics couples the rows of a batch; rounding does. A fast kernel splits its
# sums according to the shape of the whole batch: another number of tokens, another tile, another
# order of additions, last digits that differ. Where two logits nearly tie, the argmax flips, and
# the texts part for good. It also depends on chunk boundaries and on whether a prefix came from the
# cache. Here a float64 model, or margins far above the noise, hide it. A promise takes kernels
# whose order of summation for one row does not depend on the others (batch-invariant kernels for
# matrix products, norms and attention), at some cost in speed. A temperature of 0 or a seed does
# not help, because no random number is involved. Tests compare up to the first near tie.

# %% [markdown]
# **Open question 2.** Preemption by recomputation or by swapping the blocks to the host's memory:
# what decides? When does a server preempt so much that it serves nobody, and what helps?

# %% [markdown] answer="preemption"
# Recomputing n tokens costs a prefill, whose time grows with n and with the model's FLOPs; swapping
# moves 2 × the cache's bytes over the link to the host, in many small pieces if blocks are small.
# Large models with grouped queries have few cache bytes for their FLOPs, slow links favor
# recomputation, long texts with small models favor swapping; with a prefix cache the recomputation
# is often half done. Thrashing: everybody who is admitted grows, memory fills, the youngest is
# thrown out, comes back as soon as a block is free, is thrown out again, and each time its tokens
# are computed for nothing. Admission with a reserve (a share of blocks kept free, or the expected
# answer length) and a lower limit of running requests help; so does telling clients "no" early
# (429), which is admission control one level up.

# %% [markdown]
# **Open question 3.** First come, first served: somebody sends a prompt of 100,000 tokens. Who
# suffers in your scheduler, and who would with "shortest first"?

# %% [markdown] answer="fairness"
# The decodes do not: they are first in each step's budget. Those who came later do, twice: what the
# budget leaves goes to the long prompt until it is done, and if it waits for memory nobody may
# overtake it, though they would fit (head-of-line blocking). Shortest first is best for the mean
# TTFT and starves the long one as long as short ones keep coming. In between: share the prompt
# budget among several prompts, let small ones overtake a limited number of times, priorities that
# rise with waiting time, or budgets per tenant, so that one customer's prompts delay only that
# customer. Every such rule gives up the one-line proof that everybody ends; then it has to be
# proved again.

# %% [markdown]
# ## References, and what to read in them
#
# - **Yu et al. 2022**, *Orca: A Distributed Serving System for Transformer-Based Generative
#   Models*, OSDI 2022. Section 3: iteration-level scheduling and selective batching, the two ideas
#   above.
# - **Kwon et al. 2023**, *Efficient Memory Management for Large Language Model Serving with
#   PagedAttention*, arXiv:2309.06180. Section 4.5: scheduling and preemption, swapping against
#   recomputation; first come, first served, the youngest goes first.
# - **Agrawal et al. 2024**, *Taming Throughput-Latency Tradeoff in LLM Inference with
#   Sarathi-Serve*, arXiv:2403.02310. Sections 3 and 4: the generation stall, and the budget that
#   bounds it.
# - **Zheng et al. 2023**, *SGLang: Efficient Execution of Structured Language Model Programs*,
#   arXiv:2312.07104. Section 3: the radix tree; the section on compressed automata for
#   jump-forward decoding.
# - **Zhong et al. 2024**, *DistServe: Disaggregating Prefill and Decoding for Goodput-optimized
#   Large Language Model Serving*, arXiv:2401.09670. Goodput, and the M/D/1 analysis of the prefill.
# - **Patel et al. 2023**, *Splitwise: Efficient Generative LLM Inference Using Phase Splitting*,
#   arXiv:2311.18677. The same split, from the traces of a cloud, with machines of two kinds.
# - **Willard and Louf 2023**, *Efficient Guided Generation for Large Language Models*,
#   arXiv:2307.09702. Masks from an automaton, indexed by its states before decoding begins.
# - **Dong et al. 2024**, *XGrammar: Flexible and Efficient Structured Generation Engine for Large
#   Language Models*, arXiv:2411.15100. Tokens whose mask depends on the stack, and those (nearly
#   all) whose mask does not.
# - **Park et al. 2024**, *Grammar-Aligned Decoding*, arXiv:2405.21047. How a mask distorts the
#   model's distribution, and a sampler that does not.
#
# In production: vLLM, `vllm/v1/core/sched/scheduler.py`, whose `schedule` opens with the remark
# that there are no phases; it takes a running request's chunks in order of arrival (yours puts
# decodes first, as Sarathi-Serve does), and blocks chunk by chunk (yours for the whole text at
# once). Its `vllm/entrypoints/openai` is the endpoint. SGLang,
# `sglang/srt/mem_cache/radix_cache.py`, evicts whole leaves (yours single blocks) and locks what is
# in use along the path to the root.
