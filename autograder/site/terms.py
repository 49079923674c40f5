"""The glossary: bold terms of the lessons, each with the sentence in which it stands first.

Bold that only stresses a word (`the **same** seed`) has the look of a term: not_terms.txt lists such words.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from autograder.catalog import Entry

BOLD = re.compile(r"(?<!\*)\*\*(?!\s)([^*$`|{}<>]+?)\*\*(?!\*)")
SKIPPED = re.compile(r"questions|references|predict|check yourself", re.IGNORECASE)  # sections that define nothing
FENCE_OR_TABLE = re.compile(r"^```.*?^```|^[ ]*\|.*?$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
MATH = re.compile(r"\$\$.+?\$\$|\$[^$\n]+(?:\n[^$\n]+)?\$|`[^`]+`", re.DOTALL)
ABBREVIATION = re.compile(r"\b(?:et al|e\.g|i\.e|cf|vs|eq|fig|No)\.", re.IGNORECASE)
LEANS_BACK = re.compile(
    r"\W*(?:It|This|That|They|These|Its|Their|Those|Such|The other|There)\b"
)  # … on the sentence before
WORDS, SHORT = 4, 60  # words of a term at most; a sentence of fewer characters gets a neighbor
NOT_TERMS = frozenset(
    line for line in Path(__file__).with_name("not_terms.txt").read_text(encoding="utf-8").splitlines() if line
)


@dataclass
class Term:
    name: str
    definition: str  # Markdown, with the links of the lesson's page
    first: Entry
    lessons: list[Entry] = field(default_factory=list)  # all in which it stands in bold


def find_terms(lessons: dict[Entry, list[str]]) -> dict[str, Term]:
    """The terms of the lessons' prose (a text for each Markdown cell), by their key, in the order of the alphabet."""
    found: dict[str, Term] = {}
    for entry, texts in lessons.items():
        for text in _skip_sections(texts):
            for paragraph in _split_paragraphs(text):
                for match in BOLD.finditer(paragraph):
                    name = match.group(1)
                    if not is_term(name):
                        continue
                    key = find_key(name, found)
                    if key not in found:
                        found[key] = Term(name, cut_sentence(paragraph, match.start()), entry)
                    if entry not in found[key].lessons:
                        found[key].lessons.append(entry)
    return dict(sorted(found.items(), key=lambda item: re.sub(r"\W", "", item[0])))


def is_term(bold: str) -> bool:
    words = bold.split()
    plain = bold.lower().removeprefix("the ").strip()
    return (
        0 < len(words) <= WORDS
        and not re.search(r"[.?!:,;×)]$|^\W|\d{3}|=", bold)
        and re.search(r"[^\W\d]{2}", bold) is not None
        and " ".join(plain.split()) not in NOT_TERMS
    )


def find_key(name: str, known: dict[str, Term]) -> str:
    """One key for `Query`, `query` and `queries`: the singular where that is known."""
    key = " ".join(name.lower().split())
    for ending, singular in (("ies", "y"), ("es", ""), ("s", "")):
        if key.endswith(ending) and key.removesuffix(ending) + singular in known:
            return key.removesuffix(ending) + singular
    return key if key in known or f"{key}s" not in known else f"{key}s"


def link_terms(texts: list[str], terms: dict[str, Term]) -> list[str]:
    """The prose of one lesson, in which each term's first bold place is a link to the glossary."""
    linked: set[str] = set()
    wanted = set(map(id, _skip_sections(texts)))

    def link(match: re.Match) -> str:
        key = find_key(match.group(1), terms)
        if key in linked or key not in terms or not is_term(match.group(1)):
            return match.group()
        linked.add(key)
        return f"{{term}}`{' '.join(match.group(1).split())} <{' '.join(terms[key].name.split())}>`"

    made = []
    for text in texts:
        if id(text) not in wanted:
            made.append(text)
            continue
        plain = FENCE_OR_TABLE.split(text)
        kept = FENCE_OR_TABLE.findall(text)
        parts = [BOLD.sub(link, plain[0])]
        for between, part in zip(kept, plain[1:], strict=True):
            parts += [between, BOLD.sub(link, part)]
        made.append("".join(parts))
    return made


def cut_sentence(paragraph: str, at: int) -> str:
    """The sentence around a place; with a neighbor where it is short, or begins with `It` or `This`."""
    masked = MATH.sub(_mask, paragraph)
    masked = ABBREVIATION.sub(lambda match: "x" * len(match.group()), masked)
    ends = [match.end() for match in re.finditer(r"[.?!][)*_\"”]*(?=\s|$)", masked)]
    starts = [0, *ends]
    ends.append(len(paragraph))
    index = max(i for i, start in enumerate(starts) if start <= at)
    start, end = starts[index], ends[index]
    short = end - start < SHORT
    if index and (LEANS_BACK.match(paragraph[start:]) or short):
        start = starts[index - 1]
    elif short and index + 1 < len(ends):
        end = ends[index + 1]
    sentence = paragraph[start:end].strip()
    sentence = re.sub(r"^(?:[-*]|\d+\.)\s+", "", sentence)
    return re.sub(r"\s*[:,;]$", ".", sentence)


def _mask(match: re.Match) -> str:
    """As many letters as the formula has, and a full stop where a displayed one ends a sentence."""
    inner = match.group().rstrip("$").rstrip()
    ends = match.group().startswith("$$") and inner.endswith(".")
    return "x" * (len(match.group()) - 1) + ("." if ends else "x")


def _skip_sections(texts: list[str]) -> list[str]:
    """The cells outside of sections such as the references."""
    kept, skipped = [], False
    for text in texts:
        title = re.search(r"^## (.*)$", text, re.MULTILINE)
        if title:
            skipped = SKIPPED.search(title.group(1)) is not None
        if not skipped and not text.startswith("<details>"):
            kept.append(text)
    return kept


def _split_paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, each on one line; a displayed formula belongs to the paragraph before it."""
    text = HEADING.sub("\n", FENCE_OR_TABLE.sub("", text))
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    paragraphs: list[str] = []
    for part in parts:
        flat = " ".join(part.split())
        if paragraphs and (flat.startswith("$$") or (paragraphs[-1].endswith("$$") and flat[:1].islower())):
            paragraphs[-1] += f" {flat}"
        elif flat:
            paragraphs.append(flat)
    return paragraphs
