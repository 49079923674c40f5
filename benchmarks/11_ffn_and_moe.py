"""Speed of lesson 11's grouped product on this GPU, beside a loop of torch.mm and PyTorch's own grouped_mm.

    python -m benchmarks.11_ffn_and_moe

bfloat16, the shapes of a mixture of 128 experts of width 768 at a model width of 2,048, 8 experts a token: gate and up
in one product (2048 → 1536) and down (768 → 2048), for 64 to 32,768 tokens, with even and with uneven loads (some
experts empty where tokens are few). TFLOP/s count 2 · rows · K · N. Every peer gets rows already sorted; group sizes
lie on the GPU for ours and grouped_mm, and in Python too for the loop.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case, Goal, main
from llm40 import profile

DTYPE = torch.bfloat16
EXPERTS, TOP = 128, 8
SHAPES = {"gate and up": (2048, 1536), "down": (768, 2048)}
TOKENS = (64, 1024, 8192, 32_768)
SMALL = {"EXPERTS": 4, "TOP": 2, "SHAPES": {"gate and up": (40, 24)}, "TOKENS": (16,)}
OURS = "lesson 11"
GOALS = [Goal(f"{shape}, 32768 tokens", "F.grouped_mm", 1.0) for shape in SHAPES]
Product = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def loop(x: Tensor, w: Tensor, sizes: Tensor, listed: list[int]) -> Tensor:
    """One torch.mm a group, into one output: no concatenation is charged to it."""
    out = torch.empty(len(x), w.shape[1], dtype=x.dtype, device=x.device)
    for part, matrix, target in zip(x.split(listed), w, out.split(listed), strict=True):
        if len(part):
            torch.mm(part, matrix.T, out=target)
    return out


def ways(lesson: SimpleNamespace) -> dict[str, Product]:
    found = {OURS: lambda x, w, sizes, listed: lesson.grouped_gemm(x, w, sizes), "loop of torch.mm": loop}
    if hasattr(F, "grouped_mm"):
        found["F.grouped_mm"] = lambda x, w, sizes, listed: F.grouped_mm(
            x, w.mT, offs=sizes.cumsum(0, dtype=torch.int32)
        )
    return found


def group_sizes(tokens: int, even: bool) -> list[int]:
    """Rows of each expert: all alike, or of a random router with favorites."""
    if even:
        return [tokens * TOP // EXPERTS] * EXPERTS
    generator = torch.Generator().manual_seed(11)
    favorites = torch.randn(EXPERTS, generator=generator)
    chosen = (torch.randn(tokens, EXPERTS, generator=generator) + favorites).topk(TOP).indices
    return torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()


def tensors(listed: list[int], inner: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(profile.device).manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=profile.device, dtype=DTYPE, generator=generator)

    sizes = torch.tensor(listed, dtype=torch.int32, device=profile.device)
    return drawn(sum(listed), inner), drawn(len(listed), cols, inner) / inner**0.5, sizes


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for shape, (inner, cols) in SHAPES.items():
        for tokens in TOKENS[-1:] if published else TOKENS:
            for even in (True, False):
                listed = group_sizes(tokens, even)
                given = (*tensors(listed, inner, cols), listed)
                functions = {name: lambda way=way, given=given: way(*given) for name, way in ways(lesson).items()}
                work = {"": 2 * sum(listed) * inner * cols}
                settings = {"empty": listed.count(0), "largest": max(listed)}
                name = f"{shape}, {tokens} tokens, {'even' if even else 'uneven'}"
                yield Case(name, OURS, functions, work, "TFLOP/s", settings=settings)


if __name__ == "__main__":
    main("11", __doc__.splitlines()[0])
