"""A lesson's page: the learner's notebook, with what the executed answers printed and drew."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from autograder.catalog import Entry
from autograder.layout import Layout
from autograder.notebooks import read_seal
from autograder.roadmap import COLORS
from autograder.site.figures import write_figure
from autograder.site.terms import Term, link_terms

ANCHOR = re.compile(r'^(#+) <a id="([\w-]+)"></a>(.*)$', re.MULTILINE)
TO_ANCHOR = re.compile(r"\]\(#([\w-]+)\)")
COLORED = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FOLDED = ("check", "support", "figure", "setup")


class SiteError(Exception):
    """The site cannot be made; the message is one line or several, each complete."""


@dataclass
class SiteLesson:
    """A lesson as the site needs it: both notebooks as nbformat's JSON."""

    entry: Entry
    learners: dict
    executed: dict

    @property
    def prose(self) -> list[str]:
        """The text of the Markdown cells below the opening."""
        return [read_source(cell) for cell in self.learners["cells"][1:] if is_prose(cell)]


def read_lessons(layout: Layout) -> list[SiteLesson]:
    """Every lesson of course/ with its run. Raises SiteError, which names the lessons that have to be run first."""
    lessons, problems = [], []
    for entry in layout.list_written():
        run_it = f"make run LESSON={entry.number:02}"
        learners = _read_notebook(layout.course / f"{entry.key}.ipynb")
        executed = _read_notebook(layout.root / "build" / "executed" / f"{entry.key}.ipynb")
        if learners is None:
            problems.append(f"course/{entry.key}.ipynb is not here: make course LESSON={entry.number:02}")
        elif executed is None:
            problems.append(f"build/executed/{entry.key}.ipynb is not here: {run_it}")
        elif read_seal(executed) != read_seal(learners) or "run" not in executed["metadata"]["llm40"]:
            problems.append(f"build/executed/{entry.key}.ipynb is of another build than course/: {run_it}")
        elif not _has_run_to_end(executed):
            problems.append(f"build/executed/{entry.key}.ipynb did not run to its end: {run_it}")
        else:
            lessons.append(SiteLesson(entry, learners, executed))
    if problems:
        raise SiteError("\n".join(problems))
    if not lessons:
        raise SiteError("there is no lesson in solutions/: nothing to make a site of")
    return lessons


def _read_notebook(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _has_run_to_end(executed: dict) -> bool:
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code" and read_source(cell).strip()]
    errors = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    return not errors and all(cell["execution_count"] is not None for cell in code)


def read_source(cell: dict) -> str:
    return "".join(cell["source"])


def find_role(cell: dict) -> str:
    """`exercise`, `check`, `experiment`, `figure`, `support`, `setup`, `answer`, or `given` for any other."""
    marks, tags = cell["metadata"].get("nbgrader", {}), cell["metadata"].get("tags", [])
    role = cell["metadata"].get("llm40", {}).get("role")
    if role:
        return role
    if marks.get("solution"):
        return "exercise"
    if marks.get("grade"):
        return "check"
    return next((tag for tag in ("figure", "experiment", "support") if tag in tags), "given")


def is_prose(cell: dict) -> bool:
    return cell["cell_type"] == "markdown" and find_role(cell) == "given"


# --- one page -------------------------------------------------------------------------------------------------


def make_lesson_page(lesson: SiteLesson, terms: dict[str, Term], run_it: str, figures: Path, solutions: bool) -> dict:
    """The page as a notebook for myst-nb; its figures become files in the folder `figures`.

    With `solutions` it is the executed notebook itself: answers, hidden tests and all that they printed.
    """
    entry = lesson.entry
    cells = lesson.executed["cells"] if solutions else graft(lesson.learners, lesson.executed)
    prose = iter(link_terms([read_source(cell) for cell in cells[1:] if is_prose(cell)], terms))
    made, section = [], entry.title
    for index, cell in enumerate(cells):
        if index == 0:
            made.append(_make_text(write_page_opening(read_source(cell), lesson, run_it), entry))
        elif is_prose(cell):
            text = next(prose)
            title = ANCHOR.search(text)
            section = title.group(3).strip() if title else section
            if re.match(r"## .*References", text):
                text += "\n\nThe papers of all lessons are in the [bibliography](../bibliography.md)."
            made.append(_make_text(text, entry))
        elif cell["cell_type"] == "markdown":
            answer = read_source(cell).replace("<!-- BEGIN SOLUTION -->\n", "").replace("\n<!-- END SOLUTION -->", "")
            made.append(_make_text(f"**Model answer.** {answer}" if solutions else "*Your answer goes here.*", entry))
        else:
            made.append(_make_code(cell, figures, f"A figure of “{section}”"))
    return {"cells": made, "metadata": lesson.learners["metadata"], "nbformat": 4, "nbformat_minor": 4}


def graft(learners: dict, executed: dict) -> list[dict]:
    """The learner's cells; those that are given and the experiments with what they printed and drew in the run.

    Exercises and checks get no outputs: they are the answers', and could tell them.
    """
    ran = {cell["id"]: cell for cell in executed["cells"]}
    cells = []
    for cell in learners["cells"]:
        cell = dict(cell)
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            if find_role(cell) not in ("exercise", "check"):
                if read_source(ran[cell["id"]]) != read_source(cell):
                    raise SiteError(f"cell {cell['id']}: the executed text is not the learner's")
                cell["outputs"] = ran[cell["id"]]["outputs"]
        cells.append(cell)
    return cells


def write_page_opening(text: str, lesson: SiteLesson, run_it: str) -> str:
    """The opening cell, with the stage's color, how to run the lesson, and the run behind its figures."""
    stage = lesson.entry.stage.number
    mark = f'<span class="stage" style="background: {COLORS[stage - 1]}">{stage}</span> '
    text = text.replace(f"**{lesson.entry.title_zh}**", f"{mark}**{lesson.entry.title_zh}**", 1)
    before, contents, after = text.partition("**Contents**")
    return f"{before}{run_it}\n\n{describe_run(lesson.executed)}\n\n{contents}{after}"


def describe_run(executed: dict) -> str:
    """Date, machine and versions of the run in one line."""
    run = executed["metadata"]["llm40"]["run"]
    triton = f", Triton {run['triton']}" if run.get("triton") else ""
    return (
        f"**The run behind this page**: {run['created'][:10]}, {run['device']}; Python {run['python']}, "
        f"PyTorch {run['torch']}{triton}."
    )


def make_label(anchor: str, entry: Entry) -> str:
    """A section's name among those of all lessons; its address on the page stays `#tiling`."""
    return f"{entry.number:02}-{anchor}"


def link_anchors(text: str, entry: Entry) -> str:
    """Links to sections of a lesson (`](#tiling)`) as links that are right on every page."""
    return TO_ANCHOR.sub(lambda link: f"](#{make_label(link.group(1), entry)})", text)


def _make_text(text: str, entry: Entry) -> dict:
    text = ANCHOR.sub(
        lambda match: f"({make_label(match.group(2), entry)})=\n{match.group(1)} {match.group(3).strip()}", text
    )
    return {"cell_type": "markdown", "metadata": {}, "source": link_anchors(text, entry)}


def _make_code(cell: dict, figures: Path, alt: str) -> dict:
    source, role = read_source(cell), find_role(cell)
    metadata: dict = {"tags": [f"llm40-{role}"]}
    if role in FOLDED:
        title, _, source = source.partition("\n")
        title = title.lstrip("# ")
        metadata["tags"].append("hide-input")
        metadata["mystnb"] = {"code_prompt_show": title, "code_prompt_hide": title}
        alt = title if role == "figure" else alt
    return {
        "cell_type": "code",
        "metadata": metadata,
        "source": source,
        "execution_count": None,
        "outputs": [_make_output(output, figures, alt) for output in cell["outputs"]],
    }


def _make_output(output: dict, figures: Path, alt: str) -> dict:
    """The output with a figure's PNG as a file, and without colors for a terminal."""
    if output["output_type"] == "stream":
        return {**output, "text": COLORED.sub("", "".join(output["text"]))}
    png = output.get("data", {}).get("image/png")
    if png is None:
        return output
    address = f"../{figures.parent.name}/{figures.name}"
    html = write_figure("".join(png), figures, alt, address)
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": html}}
