"""A lesson whose checks use every idiom of the course, and ways to hand in something bent.

Every wrong answer fails every check of its exercise, so that a point for it is a point stolen. What only hidden tests
know is WATCHWORD: it stands in their code, and no learner's function is ever given it.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from box import LIMITS

from autograder import build
from autograder.grading.grade import SEED
from autograder.grading.masters import make_sent_master
from autograder.grading.rebuild import read_name, read_role
from autograder.grading.task import Check, Result, Task, grade_task
from autograder.kernels.manager import Kernels
from autograder.lesson import read_lesson, remove_hidden

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "builder"), str(TESTS / "grading")]  # the tiny lessons are theirs

import tiny_course  # noqa: E402

STAGE, LESSON = tiny_course.KEY.split("/")
KERNELS = Kernels()
WATCHWORD = "swordfish-4711"

TEXT = """
# %%
import math

import torch
import torch.nn.functional as F
from torch import nn

from llm40 import checks

# %% exercise="scale" minutes=5 difficulty=1
def scale(x, factor):
    ### BEGIN SOLUTION
    if factor <= 0:
        raise ValueError(f"the factor must be positive, it is {factor}")
    return x * factor
    ### END SOLUTION

# %% check="scale" points=2
x = torch.tensor([1.0, -2.0, 3.0])
with checks.unchanged(x=x):
    result = scale(x, 3.0)
checks.close(result, torch.tensor([3.0, -6.0, 9.0]), what="scale(x, 3)", mistakes={"a sum": x + 3.0})
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
g = checks.generator(1)
for shape in [(2, 3), (4,)]:
    x = checks.randn(*shape, generator=g)
    with checks.unchanged(x=x):
        result = scale(x, 2.5)
    checks.close(result, x.double() * 2.5, what="scale(x, 2.5)")
### END HIDDEN TESTS

# %% check="scale" points=1
checks.gradients(lambda x: scale(x, 2.0), lambda x: 2.0 * x, torch.tensor([1.0, 5.0]), names=["x"])
### BEGIN HIDDEN TESTS
checks.gradients(lambda x: scale(x, 0.5), lambda x: x / 2, checks.randn(3, 2, generator=checks.generator(2)))
### END HIDDEN TESTS

# %% check="scale" points=1
checks.raises(ValueError, scale, torch.ones(2), -1.0, because="No factor is negative.", mentions="-1")
### BEGIN HIDDEN TESTS
checks.raises(ValueError, scale, torch.ones(2), 0.0)
### END HIDDEN TESTS

# %% exercise="probabilities" minutes=5 difficulty=2
def probabilities(scores):
    ### BEGIN SOLUTION
    powers = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return powers / powers.sum(-1, keepdim=True)
    ### END SOLUTION

# %% check="probabilities" points=2
scores = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
with checks.forbidden("softmax", "log_softmax"):
    result = probabilities(scores)
torch.testing.assert_close(result, torch.softmax(scores, -1))
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
scores = torch.randn(4, 5, generator=checks.generator(3))
with checks.forbidden("softmax", "log_softmax"):
    result = probabilities(scores)
torch.testing.assert_close(result, F.softmax(scores, dim=-1))
### END HIDDEN TESTS

# %% check="probabilities" points=1
scores = torch.tensor([3.0, 1.0, 2.0])
expected = torch.softmax(scores, -1)
with checks.forbidden("softmax", "log_softmax"):
    result = probabilities(scores)
assert torch.allclose(result, expected), f"yours is {result}"
### BEGIN HIDDEN TESTS
expected = torch.softmax(10 * scores, -1)
with checks.forbidden("softmax", "log_softmax"):
    result = probabilities(10 * scores)
assert torch.allclose(result, expected)
### END HIDDEN TESTS

# %% check="probabilities" points=1
with checks.forbidden("softmax", "log_softmax"):
    result = probabilities(torch.tensor([1.0, 2.0]))
assert abs(result.sum().item() - 1) < 1e-6, "probabilities sum to 1"

# %% exercise="visible" minutes=5 difficulty=1
def visible(q_len, k_len):
    ### BEGIN SOLUTION
    return torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len
    ### END SOLUTION

# %% check="visible" points=2
mask = visible(2, 3)
assert getattr(mask, "dtype", None) == torch.bool, "a mask is boolean"
assert torch.equal(mask, torch.tensor([[True, True, False], [True, True, True]]))
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
mask = visible(4, 4)
assert torch.equal(mask, torch.ones(4, 4).tril().bool())
### END HIDDEN TESTS

# %% check="visible" points=1
checks.close(visible(1, 2), torch.tensor([[True, True]]), what="visible(1, 2)")
### BEGIN HIDDEN TESTS
for q_len, k_len in [(3, 3), (2, 5)]:
    expected = torch.tensor([[j <= i + k_len - q_len for j in range(k_len)] for i in range(q_len)])
    checks.close(visible(q_len, k_len), expected, what=f"visible({q_len}, {k_len})")
### END HIDDEN TESTS

# %% exercise="count" minutes=5 difficulty=1
def count(words):
    ### BEGIN SOLUTION
    return len(words)
    ### END SOLUTION

# %% check="count" points=2
assert count(["a", "b", "c"]) == 3, f"three words; yours is {count(['a', 'b', 'c'])}"
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
import random

rng = random.Random(checks.seed())
for _ in range(3):
    words = ["word"] * rng.randint(4, 1000)
    assert count(words) == len(words)
### END HIDDEN TESTS

# %% check="count" points=1
number = count(["a", "b"])
assert isinstance(number, int), f"a whole number is asked for; yours is {number!r}"
checks.close(number, 2, what="the number of words")
### BEGIN HIDDEN TESTS
answer = count(["a"] * 7)
assert isinstance(answer, int)
assert answer == 7
### END HIDDEN TESTS

# %% exercise="mean" minutes=5 difficulty=1
def mean(numbers):
    ### BEGIN SOLUTION
    return sum(numbers) / len(numbers)
    ### END SOLUTION

# %% check="mean" points=2
value = mean([1.0, 2.0])
assert math.isclose(value, 1.5, rel_tol=1e-9), f"yours is {value}"
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
value = mean([0.1, 0.5, 4.2])
assert math.isclose(value, 1.6)
### END HIDDEN TESTS

# %% check="mean" points=1
value = mean([1.0, 2.0])
assert abs(value - 1.5) < 1e-9, "the mean of 1 and 2"
### BEGIN HIDDEN TESTS
from fractions import Fraction

for numbers in ([1, 2, 4], [10, 1]):
    value = mean(numbers)
    assert abs(value - float(Fraction(sum(numbers), len(numbers)))) < 1e-9
### END HIDDEN TESTS

# %% exercise="order" minutes=5 difficulty=2
def order(before):
    ### BEGIN SOLUTION
    done = []
    while len(done) < len(before):
        done.append(next(task for task in before if task not in done and set(before[task]) <= set(done)))
    return done
    ### END SOLUTION

# %%
def same(found, expected):
    return len(found) == len(expected) and all(a == b for a, b in zip(found, expected, strict=True))

# %% check="order" points=2
assert order({"c": ["b"], "a": [], "b": ["a"]}) == ["a", "b", "c"], "first what nothing stands before"
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
from graphlib import TopologicalSorter

chain = {"d": ["c"], "b": ["a"], "c": ["b"], "a": []}
assert order(chain) == list(TopologicalSorter(chain).static_order())
### END HIDDEN TESTS

# %% check="order" points=1
assert same(order({"b": ["a"], "a": []}), ["a", "b"]), "first what nothing stands before"
### BEGIN HIDDEN TESTS
assert same(expected=["a", "b", "c"], found=order({"a": [], "c": ["a", "b"], "b": ["a"]}))
### END HIDDEN TESTS

# %% exercise="table" minutes=5 difficulty=1
def table(words):
    ### BEGIN SOLUTION
    counted = {}
    for word in words:
        counted[word] = counted.get(word, 0) + 1
    return counted
    ### END SOLUTION

# %% check="table" points=2
assert table(["a", "b", "a"]) == {"a": 2, "b": 1}, f"yours is {table(['a', 'b', 'a'])}"
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
from collections import Counter

words = "the cat and the dog and the mouse".split()
assert table(words) == dict(Counter(words))
### END HIDDEN TESTS

# %% exercise="letter" minutes=5 difficulty=1
def letter():
    ### BEGIN SOLUTION
    return "b"
    ### END SOLUTION

# %% check="letter" points=1
answer = letter()
assert answer in ("a", "b", "c"), f"the answer is one of 'a', 'b', 'c'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
assert str(answer) == "b", "read again"
### END HIDDEN TESTS

# %% exercise="slope" minutes=5 difficulty=3
def slope(f, x):
    ### BEGIN SOLUTION
    at = x.clone().requires_grad_()
    return torch.autograd.grad(f(at).sum(), at)[0]
    ### END SOLUTION

# %% check="slope" points=2
at = torch.linspace(-1, 1, 5, dtype=torch.float64)
expected = 3 * at**2
result = slope(lambda t: t**3, at)
checks.close(result, expected, what="the slope of x³", rtol=1e-6)
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"


def case(power):
    expected = power * at ** (power - 1)
    seen = []

    def f(t):
        seen.append((t.dtype, expected.dtype))
        return t**power

    return f, expected, seen


for power in (2, 5):
    f, expected, seen = case(power)
    checks.close(slope(f, at), expected, what=f"the slope of x to the power of {power}")
    assert set(seen) == {(torch.float64, torch.float64)}, "f was not called, or not in float64"
### END HIDDEN TESTS

# %% exercise="affine" minutes=9 difficulty=3
class Affine(nn.Module):
    def __init__(self, inputs, outputs):
        ### BEGIN SOLUTION
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return x @ self.weight.T + self.bias
        ### END SOLUTION

    @classmethod
    def like(cls, other):
        ### BEGIN SOLUTION
        made = cls(other.weight.shape[1], other.weight.shape[0])
        made.load_state_dict(other.state_dict())
        return made
        ### END SOLUTION

# %% check="affine" points=2
layer = Affine(2, 3)
assert isinstance(layer, nn.Module), "a layer is an nn.Module"
assert sum(p.numel() for p in layer.parameters()) == 9, "weights and biases"
checks.close(layer(torch.ones(4, 2)), torch.full((4, 3), 2.0), what="Affine(2, 3) of ones, before training,")
### BEGIN HIDDEN TESTS
watchword = "swordfish-4711"
g = checks.generator(4)
with torch.no_grad():
    layer.weight.copy_(torch.randn(3, 2, generator=g))
    layer.bias.copy_(torch.randn(3, generator=g))
x = torch.randn(5, 2, generator=g)
checks.close(layer(x), F.linear(x, layer.weight, layer.bias), what="Affine(2, 3)")
### END HIDDEN TESTS

# %% check="affine" points=1
layer = Affine(2, 2)
other = Affine.like(layer)
assert isinstance(other, Affine), "like() makes another Affine"
assert other is not layer, "like() makes another one"
### BEGIN HIDDEN TESTS
with torch.no_grad():
    layer.weight.mul_(3.0)
again = Affine.like(layer)
assert isinstance(again, Affine)
assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
### END HIDDEN TESTS
"""

# Every one fails every check of its exercise.
WRONG = {
    "scale": "def scale(x, factor):\n    return x + factor\n",
    "probabilities": "def probabilities(scores):\n    return scores\n",
    "visible": "def visible(q_len, k_len):\n    return torch.zeros(q_len, k_len).bool()\n",
    "count": "def count(words):\n    return -1\n",
    "mean": "def mean(numbers):\n    return 0.0\n",
    "order": "def order(before):\n    return sorted(before, reverse=True)\n",
    "table": "def table(words):\n    return {}\n",
    "letter": "def letter():\n    return 'c'\n",
    "slope": "def slope(f, x):\n    f(x)\n    return x\n",
    "affine": (
        "class Affine(nn.Linear):\n    def __init__(self, *sizes):\n        super().__init__(1, 1)\n\n"
        "    def forward(self, x):\n        return x\n\n"
        "    @classmethod\n    def like(cls, other):\n        return other\n"
    ),
}
EVERYTHING = tuple(WRONG)


# --- the notebooks --------------------------------------------------------------------------------------------


def source() -> str:
    """The lesson as authors' `make course` leaves it in build/source: answers and hidden tests in place."""
    return built(TEXT)


@functools.cache
def built(text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        project = tiny_course.Project(Path(folder))
        project.text = tiny_course.HEADER + text
        return build.dumps(build.make_master(read_lesson(project.source), project.layout))


def build_source(folder: Path) -> Path:
    """A folder like build/source with this lesson."""
    path = folder / "source" / STAGE / f"{LESSON}.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(source(), encoding="utf-8")
    return folder / "source"


def find(notebook: nbformat.NotebookNode, label: str) -> int:
    return next(i for i, cell in enumerate(notebook.cells) if read_name(cell) == label)


def answered(wrong: dict[str, str] | None = None, first: str = "", last: str = "") -> nbformat.NotebookNode:
    """The learner's notebook, right but for what is given by name.

    `first` is a cell of the learner's own above the first exercise, `last` one at the end.
    """
    notebook = nbformat.reads(source(), as_version=4)
    for cell in notebook.cells:
        cell.source = (wrong or {}).get(read_name(cell)) or remove_hidden(cell.source)
    if first:
        notebook.cells.insert(find(notebook, "scale"), nbformat.v4.new_code_cell(first))
    if last:
        notebook.cells.append(nbformat.v4.new_code_cell(last))
    return notebook


def dumps(notebook: nbformat.NotebookNode) -> bytes:
    return json.dumps(notebook).encode()


# --- the verdict ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cheat:
    """A wrong submission and its trick: in a cell of the learner's own, in an answer, or both.

    `at` are the exercises that are wrong, with the answers of WRONG where `answers` has no other.
    """

    at: tuple[str, ...] | str
    first: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    last: str = ""

    @property
    def wrong(self) -> tuple[str, ...]:
        return (self.at,) if isinstance(self.at, str) else self.at

    def submission(self) -> nbformat.NotebookNode:
        wrong = {label: WRONG[label] for label in self.wrong} | self.answers
        return answered(wrong, self.first, self.last)


def graded(submission: nbformat.NotebookNode | bytes, student: str = "mallory") -> Result:
    master = nbformat.writes(make_sent_master(nbformat.reads(source(), as_version=4))).encode()
    data = submission if isinstance(submission, bytes) else dumps(submission)
    return grade_task(Task(student, STAGE, LESSON, data, master, LIMITS, SEED, KERNELS))


def nothing_gained(result: Result, wrong: Iterable[str]) -> None:
    """No check of a wrong exercise gives a point, whatever the trick."""
    assert result.status != "fault", result.traceback
    judged = [check for check in result.checks if check.exercise in wrong]
    assert judged
    gained = {check.check: (check.status, check.score) for check in judged if check.score or check.status == "passed"}
    assert gained == {}, f"points without a right answer: {gained}; flags: {result.flags}"


def full_marks(result: Result) -> None:
    """Everything passed, and nobody is suspected of anything."""
    lost = [(check.check, check.status, check.message) for check in result.checks if check.status != "passed"]
    assert (result.status, lost, result.flags) == ("graded", [], []), f"{lost} {result.flags} {result.traceback}"
    assert result.score == result.max_score


def outputs(result: Result, *roles: str) -> str:
    """What cells with these roles have as output in the executed notebook, as one text."""
    cells = nbformat.reads(result.notebook.decode(), as_version=4).cells
    return "\n".join(json.dumps(cell.get("outputs", [])) for cell in cells if read_role(cell) in roles)


def kept_secret(result: Result) -> None:
    """Nothing that a learner is shown has a hidden test's text: their cells' outputs, and the checks' messages."""
    shown = outputs(result, "added", "exercise") + "\n".join(check.message for check in result.checks)
    place = shown.find(WATCHWORD)  # and not `in`: pytest would set out to explain a failure in a text of megabytes
    assert place < 0, shown[max(0, place - 300) :][:600]


def statuses(checks: Iterable[Check]) -> dict[str, str]:
    return {check.check: check.status for check in checks}
