# Right and wrong answers to the exercises of lesson 10: see CONTRIBUTING.md.

# %% wrong="mla_cache_bytes" because="a rotary key for every head" base="rotary-key"
def mla_cache_bytes(config: MLAConfig, batch: int, seq: int, bytes_per_element: int = 2):
    return (
        batch
        * seq
        * config.layers
        * (config.kv_rank + config.heads * config.rope_dim)
        * bytes_per_element
    )


def cache_comparison(
    seq: int,
    hidden: int = 4096,
    layers: int = 32,
    head_dim: int = 128,
    kv_rank: int = 512,
    rope_dim: int = 64,
):
    def gib(numbers_per_token: int):
        return numbers_per_token * layers * seq * 2 / 2**30

    heads = hidden // head_dim
    return {
        "MHA": gib(2 * heads * head_dim),
        "GQA-8": gib(2 * 8 * head_dim),
        "MQA": gib(2 * head_dim),
        "MLA": gib(kv_rank + heads * rope_dim),
    }

# %% wrong="mla_cache_bytes" because="the latent counted for keys and again for values" of="rotary-key"
- return (
-     batch
-     * seq
-     * config.layers
-     * (config.kv_rank + config.heads * config.rope_dim)
-     * bytes_per_element
- )
+ return batch * seq * config.layers * (2 * config.kv_rank + config.rope_dim) * bytes_per_element

- "MLA": gib(kv_rank + heads * rope_dim),
+ "MLA": gib(2 * kv_rank + rope_dim),

# %% wrong="mla_cache_bytes" because="no layers" of="rotary-key"
- return (
-     batch
-     * seq
-     * config.layers
-     * (config.kv_rank + config.heads * config.rope_dim)
-     * bytes_per_element
- )
+ return batch * seq * (config.kv_rank + config.rope_dim) * bytes_per_element

- "MLA": gib(kv_rank + heads * rope_dim),
+ "MLA": gib(kv_rank + rope_dim),

# %% wrong="mla_cache_bytes" because="decimal gigabytes" base="decimal-gigabytes"
def mla_cache_bytes(config: MLAConfig, batch: int, seq: int, bytes_per_element: int = 2):
    return batch * seq * config.layers * (config.kv_rank + config.rope_dim) * bytes_per_element


def cache_comparison(
    seq: int,
    hidden: int = 4096,
    layers: int = 32,
    head_dim: int = 128,
    kv_rank: int = 512,
    rope_dim: int = 64,
):
    def gib(numbers_per_token: int):
        return numbers_per_token * layers * seq * 2 / 1e9

    heads = hidden // head_dim
    return {
        "MHA": gib(2 * heads * head_dim),
        "GQA-8": gib(2 * 8 * head_dim),
        "MQA": gib(2 * head_dim),
        "MLA": gib(kv_rank + rope_dim),
    }

# %% wrong="mla_cache_bytes" because="keys without values" of="decimal-gigabytes"
- return numbers_per_token * layers * seq * 2 / 1e9
+ return numbers_per_token * layers * seq * 2 / 2**30

- "MHA": gib(2 * heads * head_dim),
- "GQA-8": gib(2 * 8 * head_dim),
+ "MHA": gib(heads * head_dim),
+ "GQA-8": gib(8 * head_dim),

# %% wrong="mla_cache_bytes" because="GQA-8 read as eight query heads a group" of="decimal-gigabytes"
- return numbers_per_token * layers * seq * 2 / 1e9
+ return numbers_per_token * layers * seq * 2 / 2**30

- "GQA-8": gib(2 * 8 * head_dim),
+ "GQA-8": gib(2 * heads // 8 * head_dim),

# %% right="mla_cache_bytes" because="counted in tensors of one token"
def mla_cache_bytes(config, batch, seq, bytes_per_element=2):
    entry = torch.empty(config.kv_rank + config.rope_dim, dtype=torch.int8)
    return entry.nbytes * bytes_per_element * config.layers * seq * batch


def cache_comparison(seq, hidden=4096, layers=32, head_dim=128, kv_rank=512, rope_dim=64):
    widths = {
        "MHA": 2 * (hidden - hidden % head_dim),
        "GQA-8": 16 * head_dim,
        "MQA": 2 * head_dim,
        "MLA": kv_rank + rope_dim,
    }
    return {name: seq * layers * width / 2**29 for name, width in widths.items()}

# %% wrong="mla" because="scale of the latent width" base="scale-latent"
class MultiHeadLatentAttention(nn.Module):
    def __init__(self, config: MLAConfig):
        super().__init__()
        c = self.config = config
        self.w_dq = nn.Linear(c.d_model, c.q_rank, bias=False)
        self.q_norm = nn.RMSNorm(c.q_rank, eps=1e-6)
        self.w_uq = nn.Linear(c.q_rank, c.heads * c.nope_dim, bias=False)
        self.w_qr = nn.Linear(c.q_rank, c.heads * c.rope_dim, bias=False)
        self.w_dkv = nn.Linear(c.d_model, c.kv_rank, bias=False)
        self.kv_norm = nn.RMSNorm(c.kv_rank, eps=1e-6)
        self.w_kr = nn.Linear(c.d_model, c.rope_dim, bias=False)
        self.w_uk = nn.Linear(c.kv_rank, c.heads * c.nope_dim, bias=False)
        self.w_uv = nn.Linear(c.kv_rank, c.heads * c.v_dim, bias=False)
        self.w_o = nn.Linear(c.heads * c.v_dim, c.d_model, bias=False)

    def latents(self, x: Tensor, start: int = 0):
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return self.kv_norm(self.w_dkv(x)), rope(self.w_kr(x), positions)

    def forward(self, x: Tensor, start: int = 0):
        c = self.config
        c_kv, k_rope = self.latents(x, start)
        c_q = self.q_norm(self.w_dq(x))
        positions = torch.arange(start, start + x.shape[1], device=x.device)

        def heads(t: Tensor, width: int):
            return t.unflatten(-1, (c.heads, width)).transpose(1, 2)

        q = torch.cat(
            [heads(self.w_uq(c_q), c.nope_dim), rope(heads(self.w_qr(c_q), c.rope_dim), positions)],
            dim=-1,
        )
        k_shared = k_rope[:, None].expand(-1, c.heads, -1, -1)
        k = torch.cat([heads(self.w_uk(c_kv), c.nope_dim), k_shared], dim=-1)
        out = F.scaled_dot_product_attention(
            q,
            k,
            heads(self.w_uv(c_kv), c.v_dim),
            is_causal=True,
            scale=(c.kv_rank + c.rope_dim) ** -0.5,
        )
        return self.w_o(out.transpose(1, 2).flatten(-2))

# %% wrong="mla" because="scale of the unrotated part alone" of="scale-latent"
- q,
- k,
- heads(self.w_uv(c_kv), c.v_dim),
- is_causal=True,
- scale=(c.kv_rank + c.rope_dim) ** -0.5,
+ q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True, scale=c.nope_dim**-0.5

# %% wrong="mla" because="the latent is not normalized" of="scale-latent"
- return self.kv_norm(self.w_dkv(x)), rope(self.w_kr(x), positions)
+ return self.w_dkv(x), rope(self.w_kr(x), positions)

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="the query latent is not normalized" of="scale-latent"
- c_q = self.q_norm(self.w_dq(x))
+ c_q = self.w_dq(x)

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="the whole key is rotated" of="scale-latent"
- [heads(self.w_uq(c_q), c.nope_dim), rope(heads(self.w_qr(c_q), c.rope_dim), positions)],
+ [
+     rope(heads(self.w_uq(c_q), c.nope_dim), positions),
+     rope(heads(self.w_qr(c_q), c.rope_dim), positions),
+ ],

- k = torch.cat([heads(self.w_uk(c_kv), c.nope_dim), k_shared], dim=-1)
- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ k = torch.cat([rope(heads(self.w_uk(c_kv), c.nope_dim), positions), k_shared], dim=-1)
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="the rotary key is not rotated" of="scale-latent"
- return self.kv_norm(self.w_dkv(x)), rope(self.w_kr(x), positions)
+ return self.kv_norm(self.w_dkv(x)), self.w_kr(x)

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="the queries are not rotated" of="scale-latent"
- [heads(self.w_uq(c_q), c.nope_dim), rope(heads(self.w_qr(c_q), c.rope_dim), positions)],
- dim=-1,
+ [heads(self.w_uq(c_q), c.nope_dim), heads(self.w_qr(c_q), c.rope_dim)], dim=-1

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="a rotary key for each head" of="scale-latent"
- self.w_kr = nn.Linear(c.d_model, c.rope_dim, bias=False)
+ self.w_kr = nn.Linear(c.d_model, c.heads * c.rope_dim, bias=False)

- return self.kv_norm(self.w_dkv(x)), rope(self.w_kr(x), positions)
+ return self.kv_norm(self.w_dkv(x)), rope(
+     self.w_kr(x).unflatten(-1, (self.config.heads, -1)).transpose(1, 2), positions
+ ).transpose(1, 2).flatten(-2)

- k_shared = k_rope[:, None].expand(-1, c.heads, -1, -1)
+ k_shared = k_rope.unflatten(-1, (c.heads, -1)).transpose(1, 2)

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="not causal" of="scale-latent"
- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim))

# %% wrong="mla" because="forward ignores start in the queries" of="scale-latent"
  c_q = self.q_norm(self.w_dq(x))
- positions = torch.arange(start, start + x.shape[1], device=x.device)
+ positions = torch.arange(x.shape[1], device=x.device)

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="rotated along the axis of the heads" of="scale-latent"
- [heads(self.w_uq(c_q), c.nope_dim), rope(heads(self.w_qr(c_q), c.rope_dim), positions)],
+ [
+     heads(self.w_uq(c_q), c.nope_dim),
+     rope(self.w_qr(c_q), positions).unflatten(-1, (c.heads, -1)).transpose(1, 2),
+ ],

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% wrong="mla" because="values from the whole key: latent and rotary part" of="scale-latent"
- heads(self.w_uv(c_kv), c.v_dim),
+ heads(self.w_uv(c_kv + F.pad(k_rope, (0, c.kv_rank - c.rope_dim))), c.v_dim),

- scale=(c.kv_rank + c.rope_dim) ** -0.5,

# %% wrong="mla" because="heads joined without transposing back" of="scale-latent"
- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
- return self.w_o(out.transpose(1, 2).flatten(-2))
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)
+ return self.w_o(out.reshape(*x.shape[:2], -1))

# %% wrong="mla" because="the rotary key normalized too" of="scale-latent"
- return self.kv_norm(self.w_dkv(x)), rope(self.w_kr(x), positions)
+ return self.kv_norm(self.w_dkv(x)), rope(
+     F.rms_norm(self.w_kr(x), (self.config.rope_dim,)), positions
+ )

- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ out = F.scaled_dot_product_attention(q, k, heads(self.w_uv(c_kv), c.v_dim), is_causal=True)

# %% right="mla" because="one head at a time, softmax by hand" of="scale-latent"
- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
- )
+ hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
+ out = []
+ for i, w_uv in enumerate(self.w_uv.weight.unflatten(0, (c.heads, -1))):
+     scores = (q[:, i] @ k[:, i].mT / math.sqrt(c.nope_dim + c.rope_dim)).masked_fill(
+         hidden, -math.inf
+     )
+     out.append(scores.softmax(-1) @ (c_kv @ w_uv.T))
+ out = torch.stack(out, 1)

# %% right="mla" because="absorbed: attention in the latent space" of="scale-latent"
- k = torch.cat([heads(self.w_uk(c_kv), c.nope_dim), k_shared], dim=-1)
- out = F.scaled_dot_product_attention(
-     q,
-     k,
-     heads(self.w_uv(c_kv), c.v_dim),
-     is_causal=True,
-     scale=(c.kv_rank + c.rope_dim) ** -0.5,
+ w_uk, w_uv = (w.weight.unflatten(0, (c.heads, -1)) for w in (self.w_uk, self.w_uv))
+ scores = (
+     torch.einsum("bhtn,hnr,bsr->bhts", q[..., : c.nope_dim], w_uk, c_kv)
+     + q[..., c.nope_dim :] @ k_shared.mT

  )
+ future = torch.ones_like(scores, dtype=torch.bool).triu(1)
+ weights = (
+     (scores * (c.nope_dim + c.rope_dim) ** -0.5).masked_fill(future, -math.inf).softmax(-1)
+ )
+ out = torch.einsum("bhts,bsr,hvr->bhtv", weights, c_kv, w_uv)
  return self.w_o(out.transpose(1, 2).flatten(-2))

# %% wrong="absorb" because="the query's product the other way round"
def absorb(w_uq, w_uk, w_uv, w_o):
    w_q = w_uq.transpose(1, 2) @ w_uk
    return w_q, w_o.unflatten(1, (w_uv.shape[0], -1)).transpose(0, 1) @ w_uv

# %% wrong="absorb" because="the columns of the output projection dealt out in turn"
def absorb(w_uq, w_uk, w_uv, w_o):
    return w_uk.mT @ w_uq, w_o.unflatten(1, (-1, w_uv.shape[0])).permute(2, 0, 1) @ w_uv

# %% wrong="absorb" because="heads summed too early"
def absorb(w_uq, w_uk, w_uv, w_o):
    w_out = w_o @ w_uv.flatten(0, 1)
    return w_uk.mT @ w_uq, w_out.expand(len(w_uv), -1, -1)

# %% wrong="absorb" because="keys and values exchanged"
def absorb(w_uq, w_uk, w_uv, w_o):
    w_q = w_uv[:, : w_uq.shape[1]].mT @ w_uq[:, : w_uv.shape[1]]
    return w_q, w_o.unflatten(1, (w_uv.shape[0], -1)).transpose(0, 1) @ w_uv

# %% wrong="absorb" because="the rotary scale taken in"
def absorb(w_uq, w_uk, w_uv, w_o):
    w_q = w_uk.mT @ w_uq / math.sqrt(w_uk.shape[1])
    return w_q, w_o.unflatten(1, (w_uv.shape[0], -1)).transpose(0, 1) @ w_uv

# %% right="absorb" because="einsum"
def absorb(w_uq, w_uk, w_uv, w_o):
    heads, v_dim, _ = w_uv.shape
    return torch.einsum("hnr,hnq->hrq", w_uk, w_uq), torch.einsum(
        "dhv,hvr->hdr", w_o.view(-1, heads, v_dim), w_uv
    )

# %% right="absorb" because="a loop over the heads"
def absorb(w_uq, w_uk, w_uv, w_o):
    w_q = torch.stack([uk.T @ uq for uk, uq in zip(w_uk, w_uq, strict=True)])
    return w_q, torch.stack(
        [o @ uv for o, uv in zip(w_o.chunk(len(w_uv), dim=1), w_uv, strict=True)]
    )

# %% wrong="decode_absorbed" because="scale 1/√(512 + 64) in place of 1/√(128 + 64)" base="scale-place"
def decode_absorbed(
    c_q: Tensor,
    q_rope: Tensor,
    entry: Tensor,
    cache: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    nope_dim: int,
):
    kv_rank, rope_dim = w_q.shape[1], q_rope.shape[-1]
    cache = torch.cat([cache, entry[:, None]], dim=1)
    q = torch.cat([torch.einsum("hrq,bq->bhr", w_q, c_q), q_rope], dim=-1)
    scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
    average = scores.softmax(-1) @ cache[..., :kv_rank]
    return torch.einsum("hdr,bhr->bd", w_out, average), cache

# %% wrong="decode_absorbed" because="scale of the unrotated part alone" of="scale-place"
- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
+ scores = q @ cache.transpose(1, 2) / math.sqrt(nope_dim)

# %% wrong="decode_absorbed" because="values from all 576 numbers" of="scale-place"
- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
- average = scores.softmax(-1) @ cache[..., :kv_rank]
- return torch.einsum("hdr,bhr->bd", w_out, average), cache
+ scores = q @ cache.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)
+ average = scores.softmax(-1) @ cache
+ return torch.einsum("hdr,bhr->bd", F.pad(w_out, (0, rope_dim), value=0.1), average), cache

# %% wrong="decode_absorbed" because="the new token does not see itself" of="scale-place"
  kv_rank, rope_dim = w_q.shape[1], q_rope.shape[-1]
+ old = cache

- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
- average = scores.softmax(-1) @ cache[..., :kv_rank]
+ scores = q @ old.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)
+ average = scores.softmax(-1) @ old[..., :kv_rank]

# %% wrong="decode_absorbed" because="the new entry in front" of="scale-place"
- cache = torch.cat([cache, entry[:, None]], dim=1)
+ cache = torch.cat([entry[:, None], cache], dim=1)

- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
+ scores = q @ cache.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)

# %% wrong="decode_absorbed" because="the rotary part left out of the score" of="scale-place"
- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
+ scores = (
+     q[..., :kv_rank] @ cache[..., :kv_rank].transpose(1, 2) / math.sqrt(nope_dim + rope_dim)
+ )

# %% wrong="decode_absorbed" because="the rotary part first in the query" of="scale-place"
- q = torch.cat([torch.einsum("hrq,bq->bhr", w_q, c_q), q_rope], dim=-1)
- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
+ q = torch.cat([q_rope, torch.einsum("hrq,bq->bhr", w_q, c_q)], dim=-1)
+ scores = q @ cache.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)

# %% wrong="decode_absorbed" because="softmax over the heads" of="scale-place"
- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
- average = scores.softmax(-1) @ cache[..., :kv_rank]
+ scores = q @ cache.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)
+ average = scores.softmax(1) @ cache[..., :kv_rank]

# %% wrong="decode_absorbed" because="the cache holds keys and values of every head"
def decode_absorbed(c_q, q_rope, entry, cache, w_q, w_out, nope_dim):
    heads, rank = w_q.shape[:2]
    whole = torch.cat([cache[..., : entry.shape[-1]], entry[:, None]], dim=1)
    keys = torch.einsum("bsr,hrq->bhsq", whole[..., :rank], w_q)
    values = torch.einsum("bsr,hdr->bhsd", whole[..., :rank], w_out)
    scores = (keys @ c_q[:, None, :, None])[..., 0] + torch.einsum(
        "bhp,bsp->bhs", q_rope, whole[..., rank:]
    )
    weights = (scores / math.sqrt(nope_dim + q_rope.shape[-1])).softmax(-1)
    y = (weights[:, :, None] @ values)[:, :, 0].sum(1)
    return y, torch.cat(
        [whole, keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)], dim=-1
    )

# %% wrong="decode_absorbed" because="unfolds the latents for every head, in passing"
def decode_absorbed(c_q, q_rope, entry, cache, w_q, w_out, nope_dim):
    heads, rank = w_q.shape[:2]
    cache = torch.cat([cache, entry[:, None]], dim=1)
    latents = cache[:, None, :, :rank].expand(-1, heads, -1, -1).contiguous()
    q = torch.einsum("hrq,bq->bhr", w_q, c_q)
    scores = (latents @ q[..., None])[..., 0] + q_rope @ cache[..., rank:].mT
    weights = (scores / math.sqrt(nope_dim + q_rope.shape[-1])).softmax(-1)
    return torch.einsum("hdr,bhr->bd", w_out, (weights[:, :, None] @ latents)[:, :, 0]), cache

# %% wrong="decode_absorbed" because="a cache of float64, for safety" of="scale-place"
- cache = torch.cat([cache, entry[:, None]], dim=1)
+ cache = torch.cat([cache, entry[:, None]], dim=1).double()

- scores = q @ cache.transpose(1, 2) / math.sqrt(kv_rank + rope_dim)
+ scores = q.double() @ cache.transpose(1, 2) / math.sqrt(nope_dim + rope_dim)

- return torch.einsum("hdr,bhr->bd", w_out, average), cache
+ return torch.einsum("hdr,bhr->bd", w_out, average.to(w_out.dtype)), cache

# %% right="decode_absorbed" because="two scores added, a sum over heads as one product"
def decode_absorbed(c_q, q_rope, entry, cache, w_q, w_out, nope_dim):
    heads, rank, _ = w_q.shape
    grown = cache.new_empty(cache.shape[0], cache.shape[1] + 1, cache.shape[2])
    grown[:, :-1], grown[:, -1] = cache, entry
    c, k_rope = grown.to(c_q.dtype).split([rank, q_rope.shape[-1]], dim=-1)
    q = (c_q @ w_q.flatten(0, 1).T).unflatten(-1, (heads, rank))
    scores = torch.baddbmm(q_rope @ k_rope.mT, q, c.mT) * (nope_dim + q_rope.shape[-1]) ** -0.5
    weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    average = torch.bmm(weights, c)
    return sum(average[:, i] @ w_out[i].T for i in range(heads)), grown

# %% wrong="mla_decode_kernel" because="looks at the first tile only" base="looks-at"
@triton.jit
def mla_decode_kernel(
    q_ptr,
    cache_ptr,
    lengths_ptr,
    parts_ptr,
    lse_ptr,
    cache_batch,
    cache_row,
    heads,
    splits,
    scale,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split, head_block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, cols, rot = (
        head_block * BLOCK_H + tl.arange(0, BLOCK_H),
        tl.arange(0, BLOCK_R),
        tl.arange(0, BLOCK_P),
    )
    real = rows[:, None] < heads
    q_rows = q_ptr + (batch * heads + rows[:, None]) * (RANK + ROPE)
    q_c = tl.load(q_rows + cols[None, :], mask=real & (cols[None, :] < RANK), other=0.0)
    q_r = tl.load(q_rows + RANK + rot[None, :], mask=real & (rot[None, :] < ROPE), other=0.0)

    length = tl.load(lengths_ptr + batch)
    n = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start = split * n
    end = tl.minimum(start + n, length)

    scale_log2 = scale * 1.4426950408889634
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    cache_ptr += batch * cache_batch
    for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        here = keys < end
        entries = cache_ptr + keys[:, None].to(tl.int64) * cache_row
        c = tl.load(entries + cols[None, :], mask=here[:, None] & (cols[None, :] < RANK), other=0.0)
        k_r = tl.load(
            entries + RANK + rot[None, :], mask=here[:, None] & (rot[None, :] < ROPE), other=0.0
        )
        s = tl.dot(q_c, tl.trans(c), input_precision="ieee")
        s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
        s = tl.where(here[None, :], s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    some = l > 0.0
    l = tl.where(some, l, 1.0)
    out = (batch * heads + rows) * splits + split
    tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
    tl.store(
        parts_ptr + out[:, None] * RANK + cols[None, :],
        acc / l[:, None],
        mask=real & (cols[None, :] < RANK),
    )

# %% wrong="mla_decode_kernel" because="no mask at the end of the sequence" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- here = keys < end
+ here = keys >= 0

# %% wrong="mla_decode_kernel" because="keys up to and including index length" of="looks-at"
- end = tl.minimum(start + n, length)
+ end = tl.minimum(start + n, length + 1)

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="the end of a split is not clamped to the length" of="looks-at"
- end = tl.minimum(start + n, length)
+ end = start + n

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="floor division drops the last keys" of="looks-at"
- n = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
+ n = tl.maximum(length // splits // BLOCK_N, 1) * BLOCK_N

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="an empty split has lse 0" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
+ tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), 0.0), mask=rows < heads)

# %% wrong="mla_decode_kernel" because="the natural logarithm of the sum" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
+ tl.store(lse_ptr + out, tl.where(some, m + tl.log(l), float("-inf")), mask=rows < heads)

# %% wrong="mla_decode_kernel" because="lse in base e" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
+ tl.store(
+     lse_ptr + out,
+     tl.where(some, (m + tl.log2(l)) / 1.4426950408889634, float("-inf")),
+     mask=rows < heads,
+ )

# %% wrong="mla_decode_kernel" because="log2 e forgotten" of="looks-at"
- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = scale

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="a scale of its own: the latent width" of="looks-at"
- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = 1.4426950408889634 / tl.sqrt((RANK + ROPE) * 1.0)

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="the rotary part is left out" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")

# %% wrong="mla_decode_kernel" because="the rotary product replaces the other" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
+ s = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")

# %% wrong="mla_decode_kernel" because="values from all 576 numbers: no mask at column RANK" of="looks-at"
- q_c = tl.load(q_rows + cols[None, :], mask=real & (cols[None, :] < RANK), other=0.0)
+ q_c = tl.load(q_rows + cols[None, :], mask=real, other=0.0)

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- c = tl.load(entries + cols[None, :], mask=here[:, None] & (cols[None, :] < RANK), other=0.0)
+ c = tl.load(entries + cols[None, :], mask=here[:, None], other=0.0)

# %% wrong="mla_decode_kernel" because="the store spills over the latent into the next split" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- tl.store(
-     parts_ptr + out[:, None] * RANK + cols[None, :],
-     acc / l[:, None],
-     mask=real & (cols[None, :] < RANK),
- )
+ tl.store(parts_ptr + out[:, None] * RANK + cols[None, :], acc / l[:, None], mask=real)

# %% wrong="mla_decode_kernel" because="no mask for rows beyond the last head" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
+ tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")))

# %% wrong="mla_decode_kernel" because="the block's maximum in place of the running one" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- m_new = tl.maximum(m, tl.max(s, axis=1))
+ m_new = tl.max(s, axis=1)

# %% wrong="mla_decode_kernel" because="the accumulator is not rescaled" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")
+ acc = tl.dot(p.to(c.dtype), c, acc, input_precision="ieee")

# %% wrong="mla_decode_kernel" because="the sum is not rescaled" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- l = l * alpha + tl.sum(p, axis=1)
+ l = l + tl.sum(p, axis=1)

# %% wrong="mla_decode_kernel" because="exp2 without a maximum" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- m_new = tl.maximum(m, tl.max(s, axis=1))
+ m_new = tl.maximum(m, tl.zeros_like(m))

# %% wrong="mla_decode_kernel" because="a padded key has score 0" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- s = tl.where(here[None, :], s * scale_log2, float("-inf"))
+ s = s * scale_log2

# %% wrong="mla_decode_kernel" because="the parts are not divided by their sum" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- parts_ptr + out[:, None] * RANK + cols[None, :],
- acc / l[:, None],
- mask=real & (cols[None, :] < RANK),
+ parts_ptr + out[:, None] * RANK + cols[None, :], acc, mask=real & (cols[None, :] < RANK)

# %% wrong="mla_decode_kernel" because="row stride taken for the row's length" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- entries = cache_ptr + keys[:, None].to(tl.int64) * cache_row
+ entries = cache_ptr + keys[:, None].to(tl.int64) * (RANK + ROPE)

# %% wrong="mla_decode_kernel" because="every sequence reads the first one's cache" of="looks-at"
- cache_ptr += batch * cache_batch
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="every sequence has the first one's length" of="looks-at"
- length = tl.load(lengths_ptr + batch)
+ length = tl.load(lengths_ptr)

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="the second block of heads reads the first" of="looks-at"
- rows, cols, rot = (
-     head_block * BLOCK_H + tl.arange(0, BLOCK_H),
-     tl.arange(0, BLOCK_R),
-     tl.arange(0, BLOCK_P),
- )
+ rows, cols, rot = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% wrong="mla_decode_kernel" because="a float16 accumulator" of="looks-at"
- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")
+ acc = (
+     tl.dot(p.to(tl.float16), c.to(tl.float16), acc * alpha[:, None])
+     .to(tl.float16)
+     .to(tl.float32)
+ )

# %% wrong="mla_decode_kernel" because="splits of any length, not whole tiles" of="looks-at"
- n = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
+ n = tl.cdiv(length, splits)

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

# %% right="mla_decode_kernel" because="pointers to both tiles, two products apart, the sum from ones" of="looks-at"
- l = tl.zeros((BLOCK_H,), tl.float32)
+ l = tl.zeros((BLOCK_H,), tl.float32) + 0.0

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- s = tl.dot(q_c, tl.trans(c), input_precision="ieee")
- s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
+ s = tl.dot(q_c, tl.trans(c), input_precision="ieee") + tl.dot(
+     q_r, tl.trans(k_r), input_precision="ieee"
+ )

- acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")
+ acc = acc * alpha[:, None] + tl.dot(p.to(c.dtype), c, input_precision="ieee")

# %% right="mla_decode_kernel" because="natural exponentials and logarithms, base 2 at the end" of="looks-at"
- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = scale

- for first in range(start, tl.minimum(start + BLOCK_N, end), BLOCK_N):
+ for first in range(start, end, BLOCK_N):

- p = tl.exp2(s - m_new[:, None])
- alpha = tl.exp2(m - m_new)
+ p = tl.exp(s - m_new[:, None])
+ alpha = tl.exp(m - m_new)

- tl.store(lse_ptr + out, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < heads)
+ tl.store(
+     lse_ptr + out,
+     tl.where(some, (m + tl.log(l)) * 1.4426950408889634, float("-inf")),
+     mask=rows < heads,
+ )

# %% wrong="sliding_window_mask" because="window keys besides the token itself" base="window-keys"
def sliding_window_mask(q_len, k_len, window, device=None):
    if window < 1:
        raise ValueError("the window is empty")
    behind = (
        torch.arange(q_len, device=device)[:, None]
        + (k_len - q_len)
        - torch.arange(k_len, device=device)
    )
    return (behind >= 0) & (behind <= window)

# %% wrong="sliding_window_mask" because="the window is not causal" of="window-keys"
- return (behind >= 0) & (behind <= window)
+ return behind.abs() < window

# %% wrong="sliding_window_mask" because="aligned to the first key"
def sliding_window_mask(q_len, k_len, window, device=None):
    if window < 1:
        raise ValueError("the window is empty")
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril().triu(1 - window)

# %% wrong="sliding_window_mask" because="one key short" of="window-keys"
- return (behind >= 0) & (behind <= window)
+ return (behind >= 0) & (behind < max(window - 1, 1))

# %% wrong="sliding_window_mask" because="an empty window is accepted"
def sliding_window_mask(q_len, k_len, window, device=None):
    behind = (
        torch.arange(q_len, device=device)[:, None]
        + (k_len - q_len)
        - torch.arange(k_len, device=device)
    )
    return (behind >= 0) & (behind < window)

# %% right="sliding_window_mask" because="tril and triu"
def sliding_window_mask(q_len, k_len, window, device=None):
    if window < 1:
        raise ValueError("the window is empty")
    return (
        torch.ones(q_len, k_len, dtype=torch.bool, device=device)
        .tril(k_len - q_len)
        .triu(k_len - q_len - window + 1)
    )

# %% wrong="sink_mask" because="sinks in the future too" base="sinks-future"
def sink_mask(q_len, k_len, window, sinks, device=None):
    queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    keys = torch.arange(k_len, device=device)
    return ((keys <= queries) & (keys > queries - window)) | (keys < sinks)

# %% wrong="sink_mask" because="no sinks"
def sink_mask(q_len, k_len, window, sinks, device=None):
    behind = (
        torch.arange(q_len, device=device)[:, None]
        + (k_len - q_len)
        - torch.arange(k_len, device=device)
    )
    return (behind >= 0) & (behind < window)

# %% wrong="sink_mask" because="the sinks count among the window's keys" of="sinks-future"
- return ((keys <= queries) & (keys > queries - window)) | (keys < sinks)
+ return (keys <= queries) & ((keys > queries - max(window - sinks, 1)) | (keys < sinks))

# %% wrong="sink_mask" because="one sink too many" of="sinks-future"
- return ((keys <= queries) & (keys > queries - window)) | (keys < sinks)
+ return (keys <= queries) & ((keys > queries - window) | (keys <= sinks))

# %% right="sink_mask" because="triangles, and columns set to True"
def sink_mask(q_len, k_len, window, sinks, device=None):
    causal = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
    mask = causal.triu(k_len - q_len - window + 1)
    mask[:, :sinks] = causal[:, :sinks]
    return mask

# %% wrong="ring_buffer" because="sinks are overwritten after wrapping" base="sinks-are"
class RingBufferCache:
    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self.window, self.sinks = window, sinks
        self.k = torch.zeros(batch, kv_heads, sinks + window, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.full((sinks + window,), -1, dtype=torch.long, device=device)
        self.seen = 0

    def append(self, k: Tensor, v: Tensor):
        positions = torch.arange(self.seen, self.seen + k.shape[2], device=k.device)
        self.seen += k.shape[2]
        kept = positions >= self.seen - self.window - self.sinks
        positions = positions[kept]
        slots = positions % (self.sinks + self.window)
        self.k[:, :, slots] = k[:, :, kept]
        self.v[:, :, slots] = v[:, :, kept]
        self.positions[slots] = positions

    def read(self):
        filled = min(self.seen, self.k.shape[2])
        return self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]

# %% wrong="ring_buffer" because="the ring wraps one slot early" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks,
+     positions,
+     self.sinks + (positions - self.sinks) % max(self.window - 1, 1),
+ )

# %% wrong="ring_buffer" because="slots are taken for positions" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

- return self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]
+ return (
+     self.k[:, :, :filled],
+     self.v[:, :, :filled],
+     torch.arange(filled, device=self.k.device),
+ )

# %% wrong="ring_buffer" because="positions are counted from the oldest, in slot order" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

- return self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]
+ return (
+     self.k[:, :, :filled],
+     self.v[:, :, :filled],
+     torch.arange(self.seen - filled, self.seen, device=self.k.device),
+ )

# %% wrong="ring_buffer" because="empty slots are handed out" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

- filled = min(self.seen, self.k.shape[2])
+ filled = self.k.shape[2]

# %% wrong="ring_buffer" because="values are not wrapped with the keys" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

- self.v[:, :, slots] = v[:, :, kept]
+ self.v[:, :, slots.sort().values] = v[:, :, kept]

# %% wrong="ring_buffer" because="counts calls, not tokens" of="sinks-are"
- self.seen += k.shape[2]
- kept = positions >= self.seen - self.window - self.sinks
+ self.seen += 1
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

# %% wrong="ring_buffer" because="of a long prompt the first tokens stay" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions < positions[0] + self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

# %% wrong="ring_buffer" because="a full cache that reads its end" base="full-cache"
class RingBufferCache:
    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self.window, self.sinks = window, sinks
        self.k = torch.zeros(batch, kv_heads, sinks + window, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.full((sinks + window,), -1, dtype=torch.long, device=device)
        self.seen = 0

    def append(self, k, v):
        old = self.seen
        self.seen += k.shape[2]
        self.k = k.clone() if old == 0 else torch.cat([self.k, k], 2)
        self.v = v.clone() if old == 0 else torch.cat([self.v, v], 2)

    def read(self):
        at = torch.arange(self.seen, device=self.k.device)
        at = at[(at < self.sinks) | (at >= self.seen - self.window)]
        return self.k[:, :, at], self.v[:, :, at], at

# %% wrong="ring_buffer" because="every append makes a new buffer"
class RingBufferCache:
    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self.window, self.sinks = window, sinks
        self.k = torch.zeros(batch, kv_heads, sinks + window, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.full((sinks + window,), -1, dtype=torch.long, device=device)
        self.seen = 0

    def append(self, k, v):
        filled = min(self.seen, self.sinks + self.window)
        at = torch.cat(
            [
                self.positions[:filled],
                torch.arange(self.seen, self.seen + k.shape[2], device=k.device),
            ]
        )
        self.seen += k.shape[2]
        keep = (at < self.sinks) | (at >= self.seen - self.window)
        self.k = torch.cat([self.k[:, :, :filled], k], 2)[:, :, keep]
        self.v = torch.cat([self.v[:, :, :filled], v], 2)[:, :, keep]
        self.positions = at[keep]

    def read(self):
        return self.k, self.v, self.positions

# %% wrong="ring_buffer" because="a pair of lists that keeps the arguments" of="full-cache"
- old = self.seen
- self.seen += k.shape[2]
- self.k = k.clone() if old == 0 else torch.cat([self.k, k], 2)
- self.v = v.clone() if old == 0 else torch.cat([self.v, v], 2)
+ self.kept = getattr(self, "kept", [])
+ for i in range(k.shape[2]):
+     self.kept.append((self.seen, k[:, :, i], v[:, :, i]))
+     self.seen += 1
+ self.kept = [e for e in self.kept if e[0] < self.sinks or e[0] >= self.seen - self.window]

- at = torch.arange(self.seen, device=self.k.device)
- at = at[(at < self.sinks) | (at >= self.seen - self.window)]
- return self.k[:, :, at], self.v[:, :, at], at
+ return (
+     torch.stack([e[1] for e in self.kept], 2),
+     torch.stack([e[2] for e in self.kept], 2),
+     torch.tensor([e[0] for e in self.kept], device=self.k.device),
+ )

# %% right="ring_buffer" because="token by token" of="full-cache"
- old = self.seen
- self.seen += k.shape[2]
- self.k = k.clone() if old == 0 else torch.cat([self.k, k], 2)
- self.v = v.clone() if old == 0 else torch.cat([self.v, v], 2)
+ for i in range(k.shape[2]):
+     p = self.seen
+     slot = p if p < self.sinks else self.sinks + (p - self.sinks) % self.window
+     self.k[:, :, slot].copy_(k[:, :, i])
+     self.v[:, :, slot].copy_(v[:, :, i])
+     self.positions[slot] = p
+     self.seen += 1

- at = torch.arange(self.seen, device=self.k.device)
- at = at[(at < self.sinks) | (at >= self.seen - self.window)]
- return self.k[:, :, at], self.v[:, :, at], at
+ order = self.positions.argsort()
+ order = order[self.positions[order] >= 0]
+ return self.k[:, :, order], self.v[:, :, order], self.positions[order]

# %% right="ring_buffer" because="the ring is turned, so that the latest token has its slot last" of="sinks-are"
- kept = positions >= self.seen - self.window - self.sinks
+ kept = (positions < self.sinks) | (positions >= self.seen - self.window)

- slots = positions % (self.sinks + self.window)
+ slots = torch.where(
+     positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window
+ )

- return self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]
+ return (
+     self.k[:, :, :filled].flip(2),
+     self.v[:, :, :filled].flip(2),
+     self.positions[:filled].flip(0),
+ )

# %% wrong="longformer_mask" because="global tokens are seen by all, and see only their window" base="global-tokens"
def longformer_mask(
    length: int,
    window: int,
    global_tokens: list[int] | tuple[int, ...] = (),
    device: torch.device | None = None,
):
    if window % 2 or window < 0:
        raise ValueError(f"the window of {window} cannot be shared out evenly to both sides")
    index = torch.arange(length, device=device)
    mask = (index[:, None] - index).abs() <= window // 2
    special = torch.zeros(length, dtype=torch.bool, device=device)
    special[list(global_tokens)] = True
    return mask | special

# %% wrong="longformer_mask" because="global tokens see all, and are seen only in their window" of="global-tokens"
- return mask | special
+ return mask | special[:, None]

# %% wrong="longformer_mask" because="the window to each side" of="global-tokens"
- mask = (index[:, None] - index).abs() <= window // 2
+ mask = (index[:, None] - index).abs() <= window

- return mask | special
+ return mask | special[:, None] | special

# %% wrong="longformer_mask" because="a causal window" of="global-tokens"
- return mask | special
+ return (mask | special[:, None] | special).tril()

# %% wrong="longformer_mask" because="the token itself counts among the window's neighbors" of="global-tokens"
- mask = (index[:, None] - index).abs() <= window // 2
+ mask = (index[:, None] - index).abs() < max(window // 2, 1)

- return mask | special
+ return mask | special[:, None] | special

# %% wrong="longformer_mask" because="an odd window is rounded down" of="global-tokens"
- if window % 2 or window < 0:
+ if window < 0:

- return mask | special
+ return mask | special[:, None] | special

# %% right="longformer_mask" because="rows and columns set to True"
def longformer_mask(length, window, global_tokens=(), device=None):
    if window < 0 or window & 1:
        raise ValueError("the window has two equal sides")
    mask = (
        torch.ones(length, length, dtype=torch.bool, device=device)
        .triu(-(window // 2))
        .tril(window // 2)
    )
    for t in global_tokens:
        mask[t, :] = mask[:, t] = True
    return mask

# %% wrong="bigbird_mask" because="the seed is ignored: the global generator" base="seed-ignored"
def bigbird_mask(
    length: int,
    block: int,
    window: int,
    random_blocks: int,
    global_blocks: int,
    seed: int,
    device: torch.device | None = None,
):
    if length % block:
        raise ValueError(f"{length} tokens are no whole number of blocks of {block}")
    n = length // block
    generator = None
    index = torch.arange(n)
    seen = (
        ((index[:, None] - index).abs() <= window // 2)
        | (index < global_blocks)
        | (index < global_blocks)[:, None]
    )
    ticket = torch.rand(n, n, generator=generator).masked_fill(seen, 2.0)
    drawn = ticket.argsort(1).argsort(1) < random_blocks
    blocks = seen | drawn
    return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1).to(device)

# %% wrong="bigbird_mask" because="the seed is ignored: always 0" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(0)

# %% wrong="bigbird_mask" because="seeds the global generator" of="seed-ignored"
  n = length // block
+ torch.manual_seed(seed)

# %% wrong="bigbird_mask" because="every row draws the same blocks" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- ticket = torch.rand(n, n, generator=generator).masked_fill(seen, 2.0)
+ ticket = torch.rand(n, generator=generator).expand(n, n).masked_fill(seen, 2.0)

# %% wrong="bigbird_mask" because="draws among all blocks, also those it sees" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- ticket = torch.rand(n, n, generator=generator).masked_fill(seen, 2.0)
+ ticket = torch.rand(n, n, generator=generator)

# %% wrong="bigbird_mask" because="draws with repetition" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- drawn = ticket.argsort(1).argsort(1) < random_blocks
+ drawn = torch.zeros(n, n, dtype=torch.bool)
+ for i in range(n):
+     free = (~seen[i]).nonzero()[:, 0]
+     if len(free):
+         drawn[i, free[torch.randint(len(free), (random_blocks,), generator=generator)]] = True

# %% wrong="bigbird_mask" because="random tokens, not blocks" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- blocks = seen | drawn
- return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1).to(device)
+ wide = seen.repeat_interleave(block, 0).repeat_interleave(block, 1)
+ drawn = (
+     torch.rand(length, length, generator=generator).masked_fill(wide, 2.0).argsort(1).argsort(1)
+     < random_blocks
+ )
+ return (wide | drawn).to(device)

# %% wrong="bigbird_mask" because="global blocks in one direction only" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- seen = (
-     ((index[:, None] - index).abs() <= window // 2)
-     | (index < global_blocks)
-     | (index < global_blocks)[:, None]
- )
+ seen = ((index[:, None] - index).abs() <= window // 2) | (index < global_blocks)

# %% wrong="bigbird_mask" because="the random part made symmetric" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- blocks = seen | drawn
+ blocks = seen | drawn | drawn.T

# %% wrong="bigbird_mask" because="a window of so many blocks to each side" of="seed-ignored"
- generator = None
+ generator = torch.Generator().manual_seed(seed)

- ((index[:, None] - index).abs() <= window // 2)
+ ((index[:, None] - index).abs() <= window)

# %% right="bigbird_mask" because="a loop and randperm"
def bigbird_mask(length, block, window, random_blocks, global_blocks, seed, device=None):
    if length % block:
        raise ValueError("no whole number of blocks")
    n = length // block
    g = torch.Generator()
    g.manual_seed(seed)
    mask = torch.zeros(length, length, dtype=torch.bool, device=device)
    for i in range(n):
        seen = {
            j
            for j in range(n)
            if abs(i - j) <= window // 2 or j < global_blocks or i < global_blocks
        }
        free = [j for j in range(n) if j not in seen]
        order = torch.randperm(len(free), generator=g).tolist()
        for j in [*seen, *(free[o] for o in order[:random_blocks])]:
            mask[i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    return mask

# %% right="bigbird_mask" because="the standard library's random numbers"
import random


def bigbird_mask(length, block, window, random_blocks, global_blocks, seed, device=None):
    if length % block:
        raise ValueError("no whole number of blocks")
    n, rng = length // block, random.Random(seed)
    rows = torch.zeros(n, n)
    for i in range(n):
        near = {j for j in range(n) if abs(i - j) <= window // 2} | set(
            range(global_blocks if i >= global_blocks else n)
        )
        near = {j for j in near if j < n}
        free = sorted(set(range(n)) - near)
        for j in near | set(rng.sample(free, min(random_blocks, len(free)))):
            rows[i, j] = 1
    return torch.kron(rows, torch.ones(block, block)).bool().to(device)

# %% wrong="lightning_indexer_scores" because="no ReLU"
def lightning_indexer_scores(q, k, w):
    return torch.einsum("btj,btjs->bts", w, torch.einsum("btjd,bsd->btjs", q, k))

# %% wrong="lightning_indexer_scores" because="no weights for the heads"
def lightning_indexer_scores(q, k, w):
    return torch.einsum("btjd,bsd->btjs", q, k).relu().sum(2)

# %% wrong="lightning_indexer_scores" because="ReLU after the sum over heads"
def lightning_indexer_scores(q, k, w):
    return torch.einsum("btj,btjs->bts", w, torch.einsum("btjd,bsd->btjs", q, k)).relu()

# %% wrong="lightning_indexer_scores" because="softmax in place of ReLU"
def lightning_indexer_scores(q, k, w):
    return torch.einsum("btj,btjs->bts", w, torch.einsum("btjd,bsd->btjs", q, k).softmax(-1))

# %% wrong="lightning_indexer_scores" because="weights made positive"
def lightning_indexer_scores(q, k, w):
    return torch.einsum("btj,btjs->bts", w.abs(), torch.einsum("btjd,bsd->btjs", q, k).relu())

# %% wrong="lightning_indexer_scores" because="divided by the root of the width"
def lightning_indexer_scores(q, k, w):
    return (
        torch.einsum("btj,btjs->bts", w, torch.einsum("btjd,bsd->btjs", q, k).relu())
        / q.shape[-1] ** 0.5
    )

# %% right="lightning_indexer_scores" because="a loop over the heads"
def lightning_indexer_scores(q, k, w):
    scores = q.new_zeros(q.shape[0], q.shape[1], k.shape[1])
    for j in range(q.shape[2]):
        scores = scores + w[:, :, j, None] * F.relu(q[:, :, j] @ k.mT)
    return scores

# %% right="lightning_indexer_scores" because="heads as rows of one product"
def lightning_indexer_scores(q, k, w):
    dots = torch.bmm(q.flatten(1, 2), k.mT).clamp(min=0).unflatten(1, (q.shape[1], q.shape[2]))
    return (w[:, :, None] @ dots)[:, :, 0]

# %% wrong="topk_sparse_attention" because="top-k picks future keys" base="top-k"
def topk_sparse_attention(q: Tensor, k: Tensor, v: Tensor, index_scores: Tensor, topk: int):
    q_len, k_len = index_scores.shape[1:]
    device = q.device
    future = torch.arange(k_len, device=device) > torch.arange(q_len, device=device)[:, None] + (
        k_len - q_len
    )
    best, chosen = index_scores.topk(min(topk, k_len), dim=-1)
    real = ~future.expand(len(q), -1, -1).gather(2, chosen)

    batch = torch.arange(q.shape[0], device=device)[:, None, None]
    k_sel, v_sel = k[batch, chosen], v[batch, chosen]
    scores = torch.einsum("bhtd,btnd->bhtn", q / math.sqrt(q.shape[-1]), k_sel)
    weights = scores.masked_fill(~real[:, None], -1e9).softmax(-1)
    return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen.masked_fill(~real, -1)

# %% wrong="topk_sparse_attention" because="not causal at all" of="top-k"
- real = ~future.expand(len(q), -1, -1).gather(2, chosen)
+ real = best > -math.inf

- weights = scores.masked_fill(~real[:, None], -1e9).softmax(-1)
+ weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)

# %% wrong="topk_sparse_attention" because="causal from the first key"
def topk_sparse_attention(q: Tensor, k: Tensor, v: Tensor, index_scores: Tensor, topk: int):
    q_len, k_len = index_scores.shape[1:]
    device = q.device
    future = torch.arange(k_len, device=device) > torch.arange(q_len, device=device)[:, None]
    best, chosen = index_scores.masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
    real = best > -math.inf

    batch = torch.arange(q.shape[0], device=device)[:, None, None]
    k_sel, v_sel = k[batch, chosen], v[batch, chosen]
    scores = torch.einsum("bhtd,btnd->bhtn", q / math.sqrt(q.shape[-1]), k_sel)
    weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen.masked_fill(~real, -1)

# %% wrong="topk_sparse_attention" because="softmax over all visible keys, cut afterwards"
def topk_sparse_attention(q, k, v, index_scores, topk):
    q_len, k_len = index_scores.shape[1:]
    future = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).triu(k_len - q_len + 1)
    best, chosen = index_scores.masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
    weights = (
        (q @ k[:, None].mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf).softmax(-1)
    )
    kept = torch.zeros_like(index_scores, dtype=torch.bool).scatter(2, chosen, best > -math.inf)
    return (weights * kept[:, None]) @ v[:, None], chosen.masked_fill(best == -math.inf, -1)

# %% wrong="topk_sparse_attention" because="all scores, then a mask"
def topk_sparse_attention(q, k, v, index_scores, topk):
    q_len, k_len = index_scores.shape[1:]
    future = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).triu(k_len - q_len + 1)
    best, chosen = index_scores.masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
    kept = torch.zeros_like(index_scores, dtype=torch.bool).scatter(2, chosen, best > -math.inf)
    scores = (q @ k[:, None].mT / math.sqrt(q.shape[-1])).masked_fill(~kept[:, None], -math.inf)
    return scores.softmax(-1) @ v[:, None], chosen.masked_fill(best == -math.inf, -1)

# %% wrong="topk_sparse_attention" because="the index scores are the weights" base="index-scores"
def topk_sparse_attention(q: Tensor, k: Tensor, v: Tensor, index_scores: Tensor, topk: int):
    q_len, k_len = index_scores.shape[1:]
    device = q.device
    future = torch.arange(k_len, device=device) > torch.arange(q_len, device=device)[:, None] + (
        k_len - q_len
    )
    best, chosen = index_scores.masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
    real = best > -math.inf

    batch = torch.arange(q.shape[0], device=device)[:, None, None]
    k_sel, v_sel = k[batch, chosen], v[batch, chosen]
    scores = best.masked_fill(~real, -1e9)[:, None].expand(-1, q.shape[1], -1, -1)
    weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen.masked_fill(~real, -1)

# %% wrong="topk_sparse_attention" because="selects by the true scores of head 0" of="top-k"
- best, chosen = index_scores.topk(min(topk, k_len), dim=-1)
- real = ~future.expand(len(q), -1, -1).gather(2, chosen)
+ best, chosen = (q[:, 0] @ k.mT).masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
+ real = best > -math.inf

- weights = scores.masked_fill(~real[:, None], -1e9).softmax(-1)
+ weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)

# %% wrong="topk_sparse_attention" because="one selection for all queries: the last one's"
def topk_sparse_attention(q: Tensor, k: Tensor, v: Tensor, index_scores: Tensor, topk: int):
    q_len, k_len = index_scores.shape[1:]
    device = q.device
    future = torch.arange(k_len, device=device) > torch.arange(q_len, device=device)[:, None] + (
        k_len - q_len
    )
    best, chosen = (
        index_scores[:, -1:]
        .expand(-1, q_len, -1)
        .masked_fill(future, -math.inf)
        .topk(min(topk, k_len), dim=-1)
    )
    real = best > -math.inf

    batch = torch.arange(q.shape[0], device=device)[:, None, None]
    k_sel, v_sel = k[batch, chosen], v[batch, chosen]
    scores = torch.einsum("bhtd,btnd->bhtn", q / math.sqrt(q.shape[-1]), k_sel)
    weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen.masked_fill(~real, -1)

# %% wrong="topk_sparse_attention" because="no scale" of="index-scores"
- scores = best.masked_fill(~real, -1e9)[:, None].expand(-1, q.shape[1], -1, -1)
+ scores = torch.einsum("bhtd,btnd->bhtn", q, k_sel)

# %% wrong="topk_sparse_attention" because="the lowest scores" of="top-k"
- best, chosen = index_scores.topk(min(topk, k_len), dim=-1)
- real = ~future.expand(len(q), -1, -1).gather(2, chosen)
+ best, chosen = (-index_scores).masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
+ real = best > -math.inf

- weights = scores.masked_fill(~real[:, None], -1e9).softmax(-1)
+ weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)

# %% wrong="topk_sparse_attention" because="empty places keep a position" of="index-scores"
- scores = best.masked_fill(~real, -1e9)[:, None].expand(-1, q.shape[1], -1, -1)
+ scores = torch.einsum("bhtd,btnd->bhtn", q / math.sqrt(q.shape[-1]), k_sel)

- return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen.masked_fill(~real, -1)
+ return torch.einsum("bhtn,btnd->bhtd", weights, v_sel), chosen

# %% right="topk_sparse_attention" because="argsort and gather"
def topk_sparse_attention(q, k, v, index_scores, topk):
    batch, heads, q_len, dim = q.shape
    k_len = k.shape[1]
    n = min(topk, k_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    order = torch.where(seen, index_scores, -torch.inf).argsort(dim=-1, descending=True)[..., :n]
    real = torch.arange(n, device=q.device) < seen.sum(-1, keepdim=True)

    def rows(t):
        return t.gather(1, order.reshape(batch, -1, 1).expand(-1, -1, t.shape[-1])).view(
            batch, q_len, n, -1
        )

    scores = q.transpose(1, 2) @ rows(k).mT / dim**0.5
    weights = (
        torch.where(real[:, None], scores, torch.finfo(q.dtype).min).softmax(-1) * real[:, None]
    )
    return (weights @ rows(v)).transpose(1, 2), torch.where(real, order, -1)

# %% right="topk_sparse_attention" because="a loop over queries"
def topk_sparse_attention(q, k, v, index_scores, topk):
    q_len, k_len = index_scores.shape[1:]
    n = min(topk, k_len)
    outs, picks = [], []
    for i in range(q_len):
        visible = i + k_len - q_len + 1
        pick = index_scores[:, i, :visible].topk(min(n, visible), -1).indices
        ks, vs = (torch.stack([t[b, p] for b, p in enumerate(pick)]) for t in (k, v))
        outs.append((q[:, :, i] @ ks.mT / math.sqrt(q.shape[-1])).softmax(-1) @ vs)
        picks.append(F.pad(pick, (0, n - pick.shape[1]), value=-1))
    return torch.stack(outs, 2), torch.stack(picks, 1)

# %% wrong="per_head_pattern_attention" because="computes everything, masks, and counts"
def per_head_pattern_attention(q, k, v, mask, block):
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    out = scores.softmax(-1).nan_to_num(0.0) @ v
    pads = F.pad(mask, (0, -k.shape[2] % block, 0, -q.shape[2] % block))
    tiles = pads.unflatten(1, (-1, block)).unflatten(3, (-1, block)).any(4).any(2)
    return out, int(tiles.sum())

# %% wrong="per_head_pattern_attention" because="skips only key blocks that no head sees"
def per_head_pattern_attention(q, k, v, mask, block):
    heads, q_len, k_len = mask.shape
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    computed = 0
    for i in range(0, q_len, block):
        columns = [j for j in range(0, k_len, block) if mask[:, i : i + block, j : j + block].any()]
        if not columns:
            continue
        computed += sum(
            int(mask[h, i : i + block, j : j + block].any()) for h in range(heads) for j in columns
        )
        at = torch.cat([torch.arange(j, min(j + block, k_len), device=q.device) for j in columns])
        scores = (q[:, :, i : i + block] @ k[:, :, at].mT / math.sqrt(q.shape[-1])).masked_fill(
            ~mask[:, i : i + block][:, :, at], -math.inf
        )
        top = scores.detach().amax(-1, keepdim=True)
        p = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
        total = p.sum(-1, keepdim=True)
        out[:, :, i : i + block] = p / total.masked_fill(total == 0, 1.0) @ v[:, :, at]
    return out, computed

# %% wrong="per_head_pattern_attention" because="whole blocks are shown" base="whole-blocks"
def per_head_pattern_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int):
    batch, heads, q_len, head_dim = q.shape
    k_len, v_dim = v.shape[2:]
    q_pad, k_pad = -q_len % block, -k_len % block

    def blocks(t: Tensor, pad: int):
        return F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, block))

    q_blocks, k_blocks, v_blocks = (
        blocks(q / math.sqrt(head_dim), q_pad),
        blocks(k, k_pad),
        blocks(v, k_pad),
    )
    tiles = (
        F.pad(mask, (0, k_pad, 0, q_pad))
        .unflatten(1, (-1, block))
        .unflatten(3, (-1, block))
        .transpose(2, 3)
    )
    head, row, column = tiles.flatten(3).any(-1).nonzero(as_tuple=True)
    rows = tiles.shape[1]
    owner = head * rows + row

    scores = q_blocks[:, head, row] @ k_blocks[:, head, column].mT
    scores = scores.masked_fill(
        ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
    )
    highest = scores.detach().amax(-1)
    top = scores.new_full((batch, heads * rows, block), -math.inf).scatter_reduce(
        1, owner[:, None].expand_as(highest), highest, "amax"
    )
    top = top.masked_fill(top == -math.inf, 0.0)
    p = torch.exp(scores - top[:, owner, :, None])
    total = p.new_zeros(batch, heads * rows, block).index_add(1, owner, p.sum(-1))
    out = p.new_zeros(batch, heads * rows, block, v_dim).index_add(
        1, owner, p @ v_blocks[:, head, column]
    )
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return out.view(batch, heads, rows * block, v_dim)[:, :, :q_len], len(owner)

# %% wrong="per_head_pattern_attention" because="head 0's pattern for all" of="whole-blocks"
- F.pad(mask, (0, k_pad, 0, q_pad))
+ F.pad(mask[:1].expand_as(mask), (0, k_pad, 0, q_pad))

- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

# %% wrong="per_head_pattern_attention" because="a softmax within each block" of="whole-blocks"
- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

  total = p.new_zeros(batch, heads * rows, block).index_add(1, owner, p.sum(-1))
+ weights = p / p.sum(-1, keepdim=True).clamp(min=1e-300)

- 1, owner, p @ v_blocks[:, head, column]
+ 1, owner, weights @ v_blocks[:, head, column]

- out = out / total.masked_fill(total == 0, 1.0)[..., None]
+ out = out / out.new_ones(1)

# %% wrong="per_head_pattern_attention" because="exponentials without a maximum" of="whole-blocks"
- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

- p = torch.exp(scores - top[:, owner, :, None])
+ p = torch.exp(scores)

# %% wrong="per_head_pattern_attention" because="queries that see nothing give NaN" of="whole-blocks"
- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

- out = out / total.masked_fill(total == 0, 1.0)[..., None]
+ out = out / total[..., None]

# %% wrong="per_head_pattern_attention" because="no scale" of="whole-blocks"
- q_blocks, k_blocks, v_blocks = (
-     blocks(q / math.sqrt(head_dim), q_pad),
-     blocks(k, k_pad),
-     blocks(v, k_pad),
- )
+ q_blocks, k_blocks, v_blocks = blocks(q, q_pad), blocks(k, k_pad), blocks(v, k_pad)

- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

# %% wrong="per_head_pattern_attention" because="one block too few counted" of="whole-blocks"
- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

- return out.view(batch, heads, rows * block, v_dim)[:, :, :q_len], len(owner)
+ return out.view(batch, heads, rows * block, v_dim)[:, :, :q_len], len(owner) - 1

# %% wrong="per_head_pattern_attention" because="all blocks counted" of="whole-blocks"
- scores = scores.masked_fill(
-     ~tiles[head, row, column].flatten(1).any(1)[:, None, None], -math.inf
- )
+ scores = scores.masked_fill(~tiles[head, row, column], -math.inf)

- return out.view(batch, heads, rows * block, v_dim)[:, :, :q_len], len(owner)
+ return out.view(batch, heads, rows * block, v_dim)[:, :, :q_len], tiles.shape[0] * tiles.shape[
+     1
+ ] * tiles.shape[2]

# %% right="per_head_pattern_attention" because="three loops, one softmax for each row of blocks"
def per_head_pattern_attention(q, k, v, mask, block):
    heads, q_len, k_len = mask.shape
    rows, computed = [], 0
    for h in range(heads):
        pieces = []
        for i in range(0, q_len, block):
            columns = [
                slice(j, j + block)
                for j in range(0, k_len, block)
                if mask[h, i : i + block, j : j + block].any()
            ]
            computed += len(columns)
            queries = q[:, h, i : i + block] / math.sqrt(q.shape[-1])
            if not columns:
                pieces.append(queries.new_zeros(*queries.shape[:2], v.shape[-1]))
                continue
            scores = [
                (queries @ k[:, h, c].mT).masked_fill(~mask[h, i : i + block, c], -math.inf)
                for c in columns
            ]
            blind = ~mask[h, i : i + block].any(-1)[:, None]
            weights = (
                torch.cat(scores, -1).masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
            )
            parts = weights.split([s.shape[-1] for s in scores], dim=-1)
            pieces.append(sum(w @ v[:, h, c] for w, c in zip(parts, columns, strict=True)))
        rows.append(torch.cat(pieces, 1))
    return torch.stack(rows, 1), computed

# %% right="per_head_pattern_attention" because="online softmax over the blocks of a row"
def per_head_pattern_attention(q, k, v, mask, block):
    heads, q_len, k_len = mask.shape
    count, out = 0, []
    for h in range(heads):
        for i in range(0, q_len, block):
            query = q[:, h, i : i + block] / math.sqrt(q.shape[-1])
            m = torch.full(query.shape[:2], -math.inf, dtype=q.dtype, device=q.device)
            l, acc = torch.zeros_like(m), query.new_zeros(*query.shape[:2], v.shape[-1])
            for j in range(0, k_len, block):
                part = mask[h, i : i + block, j : j + block]
                if not part.any():
                    continue
                count += 1
                s = (query @ k[:, h, j : j + block].mT).masked_fill(~part, -math.inf)
                m_new = torch.maximum(m, s.detach().amax(-1))
                base = m_new.masked_fill(m_new == -math.inf, 0.0)
                p, alpha = torch.exp(s - base[..., None]), torch.exp(m - base)
                l, acc, m = (
                    l * alpha + p.sum(-1),
                    acc * alpha[..., None] + p @ v[:, h, j : j + block],
                    m_new,
                )
            out.append(acc / torch.where(l == 0, 1.0, l)[..., None])
    rows = -(-q_len // block)
    return torch.stack(
        [torch.cat(out[h * rows : (h + 1) * rows], 1) for h in range(heads)], 1
    ), count

# %% wrong="sparse_numbers" because="the latent divided among the GPUs"
- "mla_gib": (512 + 64) * gib_of,  # the latent belongs to all heads
+ "mla_gib": (512 + 64) / 8 * gib_of,

# %% wrong="sparse_numbers" because="nothing divided"
- "gqa_gib": 2 * 8 * 128 / 8 * gib_of,  # one key-value head to each GPU
+ "gqa_gib": 2 * 8 * 128 * gib_of,

# %% wrong="sparse_numbers" because="decimal gigabytes"
- gib_of = 32 * 131_072 * 2 / 2**30  # GiB for one number per token and layer
+ gib_of = 32 * 131_072 * 2 / 1e9

# %% wrong="sparse_numbers" because="keys unfolded, values forgotten"
- unfold = 2 * 512 * (128 + 128)  # k and v of a token and head, once
+ unfold = 2 * 512 * 128

# %% wrong="sparse_numbers" because="break even: one less"
- "break_even": unfold // (absorbed - plain) + 1,
+ "break_even": unfold // (absorbed - plain),

# %% wrong="sparse_numbers" because="break even for scores alone"
- "break_even": unfold // (absorbed - plain) + 1,
+ "break_even": 342,

# %% wrong="sparse_numbers" because="break even as a fraction"
- "break_even": unfold // (absorbed - plain) + 1,
+ "break_even": unfold / (absorbed - plain),

# %% wrong="sparse_numbers" because="a hop of the whole window"
- "reach": 32 * (4096 - 1),
+ "reach": 32 * 4096,

# %% wrong="sparse_numbers" because="the reach of one layer"
- "reach": 32 * (4096 - 1),
+ "reach": 4095,

# %% wrong="sparse_numbers" because="the reach doubles with every layer"
- "reach": 32 * (4096 - 1),
+ "reach": 4096 * 2**31,

# %% wrong="sparse_numbers" because="the indexer forgotten"
- "dsa_factor": attention * 131_072 / (indexer * 131_072 + attention * 2048),
+ "dsa_factor": 131_072 / 2048,

# %% wrong="sparse_numbers" because="the average forgotten"
- plain, absorbed = 2 * (192 + 128), 2 * (576 + 512)  # for each query token: score and average
- attention, indexer = 128 * absorbed, 2 * 64 * 128  # for one entry of the cache
+ plain, absorbed = 2 * (192 + 128), 2 * (576 + 512)
+ attention, indexer = 128 * 2 * 576, 2 * 64 * 128

# %% wrong="sparse_numbers" because="the factor upside down"
- "dsa_factor": attention * 131_072 / (indexer * 131_072 + attention * 2048),
+ "dsa_factor": (indexer * 131_072 + attention * 2048) / (attention * 131_072),

# %% right="sparse_numbers" because="by search and by hand"
def sparse_numbers():
    t = 1
    while 512 * 256 + t * (192 + 128) >= t * (576 + 512):
        t += 1
    left = 64 * 128 / (128 * 1088) + 2048 / 131_072
    tokens = 32 * 131_072
    return {
        "gqa_gib": tokens * 256 * 2 / 1024**3,
        "mla_gib": tokens * 576 * 2 / 1024**3,
        "break_even": t,
        "reach": 131_040,
        "dsa_factor": 1 / left,
    }

# %% wrong="mla_cache_bytes" because="32 heads, whatever the width and head_dim are"
- "MHA": gib(2 * heads * head_dim),
+ "MHA": gib(2 * 32 * head_dim),

# %% wrong="mla_cache_bytes" because="MHA keeps the width, though its heads need not fill it"
- "MHA": gib(2 * heads * head_dim),
+ "MHA": gib(2 * hidden),

# %% wrong="decode_absorbed" because="softmax without a maximum: NaN in float32 where a score passes 88"
- average = scores.softmax(-1) @ entries[..., :kv_rank]  # (batch, heads, kv_rank)
+ p = scores.exp()
+ average = (p / p.sum(-1, keepdim=True)) @ entries[..., :kv_rank]

# %% wrong="decode_absorbed" because="clamped exponentials: 0 / 0 far below zero"
- average = scores.softmax(-1) @ entries[..., :kv_rank]  # (batch, heads, kv_rank)
+ p = (scores - scores.amax(-1, keepdim=True).clamp(min=0)).exp()
+ average = (p / p.sum(-1, keepdim=True)) @ entries[..., :kv_rank]

# %% wrong="decode_absorbed" because="the cache takes the entry's dtype"
- cache = torch.cat([cache, entry[:, None].to(cache.dtype)], dim=1)
+ cache = torch.cat([cache.to(entry.dtype), entry[:, None]], dim=1)

# %% wrong="decode_absorbed" because="everything in the cache's dtype"
- entries = cache.to(c_q.dtype)
+ entries, c_q, q_rope = cache, c_q.to(cache.dtype), q_rope.to(cache.dtype)
+ w_q, w_out = w_q.to(cache.dtype), w_out.to(cache.dtype)

# %% wrong="topk_sparse_attention" because="softmax without a maximum: NaN in float32 where a score passes 88"
- weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)
+ weights = scores.exp() * real[:, None]
+ weights = weights / weights.sum(-1, keepdim=True)

# %% wrong="topk_sparse_attention" because="an empty place has the score −10,000"
- weights = scores.masked_fill(~real[:, None], -math.inf).softmax(-1)
+ weights = scores.masked_fill(~real[:, None], -1e4).softmax(-1)

# %% wrong="topk_sparse_attention" because="future keys rank at −10⁹"
- best, chosen = index_scores.masked_fill(future, -math.inf).topk(min(topk, k_len), dim=-1)
- real = best > -math.inf  # (batch, q_len, topk)
+ best, chosen = index_scores.masked_fill(future, -1e9).topk(min(topk, k_len), dim=-1)
+ real = best > -1e9

# %% wrong="per_head_pattern_attention" because="invisible scores are −10,000"
- scores = scores.masked_fill(~tiles[head, row, column], -math.inf)
+ scores = scores.masked_fill(~tiles[head, row, column], -1e4)

# %% wrong="per_head_pattern_attention" because="the maximum never falls under 0"
- top = top.masked_fill(top == -math.inf, 0.0)
+ top = top.clamp(min=0.0)

# %% wrong="absorb" because="always in float32"
- return w_q, w_o @ w_uv
+ return w_q.float(), (w_o @ w_uv).float()

# %% wrong="absorb" because="float64 through float32"
- w_q = w_uk.transpose(1, 2) @ w_uq
+ w_q = (w_uk.transpose(1, 2).float() @ w_uq.float()).to(w_uq.dtype)

# %% wrong="sliding_window_mask" because="only a window of 0 is refused"
- if window < 1:
+ if window == 0:

# %% wrong="sliding_window_mask" because="the device is ignored"
- queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
- behind = queries - torch.arange(k_len, device=device)
+ queries = torch.arange(q_len)[:, None] + (k_len - q_len)
+ behind = queries - torch.arange(k_len)

# %% wrong="longformer_mask" because="the device is ignored"
- index = torch.arange(length, device=device)
+ index, device = torch.arange(length), None

# %% wrong="longformer_mask" because="a tuple of two tokens is taken for one element"
- special = torch.zeros(length, dtype=torch.bool, device=device)
- special[list(global_tokens)] = True
- return mask | special[:, None] | special
+ if global_tokens:
+     mask[global_tokens] = True
+     mask[:, global_tokens] = True
+ return mask

# %% wrong="bigbird_mask" because="the device is ignored"
- return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1).to(device)
+ return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)

# %% wrong="mla_decode_kernel" because="32-bit offsets: rows of a large cache wrap around"
- entries = cache_ptr + keys[:, None].to(tl.int64) * cache_row
+ entries = cache_ptr + keys[:, None] * cache_row.to(tl.int32)

# %% wrong="mla_decode_kernel" because="loads of keys behind the end are unmasked, and set to 0 afterwards"
- c = tl.load(entries + cols[None, :], mask=here[:, None] & (cols[None, :] < RANK), other=0.0)
+ c = tl.load(entries + cols[None, :])
+ c = tl.where(here[:, None] & (cols[None, :] < RANK), c, 0.0)

# %% wrong="mla_decode_kernel" because="a loop over a list, which only the interpreter takes"
- m = m_new
+ for newest in [m_new]:
+     m = newest

# %% wrong="mla_decode_kernel" because="float32 is multiplied as TF32, tl.dot's default"
- s = tl.dot(q_c, tl.trans(c), input_precision="ieee")
+ s = tl.dot(q_c, tl.trans(c))
