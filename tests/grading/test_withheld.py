"""Points of a submission that bent its checks: nobody has them until a person has decided, and that stays decided."""

import pytest
import tiny
from nbgrader.api import Gradebook

from autograder.execute import Limits
from autograder.grading.grade import grade_folder
from autograder.grading.task import grade

HALF = "def half(x):\n    import sys\n    return sys._getframe(1) and x / 2\n"
LIAR = "class Always(float):\n    __eq__ = lambda self, other: True\ndef half(x):\n    return Always(0)\n"


@pytest.fixture
def regrade(tmp_path):
    """Hands in a notebook and grades it; the student's one result."""
    source = tiny.build(tmp_path)

    def regrade(notebook=None):
        if notebook is not None:
            tiny.hand_in(tmp_path / "in", "林梅", tiny.dumps(notebook))
        (result,) = grade_folder(
            tmp_path / "in", tmp_path / "out", source, limits=Limits(cell=10, notebook=60), kernels=tiny.KERNELS,
            engine=lambda tasks, jobs: map(grade, tasks), show=lambda line: None,
        )  # fmt: skip
        return result

    return regrade


def entries(tmp_path) -> dict[str, tuple]:
    """Check → automatic score, manual score, whether a person is asked for."""
    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'gradebook.db'}", "llm40") as book:
        notebook = book.find_submission_notebook(tiny.LESSON, tiny.STAGE, "林梅")
        return {g.name: (g.auto_score, g.manual_score, g.needs_manual_grade) for g in notebook.grades}


def decide(tmp_path, scores: dict[str, float]) -> None:
    """What the formgrader does when a person has entered scores."""
    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'gradebook.db'}", "llm40") as book:
        for grade in book.find_submission_notebook(tiny.LESSON, tiny.STAGE, "林梅").grades:
            if grade.name in scores:
                grade.manual_score, grade.needs_manual_grade = scores[grade.name], False
        book.db.commit()


def test_a_person_is_asked(regrade, tmp_path):
    result = regrade(tiny.answered(half=HALF))
    assert (result.status, result.score) == ("withheld", 0)
    assert result.flags[0] == "withheld: 6 points wait for a person's decision"
    assert any("_getframe" in flag for flag in result.flags)
    assert {name: entry for name, entry in entries(tmp_path).items() if name.startswith(("half", "total"))} == {
        "half-check-1": (0, None, False),  # what is asked for is not given, so this failed
        "total-check-1": (None, None, True),
    }
    assert f",{tiny.LESSON}\n" not in (tmp_path / "out" / "canvas.csv").read_text().split("\n", 1)[1]
    assert (tmp_path / "out" / "moodle.csv").read_text().endswith("林梅,\n")
    assert "withheld, to be decided" in (tmp_path / "out" / "report.html").read_text()


def test_a_value_that_judges_itself(regrade):
    result = regrade(tiny.answered(half=LIAR))
    assert (result.status, result.score) == ("withheld", 0)
    assert any("Always.__eq__ is the learner's own" in flag for flag in result.flags)


def test_the_decision_stays_until_the_code_changes(regrade, tmp_path):
    regrade(tiny.answered(half=LIAR))
    checks = entries(tmp_path)
    decide(tmp_path, {name: 1.0 for name, entry in checks.items() if entry[2]})
    assert [regrade().status, regrade().score] == ["graded", 4]
    changed = tiny.answered(half=LIAR.replace("Always(0)", "Always(1)"))
    result = regrade(changed)
    assert all(asked for name, (_, _, asked) in entries(tmp_path).items() if name.endswith("-check-1"))
    assert "withheld" in result.status
    assert regrade(tiny.answered()).status == "graded"
