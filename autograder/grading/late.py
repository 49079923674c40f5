"""Reads when something was handed in, and computes what lateness costs.

An instructor sets a due date in the formgrader (or `nbgrader db assignment add stage1_foundations --duedate=…`) and
says in an nbgrader configuration what lateness costs: `c.LateSubmissionPlugin.penalty_method = "zero"`, or a plugin of
their own in `c.AssignLatePenalties.plugin_class`. When a notebook was handed in is read from nbgrader's timestamp.txt,
or from the folder's name in nbgrader's exchange. Only a time that is known for certain costs anything: one whose zone
is a name such as CST (China, Cuba or Chicago) does not.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

from traitlets.config import Config, ConfigFileNotFound, PyFileConfigLoader

Penalty = Callable[[str, float, float], float]  # student, score, seconds late → points
TIME = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?)\s*"
    r"(?P<zone>Z|[A-Za-z][\w/+-]*|(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d)?)?"
)
CERTAIN = ("Z", "UTC", "GMT")


@dataclass(frozen=True)
class HandIn:
    """When a learner's work on a lesson was handed in, None where nobody knows, and the work itself as a hash."""

    time: datetime | None = None
    work: str = ""


class BadConfig(ValueError):
    """An nbgrader configuration that cannot be used; the message says why."""


def read_time(text: str) -> tuple[datetime | None, str]:
    """A time as nbgrader writes it, in UTC and without a zone, as its gradebook keeps it; or None, and why.

    The zone must be UTC, GMT, Z or a distance such as +0100 or +01:00.
    """
    found = TIME.fullmatch(text.strip())
    if not found:
        return None, "that is no time"
    try:
        local = datetime.fromisoformat(found["time"].replace(",", "."))
        if found["sign"]:
            ahead = timedelta(hours=int(found["hours"]), minutes=int(found["minutes"] or 0))
            zone = timezone(ahead if found["sign"] == "+" else -ahead)
        elif found["zone"] and found["zone"].upper() in CERTAIN:
            zone = UTC
        else:
            return None, f"the zone {found['zone']} is not certain" if found["zone"] else "it has no zone"
        return local.replace(tzinfo=zone).astimezone(UTC).replace(tzinfo=None), ""
    except (ValueError, OverflowError):
        return None, "that is no time"


def waive_penalty(student: str, score: float, seconds: float) -> float:
    return 0.0


def read_penalty(path: Path) -> Penalty:
    """The penalty that an nbgrader configuration file asks for, never negative and never more than the score."""
    from nbgrader.preprocessors import AssignLatePenalties  # a second's import, and not always asked for

    try:
        config: Config = PyFileConfigLoader(path.name, path=str(path.parent)).load_config()
        assigning = AssignLatePenalties(config=config)
        assigning.init_plugin()
    except ConfigFileNotFound as error:
        raise BadConfig(f"{path}: there is no such configuration file") from error
    except Exception as error:  # whatever the instructor's own file raises
        raise BadConfig(f"{path}: {type(error).__name__}: {error}") from error

    def compute_penalty(student: str, score: float, seconds: float) -> float:
        if seconds <= 0:
            return 0.0
        asked = assigning.plugin_inst.late_submission_penalty(student, score, seconds)
        return min(max(asked or 0.0, 0.0), score)

    return compute_penalty
