"""Trains lesson 14's LLaMA-160M on this GPU for a few minutes: tokens per second, MFU and the loss.

    python -m benchmarks.14_building_a_llama

bfloat16 autocast over float32 weights, torch.compile, PyTorch's fused attention, sequences of 1,024 tokens, AdamW with
the lesson's parameter groups, clipping and schedule. The text is the course's own corpus in the course's tokenizer
(4,096 of the 32,000 ids). Speed is the median over steps, timed on the device after compilation. MFU counts the
lesson's 6 N + 12 L T d per token, against the data sheet's peak where the device is known, and against the largest
bfloat16 product measured in the same run. Before any timing the compiled bfloat16 model is compared with eager float32.
"""

import argparse
import itertools
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels import interleave, machine, need_gpu, reference
from benchmarks.rows import RESULTS, describe, write
from llm40 import models, profile
from llm40.models.corpus import corpus

CONTEXT = 1024
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s of the SXM versions, from data sheets


def tokens() -> Tensor:
    """The training documents, end to end, on the device: (about 2.7 million,), int64."""
    tokenizer = models.load_tokenizer()
    documents = tokenizer.encode_batch(list(corpus()[0].values()))
    return torch.tensor([i for ids in documents for i in (*ids, tokenizer.eos)], device=profile.device)


def product_peak(size: int = 8192) -> float:
    """FLOP/s of a bfloat16 product of two (size, size) matrices."""
    a, b = torch.randn(2, size, size, device=profile.device, dtype=torch.bfloat16)
    times, _ = interleave({"product": lambda: a @ b})
    return 2 * size**3 / (times["product"][0] / 1e3)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    with torch.autocast(profile.device.type, torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def difference(model: nn.Module, compiled: nn.Module, windows: Tensor) -> dict[str, float]:
    """The compiled bfloat16 model beside eager float32: relative L2 error of the logits, and both losses."""
    exact = model(windows[:, :-1])
    with torch.autocast(profile.device.type, torch.bfloat16):
        fast = compiled(windows[:, :-1]).float()
    target = windows[:, 1:].flatten()
    return {
        "logits": float((fast - exact).norm() / exact.norm()),
        "loss, float32": float(F.cross_entropy(exact.flatten(0, 1), target)),
        "loss, bfloat16": float(F.cross_entropy(fast.flatten(0, 1), target)),
    }


def train(lesson: SimpleNamespace, text: Tensor, batch: int, minutes: float, warmup: int = 100) -> dict:
    torch.manual_seed(14)
    model = lesson.Llama(lesson.LLAMA_160M).to(profile.device)
    compiled = torch.compile(model, dynamic=False)
    groups = lesson.parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    order = torch.Generator(profile.device).manual_seed(14)
    window = torch.arange(CONTEXT + 1, device=profile.device)

    def windows() -> Tensor:
        begin = torch.randint(len(text) - CONTEXT, (batch, 1), device=profile.device, generator=order)
        return text[begin + window]

    errors = difference(model, compiled, windows()[:4])
    if not errors["logits"] < 0.05:
        raise AssertionError(f"the compiled bfloat16 model's logits are off by {errors['logits']:.1e}")

    def step(rate: float) -> Tensor:
        loss = loss_of(compiled, windows())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        return loss.detach()

    # Compiles, then estimates how many steps the minutes hold, since the schedule needs their number.
    losses = [step(6e-4 * (i + 1) / warmup) for i in range(10)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    losses += [step(6e-4 * (i + 1) / warmup) for i in range(10, 20)]
    torch.cuda.synchronize()
    steps = max(2 * warmup, 20 + int(minutes * 60 / ((time.perf_counter() - began) / 10)))
    options = lesson.TrainOptions(steps=steps, warmup=warmup, learning_rate=6e-4, min_learning_rate=6e-5)

    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(20, steps + 1)]
    marks[0].record()
    for i, mark in zip(range(20, steps), marks[1:], strict=True):
        losses.append(step(lesson.learning_rate(i, options)))
        mark.record()
    torch.cuda.synchronize()
    ms = torch.tensor([a.elapsed_time(b) for a, b in itertools.pairwise(marks)], dtype=torch.float64)
    quantiles = torch.quantile(ms, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    values = torch.stack(losses).tolist()
    return {
        "steps": steps,
        "batch": batch,
        "context": CONTEXT,
        "minutes": float(ms.sum()) / 6e4,
        "ms_per_step": quantiles,
        "tokens_per_second": batch * CONTEXT / quantiles[0] * 1e3,
        "tokens": steps * batch * CONTEXT,
        "passes_over_the_text": steps * batch * CONTEXT / len(text),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "relative_errors": errors,
        "loss": {"first": values[0], "last 20, mean": sum(values[-20:]) / 20},
        "losses": [round(v, 4) for v in values[:: max(1, steps // 200)]],
    }


def measure(minutes: float, batch: int = 32) -> dict:
    """What a run of so many minutes gives: speed, MFU, memory, the loss."""
    torch.set_float32_matmul_precision("highest")
    lesson = reference("14")
    measured = train(lesson, tokens(), batch, minutes)
    device, peak = torch.cuda.get_device_name(), product_peak()
    sheet = next((value for name, value in PEAKS.items() if name in device), None)
    speed = measured["tokens_per_second"]
    mfu = {"of the measured product": lesson.mfu(speed, lesson.LLAMA_160M, CONTEXT, peak)}
    if sheet:
        mfu["of the data sheet"] = lesson.mfu(speed, lesson.LLAMA_160M, CONTEXT, sheet)
    return {
        "key": f"LLaMA-160M, batch {batch} × {CONTEXT}",
        "flops_per_token": lesson.flops_per_token(lesson.LLAMA_160M, CONTEXT),
        "product_tflops": round(peak / 1e12, 1),
        "mfu": {name: round(share, 4) for name, share in mfu.items()},
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "14_building_a_llama.json", help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, compilation not counted")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 1,024 tokens in a step")
    options = parser.parse_args()
    need_gpu()
    row = measure(options.minutes, options.batch)
    print(describe(row))
    what = "LLaMA-160M trained in bfloat16 with torch.compile and SDPA"
    write(options.out, {"what": what, "date": datetime.now(UTC).isoformat(timespec="seconds"), **machine(), **row})


if __name__ == "__main__":
    main()
