"""Prints, at the end of a run, the table of answers if it tested any, and where its time went if it took long."""

from collections import Counter

import answers_harness
import pytest

LONG = 60.0  # seconds of all tests together from which their folders are listed


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    groups = ("passed", "failed", "skipped", "xfailed", "error", "")  # "": setting up and taking down
    reports = [r for group in groups for r in terminalreporter.stats.get(group, [])]
    rows = [value for r in reports for name, value in getattr(r, "user_properties", []) if name == "answer"]
    if rows:
        lessons = {row["lesson"] for row in rows}
        terminalreporter.section("answers")
        for line in answers_harness.table(rows, messages=len(lessons) == 1 or config.get_verbosity() > 0):
            terminalreporter.write_line(line)
    seconds = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):  # a file that could not be collected has no duration
            seconds[report.nodeid.split("::")[0].rpartition("/")[0]] += report.duration
    if seconds.total() > LONG:
        terminalreporter.section("seconds by folder, of all workers together")
        for folder, spent in seconds.most_common():
            terminalreporter.write_line(f"{folder:44} {spent:8.0f}")
