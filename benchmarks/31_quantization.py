"""Speed of lesson 31's W4A16 kernel on this GPU, beside cuBLAS with bfloat16 weights and PyTorch's own int4 product.

    python -m benchmarks.31_quantization

bfloat16 inputs, weights of 4 bits in groups of 128 with a scale and a zero point each; layers of 8192 × 8192 and of a
70B model's MLP (28672 × 8192 and back), for 1 to 256 tokens. TFLOP/s count 2 · tokens · rows · K for all alike, so a
ratio is one of times. What limits a product of few tokens is the bytes of the weights: 16 bits a weight against 4.156
allow 3.85 times the speed at best.

PyTorch's int4 product keeps (8 − zero) · scale in bfloat16 where the lesson keeps the zero point itself: its weights
differ in their last bits.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.kernels import Case, Goal, main
from llm40 import profile

DTYPE = torch.bfloat16
GROUP = 128
LAYERS = ((8192, 8192), (28672, 8192), (8192, 28672))  # rows, K
TOKENS = (1, 4, 16, 64, 256)
SMALL = {"LAYERS": ((48, 256),), "TOKENS": (1, 16)}
OURS = "lesson 31"
CUBLAS, INT4 = "cuBLAS", "torch int4"
GOALS = [
    Goal(f"8192 × 8192, {tokens} tokens", peer, at_least)
    for tokens in (1, 16)
    for peer, at_least in ((CUBLAS, 2.5), (INT4, 1.0))
]


def tensors(rows: int, inner: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, codes, scale and zero point."""
    generator = torch.Generator(profile.device).manual_seed(31)

    def whole(*shape: int) -> Tensor:
        return torch.randint(0, 16, shape, device=profile.device, generator=generator, dtype=torch.uint8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=profile.device, dtype=DTYPE, generator=generator)

    scale = (normal(rows, inner // GROUP).abs() * 0.1 + 0.02) / inner**0.5
    return normal(tokens, inner), whole(rows, inner), scale, whole(rows, inner // GROUP)


def int4_product(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Callable[[], Tensor]:
    """PyTorch's: the weight's layout is made on the first call, which is not timed."""
    made: list[Tensor] = []

    def product() -> Tensor:
        if not made:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            both = torch.stack([scale, (8 - zero.to(scale.dtype)) * scale], dim=-1)
            made.append(torch.ops.aten._convert_weight_to_int4pack(pairs, 8))
            made.append(both.transpose(0, 1).contiguous())
        return torch.ops.aten._weight_int4pack_mm(x, made[0], GROUP, made[1])

    return product


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for rows, inner in LAYERS[:1] if published else LAYERS:
        for tokens in TOKENS:
            x, codes, scale, zero = tensors(rows, inner, tokens)
            words = lesson.pack_int4(codes)
            cut = codes.unflatten(1, (-1, GROUP)).to(DTYPE) - zero[..., None].to(DTYPE)
            weight = (cut * scale[..., None]).flatten(1)
            functions: dict[str, Callable] = {
                OURS: lambda x=x, words=words, scale=scale, zero=zero: lesson.w4a16(x, words, scale, zero, GROUP),
                CUBLAS: lambda x=x, weight=weight: x @ weight.T,
                INT4: int4_product(x, codes, scale, zero),
            }
            packed = words.numel() * 4 + zero.numel() + scale.numel() * scale.element_size()
            settings = {"weight_bytes": packed, "bits_per_weight": 8 * packed / codes.numel()}
            work = {"": 2 * tokens * rows * inner}
            yield Case(f"{rows} × {inner}, {tokens} tokens", OURS, functions, work, "TFLOP/s", settings=settings)


if __name__ == "__main__":
    main("31", __doc__.splitlines()[0])
