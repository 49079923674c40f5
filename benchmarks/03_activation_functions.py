"""Speed of lesson 03's fused SwiGLU kernels on this GPU, beside a plain copy, torch.compile and eager PyTorch.

    python -m benchmarks.03_activation_functions

bfloat16, 8,192 rows of 4,096 to 28,672 columns, as two tensors and as the two halves of one. TB/s count the bytes that
must move: 3 tensors forward, 5 backward; the copy moves 2.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case, Goal, backward_of, main
from llm40 import profile

DTYPE = torch.bfloat16
ROWS, COLUMNS = 8192, (4096, 8192, 14336, 28672)
PUBLISHED = [(14336, False)]  # columns, and whether gate and up are halves of one tensor
SMALL = {"ROWS": 2, "PUBLISHED": [(40, False), (40, True)]}
OURS = "lesson 03"
GOALS = [Goal("forward, 8192 × 14336", "copy", 0.95)]


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def tensors(rows: int, columns: int, halves: bool) -> tuple[list[Tensor], Tensor]:
    """(gate, up), leaves for autograd, and the gradient that arrives; gate and up as `halves` of one tensor's rows."""
    generator = torch.Generator(profile.device).manual_seed(3)
    both = torch.randn(rows, 2 * columns, device=profile.device, dtype=DTYPE, generator=generator)
    parts = both.chunk(2, dim=-1) if halves else [half.contiguous() for half in both.chunk(2, dim=-1)]
    grad = torch.randn(rows, columns, device=profile.device, dtype=DTYPE, generator=generator)
    return [part.detach().requires_grad_() for part in parts], grad


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    shapes = PUBLISHED if published else [(columns, halves) for columns in COLUMNS for halves in (False, True)]
    for columns, halves in shapes:
        leaves, grad = tensors(ROWS, columns, halves)
        target, size = torch.empty_like(grad), grad.numel() * grad.element_size()
        ways = {
            OURS: lesson.FusedSwiGLU.apply,
            "torch.compile": torch.compile(eager, dynamic=False),
            "eager": eager,
        }
        copy = {"copy": lambda target=target, grad=grad: target.copy_(grad)}
        name = f"{ROWS} × {columns}{', halves of one' if halves else ''}"
        forward = {way: lambda f=f, leaves=leaves: f(*leaves) for way, f in ways.items()}
        yield Case(f"forward, {name}", OURS, forward | copy, {"": 3 * size, "copy": 2 * size}, "TB/s")
        backward = {way: backward_of(f(*leaves), leaves, grad) for way, f in ways.items()}
        yield Case(f"backward, {name}", OURS, backward | copy, {"": 5 * size, "copy": 2 * size}, "TB/s")


if __name__ == "__main__":
    main("03", __doc__.splitlines()[0])
