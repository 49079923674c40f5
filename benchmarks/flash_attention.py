"""Speed of lesson 29's attention kernels on this GPU, beside PyTorch's SDPA (Flash, cuDNN) and flex attention.

    python -m benchmarks.flash_attention --out benchmarks/results/flash_attention.json

bfloat16, 32 heads, 32,768 tokens in all (batch = 32,768 / S), S = 1k … 16k, head dimension 64 and 128, with and without
a causal mask, forward and backward. TFLOP/s count 4·S²·D per head forward and 2.5 times that backward, half with a
causal mask. Median, 20 % and 80 % quantiles of `triton.testing.do_bench`, all peers in one run. Before any timing,
each implementation's output and gradients are compared with float64.
"""

import argparse
import json
import linecache
import math
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import jupytext
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm40 import profile

LESSON = Path(__file__).parents[1] / "solutions" / "stage5_inference" / "29_flash_attention.py"
TOKENS, HEADS = 32_768, 32
LENGTHS = (1024, 2048, 4096, 8192, 16384)
OURS = "lesson 29"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def reference(lesson: Path = LESSON) -> SimpleNamespace:
    """What a lesson's plain and exercise cells define."""
    names = {"__name__": f"lesson_{lesson.stem[:2]}"}
    for i, cell in enumerate(jupytext.read(lesson, fmt="py:percent").cells):
        skipped = "check" in cell.metadata or "experiment" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not skipped:
            where = f"<lesson {lesson.stem[:2]}, cell {i}>"
            # Triton reads a kernel's text through inspect, and so through this cache.
            linecache.cache[where] = (len(cell.source), None, cell.source.splitlines(keepends=True), where)
            exec(compile(cell.source, where, "exec"), names)
    return SimpleNamespace(**names)


def sdpa(backend: SDPBackend, causal: bool) -> Attend:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return attend


def flex(S: int, causal: bool) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, S, S, device="cuda") if causal else None
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def implementations(lesson: SimpleNamespace, S: int, causal: bool) -> dict[str, Attend]:
    return {
        OURS: lambda q, k, v: lesson.FlashAttention.apply(q, k, v, causal),
        "SDPA Flash": sdpa(SDPBackend.FLASH_ATTENTION, causal),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, causal),
        "flex": flex(S, causal),
    }


def tensors(batch: int, heads: int, S: int, D: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(29)
    q, k, v, do = torch.randn(4, batch, heads, S, D, device="cuda", dtype=torch.bfloat16, generator=generator)
    return [t.clone().requires_grad_() for t in (q, k, v)], do


def errors(lesson: SimpleNamespace, D: int, causal: bool) -> dict[str, dict[str, float]]:
    """Relative L2 error against float64 of the output and gradients, at 2 heads of 1,000 tokens (off every block)."""
    S = 1000
    leaves, do = tensors(1, 2, S, D)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    scores = exact_leaves[0] @ exact_leaves[1].mT / math.sqrt(D)
    if causal:
        scores = scores.masked_fill(~torch.ones(S, S, dtype=torch.bool, device="cuda").tril(), -math.inf)
    exact_o = torch.softmax(scores, -1) @ exact_leaves[2]
    exact = (exact_o, *torch.autograd.grad(exact_o, exact_leaves, do.double()))
    found = {}
    peers = implementations(lesson, S, causal) | {"SDPA math": sdpa(SDPBackend.MATH, causal)}
    for name, attend in peers.items():
        try:
            o = attend(*leaves)
            got = (o, *torch.autograd.grad(o, leaves, do))
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        found[name] = {what: float((a.double() - e).norm() / e.norm())
                       for what, a, e in zip(("o", "dq", "dk", "dv"), got, exact, strict=True)}
    for what, factor in (("o", 2), ("dq", 3), ("dk", 3), ("dv", 3)):
        ours, usual = found[OURS][what], found["SDPA math"][what]
        if not ours <= factor * usual:
            raise SystemExit(f"D={D}, causal={causal}: {what}'s error is {ours:.1e}; SDPA's plain path has {usual:.1e}")
    return found


def measure(lesson: SimpleNamespace, S: int, D: int, causal: bool) -> list[dict]:
    import triton

    leaves, do = tensors(TOKENS // S, HEADS, S, D)
    flops = 4 * TOKENS * HEADS * S * D * (0.5 if causal else 1.0)
    rows = []
    for name, attend in implementations(lesson, S, causal).items():
        try:
            o = attend(*leaves)
            timed = {"forward": (flops, lambda attend=attend: attend(*leaves)),
                     "backward": (2.5 * flops, lambda o=o: torch.autograd.grad(o, leaves, do, retain_graph=True))}
            for direction, (work, function) in timed.items():
                median, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
                rows.append({"implementation": name, "pass": direction, "S": S, "D": D, "causal": causal,
                             "ms": [median, low, high], "tflops": work / median / 1e9})
        except RuntimeError as error:  # a back end that this build or this GPU lacks, or too little memory
            print(f"{name}, S={S}, D={D}: {str(error).splitlines()[0]}", file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    lines = ["pass      D   causal      S  " + "".join(f"{n:>12}" for n in names) + "   TFLOP/s, median"]
    cases = dict.fromkeys((r["pass"], r["D"], r["causal"], r["S"]) for r in rows)
    for case in sorted(cases, key=lambda c: (c[0] != "forward", *c[1:])):
        found = {r["implementation"]: r["tflops"] for r in rows if (r["pass"], r["D"], r["causal"], r["S"]) == case}
        lines.append(f"{case[0]:8}{case[1]:4}  {'yes' if case[2] else 'no':>6} {case[3]:6}  "
                     + "".join(f"{found[n]:12.0f}" if n in found else f"{'-':>12}" for n in names))
    return "\n".join(lines)


def ratios(rows: list[dict]) -> dict[str, float]:
    """This lesson's speed over each peer's, causal, median over S ≥ 4096: {"forward D128 / SDPA Flash": …}."""
    speed = {(r["implementation"], r["pass"], r["D"], r["causal"], r["S"]): r["tflops"] for r in rows}
    found: dict[str, list[float]] = {}
    for (name, direction, D, causal, S), value in speed.items():
        ours = speed.get((OURS, direction, D, causal, S))
        if name != OURS and causal and S >= 4096 and ours:
            found.setdefault(f"{direction} D{D} / {name}", []).append(ours / value)
    return {key: round(statistics.median(values), 3) for key, values in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="sequence lengths")
    options = parser.parse_args()
    if profile.name != "gpu" or profile.interpret:
        raise SystemExit("This measures a GPU and PyTorch sees none here (or TRITON_INTERPRET=1 is set).")
    import triton

    lesson = reference()
    cases = [(D, causal) for D in (64, 128) for causal in (False, True)]
    accuracy = {f"D{D}{' causal' if causal else ''}": errors(lesson, D, causal) for D, causal in cases}
    rows = [row for D, causal in cases for S in options.lengths for row in measure(lesson, S, D, causal)]
    result = {
        "what": "attention, bfloat16, TFLOP/s", "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(),
        "heads": HEADS, "tokens": TOKENS, "quantiles": [0.5, 0.2, 0.8],
        "relative_errors": accuracy, "ratios_causal_from_4k": ratios(rows), "measurements": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(json.dumps(result["ratios_causal_from_4k"], indent=1))


if __name__ == "__main__":
    main()
