# %% [markdown]
# Answers to lesson 35. Each cell stands in for an exercise cell, as a change to the reference or whole.

# %% wrong="linear_attention_parallel" because="no causal mask"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ return (q @ k.mT @ v).to(dtype)

# %% wrong="linear_attention_parallel" because="a token does not see itself"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ return ((q @ k.mT).tril(-1) @ v).to(dtype)

# %% wrong="linear_attention_parallel" because="scaled by 1/√d_k"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ return ((q @ k.mT / math.sqrt(q.shape[-1])).tril() @ v).to(dtype)

# %% wrong="linear_attention_parallel" because="computed in half precision"
- q, k, v = wide(q, k, v)

# %% wrong="linear_attention_parallel" because="returned in float32"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ return (q @ k.mT).tril() @ v

# %% wrong="linear_attention_parallel" because="float64 goes through float32"
- q, k, v = wide(q, k, v)
+ q, k, v = q.float(), k.float(), v.float()

# %% wrong="linear_attention_parallel" because="a softmax after all"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).to(dtype)

# %% wrong="linear_attention_parallel" because="divides by the sum of the weights"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ weights = (q @ k.mT).tril()
+ return (weights @ v / weights.sum(-1, keepdim=True)).to(dtype)

# %% wrong="linear_attention_parallel" because="o in q's dtype"
- dtype = v.dtype
+ dtype = q.dtype

# %% wrong="linear_attention_parallel" because="all pairs less the future ones: large later tokens cancel digits away"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ scores = q @ k.mT
+ return (scores @ v - scores.triu(1) @ v).to(dtype)

# %% wrong="linear_attention_parallel" because="the sum is kept in v's dtype between blocks of 64 keys"
- return ((q @ k.mT).tril() @ v).to(dtype)
+ scores, o = (q @ k.mT).tril(), torch.zeros_like(v, dtype=dtype)
+ for start in range(0, k.shape[2], 64):
+     part = slice(start, start + 64)
+     o = (o + scores[..., part] @ v[:, :, part]).to(dtype)
+ return o

# %% right="linear_attention_parallel" because="einsum and a mask that multiplies"
def linear_attention_parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    work = torch.promote_types(v.dtype, torch.float32)
    place = torch.arange(q.shape[2], device=q.device)
    mask = (place[:, None] >= place).to(work)
    weights = torch.einsum("bhid,bhjd->bhij", q.to(work), k.to(work)) * mask
    return torch.einsum("bhij,bhjd->bhid", weights, v.to(work)).to(v.dtype)

# %% wrong="linear_attention_recurrent" because="reads before the token has written"
- state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
- outputs.append(q[:, :, t, None, :] @ state)
+ outputs.append(q[:, :, t, None, :] @ state)
+ state = state + k[:, :, t, :, None] * v[:, :, t, None, :]

# %% wrong="linear_attention_recurrent" because="writes into the caller's state"
- state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
+ state += k[:, :, t, :, None] * v[:, :, t, None, :]

# %% wrong="linear_attention_recurrent" because="ignores the state it is given"
- state = empty_state(k, v) if state is None else state
+ state = empty_state(k, v)

# %% wrong="linear_attention_recurrent" because="the state in half precision"
- q, k, v = wide(q, k, v)

# %% wrong="linear_attention_recurrent" because="the state is rounded to the dtype of v at the end"
- return torch.cat(outputs, dim=2).to(dtype), state
+ return torch.cat(outputs, dim=2).to(dtype), state.to(dtype)

# %% wrong="linear_attention_recurrent" because="o stays float32"
- return torch.cat(outputs, dim=2).to(dtype), state
+ return torch.cat(outputs, dim=2), state

# %% wrong="linear_attention_recurrent" because="the states of all tokens at once"
- outputs = []
- for t in range(q.shape[2]):
-     state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
-     outputs.append(q[:, :, t, None, :] @ state)
- return torch.cat(outputs, dim=2).to(dtype), state
+ states = state[:, :, None] + (k[..., :, None] * v[..., None, :]).cumsum(2)
+ return (q[..., None, :] @ states)[..., 0, :].to(dtype), states[:, :, -1]

# %% wrong="linear_attention_recurrent" because="all pairs, and the state afterwards"
- outputs = []
- for t in range(q.shape[2]):
-     state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
-     outputs.append(q[:, :, t, None, :] @ state)
- return torch.cat(outputs, dim=2).to(dtype), state
+ return (q @ state + (q @ k.mT).tril() @ v).to(dtype), state + k.mT @ v

# %% wrong="linear_attention_recurrent" because="the state is detached from token to token"
- state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
+ state = state.detach() + k[:, :, t, :, None] * v[:, :, t, None, :]

# %% wrong="linear_attention_recurrent" because="o in k's dtype"
- dtype = v.dtype
+ dtype = k.dtype

# %% wrong="linear_attention_recurrent" because="eight states at a time"
- outputs = []
- for t in range(q.shape[2]):
-     state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
-     outputs.append(q[:, :, t, None, :] @ state)
- return torch.cat(outputs, dim=2).to(dtype), state
+ outputs = []
+ for q_b, k_b, v_b in chunks(8, q, k, v):
+     states = (k_b[..., :, None] * v_b[..., None, :]).cumsum(2) + state[:, :, None]
+     outputs.append((q_b[..., None, :] @ states)[..., 0, :])
+     state = states[:, :, -1].clone()
+ return torch.cat(outputs, dim=2).to(dtype), state

# %% right="linear_attention_recurrent" because="einsum into an output made before"
def linear_attention_recurrent(q, k, v, state=None):
    work = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=work, device=v.device)
    rows = []
    for q_t, k_t, v_t in zip(*(t.to(work).unbind(2) for t in (q, k, v)), strict=True):
        state = torch.einsum("bhi,bhj->bhij", k_t, v_t) + state
        rows.append(torch.einsum("bhi,bhij->bhj", q_t, state))
    return torch.stack(rows, 2).to(v.dtype), state

# %% wrong="linear_attention_chunked" because="drops the state between chunks"
- state = state + k_c.mT @ v_c
+ state = k_c.mT @ v_c

# %% wrong="linear_attention_chunked" because="no mask inside a chunk"
- outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
+ outputs.append(q_c @ state + q_c @ k_c.mT @ v_c)

# %% wrong="linear_attention_chunked" because="the chunk is in the state before it is read"
- outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
- state = state + k_c.mT @ v_c
+ state = state + k_c.mT @ v_c
+ outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)

# %% wrong="linear_attention_chunked" because="all pairs at once, the chunk ignored"
- outputs = []
- for q_c, k_c, v_c in chunks(chunk, q, k, v):
-     outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
-     state = state + k_c.mT @ v_c
- return torch.cat(outputs, dim=2).to(dtype), state
+ return (q @ state + (q @ k.mT).tril() @ v).to(dtype), state + k.mT @ v

# %% wrong="linear_attention_chunked" because="token by token, the chunk ignored"
- for q_c, k_c, v_c in chunks(chunk, q, k, v):
-     outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
-     state = state + k_c.mT @ v_c
+ for q_c, k_c, v_c in chunks(1, q, k, v):
+     state = state + k_c.mT @ v_c
+     outputs.append(q_c @ state)

# %% wrong="linear_attention_chunked" because="always chunks of 64"
- for q_c, k_c, v_c in chunks(chunk, q, k, v):
+ for q_c, k_c, v_c in chunks(64, q, k, v):

# %% wrong="linear_attention_chunked" because="ignores the state it is given"
- state = empty_state(k, v) if state is None else state
+ state = empty_state(k, v)

# %% wrong="linear_attention_chunked" because="writes into the caller's state"
- state = state + k_c.mT @ v_c
+ state += k_c.mT @ v_c

# %% wrong="linear_attention_chunked" because="half precision throughout"
- q, k, v = wide(q, k, v)

# %% wrong="linear_attention_chunked" because="o in q's dtype"
- dtype = v.dtype
+ dtype = q.dtype

# %% wrong="linear_attention_chunked" because="all pairs of the chunk less the future ones"
- outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
+ outputs.append(q_c @ state + q_c @ k_c.mT @ v_c - (q_c @ k_c.mT).triu(1) @ v_c)

# %% wrong="linear_attention_chunked" because="both parts of o are rounded to v's dtype before they are added"
- outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
+ outputs.append((q_c @ state).to(dtype) + ((q_c @ k_c.mT).tril() @ v_c).to(dtype))

# %% wrong="linear_attention_chunked" because="normalizes the keys"
- q, k, v = wide(q, k, v)
+ q, k, v = wide(q, F.normalize(k, dim=-1), v)

# %% right="linear_attention_chunked" because="the first state and the chunks' writes summed in one tensor of n + 1 states"
- outputs = []
- for q_c, k_c, v_c in chunks(chunk, q, k, v):
-     outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
-     state = state + k_c.mT @ v_c
- return torch.cat(outputs, dim=2).to(dtype), state
+ writes = [k_c.mT @ v_c for k_c, v_c in chunks(chunk, k, v)]
+ states = torch.stack([state, *writes], dim=2).cumsum(2)
+ outputs = []
+ for i, (q_c, k_c, v_c) in enumerate(chunks(chunk, q, k, v)):
+     outputs.append(q_c @ states[:, :, i] + (q_c @ k_c.mT).tril() @ v_c)
+ return torch.cat(outputs, dim=2).to(dtype), states[:, :, -1].clone()

# %% right="linear_attention_chunked" because="a short last chunk padded to a full one"
- q, k, v = wide(q, k, v)
+ seq = q.shape[2]
+ q, k, v = (F.pad(t, (0, 0, 0, -seq % chunk)) for t in wide(q, k, v))

- return torch.cat(outputs, dim=2).to(dtype), state
+ return torch.cat(outputs, dim=2)[:, :, :seq].to(dtype), state

# %% right="linear_attention_chunked" because="the states of all chunks first, the outputs in one go"
def linear_attention_chunked(q, k, v, chunk, state=None):
    dtype, seq = v.dtype, q.shape[2]
    q, k, v = wide(q, k, v)
    pad = -seq % chunk
    q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for t in (q, k, v))
    sums = (k.mT @ v).cumsum(2)
    if state is not None:
        sums = sums + state[:, :, None]
    first = torch.zeros_like(sums[:, :, :1]) if state is None else state[:, :, None]
    before = torch.cat([first, sums[:, :, :-1]], 2)
    o = q @ before + (q @ k.mT).tril() @ v
    return o.flatten(2, 3)[:, :, :seq].to(dtype), sums[:, :, -1]

# %% wrong="positive_features" because="no 1/√m"
- return exponents.exp() / math.sqrt(projection.shape[0])
+ return exponents.exp()

# %% wrong="positive_features" because="x is not scaled"
- y = x / x.shape[-1] ** 0.25
+ y = x

# %% wrong="positive_features" because="x divided by √d"
- y = x / x.shape[-1] ** 0.25
+ y = x / math.sqrt(x.shape[-1])

# %% wrong="positive_features" because="the norm is not halved"
- exponents = y @ projection.mT - y.square().sum(-1, keepdim=True) / 2
+ exponents = y @ projection.mT - y.square().sum(-1, keepdim=True)

# %% wrong="positive_features" because="the largest exponent is subtracted"
- return exponents.exp() / math.sqrt(projection.shape[0])
+ exponents = exponents - exponents.amax(-1, keepdim=True)
+ return exponents.exp() / math.sqrt(projection.shape[0])

# %% wrong="positive_features" because="√d of the projection's other side"
- y = x / x.shape[-1] ** 0.25
+ y = x / projection.shape[0] ** 0.25

# %% wrong="positive_features" because="a quotient of exponentials: inf/inf for a long query"
- exponents = y @ projection.mT - y.square().sum(-1, keepdim=True) / 2
- return exponents.exp() / math.sqrt(projection.shape[0])
+ length = (y.square().sum(-1, keepdim=True) / 2).exp()
+ return (y @ projection.mT).exp() / length / math.sqrt(projection.shape[0])

# %% wrong="positive_features" because="a product of exponentials: inf · 0 for a long query"
- exponents = y @ projection.mT - y.square().sum(-1, keepdim=True) / 2
- return exponents.exp() / math.sqrt(projection.shape[0])
+ shrink = (-y.square().sum(-1, keepdim=True) / 2).exp()
+ return (y @ projection.mT).exp() * shrink / math.sqrt(projection.shape[0])

# %% wrong="positive_features" because="the largest exponential multiplied back: 0 · inf beside one that overflows"
- return exponents.exp() / math.sqrt(projection.shape[0])
+ top = exponents.amax(-1, keepdim=True)
+ return (exponents - top).exp() * top.exp() / math.sqrt(projection.shape[0])

# %% right="positive_features" because="by the distance between projection and query"
def positive_features(x: Tensor, projection: Tensor) -> Tensor:
    d, m = x.shape[-1], projection.shape[0]
    apart = (projection - x[..., None, :] * d**-0.25).square().sum(-1)
    return ((projection.square().sum(-1) - apart) / 2 - math.log(m) / 2).exp()

# %% wrong="state_bytes" because="as many bytes, not more"
- return state, token, state // token + 1
+ return state, token, -(-state // token)

# %% wrong="state_bytes" because="keys without values"
- token = layers * kv_heads * 2 * head_dim * cache_number
+ token = layers * kv_heads * head_dim * cache_number

# %% wrong="state_bytes" because="states for the key–value heads only"
- state = layers * heads * d_k * d_v * state_number
+ state = layers * kv_heads * d_k * d_v * state_number

# %% wrong="state_bytes" because="square states"
- state = layers * heads * d_k * d_v * state_number
+ state = layers * heads * d_k * d_k * state_number

# %% wrong="state_bytes" because="four bytes whatever is asked"
- state = layers * heads * d_k * d_v * state_number
+ state = layers * heads * d_k * d_v * 4

# %% wrong="state_bytes" because="two bytes whatever is asked"
- token = layers * kv_heads * 2 * head_dim * cache_number
+ token = layers * kv_heads * 2 * head_dim * 2

# %% wrong="state_bytes" because="tokens as a float"
- return state, token, state // token + 1
+ return state, token, math.floor(state / token) + 1.0

# %% wrong="state_bytes" because="one layer's bytes"
- state = layers * heads * d_k * d_v * state_number
- token = layers * kv_heads * 2 * head_dim * cache_number
+ state = heads * d_k * d_v * state_number
+ token = kv_heads * 2 * head_dim * cache_number

# %% wrong="state_bytes" because="more, by a tiny number that is lost beside many tokens"
- return state, token, state // token + 1
+ return state, token, math.ceil(state / token + 1e-9)

# %% right="state_bytes" because="layer by layer, and a search"
def state_bytes(layers, heads, d_k, d_v, kv_heads, head_dim, state_number=4, cache_number=2):
    state = sum(heads * d_k * d_v * state_number for _ in range(layers))
    token = sum((head_dim + head_dim) * kv_heads * cache_number for _ in range(layers))
    return state, token, math.floor(state / token) + 1

# %% wrong="state_update" because="what is held is read before it fades"
- if log_decay is not None:
-     state = state * log_decay.to(state.dtype).exp()[..., None]
- if beta is not None:
-     held = (k[..., None, :] @ state).squeeze(-2)
-     v = beta.to(state.dtype) * (v - held)
+ if beta is not None:
+     held = (k[..., None, :] @ state).squeeze(-2)
+     v = beta.to(state.dtype) * (v - held)
+ if log_decay is not None:
+     state = state * log_decay.to(state.dtype).exp()[..., None]

# %% wrong="state_update" because="the write fades too"
- if log_decay is not None:
-     state = state * log_decay.to(state.dtype).exp()[..., None]
- if beta is not None:
-     held = (k[..., None, :] @ state).squeeze(-2)
-     v = beta.to(state.dtype) * (v - held)
- state = state + k[..., :, None] * v[..., None, :]
+ if beta is not None:
+     held = (k[..., None, :] @ state).squeeze(-2)
+     v = beta.to(state.dtype) * (v - held)
+ state = state + k[..., :, None] * v[..., None, :]
+ if log_decay is not None:
+     state = state * log_decay.to(state.dtype).exp()[..., None]

# %% wrong="state_update" because="β on the new value only"
- v = beta.to(state.dtype) * (v - held)
+ v = beta.to(state.dtype) * v - held

# %% wrong="state_update" because="β on what is erased only"
- v = beta.to(state.dtype) * (v - held)
+ v = v - beta.to(state.dtype) * held

# %% wrong="state_update" because="β is a gate of the value, nothing is erased"
- v = beta.to(state.dtype) * (v - held)
+ v = beta.to(state.dtype) * v

# %% wrong="state_update" because="columns fade, not rows"
- state = state * log_decay.to(state.dtype).exp()[..., None]
+ decay = log_decay.to(state.dtype).exp()
+ state = state * (decay[..., None, :] if decay.shape[-1] == state.shape[-1] else decay[..., None])

# %% wrong="state_update" because="the logarithm taken for the decay"
- state = state * log_decay.to(state.dtype).exp()[..., None]
+ state = state * log_decay.to(state.dtype)[..., None]

# %% wrong="state_update" because="one decay for all rows"
- state = state * log_decay.to(state.dtype).exp()[..., None]
+ state = state * log_decay.to(state.dtype).exp().mean(-1, keepdim=True)[..., None]

# %% wrong="state_update" because="reads before it writes"
- state = state + k[..., :, None] * v[..., None, :]
- return (q[..., None, :] @ state).squeeze(-2).to(dtype), state
+ o = (q[..., None, :] @ state).squeeze(-2).to(dtype)
+ return o, state + k[..., :, None] * v[..., None, :]

# %% wrong="state_update" because="normalizes the key"
- if log_decay is not None:
+ k = F.normalize(k, dim=-1)
+ if log_decay is not None:

# %% wrong="state_update" because="fades the caller's state in place"
- state = state * log_decay.to(state.dtype).exp()[..., None]
+ state.mul_(log_decay.to(state.dtype).exp()[..., None])

# %% wrong="state_update" because="o in the state's dtype"
- return (q[..., None, :] @ state).squeeze(-2).to(dtype), state
+ return (q[..., None, :] @ state).squeeze(-2), state

# %% wrong="state_update" because="the state in the token's dtype"
- return (q[..., None, :] @ state).squeeze(-2).to(dtype), state
+ return (q[..., None, :] @ state).squeeze(-2).to(dtype), state.to(dtype)

# %% wrong="state_update" because="always float32"
- q, k, v = (t.to(state.dtype) for t in (q, k, v))
+ state = state.float()
+ q, k, v = (t.float() for t in (q, k, v))

# %% wrong="state_update" because="scales the query"
- return (q[..., None, :] @ state).squeeze(-2).to(dtype), state
+ return (q[..., None, :] @ state).squeeze(-2).to(dtype) / math.sqrt(q.shape[-1]), state

# %% wrong="state_update" because="o in q's dtype"
- dtype = v.dtype
+ dtype = q.dtype

# %% right="state_update" because="by the matrices I − β k kᵀ and Diag(α)"
def state_update(state, q, k, v, log_decay=None, beta=None):
    work = state.dtype
    matrix = torch.eye(k.shape[-1], dtype=work, device=k.device)
    value, key = v.to(work), k.to(work)
    if beta is not None:
        matrix = matrix - beta.to(work)[..., None] * key[..., :, None] * key[..., None, :]
        value = beta.to(work) * value
    if log_decay is not None:
        matrix = matrix * log_decay.to(work).exp()[..., None, :]
    new = matrix @ state + torch.einsum("bhi,bhj->bhij", key, value)
    return torch.einsum("bhi,bhij->bhj", q.to(work), new).to(v.dtype), new

# %% wrong="decayed_scores" because="a quotient of exponentials"
- exponents = sums[..., :, None, :] - sums[..., None, :, :]
- faded = exponents.masked_fill(above[..., None], -math.inf).exp()
- if log_decay.shape[-1] == 1:
-     return (a @ b.mT) * faded[..., 0]
- return (a[..., :, None, :] * b[..., None, :, :] * faded).sum(-1)
+ return ((a * sums.exp()) @ (b * (-sums).exp()).mT).masked_fill(above, 0)

# %% wrong="decayed_scores" because="masked after the exponential: NaN gradients"
- faded = exponents.masked_fill(above[..., None], -math.inf).exp()
+ faded = exponents.exp().masked_fill(above[..., None], 0)

# %% wrong="decayed_scores" because="the mask multiplies"
- faded = exponents.masked_fill(above[..., None], -math.inf).exp()
+ faded = exponents.exp() * ~above[..., None]

# %% wrong="decayed_scores" because="exponents cut at 0, no mask"
- faded = exponents.masked_fill(above[..., None], -math.inf).exp()
+ faded = exponents.clamp(max=0).exp()

# %% wrong="decayed_scores" because="the mask adds −10,000, which fast decays outweigh"
- faded = exponents.masked_fill(above[..., None], -math.inf).exp()
+ faded = (exponents - 1e4 * above[..., None]).exp()

# %% wrong="decayed_scores" because="the mask adds −100,000, which fast decays outweigh in a long chunk"
- faded = exponents.masked_fill(above[..., None], -math.inf).exp()
+ faded = (exponents - 1e5 * above[..., None]).exp()

# %% wrong="decayed_scores" because="a token's decay acts on its own write"
- exponents = sums[..., :, None, :] - sums[..., None, :, :]
+ exponents = sums[..., :, None, :] - sums[..., None, :, :] + log_decay[..., None, :, :]

# %% wrong="decayed_scores" because="sums without the token itself"
- sums = log_decay.cumsum(-2)
+ sums = log_decay.cumsum(-2) - log_decay

# %% wrong="decayed_scores" because="sums over the wrong axis"
- sums = log_decay.cumsum(-2)
+ sums = log_decay.cumsum(-1)

# %% wrong="decayed_scores" because="the mean of the channels' decays"
- sums = log_decay.cumsum(-2)
+ log_decay = log_decay.mean(-1, keepdim=True)
+ sums = log_decay.cumsum(-2)

# %% wrong="decayed_scores" because="always all channels"
- if log_decay.shape[-1] == 1:
-     return (a @ b.mT) * faded[..., 0]

# %% wrong="decayed_scores" because="transposed"
- return (a @ b.mT) * faded[..., 0]
+ return (b @ a.mT) * faded[..., 0]

# %% wrong="decayed_scores" because="leaves out the diagonal"
- above = torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).triu(1)
+ above = torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).triu(0)

# %% wrong="decayed_scores" because="pair by pair in a loop"
def decayed_scores(a: Tensor, b: Tensor, log_decay: Tensor) -> Tensor:
    rows, sums = [], log_decay.cumsum(-2)
    for i in range(a.shape[-2]):
        faded = (sums[..., i : i + 1, :] - sums[..., : i + 1, :]).exp()
        row = (a[..., i : i + 1, :] * b[..., : i + 1, :] * faded).sum(-1)
        rows.append(F.pad(row, (0, a.shape[-2] - i - 1)))
    return torch.stack(rows, -2)

# %% right="decayed_scores" because="sums of segments, each on its own"
def decayed_scores(a: Tensor, b: Tensor, log_decay: Tensor) -> Tensor:
    place = torch.arange(a.shape[-2], device=a.device)
    steps = log_decay[..., :, None, :].expand(*log_decay.shape[:-1], len(place), -1)
    later = place[:, None] > place
    segments = steps.masked_fill(~later[..., None], 0).cumsum(-3)
    faded = torch.where((place[:, None] >= place)[..., None], segments, -math.inf).exp()
    if faded.shape[-1] == 1:
        return faded.squeeze(-1) * torch.einsum("...id,...jd->...ij", a, b)
    return ((a[..., :, None, :] * faded) * b[..., None, :, :]).sum(-1)

# %% wrong="gated_linear_attention" because="queries don't fade on the way to the state"
- outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ v_c)
+ outputs.append(q_c @ state + decayed_scores(q_c, k_c, g_c) @ v_c)

# %% wrong="gated_linear_attention" because="exclusive sums for the queries"
- outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ v_c)
+ outputs.append((q_c * (sums - g_c).exp()) @ state + decayed_scores(q_c, k_c, g_c) @ v_c)

# %% wrong="gated_linear_attention" because="keys don't fade on the way into the state"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = last.exp().mT * state + k_c.mT @ v_c

# %% wrong="gated_linear_attention" because="keys fade by their own decay too"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = last.exp().mT * state + (k_c * (last - sums + g_c).exp()).mT @ v_c

# %% wrong="gated_linear_attention" because="keys fade by what is past"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = last.exp().mT * state + (k_c * sums.exp()).mT @ v_c

# %% wrong="gated_linear_attention" because="the old state fades by the last token only"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = g_c[..., -1:, :].exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c

# %% wrong="gated_linear_attention" because="the old state does not fade"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = state + (k_c * (last - sums).exp()).mT @ v_c

# %% wrong="gated_linear_attention" because="drops the state between chunks"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = (k_c * (last - sums).exp()).mT @ v_c

# %% wrong="gated_linear_attention" because="no decay inside a chunk"
- outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ v_c)
+ outputs.append((q_c * sums.exp()) @ state + (q_c @ k_c.mT).tril() @ v_c)

# %% wrong="gated_linear_attention" because="a quotient of exponentials for the keys"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c
+ state = last.exp().mT * (state + (k_c * (-sums).exp()).mT @ v_c)

# %% wrong="gated_linear_attention" because="ignores the state it is given"
- state = empty_state(k, v) if state is None else state
+ state = empty_state(k, v)

# %% wrong="gated_linear_attention" because="token by token, the chunk ignored"
- for q_c, k_c, v_c, g_c in chunks(chunk, q, k, v, log_decay):
+ for q_c, k_c, v_c, g_c in chunks(1, q, k, v, log_decay):

# %% wrong="gated_linear_attention" because="the whole sequence as one chunk"
- for q_c, k_c, v_c, g_c in chunks(chunk, q, k, v, log_decay):
+ for q_c, k_c, v_c, g_c in chunks(q.shape[2], q, k, v, log_decay):

# %% wrong="gated_linear_attention" because="o stays float32"
- return torch.cat(outputs, dim=2).to(dtype), state
+ return torch.cat(outputs, dim=2), state

# %% wrong="gated_linear_attention" because="log-decays stay in half precision"
- q, k, v, log_decay = wide(q, k, v, log_decay)
+ q, k, v = wide(q, k, v)

# %% wrong="gated_linear_attention" because="o in q's dtype"
- dtype = v.dtype
+ dtype = q.dtype

# %% wrong="gated_linear_attention" because="sums over the whole sequence: a fast stretch blurs later chunks"
- for q_c, k_c, v_c, g_c in chunks(chunk, q, k, v, log_decay):
+ whole, past = log_decay.cumsum(2), torch.zeros_like(log_decay[:, :, :1])
+ for q_c, k_c, v_c, g_c, c in chunks(chunk, q, k, v, log_decay, whole):

- sums = g_c.cumsum(-2)
- last = sums[..., -1:, :]
+ sums = c - past
+ last, past = sums[..., -1:, :], c[..., -1:, :]

# %% wrong="gated_linear_attention" because="both parts of o are rounded to v's dtype before they are added"
- outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ v_c)
+ earlier, inside = (q_c * sums.exp()) @ state, decayed_scores(q_c, k_c, g_c) @ v_c
+ outputs.append(earlier.to(dtype) + inside.to(dtype))

# %% right="gated_linear_attention" because="the state as a token in front of each chunk's pairs"
def gated_linear_attention(q, k, v, log_decay, chunk, state=None):
    dtype, work = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v, log_decay = (t.to(work) for t in (q, k, v, log_decay))
    if state is None:
        state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=work, device=k.device)
    o = []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        g = log_decay[:, :, part]
        inside = decayed_scores(q[:, :, part], k[:, :, part], g) @ v[:, :, part]
        o.append(inside + torch.einsum("bhid,bhdv->bhiv", q[:, :, part] * g.cumsum(2).exp(), state))
        rest = g.flip(2).cumsum(2).flip(2) - g  # what is still to come
        total = g.sum(2).exp()[..., None]
        added = torch.einsum("bhid,bhiv->bhdv", k[:, :, part] * rest.exp(), v[:, :, part])
        state = total * state + added
    return torch.cat(o, 2).to(dtype), state

# %% wrong="gated_linear_attention" because="log-decays take v's format first, which may be half precision"
- q, k, v, log_decay = wide(q, k, v, log_decay)
+ q, k, v, log_decay = wide(q, k, v, log_decay.to(v.dtype))

# %% wrong="wy_factors" because="no solve"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ solved = right

# %% wrong="wy_factors" because="the first term of the series only"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ solved = right - system.tril(-1) @ right

# %% wrong="wy_factors" because="β missing from the matrix"
- system = beta * decayed_scores(k, k, log_decay)
+ system = decayed_scores(k, k, log_decay)

# %% wrong="wy_factors" because="β missing on the right"
- right = beta * torch.cat([k * log_decay.cumsum(-2).exp(), v], dim=-1)
+ right = torch.cat([k * log_decay.cumsum(-2).exp(), v], dim=-1)

# %% wrong="wy_factors" because="β of the columns"
- system = beta * decayed_scores(k, k, log_decay)
+ system = decayed_scores(k, k, log_decay) * beta.mT

# %% wrong="wy_factors" because="keys that read the state unfaded"
- right = beta * torch.cat([k * log_decay.cumsum(-2).exp(), v], dim=-1)
+ right = beta * torch.cat([k.expand(k.shape), v], dim=-1)

# %% wrong="wy_factors" because="exclusive sums for the keys"
- right = beta * torch.cat([k * log_decay.cumsum(-2).exp(), v], dim=-1)
+ right = beta * torch.cat([k * (log_decay.cumsum(-2) - log_decay).exp(), v], dim=-1)

# %% wrong="wy_factors" because="no decay in the matrix"
- system = beta * decayed_scores(k, k, log_decay)
+ system = beta * (k @ k.mT)

# %% wrong="wy_factors" because="the diagonal counted twice"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ one = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
+ solved = torch.linalg.solve_triangular(system + one, right, upper=False)

# %% wrong="wy_factors" because="adds what is held"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ solved = torch.linalg.solve_triangular(-system, right, upper=False, unitriangular=True)

# %% wrong="wy_factors" because="W and U exchanged"
- return solved.split([k.shape[-1], v.shape[-1]], dim=-1)
+ w, u = solved.split([k.shape[-1], v.shape[-1]], dim=-1)
+ return u, w

# %% wrong="wy_factors" because="row after row"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ rows = []
+ for i in range(k.shape[-2]):
+     row = right[..., i : i + 1, :]
+     if rows:
+         row = row - system[..., i : i + 1, :i] @ torch.cat(rows, -2)
+     rows.append(row)
+ solved = torch.cat(rows, -2)

# %% wrong="wy_factors" because="the inverse by doubling, with factors for 64 tokens"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ power = -system.tril(-1)
+ solved = right + power @ right
+ for _ in range(5):
+     power = power @ power
+     solved = solved + power @ solved

# %% wrong="wy_factors" because="the diagonal of keys of length 1"
- system = beta * decayed_scores(k, k, log_decay)
+ one = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
+ system = one + beta * (decayed_scores(k, k, log_decay) - one)

- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ solved = torch.linalg.solve_triangular(system, right, upper=False)

# %% right="wy_factors" because="the inverse by doubling, as many factors as it takes"
- solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
+ power, solved, reach = -system.tril(-1), right, 1
+ while reach < k.shape[-2]:
+     solved, reach = solved + power @ solved, 2 * reach
+     power = power @ power

# %% right="wy_factors" because="the inverse, and two products"
def wy_factors(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    t = torch.linalg.inv(one + beta * decayed_scores(k, k, log_decay).tril(-1)) * beta.mT
    return t @ (k * log_decay.cumsum(-2).exp()), t @ v

# %% wrong="delta_rule_chunked" because="adds, erases nothing"
- written_c = u - w @ state
+ written_c = b_c * v_c

# %% wrong="delta_rule_chunked" because="erases inside a chunk only"
- written_c = u - w @ state
+ written_c = u

# %% wrong="delta_rule_chunked" because="adds what the state holds"
- written_c = u - w @ state
+ written_c = u + w @ state

# %% wrong="delta_rule_chunked" because="erases what earlier chunks wrote only"
- written_c = u - w @ state
+ written_c = b_c * (v_c - (k_c * g_c.cumsum(-2).exp()) @ state)

# %% wrong="delta_rule_chunked" because="ignores the decay"
- log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
+ log_decay = torch.zeros_like(beta)

# %% wrong="delta_rule_chunked" because="needs a decay"
- log_decay = torch.zeros_like(beta) if log_decay is None else log_decay

# %% wrong="delta_rule_chunked" because="the old state does not fade"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ written_c
+ state = state + (k_c * (last - sums).exp()).mT @ written_c

# %% wrong="delta_rule_chunked" because="keys don't fade on the way into the state"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ written_c
+ state = last.exp().mT * state + k_c.mT @ written_c

# %% wrong="delta_rule_chunked" because="queries don't fade"
- outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ written_c)
+ outputs.append(q_c @ state + decayed_scores(q_c, k_c, g_c) @ written_c)

# %% wrong="delta_rule_chunked" because="values for what is written, on the way into the state"
- state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ written_c
+ state = last.exp().mT * state + (k_c * (last - sums).exp()).mT @ v_c

# %% wrong="delta_rule_chunked" because="ignores the state it is given"
- state = empty_state(k, v) if state is None else state
+ state = empty_state(k, v)

# %% wrong="delta_rule_chunked" because="token by token, the chunk ignored"
- for q_c, k_c, v_c, b_c, g_c in chunks(chunk, q, k, v, beta, log_decay):
+ for q_c, k_c, v_c, b_c, g_c in chunks(1, q, k, v, beta, log_decay):

# %% wrong="delta_rule_chunked" because="the whole sequence as one chunk"
- for q_c, k_c, v_c, b_c, g_c in chunks(chunk, q, k, v, beta, log_decay):
+ for q_c, k_c, v_c, b_c, g_c in chunks(q.shape[2], q, k, v, beta, log_decay):

# %% wrong="delta_rule_chunked" because="state_update in a loop"
def delta_rule_chunked(q, k, v, beta, chunk, log_decay=None, state=None):
    return delta_rule_recurrent(q, k, v, beta, log_decay, state)

# %% wrong="delta_rule_chunked" because="normalizes the keys"
- q, k, v, beta, log_decay = wide(q, k, v, beta, log_decay)
+ q, k, v, beta, log_decay = wide(q, F.normalize(k, dim=-1), v, beta, log_decay)

# %% wrong="delta_rule_chunked" because="the state in v's dtype"
- return torch.cat(outputs, dim=2).to(dtype), state
+ return torch.cat(outputs, dim=2).to(dtype), state.to(dtype)

# %% wrong="delta_rule_chunked" because="o in q's dtype"
- dtype = v.dtype
+ dtype = q.dtype

# %% wrong="delta_rule_chunked" because="sums over the whole sequence: a fast stretch blurs later chunks"
- for q_c, k_c, v_c, b_c, g_c in chunks(chunk, q, k, v, beta, log_decay):
+ whole, past = log_decay.cumsum(2), torch.zeros_like(log_decay[:, :, :1])
+ for q_c, k_c, v_c, b_c, g_c, c in chunks(chunk, q, k, v, beta, log_decay, whole):

- sums = g_c.cumsum(-2)
- last = sums[..., -1:, :]
+ sums = c - past
+ last, past = sums[..., -1:, :], c[..., -1:, :]

# %% wrong="delta_rule_chunked" because="both parts of o are rounded to v's dtype before they are added"
- outputs.append((q_c * sums.exp()) @ state + decayed_scores(q_c, k_c, g_c) @ written_c)
+ earlier, inside = (q_c * sums.exp()) @ state, decayed_scores(q_c, k_c, g_c) @ written_c
+ outputs.append(earlier.to(dtype) + inside.to(dtype))

# %% right="delta_rule_chunked" because="q, k and v side by side"
- q, k, v, beta, log_decay = wide(q, k, v, beta, log_decay)
+ d_k, d_v = k.shape[-1], v.shape[-1]
+ beta, log_decay, tokens = wide(beta, log_decay, torch.cat(wide(q, k, v), dim=-1))
+ q, k, v = tokens.split([d_k, d_k, d_v], dim=-1)

# %% right="delta_rule_chunked" because="one solve a chunk, with the state on the right"
def delta_rule_chunked(q, k, v, beta, chunk, log_decay=None, state=None):
    dtype = v.dtype
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    q, k, v, beta, log_decay = wide(q, k, v, beta, log_decay)
    if state is None:
        state = empty_state(k, v)
    o = []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        q_c, k_c, v_c, b_c, g_c = (t[:, :, part] for t in (q, k, v, beta, log_decay))
        faded = g_c.cumsum(2).exp()
        right = b_c * (v_c - (k_c * faded) @ state)
        one = torch.eye(k_c.shape[2], dtype=k.dtype, device=k.device)
        system = one + (b_c * decayed_scores(k_c, k_c, g_c)).tril(-1)
        u = torch.linalg.solve(system, right)
        o.append(decayed_scores(q_c, k_c, g_c) @ u + (q_c * faded) @ state)
        rest = (g_c.sum(2, keepdim=True) - g_c.cumsum(2)).exp()
        state = faded[:, :, -1, :, None] * state + (k_c * rest).mT @ u
    return torch.cat(o, 2).to(dtype), state

# %% right="delta_rule_chunked" because="the factors of all chunks at once, padded"
def delta_rule_chunked(q, k, v, beta, chunk, log_decay=None, state=None):
    dtype, seq = v.dtype, q.shape[2]
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    parts = wide(q, k, v, beta, log_decay)
    q, k, v, beta, g = (
        F.pad(t, (0, 0, 0, -seq % chunk)).unflatten(2, (-1, chunk)) for t in parts
    )
    state = empty_state(k[:, :, 0], v[:, :, 0]) if state is None else state
    w, u = wy_factors(k, v, beta, g)
    inside, sums = decayed_scores(q, k, g), g.cumsum(-2)
    faded_q, faded_k = q * sums.exp(), k * (sums[..., -1:, :] - sums).exp()
    outputs = []
    for n in range(q.shape[2]):
        new = u[:, :, n] - w[:, :, n] @ state
        outputs.append(faded_q[:, :, n] @ state + inside[:, :, n] @ new)
        state = sums[:, :, n, -1:].exp().mT * state + faded_k[:, :, n].mT @ new
    return torch.cat(outputs, 2)[:, :, :seq].to(dtype), state

# %% wrong="delta_rule_chunked" because="beta takes v's format first, which may be half precision"
- log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
- q, k, v, beta, log_decay = wide(q, k, v, beta, log_decay)
+ log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
+ q, k, v, beta, log_decay = wide(q, k, v, beta.to(v.dtype), log_decay)

# %% wrong="chunk_kernel" because="drops the state between chunks"
- state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")
+ state = tl.dot(tl.trans(k), v, input_precision="ieee")

# %% wrong="chunk_kernel" because="exp2 without log2(e)"
- g = load_numbers(g_ptr, start, seq, CHUNK) * 1.4426950408889634
+ g = load_numbers(g_ptr, start, seq, CHUNK)

# %% wrong="chunk_kernel" because="exclusive sums"
- sums, total = tl.cumsum(g, 0), tl.sum(g, 0)  # inclusive, in units of log2
+ sums, total = tl.cumsum(g, 0) - g, tl.sum(g, 0)

# %% wrong="chunk_kernel" because="no causal mask"
- faded = tl.exp2(tl.where(i >= j, sums[:, None] - sums[None, :], float("-inf")))
+ faded = tl.exp2(sums[:, None] - sums[None, :])

# %% wrong="chunk_kernel" because="a quotient of exponentials"
- faded = tl.exp2(tl.where(i >= j, sums[:, None] - sums[None, :], float("-inf")))
+ faded = tl.where(i >= j, tl.exp2(sums)[:, None] * tl.exp2(-sums)[None, :], 0.0)

# %% wrong="chunk_kernel" because="keys don't fade on the way into the state"
- k = (k * tl.exp2(total - sums)[:, None]).to(v.dtype)

# %% wrong="chunk_kernel" because="the state rounded to the inputs' dtype after each chunk"
- state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")
+ state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee").to(v.dtype).to(tl.float32)

# %% wrong="chunk_kernel" because="the row stride of q for k"
- k = load_rows(k_ptr, start, seq, k_row, 0, D_K, CHUNK, BLOCK_K)
+ k = load_rows(k_ptr, start, seq, q_row, 0, D_K, CHUNK, BLOCK_K)

# %% wrong="chunk_kernel" because="v from its first column, in every program"
- v = load_rows(v_ptr, start, seq, v_row, first, D_V, CHUNK, BLOCK_V)
+ v = load_rows(v_ptr, start, seq, v_row, 0, D_V, CHUNK, BLOCK_V)

# %% wrong="chunk_kernel" because="whole chunks only"
- for start in range(0, seq, CHUNK):
+ for start in range(0, seq // CHUNK * CHUNK, CHUNK):

# %% wrong="chunk_kernel" because="the state is written before it is read"
- o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums)[:, None]
- o = tl.dot(scores.to(v.dtype), v, o, input_precision="ieee")
- store_rows(o_ptr, o, start, seq, o_row, first, D_V, CHUNK, BLOCK_V)
+ state = tl.dot(tl.trans((k * tl.exp2(total - sums)[:, None]).to(v.dtype)), v, state * tl.exp2(total), input_precision="ieee")
+ o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums)[:, None]
+ o = tl.dot(scores.to(v.dtype), v, o, input_precision="ieee")
+ store_rows(o_ptr, o, start, seq, o_row, first, D_V, CHUNK, BLOCK_V)

- k = (k * tl.exp2(total - sums)[:, None]).to(v.dtype)
- state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")

# %% wrong="chunk_kernel" because="a product of two dtypes, which only the interpreter takes"
- k = (k * tl.exp2(total - sums)[:, None]).to(v.dtype)
+ k = k * tl.exp2(total - sums)[:, None]

# %% wrong="chunk_kernel" because="stops with break, which no GPU kernel can"
- g = load_numbers(g_ptr, start, seq, CHUNK) * 1.4426950408889634
+ if start >= seq:
+     break
+ g = load_numbers(g_ptr, start, seq, CHUNK) * 1.4426950408889634

# %% wrong="chunk_kernel" because="loads q twice"
- o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums)[:, None]
+ q = load_rows(q_ptr, start, seq, q_row, 0, D_K, CHUNK, BLOCK_K)
+ o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums)[:, None]

# %% wrong="chunk_kernel" because="sums over the whole sequence: a fast stretch blurs later chunks"
- i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
+ past = 0.0
+ i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]

- sums, total = tl.cumsum(g, 0), tl.sum(g, 0)  # inclusive, in units of log2
+ sums, total = past + tl.cumsum(g, 0), past + tl.sum(g, 0)

- o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums)[:, None]
+ o = tl.dot(q, state.to(q.dtype), input_precision="ieee") * tl.exp2(sums - past)[:, None]

- state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")
+ state = tl.dot(tl.trans(k), v, state * tl.exp2(total - past), input_precision="ieee")
+ past = total

# %% right="chunk_kernel" because="the values fade, not the keys, and the decays by exp"
- k = (k * tl.exp2(total - sums)[:, None]).to(v.dtype)
- state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")
+ rest = tl.exp((total - sums) * 0.6931471805599453)
+ state *= tl.exp(total * 0.6931471805599453)
+ state += tl.dot(tl.trans(k), (v * rest[:, None]).to(k.dtype), input_precision="ieee")

# %% wrong="chunk_kernel" because="float32 is multiplied as TF32, tl.dot's default"
- state = tl.dot(tl.trans(k), v, state * tl.exp2(total), input_precision="ieee")
+ state = tl.dot(tl.trans(k), v, state * tl.exp2(total))

# %% wrong="linear_numbers" because="adds in place of replacing"
- "overwrite": 0.25 * (0.75 * 8) + 0.75 * 2,
+ "overwrite": 0.75 * 8 + 0.75 * 2,

# %% wrong="linear_numbers" because="the variance, not its root"
- "noise": math.sqrt(256 / 64),
+ "noise": 256 / 64,

# %% wrong="linear_numbers" because="heads counted from 1"
- "half_life": math.log(2) / -math.log(1 - 2**-8),
+ "half_life": math.log(2) / -math.log(1 - 2**-7),

# %% wrong="linear_numbers" because="the logarithm to base 10"
- "overflow": math.ceil(math.log(3.4e38) / -math.log(0.9)),
+ "overflow": math.ceil(math.log10(3.4e38) / -math.log(0.9)),

# %% wrong="linear_numbers" because="the eigenvalue of what is erased"
- "eigenvalue": 1 - 1.5,
+ "eigenvalue": 1.5,

# %% wrong="linear_numbers" because="the pairs without the products with the state"
- "pairs": (2 * 256 * 128 + 4 * 64 * 64) / (4 * 64 * 64),
+ "pairs": 2 * 256 * 128 / (4 * 64 * 64),

# %% wrong="linear_numbers" because="keys without values"
- "hybrid": 36 * 32 * 128 * 128 * 4 / (12 * 2 * 2 * 256 * 2),
+ "hybrid": 36 * 32 * 128 * 128 * 4 / (12 * 2 * 256 * 2),

# %% right="linear_numbers" because="numbers by hand"
def linear_numbers() -> dict[str, float]:
    return {
        "overwrite": 3.0,
        "noise": 2,
        "half_life": 177.1,
        "overflow": 843,
        "eigenvalue": -0.5,
        "pairs": 5,
        "hybrid": 3072,
    }
