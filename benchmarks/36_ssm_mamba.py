"""Speed of lesson 36's scan kernels on this GPU, beside a plain copy, its exponential units and torch.compile.

    python -m benchmarks.36_ssm_mamba

The gated scan in float32, 8 × 1,536 rows of 1,024 to 16,384 numbers: TB/s count two tensors read and one written; the
copy moves one each way. The selective scan in bfloat16, batch 8, 2,048 channels, 16 numbers of state, 1k to 8k tokens:
T exp/s count one exponential for each token, channel and number of state, which is what limits it. "exponentials" is a
kernel that computes as many and does nothing else. PyTorch's associative_scan gets the tensors that it needs made in
the same compiled function.
"""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.kernels import Case, Goal, main
from llm40 import profile, tl, triton

DTYPE = torch.bfloat16  # of the selective scan; the gated one is in float32
BATCH, ROWS, CHANNELS, STATES = 8, 1536, 2048, 16
SHAPES = {"gated": (1024, 2048, 4096, 8192, 16384), "selective": (1024, 2048, 4096, 8192)}
PUBLISHED = {"gated": (4096,), "selective": (2048,)}
SMALL = {"BATCH": 1, "ROWS": 3, "CHANNELS": 3, "STATES": 2, "PUBLISHED": {"gated": (21,), "selective": (21,)}}
OURS = "lesson 36"
PEER = "torch.compile of associative_scan"
GOALS = [
    Goal("gated", "copy", 0.80),
    Goal("selective scan and exponentials", "exponentials", 0.5),
    Goal("selective scan, ", PEER, 3.0),
]
BLOCK, EACH = 1024, 64  # elements of a program of `exponentials_kernel`, and how many exponentials of each


@triton.jit
def exponentials_kernel(out_ptr, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """EACH exponentials for each of BLOCK elements, independent of one another, and their sum."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i.to(tl.float32) * -1e-9
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(EACH):
        total += tl.exp2(x - k)
    tl.store(out_ptr + i, total)


def exponentials(count: int) -> Callable[[], Tensor]:
    """At least `count` of them, EACH for each number that is written."""
    programs = -(-count // (BLOCK * EACH))
    out = torch.empty(programs * BLOCK, device=profile.device)

    def run() -> Tensor:
        exponentials_kernel[(programs,)](out, EACH=EACH, BLOCK=BLOCK)
        return out

    return run


def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return first[0] * second[0], second[0] * first[1] + second[1]


def scanned(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's prototype along the last axis."""
    from torch._higher_order_ops.associative_scan import associative_scan

    mode = "pointwise" if a.is_cuda else "generic"
    return associative_scan(combine, (a, b), dim=a.dim() - 1, combine_mode=mode)[1]


def selective(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    u32, dt32 = u.float().mT, dt.float().mT  # (batch, channels, length)
    decay = torch.exp(dt32[:, :, None] * A[:, :, None])  # (batch, channels, states, length)
    states = scanned(decay, (dt32 * u32)[:, :, None] * B.float().mT[:, None])
    return ((states * C.float().mT[:, None]).sum(2) + D[:, None] * u32).mT.to(u.dtype)


def gated_case(lesson: SimpleNamespace, length: int) -> Case:
    generator = torch.Generator(profile.device).manual_seed(36)
    a, b = (torch.rand(BATCH, ROWS, length, device=profile.device, generator=generator) for _ in range(2))
    target, out, size = torch.empty_like(a), torch.empty_like(a), a.numel() * a.element_size()
    compiled = torch.compile(scanned, dynamic=False)
    functions = {
        OURS: lambda: lesson.gated_scan(a, b, out=out),
        PEER: lambda: compiled(a, b),
        "copy": lambda: target.copy_(a),
    }
    name = f"gated scan, {BATCH} × {ROWS} rows of {length}"
    return Case(name, OURS, functions, {"": 3 * size, "copy": 2 * size}, "TB/s")


def selective_cases(lesson: SimpleNamespace, length: int) -> Iterator[Case]:
    generator = torch.Generator(profile.device).manual_seed(37)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=profile.device, generator=generator)

    u, dt = drawn(BATCH, length, CHANNELS).to(DTYPE), (0.3 * drawn(BATCH, length, CHANNELS).abs()).to(DTYPE)
    A = -torch.arange(1.0, STATES + 1, device=profile.device).repeat(CHANNELS, 1)
    B, C = (drawn(BATCH, length, STATES).to(DTYPE) for _ in range(2))
    D = torch.ones(CHANNELS, device=profile.device)
    inputs, count = (u, dt, A, B, C, D), BATCH * CHANNELS * STATES * length
    shape = f"{BATCH} × {length} tokens, {CHANNELS} channels, N {STATES}"

    def ours() -> Tensor:
        return lesson.fused_selective_scan(*inputs)

    compiled = torch.compile(selective, dynamic=False)
    functions: dict[str, Callable] = {OURS: ours, PEER: lambda: compiled(*inputs)}
    yield Case(f"selective scan, {shape}", OURS, functions, {"": count}, "T exp/s")
    run = exponentials(count)
    made = math.prod(run().shape) * EACH
    functions, work = {OURS: ours, "exponentials": run}, {"": count, "exponentials": made}
    yield Case(f"selective scan and exponentials, {shape}", OURS, functions, work, "T exp/s", same=False)


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    lengths = PUBLISHED if published else SHAPES
    for length in lengths["gated"]:
        yield gated_case(lesson, length)
    for length in lengths["selective"]:
        yield from selective_cases(lesson, length)


if __name__ == "__main__":
    main("36", __doc__.splitlines()[0])
