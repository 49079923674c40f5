"""Finished runs for lesson 17's scaling laws: `python -m llm40.models.scaling --out build/models`.

Models of 9 thousand to 6 million parameters on the bytes of the course's text, at five budgets, written to
scaling_runs.json as they finish. Interrupted, the same command goes on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from llm40.models import weights
from llm40.models.corpus import Windows, corpus
from llm40.models.llama import Config, Llama
from llm40.models.train import Options, train

CONTEXT = 128
SHAPES = [(16, 3), (24, 3), (32, 3), (48, 3), (64, 4), (96, 4), (128, 4), (160, 5), (192, 7), (256, 8)]  # width, layers
# FLOPs: (places in SHAPES, seeds). Where a second seed is cheap it shows how far a run's loss can be trusted.
BUDGETS = {
    3e10: (range(0, 5), (0, 1)),
    1.2e11: (range(0, 6), (0, 1)),
    4.8e11: (range(1, 7), (0,)),
    1.9e12: (range(2, 9), (0,)),
    7.7e12: (range(5, 10), (0,)),
}


class Bytes:
    """Bytes as tokens. Byte 0, which no text has, ends a document."""

    eos, vocab_size = 0, 256

    def encode_batch(self, texts: list[str]) -> list[bytes]:
        return [text.encode() for text in texts]


def shape(width: int, layers: int) -> Config:
    return Config(
        vocab_size=256,
        hidden_size=width,
        layers=layers,
        heads=width // 16,
        kv_heads=width // 16,
        mlp_size=8 * round(width / 3),
        context=CONTEXT,
    )


def parameters(config: Config) -> int:
    """Without the embedding, which is also the head."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).layers.parameters())


def plan() -> list[dict]:
    """The runs, cheapest first; those of a second seed at the end."""
    runs = []
    for flops, (places, seeds) in BUDGETS.items():
        for width, layers in (SHAPES[place] for place in places):
            n = parameters(shape(width, layers))
            tokens = flops / 6 / n
            batch = int(np.clip(tokens / CONTEXT / 200, 4, 32))  # 200 steps, where there is enough to read
            steps = round(tokens / batch / CONTEXT)
            read = steps * batch * CONTEXT
            runs += [
                {
                    "parameters": n,
                    "tokens": read,
                    "flops": 6 * n * read,
                    "width": width,
                    "layers": layers,
                    "batch": batch,
                    "steps": steps,
                    "seed": seed,
                }
                for seed in seeds
            ]
    return sorted(runs, key=lambda run: run["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/models"))
    parser.add_argument("--learning-rate", type=float, default=0.025)
    parser.add_argument("--workers", type=int, default=1, help="CPU cores to use")
    arguments = parser.parse_args()
    listing = arguments.out / "scaling_runs.json"
    done = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else []
    training, held_out = corpus()
    text = Windows(training, Bytes(), CONTEXT, 4)
    unseen = Windows(held_out, Bytes(), CONTEXT, 16)
    for run in plan():
        if any(run.items() <= before.items() for before in done):
            continue
        text.batch, text.seed, text.epoch = run["batch"], run["seed"], -1
        text.steps_per_epoch = text.per_epoch // run["batch"]
        torch.manual_seed(run["seed"])
        model = Llama(shape(run["width"], run["layers"]))
        options = Options(
            steps=run["steps"],
            batch=run["batch"],
            micro_batch=32,
            learning_rate=arguments.learning_rate,
            warmup=max(5, run["steps"] // 20),
            workers=arguments.workers,
            seed=run["seed"],
            evaluate_every=10**9,
        )
        name = "scaling-" + "-".join(str(run[key]) for key in ("width", "steps", "seed"))
        records = train(model, text, unseen, options, arguments.out, name)
        for ending in ("pt", "jsonl"):
            (arguments.out / f"{name}.{ending}").unlink()
        done.append(run | {"loss": round(records[-1]["held_out"], 5)})
        lines = ",\n".join(json.dumps(entry) for entry in done)
        weights.write(arguments.out, listing.name, f"[\n{lines}\n]\n".encode())


if __name__ == "__main__":
    main()
