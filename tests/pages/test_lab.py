"""A built lesson in JupyterLab, as a learner meets it: run all cells, press Validate."""

import json
import re
import shutil
from pathlib import Path

import pytest

from autograder.build import ROOT, build_course
from autograder.catalog import LESSONS

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

ENTRY = LESSONS[0]
STUB_LINE = 'raise NotImplementedError("your turn: replace this line")'
SOURCE = f'''# ---
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
#     title: {json.dumps(ENTRY.title)}
#     title_zh: {json.dumps(ENTRY.title_zh, ensure_ascii=False)}
#     builds: "A function that doubles."
#     minutes: 60
#     requires: []
#     gpu: "Nothing more."
#     papers:
#       - "Euclid, Elements, book V"
# ---

# %% [markdown]
# ## Doubling
#
# Twice $x$ is $x + x$.

# %% exercise="double" minutes=5 difficulty=1
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return x + x
    ### END SOLUTION

# %% check="double" points=2
assert double(3) == 6, "double(3) is 6"
### BEGIN HIDDEN TESTS
assert double(-5) == -10
### END HIDDEN TESTS

# %% tags=["experiment"]
print("experiment:", [double(x) for x in range(3)])
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with one small lesson, built as `make course` builds it, and an answered copy of the lesson."""
    root = tmp_path_factory.mktemp("course")
    source = root / "solutions" / f"{ENTRY.key}.py"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE, encoding="utf-8")
    shutil.copy(ROOT / "nbgrader_config.py", root)
    assert build_course(root=root) == 0
    stub = root / "course" / f"{ENTRY.key}.ipynb"
    answered = stub.read_text(encoding="utf-8").replace(json.dumps(STUB_LINE)[1:-1], "return 2 * x")
    assert answered != stub.read_text(encoding="utf-8")
    stub.with_name("answered.ipynb").write_text(answered, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def server(project, lab):
    return lab(project)


@pytest.fixture
def opened(browser, server):
    """Opens a notebook of the lesson's folder and waits for its kernel."""
    pages = []

    def open_(name: str):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.goto(server.page(f"{ENTRY.stage.folder}/{name}.ipynb"))
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
        # JupyterLab silently drops cells that are run before the kernel has answered: its status bar says when it has.
        page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)
        return page

    yield open_
    for page in pages:
        page.close()


def run_all(page) -> list[str]:
    """Run menu → Run All Cells; the outputs of the code cells when the last one has run."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator("[data-command='runmenu:run-all']").click()
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    cells.last.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]:")).wait_for(timeout=60_000)
    return [cells.nth(number).locator(".jp-Cell-outputArea").inner_text() for number in range(cells.count())]


def validate(page) -> str:
    """Presses nbgrader's Validate; the text of its answer."""
    page.locator(".validate-button").get_by_text("Validate").click()
    dialog = page.locator(".jp-Dialog", has_text="Validation Results")
    dialog.wait_for(timeout=90_000)
    return dialog.inner_text()


def test_answered_lesson_runs_and_validates(opened, screenshot):
    page = opened("answered")
    outputs = run_all(page)
    assert outputs[:2] == ["", ""]
    assert "experiment: [0, 2, 4]" in outputs[2]
    screenshot(page, "lesson", full_page=False)
    text = validate(page)
    screenshot(page, "validate-answered", full_page=False)
    assert "Success! Your notebook passes all the tests." in text


def test_stub_fails_its_check_and_validate_says_so(opened, screenshot):
    page = opened(Path(ENTRY.key).name)
    text = validate(page)
    screenshot(page, "validate-stub", full_page=False)
    assert "NotImplementedError" in text
    assert "double(3)" in text
    assert "Success" not in text


def test_the_roadmap_opens(browser, server, screenshot):
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.goto(server.page("index.ipynb"))
    page.locator(".jp-Notebook .jp-MarkdownCell", has_text=ENTRY.title).first.wait_for(timeout=60_000)
    screenshot(page, "roadmap", full_page=False)
    page.close()
