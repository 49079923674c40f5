"""What the grader writes for people: learner's page, class report, the two tables and the terminal's summary."""

import base64
import binascii
import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import nbformat
from jinja2 import Environment, PackageLoader
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from autograder.execute import ANSI
from autograder.grading.rebuild import name, role
from autograder.grading.similarity import Pair
from autograder.grading.task import WAITING, Check, Result

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


def write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        try:
            file.write(data.encode() if isinstance(data, str) else data)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


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
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("autograder", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=lambda value: f"{value:g}")
    environment.globals.update(status=STATUS)
    return environment


def feedback(result: Result, title: str, unsafe: bool) -> str:
    """The learner's page: scores, messages, and their own cells as they ran; nothing of ours but what they had."""
    cells = []
    notebook = nbformat.reads(result.notebook.decode(), as_version=4) if result.notebook else None
    for cell in notebook.cells if notebook else []:
        if role(cell) in ("exercise", "added", "answer") and cell.source.strip():
            cells.append(
                {
                    "label": "your own cell" if role(cell) == "added" else name(cell),
                    "code": _highlight(cell.source) if cell.cell_type == "code" else None,
                    "text": cell.source,
                    "outputs": [_shown(output) for output in cell.get("outputs", [])],
                }
            )
    groups: dict[str, list[Check]] = defaultdict(list)
    for check in result.checks:
        groups[check.exercise].append(check)
    return _templates().get_template("feedback.html.j2").render(
        result=result,
        title=title,
        unsafe=UNSAFE if unsafe else "",
        groups=groups,
        cells=cells,
        style=HtmlFormatter(style="default").get_style_defs("pre"),
    )


def _highlight(source: str) -> str:
    return highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))


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


def exercises(results: list[Result]) -> dict[tuple[str, str], list[dict]]:
    """Per lesson, in its own order: every exercise's share passed and what most learners were told.

    A share counts the checks of all who handed the lesson in and whose file could be read.
    """
    counted: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    for result in results:
        if result.status not in ("graded", "incomplete", "withheld"):
            continue
        for check in result.checks:
            if check.status in (*WAITING, "by hand"):
                continue
            row = counted[result.stage, result.lesson].setdefault(
                check.exercise, {"exercise": check.exercise, "passed": 0, "stub": 0, "count": 0, "messages": Counter()}
            )
            row["count"] += 1
            row["passed"] += check.status == "passed"
            row["stub"] += check.status == "stub"
            if check.message and check.status != "stub":
                row["messages"][check.message] += 1
    lessons = {}
    for lesson, rows in counted.items():
        for row in rows.values():
            row["share"] = row["passed"] / row["count"]
            row["open"] = row["stub"] / row["count"]
            row["message"], row["times"] = row.pop("messages").most_common(1)[0] if row["messages"] else ("", 0)
        lessons[lesson] = list(rows.values())
    return lessons


def class_report(
    results: list[Result], notes: list[str], seconds: float, unsafe: bool, pairs: list[Pair] | None = None
) -> str:
    """The class on a page; `pairs` are the answers that resemble each other, None where nobody looked."""
    return _templates().get_template("class_report.html.j2").render(
        results=results,
        exercises=exercises(results),
        pairs=pairs,
        notes=notes,
        unsafe=UNSAFE if unsafe else "",
        seconds=seconds,
        students=len({r.student for r in results}),
        handed_in=sum(r.status != "missing" for r in results),
        flagged=sum(bool(r.flags) for r in results),
        withheld=sum(r.status == "withheld" for r in results),
        faults=sum(r.status == "fault" for r in results),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
