"""Reads a file of answers: whole cells, and changes to the reference or to another answer.

A change is written as in a diff: `- ` before an old line, `+ ` before a new one, two spaces before one that stays.
A hunk ends at an empty line, or where `- ` follows `+ `. The old lines of a hunk occur exactly once in what is changed;
indentation that all lines of a hunk share may be left out. CONTRIBUTING.md shows it.
"""

import ast
import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from autograder import lesson as lessons

KINDS = ("wrong", "right")
MARKS = (*KINDS, "because", "base", "of")


class AnswersError(Exception):
    """The answers file, or the reference that it is measured against, is unusable."""


@dataclass(frozen=True)
class Written:
    """One answer of a file."""

    kind: str  # "wrong" or "right"
    exercise: str
    because: str
    base: str  # a name by which other answers can change this one
    of: str  # the name of the answer that this one changes; empty for the reference
    source: str
    line: int  # of the cell's mark in the file, from 1


@dataclass
class Hunk:
    line: int  # of its first line within the change, from 1
    lines: list[tuple[str, str]]  # (sign, text)


class ChangeError(ValueError):
    """A change does not fit what it changes; `line` is that of the hunk within the change, from 1."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def read_answers(path: Path, references: dict[str, str]) -> list[Written]:
    """The answers of a file, every `source` a whole cell of Python.

    references: the source of each exercise's cell, by the exercise's name.
    Raises AnswersError, with one line for every answer that cannot be read.
    """
    where = "/".join(path.parts[-4:])
    written, problems = [], []
    for marks, source, line in _cells(lessons.read_text(path)):
        try:
            written += _answer(marks, source, line, references)
        except ValueError as error:
            problems.append(f"{where}:{line}: {error}")

    named: dict[tuple[str, str], str] = {}
    for a in written:
        if (a.exercise, a.base) in named:
            problems.append(f'{where}:{a.line}: two answers to "{a.exercise}" have base="{a.base}"')
        elif a.base:
            named[a.exercise, a.base] = a.source

    whole = []
    for a in written:
        if not is_change(a.source):
            whole.append(a)
        elif a.of and (a.exercise, a.of) not in named:
            problems.append(f'{where}:{a.line}: no answer to "{a.exercise}" has base="{a.of}"')
        else:
            old = named[a.exercise, a.of] if a.of else without_markers(references[a.exercise])
            try:
                whole.append(replace(a, source=changed(old, a.source, a.of or "the reference")))
            except ChangeError as error:
                problems.append(f"{where}:{a.line + error.line}: {error}")
    if problems:
        raise AnswersError("\n".join(problems))
    return whole


def _cells(text: str) -> list[tuple[str, str, int]]:
    """(marks, source, line of the mark) of each cell; not read by Jupytext, since a change is no Python."""
    found = list(re.finditer(r"^# ?%%(.*)$", text, re.MULTILINE))
    bounds = [m.start() for m in found] + [len(text)]
    return [
        (m[1].strip(), text[m.end() + 1 : end].rstrip(), text.count("\n", 0, m.start()) + 1)
        for m, end in zip(found, bounds[1:], strict=True)
    ]


def _answer(marks: str, source: str, line: int, references: dict[str, str]) -> list[Written]:
    """The answer of one cell, or none where the cell is prose; raises ValueError with a sentence."""
    if marks.startswith("[markdown]"):
        return []
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*")', marks)
    given = {name: json.loads(value) for name, value in pairs}
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) != 1 or " ".join(f"{name}={value}" for name, value in pairs) != " ".join(marks.split()):
        raise ValueError('a cell is marked wrong="…" or right="…", with because="…"')
    (kind,) = kinds
    mark = f'{kind}="{given[kind]}"'
    if given[kind] not in references:
        raise ValueError(f'the lesson has no exercise "{given[kind]}"')
    if unknown := given.keys() - set(MARKS):
        raise ValueError(f"{mark}: does not know {', '.join(sorted(unknown))}: only {', '.join(MARKS)}")
    if not given.get("because"):
        raise ValueError(f'{mark}: because="…" is missing')
    if not source.strip():
        raise ValueError(f"{mark}: the cell is empty")
    if "of" in given and not is_change(source):
        raise ValueError(f'{mark}: of="{given["of"]}" belongs to a change, whose lines begin with `- ` and `+ `')
    if "base" in given and is_change(source):
        raise ValueError(f'{mark}: base="{given["base"]}" belongs to a whole cell, and this is a change')
    return [Written(kind, given[kind], given["because"], given.get("base", ""), given.get("of", ""), source, line)]


def without_markers(source: str) -> str:
    """A reference cell as changes see it: without the lines that mark its solution."""
    markers = (lessons.BEGIN_SOLUTION, lessons.END_SOLUTION)
    return "\n".join(line for line in source.split("\n") if line.strip() not in markers)


def is_change(source: str) -> bool:
    """Whether a cell's text is a change: no Python cell begins with `- `, `+ ` or an indented line."""
    return bool(re.match(r"[-+]( |$)|  ", source.lstrip("\n"), re.MULTILINE))


def changed(old: str, change: str, name: str) -> str:
    """The text after a change. name: what `old` is called in errors.

    Raises ChangeError where a hunk does not fit, or the result is no Python.
    """
    old_lines = old.split("\n")
    edits = []
    for hunk in _hunks(change):
        start, indent = _place(old_lines, hunk, name)
        kept = [text for sign, text in hunk.lines if sign != "+"]
        new = [indent + text if text else "" for sign, text in hunk.lines if sign != "-"]
        edits.append((start, start + len(kept), new, hunk.line))
    edits.sort(key=lambda edit: edit[:2])
    for (_, end, _, above), (start, _, _, below) in pairwise(edits):
        if start < end:
            raise ChangeError(max(above, below), f"this hunk and another change the same line of {name}: make them one")
    for start, end, new, _ in reversed(edits):
        old_lines[start:end] = new
    source = "\n".join(old_lines)
    if source == old:
        raise ChangeError(0, f"the change leaves {name} as it is")
    try:
        ast.parse(lessons.python_of(source))
    except SyntaxError as error:
        raise ChangeError(0, f"{name} with this change is no Python: {error.msg}: {error.text}") from None
    return source


def _hunks(change: str) -> list[Hunk]:
    hunks: list[Hunk] = []
    before = ""  # the sign of the line before, empty where a hunk has to begin
    for number, line in enumerate(change.split("\n"), 1):
        sign, gap, text = line[:1], line[1:2], line[2:].rstrip()
        if not line.strip():
            before = ""
            continue
        if sign not in "-+ " or gap.strip():
            raise ChangeError(number, f"a line of a change begins with `- `, `+ ` or two spaces, this one is `{line}`")
        if not before or (before == "+" and sign == "-"):
            hunks.append(Hunk(number, []))
        hunks[-1].lines.append((sign, text))
        before = sign
    return hunks


def _place(lines: list[str], hunk: Hunk, name: str) -> tuple[int, str]:
    """Where a hunk's old lines stand in the text, and the indentation that the hunk leaves out."""
    old = [text for sign, text in hunk.lines if sign != "+"]
    first = next((i for i, text in enumerate(old) if text), None)
    if first is None:
        raise ChangeError(hunk.line, "this hunk has no old line: begin with the one above it, after two spaces")
    found = []
    for start in range(len(lines) - len(old) + 1):
        line = lines[start + first]
        indent = line[: len(line) - len(old[first])]
        if indent.strip():
            continue
        if all(lines[start + i].rstrip() == (indent + text if text else "") for i, text in enumerate(old)):
            found.append((start, indent))
    if not found:
        are = "and the lines after it are" if len(old) > 1 else "is"
        raise ChangeError(hunk.line, f"`{old[first].strip()}` {are} not in {name}")
    if len(found) > 1:
        at = ", ".join(str(start + 1) for start, _ in found)
        raise ChangeError(
            hunk.line,
            f"`{old[first].strip()}` is in {name} {len(found)} times, in lines {at}: "
            "add the line before or after it, after two spaces",
        )
    return found[0]
