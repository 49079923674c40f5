"""Penalties for late submissions, by nbgrader's own plugin and configuration.

An instructor sets a due date in the formgrader (or `nbgrader db assignment add stage1_foundations --duedate=…`) and
says in an nbgrader configuration what lateness costs: `c.LateSubmissionPlugin.penalty_method = "zero"`, or a plugin of
their own in `c.AssignLatePenalties.plugin_class`. When a notebook was handed in is read from nbgrader's timestamp.txt.
"""

from collections.abc import Callable
from pathlib import Path

from nbgrader.preprocessors import AssignLatePenalties
from traitlets.config import Config, ConfigFileNotFound, PyFileConfigLoader

Penalty = Callable[[str, float, float], float]  # student, score, seconds late → points


class BadConfig(ValueError):
    """An nbgrader configuration that cannot be used; the message says why."""


def no_penalty(student: str, score: float, seconds: float) -> float:
    return 0.0


def penalty_of(path: Path) -> Penalty:
    """The penalty that an nbgrader configuration file asks for, never negative and never more than the score."""
    try:
        config: Config = PyFileConfigLoader(path.name, path=str(path.parent)).load_config()
        assigning = AssignLatePenalties(config=config)
        assigning.init_plugin()
    except ConfigFileNotFound as error:
        raise BadConfig(f"{path}: there is no such configuration file") from error
    except Exception as error:  # whatever the instructor's own file raises
        raise BadConfig(f"{path}: {type(error).__name__}: {error}") from error

    def penalty(student: str, score: float, seconds: float) -> float:
        if seconds <= 0:
            return 0.0
        asked = assigning.plugin_inst.late_submission_penalty(student, score, seconds)
        return min(max(asked or 0.0, 0.0), score)

    return penalty
