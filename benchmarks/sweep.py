"""Every kernel of the course over a sweep of shapes, against float64, in float32, float16 and bfloat16.

A family is a lesson's kernels with what they are judged by: the same computation in PyTorch, at the same dtype and in
float64. In float32 the relative L2 error is at most 2e-6 forward and 3e-6 backward, in half precision at most twice
(forward) or three times (backward) that of PyTorch at the same dtype; PyTorch's own error excuses float32 likewise.

On a GPU all shapes run; without one the small ones, in Triton's interpreter, whose bfloat16 is wrong and left out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import flash_tma
from benchmarks.kernels import DTYPES, reference
from llm40 import profile

Named = dict[str, Tensor]
EXACT = torch.float64
LIMITS = {"forward": 2e-6, "backward": 3e-6}
FACTORS = {"forward": 2.0, "backward": 3.0}


@dataclass(frozen=True)
class Family:
    """`ours(lesson, *tensors)` runs the kernels, `plain(*tensors)` is PyTorch; results have the same names. Those that
    begin with d are gradients. `typical` is the shape at which the lesson's kernels are published, with few rows: what
    is compiled before anything runs.
    """

    name: str
    lesson: str
    small: list[tuple]
    large: list[tuple]
    typical: list[tuple]
    inputs: Callable[..., tuple]  # (shape, dtype) → tensors
    ours: Callable[..., Named]
    plain: Callable[..., Named]
    dtypes: tuple[torch.dtype, ...] = DTYPES


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(profile.device)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


# --- 03: SwiGLU -------------------------------------------------------------------------------------------------------


def swiglu_inputs(rows: int, columns: int, dtype: torch.dtype) -> tuple:
    """gate and up are the two halves of one tensor's rows."""
    gate, up = drawn(rows, 2 * columns, dtype=dtype, scale=2.0).chunk(2, dim=-1)
    return gate, up, drawn(rows, columns, dtype=dtype, seed=1)


def swiglu_ours(lesson: SimpleNamespace, gate: Tensor, up: Tensor, grad: Tensor) -> Named:
    dgate, dup = lesson.fused_swiglu_backward(grad, gate, up)
    return {"out": lesson.fused_swiglu_forward(gate, up), "dgate": dgate, "dup": dup}


def swiglu_plain(gate: Tensor, up: Tensor, grad: Tensor) -> Named:
    gate, up = leaves(gate, up)
    out = F.silu(gate) * up
    dgate, dup = torch.autograd.grad(out, (gate, up), grad)
    return {"out": out, "dgate": dgate, "dup": dup}


# --- 04: RMSNorm ------------------------------------------------------------------------------------------------------


def norm_inputs(rows: int, width: int, dtype: torch.dtype) -> tuple:
    x, dy = drawn(rows, width, dtype=dtype, scale=0.05), drawn(rows, width, dtype=dtype, seed=1)
    return x, drawn(width, dtype=dtype, seed=2), dy


def norm_ours(lesson: SimpleNamespace, x: Tensor, w: Tensor, dy: Tensor) -> Named:
    y, r = lesson.triton_rms_norm(x, w, 1e-6)
    dx, dw = lesson.triton_rms_norm_backward(x, w, r, dy)
    return {"y": y, "dx": dx, "dw": dw}


def norm_plain(x: Tensor, w: Tensor, dy: Tensor) -> Named:
    x, w = leaves(x, w)
    y = F.rms_norm(x, w.shape, w, 1e-6)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return {"y": y, "dx": dx, "dw": dw}


# --- 05: cross-entropy ------------------------------------------------------------------------------------------------


def loss_inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple:
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
    targets[0], targets[-1] = vocab - 1, 0
    if rows > 2:
        targets[1] = -100
    return drawn(rows, vocab, dtype=dtype, scale=4.0), targets.to(profile.device)


def loss_ours(lesson: SimpleNamespace, logits: Tensor, targets: Tensor) -> Named:
    losses, m, l = lesson.row_losses(logits, targets)
    spent = logits.clone()
    lesson.write_gradient(spent, targets, m, l)
    return {"losses": losses, "dlogits": spent}


def loss_plain(logits: Tensor, targets: Tensor) -> Named:
    [logits] = leaves(logits)
    losses = F.cross_entropy(logits, targets, reduction="none")
    kept = (targets != -100).sum()
    [gradient] = torch.autograd.grad(losses.sum() / kept, logits)
    return {"losses": losses, "dlogits": gradient}


# --- 08: rotary positions ---------------------------------------------------------------------------------------------


def rope_inputs(batch: int, seq: int, heads: int, k_heads: int, width: int, rotary: int, dtype: torch.dtype) -> tuple:
    """q, k as slices of one projection, the table of cosines and sines in float32, and two gradients."""
    both = drawn(batch, seq, heads + k_heads, width, dtype=dtype)
    frequencies = 500_000.0 ** -(torch.arange(0, rotary, 2).double() / rotary)
    angles = torch.arange(seq).double()[:, None] * frequencies
    table = [t.float().to(profile.device) for t in (angles.cos(), angles.sin())]
    gradients = [drawn(batch, seq, h, width, dtype=dtype, seed=h + 7) for h in (heads, k_heads)]
    return (*both.split([heads, k_heads], dim=2), *table, *gradients)


def rope_ours(lesson: SimpleNamespace, q, k, cos, sin, dq, dk) -> Named:
    given = leaves(q, k)
    out = lesson.FusedRoPE.apply(*given, cos, sin, 0)
    back = torch.autograd.grad(out, given, (dq, dk))
    return dict(zip(("q", "k", "dq", "dk"), (*out, *back), strict=True))


def rope_plain(q, k, cos, sin, dq, dk) -> Named:
    def turned(x: Tensor, sign: float) -> Tensor:
        half = cos.shape[1]
        c, s = (t[:, None].to(x.dtype) for t in (cos, sign * sin))
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * c - second * s, second * c + first * s, rest], -1)

    return {"q": turned(q, 1), "k": turned(k, 1), "dq": turned(dq, -1), "dk": turned(dk, -1)}


# --- 10: absorbed decoding --------------------------------------------------------------------------------------------


def decode_inputs(heads: int, rank: int, rope: int, lengths: tuple[int, ...], dtype: torch.dtype) -> tuple:
    q = drawn(len(lengths), heads, rank + rope, dtype=dtype)
    cache = drawn(len(lengths), max(lengths) + 3, rank + rope, dtype=dtype, seed=1)
    return q, cache, torch.tensor(lengths, dtype=torch.int32, device=profile.device), rank


def decode_ours(lesson: SimpleNamespace, q: Tensor, cache: Tensor, lengths: Tensor, rank: int) -> Named:
    return {"o": lesson.mla_decode(q, cache, lengths, rank, q.shape[-1] ** -0.5)}


def decode_plain(q: Tensor, cache: Tensor, lengths: Tensor, rank: int) -> Named:
    behind = torch.arange(cache.shape[1], device=q.device) >= lengths[:, None]
    scores = (q @ cache.mT * q.shape[-1] ** -0.5).masked_fill(behind[:, None], -math.inf)
    weights = scores.to(EXACT if q.dtype == EXACT else torch.float32).softmax(-1).to(q.dtype)
    return {"o": weights @ cache[..., :rank]}


# --- 11: grouped product ----------------------------------------------------------------------------------------------


def grouped_inputs(sizes: tuple[int, ...], inner: int, cols: int, dtype: torch.dtype) -> tuple:
    w = drawn(len(sizes), cols, inner, dtype=dtype, seed=1, scale=inner**-0.5)
    return drawn(sum(sizes), inner, dtype=dtype), w, torch.tensor(sizes, dtype=torch.int32, device=profile.device)


def grouped_ours(lesson: SimpleNamespace, x: Tensor, w: Tensor, sizes: Tensor) -> Named:
    return {"out": lesson.grouped_gemm(x, w, sizes)}


def grouped_plain(x: Tensor, w: Tensor, sizes: Tensor) -> Named:
    return {"out": torch.cat([part @ matrix.mT for part, matrix in zip(x.split(sizes.tolist()), w, strict=True)])}


# --- 29: attention ----------------------------------------------------------------------------------------------------


def attention_inputs(
    batch: int, heads: int, kv_heads: int, q_len: int, k_len: int, width: int, causal: bool, dtype: torch.dtype
) -> tuple:
    """q, k, v and the gradient of the output, the first three views of (batch, seq, heads, head_dim)."""
    shapes = ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads), (q_len, heads))
    q, k, v, do = (drawn(batch, n, h, width, dtype=dtype, seed=i).transpose(1, 2) for i, (n, h) in enumerate(shapes))
    return q, k, v, do.contiguous(), causal


def attention_ours(lesson: SimpleNamespace, q, k, v, do, causal: bool) -> Named:
    """With tiles of one size: what the autotuner would choose is compiled, and timed, elsewhere."""
    blocks = (32, 32) if profile.interpret or q.dtype == torch.float32 else (64, 64)
    o, lse = lesson.flash_forward(q, k, v, causal, blocks)
    dq, dk, dv = lesson.flash_backward(q, k, v, o, lse, do, causal, blocks)
    found = {"o": o, "dq": dq, "dk": dk, "dv": dv}
    if profile.name == "gpu" and q.dtype != torch.float32 and flash_tma.fits(q, k, v):
        try:
            found["o, TMA"] = flash_tma.forward(q, k, v, causal, blocks)[0]
        except Exception as error:  # a candidate: the lesson's kernels are judged all the same
            print(f"flash_tma: {type(error).__name__}: {error}")
    return found


def attention_plain(q, k, v, do, causal: bool) -> Named:
    q, k, v = leaves(q, k, v)
    group = q.shape[1] // k.shape[1]
    wide = [t.repeat_interleave(group, dim=1) for t in (k, v)]
    scores = q @ wide[0].mT / math.sqrt(q.shape[-1])
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, -math.inf)
    blind = scores.amax(-1, keepdim=True) == -math.inf  # a row that sees no key: 0
    o = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0) @ wide[1]
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv, "o, TMA": o}


# --- 36: scans --------------------------------------------------------------------------------------------------------


def scan_inputs(batch: int, channels: int, states: int, length: int, dtype: torch.dtype) -> tuple:
    """a and b of the gated scan, then u, dt, A, B, C, D of the selective one; A and D in float32, steps up to about 1.

    u and dt are the halves of one tensor's rows, as a projection leaves them.
    """
    a = drawn(batch, channels, length, dtype=torch.float32).sigmoid().to(dtype)
    b = drawn(batch, channels, length, dtype=dtype, seed=1)
    u, dt = drawn(batch, length, 2 * channels, dtype=dtype, seed=2).chunk(2, dim=2)
    A = -drawn(channels, states, dtype=torch.float32, seed=3).exp()
    B, C = (drawn(batch, length, states, dtype=dtype, seed=seed) for seed in (4, 5))
    return a, b, u, 0.3 * dt.abs(), A, B, C, drawn(channels, dtype=torch.float32, seed=6)


def scan_ours(lesson: SimpleNamespace, a, b, u, dt, A, B, C, D) -> Named:
    """Long rows with the tiles that the autotuner chooses, short ones with tiles that make them several."""
    long = a.shape[-1] >= 2048
    gated = None if long else (2, 8) if profile.interpret else (2, 128)
    fused = None if long else (2, 8) if profile.interpret else (32, 8)
    return {"h": lesson.gated_scan(a, b, gated), "y": lesson.fused_selective_scan(u, dt, A, B, C, D, fused)}


def scan_plain(a, b, u, dt, A, B, C, D) -> Named:
    """Step by step; states in float32 for half precision, as Mamba's own code has them."""
    dtype, wide = a.dtype, torch.promote_types(a.dtype, torch.float32)
    a, b, u, dt, A, B, C, D = (t.to(wide) for t in (a, b, u, dt, A, B, C, D))
    h, state = torch.zeros_like(b[..., 0]), b.new_zeros(len(u), *A.shape)
    hs, ys = [], []
    for t in range(a.shape[-1]):
        h = a[..., t] * h + b[..., t]
        new = (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        state = torch.exp(dt[:, t, :, None] * A) * state + new
        hs.append(h)
        ys.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return {"h": torch.stack(hs, -1).to(dtype), "y": torch.stack(ys, 1).to(dtype)}


# Of every size one, a power of two and none; lengths of a single step, of whole tiles and of one more or less.
SCANS = [(1 + i % 2, 1 + i % 3, (1, 2, 3, 4, 5)[i % 5], length) for i, length in enumerate(range(1, 49))]


# --- 30: paged decoding -----------------------------------------------------------------------------------------------


def paged_inputs(
    heads: int, kv_heads: int, width: int, page: int, splits: int | None, lengths: tuple[int, ...], dtype: torch.dtype
) -> tuple:
    """Blocks in a random order, NaN in slots that hold no token; entries of tables behind the last block are -1.

    The pool's memory is (blocks, page, kv_heads, head_dim) for odd pages, (blocks, kv_heads, page, head_dim) for even.
    """
    need = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(need) + 1, generator=torch.Generator().manual_seed(sum(lengths))).to(torch.int32)
    tables = torch.full((len(lengths), max(*need, 1)), -1, dtype=torch.int32)
    k, v = (drawn(len(order), page, kv_heads, width, dtype=dtype, seed=i).transpose(1, 2) for i in (1, 2))
    if page % 2 == 0:
        k, v = k.contiguous(), v.contiguous()
    empty = torch.ones(len(order), page, dtype=torch.bool)
    for row, n, part in zip(tables, lengths, order.split([*need, 1]), strict=False):
        row[: len(part)] = part
        empty[part.long()] = (torch.arange(len(part) * page) >= n).view(-1, page)
    for pool in (k, v):
        pool.masked_fill_(empty[:, None, :, None].to(pool.device), math.nan)
    q = drawn(len(lengths), heads, width, dtype=dtype)
    lengths_ = torch.tensor(lengths, dtype=torch.int32, device=profile.device)
    return q, k, v, tables.to(profile.device), lengths_, splits


def paged_ours(lesson: SimpleNamespace, q, k, v, tables, lengths, splits: int | None) -> Named:
    """Splits None is what the lesson chooses, with the tile that its autotuner does."""
    return {"o": lesson.paged_decode(q, k, v, tables, lengths, splits, None if splits is None else 32)}


def paged_plain(q, k, v, tables, lengths, splits: int | None) -> Named:
    """One sequence after the other: its blocks gathered, then two products."""
    out = torch.zeros_like(q)
    for row, (table, n) in enumerate(zip(tables, lengths.tolist(), strict=True)):
        blocks = table[: -(-n // k.shape[2])].long()
        # (blocks, kv_heads, page, head_dim) → (heads, n, head_dim)
        keys, values = (pool[blocks].transpose(0, 1).flatten(1, 2)[:, :n] for pool in (k, v))
        group = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(group, dim=0) for t in (keys, values))
        scores = (keys @ q[row, :, :, None])[..., 0] / math.sqrt(q.shape[-1])
        weights = scores.to(EXACT if q.dtype == EXACT else torch.float32).softmax(-1).to(q.dtype)
        out[row] = (weights[:, None] @ values)[:, 0]
    return {"o": out}


# Of every size a power of two and none, of lengths an empty, a short and one that ends at a block's border.
PAGED = [
    (heads, kv_heads, width, page, splits, (0, page, 3 * page + 1, 1 if splits == 5 else 45))
    for heads, kv_heads in ((2, 2), (6, 2), (20, 1))
    for width, page in ((16, 16), (24, 7), (5, 4), (40, 1))
    for splits in (1, 3, 5, None)
]


# --- 35: gated linear attention in chunks -----------------------------------------------------------------------------

CHUNK_LENGTHS = (1, 2, 15, 16, 17, 31, 33, 47, 64, 65)
CHUNK_SHAPES = ((1, 2, 16, 16, 16, 16), (2, 1, 24, 40, 32, 16), (1, 1, 5, 7, 16, 32), (2, 3, 33, 20, 64, 16))


def chunk_inputs(
    batch: int, heads: int, seq: int, d_k: int, d_v: int, chunk: int, block: int, dtype: torch.dtype
) -> tuple:
    """q, k, v as views of (batch, seq, heads, ·), log-decays, a state, and (CHUNK, BLOCK_V), 0 for the lesson's own."""
    q, k, v = (
        drawn(batch, seq, heads, n, dtype=dtype, seed=i, scale=scale).transpose(1, 2)
        for i, (n, scale) in enumerate(((d_k, 1.0), (d_k, d_k**-0.5), (d_v, 1.0)))
    )
    log_decay = -0.1 * drawn(batch, heads, seq, dtype=torch.float32, seed=3).abs()
    state = drawn(batch, heads, d_k, d_v, dtype=torch.float32, seed=4)
    return q, k, v, log_decay, state, (chunk, block) if chunk else None


def chunk_ours(lesson: SimpleNamespace, q, k, v, log_decay, state, blocks) -> Named:
    o, last = lesson.chunk_attention(q, k, v, log_decay, state, blocks)
    return {"o": o, "state": last}


def chunk_plain(q, k, v, log_decay, state, blocks) -> Named:
    """All pairs at once; products in the dtype of q, decays in that of the log-decays."""
    sums = log_decay.cumsum(-1)
    later = torch.ones(sums.shape[-1], sums.shape[-1], dtype=torch.bool, device=q.device).tril()
    faded = (sums[..., :, None] - sums[..., None, :]).masked_fill(~later, -math.inf).exp().to(q.dtype)
    left, state = sums.exp()[..., None].to(q.dtype), state.to(q.dtype)
    o = (q @ k.mT * faded) @ v + (q * left) @ state
    return {"o": o, "state": (k * faded[..., -1, :, None]).mT @ v + left[..., -1:, :] * state}


# --- 31: weights in four bits -----------------------------------------------------------------------------------------


def w4a16_inputs(
    tokens: int, rows: int, inner: int, group: int, blocks: tuple[int, int, int] | None, dtype: torch.dtype
) -> tuple:
    """x, codes, scales and zero points (asymmetric, a group each), and the tile sizes."""
    generator = torch.Generator().manual_seed(rows + inner)
    codes = torch.randint(0, 16, (rows, inner), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 16, (rows, inner // group), generator=generator, dtype=torch.uint8)
    scale = drawn(rows, inner // group, dtype=dtype, seed=1).abs() * 0.1 + 0.02
    return drawn(tokens, inner, dtype=dtype), codes.to(profile.device), scale, zero.to(profile.device), blocks


def w4a16_ours(lesson: SimpleNamespace, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, blocks) -> Named:
    words = lesson.pack_int4(codes)
    return {"y": lesson.w4a16(x, words, scale, zero, codes.shape[1] // scale.shape[1], blocks)}


def w4a16_plain(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, blocks) -> Named:
    """With the weight as the lesson says: (code − zero) · scale, rounded to x's format once."""
    cut = codes.unflatten(1, (scale.shape[1], -1)).to(torch.int32) - zero[..., None].to(torch.int32)
    return {"y": x @ (cut.to(scale.dtype) * scale[..., None]).flatten(1).T}


def w4a16_shapes() -> list[tuple]:
    """Tokens, rows, K, group, tiles: K and rows off the tiles, groups smaller and larger than a tile, and inside it."""
    tiles = [(16, 16, 16), (16, 32, 16), (32, 16, 16), (16, 16, 32)]
    tokens, rows = [1, 5, 16, 17, 33], [1, 16, 20, 37]
    depths = [(8, 8), (64, 8), (72, 24), (96, 32), (128, 64), (136, 136), (200, 40), (256, 32), (320, 160), (384, 128)]
    shapes = []
    for i, (inner, group) in enumerate(depths):
        for k in range(4):
            shapes.append((tokens[(i + k) % 5], rows[(i + 2 * k) % 4], inner, group, tiles[(i + k) % 4]))
    return [*shapes, (2, 20, 1024, 512, (16, 32, 32)), (1, 48, 640, 64, (16, 16, 16))]


FAMILIES = [
    Family(
        "SwiGLU", "03", [(3, 13), (2, 129)], [(100, 1000), (1, 1), (33, 14336), (4096, 4097)], [(4, 14336)],
        swiglu_inputs, swiglu_ours, swiglu_plain,
    ),
    Family(
        "RMSNorm", "04", [(3, 13), (5, 257)], [(100, 1000), (1, 1), (777, 4096), (64, 16384), (16, 32768)],
        [(4, 4096), (4, 8192), (4, 16384)], norm_inputs, norm_ours, norm_plain,
    ),
    Family(
        "cross-entropy", "05", [(3, 13), (4, 300)], [(64, 1000), (33, 50257), (256, 131072)], [(4, 131072)],
        loss_inputs, loss_ours, loss_plain,
    ),
    Family(
        "rotary positions", "08", [(2, 3, 4, 2, 8, 8), (1, 5, 3, 1, 10, 4)],
        [(2, 300, 32, 8, 128, 128), (1, 77, 32, 32, 128, 32), (1, 1, 6, 6, 80, 80)], [(1, 4, 32, 8, 128, 128)],
        rope_inputs, rope_ours, rope_plain,
    ),
    Family(
        "MLA decoding", "10", [(3, 20, 6, (1, 13, 22)), (20, 32, 16, (40, 7))],
        [(16, 512, 64, (1, 13, 700, 1023)), (128, 512, 64, (5, 2049)), (20, 512, 64, (64, 1))],
        [(16, 512, 64, (64, 8192)), (128, 512, 64, (64, 8192))], decode_inputs, decode_ours, decode_plain,
    ),
    Family(
        "grouped product", "11", [((0, 3, 17, 0, 1), 40, 24)],
        [((0, 1, 700, 0, 129, 128, 3000, 0), 520, 264), ((64,) * 128, 768, 2048)],
        [((1,) * 128, 2048, 1536), ((1,) * 128, 768, 2048)], grouped_inputs, grouped_ours, grouped_plain,
    ),
    Family(
        "attention", "29",
        [(2, 4, 2, 21, 45, 24, False), (1, 2, 1, 33, 50, 16, True), (1, 2, 2, 50, 19, 16, True)],
        [
            (2, 4, 2, 300, 300, 64, True), (1, 8, 2, 1000, 1000, 128, True), (1, 3, 3, 257, 1111, 80, False),
            (1, 2, 1, 1, 777, 64, True), (2, 2, 2, 500, 130, 128, True), (1, 2, 2, 2048, 2048, 64, False),
        ],
        [(1, 2, 2, 256, 256, D, causal) for D in (64, 128) for causal in (True, False)],
        attention_inputs, attention_ours, attention_plain,
    ),
    Family(
        "scans", "36", SCANS,
        [(2, 37, 16, 1000), (1, 3, 16, 5000), (3, 64, 16, 2048), (1, 5, 7, 333), (2, 16, 64, 300), (1, 1, 1, 129)],
        [(1, 2, 16, 2048), (1, 2, 16, 4096)], scan_inputs, scan_ours, scan_plain,
    ),
    Family(
        "paged decoding", "30", PAGED,
        [
            (32, 8, 128, 16, None, (1, 700, 4097, 0, 32768)), (32, 8, 64, 64, 7, (5000, 3)), (8, 8, 80, 16, 3, (1111,)),
            (64, 1, 128, 1, 2, (257, 300)), (28, 4, 256, 32, None, (12_345, 16)),
        ],
        [(32, 8, 128, page, None, (64, 8192)) for page in (16, 64)], paged_inputs, paged_ours, paged_plain,
    ),
    Family(
        "chunked linear attention", "35",
        [(batch, heads, seq, *sizes) for batch, heads, *sizes in CHUNK_SHAPES for seq in CHUNK_LENGTHS],
        [
            (2, 4, 1000, 128, 128, 0, 0), (1, 2, 4096, 128, 128, 0, 0), (1, 3, 777, 64, 64, 0, 0),
            (1, 2, 2048, 80, 96, 0, 0), (1, 2, 300, 256, 128, 0, 0), (1, 2, 1, 128, 128, 0, 0),
        ],
        [(1, 2, 256, D, D, 0, 0) for D in (64, 128)], chunk_inputs, chunk_ours, chunk_plain,
    ),
    Family(
        "W4A16", "31", w4a16_shapes(),
        [
            (1, 8192, 8192, 128, None), (16, 4096, 14336, 128, None), (3, 1000, 4160, 64, None),
            (100, 528, 2048, 32, None), (300, 4097, 1032, 8, None), (1, 64, 11008, 11008, None),
        ],
        [(1, 64, 8192, 128, None), (16, 64, 8192, 128, None), (64, 128, 8192, 128, None)],
        w4a16_inputs, w4a16_ours, w4a16_plain,
    ),
]  # fmt: skip


def family(lesson: str) -> Family:
    [found] = [f for f in FAMILIES if f.lesson == lesson]
    return found


def exactly(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative L2; where the expected values are all 0, the absolute norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / (expected.norm() if bool(expected.any()) else 1))


def judge(family: Family, shape: tuple, dtype: torch.dtype, lesson: SimpleNamespace) -> Iterator[dict]:
    """One result of one shape each: {"shape", "what", "error", "plain", "limit"}."""
    tensors = family.inputs(*shape, dtype=dtype)
    exact, usual = family.plain(*map(exactly, tensors)), family.plain(*tensors)
    for what, found in family.ours(lesson, *tensors).items():
        direction = "backward" if what.startswith("d") else "forward"
        error, plain = relative(found, exact[what]), relative(usual[what], exact[what])
        floor = LIMITS[direction] if dtype == torch.float32 else 1e-7
        limit = max(floor, FACTORS[direction] * plain)
        yield {"shape": str(shape), "what": what, "error": error, "plain": plain, "limit": limit}


def sweep(number: str, known: set[str] = frozenset()) -> Iterator[dict]:
    """A row for each dtype of a lesson's family: how many results were judged, the worst, and those too far off."""
    chosen, lesson = family(number), reference(number)
    shapes = chosen.small if profile.interpret else chosen.small + chosen.large
    for dtype in chosen.dtypes:
        key = f"{chosen.name}, {str(dtype).removeprefix('torch.')}"
        if key in known or (profile.interpret and dtype == torch.bfloat16):
            continue
        results = [result for shape in shapes for result in judge(chosen, shape, dtype, lesson)]
        worst = max(results, key=lambda r: r["error"] / r["limit"])
        wrong = [r for r in results if not r["error"] <= r["limit"]]
        row = {"key": key, "shapes": len(shapes), "results": len(results), "worst": worst}
        yield row | ({"error": f"{len(wrong)} of {len(results)} results are off", "wrong": wrong} if wrong else {})
