# %% [markdown]
# Answers to lesson 18. Each cell stands in for an exercise cell, whole.

# %% wrong="decode_float" because="a hidden 1 in subnormals"
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

# %% wrong="decode_float" because="subnormals take the exponent of their field"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (0 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="no hidden 1 at all"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="a bias of half the range"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1)
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="subnormals flushed to zero"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = torch.zeros_like(m)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="the sign is lost on zero"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return torch.where(value == 0, 0.0, sign * value)

# %% wrong="decode_float" because="the sign bit is ignored"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return value

# %% wrong="decode_float" because="E4M3 with the rules of IEEE"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special != "none":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="every mantissa of the top exponent is infinite"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones, math.inf, value)
        value = torch.where(ones & (m < 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="infinities are all positive"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return torch.where(value.isinf(), value, sign * value)

# %% wrong="decode_float" because="a NaN in formats that have none"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    else:
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="no NaN in E4M3"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "never":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="float32 out"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return (sign * value).float()

# %% wrong="decode_float" because="the mantissa counted one bit short"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2 ** (mantissa - 1) - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="the mantissa with one bit of the exponent"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2 ** (mantissa + 1) - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="fields in the order sign, mantissa, exponent"
def decode_float(bits, exponent, mantissa, special="ieee"):
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = bits & (2**exponent - 1)
    m = ((bits >> exponent) & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return sign * value

# %% wrong="decode_float" because="two's complement instead of a sign bit"
def decode_float(bits, exponent, mantissa, special="ieee"):
    width = 1 + exponent + mantissa
    negative = bits >> (width - 1) == 1
    bits = torch.where(negative, 2**width - bits, bits)
    bias = 2 ** (exponent - 1) - 1
    sign = 1 - 2 * (bits >> (exponent + mantissa))
    e = (bits >> mantissa) & (2**exponent - 1)
    m = (bits & (2**mantissa - 1)).double()
    normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias).double()
    subnormal = m / 2**mantissa * 2.0 ** (1 - bias)
    value = torch.where(e == 0, subnormal, normal)
    ones = e == 2**exponent - 1
    if special == "ieee":
        value = torch.where(ones & (m == 0), math.inf, value)
        value = torch.where(ones & (m > 0), math.nan, value)
    elif special == "nan":
        value = torch.where(ones & (m == 2**mantissa - 1), math.nan, value)
    return torch.where(negative, -value, value)

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
        return math.ldexp(sign * (m if e == 0 else m + (1 << mantissa)), max(e, 1) - bias - mantissa)

    return torch.tensor([one(p) for p in bits.flatten().tolist()], dtype=torch.float64).view(bits.shape)

# %% right="decode_float" because="whole numbers of the smallest step, shifted"
def decode_float(bits, exponent, mantissa, special="ieee"):
    fields = torch.bitwise_and(bits, 2 ** (exponent + mantissa) - 1)
    e, m = torch.div(fields, 2**mantissa, rounding_mode="floor"), torch.remainder(fields, 2**mantissa)
    steps = torch.where(e > 0, m + 2**mantissa, m).to(torch.float64)
    value = steps * torch.pow(torch.tensor(2.0, dtype=torch.float64), torch.clamp(e, min=1) + (1 - 2 ** (exponent - 1)) + 0) * 2.0**-mantissa
    limit = 2 ** (exponent + mantissa) - {"ieee": 2**mantissa, "nan": 1, "none": 0}[special]
    value[fields == limit] = math.inf if special == "ieee" else math.nan
    if special == "ieee":
        value[fields > limit] = math.nan
    return torch.copysign(value, 0.5 - (bits >= 2 ** (exponent + mantissa)).double())

# %% wrong="round_to_format" because="ties away from zero"
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
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="ties toward plus infinity"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.floor(y / ulp + 0.5) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="cuts off instead of rounding"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.trunc(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="flushes subnormals to zero"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    rounded = torch.where(rounded.abs() < 2.0 ** (1 - bias), rounded * 0, rounded)
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="no subnormals: the octaves go on down"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=-1000)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="subnormals an octave too fine"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=-bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="one bit of mantissa too many"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa - 1)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="the octave from a logarithm in float32"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = y.abs().float().log2().floor().nan_to_num(0, 900, -900).long()
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="saturates always"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="never saturates"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="E4M3 ends at 240, as with IEEE's rules"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special != "none" else bias + 1
    steps = 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="E4M3 ends at 480"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="E4M3 overflows to infinity"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.inf, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="overflow judged before rounding"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(y.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="overflow loses the sign"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, beyond, rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="an infinity survives saturation"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    rounded = torch.where(y.isinf() & saturate, y, rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="an infinity is left alone in formats without one"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    rounded = torch.where(y.isinf(), y, rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="NaN becomes the largest number when saturating"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    if saturate:
        rounded = rounded.nan_to_num(largest)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="through float32, so that some are rounded twice"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.float().double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="negative zero becomes zero"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    rounded = rounded + 0.0
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="always float64 out"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded

# %% wrong="round_to_format" because="always float32 out"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.float()

# %% wrong="round_to_format" because="PyTorch's cast where it has one, nothing else"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    for kind in (BF16, FP16, E5M2, E4M3):
        if kind.layout == (exponent, mantissa, special):
            return x.to(kind.dtype).to(x.dtype)
    return x
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

# %% wrong="round_to_format" because="PyTorch's cast where it has one"
def round_to_format(x, exponent, mantissa, special="ieee", saturate=False):
    for kind in (BF16, FP16, E5M2, E4M3):
        if kind.layout == (exponent, mantissa, special) and not saturate:
            return x.to(kind.dtype).to(x.dtype)
    bias = 2 ** (exponent - 1) - 1
    y = x.double()
    octave = torch.frexp(y).exponent - 1
    octave = octave.clamp(min=1 - bias)
    octave = octave.clamp(max=1000)
    ulp = power_of_two(octave - mantissa)
    rounded = torch.round(y / ulp) * ulp
    top = bias if special == "ieee" else bias + 1
    steps = 2 if special == "nan" else 1
    largest = (2 - steps * 2.0**-mantissa) * 2.0**top
    beyond = {"ieee": math.inf, "nan": math.nan, "none": largest}[special]
    if saturate:
        beyond = largest
    rounded = torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(y, beyond), y), rounded)
    return rounded.to(x.dtype)

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
            result = largest if saturate or special == "none" else math.inf if special == "ieee" else math.nan
        return math.copysign(result, value)

    return torch.tensor([one(v) for v in x.flatten().tolist()], dtype=torch.float64).view(x.shape).to(x.dtype)

# %% wrong="stochastic_round_bf16" because="rounds to nearest"
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
    noise = torch.randint(0, 2**16, (*x.shape[:-1], 1) if x.dim() > 1 else x.shape, generator=generator, dtype=torch.int32)
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

# %% wrong="stochastic_round_bf16" because="seeds the generator anew"
def stochastic_round_bf16(x, generator):
    generator = torch.Generator().manual_seed(generator.initial_seed())
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)

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
    rounded = torch.where(up & (bits & 0xFFFF != 0), (bits & -65536) + 65536, bits & -65536).view(torch.float32)
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
    return torch.where(x.isfinite(), rounded, x).nan_to_num(0.0, math.inf, -math.inf).to(torch.bfloat16)

# %% right="stochastic_round_bf16" because="compares the lower half with the noise"
def stochastic_round_bf16(x, generator):
    raw = x.contiguous().view(torch.int32)
    low = raw & 0xFFFF
    draw = (torch.rand(x.shape, generator=generator) * 65536).int()
    low_neighbor = raw - low
    up = (draw < low) & x.isfinite()
    return torch.where(x.isnan(), math.nan, (low_neighbor + 65536 * up.int()).view(torch.float32)).to(torch.bfloat16)

# %% right="stochastic_round_bf16" because="neighbors and distances, in float64"
def stochastic_round_bf16(x, generator):
    toward_zero = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    result = torch.where(x.isnan(), x, toward_zero)
    away = torch.where(x.isfinite(), (toward_zero.view(torch.int32) + 0x10000).view(torch.float32), toward_zero)
    share = (x.double() - toward_zero.double()) / (away.double() - toward_zero.double())
    go = torch.rand(x.shape, generator=generator, dtype=torch.float64) < share
    return torch.where(go, away, result).bfloat16()

# %% wrong="master_weight_adam" because="adds the update to the half-precision weight"
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

# %% wrong="master_weight_adam" because="the master is taken back from the weight each time"
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
            self.master[i] = p.float().clone()
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="moments in half precision"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.master = [p.detach().float().clone() for p in self.params]
        self.m = [torch.zeros_like(w) for w in self.params]
        self.v = [torch.zeros_like(w) for w in self.params]
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
            g = (p.grad.float() / scale).to(p.dtype)
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="the gradient is squared in half precision"
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
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * (g.to(p.dtype) * g.to(p.dtype)).float()
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="divides by the scale in half precision"
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
            g = (p.grad / scale).float()
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="ignores the scale"
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
            g = p.grad.float()
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="multiplies by the scale"
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
            g = p.grad.float() * scale
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="unscales p.grad itself"
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
            p.grad = (p.grad.float() / scale).to(p.dtype)
            g = p.grad.float()
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="an infinity goes into the moments"
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
                pass
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            g = p.grad.float() / scale
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="looks for NaN only"
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
            if p.grad is not None and p.grad.isnan().any():
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="looks at the first parameter only"
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
        for p in self.params[:1]:
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="skips only the parameter with the bad gradient"
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
                pass
        for i, p in enumerate(self.params):
            if p.grad is None or not p.grad.isfinite().all():
                continue
            g = p.grad.float() / scale
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="a skipped step is counted"
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
                self.t = [t + 1 for t in self.t]
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="no bias correction"
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
            m = self.m[i]
            v = self.v[i]
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="eps inside the root"
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
            self.master[i] -= self.lr * m / (v + self.eps).sqrt()
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="eps added before the scale is taken out"
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps * scale)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="the weight is never set"
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
        return True

# %% wrong="master_weight_adam" because="replaces the storage that the model holds"
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.data = self.master[i].to(p.dtype)
        return True

# %% wrong="master_weight_adam" because="the weight becomes float32"
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.data = self.master[i]
        return True

# %% wrong="master_weight_adam" because="the master shares a float32 parameter's storage"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.master = [p.detach().float() for p in self.params]
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
            self.master[i].sub_(self.lr * m / (v.sqrt() + self.eps))
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="returns nothing"
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])

# %% wrong="master_weight_adam" because="one count for all parameters"
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
        self.t = [t + 1 for t in self.t]
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            g = p.grad.float() / scale
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="zero_grad does nothing"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.master = [p.detach().float().clone() for p in self.params]
        self.m = [torch.zeros_like(w) for w in self.master]
        self.v = [torch.zeros_like(w) for w in self.master]
        self.t = [0 for _ in self.params]

    def zero_grad(self):
        return None

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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="the generator of parameters is used up"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = params
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
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="gradients that are None stop the run"
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
            g = p.grad.float() / scale
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% wrong="master_weight_adam" because="a missing gradient counts as zero"
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
            g = torch.zeros_like(self.master[i]) if p.grad is None else p.grad.float() / scale
            self.t[i] += 1
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g * g
            m = self.m[i] / (1 - self.betas[0] ** self.t[i])
            v = self.v[i] / (1 - self.betas[1] ** self.t[i])
            self.master[i] -= self.lr * m / (v.sqrt() + self.eps)
            p.copy_(self.master[i])
        return True

# %% right="master_weight_adam" because="PyTorch's Adam on the masters"
class MasterWeightAdam:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.params = [p for p in params]
        self.lr = lr
        self._parameters = [nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in self.params]
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

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self, scale=1.0):
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
        some = [(i, p.grad.to(torch.float32) * (1 / scale)) for i, p in enumerate(self.params) if p.grad is not None]
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

# %% wrong="dynamic_loss_scaler" because="the update is made in spite of an infinity"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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

# %% wrong="dynamic_loss_scaler" because="the gradients are not divided"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="the gradients are multiplied"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
                p.grad.mul_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="the loss is not scaled"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.value

    def scale(self, loss):
        return loss

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
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="the loss is divided"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.value

    def scale(self, loss):
        return loss / self.value

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
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="looks for infinity and not for NaN"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
                if torch.isinf(p.grad).any():
                    self.bad = True
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="looks for NaN and not for infinity"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
                if torch.isnan(p.grad).any():
                    self.bad = True
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="the last gradient decides"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
                self.bad = not bool(torch.isfinite(p.grad).all())
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="all gradients must be bad"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.value

    def scale(self, loss):
        return loss * self.value

    def unscale_(self, optimizer):
        if self.bad is not None:
            raise RuntimeError("unscale_ was called already")
        self.bad = True
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if torch.isfinite(p.grad).all():
                    self.bad = False
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="only the first group"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        for group in optimizer.param_groups[:1]:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not torch.isfinite(p.grad).all():
                    self.bad = True
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="the count of good steps survives a bad one"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
        optimizer.step()
        return True

    def update(self):
        if self.bad is None:
            raise RuntimeError("nothing to update from")
        if self.bad:
            self.value *= self.backoff_factor
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="a bad step counts as a good one"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
        optimizer.step()
        return True

    def update(self):
        if self.bad is None:
            raise RuntimeError("nothing to update from")
        if self.bad:
            self.value *= self.backoff_factor
            self.count += 1
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="the count is not set back after growing"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
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
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="grows one step late"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
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
            if self.count > self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="grows after every good step"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
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
            if True:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="never grows"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
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
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="never backs off"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
        optimizer.step()
        return True

    def update(self):
        if self.bad is None:
            raise RuntimeError("nothing to update from")
        if self.bad:
            self.count = 0
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="the factors are fixed"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
        optimizer.step()
        return True

    def update(self):
        if self.bad is None:
            raise RuntimeError("nothing to update from")
        if self.bad:
            self.value /= 2
            self.count = 0
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= 2
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="step divides again after unscale_"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        self.bad = None
        self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="a second unscale_ is allowed"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.value

    def scale(self, loss):
        return loss * self.value

    def unscale_(self, optimizer):
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
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="a second unscale_ is passed over in silence"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.value

    def scale(self, loss):
        return loss * self.value

    def unscale_(self, optimizer):
        if self.bad is not None:
            return
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
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="update without anything to go by"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
        optimizer.step()
        return True

    def update(self):
        if self.bad is None:
            return
        if self.bad:
            self.value *= self.backoff_factor
            self.count = 0
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% wrong="dynamic_loss_scaler" because="what was found is not forgotten"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
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
        self.bad = False if not self.bad else None

# %% wrong="dynamic_loss_scaler" because="step returns nothing"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            return False
        optimizer.step()

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

# %% wrong="dynamic_loss_scaler" because="step itself adapts the scale, and update does so again"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            self.value *= self.backoff_factor
            return False
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

# %% wrong="dynamic_loss_scaler" because="parameters without a gradient stop it"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
                if not torch.isfinite(p.grad).all():
                    self.bad = True
                p.grad.div_(self.value)

    def step(self, optimizer):
        if self.bad is None:
            self.unscale_(optimizer)
        if self.bad:
            return False
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

# %% wrong="dynamic_loss_scaler" because="a bad gradient is set to zero instead of skipped"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
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
        if self.bad:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.nan_to_num_(0, 0, 0)
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

# %% wrong="dynamic_loss_scaler" because="PyTorch's own, wrapped"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.inner = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=growth_interval)
        self.value = float(init_scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.count = 0
        self.bad = None

    def get_scale(self):
        return self.inner.get_scale()

    def scale(self, loss):
        return self.inner.scale(loss)

    def unscale_(self, optimizer):
        self.inner.scale(torch.zeros(()))
        return self.inner.unscale_(optimizer)
        self.bad = False
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not torch.isfinite(p.grad).all():
                    self.bad = True
                p.grad.div_(self.value)

    def step(self, optimizer):
        before = self.inner._per_optimizer_states[id(optimizer)]
        self.inner.step(optimizer)
        return not any(v.item() for v in before["found_inf_per_device"].values())

    def update(self):
        try:
            return self.inner.update()
        except AssertionError:
            raise RuntimeError
        if self.bad:
            self.value *= self.backoff_factor
            self.count = 0
        else:
            self.count += 1
            if self.count == self.growth_interval:
                self.value *= self.growth_factor
                self.count = 0
        self.bad = None

# %% right="dynamic_loss_scaler" because="a set of gradients and a running count"
class DynamicLossScaler:
    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.s, self.up, self.down, self.every = init_scale, growth_factor, backoff_factor, growth_interval
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

# %% wrong="autocast_policy" because="softmax in half precision"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "softmax", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="sums in half precision"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="everything that is not a product in float32"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "float32"

# %% wrong="autocast_policy" because="everything else in half precision"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "half"

# %% wrong="autocast_policy" because="norms as they come"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="dot is a product"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "dot", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="tensordot is a product"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "tensordot", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="the widest group runs in float32"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "float32"
    return "input"

# %% wrong="autocast_policy" because="attention by its softmax, in float32"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus", "scaled_dot_product_attention"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="looks for a part of a name"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in " ".join(full):
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="losses as they come"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% wrong="autocast_policy" because="an unknown name is an error"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", "softmax", "log_softmax",
            "nll_loss", "mse_loss", "layer_norm", "rms_norm", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    raise KeyError(op)

# %% wrong="autocast_policy" because="the CPU's list, where softmax and norms stay half"
def autocast_policy(op):
    half = {"linear", "matmul", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}
    full = {"exp", "log", "pow", "reciprocal", "rsqrt", "sum", "prod", "cumsum", "logsumexp", 
            "nll_loss", "mse_loss", "softplus"}
    widest = {"addcmul", "addcdiv", "atan2", "dot", "index_put", "scatter_add", "tensordot"}
    if op in half:
        return "half"
    if op in full:
        return "float32"
    if op in widest:
        return "widest"
    return "input"

# %% right="autocast_policy" because="a dictionary"
POLICY = dict.fromkeys("linear matmul bmm addmm einsum conv2d scaled_dot_product_attention".split(), "half")
POLICY.update(dict.fromkeys(("exp log pow reciprocal rsqrt sum prod cumsum logsumexp softmax log_softmax nll_loss "
                             "mse_loss layer_norm rms_norm softplus").split(), "float32"))
POLICY.update(dict.fromkeys("addcmul addcdiv atan2 dot index_put scatter_add tensordot".split(), "widest"))


def autocast_policy(op):
    return POLICY.get(op, "input")

# %% wrong="blockwise_fp8_matmul" because="one scale for each tensor"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
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
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="a scale for each row of a and each column of b"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, a.shape[1]))
    qb, sb = quantize_blocks(b, (b.shape[0], 1))
    return (qa.float() @ qb.float()) * sa * sb
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="128 × 128 blocks for a too"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (128, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1].repeat_interleave(128, 0)[: a.shape[0]] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the scale in the divisor's place"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] * scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the scale upside down"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = 448 / largest
            q[part] = x[part] * scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the largest value, not the largest magnitude"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="scaled to 1 instead of 448"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="scaled to 240"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 240
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="E5M2"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e5m2), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="a block of zeros becomes NaN"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="a block of zeros has scale 0"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
            scales[i, j] = largest / 448
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the ragged last block is dropped"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(max(1, rows // block[0]), max(1, columns // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the scales of a are left out"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the scales of b are left out"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1]
    return out

# %% wrong="blockwise_fp8_matmul" because="the scales of the first piece for all"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, :1] * sb[0, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="rows and columns of b's scales exchanged"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[min(j, sb.shape[0] - 1), min(k, sb.shape[1] - 1)]
    return out

# %% wrong="blockwise_fp8_matmul" because="sums in bfloat16"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out.float()

# %% wrong="blockwise_fp8_matmul" because="partial products rounded to half precision"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()).bfloat16().float() * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="no FP8 at all"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    return a.float() @ b.float()
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="bfloat16 out"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out.bfloat16()

# %% wrong="blockwise_fp8_matmul" because="blocks of 64"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 64))
    qb, sb = quantize_blocks(b, (64, 64))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(64 * k, 64 * (k + 1)), slice(64 * j, 64 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="rounds to whole numbers, as INT8 does"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = (x[part] / scales[i, j]).round()
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="scales that are powers of two"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = 2.0 ** math.ceil(math.log2(float(largest) / 448))
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="scales in half precision"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = (largest / 448).bfloat16().float()
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="1 × 128 tiles for b as well"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (1, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ (qb[rows, columns].float() * sb[rows, j : j + 1])) * sa[:, k : k + 1]
    return out

# %% wrong="blockwise_fp8_matmul" because="writes into the input"
def quantize_blocks(x, block):
    x = x.float()
    x.clamp_(-1e3, 1e3)
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = largest / 448
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

# %% wrong="blockwise_fp8_matmul" because="the clamp takes the outliers, not the scale"
def quantize_blocks(x, block):
    x = x.float()
    rows, columns = x.shape
    q = torch.zeros_like(x)
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = x[part].abs().max()
            if largest > 0:
                scales[i, j] = x[part].abs().mean() / 64
            q[part] = x[part] / scales[i, j]
    return q.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    qa, sa = quantize_blocks(a, (1, 128))
    qb, sb = quantize_blocks(b, (128, 128))
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(sa.shape[1]):
        for j in range(sb.shape[1]):
            rows, columns = slice(128 * k, 128 * (k + 1)), slice(128 * j, 128 * (j + 1))
            out[:, columns] += (qa[:, rows].float() @ qb[rows, columns].float()) * sa[:, k : k + 1] * sb[k, j]
    return out

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
        s = s.repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1], 1)[:, : x.shape[1]]
        return q.float() * s

    return there_and_back(a, (1, 128)) @ there_and_back(b, (128, 128))

# %% right="blockwise_fp8_matmul" because="the scales as two matrices"
def quantize_blocks(x, block):
    r, c = block
    x = F.pad(x.to(torch.float32), (0, (-x.shape[1]) % c, 0, (-x.shape[0]) % r))[: None], x.shape
    padded, (rows, columns) = x[0], x[1]
    largest = F.max_pool2d(padded.abs()[None, None], (r, c))[0, 0]
    scales = largest.masked_fill(largest == 0, 448.0) / 448
    full = torch.kron(scales, torch.ones(r, c))
    return (padded / full)[:rows, :columns].clamp(-448, 448).to(torch.float8_e4m3fn), scales


def blockwise_fp8_matmul(a, b):
    (qa, sa), (qb, sb) = quantize_blocks(a, (1, 128)), quantize_blocks(b, (128, 128))
    pieces = [(qa[:, i : i + 128].float() * sa[:, i // 128, None]) @ qb[i : i + 128].float()
              * sb[i // 128].repeat_interleave(128)[: b.shape[1]] for i in range(0, a.shape[1], 128)]
    return torch.stack(pieces).sum(0)

# %% wrong="training_memory" because="the head counted as a matrix of its own"
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

# %% wrong="training_memory" because="no biases"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 4 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
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

# %% wrong="training_memory" because="no LayerNorm parameters"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 9 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
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

# %% wrong="training_memory" because="the final norm forgotten"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors)
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

# %% wrong="training_memory" because="positions forgotten"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + L * (matrices + vectors) + 2 * h
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

# %% wrong="training_memory" because="positions for the tokens of the batch only"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + seq * h + L * (matrices + vectors) + 2 * h
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

# %% wrong="training_memory" because="three matrices in a feed-forward layer"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 16 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
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

# %% wrong="training_memory" because="no master weights"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="a master in float32 training too"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="moments in half precision"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (8 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="gradients in float32"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * 4,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the attention weights forgotten"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="scores and weights"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + 2 * a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="attention weights of one head"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the formula of the paper, with dropout"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (34 * h * e // 2 + 5 * a * seq * e // 2 + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="LayerNorm's statistics forgotten"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e)
    end = n * (2 * h * e + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="statistics in half precision"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 4 * e)
    end = n * (2 * h * e + 2 * e + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="GELU keeps its output only"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (12 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="residual additions keep a copy"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (18 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the log-probabilities in half precision"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + e * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="logits and log-probabilities"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 8 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the end forgotten"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the context instead of the sequence"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    seq = config.context
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
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

# %% wrong="training_memory" because="checkpointing keeps nothing"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = 0 if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="checkpointing keeps one input"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the loss is checkpointed too"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + (0 if checkpointing else end),
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="the input counted twice"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside if checkpointing else 0,
    }

# %% wrong="training_memory" because="all blocks recomputed at once"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": L * (inside - n * h * e) if checkpointing else 0,
    }

# %% wrong="training_memory" because="recomputed without checkpointing as well"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * e,
        "gradients": P * e,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e,
    }

# %% wrong="training_memory" because="activations in half precision always"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 2 if mixed else 4
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
    f, e = e, 2
    inside = n * (16 * h * e + a * seq * e + 16)
    end = n * (2 * h * e + 8 + 4 * V)
    kept = L * n * h * e if checkpointing else L * inside
    return {
        "parameters": P * f,
        "gradients": P * f,
        "optimizer": P * (12 if mixed else 8),
        "activations": kept + end,
        "recomputed": inside - n * h * e if checkpointing else 0,
    }

# %% wrong="training_memory" because="numbers instead of bytes"
def training_memory(config, batch, seq, mixed=True, checkpointing=False):
    h, V, L, a = config.width, config.vocab, config.layers, config.heads
    e = 1
    n = batch * seq
    matrices = 12 * h * h
    vectors = 13 * h
    P = V * h + config.context * h + L * (matrices + vectors) + 2 * h
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

    per_token = {"norm1": h, "qkv": h, "qk": 2 * h, "softmax": config.heads * seq, "v": h, "out": h, "norm2": h, "up": h, "gelu": 4 * h, "down": 4 * h}
    block = kept(n * sum(per_token.values()), 2)
    entry = kept(n * h, 0)
    last = kept(2 * n * h, 1, exact=4 * tokens.numel() * config.vocab)
    sizes = {"parameters": 4 * count // half, "gradients": 4 * count // half, "optimizer": (16 - 8 // half) * count}
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
    return {"parameters": P * (2 if mixed else 4), "gradients": P * (2 if mixed else 4), "optimizer": P * (12 if mixed else 8),
            "activations": whole, "recomputed": one if checkpointing else 0}

# %% wrong="question_swallowed" because="a whole step"
def question_swallowed():
    return 2.0**-6

# %% wrong="question_swallowed" because="half a step in the octave of 1"
def question_swallowed():
    return 2.0**-8

# %% wrong="question_swallowed" because="a step of FP16"
def question_swallowed():
    return 2.0**-9

# %% wrong="question_swallowed" because="the tie is thought to go up"
def question_swallowed():
    return 2.0**-7 - 2.0**-17

# %% right="question_swallowed" because="by the spacing of the octave"
def question_swallowed():
    return 0.5 * 2.0 ** (1 - 7)

# %% wrong="question_scale" because="one power too many"
def question_scale():
    return 2**18

# %% wrong="question_scale" because="one power too few"
def question_scale():
    return 2**16

# %% wrong="question_scale" because="the exponent"
def question_scale():
    return 17

# %% wrong="question_scale" because="not a power of two"
def question_scale():
    return 218346

# %% right="question_scale" because="by trying"
def question_scale():
    return max(2**k for k in range(30) if 0.3 * 2**k <= 65504)

# %% wrong="question_bits" because="the scale left out"
def question_bits():
    return 8

# %% wrong="question_bits" because="the tile taken for a block"
def question_bits():
    return 8 + 32 / 128**2

# %% wrong="question_bits" because="an 8-bit scale"
def question_bits():
    return 8 + 8 / 128

# %% wrong="question_bits" because="blocks of 32"
def question_bits():
    return 8 + 32 / 32

# %% right="question_bits" because="as a fraction"
def question_bits():
    return (128 * 8 + 32) / 128

# %% wrong="question_16_bytes" because="no master"
def question_16_bytes():
    return 84

# %% wrong="question_16_bytes" because="the weights alone"
def question_16_bytes():
    return 14

# %% wrong="question_16_bytes" because="float32 gradients on top"
def question_16_bytes():
    return 126

# %% wrong="question_16_bytes" because="binary gigabytes"
def question_16_bytes():
    return 112e9 / 2**30

# %% right="question_16_bytes" because="16 bytes each"
def question_16_bytes():
    return 16 * 7e9 / 1e9

# %% wrong="question_bf16" because="precision"
def question_bf16():
    return "a"

# %% wrong="question_bf16" because="accumulation"
def question_bf16():
    return "c"

# %% wrong="question_bf16" because="master weights"
def question_bf16():
    return "d"

# %% right="question_bf16" because="by exponent bits"
def question_bf16():
    return {8: "b", 5: "a"}[BF16.exponent]
