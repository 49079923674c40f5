"""Speed of lesson 08's rotary kernel on this GPU, beside a plain copy, torch.compile, eager PyTorch and Liger's kernel.

    python -m benchmarks.rope --out benchmarks/results/rope.json

bfloat16, 8,192 tokens of 32 query heads over 8 or 32 key heads, 128 features a head, all of them or a quarter turned,
as tensors of their own and as slices of one projection. TB/s count the bytes that must move: q and k read once and
written once, cosines and sines read once; the copy moves as many numbers as q and k have. Median, 20 % and 80 %
quantiles of `triton.testing.do_bench`, all peers in one run. Before any timing each peer is compared with float64.
Liger's kernel is measured forward where liger-kernel is installed. It turns whole heads, in place where they lie
together, else in a copy.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import flash_attention
from llm40 import profile

LESSON = Path(__file__).parents[1] / "solutions" / "stage2_transformer" / "08_embeddings_and_positions.py"
TOKENS, Q_HEADS, HEAD_DIM = 8192, 32, 128
OURS = "lesson 08"
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    batch: int
    k_heads: int
    rotary: int  # features of a head that turn
    slices: bool  # whether q and k are parts of one projection's rows

    def __str__(self) -> str:
        layout = ", slices" if self.slices else ""
        return f"batch {self.batch}, {Q_HEADS}/{self.k_heads} heads, {self.rotary} of {HEAD_DIM} features{layout}"


CASES = [
    Case(1, 8, 128, False), Case(1, 8, 128, True), Case(8, 8, 128, True), Case(1, 32, 128, True), Case(1, 8, 32, True)
]  # fmt: skip


def implementations(lesson: SimpleNamespace, case: Case) -> dict[str, Turn]:
    """Each takes q (batch, seq, heads, head_dim), k, cos and sin (seq, rotary / 2), and returns both turned."""

    def eager(q, k, cos, sin):
        return tuple(lesson.apply_rope(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k))

    peers = {OURS: lambda *t: lesson.FusedRoPE.apply(*t, 0), "torch.compile": torch.compile(eager, dynamic=False),
             "eager": eager}  # fmt: skip
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return peers
    if case.rotary == HEAD_DIM:
        doubled: dict[int, list[Tensor]] = {}  # it wants every angle twice; made once, outside the timing

        def liger(q, k, cos, sin):
            if id(cos) not in doubled:
                doubled[id(cos)] = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
            out = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *doubled[id(cos)])
            return tuple(t.transpose(1, 2) for t in out[:2])

        peers["Liger"] = liger
    return peers


def tensors(lesson: SimpleNamespace, case: Case, tokens: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """([q, k], leaves for autograd, [cos, sin], and the gradients that arrive)."""
    generator = torch.Generator(profile.device).manual_seed(8)
    heads = Q_HEADS + 2 * case.k_heads
    both = torch.randn(case.batch, tokens // case.batch, heads, HEAD_DIM, device=profile.device, dtype=torch.bfloat16,
                       generator=generator)  # fmt: skip
    parts = both.split([Q_HEADS, case.k_heads, case.k_heads], dim=2)[:2]
    parts = [part.detach() if case.slices else part.contiguous() for part in parts]
    table = [t.to(profile.device) for t in lesson.rope_cache(tokens // case.batch, case.rotary, 500_000.0)]
    arriving = [torch.randn(p.shape, device=p.device, dtype=p.dtype, generator=generator) for p in parts]
    return [part.requires_grad_() for part in parts], table, arriving


def run(function: Turn, leaves: list[Tensor], table: list[Tensor], arriving: list[Tensor]) -> list[Tensor]:
    """The two results and their two gradients; `function` may work in place, so it gets copies of the leaves."""
    out = function(*(t.clone() for t in leaves), *table)
    found = [t.detach().clone() for t in out]
    return found + list(torch.autograd.grad(out, leaves, [t.clone() for t in arriving]))


def exact(leaves: list[Tensor], table: list[Tensor], arriving: list[Tensor]) -> list[Tensor]:
    """The same in complex numbers of float64."""
    cos, sin = (t.double()[:, None] for t in table)
    half = cos.shape[-1]

    def turned(x: Tensor, sign: float) -> Tensor:
        z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sign * sin)
        return torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)

    return [turned(t.detach().double(), 1.0) for t in leaves] + [turned(t.double(), -1.0) for t in arriving]


def errors(lesson: SimpleNamespace, case: Case) -> dict[str, dict[str, float]]:
    """Relative L2 error against float64 on 200 tokens a sequence. Stops where ours is twice eager's."""
    inputs = tensors(lesson, case, 200 * case.batch)
    wanted, found = exact(*inputs), {}
    for name, function in implementations(lesson, case).items():
        pairs = zip(("q", "k", "dq", "dk"), run(function, *inputs), wanted, strict=True)
        found[name] = {what: float((a.double() - e).norm() / e.norm()) for what, a, e in pairs}
    for what, usual in found["eager"].items():
        if not found[OURS][what] <= 2 * usual:
            raise SystemExit(f"{case}: {what}'s error is {found[OURS][what]:.1e}; eager PyTorch has {usual:.1e}")
    return found


def measure(lesson: SimpleNamespace, case: Case) -> list[dict]:
    import triton

    leaves, table, arriving = tensors(lesson, case, TOKENS)
    numbers = sum(t.numel() for t in leaves)
    must_move = 2 * 2 * numbers + sum(t.numel() * t.element_size() for t in table)
    source = torch.randn(numbers, device=profile.device).bfloat16()
    target = torch.empty_like(source)
    timed: list[tuple[str, str, int, Callable]] = [("copy", "both", 4 * numbers, lambda: target.copy_(source))]
    for name, function in implementations(lesson, case).items():
        given = leaves if name != "Liger" else [t.detach().clone() for t in leaves]  # in place: no leaves
        timed.append((name, "forward", must_move, lambda f=function, g=given: f(*g, *table)))
        if name != "Liger":
            out = function(*leaves, *table)
            timed.append((name, "backward", must_move,
                          lambda o=out: torch.autograd.grad(o, leaves, arriving, retain_graph=True)))  # fmt: skip
    rows = []
    for name, direction, moved, function in timed:
        median, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        rows.append({"implementation": name, "pass": direction, "case": asdict(case), "label": str(case),
                     "ms": [median, low, high], "tbps": moved / median / 1e9})  # fmt: skip
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Our bandwidth over each peer's, by pass and case: {"forward, batch 1, … / copy": …}."""
    speed = {(r["implementation"], r["pass"], r["label"]): r["tbps"] for r in rows}
    found = {}
    for (name, direction, label), value in speed.items():
        for which in ("forward", "backward") if direction == "both" else (direction,):
            if name != OURS:
                found[f"{which}, {label} / {name}"] = round(speed[OURS, which, label] / value, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    if profile.name != "gpu" or profile.interpret:
        sys.exit("This measures a GPU and PyTorch sees none here (or TRITON_INTERPRET=1 is set).")
    import triton

    lesson = flash_attention.reference(LESSON)
    accuracy = {str(case): errors(lesson, case) for case in CASES}
    rows = [row for case in CASES for row in measure(lesson, case)]
    result = {
        "what": "rotary positions on queries and keys, bfloat16, TB/s of the bytes that must move",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "tokens": TOKENS, "head_dim": HEAD_DIM,
        "quantiles": [0.5, 0.2, 0.8], "relative_errors": accuracy, "ratios": ratios(rows), "measurements": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['implementation']:14}{row['pass']:10}{row['label']:56}{row['tbps']:7.2f} TB/s")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
