"""Speed of lesson 11's grouped product on this GPU, beside a loop of torch.mm and PyTorch's own grouped_mm.

    python -m benchmarks.grouped_gemm --out benchmarks/results/grouped_gemm.json

bfloat16, the shapes of a mixture of 128 experts of width 768 at a model width of 2,048, 8 experts a token: gate and up
in one product (2048 → 1536) and down (768 → 2048), for 64 to 32,768 tokens, with even and with uneven loads (some
experts empty where tokens are few). TFLOP/s count 2 · rows · K · N. Median, 20 % and 80 % quantiles of
`triton.testing.do_bench`, all peers in one run. Before any timing each peer is compared with float64. Every peer gets
rows already sorted; group sizes lie on the GPU for ours and grouped_mm, and in Python too for the loop.
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

LESSON = Path(__file__).parents[1] / "solutions" / "stage2_transformer" / "11_ffn_and_moe.py"
EXPERTS, TOP = 128, 8
SHAPES = {"gate and up": (2048, 1536), "down": (768, 2048)}
TOKENS = (64, 1024, 8192, 32_768)
OURS = "lesson 11"
Product = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def loop(x: Tensor, w: Tensor, sizes: Tensor, listed: list[int]) -> Tensor:
    """One torch.mm a group, into one output: no concatenation is charged to it."""
    out = torch.empty(len(x), w.shape[1], dtype=x.dtype, device=x.device)
    for part, matrix, target in zip(x.split(listed), w, out.split(listed), strict=True):
        if len(part):
            torch.mm(part, matrix.T, out=target)
    return out


def implementations(lesson: SimpleNamespace) -> dict[str, Product]:
    peers = {OURS: lambda x, w, sizes, listed: lesson.grouped_gemm(x, w, sizes), "loop of torch.mm": loop}
    if hasattr(F, "grouped_mm"):
        peers["F.grouped_mm"] = lambda x, w, sizes, listed: F.grouped_mm(
            x, w.mT, offs=sizes.cumsum(0, dtype=torch.int32))
    return peers


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
        return torch.randn(*shape, device=profile.device, dtype=torch.bfloat16, generator=generator)

    sizes = torch.tensor(listed, dtype=torch.int32, device=profile.device)
    return drawn(sum(listed), inner), drawn(len(listed), cols, inner) / inner**0.5, sizes


def errors(peers: dict[str, Product]) -> dict[str, float]:
    """Relative L2 error against float64 on uneven groups, some empty. Stops where ours is twice the loop's."""
    listed = [0, 1, 700, 0, 129, 128, 3000, 0]
    x, w, sizes = tensors(listed, 520, 264)
    exact = torch.cat([part @ matrix.T for part, matrix in zip(x.double().split(listed), w.double(), strict=True)])
    found = {name: float((function(x, w, sizes, listed).double() - exact).norm() / exact.norm())
             for name, function in peers.items()}
    if not found[OURS] <= 2 * found["loop of torch.mm"]:
        raise SystemExit(f"the error is {found[OURS]:.1e}; a loop of torch.mm has {found['loop of torch.mm']:.1e}")
    return found


def measure(peers: dict[str, Product], shape: str, tokens: int, even: bool) -> list[dict]:
    import triton

    inner, cols = SHAPES[shape]
    listed = group_sizes(tokens, even)
    x, w, sizes = tensors(listed, inner, cols)
    rows = []
    for name, function in peers.items():
        timed = triton.testing.do_bench(lambda f=function: f(x, w, sizes, listed), quantiles=[0.5, 0.2, 0.8])
        rows.append({"implementation": name, "shape": shape, "tokens": tokens, "even": even, "rows": len(x),
                     "empty": listed.count(0), "largest": max(listed), "ms": list(timed),
                     "tflops": 2 * len(x) * inner * cols / timed[0] / 1e9})
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Our speed over each peer's, by case."""
    speed = {(r["shape"], r["tokens"], r["even"], r["implementation"]): r["tflops"] for r in rows}
    found = {}
    for (shape, tokens, even, name), value in speed.items():
        if name != OURS:
            case = f"{shape}, {tokens} tokens, {'even' if even else 'uneven'} / {name}"
            found[case] = round(speed[shape, tokens, even, OURS] / value, 3)
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
    rows = [row for shape in SHAPES for tokens in TOKENS for even in (True, False)
            for row in measure(peers, shape, tokens, even)]
    result = {
        "what": "products of 128 experts' weights with their tokens, bfloat16, TFLOP/s",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "quantiles": [0.5, 0.2, 0.8],
        "relative_errors": accuracy, "ratios": ratios(rows), "measurements": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['implementation']:18}{row['shape']:13}{row['tokens']:7}{' even' if row['even'] else ' uneven':8}"
              f"{row['tflops']:8.1f} TFLOP/s")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
