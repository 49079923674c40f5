"""The class's pages in a browser: a hundred students in forty lessons fit, sort and are found."""

import random
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from autograder.catalog import LESSONS
from autograder.grading.class_pages import write_class_pages
from autograder.grading.masters import MasterLesson
from autograder.grading.task import Check, Result

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.grading_class import students

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

EXERCISES = {"softmax": 4, "attention": 6, "mask": 3, "grouped_queries": 5, "kernel": 8}
MORE = ("kernel",)
SAID = (
    "weights must sum to 1 over keys; yours sum to 0.83: over which axis is your softmax?",
    "scales by d_k, not its root",
    "expected shape (2, 4, 7, 16), yours is (2, 7, 4, 16)",
)
TWO = "2 different notebooks for this lesson (a.ipynb, a (1).ipynb): leave only the one that counts"


def lesson(entry) -> MasterLesson:
    cells = []
    for name in EXERCISES:
        marks = {"grade": False, "solution": True, "grade_id": name}
        path = {"path": "more" if name in MORE else "core"}
        cells.append(nbformat.v4.new_code_cell("pass", metadata={"nbgrader": marks, "llm40": path}))
    return MasterLesson(entry.stage.folder, entry.name, entry.title, nbformat.v4.new_notebook(cells=cells))


def result(student: str, entry, drawn: random.Random) -> Result:
    skill = drawn.random()
    made = Result(student, entry.stage.folder, entry.name, "graded", seconds=3.0)
    for name, points in EXERCISES.items():
        passed, written = drawn.random() < skill, drawn.random() < 0.8
        status = "passed" if passed else "failed" if written else "stub"
        message = "" if passed else drawn.choice(SAID) if written else "not written yet"
        made.checks.append(Check(name, f"{name}-check-1", points, points if passed else 0.0, status, message))
    kind = drawn.random()
    if kind < 0.1:
        made.status = drawn.choice(("missing", "missing", "missing", "unreadable", "withheld", "fault"))
        for check in made.checks:
            check.status, check.score = ("withheld" if made.status == "withheld" else "not run"), 0.0
        made.flags = {"withheld": [TWO], "fault": ["the grader failed: OSError"]}.get(made.status, [])
    elif kind < 0.2:
        made.flags = [
            "file: named Copy of x.ipynb; taken for x.ipynb",
            "softmax-check-1: edited; the course's was used",
        ]
    return made


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A generated class's pages."""
    folder = tmp_path_factory.mktemp("class 班级")
    drawn = random.Random(40)
    names = [*students(97), "<b>bold</b>", "O'Hara & 100%?#", "a very long name indeed " * 3]
    results = [result(student, entry, drawn) for student in names for entry in LESSONS]
    notes = [f"{name}/homework.ipynb → {name}: not placed (the file is empty)" for name in names[:30]]
    write_class_pages(folder, results, [lesson(entry) for entry in LESSONS], notes, 2400.0, False)
    return folder


@pytest.fixture
def opened(browser, out):
    """Opens one of the pages; nothing may be asked of a network, and no script may fail."""
    trouble = []

    def goto(place: str, width: int = 1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: request.url.startswith("file:") or trouble.append(request.url))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda said: said.type == "error" and trouble.append(said.text))
        page.goto((out / place).as_uri())
        return page

    yield goto
    assert trouble == []


def shown_students(page) -> list[str]:
    return page.locator("#grid tbody tr:visible th").all_inner_texts()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_grid_fits(opened, width, screenshot):
    page = opened("report.html", width)
    screenshot(page, f"class-{width}", full_page=False)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#grid tbody tr").count() == 100
    assert page.locator("#grid tbody td").count() == 100 * (40 + 3)
    assert page.locator("#grid").get_by_text("<b>bold</b>", exact=True).count() == 1
    page.locator(".grid").evaluate("grid => grid.scrollTo(9999, 9999)")
    name, corner = page.locator("#grid tbody tr").last.locator("th"), page.locator(".grid")
    assert abs(name.bounding_box()["x"] - corner.bounding_box()["x"]) < 3  # whose line it is stays in view
    heads = page.locator("#grid thead tr").last.locator("th").last
    assert heads.bounding_box()["y"] < corner.bounding_box()["y"] + 60  # and of which lesson a column is
    screenshot(page, f"class-{width}-end", full_page=False)
    page.close()


def sort_button(page, column: int):
    return page.locator(f'#grid th button[data-column="{column}"]')  # by role it takes a browser seconds: 4,300 cells


def test_sorting(opened):
    page = opened("report.html")
    before = shown_students(page)
    sort_button(page, 3 + 9).click()
    values = page.locator("#grid tbody tr td:nth-of-type(12)").evaluate_all("all => all.map(cell => +cell.dataset.v)")
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 5
    sort_button(page, 1).click()
    totals = page.locator("#grid tbody tr td:nth-of-type(1)")
    values = totals.evaluate_all("all => all.map(cell => +cell.dataset.v)")
    assert values == sorted(values, reverse=True)
    sort_button(page, 1).click()
    assert totals.evaluate_all("all => all.map(cell => +cell.dataset.v)") == sorted(values)
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    sort_button(page, 0).press("Enter")  # by the keyboard, too
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert set(shown_students(page)) == set(before)
    page.close()


def test_searching(opened, screenshot):
    page = opened("report.html")
    box, found = page.locator("input[type=search]"), page.locator("[role=status]")
    box.fill("李梅")
    assert {name for name in shown_students(page) if "李梅" not in name} == set()
    assert found.inner_text() == f"{len(shown_students(page))} found"
    box.fill("O'HARA 100%?#")
    assert shown_students(page) == ["O'Hara & 100%?#"]
    box.fill("withheld flagged")
    screenshot(page, "class-search", full_page=False)
    assert 0 < len(shown_students(page)) < 100
    box.fill("nobody at all")
    assert shown_students(page) == []
    box.fill("")
    assert len(shown_students(page)) == 100
    page.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_a_lessons_page(opened, out, width, screenshot):
    page = opened("report.html")
    page.locator('#grid a[aria-label^="09_"]').click()
    page.set_viewport_size({"width": width, "height": 900})
    screenshot(page, f"class-lesson-{width}")
    assert page.get_by_role("heading", name="09 · Attention I: MHA, MQA, GQA").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rows = page.locator("table").first.locator("tbody tr")
    assert rows.locator("td:first-child").all_inner_texts() == list(EXERCISES)
    assert rows.locator("td:nth-child(2)").all_inner_texts() == ["core"] * 4 + ["more"]
    assert "over which axis is your softmax?" in rows.first.inner_text()
    page.locator("input[type=search]").fill("withheld")
    assert page.locator("#students tbody tr:visible").count() > 0
    page.close()


def test_every_student_and_lesson_has_a_page_that_links_back(opened, out, screenshot):
    page = opened("report.html")
    links = page.locator("#grid a[href^=report]").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert len(links) == 140
    assert all((out / unquote(link)).is_file() for link in links)
    page.locator("#grid tbody a", has_text="O'Hara").click()
    screenshot(page, "class-student")
    assert page.get_by_role("heading", name="O'Hara & 100%?#").count() == 1
    assert page.locator("#lessons tbody tr").count() == 40
    page.get_by_role("link", name="Class report").click()
    assert page.locator("#grid").count() == 1
    page.close()


def test_pages_of_an_earlier_call_go(tmp_path):
    entries = [lesson(entry) for entry in LESSONS[:2]]
    for student in ("ada", "bob"):
        results = [result(student, entry, random.Random(1)) for entry in LESSONS[:2]]
        write_class_pages(tmp_path, results, entries, [], 1.0, False)
    assert [path.name for path in (tmp_path / "report" / "students").iterdir()] == ["bob.html"]
