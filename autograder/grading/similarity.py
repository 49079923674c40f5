"""Which answers to a lesson resemble each other: a reason to read both, never a verdict.

By copydetect, an implementation of winnowing (Schleimer, Wilkerson and Aiken 2003, the method behind MOSS): names are
made alike and comments dropped before the texts are compared, so renaming hides nothing. What everyone was given, the
stubs, does not count. Short right answers resemble each other honestly: a share means something beside the class's own
median, which stands with it.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from nbformat import NotebookNode

from autograder.grading.clerk import normalized
from autograder.grading.rebuild import role

LONGEST = 50_000  # characters of normalized code; a lesson's answers have some thousand
K, WINDOW = 25, 1  # characters of normalized code that make a match; 1 keeps every match, as exercises are short
SHOWN = 20  # pairs in a lesson's list


@dataclass
class Pair:
    """Two students of a lesson; `share` of the shorter answer's code also stands in the other's."""

    lesson: str
    first: str
    second: str
    share: float
    median: float  # of all pairs of the lesson


def code(notebook: NotebookNode) -> str:
    """The text of a notebook's exercise cells."""
    return "\n\n".join(cell.source for cell in notebook.cells if role(cell) == "exercise")


def alike(
    lesson: str, answers: dict[str, str], stub: str, left_out: Callable[[str], None] = lambda student: None
) -> list[Pair]:
    """The pairs of students with the largest shares in common, largest first; `answers` maps students to code.

    `left_out` is told the students whose code takes too much to be compared.
    """
    given = _fingerprint(normalized(stub)).hashes
    prints = {}
    for student, text in answers.items():
        prepared = normalized(text)
        if prepared is None or len(prepared) > LONGEST:
            left_out(student)
        else:
            prints[student] = _fingerprint(prepared, given)
    written = {student: print for student, print in prints.items() if print.token_coverage > K}
    shares = {pair: _share(*(written[student] for student in pair)) for pair in combinations(sorted(written), 2)}
    if not shares:
        return []
    middle = median(shares.values())
    largest = sorted(shares, key=shares.get, reverse=True)[:SHOWN]
    return [Pair(lesson, *pair, shares[pair], middle) for pair in largest]


def _fingerprint(prepared: str, boilerplate=()):
    from copydetect import CodeFingerprint  # a second's import, and seldom asked for

    return CodeFingerprint("answer.py", K, WINDOW, list(boilerplate), filter=False, fp=io.StringIO(prepared))


def _share(one, other) -> float:
    """The larger of the two shares in common: that of the shorter answer."""
    from copydetect import compare_files

    _, shares, _ = compare_files(one, other)
    return min(1.0, max(shares))
