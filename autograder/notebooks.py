"""A lesson, or a page of prose, becomes a notebook.

How those who read the notebooks tell the cells apart:

    exercise    nbgrader: solution, grade_id `sdpa`   first line `# Exercise 3 (sdpa) · ●●○ · 15 min · core`
    check       nbgrader: grade, locked, points, `sdpa-check-1`   first line `# Check 3a (sdpa) · 2 points`
    experiment  tag `experiment`, of a figure also `figure`
    support     tag `support`: a given cell that only checks use
    setup       metadata.llm40.role `setup`: the first code cell, which says what to do where `llm40` is missing
    answer      metadata.llm40.role `answer`, id `answer-…` (nbgrader has no cell for prose that nobody grades)

Checks, support cells and figures are folded: JupyterLab shows their first line.

A learner's notebook has a seal, metadata.llm40.seal: the hash of its cells' text as the builder wrote it. So everyone
can tell which build a copy was made from, and whether a notebook is still as some build made it.
"""

import hashlib
import json
import re
import tomllib
from functools import partial

from autograder import lesson
from autograder.layout import ROOT, Layout
from autograder.lesson import Cell, Lesson
from autograder.templating import render

SETUP = """\
# Setup: is the course's library here?
from importlib.util import find_spec

if find_spec("llm40") is None or find_spec("torch") is None:
    found = __import__("os").path.exists("../../llm40/profile.py")
    source = '"../.."' if found else '"llm40 @ git+{repository}"'
    raise ModuleNotFoundError(
        "the course's library is not in this kernel. Run the following line in a cell of its own, "
        f"then restart the kernel:  %pip install -q {{source}}"
    )"""
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def make_master(read: Lesson, layout: Layout) -> dict:
    """The instructor's notebook, as nbformat 4.5's JSON."""
    opening = {
        "cell_type": "markdown",
        "id": "opening",
        "metadata": {"deletable": False, "editable": False},
        "source": write_opening(read, layout),
    }
    core, whole = read.minutes
    prose = number_prose(read)
    return {
        "cells": [opening, _make_setup(), *(_make_cell(cell, prose.get(cell.id, cell.source)) for cell in read.cells)],
        "metadata": {
            "kernelspec": KERNELSPEC,
            "language_info": {"name": "python"},
            "llm40": {
                "lesson": read.entry.key,
                "title": read.entry.title,
                "minutes": {"core": core, "whole": whole},
            },
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _make_setup() -> dict:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "cell_type": "code",
        "id": "setup",
        "metadata": {
            "deletable": False,
            "editable": False,
            "jupyter": {"source_hidden": True},
            "llm40": {"role": "setup"},
        },
        "source": SETUP.format(repository=project["urls"]["Repository"]),
        "execution_count": None,
        "outputs": [],
    }


def _make_cell(cell: Cell, source: str) -> dict:
    metadata: dict = {}
    if cell.role == "exercise":
        kind = "questions · " if cell.questions else ""
        facts = f"{kind}{format_difficulty(cell.difficulty)} · {cell.minutes:g} min · {cell.path}"
        source = f"# Exercise {cell.number} ({cell.name}) · {facts}\n{source}"
        metadata["nbgrader"] = _mark_for_nbgrader(cell, solution=True)
        metadata["llm40"] = {"path": cell.path}
    elif cell.role == "check":
        points = f"{cell.points:g} point{'' if cell.points == 1 else 's'}"
        source = f"# Check {cell.number} ({cell.name}) · {points}\n{source}"
        metadata["nbgrader"] = _mark_for_nbgrader(cell, grade=True, locked=True, points=cell.points)
    elif cell.role == "experiment":
        metadata["tags"] = ["experiment", "figure"] if cell.figure else ["experiment"]
    elif cell.support:
        metadata["tags"] = ["support"]
    elif cell.role == "answer":
        source = f"<!-- BEGIN SOLUTION -->\n{source}\n<!-- END SOLUTION -->"
        metadata["llm40"] = {"role": "answer"}
    if cell.role == "check" or cell.support or cell.figure:
        metadata["jupyter"] = {"source_hidden": True}  # JupyterLab shows the first line of it
    source = source.replace("  # fmt: skip", "")  # said to the authors' formatter
    made = {"cell_type": cell.kind, "id": cell.id, "metadata": metadata, "source": source}
    if cell.kind == "code":
        made |= {"execution_count": None, "outputs": []}
    return made


def _mark_for_nbgrader(cell: Cell, **marks) -> dict:
    return {
        "cell_type": "code",
        "grade": False,
        "grade_id": cell.id,
        "locked": False,
        "schema_version": 3,
        "solution": False,
        "task": False,
        **marks,
    }


def format_difficulty(difficulty: int) -> str:
    return "●" * difficulty + "○" * (3 - difficulty)


def format_minutes(minutes: int) -> str:
    """`2 h 30 min`"""
    parts = [f"{minutes // 60} h" if minutes >= 60 else "", f"{minutes % 60} min" if minutes % 60 else ""]
    return " ".join(filter(None, parts))


def write_opening(read: Lesson, layout: Layout) -> str:
    """The lesson's first cell: what, how long, after which lessons, on which machine, and the contents."""
    requires = []
    for entry in lesson.find_prerequisites(read.entry):
        name = f"{entry.number:02} {entry.title}"
        written = layout.find_source(entry).is_file()
        requires.append(f"[{name}](../{entry.key}.ipynb)" if written else name)
    points = sum(cell.points for cell in read.cells)
    core, whole = read.minutes
    return render(
        "opening.md.j2",
        entry=read.entry,
        header=read.header,
        core=format_minutes(core),
        whole=format_minutes(whole) if whole > core else "",
        exercises=len(read.exercises),
        core_exercises=sum(cell.path == "core" for cell in read.exercises),
        points=f"{points:g}, from {sum(c.role == 'check' for c in read.cells)} checks",
        requires=", ".join(requires),
        contents=_list_contents(read),
    ).strip()


def _list_contents(read: Lesson) -> list[str]:
    lines = []
    for number, section in enumerate(read.sections[1:], 1):
        numbers = [cell.number for cell in section.exercises]
        exercises = f" · exercise{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" if numbers else ""
        lines.append(f"[{number}. {section.title}](#{section.label}){exercises}{' (more)' if section.more else ''}")
    return lines


def number_prose(read: Lesson) -> dict[str, str]:
    """The text of the Markdown cells by the cell's id, with what the builder adds to it.

    Headings of sections get a number and an anchor, those of exercises (`### Exercise · Tiling`) the number of the
    exercise that follows; `[](#tiling)` becomes the number of the section or exercise that it names, and an arXiv
    number a link.
    """
    sections = enumerate(read.sections[1:], 1)
    names = {section.label: f"[section {number}](#{section.label})" for number, section in enumerate(read.sections)}
    names |= {cell.name: f"exercise {cell.number}" for cell in read.exercises}
    coming = [cell.number for cell in read.exercises]
    prose = {}
    for cell in read.cells:
        if cell.role == "exercise":
            coming.pop(0)
        if cell.kind != "markdown":
            continue
        lines = cell.source.split("\n")
        if cell.role != "answer":
            for index, _ in lesson.headings(cell.source, 2):
                number, section = next(sections)
                lines[index] = f'## <a id="{section.label}"></a>{number}. {section.title}'
            for index, text in lesson.headings(cell.source, 3):
                if coming and text.startswith("Exercise ·"):
                    lines[index] = f"### Exercise {coming[0]} ·{text.removeprefix('Exercise ·')}"
        prose[cell.id] = link_arxiv(lesson.LINK.sub(partial(_resolve, names), "\n".join(lines)))
    return prose


def _resolve(names: dict[str, str], link: re.Match) -> str:
    """`[section 3](#tiling)` or `exercise 4`, with a capital where a sentence, paragraph or list item begins."""
    name = names[link.group(1)]
    if re.search(r"(\A|\n\s*\n|(\A|\n)\s*[-*>|]|[.?!]\**)\s*\Z", link.string[: link.start()]):
        name = re.sub("[a-z]", lambda letter: letter.group().upper(), name, count=1)
    return name


def link_arxiv(text: str) -> str:
    return re.sub(r"(?<!\[)arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def make_prose_notebook(name: str, parts: list[str]) -> dict:
    """A page of Markdown cells."""
    cells = [
        {"cell_type": "markdown", "id": f"{name}-{i}", "metadata": {}, "source": part.strip()}
        for i, part in enumerate(parts, 1)
    ]
    metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def dumps(notebook: dict) -> str:
    """The notebook's text as nbformat writes it, after its schema has been checked."""
    import nbformat

    node = nbformat.from_dict(notebook)
    nbformat.validate(node)
    return nbformat.writes(node) + "\n"


# --- the seal -------------------------------------------------------------------------------------------------


def find_seal(notebook: dict) -> str:
    """The hash of the cells' kinds and texts; outputs and metadata change when a notebook is run, and have no say."""
    texts = [[cell.get("cell_type"), "".join(cell.get("source", ""))] for cell in notebook.get("cells", [])]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def seal(notebook: dict, sealed: str = "") -> dict:
    """The same notebook with this seal, or its own."""
    notebook["metadata"].setdefault("llm40", {})["seal"] = sealed or find_seal(notebook)
    return notebook


def read_seal(notebook: dict) -> str:
    """The seal that a notebook bears, empty where it bears none."""
    try:
        return str(notebook["metadata"]["llm40"]["seal"])
    except (KeyError, TypeError):
        return ""


def is_as_built(text: str | bytes) -> bool:
    """Whether a notebook's cells are as some build made them, by its seal."""
    try:
        notebook = json.loads(text)
        return find_seal(notebook) == read_seal(notebook)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False
