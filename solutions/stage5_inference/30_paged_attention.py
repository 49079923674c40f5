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
#       A KV cache in blocks: an allocator with reference counts, copy-on-write, attention that
#       reads through a block table, in PyTorch and as a split kernel in Triton, and a cache of
#       prefixes.
#     gpu: >-
#       The kernel's bandwidth at full size, beside a plain copy of the cache and beside gathering
#       it for PyTorch's attention.
# ---

# %% [markdown]
# ## The problem: memory that is reserved and not used
#
# A server holds the keys and values of every request it is working on. It does not know how long a
# request will become. Lesson 28's cache asks for a capacity beforehand, one stretch of memory for
# each row, and whoever asks for the longest text allowed wastes nearly all of it on short ones.
#
# Three kinds of loss have names. A slot that no token will ever fill is **internal fragmentation**:
# the stretch was too long. A slot that a later token will fill is not lost but idle: **reserved**.
# And free memory in pieces, each shorter than what the next request wants, is **external
# fragmentation**: enough in sum, useless in parts. Kwon et al. (2023) measured serving systems of
# the time and found 20 to 38 percent of the cache's memory holding tokens. Decoding speed is a
# matter of how many requests share each reading of the weights, so those percents are throughput.
#
# Operating systems had this problem with programs, and solved it in the 1960s with paging. Memory
# is cut into **blocks** (pages) of equal size, a program sees consecutive addresses, and a table
# says where each of its pages really lies. **PagedAttention** does this to the KV cache.

# %% [markdown]
# ## Core ideas
#
# - The pool has $N$ blocks of $S$ slots (16, say); a slot takes one token. A sequence has a **block
#   table**: entry $i$ is the number of the block with its tokens $iS \dots iS + S - 1$.
# - A block is taken when the first token for it comes. At most $S - 1$ slots of a sequence are
#   empty, and any free block is as good as any other: no external fragmentation.
# - Two sequences may have the same block in their tables. A **reference count** says how many do.
#   Who must write into a shared block copies it first: **copy-on-write**.
# - A key depends on all tokens before it, so equal beginnings have equal blocks. A **prefix cache**
#   finds them by a hash of everything up to the block's end.
# - Attention has to follow the table. That costs one more load per block, and a kernel hides it.
#
# | symbol | in code | is |
# |---|---|---|
# | $N$, $S$ | `num_blocks`, `block_size` | blocks of the pool, slots of a block |
# | $n$ | `length` | tokens of a sequence |
# | $H$, $H_{kv}$, $D$ | `heads`, `kv_heads`, `head_dim` | query heads, key–value heads, size of a head |
# | $P$ | `splits` | parts into which the kernel cuts each sequence's keys |
#
# The pool of one layer is a tensor `(num_blocks, kv_heads, block_size, head_dim)`, one for keys and
# one for values. Query head $h$ reads key–value head $\lfloor h / (H/H_{kv}) \rfloor$.

# %%
import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile, tl, triton
from llm40.kernels import autotuned
from llm40.models.llama import angles, rotate
from torch import Tensor

plt = plot.plt

# %% [markdown]
# ## What each strategy reserves
#
# Before paging there were two strategies. Reserve the longest text allowed for every request. Or
# let an allocator hand out powers of two: a request of $n$ tokens gets the smallest $2^k \ge n$,
# less than twice what it needs.
#
# Paging reserves $\lceil n/S \rceil S$. If $n \bmod S$ is as likely to be one value as another, the
# loss is on average a constant number of slots, whatever $n$ is. The losses of the other two grow
# with the limit and with the length.
#
# ### Exercise · Fragmentation


# %% exercise="fragmentation" minutes=8 difficulty=1
def fragmentation(
    lengths: Sequence[int], strategy: str, limit: int = 2048, block_size: int = 16
) -> tuple[int, float]:
    """(slots reserved, share of them that holds no token) for requests of these lengths.

    lengths: how many tokens each request holds, each from 0 to limit < 2⁵³; may be none; unchanged.
    strategy, each request by itself:
        "max":   limit slots.
        "pow2":  the smallest power of two (1, 2, 4, …) that is not below its length, which may be
                 above limit. A request of 0 tokens reserves nothing.
        "paged": whole blocks of block_size ≥ 1 slots, as few as hold its tokens.
    Returns an int and a float from 0 to 1. Where nothing is reserved the share is 0.0.
    ValueError: another strategy; a length below 0 or above limit, whatever the strategy.

    Lengths 5, 16 and 100, limit 128, blocks of 16, 121 tokens in all: "max" reserves 384 slots
    (share 1 − 121/384 = 0.685), "pow2" 8 + 16 + 128 = 152, "paged" 16 + 16 + 112 = 144.
    """
    ### BEGIN SOLUTION
    if strategy not in ("max", "pow2", "paged"):
        raise ValueError(f"the strategy is max, pow2 or paged, not {strategy!r}")
    if any(not 0 <= n <= limit for n in lengths):
        raise ValueError(f"a length is below 0 or above {limit}")
    reserved = 0
    for n in lengths:
        if strategy == "max":
            reserved += limit
        elif strategy == "pow2":
            reserved += 1 << (n - 1).bit_length() if n else 0
        else:
            reserved += math.ceil(n / block_size) * block_size
    return reserved, 1 - sum(lengths) / reserved if reserved else 0.0
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a power of two that is not below n</summary>
#
# Start with 1 and double while it is below n. Or ask an int for its `bit_length()`: that of 100 is
# 7, that of 128 is 8, which is one too many. What has 127?
# </details>

# %% check="fragmentation" points=1
reserved, empty = checks.parts(
    fragmentation([5, 16, 100], "paged", 128, 16), "slots", "share", what="fragmentation"
)
checks.close(
    reserved,
    144,
    what="slots reserved, paged",
    hint="16 tokens fill one block of 16; 5 tokens take one as well",
    mistakes={"one block more where a length fills its blocks": 160, "rounding down": 112},
)
checks.number(empty, 23 / 144, to=1e-9, what="the empty share, paged")
reserved, empty = fragmentation([5, 16, 100], "pow2", 128, 16)
checks.close(reserved, 152, what="slots reserved, pow2", mistakes={"a power above the length": 168})
reserved, empty = fragmentation([5, 16, 100], "max", 128, 16)
checks.close(reserved, 384, what="slots reserved, max", mistakes={"one stretch for all": 128})
checks.number(
    empty, 263 / 384, to=1e-9, what="the empty share, max", mistakes={"the used share": 121 / 384}
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)


def by_counting(lengths, strategy, limit, block_size):
    """Slots that the strategies reserve, one after the other."""
    total = 0
    for n in lengths:
        own = limit if strategy == "max" else 0
        while strategy == "paged" and own < n:
            own += block_size
        powers = [2**i for i in range(20) if 2**i >= n]
        total += powers[0] if strategy == "pow2" and n > 0 else own
    return total


for limit, block_size, count in [(128, 16, 9), (1000, 7, 6), (64, 1, 5), (50, 64, 4), (4, 4, 30)]:
    lengths = [*torch.randint(0, limit + 1, (count,), generator=g).tolist(), limit, 0, 1]
    before = list(lengths)
    for strategy in ("max", "pow2", "paged"):
        reserved, empty = fragmentation(lengths, strategy, limit, block_size)
        where = f"{strategy}, limit {limit}, blocks of {block_size}, lengths {lengths}"
        right = by_counting(lengths, strategy, limit, block_size)
        checks.kind(reserved, int, what="slots reserved")
        checks.close(reserved, right, what=f"slots reserved: {where}")
        checks.number(empty, 1 - sum(lengths) / right, to=1e-9, atol=1e-12, what=f"share: {where}")
    assert lengths == before, "the lengths were changed"
for n, right in ((2**50, 2**50), (2**50 + 1, 2**51)):
    reserved, _ = fragmentation([n], "pow2", 2**51)
    assert reserved == right, (
        f"pow2 reserves {right} slots for {n} tokens; yours: {reserved}. A logarithm is rounded"
    )
reserved, empty = fragmentation([300, 2048, 17], "paged")
checks.close(reserved, 304 + 2048 + 32, what="with the default block of 16")
reserved, empty = fragmentation([300, 2048, 17], "max")
checks.close(reserved, 3 * 2048, what="with the default limit of 2048")
### END HIDDEN TESTS

# %% check="fragmentation" points=1
for strategy in ("pow2", "paged"):
    reserved, empty = fragmentation([0, 0], strategy, 128, 16)
    checks.close(reserved, 0, what=f"slots reserved by two empty requests, {strategy}")
    checks.number(empty, 0.0, to=0.0, what="the empty share of nothing", hint="Nothing is lost")
checks.raises(ValueError, fragmentation, [5], "buddy", because="there is no such strategy")
### BEGIN HIDDEN TESTS
for strategy in ("max", "pow2", "paged"):
    reserved, empty = fragmentation([], strategy, 128, 16)
    checks.close(reserved, 0, what=f"slots reserved without requests, {strategy}")
    checks.number(empty, 0.0, to=0.0, what="the empty share without requests")
    checks.raises(ValueError, fragmentation, [4, 129], strategy, 128, because="129 > limit 128")
    checks.raises(ValueError, fragmentation, [4, -1], strategy, 128, because="a length of -1")
    checks.raises(ValueError, fragmentation, [2049], strategy, because="2049 > limit 2048")
reserved, empty = fragmentation([0, 0], "max", 100)
checks.close(reserved, 200, what="slots reserved by two empty requests, max")
checks.number(empty, 1.0, to=1e-9, what="their empty share")
checks.raises(ValueError, fragmentation, [], "Paged", because="there is no such strategy")
### END HIDDEN TESTS

# %% tags=["experiment"]
# Real lengths: the pages of Python's documentation as `small` reads them, up to 2,048 tokens.
small, tokenizer = models.load("small", device="cpu")
small = small.eval().requires_grad_(False)
config = small.config
pages = {name: tokenizer.encode(text) for name, text in data.documentation().items()}
pages = {name: ids for name, ids in pages.items() if len(ids) <= 2048}
page_lengths = [len(ids) for ids in pages.values()]
LIMIT, SLOTS = 2048, 32_768
print(f"{len(pages)} pages of {min(page_lengths)} to {max(page_lengths)} tokens")
for strategy in ("max", "pow2", "paged"):
    reserved, empty = fragmentation(page_lengths, strategy, LIMIT)
    print(
        f"{strategy:5}: {reserved:7,} slots for all of them, {empty:4.0%} empty; a pool of "
        f"{SLOTS:,} slots takes {SLOTS * len(pages) / reserved:5.1f} such requests"
    )

# %% [markdown]
# ## An allocator of blocks
#
# The allocator knows nothing about tokens. It keeps a list of free blocks and, for each block, its
# reference count: how many tables (or caches) name it. Three operations:
#
# | operation | reference count |
# |---|---|
# | *allocate* | 0 → 1: the block leaves the free list |
# | *share* | + 1 |
# | *free* | − 1; at 0 the block is free again |
#
# Two rules keep a server alive. An operation that fails changes nothing, since the caller will try
# something else: evict, wait, or take another request's blocks away. And a block that is freed once
# too often is an error at once. Otherwise two requests get the same block later, and each reads the
# other's keys, without any message.
#
# ### Exercise · The allocator


# %%
class OutOfBlocks(RuntimeError):
    """There are fewer free blocks than are asked for."""


# %% exercise="block_allocator" minutes=15 difficulty=2
class BlockAllocator:
    """Which of the blocks 0 … num_blocks − 1 are free, and how often each of the others is in use.

    A method that raises has changed nothing. Lists that are passed in stay unchanged.
    """

    def __init__(self, num_blocks: int) -> None:
        ### BEGIN SOLUTION
        self._free = deque(range(num_blocks))
        self._counts = [0] * num_blocks
        ### END SOLUTION

    @property
    def available(self) -> int:
        """How many blocks are free; at first all of them."""
        ### BEGIN SOLUTION
        return len(self._free)
        ### END SOLUTION

    def references(self, block: int) -> int:
        """The reference count of a block: 0 where it is free. ValueError where there is none."""
        ### BEGIN SOLUTION
        if not 0 <= block < len(self._counts):
            raise ValueError(f"there is no block {block}")
        return self._counts[block]
        ### END SOLUTION

    def allocate(self, count: int) -> list[int]:
        """`count` ≥ 0 different free blocks, in any order, which are then in use once each.

        OutOfBlocks if fewer are free.
        """
        ### BEGIN SOLUTION
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks are asked for, {len(self._free)} are free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._counts[block] = 1
        return blocks
        ### END SOLUTION

    def share(self, blocks: list[int]) -> None:
        """One more reference to each block, for each time that it is named.

        ValueError if one of them is free or does not exist.
        """
        ### BEGIN SOLUTION
        for block in blocks:
            if self.references(block) == 0:
                raise ValueError(f"block {block} is not in use")
        for block in blocks:
            self._counts[block] += 1
        ### END SOLUTION

    def free(self, blocks: list[int]) -> None:
        """One reference less to each block, for each time that it is named; at 0 it is free.

        ValueError if one of them is named more often than it has references, or does not exist.
        """
        ### BEGIN SOLUTION
        for block, times in Counter(blocks).items():
            if self.references(block) < times:
                raise ValueError(f"block {block} is freed more often than it is in use")
        for block in blocks:
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free.append(block)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all or nothing</summary>
#
# Look at the whole list before you change anything. A list such as [3, 3] on a block with one
# reference passes a test of each entry alone: count how often a block is named
# (`collections.Counter`), and compare that with its references.
# </details>

# %% check="block_allocator" points=1
pool = BlockAllocator(3)
mine = pool.allocate(2)
checks.kind(mine, list, what="allocate(2)")
assert sorted(mine) in ([0, 1], [0, 2], [1, 2]), (
    f"two different blocks of 0, 1, 2 are asked for; yours: {mine}"
)
assert pool.available == 1, f"after 2 of 3 blocks 1 is available; yours: {pool.available}"
checks.raises(OutOfBlocks, pool.allocate, 2, because="one block is free")
pool.share([mine[0]])
pool.free(mine)
assert [pool.references(b) for b in mine] == [1, 0], (
    f"one block was shared, then both freed once: reference counts 1 and 0; yours: "
    f"{[pool.references(b) for b in mine]}"
)
assert pool.available == 2, f"one block is still in use, 2 are free; yours: {pool.available}"
### BEGIN HIDDEN TESTS
g = checks.generator(2)


def draw(high):
    return int(torch.randint(0, high, (1,), generator=g))


for size in (1, 4, 9):
    pool, model = BlockAllocator(size), [0] * size
    for turn in range(70):
        used = [b for b in range(size) if model[b]]
        kind = draw(4) if used else 0
        if kind == 0:
            count = draw(size + 2)
            if count > model.count(0):
                checks.raises(OutOfBlocks, pool.allocate, count)
            else:
                blocks = pool.allocate(count)
                checks.kind(blocks, list, what="allocate")
                assert len(blocks) == len(set(blocks)) == count, (
                    f"allocate({count}) gave {blocks}: so many different blocks are asked for"
                )
                for b in blocks:
                    checks.kind(b, int, what="a block")
                    assert b in range(size), f"there is no block {b}"
                    assert model[b] == 0, f"block {b} was not free"
                    model[b] = 1
        else:
            blocks = [used[draw(len(used))] for _ in range(draw(4))]
            given = list(blocks)
            if kind == 1:
                pool.share(given)
            elif all(blocks.count(b) <= model[b] for b in blocks):
                pool.free(given)
            else:
                checks.raises(ValueError, pool.free, given, because=f"{blocks}, counts {model}")
                kind = None
            assert given == blocks, "the list that was passed in was changed"
            for b in blocks if kind else []:
                model[b] += 1 if kind == 1 else -1
        found = [pool.references(b) for b in range(size)]
        assert found == model, f"reference counts are {found}, should be {model} (turn {turn})"
        assert pool.available == model.count(0), (
            f"{pool.available} blocks are available; the counts {model} say {model.count(0)}"
        )
assert BlockAllocator(5).available == 5, "at first all blocks are available"
other = BlockAllocator(2)
other.allocate(2)
assert BlockAllocator(2).available == 2, "two allocators share their state"
### END HIDDEN TESTS

# %% check="block_allocator" points=1
pool = BlockAllocator(4)
a, b, c = pool.allocate(3)
checks.raises(ValueError, pool.free, [a, b, a], because="it names a block twice that is used once")
assert [pool.references(x) for x in (a, b, c)] == [1, 1, 1], (
    "a free that is refused changes nothing; yours: "
    f"{[pool.references(x) for x in (a, b, c)]} in place of [1, 1, 1]"
)
### BEGIN HIDDEN TESTS
[unused] = set(range(4)) - {a, b, c}
for blocks in ([a, unused], [b, 4], [-1], [c, -4], [unused]):
    for operation in ("share", "free"):
        checks.raises(
            ValueError, getattr(pool, operation), blocks, because=f"{operation}({blocks})"
        )
        found = [pool.references(x) for x in range(4)]
        assert found == [int(x != unused) for x in range(4)], (
            f"a refused {operation} changed {found}"
        )
        assert pool.available == 1, f"after a refused {operation} {pool.available} are available"
for block in (4, -1, 100):
    checks.raises(ValueError, pool.references, block, because=f"there is no block {block}")
checks.raises(OutOfBlocks, pool.allocate, 2)
assert pool.available == 1, "a refused allocate took a block"
pool.share([a, a])
assert pool.references(a) == 3, "share([a, a]) adds two references"
pool.free([a, b, a])
found = pool.references(a), pool.references(b), pool.available
assert found == (1, 0, 2), f"free([a, b, a]) takes two from a, one from b; yours: {found}"
pool.free([a])
checks.raises(ValueError, pool.free, [a], because="it is free already")
again = pool.allocate(3)
assert sorted([*again, c]) == [0, 1, 2, 3], f"{again} after all but block {c} were freed"
assert pool.allocate(0) == [], "allocate(0) is an empty list"
assert pool.available == 0
### END HIDDEN TESTS

# %% [markdown]
# ## Tables: sequences that share blocks
#
# Now the cache. It has the two pools, an allocator, and for each sequence a block table and a
# length. Token $j$ of a sequence lies in block `table[j // block_size]`, at offset
# `j % block_size`. As one number, its **slot** is block · block_size + offset: every slot of the
# pool has one, and a model that is given the slots of its new tokens can write them without knowing
# anything about tables. One table serves all layers, since a block number means the same place in
# each layer's pool.
#
# So a step of the model has two halves. *Reserve*, once a step: take blocks if the new tokens need
# some, and say which slots they get. *Write*, once a layer: put keys and values there.
#
# **Fork.** Several answers to one prompt (samples, beams) begin with the same tokens. A fork copies
# the table and shares the blocks; no key moves. That is safe as long as nobody writes into a shared
# block. Into a full block nobody writes while it is in use. The last one may be partly filled, and
# the first sequence that has a token for it must not write there while another still reads it:
#
# ```
# parent  [ 4 | 7 | 2 ]   length 40 = 16 + 16 + 8      reference counts: 4: 2, 7: 2, 2: 2
# child   [ 4 | 7 | 2 ]   length 40
#
# child reserves one slot: block 2 is shared and not full → take block 9, copy 2 into 9
#
# parent  [ 4 | 7 | 2 ]   writes in place now          reference counts: 4: 2, 7: 2, 2: 1, 9: 1
# child   [ 4 | 7 | 9 ]   length 41
# ```
#
# If $b$ branches of one prompt all write on, $b - 1$ copies of a block are made, and the last one
# to write finds a reference count of 1. If the prompt ends at a block's border, none is made.
#
# ### Exercise · The paged cache


# %% exercise="paged_kv_cache" minutes=30 difficulty=3
class PagedKVCache:
    """Keys and values of sequences that come and go, in blocks of one pool.

    Attributes:
        k, v: (layers, num_blocks, kv_heads, block_size, head_dim), of `dtype`, on `device`; made in
            __init__ and never replaced. What stands in slots that hold no token means nothing.
        block_size, and allocator: the BlockAllocator of its num_blocks blocks.
        tables: a dict, sequence → list of blocks, as few as hold its tokens.
        lengths: a dict, sequence → how many tokens it holds.
    A sequence is an int that `add` or `fork` gave, never the same one twice. KeyError for one that
    is not there (any more). A method that raises it, or OutOfBlocks, has changed nothing.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        ### BEGIN SOLUTION
        shape = (layers, num_blocks, kv_heads, block_size, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size, self.allocator = block_size, BlockAllocator(num_blocks)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self._next = 0
        ### END SOLUTION

    def add(self, blocks: Sequence[int] = ()) -> int:
        """A new sequence that begins with these blocks, all of them full (none: it is empty).

        The blocks are in use already, and the caller's reference to each becomes the sequence's;
        the list that is passed in stays the caller's.
        """
        ### BEGIN SOLUTION
        sequence, self._next = self._next, self._next + 1
        self.tables[sequence] = list(blocks)
        self.lengths[sequence] = len(blocks) * self.block_size
        return sequence
        ### END SOLUTION

    def reserve(self, sequence: int, count: int) -> Tensor:
        """Makes room for `count` ≥ 0 more tokens; returns their slots (count,), int64, in order.

        A token's slot is block · block_size + offset in the block. The length grows by count.
        Blocks are taken from the allocator, as few as are needed. If the tokens begin in a block
        whose reference count is above 1, the sequence gives up its reference to that block and puts
        a copy in its table (all layers, keys and values), which it alone uses. With count = 0
        nothing happens.

        OutOfBlocks if there are too few free blocks, the copy's among them; nothing has changed
        then.
        """
        ### BEGIN SOLUTION
        table, length = self.tables[sequence], self.lengths[sequence]
        end, size = length + count, self.block_size
        partial = length % size > 0 and count > 0
        copy = int(partial and self.allocator.references(table[-1]) > 1)
        fresh = self.allocator.allocate(copy + max(math.ceil(end / size) - len(table), 0))
        if copy:
            old, new = table[-1], fresh.pop(0)
            self.k[:, new] = self.k[:, old]
            self.v[:, new] = self.v[:, old]
            self.allocator.free([old])
            table[-1] = new
        table.extend(fresh)
        self.lengths[sequence] = end
        places = torch.arange(length, end, device=self.k.device)
        blocks = torch.tensor(table, dtype=torch.long, device=self.k.device)
        return blocks[places // size] * size + places % size
        ### END SOLUTION

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores keys and values in one layer: token i, (kv_heads, head_dim), goes to slots[i].

        k, v: (tokens, kv_heads, head_dim), of any floating format and layout, rounded to the pool's
        as .to does; slots: (tokens,), int64, all different. They stay unchanged, and what is stored
        has no graph.
        """
        ### BEGIN SOLUTION
        block, offset = slots // self.block_size, slots % self.block_size
        self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)
        self.v[layer][block, :, offset] = v.detach().to(self.v.dtype)
        ### END SOLUTION

    def fork(self, sequence: int) -> int:
        """A new sequence of the same tokens, which shares all blocks; no key or value is copied."""
        ### BEGIN SOLUTION
        self.allocator.share(self.tables[sequence])
        child = self.add(self.tables[sequence])
        self.lengths[child] = self.lengths[sequence]
        return child
        ### END SOLUTION

    def free(self, sequence: int) -> None:
        """Forgets a sequence and its references."""
        ### BEGIN SOLUTION
        self.allocator.free(self.tables.pop(sequence))
        del self.lengths[sequence]
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: how many blocks does reserve need?</summary>
#
# Those that hold length + count tokens, less those in the table; and one more if the last block is
# partly filled and has a reference count above 1. Ask the allocator once for the sum: then it
# refuses all or gives all, before anything has changed.
# </details>
#
# <details><summary>Hint: one token, many heads</summary>
#
# `pool[block, :, offset]` with two index tensors of shape (tokens,) has shape (tokens, kv_heads,
# head_dim): PyTorch puts the indexed axes first when a slice lies between them.
# </details>

# %% tags=["support"]
# Support: what a paged cache holds, read slot by slot; new keys and values; a list kept beside it


def held(cache, layer, sequence):
    """Keys and values of a sequence, each (length, kv_heads, head_dim), found by its table."""
    table, length = list(cache.tables[sequence]), int(cache.lengths[sequence])
    size = int(cache.block_size)
    k, v = cache.k, cache.v
    places = [(table[j // size], j % size) for j in range(length)]
    return tuple(
        torch.stack([pool[layer, b, :, o] for b, o in places])
        if places
        else pool.new_zeros(0, pool.shape[2], pool.shape[4])
        for pool in (k, v)
    )


def new_tokens(cache, count, g, dtype=None):
    """Keys and values of new tokens for one layer, (count, kv_heads, head_dim), not contiguous.

    In float32 unless the pool is finer, or a dtype is given.
    """
    shape = cache.k.shape[2], count, cache.k.shape[4]
    dtype = dtype or torch.promote_types(cache.k.dtype, torch.float32)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).transpose(0, 1)
        for _ in range(2)
    ]


class Notes:
    """What each sequence of a cache should hold: in each layer a list of (k, v), token by token."""

    def __init__(self, cache):
        self.cache, self.layers = cache, cache.k.shape[0]
        self.tokens = {}

    def extend(self, sequence, count, g):
        """Reserves and writes so many random tokens, the layers in reverse order."""
        slots = self.cache.reserve(sequence, count)
        for layer in reversed(range(self.layers)):
            k, v = new_tokens(self.cache, count, g)
            self.cache.write(layer, slots, k, v)
            self.tokens[sequence][layer].extend(zip(k.unbind(), v.unbind(), strict=True))
        return slots

    def add(self):
        sequence = self.cache.add()
        self.tokens[sequence] = [[] for _ in range(self.layers)]
        return sequence

    def fork(self, sequence):
        child = self.cache.fork(sequence)
        self.tokens[child] = [list(layer) for layer in self.tokens[sequence]]
        return child

    def compare(self, where=""):
        """All sequences hold what they should, and the tables what they need."""
        cache, size = self.cache, int(self.cache.block_size)
        used = []
        for name, found in (("tables", cache.tables), ("lengths", cache.lengths)):
            assert sorted(found) == sorted(self.tokens), (
                f"{name} lists the sequences {sorted(found)}, not {sorted(self.tokens)} {where}"
            )
        for sequence, layers in self.tokens.items():
            table, length = list(cache.tables[sequence]), int(cache.lengths[sequence])
            used += table
            assert length == len(layers[0]), (
                f"sequence {sequence} has length {length}, it holds {len(layers[0])} tokens {where}"
            )
            assert len(table) == math.ceil(length / size), (
                f"{length} tokens fill {math.ceil(length / size)} blocks of {size}; the table "
                f"of sequence {sequence} is {table} {where}"
            )
            for layer, tokens in enumerate(layers):
                found = held(cache, layer, sequence)
                for side, name in enumerate(("keys", "values")):
                    if tokens:
                        checks.close(
                            found[side],
                            torch.stack([pair[side] for pair in tokens]).to(found[side].dtype),
                            what=f"the {name} of sequence {sequence}, layer {layer} {where}",
                        )
        for block in range(cache.k.shape[1]):
            assert cache.allocator.references(block) == used.count(block), (
                f"block {block} stands in {used.count(block)} tables and has a reference count of "
                f"{cache.allocator.references(block)} {where}"
            )


# %% check="paged_kv_cache" points=2
# Blocks of 2 slots, one layer, one head of size 1: what is stored reads as plain numbers.
cache = PagedKVCache(layers=1, kv_heads=1, head_dim=1, num_blocks=4, block_size=2)
text = cache.add()
slots = cache.reserve(text, 3)
assert len(cache.tables[text]) == 2, (
    f"3 tokens take 2 blocks of 2; the table is {list(cache.tables[text])}"
)
first, second = cache.tables[text]
checks.close(
    slots,
    torch.tensor([2 * first, 2 * first + 1, 2 * second]),
    what=f"the slots of 3 tokens in blocks {first} and {second}",
)
numbers = torch.tensor([10.0, 11.0, 12.0]).view(3, 1, 1)
cache.write(0, slots, numbers, -numbers)
checks.close(cache.k[0, first, 0, :, 0], torch.tensor([10.0, 11.0]), what="the keys of block 0")
checks.close(cache.v[0, second, 0, 0, 0], -12.0, what="the first value of the second block")
slots = cache.reserve(text, 1)
checks.close(slots, torch.tensor([2 * second + 1]), what="the slot of the fourth token")
assert cache.allocator.available == 2, "4 tokens fill 2 blocks of 4; 2 are free"
checks.raises(OutOfBlocks, cache.reserve, text, 5, because="4 slots are free")
assert cache.lengths[text] == 4, f"a refused reserve changed the length to {cache.lengths[text]}"
### BEGIN HIDDEN TESTS
g = checks.generator(3)


def draw(high):
    return int(torch.randint(0, high, (1,), generator=g))


for layers, kv_heads, head_dim, num_blocks, size, dtype in [
    (2, 2, 3, 12, 4, torch.float32),
    (1, 1, 2, 9, 1, torch.bfloat16),
    (3, 3, 1, 7, 5, torch.float64),
]:
    cache = PagedKVCache(layers, kv_heads, head_dim, num_blocks, size, dtype=dtype)
    shape = (layers, num_blocks, kv_heads, size, head_dim)
    assert tuple(cache.k.shape) == tuple(cache.v.shape) == shape, (
        f"k has shape {tuple(cache.k.shape)}"
    )
    assert cache.k.dtype == cache.v.dtype == dtype, (
        f"k and v have dtype {cache.k.dtype}, not {dtype}"
    )
    assert cache.allocator.available == num_blocks, "at first all blocks are free"
    pools, notes = (cache.k, cache.v), Notes(cache)
    for turn in range(14):
        live = list(notes.tokens)
        if len(live) < 2 or draw(5) == 0:
            notes.add()
        elif draw(6) == 0:
            gone = live[draw(len(live))]
            cache.free(gone)
            del notes.tokens[gone]
        else:
            sequence, count = live[draw(len(live))], draw(2 * size + 2)
            need = -(-(cache.lengths[sequence] + count) // size) - len(cache.tables[sequence])
            if need > cache.allocator.available:
                before = cache.lengths[sequence], list(cache.tables[sequence])
                checks.raises(OutOfBlocks, cache.reserve, sequence, count)
                after = cache.lengths[sequence], list(cache.tables[sequence])
                assert before == after, "a refused reserve changed the sequence"
            else:
                slots = notes.extend(sequence, count, g)
                found = tuple(slots.shape), slots.dtype
                assert found == ((count,), torch.int64), f"slots are (count,) int64; yours: {found}"
        notes.compare(f"(turn {turn}, blocks of {size})")
    for pool, before in zip((cache.k, cache.v), pools, strict=True):
        assert pool is before, "k and v were replaced: write into them"
    for sequence in list(notes.tokens):
        cache.free(sequence)
        for method in (cache.fork, cache.free, lambda s, c=cache: c.reserve(s, 1)):
            checks.raises(KeyError, method, sequence, because="the sequence was freed")
        for attribute in (cache.tables, cache.lengths):
            assert sequence not in attribute, "a freed sequence is still listed"
            for other in attribute:
                assert other in notes.tokens, "a call with a freed sequence left a new one"
    assert cache.allocator.available == num_blocks, "all sequences are gone and blocks are in use"
    assert cache.add() not in notes.tokens, "a sequence's number was given twice"
# Inputs stay as they are, and no graph is kept.
cache = PagedKVCache(2, 2, 3, 4, 4)
slots = cache.reserve(cache.add(), 6)
order = torch.tensor([4, 0, 5, 2, 1, 3])
other = torch.stack([cache.k[0], cache.v[0]])
for dtype in (torch.float32, torch.float64):  # the pool's own, and another
    k, v = new_tokens(cache, 6, g, dtype)
    k.requires_grad_()
    v.requires_grad_()
    with checks.unchanged(slots=slots, k=k, v=v):
        cache.write(1, slots[order], k, v)
for pool in (cache.k, cache.v):
    assert not pool.requires_grad, "what is stored has no graph: detach it"
checks.close(torch.stack([cache.k[0], cache.v[0]]), other, what="the pools of another layer")
where = held(cache, 1, next(iter(cache.tables)))
checks.close(where[0][order], k.detach().float(), what="keys written in another order of slots")
checks.close(where[1][order], v.detach().float(), what="values written in another order of slots")
far = PagedKVCache(1, 1, 2, 1, 2, device="meta")
for pool in (far.k, far.v):
    assert pool.device.type == "meta", f"with device='meta' a pool lies on {pool.device.type}"
### END HIDDEN TESTS

# %% check="paged_kv_cache" points=2
# A fork shares; the first to write into a partly filled block copies it.
cache = PagedKVCache(layers=1, kv_heads=1, head_dim=1, num_blocks=6, block_size=2)
parent = cache.add()
numbers = torch.tensor([10.0, 11.0, 12.0]).view(3, 1, 1)
cache.write(0, cache.reserve(parent, 3), numbers, numbers)
child = cache.fork(parent)
assert list(cache.tables[child]) == list(cache.tables[parent]), "a fork has the same blocks"
assert cache.allocator.available == 4, "a fork takes no block"
cache.write(0, cache.reserve(child, 1), torch.full((1, 1, 1), 99.0), torch.full((1, 1, 1), 99.0))
assert cache.tables[child][0] == cache.tables[parent][0], "the full block is still shared"
assert cache.tables[child][1] != cache.tables[parent][1], (
    "the child wrote into a block that the parent reads too: copy it first"
)
checks.close(
    held(cache, 0, child)[0][:, 0, 0],
    torch.tensor([10.0, 11.0, 12.0, 99.0]),
    what="the child's keys",
    hint="What the shared block held comes along",
)
cache.write(0, cache.reserve(parent, 1), torch.full((1, 1, 1), 55.0), torch.full((1, 1, 1), 55.0))
assert cache.allocator.available == 3, (
    f"one copy is enough: the parent is alone with its block now; {cache.allocator.available} "
    "blocks are free, 3 were expected"
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for size, start, branches in [(4, 6, 3), (4, 8, 3), (3, 1, 4), (5, 0, 2), (1, 3, 3)]:
    cache = PagedKVCache(2, 2, 2, 40, size, dtype=torch.float64)
    notes = Notes(cache)
    root = notes.add()
    notes.extend(root, start, g)
    family = [root] + [notes.fork(root) for _ in range(branches - 1)]
    family.append(notes.fork(family[-1]))  # a fork of a fork
    assert cache.allocator.available == 40 - math.ceil(start / size), "a fork took blocks"
    notes.compare(f"after {branches} forks of {start} tokens in blocks of {size}")
    for turn in range(3):
        for sequence in reversed(family):
            free = cache.allocator.available
            shared = bool(cache.lengths[sequence] % size) and (
                cache.allocator.references(cache.tables[sequence][-1]) > 1
            )
            full = cache.lengths[sequence] % size == 0
            cache.reserve(sequence, 0)
            assert cache.allocator.available == free, "reserve(…, 0) took a block"
            notes.extend(sequence, 1, g)
            assert free - cache.allocator.available == int(shared or full), (
                f"{free - cache.allocator.available} blocks were taken for one token; the last "
                f"block was {'full' if full else 'shared' if shared else 'its own'}"
            )
        notes.compare(f"(turn {turn}, {branches} branches of {start} tokens in blocks of {size})")
    own = [set(cache.tables[s][start // size :]) for s in family]
    assert sum(map(len, own)) == len(set().union(*own)), "two branches write into one block"
    for sequence in family[::2]:
        cache.free(sequence)
        del notes.tokens[sequence]
        notes.compare("after a branch was freed")
# Refused: a copy and a new block are needed, and one block is free. Nothing changes.
cache = PagedKVCache(1, 1, 2, 4, 4)
notes = Notes(cache)
parent = notes.add()
notes.extend(parent, 10, g)
child = notes.fork(parent)
before = cache.k.clone(), cache.v.clone()
tables = list(cache.tables[parent]), list(cache.tables[child])
checks.raises(OutOfBlocks, cache.reserve, child, 3, because="a copy and one more block are needed")
assert (list(cache.tables[parent]), list(cache.tables[child])) == tables, "a table changed"
checks.close(
    torch.stack([cache.k, cache.v]), torch.stack(before), what="the pools, after a refusal"
)
notes.compare("after a refused reserve")
assert cache.allocator.available == 1, "a refused reserve kept a block"
notes.extend(child, 2, g)
notes.compare("after the copy that did fit")
checks.raises(OutOfBlocks, cache.reserve, parent, 3)
notes.extend(parent, 2, g)
notes.compare("when the parent is alone with its block again")
# The count says who uses a block, not the tables: somebody else holds this one.
cache = PagedKVCache(1, 1, 2, 4, 4)
sequence = cache.add()
cache.reserve(sequence, 2)
[kept] = cache.tables[sequence]
cache.allocator.share([kept])
cache.reserve(sequence, 1)
assert list(cache.tables[sequence]) != [kept], "the last block has a reference count of 2: copy it"
assert cache.allocator.references(kept) == 1, "the sequence gives up its reference to that block"
# A sequence that begins with blocks of others takes over their references.
cache = PagedKVCache(1, 1, 2, 6, 4)
blocks = cache.allocator.allocate(2)
sequence = cache.add(blocks)
assert cache.lengths[sequence] == 8, (
    f"2 full blocks of 4 are 8 tokens, not {cache.lengths[sequence]}"
)
assert [cache.allocator.references(b) for b in blocks] == [1, 1], "add changes no reference count"
slots = cache.reserve(sequence, 1)
assert blocks == list(cache.tables[sequence])[:2], "the caller's list, or the blocks, changed"
assert int(slots) // 4 not in blocks, "the ninth token belongs in a third block"
cache.free(sequence)
assert cache.allocator.available == 6, "free gives back the blocks of add too"
### END HIDDEN TESTS

# %% [markdown]
# ## Attention through a table
#
# The mathematics does not change. For one new query $q \in \mathbb R^D$ of a sequence of $n$ tokens
# with table $t$,
#
# $$o = \sum_{j<n} a_j\, V\big[t_{\lfloor j/S\rfloor},\, j \bmod S\big], \qquad a = \operatorname{softmax}_{j<n}\left(\frac{q \cdot K[t_{\lfloor j/S\rfloor},\, j \bmod S]}{\sqrt D}\right).$$
#
# A batch has sequences of unequal lengths, so tables go into a rectangle, `(batch, max_blocks)`,
# and what stands behind a sequence's last block in it means nothing. Neither do the slots behind
# its last token: there lies what some other request left, or what was never written. Numbers left
# over may be infinite or NaN, and $0 \cdot \mathrm{NaN}$ is NaN: a weight of zero does not
# protect from a value that should not have been read.
#
# ### Exercise · Paged attention in PyTorch
#
# The simple way: gather each sequence's blocks into one tensor, then attend. It moves every key
# at least three times (read, write, read again), which is what the kernel below is for.


# %% exercise="paged_attention" minutes=15 difficulty=2
def paged_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token of each sequence over all of its tokens, the new one's included.

    q: (batch, heads, head_dim). k, v: (num_blocks, kv_heads, block_size, head_dim), one layer's
        pools; q, k and v have one dtype and any layout.
    tables: (batch, max_blocks), integers, max_blocks ≥ 1; lengths: (batch,), integers from 0 to
        max_blocks · block_size. Token j of sequence b lies in block tables[b, j // block_size], at
        offset j % block_size. Other entries of a table may be any number, −1 too, and other slots
        may hold anything, NaN too.
    Scores are divided by √head_dim. Query head h reads key–value head h // (heads / kv_heads). A
    sequence of length 0 gives 0.

    Returns (batch, heads, head_dim) in q's dtype; half precision is computed in float32, products
    and weights too, other formats in their own. Nothing that is passed in changes.
    """
    ### BEGIN SOLUTION
    kv_heads, block_size, head_dim = k.shape[1:]
    slots = torch.arange(tables.shape[1] * block_size, device=q.device)
    used = slots < lengths[:, None]  # (batch, slots)
    blocks = tables.long().masked_fill(~used[:, ::block_size], 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    # (batch, max_blocks, kv_heads, block_size, head_dim) → (batch, kv_heads, slots, head_dim)
    keys, values = (pool[blocks].transpose(1, 2).flatten(2, 3).to(wide) for pool in (k, v))
    values = values.masked_fill(~used[:, None, :, None], 0)
    grouped = q.to(wide).unflatten(1, (kv_heads, -1))  # (batch, kv_heads, group, head_dim)
    scores = grouped @ keys.mT / math.sqrt(head_dim)
    weights = scores.masked_fill(~used[:, None, None], -math.inf).softmax(-1)
    weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0)
    return (weights @ values).flatten(1, 2).to(q.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: indexing with a table</summary>
#
# `pool[blocks]` with blocks (batch, max_blocks) is (batch, max_blocks, kv_heads, block_size,
# head_dim). Move the heads to the front, then max_blocks and block_size are neighbors and flatten
# into one axis of tokens.
# </details>
#
# <details><summary>Hint: NaN</summary>
#
# Replace entries of tables that are not used by a block that exists. Mask scores with −∞ before the
# softmax (`masked_fill` throws NaN away; adding −∞ does not), and set the *values* of unused slots
# to 0. Where a length is 0 the softmax itself is NaN.
# </details>

# %% tags=["support"]
# Support: random pools with NaN in every slot that holds no token, and attention in float64


def scattered(
    lengths, block_size, kv_heads, head_dim, g, dtype=torch.float32, scale=1.0, wild=True
):
    """(k, v, tables, lengths): pools whose blocks lie in a random order, unused slots NaN.

    tables is int32; its entries behind the last block are −1, a large number, or an unused block;
    without `wild` an unused block, and many of them, so that a kernel that follows them does not
    end the process.
    """
    need = [math.ceil(n / block_size) for n in lengths]
    num_blocks, columns = sum(need) + 3, max(max(need), 1) + (1 if wild else 64 // block_size + 9)
    order = torch.randperm(num_blocks, generator=g).tolist()
    k, v = (torch.full((num_blocks, kv_heads, block_size, head_dim), math.nan) for _ in range(2))
    others = torch.tensor([-1, 10**6, order[-1]] if wild else [order[-1]])
    tables = others[torch.randint(0, len(others), (len(lengths), columns), generator=g)]
    tables = tables.to(torch.int32)
    for b, n in enumerate(lengths):
        for i in range(need[b]):
            block = order.pop(0)
            tables[b, i] = block
            here = min(block_size, n - i * block_size)
            for pool, size in ((k, scale), (v, 1.0)):
                pool[block, :, :here] = size * torch.randn(kv_heads, here, head_dim, generator=g)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return [t.to(profile.device) for t in (k.to(dtype), v.to(dtype), tables, lengths)]


def tokens_of(pool, tables, lengths, b):
    """One sequence's keys or values, (kv_heads, length, head_dim), token by token, in float64."""
    size, n = pool.shape[2], int(lengths[b])
    found = [pool[int(tables[b, j // size]), :, j % size].double() for j in range(n)]
    if not found:
        return pool.new_zeros(pool.shape[1], 0, pool.shape[3], dtype=torch.float64)
    return torch.stack(found, dim=1)


def attend_one(q, keys, values, seen=None):
    """One query (heads, head_dim) over keys (kv_heads, n, head_dim), float64: output, log-sum-exp.

    seen: how many keys it sees, all by default. Without keys 0 and −inf.
    """
    heads, head_dim = q.shape
    n = keys.shape[1] if seen is None else seen
    out = torch.zeros(heads, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((heads,), -math.inf, dtype=torch.float64, device=q.device)
    for h in range(heads):
        kv = h // (heads // keys.shape[0])
        if n:
            scores = keys[kv, :n] @ q[h].double() / math.sqrt(head_dim)
            out[h], lse[h] = scores.softmax(0) @ values[kv, :n], scores.logsumexp(0)
    return out, lse


def decode_by_definition(q, k, v, tables, lengths):
    """(batch, heads, head_dim) and (batch, heads): each sequence for itself, in float64."""
    found = [
        attend_one(q[b], *(tokens_of(pool, tables, lengths, b) for pool in (k, v)))
        for b in range(len(q))
    ]
    return torch.stack([o for o, _ in found]), torch.stack([lse for _, lse in found])


def far_below(lengths, size, g):
    """(q, k, v, tables, lengths), one head of size 1: each query's scores are all -2¹¹⁰."""
    k, v, tables, lengths = scattered(lengths, size, 1, 1, g)
    q = torch.full((len(lengths), 1, 1), -(2.0**55), device=k.device)
    return q, k * 0 + 2.0**55, v, tables, lengths


def cancelling(dtype, g):
    """(q, k, v, tables, lengths), two queries in half precision, whose values cancel nearly.

    What is left is as small as what rounding a score, or a weight, to half precision changes.
    """
    k, v, tables, lengths = scattered([6, 9], 4, 1, 8, g)
    q, k, v = checks.randn(2, 1, 8, generator=g).to(dtype), k.to(dtype), v.to(dtype)
    for b, n in enumerate(lengths.tolist()):
        last = int(tables[b, (n - 1) // 4]), 0, (n - 1) % 4
        v[last] = 0
        keys, values = (tokens_of(pool, tables, lengths, b) for pool in (k, v))
        weight = (keys[0] @ q[b, 0].double() / math.sqrt(8)).softmax(0)[-1]
        v[last] = (-attend_one(q[b], keys, values)[0][0] / weight).to(dtype)
    return q, k, v, tables, lengths


# %% check="paged_attention" points=2
# Two sequences of 3 and 1 tokens, blocks of 2, one head of size 1. All other slots hold NaN.
nan = math.nan
k = torch.tensor([[1.0, nan], [nan, nan], [0.0, 2.0], [3.0, nan]]).view(4, 1, 2, 1)
v = torch.tensor([[5.0, nan], [nan, nan], [1.0, 2.0], [7.0, nan]]).view(4, 1, 2, 1)
k, v = k.to(profile.device), v.to(profile.device)
tables = torch.tensor([[2, 0], [3, -1]], dtype=torch.int32, device=profile.device)
lengths = torch.tensor([3, 1], dtype=torch.int32, device=profile.device)
q = torch.ones(2, 1, 1, device=profile.device)
out = paged_attention(q, k, v, tables, lengths)
weights = torch.softmax(torch.tensor([0.0, 2.0, 1.0]), 0)
first = float(weights @ torch.tensor([1.0, 2.0, 5.0]))
checks.close(
    out[:, 0, 0],
    torch.tensor([first, 7.0]),
    what="the outputs for tables [2, 0] and [3, −1]",
    hint="Blocks 2 and 0 hold keys 0, 2 and 1, values 1, 2 and 5. NaN: mask the values too",
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
for lengths, size, heads, kv_heads, head_dim in [
    ([5, 1, 12, 0], 4, 6, 2, 3),
    ([7], 1, 2, 2, 5),
    ([3, 16, 17], 16, 4, 1, 8),
    ([0, 0], 2, 3, 3, 2),
    ([9, 2, 2], 5, 6, 3, 1),
]:
    k, v, tables, lengths = scattered(lengths, size, kv_heads, head_dim, g, scale=2.0)
    if lengths[0]:
        k[int(tables[0, 0]), :, 0] = 0  # a key as good as others: its score is 0
    q = checks.randn(heads, len(lengths), head_dim, generator=g).transpose(0, 1)
    with checks.unchanged(q=q, k=k, v=v, tables=tables, lengths=lengths):
        out = paged_attention(q, k, v, tables, lengths)
    exact, _ = decode_by_definition(q, k, v, tables, lengths)
    interleaved = decode_by_definition(
        q.unflatten(1, (-1, kv_heads)).transpose(1, 2).flatten(1, 2), k, v, tables, lengths
    )[0]
    interleaved = interleaved.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)
    checks.close(
        out,
        exact,
        dtype=torch.float32,
        what=f"outputs of {heads} heads on {kv_heads}, lengths {lengths.tolist()}, block {size}",
        mistakes={"key–value head h % kv_heads": interleaved},
    )
    wide = {"tables": tables.long(), "lengths": lengths.long()}
    with checks.unchanged(q=q, k=k, v=v, **wide):
        found = paged_attention(q, k, v, **wide)
    checks.close(found, exact, what="outputs with tables and lengths in int64")
# Pools as views: heads and slots exchanged in memory, k and v interleaved.
k, v, tables, lengths = scattered([6, 11], 4, 2, 3, g)
both = torch.stack([k.transpose(1, 2), v.transpose(1, 2)], dim=1)
q = checks.randn(2, 4, 3, generator=g)
exact, _ = decode_by_definition(q, k, v, tables, lengths)
found = paged_attention(q, both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2), tables, lengths)
checks.close(found, exact, what="outputs with pools that are views")
# A table without a column to spare, and a sequence that fills it.
k, v, tables, lengths = scattered([8, 3], 4, 2, 3, g)
found = paged_attention(q, k, v, tables[:, :2], lengths)
exact, _ = decode_by_definition(q, k, v, tables, lengths)
checks.close(found, exact, what="outputs where a sequence fills its table")
given = far_below([3, 1, 6], 4, g)
checks.close(
    paged_attention(*given),
    decode_by_definition(*given)[0],
    what="outputs where all scores are -1e33",
    hint="Only -inf is below every score",
)
### END HIDDEN TESTS

# %% check="paged_attention" points=1
# Where the blocks lie, and how large they are, changes nothing.
g = checks.generator(6)
k, v, tables, lengths = scattered([7, 4], 4, 1, 2, g)
q = checks.randn(2, 2, 2, generator=g)
out = paged_attention(q, k, v, tables, lengths)
one = [torch.full((2, 1, 8, 2), math.nan, device=profile.device) for _ in range(2)]
for pool, big in zip((k, v), one, strict=True):
    for b in range(2):
        for j in range(int(lengths[b])):
            big[1 - b, :, j] = pool[int(tables[b, j // 4]), :, j % 4]
single = torch.tensor([[1], [0]], device=profile.device)
again = paged_attention(q, *one, single, lengths)
checks.close(again, out, what="outputs with the same tokens in one block each")
### BEGIN HIDDEN TESTS
checks.close(out, decode_by_definition(q, k, v, tables, lengths)[0], what="outputs")
k, v, tables, lengths = scattered([13, 6, 1], 4, 2, 6, g)
q = checks.randn(3, 4, 6, generator=g)
exact, _ = decode_by_definition(q, k, v, tables, lengths)
checks.keeps_dtype(
    lambda q, k, v: paged_attention(q, k, v, tables, lengths),
    *(q, k, v),
    reference=lambda q, k, v: decode_by_definition(q, k, v, tables, lengths)[0],
    what="the output",
    hint="Half precision: compute in float32, round once at the end",
)
# Products beyond float16's largest number, 65,504.
given = [t.half() for t in (q + 120, k + 120, v)]
checks.relative_l2(
    paged_attention(*given, tables, lengths),
    decode_by_definition(*given, tables, lengths)[0],
    1e-2,
    what="outputs for products of about 86,000 in float16",
    hint="Compute in float32",
)
for half in (torch.float16, torch.bfloat16):
    given = cancelling(half, g)
    checks.relative_l2(
        paged_attention(*given),
        decode_by_definition(*given)[0],
        0.02,
        what=f"outputs of {half} where values cancel nearly",
        hint="Scores, weights and their products with the values are float32",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### Several queries of one sequence
#
# Prefill has many queries of a sequence, decode has one. A server that does both in one batch cuts
# long prompts into chunks and packs what it has, one after the other, without padding: 5 queries of
# sequence 0, 1 of sequence 1, 3 of sequence 2. (This is how a server keeps a long prompt from
# stopping everybody else, **chunked prefill**, lesson 34.)
#
# The keys of the chunk are written into the cache first, then its queries look at everything in
# their sequence up to themselves. Query $i$ of the $c$ newest tokens of a sequence of $n$ stands at
# position $n - c + i$. It sees positions $0 \dots n - c + i$: all of the older chunks, and a
# triangle of its own.
#
# ### Exercise · Paged prefill


# %% exercise="paged_prefill" minutes=12 difficulty=2
def paged_prefill(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor, counts: Tensor
) -> Tensor:
    """Causal attention of the newest tokens of each sequence, packed one behind the other.

    k, v, tables, lengths, the scale, the groups of heads and the dtypes: as in `paged_attention`.
    counts: (batch,), integers, 0 ≤ counts[b] ≤ lengths[b]: how many queries sequence b has. They
        are its newest tokens, and their keys are in the cache already.
    q: (tokens, heads, head_dim) with counts[0] queries of sequence 0, then counts[1] of sequence 1
        and so on; tokens is their sum.
    Query i of sequence b stands at position lengths[b] − counts[b] + i and sees the keys of all
    positions up to its own, that one included.

    Returns (tokens, heads, head_dim) in q's dtype, in the order of q. Nothing passed in changes.
    """
    ### BEGIN SOLUTION
    kv_heads, block_size, head_dim = k.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = []
    parts = q.split(counts.tolist())
    for part, table, length in zip(parts, tables, lengths.tolist(), strict=True):
        blocks = table[: math.ceil(length / block_size)].long()
        # (blocks, kv_heads, block_size, head_dim) → (kv_heads, length, head_dim)
        keys, values = (
            pool[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(wide) for pool in (k, v)
        )
        position = torch.arange(length - len(part), length, device=q.device)
        hidden = torch.arange(length, device=q.device) > position[:, None]
        grouped = part.to(wide).transpose(0, 1).unflatten(0, (kv_heads, -1))
        scores = grouped @ keys[:, None].mT / math.sqrt(head_dim)
        out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, None]
        outputs.append(out.flatten(0, 1).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one sequence at a time</summary>
#
# `q.split(counts.tolist())` gives each sequence its queries. With only the blocks it needs, cut to
# its length, no slot of somebody else is ever read, and the mask is the causal one, aligned to the
# end.
# </details>

# %% check="paged_prefill" points=2
# A sequence of 5 tokens whose last 2 are new, and one of 3 with 1 new token, as in decoding.
g = checks.generator(7)
k, v, tables, lengths = scattered([5, 3], 2, 1, 4, g)
q = checks.randn(3, 2, 4, generator=g)
counts = torch.tensor([2, 1], device=profile.device)
out = paged_prefill(q, k, v, tables, lengths, counts)
for row, (b, seen) in enumerate([(0, 4), (0, 5), (1, 3)]):
    tokens = [tokens_of(pool, tables, lengths, b) for pool in (k, v)]
    checks.close(
        out[row],
        attend_one(q[row], *tokens, seen)[0],
        what=f"output {row}: a query of sequence {b} that sees {seen} keys",
        mistakes={
            "a mask aligned to the start": attend_one(q[row], *tokens, row + 1)[0],
            "no causal mask": attend_one(q[row], *tokens)[0],
            "not seeing itself": attend_one(q[row], *tokens, seen - 1)[0],
        },
    )
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for lengths, counts, size, heads, kv_heads, head_dim in [
    ([9, 4, 7], [3, 4, 1], 4, 6, 2, 3),
    ([6], [6], 3, 2, 2, 2),
    ([5, 0, 8, 2], [0, 0, 8, 1], 1, 4, 1, 4),
    ([17, 3], [2, 0], 16, 3, 3, 5),
]:
    k, v, tables, lengths = scattered(lengths, size, kv_heads, head_dim, g, scale=2.0)
    k[int(tables[0, 0]), :, 0] = 0  # a key as good as others: its score is 0
    q = checks.randn(heads, sum(counts), head_dim, generator=g).transpose(0, 1)
    kind = torch.int64 if kv_heads == 2 else torch.int32
    counts = torch.tensor(counts, dtype=kind, device=profile.device)
    tables, lengths = tables.to(kind), lengths.to(kind)
    with checks.unchanged(q=q, k=k, v=v, tables=tables, lengths=lengths, counts=counts):
        out = paged_prefill(q, k, v, tables, lengths, counts)
    expected, rows = [], iter(q)
    for b, c in enumerate(counts.tolist()):
        tokens = [tokens_of(pool, tables, lengths, b) for pool in (k, v)]
        for i in range(c):
            expected.append(attend_one(next(rows), *tokens, int(lengths[b]) - c + i + 1)[0])
    checks.close(
        out,
        torch.stack(expected),
        dtype=torch.float32,
        what=f"lengths {lengths.tolist()}, counts {counts.tolist()}, blocks of {size}, {heads} "
        f"heads on {kv_heads}",
    )
none = torch.zeros(2, dtype=torch.int64, device=profile.device)
out = paged_prefill(q[:0], k, v, tables, lengths, none)
assert tuple(out.shape) == (0, *q.shape[1:]), f"without queries the result is empty: {out.shape}"
# Law: cut into chunks, a prompt gives what it gives at once.
k, v, tables, lengths = scattered([11], 4, 2, 4, g)
q = checks.randn(11, 4, 4, generator=g)
whole = paged_prefill(q, k, v, tables, lengths, lengths)
for chunks in ([4, 4, 3], [1] * 11, [10, 1]):
    done, pieces = 0, []
    for c in chunks:
        done += c
        now, new = (torch.tensor([n], device=profile.device) for n in (done, c))
        pieces.append(paged_prefill(q[done - c : done], k, v, tables, now, new))
    checks.close(torch.cat(pieces), whole, what=f"outputs of a prompt in chunks of {chunks}")
by_definition = [
    attend_one(q[i], *(tokens_of(pool, tables, lengths, 0) for pool in (k, v)), i + 1)[0]
    for i in range(11)
]
checks.close(whole, torch.stack(by_definition), what="outputs of a prompt at once")
# One query each is decoding.
k, v, tables, lengths = scattered([3, 8, 6], 4, 2, 6, g)
q = checks.randn(3, 4, 6, generator=g)
ones = torch.ones(3, dtype=torch.long, device=profile.device)
checks.keeps_dtype(
    lambda q, k, v: paged_prefill(q, k, v, tables, lengths, ones),
    *(q, k, v),
    reference=lambda q, k, v: decode_by_definition(q, k, v, tables, lengths)[0],
    what="the output",
    hint="Half precision: compute in float32, round once at the end",
)
given = [t.half() for t in (q + 120, k + 120, v)]
checks.relative_l2(
    paged_prefill(*given, tables, lengths, ones),
    decode_by_definition(*given, tables, lengths)[0],
    1e-2,
    what="outputs for products of about 86,000 in float16",
    hint="Compute in float32",
)
for half in (torch.float16, torch.bfloat16):
    given = cancelling(half, g)
    checks.relative_l2(
        paged_prefill(*given, ones[:2]),
        decode_by_definition(*given)[0],
        0.02,
        what=f"outputs of {half} where values cancel nearly",
        hint="Scores, weights and their products with the values are float32",
    )
q, k, v, tables, lengths = far_below([6], 4, g)
_, values = (tokens_of(pool, tables, lengths, 0) for pool in (k, v))
checks.close(
    paged_prefill(q.expand(6, 1, 1), k, v, tables, lengths, lengths)[:, 0],
    values[0].cumsum(0) / torch.arange(1, 7, device=v.device)[:, None],
    what="outputs where all scores are -1e33",
    hint="Only -inf is below every score",
)
### END HIDDEN TESTS

# %% [markdown]
# ### The model on pages
#
# The forward pass of the course's model with your cache and `paged_prefill`. One call takes any mix
# of prompts, chunks and single tokens, each as a list of ids for its sequence.


# %%
@torch.no_grad()
def paged_step(model, cache, new: dict[int, list[int]]) -> Tensor:
    """Logits (tokens, vocab) of the new ids of each sequence, packed; the cache takes them in."""
    slots = torch.cat([cache.reserve(sequence, len(ids)) for sequence, ids in new.items()])
    lengths = torch.tensor([cache.lengths[sequence] for sequence in new])
    counts = torch.tensor([len(ids) for ids in new.values()])
    longest = max(len(cache.tables[sequence]) for sequence in new)
    rows = [cache.tables[sequence] for sequence in new]
    tables = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])
    places = [torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]
    cos, sin = angles(torch.cat(places), model.config)
    x = model.embed_tokens(torch.tensor([id for ids in new.values() for id in ids]))
    for layer, block in enumerate(model.layers):
        attention, normed = block.self_attn, block.input_layernorm(x)
        # (tokens, width) → (1, heads, tokens, head_dim), as `rotate` wants it, and back
        q, k, v = (
            project(normed).unflatten(-1, (-1, model.config.head_dim)).transpose(0, 1)[None]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k, v = (t[0].transpose(0, 1) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        cache.write(layer, slots, k, v)
        out = paged_prefill(q, cache.k[layer], cache.v[layer], tables, lengths, counts)
        x = x + attention.o_proj(out.flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return F.linear(model.norm(x), model.embed_tokens.weight)


# %% [markdown]
# ### Experiment · One prompt, six answers
#
# **Question.** `small` reads a documentation page and samples six continuations of 40 tokens, once
# with forks and once with six sequences of their own. How many blocks of 16 do the two ways use in
# the end? Are the texts the same?
#
# **Predict first.** The page's first 200 tokens are the prompt. Compute both numbers of blocks.
# Then: do the two ways give the same texts, token for token, if each branch draws with the same
# random numbers?


# %% tags=["experiment"]
def sample_branches(prompt, branches, new, forked, size=16, seed=0):
    """(cache, sequences, texts, blocks in use after each step) of sampling at temperature 1."""
    cache = PagedKVCache(config.layers, config.kv_heads, config.head_dim, 256, size)
    if forked:
        first = cache.add()
        last = paged_step(small, cache, {first: prompt})[-1:].expand(branches, -1)
        sequences = [first, *(cache.fork(first) for _ in range(branches - 1))]
    else:
        sequences = [cache.add() for _ in range(branches)]
        last = torch.cat([paged_step(small, cache, {s: prompt})[-1:] for s in sequences])
    g = torch.Generator().manual_seed(seed)
    texts, in_use = [[] for _ in sequences], [256 - cache.allocator.available]
    for _ in range(new):
        chosen = torch.multinomial(last.softmax(-1), 1, generator=g)[:, 0].tolist()
        for text, id in zip(texts, chosen, strict=True):
            text.append(id)
        last = paged_step(small, cache, {s: [t[-1]] for s, t in zip(sequences, texts, strict=True)})
        in_use.append(256 - cache.allocator.available)
    return cache, sequences, texts, in_use


threads = torch.get_num_threads()
torch.set_num_threads(1)
prompt = max(pages.values(), key=len)[:200]
forks, sequences, texts, fork_use = sample_branches(prompt, 6, 40, True)
_, _, other_texts, own_use = sample_branches(prompt, 6, 40, False)
torch.set_num_threads(threads)
print(f"blocks in use after the prompt: {fork_use[0]} forked, {own_use[0]} without sharing")
print(f"                   in the end: {fork_use[-1]} forked, {own_use[-1]} without sharing")
print(f"the same six texts: {texts == other_texts}")
for text in texts[:2]:
    print(repr(tokenizer.decode(text[:24])))

# %% tags=["experiment", "figure"]
# Figure: the six block tables, and the blocks in use over the steps
tables = [list(forks.tables[s]) for s in sequences]
uses = torch.tensor([[forks.allocator.references(b) for b in row] for row in tables])
fig, axes = plt.subplots(1, 2, figsize=(12, 3.4), width_ratios=[1.7, 1])
ax = axes[0]
image = ax.imshow(uses, cmap="Blues", vmin=0, vmax=8, aspect="auto")
for row, line in enumerate(tables):
    for column, block in enumerate(line):
        dark = uses[row, column] > 4
        ax.text(
            column,
            row,
            block,
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=9,
        )
ax.set(xlabel="logical block (16 tokens each)", ylabel="branch")
ax.set_title("block tables after 40 tokens: which block of the pool")
ax.set_xticks(range(len(tables[0])))
ax.grid(False)
fig.colorbar(image, ax=ax, label="reference count", ticks=[1, 6])
plot.curves(
    range(41),
    {"forked": fork_use, "without sharing": own_use},
    xlabel="tokens written by each branch",
    ylabel="blocks in use",
    title="blocks of the pool",
    ax=axes[1],
)
axes[1].set_ylim(0, None)
plot.caption(
    fig,
    "Left: the prompt's full blocks are one and the same block in six tables (dark). Its last, "
    "partly filled one was copied at the first new token: the numbers differ from there on. Right: "
    "the first step of the forked branches makes the copies, later ones take a block each whenever "
    "they cross a border.",
)
plt.show()

# %% [markdown]
# **What came out.** Blocks as computed: what the branches share is stored once, whatever the texts
# are. And the texts agree token for token, here and with each of five seeds: the same numbers are
# read, only from elsewhere. (A prompt that goes through the model together with others may be
# summed in another order, so equality of sampled texts is no theorem; the logits differ in the last
# digits at most.)

# %% [markdown]
# ### Experiment · A pool under load
#
# **Question.** Requests of real lengths arrive at a pool of 8,192 slots. How many of them run at
# the same time, and how many steps does it take to serve them all, with each of three strategies?
#
# A request is a documentation page: the first quarter is its prompt, and the rest is written at one
# token a step. *Max* reserves 2,048 consecutive slots, *pow2* the power of two that its final
# length needs (a server would have to guess that), both first-fit; nobody overtakes. *Paged* takes
# blocks as tokens come; when there are none left, the youngest request gives its blocks back and
# waits, and later all that it had written passes again as a longer prompt (**preemption** by
# recomputing).
#
# **Predict first.** With `fragmentation` you know the three averages. Which of the strategies will
# be hit by external fragmentation? Will paged waste work by preemption?


# %%
def first_fit(taken: list[tuple[int, int]], size: int, slots: int) -> int | None:
    """Where a stretch of `size` slots fits between those taken, (start, end); None: nowhere."""
    start = 0
    for begin, end in sorted(taken):
        if begin - start >= size:
            return start
        start = end
    return start if slots - start >= size else None


# %% tags=["experiment"]
POOL, BLOCK = 8192, 16


def serve(strategy, requests):
    """Serves requests (prompt, final length) in order; what each step looks like.

    Returns (per step: running requests, slots with tokens, tokens lost to preemption so far), and
    the picture of the memory: one column a step, one row for each block of 16 slots.
    """
    waiting, running = deque(enumerate(requests)), {}
    allocator = BlockAllocator(POOL // BLOCK)
    steps, picture, lost = [], [], 0

    def admit():
        """Lets the next request in, if it fits."""
        name, (prompt, final) = waiting[0]
        if strategy == "paged":
            if allocator.available < math.ceil(prompt / BLOCK):
                return False
            running[name] = [prompt, final, allocator.allocate(math.ceil(prompt / BLOCK))]
        else:
            size, _ = fragmentation([final], strategy, LIMIT)
            taken = [(start, start + own) for *_, (start, own) in running.values()]
            start = first_fit(taken, size, POOL)
            if start is None:
                return False
            running[name] = [prompt, final, (start, size)]
        waiting.popleft()
        return True

    while waiting or running:
        while waiting and admit():
            pass
        for name in list(running):
            if name not in running:  # preempted in this very step
                continue
            length, final, place = running[name]
            if strategy == "paged" and length == len(place) * BLOCK:
                while not allocator.available:
                    youngest = max(running)
                    written, target, blocks = running.pop(youngest)
                    allocator.free(blocks)
                    waiting.appendleft((youngest, (written, target)))  # a longer prompt now
                    lost += written
                if name not in running:
                    continue
                place += allocator.allocate(1)
            running[name][0] = length + 1
        column = torch.zeros(POOL // BLOCK)
        for name, (length, _, place) in running.items():
            if strategy == "paged":
                column[place] = 1 + name % 6
            else:
                start, size = (x // BLOCK for x in place)
                column[start : start + max(size, 1)] = -1  # reserved, without a token
                column[start : start + math.ceil(length / BLOCK)] = 1 + name % 6
        picture.append(column)
        steps.append((len(running), sum(length for length, *_ in running.values()), lost))
        for name, (length, final, place) in list(running.items()):
            if length >= final:
                if strategy == "paged":
                    allocator.free(place)
                del running[name]
    return steps, torch.stack(picture, dim=1)


g = torch.Generator().manual_seed(30)
order = torch.randperm(len(page_lengths), generator=g).tolist()
requests = [(math.ceil(page_lengths[i] / 4), page_lengths[i]) for i in order]
loads = {strategy: serve(strategy, requests) for strategy in ("max", "pow2", "paged")}
for strategy, (steps, _) in loads.items():
    half = steps[: len(steps) // 2]  # the queue is not empty yet
    print(
        f"{strategy:5}: {len(steps):5} steps for {len(requests)} requests; in the first half "
        f"{sum(s[0] for s in half) / len(half):4.1f} run at once, "
        f"{sum(s[1] for s in half) / len(half) / POOL:4.0%} of the slots hold tokens; "
        f"{steps[-1][2]:,} tokens computed again"
    )

# %% tags=["experiment", "figure"]
# Figure: three memories over time
from matplotlib.colors import ListedColormap

shown = 900
colors = ["#d9d9d9", "white", *(plot.COLORS[i] for i in (0, 1, 3, 4, 5, 6))]
fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
for ax, (strategy, (steps, picture)) in zip(axes, loads.items(), strict=True):
    ax.imshow(
        picture[:, :shown],
        cmap=ListedColormap(colors),
        vmin=-1,
        vmax=6,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0, min(shown, len(steps)), 0, POOL),
    )
    ax.set(xlabel="step")
    ax.set_title(
        f"{strategy}: {sum(s[0] for s in steps[:shown]) / len(steps[:shown]):.1f} requests at once"
    )
    ax.grid(False)
axes[0].set(ylabel="slot of the pool")
plot.caption(
    fig,
    "Each color is a request (six colors in turn), grey is reserved and without a token, white is "
    "free. Left: four stretches, mostly grey. Middle: less grey, and white gaps too short for the "
    "next in line. Right: a request's blocks lie anywhere, and nearly every slot is in use.",
)
plt.show()

# %% [markdown]
# **What came out.** In each of five orders of arrival paged serves everything in less than half of
# max's steps, and holds more than twice the requests at once. Pow2, which was told the final
# lengths, takes fewer steps than max; but in one of the five orders no more requests ran at once
# than with max, since reserved slots were idle and gaps too short.
#
# Preemption is the price of letting requests in before their whole need is known: in each order
# more than half as many tokens as all requests have were computed twice. They pass as prompts, many
# at a time, which is cheap beside decoding. A server that keeps a few blocks back would waste less.

# %% [markdown]
# ## The same beginning, twice: a cache of prefixes
#
# A fork needs somebody who knows that two sequences begin alike. Requests of different users do
# not tell. But a system prompt of 2,000 tokens begins every one of them, and lesson 28 counted what
# a chat repeats. So when a request is over, keep its blocks for a while, and let the next one find
# them by what they hold.
#
# What does a block hold? Not its 16 tokens alone: a key depends on everything before it. So block
# $i$ is named by *all* tokens up to its end. Hashed as a chain, that costs one block's work each:
#
# $$h_{-1} = \mathrm{hash}(\text{salt}), \qquad h_i = \mathrm{hash}\big(h_{i-1} \,\Vert\, \text{tokens of block } i\big).$$
#
# Equal $h_i$ means equal salt and equal blocks $0 \dots i$, as far as a hash can mean it. Only full
# blocks are named: a partly filled one will still change. The **salt** separates what must not be
# shared although its tokens are the same: an adapter's keys differ (lesson 25), and a customer can
# measure by the answer's delay whether somebody else has sent the same prompt. A block that is
# found only with the right salt tells nothing.
#
# vLLM used Python's `hash` at first. From Python 3.12 on its values for such tuples can be
# predicted, so that a prompt could be built that finds another prompt's blocks (CVE-2025-25183).
# SHA-256 is its default since version 0.10.2.
#
# ### Exercise · Names of blocks


# %% exercise="prefix_hash_blocks" minutes=8 difficulty=1
def prefix_hash_blocks(tokens: Sequence[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """A SHA-256 digest (32 bytes) for each full block of the tokens, in order.

    The chain begins with the digest of `salt`. A block's digest is that of the 32 bytes before it
    in the chain, followed by its tokens, each as 8 bytes, the lowest byte first. Tokens from 0 to
    2⁶³ − 1; what is left over at the end has no digest.

    Tokens [1, 2, 3, 4, 5] in blocks of 2, without salt: the digests of blocks [1, 2] and [3, 4]
    begin with 5d8bb3bb and a7d08094 (hexadecimal).
    """
    ### BEGIN SOLUTION
    digest, names = hashlib.sha256(salt).digest(), []
    for end in range(block_size, len(tokens) + 1, block_size):
        block = b"".join(t.to_bytes(8, "little") for t in tokens[end - block_size : end])
        digest = hashlib.sha256(digest + block).digest()
        names.append(digest)
    return names
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: bytes</summary>
#
# `token.to_bytes(8, "little")` is one token's 8 bytes, `hashlib.sha256(data).digest()` the 32 bytes
# of the hash. With "big", or with fewer bytes, the digests are others.
# </details>

# %% check="prefix_hash_blocks" points=1
names = prefix_hash_blocks([1, 2, 3, 4, 5], 2)
checks.kind(names, list, what="prefix_hash_blocks")
assert len(names) == 2, f"5 tokens have 2 full blocks of 2; yours: {len(names)} digests"
heads = [name.hex()[:8] for name in names]
assert heads == ["5d8bb3bb", "a7d08094"], (
    f"the digests begin with 5d8bb3bb and a7d08094; yours: {heads}"
)
again = prefix_hash_blocks([9, 9, 3, 4], 2)
assert len(again) == 2, f"four tokens fill two blocks of 2: two digests, yours are {len(again)}"
assert again[1] != names[1], "[3, 4] behind [9, 9] is another block than [3, 4] behind [1, 2]"
### BEGIN HIDDEN TESTS
g = checks.generator(9)
assert all(type(name) is bytes and len(name) == 32 for name in names), "a digest is 32 bytes"
worked = [
    (([1, 2, 3, 4, 5], 2, b""), ["5d8bb3bb", "a7d08094"]),
    (([7], 1, b"tenant"), ["7c6d3346"]),
    (([4095, 2**40, 0], 3, b"\x00\xff"), ["95c91741"]),
    (([2**63 - 1], 1, b""), ["178c9ae5"]),
]
for arguments, expected in worked:
    found = [name.hex()[:8] for name in prefix_hash_blocks(*arguments)]
    assert found == expected, f"prefix_hash_blocks{arguments} begins {found}, expected {expected}"
# Two names are equal exactly where everything up to the block's end is, and the salt.
seen = {}
for _ in range(60):
    size = int(torch.randint(1, 4, (1,), generator=g))
    tokens = torch.randint(
        0, 2, (int(torch.randint(0, 9, (1,), generator=g)),), generator=g
    ).tolist()
    salt = [b"", b"a", b"ab", b"\x01"][int(torch.randint(0, 4, (1,), generator=g))]
    before = list(tokens)
    names = prefix_hash_blocks(tokens, size, salt)
    assert tokens == before, "the tokens were changed"
    assert len(names) == len(tokens) // size, (
        f"{len(tokens)} tokens, {len(tokens) // size} full blocks of {size}; yours: {len(names)}"
    )
    assert names == prefix_hash_blocks(tuple(tokens), size, salt), "a tuple has other names"
    for i, name in enumerate(names):
        content = salt, size, tuple(tokens[: (i + 1) * size])
        assert seen.setdefault(name, content) == content, (
            f"{content} and {seen[name]} have one name"
        )
        assert seen.setdefault(content, name) == name, f"{content} has two names"
assert prefix_hash_blocks([], 4) == [], "no tokens, no names"
### END HIDDEN TESTS

# %% [markdown]
# ### Which block to forget
#
# The cache of prefixes is one more user of the blocks: it holds a reference of its own to each
# block that it knows. A running request that found a block holds another. So a block with a count
# of 1 is kept only in case somebody asks, and may go when memory is needed; one with a higher count
# may not.
#
# Among those that may go: the least recently used. All blocks of one request were used at the same
# time, and there the order matters. Without its parent a block is not found, since a search goes
# along the chain: until the parent is inserted again, it lies there in vain. So of blocks used at
# the same time the *deeper* one goes first, and a chain is eaten from its end. (SGLang keeps the
# chains as a radix tree and evicts leaves: the same order from another structure.)
#
# Two edges decide whether it is right:
#
# - **A prompt that is cached to its last token.** Nothing would be left to pass through the model,
#   and there would be no logits to choose a token from. So at least the last token is computed.
# - **Equal hashes of unequal contents.** With a weak hash, or an unlucky one, a request would read
#   another one's keys. A hash only says where to look: compare what is there.
#
# ### Exercise · The prefix cache


# %% exercise="prefix_cache" minutes=25 difficulty=3
class PrefixCache:
    """Full blocks of earlier sequences, found again by the tokens that they and their past hold.

    The cache has one reference of its own (BlockAllocator) to each block that it knows; a block
    with no other is unused. hash_blocks(tokens, block_size, salt) names each full block; a name has
    room for one block, the first that came, until it is evicted. Nobody inserts one block under two
    names.

    Time is counted: each call of insert or match is a moment later than the one before. A block's
    last use is the last moment in which match returned it, or insert took it in, or insert met its
    tokens again and let it stay.
    Lists that are passed in stay unchanged.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        block_size: int,
        hash_blocks: Callable = prefix_hash_blocks,
    ) -> None:
        ### BEGIN SOLUTION
        self._allocator, self._size, self._hash = allocator, block_size, hash_blocks
        self._known: dict = {}  # name → [block, (tokens up to its end, salt), depth, last use]
        self._now = 0
        ### END SOLUTION

    def insert(self, tokens: Sequence[int], blocks: Sequence[int], salt: bytes = b"") -> None:
        """Takes in the full blocks of a sequence that holds these tokens in these blocks.

        blocks: its table, at least as long as there are full blocks; what comes after those is
        left out. For each full block, in order: where the name is new, the cache keeps the block
        and takes a reference to it. Where the name belongs to a block of the same tokens (all of
        them, up to its end) and the same salt, that one stays, be it this one or another. Where it
        belongs to other contents, neither this block nor those behind it are taken in.
        """
        ### BEGIN SOLUTION
        self._now += 1
        for depth, name in enumerate(self._hash(tokens, self._size, salt)):
            content = tuple(tokens[: (depth + 1) * self._size]), salt
            if name not in self._known:
                self._allocator.share([blocks[depth]])
                self._known[name] = [blocks[depth], content, depth, self._now]
            elif self._known[name][1] != content:
                return
            self._known[name][3] = self._now
        ### END SOLUTION

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> list[int]:
        """The blocks that hold the longest known beginning of these tokens, from the first on.

        Only blocks that were inserted with the same salt and the same tokens up to their end; none
        behind one that is missing. At least the last token is left over: of a prompt that fills its
        blocks, the last block is not returned. The caller gets a reference to each.
        """
        ### BEGIN SOLUTION
        self._now += 1
        found = []
        most = (len(tokens) - 1) // self._size if tokens else 0
        for depth, name in enumerate(self._hash(tokens, self._size, salt)[:most]):
            content = tuple(tokens[: (depth + 1) * self._size]), salt
            entry = self._known.get(name)
            if entry is None or entry[1] != content:
                break
            entry[3] = self._now
            found.append(entry[0])
        self._allocator.share(found)
        return found
        ### END SOLUTION

    def evict(self, count: int) -> int:
        """Forgets up to `count` unused blocks and gives back their references; returns how many.

        The least recently used first; of those with the same last use the deeper in its chain.
        """
        ### BEGIN SOLUTION
        unused = [n for n, e in self._known.items() if self._allocator.references(e[0]) == 1]
        unused.sort(key=lambda name: (self._known[name][3], -self._known[name][2]))
        for name in unused[:count]:
            self._allocator.free([self._known.pop(name)[0]])
        return len(unused[:count])
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what to remember of a block</summary>
#
# Its number, its contents (all tokens up to its end, and the salt), its depth, and its last use,
# under its name. Storing all tokens for each block is wasteful and right; comparing the block's own
# 16 tokens is not enough, since with a weak hash the past may differ.
# </details>
#
# <details><summary>Hint: who holds which reference?</summary>
#
# `insert` leaves the sequence its own references and adds the cache's. The sequence frees its own
# when it is over. `match` adds one for the caller, who hands them to `PagedKVCache.add`.
# </details>


# %% tags=["support"]
# Support: weak hashes, and a prefix cache that is a list and searches it
def constant_names(tokens, block_size, salt=b""):
    """The same name for every block of the same depth."""
    return list(range(len(tokens) // block_size))


def last_token_names(tokens, block_size, salt=b""):
    """A block's name is its last token and its depth: the past does not count."""
    return [(i, tokens[(i + 1) * block_size - 1]) for i in range(len(tokens) // block_size)]


def true_names(tokens, block_size, salt=b""):
    """The contents themselves."""
    ends = range(block_size, len(tokens) + 1, block_size)
    return [(tuple(tokens[:end]), salt) for end in ends]


class Shelf:
    """What a prefix cache should do, written as a search in a list; it counts references itself."""

    def __init__(self, size, names, uses):
        self.size, self.names, self.uses = size, names, uses  # uses: Counter of references
        self.rows, self.now = [], 0  # rows: dicts of name, block, tokens, salt, when

    def search(self, name):
        rows = [row for row in self.rows if row["name"] == name]
        return rows[0] if rows else None

    def same(self, row, tokens, i, salt):
        return row["salt"] == salt and row["tokens"] == list(tokens[: (i + 1) * self.size])

    def insert(self, tokens, blocks, salt):
        self.now += 1
        for i, name in enumerate(self.names(tokens, self.size, salt)):
            row = self.search(name)
            if row is None:
                row = {"name": name, "block": blocks[i], "salt": salt}
                row["tokens"] = list(tokens[: (i + 1) * self.size])
                self.rows.append(row)
                self.uses[blocks[i]] += 1
            if not self.same(row, tokens, i, salt):
                return
            row["when"] = self.now

    def match(self, tokens, salt):
        self.now += 1
        found = []
        for i, name in enumerate(self.names(tokens, self.size, salt)):
            row = self.search(name)
            if row is None or not self.same(row, tokens, i, salt):
                break
            if (i + 1) * self.size == len(tokens):
                break
            row["when"] = self.now
            found.append(row["block"])
        for block in found:
            self.uses[block] += 1
        return found

    def evict(self, count):
        gone = 0
        for _ in range(count):
            rows = [row for row in self.rows if self.uses[row["block"]] == 1]
            if not rows:
                break
            oldest = min(row["when"] for row in rows)
            rows = [row for row in rows if row["when"] == oldest]
            row = max(rows, key=lambda row: len(row["tokens"]))
            self.rows.remove(row)
            self.uses[row["block"]] -= 1
            gone += 1
        return gone


# %% check="prefix_cache" points=2
# Blocks of 2. A request of 7 tokens leaves 3 full blocks; a second one shares two of them.
pool = BlockAllocator(8)
cache = PrefixCache(pool, 2, true_names)
table = pool.allocate(4)
cache.insert([1, 2, 3, 4, 5, 6, 7], table)
assert [pool.references(b) for b in table] == [2, 2, 2, 1], (
    f"three full blocks have the cache as a second user: reference counts 2, 2, 2, 1; yours: "
    f"{[pool.references(b) for b in table]}"
)
pool.free(table)
found = cache.match([1, 2, 3, 4, 9, 9, 9])
checks.kind(found, list, what="match")
assert found == table[:2], f"[1, 2] and [3, 4] are known, blocks {table[:2]}; yours: {found}"
assert pool.references(table[0]) == 2, "match gives the caller a reference"
found = cache.match([1, 2, 3, 4])
assert found == table[:1], (
    f"of a prompt of 4 tokens the last must be computed: one block of 2 is returned; yours: {found}"
)
assert cache.match([1, 2, 3, 4, 9], b"other") == [], "another salt finds nothing"
### BEGIN HIDDEN TESTS
g = checks.generator(10)


def draw(high):
    return int(torch.randint(0, high, (1,), generator=g))


for size, names in [
    (2, prefix_hash_blocks),
    (1, true_names),
    (3, true_names),
    (2, constant_names),
    (1, last_token_names),
    (2, last_token_names),
]:
    pool, uses = BlockAllocator(40), Counter()
    cache = PrefixCache(pool, size, names)
    shelf = Shelf(size, names, uses)
    running = []  # tables of sequences that still run
    for turn in range(45):
        tokens = [draw(2) for _ in range(draw(3 * size + 3))]
        salt = [b"", b"x"][draw(3) == 0]
        kind = draw(4)
        where = f"(turn {turn}, blocks of {size}, {tokens}, {salt})"
        if kind < 2:  # a request: match, compute the rest, insert
            given = list(tokens)
            found, right = cache.match(given, salt), shelf.match(tokens, salt)
            assert given == tokens, "match changed the list of tokens"
            assert list(found) == right, f"match gives {found}, should give {right} {where}"
            need = math.ceil(len(tokens) / size) - len(found)
            if need > pool.available:
                pool.free(found)
                uses.subtract(right)
                continue
            table = list(found) + pool.allocate(need)
            uses.update(table[len(found) :])
            if kind == 0 or draw(2):
                given = list(tokens), list(table)
                cache.insert(*given, salt)
                shelf.insert(tokens, table, salt)
                assert given == (tokens, table), "insert changed the tokens or the table"
            running.append(table)
        elif kind == 2 and running:
            table = running.pop(draw(len(running)))
            pool.free(table)
            uses.subtract(table)
        else:
            count = draw(4)
            gone, right = cache.evict(count), shelf.evict(count)
            assert gone == right, f"evict({count}) says {gone}, should say {right} {where}"
        counts = [pool.references(b) for b in range(40)]
        right = [uses[b] for b in range(40)]
        assert counts == right, f"reference counts {counts}, should be {right} {where}"
### END HIDDEN TESTS

# %% check="prefix_cache" points=2
# Eviction: the least recently used, and of one chain its end.
pool = BlockAllocator(8)
cache = PrefixCache(pool, 2, true_names)
old, new = pool.allocate(3), pool.allocate(2)
cache.insert([1, 2, 3, 4, 5, 6], old)
cache.insert([7, 8, 9, 9], new)
pool.free(old + new)
in_use = cache.match([1, 2, 3, 4, 0])  # two blocks of the first are in use again, and young
gone = []
for _ in range(3):
    before = [b for b in old + new if pool.references(b)]
    assert cache.evict(1) == 1, "three blocks are unused"
    gone += [b for b in before if not pool.references(b)]
assert gone == [old[2], new[1], new[0]], (
    f"block {old[2]} was used longest ago, then the end of the second chain, {new[1]}, then "
    f"{new[0]}; yours went in the order {gone}"
)
assert cache.evict(5) == 0, "the other two blocks are in use"
### BEGIN HIDDEN TESTS
pool.free(in_use)
assert cache.evict(5) == 2, "nobody uses the other two any more"
assert pool.available == 8, "what is evicted is free"
assert cache.match([1, 2, 3, 4, 0]) == [], "all is forgotten"
# Use renews: of three chains the first is asked for again, the second inserted again.
pool = BlockAllocator(12)
cache = PrefixCache(pool, 1, true_names)
chains = [pool.allocate(2) for _ in range(3)]
for i, chain in enumerate(chains):
    cache.insert([i, 5], chain)
    pool.free(chain)
pool.free(cache.match([0, 5, 5]))
twin = pool.allocate(2)
cache.insert([1, 5], twin)  # computed twice: the block that is known stays
assert [pool.references(b) for b in twin + chains[1]] == [1, 1, 1, 1], (
    "the first of two twins stays"
)
pool.free(twin)
order = []
while sum(pool.references(b) for chain in chains for b in chain):
    before = [b for chain in chains for b in chain if pool.references(b)]
    assert cache.evict(1) == 1
    order += [b for b in before if not pool.references(b)]
right = [chains[2][1], chains[2][0], chains[0][1], chains[0][0], chains[1][1], chains[1][0]]
assert order == right, f"evicted in the order {order}, should be {right}"
# Held back is not returned: a prompt asked for again to its last token leaves its last block old.
pool = BlockAllocator(4)
cache = PrefixCache(pool, 1, true_names)
asked, other = pool.allocate(2), pool.allocate(2)
cache.insert([1, 2], asked)
cache.insert([3, 4], other)
pool.free(asked + other)
pool.free(cache.match([1, 2]))
assert (cache.evict(1), pool.references(asked[1])) == (1, 0), (
    "match held back the last block of a prompt, so that was used longest ago: it goes first"
)
# A block whose parent has gone is not found, and is found again when the parent is back.
pool = BlockAllocator(6)
cache = PrefixCache(pool, 1, true_names)
a, b, c = pool.allocate(3)
cache.insert([1, 2, 3], [a, b, c])
pool.free([a, b])  # c stays in use
assert cache.evict(9) == 2, "two blocks of three are unused"
assert cache.match([1, 2, 3, 4]) == [], "the parents of the third are gone"
fresh = pool.allocate(2)
cache.insert([1, 2], fresh)
assert cache.match([1, 2, 3, 4]) == [*fresh, c], "parents computed anew lead to the child again"
assert cache.evict(0) == 0, "evict(0) forgets nothing"
assert PrefixCache(pool, 2).match([]) == [], "no tokens, no blocks"
# With the hash of the exercise above, and tuples in place of lists.
pool = BlockAllocator(4)
cache = PrefixCache(pool, 2)
table = pool.allocate(2)
cache.insert((7, 8, 7, 8), tuple(table), b"s")
assert cache.match([7, 8, 7, 8, 1], b"s") == table, "a list finds what a tuple inserted"
assert cache.match((7, 8, 7, 9, 1), b"s") == table[:1], "a tuple finds it too"
assert cache.match([7, 8, 7, 8, 1]) == [], "another salt finds nothing"
### END HIDDEN TESTS

# %% check="prefix_cache" points=1
# With a hash that knows only a block's last token, [1, 2] and [3, 2] have one name.
pool = BlockAllocator(6)
cache = PrefixCache(pool, 2, last_token_names)
cache.insert([1, 2, 5, 6], pool.allocate(2))
assert cache.match([3, 2, 5, 6, 0]) == [], (
    "[3, 2] found the block of [1, 2]: equal hashes are no proof, compare the tokens"
)
### BEGIN HIDDEN TESTS
assert cache.match([1, 2, 5, 6, 0], b"x") == [], "the salt is part of the contents"
found = cache.match([1, 2, 7, 6, 0])
assert len(found) == 1, f"[1, 2] is known, [7, 6] behind it is not; yours: {found}"
other = pool.allocate(2)
cache.insert([3, 2, 7, 8], other)
assert [pool.references(b) for b in other] == [1, 1], (
    "the name of [3, 2] belongs to [1, 2]: neither it nor what is behind it is taken in"
)
# The same last block behind another past: its own tokens agree, the past does not.
pool = BlockAllocator(9)
cache = PrefixCache(pool, 1, lambda tokens, size, salt=b"": list(tokens))  # a name: the token
x = pool.allocate(2)
cache.insert([1, 9], x)
assert cache.match([2, 9, 0]) == [], "block [9] stood behind [1], not behind [2]"
y = pool.allocate(2)
cache.insert([2, 9], y)
assert [pool.references(b) for b in y] == [2, 1], "[2] is new; [9] has another past"
assert cache.match([2, 9, 0]) == y[:1], "[9] behind [2] is not known"
### END HIDDEN TESTS

# %% [markdown]
# ### Experiment · Eight questions about one page
#
# **Question.** Eight requests begin with the same 350 tokens and end with 30 of their own; `small`
# answers each with 8 tokens, one request after the other. How many tokens pass through it in
# prefill, with blocks of 4, 16, 64 and 128 slots? How many slots are empty? Do the answers change?
#
# **Predict first.** Without reuse 8 · 380 tokens pass. With reuse the first request passes all of
# its own. How many do the others pass with blocks of 16? With blocks of 128? What speaks against
# blocks of 1?


# %%
def answer(model, cache, known, prompt, new, salt=b""):
    """(greedy ids, tokens passed in prefill, empty slots at the end) of one request.

    known: a PrefixCache on the cache's allocator, or None.
    """
    blocks = known.match(prompt, salt) if known else []
    sequence, start = cache.add(blocks), len(blocks) * cache.block_size
    while True:
        try:
            logits = paged_step(model, cache, {sequence: prompt[start:]})
            break
        except OutOfBlocks:
            if not known or not known.evict(1):
                raise
    text = [int(logits[-1].argmax())]
    for _ in range(new - 1):
        text.append(int(paged_step(model, cache, {sequence: text[-1:]})[-1].argmax()))
    empty = len(cache.tables[sequence]) * cache.block_size - cache.lengths[sequence]
    if known:
        known.insert([*prompt, *text[:-1]], cache.tables[sequence], salt)
    cache.free(sequence)
    return text, len(prompt) - start, empty


# %% tags=["experiment"]
def ask_all(prompts, size, reuse, num_slots=4096):
    """Texts, tokens passed, empty slots: lists over the requests."""
    cache = PagedKVCache(config.layers, config.kv_heads, config.head_dim, num_slots // size, size)
    known = PrefixCache(cache.allocator, size) if reuse else None
    return zip(*(answer(small, cache, known, p, 8) for p in prompts), strict=True)


names = sorted(pages, key=lambda name: -len(pages[name]))
system, others = pages[names[0]][:350], [pages[name][:30] for name in names[1:9]]
prompts = [system + own for own in others]
torch.set_num_threads(1)
plain, passed, _ = ask_all(prompts, 16, False)
print(f"no reuse:      {sum(passed):5} tokens of prefill")
sizes, found = (4, 16, 64, 128), {}
for size in sizes:
    texts, passed, empty = ask_all(prompts, size, True)
    found[size] = passed, empty
    print(
        f"blocks of {size:3}: {sum(passed):5} tokens of prefill, {sum(empty) / 8:5.1f} slots of a "
        f"request empty, {math.ceil(387 / size):3} table entries; same answers: {texts == plain}"
    )
torch.set_num_threads(threads)

# %% tags=["experiment", "figure"]
# Figure: what a block's size costs
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4))
for i, size in enumerate(sizes):
    axes[0].plot(
        range(1, 9), found[size][0], marker="os^D"[i], markersize=5, label=f"blocks of {size}"
    )
axes[0].axhline(380, color="#777777", linewidth=1)
axes[0].text(4.5, 366, "without reuse", fontsize=8, ha="center", va="top", color="#555555")
axes[0].set(xlabel="request", ylabel="tokens passed in prefill", ylim=(0, 400))
axes[0].set_title("prefill: 350 tokens are the same")
axes[0].legend(fontsize=8)
fine = [2**i for i in range(9)]
waste = [fragmentation(page_lengths, "paged", LIMIT, size)[1] for size in fine]
axes[1].plot(fine, [100 * w for w in waste], marker="o", color=plot.COLORS[0])
entries = [sum(math.ceil(n / size) for n in page_lengths) / len(pages) for size in fine]
other = axes[1].twinx()
other.plot(fine, entries, marker="s", linestyle="--", color=plot.COLORS[1])
other.set(ylabel="table entries a request (dashed)", yscale="log")
other.grid(False)
other.spines["right"].set_visible(True)
axes[1].set_xscale("log", base=2)
axes[1].set(xlabel="slots in a block", ylabel="empty slots, percent")
axes[1].set_title("memory: all documentation pages")
plot.caption(
    fig,
    "Left: the second request reuses the whole blocks of the common 350 tokens, and passes what is "
    "left of them again. Right: larger blocks leave more slots empty; smaller ones make "
    "longer tables, and shorter stretches for the kernel to read.",
)
plt.show()

# %% [markdown]
# **What came out.** A request after the first passes 380 tokens less the whole blocks of the common
# 350, whatever the pages are; where two pages begin alike, a little less. The answers are the same
# in each of five choices of pages. Blocks of 16, vLLM's default on a GPU, are cheap on both sides.
# Blocks of 1 would reuse everything and leave nothing empty (SGLang's default page is one token):
# what speaks against them is a table as long as the text, and reads of one token's key at a time,
# $2D$ bytes in half precision, scattered over memory.

# %% [markdown]
# ## From one pool to another
#
# Prefill is bound by arithmetic and decode by memory (lesson 28), so large services run them on
# different machines: **disaggregated serving**. Between the two phases a request's cache has to
# move. With pages that is a copy of its blocks into any free blocks of the other pool, and a new
# table; nothing in a key depends on where it lies. The pools may have blocks of different sizes.
#
# ### Exercise · Migrate


# %% exercise="migrate" minutes=12 difficulty=2 path="more"
def migrate(sequence: int, source: PagedKVCache, target: PagedKVCache) -> int:
    """Moves a sequence with all its keys and values to another cache; its number there.

    The caches have equal layers, kv_heads and head_dim (ValueError otherwise); block size, dtype
    and number of blocks may differ. What is moved takes the target's dtype. Afterwards the source
    has forgotten the sequence; sequences that share its blocks there keep them. In the target it
    takes as few blocks as hold it.

    KeyError if the source does not have the sequence; OutOfBlocks if the target has too few free
    blocks; any of the errors where several apply. Whenever it raises, both caches are as they were:
    no sequence more, none less.
    """
    ### BEGIN SOLUTION
    layers, _, kv_heads, _, head_dim = source.k.shape
    if (layers, kv_heads, head_dim) != tuple(target.k.shape[i] for i in (0, 2, 4)):
        raise ValueError("the caches have different layers, heads or head sizes")
    length, size = source.lengths[sequence], source.block_size
    places = torch.arange(length, device=source.k.device)
    table = torch.tensor(source.tables[sequence], dtype=torch.long, device=source.k.device)
    block, offset = table[places // size], places % size
    moved = target.add()
    try:
        slots = target.reserve(moved, length)
    except OutOfBlocks:
        target.free(moved)
        raise
    for layer in range(layers):
        k, v = (pool[layer][block, :, offset].to(target.k.device) for pool in (source.k, source.v))
        target.write(layer, slots, k, v)
    source.free(sequence)
    return moved
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: use what is there</summary>
#
# `target.add`, `target.reserve` and `target.write` do the target's side for any block size. Read
# the source by its table, and free it last.
# </details>

# %% check="migrate" points=2
g = checks.generator(11)
source = PagedKVCache(layers=2, kv_heads=2, head_dim=3, num_blocks=6, block_size=4)
target = PagedKVCache(layers=2, kv_heads=2, head_dim=3, num_blocks=6, block_size=2)
notes = Notes(source)
text = notes.add()
notes.extend(text, 7, g)
before = [held(source, layer, text) for layer in range(2)]
moved = migrate(text, source, target)
assert text not in source.tables, "the source still has the sequence"
assert text not in source.lengths, "the source still has the sequence's length"
assert source.allocator.available == 6, "the source's blocks are free again"
assert len(target.tables[moved]) == 4, (
    f"7 tokens take 4 blocks of 2; the table in the target is {list(target.tables[moved])}"
)
for layer in range(2):
    for found, right, name in zip(
        held(target, layer, moved), before[layer], ("keys", "values"), strict=True
    ):
        checks.close(found, right, what=f"the {name} of layer {layer} in the target")
### BEGIN HIDDEN TESTS
for from_size, to_size, length, dtype in [
    (3, 5, 11, torch.float32),
    (4, 4, 8, torch.bfloat16),
    (1, 3, 4, torch.float64),
    (5, 2, 0, torch.float32),
    (8, 2, 1, torch.float32),
]:
    own = torch.float64 if dtype == torch.float64 else torch.float32
    source = PagedKVCache(3, 1, 2, 30, from_size, dtype=own)
    target = PagedKVCache(3, 1, 2, 20, to_size, dtype=dtype)
    notes, there = Notes(source), Notes(target)
    stays = notes.add()
    notes.extend(stays, length, g)
    goes = notes.fork(stays)
    notes.extend(goes, 2 if length else 0, g)
    others = [there.add() for _ in range(4)]
    there.extend(others[2], 4, g)
    moved = migrate(goes, source, target)
    checks.kind(moved, int, what="the sequence's number in the target")
    assert moved not in others, "its number in the target belongs to another sequence"
    needed = -(-(length + 2 if length else 0) // to_size)
    assert len(target.tables[moved]) == needed, (
        f"{len(target.tables[moved])} blocks of {to_size} in the target; {needed} hold the sequence"
    )
    there.tokens[moved] = notes.tokens.pop(goes)
    notes.compare("in the source, after one of two that share has moved")
    there.compare("in the target")
# Too few blocks in the target, other shapes, no such sequence: nothing changes.
source, target = PagedKVCache(1, 1, 2, 8, 4), PagedKVCache(1, 1, 2, 3, 4)
notes, there = Notes(source), Notes(target)
text = notes.add()
notes.extend(text, 9, g)
there.extend(there.add(), 1, g)
for _ in range(2):
    checks.raises(OutOfBlocks, migrate, text, source, target, because="3 blocks, 2 are free")
    assert len(target.tables) == len(target.lengths) == 1, "the target has a sequence too many"
    notes.compare("in the source, after a refused move")
    there.compare("in the target, after a refused move")
for shape in ((2, 1, 2), (1, 2, 2), (1, 1, 3)):
    unlike = PagedKVCache(*shape, 8, 4)
    checks.raises(ValueError, migrate, text, source, unlike, because="the shapes differ")
    assert len(unlike.tables) == 0, "a refused move left a sequence in the target"
checks.raises(KeyError, migrate, 12345, source, target)
assert len(target.tables) == 1, "a sequence that is not there left one in the target"
notes.compare("in the source, at last")
### END HIDDEN TESTS

# %% [markdown]
# ## The kernel: one query, many keys, scattered
#
# `paged_attention` reads every key, writes it in order, and reads it again. A kernel follows the
# table and reads once. Decode is bound by exactly these bytes: at most a third of them is left. (If
# Triton is new to you: lesson 03 introduces it, lesson 29 has the forward kernel.)
#
# **What one program does.** It takes one key–value head of one sequence, and *all* query heads that
# share it: they are the rows of a tile, so that each key is loaded once for the group. It walks
# over its keys in tiles of `BLOCK_N` with online softmax (lesson 29): running maximum $m$, sum
# $\ell$, accumulator. What is new is where the keys are. Token $j$ lies in row $j \bmod S$ of block
# $t_{\lfloor j/S \rfloor}$, so a tile of token numbers becomes a tile of block numbers by one more
# load, and then a tile of addresses. A tile may span several blocks, or a part of one.
#
# **Why split.** One sequence of 100,000 tokens with 8 key–value heads makes 8 programs; an H200 has
# 132 multiprocessors, and 124 of them would watch. **Flash-Decoding** cuts each sequence's keys
# into $P$ splits, programs of their own. Each writes the output over *its* keys, $o_p$, and the
# logarithm of its sum, $L_p = \log_2 \sum_j 2^{s_j}$ in base 2, where $s_j$ is the scaled score
# times $\log_2 e$. These two are enough to merge:
#
# $$o = \frac{\sum_j 2^{s_j} v_j}{\sum_j 2^{s_j}} = \frac{\sum_p 2^{L_p}\, o_p}{\sum_p 2^{L_p}},$$
#
# since $o_p$ is split $p$'s numerator divided by $2^{L_p}$. Subtract the largest $L_p$ from all
# before the powers are taken, or they overflow.
#
# **Empty splits.** Splits are as many for a sequence of 5 tokens as for one of 100,000. A split
# without keys has $2^{L_p} = 0$: $L_p = -\infty$, and $o_p = 0$. An $L_p$ of 0 would give it the
# weight of one key with score 0, and nobody would notice while other scores are large.

# %% [markdown]
# ### Exercise · The merge kernel
#
# A program merges one head of one sequence. There may be more splits than one tile has rows, so it
# walks over them with a running maximum, as one walks over keys. The loads (`load_splits`) and the
# last lines are given.


# %%
@triton.jit
def load_splits(parts_ptr, lse_ptr, row, first, splits, HEAD_DIM: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """Splits first … first + BLOCK_S of one head: lse (BLOCK_S,) and parts (BLOCK_S, BLOCK_D).

    Beyond the last split lse is -inf and parts are 0.
    """
    index, cols = first + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * splits + index, mask=index < splits, other=float("-inf"))
    inside = (index[:, None] < splits) & (cols[None, :] < HEAD_DIM)
    ptrs = parts_ptr + (row * splits + index[:, None]) * HEAD_DIM + cols[None, :]
    return lse, tl.load(ptrs, mask=inside, other=0.0)


# %% exercise="merge_kernel" minutes=10 difficulty=2 path="more"
@triton.jit
def merge_kernel(
    parts_ptr, lse_ptr, o_ptr, o_batch, o_head, splits, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: the output over all keys, from the outputs over each split's keys.

    parts: (batch, heads, splits, HEAD_DIM) float32, contiguous: each split's own output.
    lse:   (batch, heads, splits) float32, contiguous: log2 of each split's sum; a split without
        keys has -inf, and 0 as its part.
    o:     (batch, heads, HEAD_DIM), strides o_batch, o_head, 1. Where no split has a key, 0.

    Grid: (heads, batch). BLOCK_S, a power of two, splits at a time: there may be more of them, or
    fewer. BLOCK_D ≥ HEAD_DIM, a power of two. Each number is loaded once.
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + head
    cols = tl.arange(0, BLOCK_D)
    top = -float("inf")  # the largest lse so far
    total = 0.0  # Σ 2^(lse − top)
    acc = tl.zeros((BLOCK_D,), tl.float32)  # Σ 2^(lse − top) · part
    # Walk over the splits with load_splits, and bring top, total and acc up to date:
    ### BEGIN SOLUTION
    for first in range(0, splits, BLOCK_S):
        lse, parts = load_splits(parts_ptr, lse_ptr, row, first, splits, HEAD_DIM, BLOCK_D, BLOCK_S)
        higher = tl.maximum(top, tl.max(lse, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing yet: -inf - -inf is NaN
        share, keep = tl.exp2(lse - base), tl.exp2(top - base)
        acc = acc * keep + tl.sum(share[:, None] * parts, axis=0)
        total = total * keep + tl.sum(share, axis=0)
        top = higher
    ### END SOLUTION
    o = acc / tl.where(total > 0, total, 1.0)
    o_ptrs = o_ptr + batch * o_batch + head * o_head + cols
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=cols < HEAD_DIM)


# %% [markdown]
# <details><summary>Hint: all −∞ so far</summary>
#
# −∞ − (−∞) is NaN. Subtract 0 in place of the maximum while it is −∞ (`tl.where`): then all powers
# are 0, as they should be.
# </details>
#
# <details><summary>Hint: a type that changes in the loop</summary>
#
# What goes round a loop keeps its shape and type: `top` and `total` are numbers, `acc` is a vector.
# `tl.max(lse, axis=0)` and `tl.sum(x, axis=0)` of a vector are numbers.
# </details>


# %%
def merge(parts, lse, out, block_s=16):
    """Launches merge_kernel: parts (batch, heads, splits, head_dim) and lse into out."""
    batch, heads, splits, head_dim = parts.shape
    merge_kernel[heads, batch](
        *(parts, lse, out, out.stride(0), out.stride(1), splits),
        **{"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_S": block_s},
    )
    return out


# %% tags=["support"]
# Support: random splits, their merge in float64, and the merge among canaries


def random_splits(batch, heads, splits, head_dim, g, spread=3.0):
    """(parts, lse): about a third of the splits are empty."""
    parts = checks.randn(batch, heads, splits, head_dim, generator=g)
    lse = checks.randn(batch, heads, splits, generator=g, scale=spread)
    empty = checks.randn(batch, heads, splits, generator=g) < -0.4
    return parts.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -math.inf)


def merged(parts, lse):
    """Weights softmax over the splits, in float64; 0 where all are empty."""
    weights = (lse.double() * math.log(2)).softmax(-1).nan_to_num(0.0)
    return (weights[..., None] * parts.double()).sum(-2)


def merge_among_canaries(parts, lse, block_s, dtype=torch.float32):
    out = torch.full_like(parts[:, :, 0], math.nan, dtype=dtype)
    tensors = {"parts": parts, "lse": lse, "o": out}
    with checks.buffers(**tensors, written=("o",), contiguous=("parts", "lse")) as guarded:
        merge(guarded.parts, guarded.lse, guarded.o, block_s)
    return guarded.o.clone()


# %% check="merge_kernel" points=2
# Two splits whose sums are 2² and 2⁰: weights 4/5 and 1/5. A third one is empty.
parts = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]], device=profile.device)
lse = torch.tensor([[[2.0, 0.0, -math.inf]]], device=profile.device)
with checks.launches() as launched:
    out = merge(parts, lse, torch.empty(1, 1, 2, device=profile.device), 2)
assert launched.kernels["merge_kernel"] == 1, "merge_kernel was not launched"
checks.close(
    out,
    torch.tensor([[[0.8, 0.2]]]),
    what="the output of splits with lse 2, 0 and −∞",
    mistakes={
        "the mean of the splits": torch.tensor([[[0.5, 0.5]]]),
        "powers of e": torch.tensor([[[1.0, math.exp(-2)]]]) / (1 + math.exp(-2)),
        "the last tile of splits alone": torch.zeros(1, 1, 2),
        "giving the empty split a share": torch.tensor([[[4 / 6, 1 / 6]]]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(12)
for batch, heads, splits, head_dim, block_s in [
    (2, 3, 5, 6, 4),
    (1, 2, 1, 16, 4),
    (3, 1, 9, 5, 2),
    (2, 2, 3, 3, 16),
]:
    parts, lse = random_splits(batch, heads, splits, head_dim, g)
    lse[0, 0], parts[0, 0] = -math.inf, 0  # no split of this row has a key
    with checks.forbidden("softmax", "logsumexp"):
        out = merge_among_canaries(parts, lse, block_s)
    where = f"{splits} splits, {block_s} at a time, head_dim {head_dim}"
    checks.relative_l2(out, merged(parts, lse), 2e-6, what=f"the output of {where}")
    checks.close(
        out[0, 0], torch.zeros(head_dim), what=f"the output where no split has a key, {where}"
    )
parts, lse = random_splits(2, 2, 6, 4, g)
lse[0, 0], parts[0, 0] = -math.inf, 0
with checks.traffic() as moved:
    merge(parts, lse, torch.empty(2, 2, 4, device=parts.device), 4)
due = parts.numel() + lse.numel()
assert moved is None or moved.loaded <= due, (
    f"{moved.loaded} numbers are loaded where there are {due}: once each"
)
### END HIDDEN TESTS
with checks.compiled():  # and for a GPU
    merge(parts, lse, torch.empty_like(parts[:, :, 0]), 2)

# %% check="merge_kernel" points=1
# Sums of 2⁴⁰⁰ and 2³⁹⁹: relative to their maximum they are 1 and ½.
parts = torch.tensor([[[[3.0], [0.0]]]], device=profile.device)
lse = torch.tensor([[[400.0, 399.0]]], device=profile.device)
out = merge(parts, lse, torch.empty(1, 1, 1, device=profile.device), 2)
checks.close(out[0, 0], torch.tensor([2.0]), what="the output for lse of 400 and 399")
with checks.compiled():
    merge(parts, lse, torch.empty(1, 1, 1, device=profile.device), 2)
### BEGIN HIDDEN TESTS
g = checks.generator(13)
for center, spread in ((-400.0, 2.0), (400.0, 2.0), (0.0, 150.0)):
    parts, lse = random_splits(2, 3, 7, 5, g, spread)
    lse = lse + center
    for order in (lse.argsort(-1), lse.argsort(-1, descending=True)):  # the maximum last, or first
        ordered = parts.gather(2, order[..., None].expand_as(parts)), lse.gather(2, order)
        out = merge_among_canaries(*ordered, 2)
        checks.relative_l2(
            out,
            merged(*ordered),
            5e-5,
            what=f"the output for lse near {center:g} ± {spread:g}, sorted, 2 at a time",
            hint="Is the maximum the running one, and are acc and total multiplied by "
            "2^(old − new) when it rises?",
        )
for half in (torch.float16,) if profile.interpret else (torch.float16, torch.bfloat16):
    parts, lse = random_splits(1, 4, 64, 16, g)
    parts = parts + 5 * (lse > -math.inf)[..., None]
    out = merge_among_canaries(parts, lse, 4, half)
    assert out.dtype == half, f"o is {half}: {out.dtype} was stored"
    limit = 3e-4 if half == torch.float16 else 3e-3
    checks.relative_l2(out, merged(parts, lse), limit, what=f"o in {half}, 64 splits")
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · The decode kernel
#
# Given: a program's queries, its length, its table, and the stores. Yours: which keys belong to its
# split, and the loop over their tiles. `BLOCK_N` does not have to fit the blocks of the pool.
#
# Four things make it fast, and the given lines have two of them: queries of a whole group in one
# tile, and the scale folded into base 2. The others are yours: each key and value is loaded once,
# and no tile behind the sequence's end is loaded at all.


# %% exercise="paged_decode_kernel" minutes=30 difficulty=3
@triton.jit
def paged_decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, lengths_ptr, parts_ptr, lse_ptr, q_batch, q_head, k_block,
    k_head, k_row, v_block, v_head, v_row, table_row, group, splits, scale,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's keys, for the query heads that share one key–value head.

    q: (batch, heads, HEAD_DIM), strides q_batch, q_head, 1; heads = kv_heads · group.
    k, v: (blocks, kv_heads, PAGE, HEAD_DIM), each with strides of its own (x_block, x_head, x_row,
        1), in q's dtype. A pool may have more than 2³¹ elements; PAGE · x_row is below 2³¹.
    tables: (batch, …) int32, rows table_row apart: token j lies in block tables[b, j // PAGE], row
        j % PAGE. lengths: (batch,) int32, 0 too. Other entries and slots may hold anything.
    parts: (batch, heads, splits, HEAD_DIM) float32, contiguous: softmax(scale · q·k) v over this
        split's keys. lse: (batch, heads, splits) float32, contiguous: log2 Σ_j exp(scale · q·k_j).
        A split without keys stores 0 and -inf.

    Grid: (splits, kv_heads, batch). Split s has the keys s·n … (s+1)·n − 1 that are below the
    sequence's length, n = ⌈length / splits⌉ rounded up to a multiple of BLOCK_N. BLOCK_G ≥ group,
    BLOCK_D ≥ HEAD_DIM and BLOCK_N are powers of two, at least 16. Sums in float32, and products of
    float32 without TF32; for their product with v the weights may be rounded to v's dtype. Of k, v
    and tables each program loads its keys and values, and at most one table entry for each key,
    once; nothing else.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, cols = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * group + rows  # the query heads of this program
    real = (rows[:, None] < group) & (cols[None, :] < HEAD_DIM)
    q_ptrs = q_ptr + batch * q_batch + heads[:, None] * q_head + cols[None, :]
    q = tl.load(q_ptrs, mask=real, other=0.0)
    length = tl.load(lengths_ptr + batch)
    tables_ptr += batch * table_row
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head

    log2_scale = scale * 1.4426950408889634  # exp(scale · x) = exp2(log2_scale · x)
    m = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    # This split's keys, and the loop over their tiles, which brings m, l and acc up to date:
    ### BEGIN SOLUTION
    span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * span
    end = tl.minimum(begin + span, length)  # not above begin where nothing is left: no turn
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        seen = tokens < end
        block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
        inside = seen[:, None] & (cols[None, :] < HEAD_DIM)
        k_rows = k_ptr + block * k_block + tokens % PAGE * k_row
        k = tl.load(k_rows[:, None] + cols[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        s = tl.where(seen[None, :], s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, axis=1))  # finite: the first token of a tile is seen
        p, keep = tl.exp2(s - higher[:, None]), tl.exp2(m - higher)
        l = l * keep + tl.sum(p, axis=1)
        v_rows = v_ptr + block * v_block + tokens % PAGE * v_row
        v = tl.load(v_rows[:, None] + cols[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        m = higher
    ### END SOLUTION

    some = l > 0  # False where the split has no key
    l = tl.where(some, l, 1.0)
    out = (batch * tl.num_programs(1) * group + heads) * splits + split
    tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), -float("inf")), mask=rows < group)
    tl.store(parts_ptr + out[:, None] * HEAD_DIM + cols[None, :], acc / l[:, None], mask=real)


# %% [markdown]
# <details><summary>Hint: from tokens to addresses</summary>
#
# A tile of token numbers; which of them are below the split's end; `tokens // PAGE` picks the table
# entries, a load with that mask; block number · k_block + (token % PAGE) · k_row is where a key
# begins. Make the block number an int64 before it is multiplied.
# </details>
#
# <details><summary>Hint: bounds of a split</summary>
#
# n is a multiple of BLOCK_N, computed from this sequence's own length. The last split that has keys
# may be cut short by the length, later ones begin behind it: with the end clamped to the length
# their loop makes no turn, and m, l and acc stay as they began.
# </details>
#
# <details><summary>Hint: NaN in the output</summary>
#
# Slots behind the length hold NaN in the checks. Loads of keys and of values need the mask, with 0
# for what is not there, and the score of a key that is not there is −∞, not 0.
# </details>

# %%
# (BLOCK_N, warps, pipeline stages) to choose from; the interpreter takes the first.
CONFIGS = [(32, 4, 3), (64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 8, 5)]
TUNED = tuple(
    triton.Config({"BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for n, warps, stages in CONFIGS
)


def choose_splits(q, kv_heads, most):
    """So many that a GPU has four programs for each multiprocessor, none for fewer than 256 tokens.

    It asks for no length, which lies on the GPU: `most` is what the tables have room for.
    """
    if not q.is_cuda:
        return 2
    programs = 4 * torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(triton.cdiv(programs, q.shape[0] * kv_heads), most // 256))


def decode_parts(q, k, v, tables, lengths, parts, lse, block_n=None):
    """Launches paged_decode_kernel: what each split gives, into parts and lse."""
    batch, heads, head_dim = q.shape
    _, kv_heads, page, _ = k.shape
    splits, group = parts.shape[2], heads // kv_heads
    tensors = q, k, v, tables, lengths, parts, lse
    strides = *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], tables.stride(0)
    known = {
        "PAGE": page,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_G": max(16, triton.next_power_of_2(group)),
    }
    kernel = paged_decode_kernel
    if block_n is None and q.dtype == torch.float32 and not profile.interpret:
        block_n = 32  # without tensor cores, larger tiles do not fit in registers
    if block_n is None:
        room = triton.next_power_of_2(tables.shape[1] * page)
        kernel = autotuned(kernel, TUNED, ("HEAD_DIM", "PAGE"), bucket=(room, batch, splits))
    else:
        known["BLOCK_N"] = block_n
    kernel[(splits, kv_heads, batch)](
        *tensors, *strides, group, splits, 1 / math.sqrt(head_dim), **known
    )
    return parts, lse


def paged_decode(q, k, v, tables, lengths, splits=None, block_n=None):
    """As paged_attention, by the two kernels; tables and lengths are int32."""
    batch, heads, head_dim = q.shape
    if splits is None:
        splits = choose_splits(q, k.shape[1], tables.shape[1] * k.shape[2])
    wide = {"dtype": torch.float32, "device": q.device}
    parts = torch.empty(batch, heads, splits, head_dim, **wide)
    lse = torch.empty(batch, heads, splits, **wide)
    decode_parts(q, k, v, tables, lengths, parts, lse, block_n)
    return merge(parts, lse, torch.empty_like(q))


# %% tags=["support"]
# Support: the splits by definition, the kernel among canaries, and where it reads


def splits_by_definition(q, k, v, tables, lengths, splits, block_n):
    """parts (batch, heads, splits, head_dim) and lse in base 2, in float64, key by key."""
    batch, heads, head_dim = q.shape
    parts = q.new_zeros(batch, heads, splits, head_dim, dtype=torch.float64)
    lse = q.new_full((batch, heads, splits), -math.inf, dtype=torch.float64)
    for b in range(batch):
        keys, values = (tokens_of(pool, tables, lengths, b) for pool in (k, v))
        n = block_n * math.ceil(math.ceil(int(lengths[b]) / splits) / block_n)
        for s in range(splits):
            own = slice(s * n, (s + 1) * n)
            parts[b, :, s], found = attend_one(q[b], keys[:, own], values[:, own])
            lse[b, :, s] = found / math.log(2)
    return parts, lse


def parts_among_canaries(q, k, v, tables, lengths, splits, block_n):
    """(parts, lse) of the kernel, each tensor in a buffer and with strides of its own."""
    batch, heads, head_dim = q.shape
    parts = torch.full((batch, heads, splits, head_dim), math.nan, device=q.device)
    lse = torch.full((batch, heads, splits), math.nan, device=q.device)
    tensors = {"q": q, "k": k, "v": v, "tables": tables, "lengths": lengths}
    tensors |= {"parts": parts, "lse": lse}
    written = ("parts", "lse")
    with checks.buffers(**tensors, written=written, contiguous=("tables", *written)) as guarded:
        decode_parts(*guarded, block_n)
    return guarded.parts.clone(), guarded.lse.clone()


@checks.measured
def stray_loads(kernel):
    """How many addresses the kernel reads in none of its tensors, whose blocks lie 2³⁰ elements
    apart; only the tables and lengths are touched. Interpreter only; None elsewhere."""
    group, splits, page, head_dim = 3, 2, 4, 5
    q, pool = torch.zeros(2, 2 * group, head_dim), torch.zeros(1)
    rows = [[17, 2, 9, 4, 7, 5, 5], [3, 12, 6, 5, 5, 5, 5], [9, 20, 5, 5, 5, 5, 5]]
    small = torch.tensor(rows, dtype=torch.int32)  # the last row: lengths, and no table
    parts, lse = torch.zeros(2, 2 * group, splits, head_dim), torch.zeros(2, 2 * group, splits)
    k_strides, v_strides = (2**30, 2**20, 64), (2**31 + 2**29, 2**21, 32)
    lengths = small[2]
    lengths[0], lengths[1] = 18, 11
    with checks.traffic(only=small) as seen:
        if seen is None:
            return None
        kernel[(splits, 2, 2)](
            *(q, pool, pool, small, lengths, parts, lse),
            *(q.stride(0), q.stride(1), *k_strides, *v_strides, 7, group, splits, 0.3),
            **{"PAGE": page, "HEAD_DIM": head_dim, "BLOCK_D": 16, "BLOCK_G": 16, "BLOCK_N": 16},
        )
    known = checks.addresses(q) | checks.addresses(small)
    for b, n in enumerate((18, 11)):
        for j in range(n):
            block = int(small[b, j // page])
            for strides in (k_strides, v_strides):
                for head in range(2):
                    start = block * strides[0] + head * strides[1] + j % page * strides[2]
                    known |= {pool.data_ptr() + 4 * (start + c) for c in range(head_dim)}
    return len(seen.read.keys() - known)


# %% check="paged_decode_kernel" points=2
# One sequence of two tiles of 16 keys in blocks of 8, one split, four query heads on two.
g = checks.generator(14)
k, v, tables, lengths = scattered([32], 8, 2, 16, g, wild=False)
q = checks.randn(1, 4, 16, generator=g)
outputs = torch.empty(1, 4, 1, 16, device=q.device), torch.empty(1, 4, 1, device=q.device)
with checks.launches() as launched:
    parts, lse = decode_parts(q, k, v, tables, lengths, *outputs, 16)
assert launched.kernels["paged_decode_kernel"] == 1, "paged_decode_kernel was not launched"
assert launched.programs == 2, "one split of two key–value heads is two programs"
exact, exact_lse = splits_by_definition(q, k, v, tables, lengths, 1, 16)
checks.relative_l2(
    parts,
    exact,
    2e-6,
    what="parts",
    mistakes={
        "looking at the first tile only": splits_by_definition(
            q, k, v, tables, lengths // 2, 1, 16
        )[0],
        "leaving out the scale": splits_by_definition(4 * q, k, v, tables, lengths, 1, 16)[0],
        "blocks in the order of the pool": splits_by_definition(
            q, k.nan_to_num(), v.nan_to_num(), torch.arange(4)[None], lengths, 1, 16
        )[0],
    },
)
checks.relative_l2(
    lse,
    exact_lse,
    2e-6,
    what="lse",
    hint="In base 2: m + log2(l)",
    mistakes={"the natural logarithm": exact_lse * math.log(2)},
)
### BEGIN HIDDEN TESTS
g = checks.generator(15)
for lengths, page, heads, kv_heads, head_dim, splits, block_n in [
    ([1, 13, 22], 4, 6, 2, 5, 3, 16),
    ([40, 0, 17], 16, 4, 4, 24, 2, 32),
    ([41, 33], 5, 20, 1, 16, 2, 16),
]:
    k, v, tables, lengths = scattered(lengths, page, kv_heads, head_dim, g, wild=False)
    k[int(tables[0, 0]), :, 0] = 0  # a key as good as others: its score is 0
    q = checks.randn(len(lengths), heads, head_dim, generator=g)
    with checks.launches() as launched, checks.forbidden("scaled_dot_product_attention", "softmax"):
        parts, lse = parts_among_canaries(q, k, v, tables, lengths, splits, block_n)
    assert launched.kernels["paged_decode_kernel"] == 1, "paged_decode_kernel was not launched"
    where = (
        f"lengths {lengths.tolist()}, blocks of {page}, {heads} heads on {kv_heads} of {head_dim}, "
        f"{splits} splits, BLOCK_N = {block_n}"
    )
    exact, exact_lse = splits_by_definition(q, k, v, tables, lengths, splits, block_n)
    checks.relative_l2(parts, exact, 2e-6, what="parts", hint=where)
    some = exact_lse.isfinite()
    checks.relative_l2(lse[some], exact_lse[some], 2e-6, what="lse", hint=where)
    assert bool((lse[~some] == -math.inf).all()), f"the lse of an empty split is -inf: {where}"
    assert bool((parts[~some] == 0).all()), f"the part of an empty split is 0: {where}"
### END HIDDEN TESTS
with checks.compiled():  # and for a GPU
    decode_parts(q, k, v, tables, lengths, parts, lse, 16)

# %% check="paged_decode_kernel" points=2
# Lengths that fit no tile, three splits, and splits that get no key.
g = checks.generator(16)
k, v, tables, lengths = scattered([1, 13, 22], 4, 1, 8, g, wild=False)
q = checks.randn(3, 2, 8, generator=g)
outputs = [torch.full(shape, math.nan, device=q.device) for shape in ((3, 2, 3, 8), (3, 2, 3))]
parts, lse = decode_parts(q, k, v, tables, lengths, *outputs, 16)
exact, exact_lse = splits_by_definition(q, k, v, tables, lengths, 3, 16)
assert bool((lse[0, :, 1:] == -math.inf).all()), (
    f"a sequence of 1 token in three splits: the last two have lse = -inf; yours has "
    f"{lse[0, 0].tolist()}"
)
checks.relative_l2(
    parts,
    exact,
    2e-6,
    what="parts for lengths 1, 13, 22 in three splits",
    hint="n is 16 for all three: 22 keys are 16 and 6, and nothing is left for the third split",
)
checks.close(lse.double().exp2(), exact_lse.exp2(), rtol=1e-5, what="2^lse of the splits")
with checks.compiled():
    decode_parts(q, k, v, tables, lengths, *outputs, 16)
### BEGIN HIDDEN TESTS
# The output, with any number of splits and any tile.
k, v, tables, lengths = scattered([40, 19, 3], 4, 2, 12, g, wild=False)
q = checks.randn(3, 6, 12, generator=g)
exact, _ = decode_by_definition(q, k, v, tables, lengths)
for splits, block_n in [(1, 64), (4, 16)]:
    parts, lse = parts_among_canaries(q, k, v, tables, lengths, splits, block_n)
    checks.relative_l2(
        merged(parts, lse), exact, 2e-6, what=f"the output, {splits} splits, BLOCK_N = {block_n}"
    )
# Where blocks lie and how large they are changes nothing.
one = [torch.full((1, 2, 50, 12), math.nan, device=q.device) for _ in range(2)]
for pool, big in zip((k, v), one, strict=True):
    for j in range(40):
        big[0, :, j] = pool[int(tables[0, j // 4]), :, j % 4]
single = torch.zeros(1, 1, dtype=torch.int32, device=q.device)
parts, lse = parts_among_canaries(q[:1], *one, single, lengths[:1], 2, 16)
checks.relative_l2(merged(parts, lse), exact[:1], 2e-6, what="the output with one large block")
# What is loaded, counted.
empty = torch.empty(3, 6, 2, 12, device=q.device)
with checks.traffic() as moved:
    decode_parts(q, k, v, tables, lengths, empty, empty[..., 0].clone(), 16)
due = 2 * (q.numel() + 3 * 2) + 2 * int(lengths.sum()) * (2 * 12 + 1)
assert moved is None or moved.loaded <= due, (
    f"{moved.loaded:,} elements are loaded where {due:,} are enough: each key, value and table "
    "entry once, nothing behind a length, no column beyond HEAD_DIM"
)
stray = stray_loads(paged_decode_kernel)
assert not stray, (
    f"{stray} addresses outside the tensors are read where blocks lie 2³⁰ elements apart: is every "
    "load masked, and is the block number an int64 before it is multiplied?"
)
### END HIDDEN TESTS

# %% check="paged_decode_kernel" points=2
# Scores from about -80 to 80: the running maximum has to carry from tile to tile.
g = checks.generator(17)
k, v, tables, lengths = scattered([48], 16, 1, 16, g, scale=4.0, wild=False)
q = checks.randn(1, 2, 16, generator=g, scale=8.0)
outputs = torch.empty(1, 2, 1, 16, device=q.device), torch.empty(1, 2, 1, device=q.device)
parts, lse = decode_parts(q, k, v, tables, lengths, *outputs, 16)
checks.relative_l2(
    parts[:, :, 0],
    decode_by_definition(q, k, v, tables, lengths)[0],
    5e-5,
    what="parts for scores of wide range",
    hint="Is every tile's maximum merged with the running one, and are l and acc multiplied by "
    "2^(old − new)?",
)
with checks.compiled():
    decode_parts(q, k, v, tables, lengths, *outputs, 16)
### BEGIN HIDDEN TESTS
for center in (-200.0, 200.0):
    # All scores near ∓200: a missing key's 0 would tower over them, or their powers overflow.
    k, v, tables, lengths = scattered([37, 5], 4, 1, 16, g, scale=0.05, wild=False)
    k, q = k + 2.5, torch.full((2, 3, 16), center / 10, device=k.device)
    parts, lse = parts_among_canaries(q, k, v, tables, lengths, 2, 16)
    exact, exact_lse = decode_by_definition(q, k, v, tables, lengths)
    checks.relative_l2(
        merged(parts, lse), exact, 1e-4, what=f"the output for scores near {center:g}"
    )
    total = (lse.double() * math.log(2)).logsumexp(-1)
    checks.relative_l2(total, exact_lse, 2e-6, what=f"lse for scores near {center:g}")
# The first tile near +120, the others near -120: relative to a later maximum the first overflows.
k, v, tables, lengths = scattered([48], 16, 1, 16, g, scale=0.1, wild=False)
q = torch.full((1, 2, 16), 6.0, device=k.device)
k[int(tables[0, 0])] += 5
for i in (1, 2):
    k[int(tables[0, i])] -= 5
parts, lse = parts_among_canaries(q, k, v, tables, lengths, 1, 16)
checks.relative_l2(
    parts[:, :, 0],
    decode_by_definition(q, k, v, tables, lengths)[0],
    5e-5,
    what="parts where the first tile scores 240 more than the others",
)
# All scores far below any constant: a missing key's is -inf. Powers of two, so sums are exact.
k, v, tables, lengths = scattered([3], 4, 1, 16, g, wild=False)
q, k = torch.full((1, 1, 16), -(2.0**50), device=k.device), k * 0 + 2.0**50
outputs = torch.empty(1, 1, 1, 16, device=q.device), torch.empty(1, 1, 1, device=q.device)
parts, _ = decode_parts(q, k, v, tables, lengths, *outputs, 16)
exact, _ = decode_by_definition(q, k, v, tables, lengths)
checks.relative_l2(parts[:, :, 0], exact, 2e-6, what="parts where all scores are -5e30")
# Half precision: many tiles of values with a mean, which a half-precision accumulator loses.
for half in (torch.float16,) if profile.interpret else (torch.float16, torch.bfloat16):
    k, v, tables, lengths = scattered([400, 31], 16, 1, 16, g, scale=0.3, wild=False)
    k, v, q = k.to(half), (v + 5).to(half), checks.randn(2, 2, 16, generator=g).to(half)
    parts, lse = parts_among_canaries(q, k, v, tables, lengths, 1, 16)
    exact, exact_lse = decode_by_definition(q, k, v, tables, lengths)
    limit = 1e-4 if half == torch.float16 else 8e-4
    checks.relative_l2(merged(parts, lse), exact, limit, what=f"the output of inputs in {half}")
    total = (lse.double() * math.log(2)).logsumexp(-1)
    checks.relative_l2(total, exact_lse, 2e-6, what=f"lse of inputs in {half}")
### END HIDDEN TESTS

# %% [markdown]
# ### On the hardware
#
# On a GPU the next cells measure your kernels at a batch of 32, 32 query heads on 8 key–value heads
# of 128, bfloat16, blocks of 16. Beside them in the same run: a plain copy of both pools, half of
# whose traffic is reading; and gathering the blocks for PyTorch's own attention. On a CPU they
# count: what your two versions of paged attention move, and how many multiprocessors have work.


# %% tags=["experiment"]
on_gpu = profile.name == "gpu" and not profile.interpret


def pools_of(lengths, page, kv_heads, head_dim, dtype):
    """Pools, shuffled tables and lengths for sequences of these lengths."""
    g = torch.Generator(profile.device).manual_seed(0)
    need = [math.ceil(n / page) for n in lengths]
    shape, options = (sum(need), kv_heads, page, head_dim), {"device": profile.device}
    k, v = (torch.randn(shape, generator=g, dtype=dtype, **options) for _ in range(2))
    order = torch.randperm(sum(need), generator=g, **options).to(torch.int32)
    tables = torch.zeros(len(lengths), max(need), dtype=torch.int32, **options)
    for row, part in zip(tables, order.split(need), strict=True):
        row[: len(part)] = part
    return k, v, tables, torch.tensor(lengths, dtype=torch.int32, **options)


def gather_and_attend(q, k, v, tables, lengths):
    """PyTorch's attention over gathered blocks: all sequences as long as their table."""
    keys, values = (pool[tables.long()].transpose(1, 2).flatten(2, 3) for pool in (k, v))
    seen = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True
    )
    return out[:, :, 0]


bandwidths = {}
if on_gpu:
    for n in (1024, 4096, 16384, 32768):
        k, v, tables_gpu, lengths_gpu = pools_of([n] * 32, 16, 8, 128, torch.bfloat16)
        q = torch.randn(32, 32, 128, device="cuda", dtype=torch.bfloat16)
        read, target = 2 * k.nbytes, torch.empty_like(k)
        ways = {
            "your kernels": lambda q=q, a=(k, v, tables_gpu, lengths_gpu): paged_decode(q, *a),
            "gather, then SDPA": lambda q=q, a=(k, v, tables_gpu, lengths_gpu): gather_and_attend(
                q, *a
            ),
            "copy": lambda t=target, k=k, v=v: (t.copy_(k), t.copy_(v)),
        }
        for name, way in ways.items():
            ms = triton.testing.do_bench(way, return_mode="median")
            moved_bytes = 2 * read if name == "copy" else read
            bandwidths.setdefault(name, []).append(moved_bytes / ms / 1e9)
        print(
            f"{n:6} tokens: "
            + ", ".join(f"{name} {speed[-1]:.2f} TB/s" for name, speed in bandwidths.items())
        )
else:
    some_lengths = [n % 160 + 20 for n in page_lengths[:4]]
    k, v, tables_cpu, lengths_cpu = pools_of(some_lengths, 16, 2, 32, torch.float32)
    q = torch.randn(4, 8, 32)
    least = 2 * sum(some_lengths) * 2 * 32 * 4
    with checks.moved() as work:
        by_hand = paged_attention(q, k, v, tables_cpu, lengths_cpu)
    with checks.traffic() as seen:
        by_kernel = paged_decode(q, k, v, tables_cpu, lengths_cpu, splits=2, block_n=32)
    counted = {
        "each key and\nvalue once": least,
        "your kernels": 4 * (seen.loaded + seen.stored),
        "paged_attention\nin PyTorch": work.total,
    }
    print(
        f"lengths {some_lengths}; outputs differ by {float((by_hand - by_kernel).abs().max()):.0e}"
    )
    for name, size in counted.items():
        print(f"{' '.join(name.split()):30} {size:9,} bytes, {size / least:4.1f} × the least")

# %% tags=["experiment", "figure"]
# Figure: bandwidth on this GPU, or what moves and who works
if on_gpu:
    fig, ax = plt.subplots(figsize=(6.5, 3.8))
    plot.curves(
        (1024, 4096, 16384, 32768),
        bandwidths,
        xlabel="tokens of each of 32 sequences",
        ylabel="TB/s",
        title=f"reading the cache, {torch.cuda.get_device_name()}",
        logx=True,
        ax=ax,
    )
    ax.set_ylim(0, None)
    plot.caption(
        fig,
        "Bytes of keys and values over time; for the copy, reads and writes. A kernel that only "
        "reads may come out above the copy.",
    )
else:
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1, 1.3])
    axes[0].bar(
        list(counted), [size / 1e3 for size in counted.values()], color=plot.COLORS[0], width=0.55
    )
    axes[0].set(ylabel="kilobytes read and written")
    axes[0].set_title("one step, four sequences, counted")
    axes[0].grid(axis="x", visible=False)
    counts = list(range(1, 41))
    lines = {}
    for batch in (1, 4, 32):
        programs = [8 * batch * p for p in counts]
        lines[f"batch {batch}"] = [p / (132 * math.ceil(p / 132)) for p in programs]
    plot.curves(
        counts,
        lines,
        xlabel="splits of each sequence",
        ylabel="share of an H200's 132 SMs at work",
        title="8 key–value heads, one program an SM: arithmetic",
        ax=axes[1],
    )
    axes[1].set_ylim(0, 1.05)
    plot.caption(
        fig,
        "Left: bytes counted in Triton's interpreter and in PyTorch's operations. The kernels' "
        "parts and lse come on top of the keys; they weigh less the longer the texts are. Right: "
        "without splits one sequence keeps 8 of 132 multiprocessors busy, and four keep 32; a "
        "batch of 32 fills them without any. A line falls where a last wave of few programs "
        "begins.",
    )
plt.show()

# %% [markdown]
# ## Key questions
#
# Those with a number are graded, one by one. A model of 8 billion parameters here has 32 layers, 8
# key–value heads of size 128, and two bytes a number.


# %% exercise="questions" minutes=10 difficulty=2 kind="questions"
def questions() -> dict[str, float]:
    """Short answers; numbers to 1 percent.

    "mean_waste": blocks of 16, and a length is as likely to leave any remainder as any other. How
                  many slots of a sequence are empty on average?
    "samples":    a prompt of 100 tokens, blocks of 16. Eight samples fork from it and each writes
                  50 tokens more. How many blocks are in use in the end, the prompt's own sequence
                  being one of the eight?
    "left":       then seven of the eight are freed. How many blocks are still in use?
    "recompute":  the same prompt of 1,024 tokens is sent twice, blocks of 16, all of it known. How
                  many tokens pass through the model in the second prefill?
    "entry":      how many bytes of keys and values of the 8B model stand behind one entry of a
                  block table, all layers together, with blocks of 16?
    "splits":     one sequence, 8 key–value heads, 132 multiprocessors. The fewest splits with which
                  there is a program for each of them?
    "merged":     two splits give outputs 1.0 and 3.0 with lse (base 2) 4 and 6. The output?
    """
    ### BEGIN SOLUTION
    return {
        "mean_waste": sum(range(16)) / 16,
        "samples": 100 // 16 + 8 * (math.ceil(150 / 16) - 100 // 16),
        "left": math.ceil(150 / 16),
        "recompute": 1024 - 1023 // 16 * 16,
        "entry": 16 * 32 * 2 * 8 * 128 * 2,
        "splits": math.ceil(132 / 8),
        "merged": (2**4 * 1.0 + 2**6 * 3.0) / (2**4 + 2**6),
    }
    ### END SOLUTION


# %% check="questions" points=1
found = questions()["mean_waste"]
checks.kind(found, float, what="mean_waste")
### BEGIN HIDDEN TESTS
checks.number(
    found,
    7.5,
    what="mean_waste",
    hint="Of 16 remainders one leaves nothing empty, one leaves 15",
    mistakes={"as if no length filled its blocks": 8.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
found = questions()["samples"]
checks.kind(found, float, what="samples")
### BEGIN HIDDEN TESTS
checks.number(
    found,
    38,
    what="samples",
    hint="100 tokens fill 6 blocks and a part of a seventh, which only one sample keeps",
    mistakes={"without sharing": 80, "the seventh block shared for good": 31},
)
### END HIDDEN TESTS

# %% check="questions" points=1
found = questions()["left"]
checks.kind(found, float, what="left")
### BEGIN HIDDEN TESTS
checks.number(
    found,
    10,
    what="left",
    hint="A block is free when nobody refers to it any more",
    mistakes={"its own blocks alone": 4, "the prompt's blocks freed seven times": 3},
)
### END HIDDEN TESTS

# %% check="questions" points=1
found = questions()["recompute"]
checks.kind(found, float, what="recompute")
### BEGIN HIDDEN TESTS
checks.number(
    found,
    16,
    what="recompute",
    hint="The last token must pass, and blocks are reused whole",
    mistakes={"the last token alone": 1, "nothing": 0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
found = questions()["entry"]
checks.kind(found, float, what="entry")
### BEGIN HIDDEN TESTS
checks.number(
    found,
    2**21,
    what="entry",
    hint="16 tokens, keys and values, of every layer",
    mistakes={"one layer": 2**16, "keys alone": 2**20, "one token": 2**17},
)
### END HIDDEN TESTS

# %% check="questions" points=1
found = questions()["splits"]
checks.kind(found, float, what="splits")
### BEGIN HIDDEN TESTS
checks.number(
    found, 17, what="splits", hint="16 splits make 128 programs", mistakes={"rounded down": 16}
)
### END HIDDEN TESTS

# %% check="questions" points=1
found = questions()["merged"]
checks.kind(found, float, what="merged")
### BEGIN HIDDEN TESTS
checks.number(
    found,
    2.6,
    what="merged",
    hint="Weights are powers of two of the lse",
    mistakes={"weighted by the lse itself": 2.2, "powers of e": 2.7616, "the mean": 2.0},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Paging removes external fragmentation altogether. What does it cost in
# exchange, and at which block sizes does each of these costs become noticeable?

# %% [markdown] answer="what-paging-costs"
# Up to a block less one slot of each sequence is empty (large blocks); a table has to be kept and
# sent to the GPU (small blocks); the kernel reads it, and reads memory in stretches of one block
# and head, $S \cdot D$ numbers (small blocks: short stretches waste bandwidth).
# Prefix reuse is cut down to whole blocks (large blocks). And every kernel that touches the cache
# has to know about tables: an attention written for contiguous tensors cannot be used. vAttention
# (2024) avoids that with the GPU's own virtual memory, whose pages are large.

# %% [markdown]
# **Open question 2.** A colleague wants to hash each block by its own tokens alone, so that a
# document that stands in the middle of two prompts is found too. What goes wrong? What would have
# to hold for it to be right?

# %% [markdown] answer="content-hash"
# From the second layer on a key depends on all tokens before its own, and a rotary key on its
# position too. The same 16 tokens behind another text have other keys and values, and the model
# would read those of the other text. It would be right if the document could not see what is before
# it, and positions began anew (or the keys were rotated again): attention with blocks that do not
# see each other. Some systems do so and recompute a part of the tokens to repair the rest
# (CacheBlend, 2024); the result is then approximate.

# %% [markdown]
# **Open question 3.** Two customers of one service send secret prompts. Both have prefix caching.
# How could one of them learn what the other has sent, without any hash collision? What protects?

# %% [markdown] answer="timing"
# By time: a prompt whose beginning is known is answered faster. Who guesses a beginning token by
# token, or block by block, and measures the delay of the first token, finds out whether somebody
# has sent it. A salt for each customer makes one's blocks unfindable for the other, at the price of
# not sharing common system prompts; sharing can be allowed for public prefixes only.

# %% [markdown]
# ## References
#
# - **Kwon et al. 2023**, *Efficient Memory Management for Large Language Model Serving with
#   PagedAttention*, arXiv:2309.06180. Section 3 for the three kinds of waste, 4.2 and 4.4 for block
#   tables and copy-on-write, 4.5 for preemption, 7.2 for the choice of the block's size.
# - **Zheng et al. 2023**, *SGLang: Efficient Execution of Structured Language Model Programs*,
#   arXiv:2312.07104. Section 3 for RadixAttention: prefixes as a tree, eviction of leaves.
# - **Dao et al. 2023**, *Flash-Decoding for long-context inference*,
#   [PyTorch blog](https://pytorch.org/blog/flash-decoding/): splits, and the merge by log-sum-exp.
# - **Zhong et al. 2024**, *DistServe: Disaggregating Prefill and Decoding for Goodput-optimized
#   Large Language Model Serving*, arXiv:2401.09670. Section 2 for why, 4 for where caches move.
# - **Prabhu et al. 2024**, *vAttention: Dynamic Memory Management for Serving LLMs without
#   PagedAttention*, arXiv:2405.04437. Section 3 for what paging costs kernels.
# - **Yao et al. 2024**, *CacheBlend: Fast Large Language Model Serving for RAG with Cached
#   Knowledge Fusion*, arXiv:2405.16444. Section 3 for why a block in the middle cannot be reused
#   as it is.
#
# In production: vLLM, `vllm/v1/core/block_pool.py` and `kv_cache_manager.py`, whose unused blocks
# stay in the free list until they are needed, under their hashes, and whose design page on prefix
# caching tells how; `vllm/v1/attention/ops/triton_unified_attention.py`, a Triton kernel with
# splits ("segments") and a merge over a cache of `(blocks, block_size, kv_heads, head_dim)`.
# SGLang, `python/sglang/srt/mem_cache/radix_cache.py`. FlashInfer names both layouts: NHD, and HND
# as here. Chunked prefill and the scheduler around this cache are lesson 34.
