"""Speed of lesson 04's RMSNorm kernels on this GPU, beside a plain copy, F.rms_norm, torch.compile and Liger's kernel.

    python -m benchmarks.04_normalization

bfloat16, rows of 1,024 to 16,384 numbers. TB/s count the bytes that must move: 2 tensors forward, 3 backward; the copy
moves 2. Liger's kernel where liger-kernel is installed.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case, Goal, backward_of, imported, main
from llm40 import profile

DTYPE = torch.bfloat16
SHAPES = {
    "forward": [(8192, width) for width in (1024, 2048, 4096, 8192, 16384)],
    "backward": [(4096, 4096), (8192, 8192), (8192, 16384)],
}
PUBLISHED = {"forward": SHAPES["forward"][2:], "backward": SHAPES["backward"][:1]}
SMALL = {"PUBLISHED": {"forward": [(3, 40)], "backward": [(3, 40)]}}
OURS, EPS = "lesson 04", 1e-6
GOALS = [
    Goal("forward", "copy", 0.93),
    Goal("forward", "Liger", 0.98),
    Goal("forward", "torch.compile", 1.1),
    Goal("backward, 4096 × 4096", "Liger", 1.5),
    Goal("backward, 4096 × 4096", "F.rms_norm", 1.0),
]


def by_definition(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * w


def ways(lesson: SimpleNamespace) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found = {
        OURS: lambda x, w: lesson.TritonRMSNorm.apply(x, w, EPS),
        "torch.compile": torch.compile(by_definition, dynamic=False),
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
    }
    liger = imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    if liger:  # not in place: the gradient that arrives is the same in every call
        found["Liger"] = lambda x, w: liger.apply(x, w, EPS, 0.0, "llama", False)
    return found


def tensors(rows: int, width: int) -> tuple[list[Tensor], Tensor]:
    """(x, w), leaves for autograd, and the gradient that arrives."""
    generator = torch.Generator(profile.device).manual_seed(4)
    x, dy, w = (
        torch.randn(*shape, device=profile.device, dtype=DTYPE, generator=generator)
        for shape in ((rows, width), (rows, width), (width,))
    )
    return [x.requires_grad_(), w.requires_grad_()], dy


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for direction, shapes in (PUBLISHED if published else SHAPES).items():
        for rows, width in shapes:
            leaves, dy = tensors(rows, width)
            target, size = torch.empty_like(dy), dy.numel() * dy.element_size()
            functions = {"copy": lambda target=target, dy=dy: target.copy_(dy)}
            for name, function in ways(lesson).items():
                if direction == "forward":
                    functions[name] = lambda f=function, leaves=leaves: f(*leaves)
                else:
                    functions[name] = backward_of(function(*leaves), leaves, dy)
            work = {"": (2 if direction == "forward" else 3) * size, "copy": 2 * size}
            yield Case(f"{direction}, {rows} × {width}", OURS, functions, work, "TB/s")


if __name__ == "__main__":
    main("04", __doc__.splitlines()[0])
