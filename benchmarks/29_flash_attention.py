"""Speed of lesson 29's attention kernels on this GPU, beside FlashAttention-2, cuDNN and flex attention in PyTorch.

    python -m benchmarks.29_flash_attention

bfloat16, 32 heads, 32,768 tokens in all (batch = 32,768 / S), S = 1k … 32k, head dimension 64 and 128, with and without
a causal mask, with as many key-value heads and with 8, forward and backward. TFLOP/s count 4·S²·D per head forward and
2.5 times that backward, half with a causal mask.

What SDPA takes by itself is FlashAttention-2, about half as fast as cuDNN on a Hopper GPU: claims are held against the
better. "lesson 29, TMA" is the lesson's forward kernel with tensor descriptors, see flash_tma.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import flash_tma
from benchmarks.kernels import Case, Goal, backward_of, layout_of, main
from llm40 import profile

DTYPE = torch.bfloat16
TOKENS, HEADS = 32_768, 32
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
OURS = "lesson 29"
FLASH, CUDNN, FLEX = "FlashAttention-2", "cuDNN", "flex"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    S: int
    D: int
    causal: bool
    kv_heads: int = HEADS

    def __str__(self) -> str:
        heads = f"{HEADS}" if self.kv_heads == HEADS else f"{HEADS}/{self.kv_heads}"
        return f"D {self.D}, {'causal' if self.causal else 'full'}, S {self.S}, {heads} heads"


PUBLISHED = [Shape(8192, 128, True), Shape(8192, 64, True), Shape(8192, 128, True, 8), Shape(8192, 128, False)]
SHAPES = [
    Shape(S, D, causal, kv_heads)
    for D in (64, 128)
    for kv_heads in (HEADS, 8)
    for causal in (True, False)
    for S in LENGTHS
    if kv_heads == HEADS or causal
]
SMALL = {
    "TOKENS": 48,
    "HEADS": 2,
    "PUBLISHED": [Shape(48, 16, True, 2), Shape(48, 16, True, 1), Shape(48, 16, False, 2)],
}
GOALS = [
    Goal(f"forward, {PUBLISHED[0]}", FLASH, 1.15),
    Goal(f"forward, {PUBLISHED[0]}", CUDNN, 0.70, stretch=0.78),
    Goal(f"forward, {PUBLISHED[0]}", FLEX, 1.05),
    Goal(f"forward, {PUBLISHED[1]}", FLASH, 1.2),
    Goal(f"forward, {PUBLISHED[1]}", CUDNN, 0.95),
    Goal(f"backward, {PUBLISHED[0]}", FLASH, 0.75),
    Goal(f"backward, {PUBLISHED[1]}", FLASH, 0.95),
]


def sdpa(backend: SDPBackend, shape: Shape) -> Attend:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.kv_heads != HEADS)

    return attend


def flex(shape: Shape) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Inside `strict_compiler`, once for each shape: Dynamo's limit of eight is never reached, and would be an error.
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, shape.S, shape.S, device=profile.device)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=shape.kv_heads != HEADS)


def ways(lesson: SimpleNamespace, shape: Shape) -> dict[str, Attend]:
    return {
        OURS: lambda q, k, v: lesson.FlashAttention.apply(q, k, v, shape.causal),
        FLASH: sdpa(SDPBackend.FLASH_ATTENTION, shape),
        CUDNN: sdpa(SDPBackend.CUDNN_ATTENTION, shape),
        FLEX: flex(shape),
    }


def tensors(batch: int, shape: Shape) -> tuple[list[Tensor], Tensor]:
    """(q, k, v), leaves for autograd, and the gradient that arrives."""
    generator = torch.Generator(profile.device).manual_seed(29)
    q, k, v, do = (
        torch.randn(batch, heads, shape.S, shape.D, device=profile.device, dtype=DTYPE, generator=generator)
        for heads in (HEADS, shape.kv_heads, shape.kv_heads, HEADS)
    )
    return [t.requires_grad_() for t in (q, k, v)], do


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for shape in PUBLISHED if published else SHAPES:
        batch = max(1, TOKENS // shape.S)
        leaves, do = tensors(batch, shape)
        flops = 4 * batch * HEADS * shape.S**2 * shape.D * (0.5 if shape.causal else 1.0)
        settings = {"batch": batch}
        attend = ways(lesson, shape)
        forward: dict[str, Callable] = {
            name: lambda way=way, leaves=leaves: way(*leaves) for name, way in attend.items()
        }
        forward["lesson 29, TMA"] = lambda leaves=leaves, causal=shape.causal: flash_tma.attend(*leaves, causal)
        yield Case(f"forward, {shape}", OURS, forward, {"": flops}, "TFLOP/s", settings=settings)
        backward = {}
        for name, way in attend.items():
            try:
                o = way(*leaves)
                backward[name] = backward_of(o, leaves, layout_of(o, do))
            except Exception as error:  # a back end that this build or GPU lacks
                if name == OURS:
                    raise
                settings[f"no backward of {name}"] = str(error).strip().splitlines()[0]
        yield Case(f"backward, {shape}", OURS, backward, {"": 2.5 * flops}, "TFLOP/s", settings=settings)


if __name__ == "__main__":
    main("29", __doc__.splitlines()[0])
