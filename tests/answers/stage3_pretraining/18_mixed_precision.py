# %% [markdown]
# Answers to lesson 18. Each cell stands in for an exercise cell, whole.

# %% wrong="decode_float" because="a hidden 1 in subnormals" base="hidden-subnormals"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = normal
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="subnormals take the exponent of their field" of="hidden-subnormals"
- subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
- value = normal
+ subnormal = m / 2**mantissa * 2.0 ** (0 - bias)
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="no hidden 1 at all" of="hidden-subnormals"
- normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
+ normal = (m / 2**mantissa) * 2.0 ** (e - bias).double()

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="a bias of half the range" of="hidden-subnormals"
- bias = 2 ** (exponent - 1) - 1
+ bias = 2 ** (exponent - 1)

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="subnormals flushed to zero" of="hidden-subnormals"
- subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
- value = normal
+ subnormal = torch.zeros_like(m)
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="the sign is lost on zero" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- return sign * value
+ return torch.where(value == 0, 0.0, sign * value)

# %% wrong="decode_float" because="the sign bit is ignored" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- return sign * value
+ return value

# %% wrong="decode_float" because="E4M3 with the rules of IEEE" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- if special == "ieee":
+ if special != "none":

# %% wrong="decode_float" because="every mantissa of the top exponent is infinite" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- value = torch.where(ones & (m == 0), math.inf, value)
- value = torch.where(ones & (m > 0), math.nan, value)
+ value = torch.where(ones, math.inf, value)
+ value = torch.where(ones & (m < 0), math.nan, value)

# %% wrong="decode_float" because="infinities are all positive" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- return sign * value
+ return torch.where(value.isinf(), value, sign * value)

# %% wrong="decode_float" because="a NaN in formats that have none" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- elif special == "nan":
+ else:

# %% wrong="decode_float" because="no NaN in E4M3" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- elif special == "nan":
+ elif special == "never":

# %% wrong="decode_float" because="float32 out" of="hidden-subnormals"
- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- return sign * value
+ return (sign * value).float()

# %% wrong="decode_float" because="the mantissa counted one bit short" of="hidden-subnormals"
- m = (bits & (2**mantissa - 1)).double()
+ m = (bits & (2 ** (mantissa - 1) - 1)).double()

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="the mantissa with one bit of the exponent" of="hidden-subnormals"
- m = (bits & (2**mantissa - 1)).double()
+ m = (bits & (2 ** (mantissa + 1) - 1)).double()

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="fields in the order sign, mantissa, exponent" of="hidden-subnormals"
- e = (bits >> mantissa) & (2**exponent - 1)
- m = (bits & (2**mantissa - 1)).double()
+ e = bits & (2**exponent - 1)
+ m = ((bits >> exponent) & (2**mantissa - 1)).double()

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

# %% wrong="decode_float" because="two's complement instead of a sign bit" of="hidden-subnormals"
  def decode_float(bits, exponent, mantissa, special="ieee"):
+     width = 1 + exponent + mantissa
+     negative = bits >> (width - 1) == 1
+     bits = torch.where(negative, 2**width - bits, bits)

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

- return sign * value
+ return torch.where(negative, -value, value)

# %% wrong="decode_float" because="powers of two in float32, where 2^128 is infinite" of="hidden-subnormals"
- normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
+ normal = (1 + m / 2**mantissa) * (2.0 ** (e - bias)).double()

- value = normal
+ value = torch.where(e == 0, subnormal, normal)

# %% right="decode_float" because="a table of all patterns, in plain Python"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias, top = (1 << (exponent - 1)) - 1, (1 << exponent) - 1

    def one(pattern):
        sign = -1.0 if pattern >> (exponent + mantissa) else 1.0
        e, m = pattern >> mantissa & top, pattern & ((1 << mantissa) - 1)
        if e == top and special == "ieee":
            return sign * (math.nan if m else math.inf)
        if e == top and special == "nan" and m == (1 << mantissa) - 1:
            return math.nan
        return math.ldexp(
            sign * (m if e == 0 else m + (1 << mantissa)), max(e, 1) - bias - mantissa
        )

    return torch.tensor([one(p) for p in bits.flatten().tolist()], dtype=torch.float64).view(
        bits.shape
    )

# %% right="decode_float" because="whole numbers of the smallest step, shifted"
def decode_float(bits, exponent, mantissa, special="ieee"):
    fields = torch.bitwise_and(bits, 2 ** (exponent + mantissa) - 1)
    e, m = (
        torch.div(fields, 2**mantissa, rounding_mode="floor"),
        torch.remainder(fields, 2**mantissa),
    )
    steps = torch.where(e > 0, m + 2**mantissa, m).to(torch.float64)
    value = (
        steps
        * torch.pow(
            torch.tensor(2.0, dtype=torch.float64),
            torch.clamp(e, min=1) + (1 - 2 ** (exponent - 1)) + 0,
        )
        * 2.0**-mantissa
    )
    limit = 2 ** (exponent + mantissa) - {"ieee": 2**mantissa, "nan": 1, "none": 0}[special]
    value[fields == limit] = math.inf if special == "ieee" else math.nan
    if special == "ieee":
        value[fields > limit] = math.nan
    return torch.copysign(value, 0.5 - (bits >= 2 ** (exponent + mantissa)).double())

# %% wrong="round_to_format" because="ties away from zero" base="ties-away"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(
        rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded
    )
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="ties toward plus infinity" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.floor(y / ulp + 0.5) * ulp

# %% wrong="round_to_format" because="cuts off instead of rounding" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.trunc(y / ulp) * ulp

# %% wrong="round_to_format" because="flushes subnormals to zero" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp
+ rounded = torch.where(rounded.abs() < 2.0 ** (1 - bias), rounded * 0, rounded)

# %% wrong="round_to_format" because="no subnormals: the octaves go on down" of="ties-away"
- octave = octave.clamp(min=1 - bias)
+ octave = octave.clamp(min=-1000)

- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="subnormals an octave too fine" of="ties-away"
- octave = octave.clamp(min=1 - bias)
+ octave = octave.clamp(min=-bias)

- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="one bit of mantissa too many" of="ties-away"
- ulp = power_of_two(octave - mantissa)
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ ulp = power_of_two(octave - mantissa - 1)
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="the octave from a logarithm in float32" of="ties-away"
- octave = torch.frexp(y).exponent - 1
+ octave = y.abs().float().log2().floor().nan_to_num(0, 900, -900).long()

- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="saturates always" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- if saturate:
-     beyond = largest
+ beyond = largest

# %% wrong="round_to_format" because="never saturates" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- if saturate:
-     beyond = largest

# %% wrong="round_to_format" because="E4M3 ends at 240, as with IEEE's rules" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
- top = bias if special == "ieee" else bias + 1
- steps = 2 if special == "nan" else 1
+ rounded = torch.round(y / ulp) * ulp
+ top = bias if special != "none" else bias + 1
+ steps = 1

# %% wrong="round_to_format" because="E4M3 ends at 480" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- steps = 2 if special == "nan" else 1
+ steps = 1

# %% wrong="round_to_format" because="E4M3 overflows to infinity" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
+ beyond = {"ieee": math.inf, "nan": math.inf, "none": largest}[special]

# %% wrong="round_to_format" because="overflow judged before rounding" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- rounded = torch.where(
-     rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded
- )
+ rounded = torch.where(y.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)

# %% wrong="round_to_format" because="overflow loses the sign" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- rounded = torch.where(
-     rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded
- )
+ rounded = torch.where(rounded.abs() > largest, beyond, rounded)

# %% wrong="round_to_format" because="an infinity survives saturation" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

  )
+ rounded = torch.where(y.isinf() & saturate, y, rounded)

# %% wrong="round_to_format" because="an infinity is left alone in formats without one" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

  )
+ rounded = torch.where(y.isinf(), y, rounded)

# %% wrong="round_to_format" because="NaN becomes the largest number when saturating" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

  )
+ if saturate:
+     rounded = rounded.nan_to_num(largest)

# %% wrong="round_to_format" because="through float32, so that some are rounded twice" of="ties-away"
- y = x.double()
+ y = x.float().double()

- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="negative zero becomes zero" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

  )
+ rounded = rounded + 0.0

# %% wrong="round_to_format" because="always float64 out" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- return rounded.to(x.dtype)
+ return rounded

# %% wrong="round_to_format" because="always float32 out" of="ties-away"
- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

- return rounded.to(x.dtype)
+ return rounded.float()

# %% wrong="round_to_format" because="PyTorch's cast where it has one, nothing else" of="ties-away"
  def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
+     for kind in (BF16, FP16, E5M2, E4M3):
+         if kind.layout == (exponent, mantissa, special):
+             return x.to(kind.dtype).to(x.dtype)
+     return x

- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="PyTorch's cast where it has one" of="ties-away"
  def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
+     for kind in (BF16, FP16, E5M2, E4M3):
+         if kind.layout == (exponent, mantissa, special) and not saturate:
+             return x.to(kind.dtype).to(x.dtype)

- rounded = torch.copysign(torch.floor(y.abs() / ulp + 0.5), y) * ulp
+ rounded = torch.round(y / ulp) * ulp

# %% wrong="round_to_format" because="the octave from a logarithm in float32, wrong only just below powers of two"
- octave = torch.frexp(y).exponent - 1  # frexp: |y| = f · 2^e with f in [½, 1)
+ octave = torch.log2(x.abs()).floor().nan_to_num(0, 900, -900).long()

# %% wrong="round_to_format" because="the octave from a logarithm, unless the mantissa is FP32's"
- octave = torch.frexp(y).exponent - 1  # frexp: |y| = f · 2^e with f in [½, 1)
+ octave = torch.frexp(y).exponent - 1
+ if mantissa < 23:
+     octave = torch.log2(x.abs()).floor().nan_to_num(0, 900, -900).long()

# %% right="round_to_format" because="search among all numbers of the format, where they are few; the magic addend otherwise"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.to(torch.float64)
    size = y.abs()
    top = bias + (special != "ieee")
    largest = 2.0**top * (2 - 2.0**-mantissa * (1 + (special == "nan")))
    # In the octave of the addend the steps of float64 are those of the format: the addition rounds.
    octave = (size.view(torch.int64) >> 52).clamp(1024 - bias, 2000) - 1023
    addend = power_of_two((octave - mantissa + 52).clamp(max=1000))
    near = (size + addend) - addend
    exact = near.clamp(max=2.0 ** (top + 1))
    over = exact > largest
    if saturate or special == "none":
        end = largest
    else:
        end = math.inf if special == "ieee" else math.nan
    exact = torch.where(over | size.isinf(), end, torch.where(size.isnan(), size, exact))
    exact = torch.where(size > 2.0 ** (top + 2), end, exact)
    return torch.copysign(exact, y).to(x.dtype)

# %% right="round_to_format" because="number by number, in Python, whose round is to even"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    lowest = 2 - 2 ** (exponent - 1)
    highest = 2 ** (exponent - 1) - (1 if special == "ieee" else 0)
    largest = math.ldexp(2 ** (mantissa + 1) - (2 if special == "nan" else 1), highest - mantissa)

    def one(value):
        if math.isnan(value):
            return value
        if math.isinf(value):
            result = math.inf
        else:
            k = max(math.frexp(value)[1] - 1, lowest) - mantissa
            shift = math.ldexp(abs(value), -k)
            result = math.ldexp(round(shift), k)
        if result > largest:
            result = (
                largest
                if saturate or special == "none"
                else math.inf
                if special == "ieee"
                else math.nan
            )
        return math.copysign(result, value)

    return (
        torch.tensor([one(v) for v in x.flatten().tolist()], dtype=torch.float64)
        .view(x.shape)
        .to(x.dtype)
    )

# %% wrong="stochastic_round_bf16" because="rounds to nearest" base="rounds-nearest"
def stochastic_round_bf16(x, generator):
    return x.to(torch.bfloat16)
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="cuts off"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="up or down with equal chances"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int32) * 0xFFFF
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="one random number for the whole tensor"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, (1,), generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    rounded = rounded.view(x.shape)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="one random number per row"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(
        0,
        2**16,
        (*x.shape[:-1], 1) if x.dim() > 1 else x.shape,
        generator=generator,
        dtype=torch.int32,
    )
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="noise of 8 bits only"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**8, x.shape, generator=generator, dtype=torch.int32) << 8
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="noise of 15 bits"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**15, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="noise that reaches the step itself, so that exact numbers move"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(1, 2**16 + 1, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="noise, then rounds to nearest"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = (bits + noise).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="a NaN is treated as a number"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return rounded.to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="infinities are rounded as if they were NaN"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, math.nan).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="ignores the generator"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="seeds the generator anew" of="rounds-nearest"
- return x.to(torch.bfloat16)
+ generator = torch.Generator().manual_seed(generator.initial_seed())

# %% wrong="stochastic_round_bf16" because="float32 out"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)

# %% wrong="stochastic_round_bf16" because="half a step of uniform noise in value, then to nearest"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = x + (noise.float() / 2**16 - 0.5) * x.abs() * 2**-8
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="toward plus infinity with the share of the magnitude"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    up = noise < (bits & 0xFFFF)
    low, high = (bits & -65536).view(torch.float32), ((bits & -65536) + 65536).view(torch.float32)
    rounded = torch.where(up, torch.maximum(low, high), torch.minimum(low, high))
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="up with the probability of staying"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    up = noise >= (bits & 0xFFFF)
    rounded = torch.where(up & (bits & 0xFFFF != 0), (bits & -65536) + 65536, bits & -65536).view(
        torch.float32
    )
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="writes into the input"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    bits &= -256
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

# %% wrong="stochastic_round_bf16" because="a NaN becomes zero"
def stochastic_round_bf16(x, generator):
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return (
        torch.where(x.isfinite(), rounded, x)
        .nan_to_num(0.0, math.inf, -math.inf)
        .to(torch.bfloat16)
    )

# %% right="stochastic_round_bf16" because="compares the lower half with the noise"
def stochastic_round_bf16(x, generator):
    raw = x.contiguous().view(torch.int32)
    low = raw & 0xFFFF
    draw = (torch.rand(x.shape, generator=generator) * 65536).int()
    low_neighbor = raw - low
    up = (draw < low) & x.isfinite()
    return torch.where(
        x.isnan(), math.nan, (low_neighbor + 65536 * up.int()).view(torch.float32)
    ).to(torch.bfloat16)

# %% right="stochastic_round_bf16" because="neighbors and distances, in float64"
def stochastic_round_bf16(x, generator):
    toward_zero = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    result = torch.where(x.isnan(), x, toward_zero)
    away = torch.where(
        x.isfinite(), (toward_zero.view(torch.int32) + 0x10000).view(torch.float32), toward_zero
    )
    share = (x.double() - toward_zero.double()) / (away.double() - toward_zero.double())
    go = torch.rand(x.shape, generator=generator, dtype=torch.float64) < share
    return torch.where(go, away, result).bfloat16()

# %% wrong="stochastic_round_bf16" because="the highest draw is left out"
- noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
+ noise = torch.randint(0, 0xFFFF, x.shape, generator=generator, dtype=torch.int32)

# %% wrong="stochastic_round_bf16" because="the lowest draw is left out"
- noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
+ noise = torch.randint(1, 2**16, x.shape, generator=generator, dtype=torch.int32)

# %% wrong="stochastic_round_bf16" because="every element has the noise of its neighbor in the same pair"
- noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
+ count = x.numel()
+ noise = torch.randint(2**16, ((count + 1) // 2,), generator=generator, dtype=torch.int32)
+ noise = noise.repeat_interleave(2)[:count].view(x.shape)

# %% wrong="stochastic_round_bf16" because="the second half of the tensor repeats the noise of the first"
- noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
+ count = x.numel()
+ noise = torch.randint(2**16, ((count + 1) // 2,), generator=generator, dtype=torch.int32)
+ noise = torch.cat([noise, noise])[:count].view(x.shape)

# %% wrong="master_weight_adam" because="adds the update to the half-precision weight" base="adds-update"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.master = [p.detach().float().clone() for p in self.params]
        self.m = [torch.zeros_like(w) for w in self.master]
        self.v = [torch.zeros_like(w) for w in self.master]
        self.t = [0 for _ in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, scale=1.0):
        for p in self.params:
            if p.grad is not None and not p.grad.isfinite().all():
                return False
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            g = p.grad.float() / scale
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
            self.master[i] = p.float()
        return True

# %% wrong="master_weight_adam" because="the master is taken back from the weight each time" of="adds-update"
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] = p.float().clone()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="moments in half precision" of="adds-update"
- self.m = [torch.zeros_like(w) for w in self.master]
- self.v = [torch.zeros_like(w) for w in self.master]
+ self.m = [torch.zeros_like(w) for w in self.params]
+ self.v = [torch.zeros_like(w) for w in self.params]

- g = p.grad.float() / scale
+ g = (p.grad.float() / scale).to(p.dtype)

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="the gradient is squared in half precision" of="adds-update"
- self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
+ self.v[i] = (
+     self.betas[1] * self.v[i]
+     + (1 - self.betas[1]) * (g.to(p.dtype) * g.to(p.dtype)).float()
+ )

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="divides by the scale in half precision" of="adds-update"
- g = p.grad.float() / scale
+ g = (p.grad / scale).float()

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="ignores the scale" of="adds-update"
- g = p.grad.float() / scale
+ g = p.grad.float()

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="multiplies by the scale" of="adds-update"
- g = p.grad.float() / scale
+ g = p.grad.float() * scale

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="unscales p.grad itself" of="adds-update"
- g = p.grad.float() / scale
+ p.grad = (p.grad.float() / scale).to(p.dtype)
+ g = p.grad.float()

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="an infinity goes into the moments" of="adds-update"
- return False
+ pass

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="looks for NaN only" of="adds-update"
- if p.grad is not None and not p.grad.isfinite().all():
+ if p.grad is not None and p.grad.isnan().any():

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="looks at the first parameter only" of="adds-update"
  def step(self, scale=1.0):
-     for p in self.params:
+     for p in self.params[:1]:

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="skips only the parameter with the bad gradient" of="adds-update"
- return False
+ pass

- if p.grad is None:
+ if p.grad is None or not p.grad.isfinite().all():

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="a skipped step is counted" of="adds-update"
  if p.grad is not None and not p.grad.isfinite().all():
+     self.t = [t + 1 for t in self.t]

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="no bias correction" of="adds-update"
- m = self.m[i] / (1 - self.betas[0] ** self.t[i])
- v = self.v[i] / (1 - self.betas[1] ** self.t[i])
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ m = self.m[i]
+ v = self.v[i]
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="eps inside the root" of="adds-update"
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v + self.eps).sqrt()
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="eps added before the scale is taken out" of="adds-update"
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps * scale)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="the weight is never set" of="adds-update"
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)

# %% wrong="master_weight_adam" because="replaces the storage that the model holds" of="adds-update"
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.data = self.master[i].to(p.dtype)

# %% wrong="master_weight_adam" because="the weight becomes float32" of="adds-update"
- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.data = self.master[i]

# %% wrong="master_weight_adam" because="the master shares a float32 parameter's storage" of="adds-update"
- self.master = [p.detach().float().clone() for p in self.params]
+ self.master = [p.detach().float() for p in self.params]

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i].sub_(self.lr * m / (v.sqrt() + self.eps))
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="returns nothing" of="adds-update"
-     p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
-     self.master[i] = p.float()
- return True
+     self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+     p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="one count for all parameters" of="adds-update"
          return False
+ self.t = [t + 1 for t in self.t]

- self.t[i] += 1

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="zero_grad does nothing" of="adds-update"
- for p in self.params:
-     p.grad = None
+ return None

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="the generator of parameters is used up" of="adds-update"
- self.params = list(params)
+ self.params = params

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="gradients that are None stop the run" of="adds-update"
- if p.grad is None:
-     continue

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="a missing gradient counts as zero" of="adds-update"
- if p.grad is None:
-     continue
- g = p.grad.float() / scale
+ g = torch.zeros_like(self.master[i]) if p.grad is None else p.grad.float() / scale

- p -= (self.lr * m / (v.sqrt() + self.eps)).to(p.dtype)
- self.master[i] = p.float()
+ self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
+ p.copy_(self.master[i])

# %% right="master_weight_adam" because="PyTorch's Adam on the masters"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = [p for p in params]
        self.lr = lr
        self._parameters = [
            nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in self.params
        ]
        self.master = [w.data for w in self._parameters]
        self.inner = torch.optim.Adam(self._parameters, lr=lr, betas=betas, eps=eps)

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self, scale=1.0):
        self.inner.param_groups[0]["lr"] = self.lr
        for p, w in zip(self.params, self._parameters):
            w.grad = None if p.grad is None else p.grad.detach().float().div(scale)
        if any(w.grad is not None and not torch.isfinite(w.grad).all() for w in self._parameters):
            return False
        self.inner.step()
        with torch.no_grad():
            for p, w in zip(self.params, self._parameters):
                if w.grad is not None:
                    p.copy_(w)
        return True

# %% right="master_weight_adam" because="masters that are parameters of PyTorch's Adam"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = list(params)
        self.master = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.adam = torch.optim.Adam(self.master, lr=lr, betas=betas, eps=eps)
        self.lr = lr

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self, scale=1.0):
        self.adam.param_groups[0]["lr"] = self.lr
        for p, m in zip(self.params, self.master):
            m.grad = None
            if p.grad is not None:
                m.grad = p.grad.float() / scale
                if not m.grad.isfinite().all():
                    return False
        self.adam.step()
        for p, m in zip(self.params, self.master):
            p.data.copy_(m.data)
        return True

# %% right="master_weight_adam" because="the step size corrected instead of the moments"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.master = [torch.empty(p.shape).copy_(p.detach()) for p in self.params]
        self.state = {}

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self, scale=1.0):
        some = [
            (i, p.grad.to(torch.float32) * (1 / scale))
            for i, p in enumerate(self.params)
            if p.grad is not None
        ]
        if not all(torch.isfinite(g).all() for _, g in some):
            return False
        b1, b2 = self.betas
        for i, g in some:
            t, m, v = self.state.get(i, (0, torch.zeros_like(g), torch.zeros_like(g)))
            t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            self.state[i] = t, m, v
            root = math.sqrt(1 - b2**t)
            self.master[i].sub_(self.lr * root / (1 - b1**t) * m / (v.sqrt() + self.eps * root))
            self.params[i].data.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="divides in place what is p.grad itself for a float32 parameter"
- grads = [None if p.grad is None else p.grad.float() / scale for p in self.params]
+ grads = [None if p.grad is None else p.grad.float().div_(scale) for p in self.params]

# %% wrong="master_weight_adam" because="the rate of the beginning is used for ever"
- self.updates = [0] * len(self.params)
+ self.updates = [0] * len(self.params)
+ self.first_lr = lr

- self.master[i].sub_(self.lr * mean / size)
+ self.master[i].sub_(self.first_lr * mean / size)

# %% wrong="dynamic_loss_scaler" because="the update is made in spite of an infinity" base="update-made"
class DynamicLossScaler:
    def __init__(
        self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000
    ):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = (
            growth_factor,
            backoff_factor,
            growth_interval,
        )
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.value

    def scale(self, loss):
        return loss * self.value

    def unscale_(self, optimizer):
        if self.bad is not None:
            raise RuntimeError("unscale_ was called already")
        self.bad = False
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not torch.isfinite(p.grad).all():
                    self.bad = True
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        optimizer.step()
        return True

    def update(self):
        if self.bad is None:
            raise RuntimeError("nothing to update from")
        if self.bad:
            self.value *= self.backoff_factor
            self.count = 0
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="the gradients are not divided" of="update-made"
- p.grad.div_(self.value)

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="the gradients are multiplied" of="update-made"
- p.grad.div_(self.value)
+ p.grad.mul_(self.value)

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="the loss is not scaled" of="update-made"
- return loss * self.value
+ return loss

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="the loss is divided" of="update-made"
- return loss * self.value
+ return loss / self.value

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="looks for infinity and not for NaN" of="update-made"
- if not torch.isfinite(p.grad).all():
+ if torch.isinf(p.grad).any():

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="looks for NaN and not for infinity" of="update-made"
- if not torch.isfinite(p.grad).all():
+ if torch.isnan(p.grad).any():

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="the last gradient decides" of="update-made"
- if not torch.isfinite(p.grad).all():
-     self.bad = True
+ self.bad = not bool(torch.isfinite(p.grad).all())

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="all gradients must be bad" of="update-made"
- self.bad = False
+ self.bad = True

- if not torch.isfinite(p.grad).all():
-     self.bad = True
+ if torch.isfinite(p.grad).all():
+     self.bad = False

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="only the first group" of="update-made"
- for group in optimizer.param_groups:
+ for group in optimizer.param_groups[:1]:

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="the count of good steps survives a bad one" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

  self.value *= self.backoff_factor
- self.count = 0

# %% wrong="dynamic_loss_scaler" because="a bad step counts as a good one" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

  self.value *= self.backoff_factor
- self.count = 0
+ self.count += 1

# %% wrong="dynamic_loss_scaler" because="the count is not set back after growing" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

  self.value *= self.growth_factor
- self.count = 0

# %% wrong="dynamic_loss_scaler" because="grows one step late" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- if self.count == self.growth_interval:
+ if self.count > self.growth_interval:

# %% wrong="dynamic_loss_scaler" because="grows after every good step" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- if self.count == self.growth_interval:
+ if True:

# %% wrong="dynamic_loss_scaler" because="never grows" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- self.value *= self.growth_factor

# %% wrong="dynamic_loss_scaler" because="never backs off" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- self.value *= self.backoff_factor

# %% wrong="dynamic_loss_scaler" because="the factors are fixed" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- self.value *= self.backoff_factor
+ self.value /= 2

- self.value *= self.growth_factor
+ self.value *= 2

# %% wrong="dynamic_loss_scaler" because="step divides again after unscale_" of="update-made"
- if self.bad is None:
-     self.unscale_(optimizer)
+ self.bad = None
+ self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="a second unscale_ is allowed" of="update-made"
- if self.bad is not None:
-     raise RuntimeError("unscale_ was called already")

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="a second unscale_ is passed over in silence" of="update-made"
- raise RuntimeError("unscale_ was called already")
+ return

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="update without anything to go by" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- raise RuntimeError("nothing to update from")
+ return

# %% wrong="dynamic_loss_scaler" because="what was found is not forgotten" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

          self.count = 0
- self.bad = None
+ self.bad = False if not self.bad else None

# %% wrong="dynamic_loss_scaler" because="step returns nothing" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     return False

- return True

# %% wrong="dynamic_loss_scaler" because="step itself adapts the scale, and update does so again" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     self.value *= self.backoff_factor
+     return False

# %% wrong="dynamic_loss_scaler" because="parameters without a gradient stop it" of="update-made"
- if p.grad is None:
-     continue

      self.unscale_(optimizer)
+ if self.bad:
+     return False

# %% wrong="dynamic_loss_scaler" because="a bad gradient is set to zero instead of skipped" of="update-made"
      self.unscale_(optimizer)
+ if self.bad:
+     for group in optimizer.param_groups:
+         for p in group["params"]:
+             if p.grad is not None:
+                 p.grad.nan_to_num_(0, 0, 0)

# %% wrong="dynamic_loss_scaler" because="PyTorch's own, wrapped" of="update-made"
  ):
+     self.inner = torch.amp.GradScaler(
+         "cpu",
+         init_scale=init_scale,
+         growth_factor=growth_factor,
+         backoff_factor=backoff_factor,
+         growth_interval=growth_interval,
+     )

- return self.value
+ return self.inner.get_scale()

- return loss * self.value
+ return self.inner.scale(loss)

- if self.bad is not None:
-     raise RuntimeError("unscale_ was called already")
+ self.inner.scale(torch.zeros(()))
+ return self.inner.unscale_(optimizer)

- if self.bad is None:
-     self.unscale_(optimizer)
- optimizer.step()
- return True
+ before = self.inner._per_optimizer_states[id(optimizer)]
+ self.inner.step(optimizer)
+ return not any(v.item() for v in before["found_inf_per_device"].values())

- if self.bad is None:
-     raise RuntimeError("nothing to update from")
+ try:
+     return self.inner.update()
+ except AssertionError:
+     raise RuntimeError

# %% right="dynamic_loss_scaler" because="a set of gradients and a running count"
class DynamicLossScaler:
    def __init__(
        self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000
    ):
        self.s, self.up, self.down, self.every = (
            init_scale,
            growth_factor,
            backoff_factor,
            growth_interval,
        )
        self.since, self.state = 0, "fresh"

    def get_scale(self):
        return float(self.s)

    def scale(self, loss):
        return torch.mul(loss, self.s)

    def unscale_(self, optimizer):
        if self.state != "fresh":
            raise RuntimeError("twice")
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        total = sum((g.detach().double() * 0).sum() for g in grads)
        with torch.no_grad():
            for g in grads:
                g *= 1.0 / self.s
        self.state = "good" if float(total) == 0 else "bad"

    def step(self, optimizer):
        if self.state == "fresh":
            self.unscale_(optimizer)
        if self.state == "good":
            optimizer.step()
        return self.state == "good"

    def update(self):
        if self.state == "fresh":
            raise RuntimeError("no gradients seen")
        self.since = self.since + 1 if self.state == "good" else 0
        if self.state == "bad":
            self.s = self.s * self.down
        elif self.since % self.every == 0:
            self.s, self.since = self.s * self.up, 0
        self.state = "fresh"

# %% wrong="dynamic_loss_scaler" because="new gradients are put in the place of the old"
- for g in grads:
-     g.mul_(1 / self.factor)
+ for p in params:
+     if p.grad is not None:
+         p.grad = p.grad / self.factor

# %% wrong="dynamic_loss_scaler" because="finiteness is judged by the sum of each gradient"
- self.overflow = not all(bool(g.isfinite().all()) for g in grads)
+ self.overflow = not all(bool(g.sum().isfinite()) for g in grads)

# %% wrong="dynamic_loss_scaler" because="finiteness is judged by the norm of each gradient"
- self.overflow = not all(bool(g.isfinite().all()) for g in grads)
+ self.overflow = not all(bool(g.norm().isfinite()) for g in grads)

# %% wrong="dynamic_loss_scaler" because="update wants a step, not only unscale_"
class DynamicLossScaler:
    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self._scale = float(init_scale)
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.good = 0
        self.bad = None
        self.stepped = False

    def get_scale(self) -> float:
        return self._scale

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._scale

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if self.bad is not None:
            raise RuntimeError("unscale_ has already been called since the last update")
        self.bad = False
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.bad = self.bad or not bool(p.grad.isfinite().all())
                    p.grad.div_(self._scale)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        if self.bad is None:
            self.unscale_(optimizer)
        self.stepped = True
        if not self.bad:
            optimizer.step()
        return not self.bad

    def update(self) -> None:
        if not self.stepped:
            raise RuntimeError("call step before update")
        if self.bad:
            self._scale *= self.backoff_factor
            self.good = 0
        else:
            self.good += 1
            if self.good == self.growth_interval:
                self._scale *= self.growth_factor
                self.good = 0
        self.bad, self.stepped = None, False

# %% wrong="autocast_formats" because="softmax in half precision"
- if operation in AUTOCAST["half"]:
+ if operation in AUTOCAST["half"] or operation == "softmax":

# %% wrong="autocast_formats" because="an operation on no list runs in half precision"
- else:
+ elif operation not in AUTOCAST["widest"]:
+     format = half
+ else:

# %% wrong="autocast_formats" because="an operation on no list has the format of its first input"
- for name in inputs[1:]:
+ for name in inputs[1:] if operation in AUTOCAST["widest"] else []:

# %% wrong="autocast_formats" because="half precision is always float16"
- format = half
+ format = torch.float16

# %% wrong="autocast_formats" because="names are looked for in a string"
- elif operation in AUTOCAST["float32"]:
+ elif operation in " ".join(AUTOCAST["float32"]):

# %% wrong="autocast_formats" because="results are not inputs of what follows"
- known, results = dict(formats), {}
+ known, results = {**formats, **{r: torch.float32 for r, _, _ in program}}, {}

- known[result] = results[result] = format
+ results[result] = format

# %% wrong="autocast_formats" because="the formats that are given are changed"
- known, results = dict(formats), {}
+ known, results = formats, {}

# %% wrong="autocast_formats" because="what was given is among the results"
- return results
+ return known

# %% wrong="autocast_formats" because="a name keeps its first result"
- known[result] = results[result] = format
+ known.setdefault(result, format)
+ results.setdefault(result, format)

# %% wrong="autocast_formats" because="the widest in bytes: float16 with bfloat16 is the first of them"
- format = torch.promote_types(format, known[name])
+ format = max(format, known[name], key=lambda f: f.itemsize)

# %% right="autocast_formats" because="reduce over the inputs, and a table the other way round"
def autocast_formats(program, formats, half):
    from functools import reduce

    rule = {op: name for name, ops in AUTOCAST.items() for op in ops}
    fixed = {"half": half, "float32": torch.float32}
    known = formats.copy()
    for result, operation, inputs in program:
        known[result] = fixed.get(
            rule.get(operation), reduce(torch.promote_types, [known[i] for i in inputs])
        )
    return {result: known[result] for result, _, _ in program}

# %% wrong="blockwise_fp8_matmul" because="one scale for each tensor" base="scale-each"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, tuple(a.shape))
    qb, sb = quantize_blocks(b, tuple(b.shape))
    return (qa.float() @ qb.float()) * sa * sb
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (
                (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
            )
    return out

# %% wrong="blockwise_fp8_matmul" because="a scale for each row of a and each column of b" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
+ qa, sa = quantize_blocks(a, (1, a.shape[1]))
+ qb, sb = quantize_blocks(b, (b.shape[0], 1))

# %% wrong="blockwise_fp8_matmul" because="128 × 128 blocks for a too" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (128, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
+ (qa[:, rows].float() @ qb[rows, columns].float())
+ * sa[:, k : k + 1].repeat_interleave(128, 0)[: a.shape[0]]
+ * sb[k, j]

# %% wrong="blockwise_fp8_matmul" because="the scale in the divisor's place" of="scale-each"
- q[part] = x[part] / scales[i, j]
+ q[part] = x[part] * scales[i, j]

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="the scale upside down" of="scale-each"
-     scales[i, j] = largest / 448
- q[part] = x[part] / scales[i, j]
+     scales[i, j] = 448 / largest
+ q[part] = x[part] * scales[i, j]

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="the largest value, not the largest magnitude" of="scale-each"
- largest = x[part].abs().max()
+ largest = x[part].max()

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="scaled to 1 instead of 448" of="scale-each"
- scales[i, j] = largest / 448
+ scales[i, j] = largest

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="scaled to 240" of="scale-each"
- scales[i, j] = largest / 448
+ scales[i, j] = largest / 240

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="E5M2" of="scale-each"
- return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales
+ return q.clamp(-448, 448).to(torch.float8_e5m2), scales

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="a block of zeros becomes NaN" of="scale-each"
- if largest > 0:
-     scales[i, j] = largest / 448
+ scales[i, j] = largest / 448

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="a block of zeros has scale 0" of="scale-each"
  q[part] = x[part] / scales[i, j]
+ scales[i, j] = largest / 448

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="the ragged last block is dropped" of="scale-each"
- scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
+ scales = torch.ones(max(1, rows // block[0]), max(1, columns // block[1]))

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="the scales of a are left out" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- out[:, columns] += (
-     (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
- )
+ out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sb[k, j]

# %% wrong="blockwise_fp8_matmul" because="the scales of b are left out" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- out[:, columns] += (
-     (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
- )
+ out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1]

# %% wrong="blockwise_fp8_matmul" because="the scales of the first piece for all" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
+ (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, :1] * sb[0, j]

# %% wrong="blockwise_fp8_matmul" because="rows and columns of b's scales exchanged" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
+ (qa[:, rows].float() @ qb[rows, columns].float())
+ * sa[:, k : k + 1]
+ * sb[min(j, sb.shape[0] - 1), min(k, sb.shape[1] - 1)]

# %% wrong="blockwise_fp8_matmul" because="sums in bfloat16" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
- out = torch.zeros(a.shape[0], b.shape[1])
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))
+ out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)

- return out
+ return out.float()

# %% wrong="blockwise_fp8_matmul" because="partial products rounded to half precision" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
+ (qa[:, rows].float() @ qb[rows, columns].float()).bfloat16().float()
+ * sa[:, k : k + 1]
+ * sb[k, j]

# %% wrong="blockwise_fp8_matmul" because="no FP8 at all" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ return a.float() @ b.float()
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="bfloat16 out" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

- return out
+ return out.bfloat16()

# %% wrong="blockwise_fp8_matmul" because="blocks of 64" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 64))
+ qb, sb = quantize_blocks(b, (64, 64))

- rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
+ rows, columns = slice(64 * k, 64 * (k + 1)), slice(64 * j, 64 * (j + 1))

# %% wrong="blockwise_fp8_matmul" because="rounds to whole numbers, as INT8 does" of="scale-each"
- q[part] = x[part] / scales[i, j]
+ q[part] = (x[part] / scales[i, j]).round()

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="scales that are powers of two" of="scale-each"
- scales[i, j] = largest / 448
+ scales[i, j] = 2.0 ** math.ceil(math.log2(float(largest) / 448))

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="scales in half precision" of="scale-each"
- scales[i, j] = largest / 448
+ scales[i, j] = (largest / 448).bfloat16().float()

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="1 × 128 tiles for b as well" of="scale-each"
- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (1, 128))

-     (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
- )
+     qa[:, rows].float() @ (qb[rows, columns].float() * sb[rows, j : j + 1])
+ ) * sa[:, k : k + 1]

# %% wrong="blockwise_fp8_matmul" because="writes into the input" of="scale-each"
  x = x.float()
+ x.clamp_(-1e3, 1e3)

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% wrong="blockwise_fp8_matmul" because="the clamp takes the outliers, not the scale" of="scale-each"
- scales[i, j] = largest / 448
+ scales[i, j] = x[part].abs().mean() / 64

- qa, sa = quantize_blocks(a, tuple(a.shape))
- qb, sb = quantize_blocks(b, tuple(b.shape))
- return (qa.float() @ qb.float()) * sa * sb
+ qa, sa = quantize_blocks(a, (1, 128))
+ qb, sb = quantize_blocks(b, (128, 128))

# %% right="blockwise_fp8_matmul" because="everything dequantized, then one product"
def quantize_blocks(x, block):
    rows, columns = x.shape
    tall, wide = (rows + block[0] - 1) // block[0], (columns + block[1] - 1) // block[1]
    whole = torch.zeros(tall * block[0], wide * block[1])
    whole[:rows, :columns] = x
    view = whole.view(tall, block[0], wide, block[1])
    scales = (view.abs().amax(dim=(1, 3)) / 448).clamp(min=1e-30)
    q = view / scales.view(tall, 1, wide, 1)
    return q.clamp(-448.0, 448.0).view(whole.shape)[:rows, :columns].to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    def there_and_back(x, block):
        q, s = quantize_blocks(x, block)
        s = s.repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1], 1)[
            :, : x.shape[1]
        ]
        return q.float() * s

    return there_and_back(a, (1, 128)) @ there_and_back(b, (128, 128))

# %% right="blockwise_fp8_matmul" because="the scales as two matrices"
def quantize_blocks(x, block):
    r, c = block
    x = F.pad(x.to(torch.float32), (0, (-x.shape[1]) % c, 0, (-x.shape[0]) % r))[:None], x.shape
    padded, (rows, columns) = x[0], x[1]
    largest = F.max_pool2d(padded.abs()[None, None], (r, c))[0, 0]
    scales = largest.masked_fill(largest == 0, 448.0) / 448
    full = torch.kron(scales, torch.ones(r, c))
    return (padded / full)[:rows, :columns].clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    (qa, sa), (qb, sb) = quantize_blocks(a, (1, 128)), quantize_blocks(b, (128, 128))
    pieces = [
        (qa[:, i : i + 128].float() * sa[:, i // 128, None])
        @ qb[i : i + 128].float()
        * sb[i // 128].repeat_interleave(128)[: b.shape[1]]
        for i in range(0, a.shape[1], 128)
    ]
    return torch.stack(pieces).sum(0)

# %% wrong="blockwise_fp8_matmul" because="the scale is never below 1e-12"
- scales = torch.where(largest > 0, largest / 448, 1.0)
+ scales = (largest / 448).clamp(min=1e-12)

# %% wrong="training_memory" because="the head counted as a matrix of its own" base="head-counted"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="no biases" of="head-counted"
- vectors = 13 * h
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ vectors = 4 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

# %% wrong="training_memory" because="no LayerNorm parameters" of="head-counted"
- vectors = 13 * h
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ vectors = 9 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

# %% wrong="training_memory" because="the final norm forgotten" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors)

# %% wrong="training_memory" because="positions forgotten" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + L * (matrices + vectors) + 2 * h

# %% wrong="training_memory" because="positions for the tokens of the batch only" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + seq * h + L * (matrices + vectors) + 2 * h

# %% wrong="training_memory" because="three matrices in a feed-forward layer" of="head-counted"
- matrices = 12 * h * h
+ matrices = 16 * h * h

- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

# %% wrong="training_memory" because="no master weights" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "optimizer": P * (12 if mixed else 8),
+ "optimizer": P * (8),

# %% wrong="training_memory" because="a master in float32 training too" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "optimizer": P * (12 if mixed else 8),
+ "optimizer": P * (12),

# %% wrong="training_memory" because="moments in half precision" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "optimizer": P * (12 if mixed else 8),
+ "optimizer": P * (8 if mixed else 8),

# %% wrong="training_memory" because="gradients in float32" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "gradients": P * e,
+ "gradients": P * 4,

# %% wrong="training_memory" because="the attention weights forgotten" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (16 * h * e + 16)

# %% wrong="training_memory" because="scores and weights" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (16 * h * e + 2 * a * seq * e + 16)

# %% wrong="training_memory" because="attention weights of one head" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (16 * h * e + seq * e + 16)

# %% wrong="training_memory" because="the formula of the paper, with dropout" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (34 * h * e // 2 + 5 * a * seq * e // 2 + 16)

# %% wrong="training_memory" because="LayerNorm's statistics forgotten" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
- end = n * (2 * h * e + 8 + 4 * V)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (16 * h * e + a * seq * e)
+ end = n * (2 * h * e + 4 * V)

# %% wrong="training_memory" because="statistics in half precision" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
- end = n * (2 * h * e + 8 + 4 * V)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (16 * h * e + a * seq * e + 4 * e)
+ end = n * (2 * h * e + 2 * e + 4 * V)

# %% wrong="training_memory" because="GELU keeps its output only" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (12 * h * e + a * seq * e + 16)

# %% wrong="training_memory" because="residual additions keep a copy" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
- inside = n * (16 * h * e + a * seq * e + 16)
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ inside = n * (18 * h * e + a * seq * e + 16)

# %% wrong="training_memory" because="the log-probabilities in half precision" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- end = n * (2 * h * e + 8 + 4 * V)
+ end = n * (2 * h * e + 8 + e * V)

# %% wrong="training_memory" because="logits and log-probabilities" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- end = n * (2 * h * e + 8 + 4 * V)
+ end = n * (2 * h * e + 8 + 8 * V)

# %% wrong="training_memory" because="the end forgotten" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "activations": kept + end,
+ "activations": kept,

# %% wrong="training_memory" because="the context instead of the sequence" of="head-counted"
  e = 2 if mixed else 4
+ seq = config.context

- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

# %% wrong="training_memory" because="checkpointing keeps nothing" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- kept = L * n * h * e if checkpointing else L * inside
+ kept = 0 if checkpointing else L * inside

# %% wrong="training_memory" because="checkpointing keeps one input" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- kept = L * n * h * e if checkpointing else L * inside
+ kept = n * h * e if checkpointing else L * inside

# %% wrong="training_memory" because="the loss is checkpointed too" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "activations": kept + end,
+ "activations": kept + (0 if checkpointing else end),

# %% wrong="training_memory" because="the input counted twice" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "recomputed": inside - n * h * e if checkpointing else 0,
+ "recomputed": inside if checkpointing else 0,

# %% wrong="training_memory" because="all blocks recomputed at once" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "recomputed": inside - n * h * e if checkpointing else 0,
+ "recomputed": L * (inside - n * h * e) if checkpointing else 0,

# %% wrong="training_memory" because="recomputed without checkpointing as well" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

- "recomputed": inside - n * h * e if checkpointing else 0,
+ "recomputed": inside - n * h * e,

# %% wrong="training_memory" because="activations in half precision always" of="head-counted"
- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ f, e = e, 2

- "parameters": P * e,
- "gradients": P * e,
+ "parameters": P * f,
+ "gradients": P * f,

# %% wrong="training_memory" because="numbers instead of bytes" of="head-counted"
- e = 2 if mixed else 4
+ e = 1

- P = 2 * V * h + config.context * h + L * (matrices + vectors) + 2 * h
+ P = V * h + config.context * h + L * (matrices + vectors) + 2 * h

# %% right="training_memory" because="the model itself, on the meta device"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    with torch.device("meta"):
        model = GPT(config)
        tokens = torch.zeros(batch, seq, dtype=torch.long)
    half = 2 if mixed else 1
    count = sum(p.numel() for p in model.parameters())
    n, h = batch * seq, config.width
    statistics = 2 * 4 * n

    class Kept:
        total = 0

    def kept(numbers, norms, exact=0):
        return numbers * 4 // half + norms * statistics + exact

    per_token = {
        "norm1": h,
        "qkv": h,
        "qk": 2 * h,
        "softmax": config.heads * seq,
        "v": h,
        "out": h,
        "norm2": h,
        "up": h,
        "gelu": 4 * h,
        "down": 4 * h,
    }
    block = kept(n * sum(per_token.values()), 2)
    entry = kept(n * h, 0)
    last = kept(2 * n * h, 1, exact=4 * tokens.numel() * config.vocab)
    sizes = {
        "parameters": 4 * count // half,
        "gradients": 4 * count // half,
        "optimizer": (16 - 8 // half) * count,
    }
    if checkpointing:
        return sizes | {"activations": config.layers * entry + last, "recomputed": block - entry}
    return sizes | {"activations": config.layers * block + last, "recomputed": 0}

# %% right="training_memory" because="measured on a model of the same shape, in float32, and halved"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    model = GPT(config)
    tokens = torch.zeros(batch, seq, dtype=torch.long)
    exact = batch * seq * 4 * config.vocab
    norms = batch * seq * 8
    whole = saved_bytes(lambda: model(tokens, tokens, checkpointing), model)
    x = torch.zeros(batch, seq, config.width, requires_grad=True)
    one = saved_bytes(lambda: model.blocks[0](x), model) - x.nbytes
    P = sum(p.numel() for p in model.parameters())
    if mixed:
        fixed = exact + norms * (1 if checkpointing else 1 + 2 * config.layers)
        whole = (whole - fixed) // 2 + fixed
        one = (one - 2 * norms) // 2 + 2 * norms
    return {
        "parameters": P * (2 if mixed else 4),
        "gradients": P * (2 if mixed else 4),
        "optimizer": P * (12 if mixed else 8),
        "activations": whole,
        "recomputed": one if checkpointing else 0,
    }

# %% wrong="questions" because="swallowed: a whole step"
- "swallowed": 2.0**-7,
+ "swallowed": 2.0**-6,

# %% wrong="questions" because="swallowed: half a step in the octave of 1"
- "swallowed": 2.0**-7,
+ "swallowed": 2.0**-8,

# %% wrong="questions" because="swallowed: a step of FP16"
- "swallowed": 2.0**-7,
+ "swallowed": 2.0**-9,

# %% wrong="questions" because="swallowed: the tie is thought to go up"
- "swallowed": 2.0**-7,
+ "swallowed": 2.0**-7 - 2.0**-17,

# %% wrong="questions" because="scale: one power too many"
- "scale": 2 ** math.floor(math.log2(65504 / 0.3)),
+ "scale": 2**18,

# %% wrong="questions" because="scale: one power too few"
- "scale": 2 ** math.floor(math.log2(65504 / 0.3)),
+ "scale": 2**16,

# %% wrong="questions" because="scale: the exponent"
- "scale": 2 ** math.floor(math.log2(65504 / 0.3)),
+ "scale": 17,

# %% wrong="questions" because="scale: not a power of two"
- "scale": 2 ** math.floor(math.log2(65504 / 0.3)),
+ "scale": 218346,

# %% wrong="questions" because="bits: the scale left out"
- "bits": 8 + 32 / 128,
+ "bits": 8,

# %% wrong="questions" because="bits: the tile taken for a block"
- "bits": 8 + 32 / 128,
+ "bits": 8 + 32 / 128**2,

# %% wrong="questions" because="bits: an 8-bit scale"
- "bits": 8 + 32 / 128,
+ "bits": 8 + 8 / 128,

# %% wrong="questions" because="bits: blocks of 32"
- "bits": 8 + 32 / 128,
+ "bits": 8 + 32 / 32,

# %% wrong="questions" because="bytes: no master"
- "bytes": 7 * (2 + 2 + 4 + 4 + 4),
+ "bytes": 84,

# %% wrong="questions" because="bytes: the weights alone"
- "bytes": 7 * (2 + 2 + 4 + 4 + 4),
+ "bytes": 14,

# %% wrong="questions" because="bytes: float32 gradients on top"
- "bytes": 7 * (2 + 2 + 4 + 4 + 4),
+ "bytes": 126,

# %% wrong="questions" because="bytes: binary gigabytes"
- "bytes": 7 * (2 + 2 + 4 + 4 + 4),
+ "bytes": 112e9 / 2**30,

# %% wrong="questions" because="bf16: precision"
- "bf16": "b",
+ "bf16": "a",

# %% wrong="questions" because="bf16: accumulation"
- "bf16": "b",
+ "bf16": "c",

# %% wrong="questions" because="bf16: master weights"
- "bf16": "b",
+ "bf16": "d",

# %% right="questions" because="worked out by hand"
def questions():
    return {
        "swallowed": 0.5 * 2.0 ** (1 - 7),
        "scale": max(2**k for k in range(30) if 0.3 * 2**k <= 65504),
        "bits": (128 * 8 + 32) / 128,
        "bytes": 16 * 7e9 / 1e9,
        "bf16": {8: "b", 5: "a"}[BF16.exponent],
    }
