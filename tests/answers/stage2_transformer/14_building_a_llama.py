# Right and wrong answers to the exercises of lesson 14: see CONTRIBUTING.md.


# %% wrong="rms_norm" because="eps outside the root"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="the mean is subtracted"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide - wide.mean(-1, keepdim=True)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="the sum of squares, not their mean"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="computed in the format of the input, inf in float16"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(x.dtype)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="always computed in float32, also for float64"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="float32 out, whatever came in"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight)


# %% wrong="rms_norm" because="no weight"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


# %% wrong="rms_norm" because="the weight is a buffer, not a parameter"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="normalizes over all axes but the first"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(tuple(range(1, x.dim())) or -1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


# %% wrong="rms_norm" because="PyTorch's own"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


# %% right="rms_norm" because="the vector norm, the weight after the cast back"
class RMSNorm(nn.Module):

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        root = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / x.shape[-1] + self.eps).sqrt()
        return self.weight * (wide / root).to(x.dtype)


# %% wrong="rotary" because="interleaved pairs"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide)[..., 0::2], x.to(wide)[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


# %% wrong="rotary" because="turned clockwise"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


# %% wrong="rotary" because="the sign lost: a reflection, not a turn"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# %% wrong="rotary" because="exponents i/head_dim"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
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


# %% wrong="rotary" because="angles formed in float32"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.double().cos(), angles.double().sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# %% wrong="rotary" because="positions counted from 1"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = (positions.double()[..., None] + 1) * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# %% wrong="rotary" because="theta ignored"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * 10_000.0**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# %% wrong="rotary" because="no axis for the heads where each row has its own positions"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# %% wrong="rotary" because="float32 out, whatever came in"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# %% wrong="rotary" because="float64 out for float32 inputs"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.float64
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# %% wrong="rotary" because="turns x in place"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    half = x.shape[-1] // 2
    with torch.no_grad():
        first = x[..., :half].clone()
        x[..., :half] = first * cos - x[..., half:] * sin
        x[..., half:] = x[..., half:] * cos + first * sin
    return x


# %% right="rotary" because="rotate_half, as in Hugging Face"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
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


# %% right="rotary" because="complex numbers"
def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = torch.complex(*x.to(wide).chunk(2, dim=-1)) * torch.complex(cos.to(wide), sin.to(wide))
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


# %% wrong="attention" because="the causal mask is aligned to the first key"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril()
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="is_causal whatever the cache holds"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        causal = mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="no mask for several tokens after a cache"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        causal = mask is None and q_len == k_len
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="no causal mask"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="heads repeated in blocks: 0, 1, 0, 1"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k.repeat(1, q.shape[1] // k.shape[1], 1, 1), v.repeat(1, q.shape[1] // v.shape[1], 1, 1), attn_mask=mask, is_causal=causal)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="the mask is ignored"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="keys are not turned"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q = apply_rotary(q, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="values are turned too"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k, v = (apply_rotary(t, cos, sin) for t in (q, k, v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="keys cached before they are turned, all turned by the angles of the new tokens"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q = apply_rotary(q, cos, sin)
        new = apply_rotary(k[:, :, -x.shape[1]:], cos, sin)
        k = torch.cat([k[:, :, :-x.shape[1]], new], 2)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="the cache is read but every layer writes to layer 0"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(0, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="caches the repeated heads"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="joined without transposing back"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.reshape(*x.shape[:2], -1))


# %% wrong="attention" because="with biases"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=True)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=True)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=True)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="attention" because="features dealt out to the heads in turn"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (self.head_dim, -1)).permute(0, 3, 1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None and 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        causal = mask is None and q_len > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% right="attention" because="repeat_interleave, softmax by hand, the mask by comparing positions"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None:
            at = torch.arange(k_len, device=x.device)
            mask = at <= at[k_len - q_len:, None]
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = q @ k.mT / math.sqrt(self.head_dim)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(-2))


# %% right="attention" because="groups as further rows"
class Attention(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q, self.k, self.v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        if mask is None:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=x.device).tril(k_len - q_len)
        stacked = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
        scores = (stacked @ k.mT / math.sqrt(self.head_dim)).view(*q.shape[:3], k_len)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        out = (weights.view(*stacked.shape[:3], k_len) @ v).view(q.shape)
        return self.o(out.transpose(1, 2).flatten(-2))


# %% wrong="block" because="gate and up exchanged"
class MLP(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)) * self.gate(x))


class Block(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="GELU in place of SiLU"
class MLP(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class Block(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="sigmoid in place of SiLU (GLU)"
class MLP(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Block(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="no up branch"
class MLP(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) + 0 * self.up(x))


class Block(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="both branches read the same stream"
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return x + self.attention(self.attention_norm(x), cos, sin, mask, cache) + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="norms after the sums (post-norm)"
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.attention_norm(x + self.attention(x, cos, sin, mask, cache))
        return self.mlp_norm(x + self.mlp(x))


# %% wrong="block" because="no residual around the MLP"
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return self.mlp(self.mlp_norm(x))


# %% wrong="block" because="the cache is not handed on"
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="the mask is not handed on"
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, None, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="eps of the config ignored"
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
        self.attention_norm = RMSNorm(config.hidden_size)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="block" because="the residual starts after the norm"
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.attention_norm(x)
        x = x + self.attention(x, cos, sin, mask, cache)
        x = self.mlp_norm(x)
        return x + self.mlp(x)


# %% right="block" because="PyTorch's RMSNorm, SiLU written out"
class MLP(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(gate) * self.up(x))


class Block(nn.Module):

    def __init__(self, config: LlamaConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


# %% wrong="llama" because="no norm before the head"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="positions ignore the cache"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[:seq] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="the length of the cache read after the blocks have begun"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            at = torch.arange(seq, device=tokens.device) + (len(cache) if cache is not None else 0)
            cos, sin = rotary_angles(at if positions is None else positions, self.config.head_dim, self.config.rope_theta)
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="positions given are ignored"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:], self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="the tied head is a copy"
class Llama(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight.data.copy_(self.embed.weight.data)
        initialize(self, config.layers)

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return self.head(x)


# %% wrong="llama" because="tied is ignored"
class Llama(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.layers)

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return self.head(x)


# %% wrong="llama" because="the tied head is detached"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight.detach()) if self.config.tied else self.head(x)


# %% wrong="llama" because="padding is attended to"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal.expand(len(tokens), 1, -1, -1) | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="a row of padding sees nothing"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        if mask is not None:
            x = x.masked_fill(~mask.any(-1)[:, 0, :, None], torch.nan)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="with an attention mask nothing is causal"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="the attention mask hides the queries, not the keys"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, past:, None].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="a causal mask aligned to the first key where there is padding"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[:seq, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="all blocks share one layer of the cache"
class Llama(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, 0) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        if not config.tied:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.layers)

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="all blocks are one"
class Llama(nn.Module):

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, 0)] * config.layers)
        self.norm = RMSNorm(config.hidden_size, config.eps)
        if not config.tied:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.layers)

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="rope_theta of the config ignored"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="the cache is not handed on"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="embeddings scaled by the root of their width, as in 2017"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens) * self.config.hidden_size**0.5
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tied else self.head(x)


# %% wrong="llama" because="probabilities, not logits"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            causal, own = columns <= columns[past:, None], columns == columns[past:, None]
            mask = causal & attention_mask[:, None, None, :].bool() | own
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return (F.linear(x, self.embed.weight) if self.config.tied else self.head(x)).softmax(-1)


# %% right="llama" because="the mask always built, positions from a sum, a product for the tied head"
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        past, seq = len(cache) if cache is not None else 0, tokens.shape[1]
        columns = torch.arange(past + seq, device=tokens.device)
        cos, sin = rotary_angles(columns[past:] if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        if attention_mask is None:
            attention_mask = torch.ones(len(tokens), past + seq, dtype=torch.bool, device=tokens.device)
        triangle = torch.ones(past + seq, past + seq, dtype=torch.bool, device=tokens.device).tril()[past:]
        mask = (triangle & attention_mask.bool()[:, None]) | torch.eye(past + seq, dtype=torch.bool, device=tokens.device)[past:]
        mask = mask[:, None]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        x = self.norm(x)
        return x @ self.embed.weight.T if self.config.tied else self.head(x)


# %% wrong="llama_160m" because="tied"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(vocab_size=32_000, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6, tied=True)


# %% wrong="llama_160m" because="a vocabulary of 2^15"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(vocab_size=32_768, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12, eps=1e-6)


# %% wrong="llama_160m" because="eps left at its default"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(vocab_size=32_000, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=12)


# %% wrong="llama_160m" because="four key-value heads"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(vocab_size=32_000, hidden_size=768, mlp_size=3072, layers=12, heads=12, kv_heads=4, eps=1e-6)


# %% wrong="llama_160m" because="LLaMA's rule for the inner width, 8/3"
# Width 768, SwiGLU 3072, 12 layers, 12 heads, none of them shared, a vocabulary of 32,000, head and embedding apart, eps 1e-6.
LLAMA_160M = LlamaConfig(vocab_size=32_000, hidden_size=768, mlp_size=2048, layers=12, heads=12, kv_heads=12, eps=1e-6)


# %% wrong="llama_160m" because="a dict"
LLAMA_160M = {"vocab_size": 32_000, "hidden_size": 768, "mlp_size": 3072, "layers": 12, "heads": 12, "kv_heads": 12, "eps": 1e-6}


# %% right="llama_160m" because="by position"
LLAMA_160M = LlamaConfig(32_000, 768, 4 * 768, 12, 12, 12, False, 10_000.0, 1e-6)


# %% wrong="rename_state_dict" because="unexpected names are ignored"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="missing names are ignored"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items() if theirs in given}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items() if ours in state}


# %% wrong="rename_state_dict" because="a KeyError names the first missing one"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="only the first missing name is reported"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {missing[0] if missing else 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {missing[0] if missing else 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="only how many names do not fit"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {len(missing)}; unexpected: {len(unexpected)}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {len(missing)}; unexpected: {len(unexpected)}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="gate and up exchanged"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {"mlp.gate_proj": "mlp.up", "mlp.up_proj": "mlp.gate", "mlp.down_proj": "mlp.down"}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="the two norms exchanged"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "mlp_norm", "post_attention_layernorm": "attention_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="a tied model that has lm_head.weight is refused"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="a different head is dropped without a word"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="rotary tables of old files are refused"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = dict(hf_state)
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="the argument loses its head"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = hf_state
    for name in [n for n in given if n.endswith("rotary_emb.inv_freq")]:
        given.pop(name)
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given.pop(theirs) for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="the tensors are copied"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs].clone() for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {theirs: state[ours] for ours, theirs in names.items()}


# %% wrong="rename_state_dict" because="a chain of replacements that meets norm everywhere"
def rename_state_dict(hf_state, config):
    renamed = {}
    for name, tensor in hf_state.items():
        if name.endswith("inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        for theirs, ours in (("model.", ""), ("embed_tokens", "embed"), ("layers", "blocks"), ("self_attn", "attention"), ("_proj", ""), ("lm_head", "head"),
                             ("layernorm", "norm"), ("input_norm", "attention_norm"), ("post_attention_norm", "mlp_norm"), ("post_attention", "mlp")):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def to_hugging_face(state, config):
    return {name.replace("blocks", "model.layers"): tensor for name, tensor in state.items()}


# %% wrong="rename_state_dict" because="the way back keeps a head for tied models"
def rename_state_dict(hf_state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in hf_state.items() if not name.endswith("rotary_emb.inv_freq")}
    head = given.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, given.get("model.embed_tokens.weight", head)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: this model is not tied")
    names = hugging_face_names(config)
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    return {ours: given[theirs] for theirs, ours in names.items()}


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    inside = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    inside |= {f"self_attn.{p}_proj": f"attention.{p}" for p in ("q", "k", "v", "o")}
    inside |= {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    if not config.tied:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.layers):
        names |= {f"model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.weight" for theirs, ours in inside.items()}
    return names


def to_hugging_face(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in hugging_face_names(config).items()}
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unexpected: {', '.join(unexpected) or 'nothing'}")
    result = {theirs: state[ours] for ours, theirs in names.items()}
    return result | {"lm_head.weight": state["embed.weight"]}


# %% right="rename_state_dict" because="one name at a time, by a regular expression"
import re

PARTS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
TOP = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"}


def translated(name):
    if name in TOP:
        return TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return None
    part = PARTS.get(match[2]) or match[2].replace("self_attn", "attention").replace("_proj", "")
    return f"blocks.{match[1]}.{part}.weight"


def wanted(config):
    parts = ["attention_norm", "attention.q", "attention.k", "attention.v", "attention.o", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down"]
    names = ["embed.weight", "norm.weight"] + ([] if config.tied else ["head.weight"])
    return names + [f"blocks.{i}.{part}.weight" for i in range(config.layers) for part in parts]


def back(name):
    top = {ours: theirs for theirs, ours in TOP.items()}
    if name in top:
        return top[name]
    _, i, *part, _ = name.split(".")
    part = ".".join(part)
    norms = {ours: theirs for theirs, ours in PARTS.items()}
    return f"model.layers.{i}." + (norms.get(part) or part.replace("attention", "self_attn") + "_proj") + ".weight"


def complain(missing, unexpected):
    if missing or unexpected:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}")


def rename_state_dict(hf_state, config):
    result, unexpected = {}, []
    for name, tensor in hf_state.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if config.tied and name == "lm_head.weight":
            if "model.embed_tokens.weight" in hf_state and not torch.equal(tensor, hf_state["model.embed_tokens.weight"]):
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
    complain([name for name in wanted(config) if name not in state], [name for name in state if name not in wanted(config)])
    return {back(name): tensor for name, tensor in state.items()}


# %% wrong="sample" because="top_p ignored"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
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
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="the token that crosses the threshold is dropped"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, (before + p > top_p) & (before > 0))
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="the token that crosses the threshold is dropped, nothing may be left"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before + p > top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="top-p before the temperature"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    warm = temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    logits = logits / warm
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="one too few in top-k"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(max(1, min(top_k - 1, logits.shape[-1])), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="one too many in top-k"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k + 1, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="top_k larger than the vocabulary raises"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="ties at the edge of top-k are cut"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="min_p as a probability, not as a share of the largest"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill((logits.softmax(-1) < min_p) & (logits < logits.amax(-1, keepdim=True)), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="min_p of the logits, not of the probabilities"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) * min_p, -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="min_p ignores the temperature"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p) / temperature, -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="the filters see the order, and the result stays sorted"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = before >= top_p
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="top-p on probabilities before top-k"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    first = logits.softmax(-1)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = first.sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="multiplies by the temperature"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="changes the logits in place"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="bounds are not checked"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if False and (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="a negative temperature passes"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature == 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="always greedy"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return p.argmax(-1)


# %% wrong="sample" because="the generator is not used"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1)[:, 0]


# %% wrong="sample" because="one draw for all rows"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p[:1], 1, generator=generator)[:, 0].expand(len(p))


# %% wrong="sample" because="temperature 0 divides by a small number and draws"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    temperature = temperature or 1.0
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# %% wrong="sample" because="keeps the axis of multinomial"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)


# %% right="sample" because="sorted upwards as in Hugging Face, Gumbel noise in place of multinomial"
def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                  min_p: float | None = None) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1) or (min_p is not None and not 0 <= min_p <= 1):
        raise ValueError(f"top_k ≥ 1, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1 are needed; given are {top_k}, {top_p}, {min_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        up, order = logits.sort(dim=-1)
        below = up.softmax(-1).cumsum(-1) <= 1 - top_p
        below[..., -1] = False
        drop = torch.zeros_like(below).scatter(-1, order, below)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits.softmax(-1) < min_p * logits.softmax(-1).amax(-1, keepdim=True), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    u = torch.rand(kept.shape, generator=generator, device=kept.device).clamp(1e-12)
    return (kept - (-u.log()).log()).argmax(-1)


# %% wrong="generate" because="does not stop at eos"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
    return written


# %% wrong="generate" because="ended rows go on until the last one has ended"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if True:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="all rows stop with the first"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.clear()
    return written


# %% wrong="generate" because="eos is not part of the text"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    if token == eos:
                        running.discard(row)
                    else:
                        written[row].append(token)
    return written


# %% wrong="generate" because="the prompt is part of the result"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return [list(p) + w for p, w in zip(prompts, written)]


# %% wrong="generate" because="padding is attended to"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=None)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="padding is attended to after the prompt"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            if len(cache):
                real = torch.ones_like(real)
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="padded on the right"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([list(p) + [0] * (longest - len(p)) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[True] * len(p) + [False] * (longest - len(p)) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="prompts begin at position 0, new tokens at the column"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real, positions=None if len(cache) else (real.long().cumsum(1) - 1).clamp(min=0))[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="every new token stands at position 0"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real, positions=torch.arange(tokens.shape[1], device=device))[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="no cache: the whole text each time"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, attention_mask=real)[:, -1]
            tokens = torch.cat([tokens, sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]], 1)
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, -1].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="the whole text each time although there is a cache"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = torch.cat([tokens, sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]], 1)
            real = torch.cat([real, real.new_ones(len(prompts), tokens.shape[1])], dim=1)
            for row, token in enumerate(tokens[:, -1].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="one prompt after the other"
def generate_batch(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


def generate(model, prompts, max_new_tokens, *args, **kwargs):
    return [generate_batch(model, [p], max_new_tokens, *args, **kwargs)[0] for p in prompts]


# %% wrong="generate" because="gradients are recorded"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    if True:
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="gradients stay switched off"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    torch.set_grad_enabled(False)
    if True:
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="one call too many"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    if max_new_tokens:
        model(tokens, cache=cache, attention_mask=real)
    return written


# %% wrong="generate" because="an empty prompt is padded like any other"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if False:
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="always greedy"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="the filters are not handed on"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, generator=generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="an eos in the prompt ends the text"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], {i for i, p in enumerate(prompts) if eos not in p}
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% wrong="generate" because="padding counts as eos 0"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], {i for i in range(len(prompts)) if int(tokens[i, 0]) != eos}
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real)[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% right="generate" because="positions counted from each prompt, throughout"
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token")
    device = next(model.parameters()).device
    longest = max(map(len, prompts), default=0)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool, device=device)
    cache, written, running = Cache(), [[] for _ in prompts], set(range(len(prompts)))
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if not running:
                break
            logits = model(tokens, cache=cache, attention_mask=real, positions=(real.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1]:])[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)[:, None]
            real = torch.cat([real, real.new_ones(len(prompts), 1)], dim=1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in running:
                    written[row].append(token)
                    if token == eos:
                        running.discard(row)
    return written


# %% right="generate" because="a tensor of all tokens, cut at the first eos"
@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos=None, temperature=0.0, top_k=None, top_p=None, min_p=None, generator=None):
    if any(len(p) == 0 for p in prompts):
        raise ValueError("empty prompt")
    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    tokens = torch.ones(len(prompts), width, dtype=torch.long, device=device)
    real = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    for i, p in enumerate(prompts):
        tokens[i, width - len(p):] = torch.tensor(p)
        real[i, width - len(p):] = True
    cache, new = Cache(), tokens
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while tokens.shape[1] < width + max_new_tokens and not done.all():
        new = sample(model(new, cache=cache, attention_mask=real)[:, -1], temperature, top_k, top_p, min_p, generator)[:, None]
        tokens, real = torch.cat([tokens, new], 1), F.pad(real, (0, 1), value=True)
        if eos is not None:
            done |= new[:, 0] == eos
    texts = tokens[:, width:].tolist()
    return [t[:t.index(eos) + 1] if eos in t else t for t in texts]


# %% wrong="optimizer" because="everything decays"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
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


# %% wrong="optimizer" because="embeddings decay"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[p.dim() < 2]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="norms and biases decay"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="embeddings found by name"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() < 2 or "embed" in name]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="frozen parameters too"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if True:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="a shared parameter comes twice"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for _, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="the groups exchanged"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[not (p.dim() < 2 or id(p) in embeddings)]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="warm-up begins at 0"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * step / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="the peak comes a step late"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="the lowest rate is never reached"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / (options.steps - options.warmup + 1)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="decays to 0"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return 0.5 * options.learning_rate * (1 + math.cos(math.pi * progress))


# %% wrong="optimizer" because="linear decay"
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad:
            groups[p.dim() < 2 or id(p) in embeddings]["params"].append(p)
    return groups


def learning_rate(step: int, options: TrainOptions) -> float:
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - (options.warmup - 1)) / (options.steps - options.warmup)
    swing = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + swing * (1 - progress)


# %% right="optimizer" because="split by names of modules, cosine squared"
def parameter_groups(model, weight_decay):
    still = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    still |= {p for p in model.parameters() if p.ndim <= 1}
    free = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in free if p not in still], "weight_decay": weight_decay},
            {"params": [p for p in free if p in still], "weight_decay": 0.0}]


def learning_rate(step, options):
    done = step + 1
    if done <= options.warmup:
        return options.learning_rate * done / options.warmup
    share = math.cos(math.pi / 2 * (done - options.warmup) / (options.steps - options.warmup)) ** 2
    return share * options.learning_rate + (1 - share) * options.min_learning_rate


# %% wrong="train" because="no clipping"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="clips after the step"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="clips before the gradients are there"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="clips each element"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="everything decays"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=options.weight_decay, lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="L2 regularization in place of decoupled decay"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the default betas"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="gradients are never set to zero"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the schedule is a step ahead"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="a constant rate"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="predicts the token itself"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="predicts the token after the next"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
        begin = torch.randint(max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order)
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
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="windows shuffled: each token from anywhere"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[torch.randint(len(tokens), (options.batch, options.context + 1), generator=order).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the last place is never read"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(max(1, len(tokens) - options.context - 1), (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="windows one after the other from the beginning"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = ((step * options.batch + torch.arange(options.batch)) % (len(tokens) - options.context))[:, None]
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the order of the data comes from the default generator"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1))
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="resumed without the optimizer"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="resumed without the order of the data"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="resumed without the default random numbers"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        order.set_state(checkpoint["order"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="resumed from step 0"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="resumed without the weights"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="one step is repeated after resuming"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = max(0, checkpoint["step"] - 1)
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the schedule starts anew after resuming"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - start, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the checkpoint holds the live tensors"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, state


# %% wrong="train" because="the resumed optimizer works in the tensors of the checkpoint"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
    order = torch.Generator().manual_seed(options.seed)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for p, old in zip([p for g in optimizer.param_groups for p in g["params"]], checkpoint["optimizer"]["state"].values()):
            optimizer.state[p] = old
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_device"], device)
        start = checkpoint["step"]
    end = options.steps if until is None else min(until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the checkpoint holds the optimizer itself"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(), "object": optimizer,
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="only the weights are saved in float16"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": {n: t.half() for n, t in model.state_dict().items()}, "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="until counts from the checkpoint"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    end = options.steps if until is None else min(start + until, options.steps)
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item())
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the losses are tensors with a graph"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss)
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


# %% wrong="train" because="the losses are added up over the run"
def train(model: nn.Module, tokens: Tensor, options: TrainOptions, checkpoint: dict | None = None,
          until: int | None = None) -> tuple[list[float], dict]:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas)
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
    window = torch.arange(options.context + 1)
    model.train()
    losses = []
    for step in range(start, end):
        begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=order)
        windows = tokens[(begin + window).to(tokens.device)].to(device)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        losses.append(loss.item() + sum(losses[-1:]))
    state = {"step": max(start, end), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "order": order.get_state(), "random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_device"] = torch.cuda.get_rng_state(device)
    return losses, copy.deepcopy(state)


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
            for p, old in zip(model.parameters(), checkpoint["weights"]):
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
        starts = (torch.rand(options.batch, generator=dice, dtype=torch.float64) * places).long().tolist()
        windows = torch.stack([tokens[s:s + options.context + 1] for s in starts]).to(device)
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
    kept = {"step": step, "weights": [p.detach().clone() for p in model.parameters()],
            "adam": copy.deepcopy(optimizer.state_dict()), "random": torch.get_rng_state()}
    return losses, kept


# %% wrong="flops" because="the embedding counted as a product"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + 2 * d * config.vocab_size
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


# %% wrong="flops" because="the head of a tied model left out"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + (0 if config.tied else d * config.vocab_size)
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak


# %% wrong="flops" because="the forward pass alone"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    return 2 * products + 4 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak


# %% wrong="flops" because="without the products of attention"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    return 6 * products


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak


# %% wrong="flops" because="only half of the scores"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    return 6 * products + 6 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak


# %% wrong="flops" because="keys and values as wide as queries"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, d
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * flops_per_token(config, seq) / peak


# %% wrong="flops" because="MFU in percent"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return 100 * tokens_per_second * flops_per_token(config, seq) / peak


# %% wrong="flops" because="MFU with 6 FLOPs per token"
def flops_per_token(config: LlamaConfig, seq: int) -> int:
    d, kv = config.hidden_size, config.kv_heads * config.head_dim
    products = config.layers * (2 * d * d + 2 * d * kv + 3 * d * config.mlp_size) + d * config.vocab_size
    return 6 * products + 12 * config.layers * seq * d


def mfu(tokens_per_second: float, config: LlamaConfig, seq: int, peak: float) -> float:
    return tokens_per_second * 6 / peak


# %% right="flops" because="counted on the meta device"
def flops_per_token(config, seq):
    with torch.device("meta"):
        layers = nn.ModuleList(nn.ModuleList([nn.Linear(config.hidden_size, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False),
                                              nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False),
                                              nn.Linear(config.hidden_size, 3 * config.mlp_size, bias=False)]) for _ in range(config.layers))
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    weights = sum(p.numel() for p in layers.parameters()) + head.weight.numel()
    attention = 2 * config.heads * seq * config.head_dim * config.layers
    return 3 * 2 * (weights + attention)


def mfu(tokens_per_second, config, seq, peak):
    return flops_per_token(config, seq) / (peak / tokens_per_second)


# %% wrong="question_top_p" because="no temperature"
def question_top_p():
    return 0.3 / 0.8


# %% wrong="question_top_p" because="not renormalized"
def question_top_p():
    return 0.09 / 0.365


# %% wrong="question_top_p" because="the crossing token dropped"
def question_top_p():
    return 0.0


# %% right="question_top_p" because="by number"
def question_top_p():
    return 0.2647


# %% wrong="question_prefill" because="what goes through without a cache"
def question_prefill():
    return 54_950


# %% wrong="question_prefill" because="the last token fed back"
def question_prefill():
    return 54_450


# %% wrong="question_prefill" because="the prompt alone"
def question_prefill():
    return 500 * 99


# %% right="question_prefill" because="a closed form"
def question_prefill():
    return 100 * 500 + 100 * 99 // 2 - 599


# %% wrong="question_mfu" because="no attention"
def question_mfu():
    return 33.4


# %% wrong="question_mfu" because="a share"
def question_mfu():
    return 0.38


# %% wrong="question_mfu" because="the embedding counted"
def question_mfu():
    return 44.0


# %% right="question_mfu" because="with what was built"
def question_mfu():
    return 100 * mfu(400_000, LLAMA_160M, 1024, 989e12)


# %% wrong="question_padding" because="worse with padding"
def question_padding():
    return "b"


# %% wrong="question_padding" because="different afterwards"
def question_padding():
    return "c"


# %% wrong="question_padding" because="upper case"
def question_padding():
    return "A"


# %% right="question_padding" because="in single quotes"
def question_padding():
    return 'a'
