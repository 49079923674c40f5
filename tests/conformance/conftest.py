"""What the conformance tests share: a lesson's reference answers, and the table printed at the end of the run.

These tests hold the answers of `solutions/` against independent libraries, with the same weights and inputs. The
learner's checks never see them.
"""

import linecache
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jupytext
import pytest
import torch

SOLUTIONS = Path(__file__).parents[2] / "solutions"
ROWS = pytest.StashKey[list]()


@cache
def _reference(number: str) -> SimpleNamespace:
    paths = sorted(SOLUTIONS.glob(f"stage*/{number}_*.py"))
    if len(paths) != 1:
        raise FileNotFoundError(f"{len(paths)} lessons in {SOLUTIONS} have the number {number}, not one")
    names = {"__name__": f"lesson_{number}"}
    for i, cell in enumerate(jupytext.read(paths[0], fmt="py:percent").cells):
        skipped = "check" in cell.metadata or "experiment" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not skipped:
            where = f"<lesson {number}, cell {i}>"
            # Triton reads a kernel's text through inspect, and so through this cache.
            linecache.cache[where] = (len(cell.source), None, cell.source.splitlines(keepends=True), where)
            exec(compile(cell.source, where, "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], SimpleNamespace]:
    """`reference("09").causal_mask`: what a lesson's plain and exercise cells define, with the reference answers in."""
    return _reference


@pytest.fixture
def agrees(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`agrees(what, against, actual, expected, tolerance=…)`: asserts, and adds a row to the table at the end.

    The difference is the largest absolute one, relative to the largest expected value, in float64.
    """

    def compare(what: str, against: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} against {tuple(expected.shape)}"
        actual, expected = actual.detach().double(), expected.detach().double()
        scale = float(expected.abs().max()) or 1.0
        difference = float((actual - expected).abs().max()) / scale
        request.config.stash.setdefault(ROWS, []).append((what, against, difference))
        assert difference <= tolerance, f"{what} differs from {against} by {difference:.1e}, allowed {tolerance:.1e}"

    return compare


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Hands a test's rows to its report, which pytest-xdist carries to the process that prints."""
    if call.when == "call":
        item.user_properties += [("conformance", row) for row in item.config.stash.get(ROWS, [])]
        item.config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[tuple[str, str], float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, row in getattr(report, "user_properties", []):
                if name == "conformance":
                    what, against, difference = row
                    rows[what, against] = max(difference, rows.get((what, against), 0.0))
    if not rows:
        return
    terminalreporter.section("conformance: largest difference, relative to the largest expected value")
    width = [max(len(key[i]) for key in rows) for i in (0, 1)]
    for (what, against), difference in sorted(rows.items()):
        terminalreporter.write_line(f"{what:<{width[0]}}  {against:<{width[1]}}  {difference:.1e}")
