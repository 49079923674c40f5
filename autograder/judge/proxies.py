"""Proxies: each stands at one end of a link for an object of the other end, which describes it once and then answers.

A function becomes a function, a class a class, a module a module (its parameters are mirrors, its forward is a call), a
Triton kernel a kernel; anything else an object with the same special methods as the original.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
from torch import nn

from autograder.judge import tensors
from autograder.judge.messages import Hook, Launch
from autograder.judge.sources import ARITHMETIC, COMPARING, COMPUTING
from autograder.judge.values import Refused, name_class

UNARY = (
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "neg",
    "pos",
    "abs",
    "invert",
    "round",
    "trunc",
    "len",
    "getitem",
    "setitem",
    "delitem",
    "contains",
    "iter",
    "next",
    "reversed",
    "call",
    "enter",
    "exit",
    "bool",
    "int",
    "float",
    "index",
    "complex",
    "repr",
    "str",
    "format",
    "missing",
)
OPERATORS = [
    *(f"__{side}{name}__" for side in ("", "r", "i") for name in ARITHMETIC),
    *(f"__{name}__" for name in UNARY),
]
OF_OBJECT = {name for name in OPERATORS if getattr(object, name, None) is not None}
ITEMS = ("__len__", "__getitem__", "__iter__")
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
KNOWN_BASES = ("torch.", "collections", "builtins:", "typing:", "abc:", "enum:", "functools:")
COMMON = frozenset(vars(nn.Module()))  # attributes that every module has
PYTORCH = "torch.nn.modules."  # modules of these classes are the same at both ends
IS_INSTANCE = "autograder.judge.agent:is_instance"
PLACE = "_judge_place"  # where a proxy keeps its link and its number


def is_special(name: object) -> bool:
    """Whether Python or a library may ask an object itself for this attribute, as `__reduce_ex__`."""
    return str(name).startswith("__") and str(name).endswith("__")


def find_number(value: object, link) -> int | None:
    """The number at the other end, if a value is a proxy of this link."""
    place = None
    if isinstance(value, RemoteType):
        place = type.__getattribute__(value, "__dict__").get(PLACE)
    elif isinstance(value, FunctionType):
        place = value.__dict__.get(PLACE)
    else:
        try:
            place = object.__getattribute__(value, "__dict__").get(PLACE)
        except (AttributeError, TypeError):
            return None
    return place[1] if place and place[0] is link else None


# --- describing an object to the other end -----------------------------------------------------------------------


def describe(value: object, number: int, link) -> dict:
    kind = type(value)
    if isinstance(value, nn.Module):
        return describe_module(value, number, link)
    if isinstance(value, type):
        is_module = issubclass(value, nn.Module)
        return {"kind": "class", "name": value.__name__, "module": is_module, "bases": list_bases(value)}
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType)):
        name = getattr(value, "__name__", "function")
        return {
            "kind": "function",
            "name": name,
            "doc": getattr(value, "__doc__", None),
            "signature": describe_signature(value, link),
        }
    if hasattr(kind, "__getitem__") and hasattr(value, "fn") and kind.__module__.startswith("triton."):
        return {"kind": "kernel", "name": getattr(value, "__name__", getattr(value.fn, "__name__", "kernel"))}
    return {
        "kind": "object",
        "name": kind.__name__,
        "bases": list_bases(kind),
        "operators": list_operators(kind),
        "before_numpy": is_before_numpy(kind),
        "hashable": kind.__hash__ is not None,
    }


def is_before_numpy(kind: type) -> bool:
    """Whether x answers `array + x`, because NumPy's binary operators step back for its class."""
    if hasattr(kind, "__array_ufunc__"):
        return kind.__array_ufunc__ is None
    priority = getattr(kind, "__array_priority__", None)
    return isinstance(priority, (int, float)) and priority > 0


def list_bases(kind: type) -> list[str]:
    names = [name_class(base) for base in kind.__mro__ if base is not object]
    return [name for name in names if name.startswith(KNOWN_BASES)]


def list_operators(kind: type) -> list[str]:
    return [
        name
        for name in OPERATORS
        if getattr(kind, name, None) is not None
        and (name not in OF_OBJECT or getattr(kind, name) is not getattr(object, name))
    ]


def describe_signature(function: Callable, link) -> list | None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [
        [
            p.name,
            int(p.kind),
            p.default is not p.empty,
            None if p.default is p.empty or link.judges else repr(p.default)[:80],
        ]
        for p in parameters
    ]


def describe_module(module: nn.Module, number: int, link) -> dict:
    library = next((base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.")), nn.Module)
    own = [base for base in type(module).__mro__ if not base.__module__.startswith("torch.") and base is not object]
    link.share_module(number, module)
    return {
        "kind": "module",
        "name": type(module).__name__,
        "library": name_class(library),
        "methods": sorted({name for base in own for name in vars(base) if not hasattr(nn.Module, name)}),
        "operators": [
            name for name in list_operators(type(module)) if name in (*ITEMS, *COMPARING, *COMPUTING, "__contains__")
        ],
        "exact": type(module) is library and library.__module__.startswith(PYTORCH) and "forward" not in vars(module),
        "attributes": describe_attributes(module, link) if type(module) is library else [],
        "parameters": [[name, link.encode(p)] for name, p in module._parameters.items()],
        "buffers": [
            [name, link.encode(b), name not in module._non_persistent_buffers_set]
            for name, b in module._buffers.items()
        ],
        "modules": [[name, link.encode(child)] for name, child in module._modules.items()],
        "training": module.training,
    }


def describe_attributes(module: nn.Module, link) -> list:
    own = {name: value for name, value in vars(module).items() if name not in COMMON}
    return [[name, link.encode(value)] for name, value in own.items()]


def describe_built(module: nn.Module, path: str, link) -> dict:
    """Describes the contents of a module whose class the other end has."""
    return {
        "class": path,
        "attributes": describe_attributes(module, link),
        "parameters": [[name, link.encode(p)] for name, p in module._parameters.items()],
        "buffers": [
            [name, link.encode(b), name not in module._non_persistent_buffers_set]
            for name, b in module._buffers.items()
        ],
        "modules": [[name, link.encode(child)] for name, child in module._modules.items()],
        "training": module.training,
        "hooks": [[kind, name, link.encode(hook)] for (kind, name), hook in link.list_hooks(module).items()],
    }


# --- proxies -----------------------------------------------------------------------------------------------------


def make_proxy(link, number: int, description: dict) -> object:
    kind = description.get("kind")
    if kind == "function":
        return make_function(link, number, description)
    if kind == "class":
        return make_class(link, number, description)
    if kind == "module":
        return make_module(link, number, description)
    if kind == "kernel":
        return Kernel(link, number, str(description["name"]))
    if kind == "object":
        return make_object(link, number, description)
    raise Refused("a handle of no known kind")


def make_function(link, number: int, description: dict) -> Callable:
    def function(*args, **kwargs):
        return link.call_function(number, function, args, kwargs)

    function.__name__ = function.__qualname__ = str(description["name"])
    function.__doc__ = description.get("doc")
    setattr(function, PLACE, (link, number))
    if description.get("signature") is not None:
        try:
            parameters = [
                inspect.Parameter(
                    name, inspect._ParameterKind(kind), default=default if has else inspect.Parameter.empty
                )
                for name, kind, has, default in description["signature"]
            ]
            function.__signature__ = inspect.Signature(parameters)
        except (TypeError, ValueError):
            pass
    return function


class RemoteType(type):
    """A class of the other end: calls make objects there, and its attributes are asked there."""

    def __call__(cls, *args, **kwargs):
        link, number = type.__getattribute__(cls, "__dict__").get(PLACE) or (None, None)
        if link is None:
            raise TypeError(f"{cls.__name__} derives from a class of the learner's: a check cannot do that")
        return link.call(["object", number], args, kwargs)

    def __getattr__(cls, name: str) -> object:
        place = type.__getattribute__(cls, "__dict__").get(PLACE)
        if place is None or (name.startswith("__") and name.endswith("__") and name not in OPERATORS):
            raise AttributeError(name)
        return place[0].request_attribute(["object", place[1]], name)

    def __instancecheck__(cls, value: object) -> bool:
        place = type.__getattribute__(cls, "__dict__").get(PLACE)
        if place is None:
            return type.__instancecheck__(cls, value)
        if find_number(value, place[0]) is None:
            return False
        return bool(place[0].call(["library", IS_INSTANCE], (value, cls), {}))

    def __subclasscheck__(cls, other: type) -> bool:
        place = type.__getattribute__(cls, "__dict__").get(PLACE)
        if place is None or find_number(other, place[0]) is None:
            return type.__subclasscheck__(cls, other)
        return bool(place[0].call(["library", "builtins:issubclass"], (other, cls), {}))

    def __setattr__(cls, name: str, value: object) -> None:
        place = type.__getattribute__(cls, "__dict__").get(PLACE)
        if place is None:
            type.__setattr__(cls, name, value)
        else:
            place[0].request_attribute(["object", place[1]], name, "set", value)

    def __delattr__(cls, name: str) -> None:
        place = type.__getattribute__(cls, "__dict__").get(PLACE)
        if place is None:
            type.__delattr__(cls, name)
        else:
            place[0].request_attribute(["object", place[1]], name, "delete")


def make_class(link, number: int, description: dict) -> type:
    base = nn.Module if description["module"] else next(iter(find_local_bases(description["bases"])), object)
    try:
        return RemoteType(str(description["name"]), (base,), {PLACE: (link, number)})
    except TypeError:  # a base with a metaclass of its own
        return RemoteType(str(description["name"]), (object,), {PLACE: (link, number)})


def find_local_bases(paths: list[str]) -> list[type]:
    """The library classes among these paths that this end has loaded too."""
    found = []
    for path in map(str, paths):
        module, _, name = path.partition(":")
        base = getattr(sys.modules.get(module), name, None) if path.startswith(KNOWN_BASES) else None
        if isinstance(base, type):
            found.append(base)
    return found


class RemoteObject:
    """An object of the other end."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        link, number = find_place(self)
        return link.request_attribute(["object", number], name)

    def __setattr__(self, name: str, value: object) -> None:
        link, number = find_place(self)
        link.request_attribute(["object", number], name, "set", value)

    def __delattr__(self, name: str) -> None:
        link, number = find_place(self)
        link.request_attribute(["object", number], name, "delete")

    def __deepcopy__(self, memo: dict) -> object:
        link, _ = find_place(self)
        return link.call(["library", "copy:deepcopy"], (self,), {})

    def __copy__(self) -> object:
        link, _ = find_place(self)
        return link.call(["library", "copy:copy"], (self,), {})

    def __dir__(self) -> list:
        link, _ = find_place(self)
        return link.call(["library", "builtins:dir"], (self,), {})

    def __hash__(self) -> int:
        return hash(find_place(self)[1])


def find_place(proxy: object) -> tuple:
    return object.__getattribute__(proxy, "__dict__")[PLACE]


def make_operator(name: str) -> Callable:
    def operate(self, *args, **kwargs):
        link, number = find_place(self)
        result = link.call(["method", number, name], args, kwargs)
        return bool(result) if name == "__bool__" else result

    operate.__name__ = name
    return operate


_classes: dict[tuple, type] = {}


def make_refusal(name: str) -> Callable:
    """Makes a comparison or an operation that raises, for classes whose exercise defines none: what it gives would be
    the learner's word. Two proxies are equal if they are the same one."""
    use = "compared" if name in COMPARING else "computed"

    def compare(self, *others):
        if name in ("__eq__", "__ne__") and isinstance(others[0], RemoteObject):
            return (self is others[0]) == (name == "__eq__")
        raise AssertionError(f"an object of class {type(self).__name__} is no value that can be {use} with others.")

    return compare


def make_object(link, number: int, description: dict) -> RemoteObject:
    own = link.list_operators(str(description["name"]))
    # Without its own `__contains__`, Python looks for a value among those that the object's `__iter__` gives.
    names = tuple(
        name for name in description["operators"] if name in OPERATORS and (name != "__contains__" or name in own)
    )
    known = tuple(find_local_bases(description["bases"]))
    before_numpy, hashable = bool(description.get("before_numpy")), bool(description.get("hashable"))
    key = (description["name"], names, known, own, before_numpy, hashable)
    if key not in _classes:
        members = {name: make_operator(name) for name in names}
        decisive = {*COMPARING, *(name for name in names if name in COMPUTING)}
        members |= {name: make_refusal(name) for name in decisive if name not in own}
        members["__hash__"] = RemoteObject.__hash__ if hashable else None
        if before_numpy:
            members["__array_ufunc__"] = None
        if known:
            members["__class__"] = property(lambda self: known[0])
        _classes[key] = type(str(description["name"]), (RemoteObject,), members)
    made = object.__new__(_classes[key])
    object.__getattribute__(made, "__dict__")[PLACE] = (link, number)
    return made


@cache
def make_plain_class(name: str) -> type:
    """A class with nothing but a name, for copies of things (link.py)."""
    return type(name, (), {})


# --- modules -----------------------------------------------------------------------------------------------------


class RemoteModule(nn.Module):
    """A module of the other end: its parameters, buffers and modes are at both ends, its forward is a call.

    The methods of nn.Module itself (parameters, state_dict, train, to …) run at this end, even if the other end
    overrides them.
    """

    def forward(self, *args, **kwargs):
        link, number = self.__dict__[PLACE]
        return link.call(["object", number], args, kwargs)

    def __getattr__(self, name: str) -> object:
        for place in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(place, ()):
                return self.__dict__[place][name]
        if PLACE not in self.__dict__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        link, number = self.__dict__[PLACE]
        return link.request_attribute(["object", number], name)

    def __setattr__(self, name: str, value: object) -> None:
        known = any(name in self.__dict__[place] for place in ("_parameters", "_buffers", "_modules"))
        if known or isinstance(value, (nn.Parameter, nn.Module)) or name == "training":
            super().__setattr__(name, value)
        else:
            link, number = self.__dict__[PLACE]
            link.request_attribute(["object", number], name, "set", value)

    def __deepcopy__(self, memo: dict) -> object:
        return self.__dict__[PLACE][0].call(["library", "copy:deepcopy"], (self,), {})


def make_property(name: str) -> property:
    def get(self):
        link, number = self.__dict__[PLACE]
        return link.request_attribute(["object", number], name)

    return property(get)


def make_registration(kind: str) -> Callable:
    def register(self, hook, **options):
        link, number = self.__dict__[PLACE]
        with link.asking():
            return link.decode(link.request(Hook(number, kind, link.encode(hook), link.encode(options))).value)

    return register


for _kind in HOOKS:
    setattr(RemoteModule, _kind, make_registration(_kind))


def make_module(link, number: int, description: dict) -> nn.Module:
    library = next(iter(find_local_bases([description["library"]])), nn.Module)
    if not issubclass(library, nn.Module):
        raise Refused("a module that is none")
    if description["exact"] and library.__module__.startswith(PYTORCH):
        return finish_module(make_library_module(link, number, library, description), link, number, description)
    # No `__torch_function__`, `__array__` or `__sub__`: with those a module would decide what it equals.
    names = tuple(
        name for name in map(str, description["methods"]) if not (hasattr(nn.Module, name) or is_special(name))
    )
    allowed = (*ITEMS, *link.list_operators(str(description["name"])))
    operators = tuple(name for name in description["operators"] if name in OPERATORS and name in allowed)
    key = ("module", description["name"], library, names, operators)
    if key not in _classes:
        members = {str(name): make_property(str(name)) for name in names}
        members |= {name: make_operator(name) for name in operators}
        base = (RemoteModule, library) if library is not nn.Module else (RemoteModule,)
        _classes[key] = type(str(description["name"]), base, members)
    made = object.__new__(_classes[key])
    nn.Module.__init__(made)
    return finish_module(made, link, number, description)


def make_library_module(link, number: int, library: type, description: dict) -> nn.Module:
    """Makes a module of the same PyTorch class, with the same parameters. Its hooks are registered at both ends: either
    can call it."""
    made = object.__new__(library)
    nn.Module.__init__(made)
    for name, value in description["attributes"]:
        if isinstance(name, str) and name not in COMMON and not is_special(name) and not hasattr(library, name):
            made.__dict__[name] = link.decode(value)
    for kind in HOOKS:
        made.__dict__[kind] = make_double_registration(made, kind)
    return made


def finish_module(made: nn.Module, link, number: int, description: dict) -> nn.Module:
    made.__dict__[PLACE] = (link, number)
    fill_module(made, description, link)
    link.keep_import(number, made)
    link.share_module(number, made)
    return made


class HookHandles:
    """Removes a hook from both ends."""

    def __init__(self, *handles: object):
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def make_double_registration(module: nn.Module, kind: str) -> Callable:
    def register(hook, **options):
        here = getattr(type(module), kind)(module, hook, **options)
        return HookHandles(here, make_registration(kind)(module, hook, **options))

    return register


def fill_module(module: nn.Module, description: dict, link) -> None:
    for name, value in description["parameters"]:
        module._parameters[name] = link.decode(value)
    for name, value, persistent in description["buffers"]:
        module._buffers[name] = link.decode(value)
        if not persistent:
            module._non_persistent_buffers_set.add(name)
    for name, value in description["modules"]:
        module._modules[name] = link.decode(value)
    module.__dict__["training"] = bool(description["training"])


def build_module(link, number: int, description: dict) -> nn.Module:
    """Builds a module that the judge handed over, of a class that this end has."""
    kind = link.find_class(description["class"])
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name, value in description["attributes"]:
        made.__dict__[name] = link.decode(value)
    fill_module(made, description, link)
    for kind, name, hook in description["hooks"]:
        link.set_part(made, kind, name, link.decode(hook))
    link.share_module(number, made)
    return made


# --- kernels -----------------------------------------------------------------------------------------------------


class Kernel:
    """A learner's Triton kernel: `kernel[grid](…)` launches it in the learner's process, on copies of the storages that
    come back."""

    def __init__(self, link, number: int, name: str):
        self.__dict__[PLACE] = (link, number)
        self.__name__ = name

    def __getitem__(self, grid: object) -> Callable:
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        link, number = self.__dict__[PLACE]
        return link.request_attribute(["object", number], name)

    def run(self, *args, grid: object, warmup: bool = False, **kwargs) -> None:
        """Launches the kernel for an autotuner, which calls this method."""
        if not warmup:
            self.launch(grid, args, kwargs)

    def launch(self, grid: object, args: tuple, kwargs: dict) -> None:
        link, number = self.__dict__[PLACE]
        sizes: list = []

        storages: dict[int, list] = {}

        def compute_grid(meta: dict) -> tuple:
            sizes.append(tuple(grid(meta)))
            return sizes[-1]

        def count_programs() -> tuple:
            """The grid, as the launcher's own arguments say it; an autotuned kernel's end adds what it chose."""
            try:
                return tuple(grid(kwargs)) if callable(grid) else tuple(grid)
            except KeyError:
                return sizes[-1] if sizes else ()

        def encode(value: object) -> object:
            return tensors.place_in_storage(value, storages) if torch.is_tensor(value) else link.encode(value)

        with link.asking():
            encoded = [encode(value) for value in args]
            named = [[name, encode(value)] for name, value in kwargs.items()]
            only = [m.only for m in link.measurements if m.only is not None]
            only = tensors.place_in_storage(only[0], storages) if only else None
            held = [storage for _, storage in storages.values()]
            places = [storage.data_ptr() for storage in held]
            sent = [tensors.read_storage(storage) for storage in held]
            shape = link.encode(compute_grid if callable(grid) else tuple(grid))
            with link.without_launches():  # they are counted below, out of the learner's reach
                target, around = ["object", number], link.list_measurements()
                answer = link.request(Launch(target, shape, encoded, named, sent, places, only, around))
            for place, raw in answer.storages:
                tensors.fill_storage(held[place], raw)
        for counted in link.launches:
            counted.note(self.__name__, count_programs())
