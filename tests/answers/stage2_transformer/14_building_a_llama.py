# Right and wrong answers to the exercises of lesson 14: see CONTRIBUTING.md.

# %% wrong="rms_norm" because="eps outside the root" base="eps-outside"
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(
            x.dtype
        )

# %% wrong="rms_norm" because="the mean is subtracted" of="eps-outside"
- return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(
-     x.dtype
- )
+ wide = wide - wide.mean(-1, keepdim=True)
+ return (
+     wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
+ ).to(x.dtype)

# %% wrong="rms_norm" because="the sum of squares, not their mean" of="eps-outside"
- return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(
-     x.dtype
- )
+ return (
+     wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps) * self.weight
+ ).to(x.dtype)

# %% wrong="rms_norm" because="computed in the format of the input, inf in float16" base="computed-format"
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(x.dtype)
        return (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        ).to(x.dtype)

# %% wrong="rms_norm" because="always computed in float32, also for float64" of="computed-format"
- wide = x.to(x.dtype)
+ wide = x.to(torch.float32)

# %% wrong="rms_norm" because="float32 out, whatever came in" of="eps-outside"
- return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(
-     x.dtype
- )
+ return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight

# %% wrong="rms_norm" because="no weight" of="eps-outside"
- return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(
-     x.dtype
- )
+ return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

# %% wrong="rms_norm" because="the weight is a buffer, not a parameter" of="computed-format"
- self.weight = nn.Parameter(torch.ones(dim))
+ self.register_buffer("weight", torch.ones(dim))

- wide = x.to(x.dtype)
+ wide = x.to(torch.promote_types(x.dtype, torch.float32))

# %% wrong="rms_norm" because="normalizes over all axes but the first"
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (
            wide
            * torch.rsqrt(
                wide.square().mean(tuple(range(1, x.dim())) or -1, keepdim=True) + self.eps
            )
            * self.weight
        ).to(x.dtype)

# %% wrong="rms_norm" because="PyTorch's own"
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

# %% right="rms_norm" because="the vector norm, the weight after the cast back" of="eps-outside"
- return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(
-     x.dtype
- )
+ root = (
+     torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / x.shape[-1] + self.eps
+ ).sqrt()
+ return (self.weight * (wide / root).to(x.dtype)).to(x.dtype)

# %% wrong="rms_norm" because="bfloat16 is computed in bfloat16"
- wide = x.to(torch.promote_types(x.dtype, torch.float32))
+ wide = x.float() if x.dtype == torch.float16 else x

# %% wrong="rms_norm" because="the root is rounded to the input's format"
- root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
+ root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps).to(x.dtype)

# %% wrong="rms_norm" because="a float32 weight turns half-precision inputs into float32"
- return (wide * root * self.weight).to(x.dtype)
+ return self.weight * (wide * root).to(x.dtype)

# %% wrong="rms_norm" because="the result has the weight's format"
- return (wide * root * self.weight).to(x.dtype)
+ return (wide * root * self.weight).to(self.weight.dtype)

# %% wrong="rotary" because="interleaved pairs" base="interleaved-pairs"
def rotary_angles(
    positions: Tensor, head_dim: int, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    exponents = (
        torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    )
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
    return (
        torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )

# %% wrong="rotary" because="turned clockwise" of="interleaved-pairs"
- first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
- return (
-     torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
-     .flatten(-2)
-     .to(x.dtype)
- )
+ first, second = x.to(wide).chunk(2, dim=-1)
+ return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)

# %% wrong="rotary" because="the sign lost: a reflection, not a turn" of="interleaved-pairs"
- first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
- return (
-     torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
-     .flatten(-2)
-     .to(x.dtype)
- )
+ first, second = x.to(wide).chunk(2, dim=-1)
+ return torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="rotary" because="exponents i/head_dim" base="exponents-i"
def rotary_angles(
    positions: Tensor, head_dim: int, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="rotary" because="angles formed in float32" of="exponents-i"
- exponents = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device) / head_dim
- angles = positions.double()[..., None] * theta**-exponents
+ exponents = (
+     torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
+ )
+ angles = positions.float()[..., None] * theta**-exponents

- return angles.cos(), angles.sin()
+ return angles.double().cos(), angles.double().sin()

# %% wrong="rotary" because="positions counted from 1" of="exponents-i"
- exponents = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device) / head_dim
- angles = positions.double()[..., None] * theta**-exponents
+ exponents = (
+     torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
+ )
+ angles = (positions.double()[..., None] + 1) * theta**-exponents

# %% wrong="rotary" because="theta ignored" of="exponents-i"
- exponents = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device) / head_dim
- angles = positions.double()[..., None] * theta**-exponents
+ exponents = (
+     torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
+ )
+ angles = positions.double()[..., None] * 10_000.0**-exponents

# %% wrong="rotary" because="no axis for the heads where each row has its own positions" of="exponents-i"
- exponents = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device) / head_dim
+ exponents = (
+     torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
+ )

- if positions.dim() == 2:
-     angles = angles[:, None]

# %% wrong="rotary" because="float32 out, whatever came in" of="interleaved-pairs"
- first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
- return (
-     torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
-     .flatten(-2)
-     .to(x.dtype)
- )
+ first, second = x.to(wide).chunk(2, dim=-1)
+ return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

# %% wrong="rotary" because="float64 out for float32 inputs"
def rotary_angles(
    positions: Tensor, head_dim: int, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    exponents = (
        torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    )
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.float64
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

# %% wrong="rotary" because="turns x in place" of="interleaved-pairs"
- first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
- return (
-     torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
-     .flatten(-2)
-     .to(x.dtype)
- )
+ half = x.shape[-1] // 2
+ with torch.no_grad():
+     first = x[..., :half].clone()
+     x[..., :half] = first * cos - x[..., half:] * sin
+     x[..., half:] = x[..., half:] * cos + first * sin
+ return x

# %% right="rotary" because="rotate_half, as in Hugging Face"
def rotary_angles(
    positions: Tensor, head_dim: int, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    exponents = (
        torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    )
    angles = positions.double()[..., None] * torch.exp(-math.log(theta) * exponents)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    half = x.shape[-1] // 2
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    wider = x.to(wide)
    return (wider * cos + torch.cat([-wider[..., half:], wider[..., :half]], -1) * sin).to(x.dtype)

# %% right="rotary" because="complex numbers" of="interleaved-pairs"
- cos, sin = cos.to(wide), sin.to(wide)
- first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
- return (
-     torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
-     .flatten(-2)
-     .to(x.dtype)
- )
+ turned = torch.complex(*x.to(wide).chunk(2, dim=-1)) * torch.complex(cos.to(wide), sin.to(wide))
+ return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)

# %% wrong="rotary" because="half precision is turned in half precision"
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = x.dtype

# %% wrong="rotary" because="bfloat16 is turned in bfloat16"
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = torch.float32 if x.dtype == torch.float16 else x.dtype

# %% wrong="rotary" because="the angles are made on the CPU"
- pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
+ pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)

- angles = positions.double()[..., None] * theta ** (-pairs / head_dim)
+ positions = torch.tensor(positions.tolist()) if positions.device.type != "meta" else torch.zeros(
+     positions.shape
+ )
+ angles = positions.double()[..., None] * theta ** (-pairs / head_dim)

# %% wrong="attention" because="the causal mask is aligned to the first key" base="causal-mask"
class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).flatten(-2))

# %% wrong="attention" because="is_causal whatever the cache holds" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
- causal = mask is None and q_len > 1
+ causal = mask is None

# %% wrong="attention" because="no mask for several tokens after a cache" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
- causal = mask is None and q_len > 1
+ causal = mask is None and q_len == k_len

# %% wrong="attention" because="no causal mask" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()

- q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
+ q, k, v, attn_mask=mask, is_causal=False, enable_gqa=True

# %% wrong="attention" because="heads repeated in blocks: 0, 1, 0, 1" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

- q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
+ q,
+ k.repeat(1, q.shape[1] // k.shape[1], 1, 1),
+ v.repeat(1, q.shape[1] // v.shape[1], 1, 1),
+ attn_mask=mask,
+ is_causal=causal,

# %% wrong="attention" because="the mask is ignored" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

  causal = mask is None and q_len > 1
+ mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
+ causal = False

# %% wrong="attention" because="keys are not turned" of="causal-mask"
- q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
+ q = apply_rotary(q, cos, sin)

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

# %% wrong="attention" because="values are turned too" of="causal-mask"
- q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
+ q, k, v = (apply_rotary(t, cos, sin) for t in (q, k, v))

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

# %% wrong="attention" because="keys cached before they are turned, all turned by the angles of the new tokens" of="causal-mask"
- q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)

      k, v = cache.extend(self.layer, k, v)
+ q = apply_rotary(q, cos, sin)
+ new = apply_rotary(k[:, :, -x.shape[1] :], cos, sin)
+ k = torch.cat([k[:, :, : -x.shape[1]], new], 2)

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

# %% wrong="attention" because="the cache is read but every layer writes to layer 0" of="causal-mask"
- k, v = cache.extend(self.layer, k, v)
+ k, v = cache.extend(0, k, v)

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

# %% wrong="attention" because="caches the repeated heads" of="causal-mask"
  q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
+ k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

- out = F.scaled_dot_product_attention(
-     q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
- )
+ out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

# %% wrong="attention" because="joined without transposing back" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

- return self.o(out.transpose(1, 2).flatten(-2))
+ return self.o(out.reshape(*x.shape[:2], -1))

# %% wrong="attention" because="with biases" of="causal-mask"
- self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
- self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
- self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
- self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
+ self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=True)
+ self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=True)
+ self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=True)
+ self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=True)

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

# %% wrong="attention" because="features dealt out to the heads in turn" of="causal-mask"
- projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
+ projection(x).unflatten(-1, (self.head_dim, -1)).permute(0, 3, 1, 2)

- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
+ if mask is None and 1 < q_len < k_len:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)

# %% right="attention" because="repeat_interleave, softmax by hand, the mask by comparing positions" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
- causal = mask is None and q_len > 1
- out = F.scaled_dot_product_attention(
-     q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
- )
+ if mask is None:
+     at = torch.arange(k_len, device=x.device)
+     mask = at <= at[k_len - q_len :, None]
+ k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
+ scores = q @ k.mT / math.sqrt(self.head_dim)
+ out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

# %% right="attention" because="groups as further rows" of="causal-mask"
- if mask is None and q_len < k_len:
-     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
- causal = mask is None and q_len > 1
- out = F.scaled_dot_product_attention(
-     q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
- )
+ if mask is None:
+     mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
+ stacked = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
+ scores = (stacked @ k.mT / math.sqrt(self.head_dim)).view(*q.shape[:3], k_len)
+ weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
+ out = (weights.view(*stacked.shape[:3], k_len) @ v).view(q.shape)

# %% wrong="attention" because="a mask must have an axis for the batch"
- if mask is None and 1 < q_len < k_len:  # is_causal would align to the first key
+ if mask is not None and mask.dim() < 4:
+     mask = None
+ if mask is None and 1 < q_len < k_len:

# %% wrong="attention" because="only the first head's mask is used"
- q_len, k_len = q.shape[2], k.shape[2]
+ q_len, k_len = q.shape[2], k.shape[2]
+ if mask is not None and mask.dim() > 2:
+     mask = mask[..., :1, :, :]

# %% wrong="attention" because="a single query drops the mask that it is given"
- q_len, k_len = q.shape[2], k.shape[2]
+ q_len, k_len = q.shape[2], k.shape[2]
+ if q_len == 1:
+     mask = None

# %% wrong="block" because="gate and up exchanged"
- return self.down(F.silu(self.gate(x)) * self.up(x))
+ return self.down(F.silu(self.up(x)) * self.gate(x))


# %% wrong="block" because="GELU in place of SiLU"
- return self.down(F.silu(self.gate(x)) * self.up(x))
+ return self.down(F.gelu(self.gate(x)) * self.up(x))


# %% wrong="block" because="sigmoid in place of SiLU (GLU)"
- return self.down(F.silu(self.gate(x)) * self.up(x))
+ return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


# %% wrong="block" because="no up branch"
- return self.down(F.silu(self.gate(x)) * self.up(x))
+ return self.down(F.silu(self.gate(x)) + 0 * self.up(x))


# %% wrong="block" because="both branches read the same stream" base="both-branches"
class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        return (
            x
            + self.attention(self.attention_norm(x), cos, sin, mask, cache)
            + self.mlp(self.mlp_norm(x))
        )

# %% wrong="block" because="norms after the sums (post-norm)" of="both-branches"
- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = self.attention_norm(x + self.attention(x, cos, sin, mask, cache))
+ return self.mlp_norm(x + self.mlp(x))

# %% wrong="block" because="no residual around the MLP" of="both-branches"
- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
+ return self.mlp(self.mlp_norm(x))

# %% wrong="block" because="the cache is not handed on" of="both-branches"
- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = x + self.attention(self.attention_norm(x), cos, sin, mask)
+ return x + self.mlp(self.mlp_norm(x))

# %% wrong="block" because="the mask is not handed on" of="both-branches"
- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = x + self.attention(self.attention_norm(x), cos, sin, None, cache)
+ return x + self.mlp(self.mlp_norm(x))

# %% wrong="block" because="eps of the config ignored" of="both-branches"
- self.attention_norm = RMSNorm(config.hidden_size, config.eps)
+ self.attention_norm = RMSNorm(config.hidden_size)

- self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
+ self.mlp_norm = RMSNorm(config.hidden_size)

- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
+ return x + self.mlp(self.mlp_norm(x))

# %% wrong="block" because="the residual starts after the norm" of="both-branches"
- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = self.attention_norm(x)
+ x = x + self.attention(x, cos, sin, mask, cache)
+ x = self.mlp_norm(x)
+ return x + self.mlp(x)

# %% right="block" because="PyTorch's RMSNorm, SiLU written out" of="both-branches"
- return self.down(F.silu(self.gate(x)) * self.up(x))
+ gate = self.gate(x)
+ return self.down(gate * torch.sigmoid(gate) * self.up(x))

- self.attention_norm = RMSNorm(config.hidden_size, config.eps)
+ self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.eps)

- self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
+ self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.eps)

- return (
-     x
-     + self.attention(self.attention_norm(x), cos, sin, mask, cache)
-     + self.mlp(self.mlp_norm(x))
- )
+ x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
+ return x + self.mlp(self.mlp_norm(x))

# %% wrong="block" because="the layer's number is not handed on"
- self.attention = Attention(config, layer)
+ self.attention = Attention(config)

# %% wrong="llama" because="no norm before the head" base="no-norm"
class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        if not config.tied:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.layers)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(
            columns[past:] if positions is None else positions,
            self.config.head_dim,
            self.config.rope_theta,
        )
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)

# %% wrong="llama" because="positions ignore the cache" of="no-norm"
- columns[past:] if positions is None else positions,
+ columns[:seq] if positions is None else positions,

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="the length of the cache read after the blocks have begun" of="no-norm"
  for block in self.blocks:
+     at = torch.arange(seq, device=tokens.device) + (len(cache) if cache is not None else 0)
+     cos, sin = rotary_angles(
+         at if positions is None else positions, self.config.head_dim, self.config.rope_theta
+     )

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="positions given are ignored" of="no-norm"
- cos, sin = rotary_angles(
-     columns[past:] if positions is None else positions,
-     self.config.head_dim,
-     self.config.rope_theta,
- )
+ cos, sin = rotary_angles(columns[past:], self.config.head_dim, self.config.rope_theta)

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="the tied head is a copy" of="no-norm"
- if not config.tied:
-     self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
+ self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
+ if config.tied:
+     self.head.weight.data.copy_(self.embed.weight.data)

- return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ x = self.norm(x)
+ return self.head(x)

# %% wrong="llama" because="tied is ignored" of="no-norm"
- if not config.tied:
-     self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
+ self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

- return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ x = self.norm(x)
+ return self.head(x)

# %% wrong="llama" because="the tied head is detached" of="no-norm"
- return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ x = self.norm(x)
+ return F.linear(x, self.embed.weight.detach()) if self.config.tied else self.head(x)

# %% wrong="llama" because="padding is attended to" of="no-norm"
- mask = causal & attention_mask[:, None, None, :].bool() | own
+ mask = causal.expand(len(tokens), 1, -1, -1) | own

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="a row of padding sees nothing" of="no-norm"
- mask = causal & attention_mask[:, None, None, :].bool() | own
+ mask = causal & attention_mask[:, None, None, :].bool()

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)
+ if mask is not None:
+     x = x.masked_fill(~mask.any(-1)[:, 0, :, None], torch.nan)

# %% wrong="llama" because="with an attention mask nothing is causal" of="no-norm"
- mask = causal & attention_mask[:, None, None, :].bool() | own
+ mask = attention_mask[:, None, None, :].bool() | own

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="the attention mask hides the queries, not the keys" of="no-norm"
- mask = causal & attention_mask[:, None, None, :].bool() | own
+ mask = causal & attention_mask[:, None, past:, None].bool() | own

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="a causal mask aligned to the first key where there is padding" of="no-norm"
- causal, own = columns <= columns[past:, None], columns == columns[past:, None]
+ causal, own = columns <= columns[:seq, None], columns == columns[past:, None]

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="all blocks share one layer of the cache" of="no-norm"
- self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
+ self.blocks = nn.ModuleList(Block(config, 0) for layer in range(config.layers))

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="all blocks are one" of="no-norm"
- self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
+ self.blocks = nn.ModuleList([Block(config, 0)] * config.layers)

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="rope_theta of the config ignored" of="no-norm"
- columns[past:] if positions is None else positions,
- self.config.head_dim,
- self.config.rope_theta,
+ columns[past:] if positions is None else positions, self.config.head_dim

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="the cache is not handed on" of="no-norm"
-     x = block(x, cos, sin, mask, cache)
+     x = block(x, cos, sin, mask)
+ x = self.norm(x)

# %% wrong="llama" because="embeddings scaled by the root of their width, as in 2017" of="no-norm"
- x = self.embed(tokens)
+ x = self.embed(tokens) * self.config.hidden_size**0.5

      x = block(x, cos, sin, mask, cache)
+ x = self.norm(x)

# %% wrong="llama" because="probabilities, not logits" of="no-norm"
- return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ x = self.norm(x)
+ return (F.linear(x, self.embed.weight) if self.config.tied else self.head(x)).softmax(-1)

# %% right="llama" because="the mask always built, positions from a sum, a product for the tied head" of="no-norm"
- mask = None
- if attention_mask is not None:
-     causal, own = columns <= columns[past:, None], columns == columns[past:, None]
-     mask = causal & attention_mask[:, None, None, :].bool() | own
+ if attention_mask is None:
+     attention_mask = torch.ones(
+         len(tokens), past + seq, dtype=torch.bool, device=tokens.device
+     )
+ triangle = torch.ones(
+     past + seq, past + seq, dtype=torch.bool, device=tokens.device
+ ).tril()[past:]
+ mask = (triangle & attention_mask.bool()[:, None]) | torch.eye(
+     past + seq, dtype=torch.bool, device=tokens.device
+ )[past:]
+ mask = mask[:, None]

- return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ x = self.norm(x)
+ return x @ self.embed.weight.T if self.config.tied else self.head(x)

# %% wrong="llama" because="positions that are given are shifted by the cache once more"
- positions = columns[past:]
+ positions = columns[past:] - past

- cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
+ cos, sin = rotary_angles(positions + past, self.config.head_dim, self.config.rope_theta)

# %% wrong="llama" because="the logits are float32 whatever the weights are"
- return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ out = F.linear(x, self.embed.weight) if self.config.tied else self.head(x)
+ return out.float() if out.dtype in (torch.float16, torch.bfloat16) else out

# %% wrong="llama" because="with a mask the positions count real tokens only"
- positions = columns[past:]
+ positions = columns[past:]
+ if attention_mask is not None:
+     positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]

# %% wrong="llama_160m" because="tied"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(
    vocab_size=32_000,
    hidden_size=768,
    mlp_size=3072,
    layers=12,
    heads=12,
    kv_heads=12,
    eps=1e-6,
    tied=True,
)

# %% wrong="llama_160m" because="a vocabulary of 2^15" base="vocabulary"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(
    vocab_size=32_768, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6
)

# %% wrong="llama_160m" because="eps left at its default" of="vocabulary"
- vocab_size=32_768, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6
+ vocab_size=32_000, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12

# %% wrong="llama_160m" because="four key-value heads" of="vocabulary"
- vocab_size=32_768, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6
+ vocab_size=32_000, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=4, eps=1e-6

# %% wrong="llama_160m" because="LLaMA's rule for the inner width, 8/3" of="vocabulary"
- vocab_size=32_768, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6
+ vocab_size=32_000, hidden_size=768, mlp_size=2048, layers=12, heads=12, kv_heads=12, eps=1e-6

# %% wrong="llama_160m" because="a dict"
LLAMA_160M = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "mlp_size": 3072,
    "layers": 12,
    "heads": 12,
    "kv_heads": 12,
    "eps": 1e-6,
}

# %% right="llama_160m" because="by position"
LLAMA_160M = LlamaConfig(32_000, 768, 4 * 768, 12, 12, 12, False, 10_000.0, 1e-6)

# %% wrong="rename_state_dict" because="unexpected names are ignored" base="unexpected-names"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {
        name: tensor
        for name, tensor in hf_state.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError(
            "lm_head.weight differs from model.embed_tokens.weight: this model is not tied"
        )
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing:
        raise ValueError(
            f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
        )
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {
            f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight"
            for theirs, ours in inside.items()
        }
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing:
        raise ValueError(
            f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
        )
    return {theirs: state[ours] for ours, theirs in names.items()}

# %% wrong="rename_state_dict" because="missing names are ignored" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if unexpected:

- return {ours: given[theirs] for theirs, ours in names.items()}
+ return {ours: given[theirs] for theirs, ours in names.items() if theirs in given}

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if unexpected:

- return {theirs: state[ours] for ours, theirs in names.items()}
+ return {theirs: state[ours] for ours, theirs in names.items() if ours in state}

# %% wrong="rename_state_dict" because="a KeyError names the first missing one" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if unexpected:

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if unexpected:

# %% wrong="rename_state_dict" because="only the first missing name is reported" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:
      raise ValueError(
-         f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
+         f"missing: {missing[0] if missing else 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
      )
  return {ours: given[theirs] for theirs, ours in names.items()}

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:
      raise ValueError(
-         f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
+         f"missing: {missing[0] if missing else 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
      )
  return {theirs: state[ours] for ours, theirs in names.items()}

# %% wrong="rename_state_dict" because="only how many names do not fit" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
-     raise ValueError(
-         f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
-     )
+ if missing or unexpected:
+     raise ValueError(f"missing: {len(missing)}; unexpected: {len(unexpected)}")

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
-     raise ValueError(
-         f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}"
-     )
+ if missing or unexpected:
+     raise ValueError(f"missing: {len(missing)}; unexpected: {len(unexpected)}")

# %% wrong="rename_state_dict" because="gate and up exchanged" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

- inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
+ inside |= {"mlp.gate_proj": "mlp.up", "mlp.up_proj": "mlp.gate", "mlp.down_proj": "mlp.down"}

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="the two norms exchanged" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

- inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
+ inside = {"input_layernorm": "mlp_norm", "post_attention_layernorm": "attention_norm"}

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="a tied model that has lm_head.weight is refused" of="unexpected-names"
- head = given.pop("lm_head.weight", None) if config.tied else None
+ head = None

  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="a different head is dropped without a word" of="unexpected-names"
- if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
-     raise ValueError(
-         "lm_head.weight differs from model.embed_tokens.weight: this model is not tied"
-     )

  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="rotary tables of old files are refused" of="unexpected-names"
- given = {
-     name: tensor
-     for name, tensor in hf_state.items()
-     if not name.endswith("rotary_emb.inv_freq")
- }
+ given = dict(hf_state)

  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="the argument loses its head" of="unexpected-names"
- given = {
-     name: tensor
-     for name, tensor in hf_state.items()
-     if not name.endswith("rotary_emb.inv_freq")
- }
+ given = hf_state
+ for name in [n for n in given if n.endswith("rotary_emb.inv_freq")]:
+     given.pop(name)

  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

- return {ours: given[theirs] for theirs, ours in names.items()}
+ return {ours: given.pop(theirs) for theirs, ours in names.items()}

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="the tensors are copied" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

- return {ours: given[theirs] for theirs, ours in names.items()}
+ return {ours: given[theirs].clone() for theirs, ours in names.items()}

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

# %% wrong="rename_state_dict" because="a chain of replacements that meets norm everywhere"
def rename_state_dict(hf_state, config):
    renamed = {}
    for name, tensor in hf_state.items():
        if name.endswith("inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        for theirs, ours in (
            ("model.", ""),
            ("embed_tokens", "embed"),
            ("layers", "blocks"),
            ("self_attn", "attention"),
            ("_proj", ""),
            ("lm_head", "head"),
            ("layernorm", "norm"),
            ("input_norm", "attention_norm"),
            ("post_attention_norm", "mlp_norm"),
            ("post_attention", "mlp"),
        ):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def to_hugging_face(state, config):
    return {name.replace("blocks", "model.layers"): tensor for name, tensor in state.items()}

# %% wrong="rename_state_dict" because="the way back keeps a head for tied models" of="unexpected-names"
  missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
- if missing:
+ if missing or unexpected:

  missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
- if missing:
+ if missing or unexpected:

- return {theirs: state[ours] for ours, theirs in names.items()}
+ result = {theirs: state[ours] for ours, theirs in names.items()}
+ return result | {"lm_head.weight": state["embed.weight"]}

# %% right="rename_state_dict" because="one name at a time, by a regular expression"
import re

PARTS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def translated(name):
    if name in TOP:
        return TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return None
    part = PARTS.get(match[2]) or match[2].replace("self_attn", "attention").replace("_proj", "")
    return f"blocks.{match[1]}.{part}.weight"


def wanted(config):
    parts = [
        "attention_norm",
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
        "mlp_norm",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    ]
    names = ["embed.weight", "norm.weight"] + ([] if config.tied else ["head.weight"])
    return names + [f"blocks.{i}.{part}.weight" for i in range(config.layers) for part in parts]


def back(name):
    top = {ours: theirs for theirs, ours in TOP.items()}
    if name in top:
        return top[name]
    _, i, *part, _ = name.split(".")
    part = ".".join(part)
    norms = {ours: theirs for theirs, ours in PARTS.items()}
    return (
        f"model.layers.{i}."
        + (norms.get(part) or part.replace("attention", "self_attn") + "_proj")
        + ".weight"
    )


def complain(missing, unexpected):
    if missing or unexpected:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}")


def rename_state_dict(hf_state, config):
    result, unexpected = {}, []
    for name, tensor in hf_state.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if config.tied and name == "lm_head.weight":
            if "model.embed_tokens.weight" in hf_state and not torch.equal(
                tensor, hf_state["model.embed_tokens.weight"]
            ):
                raise ValueError("not tied")
            continue
        ours = translated(name)
        if ours in wanted(config):
            result[ours] = tensor
        else:
            unexpected.append(name)
    complain([back(name) for name in wanted(config) if name not in result], unexpected)
    return result


def to_hugging_face(state, config):
    complain(
        [name for name in wanted(config) if name not in state],
        [name for name in state if name not in wanted(config)],
    )
    return {back(name): tensor for name, tensor in state.items()}

# %% wrong="rename_state_dict" because="inv_freq is only known inside a layer"
- if not name.endswith("rotary_emb.inv_freq")
+ if not (name.startswith("model.layers.") and name.endswith(".self_attn.rotary_emb.inv_freq"))

# %% wrong="rename_state_dict" because="everything with rotary in its name is passed over"
- if not name.endswith("rotary_emb.inv_freq")
+ if "rotary" not in name

# %% wrong="rename_state_dict" because="a KeyError where a tied file has a head and no embedding"
- if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
+ if head is not None and not torch.equal(head, given["model.embed_tokens.weight"]):

# %% wrong="rename_state_dict" because="a tied head that is only close to the embedding passes"
- if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
+ if head is not None and not torch.allclose(head, given.get("model.embed_tokens.weight", head)):

# %% right="rename_state_dict" because="a helper called hf_names, a table called per_layer"
per_layer = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def hf_names(config):
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for i in range(config.layers):
        for theirs, ours in per_layer.items():
            names[f"model.layers.{i}.{theirs}.weight"] = f"blocks.{i}.{ours}.weight"
    return names


def renamed(state, expected_names):
    missing, unexpected = sorted(set(expected_names) - set(state)), sorted(set(state) - set(expected_names))
    if missing or unexpected:
        raise ValueError(f"missing: {missing}; unexpected: {unexpected}")
    return {new: state[old] for old, new in expected_names.items()}


def rename_state_dict(hf_state, config):
    state = {n: t for n, t in hf_state.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in state:
        head, embedding = state.pop("lm_head.weight"), state.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise ValueError("lm_head.weight is not the embedding: the model is not tied")
    return renamed(state, hf_names(config))


def to_hugging_face(state, config):
    return renamed(state, {ours: theirs for theirs, ours in hf_names(config).items()})

# %% wrong="sample" because="top_p ignored" base="top-p"
def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (
        (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
        or (min_p is not None and not 0 <= min_p <= 1)
    ):
        raise ValueError(
            f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if False:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(
            logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf
        )
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]

# %% wrong="sample" because="the token that crosses the threshold is dropped" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
+ drop = torch.zeros_like(before, dtype=torch.bool).scatter(
+     -1, order, (before + p > top_p) & (before > 0)
+ )

# %% wrong="sample" because="the token that crosses the threshold is dropped, nothing may be left" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
+ drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before + p > top_p)

# %% wrong="sample" because="top-p before the temperature" of="top-p"
- logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+ logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
+ warm = temperature

- if False:
+ if top_p is not None and top_p < 1:

      logits = logits.masked_fill(drop, -torch.inf)
+ logits = logits / warm

# %% wrong="sample" because="one too few in top-k" of="top-p"
- smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
+ smallest = logits.topk(max(1, min(top_k - 1, logits.shape[-1])), dim=-1).values[..., -1:]

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="one too many in top-k" of="top-p"
- smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
+ smallest = logits.topk(min(top_k + 1, logits.shape[-1]), dim=-1).values[..., -1:]

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="top_k larger than the vocabulary raises" of="top-p"
- smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
+ smallest = logits.topk(top_k, dim=-1).values[..., -1:]

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="ties at the edge of top-k are cut" of="top-p"
-     smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
-     logits = logits.masked_fill(logits < smallest, -torch.inf)
- if False:
+     best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices
+     logits = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="min_p as a probability, not as a share of the largest" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf
+ (logits.softmax(-1) < min_p) & (logits < logits.amax(-1, keepdim=True)), -torch.inf

# %% wrong="sample" because="min_p of the logits, not of the probabilities" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- logits = logits.masked_fill(
-     logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf
- )
+ logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) * min_p, -torch.inf)

# %% wrong="sample" because="min_p ignores the temperature" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf
+ logits < logits.amax(-1, keepdim=True) + math.log(min_p) / temperature, -torch.inf

# %% wrong="sample" because="the filters see the order, and the result stays sorted" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
+ drop = before >= top_p

# %% wrong="sample" because="top-p on probabilities before top-k" of="top-p"
  logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+ first = logits.softmax(-1)

- if False:
-     p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
+ if top_p is not None and top_p < 1:
+     p, order = first.sort(dim=-1, descending=True, stable=True)

# %% wrong="sample" because="multiplies by the temperature" of="top-p"
- logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+ logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * temperature

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="changes the logits in place" of="top-p"
- logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+ logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="bounds are not checked" of="top-p"
- (top_k is not None and top_k < 1)
+ False
+ and (top_k is not None and top_k < 1)

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="a negative temperature passes" of="top-p"
- if temperature <= 0:
+ if temperature == 0:

- if False:
+ if top_p is not None and top_p < 1:

# %% wrong="sample" because="always greedy" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- return torch.multinomial(p, 1, generator=generator)[:, 0]
+ return p.argmax(-1)

# %% wrong="sample" because="the generator is not used" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- return torch.multinomial(p, 1, generator=generator)[:, 0]
+ return torch.multinomial(p, 1)[:, 0]

# %% wrong="sample" because="one draw for all rows" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- return torch.multinomial(p, 1, generator=generator)[:, 0]
+ return torch.multinomial(p[:1], 1, generator=generator)[:, 0].expand(len(p))

# %% wrong="sample" because="temperature 0 divides by a small number and draws" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- if temperature == 0:
-     return logits.argmax(-1)
+ temperature = temperature or 1.0

# %% wrong="sample" because="keeps the axis of multinomial" of="top-p"
- if False:
+ if top_p is not None and top_p < 1:

- return torch.multinomial(p, 1, generator=generator)[:, 0]
+ return torch.multinomial(p, 1, generator=generator)

# %% right="sample" because="sorted upwards as in Hugging Face, Gumbel noise in place of multinomial" of="top-p"
- if False:
-     p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
-     before = p.cumsum(-1) - p
-     drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
+ if top_p is not None and top_p < 1:
+     up, order = logits.sort(dim=-1)
+     below = up.softmax(-1).cumsum(-1) <= 1 - top_p
+     below[..., -1] = False
+     drop = torch.zeros_like(below).scatter(-1, order, below)

- logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf
+ logits.softmax(-1) < min_p * logits.softmax(-1).amax(-1, keepdim=True), -torch.inf

- p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
- return torch.multinomial(p, 1, generator=generator)[:, 0]
+ kept = filter_logits(logits, temperature, top_k, top_p, min_p)
+ u = torch.rand(kept.shape, generator=generator, device=kept.device).clamp(1e-12)
+ return (kept - (-u.log()).log()).argmax(-1)

# %% wrong="sample" because="half-precision logits are divided in half precision"
- logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+ logits = (logits / temperature).to(torch.promote_types(logits.dtype, torch.float32))

# %% wrong="sample" because="bfloat16 logits are not widened"
- logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+ logits = (logits.float() if logits.dtype == torch.float16 else logits) / temperature

# %% wrong="sample" because="one token too many where top_p is met exactly"
- drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
+ drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)

# %% wrong="sample" because="a new generator from the first one's seed"
- return torch.multinomial(p, 1, generator=generator)[:, 0]
+ if generator is not None:
+     generator = torch.Generator(logits.device).manual_seed(generator.initial_seed())
+ return torch.multinomial(p, 1, generator=generator)[:, 0]

# %% wrong="sample" because="greedy draws all the same"
- return logits.argmax(-1)
+ torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
+ return logits.argmax(-1)

# %% wrong="generate" because="does not stop at eos"
- if token == eos:
-     running.discard(row)

# %% wrong="generate" because="ended rows go on until the last one has ended"
- if row in running:
+ if True:

# %% wrong="generate" because="all rows stop with the first"
- running.discard(row)
+ running.clear()

# %% wrong="generate" because="eos is not part of the text"
- written[row].append(token)

      running.discard(row)
+ else:
+     written[row].append(token)

# %% wrong="generate" because="the prompt is part of the result"
- return written
+ return [list(p) + w for p, w in zip(prompts, written)]

# %% wrong="generate" because="padding is attended to"
- logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
+ logits = model(tokens, cache=cache, attention_mask=None)[:, -1]

# %% wrong="generate" because="padding is attended to after the prompt"
      break
+ if len(cache):
+     real = torch.ones_like(real)

# %% wrong="generate" because="padded on the right"
- rows = [[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
+ rows = [list(prompt) + [0] * n for n, prompt in zip(padding, prompts, strict=True)]

- real = torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None]
+ lengths = [len(prompt) for prompt in prompts]
+ real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]

# %% wrong="generate" because="prompts begin at position 0, new tokens at the column"
- logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
+ logits = model(
+     tokens,
+     cache=cache,
+     attention_mask=real,
+     positions=None if len(cache) else (real.long().cumsum(1) - 1).clamp(min=0),
+ )[:, -1]

# %% wrong="generate" because="every new token stands at position 0"
- logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
+ logits = model(
+     tokens,
+     cache=cache,
+     attention_mask=real,
+     positions=torch.arange(tokens.shape[1], device=device),
+ )[:, -1]

# %% wrong="generate" because="no cache: the whole text each time"
- logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
- tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
+ logits = model(tokens, attention_mask=real)[:, -1]
+ tokens = torch.cat(
+     [tokens, sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]], 1
+ )

- for row, token in enumerate(tokens[:, 0].tolist()):
+ for row, token in enumerate(tokens[:, -1].tolist()):

# %% wrong="generate" because="the whole text each time although there is a cache"
- tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
- real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
- for row, token in enumerate(tokens[:, 0].tolist()):
+ tokens = torch.cat(
+     [tokens, sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]], 1
+ )
+ real = torch.cat([real, real.new_ones(len(prompts), tokens.shape[1])], dim=1)
+ for row, token in enumerate(tokens[:, -1].tolist()):

# %% wrong="generate" because="one prompt after the other"
- def generate(
+ def generate_batch(

      return written
+
+
+ def generate(model, prompts, max_new_tokens, *args, **kwargs):
+     return [generate_batch(model, [p], max_new_tokens, *args, **kwargs)[0] for p in prompts]

# %% wrong="generate" because="gradients are recorded"
- with torch.no_grad():
+ if True:

# %% wrong="generate" because="gradients stay switched off"
- with torch.no_grad():
+ torch.set_grad_enabled(False)
+ if True:

# %% wrong="generate" because="one call too many"
                      running.discard(row)
+ if max_new_tokens:
+     model(tokens, cache=cache, attention_mask=real)

# %% wrong="generate" because="an empty prompt is padded like any other"
- if not all(prompts):
+ if False:

# %% wrong="generate" because="always greedy"
- tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
+ tokens = logits.argmax(-1, keepdim=True)

# %% wrong="generate" because="the filters are not handed on"
- tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
+ tokens = sample(logits, temperature, generator=generator)[:, None]

# %% wrong="generate" because="an eos in the prompt ends the text"
- cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
+ cache, written, running = (
+     Cache(),
+     [[] for _ in prompts],
+     {i for i, p in enumerate(prompts) if eos not in p},
+ )

# %% wrong="generate" because="padding counts as eos 0"
- cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
+ cache, written, running = (
+     Cache(),
+     [[] for _ in prompts],
+     {i for i in range(len(prompts)) if int(tokens[i, 0]) != eos},
+ )

# %% right="generate" because="positions counted from each prompt, throughout"
- logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
+ logits = model(
+     tokens,
+     cache=cache,
+     attention_mask=real,
+     positions=(real.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
+ )[:, -1]

# %% right="generate" because="a tensor of all tokens, cut at the first eos"
@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    eos=None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    min_p=None,
    generator=None,
):
    if any(len(p) == 0 for p in prompts):
        raise ValueError("empty prompt")
    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    tokens = torch.ones(len(prompts), width, dtype=torch.long, device=device)
    real = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    for i, p in enumerate(prompts):
        tokens[i, width - len(p) :] = torch.tensor(p)
        real[i, width - len(p) :] = True
    cache, new = Cache(), tokens
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while tokens.shape[1] < width + max_new_tokens and not done.all():
        new = sample(
            model(new, cache=cache, attention_mask=real)[:, -1],
            temperature,
            top_k,
            top_p,
            min_p,
            generator,
        )[:, None]
        tokens, real = torch.cat([tokens, new], 1), F.pad(real, (0, 1), value=True)
        if eos is not None:
            done |= new[:, 0] == eos
    texts = tokens[:, width:].tolist()
    return [t[: t.index(eos) + 1] if eos in t else t for t in texts]

# %% wrong="generate" because="eos 0 is taken for none"
- if token == eos:
+ if eos and token == eos:

# %% wrong="generate" because="the generator begins anew at each token"
- cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
+ state = None if generator is None else generator.get_state()
+ cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))

- logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
+ logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
+ if state is not None:
+     generator.set_state(state)

# %% wrong="generate" because="ids are tensors"
- written[row].append(token)
+ written[row].append(tokens[row, 0])

# %% wrong="generate" because="the model is left in evaluation mode"
- device = next(model.parameters()).device
+ model.eval()
+ device = next(model.parameters()).device

# %% wrong="generate" because="the prompts grow"
- written[row].append(token)
+ written[row].append(token)
+ prompts[row].append(token)

# %% wrong="optimizer" because="everything decays" base="everything-decays"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[False]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))

# %% wrong="optimizer" because="embeddings decay" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[p.dim() < 2]["params"].append(p)

# %% wrong="optimizer" because="norms and biases decay" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[id(p) in embeddings]["params"].append(p)

# %% wrong="optimizer" because="embeddings found by name" of="everything-decays"
- for p in model.parameters():
+ for name, p in model.named_parameters():

- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or "embed" in name]["params"].append(p)

# %% wrong="optimizer" because="frozen parameters too" of="everything-decays"
- if p.requires_grad:
-     groups[False]["params"].append(p)
+ if True:
+     groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

# %% wrong="optimizer" because="a shared parameter comes twice" of="everything-decays"
- for p in model.parameters():
+ for _, p in model.named_parameters(remove_duplicate=False):

- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

# %% wrong="optimizer" because="the groups exchanged" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[not (p.dim() < 2 or id(p) in embeddings)]["params"].append(p)

# %% wrong="optimizer" because="warm-up begins at 0" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

- return options.learning_rate * (step + 1) / options.warmup
+ return options.learning_rate * step / options.warmup

# %% wrong="optimizer" because="the peak comes a step late" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

- progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
+ progress = (step - options.warmup) / (options.steps - options.warmup)

# %% wrong="optimizer" because="the lowest rate is never reached" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

- progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
+ progress = (step - options.warmup) / (options.steps - options.warmup + 1)

# %% wrong="optimizer" because="decays to 0" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

- return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))
+ return 0.5 * options.learning_rate * (1 + math.cos(math.pi * progress))

# %% wrong="optimizer" because="linear decay" of="everything-decays"
- groups[False]["params"].append(p)
+ groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)

- return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))
+ return options.min_learning_rate + swing * (1 - progress)

# %% right="optimizer" because="split by names of modules, cosine squared"
def parameter_groups(model, weight_decay):
    still = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    still |= {p for p in model.parameters() if p.ndim <= 1}
    free = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in free if p not in still], "weight_decay": weight_decay},
        {"params": [p for p in free if p in still], "weight_decay": 0.0},
    ]


def learning_rate(step, options):
    done = step + 1
    if done <= options.warmup:
        return options.learning_rate * done / options.warmup
    share = math.cos(math.pi / 2 * (done - options.warmup) / (options.steps - options.warmup)) ** 2
    return share * options.learning_rate + (1 - share) * options.min_learning_rate

# %% wrong="optimizer" because="a scalar decays"
- groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
+ groups[p.dim() == 1 or id(p) in embeddings]["params"].append(p)

# %% wrong="optimizer" because="only the names of norms and biases are spared"
def parameter_groups(model, weight_decay):
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decays, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            still = id(p) in tables or "norm" in name or name.endswith("bias")
            (rest if still else decays).append(p)
    return [
        {"params": decays, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def learning_rate(step, options):
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    share = (step - options.warmup + 1) / (options.steps - options.warmup)
    low, high = options.min_learning_rate, options.learning_rate
    return low + (high - low) * math.cos(math.pi / 2 * share) ** 2

# %% wrong="train" because="no clipping"
- torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)

# %% wrong="train" because="clips after the step"
- torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)

  optimizer.step()
+ torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)

# %% wrong="train" because="clips before the gradients are there"
  optimizer.zero_grad()
+ torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)

- torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)

# %% wrong="train" because="clips each element"
- torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
+ torch.nn.utils.clip_grad_value_(model.parameters(), options.clip)

# %% wrong="train" because="everything decays"
- groups = parameter_groups(model, options.weight_decay)
+ groups = [{"params": list(model.parameters()), "weight_decay": options.weight_decay}]

# %% wrong="train" because="L2 regularization in place of decoupled decay"
- optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas)
+ optimizer = torch.optim.Adam(groups, lr=options.learning_rate, betas=options.betas)

# %% wrong="train" because="the default betas"
- optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas)
+ optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)

# %% wrong="train" because="gradients are never set to zero"
- optimizer.zero_grad()

# %% wrong="train" because="the schedule is a step ahead"
- group["lr"] = learning_rate(step, options)
+ group["lr"] = learning_rate(step + 1, options)

# %% wrong="train" because="a constant rate"
- group["lr"] = learning_rate(step, options)
+ group["lr"] = options.learning_rate

# %% wrong="train" because="predicts the token itself"
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, :-1].flatten())

# %% wrong="train" because="predicts the token after the next" base="predicts-token"
def train(
    model: nn.Module,
    tokens: Tensor,
    options: TrainOptions,
    checkpoint: dict | None = None,
    until: int | None = None,
) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas
    )
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 2)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(
            max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
        )
        windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
        logits = model(windows[:, :-2])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {
        "step": max(start, end),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "order": order.get_state(),
        "random": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)

# %% wrong="train" because="windows shuffled: each token from anywhere" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[
+     torch.randint(len(tokens), (options.batch, options.context + 1), generator=order).to(
+         tokens.device
+     )
+ ].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="the last place is never read" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="windows one after the other from the beginning" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = (
+     (step * options.batch + torch.arange(options.batch)) % (len(tokens) - options.context)
+ )[:, None]
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="the order of the data comes from the default generator" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1))
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="resumed without the optimizer" of="predicts-token"
- optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="resumed without the order of the data" of="predicts-token"
- order.set_state(checkpoint["order"])

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="resumed without the default random numbers" of="predicts-token"
- torch.set_rng_state(checkpoint["random"])

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="resumed from step 0" of="predicts-token"
- start = checkpoint["step"]

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="resumed without the weights" of="predicts-token"
- model.load_state_dict(checkpoint["model"])

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="one step is repeated after resuming" of="predicts-token"
- start = checkpoint["step"]
+ start = max(0, checkpoint["step"] - 1)

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="the schedule starts anew after resuming" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

- group["lr"] = learning_rate(step, options)
+ group["lr"] = learning_rate(step - start, options)

# %% wrong="train" because="the checkpoint holds the live tensors" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

- return losses, copy.deepcopy(state)
+ return losses, state

# %% wrong="train" because="the resumed optimizer works in the tensors of the checkpoint" of="predicts-token"
- optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
+ optimizer.load_state_dict(checkpoint["optimizer"])
+ for p, old in zip(
+     [p for g in optimizer.param_groups for p in g["params"]],
+     checkpoint["optimizer"]["state"].values(),
+ ):
+     optimizer.state[p] = old

- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="the checkpoint holds the optimizer itself" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

  "optimizer": optimizer.state_dict(),
+ "object": optimizer,

# %% wrong="train" because="only the weights are saved in float16" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

- "model": model.state_dict(),
+ "model": {n: t.half() for n, t in model.state_dict().items()},

# %% wrong="train" because="until counts from the checkpoint" of="predicts-token"
- end = options.steps if until is None else min(until, options.steps)
- window = torch.arange(options.context + 2)
+ end = options.steps if until is None else min(start + until, options.steps)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

# %% wrong="train" because="the losses are tensors with a graph" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

- losses.append(loss.item())
+ losses.append(loss)

# %% wrong="train" because="the losses are added up over the run" of="predicts-token"
- window = torch.arange(options.context + 2)
+ window = torch.arange(options.context + 1)

- begin = torch.randint(
-     max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order
- )
- windows = tokens[(begin + window).clamp(max=len(tokens) - 1).to(tokens.device)].to(device)
- logits = model(windows[:, :-2])
- loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten())
+ begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
+ windows = tokens[(begin + window).to(tokens.device)].to(device)
+ logits = model(windows[:, :-1])
+ loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

- losses.append(loss.item())
+ losses.append(loss.item() + sum(losses[-1:]))

# %% right="train" because="the windows of a step from the seed and its number, states by hand"
def train(model, tokens, options, checkpoint=None, until=None):
    device = next(model.parameters()).device
    groups = parameter_groups(model, options.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=options.betas)
    checkpoint = copy.deepcopy(checkpoint) or {"step": 0}
    step = checkpoint["step"]
    if "weights" in checkpoint:
        with torch.no_grad():
            for p, old in zip([*model.parameters(), *model.buffers()], checkpoint["weights"]):
                p.copy_(old)
        optimizer.load_state_dict(checkpoint["adam"])
        torch.set_rng_state(checkpoint["random"])
    model.train()
    losses = []
    places = len(tokens) - options.context - 1 + 1
    while step < options.steps and (until is None or step < until):
        rate = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        dice = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        starts = (
            (torch.rand(options.batch, generator=dice, dtype=torch.float64) * places)
            .long()
            .tolist()
        )
        windows = torch.stack([tokens[s : s + options.context + 1] for s in starts]).to(device)
        log_p = model(windows[:, :-1]).log_softmax(-1)
        loss = -log_p.gather(-1, windows[:, 1:, None]).mean()
        for p in parameters:
            p.grad = None
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        if norm > options.clip:
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(options.clip / norm)
        optimizer.step()
        losses.append(float(loss))
        step += 1
    kept = {
        "step": step,
        "weights": [p.detach().clone() for p in (*model.parameters(), *model.buffers())],
        "adam": copy.deepcopy(optimizer.state_dict()),
        "random": torch.get_rng_state(),
    }
    return losses, kept

# %% wrong="train" because="gradients are set to zero after the step, so that stale ones count in the first"
- optimizer.zero_grad()
- loss.backward()
+ loss.backward()

- optimizer.step()
+ optimizer.step()
+ optimizer.zero_grad()

# %% wrong="train" because="a call that has nothing to do sets the step back"
- "step": max(start, end),
+ "step": end,

# %% wrong="train" because="the checkpoint lacks the model's buffers"
- model.load_state_dict(checkpoint["model"])
+ model.load_state_dict(checkpoint["model"], strict=False)

- "model": model.state_dict(),
+ "model": {name: p.detach() for name, p in model.named_parameters()},

# %% wrong="flops" because="the embedding counted as a product" base="embedding-counted"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = (
        config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size)
        + 2 * d * config.vocab_size
    )
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak

# %% wrong="flops" because="the head left out"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size)
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak

# %% wrong="flops" because="the head of a tied model left out" of="embedding-counted"
- products = (
-     config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size)
-     + 2 * d * config.vocab_size
+ products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + (
+     0 if config.tied else d * config.vocab_size

# %% wrong="flops" because="the forward pass alone" base="forward-pass"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = (
        config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    )
    return 2 * products + 4 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak

# %% wrong="flops" because="without the products of attention" of="forward-pass"
- return 2 * products + 4 * config.layers * seq * d
+ return 6 * products

# %% wrong="flops" because="only half of the scores" of="forward-pass"
- return 2 * products + 4 * config.layers * seq * d
+ return 6 * products + 6 * config.layers * seq * d

# %% wrong="flops" because="keys and values as wide as queries"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, d
    products = (
        config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    )
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak

# %% wrong="flops" because="MFU in percent" base="mfu-percent"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = (
        config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    )
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return 100 * tokens_per_second * flops_per_token(config, seq) / peak

# %% wrong="flops" because="MFU with 6 FLOPs per token" of="mfu-percent"
- return 100 * tokens_per_second * flops_per_token(config, seq) / peak
+ return tokens_per_second * 6 / peak

# %% right="flops" because="counted on the meta device"
def flops_per_token(config, seq):
    with torch.device("meta"):
        layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Linear(
                        config.hidden_size,
                        (config.heads + 2 * config.kv_heads) * config.head_dim,
                        bias=False,
                    ),
                    nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False),
                    nn.Linear(config.hidden_size, 3 * config.mlp_size, bias=False),
                ]
            )
            for _ in range(config.layers)
        )
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    weights = sum(p.numel() for p in layers.parameters()) + head.weight.numel()
    attention = 2 * config.heads * seq * config.head_dim * config.layers
    return 3 * 2 * (weights + attention)


def mfu(tokens_per_second, config, seq, peak):
    return flops_per_token(config, seq) / (peak / tokens_per_second)

# %% wrong="questions" because="top_p: no temperature"
- "top_p": sharpened[1] / (sharpened[0] + sharpened[1]),
+ "top_p": 0.3 / 0.8,

# %% wrong="questions" because="top_p: not renormalized"
- "top_p": sharpened[1] / (sharpened[0] + sharpened[1]),
+ "top_p": 0.09 / 0.365,

# %% wrong="questions" because="top_p: the crossing token dropped"
- "top_p": sharpened[1] / (sharpened[0] + sharpened[1]),
+ "top_p": 0.0,

# %% wrong="questions" because="prefill: what goes through without a cache"
- "prefill": sum(500 + i for i in range(100)) - (500 + 99),
+ "prefill": 54_950,

# %% wrong="questions" because="prefill: the last token fed back"
- "prefill": sum(500 + i for i in range(100)) - (500 + 99),
+ "prefill": 54_450,

# %% wrong="questions" because="prefill: the prompt alone"
- "prefill": sum(500 + i for i in range(100)) - (500 + 99),
+ "prefill": 500 * 99,

# %% wrong="questions" because="prefill: a float"
- "prefill": sum(500 + i for i in range(100)) - (500 + 99),
+ "prefill": 54_351.0,

# %% wrong="questions" because="mfu: no attention"
- "mfu": 100 * 400_000 * (6 * products + 12 * 12 * 1024 * 768) / 989e12,
+ "mfu": 33.4,

# %% wrong="questions" because="mfu: a share"
- "mfu": 100 * 400_000 * (6 * products + 12 * 12 * 1024 * 768) / 989e12,
+ "mfu": 0.38,

# %% wrong="questions" because="mfu: the embedding counted"
- "mfu": 100 * 400_000 * (6 * products + 12 * 12 * 1024 * 768) / 989e12,
+ "mfu": 44.0,

# %% wrong="questions" because="padding: worse with padding"
- "padding": "a",
+ "padding": "b",

# %% wrong="questions" because="padding: different afterwards"
- "padding": "a",
+ "padding": "c",

# %% wrong="questions" because="padding: upper case"
- "padding": "a",
+ "padding": "A",

# %% right="questions" because="by number, a closed form, and with what was built"
def questions():
    return {
        "padding": "a",
        "mfu": 100 * mfu(400_000, LLAMA_160M, 1024, 989e12),
        "top_p": 0.2647,
        "prefill": 100 * 500 + 100 * 99 // 2 - 599,
    }
