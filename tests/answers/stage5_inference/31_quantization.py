# %% [markdown]
# Answers to lesson 31: most are the reference with one mistake made, the right ones go another way.

# %% wrong="affine" because="the range does not have to contain 0"
- low, high = cut.amin(-1, keepdim=True).clamp(max=0), cut.amax(-1, keepdim=True).clamp(min=0)
+ low, high = cut.amin(-1, keepdim=True), cut.amax(-1, keepdim=True)

# %% wrong="affine" because="a zero point that is no whole number"
- zero = torch.round(-low / scale)
- codes = (torch.round(cut / scale) + zero).clamp(0, 2**bits - 1)
+ zero = -low / scale
+ codes = torch.round(cut / scale + zero).clamp(0, 2**bits - 1)

# %% wrong="affine" because="2**bits steps"
- scale = (high - low) / (2**bits - 1)
+ scale = (high - low) / 2**bits

# %% wrong="affine" because="codes are not clamped: where the zero point was rounded one leaves the range"
- codes = (torch.round(cut / scale) + zero).clamp(0, 2**bits - 1)
+ codes = torch.round(cut / scale) + zero

# %% wrong="affine" because="a range of zeros divides by 0"
- scale = torch.where(scale == 0, 1, scale)

# %% wrong="affine" because="a floor under the scale, which tiny weights fall below"
- scale = torch.where(scale == 0, 1, scale)
+ scale = torch.where(scale == 0, 1, scale).clamp(min=1e-5)

# %% wrong="affine" because="truncates"
- codes = (torch.round(cut / scale) + zero).clamp(0, 2**bits - 1)
+ codes = ((cut / scale).trunc() + zero).clamp(0, 2**bits - 1)

# %% wrong="affine" because="rounds half up"
- codes = (torch.round(cut / scale) + zero).clamp(0, 2**bits - 1)
+ codes = (torch.floor(cut / scale + 0.5) + zero).clamp(0, 2**bits - 1)

# %% wrong="affine" because="half precision stays half precision"
- wide = w.to(torch.promote_types(w.dtype, torch.float32))
+ wide = w

# %% wrong="affine" because="float64 goes through float32"
- wide = w.to(torch.promote_types(w.dtype, torch.float32))
+ wide = w.float()

# %% wrong="affine" because="channels are columns"
- size = {"tensor": (1, 1, -1), "channel": (rows, 1, columns)}.get(group, (rows, -1, group))
- cut = wide.reshape(size)
+ if group == "channel":
+     codes, scale, zero = quantize_affine(w.T.contiguous(), bits, group=rows)
+     return codes.T.contiguous(), scale, zero
+ size = {"tensor": (1, 1, -1)}.get(group, (rows, -1, group))
+ cut = wide.reshape(size)

# %% wrong="affine" because="one range for the tensor, whatever is asked for"
- size = {"tensor": (1, 1, -1), "channel": (rows, 1, columns)}.get(group, (rows, -1, group))
+ size = (1, 1, -1)

# %% wrong="affine" because="groups that do not fill a row are let through"
- if isinstance(group, int) and (group < 1 or columns % group):
+ if isinstance(group, int) and group < 1:

# %% wrong="affine" because="a view of the rows in place of a copy: reads groups down the columns"
- cut = wide.reshape(size)
+ cut = wide.T.reshape(size)

# %% wrong="affine" because="subtracts the zero point in uint8"
- cut = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
+ cut = codes.unflatten(1, (scale.shape[1], -1))

-     cut = cut - zero[..., None].to(scale.dtype)
+     cut = cut - zero[..., None]

# %% wrong="affine" because="dequantize forgets the zero point"
- if zero is not None:
-     cut = cut - zero[..., None].to(scale.dtype)

# %% wrong="affine" because="dequantize always gives float32"
- return (cut * scale[..., None]).flatten(1)
+ return (cut * scale[..., None]).flatten(1).float()

# %% wrong="affine" because="scales repeat instead of holding for neighbors"
- cut = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
- if zero is not None:
-     cut = cut - zero[..., None].to(scale.dtype)
- return (cut * scale[..., None]).flatten(1)
+ times = codes.shape[1] // scale.shape[1]
+ cut = codes.to(scale.dtype)
+ if zero is not None:
+     cut = cut - zero.repeat(1, times).to(scale.dtype)
+ return cut * scale.repeat(1, times)

# %% wrong="affine" because="dequantize multiplied out: in half scales rounded twice, and beyond float16's range"
- cut = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
- if zero is not None:
-     cut = cut - zero[..., None].to(scale.dtype)
- return (cut * scale[..., None]).flatten(1)
+ cut = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype) * scale[..., None]
+ if zero is not None:
+     cut = cut - (zero.to(scale.dtype) * scale)[..., None]
+ return cut.flatten(1)

# %% wrong="affine" because="zero points are added in uint8, and 256 wraps to 0 before the clamp"
- codes = (torch.round(cut / scale) + zero).clamp(0, 2**bits - 1)
+ codes = (torch.round(cut / scale).to(torch.int32) + zero.to(torch.int32)).to(torch.uint8)
+ codes = codes.clamp(0, 2**bits - 1)

# %% wrong="affine" because="a group wider than the row is taken for the row"
- if isinstance(group, int) and (group < 1 or columns % group):
+ if isinstance(group, int):
+     group = min(group, columns)
+ if isinstance(group, int) and (group < 1 or columns % group):

# %% right="affine" because="repeats scales, bounds by torch.minimum, codes by adding the zero point first"
def quantize_affine(w, bits, group="channel"):
    rows, columns = w.shape
    if not isinstance(group, str) and (group <= 0 or columns % group != 0):
        raise ValueError("groups")
    wide = w.double() if w.dtype == torch.float64 else w.float()
    if group == "tensor":
        parts = wide.reshape(1, -1)
    elif group == "channel":
        parts = wide
    else:
        parts = wide.reshape(-1, group)
    nothing = torch.zeros((), dtype=wide.dtype)
    low = torch.minimum(parts.min(1).values, nothing)
    high = torch.maximum(parts.max(1).values, nothing)
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    zero = (-low / scale).round()
    codes = (parts / scale[:, None]).round() + zero[:, None]
    codes = torch.clamp(codes, 0, 2**bits - 1).byte().view(rows, columns)
    shape = (1, 1) if group == "tensor" else (rows, -1)
    return codes, scale.view(shape), zero.byte().view(shape)


def dequantize(codes, scale, zero=None):
    if scale.shape == (1, 1):
        each, offset = scale, 0 if zero is None else zero.to(scale.dtype)
    else:
        times = codes.shape[1] // scale.shape[1]
        each = scale.repeat_interleave(times, 1)
        offset = 0 if zero is None else zero.to(scale.dtype).repeat_interleave(times, 1)
    return (codes.to(scale.dtype) - offset) * each

# %% wrong="symmetric" because="−128 is a code"
- cut, q = wide.reshape(size), 2 ** (bits - 1) - 1
+ cut, q = wide.reshape(size), 2 ** (bits - 1)

# %% wrong="symmetric" because="the largest number, not the largest magnitude"
- scale = cut.abs().amax(-1, keepdim=True) / q
+ scale = cut.amax(-1, keepdim=True) / q

# %% wrong="symmetric" because="2**bits − 1 steps"
- cut, q = wide.reshape(size), 2 ** (bits - 1) - 1
+ cut, q = wide.reshape(size), 2**bits - 1

# %% wrong="symmetric" because="a row of zeros gives NaN"
- scale = torch.where(scale == 0, 1, scale)

# %% wrong="symmetric" because="half precision stays half precision"
- wide = w.to(torch.promote_types(w.dtype, torch.float32))
+ wide = w

# %% wrong="symmetric" because="a group is ignored"
- size = {"tensor": (1, 1, -1), "channel": (rows, 1, columns)}.get(group, (rows, -1, group))
+ size = {"tensor": (1, 1, -1)}.get(group, (rows, 1, columns))

# %% wrong="symmetric" because="unsigned codes"
- return codes.reshape(w.shape).to(torch.int8), scale[..., 0]
+ return (codes + q).reshape(w.shape).to(torch.uint8), scale[..., 0]

# %% wrong="symmetric" because="groups are to divide the number of weights, and run over the ends of rows"
- if isinstance(group, int) and (group < 1 or columns % group):
+ if isinstance(group, int) and (group < 1 or w.numel() % group):

# %% wrong="symmetric" because="a group wider than the row is taken for the row"
- if isinstance(group, int) and (group < 1 or columns % group):
+ if isinstance(group, int):
+     group = min(group, columns)
+ if isinstance(group, int) and (group < 1 or columns % group):

# %% right="symmetric" because="largest of minimum and maximum, row by row of a view"
def quantize_symmetric(w, bits, group="channel"):
    rows, columns = w.shape
    if isinstance(group, int) and not (group > 0 and columns % group == 0):
        raise ValueError("groups")
    wide = w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    length = {"tensor": rows * columns, "channel": columns}.get(group, group)
    parts = wide.reshape(-1, length)
    top = 2 ** (bits - 1) - 1
    scale = torch.maximum(parts.max(1).values, -parts.min(1).values) / top
    scale = scale + (scale == 0)
    codes = (parts / scale[:, None]).round().to(torch.int8).view(rows, columns)
    return codes, scale.view(1, 1) if group == "tensor" else scale.view(rows, -1)

# %% wrong="llm_int8" because="outliers are rounded, too"
- outlier = (wide.abs() >= threshold).any(dim=0)
+ outlier = (wide.abs() >= math.inf).any(dim=0)

# %% wrong="llm_int8" because="outliers number by number, not column by column"
- kept = wide[:, outlier] @ weight[:, outlier].T
+ outlier = wide.abs() >= threshold
+ kept = wide.masked_fill(~outlier, 0) @ weight.T

# %% wrong="llm_int8" because="beyond the threshold only"
- outlier = (wide.abs() >= threshold).any(dim=0)
+ outlier = (wide.abs() > threshold).any(dim=0)

# %% wrong="llm_int8" because="positive outliers only"
- outlier = (wide.abs() >= threshold).any(dim=0)
+ outlier = (wide >= threshold).any(dim=0)

# %% wrong="llm_int8" because="the threshold is always 6"
- outlier = (wide.abs() >= threshold).any(dim=0)
+ outlier = (wide.abs() >= 6.0).any(dim=0)

# %% wrong="llm_int8" because="a token's scale counts its outliers"
- x_codes, x_scale = quantize_symmetric(wide.masked_fill(outlier, 0), 8)
+ x_codes, x_scale = quantize_symmetric(wide, 8)
+ x_codes = x_codes.masked_fill(outlier, 0)

# %% wrong="llm_int8" because="one scale for all tokens"
- x_codes, x_scale = quantize_symmetric(wide.masked_fill(outlier, 0), 8)
+ x_codes, x_scale = quantize_symmetric(wide.masked_fill(outlier, 0), 8, "tensor")

# %% wrong="llm_int8" because="w is rounded without the outlier columns"
- w_codes, w_scale = quantize_symmetric(weight, 8)
+ w_codes, w_scale = quantize_symmetric(weight.masked_fill(outlier, 0), 8)

# %% wrong="llm_int8" because="outlier columns take w from its codes"
- kept = wide[:, outlier] @ weight[:, outlier].T
- w_codes, w_scale = quantize_symmetric(weight, 8)
+ w_codes, w_scale = quantize_symmetric(weight, 8)
+ kept = wide[:, outlier] @ (w_codes * w_scale)[:, outlier].T

# %% wrong="llm_int8" because="sums in int8"
- sums = x_codes.to(torch.int32) @ w_codes.to(torch.int32).T
+ sums = x_codes @ w_codes.T

# %% wrong="llm_int8" because="always returns float32"
- return (kept + sums.to(work) * x_scale * w_scale.T).to(x.dtype)
+ return (kept + sums.to(work) * x_scale * w_scale.T).float()

# %% wrong="llm_int8" because="both parts are rounded to half before they are added"
- return (kept + sums.to(work) * x_scale * w_scale.T).to(x.dtype)
+ return kept.to(x.dtype) + (sums.to(work) * x_scale * w_scale.T).to(x.dtype)

# %% right="llm_int8" because="cuts the columns out, sums in float64"
def llm_int8_matmul(x, w, threshold=6.0):
    work = torch.float64
    loud = x.double().abs().amax(0) >= threshold if len(x) else torch.zeros(x.shape[1]).bool()
    quiet = ~loud
    y = x.to(work)[:, loud] @ w.to(work)[:, loud].T
    w_scale = w.to(work).abs().amax(1) / 127
    w_scale[w_scale == 0] = 1
    w_codes = (w.to(work) / w_scale[:, None]).round()
    if quiet.any():
        rest = x.to(work)[:, quiet]
        x_scale = rest.abs().amax(1) / 127
        x_scale[x_scale == 0] = 1
        codes = (rest / x_scale[:, None]).round()
        y = y + (codes @ w_codes[:, quiet].T) * x_scale[:, None] * w_scale
    return y.to(x.dtype)

# %% wrong="smoothquant" because="alpha on the wrong side"
- return (x_absmax**alpha / w_absmax ** (1 - alpha)).clamp(min=1e-5)
+ return (x_absmax ** (1 - alpha) / w_absmax**alpha).clamp(min=1e-5)

# %% wrong="smoothquant" because="the inverse"
- return (x_absmax**alpha / w_absmax ** (1 - alpha)).clamp(min=1e-5)
+ return (w_absmax ** (1 - alpha) / x_absmax**alpha).clamp(min=1e-5)

# %% wrong="smoothquant" because="alpha is always one half"
- return (x_absmax**alpha / w_absmax ** (1 - alpha)).clamp(min=1e-5)
+ return (x_absmax / w_absmax).sqrt().clamp(min=1e-5)

# %% wrong="smoothquant" because="the first matrix only"
- w_absmax = torch.cat(list(weights)).abs().amax(dim=0).clamp(min=1e-5)
+ w_absmax = weights[0].abs().amax(dim=0).clamp(min=1e-5)

# %% wrong="smoothquant" because="largest weight, not largest magnitude"
- w_absmax = torch.cat(list(weights)).abs().amax(dim=0).clamp(min=1e-5)
+ w_absmax = torch.cat(list(weights)).amax(dim=0).clamp(min=1e-5)

# %% wrong="smoothquant" because="no floor under s: a dead channel divides by 0"
- return (x_absmax**alpha / w_absmax ** (1 - alpha)).clamp(min=1e-5)
+ return x_absmax**alpha / w_absmax ** (1 - alpha)

# %% wrong="smoothquant" because="no floor under the weights"
- w_absmax = torch.cat(list(weights)).abs().amax(dim=0).clamp(min=1e-5)
+ w_absmax = torch.cat(list(weights)).abs().amax(dim=0)

# %% wrong="smoothquant" because="s goes into the gain, too"
- return (gain / s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]
+ return (gain * s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]

# %% wrong="smoothquant" because="s goes the wrong way"
- return (gain / s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]
+ return (gain * s).to(gain.dtype), [(w / s).to(w.dtype) for w in weights]

# %% wrong="smoothquant" because="the matrices are changed in place"
- return (gain / s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]
+ return (gain / s).to(gain.dtype), [w.mul_(s) for w in weights]

# %% wrong="smoothquant" because="in logarithms 0**0 is NaN: a silent channel at alpha 0"
- return (x_absmax**alpha / w_absmax ** (1 - alpha)).clamp(min=1e-5)
+ log = alpha * x_absmax.double().log() - (1 - alpha) * w_absmax.double().log()
+ return log.exp().clamp(min=1e-5).to(x_absmax.dtype)

# %% wrong="smoothquant" because="matrices take the format of s"
- return (gain / s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]
+ return (gain / s).to(gain.dtype), [w * s for w in weights]

# %% wrong="smoothquant" because="the gain takes the format of s"
- return (gain / s).to(gain.dtype), [(w * s).to(w.dtype) for w in weights]
+ return gain / s, [(w * s).to(w.dtype) for w in weights]

# %% right="smoothquant" because="by logarithms, matrix by matrix"
def smoothquant_scales(x_absmax, weights, alpha=0.5):
    largest = weights[0].abs().max(0).values
    for w in weights[1:]:
        largest = torch.maximum(largest, w.abs().max(0).values)
    largest = torch.maximum(largest, torch.full_like(largest, 1e-5))
    log = torch.xlogy(torch.full_like(x_absmax, alpha), x_absmax) - (1 - alpha) * largest.log()
    return torch.maximum(log.exp(), torch.full_like(log, 1e-5))


def smooth(gain, weights, s):
    gained = (gain.double() * (1 / s.double())).to(gain.dtype)
    return gained, [(w.double() @ torch.diag(s.double())).to(w.dtype) for w in weights]

# %% wrong="gptq" because="rounding to nearest: no error moves"
-         w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
-     w[:, end:] -= errors @ u[start:end, end:]

# %% wrong="gptq" because="columns beyond the block never hear of its errors"
-     w[:, end:] -= errors @ u[start:end, end:]

# %% wrong="gptq" because="errors are indexed by the column of the matrix, so that later blocks lose theirs (mlx-lm#1878)"
-     errors = w.new_empty(rows, end - start)
+     errors = w.new_zeros(rows, end - start)

-         errors[:, j - start] = (w[:, j] - back) / u[j, j]
-         w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
+         error = (w[:, j] - back) / u[j, j]
+         if j < end - start:
+             errors[:, j] = error
+         w[:, j + 1 : end] -= error[:, None] * u[j, j + 1 : end]

# %% wrong="gptq" because="the update of a block runs beyond it, and is made again (mlx-lm#1878)"
-         w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
+         last = min(columns, j + end - start)
+         w[:, j + 1 : last] -= errors[:, j - start, None] * u[j, j + 1 : last]

# %% wrong="gptq" because="scales from weights that lack the block's updates, as in the authors' code"
- codes = torch.empty_like(weight, dtype=torch.uint8)
+ codes, behind = torch.empty_like(weight, dtype=torch.uint8), w.clone()

-                 w[:, j : j + group], bits
+                 behind[:, j : j + group], bits

-     w[:, end:] -= errors @ u[start:end, end:]
+     w[:, end:] -= errors @ u[start:end, end:]
+     behind = w.clone()

# %% wrong="gptq" because="scales from the original weights"
- codes = torch.empty_like(weight, dtype=torch.uint8)
+ codes, first = torch.empty_like(weight, dtype=torch.uint8), w.clone()

-                 w[:, j : j + group], bits
+                 first[:, j : j + group], bits

# %% wrong="gptq" because="the factor of H inverted: a lower triangle"
- u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
+ u = torch.linalg.inv(torch.linalg.cholesky(damped)).T

# %% wrong="gptq" because="the factor of H, not of its inverse"
- u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
+ u = torch.linalg.cholesky(damped, upper=True)

# %% wrong="gptq" because="the inverse itself, unfactored, and never downdated"
- u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
+ u = torch.linalg.inv(damped)

# %% wrong="gptq" because="the wrong sign"
-         w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
-     w[:, end:] -= errors @ u[start:end, end:]
+         w[:, j + 1 : end] += errors[:, j - start, None] * u[j, j + 1 : end]
+     w[:, end:] += errors @ u[start:end, end:]

# %% wrong="gptq" because="the error is not divided by the diagonal"
-         errors[:, j - start] = (w[:, j] - back) / u[j, j]
+         errors[:, j - start] = w[:, j] - back

# %% wrong="gptq" because="no damping"
- damped = hessian.double() + damp * diagonal.mean() * torch.eye(columns).to(w)
+ damped = hessian.double() + 1e-9 * torch.eye(columns).to(w)

# %% wrong="gptq" because="one percent, whatever damp says"
- damped = hessian.double() + damp * diagonal.mean() * torch.eye(columns).to(w)
+ damped = hessian.double() + 0.01 * diagonal.mean() * torch.eye(columns).to(w)

# %% wrong="gptq" because="damping without the mean diagonal"
- damped = hessian.double() + damp * diagonal.mean() * torch.eye(columns).to(w)
+ damped = hessian.double() + damp * torch.eye(columns).to(w)

# %% wrong="gptq" because="dead columns widen their group"
- w = weight.double().masked_fill(diagonal == 0, 0)
+ w = weight.double().clone()

# %% wrong="gptq" because="a dead column's diagonal becomes 1 before the mean, as in the authors' code"
- diagonal = hessian.double().diagonal()
- w = weight.double().masked_fill(diagonal == 0, 0)
- damped = hessian.double() + damp * diagonal.mean() * torch.eye(columns).to(w)
+ dead = hessian.diagonal() == 0
+ w = weight.double().masked_fill(dead, 0)
+ whole = hessian.double() + torch.diag(dead.double())
+ damped = whole + damp * whole.diagonal().mean() * torch.eye(columns).to(w)

# %% wrong="gptq" because="the group of the block's first column for all of it"
-         g = j // group
+         g = j // group if group <= block else start // group
+         g = start // group

# %% wrong="gptq" because="updates the whole rest of the matrix after each column"
-         w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
-     w[:, end:] -= errors @ u[start:end, end:]
+         w[:, j + 1 :] -= errors[:, j - start, None] * u[j, j + 1 :]

# %% wrong="gptq" because="the weights are changed in place"
- w = weight.double().masked_fill(diagonal == 0, 0)
+ weight[:, diagonal == 0] = 0
+ w = weight if weight.dtype == torch.float64 else weight.double()

# %% wrong="gptq" because="the hessian is damped in place"
- damped = hessian.double() + damp * diagonal.mean() * torch.eye(columns).to(w)
+ hessian += damp * diagonal.mean() * torch.eye(columns).to(hessian)
+ damped = hessian.double()

# %% wrong="gptq" because="group and block that do not fit are let through"
- if group < 1 or block < 1 or columns % group or (block % group and group % block):
+ if group < 1 or block < 1 or columns % group:

# %% wrong="gptq" because="always float32 scales"
- return codes, scale.to(torch.promote_types(weight.dtype, torch.float32)), zero
+ return codes, scale.float(), zero

# %% wrong="gptq" because="in the weights' own precision"
- w = weight.double().masked_fill(diagonal == 0, 0)
+ w = weight.masked_fill(diagonal == 0, 0).to(weight.dtype)

# %% wrong="gptq" because="the hessian is not averaged over tokens"
- return 2 / len(wide) * wide.T @ wide
+ return 2 * wide.T @ wide

# %% wrong="gptq" because="half of the hessian"
- return 2 / len(wide) * wide.T @ wide
+ return 1 / len(wide) * wide.T @ wide

# %% wrong="gptq" because="half-precision inputs are multiplied as they are"
- return 2 / len(wide) * wide.T @ wide
+ return (2 / len(wide) * (x.T @ x)).double()

# %% wrong="gptq" because="tokens by tokens"
- return 2 / len(wide) * wide.T @ wide
+ return 2 / len(wide) * wide @ wide.T

# %% wrong="gptq" because="quiet columns count as dead"
- w = weight.double().masked_fill(diagonal == 0, 0)
+ w = weight.double().masked_fill(diagonal < 1e-8, 0)

# %% wrong="gptq" because="the default block refuses one group of fewer columns than it"
- block = min(block, columns)

# %% right="gptq" because="lazily: each group takes all errors so far in one product; the inverse by cholesky_inverse"
def layer_hessian(x):
    return torch.einsum("ti,tj->ij", x.double(), x.double()) * 2 / x.shape[0]


def gptq(weight, hessian, bits, group, block=128, damp=0.01):
    rows, columns = weight.shape
    block = min(block, columns)
    if min(group, block) < 1 or columns % group or max(group, block) % min(group, block):
        raise ValueError("sizes")
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky((inverse + inverse.T) / 2).T
    original = weight.double().clone()
    original[:, dead] = 0
    errors = torch.zeros_like(original)
    codes, scales, zeros = [], [], []
    for begin in range(0, columns, group):
        here = slice(begin, begin + group)
        now = original[:, here] - errors[:, :begin] @ u[:begin, here]
        low, high = now.amin(1).clamp(max=0), now.amax(1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low / scale).round()
        for k in range(group):
            j = begin + k
            code = ((now[:, k] / scale).round() + zero).clamp(0, 2**bits - 1)
            errors[:, j] = (now[:, k] - (code - zero) * scale) / u[j, j]
            now[:, k + 1 :] -= errors[:, j : j + 1] * u[j, j + 1 : begin + group]
            codes.append(code)
        scales.append(scale)
        zeros.append(zero)
    scale = torch.stack(scales, 1)
    if weight.dtype != torch.float64:
        scale = scale.float()
    return torch.stack(codes, 1).byte(), scale, torch.stack(zeros, 1).byte()

# %% wrong="awq" because="judges the weights, not the output"
- error = float((x @ (back - w).T).square().sum())
+ error = float((back - w).square().sum())

# %% wrong="awq" because="compares without dividing by s again"
- back = dequantize(*quantize_affine(w * s, bits, group)) / s
- error = float((x @ (back - w).T).square().sum())
+ back = dequantize(*quantize_affine(w * s, bits, group))
+ error = float((x @ (back - w * s).T).square().sum())

# %% wrong="awq" because="the largest magnitude, not the mean"
- magnitude = x.abs().mean(dim=0)
+ magnitude = x.abs().amax(dim=0)

# %% wrong="awq" because="the mean with its sign"
- magnitude = x.abs().mean(dim=0)
+ magnitude = x.mean(dim=0).abs()

# %% wrong="awq" because="s is not normalized"
- s = s / torch.sqrt(s.max() * s.min())

# %% wrong="awq" because="normalized by the mean"
- s = s / torch.sqrt(s.max() * s.min())
+ s = s / s.mean()

# %% wrong="awq" because="alpha = 0 is left out of the grid"
- for i in range(grid):
+ for i in range(min(1, grid - 1), grid):

# %% wrong="awq" because="alpha from 0 to 1, with both ends"
-     s = (magnitude ** (i / grid)).clamp(min=1e-4)
+     s = (magnitude ** (i / max(1, grid - 1))).clamp(min=1e-4)

-         best = error, s, i / grid
+         best = error, s, i / max(1, grid - 1)

# %% wrong="awq" because="always twenty candidates"
- for i in range(grid):
-     s = (magnitude ** (i / grid)).clamp(min=1e-4)
+ for i in range(20):
+     s = (magnitude ** (i / 20)).clamp(min=1e-4)

-         best = error, s, i / grid
+         best = error, s, i / 20

# %% wrong="awq" because="the last of equally good candidates"
-     if best is None or error < best[0]:
+     if best is None or error <= best[0]:

# %% wrong="awq" because="the worst candidate"
-     if best is None or error < best[0]:
+     if best is None or error > best[0]:

# %% wrong="awq" because="alpha is fixed at one half"
- for i in range(grid):
+ for i in [grid // 2]:

# %% wrong="awq" because="the group is ignored"
- back = dequantize(*quantize_affine(w * s, bits, group)) / s
+ back = dequantize(*quantize_affine(w * s, bits)) / s

# %% wrong="awq" because="a dead channel has s = 0"
- s = (magnitude ** (i / grid)).clamp(min=1e-4)
+ s = magnitude ** (i / grid)

# %% wrong="awq" because="returns float64"
- return best[1].to(torch.promote_types(weight.dtype, torch.float32)), best[2]
+ return best[1], best[2]

# %% wrong="awq" because="returns the number of the candidate"
- return best[1].to(torch.promote_types(weight.dtype, torch.float32)), best[2]
+ return best[1].to(torch.promote_types(weight.dtype, torch.float32)), best[2] * grid

# %% wrong="awq" because="float64 inputs give float32 weights a float64 s"
- return best[1].to(torch.promote_types(weight.dtype, torch.float32)), best[2]
+ return best[1].to(torch.promote_types(torch.promote_types(weight.dtype, inputs.dtype), torch.float32)), best[2]

- w, x = weight.double(), x.double()
+ inputs, w, x = x, weight.double(), x.double()

# %% wrong="awq" because="stops at the first rise, and the curve has several valleys"
-     if best is None or error < best[0]:
+     if best is not None and error > best[0]:
+         break
+     if best is None or error < best[0]:

# %% right="awq" because="all candidates in a list; the error by the inputs' second moments"
def awq_search(weight, x, bits, group, grid=20):
    w, inputs = weight.double(), x.double()
    moments = inputs.T @ inputs
    typical = inputs.abs().sum(0) / len(inputs)
    candidates = []
    for i in range(grid):
        s = torch.clamp(typical**(i / grid), min=1e-4)
        s = s / (s.max().sqrt() * s.min().sqrt())
        codes, scale, zero = quantize_affine(w * s, bits, group)
        change = dequantize(codes, scale, zero) / s - w
        candidates.append((float(torch.einsum("ri,ij,rj->", change, moments, change)), i, s))
    _, i, s = min(candidates, key=lambda c: (c[0], c[1]))
    return (s if weight.dtype == torch.float64 else s.float()), i / grid

# %% wrong="rotate" because="not divided by the root"
- return (y / math.sqrt(size)).to(x.dtype)
+ return y.to(x.dtype)

# %% wrong="rotate" because="divided by the size"
- return (y / math.sqrt(size)).to(x.dtype)
+ return (y / size).to(x.dtype)

# %% wrong="rotate" because="sum and difference next to each other: another order of the rows"
-     y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
+     y = torch.stack([first + second, first - second], dim=-1).flatten(-3)

# %% wrong="rotate" because="the whole row is one block"
-     n = x.shape[-1]
+     n = x.shape[-1]
+     rows, size = size, n

# %% wrong="rotate" because="one round too few"
- while half < size:
+ while 2 * half < size:

# %% wrong="rotate" because="in half precision"
- y = x.to(torch.promote_types(x.dtype, torch.float32))
+ y = x

# %% wrong="rotate" because="float64 goes through float32"
- y = x.to(torch.promote_types(x.dtype, torch.float32))
+ y = x.float()

# %% wrong="rotate" because="the matrix is formed and multiplied"
- y = x.to(torch.promote_types(x.dtype, torch.float32))
- half = 1
- while half < size:
-     first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
-     y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
-     half *= 2
- return (y / math.sqrt(size)).to(x.dtype)
+ y = x.to(torch.promote_types(x.dtype, torch.float32))
+ h = torch.ones(1, 1, dtype=y.dtype)
+ while len(h) < size:
+     h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
+ blocks = y.unflatten(-1, (-1, size)).unsqueeze(-1)
+ return ((h * blocks.transpose(-1, -2)).sum(-1).flatten(-2) / math.sqrt(size)).to(x.dtype)

# %% wrong="rotate" because="a size that is no power of two is let through"
- if size < 1 or size & (size - 1) or n % size:
+ if size < 1 or n % size:

# %% wrong="rotate" because="works in place"
- return (y / math.sqrt(size)).to(x.dtype)
+ return x.copy_((y / math.sqrt(size)).to(x.dtype))

# %% wrong="rotate" because="sums return to half precision before they are divided"
- return (y / math.sqrt(size)).to(x.dtype)
+ return y.to(x.dtype) / math.sqrt(size)

# %% right="rotate" because="from the largest distance down, scaled in each round"
def rotate(x, size):
    if size not in {2**p for p in range(30)} or x.shape[-1] % size:
        raise ValueError("size")
    y = x.double().unflatten(-1, (-1, size)).clone()
    distance = size // 2
    while distance:
        pairs = y.unflatten(-1, (-1, 2, distance))
        a, b = pairs[..., 0, :].clone(), pairs[..., 1, :].clone()
        y = torch.cat([(a + b).unsqueeze(-2), (a - b).unsqueeze(-2)], -2).flatten(-3) / 2**0.5
        distance //= 2
    return y.flatten(-2).to(x.dtype)

# %% wrong="fp4" because="the scale brings the largest to 6, as NVFP4 does, for both"
- if kind == "mx":
+ if kind == "never":

# %% wrong="fp4" because="the exponent is off by one"
- scale = torch.ldexp(torch.ones_like(m), torch.frexp(m).exponent - 3)
+ scale = torch.ldexp(torch.ones_like(m), torch.frexp(m).exponent - 2)

# %% wrong="fp4" because="rounds the exponent to nearest"
- scale = torch.ldexp(torch.ones_like(m), torch.frexp(m).exponent - 3)
+ scale = 2 ** (torch.round(torch.log2(m.clamp(min=1e-30))) - 2)

# %% wrong="fp4" because="the floor of a logarithm that was rounded up, just below a power of two"
- scale = torch.ldexp(torch.ones_like(m), torch.frexp(m).exponent - 3)
+ scale = 2 ** (torch.floor(torch.log2(m.clamp(min=1e-30))) - 2)

# %% wrong="fp4" because="one block size for both"
- block = {"mx": 32, "nv": 16}.get(kind)
+ block = {"mx": 32, "nv": 32}.get(kind)

# %% wrong="fp4" because="no scale of the tensor"
-     t = m.max() / (448 * 6)
+     t = torch.ones_like(m.max())

# %% wrong="fp4" because="the scale of the tensor forgets the 6"
-     t = m.max() / (448 * 6)
+     t = m.max() / 448

# %% wrong="fp4" because="block scales stay float32"
-     e = (m / 6 / t).clamp(max=448).nan_to_num(0).to(torch.float8_e4m3fn)
+     e = (m / 6 / t).clamp(max=448).nan_to_num(0)

# %% wrong="fp4" because="wraps beyond 6 instead of clipping"
- size = torch.where(scale > 0, cut / scale, 0).abs().clamp(max=6)
+ size = torch.where(scale > 0, cut / scale, 0).abs()

# %% wrong="fp4" because="even steps of one half everywhere"
- step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
+ step = 0.5

# %% wrong="fp4" because="ties go to the smaller level"
- levels = torch.copysign(torch.round(size / step) * step, cut)
+ levels = torch.copysign(torch.ceil(size / step - 0.5) * step, cut)

# %% wrong="fp4" because="the sign is lost"
- levels = torch.copysign(torch.round(size / step) * step, cut)
+ levels = torch.round(size / step) * step

# %% wrong="fp4" because="a block of zeros has a scale"
- scale = torch.where(m == 0, 0, scale)
+ scale = torch.where(m == 0, 1, scale)

# %% wrong="fp4" because="an unknown kind is taken for one of the two"
- block = {"mx": 32, "nv": 16}.get(kind)
+ block = {"mx": 32}.get(kind, 16)

# %% right="fp4" because="nearest of a list of levels, the even index at ties"
def quantize_fp4(x, kind):
    if kind not in ("mx", "nv"):
        raise ValueError(kind)
    block = 32 if kind == "mx" else 16
    if x.shape[1] % block:
        raise ValueError("columns")
    values = x.double().reshape(len(x), -1, block)
    largest = values.abs().max(-1).values
    if kind == "mx":
        safe = torch.where(largest > 0, largest, 1.0)
        exponent = torch.floor(torch.log2(safe))
        exponent = exponent - (2.0**exponent > safe).double() + (2.0 ** (exponent + 1) <= safe).double()
        scale = torch.where(largest > 0, 2.0 ** (exponent - 2), 0.0)
    else:
        t = float((x.float().abs().max() / 2688).item())
        if t == 0:
            scale = torch.zeros_like(largest)
        else:
            e = (largest.float() / 6 / t).clamp(max=448.0).to(torch.float8_e4m3fn)
            scale = (e.float() * torch.tensor(t, dtype=torch.float32)).double()
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    ratio = (values / torch.where(scale > 0, scale, 1.0)[..., None]).float().double().abs()
    ratio = torch.where(scale[..., None] > 0, ratio, 0.0)
    low, high = torch.bucketize(ratio, middle), torch.bucketize(ratio, middle, right=True)
    index = torch.where(low == high, low, torch.where(low % 2 == 0, low, high))
    levels = grid[index] * torch.where(values < 0, -1.0, 1.0)
    return levels.reshape(x.shape).float(), scale.float()

# %% wrong="qat" because="the gradient of rounding: none"
- return back + (w - w.detach())
+ return back

# %% wrong="qat" because="the scale is rounded to half before it multiplies"
- back = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(w.dtype)
+ codes, scale = quantize_symmetric(w.detach(), bits, group)
+ back = dequantize(codes, scale.to(w.dtype))

# %% right="qat" because="w + (q − w), exact by Sterbenz's lemma"
- return back + (w - w.detach())
+ return w + (back - w).detach()

# %% wrong="qat" because="nothing is rounded"
- return back + (w - w.detach())
+ return w

# %% wrong="qat" because="the gradient stops at the largest magnitudes"
- return back + (w - w.detach())
+ inside = (w.detach().abs() < w.detach().abs().amax(1, keepdim=True)).to(w.dtype)
+ return back + (w - w.detach()) * inside

# %% wrong="qat" because="a gradient through the scale besides"
- back = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(w.dtype)
- return back + (w - w.detach())
+ codes, scale = quantize_symmetric(w, bits, group)
+ return dequantize(codes, scale).to(w.dtype) + (w - w.detach())

# %% wrong="qat" because="the group is ignored"
- back = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(w.dtype)
+ back = dequantize(*quantize_symmetric(w.detach(), bits)).to(w.dtype)

# %% wrong="qat" because="affine levels"
- back = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(w.dtype)
+ back = dequantize(*quantize_affine(w.detach(), bits, group)).to(w.dtype)

# %% wrong="qat" because="half-precision weights come back in float32"
- back = dequantize(*quantize_symmetric(w.detach(), bits, group)).to(w.dtype)
+ back = dequantize(*quantize_symmetric(w.detach(), bits, group))

# %% wrong="qat" because="parts that share a weight stay tied: an embedding is rounded too"
- return torch.func.functional_call(model, weights, (x,), tie_weights=False)
+ return torch.func.functional_call(model, weights, (x,))

# %% wrong="qat" because="puts the rounded weights into the model"
- return torch.func.functional_call(model, weights, (x,), tie_weights=False)
+ for name, layer in model.named_modules():
+     if isinstance(layer, nn.Linear):
+         layer.weight.data = weights[f"{name}.weight"].detach()
+ return model(x)

# %% wrong="qat" because="rounds embeddings, too"
-     if isinstance(layer, nn.Linear)
+     if isinstance(layer, (nn.Linear, nn.Embedding))

# %% wrong="qat" because="the model's own weights are used"
- return torch.func.functional_call(model, weights, (x,), tie_weights=False)
+ return model(x)

# %% wrong="qat" because="the outermost layers only"
-     for name, layer in model.named_modules()
+     for name, layer in model.named_children()

# %% wrong="qat" because="bits and group are those of the experiment"
-     f"{name}.weight".lstrip("."): fake_quantize(layer.weight, bits, group)
+     f"{name}.weight".lstrip("."): fake_quantize(layer.weight, 3, "channel")

# %% wrong="qat" because="a model that is one layer is left as it is"
-     f"{name}.weight".lstrip("."): fake_quantize(layer.weight, bits, group)
-     for name, layer in model.named_modules()
-     if isinstance(layer, nn.Linear)
+     f"{name}.weight": fake_quantize(layer.weight, bits, group)
+     for name, layer in model.named_modules()
+     if isinstance(layer, nn.Linear) and name

# %% wrong="qat" because="rounded weights without a gradient"
-     f"{name}.weight".lstrip("."): fake_quantize(layer.weight, bits, group)
+     f"{name}.weight".lstrip("."): fake_quantize(layer.weight, bits, group).detach()

# %% right="qat" because="an autograd function; weights exchanged for the call and put back"
class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, bits, group):
        return dequantize(*quantize_symmetric(w, bits, group)).to(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fake_quantize(w, bits, group="channel"):
    return _Straight.apply(w, bits, group)


def qat_forward(model, x, bits, group="channel"):
    own = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            own[layer] = layer.weight
    try:
        for layer, weight in own.items():
            del layer._parameters["weight"]
            layer.weight = fake_quantize(weight, bits, group)
        return model(x)
    finally:
        for layer, weight in own.items():
            layer.__dict__.pop("weight", None)
            bias = layer._parameters.pop("bias", None)
            layer._parameters["weight"] = weight
            layer._parameters["bias"] = bias

# %% wrong="packing" because="shifts in uint8"
- eights = codes.unflatten(-1, (-1, 8)).to(torch.int32)
- words = torch.zeros_like(eights[..., 0])
+ eights = codes.unflatten(-1, (-1, 8))
+ words = torch.zeros_like(eights[..., 0], dtype=torch.int32)

# %% wrong="packing" because="the first code in the highest bits"
-     words = words | (eights[..., k] << (4 * i))
+     words = words | (eights[..., k] << (28 - 4 * i))

# %% wrong="packing" because="the order is ignored"
- for i, k in enumerate(ORDERS[order]):
+ for i, k in enumerate(range(8)):

- back = [ORDERS[order].index(k) for k in range(8)]
+ back = list(range(8))

# %% wrong="packing" because="the inverse order"
-     words = words | (eights[..., k] << (4 * i))
+     words = words | (eights[..., i] << (4 * k))

- back = [ORDERS[order].index(k) for k in range(8)]
+ back = list(ORDERS[order])

# %% wrong="packing" because="unpacks in the order in which it packs"
- back = [ORDERS[order].index(k) for k in range(8)]
+ back = list(ORDERS[order])

# %% wrong="packing" because="codes 8 elements apart share a word"
- eights = codes.unflatten(-1, (-1, 8)).to(torch.int32)
+ eights = codes.unflatten(-1, (8, -1)).transpose(-1, -2).to(torch.int32)

- return nibbles[..., back].flatten(-2).to(torch.uint8)
+ return nibbles[..., back].transpose(-1, -2).flatten(-2).to(torch.uint8)

# %% wrong="packing" because="the sign bit runs into the highest code"
- nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1)
+ nibbles = torch.stack([(words >> (4 * i)) % 16 if i < 7 else words >> 28 for i in range(8)], dim=-1)

# %% wrong="packing" because="words are int64"
- return words
+ return words.long()

# %% wrong="packing" because="codes that do not fill a word are cut off"
- if codes.shape[-1] % 8:
-     raise ValueError(f"{codes.shape[-1]} codes do not fill words of eight")
+ codes = codes[..., : codes.shape[-1] // 8 * 8]

# %% right="packing" because="bytes of two nibbles, reread as int32"
def pack_int4(codes, order="gptq"):
    if codes.shape[-1] % 8:
        raise ValueError("eight codes to a word")
    eights = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)[..., list(ORDERS[order])]
    weights = torch.tensor([16**i for i in range(8)], dtype=torch.int64)
    words = (eights.long() * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(words, order="gptq"):
    unsigned = words.long() % 2**32
    nibbles = torch.stack([unsigned // 16**i % 16 for i in range(8)], -1)
    codes = torch.empty_like(nibbles)
    codes[..., list(ORDERS[order])] = nibbles
    return codes.reshape(*words.shape[:-1], words.shape[-1] * 8).to(torch.uint8)

# %% wrong="w4a16_kernel" because="the first group's scale and zero for the whole tile (vllm#39705)"
-     group = at * 8 // GROUP  # of each word: a tile may hold several
+     group = at * 0 + start * 8 // GROUP

# %% wrong="w4a16_kernel" because="group 0 throughout"
-     group = at * 8 // GROUP  # of each word: a tile may hold several
+     group = at * 0

# %% wrong="w4a16_kernel" because="the number of the tile for the number of the group"
-     group = at * 8 // GROUP  # of each word: a tile may hold several
+     group = at // BLOCK_W

# %% wrong="w4a16_kernel" because="groups of words, not of columns"
-     group = at * 8 // GROUP  # of each word: a tile may hold several
+     group = at // GROUP

# %% wrong="w4a16_kernel" because="the zero point is ignored"
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+         w = (codes.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)

# %% wrong="w4a16_kernel" because="a symmetric zero point of 8"
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+         w = ((codes.to(tl.float32) - 8.0) * scale).to(x_ptr.dtype.element_ty)

# %% wrong="w4a16_kernel" because="the zero point of GPTQ's first format, off by one"
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+         w = ((codes.to(tl.float32) - zero - 1) * scale).to(x_ptr.dtype.element_ty)

# %% wrong="w4a16_kernel" because="the scale multiplies the code alone"
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+         w = (codes.to(tl.float32) * scale - zero).to(x_ptr.dtype.element_ty)

# %% wrong="w4a16_kernel" because="no & 15: higher codes stay in"
-         codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
+         codes = words >> (4 * i)

# %% wrong="w4a16_kernel" because="signed codes: the highest nibble is negative"
-         codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
+         codes = (words << (28 - 4 * i)) >> 28

# %% wrong="w4a16_kernel" because="the first code in the highest bits"
-         codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
+         codes = (words >> (28 - 4 * i)) & 15

# %% wrong="w4a16_kernel" because="codes of a word are taken for columns a tile apart"
-             x_ptrs + (8 * at + i)[:, None],
+             x_ptrs + (start * 8 + i * BLOCK_W + tl.arange(0, BLOCK_W))[:, None],

# %% wrong="w4a16_kernel" because="x is not masked at the end of its row"
-             mask=inside[:, None] & (tokens < n_tokens)[None, :],
+             mask=(at < n_words + BLOCK_W)[:, None] & (tokens < n_tokens)[None, :],

# %% wrong="w4a16_kernel" because="x is masked at the number of words, not of columns (aiter#4181)"
-             mask=inside[:, None] & (tokens < n_tokens)[None, :],
+             mask=(8 * at + i < n_words)[:, None] & (tokens < n_tokens)[None, :],

# %% wrong="w4a16_kernel" because="words beyond the row are loaded (vllm#52576)"
-     words = tl.load(words_ptrs + at[None, :], mask=known, other=0)
+     words = tl.load(words_ptrs + at[None, :], mask=(outs < n_out)[:, None], other=0)

# %% wrong="w4a16_kernel" because="the ragged tile of words is left out"
- for start in range(0, n_words, BLOCK_W):
+ for start in range(0, n_words // BLOCK_W * BLOCK_W, BLOCK_W):

# %% wrong="w4a16_kernel" because="scales of rows beyond the last"
-     scale = tl.load(scale_ptrs + group[None, :], mask=known, other=0.0).to(tl.float32)
+     scale = tl.load(scale_ptrs + group[None, :], mask=inside[None, :], other=0.0).to(tl.float32)

# %% wrong="w4a16_kernel" because="sums in the inputs' format"
-         acc = tl.dot(w, x, acc, input_precision="ieee")
+         acc = (acc + tl.dot(w, x, input_precision="ieee")).to(x.dtype).to(tl.float32)

# %% wrong="w4a16_kernel" because="the weight is computed in the inputs' format"
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+         fmt = x_ptr.dtype.element_ty
+         w = codes.to(fmt) * scale.to(fmt) - (zero * scale).to(fmt)

# %% wrong="w4a16_kernel" because="the weight stays float32, and x is widened"
- w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+ w = (codes.to(tl.float32) - zero) * scale

- acc = tl.dot(w, x, acc, input_precision="ieee")
+ acc = tl.dot(w, x.to(tl.float32), acc, input_precision="ieee")

# %% right="w4a16_kernel" because="the weight is rounded, and both are widened for the product"
- acc = tl.dot(w, x, acc, input_precision="ieee")
+ acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")

# %% wrong="w4a16_kernel" because="each code loads its word again"
-         codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
+         again = tl.load(words_ptrs + at[None, :], mask=known, other=0)
+         codes = (again >> (4 * i)) & 15

# %% wrong="w4a16_kernel" because="rows are 32 bits wide"
- out_rows, token_rows = outs[:, None].to(tl.int64), tokens[None, :].to(tl.int64)
+ out_rows, token_rows = outs[:, None], tokens[None, :]

# %% wrong="w4a16_kernel" because="scales have the stride of the words"
- scale_ptrs, zero_ptrs = scale_ptr + out_rows * scale_row, zero_ptr + out_rows * zero_row
+ scale_ptrs, zero_ptrs = scale_ptr + out_rows * words_row, zero_ptr + out_rows * zero_row

# %% wrong="w4a16_kernel" because="zero points have the stride of the scales"
- scale_ptrs, zero_ptrs = scale_ptr + out_rows * scale_row, zero_ptr + out_rows * zero_row
+ scale_ptrs, zero_ptrs = scale_ptr + out_rows * scale_row, zero_ptr + out_rows * scale_row

# %% wrong="w4a16_kernel" because="the output has the stride of x"
- y_ptrs = y_ptr + token_rows * y_row + outs[:, None]
+ y_ptrs = y_ptr + token_rows * x_row + outs[:, None]

# %% wrong="w4a16_kernel" because="rows beyond the last output are stored"
- inside = (outs < n_out)[:, None] & (tokens < n_tokens)[None, :]
+ inside = (outs < n_out + BLOCK_N)[:, None] & (tokens < n_tokens)[None, :]

# %% wrong="w4a16_kernel" because="tokens beyond the last are stored"
- inside = (outs < n_out)[:, None] & (tokens < n_tokens)[None, :]
+ inside = (outs < n_out)[:, None] & (tokens < n_tokens + BLOCK_M)[None, :]

# %% wrong="w4a16_kernel" because="a Python list of codes, which no GPU compiles"
-     for i in tl.static_range(8):
-         codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
+     shifts = [0, 4, 8, 12, 16, 20, 24, 28]
+     for i in range(8):
+         codes = (words >> shifts[i]) & 15

# %% wrong="w4a16_kernel" because="operands of two formats, which no GPU multiplies"
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
+         w = (codes.to(tl.float32) - zero) * scale

# %% right="w4a16_kernel" because="all columns of a tile at once, split into groups by the scales' addresses; transposed back at the end"
-     for i in tl.static_range(8):
-         codes = (words >> (4 * i)) & 15  # >> copies the sign bit of int32; & drops it
-         w = ((codes.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
-         x = tl.load(
-             x_ptrs + (8 * at + i)[:, None],
-             mask=inside[:, None] & (tokens < n_tokens)[None, :],
-             other=0.0,
-         )
-         acc = tl.dot(w, x, acc, input_precision="ieee")
+     offset = zero * scale
+     for i in tl.static_range(7, -1, -1):
+         codes = ((words >> (4 * i)) & 0xF).to(tl.float32)
+         w = (codes * scale - offset).to(x_ptr.dtype.element_ty)
+         x = tl.load(
+             x_ptrs + (8 * at[:, None] + i),
+             mask=(at < n_words)[:, None] & (tokens[None, :] < n_tokens),
+             other=0.0,
+         )
+         acc += tl.dot(w, x, input_precision="ieee")

# %% wrong="w4a16_kernel" because="float32 is multiplied as TF32, tl.dot's default"
- acc = tl.dot(w, x, acc, input_precision="ieee")
+ acc = tl.dot(w, x, acc)

# %% wrong="questions" because="a float32 scale in NVFP4"
- "nvfp4_bits": 4 + 8 / 16,
+ "nvfp4_bits": 4 + 32 / 16,

# %% wrong="questions" because="the zero point is forgotten"
- int3 = 3 + (16 + 3) / 32
+ int3 = 3 + 16 / 32

# %% wrong="questions" because="four times"
- "speedup": 16 / int3,
+ "speedup": 16 / 3,

# %% wrong="questions" because="divided by the size, not its root"
- "turned": 64 / math.sqrt(256),
+ "turned": 64 / 256,

# %% wrong="questions" because="s, not the range"
- "balanced": math.sqrt(64 * 0.25),
+ "balanced": math.sqrt(64 / 0.25),

# %% wrong="questions" because="the wrong sign"
- "moved": 0.3 * -0.5 / 2,
+ "moved": 0.3 * 0.5 / 2,

# %% wrong="questions" because="the share that is right"
- "wrong_share": 3 / 4,
+ "wrong_share": 1 / 4,

# %% wrong="questions" because="down to the code below, not to the middle"
- "steps": (0.35 - 1.5 * 0.2) / 0.001,
+ "steps": (0.35 - 0.2) / 0.001,

# %% right="questions" because="written out"
def questions():
    return {
        "nvfp4_bits": 4.5,
        "int3_bits": 3.59375,
        "speedup": 4.45,
        "turned": 4,
        "balanced": 4.0,
        "moved": -0.075,
        "wrong_share": 0.75,
        "steps": 50,
    }
