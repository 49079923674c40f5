# Right and wrong answers to the exercises of lesson 26: see CONTRIBUTING.md.

# %% wrong="position_interpolation" because="multiplies"
- return frequencies / scale
+ return frequencies * scale

# %% wrong="position_interpolation" because="in place"
- return frequencies / scale
+ return frequencies.div_(scale)

# %% wrong="position_interpolation" because="leaves the fastest pair alone"
- return frequencies / scale
+ return torch.cat([frequencies[:1], frequencies[1:] / scale])

# %% wrong="position_interpolation" because="always float64"
- return frequencies / scale
+ return frequencies.double() / scale

# %% wrong="position_interpolation" because="float32 on the way"
- return frequencies / scale
+ return (frequencies.float() / scale).to(frequencies.dtype)

# %% wrong="position_interpolation" because="the scale is rounded"
- return frequencies / scale
+ return frequencies / int(scale)

# %% wrong="position_interpolation" because="a scale below 1 is taken"
- if scale < 1:
+ if scale <= 0:

# %% wrong="position_interpolation" because="at scale 1 the input itself comes back"
- return frequencies / scale
+ return frequencies / scale if scale > 1 else frequencies

# %% right="position_interpolation" because="slower pairs one by one"
def position_interpolation(frequencies, scale):
    if not scale >= 1:
        raise ValueError("scale")
    return torch.stack([w / scale for w in frequencies])

# %% wrong="ntk_aware_base" because="base times scale"
- return base * scale ** (dim / (dim - 2))
+ return base * scale

# %% wrong="ntk_aware_base" because="the exponent upside down"
- return base * scale ** (dim / (dim - 2))
+ return base * scale ** ((dim - 2) / dim)

# %% wrong="ntk_aware_base" because="pairs for dimensions"
- return base * scale ** (dim / (dim - 2))
+ return base * scale ** (dim / 2 / (dim / 2 - 2 + 1e-12))

# %% wrong="ntk_aware_base" because="the base is part of the power"
- return base * scale ** (dim / (dim - 2))
+ return (base * scale) ** (dim / (dim - 2))

# %% wrong="ntk_aware_base" because="no errors"
- if dim < 4 or dim % 2 or scale < 1:
+ if dim < 3:

# %% right="ntk_aware_base" because="solves for the slowest pair in logarithms"
def ntk_aware_base(base, dim, scale):
    if dim < 4 or dim % 2 == 1 or scale < 1:
        raise ValueError("dim or scale")
    last = (dim - 2) / dim
    return math.exp((last * math.log(base) + math.log(scale)) / last)

# %% wrong="dynamic_ntk" because="scales short texts too"
- scale = max(1.0, factor * length / trained - (factor - 1))
+ scale = factor * length / trained - (factor - 1)

# %% wrong="dynamic_ntk" because="ignores the factor"
- scale = max(1.0, factor * length / trained - (factor - 1))
+ scale = max(1.0, length / trained)

# %% wrong="dynamic_ntk" because="a jump at the trained length"
- scale = max(1.0, factor * length / trained - (factor - 1))
+ scale = max(1.0, factor * length / trained) if length > trained else 1.0

# %% wrong="dynamic_ntk" because="a fixed scale beyond the trained length"
- scale = max(1.0, factor * length / trained - (factor - 1))
+ scale = max(1.0, factor) if length > trained else 1.0

# %% wrong="dynamic_ntk" because="interpolates all pairs"
- return rope_frequencies(dim, base * scale ** (dim / (dim - 2)))
+ return rope_frequencies(dim, base) / scale

# %% wrong="dynamic_ntk" because="whole multiples only"
- scale = max(1.0, factor * length / trained - (factor - 1))
+ scale = max(1.0, factor * (length // trained) - (factor - 1))

# %% wrong="dynamic_ntk" because="float32"
- return rope_frequencies(dim, base * scale ** (dim / (dim - 2)))
+ return rope_frequencies(dim, base * scale ** (dim / (dim - 2))).float()

# %% right="dynamic_ntk" because="each pair slowed by a power of the scale"
def dynamic_ntk(dim, base, length, trained, factor=1.0):
    plain = rope_frequencies(dim, base)
    if length <= trained:
        return plain
    scale = 1 + factor * (length / trained - 1)
    return plain * scale ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64)

# %% wrong="yarn_frequencies" because="the ramp turned around"
- keep = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
+ keep = ((pairs - low) / (high - low)).clamp(0, 1)

# %% wrong="yarn_frequencies" because="the betas exchanged"
- for beta in (beta_fast, beta_slow)
+ for beta in (beta_slow, beta_fast)

# %% wrong="yarn_frequencies" because="a turn is one radian"
- dim * math.log(trained / (beta * 2 * math.pi)) / (2 * math.log(base))
+ dim * math.log(trained / beta) / (2 * math.log(base))

# %% wrong="yarn_frequencies" because="always rounded"
- if truncate:
+ if True:

# %% wrong="yarn_frequencies" because="never rounded"
- if truncate:
+ if False:

# %% wrong="yarn_frequencies" because="rounded to the nearest"
- low, high = math.floor(low), math.ceil(high)
+ low, high = round(low), round(high)

# %% wrong="yarn_frequencies" because="high is at most the last pair"
- low, high = max(low, 0), min(high, dim - 1)
+ low, high = max(low, 0), min(high, dim // 2 - 1)

# %% wrong="yarn_frequencies" because="ends are not clamped"
- low, high = max(low, 0), min(high, dim - 1)

# %% wrong="yarn_frequencies" because="0 / 0 on a ramp without length"
- if low == high:
-     high += 0.001

# %% wrong="yarn_frequencies" because="the paper's ramp for both"
- if ramp == "rotations":
+ if ramp in ("rotations", "index"):

# %% wrong="yarn_frequencies" because="the ramp's name is ignored"
- if ramp == "rotations":
+ if ramp == "turns":

# %% wrong="yarn_frequencies" because="the temperature of the logits"
- return keep * plain + (1 - keep) * plain / scale, 0.1 * math.log(scale) + 1
+ return keep * plain + (1 - keep) * plain / scale, (0.1 * math.log(scale) + 1) ** 2

# %% wrong="yarn_frequencies" because="interpolates the wavelength instead"
- return keep * plain + (1 - keep) * plain / scale, 0.1 * math.log(scale) + 1
+ return 1 / (keep / plain + (1 - keep) * scale / plain), 0.1 * math.log(scale) + 1

# %% wrong="yarn_frequencies" because="default betas always"
- plain = rope_frequencies(dim, base)
+ plain, beta_fast, beta_slow = rope_frequencies(dim, base), 32.0, 1.0

# %% wrong="yarn_frequencies" because="any scale is taken"
- if ramp not in ("index", "rotations") or scale < 1:
+ if ramp not in ("index", "rotations"):

# %% right="yarn_frequencies" because="pair by pair"
def yarn_frequencies(dim, base, scale, trained, beta_fast=32.0, beta_slow=1.0, ramp="index", truncate=True):
    if scale < 1:
        raise ValueError("scale")
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if ramp == "rotations":
        at = [trained * w / (2 * math.pi) for w in plain]
        first, last = beta_fast, beta_slow
    elif ramp == "index":
        at = list(range(dim // 2))
        first, last = (
            math.log(trained / (2 * math.pi * b)) / math.log(base) * dim / 2
            for b in (beta_fast, beta_slow)
        )
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(0, first), min(dim - 1, last)
        last += 0.001 * (first == last)
    else:
        raise ValueError("ramp")
    mix = [min(1.0, max(0.0, (x - first) / (last - first))) for x in at]
    slowed = [w * (1 - m) + w / scale * m for w, m in zip(plain, mix, strict=True)]
    return torch.tensor(slowed, dtype=torch.float64), 1 + math.log(scale) / 10

# %% wrong="partial_rope" because="keeps the slow ones"
- return torch.where(turning, frequencies, 0)
+ return torch.where(turning, 0, frequencies)

# %% wrong="partial_rope" because="in place"
- return torch.where(turning, frequencies, 0)
+ frequencies[~turning] = 0
+ return frequencies

# %% wrong="partial_rope" because="drops the others instead of stopping them"
- return torch.where(turning, frequencies, 0)
+ return frequencies[turning]

# %% wrong="partial_rope" because="rounds up"
- share * len(frequencies)
+ math.ceil(share * len(frequencies))

# %% wrong="partial_rope" because="at least one pair turns"
- share * len(frequencies)
+ max(1, share * len(frequencies))

# %% wrong="partial_rope" because="respaces the pairs that turn, as GPT-NeoX does"
- return torch.where(turning, frequencies, 0)
+ n = max(1, int(turning.sum()))
+ again = frequencies[torch.arange(len(frequencies)).mul(len(frequencies) // n).clamp(max=len(frequencies) - 1)]
+ return torch.where(turning, again, 0)

# %% wrong="partial_rope" because="any share is taken"
- if not 0 <= share <= 1:
+ if share > 99:

# %% wrong="partial_rope" because="at share 1 the input itself comes back"
- return torch.where(turning, frequencies, 0)
+ return torch.where(turning, frequencies, 0) if share < 1 else frequencies

# %% right="partial_rope" because="a mask of ones and zeros"
def partial_rope(frequencies, share):
    if share < 0 or share > 1:
        raise ValueError("share")
    mask = torch.zeros_like(frequencies)
    mask[: math.floor(share * len(frequencies))] = 1
    return frequencies * mask

# %% wrong="longrope_rescale" because="multiplies by the factors"
- return torch.where(positions[:, None] < keep, plain, plain / factors.double())
+ return torch.where(positions[:, None] < keep, plain, plain * factors.double())

# %% wrong="longrope_rescale" because="position `keep` is kept too"
- return torch.where(positions[:, None] < keep, plain, plain / factors.double())
+ return torch.where(positions[:, None] <= keep, plain, plain / factors.double())

# %% wrong="longrope_rescale" because="places for positions"
- return torch.where(positions[:, None] < keep, plain, plain / factors.double())
+ return torch.where(torch.arange(len(positions))[:, None] < keep, plain, plain / factors.double())

# %% wrong="longrope_rescale" because="ignores keep"
- return torch.where(positions[:, None] < keep, plain, plain / factors.double())
+ return plain / factors.double()

# %% wrong="longrope_rescale" because="goes on from the kept positions without a jump"
- return torch.where(positions[:, None] < keep, plain, plain / factors.double())
+ late = (positions - keep).clamp(min=0).double()[:, None] * frequencies / factors
+ return positions.clamp(max=keep).double()[:, None] * frequencies + late

# %% wrong="longrope_rescale" because="positions counted from 0 whatever they are"
- plain = positions.double()[:, None] * frequencies.double()
+ positions = torch.arange(len(positions))
+ plain = positions.double()[:, None] * frequencies.double()

# %% wrong="longrope_rescale" because="no errors"
- if bool((factors < 1).any()) or bool((factors[1:] < factors[:-1]).any()):
+ if False:

# %% wrong="longrope_rescale" because="factors may decrease"
- if bool((factors < 1).any()) or bool((factors[1:] < factors[:-1]).any()):
+ if bool((factors < 1).any()):

# %% wrong="longrope_rescale" because="equal factors are refused"
- if bool((factors < 1).any()) or bool((factors[1:] < factors[:-1]).any()):
+ if bool((factors < 1).any()) or bool((factors[1:] <= factors[:-1]).any()):

# %% wrong="longrope_rescale" because="positions are rounded to the frequencies' format"
- plain = positions.double()[:, None] * frequencies.double()
+ plain = positions.to(frequencies.dtype).double()[:, None] * frequencies.double()

# %% wrong="longrope_rescale" because="multiplied in the frequencies' format"
- plain = positions.double()[:, None] * frequencies.double()
+ plain = (positions[:, None] * frequencies).double()

# %% wrong="longrope_rescale" because="fractions of positions are cut off"
- plain = positions.double()[:, None] * frequencies.double()
+ plain = positions.long()[:, None] * frequencies.double()

# %% right="longrope_rescale" because="position by position"
def longrope_rescale(frequencies, positions, factors, keep=0):
    f = factors.double()
    if len(f) != len(frequencies) or float(f.min()) < 1 or bool((f.diff() < 0).any()):
        raise ValueError("factors")
    w = frequencies.double()
    rows = [n * (w if n < keep else w / f) for n in positions.tolist()]
    return torch.stack(rows)

# %% wrong="longrope_search" because="children are not repaired"
- factors = logs.exp().clamp(1, 1.25 * scale).sort().values
+ factors = logs.exp().clamp(1, 1.25 * scale)

# %% wrong="longrope_search" because="children leave the interval"
- factors = logs.exp().clamp(1, 1.25 * scale).sort().values
+ factors = logs.exp().sort().values

# %% wrong="longrope_search" because="seeds are not evaluated"
- known = [(float(evaluate(seed.double().clone())), seed.double().clone()) for seed in seeds]
+ known = [(1e9, seed.double().clone()) for seed in seeds]

# %% wrong="longrope_search" because="draws from the global generator"
- noise = torch.randn(len(logs), generator=generator, dtype=torch.float64)
+ noise = torch.randn(len(logs), dtype=torch.float64)

# %% wrong="longrope_search" because="parents are the worst"
- parents = [factors for _, factors in sorted(known, key=lambda pair: pair[0])[:4]]
+ parents = [factors for _, factors in sorted(known, key=lambda pair: -pair[0])[:4]]

# %% wrong="longrope_search" because="parents are the seeds for ever"
- parents = [factors for _, factors in sorted(known, key=lambda pair: pair[0])[:4]]
+ parents = [factors for _, factors in known[: len(seeds)]]

# %% wrong="longrope_search" because="the last child is returned"
- loss, factors = min(known, key=lambda pair: pair[0])
+ loss, factors = known[-1]

# %% wrong="longrope_search" because="the best is evaluated once more"
- return factors, loss
+ return factors, float(evaluate(factors.clone()))

# %% wrong="longrope_search" because="the greatest loss"
- loss, factors = min(known, key=lambda pair: pair[0])
+ loss, factors = max(known, key=lambda pair: pair[0])

# %% wrong="longrope_search" because="draws anew from the whole space"
- factors = logs.exp().clamp(1, 1.25 * scale).sort().values
+ u = torch.rand(len(logs), generator=generator, dtype=torch.float64)
+ factors = (1 + (1.25 * scale - 1) * u).sort().values

# %% wrong="longrope_search" because="one child too few in each generation"
- for child in range(children):
+ for child in range(children - 1):

# %% wrong="longrope_search" because="the upper end is scale"
- factors = logs.exp().clamp(1, 1.25 * scale).sort().values
+ factors = logs.exp().clamp(1, 1.25 * scale).sort(descending=True).values

# %% wrong="longrope_search" because="parents come from the generation before alone"
- parents = [factors for _, factors in sorted(known, key=lambda pair: pair[0])[:4]]
+ pool = known[-children:] if len(known) > len(seeds) else known
+ parents = [factors for _, factors in sorted(pool, key=lambda pair: pair[0])[:4]]

# %% wrong="longrope_search" because="a child becomes a parent in its own generation"
- for child in range(children):
+ for child in range(children):
+     parents[:] = [factors for _, factors in sorted(known, key=lambda pair: pair[0])[:4]]

# %% right="longrope_search" because="small steps from the best two, running maximum"
def longrope_search(evaluate, seeds, scale, generations, children, generator):
    pool = []
    for seed in seeds:
        pool.append((evaluate(seed.clone().double()), len(pool), seed.clone().double()))
    for generation in range(generations):
        best = [f for _, _, f in sorted(pool, key=lambda e: e[:2])[:2]]
        for _ in range(children):
            parent = best[int(torch.randint(len(best), (1,), generator=generator))]
            size = 0.25 * 0.9 ** int(torch.randint(generation + 1, (1,), generator=generator))
            step = size * torch.randn(parent.shape, generator=generator, dtype=torch.float64)
            where = torch.rand(parent.shape, generator=generator) < 0.4
            child = (parent * torch.exp(step * where)).clamp(1, 1.25 * scale).cummax(0).values
            pool.append((evaluate(child.clone()), len(pool), child))
    loss, _, factors = min(pool, key=lambda e: e[:2])
    return factors, loss

# %% wrong="streaming_cache" because="positions in the text"
- angles = angles_of(self.frequencies, keys.shape[2]).to(q.device)
+ self.seen = getattr(self, "seen", {})
+ self.seen[layer] = self.seen.get(layer, 0) + 1
+ count, held = self.seen[layer], keys.shape[2]
+ place = torch.tensor([i if i < self.sinks else count - held + i for i in range(held)])
+ angles = place.double()[:, None] * self.frequencies

# %% wrong="streaming_cache" because="stores rotated keys"
- keys, q = rotate(keys, cos, sin), rotate(q, cos[:, :, -1:], sin[:, :, -1:])
+ keys, q = rotate(keys, cos, sin), rotate(q, cos[:, :, -1:], sin[:, :, -1:])
+ self.keys[layer] = keys

# %% wrong="streaming_cache" because="no sinks are kept"
- return torch.cat([held[:, :, : self.sinks], held[:, :, -self.window :]], dim=2)
+ return held[:, :, -self.window - self.sinks :]

# %% wrong="streaming_cache" because="the window counts the sinks"
- if held.shape[2] <= self.sinks + self.window:
-     return held
- return torch.cat([held[:, :, : self.sinks], held[:, :, -self.window :]], dim=2)
+ if held.shape[2] <= self.window:
+     return held
+ return torch.cat([held[:, :, : self.sinks], held[:, :, self.sinks - self.window :]], dim=2)

# %% wrong="streaming_cache" because="drops before it adds: one too many is held"
- if held.shape[2] <= self.sinks + self.window:
-     return held
- return torch.cat([held[:, :, : self.sinks], held[:, :, -self.window :]], dim=2)
+ if held.shape[2] <= self.sinks + self.window + 1:
+     return held
+ return torch.cat([held[:, :, : self.sinks], held[:, :, -self.window - 1 :]], dim=2)

# %% wrong="streaming_cache" because="the query is not turned"
- keys, q = rotate(keys, cos, sin), rotate(q, cos[:, :, -1:], sin[:, :, -1:])
+ keys = rotate(keys, cos, sin)

# %% wrong="streaming_cache" because="grows for ever"
- if held.shape[2] <= self.sinks + self.window:
-     return held
- return torch.cat([held[:, :, : self.sinks], held[:, :, -self.window :]], dim=2)
+ return held

# %% wrong="streaming_cache" because="one store for all layers"
- for store, new in ((self.keys, k), (self.values, v)):
+ layer = 0
+ for store, new in ((self.keys, k), (self.values, v)):

# %% wrong="streaming_cache" because="kv heads in turn, not in groups"
- return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
+ group = q.shape[1] // keys.shape[1]
+ return F.scaled_dot_product_attention(q, keys.repeat(1, group, 1, 1), values.repeat(1, group, 1, 1))

# %% wrong="streaming_cache" because="neighboring dimensions form pairs"
- keys, q = rotate(keys, cos, sin), rotate(q, cos[:, :, -1:], sin[:, :, -1:])
+ def turn(x, c, s):
+     a, b = x[..., ::2], x[..., 1::2]
+     return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2).to(x.dtype)
+
+ keys, q = turn(keys, cos, sin), turn(q, cos[:, :, -1:], sin[:, :, -1:])

# %% wrong="streaming_cache" because="a window of nothing is taken"
- if sinks < 0 or window < 1:
+ if sinks < 0:

# %% right="streaming_cache" because="deletes one token, softmax written out"
class StreamingCache:
    def __init__(self, sinks, window, frequencies):
        if sinks < 0 or window <= 0:
            raise ValueError("sinks or window")
        self.sinks, self.limit, self.w = sinks, sinks + window, frequencies
        self.keys, self.values = [], []

    def __len__(self):
        return self.keys[0].size(2) if self.keys else 0

    def turn(self, x, place):
        half = x.shape[-1] // 2
        a, b = x[..., :half].double(), x[..., half:].double()
        angle = (place.double()[:, None] * self.w).to(x.device)
        c, s = angle.cos(), angle.sin()
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    def attend(self, layer, q, k, v):
        if layer == len(self.keys):
            self.keys.append(k[:, :, :0])
            self.values.append(v[:, :, :0])
        held = torch.arange(self.keys[layer].shape[2] + 1)
        if len(held) > self.limit:
            held = torch.cat([held[: self.sinks], held[self.sinks + 1 :]])
        held = held.to(k.device)
        self.keys[layer] = torch.cat([self.keys[layer], k], 2)[:, :, held]
        self.values[layer] = torch.cat([self.values[layer], v], 2)[:, :, held]
        n = len(held)
        group = q.shape[1] // k.shape[1]
        keys = self.turn(self.keys[layer], torch.arange(n)).repeat_interleave(group, 1)
        query = self.turn(q, torch.tensor([n - 1]))
        p = (query @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return (p @ self.values[layer].double().repeat_interleave(group, 1)).to(q.dtype)

# %% wrong="passkey_examples" because="one key for all"
- examples = []
- for length in lengths:
+ examples = []
+ key = "".join(map(str, torch.randint(10, (5,), generator=generator).tolist()))
+ for length in lengths:

- key = "".join(map(str, torch.randint(10, (5,), generator=generator).tolist()))
- told, asked = encode(TELL.format(key)), encode(ASK)
+ told, asked = encode(TELL.format(key)), encode(ASK)

# %% wrong="passkey_examples" because="no leading zeros"
- key = "".join(map(str, torch.randint(10, (5,), generator=generator).tolist()))
+ key = str(int(torch.randint(10_000, 100_000, (), generator=generator)))

# %% wrong="passkey_examples" because="draws from the global generator"
- key = "".join(map(str, torch.randint(10, (5,), generator=generator).tolist()))
+ key = "".join(map(str, torch.randint(10, (5,)).tolist()))

# %% wrong="passkey_examples" because="the filler always begins at its first token"
- start = int(torch.randint(len(filler) - count + 1, (), generator=generator))
+ start = 0

# %% wrong="passkey_examples" because="forgets the first token in the count"
- count = length - 1 - len(told) - len(asked)
+ count = length - len(told) - len(asked)

# %% wrong="passkey_examples" because="depth counted from the end"
- cut = math.floor(depth * count)
+ cut = math.floor((1 - depth) * count)

# %% wrong="passkey_examples" because="depth of the whole prompt"
- cut = math.floor(depth * count)
+ cut = min(count, math.floor(depth * length))

# %% wrong="passkey_examples" because="the beginning is always 0"
- prompt = [bos, *text[:cut], *told, *text[cut:], *asked]
+ prompt = [0, *text[:cut], *told, *text[cut:], *asked]

# %% wrong="passkey_examples" because="the answer without its space"
- examples.append(Passkey(length, depth, key, prompt, encode(f" {key}.")))
+ examples.append(Passkey(length, depth, key, prompt, encode(f"{key}.")))

# %% wrong="passkey_examples" because="depths outside, lengths inside"
- for length in lengths:
-     for depth in depths:
+ for depth in depths:
+     for length in lengths:

# %% wrong="passkey_examples" because="the last start is never drawn, and a text that fits exactly fails"
- start = int(torch.randint(len(filler) - count + 1, (), generator=generator))
+ start = int(torch.randint(len(filler) - count, (), generator=generator)) // 2

# %% wrong="passkey_examples" because="any depth is taken"
- if count < 0 or count > len(filler) or not 0 <= depth <= 1:
+ if count < 0 or count > len(filler):

# %% wrong="passkey_examples" because="the last place is never drawn"
- start = int(torch.randint(len(filler) - count + 1, (), generator=generator))
+ start = int(torch.randint(max(1, len(filler) - count), (), generator=generator))

# %% wrong="passkey_examples" because="no key has a 9"
- key = "".join(map(str, torch.randint(10, (5,), generator=generator).tolist()))
+ key = "".join(map(str, torch.randint(9, (5,), generator=generator).tolist()))

# %% wrong="passkey_examples" because="a prompt without filler is refused"
- if count < 0 or count > len(filler) or not 0 <= depth <= 1:
+ if count <= 0 or count > len(filler) or not 0 <= depth <= 1:

# %% right="passkey_examples" because="digits one by one, text by a comprehension"
def passkey_examples(encode, filler, lengths, depths, generator, bos=0):
    made = []
    for length, depth in [(n, d) for n in lengths for d in depths]:
        if depth < 0 or depth > 1:
            raise ValueError("depth")
        key = ""
        for _ in range(5):
            key += str(int(torch.randint(0, 10, (1,), generator=generator)))
        told, asked = encode(TELL.format(key)), encode(ASK)
        count = length - len([bos]) - len(told + asked)
        places = len(filler) - count + 1
        if count < 0 or places < 1:
            raise ValueError("no room")
        start = int(torch.randint(0, places, (1,), generator=generator))
        text = [filler[start + i] for i in range(count)]
        before = int(depth * count)
        prompt = [bos] + text[:before] + told + text[before:] + asked
        made.append(Passkey(length, depth, key, prompt, encode(" " + key + ".")))
    return made

# %% wrong="passkey_accuracy" because="one token is enough"
- found.setdefault((example.length, example.depth), []).append(written == example.answer)
+ found.setdefault((example.length, example.depth), []).append(written[:1] == example.answer[:1])

# %% wrong="passkey_accuracy" because="the share of tokens"
- return {cell: sum(right) / len(right) for cell, right in found.items()}
+ return {cell: float(any(right)) for cell, right in found.items()}

# %% wrong="passkey_accuracy" because="the last example of a cell counts"
- found.setdefault((example.length, example.depth), []).append(written == example.answer)
+ found[(example.length, example.depth)] = [written == example.answer]

# %% wrong="passkey_accuracy" because="what was written so far is enough"
- found.setdefault((example.length, example.depth), []).append(written == example.answer)
+ found.setdefault((example.length, example.depth), []).append(
+     written == example.answer[: len(written)]
+ )

# %% wrong="passkey_accuracy" because="hands out the example's own prompt"
- written = list(write(list(example.prompt), len(example.answer)))
+ written = list(write(example.prompt, len(example.answer)))

# %% wrong="passkey_accuracy" because="asks for five tokens"
- written = list(write(list(example.prompt), len(example.answer)))
+ written = list(write(list(example.prompt), 5))

# %% wrong="passkey_accuracy" because="asks for the longest answer's tokens"
- written = list(write(list(example.prompt), len(example.answer)))
+ longest = max(len(e.answer) for e in examples)
+ written = list(write(list(example.prompt), longest))[: len(example.answer)]

# %% wrong="passkey_accuracy" because="counts, not shares"
- return {cell: sum(right) / len(right) for cell, right in found.items()}
+ return {cell: float(sum(right)) for cell, right in found.items()}

# %% right="passkey_accuracy" because="two counters"
def passkey_accuracy(write, examples):
    right, total = {}, {}
    for e in examples:
        cell = e.length, e.depth
        total[cell] = total.get(cell, 0) + 1
        out = write(e.prompt[:], len(e.answer))
        same = len(out) == len(e.answer) and all(a == b for a, b in zip(out, e.answer, strict=True))
        right[cell] = right.get(cell, 0) + same
    return {cell: right[cell] / total[cell] for cell in total}

# %% wrong="finetune_longer" because="no shift"
- loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
+ loss = F.cross_entropy(logits.flatten(0, 1), batch[:, :-1].flatten())

# %% wrong="finetune_longer" because="gradients are not cleared"
- optimizer.zero_grad(set_to_none=True)
- angles = angles_of(frequencies, batch.shape[1] - 1)
+ angles = angles_of(frequencies, batch.shape[1] - 1)

# %% wrong="finetune_longer" because="no clipping"
- nn.utils.clip_grad_norm_(trained, 1.0)

# %% wrong="finetune_longer" because="no warm-up"
- group["lr"] = lr * min(1.0, step / warmup)
+ group["lr"] = lr

# %% wrong="finetune_longer" because="the warm-up begins at 0"
- group["lr"] = lr * min(1.0, step / warmup)
+ group["lr"] = lr * min(1.0, (step - 1) / warmup)

# %% wrong="finetune_longer" because="weight decay by default"
- optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
+ optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

# %% wrong="finetune_longer" because="default betas"
- optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
+ optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

# %% wrong="finetune_longer" because="the model's own frequencies"
- angles = angles_of(frequencies, batch.shape[1] - 1)
+ angles = angles_of(rope_frequencies(model.config.head_dim), batch.shape[1] - 1)

# %% wrong="finetune_longer" because="the factor is ignored"
- logits = logits_with(model, batch[:, :-1], angles, factor)
+ logits = logits_with(model, batch[:, :-1], angles)

# %% wrong="finetune_longer" because="frozen parameters thaw"
- trained = [p for p in model.parameters() if p.requires_grad]
+ trained = [p.requires_grad_() for p in model.parameters()]

# %% wrong="finetune_longer" because="training mode stays on"
- losses = []
+ losses = []
+ model.train()

# %% wrong="finetune_longer" because="gradients are left behind"
- for parameter in model.parameters():  # the frozen ones too
-     parameter.grad = None
- return losses
+ return losses

# %% wrong="finetune_longer" because="the first batch again and again"
- logits = logits_with(model, batch[:, :-1], angles, factor)
+ batch = batches[0]
+ logits = logits_with(model, batch[:, :-1], angles_of(frequencies, batch.shape[1] - 1), factor)

# %% wrong="finetune_longer" because="a frozen parameter's old gradient enters the norm"
- nn.utils.clip_grad_norm_(trained, 1.0)
+ nn.utils.clip_grad_norm_(model.parameters(), 1.0)

# %% wrong="finetune_longer" because="a frozen parameter's old gradient is left"
- for parameter in model.parameters():  # the frozen ones too
+ for parameter in trained:

# %% right="finetune_longer" because="Adam with the gradients taken by hand"
def finetune_longer(model, frequencies, factor, batches, lr, warmup=4):
    for p in model.parameters():
        p.grad = None
    chosen = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.Adam(chosen, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    history = []
    for i, batch in enumerate(batches):
        known, wanted = batch[:, :-1], batch[:, 1:]
        out = logits_with(model, known, angles_of(frequencies, known.shape[1]), factor)
        loss = -out.log_softmax(-1).gather(-1, wanted[..., None]).mean()
        grads = torch.autograd.grad(loss, chosen)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for p, g in zip(chosen, grads, strict=True):
            p.grad = g / max(1.0, float(norm))
        rule.param_groups[0]["lr"] = lr * min(1, (i + 1) / warmup)
        rule.step()
        history.append(loss.item())
    for p in model.parameters():
        p.grad = None
    return history

# %% wrong="questions" because="the factor, not its square; keys alone; pairs that do turn"
def questions():
    return {
        "logits": 0.1 * math.log(16) + 1,
        "cache": 8.0,
        "unturned": 46,
        "recompute": "both",
        "place": 1024,
        "sink": 1.25,
    }

# %% wrong="questions" because="radians for turns"
- "unturned": int((4096 * rope_frequencies(128) < math.tau).sum()),
+ "unturned": int((4096 * rope_frequencies(128) < 1).sum()),

# %% wrong="questions" because="positions in the text"
- "place": 4 + 1020 - 1,
+ "place": 999_999,

# %% right="questions" because="by hand"
def questions():
    return {
        "logits": 1.2772588722239782**2,
        "cache": 16,
        "unturned": 18,
        "recompute": "keys",
        "place": 1023,
        "sink": 5,
    }

# %% wrong="partial_rope" because="the product is rounded to float32"
def partial_rope(frequencies: Tensor, share: float) -> Tensor:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, it must be between 0 and 1")
    kept = int(torch.floor(torch.tensor(share, dtype=torch.float32) * len(frequencies)))
    found = torch.zeros_like(frequencies)
    found[:kept] = frequencies[:kept]
    return found
