# %% wrong="budget" because="counts the matrices, not their factors"
- return sum(rank * (rows + columns) for rows, columns in shapes)
+ return sum(rank * rows * columns for rows, columns in shapes)

# %% wrong="budget" because="forgets Adam's second moment"
- return frozen * frozen_bits / 8 + 16 * trained
+ return frozen * frozen_bits / 8 + 12 * trained

# %% wrong="budget" because="every frozen parameter takes two bytes"
- return frozen * frozen_bits / 8 + 16 * trained
+ return frozen * 2 + 16 * trained

# %% wrong="budget" because="shapes that occur twice count once"
- return sum(rank * (rows + columns) for rows, columns in shapes)
+ return sum(rank * (rows + columns) for rows, columns in set(shapes))

# %% right="budget" because="a loop"
def lora_parameters(shapes, rank):
    count = 0
    for rows, columns in shapes:
        count += rows * rank
        count += columns * rank
    return count


def training_bytes(frozen, trained, frozen_bits=16.0):
    bits = frozen_bits * frozen + (32 + 32 + 32 + 32) * trained
    return bits / 8

# %% wrong="lora_linear" because="the base is trained, too"
- self.base = base.requires_grad_(False)
+ self.base = base

# %% wrong="lora_linear" because="freezes the weight alone, not the bias"
- self.base = base.requires_grad_(False)
+ self.base = base
+ base.weight.requires_grad_(False)

# %% wrong="lora_linear" because="rslora is ignored"
- self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
+ self.scaling = alpha / rank

# %% wrong="lora_linear" because="α without the rank"
- self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
+ self.scaling = alpha

# %% wrong="lora_linear" because="both factors random"
- self.B = nn.Parameter(new(base.out_features, rank).zero_())
+ self.B = nn.Parameter(new(base.out_features, rank).normal_())

# %% wrong="lora_linear" because="A normal with standard deviation 1/rank"
- nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
+ nn.init.normal_(self.A, std=1 / rank)

# %% wrong="lora_linear" because="dropout on what the base reads, too"
- y = self.base(x)
- if self.merged:
+ x = self.dropout(x)
+ y = self.base(x)
+ if self.merged:

# %% wrong="lora_linear" because="no dropout at all"
- return y + self.scaling * F.linear(F.linear(self.dropout(x), self.A), self.B)
+ return y + self.scaling * F.linear(F.linear(x, self.A), self.B)

# %% wrong="lora_linear" because="dropout in evaluation mode, too"
- return y + self.scaling * F.linear(F.linear(self.dropout(x), self.A), self.B)
+ return y + self.scaling * F.linear(F.linear(F.dropout(x, self.dropout.p), self.A), self.B)

# %% wrong="lora_linear" because="makes the whole matrix first"
- return y + self.scaling * F.linear(F.linear(self.dropout(x), self.A), self.B)
+ return y + self.scaling * F.linear(self.dropout(x), self.B @ self.A)

# %% wrong="lora_linear" because="the adapter acts after merging, too"
- if self.merged:
-     return y
+ pass

# %% wrong="lora_linear" because="merges twice"
- if self.merged != merged:
-     self.base.weight += sign * self.scaling * (self.B @ self.A)
-     self.merged = merged
+ self.base.weight += sign * self.scaling * (self.B @ self.A)
+ self.merged = merged

# %% wrong="lora_linear" because="merges without the scale"
- self.base.weight += sign * self.scaling * (self.B @ self.A)
+ self.base.weight += sign * (self.B @ self.A)

# %% wrong="lora_linear" because="works on a copy of the layer"
- self.base = base.requires_grad_(False)
+ self.base = nn.Linear(base.in_features, base.out_features, base.bias is not None).to(base.weight)
+ self.base.load_state_dict(base.state_dict())
+ self.base.requires_grad_(False)

# %% wrong="lora_linear" because="factors in float32 whatever the weight's format"
- new = base.weight.new_empty
+ new = torch.empty

# %% wrong="lora_linear" because="drops entries of A x, not of x"
- return y + self.scaling * F.linear(F.linear(self.dropout(x), self.A), self.B)
+ return y + self.scaling * F.linear(self.dropout(F.linear(x, self.A)), self.B)

# %% wrong="lora_linear" because="merging puts a new parameter into the layer"
- self.base.weight += sign * self.scaling * (self.B @ self.A)
+ new = self.base.weight + sign * self.scaling * (self.B @ self.A)
+ self.base.weight = nn.Parameter(new, requires_grad=False)

# %% wrong="lora_linear" because="freezes by putting new parameters into the layer"
- self.base = base.requires_grad_(False)
+ base.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
+ self.base = base.requires_grad_(False)

# %% wrong="lora_linear" because="no gradient in evaluation mode"
- return y + self.scaling * F.linear(F.linear(self.dropout(x), self.A), self.B)
+ with torch.set_grad_enabled(self.training):
+     return y + self.scaling * F.linear(F.linear(self.dropout(x), self.A), self.B)

# %% right="lora_linear" because="sums and products written out, base kept for unmerging"
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha=16.0, dropout=0.0, rslora=False):
        super().__init__()
        if rank <= 0:
            raise ValueError("rank")
        for p in base.parameters():
            p.requires_grad = False
        self.base, self.p, self.merged = base, dropout, False
        bound = base.in_features**-0.5
        a = torch.rand(rank, base.in_features).to(base.weight) * 2 * bound - bound
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))
        self.scaling = alpha * rank ** (-0.5 if rslora else -1.0)

    def forward(self, x):
        if self.merged:
            return self.base(x)
        read = x
        if self.training and self.p:
            read = x * (torch.rand(x.shape, device=x.device) >= self.p) / (1 - self.p)
        return self.base(x) + (read @ self.A.T) @ (self.scaling * self.B).T

    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self.before = self.base.weight.clone()
            self.base.weight.add_(self.B @ self.A, alpha=self.scaling)
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        if self.merged:
            self.base.weight.copy_(self.before)
            self.merged = False

# %% wrong="inject_lora" because="a target is searched for anywhere in the name"
- return [name for name in layers if name == target or name.endswith("." + target)]
+ return [name for name in layers if target in name]

# %% wrong="inject_lora" because="the end of a name without the dot"
- return [name for name in layers if name == target or name.endswith("." + target)]
+ return [name for name in layers if name.endswith(target)]

# %% wrong="inject_lora" because="the last part of a name only"
- return [name for name in layers if name == target or name.endswith("." + target)]
+ return [name for name in layers if name.rpartition(".")[2] == target]

# %% wrong="inject_lora" because="nothing matched is no error"
- if missing or not targets:
+ if False:

# %% wrong="inject_lora" because="an error only if no target at all matches"
- if missing or not targets:
+ if len(missing) == len(targets):

# %% wrong="inject_lora" because="freezes before it raises"
- missing = [target for target in targets if not named_by(target)]
+ model.requires_grad_(False)
+ missing = [target for target in targets if not named_by(target)]

# %% wrong="inject_lora" because="freezes the adapted layers only"
- model.requires_grad_(False)
+ pass

# %% wrong="inject_lora" because="freezes afterwards: the adapters, too"
- return found
+ model.requires_grad_(False)
+ return found

# %% wrong="inject_lora" because="alpha, dropout and rslora are not handed on"
- adapted = LoRALinear(layers[name], rank, alpha, dropout, rslora)
+ adapted = LoRALinear(layers[name], rank)

# %% wrong="inject_lora" because="new layers are in training mode"
- setattr(model.get_submodule(parent), last, adapted.train(layers[name].training))
+ setattr(model.get_submodule(parent), last, adapted)

# %% wrong="inject_lora" because="names in the order of the targets"
- return found
+ return [name for target in targets for name in named_by(target) if name in wanted]

# %% right="inject_lora" because="regular expressions, walking over parents"
def inject_lora(model, targets, rank, alpha=16.0, dropout=0.0, rslora=False):
    import re

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = []
    if len(targets) == 0:
        raise ValueError("no targets")
    patterns = {t: re.compile(r"(?:.*\.)?" + re.escape(t)) for t in targets}
    for t, pattern in patterns.items():
        if not any(pattern.fullmatch(n) for n in names):
            raise ValueError(f"{t} names no layer")
    for n in names:
        if any(p.fullmatch(n) for p in patterns.values()):
            chosen.append(n)
    for p in model.parameters():
        p.requires_grad = False
    for n in chosen:
        *path, last = n.split(".")
        parent = model
        for part in path:
            parent = getattr(parent, part)
        old = getattr(parent, last)
        new = LoRALinear(old, rank, alpha=alpha, dropout=dropout, rslora=rslora)
        new.train(old.training)
        setattr(parent, last, new)
    return chosen

# %% wrong="nf4_codebook" because="the formula that the paper prints, its ends at one"
def nf4_codebook():
    shares = torch.linspace(0, 1, 18, dtype=torch.float64)
    q = torch.special.ndtri(shares.clamp(0.01, 0.99))
    middles = (q[1:] + q[:-1]) / 2
    levels = middles[:16] / middles.abs().max()
    levels[7] = 0.0
    return levels.float()

# %% wrong="nf4_codebook" because="the halves exchanged"
- above, below = quantiles(8), -quantiles(7).flip(0)
- return (torch.cat([below, above.new_zeros(1), above]) / above[-1]).float()
+ above, below = quantiles(7), -quantiles(8).flip(0)
+ return (torch.cat([below, above.new_zeros(1), above]) / above[-1]).float()

# %% wrong="nf4_codebook" because="half a step of 16 alone"
- delta = 1 - (1 / 30 + 1 / 32) / 2
+ delta = 1 - 1 / 32

# %% wrong="nf4_codebook" because="evenly spaced values"
- return (torch.cat([below, above.new_zeros(1), above]) / above[-1]).float()
+ return torch.linspace(-1, 1, 16)

# %% wrong="nf4_codebook" because="float64"
- return (torch.cat([below, above.new_zeros(1), above]) / above[-1]).float()
+ return torch.cat([below, above.new_zeros(1), above]) / above[-1]

# %% right="nf4_codebook" because="bisection on the distribution function"
def nf4_codebook():
    def quantile(p):
        low, high = -10.0, 10.0
        for _ in range(80):
            middle = (low + high) / 2
            if (1 + math.erf(middle / math.sqrt(2))) / 2 < p:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    delta = 1 - (1 / 30 + 1 / 32) / 2
    up = [quantile(0.5 + (delta - 0.5) * i / 8) for i in range(1, 9)]
    down = [-quantile(0.5 + (delta - 0.5) * i / 7) for i in range(7, 0, -1)]
    return torch.tensor([v / up[-1] for v in [*down, 0.0, *up]], dtype=torch.float32)

# %% wrong="nf4_blocks" because="the first of a pair in the lower bits"
- return codes[::2] << 4 | codes[1::2], absmax
+ return codes[1::2] << 4 | codes[::2], absmax

# %% wrong="nf4_blocks" because="one absmax for the whole tensor"
- ratios = blocks / absmax.masked_fill(absmax == 0, 1.0)[:, None]
+ absmax = absmax.amax().expand(len(blocks)).clone() if len(blocks) else absmax
+ ratios = blocks / absmax.masked_fill(absmax == 0, 1.0)[:, None]

# %% wrong="nf4_blocks" because="a block of zeros is divided by zero"
- ratios = blocks / absmax.masked_fill(absmax == 0, 1.0)[:, None]
+ ratios = blocks / absmax[:, None]

# %% wrong="nf4_blocks" because="a small number added to absmax"
- ratios = blocks / absmax.masked_fill(absmax == 0, 1.0)[:, None]
+ ratios = blocks / (absmax + 1e-8)[:, None]

# %% wrong="nf4_blocks" because="the largest value, not the largest absolute value"
- absmax = blocks.abs().amax(dim=1) if len(blocks) else flat.new_zeros(0)
+ absmax = blocks.amax(dim=1) if len(blocks) else flat.new_zeros(0)

# %% wrong="nf4_blocks" because="the last block is dropped where it is ragged"
- codes = torch.bucketize(ratios.flatten()[: flat.numel()], between).to(torch.uint8)
+ codes = torch.bucketize(ratios.flatten(), between).to(torch.uint8)

# %% wrong="nf4_blocks" because="the next lower value, not the nearest"
- codes = torch.bucketize(ratios.flatten()[: flat.numel()], between).to(torch.uint8)
+ codes = torch.bucketize(ratios.flatten()[: flat.numel()], levels[1:]).to(torch.uint8)

# %% wrong="nf4_blocks" because="an odd number is padded with code 0"
- codes = F.pad(codes, (0, flat.numel() % 2), value=7)
+ codes = F.pad(codes, (0, flat.numel() % 2), value=0)

# %% wrong="nf4_blocks" because="absmax in the format of the weights"
- return codes[::2] << 4 | codes[1::2], absmax
+ return codes[::2] << 4 | codes[1::2], absmax.to(x.dtype)

# %% wrong="nf4_blocks" because="the asked format is ignored"
- return (nf4_codebook().to(packed.device)[codes.long()] * scales).view(*shape).to(dtype)
+ return (nf4_codebook().to(packed.device)[codes.long()] * scales).view(*shape)

# %% wrong="nf4_blocks" because="blocks of 64 whatever is asked"
- scales = absmax.repeat_interleave(block)[:n]
+ scales = absmax.repeat_interleave(64)[:n]

# %% wrong="nf4_blocks" because="multiplies in the asked format"
- return (nf4_codebook().to(packed.device)[codes.long()] * scales).view(*shape).to(dtype)
+ return (nf4_codebook()[codes.long()].bfloat16() * scales.bfloat16()).view(*shape).to(dtype)

# %% wrong="nf4_blocks" because="value and absmax are rounded to the asked format before the product"
- scales = absmax.repeat_interleave(block)[:n]
- return (nf4_codebook().to(packed.device)[codes.long()] * scales).view(*shape).to(dtype)
+ scales = absmax.to(dtype).repeat_interleave(block)[:n]
+ return (nf4_codebook().to(packed.device, dtype)[codes.long()] * scales).view(*shape)

# %% wrong="nf4_blocks" because="full blocks of a contiguous x are a view of it, divided in place"
- blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)
+ blocks = F.pad(flat, (0, -flat.numel() % block)) if flat.numel() % block else flat
+ blocks = blocks.view(-1, block)
- ratios = blocks / absmax.masked_fill(absmax == 0, 1.0)[:, None]
+ ratios = blocks.div_(absmax.masked_fill(absmax == 0, 1.0)[:, None])

# %% right="nf4_blocks" because="distances to all 16 values, a loop over blocks"
def quantize_nf4(x, block=64):
    levels = nf4_codebook()
    flat = x.detach().reshape(-1).to(torch.float32)
    largest, codes = [], []
    for part in flat.split(block) if flat.numel() else ():
        c = part.abs().max()
        largest.append(c)
        ratio = part / c if c > 0 else part
        codes.append((ratio[:, None] - levels).abs().argmin(dim=1))
    if not codes:
        return torch.zeros(0, dtype=torch.uint8), torch.zeros(0)
    codes = torch.cat(codes)
    if codes.numel() % 2:
        codes = torch.cat([codes, torch.tensor([7])])
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8), torch.stack(largest)


def dequantize_nf4(packed, absmax, shape, block=64, dtype=torch.float32):
    n = math.prod(shape)
    out = torch.zeros(2 * packed.numel())
    out[0::2] = nf4_codebook()[(packed // 16).long()]
    out[1::2] = nf4_codebook()[(packed % 16).long()]
    out = out[:n] * absmax[torch.arange(n) // block]
    return out.reshape(tuple(shape)).to(dtype)

# %% wrong="double_quantization" because="no mean is subtracted"
- mean = absmax.double().mean().float() if n else absmax.new_zeros(())
+ mean = absmax.new_zeros(())

# %% wrong="double_quantization" because="pads before the mean is subtracted"
- blocks = F.pad(absmax - mean, (0, -n % block)).view(-1, block)
+ blocks = F.pad(absmax, (0, -n % block)).view(-1, block) - mean

# %% wrong="double_quantization" because="the mean of nothing is NaN"
- mean = absmax.double().mean().float() if n else absmax.new_zeros(())
+ mean = absmax.mean()

# %% wrong="double_quantization" because="truncates instead of rounding"
- codes = (blocks / scales.masked_fill(scales == 0, 1.0)[:, None]).round()
+ codes = (blocks / scales.masked_fill(scales == 0, 1.0)[:, None]).trunc()

# %% wrong="double_quantization" because="one scale for all blocks"
- codes = (blocks / scales.masked_fill(scales == 0, 1.0)[:, None]).round()
+ scales = scales.amax().expand(len(blocks)).clone() if n else scales
+ codes = (blocks / scales.masked_fill(scales == 0, 1.0)[:, None]).round()

# %% wrong="double_quantization" because="scales may come back negative"
- return (codes.float() * scales.repeat_interleave(block)[:n] + mean).clamp(min=0)
+ return codes.float() * scales.repeat_interleave(block)[:n] + mean

# %% wrong="double_quantization" because="the mean is not added again"
- return (codes.float() * scales.repeat_interleave(block)[:n] + mean).clamp(min=0)
+ return (codes.float() * scales.repeat_interleave(block)[:n]).clamp(min=0)

# %% right="double_quantization" because="block after block, in float64"
def double_quantize(absmax, block=256):
    n = len(absmax)
    if not n:
        return torch.zeros(0, dtype=torch.int8), torch.zeros(0), torch.zeros(())
    mean = absmax.double().mean().float()
    codes, scales = [], []
    for part in absmax.split(block):
        rest = part.double() - mean.double()
        scale = (rest.abs().max() / 127).float()
        scales.append(scale)
        codes.append(torch.round(rest / scale.double()) if scale > 0 else torch.zeros_like(rest))
    return torch.cat(codes).to(torch.int8), torch.stack(scales), mean


def double_dequantize(codes, scales, mean, block=256):
    each = scales[torch.arange(len(codes)) // block]
    return torch.relu(codes.to(torch.float32) * each + mean)

# %% wrong="qlora_linear" because="autograd keeps the dequantized weight"
- y = _FrozenProduct.apply(x, self)
+ y = F.linear(x, self.dequantized())

# %% wrong="qlora_linear" because="keeps the layer that it was given"
- self.B = nn.Parameter(torch.zeros(self.shape[0], rank, device=packed.device))
+ self.B = nn.Parameter(torch.zeros(self.shape[0], rank, device=packed.device))
+ self.base = base.requires_grad_(False)

# %% wrong="qlora_linear" because="keeps the weight out of sight"
- self.B = nn.Parameter(torch.zeros(self.shape[0], rank, device=packed.device))
+ self.B = nn.Parameter(torch.zeros(self.shape[0], rank, device=packed.device))
+ self.kept = (base.weight.detach(),)

# %% wrong="qlora_linear" because="no gradient reaches x through the frozen weight"
- return dy @ ctx.layer.dequantized(), None
+ return None, None

# %% wrong="qlora_linear" because="the block size is ignored"
- packed, absmax = quantize_nf4(base.weight, block)
+ self.block = 64
+ packed, absmax = quantize_nf4(base.weight, 64)

# %% wrong="qlora_linear" because="the bias is dropped"
- if self.bias is not None:
-     y = y + self.bias
+ pass

# %% wrong="qlora_linear" because="the bias is trained"
- kept = {"packed": packed, "codes": codes, "scales": scales, "mean": mean, "bias": bias}
+ kept = {"packed": packed, "codes": codes, "scales": scales, "mean": mean}
+ self.bias = None if bias is None else nn.Parameter(bias)

# %% wrong="qlora_linear" because="no scaling"
- return y + self.scaling * F.linear(F.linear(x, self.A), self.B)
+ return y + F.linear(F.linear(x, self.A), self.B)

# %% wrong="qlora_linear" because="shares the bias with the layer that it was given"
- bias = None if base.bias is None else base.bias.detach().clone()
+ bias = None if base.bias is None else base.bias.detach()

# %% right="qlora_linear" because="checkpointing in place of an autograd function"
class QLoRALinear(nn.Module):
    def __init__(self, base, rank, alpha=16.0, block=64):
        super().__init__()
        self.size, self.block, self.scaling = base.weight.shape, block, alpha / rank
        packed, absmax = quantize_nf4(base.weight, block)
        codes, scales, mean = double_quantize(absmax)
        self.register_buffer("packed", packed)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("mean", mean)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().clone())
        bound = base.in_features**-0.5
        self.A = nn.Parameter((torch.rand(rank, base.in_features) * 2 - 1) * bound)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def dequantized(self):
        absmax = double_dequantize(self.codes, self.scales, self.mean)
        return dequantize_nf4(self.packed, absmax, self.size, self.block)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        y = checkpoint(lambda x: F.linear(x, self.dequantized()), x, use_reentrant=False)
        y = y + (x @ self.A.T) @ self.B.T * self.scaling
        return y if self.bias is None else y + self.bias

# %% wrong="qlora_linear" because="the weight is kept as an attribute of ctx, past save_for_backward"
class QLoRALinear(nn.Module):
    """y = x W′ᵀ + bias + scaling · B A x, where W′ is the frozen weight in NF4."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 16.0, block: int = 64) -> None:
        super().__init__()
        weight = base.weight.detach()
        self.shape, self.block, self.scaling = tuple(weight.shape), block, alpha / rank
        packed, absmax = quantize_nf4(weight, block)
        codes, scales, mean = double_quantize(absmax)
        self.register_buffer("packed", packed)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("mean", mean)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().clone())
        self.A = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        absmax = double_dequantize(self.codes, self.scales, self.mean)
        return dequantize_nf4(self.packed, absmax, self.shape, self.block)

    def forward(self, x: Tensor) -> Tensor:
        y = FrozenProduct.apply(x, self)
        if self.bias is not None:
            y = y + self.bias
        return y + self.scaling * (x @ self.A.T @ self.B.T)


class FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: QLoRALinear) -> Tensor:
        ctx.weight = layer.dequantized()
        return x @ ctx.weight.T

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.weight, None

# %% wrong="dora_linear" because="the norm of W, not of W + sBA"
- norm = (self.base.weight + self.scaling * self.B @ self.A).norm(dim=1)
+ norm = self.base.weight.norm(dim=1)

# %% wrong="dora_linear" because="a gradient through the norm"
- with torch.no_grad():
-     norm = (self.base.weight + self.scaling * self.B @ self.A).norm(dim=1)
+ norm = (self.base.weight + self.scaling * self.B @ self.A).norm(dim=1)

# %% wrong="dora_linear" because="m scales the bias, too"
- y = F.linear(x, self.base.weight) + self.scaling * F.linear(F.linear(x, self.A), self.B)
- y = self.m / norm * y
- return y if self.base.bias is None else y + self.base.bias
+ y = self.base(x) + self.scaling * F.linear(F.linear(x, self.A), self.B)
+ return self.m / norm * y

# %% wrong="dora_linear" because="m starts at one"
- self.m = nn.Parameter(base.weight.norm(dim=1))
+ self.m = nn.Parameter(torch.ones_like(base.weight[:, 0]))

# %% wrong="dora_linear" because="no division by the norm"
- y = self.m / norm * y
+ y = self.m / self.base.weight.norm(dim=1) * y

# %% right="dora_linear" because="the weight written out, the norm detached"
class DoRALinear(nn.Module):
    def __init__(self, base, rank, alpha=16.0):
        super().__init__()
        for p in base.parameters():
            p.requires_grad_(False)
        self.base, self.scaling = base, alpha / rank
        bound = base.in_features**-0.5
        a = (torch.rand(rank, base.in_features).to(base.weight) * 2 - 1) * bound
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))
        self.m = nn.Parameter(base.weight.detach().square().sum(1).sqrt())

    def forward(self, x):
        v = self.base.weight + self.scaling * self.B @ self.A
        length = v.square().sum(dim=1, keepdim=True).sqrt().detach()
        return F.linear(x, self.m[:, None] * v / length, self.base.bias)

# %% wrong="prefix_tuning" because="the text's positions begin at zero"
- return model(tokens, cache=cache)
+ places = torch.arange(tokens.shape[1], device=tokens.device)
+ return model(tokens, cache=cache, positions=places)

# %% wrong="prefix_tuning" because="keys and values exchanged"
- (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1))
+ (v.expand(batch, -1, -1, -1), k.expand(batch, -1, -1, -1))

# %% wrong="prefix_tuning" because="no prefix"
- return model(tokens, cache=cache)
+ return model(tokens)

# %% wrong="prefix_tuning" because="the graph ends at the prefix"
- (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1))
+ (k.detach().expand(batch, -1, -1, -1), v.detach().expand(batch, -1, -1, -1))

# %% wrong="prefix_tuning" because="in the first layer only, zeros elsewhere"
- for k, v in zip(keys, values, strict=True)
+ for k, v in zip(keys * (torch.arange(len(keys)) == 0)[:, None, None, None], values, strict=True)

# %% wrong="prefix_tuning" because="the graph of a model whose weights are trained"
- with torch.no_grad():
-     device = model.embed_tokens.weight.device
-     model(torch.tensor([list(tokens)], device=device), cache=cache)
+ device = model.embed_tokens.weight.device
+ model(torch.tensor([list(tokens)], device=device), cache=cache)

# %% wrong="prefix_tuning" because="tensors of inference mode cannot be trained"
- with torch.no_grad():
-     device = model.embed_tokens.weight.device
-     model(torch.tensor([list(tokens)], device=device), cache=cache)
- keys, values = zip(*cache.layers, strict=True)
- return torch.cat(keys), torch.cat(values)
+ with torch.inference_mode():
+     device = model.embed_tokens.weight.device
+     model(torch.tensor([list(tokens)], device=device), cache=cache)
+     keys, values = zip(*cache.layers, strict=True)
+     return torch.cat(keys), torch.cat(values)

# %% wrong="prefix_tuning" because="no gradient while the model is in evaluation mode"
- return model(tokens, cache=cache)
+ with torch.set_grad_enabled(model.training):
+     return model(tokens, cache=cache)

# %% right="prefix_tuning" because="one repeated tensor, layer after layer"
def prefix_of(model, tokens):
    cache = Cache()
    with torch.inference_mode():
        model(torch.tensor(list(tokens))[None], cache=cache)
    keys = torch.stack([k[0] for k, _ in cache.layers])
    values = torch.stack([v[0] for _, v in cache.layers])
    return keys.clone(), values.clone()


def prefix_logits(model, keys, values, tokens):
    cache = Cache()
    for layer in range(keys.shape[0]):
        k = keys[layer][None].repeat(tokens.shape[0], 1, 1, 1)
        v = values[layer][None].repeat(tokens.shape[0], 1, 1, 1)
        cache.extend(layer, k, v)
    return model(tokens, cache=cache)

# %% wrong="multi_lora_linear" because="−1 is taken for the last adapter"
- own = index.clamp(min=0)
- scale = torch.where(index < 0, 0.0, scaling[own])[:, None, None]
+ own = index
+ scale = scaling[own][:, None, None]

# %% wrong="multi_lora_linear" because="a matrix for each row"
- return F.linear(x, weight) + scale * (x @ A[own].mT @ B[own].mT)
+ return x @ (weight + scale * (B[own] @ A[own])).mT

# %% wrong="multi_lora_linear" because="the first row's adapter for all"
- return F.linear(x, weight) + scale * (x @ A[own].mT @ B[own].mT)
+ return F.linear(x, weight) + scale * (x @ A[own[:1]].mT @ B[own[:1]].mT)

# %% wrong="multi_lora_linear" because="one scale for all adapters"
- scale = torch.where(index < 0, 0.0, scaling[own])[:, None, None]
+ scale = torch.where(index < 0, 0.0, scaling[0])[:, None, None]

# %% right="multi_lora_linear" because="one adapter after another, its rows together"
def multi_lora_linear(x, weight, A, B, scaling, index):
    y = x @ weight.T
    for k in range(len(A)):
        mine = (index == k).nonzero()[:, 0]
        y = y.index_add(0, mine, scaling[k] * (x[mine] @ A[k].T @ B[k].T))
    return y

# %% wrong="questions" because="the usual slips"
def questions():
    return {
        "even": 4096, "moments": 67.1, "first": "A", "bits": 0.25, "widest": 0.0277,
        "merge": "a", "rank": 0.0625, "server": 256,
    }

# %% wrong="questions" because="other slips"
def questions():
    return {
        "even": 1024, "moments": 268.4, "first": "both", "bits": 0.0625, "widest": 0.0608,
        "merge": "c", "rank": 4.0, "server": 4096,
    }

# %% wrong="questions" because="integers as texts, one choice in lower case"
def questions():
    return {
        "even": "2048", "moments": "134", "first": "b", "bits": "0.06", "widest": "0.03",
        "merge": "B", "rank": "1/4", "server": "128",
    }

# %% right="questions" because="numbers by hand"
def questions():
    return {
        "even": 2048, "moments": 134.2, "first": "B", "bits": 0.0635, "widest": 0.0304,
        "merge": "b", "rank": 0.25, "server": 128,
    }
