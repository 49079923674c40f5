"""The tiny course, under a path that no shell, glob or URL likes."""

from pathlib import Path

import pytest
from tiny_course import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "课程 of lessons [v1]")
