"""The classes that are not a learner's."""

import gc
import sys
import types
from collections import UserDict, UserList, UserString, deque
from weakref import CallableProxyType, ProxyType

HOLDING = (list, tuple, set, frozenset, dict, deque)
# The library's, but they speak for what they hold.
MASKS = frozenset((ProxyType, CallableProxyType, types.MappingProxyType, UserDict, UserList, UserString))


class Kinds:
    """Every class that was there before a learner, kept alive so that its id remains its own.

    `fine` are the ids of all, `known` those whose own class is `type`, `holding` the containers among these, `silent`
    those whose values hold nothing and are what they say: numbers, strings, and nearly all others.
    """

    masks = MASKS

    def __init__(self):
        self.all, self.fine, self.known, self.holding, self.silent = [], set(), set(), set(), set()
        self.modules = set()
        self.renew()

    def renew(self) -> None:
        """Adds the classes that came since."""
        if all(map(_of_python, sys.modules.keys() - self.modules)):
            # All that came can be collected. To walk through the others would copy them from the warm process.
            new = [thing for thing in gc.get_objects() if isinstance(thing, type)]
        else:
            new = every_type()
        self.modules = set(sys.modules)
        new = [kind for kind in new if id(kind) not in self.fine]
        self.all += new
        self.fine.update(map(id, new))
        known = [kind for kind in new if type(kind) is type]
        self.known.update(known)
        self.holding.update(kind for kind in known if issubclass(kind, HOLDING))
        self.silent.update(kind for kind in known if not issubclass(kind, HOLDING) and not speaks_for_others(kind))


def speaks_for_others(kind: type) -> bool:
    """Whether a class of a library's says that it equals whatever is wanted, or hides what it holds."""
    array = (kind.__module__, kind.__name__) == ("numpy", "ndarray")  # of objects, perhaps
    return kind in MASKS or kind.__module__ == "unittest.mock" or array


def _of_python(module: str) -> bool:
    """Whether a module is no more than a file of Python: others may have classes that the collector does not know."""
    found = sys.modules[module]
    spec = getattr(found, "__spec__", None)
    return not isinstance(found, types.ModuleType) or (getattr(spec, "origin", "") or "").endswith(".py")


def every_type() -> list[type]:
    """Every class there is."""
    found, waiting = [object], [object]
    while waiting:
        below = type.__subclasses__(waiting.pop())
        found += below
        waiting += below
    return found
