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
    assert {name: outcome.score for name, (_, outcome, _) in results.items() if outcome.fake_applied} == {
        "01-norm-reference": 3,
        "01-norm-stub": 0,
        "01-norm-fake-none": 0,
        "01-norm-fake-zeros-norm": 0,
        "01-norm-fake-bfloat16-norm": 0,
        "01-norm-wrong-forgets_the_root": 0,  # done at its first failing check, though it would pass the second
        "01-norm-wrong-only_right_in_two_dimensions": 0,
        "01-norm-right-hypot": 3,
    }
    # It takes a list and returns a number: there is no tensor to give back, to change or to detach.
    assert {name.removeprefix("01-norm-") for name, (_, outcome, _) in results.items() if not outcome.fake_applied} == {
        "fake-first-norm",
        "fake-in-place-norm",
        "fake-detached-norm",
        "fake-generator-norm",
        "fake-row-norm",
    }
    verdicts = {name: verdict for name, (_, outcome, verdict) in results.items() if outcome.fake_applied}
    assert not any(verdicts.values()), verdicts
    assert results["01-norm-wrong-forgets_the_root"][1].message == "norm([3, 4]) must be 5; yours is 25"
    assert all(outcome.seconds > 0 for _, outcome, _ in results.values())


def test_a_wrong_answer_that_slips_through_fails(project: Project) -> None:
    project.replace("for dimension in (1, 7, 64):", "for dimension in ():")
    verdict = run(project)["01-norm-wrong-only_right_in_two_dimensions"][2]
    assert verdict == (
        'exercise "norm": the wrong answer "only right in two dimensions" got all 3 of 3 points: '
        "the checks do not catch it"
    )


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
    answers = (
        ANSWERS
        + """
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
"""
    )
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


TENSORS = """
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
"""


def fakes(project: Project, cells: str) -> dict[str, str]:
    """id → state, of the fakes of a lesson that has these cells; not of those that make no difference."""
    project.text = project.text[: project.text.index("\n# %% [markdown]")] + cells
    results = run(project, "")
    assert results["01-tools-reference"][1].score == results["01-tools-reference"][1].total
    assert results["01-tools-stub"][1].score == 0
    return {
        a.id.removeprefix("01-tools-fake-"): "lost" if o.score < o.total else "all"
        for a, o, _ in results.values()
        if a.targets and o.fake_applied
    }


def test_fakes_of_methods_functions_and_values(project: Project) -> None:
    assert fakes(project, TENSORS) == {
        "none": "lost",
        "zeros-Scale_forward": "lost",
        "zeros-shift": "lost",
        "zeros-threshold": "lost",
        "first-Scale_forward": "lost",
        "first-shift": "lost",
        "in-place-Scale_forward": "lost",
        "in-place-shift": "all",  # the check does not keep what it hands in
    }


CARELESS = """
# %%
import torch

# %% exercise="tools" minutes=5 difficulty=1
def noisy(x, generator):
    ### BEGIN SOLUTION
    return x / 3 + torch.randn(x.shape, generator=generator)
    ### END SOLUTION

# %% check="tools" points=1
x = torch.arange(12.0).view(4, 3).requires_grad_()
y = noisy(x, torch.Generator().manual_seed(0))
assert y.shape == (4, 3) and bool((y != 0).all()) and y is not x
### BEGIN HIDDEN TESTS
if {careful}:
    assert torch.equal(x, torch.arange(12.0).view(4, 3)), "changed"
    expected = x / 3 + torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(y, expected), "wrong"
    y.sum().backward()
    assert x.grad is not None
### END HIDDEN TESTS
"""


@pytest.mark.parametrize("careful", [True, False])
def test_fakes_of_careless_answers(project: Project, careful: bool) -> None:
    kinds = ("in-place", "detached", "generator", "bfloat16", "row")
    found = fakes(project, CARELESS.replace("{careful}", str(careful)))
    assert {kind: found.get(f"{kind}-noisy") for kind in kinds} == dict.fromkeys(kinds, "lost" if careful else "all")


KERNEL = """
# %%
import torch
import llm40
import triton
import triton.language as tl

# %% exercise="tools" minutes=5 difficulty=1
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, x_row, y_row, out_row, n, BLOCK: tl.constexpr):
    ### BEGIN SOLUTION
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_ptr + row * x_row + columns, mask=inside)
    y = tl.load(y_ptr + row * y_row + columns, mask=inside)
    tl.store(out_ptr + row * out_row + columns, x + y, mask=inside)
    ### END SOLUTION

# %% check="tools" points=1
def add(x, y):
    out = torch.empty(x.shape)
    add_kernel[(len(x),)](x, y, out, x.stride(0), y.stride(0), out.stride(0), x.shape[1], BLOCK=4)
    return out
### BEGIN HIDDEN TESTS
x = torch.arange(12.0).view(4, 3)
assert torch.equal(add(x, x + 1), 2 * x + 1)
wide = torch.arange(20.0).view(4, 5)[:, :3]
if {careful}:
    assert torch.equal(add(wide, x), wide + x)
    assert torch.equal(add(x, wide), wide + x)
### END HIDDEN TESTS
"""


@pytest.mark.parametrize("careful", [True, False])
def test_strides_that_no_launch_tells_apart(project: Project, careful: bool) -> None:
    pytest.importorskip("triton")
    found = fakes(project, KERNEL.replace("{careful}", str(careful)))
    assert found["strides-add_kernel"] == ("lost" if careful else "all")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('# %% wrong="nrom" because="a slip"\n1\n', 'py:1: the lesson has no exercise "nrom"'),
        ('# %% wrong="norm"\n1\n', 'py:1: wrong="norm": because="…" is missing'),
        ("# %%\n1\n\n# %%\n2\n", 'py:4: a cell is marked wrong="…" or right="…"'),
        (ANSWERS + ANSWERS.split('"""\n', 1)[1], "two answers say the same in because"),
    ],
)
def test_broken_answers_file(project: Project, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(harness.AnswersError) as caught:
        harness.collect(read_lesson(project.source), path)
    assert message in str(caught.value)


CHANGES = """
# %% wrong="norm" because="forgets the root"
- return math.sqrt(sum_of_squares)
+ return sum_of_squares

# %% right="norm" because="hypot" base="hypot"
def norm(x):
    if not x:
        return 0.0
    return math.hypot(*x)

# %% wrong="norm" of="hypot" because="a loop that keeps the last number"
      if not x:
          return 0.0
-     return math.hypot(*x)
+     for v in x:
+         length = abs(v)
+
+     return length

# %% wrong="norm" because="the mean, and of the numbers"
- sum_of_squares = sum(v * v for v in x)
+ sum_of_squares = sum(v for v in x)
- return math.sqrt(sum_of_squares)
+ return sum_of_squares / len(x)
"""


def collect(project: Project, answers: str) -> list[harness.Answer]:
    path = project.root / "01_x.py"
    path.write_text(answers, encoding="utf-8")
    return harness.collect(read_lesson(project.source), path)


def test_changes_give_whole_cells(project: Project) -> None:
    sources = {a.because: a.source for a in collect(project, CHANGES) if a.because}
    head = 'def norm(x):\n    """The length of a list of numbers."""\n'
    assert sources["forgets the root"] == head + "    sum_of_squares = sum(v * v for v in x)\n    return sum_of_squares"
    assert sources["a loop that keeps the last number"] == (
        "def norm(x):\n    if not x:\n        return 0.0\n    for v in x:\n        length = abs(v)\n\n    return length"
    )
    assert sources["the mean, and of the numbers"] == (
        head + "    sum_of_squares = sum(v for v in x)\n    return sum_of_squares / len(x)"
    )


def test_changes_are_run(project: Project) -> None:
    results = run(project, CHANGES)
    assert results["01-norm-wrong-forgets_the_root"][1].message == "norm([3, 4]) must be 5; yours is 25"
    assert results["01-norm-right-hypot"][1].score == 3
    assert not any(verdict for _, outcome, verdict in results.values() if outcome.fake_applied)


def test_windows_line_ends(project: Project) -> None:
    assert collect(project, CHANGES.replace("\n", "\r\n")) == collect(project, CHANGES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("- return sum_of_squares\n+ return 1", ":2: `return sum_of_squares` is not in the reference"),
        (
            "- sum_of_squares = sum(v * v for v in x)\n- return 1\n+ return 2",
            ":2: `sum_of_squares = sum(v * v for v in x)` and the lines after it are not in the reference",
        ),
        ("+ return 1", ":2: this hunk has no old line"),
        ("- return math.sqrt(sum_of_squares)\n+ return 1\n* x", ":4: a line of a change begins with"),
        ("- return math.sqrt(sum_of_squares)\n+ return (", ":1: the reference with this change is no Python: "),
        (
            "- return math.sqrt(sum_of_squares)\n+ return math.sqrt(sum_of_squares)",
            ":1: the change leaves the reference",
        ),
        (
            "  sum_of_squares = sum(v * v for v in x)\n- return math.sqrt(sum_of_squares)\n+ return 1\n\n"
            "- sum_of_squares = sum(v * v for v in x)\n+ sum_of_squares = 1",
            ":6: this hunk and another change the same",
        ),
    ],
)
def test_change_that_does_not_fit(project: Project, body: str, message: str) -> None:
    with pytest.raises(harness.AnswersError) as caught:
        collect(project, f'# %% wrong="norm" because="x"\n{body}\n')
    assert f"01_x.py{message}" in str(caught.value)


def test_change_of_lines_that_occur_twice(project: Project) -> None:
    last = "    return math.sqrt(sum_of_squares)"
    project.replace(last, "    if not x:\n        return 0\n    if x == [0]:\n        return 0\n" + last)
    mark = '# %% wrong="norm" because="x"\n'
    with pytest.raises(harness.AnswersError, match="`return 0` is in the reference 2 times, in lines 5, 7: add the"):
        collect(project, mark + "- return 0\n+ return 1\n")
    collected = collect(project, mark + "  if not x:\n-     return 0\n+     return 1\n")
    wrong = next(a for a in collected if a.kind == "wrong")
    assert "    if not x:\n        return 1\n    if x == [0]:\n        return 0\n" in wrong.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('# %% wrong="norm" of="hypo" because="x"\n- a\n+ b\n', ':1: no answer to "norm" has base="hypo"'),
        ('# %% wrong="norm" of="hypot" because="x"\nx = 1\n', ':1: wrong="norm": of="hypot" belongs to a change'),
        ('# %% wrong="norm" base="y" because="x"\n- a\n+ b\n', ':1: wrong="norm": base="y" belongs to a whole cell'),
        (
            '# %% wrong="norm" base="y" because="x"\n1\n\n# %% wrong="norm" base="y" because="z"\n2\n',
            ':4: two answers to "norm" have base="y"',
        ),
        ('# %% wrong="norm" becuase="x"\n1\n', ':1: wrong="norm": does not know becuase'),
        ('# %% wrong="norm" because="x"\n\n', ':1: wrong="norm": the cell is empty'),
        ('# %% wrong="norm" because=x\n1\n', ":1: a cell is marked wrong="),
    ],
)
def test_marks_of_changes(project: Project, text: str, message: str) -> None:
    with pytest.raises(harness.AnswersError) as caught:
        collect(project, text)
    assert f"01_x.py{message}" in str(caught.value)


def test_unknown_names(project: Project) -> None:
    slip = '\n# %% wrong="norm" because="a slip"\ndef norm(x):\n    return mth.hypot(*y, *x)\n'
    unknown = harness.unknown_names(read_lesson(project.source), collect(project, ANSWERS + slip))
    assert unknown == ['wrong="norm" because="a slip" reads mth, y']


def test_too_few(project: Project, tmp_path: Path) -> None:
    lesson = read_lesson(project.source)
    answers = harness.collect(lesson, tmp_path / "none.py")
    assert harness.too_few(answers, "norm") == "0 wrong and 0 right answers, it needs at least 2 and 1"
    (tmp_path / "some.py").write_text(ANSWERS, encoding="utf-8")
    assert harness.too_few(harness.collect(lesson, tmp_path / "some.py"), "norm") == ""


def test_table() -> None:
    row = {"lesson": "01_x", "exercise": "norm", "total": 3, "seconds": 8}
    lines = harness.table(
        [
            row | {"kind": "reference", "because": "", "score": 3, "message": "", "state": "ok"},
            row | {"kind": "right", "because": "hypot", "score": 3, "message": "", "state": "ok"},
            row | {"kind": "wrong", "because": "no root", "score": 1, "message": "must be\n5", "state": "ok"},
            row | {"kind": "wrong", "because": "lucky", "score": 3, "message": "", "state": "bad"},
            row | {"kind": "stub", "because": "", "score": 0, "message": "your turn", "state": "ok"},
            row | {"kind": "fake-row", "because": "norm", "score": 3, "message": "", "state": "open"},
            row | {"kind": "fake-first", "because": "norm", "score": 3, "message": "", "state": "skipped"},
        ],
        messages=True,
    )
    assert lines[1].split() == ["01", "norm", "3", "1/2", "2/2", "1/2"]
    assert any(line.split() == ["lost", "wrong", "no", "root:", "must", "be", "5"] for line in lines)
    assert any(line.split() == ["!", "3/3", "wrong", "lucky"] for line in lines)
    assert any(line.split() == ["?", "3/3", "fake-row", "norm"] for line in lines)
    assert not any("fake-first" in line for line in lines)
    assert lines[-1].split() == ["01_x", "56.0", "s", "of", "one", "core,", "over", "the", "budget", "of", "45", "s"]
