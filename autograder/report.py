"""Figures and pages from the results of a run: the terminal's table, Markdown for a CI summary, an HTML page."""

import shutil

from autograder.tables import format_table
from autograder.templating import load_templates, render
from autograder.text import strip_colors


def format_seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def format_size(value: float | None) -> str:
    """Bytes in the binary units of the budgets."""
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


# Terminal -----------------------------------------------------------------------------------------------------------


def format_progress(stub: bool, record: dict) -> str:
    """One line per run, for logs without a progress bar."""
    name = record["key"].split("/")[1]
    state = "ok    " if record["status"] == "ok" else "FAILED"
    if stub:
        return f"{state} {name} (stub): {record.get('checks_failing', 0)} of {record.get('checks', 0)} checks fail"
    passed = f"{record.get('checks_passed', 0)} of {record.get('checks', 0)} checks"
    return f"{state} {name}: {format_seconds(record['seconds'])}, {passed}"


def format_failure(record: dict, failure: dict, color: bool) -> str:
    """The failing cell and its traceback, and nothing else of the notebook."""
    width = min(shutil.get_terminal_size().columns, 100)
    where = f"{record['name']}{' (stub)' if failure.get('stub') else ''}"
    head = f"FAILED {where}: {failure['cell'] + ': ' if failure['cell'] else ''}{failure['message']}"
    parts = ["", f"\x1b[1;31m{head}\x1b[0m" if color else head]
    if failure["source"]:
        parts += ["─" * width, failure["source"].rstrip()]
    if failure["traceback"]:
        parts += ["─" * width, failure["traceback"].rstrip() if color else strip_colors(failure["traceback"]).rstrip()]
    return "\n".join([*parts, "─" * width])


def make_rows(result: dict) -> list[dict]:
    """One row of words per lesson, for every kind of table."""
    return [
        {
            "key": lesson["key"],
            "name": lesson["name"],
            "title": lesson["title"],
            "state": find_state(lesson),
            "time": format_seconds(lesson["seconds"]),
            "grading": format_seconds(lesson["grading_seconds"]),
            "memory": format_size(lesson["peak_bytes"]),
            "gpu": format_size(lesson["gpu_bytes"]) if lesson["gpu_bytes"] else "–",
            "checks": f"{lesson['checks_passed']}/{lesson['checks']}",
            "points": f"{lesson['points']:g}/{lesson['max_points']:g}",
            "stub": f"{lesson['stub'].get('checks_failing', 0)}/{lesson['stub'].get('checks', 0)}",
            "figures": str(lesson["figures"]),
            "slowest": lesson["slowest"],
        }
        for lesson in result["lessons"]
    ]


def find_state(lesson: dict) -> str:
    if lesson["failures"] or lesson["stub"]["failures"]:
        return "failed"
    return "over budget" if lesson["warnings"] else "ok"


def count_results(result: dict) -> dict:
    lessons = result["lessons"]
    return {
        "lessons": len(lessons),
        "failed": sum(find_state(lesson) == "failed" for lesson in lessons),
        "over": sum(bool(lesson["warnings"]) for lesson in lessons),
        "checks": sum(lesson["checks"] for lesson in lessons),
        "passed": sum(lesson["checks_passed"] for lesson in lessons),
        "stub_checks": sum(lesson["stub"].get("checks", 0) for lesson in lessons),
        "stub_failing": sum(lesson["stub"].get("checks_failing", 0) for lesson in lessons),
        "figures": sum(lesson["figures"] for lesson in lessons),
    }


def format_summary(result: dict) -> str:
    head = (
        "lesson",
        "",
        "time",
        "no exp.",
        "memory",
        "GPU",
        "checks",
        "points",
        "stub fails",
        "figures",
        "slowest cell",
    )
    table = []
    for row in make_rows(result):
        slow = row["slowest"]
        slowest = f"{slow['seconds']:.1f} s  {slow['line'][:44]}" if slow else ""
        table.append(
            (
                row["name"],
                row["state"],
                row["time"],
                row["grading"],
                row["memory"],
                row["gpu"],
                row["checks"],
                row["points"],
                row["stub"],
                row["figures"],
                slowest,
            )
        )
    lines = ["", format_table(head, table, right=range(2, len(head) - 1))]
    lines += [f"warning: {lesson['name']}: {warning}" for lesson in result["lessons"] for warning in lesson["warnings"]]
    lines += [
        f"left out: {lesson['name']}: {len(lesson['left_out'])} cells need Triton, which is not here"
        for lesson in result["lessons"]
        if lesson.get("left_out")
    ]
    return "\n".join([*lines, "", format_closing(result)])


def format_closing(result: dict) -> str:
    """The run in one sentence."""
    s = count_results(result)
    done = f"{s['lessons'] - s['failed']} of {s['lessons']} lessons ok"
    over = f", {s['over']} over budget" if s["over"] else ""
    return (
        f"{done}{over}; {s['passed']} of {s['checks']} checks pass on the answers, "
        f"{s['stub_failing']} of {s['stub_checks']} fail on the stubs; {format_seconds(result['seconds'])} "
        f"({result['profile']}, {result['jobs']} at once)"
    )


# Pages --------------------------------------------------------------------------------------------------------------


def _escape_for_cell(text: str) -> str:
    """Text that cannot break out of a table's cell or of its code quotes."""
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


load_templates().filters.update(seconds=format_seconds, size=format_size, plain=strip_colors, cell=_escape_for_cell)


def render_markdown(result: dict) -> str:
    return render("run_report.md.j2", result=result, rows=make_rows(result), closing=format_closing(result))


def render_html(result: dict) -> str:
    budgets = result["budgets"] or {}
    lessons = result["lessons"]
    charts = [
        {
            "title": "Time",
            "about": "The whole notebook; the darker part is what grading runs too, without the experiments.",
            **place_bars(
                [(lesson["name"], lesson["seconds"], lesson["grading_seconds"]) for lesson in lessons],
                budgets.get("seconds"),
                format_seconds,
            ),
        },
        {
            "title": "Peak memory",
            "about": "Resident memory of the kernel's process at its highest.",
            **place_bars(
                [(lesson["name"], lesson["peak_bytes"], lesson["peak_bytes"]) for lesson in lessons],
                budgets.get("peak_bytes"),
                format_size,
            ),
        },
    ]
    return render(
        "run_report.html.j2",
        result=result,
        rows=make_rows(result),
        summary=count_results(result),
        charts=charts,
        closing=format_closing(result),
    )


def place_bars(values: list[tuple[str, float, float]], budget: float | None, show) -> dict:
    """A chart of horizontal bars as numbers for the template: one (name, value, part of it) per bar, and the budget.

    Widths are in units of an SVG 380 wide, of which the bars have 206 and the words beside them the rest.
    """
    left, wide, row, top = 112, 206, 24, 22
    most = max([value for _, value, _ in values] + [budget or 0.0]) or 1.0
    scale = wide / most
    return {
        "left": left,
        "top": top,
        "height": top + row * len(values) + 6,
        "budget": budget and {"x": left + budget * scale, "label": show(budget)},
        "bars": [
            {
                "y": top + row * index,
                "label": _shorten(name),
                "name": name,
                "width": value * scale,
                "part": min(part, value) * scale,
                "text": show(value),
                "over": budget is not None and value > budget,
            }
            for index, (name, value, part) in enumerate(values)
        ],
    }


def _shorten(name: str) -> str:
    """`09 attention mha`: a lesson's name, cut to what fits beside a bar."""
    words = name.replace("_", " ")
    return words if len(words) <= 15 else words[:14].rstrip() + "…"
