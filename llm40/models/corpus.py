"""The text that the models are trained and judged on."""

from functools import cache

import numpy as np

from llm40 import data
from llm40.models.tokenizer import Tokenizer

# How often a document is read in one pass. There is 25 times as much source code as documentation.
REPEATS = {"documentation": 2, "source": 1}


@cache
def corpus() -> tuple[dict[str, str], dict[str, str]]:
    """(training, held out): {"documentation/assert": text, …, "source/ast.py": text, …}, without repeats."""
    training, held_out = {}, {}
    for kind, documents in (("documentation", data.documentation()), ("source", data.source_code())):
        ours, theirs = data.split(data.deduplicate(documents))
        training |= {f"{kind}/{name}": text for name, text in data.scrub(ours, theirs).items()}
        held_out |= {f"{kind}/{name}": text for name, text in theirs.items()}
    return data.scrub(training, held_out), held_out


class Windows:
    """Documents packed into windows of `context` + 1 tokens, <|endoftext|> between them, in a new order for each epoch.

    Which windows a step gets depends on the seed and the step's number alone: training resumes without a stored state.
    """

    def __init__(self, documents: dict[str, str], tokenizer: Tokenizer, context: int, batch: int, seed: int = 0):
        encoded = tokenizer.encode_batch(list(documents.values()))
        self.documents = [
            np.array([*ids, tokenizer.eos], dtype=np.int64)
            for name, ids in zip(documents, encoded, strict=True)
            for _ in range(REPEATS.get(name.split("/")[0], 1))
        ]
        self.context, self.batch, self.seed, self.epoch = context, batch, seed, -1
        self.tokens_per_epoch = sum(map(len, self.documents))
        # A random part of a window is left out at the start of each epoch, so that windows begin elsewhere.
        self.per_epoch = (self.tokens_per_epoch - 1 - context) // context
        self.steps_per_epoch = self.per_epoch // batch
        if not self.steps_per_epoch:
            raise ValueError(f"{self.tokens_per_epoch} tokens do not fill {batch} windows of {context} tokens")

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of a step: (batch, context + 1) int64, where each window's last token begins its successor."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
            stream = stream[rng.integers(self.context) :]
            starts = rng.permutation(self.per_epoch) * self.context
            self.epoch, self.stream, self.starts = epoch, stream, starts
        starts = self.starts[index * self.batch : (index + 1) * self.batch]
        return np.stack([self.stream[start : start + self.context + 1] for start in starts])

    def batch_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step, and which of its tokens count in the loss: all. Both (batch, context + 1)."""
        windows = self[step]
        return windows, np.ones(windows.shape, dtype=bool)
