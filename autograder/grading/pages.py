"""What the grader shows people: a learner's page, and the terminal's summary."""

import base64
import binascii
import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import nbformat
from pygments.formatters import HtmlFormatter

from autograder.grading.clerk import color_safely
from autograder.grading.gradebook import ManualEntries
from autograder.grading.rebuild import read_name, read_role
from autograder.grading.task import Check, Result
from autograder.tables import format_table
from autograder.templating import read_template, render
from autograder.text import strip_colors

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


def format_results(results: list[Result]) -> str:
    """The terminal's table."""
    rows = []
    for r in results:
        flags = r.flags[0] if r.flags else ""
        more = f" (+{len(r.flags) - 1})" if len(r.flags) > 1 else ""
        short = flags if len(flags) <= 70 else flags[:69] + "…"
        score = f"{r.score:g}/{r.max_score:g}"
        rows.append((r.student, r.lesson, score, r.status, f"{r.seconds:.1f}", short + more))
    return format_table(("student", "lesson", "score", "status", "seconds", "flags"), rows)


# --- pages ----------------------------------------------------------------------------------------------------


def digest_shown(result: Result, title: str, flags: list[str], unsafe: bool, entered: ManualEntries) -> str:
    """All that a learner's page shows beside the notebook, as a hash that stands in the page."""
    checks = [asdict(check) for check in result.checks]
    facts = [result.status, checks, result.late_penalty, title, flags, unsafe, asdict(entered), _digest_templates()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def shows(page: Path, shown: str) -> bool:
    """Whether a page that was written earlier shows this."""
    with open(page, encoding="utf-8", errors="replace") as file:
        return f'content="{shown}"' in file.read(1000)


@cache
def _digest_templates() -> str:
    sources = read_template("feedback.html.j2") + read_template("class_style.css.j2")
    return hashlib.sha256(sources.encode()).hexdigest()


def make_feedback(result: Result, title: str, flags: list[str], unsafe: bool, entered: ManualEntries) -> str:
    """The learner's page: scores, messages, what a person wrote, and the learner's own cells as they ran."""
    cells = []
    notebook = nbformat.reads(result.notebook.decode(), as_version=4) if result.notebook else None
    for cell in notebook.cells if notebook else []:
        if read_role(cell) in ("exercise", "added", "answer") and cell.source.strip():
            cells.append(
                {
                    "label": "your own cell" if read_role(cell) == "added" else read_name(cell),
                    "comment": entered.comments.get(read_name(cell)) if read_role(cell) != "added" else None,
                    "code": color_safely(cell.source) if cell.cell_type == "code" else None,
                    "text": cell.source,
                    "outputs": [_describe_output(output) for output in cell.get("outputs", [])],
                }
            )
    groups: dict[str, list[Check]] = defaultdict(list)
    for check in result.checks:
        groups[check.exercise].append(check)
    return render(
        "feedback.html.j2",
        result=result,
        title=title,
        flags=flags,
        shown=digest_shown(result, title, flags, unsafe, entered),
        unsafe=UNSAFE if unsafe else "",
        groups=groups,
        cells=cells,
        entered=entered,
        status=STATUS,
        style=HtmlFormatter(style="default").get_style_defs("pre"),
    )


@dataclass
class Shown:
    """An output on a page: text, or a picture in base64."""

    text: str = ""
    picture: str = ""
    error: bool = False


def _describe_output(output: dict) -> Shown:
    """HTML that a learner's code made is not put into a page."""
    if output["output_type"] == "stream":
        return Shown(_cut(output["text"]))
    if output["output_type"] == "error":
        trace = [line for line in output.get("traceback", []) if isinstance(line, str)]
        return Shown(_cut("\n".join(trace) or f"{output.get('ename')}: {output.get('evalue')}"), error=True)
    data = output.get("data", {})
    picture = data.get("image/png")
    if isinstance(picture, str):
        try:
            return Shown(picture=base64.b64encode(base64.b64decode(picture)).decode())
        except (binascii.Error, ValueError):
            return Shown("[a picture that cannot be read]")
    return Shown(_cut(str(data.get("text/plain", ""))))


def _cut(text: str) -> str:
    text = strip_colors(text)
    return text if len(text) <= OUTPUT_CHARS else text[:OUTPUT_CHARS] + "\n[…]"
