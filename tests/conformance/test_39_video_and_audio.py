"""Lesson 39 against torch.stft, F.ctc_loss, transformers (Whisper's features, EnCodec's and Mimi's quantizers,
MusicGen's delay, ViViT's tubelets, BERT) and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llm40  # noqa: F401  before transformers, which imports Triton

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("39")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x.resolve_conj().contiguous())


# --- spectrograms ---


@pytest.mark.parametrize(("n_fft", "hop"), [(400, 160), (512, 100), (25, 10)])
def test_stft(lesson, agrees, n_fft, hop):
    x, window = randn(2, 3000, seed=1), torch.hann_window(n_fft, dtype=torch.float64)
    theirs = torch.stft(x, n_fft, hop, window=window, return_complex=True)
    agrees("stft", "torch.stft", real(lesson.stft(x, window, hop)), real(theirs), 1e-12)


@pytest.mark.parametrize(
    ("n_mels", "n_fft", "rate", "low", "high", "area"),
    [
        (80, 400, 16_000, 0.0, 8000.0, True),
        (128, 400, 16_000, 0.0, 8000.0, True),
        (40, 1024, 22_050, 50.0, 7600.0, False),
    ],
)
def test_mel_filterbank(lesson, agrees, n_mels, n_fft, rate, low, high, area):
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(
        n_fft // 2 + 1, n_mels, low, high, rate, norm="slaney" if area else None, mel_scale="slaney"
    )
    agrees(
        "mel_filterbank",
        "transformers mel_filter_bank, slaney",
        lesson.mel_filterbank(n_mels, n_fft, rate, low, high, area),
        torch.tensor(theirs.T),
        1e-7,
    )


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("path", ["numpy", "torch"])
def test_log_mel(lesson, agrees, n_mels, path):
    """Both of transformers' ways to Whisper's features, on a batch of a loud and a soft sound."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
    noise = 0.01 * torch.randn(16_000, generator=generator(2))
    loud = lesson.vowel("a", 120, 1.0) + noise
    batch = torch.stack([loud, 1e-3 * lesson.chirp(100, 7000, 1.0)]).float()
    sounds = batch.numpy()
    if path == "numpy":
        theirs = extractor._np_extract_fbank_features(sounds, "cpu")
    else:
        theirs = extractor._torch_extract_fbank_features(sounds, "cpu")
    agrees(
        "log_mel",
        f"transformers WhisperFeatureExtractor, {path}",
        lesson.log_mel(batch, n_mels),
        torch.tensor(np.asarray(theirs)),
        2e-5,
    )


def test_the_stem_halves_the_frame_rate(lesson):
    """As WhisperEncoder's: 3000 frames become 1500 positions, and its sinusoids are the lesson's."""
    from transformers.models.whisper.modeling_whisper import sinusoids

    encoder = lesson.AudioEncoder(80, 16)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 80, 3000)).shape == (1, 1500, 16)
    torch.testing.assert_close(lesson.waves(torch.arange(1500), 16), sinusoids(1500, 16), rtol=1e-4, atol=1e-4)


# --- CTC ---


def test_ctc(lesson, agrees):
    logits = randn(6, 50, 9, seed=3).requires_grad_()
    targets = torch.randint(1, 9, (6, 12), generator=generator(4))
    targets[0, :6] = 4
    n, m = torch.tensor([50, 50, 33, 20, 50, 8]), torch.tensor([12, 1, 7, 5, 0, 3])
    mine = lesson.ctc_loss_forward(logits.log_softmax(-1), targets, n, m)
    theirs = F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), targets, n, m, reduction="none")
    agrees("ctc_loss_forward", "F.ctc_loss", mine, theirs, 1e-12)
    for a, b in zip(torch.autograd.grad(mine.sum(), logits), torch.autograd.grad(theirs.sum(), logits), strict=True):
        agrees("ctc_loss_forward, gradient at the logits", "F.ctc_loss", a, b, 1e-10)
    # F.ctc_loss(reduction="mean") divides each loss by its target's length first.
    several = m > 0
    mean = F.ctc_loss(logits.log_softmax(-1).transpose(0, 1)[:, several], targets[several], n[several], m[several])
    agrees("ctc_loss_forward / lengths, averaged", "F.ctc_loss, mean", (mine[several] / m[several]).mean(), mean, 1e-12)


def test_ctc_of_a_speech_model(lesson, agrees):
    """The loss of transformers' Wav2Vec2ForCTC, whose padding of labels is −100."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        ctc_loss_reduction="sum",
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    labels = torch.tensor([[1, 2, 2, 5], [3, 6, -100, -100]])
    with torch.no_grad():
        out = model(torch.randn(2, 800, generator=generator(5)), labels=labels)
    frames = torch.full((2,), out.logits.shape[1])
    mine = lesson.ctc_loss_forward(out.logits.log_softmax(-1), labels, frames, (labels >= 0).sum(1)).sum()
    agrees("ctc_loss_forward, summed", "transformers Wav2Vec2ForCTC", mine, out.loss, 1e-6)


# --- codebooks ---


def encodec(books: list[torch.Tensor]) -> nn.Module:
    from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

    size, dim = books[0].shape
    config = transformers.EncodecConfig(codebook_size=size, codebook_dim=dim, hidden_size=dim)
    theirs = EncodecResidualVectorQuantizer(config).double()
    for layer, book in zip(theirs.layers, books, strict=False):
        layer.codebook.embed = book.clone()
    return theirs


def mimi(books: list[torch.Tensor], counts: torch.Tensor | None = None) -> nn.Module:
    from transformers.models.mimi.modeling_mimi import MimiResidualVectorQuantizer

    size, dim = books[0].shape
    config = transformers.MimiConfig(
        codebook_size=size, codebook_dim=dim, vector_quantization_hidden_dimension=dim, hidden_size=dim
    )
    theirs = MimiResidualVectorQuantizer(config, len(books)).double()
    for layer, book in zip(theirs.layers, books, strict=True):
        usage = torch.ones(size, dtype=torch.float64) if counts is None else counts
        layer.codebook.cluster_usage, layer.codebook.embed_sum = usage, book * usage[:, None]
    return theirs


@pytest.mark.parametrize("make", [encodec, mimi])
def test_residual_quantizers(lesson, agrees, make):
    """Codes and vectors of transformers' two codecs, whose codes are (stages, batch, frames)."""
    books = [randn(32, 6, seed=10 + i) / (i + 1) for i in range(4)]
    x = randn(3, 20, 6, seed=6) * 1.5
    theirs = make(books)
    codes = theirs.encode(x.mT, 1000) if make is encodec else theirs.encode(x.mT)
    decoded = theirs.decode(codes[:4] if make is encodec else codes.transpose(0, 1))
    quantized, mine = lesson.residual_vector_quantize(x, books)
    name = f"transformers {'EncodecResidualVectorQuantizer' if make is encodec else 'MimiResidualVectorQuantizer'}"
    agrees("residual_vector_quantize, codes", name, mine, codes[:4].permute(1, 2, 0), 0.0)
    agrees("residual_vector_quantize, vectors", name, quantized, decoded.mT, 1e-12)


def test_the_codebook_that_mimi_reads(lesson, agrees):
    """Mimi keeps sums and counts, as ema_codebook does, and divides (its counts clamped, not smoothed)."""
    x, codes = randn(200, 3, seed=7), torch.randint(0, 8, (200,), generator=generator(8))
    counts, sums = torch.ones(8, dtype=torch.float64), randn(8, 3, seed=9)
    book, counts, sums = lesson.ema_codebook(counts, sums, x, codes, decay=0.9, eps=1e-12)
    theirs = mimi([sums / counts[:, None]], counts).layers[0].codebook.embed
    agrees("ema_codebook", "transformers MimiEuclideanCodebook.embed", book, theirs, 1e-9)


def test_straight_through_and_losses(lesson, agrees):
    """VQ-VAE's objective as transformers' Chameleon image tokenizer has it, in value and in each part's gradient."""
    vqvae = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    config = transformers.ChameleonVQVAEConfig(num_embeddings=8, embed_dim=4)
    theirs = vqvae.ChameleonVQVAEVectorQuantizer(config).double()
    book = randn(8, 4, seed=20)
    theirs.embedding.weight.data.copy_(book)
    x = randn(2, 4, 3, 3, seed=21)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine_book = book.clone().requires_grad_()
    out, loss, codes = theirs(a)
    # Theirs weighs the codebook's term with beta and the commitment with 1: exchanged, and scaled.
    beta = theirs.beta
    mine, mine_codes, mine_loss = lesson.vector_quantize(b.permute(0, 2, 3, 1), mine_book, 1 / beta)
    agrees("vector_quantize, codes", "transformers ChameleonVQVAE", mine_codes.flatten(), codes.flatten(), 0.0)
    agrees("vector_quantize, vectors", "transformers ChameleonVQVAE", mine.permute(0, 3, 1, 2), out, 1e-12)
    agrees("vector_quantize, loss", "transformers ChameleonVQVAE", beta * mine_loss, loss, 1e-12)
    slope = randn(2, 4, 3, 3, seed=22)
    (out * slope).sum().backward(retain_graph=True)
    (mine.permute(0, 3, 1, 2) * slope).sum().backward(retain_graph=True)
    agrees("vector_quantize, straight-through gradient", "transformers ChameleonVQVAE", b.grad, a.grad, 1e-12)
    loss.backward()
    (beta * mine_loss).backward()
    agrees("vector_quantize, loss's gradient at x", "transformers ChameleonVQVAE", b.grad, a.grad, 1e-12)
    agrees(
        "vector_quantize, loss's gradient at the codebook",
        "transformers ChameleonVQVAE",
        mine_book.grad,
        theirs.embedding.weight.grad,
        1e-12,
    )


def test_delay_pattern(lesson, agrees):
    """MusicGen's mask, whose prompt begins with a start token of each stage."""
    from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM

    torch.manual_seed(0)
    config = transformers.MusicgenDecoderConfig(
        vocab_size=16, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2, hidden_size=8, num_codebooks=4
    )
    model = MusicgenForCausalLM(config)
    codes = torch.randint(0, 15, (2, 4, 6), generator=generator(30))
    started = F.pad(codes, (1, 0), value=15).reshape(8, 7)
    _, mask = model.build_delay_pattern_mask(started, pad_token_id=15, max_length=6 + 4)
    agrees(
        "delay_pattern",
        "transformers MusicGen build_delay_pattern_mask",
        lesson.delay_pattern(codes, 15),
        mask.reshape(2, 4, 10)[..., 1:],
        0.0,
    )
    agrees("undo_delay", "the codes", lesson.undo_delay(lesson.delay_pattern(codes, 15)), codes, 0.0)


# --- video ---


def test_tubelets(lesson, agrees):
    from transformers.models.vivit.modeling_vivit import VivitTubeletEmbeddings

    config = transformers.VivitConfig(image_size=8, num_frames=4, tubelet_size=[2, 4, 4], num_channels=3, hidden_size=5)
    theirs = VivitTubeletEmbeddings(config).double()
    video = randn(2, 4, 3, 8, 8, seed=31)  # ViViT's frames come before channels
    mine = lesson.tubelet_embed(video.transpose(1, 2), theirs.projection.weight, theirs.projection.bias)
    agrees("tubelet_embed", "transformers VivitTubeletEmbeddings", mine.flatten(1, 2), theirs(video), 1e-12)


def test_factorized_attention(lesson, agrees):
    """nn.MultiheadAttention on all tokens, with masks that join what stands in one frame, and in one place."""
    torch.manual_seed(1)
    parts = [nn.MultiheadAttention(8, 2, batch_first=True).double() for _ in range(2)]
    x = randn(2, 3, 5, 8, seed=32)
    token = torch.arange(15)
    apart = [token[:, None] // 5 != token // 5, token[:, None] % 5 != token % 5]
    flat = x.flatten(1, 2)
    for part, mask in zip(parts, apart, strict=True):
        flat = flat + part(flat, flat, flat, attn_mask=mask, need_weights=False)[0]
    mine = lesson.factorized_attention(
        x, *(lambda rows, part=part: part(rows, rows, rows, need_weights=False)[0] for part in parts)
    )
    agrees("factorized_attention", "nn.MultiheadAttention, masked", mine.flatten(1, 2), flat, 1e-12)


# --- flow matching ---


def test_flow_matching_finds_the_exact_velocity(lesson, agrees):
    """Least squares on the loss's own samples, in narrow bands of times, finds the closed form for Gaussian data."""
    mean, deviation, seen = 1.5, 0.4, []

    def spy(x, t, labels):
        seen.append((x, t))
        return torch.zeros_like(x)

    data = mean + deviation * randn(400_000, seed=33)
    lesson.flow_matching_loss(spy, data, torch.zeros(400_000, dtype=torch.long), generator(34))
    x, t = seen[0]
    noise = (x - t * data) / (1 - t)
    found, exact = [], []
    for middle in (0.2, 0.5, 0.8):
        band = (t - middle).abs() < 0.02
        design = torch.stack([torch.ones_like(x[band]), x[band]], dim=1)
        found.append(torch.linalg.lstsq(design, (data - noise)[band, None]).solution[:, 0])
        variance = (1 - middle) ** 2 + middle**2 * deviation**2
        slope = (middle * deviation**2 - (1 - middle)) / variance
        exact.append(torch.tensor([mean - slope * middle * mean, slope], dtype=torch.float64))
    agrees(
        "flow_matching_loss, its minimum", "closed form, 400,000 samples", torch.stack(found), torch.stack(exact), 0.03
    )


def test_sample_euler(lesson, agrees):
    """The exact velocity carries N(0, 1) to N(μ, σ²) along x₀ ↦ μ + σx₀."""
    noise = randn(100, 2, seed=35)
    mean, deviation = 0.7, 0.3

    def velocity(x, t, labels):
        s = t[:, None]
        slope = (s * deviation**2 - (1 - s)) / ((1 - s) ** 2 + s**2 * deviation**2)
        return mean + slope * (x - s * mean)

    mine = lesson.sample_euler(velocity, noise, torch.zeros(100, dtype=torch.long), 4000)
    agrees("sample_euler, 4000 steps", "the exact Gaussian transport", mine, mean + deviation * noise, 2e-3)


def test_dit_block(lesson, agrees):
    """nn.MultiheadAttention and nn.LayerNorm with the same weights."""
    torch.manual_seed(2)
    block = lesson.DiTBlock(12, 3).double()
    nn.init.normal_(block.modulation.weight, std=0.5)
    nn.init.normal_(block.modulation.bias, std=0.5)
    attention = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(block.qkv.weight)
        attention.in_proj_bias.copy_(block.qkv.bias)
        attention.out_proj.weight.copy_(block.proj.weight)
        attention.out_proj.bias.copy_(block.proj.bias)
    norm = nn.LayerNorm(12, eps=1e-6, elementwise_affine=False).double()
    x, c = randn(2, 5, 12, seed=36), randn(2, 12, seed=37)
    six = block.modulation(F.silu(c)).reshape(2, 6, 1, 12).unbind(1)
    steered = norm(x) * (1 + six[1]) + six[0]
    y = x + six[2] * attention(steered, steered, steered, need_weights=False)[0]
    y = y + six[5] * block.mlp(norm(y) * (1 + six[4]) + six[3])
    agrees("DiTBlock", "nn.MultiheadAttention, nn.LayerNorm", block(x, c), y, 1e-12)


# --- masked diffusion ---


def bert() -> tuple[nn.Module, callable]:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        initializer_range=0.5,
    )
    model = transformers.BertForMaskedLM(config).double().eval()
    return model, lambda tokens: model(input_ids=tokens).logits


def test_masked_diffusion_loss(lesson, agrees):
    """At t = 1 for all it is BERT's loss with everything masked; in general, that of each row by its labels."""
    model, logits = bert()
    tokens = torch.randint(0, 8, (4, 6), generator=generator(40))
    seen = []

    def spy(inputs):
        seen.append(inputs)
        return logits(inputs)

    with torch.no_grad():
        mine = lesson.masked_diffusion_loss(spy, tokens, torch.ones(4), 8, generator(41))
        theirs = model(input_ids=torch.full_like(tokens, 8), labels=tokens).loss
        agrees("masked_diffusion_loss, t = 1", "transformers BertForMaskedLM", mine, theirs, 1e-12)
        t = torch.tensor([0.9, 0.5, 0.7, 0.3], dtype=torch.float64)
        mine = lesson.masked_diffusion_loss(spy, tokens, t, 8, generator(42))
        total = 0.0
        for row, inputs, share in zip(tokens, seen[-1], t, strict=True):
            labels = row.masked_fill(inputs != 8, -100)
            if (labels >= 0).any():
                loss = model(input_ids=inputs[None], labels=labels[None]).loss
                total = total + loss * (labels >= 0).sum() / share
        agrees("masked_diffusion_loss", "transformers BertForMaskedLM, row by row", mine, total / 24, 1e-12)


def test_exact_bound(lesson, agrees):
    """BERT on four tokens: the mean over all 24 orders, and a bound on what they say together."""
    _, logits = bert()
    tokens = torch.tensor([[1, 5, 5, 2], [0, 7, 3, 3]])
    with torch.no_grad():
        orders = []
        for order in itertools.permutations(range(4)):
            inputs, total = torch.full_like(tokens, 8), 0.0
            for place in order:
                total = total - logits(inputs)[:, place].log_softmax(-1).gather(1, tokens[:, place, None])[:, 0]
                inputs[:, place] = tokens[:, place]
            orders.append(total)
        orders = torch.stack(orders)
        mine = lesson.exact_bound(logits, tokens, 8)
    agrees("exact_bound", "all orders, transformers BertForMaskedLM", mine, orders.mean(0), 1e-12)
    mixture = -(orders.neg().logsumexp(0) - math.log(24))
    assert bool((mine >= mixture).all())


def test_the_loss_meets_the_bound(lesson, agrees):
    """Averaged over draws of t and of masks, the loss is the exact bound per token."""
    _, logits = bert()
    tokens = torch.tensor([[1, 5, 2]])
    rows = 60_000
    with torch.no_grad():
        t = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
        mine = lesson.masked_diffusion_loss(logits, tokens.expand(rows, -1), t, 8, generator(43))
        agrees(
            "masked_diffusion_loss, 60,000 draws",
            "exact_bound",
            mine,
            lesson.exact_bound(logits, tokens, 8)[0] / 3,
            0.03,
        )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sample_masked(lesson, agrees, steps):
    """The distribution of three tokens, random remasking, against its list over all orders."""
    _, logits = bert()
    draws = 60_000
    cache = {}

    def told(inputs):  # the model, once for each different input
        rows, where = inputs.unique(dim=0, return_inverse=True)
        known = [cache.setdefault(tuple(r), None) for r in rows.tolist()]
        for i, row in enumerate(rows):
            if known[i] is None:
                with torch.no_grad():
                    cache[tuple(row.tolist())] = logits(row[None])[0]
        return torch.stack([cache[tuple(r)] for r in rows.tolist()])[where]

    sample = lesson.sample_masked(told, torch.full((draws, 3), 8), 8, steps, generator(44))
    found = torch.bincount((sample * torch.tensor([64, 8, 1])).sum(1), minlength=512).double() / draws
    sizes = {1: (3,), 2: (2, 1), 3: (1, 1, 1)}[steps]
    exact, count = torch.zeros(8, 8, 8, dtype=torch.float64), 0
    for order in itertools.permutations(range(3)):
        count += 1
        for text in itertools.product(range(8), repeat=3):
            inputs, p, done = [8, 8, 8], 1.0, 0
            for size in sizes:
                rows = told(torch.tensor([inputs]))[0][:, :8].softmax(-1)
                for place in order[done : done + size]:
                    p *= float(rows[place, text[place]])
                for place in order[done : done + size]:
                    inputs[place] = text[place]
                done += size
            exact[text] += p
    agrees(f"sample_masked, {steps} steps", "all orders listed, 60,000 draws", found, exact.flatten() / count, 0.08)
