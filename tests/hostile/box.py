"""What the hostile tests share."""

import time
from pathlib import Path

from autograder.execute import Limits, Outcome
from autograder.kernels.manager import Kernels

LIMITS = Limits(cell=10, notebook=60, grace=1)
SANDBOX = {"forked": Kernels(libraries=()), "started": Kernels(warm=False)}


def printed(outcome: Outcome) -> str:
    assert outcome.status == "ok", f"{outcome.status} {outcome.ename} {outcome.evalue}"
    return "".join(output.get("text", "") for output in outcome.outputs)


def running(word: str) -> list[str]:
    """The processes of this machine with a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has ended
            pass
    return found


def gone(word: str, seconds: float = 5.0) -> bool:
    ends = time.monotonic() + seconds
    while running(word):
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True
