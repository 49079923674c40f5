"""The run's report in a browser: it fits a wide and a narrow window, with the longest course it can meet."""

import copy

import pytest

from autograder import report
from autograder.catalog import LESSONS

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

FAILURE = {
    "kind": "error",
    "cell": "scaled_dot_product_attention-check-2 (code cell 31 of 51)",
    "message": "AssertionError: weights must sum to 1 over keys; yours sum to " + "0.83" * 60,
    "source": "checks.close(scaled_dot_product_attention(q, k, v), " + "expected, " * 40 + ")",
    "traceback": "\x1b[31mAssertionError\x1b[39m <b>not bold</b> " + "x" * 300,
}


def lesson(entry, number: int) -> dict:
    return {
        "key": entry.key,
        "stage": entry.stage.folder,
        "name": entry.name,
        "title": entry.title,
        "status": "ok",
        "failures": [],
        "warnings": [],
        "seconds": 4.0 + number,
        "grading_seconds": 3.0 + number / 4,
        "peak_bytes": (300 + 50 * number) * 2**20,
        "gpu_bytes": 0,
        "checks": 20,
        "checks_passed": 20,
        "points": 41,
        "max_points": 41,
        "figures": 4,
        "slowest": {"cell": "code cell 40 of 51", "seconds": 2.5, "line": "losses = train(model, steps=400) " * 4},
        "stub": {"status": "ok", "failures": [], "checks": 20, "checks_failing": 20},
    }


@pytest.fixture(scope="module")
def result() -> dict:
    lessons = [lesson(entry, number) for number, entry in enumerate(LESSONS, start=1)]
    lessons[8].update(status="failed", failures=[FAILURE], checks_passed=14, points=25)
    lessons[9]["stub"]["failures"] = [copy.deepcopy(FAILURE)]
    lessons[39]["warnings"] = ["the whole notebook takes 44.0 s, over the budget of 30.0 s"]
    return {
        "created": "2026-11-20T22:00:00+00:00",
        "profile": "cpu",
        "jobs": 2,
        "seconds": 412.0,
        "strict_budgets": False,
        "budgets": {"seconds": 30.0, "grading_seconds": 8.0, "peak_bytes": 2 * 2**30},
        "status": "failed",
        "versions": {
            "python": "3.11.7",
            "device": "a processor, 2 cores",
            "torch": "2.13.0+cpu",
            "triton": "3.7.1",
            "papermill": "2.7.0",
            "ipykernel": "7.4.0",
        },
        "lessons": lessons,
    }


@pytest.mark.parametrize("width", [1280, 400])
def test_report_fits_the_window(browser, result, tmp_path, width, screenshot):
    page_file = tmp_path / "report.html"
    page_file.write_text(report.render_html(result), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    outside = []
    page.on("request", lambda request: request.url.startswith("file:") or outside.append(request.url))
    page.goto(page_file.as_uri())
    screenshot(page, f"report-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg g").count() == 2 * len(LESSONS)
    assert page.locator("tbody tr").count() == len(LESSONS)
    assert page.get_by_text("<b>not bold</b>").count() == 1 + 1  # the failing lesson's and the failing stub's
    words = page.locator("svg text")
    # Every word of the charts lies inside its chart and is large enough to read.
    for box, chart in words.evaluate_all(
        "all => all.map(t => [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()])"
    ):
        assert chart["left"] - 1 <= box["left"]
        assert box["right"] <= chart["right"] + 1
        assert box["height"] >= 11
    assert outside == []
    page.close()
