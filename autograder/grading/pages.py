"""What the grader shows people: a learner's page, and the terminal's summary."""

import base64
import binascii
import hashlib
import json
import unicodedata
from collections import defaultdict
from dataclasses import asdict
from functools import cache
from pathlib import Path

import nbformat
from jinja2 import Environment, PackageLoader
from pygments.formatters import HtmlFormatter

from autograder.execute import ANSI
from autograder.grading.clerk import colored
from autograder.grading.gradebook import Entered
from autograder.grading.rebuild import name, role
from autograder.grading.task import Check, Result

UNSAFE = "Graded without a sandbox (--unsafe): the code ran with all the rights of whoever graded it."
OUTPUT_CHARS = 20_000  # of one output on the learner's page
STATUS = {
    "passed": "passed",
    "failed": "failed",
    "stub": "not written",
    "timeout": "too slow",
    "crashed": "crashed",
    "not run": "not run",
    "to grade": "to be graded by a person",
    "withheld": "withheld until a person has decided",
    "by hand": "graded by a person",
}


# --- the terminal ----------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """The terminal's table."""
    rows = [("student", "lesson", "score", "status", "seconds", "flags")]
    for r in results:
        flags = r.flags[0] if r.flags else ""
        more = f" (+{len(r.flags) - 1})" if len(r.flags) > 1 else ""
        short = flags if len(flags) <= 70 else flags[:69] + "…"
        rows.append((r.student, r.lesson, f"{r.score:g}/{r.max_score:g}", r.status, f"{r.seconds:.1f}", short + more))
    widths = [max(_width(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(text + " " * (width - _width(text)) for text, width in zip(row, widths, strict=False)) + "  " + row[5]
        for row in rows
    )


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


# --- pages ----------------------------------------------------------------------------------------------------


@cache
def templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("autograder", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=lambda value: f"{value:g}")
    environment.globals.update(status=STATUS)
    return environment


def shown(result: Result, title: str, flags: list[str], unsafe: bool, entered: Entered) -> str:
    """All that a learner's page shows beside the notebook, as a hash that stands in the page."""
    checks = [asdict(check) for check in result.checks]
    facts = [result.status, checks, result.late_penalty, title, flags, unsafe, asdict(entered), _template_digest()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def shows(page: Path, shown: str) -> bool:
    """Whether a page that was written earlier shows this."""
    with open(page, encoding="utf-8", errors="replace") as file:
        return f'content="{shown}"' in file.read(1000)


@cache
def _template_digest() -> str:
    loader = templates().loader
    sources = [loader.get_source(templates(), name)[0] for name in ("feedback.html.j2", "class_style.css.j2")]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def feedback(result: Result, title: str, flags: list[str], unsafe: bool, entered: Entered) -> str:
    """The learner's page: scores, messages, what a person wrote, and the learner's own cells as they ran."""
    cells = []
    notebook = nbformat.reads(result.notebook.decode(), as_version=4) if result.notebook else None
    for cell in notebook.cells if notebook else []:
        if role(cell) in ("exercise", "added", "answer") and cell.source.strip():
            cells.append(
                {
                    "label": "your own cell" if role(cell) == "added" else name(cell),
                    "comment": entered.comments.get(name(cell)) if role(cell) != "added" else None,
                    "code": colored(cell.source) if cell.cell_type == "code" else None,
                    "text": cell.source,
                    "outputs": [_shown(output) for output in cell.get("outputs", [])],
                }
            )
    groups: dict[str, list[Check]] = defaultdict(list)
    for check in result.checks:
        groups[check.exercise].append(check)
    return (
        templates()
        .get_template("feedback.html.j2")
        .render(
            result=result,
            title=title,
            flags=flags,
            shown=shown(result, title, flags, unsafe, entered),
            unsafe=UNSAFE if unsafe else "",
            groups=groups,
            cells=cells,
            entered=entered,
            style=HtmlFormatter(style="default").get_style_defs("pre"),
        )
    )


def _shown(output: dict) -> dict:
    """An output as text, or as a picture; HTML that a learner's code made is not put into a page."""
    if output["output_type"] == "stream":
        return {"text": _cut(output["text"])}
    if output["output_type"] == "error":
        trace = [line for line in output.get("traceback", []) if isinstance(line, str)]
        return {"text": _cut("\n".join(trace) or f"{output.get('ename')}: {output.get('evalue')}"), "error": True}
    data = output.get("data", {})
    picture = data.get("image/png")
    if isinstance(picture, str):
        try:
            return {"picture": base64.b64encode(base64.b64decode(picture)).decode()}
        except (binascii.Error, ValueError):
            return {"text": "[a picture that cannot be read]"}
    return {"text": _cut(str(data.get("text/plain", "")))}


def _cut(text: str) -> str:
    text = ANSI.sub("", text)
    return text if len(text) <= OUTPUT_CHARS else text[:OUTPUT_CHARS] + "\n[…]"
