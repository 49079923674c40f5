"""A learner's walk: make lab, two exercises of lesson 02, a new edition meanwhile, make check, and open it again."""

import json
import re
import shutil
import urllib.error
import urllib.request
from contextlib import suppress

import nbformat
import pytest

from autograder.build import build_course
from autograder.catalog import BY_NUMBER
from autograder.layout import ROOT
from autograder.learner.check import check_work
from autograder.learner.work import Work

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

KEY = BY_NUMBER[2].key
PROSE = "Training asks one question over and over"
AGAIN = "Training asks one question again and again"
FIRST, SECOND = "numerical_gradient", "unbroadcast"
NOTE = "my_own_note = 'kept'"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with lesson 02, in a folder with a space and Chinese in its name; and its course/ in a new edition."""
    root = tmp_path_factory.mktemp("learner") / "我的 course"
    source = root / "solutions" / f"{KEY}.py"
    source.parent.mkdir(parents=True)
    shutil.copy(ROOT / "nbgrader_config.py", root)
    text = (ROOT / "solutions" / f"{KEY}.py").read_text(encoding="utf-8")
    assert PROSE in text
    source.write_text(text.replace(PROSE, AGAIN), encoding="utf-8")
    assert build_course(root=root) == 0
    shutil.copytree(root / "course", root / "new edition")
    source.write_text(text, encoding="utf-8")
    assert build_course(root=root) == 0
    return root


@pytest.fixture(scope="module")
def answers(project) -> dict[str, str]:
    master = nbformat.read(project / "build" / "source" / f"{KEY}.ipynb", as_version=4)
    found = {cell.id: cell.source for cell in master.cells if cell.id in (FIRST, SECOND)}
    return {name: re.sub(r"\n *### \w+ SOLUTION", "", source) for name, source in found.items()}


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    yield page
    page.close()


def wait_for_kernel(page) -> None:
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)


def cell_with(page, text: str):
    return page.locator(".jp-Notebook .jp-CodeCell", has_text=text).first


def run_cell(page, cell) -> None:
    """Shift-Enter in a cell, until it has run."""
    cell.locator(".jp-InputPrompt").click()
    page.keyboard.press("Shift+Enter")
    cell.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]:")).wait_for(timeout=60_000)


def write_cell(page, cell, text: str) -> None:
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(text)


def test_two_exercises_a_new_edition_and_all_is_there(page, project, answers, lab, screenshot, panel, capsys):
    server = lab(project, learner=True)
    copy = Work(project).find_copy(KEY)
    page.goto(server.page("index.ipynb"))
    link = page.locator(f".jp-Notebook a[href*='{KEY}.ipynb']").first
    link.wait_for(timeout=60_000)
    screenshot(page, "learner-1-roadmap", full_page=False)

    # JupyterLab shows no instructor's panel, and no menu with one; nor does the server have their pages.
    assert not page.locator(panel).count()
    assert not page.locator(".lm-MenuBar-itemLabel", has_text="Nbgrader").count()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}/formgrader?token={server.token}")

    link.click()
    page.locator(".jp-Notebook .jp-CodeCell", has_text=FIRST).first.wait_for(timeout=60_000)
    page.goto(server.page(f"{KEY}.ipynb"))
    wait_for_kernel(page)
    assert page.locator(".validate-button").count()  # nbgrader's Validate stays
    run_cell(page, page.locator(".jp-Notebook .jp-CodeCell").nth(0))
    run_cell(page, page.locator(".jp-Notebook .jp-CodeCell").nth(1))
    solve(page, FIRST, answers)
    screenshot(page, "learner-2-solved", full_page=False)
    save(page, copy, FIRST)

    # The lesson changes while it is open, and `make lab` in another terminal updates the copy.
    shutil.copytree(project / "new edition", project / "course", dirs_exist_ok=True)
    with Work(project).lock():
        [line] = Work(project).make_current([KEY])
    assert "1 answers and 0 cells of your own are kept" in line
    solve(page, SECOND, answers)
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(NOTE)
    page.keyboard.press("Control+S")
    dialog = page.locator(".jp-Dialog", has_text="changed")
    dialog.wait_for(timeout=30_000)
    screenshot(page, "learner-3-changed-on-disk", full_page=False)
    dialog.get_by_role("button", name="Overwrite").click()
    wait_until_written(page, copy, SECOND)
    page.goto("about:blank")

    # How far: both answers pass.
    assert check_work(root=project) == 0
    said = capsys.readouterr().out
    assert re.search(rf"1  {FIRST} +passed +3 of 3", said)
    assert re.search(rf"2  {SECOND} +passed +2 of 2", said)

    # Open it again: the new edition, with everything of the learner's.
    again = lab(project, learner=True)
    assert f"work/{KEY}.ipynb is up to date again: 2 answers and 1 cells of your own are kept" in again.said
    page.goto(again.page("index.ipynb"))
    page.locator(".jp-Notebook", has_text=re.compile(r"\b5 of \d+")).first.wait_for(timeout=60_000)
    screenshot(page, "learner-4-progress", full_page=False)
    page.goto(again.page(f"{KEY}.ipynb"))
    wait_for_kernel(page)
    shown = page.locator(".jp-Notebook").inner_text()
    assert AGAIN in shown
    assert PROSE not in shown
    for name in (FIRST, SECOND):
        last = answers[name].rstrip().split("\n")[-1].strip()
        assert last in cell_with(page, f"({name}) ·").inner_text()
    assert NOTE in shown
    cell_with(page, f"({FIRST}) ·").scroll_into_view_if_needed()
    screenshot(page, "learner-5-opened-again", full_page=False)
    assert len(list((project / "work" / ".earlier").rglob("*.ipynb"))) == 2


def solve(page, name: str, answers: dict[str, str]) -> None:
    """Types the answer, runs it, and its check, which says nothing."""
    exercise = cell_with(page, f"({name}) ·")
    write_cell(page, exercise, answers[name])
    run_cell(page, exercise)
    check = page.locator(".jp-Notebook .jp-CodeCell", has_text=re.compile(rf"# Check \d\w? \({name}\)")).first
    check.scroll_into_view_if_needed()
    run_cell(page, check)
    assert not check.locator("[data-mime-type='application/vnd.jupyter.error']").count()


def save(page, copy, name: str) -> None:
    page.keyboard.press("Control+S")
    wait_until_written(page, copy, name)


def wait_until_written(page, copy, name: str) -> None:
    for _ in range(100):
        with suppress(ValueError):  # JupyterLab empties the file before it writes
            cells = json.loads(copy.read_text(encoding="utf-8"))["cells"]
            if "NotImplementedError" not in "".join(next(cell for cell in cells if cell["id"] == name)["source"]):
                return
        page.wait_for_timeout(100)
    pytest.fail(f"{name} was not saved")
