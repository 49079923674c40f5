"""The harness that proves checks is itself proved: with checks that are too weak, and with answers that misbehave."""

from pathlib import Path

import answers_harness as harness
import pytest
from tiny_course import Project

from autograder.lesson import read_lesson

ANSWERS = '''"""Answers to the tiny lesson."""

# %% wrong="norm" because="forgets the root"
def norm(x):
    return sum(v * v for v in x)

# %% wrong="norm" because="only right in two dimensions"
def norm(x):
    return 5.0 if len(x) == 2 else 0.0

# %% right="norm" because="hypot"
def norm(x):
    return math.hypot(*x)
'''


def run(project: Project, answers: str = ANSWERS, limit: float = 30) -> dict[str, tuple]:
    """id → (answer, outcome, verdict)"""
    path = project.root / "tests" / "answers" / "stage1_foundations" / "01_high_dimensional_intuition.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(answers, encoding="utf-8")
    lesson = read_lesson(project.source)
    collected = harness.collect(lesson, path)
    outcomes = harness.run_answers(lesson, collected, limit)
    return {a.id: (a, outcomes[a.id], harness.verdict(a, outcomes[a.id])) for a in collected}


def test_sound_checks(project: Project) -> None:
    results = run(project)
    assert {name: outcome.score for name, (_, outcome, _) in results.items()} == {
        "01-norm-reference": 3,
        "01-norm-stub": 0,
        "01-norm-fake-none": 0,
        "01-norm-fake-zeros-norm": 1,
        "01-norm-fake-first-norm": 3,  # takes a list: there is no tensor to give back
        "01-norm-wrong-forgets_the_root": 1,
        "01-norm-wrong-only_right_in_two_dimensions": 1,
        "01-norm-right-hypot": 3,
    }
    assert not results["01-norm-fake-first-norm"][1].fake_applied
    verdicts = {name: verdict for name, (_, outcome, verdict) in results.items() if outcome.fake_applied}
    assert not any(verdicts.values()), verdicts
    assert results["01-norm-wrong-forgets_the_root"][1].message == "norm([3, 4]) must be 5; yours is 25"


def test_a_wrong_answer_that_slips_through_fails(project: Project) -> None:
    project.replace("for dimension in (1, 7, 64):", "for dimension in ():")
    verdict = run(project)["01-norm-wrong-only_right_in_two_dimensions"][2]
    assert verdict == ('exercise "norm": the wrong answer "only right in two dimensions" got all 3 of 3 points: '
                       "the checks do not catch it")  # fmt: skip


def test_a_check_that_asks_nothing_is_caught_by_the_stub_and_none(project: Project) -> None:
    project.replace('assert norm([]) == 0, "no numbers: length 0"', "print(norm)")
    results = run(project)
    for fake in ("01-norm-stub", "01-norm-fake-none"):
        assert results[fake][2].endswith("got 1 of 3 points, it should get none: a check asks too little")


def test_a_check_that_refuses_a_right_answer_fails(project: Project) -> None:
    project.replace("assert norm([]) == 0", "import inspect\nassert 'sqrt' in inspect.getsource(norm)")
    verdict = run(project)["01-norm-right-hypot"][2]
    assert verdict.startswith('exercise "norm": the right answer "hypot" got only 2 of 3 points')


def test_answers_that_misbehave_lose_their_own_points_only(project: Project) -> None:
    answers = ANSWERS + '''
# %% wrong="norm" because="never ends"
def norm(x):
    while x != []:
        pass
    return 0

# %% wrong="norm" because="leaves"
import os

def norm(x):
    os._exit(0)

# %% wrong="norm" because="crashes"
def norm(x):
    import ctypes

    ctypes.string_at(0)

# %% wrong="norm" because="no Python"
def norm(x:
'''
    results = run(project, answers, limit=3)
    message = {name.rsplit("-", 1)[-1]: outcome.message for name, (_, outcome, _) in results.items()}
    assert message["never_ends"] == "took longer than 3 s"
    assert message["leaves"] == "the process ended early"
    assert message["crashes"] == "the process died of SIGSEGV"
    assert "SyntaxError" in message["no_Python"]
    assert results["01-norm-right-hypot"][1].score == 3


def test_a_check_has_only_the_cells_above(project: Project) -> None:
    """The lesson's rules catch this by name; the harness catches what hides behind a string."""
    project.replace("assert norm([]) == 0", 'assert globals()["late"] and norm([]) == 0')
    project.replace("# %% tags", "# %%\nlate = 1\n\n# %% tags")
    assert run(project)["01-norm-reference"][2].startswith('exercise "norm": the reference answer got only 2 of 3')


def test_reference_that_fails_is_said_so(project: Project) -> None:
    project.replace("import math", "import math\n1 / 0")
    with pytest.raises(harness.AnswersError, match="ZeroDivisionError: division by zero"):
        run(project)


TENSORS = '''
# %%
import torch

# %% exercise="tools" minutes=5 difficulty=1
class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        ### BEGIN SOLUTION
        return x * self.factor
        ### END SOLUTION

    def twice(self, x):
        return self(self(x))

def shift(x, by):
    ### BEGIN SOLUTION
    return helper(x, by)
    ### END SOLUTION

### BEGIN SOLUTION
def helper(x, by):
    return x + by

threshold = 3
### END SOLUTION

# %% check="tools" points=2
### BEGIN HIDDEN TESTS
x = torch.arange(4.0)
assert torch.equal(Scale(2)(x), 2 * x), "scale"
### END HIDDEN TESTS

# %% check="tools" points=1
assert torch.equal(shift(torch.ones(2), 1), torch.full((2,), 2.0)) and threshold == 3
'''


def test_fakes_of_methods_functions_and_values(project: Project) -> None:
    start = project.text.index("\n# %% [markdown]")
    project.text = project.text[:start] + TENSORS
    results = run(project, "")
    fakes = {a.id: (a.targets, o.score, o.fake_applied) for a, o, _ in results.values() if a.targets}
    assert fakes == {
        "01-tools-fake-none": (("Scale.forward", "shift", "threshold"), 0, True),
        "01-tools-fake-zeros-Scale_forward": (("Scale.forward",), 1, True),
        "01-tools-fake-zeros-shift": (("shift",), 2, True),
        "01-tools-fake-zeros-threshold": (("threshold",), 2, True),
        "01-tools-fake-first-Scale_forward": (("Scale.forward",), 1, True),
        "01-tools-fake-first-shift": (("shift",), 2, True),
        "01-tools-fake-first-threshold": (("threshold",), 3, False),
    }
    assert results["01-tools-reference"][1].score == 3
    assert results["01-tools-stub"][1].score == 0


@pytest.mark.parametrize(("text", "message"), [
    ('# %% wrong="nrom" because="a slip"\n1\n', 'py:1: the lesson has no exercise "nrom"'),
    ('# %% wrong="norm"\n1\n', 'py:1: wrong="norm": because="…" is missing'),
    ('# %%\n1\n\n# %%\n2\n', 'py:4: a cell is marked wrong="…" or right="…"'),
    (ANSWERS + ANSWERS.split('"""\n', 1)[1], "two answers to one exercise say the same in because"),
])  # fmt: skip
def test_broken_answers_file(project: Project, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(harness.AnswersError) as caught:
        harness.collect(read_lesson(project.source), path)
    assert message in str(caught.value)


def test_too_few(project: Project, tmp_path: Path) -> None:
    lesson = read_lesson(project.source)
    answers = harness.collect(lesson, tmp_path / "none.py")
    assert harness.too_few(answers, "norm") == "0 wrong and 0 right answers, it needs at least 2 and 1"
    (tmp_path / "some.py").write_text(ANSWERS, encoding="utf-8")
    assert harness.too_few(harness.collect(lesson, tmp_path / "some.py"), "norm") == ""


def test_table() -> None:
    row = {"lesson": "01_x", "exercise": "norm", "total": 3}
    lines = harness.table([
        row | {"kind": "reference", "because": "", "score": 3, "message": "", "state": "ok"},
        row | {"kind": "right", "because": "hypot", "score": 3, "message": "", "state": "ok"},
        row | {"kind": "wrong", "because": "no root", "score": 1, "message": "must be\n5", "state": "ok"},
        row | {"kind": "wrong", "because": "lucky", "score": 3, "message": "", "state": "bad"},
        row | {"kind": "stub", "because": "", "score": 0, "message": "your turn", "state": "ok"},
        row | {"kind": "fake-first", "because": "norm", "score": 3, "message": "", "state": "skipped"},
    ], messages=True)  # fmt: skip
    assert lines[1].split() == ["01", "norm", "3", "1/2", "2/2", "1/1"]
    assert any(line.split() == ["1/3", "wrong", "no", "root:", "must", "be", "5"] for line in lines)
    assert any(line.split() == ["!", "3/3", "wrong", "lucky"] for line in lines)
    assert any(line.split() == ["skip", "fake-first", "norm"] for line in lines)
