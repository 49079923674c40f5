"""What a check does with each value before it compares it or hands it on: it asks whose the value's class is.

A class can say itself what it is equal to, how large it is, whether it is true; the answer to an exercise must not. In
a check every operand `a` of an operator is run as `__operand__(a)`, every argument of a call as `__argument__(a)`, or
`__handed__(a)` where the function is our own, what is searched (`in a`, `a.index`) as `__collection__(a)`, and `a` of
any other `a.method` as `__owner__(a)` (grading.integrity rewrites the check). They give the value back, or raise Bent
where its class, or that of something in a list, was written by the learner and speaks for itself, or where a tensor has
a method of its own.

All this is made anew for each check, so that nothing can be reached from these functions.
"""

import sys
import types
from collections import deque
from functools import lru_cache
from itertools import repeat
from operator import is_

COMPARING = frozenset(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "contains"))
CALCULATING = frozenset(
    f"__{prefix}{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
    for prefix in ("", "r", "i")
) | frozenset(("__neg__", "__pos__", "__invert__"))
PRETENDING = frozenset(
    f"__{name}__"
    for name in ("bool", "float", "int", "index", "complex", "abs", "round", "class", "getattribute", "instancecheck",
                 "subclasscheck", "torch_function", "torch_dispatch", "array", "array_ufunc", "array_function",
                 "array_interface")
)  # fmt: skip
DEEPEST = 8  # lists within lists
LONG = 1000  # items; of a longer list that is an argument, the lists inside are not looked into

ndarray = sys.modules["numpy"].ndarray if "numpy" in sys.modules else None

# As they are, whatever a learner's class or metaclass says of itself.
lineage = type.__dict__["__mro__"].__get__
attributes = type.__dict__["__dict__"].__get__
called = type.__dict__["__name__"].__get__


check: dict = {}


def of_check(names: dict) -> None:
    """Says which names are the check's own."""
    check["names"] = names


def closed(value):
    """A function that the check defined, as something that can be called and not looked into; others as they are."""
    if type(value) is not types.FunctionType or value.__globals__ is not check["names"]:
        return value
    shut = lru_cache(maxsize=0)(value)  # C code that calls; without a size it remembers nothing
    del shut.__wrapped__
    return shut


class Bent(BaseException):
    """A value whose class decides what the check would have decided."""


def arms(kinds, tensors: frozenset, honest: dict, mark: str) -> dict:
    """The functions, by the names that a check has for them.

    `kinds` are the classes that are not the learner's (Kinds); `tensors` are PyTorch's own. `honest` gives for classes
    that the lesson itself names (by id) the special methods that they are asked to have; `mark` is the module of the
    check's own classes.
    """
    fine, known, holding, silent, masks = kinds.fine, kinds.known, kinds.holding, kinds.silent, kinds.masks

    def speaks(kind: type, of: frozenset) -> str:
        """The special method by which a class speaks for itself, if there is one."""
        for one in lineage(kind):
            module = attributes(one).get("__module__")
            if id(one) in fine or (type(module) is str and module == mark):
                continue
            allowed = frozenset(honest.get(id(one), ())) | (CALCULATING if id(one) in honest else frozenset())
            for method in of - allowed:
                if method in attributes(one):
                    return f"{called(one)}.{method}"
        return "" if id(type(kind)) in fine else speaks(type(kind), of)

    def look(value, of: frozenset, depth: int, longest: float) -> None:
        kind = type(value)
        ordinary = type(kind) is type and kind in known
        if ordinary and kind in silent:
            return
        if not ordinary and id(kind) not in fine:
            method = speaks(kind, of)
            if method:
                raise Bent(f"{method} is the learner's own: the value would judge itself")
        if kind in masks or attributes(kind).get("__module__") == "unittest.mock":
            raise Bent(f"{called(kind)} says that it equals what is wanted")
        if kind is ndarray and value.dtype.hasobject:
            raise TypeError("an array of objects: they could judge themselves, and are no numbers")
        if kind in tensors and any(hasattr(kind, name) for name in vars(value)):
            raise Bent(f"a tensor's {', '.join(vars(value))} is the learner's own: the value would judge itself")
        if depth and not (ordinary and kind not in holding):
            for item in telling(inside(value, lineage(kind)), longest):
                look(item, of, depth - 1, longest)

    def telling(items: tuple, longest: float):
        """The items that have to be looked at: none where all are numbers, say; of each other class one, or all."""
        kinds = tuple(map(type, items))
        if all(map(is_, map(type, kinds), repeat(type))):  # a class of another kind could say that it is `int`
            different = set(kinds)
            if different <= silent or (different <= known and len(items) > longest):
                return ()
        return items if len(items) <= longest else dict(zip(map(id, kinds), items, strict=True)).values()

    def inside(value, classes: tuple) -> tuple:
        """What a container holds, whatever its class says."""
        if dict in classes:
            return (*dict.keys(value), *dict.values(value))
        for container in (list, tuple, set, frozenset, deque):
            if container in classes:
                return tuple(container.__iter__(value))
        return ()

    def operand(value):
        kind = type(value)
        if type(kind) is type and kind in silent:  # as `look`, for the many numbers of a loop
            return value
        look(value, everything, DEEPEST, float("inf"))
        return value

    def argument(value):
        kind = type(value)
        if type(kind) is type and kind in silent:
            return closed(value) if kind is types.FunctionType else value
        look(value, PRETENDING, DEEPEST, LONG)
        return closed(value)

    def handed(value):
        """To a function of our own cells, which compares and calculates as a check does, and is not rewritten."""
        look(value, everything, DEEPEST, LONG)
        return closed(value)

    def collection(value):
        """What is asked whether it contains something: a dict or a set answers at once, however large."""
        large = issubclass(type(value), (dict, set, frozenset))
        look(value, comparing, 0 if large else DEEPEST, float("inf"))
        return value

    def owner(value):
        """Of an attribute: what is in it is looked at when it is taken out."""
        look(value, PRETENDING, 0, LONG)
        return value

    comparing, everything = COMPARING | PRETENDING, COMPARING | CALCULATING | PRETENDING
    named = {"operand": operand, "argument": argument, "handed": handed, "collection": collection, "owner": owner}
    return {f"__{name}__": function for name, function in named.items()}
