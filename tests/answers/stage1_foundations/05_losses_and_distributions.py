# %% [markdown]
# Answers to lesson 05. Each cell stands in for an exercise cell, whole. The wrong kernels are the lesson's own with one mistake made.

# %% wrong="log_sum_exp" because="no maximum subtracted"
def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    return x.exp().sum(dim).log()

# %% wrong="log_sum_exp" because="NaN where all logits are -inf"
def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    m = x.detach().amax(dim, keepdim=True)
    return (x - m).exp().sum(dim).log() + m.squeeze(dim)

# %% wrong="log_sum_exp" because="the maximum of the whole tensor: rows far below it underflow"
def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    m = x.detach().max()
    m = m.masked_fill(m.isinf(), 0)
    return (x - m).exp().sum(dim).log() + m

# %% wrong="log_sum_exp" because="forgets to add the maximum back"
def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    m = x.detach().amax(dim, keepdim=True)
    m = m.masked_fill(m.isinf(), 0)
    return (x - m).exp().sum(dim).log()

# %% wrong="log_sum_exp" because="always the last axis"
def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    m = x.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m.isinf(), 0)
    return (x - m).exp().sum(-1).log() + m.squeeze(-1)

# %% wrong="log_sum_exp" because="PyTorch's own"
def log_sum_exp(x, dim=-1):
    return torch.logsumexp(x, dim)

# %% right="log_sum_exp" because="log1p of all terms but one largest"
def log_sum_exp(x, dim=-1):
    x = x.movedim(dim, -1)
    top, where = x.max(-1, keepdim=True)
    shift = torch.where(top.isinf(), 0.0, top)
    others = torch.exp(x - shift).scatter(-1, where, 0.0).sum(-1)
    first = torch.exp(top - shift).squeeze(-1)
    return torch.where(first == 1, torch.log1p(others), (first + others).log()) + shift.squeeze(-1)

# %% wrong="cross_entropy" because="divides by all positions"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * lse.square()
    return losses.sum() / max(targets.numel(), 1)

# %% wrong="cross_entropy" because="0/0 with no position left"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * lse.square()
    return losses.mean()

# %% wrong="cross_entropy" because="ignored rows are multiplied by 0: NaN stays NaN"
def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0):
    kept = (targets != ignore_index).reshape(-1).float()
    x, y = logits.reshape(-1, logits.shape[-1]).float(), targets.masked_fill(targets == ignore_index, 0).reshape(-1)
    lse = torch.logsumexp(x, -1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(-1))
    losses = losses + z_loss * lse.square()
    return (losses * kept).sum() / kept.sum().clamp(min=1)

# %% wrong="cross_entropy" because="ignores -100 whatever ignore_index says"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != -100
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * lse.square()
    return losses.sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="spreads the smoothing over the other words only"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - (x.sum(dim=-1) - x.gather(-1, y[:, None]).squeeze(-1)) / (x.shape[-1] - 1))
    losses = losses + z_loss * lse.square()
    return losses.sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="smooths also where there is nothing to smooth: 0 · inf"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * lse.square()
    return losses.sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="z-loss of lse, not of its square"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * lse
    return losses.sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="z-loss summed over the vocabulary's logits"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * x.square().sum(-1)
    return losses.sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="computes in half precision"
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    if x.dtype in (torch.float16, torch.bfloat16):
        pass
    lse = torch.logsumexp(x, dim=-1)
    losses = lse - x.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:                                 # without the if, 0 · inf is NaN where a word is banned
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    losses = losses + z_loss * lse.square()
    return losses.sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="log of softmax: -inf for what is unlikely"
def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0):
    kept = targets != ignore_index
    x, y = logits[kept], targets[kept]
    log_q = torch.softmax(x.float() if x.dtype != torch.float64 else x, -1).log()
    losses = -(1 - label_smoothing) * log_q.gather(-1, y[:, None]).squeeze(-1)
    if label_smoothing:
        losses = losses - label_smoothing * log_q.mean(-1)
    return (losses + z_loss * torch.logsumexp(x, -1).square()).sum() / max(len(y), 1)

# %% wrong="cross_entropy" because="PyTorch's own"
def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0):
    kept = targets != ignore_index
    if not kept.any():
        return logits[kept].sum()
    x = logits[kept].double() if logits.dtype == torch.float64 else logits[kept].float()
    return F.cross_entropy(x, targets[kept], label_smoothing=label_smoothing) + z_loss * torch.logsumexp(x, -1).square().mean()

# %% right="cross_entropy" because="a target distribution, one product"
def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0):
    rows = (targets.reshape(-1) != ignore_index).nonzero().squeeze(1)
    x = logits.reshape(-1, logits.shape[-1]).index_select(0, rows)
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    wanted = torch.full_like(x, label_smoothing / x.shape[-1])
    wanted[torch.arange(len(rows)), targets.reshape(-1)[rows]] += 1 - label_smoothing
    log_q = x.log_softmax(-1)
    paid = torch.where(wanted == 0, 0.0, -wanted * log_q).sum()
    return (paid + z_loss * (x.logsumexp(-1) ** 2).sum()) / max(1, rows.numel())

# %% wrong="kl" because="KL(q ‖ p)"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_q, log_p = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="the logits taken for log-probabilities"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = p_logits, q_logits
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="NaN where a word is banned in both"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="nan_to_num hides the infinite case too"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.nan_to_num(terms, nan=0.0, posinf=0.0).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="averages over the words"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).mean(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="k1 with the wrong sign"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="k2 without the half"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square(), torch.expm1(log_ratio) - log_ratio

# %% wrong="kl" because="k3 with r = p/q"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.expm1(-log_ratio) + log_ratio

# %% wrong="kl" because="k3 through exp, negative for ratios near 1"
def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms).sum(-1)


def kl_estimates(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = log_q - log_p
    return -log_ratio, log_ratio.square() / 2, torch.exp(log_ratio) - 1 - log_ratio

# %% right="kl" because="cross-entropy less entropy, and k3 from k1"
def kl_divergence(p_logits, q_logits):
    p = torch.softmax(p_logits, -1)
    seen = p_logits != -math.inf
    log_p = (p_logits - p_logits.logsumexp(-1, keepdim=True)).masked_fill(~seen, 0)
    log_q = (q_logits - q_logits.logsumexp(-1, keepdim=True)).masked_fill(~seen, 0)
    return (p * log_p - p * log_q).sum(-1)


def kl_estimates(log_p, log_q):
    k1 = log_p - log_q
    return k1, 0.5 * k1 * k1, k1 + torch.expm1(-k1)

# %% wrong="perplexity" because="the mean of the batches' means"
def perplexity(losses: list[float], tokens: list[int]) -> float:
    if len(losses) != len(tokens) or sum(tokens) == 0:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of {sum(tokens)} tokens in all: nothing to average")
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 709 else math.inf


def bits_per_byte(losses: list[float], tokens: list[int], text: str) -> float:
    if len(losses) != len(tokens) or not text:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of a text of {len(text)} characters: nothing to average")
    nats = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True) if n)
    return nats / math.log(2) / len(text.encode())

# %% wrong="perplexity" because="the weighted mean of perplexities; bits per character"
def perplexity(losses, tokens):
    if len(losses) != len(tokens) or not sum(tokens):
        raise ValueError("nothing to average")
    return sum(n * math.exp(loss) for loss, n in zip(losses, tokens) if n) / sum(tokens)


def bits_per_byte(losses, tokens, text):
    if not text:
        raise ValueError("no text")
    return sum(n * loss for loss, n in zip(losses, tokens) if n) / math.log(2) / len(text)

# %% wrong="perplexity" because="nats per byte"
def perplexity(losses: list[float], tokens: list[int]) -> float:
    if len(losses) != len(tokens) or sum(tokens) == 0:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of {sum(tokens)} tokens in all: nothing to average")
    mean = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True) if n) / sum(tokens)
    return math.exp(mean) if mean < 709 else math.inf


def bits_per_byte(losses: list[float], tokens: list[int], text: str) -> float:
    if len(losses) != len(tokens) or not text:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of a text of {len(text)} characters: nothing to average")
    nats = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True) if n)
    return nats / len(text.encode())

# %% wrong="perplexity" because="an empty batch spoils the mean, and a large loss overflows"
def perplexity(losses: list[float], tokens: list[int]) -> float:
    if len(losses) != len(tokens) or sum(tokens) == 0:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of {sum(tokens)} tokens in all: nothing to average")
    mean = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    return math.exp(mean)


def bits_per_byte(losses: list[float], tokens: list[int], text: str) -> float:
    if len(losses) != len(tokens) or not text:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of a text of {len(text)} characters: nothing to average")
    nats = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True) if n)
    return nats / math.log(2) / len(text.encode())

# %% wrong="perplexity" because="an empty corpus has perplexity 1"
def perplexity(losses: list[float], tokens: list[int]) -> float:
    if len(losses) != len(tokens) or sum(tokens) == 0:
        return 1.0
    mean = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True) if n) / sum(tokens)
    return math.exp(mean) if mean < 709 else math.inf


def bits_per_byte(losses: list[float], tokens: list[int], text: str) -> float:
    if len(losses) != len(tokens) or not text:
        raise ValueError(f"{len(losses)} losses for {len(tokens)} batches of a text of {len(text)} characters: nothing to average")
    nats = math.fsum(n * loss for loss, n in zip(losses, tokens, strict=True) if n)
    return nats / math.log(2) / len(text.encode())

# %% right="perplexity" because="through tensors"
def perplexity(losses, tokens):
    if len(losses) != len(tokens):
        raise ValueError("as many losses as batches")
    counts = torch.tensor(tokens, dtype=torch.float64)
    if counts.sum() == 0:
        raise ValueError("no token")
    means = torch.tensor(losses, dtype=torch.float64)
    return float(torch.exp((means[counts > 0] * counts[counts > 0]).sum() / counts.sum()))


def bits_per_byte(losses, tokens, text):
    if len(losses) != len(tokens) or len(text) == 0:
        raise ValueError("no text")
    total = 0.0
    for loss, n in zip(losses, tokens):
        total += n * loss / math.log(2) if n > 0 else 0.0
    return total / len(bytes(text, "utf-8"))

# %% wrong="recurrent_cells" because="z and 1 - z the other way round"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return z * n + (1 - z) * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c

# %% wrong="recurrent_cells" because="resets h before the product, as in Cho's paper"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    size = h.shape[-1]
    n = torch.tanh(n_x + (r * h) @ w_hh[2 * size:].T + b_hh[2 * size:])
    return (1 - z) * n + z * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c

# %% wrong="recurrent_cells" because="the bias is not reset"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    bias = b_hh[-h.shape[-1]:]
    n = torch.tanh(n_x + r * (n_h - bias) + bias)
    return (1 - z) * n + z * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c

# %% wrong="recurrent_cells" because="gates in the order z, r, n and i, g, f, o"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    z_x, r_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    z_h, r_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, g, f, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c

# %% wrong="recurrent_cells" because="input and forget gate exchanged"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    f, i, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c

# %% wrong="recurrent_cells" because="shows the memory without tanh"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * c, c

# %% wrong="recurrent_cells" because="changes the memory it was given"
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    with torch.no_grad():
        c.mul_(torch.sigmoid(f)).add_(torch.sigmoid(i) * torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c

# %% wrong="recurrent_cells" because="PyTorch's own"
def gru_cell(x, h, w_ih, w_hh, b_ih, b_hh):
    return torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)


def lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh):
    return torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)

# %% right="recurrent_cells" because="gate by gate with F.linear"
def gate(k, x, h, w_ih, w_hh, b_ih, b_hh):
    size = h.shape[-1]
    rows = slice(k * size, (k + 1) * size)
    return F.linear(x, w_ih[rows], b_ih[rows]), F.linear(h, w_hh[rows], b_hh[rows])


def gru_cell(x, h, *weights):
    r = torch.sigmoid(sum(gate(0, x, h, *weights)))
    z = torch.sigmoid(sum(gate(1, x, h, *weights)))
    from_x, from_h = gate(2, x, h, *weights)
    n = torch.tanh(from_x + r * from_h)
    return n + z * (h - n)


def lstm_cell(x, h, c, *weights):
    i, f, g, o = (sum(gate(k, x, h, *weights)) for k in range(4))
    memory = c * f.sigmoid() + g.tanh() * i.sigmoid()
    return memory.tanh() * o.sigmoid(), memory

# %% wrong="text_classifier" because="the state after the padding"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        return self.out(states[:, -1])

# %% wrong="text_classifier" because="the mean over padding too"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        return self.out(states.mean(1))

# %% wrong="text_classifier" because="batch and time exchanged: rows of a batch read one another"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        real = (tokens != 0)[..., None]
        return self.out((states * real).sum(1) / real.sum(1))

# %% wrong="text_classifier" because="a bag of words: the recurrent layer is not used"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        real = (tokens != 0)[..., None]
        return self.out((self.embedding(tokens) * real).sum(1) / real.sum(1))

# %% wrong="text_classifier" because="the first state, which has read one word"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        return self.out(states[:, 0])

# %% wrong="text_classifier" because="the states are detached: nothing below the last layer learns"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        with torch.no_grad():
            states, _ = self.rnn(self.embedding(tokens))
        real = (tokens != 0)[..., None]
        return self.out((states * real).sum(1) / real.sum(1))

# %% wrong="text_classifier" because="probabilities, not logits: the loss takes a second softmax"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        real = (tokens != 0)[..., None]
        return torch.softmax(self.out((states * real).sum(1) / real.sum(1)), -1)

# %% right="text_classifier" because="the state at the last real word"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, padding_idx=0)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        lengths = (tokens != 0).sum(1)
        return self.out(states[torch.arange(len(tokens)), lengths - 1])

# %% right="text_classifier" because="an LSTM over packed sequences, mean of its states"
class TextClassifier(nn.Module):
    def __init__(self, vocab, classes, dim=32, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.rnn = nn.LSTM(dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, tokens):
        lengths = (tokens != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, lengths = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(states.sum(1) / lengths[:, None])

# %% wrong="cross_entropy_kernel" because="padding reads 0, not -inf"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=0.0).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=0.0).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the target's logit read after its gradient was written over it"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)
    label = tl.load(logits_ptr + target).to(tl.float32)
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

# %% wrong="cross_entropy_kernel" because="the target's place counted within the block"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the target's logit looked for in the last block only"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    label = tl.sum(tl.where(cols == target % BLOCK, x, 0.0), axis=0)
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the sum is not rescaled when the maximum rises"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the block's maximum, not the running one"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.max(x, axis=0)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="no maximum at all"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.max(x, axis=0) * 0.0
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the maximum starts at 0: rows near -200 underflow"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), 0.0, tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="NaN after a block of -inf"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = m_new
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="stores without a mask"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale)

# %% wrong="cross_entropy_kernel" because="ignored rows stored without a mask"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32))
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="rows are vocab apart"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="rows are a block apart"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * BLOCK
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="only the first block"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, BLOCK, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, BLOCK, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="leaves the ragged last block out"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab // BLOCK * BLOCK, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab // BLOCK * BLOCK, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the gradient without the one at the target"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the gradient without the scale"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the loss scaled too"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, (tl.log(l) + (m - label)) * tl.load(scale_ptr))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="the gradient with the wrong sign"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.where(start + cols == target, 1.0, 0.0) - tl.exp(x - m) / l
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="sums in half precision for half-precision logits"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = (l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)).to(logits_ptr.dtype.element_ty).to(tl.float32)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="ignored rows are left as they are"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            pass
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="ignored rows keep no loss"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="a base-2 logarithm of base-e exponentials"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, (m + tl.log2(l)) - label)

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="cross_entropy_kernel" because="only row 0 is worked on"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * 0
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log(l) + (m - label))

    scale = tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% right="cross_entropy_kernel" because="lanes keep their own maximum and sum, merged once at the end; a finite start"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start_of_row = logits_ptr + tl.cast(row, tl.int64) * row_stride
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    label = tl.load(start_of_row + tl.where(kept, target, 0)).to(tl.float32)
    m = tl.full((BLOCK,), -3.4e38, tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.cdiv(vocab, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(start_of_row + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, x)
        l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
        m = m_new
    top = tl.max(m, axis=0)
    total = tl.sum(l * tl.exp(m - top), axis=0)
    tl.store(losses_ptr + row, tl.where(kept, tl.log(total) - (label - top), 0.0))
    scale = tl.load(scale_ptr)
    for block in range(tl.cdiv(vocab, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(start_of_row + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
        q = tl.exp(x - top) * (scale / total)
        gradient = tl.where(kept, tl.where(cols == target, q - scale, q), 0.0)
        tl.store(start_of_row + cols, gradient, mask=cols < vocab)

# %% right="cross_entropy_kernel" because="in base 2, second pass from the end"
@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + cols, tl.zeros((BLOCK,), tl.float32), mask=start + cols < vocab)
        tl.store(losses_ptr + row, 0.0)
        return
    label = tl.load(logits_ptr + target).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp2((m - base) * 1.4426950408889634) + tl.sum(tl.exp2((x - base) * 1.4426950408889634), axis=0)
        m = m_new
    tl.store(losses_ptr + row, tl.log2(l) * 0.6931471805599453 + (m - label))

    scale = tl.load(scale_ptr)
    last = (vocab - 1) // BLOCK * BLOCK
    for back in range(0, vocab, BLOCK):
        start = last - back
        x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - m) / l - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(logits_ptr + start + cols, gradient * scale, mask=start + cols < vocab)

# %% wrong="key_questions" because="bits, 1 - ε, GB, and the other direction"
def loss_at_start(vocab: int) -> float:
    return math.log2(vocab)


def best_probability(smoothing: float, vocab: int) -> float:
    return 1 - smoothing


def logits_gib(tokens: int, vocab: int, bytes_each: int, tensors: int) -> float:
    return tokens * vocab * bytes_each * tensors / 1e9


def fit_by_maximum_likelihood() -> str:
    return "sits on one"

# %% wrong="key_questions" because="KL the other way round only"
def loss_at_start(vocab: int) -> float:
    return math.log(vocab)


def best_probability(smoothing: float, vocab: int) -> float:
    return 1 - smoothing + smoothing / vocab


def logits_gib(tokens: int, vocab: int, bytes_each: int, tensors: int) -> float:
    return tokens * vocab * bytes_each * tensors / 2**30


def fit_by_maximum_likelihood() -> str:
    return "sits on one"

# %% wrong="key_questions" because="the probability of a uniform guess for its loss"
def loss_at_start(vocab: int) -> float:
    return 1 / vocab


def best_probability(smoothing: float, vocab: int) -> float:
    return 1 - smoothing + smoothing / vocab


def logits_gib(tokens: int, vocab: int, bytes_each: int, tensors: int) -> float:
    return tokens * vocab * bytes_each * tensors / 2**30


def fit_by_maximum_likelihood() -> str:
    return "covers both peaks"

# %% right="key_questions" because="written another way"
def loss_at_start(vocab):
    return -math.log(1 / vocab)


def best_probability(smoothing, vocab):
    return (vocab - smoothing * (vocab - 1)) / vocab


def logits_gib(tokens, vocab, bytes_each, tensors):
    return math.prod((tokens, vocab, bytes_each, tensors)) / 1024 ** 3


def fit_by_maximum_likelihood():
    return "covers both" + " peaks"
