"""The log of the commands. Each module has `logging.getLogger(__name__)`; a line names the lesson and the cell."""

import logging
import os

VERBOSE = "LLM40_VERBOSE"  # in the environment, so that processes that the command starts know too


def show_logs(verbose: bool) -> None:
    """Show the autograder's log on standard error: with `verbose` every step, without it warnings."""
    if verbose:
        os.environ[VERBOSE] = "1"
    logger = logging.getLogger("autograder")
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


def show_logs_as_parent() -> None:
    """In a process that a command started: what the command shows."""
    show_logs(bool(os.environ.get(VERBOSE)))
