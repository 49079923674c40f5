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

from autograder.grading.clerk import normalize_safely
from autograder.grading.rebuild import read_role

LONGEST = 50_000  # characters of normalized code; a lesson's answers have some thousand
K, WINDOW = 25, 1  # characters of normalized code that make a match; 1 keeps every match, as exercises are short
SHOWN = 20  # pairs in a lesson's list


@dataclass
class SimilarPair:
    """Two students of a lesson; `share` of the shorter answer's code also stands in the other's."""

    lesson: str
    first: str
    second: str
    share: float
    median: float  # of all pairs of the lesson


def collect_code(notebook: NotebookNode) -> str:
    """The text of a notebook's exercise cells."""
    return "\n\n".join(cell.source for cell in notebook.cells if read_role(cell) == "exercise")


def find_alike(
    lesson: str, answers: dict[str, str], stub: str, left_out: Callable[[str], None] = lambda student: None
) -> list[SimilarPair]:
    """The pairs of students with the largest shares in common, largest first; `answers` maps students to code.

    `left_out` is called with each student whose code takes too much to be compared.
    """
    given = _take_code_fingerprint(normalize_safely(stub)).hashes
    prints = {}
    for student, text in answers.items():
        prepared = normalize_safely(text)
        if prepared is None or len(prepared) > LONGEST:
            left_out(student)
        else:
            prints[student] = _take_code_fingerprint(prepared, given)
    written = {student: print for student, print in prints.items() if print.token_coverage > K}
    shares = {pair: _find_share(*(written[student] for student in pair)) for pair in combinations(sorted(written), 2)}
    if not shares:
        return []
    middle = median(shares.values())
    largest = sorted(shares, key=shares.get, reverse=True)[:SHOWN]
    return [SimilarPair(lesson, *pair, shares[pair], middle) for pair in largest]


def _take_code_fingerprint(prepared: str, boilerplate=()):
    from copydetect import CodeFingerprint  # a second's import, and seldom asked for

    return CodeFingerprint("answer.py", K, WINDOW, list(boilerplate), filter=False, fp=io.StringIO(prepared))


def _find_share(one, other) -> float:
    """The larger of the two shares in common: that of the shorter answer."""
    from copydetect import compare_files

    _, shares, _ = compare_files(one, other)
    return min(1.0, max(shares))
