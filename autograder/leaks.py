"""Finds answers and hidden tests that a learner's notebook would give away."""

import io
import json
import tokenize

from autograder import lesson
from autograder.lesson import Cell, Lesson


def find_leaks(read: Lesson, learners: str) -> list[str]:
    """A line for each answer or hidden test that is still in the learner's notebook: each is a bug."""
    where = lesson.shown_path(read.path)
    problems = []
    text = "\n"
    for cell in json.loads(learners)["cells"]:
        source = "".join(cell["source"])
        text += "\n".join([*split_statements(source), "\0\n"])
        if cell.get("outputs"):
            problems.append(f"{where}:1: file: the learner's notebook has outputs")
        for marker in ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"):
            if marker in source:
                problems.append(f"{where}:1: file: `{marker}` is left in the learner's cell {cell['id']}")
    for cell in read.cells:
        told = next((run for run in find_telling_lines(cell) if "\n".join(["", *run, ""]) in text), None)
        if told:
            what = "hidden tests" if cell.role == "check" else "answer"
            problems.append(
                f"{where}:{cell.line}: {cell.label}: its {what} can be read elsewhere in the "
                f"learner's notebook: `{told[0]}` …"
            )
    return problems


def split_statements(source: str) -> list[str]:
    """A cell's statements and comments, each on one line however it was wrapped; where it is no Python, its lines."""
    plain = [line.strip() for line in source.split("\n") if line.strip()]
    statements, parts = [], []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
            if token.type == tokenize.NEWLINE or (token.type == tokenize.COMMENT and not parts):
                statements.append(" ".join([*parts, token.string]).strip())
                parts = []
            elif token.string.strip() and token.type != tokenize.COMMENT:
                if token.string in ")]}" and parts and parts[-1] == ",":
                    parts.pop()
                parts.append(token.string)
    except (tokenize.TokenError, SyntaxError):
        return plain
    return statements


# The lines of every training loop in PyTorch: no secret.
TRAINING_STEP = set(
    split_statements("optimizer.zero_grad()\nloss.backward()\noptimizer.step()\nlosses.append(loss.item())")
)


def find_telling_lines(cell: Cell) -> list[list[str]]:
    """Runs of statements that give a cell's secret away.

    Of an answer any three in a row; of hidden tests only the whole, since a visible test may well be set up in
    the same way. Less than 30 characters are no secret: `return x` stands everywhere; nor are TRAINING_STEP's lines.
    """
    found = []
    for secret in lesson.secrets(cell):
        lines = split_statements(secret)
        whole = cell.role == "check" or len(lines) <= 3
        found += [lines] if whole else [lines[i : i + 3] for i in range(len(lines) - 2)]
    return [run for run in found if len("".join(run)) >= 30 and not TRAINING_STEP.issuperset(run)]
