"""The site's parts that need none of its packages."""

import json
import re

import pytest
from tiny_course import Project

from autograder import catalog
from autograder.layout import ROOT, Layout
from autograder.roadmap import draw_roadmap
from autograder.site import examine
from autograder.site.build import find_neighbors, write_run_it
from autograder.site.pages import SiteLesson, find_role, graft
from autograder.site.papers import ARXIV, find_papers, read_references
from autograder.site.terms import cut_sentence, find_terms, is_term, link_terms

FIRST, SECOND = catalog.BY_NUMBER[1], catalog.BY_NUMBER[2]


def read_prose() -> dict[catalog.Entry, list[str]]:
    """The prose of the real course."""
    texts = {}
    for entry in Layout(ROOT).list_written():
        cells = json.loads((ROOT / "course" / f"{entry.key}.ipynb").read_text(encoding="utf-8"))["cells"]
        texts[entry] = ["".join(cell["source"]) for cell in cells[1:] if cell["cell_type"] == "markdown"]
    return texts


# --- terms ----------------------------------------------------------------------------------------------------


def test_a_term_is_defined_where_it_stands_first():
    terms = find_terms({FIRST: ["One. A **rank** counts.\nMore."], SECOND: ["**Ranks** again, and the **gain** $g$."]})
    assert [(key, term.first, term.lessons) for key, term in terms.items()] == [
        ("gain", SECOND, [SECOND]),
        ("rank", FIRST, [FIRST, SECOND]),
    ]
    assert terms["rank"].definition == "One. A **rank** counts."


@pytest.mark.parametrize("bold", ["all", "Predict first.", "$x$", "The rank of a matrix is", "1.", "Θ(S²)"])
def test_stress_and_headlines_are_no_terms(bold):
    assert not is_term(bold)


def test_sections_without_definitions_define_nothing():
    assert not find_terms({FIRST: ["## 3. References\n\n- **Somebody** wrote.", "## 4. Key questions\n\n**Why**"]})


@pytest.mark.parametrize(
    ("before", "sentence", "after"),
    [
        ("Another thing. ", "The **loss** by Kim et al. 2020 is $a. b$ here, and it is one number.", " No."),
        ("", "What comes before it. It is the **loss**, one number.", " No."),
        ("", "**Loss** of a batch, which is the mean over all that is scored in it.", ""),
        ("", "The **loss** is this long formula, a number of nats: $$ L = 1. $$", " No."),
    ],
)
def test_sentences(before, sentence, after):
    text = before + sentence + after
    assert cut_sentence(text, text.index("**")) == sentence


def test_what_introduces_a_list_ends_in_a_full_stop():
    assert cut_sentence("- **Loss** of a batch, of which there are two kinds in use:", 2).endswith("kinds in use.")


def test_links_stand_at_the_first_place_only_and_not_in_tables_and_code():
    texts = ["| **rank** |\n\n```\n**rank**\n```\nThe **rank** and the\n**effective\nrank**, the **rank**."]
    linked = link_terms(texts, find_terms({FIRST: texts}))
    assert linked == [
        "| **rank** |\n\n```\n**rank**\n```\nThe {term}`rank <rank>` and the\n"
        "{term}`effective rank <effective rank>`, the **rank**."
    ]


# --- papers ---------------------------------------------------------------------------------------------------


def test_every_way_to_write_a_reference():
    text = """## 9. References

- **Kim & Lee 2014**, Adam, [arXiv:1412.6980](https://arxiv.org/abs/1412.6980). Section *one*.
- **Vaswani et al. 2017**, *Attention Is
  All You Need*, [arXiv:1706.03762](https://arxiv.org/abs/1706.03762); *More*,
  [arXiv:2307.09288](https://arxiv.org/abs/2307.09288). **Kudo 2018**, *Subwords* (ACL).
- Dao 2023, *FlashAttention-2*, [arXiv:2307.08691](https://arxiv.org/abs/2307.08691): loops.
- **Glorot 2011**, Deep sparse networks, AISTATS. Why.
- In production: `torch/optim/adamw.py`, which is *fast*.
"""
    assert [(p.authors, p.year, p.title, p.arxiv) for p in read_references(text)] == [
        ("Kim & Lee", "2014", "Adam", "1412.6980"),
        ("Vaswani et al.", "2017", "Attention Is All You Need", "1706.03762"),
        ("Vaswani et al.", "2023", "More", "2307.09288"),
        ("Kudo", "2018", "Subwords", ""),
        ("Dao", "2023", "FlashAttention-2", "2307.08691"),
        ("Glorot", "2011", "Deep sparse networks", ""),
    ]


def test_every_paper_of_the_course_is_in_the_bibliography_once():
    prose = read_prose()
    numbers = [p.arxiv for p in find_papers(prose) if p.arxiv]
    cited = {n for texts in prose.values() for t in texts if re.match(r"## .*References", t) for n in ARXIV.findall(t)}
    assert sorted(numbers) == sorted(cited)
    titles = [p.title.lower() for p in find_papers(prose) if p.title]
    assert len(titles) == len(set(titles))


# --- pages ----------------------------------------------------------------------------------------------------


def make_cell(name: str, source: str, **metadata) -> dict:
    return {"cell_type": "code", "id": name, "source": source, "metadata": metadata, "outputs": []}


def test_exercises_and_checks_get_no_outputs():
    cells = [
        make_cell("a", "raise", nbgrader={"solution": True}),
        make_cell("b", "assert", nbgrader={"grade": True, "solution": False}),
        make_cell("c", "plot()", tags=["experiment", "figure"]),
    ]
    assert [find_role(cell) for cell in cells] == ["exercise", "check", "figure"]
    executed = {"cells": [{**cell, "outputs": [{"output_type": "stream", "text": "x"}]} for cell in cells]}
    assert [len(cell["outputs"]) for cell in graft({"cells": cells}, executed)] == [0, 0, 1]


def test_neighbors_follow_prerequisites():
    found = find_neighbors([SiteLesson(catalog.BY_NUMBER[n], {}, {}) for n in (1, 2, 3, 6, 8)])
    keys = {
        catalog.BY_KEY[page].number: [[key for key, _ in side] for side in sides.values()]
        for page, sides in found.items()
    }
    third, sixth, eighth = (catalog.BY_NUMBER[n].key for n in (3, 6, 8))
    assert keys[2] == [[FIRST.key], [third, sixth]]
    assert keys[3] == [[SECOND.key], [eighth]]
    assert keys[6][1] == [eighth]  # nothing here builds on it
    assert found[FIRST.key]["after"] == [(SECOND.key, "02 · Automatic differentiation and computation graphs")]


def test_colab_takes_notebooks_of_github_only():
    assert "colab.research" in write_run_it(FIRST, "https://github.com/someone/course.git")
    assert "colab.research" not in write_run_it(FIRST, "https://git.example.org/llm40/llm40")


def test_boxes_of_the_map_are_links():
    svg = draw_roadmap({1, 2}, links={1: ("a.html", "One & two")})
    assert svg.count("<a ") == svg.count("</a>") == 1
    assert '<a href="a.html"><title>One &amp; two</title>' in svg


# --- what a site must keep ------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    def write(**pages: str):
        for name, html in pages.items():
            (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        return tmp_path, {f"{name}.html": examine.read_page(tmp_path / f"{name}.html") for name in pages}

    return write


def test_links(site):
    folder, pages = site(
        a='<a href="b.html#here">x</a><a href="b.html#gone">x</a><a href="c.html">x</a><a href="#">x</a>'
        '<a href="https://example.org">x</a><img src="d.webp"><script src="https://example.org/x.js"></script>',
        b='<p id="here"><audio src="data:audio/wav;base64,UklGRg=="></audio>',  # a player carries its sound
    )
    assert examine.find_broken_links(folder, pages) == [
        "a.html: loads https://example.org/x.js over a network",
        "a.html: links to b.html#gone, but that page has no such anchor",
        "a.html: links to c.html, which is not there",
        "a.html: links to d.webp, which is not there",
    ]


def test_weight_counts_the_pages_own_figures_once(site):
    folder, pages = site(a='<img src="f.webp"><img src="f.webp">')
    (folder / "f.webp").write_bytes(b"x" * examine.HEAVIEST)
    assert examine.find_heavy_pages(folder, pages) == ["a.html: 3.0 MB with its figures, more than 3 MB"]


@pytest.mark.parametrize(
    "html",
    [
        "<pre>sum_of_squares = <span>sum</span>(\n    v * v for v in x\n)\nreturn math.sqrt(sum_of_squares)</pre>",
        "<p>for dimension in (1, 7, 64): ones = [1.0] * dimension assert abs(norm(ones) - math.sqrt(dimension)) "
        "&lt; 1e-9, \"a vector of ones has length √d\"</p>",
        "<p>Because the <em>squares</em> of d independent coordinates\nadd up.</p>",
    ],
)  # fmt: skip
def test_leaks_are_found_however_they_are_marked_up(site, tmp_path, html):
    project = Project(tmp_path / "project")
    folder, pages = site(a=html, b="<pre>return x</pre>")
    told = examine.find_page_leaks(folder, pages, project.layout)
    assert told
    assert all(line.startswith("a.html: tells 01_high_dimensional_intuition, cell ") for line in told)
