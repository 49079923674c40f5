# Right and wrong answers to the exercises of lesson 39: see CONTRIBUTING.md.

# %% wrong="stft" because="padded with zeros"
- padded = F.pad(x.reshape(-1, x.shape[-1]), (half, half), mode="reflect")
+ padded = F.pad(x.reshape(-1, x.shape[-1]), (half, half))

# %% wrong="stft" because="the end sample is repeated"
- padded = F.pad(x.reshape(-1, x.shape[-1]), (half, half), mode="reflect")
+ flat = x.reshape(-1, x.shape[-1])
+ padded = torch.cat([flat[:, :half].flip(1), flat, flat[:, -half:].flip(1)], dim=1)

# %% wrong="stft" because="not centered"
- padded = F.pad(x.reshape(-1, x.shape[-1]), (half, half), mode="reflect")
+ padded = x.reshape(-1, x.shape[-1])

# %% wrong="stft" because="no window"
- frames = padded.unfold(-1, n_fft, hop) * window  # (rows, frames, n_fft)
+ frames = padded.unfold(-1, n_fft, hop)

# %% wrong="stft" because="the window is turned round"
- frames = padded.unfold(-1, n_fft, hop) * window  # (rows, frames, n_fft)
+ frames = padded.unfold(-1, n_fft, hop) * window.flip(0)

# %% wrong="stft" because="a Hann window in place of the one given"
- frames = padded.unfold(-1, n_fft, hop) * window  # (rows, frames, n_fft)
+ frames = padded.unfold(-1, n_fft, hop) * torch.hann_window(n_fft).to(window)

# %% wrong="stft" because="frames before bins"
- spectrum = torch.fft.rfft(frames).mT
+ spectrum = torch.fft.rfft(frames)

# %% wrong="stft" because="normalized"
- spectrum = torch.fft.rfft(frames).mT
+ spectrum = torch.fft.rfft(frames, norm="ortho").mT

# %% wrong="stft" because="a hop of half a frame always"
- frames = padded.unfold(-1, n_fft, hop) * window  # (rows, frames, n_fft)
+ frames = padded.unfold(-1, n_fft, n_fft // 2) * window

# %% wrong="stft" because="the conjugate"
- spectrum = torch.fft.rfft(frames).mT
+ spectrum = torch.fft.rfft(frames).conj().mT

# %% wrong="stft" because="float64 goes through float32"
- frames = padded.unfold(-1, n_fft, hop) * window  # (rows, frames, n_fft)
+ frames = padded.float().unfold(-1, n_fft, hop) * window.float()

# %% wrong="stft" because="short sounds are refused one sample too early"
- if x.shape[-1] <= half:
+ if x.shape[-1] <= half + 1:

# %% wrong="stft" because="torch.stft"
def stft(x, window, hop):
    n_fft = len(window)
    if x.shape[-1] <= n_fft // 2:
        raise ValueError("too short")
    flat = x.reshape(-1, x.shape[-1])
    out = torch.stft(flat, n_fft, hop, window=window, return_complex=True)
    return out.reshape(*x.shape[:-1], *out.shape[-2:])

# %% right="stft" because="indices for the mirror, and a matrix of waves"
def stft(x, window, hop):
    n_fft, samples = len(window), x.shape[-1]
    half = n_fft // 2
    if samples <= half:
        raise ValueError(f"too short: {samples} samples, {half} are mirrored")
    count = 1 + (samples + 2 * half - n_fft) // hop
    at = torch.arange(count)[:, None] * hop + torch.arange(n_fft) - half
    at = at.abs()
    at = torch.where(at >= samples, 2 * (samples - 1) - at, at).to(x.device)
    n = torch.arange(n_fft, dtype=torch.float64)
    angle = -2 * math.pi / n_fft * n * torch.arange(half + 1, dtype=torch.float64)[:, None]
    waves = torch.polar(torch.ones_like(angle), angle).to(x.device)
    frames = (x[..., at] * window).double()
    out = torch.einsum("kn,...fn->...kf", waves, frames.to(torch.complex128))
    return out.to(torch.complex64 if x.dtype == torch.float32 else torch.complex128)

# %% wrong="mel_filterbank" because="HTK's scale"
def mel_filterbank(n_mels, n_fft=400, sample_rate=16_000, low=0.0, high=None, area=True):
    high = sample_rate / 2 if high is None else high
    ends = [2595 * math.log10(1 + f / 700) for f in (low, high)]
    corners = 700 * (10 ** (torch.linspace(*ends, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    left, center, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bands = torch.minimum((bins - left) / (center - left), (right - bins) / (right - center))
    bands = bands.clamp(min=0)
    return (bands * (2 / (right - left) if area else 1)).float()

# %% wrong="mel_filterbank" because="peaks of 1, whatever is asked"
- return (bands * (2 / (right - left) if area else 1)).float()
+ return bands.float()

# %% wrong="mel_filterbank" because="areas of 1, whatever is asked"
- return (bands * (2 / (right - left) if area else 1)).float()
+ return (bands * (2 / (right - left))).float()

# %% wrong="mel_filterbank" because="the whole base in place of half of it"
- return (bands * (2 / (right - left) if area else 1)).float()
+ return (bands * (1 / (right - left) if area else 1)).float()

# %% wrong="mel_filterbank" because="the low end is always 0"
- mels = torch.linspace(to_mel(low), to_mel(high), n_mels + 2, dtype=torch.float64)
+ mels = torch.linspace(0.0, to_mel(high), n_mels + 2, dtype=torch.float64)

# %% wrong="mel_filterbank" because="the high end is always half the sample rate"
- high = sample_rate / 2 if high is None else high
+ high = sample_rate / 2

# %% wrong="mel_filterbank" because="one corner too few"
- mels = torch.linspace(to_mel(low), to_mel(high), n_mels + 2, dtype=torch.float64)
+ mels = torch.linspace(to_mel(low), to_mel(high), n_mels + 3, dtype=torch.float64)[:-1]

# %% wrong="mel_filterbank" because="triangles in mel"
def mel_filterbank(n_mels, n_fft=400, sample_rate=16_000, low=0.0, high=None, area=True):
    step = math.log(6.4) / 27

    def to_mel(f):
        return torch.where(f < 1000, 3 * f / 200, 15 + torch.log(f.clamp(min=1) / 1000) / step)

    high = sample_rate / 2 if high is None else high
    ends = to_mel(torch.tensor([low, high], dtype=torch.float64))
    mels = torch.linspace(*ends.tolist(), n_mels + 2, dtype=torch.float64)
    corners = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    bins = to_mel(torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft)
    left, center, right = mels[:-2, None], mels[1:-1, None], mels[2:, None]
    bands = torch.minimum((bins - left) / (center - left), (right - bins) / (right - center))
    bands = bands.clamp(min=0)
    return (bands * (2 / (corners[2:] - corners[:-2])[:, None] if area else 1)).float()

# %% wrong="mel_filterbank" because="the logarithm begins at 700 Hz"
- return 3 * f / 200 if f < 1000 else 15 + math.log(f / 1000) / step
+ return 3 * f / 200 if f < 700 else 15 + math.log(f / 1000) / step

# %% wrong="mel_filterbank" because="the bins of one sample rate"
- bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
+ bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * 16_000 / n_fft

# %% wrong="mel_filterbank" because="computed in float32"
- mels = torch.linspace(to_mel(low), to_mel(high), n_mels + 2, dtype=torch.float64)
+ mels = torch.linspace(to_mel(low), to_mel(high), n_mels + 2)
- bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
+ bins = torch.arange(n_fft // 2 + 1) * sample_rate / n_fft

# %% wrong="mel_filterbank" because="float64"
- return (bands * (2 / (right - left) if area else 1)).float()
+ return bands * (2 / (right - left) if area else 1)

# %% wrong="mel_filterbank" because="transposed"
- return (bands * (2 / (right - left) if area else 1)).float()
+ return (bands * (2 / (right - left) if area else 1)).float().T

# %% right="mel_filterbank" because="NumPy's interp, band by band"
def mel_filterbank(n_mels, n_fft=400, sample_rate=16_000, low=0.0, high=None, area=True):
    if high is None:
        high = sample_rate / 2
    ends = [f * 0.015 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4) for f in (low, high)]
    mels = np.linspace(ends[0], ends[1], n_mels + 2)
    corners = [m / 0.015 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    out = np.zeros((n_mels, len(bins)))
    for m in range(n_mels):
        out[m] = np.interp(bins, corners[m : m + 3], [0.0, 1.0, 0.0], left=0.0, right=0.0)
        if area:
            out[m] *= 2 / (corners[m + 2] - corners[m])
    return torch.tensor(out, dtype=torch.float32)

# %% wrong="log_mel" because="a symmetric window"
- window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
+ window = torch.hann_window(n_fft, periodic=False, dtype=x.dtype, device=x.device)

# %% wrong="log_mel" because="magnitudes, not power"
- power = stft(x, window, hop)[..., :-1].abs().square()
+ power = stft(x, window, hop)[..., :-1].abs()

# %% wrong="log_mel" because="the last frame stays"
- power = stft(x, window, hop)[..., :-1].abs().square()
+ power = stft(x, window, hop).abs().square()

# %% wrong="log_mel" because="the first frame is dropped"
- power = stft(x, window, hop)[..., :-1].abs().square()
+ power = stft(x, window, hop)[..., 1:].abs().square()

# %% wrong="log_mel" because="the natural logarithm"
- y = mel.clamp(min=1e-10).log10()
+ y = mel.clamp(min=1e-10).log()

# %% wrong="log_mel" because="1e-10 is added"
- y = mel.clamp(min=1e-10).log10()
+ y = (mel + 1e-10).log10()

# %% wrong="log_mel" because="the loudest point of the batch"
- y = torch.maximum(y, y.amax(dim=(-2, -1), keepdim=True) - 8)
+ y = torch.maximum(y, y.max() - 8)

# %% wrong="log_mel" because="the loudest point of each frame"
- y = torch.maximum(y, y.amax(dim=(-2, -1), keepdim=True) - 8)
+ y = torch.maximum(y, y.amax(dim=-2, keepdim=True) - 8)

# %% wrong="log_mel" because="no floor"
- y = torch.maximum(y, y.amax(dim=(-2, -1), keepdim=True) - 8)
+ y = y * 1

# %% wrong="log_mel" because="the mean and deviation of the clip"
- return (y + 4) / 4
+ return (y - y.mean()) / (y.std() + 1e-6)

# %% wrong="log_mel" because="always 80 bands"
- mel = mel_filterbank(n_mels, n_fft, sample_rate).to(x) @ power
+ mel = mel_filterbank(80, n_fft, sample_rate).to(x) @ power

# %% wrong="log_mel" because="always 16 kHz"
- mel = mel_filterbank(n_mels, n_fft, sample_rate).to(x) @ power
+ mel = mel_filterbank(n_mels, n_fft).to(x) @ power

# %% wrong="log_mel" because="float64 goes through float32"
- window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
+ given, x = x.dtype, x.float()
+ window = torch.hann_window(n_fft, device=x.device)
- return (y + 4) / 4
+ return ((y + 4) / 4).to(given)

# %% right="log_mel" because="torch.stft, clip by clip"
def log_mel(x, n_mels=80, n_fft=400, hop=160, sample_rate=16_000):
    clips = []
    for clip in x.reshape(-1, x.shape[-1]):
        bins = torch.stft(
            clip, n_fft, hop, window=torch.hann_window(n_fft, dtype=clip.dtype).to(clip), return_complex=True
        )
        power = torch.view_as_real(bins).square().sum(-1)[:, :-1]
        y = torch.log10(torch.clamp(mel_filterbank(n_mels, n_fft, sample_rate).to(power) @ power, min=1e-10))
        clips.append((torch.clamp(y, min=float(y.max()) - 8) + 4) / 4)
    return torch.stack(clips).reshape(*x.shape[:-1], *clips[0].shape)

# %% wrong="ctc_loss_forward" because="skips between equal letters"
- skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
+ skips[:, 2:] = states[:, 2:] != blank

# %% wrong="ctc_loss_forward" because="skips a letter, from blank to blank"
- skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
+ skips[:, 2:] = (states[:, 2:] == blank) | (states[:, 2:] != states[:, :-2])

# %% wrong="ctc_loss_forward" because="no skips"
- moved = torch.stack([alpha, one, two]).logsumexp(0) + emitted[:, f]
+ moved = torch.stack([alpha, one]).logsumexp(0) + emitted[:, f]

# %% wrong="ctc_loss_forward" because="the best path, not the sum of all"
- moved = torch.stack([alpha, one, two]).logsumexp(0) + emitted[:, f]
+ moved = torch.stack([alpha, one, two]).amax(0) + emitted[:, f]
- loss = -ends.logsumexp(1)
+ loss = -ends.amax(1)

# %% wrong="ctc_loss_forward" because="ends in the last blank only"
- loss = -ends.logsumexp(1)
+ loss = -ends[:, 0]

# %% wrong="ctc_loss_forward" because="ends in the last letter only"
- loss = -ends.logsumexp(1)
+ loss = -ends[:, 1]

# %% wrong="ctc_loss_forward" because="starts in the blank only"
- alpha = torch.cat([emitted[:, 0, :2], torch.full_like(emitted[:, 0, 2:], never)], dim=1)
+ alpha = torch.cat([emitted[:, 0, :1], torch.full_like(emitted[:, 0, 1:], never)], dim=1)

# %% wrong="ctc_loss_forward" because="starts anywhere"
- alpha = torch.cat([emitted[:, 0, :2], torch.full_like(emitted[:, 0, 2:], never)], dim=1)
+ alpha = emitted[:, 0]

# %% wrong="ctc_loss_forward" because="the blank is always 0"
- states = torch.full((batch, 2 * longest + 1), blank, device=targets.device)
+ blank = 0
+ states = torch.full((batch, 2 * longest + 1), blank, device=targets.device)

# %% wrong="ctc_loss_forward" because="input lengths are ignored"
- inside = torch.arange(time, device=log_probs.device) < input_lengths[:, None]
+ inside = torch.ones(batch, time, dtype=torch.bool, device=log_probs.device)

# %% wrong="ctc_loss_forward" because="one frame too many"
- inside = torch.arange(time, device=log_probs.device) < input_lengths[:, None]
+ inside = torch.arange(time, device=log_probs.device) <= input_lengths[:, None]

# %% wrong="ctc_loss_forward" because="the longest target's end for all"
- last = 2 * target_lengths[:, None]  # the blank after the last letter
+ last = torch.full_like(target_lengths[:, None], 2 * longest)

# %% wrong="ctc_loss_forward" because="an empty target counts its blank twice"
- letter = alpha.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, never)
+ letter = alpha.gather(1, (last - 1).clamp(min=0))

# %% wrong="ctc_loss_forward" because="a large number in place of inf"
- return torch.where(loss > -never / 2, torch.inf, loss)
+ return loss

# %% wrong="ctc_loss_forward" because="impossible is −inf, and its gradient NaN"
- never = -1e30  # a finite −inf: the gradient of logsumexp of nothing but −inf is NaN
+ never = -torch.inf
- return torch.where(loss > -never / 2, torch.inf, loss)
+ return loss

# %% wrong="ctc_loss_forward" because="−inf stays in the table: NaN in the gradient beside it"
- emitted = log_probs.masked_fill(~inside[..., None], 0.0).clamp(min=never)
+ emitted = log_probs.masked_fill(~inside[..., None], 0.0)

# %% wrong="ctc_loss_forward" because="NaN past the end is multiplied away"
- emitted = log_probs.masked_fill(~inside[..., None], 0.0).clamp(min=never)
+ emitted = (log_probs * inside[..., None]).clamp(min=never)
- alpha = torch.where(inside[:, f, None], moved, alpha)
+ alpha = moved * inside[:, f, None] + alpha * ~inside[:, f, None]

# %% wrong="ctc_loss_forward" because="an empty table of targets is an error"
- longest = targets.shape[1]
+ longest = max(targets.shape[1], 1)

# %% wrong="ctc_loss_forward" because="probabilities, which underflow" base="underflow"
def ctc_loss_forward(log_probs, targets, input_lengths, target_lengths, blank=0):
    p = log_probs.exp()
    losses = []
    for b in range(len(targets)):
        states = [blank]
        for letter in targets[b, : int(target_lengths[b])].tolist():
            states += [letter, blank]
        size = len(states)
        alpha = [p[b, 0, states[s]] if s < 2 else p.new_zeros(()) for s in range(size)]
        for f in range(1, int(input_lengths[b])):
            new = []
            for s in range(size):
                total = alpha[s]
                if s >= 1:
                    total = total + alpha[s - 1]
                if s >= 2 and states[s] != blank and states[s] != states[s - 2]:
                    total = total + alpha[s - 2]
                new.append(total * p[b, f, states[s]])
            alpha = new
        losses.append(-(alpha[-1] + (alpha[-2] if size > 1 else 0)).log())
    return torch.stack(losses)

# %% wrong="ctc_loss_forward" because="the mean of the batch"
- return torch.where(loss > -never / 2, torch.inf, loss)
+ return torch.where(loss > -never / 2, torch.inf, loss).mean()

# %% wrong="ctc_loss_forward" because="divided by the target's length"
- return torch.where(loss > -never / 2, torch.inf, loss)
+ return torch.where(loss > -never / 2, torch.inf, loss) / target_lengths.clamp(min=1)

# %% wrong="ctc_loss_forward" because="the log-likelihood, not its negative"
- return torch.where(loss > -never / 2, torch.inf, loss)
+ return -torch.where(loss > -never / 2, torch.inf, loss)

# %% wrong="ctc_loss_forward" because="F.ctc_loss"
def ctc_loss_forward(log_probs, targets, input_lengths, target_lengths, blank=0):
    return F.ctc_loss(
        log_probs.transpose(0, 1), targets.clamp(min=0), input_lengths, target_lengths, blank, "none"
    )

# %% wrong="ctc_loss_forward" because="float64 goes through float32"
- emitted = log_probs.masked_fill(~inside[..., None], 0.0).clamp(min=never)
+ emitted = log_probs.float().masked_fill(~inside[..., None], 0.0).clamp(min=never)
- return torch.where(loss > -never / 2, torch.inf, loss)
+ return torch.where(loss > -never / 2, torch.inf, loss).to(log_probs.dtype)

# %% right="ctc_loss_forward" because="row by row, backwards, with logaddexp of masked states"
def ctc_loss_forward(log_probs, targets, input_lengths, target_lengths, blank=0):
    hopeless = -1e25
    losses = []
    for b, (frames, letters) in enumerate(zip(input_lengths.tolist(), target_lengths.tolist())):
        states = [blank]
        for letter in targets[b, :letters].tolist():
            states += [letter, blank]
        z = torch.tensor(states, device=log_probs.device)
        may = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        may[:-2] = (z[:-2] != blank) & (z[:-2] != z[2:])
        seen = log_probs[b, :frames][:, z].clamp(min=hopeless)
        beta = torch.full_like(seen[0], hopeless)
        beta = torch.cat([beta[:-2], seen[-1, -2:]]) if len(z) > 1 else seen[-1]
        for f in range(frames - 2, -1, -1):
            stay = beta
            one = torch.cat([beta[1:], beta.new_full((1,), hopeless)])
            two = torch.cat([beta[2:], beta.new_full((2,), hopeless)])[: len(z)]
            two = torch.where(may, two, torch.full_like(two, hopeless))
            beta = torch.logaddexp(torch.logaddexp(stay, one), two) + seen[f]
        total = beta[:2].logsumexp(0)
        losses.append(torch.where(total < hopeless / 2, torch.inf, -total))
    return torch.stack(losses)

# %% wrong="vector_quantize" because="no straight-through"
- return x + (q - x).detach(), codes, loss
+ return q, codes, loss

# %% wrong="vector_quantize" because="the straight-through gradient reaches the codebook too"
- return x + (q - x).detach(), codes, loss
+ return x - x.detach() + q, codes, loss

# %% wrong="vector_quantize" because="nothing passes"
- return x + (q - x).detach(), codes, loss
+ return q.detach(), codes, loss

# %% wrong="vector_quantize" because="beta on the codebook's term"
- loss = (x.detach() - q).square().mean() + beta * (x - q.detach()).square().mean()
+ loss = beta * (x.detach() - q).square().mean() + (x - q.detach()).square().mean()

# %% wrong="vector_quantize" because="nothing is detached in the loss"
- loss = (x.detach() - q).square().mean() + beta * (x - q.detach()).square().mean()
+ loss = (1 + beta) * (x - q).square().mean()

# %% wrong="vector_quantize" because="beta is always a quarter"
- loss = (x.detach() - q).square().mean() + beta * (x - q.detach()).square().mean()
+ loss = (x.detach() - q).square().mean() + 0.25 * (x - q.detach()).square().mean()

# %% wrong="vector_quantize" because="squared distances are summed over dim"
- loss = (x.detach() - q).square().mean() + beta * (x - q.detach()).square().mean()
+ loss = (x.detach() - q).square().sum(-1).mean() + beta * (x - q.detach()).square().sum(-1).mean()

# %% wrong="vector_quantize" because="the largest inner product"
- codes = gaps.square().sum(-1).argmin(-1)
+ codes = (x.detach() @ codebook.detach().T).argmax(-1)

# %% wrong="vector_quantize" because="the sum of absolute differences"
- codes = gaps.square().sum(-1).argmin(-1)
+ codes = gaps.abs().sum(-1).argmin(-1)

# %% wrong="vector_quantize" because="the expanded square, lost far from the origin"
- codes = gaps.square().sum(-1).argmin(-1)
+ e = codebook.detach()
+ codes = (e.square().sum(-1) - 2 * x.detach() @ e.T).argmin(-1)

# %% wrong="vector_quantize" because="torch.cdist, which multiplies matrices"
- codes = gaps.square().sum(-1).argmin(-1)
+ flat = x.detach().reshape(-1, x.shape[-1])
+ codes = torch.cdist(flat, codebook.detach()).argmin(-1).reshape(x.shape[:-1])

# %% wrong="vector_quantize" because="the highest index among equals"
- codes = gaps.square().sum(-1).argmin(-1)
+ codes = len(codebook) - 1 - gaps.square().sum(-1).flip(-1).argmin(-1)

# %% right="vector_quantize" because="a custom gradient, and a loop over entries"
def vector_quantize(x, codebook, beta=0.25):
    with torch.no_grad():
        best = torch.full(x.shape[:-1], math.inf, dtype=x.dtype, device=x.device)
        codes = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
        for k, entry in enumerate(codebook):
            distance = torch.linalg.vector_norm(x - entry, dim=-1)
            nearer = distance < best
            best, codes = torch.where(nearer, distance, best), torch.where(nearer, k, codes)

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, q):
            return q.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    chosen = F.embedding(codes, codebook)
    loss = F.mse_loss(chosen, x.detach()) + beta * F.mse_loss(x, chosen.detach())
    return Through.apply(x, chosen.detach()), codes, loss

# %% wrong="ema_codebook" because="decay and its complement exchanged"
- counts = decay * counts.detach() + (1 - decay) * chose.sum(0)
- sums = decay * sums.detach() + (1 - decay) * (chose.T @ vectors)
+ counts = (1 - decay) * counts.detach() + decay * chose.sum(0)
+ sums = (1 - decay) * sums.detach() + decay * (chose.T @ vectors)

# %% wrong="ema_codebook" because="means in place of sums"
- sums = decay * sums.detach() + (1 - decay) * (chose.T @ vectors)
+ sums = decay * sums.detach() + (1 - decay) * (chose.T @ vectors) / chose.sum(0).clamp(min=1)[:, None]

# %% wrong="ema_codebook" because="no smoothing"
- return sums / smoothed[:, None], counts, sums
+ return sums / counts[:, None], counts, sums

# %% wrong="ema_codebook" because="eps is only added"
- smoothed = (counts + eps) / (total + entries * eps) * total
+ smoothed = counts + eps

# %% wrong="ema_codebook" because="the total of the old counts"
- counts = decay * counts.detach() + (1 - decay) * chose.sum(0)
+ total = counts.sum()
+ counts = decay * counts.detach() + (1 - decay) * chose.sum(0)
- total = counts.sum()
- smoothed = (counts + eps) / (total + entries * eps) * total
+ smoothed = (counts + eps) / (total + entries * eps) * total

# %% wrong="ema_codebook" because="the counts come back smoothed"
- return sums / smoothed[:, None], counts, sums
+ return sums / smoothed[:, None], smoothed, sums

# %% wrong="ema_codebook" because="entries that nobody chose keep their counts"
- counts = decay * counts.detach() + (1 - decay) * chose.sum(0)
+ used = chose.sum(0) > 0
+ counts = torch.where(used, decay * counts.detach() + (1 - decay) * chose.sum(0), counts)

# %% wrong="ema_codebook" because="x's graph hangs on"
- vectors = x.detach().reshape(-1, x.shape[-1])
+ vectors = x.reshape(-1, x.shape[-1])

# %% right="ema_codebook" because="index_add"
def ema_codebook(counts, sums, x, codes, decay=0.99, eps=1e-5):
    with torch.no_grad():
        flat, where = x.reshape(-1, x.shape[-1]), codes.reshape(-1)
        n = torch.zeros_like(counts).index_add(0, where, torch.ones_like(flat[:, 0]))
        m = torch.zeros_like(sums).index_add(0, where, flat)
        counts = torch.lerp(n, counts, decay)
        sums = torch.lerp(m, sums, decay)
        share = (counts + eps) / (counts + eps).sum()
        return sums / (share * counts.sum())[:, None], counts, sums

# %% wrong="residual_vector_quantize" because="every stage quantizes x"
- entries, chosen, _ = vector_quantize(residual, codebook.detach())
+ entries, chosen, _ = vector_quantize(x.detach(), codebook.detach())

# %% wrong="residual_vector_quantize" because="the gradient passes once for each stage"
def residual_vector_quantize(x, codebooks):
    residual, codes, total = x, [], 0
    for codebook in codebooks:
        q, chosen, _ = vector_quantize(residual, codebook.detach())
        residual = residual - q.detach()
        total = total + q
        codes.append(chosen)
    return total, torch.stack(codes, -1)

# %% wrong="residual_vector_quantize" because="no gradient"
- return x + (total - x).detach(), torch.stack(codes, dim=-1)
+ return total, torch.stack(codes, dim=-1)

# %% wrong="residual_vector_quantize" because="the highest index among equals"
- entries, chosen, _ = vector_quantize(residual, codebook.detach())
+ entries, chosen, _ = vector_quantize(residual, codebook.detach().flip(0))
+ chosen = len(codebook) - 1 - chosen

# %% wrong="residual_vector_quantize" because="codes as float"
- return x + (total - x).detach(), torch.stack(codes, dim=-1)
+ return x + (total - x).detach(), torch.stack(codes, dim=-1).to(x)

# %% wrong="residual_vector_quantize" because="the last stage's entries only"
- total = x.detach() - residual  # the sum of the chosen entries
+ total = entries

# %% wrong="residual_vector_quantize" because="the residual in place of the sum"
- total = x.detach() - residual  # the sum of the chosen entries
+ total = residual

# %% wrong="residual_vector_quantize" because="stages first"
- return x + (total - x).detach(), torch.stack(codes, dim=-1)
+ return x + (total - x).detach(), torch.stack(codes, dim=0)

# %% wrong="residual_vector_quantize" because="the first codebook at every stage"
- entries, chosen, _ = vector_quantize(residual, codebook.detach())
+ entries, chosen, _ = vector_quantize(residual, codebooks[0].detach())

# %% wrong="residual_vector_quantize" because="the codebooks get gradients"
def residual_vector_quantize(x, codebooks):
    residual, codes, total = x.detach(), [], 0
    for codebook in codebooks:
        _, chosen, _ = vector_quantize(residual, codebook.detach())
        residual = residual - codebook.detach()[chosen]
        total = total + codebook[chosen]
        codes.append(chosen)
    return x - x.detach() + total, torch.stack(codes, -1)

# %% right="residual_vector_quantize" because="distances by hand; straight-through at every stage, which adds up to once"
def residual_vector_quantize(x, codebooks):
    residual, codes, parts = x, [], []
    for codebook in codebooks:
        gaps = residual.detach().unsqueeze(-2) - codebook.detach()
        codes.append(torch.linalg.vector_norm(gaps, dim=-1).argmin(-1))
        entry = codebook.detach()[codes[-1]]
        parts.append(residual + (entry - residual).detach())
        residual = residual - parts[-1]
    return sum(parts), torch.stack(codes, dim=-1)

# %% wrong="delay_pattern" because="shifted the other way"
- delayed[:, k, k : k + frames] = codes[:, k]
+ delayed[:, k, stages - 1 - k : stages - 1 - k + frames] = codes[:, k]

# %% wrong="delay_pattern" because="rolled, so that the end comes round"
def delay_pattern(codes, pad):
    stages = codes.shape[1]
    wide = F.pad(codes, (0, stages - 1), value=pad)
    return torch.stack([wide[:, k].roll(k + 1, -1) for k in range(stages)], dim=1)


def undo_delay(delayed):
    stages, steps = delayed.shape[1:]
    frames = steps - stages + 1
    if frames < 0:
        raise ValueError("too few steps")
    return torch.stack([delayed[:, k, k : k + frames] for k in range(stages)], dim=1)

# %% wrong="delay_pattern" because="cut off at the number of frames"
- return delayed
+ return delayed[..., :frames]

# %% wrong="delay_pattern" because="the holes are 0"
- delayed = codes.new_full((batch, stages, frames + stages - 1), pad)
+ delayed = codes.new_full((batch, stages, frames + stages - 1), 0)

# %% wrong="delay_pattern" because="int64 whatever is given"
- delayed = codes.new_full((batch, stages, frames + stages - 1), pad)
+ delayed = torch.full((batch, stages, frames + stages - 1), pad)

# %% wrong="delay_pattern" because="the way back drops what equals a hole"
- return torch.stack([delayed[:, k, k : k + frames] for k in range(stages)], dim=1)
+ back = torch.stack([delayed[:, k, k : k + frames] for k in range(stages)], dim=1)
+ return torch.where(back == delayed[:, -1:, :1], 0, back)

# %% wrong="delay_pattern" because="too few steps raise nothing"
- if frames < 0:
+ if frames < -99:

# %% wrong="delay_pattern" because="no frames raise an error"
- if frames < 0:
+ if frames <= 0:

# %% wrong="delay_pattern" because="a view of the codes"
- return delayed
+ return codes if stages == 1 else delayed

# %% wrong="delay_pattern" because="the way back is a view"
- return torch.stack([delayed[:, k, k : k + frames] for k in range(stages)], dim=1)
+ if stages == 1:
+     return delayed
+ return torch.stack([delayed[:, k, k : k + frames] for k in range(stages)], dim=1)

# %% right="delay_pattern" because="gather"
def delay_pattern(codes, pad):
    batch, stages, frames = codes.shape
    source = torch.arange(frames + stages - 1) - torch.arange(stages)[:, None]
    inside = (source >= 0) & (source < frames)
    if frames == 0:
        return torch.full((batch, stages, stages - 1), pad, dtype=codes.dtype)
    taken = codes.gather(2, source.clamp(0, frames - 1).expand(batch, -1, -1))
    return torch.where(inside, taken, torch.full_like(taken, pad))


def undo_delay(delayed):
    batch, stages, steps = delayed.shape
    if steps < stages - 1:
        raise ValueError("fewer steps than delays")
    source = torch.arange(steps - stages + 1) + torch.arange(stages)[:, None]
    return delayed.gather(2, source.expand(batch, -1, -1))

# %% wrong="tubelet_embed" because="channels last inside a tubelet"
- cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)  # places first, then what is inside of one
+ cut = cut.permute(0, 2, 4, 6, 3, 5, 7, 1)

# %% wrong="tubelet_embed" because="no permutation"
- cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)  # places first, then what is inside of one
+ cut = cut.reshape(batch, frames // t, height // h, width // w, channels, t, h, w)

# %% wrong="tubelet_embed" because="places column by column"
- cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)  # places first, then what is inside of one
+ cut = cut.permute(0, 2, 6, 4, 1, 3, 5, 7)

# %% wrong="tubelet_embed" because="no bias"
- return cut.flatten(4).flatten(2, 3) @ weight.reshape(dim, -1).T + bias
+ return cut.flatten(4).flatten(2, 3) @ weight.reshape(dim, -1).T

# %% wrong="tubelet_embed" because="what doesn't divide is cut off"
- if frames % t or height % h or width % w:
-     raise ValueError(f"tubelets {t}×{h}×{w} don't divide a video of {frames}×{height}×{width}")
+ video = video[:, :, : frames // t * t, : height // h * h, : width // w * w]

# %% wrong="tubelet_embed" because="frames are not asked whether they divide"
- if frames % t or height % h or width % w:
+ if height % h or width % w:
+     raise ValueError("pixels don't divide")
+ if frames % t:
+     video, frames = video[:, :, : frames // t * t], frames // t * t
+ if frames % t:

# %% wrong="tubelet_embed" because="a convolution"
def tubelet_embed(video, weight, bias):
    t, h, w = weight.shape[2:]
    if video.shape[2] % t or video.shape[3] % h or video.shape[4] % w:
        raise ValueError("no")
    return F.conv3d(video, weight, bias, stride=(t, h, w)).flatten(3).permute(0, 2, 3, 1)

# %% wrong="tubelet_embed" because="a convolution through torch.ops"
def tubelet_embed(video, weight, bias):
    t, h, w = weight.shape[2:]
    if video.shape[2] % t or video.shape[3] % h or video.shape[4] % w:
        raise ValueError("no")
    out = torch.ops.aten.convolution(
        video, weight, bias, [t, h, w], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1
    )
    return out.flatten(3).permute(0, 2, 3, 1)

# %% wrong="tubelet_embed" because="float32 whatever is given"
- return cut.flatten(4).flatten(2, 3) @ weight.reshape(dim, -1).T + bias
+ return cut.flatten(4).flatten(2, 3).float() @ weight.float().reshape(dim, -1).T + bias.float()

# %% wrong="tubelet_embed" because="the parameters get no gradient"
- return cut.flatten(4).flatten(2, 3) @ weight.reshape(dim, -1).T + bias
+ return cut.flatten(4).flatten(2, 3) @ weight.detach().reshape(dim, -1).T + bias.detach()

# %% right="tubelet_embed" because="unfold and einsum"
def tubelet_embed(video, weight, bias):
    t, h, w = weight.shape[2:]
    for length, side in zip(video.shape[2:], (t, h, w)):
        if length % side:
            raise ValueError(f"{side} doesn't divide {length}")
    pieces = video.unfold(2, t, t).unfold(3, h, h).unfold(4, w, w)
    return (torch.einsum("bcTHWthw,dcthw->bTHWd", pieces, weight) + bias).flatten(2, 3)

# %% wrong="factorized_attention" because="reshape where a transpose is needed"
- places = x.transpose(1, 2)  # (batch, space, time, dim)
+ places = x.reshape(batch, space, time, dim)
- return x + along.transpose(1, 2)
+ return x + along.reshape(x.shape)

# %% wrong="factorized_attention" because="not transposed back"
- return x + along.transpose(1, 2)
+ return x + along.reshape(x.shape)

# %% wrong="factorized_attention" because="time sees x, not the sum"
- x = x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)
- places = x.transpose(1, 2)  # (batch, space, time, dim)
+ places = x.transpose(1, 2)  # (batch, space, time, dim)
+ x = x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)

# %% wrong="factorized_attention" because="time first"
def factorized_attention(x, spatial, temporal):
    batch, time, space, dim = x.shape
    places = x.transpose(1, 2)
    along = temporal(places.reshape(batch * space, time, dim)).reshape(places.shape)
    x = x + along.transpose(1, 2)
    return x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)

# %% wrong="factorized_attention" because="no residual"
- return x + along.transpose(1, 2)
+ return along.transpose(1, 2)

# %% wrong="factorized_attention" because="no residual of the first"
- x = x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)
+ x = spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)

# %% wrong="factorized_attention" because="all tokens of a video in one row"
- x = x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)
+ x = x + spatial(x.reshape(batch, time * space, dim)).reshape(x.shape)

# %% wrong="factorized_attention" because="places of different videos in one row"
- places = x.transpose(1, 2)  # (batch, space, time, dim)
- along = temporal(places.reshape(batch * space, time, dim)).reshape(places.shape)
- return x + along.transpose(1, 2)
+ places = x.permute(2, 0, 1, 3)
+ along = temporal(places.reshape(space, batch * time, dim)).reshape(places.shape)
+ return x + along.permute(1, 2, 0, 3)

# %% wrong="factorized_attention" because="time runs backwards"
- along = temporal(places.reshape(batch * space, time, dim)).reshape(places.shape)
+ along = temporal(places.reshape(batch * space, time, dim).flip(1)).reshape(places.shape).flip(2)

# %% wrong="factorized_attention" because="one call a frame"
- x = x + spatial(x.reshape(batch * time, space, dim)).reshape(x.shape)
+ x = x + torch.stack([spatial(x[:, t]) for t in range(time)], dim=1)

# %% right="factorized_attention" because="rows in another order"
def factorized_attention(x, spatial, temporal):
    batch, time, space, dim = x.shape
    frames = x.transpose(0, 1).flatten(0, 1)
    x = x + spatial(frames).unflatten(0, (time, batch)).transpose(0, 1)
    rows = x.permute(2, 0, 1, 3).flatten(0, 1)
    return x + temporal(rows).unflatten(0, (space, batch)).permute(1, 2, 0, 3)

# %% wrong="flow_matching_loss" because="the way back: noise minus data"
- return (predicted - (pictures - noise)).square().mean()
+ return (predicted - (noise - pictures)).square().mean()

# %% wrong="flow_matching_loss" because="noise at t = 1"
- predicted = velocity((1 - s) * noise + s * pictures, t, labels)
- return (predicted - (pictures - noise)).square().mean()
+ predicted = velocity((1 - s) * pictures + s * noise, t, labels)
+ return (predicted - (noise - pictures)).square().mean()

# %% wrong="flow_matching_loss" because="one time for the batch"
- t = torch.rand(len(pictures), generator=generator, dtype=pictures.dtype).to(pictures.device)
+ t = torch.rand(1, generator=generator, dtype=pictures.dtype).expand(len(pictures))

# %% wrong="flow_matching_loss" because="one noise for the batch"
- noise = torch.randn(pictures.shape, generator=generator, dtype=pictures.dtype)
+ noise = torch.randn(pictures.shape[1:], generator=generator, dtype=pictures.dtype)
+ noise = noise.expand(pictures.shape)

# %% wrong="flow_matching_loss" because="uniform noise"
- noise = torch.randn(pictures.shape, generator=generator, dtype=pictures.dtype)
+ noise = torch.rand(pictures.shape, generator=generator, dtype=pictures.dtype) * 2 - 1

# %% wrong="flow_matching_loss" because="the global generator"
- noise = torch.randn(pictures.shape, generator=generator, dtype=pictures.dtype)
+ noise = torch.randn_like(pictures)

# %% wrong="flow_matching_loss" because="a sum in place of a mean"
- return (predicted - (pictures - noise)).square().mean()
+ return (predicted - (pictures - noise)).square().sum()

# %% wrong="flow_matching_loss" because="the mean over rows of the sums"
- return (predicted - (pictures - noise)).square().mean()
+ return (predicted - (pictures - noise)).square().flatten(1).sum(1).mean()

# %% wrong="flow_matching_loss" because="the data as target"
- return (predicted - (pictures - noise)).square().mean()
+ return (predicted - pictures).square().mean()

# %% wrong="flow_matching_loss" because="the absolute error"
- return (predicted - (pictures - noise)).square().mean()
+ return (predicted - (pictures - noise)).abs().mean()

# %% wrong="flow_matching_loss" because="a time with the picture's axes"
- predicted = velocity((1 - s) * noise + s * pictures, t, labels)
+ predicted = velocity((1 - s) * noise + s * pictures, s, labels)

# %% wrong="flow_matching_loss" because="labels are not handed on"
- predicted = velocity((1 - s) * noise + s * pictures, t, labels)
+ predicted = velocity((1 - s) * noise + s * pictures, t, torch.zeros_like(labels))

# %% wrong="flow_matching_loss" because="noise and times in float32"
- noise = torch.randn(pictures.shape, generator=generator, dtype=pictures.dtype)
+ pictures = pictures.float()
+ noise = torch.randn(pictures.shape, generator=generator, dtype=pictures.dtype)

# %% wrong="flow_matching_loss" because="times near the middle are likelier"
- t = torch.rand(len(pictures), generator=generator, dtype=pictures.dtype).to(pictures.device)
+ t = torch.randn(len(pictures), generator=generator, dtype=pictures.dtype).sigmoid()

# %% wrong="flow_matching_loss" because="no gradient"
- predicted = velocity((1 - s) * noise + s * pictures, t, labels)
+ predicted = velocity((1 - s) * noise + s * pictures, t, labels).detach()

# %% right="flow_matching_loss" because="times first, and lerp"
def flow_matching_loss(velocity, pictures, labels, generator):
    t = torch.empty(len(pictures), dtype=pictures.dtype).uniform_(0, 1, generator=generator)
    noise = torch.empty(pictures.shape, dtype=pictures.dtype).normal_(generator=generator)
    t, noise = t.to(pictures.device), noise.to(pictures.device)
    weight = t.view(-1, *(1 for _ in pictures.shape[1:])).expand_as(pictures)
    return F.mse_loss(velocity(torch.lerp(noise, pictures, weight), t, labels), pictures - noise)

# %% wrong="sample_euler" because="from 1 to 0"
- t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
- x = x + velocity(x, t, labels) / steps
+ t = torch.full((len(x),), 1 - i / steps, dtype=x.dtype, device=x.device)
+ x = x - velocity(x, t, labels) / steps

# %% wrong="sample_euler" because="the time at the end of a step"
- t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
+ t = torch.full((len(x),), (i + 1) / steps, dtype=x.dtype, device=x.device)

# %% wrong="sample_euler" because="the time at the middle of a step"
- t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
+ t = torch.full((len(x),), (i + 0.5) / steps, dtype=x.dtype, device=x.device)

# %% wrong="sample_euler" because="times from 0 to 1, both included"
- t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
+ t = torch.full((len(x),), i / max(steps - 1, 1), dtype=x.dtype, device=x.device)

# %% wrong="sample_euler" because="steps of 1"
- x = x + velocity(x, t, labels) / steps
+ x = x + velocity(x, t, labels)

# %% wrong="sample_euler" because="one step too many"
- for i in range(steps):
+ for i in range(steps + 1):

# %% wrong="sample_euler" because="the time adds up and stays below 1, so 11 calls for 10 steps"
- for i in range(steps):
-     t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
-     x = x + velocity(x, t, labels) / steps
+ now = 0.0
+ while now < 1:
+     t = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
+     x = x + velocity(x, t, labels) / steps
+     now += 1 / steps

# %% wrong="sample_euler" because="the last step is lost where the time adds up to too much"
- for i in range(steps):
-     t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
-     x = x + velocity(x, t, labels) / steps
+ now, size = 0.0, 1 / steps
+ while now <= 1 - size:
+     t = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
+     x = x + velocity(x, t, labels) / steps
+     now += size

# %% wrong="sample_euler" because="arange with a rounded step: 50 times for 49 steps"
- for i in range(steps):
-     t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
+ for now in torch.arange(0, 1, 1 / steps, dtype=x.dtype):
+     t = now.to(x.device).expand(len(x))

# %% right="sample_euler" because="the time adds up, the steps are counted"
@torch.no_grad()
def sample_euler(velocity, noise, labels, steps):
    x, t = noise.clone(), torch.zeros(len(noise), dtype=noise.dtype, device=noise.device)
    for _ in range(steps):
        x = x + velocity(x, t, labels) / steps
        t = t + 1 / steps
    return x

# %% wrong="sample_euler" because="the velocity at the start, throughout"
- x = x + velocity(x, t, labels) / steps
+ x = x + velocity(noise, t, labels) / steps

# %% wrong="sample_euler" because="with a graph"
- with torch.no_grad():
+ if True:

# %% wrong="sample_euler" because="the noise is changed"
- x = x + velocity(x, t, labels) / steps
+ x += velocity(x, t, labels) / steps

# %% wrong="sample_euler" because="gradients stay switched off"
- with torch.no_grad():
+ torch.set_grad_enabled(False)
+ if True:

# %% wrong="sample_euler" because="a time for all rows"
- t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
+ t = torch.full((1,), i / steps, dtype=x.dtype, device=x.device)

# %% wrong="sample_euler" because="bfloat16 becomes float32"
- t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
+ t = torch.full((len(x),), i / steps, dtype=torch.promote_types(x.dtype, torch.float32))

# %% wrong="sample_euler" because="Heun's method, twice the calls"
- x = x + velocity(x, t, labels) / steps
+ v = velocity(x, t, labels)
+ x = x + (v + velocity(x + v / steps, t + 1 / steps, labels)) / (2 * steps)

# %% right="sample_euler" because="accumulated times of a linspace, and a decorator"
@torch.no_grad()
def sample_euler(velocity, noise, labels, steps):
    x = noise.clone()
    for start in torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1].tolist():
        x = torch.add(x, velocity(x, x.new_full((x.shape[0],), start), labels), alpha=1 / steps)
    return x

# %% wrong="dit_block" because="modulation starts at random"
- nn.init.zeros_(self.modulation.weight)
- nn.init.zeros_(self.modulation.bias)
+ pass

# %% wrong="dit_block" because="modulation's bias starts at random"
- nn.init.zeros_(self.modulation.bias)
+ pass

# %% wrong="dit_block" because="every weight starts at zero"
- nn.init.zeros_(self.modulation.weight)
- nn.init.zeros_(self.modulation.bias)
+ for p in self.parameters():
+     nn.init.zeros_(p)

# %% wrong="dit_block" because="scale before shift"
- modulated = self.modulation(F.silu(c))[:, None]
+ modulated = self.modulation(F.silu(c))[:, None].unflatten(-1, (6, -1))[..., [1, 0, 2, 4, 3, 5], :].flatten(-2)

# %% wrong="dit_block" because="gates first"
- modulated = self.modulation(F.silu(c))[:, None]
+ modulated = self.modulation(F.silu(c))[:, None].unflatten(-1, (6, -1))[..., [1, 2, 0, 4, 5, 3], :].flatten(-2)

# %% wrong="dit_block" because="the scale is not around 1"
- steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
+ steered = F.layer_norm(x, (dim,), eps=1e-6) * scale1 + shift1

# %% wrong="dit_block" because="gates of 1 + gate"
- x = x + gate1 * self.proj(mixed)
+ x = x + (1 + gate1) * self.proj(mixed)

# %% wrong="dit_block" because="no gate on the MLP"
- return x + gate2 * self.mlp(steered)
+ return x + self.mlp(steered)

# %% wrong="dit_block" because="no activation of c"
- modulated = self.modulation(F.silu(c))[:, None]
+ modulated = self.modulation(c)[:, None]

# %% wrong="dit_block" because="no norm before the MLP"
- steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
+ steered = x * (1 + scale2) + shift2

# %% wrong="dit_block" because="eps of 1e-5"
- steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
+ steered = F.layer_norm(x, (dim,), eps=1e-5) * (1 + scale1) + shift1

# %% wrong="dit_block" because="causal"
- mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
+ mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

# %% wrong="dit_block" because="one head"
- q, k, v = self.qkv(steered).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
+ q, k, v = self.qkv(steered).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)

# %% wrong="dit_block" because="queries, keys and values interleaved by head"
- q, k, v = self.qkv(steered).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
+ q, k, v = self.qkv(steered).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)

# %% wrong="dit_block" because="heads are not put back in order"
- mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
+ mixed = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)

# %% wrong="dit_block" because="both branches side by side"
- steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
+ given = x
+ steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
- steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
+ steered = F.layer_norm(given, (dim,), eps=1e-6) * (1 + scale2) + shift2

# %% wrong="dit_block" because="the attention's three for both"
- steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
- return x + gate2 * self.mlp(steered)
+ steered = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
+ return x + gate1 * self.mlp(steered)

# %% wrong="dit_block" because="no projection"
- x = x + gate1 * self.proj(mixed)
+ x = x + gate1 * mixed

# %% wrong="dit_block" because="float32 whatever is given"
- return x + gate2 * self.mlp(steered)
+ return (x + gate2 * self.mlp(steered)).float()

# %% right="dit_block" because="softmax by hand"
class DiTBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)
        with torch.no_grad():
            self.modulation.weight.mul_(0)
            self.modulation.bias.mul_(0)

    def attend(self, x):
        batch, tokens, dim = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, dim // self.heads) for part in self.qkv(x).chunk(3, -1)
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(dim // self.heads)
        return self.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(x.shape))

    def forward(self, x, c):
        dim = x.shape[-1]
        six = self.modulation(c * torch.sigmoid(c)).unsqueeze(1).split(dim, dim=-1)
        for branch, (shift, scale, gate) in ((self.attend, six[:3]), (self.mlp, six[3:])):
            mean = x.mean(-1, keepdim=True)
            normed = (x - mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
            x = x + gate * branch(normed + normed * scale + shift)
        return x

# %% wrong="masked_diffusion_loss" because="no 1/t"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return surprise.masked_fill(~hidden, 0.0).sum() / tokens.numel()

# %% wrong="masked_diffusion_loss" because="the mean over masked tokens"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return surprise.masked_fill(~hidden, 0.0).sum() / hidden.sum().clamp(min=1)

# %% wrong="masked_diffusion_loss" because="1/t and the mean over masked tokens"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / hidden.sum().clamp(min=1)

# %% wrong="masked_diffusion_loss" because="all tokens count"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return (surprise / t[:, None].to(wide)).sum() / tokens.numel()

# %% wrong="masked_diffusion_loss" because="the tokens that are not masked count"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return (surprise.masked_fill(hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()

# %% wrong="masked_diffusion_loss" because="1 − t is the share of masks"
- hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
+ hidden = torch.rand(tokens.shape, generator=generator) >= t[:, None]

# %% wrong="masked_diffusion_loss" because="the first row's t for all"
- hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
+ t = t[:1].expand(len(t))
+ hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]

# %% wrong="masked_diffusion_loss" because="one mask for all rows"
- hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
+ hidden = torch.rand(tokens.shape[1:], generator=generator) < t[:, None]

# %% wrong="masked_diffusion_loss" because="a fixed number of masks"
- hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
+ length = tokens.shape[1]
+ rank = torch.rand(tokens.shape, generator=generator).argsort(1).argsort(1)
+ hidden = rank < (t[:, None] * length).round().clamp(min=1)

# %% wrong="masked_diffusion_loss" because="the global generator"
- hidden = torch.rand(tokens.shape, generator=generator) < t[:, None]
+ hidden = torch.rand(tokens.shape) < t[:, None]

# %% wrong="masked_diffusion_loss" because="shifted by one"
- surprise = -log_p.gather(-1, tokens[..., None])[..., 0]
+ surprise = F.pad(-log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0], (1, 0))

# %% wrong="masked_diffusion_loss" because="the masked tokens as targets"
- surprise = -log_p.gather(-1, tokens[..., None])[..., 0]
+ surprise = -log_p.gather(-1, tokens.masked_fill(hidden, mask_id)[..., None])[..., 0]

# %% wrong="masked_diffusion_loss" because="0 · inf is NaN"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return (surprise * hidden / t[:, None].to(wide)).sum() / tokens.numel()

# %% wrong="masked_diffusion_loss" because="half precision is not widened"
- wide = torch.promote_types(logits.dtype, torch.float32)
+ wide = logits.dtype

# %% wrong="masked_diffusion_loss" because="float64 goes through float32"
- wide = torch.promote_types(logits.dtype, torch.float32)
+ wide = torch.float32

# %% wrong="masked_diffusion_loss" because="t decides the format"
- return (surprise.masked_fill(~hidden, 0.0) / t[:, None].to(wide)).sum() / tokens.numel()
+ return (surprise.masked_fill(~hidden, 0.0).to(t.dtype) / t[:, None]).sum() / tokens.numel()

# %% wrong="masked_diffusion_loss" because="tokens are masked in place"
- logits = model(tokens.masked_fill(hidden, mask_id))
+ kept = tokens.clone()
+ logits = model(tokens.masked_fill_(hidden, mask_id))
+ tokens = kept

# %% wrong="masked_diffusion_loss" because="the log-likelihood"
- surprise = -log_p.gather(-1, tokens[..., None])[..., 0]
+ surprise = log_p.gather(-1, tokens[..., None])[..., 0]

# %% right="masked_diffusion_loss" because="only the masked places are looked at"
def masked_diffusion_loss(model, tokens, t, mask_id, generator):
    chance = t.to(torch.float64)[:, None].expand(tokens.shape)
    hidden = torch.bernoulli(chance, generator=generator).bool()
    logits = model(torch.where(hidden, mask_id, tokens))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    nats = F.cross_entropy(logits[hidden], tokens[hidden], reduction="none")
    weight = (1 / chance[hidden]).to(logits.dtype)
    return (nats * weight).sum() / (tokens.shape[0] * tokens.shape[1])

# %% wrong="exact_bound" because="all sets alike"
- total = total + nats / (m * math.comb(length, m))
+ total = total + nats / (2**length - 1)

# %% wrong="exact_bound" because="no 1/m"
- total = total + nats / (m * math.comb(length, m))
+ total = total + nats / math.comb(length, m)

# %% wrong="exact_bound" because="no binomial coefficient"
- total = total + nats / (m * math.comb(length, m))
+ total = total + nats / m

# %% wrong="exact_bound" because="nats a token"
- return total
+ return total / length

# %% wrong="exact_bound" because="left to right only"
def exact_bound(model, tokens, mask_id):
    total = 0.0
    for i in range(tokens.shape[1]):
        inputs = tokens.clone()
        inputs[:, i:] = mask_id
        total = total - model(inputs).log_softmax(-1)[:, i].gather(-1, tokens[:, i, None])[:, 0]
    return total

# %% wrong="exact_bound" because="pseudo-likelihood: one mask at a time"
- for m in range(1, length + 1):
+ for m in range(1, 2):

# %% wrong="exact_bound" because="without the set of all places"
- for m in range(1, length + 1):
+ for m in range(1, max(length, 2)):

# %% wrong="exact_bound" because="all places count, masked or not"
- nats = -log_p.gather(-1, tokens[..., None])[..., 0][:, list(places)].sum(1)
+ nats = -log_p.gather(-1, tokens[..., None])[..., 0].sum(1)

# %% wrong="exact_bound" because="the mean of the batch"
- return total
+ return total.mean().expand(len(tokens))

# %% wrong="exact_bound" because="no gradient"
- log_p = model(inputs).log_softmax(-1)
+ log_p = model(inputs).detach().log_softmax(-1)

# %% wrong="exact_bound" because="float64 goes through float32"
- log_p = model(inputs).log_softmax(-1)
+ log_p = model(inputs).float().log_softmax(-1).to(model(inputs).dtype)

# %% wrong="exact_bound" because="the log-likelihood"
- return total
+ return -total

# %% right="exact_bound" because="one cross-entropy for all sets, weights by the beta function"
def exact_bound(model, tokens, mask_id):
    batch, length = tokens.shape
    sets = torch.tensor(list(itertools.product((False, True), repeat=length))[1:])
    rows = tokens[:, None].expand(-1, len(sets), -1)
    logits = torch.stack([model(tokens.masked_fill(s, mask_id)) for s in sets], dim=1).flatten(0, 1)
    nats = F.cross_entropy(logits.transpose(1, 2), rows.flatten(0, 1), reduction="none")
    nats = torch.where(sets, nats.unflatten(0, (batch, -1)), 0.0).sum(-1)
    m = sets.sum(1).double()
    weight = (torch.lgamma(m) + torch.lgamma(length - m + 1) - math.lgamma(length + 1)).exp()
    return (nats * weight.to(nats)).sum(1)

# %% right="exact_bound" because="the mean over all orders"
def exact_bound(model, tokens, mask_id):
    orders = list(itertools.permutations(range(tokens.shape[1])))
    if len(orders) > 200:
        raise ValueError("too long for this way")
    total = 0.0
    for order in orders:
        inputs = torch.full_like(tokens, mask_id)
        for place in order:
            log_p = model(inputs)[:, place].log_softmax(-1)
            total = total - log_p.gather(1, tokens[:, place : place + 1])[:, 0] / len(orders)
            inputs = inputs.clone()
            inputs[:, place] = tokens[:, place]
    return total

# %% wrong="exact_bound" because="places that are seen are multiplied by 0, which is NaN where they have probability 0"
- nats = -log_p.gather(-1, tokens[..., None])[..., 0][:, list(places)].sum(1)
+ hidden = torch.zeros(length).index_fill(0, torch.tensor(places), 1.0)
+ nats = (-log_p.gather(-1, tokens[..., None])[..., 0] * hidden.to(log_p)).sum(1)

# %% wrong="sample_masked" because="always random"
- if remasking == "random":
+ if True:

# %% wrong="sample_masked" because="always low confidence"
- if remasking == "random":
+ if False:

# %% wrong="sample_masked" because="the least sure are kept"
- rank = p.gather(-1, drawn[..., None])[..., 0]
+ rank = 1 - p.gather(-1, drawn[..., None])[..., 0]

# %% wrong="sample_masked" because="the likeliest token's probability, not the drawn one's"
- rank = p.gather(-1, drawn[..., None])[..., 0]
+ rank = p.amax(-1)

# %% wrong="sample_masked" because="the likeliest token, not a draw"
- drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(tokens.shape)
+ drawn = p.argmax(-1)

# %% wrong="sample_masked" because="the mask can be drawn"
- p = logits.masked_fill(never, -torch.inf).softmax(-1)
+ p = logits.softmax(-1)

# %% wrong="sample_masked" because="the prompt is written over"
- tokens = torch.where(best & hidden, drawn, tokens)
+ tokens = torch.where(best, drawn, tokens)
- order = rank.masked_fill(~hidden, -1.0).argsort(dim=1, descending=True, stable=True)
+ order = rank.argsort(dim=1, descending=True, stable=True)

# %% wrong="sample_masked" because="the first row's number of masks for all"
- keep = outset // steps + (s < outset % steps)
+ keep = (outset // steps + (s < outset % steps))[:1].expand(len(outset))

# %% wrong="sample_masked" because="the rest all at the end"
- keep = outset // steps + (s < outset % steps)
+ keep = outset // steps + (s == steps - 1) * (outset % steps)

# %% wrong="sample_masked" because="from left to right"
- rank = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
+ rank = -torch.arange(tokens.shape[1], dtype=torch.float64).expand(tokens.shape) + 99

# %% wrong="sample_masked" because="all rows in one random order"
- rank = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
+ rank = torch.rand(tokens.shape[1], generator=generator, dtype=torch.float64).expand(tokens.shape)

# %% wrong="sample_masked" because="one call of the model for all steps"
def sample_masked(model, tokens, mask_id, steps, generator, remasking="random"):
    if remasking not in ("random", "low_confidence"):
        raise ValueError("no")
    with torch.no_grad():
        p = model(tokens).double()
    p = p.masked_fill(torch.arange(p.shape[-1]) == mask_id, -torch.inf).softmax(-1)
    drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(tokens.shape)
    return torch.where(tokens == mask_id, drawn, tokens)

# %% wrong="sample_masked" because="the tokens are changed"
- tokens = tokens.clone()
+ given = tokens
- tokens = torch.where(best & hidden, drawn, tokens)
+ tokens = given.copy_(torch.where(best & hidden, drawn, tokens))

# %% wrong="sample_masked" because="confidence by a softmax that counts the mask"
- rank = p.gather(-1, drawn[..., None])[..., 0]
+ rank = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]

# %% wrong="sample_masked" because="any word will do"
- if remasking not in ("random", "low_confidence"):
+ if remasking == "":

# %% wrong="sample_masked" because="an unknown word is noticed only after the model was called"
- if remasking not in ("random", "low_confidence"):
-     raise ValueError(f"remasking is 'random' or 'low_confidence', not {remasking!r}")
- tokens = tokens.clone()
+ tokens = tokens.clone()
- else:
-     rank = p.gather(-1, drawn[..., None])[..., 0]
+ elif remasking == "low_confidence":
+     rank = p.gather(-1, drawn[..., None])[..., 0]
+ else:
+     raise ValueError(remasking)

# %% wrong="sample_masked" because="ties go to the right"
- order = rank.masked_fill(~hidden, -1.0).argsort(dim=1, descending=True, stable=True)
+ order = rank.masked_fill(~hidden, -1.0).flip(1).argsort(dim=1, descending=True, stable=True)
+ order = tokens.shape[1] - 1 - order

# %% wrong="sample_masked" because="the global generator draws the tokens"
- drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(tokens.shape)
+ drawn = torch.multinomial(p.flatten(0, 1), 1).reshape(tokens.shape)

# %% right="sample_masked" because="row by row, with Gumbel noise"
@torch.no_grad()
def sample_masked(model, tokens, mask_id, steps, generator, remasking="random"):
    if remasking != "random" and remasking != "low_confidence":
        raise ValueError(remasking)
    tokens = tokens.clone()
    quota = []
    for row in tokens:
        n = int((row == mask_id).sum())
        quota.append([n // steps + (1 if s < n % steps else 0) for s in range(steps)])
    for s in range(steps):
        logits = model(tokens.clone()).to(torch.float64)
        logits = logits.clone()
        logits[..., mask_id] = -torch.inf
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        drawn = (logits.log_softmax(-1) + noise).argmax(-1)
        sure = logits.softmax(-1)
        for b in range(len(tokens)):
            places = (tokens[b] == mask_id).nonzero()[:, 0].tolist()
            if remasking == "random":
                order = torch.randperm(len(places), generator=generator).tolist()
                places = [places[i] for i in order]
            else:
                places.sort(key=lambda i: -float(sure[b, i, drawn[b, i]]))
            for i in places[: quota[b][s]]:
                tokens[b, i] = drawn[b, i]
    return tokens

# %% wrong="questions" because="the usual slips"
def questions():
    return {
        "positions": 1200,
        "frames": 7,
        "bitrate": 307.2,
        "delay": 2000,
        "scores": 32.0,
        "velocity": 0.4,
        "weight": 0.1,
    }

# %% wrong="questions" because="one position and one frame too many: whole numbers are exact"
- "positions": 12 * 8_000 / 80 / 4,
+ "positions": (12 * 8_000 / 80 + 1) // 4 + 1,
- "delay": 10 * 50 + 4 - 1,
+ "delay": 10 * 50 + 4 - 2,

# %% wrong="questions" because="one question is not answered"
- "delay": 10 * 50 + 4 - 1,

# %% wrong="questions" because="a stride, the start token, σ for its square"
- "positions": 12 * 8_000 / 80 / 4,
+ "positions": 12 * 8_000 / 80 / 2,
- "delay": 10 * 50 + 4 - 1,
+ "delay": 10 * 50 + 4,
- "velocity": 2 + slope * (3 - t * 2),
+ "velocity": 2 + (0.25 - 0.5) / 0.375 * 2,

# %% right="questions" because="numbers"
def questions():
    return {
        "positions": 300,
        "frames": 9,
        "bitrate": 1.65,
        "delay": 503,
        "scores": 27.51,
        "velocity": -0.4,
        "weight": 0.05,
    }
