"""What a trained model has to beat: a general compressor and an n-gram model, on the same text."""

import lzma

import numpy as np


def xz_bytes(text: bytes) -> int:
    """The size of `text` after `xz -9e`, whose window of 64 MiB spans it all. What the text adds to one seen before is
    `xz_bytes(seen + text) - xz_bytes(seen)`."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


class KneserNey:
    """Interpolated modified Kneser–Ney over token ids (Chen and Goodman 1999).

    An n-gram is one int64, its tokens the digits in base `vocab_size`: with 4,096 tokens five of them fill 60 bits.
    `documents` are lists of ids; id 0, which occurs in none of them, stands for what is before a document's first.
    """

    def __init__(self, documents: list[list[int]], order: int = 5, vocab_size: int = 4096):
        if vocab_size**order > 2**63:
            raise ValueError(f"{order} tokens of {vocab_size} do not fit in 64 bits")
        self.order, self.vocab_size = order, vocab_size
        grams = np.concatenate([self._grams(ids, order) for ids in documents])
        self.levels = {}
        for n in range(order, 0, -1):
            if n == order:
                keys, counts = np.unique(grams, return_counts=True)
            else:  # below the highest order, count not occurrences but the different tokens seen before the n-gram
                keys, counts = np.unique(keys % vocab_size**n, return_counts=True)
            n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
            y = n1 / max(1, n1 + 2 * n2)
            steps = [1 - 2 * y * n2 / max(1, n1), 2 - 3 * y * n3 / max(1, n2), 3 - 4 * y * n4 / max(1, n3)]
            discounts = np.array([0, *(max(0.0, d) for d in steps)])[np.minimum(counts, 3)]
            contexts, index = np.unique(keys // vocab_size, return_inverse=True)
            totals, freed = np.bincount(index, counts), np.bincount(index, discounts)
            self.levels[n] = keys, counts - discounts, contexts, totals, freed / totals

    def _grams(self, ids: list[int], n: int) -> np.ndarray:
        """The n-gram that ends at each token of a document: (len(ids),) int64."""
        padded = np.array([0] * (n - 1) + list(ids), dtype=np.int64)
        return sum(padded[i : i + len(ids)] * self.vocab_size ** (n - 1 - i) for i in range(n))

    def probabilities(self, ids: list[int]) -> np.ndarray:
        """The probability of each token of a document, given those before it: (len(ids),)."""
        p = np.full(len(ids), 1 / self.vocab_size)
        for n in range(1, self.order + 1):
            keys, kept, contexts, totals, freed = self.levels[n]
            grams = self._grams(ids, n)
            at, known = _find(contexts, grams // self.vocab_size)
            gram_at, seen = _find(keys, grams)
            p = np.where(known, np.where(seen, kept[gram_at], 0) / totals[at] + freed[at] * p, p)
        return p


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, found): where in the sorted `keys` each of `wanted` is."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
