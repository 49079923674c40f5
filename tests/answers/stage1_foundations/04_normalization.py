# %% wrong="layer_norm" because="the unbiased variance, which divides by D - 1" base="unbiased-variance"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)

# %% wrong="layer_norm" because="eps outside the root" of="unbiased-variance"
- y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True) + eps).sqrt()
+ y = (wide - wide.mean(-1, keepdim=True)) / (wide.std(-1, correction=0, keepdim=True) + eps)

# %% wrong="layer_norm" because="stays in half precision"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

# %% wrong="layer_norm" because="mean of squares minus square of the mean" of="unbiased-variance"
- y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True) + eps).sqrt()
+ mean = wide.mean(-1, keepdim=True)
+ variance = wide.square().mean(-1, keepdim=True) - mean.square()
+ y = (wide - mean) / (variance.clamp_min(0) + eps).sqrt()

# %% wrong="layer_norm" because="PyTorch's own"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

# %% wrong="layer_norm" because="statistics over the whole tensor" of="unbiased-variance"
- y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True) + eps).sqrt()
+ y = (wide - wide.mean()) / (wide.var(correction=0) + eps).sqrt()

# %% right="layer_norm" because="everything in float64"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    variance, mean = torch.var_mean(x.double(), dim=-1, correction=0, keepdim=True)
    y = (x.double() - mean) / torch.sqrt(variance + eps)
    weight = torch.ones_like(y) if weight is None else weight
    bias = torch.zeros_like(y) if bias is None else bias
    return (y * weight + bias).to(x.dtype)

# %% wrong="rms_norm" because="eps outside the root" base="eps-outside"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    return (y if weight is None else y * weight).to(x.dtype)

# %% wrong="rms_norm" because="no eps" of="eps-outside"
- y = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
+ y = wide / wide.square().mean(-1, keepdim=True).sqrt()

# %% wrong="rms_norm" because="the length, not the root mean square" of="eps-outside"
- y = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
+ y = wide / (wide.square().sum(-1, keepdim=True) + eps).sqrt()

# %% wrong="rms_norm" because="stays in half precision"
def rms_norm(x, weight=None, eps=1e-6):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight

# %% wrong="rms_norm" because="returns float32 for half inputs"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight

# %% wrong="rms_norm" because="changes x in place"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    wide *= torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight).to(x.dtype)

# %% wrong="rms_norm" because="vector norm, in float64, gain after rounding"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x.double()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / x.shape[-1]
    y = (wide / (mean_square + eps) ** 0.5).to(x.dtype)
    return y if weight is None else weight * y

# %% wrong="batch_norm" because="remembers the biased variance" base="remembers-biased"
class BatchNorm1d(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        if self.training:
            if len(x) < 2:
                raise ValueError("one example has no variance")
            mean, variance = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

# %% wrong="batch_norm" because="normalizes by the unbiased variance" of="remembers-biased"
- mean, variance = x.mean(0), x.var(0, correction=0)
+ mean, variance = x.mean(0), x.var(0)

# %% wrong="batch_norm" because="uses the batch in evaluation too"
class BatchNorm1d(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        if self.training and len(x) < 2:
            raise ValueError("one example has no variance")
        mean, variance = x.mean(0), x.var(0, correction=0)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

# %% wrong="batch_norm" because="old and new exchanged in the running estimates" of="remembers-biased"
- self.running_mean.lerp_(mean, self.momentum)
- self.running_var.lerp_(variance, self.momentum)
+ self.running_mean.lerp_(mean, 1 - self.momentum)
+ self.running_var.lerp_(x.var(0), 1 - self.momentum)

# %% wrong="batch_norm" because="the batch's statistics are cut out of the graph" of="remembers-biased"
- mean, variance = x.mean(0), x.var(0, correction=0)

  with torch.no_grad():
+     mean, variance = x.mean(0), x.var(0, correction=0)

- self.running_var.lerp_(variance, self.momentum)
+ self.running_var.lerp_(x.var(0), self.momentum)

# %% wrong="batch_norm" because="the running estimates keep the graph" of="remembers-biased"
- with torch.no_grad():
-     self.running_mean.lerp_(mean, self.momentum)
-     self.running_var.lerp_(variance, self.momentum)
+ self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
+ self.running_var = (1 - self.momentum) * self.running_var + self.momentum * x.var(0)

# %% right="batch_norm" because="var_mean, new tensors for the running estimates, examples last"
class BatchNorm1d(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        mean, variance = self.running_mean, self.running_var
        if self.training:
            if x.shape[0] == 1:
                raise ValueError("a batch of one")
            columns = x.T
            unbiased, mean = torch.var_mean(columns, dim=1)
            variance = unbiased * (len(x) - 1) / len(x)
            keep = 1 - self.momentum
            self.running_mean = keep * self.running_mean + self.momentum * mean.detach()
            self.running_var = keep * self.running_var + self.momentum * unbiased.detach()
        scale = self.weight / torch.sqrt(variance + self.eps)
        return x * scale + (self.bias - mean * scale)

# %% wrong="rms_norm_backward" because="takes the root mean square for a constant"
def rms_norm_backward(x, w, dy, eps=1e-6):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return dy * w * r, (dy * x * r).reshape(-1, x.shape[-1]).sum(0)

# %% wrong="rms_norm_backward" because="sums over the row where the mean belongs"
def rms_norm_backward(x, w, dy, eps=1e-6):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, g = x * r, dy * w
    dx = r * (g - normed * (g * normed).sum(-1, keepdim=True))
    return dx, (dy * normed).reshape(-1, x.shape[-1]).sum(0)

# %% wrong="rms_norm_backward" because="dw with x that is not normalized"
def rms_norm_backward(x, w, dy, eps=1e-6):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, g = x * r, dy * w
    dx = r * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx, (dy * x).reshape(-1, x.shape[-1]).sum(0)

# %% wrong="rms_norm_backward" because="dw summed over the first axis only"
def rms_norm_backward(x, w, dy, eps=1e-6):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, g = x * r, dy * w
    dx = r * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx, (dy * normed).sum(0)

# %% wrong="rms_norm_backward" because="forgets eps"
def rms_norm_backward(x, w, dy, eps=1e-6):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True))
    normed, g = x * r, dy * w
    dx = r * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx, (dy * normed).reshape(-1, x.shape[-1]).sum(0)

# %% wrong="rms_norm_backward" because="asks autograd"
def rms_norm_backward(x, w, dy, eps=1e-6):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    with torch.enable_grad():
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w
    return torch.autograd.grad(y, (x, w), dy)

# %% wrong="rms_norm_backward" because="forms the Jacobian of every row"
def rms_norm_backward(x, w, dy, eps=1e-6):
    d = x.shape[-1]
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    jacobian = w[:, None] * (
        r[..., None] * torch.eye(d, dtype=x.dtype)
        - r[..., None] ** 3 * x[..., :, None] * x[..., None, :] / d
    )
    dx = torch.einsum("...i,...ij->...j", dy, jacobian)
    return dx, (dy * x * r).reshape(-1, d).sum(0)

# %% right="rms_norm_backward" because="powers of the root mean square, einsum"
def rms_norm_backward(x, w, dy, eps=1e-6):
    d = x.shape[-1]
    rows, grads = x.reshape(-1, d), dy.reshape(-1, d)
    rms = torch.sqrt(torch.einsum("nd,nd->n", rows, rows) / d + eps)[:, None]
    inner = torch.einsum("nd,d,nd->n", grads, w, rows)[:, None]
    dx = grads * w / rms - rows * inner / (d * rms**3)
    dw = torch.einsum("nd,nd->d", grads, rows / rms)
    return dx.reshape(x.shape), dw

# %% wrong="qk_norm" because="normalizes the query only"
def qk_norm_attention_scores(q, k, gain):
    q32, k32 = (t if t.dtype == torch.float64 else t.float() for t in (q, k))
    return (gain[:, None, None] * (F.normalize(q32, dim=-1) @ k32.mT)).to(q.dtype)

# %% wrong="qk_norm" because="the norm runs over all heads together" base="norm-runs"
def qk_norm_attention_scores(q, k, gain):
    def direction(t):
        t = t if t.dtype == torch.float64 else t.float()
        return t / torch.linalg.vector_norm(t, dim=(1, 3), keepdim=True).clamp_min(1e-12)

    return (gain[:, None, None] * (direction(q) @ direction(k).mT)).to(q.dtype)

# %% wrong="qk_norm" because="a root mean square where the length belongs" of="norm-runs"
- return t / torch.linalg.vector_norm(t, dim=(1, 3), keepdim=True).clamp_min(1e-12)
+ return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-12)

# %% wrong="qk_norm" because="NaN for a vector of length 0"
def qk_norm_attention_scores(q, k, gain):
    q32, k32 = (t if t.dtype == torch.float64 else t.float() for t in (q, k))
    q32, k32 = q32 / q32.norm(dim=-1, keepdim=True), k32 / k32.norm(dim=-1, keepdim=True)
    return (gain[:, None, None] * (q32 @ k32.mT)).to(q.dtype)

# %% wrong="qk_norm" because="the gain meets the last axis"
def qk_norm_attention_scores(q, k, gain):
    q32, k32 = (F.normalize(t if t.dtype == torch.float64 else t.float(), dim=-1) for t in (q, k))
    return (gain * (q32 @ k32.mT)).to(q.dtype)

# %% wrong="qk_norm" because="stays in half precision"
def qk_norm_attention_scores(q, k, gain):
    def direction(t):
        return t / t.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-4)

    return gain[:, None, None] * (direction(q) @ direction(k).mT)

# %% right="qk_norm" because="F.normalize and einsum, gain on the query"
def qk_norm_attention_scores(q, k, gain):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_hat = F.normalize(q.to(wide), dim=-1) * gain.to(wide).view(-1, 1, 1)
    return torch.einsum("bhqd,bhkd->bhqk", q_hat, F.normalize(k.to(wide), dim=-1)).to(q.dtype)

# %% wrong="residual_blocks" because="the road runs through the norm in both" base="road-runs"
class PreNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        x = self.norm(x)
        return x + self.sublayer(x, *args, **kwargs)


class PostNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        return x + self.norm(self.sublayer(x, *args, **kwargs))

# %% wrong="residual_blocks" because="the two exchanged" of="road-runs"
- x = self.norm(x)
- return x + self.sublayer(x, *args, **kwargs)
+ return self.norm(x + self.sublayer(x, *args, **kwargs))

- return x + self.norm(self.sublayer(x, *args, **kwargs))
+ return x + self.sublayer(self.norm(x), *args, **kwargs)

# %% wrong="residual_blocks" because="drops the sublayer's arguments" of="road-runs"
- x = self.norm(x)
- return x + self.sublayer(x, *args, **kwargs)
+ return x + self.sublayer(self.norm(x))

- return x + self.norm(self.sublayer(x, *args, **kwargs))
+ return self.norm(x + self.sublayer(x))

# %% wrong="residual_blocks" because="adds in place" of="road-runs"
- x = self.norm(x)
- return x + self.sublayer(x, *args, **kwargs)
+ x += self.sublayer(self.norm(x), *args, **kwargs)
+ return x

- return x + self.norm(self.sublayer(x, *args, **kwargs))
+ x += self.sublayer(x, *args, **kwargs)
+ return self.norm(x)

# %% right="residual_blocks" because="step by step, torch.add" of="road-runs"
- x = self.norm(x)
- return x + self.sublayer(x, *args, **kwargs)
+ normed = self.norm(x)
+ return torch.add(self.sublayer(normed, *args, **kwargs), x)

- return x + self.norm(self.sublayer(x, *args, **kwargs))
+ out = torch.add(self.sublayer(x, *args, **kwargs), x)
+ return self.norm(out)

# %% wrong="rms_norm_kernel" because="divides by the block, not by the row's length" base="divides-block"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="eps outside the root" of="divides-block"
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ r = 1.0 / (tl.sqrt(tl.sum(x * x, axis=0) / n_cols) + eps)

# %% wrong="rms_norm_kernel" because="no eps" of="divides-block"
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols)

# %% wrong="rms_norm_kernel" because="no mask on the store" of="divides-block"
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)

- tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
+ tl.store(y_ptr + row * y_row + cols, x * r * w)

# %% wrong="rms_norm_kernel" because="no mask on the load" of="divides-block"
- x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ x = tl.load(x_ptr + row * x_row + cols).to(tl.float32)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)

# %% wrong="rms_norm_kernel" because="takes the block for the distance between rows"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * BLOCK + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * BLOCK + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="takes the row's length for the distance between rows"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * n_cols + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_cols + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="writes y with the row distance of x" of="divides-block"
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)

- tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
+ tl.store(y_ptr + row * x_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="squares in the format of x" of="divides-block"
- x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0)
+ r = 1.0 / tl.sqrt(tl.sum((x * x).to(tl.float32), axis=0) / n_cols + eps)

# %% wrong="rms_norm_kernel" because="masked lanes are 1" of="divides-block"
- x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=1.0).to(tl.float32)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)

# %% wrong="rms_norm_kernel" because="forgets the gain" of="divides-block"
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)

- tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
+ tl.store(y_ptr + row * y_row + cols, x * r, mask=inside)

# %% wrong="rms_norm_kernel" because="stores the root mean square for its inverse" of="divides-block"
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
- tl.store(r_ptr + row, r)
+ r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
+ tl.store(r_ptr + row, 1.0 / r)

# %% right="rms_norm_kernel" because="rsqrt, lanes beyond the row read its first number and are masked by where" of="divides-block"
- x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
- r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)
+ x = tl.load(x_ptr + row * x_row + tl.where(inside, cols, 0)).to(tl.float32)
+ squares = tl.where(inside, x * x, 0.0)
+ r = tl.rsqrt(tl.sum(squares) * (1.0 / n_cols) + eps)

# %% right="rms_norm_kernel" because="reads the row twice, in pieces"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    PIECE: tl.constexpr = 16
    total = tl.zeros((PIECE,), tl.float32)
    for start in range(0, n_cols, PIECE):
        cols = start + tl.arange(0, PIECE)
        x = tl.load(x_ptr + row * x_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        total += x * x
    r = 1.0 / tl.sqrt(tl.sum(total) / n_cols + eps)
    tl.store(r_ptr + row, r)
    for start in range(0, n_cols, PIECE):
        cols = start + tl.arange(0, PIECE)
        x = tl.load(x_ptr + row * x_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * y_row + cols, x * r * w, mask=cols < n_cols)

# %% wrong="rms_norm_backward_kernel" because="takes r for a constant" base="takes-r"
@triton.jit
def rms_norm_backward_kernel(
    x_ptr,
    w_ptr,
    r_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    x_row,
    dy_row,
    dx_row,
    partial_row,
    n_rows,
    n_cols,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, n_rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + wide_row)
        normed = x * r
        g = dy * w
        along = tl.sum(g * normed, axis=0) / n_cols
        tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="divides by the block, not by the row's length" of="takes-r"
- along = tl.sum(g * normed, axis=0) / n_cols
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ along = tl.sum(g * normed, axis=0) / BLOCK
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)

# %% wrong="rms_norm_backward_kernel" because="a sum where the mean belongs" of="takes-r"
- along = tl.sum(g * normed, axis=0) / n_cols
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ along = tl.sum(g * normed, axis=0)
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)

# %% wrong="rms_norm_backward_kernel" because="no mask on the stores" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along))

- tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)
+ tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw)

# %% wrong="rms_norm_backward_kernel" because="partial sums of the last row only" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
- dw += dy * normed
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
+ dw = dy * normed

# %% wrong="rms_norm_backward_kernel" because="dw with the gain in it" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
- dw += dy * normed
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
+ dw += g * normed

# %% wrong="rms_norm_backward_kernel" because="dw with x that is not normalized" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
- dw += dy * normed
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
+ dw += dy * x

# %% wrong="rms_norm_backward_kernel" because="dy read with the row distance of x" of="takes-r"
- dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
+ dy = tl.load(dy_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)

- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)

# %% wrong="rms_norm_backward_kernel" because="partial sums written a block apart" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)

- tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)
+ tl.store(partial_ptr + program.to(tl.int64) * BLOCK + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="the store inside the loop: a program without rows writes nothing" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)

- tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)
+     tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="one row a program" of="takes-r"
- for row in range(program, n_rows, tl.num_programs(0)):
+ for row in range(program, program + 1):

- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)

# %% wrong="rms_norm_backward_kernel" because="products in half precision" of="takes-r"
- x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
- dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
+ x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0)
+ dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0)

- g = dy * w
+ g = (dy * w.to(dy.dtype)).to(tl.float32)

- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
- dw += dy * normed
+ tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
+ dw += (dy * normed.to(dy.dtype)).to(tl.float32)

# %% wrong="rms_norm_backward_kernel" because="forgets the outer r" of="takes-r"
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
+ tl.store(dx_ptr + wide_row * dx_row + cols, g - normed * along, mask=inside)

# %% right="rms_norm_backward_kernel" because="a while loop, the formula with r cubed" of="takes-r"
- for row in range(program, n_rows, tl.num_programs(0)):
-     wide_row = tl.cast(row, tl.int64)
+ wide_row = program.to(tl.int64)
+ while wide_row < n_rows:

- along = tl.sum(g * normed, axis=0) / n_cols
- tl.store(dx_ptr + wide_row * dx_row + cols, r * g, mask=inside)
- dw += dy * normed
+ inner = tl.sum(g * x, axis=0)
+ tl.store(
+     dx_ptr + wide_row * dx_row + cols, g * r - x * (inner * r * r * r / n_cols), mask=inside
+ )
+ dw = dw + dy * normed
+ wide_row += tl.num_programs(0)

# %% wrong="norm_numbers" because="eps neglected, contributions added as sizes" base="eps-neglected"
def norm_numbers():
    return {
        "saved": 4096,
        "shift": "layer",
        "small": 1.0,
        "qk_bound": 11.31,
        "stream": 49.0,
        "post_share": 3.5527e-15,
        "traffic_us": 55.92,
    }

# %% wrong="norm_numbers" because="RMSNorm is said to ignore a shift, only reads counted"
def norm_numbers():
    return {
        "saved": 4096,
        "shift": "rms",
        "small": 0.7071,
        "qk_bound": 11.31,
        "stream": 7.0,
        "post_share": 3.5527e-15,
        "traffic_us": 27.96,
    }

# %% wrong="norm_numbers" because="vectors of length 1, Pre-Norm's share"
def norm_numbers():
    return {
        "saved": 4096,
        "shift": "layer",
        "small": 0.7071,
        "qk_bound": 0.0884,
        "stream": 7.0,
        "post_share": 0.0204,
        "traffic_us": 55.92,
    }

# %% right="norm_numbers" because="written out" of="eps-neglected"
- "small": 1.0,
+ "small": 0.7071,

- "stream": 49.0,
+ "stream": 7.0,

# %% wrong="layer_norm" because="bfloat16 is not widened"
- wide = x if x.dtype == torch.float64 else x.float()
+ wide = x.float() if x.dtype == torch.float16 else x

# %% wrong="layer_norm" because="a float32 weight makes float32 of half inputs"
- return y.to(x.dtype)
+ return y.to(x.dtype if weight is None else weight.dtype)

# %% wrong="rms_norm" because="bfloat16 is not widened"
- wide = x if x.dtype == torch.float64 else x.float()
+ wide = x.float() if x.dtype == torch.float16 else x

# %% wrong="qk_norm" because="float64 goes through float32"
- wide = t if t.dtype == torch.float64 else t.float()
+ wide = t.float()

# %% wrong="qk_norm" because="bfloat16 is not widened"
- wide = t if t.dtype == torch.float64 else t.float()
+ wide = t.float() if t.dtype == torch.float16 else t

# %% wrong="residual_blocks" because="arguments without a name are not handed on"
- return x + self.sublayer(self.norm(x), *args, **kwargs)
+ return x + self.sublayer(self.norm(x), **kwargs)

# %% wrong="rms_norm_kernel" because="32-bit row offsets"
- row = tl.program_id(0).to(tl.int64)  # 64 bits: row · stride passes 2³¹
+ row = tl.program_id(0)

# %% wrong="rms_norm_kernel" because="reads beyond the row and masks afterwards"
- x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
+ x = tl.where(inside, tl.load(x_ptr + row * x_row + cols).to(tl.float32), 0.0)

# %% wrong="rms_norm_kernel" because="the gain is read without a mask"
- w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
+ w = tl.load(w_ptr + cols).to(tl.float32)

# %% wrong="rms_norm_kernel" because="the normalized row is rounded before the gain"
- tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
+ normed = (x * r).to(x_ptr.dtype.element_ty).to(tl.float32)
+ tl.store(y_ptr + row * y_row + cols, normed * w, mask=inside)

# %% wrong="rms_norm_kernel" because="a try, which only the interpreter takes"
- tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
+ try:
+     tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)
+ finally:
+     pass

# %% wrong="rms_norm_backward_kernel" because="the gain is read without a mask"
- w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
+ w = tl.where(inside, tl.load(w_ptr + cols).to(tl.float32), 0.0)

# %% wrong="rms_norm_backward_kernel" because="32-bit offsets of rows"
- wide_row = tl.cast(row, tl.int64)
+ wide_row = row

# %% wrong="rms_norm_backward_kernel" because="a 32-bit offset into the partial sums"
- tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)
+ tl.store(partial_ptr + program * partial_row + cols, dw, mask=inside)

# %% right="rms_norm" because="vector norm, in float64 for float64 only"
- y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+ length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
+ y = wide / (length.square() / x.shape[-1] + eps).sqrt()

# %% wrong="residual_blocks" because="adds to what the sublayer returned, which may be x itself"
-     return x + self.sublayer(self.norm(x), *args, **kwargs)
+     out = self.sublayer(self.norm(x), *args, **kwargs)
+     out += x
+     return out

# %% wrong="residual_blocks" because="adds to what the sublayer of a post-norm block returned"
-     return self.norm(x + self.sublayer(x, *args, **kwargs))
+     out = self.sublayer(x, *args, **kwargs)
+     out += x
+     return self.norm(out)

# %% wrong="residual_blocks" because="calls the sublayer twice"
-     return x + self.sublayer(self.norm(x), *args, **kwargs)
+     if isinstance(self.sublayer(self.norm(x), *args, **kwargs), tuple):
+         return x + self.sublayer(self.norm(x), *args, **kwargs)[0]
+     return x + self.sublayer(self.norm(x), *args, **kwargs)

# %% right="rms_norm_backward_kernel" because="the same number of rounds for all programs; a round without a row is masked away"
@triton.jit
def rms_norm_backward_kernel(
    x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr,
    x_row, dy_row, dx_row, partial_row,
    n_rows, n_cols, BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    rounds = (n_rows + programs - 1) // programs
    cols = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, rounds):
        row = p + i * programs
        here = (cols < n_cols) & (row < n_rows)
        r = tl.load(r_ptr + row, mask=row < n_rows, other=0.0)
        normed = r * tl.load(x_ptr + row * x_row + cols, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + cols, mask=here, other=0.0).to(tl.float32)
        share = dy * normed
        total += share
        along = tl.sum(share * w, axis=0) / n_cols
        tl.store(dx_ptr + row * dx_row + cols, (dy * w - along * normed) * r, mask=here)
    tl.store(partial_ptr + p * partial_row + cols, total, mask=cols < n_cols)
