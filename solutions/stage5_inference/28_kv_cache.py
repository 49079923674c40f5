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
#       A cache for batches of unequal texts, generation that uses it, the bytes and the time it
#       costs on today's models, and the two ways to make it smaller: fewer bits, fewer tokens.
#     gpu: "One layer's prefill and decode, measured against your roofline."
# ---

# %% [markdown]
# ## The problem: the same work, again and again
#
# A decoder writes one token at a time. To choose token 500 it needs the attention of token 499 over
# all 499 so far, and so their keys and values, in every layer. Computed from the text, they cost a
# pass of all 499 tokens through the whole model. For token 501 it is the same pass again, with one
# token more.
#
# But nothing about those 499 has changed. Attention is causal: what layer 3 holds of token 7
# depends on tokens 1 to 7 and on nothing that comes later. Its key and its value are final as soon
# as they are made. Keep them, and each new token costs a pass of *one* token. What is kept is the
# **KV cache**.
#
# The queries are not kept. The query of token 7 asked its question when token 7 was new; nobody
# asks it again.
#
# The cache trades arithmetic for memory, and the trade moves the bottleneck. A model that decodes
# with a cache is hardly ever short of arithmetic. It is short of bytes: bytes to hold the cache,
# and bytes per second to read it. The second half of this lesson is about these.

# %% [markdown]
# ## Core ideas
#
# - **Prefill** passes the whole prompt through the model at once and fills the cache. It is one
#   large matrix product after another, and arithmetic limits it.
# - **Decode** passes one token for each text at a time. It reads every weight and the whole cache
#   to make one token a text, and memory limits it.
# - The cache grows with layers × key–value heads × head size × tokens. Grouped queries, latents,
#   windows and shared layers attack these factors.
# - Fewer bits: **KIVI** rounds keys along each channel and values along each token.
# - Fewer tokens: **H2O** evicts those that received little attention.
#
# | symbol | in code | is |
# |---|---|---|
# | $B$ | `batch` | texts that are decoded together |
# | $L$ | `layers` | layers of the model |
# | $H$, $H_{kv}$, $D$ | `heads`, `kv_heads`, `head_dim` | query heads, key–value heads, size of a head |
# | $n$ | `tokens` | tokens of one text |
# | $P$ | `parameters` | weights that each token is multiplied with |
#
# Keys and values are `(batch, kv_heads, tokens, head_dim)`. Keys are stored after their rotation by
# position (RoPE), so that a cached key is never touched again.

# %%
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile, triton
from llm40.models.heads import attention_weights
from llm40.models.llama import angles, rotate
from torch import Tensor

plt = plot.plt
H200 = {"peak": 989e12, "bandwidth": 4.8e12, "memory": 141e9}  # dense bf16 FLOP/s, bytes/s, bytes


# %% tags=["support"]
# Support: normal numbers on the CPU
def normal(*shape: int, **options) -> Tensor:
    """As checks.randn, on the CPU, with a GPU too: so is everything in this lesson."""
    return checks.randn(*shape, **options).cpu()


# %% [markdown]
# ## How much work is saved
#
# Write $n$ tokens after a prompt of $p$. Without a cache, the first new token needs a pass of $p$
# tokens, the second of $p + 1$, the last of $p + n - 1$:
#
# $$\sum_{i=0}^{n-1} (p + i) = np + \frac{n(n-1)}{2}.$$
#
# From a prompt of one token that is $n(n+1)/2$. With a cache the prompt goes through once, and then
# every written token but the last, which nothing follows: $p + n - 1$, from one token exactly $n$.
#
# This counts passes of a token through the layers' matrices. Attention itself stays quadratic with
# a cache too: token $i$ still looks at $i$ keys. Only recomputing them is saved.


# %% exercise="token_passes" minutes=8 difficulty=1
def token_passes(prompt: int, new: int, cached: bool) -> int:
    """How many tokens pass through the model while `new` tokens are written after a prompt.

    prompt ≥ 1 tokens, new ≥ 0. A token counts as often as it passes. Without a cache every new
    token takes a pass of the whole text so far. With a cache the prompt passes once (prefill), then
    each written token passes once when the next one is needed. Where new = 0, nothing passes. The
    count is exact, however large.

    A prompt of 1 and 4 new tokens: 1 + 2 + 3 + 4 = 10 without a cache, 4 with one.
    """
    ### BEGIN SOLUTION
    if new == 0:
        return 0
    return prompt + new - 1 if cached else new * prompt + new * (new - 1) // 2
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: off by one</summary>
#
# The logits of the last prompt token already give the first new token. And the last token that is
# written is never passed in.
# </details>

# %% check="token_passes" points=1
checks.close(token_passes(1, 4, cached=False), 10, what="passes for 4 tokens without a cache")
checks.close(
    token_passes(1, 4, cached=True),
    4,
    what="passes for 4 tokens with a cache",
    mistakes={"passing the last written token too": 5},
)
### BEGIN HIDDEN TESTS
for prompt, new in [(1, 0), (5, 0), (1, 1), (7, 1), (3, 2), (10, 25), (100, 7)]:
    texts = range(prompt, prompt + new)  # the length of the text before each new token
    for cached, expected in ((False, sum(texts)), (True, max(texts, default=0))):
        answer = token_passes(prompt, new, cached)
        checks.kind(answer, int, what="token_passes")
        checks.close(
            answer,
            expected,
            what=f"prompt {prompt}, new {new}, cached={cached}",
            mistakes={
                "one token too many": expected + 1,
                "the prompt once, whatever follows": prompt + new * (new - 1) // 2,
                "the whole text each time, its last token too": sum(texts) + new,
            },
        )
answer = token_passes(10**17, 3, cached=False)
assert answer == 3 * 10**17 + 3, f"prompt 10**17, new 3: {answer}; a float is not exact there"
### END HIDDEN TESTS

# %% [markdown]
# ## A cache in memory that is reserved once
#
# The course's own `models.Cache` glues new keys to old ones with `torch.cat`. That allocates and
# copies the whole cache for every token, layer by layer, and holds the layer it copies twice.
# Serving code reserves the memory first, for a known number of tokens, and writes each new key into
# the next free slot. Then nothing moves, addresses stay the same (a recorded CUDA graph needs that,
# and fixed shapes as well), and a full cache is an error that you can see coming.
#
# Texts in a batch have unequal lengths, so each row has a length of its own:
#
# ```
# slot      0    1    2    3    4    5         length
# row 0     The  cat  sat  .    .    .            3
# row 1     A    dog  .    .    .    .            2
# row 2     He   said he   was  here .            5
# ```
#
# Token $i$ of a row stands in slot $i$, whatever the others do. A new key of row 1 goes into slot
# 2, of row 2 into slot 5. What stands behind a row's length is left over from something else and
# means nothing. A query at position $i$ therefore sees slots $0 \dots i$ of its own row.

# %% [markdown]
# ### Exercise · The cache
#
# Three operations change the cache, and each has one use that you will meet again:
#
# | operation | used by |
# |---|---|
# | *append* new keys and values | every step |
# | *crop* to fewer tokens | speculative decoding, which takes rejected drafts back (lesson 32) |
# | *reorder* the rows | beam search, in which two surviving beams may come from one |


# %% exercise="kv_cache" minutes=40 difficulty=3
class KVCache:
    """Keys and values of a batch of texts of unequal lengths, in memory that is reserved once.

    Attributes, made in __init__ (all zeros) and never replaced, only written into:
        k, v: (layers, batch, kv_heads, capacity, head_dim), of `dtype`, on `device`.
        lengths: (layers, batch), int64: how many tokens each layer holds of each row. Token i of a
            row stands in slot i. What stands at and behind the length means nothing.
    All tensors that the methods are given are on `device`, too.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        ### BEGIN SOLUTION
        shape = (layers, batch, kv_heads, capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(layers, batch, dtype=torch.long, device=device)
        ### END SOLUTION

    def append(
        self, layer: int, k: Tensor, v: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens of one layer behind those it has, and returns all of that layer's.

        k, v: (batch, kv_heads, new, head_dim), each of any floating format and layout; unchanged.
        Of row b the first counts[b] tokens are real and are stored, the others are padding: counts
        (batch,), int64, from 0 to new; None means that all are real.

        Returns (keys, values), views of this layer's memory, (batch, kv_heads, longest, head_dim):
        longest is the largest length of this layer, now. No other layer changes. Nothing of the
        size of the cache is allocated. What is stored has no graph.

        OverflowError, whose message contains the word "capacity", if a row would get more tokens
        than there are slots; then nothing at all has changed.
        """
        ### BEGIN SOLUTION
        start, capacity = self.lengths[layer], self.k.shape[3]
        new = torch.arange(k.shape[2], device=start.device)
        if counts is None:
            counts = torch.full_like(start, len(new))
        end = start + counts.to(start.device)
        longest = int(end.max())
        if longest > capacity:
            raise OverflowError(f"a row would have {longest} tokens; the capacity is {capacity}")
        row, column = (new < counts.to(start.device)[:, None]).nonzero(as_tuple=True)
        slot = start[row] + column
        self.k[layer][row, :, slot] = k.detach()[row, :, column].to(self.k.dtype)
        self.v[layer][row, :, slot] = v.detach()[row, :, column].to(self.v.dtype)
        self.lengths[layer] = end
        return self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]
        ### END SOLUTION

    def crop(self, keep: int | Tensor) -> None:
        """Forgets the newest tokens of every layer: of a row with more than `keep`, `keep` stay.

        keep: a number for all rows, or (batch,), int64, one for each. A row that has no more than
        that stays as it is. ValueError if any number is negative; then nothing has changed.
        """
        ### BEGIN SOLUTION
        keep = torch.as_tensor(keep, device=self.lengths.device)
        if (keep < 0).any():
            raise ValueError("a row can't keep a negative number of tokens")
        self.lengths.copy_(torch.minimum(self.lengths, keep))
        ### END SOLUTION

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row rows[b] was, in every layer, with its length.

        rows: (batch,), int64. A row may be named more than once, or not at all.
        """
        ### BEGIN SOLUTION
        used = int(self.lengths.max())
        self.k[:, :, :, :used] = self.k[:, rows, :, :used]
        self.v[:, :, :, :used] = self.v[:, rows, :, :used]
        self.lengths.copy_(self.lengths[:, rows])
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: each row writes into other slots</summary>
#
# First write it with a loop over the rows: `self.k[layer, b, :, n : n + c] = k[b, :, :c]`. It
# passes. Without the loop: `(arange(new) < counts[:, None]).nonzero()` lists every real (row,
# column), and its slot is `lengths[layer][row] + column`.
# </details>
#
# <details><summary>Hint: two beams from one</summary>
#
# Row by row, `k[:, b] = k[:, rows[b]]` overwrites a row that a later one still has to read. Gather
# all rows first: `k[:, rows]` is a copy.
# </details>

# %% check="kv_cache" points=2
# One layer, two rows, one head of size 1: what is stored can be read as plain numbers.
cache = KVCache(layers=1, batch=2, kv_heads=1, capacity=4, head_dim=1)
new = torch.tensor([1.0, 2.0, 5.0, 6.0]).view(2, 1, 2, 1)
cache.append(0, new, 10 * new, counts=torch.tensor([2, 1]))
keys, values = checks.parts(
    cache.append(0, torch.tensor([3.0, 7.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)),
    "keys",
    "values",
)
checks.close(cache.lengths, torch.tensor([[3, 2]]), what="lengths after 2 + 1 and 1 + 1 tokens")
checks.close(keys[0, 0, :, 0], torch.tensor([1.0, 2.0, 3.0]), what="the keys of row 0 (3 tokens)")
checks.close(
    keys[1, 0, :2, 0],
    torch.tensor([5.0, 7.0]),
    what="the keys of row 1 (2 tokens)",
    hint="Its first call had one real token, so the next goes into slot 1",
    mistakes={"keeping the padding": torch.tensor([5.0, 6.0])},
)
checks.close(values[1, 0, :1, 0], torch.tensor([50.0]), what="the first value of row 1")
### BEGIN HIDDEN TESTS
g = checks.generator(1)


def held(cache, layer, row):
    """What a cache holds of one row: keys and values, (kv_heads, length, head_dim)."""
    n = int(cache.lengths[layer, row])
    return cache.k[layer, row, :, :n], cache.v[layer, row, :, :n]


for layers, batch, kv_heads, capacity, head_dim, dtype in [
    (2, 3, 2, 12, 4, torch.float32),
    (1, 1, 1, 7, 3, torch.float64),
    (3, 4, 1, 16, 2, torch.bfloat16),
]:
    cache = KVCache(layers, batch, kv_heads, capacity, head_dim, dtype=dtype)
    assert tuple(cache.k.shape) == (layers, batch, kv_heads, capacity, head_dim), (
        f"k has shape {tuple(cache.k.shape)}: (layers, batch, kv_heads, capacity, head_dim)"
    )
    assert cache.k.dtype == cache.v.dtype == dtype, f"k and v have dtype {dtype} when asked for it"
    expected = [[[[], []] for _ in range(batch)] for _ in range(layers)]  # layer, row, k or v
    for turn, size in enumerate((3, 1, 2, 1)):
        for layer in reversed(range(layers)):
            if turn == 1 and layer + 1 < layers:
                continue  # from here on the last layer is ahead of all others
            k, v = (
                normal(batch, size, kv_heads, head_dim, generator=g).transpose(1, 2)
                for _ in range(2)
            )
            counts = torch.randint(0, size + 1, (batch,), generator=g)
            counts[0] = size
            whole = size == 2  # once without counts
            with checks.unchanged(k=k, v=v, counts=counts):
                keys, values = cache.append(layer, k, v, None if whole else counts)
            for b in range(batch):
                c = size if whole else int(counts[b])
                expected[layer][b][0].append(k[b, :, :c].to(dtype))
                expected[layer][b][1].append(v[b, :, :c].to(dtype))
            lengths = [sum(part.shape[1] for part in expected[layer][b][0]) for b in range(batch)]
            checks.close(
                cache.lengths[layer], torch.tensor(lengths), what=f"lengths of layer {layer}"
            )
            assert keys.shape[2] == values.shape[2] == max(lengths), (
                f"append returns {keys.shape[2]} slots; the longest row of layer {layer} has "
                f"{max(lengths)} tokens"
            )
            for b in range(batch):
                truth = [torch.cat(part, dim=1) for part in expected[layer][b]]
                for found, name, right in zip(
                    (keys, values), ("keys", "values"), truth, strict=True
                ):
                    checks.close(
                        found[b, :, : lengths[b]],
                        right,
                        dtype=dtype,
                        what=f"{name} of row {b} that append returns",
                    )
    for layer in range(layers):
        for b in range(batch):
            for found, part in zip(held(cache, layer, b), expected[layer][b], strict=True):
                checks.close(
                    found, torch.cat(part, dim=1), what=f"layer {layer}, row {b}, at the end"
                )
### END HIDDEN TESTS

# %% check="kv_cache" points=1
cache = KVCache(layers=2, batch=2, kv_heads=1, capacity=3, head_dim=1)
two = torch.ones(2, 1, 2, 1)
cache.append(1, two, two, counts=torch.tensor([2, 1]))
checks.raises(
    OverflowError,
    cache.append,
    1,
    two,
    two,
    mentions="capacity",
    because="row 0 would get 4 tokens and there are 3 slots",
)
checks.close(cache.lengths[1], torch.tensor([2, 1]), what="lengths after a refused append")
### BEGIN HIDDEN TESTS
before = cache.k.clone(), cache.v.clone(), cache.lengths.clone()
checks.raises(OverflowError, cache.append, 1, 5 * two, 5 * two, torch.tensor([0, 2]) + 1)
checks.raises(OverflowError, cache.append, 1, 5 * two, 5 * two, torch.tensor([2, 0]))
for now, was, name in zip(
    (cache.k, cache.v, cache.lengths), before, ("k", "v", "lengths"), strict=True
):
    checks.close(now, was, what=f"{name} after a refused append", hint="Check before you write")
cache.append(1, 7 * two, 7 * two, counts=torch.tensor([1, 2]))  # both rows are full now
checks.close(cache.lengths[1], torch.tensor([3, 3]), what="lengths of full rows")
cache.append(1, two, two, counts=torch.tensor([0, 0]))  # nothing to store: no overflow
checks.close(cache.lengths[0], torch.tensor([0, 0]), what="lengths of the other layer")
keys, _ = cache.append(0, two, two)  # layer 1 is full; layer 0 is not
assert keys.shape[2] == 2, f"layer 0 has 2 tokens a row; append returns {keys.shape[2]} slots"
full = KVCache(1, 2, 1, 600, 8)
one = torch.ones(2, 1, 1, 8)
full.append(0, torch.ones(2, 1, 599, 8), torch.ones(2, 1, 599, 8), torch.tensor([599, 3]))
with checks.allocations() as made:
    full.append(0, one, one)
assert made.largest <= 200, (
    f"append made a tensor of {made.largest} elements for one new token of 16: write into the "
    "memory that is reserved, copy nothing that is there"
)
grown = torch.ones(2, 1, 1, 8, requires_grad=True)
full.crop(5)
keys, _ = full.append(0, 2 * grown, 2 * grown)
assert not keys.requires_grad, "what is stored must have no graph: detach it"
# Keys and values of two formats: neither goes through the other's.
fine, coarse = torch.full((1, 1, 1, 2), 1 / 3), torch.full((1, 1, 1, 2), 1e5, dtype=torch.bfloat16)
for k, v in ((fine, coarse), (coarse, fine), (fine.half(), coarse)):
    mixed = KVCache(1, 1, 1, 2, 2).append(0, k, v)
    for found, right, name in zip(mixed, (k, v), ("keys", "values"), strict=True):
        checks.close(found, right.float(), what=f"{name}, of {k.dtype} and {v.dtype}")
### END HIDDEN TESTS

# %% check="kv_cache" points=2
cache = KVCache(layers=1, batch=3, kv_heads=1, capacity=4, head_dim=1)
new = torch.arange(1.0, 7.0).view(3, 1, 2, 1)
cache.append(0, new, new, counts=torch.tensor([2, 1, 2]))
cache.reorder(torch.tensor([2, 0, 0]))
checks.close(cache.lengths[0], torch.tensor([2, 2, 2]), what="lengths after reorder([2, 0, 0])")
checks.close(
    cache.k[0, :, 0, 0, 0],
    torch.tensor([5.0, 1.0, 1.0]),
    what="the first keys after reorder([2, 0, 0])",
    mistakes={"overwriting row 0 before it is read": torch.tensor([5.0, 5.0, 5.0])},
)
cache.crop(1)
checks.close(cache.lengths[0], torch.tensor([1, 1, 1]), what="lengths after crop(1)")
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for rows in ([1, 1, 3, 0], [3, 2, 1, 0], [0, 0, 0, 0], [2, 3, 2, 1]):
    cache = KVCache(2, 4, 2, 9, 3)
    stored = {}
    for layer, counts in enumerate(([5, 1, 0, 3], [4, 4, 2, 6])):
        k, v = (normal(4, 2, 6, 3, generator=g) for _ in range(2))
        cache.append(layer, k, v, torch.tensor(counts))
        stored[layer] = k, v, counts
    index = torch.tensor(rows)
    memory = cache.k, cache.v, cache.lengths
    with checks.unchanged(rows=index):
        cache.reorder(index)
    for now, before, name in zip(
        (cache.k, cache.v, cache.lengths), memory, ("k", "v", "lengths"), strict=True
    ):
        assert now is before, f"reorder replaced {name}: write into the tensor that is there"
    for layer, (k, v, counts) in stored.items():
        for b, source in enumerate(rows):
            n = counts[source]
            assert int(cache.lengths[layer, b]) == n, (
                f"after reorder({rows}) row {b} of layer {layer} has length "
                f"{int(cache.lengths[layer, b])}; row {source} had {n}"
            )
            checks.close(cache.k[layer, b, :, :n], k[source, :, :n], what=f"keys, reorder({rows})")
            checks.close(
                cache.v[layer, b, :, :n], v[source, :, :n], what=f"values, reorder({rows})"
            )
    lengths = torch.tensor([[stored[layer][2][source] for source in rows] for layer in (0, 1)])
    keep = torch.tensor([2, 9, 0, 1])
    with checks.unchanged(keep=keep):
        cache.crop(keep)
    checks.close(cache.lengths, torch.minimum(lengths, keep), what="lengths after crop(tensor)")
    checks.raises(ValueError, cache.crop, -1)
    checks.raises(ValueError, cache.crop, torch.tensor([1, 1, -2, 1]))
    checks.close(cache.lengths, torch.minimum(lengths, keep), what="lengths after a refused crop")
    # What is appended after a crop takes the place of what was forgotten.
    k = normal(4, 2, 1, 3, generator=g)
    keys, _ = cache.append(1, k, k)
    for b, n in enumerate(torch.minimum(lengths, keep)[1].tolist()):
        checks.close(keys[b, :, n], k[b, :, 0], what="the key appended after a crop")
    cache.crop(0)
    checks.close(cache.lengths, torch.zeros(2, 4, dtype=torch.long), what="lengths after crop(0)")
### END HIDDEN TESTS

# %% [markdown]
# ### The model, with your cache inside
#
# This is the forward pass of the course's model, written out with a cache of your interface. Each
# row's new tokens begin at its own length: that gives their rotary positions and the mask. It also
# says why padding goes to the *right* here: padding that is never stored leaves no hole.


# %%
@torch.no_grad()
def step(model: models.Llama, tokens: Tensor, cache, counts: Tensor | None = None) -> Tensor:
    """Logits (batch, new, vocab) of new tokens (batch, new); the cache takes in the real ones.

    Row b's first counts[b] tokens are real; the logits of the others mean nothing.
    """
    new = torch.arange(tokens.shape[1], device=tokens.device)
    places = cache.lengths[0][:, None] + new  # (batch, new): the position of each new token
    cos, sin = angles(places, model.config)
    x = model.embed_tokens(tokens)
    for layer, block in enumerate(model.layers):
        attention, normed = block.self_attn, block.input_layernorm(x)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = cache.append(layer, rotate(k, cos, sin), v, counts)
        slots = torch.arange(keys.shape[2], device=tokens.device)
        seen = slots <= places[:, None, :, None]  # (batch, 1, new, slots)
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), keys, values, attn_mask=seen, enable_gqa=True
        )
        x = x + attention.o_proj(out.transpose(1, 2).flatten(-2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return F.linear(model.norm(x), model.embed_tokens.weight)


# %% tags=["support"]
# Support: a cache that concatenates, a small model with random weights, and text without a cache
class ConcatCache:
    """The same interface as KVCache, kept as lists of tensors, one for each layer and row."""

    def __init__(self, layers: int, batch: int) -> None:
        self.parts = [[None] * batch for _ in range(layers)]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(
            [[0 if part is None else part[0].shape[1] for part in layer] for layer in self.parts]
        )

    def append(self, layer, k, v, counts=None):
        for b in range(len(k)):
            c = k.shape[2] if counts is None else int(counts[b])
            new = k[b, :, :c], v[b, :, :c]
            old = self.parts[layer][b]
            self.parts[layer][b] = (
                new
                if old is None
                else tuple(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))
            )
        longest = max(part[0].shape[1] for part in self.parts[layer])
        padded = [
            [F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in part] for part in self.parts[layer]
        ]
        return tuple(torch.stack(side) for side in zip(*padded, strict=True))


def random_model(seed: int) -> models.Llama:
    """Two layers, four heads on two key–value heads, 40 tokens; weights wide enough to vary."""
    config = models.Config(
        vocab_size=40, hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_size=48, context=64
    )
    model = models.Llama(config).eval().requires_grad_(False)
    g = checks.generator(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.25)
    return model


def write_without_cache(model, prompt, new, stop=None):
    """Greedy text, the whole of it through the library's model for each token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
            if text[-1] == stop:
                break
    return text[len(prompt) :]


# %% check="kv_cache" points=1
# The model with your cache gives the logits of the model without one.
model = random_model(1)
text = torch.tensor([[5, 9, 3, 7, 1]])
cache = KVCache(layers=2, batch=1, kv_heads=2, capacity=5, head_dim=8)
parts = [step(model, text[:, :3], cache), step(model, text[:, 3:4], cache)]
parts.append(step(model, text[:, 4:], cache))
with torch.no_grad():
    expected = model(text)
checks.close(torch.cat(parts, dim=1), expected, what="the logits, in three steps", rtol=1e-4)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
texts = torch.randint(0, 40, (3, 14), generator=g)
with torch.no_grad():
    expected = model(texts)
cache = KVCache(2, 3, 2, 14, 8)
done = [0, 0, 0]
for counts in ([4, 1, 6], [1, 1, 1], [3, 0, 2], [0, 5, 1], [1, 1, 0]):
    chunk = torch.zeros(3, max(counts), dtype=torch.long)
    for b, c in enumerate(counts):
        chunk[b, :c] = texts[b, done[b] : done[b] + c]
    logits = step(model, chunk, cache, torch.tensor(counts))
    for b, c in enumerate(counts):
        checks.close(
            logits[b, :c],
            expected[b, done[b] : done[b] + c],
            rtol=1e-4,
            what=f"logits of row {b}, rows of unequal length",
        )
        done[b] += c
# A draft that is taken back leaves no trace, nor does a beam that is replaced.
cache.crop(torch.tensor([5, 2, 4]))
cache.reorder(torch.tensor([1, 0, 2]))
logits = step(model, texts[[1, 0, 2], [2, 5, 4]][:, None], cache)
for b, (source, place) in enumerate(((1, 2), (0, 5), (2, 4))):
    checks.close(
        logits[b, 0], expected[source, place], rtol=1e-4, what="logits after crop and reorder"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## Prefill, then decode
#
# Generation has two phases with one loop. The first call passes all prompts, padded on the right to
# the longest, and says how many tokens of each are real. The logits that choose a row's first new
# token stand at its *own* last real token, which in a shorter row is not the last column. Every
# further call passes one token a row.
#
# A row that has written its stop token has nothing more to pass. It stays in the batch, with a
# count of 0, until all have ended. (A server would give its place to the next request: **continuous
# batching**, lesson 34.)
#
# ### Exercise · Generate


# %% exercise="generate_with_cache" minutes=25 difficulty=2
def generate_with_cache(
    forward: Callable[[Tensor, object, Tensor], Tensor],
    cache: object,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: int | None = None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the prompt: a list of plain ints each.

    forward(tokens, cache, counts) gives logits (batch, new, vocab) for tokens (batch, new), int64,
    of which row b's first counts[b] are real; counts (batch,), int64. It puts the real tokens into
    the cache, which is empty at first and is only handed on.
    prompts: one list of ids or more, of any lengths, unchanged. ValueError if one of them is empty
        (with max_new_tokens = 0 too).
    A text ends with the token `stop`, which is its last (None: there is no such token), or after
    max_new_tokens ≥ 0. Each token is the argmax of the logits of the last real token of its row.

    The first call passes all prompts, padded on the right with 0. Each further call passes one
    token a row, shape (batch, 1); a row that has ended gets the count 0 and any id that the
    model knows. forward is called only when a token is still needed (with max_new_tokens = 0:
    never), so that in the end every prompt and every written token but the last of its row has
    passed once.
    """
    ### BEGIN SOLUTION
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    written = [[] for _ in prompts]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    counts = torch.tensor([len(prompt) for prompt in prompts])
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = forward(tokens, cache, counts)
        last = (counts - 1).clamp(min=0)
        chosen = logits[torch.arange(len(prompts)), last].argmax(-1)
        for row in running.nonzero()[:, 0].tolist():
            written[row].append(int(chosen[row]))
            running[row] = written[row][-1] != stop
        if not running.any():
            break
        tokens, counts = chosen[:, None], running.long()
    return written
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which logits?</summary>
#
# `logits[:, -1]` is right for the longest prompt only. Take `logits[arange(batch), counts - 1]`. In
# the later calls there is one column, and a row with count 0 needs no token at all.
# </details>
#
# <details><summary>Hint: one call too many</summary>
#
# After the last token is chosen there is nothing to ask for. Call `forward` at the top of the loop,
# `max_new_tokens` times at most, and leave the loop as soon as no row is running.
# </details>


# %% check="generate_with_cache" points=2
# A model that counts: after token t it writes t + 1.
def count_up(tokens, cache, counts):
    return F.one_hot(tokens + 1, 30).float()


written = generate_with_cache(count_up, None, [[1, 2, 3], [10]], max_new_tokens=4)
assert written == [[4, 5, 6, 7], [11, 12, 13, 14]], (
    f"after [1, 2, 3] and [10] a model that counts writes [4, 5, 6, 7] and [11, 12, 13, 14]; "
    f"yours: {written}. If the second row is wrong: its first logits stand at its own last token."
)
written = generate_with_cache(count_up, None, [[1, 2, 3], [10]], max_new_tokens=4, stop=5)
assert written == [[4, 5], [11, 12, 13, 14]], f"with stop=5 row 0 ends with its 5; yours: {written}"
### BEGIN HIDDEN TESTS
g = checks.generator(4)
model = random_model(2)
prompts = [torch.randint(0, 40, (n,), generator=g).tolist() for n in (6, 1, 9, 3)]
copies = [list(p) for p in prompts]
expected = [write_without_cache(model, p, 12) for p in prompts]


def with_model(tokens, cache, counts):
    return step(model, tokens, cache, counts)


for chosen in ([0, 1, 2, 3], [1], [2, 1], [3, 3, 0]):
    cache = ConcatCache(2, len(chosen))
    written = generate_with_cache(with_model, cache, [list(prompts[i]) for i in chosen], 12)
    for row, i in enumerate(chosen):
        assert list(written[row]) == expected[i], (
            f"a prompt of {len(prompts[i])} tokens, with {len(chosen)} rows in the batch, goes on "
            f"{written[row]}; without a cache it is {expected[i]}"
        )
written = generate_with_cache(with_model, ConcatCache(2, 4), prompts, 5)
assert prompts == copies, "the prompts were changed: work on copies"
assert all(type(token) is int for row in written for token in row), "a token is a plain int"
for stop in {expected[0][2], expected[2][0], expected[1][5]}:
    written = generate_with_cache(with_model, ConcatCache(2, 4), prompts, 12, stop)
    for row, prompt in zip(written, prompts, strict=True):
        right = write_without_cache(model, prompt, 12, stop)
        assert list(row) == right, f"with stop={stop}: {row}, without a cache {right}"
for new in (3, 0):
    checks.raises(ValueError, generate_with_cache, count_up, None, [[1], []], new)


def count_down(tokens, cache, counts):
    return F.one_hot((tokens - 1) % 30, 30).float()


written = generate_with_cache(count_down, None, [[2], [4]], 3, stop=0)
assert written == [[1, 0], [3, 2, 1]], f"counting down with stop=0: {written}; 0 is a token"


def near_ties(tokens, cache, counts):
    return 2**-30 * count_up(tokens, cache, counts)


written = generate_with_cache(near_ties, None, [[1, 2], [10]], 2)
assert written == [[3, 4], [11, 12]], (
    f"with logits that differ by 2**-30: {written}, expected [[3, 4], [11, 12]]: take the argmax "
    "of the logits themselves; their softmax rounds to equal numbers"
)
### END HIDDEN TESTS

# %% check="generate_with_cache" points=2
# Work, counted: every prompt token once, every written token but the last once.
passed = []


def counting(tokens, cache, counts):
    passed.append((tuple(tokens.shape), counts.tolist(), tokens.tolist()))
    return F.one_hot(tokens + 1, 30).float()


generate_with_cache(counting, None, [[1, 2, 3], [10]], max_new_tokens=4)
shapes = [shape for shape, _, _ in passed]
assert shapes == [(2, 3), (2, 1), (2, 1), (2, 1)], (
    f"the shapes of the tokens passed are (2, 3), then three times (2, 1); yours: {shapes}"
)
assert passed[0][1] == [3, 1], f"the counts of the first call are [3, 1]; yours: {passed[0][1]}"
### BEGIN HIDDEN TESTS
assert passed[0][2] == [[1, 2, 3], [10, 0, 0]], (
    f"the first call passes [[1, 2, 3], [10, 0, 0]]; yours: {passed[0][2]}"
)
for prompts, new, stop in [
    ([[1, 2, 3], [10]], 7, 6),
    ([[4]], 1, None),
    ([[4], [9, 9], [3, 3, 3]], 6, 10),
    ([[1], [2]], 9, 3),
    ([[4], [5]], 0, None),
]:
    passed.clear()
    written = generate_with_cache(counting, None, prompts, new, stop)
    assert len(passed) == max(map(len, written)), (
        f"{len(passed)} calls for texts of {[len(w) for w in written]} tokens: one for each token "
        "of the longest"
    )
    real = [0] * len(prompts)
    for shape, counts, _ in passed:
        assert len(counts) == shape[0] == len(prompts), "all rows stay in the batch"
        real = [a + c for a, c in zip(real, counts, strict=True)]
    right = [len(p) + len(w) - 1 if w else 0 for p, w in zip(prompts, written, strict=True)]
    assert real == right, (
        f"real tokens passed: {real}, expected {right}: a row that has ended counts 0"
    )
    for (shape, counts, tokens), index in zip(passed[1:], range(1, new), strict=False):
        assert shape == (len(prompts), 1), f"a later call has shape {shape}"
        for row, c in enumerate(counts):
            assert not c or tokens[row] == [written[row][index - 1]], "the token passed is the last"
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment · Tokens per second, with and without
#
# **Question.** How many times faster is `small` with a cache, when the text is 32, 128, 512 tokens
# long?
#
# **Predict first.** Without a cache a new token costs a pass of the whole text, so the ratio of the
# work is the length. Write down which ratio of the *times* you expect at 32 and at 512, and whether
# the time of a decode step grows with the length. Then run. One thread, since two only get in each
# other's way here; the times are the processor's.


# %% tags=["experiment"]
threads = torch.get_num_threads()
torch.set_num_threads(1)
small, tokenizer = models.load("small", device="cpu")
small = small.eval()
config = small.config
lengths = [32, 64, 128, 256, 512]
seconds = {"without a cache": [], "with your cache": []}
text = torch.tensor([tokenizer.encode("".join(data.documentation().values())[:4000])[:513]])
with torch.no_grad():
    for n in lengths:
        cache = KVCache(config.layers, 1, config.kv_heads, n + 6, config.head_dim)
        small(text[:, :n])  # the first call of a size is slower
        start = time.process_time()
        small(text[:, :n])
        seconds["without a cache"].append(time.process_time() - start)
        step(small, text[:, :n], cache)
        step(small, text[:, n : n + 1], cache)
        start = time.process_time()
        for _ in range(5):
            step(small, text[:, n : n + 1], cache)
        seconds["with your cache"].append((time.process_time() - start) / 5)
ratio = [a / b for a, b in zip(*seconds.values(), strict=True)]
for n, r in zip(lengths, ratio, strict=True):
    print(f"{n:4} tokens: {r:5.1f} times as fast with the cache; the work is {n} to 1")
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: one more token costs the whole text, or one token
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.5))
plot.curves(
    lengths,
    {name: [1 / t for t in times] for name, times in seconds.items()},
    xlabel="tokens already written",
    ylabel="tokens per second (CPU time)",
    title="one text, one thread",
    logx=True,
    logy=True,
    ax=axes[0],
)
plot.curves(
    lengths,
    {"time": ratio, "token passes": lengths},
    xlabel="tokens already written",
    ylabel="without ÷ with",
    title="the ratio, in work and in time",
    logx=True,
    logy=True,
    ax=axes[1],
)
plot.caption(
    fig,
    "Left: without a cache the speed falls with the length; with one it hardly moves at this size. "
    "Right: time gains far less than the work saved. A pass of many tokens uses each weight many "
    "times once it is loaded; a pass of one token uses it once.",
)
plt.show()

# %% [markdown]
# The gap on the right is the subject of the next sections. The work of a decode step is tiny and
# its time is not: what remains is the reading of every weight for a single token. (The work counts
# passes of tokens; attention to the cached keys comes on top, and would show at longer texts.)

# %% [markdown]
# ## How many bytes
#
# A token of one text leaves a key and a value in every layer, $2 H_{kv} D$ numbers. With two bytes
# a number, that is $4 L H_{kv} D$ bytes a token: 1,792 for `small`, half a megabyte for a model of
# 7 billion parameters with 32 heads, and only texts that begin alike can share them. Every design
# since has attacked one or more of the factors:
#
# | factor | attacked by |
# |---|---|
# | heads | one key–value head for all (**MQA**) or for a group of query heads (**GQA**) |
# | 2 · heads · size | a **latent** from which keys and values are made again (MLA), beside a small rotary key |
# | 2 | one tensor that serves as key and as value |
# | tokens | a **window** in some layers: older entries are overwritten |
# | tokens | one entry for several tokens (compression) |
# | layers | a layer that reads the cache of an earlier one |
#
# Lessons 09 and 10 built these layers. Here they are only counted.


# %%
@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps. A layer that keeps two kinds of entries is written as two of these."""

    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = False  # one tensor serves as key and value
    extra: int = 0  # numbers an entry besides: a latent, a rotary key, an indexer's key
    window: int | None = None  # only the newest so many tokens
    stride: int = 1  # one entry for each full `stride` tokens
    shared: bool = False  # reads an earlier layer's cache and keeps nothing of its own


# %% exercise="cache_bytes" minutes=15 difficulty=2
def cache_bytes(layers: Sequence[LayerCache], lengths: Sequence[int], bits: int = 16) -> int:
    """Bytes of the caches of several texts, of these lengths (each ≥ 0, in tokens).

    Of a text of n tokens a layer keeps the newest min(n, window) tokens (all of them where window
    is None), one entry for each full `stride` of these. An entry is kv_heads · head_dim numbers for
    the key, as many for the value unless `tied`, and `extra` numbers. A `shared` layer keeps
    nothing. Numbers have `bits` bits; the sum over all layers and texts is rounded up to a whole
    byte, once. window ≥ 0, stride ≥ 1. Returns an int, exact however large.

    Seven layers LayerCache(2, 32) and one text of 1 token: 7 · 2 · 2 · 32 · 2 = 1792 bytes.
    """
    ### BEGIN SOLUTION
    numbers = 0
    for layer in layers:
        if layer.shared:
            continue
        entry = (1 if layer.tied else 2) * layer.kv_heads * layer.head_dim + layer.extra
        for n in lengths:
            tokens = n if layer.window is None else min(n, layer.window)
            numbers += entry * (tokens // layer.stride)
    return -(-numbers * bits // 8)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a batch is not a length</summary>
#
# The window cuts each text for itself: two texts of 100 tokens in a window of 128 keep 200, not
# 128. Count numbers first, over all layers and texts, and turn them into bytes at the end.
# </details>

# %% check="cache_bytes" points=1
small_layout = [LayerCache(2, 32)] * 7
checks.close(
    cache_bytes(small_layout, [1]),
    1792,
    what="one token of `small`",
    mistakes={"keys alone": 896, "all eight query heads": 7168, "float32": 3584},
)
checks.close(cache_bytes(small_layout, [100, 20]), 1792 * 120, what="texts of 100 and 20 tokens")
checks.close(
    cache_bytes([LayerCache(1, 8, window=4)], [3, 10]),
    (3 + 4) * 32,
    what="a window of 4 over texts of 3 and 10 tokens",
    mistakes={"no window": 13 * 32, "one window for the whole batch": 4 * 32},
)
### BEGIN HIDDEN TESTS
worked = [
    ("multi-head, 32 layers", [LayerCache(32, 128)] * 32, [1], 524_288),
    ("Llama 3 8B", [LayerCache(8, 128)] * 32, [8192], 2**30),
    ("multi-query", [LayerCache(1, 128)] * 5, [3, 0, 4], 5 * 7 * 512),
    ("DeepSeek-V3", [LayerCache(extra=512 + 64)] * 61, [1], 70_272),
    ("gpt-oss", [LayerCache(8, 64, window=128), LayerCache(8, 64)] * 18, [100_000], 3_691_118_592),
    ("no text", [LayerCache(8, 64)], [], 0),
    ("no tokens", [LayerCache(8, 64, stride=4)], [0], 0),
    ("a window of 0", [LayerCache(1, 8, window=0), LayerCache(1, 8)], [5, 0], 160),
]
for name, layout, lengths_of, expected in worked:
    answer = cache_bytes(layout, lengths_of)
    checks.kind(answer, int, what="cache_bytes")
    checks.close(answer, expected, what=name)
answer = cache_bytes([LayerCache(1, 1, tied=True)], [2**60 + 1], bits=4)
assert answer == 2**59 + 1, f"2**60 + 1 numbers of 4 bits take 2**59 + 1 bytes; yours: {answer}"
### END HIDDEN TESTS

# %% check="cache_bytes" points=1
checks.close(
    cache_bytes([LayerCache(1, 8, tied=True, stride=4), LayerCache(1, 8, shared=True)], [11]),
    2 * 8 * 2,
    what="a tied layer of stride 4 and a shared one, 11 tokens",
    mistakes={"a started stride counted": 3 * 8 * 2, "the shared layer counted": 32 + 11 * 32},
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)


def counted(layers, lengths, bits):
    """Bytes by listing every entry."""
    total = 0
    for layer in layers:
        for n in lengths:
            kept = list(range(n))[-layer.window :] if layer.window else list(range(n))
            whole = [i for i in range(len(kept)) if (i + 1) % layer.stride == 0]
            for _ in whole if not layer.shared else []:
                sides = ["key"] if layer.tied else ["key", "value"]
                total += len(sides) * layer.kv_heads * layer.head_dim + layer.extra
    return math.ceil(total * bits / 8)


def draw(low, high):
    return int(torch.randint(low, high, (1,), generator=g))


for _ in range(30):
    layout = [
        LayerCache(
            draw(0, 4),
            draw(1, 6),
            bool(draw(0, 2)),
            draw(0, 5),
            [None, draw(1, 30)][draw(0, 2)],
            draw(1, 6),
            draw(0, 4) == 0,
        )
        for _ in range(draw(1, 5))
    ]
    texts = [draw(0, 50) for _ in range(draw(1, 4))]
    bits = [2, 3, 4, 8, 16, 32][draw(0, 6)]
    checks.close(
        cache_bytes(layout, texts, bits),
        counted(layout, texts, bits),
        what=f"{layout}, {texts}, {bits} bits",
    )
### END HIDDEN TESTS

# %% [markdown]
# Layouts of published models, from their configurations. Three remarks. Gemma 4 makes the values of
# its global layers from the same projection as the keys, but keys are rotated and values are not,
# so transformers caches both. DeepSeek-V3.2 adds an indexer's key of 128 numbers a token (in FP8 in
# DeepSeek's own code; here every number has two bytes). DeepSeek-V4-Flash's layers keep a window of
# 128 tokens and, but for the first two, one entry for 4 or for 128 tokens beside it, a single
# tensor for key and value.


# %%
def every(period: int, layers: int, inner: LayerCache, last: LayerCache) -> list[LayerCache]:
    """`layers` layers, of which each `period`-th is `last`, the others `inner`."""
    return [last if (i + 1) % period == 0 else inner for i in range(layers)]


LAYOUTS = {
    "Llama 2 7B (MHA)": [LayerCache(32, 128)] * 32,
    "Llama 3 8B (GQA)": [LayerCache(8, 128)] * 32,
    "Gemma 3 27B": every(6, 62, LayerCache(16, 128, window=1024), LayerCache(16, 128)),
    "Gemma 4 26B-A4B": every(6, 30, LayerCache(8, 256, window=1024), LayerCache(2, 512)),
    "gpt-oss-120b": every(2, 36, LayerCache(8, 64, window=128), LayerCache(8, 64)),
    "DeepSeek-V3 (MLA)": [LayerCache(extra=512 + 64)] * 61,
    "DeepSeek-V3.2": [LayerCache(extra=512 + 64 + 128)] * 61,
    "DeepSeek-V4-Flash": [
        *[LayerCache(1, 512, tied=True, window=128)] * 43,
        *[LayerCache(1, 512, tied=True, extra=128, stride=4)] * 21,
        *[LayerCache(1, 512, tied=True, stride=128)] * 20,
    ],
}

# %% tags=["experiment", "figure"]
# Figure: gigabytes of one text, by its length
fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.5, 1])
grid = [2**i for i in range(8, 18)]
for i, (name, layout) in enumerate(LAYOUTS.items()):
    gigabytes = [cache_bytes(layout, [n]) / 1e9 for n in grid]
    axes[0].plot(
        grid,
        gigabytes,
        label=name,
        color=plot.COLORS[i % 7],
        linestyle=plot.DASHES[(i + i // 7) % 7],
        marker="os^Dv*xP"[i],
        markersize=4,
    )
axes[0].set_xscale("log", base=2)
axes[0].set_yscale("log")
axes[0].set(xlabel="tokens of one text", ylabel="GB, two bytes a number")
axes[0].set_title("one text")
axes[0].legend(fontsize=7.5)
fits = [H200["memory"] / cache_bytes(layout, [grid[-1]]) for layout in LAYOUTS.values()]
axes[1].barh(list(LAYOUTS), fits, color=plot.COLORS[0])
axes[1].set_xscale("log")
axes[1].invert_yaxis()
axes[1].tick_params(axis="y", labelsize=8)
axes[1].grid(axis="y", visible=False)
axes[1].set(xlabel="texts of 131,072 tokens in 141 GB")
axes[1].set_title("an H200, if it held nothing else")
for i, count in enumerate(fits):
    axes[1].text(count * 1.1, i, f"{count:.0f}", va="center", fontsize=8)
axes[1].set_xlim(1, max(fits) * 3)
plot.caption(
    fig,
    "Every line ends with a slope of one: windows and strides change its height. A window bends a "
    "line where the text outgrows it.",
)
plt.show()

# %% [markdown]
# ## How many seconds: prefill against decode
#
# A kernel needs at least the time of its arithmetic and at least the time of its memory traffic:
#
# $$t \ge \max\left(\frac{\text{FLOPs}}{\text{peak}}, \frac{\text{bytes}}{\text{bandwidth}}\right).$$
#
# This is the **roofline**. Which of the two counts is told by the **arithmetic intensity**, FLOPs
# per byte: above peak ÷ bandwidth (the ridge, 206 for an H200) arithmetic limits, below it memory.
#
# Count a pass. Each token is multiplied with $P$ weights: $2P$ FLOPs. Each pair of a query and a
# key it sees costs $2D$ for the score and $2D$ for the value, in $H$ heads and $L$ layers: $4LHD$.
# The weights are read once for the whole batch, and each cached entry, old or new, moves once.
#
# **Why batching helps one half only.** In a decode step of $B$ texts with $n$ cached tokens, two
# bytes a number:
#
# $$\text{weights: } \frac{2PB}{2P} = B, \qquad \text{cache: } \frac{4LHD\,n\,B}{2\cdot 2LH_{kv}D\,n\,B} = \frac{H}{H_{kv}}.$$
#
# A larger batch shares the weights, but every text reads its own cache. $B$ and $n$ cancel, and
# what is left is the size of a group of query heads. With long texts the whole step tends to that
# number: 1 for MHA, 4 for Llama 3 8B, far from 206. That is the deeper reason for GQA: not only
# fewer bytes, but more use of each.


# %%
@dataclass(frozen=True)
class ModelSize:
    parameters: int  # weights that every token is multiplied with, the head's too
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes_per_number: int = 2  # of weights and cache


LLAMA_3_8B = ModelSize(7_504_924_672, 32, 32, 8, 128)


# %% exercise="arithmetic_intensity" minutes=20 difficulty=2
def arithmetic_intensity(
    model: ModelSize, batch: int, tokens: int, phase: str
) -> tuple[float, float, float]:
    """(FLOPs, bytes, FLOPs per byte) of one pass of `batch` texts through the model.

    phase "prefill": each text brings `tokens` ≥ 1 new tokens, and nothing is cached before; query i
        (from 1) sees i keys. phase "decode": each text brings one new token and has `tokens` ≥ 0
        cached; the new one sees them and itself. Anything else: ValueError.
    FLOPs: 2 · parameters for each new token, and 4 · head_dim for each pair of a query and a key
        that it sees, in each query head of each layer.
    Bytes: the weights once, and the key and the value of every token of every text once, whether
        they were cached or are new. Activations are left out.

    ModelSize(1000, 1, 4, 2, 8), 2 bytes a number. Decode, batch 3, 9 cached: 3 · (2000 + 32 · 4 ·
    10) = 9840 FLOPs, 2000 + 3 · 10 · 64 = 3920 bytes, 2.5102 FLOPs per byte. Prefill of 3 texts of
    4 tokens: 3 · (4 · 2000 + 32 · 4 · 10) = 27840 FLOPs, 2000 + 3 · 4 · 64 = 2768 bytes.
    """
    ### BEGIN SOLUTION
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase is 'prefill' or 'decode', not {phase!r}")
    if phase == "prefill":
        new, pairs, entries = tokens, tokens * (tokens + 1) / 2, tokens
    else:
        new, pairs, entries = 1, tokens + 1, tokens + 1
    attention = 4 * model.head_dim * model.heads * model.layers * pairs
    flops = batch * (2 * model.parameters * new + attention)
    entry = 2 * model.layers * model.kv_heads * model.head_dim
    moved = model.bytes_per_number * (model.parameters + batch * entry * entries)
    return flops, moved, flops / moved
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what does the batch multiply?</summary>
#
# All FLOPs, and the bytes of the caches. Not the bytes of the weights.
# </details>
#
# <details><summary>Hint: heads or kv_heads?</summary>
#
# Every query head computes scores; only key–value heads are stored.
# </details>

# %% check="arithmetic_intensity" points=2
toy = ModelSize(1000, 1, 4, 2, 8)
flops, moved, intensity = checks.parts(
    arithmetic_intensity(toy, 3, 9, "decode"), "FLOPs", "bytes", "FLOPs per byte"
)
checks.number(
    flops,
    9840,
    to=1e-9,
    what="FLOPs of decoding",
    mistakes={
        "the new token does not see itself": 3 * (2000 + 32 * 4 * 9),
        "key–value heads, not query heads": 3 * (2000 + 32 * 2 * 10),
        "one FLOP for a multiplication and an addition": 4920,
    },
)
checks.number(
    moved,
    3920,
    to=1e-9,
    what="bytes of decoding",
    mistakes={
        "weights read again for each text": 3 * 2000 + 1920,
        "all query heads cached": 2000 + 3840,
        "keys alone": 2000 + 960,
    },
)
checks.number(intensity, 9840 / 3920, to=1e-9, what="FLOPs per byte")
flops, moved, intensity = arithmetic_intensity(toy, 3, 4, "prefill")
checks.number(flops, 27840, to=1e-9, what="FLOPs of prefill", mistakes={"no causal mask": 30144})
checks.number(moved, 2768, to=1e-9, what="bytes of prefill")
### BEGIN HIDDEN TESTS
g = checks.generator(6)


def by_listing(model, batch, tokens, phase):
    """FLOPs and bytes, pair by pair."""
    queries = range(1, tokens + 1) if phase == "prefill" else [tokens + 1]
    flops, stored = 0, max(queries)
    for _ in range(batch):
        for seen in queries:
            flops += 2 * model.parameters
            for _ in range(model.layers):
                flops += model.heads * sum(
                    2 * model.head_dim + 2 * model.head_dim for _ in range(seen)
                )
    numbers = model.parameters + batch * stored * model.layers * (
        2 * model.kv_heads * model.head_dim
    )
    return flops, model.bytes_per_number * numbers


for _ in range(12):
    kv, group = (int(torch.randint(1, 5, (1,), generator=g)) for _ in range(2))
    size = torch.randint(1, 6, (4,), generator=g).tolist()
    model = ModelSize(
        100 * size[0] + 7, size[1], kv * group, kv, 3 * size[2], [1, 2, 4][size[3] % 3]
    )
    batch, tokens = torch.randint(1, 9, (2,), generator=g).tolist()
    for phase in ("prefill", "decode"):
        answer = arithmetic_intensity(model, batch, tokens, phase)
        right = by_listing(model, batch, tokens, phase)
        for value, expected, name in zip(
            answer, (*right, right[0] / right[1]), ("FLOPs", "bytes", "FLOPs per byte"), strict=True
        ):
            checks.number(value, expected, to=1e-9, what=f"{name}, {phase}, {model}")
# Law: with ever longer texts a decode step tends to the size of a group, whatever the batch.
for batch in (1, 64):
    checks.number(
        arithmetic_intensity(LLAMA_3_8B, batch, 10**10, "decode")[2], 4, to=1e-3, what="the limit"
    )
checks.number(arithmetic_intensity(toy, 1, 0, "decode")[0], 2128, to=1e-9, what="FLOPs, 0 cached")
for phase in ("training", "Prefill", "DECODE", " decode", "pre", ""):
    checks.raises(ValueError, arithmetic_intensity, toy, 1, 5, phase)
### END HIDDEN TESTS


# %% exercise="roofline_time" minutes=5 difficulty=1
def roofline_time(flops: float, moved: float, peak: float, bandwidth: float) -> tuple[float, str]:
    """(seconds, what limits): the least time for so many FLOPs and moved bytes.

    flops ≥ 0, moved > 0; peak in FLOP/s and bandwidth in bytes/s; arithmetic and traffic overlap.
    What limits is "compute" where arithmetic takes longer, by however little, else "memory". 1000
    FLOPs and 50 bytes at 100 FLOP/s and 10 bytes/s: (10.0, "compute").
    """
    ### BEGIN SOLUTION
    compute, memory = flops / peak, moved / bandwidth
    return (compute, "compute") if compute > memory else (memory, "memory")
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two clocks</summary>
#
# The arithmetic alone takes flops / peak seconds, the traffic alone moved / bandwidth. Both run at
# the same time, so the later one decides.
# </details>

# %% check="roofline_time" points=1
seconds_of, limit = checks.parts(roofline_time(1000, 50, 100, 10), "seconds", "what limits")
checks.number(seconds_of, 10.0, to=1e-9, what="seconds", mistakes={"one after the other": 15.0})
assert limit == "compute", f"arithmetic takes 10 s, traffic 5 s; yours says {limit!r}"
### BEGIN HIDDEN TESTS
for flops, moved, peak, bandwidth, expected, name in [
    (100, 50, 100, 10, 5.0, "memory"),
    (50, 5, 100, 10, 0.5, "memory"),
    (1e12, 1e9, 989e12, 4.8e12, 1e12 / 989e12, "compute"),
    (1e12, 1e10, 989e12, 4.8e12, 1e10 / 4.8e12, "memory"),
    (0, 8, 3, 2, 4.0, "memory"),
    (64, 16, 32, 8, 2.0, "memory"),
    (2**40 + 1, 2**40, 1, 1, 2.0**40, "compute"),
    (3000, 1000, 2.0**60, 2.0**60, 3000 / 2**60, "compute"),
    (1000, 3000, 2.0**60, 2.0**60, 3000 / 2**60, "memory"),
]:
    found, limit = roofline_time(flops, moved, peak, bandwidth)
    checks.number(found, expected, to=1e-9, what=f"seconds for {flops:g} FLOPs, {moved:g} bytes")
    assert limit == name, f"{flops:g} FLOPs, {moved:g} bytes: {name} limits, yours says {limit!r}"
### END HIDDEN TESTS

# %% tags=["experiment"]
print("Llama 3 8B on an H200, at the roofline:")
for phase, batch, tokens in [
    ("prefill", 1, 2048),
    ("decode", 1, 2048),
    ("decode", 64, 2048),
    ("decode", 64, 32768),
]:
    flops, moved, intensity = arithmetic_intensity(LLAMA_3_8B, batch, tokens, phase)
    duration, limit = roofline_time(flops, moved, H200["peak"], H200["bandwidth"])
    made = batch * (tokens if phase == "prefill" else 1)
    print(
        f"{phase:7} of {batch:2} × {tokens:5} tokens: {1e3 * duration:6.1f} ms, {limit:7} limits, "
        f"{intensity:6.1f} FLOP/byte, {made / duration:8.0f} tokens/s"
    )

# %% tags=["experiment", "figure"]
# Figure: a larger batch climbs the slope, until the caches weigh more than the weights
fig, axes = plt.subplots(1, 2, figsize=(11, 4.1))
points = {
    "prefill 2k": (arithmetic_intensity(LLAMA_3_8B, 1, 2048, "prefill")[2], None),
    "decode, B = 1": (arithmetic_intensity(LLAMA_3_8B, 1, 2048, "decode")[2], None),
    "B = 16": (arithmetic_intensity(LLAMA_3_8B, 16, 2048, "decode")[2], None),
    "B = 256": (arithmetic_intensity(LLAMA_3_8B, 256, 2048, "decode")[2], None),
}
plot.roofline(
    points,
    peak=H200["peak"],
    bandwidth=H200["bandwidth"],
    ax=axes[0],
    title="Llama 3 8B, H200, 2,048 tokens a text",
)
batches = [2**i for i in range(11)]
lines = {
    f"{n:,} tokens a text": [arithmetic_intensity(LLAMA_3_8B, b, n, "decode")[2] for b in batches]
    for n in (0, 512, 2048, 8192, 32768)
}
plot.curves(
    batches,
    lines,
    xlabel="batch B",
    ylabel="FLOP/byte",
    title="decode: batch against length",
    logx=True,
    logy=True,
    ax=axes[1],
)
axes[1].axhline(206, color="#777777", linewidth=1)
axes[1].text(1, 225, "ridge of an H200", fontsize=8, color="#555555")
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Arithmetic, no measurement. Right: without cached tokens the intensity is about the batch: "
    "some 206 texts reach the ridge. With 2,048 tokens a text it bends long before; at 32,768 even "
    "a batch of 1,024 stays below 8, since each text reads a cache of its own.",
)
plt.show()

# %% [markdown]
# ### On a GPU: is the roofline reached?
#
# The next cells run one layer of Llama 3 8B's size on a GPU, its four matrix products and its
# attention over the cache, in bfloat16, and compare the time with your roofline. Without a GPU they
# show what one H200 gave.


# %% tags=["experiment"]
ONE_LAYER = ModelSize(218_103_808, 1, 32, 8, 128)


def time_layer(batch: int, tokens: int, phase: str) -> float:
    """Seconds of one layer's products and attention on this GPU; L2 is emptied before each run."""
    new, keys = (tokens, tokens) if phase == "prefill" else (1, tokens + 1)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    # Query, key and value together; output; gate and up together; down.
    weights = [torch.randn(shape, **options) / 64 for shape in shapes]
    inputs = [torch.randn(batch * new, columns, **options) for _, columns in shapes]
    q = torch.randn(batch, 32, new, 128, **options)
    k, v = (torch.randn(batch, 8, keys, 128, **options) for _ in range(2))

    def layer():
        for x, w in zip(inputs, weights, strict=True):
            F.linear(x, w)
        F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=True)

    return triton.testing.do_bench(layer, return_mode="median") / 1e3


# Microseconds on one H200 with PyTorch 2.11: shown where there is no GPU.
RECORDED = {
    ("prefill", 1, 2048): 1388,
    ("decode", 1, 2048): 145,
    ("decode", 16, 2048): 170,
    ("decode", 64, 2048): 270,
    ("decode", 256, 2048): 686,
    ("decode", 64, 16384): 1103,
}
on_gpu = profile.name == "gpu" and not profile.interpret
print(f"{torch.cuda.get_device_name() if on_gpu else 'recorded on an H200'}; one layer, bfloat16")
gpu_points = {}
for (phase, batch, tokens), recorded in RECORDED.items():
    flops, moved, intensity = arithmetic_intensity(ONE_LAYER, batch, tokens, phase)
    measured = time_layer(batch, tokens, phase) if on_gpu else recorded / 1e6
    bound, limit = roofline_time(flops, moved, H200["peak"], H200["bandwidth"])
    name = f"{phase} {batch} × {tokens}"
    gpu_points[name] = (intensity, flops / measured)
    print(
        f"{name:17} {1e6 * measured:5.0f} µs, roofline {1e6 * bound:4.0f} µs ({limit}): "
        f"{bound / measured:4.0%} of the speed it allows; {moved / measured / 1e12:.2f} TB/s"
    )

# %% tags=["experiment", "figure"]
# Figure: measured steps below the roof of an H200
fig, ax = plt.subplots(figsize=(7.5, 4.2))
longest = "decode 64 × 16384"  # whose label would lie on another's
plot.roofline(
    {"" if name == longest else name: point for name, point in gpu_points.items()},
    peak=H200["peak"],
    bandwidth=H200["bandwidth"],
    title="one layer of Llama 3 8B's size: roof and measured points",
    ax=ax,
)
ax.annotate(
    longest,
    (gpu_points[longest][0], gpu_points[longest][1] / 1e12),
    textcoords="offset points",
    xytext=(-8, 3),
    ha="right",
    fontsize=8,
)
plot.caption(
    fig,
    "The roof is an H200's data sheet. Decode lies a little below the slope: its speed is that of "
    "the memory. A larger batch climbs; a longer text slides back.",
)
plt.show()

# %% [markdown]
# Every case reaches more than half of what the bound allows, and the one with the most cache to
# read comes closest. The longer a decode step takes, the nearer it is to its bound: each of the
# five kernels takes a few microseconds to start and to end. The prefill is bound by arithmetic, and
# gets two thirds of the data sheet's peak out of the tensor cores. Lessons 29 and 30 write such
# kernels.

# %% [markdown]
# ## Fewer bits: KIVI
#
# Round a group of numbers to $b$ bits: take its smallest and largest, lay $2^b$ levels from one to
# the other, and store for each number which level is nearest:
#
# $$\Delta = \frac{\max - \min}{2^b - 1}, \qquad c = \mathrm{round}\Big(\frac{x - \min}{\Delta}\Big), \qquad \hat x = \min + c\,\Delta, \qquad |\hat x - x| \le \frac{\Delta}{2}.$$
#
# The error follows the *range* of the group. So the question is which numbers share a group. Liu et
# al. (2024) looked at caches and found that keys have channels in which every token is large,
# and values have none. A group of one token's channels puts large and small channels of a key
# together, and the small ones drown. A group of one channel's tokens does not.

# %% tags=["experiment"]
topics = data.split(data.documentation())[1] | data.split(data.source_code())[1]
pieces = [torch.tensor(tokenizer.encode(text)) for text in topics.values()]
windows = torch.stack([piece[:352] for piece in pieces if len(piece) >= 352][:8])  # held out
full = models.Cache()
torch.set_num_threads(1)
with torch.no_grad():
    small(windows[:, :287], cache=full)
torch.set_num_threads(threads)
print(
    f"{len(windows)} held-out texts; {len(full.layers)} layers of {tuple(full.layers[0][0].shape)}"
)

# %% tags=["experiment", "figure"]
# Figure: keys have loud channels, values have not
layer = 3
fig, axes = plt.subplots(2, 1, figsize=(11, 4.6), sharex=True)
for ax, tensor, name in zip(axes, full.layers[layer], ("keys", "values"), strict=True):
    picture = tensor[0, 0, :128].abs().T
    image = ax.imshow(picture, cmap="magma_r", aspect="auto", interpolation="nearest")
    mean = picture.mean(dim=1)
    ax.set(ylabel="channel")
    ax.set_title(
        f"{name}: loudest channel {float(mean.max() / mean.median()):.1f} × the median one"
    )
    ax.grid(False)
    fig.colorbar(image, ax=ax, label="absolute value", pad=0.01)
axes[1].set_xlabel("token")
plot.caption(
    fig,
    f"`small`, layer {layer}, one key–value head, a held-out text. Horizontal stripes above are "
    "channels that are large in every token: a range shared along a row is narrow, one along "
    "a column is wide.",
)
plt.show()

# %% [markdown]
# ### Exercise · Keys per channel, values per token
#
# **KIVI** therefore quantizes keys *per channel*, in groups of $G$ consecutive tokens, and values
# *per token*, in groups of $G$ consecutive channels. Values have a second reason: the output is
# $\sum_j a_j v_j$ with few large $a_j$, and per token the error of an unimportant value stays with
# it.
#
# A group of keys needs $G$ tokens before it can be rounded, while tokens come one by one. So the
# newest tokens stay in full: of $n$ keys the last $n \bmod R$, and of the values the last $R$
# (**residual**). These are also the tokens that attention looks at most.


# %% exercise="quantize_kv" minutes=35 difficulty=3
def quantize_kv(
    k: Tensor, v: Tensor, bits: int = 2, group: int = 32, residual: int = 128
) -> tuple[Tensor, Tensor]:
    """Keys and values as they read back from a KIVI cache, rounded to `bits` bits.

    k, v: (batch, kv_heads, tokens, head_dim), floating; unchanged. The results have their shapes
    and dtypes. bits ≥ 1, group ≥ 1.
    Keys, per channel: the first tokens − tokens % residual tokens are cut into groups of `group`
        consecutive tokens. In each, the numbers of one channel (of one head of one text) share
        their levels. The last tokens % residual tokens come back as they are.
    Values, per token: of all but the last `residual` tokens (of none, if there are no more), each
        token's channels are cut into groups of `group` consecutive channels, which share their
        levels. The last `residual` tokens come back as they are.
    Levels of a group: 2**bits, evenly spaced from its minimum to its maximum. A number goes to the
        nearest level (torch.round of (x − min)/Δ), however small the range is (Δ is 0 or at least
        1.2e-38, no subnormal number). A group of equal numbers comes back as it is. Computed in
        float32 (float64 for float64), then cast, k and v each for itself.
    ValueError if residual is not positive, or group does not divide both residual and head_dim, for
        any number of tokens.

    bits=1, group=4, residual=4, head size 4, 5 tokens: the keys 0, 2, 4, 8 of one channel (tokens 0
    to 3) become 0, 0, 0, 8 (4 lies in the middle, and torch.round takes the even code), token 4
    stays; the value (0, 7, 1, 10) of token 0 becomes (0, 10, 0, 10), tokens 1 to 4 stay.
    """
    ### BEGIN SOLUTION
    tokens, head_dim = k.shape[-2:]
    if residual <= 0 or residual % group or head_dim % group:
        raise ValueError(f"group {group} must divide residual {residual} and head_dim {head_dim}")

    def nearest(x: Tensor, dim: int) -> Tensor:
        """x with groups along `dim`, on the levels of each group."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
        delta = (high - low) / (2**bits - 1)
        codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
        return (low + codes * delta).to(x.dtype)

    k, v = k.clone(), v.clone()
    old = tokens - tokens % residual
    if old:
        k[..., :old, :] = nearest(k[..., :old, :].unflatten(-2, (-1, group)), -2).flatten(-3, -2)
    old = max(tokens - residual, 0)
    if old:
        v[..., :old, :] = nearest(v[..., :old, :].unflatten(-1, (-1, group)), -1).flatten(-2)
    return k, v
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: groups as an axis</summary>
#
# `x.unflatten(dim, (-1, group))` makes the group an axis of its own; take minimum and maximum over
# it with `keepdim=True`. For keys the tokens are unflattened, for values the channels.
# </details>
#
# <details><summary>Hint: 0/0</summary>
#
# Where all numbers of a group are equal, Δ = 0. Divide by 1 there: the codes are 0 and the minimum
# is right.
# </details>

# %% check="quantize_kv" points=2
x = torch.tensor([[0.0, 0.0], [1.0, 10.0], [4.0, 40.0], [6.0, 44.0], [9.0, 9.0]]).view(1, 1, 5, 2)
# Groups of two tokens: each number is the minimum or the maximum of its group.
k_hat, v_hat = checks.parts(quantize_kv(x, x, bits=1, group=2, residual=2), "k", "v")
checks.close(k_hat, x, what="keys whose groups hold two tokens", hint="per channel, over tokens")
y = torch.tensor([[0.0, 7.0, 1.0, 10.0], [2.0, 5.0, 3.0, 3.0], [4.0, 4.0, 9.0, 1.0]])
y = torch.cat([y, torch.tensor([[8.0, 6.0, 5.0, 2.0], [1.0, 2.0, 3.0, 4.0]])]).view(1, 1, 5, 4)
k_hat, v_hat = quantize_kv(y, y, bits=1, group=4, residual=4)
checks.close(
    k_hat[0, 0, :4, 0],
    torch.tensor([0.0, 0.0, 0.0, 8.0]),
    what="channel 0 of the keys 0, 2, 4, 8 at one bit",
    hint="Levels are 0 and 8; 4 lies in the middle, and torch.round takes the even code, 0",
)
checks.close(
    v_hat[0, 0, 0],
    torch.tensor([0.0, 10.0, 0.0, 10.0]),
    what="the oldest value (0, 7, 1, 10) at one bit",
    mistakes={"left in full": torch.tensor([0.0, 7.0, 1.0, 10.0])},
)
checks.close(v_hat[0, 0, 1:], y[0, 0, 1:], what="the last 4 values", hint="They stay in full")
### BEGIN HIDDEN TESTS
g = checks.generator(7)


def on_levels(numbers, bits):
    """Each number on the nearest of the levels of all of them, in plain floats."""
    low, high = min(numbers), max(numbers)
    levels = [low + (high - low) * i / (2**bits - 1) for i in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - x)) for x in numbers]


def by_hand(k, v, bits, group, residual):
    """KIVI group by group, in float64."""
    k, v = k.double().clone(), v.double().clone()
    batch, heads, tokens, size = k.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(0, tokens - tokens % residual, group):
                for c in range(size):
                    part = k[b, h, t : t + group, c]
                    part.copy_(torch.tensor(on_levels(part.tolist(), bits), dtype=k.dtype))
            for t in range(max(tokens - residual, 0)):
                for c in range(0, size, group):
                    part = v[b, h, t, c : c + group]
                    part.copy_(torch.tensor(on_levels(part.tolist(), bits), dtype=v.dtype))
    return k, v


# No groups of two: both numbers are ends of the range, and rounding leaves no trace.
for shape, bits, group, residual in [
    ((2, 2, 19, 8), 2, 4, 8),
    ((1, 3, 16, 4), 3, 4, 4),
    ((2, 1, 7, 6), 2, 3, 9),
    ((1, 1, 9, 3), 4, 3, 3),
    ((1, 2, 1, 4), 1, 4, 4),
    ((1, 2, 25, 6), 1, 3, 6),
]:
    batch, heads, tokens, size = shape
    k, v = (
        normal(batch, tokens, heads, size, generator=g, dtype=torch.float64).transpose(1, 2)
        for _ in range(2)
    )
    k = k * torch.tensor([1.0, 30.0] * size)[:size] + 3  # a loud channel beside a quiet one
    with checks.unchanged(k=k, v=v):
        k_hat, v_hat = quantize_kv(k, v, bits, group, residual)
    right_k, right_v = by_hand(k, v, bits, group, residual)
    swapped_v, swapped_k = by_hand(v, k, bits, group, residual)
    where = f"{tokens} tokens, {bits} bits, group {group}, residual {residual}"
    checks.close(
        k_hat,
        right_k,
        rtol=1e-9,
        what=f"keys, {where}",
        mistakes={"keys per token": swapped_k, "no rounding": k},
    )
    checks.close(
        v_hat,
        right_v,
        rtol=1e-9,
        what=f"values, {where}",
        mistakes={"values per channel": swapped_v, "no rounding": v},
    )
# Keys and values of two formats: each is computed in its own.
wide = normal(2, 1, 13, 8, generator=g, dtype=torch.float64) + 3
for k, v in ((wide, wide.float()), (wide.float(), wide), (wide.bfloat16(), wide)):
    for found, right, given in zip(
        quantize_kv(k, v, 3, 4, 4), by_hand(k, v, 3, 4, 4), (k, v), strict=True
    ):
        assert found.dtype == given.dtype, f"{given.dtype} comes back as {found.dtype}"
        if given.dtype != torch.bfloat16:  # in which two codes can be equally near
            fine = 1e-9 if given.dtype == torch.float64 else 1e-5
            checks.close(found, right, rtol=fine, what=f"{given.dtype} beside another format")
### END HIDDEN TESTS

# %% check="quantize_kv" points=1
x = torch.full((1, 1, 4, 2), 3.0)
k_hat, v_hat = quantize_kv(x, x, bits=2, group=2, residual=2)
checks.close(k_hat, x, what="keys that are all equal", hint="Δ = 0: do not divide by it")
checks.raises(ValueError, quantize_kv, x, x, 2, 2, 3, because="group 2 does not divide residual 3")
### BEGIN HIDDEN TESTS
g = checks.generator(8)
checks.close(v_hat, x, what="values that are all equal")
checks.raises(ValueError, quantize_kv, x, x, 2, 4, 4, because="group 4 does not divide head_dim 2")
checks.raises(ValueError, quantize_kv, x, x, 2, 2, 0, because="the residual is 0")
for tokens in (0, 1, 4):  # also where nothing is rounded
    short = x[:, :, :tokens]
    for group, residual in ((2, 9), (4, 8), (2, -2)):
        checks.raises(ValueError, quantize_kv, short, short, 2, group, residual)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    k, v = ((5 + normal(2, 2, 20, 8, generator=g)).to(dtype) for _ in range(2))
    v[0, 0, 0] = torch.tensor([-6e4, 6e4] * 4).to(dtype)  # whose range is more than float16 holds
    k_hat, v_hat = quantize_kv(k, v, 4, 4, 8)
    assert k_hat.dtype == v_hat.dtype == dtype, f"results have dtype {k_hat.dtype}, inputs {dtype}"
    unit = torch.finfo(dtype).eps
    for found, exact, dim, old in ((k_hat, k, -2, 16), (v_hat, v, -1, 12)):
        wide = exact[..., :old, :].double().unflatten(dim, (-1, 4))
        axis = -2 if dim == -2 else -1
        half = (wide.amax(axis, keepdim=True) - wide.amin(axis, keepdim=True)) / 30
        error = (found[..., :old, :].double().unflatten(dim, (-1, 4)) - wide).abs()
        allowed = half * (1 + 1e-3) + 2 * unit * wide.abs()
        assert bool((error <= allowed).all()), (
            f"in {dtype} an error is more than half a step: compute in float32, then cast"
        )
        checks.close(found[..., old:, :], exact[..., old:, :], what="the residual", dtype=dtype)
# Numbers 2**30 times as small, or as large, come back so: a power of two rounds nothing.
k, v = normal(2, 1, 13, 8, generator=g), normal(2, 1, 13, 8, generator=g)
whole = quantize_kv(k, v, 2, 4, 4)
for scale in (2.0**-30, 2.0**-100, 2.0**30):
    for found, right, name in zip(
        quantize_kv(scale * k, scale * v, 2, 4, 4), whole, ("keys", "values"), strict=True
    ):
        checks.close(found / scale, right, what=f"{name} of a range of about {4 * scale:.0e}")
k, v = normal(1, 1, 3, 4, generator=g), normal(1, 1, 3, 4, generator=g)
alone_k, alone_v = quantize_kv(k, v, 2, 1, 1)  # groups of one number
checks.close(alone_k, k, what="keys in groups of one")
checks.close(alone_v, v, what="values in groups of one")
for tokens in (0, 1):
    k_hat, v_hat = quantize_kv(k[:, :, :tokens], v[:, :, :tokens], 2, 4, 4)
    checks.close(k_hat, k[:, :, :tokens], what=f"{tokens} keys")
    checks.close(v_hat, v[:, :, :tokens], what=f"{tokens} values")
### END HIDDEN TESTS

# %% [markdown]
# ## Fewer tokens: heavy hitters
#
# Attention is uneven: in most heads a few keys receive most of the weight, step after step. **H2O**
# (Zhang et al. 2023) keeps those and evicts the rest. Its score of a cached token is the attention
# that it has received so far,
#
# $$s_j = \sum_{i \ge j} a_{ij},$$
#
# summed over all queries, of the prompt and of every decode step since. Query heads that share a
# key–value head add up, because they share what is evicted: each key–value head keeps tokens of its
# own.
#
# A sum favors the old: token 0 has been seen by every query, the newest by one. Without a
# correction the newest tokens would mostly go first. So half of the budget is reserved for the most
# recent tokens and half for the heaviest of the others. Kept keys stay rotated as they were: the
# token at position 7 stays at position 7, whatever is gone around it.


# %% exercise="accumulate_attention" minutes=10 difficulty=1 path="more"
def accumulate_attention(weights: Tensor, kv_heads: int, past: Tensor | None = None) -> Tensor:
    """The attention that each cached token has received so far, for each key–value head.

    weights: (batch, heads, new, keys), attention weights of the new queries; key–value head h is
        shared by the query heads h · heads/kv_heads and the next ones. Unchanged.
    past: (batch, kv_heads, at most keys), what earlier steps gave: the score of the first keys; the
        others are new. None: nothing yet. Unchanged.
    Returns (batch, kv_heads, keys): the sum over queries and over the query heads of a group, plus
    the past; added and returned in float32, or in float64 where weights are, whatever past is.

    One query head, weights (1, 0), (¼, ¾): scores 1.25, 0.75. Then (½, ¼, ¼): 1.75, 1.0, 0.25.
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(weights.dtype, torch.float32)
    scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
    if past is not None:
        scores[..., : past.shape[-1]] += past.to(wide)
    return scores
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which heads form a group?</summary>
#
# Consecutive ones: `weights.unflatten(1, (kv_heads, -1))` has axes (batch, kv_heads, group, new,
# keys).
# </details>

# %% check="accumulate_attention" points=1
w = torch.tensor([[1.0, 0.0], [0.25, 0.75]]).view(1, 1, 2, 2)
scores = accumulate_attention(w, 1)
checks.close(scores, torch.tensor([[[1.25, 0.75]]]), what="scores after two queries")
scores = accumulate_attention(torch.tensor([0.5, 0.25, 0.25]).view(1, 1, 1, 3), 1, scores)
checks.close(
    scores,
    torch.tensor([[[1.75, 1.0, 0.25]]]),
    what="scores after a third",
    mistakes={
        "forgetting the past": torch.tensor([[[0.5, 0.25, 0.25]]]),
        "adding the past to the last keys": torch.tensor([[[0.5, 1.5, 1.0]]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(9)
for batch, heads, kv, new, keys, old in [
    (2, 6, 2, 3, 7, 4),
    (1, 4, 4, 1, 5, 5),
    (3, 4, 1, 2, 1, 0),
]:
    w = normal(batch, new, heads, keys, generator=g).softmax(-1).transpose(1, 2)
    past = normal(batch, kv, old, generator=g).abs()
    with checks.unchanged(weights=w, past=past):
        found = accumulate_attention(w, kv, past)
    expected = torch.zeros(batch, kv, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(new):
                expected[b, h // (heads // kv)] += w[b, h, q].double()
    expected[..., :old] += past.double()
    checks.close(found, expected, what=f"scores of {heads} heads on {kv}", dtype=torch.float32)
    checks.close(
        accumulate_attention(w, kv),
        expected - F.pad(past.double(), (0, keys - old)),
        rtol=1e-4,
        what="scores without a past",
    )
many = torch.full((1, 2, 600, 3), 1 / 3, dtype=torch.bfloat16)
exact = many.double().sum() / 3
checks.close(
    accumulate_attention(many, 1)[0, 0, 0],
    exact,
    rtol=1e-4,
    what="a sum of 1,200 bfloat16 weights",
    hint="Sum in float32: a bfloat16 sum stops growing",
    dtype=torch.float32,
)
assert accumulate_attention(many.double(), 1).dtype == torch.float64, "float64 stays float64"
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    w = normal(1, 6, 3, 5, generator=g).softmax(-1).to(dtype)
    exact = w.double().unflatten(1, (2, 3)).sum(dim=(2, 3))
    result = torch.float64 if dtype == torch.float64 else torch.float32
    for past in (torch.float32, torch.float64):
        checks.close(
            accumulate_attention(w, 2, torch.ones(1, 2, 5, dtype=past)),
            exact + 1,
            rtol=1e-6,
            what=f"scores of {dtype} weights, with a {past} past",
            hint="Every sum, over heads too, is made in the format of the result",
            dtype=result,
        )
### END HIDDEN TESTS


# %% exercise="heavy_hitter_evict" minutes=15 difficulty=2 path="more"
def heavy_hitter_evict(scores: Tensor, budget: int) -> Tensor:
    """Which cached tokens H2O keeps, for each text and key–value head.

    scores: (batch, kv_heads, tokens), the attention that each token has received; unchanged.
    budget: how many tokens may stay, ≥ 0. With tokens ≤ budget all of them stay.
    The last budget − budget // 2 tokens stay whatever their score. Of the others the budget // 2
    with the highest scores stay; of equal scores the earlier token.

    Returns (batch, kv_heads, min(tokens, budget)), int64: their positions, in rising order.

    Scores 5, 1, 4, 4, 0, 2 and a budget of 4: tokens 4 and 5 are recent, 0 and 2 are heavy:
    [0, 2, 4, 5]. With a budget of 3: [0, 4, 5].
    """
    ### BEGIN SOLUTION
    batch, kv_heads, tokens = scores.shape
    if tokens <= budget:
        return torch.arange(tokens, device=scores.device).expand(batch, kv_heads, tokens).clone()
    heavy = budget // 2
    older = tokens - (budget - heavy)
    order = scores[..., :older].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
    recent = torch.arange(older, tokens, device=scores.device).expand(batch, kv_heads, -1)
    return torch.cat([order.sort(dim=-1).values, recent], dim=-1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: equal scores</summary>
#
# `topk` promises no order among equals. `sort(descending=True, stable=True)` keeps the earlier
# first.
# </details>

# %% check="heavy_hitter_evict" points=1
scores = torch.tensor([[[5.0, 1.0, 4.0, 4.0, 0.0, 2.0]]])
for budget, expected in [(4, [0, 2, 4, 5]), (3, [0, 4, 5]), (6, [0, 1, 2, 3, 4, 5]), (1, [5])]:
    checks.close(
        heavy_hitter_evict(scores, budget)[0, 0],
        torch.tensor(expected),
        what=f"what a budget of {budget} keeps of scores 5, 1, 4, 4, 0, 2",
    )
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for batch, heads, tokens, budget in [
    (2, 3, 12, 5),
    (1, 2, 12, 6),
    (2, 1, 5, 9),
    (3, 2, 7, 1),
    (1, 1, 4, 0),
    (2, 2, 6, 6),
    (1, 2, 60, 31),
    (1, 1, 0, 3),
]:
    scores = torch.randint(0, 6, (tokens, heads, batch), generator=g).float().permute(2, 1, 0)
    with checks.unchanged(scores=scores):
        kept = heavy_hitter_evict(scores, budget)
    size = min(tokens, budget)
    assert tuple(kept.shape) == (batch, heads, size), (
        f"the result has shape {tuple(kept.shape)} for {tokens} tokens and a budget of {budget}"
    )
    for b in range(batch):
        for h in range(heads):
            if tokens <= budget:
                right = list(range(tokens))
            else:
                recent = list(range(tokens - math.ceil(budget / 2), tokens))
                row = scores[b, h].tolist()
                others = sorted(range(recent[0] if recent else tokens), key=lambda i: (-row[i], i))
                right = sorted(others[: budget // 2] + recent)
            checks.close(
                kept[b, h],
                torch.tensor(right, dtype=torch.long),
                what=f"{row if size else ''} kept" if tokens > budget else "everything kept",
            )
low = torch.tensor([[[-3.0, -1.0, -2.0, -9.0, -8.0]]])
checks.close(heavy_hitter_evict(low, 2)[0, 0], torch.tensor([1, 4]), what="negative scores")
large = torch.full((1, 1, 6), 2.0**25)  # where a float32 plus 1 is itself
checks.close(heavy_hitter_evict(large, 4)[0, 0], torch.tensor([0, 1, 4, 5]), what="large scores")
close = 1 + torch.tensor([[[0.0, 1, 3, 2, 0, 0]]]) * 2**-22  # a few units in the last place apart
checks.close(heavy_hitter_evict(close, 4)[0, 0], torch.tensor([2, 3, 4, 5]), what="close scores")
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment · What a smaller cache costs
#
# **Question.** `small` reads 287 tokens and keeps a smaller cache of them. How much worse does it
# predict the next 64? And how well does it copy, which needs single tokens of the past exactly?
#
# **Predict first.** Which hurts more: everything at 2 bits, or at 16 bits only 64 tokens of the
# 287? Does it matter at 2 bits whether keys are grouped per channel (KIVI) or per token? Does H2O
# beat the plain rule "keep the most recent" on text? On copying? Write down four answers.
#
# For copying, 254 random tokens follow `<|endoftext|>`, then 32 tokens of the second copy are read;
# the next 64 are predicted. With residual 32 the newest 31 keys and 32 values stay in full. Scores
# are the sums of attention over the prompt, and eviction happens once, after it.


# %% tags=["experiment"]
def attention_scores(model, tokens):
    """For each layer: the attention each token receives, (batch, kv_heads, tokens)."""
    weights = attention_weights(model, tokens)  # (layers, batch, heads, seq, seq)
    return [accumulate_attention(w, model.config.kv_heads) for w in weights]


def go_on(model, layers, tokens, start):
    """(nats, share right) of tokens[:, start + 1:] with the cache `layers` of those before."""
    cache = models.Cache()
    cache.layers = list(layers)
    places = torch.arange(start, tokens.shape[1] - 1)
    logits = model(tokens[:, start:-1], cache=cache, positions=places)
    target = tokens[:, start + 1 :]
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return float(nats), float((logits.argmax(-1) == target).float().mean())


def gathered(layers, kept):
    """The cache with only these positions of each layer and head."""
    return [
        tuple(t.gather(2, rows[..., None].expand(-1, -1, -1, t.shape[-1])) for t in pair)
        for pair, rows in zip(layers, kept, strict=True)
    ]


def measure(tokens, start):
    """{(kind, bits or budget): (nats, share right)}."""
    cache, found = models.Cache(), {}
    small(tokens[:, :start], cache=cache)
    found["full", 16] = go_on(small, cache.layers, tokens, start)
    for bits in (8, 4, 3, 2):
        as_keys, as_values = (
            [tuple(quantize_kv(t, t, bits, 32, 32)[side] for t in pair) for pair in cache.layers]
            for side in (0, 1)
        )
        kivi = [(a[0], b[1]) for a, b in zip(as_keys, as_values, strict=True)]
        found["KIVI", bits] = go_on(small, kivi, tokens, start)
        if bits < 4:
            found["per channel", bits] = go_on(small, as_keys, tokens, start)
            found["per token", bits] = go_on(small, as_values, tokens, start)
    scores = attention_scores(small, tokens[:, :start])
    for budget in (192, 128, 64, 32):
        kept = [heavy_hitter_evict(s, budget) for s in scores]
        last = [torch.arange(start - budget, start).expand(*k.shape) for k in kept]
        found["H2O", budget] = go_on(small, gathered(cache.layers, kept), tokens, start)
        found["recent", budget] = go_on(small, gathered(cache.layers, last), tokens, start)
    return found


def copies(seed, count=8):
    """<|endoftext|>, 254 random tokens, and the first 97 of them again."""
    g = torch.Generator().manual_seed(seed)
    string = torch.randint(16, config.vocab_size, (count, 254), generator=g)
    return torch.cat([torch.full((count, 1), tokenizer.eos), string, string[:, :97]], dim=1)


torch.set_num_threads(1)
with torch.no_grad():
    on_text, on_copies = measure(windows, 287), measure(copies(0), 287)
    for side, name in enumerate(("keys", "values")):
        errors = [0.0, 0.0]
        for pair in full.layers:
            exact = pair[side][:, :, :255]
            for i, found in enumerate(quantize_kv(pair[side], pair[side], 2, 32, 32)):
                errors[i] += float((found[:, :, :255] - exact).norm() / exact.norm()) / 7
        print(f"{name} at 2 bits: error {errors[0]:.0%} per channel, {errors[1]:.0%} per token")
torch.set_num_threads(threads)
print(f"{'cache':>14}  text, nats  copied")
for key, (nats, _) in on_text.items():
    print(f"{key[0]:>11} {key[1]:4}  {nats:8.3f}  {on_copies[key][1]:6.0%}")

# %% tags=["experiment", "figure"]
# Figure: quality against the size of the cache
fig, axes = plt.subplots(1, 2, figsize=(11, 4))
size = cache_bytes([LayerCache(2, 32)] * 7, [287])
rounded = (256 + 255) / (2 * 287)  # share of the numbers that are rounded
share = {}
for kind, number in on_text:
    if kind in ("full", "H2O", "recent"):
        share[kind, number] = 1.0 if kind == "full" else number / 287
    else:  # a 16-bit minimum and step for each group of 32: one bit more a number
        share[kind, number] = rounded * (number + 1) / 16 + 1 - rounded
for ax, results, part, label, title in (
    (axes[0], on_text, 0, "nats a token", "text: less is better"),
    (axes[1], on_copies, 1, "share right", "copying: more is better"),
):
    for i, kind in enumerate(("KIVI", "per token", "H2O", "recent")):
        keys = sorted((key for key in results if key[0] in (kind, "full")), key=share.get)
        ax.plot(
            [share[key] for key in keys],
            [results[key][part] for key in keys],
            marker="osD^"[i],
            markersize=5,
            label={"per token": "keys and values per token"}.get(kind, kind),
        )
    ax.set(xlabel="share of the cache's bytes", ylabel=label)
    ax.set_title(title)
axes[0].legend(fontsize=8)
plot.caption(
    fig,
    f"`small`, 287 tokens cached ({size:,} bytes at 16 bits), the next 64 predicted, 8 rows. "
    "Minima and steps of the groups are counted, 16 bits each. KIVI's points are 8, 4, 3 and 2 "
    "bits, H2O's 192, 128, 64 and 32 tokens.",
)
plt.show()

# %% [markdown]
# **What came out.** The cells above print one draw; the sentences here hold in each of five, with
# other texts and other strings.
#
# *Bits.* 8 and 4 bits cost nothing that shows, 3 bits next to nothing. At 2 bits text suffers a
# little, and copying loses a clear part.
#
# *Tokens.* At a fifth fewer bytes than 2 bits take, 64 tokens of 287 cost at least twice as many
# nats, and nearly all of the copying. Evicting is the worse bargain here.
#
# *Which axis.* The keys' error at 2 bits is about half as large per channel as per token, as the
# picture promised. The predictions follow only in part: on text KIVI was ahead in four draws of
# five; on copying keys per token were slightly ahead in all. What counts is the error of the scores
# after the softmax. KIVI's authors found a large difference in much larger models.
#
# *H2O.* On text neither H2O nor the most recent tokens were ahead throughout: the next token
# depends on its neighbors. On copying the most recent are useless, as the string to be copied
# begins at the other end; H2O saves some of it, though its scores cannot know what will be asked.
# Large models send much attention to their first token, which H2O then keeps; `small` does not.

# %% [markdown]
# ## The cache between requests: a chat of ten turns
#
# In a chat each request repeats everything said so far: system prompt, all questions, all answers,
# one new question. The server has had all of it in its cache a moment ago. If it keeps the cache
# until the next turn, only the new part needs prefill. A key depends on all tokens before it, so
# what can be reused is the longest common *prefix* of the new request and what is cached, and
# nothing after the first difference, however much of it is the same.
#
# Two details. The last token of a reply is chosen and sent, but never passed through the model, so
# it is not in the cache. And a request needs logits after its last token, so that token is passed
# even if its key is there.
#
# ### Exercise · Tokens saved by prefix reuse


# %% exercise="prefill_tokens" minutes=15 difficulty=2 path="more"
def prefill_tokens(
    requests: list[list[int]], replies: list[list[int]], reuse: bool = True
) -> list[int]:
    """How many tokens each turn of a chat passes in its prefill: one int for each request.

    requests[i]: all ids that are sent in turn i (never empty). replies[i]: the ids that the model
    writes after them (perhaps none). The cache holds what passed in the turn before: requests[i −
    1] and replies[i − 1] without its last id; nothing at first. With reuse, the longest common
    prefix of that and requests[i] is not passed again, but at least the last token of a request
    always passes. Without reuse every request passes whole. The lists stay unchanged.

    Requests [1, 2], then [1, 2, 3, 4, 5], with the reply [3, 4] between: 2 tokens and 2 tokens (1,
    2, 3 are cached).
    """
    ### BEGIN SOLUTION
    passed, cached = [], []
    for request, reply in zip(requests, replies, strict=True):
        common = 0
        while reuse and common < min(len(request) - 1, len(cached)):
            if request[common] != cached[common]:
                break
            common += 1
        passed.append(len(request) - common)
        cached = [*request, *reply[:-1]]
    return passed
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a prefix, not a set</summary>
#
# Count positions from the front while the ids agree, and stop at the first that does not. The
# request may be shorter than the cache, or equal to it.
# </details>

# %% check="prefill_tokens" points=1
answer = prefill_tokens([[1, 2], [1, 2, 3, 4, 5]], [[3, 4], [6]])
checks.kind(answer, list, what="prefill_tokens")
assert list(answer) == [2, 2], (
    f"2 tokens, then 4 and 5 (the reply's last token was never passed); yours: {answer}"
)
answer = prefill_tokens([[1, 2], [1, 2, 3, 4, 5]], [[3, 4], [6]], reuse=False)
assert list(answer) == [2, 5], f"without reuse 2 and 5 tokens; yours: {answer}"
answer = prefill_tokens([[7, 8, 9]] * 2, [[1], [1]])
assert list(answer) == [3, 1], f"the same request again passes its last token; yours: {answer}"
### BEGIN HIDDEN TESTS
g = checks.generator(11)


def draw(low, high, size):
    return torch.randint(low, high, (size,), generator=g).tolist()


for _ in range(60):
    requests, replies, text = [], [], draw(0, 3, 1 + draw(0, 4, 1)[0])
    for _ in range(1 + draw(0, 5, 1)[0]):
        requests.append(list(text))
        replies.append(draw(0, 3, draw(0, 4, 1)[0]))
        text = [*text, *replies[-1], *draw(0, 3, draw(0, 3, 1)[0])]
        if draw(0, 3, 1)[0] == 0:  # an edit, or a cut: what a template or a user does
            text[draw(0, len(text), 1)[0]] = 9
        if draw(0, 4, 1)[0] == 0:
            text = text[: 1 + draw(0, len(text), 1)[0]]
    for reuse in (True, False):
        expected = []
        for i, request in enumerate(requests):
            cached = [] if i == 0 else requests[i - 1] + replies[i - 1][: len(replies[i - 1]) - 1]
            fits = [n for n in range(len(request)) if request[:n] == cached[:n]]
            expected.append(len(request) - (max(fits) if reuse else 0))
        before = [list(r) for r in requests], [list(r) for r in replies]
        answer = prefill_tokens(requests, replies, reuse)
        assert (requests, replies) == before, "the lists were changed"
        assert list(answer) == expected, (
            f"requests {requests}, replies {replies}, reuse={reuse}: {expected}; yours {answer}"
        )
### END HIDDEN TESTS

# %% tags=["experiment"]
generator = torch.Generator().manual_seed(0)


def said(count):
    return torch.randint(16, 4096, (count,), generator=generator).tolist()


def chat(drop_reasoning, clock, turns=10):
    """Ten turns: a system prompt of 400 tokens, questions of 50, reasoning of 150, answers of 100.

    drop_reasoning: the template removes earlier reasoning. clock: the system prompt tells the time.
    """
    start, history = said(400), []
    requests, replies = [], []
    for _ in range(turns):
        head = said(3) + start if clock else start
        requests.append(head + history + said(50))
        reasoning, answer = said(150), said(100)
        replies.append(reasoning + answer)
        question = requests[-1][len(head) + len(history) :]
        history = history + question + ([] if drop_reasoning else reasoning) + answer
    return requests, replies


kinds = {
    "no reuse": (chat(False, False), False),
    "prefix reuse": (chat(False, False), True),
    "reuse, reasoning dropped": (chat(True, False), True),
    "reuse, the time in front": (chat(False, True), True),
}
per_turn = {name: prefill_tokens(*pair, reuse) for name, (pair, reuse) in kinds.items()}
for name, passed in per_turn.items():
    print(f"{name:25} {sum(passed):6} tokens of prefill in ten turns")

# %% tags=["experiment", "figure"]
# Figure: one clock in the system prompt, and nothing is reused
fig, ax = plt.subplots(figsize=(10, 3.6))
for i, (name, passed) in enumerate(per_turn.items()):
    ax.bar(
        [turn + 0.2 * (i - 1.5) for turn in range(1, 11)],
        passed,
        width=0.19,
        label=name,
        color=plot.COLORS[i],
        hatch=["", "//", "", ".."][i],
        edgecolor="white",
    )
ax.set_xticks(range(1, 11))
ax.set(xlabel="turn", ylabel="tokens of prefill")
ax.set_title("a chat of ten turns")
ax.grid(axis="x", visible=False)
ax.legend(fontsize=8)
plot.caption(
    fig,
    "With reuse a later turn costs its question and one token. A template that drops earlier "
    "reasoning breaks the prefix at the last reply, and costs that reply's answer again. Three "
    "tokens of time at the very front break it at token 0.",
)
plt.show()

# %% [markdown]
# ## Key questions
#
# Those with a number or a choice are graded, one by one. H200: 989 TFLOP/s, 4.8 TB/s, 141 GB, all
# powers of ten. An 8B model here has 32 layers, 32 query heads on 8 key–value heads of size 128,
# and weights of 15 GB; two bytes a number.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | str]:
    """Short answers; numbers to 1 percent.

    "work":      a prompt of 1000 tokens, 200 written. How many times as many tokens pass through
                 the model without a cache as with one?
    "fits":      how many thousand tokens of cache fit on an H200 beside the 8B model's weights?
    "batch":     the 8B model decodes a batch of 64 texts with 8192 cached tokens each. How many
                 times as many bytes of cache as of weights does a step read?
    "bound":     a decode step of that batch on an H200, attention included: "compute" or "memory"?
    "mla":       DeepSeek-V3 has 128 heads of 128 and caches 512 + 64 numbers a token and layer. How
                 many times as many would multi-head attention with these heads cache?
    "bits":      KIVI at 2 bits, groups of 32, each with a 16-bit minimum and a 16-bit step. How
                 many bits does a number of the rounded part take?
    "reserved":  a cache is reserved for 8192 tokens a text, and texts have 500 tokens on average.
                 Which share (0 to 1) of the memory holds nothing?
    """
    ### BEGIN SOLUTION
    entry = 2 * 32 * 8 * 128 * 2
    return {
        "work": (200 * 1000 + 200 * 199 / 2) / (1000 + 199),
        "fits": (141e9 - 15e9) / entry / 1000,
        "batch": 64 * 8192 * entry / 15e9,
        "bound": "memory",
        "mla": 2 * 128 * 128 / (512 + 64),
        "bits": 2 + 2 * 16 / 32,
        "reserved": 1 - 500 / 8192,
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["work"]
checks.kind(answer, float, what="work")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    sum(range(1000, 1200)) / 1199,
    what="work",
    hint="Without a cache the texts are 1000, 1001, … 1199 tokens long",
    mistakes={"the number of written tokens": 200.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["fits"]
checks.kind(answer, float, what="fits")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    126e6 / 131072,
    what="fits",
    hint="A token takes 128 KiB; the answer is in thousands of tokens",
    mistakes={
        "keys alone": 126e6 / 65536,
        "all query heads": 126e6 / 524288,
        "tokens, not thousands": 126e9 / 131072,
        "no weights": 141e6 / 131072,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["batch"]
checks.kind(answer, float, what="batch")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2**36 / 15e9,
    what="batch",
    hint="64 · 8192 tokens of 128 KiB; the weights are read once for the whole batch",
    mistakes={"one text": 2**30 / 15e9, "weights read for each text": 2**30 / 15e9},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bound"]
assert answer in ("compute", "memory"), f"bound is 'compute' or 'memory'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "memory", "bound: compare its FLOPs per byte with 206"
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["mla"]
checks.kind(answer, float, what="mla")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    32768 / 576,
    what="mla",
    hint="A key and a value for each of 128 heads, against 576 numbers",
    mistakes={"keys alone": 16384 / 576, "without the rotary key": 64.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["bits"]
checks.kind(answer, float, what="bits")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    3.0,
    what="bits",
    hint="32 numbers share 32 bits of minimum and step",
    mistakes={"the codes alone": 2.0, "the step alone": 2.5},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["reserved"]
checks.kind(answer, float, what="reserved")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    7692 / 8192,
    to=0.001,
    what="reserved",
    hint="Of 8192 slots 500 are used",
    mistakes={"the share that is used": 500 / 8192},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Why are keys and values cached, and queries not? Would caching the layers'
# inputs in place of keys and values be correct, and when would it be smaller?

# %% [markdown] answer="why-not-queries"
# A query is used in one step, by its own token; keys and values are used by every later token. The
# inputs $x$ of each layer would do, since $K = xW_K$ and $V = xW_V$ can be made from them, but then
# each step multiplies all of them again. They are smaller where the width is less than $2H_{kv}D$:
# half of it for MHA, where width is $HD$; larger for GQA with a group of more than 2. MLA is this
# idea with a learned, smaller $x$, and with $W_K$ moved over to the query so that nothing is made
# again.

# %% [markdown]
# **Open question 2.** Your server decodes at a batch of 32 and the GPU's arithmetic stands at 10 %
# of its peak. A colleague proposes a larger batch, another a 4-bit cache, a third 4-bit weights.
# What would you want to know first?

# %% [markdown] answer="what-to-know"
# How many cached tokens the texts have, because that decides what a step reads. With short texts
# the weights dominate: a larger batch shares them and is nearly free, 4-bit weights help as well.
# With long texts the caches dominate: a larger batch adds as many bytes as tokens and helps little,
# and a 4-bit cache (or a window, or fewer key–value heads) is what cuts them. Then: is there memory
# left for a larger batch at all, and may latency grow?

# %% [markdown]
# **Open question 3.** H2O has evicted a token. In which later situations is that wrong, although
# its score was low? Which checks would reveal it and which would not?

# %% [markdown] answer="evicted"
# Whenever the future asks for something that the past did not: a name mentioned once and asked for
# at the end, a string to be copied, a key in a list. Attention received so far is a forecast that
# the future looks as the past did. Perplexity on ordinary text hardly sees it, as most next tokens
# depend on recent ones. Retrieval tasks with the question *after* the context do, at several
# depths.

# %% [markdown]
# ## References
#
# - **Pope et al. 2022**, *Efficiently Scaling Transformer Inference*, arXiv:2211.05102. Section 2
#   for the cost of prefill and decode, 3.3 for multi-query attention and long contexts.
# - **Liu et al. 2024**, *KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache*,
#   arXiv:2402.02750. Section 3 for the distributions of keys and values, algorithm 1 for residuals.
#   Transformers' quantized cache differs from the paper: by default it groups keys and values
#   alike (`axis_key` and `axis_value` choose).
# - **Zhang et al. 2023**, *H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
#   Language Models*, arXiv:2306.14048. Section 4 for the policy, and why half of it is recent.
# - **Shazeer 2019**, *Fast Transformer Decoding: One Write-Head is All You Need*, arXiv:1911.02150.
#   Section 2.4 has the ratio of memory to arithmetic that was derived here.
# - **Ainslie et al. 2023**, *GQA: Training Generalized Multi-Query Transformer Models from
#   Multi-Head Checkpoints*, arXiv:2305.13245. Section 2.2.
# - **DeepSeek-AI 2024**, *DeepSeek-V3 Technical Report*, arXiv:2412.19437. Section 2.1 for what MLA
#   caches.
#
# In production: transformers, `cache_utils.py` (`DynamicCache`, `StaticCache` and sliding layers;
# its `crop` takes, in version 5.23, the negative number of tokens to *remove*); vLLM,
# `vllm/v1/core/kv_cache_manager.py`, whose blocks are lesson 30; SGLang's radix tree for prefix
# reuse. Rounding of weights is lesson 31, drafts that are taken back lesson 32, servers lesson 34.
