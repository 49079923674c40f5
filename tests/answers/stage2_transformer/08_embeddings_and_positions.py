# Right and wrong answers to the exercises of lesson 08: see CONTRIBUTING.md.

# %% wrong="tied_embedding" because="no root of dim at the input" base="no-root"
class TiedEmbedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

# %% wrong="tied_embedding" because="the logits are scaled by the root of dim as well" of="no-root"
- return self.weight[ids]
+ return self.weight[ids] * math.sqrt(self.weight.shape[1])

- return x @ self.weight.T
+ return x @ self.weight.T * math.sqrt(self.weight.shape[1])

# %% wrong="tied_embedding" because="multiplies by dim" of="no-root"
- return self.weight[ids]
+ return self.weight[ids] * self.weight.shape[1]

# %% wrong="tied_embedding" because="divides by the root of dim" of="no-root"
- return self.weight[ids]
+ return self.weight[ids] / math.sqrt(self.weight.shape[1])

# %% wrong="tied_embedding" because="entries of variance 1" of="no-root"
- self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
+ self.weight = nn.Parameter(torch.randn(vocab_size, dim))

- return self.weight[ids]
+ return self.weight[ids] * math.sqrt(self.weight.shape[1])

# %% wrong="tied_embedding" because="standard deviation 1/dim" of="no-root"
- self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
+ self.weight = nn.Parameter(torch.randn(vocab_size, dim) / dim)

- return self.weight[ids]
+ return self.weight[ids] * math.sqrt(self.weight.shape[1])

# %% wrong="tied_embedding" because="standard deviation 0.02, as in GPT-2" of="no-root"
- self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
+ self.weight = nn.Parameter(0.02 * torch.randn(vocab_size, dim))

- return self.weight[ids]
+ return self.weight[ids] * math.sqrt(self.weight.shape[1])

# %% wrong="tied_embedding" because="two matrices"
class TiedEmbedding(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, ids):
        return self.weight[ids] * math.sqrt(self.weight.shape[1])

    def logits(self, x):
        return self.head(x)

# %% wrong="tied_embedding" because="the head uses a detached copy, which learns nothing" of="no-root"
- return self.weight[ids]
+ return self.weight[ids] * math.sqrt(self.weight.shape[1])

- return x @ self.weight.T
+ return x @ self.weight.detach().T

# %% right="tied_embedding" because="nn.Embedding's functions, and einsum"
class TiedEmbedding(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, ids):
        return F.embedding(ids, self.weight) * self.weight.shape[-1] ** 0.5

    def logits(self, x):
        return torch.einsum("...d,vd->...v", x, self.weight)

# %% wrong="sinusoidal_encoding" because="the exponent is i/dim, not 2i/dim" base="exponent-i"
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange((dim + 1) // 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return encoding[:, :dim].float()

# %% wrong="sinusoidal_encoding" because="one frequency for each column"
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(dim, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    encoding = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return encoding[:, :dim].float()

# %% wrong="sinusoidal_encoding" because="all sines, then all cosines" base="all-sines"
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    encoding = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return encoding[:, :dim].float()

# %% wrong="sinusoidal_encoding" because="cosine before sine" of="all-sines"
- encoding = torch.cat([angle.sin(), angle.cos()], dim=-1)
+ encoding = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)

# %% wrong="sinusoidal_encoding" because="positions counted from 1"
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(1, length + 1, dtype=torch.float64)[:, None] * frequency
    encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return encoding[:, :dim].float()

# %% wrong="sinusoidal_encoding" because="angles in float32"
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return encoding[:, :dim].float()

# %% wrong="sinusoidal_encoding" because="an odd dim is rounded up in the exponent" of="exponent-i"
- frequency = 10_000.0 ** (-torch.arange((dim + 1) // 2, dtype=torch.float64) / dim)
+ frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / (dim + dim % 2))

# %% wrong="sinusoidal_encoding" because="an odd dim loses its last column" base="an-odd"
def sinusoidal_encoding(length: int, dim: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return encoding[:, : dim - dim % 2].float()

# %% wrong="sinusoidal_encoding" because="the series ends at 1/10000 exactly, as in tensor2tensor" of="exponent-i"
- frequency = 10_000.0 ** (-torch.arange((dim + 1) // 2, dtype=torch.float64) / dim)
+ frequency = 10_000.0 ** (
+     -torch.arange((dim + 1) // 2, dtype=torch.float64) / max((dim + 1) // 2 - 1, 1)
+ )

# %% wrong="sinusoidal_encoding" because="float64 out" of="an-odd"
- return encoding[:, : dim - dim % 2].float()
+ return encoding[:, :dim]

# %% wrong="sinusoidal_encoding" because="frequencies that grow" of="exponent-i"
- frequency = 10_000.0 ** (-torch.arange((dim + 1) // 2, dtype=torch.float64) / dim)
+ frequency = 10_000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

# %% right="sinusoidal_encoding" because="filled column by column, frequencies by exp and log"
def sinusoidal_encoding(length, dim):
    table = torch.zeros(length, dim, dtype=torch.float64)
    position = torch.arange(length, dtype=torch.float64)
    for column in range(dim):
        angle = position * math.exp(-math.log(10000.0) * (column // 2 * 2) / dim)
        table[:, column] = angle.cos() if column % 2 else angle.sin()
    return table.to(torch.float32)

# %% right="sinusoidal_encoding" because="the real and imaginary parts of powers of one rotation"
def sinusoidal_encoding(length, dim):
    pairs = (dim + 1) // 2
    angle = torch.outer(
        torch.arange(length, dtype=torch.float64),
        10000.0 ** (-2.0 / dim * torch.arange(pairs, dtype=torch.float64)),
    )
    z = torch.polar(torch.ones_like(angle), angle)
    table = torch.empty(length, 2 * pairs)
    table[:, 0::2], table[:, 1::2] = z.imag.float(), z.real.float()
    return table[:, :dim].clone()

# %% wrong="t5_relative_bucket" because="leaves out the minimum: far keys run into other buckets" base="leaves-out"
def t5_relative_bucket(rel: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    first = torch.zeros_like(rel, dtype=torch.int64)
    if bidirectional:
        buckets //= 2
        first = (rel > 0) * buckets
        distance = rel.abs()
    else:
        distance = (-rel).clamp(min=0)
    exact = buckets // 2

    way = torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact)
    far = exact + (way * (buckets - exact)).long()
    return first + torch.where(distance < exact, distance.long(), far)

# %% wrong="t5_relative_bucket" because="takes rel as query minus key" of="leaves-out"
  first = (rel > 0) * buckets
+ rel = -rel

- distance = (-rel).clamp(min=0)
+ distance = rel.clamp(min=0)

- far = exact + (way * (buckets - exact)).long()
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="the halves of an encoder are swapped" of="leaves-out"
- first = (rel > 0) * buckets
+ first = (rel < 0) * buckets

- far = exact + (way * (buckets - exact)).long()
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="distance 0 goes to the upper half" of="leaves-out"
- first = (rel > 0) * buckets
+ first = (rel >= 0) * buckets

- far = exact + (way * (buckets - exact)).long()
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="the halves of an encoder are not halved" of="leaves-out"
- buckets //= 2
- first = (rel > 0) * buckets
+ first = (rel > 0) * (buckets // 2)

- far = exact + (way * (buckets - exact)).long()
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="all buckets exact, the rest in the last" of="leaves-out"
- far = exact + (way * (buckets - exact)).long()
- return first + torch.where(distance < exact, distance.long(), far)
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)
+ return first + distance.clamp(max=buckets - 1).long()

# %% wrong="t5_relative_bucket" because="exact buckets include their number itself" of="leaves-out"
- far = exact + (way * (buckets - exact)).long()
- return first + torch.where(distance < exact, distance.long(), far)
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)
+ return first + torch.where(distance <= exact + 1, distance.long(), far)

# %% wrong="t5_relative_bucket" because="the future of a decoder gets its distance" of="leaves-out"
- distance = (-rel).clamp(min=0)
+ distance = rel.abs()

- far = exact + (way * (buckets - exact)).long()
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="rounded, not floored" of="leaves-out"
- far = exact + (way * (buckets - exact)).long()
+ far = (exact + (way * (buckets - exact)).round().long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="the logarithm is not measured from the last exact distance" of="leaves-out"
- way = torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact)
- far = exact + (way * (buckets - exact)).long()
+ way = torch.log(distance.clamp(min=1) / 1.0) / math.log(max_distance)
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="the far ones start one bucket too late" of="leaves-out"
- far = exact + (way * (buckets - exact)).long()
+ far = (exact + 1 + (way * (buckets - exact)).long()).clamp(max=buckets - 1)

# %% wrong="t5_relative_bucket" because="buckets as floats" of="leaves-out"
- far = exact + (way * (buckets - exact)).long()
- return first + torch.where(distance < exact, distance.long(), far)
+ far = (exact + (way * (buckets - exact)).long()).clamp(max=buckets - 1)
+ return first + torch.where(distance < exact, distance.long(), far).float()

# %% right="t5_relative_bucket" because="borders in a list, and bucketize"
def t5_relative_bucket(rel, bidirectional, buckets, max_distance):
    count = buckets // 2 if bidirectional else buckets
    exact = count // 2
    wide = count - exact
    borders = list(range(1, exact))
    for j in range(wide):
        n = exact
        while n**wide * exact**j < max_distance**j * exact**wide:
            n += 1
        borders.append(n)
    distance = rel.abs() if bidirectional else (-rel).clamp(min=0)
    index = torch.bucketize(distance.long(), torch.tensor(borders), right=True)
    return index + (rel > 0).long() * count if bidirectional else index

# %% right="t5_relative_bucket" because="the published code's way, in float32, without clamping the logarithm's input"
def t5_relative_bucket(rel, bidirectional, buckets, max_distance):
    result = 0
    n = -rel.long()
    if bidirectional:
        buckets //= 2
        result = (n < 0).long() * buckets
        n = n.abs()
    else:
        n = torch.maximum(n, torch.zeros_like(n))
    exact = buckets // 2
    far = (
        exact
        + (torch.log(n.float() / exact) / math.log(max_distance / exact) * (buckets - exact)).long()
    )
    far = torch.minimum(far, torch.full_like(far, buckets - 1))
    return result + torch.where(n < exact, n, far)

# %% wrong="alibi_bias" because="slopes by the formula for powers of two, whatever the number of heads" base="slopes-formula"
def alibi_slopes(heads: int) -> Tensor:
    power = heads
    own = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return torch.tensor(own + finer[: heads - power])


def alibi_bias(heads: int, length: int) -> Tensor:
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    bias = -alibi_slopes(heads)[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf)

# %% wrong="alibi_bias" because="the additional slopes are the second, fourth, sixth of the finer series" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
+ finer = [2 ** (-8 * h / (2 * power)) for h in range(2, 2 * power + 1, 2)]

# %% wrong="alibi_bias" because="the additional slopes are the first of the finer series, without leaving out every other" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
+ finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)]

# %% wrong="alibi_bias" because="the additional slopes in reverse order" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- return torch.tensor(own + finer[: heads - power])
+ return torch.tensor(own + finer[: heads - power][::-1])

# %% wrong="alibi_bias" because="slopes sorted" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- return torch.tensor(own + finer[: heads - power])
+ return torch.tensor(own + finer[: heads - power]).sort(descending=True).values

# %% wrong="alibi_bias" because="the slopes of the next larger power of two, cut off" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- return torch.tensor(own + finer[: heads - power])
+ return torch.tensor(
+     [2 ** (-8 * h / (2 * power if heads > power else power)) for h in range(1, heads + 1)]
+ )

# %% wrong="alibi_bias" because="a reward for distance" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- bias = -alibi_slopes(heads)[:, None, None] * distance
+ bias = alibi_slopes(heads)[:, None, None] * distance

# %% wrong="alibi_bias" because="the future is not hidden" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- return bias.masked_fill(distance < 0, -torch.inf)
+ return bias

# %% wrong="alibi_bias" because="the future gets a distance as well" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- return bias.masked_fill(distance < 0, -torch.inf)
+ return -bias.abs()

# %% wrong="alibi_bias" because="a token hides itself" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- return bias.masked_fill(distance < 0, -torch.inf)
+ return bias.masked_fill(distance <= 0, -torch.inf)

# %% wrong="alibi_bias" because="rows and columns exchanged" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- distance = position[:, None] - position[None, :]
+ distance = position[None, :] - position[:, None]

# %% wrong="alibi_bias" because="one slope for all heads" of="slopes-formula"
- power = heads
+ power = 1 << (heads.bit_length() - 1)

- bias = -alibi_slopes(heads)[:, None, None] * distance
+ bias = -alibi_slopes(heads).mean().expand(heads)[:, None, None] * distance

# %% right="alibi_bias" because="powers by repeated multiplication, the bias with tril"
def alibi_slopes(heads):
    power = 2 ** math.floor(math.log2(heads))
    ratio = 2 ** (-8 / power)
    slopes = [ratio ** (n + 1) for n in range(power)]
    extra = [ratio**0.5 * ratio**n for n in range(heads - power)]
    return torch.tensor(slopes + extra, dtype=torch.float32)


def alibi_bias(heads, length):
    future = torch.full((length, length), -torch.inf).triu(1)
    back = torch.arange(length).float()[None, :] - torch.arange(length).float()[:, None]
    return alibi_slopes(heads).view(-1, 1, 1) * back.tril() + future

# %% wrong="alibi_bias" because="distances in bfloat16, whole numbers up to 256 only"
def alibi_slopes(heads: int) -> Tensor:
    power = 2 ** math.floor(math.log2(heads))

    def series(n):
        return 2.0 ** (-8 * torch.arange(1, n + 1, dtype=torch.float32) / n)

    return torch.cat([series(power), series(2 * power)[0::2][: heads - power]])


def alibi_bias(heads: int, length: int) -> Tensor:
    place = torch.arange(length)
    distance = (place[:, None] - place).bfloat16()  # half the memory for the large table
    bias = -alibi_slopes(heads)[:, None, None] * distance.float()
    return bias.masked_fill(distance < 0, -math.inf)

# %% wrong="disentangled_scores" because="divides by the root of d" base="divides-root"
def disentangled_scores(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    batch, heads, seq, d = q.shape
    span = pos_k.shape[1] // 2
    position = torch.arange(seq, device=q.device)
    delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
    index = delta.expand(batch, heads, seq, seq)
    content = q @ k.mT
    to_position = (q @ pos_k.mT).gather(-1, index)

    from_position = (k @ pos_q.mT).gather(-1, index).mT
    return (content + to_position + from_position) / math.sqrt(d)

# %% wrong="disentangled_scores" because="divides by 3 root d" of="divides-root"
- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + to_position + from_position) / (3 * math.sqrt(d))

# %% wrong="disentangled_scores" because="does not divide" of="divides-root"
- return (content + to_position + from_position) / math.sqrt(d)
+ return content + to_position + from_position

# %% wrong="disentangled_scores" because="position to content with delta(i, j), not delta(j, i)" of="divides-root"
- from_position = (k @ pos_q.mT).gather(-1, index).mT
- return (content + to_position + from_position) / math.sqrt(d)
+ from_position = (k @ pos_q.mT).gather(-1, index.mT).mT
+ return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="position to content is not transposed back" of="divides-root"
- from_position = (k @ pos_q.mT).gather(-1, index).mT
- return (content + to_position + from_position) / math.sqrt(d)
+ from_position = (k @ pos_q.mT).gather(-1, index)
+ return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="content to position with delta(j, i)" of="divides-root"
- to_position = (q @ pos_k.mT).gather(-1, index)
+ to_position = (q @ pos_k.mT).gather(-1, index.mT)

- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="pos_q and pos_k exchanged"
def disentangled_scores(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    batch, heads, seq, d = q.shape
    span = pos_k.shape[1] // 2
    position = torch.arange(seq, device=q.device)
    delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
    index = delta.expand(batch, heads, seq, seq)
    content = q @ k.mT
    to_position = (q @ pos_q.mT).gather(-1, index)

    from_position = (k @ pos_k.mT).gather(-1, index).mT
    return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="no position to content" of="divides-root"
- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + to_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="no content to position" of="divides-root"
- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="distances are not clipped but wrap around" of="divides-root"
- delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
+ delta = (position[:, None] - position[None, :] + span) % (2 * span)

- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="clipped one too early" of="divides-root"
- delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
+ delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 2)

- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="the sign of the distance" of="divides-root"
- delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
+ delta = (position[None, :] - position[:, None] + span).clamp(0, 2 * span - 1)

- return (content + to_position + from_position) / math.sqrt(d)
+ return (content + to_position + from_position) / math.sqrt(3 * d)

# %% wrong="disentangled_scores" because="gathers vectors first: right, with a (seq, seq, d) tensor"
def disentangled_scores(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    batch, heads, seq, d = q.shape
    span = pos_k.shape[1] // 2
    position = torch.arange(seq, device=q.device)
    delta = (position[:, None] - position[None, :] + span).clamp(0, 2 * span - 1)
    index = delta.expand(batch, heads, seq, seq)
    content = q @ k.mT
    to_position = torch.einsum("bhid,hijd->bhij", q, pos_k[:, delta])

    from_position = torch.einsum("bhjd,hjid->bhij", k, pos_q[:, delta])
    return (content + to_position + from_position) / math.sqrt(3 * d)

# %% right="disentangled_scores" because="advanced indexing, positions as a range of shifts"
def disentangled_scores(q, k, pos_q, pos_k):
    seq, d = q.shape[-2:]
    span = pos_k.shape[1] // 2
    i = torch.arange(seq)[:, None]
    j = torch.arange(seq)[None, :]
    there, back = (
        torch.clamp(i - j + span, 0, 2 * span - 1),
        torch.clamp(j - i + span, 0, 2 * span - 1),
    )
    asked = torch.einsum("bhid,hrd->bhir", q, pos_k)[..., i, there]
    told = torch.einsum("bhjd,hrd->bhjr", k, pos_q)[..., j, back]
    return (torch.einsum("bhid,bhjd->bhij", q, k) + asked + told) * (3 * d) ** -0.5

# %% right="disentangled_scores" because="scaled queries and keys, take_along_dim"
def disentangled_scores(q, k, pos_q, pos_k):
    seq, width = q.shape[-2], pos_k.shape[1]
    s = (3 * q.shape[-1]) ** -0.5
    place = torch.arange(seq)
    row = (place[:, None] - place + width // 2).clamp(min=0, max=width - 1)[None, None]
    out = (q * s) @ k.transpose(-1, -2)
    out = out + torch.take_along_dim((q * s) @ pos_k.transpose(-1, -2), row, dim=-1)
    return out + torch.take_along_dim((k * s) @ pos_q.transpose(-1, -2), row, dim=-1).transpose(
        -1, -2
    )

# %% wrong="rope_cache" because="the exponent is i/dim, not 2i/dim" base="exponent-i"
def rope_cache(length: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    if dim % 2:
        raise ValueError(f"{dim} features do not form pairs")
    frequency = base ** (-torch.arange(dim // 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()

# %% wrong="rope_cache" because="base ignored" of="exponent-i"
- frequency = base ** (-torch.arange(dim // 2, dtype=torch.float64) / dim)
+ frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

# %% wrong="rope_cache" because="positions counted from 1"
def rope_cache(length: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    if dim % 2:
        raise ValueError(f"{dim} features do not form pairs")
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(1, length + 1, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()

# %% wrong="rope_cache" because="angles in float32"
def rope_cache(length: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    if dim % 2:
        raise ValueError(f"{dim} features do not form pairs")
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()

# %% wrong="rope_cache" because="sine first" base="sine-first"
def rope_cache(length: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    if dim % 2:
        raise ValueError(f"{dim} features do not form pairs")
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.sin().float(), angle.cos().float()

# %% wrong="rope_cache" because="every angle twice, (length, dim)" of="sine-first"
- return angle.sin().float(), angle.cos().float()
+ return angle.cos().float().repeat(1, 2), angle.sin().float().repeat(1, 2)

# %% wrong="rope_cache" because="an odd dim is accepted"
def rope_cache(length: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()

# %% wrong="rope_cache" because="frequencies that grow" of="exponent-i"
- frequency = base ** (-torch.arange(dim // 2, dtype=torch.float64) / dim)
+ frequency = base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

# %% wrong="rope_cache" because="float64 out" of="sine-first"
- return angle.sin().float(), angle.cos().float()
+ return angle.cos(), angle.sin()

# %% right="rope_cache" because="outer product, frequencies by exp"
def rope_cache(length, dim, base=10_000.0):
    if dim % 2 != 0:
        raise ValueError("dim must be even")
    omega = torch.exp(
        torch.linspace(0, -math.log(base) * (1 - 2 / dim), dim // 2, dtype=torch.float64)
    )
    angles = torch.outer(torch.arange(length).double(), omega)
    return torch.cos(angles).to(torch.float32), torch.sin(angles).to(torch.float32)

# %% wrong="apply_rope" because="the identity"
def apply_rope(x, cos, sin, start=0):
    if start + x.shape[-2] > cos.shape[0]:
        raise ValueError("too long")
    return x.clone()

# %% wrong="apply_rope" because="the interleaved layout"
def apply_rope(x, cos, sin, start=0):
    seq, r = x.shape[-2], 2 * cos.shape[1]
    if start + seq > cos.shape[0]:
        raise ValueError("too long")
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    a, b = x[..., 0:r:2].to(wide), x[..., 1:r:2].to(wide)
    y = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([y, x[..., r:]], dim=-1)

# %% wrong="apply_rope" because="turns the other way" base="turns-other"
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
    seq, half = x.shape[-2], cos.shape[1]
    if start + seq > cos.shape[0]:
        raise ValueError(
            f"positions {start} … {start + seq - 1} are asked for, but the table ends at {cos.shape[0] - 1}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(wide), second.to(wide)
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

# %% wrong="apply_rope" because="a sign error: lengths change" of="turns-other"
- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
+ turned = torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="apply_rope" because="start ignored" of="turns-other"
- cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
+ cos, sin = cos[:seq].to(wide), sin[:seq].to(wide)

- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="apply_rope" because="positions one too far" of="turns-other"
- cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
+ cos, sin = (
+     cos.roll(-1, 0)[start : start + seq].to(wide),
+     sin.roll(-1, 0)[start : start + seq].to(wide),
+ )

- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="apply_rope" because="what is not turned gets lost" of="turns-other"
- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
- return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
+ return turned

# %% wrong="apply_rope" because="what is not turned becomes zero" of="turns-other"
- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
- return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
+ return torch.cat([turned, torch.zeros_like(rest)], dim=-1) if rest.shape[-1] else turned

# %% wrong="apply_rope" because="halves of the whole head, although only a part turns"
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
    seq, half = x.shape[-2], cos.shape[1]
    if start + seq > cos.shape[0]:
        raise ValueError(
            f"positions {start} … {start + seq - 1} are asked for, but the table ends at {cos.shape[0] - 1}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    d = x.shape[-1] // 2
    first, rest1, second, rest2 = (
        x[..., :half],
        x[..., half:d],
        x[..., d : d + half],
        x[..., d + half :],
    )
    rest = x[..., 2 * half :]
    first, second = first.to(wide), second.to(wide)
    return torch.cat(
        [
            (first * cos - second * sin).to(x.dtype),
            rest1,
            (second * cos + first * sin).to(x.dtype),
            rest2,
        ],
        dim=-1,
    )

# %% wrong="apply_rope" because="no look at the table's length"
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
    seq, half = x.shape[-2], cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(wide), second.to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

# %% wrong="apply_rope" because="turned in half precision" of="turns-other"
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = x.dtype

- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="apply_rope" because="float32 out, whatever came in" of="turns-other"
- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
- return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
+ return torch.cat([turned, rest.to(turned.dtype)], dim=-1) if rest.shape[-1] else turned

# %% wrong="apply_rope" because="float64 goes through float32" of="turns-other"
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = torch.float32

- turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)
+ turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

# %% wrong="apply_rope" because="in place"
def apply_rope(x, cos, sin, start=0):
    seq, h = x.shape[-2], cos.shape[1]
    if start + seq > len(cos):
        raise ValueError("too long")
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    a, b = x[..., :h].to(wide).clone(), x[..., h : 2 * h].to(wide).clone()
    with torch.no_grad():
        x[..., :h] = a * cos - b * sin
        x[..., h : 2 * h] = b * cos + a * sin
    return x

# %% wrong="apply_rope" because="detached"
def apply_rope(x, cos, sin, start=0):
    seq, h = x.shape[-2], cos.shape[1]
    if start + seq > len(cos):
        raise ValueError("too long")
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    y = x.detach().to(wide).clone()
    a, b = y[..., :h].clone(), y[..., h : 2 * h].clone()
    y[..., :h] = a * cos - b * sin
    y[..., h : 2 * h] = b * cos + a * sin
    return y.to(x.dtype)

# %% wrong="apply_rope" because="the sequence is taken for the axis before the last but one"
def apply_rope(x, cos, sin, start=0):
    seq, h = x.shape[-2], cos.shape[1]
    if start + seq > len(cos):
        raise ValueError("too long")
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dim() > 3 and x.shape[-3] <= len(cos) - start:
        seq = x.shape[-3]
        cos, sin = cos[start : start + seq, None].to(wide), sin[start : start + seq, None].to(wide)
    else:
        cos, sin = cos[start : start + seq].to(wide), sin[start : start + seq].to(wide)
    a, b = x[..., :h].to(wide), x[..., h : 2 * h].to(wide)
    return torch.cat(
        [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * h :]], -1
    )

# %% right="apply_rope" because="complex numbers"
def apply_rope(x, cos, sin, start=0):
    seq, h = x.shape[-2], cos.shape[1]
    if start + seq > len(cos):
        raise ValueError("the table is too short")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turn = torch.complex(cos[start : start + seq].to(wide), sin[start : start + seq].to(wide))
    z = torch.complex(x[..., :h].to(wide), x[..., h : 2 * h].to(wide)) * turn
    return torch.cat([z.real.to(x.dtype), z.imag.to(x.dtype), x[..., 2 * h :]], dim=-1)

# %% right="apply_rope" because="rotate_half and doubled tables, as Hugging Face writes it"
def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rope(x, cos, sin, start=0):
    rows = slice(start, start + x.shape[-2])
    if rows.stop > cos.shape[0]:
        raise ValueError("the table is too short")
    wide = torch.promote_types(torch.float32, x.dtype)
    r = 2 * cos.shape[1]
    c, s = (torch.cat([t[rows], t[rows]], -1).to(wide) for t in (cos, sin))
    y = x.clone()
    part = x[..., :r].to(wide)
    y[..., :r] = (part * c + rotate_half(part) * s).to(x.dtype)
    return y

# %% wrong="apply_rope" because="the rest is turned by 0, which changes −0 and ∞"
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
    seq, half = x.shape[-2], cos.shape[1]
    if start + seq > len(cos):
        raise ValueError(f"{start + seq} positions, but the table has {len(cos)}")
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    c, s = cos[start : start + seq].to(work), sin[start : start + seq].to(work)
    rest = x.shape[-1] - 2 * half
    c = F.pad(torch.cat([c, c], -1), (0, rest), value=1.0)  # the rest turns by 0
    s = F.pad(torch.cat([s, s], -1), (0, rest), value=0.0)
    y = x.to(work)
    swapped = torch.cat([-y[..., half : 2 * half], y[..., :half], y[..., 2 * half :]], -1)
    return (y * c + swapped * s).to(x.dtype)

# %% wrong="interleaved_to_half" because="the conversion in the other direction"
def interleaved_to_half(w, rotary_dim=None):
    r = w.shape[1] if rotary_dim is None else rotary_dim
    order = torch.arange(w.shape[1])
    order[0:r:2] = torch.arange(r // 2)
    order[1:r:2] = torch.arange(r // 2, r)
    return w[:, order]

# %% wrong="interleaved_to_half" because="rotary_dim ignored"
def interleaved_to_half(w: Tensor, rotary_dim: int | None = None) -> Tensor:
    head_dim = w.shape[1]
    rotary_dim = head_dim
    order = torch.arange(head_dim)
    order[:rotary_dim] = torch.cat([torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2)])
    return w[:, order.to(w.device)]

# %% wrong="interleaved_to_half" because="second members before first members"
def interleaved_to_half(w: Tensor, rotary_dim: int | None = None) -> Tensor:
    head_dim = w.shape[1]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    order = torch.arange(head_dim)
    order[:rotary_dim] = torch.cat([torch.arange(1, rotary_dim, 2), torch.arange(0, rotary_dim, 2)])
    return w[:, order.to(w.device)]

# %% wrong="interleaved_to_half" because="all heads as one"
def interleaved_to_half(w, rotary_dim=None):
    if rotary_dim is not None and rotary_dim < w.shape[1]:
        order = torch.arange(w.shape[1])
        order[:rotary_dim] = torch.cat(
            [torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2)]
        )
        return w[:, order]
    rows = w.flatten(0, 1)
    return torch.cat([rows[0::2], rows[1::2]]).view(w.shape)

# %% wrong="interleaved_to_half" because="permutes the input features, not the rows"
def interleaved_to_half(w, rotary_dim=None):
    if w.dim() == 2:
        r = rotary_dim or w.shape[1]
        return torch.cat([w[:, 0:r:2], w[:, 1:r:2], w[:, r:]], 1)
    return torch.cat([w[..., 0::2], w[..., 1::2]], -1)

# %% wrong="interleaved_to_half" because="in place"
def interleaved_to_half(w, rotary_dim=None):
    r = rotary_dim or w.shape[1]
    w[:, :r] = torch.cat([w[:, 0:r:2], w[:, 1:r:2]], 1)
    return w

# %% right="interleaved_to_half" because="a transposition of (half, 2)"
def interleaved_to_half(w, rotary_dim=None):
    r = w.shape[1] if rotary_dim is None else rotary_dim
    turned = w[:, :r].unflatten(1, (r // 2, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([turned, w[:, r:]], dim=1)

# %% wrong="rotary_attention" because="values are turned too" base="values-are"
def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    seen, new = 0 if past is None else past[0].shape[-2], q.shape[-2]
    q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
    if v.shape[-1] >= 2 * cos.shape[1]:
        v = apply_rope(v, cos, sin, seen)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
    visible = torch.ones(new, seen + new, dtype=torch.bool, device=q.device).tril(seen)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True), (k, v)

# %% wrong="rotary_attention" because="every piece starts at position 0" of="values-are"
- q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)
+ q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)

# %% wrong="rotary_attention" because="the query starts at 0, the key at its place" of="values-are"
- q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)
+ q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin, seen)

# %% wrong="rotary_attention" because="one position too far after the first piece" of="values-are"
- q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)
+ q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, max(seen - 1, 0))

# %% wrong="rotary_attention" because="cached keys are turned again"
def rotary_attention(q, k, v, cos, sin, past=None):
    seen, new = 0 if past is None else past[0].shape[-2], q.shape[-2]
    if past is not None:
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
    q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin)
    visible = torch.ones(new, seen + new, dtype=torch.bool).tril(seen)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True), (k, v)

# %% wrong="rotary_attention" because="keys are kept unturned"
def rotary_attention(q, k, v, cos, sin, past=None):
    seen, new = 0 if past is None else past[0].shape[-2], q.shape[-2]
    if past is not None:
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
    visible = torch.ones(new, seen + new, dtype=torch.bool).tril(seen)
    out = F.scaled_dot_product_attention(
        apply_rope(q, cos, sin, seen),
        apply_rope(k, cos, sin),
        v,
        attn_mask=visible,
        enable_gqa=True,
    )
    return out, (k, v)

# %% wrong="rotary_attention" because="the first query lines up with the first key" of="values-are"
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)

- visible = torch.ones(new, seen + new, dtype=torch.bool, device=q.device).tril(seen)
+ visible = torch.ones(new, seen + new, dtype=torch.bool, device=q.device).tril()

# %% wrong="rotary_attention" because="new tokens see one another's future" of="values-are"
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)

- visible = torch.ones(new, seen + new, dtype=torch.bool, device=q.device).tril(seen)
+ visible = torch.ones(new, seen + new, dtype=torch.bool, device=q.device)

# %% wrong="rotary_attention" because="queries are not turned" of="values-are"
- q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)
+ k = apply_rope(k, cos, sin, seen)

# %% wrong="rotary_attention" because="query heads dealt out to the key heads in turn" of="values-are"
- if v.shape[-1] >= 2 * cos.shape[1]:
-     v = apply_rope(v, cos, sin, seen)

- return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True), (k, v)
+ turn = torch.arange(q.shape[1]) % k.shape[1]
+ return F.scaled_dot_product_attention(
+     q, k[:, turn], v[:, turn], attn_mask=visible, enable_gqa=True
+ ), (k, v)

# %% right="rotary_attention" because="scores by hand, the cache written into a longer tensor"
def rotary_attention(q, k, v, cos, sin, past=None):
    seen = 0
    if past is not None:
        seen = past[0].shape[2]
    total = seen + q.shape[2]
    keys = torch.empty(*k.shape[:2], total, k.shape[3], dtype=k.dtype, device=k.device)
    values = torch.empty(*v.shape[:2], total, v.shape[3], dtype=v.dtype, device=v.device)
    if past is not None:
        keys[:, :, :seen], values[:, :, :seen] = past
    keys[:, :, seen:], values[:, :, seen:] = apply_rope(k, cos, sin, start=seen), v
    group = q.shape[1] // k.shape[1]
    scores = (
        apply_rope(q, cos, sin, start=seen)
        @ keys.repeat_interleave(group, 1).mT
        / math.sqrt(q.shape[-1])
    )
    future = torch.arange(total)[None, :] > torch.arange(seen, total)[:, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ values.repeat_interleave(
        group, 1
    ), (keys, values)

# %% wrong="rope_kernel" because="the identity" base="identity"
@triton.jit
def rotate_heads(
    x_ptr,
    out_ptr,
    x_head,
    out_head,
    cos,
    sin,
    heads,
    half,
    head_dim,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    head = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < heads) & (pair < half)
    first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
    cos, sin = cos[None, :], sin[None, :]
    tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
    tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < heads) & (rest < head_dim)
        tl.store(
            out_ptr + head * out_head + rest,
            tl.load(x_ptr + head * x_head + rest, mask=inside),
            mask=inside,
        )


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    start,
    half,
    head_dim,
    q_heads,
    k_heads,
    q_batch,
    q_seq,
    q_head,
    k_batch,
    k_seq,
    k_head,
    q_out_batch,
    q_out_seq,
    q_out_head,
    k_out_batch,
    k_out_seq,
    k_out_head,
    BACKWARD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    row = (start + s) * half
    cos = tl.load(cos_ptr + row + pair, mask=pair < half, other=0.0)
    sin = tl.load(sin_ptr + row + pair, mask=pair < half, other=0.0)
    if BACKWARD:
        sin = -sin
    rotate_heads(
        q_ptr + b * q_batch + s * q_seq,
        q_out_ptr + b * q_out_batch + s * q_out_seq,
        q_head,
        q_out_head,
        cos,
        sin,
        q_heads,
        half,
        head_dim,
        BLOCK_Q,
        BLOCK_HALF,
        BLOCK_REST,
    )
    rotate_heads(
        k_ptr + b * k_batch + s * k_seq,
        k_out_ptr + b * k_out_batch + s * k_out_seq,
        k_head,
        k_out_head,
        cos,
        sin,
        k_heads,
        half,
        head_dim,
        BLOCK_K,
        BLOCK_HALF,
        BLOCK_REST,
    )

# %% wrong="rope_kernel" because="the interleaved layout" of="identity"
- first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
- second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
+ first = tl.load(x_ptr + head * x_head + 2 * pair, mask=inside, other=0.0).to(tl.float32)
+ second = tl.load(x_ptr + head * x_head + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + 2 * pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + 2 * pair + 1, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="turns forward in the backward pass" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- if BACKWARD:
-     sin = -sin

# %% wrong="rope_kernel" because="turns back in the forward pass" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- if BACKWARD:
+ if not BACKWARD:

# %% wrong="rope_kernel" because="a sign error: lengths change" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos + second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="start ignored" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- row = (start + s) * half
+ row = s * half

# %% wrong="rope_kernel" because="positions one too far" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- row = (start + s) * half
+ row = (start + s + 1) * half

# %% wrong="rope_kernel" because="the position is not multiplied by the table's width" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- row = (start + s) * half
+ row = start + s

# %% wrong="rope_kernel" because="what is not turned gets lost" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
- if BLOCK_REST > 0:
-     rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
-     inside = (head < heads) & (rest < head_dim)
-     tl.store(
-         out_ptr + head * out_head + rest,
-         tl.load(x_ptr + head * x_head + rest, mask=inside),
-         mask=inside,
-     )
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="what passes through is not masked" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- tl.store(
-     out_ptr + head * out_head + rest,
-     tl.load(x_ptr + head * x_head + rest, mask=inside),
-     mask=inside,
- )
+ tl.store(out_ptr + head * out_head + rest, tl.load(x_ptr + head * x_head + rest))

# %% wrong="rope_kernel" because="keys use the number of query heads" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

  sin,
- k_heads,
+ q_heads,

- BLOCK_K,
+ BLOCK_Q,

# %% wrong="rope_kernel" because="keys use the head stride of the queries" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- k_head,
- k_out_head,
+ q_head,
+ q_out_head,

# %% wrong="rope_kernel" because="the batch stride of the queries is ignored" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- q_ptr + b * q_batch + s * q_seq,
- q_out_ptr + b * q_out_batch + s * q_out_seq,
+ q_ptr + s * q_seq,
+ q_out_ptr + s * q_out_seq,

# %% wrong="rope_kernel" because="the batch is read at b times seq rows" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- q_ptr + b * q_batch + s * q_seq,
+ q_ptr + (b * tl.num_programs(0) + s) * q_seq,

- k_ptr + b * k_batch + s * k_seq,
+ k_ptr + (b * tl.num_programs(0) + s) * k_seq,

# %% wrong="rope_kernel" because="outputs are written with the strides of the inputs" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- q_out_ptr + b * q_out_batch + s * q_out_seq,
+ q_out_ptr + b * q_batch + s * q_seq,

  q_head,
- q_out_head,
+ q_head,

- k_out_ptr + b * k_out_batch + s * k_out_seq,
+ k_out_ptr + b * k_batch + s * k_seq,

  k_head,
- k_out_head,
+ k_head,

# %% wrong="rope_kernel" because="heads taken to be head_dim apart" of="identity"
- first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
- second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
+ first = tl.load(x_ptr + head * head_dim + pair, mask=inside, other=0.0).to(tl.float32)
+ second = tl.load(x_ptr + head * head_dim + half + pair, mask=inside, other=0.0).to(tl.float32)

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- tl.load(x_ptr + head * x_head + rest, mask=inside),
+ tl.load(x_ptr + head * head_dim + rest, mask=inside),

# %% wrong="rope_kernel" because="no mask on heads" of="identity"
- inside = (head < heads) & (pair < half)
+ inside = (head < BLOCK_H) & (pair < half)

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="no mask on pairs" of="identity"
- inside = (head < heads) & (pair < half)
+ inside = (head < heads) & (pair < BLOCK_HALF)

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="no mask on the stores" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin)

# %% wrong="rope_kernel" because="the second half begins at the block, not at half" of="identity"
- second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
+ second = tl.load(x_ptr + head * x_head + BLOCK_HALF + pair, mask=inside, other=0.0).to(
+     tl.float32
+ )

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + BLOCK_HALF + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="the second half begins in the middle of the head" of="identity"
- second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
+ second = tl.load(x_ptr + head * x_head + head_dim // 2 + pair, mask=inside, other=0.0).to(
+     tl.float32
+ )

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(
+     out_ptr + head * out_head + head_dim // 2 + pair, second * cos + first * sin, mask=inside
+ )

# %% wrong="rope_kernel" because="32-bit offsets for tokens" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
+ s, b = tl.program_id(0), tl.program_id(1)

# %% wrong="rope_kernel" because="32-bit offsets for heads" of="identity"
- head = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
+ head = tl.arange(0, BLOCK_H)[:, None]

- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="batch and sequence exchanged in the grid" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
+ s, b = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)

# %% wrong="rope_kernel" because="only the queries are turned, keys are copied" of="identity"
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

  k_out_head,
- cos,
- sin,
+ 1.0 + 0 * cos,
+ 0 * sin,

# %% wrong="rope_kernel" because="computed in the format of x" of="identity"
- first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
- second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
- cos, sin = cos[None, :], sin[None, :]
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(x_ptr.dtype.element_ty)
+ second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0)
+ cos, sin = cos[None, :].to(x_ptr.dtype.element_ty), sin[None, :].to(x_ptr.dtype.element_ty)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

# %% wrong="rope_kernel" because="cosines and sines loaded for every head" of="identity"
  out_head,
- cos,
- sin,
+ cos_ptr,
+ sin_ptr,
+ sign,

  inside = (head < heads) & (pair < half)
+ cos = tl.load(cos_ptr + 0 * head + pair, mask=inside, other=0.0)
+ sin = sign * tl.load(sin_ptr + 0 * head + pair, mask=inside, other=0.0)

- cos, sin = cos[None, :], sin[None, :]
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- cos = tl.load(cos_ptr + row + pair, mask=pair < half, other=0.0)
- sin = tl.load(sin_ptr + row + pair, mask=pair < half, other=0.0)
+ sign = 1.0

- sin = -sin
+ sign = -1.0

  q_out_head,
- cos,
- sin,
+ cos_ptr + row,
+ sin_ptr + row,
+ sign,

  k_out_head,
- cos,
- sin,
+ cos_ptr + row,
+ sin_ptr + row,
+ sign,

# %% wrong="rope_kernel" because="cosines and sines loaded once for q and once for k" of="identity"
  out_head,
- cos,
- sin,
+ cos_ptr,
+ sin_ptr,
+ sign,

- cos, sin = cos[None, :], sin[None, :]
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
+ cos = tl.load(cos_ptr + pair, mask=pair < half, other=0.0)
+ sin = sign * tl.load(sin_ptr + pair, mask=pair < half, other=0.0)
+ tl.store(out_ptr + head * out_head + pair, first * cos - second * sin, mask=inside)
+ tl.store(out_ptr + head * out_head + half + pair, second * cos + first * sin, mask=inside)

- cos = tl.load(cos_ptr + row + pair, mask=pair < half, other=0.0)
- sin = tl.load(sin_ptr + row + pair, mask=pair < half, other=0.0)
+ sign = 1.0

- sin = -sin
+ sign = -1.0

  q_out_head,
- cos,
- sin,
+ cos_ptr + row,
+ sin_ptr + row,
+ sign,

  k_out_head,
- cos,
- sin,
+ cos_ptr + row,
+ sin_ptr + row,
+ sign,

# %% right="rope_kernel" because="a loop over the heads, queries and keys in one function" of="identity"
- head = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
- pair = tl.arange(0, BLOCK_HALF)[None, :]
- inside = (head < heads) & (pair < half)
- first = tl.load(x_ptr + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
- second = tl.load(x_ptr + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
- cos, sin = cos[None, :], sin[None, :]
- tl.store(out_ptr + head * out_head + pair, first + 0 * cos, mask=inside)
- tl.store(out_ptr + head * out_head + half + pair, second + 0 * sin, mask=inside)
- if BLOCK_REST > 0:
-     rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
-     inside = (head < heads) & (rest < head_dim)
-     tl.store(
-         out_ptr + head * out_head + rest,
-         tl.load(x_ptr + head * x_head + rest, mask=inside),
-         mask=inside,
-     )
+ pair = tl.arange(0, BLOCK_HALF)
+ inside = pair < half
+ for h in range(heads):
+     head = h * tl.full((), 1, tl.int64)
+     x, out = x_ptr + head * x_head, out_ptr + head * out_head
+     a = tl.load(x + pair, mask=inside).to(tl.float32)
+     b = tl.load(x + half + pair, mask=inside).to(tl.float32)
+     tl.store(out + pair, a * cos - b * sin, mask=inside)
+     tl.store(out + half + pair, a * sin + b * cos, mask=inside)
+     if BLOCK_REST > 0:
+         rest = tl.arange(0, BLOCK_REST) + 2 * half
+         tl.store(out + rest, tl.load(x + rest, mask=rest < head_dim), mask=rest < head_dim)

# %% right="rope_kernel" because="without the helper: pointers first, both loads before both stores"
@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    start,
    half,
    head_dim,
    q_heads,
    k_heads,
    q_batch,
    q_seq,
    q_head,
    k_batch,
    k_seq,
    k_head,
    q_out_batch,
    q_out_seq,
    q_out_head,
    k_out_batch,
    k_out_seq,
    k_out_head,
    BACKWARD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    hq = tl.arange(0, BLOCK_Q)[:, None].to(tl.int64)
    hk = tl.arange(0, BLOCK_K)[:, None].to(tl.int64)
    mq, mk = (hq < q_heads) & (cols < half), (hk < k_heads) & (cols < half)
    q = q_ptr + b * q_batch + s * q_seq + hq * q_head
    k = k_ptr + b * k_batch + s * k_seq + hk * k_head
    qo = q_out_ptr + b * q_out_batch + s * q_out_seq + hq * q_out_head
    ko = k_out_ptr + b * k_out_batch + s * k_out_seq + hk * k_out_head
    c = tl.load(cos_ptr + (s + start) * half + cols, mask=cols < half, other=1.0)
    z = tl.load(sin_ptr + (s + start) * half + cols, mask=cols < half, other=0.0)
    z = tl.where(BACKWARD, -z, z)
    q1, q2 = (
        tl.load(q + cols, mask=mq, other=0.0).to(tl.float32),
        tl.load(q + half + cols, mask=mq, other=0.0).to(tl.float32),
    )
    k1, k2 = (
        tl.load(k + cols, mask=mk, other=0.0).to(tl.float32),
        tl.load(k + half + cols, mask=mk, other=0.0).to(tl.float32),
    )
    tl.store(qo + cols, q1 * c - q2 * z, mask=mq)
    tl.store(qo + half + cols, q2 * c + q1 * z, mask=mq)
    tl.store(ko + cols, k1 * c - k2 * z, mask=mk)
    tl.store(ko + half + cols, k2 * c + k1 * z, mask=mk)
    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(
            qo + rest,
            tl.load(q + rest, mask=(hq < q_heads) & (rest < head_dim)),
            mask=(hq < q_heads) & (rest < head_dim),
        )
        tl.store(
            ko + rest,
            tl.load(k + rest, mask=(hk < k_heads) & (rest < head_dim)),
            mask=(hk < k_heads) & (rest < head_dim),
        )

# %% wrong="position_numbers" because="periods without 2 pi, and with the exponent i/d" base="periods-without"
def position_numbers() -> dict[str, float | str]:
    period = [10_000 ** (i / 128) for i in range(64)]
    return {
        "slowest": period[-1],
        "unturned": sum(p > 4096 for p in period),
        "t5": 32 * 12,
        "alibi": math.log(2) * 16,
        "tied": 128_256 * 4096,
        "kernel_us": 2 * 2 * 8192 * (32 + 8) * 128 / 4.8e12 * 1e6,
        "saved": "nothing",
        "cache": "no",
    }

# %% wrong="position_numbers" because="pairs that do turn are counted" of="periods-without"
- period = [10_000 ** (i / 128) for i in range(64)]
+ period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]

- "unturned": sum(p > 4096 for p in period),
+ "unturned": sum(p <= 4096 for p in period),

# %% wrong="position_numbers" because="a table for each layer" of="periods-without"
- period = [10_000 ** (i / 128) for i in range(64)]
+ period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]

- "t5": 32 * 12,
+ "t5": 32 * 12 * 12,

# %% wrong="position_numbers" because="ALiBi's slope as a half-life" of="periods-without"
- period = [10_000 ** (i / 128) for i in range(64)]
+ period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]

- "alibi": math.log(2) * 16,
+ "alibi": 16,

# %% wrong="position_numbers" because="only the reads are counted" of="periods-without"
- period = [10_000 ** (i / 128) for i in range(64)]
+ period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]

- "kernel_us": 2 * 2 * 8192 * (32 + 8) * 128 / 4.8e12 * 1e6,
+ "kernel_us": 2 * 8192 * (32 + 8) * 128 / 4.8e12 * 1e6,

# %% wrong="position_numbers" because="keeps q and k for the backward pass" of="periods-without"
- period = [10_000 ** (i / 128) for i in range(64)]
+ period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]

- "saved": "nothing",
+ "saved": "both",

# %% wrong="position_numbers" because="turns the cache again" of="periods-without"
- period = [10_000 ** (i / 128) for i in range(64)]
+ period = [2 * math.pi * 10_000 ** (2 * i / 128) for i in range(64)]

- "cache": "no",
+ "cache": "yes",

# %% right="position_numbers" because="written out"
def position_numbers():
    return {
        "slowest": 54_410.0,
        "unturned": 18,
        "t5": 384,
        "alibi": 11.09,
        "tied": 525_336_576,
        "kernel_us": 34.95,
        "saved": "nothing",
        "cache": "no",
    }

# %% wrong="tied_embedding" because="a uniform distribution of variance 1/dim"
- self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
+ self.weight = nn.Parameter(torch.empty(vocab_size, dim))
+ nn.init.kaiming_uniform_(self.weight, nonlinearity="linear")

# %% wrong="tied_embedding" because="the root is a tensor, which widens half-precision vectors"
- return self.weight[ids] * math.sqrt(self.weight.shape[1])
+ return self.weight[ids] * torch.full((1,), self.weight.shape[1]).sqrt()

# %% wrong="t5_relative_bucket" because="rel is made absolute in place, for an encoder"
- distance = rel.abs()
+ distance = rel.abs_()

# %% wrong="t5_relative_bucket" because="the logarithmic scale is one distance too short"
- way = torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact)
+ way = torch.log(distance.clamp(min=1) / exact) / math.log(max_distance / (exact + 1))

# %% wrong="interleaved_to_half" because="rotary_dim = 0 is taken for None"
- rotary_dim = head_dim if rotary_dim is None else rotary_dim
+ rotary_dim = rotary_dim or head_dim

# %% wrong="interleaved_to_half" because="w itself where nothing turns"
- rotary_dim = head_dim if rotary_dim is None else rotary_dim
+ rotary_dim = head_dim if rotary_dim is None else rotary_dim
+ if rotary_dim <= 2:
+     return w

# %% wrong="rotary_attention" because="the cache is kept in float32"
- return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True), (k, v)
+ out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
+ return out, (k.float(), v.to(q.dtype))

# %% wrong="rotary_attention" because="keys and values are detached before they are used"
- q, k = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen)
+ q, k, v = apply_rope(q, cos, sin, seen), apply_rope(k, cos, sin, seen).detach(), v.detach()

# %% wrong="rope_kernel" because="an if on a block, which no GPU compiles"
- if BACKWARD:  # R_pᵀ = R_{−p}
-     sin = -sin
+ if BACKWARD and (pair < half).any():
+     sin = -sin
