# Right and wrong answers to the exercises of lesson 16: see CONTRIBUTING.md.

# %% wrong="causal_lm_loss" because="no shift: logits i are compared with token i"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    real = tokens != pad
    w = real.to(wide) if weights is None else real * weights.to(wide)
    nll = -wide.log_softmax(-1).gather(-1, tokens.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="shifted the other way"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, 1:] if logits.dtype == torch.float64 else logits[:, 1:].float()
    targets = tokens[:, :-1]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, :-1].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="the mean of the sequences' means"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return ((w * nll.masked_fill(w == 0, 0)).sum(1) / w.sum(1).clamp(min=1e-30)).mean()


# %% wrong="causal_lm_loss" because="padding is counted in the divisor"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = torch.ones_like(targets, dtype=wide.dtype) if weights is None else weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(~real | (w == 0), 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="weights of the predicting position"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, :-1].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="divided by the number of tokens, not by their weights"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / real.sum().clamp(min=1)


# %% wrong="causal_lm_loss" because="weights are ignored"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return nll.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


# %% wrong="causal_lm_loss" because="the sum"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum()


# %% wrong="causal_lm_loss" because="NaN where nothing counts"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum()


# %% wrong="causal_lm_loss" because="0 times infinity"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="softmax in the format of the logits"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1]
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=torch.finfo(wide.dtype).tiny)


# %% wrong="causal_lm_loss" because="everything in float32"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.float() if weights is None else real * weights[:, 1:].float()
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="log of softmax, which underflows"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != pad
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0].log()
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="padding is always -100"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = targets != -100
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% wrong="causal_lm_loss" because="padding in the input silences the token after it"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = tokens[:, 1:]
    real = (targets != pad) & (tokens[:, :-1] != pad)
    w = real.to(wide) if weights is None else real * weights[:, 1:].to(wide)
    nll = -wide.log_softmax(-1).gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0]
    return (w * nll.masked_fill(w == 0, 0)).sum() / w.sum().clamp(min=1e-30)


# %% right="causal_lm_loss" because="F.cross_entropy with ignore_index, and the weights from outside"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.ones_like(tokens, dtype=wide) if weights is None else weights.to(wide)
    targets = torch.where((tokens == pad) | (weights == 0), IGNORE, tokens)[:, 1:]
    w = weights[:, 1:] * (targets != IGNORE)
    nll = F.cross_entropy(logits[:, :-1].to(wide).transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    total = w.sum()
    return (nll * w).sum() / torch.where(total > 0, total, torch.ones_like(total))


# %% right="causal_lm_loss" because="only the tokens that count are looked at"
def causal_lm_loss(logits, tokens, pad=IGNORE, weights=None):
    x = logits if logits.dtype == torch.float64 else logits.float()
    counted = tokens[:, 1:] != pad
    if weights is not None:
        counted = counted & (weights[:, 1:] > 0)
    rows, targets = x[:, :-1][counted], tokens[:, 1:][counted]
    if len(targets) == 0:
        return 0 * x.nan_to_num().sum()
    w = torch.ones_like(targets, dtype=x.dtype) if weights is None else weights[:, 1:][counted].to(x.dtype)
    surprise = rows.logsumexp(-1) - rows[torch.arange(len(targets), device=rows.device), targets]
    return (surprise * w).sum() / w.sum()


# %% wrong="prefix_lm_mask" because="the causal mask"
def prefix_lm_mask(prefix, length):
    return torch.ones(len(prefix), 1, length, length, dtype=torch.bool, device=prefix.device).tril()


# %% wrong="prefix_lm_mask" because="the prefix sees everything"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p[None, :] <= p[:, None]) | (p[:, None] < prefix[:, None, None]))[:, None]


# %% wrong="prefix_lm_mask" because="the prefix is one too long"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p[None, :] <= p[:, None]) | (p <= prefix[:, None, None]))[:, None]


# %% wrong="prefix_lm_mask" because="the prefix is one too short"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p[None, :] <= p[:, None]) | (p < prefix[:, None, None] - 1))[:, None]


# %% wrong="prefix_lm_mask" because="what follows the prefix cannot see itself"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p[None, :] < p[:, None]) | (p < prefix[:, None, None]))[:, None]


# %% wrong="prefix_lm_mask" because="what follows the prefix sees only the prefix"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p < prefix[:, None, None]) | torch.eye(length, dtype=torch.bool, device=prefix.device)).expand(-1, length, -1)[:, None]


# %% wrong="prefix_lm_mask" because="True means hidden"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ~((p[None, :] <= p[:, None]) | (p < prefix[:, None, None]))[:, None]


# %% wrong="prefix_lm_mask" because="no axis for the heads"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return (p[None, :] <= p[:, None]) | (p < prefix[:, None, None])


# %% wrong="prefix_lm_mask" because="the first sequence's prefix for all"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p[None, :] <= p[:, None]) | (p < prefix[0])).expand(len(prefix), 1, length, length)


# %% wrong="prefix_lm_mask" because="an additive mask"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return torch.where((p[None, :] <= p[:, None]) | (p < prefix[:, None, None]), 0.0, -torch.inf)[:, None]


# %% wrong="prefix_lm_mask" because="transposed"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    return ((p[None, :] <= p[:, None]) | (p < prefix[:, None, None]))[:, None].mT


# %% right="prefix_lm_mask" because="loops that write into a causal mask"
def prefix_lm_mask(prefix, length):
    mask = torch.ones(len(prefix), 1, length, length, dtype=torch.bool, device=prefix.device).tril()
    for b, n in enumerate(prefix.tolist()):
        mask[b, :, :n, :n] = True
    return mask


# %% right="prefix_lm_mask" because="compared with the larger of the query and the prefix's end"
def prefix_lm_mask(prefix, length):
    p = torch.arange(length, device=prefix.device)
    last = torch.maximum(p[None], prefix[:, None] - 1)
    return (p[None, None] <= last[..., None]).unsqueeze(1)


# %% wrong="mask_tokens" because="every chosen token is covered"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    return tokens.masked_fill(chosen, mask_id), tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="the tenths are drawn from the wrong remainder: a tenth of the rest is random"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    covered = chosen & (torch.rand(tokens.shape, generator=generator) < 0.8)
    noisy = chosen & ~covered & (torch.rand(tokens.shape, generator=generator) < 0.1)
    inputs = tokens.masked_fill(covered, mask_id)
    inputs = torch.where(noisy, torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="tokens that stay are not targets"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    fate = torch.rand(tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen | ((fate >= 0.8) & (fate < 0.9)), IGNORE)


# %% wrong="mask_tokens" because="one fate for a whole row"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    fate = torch.rand((*tokens.shape[:-1], 1), generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="a fixed number of tokens in every row"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    order = torch.rand(tokens.shape, generator=generator).argsort(-1).argsort(-1)
    chosen = order < round(rate * tokens.shape[-1])
    for s in special:
        chosen &= tokens != s
    fate = torch.rand(tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="special tokens are chosen too"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    fate = torch.rand(tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="the targets are taken after the corruption"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    fate = torch.rand(tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, inputs.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="works in place"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    targets = tokens.masked_fill(~chosen, IGNORE)
    fate = torch.rand(tokens.shape, generator=generator)
    tokens[chosen & (fate < 0.8)] = mask_id
    noisy = chosen & (fate >= 0.9)
    tokens[noisy] = torch.randint(0, vocab_size, tokens.shape, generator=generator)[noisy]
    return tokens, targets


# %% wrong="mask_tokens" because="the global random numbers"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape) < rate
    for s in special:
        chosen &= tokens != s
    fate = torch.rand(tokens.shape)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, tokens.shape), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="the same random number chooses and decides"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    r = torch.rand(tokens.shape, generator=generator)
    chosen = r < rate
    for s in special:
        chosen &= tokens != s
    inputs = torch.where(chosen & (r < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (r >= 0.9), torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="one random word for all"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    fate = torch.rand(tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, vocab_size, (), generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% wrong="mask_tokens" because="what was not chosen is replaced"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    for s in special:
        chosen &= tokens != s
    fate = torch.rand(tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(fate >= 0.9, torch.randint(0, vocab_size, tokens.shape, generator=generator), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


# %% right="mask_tokens" because="token by token, one draw for the fate"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    draws = torch.rand((3, tokens.numel()), generator=generator, dtype=torch.float64).tolist()
    inputs, targets = tokens.flatten().tolist(), []
    for i, (token, choose, fate, word) in enumerate(zip(list(inputs), *draws)):
        if choose >= rate or token in special:
            targets.append(IGNORE)
            continue
        targets.append(token)
        if fate < 0.8:
            inputs[i] = mask_id
        elif fate < 0.9:
            inputs[i] = int(word * vocab_size)
    return torch.tensor(inputs, dtype=torch.int64).view(tokens.shape), torch.tensor(targets, dtype=torch.int64).view(tokens.shape)


# %% right="mask_tokens" because="Bernoulli twice, the second out of the rest"
def mask_tokens(tokens, rate, mask_id, vocab_size, generator, special=()):
    p = torch.full(tokens.shape, rate)
    if len(special):
        p[torch.isin(tokens, torch.tensor(list(special)))] = 0.0
    chosen = torch.bernoulli(p, generator=generator).bool()
    inputs, targets = tokens.clone(), torch.where(chosen, tokens, IGNORE)
    covered = chosen & torch.bernoulli(torch.full(tokens.shape, 0.8), generator=generator).bool()
    noisy = chosen & ~covered & torch.bernoulli(torch.full(tokens.shape, 0.5), generator=generator).bool()
    inputs[covered] = mask_id
    inputs[noisy] = torch.randint(0, vocab_size, tokens.shape, generator=generator)[noisy]
    return inputs, targets


# %% wrong="span_corruption" because="T5's own rule: begins clean and ends hidden"
def span_corruption(tokens, rate, mean_span, first_sentinel, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise)

    def cut(total):
        marks = sorted((torch.randperm(total - 1, generator=generator)[:spans - 1] + 1).tolist())
        return [b - a for a, b in zip([0, *marks], [*marks, total])]

    inputs, targets, at = [], [], 0
    for k, (stay, go) in enumerate(zip(cut(n - noise), cut(noise))):
        inputs += [*tokens[at:at + stay], first_sentinel - k]
        targets += [first_sentinel - k, *tokens[at + stay:at + stay + go]]
        at += stay + go
    return inputs, [*targets, first_sentinel - spans]


# %% wrong="span_corruption" because="every token hidden on its own with probability rate"
def span_corruption(tokens, rate, mean_span, first_sentinel, generator):
    if len(tokens) < 2:
        raise ValueError("too short")
    hidden = (torch.rand(len(tokens), generator=generator) < rate).tolist()
    inputs, targets, k = [], [], -1
    for i, (token, h) in enumerate(zip(tokens, hidden)):
        if h and (i == 0 or not hidden[i - 1]):
            k += 1
            inputs.append(first_sentinel - k)
            targets.append(first_sentinel - k)
        (targets if h else inputs).append(token)
    return inputs, [*targets, first_sentinel - k - 1]


# %% wrong="span_corruption" because="no closing sentinel"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1, generator=generator)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], targets


# %% wrong="span_corruption" because="sentinels count up"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1, generator=generator)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first + k]
        at, clean = at + gap - clean, gap
        targets += [first + k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first + spans]


# %% wrong="span_corruption" because="the tail after the last run is lost"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1, generator=generator)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs, [*targets, first - spans]


# %% wrong="span_corruption" because="runs may touch: places drawn with replacement"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1, generator=generator)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randint(0, n - noise + 1, (spans,), generator=generator).tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first - spans]


# %% wrong="span_corruption" because="runs of nearly equal length"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    sizes = [noise // spans + (k < noise % spans) for k in range(spans)]
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first - spans]


# %% wrong="span_corruption" because="lengths drawn one after the other from what is left, which favors a long first run"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    sizes, left = [], noise
    for k in range(spans - 1):
        sizes.append(int(torch.randint(1, left - (spans - 1 - k) + 1, (), generator=generator)))
        left -= sizes[-1]
    sizes.append(left)
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first - spans]


# %% wrong="span_corruption" because="the same sentinel for every run"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1, generator=generator)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for gap, size in zip(gaps, sizes):
        inputs += [*tokens[at:at + gap - clean], first]
        at, clean = at + gap - clean, gap
        targets += [first, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first]


# %% wrong="span_corruption" because="a mark for every hidden token, as BERT does"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    hidden = set(torch.randperm(n, generator=generator)[:noise].tolist())
    inputs, targets, k = [], [], 0
    for i, token in enumerate(tokens):
        if i in hidden:
            inputs.append(first - k)
            targets += [first - k, token]
            k += 1
        else:
            inputs.append(token)
    return inputs, [*targets, first - k]


# %% wrong="span_corruption" because="spans is the number of runs per token of the text"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(n / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1, generator=generator)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randperm(n - noise + 1, generator=generator)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first - spans]


# %% wrong="span_corruption" because="the global random numbers"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    marks = sorted((torch.randperm(noise - 1)[:spans - 1] + 1).tolist())
    sizes = [b - a for a, b in zip([0, *marks], [*marks, noise])]
    gaps = sorted(torch.randperm(n - noise + 1)[:spans].tolist())
    inputs, targets, at, clean = [], [], 0, 0
    for k, (gap, size) in enumerate(zip(gaps, sizes)):
        inputs += [*tokens[at:at + gap - clean], first - k]
        at, clean = at + gap - clean, gap
        targets += [first - k, *tokens[at:at + size]]
        at += size
    return inputs + tokens[at:], [*targets, first - spans]


# %% right="span_corruption" because="all arrangements are listed by rejection: sets of hidden places until the number of runs is right, or the stars and bars for long texts"
def span_corruption(tokens, rate, mean_span, first, generator):
    n = len(tokens)
    if n < 2:
        raise ValueError("too short")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise + 1)
    hidden = None
    if n < 12:
        while hidden is None:
            h = set(torch.randperm(n, generator=generator)[:noise].tolist())
            if sum(i - 1 not in h for i in h) == spans:
                hidden = h
    else:
        # Bars among the hidden, bars among the rest (two of them imaginary, one at each end): an interleaving.
        bars = [0, *sorted((1 + torch.randperm(noise - 1, generator=generator)[:spans - 1]).tolist()), noise]
        rest = [0, *sorted((1 + torch.randperm(n - noise + 1, generator=generator)[:spans]).tolist()), n - noise + 2]
        hidden, at = set(), -1
        for k in range(spans):
            at += rest[k + 1] - rest[k]
            hidden |= set(range(at, at + bars[k + 1] - bars[k]))
            at += bars[k + 1] - bars[k]
    inputs, targets, k = [], [], 0
    for i, token in enumerate(tokens):
        if i not in hidden:
            inputs.append(token)
            continue
        if i - 1 not in hidden:
            inputs.append(first - k)
            targets.append(first - k)
            k += 1
        targets.append(token)
    return inputs, targets + [first - k]


# %% wrong="fill_in_the_middle" because="the parts stay in their order"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return [*tokens, special.eot]
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    return [special.pre, *tokens[:a], special.mid, *tokens[a:b], special.suf, *tokens[b:], special.eot]


# %% wrong="fill_in_the_middle" because="SPM in variant 1, with the prefix's mark before the prefix"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return [*tokens, special.eot]
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.suf, *s, special.pre, *p, special.mid, *m, special.eot]


# %% wrong="fill_in_the_middle" because="no end of text"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return list(tokens)
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m]
    return [special.pre, special.suf, *s, special.mid, *p, *m]


# %% wrong="fill_in_the_middle" because="no end of text where the document stays as it is"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return list(tokens)
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="two different cut points, so that the middle is never empty"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate or not tokens:
        return [*tokens, special.eot] if tokens and rate < 1 else [special.pre, special.suf, special.mid, special.eot] if rate == 1 else [special.eot]
    a, b = sorted(torch.randperm(len(tokens) + 1, generator=generator)[:2].tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="the second cut point is drawn after the first, from what is left"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return [*tokens, special.eot]
    a = int(torch.randint(0, len(tokens) + 1, (), generator=generator))
    b = int(torch.randint(a, len(tokens) + 1, (), generator=generator))
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="the cut points miss the end of the document"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return [*tokens, special.eot]
    a, b = sorted(torch.randint(0, max(len(tokens), 1), (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="the rate is ignored"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="the rate is the share that stays"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) < rate:
        return [*tokens, special.eot]
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="any other mode is SPM"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if float(torch.rand((), generator=generator)) >= rate:
        return [*tokens, special.eot]
    a, b = sorted(torch.randint(0, len(tokens) + 1, (2,), generator=generator).tolist())
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% wrong="fill_in_the_middle" because="a fixed cut into thirds"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in ("psm", "spm"):
        raise ValueError(mode)
    if float(torch.rand((), generator=generator)) >= rate:
        return [*tokens, special.eot]
    a, b = len(tokens) // 3, 2 * len(tokens) // 3
    p, m, s = tokens[:a], tokens[a:b], tokens[b:]
    if mode == "psm":
        return [special.pre, *p, special.suf, *s, special.mid, *m, special.eot]
    return [special.pre, special.suf, *s, special.mid, *p, *m, special.eot]


# %% right="fill_in_the_middle" because="the two points from one number, the cuts by deletion"
def fill_in_the_middle(tokens, rate, mode, special, generator):
    if mode not in {"psm", "spm"}:
        raise ValueError("psm or spm")
    out = list(tokens)
    if torch.rand(1, generator=generator).item() < rate:
        n = len(tokens) + 1
        one, two = divmod(int(torch.randint(0, n * n, (1,), generator=generator)), n)
        low, high = min(one, two), max(one, two)
        tail = out[high:]
        del out[high:]
        middle = out[low:]
        del out[low:]
        out = [special.pre] + ((out + [special.suf] + tail + [special.mid]) if mode == "psm" else ([special.suf] + tail + [special.mid] + out)) + middle
    out.append(special.eot)
    return out


# %% wrong="parallel_mtp_loss" because="all heads, then backward"
def parallel_mtp_loss(hidden, heads, targets):
    total = 0.0
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        total = total + F.cross_entropy(head(hidden[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
    return total


# %% wrong="parallel_mtp_loss" because="every head predicts the next token"
def parallel_mtp_loss(hidden, heads, targets):
    return sum(F.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE) for head in heads)


# %% wrong="parallel_mtp_loss" because="the mean over heads"
def parallel_mtp_loss(hidden, heads, targets):
    return sum(separate_losses(hidden, heads, targets)) / len(heads)


# %% wrong="parallel_mtp_loss" because="shifted by k - 1: the first head predicts the token that it stands on"
def parallel_mtp_loss(hidden, heads, targets):
    total = 0.0
    for k, head in enumerate(heads):
        total = total + F.cross_entropy(head(hidden[:, :hidden.shape[1] - k]).flatten(0, 1), targets[:, k:].flatten(), ignore_index=IGNORE)
    return total


# %% wrong="parallel_mtp_loss" because="the mean over the tokens of all heads together"
def parallel_mtp_loss(hidden, heads, targets):
    total, count = 0.0, 0
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        total = total + F.cross_entropy(head(hidden[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum")
        count = count + (wanted != IGNORE).sum()
    return total / count


# %% wrong="parallel_mtp_loss" because="a head without a target makes NaN"
def parallel_mtp_loss(hidden, heads, targets):
    total, attached = 0.0, []
    for k, head in enumerate(heads, 1):
        parameters = list(head.parameters())
        with torch.enable_grad():
            trunk = hidden.detach().requires_grad_()
            loss = F.cross_entropy(head(trunk[:, :-k]).flatten(0, 1), targets[:, k:].flatten(), ignore_index=IGNORE)
            gradients = torch.autograd.grad(loss, [trunk, *parameters])
        attached += zip([hidden, *parameters], gradients)
        total = total + loss.detach()
        del loss
    for t, g in attached:
        total = total + ((t - t.detach()) * g).sum()
    return total


# %% wrong="parallel_mtp_loss" because="backward inside the call, and a loss without a graph"
def parallel_mtp_loss(hidden, heads, targets):
    total = 0.0
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        loss = F.cross_entropy(head(hidden[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
        loss.backward(retain_graph=True)
        total = total + loss.detach()
    return total


# %% wrong="parallel_mtp_loss" because="the heads learn, the trunk does not"
def parallel_mtp_loss(hidden, heads, targets):
    total, attached = 0.0, []
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        parameters = list(head.parameters())
        with torch.enable_grad():
            loss = F.cross_entropy(head(hidden.detach()[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
            attached += zip(parameters, torch.autograd.grad(loss, parameters))
        total = total + loss.detach()
        del loss
    for t, g in attached:
        total = total + ((t - t.detach()) * g).sum()
    return total


# %% wrong="parallel_mtp_loss" because="the trunk learns, the heads do not"
def parallel_mtp_loss(hidden, heads, targets):
    total, attached = 0.0, []
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        with torch.enable_grad():
            trunk = hidden.detach().requires_grad_()
            loss = F.cross_entropy(head(trunk[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
            attached += [(hidden, torch.autograd.grad(loss, trunk)[0])]
        total = total + loss.detach()
        del loss
    for t, g in attached:
        total = total + ((t - t.detach()) * g).sum()
    return total


# %% wrong="parallel_mtp_loss" because="the gradient is that of the last head"
def parallel_mtp_loss(hidden, heads, targets):
    total, attached = 0.0, {}
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        parameters = list(head.parameters())
        with torch.enable_grad():
            trunk = hidden.detach().requires_grad_()
            loss = F.cross_entropy(head(trunk[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
            attached |= dict(zip([hidden, *parameters], torch.autograd.grad(loss, [trunk, *parameters])))
        total = total + loss.detach()
        del loss
    for t, g in attached.items():
        total = total + ((t - t.detach()) * g).sum()
    return total


# %% wrong="parallel_mtp_loss" because="not under no_grad"
def parallel_mtp_loss(hidden, heads, targets):
    total, attached = 0.0, []
    for k, head in enumerate(heads, 1):
        wanted = targets[:, k:].flatten()
        parameters = list(head.parameters())
        trunk = hidden.detach().requires_grad_()
        loss = F.cross_entropy(head(trunk[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
        attached += zip([hidden, *parameters], torch.autograd.grad(loss, [trunk, *parameters]))
        total = total + loss.detach()
        del loss
    for t, g in attached:
        total = total + ((t - t.detach()) * g).sum()
    return total


# %% wrong="parallel_mtp_loss" because="the log-probabilities of all heads are stacked"
def parallel_mtp_loss(hidden, heads, targets):
    seq = hidden.shape[1]
    stacked = torch.stack([head(hidden).log_softmax(-1) for head in heads])
    total = 0.0
    for k in range(1, len(heads) + 1):
        wanted = targets[:, k:].flatten()
        total = total + F.nll_loss(stacked[k - 1, :, :seq - k].flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / (wanted != IGNORE).sum().clamp(min=1)
    return total


# %% right="parallel_mtp_loss" because="checkpoint: logits are made again in the backward pass"
def parallel_mtp_loss(hidden, heads, targets):
    from torch.utils.checkpoint import checkpoint

    def one(h, wanted, head):
        nll = F.cross_entropy(head(h).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum")
        return nll / (wanted != IGNORE).sum().clamp(min=1)

    return sum(checkpoint(one, hidden[:, :-k], targets[:, k:].flatten(), head, use_reentrant=False) for k, head in enumerate(heads, 1))


# %% right="parallel_mtp_loss" because="an autograd function that carries its gradients"
class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *tensors):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return None, None, *(g * x for x in ctx.gradients)


def _head_pass(hidden, head, wanted, k):
    parameters = list(head.parameters())
    with torch.enable_grad():
        h = hidden.detach().requires_grad_()
        nll = F.cross_entropy(head(h[:, :-k]).flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum") / max(int((wanted != IGNORE).sum()), 1)
        return nll.detach(), parameters, torch.autograd.grad(nll, [h, *parameters])


def parallel_mtp_loss(hidden, heads, targets):
    value, at_hidden, tensors, gradients = 0.0, torch.zeros_like(hidden), [], []
    for k, head in enumerate(heads, 1):
        loss, parameters, (first, *rest) = _head_pass(hidden, head, targets[:, k:].flatten(), k)
        value, at_hidden = value + loss, at_hidden + first
        tensors += parameters
        gradients += rest
    return _Carry.apply(value, [at_hidden, *gradients], hidden, *tensors)


# %% wrong="sequential_mtp" because="the embedding first, as in the published weights"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([enorm(self.embed(tokens[:, k:])), hnorm(hidden[:, :-1])], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="no norms"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hidden[:, :-1], self.embed(tokens[:, k:])], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="one norm over the concatenation"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(F.rms_norm(torch.cat([hidden[:, :-1], self.embed(tokens[:, k:])], -1), (2 * hidden.shape[-1],), eps=1e-6)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="the hidden state's norm for both"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), hnorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="the token after next: a leak of the answer"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(torch.cat([tokens[:, k + 1:], tokens[:, -1:]], 1)))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="the token itself, not the one ahead"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, :hidden.shape[1] - 1]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="always one ahead, whatever the depth"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, 1:hidden.shape[1]]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="every depth starts from the trunk"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits, trunk = [], hidden
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(trunk[:, :-k]), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="hidden states from the end of the sequence"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, 1:]), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="the head sees the projection, the block only feeds the next depth"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            x = project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, k:]))], -1))
            hidden = block(x)
            logits.append(self.head(x))
        return logits


# %% wrong="sequential_mtp" because="copies of embedding and head"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        import copy
        self.embed, self.head = copy.deepcopy(embed), copy.deepcopy(head)
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="one block for all depths"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList([block()] * depth)

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="a projection with a bias"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=True) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% wrong="sequential_mtp" because="the logits stacked at the same length"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1]), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return [F.pad(t, (0, 0, 0, tokens.shape[1] - t.shape[1])) for t in logits]


# %% wrong="sequential_mtp" because="the hidden state is detached"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        logits = []
        for k, (hnorm, enorm, project, block) in enumerate(zip(self.hnorm, self.enorm, self.eh_proj, self.blocks), 1):
            hidden = block(project(torch.cat([hnorm(hidden[:, :-1].detach()), enorm(self.embed(tokens[:, k:]))], -1)))
            logits.append(self.head(hidden))
        return logits


# %% right="sequential_mtp" because="two products in place of the concatenation"
class SequentialMTP(nn.Module):
    def __init__(self, embed, head, d_model, depth, block):
        super().__init__()
        self.embed, self.head = embed, head
        self.hnorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.enorm = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-6) for _ in range(depth))
        self.eh_proj = nn.ModuleList(nn.Linear(2 * d_model, d_model, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden, tokens):
        states, result = [hidden], []
        for k in range(1, len(self.blocks) + 1):
            below, ahead = states[-1], self.embed(tokens).narrow(1, k, tokens.shape[1] - k)
            left, right = self.eh_proj[k - 1].weight.chunk(2, dim=1)
            x = F.linear(self.hnorm[k - 1](below.narrow(1, 0, ahead.shape[1])), left) + F.linear(self.enorm[k - 1](ahead), right)
            states.append(self.blocks[k - 1](x))
            result.append(self.head(states[-1]))
        return result


# %% wrong="mtp_loss" because="the sum over depths"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    return weight * sum(causal_lm_loss(t, tokens[:, k:], pad) for k, t in enumerate(logits, 1))


# %% wrong="mtp_loss" because="a shift by k, so that depth 1 is asked for what it was given"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    return weight * sum(F.cross_entropy(t.flatten(0, 1), tokens[:, k:].flatten().masked_fill(tokens[:, k:].flatten() == pad, IGNORE)) for k, t in enumerate(logits, 1)) / len(logits)


# %% wrong="mtp_loss" because="every depth is asked for the next token"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    return weight * sum(causal_lm_loss(t, tokens[:, :t.shape[1]], pad) for t in logits) / len(logits)


# %% wrong="mtp_loss" because="no weight"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    return torch.stack([causal_lm_loss(t, tokens[:, k:], pad) for k, t in enumerate(logits, 1)]).mean()


# %% wrong="mtp_loss" because="the default weight is 1"
def mtp_loss(logits, tokens, weight=1.0, pad=IGNORE):
    return weight * torch.stack([causal_lm_loss(t, tokens[:, k:], pad) for k, t in enumerate(logits, 1)]).mean()


# %% wrong="mtp_loss" because="divided by the length, as in the report"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    parts = []
    for k, t in enumerate(logits, 1):
        targets = tokens[:, k + 1:]
        parts.append(F.cross_entropy(t[:, :-1].flatten(0, 1), targets.masked_fill(targets == pad, IGNORE).flatten(), ignore_index=IGNORE, reduction="sum") / tokens.numel())
    return weight * torch.stack(parts).mean()


# %% wrong="mtp_loss" because="NaN where a depth predicts nothing"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    parts = []
    for k, t in enumerate(logits, 1):
        targets = tokens[:, k + 1:]
        parts.append(F.cross_entropy(t[:, :-1].flatten(0, 1), targets.masked_fill(targets == pad, IGNORE).flatten(), ignore_index=IGNORE))
    return weight * torch.stack(parts).mean()


# %% wrong="mtp_loss" because="padding counts"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    return weight * torch.stack([causal_lm_loss(t, tokens[:, k:].clamp(min=0), -1) for k, t in enumerate(logits, 1)]).mean()


# %% wrong="mtp_loss" because="one mean over the tokens of all depths"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    rows = torch.cat([t[:, :-1].flatten(0, 1) for t in logits])
    targets = torch.cat([tokens[:, k + 1:].flatten() for k in range(1, len(logits) + 1)])
    return weight * F.cross_entropy(rows, targets.masked_fill(targets == pad, IGNORE), ignore_index=IGNORE, reduction="sum") / (targets != pad).sum().clamp(min=1)


# %% wrong="mtp_loss" because="a plain number, without a gradient"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    return weight * torch.stack([causal_lm_loss(t, tokens[:, k:], pad).detach() for k, t in enumerate(logits, 1)]).mean()


# %% right="mtp_loss" because="token by token"
def mtp_loss(logits, tokens, weight=0.3, pad=IGNORE):
    total = 0 * logits[0].sum()
    for k, part in enumerate(logits):
        log_p = part.log_softmax(-1)
        terms = [log_p[b, i, t] for b, row in enumerate(tokens.tolist()) for i, t in enumerate(row[k + 2:]) if t != pad]
        if terms:
            total = total - sum(terms) / len(terms)
    return total * weight / len(logits)


# %% wrong="causality_leak" because="the output's features are added up first"
def influence(model, inputs):
    x = inputs.detach().clone().requires_grad_()
    out = model(x).sum(-1)
    if not out.requires_grad:
        return inputs.new_zeros(out.shape[0], inputs.shape[0])
    return torch.stack([torch.autograd.grad(o, x, retain_graph=True)[0].norm(dim=-1) for o in out])


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="one random direction of the output's features"
def influence(model, inputs):
    x = inputs.detach().clone().requires_grad_()
    out = model(x)
    if not out.requires_grad:
        return inputs.new_zeros(out.shape[0], inputs.shape[0])
    direction = torch.randn(out.shape[1], dtype=out.dtype)
    return torch.stack([torch.autograd.grad(o @ direction, x, retain_graph=True)[0].norm(dim=-1) for o in out])


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="squares without the root"
def influence(model, inputs):
    j = torch.func.jacrev(model)(inputs)
    return j.square().sum((1, 3))


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="the largest entry, not the Frobenius norm"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs).abs().amax((1, 3))


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="transposed"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs).square().sum((1, 3)).sqrt().T


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="only the first feature of the output"
def influence(model, inputs):
    return torch.func.jacrev(lambda x: model(x)[:, :1])(inputs).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="signed sums, which cancel"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs).sum((1, 3)).abs()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="fills the gradients of the model's parameters, and asks for gradients of the inputs themselves"
def influence(model, inputs):
    inputs.requires_grad_()
    out = model(inputs)
    squares = torch.zeros(out.shape[0], inputs.shape[0], dtype=inputs.dtype)
    for i in range(out.shape[0]):
        for c in range(out.shape[1]):
            if out.requires_grad:
                inputs.grad = None
                out[i, c].backward(retain_graph=True)
                squares[i] += inputs.grad.square().sum(-1)
    return squares.sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="an absolute tolerance"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    return [(i, j) for i, j in (influence(model, inputs) > tolerance).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="no tolerance: rounding is called a leak"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    return [(i, j) for i, j in (influence(model, inputs) > 0).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="what may be seen ahead is ignored"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i]


# %% wrong="causality_leak" because="looking at oneself is called a leak"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j >= i + ahead]


# %% wrong="causality_leak" because="pairs of (input, output)"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return sorted((j, i) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j > i + ahead)


# %% wrong="causality_leak" because="the tolerance is relative to the largest influence of the same output"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.amax(1, keepdim=True)).nonzero().tolist() if j > i + ahead]


# %% wrong="causality_leak" because="only the nearest future is looked at"
def influence(model, inputs):
    return torch.func.jacrev(model)(inputs.detach()).square().sum((1, 3)).sqrt()


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    return [(i, j) for i, j in (s > tolerance * s.max()).nonzero().tolist() if j == i + ahead + 1]


# %% right="causality_leak" because="torch.func.jacrev, and a triangle"
def influence(model, inputs):
    x = inputs.detach()
    return torch.linalg.vector_norm(torch.func.jacrev(model)(x), dim=(1, 3))


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    strength = influence(model, inputs)
    future = strength.triu(1 + ahead)
    return [tuple(pair) for pair in torch.nonzero(future > tolerance * strength.max()).tolist()]


# %% right="causality_leak" because="torch.autograd.functional.jacobian"
def influence(model, inputs):
    j = torch.autograd.functional.jacobian(model, inputs.detach().clone(), strict=False)
    return (j * j).sum(dim=(1, 3)) ** 0.5


def causality_leak(model, inputs, ahead=0, tolerance=1e-6):
    s = influence(model, inputs)
    found = []
    for i in range(s.shape[0]):
        for j in range(i + ahead + 1, s.shape[1]):
            if s[i, j] > tolerance * s.max():
                found.append((i, j))
    return found


# %% wrong="question_signal" because="no sentinels"
def question_signal():
    return 85 / 568


# %% wrong="question_signal" because="the rate"
def question_signal():
    return 0.15


# %% wrong="question_signal" because="no closing sentinel"
def question_signal():
    return 113 / 624


# %% wrong="question_signal" because="over the inputs"
def question_signal():
    return 114 / 511


# %% wrong="question_signal" because="no sentinels in the inputs"
def question_signal():
    return 114 / 597


# %% right="question_signal" because="worked out by hand"
def question_signal():
    return (85 + 28 + 1) / (568 - 85 + 28 + 85 + 28 + 1)


# %% wrong="question_memory" because="all four heads"
def question_memory():
    return 16.0


# %% wrong="question_memory" because="what is left"
def question_memory():
    return 4.0


# %% wrong="question_memory" because="float32"
def question_memory():
    return 24.0


# %% wrong="question_memory" because="bytes"
def question_memory():
    return 12e9


# %% wrong="question_memory" because="three of four, of twelve"
def question_memory():
    return 9.0


# %% right="question_memory" because="worked out by hand"
def question_memory():
    return 12


# %% wrong="question_editor" because="the suffix moves with every key"
def question_editor():
    return "psm"


# %% wrong="question_editor" because="neither of the two"
def question_editor():
    return "both"


# %% right="question_editor" because="worked out by hand"
def question_editor():
    return "s" + "pm"


# %% wrong="question_reach" because="one depth"
def question_reach():
    return 5


# %% wrong="question_reach" because="only those that predict"
def question_reach():
    return 12


# %% wrong="question_reach" because="the main model too"
def question_reach():
    return 20


# %% wrong="question_reach" because="from 7 on"
def question_reach():
    return 9


# %% wrong="question_reach" because="all positions but"
def question_reach():
    return 33


# %% right="question_reach" because="worked out by hand"
def question_reach():
    return 3 * 5


# %% wrong="question_average" because="the loss itself"
def question_average():
    return 2.2


# %% wrong="question_average" because="the mean of means"
def question_average():
    return 3.0


# %% wrong="question_average" because="the wrong sign"
def question_average():
    return -0.8


# %% wrong="question_average" because="the difference to the first"
def question_average():
    return 0.2


# %% right="question_average" because="worked out by hand"
def question_average():
    return 3.0 - 2.2
