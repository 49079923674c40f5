"""Answers that prove the checks of lesson 37."""

# %% wrong="layer_pattern" because="counts the place from 1"
- pattern = ["full" if layer % period == place else cheap for layer in range(layers)]
+ pattern = ["full" if (layer + 1) % period == place else cheap for layer in range(layers)]

# %% wrong="layer_pattern" because="the last layer is always full when asked for any kind"
- pattern[-1] = last
+ pattern[-1] = "full"

# %% wrong="layer_pattern" because="only whole periods"
- pattern = ["full" if layer % period == place else cheap for layer in range(layers)]
+ unit = ["full" if i == place else cheap for i in range(period)]
+ pattern = (unit * (layers // period))[:layers] + [cheap] * (layers % period)

# %% wrong="layer_pattern" because="a place of period passes"
- if not 0 <= place < period:
+ if not 0 <= place <= period:

# %% wrong="layer_pattern" because="a last kind of an empty stack is an error"
- if last is not None and pattern:
+ if last is not None:

# %% right="layer_pattern" because="repeated slices"
def layer_pattern(layers, period, place, cheap, last=None):
    if place not in range(period):
        raise ValueError("place")
    out = [cheap] * layers
    out[place::period] = ["full"] * len(out[place::period])
    return out if last is None else (out[:-1] + [last])[:layers]

# %% wrong="rg_lru" because="the first token is scaled too"
- state = taken[:, t] if state is None else a[:, t] * state.to(wide) + scaled[:, t]
+ state = scaled[:, t] if state is None else a[:, t] * state.to(wide) + scaled[:, t]

# %% wrong="rg_lru" because="after a given state the first token is not scaled"
- states = []
- for t in range(x.shape[1]):
-     state = taken[:, t] if state is None else a[:, t] * state.to(wide) + scaled[:, t]
+ states = []
+ for t in range(x.shape[1]):
+     state = a[:, t] * (0 if state is None else state) + (taken if t == 0 else scaled)[:, t]

# %% wrong="rg_lru" because="the paper's sign: softplus of −λ"
- log_a = -8 * F.softplus(self.decay.to(wide)) * gate("recurrence")
+ log_a = -8 * F.softplus(-self.decay.to(wide)) * gate("recurrence")

# %% wrong="rg_lru" because="1 − a in place of its root with a²"
- scaled = taken * (-torch.expm1(2 * log_a)).clamp(min=1e-12).sqrt()
+ scaled = taken * (1 - a)

# %% wrong="rg_lru" because="the root's slope at 0: gradients are not finite"
- scaled = taken * (-torch.expm1(2 * log_a)).clamp(min=1e-12).sqrt()
+ scaled = taken * (1 - a * a).sqrt()

# %% wrong="rg_lru" because="weights used transposed"
- logits = torch.einsum("bnhi,hij->bnhj", split, weight.to(wide)) + bias
+ logits = torch.einsum("bnhi,hji->bnhj", split, weight.to(wide)) + bias

# %% wrong="rg_lru" because="no bias in the gates"
- logits = torch.einsum("bnhi,hij->bnhj", split, weight.to(wide)) + bias
+ logits = torch.einsum("bnhi,hij->bnhj", split, weight.to(wide)) + 0 * bias

# %% wrong="rg_lru" because="heads are interleaved"
- split = x.to(wide).unflatten(-1, (heads, -1))
+ split = x.to(wide).unflatten(-1, (-1, heads)).mT

# %% wrong="rg_lru" because="the recurrence runs in x's dtype"
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = x.dtype

# %% wrong="rg_lru" because="the state has no graph"
- return torch.stack(states, dim=1).to(x.dtype), state
+ return torch.stack(states, dim=1).to(x.dtype), state.detach()

# %% wrong="rg_lru" because="float64 input is computed in float32"
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = torch.float32

# %% right="rg_lru" because="one matrix for all heads, and weights of a cumulative sum of logs"
class RGLRU(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        size = width // heads
        self.decay = nn.Parameter(torch.linspace(-2, 4, width))
        self.input_weight = nn.Parameter(torch.randn(heads, size, size) / size**0.5)
        self.input_bias = nn.Parameter(torch.zeros(heads, size))
        self.recurrence_weight = nn.Parameter(torch.randn(heads, size, size) / size**0.5)
        self.recurrence_bias = nn.Parameter(torch.zeros(heads, size))

    def forward(self, x, state=None):
        kind = torch.promote_types(x.dtype, torch.float32)
        y = x.to(kind)
        r = (y @ torch.block_diag(*self.recurrence_weight.to(kind)) + self.recurrence_bias.flatten()).sigmoid()
        i = (y @ torch.block_diag(*self.input_weight.to(kind)) + self.input_bias.flatten()).sigmoid()
        power = -8 * F.softplus(self.decay.to(kind)) * r
        factor = (-torch.expm1(2 * power) + 1e-14).sqrt()
        if state is None:
            factor = torch.cat([torch.ones_like(factor[:, :1]), factor[:, 1:]], dim=1)
        new = factor * i * y
        total = power.cumsum(1)
        n = x.shape[1]
        ahead = torch.ones(n, n, dtype=torch.bool).triu(1)[..., None]
        between = (total[:, :, None] - total[:, None]).masked_fill(ahead, float("-inf")).exp()
        h = (between * new[:, None]).sum(2)
        if state is not None:
            h = h + total.exp() * state.to(kind)[:, None]
        return h.to(x.dtype), h[:, -1]

# %% wrong="hybrid_cache" because="a local layer keeps a window, not a window less one"
- keep = keys.shape[2] if self.kinds[layer] == "full" else min(self.window - 1, keys.shape[2])
+ keep = keys.shape[2] if self.kinds[layer] == "full" else min(self.window, keys.shape[2])

# %% wrong="hybrid_cache" because="what is returned is cut to a window"
- return keys, values, start
+ if self.kinds[layer] == "local":
+     start += max(0, keys.shape[2] - self.window)
+     keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
+ return keys, values, start

# %% wrong="hybrid_cache" because="a slice from −0 keeps everything where the window is 1"
- kept = (t[:, :, first:].detach().clone() for t in (keys, values))
+ kept = (t[:, :, -keep:].detach().clone() for t in (keys, values))

# %% wrong="hybrid_cache" because="start is always 0"
- start = seen + k.shape[2] - keys.shape[2]
+ start = 0

# %% wrong="hybrid_cache" because="one count of tokens for all layers"
- start = seen + k.shape[2] - keys.shape[2]
+ self.seen = max(getattr(self, "seen", 0), seen + k.shape[2])
+ start = self.seen - keys.shape[2]

# %% wrong="hybrid_cache" because="states do not follow a reorder"
- if held is not None:
-     self.held[layer] = tuple(t[rows] if isinstance(t, Tensor) else t for t in held)
+ if held is not None and self.kinds[layer] != "recurrent":
+     self.held[layer] = tuple(t[rows] if isinstance(t, Tensor) else t for t in held)

# %% wrong="hybrid_cache" because="bytes leave out the states"
- tensors = (t for held in self.held if held for t in held if isinstance(t, Tensor))
+ held_keys = (h for h, kind in zip(self.held, self.kinds) if h and kind != "recurrent")
+ tensors = (t for held in held_keys for t in held if isinstance(t, Tensor))

# %% wrong="hybrid_cache" because="bytes counts four for every number"
- return sum(t.numel() * t.element_size() for t in tensors)
+ return sum(t.numel() * 4 for t in tensors)

# %% wrong="hybrid_cache" because="what is kept has a graph"
- kept = (t[:, :, first:].detach().clone() for t in (keys, values))
+ kept = (t[:, :, first:].clone() for t in (keys, values))

# %% wrong="hybrid_cache" because="what is returned has no graph"
- keys, values = k, v
+ keys, values = k, v = k.detach(), v.detach()

# %% wrong="hybrid_cache" because="a state that is kept has a graph"
- self.held[layer] = tuple(t.detach() for t in state)
+ self.held[layer] = tuple(state)

# %% wrong="hybrid_cache" because="any word is a kind"
- if unknown:
+ if False:

# %% right="hybrid_cache" because="lists of single tokens, glued when asked"
class HybridCache:
    def __init__(self, kinds, window):
        if any(kind not in KINDS for kind in kinds):
            raise ValueError("kind")
        self.kinds, self.window = list(kinds), window
        self.tokens = {i: [] for i, kind in enumerate(kinds) if kind != "recurrent"}
        self.counts = dict.fromkeys(self.tokens, 0)
        self.states = {i: None for i, kind in enumerate(kinds) if kind == "recurrent"}

    def append(self, layer, k, v):
        if layer not in self.tokens:
            raise ValueError("recurrent")
        old = self.tokens[layer]
        start = self.counts[layer] - len(old)
        keys = torch.cat([*(pair[0] for pair in old), k], dim=2)
        values = torch.cat([*(pair[1] for pair in old), v], dim=2)
        new = zip(k.detach().clone().split(1, 2), v.detach().clone().split(1, 2))
        old.extend(new)
        self.counts[layer] += k.shape[2]
        if self.kinds[layer] == "local":
            while len(old) > self.window - 1:
                old.pop(0)
        return keys, values, start

    def state(self, layer):
        if layer not in self.states:
            raise ValueError("no state")
        return self.states[layer]

    def keep(self, layer, state):
        if layer not in self.states:
            raise ValueError("no state")
        self.states[layer] = tuple(t.detach().clone() for t in state)

    def reorder(self, rows):
        for layer, pairs in self.tokens.items():
            self.tokens[layer] = [(k[rows], v[rows]) for k, v in pairs]
        for layer, state in self.states.items():
            if state is not None:
                self.states[layer] = tuple(t[rows] for t in state)

    def bytes(self):
        kept = [t for pairs in self.tokens.values() for pair in pairs for t in pair]
        kept += [t for state in self.states.values() for t in state or ()]
        return sum(t.nbytes for t in kept)

# %% wrong="hybrid_cache_bytes" because="entries are rounded up"
- entries = tokens // group.stride
+ entries = -(-tokens // group.stride)

# %% wrong="hybrid_cache_bytes" because="a window of tokens, not of entries"
- entries = tokens // group.stride
- if group.window is not None:
-     entries = min(entries, group.window)
+ entries = min(tokens, group.window or tokens) // group.stride

# %% wrong="hybrid_cache_bytes" because="states of no text"
- for group in groups if tokens > 0 else ():
+ for group in groups:

# %% wrong="hybrid_cache_bytes" because="states in the bytes of entries"
- kept = group.per_entry * entries * group.entry_bytes + group.state * group.state_bytes
+ kept = (group.per_entry * entries + group.state) * group.entry_bytes

# %% wrong="hybrid_cache_bytes" because="texts share a state"
- return math.ceil(batch * total)
+ states = sum(g.count * g.state * g.state_bytes for g in groups) if tokens else 0
+ return math.ceil(batch * (total - states) + states)

# %% wrong="hybrid_cache_bytes" because="each group is rounded up by itself"
- total += group.count * kept
+ total += math.ceil(group.count * kept)

# %% wrong="hybrid_cache_bytes" because="rounded down"
- return math.ceil(batch * total)
+ return int(batch * total)

# %% wrong="hybrid_cache_bytes" because="each text is rounded up by itself"
- return math.ceil(batch * total)
+ return batch * math.ceil(total)

# %% right="hybrid_cache_bytes" because="one sum in halves of a byte"
def hybrid_cache_bytes(groups, tokens, batch=1):
    if not tokens:
        return 0
    halves = 0
    for g in groups:
        entries = tokens // g.stride if g.window is None else min(tokens // g.stride, g.window)
        halves += batch * g.count * int(2 * (g.per_entry * entries * g.entry_bytes + g.state * g.state_bytes))
    return (halves + 1) // 2

# %% wrong="compressed_attention" because="a block that is not over yet is seen"
- last = torch.arange(1, blocks + 1, device=q.device) * block - 1
+ last = torch.arange(blocks, device=q.device) * block

# %% wrong="compressed_attention" because="only blocks that end before the query"
- seen = last <= torch.arange(n, device=q.device)[:, None]
+ seen = last < torch.arange(n, device=q.device)[:, None]

# %% wrong="compressed_attention" because="rows without a block are NaN"
- weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~seen, 0.0)
+ weights = scores.softmax(-1)

# %% right="compressed_attention" because="NaN replaced after the softmax: the mask stops it on the way back"
- weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~seen, 0.0)
+ weights = scores.softmax(-1).nan_to_num(0.0)

# %% wrong="compressed_attention" because="rows without a block get equal weights"
- weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~seen, 0.0)
+ weights = scores.masked_fill(empty, 0.0).softmax(-1)

# %% wrong="compressed_attention" because="heads are assigned round robin"
- return x.repeat_interleave(group, dim=1)
+ return x.repeat(1, group, 1, 1)

# %% wrong="compressed_attention" because="no scale"
- scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
+ scores = (q @ keys.mT).masked_fill(~seen, float("-inf"))

# %% wrong="compressed_attention" because="sums, not means, of the values"
- return weights @ values, weights
+ return block * weights @ values, weights

# %% wrong="compressed_attention" because="the rest of the text is a block too"
- n, blocks = q.shape[2], q.shape[2] // block
+ n, blocks = q.shape[2], -(-q.shape[2] // block)
+ extra = blocks * block - n
+ k, v = (F.pad(t, (0, 0, 0, extra)) for t in (k, v))

# %% right="compressed_attention" because="a loop over the queries' blocks"
def compressed_attention(q, k, v, block):
    batch, heads, n, d = q.shape
    blocks = n // block
    pool = torch.zeros(blocks, n, dtype=q.dtype)
    for j in range(blocks):
        pool[j, j * block : (j + 1) * block] = 1 / block
    keys = (pool @ k).repeat_interleave(heads // k.shape[1], dim=1)
    values = (pool @ v).repeat_interleave(heads // k.shape[1], dim=1)
    rows = []
    for t in range(n):
        count = (t + 1) // block
        part = (q[:, :, t, None] * keys[:, :, :count]).sum(-1) / d**0.5
        rows.append(F.pad(part.softmax(-1), (0, blocks - count)))
    weights = torch.stack(rows, dim=2)
    return weights @ values, weights

# %% wrong="compressed_attention" because="hidden blocks score -10,000, which is above low scores"
def compressed_attention(q, k, v, block):
    n, head_dim = q.shape[-2:]
    group, blocks = q.shape[1] // k.shape[1], n // block
    means_k, means_v = (
        x[:, :, : blocks * block].unflatten(2, (blocks, block)).mean(3)
        .repeat_interleave(group, dim=1)
        for x in (k, v)
    )
    ends = torch.arange(blocks, device=q.device) * block + block - 1
    seen = ends <= torch.arange(n, device=q.device)[:, None]
    scores = (q @ means_k.mT / math.sqrt(head_dim)).masked_fill(~seen, -1e4)
    weights = scores.softmax(-1) * seen
    return weights @ means_v, weights

# %% wrong="compressed_attention" because="the weights of half-precision input stay float32"
def compressed_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:

    n, head_dim = q.shape[2:]
    blocks, group = n // block, q.shape[1] // k.shape[1]
    keys, values = (
        z[:, :, : blocks * block].unflatten(2, (blocks, block)).mean(3) for z in (k, v)
    )
    keys, values = (z.repeat_interleave(group, dim=1) for z in (keys, values))
    scores = q @ keys.mT / math.sqrt(head_dim)
    ends = torch.arange(1, blocks + 1, device=q.device) * block - 1
    seen = ends <= torch.arange(n, device=q.device)[:, None]
    empty = ~seen.any(-1, keepdim=True)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    wide = wide.masked_fill(~seen, float("-inf")).masked_fill(empty, 0.0)
    weights = wide.softmax(-1) * seen
    return (weights @ values.to(weights.dtype)).to(q.dtype), weights

# %% wrong="select_blocks" because="each head chooses for itself: the first of a group decides"
- sums = weights.detach().unflatten(1, (kv_heads, -1)).sum(2)
+ sums = weights.detach().unflatten(1, (kv_heads, -1))[:, :, 0]

# %% wrong="select_blocks" because="the largest of the group, not the sum"
- sums = weights.detach().unflatten(1, (kv_heads, -1)).sum(2)
+ sums = weights.detach().unflatten(1, (kv_heads, -1)).amax(2)

# %% wrong="select_blocks" because="the forced blocks come on top of `top`"
- order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :top]
+ order = ranked.argsort(dim=-1, descending=True, stable=True)[..., : top + 3]

# %% wrong="select_blocks" because="the first block is not forced"
- forced = (index == 0) | (index == here) | (index == here - 1)
+ forced = (index == here) | (index == here - 1)

# %% wrong="select_blocks" because="the block before is not forced"
- forced = (index == 0) | (index == here) | (index == here - 1)
+ forced = (index == 0) | (index == here)

# %% wrong="select_blocks" because="blocks ahead are chosen where few are behind"
- return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, True) & (index <= here)
+ return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, True)

# %% wrong="select_blocks" because="of equal sums the later block"
- order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :top]
+ order = len(index) - 1 - ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :top]

# %% wrong="select_blocks" because="the last block, cut off, is missing"
- blocks = -(-n // block)
+ blocks = n // block

# %% right="select_blocks" because="a loop with Python's sort"
def select_blocks(weights, kv_heads, block, top):
    batch, heads, n, whole = weights.shape
    blocks = (n + block - 1) // block
    chosen = torch.zeros(batch, kv_heads, n, blocks, dtype=torch.bool)
    sums = weights.view(batch, kv_heads, heads // kv_heads, n, whole).sum(2).tolist()
    for b in range(batch):
        for h in range(kv_heads):
            for t in range(n):
                c = t // block
                taken = {0, c} | ({c - 1} if c else set())
                rest = [j for j in range(c) if j not in taken]
                rest.sort(key=lambda j: -sums[b][h][t][j])
                for j in [*taken, *rest[: top - len(taken)]]:
                    chosen[b, h, t, j] = True
    return chosen

# %% wrong="native_sparse_attention" because="gates go through a sigmoid again"
- return (torch.stack(branches, dim=-1) * gates[..., None, :]).sum(-1).to(q.dtype)
+ return (torch.stack(branches, dim=-1) * gates.sigmoid()[..., None, :]).sum(-1).to(q.dtype)

# %% wrong="native_sparse_attention" because="gates are normalized to a sum of 1"
- return (torch.stack(branches, dim=-1) * gates[..., None, :]).sum(-1).to(q.dtype)
+ return (torch.stack(branches, dim=-1) * (gates / gates.sum(-1, keepdim=True))[..., None, :]).sum(-1).to(q.dtype)

# %% wrong="native_sparse_attention" because="the selected branch reads ahead in its own block"
- selected = chosen.repeat_interleave(block, dim=-1)[..., :n] & causal
+ selected = chosen.repeat_interleave(block, dim=-1)[..., :n]

# %% wrong="native_sparse_attention" because="the window has one token more"
- sliding = causal & (t > t[:, None] - window)
+ sliding = causal & (t >= t[:, None] - window)

# %% wrong="native_sparse_attention" because="the order of the gates"
- branches = [compressed]
- for mask in (selected, sliding):
+ branches = [compressed]
+ for mask in (sliding, selected):

# %% wrong="native_sparse_attention" because="heads of the choice are assigned round robin"
- selected = selected.repeat_interleave(q.shape[1] // kv_heads, dim=1)
+ selected = selected.repeat(1, q.shape[1] // kv_heads, 1, 1)

# %% wrong="native_sparse_attention" because="the gates get no gradient"
- return (torch.stack(branches, dim=-1) * gates[..., None, :]).sum(-1).to(q.dtype)
+ return (torch.stack(branches, dim=-1) * gates.detach()[..., None, :]).sum(-1).to(q.dtype)

# %% wrong="native_sparse_attention" because="the compressed branch is detached with its weights"
- compressed, weights = compressed_attention(q, k, v, block)
+ compressed, weights = (t.detach() for t in compressed_attention(q, k, v, block))

# %% right="native_sparse_attention" because="masked scores written out"
def native_sparse_attention(q, k, v, gates, block, top, window):
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    first, weights = compressed_attention(q, k, v, block)
    blocks = select_blocks(weights, k.shape[1], block, top)
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, keys) / q.shape[-1] ** 0.5
    place = torch.arange(n)
    behind = place[:, None] - place
    chosen = blocks[..., place // block].repeat_interleave(group, 1) & (behind >= 0)
    near = (behind >= 0) & (behind < window)
    second, third = (
        scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values for mask in (chosen, near)
    )
    g = gates.unbind(-1)
    return (g[0][..., None] * first + g[1][..., None] * second + g[2][..., None] * third).to(q.dtype)

# %% wrong="summary_attention" because="a softmax for each part, added"
- return F.scaled_dot_product_attention(
-     q, extended(k), extended(v), attn_mask=mask, enable_gqa=True
- )
+ one = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., :n], enable_gqa=True)
+ two = F.scaled_dot_product_attention(
+     q, extended(k)[:, :, n:], extended(v)[:, :, n:], attn_mask=mask[..., n:], enable_gqa=True
+ ) if blocks else 0
+ return one + two

# %% wrong="summary_attention" because="the choice is ignored"
- if chosen is not None:
+ if False:

# %% wrong="summary_attention" because="a choice shows blocks ahead"
- far = far & chosen
+ far = chosen

# %% wrong="summary_attention" because="blocks that overlap the window are left out"
- far = (last <= t[:, None]).expand(*q.shape[:3], blocks)
+ far = (last <= t[:, None] - window).expand(*q.shape[:3], blocks)

# %% wrong="summary_attention" because="the window has one token more"
- near = (t <= t[:, None]) & (t > t[:, None] - window)
+ near = (t <= t[:, None]) & (t >= t[:, None] - window)

# %% wrong="summary_attention" because="the means are detached"
- return torch.cat([x, means], dim=2)
+ return torch.cat([x, means.detach()], dim=2)

# %% right="summary_attention" because="query by query"
def summary_attention(q, k, v, block, window, chosen=None):
    batch, heads, n, d = q.shape
    group, blocks = heads // k.shape[1], n // block
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = []
    for t in range(n):
        begin, count = max(0, t + 1 - window), (t + 1) // block
        keys, values = (
            torch.cat(
                [x[:, :, begin : t + 1], x[:, :, : count * block].unflatten(2, (count, block)).mean(3)],
                dim=2,
            )
            if count
            else x[:, :, begin : t + 1]
            for x in (k, v)
        )
        scores = (q[:, :, t, None] * keys).sum(-1) / d**0.5
        if chosen is not None and count:
            off = F.pad(~chosen[:, :, t, :count], (t + 1 - begin, 0))
            scores = scores.masked_fill(off, float("-inf"))
        rows.append((scores.softmax(-1)[..., None] * values).sum(2))
    return torch.stack(rows, dim=2).to(q.dtype)

# %% wrong="summary_attention" because="exp without taking off the maximum"
def summary_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, window: int, chosen: Tensor | None = None
) -> Tensor:

    n, head_dim = q.shape[2:]
    blocks, group = n // block, q.shape[1] // k.shape[1]

    def joined(z):
        means = z[:, :, : blocks * block].unflatten(2, (blocks, block)).mean(3)
        return torch.cat([z, means], dim=2).repeat_interleave(group, dim=1)

    keys, values = joined(k), joined(v)
    here = torch.arange(n, device=q.device)[:, None]
    there = torch.arange(n, device=q.device)
    near = (there <= here) & (there > here - window)
    first = torch.arange(blocks, device=q.device) * block
    past = first + block - 1 <= here
    if chosen is not None:
        past = past & chosen
    near, past = (m.expand(*q.shape[:2], n, -1) for m in (near, past))
    seen = torch.cat([near, past], dim=-1)
    scores = q @ keys.mT / math.sqrt(head_dim)
    weights = scores.exp() * seen
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ values

# %% wrong="hybrid_questions" because="all layers grow"
- token = 12 * 2 * 2 * 256 * 2
+ token = 48 * 2 * 2 * 256 * 2

# %% wrong="hybrid_questions" because="keys without values"
- token = 12 * 2 * 2 * 256 * 2
+ token = 12 * 2 * 256 * 2

# %% wrong="hybrid_questions" because="a state of one layer"
- "state_tokens": 36 * 32 * 128 * 128 * 4 / token,
+ "state_tokens": 32 * 128 * 128 * 4 / token,

# %% wrong="hybrid_questions" because="the time constant, not the half-life"
- "half_life": math.log(2) / -math.log(0.999),
+ "half_life": 1 / -math.log(0.999),

# %% wrong="hybrid_questions" because="all tokens and more"
- "keys_read": 65536 // 64 + 16 * 64 + 512,
+ "keys_read": 16 * 64 + 512,

# %% wrong="hybrid_questions" because="the convolution's inputs are enough"
- "take_back": "the state before the draft",
+ "take_back": "the last three inputs",

# %% right="hybrid_questions" because="numbers"
def hybrid_questions():
    return {
        "token_bytes": 24576,
        "state_tokens": 3072.0,
        "half_life": 693,
        "keys_read": 2560,
        "take_back": "the state before the draft",
    }
