"""Runs the guard's own files as programs that no module's name leads to."""

import builtins
import sys
import types

OURS = "<llm40 "  # how the names of our files begin, and those of our cells


def loaded(sources: dict[str, str]) -> types.ModuleType:
    """The last of some modules, given as name → text; each may import those before it.

    Each has its own copy of the builtins, and when they are made, none is in sys.modules any more.
    """
    before = {name: sys.modules.get(name) for name in sources}
    try:
        for name, source in sources.items():
            module = sys.modules[name] = types.ModuleType(name)
            module.__builtins__ = dict(vars(builtins))
            exec(compile(source, f"{OURS}guard {name}>", "exec"), vars(module))
    finally:
        for name, was in before.items():
            del sys.modules[name]
            if was is not None:
                sys.modules[name] = was
    return module


def ready(sources: dict[str, str], arms: str) -> tuple:
    """A guard that waits for its kernel: its door, and what it knows of what is there."""
    door = loaded(sources)
    return door, door.Surroundings(arms)
