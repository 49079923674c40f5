"""How well the small models do, beside baselines and earlier weights: `python -m llm40.models.evaluate`.

With `--card`, the tables and fresh samples are also written into the model card.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from llm40 import profile
from llm40.models import CONFIGS, Llama, Tokenizer, generate, load
from llm40.models.baselines import KneserNey, xz_bytes
from llm40.models.corpus import REPEATS, Windows, corpus
from llm40.models.heads import attention_weights, head_scores
from llm40.models.mtp import Ahead
from llm40.models.recall import DISTANCES, copied, passkeys_found, values_found
from llm40.models.weights import SHIPPED, load_mtp

SIZES = {"small": "6.0", "tiny": "0.7"}  # and millions of parameters
# Two openings of held-out topics, the rest written for the card; all of them are shown there.
PROMPTS = [
    'The "assert" statement\n**********************\n\n',
    "The import system\n*****************\n\nPython code in one module gains access to the code in another module\n",
    'A "for" loop over a dictionary\n******************************\n\n',
    '"""A generally useful event scheduler class."""\n\nimport time\n',
    "def read_lines(path, encoding=None):\n",
    "class Stack:\n    def __init__(self):\n",
]


@torch.inference_mode()
def token_losses(model: nn.Module, ids: list[int], eos: int, context: int, batch: int = 8) -> np.ndarray:
    """Nats of each token of a document, (len(ids),), given at least half a context of what came before it."""
    if not ids:  # an empty __init__.py
        return np.empty(0)
    device = next(model.parameters()).device
    tokens = torch.tensor([eos, *ids])
    stride = context // 2
    # Each window predicts its last `stride` tokens; the first one all of its own.
    starts = [0, *range(stride, max(stride, len(tokens) - stride - 1), stride)] if len(tokens) > context + 1 else [0]
    losses = np.empty(len(ids))
    whole = [start for start in starts if start + context + 1 <= len(tokens)]
    groups = [whole[i : i + batch] for i in range(0, len(whole), batch)]
    groups += [[start] for start in starts if start not in set(whole)]
    for group in groups:
        window = torch.stack([tokens[start : start + context + 1] for start in group]).to(device)
        nats = F.cross_entropy(model(window[:, :-1]).transpose(1, 2), window[:, 1:], reduction="none").double().cpu()
        for start, row in zip(group, nats.numpy(), strict=True):
            skipped = stride if start else 0
            losses[start + skipped : start + len(row)] = row[skipped:]
    return losses


def bits_per_byte(nats: dict[str, float], documents: dict[str, str]) -> dict[str, float]:
    """{"documentation": …, "source": …} from the nats of whole documents."""
    return {
        kind: sum(nats[name] for name in documents if name.startswith(kind))
        / math.log(2)
        / sum(len(text.encode()) for name, text in documents.items() if name.startswith(kind))
        for kind in REPEATS
    }


def of_model(model: Llama, tokenizer: Tokenizer, documents: dict[str, str], label: str) -> dict[str, float]:
    bar = tqdm(documents.items(), desc=label, unit="document")
    context = model.config.context
    nats = {name: token_losses(model, tokenizer.encode(text), tokenizer.eos, context).sum() for name, text in bar}
    return bits_per_byte(nats, documents)


def of_kneser_ney(training: dict[str, str], tokenizer: Tokenizer, documents: dict[str, str]) -> dict[str, float]:
    ngrams = KneserNey(tokenizer.encode_batch(list(training.values())))
    nats = {name: -np.log(ngrams.probabilities(tokenizer.encode(text))).sum() for name, text in documents.items()}
    return bits_per_byte(nats, documents)


def of_xz(training: dict[str, str], documents: dict[str, str]) -> dict[str, float]:
    seen = "\n".join(training.values()).encode()
    texts = {kind: "\n".join(t for name, t in documents.items() if name.startswith(kind)).encode() for kind in REPEATS}
    before = xz_bytes(seen)
    return {kind: 8 * (xz_bytes(seen + text) - before) / len(text) for kind, text in texts.items()}


def table(training: dict[str, str], held_out: dict[str, str], folder: Path, before: Path | None) -> str:
    """Bits per byte, in Markdown."""
    torch.manual_seed(0)
    models = {f"`{size}`, {millions} M parameters": load(size, folder) for size, millions in SIZES.items()}
    for size in SIZES if before else ():
        models[f"`{size}` of the first edition"] = load(size, before)
    models["`small` without training"] = Llama(CONFIGS["small"]).to(profile.device), models[next(iter(models))][1]
    rows = {name: of_model(model, tokenizer, held_out, name) for name, (model, tokenizer) in models.items()}
    _, tokenizer = load("tiny", folder)
    rows |= {
        "5-gram, modified Kneser–Ney, same tokens": of_kneser_ney(training, tokenizer, held_out),
        "`xz -9e`, after the training text": of_xz(training, held_out),
        "`xz -9e`, alone": of_xz({}, held_out),
    }
    lines = [f"| bits per byte, held out | {' | '.join(REPEATS)} |", "|---|" + "--:|" * len(REPEATS)]
    for row, values in sorted(rows.items(), key=lambda item: sum(item[1].values())):
        lines.append(f"| {row} | {' | '.join(f'{values[kind]:.3f}' for kind in REPEATS)} |")
    return "\n".join(lines)


def looking_back(model: Llama, tokenizer: Tokenizer, held_out: dict[str, str], seed: int) -> dict[str, float]:
    """The shares of tasks solved that need the context; `seed` draws other tasks."""
    prose = [token for ids in tokenizer.encode_batch(list(held_out.values())) for token in ids]
    copies = copied(model, 16, seed)
    shares = {f"second copy right, string of {name.split()[-1]}": share for name, share in copies.items()}
    shares["passkey of 5 digits in 100–450 tokens"] = passkeys_found(model, tokenizer, prose, seed=seed)
    for entries in (4, 12, 24):
        shares[f"value of one of {entries} keys"] = values_found(model, tokenizer, entries, seed=seed)
    return shares


def recall_table(held_out: dict[str, str], folder: Path, before: Path | None) -> str:
    """`looking_back` of the models, and of the earlier ones, over three seeds: mean and extremes, in Markdown."""
    columns = {}
    for size in SIZES:
        for place, edition in ((before, ", first edition"), (folder, "")):
            if place:
                columns[f"`{size}`{edition}"] = [looking_back(*load(size, place), held_out, seed) for seed in range(3)]
    lines = [f"| solved, % | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for task in next(iter(columns.values()))[0]:
        cells = []
        for seeds in columns.values():
            shares = [100 * seed[task] for seed in seeds]
            cells.append(f"{np.mean(shares):.1f} ({min(shares):.1f}–{max(shares):.1f})")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heads_table(held_out: dict[str, str], folder: Path) -> str:
    """The heads with the highest scores of lesson 09, written layer.head, in Markdown.

    The scores for the previous token and for induction are those on random strings said twice, the sink's on held-out
    text.
    """
    lines = [
        "| | looks at the previous token | induction | at the first token (queries 100–511), largest; mean |",
        "|---|---|---|---|",
    ]
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        model, tokenizer = load(size, folder)
        strings = torch.randint(16, 4096, (8, 100), generator=generator).to(profile.device)
        strings = torch.cat([torch.zeros_like(strings[:, :1]), strings, strings], dim=1)
        scores = head_scores(attention_weights(model, strings), strings)
        windows = Windows(held_out, tokenizer, model.config.context - 1, 8).batch_of(0)[0]
        windows[:, 0] = tokenizer.eos
        weights = attention_weights(model, torch.from_numpy(windows).to(profile.device))
        sink = weights[..., 100:, 0].mean((1, 3))

        def best(scores: torch.Tensor, count: int) -> str:
            values, places = scores.flatten().topk(count)
            return ", ".join(
                f"{place // scores.shape[1]}.{place % scores.shape[1]}: {value:.2f}"
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
            )

        first = f"{best(sink, 1)}; {100 * sink.mean():.1f} %"
        lines.append(f"| `{size}` | {best(scores['previous_token'], 3)} | {best(scores['induction'], 3)} | {first} |")
    return "\n".join(lines)


@torch.inference_mode()
def drafts_table(held_out: dict[str, str], folder: Path) -> str:
    """How often `small` would accept what is drafted for it, on held-out text, in Markdown."""
    small, tokenizer = load("small", folder)
    windows = torch.from_numpy(Windows(held_out, tokenizer, 512, 8).batch_of(0)[0]).to(profile.device)
    target = small(windows[:, :-1]).softmax(-1)
    drafts = {"its MTP block": Ahead(small, load_mtp(folder)), "`tiny`": load("tiny", folder)[0]}
    lines = ["| drafts for `small` | Σ min(p, q) at temperature 1 | same likeliest token |", "|---|--:|--:|"]
    for name, draft in drafts.items():
        q = draft(windows[:, :-1]).softmax(-1)
        overlap, same = torch.minimum(target, q).sum(-1).mean(), (target.argmax(-1) == q.argmax(-1)).float().mean()
        lines.append(f"| {name} | {overlap:.2f} | {same:.2f} |")
    return "\n".join(lines)


def curve(logs: Path) -> str:
    """How copying came, by the logs of the training with recall documents, in Markdown."""
    lines = ["| | million tokens | copied at 32, % | 128 | 240 | held out |", "|---|--:|--:|--:|--:|--:|"]
    for size in SIZES:
        records = map(json.loads, (logs / f"{size}.jsonl").read_text(encoding="utf-8").splitlines())
        measured = [record for record in records if "held_out" in record]
        for record in reversed(measured[:: -max(1, len(measured) // 7)]):  # with the last one
            copies = " | ".join(f"{100 * record[f'copied at {distance}']:.0f}" for distance in DISTANCES)
            tokens = record["step"] * 8 * CONFIGS[size].context / 1e6
            lines.append(f"| `{size}` | {tokens:.2f} | {copies} | {record['held_out']:.3f} |")
    return "\n".join(lines)


def samples(folder: Path, size: str = "small", temperature: float = 0.85, length: int = 160) -> str:
    """What the model writes after each of PROMPTS, in Markdown. The prompt comes first in each block."""
    model, tokenizer = load(size, folder)
    generator = torch.Generator(profile.device).manual_seed(0)
    blocks = []
    for prompt in PROMPTS:
        (written,) = generate(
            model, [[tokenizer.eos, *tokenizer.encode(prompt)]], length, temperature, tokenizer.eos, generator
        )
        blocks.append(f"````text\n{prompt}⟦{tokenizer.decode(written)}⟧\n````")
    return "\n\n".join(blocks)


def replace_part(card: str, part: str, content: str) -> str:
    """The card with what stands between <!-- part --> and <!-- /part --> replaced."""
    before, opening, rest = card.partition(f"<!-- {part} -->")
    _, closing, after = rest.partition(f"<!-- /{part} -->")
    if not closing:
        raise ValueError(f"the card has no part <!-- {part} --> … <!-- /{part} -->")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where the weights are")
    parser.add_argument("--before", type=Path, help="where earlier weights are, to compare with")
    parser.add_argument("--logs", type=Path, help="where the training's logs are, for the curve of copying")
    parser.add_argument("--card", action="store_true", help="also write tables and samples into README.md there")
    arguments = parser.parse_args()
    training, held_out = corpus()
    parts = {"curve": curve(arguments.logs)} if arguments.logs else {}
    parts |= {
        "recall": recall_table(held_out, arguments.folder, arguments.before),
        "heads": heads_table(held_out, arguments.folder),
        "drafts": drafts_table(held_out, arguments.folder),
        "samples": samples(arguments.folder),
        "comparison": table(training, held_out, arguments.folder, arguments.before),
    }
    print("\n\n".join(parts.values()))
    if arguments.card:
        card = arguments.folder / "README.md"
        content = card.read_text(encoding="utf-8")
        for part, text in parts.items():
            content = replace_part(content, part, text)
        card.write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
