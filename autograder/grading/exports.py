"""Grades as tables for learning management systems, beside the grader's own and nbgrader's; what became of every file.

A student's folder name is their login there. A lesson is a column. A cell is empty where there is no score: a
fault, a score that waits for a person, a file that cannot be read, and a notebook that is not there, since a file that
was not recognized may be it. Both systems read an empty cell as "leave it as it is", and an import would write a zero
over an earlier grade.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence

from autograder.grading.files import BESIDE, IGNORED, OTHER, REFUSED, TAKEN, UNPLACED, WAITS, File
from autograder.grading.submissions import ARCHIVES
from autograder.grading.task import Result

TOLD = 60  # lines about files on the terminal; intake.csv has them all


def make_harmless(text: str) -> str:
    """Text that a spreadsheet shows and does not evaluate."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def format_csv(header: list[str], rows: Iterable[list]) -> str:
    """A CSV file's text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([make_harmless(value) if isinstance(value, str) else value for value in row] for row in rows)
    return file.getvalue()


def make_grades(results: list[Result]) -> str:
    """A line per student and lesson."""
    return format_csv(
        ["student", "stage", "lesson", "score", "max_score", "late_penalty", "status", "seconds", "flags"],
        (
            [
                r.student,
                r.stage,
                r.lesson,
                f"{r.score:g}",
                f"{r.max_score:g}",
                f"{r.late_penalty:g}",
                r.status,
                f"{r.seconds:.1f}",
                "; ".join(r.flags),
            ]
            for r in results
        ),
    )


def make_checks(results: list[Result]) -> str:
    """A line per student and check."""
    return format_csv(
        ["student", "lesson", "exercise", "check", "points", "score", "status", "counted", "message"],
        (
            [
                r.student,
                r.lesson,
                c.exercise,
                c.check,
                f"{c.points:g}",
                f"{c.score:g}",
                c.status,
                "yes" if c.counted else "",
                c.message,
            ]
            for r in results
            for c in r.checks
        ),
    )


def _group_by_student(results: list[Result]) -> tuple[dict[str, float], dict[str, dict[str, str]]]:
    """Lesson → highest score possible, and student → lesson → score; both in order."""
    possible = {r.lesson: r.max_score for r in sorted(results, key=lambda r: (r.stage, r.lesson)) if r.max_score}
    scores: dict[str, dict[str, str]] = {}
    for r in sorted(results, key=lambda r: r.student):
        known = r.status in ("graded", "incomplete") and not r.waits
        scores.setdefault(r.student, {})[r.lesson] = f"{r.score:g}" if known else ""
    return possible, scores


def make_canvas(results: list[Result]) -> str:
    """For Canvas: Grades → Import. Its five columns of identity, and the row of possible points that it expects."""
    possible, scores = _group_by_student(results)
    points = ["    Points Possible", "", "", "", "", *(f"{value:g}" for value in possible.values())]
    rows = [[who, "", "", who, "", *(found.get(lesson, "") for lesson in possible)] for who, found in scores.items()]
    return format_csv(["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *possible], [points, *rows])


def make_moodle(results: list[Result]) -> str:
    """For Moodle: Grades → Import → CSV file, "username" mapped to the user, each lesson to a grade item."""
    possible, scores = _group_by_student(results)
    rows = [[who, *(found.get(lesson, "") for lesson in possible)] for who, found in scores.items()]
    return format_csv(["username", *possible], rows)


TABLES = {
    "grades.csv": make_grades,
    "checks.csv": make_checks,
    "canvas.csv": make_canvas,
    "moodle.csv": make_moodle,
}


# --- files ----------------------------------------------------------------------------------------------------


def make_intake(files: Sequence[File]) -> str:
    """A line for every file: whose it is, which lesson, and what became of it."""
    return format_csv(
        ["file", "student", "lesson", "became", "why", "handed_in"],
        (
            [f.place, f.student or "", f.lesson.name if f.lesson else "", f.became, _tell_why(f), _tell_time(f)]
            for f in files
        ),
    )


def _tell_why(file: File) -> str:
    return "; ".join([*filter(None, [file.why]), *file.notes])


def _tell_time(file: File) -> str:
    return f"{file.time:%Y-%m-%d %H:%M:%S} UTC" if file.time else ""


def tell_file(file: File) -> str:
    """A file in a line of text."""
    whose = f" → {file.student}" if file.student else ""
    lesson = f", {file.lesson.name}" if file.lesson else ""
    why = f" ({_tell_why(file)})" if _tell_why(file) else ""
    return f"{file.place}{whose}{lesson}: {file.became}{why}"


def _is_usual(file: File) -> bool:
    """Whether a file lies and is called as it should, or is of no interest."""
    if file.became in (OTHER, IGNORED, BESIDE):
        return not file.name.lower().endswith(ARCHIVES)
    usual = (file.student, file.lesson.stage, f"{file.lesson.name}.ipynb") if file.lesson else ()
    return file.became == TAKEN and file.parts == usual and not file.notes


def tell_files(files: Sequence[File]) -> list[str]:
    """The terminal's lines about the files: how many became what, and each that is not where one expects it."""
    counts = Counter(file.became for file in files)
    odd = [file for file in files if not _is_usual(file)]
    lines = [f"{len(files)} files: " + ", ".join(f"{count} {became}" for became, count in counts.most_common()) + "."]
    lines += [f"  {tell_file(file)}" for file in odd[:TOLD]]
    if len(odd) > TOLD:
        lines.append(f"  … and {len(odd) - TOLD} more: see intake.csv")
    return lines


def list_left_out(files: Sequence[File]) -> list[str]:
    """The files that should perhaps have been graded and were not."""
    return [tell_file(file) for file in files if file.became in (UNPLACED, REFUSED, WAITS)]
