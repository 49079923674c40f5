"""Speed of lesson 35's chunk kernel on this GPU, beside flash-linear-attention, PyTorch, a plain copy and attention.

    python -m benchmarks.35_linear_attention

bfloat16, batch 2, 16 heads of 128, 1k to 64k tokens, one decay a head and token. TB/s count q, k, v and o once for
every way, and both directions for the copy of as many bytes. "against attention" has FlashAttention-2 and cuDNN, which
compute something else over the same tensors: what is compared there is time alone.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import Case, Goal, imported, main
from llm40 import profile

DTYPE = torch.bfloat16
BATCH, HEADS, DIM = 2, 16, 128
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
PUBLISHED = (16384,)
SMALL = {"BATCH": 1, "HEADS": 2, "DIM": 16, "PUBLISHED": (96,)}
OURS = "lesson 35"
FLA, FLASH, CUDNN = "flash-linear-attention", "FlashAttention-2", "cuDNN"
GOALS = [Goal("chunks", FLA, 0.8), Goal("against attention", FLASH, 4.0)]
Way = Callable[[], Tensor]


def tensors(seq: int) -> tuple[Tensor, ...]:
    """q, k, v (batch, seq, heads, dim), as flash-linear-attention takes them, and log-decays (batch, seq, heads)."""
    generator = torch.Generator(profile.device).manual_seed(35)
    options = {"device": profile.device, "generator": generator}
    q, k, v = (torch.randn(BATCH, seq, HEADS, DIM, dtype=DTYPE, **options) for _ in range(3))
    return q, k * DIM**-0.5, v, -0.1 * torch.rand(BATCH, seq, HEADS, **options)


def chunk_ways(lesson: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, Way]:
    """All (batch, heads, seq, dim). Ours takes any strides; fla takes its own order."""
    a, b, c, decay = (t.transpose(1, 2) for t in (q, k, v, g))
    decay = decay.contiguous()

    def ours() -> Tensor:
        return lesson.chunk_attention(a, b, c, decay)[0]

    def plain() -> Tensor:
        return lesson.gated_linear_attention(a, b, c, decay[..., None], 64)[0]

    ways: dict[str, Way] = {OURS: ours, "PyTorch, chunk by chunk": plain}
    simple_gla = imported("fla.ops.simple_gla", "chunk_simple_gla") if profile.device.type == "cuda" else None
    if simple_gla is not None:
        ways[FLA] = lambda: simple_gla(q, k, v, g, scale=1.0)[0].transpose(1, 2)
    return ways


def attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Way:
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(a, b, c, is_causal=True)

    return attend


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for seq in PUBLISHED if published else LENGTHS:
        q, k, v, g = tensors(seq)
        size = 4 * q.numel() * q.element_size()
        source = torch.empty(2, *q.shape, dtype=DTYPE, device=profile.device)
        target = torch.empty_like(source)
        functions: dict[str, Callable] = dict(chunk_ways(lesson, q, k, v, g))
        functions["copy"] = lambda target=target, source=source: target.copy_(source)
        name = f"{BATCH} × {seq} tokens, {HEADS} heads of {DIM}"
        yield Case(f"chunks, {name}", OURS, functions, {"": size}, "TB/s")
        functions = {OURS: chunk_ways(lesson, q, k, v, g)[OURS]}
        functions |= {
            peer: attention(backend, q, k, v)
            for peer, backend in ((FLASH, SDPBackend.FLASH_ATTENTION), (CUDNN, SDPBackend.CUDNN_ATTENTION))
        }
        yield Case(f"against attention, {name}", OURS, functions, {"": size}, "TB/s", same=False)


if __name__ == "__main__":
    main("35", __doc__.splitlines()[0])
