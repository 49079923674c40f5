# %% wrong="layer_norm" because="the unbiased variance, which divides by D - 1"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)

# %% wrong="layer_norm" because="eps outside the root"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide - wide.mean(-1, keepdim=True)) / (wide.std(-1, correction=0, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)

# %% wrong="layer_norm" because="stays in half precision"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

# %% wrong="layer_norm" because="mean of squares minus square of the mean"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = wide.square().mean(-1, keepdim=True) - mean.square()
    y = (wide - mean) / (variance.clamp_min(0) + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)

# %% wrong="layer_norm" because="PyTorch's own"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

# %% wrong="layer_norm" because="statistics over the whole tensor"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide - wide.mean()) / (wide.var(correction=0) + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)

# %% right="layer_norm" because="everything in float64"
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    variance, mean = torch.var_mean(x.double(), dim=-1, correction=0, keepdim=True)
    y = (x.double() - mean) / torch.sqrt(variance + eps)
    weight = torch.ones_like(y) if weight is None else weight
    bias = torch.zeros_like(y) if bias is None else bias
    return (y * weight + bias).to(x.dtype)

# %% wrong="rms_norm" because="eps outside the root"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    return (y if weight is None else y * weight).to(x.dtype)

# %% wrong="rms_norm" because="no eps"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide / wide.square().mean(-1, keepdim=True).sqrt()
    return (y if weight is None else y * weight).to(x.dtype)

# %% wrong="rms_norm" because="the length, not the root mean square"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide / (wide.square().sum(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight).to(x.dtype)

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

# %% right="rms_norm" because="vector norm, in float64, gain after rounding"
def rms_norm(x, weight=None, eps=1e-6):
    wide = x.double()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / x.shape[-1]
    y = (wide / (mean_square + eps) ** 0.5).to(x.dtype)
    return y if weight is None else weight * y

# %% wrong="batch_norm" because="remembers the biased variance"
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

# %% wrong="batch_norm" because="normalizes by the unbiased variance"
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
            mean, variance = x.mean(0), x.var(0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

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

# %% wrong="batch_norm" because="old and new exchanged in the running estimates"
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
                self.running_mean.lerp_(mean, 1 - self.momentum)
                self.running_var.lerp_(x.var(0), 1 - self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

# %% wrong="batch_norm" because="the batch's statistics are cut out of the graph"
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
            with torch.no_grad():
                mean, variance = x.mean(0), x.var(0, correction=0)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

# %% wrong="batch_norm" because="the running estimates keep the graph"
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
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * x.var(0)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

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
    jacobian = w[:, None] * (r[..., None] * torch.eye(d, dtype=x.dtype) - r[..., None] ** 3 * x[..., :, None] * x[..., None, :] / d)
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

# %% wrong="qk_norm" because="the norm runs over all heads together"
def qk_norm_attention_scores(q, k, gain):
    def direction(t):
        t = t if t.dtype == torch.float64 else t.float()
        return t / torch.linalg.vector_norm(t, dim=(1, 3), keepdim=True).clamp_min(1e-12)
    return (gain[:, None, None] * (direction(q) @ direction(k).mT)).to(q.dtype)

# %% wrong="qk_norm" because="a root mean square where the length belongs"
def qk_norm_attention_scores(q, k, gain):
    def direction(t):
        t = t if t.dtype == torch.float64 else t.float()
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-12)
    return (gain[:, None, None] * (direction(q) @ direction(k).mT)).to(q.dtype)

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

# %% wrong="residual_blocks" because="the road runs through the norm in both"
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

# %% wrong="residual_blocks" because="the two exchanged"
class PreNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        return self.norm(x + self.sublayer(x, *args, **kwargs))


class PostNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        return x + self.sublayer(self.norm(x), *args, **kwargs)

# %% wrong="residual_blocks" because="drops the sublayer's arguments"
class PreNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        return x + self.sublayer(self.norm(x))


class PostNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        return self.norm(x + self.sublayer(x))

# %% wrong="residual_blocks" because="adds in place"
class PreNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        x += self.sublayer(self.norm(x), *args, **kwargs)
        return x


class PostNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        x += self.sublayer(x, *args, **kwargs)
        return self.norm(x)

# %% right="residual_blocks" because="step by step, torch.add"
class PreNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        normed = self.norm(x)
        return torch.add(self.sublayer(normed, *args, **kwargs), x)


class PostNormBlock(nn.Module):
    def __init__(self, norm, sublayer):
        super().__init__()
        self.norm, self.sublayer = norm, sublayer

    def forward(self, x, *args, **kwargs):
        out = torch.add(self.sublayer(x, *args, **kwargs), x)
        return self.norm(out)

# %% wrong="rms_norm_kernel" because="divides by the block, not by the row's length"
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

# %% wrong="rms_norm_kernel" because="eps outside the root"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / (tl.sqrt(tl.sum(x * x, axis=0) / n_cols) + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="no eps"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="no mask on the store"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w)

# %% wrong="rms_norm_kernel" because="no mask on the load"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

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

# %% wrong="rms_norm_kernel" because="writes y with the row distance of x"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * x_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="squares in the format of x"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0)
    r = 1.0 / tl.sqrt(tl.sum((x * x).to(tl.float32), axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="masked lanes are 1"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=1.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

# %% wrong="rms_norm_kernel" because="forgets the gain"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r, mask=inside)

# %% wrong="rms_norm_kernel" because="stores the root mean square for its inverse"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(r_ptr + row, 1.0 / r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

# %% right="rms_norm_kernel" because="rsqrt, lanes beyond the row read its first number and are masked by where"
@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, x_row, y_row, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_row + tl.where(inside, cols, 0)).to(tl.float32)
    squares = tl.where(inside, x * x, 0.0)
    r = tl.rsqrt(tl.sum(squares) * (1.0 / n_cols) + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + cols, x * r * w, mask=inside)

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

# %% wrong="rms_norm_backward_kernel" because="takes r for a constant"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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

# %% wrong="rms_norm_backward_kernel" because="divides by the block, not by the row's length"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        along = tl.sum(g * normed, axis=0) / BLOCK
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="a sum where the mean belongs"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        along = tl.sum(g * normed, axis=0)
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="no mask on the stores"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along))
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw)

# %% wrong="rms_norm_backward_kernel" because="partial sums of the last row only"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw = dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="dw with the gain in it"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += g * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="dw with x that is not normalized"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * x
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="dy read with the row distance of x"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, n_rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + wide_row)
        normed = x * r
        g = dy * w
        along = tl.sum(g * normed, axis=0) / n_cols
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="partial sums written a block apart"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * BLOCK + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="the store inside the loop: a program without rows writes nothing"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
        tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="one row a program"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, program + 1):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + wide_row)
        normed = x * r
        g = dy * w
        along = tl.sum(g * normed, axis=0) / n_cols
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="products in half precision"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, n_rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0)
        r = tl.load(r_ptr + wide_row)
        normed = x * r
        g = (dy * w.to(dy.dtype)).to(tl.float32)
        along = tl.sum(g * normed, axis=0) / n_cols
        tl.store(dx_ptr + wide_row * dx_row + cols, r * (g - normed * along), mask=inside)
        dw += (dy * normed.to(dy.dtype)).to(tl.float32)
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="rms_norm_backward_kernel" because="forgets the outer r"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
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
        tl.store(dx_ptr + wide_row * dx_row + cols, g - normed * along, mask=inside)
        dw += dy * normed
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% right="rms_norm_backward_kernel" because="a while loop, the formula with r cubed"
@triton.jit
def rms_norm_backward_kernel(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, partial_ptr, x_row, dy_row, dx_row, partial_row, n_rows, n_cols,
                             BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    wide_row = program.to(tl.int64)
    while wide_row < n_rows:
        x = tl.load(x_ptr + wide_row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + wide_row)
        normed = x * r
        g = dy * w
        inner = tl.sum(g * x, axis=0)
        tl.store(dx_ptr + wide_row * dx_row + cols, g * r - x * (inner * r * r * r / n_cols), mask=inside)
        dw = dw + dy * normed
        wide_row += tl.num_programs(0)
    tl.store(partial_ptr + program.to(tl.int64) * partial_row + cols, dw, mask=inside)

# %% wrong="norm_numbers" because="eps neglected, contributions added as sizes"
def norm_numbers():
    return {"saved": 4096, "shift": "layer", "small": 1.0, "qk_bound": 11.31, "stream": 49.0, "post_share": 3.5527e-15, "traffic_us": 55.92}

# %% wrong="norm_numbers" because="RMSNorm is said to ignore a shift, only reads counted"
def norm_numbers():
    return {"saved": 4096, "shift": "rms", "small": 0.7071, "qk_bound": 11.31, "stream": 7.0, "post_share": 3.5527e-15, "traffic_us": 27.96}

# %% wrong="norm_numbers" because="vectors of length 1, Pre-Norm's share"
def norm_numbers():
    return {"saved": 4096, "shift": "layer", "small": 0.7071, "qk_bound": 0.0884, "stream": 7.0, "post_share": 0.0204, "traffic_us": 55.92}

# %% right="norm_numbers" because="written out"
def norm_numbers():
    return {"saved": 4096, "shift": "layer", "small": 0.7071, "qk_bound": 11.31, "stream": 7.0, "post_share": 3.5527e-15, "traffic_us": 55.92}
