"""Hostile code in real kernels. Where there can be no sandbox these tests are skipped, and say why."""

import sys
from pathlib import Path

import pytest
from box import LIMITS, SANDBOX

from autograder.execute import Outcome, Step, execute
from autograder.kernels.sandbox import find_sandbox_trouble

sys.path.append(str(Path(__file__).parents[1] / "grading"))  # the tiny lesson is theirs


def pytest_collection_modifyitems(items) -> None:
    for item in items:  # pytest hands over everybody's
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.xdist_group("hostile"))
        if find_sandbox_trouble():
            item.add_marker(pytest.mark.skip(reason=find_sandbox_trouble()))


@pytest.fixture(params=["forked", "started"])
def kernels(request):
    """Kernels in a sandbox, both kinds: their walls are the same."""
    return SANDBOX[request.param]


@pytest.fixture
def run(kernels):
    """Runs cells in one kernel (or as many as it takes) and returns what became of each."""

    def run(*sources: str, limits=LIMITS) -> list[Outcome]:
        return execute([Step(source) for source in sources], limits, managers=kernels)

    return run
