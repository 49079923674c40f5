# Right and wrong answers to the exercises of lesson 12: see CONTRIBUTING.md.

# %% wrong="visibility" because="the prefix stays causal"
def visibility(kind, prefix, seq):
    if kind == "encoder":
        return torch.ones(seq, seq, dtype=torch.bool)
    if kind in ("decoder", "prefix"):
        return torch.ones(seq, seq, dtype=torch.bool).tril()
    raise ValueError(kind)

# %% wrong="visibility" because="the prefix sees what follows it"
def visibility(kind, prefix, seq):
    mask = torch.ones(seq, seq, dtype=torch.bool)
    if kind == "encoder":
        return mask
    mask = mask.tril()
    if kind == "decoder":
        return mask
    if kind != "prefix":
        raise ValueError(kind)
    mask[:prefix] = True
    return mask

# %% wrong="visibility" because="target rows do not see the prefix: two separate blocks"
def visibility(kind, prefix, seq):
    mask = torch.ones(seq, seq, dtype=torch.bool)
    if kind == "encoder":
        return mask
    mask = mask.tril()
    if kind == "prefix":
        mask[:prefix, :prefix] = True
        mask[prefix:, :prefix] = False
    elif kind != "decoder":
        raise ValueError(kind)
    return mask

# %% wrong="visibility" because="an unknown family is taken for a decoder"
def visibility(kind, prefix, seq):
    mask = torch.ones(seq, seq, dtype=torch.bool)
    if kind == "encoder":
        return mask
    mask = mask.tril()
    if kind == "prefix":
        mask[:, :prefix] = True
    return mask

# %% right="visibility" because="comparisons of positions"
def visibility(kind, prefix, seq):
    if kind not in ("encoder", "decoder", "prefix"):
        raise ValueError(kind)
    horizon = {"encoder": seq, "decoder": 0, "prefix": prefix}[kind]
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None, :]
    return (j <= i) | (j < horizon)

# %% wrong="encoder_layer" because="pre-norm" base="pre-norm"
class EncoderLayer(nn.Module):
    def __init__(self, d_model, heads, d_ff, activation=F.relu):
        super().__init__()
        self.self_attn = Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.activation = activation

    def forward(self, x, mask=None):
        h = self.norm1(x)
        x = x + self.self_attn(h, h, mask)
        return x + self.linear2(self.activation(self.linear1(self.norm2(x))))

# %% wrong="encoder_layer" because="the second residual skips the first norm" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = x + self.self_attn(x, x, mask)
+ return self.norm2(x + self.linear2(self.activation(self.linear1(self.norm1(x)))))

# %% wrong="encoder_layer" because="no residual around attention" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = self.norm1(self.self_attn(x, x, mask))
+ return self.norm2(x + self.linear2(self.activation(self.linear1(x))))

# %% wrong="encoder_layer" because="one norm used twice" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = self.norm1(x + self.self_attn(x, x, mask))
+ return self.norm1(x + self.linear2(self.activation(self.linear1(x))))

# %% wrong="encoder_layer" because="the mask is not handed on" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = self.norm1(x + self.self_attn(x, x))
+ return self.norm2(x + self.linear2(self.activation(self.linear1(x))))

# %% wrong="encoder_layer" because="always ReLU" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = self.norm1(x + self.self_attn(x, x, mask))
+ return self.norm2(x + self.linear2(F.relu(self.linear1(x))))

# %% wrong="encoder_layer" because="activation after the second linear layer" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = self.norm1(x + self.self_attn(x, x, mask))
+ return self.norm2(x + self.activation(self.linear2(self.linear1(x))))

# %% wrong="encoder_layer" because="the norm before the residual is added" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ x = x + self.norm1(self.self_attn(x, x, mask))
+ return x + self.norm2(self.linear2(self.activation(self.linear1(x))))

# %% right="encoder_layer" because="sublayers in a loop"
class EncoderLayer(nn.Module):
    def __init__(self, d_model, heads, d_ff, activation=F.relu):
        super().__init__()
        self.self_attn = Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.activation = activation

    def forward(self, x, mask=None):
        frames = (
            (self.norm1, lambda h: self.self_attn(h, h, mask)),
            (self.norm2, lambda h: self.linear2(self.activation(self.linear1(h)))),
        )
        for norm, sublayer in frames:
            x = norm(sublayer(x) + x)
        return x

# %% right="encoder_layer" because="norms by the functional form" of="pre-norm"
- h = self.norm1(x)
- x = x + self.self_attn(h, h, mask)
- return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
+ a = x + self.self_attn(x, x, mask=mask)
+ a = F.layer_norm(a, (a.shape[-1],), self.norm1.weight, self.norm1.bias, self.norm1.eps)
+ a = a + self.linear2(self.activation(self.linear1(a)))
+ return F.layer_norm(a, a.shape[-1:], self.norm2.weight, self.norm2.bias, self.norm2.eps)

# %% wrong="encoder_layer" because="d_ff is ignored: always four times d_model"
- self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
+ self.linear1, self.linear2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

# %% wrong="encoder_layer" because="only ReLU and F.gelu are known, any other activation becomes ReLU"
- self.activation = activation
+ self.activation = activation if activation is F.gelu else F.relu

# %% wrong="encoder_layer" because="every head and every sentence uses the first one's mask"
- x = self.norm1(x + self.self_attn(x, x, mask))
+ if mask is not None and mask.dim() == 4:
+     mask = mask[:, :1]
+ x = self.norm1(x + self.self_attn(x, x, mask))

# %% wrong="decoder_layer" because="pre-norm"
class DecoderLayer(nn.Module):
    def __init__(self, d_model, heads, d_ff):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(d_model, heads), Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))

    def forward(self, x, memory, mask=None, memory_mask=None):
        h = self.norm1(x)
        x = x + self.self_attn(h, h, mask)
        x = x + self.cross_attn(self.norm2(x), memory, memory_mask)
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))

# %% wrong="decoder_layer" because="cross-attention reads its own states as keys" base="cross-attention"
class DecoderLayer(nn.Module):
    def __init__(self, d_model, heads, d_ff):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(d_model, heads), Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))

    def forward(self, x, memory, mask=None, memory_mask=None):
        x = self.norm1(x + self.self_attn(x, x, mask))
        x = self.norm2(x + self.cross_attn(x, x))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))

# %% wrong="decoder_layer" because="cross-attention asks with the memory and reads the target" of="cross-attention"
- x = self.norm2(x + self.cross_attn(x, x))
+ x = self.norm2(x + self.cross_attn(memory, x)[:, : x.shape[1]])

# %% wrong="decoder_layer" because="the masks exchanged" of="cross-attention"
- x = self.norm1(x + self.self_attn(x, x, mask))
- x = self.norm2(x + self.cross_attn(x, x))
+ x = self.norm1(x + self.self_attn(x, x, memory_mask))
+ x = self.norm2(x + self.cross_attn(x, memory, mask))

# %% wrong="decoder_layer" because="the source's padding is not hidden" of="cross-attention"
- x = self.norm2(x + self.cross_attn(x, x))
+ x = self.norm2(x + self.cross_attn(x, memory))

# %% wrong="decoder_layer" because="cross-attention before self-attention" of="cross-attention"
  def forward(self, x, memory, mask=None, memory_mask=None):
+     x = self.norm2(x + self.cross_attn(x, memory, memory_mask))

- x = self.norm2(x + self.cross_attn(x, x))

# %% wrong="decoder_layer" because="the causal mask is left out of self-attention" of="cross-attention"
- x = self.norm1(x + self.self_attn(x, x, mask))
- x = self.norm2(x + self.cross_attn(x, x))
+ x = self.norm1(x + self.self_attn(x, x))
+ x = self.norm2(x + self.cross_attn(x, memory, memory_mask))

# %% wrong="decoder_layer" because="no residual around cross-attention" of="cross-attention"
- x = self.norm2(x + self.cross_attn(x, x))
+ x = self.norm2(self.cross_attn(x, memory, memory_mask))

# %% wrong="decoder_layer" because="always causal, whatever mask is given" of="cross-attention"
  def forward(self, x, memory, mask=None, memory_mask=None):
+     n = x.shape[1]
+     mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()

- x = self.norm2(x + self.cross_attn(x, x))
+ x = self.norm2(x + self.cross_attn(x, memory, memory_mask))

# %% right="decoder_layer" because="sublayers in a loop"
class DecoderLayer(nn.Module):
    def __init__(self, d_model, heads, d_ff):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(d_model, heads), Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))

    def forward(self, x, memory, mask=None, memory_mask=None):
        frames = (
            (self.norm1, lambda h: self.self_attn(h, h, mask)),
            (self.norm2, lambda h: self.cross_attn(h, memory, memory_mask)),
            (self.norm3, lambda h: self.linear2(F.relu(self.linear1(h)))),
        )
        for norm, sublayer in frames:
            x = norm(x + sublayer(x))
        return x

# %% wrong="decoder_layer" because="d_ff is ignored: always four times d_model"
- self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
+ self.linear1, self.linear2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

# %% wrong="decoder_layer" because="a causal mask of its own on top of the mask that is given"
- x = self.norm1(x + self.self_attn(x, x, mask))
+ if mask is not None:
+     seq = x.shape[1]
+     mask = mask & torch.ones(seq, seq, dtype=torch.bool, device=x.device).tril()
+ x = self.norm1(x + self.self_attn(x, x, mask))

# %% wrong="decoder_layer" because="memory_mask is taken for padding: the first query's row for all"
- x = self.norm2(x + self.cross_attn(x, memory, memory_mask))
+ if memory_mask is not None and memory_mask.dim() > 1:
+     memory_mask = memory_mask[..., :1, :]
+ x = self.norm2(x + self.cross_attn(x, memory, memory_mask))

# %% wrong="transformer" because="decoder without causal mask" base="decoder-without"
class Transformer(nn.Module):
    def __init__(self, vocab_size, d_model=64, heads=4, layers=2, d_ff=256, pad=0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, heads, d_ff) for _ in range(layers))
        self.pad = pad

    def embed(self, tokens):
        width = self.embedding.embedding_dim
        return self.embedding(tokens) * math.sqrt(width) + sinusoids(tokens.shape[1], width).to(
            self.embedding.weight
        )

    def encode(self, source):
        x, mask = self.embed(source), (source != self.pad)[:, None, None]
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def decode(self, target, memory, source):
        seq = target.shape[1]
        causal = None
        x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
        for layer in self.decoder:
            x = layer(x, memory, causal, memory_mask)
        return x @ self.embedding.weight.T

    def forward(self, source, target):
        return self.decode(target, self.encode(source), source)

# %% wrong="transformer" because="the causal mask also hides a token from itself" of="decoder-without"
- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril(-1)

# %% wrong="transformer" because="embeddings not scaled" of="decoder-without"
- return self.embedding(tokens) * math.sqrt(width) + sinusoids(tokens.shape[1], width).to(
-     self.embedding.weight
- )
+ return self.embedding(tokens) + sinusoids(tokens.shape[1], width).to(self.embedding.weight)

- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

# %% wrong="transformer" because="positions scaled as well" of="decoder-without"
- return self.embedding(tokens) * math.sqrt(width) + sinusoids(tokens.shape[1], width).to(
-     self.embedding.weight
- )
+ return (
+     self.embedding(tokens) + sinusoids(tokens.shape[1], width).to(self.embedding.weight)
+ ) * math.sqrt(width)

- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

# %% wrong="transformer" because="no positions" of="decoder-without"
- return self.embedding(tokens) * math.sqrt(width) + sinusoids(tokens.shape[1], width).to(
-     self.embedding.weight
- )
+ return self.embedding(tokens) * math.sqrt(width)

- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

# %% wrong="transformer" because="the source's padding is seen by the encoder" of="decoder-without"
- x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ x, mask = self.embed(source), None

- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

# %% wrong="transformer" because="the source's padding is seen by cross-attention" of="decoder-without"
- causal = None
- x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()
+ x, memory_mask = self.embed(target), None

# %% wrong="transformer" because="padding is taken to be 0" of="decoder-without"
- x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ x, mask = self.embed(source), (source != 0)[:, None, None]

- causal = None
- x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()
+ x, memory_mask = self.embed(target), (source != 0)[:, None, None]

# %% wrong="transformer" because="the masks mean hidden" of="decoder-without"
- x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ x, mask = self.embed(source), (source == self.pad)[:, None, None]

- causal = None
- x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()
+ x, memory_mask = self.embed(target), (source == self.pad)[:, None, None]

# %% wrong="transformer" because="PyTorch's default initialization of the embedding" of="decoder-without"
- nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
+ pass

- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

# %% wrong="transformer" because="logits scaled as the input is" of="decoder-without"
- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

- return x @ self.embedding.weight.T
+ return x @ self.embedding.weight.T * math.sqrt(self.embedding.embedding_dim)

# %% wrong="transformer" because="the decoder reads the embedded source, not the encoder's output" of="decoder-without"
- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

- return self.decode(target, self.encode(source), source)
+ return self.decode(target, self.embed(source), source)

# %% wrong="transformer" because="probabilities instead of logits" of="decoder-without"
- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

- return x @ self.embedding.weight.T
+ return (x @ self.embedding.weight.T).softmax(-1)

# %% wrong="transformer" because="a head of its own" of="decoder-without"
  nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
+ self.head = nn.Linear(d_model, vocab_size, bias=False)

- causal = None
+ causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()

- return x @ self.embedding.weight.T
+ return self.head(x)

# %% right="transformer" because="F.linear, masks by comparison, positions kept in a buffer" of="decoder-without"
- nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
+ nn.init.normal_(self.embedding.weight, 0.0, 1 / math.sqrt(d_model))
+ self.register_buffer("positions", sinusoids(512, d_model), persistent=False)

- return self.embedding(tokens) * math.sqrt(width) + sinusoids(tokens.shape[1], width).to(
-     self.embedding.weight
+ return self.embedding(tokens).mul(width**0.5) + self.positions[: tokens.shape[1]].to(
+     self.embedding.weight.dtype

- x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ x, mask = self.embed(source), source.ne(self.pad).view(len(source), 1, 1, -1)

- causal = None
+ causal = (
+     torch.arange(seq, device=target.device)[None]
+     <= torch.arange(seq, device=target.device)[:, None]
+ )

- return x @ self.embedding.weight.T
+ return F.linear(x, self.embedding.weight)

# %% wrong="warmup_rate" because="no square root of the width" base="no-square"
def warmup_rate(step, d_model, warmup):
    if step < 1:
        raise ValueError(step)
    return min(step**-0.5, step * warmup**-1.5) / d_model

# %% wrong="warmup_rate" because="linear decay" of="no-square"
- return min(step**-0.5, step * warmup**-1.5) / d_model
+ return (d_model * warmup) ** -0.5 * min(step / warmup, warmup / step)

# %% wrong="warmup_rate" because="the larger of the two branches" of="no-square"
- return min(step**-0.5, step * warmup**-1.5) / d_model
+ return d_model**-0.5 * max(step**-0.5, step * warmup**-1.5)

# %% wrong="warmup_rate" because="steps counted from 0"
def warmup_rate(step, d_model, warmup):
    step += 1
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)

# %% right="warmup_rate" because="two branches"
def warmup_rate(step, d_model, warmup):
    if step < 1:
        raise ValueError("from 1")
    peak = 1 / math.sqrt(d_model * warmup)
    return peak * step / warmup if step < warmup else peak * math.sqrt(warmup / step)

# %% wrong="smoothed_loss" because="mass on padding: PyTorch's own smoothing"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=pad, label_smoothing=smoothing
    )

# %% wrong="smoothed_loss" because="padding positions count" base="padding-positions"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    logp = logits.log_softmax(-1)
    right = logp.gather(-1, labels[..., None])[..., 0]
    others = (logp.sum(-1) - logp[..., pad]) / (logits.shape[-1] - 1)
    return -((1 - smoothing) * right + smoothing * others).mean()

# %% wrong="smoothed_loss" because="divided by all positions, padding too" of="padding-positions"
- return -((1 - smoothing) * right + smoothing * others).mean()
+ return -(((1 - smoothing) * right + smoothing * others) * (labels != pad)).mean()

# %% wrong="smoothed_loss" because="no smoothing"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad)

# %% wrong="smoothed_loss" because="a sum instead of a mean"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    real = labels != pad
    logp = logits[real].log_softmax(-1)
    right = logp.gather(-1, labels[real][:, None])[:, 0]
    others = (logp.sum(-1) - logp[:, pad]) / (logits.shape[-1] - 1)
    return -((1 - smoothing) * right + smoothing * others).sum()

# %% wrong="smoothed_loss" because="the mass goes to the other tokens only"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    real = labels != pad
    logp = logits[real].log_softmax(-1)
    right = logp.gather(-1, labels[real][:, None])[:, 0]
    others = (logp.sum(-1) - logp[:, pad] - right) / (logits.shape[-1] - 2)
    return -((1 - smoothing) * right + smoothing * others).mean()

# %% wrong="smoothed_loss" because="the logarithm of a softmax that underflows"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    real = labels != pad
    logp = logits[real].softmax(-1).log()
    right = logp.gather(-1, labels[real][:, None])[:, 0]
    others = (logp.sum(-1) - logp[:, pad]) / (logits.shape[-1] - 1)
    return -((1 - smoothing) * right + smoothing * others).mean()

# %% wrong="smoothed_loss" because="the softmax leaves padding out"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    real = labels != pad
    keep = [c for c in range(logits.shape[-1]) if c != pad]
    kept = logits[real][:, keep]
    where = torch.tensor([keep.index(y) for y in labels[real].tolist()], device=labels.device)
    return F.cross_entropy(kept, where, label_smoothing=smoothing)

# %% right="smoothed_loss" because="a table of wanted distributions"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    vocab = logits.shape[-1]
    q = F.one_hot(labels, vocab).to(logits) * (1 - smoothing) + smoothing / (vocab - 1)
    q = q * (torch.arange(vocab, device=labels.device) != pad)
    real = (labels != pad).to(logits)
    return -((q * logits.log_softmax(-1)).sum(-1) * real).sum() / real.sum()

# %% right="smoothed_loss" because="PyTorch's cross-entropy twice"
def smoothed_loss(logits, labels, pad=0, smoothing=0.1):
    real = labels != pad
    z, y = logits[real], labels[real]
    rest = torch.logsumexp(z, -1) - (z.sum(-1) - z[:, pad]) / (z.shape[-1] - 1)
    return (1 - smoothing) * F.cross_entropy(z, y) + smoothing * rest.mean()

# %% wrong="train" because="target not shifted: the answer leaks" base="target-shifted"
def train(model, source, target, *, steps, batch, loss_fn, rate_fn, generator=None, report=None):
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    losses = []
    for k in range(1, steps + 1):
        rows = torch.randint(len(source), (batch,), generator=generator).to(source.device)
        wanted = target[rows]
        loss = loss_fn(model(source[rows], wanted), wanted)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_fn(k)
        optimizer.step()
        losses.append(loss.item())
        if report is not None:
            report(k)
    return losses

# %% wrong="train" because="labels cut like the input" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, :-1])

# %% wrong="train" because="the decoder reads the labels, the loss the inputs" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, 1:]), wanted[:, :-1])

# %% wrong="train" because="gradients add up over the steps" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
- optimizer.zero_grad()
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])
+ pass

# %% wrong="train" because="the rate of the step before" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])

- group["lr"] = rate_fn(k)
+ group["lr"] = rate_fn(max(k - 1, 1))

# %% wrong="train" because="no schedule: the rate of step 1 throughout" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])

- group["lr"] = rate_fn(k)
+ group["lr"] = rate_fn(1)

# %% wrong="train" because="source and target drawn separately" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(
+     model(
+         source[torch.randint(len(source), (batch,), generator=generator)], wanted[:, :-1]
+     ),
+     wanted[:, 1:],
+ )

# %% wrong="train" because="the same rows at every step" of="target-shifted"
- rows = torch.randint(len(source), (batch,), generator=generator).to(source.device)
+ rows = torch.arange(batch) % len(source)

- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])

# %% wrong="train" because="Adam's default betas" of="target-shifted"
- optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
+ optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), eps=1e-9)

- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])

# %% wrong="train" because="returns the last loss only at every place" of="target-shifted"
- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])

- return losses
+ return losses[-1:] * steps

# %% wrong="train" because="the generator is ignored" of="target-shifted"
- rows = torch.randint(len(source), (batch,), generator=generator).to(source.device)
+ rows = torch.randint(len(source), (batch,)).to(source.device)

- loss = loss_fn(model(source[rows], wanted), wanted)
+ loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])

# %% right="train" because="a scheduler's place taken by setting the rate first, gradients cleared at the end"
def train(model, source, target, *, steps, batch, loss_fn, rate_fn, generator=None, report=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    losses = []
    for k in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate_fn(k)
        rows = torch.randint(0, source.shape[0], (batch,), generator=generator).to(source.device)
        inputs, labels = target[rows, :-1], target[rows, 1:]
        loss = loss_fn(model(source[rows], inputs), labels)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report:
            report(k)
    return losses

# %% right="train" because="LambdaLR"
def train(model, source, target, *, steps, batch, loss_fn, rate_fn, generator=None, report=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: rate_fn(min(done + 1, steps))
    )
    losses = []
    for k in range(steps):
        rows = torch.randint(len(source), (batch,), generator=generator).to(source.device)
        loss = loss_fn(model(source[rows], target[rows][:, :-1]), target[rows][:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach().item())
        if report is not None:
            report(k + 1)
    return losses

# %% wrong="beam_search" because="no length normalization" base="no-length"
def beam_search(step_fn, beam, length_penalty=0.6, *, bos=1, eos=2, max_len=32):
    def penalty(length):
        return 1.0

    living = [((), 0.0)]
    finished = []
    for length in range(1, max_len + 1):
        prefixes = torch.tensor([(bos, *tokens) for tokens, _ in living])
        extended = []
        for (tokens, logp), row in zip(living, step_fn(prefixes).double().tolist()):
            for token, step in enumerate(row):
                if step == -math.inf:
                    continue
                if token == eos:
                    finished.append(((*tokens, eos), (logp + step) / penalty(length)))
                else:
                    extended.append(((*tokens, token), logp + step))
        finished = sorted(finished, key=lambda pair: -pair[1])[:beam]
        living = sorted(extended, key=lambda pair: -pair[1])[:beam]
        if not living or (
            len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
        ):
            break
    return finished

# %% wrong="beam_search" because="length to the power of alpha" of="no-length"
- return 1.0
+ return length**length_penalty

# %% wrong="beam_search" because="the end token is left out of the length" of="no-length"
- return 1.0
+ return ((4 + length) / 6) ** length_penalty

# %% wrong="beam_search" because="stops as soon as beam hypotheses have finished" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- if not living or (
-     len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
- ):
+ if not living or len(finished) == beam:

# %% wrong="beam_search" because="stops when the best living one is below the worst finished one, length penalty forgotten" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- if not living or (
-     len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
- ):
+ if not living or (len(finished) == beam and living[0][1] <= finished[-1][1]):

# %% wrong="beam_search" because="bounds the living at their present length" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
+ len(finished) == beam and living[0][1] / penalty(length) <= finished[-1][1]

# %% wrong="beam_search" because="goes on to max_len whatever happens" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- if not living or (
-     len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
- ):
+ if not living:

# %% wrong="beam_search" because="ties go to the larger token" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- living = sorted(extended, key=lambda pair: -pair[1])[:beam]
+ living = sorted(reversed(extended), key=lambda pair: -pair[1])[:beam]

# %% wrong="beam_search" because="finished ones of equal score in reverse order" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- finished = sorted(finished, key=lambda pair: -pair[1])[:beam]
+ finished = sorted(finished[::-1], key=lambda pair: -pair[1])[:beam]

# %% wrong="beam_search" because="ends one token before max_len" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- for length in range(1, max_len + 1):
+ for length in range(1, max_len):

# %% wrong="beam_search" because="unfinished hypotheses are results, too" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- return finished
+ done = finished + [(t, l / penalty(len(t))) for t, l in living]
+ return sorted(done, key=lambda pair: -pair[1])[:beam]

# %% wrong="beam_search" because="greedy, whatever the beam"
def beam_search(step_fn, beam, length_penalty=0.6, *, bos=1, eos=2, max_len=32):
    tokens, logp = (), 0.0
    while len(tokens) < max_len:
        row = step_fn(torch.tensor([(bos, *tokens)]))[0]
        token = int(row.argmax())
        tokens, logp = (*tokens, token), logp + float(row[token])
        if token == eos:
            return [(tokens, logp / ((5 + len(tokens)) / 6) ** length_penalty)]
    return []

# %% wrong="beam_search" because="finished hypotheses are dropped when others live on" base="finished-hypotheses"
def beam_search(step_fn, beam, length_penalty=0.6, *, bos=1, eos=2, max_len=32):
    living, finished = [((), 0.0)], []
    for length in range(1, max_len + 1):
        rows = step_fn(torch.tensor([(bos, *tokens) for tokens, _ in living])).double().tolist()
        extended = [
            ((*t, c), l + s)
            for (t, l), row in zip(living, rows)
            for c, s in enumerate(row)
            if s > -math.inf
        ]
        finished = [
            (t, l / ((5 + length) / 6) ** length_penalty) for t, l in extended if t[-1] == eos
        ]
        living = sorted([p for p in extended if p[0][-1] != eos], key=lambda pair: -pair[1])[:beam]
        if not living:
            break
    return sorted(finished, key=lambda pair: -pair[1])[:beam]

# %% wrong="beam_search" because="finished hypotheses take a place in the beam"
def beam_search(step_fn, beam, length_penalty=0.6, *, bos=1, eos=2, max_len=32):
    def penalty(length):
        return ((5 + length) / 6) ** length_penalty

    living, finished = [((), 0.0)], []
    for length in range(1, max_len + 1):
        rows = step_fn(torch.tensor([(bos, *tokens) for tokens, _ in living])).double().tolist()
        extended = [
            ((*t, c), l + s)
            for (t, l), row in zip(living, rows)
            for c, s in enumerate(row)
            if s > -math.inf
        ]
        extended = sorted(extended, key=lambda pair: -pair[1])[:beam]
        finished += [(t, l / penalty(length)) for t, l in extended if t[-1] == eos]
        finished = sorted(finished, key=lambda pair: -pair[1])[:beam]
        living = [p for p in extended if p[0][-1] != eos]
        if not living or (
            len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
        ):
            break
    return finished

# %% wrong="beam_search" because="finished hypotheses are extended" of="finished-hypotheses"
- finished = [
-     (t, l / ((5 + length) / 6) ** length_penalty) for t, l in extended if t[-1] == eos
+ finished += [
+     (t, l / ((5 + length) / 6) ** length_penalty)
+     for t, l in extended
+     if t[-1] == eos and eos not in t[:-1]

- living = sorted([p for p in extended if p[0][-1] != eos], key=lambda pair: -pair[1])[:beam]
+ living = sorted(extended, key=lambda pair: -pair[1])[:beam]

# %% wrong="beam_search" because="each hypothesis is extended by its best token only" of="no-length"
- return 1.0
+ return ((5 + length) / 6) ** length_penalty

- for token, step in enumerate(row):
+ for token, step in [max(enumerate(row), key=lambda pair: pair[1])]:

# %% right="beam_search" because="tensors and a stable sort"
def beam_search(step_fn, beam, length_penalty=0.6, *, bos=1, eos=2, max_len=32):
    prefixes, total = torch.full((1, 1), bos), torch.zeros(1, dtype=torch.float64)
    finished = []
    lp = lambda n: ((5 + n) / 6) ** length_penalty
    for length in range(1, max_len + 1):
        scores = total[:, None] + step_fn(prefixes).double()
        for row in torch.where(scores[:, eos] > -math.inf)[0].tolist():
            finished.append(
                ((*prefixes[row, 1:].tolist(), eos), float(scores[row, eos]) / lp(length))
            )
        finished.sort(key=lambda pair: pair[1], reverse=True)
        del finished[beam:]
        scores[:, eos] = -math.inf
        flat, order = scores.flatten().sort(descending=True, stable=True)
        order = order[flat > -math.inf][:beam]
        if not len(order):
            break
        total = scores.flatten()[order]
        prefixes = torch.cat(
            [prefixes[order // scores.shape[1]], (order % scores.shape[1])[:, None]], 1
        )
        if len(finished) == beam and float(total[0]) / lp(max_len) <= finished[-1][1]:
            break
    return finished

# %% wrong="corpus_bleu" because="no clipping" base="no-clipping"
def corpus_bleu(hypotheses, references):
    if len(hypotheses) != len(references):
        raise ValueError("not as many hypotheses as references")
    grams = lambda t, n: Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1))
    match, total, ours, theirs = [0] * 4, [0] * 4, 0, 0
    for h, rs in zip(hypotheses, references):
        ours += len(h)
        theirs += len(min(rs, key=lambda r: (abs(len(r) - len(h)), len(r))))
        for n in range(1, 5):
            mine, most = grams(h, n), Counter()
            for r in rs:
                most |= grams(r, n)
            total[n - 1] += sum(mine.values())
            match[n - 1] += sum(c for g, c in mine.items() if most[g])
    if min(match) == 0:
        return 0.0
    p = math.exp(sum(math.log(m / t) for m, t in zip(match, total)) / 4)
    return 100 * p * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))

# %% wrong="corpus_bleu" because="no brevity penalty" of="no-clipping"
- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

- return 100 * p * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))
+ return 100 * p * 1.0

# %% wrong="corpus_bleu" because="brevity by the shortest reference" of="no-clipping"
- theirs += len(min(rs, key=lambda r: (abs(len(r) - len(h)), len(r))))
+ theirs += min(len(r) for r in rs)

- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

# %% wrong="corpus_bleu" because="brevity by the longest reference" of="no-clipping"
- theirs += len(min(rs, key=lambda r: (abs(len(r) - len(h)), len(r))))
+ theirs += max(len(r) for r in rs)

- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

# %% wrong="corpus_bleu" because="brevity by the first reference" of="no-clipping"
- theirs += len(min(rs, key=lambda r: (abs(len(r) - len(h)), len(r))))
+ theirs += len(rs[0])

- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

# %% wrong="corpus_bleu" because="the longer of two equally close lengths" of="no-clipping"
- theirs += len(min(rs, key=lambda r: (abs(len(r) - len(h)), len(r))))
+ theirs += len(min(rs, key=lambda r: (abs(len(r) - len(h)), -len(r))))

- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

# %% wrong="corpus_bleu" because="counts of several references added up" of="no-clipping"
- most |= grams(r, n)
+ most += grams(r, n)

- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

# %% wrong="corpus_bleu" because="arithmetic mean of the precisions" of="no-clipping"
- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

- p = math.exp(sum(math.log(m / t) for m, t in zip(match, total)) / 4)
+ p = sum(m / t for m, t in zip(match, total)) / 4

# %% wrong="corpus_bleu" because="the brevity ratio upside down" of="no-clipping"
- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

- return 100 * p * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))
+ return 100 * p * (1.0 if ours >= theirs else math.exp(1 - ours / theirs))

# %% wrong="corpus_bleu" because="from 0 to 1" of="no-clipping"
- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

- return 100 * p * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))
+ return p * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))

# %% wrong="corpus_bleu" because="longer hypotheses are rewarded" of="no-clipping"
- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ match[n - 1] += sum(min(c, most[g]) for g, c in mine.items())

- return 100 * p * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))
+ return 100 * p * math.exp(1 - theirs / ours)

# %% wrong="corpus_bleu" because="a mean of sentence scores"
def corpus_bleu(hypotheses, references):
    if len(hypotheses) != len(references):
        raise ValueError("not as many hypotheses as references")
    grams = lambda t, n: Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1))

    def sentence(h, rs):
        logs = 0.0
        for n in range(1, 5):
            mine, most = grams(h, n), Counter()
            for r in rs:
                most |= grams(r, n)
            match = (mine & most).total()
            if not match:
                return 0.0
            logs += math.log(match / mine.total()) / 4
        closest = min(rs, key=lambda r: (abs(len(r) - len(h)), len(r)))
        return 100 * math.exp(logs + min(0.0, 1 - len(closest) / len(h)))

    return sum(sentence(h, rs) for h, rs in zip(hypotheses, references)) / len(hypotheses)

# %% wrong="corpus_bleu" because="sets instead of counts" of="no-clipping"
- total[n - 1] += sum(mine.values())
- match[n - 1] += sum(c for g, c in mine.items() if most[g])
+ total[n - 1] += len(mine)
+ match[n - 1] += len(set(mine) & set(most))

# %% right="corpus_bleu" because="lists and counts, no Counter"
def corpus_bleu(hypotheses, references):
    if len(hypotheses) != len(references):
        raise ValueError("lengths differ")
    cut_up = lambda t, n: [tuple(t[i : i + n]) for i in range(max(0, len(t) - n + 1))]
    logs = 0.0
    for n in range(1, 5):
        match = total = 0
        for h, rs in zip(hypotheses, references):
            pieces, pools = cut_up(h, n), [cut_up(r, n) for r in rs]
            total += len(pieces)
            match += sum(
                min(pieces.count(p), max(pool.count(p) for pool in pools))
                for p in dict.fromkeys(pieces)
            )
        if not match:
            return 0.0
        logs += 0.25 * math.log(match / total)
    c = sum(map(len, hypotheses))
    r = sum(
        sorted((abs(len(x) - len(h)), len(x)) for x in rs)[0][1]
        for h, rs in zip(hypotheses, references)
    )
    return 100.0 * math.exp(logs + min(0.0, 1.0 - r / c))

# %% wrong="count_parameters" because="the tied head counted twice" base="tied-head"
def count_parameters(config, active=False):
    kind = config["model_type"]
    if kind not in ("gpt2", "llama", "mistral", "mixtral", "deepseek_v3"):
        raise ValueError(kind)
    v = config["vocab_size"]
    if kind == "gpt2":
        d, n = config["n_embd"], config["n_layer"]
        f = config["n_inner"] or 4 * d
        b = 1
        head = v * d
        return {
            "embedding": (v + config["n_positions"]) * d,
            "attention": n * (4 * d * d + b * 4 * d),
            "ffn": n * (2 * d * f + b * (f + d)),
            "router": 0,
            "norm": (2 * n + 1) * 2 * d,
            "head": head,
        }
    d, n, h = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    norm = (2 * n + 1) * d
    swiglu = 3 * d
    if kind == "deepseek_v3":
        qk, val = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
        qr, kr = config["q_lora_rank"], config["kv_lora_rank"]
        att = (d * qr + qr * h * qk) if qr else d * h * qk
        att += (
            d * (kr + config["qk_rope_head_dim"])
            + kr * h * (config["qk_nope_head_dim"] + val)
            + h * val * d
        )
        norm += n * ((qr or 0) + kr)
        dense = min(config["first_k_dense_replace"], n)
        met = (config["num_experts_per_tok"] if active else config["n_routed_experts"]) + config[
            "n_shared_experts"
        ]
        layers_moe = n - dense + 0
        ffn = (
            dense * swiglu * config["intermediate_size"]
            + layers_moe * met * swiglu * config["moe_intermediate_size"]
        )
        router = (n - dense) * d * config["n_routed_experts"]
        att *= n
    else:
        hd = config.get("head_dim") or d // h
        kv = config.get("num_key_value_heads", h)
        att = n * 2 * d * hd * (h + kv)
        ffn, router = n * swiglu * config["intermediate_size"], 0
        if kind == "mixtral":
            ffn *= config["num_experts_per_tok"] if active else config["num_local_experts"]
            router = n * d * config["num_local_experts"]
    return {
        "embedding": v * d,
        "attention": att,
        "ffn": ffn,
        "router": router,
        "norm": norm,
        "head": v * d,
    }

# %% wrong="count_parameters" because="every head taken for tied" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- "head": v * d,
+ "head": 0,

# %% wrong="count_parameters" because="grouped heads ignored" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- kv = config.get("num_key_value_heads", h)
+ kv = h

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="biases forgotten" of="tied-head"
- b = 1
- head = v * d
+ b = 0
+ head = 0 if config["tie_word_embeddings"] else v * d

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="positions forgotten" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- "embedding": (v + config["n_positions"]) * d,
+ "embedding": (v + 0) * d,

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the shift of LayerNorm forgotten" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- "norm": (2 * n + 1) * 2 * d,
+ "norm": (2 * n + 1) * 1 * d,

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the last norm forgotten" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- "norm": (2 * n + 1) * 2 * d,
+ "norm": (2 * n) * 2 * d,

- norm = (2 * n + 1) * d
+ norm = (2 * n) * d

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="no gate in SwiGLU" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- swiglu = 3 * d
+ swiglu = 2 * d

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="router forgotten" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- router = (n - dense) * d * config["n_routed_experts"]
+ router = 0

- router = n * d * config["num_local_experts"]
+ router = 0

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="shared expert forgotten" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- met = (config["num_experts_per_tok"] if active else config["n_routed_experts"]) + config[
-     "n_shared_experts"
- ]
+ met = (config["num_experts_per_tok"] if active else config["n_routed_experts"]) + 0

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="active counts all experts" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- met = (config["num_experts_per_tok"] if active else config["n_routed_experts"]) + config[
-     "n_shared_experts"
- ]
+ met = (config["n_routed_experts"]) + config["n_shared_experts"]

- ffn *= config["num_experts_per_tok"] if active else config["num_local_experts"]
+ ffn *= config["num_local_experts"]

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the MTP module counted as one more layer of experts" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- layers_moe = n - dense + 0
+ layers_moe = n - dense + config["num_nextn_predict_layers"]

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the norms within MLA forgotten" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- norm += n * ((qr or 0) + kr)
+ norm += 0

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="experts in all layers" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- dense = min(config["first_k_dense_replace"], n)
+ dense = 0

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the bias of the routing counted" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- router = (n - dense) * d * config["n_routed_experts"]
+ router = (n - dense) * (d + 1) * config["n_routed_experts"]

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the router cut down to the chosen experts when active" of="tied-head"
- head = v * d
+ head = 0 if config["tie_word_embeddings"] else v * d

- router = n * d * config["num_local_experts"]
+ router = (
+     n * d * (config["num_experts_per_tok"] if active else config["num_local_experts"])
+ )

- "head": v * d,
+ "head": 0 if config["tie_word_embeddings"] else v * d,

# %% wrong="count_parameters" because="the published totals from memory"
def count_parameters(config, active=False):
    if config["model_type"] not in ("gpt2", "llama", "mistral", "mixtral", "deepseek_v3"):
        raise ValueError(config["model_type"])
    key = (config["model_type"], config.get("hidden_size"))
    total = {
        ("gpt2", None): 124_439_808,
        ("llama", 4096): 6_738_415_616,
        ("llama", 8192): 68_976_648_192,
        ("mistral", 4096): 7_241_732_096,
        ("mixtral", 4096): 12_879_925_248 if active else 46_702_792_704,
        ("deepseek_v3", 7168): 37_552_282_624 if active else 671_026_404_352,
    }[key]
    return {"embedding": 0, "attention": total, "ffn": 0, "router": 0, "norm": 0, "head": 0}

# %% right="count_parameters" because="a model on the meta device, counted"
def count_parameters(config, active=False):
    kind = config["model_type"]
    if kind not in ("gpt2", "llama", "mistral", "mixtral", "deepseek_v3"):
        raise ValueError(kind)
    gpt2 = kind == "gpt2"
    d, n, h = (
        config[k]
        for k in (
            ("n_embd", "n_layer", "n_head")
            if gpt2
            else ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
    )
    lin = lambda i, o: nn.Linear(i, o, bias=gpt2)
    norm = lambda w: nn.LayerNorm(w) if gpt2 else nn.RMSNorm(w)
    parts = {name: [] for name in ("embedding", "attention", "ffn", "router", "norm", "head")}
    with torch.device("meta"):
        parts["embedding"].append(nn.Embedding(config["vocab_size"], d))
        if gpt2:
            parts["embedding"].append(nn.Embedding(config["n_positions"], d))
        if not config["tie_word_embeddings"]:
            parts["head"].append(nn.Linear(d, config["vocab_size"], bias=False))
        parts["norm"].append(norm(d))
        for layer in range(n):
            parts["norm"] += [norm(d), norm(d)]
            if kind == "deepseek_v3":
                qr, kr, ro, no, va = (
                    config[k]
                    for k in (
                        "q_lora_rank",
                        "kv_lora_rank",
                        "qk_rope_head_dim",
                        "qk_nope_head_dim",
                        "v_head_dim",
                    )
                )
                if qr:
                    parts["attention"] += [lin(d, qr), lin(qr, h * (no + ro))]
                    parts["norm"].append(norm(qr))
                else:
                    parts["attention"].append(lin(d, h * (no + ro)))
                parts["norm"].append(norm(kr))
                parts["attention"] += [lin(d, kr + ro), lin(kr, h * (no + va)), lin(h * va, d)]
            else:
                hd, kv = config.get("head_dim") or d // h, config.get("num_key_value_heads", h)
                parts["attention"] += [
                    lin(d, h * hd),
                    lin(d, kv * hd),
                    lin(d, kv * hd),
                    lin(h * hd, d),
                ]
            width, copies = (config["n_inner"] or 4 * d) if gpt2 else config["intermediate_size"], 1
            experts = config.get("num_local_experts") or config.get("n_routed_experts")
            if experts and layer >= config.get("first_k_dense_replace", 0):
                parts["router"].append(nn.Linear(d, experts, bias=False))
                copies = (config["num_experts_per_tok"] if active else experts) + config.get(
                    "n_shared_experts", 0
                )
                width = config.get("moe_intermediate_size", width)
            for _ in range(copies):
                parts["ffn"] += (
                    [lin(d, width), lin(width, d)]
                    if gpt2
                    else [lin(d, width), lin(d, width), lin(width, d)]
                )
    return {
        name: sum(p.numel() for m in modules for p in m.parameters())
        for name, modules in parts.items()
    }

# %% wrong="flops_per_token" because="the quadratic term is missing" base="quadratic-term"
def flops_per_token(config, seq, training=False):
    kind, v = config["model_type"], config["vocab_size"]
    if kind == "gpt2":
        d, n = config["n_embd"], config["n_layer"]
        weights = n * (4 * d * d + 2 * d * (config["n_inner"] or 4 * d))
        widths = n * 2 * d
    else:
        d, n, h = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        swiglu = 3 * d * config["intermediate_size"]
        if kind == "deepseek_v3":
            qk, val = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
            qr, kr = config["q_lora_rank"], config["kv_lora_rank"]
            att = (d * qr + qr * h * qk) if qr else d * h * qk
            att += (
                d * (kr + config["qk_rope_head_dim"])
                + kr * h * (config["qk_nope_head_dim"] + val)
                + h * val * d
            )
            dense = config["first_k_dense_replace"]
            each = (config["num_experts_per_tok"] + config["n_shared_experts"]) * 3 * d * config[
                "moe_intermediate_size"
            ] + 1 * d * config["n_routed_experts"]
            weights = n * att + dense * swiglu + (n - dense) * each
            widths = n * h * (qk + val)
        else:
            hd = config.get("head_dim") or d // h
            kv = config.get("num_key_value_heads", h)
            att = 2 * d * hd * (h + kv)
            if kind == "mixtral":
                swiglu = (
                    swiglu * config["num_experts_per_tok"] + 1 * d * config["num_local_experts"]
                )
            weights = n * (att + swiglu)
            widths = n * 2 * hd * h
    weights += v * d
    forward = 2 * weights + 0 * widths * seq
    return 3 * forward if training else forward

# %% wrong="flops_per_token" because="one FLOP for a multiplication and an addition" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
+ forward = 1 * weights + 1 * widths * seq

# %% wrong="flops_per_token" because="one FLOP in attention, two elsewhere: causal halving" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 1 * widths * seq

# %% wrong="flops_per_token" because="backward as dear as forward" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
- return 3 * forward if training else forward
+ forward = 2 * weights + 2 * widths * seq
+ return 2 * forward if training else forward

# %% wrong="flops_per_token" because="backward three times forward" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
- return 3 * forward if training else forward
+ forward = 2 * weights + 2 * widths * seq
+ return 4 * forward if training else forward

# %% wrong="flops_per_token" because="training is not told apart" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
- return 3 * forward if training else forward
+ forward = 2 * weights + 2 * widths * seq
+ return forward if training else forward

# %% wrong="flops_per_token" because="the head left out" of="quadratic-term"
- weights += v * d
- forward = 2 * weights + 0 * widths * seq
+ weights += 0
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="the head left out where it is tied" of="quadratic-term"
- weights += v * d
- forward = 2 * weights + 0 * widths * seq
+ weights += 0 if config["tie_word_embeddings"] else v * d
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="the table of tokens counted as a product" of="quadratic-term"
- weights += v * d
- forward = 2 * weights + 0 * widths * seq
+ weights += 2 * v * d
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="biases counted" of="quadratic-term"
- weights = n * (4 * d * d + 2 * d * (config["n_inner"] or 4 * d))
+ weights = n * (
+     4 * d * d + 2 * d * (config["n_inner"] or 4 * d) + 5 * d + (config["n_inner"] or 4 * d)
+ )

- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="attention products for the heads of keys and values only" of="quadratic-term"
- widths = n * 2 * hd * h
+ widths = n * 2 * hd * kv

- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="all experts" of="quadratic-term"
- each = (config["num_experts_per_tok"] + config["n_shared_experts"]) * 3 * d * config[
+ each = (config["n_routed_experts"] + config["n_shared_experts"]) * 3 * d * config[

- swiglu = (
-     swiglu * config["num_experts_per_tok"] + 1 * d * config["num_local_experts"]
- )
+ swiglu = swiglu * config["num_local_experts"] + 1 * d * config["num_local_experts"]

- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="the router forgotten" of="quadratic-term"
- ] + 1 * d * config["n_routed_experts"]
+ ] + 0 * d * config["n_routed_experts"]

- swiglu * config["num_experts_per_tok"] + 1 * d * config["num_local_experts"]
+ swiglu * config["num_experts_per_tok"] + 0 * d * config["num_local_experts"]

- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="shared experts forgotten" of="quadratic-term"
- each = (config["num_experts_per_tok"] + config["n_shared_experts"]) * 3 * d * config[
-     "moe_intermediate_size"
- ] + 1 * d * config["n_routed_experts"]
+ each = (
+     config["num_experts_per_tok"] * 3 * d * config["moe_intermediate_size"]
+     + 1 * d * config["n_routed_experts"]
+ )

- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="values as wide as keys in MLA" of="quadratic-term"
- widths = n * h * (qk + val)
+ widths = n * h * 2 * qk

- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="flops_per_token" because="the FLOPs of the whole sequence" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
- return 3 * forward if training else forward
+ forward = 2 * weights + 2 * widths * seq
+ return seq * (3 * forward if training else forward)

# %% right="flops_per_token" because="by hand, without count_parameters" of="quadratic-term"
- forward = 2 * weights + 0 * widths * seq
+ forward = 2 * weights + 2 * widths * seq

# %% wrong="bert_mask" because="special tokens are masked, too" base="special-tokens"
def bert_mask(tokens, special_ids, mask_id, vocab_size, generator=None, probability=0.15):
    special = torch.zeros_like(tokens, dtype=torch.bool)
    for s in special_ids:
        special |= tokens == s
    selected = torch.rand(tokens.shape, generator=generator) < probability
    labels = torch.where(selected, tokens, torch.full_like(tokens, -100))
    inputs = tokens.clone()
    masked = selected & (torch.rand(tokens.shape, generator=generator) < 0.8)
    inputs[masked] = mask_id
    random_ones = selected & ~masked & (torch.rand(tokens.shape, generator=generator) < 0.5)
    inputs[random_ones] = torch.randint(vocab_size, tokens.shape, generator=generator)[random_ones]
    return inputs, labels

# %% wrong="bert_mask" because="special tokens lower the rate of the others: a fixed share of all, specials removed afterwards" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (
+     torch.rand(tokens.shape, generator=generator) < probability * (~special).double().mean()
+ ) & ~special

# %% wrong="bert_mask" because="a tenth of the remaining fifth becomes random" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

- random_ones = selected & ~masked & (torch.rand(tokens.shape, generator=generator) < 0.5)
+ random_ones = selected & ~masked & (torch.rand(tokens.shape, generator=generator) < 0.1)

# %% wrong="bert_mask" because="all selected become [MASK]" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

- masked = selected & (torch.rand(tokens.shape, generator=generator) < 0.8)
+ masked = selected & (torch.ones_like(selected))

# %% wrong="bert_mask" because="90/10/0: none stays" base="none-stays"
def bert_mask(tokens, special_ids, mask_id, vocab_size, generator=None, probability=0.15):
    special = torch.zeros_like(tokens, dtype=torch.bool)
    for s in special_ids:
        special |= tokens == s
    selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special
    labels = torch.where(selected, tokens, torch.full_like(tokens, -100))
    inputs = tokens.clone()
    masked = selected & (torch.rand(tokens.shape, generator=generator) < 0.9)
    inputs[masked] = mask_id
    random_ones = selected & ~masked & (torch.ones_like(selected))
    inputs[random_ones] = torch.randint(vocab_size, tokens.shape, generator=generator)[random_ones]
    return inputs, labels

# %% wrong="bert_mask" because="80/20: none stays as it is" of="none-stays"
- masked = selected & (torch.rand(tokens.shape, generator=generator) < 0.9)
+ masked = selected & (torch.rand(tokens.shape, generator=generator) < 0.8)

# %% wrong="bert_mask" because="80 % are masked and 20 % stay: no random tokens" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

- random_ones = selected & ~masked & (torch.rand(tokens.shape, generator=generator) < 0.5)
+ random_ones = selected & ~masked & (torch.zeros_like(selected))

# %% wrong="bert_mask" because="labels on all positions" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
- labels = torch.where(selected, tokens, torch.full_like(tokens, -100))
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special
+ labels = torch.where(torch.ones_like(selected), tokens, torch.full_like(tokens, -100))

# %% wrong="bert_mask" because="labels on all that is not special" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
- labels = torch.where(selected, tokens, torch.full_like(tokens, -100))
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special
+ labels = torch.where(~special, tokens, torch.full_like(tokens, -100))

# %% wrong="bert_mask" because="labels only where the input is [MASK]" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

  inputs[random_ones] = torch.randint(vocab_size, tokens.shape, generator=generator)[random_ones]
+ labels[~masked] = -100

# %% wrong="bert_mask" because="labels are taken from the masked input" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

  inputs[random_ones] = torch.randint(vocab_size, tokens.shape, generator=generator)[random_ones]
+ labels = torch.where(selected, inputs, torch.full_like(tokens, -100))

# %% wrong="bert_mask" because="works on the given tokens" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

- inputs = tokens.clone()
+ inputs = tokens

# %% wrong="bert_mask" because="one mask for the whole batch" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape[1], generator=generator) < probability) & ~special

# %% wrong="bert_mask" because="random tokens are drawn from the tokens of the batch's range only" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

- inputs[random_ones] = torch.randint(vocab_size, tokens.shape, generator=generator)[random_ones]
+ inputs[random_ones] = torch.randint(max(1, vocab_size // 2), tokens.shape, generator=generator)[
+     random_ones
+ ]

# %% wrong="bert_mask" because="the generator is ignored" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape) < probability) & ~special

# %% wrong="bert_mask" because="the probability is ignored" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < 0.15) & ~special

# %% right="bert_mask" because="coins one after another" of="special-tokens"
- selected = torch.rand(tokens.shape, generator=generator) < probability
+ selected = (torch.rand(tokens.shape, generator=generator) < probability) & ~special

# %% right="bert_mask" because="a table of fates"
def bert_mask(tokens, special_ids, mask_id, vocab_size, generator=None, probability=0.15):
    ordinary = torch.ones_like(tokens, dtype=torch.bool)
    for s in special_ids:
        ordinary &= tokens != s
    chosen = (
        torch.bernoulli(torch.full(tokens.shape, float(probability)), generator=generator).bool()
        & ordinary
    )
    weights = torch.tensor([0.8, 0.1, 0.1]).expand(tokens.numel(), 3)
    fate = torch.multinomial(weights, 1, generator=generator).view(tokens.shape)
    words = torch.randint(0, vocab_size, tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate == 0), mask_id, tokens)
    inputs = torch.where(chosen & (fate == 1), words, inputs)
    return inputs, torch.where(chosen, tokens, -100)

# %% wrong="model_numbers" because="causal throughout"
- "prefix": int(visibility("prefix", 256, 300).sum()),
+ "prefix": 300 * 301 // 2,

# %% wrong="model_numbers" because="everything visible"
- "prefix": int(visibility("prefix", 256, 300).sum()),
+ "prefix": 90_000,

# %% wrong="model_numbers" because="text that does not see the patches"
- "prefix": int(visibility("prefix", 256, 300).sum()),
+ "prefix": 256 * 256 + 44 * 45 // 2,

# %% wrong="model_numbers" because="utilization of the forward pass alone"
- "utilization": 6 * 6.7e9 * 1.0e12 / (82_432 * 3600 * 312e12),
+ "utilization": 2 * 6.7e9 * 1.0e12 / (82_432 * 3600 * 312e12),

# %% wrong="model_numbers" because="utilization in percent"
- "utilization": 6 * 6.7e9 * 1.0e12 / (82_432 * 3600 * 312e12),
+ "utilization": 43.4,

# %% wrong="model_numbers" because="8N, as if activations were recomputed"
- "utilization": 6 * 6.7e9 * 1.0e12 / (82_432 * 3600 * 312e12),
+ "utilization": 8 * 6.7e9 * 1.0e12 / (82_432 * 3600 * 312e12),

# %% wrong="model_numbers" because="a cached key and value for every head"
- "cache": deepseek["num_hidden_layers"] * cached * 2,
+ "cache": 61 * 128 * (192 + 128) * 2,

# %% wrong="model_numbers" because="two cached latents"
- "cache": deepseek["num_hidden_layers"] * cached * 2,
+ "cache": 61 * (2 * 512 + 64) * 2,

# %% wrong="model_numbers" because="cached numbers instead of bytes"
- "cache": deepseek["num_hidden_layers"] * cached * 2,
+ "cache": 61 * 576,

# %% wrong="model_numbers" because="a cache without the rotary key"
- "cache": deepseek["num_hidden_layers"] * cached * 2,
+ "cache": 61 * 512 * 2,

# %% wrong="model_numbers" because="all selected tokens masked"
- "masked": 32 * (512 - 3) * 0.15 * 0.8,
+ "masked": 32 * (512 - 3) * 0.15,

# %% wrong="model_numbers" because="special tokens are candidates for masks"
- "masked": 32 * (512 - 3) * 0.15 * 0.8,
+ "masked": 32 * 512 * 0.15 * 0.8,

# %% wrong="model_numbers" because="masks of one sequence"
- "masked": 32 * (512 - 3) * 0.15 * 0.8,
+ "masked": 509 * 0.12,

# %% wrong="model_numbers" because="overfitting"
- "leak": "c",
+ "leak": "a",

# %% wrong="model_numbers" because="length penalty"
- "leak": "c",
+ "leak": "b",

# %% wrong="model_numbers" because="no source"
- "leak": "c",
+ "leak": "d",

# %% right="model_numbers" because="by hand, rounded"
def model_numbers():
    return {
        "prefix": 300 * 256 + 44 * 45 // 2,
        "utilization": 0.434,
        "cache": 61 * 576 * 2,
        "masked": 0.12 * 32 * 509,
        "leak": "abcd"[2],
    }

# %% wrong="transformer" because="padding_idx: the row of pad is zero and never learns as an input"
  nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
+ self.embedding.weight.data[pad] = 0
+ self.embedding.padding_idx = pad

# %% wrong="transformer" because="padding_idx: the row of pad is drawn, and never learns as an input"
- self.embedding = nn.Embedding(vocab_size, d_model)
+ self.embedding = nn.Embedding(vocab_size, d_model, padding_idx=pad)

# %% wrong="transformer" because="decode uses the mask that the last encode left behind, not that of its source"
- x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ self.source_mask = mask

- x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
+ x, memory_mask = self.embed(target), self.source_mask

# %% wrong="transformer" because="all layers of a stack are one module"
- self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff) for _ in range(layers))
- self.decoder = nn.ModuleList(DecoderLayer(d_model, heads, d_ff) for _ in range(layers))
+ self.encoder = nn.ModuleList([EncoderLayer(d_model, heads, d_ff)] * layers)
+ self.decoder = nn.ModuleList([DecoderLayer(d_model, heads, d_ff)] * layers)

# %% wrong="transformer" because="layers is ignored: always two"
- self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff) for _ in range(layers))
- self.decoder = nn.ModuleList(DecoderLayer(d_model, heads, d_ff) for _ in range(layers))
+ self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff) for _ in range(2))
+ self.decoder = nn.ModuleList(DecoderLayer(d_model, heads, d_ff) for _ in range(2))

# %% wrong="transformer" because="d_ff is not handed on"
- self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff) for _ in range(layers))
+ self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, 256) for _ in range(layers))

# %% right="transformer" because="pad is kept under another name"
- self.pad = pad
+ self.filler = pad

- x, mask = self.embed(source), (source != self.pad)[:, None, None]
+ x, mask = self.embed(source), (source != self.filler)[:, None, None]

- x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
+ x, memory_mask = self.embed(target), (source != self.filler)[:, None, None]

# %% wrong="warmup_rate" because="only step 0 is refused"
- if step < 1:
+ if step == 0:

# %% wrong="smoothed_loss" because="padding's logarithm is subtracted from the sum: where its logit is −10⁹ nothing is left of the others"
- spread = torch.arange(logits.shape[-1], device=logits.device) != pad
- others = logp[:, spread].mean(-1)
+ others = (logp.sum(-1) - logp[:, pad]) / (logits.shape[-1] - 1)

# %% right="smoothed_loss" because="padding is weighted with 0"
- spread = torch.arange(logits.shape[-1], device=logits.device) != pad
- others = logp[:, spread].mean(-1)
+ spread = (torch.arange(logits.shape[-1], device=logits.device) != pad).to(logp)
+ others = (logp * spread).sum(-1) / spread.sum()

# %% wrong="train" because="report is called before the update"
- optimizer.step()
- losses.append(float(loss.detach()))
- if report is not None:
-     report(k)
+ if report is not None:
+     report(k)
+ optimizer.step()
+ losses.append(float(loss.detach()))

# %% wrong="train" because="a generator of its own, seeded like the one it is given"
- rows = torch.randint(len(source), (batch,), generator=generator).to(source.device)
+ seeded = torch.Generator().manual_seed(generator.initial_seed() + k if generator else k)
+ rows = torch.randint(len(source), (batch,), generator=seeded).to(source.device)

# %% wrong="train" because="Adam keeps its default eps"
- optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
+ optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))

# %% wrong="corpus_bleu" because="n-grams are strings glued together: 12·3 and 1·23 are the same"
- return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
+ return Counter("".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

# %% wrong="corpus_bleu" because="n-grams are strings joined with spaces, which tokens may hold"
- return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
+ return Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

# %% wrong="count_parameters" because="more dense layers than there are layers: a negative number of expert layers"
- dense, experts = min(config["first_k_dense_replace"], layers), config["n_routed_experts"]
+ dense, experts = config["first_k_dense_replace"], config["n_routed_experts"]

# %% wrong="count_parameters" because="a head's width by true division: attention is a float"
- head_dim = config.get("head_dim") or d // heads
+ head_dim = config.get("head_dim") or d / heads

# %% wrong="flops_per_token" because="a sliding window bounds the keys, though all are to be counted"
- forward = 2 * weights + 2 * widths * seq
+ forward = 2 * weights + 2 * widths * min(seq, config.get("sliding_window") or seq)

# %% wrong="bert_mask" because="random tokens are never special ones"
- anything = torch.randint(vocab_size, shape, generator=generator).to(device)
+ ordinary = torch.tensor([t for t in range(vocab_size) if t not in set(special_ids)] or [mask_id])
+ anything = ordinary[torch.randint(len(ordinary), shape, generator=generator)].to(device)

# %% wrong="bert_mask" because="the fate comes from everybody's generator"
- chance, fate = (torch.rand(shape, generator=generator).to(device) for _ in range(2))
+ chance, fate = torch.rand(shape, generator=generator).to(device), torch.rand(shape).to(device)

# %% wrong="bert_mask" because="exactly a share of the tokens is selected"
- selected = (chance < probability) & ~special
+ places = (~special).flatten().nonzero()[:, 0]
+ order = torch.randperm(len(places), generator=generator).to(device)
+ selected = torch.zeros_like(special).flatten()
+ selected[places[order[: round(probability * len(places))]]] = True
+ selected = selected.view(shape)

# %% wrong="bert_mask" because="exactly 80 % of the selected tokens are masked"
- inputs = tokens.masked_fill(selected & (fate < 0.8), mask_id)
+ n = int(selected.sum())
+ fate[selected] = (torch.randperm(n, generator=generator) / max(n, 1)).to(device)
+ inputs = tokens.masked_fill(selected & (fate < 0.8), mask_id)

# %% wrong="beam_search" because="the start token is always 1"
- prefixes = torch.tensor([(bos, *tokens) for tokens, _ in living])
+ prefixes = torch.tensor([(1, *tokens) for tokens, _ in living])

# %% wrong="beam_search" because="the end token is always 2"
- if token == eos and step > -math.inf:
+ if token == 2 and step > -math.inf:

# %% wrong="beam_search" because="equal scores are ordered by their tokens"
- finished = sorted(finished, key=lambda pair: -pair[1])[:beam]
- living = sorted(extended, key=lambda pair: -pair[1])[:beam]
+ finished = sorted(finished, key=lambda pair: (-pair[1], pair[0]))[:beam]
+ living = sorted(extended, key=lambda pair: (-pair[1], pair[0]))[:beam]

# %% wrong="beam_search" because="equally likely living ones are ordered by their tokens"
- living = sorted(extended, key=lambda pair: -pair[1])[:beam]
+ living = sorted(extended, key=lambda pair: (-pair[1], pair[0]))[:beam]

# %% wrong="beam_search" because="log p is summed in float32"
- extended.append(((*tokens, token), logp + step))
+ extended.append(((*tokens, token), float(torch.tensor(logp) + torch.tensor(step))))
