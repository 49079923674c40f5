"""Examines a finished site: it tells no answer, links lead somewhere, pages are light, no network is needed."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from autograder import lesson
from autograder.layout import Layout
from autograder.leaks import find_telling_lines, split_statements

HEAVIEST = 3_000_000  # bytes of a page and its figures
TOLD = 30  # letters; shorter texts stand everywhere, as in autograder/leaks.py
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
HIDDEN = ("script", "style", "head")  # no text of the page
TEXTS = (".html", ".js", ".txt", ".json", ".ipynb", ".svg", ".inv", ".xml")


def find_problems(site: Path, layout: Layout, solutions: bool) -> list[str]:
    """One line for each thing that is wrong with a site; none for a good one."""
    found = {path.relative_to(site).as_posix(): read_page(path) for path in sorted(site.rglob("*.html"))}
    leaks = [] if solutions else find_page_leaks(site, found, layout)
    return [*leaks, *find_broken_links(site, found), *find_heavy_pages(site, found)]


def describe_site(site: Path) -> str:
    """A site's size in words."""
    sizes = {path: path.stat().st_size for path in site.rglob("*") if path.is_file()}
    pages = {path: weigh(site, path, read_page(path)) for path in sizes if path.suffix == ".html"}
    heaviest = max(pages, key=lambda path: pages[path])
    figures = sum(path.suffix == ".webp" for path in sizes)
    return (
        f"{len(pages)} pages, {figures} figures, {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB; the heaviest "
        f"page is {heaviest.relative_to(site).as_posix()}, {pages[heaviest] / 1e6:.2f} MB with its figures"
    )


# --- a page ---------------------------------------------------------------------------------------------------


@dataclass
class Page:
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)  # addresses that can be clicked
    loads: list[str] = field(default_factory=list)  # addresses that a browser fetches with the page
    code: list[str] = field(default_factory=list)  # the text of each <pre>
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.parts: list[str] = []
        self.hidden = 0
        self.code: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.page.anchors |= {told[name] for name in ("id", "name") if told.get(name)}
        for name, value in told.items():
            if (tag, name) in LOADS and told.get("rel") not in ("next", "prev", "index", "search", "canonical"):
                self.page.loads.append(value)
        if tag == "a" and "href" in told:
            self.page.links.append(told["href"])
        self.hidden += tag in HIDDEN
        if tag == "pre":
            self.code = []

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN
        if tag == "pre" and self.code is not None:
            self.page.code.append("".join(self.code))
            self.code = None

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)
        if self.code is not None:
            self.code.append(data)


def read_page(path: Path) -> Page:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.page.text = "".join(reader.parts)
    return reader.page


# --- leaks ----------------------------------------------------------------------------------------------------


def find_page_leaks(site: Path, pages: dict[str, Page], layout: Layout) -> list[str]:
    """Every place at which an answer or a hidden test can be read.

    Of an answer any three statements in a row (autograder/leaks.py), in code of any page; of every hidden region and
    model answer all its letters, and each long sentence, in any text file, however it is marked up or wrapped.
    """
    codes = {name: page.code for name, page in pages.items()}
    letters = {name: squeeze(page.text) for name, page in pages.items()}
    for path in sorted(site.rglob("*")):
        name = path.relative_to(site).as_posix()
        if path.suffix in TEXTS and name not in pages and not name.startswith("_static/"):
            text = path.read_text(encoding="utf-8", errors="replace")
            letters[name] = squeeze(text)
            if path.suffix == ".ipynb":
                codes[name] = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
                letters[name] = squeeze("\n".join(codes[name]))
    runs, wholes = _read_secrets(layout)
    problems = []
    for name, blocks in codes.items():
        for block in blocks:
            statements = split_statements(block)
            for index, first in enumerate(statements):
                for where, run in runs.get(first, ()):
                    if statements[index : index + len(run)] == run:
                        problems.append(f"{name}: tells {where}: `{first}` …")
    for name, text in letters.items():
        problems += [f"{name}: tells {where}: `{secret[:60]}` …" for where, secret in wholes if secret in text]
    return list(dict.fromkeys(problems))


def squeeze(text: str) -> str:
    """Letters and digits alone: equal for the same words in Markdown, in HTML and in a notebook's JSON."""
    return re.sub(r"[\W_]+", "", text)


def _read_secrets(layout: Layout) -> tuple[dict[str, list[tuple[str, list[str]]]], list[tuple[str, str]]]:
    """All that must not be told: runs of statements by their first, and texts as letters; each with its cell's name."""
    runs: dict[str, list[tuple[str, list[str]]]] = {}
    wholes = []
    for entry in layout.list_written():
        for cell in lesson.read_lesson(layout.find_source(entry)).cells:
            where = f"{entry.name}, {cell.label}"
            if cell.role != "answer":
                for run in find_telling_lines(cell):
                    runs.setdefault(run[0], []).append((where, run))
            for secret in lesson.secrets(cell):
                parts = [secret, *_split_sentences(secret)] if cell.role == "answer" else [secret]
                wholes += [(where, squeeze(part)) for part in parts if len(squeeze(part)) >= TOLD]
    return runs, wholes


def _split_sentences(text: str) -> Iterable[str]:
    """The sentences of prose that are free of formulas, whose text a page has in another form."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text) if not re.search(r"[$\\]", part)]


# --- links and weight -----------------------------------------------------------------------------------------


def find_broken_links(site: Path, pages: dict[str, Page]) -> list[str]:
    """Links of pages to files and anchors that are not there, and what would be loaded over a network."""
    problems = []
    for name, page in pages.items():
        fetched = [a for a in page.loads if _is_elsewhere(a) and not a.startswith("data:")]  # data: the page carries it
        problems += [f"{name}: loads {address} over a network" for address in fetched]
        for address in dict.fromkeys([*page.links, *page.loads]):
            if _is_elsewhere(address) or address in ("", "#"):
                continue
            parts = urlsplit(address)
            path = (site / name).parent / unquote(parts.path) if parts.path else site / name
            path = path / "index.html" if path.is_dir() else path
            target = path.resolve()
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                problems.append(f"{name}: links to {address}, which is not there")
            elif parts.fragment and target.suffix == ".html":
                anchors = pages[target.relative_to(site.resolve()).as_posix()].anchors
                if unquote(parts.fragment) not in anchors:
                    problems.append(f"{name}: links to {address}, but that page has no such anchor")
    return problems


def _is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("mailto", "data", "javascript")


def find_heavy_pages(site: Path, pages: dict[str, Page]) -> list[str]:
    weights = {name: weigh(site, site / name, page) for name, page in pages.items()}
    return [
        f"{name}: {weight / 1e6:.1f} MB with its figures, more than {HEAVIEST / 1e6:g} MB"
        for name, weight in weights.items()
        if weight > HEAVIEST
    ]


def weigh(site: Path, path: Path, page: Page) -> int:
    """Bytes of a page and its own figures: what all pages share (_static) is loaded once."""
    own = {
        (path.parent / unquote(urlsplit(address).path)).resolve()
        for address in page.loads
        if not _is_elsewhere(address)
    }
    static = (site / "_static").resolve()
    return path.stat().st_size + sum(p.stat().st_size for p in own if p.is_file() and not p.is_relative_to(static))
