"""Speed of lesson 08's rotary kernel on this GPU, beside a plain copy, torch.compile, eager PyTorch and Liger's kernel.

    python -m benchmarks.08_embeddings_and_positions

bfloat16, 8,192 tokens of 32 query heads over 8 or 32 key heads, 128 features a head, all of them or a quarter turned,
as tensors of their own and as slices of one projection. TB/s count the bytes that must move: q and k read once and
written once, cosines and sines read once; the copy moves as many numbers as q and k have. Liger's kernel is measured
forward where liger-kernel is installed. It turns whole heads, in place where they lie together, else in a copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.kernels import Case, Goal, backward_of, imported, main
from llm40 import profile

DTYPE = torch.bfloat16
TOKENS, Q_HEADS, HEAD_DIM = 8192, 32, 128
SMALL = {"TOKENS": 4}
OURS = "lesson 08"
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    batch: int
    k_heads: int
    rotary: int  # features of a head that turn
    slices: bool  # whether q and k are parts of one projection's rows

    def __str__(self) -> str:
        layout = ", slices" if self.slices else ""
        return f"batch {self.batch}, {Q_HEADS}/{self.k_heads} heads, {self.rotary} of {HEAD_DIM} features{layout}"


SHAPES = [
    Shape(1, 8, 128, False),
    Shape(1, 8, 128, True),
    Shape(8, 8, 128, True),
    Shape(1, 32, 128, True),
    Shape(1, 8, 32, True),
]
PUBLISHED = SHAPES[0]
GOALS = [Goal(f"forward, {PUBLISHED}", "torch.compile", 1.1), Goal(f"forward, {PUBLISHED}", "Liger", 1.8)]


def ways(lesson: SimpleNamespace, shape: Shape) -> dict[str, Turn]:
    """Each takes q (batch, seq, heads, head_dim), k, cos and sin (seq, rotary / 2), and returns both turned."""

    def eager(q, k, cos, sin):
        return tuple(lesson.apply_rope(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k))

    found = {
        OURS: lambda *t: lesson.FusedRoPE.apply(*t, 0),
        "torch.compile": torch.compile(eager, dynamic=False),
        "eager": eager,
    }
    function = imported("liger_kernel.ops.rope", "LigerRopeFunction")
    if function and shape.rotary == HEAD_DIM:
        doubled: dict[int, list[Tensor]] = {}  # it wants every angle twice; made once, outside the timing

        def liger(q, k, cos, sin):
            if id(cos) not in doubled:
                doubled[id(cos)] = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
            out = function.apply(q.transpose(1, 2), k.transpose(1, 2), *doubled[id(cos)])
            return tuple(t.transpose(1, 2) for t in out[:2])

        found["Liger"] = liger
    return found


def tensors(lesson: SimpleNamespace, shape: Shape, tokens: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """([q, k], leaves for autograd, [cos, sin], and the gradients that arrive)."""
    generator = torch.Generator(profile.device).manual_seed(8)
    sizes = shape.batch, tokens // shape.batch, Q_HEADS + 2 * shape.k_heads, HEAD_DIM
    both = torch.randn(*sizes, device=profile.device, dtype=DTYPE, generator=generator)
    parts = both.split([Q_HEADS, shape.k_heads, shape.k_heads], dim=2)[:2]
    parts = [part.detach() if shape.slices else part.contiguous() for part in parts]
    table = [t.to(profile.device) for t in lesson.rope_cache(tokens // shape.batch, shape.rotary, 500_000.0)]
    arriving = [torch.randn(p.shape, device=p.device, dtype=p.dtype, generator=generator) for p in parts]
    return [part.requires_grad_() for part in parts], table, arriving


def wrong_peers(lesson: SimpleNamespace, shape: Shape) -> dict[str, str]:
    """All ways on copies, since Liger's works in place: what peers that fail say. Ours must be right."""
    wrong: dict[str, str] = {}
    leaves, table, _ = tensors(lesson, shape, 64 * shape.batch)
    exact = lesson.apply_rope(leaves[0].detach().double().transpose(1, 2), *(t.double() for t in table)).transpose(1, 2)
    for name, way in ways(lesson, shape).items():
        try:
            found = way(*(t.detach().clone() for t in leaves), *table)[0]
            error = float((found.double() - exact).norm() / exact.norm())
            if not error < 0.01:
                raise AssertionError(f"the queries are off by {error:.1e} (relative L2)")
        except Exception as problem:
            if name == OURS:
                raise
            wrong[name] = f"{type(problem).__name__}: {problem}"
    return wrong


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for shape in [PUBLISHED] if published else SHAPES:
        wrong = wrong_peers(lesson, shape)
        leaves, table, arriving = tensors(lesson, shape, TOKENS)
        numbers = sum(t.numel() for t in leaves)
        source = torch.randn(numbers, device=profile.device).to(DTYPE)
        target = torch.empty_like(source)
        forward: dict[str, Callable] = {"copy": lambda target=target, source=source: target.copy_(source)}
        backward = dict(forward)
        for name, way in ways(lesson, shape).items():
            if name in wrong:
                continue
            # in place: no leaves
            given = [t.detach().clone() for t in leaves] if name == "Liger" else leaves
            forward[name] = lambda way=way, given=given, table=table: way(*given, *table)
            if name != "Liger":
                backward[name] = backward_of(way(*leaves, *table), leaves, arriving)
        work = {"": 4 * numbers + sum(t.numel() * t.element_size() for t in table), "copy": 4 * numbers}
        yield Case(f"forward, {shape}", OURS, forward, work, "TB/s", same=False, settings={"wrong": wrong})
        yield Case(f"backward, {shape}", OURS, backward, work, "TB/s")


if __name__ == "__main__":
    main("08", __doc__.splitlines()[0])
