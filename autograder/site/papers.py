"""The bibliography: each paper once, with the lessons that name it under their references."""

import re
import unicodedata
from dataclasses import dataclass, field

from autograder.catalog import Entry

ARXIV = re.compile(r"\[arXiv:(\d{4}\.\d{4,5})\]")
AUTHORS = re.compile(r"\*\*(?P<bold>[^*]+?\d{4}|[^*]+ et al\.)\*\*,?\s*|^(?P<plain>[^*`\[]+?\d{4}),\s*")
ITALIC = re.compile(r"(?<!\*)\*(?!\*)([^*]+)\*(?!\*)")
# A title that is not in italics ends at its arXiv number; without one, at the place where it appeared.
PLAIN = re.compile(r"(?P<numbered>[^*\[]+?),? \[arXiv|(?P<other>[^*\[,]+?)(?:, | \(|\. |\.$)")


@dataclass
class Paper:
    authors: str
    year: str  # empty where the lesson does not say
    title: str
    arxiv: str  # its number, or empty
    lessons: list[Entry] = field(default_factory=list)


def simplify(title: str) -> str:
    """A title's letters, for comparing: spelling of dashes, capitals and marks aside."""
    return re.sub(r"\W", "", title.lower())


def find_papers(lessons: dict[Entry, list[str]]) -> list[Paper]:
    """The papers of the lessons' references (a text for each Markdown cell), by author and year."""
    found: list[Paper] = []
    for entry, texts in lessons.items():
        for text in texts:
            if re.match(r"## .*References", text):
                for paper in read_references(text):
                    same = next((other for other in found if _is_same_paper(paper, other)), None)
                    if same is None:
                        found.append(paper)
                        same = paper
                    _add(same, paper, entry)
    return sorted(found, key=lambda paper: (_find_sort_name(paper.authors), paper.year, paper.title))


def read_references(text: str) -> list[Paper]:
    """The papers of one list of references, as the lesson writes them."""
    papers = []
    for item in re.split(r"^- ", text, flags=re.MULTILINE)[1:]:
        flat = " ".join(re.split(r"\n\s*\n", item)[0].split())
        begins = list(AUTHORS.finditer(flat))
        for index, match in enumerate(begins):
            end = begins[index + 1].start() if index + 1 < len(begins) else len(flat)
            papers += _read_item(match["bold"] or match["plain"], flat[match.end() : end])
    return papers


def _read_item(authors: str, told: str) -> list[Paper]:
    """The paper, or the papers, of these authors: `told` is what the list says of it."""
    year = re.search(r"\b(?:19|20)\d\d\b", authors)
    who = re.sub(r"[\s,]*\b(?:19|20)\d\d\b.*", "", authors)
    arxiv = ARXIV.search(told)
    number = arxiv.group(1) if arxiv else ""
    italic = ITALIC.match(told)
    if italic:
        title = italic.group(1)
    elif arxiv and arxiv.start() == 0:
        title = ""
    else:
        plain = PLAIN.match(told)
        title = (plain["numbered"] or plain["other"]) if plain else told
    first = Paper(who, year.group() if year else "", title.rstrip("."), number)
    more = []
    for other in ITALIC.finditer(told, italic.end() if italic else 0):
        numbered = ARXIV.match(told[other.end() :].lstrip(", "))
        if numbered and numbered.group(1) != number:
            more.append(Paper(who, f"20{numbered.group(1)[:2]}", other.group(1), numbered.group(1)))
    return [first, *more]


def _is_same_paper(paper: Paper, other: Paper) -> bool:
    if paper.arxiv and other.arxiv:
        return paper.arxiv == other.arxiv
    return simplify(paper.title) == simplify(other.title)


def _add(same: Paper, paper: Paper, entry: Entry) -> None:
    """Note the lesson, and what this one tells more of the paper: the full title, all authors."""
    if entry not in same.lessons:
        same.lessons.append(entry)
    same.title = max(same.title, paper.title, key=len)
    same.authors = max(same.authors, paper.authors, key=len)
    same.arxiv = same.arxiv or paper.arxiv
    same.year = same.year or paper.year


def _find_sort_name(authors: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", authors) if not unicodedata.combining(c))
    return re.sub(r"^(?:(?:de|den|der|van|von) )+", "", plain).lower()
