"""Documents whose next token stands earlier in them: without these a model of this size learns no induction head.

Four kinds: strings of random tokens and spans of real text, said again and again; key–value lists asked for their
entries; a passkey hidden in prose. Only tokens that can be known are counted in the loss. Olsson et al. 2022,
arXiv:2209.11895 (induction heads); Mohtashami and Jaggi 2023, arXiv:2305.16300 (passkeys).
"""

import hashlib

import numpy as np
import torch

from llm40.models.corpus import Windows
from llm40.models.generation import generate
from llm40.models.llama import Llama
from llm40.models.tokenizer import Tokenizer

SHARES = {"strings": 0.4, "spans": 0.2, "pairs": 0.2, "passkey": 0.2}  # of the documents
DISTANCES = (32, 128, 240)  # the lengths of the evaluation's strings: no string or span of training is as long
_FIRST = 16  # tokens below are special
_SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
_JOINTS = [" = ", ": ", " -> ", " is "]
# How a passkey is told, and asked for; the first form is the evaluation's. {0} is "" or " of <word>", {1} the passkey.
_PASSKEYS = [
    ("\nThe passkey{0} is {1}. Remember it: {1} is the passkey{0}.\n", "\nWhat is the passkey{0}? The passkey{0} is"),
    (
        "\nThe pass key{0} is {1}. Remember it. {1} is the pass key{0}.\n",
        "\nWhat is the pass key{0}? The pass key{0} is",
    ),
    ("\n# Note: the passkey{0} is {1}.\n", "\n# As noted above, the passkey{0} is"),
    ("\nThe secret number{0} is {1}, keep it in mind.\n", "\nSo the secret number{0} is"),
]


def held_out(key: str) -> bool:
    """Whether a key or a passkey belongs to the evaluation: a tenth do, by a hash of the key."""
    return hashlib.sha256(key.encode()).digest()[0] < 26


def draw_passkey(rng: np.random.Generator, digits: int, evaluation: bool) -> str:
    while True:
        key = "".join(map(str, rng.integers(10, size=digits)))
        if held_out(key) == evaluation:
            return key


def draw_word(rng: np.random.Generator, evaluation: bool) -> str:
    """A made-up word of two or three syllables, such as "kovibe"."""
    while True:
        word = "".join(rng.choice(_SYLLABLES, rng.integers(2, 4)))
        if held_out(word) == evaluation:
            return word


class Recall:
    """Windows of recall documents: `window(step)` gives the same one each time.

    `prose` are token ids of real documents, from which spans and the text around passkeys are taken.
    """

    def __init__(self, prose: list[np.ndarray], tokenizer: Tokenizer, context: int, seed: int = 0):
        self.prose = np.concatenate(prose)
        self.tokenizer, self.context, self.seed = tokenizer, context, seed

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, counted), (context + 1,) int64 and bool: whole documents, as many as fit, the last one cut.

        `counted` tokens follow from what stands before them; in real text, all.
        """
        rng = np.random.default_rng([self.seed, index, 0x7EC])
        tokens, counted = [np.array([self.tokenizer.eos])], [np.array([False])]
        room = self.context
        while room > 0:
            kind = rng.choice(list(SHARES), p=list(SHARES.values()))
            # Half of the documents take all the room there is, so that repeats lie at every distance up to the context.
            size = room if room < 64 or rng.random() < 0.5 else int(rng.integers(32, room + 1))
            made, known = getattr(self, kind)(rng, size)
            tokens.append(made[:room]), counted.append(known[:room])
            room -= len(made)
            if room > 0:
                tokens.append(np.array([self.tokenizer.eos])), counted.append(np.array([True]))
                room -= 1
        return np.concatenate(tokens), np.concatenate(counted)

    def strings(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        return self._repeated(rng, size, lambda n: rng.integers(_FIRST, self.tokenizer.vocab_size, n))

    def spans(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        return self._repeated(rng, size, lambda n: self._text(rng, n))

    def _repeated(self, rng, size, draw) -> tuple[np.ndarray, np.ndarray]:
        """One to eight pieces, at most half of the document together, said in any order until it is full."""
        longest = max(2, size // 2)
        pieces = []
        for _ in range(rng.integers(1, 9)):
            n = int(np.exp(rng.uniform(np.log(2), np.log(longest + 1))))
            n += n in DISTANCES
            if sum(map(len, pieces)) + n <= longest or not pieces:
                pieces.append(draw(n))
        order = [*rng.permutation(len(pieces)), *rng.integers(len(pieces), size=size)]
        tokens, counted, total = [], [], 0
        for place, piece in enumerate(order):
            if total >= size:
                break
            again = np.full(len(pieces[piece]), place >= len(pieces))
            again[0] &= len(pieces) == 1  # which piece comes is known only where there is one
            tokens.append(pieces[piece]), counted.append(again)
            total += len(again)
        return np.concatenate(tokens)[:size], np.concatenate(counted)[:size]

    def _text(self, rng: np.random.Generator, n: int) -> np.ndarray:
        start = rng.integers(len(self.prose) - n)
        return self.prose[start : start + n]

    def pairs(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A list of keys and values, then the same keys in any order, each with its value."""
        joint = str(rng.choice(_JOINTS))
        numbers = rng.random() < 0.5
        listed = []
        entries: dict[str, str] = {}
        while True:
            key = draw_word(rng, False)
            value = draw_passkey(rng, int(rng.integers(2, 6)), False) if numbers else draw_word(rng, False)
            if key in entries:
                continue
            entries[key] = value
            head, tail = self.tokenizer.encode(key + joint), self.tokenizer.encode(value + "\n")
            listed.append((head, tail))
            if 2 * sum(len(h) + len(t) for h, t in listed) >= size and len(listed) > 1:
                break
        asked = [listed[i] for i in rng.permutation(len(listed))]
        asked += [listed[i] for i in rng.integers(len(listed), size=len(listed))]
        parts = [(ids, False) for pair in listed for ids in pair]
        parts += [(ids, known) for pair in asked for ids, known in zip(pair, (False, True), strict=True)]
        return _join(parts, size)

    def passkey(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Prose with one to three passkeys in it, then a question for each."""
        tell, ask = _PASSKEYS[rng.integers(len(_PASSKEYS))]
        names = ["", *(f" of {draw_word(rng, False)}" for _ in range(2))][: rng.integers(1, 4)]
        keys = {name: draw_passkey(rng, int(rng.integers(3, 8)), False) for name in names}
        said = [self.tokenizer.encode(tell.format(name, key)) for name, key in keys.items()]
        asked = []
        for name in rng.permutation(names):
            asked += [(self.tokenizer.encode(ask.format(name)), False)]
            asked += [(self.tokenizer.encode(f" {keys[name]}."), True), (self.tokenizer.encode("\n"), False)]
        prose = max(0, size - sum(map(len, said)) - sum(len(ids) for ids, _ in asked))
        cuts = np.sort(rng.integers(prose + 1, size=len(said)))
        pieces = np.split(self._text(rng, prose), cuts)
        parts = [(pieces[0], True)]
        for ids, piece in zip(said, pieces[1:], strict=True):
            parts += [(ids, False), (piece, True)]
        return _join(parts + asked, size)


def _join(parts: list[tuple[list[int], bool]], size: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in parts])
    return tokens[:size], np.concatenate([np.full(len(ids), known) for ids, known in parts])[:size]


class Mixture:
    """Batches of windows of text, of which the share `recall_share` is windows of recall documents."""

    def __init__(self, text: Windows, recall: Recall, batch: int, recall_share: float):
        if text.batch != 1 or not 0 <= recall_share <= 1:
            raise ValueError("the text comes one window at a time, and recall_share is between 0 and 1")
        self.text, self.recall, self.batch, self.share = text, recall, batch, recall_share

    def batch_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step, and which of its tokens count in the loss. Both (batch, context + 1)."""
        before, after = (int(n * self.batch * self.share) for n in (step, step + 1))
        rows = [self.recall.window(index) for index in range(before, after)]
        of_text = range(step * self.batch - before, (step + 1) * self.batch - after)
        rows += [(window, np.ones(len(window), dtype=bool)) for index in of_text for window in self.text[index]]
        windows, counted = zip(*rows, strict=True)
        return np.stack(windows), np.stack(counted)


# --- how well a model looks back


@torch.inference_mode()
def copied(model: Llama, examples: int = 32, seed: int = 0) -> dict[str, float]:
    """{"copied at 32": …}: the share of tokens guessed right in the second copy of a random string, by its length.

    The second copy's first token, which nothing announces, is not counted. Deterministic by `seed`.
    """
    device, found = model.embed_tokens.weight.device, {}
    rng = np.random.default_rng([seed, 0xC0])
    for distance in DISTANCES:
        string = torch.from_numpy(rng.integers(_FIRST, model.config.vocab_size, (examples, distance)))
        tokens = torch.cat([torch.zeros(examples, 1, dtype=torch.int64), string, string], dim=1).to(device)
        right = [
            model(part[:, :-1])[:, distance + 1 :].argmax(-1) == part[:, distance + 2 :] for part in tokens.split(4)
        ]
        found[f"copied at {distance}"] = torch.cat(right).float().mean().item()
    return found


def passkeys_found(model: Llama, tokenizer: Tokenizer, prose: list[int], examples: int = 54, seed: int = 0) -> float:
    """The share of held-out passkeys of five digits that the model writes out, greedily, when asked.

    Each is told once, in the form of _PASSKEYS[0], in 100 to 450 tokens of `prose`, a tenth, half or nine tenths of the
    way through.
    """
    rng = np.random.default_rng([seed, 0x5])
    tell, ask = _PASSKEYS[0]
    prompts, keys = [], []
    for example in range(examples):
        key = draw_passkey(rng, 5, True)
        said, asked = tokenizer.encode(tell.format("", key)), tokenizer.encode(ask.format(""))
        size = int(rng.integers(100, 451)) - len(said) - len(asked) - 1
        start = int(rng.integers(len(prose) - size))
        text, cut = prose[start : start + size], int(size * (0.1, 0.5, 0.9)[example % 3])
        prompts.append([tokenizer.eos, *text[:cut], *said, *text[cut:], *asked])
        keys.append(key)
    written = generate(model, prompts, 6, stop=None)
    return float(np.mean([tokenizer.decode(ids).strip() == key for ids, key in zip(written, keys, strict=True)]))


def values_found(model: Llama, tokenizer: Tokenizer, entries: int = 12, examples: int = 54, seed: int = 0) -> float:
    """The share of lists of `entries` held-out keys, each with a number of four digits, in which the model writes the
    number of the one that is asked for, greedily."""
    rng = np.random.default_rng([seed, 0x1157])
    prompts, values = [], []
    for _ in range(examples):
        keys = [draw_word(rng, True) for _ in range(entries)]
        numbers = [draw_passkey(rng, 4, True) for _ in keys]
        asked = int(rng.integers(entries))
        listing = "".join(f"{key} = {number}\n" for key, number in zip(keys, numbers, strict=True))
        prompts.append([tokenizer.eos, *tokenizer.encode(f"{listing}{keys[asked]} =")])
        values.append(numbers[asked])
    written = generate(model, prompts, 5, stop=None)
    return float(np.mean([tokenizer.decode(ids).strip() == value for ids, value in zip(written, values, strict=True)]))
