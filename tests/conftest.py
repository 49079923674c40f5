"""Prints the table of answers at the end of a run that tested any."""

import answers_harness
import pytest


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    reports = [r for group in ("passed", "failed", "skipped", "xfailed") for r in terminalreporter.stats.get(group, [])]
    rows = [value for r in reports for name, value in getattr(r, "user_properties", []) if name == "answer"]
    if rows:
        lessons = {row["lesson"] for row in rows}
        terminalreporter.section("answers")
        for line in answers_harness.table(rows, messages=len(lessons) == 1 or config.get_verbosity() > 0):
            terminalreporter.write_line(line)
