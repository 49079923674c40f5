"""Speed of lesson 03's fused SwiGLU kernels on this GPU, beside a plain copy, torch.compile and eager PyTorch.

    python -m benchmarks.swiglu --out benchmarks/results/swiglu.json

bfloat16, 8,192 rows of 4,096 to 28,672 columns, as two tensors and as the two halves of one. TB/s count the bytes that
must move: 3 tensors forward, 5 backward; the copy moves 2. Median, 20 % and 80 % quantiles of
`triton.testing.do_bench`, all peers in one run. Before any timing each peer is compared with float64.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import flash_attention
from llm40 import profile

LESSON = Path(__file__).parents[1] / "solutions" / "stage1_foundations" / "03_activation_functions.py"
ROWS, COLUMNS = 8192, (4096, 8192, 14336, 28672)
OURS = "lesson 03"
Gate = Callable[[Tensor, Tensor], Tensor]


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def implementations(lesson: SimpleNamespace) -> dict[str, Gate]:
    return {OURS: lesson.FusedSwiGLU.apply, "torch.compile": torch.compile(eager, dynamic=False), "eager": eager}


def tensors(rows: int, columns: int, halves: bool) -> tuple[list[Tensor], Tensor]:
    """(gate, up), leaves for autograd, and the gradient that arrives; gate and up as `halves` of one tensor's rows."""
    generator = torch.Generator(profile.device).manual_seed(3)
    both = torch.randn(rows, 2 * columns, device=profile.device, dtype=torch.bfloat16, generator=generator)
    parts = both.chunk(2, dim=-1) if halves else [half.contiguous() for half in both.chunk(2, dim=-1)]
    grad = torch.randn(rows, columns, device=profile.device, dtype=torch.bfloat16, generator=generator)
    return [part.detach().requires_grad_() for part in parts], grad


def errors(peers: dict[str, Gate]) -> dict[str, dict[str, float]]:
    """Relative L2 error against float64, 100 rows of 1,000 (off every block). Stops where ours is twice eager's."""
    leaves, grad = tensors(100, 1000, halves=True)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact_out = eager(*exact_leaves)
    exact = (exact_out, *torch.autograd.grad(exact_out, exact_leaves, grad.double()))
    found = {}
    for name, function in peers.items():
        out = function(*leaves)
        got = (out, *torch.autograd.grad(out, leaves, grad))
        found[name] = {what: float((a.detach().double() - e.detach()).norm() / e.detach().norm())
                       for what, a, e in zip(("out", "dgate", "dup"), got, exact, strict=True)}
    for what, usual in found["eager"].items():
        if not found[OURS][what] <= 2 * usual:
            raise SystemExit(f"{what}'s error is {found[OURS][what]:.1e}; eager PyTorch has {usual:.1e}")
    return found


def measure(peers: dict[str, Gate], columns: int, halves: bool) -> list[dict]:
    import triton

    leaves, grad = tensors(ROWS, columns, halves)
    target, size = torch.empty_like(grad), grad.numel() * grad.element_size()
    timed: list[tuple[str, str, int, Callable]] = [("copy", "both", 2, lambda: target.copy_(grad))]
    for name, function in peers.items():
        out = function(*leaves)
        timed += [(name, "forward", 3, lambda f=function: f(*leaves)),
                  (name, "backward", 5, lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True))]
    rows = []
    for name, direction, moved, function in timed:
        median, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        rows.append({"implementation": name, "pass": direction, "columns": columns, "halves": halves,
                     "ms": [median, low, high], "tbps": moved * size / median / 1e9})
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Our bandwidth over each peer's, by pass and shape: {"forward 8192 × 14336 / copy": …}."""
    speed = {(r["implementation"], r["pass"], r["columns"], r["halves"]): r["tbps"] for r in rows}
    found = {}
    for (name, direction, columns, halves), value in speed.items():
        for which in ("forward", "backward") if direction == "both" else (direction,):
            if name != OURS:
                case = f"{which} {ROWS} × {columns}{', halves' if halves else ''} / {name}"
                found[case] = round(speed[OURS, which, columns, halves] / value, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    if profile.name != "gpu" or profile.interpret:
        sys.exit("This measures a GPU and PyTorch sees none here (or TRITON_INTERPRET=1 is set).")
    import triton

    peers = implementations(flash_attention.reference(LESSON))
    accuracy = errors(peers)
    rows = [row for columns in COLUMNS for halves in (False, True) for row in measure(peers, columns, halves)]
    result = {
        "what": "SwiGLU's element-wise part, bfloat16, TB/s of the bytes that must move",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "rows": ROWS, "quantiles": [0.5, 0.2, 0.8],
        "relative_errors": accuracy, "ratios": ratios(rows), "measurements": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['implementation']:14}{row['pass']:10}{row['columns']:6}{' halves' if row['halves'] else '':8}"
              f"{row['tbps']:7.2f} TB/s")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
