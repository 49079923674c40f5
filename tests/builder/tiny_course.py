"""A project in a folder of its own, with one tiny lesson that needs no PyTorch."""

from pathlib import Path

from autograder.build import Layout

KEY = "stage1_foundations/01_high_dimensional_intuition"

HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: "Lengths of vectors."
#     gpu: "Nothing more."
# ---
"""

BODY = '''
# %% [markdown]
# ## Core ideas
# A vector has a **length**.

# %%
import math

# %% exercise="norm" minutes=5 difficulty=2
def norm(x):
    """The length of a list of numbers."""
    ### BEGIN SOLUTION
    sum_of_squares = sum(v * v for v in x)
    return math.sqrt(sum_of_squares)
    ### END SOLUTION

# %% [markdown]
# <details><summary>Hint: which function?</summary>
# The square root of a sum of squares.
# </details>

# %% check="norm" points=2
assert norm([3, 4]) == 5, f"norm([3, 4]) must be 5; yours is {norm([3, 4])}"
### BEGIN HIDDEN TESTS
for dimension in (1, 7, 64):
    ones = [1.0] * dimension
    assert abs(norm(ones) - math.sqrt(dimension)) < 1e-9, "a vector of ones has length √d"
### END HIDDEN TESTS

# %% check="norm" points=1
assert norm([]) == 0, "no numbers: length 0"

# %% tags=["experiment"]
lengths = [norm([1.0] * d) for d in range(10)]

# %% [markdown]
# ## Key questions
# **Why √d?** Write your answer below.

# %% [markdown] answer="why-root"
# Because the squares of d independent coordinates add up.

# %% [markdown]
# ## References
# - Somebody 2017, A paper, arXiv:1706.03762. All of it.
'''


class Project:
    """A course of one lesson; `text` is its source."""

    def __init__(self, root: Path):
        self.root = root
        self.layout = Layout(root)
        self.source = root / "solutions" / f"{KEY}.py"
        self.learners = root / "course" / f"{KEY}.ipynb"
        self.master = root / "build" / "source" / f"{KEY}.ipynb"
        self.source.parent.mkdir(parents=True)
        self.text = HEADER + BODY

    @property
    def text(self) -> str:
        return self.source.read_text(encoding="utf-8")

    @text.setter
    def text(self, value: str) -> None:
        self.source.write_text(value, encoding="utf-8", newline="\n")

    def replace(self, old: str, new: str) -> None:
        assert self.text.count(old) >= 1, f"the tiny lesson has no {old!r}"
        self.text = self.text.replace(old, new, 1)

    def files(self) -> dict[str, bytes]:
        """Every file below course/ and build/, by its path."""
        folders = (self.root / "course", self.root / "build")
        return {
            p.relative_to(self.root).as_posix(): p.read_bytes()
            for folder in folders
            for p in folder.rglob("*")
            if p.is_file()
        }
