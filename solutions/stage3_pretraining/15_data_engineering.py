# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: >-
#       The way from a crawl to a batch: quality rules, MinHash and LSH with the S-curve measured,
#       decontamination, packing with document masks, and a loader that resumes to the exact batch.
#     gpu: "Nothing more: this lesson is text, hashes and index arithmetic."
# ---

# %% [markdown]
# ## The problem
#
# A model is what it has read. Two runs that differ in nothing but their text can end far apart, and
# no line of the model's code shows why. Yet what comes out of a crawl of the web is mostly not text
# that anyone would read: menus, teasers, lists of keywords, the same article on forty mirrors, and
# somewhere among it the questions of the very benchmark that the model will be judged by.
#
# **Data engineering** is the way from there to a batch of token ids. Every step of it is a small
# algorithm, and each has a mistake that no exception reports: a filter that throws away the good
# pages, a duplicate detector that compares every pair and never ends, a test set that was in the
# training set, an attention mask that lets a recipe read the end of a court ruling, a loader that
# after a crash shows the model the same batches again.
#
# | stage | question | section |
# |---|---|---|
# | rules | is this text at all? | [](#rules) |
# | deduplication | have we read this already? | [](#minhash), [](#lsh), [](#dedup) |
# | decontamination | is this the exam? | [](#contamination) |
# | classifier | does this look like what we want? | [](#classifier) |
# | packing | how do documents become rows of equal length? | [](#packing) |
# | mixing | how often is each source read? | [](#mixing) |
# | loading | which batch comes next, on which rank, after a crash? | [](#loading) |
#
# ### Words used throughout
#
# | term | meaning |
# |---|---|
# | **document** | one text: a page, a file. A collection of documents is a dictionary from names to texts |
# | **shingle** | a run of $w$ words in a row; a document is compared as the *set* of its shingles |
# | **Jaccard similarity** | $J(A,B)=\lvert A\cap B\rvert\,/\,\lvert A\cup B\rvert$, from 0 (nothing in common) to 1 (the same set) |
# | **signature** | $k$ hash values that stand for a set of any size |
# | **row** | a sequence of fixed length, the `capacity`, as the model is trained on it |
# | **epoch** | one pass over all items, but for a rest that fills no batch |
# | **rank** | a process of a distributed run; each gets its own part of every batch |

# %%
import contextlib
import hashlib
import json
import math
import random
import re
import sys
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from llm40 import checks, data, distributed, models, plot, profile
from torch import Tensor, nn

tokenizer = models.load_tokenizer()  # the course's own: 4,096 tokens
IGNORE = -100  # a label that does not count in the loss
PAD = -1  # the document id of padding


def words_of(text: str) -> list[str]:
    """Lower-cased words without punctuation: "Don't stop!" → ["don", "t", "stop"]."""
    return re.findall(r"\w+", text.lower())


def hash64(text: str) -> int:
    """64 bits of BLAKE2b, 0 to 2⁶⁴ − 1: the same in every process and on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# %% [markdown]
# `hash64` and not Python's `hash`: for text that one is **salted**, with another salt in every
# process, so that the signatures of yesterday's run would not match today's.


# %% tags=["support"]
# Support: comparing dictionaries of numbers, and work counted in lines of Python
def same_numbers(actual: dict, expected: dict, what: str) -> None:
    """`actual` has these keys and, to nine digits, these numbers."""
    checks.kind(actual, dict, what=what)
    missing, extra = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    assert not missing, f"{what}: the keys {sorted(missing)} are missing"
    assert not extra, f"{what}: the keys {sorted(map(str, extra))} are not asked for"
    for key, value in expected.items():
        checks.number(actual[key], float(value), to=1e-9, atol=1e-12, what=f"{what}: {key}")


@dataclass
class Steps:
    count: int = 0


@checks.measured
@contextmanager
def counted_steps() -> Iterator[Steps]:
    """Counts the lines of Python that are executed by what is called inside the block."""
    steps = Steps()

    def trace(frame, event, arg):
        steps.count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(before)


@checks.measured
def shared_generators() -> int:
    """A number that changes when Python's, NumPy's or PyTorch's own generator does."""
    numpy_state = [np.asarray(part).tolist() for part in np.random.get_state()]
    return hash64(repr((random.getstate(), numpy_state, torch.get_rng_state().tolist())))


@checks.measured
def seed_shared_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def made_words(count: int, generator: torch.Generator, vocabulary: int = 2000) -> list[str]:
    """Random words w0, w1, … of a vocabulary."""
    return [f"w{i}" for i in torch.randint(0, vocabulary, (count,), generator=generator).tolist()]


def joined_parts(parts) -> list:
    """The items of several lists, one list after the other."""
    return [item for part in parts for item in part]


def draw(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high − 1."""
    return int(torch.randint(low, high, (), generator=generator))


# %% [markdown]
# ## Rules {#rules}
#
# The cheapest filter reads no meaning. The rules of *Gopher* (Rae et al. 2021) look at statistics
# that hold for nearly all prose and for little else: a page has 50 to 100,000 words; words are 3
# to 10 characters long on average; there are few `#` and few ellipses; most words contain a letter;
# not every line is a bullet point, few lines end in an ellipsis (teasers do); and at least two of
# eight ordinary words occur: *the, be, to, of, and, that, have, with*. The last rule alone removes
# most lists, tables and text that is not English.
#
# The limits stand in `LIMITS`, as Gopher has them. Two of the signals count `#` and ellipses *per
# word*, and an ellipsis is written as three full stops or as one character.

# %%
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "-", "*")

# signal → (smallest, largest) value that a document may have; both are allowed
LIMITS = {
    "words": (50, 100_000),
    "mean_word_length": (3, 10),
    "hashes": (0, 0.1),
    "ellipses": (0, 0.1),
    "bullet_lines": (0, 0.9),
    "ellipsis_lines": (0, 0.3),
    "letter_words": (0.8, 1),
    "stop_words": (2, len(STOP_WORDS)),
}
REPETITION_LIMITS = {
    "lines": (0, 0.30),
    "line_characters": (0, 0.20),
    "paragraphs": (0, 0.30),
    "paragraph_characters": (0, 0.20),
    "top_2": (0, 0.20),
    "top_3": (0, 0.18),
    "top_4": (0, 0.16),
    "repeated_5": (0, 0.15),
    "repeated_6": (0, 0.14),
    "repeated_7": (0, 0.13),
    "repeated_8": (0, 0.12),
    "repeated_9": (0, 0.11),
    "repeated_10": (0, 0.10),
}


# %% exercise="quality_signals" minutes=15 difficulty=1
def quality_signals(text: str) -> dict[str, float]:
    """Eight numbers about a text. A word is what white space separates (`text.split()`), with its
    punctuation; a line is one of `text.splitlines()`, without white space at its ends, empty ones
    left out; an ellipsis is "..." (three full stops, counted from the left without overlap) or "…".

    "words":            how many words
    "mean_word_length": characters of all words / words
    "hashes":           occurrences of "#" / words
    "ellipses":         ellipses / words
    "bullet_lines":     share of the lines that begin with one of BULLETS
    "ellipsis_lines":   share of the lines that end with an ellipsis
    "letter_words":     share of the words with at least one letter (str.isalpha of a character)
    "stop_words":       how many different STOP_WORDS occur among words_of(text)

    A text without words has 0 everywhere.
    """
    ### BEGIN SOLUTION
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    count, rows = max(len(words), 1), max(len(lines), 1)
    return {
        "words": len(words),
        "mean_word_length": sum(map(len, words)) / count,
        "hashes": text.count("#") / count,
        "ellipses": (text.count("...") + text.count("…")) / count,
        "bullet_lines": sum(line.startswith(BULLETS) for line in lines) / rows,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / rows,
        "letter_words": sum(any(c.isalpha() for c in word) for word in words) / count,
        "stop_words": len(set(STOP_WORDS).intersection(words_of(text))),
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: several beginnings at once</summary>
#
# `str.startswith` and `str.endswith` take a tuple of strings. `sum` of truth values counts them.
# </details>
#
# <details><summary>Hint: nothing to divide by</summary>
#
# An empty text has no words and no lines. Divide by `max(count, 1)`: the numerators are 0 there.
# </details>

# %% check="quality_signals" points=2
page = "- The cat sat on the mat...\n\n  * and 2 dogs # barked …\nTo be, or not to be: 1984\n"
same_numbers(
    quality_signals(page),
    {
        "words": 21,
        "mean_word_length": 57 / 21,
        "hashes": 1 / 21,
        "ellipses": 2 / 21,
        "bullet_lines": 2 / 3,
        "ellipsis_lines": 2 / 3,
        "letter_words": 15 / 21,
        "stop_words": 4,
    },
    "signals of a page of three lines",
)
### BEGIN HIDDEN TESTS
same_numbers(quality_signals(""), dict.fromkeys(LIMITS, 0), "signals of the empty text")
assert quality_signals("## a ### b")["hashes"] == 5 / 4, "every # counts, not every word with one"
same_numbers(quality_signals(" \n\t\n "), dict.fromkeys(LIMITS, 0), "signals of white space")
g = checks.generator(1)
for _ in range(12):
    # A page put together from parts whose share in each signal is known.
    lines, totals = [], Counter()
    for _ in range(draw(1, 9, g)):
        bullet = ("", "", "• ", "- ", "*")[draw(0, 5, g)]
        ending = ("", "", "...", "…", " ...", ".", "..")[draw(0, 7, g)]
        parts = [
            ("THE", "cats", "#1", "1984", "x", "(that)", "Ünïcode", "#", "5%", "withal")[
                draw(0, 10, g)
            ]
            for _ in range(draw(1, 12, g))
        ]
        line = bullet + " ".join(parts) + ending
        words = (bullet.rstrip() + (" " if bullet.endswith(" ") else "") + " ".join(parts)).split()
        words = words if bullet != "*" else ["*" + parts[0], *parts[1:]]
        words = [*words, "..."] if ending == " ..." else [*words[:-1], words[-1] + ending]
        totals["words"] += len(words)
        totals["characters"] += sum(map(len, words))
        totals["hashes"] += sum(part in ("#1", "#") for part in parts)
        totals["ellipses"] += ending.strip() in ("...", "…")
        totals["bullets"] += bool(bullet)
        totals["ends"] += ending.strip() in ("...", "…")
        lettered = ("THE", "cats", "x", "(that)", "Ünïcode", "withal")
        totals["letters"] += sum(part in lettered for part in parts)
        totals["the"] |= "THE" in parts
        totals["that"] |= "(that)" in parts
        lines.append(" " * draw(0, 3, g) + line + " " * draw(0, 3, g))
        lines += [""] * draw(0, 3, g)
    text, rows = "\n".join(lines), sum(bool(line.strip()) for line in lines)
    n = totals["words"]
    same_numbers(
        quality_signals(text),
        {
            "words": n,
            "mean_word_length": totals["characters"] / n,
            "hashes": totals["hashes"] / n,
            "ellipses": totals["ellipses"] / n,
            "bullet_lines": totals["bullets"] / rows,
            "ellipsis_lines": totals["ends"] / rows,
            "letter_words": totals["letters"] / n,
            "stop_words": totals["the"] + totals["that"],
        },
        f"signals of {text!r}",
    )
same_numbers(
    quality_signals("wait...... for it....\nthen …… go"),
    {
        "words": 6,
        "mean_word_length": 27 / 6,
        "hashes": 0,
        "ellipses": 5 / 6,
        "bullet_lines": 0,
        "ellipsis_lines": 1 / 2,
        "letter_words": 5 / 6,
        "stop_words": 0,
    },
    "signals of a text with many full stops",
)
same_numbers(
    {k: quality_signals("Have HAVE (have) 'with' be\u2028of")[k] for k in ("words", "stop_words")},
    {"words": 6, "stop_words": 4},
    "signals of six stop words, three of them alike",
)
same_numbers(
    {"letter_words": quality_signals("日本 é 123 ß 5% ...")["letter_words"]},
    {"letter_words": 3 / 6},
    "signals of words without ASCII letters",
)
same_numbers(
    {k: quality_signals("a-b\r\n-c d\x0b* e")[k] for k in ("words", "bullet_lines")},
    {"words": 5, "bullet_lines": 2 / 3},
    "signals of lines that end otherwise than in \\n",
)
### END HIDDEN TESTS

# %% [markdown]
# A document is kept if it breaks no rule.


# %% exercise="keep" minutes=5 difficulty=1
def keep(signals: dict[str, float], limits: dict[str, tuple[float, float]] = LIMITS) -> bool:
    """Whether every signal that has a limit lies within it; a value at the limit is within.

    Signals without a limit do not matter. A limit whose signal is missing raises KeyError.
    """
    ### BEGIN SOLUTION
    return all(low <= signals[name] <= high for name, (low, high) in limits.items())
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one line</summary>
#
# `all(...)` over the items of `limits`. Loop over the limits, not over the signals.
# </details>

# %% check="keep" points=1
good = {name: low for name, (low, high) in LIMITS.items()}
assert keep(good) is True, "every signal at its smallest allowed value: True is asked for"
assert keep(good | {"words": 49}) is False, "49 words are too few: False is asked for"
### BEGIN HIDDEN TESTS
for limits in (LIMITS, REPETITION_LIMITS):
    for name, (low, high) in limits.items():
        fine = {each: bounds[0] for each, bounds in limits.items()}
        for value, expected in ((low, True), (high, True), ((low + high) / 2, True)):
            got = keep(fine | {name: value}, limits)
            assert got is expected, f"{name} = {value} is within {low} to {high}; yours: {got!r}"
        for value in (low - 1e-6, high + 1e-6):
            got = keep(fine | {name: value}, limits)
            assert got is False, f"{name} = {value} is outside {low} to {high}; yours: {got!r}"
assert keep({"a": 5.0, "b": -3.0}, {"a": (4, 6)}) is True, (
    "a signal without a limit does not matter"
)
assert keep({"a": 5.0, "b": -3.0}, {}) is True, "no limits, no reason to drop"
checks.raises(KeyError, keep, {"b": 1.0}, {"a": (0, 1)}, because="the signal 'a' is missing")
checks.raises(KeyError, keep, {}, because="no signal at all")
### END HIDDEN TESTS

# %% [markdown]
# ### Repetition
#
# Pages made by programs repeat themselves: the same line for every product, the same phrase for the
# search engine. A language model that reads many of them learns to loop. Gopher's second table
# measures how much of a page is said twice, at three scales: lines and paragraphs, short phrases
# (how much of the text does *one* repeated pair, triple or quadruple of words cover?) and long ones
# (how much of the text lies in runs of 5 to 10 words that stood there before?).
#
# Papers leave such definitions a little open, and libraries differ. Ours: **the first occurrence
# of a line, a paragraph or a long phrase is not a repetition, the others are**; and where
# occurrences overlap, a word counts once, so that no share exceeds 1.


# %% exercise="repetition_signals" minutes=25 difficulty=2 path="more"
def repetition_signals(text: str) -> dict[str, float]:
    """Thirteen shares, each from 0 to 1, with the keys of REPETITION_LIMITS.

    "lines":           of the lines, those that stood earlier in the text. A line is one of
                       `text.splitlines()`, stripped; empty ones are left out
    "line_characters": the characters of those lines / characters of all lines
    "paragraphs", "paragraph_characters": the same of paragraphs: what one or more blank lines
                       (of nothing or white space) separate, `re.split(r"\\n\\s*\\n", text)`,
                       stripped; empty ones are left out
    "top_2", "top_3", "top_4": for n = 2, 3, 4: of the characters of all words, words_of(text), the
                       share that lies in occurrences of one n-gram, the n-gram for which this share
                       is largest among those that occur at least twice
    "repeated_5" … "repeated_10": for n = 5 … 10: of the same characters, the share that lies in a
                       second or later occurrence of an n-gram

    A word in several overlapping occurrences counts once. 0 where there is nothing to divide by, or
    nothing that occurs twice.
    """
    ### BEGIN SOLUTION
    words = words_of(text)
    sizes = [len(word) for word in words]
    total = max(sum(sizes), 1)

    def repeated(parts: list[str]) -> tuple[float, float]:
        parts = [part.strip() for part in parts if part.strip()]
        seen, again = set(), []
        for part in parts:
            if part in seen:
                again.append(part)
            seen.add(part)
        characters = sum(map(len, parts))
        return len(again) / max(len(parts), 1), sum(map(len, again)) / max(characters, 1)

    def covered(starts: list[int], n: int) -> int:
        return sum(sizes[i] for i in {start + j for start in starts for j in range(n)})

    signals = {}
    signals["lines"], signals["line_characters"] = repeated(text.splitlines())
    signals["paragraphs"], signals["paragraph_characters"] = repeated(re.split(r"\n\s*\n", text))
    for n in range(2, 11):
        places = defaultdict(list)
        for start, gram in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
            places[gram].append(start)
        if n <= 4:
            common = [covered(starts, n) for starts in places.values() if len(starts) > 1]
            signals[f"top_{n}"] = max(common, default=0) / total
        else:
            later = [start for starts in places.values() for start in starts[1:]]
            signals[f"repeated_{n}"] = covered(later, n) / total
    return signals
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all n-grams with their places</summary>
#
# `zip(*(words[i:] for i in range(n)))` runs through the n-grams; `enumerate` gives the word at
# which each begins. Collect the beginnings of each n-gram in a `defaultdict(list)`.
# </details>
#
# <details><summary>Hint: counting each word once</summary>
#
# Turn beginnings into a *set* of word positions (each beginning covers n of them), and add up the
# lengths of the words at these positions.
# </details>

# %% check="repetition_signals" points=2
nothing = dict.fromkeys(REPETITION_LIMITS, 0)
same_numbers(
    repetition_signals("red fish\nblue fish\nred fish\n\nRed fish"),
    nothing
    | {
        "lines": 1 / 4,  # "Red fish" is another line than "red fish"
        "line_characters": 8 / 33,
        "top_2": 21 / 29,  # "red fish", three times
        "top_3": 18 / 29,  # "fish red fish", twice, with a word in common
    },
    "repetition in four lines about fish",
)
same_numbers(
    repetition_signals("a b c d e\n\na b c d e"),
    nothing
    | {"lines": 1 / 2, "line_characters": 1 / 2, "paragraphs": 1 / 2, "paragraph_characters": 1 / 2}
    | {"top_2": 4 / 10, "top_3": 6 / 10, "top_4": 8 / 10, "repeated_5": 5 / 10},
    "repetition in two equal paragraphs",
)
### BEGIN HIDDEN TESTS
for text in ("", " \n\n ", "one", "!!!\n???", "one two"):
    expected = dict(nothing)
    same_numbers(repetition_signals(text), expected, f"repetition in {text!r}")


def again(parts: list[str]) -> tuple[float, float]:
    """Shares of the parts, and of their characters, that stand at an earlier place too."""
    parts = [part.strip() for part in parts]
    parts = [part for part in parts if part]
    late = [part for i, part in enumerate(parts) if part in parts[:i]]
    return len(late) / len(parts), len("".join(late)) / len("".join(parts))


def share(words: list[str], occurs: Callable[[int], bool], n: int) -> float:
    """Of the words' characters, the share in n-grams whose beginnings satisfy `occurs`."""
    last = len(words) - n
    inside = [
        word
        for place, word in enumerate(words)
        if any(occurs(i) for i in range(max(place - n + 1, 0), min(place, last) + 1))
    ]
    return len("".join(inside)) / len("".join(words))


g = checks.generator(2)
for _ in range(12):
    pieces = [" ".join(made_words(draw(1, 6, g), g, 12)) for _ in range(5)]
    pieces += ["W1, w1; w1 w1", "  w3 w4 w5 w6 w7 w8 w9 w10 w11 w2 w1 ", "x" * draw(1, 20, g)]
    breaks = ("\n", "\n\n", "\n \t\n", "\n\n\n", "\r\n")
    text = "".join(
        pieces[draw(0, len(pieces), g)] + breaks[draw(0, len(breaks), g)]
        for _ in range(draw(6, 16, g))
    )
    words, expected = words_of(text), {}
    expected["lines"], expected["line_characters"] = again(text.splitlines())
    expected["paragraphs"], expected["paragraph_characters"] = again(re.split(r"\n\s*\n", text))
    for n in range(2, 11):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n > 4:
            expected[f"repeated_{n}"] = share(
                words, lambda i, grams=grams: grams[i] in grams[:i], n
            )
        else:
            expected[f"top_{n}"] = max(
                (
                    share(words, lambda i, grams=grams, gram=gram: grams[i] == gram, n)
                    for gram in set(grams)
                    if grams.count(gram) > 1
                ),
                default=0,
            )
    same_numbers(repetition_signals(text), expected, f"repetition in {text!r}")
### END HIDDEN TESTS

# %% [markdown]
# ## Similarity from minima {#minhash}
#
# Exact copies are easy: hash every text, keep one of each hash. But mirrors differ in a header, a
# date, a cookie notice. So a document becomes the set of its **shingles**, runs of $w$ words, and
# two documents are near-duplicates if the Jaccard similarity of the two sets is large. With $w=5$
# one changed word spoils five shingles: $J$ falls quickly, and unrelated texts share next to none.


# %% exercise="shingle_ids" minutes=5 difficulty=1
def shingle_ids(text: str, width: int = 5) -> np.ndarray:
    """The set of a text's shingles as a sorted uint64 array (n,), each id once.

    A shingle is `width` consecutive words of words_of(text), joined by one space; its id is
    hash64(shingle). A text of fewer than `width` words has one shingle, all of its words; a text
    without words has none.
    """
    ### BEGIN SOLUTION
    words = words_of(text)
    runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
    return np.array(sorted(hash64(run) for run in runs if run), dtype=np.uint64)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: numbers beyond 2⁶³</summary>
#
# NumPy makes floats of a list with numbers below and above 2⁶³, and of an empty one, unless you say
# `dtype=np.uint64`.
# </details>

# %% check="shingle_ids" points=1
got = shingle_ids("To be, or not to be!", 2)
checks.kind(got, np.ndarray, what="shingle_ids")
pairs = ["to be", "be or", "or not", "not to"]
checks.close(
    got,
    np.array(sorted(map(hash64, pairs)), dtype=np.uint64),
    what="the ids of the pairs of words in 'To be, or not to be!'",
)
assert got.dtype == np.uint64, f"uint64 is asked for; yours is {got.dtype}"
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for count, width in [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (60, 5), (40, 1), (300, 8), (7, 7)]:
    words = made_words(count, g, 15)
    text = "... " + ",\n ".join(words).title() + "?"
    expected = set()
    while len(words) >= width:
        expected.add(hash64(" ".join(words[:width])))
        words = words[1:]
    if 0 < count < width:
        expected = {hash64(" ".join(words))}
    got = shingle_ids(text, width)
    assert got.dtype == np.uint64, f"uint64 is asked for; yours is {got.dtype}"
    checks.close(
        got,
        np.array(sorted(expected), dtype=np.uint64),
        what=f"the shingle ids of {count} words, width {width}",
    )
words = made_words(9, g)
checks.close(
    shingle_ids(" ".join(words)),
    np.array(sorted(hash64(" ".join(words[i : i + 5])) for i in range(5)), dtype=np.uint64),
    what="the shingle ids with the width of 5 that is the default",
)
### END HIDDEN TESTS

# %% [markdown]
# ### One hash, one coin
#
# A crawl holds billions of such sets; they cannot be compared with each other, nor even kept.
# **MinHash** (Broder 1997; with $k$ hash functions Broder et al. 1998) keeps $k$ numbers of each.
# Let $h$ be a random hash function, one that puts the ids in random order. Look at the smallest
# hash in $A\cup B$. Every element is equally likely to be the one that has it. If that element is
# in both sets, then $\min h(A)=\min h(B)$; if it is in one only, the other set's minimum is larger.
# So
#
# $$ P\bigl[\min h(A)=\min h(B)\bigr]=\frac{\lvert A\cap B\rvert}{\lvert A\cup B\rvert}=J(A,B). $$
#
# Each hash function is a coin that falls on "equal" with probability $J$. With $k$ of them the
# share of equal minima estimates $J$ without bias and with the standard error
# $\sqrt{J(1-J)/k}$: at most 0.045 for $k=128$, however large the documents are.
#
# **Which hash functions?** $h(x)=ax+b$ with random $a$ and $b$. Libraries often take the remainder
# modulo the prime $2^{61}-1$. In 64-bit arithmetic $ax$, which has up to 125 bits, overflows first,
# so that the result is not the textbook's function. Overflow itself, though, is a fine
# remainder: modulo $2^{64}$. If $a$ is odd, no two ids collide, for an odd number has an inverse
# there. (The ids must look random already; BLAKE2b sees to that.)


# %%
def hash_seeds(count: int, seed: int = 0) -> np.ndarray:
    """(2, count) uint64: multipliers a, all odd, and offsets b of `count` hash functions."""
    seeds = np.random.default_rng(seed).integers(0, 2**64, (2, count), dtype=np.uint64)
    seeds[0] |= np.uint64(1)
    return seeds


SEEDS = hash_seeds(128)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two arrays of distinct ids; 0 for two empty ones."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


# %% exercise="minhash_signature" minutes=15 difficulty=2
def minhash_signature(ids: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The smallest value of each hash function over a set.

    ids: uint64 (n,), in any order. seeds: uint64 (2, k), multipliers and offsets.
    Returns uint64 (k,): min over x of ids of (seeds[0, i] · x + seeds[1, i]) mod 2⁶⁴, exactly; for
    n = 0 all are 2⁶⁴ − 1. Vectorized: no Python loop runs over the ids. Inputs are not changed.
    """
    ### BEGIN SOLUTION
    a, b = seeds[:, :, None]
    values = a * ids + b  # (k, n): products of uint64 arrays wrap, which is the remainder
    return values.min(axis=1, initial=np.iinfo(np.uint64).max)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the remainder for free</summary>
#
# NumPy's arrays of uint64 multiply and add modulo 2⁶⁴ without a warning. Mixed with a Python float
# or a signed array they become float64, which has 53 bits.
# </details>
#
# <details><summary>Hint: the empty set</summary>
#
# `min` of nothing is an error, unless it is told what to begin with: its argument `initial`.
# </details>

# %% check="minhash_signature" points=2
ids = np.array([1, 2], dtype=np.uint64)
seeds = np.array([[3, 2**63 + 1, 5], [5, 7, 2**64 - 6]], dtype=np.uint64)
got = minhash_signature(ids, seeds)
checks.kind(got, np.ndarray, what="minhash_signature")
checks.close(
    got,
    np.array([8, 9, 4], dtype=np.uint64),
    what="the signature of {1, 2}: of 8 and 11, of 2⁶³ + 8 and 9, of 2⁶⁴ − 1 and 4",
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)


def random_ids(count: int) -> np.ndarray:
    halves = torch.randint(0, 2**32, (2, count), generator=g).numpy().astype(np.uint64)
    return halves[0] << np.uint64(32) | halves[1]


for n, k in [(1, 1), (7, 3), (1, 40), (300, 17), (2, 128)]:
    ids, seeds = random_ids(n), random_ids(2 * k).reshape(2, k)
    # Multipliers are odd as a rule, and need not be.
    seeds[0] = seeds[0] | np.uint64(1) if n != 7 else seeds[0] & np.uint64(2**64 - 2)
    before = ids.copy(), seeds.copy()
    expected = [
        min((int(a) * int(x) + int(b)) % 2**64 for x in ids) for a, b in zip(*seeds, strict=True)
    ]
    got = minhash_signature(ids, seeds)
    assert got.dtype == np.uint64, f"uint64 is asked for; yours is {got.dtype}"
    checks.close(got, np.array(expected, dtype=np.uint64), what=f"a signature, n = {n}, k = {k}")
    assert (ids == before[0]).all(), "the ids were changed in place: work on a copy"
    assert (seeds == before[1]).all(), "the seeds were changed in place: work on a copy"
    again = minhash_signature(np.concatenate([ids[::-1], ids]), seeds)
    checks.close(again, got, what="the signature of the same set in another order, ids twice")
    more = random_ids(5)
    both = minhash_signature(np.concatenate([ids, more]), seeds)
    least = np.minimum(got, minhash_signature(more, seeds))
    checks.close(both, least, what="the signature of a union, which is the smaller of the two")
empty = minhash_signature(np.zeros(0, dtype=np.uint64), SEEDS)
assert empty.dtype == np.uint64, f"uint64 is asked for; yours is {empty.dtype} for the empty set"
checks.close(
    empty,
    np.full(128, 2**64 - 1, dtype=np.uint64),
    what="the signature of the empty set",
)
### END HIDDEN TESTS

# %% check="minhash_signature" points=1
ids, seeds = np.arange(5000, dtype=np.uint64) ** np.uint64(3), hash_seeds(8, 3)
with counted_steps() as steps:
    got = minhash_signature(ids, seeds)
assert steps.count < 4000, (
    f"{steps.count:,} lines of Python ran for 5,000 ids and 8 hash functions: let NumPy loop "
    "over the ids"
)
### BEGIN HIDDEN TESTS
checks.close(
    got,
    np.array(
        [min((int(a) * x**3 + int(b)) % 2**64 for x in range(5000)) for a, b in seeds.T],
        dtype=np.uint64,
    ),
    what="the signature of 5,000 ids",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Candidates without comparing all pairs {#lsh}
#
# Signatures make a comparison cheap, but a million documents have $5\cdot10^{11}$ pairs.
# **Locality-sensitive hashing** finds the similar ones without looking at the rest. Cut the
# signature into $b$ **bands** of $r$ rows. Two documents are **candidates** if they agree in all
# $r$ rows of *at least one* band. Documents are put into buckets by the content of each band, and
# only those that meet in a bucket are ever compared.
#
# A band agrees with probability $s^r$ at similarity $s$; it fails with $1-s^r$; all $b$ fail with
# $(1-s^r)^b$. So
#
# $$ P[\text{candidate}] = 1-(1-s^r)^b, $$
#
# an **S-curve**: nearly 0, then a steep rise near $s\approx(1/b)^{1/r}$, then nearly 1. More rows
# move it to the right, more bands to the left. Candidates that are no near-duplicates cost a
# comparison; near-duplicates that never meet are missed for good. So one sets the rise *below* the
# threshold that one wants.


# %% exercise="s_curve" minutes=5 difficulty=1 path="more"
def s_curve(similarity, bands: int, rows: int):
    """The probability that two documents of this similarity become candidates.

    similarity: a number or a tensor of any shape, from 0 to 1. Returns the same kind and shape.
    """
    ### BEGIN SOLUTION
    return 1 - (1 - similarity**rows) ** bands
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the formula</summary>
#
# It stands above; Python's operators work for numbers and tensors alike.
# </details>

# %% check="s_curve" points=1
checks.number(
    s_curve(0.5, 2, 3),
    1 - (7 / 8) ** 2,
    to=1e-9,
    what="two bands of three rows at similarity 0.5",
    mistakes={
        "bands and rows exchanged": 1 - (3 / 4) ** 3,
        "the probability that all bands agree": 1 / 64,
    },
)
### BEGIN HIDDEN TESTS
for similarity in (0.0, 1.0):
    checks.number(s_curve(similarity, 4, 3), similarity, to=1e-12, what=f"at {similarity}")
g = checks.generator(5)
for bands, rows in [(1, 1), (1, 5), (6, 1), (20, 5), (32, 4), (9, 13)]:
    s = torch.rand(3, 4, generator=g, dtype=torch.float64)
    s[0, 0], s[0, 1] = 0.0, 1.0
    p = s**rows  # that one band agrees; then the probabilities of 1, 2, … bands that do
    expected = sum(math.comb(bands, n) * p**n * (1 - p) ** (bands - n) for n in range(1, bands + 1))
    with checks.unchanged(similarity=s):
        got = s_curve(s, bands, rows)
    checks.close(
        got,
        expected,
        what=f"the S-curve of {bands} bands of {rows} rows",
        dtype=torch.float64,
    )
### END HIDDEN TESTS


# %% exercise="lsh_candidates" minutes=15 difficulty=2
def lsh_candidates(signatures: np.ndarray, bands: int) -> set[tuple[int, int]]:
    """The pairs (i, j), i < j, of documents whose signatures agree in all rows of some band.

    signatures: uint64 (n, k). Band number m consists of the columns m·r to (m+1)·r − 1, where
    r = k/bands; only the same band of two documents is compared. Raises ValueError if `bands` does
    not divide k. Work: documents are put into buckets; no loop runs over all pairs.
    """
    ### BEGIN SOLUTION
    k = signatures.shape[1]
    if k % bands:
        raise ValueError(f"{k} hashes do not make {bands} bands of equal length")
    pairs = set()
    for band in np.split(signatures, bands, axis=1):
        buckets = defaultdict(list)
        for i, rows in enumerate(band):
            buckets[rows.tobytes()].append(i)
        for members in buckets.values():
            pairs.update(combinations(members, 2))
    return pairs
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a bucket's key</summary>
#
# The rows of a band as something that can be a key of a dictionary: `tuple(...)` or `.tobytes()`.
# Each band needs buckets of its own.
# </details>
#
# <details><summary>Hint: pairs from a bucket</summary>
#
# `itertools.combinations(members, 2)` of members in ascending order are pairs with i < j. Plain
# Python integers, please.
# </details>

# %% check="lsh_candidates" points=2
signatures = np.array(
    [[1, 2, 3, 4], [1, 2, 9, 9], [9, 9, 3, 4], [3, 4, 1, 2], [1, 9, 3, 9]], dtype=np.uint64
)
got = lsh_candidates(signatures, 2)
checks.kind(got, set, what="lsh_candidates")
assert (0, 3) not in got, (
    "documents 0 and 3 hold the same values in different bands, which says nothing: those come "
    "from other hash functions"
)
assert got == {(0, 1), (0, 2)}, (
    f"0 and 1 agree in band 0, 0 and 2 in band 1, and that is all; yours: {sorted(got)}"
)
checks.raises(ValueError, lsh_candidates, signatures, 3, because="3 does not divide 4")
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for n, k, bands in [(1, 6, 3), (30, 12, 4), (30, 12, 3), (25, 6, 6), (40, 8, 1), (13, 24, 8)]:
    values = torch.randint(0, 2 if k // bands > 2 else 5, (n, k), generator=g)
    values[draw(0, n, g)] = values[draw(0, n, g)]
    signatures = values.numpy().astype(np.uint64) + np.uint64(2**63)
    equal = (values[:, None] == values[None]).unflatten(-1, (bands, k // bands)).all(-1).any(-1)
    expected = {(i, j) for i, j in equal.nonzero().tolist() if i < j}
    before = signatures.copy()
    got = lsh_candidates(signatures, bands)
    checks.kind(got, set, what="lsh_candidates")
    missing, extra = expected - got, got - expected
    assert not missing, f"{n} documents, {bands} bands of {k}: {min(missing)} is missing"
    assert not extra, f"{n} documents, {bands} bands of {k}: {max(extra)} is not asked for"
    assert (signatures == before).all(), "the signatures were changed in place"
close = np.array([[2**64 - 1, 5], [2**64 - 2, 5], [2**53, 6], [2**53 + 1, 6]], dtype=np.uint64)
assert lsh_candidates(close, 1) == set(), "numbers that differ in their last bit are not equal"
checks.raises(ValueError, lsh_candidates, close, 4, because="4 bands of 2 hashes")
n = 600
different = torch.arange(n * 8).view(n, 8).numpy().astype(np.uint64)
different[7, 4:] = different[550, 4:]
with counted_steps() as steps:
    got = lsh_candidates(different, 2)
assert got == {(7, 550)}, f"only 7 and 550 agree in a band; yours: {got}"
assert steps.count < 60_000, (
    f"{steps.count:,} lines of Python ran for {n} documents: buckets, not all {n * (n - 1) // 2:,} "
    "pairs"
)
### END HIDDEN TESTS

# %% [markdown]
# ### Measured
#
# Before you run the next cell, predict: 128 hashes, once as 32 bands of 4 rows, once as 16 of 8 and
# once as 8 of 16. Where does each curve rise, and does the measurement follow the formula although
# the hash functions are as simple as $ax+b$? The documents are sets of random ids with a known
# Jaccard similarity, and every pair goes through your two functions (the curves are exercise 6).


# %% tags=["experiment"]
def pair_of_sets(similarity: float, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Two sets of random ids, `size` in their union, with this similarity."""
    ids = rng.integers(0, 2**64, size, dtype=np.uint64)
    both = round(similarity * size)
    middle = both + (size - both) // 2
    return ids[:middle], np.concatenate([ids[:both], ids[middle:]])


rng = np.random.default_rng(15)
grid = np.array([0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
TRIALS = 150
signatures = []  # of the pairs' documents, one after the other
for similarity in grid:
    for trial in range(TRIALS):
        seeds = hash_seeds(128, trial)
        pair = pair_of_sets(similarity, 200, rng)
        signatures.append([minhash_signature(ids, seeds) for ids in pair])
signatures = np.array(signatures).reshape(len(grid), TRIALS, 2, 128)
estimates = (signatures[:, :, 0] == signatures[:, :, 1]).mean(-1)  # (grid, TRIALS)
measured = {
    bands: [np.mean([bool(lsh_candidates(pair, bands)) for pair in pairs]) for pairs in signatures]
    for bands in (32, 16, 8)
}

# %% tags=["experiment", "figure"]
# Figure: the S-curve and the estimator, measured
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8))
x = np.linspace(0, 1, 201)
for i, (bands, shares) in enumerate(measured.items()):
    rows = 128 // bands
    color, marker = plot.COLORS[i], "osD"[i]
    axes[0].plot(x, s_curve(x, bands, rows), color=color, label=f"{bands} bands of {rows} rows")
    errors = 2 * np.sqrt(np.maximum(np.array(shares) * (1 - np.array(shares)), 1e-9) / TRIALS)
    axes[0].errorbar(
        grid, shares, errors, fmt=marker, color=color, linestyle="none", markersize=5, capsize=2
    )
    axes[0].axvline((1 / bands) ** (1 / rows), color=color, linestyle=":", linewidth=1)
axes[0].set(xlabel="Jaccard similarity", ylabel="share that become candidates")
axes[0].set_title("candidates: formula and measurement")
axes[0].legend(loc="upper left", fontsize=8)
errors = estimates - grid[:, None]
axes[1].plot(x, np.sqrt(x * (1 - x) / 128), color=plot.COLORS[2], label=r"$\sqrt{J(1-J)/128}$")
axes[1].plot(grid, errors.std(1), "o", color=plot.COLORS[0], linestyle="none", label="spread")
axes[1].plot(grid, errors.mean(1), "s", color=plot.COLORS[1], linestyle="none", label="mean error")
axes[1].axhline(0, color="#999999", linewidth=1)
axes[1].set(xlabel="Jaccard similarity", ylabel="error of the estimate")
axes[1].set_title("the estimate from 128 hashes")
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    f"Left: the formula as lines; points are {TRIALS} pairs, with bars of two standard errors; "
    f"dotted lines stand at (1/b)^(1/r). Right: the estimate has no bias that could be seen, and "
    f"spreads as a share of 128 coins does.",
)
plot.plt.show()

# %% [markdown]
# ## Deduplication {#dedup}
#
# Three decisions are left, and each is a place where pipelines differ.
#
# **Candidates are verified.** A bucket says "perhaps". Before anything is thrown away, the true
# Jaccard similarity of the pair is computed, and only if it reaches the threshold are the two
# joined. Without it a single unlucky bucket joins documents that have little in common.
#
# **Groups are joined by union–find.** If A is like B and B like C, then A, B and C are one
# **cluster**, even if A is not like C. Union–find keeps a parent for each document; `find` follows
# parents to the root of a cluster, `union` hangs one root under the other.
#
# **One survivor for each cluster**: here the longest text, which is the likeliest to be whole.


# %% exercise="deduplicate" minutes=20 difficulty=3
def deduplicate(
    documents: dict[str, str],
    threshold: float = 0.7,
    width: int = 5,
    seeds: np.ndarray = SEEDS,
    bands: int = 32,
) -> dict[str, str]:
    """One document of each cluster of near-duplicates, in the order in which they were given.

    Two documents are joined if they are candidates by LSH (signatures of their shingle_ids of
    `width` words under `seeds`, in `bands` bands) *and* the Jaccard similarity of their shingles
    is at least `threshold`. A cluster is what is joined directly or through others. Of each cluster
    one document stays: the one with most characters, of several such the first given. Documents
    without words are in no cluster, and stay. `documents` is not changed.
    """
    ### BEGIN SOLUTION
    names = list(documents)
    ids = [shingle_ids(documents[name], width) for name in names]
    signatures = np.array([minhash_signature(each, seeds) for each in ids], dtype=np.uint64)
    parent = list(range(len(names)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # halves the way for the next who comes by
            i = parent[i]
        return i

    for i, j in lsh_candidates(signatures.reshape(len(names), -1), bands) if names else ():
        if len(ids[i]) and jaccard(ids[i], ids[j]) >= threshold:
            parent[find(j)] = find(i)
    best: dict[int, int] = {}
    for i, name in enumerate(names):
        root = find(i)
        if root not in best or len(documents[name]) > len(documents[names[best[root]]]):
            best[root] = i
    kept = {names[i] for i in best.values()}
    return {name: text for name, text in documents.items() if name in kept}
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: union–find in six lines</summary>
#
# `parent = list(range(n))`; `find(i)` goes from `i` to `parent[i]` until it stays the same; joining
# i and j sets `parent[find(j)] = find(i)`. Both `find`s matter: `parent[j] = i` alone loses what j
# was joined to before.
# </details>
#
# <details><summary>Hint: choosing the survivor</summary>
#
# Only when all pairs are joined: go through the documents in order and keep, for each root, the
# first with the largest length.
# </details>
#
# <details><summary>Hint: no documents at all</summary>
#
# `np.array([])` has one axis, not two. An empty dictionary comes back empty.
# </details>

# %% check="deduplicate" points=2
base = [f"w{i}" for i in range(60)]
pages = {
    "first": " ".join(base),
    "other": " ".join(f"x{i}" for i in range(60)),
    "mirror": "Printed page: " + " ".join(base),
    "copy": ", ".join(base).upper(),
}
got = deduplicate(pages)
checks.kind(got, dict, what="deduplicate")
assert "other" in got, "'other' shares no word with the rest: it stays"
assert list(got) == ["other", "copy"], (
    "first, mirror and copy say the same; the longest of the three is 'copy', and the order stays "
    f"as it was: ['other', 'copy']. Yours: {list(got)}"
)
assert got["copy"] == pages["copy"], "texts stay as they are"
### BEGIN HIDDEN TESTS
assert deduplicate({}) == {}, "no documents in, none out"
assert list(deduplicate({"a": "", "b": "...", "c": "one", "d": "One!"})) == ["a", "b", "d"], (
    "documents without words are in no cluster; 'one' and 'One!' are one shingle each, the same"
)
assert list(deduplicate({"a": "", "b": "..."}, threshold=0)) == ["a", "b"], (
    "documents without words are in no cluster, whatever the threshold"
)


def runs(text: str, width: int) -> set[tuple[str, ...]]:
    """The shingles as tuples of words."""
    words = words_of(text)
    return {tuple(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))} - {()}


def survivors(documents: dict[str, str], threshold: float, width: int) -> list[str]:
    """By comparing all pairs, and spreading through the graph of those that are alike."""
    names, left = list(documents), []
    sets = {name: runs(documents[name], width) for name in names}
    alike = {
        a: [b for b in names if len(sets[a] & sets[b]) >= threshold * len(sets[a] | sets[b])]
        for a in names
    }
    seen: set[str] = set()
    for name in names:
        if name in seen:
            continue
        cluster, waiting = [], [name]
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                cluster.append(each)
                waiting += alike[each]
        longest = max(len(documents[each]) for each in cluster)
        left.append(next(e for e in names if e in cluster and len(documents[e]) == longest))
    return sorted(left, key=names.index)


g = checks.generator(7)
for threshold, width in [(0.7, 5), (0.6, 2), (0.8, 3)]:
    pages, order = {}, []
    for _family in range(5):
        words = made_words(draw(150, 260, g), g, 10**6)
        order.append(words)
        for _ in range(draw(1, 3, g)):  # mirrors: J of about 0.9 with the original
            head = made_words(draw(2, 5, g), g, 10**6)
            order.append([*head, *words] if draw(0, 2, g) else [*words, *head])
        # a relative with J of about a half, which is often a candidate and never a near-duplicate
        order.append(words[: len(words) // 2])
    places = torch.randperm(len(order), generator=g).tolist()
    pages = {f"page {i}": " ".join(order[i]) for i in places}
    before = dict(pages)
    expected = survivors(pages, threshold, width)
    got = deduplicate(pages, threshold, width, hash_seeds(128, draw(0, 10**6, g)))
    assert pages == before, "the dictionary that was given was changed"
    assert list(got) == expected, (
        f"threshold {threshold}, width {width}: {len(expected)} of {len(pages)} documents should "
        f"stay, yours keeps {len(got)}; kept wrongly: {sorted(set(got) - set(expected))}, dropped "
        f"wrongly: {sorted(set(expected) - set(got))}, or another order"
    )
    assert all(got[name] == pages[name] for name in got), "texts stay as they are"
### END HIDDEN TESTS

# %% check="deduplicate" points=2
# A chain: each document shares nine tenths with the next, the ends of the chain much less.
words = [f"w{i}" for i in range(400)]
chain = {f"part {i}": " ".join(words[8 * i : 8 * i + 160 + i]) for i in range(8)}
got = deduplicate(chain)
assert list(got) == ["part 7"], (
    "all eight are joined through their neighbors, so that one stays, the longest: 'part 7'. "
    f"Yours: {list(got)}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for _ in range(4):
    places = torch.randperm(8, generator=g).tolist()
    shuffled = {f"part {i}": chain[f"part {i}"] for i in places}
    got = deduplicate(shuffled, seeds=hash_seeds(128, draw(0, 10**6, g)))
    assert list(got) == ["part 7"], f"the chain in the order {places}: yours keeps {list(got)}"
    lengths = {f"copy {i}": " ".join(words[:100]) + " " * (i % 3) for i in places}
    got = deduplicate(lengths)
    first = next(name for name in lengths if len(lengths[name]) == max(map(len, lengths.values())))
    assert list(got) == [first], (
        f"of several longest texts the first that was given stays, {first!r}; yours: {list(got)}"
    )
edge = {"a": " ".join(words[:11]), "b": " ".join(words[:12])}  # one word each: 11 of 12
for threshold, count in ((11 / 12, 1), (11 / 12 + 1e-9, 2)):
    got = deduplicate(edge, threshold, width=1)
    assert len(got) == count, (
        f"J = 11/12 at a threshold of {threshold}: {count} should stay, yours keeps {len(got)}"
    )
# One band of all 128 rows: at J = 0.95 two documents meet once in 800 times. The seeds are fixed.
apart = {"a": " ".join(words[:200]), "b": " ".join(words[10:200])}
seeds = hash_seeds(128, 15)
before = seeds.copy()
got = deduplicate(apart, seeds=seeds, bands=1)
assert (seeds == before).all(), "the seeds were changed in place: work on a copy"
assert len(got) == 2, (
    "with one band of 128 rows these two (J = 0.95) are hardly ever candidates, and only "
    "candidates are compared"
)
### END HIDDEN TESTS

# %% [markdown]
# Real data: Python's own documentation, as it stands in every installation. It was not made for
# this lesson, and it holds duplicates.

# %% tags=["experiment"]
documentation = data.documentation()
shingled = {name: shingle_ids(text) for name, text in documentation.items()}
rows = []
for a, b in combinations(documentation, 2):
    both = len(np.intersect1d(shingled[a], shingled[b], assume_unique=True))
    if both:
        smaller = min(len(shingled[a]), len(shingled[b]))
        rows.append((jaccard(shingled[a], shingled[b]), both / smaller, a, b))
print("Jaccard  contained  documents")
for similarity, contained, a, b in sorted(rows, reverse=True)[:8]:
    print(f"{similarity:7.2f}  {contained:9.2f}  {a}, {b}")
whole = sum(contained > 0.99 for _, contained, _, _ in rows)
print(f"\n{len(documentation)} documents, {len(deduplicate(documentation))} after deduplicate()")
print(f"{whole} pairs in which one document stands whole inside of the other")

# %% [markdown]
# Look at the second column. The topic "if" is "else", word for word, and deduplication finds it.
# But many a topic stands *whole* inside a longer chapter, and Jaccard similarity does not notice: a
# page of 100 shingles inside a book of 10,000 has $J=0.01$. That is a property of the measure, not
# a mistake of yours. Pipelines that care use **containment**, $\lvert A\cap B\rvert/\lvert
# A\rvert$, or look for long common substrings with a suffix array (Lee et al. 2021). The models
# that this course ships were trained on text deduplicated by containment.

# %% [markdown]
# ## Contamination {#contamination}
#
# Benchmarks lie on the web too. A model that has read the questions with their answers scores
# better on them and is no better. GPT-3's authors looked for this by **n-gram overlap**: a
# benchmark item and a training document that share a run of 13 words, in lower case and without
# punctuation, are taken for related. Thirteen words seldom match by accident (licenses and famous
# quotes do). GPT-3 cut out the match with its surroundings; we drop the whole document.
#
# The overlap is used in both directions. Training documents that share a run are removed *before*
# training; and the items that were found are reported, so that a score can be given with and
# without them, since no cleaning is complete: a translation or a paraphrase has no common run.


# %% exercise="decontaminate" minutes=15 difficulty=2
def decontaminate(
    documents: dict[str, str], benchmark: dict[str, str], n: int = 13
) -> tuple[dict[str, str], set[str]]:
    """Documents without those that share a run of n words with a benchmark item, and the names of
    the items that were found in any document.

    Words are words_of(text). An item of fewer than n words is looked for as a whole: all of its
    words in a row. An item without words is never found. Documents keep their order.
    """
    ### BEGIN SOLUTION
    owners = defaultdict(set)  # run of words → items that hold it
    for item, text in benchmark.items():
        words = words_of(text)
        for i in range(max(len(words) - n + 1, 1)):
            owners[tuple(words[i : i + n])].add(item)
    owners.pop((), None)
    lengths = {len(run) for run in owners}
    clean, leaked = {}, set()
    for name, text in documents.items():
        words = words_of(text)
        found = set()
        for length in lengths:
            for i in range(len(words) - length + 1):
                found |= owners.get(tuple(words[i : i + length]), set())
        leaked |= found
        if not found:
            clean[name] = text
    return clean, leaked
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which runs to look for</summary>
#
# Make a dictionary from each run of the benchmark (a tuple of words) to the items that hold it.
# Items shorter than n add one run of their own length; so each document is searched for runs of
# several lengths, those that occur in the dictionary.
# </details>
#
# <details><summary>Hint: defaultdict grows when it is read</summary>
#
# `owners[run]` of an unknown run makes an entry; `owners.get(run, set())` does not.
# </details>

# %% check="decontaminate" points=2
numbers = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
exam = {"count": numbers, "short": "What is LSH?", "never": "red green blue"}
pages = {
    "clean": "one two three four five six seven, and so on",
    "forum": "answers: Two, three, four, five; six seven eight nine ten ELEVEN twelve thirteen "
    "fourteen",
    "quiz": "he asked what is lsh and left",
}
clean, leaked = checks.parts(decontaminate(pages, exam), "clean documents", "leaked items")
assert list(clean) == ["clean"], (
    "'forum' holds 13 words of 'count' in a row, 'quiz' all three words of 'short', 'clean' holds "
    f"only seven of 'count'. Yours keeps {list(clean)}"
)
assert leaked == {"count", "short"}, f"found were 'count' and 'short'; yours: {leaked}"
### BEGIN HIDDEN TESTS
g = checks.generator(9)


def joined(words: list[str]) -> str:
    """The words with random punctuation and capitals."""
    signs = (" ", ", ", "; ", " - ", ".\n", " ")
    return "".join(
        (word.upper() if draw(0, 2, g) else word) + signs[draw(0, len(signs), g)] for word in words
    )


for n in (13, 5, 2):
    items = {f"item {i}": made_words(draw(n, 4 * n, g), g, 10**7) for i in range(8)}
    items |= {f"short {i}": made_words(draw(1, n, g), g, 10**7) for i in range(4)}
    names, pages, expected_clean, expected_leaked = list(items), {}, [], set()
    for i in range(24):
        filler = [made_words(draw(0, 30, g), g, 10**7) for _ in range(2)]
        item = names[draw(0, len(names), g)]
        words = items[item]
        start = draw(0, max(len(words) - n, 0) + 1, g)
        kind = draw(0, 4, g)
        needed = min(n, len(words))
        if kind == 0:  # nothing of the exam
            part = []
        elif kind == 1:  # a run that is just long enough
            part = words[start : start + needed]
        elif kind == 2:  # one word too few
            part = words[start : start + needed - 1]
        else:  # all words of it, with a stranger in the middle of every run that is long enough
            part = words[:needed]
            part = [*part[: needed // 2], "stranger", *part[needed // 2 :]]
            part = part if needed > 1 else ["stranger"]
        page = joined([*filler[0], *part, *filler[1]])
        pages[f"page {i}"] = page
        if kind == 1:
            expected_leaked.add(item)
        else:
            expected_clean.append(f"page {i}")
    before = dict(pages)
    benchmark = {name: joined(words) for name, words in items.items()} | {"empty": " ... "}
    clean, leaked = checks.parts(
        decontaminate(pages, benchmark, n), "clean documents", "leaked items"
    )
    assert pages == before, "the dictionary of documents was changed"
    assert list(clean) == expected_clean, (
        f"n = {n}: of {len(pages)} pages {len(expected_clean)} are clean, yours keeps {len(clean)}"
        f"; kept wrongly: {sorted(set(clean) - set(expected_clean))}, dropped wrongly: "
        f"{sorted(set(expected_clean) - set(clean))}"
    )
    assert all(clean[name] == pages[name] for name in clean), "texts stay as they are"
    checks.kind(leaked, set, what="leaked items")
    assert leaked == expected_leaked, (
        f"n = {n}: found should be {sorted(expected_leaked)}, yours: {sorted(leaked)}"
    )
twins = {"a": "the same short question", "b": "The same short question!", "c": "category theory"}
clean, leaked = decontaminate({"page": "see: the SAME short question", "cat": "a cat"}, twins)
assert leaked == {"a", "b"}, f"two items with the same words are both found; yours: {leaked}"
assert list(clean) == ["cat"], (
    f"words are compared whole: 'cat' is not 'category'; yours keeps {list(clean)}"
)
clean, leaked = decontaminate({"page": "concatenate the cat egory theory"}, twins)
assert list(clean) == ["page"], "'cat egory theory' are other words than 'category theory'"
pages = {"a": "smart history", "b": "art historyless", "c": "art", "d": "modern art history"}
clean, leaked = decontaminate(pages, {"short": "art history"})
assert list(clean) == ["a", "b", "c"], (
    f"'art history' stands in 'modern art history' alone, word for word; yours keeps {list(clean)}"
)
clean, leaked = decontaminate({"page": "four five six seven"}, exam)
assert leaked == set(), "four words of an item of fourteen are not enough, short as the page is"
both = {"a": "one two three", "b": "four five six"}
clean, leaked = decontaminate({"page": "one two three four five six"}, both, 3)
assert leaked == {"a", "b"}, f"one page may hold several items; yours: {leaked}"
nothing, none = decontaminate({}, both, 3)
assert nothing == {}, f"no documents in, none out; yours: {nothing}"
assert none == set(), f"nothing can be found in no documents; yours: {none}"
### END HIDDEN TESTS

# %% [markdown]
# ## A classifier for quality {#classifier}
#
# Rules cannot tell a good page from a dull one. The next filter is a small model that is trained on
# examples of what one wants (encyclopedias, textbooks) and of the crawl as it is, and then scores
# the whole crawl. It must be cheap, since it reads everything. GPT-3's authors used logistic
# regression on hashed words; DataComp-LM compared many filters, and a linear model over n-grams did
# best. FineWeb-Edu lets a large model grade half a million pages and trains a small one on the
# grades.
#
# **Hashing** saves the vocabulary: the feature of an n-gram is its hash modulo the number of
# buckets. Two n-grams may share a bucket; with enough buckets it does no harm.


# %% exercise="quality_classifier" minutes=20 difficulty=2 path="more"
class QualityClassifier(nn.Module):
    """Logistic regression on hashed words and pairs of words.

    Parameters: `weight` (buckets,) and `bias` (), float32, zero at first.
    """

    def __init__(self, buckets: int = 4096):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets))
        self.bias = nn.Parameter(torch.zeros(()))

    def features(self, texts: list[str]) -> Tensor:
        """(texts, buckets) float32. Of words_of(text), each word and each pair of neighbors,
        joined by a space, adds 1 to the bucket hash64(it) % buckets; then each row is divided by
        its Euclidean norm. A text without words has a row of zeros."""
        ### BEGIN SOLUTION
        buckets = len(self.weight)
        counts = torch.zeros(len(texts), buckets)
        for row, text in zip(counts, texts, strict=True):
            words = words_of(text)
            grams = words + [f"{a} {b}" for a, b in pairwise(words)]
            places = torch.tensor([hash64(gram) % buckets for gram in grams], dtype=torch.long)
            row += torch.bincount(places, minlength=buckets)
        return counts / counts.norm(dim=1, keepdim=True).clamp(min=1)
        ### END SOLUTION

    def forward(self, texts: list[str]) -> Tensor:
        """Logits (texts,): positive for texts that look like those with label 1."""
        ### BEGIN SOLUTION
        return self.features(texts) @ self.weight + self.bias
        ### END SOLUTION

    def fit(self, texts: list[str], labels: Tensor, steps: int = 100) -> None:
        """Trains weight and bias to predict the labels (texts,), 0 or 1, by logistic regression:
        `steps` steps of any optimizer on the mean binary cross-entropy over all texts. On a few
        hundred texts it takes less than two seconds."""
        ### BEGIN SOLUTION
        inputs, labels = self.features(texts), labels.float()
        with torch.no_grad():
            for _ in range(steps):
                error = (inputs @ self.weight + self.bias).sigmoid() - labels
                self.weight -= 10 * error @ inputs / len(texts)  # the gradient, in closed form
                self.bias -= error.mean()
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: training is slow</summary>
#
# The features do not change while the weights do: compute them once, before the loop.
# </details>
#
# <details><summary>Hint: nothing is learned</summary>
#
# Rows have norm 1, so that single features are about 0.1, and plain gradient descent needs a rate
# of 10 or so. The gradient of the cross-entropy with respect to a logit is sigmoid(logit) − label;
# it may be written down, or left to autograd and an optimizer.
# </details>

# %% check="quality_classifier" points=1
model = QualityClassifier(buckets=64)
got = model.features(["Good text, good", ""])
expected = torch.zeros(2, 64)
for gram in ("good", "text", "good", "good text", "text good"):
    expected[0, hash64(gram) % 64] += 1
checks.close(
    got,
    expected / expected.norm(),
    what="the features of 'Good text, good' and of an empty text",
    mistakes={"counts that are not divided by their norm": expected},
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for buckets in (1, 7, 4096):
    model = QualityClassifier(buckets)
    assert sorted(name for name, _ in model.named_parameters()) == ["bias", "weight"], (
        "the parameters are named weight and bias"
    )
    texts = [" ".join(made_words(n, g, 30)) for n in (0, 1, 2, 40, 200)]
    expected = torch.zeros(5, buckets, dtype=torch.float64)
    for row, text in enumerate(texts):
        words = text.split()
        for i in range(len(words)):
            expected[row, hash64(words[i]) % buckets] += 1
            if i:
                expected[row, hash64(words[i - 1] + " " + words[i]) % buckets] += 1
    expected /= expected.square().sum(1, keepdim=True).sqrt().clamp(min=1e-9)
    got = model.features(texts)
    checks.close(got, expected.float(), what=f"features in {buckets} buckets", dtype=torch.float32)
    weight = torch.randn(buckets, generator=g)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.fill_(-0.7)
    checks.close(
        model(texts),
        (expected @ weight.double() - 0.7).float(),
        what=f"logits from {buckets} buckets",
        rtol=1e-4,
    )
    checks.close(
        torch.autograd.grad(model(texts).sum(), model.weight)[0],
        expected.sum(0).float(),
        what="the gradient of the logits' sum in the weight",
    )
### END HIDDEN TESTS


# %% check="quality_classifier" points=2
def toy_texts(count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Texts of 40 words, 30 of them shared by both kinds, the rest mostly of the kind's own."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    texts = []
    for label in labels.tolist():
        words = made_words(30, generator, 300)
        for kind in (label,) * 8 + (1 - label,) * 2:
            words.append(f"d{kind}x{draw(0, 40, generator)}")
        texts.append(" ".join(words))
    return texts, labels


def area(scores: Tensor, labels: Tensor) -> float:
    """AUC: how often a text with label 1 scores higher than one with label 0."""
    good, bad = scores[labels == 1], scores[labels == 0]
    return float((good[:, None] > bad).double().mean() + (good[:, None] == bad).double().mean() / 2)


g = checks.generator(11)
texts, labels = toy_texts(200, g)
new_texts, new_labels = toy_texts(120, g)
model = QualityClassifier()
with checks.unchanged(labels=labels):
    model.fit(texts, labels)
found = area(model(new_texts).detach(), new_labels)
assert found > 0.8, (
    f"on new texts, a good one should score higher than a bad one in 80 % of the pairs or more; "
    f"yours: {100 * found:.0f} %"
)
### BEGIN HIDDEN TESTS
turned = QualityClassifier()
turned.fit(texts, 1 - labels)
found = area(turned(new_texts).detach(), new_labels)
assert found < 0.2, f"trained with exchanged labels the scores should turn; AUC {found:.2f}"
untouched = QualityClassifier()
untouched.fit(texts, labels, steps=0)
checks.close(untouched(texts), torch.zeros(200), what="logits after 0 steps")
mostly_good = QualityClassifier()  # nothing to learn from but how often the label is 1
mostly_good.fit([""] * 8, torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]))
assert mostly_good([""]).item() > 0.1, (
    "six of eight texts without words have label 1: the bias learns it; the logit of one is "
    f"{mostly_good(['']).item():.2f}"
)
loss = F.binary_cross_entropy_with_logits(model(texts).detach(), labels.float())
assert float(loss) < 0.45, (
    f"after 100 steps the mean cross-entropy on the training texts should be far below log 2 = 0.69"
    f"; yours is {float(loss):.2f}"
)
### END HIDDEN TESTS

# %% [markdown]
# ## Packing {#packing}
#
# A model is trained on rows of equal length, and documents have all lengths. Three ways:
#
# - **Pad** each document to a row of its own: much of the rows is padding.
# - **Concatenate and cut**: write all documents one after the other, with a separator, and cut
#   every `capacity` tokens. No token is wasted, but many documents are cut. A model that
#   reads the second half of a text without the first learns to make up what it cannot know.
# - **Pack** whole documents into rows, as suitcases into a car. This is bin packing, which is hard
#   to solve exactly and easy to solve well: take the documents from the longest to the shortest,
#   and put each into the row where it fits most tightly. **Best-fit decreasing** never needs more
#   than 11/9 of the best number of rows, plus a constant; and with thousands of documents, many of
#   them short, hardly any space is left (Ding et al. 2024).
#
# A document longer than a row has to be cut first, into pieces of `capacity`.


# %% exercise="pack_sequences" minutes=15 difficulty=2
def pack_sequences(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of documents by best-fit decreasing: for each row the indices of its documents.

    lengths: of the documents, 1 to capacity each; another length raises ValueError.
    Documents are placed from the longest to the shortest, of equally long ones the first given
    first. Each goes into the row with the least room among those that have enough, of several such
    the one that was opened first; if there is none, into a new row. Rows stand in the order in
    which they were opened, documents in the order in which they were placed.
    """
    ### BEGIN SOLUTION
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError(f"every length must be from 1 to {capacity}: cut longer documents first")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[i], -1))
        if place == len(room):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = room.pop(place)
        rows[row].append(i)
        insort(room, (free - lengths[i], row))
    return rows
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the tightest row</summary>
#
# Keep a list of (free tokens, number of the row), sorted. `bisect_left(room, (length, -1))` finds
# the first that has enough room, and among equals the one that was opened first. A plain search
# through all rows is right too, and slower.
# </details>
#
# <details><summary>Hint: equal lengths</summary>
#
# `sorted` is stable: with the key −length, equally long documents keep their order. `reverse=True`
# keeps it as well; sorting pairs (length, index) backwards does not.
# </details>

# %% check="pack_sequences" points=2
got = pack_sequences([4, 8, 1, 4, 2, 1], 10)
checks.kind(got, list, what="pack_sequences")
assert got == [[1, 4], [0, 3, 2, 5]], (
    "8 opens row 0 and 4 row 1; the next 4 goes to row 1; 2 fits both and fills row 0; the two of "
    f"length 1 fill row 1: [[1, 4], [0, 3, 2, 5]]. Yours: {got}"
)
checks.raises(ValueError, pack_sequences, [3, 11], 10, because="11 tokens do not fit into 10")


### BEGIN HIDDEN TESTS
def packed_slowly(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, by a search through all rows for every document."""
    rows, free = [], []
    waiting = list(range(len(lengths)))
    while waiting:
        longest = max(waiting, key=lambda i: lengths[i])  # the first of several
        waiting.remove(longest)
        fitting = [r for r in range(len(rows)) if free[r] >= lengths[longest]]
        if not fitting:
            rows.append([])
            free.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda r: free[r])
        rows[row].append(longest)
        free[row] -= lengths[longest]
    return rows


g = checks.generator(12)
assert pack_sequences([], 5) == [], "no documents, no rows"
for count, capacity in [(1, 1), (1, 9), (9, 1), (40, 10), (150, 100), (120, 7), (200, 512)]:
    lengths = [
        1 + draw(0, capacity, g) * draw(0, capacity + 1, g) // capacity for _ in range(count)
    ]
    lengths = [min(length, capacity) for length in lengths]
    before = list(lengths)
    got = pack_sequences(lengths, capacity)
    assert lengths == before, "the list of lengths was changed"
    placed = sorted(i for row in got for i in row)
    assert placed == list(range(count)), (
        f"{count} documents, capacity {capacity}: every document must be in one row, once"
    )
    fullest = max(sum(lengths[i] for i in row) for row in got)
    assert fullest <= capacity, f"a row holds {fullest} tokens, its capacity is {capacity}"
    expected = packed_slowly(lengths, capacity)
    at = next((r for r in range(len(expected)) if got[r : r + 1] != expected[r : r + 1]), None)
    at = len(expected) if at is None and len(got) > len(expected) else at
    assert at is None, (
        f"{count} documents, capacity {capacity}: {len(expected)} rows expected, yours are "
        f"{len(got)}; the first that differs is row {at}: lengths {lengths}"
    )
for bad in ([0], [3, -1], [5, 6]):
    checks.raises(ValueError, pack_sequences, bad, 5, because=f"lengths {bad} for a capacity of 5")
### END HIDDEN TESTS

# %% [markdown]
# ### A row with several documents
#
# In a packed row, causal attention lets a token look at everything before it: the documents that
# happen to stand there too. A **document mask** forbids it. Positions restart with each document;
# otherwise its first token might have position 300. (Rotary attention sees only differences of
# positions, so that under a mask the restart changes nothing there.) And the label of a document's
# last token would be the first token of another: nobody can know that one, so it is ignored (label
# −100). In practice a document ends with an end token, which is then the only one without a label,
# where no document was cut.
#
# A row is described by the number of the document that each token belongs to; −1 is padding:
#
# | tokens | `H` `e` `l` `l` `o` | `O` `k` | · · |
# |---|---|---|---|
# | document ids | 0 0 0 0 0 | 1 1 | −1 −1 |
# | positions | 0 1 2 3 4 | 0 1 | 0 0 |
# | labels | `e` `l` `l` `o` −100 | `k` −100 | −100 −100 |


# %% exercise="document_mask" minutes=10 difficulty=2
def document_mask(ids: Tensor) -> Tensor:
    """Which key each query may see in packed rows: bool (batch, 1, seq, seq), True = visible.

    ids: (batch, seq), int64: the document of each token, PAD (−1) for padding. A document is one
    run of equal ids, and a row's documents have different ids, in any order. A token sees itself
    and what stands before it in its document. Padding sees itself alone (so that no row of scores
    is empty), and nothing else sees it. On the device of ids.
    """
    ### BEGIN SOLUTION
    seq = ids.shape[1]
    same = ids[:, :, None] == ids[:, None, :]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=ids.device).tril()
    alone = torch.eye(seq, dtype=torch.bool, device=ids.device)
    return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: comparing each with each</summary>
#
# `ids[:, :, None] == ids[:, None, :]` is (batch, seq, seq): entry (i, j) is whether tokens i and j
# are of the same document.
# </details>

# %% check="document_mask" points=2
ids = torch.tensor([[4, 4, 2, PAD], [0, 0, 0, 0]], device=profile.device)
first = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
expected = torch.stack([torch.tensor(first).bool(), torch.ones(4, 4).tril().bool()])[:, None]
causal = torch.ones(2, 1, 4, 4).tril().bool()
checks.close(
    document_mask(ids),
    expected.to(profile.device),
    what="the mask of a packed row and of a row with one document",
    dtype=torch.bool,
    mistakes={
        "a causal mask without documents": causal,
        "True for what is hidden": ~expected,
        "the mask transposed": expected.mT,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(13)
for batch, seq in [(1, 1), (3, 9), (2, 16), (4, 5)]:
    ids = torch.full((batch, seq), PAD)
    for row in ids:
        names, end = torch.randperm(seq, generator=g).tolist(), 0
        while end < seq and draw(0, 5, g):
            start, end = end, end + draw(1, seq // 2 + 2, g)
            row[start:end] = names.pop()
    expected = torch.zeros(batch, 1, seq, seq, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        for q in range(seq):
            first = q  # where the query's document begins
            while row[q] != PAD and first and row[first - 1] == row[q]:
                first -= 1
            expected[b, 0, q, first : q + 1] = True
    ids, expected = ids.to(profile.device), expected.to(profile.device)
    with checks.unchanged(ids=ids):
        got = document_mask(ids)
    checks.close(got, expected, what=f"the mask of {ids.tolist()}", dtype=torch.bool)
    strided = torch.stack([ids, ids + 1], dim=-1)[..., 0]
    checks.close(document_mask(strided), expected, what="the mask of a strided view of ids")
many = torch.tensor([[0, 0, 256, 65_536, 2**32, 2**32, 2**32 + 1]], device=profile.device)
expected = torch.eye(7, device=profile.device).bool()
expected[1, 0] = expected[5, 4] = True
checks.close(document_mask(many)[0, 0], expected, what=f"the mask of {many.tolist()}")
with contextlib.suppress(NotImplementedError):  # ids that are read one by one have no meta device
    assert document_mask(torch.zeros(2, 3, dtype=torch.long, device="meta")).is_meta, (
        "the mask must be made on the device of ids"
    )
# The law: in a packed row, attention gives what it gives to each document alone.
lengths = (3, 1, 5)
ids = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)] + [PAD] * 2)[None]
q, k, v = (torch.randn(1, 2, 11, 4, generator=g, dtype=torch.float64) for _ in range(3))
packed = F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask(ids))
start = 0
for n in lengths:
    part = slice(start, start + n)
    alone = F.scaled_dot_product_attention(*(t[:, :, part] for t in (q, k, v)), is_causal=True)
    checks.close(
        packed[:, :, part], alone, what=f"attention over a document of {n} in a packed row"
    )
    start += n
checks.close(packed[:, :, start:], v[:, :, start:], what="attention of padding, which sees itself")
### END HIDDEN TESTS


# %% exercise="packed_inputs" minutes=10 difficulty=2
def packed_inputs(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and labels of packed rows, both (batch, seq) int64.

    tokens, ids: (batch, seq), int64; ids as in document_mask.
    positions: 0, 1, 2 … within each document, 0 for padding.
    labels: the next token of the same document; IGNORE (−100) for the last token of each document
        and for padding.
    """
    ### BEGIN SOLUTION
    batch, seq = ids.shape
    place = torch.arange(seq, device=ids.device).expand(batch, seq)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(begins, place, 0).cummax(dim=1).values
    positions = (place - start).masked_fill(ids == PAD, 0)
    labels = torch.full_like(tokens, IGNORE)
    goes_on = ~begins[:, 1:] & (ids[:, 1:] != PAD)
    labels[:, :-1] = torch.where(goes_on, tokens[:, 1:], IGNORE)
    return positions, labels
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: restarting the count</summary>
#
# A document begins where the id differs from the one before. Write each beginning's place there
# and 0 elsewhere; the running maximum (`cummax`) is the beginning of every token's document, and
# the position is the difference.
# </details>

# %% check="packed_inputs" points=2
tokens = torch.tensor([[11, 12, 13, 21, 22, 0], [31, 32, 33, 34, 35, 36]])
ids = torch.tensor([[7, 7, 7, 3, 3, PAD], [0, 0, 0, 0, 0, 0]])
tokens, ids = tokens.to(profile.device), ids.to(profile.device)
positions, labels = checks.parts(packed_inputs(tokens, ids), "positions", "labels")
checks.close(
    positions,
    torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
    what="the positions of two rows",
    dtype=torch.int64,
)
checks.close(
    labels,
    torch.tensor([[12, 13, -100, 22, -100, -100], [32, 33, 34, 35, 36, -100]]),
    what="the labels of two rows",
    dtype=torch.int64,
    mistakes={
        "labels that cross the border between documents": torch.tensor(
            [[12, 13, 21, 22, -100, -100], [32, 33, 34, 35, 36, -100]]
        ),
        "labels that are not shifted": torch.tensor(
            [[11, 12, 13, 21, 22, -100], [31, 32, 33, 34, 35, 36]]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(14)
for batch, seq in [(1, 1), (1, 2), (4, 12), (3, 33)]:
    ids = torch.full((batch, seq), PAD)
    tokens = torch.randint(0, 50, (batch, seq), generator=g)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for b in range(batch):
        names, end = torch.randperm(seq + 5, generator=g).tolist(), 0
        while end < seq and draw(0, 8, g):
            start, end = end, min(end + draw(1, seq // 2 + 2, g), seq)
            ids[b, start:end] = names.pop()
            positions[b, start:end] = torch.arange(end - start)
            labels[b, start : end - 1] = tokens[b, start + 1 : end]
    tokens, ids = tokens.to(profile.device), ids.to(profile.device)
    with checks.unchanged(tokens=tokens, ids=ids):
        got = checks.parts(packed_inputs(tokens, ids), "positions", "labels")
    checks.close(got[0], positions, what=f"the positions for {ids.tolist()}", dtype=torch.int64)
    checks.close(got[1], labels, what=f"the labels for {ids.tolist()}", dtype=torch.int64)
alike = torch.full((2, 2), 5, device=profile.device)  # both rows are one document, of the same id
got = checks.parts(packed_inputs(alike + 1, alike), "positions", "labels")
checks.close(got[0], torch.tensor([[0, 1], [0, 1]]), what="the positions of rows of one id")
checks.close(got[1], torch.tensor([[6, IGNORE], [6, IGNORE]]), what="the labels of rows of one id")
with contextlib.suppress(NotImplementedError):  # as above
    meta = packed_inputs(*torch.zeros(2, 2, 3, dtype=torch.long, device="meta"))
    assert all(part.is_meta for part in meta), "both results must be on the device of ids"
### END HIDDEN TESTS

# %% [markdown]
# How much is wasted, and how much is cut, on real documents? The functions of Python's standard
# library, each a document, in tokens of the course's tokenizer; rows of 512.

# %% tags=["experiment", "figure"]
# Figure: three ways to fill rows of 512 tokens
functions = [
    part
    for name, text in list(data.source_code().items())[:60]
    for part in re.split(r"\n(?=(?:def|class|async def) )", text)
]
sizes = [len(ids) for ids in tokenizer.encode_batch(functions) if ids]
CAPACITY = 512
pieces = [min(CAPACITY, n - cut) for n in sizes for cut in range(0, n, CAPACITY)]
packed = pack_sequences(pieces, CAPACITY)
ends = np.cumsum(sizes)
crossing = sum(
    (end - n) // CAPACITY != (end - 1) // CAPACITY for end, n in zip(ends, sizes, strict=True)
)
rows_of = {
    "pad each": (len(pieces), sum(n > CAPACITY for n in sizes)),
    "concatenate\nand cut": (math.ceil(sum(sizes) / CAPACITY), crossing),
    "best-fit\ndecreasing": (len(packed), sum(n > CAPACITY for n in sizes)),
}
fig, axes = plot.plt.subplots(1, 3, figsize=(12, 3.4))
axes[0].hist(pieces, bins=np.arange(1, 514, 32), color=plot.COLORS[0])
axes[0].set(xlabel="tokens", ylabel="documents (after cutting long ones)", title="lengths")
for ax, title, values in (
    (
        axes[1],
        "share of the rows that is padding",
        [1 - sum(sizes) / (n * CAPACITY) for n, _ in rows_of.values()],
    ),
    (
        axes[2],
        "share of the documents that is cut",
        [cut / len(sizes) for _, cut in rows_of.values()],
    ),
):
    bars = ax.bar(list(rows_of), [100 * value for value in values], color=plot.COLORS[:3])
    ax.bar_label(bars, fmt="%.1f %%", fontsize=9)
    ax.set(ylabel="percent", title=title)
    ax.grid(axis="x", visible=False)
plot.caption(
    fig,
    f"{len(sizes):,} functions and classes, {sum(sizes):,} tokens. Packing cuts only what is "
    f"longer than a row and wastes next to nothing.",
)
plot.plt.show()

# %% tags=["experiment", "figure"]
# Figure: the mask of one packed row
example = torch.tensor([[0] * 7 + [1] * 3 + [2] * 9 + [PAD] * 3])
positions, labels = packed_inputs(torch.arange(22)[None], example)
fig, axes = plot.plt.subplots(1, 2, figsize=(9.5, 3.9), width_ratios=(1, 1.25))
axes[0].imshow(document_mask(example)[0, 0], cmap="Greys", vmin=0, vmax=1.4)
axes[0].set(xlabel="key", ylabel="query", title="who sees whom", xticks=[0, 7, 10, 19])
axes[0].set_yticks([0, 7, 10, 19])
axes[0].grid(False)
without = (labels[0] == IGNORE).nonzero()[:, 0]
axes[1].plot(range(22), positions[0], "o-", markersize=4, label="position")
axes[1].plot(
    without,
    positions[0, without],
    "s",
    color=plot.COLORS[1],
    linestyle="none",
    markersize=9,
    markerfacecolor="none",
    label="no label",
)
axes[1].set(xlabel="token", ylabel="position in its document", title="positions restart")
axes[1].legend(fontsize=8)
plot.caption(
    fig, "Documents of 7, 3 and 9 tokens and three of padding. Dark: what attention may see."
)
plot.plt.show()

# %% [markdown]
# **Does the mask matter?** For cost it does: a row of 4,096 tokens with documents of 512 needs an
# eighth of the attention, if the kernel can skip what is masked. For quality, results
# differ: Zhao et al. (2024) found a clear gain, Llama 3's authors little in ordinary pretraining
# and much in training on very long sequences. (A dense mask, as in exercise 12, keeps SDPA from its
# fast kernels; FlexAttention and FlashAttention's form for rows of several documents skip what is
# masked.) Our own measurement: how well does the
# course's `tiny` predict a source file alone (as behind a mask), and how well after another file in
# the same row? Predict the sign of the difference (loss after a stranger minus loss alone).

# %% tags=["experiment"]
tiny, _ = models.load("tiny")
held_out = list(data.split(data.deduplicate(data.source_code()))[1].values())
encoded = [ids[:256] for ids in tokenizer.encode_batch(held_out) if len(ids) >= 256][:24]
texts = torch.tensor(encoded)
with torch.inference_mode():
    eos = torch.full((len(texts), 1), tokenizer.eos)
    alone = tiny(torch.cat([eos, texts], 1))
    after = tiny(torch.cat([eos, texts.roll(1, 0), eos, texts], 1))[:, -257:]
    nats = [
        F.cross_entropy(logits[:, :-1].transpose(1, 2), texts, reduction="none").double()
        for logits in (alone, after)
    ]
difference = (nats[1] - nats[0]).mean(1)
error = difference.std() / len(difference) ** 0.5
print(f"alone {nats[0].mean():.3f} nats per token, after a stranger {nats[1].mean():.3f}")
print(f"difference {difference.mean():+.3f}, standard error {error:.3f}, {len(texts)} documents")

# %% [markdown]
# A stranger in the row does not hurt here: the loss is *lower* after it. Both are files of the same
# library, and the first tells what kind of text this is, in what style, with which names. That is
# what a mask takes away. (`tiny` was also trained on rows without masks.) So for this model
# and these files the stranger does no harm; whether *training* with a mask helps, this does not
# test. The mask pays in arithmetic, and where many short documents share a very long row.

# %% [markdown]
# ## Mixing sources {#mixing}
#
# A corpus has sources of very different sizes: a crawl, code, papers, an encyclopedia. Sampled in
# proportion to their sizes, the small good ones drown; sampled equally, they are read over and
# over. The dial between the two is a **temperature** $T$: $p_i\propto n_i^{1/T}$. $T=1$ is
# proportional, $T\to\infty$ is uniform. (It came from multilingual models, whose languages have
# the same problem.)
#
# How much is it worth to read something twice? Muennighoff et al. (2023) fitted it: $U$ unique
# tokens read for $E$ epochs, with $R=E-1$ repetitions, are worth as much as
#
# $$ D' = U\Bigl(1+R^*\bigl(1-e^{-R/R^*}\bigr)\Bigr),\qquad R^*\approx 15.4 $$
#
# fresh tokens. Up to four epochs repetition is nearly as good as new text; after some tens it adds
# next to nothing. However long one reads, $U$ tokens are never worth more than $(1+R^*)\,U$.


# %% exercise="mixture_weights" minutes=10 difficulty=1 path="more"
def mixture_weights(sizes: Sequence[float], temperature: float) -> Tensor:
    """The probability of each source: float64 (sources,), proportional to size^(1/temperature).

    sizes: ≥ 0, up to 1e300, at least one of them positive; a source of size 0 has probability 0,
    at every temperature. temperature: positive; math.inf makes all sources with something in them
    equally likely. Another temperature raises ValueError. Right also where size^(1/temperature)
    is beyond float64.
    """
    ### BEGIN SOLUTION
    if not temperature > 0:
        raise ValueError(f"a temperature is positive, not {temperature}")
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    scaled = (logs - logs.max()) / temperature  # the largest is 0; −inf for empty sources
    return scaled.masked_fill(logs == -math.inf, -math.inf).softmax(0)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: beyond float64</summary>
#
# $n^{1/T}=e^{\log n/T}$, and a softmax subtracts the largest before it takes the exponential. For a
# tiny $T$ that is too late, for $\log n/T$ itself is infinite: subtract before you divide.
# </details>
#
# <details><summary>Hint: empty sources at infinite temperature</summary>
#
# $-\infty/\infty$ is NaN. Put the $-\infty$ back after the division.
# </details>

# %% check="mixture_weights" points=1
got = mixture_weights([900, 100], 2)
checks.close(
    got,
    torch.tensor([0.75, 0.25], dtype=torch.float64),
    what="the weights of 900 and 100 at temperature 2",
    dtype=torch.float64,
    mistakes={
        "size^T": torch.tensor([81 / 82, 1 / 82], dtype=torch.float64),
        "T = 1": torch.tensor([0.9, 0.1], dtype=torch.float64),
        "a softmax of size/T": torch.tensor([1.0, 0.0], dtype=torch.float64),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(15)
for count, temperature in [(1, 3.0), (2, 1.0), (5, 0.7), (4, 3.3), (6, math.inf), (3, 1e-3)]:
    sizes = (torch.rand(count, generator=g, dtype=torch.float64) * 50 - 5).exp()
    sizes[-1] = 0.0 if count > 2 else sizes[-1]
    power = 0.0 if temperature == math.inf else 1 / temperature
    # ratios to the largest, in which nothing overflows
    ratios = torch.stack([(s / sizes.max()) ** power if s > 0 else s for s in sizes])
    checks.close(
        mixture_weights(sizes.tolist(), temperature),
        ratios / ratios.sum(),
        what=f"the weights of {count} sources at temperature {temperature}",
        dtype=torch.float64,
        rtol=1e-9,
        atol=1e-300,
    )
checks.close(
    mixture_weights([3e300, 1e300, 0], 0.5),
    torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64),
    what="the weights of sources whose squares are beyond float64",
)
checks.close(
    mixture_weights([1, 1, 0.5, 1], 1e-3),
    torch.tensor([1 / 3, 1 / 3, 0.0, 1 / 3], dtype=torch.float64),
    what="the weights of 1, 1, 0.5 and 1 at temperature 0.001",
)
checks.close(
    mixture_weights([1e300, 1e299, 1e300], 1e-307),
    torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64),
    what="the weights at a temperature of 1e-307, where log(size) / T is beyond float64",
)
for wrong in (0.0, -1.0, math.nan):
    checks.raises(ValueError, mixture_weights, [1, 2], wrong, because=f"temperature {wrong}")
### END HIDDEN TESTS


# %% exercise="effective_tokens" minutes=5 difficulty=1 path="more"
def effective_tokens(unique: float, epochs: float, decay: float = 15.4) -> float:
    """How many fresh tokens it is worth to read `unique` tokens for so many epochs: D′ above, with
    `decay` for R*.

    epochs ≥ 0, whole or not. Below one epoch not everything is read: unique · epochs.
    """
    ### BEGIN SOLUTION
    if epochs <= 1:
        return unique * epochs
    return unique * (1 - decay * math.expm1((1 - epochs) / decay))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: repetitions, not epochs</summary>
#
# The first pass is no repetition: $R=E-1$. At $E=1$ the formula gives $U$.
# </details>

# %% check="effective_tokens" points=1
checks.number(
    effective_tokens(100.0, 5),
    100 * (1 + 15.4 * (1 - math.exp(-4 / 15.4))),
    to=1e-9,
    what="100 tokens read five times",
    mistakes={
        "R = epochs": 100 * (1 + 15.4 * (1 - math.exp(-5 / 15.4))),
        "counting every reading in full": 500.0,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(16)
for epochs in (0, 0.25, 1, 1.001, 4, 44.7, 1000):
    unique = 1e9 * float(torch.rand((), generator=g))
    for decay in (15.4, 3.0):
        # D′ is the integral of e^(−r/R*) over the repetitions r, plus the first pass.
        r = torch.linspace(0, max(epochs - 1, 0), 200_001, dtype=torch.float64)
        worth = float(torch.trapezoid(torch.exp(-r / decay), r))
        checks.number(
            effective_tokens(unique, epochs, decay),
            unique * (min(epochs, 1) + worth),
            to=1e-5,
            what=f"{unique:.0f} tokens, {epochs} epochs, R* = {decay}",
        )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: what mixing and repetition are worth
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.6))
sources = {"crawl": 4000.0, "code": 600.0, "papers": 120.0, "encyclopedia": 20.0}
temperatures = torch.logspace(0, 1.3, 40)
shares = torch.stack([mixture_weights(list(sources.values()), float(t)) for t in temperatures])
plot.curves(
    temperatures,
    {name: 2000 * shares[:, i] / n for i, (name, n) in enumerate(sources.items())},
    xlabel="temperature T",
    ylabel="epochs of each source",
    title="2,000 GB read from four sources",
    logx=True,
    logy=True,
    ax=axes[0],
)
axes[0].set_ylim(top=300)  # room for the legend
epochs = torch.linspace(1, 60, 100)
worth = torch.tensor([effective_tokens(1.0, float(e)) for e in epochs])
axes[1].plot(epochs, epochs, color="#999999", linestyle="--", label="if every reading counted")
axes[1].plot(epochs, worth, color=plot.COLORS[0], label="fresh tokens that it is worth")
axes[1].axhline(16.4, color=plot.COLORS[1], linestyle=":", label="the most it can be worth")
axes[1].set(xlabel="epochs", ylabel="in units of the unique tokens", ylim=(0, 32))
axes[1].set_title("repeated data")
axes[1].legend(fontsize=8)
plot.caption(
    fig,
    "Left: the crawl is never read through once; the encyclopedia (20 GB) is, many times, as soon "
    "as T is well above 1. Right: so its readings lose their worth.",
)
plot.plt.show()

# %% [markdown]
# ## The loader {#loading}
#
# A run of weeks is interrupted: a machine fails, a job ends, the number of machines changes. After
# it, training must go on with *the batch that would have come next*. Otherwise some text is read
# twice and some never, a loss curve cannot be reproduced, and a spike at step 81,230 cannot be
# looked into.
#
# The trick is to keep almost no state. If the order of an epoch is computed from (seed, epoch)
# alone, a whole loader is three numbers: **seed, epoch, index of the next batch**. No file
# position, no generator's state, no list of what was seen.
#
# **Ranks.** Every rank computes the same order and takes its own part of each batch. What is
# counted in the state is *global* batches, so a run can be resumed on another number of ranks: the
# batches stay, they are divided otherwise.
#
# Two traps. A seed made as `seed + epoch` gives run 0 in its epoch 1 the order of run 1 in its
# epoch 0: runs that should be independent read the same. And a loader whose workers fetch ahead
# must save the index of what the model *has had*, not of what is waiting in the queue.


# %% exercise="resumable_loader" minutes=20 difficulty=3
class ResumableLoader:
    """An endless iterator over batches of items, in an order that the seed decides.

    Epoch e = 0, 1, 2 … goes through the items in a random order that depends on (seed, e) and the
    number of items alone: another epoch has another order, and so has another seed, also where
    seed + epoch is the same. Its batches are consecutive parts of `batch` items of that order; what
    is left over at its end is dropped. The loader of rank r gives the r-th of `ranks` equal
    consecutive parts of every batch, a list. The loader neither uses nor changes the random numbers
    of Python, NumPy or PyTorch that everybody shares.

    Raises ValueError where `ranks` does not divide `batch`, where rank is not from 0 to ranks − 1,
    and where the items do not fill one batch.
    """

    def __init__(self, items: Sequence, batch: int, seed: int = 0, rank: int = 0, ranks: int = 1):
        ### BEGIN SOLUTION
        if batch % ranks:
            raise ValueError(f"a batch of {batch} cannot be divided among {ranks} ranks")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        if len(items) < batch:
            raise ValueError(f"{len(items)} items do not fill a batch of {batch}")
        self.items, self.batch, self.seed = items, batch, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = self.index = 0
        self.shuffled = (-1, -1, None)  # seed, epoch and order of the epoch that is held
        ### END SOLUTION

    def __iter__(self) -> "ResumableLoader":
        return self

    def __next__(self) -> list:
        """This rank's part of the next batch: batch / ranks items."""
        ### BEGIN SOLUTION
        if self.index == len(self.items) // self.batch:
            self.epoch, self.index = self.epoch + 1, 0
        if self.shuffled[:2] != (self.seed, self.epoch):
            rng = np.random.default_rng([self.seed, self.epoch])
            self.shuffled = self.seed, self.epoch, rng.permutation(len(self.items)).tolist()
        size = self.batch // self.ranks
        start = self.index * self.batch + self.rank * size
        self.index += 1
        return [self.items[i] for i in self.shuffled[2][start : start + size]]
        ### END SOLUTION

    def state_dict(self) -> dict[str, int]:
        """{"seed", "epoch", "index"}: index is the number of batches of this epoch that were given.
        After an epoch's last batch that is all of them, or already none of the next epoch.
        The dictionary does not change when the loader goes on, and is the same on every rank."""
        ### BEGIN SOLUTION
        return {"seed": self.seed, "epoch": self.epoch, "index": self.index}
        ### END SOLUTION

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the loader that gave this state would have: with its seed too, and on
        whatever number of ranks this loader has."""
        ### BEGIN SOLUTION
        self.seed, self.epoch, self.index = (state[key] for key in ("seed", "epoch", "index"))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a generator of one's own</summary>
#
# `np.random.default_rng([seed, epoch])` takes a list of numbers and mixes all of them.
# `torch.Generator().manual_seed(…)` takes one: combine seed and epoch by a hash, not by a sum.
# </details>
#
# <details><summary>Hint: the end of an epoch</summary>
#
# There are `len(items) // batch` batches in an epoch. Look at the *beginning* of `__next__` whether
# the epoch is over, so that a state that was saved after its last batch is no special case.
# </details>
#
# <details><summary>Hint: it resumes, but with the wrong order</summary>
#
# If you keep the shuffled order, ask whether it belongs to the seed and the epoch that were loaded.
# </details>

# %% check="resumable_loader" points=2
loader = ResumableLoader(list("abcdefg"), 3, seed=1)
first = [next(loader) for _ in range(2)]
assert all(isinstance(part, list) and len(part) == 3 for part in first), (
    f"each batch is a list of 3 items; yours: {first}"
)
assert len({*first[0], *first[1]}) == 6, f"within an epoch no item comes twice; yours: {first}"
state = json.loads(json.dumps(loader.state_dict()))
expected = [next(loader) for _ in range(5)]
resumed = ResumableLoader(list("abcdefg"), 3, seed=99)
resumed.load_state_dict(state)
got = [next(resumed) for _ in range(5)]
assert got == expected, (
    f"resumed after 2 batches, the next should be {expected[0]}, and yours is {got[0]}"
    if got[0] != expected[0]
    else f"resumed, the batches that follow should be {expected}, yours are {got}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(17)


def batches(loader: ResumableLoader, count: int) -> list[list]:
    return [next(loader) for _ in range(count)]


for count, batch in [(5, 5), (23, 4), (12, 1), (40, 8), (17, 6)]:
    per_epoch, seed = count // batch, draw(0, 10**6, g)
    items = [f"item {i}" for i in range(count)]
    whole = batches(ResumableLoader(items, batch, seed), 4 * per_epoch)
    again = batches(iter(ResumableLoader(tuple(items), batch, seed)), 4 * per_epoch)
    assert whole == again, "two loaders of one seed give different batches"
    assert all(type(part) is list for part in whole), "every batch is a list"
    for epoch in range(4):
        flat = joined_parts(whole[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(flat) == per_epoch * batch, f"a batch has {batch} items"
        assert len(set(flat)) == len(flat), f"epoch {epoch} gives an item twice"
        assert set(flat) <= set(items), "what comes out is not what went in"
    for done in {0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch, draw(0, 9, g)}:
        loader = ResumableLoader(items, batch, seed)
        batches(loader, done)
        state = loader.state_dict()
        assert set(state) == {"seed", "epoch", "index"}, (
            f"the state has the keys seed, epoch and index; yours: {sorted(map(str, state))}"
        )
        for key, value in state.items():
            checks.kind(value, int, what=f"the state's {key}")
        assert state["epoch"] * per_epoch + state["index"] == done, (
            f"after {done} batches of {per_epoch} an epoch, yours is {state}"
        )
        kept = dict(state)
        following = batches(loader, per_epoch + 3)
        assert state == kept, "a state that was taken changes when the loader goes on"
        for other in (ResumableLoader(items, batch, seed + 1), loader):  # new, and far ahead
            batches(other, draw(0, 4, g))
            other.load_state_dict(json.loads(json.dumps(state)))
            got = batches(other, per_epoch + 3)
            at = next((i for i, b in enumerate(got) if b != following[i]), None)
            assert at is None, (
                f"resumed after {done} batches ({per_epoch} an epoch): batch {at} from there is "
                f"{got[at]}, without the interruption it is {following[at]}"
            )
### END HIDDEN TESTS

# %% check="resumable_loader" points=2
items = list(range(60))
parts = [ResumableLoader(items, 12, 5, rank, 3) for rank in range(3)]
whole = ResumableLoader(items, 12, 5)
for _ in range(7):
    expected, got = next(whole), [next(part) for part in parts]
    assert all(len(part) == 4 for part in got), "each of 3 ranks gets 4 of a batch's 12 items"
    assert joined_parts(got) == expected, (
        f"the ranks' parts, one after the other, are the batch {expected}; yours: {got}"
    )
### BEGIN HIDDEN TESTS
states = [part.state_dict() for part in parts]
assert states == [whole.state_dict()] * 3, f"the state is the same on every rank; yours: {states}"
for ranks in (1, 2, 4, 6, 12):
    fewer = [ResumableLoader(items, 12, 0, rank, ranks) for rank in range(ranks)]
    for part in fewer:
        part.load_state_dict(states[0])
    reference = ResumableLoader(items, 12, 5)
    for _ in range(7):
        next(reference)
    for _ in range(6):
        expected = next(reference)
        got = joined_parts(next(part) for part in fewer)
        assert got == expected, f"a run on 3 ranks resumed on {ranks}: {expected}, yours {got}"
for arguments in ((items, 12, 0, 0, 5), (items, 61), (items, 12, 0, 3, 3), (items, 12, 0, -1, 3)):
    checks.raises(
        ValueError,
        ResumableLoader,
        *arguments,
        because=f"{len(items)} items, (batch, seed, rank, ranks) = {arguments[1:]}",
    )
### END HIDDEN TESTS

# %% check="resumable_loader" points=1
orders = {}
for seed, epoch in ((3, 0), (3, 1), (4, 0)):
    loader = ResumableLoader(range(40), 10)
    loader.load_state_dict({"seed": seed, "epoch": epoch, "index": 0})
    orders[seed, epoch] = joined_parts(next(loader) for _ in range(4))
assert orders[3, 0] != orders[3, 1], "each epoch has an order of its own; yours repeats the first"
assert orders[3, 0] != orders[4, 0], "another seed, another order; yours ignores the seed"
### BEGIN HIDDEN TESTS
assert orders[3, 1] != orders[4, 0], (
    "seed 3 in its epoch 1 reads what seed 4 reads in its epoch 0: is the order made from seed + "
    "epoch?"
)
for one, other in (((1, 11), (11, 1)), ((12, 3), (1, 23)), ((0, 5), (5, 0))):
    firsts = []
    for seed, epoch in (one, other):
        loader = ResumableLoader(range(40), 40)
        loader.load_state_dict({"seed": seed, "epoch": epoch, "index": 0})
        firsts.append(next(loader))
    assert firsts[0] != firsts[1], f"(seed, epoch) = {one} and {other} have the same order"
# Orders of many seeds and epochs: all different, not sorted, not one order turned or stepped.
g = checks.generator(18)
base, seen = draw(0, 10**6, g), []
for seed in range(base, base + 12):
    loader = ResumableLoader(range(40), 20, seed)
    seen += [next(loader) + next(loader) for _ in range(6)]
assert len({tuple(order) for order in seen}) == len(seen), (
    "of 72 orders (12 seeds, 6 epochs each) some are the same"
)
steps = {tuple(sorted((b - a) % 40 for a, b in pairwise(order))) for order in seen}
assert len(steps) > 60, "the orders are one order, begun elsewhere: shuffle"
firsts = torch.tensor([order[0] for order in seen], dtype=torch.float64)
checks.close(firsts.mean(), torch.tensor(19.5), what="the mean first item", rtol=0, atol=9.0)
before = shared_generators()
loader = ResumableLoader(range(40), 10, 1)
one = [next(loader) for _ in range(9)]
assert before == shared_generators(), (
    "the loader draws from (or seeds) a generator that everybody shares"
)
seed_shared_generators(draw(0, 10**6, g))
loader = ResumableLoader(range(40), 10, 1)
assert [next(loader) for _ in range(9)] == one, "the order depends on more than seed and epoch"
### END HIDDEN TESTS

# %% [markdown]
# The same in real processes. Four ranks read, and after five batches the run ends; two new ranks go
# on from its state. The ranks gather what each has read, so that nothing is taken on trust.


# %% tags=["experiment"]
def read_batches(rank: int, ranks: int, count: int, state: dict | None) -> tuple[list, dict]:
    """What all ranks together read in each of `count` batches, and the loader's state after it."""
    loader = ResumableLoader(range(1000), 16, seed=15, rank=rank, ranks=ranks)
    if state is not None:
        loader.load_state_dict(state)
    read = []
    for _ in range(count):
        parts = [torch.empty(16 // ranks, dtype=torch.long) for _ in range(ranks)]
        torch.distributed.all_gather(parts, torch.tensor(next(loader)))
        read.append(torch.cat(parts).tolist())
    return read, loader.state_dict()


before, state = distributed.launch(read_batches, 4, 4, 5, None)[0]
after, _ = distributed.launch(read_batches, 2, 2, 5, state)[0]
alone = ResumableLoader(range(1000), 16, seed=15)
print("state after 5 batches on 4 ranks:", state)
print(
    "the 10 batches are those of one process:", before + after == [next(alone) for _ in range(10)]
)

# %% [markdown]
# ## The pipeline, on a crawl {#pipeline}
#
# Now everything in a row, on a small crawl whose truth is known. The pages are Python's
# documentation. Around them stands what stands around pages on the web: mirrors with another header
# and a few changed words, menus, teasers, keyword lists, tables of numbers, and forum pages that
# quote the exam. The exam consists of paragraphs of held-out documents; **half of them leak**, the
# other half never does.
#
# Before you run it, write down: which stage removes which kind? Which kind survives? And a language
# model that is trained on the text of each stage: how will its loss on the *clean* half of the
# held-out text change from stage to stage, and how on the *leaked* half?


# %% tags=["experiment"]
def make_crawl(pages: dict[str, str], leaks: list[str], seed: int) -> dict[str, tuple[str, str]]:
    """{name: (kind, text)}: the pages, and what surrounds them."""
    rng = random.Random(seed)
    vocabulary = words_of(" ".join(pages.values()))
    crawl = {f"page/{name}": ("page", text) for name, text in pages.items()}

    def mirrored(text: str) -> str:
        words = re.split(r"(\s+)", text)
        for _ in range(len(words) // 200):
            words[2 * rng.randrange((len(words) + 1) // 2)] = rng.choice(vocabulary)
        site = " ".join(rng.choices(vocabulary, k=6))
        return f"{site} | home | login\n\n{''.join(words)}\n\nCopyright {site}"

    for name, text in pages.items():
        for i in range(min(int(rng.expovariate(0.7)), 5)):
            crawl[f"mirror/{name}/{i}"] = ("mirror", mirrored(text))
    firsts = [" ".join(text.split()[:12]) for text in pages.values()]
    for i in range(30):
        menu = "\n".join(f"- {' '.join(rng.choices(vocabulary, k=2))}" for _ in range(150))
        teaser = "\n".join(f"{rng.choice(firsts)} ..." for _ in range(25))
        phrase = " ".join(rng.choices(vocabulary, k=4))
        keywords = " ".join(
            rng.choice((phrase, "buy the best " + phrase, "and " + rng.choice(vocabulary)))
            for _ in range(80)
        )
        dump = "\n".join(
            f"{rng.getrandbits(32):08x} {rng.random():.6f} {rng.randrange(10**6)}"
            for _ in range(120)
        )
        for kind, text in (
            ("menu", menu),
            ("teaser", teaser),
            ("keywords", keywords),
            ("numbers", dump),
        ):
            crawl[f"{kind}/{i}"] = (kind, text)
    for i in range(0, len(leaks), 4):
        quoted = "\n\n".join(leaks[i : i + 4])
        chatter = " ".join(rng.choices(vocabulary, k=30))
        crawl[f"forum/{i}"] = ("forum", f"I have to answer this: {quoted}\n\nthe {chatter} of that")
    names = list(crawl)
    rng.shuffle(names)
    return {name: crawl[name] for name in names}


train_pages, exam_pages = data.split(data.deduplicate(data.documentation()), held_out=0.15)
train_pages = data.scrub(train_pages, exam_pages)
exam = {
    f"{name}/{i}": part
    for name, text in exam_pages.items()
    for i, part in enumerate(text.split("\n\n"))
    if len(words_of(part)) >= 20
}
train_pages, _ = decontaminate(train_pages, exam)  # so that only what is planted below can leak
leaked_items = {name: text for i, (name, text) in enumerate(exam.items()) if i % 2}
clean_items = {name: text for name, text in exam.items() if name not in leaked_items}
quotes = list(leaked_items.values()) * 8  # each is quoted on eight pages
random.Random(15).shuffle(quotes)
crawl = make_crawl(train_pages, quotes, seed=15)
kind_of = {name: kind for name, (kind, _) in crawl.items()}
raw = {name: text for name, (_, text) in crawl.items()}

stages = {"crawl": raw}
# Without exercise 3, leave the second stage out: stages["repetition"] = stages["rules"].
stages["rules"] = {name: text for name, text in raw.items() if keep(quality_signals(text))}
stages["repetition"] = {
    name: text
    for name, text in stages["rules"].items()
    if keep(repetition_signals(text), REPETITION_LIMITS)
}
stages["deduplicated"] = deduplicate(stages["repetition"])
filtered, found = decontaminate(stages["deduplicated"], exam)
stages["decontaminated"] = filtered
print(f"{len(found)} exam items found, {len(leaked_items)} had leaked")

# %% tags=["experiment", "figure"]
# Figure: the funnel
kinds = ["page", "mirror", "forum", "menu", "teaser", "keywords", "numbers"]
hatches = ["", "//", "xx", "..", "\\\\", "--", "++"]
fig, ax = plot.plt.subplots(figsize=(10, 3.8))
left = np.zeros(len(stages))
for kind, hatch, color in zip(kinds, hatches, plot.COLORS, strict=True):
    counts = [sum(kind_of[name] == kind for name in kept) for kept in stages.values()]
    bars = ax.barh(
        list(stages), counts, left=left, label=kind, color=color, hatch=hatch, edgecolor="white"
    )
    ax.bar_label(
        bars,
        [str(n) if n > 4 else "" for n in counts],
        label_type="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    left += counts
for stage, total in zip(stages, left, strict=True):
    characters = sum(map(len, stages[stage].values()))
    ax.text(
        total + 4,
        stage,
        f"{total:.0f} documents, {characters / 1e6:.2f} MB",
        va="center",
        fontsize=9,
    )
ax.set(xlabel="documents left", xlim=(0, left.max() * 1.25 + 60))
ax.invert_yaxis()
ax.legend(ncol=7, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
ax.set_title("what is left after each stage")
plot.caption(
    fig, "Kinds are known because the crawl was made for this; on a real one they are not."
)
plot.plt.show()


# %% [markdown]
# What is the text worth, stage by stage? The judge is a model that learns in one pass: it counts
# which token follows each context of 3, 2, 1 and 0 tokens, and interpolates (Witten and
# Bell's way: the more different followers a context has had, the more is left to shorter contexts).
# We train one such model per stage and measure bits per byte on both halves of the exam. No stage
# knows to which half an item belongs.


# %% tags=["experiment"]
class CountModel:
    """An interpolated n-gram model over tokens, from contexts of 0 to `order` − 1 tokens."""

    def __init__(self, documents: dict[str, str], order: int = 4):
        self.grams = [Counter() for _ in range(order)]
        for ids in tokenizer.encode_batch(list(documents.values())):
            ids = [tokenizer.eos, *ids]
            for n, grams in enumerate(self.grams):
                grams.update(zip(*(ids[i:] for i in range(n + 1)), strict=False))
        self.total, self.kinds = Counter(), Counter()  # of each context: followers, different ones
        for grams in self.grams:
            for gram, count in grams.items():
                self.total[gram[:-1]] += count
                self.kinds[gram[:-1]] += 1

    def bits_per_byte(self, text: str) -> float:
        ids, bits = (tokenizer.eos, *tokenizer.encode(text)), 0.0
        for i in range(1, len(ids)):
            p = 1 / tokenizer.vocab_size
            for n, grams in enumerate(self.grams[: i + 1]):
                context = ids[i - n : i]
                if self.total[context]:
                    unseen = self.kinds[context]
                    p = (grams[*context, ids[i]] + unseen * p) / (self.total[context] + unseen)
            bits -= math.log2(p)
        return bits / len(text.encode())


halves = {"the half that never leaked": clean_items, "the half that leaked": leaked_items}
scores = {half: [] for half in halves}
for documents in stages.values():
    counted = CountModel(documents)
    for half, items in halves.items():
        scores[half].append([counted.bits_per_byte(text) for text in items.values()])
scores = {half: np.array(values) for half, values in scores.items()}  # (stages, items)

# %% tags=["experiment", "figure"]
# Figure: bits per byte on held-out text, stage by stage
fig, ax = plot.plt.subplots(figsize=(9, 3.8))
for i, (half, values) in enumerate(scores.items()):
    ax.errorbar(
        np.arange(len(stages)) + 0.06 * i,
        values.mean(1),
        2 * values.std(1) / values.shape[1] ** 0.5,
        label=half,
        color=plot.COLORS[i],
        linestyle=plot.DASHES[i],
        marker="os"[i],
        capsize=3,
    )
    for stage, mean in enumerate(values.mean(1)):
        ax.annotate(
            f"{mean:.2f}",
            (stage, mean),
            xytext=(8, -14 if i == 0 else 6),
            textcoords="offset points",
            fontsize=9,
        )
ax.set_xticks(range(len(stages)), list(stages))
ax.set(ylabel="bits per byte, less is better", ylim=(0, None))
ax.legend(loc="center")
ax.set_title("what the text of each stage teaches")
plot.caption(
    fig,
    f"{len(clean_items)} and {len(leaked_items)} paragraphs; bars are two standard errors of the "
    f"mean over paragraphs. Before decontamination the two halves differ by nothing but the leak.",
)
plot.plt.show()

# %% [markdown]
# **What came out**, with two seeds of the crawl (the last digits differ). *The rules* take menus,
# teasers and tables of numbers, all of them; keyword lists pass (their words are ordinary) and fall
# to the *repetition* filter. Both also drop a few real pages: those of fewer than 50 words, and
# reference pages that say nearly the same of one method after another. *Deduplication* halves pages
# and mirrors; about half of the survivors are mirrors, for a mirror with its header is longer than
# its page. Most forum pages pass everything, being ordinary English, until *decontamination*. It
# finds one item more than had leaked: a paragraph of the clean half has 14 words in a row in common
# with its neighbor, which leaked.
#
# *The leaked half* is the lesson's warning. Until the last stage the model seems to know these
# paragraphs almost by heart: 0.2 bits per byte, where text that it has not seen costs more than
# 2. No filter for quality would ever have removed them.
#
# *The clean half* gains a little from the rules (0.06 to 0.07 bits per byte), nothing from the
# repetition filter, and most from deduplication (0.10 to 0.13), from less than two thirds of the
# text. Part of this belongs to the judge: copies raise its counts, but not the number of different
# followers. Then it *loses* 0.15 by decontamination: the forum quoted neighbors of these
# paragraphs, from the same documents, and neighbors teach. "Clean" is a matter of degree, and so is
# every number that one reports for a benchmark.
#
# Why counts, and no small Transformer? We tried: 120 steps of a model with 96 channels on the raw
# and on the filtered crawl gave 3.02 and 3.03 bits per byte on the clean half, 3.05 and 3.08 on the
# leaked one. After a quarter of an epoch it has hardly begun to learn, and nothing shows. Real
# ablations of data take models of about two billion parameters and tens of billions of tokens
# (FineWeb's choice), for the same reason.

# %% [markdown]
# And the last step, from the documents that are left to a batch: cut, packed, masked, loaded.


# %% tags=["experiment"]
def rows_from(documents: dict[str, str], capacity: int) -> tuple[Tensor, Tensor]:
    """Tokens and document ids of packed rows, both (rows, capacity)."""
    pieces = []
    for ids in tokenizer.encode_batch(list(documents.values())):
        ids = [tokenizer.eos, *ids, tokenizer.eos]
        pieces += [ids[cut : cut + capacity] for cut in range(0, len(ids), capacity)]
    rows = pack_sequences([len(piece) for piece in pieces], capacity)
    tokens = torch.full((len(rows), capacity), tokenizer.pad)
    ids = torch.full_like(tokens, PAD)
    for r, row in enumerate(rows):
        end = 0
        for number, i in enumerate(row):
            start, end = end, end + len(pieces[i])
            tokens[r, start:end] = torch.tensor(pieces[i])
            ids[r, start:end] = number
    return tokens, ids


tokens, ids = rows_from(filtered, capacity=512)
loader = ResumableLoader(range(len(tokens)), batch=8, seed=15)
part = next(loader)
positions, labels = packed_inputs(tokens[part], ids[part])
print(f"{len(tokens)} rows of 512, {(ids != PAD).float().mean():.1%} of them text")
print(f"a batch: tokens {tuple(tokens[part].shape)}, mask {tuple(document_mask(ids[part]).shape)}")
print(f"labels that count: {(labels != IGNORE).float().mean():.1%}; state: {loader.state_dict()}")

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each.


# %% exercise="questions" minutes=10 difficulty=2 kind="questions"
def questions() -> dict[str, float | int | str]:
    """Short answers; numbers to 1 percent, whole numbers exactly.

    "threshold": 128 hashes in 16 bands. Near which Jaccard similarity does the S-curve rise, by
                 the rule (1/b)^(1/r)?
    "hashes":    the smallest number of hashes with which the standard error of the estimate is at
                 most 0.02 at J = 0.5. (a whole number)
    "contained": a page of 200 shingles stands whole inside a book of 10,000 shingles. Their Jaccard
                 similarity?
    "attention": a row of 4096 tokens holds four documents of 1024. Which share of the causal mask's
                 visible pairs (a token sees itself too) is visible with a document mask?
    "mixture":   a source of 900 GB and one of 100 GB are sampled with p ∝ n^(1/2). How many times
                 as often is a token of the small source read as one of the large?
    "worth":     40 billion tokens are read from 10 billion unique ones. How many billion fresh
                 tokens is it worth, with R* = 15.4?
    "index":     1000 items, batches of 64, leftovers dropped. After 40 batches, how many batches of
                 the current epoch were given? (a whole number)
    "order":     "verify" or "join": what has to come first, after the buckets of LSH: computing
                 the true similarity of a pair, or joining its clusters?
    """
    ### BEGIN SOLUTION
    return {
        "threshold": (1 / 16) ** (1 / 8),
        "hashes": 625,
        "contained": 200 / 10_000,
        "attention": 4 * (1024 * 1025) / (4096 * 4097),
        "mixture": (30 / 900) ** -1 * (10 / 100),
        "worth": 10 * (1 + 15.4 * (1 - math.exp(-3 / 15.4))),
        "index": 40 % (1000 // 64),
        "order": "verify",
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["threshold"]
checks.kind(answer, float, what="threshold")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2**-0.5,
    to=0.01,
    what="threshold",
    hint="16 bands of 128 hashes have 8 rows each",
    mistakes={"bands and rows exchanged": (1 / 8) ** (1 / 16), "1/b": 1 / 16},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["hashes"]
checks.kind(answer, int, what="hashes")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    625,
    to=0,
    what="hashes",
    hint="J(1 − J)/k ≤ 0.02²",
    mistakes={"1/0.02²": 2500, "without the square": 13},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["contained"]
checks.kind(answer, float, what="contained")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    0.02,
    to=0.01,
    what="contained",
    hint="The union is the book",
    mistakes={"containment": 1.0, "a union of both sizes": 200 / 10_200},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["attention"]
checks.kind(answer, float, what="attention")
### BEGIN HIDDEN TESTS
visible = sum(range(1, 1025)) * 4 / sum(range(1, 4097))
checks.number(
    answer,
    visible,
    to=0.01,
    what="attention",
    hint="A document of n tokens has n(n + 1)/2 visible pairs",
    mistakes={"one document of the four": visible / 4, "what is hidden": 1 - visible},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["mixture"]
checks.kind(answer, float, what="mixture")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    3.0,
    to=0.01,
    what="mixture",
    hint="Readings of a token: probability of its source over its size",
    mistakes={"the ratio of the probabilities": 1 / 3, "the inverse of the sizes": 9.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["worth"]
checks.kind(answer, float, what="worth")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    10 + 154 * -math.expm1(-3 / 15.4),
    to=0.01,
    what="worth",
    hint="Four epochs are three repetitions",
    mistakes={
        "R = epochs": 10 + 154 * -math.expm1(-4 / 15.4),
        "every reading in full": 40.0,
    },
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["index"]
checks.kind(answer, int, what="index")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    10,
    to=0,
    what="index",
    hint="An epoch has 15 whole batches",
    mistakes={"an epoch of 16 batches": 8, "the epoch": 2},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["order"]
assert answer in ("verify", "join"), f"order is 'verify' or 'join'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert answer == "verify", (
    "A bucket says 'perhaps'. What happens to two clusters that one false candidate joins?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Should a crawl be deduplicated before or after the quality filters? What
# speaks for each?

# %% [markdown] answer="order-of-stages"
# Rules first: they read each document once, on its own, and are cheap; whatever they remove needs
# no signature. Repetition filters and classifiers cost more and can wait. Deduplication compares
# documents with each other, needs all of them in one place, and its survivor should be a good
# copy: if the filters ran later, the copy that was kept might be thrown away and the good mirror
# with it. What speaks against: classifiers that need a GPU are run after deduplication, so that
# nothing is scored twenty times. A related decision is *how far* deduplication reaches. FineWeb's
# authors deduplicated each crawl by itself and got better models than by deduplicating all of them
# together: what that left of the old crawls was worse than what it had removed.

# %% [markdown]
# **Open question 2.** Your quality classifier was trained with encyclopedia articles as positives.
# The filtered data scores well on benchmarks. What did you lose, and how would you find out?

# %% [markdown] answer="classifier-bias"
# What does not look like an encyclopedia: dialogue, dialects, fiction, forums, languages mixed in
# one page, writing by and about people that encyclopedias seldom mention. The score measures
# likeness to the positives, and benchmarks are written by people who like encyclopedias, so they
# cannot show it. Look at what is dropped, by kind and by source, not only at what is kept; measure
# bits per byte on held-out text of each kind; sample with probability by score in place of a hard
# threshold; train small models with and without the filter and compare them where it should hurt.

# %% [markdown]
# **Open question 3.** A model answers a benchmark suspiciously well, and no 13-gram of it is in the
# training data. How could it have leaked, and how would you test for it?

# %% [markdown] answer="soft-contamination"
# Translations, paraphrases, the same questions with other numbers, solutions without the question,
# synthetic data made by a model that had seen it. Tests: compare with a new version of the
# benchmark written after the data was collected; change names, numbers and the order of the choices
# and see whether the score falls; compare the likelihood of the items in their published order with
# that of shuffled orders; ask the model to continue an item from its first half. And measure soft
# overlap (embeddings, shorter n-grams) and report the score as a function of it.

# %% [markdown]
# ## References, and what to read in them
#
# - **Rae et al. 2021**, *Scaling Language Models: Methods, Analysis & Insights from Training
#   Gopher*, [arXiv:2112.11446](https://arxiv.org/abs/2112.11446). Appendix A: the rules and table
#   A1 with the limits for repetition.
# - **Broder 1997**, *On the resemblance and containment of documents*, Proceedings of Compression
#   and Complexity of Sequences. Shingles, minima, and containment beside resemblance.
# - **Broder et al. 1998**, *Min-wise Independent Permutations*, STOC. One minimum for each of $k$
#   functions.
# - **Lee et al. 2021**, *Deduplicating Training Data Makes Language Models Better*,
#   [arXiv:2107.06499](https://arxiv.org/abs/2107.06499). Suffix arrays beside MinHash, and how much
#   of the test sets stood in the training sets.
# - **Penedo et al. 2024**, *The FineWeb Datasets*,
#   [arXiv:2406.17557](https://arxiv.org/abs/2406.17557). Each decision with the ablation that it
#   was made by; section 3.4 on deduplicating each crawl by itself; FineWeb-Edu's classifier.
# - **Li et al. 2024**, *DataComp-LM*, [arXiv:2406.11794](https://arxiv.org/abs/2406.11794). Many
#   filters compared at equal compute; a linear classifier wins.
# - **Brown et al. 2020**, *Language Models are Few-Shot Learners*,
#   [arXiv:2005.14165](https://arxiv.org/abs/2005.14165). Appendix C: 13-grams, both directions.
# - **Ding et al. 2024**, *Fewer Truncations Improve Language Modeling*,
#   [arXiv:2404.10830](https://arxiv.org/abs/2404.10830). Best-fit packing in $O(N\log L)$, and what
#   cutting documents does to a model.
# - **Grattafiori et al. 2024**, *The Llama 3 Herd of Models*,
#   [arXiv:2407.21783](https://arxiv.org/abs/2407.21783). Section 3.1 on the data, 3.2 on the
#   document mask.
# - **Zhao et al. 2024**, *Analysing The Impact of Sequence Composition on Language Model
#   Pre-Training*, [arXiv:2402.13991](https://arxiv.org/abs/2402.13991). What documents that share a
#   row do to training.
# - **Muennighoff et al. 2023**, *Scaling Data-Constrained Language Models*,
#   [arXiv:2305.16264](https://arxiv.org/abs/2305.16264). Section 3 and appendix A: the worth of
#   repeated tokens.
#
# In production: Hugging Face's `datatrove` (`pipeline.filters`, `pipeline.dedup.minhash`), whose
# repetition filters count a little otherwise than ours; `datasketch` (`MinHash`, `MinHashLSH`);
# AllenAI's `dolma`; `torchdata.stateful_dataloader`, a loader whose workers' state is saved too.
# What the model is asked about a packed row is lesson 16; how much data a model should get is
# lesson 17; ranks that train together are lesson 19.
