"""Speed of lesson 10's absorbed MLA decoding kernel on this GPU, beside a plain copy, PyTorch's products and SDPA.

    python -m benchmarks.mla_decode --out benchmarks/results/mla_decode.json

bfloat16, batch 32, latent 512 + 64, 16 and 128 heads, 4k to 32k tokens of cache. TB/s count the cache once for every
way to decode, and both directions for the copy; TFLOP/s count 2·(576 + 512) a head and token. Median, 20 % and 80 %
quantiles of `triton.testing.do_bench`, all peers in one run. Before any timing each peer is compared with float64, on
sequences of unequal length.
"""

import argparse
import json
import math
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

LESSON = Path(__file__).parents[1] / "solutions" / "stage2_transformer" / "10_attention_mla_sparse.py"
BATCH, RANK, ROPE, SCALE = 32, 512, 64, 192**-0.5
HEADS, LENGTHS = (16, 128), (4096, 8192, 16384, 32768)
OURS = "lesson 10"
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """Two batched products in the latent space, and what lies between them."""
    behind = torch.arange(cache.shape[1], device=q.device) >= lengths[:, None]
    scores = (torch.bmm(q, cache.transpose(1, 2)) * SCALE).masked_fill(behind[:, None], -math.inf)
    return torch.bmm(scores.float().softmax(-1).to(q.dtype), cache[..., :RANK])


def gathered(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """SDPA over the latent as one key-value head of 576; the values have the keys' width, as its kernels want."""
    seen = torch.arange(cache.shape[1], device=q.device) < lengths[:, None]
    kv = cache[:, None]
    out = F.scaled_dot_product_attention(q[:, :, None], kv, kv, seen[:, None, None], scale=SCALE, enable_gqa=True)
    return out[:, :, 0, :RANK]


def implementations(lesson: SimpleNamespace) -> dict[str, Decode]:
    def ours(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        return lesson.mla_decode(q, cache, lengths, RANK, SCALE)

    return {OURS: ours, "bmm": products, "torch.compile of bmm": torch.compile(products), "SDPA, gathered": gathered}


def tensors(heads: int, length: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(profile.device).manual_seed(10)
    shapes = ((batch, heads, RANK + ROPE), (batch, length, RANK + ROPE))
    q, cache = (torch.randn(*s, device=profile.device, dtype=torch.bfloat16, generator=generator) for s in shapes)
    return q, cache


def errors(peers: dict[str, Decode], lesson: SimpleNamespace) -> dict[str, dict[str, float]]:
    """Relative L2 error against float64, lengths off every block. Stops where ours is twice that of the products."""
    found: dict[str, dict[str, float]] = {name: {} for name in peers}
    lengths = torch.tensor([1, 13, 700, 1023], dtype=torch.int32, device=profile.device)
    for heads in (*HEADS, 20):
        q, cache = tensors(heads, 1023, batch=4)
        exact, _ = lesson.decode_by_definition(q, cache, lengths, RANK, SCALE)
        for name, decode in peers.items():
            found[name][f"{heads} heads"] = float((decode(q, cache, lengths).double() - exact).norm() / exact.norm())
    for heads, usual in found["bmm"].items():
        if not found[OURS][heads] <= 2 * usual:
            raise SystemExit(f"{heads}: our error is {found[OURS][heads]:.1e}; PyTorch's products have {usual:.1e}")
    return found


def measure(peers: dict[str, Decode], heads: int, length: int) -> list[dict]:
    import triton

    q, cache = tensors(heads, length)
    lengths = torch.full((BATCH,), length, dtype=torch.int32, device=profile.device)
    target, size = torch.empty_like(cache), cache.numel() * cache.element_size()
    flops = 2 * BATCH * heads * length * (2 * RANK + ROPE)
    rows = []
    timed = {"copy": lambda: target.copy_(cache)} | {n: lambda f=f: f(q, cache, lengths) for n, f in peers.items()}
    for name, function in timed.items():
        row = {"implementation": name, "heads": heads, "length": length}
        try:
            median, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        except RuntimeError as error:  # too little memory, or no back end for a head of 576
            rows.append(row | {"error": str(error).splitlines()[0]})
            continue
        copy = name == "copy"
        rows.append(row | {"ms": [median, low, high], "tbps": (2 if copy else 1) * size / median / 1e9,
                           "tflops": None if copy else flops / median / 1e9})  # fmt: skip
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Our speed over each peer's: of bandwidth for the copy, of time for the others."""
    timed = {(r["implementation"], r["heads"], r["length"]): r for r in rows if "ms" in r}
    found = {}
    for (name, heads, length), row in timed.items():
        if name != OURS and (OURS, heads, length) in timed:
            ours = timed[OURS, heads, length]
            found[f"{heads} heads, {length} tokens / {name}"] = round(ours["tbps"] / row["tbps"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    if profile.name != "gpu" or profile.interpret:
        sys.exit("This measures a GPU and PyTorch sees none here (or TRITON_INTERPRET=1 is set).")
    import triton

    lesson = flash_attention.reference(LESSON)
    peers = implementations(lesson)
    accuracy = errors(peers, lesson)
    rows = [row for heads in HEADS for length in LENGTHS for row in measure(peers, heads, length)]
    result = {
        "what": "absorbed MLA decoding, one token a sequence, bfloat16; TB/s of the cache read once",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "batch": BATCH, "latent": [RANK, ROPE],
        "quantiles": [0.5, 0.2, 0.8], "relative_errors": accuracy, "ratios": ratios(rows), "measurements": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        speed = row.get("error") or f"{row['tbps']:6.2f} TB/s"
        if row.get("tflops"):
            speed += f"{row['tflops']:7.0f} TFLOP/s"
        print(f"{row['implementation']:22}{row['heads']:4} heads{row['length']:7} tokens  {speed}")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
