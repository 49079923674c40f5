"""Trains one of the small models from nothing: `python -m llm40.models.train --size small --minutes 60`.

Muon (Jordan et al. 2024) for the matrices inside the blocks and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)
for the rest; a warm-up–stable–decay schedule (Hu et al. 2024, arXiv:2404.06395), whose stable part can end at any time.
Interrupted, the same command goes on from its last checkpoint, to the same bits.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llm40 import profile
from llm40.models import weights
from llm40.models.corpus import Windows, corpus
from llm40.models.llama import CONFIGS, Llama
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


def learning_rate_factor(step: int, steps: int | None, warmup: int) -> float:
    """Rises over `warmup` steps, stays at 1, and falls to 0 over the last fifth. While `steps` is unknown it stays."""
    rising = min(1.0, (step + 1) / warmup)
    return rising if steps is None else min(rising, (steps - step) / max(1, steps // 5))


def make_optimizers(model: Llama, options: Options) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    # "match_rms_adamw" scales Muon's update to the size of AdamW's (arXiv:2502.16982): one learning rate serves both.
    muon = torch.optim.Muon(
        matrices, lr=options.learning_rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(model: Llama, windows: Tensor, precision: str) -> Tensor:
    """Mean cross-entropy, in nats per token, of windows (batch, context + 1)."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def accumulate(model: Llama, windows: Tensor, options: Options, pool: ThreadPoolExecutor) -> float:
    """Sets every parameter's .grad to the gradient of the mean loss, which is returned.

    On a CPU the forward and backward passes of the micro-batches run side by side, one core each: at this size that is
    faster than one pass on all cores, and much faster when something else keeps a core busy.
    """
    parameters = list(model.parameters())

    def gradient(part: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = loss_of(model, part, options.precision)
        return loss.item(), torch.autograd.grad(loss, parameters)

    parts = windows.split(options.micro_batch)
    mean, sums = 0.0, None
    for part, (loss, gradients) in zip(parts, pool.map(gradient, parts), strict=True):  # in order: always the same sum
        share = len(part) / len(windows)
        mean += share * loss
        scaled = torch._foreach_mul(gradients, share)
        sums = scaled if sums is None else torch._foreach_add(sums, scaled)
    for parameter, gradient_ in zip(parameters, sums, strict=True):
        parameter.grad = gradient_
    return mean


def train(model: Llama, windows: Windows, held_out: Windows, options: Options, folder: Path, name: str) -> list[dict]:
    """Trains `model` in place; checkpoints and a log go to `folder`/`name`.pt and .jsonl. Returns the log's records."""
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
        state = {"step": step, "steps": steps, "seconds": spent, "records": records, "model": model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}  # fmt: skip
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint)  # whole or not at all, whenever the power goes
        log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    @torch.inference_mode()
    def held_out_loss() -> float:
        batches = range(min(8, held_out.steps_per_epoch))
        losses = [loss_of(model, torch.from_numpy(held_out[i]).to(device), options.precision) for i in batches]
        return torch.stack(losses).mean().item()

    bar = tqdm(initial=step, total=steps, unit="step", smoothing=0.02, dynamic_ncols=True)
    saved_at = time.monotonic()
    pool = ThreadPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,))
    with bar, pool:
        while (steps is None or step < steps) and step != options.until:
            began = time.monotonic()
            rate = options.learning_rate * learning_rate_factor(step, steps, options.warmup)
            loss = accumulate(model, torch.from_numpy(windows[step]).to(device), options, pool)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            step += 1
            record = {"step": step, "loss": loss, "learning_rate": rate}
            if step % options.evaluate_every == 0 or step == steps:
                record["held_out"] = held_out_loss()
                tqdm.write(f"step {step}, {spent / 60:.1f} min: held-out loss {record['held_out']:.3f} nats per token")
            records.append(record)
            spent += time.monotonic() - began
            if options.minutes and steps is None:
                bar.total = int(step * options.minutes * 60 / spent)  # tqdm's time left follows from it
                if spent > 0.8 * options.minutes * 60:
                    steps = step + step // 4  # the decay is the last fifth
                    bar.total = steps
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
            bar.update()
            if time.monotonic() - saved_at > options.checkpoint_every:
                write_checkpoint()
                saved_at = time.monotonic()
    write_checkpoint()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CONFIGS, default="small")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="stop after about this long, decay included")
    length.add_argument("--steps", type=int, help="stop after so many steps, decay included")
    parser.add_argument("--until", type=int, help="pause after this step; the same command without it goes on")
    for option in ("batch", "micro_batch", "learning_rate", "weight_decay", "warmup", "seed"):
        default = getattr(Options, option)
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    gpu = profile.device.type == "cuda"
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16" if gpu else "float32",
                        help="bfloat16 is the faster one on a GPU, and on a CPU that has AMX")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1 if gpu else os.cpu_count(), help="CPU cores to use")
    parser.add_argument("--out", type=Path, default=Path("build/models"), help="folder of checkpoint, log and weights")
    parser.add_argument("--tokenizer", action="store_true", help="train the tokenizer anew too")
    arguments = vars(parser.parse_args())
    size, out, new_tokenizer = (arguments.pop(key) for key in ("size", "out", "tokenizer"))
    options = Options(**arguments)
    options.micro_batch = options.batch if gpu else options.micro_batch

    torch.manual_seed(options.seed)
    training, held_out = corpus()
    tokenizer = Tokenizer.train(training.values()) if new_tokenizer else weights.load_tokenizer()
    weights.write(out, "tokenizer.json", tokenizer.to_json().encode())
    model = Llama(CONFIGS[size]).to(profile.device)
    windows = Windows(training, tokenizer, model.config.context, options.batch, options.seed)
    print(f"{size}: {sum(p.numel() for p in model.parameters()):,} parameters; {windows.tokens_per_epoch:,} tokens in "
          f"an epoch of {windows.steps_per_epoch} steps; {profile.device}, {options.precision}")  # fmt: skip
    train(model, windows, Windows(held_out, tokenizer, model.config.context, 4), options, out, size)
    weights.save(size, model.state_dict(), out)
    print(f"{out / size}.safetensors and checksums.json written")


if __name__ == "__main__":
    main()
