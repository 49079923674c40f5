"""A built lesson in JupyterLab, as a learner meets it: run all cells, press Validate."""

import json
import re
import shutil

import pytest

from autograder.build import ROOT, build_course
from autograder.catalog import BY_NUMBER, LESSONS

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

ENTRY = LESSONS[0]
REAL = (9, 29)
STUB_LINE = 'raise NotImplementedError("your turn: replace this line")'
SOURCE = '''# ---
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
#     builds: "A function that doubles."
#     gpu: "Nothing more."
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

# %% [markdown]
# <details><summary>Hint: what is twice?</summary>
# A sum.
# </details>

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
def opened(browser):
    """Opens a notebook of a server and waits for its kernel."""
    pages = []

    def open_(server, path: str):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.goto(server.page(path))
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
        # JupyterLab silently drops cells that are run before the kernel has answered: its status bar says when it has.
        page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)
        return page

    yield open_
    for page in pages:
        page.close()


def run_all(page, seconds: float = 60) -> list[str]:
    """Run menu → Run All Cells; the outputs of the code cells when the last one has run.

    A folded cell shows no number, and the last one may be folded: the notebook's own indicator says when all have run.
    """
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator("[data-command='runmenu:run-all']").click()
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    begun = cells.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]:"))
    begun.first.wait_for(timeout=1000 * seconds)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for(timeout=1000 * seconds)
    error = page.locator("[data-mime-type='application/vnd.jupyter.error']")  # at which Run All Cells stops
    assert not error.count(), error.first.inner_text()
    return [cells.nth(number).locator(".jp-Cell-outputArea").inner_text() for number in range(cells.count())]


def validate(page, seconds: float = 90) -> str:
    """Presses nbgrader's Validate, which runs the notebook afresh; the text of its answer."""
    page.locator(".validate-button").get_by_text("Validate").click()
    dialog = page.locator(".jp-Dialog", has_text="Validation Results")
    dialog.wait_for(timeout=1000 * seconds)
    return dialog.inner_text()


def test_answered_lesson_runs_and_validates(opened, server, screenshot):
    page = opened(server, f"{ENTRY.stage.folder}/answered.ipynb")
    outputs = run_all(page)
    assert outputs[:3] == ["", "", ""]  # set-up, exercise, check
    assert "experiment: [0, 2, 4]" in outputs[3]
    screenshot(page, "lesson", full_page=False)
    text = validate(page)
    screenshot(page, "validate-answered", full_page=False)
    assert "Success! Your notebook passes all the tests." in text


def test_stub_fails_its_check_and_validate_says_so(opened, server, screenshot):
    page = opened(server, f"{ENTRY.key}.ipynb")
    text = validate(page)
    screenshot(page, "validate-stub", full_page=False)
    assert "NotImplementedError" in text
    assert "double(3)" in text
    assert "Success" not in text


def test_the_roadmap_opens(browser, server, screenshot, panel):
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.goto(server.page("index.ipynb"))
    page.locator(".jp-Notebook .jp-MarkdownCell", has_text=ENTRY.title).first.wait_for(timeout=60_000)
    screenshot(page, "roadmap", full_page=False)
    page.locator(panel).first.wait_for(state="attached")  # an instructor's JupyterLab has what a learner's has not
    page.close()


@pytest.fixture(scope="module")
def real_lessons(tmp_path_factory, lab):
    """A server on a project with the two lessons that are the pattern of the others, their answers in place."""
    root = tmp_path_factory.mktemp("real")
    shutil.copy(ROOT / "nbgrader_config.py", root)
    for number in REAL:
        source = root / "solutions" / f"{BY_NUMBER[number].key}.py"
        source.parent.mkdir(parents=True)
        shutil.copy(ROOT / "solutions" / f"{BY_NUMBER[number].key}.py", source)
    assert build_course(root=root) == 0
    for number in REAL:
        key = BY_NUMBER[number].key
        shutil.copy(root / "build" / "source" / f"{key}.ipynb", root / "course" / f"{key}.ipynb")
    return lab(root)


@pytest.mark.parametrize("number", REAL)
def test_a_real_lesson_runs_and_validates(opened, real_lessons, screenshot, number):
    page = opened(real_lessons, f"{BY_NUMBER[number].key}.ipynb")
    run_all(page, seconds=300)
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= 2
    figures.nth(1).scroll_into_view_if_needed()
    screenshot(page, f"lesson-{number:02}", full_page=False)
    text = validate(page, seconds=300)
    screenshot(page, f"validate-{number:02}", full_page=False)
    assert "Success! Your notebook passes all the tests." in text
