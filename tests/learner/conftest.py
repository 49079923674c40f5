"""Two editions of a small course, built once; each test has a project of its own, under a path that nothing likes."""

import shutil
from pathlib import Path

import learner_course as course
import pytest


@pytest.fixture(scope="session")
def editions(tmp_path_factory) -> tuple[Path, Path]:
    """The course as it was, and as it is after a change of lesson 01."""
    root = tmp_path_factory.mktemp("editions")
    return course.make_project(root / "first", course.FIRST), course.make_project(root / "second", course.CHANGED)


@pytest.fixture
def changed(editions) -> Path:
    return editions[1]


@pytest.fixture
def project(editions, tmp_path) -> Path:
    """A learner's project, with work/ laid."""
    root = tmp_path / "我的 course [v1]"
    shutil.copytree(editions[0], root)
    assert course.lay(root) == []
    return root
