"""Grades as tables that learning management systems take in, beside our own and nbgrader's.

A student's folder name is their login there. A lesson is a column; a cell is empty where there is no score of ours to
give (a fault, or a score that waits for a person), which both systems read as "leave it as it is".
"""

import csv
import io
from collections.abc import Iterable

from autograder.grading.task import Result


def harmless(text: str) -> str:
    """Text that a spreadsheet shows and does not evaluate."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def table(header: list[str], rows: Iterable[list]) -> str:
    """A CSV file's text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([harmless(value) if isinstance(value, str) else value for value in row] for row in rows)
    return file.getvalue()


def grades(results: list[Result]) -> str:
    """A line per student and lesson."""
    return table(
        ["student", "stage", "lesson", "score", "max_score", "late_penalty", "status", "seconds", "flags"],
        (
            [r.student, r.stage, r.lesson, f"{r.score:g}", f"{r.max_score:g}", f"{r.late_penalty:g}", r.status,
             f"{r.seconds:.1f}", "; ".join(r.flags)]
            for r in results
        ),
    )  # fmt: skip


def checks(results: list[Result]) -> str:
    """A line per student and check."""
    return table(
        ["student", "lesson", "exercise", "check", "points", "score", "status", "message"],
        (
            [r.student, r.lesson, c.exercise, c.check, f"{c.points:g}", f"{c.score:g}", c.status, c.message]
            for r in results
            for c in r.checks
        ),
    )


def _by_student(results: list[Result]) -> tuple[dict[str, float], dict[str, dict[str, str]]]:
    """Lesson → highest score possible, and student → lesson → score; both in order."""
    possible = {r.lesson: r.max_score for r in sorted(results, key=lambda r: (r.stage, r.lesson)) if r.max_score}
    scores: dict[str, dict[str, str]] = {}
    for r in sorted(results, key=lambda r: r.student):
        scores.setdefault(r.student, {})[r.lesson] = "" if r.status == "fault" or r.waits else f"{r.score:g}"
    return possible, scores


def canvas(results: list[Result]) -> str:
    """For Canvas: Grades → Import. Its five columns of identity, and the row of possible points that it expects."""
    possible, scores = _by_student(results)
    points = ["    Points Possible", "", "", "", "", *(f"{value:g}" for value in possible.values())]
    rows = [[who, "", "", who, "", *(theirs.get(lesson, "") for lesson in possible)] for who, theirs in scores.items()]
    return table(["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *possible], [points, *rows])


def moodle(results: list[Result]) -> str:
    """For Moodle: Grades → Import → CSV file, "username" mapped to the user, each lesson to a grade item."""
    possible, scores = _by_student(results)
    rows = [[who, *(theirs.get(lesson, "") for lesson in possible)] for who, theirs in scores.items()]
    return table(["username", *possible], rows)
