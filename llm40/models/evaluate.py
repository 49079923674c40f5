"""Held-out bits per byte of the small models beside baselines: `python -m llm40.models.evaluate`.

With `--card`, the table and fresh samples are also written into the model card.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from llm40 import profile
from llm40.models import CONFIGS, Llama, Tokenizer, generate, load
from llm40.models.baselines import KneserNey, xz_bytes
from llm40.models.corpus import REPEATS, corpus
from llm40.models.weights import SHIPPED

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
def token_losses(model: Llama, ids: list[int], eos: int, batch: int = 8) -> np.ndarray:
    """Nats of each token of a document, (len(ids),), given at least half a context of what came before it."""
    if not ids:  # an empty __init__.py
        return np.empty(0)
    context, device = model.config.context, model.embed_tokens.weight.device
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
    nats = {name: token_losses(model, tokenizer.encode(text), tokenizer.eos).sum() for name, text in bar}
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


def table(training: dict[str, str], held_out: dict[str, str], folder: Path) -> str:
    """The comparison, in Markdown."""
    torch.manual_seed(0)
    (small, tokenizer), (tiny, _) = load("small", folder), load("tiny", folder)
    untrained = Llama(CONFIGS["small"]).to(profile.device)
    rows = {
        "`small`, 6.0 M parameters": of_model(small, tokenizer, held_out, "small"),
        "`tiny`, 0.7 M parameters": of_model(tiny, tokenizer, held_out, "tiny"),
        "5-gram, modified Kneser–Ney, same tokens": of_kneser_ney(training, tokenizer, held_out),
        "`xz -9e`, after the training text": of_xz(training, held_out),
        "`xz -9e`, alone": of_xz({}, held_out),
        "`small` without training": of_model(untrained, tokenizer, held_out, "untrained"),
    }
    lines = [f"| bits per byte, held out | {' | '.join(REPEATS)} |", "|---|" + "--:|" * len(REPEATS)]
    lines += [f"| {row} | {' | '.join(f'{values[kind]:.3f}' for kind in REPEATS)} |" for row, values in rows.items()]
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
    parser.add_argument("--card", action="store_true", help="also write table and samples into README.md there")
    arguments = parser.parse_args()
    training, held_out = corpus()
    comparison, text = table(training, held_out, arguments.folder), samples(arguments.folder)
    print(f"\n{comparison}\n\n{text}")
    if arguments.card:
        card = arguments.folder / "README.md"
        content = card.read_text(encoding="utf-8")
        content = replace_part(replace_part(content, "comparison", comparison), "samples", text)
        card.write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
