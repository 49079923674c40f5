"""`make site` on a course of one tiny lesson."""

import json
import re

import pytest
from tiny_course import KEY

from autograder.site.examine import read_page


@pytest.fixture(scope="module")
def site(make, original):
    done, out = make(original.root)
    assert done.returncode == 0, done.stderr
    return out


def read(site, name: str) -> str:
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_lesson_has_the_runs_outputs_and_no_answer(site):
    html = read(site, KEY)
    page = read_page(site / f"{KEY}.html")
    assert "the lengths are here" in page.text
    assert re.search(r'<img class="figure" src="\.\./figures/01/\w+\.webp" alt="[^"]+" width="200" height="100"', html)
    assert "your turn: replace this line" in page.text
    for secret in ("sum_of_squares", "printed by the answer", "ones = [1.0]", "independent coordinates add up"):
        assert secret not in html
    assert "Check 1a (norm) · 2 points" in page.text  # the summary of a folded cell
    assert "assert norm([3, 4]) == 5" in page.text


def test_lesson_says_how_to_run_it_and_what_ran(site):
    text = read_page(site / f"{KEY}.html").text
    assert "git clone https://github.com/someone/course llm40" in text
    assert "make lab LESSON=01" in text
    assert f"colab.research.google.com/github/someone/course/blob/main/course/{KEY}.ipynb" in read(site, KEY)
    assert "2026-01-02, A CPU, 2 cores; Python 3.11.7, PyTorch 2.13.0." in text
    assert "高维空间的数学直觉" in text
    assert (site / "notebooks" / f"{KEY}.ipynb").is_file()


def test_front_page_is_the_roadmap_and_its_map_opens_lessons(site):
    html = read(site, "index")
    assert f'<a href="{KEY}.html"><title>01 · Geometry of high-dimensional space · 高维空间的数学直觉 · core' in html
    text = read_page(site / "index.html").text
    assert "迈向 AGI" in text
    assert {f"{KEY}.html", "notation.html", "glossary.html", "bibliography.html"} <= set(
        read_page(site / "index.html").links
    )


def test_terms_and_papers_have_pages_that_lessons_link(site):
    links = read_page(site / f"{KEY}.html").links
    assert "../glossary.html#term-squared-length" in links
    assert "../bibliography.html" in links
    glossary, bibliography = read_page(site / "glossary.html"), read_page(site / "bibliography.html")
    assert "A vector has a squared length." in glossary.text
    assert f"{KEY}.html" in glossary.links
    assert "Somebody 2017. A paper. arXiv:1706.03762. Lesson 01." in bibliography.text


def test_nothing_comes_over_a_network(site):
    assert (site / "_static" / "mathjax" / "tex-chtml-full.js").is_file()
    for path in site.rglob("*.html"):
        assert not [address for address in read_page(path).loads if address.startswith("http")]


def test_instructors_site_has_answers_and_hidden_tests(make, original, tmp_path):
    done, out = make(original.root, "answers", out=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    text = read_page(out / f"{KEY}.html").text
    for secret in ("sum_of_squares", "ones = [1.0]", "independent coordinates add up"):
        assert secret in text


def test_answers_and_broken_links_on_any_page_stop_it(make, copied):
    code = "sum_of_squares = sum(v * v for v in x)\nreturn math.sqrt(sum_of_squares)"
    (copied / "docs" / "learners.md").write_text(f"# Page\n\n```python\n{code}\n```\n", encoding="utf-8")
    (copied / "docs" / "grading.md").write_text('# Page\n\n<a href="nowhere.html">here</a>\n', encoding="utf-8")
    done, out = make(copied)
    assert done.returncode == 1
    assert 'docs/learners.html: tells 01_high_dimensional_intuition, cell exercise "norm"' in done.stderr
    assert "docs/grading.html: links to nowhere.html, which is not there" in done.stderr
    assert not out.exists()


def test_a_run_of_another_build_is_refused(make, copied):
    executed = copied / "build" / "executed" / f"{KEY}.ipynb"
    executed.write_text(re.sub(r'"seal": "\w+"', '"seal": "another"', executed.read_text(encoding="utf-8")))
    done, _ = make(copied)
    assert done.returncode == 1
    assert f"build/executed/{KEY}.ipynb is of another build than course/: make run LESSON=01" in done.stderr


def test_a_run_that_ended_early_is_refused(make, copied):
    executed = copied / "build" / "executed" / f"{KEY}.ipynb"
    told = json.loads(executed.read_text(encoding="utf-8"))
    code = [cell for cell in told["cells"] if cell["cell_type"] == "code"]
    code[-1]["execution_count"] = None  # as after a timeout, which leaves no error in the notebook
    executed.write_text(json.dumps(told), encoding="utf-8")
    done, _ = make(copied)
    assert done.returncode == 1
    assert f"build/executed/{KEY}.ipynb did not run to its end: make run LESSON=01" in done.stderr


def test_somebodys_folder_stays(make, original, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    done, _ = make(original.root, out=tmp_path)
    assert done.returncode == 1
    assert "is not empty and holds no site" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
