"""What runs inside a learner's kernel, from before the learner's first line: it runs what is ours there, and sees what
bends it.

A check has to run in the learner's own process, among the learner's own objects. So that what runs there is the check,
and nothing but the check, it does not go through IPython, whose every part a cell can replace. It goes to a thread of
our own, over a connection of its own:

- `door` is that thread. What it receives and sends is sealed (`seal`) with a key that only its own frame holds. After a
  learner's first line it touches no object that a learner could have made, and calls nothing that one could have
  replaced: C functions taken beforehand, its own functions, its own copy of the builtins.
- `desk` does everything else, in a fresh thread for each cell of ours, with its own state of PyTorch's modes. A check
  has names of its own: a copy of the notebook's, those that our cells made as we made them, and untouched builtins.
  What a check calls `expected` is no name of the notebook's. After a check that passed come canaries, assertions that
  must fail.
- `watch` knows every attribute of the libraries that checks stand on as it was. Before a cell of ours what was replaced
  is put back; after it, what was replaced meanwhile is found, also where it was put back since.
- `sentry` is an audit hook (PEP 578), which nobody can remove: learners' code gets no frame, no list of all objects, no
  other function's code, no foreign memory.
- `arms` are what a check asks each value before it believes it.

What is found is reported with the next answer. None of this holds against code that writes to arbitrary memory.

The files are put into the kernel as text (`load`): nothing of the project but llm40 is to be seen there, and none of
this is a module that a learner could import. They need the standard library only.
"""

from functools import cache
from pathlib import Path

PARTS = ("load", "seal", "kinds", "watch", "sentry", "desk", "door")  # each imports those before it
READY = "llm40 guard"  # in a kernel forked from the warm process, where the guard is to be found once
OPEN = """_made = {made}
_made[0].open_door({path!r}, globals(), _made[1])
del _made"""


@cache
def text(part: str) -> str:
    return Path(__file__).with_name(f"{part}.py").read_text(encoding="utf-8")


def texts() -> dict[str, str]:
    """The guard's files, by the names under which they import each other."""
    return {f"{__name__}.{part}": text(part) for part in PARTS}


def doors(path: str) -> list[str]:
    """Cells that start a guard at a socket of this path, the kernel's very first: the second where the first raises.

    The first takes the guard that came with the warm process, the second brings one.
    """
    names = {"__name__": "load"}
    bring = f"exec(compile({text('load')!r}, '<llm40 load>', 'exec'), _made := {names}) or _made['ready']"
    found = f"__import__('sys').modules.pop({READY!r})"
    brought = f"{bring}({texts()!r}, {text('arms')!r})"
    return [OPEN.format(made=made, path=path) for made in (found, brought)]
