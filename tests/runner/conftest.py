import pytest
from built_course import Course


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    """Makes a course in a new folder, whose name has a space and Chinese characters."""

    def make() -> Course:
        return Course(tmp_path_factory.mktemp("课程 built"))

    return make
