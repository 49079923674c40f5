# Right and wrong answers to the exercises of lesson 09: see CONTRIBUTING.md.

# %% wrong="masks" because="the causal mask is aligned to the first key" base="causal-mask"
def causal_mask(q_len, k_len, device=None):
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril()


def padding_mask(lengths, k_len):
    return (torch.arange(k_len, device=lengths.device) < lengths[:, None])[:, None, None, :]

# %% wrong="masks" because="True means hidden, as in nn.MultiheadAttention"
def causal_mask(q_len, k_len, device=None):
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).triu(k_len - q_len + 1)


def padding_mask(lengths, k_len):
    return (torch.arange(k_len, device=lengths.device) >= lengths[:, None])[:, None, None, :]

# %% wrong="masks" because="a token cannot see itself" of="causal-mask"
- return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril()
+ return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len - 1)

# %% wrong="masks" because="an additive mask of 0 and minus infinity"
def causal_mask(q_len, k_len, device=None):
    return torch.full((q_len, k_len), -torch.inf, device=device).triu(k_len - q_len + 1)


def padding_mask(lengths, k_len):
    return torch.where(torch.arange(k_len) < lengths[:, None], 0.0, -torch.inf)[:, None, None, :]

# %% wrong="masks" because="the padding mask lacks the axes for heads and queries" base="padding-mask"
def causal_mask(q_len, k_len, device=None):
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)


def padding_mask(lengths, k_len):
    return torch.arange(k_len, device=lengths.device) < lengths[:, None]

# %% wrong="masks" because="padding counted from one" of="padding-mask"
- return torch.arange(k_len, device=lengths.device) < lengths[:, None]
+ return (torch.arange(k_len, device=lengths.device) <= lengths[:, None])[:, None, None, :]

# %% right="masks" because="tril and a loop over the lengths" of="padding-mask"
- return torch.arange(k_len, device=lengths.device) < lengths[:, None]
+ mask = torch.zeros(len(lengths), 1, 1, k_len, dtype=torch.bool, device=lengths.device)
+ for b, n in enumerate(lengths.tolist()):
+     mask[b, ..., :n] = True
+ return mask

# %% wrong="sdpa" because="scales by d_k, not its root" base="scales-d"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights

# %% wrong="sdpa" because="no scaling" of="scales-d"
- scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
+ scores = q @ k.transpose(-2, -1)

# %% wrong="sdpa" because="scales by the width of the values" of="scales-d"
- scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
+ scores = (q / math.sqrt(v.shape[-1])) @ k.transpose(-2, -1)

# %% wrong="sdpa" because="softmax over the queries"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-2)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights

# %% wrong="sdpa" because="mask inverted"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(mask, 0.0)
    return weights @ v, weights

# %% wrong="sdpa" because="mask ignored" base="mask-ignored"
def scaled_dot_product_attention(q, k, v, mask=None):
    weights = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, weights

# %% wrong="sdpa" because="hidden keys set to 0 after softmax, without normalizing again" of="mask-ignored"
  weights = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1)
+ if mask is not None:
+     weights = weights * mask

# %% wrong="sdpa" because="hidden scores set to 0 before softmax" base="hidden-scores"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores * mask
    weights = scores.softmax(-1)
    return weights @ v, weights

# %% wrong="sdpa" because="NaN on rows without a key" of="hidden-scores"
- scores = scores * mask
+ scores = scores.masked_fill(~mask, -torch.inf)

# %% wrong="sdpa" because="rows without a key become uniform" of="hidden-scores"
- scores = scores * mask
+ scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)

# %% wrong="sdpa" because="repaired in the forward pass, NaN in the gradient"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, -torch.inf).to(scores)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ v, weights

# %% wrong="sdpa" because="a penalty of 1e9, beyond the range of float16"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights

# %% wrong="sdpa" because="a penalty of 100, which large scores overcome"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores - 100.0 * ~mask
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights * mask.any(-1, keepdim=True)
    return weights @ v, weights

# %% wrong="sdpa" because="scaled after the product, inf in float16" of="scales-d"
- scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
+ scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])

# %% wrong="sdpa" because="exp without subtracting the maximum"
def scaled_dot_product_attention(q, k, v, mask=None):
    e = torch.exp((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1))
    if mask is not None:
        e = e * mask
    weights = e / e.sum(-1, keepdim=True).clamp(min=1e-30)
    return weights @ v, weights

# %% wrong="sdpa" because="float32 out, whatever came in" of="scales-d"
- scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
+ q, k, v = q.float(), k.float(), v.float()
+ scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)

# %% wrong="sdpa" because="scales q in place" of="scales-d"
- scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
+ with torch.no_grad():
+     q /= math.sqrt(q.shape[-1])
+ scores = q @ k.transpose(-2, -1)

# %% wrong="sdpa" because="the weights are detached"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights.detach()

# %% wrong="sdpa" because="transposes with .T, which reverses every axis" of="scales-d"
- scores = (q / q.shape[-1]) @ k.transpose(-2, -1)
+ scores = (q / math.sqrt(q.shape[-1])) @ k.T

# %% wrong="sdpa" because="PyTorch's own"
def scaled_dot_product_attention(q, k, v, mask=None):
    eye = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], -1)
    weights = F.scaled_dot_product_attention(q, k, eye, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), weights

# %% wrong="sdpa" because="keys are ignored"
def scaled_dot_product_attention(q, k, v, mask=None):
    weights = torch.full((*q.shape[:-1], k.shape[-2]), 1 / k.shape[-2], dtype=q.dtype)
    return weights @ v, weights

# %% right="sdpa" because="einsum, minus infinity and a repair of the empty rows"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = torch.einsum("...qd,...kd->...qk", q * q.shape[-1] ** -0.5, k)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        empty = ~mask.any(-1, keepdim=True)
        weights = (
            scores.masked_fill(~mask, -torch.inf)
            .masked_fill(empty, 0.0)
            .softmax(-1)
            .masked_fill(empty, 0.0)
        )
    return torch.einsum("...qk,...kd->...qd", weights, v), weights

# %% right="sdpa" because="softmax by hand, the root shared between q and k, computed in float32 or better"
def scaled_dot_product_attention(q, k, v, mask=None):
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    root = q.shape[-1] ** 0.25
    scores = (q.to(wide) / root) @ (k.to(wide) / root).mT
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    lowest = torch.finfo(wide).min
    top = scores.detach().masked_fill(~mask, lowest).amax(-1, keepdim=True)
    e = torch.where(mask, scores - top, lowest).exp() * mask
    weights = e / e.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return (weights @ v.to(wide)).to(dtype), weights.to(dtype)

# %% wrong="mha" because="heads split by view without a transpose" base="heads-split"
class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        if d_model % heads:
            raise ValueError("d_model must be a multiple of heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context

        def split(t):
            return t.reshape(t.shape[0], self.heads, t.shape[1], -1)

        out, weights = scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(context)), split(self.v_proj(context)), mask
        )
        return self.out_proj(out.reshape(x.shape)), weights

# %% wrong="mha" because="joined without transposing back" of="heads-split"
- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

# %% wrong="mha" because="features dealt out to the heads in turn" of="heads-split"
- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)

- return self.out_proj(out.reshape(x.shape)), weights
+ return self.out_proj(out.permute(0, 2, 3, 1).flatten(-2)), weights

# %% wrong="mha" because="the context is ignored"
class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        if d_model % heads:
            raise ValueError("d_model must be a multiple of heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, x, context=None, mask=None):
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out, weights = scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)), mask
        )
        return self.out_proj(out.transpose(1, 2).flatten(-2)), weights

# %% wrong="mha" because="the values come from x where its shape allows, not from the context" base="values-come"
class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        if d_model % heads:
            raise ValueError("d_model must be a multiple of heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context

        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        values = self.v_proj(x if x.shape == context.shape else context)
        out, weights = scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(context)), split(values), mask
        )
        return self.out_proj(out.transpose(1, 2).flatten(-2)), weights

# %% wrong="mha" because="no output projection" of="heads-split"
- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

- return self.out_proj(out.reshape(x.shape)), weights
+ return out.transpose(1, 2).flatten(-2), weights

# %% wrong="mha" because="projections without biases" of="heads-split"
- nn.Linear(d_model, d_model) for _ in range(4)
+ nn.Linear(d_model, d_model, bias=False) for _ in range(4)

- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

- return self.out_proj(out.reshape(x.shape)), weights
+ return self.out_proj(out.transpose(1, 2).flatten(-2)), weights

# %% wrong="mha" because="the weights are averaged over the heads" of="heads-split"
- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

- return self.out_proj(out.reshape(x.shape)), weights
+ return self.out_proj(out.transpose(1, 2).flatten(-2)), weights.mean(1)

# %% wrong="mha" because="accepts a width that the heads do not divide" of="heads-split"
- if d_model % heads:
-     raise ValueError("d_model must be a multiple of heads")
- self.heads = heads
+ self.heads, self.head_dim = heads, d_model // heads

- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

- return self.out_proj(out.reshape(x.shape)), weights
+ return self.out_proj(out.transpose(1, 2).flatten(-2)), weights

# %% wrong="mha" because="the mask never reaches the attention" of="values-come"
- values = self.v_proj(x if x.shape == context.shape else context)

- split(self.q_proj(x)), split(self.k_proj(context)), split(values), mask
+ split(self.q_proj(x)), split(self.k_proj(context)), split(self.v_proj(context))

# %% wrong="mha" because="an always-causal module" of="heads-split"
  context = x if context is None else context
+ if mask is None:
+     mask = causal_mask(x.shape[1], context.shape[1], device=x.device)

- return t.reshape(t.shape[0], self.heads, t.shape[1], -1)
+ return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

- return self.out_proj(out.reshape(x.shape)), weights
+ return self.out_proj(out.transpose(1, 2).flatten(-2)), weights

# %% right="mha" because="a loop over the heads, einsum and no other function of the lesson"
class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, heads):
        if d_model < 1 or d_model % heads != 0:
            raise ValueError(f"{heads} heads do not divide {d_model} features")
        super().__init__()
        self.number = heads
        for name in ("q", "k", "v", "out"):
            setattr(self, f"{name}_proj", nn.Linear(d_model, d_model))

    def forward(self, x, context=None, mask=None):
        if context is None:
            context = x
        batch, q_len, width = x.shape
        q = self.q_proj(x).chunk(self.number, -1)
        k = self.k_proj(context).chunk(self.number, -1)
        v = self.v_proj(context).chunk(self.number, -1)
        shape = (batch, self.number, q_len, context.shape[1])
        visible = (
            torch.ones(shape, dtype=torch.bool, device=x.device)
            if mask is None
            else mask.expand(shape)
        )
        outs, maps = [], []
        for h in range(self.number):
            scores = torch.einsum("bqd,bkd->bqk", q[h], k[h]) * (width // self.number) ** -0.5
            w = (
                scores.masked_fill(~visible[:, h], torch.finfo(x.dtype).min).softmax(-1)
                * visible[:, h]
            )
            outs.append(torch.einsum("bqk,bkd->bqd", w, v[h]))
            maps.append(w)
        return self.out_proj(torch.cat(outs, -1)), torch.stack(maps, 1)

# %% right="mha" because="fused at run time"
class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        if d_model % heads:
            raise ValueError("d_model must be a multiple of heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        fused = (
            torch.cat([self.k_proj.weight, self.v_proj.weight]),
            torch.cat([self.k_proj.bias, self.v_proj.bias]),
        )
        k, v = F.linear(context, *fused).chunk(2, -1)
        q, k, v = (
            t.reshape(t.shape[0], t.shape[1], self.heads, -1).permute(0, 2, 1, 3)
            for t in (self.q_proj(x), k, v)
        )
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(out.permute(0, 2, 1, 3).reshape(x.shape)), weights

# %% wrong="kv_cache_bytes" because="forgets the factor 2: keys or values, not both"
def kv_cache_bytes(config, batch, seq, bytes_per_element=2):
    return config.layers * config.kv_heads * config.head_dim * batch * seq * bytes_per_element

# %% wrong="kv_cache_bytes" because="counts query heads"
def kv_cache_bytes(config, batch, seq, bytes_per_element=2):
    return 2 * config.layers * config.heads * config.head_dim * batch * seq * bytes_per_element

# %% wrong="kv_cache_bytes" because="forgets the layers"
def kv_cache_bytes(config, batch, seq, bytes_per_element=2):
    return 2 * config.kv_heads * config.head_dim * batch * seq * bytes_per_element

# %% wrong="kv_cache_bytes" because="two bytes whatever the format"
def kv_cache_bytes(config, batch, seq, bytes_per_element=2):
    return 2 * config.layers * config.kv_heads * config.head_dim * batch * seq * 2

# %% wrong="kv_cache_bytes" because="counts the scores, which grow with the square"
def kv_cache_bytes(config, batch, seq, bytes_per_element=2):
    return (
        2
        * config.layers
        * config.kv_heads
        * config.head_dim
        * batch
        * seq
        * seq
        * bytes_per_element
    )

# %% right="kv_cache_bytes" because="summed layer by layer"
def kv_cache_bytes(config, batch, seq, bytes_per_element=2):
    total = 0
    for _ in range(config.layers):
        for _ in ("keys", "values"):
            total += batch * config.kv_heads * seq * config.head_dim * bytes_per_element
    return total

# %% wrong="gqa" because="head index h % kv_heads instead of h // group" base="head-index"
def grouped_query_attention(q, k, v, mask=None):
    if q.shape[1] % k.shape[1]:
        raise ValueError("heads must be a multiple of kv_heads")
    group = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(
        q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), mask
    )[0]

# %% wrong="gqa" because="materializes the repeat" of="head-index"
- q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), mask
+ q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask

# %% wrong="gqa" because="a broadcasting product, which makes the copy inside" base="broadcasting-product"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    split = (q / math.sqrt(dim)).reshape(batch, kv_heads, heads // kv_heads, q_len, dim)
    scores = (split @ k.unsqueeze(2).transpose(-2, -1)).flatten(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return (weights.unflatten(1, (kv_heads, -1)) @ v.unsqueeze(2)).flatten(1, 2)

# %% wrong="gqa" because="expand, which the product copies after all"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    if heads % k.shape[1]:
        raise ValueError("heads must be a multiple of kv_heads")
    group = heads // k.shape[1]
    k, v = (t.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, mask)[0]

# %% wrong="gqa" because="only the keys are shared without a copy" of="broadcasting-product"
- split = (q / math.sqrt(dim)).reshape(batch, kv_heads, heads // kv_heads, q_len, dim)
- scores = (split @ k.unsqueeze(2).transpose(-2, -1)).flatten(1, 2)
+ stacked = (q / math.sqrt(dim)).reshape(batch, kv_heads, -1, dim)
+ scores = (stacked @ k.transpose(-2, -1)).view(batch, heads, q_len, k_len)

- return (weights.unflatten(1, (kv_heads, -1)) @ v.unsqueeze(2)).flatten(1, 2)
+ return weights @ v.repeat_interleave(heads // kv_heads, 1)

# %% wrong="gqa" because="PyTorch's own"
def grouped_query_attention(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

# %% wrong="gqa" because="the mask is applied to the stacked rows of the first head only"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    stacked = (q / math.sqrt(dim)).reshape(batch, kv_heads, -1, dim)
    scores = stacked @ k.transpose(-2, -1)
    if mask is not None and mask.dim() == 2:
        scores = torch.cat(
            [
                scores[:, :, :q_len].masked_fill(~mask, torch.finfo(scores.dtype).min),
                scores[:, :, q_len:],
            ],
            2,
        )
    return (scores.softmax(-1) @ v).view(batch, heads, q_len, -1)

# %% wrong="gqa" because="averages the queries of a group"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    if heads % k.shape[1]:
        raise ValueError("heads must be a multiple of kv_heads")
    pooled = q.unflatten(1, (k.shape[1], -1)).mean(2)
    out, _ = scaled_dot_product_attention(pooled, k, v, None)
    return out.repeat_interleave(heads // k.shape[1], 1)

# %% wrong="gqa" because="no scaling" of="broadcasting-product"
- split = (q / math.sqrt(dim)).reshape(batch, kv_heads, heads // kv_heads, q_len, dim)
- scores = (split @ k.unsqueeze(2).transpose(-2, -1)).flatten(1, 2)
+ scores = (q.reshape(batch, kv_heads, -1, dim) @ k.transpose(-2, -1)).view(
+     batch, heads, q_len, k_len
+ )

- return (weights.unflatten(1, (kv_heads, -1)) @ v.unsqueeze(2)).flatten(1, 2)
+ return (weights.reshape(batch, kv_heads, -1, k_len) @ v).view(batch, heads, q_len, -1)

# %% wrong="gqa" because="NaN on rows without a key"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    scores = ((q / math.sqrt(dim)).reshape(batch, kv_heads, -1, dim) @ k.transpose(-2, -1)).view(
        batch, heads, q_len, k_len
    )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).view(batch, kv_heads, -1, k_len) @ v).view(batch, heads, q_len, -1)

# %% wrong="gqa" because="silently drops heads that do not fit"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    group = heads // kv_heads
    q = q[:, : group * kv_heads]
    scores = ((q / math.sqrt(dim)).reshape(batch, kv_heads, -1, dim) @ k.transpose(-2, -1)).view(
        batch, -1, q_len, k_len
    )
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return (weights.view(batch, kv_heads, -1, k_len) @ v).view(batch, -1, q_len, v.shape[-1])

# %% right="gqa" because="a loop over the query heads"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    visible = None if mask is None else mask.expand(batch, heads, q_len, k_len)
    outs = []
    for h in range(heads):
        own = h // (heads // kv_heads)
        out, _ = scaled_dot_product_attention(
            q[:, h], k[:, own], v[:, own], None if visible is None else visible[:, h]
        )
        outs.append(out)
    return torch.stack(outs, 1)

# %% right="gqa" because="einsum over groups"
def grouped_query_attention(q, k, v, mask=None):
    batch, heads, q_len, dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    grouped = (q * dim**-0.5).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("bngqd,bnkd->bngqk", grouped, k)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        visible = mask.expand(batch, heads, q_len, k.shape[2]).unflatten(1, (kv_heads, -1))
        weights = (
            scores.masked_fill(~visible, torch.finfo(q.dtype).min)
            .softmax(-1)
            .masked_fill(~visible, 0.0)
        )
    return torch.einsum("bngqk,bnkd->bngqd", weights, v).flatten(1, 2)

# %% wrong="mha_to_gqa" because="pools every second head: the wrong grouping" base="pools-every"
def mha_to_gqa(w_k, groups):
    if w_k.shape[0] % groups:
        raise ValueError("heads must be a multiple of groups")
    return w_k.unflatten(0, (-1, groups)).mean(0)

# %% wrong="mha_to_gqa" because="sums instead of averaging" of="pools-every"
- return w_k.unflatten(0, (-1, groups)).mean(0)
+ return w_k.unflatten(0, (groups, -1)).sum(1)

# %% wrong="mha_to_gqa" because="keeps the first head of each group" of="pools-every"
- return w_k.unflatten(0, (-1, groups)).mean(0)
+ return w_k[:: w_k.shape[0] // groups].clone()

# %% wrong="mha_to_gqa" because="takes groups for the number of heads in a group" of="pools-every"
- return w_k.unflatten(0, (-1, groups)).mean(0)
+ return w_k.unflatten(0, (-1, groups)).mean(1)

# %% wrong="mha_to_gqa" because="averages over the features of a head" of="pools-every"
- return w_k.unflatten(0, (-1, groups)).mean(0)
+ return w_k.mean(1, keepdim=True).expand_as(w_k)[:groups].clone()

# %% right="mha_to_gqa" because="a product with a pooling matrix"
def mha_to_gqa(w_k, groups):
    heads = w_k.shape[0]
    if heads % groups != 0:
        raise ValueError("no equal groups")
    size = heads // groups
    own = torch.arange(heads, device=w_k.device) // size
    pool = F.one_hot(own, groups).T.to(w_k) / size
    return torch.tensordot(pool, w_k, 1)

# %% wrong="attention_entropy" because="entropy in bits" base="entropy-bits"
def attention_entropy(weights, mask=None):
    visible = (
        torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    )
    rows = torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1) / math.log(2)
    counted = visible.any(-1)
    return rows.sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)

# %% wrong="attention_entropy" because="0 log 0 is NaN" of="entropy-bits"
- rows = torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1) / math.log(2)
+ w = weights.masked_fill(~visible, 0.0)
+ rows = -(w * w.log()).sum(-1)

# %% wrong="attention_entropy" because="the sign is forgotten" of="entropy-bits"
- rows = torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1) / math.log(2)
+ rows = -torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1)

# %% wrong="attention_entropy" because="an epsilon of 1e-3 inside the logarithm" of="entropy-bits"
- rows = torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1) / math.log(2)
+ w = weights.masked_fill(~visible, 0.0)
+ rows = -(w * (w + 1e-3).log()).sum(-1)

# %% wrong="attention_entropy" because="empty rows count in the mean"
def attention_entropy(weights, mask=None):
    visible = (
        torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    )
    return torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1).mean((0, 2))

# %% wrong="attention_entropy" because="the mask is ignored"
def attention_entropy(weights, mask=None):
    return torch.special.entr(weights).sum(-1).mean((0, 2))

# %% wrong="attention_entropy" because="hidden positions multiplied by 0, which keeps NaN" of="entropy-bits"
- rows = torch.special.entr(weights.masked_fill(~visible, 0.0)).sum(-1) / math.log(2)
+ rows = torch.special.entr(weights * visible).sum(-1)

# %% wrong="attention_entropy" because="the entropy of the averaged row"
def attention_entropy(weights, mask=None):
    return torch.special.entr(weights.nan_to_num(0.0).mean((0, 2))).sum(-1)

# %% right="attention_entropy" because="row by row, only the visible and positive weights"
def attention_entropy(weights, mask=None):
    mask = (
        torch.ones_like(weights, dtype=torch.bool)
        if mask is None
        else mask.broadcast_to(weights.shape)
    )
    result = []
    for h in range(weights.shape[1]):
        rows = []
        for w, seen in zip(weights[:, h].flatten(0, 1), mask[:, h].flatten(0, 1), strict=True):
            if seen.any():
                w = w[seen]
                w = w[w > 0]
                rows.append((w * (1 / w).log()).sum())
        result.append(torch.stack(rows).mean() if rows else torch.zeros((), dtype=weights.dtype))
    return torch.stack(result)

# %% wrong="head_scores" because="looks at the earlier token itself, not at what follows it"
def head_scores(weights, tokens):
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    repeated = earlier.any(-1)[:, None]
    found = (weights * earlier[:, None]).sum(-1) * repeated
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "sink": weights[:, :, 1:, 0].mean((0, 2)),
        "induction": found.sum((0, 2)) / repeated.sum().clamp(min=1),
    }

# %% wrong="head_scores" because="the induction score averages over all queries"
def head_scores(weights, tokens):
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after = F.pad(earlier, (1, 0))[..., :-1]
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "sink": weights[:, :, 1:, 0].mean((0, 2)),
        "induction": (weights * after[:, None]).sum(-1).mean((0, 2)),
    }

# %% wrong="head_scores" because="only the first occurrence counts"
def head_scores(weights, tokens):
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    repeated = earlier.any(-1)
    key = (earlier.int().argmax(-1) + 1).clamp(max=tokens.shape[1] - 1)
    at = (
        weights.gather(3, key[:, None, :, None].expand(-1, weights.shape[1], -1, 1))[..., 0]
        * repeated[:, None]
    )
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "sink": weights[:, :, 1:, 0].mean((0, 2)),
        "induction": at.sum((0, 2)) / repeated.sum().clamp(min=1),
    }

# %% wrong="head_scores" because="the token itself counts as an occurrence"
def head_scores(weights, tokens):
    same = (tokens[:, :, None] == tokens[:, None, :]).tril()
    after = F.pad(same, (1, 0))[..., :-1]
    found = (weights * after[:, None]).sum(-1)
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "sink": weights[:, :, 1:, 0].mean((0, 2)),
        "induction": found.mean((0, 2)),
    }

# %% wrong="head_scores" because="NaN where no token repeats" base="nan-where"
def head_scores(weights, tokens):
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after = F.pad(earlier, (1, 0))[..., :-1]
    repeated = earlier.any(-1)[:, None]
    found = (weights * after[:, None]).sum(-1) * repeated
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
        "sink": weights[:, :, 1:, 0].mean((0, 2)),
        "induction": found.sum((0, 2)) / repeated.sum(),
    }

# %% wrong="head_scores" because="the sink counts query 0, which has no choice" of="nan-where"
- "sink": weights[:, :, 1:, 0].mean((0, 2)),
- "induction": found.sum((0, 2)) / repeated.sum(),
+ "sink": weights[..., 0].mean((0, 2)),
+ "induction": found.sum((0, 2)) / repeated.sum().clamp(min=1),

# %% wrong="head_scores" because="the diagonal above instead of below" of="nan-where"
- "previous_token": weights.diagonal(-1, -2, -1).mean((0, 2)),
+ "previous_token": weights.diagonal(1, -2, -1).mean((0, 2)),

- "induction": found.sum((0, 2)) / repeated.sum(),
+ "induction": found.sum((0, 2)) / repeated.sum().clamp(min=1),

# %% right="head_scores" because="loops"
def head_scores(weights, tokens):
    batch, heads, seq, _ = weights.shape
    previous, sink, induction, count = (torch.zeros(heads, dtype=weights.dtype) for _ in range(4))
    for b in range(batch):
        for i in range(1, seq):
            previous += weights[b, :, i, i - 1]
            sink += weights[b, :, i, 0]
            keys = {j + 1 for j in range(i) if int(tokens[b, j]) == int(tokens[b, i])}
            for key in sorted(keys):
                induction += weights[b, :, i, key]
            count += bool(keys)
    queries = batch * (seq - 1)
    return {
        "previous_token": previous / queries,
        "sink": sink / queries,
        "induction": induction / count.clamp(min=1),
    }

# %% wrong="induction_weights" because="position 0 keeps its false predecessor" base="position-keeps"
def induction_weights(vocab_size, length):
    V, T = vocab_size, length
    d = 2 * V + T
    eye = lambda n: torch.eye(n, dtype=torch.float64)
    zeros = lambda *s: torch.zeros(*s, dtype=torch.float64)
    one = {"q": zeros(d, T), "k": zeros(d, T), "v": zeros(d, V), "o": zeros(V, d)}
    one["q"][V : V + T] = 30 * T**0.5 * eye(T)
    one["k"][V : V + T] = eye(T).roll(1, dims=1)
    one["v"][:V], one["o"][:, V + T :] = eye(V), eye(V)
    two = {"q": zeros(d, V), "k": zeros(d, V), "v": zeros(d, V), "o": zeros(V, d)}
    two["q"][:V] = 30 * V**0.5 * eye(V)
    two["k"][V + T :] = eye(V)
    two["v"][:V], two["o"][:, :V] = eye(V), 2 * eye(V)
    return [one, two]

# %% wrong="induction_weights" because="the current token drowns the prediction" of="position-keeps"
- two["k"][V + T :] = eye(V)
- two["v"][:V], two["o"][:, :V] = eye(V), 2 * eye(V)
+ two["k"][V + T :], two["k"][V] = eye(V), -1
+ two["v"][:V], two["o"][:, :V] = eye(V), 0.5 * eye(V)

# %% wrong="induction_weights" because="not sharp: the division by the root of the width is forgotten" of="position-keeps"
- one["q"][V : V + T] = 30 * T**0.5 * eye(T)
+ one["q"][V : V + T] = 10 * eye(T)

- two["q"][:V] = 30 * V**0.5 * eye(V)
- two["k"][V + T :] = eye(V)
+ two["q"][:V] = 10 * eye(V)
+ two["k"][V + T :], two["k"][V] = eye(V), -1

# %% wrong="induction_weights" because="layer 2 looks for the token itself and copies it" of="position-keeps"
- two["q"][:V] = 30 * V**0.5 * eye(V)
- two["k"][V + T :] = eye(V)
+ two["q"][:V], two["k"][:V] = 30 * V**0.5 * eye(V), eye(V)

# %% wrong="induction_weights" because="layer 1 looks at itself" of="position-keeps"
- one["q"][V : V + T] = 30 * T**0.5 * eye(T)
- one["k"][V : V + T] = eye(T).roll(1, dims=1)
+ one["q"][V : V + T], one["k"][V : V + T] = 30 * T**0.5 * eye(T), eye(T)

- two["k"][V + T :] = eye(V)
+ two["k"][V + T :], two["k"][V] = eye(V), -1

# %% wrong="induction_weights" because="one layer that looks back by one"
def induction_weights(vocab_size, length):
    V, T = vocab_size, length
    d = 2 * V + T
    eye = lambda n: torch.eye(n, dtype=torch.float64)
    zeros = lambda *s: torch.zeros(*s, dtype=torch.float64)
    one = {"q": zeros(d, T), "k": zeros(d, T), "v": zeros(d, V), "o": zeros(V, d)}
    one["q"][V : V + T] = 30 * T**0.5 * eye(T)
    one["k"][V : V + T] = eye(T).roll(1, dims=1)
    one["v"][:V], one["o"][:, :V] = eye(V), 2 * eye(V)
    two = {"q": zeros(d, 1), "k": zeros(d, 1), "v": zeros(d, 1), "o": zeros(1, d)}
    return [one, two]

# %% right="induction_weights" because="the full matrices as factors, float32, and no claim at position 0 at all"
def induction_weights(vocab_size, length):
    V, T = vocab_size, length
    d = 2 * V + T
    sharp = 40 * d**0.5
    behind = torch.zeros(d, d)
    behind[V + 1 : V + T, V : V + T - 1] = torch.eye(T - 1)  # query i, key i − 1
    write = torch.zeros(d, d)
    write[:V, V + T :] = torch.eye(V)
    match = torch.zeros(d, d)
    match[:V, V + T :] = torch.eye(V)  # my token is your predecessor
    match[:V, V] = -2.0  # but nobody asks position 0
    copy = torch.zeros(d, d)
    copy[:V, :V] = 3 * torch.eye(V)
    return [
        {"q": sharp * behind, "k": torch.eye(d), "v": torch.eye(d), "o": write},
        {"q": sharp * match, "k": torch.eye(d), "v": torch.eye(d), "o": copy},
    ]

# %% wrong="key_questions" because="the variance, not the standard deviation"
- return math.sqrt(64) * 3 * 0.5
+ return 64 * 9 * 0.25

# %% wrong="key_questions" because="unit variances assumed"
- return math.sqrt(64) * 3 * 0.5
+ return 8.0

# %% wrong="key_questions" because="the mean of the two deviations"
- return math.sqrt(64) * 3 * 0.5
+ return 8 * (3 + 0.5) / 2

# %% wrong="key_questions" because="upside down"
- return slope(1.0) / slope(8.0)
+ return 0.0017

# %% wrong="key_questions" because="the exponentials alone"
- return slope(1.0) / slope(8.0)
+ return math.exp(7)

# %% wrong="key_questions" because="compared with a tie instead of a gap of 1"
- return slope(1.0) / slope(8.0)
+ w = 1 / (1 + math.exp(-8))
+ return 0.25 / (w * (1 - w))

# %% wrong="key_questions" because="aligned to the first key"
- return sum(1000 + i + 1 for i in range(24))
+ return 24 * 25 // 2

# %% wrong="key_questions" because="a token cannot see itself"
- return sum(1000 + i + 1 for i in range(24))
+ return 24 * 1000 + 24 * 23 // 2

# %% wrong="key_questions" because="everything visible"
- return sum(1000 + i + 1 for i in range(24))
+ return 24 * 1024

# %% wrong="key_questions" because="a multiplication and an addition counted as one"
- return flops / read
+ return 4.0

# %% wrong="key_questions" because="elements instead of bytes"
- return flops / read
+ return 16.0

# %% wrong="key_questions" because="as if every head had its own cache"
- return flops / read
+ return 1.0

# %% wrong="key_questions" because="attention taken for a pooling"
- return "b"
+ return "a"

# %% wrong="key_questions" because="attention taken for a recurrence"
- return "b"
+ return "c"

# %% wrong="masks" because="the device asked for is not used"
- queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
- keys = torch.arange(k_len, device=device)[None, :]
+ queries = torch.arange(q_len)[:, None] + (k_len - q_len)
+ keys = torch.arange(k_len)[None, :]

# %% wrong="masks" because="without a device it is the CPU, whatever PyTorch's default is"
- queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
- keys = torch.arange(k_len, device=device)[None, :]
+ device = device or "cpu"
+ queries = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
+ keys = torch.arange(k_len, device=device)[None, :]

# %% wrong="sdpa" because="hidden scores are −10,000, and visible ones may be lower"
- scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
+ scores = scores.masked_fill(~mask, -10000.0)

# %% wrong="sdpa" because="computes in float32 whatever comes in"
- scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
+ kept = q.dtype
+ q, k, v = q.float(), k.float(), v.float()
+ scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)

- return weights @ v, weights
+ return (weights @ v).to(kept), weights.to(kept)

# %% wrong="sdpa" because="widens half precision and does not come back"
- return weights @ v, weights
+ return (weights.float() @ v.float()).to(v.dtype), weights.float()

# %% wrong="sdpa" because="opens the empty rows of the caller's mask in place"
def scaled_dot_product_attention(q, k, v, mask=None):
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if mask is None:
        weights = scores.softmax(-1)
    else:
        empty = ~mask.any(-1, keepdim=True)
        mask |= empty
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
    return weights @ v, weights

# %% wrong="gqa" because="hidden scores are −10,000, and visible ones may be lower"
- scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
+ scores = scores.masked_fill(~mask, -10000.0)

# %% wrong="gqa" because="exponentials without the maximum subtracted"
- weights = torch.softmax(scores, dim=-1)
+ weights = scores.exp() / scores.exp().sum(-1, keepdim=True)

# %% wrong="gqa" because="scaled after the product, which overflows in float16"
- stacked = (q / math.sqrt(head_dim)).reshape(batch, kv_heads, -1, head_dim)
- scores = (stacked @ k.transpose(-2, -1)).view(batch, heads, q_len, k_len)
+ stacked = q.reshape(batch, kv_heads, -1, head_dim)
+ scores = (stacked @ k.transpose(-2, -1)).view(batch, heads, q_len, k_len) / math.sqrt(head_dim)

# %% wrong="gqa" because="opens the empty rows of the caller's mask in place"
- if mask is not None:
-     scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
- weights = torch.softmax(scores, dim=-1)
- if mask is not None:
-     weights = weights.masked_fill(~mask, 0.0)
+ if mask is None:
+     weights = scores.softmax(-1)
+ else:
+     empty = ~mask.any(-1, keepdim=True)
+     mask |= empty
+     weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(empty, 0.0)

# %% wrong="attention_entropy" because="all heads divided by the number of rows of the first"
- return rows.sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)
+ return rows.sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)[0]

# %% wrong="attention_entropy" because="a float32 result for float64 weights"
- return rows.sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)
+ return (rows.sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)).float()

# %% wrong="head_scores" because="a mean over sequences of their means"
- "induction": found.sum((0, 2)) / repeated.sum().clamp(min=1),
+ "induction": (found.sum(2) / repeated.sum(2).clamp(min=1)).mean(0),

# %% wrong="mha_to_gqa" because="the mean is taken in float32"
- return w_k.unflatten(0, (groups, heads // groups)).mean(1)
+ return w_k.float().unflatten(0, (groups, heads // groups)).mean(1).to(w_k.dtype)

# %% right="key_questions" because="autograd, a rectangle and a triangle, heads over heads"
def question_scale():
    return 12


def question_saturation():
    gaps = torch.tensor([1.0, 8.0], dtype=torch.float64, requires_grad=True)
    torch.sigmoid(gaps).sum().backward()
    return (gaps.grad[0] / gaps.grad[1]).item()


def question_mask():
    return 24 * 1000 + 24 * 25 // 2


def question_intensity():
    return 64 / 8


def question_order():
    return "bb"[:1]

# %% wrong="mha" because="a mask of three axes is taken for one of the batch"
-     context = x if context is None else context
+     context = x if context is None else context
+     if mask is not None and mask.dim() == 3:
+         mask = mask.unsqueeze(1)

# %% wrong="head_scores" because="only queries that look at their targets are averaged over"
-     repeated = earlier.any(-1)[:, None]  # (batch, 1, i)
-     found = (weights * after[:, None]).sum(-1) * repeated  # (batch, heads, i)
+     found = (weights * after[:, None]).sum(-1) * earlier.any(-1)[:, None]  # (batch, heads, i)
-         "induction": found.sum((0, 2)) / repeated.sum().clamp(min=1),
+         "induction": found.sum((0, 2)) / (found > 0).sum((0, 2)).clamp(min=1),

# %% wrong="induction_weights" because="a bonus for late positions, meant to prefer the last occurrence, outweighs the match in a long sequence"
def induction_weights(vocab_size: int, length: int) -> list[dict[str, Tensor]]:
    V, T = vocab_size, length
    d = 2 * V + T

    q1, k1 = torch.zeros(d, T), torch.zeros(d, T)
    q1[V : V + T] = torch.eye(T)
    k1[V : V + T - 1, 1:] = 40.0 * math.sqrt(T) * torch.eye(T - 1)
    v1, o1 = torch.zeros(d, V), torch.zeros(V, d)
    v1[:V] = torch.eye(V)
    o1[:, V + T :] = torch.eye(V)

    # one more column than tokens: a query of 1, met by a score for the position of the key
    q2, k2 = torch.zeros(d, V + 1), torch.zeros(d, V + 1)
    root = math.sqrt(V + 1)
    q2[:V, :V] = torch.eye(V)
    q2[:V, V] = 1.0
    k2[V + T :, :V] = 20.0 * root * torch.eye(V)
    k2[V : V + T, V] = 0.5 * root * torch.arange(T)
    k2[V, V] = -40.0 * root
    v2, o2 = torch.zeros(d, V), torch.zeros(V, d)
    v2[:V] = torch.eye(V)
    o2[:, :V] = 2 * torch.eye(V)
    return [
        {"q": q1, "k": k1, "v": v1, "o": o1},
        {"q": q2, "k": k2, "v": v2, "o": o2},
    ]
