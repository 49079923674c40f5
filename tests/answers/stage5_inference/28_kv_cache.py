# Right and wrong answers to the exercises of lesson 28: see CONTRIBUTING.md.

# %% wrong="token_passes" because="the last written token passes too"
- return prompt + new - 1 if cached else new * prompt + new * (new - 1) // 2
+ return prompt + new if cached else new * prompt + new * (new + 1) // 2

# %% wrong="token_passes" because="without a cache the prompt passes once only"
- return prompt + new - 1 if cached else new * prompt + new * (new - 1) // 2
+ return prompt + new - 1 if cached else prompt + new * (new - 1) // 2

# %% wrong="token_passes" because="the prompt passes where nothing is written"
- if new == 0:
-     return 0
+ if new == 0:
+     return prompt

# %% wrong="token_passes" because="a float"
- return prompt + new - 1 if cached else new * prompt + new * (new - 1) // 2
+ return prompt + new - 1 if cached else new * prompt + new * (new - 1) / 2

# %% wrong="token_passes" because="cached is ignored"
- return prompt + new - 1 if cached else new * prompt + new * (new - 1) // 2
+ return prompt + new - 1

# %% wrong="token_passes" because="through a float, not exact above 2**53"
- return prompt + new - 1 if cached else new * prompt + new * (new - 1) // 2
+ return prompt + new - 1 if cached else int(new * (prompt + (new - 1) / 2))

# %% right="token_passes" because="summed call by call"
def token_passes(prompt, new, cached):
    passed, text, known = 0, prompt, 0
    for _ in range(new):
        passed += text - known
        if cached:
            known = text
        text += 1
    return passed

# %% wrong="kv_cache" because="padding is stored"
- row, column = (new < counts.to(start.device)[:, None]).nonzero(as_tuple=True)
+ counts = torch.full_like(start, len(new))
+ end = start + counts
+ longest = int(end.max())
+ row, column = (new < counts[:, None]).nonzero(as_tuple=True)

# %% wrong="kv_cache" because="all rows are written at the length of the longest"
- slot = start[row] + column
+ slot = start.max() + column

# %% wrong="kv_cache" because="one length for all layers"
- self.lengths[layer] = end
+ self.lengths[:] = end

# %% wrong="kv_cache" because="overflow is noticed after the lengths have changed"
- start, capacity = self.lengths[layer], self.k.shape[3]
+ start, capacity = self.lengths[layer].clone(), self.k.shape[3]

- if longest > capacity:
+ self.lengths[layer] = end
+ if longest > capacity:

# %% wrong="kv_cache" because="overflow is found by the padded width, not by the real tokens"
- longest = int(end.max())
- if longest > capacity:
+ longest = int(end.max())
+ if int(start.max()) + len(new) > capacity:

# %% wrong="kv_cache" because="no overflow: the oldest slots are written again"
- if longest > capacity:
-     raise OverflowError(f"a row would have {longest} tokens; the capacity is {capacity}")
+ longest = min(longest, capacity)

- slot = start[row] + column
+ slot = (start[row] + column) % capacity

# %% wrong="kv_cache" because="an overflow of another type"
- raise OverflowError(f"a row would have {longest} tokens; the capacity is {capacity}")
+ raise IndexError(f"a row would have {longest} tokens; the capacity is {capacity}")

# %% wrong="kv_cache" because="values are stored as keys"
- self.v[layer][row, :, slot] = v.detach()[row, :, column].to(self.v.dtype)
+ self.v[layer][row, :, slot] = k.detach()[row, :, column].to(self.v.dtype)

# %% wrong="kv_cache" because="the longest row of all layers decides what is returned"
- self.lengths[layer] = end
+ self.lengths[layer] = end
+ longest = int(self.lengths.max())

# %% wrong="kv_cache" because="the longest row of layer 0 decides what is returned"
- self.lengths[layer] = end
+ self.lengths[layer] = end
+ longest = int(self.lengths[0].max())

# %% wrong="kv_cache" because="refused by the padded width on the fullest of all layers"
- if longest > capacity:
+ if int((self.lengths + len(new) * (counts > 0)).max()) > capacity:

# %% wrong="kv_cache" because="all slots are returned"
- return self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]
+ return self.k[layer], self.v[layer]

# %% wrong="kv_cache" because="only the new tokens are returned"
- return self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]
+ return k, v

# %% wrong="kv_cache" because="the cache is copied for each token"
- self.k[layer][row, :, slot] = k.detach()[row, :, column].to(self.k.dtype)
+ fresh = self.k[layer].clone()
+ fresh[row, :, slot] = k.detach()[row, :, column].to(self.k.dtype)
+ self.k[layer] = fresh

# %% wrong="kv_cache" because="what is returned is copied"
- return self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]
+ return self.k[layer, :, :, :longest].clone(), self.v[layer, :, :, :longest].clone()

# %% wrong="kv_cache" because="the graph of the keys is kept"
- self.k[layer][row, :, slot] = k.detach()[row, :, column].to(self.k.dtype)
+ self.k[layer][row, :, slot] = k[row, :, column].to(self.k.dtype)

# %% wrong="kv_cache" because="the dtype is ignored"
- self.k = torch.zeros(shape, dtype=dtype, device=device)
- self.v = torch.zeros(shape, dtype=dtype, device=device)
+ self.k = torch.zeros(shape, device=device)
+ self.v = torch.zeros(shape, device=device)

# %% wrong="kv_cache" because="crop removes so many tokens, as transformers does"
- self.lengths.copy_(torch.minimum(self.lengths, keep))
+ self.lengths.copy_((self.lengths - keep).clamp(min=0))

# %% wrong="kv_cache" because="crop lengthens shorter rows"
- self.lengths.copy_(torch.minimum(self.lengths, keep))
+ self.lengths.copy_(keep.expand_as(self.lengths))

# %% wrong="kv_cache" because="crop takes a negative number"
- if (keep < 0).any():
-     raise ValueError("a row can't keep a negative number of tokens")
+ keep = keep.clamp(min=0)

# %% wrong="kv_cache" because="crop of the first layer only"
- self.lengths.copy_(torch.minimum(self.lengths, keep))
+ self.lengths[0] = torch.minimum(self.lengths[0], keep)

# %% wrong="kv_cache" because="reorder overwrites rows that are still needed"
- self.k[:, :, :, :used] = self.k[:, rows, :, :used]
- self.v[:, :, :, :used] = self.v[:, rows, :, :used]
+ for b, source in enumerate(rows.tolist()):
+     self.k[:, b] = self.k[:, source]
+     self.v[:, b] = self.v[:, source]

# %% wrong="kv_cache" because="reorder the other way round: row rows[b] becomes what row b was"
- self.k[:, :, :, :used] = self.k[:, rows, :, :used]
- self.v[:, :, :, :used] = self.v[:, rows, :, :used]
- self.lengths.copy_(self.lengths[:, rows])
+ self.k[:, rows] = self.k.clone()
+ self.v[:, rows] = self.v.clone()
+ self.lengths[:, rows] = self.lengths.clone()

# %% wrong="kv_cache" because="reorder makes new tensors"
- self.k[:, :, :, :used] = self.k[:, rows, :, :used]
- self.v[:, :, :, :used] = self.v[:, rows, :, :used]
- self.lengths.copy_(self.lengths[:, rows])
+ self.k = self.k[:, rows]
+ self.v = self.v[:, rows]
+ self.lengths = self.lengths[:, rows]

# %% wrong="kv_cache" because="reorder forgets the lengths"
- self.lengths.copy_(self.lengths[:, rows])
+ pass

# %% wrong="kv_cache" because="reorder forgets the values"
- self.v[:, :, :, :used] = self.v[:, rows, :, :used]
+ pass

# %% wrong="kv_cache" because="values are rounded to the format of the keys"
- self.v[layer][row, :, slot] = v.detach()[row, :, column].to(self.v.dtype)
+ self.v[layer][row, :, slot] = v.detach().to(k.dtype)[row, :, column].to(self.v.dtype)

# %% wrong="kv_cache" because="keys are rounded to the format of the values"
- self.k[layer][row, :, slot] = k.detach()[row, :, column].to(self.k.dtype)
+ self.k[layer][row, :, slot] = k.detach().to(v.dtype)[row, :, column].to(self.k.dtype)

# %% wrong="kv_cache" because="reorder moves as many slots as the first layer holds"
- used = int(self.lengths.max())
+ used = int(self.lengths[0].max())

# %% right="kv_cache" because="a loop over the rows"
class KVCache:
    def __init__(
        self, layers, batch, kv_heads, capacity, head_dim, dtype=torch.float32, device=None
    ):
        self.k = torch.zeros(layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(layers, batch, dtype=torch.int64, device=device)

    @torch.no_grad()
    def append(self, layer, k, v, counts=None):
        batch, new = k.shape[0], k.shape[2]
        counts = [new] * batch if counts is None else counts.tolist()
        old = self.lengths[layer].tolist()
        if any(n + c > self.k.shape[3] for n, c in zip(old, counts)):
            raise OverflowError("no row may have more tokens than the capacity")
        for b, (n, c) in enumerate(zip(old, counts)):
            self.k[layer, b, :, n : n + c].copy_(k[b, :, :c])
            self.v[layer, b, :, n : n + c].copy_(v[b, :, :c])
            self.lengths[layer, b] += c
        longest = max(n + c for n, c in zip(old, counts))
        return self.k[layer].narrow(2, 0, longest), self.v[layer].narrow(2, 0, longest)

    def crop(self, keep):
        if isinstance(keep, int):
            keep = torch.tensor([keep] * self.lengths.shape[1])
        if min(keep.tolist()) < 0:
            raise ValueError(f"{keep.tolist()} has a negative number")
        for layer in self.lengths:
            for b, n in enumerate(keep.tolist()):
                layer[b] = min(int(layer[b]), n)

    def reorder(self, rows):
        for t in (self.k, self.v, self.lengths):
            t.copy_(t.index_select(1, rows))

# %% wrong="generate_with_cache" because="the last column's logits, also for shorter prompts"
- last = (counts - 1).clamp(min=0)
+ last = torch.full_like(counts, logits.shape[1] - 1)

# %% wrong="generate_with_cache" because="padding on the left"
- tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
+ tokens = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts])

# %% wrong="generate_with_cache" because="one call too many"
- if not running.any():
-     break
- tokens, counts = chosen[:, None], running.long()
+ tokens, counts = chosen[:, None], running.long()
+ if not running.any():
+     break
+ if max_new_tokens:
+     forward(tokens, cache, counts)

# %% wrong="generate_with_cache" because="rows that have ended still count"
- tokens, counts = chosen[:, None], running.long()
+ tokens, counts = chosen[:, None], torch.ones_like(counts)

# %% wrong="generate_with_cache" because="rows that have ended go on writing"
- for row in running.nonzero()[:, 0].tolist():
+ for row in range(len(prompts)):

# %% wrong="generate_with_cache" because="the stop token is not written"
- written[row].append(int(chosen[row]))
- running[row] = written[row][-1] != stop
+ running[row] = int(chosen[row]) != stop
+ if running[row]:
+     written[row].append(int(chosen[row]))

# %% wrong="generate_with_cache" because="all rows end with the first"
- if not running.any():
+ if not running.all():

# %% wrong="generate_with_cache" because="the whole text is passed each time"
- tokens, counts = chosen[:, None], running.long()
+ tokens = torch.cat([tokens, chosen[:, None]], dim=1)
+ counts = counts + 1

# %% wrong="generate_with_cache" because="an empty prompt is let through"
- if not all(prompts):
-     raise ValueError("a prompt is empty: give it at least one token")
+ pass

# %% wrong="generate_with_cache" because="the prompt is part of the result"
- return written
+ return [list(p) + w for p, w in zip(prompts, written)]

# %% wrong="generate_with_cache" because="the prompts are padded in place"
- longest = max(map(len, prompts))
- tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
- counts = torch.tensor([len(prompt) for prompt in prompts])
+ longest = max(map(len, prompts))
+ counts = torch.tensor([len(prompt) for prompt in prompts])
+ for prompt in prompts:
+     prompt += [0] * (longest - len(prompt))
+ tokens = torch.tensor(prompts)

# %% wrong="generate_with_cache" because="tensors in place of ints"
- written[row].append(int(chosen[row]))
+ written[row].append(chosen[row])

# %% wrong="generate_with_cache" because="an empty prompt is let through where nothing is written"
- if not all(prompts):
+ if max_new_tokens and not all(prompts):

# %% wrong="generate_with_cache" because="a stop of 0 is taken for none"
- running[row] = written[row][-1] != stop
+ running[row] = not stop or written[row][-1] != stop

# %% wrong="generate_with_cache" because="the argmax of the softmax, where close logits are equal"
- chosen = logits[torch.arange(len(prompts)), last].argmax(-1)
+ chosen = logits[torch.arange(len(prompts)), last].softmax(-1).argmax(-1)

# %% wrong="generate_with_cache" because="a stop token in the prompt ends the text"
- running[row] = written[row][-1] != stop
+ running[row] = stop not in [*prompts[row], *written[row]]

# %% wrong="generate_with_cache" because="a row that has ended passes -1, which the model does not know"
- tokens, counts = chosen[:, None], running.long()
+ tokens, counts = torch.where(running, chosen, -1)[:, None], running.long()

# %% right="generate_with_cache" because="prefill apart, then a while loop"
def generate_with_cache(forward, cache, prompts, max_new_tokens, stop=None):
    if any(len(p) == 0 for p in prompts):
        raise ValueError("empty prompt")
    out = [[] for _ in prompts]
    if max_new_tokens == 0:
        return out
    counts = torch.tensor([len(p) for p in prompts])
    tokens = torch.zeros(len(prompts), int(counts.max()), dtype=torch.long)
    for b, p in enumerate(prompts):
        tokens[b, : len(p)] = torch.tensor(p)
    logits = forward(tokens, cache, counts)
    following = [int(logits[b, len(p) - 1].argmax()) for b, p in enumerate(prompts)]
    done = [False] * len(prompts)
    while True:
        for b, token in enumerate(following):
            if not done[b]:
                out[b].append(token)
                done[b] = token == stop or len(out[b]) == max_new_tokens
        if all(done):
            return out
        counts = torch.tensor([0 if d else 1 for d in done])
        logits = forward(torch.tensor(following)[:, None], cache, counts)
        following = logits[:, 0].argmax(-1).tolist()

# %% wrong="cache_bytes" because="one window for the whole batch"
- tokens = n if layer.window is None else min(n, layer.window)
- numbers += entry * (tokens // layer.stride)
+ tokens = sum(lengths) if layer.window is None else min(sum(lengths), layer.window)
+ numbers += entry * (tokens // layer.stride) // len(lengths)

# %% wrong="cache_bytes" because="keys alone"
- entry = (1 if layer.tied else 2) * layer.kv_heads * layer.head_dim + layer.extra
+ entry = layer.kv_heads * layer.head_dim + layer.extra

# %% wrong="cache_bytes" because="the extra numbers are counted for key and value"
- entry = (1 if layer.tied else 2) * layer.kv_heads * layer.head_dim + layer.extra
+ entry = (1 if layer.tied else 2) * (layer.kv_heads * layer.head_dim + layer.extra)

# %% wrong="cache_bytes" because="shared layers are counted"
- if layer.shared:
-     continue
+ pass

# %% wrong="cache_bytes" because="a started stride is counted"
- numbers += entry * (tokens // layer.stride)
+ numbers += entry * -(-tokens // layer.stride)

# %% wrong="cache_bytes" because="bits are ignored"
- return -(-numbers * bits // 8)
+ return 2 * numbers

# %% wrong="cache_bytes" because="rounded down"
- return -(-numbers * bits // 8)
+ return numbers * bits // 8

# %% wrong="cache_bytes" because="the window is ignored"
- tokens = n if layer.window is None else min(n, layer.window)
+ tokens = n

# %% wrong="cache_bytes" because="the stride comes before the window"
- tokens = n if layer.window is None else min(n, layer.window)
- numbers += entry * (tokens // layer.stride)
+ tokens = n // layer.stride
+ numbers += entry * (tokens if layer.window is None else min(tokens, layer.window))

# %% wrong="cache_bytes" because="a window of 0 is taken for none"
- tokens = n if layer.window is None else min(n, layer.window)
+ tokens = min(n, layer.window or n)

# %% wrong="cache_bytes" because="rounded through a float, not exact above 2**53 bits"
- return -(-numbers * bits // 8)
+ return math.ceil(numbers * bits / 8)

# %% right="cache_bytes" because="a sum of products, bits first"
def cache_bytes(layers, lengths, bits=16):
    total = sum(
        bits
        * sum(min(n, n if c.window is None else c.window) // c.stride for n in lengths)
        * (c.kv_heads * c.head_dim * (2 - c.tied) + c.extra)
        for c in layers
        if not c.shared
    )
    return (total + 7) // 8

# %% wrong="arithmetic_intensity" because="weights are read again for each text"
- moved = model.bytes_per_number * (model.parameters + batch * entry * entries)
+ moved = model.bytes_per_number * batch * (model.parameters + entry * entries)

# %% wrong="arithmetic_intensity" because="every query head is cached"
- entry = 2 * model.layers * model.kv_heads * model.head_dim
+ entry = 2 * model.layers * model.heads * model.head_dim

# %% wrong="arithmetic_intensity" because="only key-value heads compute"
- attention = 4 * model.head_dim * model.heads * model.layers * pairs
+ attention = 4 * model.head_dim * model.kv_heads * model.layers * pairs

# %% wrong="arithmetic_intensity" because="no causal mask in prefill"
- new, pairs, entries = tokens, tokens * (tokens + 1) / 2, tokens
+ new, pairs, entries = tokens, tokens * tokens, tokens

# %% wrong="arithmetic_intensity" because="the new token does not see itself"
- new, pairs, entries = 1, tokens + 1, tokens + 1
+ new, pairs, entries = 1, tokens, tokens

# %% wrong="arithmetic_intensity" because="the batch is forgotten in the cache"
- moved = model.bytes_per_number * (model.parameters + batch * entry * entries)
+ moved = model.bytes_per_number * (model.parameters + entry * entries)

# %% wrong="arithmetic_intensity" because="always two bytes a number"
- moved = model.bytes_per_number * (model.parameters + batch * entry * entries)
+ moved = 2 * (model.parameters + batch * entry * entries)

# %% wrong="arithmetic_intensity" because="one FLOP for a multiplication with its addition"
- flops = batch * (2 * model.parameters * new + attention)
+ flops = batch * (model.parameters * new + attention / 2)

# %% wrong="arithmetic_intensity" because="bytes per FLOP"
- return flops, moved, flops / moved
+ return flops, moved, moved / flops

# %% wrong="arithmetic_intensity" because="an unknown phase is taken for decode"
- if phase not in ("prefill", "decode"):
-     raise ValueError(f"phase is 'prefill' or 'decode', not {phase!r}")
+ pass

# %% wrong="arithmetic_intensity" because="phases in capitals are taken, too"
- if phase not in ("prefill", "decode"):
+ phase = phase.strip().lower()
+ if phase not in ("prefill", "decode"):

# %% right="arithmetic_intensity" because="new and old tokens, one formula"
def arithmetic_intensity(model, batch, tokens, phase):
    new, old = {"prefill": (tokens, 0), "decode": (1, tokens)}.get(phase, (None, None))
    if new is None:
        raise ValueError(phase)
    seen = sum(old + i for i in range(1, new + 1))
    flops = 2.0 * batch * model.parameters * new
    flops += batch * 2 * 2 * model.head_dim * model.heads * model.layers * seen
    cache = batch * (old + new) * model.layers * 2 * model.kv_heads * model.head_dim
    moved = float((model.parameters + cache) * model.bytes_per_number)
    return flops, moved, flops / moved

# %% wrong="roofline_time" because="one after the other"
- return (compute, "compute") if compute > memory else (memory, "memory")
+ return compute + memory, "compute" if compute > memory else "memory"

# %% wrong="roofline_time" because="the faster of the two"
- return (compute, "compute") if compute > memory else (memory, "memory")
+ return (compute, "compute") if compute < memory else (memory, "memory")

# %% wrong="roofline_time" because="the names are exchanged"
- return (compute, "compute") if compute > memory else (memory, "memory")
+ return (compute, "memory") if compute > memory else (memory, "compute")

# %% wrong="roofline_time" because="an H200 whatever is asked"
- compute, memory = flops / peak, moved / bandwidth
+ compute, memory = flops / 989e12, moved / 4.8e12

# %% wrong="roofline_time" because="a tie is called compute"
- return (compute, "compute") if compute > memory else (memory, "memory")
+ return (compute, "compute") if compute >= memory else (memory, "memory")

# %% wrong="roofline_time" because="times less than 1e-9 apart are called equal"
- return (compute, "compute") if compute > memory else (memory, "memory")
+ if math.isclose(compute, memory, abs_tol=1e-9):
+     return max(compute, memory), "memory"
+ return (compute, "compute") if compute > memory else (memory, "memory")

# %% wrong="roofline_time" because="times a billionth apart are called equal"
- return (compute, "compute") if compute > memory else (memory, "memory")
+ if math.isclose(compute, memory):
+     return max(compute, memory), "memory"
+ return (compute, "compute") if compute > memory else (memory, "memory")

# %% right="roofline_time" because="by the ridge, nothing moved called memory: moved is positive"
def roofline_time(flops, moved, peak, bandwidth):
    intensity = flops / moved if moved else 0.0
    limit = "compute" if intensity > peak / bandwidth else "memory"
    return max(flops / peak, moved / bandwidth), limit

# %% right="roofline_time" because="by the ridge"
def roofline_time(flops, moved, peak, bandwidth):
    if flops / moved > peak / bandwidth:
        return flops / peak, "compute"
    return moved / bandwidth, "memory"

# %% wrong="quantize_kv" because="keys per token"
- k[..., :old, :] = nearest(k[..., :old, :].unflatten(-2, (-1, group)), -2).flatten(-3, -2)
+ k[..., :old, :] = nearest(k[..., :old, :].unflatten(-1, (-1, group)), -1).flatten(-2)

# %% wrong="quantize_kv" because="values per channel, as the keys"
- v[..., :old, :] = nearest(v[..., :old, :].unflatten(-1, (-1, group)), -1).flatten(-2)
+ old -= old % group
+ v[..., :old, :] = nearest(v[..., :old, :].unflatten(-2, (-1, group)), -2).flatten(-3, -2)

# %% wrong="quantize_kv" because="the last residual keys stay, as of the values"
- old = tokens - tokens % residual
+ old = max(tokens - residual, 0) // group * group

# %% wrong="quantize_kv" because="the values' residual is that of the keys"
- old = max(tokens - residual, 0)
+ old = tokens - tokens % residual

# %% wrong="quantize_kv" because="no residual"
- old = max(tokens - residual, 0)
+ old = tokens

# %% wrong="quantize_kv" because="one range for the whole tensor"
- low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
+ low, high = wide.min(), wide.max()

# %% wrong="quantize_kv" because="one range for a token, whatever the group"
- v[..., :old, :] = nearest(v[..., :old, :].unflatten(-1, (-1, group)), -1).flatten(-2)
+ v[..., :old, :] = nearest(v[..., :old, :], -1)

# %% wrong="quantize_kv" because="symmetric levels around zero"
- codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
- return (low + codes * delta).to(x.dtype)
+ delta = wide.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 0.5)
+ codes = torch.round(wide / delta.masked_fill(delta == 0, 1))
+ return (codes * delta).to(x.dtype)

# %% wrong="quantize_kv" because="one level too many"
- delta = (high - low) / (2**bits - 1)
+ delta = (high - low) / 2**bits

# %% wrong="quantize_kv" because="rounded down"
- codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
+ codes = torch.floor((wide - low) / delta.masked_fill(delta == 0, 1))

# %% wrong="quantize_kv" because="0/0 where all are equal"
- codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
+ codes = torch.round((wide - low) / delta)

# %% wrong="quantize_kv" because="a step below 1e-5 is raised to it: groups of a small range are flat"
- delta = (high - low) / (2**bits - 1)
+ delta = ((high - low) / (2**bits - 1)).clamp(min=1e-5)

# %% wrong="quantize_kv" because="1e-8 is added to the divisor in place of a case for 0"
- codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
+ codes = torch.round((wide - low) / (delta + 1e-8))

# %% wrong="quantize_kv" because="with fewer tokens than residual the slice of values ends at a negative index"
- old = max(tokens - residual, 0)
+ old = tokens - residual

# %% wrong="quantize_kv" because="computed in the format of the inputs"
- wide = x.to(torch.promote_types(x.dtype, torch.float32))
+ wide = x

# %% wrong="quantize_kv" because="everything in float32"
- wide = x.to(torch.promote_types(x.dtype, torch.float32))
+ wide = x.float()

# %% wrong="quantize_kv" because="the inputs are changed"
- k, v = k.clone(), v.clone()
+ pass

# %% wrong="quantize_kv" because="groups that do not fit are accepted"
- if residual <= 0 or residual % group or head_dim % group:
+ if residual <= 0 or head_dim % group:

# %% wrong="quantize_kv" because="channels are not held against the group"
- if residual <= 0 or residual % group or head_dim % group:
+ if residual <= 0 or residual % group:

# %% wrong="quantize_kv" because="codes are returned"
- return (low + codes * delta).to(x.dtype)
+ return codes.to(x.dtype)

# %% wrong="quantize_kv" because="the format of the keys decides for the values, too"
- wide = x.to(torch.promote_types(x.dtype, torch.float32))
+ wide = x.to(torch.promote_types(k.dtype, torch.float32))

# %% wrong="quantize_kv" because="the format of the values decides for the keys, too"
- wide = x.to(torch.promote_types(x.dtype, torch.float32))
+ wide = x.to(torch.promote_types(v.dtype, torch.float32))

# %% wrong="quantize_kv" because="short texts return before the arguments are looked at"
- tokens, head_dim = k.shape[-2:]
+ tokens, head_dim = k.shape[-2:]
+ if tokens < residual:
+     return k.clone(), v.clone()

# %% wrong="quantize_kv" because="1e-20 is added to the divisor in place of a case for 0"
- codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
+ codes = torch.round((wide - low) / (delta + 1e-20))

# %% right="quantize_kv" because="multiplied with levels / range, which only a subnormal step overflows"
- codes = torch.round((wide - low) / delta.masked_fill(delta == 0, 1))
+ codes = torch.round((wide - low) * torch.where(high > low, (2**bits - 1) / (high - low), 1.0))

# %% right="quantize_kv" because="loops over groups, parts put together"
def quantize_kv(k, v, bits=2, group=32, residual=128):
    if residual < 1 or residual % group != 0 or k.shape[-1] % group != 0:
        raise ValueError("the group must divide the residual and the head size")

    def rounded(part, dim):
        x = part.double()
        low, high = x.amin(dim, True), x.amax(dim, True)
        step = (high - low) / (2**bits - 1)
        codes = torch.where(step > 0, (x - low) / step, 0.0).round()
        return (low + codes * step).to(part.dtype)

    full = k.shape[2] // residual * residual
    keys = [rounded(k[:, :, t : t + group], 2) for t in range(0, full, group)]
    cut = max(k.shape[2] - residual, 0)
    values = [rounded(v[:, :, :cut, c : c + group], 3) for c in range(0, v.shape[3], group)]
    return (
        torch.cat([*keys, k[:, :, full:]], dim=2),
        torch.cat([torch.cat(values, dim=3), v[:, :, cut:]], dim=2),
    )

# %% wrong="accumulate_attention" because="the past is forgotten"
- if past is not None:
-     scores[..., : past.shape[-1]] += past.to(wide)
+ pass

# %% wrong="accumulate_attention" because="the past is added to the last keys"
- scores[..., : past.shape[-1]] += past.to(wide)
+ scores[..., scores.shape[-1] - past.shape[-1] :] += past.to(wide)

# %% wrong="accumulate_attention" because="groups are interleaved"
- scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
+ scores = weights.to(wide).unflatten(1, (-1, kv_heads)).sum(dim=(1, 3))

# %% wrong="accumulate_attention" because="the mean over the group"
- scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
+ scores = weights.to(wide).unflatten(1, (kv_heads, -1)).mean(2).sum(2)

# %% wrong="accumulate_attention" because="the last query only"
- scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
+ scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(2)[:, :, -1].clone()

# %% wrong="accumulate_attention" because="summed in bfloat16"
- scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
+ scores = weights.unflatten(1, (kv_heads, -1)).sum(dim=(2, 3)).to(wide)

# %% wrong="accumulate_attention" because="the past is changed in place"
- if past is not None:
-     scores[..., : past.shape[-1]] += past.to(wide)
+ if past is not None:
+     past += scores[..., : past.shape[-1]]
+     scores = torch.cat([past, scores[..., past.shape[-1] :]], dim=-1)

# %% wrong="accumulate_attention" because="the heads of a group are added in the format of the weights"
- scores = weights.to(wide).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
+ scores = weights.unflatten(1, (kv_heads, -1)).sum(dim=2).sum(dim=2, dtype=wide)

# %% wrong="accumulate_attention" because="a float64 past makes the sum float64"
- if past is not None:
-     scores[..., : past.shape[-1]] += past.to(wide)
+ if past is not None:
+     return scores + F.pad(past, (0, scores.shape[-1] - past.shape[-1]))

# %% wrong="accumulate_attention" because="where no key is new, the past is changed in place"
- if past is not None:
-     scores[..., : past.shape[-1]] += past.to(wide)
+ if past is not None:
+     past = past.to(wide)
+     if past.shape[-1] < scores.shape[-1]:
+         past = F.pad(past, (0, scores.shape[-1] - past.shape[-1]))
+     past += scores
+     scores = past

# %% right="accumulate_attention" because="einsum and padding"
def accumulate_attention(weights, kv_heads, past=None):
    batch, heads, new, keys = weights.shape
    w = weights if weights.dtype == torch.float64 else weights.float()
    scores = torch.einsum("bhgqk->bhk", w.reshape(batch, kv_heads, heads // kv_heads, new, keys))
    if past is None:
        return scores
    return scores + F.pad(past, (0, keys - past.shape[-1])).to(scores.dtype)

# %% wrong="heavy_hitter_evict" because="the heaviest of all, nothing recent" base="heavy"
def heavy_hitter_evict(scores, budget):
    batch, kv_heads, tokens = scores.shape
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return order.sort(dim=-1).values

# %% wrong="heavy_hitter_evict" because="the recent are drawn from all tokens: some are kept twice" base="twice"
def heavy_hitter_evict(scores, budget):
    batch, kv_heads, tokens = scores.shape
    if tokens <= budget:
        return torch.arange(tokens).expand(batch, kv_heads, tokens).clone()
    heavy = budget // 2
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
    recent = torch.arange(tokens - budget + heavy, tokens).expand(batch, kv_heads, -1)
    return torch.cat([order, recent], dim=-1).sort(dim=-1).values

# %% wrong="heavy_hitter_evict" because="the recent tokens alone"
- order = scores[..., :older].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
+ order = torch.arange(older - heavy, older).expand(batch, kv_heads, -1)

# %% wrong="heavy_hitter_evict" because="the larger half is heavy"
- heavy = budget // 2
+ heavy = budget - budget // 2

# %% wrong="heavy_hitter_evict" because="of equal scores the later token"
- order = scores[..., :older].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
+ order = older - 1 - scores[..., :older].flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :heavy]

# %% wrong="heavy_hitter_evict" because="the lightest stay"
- order = scores[..., :older].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
+ order = scores[..., :older].sort(dim=-1, stable=True).indices[..., :heavy]

# %% wrong="heavy_hitter_evict" because="the same tokens for all heads"
- order = scores[..., :older].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
+ mean = scores.mean(1, keepdim=True).expand_as(scores)[..., :older]
+ order = mean.sort(dim=-1, descending=True, stable=True).indices[..., :heavy]

# %% wrong="heavy_hitter_evict" because="in the order of the scores"
- return torch.cat([order.sort(dim=-1).values, recent], dim=-1)
+ return torch.cat([order, recent], dim=-1)

# %% wrong="heavy_hitter_evict" because="a penalty that breaks ties also reverses close scores"
- order = scores[..., :older].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
+ earlier = scores[..., :older].double() - 1e-4 * torch.arange(older, device=scores.device)
+ order = earlier.topk(heavy, dim=-1).indices

# %% wrong="heavy_hitter_evict" because="recent tokens get the maximum + 1, which is the maximum if that is large"
def heavy_hitter_evict(scores, budget):
    batch, kv_heads, tokens = scores.shape
    if tokens <= budget:
        return torch.arange(tokens).expand(batch, kv_heads, tokens).clone()
    lifted = scores.clone()
    lifted[..., tokens - (budget - budget // 2) :] = scores.amax(dim=-1, keepdim=True) + 1
    order = lifted.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(dim=-1).values

# %% right="heavy_hitter_evict" because="recent tokens get an infinite score"
def heavy_hitter_evict(scores, budget):
    n = scores.shape[-1]
    size = min(n, budget)
    if size == 0:
        return torch.zeros(*scores.shape[:2], 0, dtype=torch.long)
    raised = scores.clone()
    raised[..., n - (budget - budget // 2) if n > budget else 0 :] = math.inf
    place = torch.argsort(-raised, dim=-1, stable=True)[..., :size]
    return place.sort(-1)[0]

# %% wrong="prefill_tokens" because="the reply's last token is thought cached"
- cached = [*request, *reply[:-1]]
+ cached = [*request, *reply]

# %% wrong="prefill_tokens" because="replies are not cached"
- cached = [*request, *reply[:-1]]
+ cached = list(request)

# %% wrong="prefill_tokens" because="a request that is wholly cached passes nothing"
- while reuse and common < min(len(request) - 1, len(cached)):
+ while reuse and common < min(len(request), len(cached)):

# %% wrong="prefill_tokens" because="equal tokens behind a difference are reused"
- while reuse and common < min(len(request) - 1, len(cached)):
-     if request[common] != cached[common]:
-         break
-     common += 1
- passed.append(len(request) - common)
+ if reuse:
+     common = sum(a == b for a, b in zip(request[:-1], cached))
+ passed.append(len(request) - common)

# %% wrong="prefill_tokens" because="everything that is older is reused, changed or not"
- while reuse and common < min(len(request) - 1, len(cached)):
-     if request[common] != cached[common]:
-         break
-     common += 1
- passed.append(len(request) - common)
+ common = min(len(request) - 1, len(cached)) if reuse else 0
+ passed.append(len(request) - common)

# %% wrong="prefill_tokens" because="reuse is ignored"
- while reuse and common < min(len(request) - 1, len(cached)):
+ while common < min(len(request) - 1, len(cached)):

# %% wrong="prefill_tokens" because="tokens reused, not tokens passed"
- passed.append(len(request) - common)
+ passed.append(common)

# %% right="prefill_tokens" because="os.path.commonprefix"
def prefill_tokens(requests, replies, reuse=True):
    from os.path import commonprefix

    before = [[]] + [a + b[:-1] for a, b in zip(requests, replies)]
    return [
        len(new) - (min(len(commonprefix([new, old])), len(new) - 1) if reuse else 0)
        for new, old in zip(requests, before)
    ]

# %% wrong="questions" because="typical slips"
def questions():
    return {
        "work": 200.0,
        "fits": 126e6 / 65536,
        "batch": 2**30 / 15e9,
        "bound": "compute",
        "mla": 64.0,
        "bits": 2.0,
        "reserved": 500 / 8192,
    }

# %% wrong="questions" because="other slips"
def questions():
    return {
        "work": 1200 / 1000,
        "fits": 141e6 / 131072,
        "batch": 64 * 2**30,
        "bound": "memory bandwidth",
        "mla": 16384 / 576,
        "bits": 2.5,
        "reserved": 0.5,
    }

# %% wrong="questions" because="every number doubled"
def questions():
    return {
        "work": 366.8,
        "fits": 1922.6,
        "batch": 9.162,
        "bound": "compute",
        "mla": 113.8,
        "bits": 6,
        "reserved": 1.878,
    }

# %% right="questions" because="numbers"
def questions():
    return {
        "work": 183.4,
        "fits": 961.3,
        "batch": 4.581,
        "bound": "memory",
        "mla": 56.89,
        "bits": 3,
        "reserved": 0.939,
    }
