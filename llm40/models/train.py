"""Trains a small model, from nothing or from weights: `python -m llm40.models.train --size small --minutes 60`.

Muon (Jordan et al. 2024) for the matrices inside the blocks and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)
for the rest; a warm-up–stable–decay schedule (Hu et al. 2024, arXiv:2404.06395), whose stable part can end at any time.
Interrupted, the same command goes on from its last checkpoint, to the same bits.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llm40 import profile
from llm40.models import weights
from llm40.models.corpus import Windows, corpus
from llm40.models.llama import CONFIGS, Llama
from llm40.models.mtp import MTP, Ahead
from llm40.models.recall import Mixture, Recall, copied
from llm40.models.tokenizer import Tokenizer


@dataclass
class Options:
    steps: int | None = None  # exactly one of steps and minutes is given: when training ends
    minutes: float | None = None
    until: int | None = None  # pause after this step, before training ends: another run can go on, with other options
    batch: int = 8  # windows in a step
    micro_batch: int = 2  # windows in one forward pass
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100  # steps
    precision: str = "float32"
    workers: int = 2  # forward passes at a time
    seed: int = 0
    checkpoint_every: float = 120  # seconds
    evaluate_every: int = 250  # steps
    keep: tuple[int, ...] = ()  # steps after which the weights are also saved as {name}-step{step}.safetensors


def learning_rate_factor(step: int, steps: int | None, warmup: int) -> float:
    """Rises over `warmup` steps, stays at 1, and falls to 0 over the last fifth. While `steps` is unknown it stays."""
    rising = min(1.0, (step + 1) / warmup)
    return rising if steps is None else min(rising, (steps - step) / max(1, steps // 5))


class Muon(torch.optim.Optimizer):
    """Muon for matrices, in float32: torch.optim.Muon computes in bfloat16, which on a processor without it takes more
    time (12 s a step of `small`) than the rest of the training. Updates are scaled to the size of AdamW's
    (arXiv:2502.16982), so that one learning rate serves both."""

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalize(matrix.grad.lerp(state["momentum_buffer"], group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with singular values near 1: five Newton–Schulz steps, with Jordan's coefficients."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(model: Llama, options: Options) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = Muon(matrices, options.learning_rate, options.weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(model: Llama, windows: Tensor, counted: Tensor, precision: str, total: int | None = None) -> Tensor:
    """Cross-entropy, in nats, of the `counted` tokens of windows, both (batch, context + 1): their sum, divided by
    `total` or by their number."""
    counted = counted[:, 1:]
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = F.linear(model.hidden(windows[:, :-1])[counted], model.embed_tokens.weight)
    return F.cross_entropy(logits.float(), windows[:, 1:][counted], reduction="sum") / (total or len(logits))


def accumulate(model: Llama, windows: Tensor, counted: Tensor, options: Options, pool: ThreadPoolExecutor) -> float:
    """Sets every parameter's .grad to the gradient of the mean loss of the counted tokens; the loss is returned.

    On a CPU the forward and backward passes of the micro-batches run side by side, one core each: at this size that is
    faster than one pass on all cores, and much faster when something else keeps a core busy.
    """
    parameters, total = list(model.parameters()), int(counted[:, 1:].sum())

    def gradient(part: Tensor, counted: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = loss_of(model, part, counted, options.precision, total)
        return loss.item(), torch.autograd.grad(loss, parameters)

    parts = windows.split(options.micro_batch), counted.split(options.micro_batch)
    mean, sums = 0.0, None
    for loss, gradients in pool.map(gradient, *parts):  # in order: always the same sum
        mean += loss
        sums = gradients if sums is None else torch._foreach_add(sums, gradients)
    for parameter, gradient_ in zip(parameters, sums, strict=True):
        parameter.grad = gradient_
    return mean


def train(
    model: Llama,
    windows: Windows | Mixture,
    held_out: Windows,
    options: Options,
    folder: Path,
    name: str,
    measure: Callable[[Llama], dict[str, float]] = lambda model: {},
) -> list[dict]:
    """Trains `model` in place; checkpoints and a log go to `folder`/`name`.pt and .jsonl. Returns the log's records.

    What `measure` returns is logged beside the held-out loss.
    """
    device = model.embed_tokens.weight.device
    optimizers = make_optimizers(model, options)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    step, steps, spent, records = 0, options.steps, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        step, spent, records, steps = state["step"], state["seconds"], state["records"], steps or state["steps"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def write_checkpoint() -> None:
        state = {
            "step": step,
            "steps": steps,
            "seconds": spent,
            "records": records,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint)  # whole or not at all, whenever the power goes
        log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def on_device(batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(batch[0]).to(device), torch.from_numpy(batch[1]).to(device)

    @torch.inference_mode()
    def held_out_loss() -> float:
        batches = [held_out.batch_of(i) for i in range(min(8, held_out.steps_per_epoch))]
        losses = [loss_of(model, *on_device(batch), options.precision) for batch in batches]
        return torch.stack(losses).mean().item()

    bar = tqdm(initial=step, total=steps, unit="step", smoothing=0.02, dynamic_ncols=True)
    saved_at = time.monotonic()
    pool = ThreadPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,))
    with bar, pool:
        while (steps is None or step < steps) and step != options.until:
            began = time.monotonic()
            rate = options.learning_rate * learning_rate_factor(step, steps, options.warmup)
            loss = accumulate(model, *on_device(windows.batch_of(step)), options, pool)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            step += 1
            record = {"step": step, "loss": loss, "learning_rate": rate}
            if step % options.evaluate_every == 0 or step == steps:
                record |= {"held_out": held_out_loss(), **measure(model)}
                tqdm.write(f"step {step}, {spent / 60:.1f} min: held-out loss {record['held_out']:.3f} nats per token")
            records.append(record)
            spent += time.monotonic() - began
            if options.minutes and steps is None:
                bar.total = int(step * options.minutes * 60 / spent)  # tqdm's time left follows from it
                if spent > 0.8 * options.minutes * 60:
                    steps = step + step // 4  # the decay is the last fifth
                    bar.total = steps
            if step in options.keep:
                weights.save(f"{name}-step{step}", model.state_dict(), folder)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
            bar.update()
            if time.monotonic() - saved_at > options.checkpoint_every:
                write_checkpoint()
                saved_at = time.monotonic()
    write_checkpoint()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        choices=[*CONFIGS, "small-mtp"],
        default="small",
        help="small-mtp is the MTP block of the weights of `small` in --start",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="stop after about this long, decay included")
    length.add_argument("--steps", type=int, help="stop after so many steps, decay included")
    parser.add_argument("--start", type=Path, help="a folder with weights to begin with, in place of random ones")
    parser.add_argument("--recall", type=float, default=0.0, help="the share of windows with recall documents")
    parser.add_argument("--keep", type=int, nargs="*", default=(), help="steps after which to save the weights, too")
    parser.add_argument("--until", type=int, help="pause after this step; the same command without it goes on")
    for option in ("batch", "micro_batch", "learning_rate", "weight_decay", "warmup", "evaluate_every", "seed"):
        default = getattr(Options, option)
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    gpu = profile.device.type == "cuda"
    parser.add_argument(
        "--precision",
        choices=["bfloat16", "float32"],
        default="bfloat16" if gpu else "float32",
        help="bfloat16 is the faster one on a GPU, and on a CPU that has AMX",
    )
    parser.add_argument("--workers", type=int, default=1 if gpu else os.cpu_count(), help="CPU cores to use")
    parser.add_argument("--out", type=Path, default=Path("build/models"), help="folder of checkpoint, log and weights")
    parser.add_argument("--tokenizer", action="store_true", help="train the tokenizer anew too")
    arguments = vars(parser.parse_args())
    size, out, new_tokenizer, start, share = (
        arguments.pop(key) for key in ("size", "out", "tokenizer", "start", "recall")
    )
    options = Options(**arguments)
    options.micro_batch = options.batch if gpu else options.micro_batch

    torch.manual_seed(options.seed)
    training, held_out = corpus()
    if new_tokenizer:
        tokenizer = Tokenizer.train(training.values())
    else:
        tokenizer = weights.load_tokenizer(start or weights.SHIPPED)
    weights.write(out, "tokenizer.json", tokenizer.to_json().encode())
    if size == "small-mtp":
        model = Ahead(weights.load("small", start or weights.SHIPPED)[0], MTP(CONFIGS["small"]).to(profile.device))
    else:
        model = weights.load(size, start)[0].train() if start else Llama(CONFIGS[size]).to(profile.device)
    text = Windows(training, tokenizer, model.config.context, 1, options.seed)
    recall = Recall(text.documents, tokenizer, model.config.context, options.seed)
    print(
        f"{size}: {sum(p.numel() for p in model.parameters()):,} parameters; {text.tokens_per_epoch:,} tokens in "
        f"an epoch; {profile.device}, {options.precision}"
    )
    train(
        model,
        Mixture(text, recall, options.batch, share),
        Windows(held_out, tokenizer, model.config.context, 4),
        options,
        out,
        size,
        lambda model: copied(model, examples=4),
    )
    weights.save(size, (model.layers[0] if size == "small-mtp" else model).state_dict(), out)
    print(f"{out / size}.safetensors and checksums.json written")


if __name__ == "__main__":
    main()
