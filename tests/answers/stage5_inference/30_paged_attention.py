# Right and wrong answers to the exercises of lesson 30: see CONTRIBUTING.md.

# %% wrong="fragmentation" because="paged takes one block more where a length fills its blocks"
- reserved += math.ceil(n / block_size) * block_size
+ reserved += (n // block_size + 1) * block_size

# %% wrong="fragmentation" because="paged rounds down"
- reserved += math.ceil(n / block_size) * block_size
+ reserved += n // block_size * block_size

# %% wrong="fragmentation" because="paged counts all tokens as one text"
- reserved += math.ceil(n / block_size) * block_size
+ reserved = math.ceil(sum(lengths) / block_size) * block_size

# %% wrong="fragmentation" because="the power of two above the length"
- reserved += 1 << (n - 1).bit_length() if n else 0
+ reserved += 1 << n.bit_length() if n else 0

# %% wrong="fragmentation" because="an empty request reserves one slot"
- reserved += 1 << (n - 1).bit_length() if n else 0
+ reserved += 1 << max(n - 1, 0).bit_length()

# %% wrong="fragmentation" because="powers of two stop at the limit"
- reserved += 1 << (n - 1).bit_length() if n else 0
+ reserved += min(limit, 1 << (n - 1).bit_length()) if n else 0

# %% wrong="fragmentation" because="max reserves nothing for an empty request"
- reserved += limit
+ reserved += limit if n else 0

# %% wrong="fragmentation" because="the share that is used"
- return reserved, 1 - sum(lengths) / reserved if reserved else 0.0
+ return reserved, sum(lengths) / reserved if reserved else 0.0

# %% wrong="fragmentation" because="the mean of the requests' shares"
- return reserved, 1 - sum(lengths) / reserved if reserved else 0.0
+ shares = [1 - n / fragmentation([n], strategy, limit, block_size)[0] for n in lengths if n]
+ return reserved, sum(shares) / len(shares) if shares else 0.0

# %% wrong="fragmentation" because="divides by nothing"
- return reserved, 1 - sum(lengths) / reserved if reserved else 0.0
+ return reserved, 1 - sum(lengths) / reserved

# %% wrong="fragmentation" because="nothing reserved counts as all empty"
- return reserved, 1 - sum(lengths) / reserved if reserved else 0.0
+ return reserved, 1 - sum(lengths) / reserved if reserved else 1.0

# %% wrong="fragmentation" because="an unknown strategy is taken for paged"
- if strategy not in ("max", "pow2", "paged"):
-     raise ValueError(f"the strategy is max, pow2 or paged, not {strategy!r}")
+ pass

# %% wrong="fragmentation" because="lengths beyond the limit are let through unless the strategy is max"
- if any(not 0 <= n <= limit for n in lengths):
+ if strategy == "max" and any(not 0 <= n <= limit for n in lengths):

# %% wrong="fragmentation" because="negative lengths are let through"
- if any(not 0 <= n <= limit for n in lengths):
+ if any(n > limit for n in lengths):

# %% wrong="fragmentation" because="a length at the limit is refused"
- if any(not 0 <= n <= limit for n in lengths):
+ if any(not 0 <= n < limit for n in lengths):

# %% wrong="fragmentation" because="blocks of 16 whatever is asked"
- reserved += math.ceil(n / block_size) * block_size
+ reserved += math.ceil(n / 16) * 16

# %% wrong="fragmentation" because="a float of slots"
- reserved = 0
+ reserved = 0.0

# %% wrong="fragmentation" because="a logarithm is rounded, just above a large power of two"
- reserved += 1 << (n - 1).bit_length() if n else 0
+ reserved += 2 ** math.ceil(math.log2(n)) if n else 0

# %% wrong="fragmentation" because="the strategy is looked at request by request, so none passes"
- if strategy not in ("max", "pow2", "paged"):
+ if len(lengths) and strategy not in ("max", "pow2", "paged"):

# %% right="fragmentation" because="one function a strategy, doubling and integer division"
def fragmentation(lengths, strategy, limit=2048, block_size=16):
    def doubled(n):
        size = 1
        while size < n:
            size *= 2
        return size if n > 0 else 0

    own = {
        "max": lambda n: limit,
        "pow2": doubled,
        "paged": lambda n: -(-n // block_size) * block_size,
    }
    if strategy not in own:
        raise ValueError(strategy)
    for n in lengths:
        if n < 0 or n > limit:
            raise ValueError(n)
    total = sum(own[strategy](n) for n in lengths)
    if total == 0:
        return 0, 0.0
    return total, (total - sum(lengths)) / total

# %% wrong="block_allocator" because="takes what there is before it finds that it is too little"
- if count > len(self._free):
-     raise OutOfBlocks(f"{count} blocks are asked for, {len(self._free)} are free")
- blocks = [self._free.popleft() for _ in range(count)]
+ blocks = []
+ for _ in range(count):
+     if not self._free:
+         raise OutOfBlocks("no block is free")
+     blocks.append(self._free.popleft())

# %% wrong="block_allocator" because="fewer blocks than asked for, without an error"
- if count > len(self._free):
-     raise OutOfBlocks(f"{count} blocks are asked for, {len(self._free)} are free")
+ count = min(count, len(self._free))

# %% wrong="block_allocator" because="an error of another kind"
- raise OutOfBlocks(f"{count} blocks are asked for, {len(self._free)} are free")
+ raise MemoryError(f"{count} blocks are asked for, {len(self._free)} are free")

# %% wrong="block_allocator" because="the last free block is never given"
- if count > len(self._free):
+ if count >= len(self._free) and count:

# %% wrong="block_allocator" because="a shared block is free at the first free"
- if self._counts[block] == 0:
+ if self._counts[block] >= 0:
+     self._counts[block] = 0

# %% wrong="block_allocator" because="freed blocks are not given again"
-         self._free.append(block)
+         pass

# %% wrong="block_allocator" because="free stops in the middle of a list"
- for block, times in Counter(blocks).items():
-     if self.references(block) < times:
-         raise ValueError(f"block {block} is freed more often than it is in use")
- for block in blocks:
-     self._counts[block] -= 1
+ for block in blocks:
+     if self.references(block) < 1:
+         raise ValueError(f"block {block} is free already")
+     self._counts[block] -= 1

# %% wrong="block_allocator" because="a block may be named twice that has one reference"
- if self.references(block) < times:
+ if self.references(block) < 1:

# %% wrong="block_allocator" because="a double free is let through"
- if self.references(block) < times:
-     raise ValueError(f"block {block} is freed more often than it is in use")
+ if self.references(block) < times:
+     return

# %% wrong="block_allocator" because="free blocks may be shared"
- if self.references(block) == 0:
-     raise ValueError(f"block {block} is not in use")
+ self.references(block)

# %% wrong="block_allocator" because="share counts a block once that is named twice"
- for block in blocks:
-     self._counts[block] += 1
+ for block in set(blocks):
+     self._counts[block] += 1

# %% wrong="block_allocator" because="share stops in the middle of a list"
- for block in blocks:
-     if self.references(block) == 0:
-         raise ValueError(f"block {block} is not in use")
- for block in blocks:
-     self._counts[block] += 1
+ for block in blocks:
+     if self.references(block) == 0:
+         raise ValueError(f"block {block} is not in use")
+     self._counts[block] += 1

# %% wrong="block_allocator" because="negative numbers count from the end"
- if not 0 <= block < len(self._counts):
+ if not -len(self._counts) <= block < len(self._counts):

# %% wrong="block_allocator" because="a block that does not exist is an IndexError"
- raise ValueError(f"there is no block {block}")
+ raise IndexError(f"there is no block {block}")

# %% wrong="block_allocator" because="all allocators have one list"
- self._free = deque(range(num_blocks))
- self._counts = [0] * num_blocks
+ kept = BlockAllocator.__dict__.get("_all", {})
+ BlockAllocator._all = kept
+ self._free = kept.setdefault(num_blocks, deque(range(num_blocks)))
+ self._counts = [0] * num_blocks

# %% wrong="block_allocator" because="available counts the blocks in use"
- return len(self._free)
+ return len(self._counts) - len(self._free)

# %% wrong="block_allocator" because="available is a method"
- @property
+ pass

# %% wrong="block_allocator" because="no blocks are a slice [-0:] of the list, all of it"
- blocks = [self._free.popleft() for _ in range(count)]
+ blocks = list(self._free)[-count:]
+ self._free = deque(b for b in self._free if b not in blocks)

# %% right="block_allocator" because="a set of free blocks and a Counter"
class BlockAllocator:
    def __init__(self, num_blocks):
        self.total, self.uses = num_blocks, Counter()
        self.unused = set(range(num_blocks))

    available = property(lambda self: len(self.unused))

    def references(self, block):
        if block not in range(self.total):
            raise ValueError(block)
        return self.uses[block]

    def allocate(self, count):
        if len(self.unused) < count:
            raise OutOfBlocks(count)
        blocks = sorted(self.unused, reverse=True)[:count]
        self.unused.difference_update(blocks)
        self.uses.update(blocks)
        return blocks

    def share(self, blocks):
        if any(self.references(block) < 1 for block in blocks):
            raise ValueError(blocks)
        self.uses.update(blocks)

    def free(self, blocks):
        left = self.uses.copy()
        left.subtract(blocks)
        if any(self.references(block) < 1 or left[block] < 0 for block in blocks):
            raise ValueError(blocks)
        self.uses = left
        self.unused.update(block for block in blocks if left[block] == 0)

# %% wrong="paged_kv_cache" because="no copy-on-write"
- copy = int(partial and self.allocator.references(table[-1]) > 1)
+ copy = 0

# %% wrong="paged_kv_cache" because="the copy comes without its contents"
- self.k[:, new] = self.k[:, old]
- self.v[:, new] = self.v[:, old]
+ pass

# %% wrong="paged_kv_cache" because="values are not copied"
- self.v[:, new] = self.v[:, old]
+ pass

# %% wrong="paged_kv_cache" because="one layer is copied"
- self.k[:, new] = self.k[:, old]
- self.v[:, new] = self.v[:, old]
+ self.k[0, new] = self.k[0, old]
+ self.v[0, new] = self.v[0, old]

# %% wrong="paged_kv_cache" because="the reference to the shared block is kept"
- self.allocator.free([old])
+ pass

# %% wrong="paged_kv_cache" because="a block is copied that is the sequence's own"
- copy = int(partial and self.allocator.references(table[-1]) > 1)
+ copy = int(partial)

# %% wrong="paged_kv_cache" because="full shared blocks are copied too"
- partial = length % size > 0 and count > 0
+ partial = length > 0 and count > 0

# %% wrong="paged_kv_cache" because="reserving nothing makes a copy"
- partial = length % size > 0 and count > 0
+ partial = length % size > 0

# %% wrong="paged_kv_cache" because="the copy is asked for apart, after the new blocks"
- fresh = self.allocator.allocate(copy + max(math.ceil(end / size) - len(table), 0))
+ fresh = self.allocator.allocate(max(math.ceil(end / size) - len(table), 0))

- old, new = table[-1], fresh.pop(0)
+ old, new = table[-1], self.allocator.allocate(1)[0]

# %% wrong="paged_kv_cache" because="the length grows before blocks are found"
- partial = length % size > 0 and count > 0
+ self.lengths[sequence] = end
+ partial = length % size > 0 and count > 0

# %% wrong="paged_kv_cache" because="a block too many at each border"
- fresh = self.allocator.allocate(copy + max(math.ceil(end / size) - len(table), 0))
+ fresh = self.allocator.allocate(copy + max(end // size + 1 - len(table), 0))

# %% wrong="paged_kv_cache" because="new tokens always take new blocks"
- fresh = self.allocator.allocate(copy + max(math.ceil(end / size) - len(table), 0))
+ fresh = self.allocator.allocate(copy + math.ceil(count / size))

# %% wrong="paged_kv_cache" because="slots are positions, not places in the pool"
- return blocks[places // size] * size + places % size
+ return places

# %% wrong="paged_kv_cache" because="slots in int32"
- return blocks[places // size] * size + places % size
+ return (blocks[places // size] * size + places % size).int()

# %% wrong="paged_kv_cache" because="a fork does not share references"
- self.allocator.share(self.tables[sequence])
- child = self.add(self.tables[sequence])
+ child = self.add(self.tables[sequence])

# %% wrong="paged_kv_cache" because="a fork's length is that of its blocks"
- self.lengths[child] = self.lengths[sequence]
+ pass

# %% wrong="paged_kv_cache" because="a fork has the very same list"
- self.lengths[child] = self.lengths[sequence]
+ self.lengths[child] = self.lengths[sequence]
+ self.tables[child] = self.tables[sequence]

# %% wrong="paged_kv_cache" because="a fork copies all blocks"
- self.allocator.share(self.tables[sequence])
- child = self.add(self.tables[sequence])
+ fresh = self.allocator.allocate(len(self.tables[sequence]))
+ self.k[:, fresh] = self.k[:, self.tables[sequence]]
+ self.v[:, fresh] = self.v[:, self.tables[sequence]]
+ child = self.add(fresh)

# %% wrong="paged_kv_cache" because="add takes references of its own"
- self.tables[sequence] = list(blocks)
+ self.tables[sequence] = list(blocks)
+ self.allocator.share(list(blocks))

# %% wrong="paged_kv_cache" because="add keeps the caller's list"
- self.tables[sequence] = list(blocks)
+ self.tables[sequence] = blocks if isinstance(blocks, list) else list(blocks)

# %% wrong="paged_kv_cache" because="a sequence with blocks begins at length 0"
- self.lengths[sequence] = len(blocks) * self.block_size
+ self.lengths[sequence] = 0

# %% wrong="paged_kv_cache" because="numbers of freed sequences are given again"
- sequence, self._next = self._next, self._next + 1
+ sequence = min(i for i in range(len(self.tables) + 1) if i not in self.tables)

# %% wrong="paged_kv_cache" because="free forgets the blocks and gives none back"
- self.allocator.free(self.tables.pop(sequence))
+ self.tables.pop(sequence)

# %% wrong="paged_kv_cache" because="free leaves the length"
- del self.lengths[sequence]
+ pass

# %% wrong="paged_kv_cache" because="the dtype is ignored"
- self.k = torch.zeros(shape, dtype=dtype, device=device)
- self.v = torch.zeros(shape, dtype=dtype, device=device)
+ self.k = torch.zeros(shape, device=device)
+ self.v = torch.zeros(shape, device=device)

# %% wrong="paged_kv_cache" because="write stores in all layers"
- self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)
- self.v[layer][block, :, offset] = v.detach().to(self.v.dtype)
+ for layer in range(len(self.k)):
+     self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)
+     self.v[layer][block, :, offset] = v.detach().to(self.v.dtype)

# %% wrong="paged_kv_cache" because="values are stored as keys"
- self.v[layer][block, :, offset] = v.detach().to(self.v.dtype)
+ self.v[layer][block, :, offset] = k.detach().to(self.v.dtype)

# %% wrong="paged_kv_cache" because="write sorts the slots"
- block, offset = slots // self.block_size, slots % self.block_size
+ slots = slots.sort().values
+ block, offset = slots // self.block_size, slots % self.block_size

# %% wrong="paged_kv_cache" because="the graph of the keys is kept"
- self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)
+ self.k[layer][block, :, offset] = k.to(self.k.dtype)

# %% wrong="paged_kv_cache" because="the graph of the values is kept"
- self.v[layer][block, :, offset] = v.detach().to(self.v.dtype)
+ self.v[layer][block, :, offset] = v.to(self.v.dtype)

# %% wrong="paged_kv_cache" because="the device is ignored"
- self.k = torch.zeros(shape, dtype=dtype, device=device)
- self.v = torch.zeros(shape, dtype=dtype, device=device)
+ self.k = torch.zeros(shape, dtype=dtype)
+ self.v = torch.zeros(shape, dtype=dtype)

# %% wrong="paged_kv_cache" because="the pools are replaced"
- self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)
+ self.k = self.k.clone()
+ self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)

# %% wrong="paged_kv_cache" because="an unknown sequence is a ValueError"
- table, length = self.tables[sequence], self.lengths[sequence]
+ if sequence not in self.tables:
+     raise ValueError(sequence)
+ table, length = self.tables[sequence], self.lengths[sequence]

# %% wrong="paged_kv_cache" because="what is written passes through float32"
- self.k[layer][block, :, offset] = k.detach().to(self.k.dtype)
- self.v[layer][block, :, offset] = v.detach().to(self.v.dtype)
+ self.k[layer][block, :, offset] = k.detach().float().to(self.k.dtype)
+ self.v[layer][block, :, offset] = v.detach().float().to(self.v.dtype)

# %% wrong="paged_kv_cache" because="the copy passes through float32"
- self.k[:, new] = self.k[:, old]
- self.v[:, new] = self.v[:, old]
+ self.k[:, new] = self.k[:, old].float().to(self.k.dtype)
+ self.v[:, new] = self.v[:, old].float().to(self.v.dtype)

# %% wrong="paged_kv_cache" because="who shares a block is looked up in the tables"
- copy = int(partial and self.allocator.references(table[-1]) > 1)
+ copy = int(partial and sum(table[-1] in other for other in self.tables.values()) > 1)

# %% wrong="paged_kv_cache" because="a fork of nothing leaves a sequence"
- self.allocator.share(self.tables[sequence])
- child = self.add(self.tables[sequence])
+ child = self.add(self.tables.get(sequence, ()))
+ self.allocator.share(self.tables[sequence])

# %% right="paged_kv_cache" because="token by token, block by block"
class PagedKVCache:
    def __init__(
        self, layers, kv_heads, head_dim, num_blocks, block_size, dtype=torch.float32, device=None
    ):
        options = {"dtype": dtype, "device": device}
        self.k = torch.full((layers, num_blocks, kv_heads, block_size, head_dim), 7.0, **options)
        self.v = self.k.clone()
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self.tables, self.lengths, self.count = {}, {}, 100

    def add(self, blocks=()):
        self.count += 1
        self.tables[self.count] = [*blocks]
        self.lengths[self.count] = sum(self.block_size for _ in blocks)
        return self.count

    def reserve(self, sequence, count):
        table, length = self.tables[sequence], self.lengths[sequence]
        room = len(table) * self.block_size - length
        shared = room > 0 and count > 0 and self.allocator.references(table[-1]) > 1
        more = max(0, count - room + self.block_size - 1) // self.block_size
        if shared + more > self.allocator.available:
            raise OutOfBlocks("too few blocks")
        if shared:
            [new] = self.allocator.allocate(1)
            for pool in (self.k, self.v):
                for layer in pool:
                    layer[new].copy_(layer[table[-1]])
            self.allocator.free([table.pop()])
            table.append(new)
        slots = []
        for j in range(length, length + count):
            if j == len(table) * self.block_size:
                table += self.allocator.allocate(1)
            slots.append(table[j // self.block_size] * self.block_size + j % self.block_size)
        self.lengths[sequence] += count
        return torch.tensor(slots, dtype=torch.int64, device=self.k.device)

    @torch.no_grad()
    def write(self, layer, slots, k, v):
        for i, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, self.block_size)
            self.k[layer, block, :, offset] = k[i]
            self.v[layer, block, :, offset] = v[i]

    def fork(self, sequence):
        length = self.lengths[sequence]
        self.allocator.share(list(self.tables[sequence]))
        self.count += 1
        self.tables[self.count], self.lengths[self.count] = list(self.tables[sequence]), length
        return self.count

    def free(self, sequence):
        blocks = self.tables[sequence]
        del self.tables[sequence], self.lengths[sequence]
        self.allocator.free(blocks)

# %% wrong="paged_attention" because="values of unused slots are not masked: 0 · NaN"
- values = values.masked_fill(~used[:, None, :, None], 0)
+ pass

# %% wrong="paged_attention" because="scores are masked by adding -inf, which keeps NaN"
- weights = scores.masked_fill(~used[:, None, None], -math.inf).softmax(-1)
+ hidden = torch.zeros_like(used, dtype=wide).masked_fill(~used, -math.inf)
+ weights = (scores + hidden[:, None, None]).softmax(-1)

# %% wrong="paged_attention" because="entries behind the last block are read"
- blocks = tables.long().masked_fill(~used[:, ::block_size], 0)
+ blocks = tables.long()

# %% wrong="paged_attention" because="one key too many: up to and including index length"
- used = slots < lengths[:, None]  # (batch, slots)
+ used = slots <= lengths[:, None]

# %% wrong="paged_attention" because="whole blocks, the last one's empty slots too"
- used = slots < lengths[:, None]  # (batch, slots)
+ used = slots < (lengths[:, None] + block_size - 1) // block_size * block_size

# %% wrong="paged_attention" because="blocks in the order of the pool"
- blocks = tables.long().masked_fill(~used[:, ::block_size], 0)
+ blocks = torch.arange(tables.shape[1]).expand_as(tables).masked_fill(~used[:, ::block_size], 0)
+ blocks = blocks.clamp(max=len(k) - 1)

# %% wrong="paged_attention" because="the longest sequence's length for all"
- used = slots < lengths[:, None]  # (batch, slots)
+ used = (slots < lengths.max()).expand(len(q), -1)

# %% wrong="paged_attention" because="an empty sequence gives NaN"
- weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0)
+ pass

# %% wrong="paged_attention" because="no scale"
- scores = grouped @ keys.mT / math.sqrt(head_dim)
+ scores = grouped @ keys.mT

# %% wrong="paged_attention" because="divides by head_dim"
- scores = grouped @ keys.mT / math.sqrt(head_dim)
+ scores = grouped @ keys.mT / head_dim

# %% wrong="paged_attention" because="key–value heads interleaved"
- grouped = q.to(wide).unflatten(1, (kv_heads, -1))  # (batch, kv_heads, group, head_dim)
+ grouped = q.to(wide).unflatten(1, (-1, kv_heads)).transpose(1, 2)

- return (weights @ values).flatten(1, 2).to(q.dtype)
+ return (weights @ values).transpose(1, 2).flatten(1, 2).to(q.dtype)

# %% wrong="paged_attention" because="heads and offsets mixed up when blocks are joined"
- keys, values = (pool[blocks].transpose(1, 2).flatten(2, 3).to(wide) for pool in (k, v))
+ keys, values = (
+     pool[blocks].flatten(1, 3).unflatten(1, (kv_heads, -1)).to(wide) for pool in (k, v)
+ )

# %% wrong="paged_attention" because="half precision stays half"
- wide = torch.promote_types(q.dtype, torch.float32)
+ wide = q.dtype

# %% wrong="paged_attention" because="float64 goes through float32"
- wide = torch.promote_types(q.dtype, torch.float32)
+ wide = torch.float32

# %% wrong="paged_attention" because="returns float32 for half inputs"
- return (weights @ values).flatten(1, 2).to(q.dtype)
+ return (weights @ values).flatten(1, 2)

# %% wrong="paged_attention" because="NaN is cleaned from the pools in place"
- kv_heads, block_size, head_dim = k.shape[1:]
+ k.nan_to_num_(0.0)
+ v.nan_to_num_(0.0)
+ kv_heads, block_size, head_dim = k.shape[1:]

# %% wrong="paged_attention" because="NaN in tables is fixed in place"
- blocks = tables.long().masked_fill(~used[:, ::block_size], 0)
+ blocks = tables.masked_fill_(~used[:, ::block_size], 0).long()

# %% wrong="paged_attention" because="keys as values"
- keys, values = (pool[blocks].transpose(1, 2).flatten(2, 3).to(wide) for pool in (k, v))
+ keys, values = (pool[blocks].transpose(1, 2).flatten(2, 3).to(wide) for pool in (k, k))

# %% wrong="paged_attention" because="tables of int64 are changed in place"
- blocks = tables.long().masked_fill(~used[:, ::block_size], 0)
+ blocks = tables.long()
+ blocks[~used[:, ::block_size]] = 0

# %% wrong="paged_attention" because="-10,000 for a key that is not there"
- weights = scores.masked_fill(~used[:, None, None], -math.inf).softmax(-1)
+ weights = scores.masked_fill(~used[:, None, None], -1e4).softmax(-1)

# %% wrong="paged_attention" because="a key with a score of 0 is taken for one that is not there"
- weights = scores.masked_fill(~used[:, None, None], -math.inf).softmax(-1)
+ scores = scores.masked_fill(~used[:, None, None], 0)
+ weights = scores.masked_fill(scores == 0, -math.inf).softmax(-1).nan_to_num()

# %% wrong="paged_attention" because="weights are rounded to half precision"
- weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0)
+ weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0).to(q.dtype).to(wide)

# %% right="paged_attention" because="one sequence at a time, PyTorch's attention"
def paged_attention(q, k, v, tables, lengths):
    out = torch.zeros_like(q)
    size = k.shape[2]
    for b, n in enumerate(lengths.tolist()):
        if n == 0:
            continue
        blocks = tables[b, : (n + size - 1) // size].tolist()
        keys = torch.cat([k[i] for i in blocks], dim=1)[:, :n]
        values = torch.cat([v[i] for i in blocks], dim=1)[:, :n]
        query, keys, values = (
            t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q[b, :, None], keys, values)
        )
        out[b] = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)[:, 0].to(
            q.dtype
        )
    return out

# %% wrong="paged_prefill" because="no causal mask"
- out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, None]
+ out = scores.softmax(-1) @ values[:, None]

# %% wrong="paged_prefill" because="the mask is aligned to the start"
- position = torch.arange(length - len(part), length, device=q.device)
+ position = torch.arange(len(part), device=q.device)

# %% wrong="paged_prefill" because="a query does not see itself"
- hidden = torch.arange(length, device=q.device) > position[:, None]
+ hidden = torch.arange(length, device=q.device) >= position[:, None]

# %% wrong="paged_prefill" because="a query sees one key too many"
- hidden = torch.arange(length, device=q.device) > position[:, None]
+ hidden = torch.arange(length, device=q.device) > position[:, None] + 1

# %% wrong="paged_prefill" because="sees its own chunk only"
- hidden = torch.arange(length, device=q.device) > position[:, None]
+ places = torch.arange(length, device=q.device)
+ hidden = (places > position[:, None]) | (places < length - len(part))

# %% wrong="paged_prefill" because="the last slots of the blocks, not the first"
- pool[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(wide) for pool in (k, v)
+ pool[blocks].transpose(0, 1).flatten(1, 2)[:, -length:].to(wide) for pool in (k, v)

# %% wrong="paged_prefill" because="the first sequence's table for all"
- blocks = table[: math.ceil(length / block_size)].long()
+ blocks = tables[0, : math.ceil(length / block_size)].long().clamp(0, len(k) - 1)

# %% wrong="paged_prefill" because="equal shares of the queries for all sequences"
- parts = q.split(counts.tolist())
+ parts = q.tensor_split(len(counts))

# %% wrong="paged_prefill" because="no scale"
- scores = grouped @ keys[:, None].mT / math.sqrt(head_dim)
+ scores = grouped @ keys[:, None].mT

# %% wrong="paged_prefill" because="key–value heads interleaved"
- grouped = part.to(wide).transpose(0, 1).unflatten(0, (kv_heads, -1))
+ grouped = part.to(wide).transpose(0, 1).unflatten(0, (-1, kv_heads)).transpose(0, 1)

- outputs.append(out.flatten(0, 1).transpose(0, 1).to(q.dtype))
+ outputs.append(out.transpose(0, 1).flatten(0, 1).transpose(0, 1).to(q.dtype))

# %% wrong="paged_prefill" because="heads first in the result"
- return torch.cat(outputs)
+ return torch.cat(outputs).transpose(0, 1).reshape(q.shape)

# %% wrong="paged_prefill" because="half precision stays half"
- wide = torch.promote_types(q.dtype, torch.float32)
+ wide = q.dtype

# %% wrong="paged_prefill" because="float64 goes through float32"
- wide = torch.promote_types(q.dtype, torch.float32)
+ wide = torch.float32

# %% wrong="paged_prefill" because="returns float32 for half inputs"
- outputs.append(out.flatten(0, 1).transpose(0, 1).to(q.dtype))
+ outputs.append(out.flatten(0, 1).transpose(0, 1))

# %% wrong="paged_prefill" because="sequences are expected to have queries"
- parts = q.split(counts.tolist())
+ parts = q.split([max(c, 1) for c in counts.tolist()])

# %% wrong="paged_prefill" because="a key with a score of 0 is taken for a hidden one"
- out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, None]
+ scores = scores.masked_fill(hidden, 0)
+ out = scores.masked_fill(scores == 0, -math.inf).softmax(-1) @ values[:, None]

# %% wrong="paged_prefill" because="weights are rounded to half precision"
- out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, None]
+ weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(q.dtype)
+ out = weights.to(wide) @ values[:, None]

# %% wrong="paged_prefill" because="-1e9 for a hidden key"
- out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, None]
+ out = scores.masked_fill(hidden, -1e9).softmax(-1) @ values[:, None]

# %% wrong="paged_prefill" because="tables of int64 are changed in place"
- blocks = table[: math.ceil(length / block_size)].long()
+ blocks = table.long()
+ blocks[math.ceil(length / block_size) :] = 0

# %% wrong="paged_prefill" because="one entry too many where the tokens fill their blocks"
- blocks = table[: math.ceil(length / block_size)].long()
+ blocks = table[: length // block_size + 1].long()

# %% right="paged_prefill" because="every query a row of paged_attention with a length of its own"
def paged_prefill(q, k, v, tables, lengths, counts):
    rows, seen = [], []
    for b, c in enumerate(counts.tolist()):
        for i in range(c):
            rows.append(b)
            seen.append(int(lengths[b]) - c + i + 1)
    rows = torch.tensor(rows, dtype=torch.long, device=q.device)
    if not seen:
        return q.clone()
    return paged_attention(q, k, v, tables[rows], torch.tensor(seen, device=q.device).long())

# %% wrong="prefix_hash_blocks" because="each block by its own tokens"
- digest = hashlib.sha256(digest + block).digest()
- names.append(digest)
+ names.append(hashlib.sha256(digest + block).digest())

# %% wrong="prefix_hash_blocks" because="no salt"
- digest, names = hashlib.sha256(salt).digest(), []
+ digest, names = hashlib.sha256(b"").digest(), []

# %% wrong="prefix_hash_blocks" because="the salt itself begins the chain"
- digest, names = hashlib.sha256(salt).digest(), []
+ digest, names = salt, []

# %% wrong="prefix_hash_blocks" because="the rest has a name too"
- for end in range(block_size, len(tokens) + 1, block_size):
+ for end in range(block_size, len(tokens) + block_size, block_size):

# %% wrong="prefix_hash_blocks" because="a block that ends with the text is left out"
- for end in range(block_size, len(tokens) + 1, block_size):
+ for end in range(block_size, len(tokens), block_size):

# %% wrong="prefix_hash_blocks" because="highest byte first"
- block = b"".join(t.to_bytes(8, "little") for t in tokens[end - block_size : end])
+ block = b"".join(t.to_bytes(8, "big") for t in tokens[end - block_size : end])

# %% wrong="prefix_hash_blocks" because="four bytes a token"
- block = b"".join(t.to_bytes(8, "little") for t in tokens[end - block_size : end])
+ block = b"".join((t % 2**32).to_bytes(4, "little") for t in tokens[end - block_size : end])

# %% wrong="prefix_hash_blocks" because="the tokens come before the parent"
- digest = hashlib.sha256(digest + block).digest()
+ digest = hashlib.sha256(block + digest).digest()

# %% wrong="prefix_hash_blocks" because="names as hexadecimal text"
- names.append(digest)
+ names.append(digest.hex())

# %% right="prefix_hash_blocks" because="struct and a loop over blocks"
def prefix_hash_blocks(tokens, block_size, salt=b""):
    import struct

    chain = [hashlib.sha256(salt).digest()]
    for i in range(len(tokens) // block_size):
        own = tokens[i * block_size : (i + 1) * block_size]
        chain.append(hashlib.sha256(chain[-1] + struct.pack(f"<{block_size}Q", *own)).digest())
    return chain[1:]

# %% wrong="prefix_cache" because="the cache takes no reference of its own"
- self._allocator.share([blocks[depth]])
- self._known[name] = [blocks[depth], content, depth, self._now]
+ self._known[name] = [blocks[depth], content, depth, self._now]

# %% wrong="prefix_cache" because="a reference for a twin that is not kept"
- if name not in self._known:
-     self._allocator.share([blocks[depth]])
-     self._known[name] = [blocks[depth], content, depth, self._now]
+ self._allocator.share([blocks[depth]])
+ if name not in self._known:
+     self._known[name] = [blocks[depth], content, depth, self._now]

# %% wrong="prefix_cache" because="the newer of two twins stays"
- elif self._known[name][1] != content:
-     return
+ elif self._known[name][1] != content:
+     return
+ elif self._known[name][0] != blocks[depth]:
+     self._allocator.share([blocks[depth]])
+     self._allocator.free([self._known[name][0]])
+     self._known[name][0] = blocks[depth]

# %% wrong="prefix_cache" because="a hash is taken for a proof"
- elif self._known[name][1] != content:
-     return
+ pass

- if entry is None or entry[1] != content:
+ if entry is None:

# %% wrong="prefix_cache" because="only the block's own tokens are compared"
- for depth, name in enumerate(self._hash(tokens, self._size, salt)):
-     content = tuple(tokens[: (depth + 1) * self._size]), salt
+ for depth, name in enumerate(self._hash(tokens, self._size, salt)):
+     content = tuple(tokens[depth * self._size : (depth + 1) * self._size]), salt

- for depth, name in enumerate(self._hash(tokens, self._size, salt)[:most]):
-     content = tuple(tokens[: (depth + 1) * self._size]), salt
+ for depth, name in enumerate(self._hash(tokens, self._size, salt)[:most]):
+     content = tuple(tokens[depth * self._size : (depth + 1) * self._size]), salt

# %% wrong="prefix_cache" because="a block under a foreign name is replaced"
- elif self._known[name][1] != content:
-     return
+ elif self._known[name][1] != content:
+     self._allocator.free([self._known[name][0]])
+     self._allocator.share([blocks[depth]])
+     self._known[name] = [blocks[depth], content, depth, self._now]

# %% wrong="prefix_cache" because="blocks behind a foreign name are taken in"
- elif self._known[name][1] != content:
-     return
+ elif self._known[name][1] != content:
+     continue

# %% wrong="prefix_cache" because="the salt does not count"
- for depth, name in enumerate(self._hash(tokens, self._size, salt)):
+ salt = b""
+ for depth, name in enumerate(self._hash(tokens, self._size, salt)):

- self._now += 1
- found = []
+ self._now += 1
+ salt, found = b"", []

# %% wrong="prefix_cache" because="the salt is left to the hash"
- for depth, name in enumerate(self._hash(tokens, self._size, salt)):
-     content = tuple(tokens[: (depth + 1) * self._size]), salt
+ for depth, name in enumerate(self._hash(tokens, self._size, salt)):
+     content = tuple(tokens[: (depth + 1) * self._size])

- for depth, name in enumerate(self._hash(tokens, self._size, salt)[:most]):
-     content = tuple(tokens[: (depth + 1) * self._size]), salt
+ for depth, name in enumerate(self._hash(tokens, self._size, salt)[:most]):
+     content = tuple(tokens[: (depth + 1) * self._size])

# %% wrong="prefix_cache" because="a prompt that is cached to its last token leaves nothing to compute"
- most = (len(tokens) - 1) // self._size if tokens else 0
+ most = len(tokens) // self._size

# %% wrong="prefix_cache" because="match gives the caller no reference"
- self._allocator.share(found)
- return found
+ return found

# %% wrong="prefix_cache" because="match goes on behind a missing block"
- if entry is None or entry[1] != content:
-     break
+ if entry is None or entry[1] != content:
+     continue

# %% wrong="prefix_cache" because="blocks in use are evicted"
- unused = [n for n, e in self._known.items() if self._allocator.references(e[0]) == 1]
+ unused = list(self._known)

# %% wrong="prefix_cache" because="the parent goes first"
- unused.sort(key=lambda name: (self._known[name][3], -self._known[name][2]))
+ unused.sort(key=lambda name: (self._known[name][3], self._known[name][2]))

# %% wrong="prefix_cache" because="the deepest of all goes first, whenever it was used"
- unused.sort(key=lambda name: (self._known[name][3], -self._known[name][2]))
+ unused.sort(key=lambda name: (-self._known[name][2], self._known[name][3]))

# %% wrong="prefix_cache" because="the most recently used goes first"
- unused.sort(key=lambda name: (self._known[name][3], -self._known[name][2]))
+ unused.sort(key=lambda name: (-self._known[name][3], -self._known[name][2]))

# %% wrong="prefix_cache" because="first in, first out: a match does not renew"
- entry[3] = self._now
+ pass

# %% wrong="prefix_cache" because="inserting known tokens does not renew"
- self._known[name][3] = self._now
+ pass

# %% wrong="prefix_cache" because="every block has a moment of its own"
- entry[3] = self._now
+ self._now += 1
+ entry[3] = self._now

- self._known[name][3] = self._now
+ self._now += 1
+ self._known[name][3] = self._now

# %% wrong="prefix_cache" because="evict forgets the names and frees nothing"
- self._allocator.free([self._known.pop(name)[0]])
+ self._known.pop(name)

# %% wrong="prefix_cache" because="evict frees the blocks and keeps the names"
- self._allocator.free([self._known.pop(name)[0]])
+ self._allocator.free([self._known[name][0]])

# %% wrong="prefix_cache" because="evict returns what was asked for"
- return len(unused[:count])
+ return count

# %% wrong="prefix_cache" because="evict returns nothing"
- return len(unused[:count])
+ pass

# %% wrong="prefix_cache" because="the default hash whatever is given"
- self._allocator, self._size, self._hash = allocator, block_size, hash_blocks
+ self._allocator, self._size, self._hash = allocator, block_size, prefix_hash_blocks

# %% wrong="prefix_cache" because="the rest of the table is taken in too"
- self._known[name][3] = self._now
+ self._known[name][3] = self._now
+ rest = len(tokens) // self._size
+ if len(tokens) % self._size:
+     self._allocator.share([blocks[rest]])

# %% wrong="prefix_cache" because="the block that match holds back is renewed too"
- for depth, name in enumerate(self._hash(tokens, self._size, salt)[:most]):
+ for depth, name in enumerate(self._hash(tokens, self._size, salt)):
- found.append(entry[0])
+ found += [entry[0]] if depth < most else []

# %% right="prefix_cache" because="entries in order of use, chains in reverse"
class PrefixCache:
    def __init__(self, allocator, block_size, hash_blocks=prefix_hash_blocks):
        self.allocator, self.size, self.names = allocator, block_size, hash_blocks
        self.order = {}  # name → (block, tokens, salt); the first to go stands first

    def insert(self, tokens, blocks, salt=b""):
        used = []
        for i, name in enumerate(self.names(tokens, self.size, salt)):
            entry = (blocks[i], list(tokens)[: (i + 1) * self.size], salt)
            if name in self.order:
                if self.order[name][1:] != entry[1:]:
                    break
            else:
                self.allocator.share([entry[0]])
                self.order[name] = entry
            used.append(name)
        self.renew(used)

    def renew(self, names):
        for name in reversed(names):
            self.order[name] = self.order.pop(name)

    def match(self, tokens, salt=b""):
        used = []
        for i, name in enumerate(self.names(tokens, self.size, salt)):
            end = (i + 1) * self.size
            entry = self.order.get(name)
            if entry is None or entry[1:] != (list(tokens)[:end], salt) or end >= len(tokens):
                break
            used.append(name)
        self.renew(used)
        found = [self.order[name][0] for name in used]
        self.allocator.share(found)
        return found

    def evict(self, count):
        gone = 0
        for name, (block, *_) in list(self.order.items()):
            if gone < count and self.allocator.references(block) < 2:
                del self.order[name]
                self.allocator.free([block])
                gone += 1
        return gone

# %% wrong="migrate" because="the source keeps the sequence"
- source.free(sequence)
- return moved
+ return moved

# %% wrong="migrate" because="the source forgets before the target has room"
- moved = target.add()
- try:
+ blocks = list(source.tables[sequence])
+ source.free(sequence)
+ moved = target.add()
+ try:

- source.free(sequence)
- return moved
+ return moved

# %% wrong="migrate" because="a refused move leaves an empty sequence in the target"
- except OutOfBlocks:
-     target.free(moved)
-     raise
+ except OutOfBlocks:
+     raise

# %% wrong="migrate" because="an unknown sequence leaves an empty one in the target"
- length, size = source.lengths[sequence], source.block_size
+ moved = target.add()
+ length, size = source.lengths[sequence], source.block_size

- moved = target.add()
- try:
+ try:

# %% wrong="migrate" because="block by block, as if the blocks had one size"
- for layer in range(layers):
-     k, v = (pool[layer][block, :, offset].to(target.k.device) for pool in (source.k, source.v))
-     target.write(layer, slots, k, v)
+ for old, new in zip(source.tables[sequence], target.tables[moved]):
+     both = min(size, target.block_size)
+     target.k[:, new, :, :both] = source.k[:, old, :, :both].to(target.k.dtype)
+     target.v[:, new, :, :both] = source.v[:, old, :, :both].to(target.v.dtype)

# %% wrong="migrate" because="the same block numbers in the target"
- block, offset = table[places // size], places % size
+ block, offset = table[places // size], places % size
+ if size == target.block_size and max(source.tables[sequence], default=0) < target.k.shape[1]:
+     moved = target.add(source.tables[sequence])
+     target.lengths[moved] = length
+     target.k[:, source.tables[sequence]] = source.k[:, source.tables[sequence]].to(target.k.dtype)
+     target.v[:, source.tables[sequence]] = source.v[:, source.tables[sequence]].to(target.v.dtype)
+     source.free(sequence)
+     return moved

# %% wrong="migrate" because="values are left behind"
- target.write(layer, slots, k, v)
+ target.write(layer, slots, k, k)

# %% wrong="migrate" because="the first layer only"
- for layer in range(layers):
+ for layer in range(1):

# %% wrong="migrate" because="full blocks of the source's size are moved, and the length with them"
- length, size = source.lengths[sequence], source.block_size
+ size = source.block_size
+ length = len(source.tables[sequence]) * size

# %% wrong="migrate" because="its number in the source is returned"
- source.free(sequence)
- return moved
+ source.free(sequence)
+ return sequence

# %% wrong="migrate" because="other shapes are not refused"
- if (layers, kv_heads, head_dim) != tuple(target.k.shape[i] for i in (0, 2, 4)):
-     raise ValueError("the caches have different layers, heads or head sizes")
+ pass

# %% wrong="migrate" because="other numbers of layers are not refused"
- if (layers, kv_heads, head_dim) != tuple(target.k.shape[i] for i in (0, 2, 4)):
+ if (kv_heads, head_dim) != tuple(target.k.shape[i] for i in (2, 4)):

# %% wrong="migrate" because="blocks are freed that others share"
- source.free(sequence)
- return moved
+ for b in source.tables[sequence]:
+     source.allocator.free([b] * source.allocator.references(b))
+ del source.tables[sequence], source.lengths[sequence]
+ return moved

# %% wrong="migrate" because="a block more than it needs"
- slots = target.reserve(moved, length)
+ slots = target.reserve(moved, length + target.block_size)[:length]
+ target.lengths[moved] = length

# %% wrong="migrate" because="its length stays in the source"
- source.free(sequence)
+ source.allocator.free(source.tables.pop(sequence))

# %% wrong="migrate" because="a sequence without tokens stays in the source"
- moved = target.add()
- try:
+ moved = target.add()
+ if not length:
+     return moved
+ try:

# %% wrong="migrate" because="what is moved passes through float32"
- target.write(layer, slots, k, v)
+ target.write(layer, slots, k.float(), v.float())

# %% right="migrate" because="counts first, then token by token"
def migrate(sequence, source, target):
    if source.k[:, 0, :, 0].shape != target.k[:, 0, :, 0].shape:
        raise ValueError("unlike caches")
    table, length = source.tables[sequence], source.lengths[sequence]
    if math.ceil(length / target.block_size) > target.allocator.available:
        raise OutOfBlocks("the target is full")
    moved = target.add()
    for j in range(length):
        [slot] = target.reserve(moved, 1).tolist()
        old, here = divmod(j, source.block_size)
        new, there = divmod(slot, target.block_size)
        target.k[:, new, :, there] = source.k[:, table[old], :, here].to(target.k.dtype)
        target.v[:, new, :, there] = source.v[:, table[old], :, here].to(target.v.dtype)
    source.free(sequence)
    return moved

# %% wrong="migrate" because="takes as many slots as the source's blocks have"
- slots = target.reserve(moved, length)
+ slots = target.reserve(moved, len(source.tables[sequence]) * size)[:length]

# %% wrong="merge_kernel" because="the mean of the splits' outputs"
- share, keep = tl.exp2(lse - base), tl.exp2(top - base)
+ share, keep = tl.where(lse > -float("inf"), 1.0, 0.0), tl.where(top > -float("inf"), 1.0, 0.0)

# %% wrong="merge_kernel" because="powers of e"
- share, keep = tl.exp2(lse - base), tl.exp2(top - base)
+ share, keep = tl.exp(lse - base), tl.exp(top - base)

# %% wrong="merge_kernel" because="no maximum is subtracted"
- share, keep = tl.exp2(lse - base), tl.exp2(top - base)
+ share, keep = tl.exp2(lse), 1.0

# %% wrong="merge_kernel" because="the tile's maximum, not the running one"
- higher = tl.maximum(top, tl.max(lse, axis=0))
+ higher = tl.max(lse, axis=0)

# %% wrong="merge_kernel" because="the accumulator is not rescaled"
- acc = acc * keep + tl.sum(share[:, None] * parts, axis=0)
+ acc = acc + tl.sum(share[:, None] * parts, axis=0)

# %% wrong="merge_kernel" because="the total is not rescaled"
- total = total * keep + tl.sum(share, axis=0)
+ total = total + tl.sum(share, axis=0)

# %% wrong="merge_kernel" because="-inf is subtracted from -inf"
- base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing yet: -inf - -inf is NaN
+ base = higher

# %% wrong="merge_kernel" because="the first tile of splits only"
- for first in range(0, splits, BLOCK_S):
+ for first in range(0, tl.minimum(splits, BLOCK_S), BLOCK_S):

# %% wrong="merge_kernel" because="whole tiles of splits only"
- for first in range(0, splits, BLOCK_S):
+ for first in range(0, splits // BLOCK_S * BLOCK_S, BLOCK_S):

# %% wrong="merge_kernel" because="the last tile replaces the others"
- acc = acc * keep + tl.sum(share[:, None] * parts, axis=0)
- total = total * keep + tl.sum(share, axis=0)
+ acc = tl.sum(share[:, None] * parts, axis=0)
+ total = tl.sum(share, axis=0)

# %% wrong="merge_kernel" because="two passes: each lse is loaded twice"
- top = higher
+ top = higher
+ again, _ = load_splits(parts_ptr, lse_ptr, row, first, splits, HEAD_DIM, BLOCK_D, BLOCK_S)
+ total = total + 0.0 * tl.max(tl.where(again == -float("inf"), 0.0, again), axis=0)

# %% wrong="merge_kernel" because="an empty split has a share"
- share, keep = tl.exp2(lse - base), tl.exp2(top - base)
+ inside = first + tl.arange(0, BLOCK_S) < splits
+ lse = tl.where(inside & (lse == -float("inf")), 0.0, lse)
+ higher = tl.maximum(top, tl.max(lse, axis=0))
+ base = tl.where(higher == -float("inf"), 0.0, higher)
+ share, keep = tl.exp2(lse - base), tl.exp2(top - base)

# %% wrong="merge_kernel" because="an accumulator in half precision"
- acc = acc * keep + tl.sum(share[:, None] * parts, axis=0)
+ acc = (acc * keep + tl.sum(share[:, None] * parts, axis=0)).to(tl.float16).to(tl.float32)

# %% wrong="merge_kernel" because="an if on a loaded number and a break, which no GPU compiles"
- higher = tl.maximum(top, tl.max(lse, axis=0))
+ if first >= splits:
+     break
+ higher = tl.maximum(top, tl.max(lse, axis=0))

# %% right="merge_kernel" because="one split at a time, lse merged as logarithms"
@triton.jit
def merge_kernel(
    parts_ptr,
    lse_ptr,
    o_ptr,
    o_batch,
    o_head,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + head
    cols = tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    log = -float("inf")
    for i in range(splits):
        lse = tl.load(lse_ptr + row * splits + i)
        part = tl.load(
            parts_ptr + (row * splits + i) * HEAD_DIM + cols, mask=cols < HEAD_DIM, other=0.0
        )
        top = tl.maximum(log, lse)
        base = tl.where(top == -float("inf"), 0.0, top)
        old, new = tl.exp2(log - base), tl.exp2(lse - base)
        sum = old + new
        safe = tl.where(sum > 0, sum, 1.0)
        mean = (mean * old + part * new) / safe
        log = tl.where(sum > 0, base + tl.log2(safe), -float("inf"))
    o_ptrs = o_ptr + batch * o_batch + head * o_head + cols
    tl.store(o_ptrs, mean.to(o_ptr.dtype.element_ty), mask=cols < HEAD_DIM)

# %% wrong="paged_decode_kernel" because="no length mask on the score"
- s = tl.where(seen[None, :], s, -float("inf"))
+ pass

# %% wrong="paged_decode_kernel" because="one key too many: <= end"
- seen = tokens < end
+ seen = tokens <= end

# %% wrong="paged_decode_kernel" because="a split's end is not clamped to the length"
- end = tl.minimum(begin + span, length)  # not above begin where nothing is left: no turn
+ end = begin + span

# %% wrong="paged_decode_kernel" because="splits rounded down: the last keys belong to nobody"
- span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
+ span = length // splits // BLOCK_N * BLOCK_N

# %% wrong="paged_decode_kernel" because="a split's length is not rounded up to whole tiles"
- span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
+ span = tl.cdiv(length, splits)

# %% wrong="paged_decode_kernel" because="every split walks over all keys"
- begin = split * span
- end = tl.minimum(begin + span, length)  # not above begin where nothing is left: no turn
+ begin = 0
+ end = length

# %% wrong="paged_decode_kernel" because="the table's row stride is forgotten"
- block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
+ tables = tables_ptr - batch * table_row + batch * tl.cdiv(length, PAGE)
+ block = tl.load(tables + tokens // PAGE, mask=seen, other=0).to(tl.int64)

# %% wrong="paged_decode_kernel" because="blocks in the order of the pool"
- block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
+ block = (tokens // PAGE).to(tl.int64)

# %% wrong="paged_decode_kernel" because="one table entry for the whole tile"
- block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
+ block = tl.load(tables_ptr + (first + tl.zeros_like(tokens)) // PAGE, mask=seen, other=0).to(tl.int64)

# %% wrong="paged_decode_kernel" because="the table is loaded without a mask"
- block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
+ block = tl.load(tables_ptr + tokens // PAGE).to(tl.int64)

# %% wrong="paged_decode_kernel" because="a block's place in 32 bits"
- block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
+ block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0)

# %% wrong="paged_decode_kernel" because="rows within a block are not wrapped"
- k_rows = k_ptr + block * k_block + tokens % PAGE * k_row
+ k_rows = k_ptr + block * k_block + (tokens - first) * k_row

# %% wrong="paged_decode_kernel" because="values have the keys' strides"
- v_rows = v_ptr + block * v_block + tokens % PAGE * v_row
+ v_rows = v_ptr + block * k_block + tokens % PAGE * k_row

# %% wrong="paged_decode_kernel" because="rows are HEAD_DIM apart"
- k_rows = k_ptr + block * k_block + tokens % PAGE * k_row
+ k_rows = k_ptr + block * k_block + tokens % PAGE * HEAD_DIM

# %% wrong="paged_decode_kernel" because="values are loaded without a mask for the length"
- v = tl.load(v_rows[:, None] + cols[None, :], mask=inside, other=0.0)
+ v = tl.load(v_rows[:, None] + cols[None, :], mask=cols[None, :] < HEAD_DIM, other=0.0)

# %% wrong="paged_decode_kernel" because="columns beyond HEAD_DIM are loaded"
- inside = seen[:, None] & (cols[None, :] < HEAD_DIM)
+ inside = seen[:, None] & (cols[None, :] < BLOCK_D)

# %% wrong="paged_decode_kernel" because="the tile's maximum, not the running one"
- higher = tl.maximum(m, tl.max(s, axis=1))  # finite: the first token of a tile is seen
+ higher = tl.max(s, axis=1)

# %% wrong="paged_decode_kernel" because="the maximum starts at 0"
- span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
+ m = tl.zeros((BLOCK_G,), tl.float32)
+ span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N

# %% wrong="paged_decode_kernel" because="missing keys score 0"
- s = tl.where(seen[None, :], s, -float("inf"))
+ s = tl.where(seen[None, :], s, 0.0)

# %% wrong="paged_decode_kernel" because="the accumulator is not rescaled"
- acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
+ acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

# %% wrong="paged_decode_kernel" because="the sum is not rescaled"
- l = l * keep + tl.sum(p, axis=1)
+ l = l + tl.sum(p, axis=1)

# %% wrong="paged_decode_kernel" because="no scale"
- s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
+ s = tl.dot(q, tl.trans(k), input_precision="ieee") * 1.4426950408889634

# %% wrong="paged_decode_kernel" because="no log2(e)"
- s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
+ s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale

# %% wrong="paged_decode_kernel" because="a half-precision accumulator"
- acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
+ acc = tl.dot(p.to(v.dtype), v, (acc * keep[:, None]).to(v.dtype).to(tl.float32), input_precision="ieee")

# %% wrong="paged_decode_kernel" because="keys are loaded again, for the values too"
- acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
+ again = tl.load(k_rows[:, None] + cols[None, :], mask=inside, other=0.0)
+ acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None] + 0.0 * tl.max(again), input_precision="ieee")

# %% wrong="paged_decode_kernel" because="an empty split's lse is that of one key"
- for first in range(begin, end, BLOCK_N):
+ if begin >= length:
+     m = tl.zeros((BLOCK_G,), tl.float32)
+     l = l + 1.0
+ for first in range(begin, end, BLOCK_N):

# %% wrong="paged_decode_kernel" because="operands of two types, which no GPU multiplies"
- acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
+ acc = tl.dot(p.to(tl.float16), v, acc * keep[:, None], input_precision="ieee")

# %% wrong="paged_decode_kernel" because="a break, which no GPU compiles"
- seen = tokens < end
+ if first >= length:
+     break
+ seen = tokens < end

# %% wrong="paged_decode_kernel" because="-10,000 for a key that is not there"
- s = tl.where(seen[None, :], s, -float("inf"))
+ s = tl.where(seen[None, :], s, -10000.0)

# %% wrong="paged_decode_kernel" because="a key with a score of 0 is taken for one that is not there"
- s = tl.where(seen[None, :], s, -float("inf"))
+ s = tl.where(s == 0.0, -float("inf"), s)

# %% right="paged_decode_kernel" because="base e inside, the table by clamped entries"
- span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
- begin = split * span
- end = tl.minimum(begin + span, length)  # not above begin where nothing is left: no turn
+ tiles = (length + splits * BLOCK_N - 1) // (splits * BLOCK_N)
+ begin = split * tiles * BLOCK_N
+ end = tl.minimum((split + 1) * tiles * BLOCK_N, length)

- s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
- s = tl.where(seen[None, :], s, -float("inf"))
- higher = tl.maximum(m, tl.max(s, axis=1))  # finite: the first token of a tile is seen
- p, keep = tl.exp2(s - higher[:, None]), tl.exp2(m - higher)
+ s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
+ s = s + tl.where(seen[None, :], 0.0, -float("inf"))
+ higher = tl.maximum(m, tl.max(s, axis=1) * 1.4426950408889634)
+ p, keep = tl.exp(s - higher[:, None] / 1.4426950408889634), tl.exp2(m - higher)

- acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
+ acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")

# %% right="paged_decode_kernel" because="walks over blocks, and over tiles inside them"
- for first in range(begin, end, BLOCK_N):
-     tokens = first + tl.arange(0, BLOCK_N)
-     seen = tokens < end
-     block = tl.load(tables_ptr + tokens // PAGE, mask=seen, other=0).to(tl.int64)
-     inside = seen[:, None] & (cols[None, :] < HEAD_DIM)
-     k_rows = k_ptr + block * k_block + tokens % PAGE * k_row
+ first = begin
+ while first < end:
+     block = tl.load(tables_ptr + first // PAGE).to(tl.int64)
+     stop = tl.minimum(end, (first // PAGE + 1) * PAGE)
+     stop = tl.minimum(stop, first + BLOCK_N)
+     tokens = first + tl.arange(0, BLOCK_N)
+     seen = tokens < stop
+     inside = seen[:, None] & (cols[None, :] < HEAD_DIM)
+     k_rows = k_ptr + block * k_block + tokens % PAGE * k_row

- m = higher
+ m = higher
+ first = stop

# %% wrong="paged_decode_kernel" because="float32 is multiplied as TF32, tl.dot's default"
- s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
+ s = tl.dot(q, tl.trans(k)) * log2_scale

# %% wrong="questions" because="halves, no sharing, and one block more"
- "mean_waste": sum(range(16)) / 16,
- "samples": 100 // 16 + 8 * (math.ceil(150 / 16) - 100 // 16),
- "left": math.ceil(150 / 16),
- "recompute": 1024 - 1023 // 16 * 16,
- "entry": 16 * 32 * 2 * 8 * 128 * 2,
- "splits": math.ceil(132 / 8),
- "merged": (2**4 * 1.0 + 2**6 * 3.0) / (2**4 + 2**6),
+ "mean_waste": 8,
+ "samples": 80,
+ "left": 4,
+ "recompute": 1,
+ "entry": 16 * 2 * 8 * 128 * 2,
+ "splits": 16,
+ "merged": 2.2,

# %% wrong="questions" because="the partly filled block stays shared, and nothing is computed again"
- "samples": 100 // 16 + 8 * (math.ceil(150 / 16) - 100 // 16),
+ "samples": 7 + 8 * 3,

- "recompute": 1024 - 1023 // 16 * 16,
+ "recompute": 0,

# %% right="questions" because="numbers"
def questions():
    return {
        "mean_waste": 7.5,
        "samples": 38,
        "left": 10,
        "recompute": 16,
        "entry": 2_097_152,
        "splits": 17.0,
        "merged": 2.6,
    }
