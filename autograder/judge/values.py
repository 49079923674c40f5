"""Turns values into messages and back.

Numbers, texts, None and bytes pass as they are; every other value becomes a list that begins with a tag. A value
without a form of its own (a function, an object of a class that only one end knows) stays where it is and passes as a
handle. From the learner's messages the judge builds only values: they can name no class, function or module, except a
dataclass or named tuple that the judge has itself.
"""

import dataclasses
import importlib
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

PLAIN = (bool, float, str, bytes, type(None))
CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
    "deque": deque,
}
MAPPINGS = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
CONSTANTS = {"ellipsis": ..., "notimplemented": NotImplemented}
CONSTRUCTED = {  # values that their class makes from plain parts
    "slice": (slice, lambda v: [v.start, v.stop, v.step]),
    "range": (range, lambda v: [v.start, v.stop, v.step]),
    "complex": (complex, lambda v: [v.real, v.imag]),
    "fraction": (Fraction, lambda v: [v.numerator, v.denominator]),
    "bytearray": (bytearray, lambda v: [bytes(v)]),
}
TORCH_NAMES = (torch.dtype, torch.layout, torch.memory_format)
BASES = {  # an object of a class derived from one of these passes as its plain value, whatever its own methods return
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    list: list.copy,
    dict: dict.copy,
    tuple: tuple,
    set: set.copy,
    frozenset: frozenset,
}
DEPTH = 200


class Refused(TypeError):
    """A value or a request that this end does not accept."""


@lru_cache
def name_class(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


class Codec:
    """Encodes and decodes the values of one end. A link (link.py) adds tensors, generators and handles to it."""

    sent: dict | None = None  # while a value is encoded: each array's id → [its place among the arrays, the array]
    received: list | None = None  # while a value is decoded: its arrays so far
    repeated = False  # whether an array occurred in it twice

    def encode(self, value: object, depth: int = 0) -> object:
        """Encodes a value. An array that occurs in it twice is one array at the other end too."""
        if depth:
            return self.encode_part(value, depth)
        outer, self.sent = self.sent, {}
        try:
            return self.encode_part(value, 0)
        finally:
            self.sent = outer

    def decode(self, encoded: object, depth: int = 0) -> object:
        if depth:
            return self.decode_part(encoded, depth)
        outer, self.received = self.received, []
        try:
            return self.decode_part(encoded, 0)
        finally:
            self.received = outer

    def encode_part(self, value: object, depth: int) -> object:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else ["int", hex(value)]
        if depth > DEPTH:
            raise Refused("nested too deeply to be handed over")
        if isinstance(value, torch.Tensor):
            return self.encode_tensor(value)
        for tag, container in CONTAINERS.items():
            if kind is container:
                return [tag, [self.encode(item, depth + 1) for item in value]]
        for tag, mapping in MAPPINGS.items():
            if kind is mapping or (tag == "dict" and kind is defaultdict):
                return [tag, [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]]
        for tag, (made, parts) in CONSTRUCTED.items():
            if kind is made:
                return [tag, [self.encode(part) for part in parts(value)]]
        for tag, constant in CONSTANTS.items():
            if value is constant:
                return [tag]
        if isinstance(value, TORCH_NAMES):
            return ["torch", str(value).removeprefix("torch.")]
        if kind is torch.device:
            return ["device", str(value)]
        if isinstance(value, np.generic) and value.dtype.hasobject is False:
            return ["scalar", value.dtype.str, value.tobytes()]
        if kind is np.ndarray and not value.dtype.hasobject:
            if id(value) in self.sent:
                return ["same", self.sent[id(value)][0]]
            self.sent[id(value)] = [len(self.sent), value]
            return self.encode_array(value)
        if isinstance(value, np.dtype):
            return ["numpy", value.str]
        if isinstance(value, torch.Generator):
            return self.encode_generator(value)
        if kind is np.random.Generator:
            return ["numpy generator", pack_state(value.bit_generator.state)]
        if kind is random.Random:
            return ["random", self.encode(value.getstate())]
        if kind is torch.nn.Module:
            return self.encode_object(value)
        if is_named_tuple(value):
            items = [self.encode(item, depth + 1) for item in value]
            return ["named", self.name_record(kind), kind.__name__, list(kind._fields), items]
        if is_record(value) and (name := self.name_record(kind)):
            held = [
                [f.name, self.encode(getattr(value, f.name), depth + 1)]
                for f in dataclasses.fields(value)
                if hasattr(value, f.name)
            ]
            return ["record", name, held]
        if isinstance(value, tuple) and kind.__module__ == "torch.return_types":
            fields = [name for name in dir(kind) if not name.startswith(("_", "n_")) and name not in ("count", "index")]
            items = [self.encode(item, depth + 1) for item in value]
            order = sorted(fields, key=lambda name: next(i for i, v in enumerate(value) if v is getattr(value, name)))
            return ["named", "", kind.__name__, order, items]
        if isinstance(value, BaseException):
            return ["exception", self.encode_exception(value)]
        for base, plain in BASES.items():
            if isinstance(value, base) and not self.is_exercise_class(kind):
                return self.encode(plain(value), depth + 1)
        return self.encode_object(value)

    def decode_part(self, encoded: object, depth: int) -> object:
        if not isinstance(encoded, list):
            return encoded
        if not encoded or depth > DEPTH:
            raise Refused("no value")
        tag, *parts = encoded
        if tag in CONTAINERS:
            items = [self.decode(item, depth + 1) for item in parts[0]]
            return items if tag == "list" else CONTAINERS[tag](items)
        if tag in MAPPINGS:
            pairs = [(self.decode(k, depth + 1), self.decode(v, depth + 1)) for k, v in parts[0]]
            return MAPPINGS[tag](dict(pairs))
        if tag in CONSTRUCTED:
            return CONSTRUCTED[tag][0](*(self.decode(part) for part in parts[0]))
        if tag in CONSTANTS:
            return CONSTANTS[tag]
        if tag == "same":
            if parts[0] not in range(len(self.received)):
                raise Refused("the same as nothing")
            self.repeated = True
            return self.received[parts[0]]
        decoder = getattr(self, "decode_" + str(tag).replace(" ", "_"), None)
        if decoder is None:
            raise Refused(f"a value of no known kind: {str(tag)[:40]}")
        value = decoder(*parts)
        if tag == "array":
            self.received.append(value)
        return value

    # --- one method for each tag ---

    def decode_int(self, text: str) -> int:
        return int(text, 16)

    def decode_torch(self, name: str) -> object:
        value = getattr(torch, name, None)
        if not isinstance(value, TORCH_NAMES):
            raise Refused("no constant of PyTorch's")
        return value

    def decode_device(self, name: str) -> torch.device:
        return torch.device(name)

    def decode_scalar(self, dtype: str, raw: bytes) -> np.generic:
        return np.frombuffer(raw, _make_plain_dtype(dtype))[0]

    def decode_numpy(self, dtype: str) -> np.dtype:
        return _make_plain_dtype(dtype)

    def encode_array(self, value: np.ndarray) -> list:
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        return ["array", value.dtype.str, list(value.shape), order, value.tobytes(order)]

    def decode_array(self, dtype: str, shape: list, order: str, raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, _make_plain_dtype(dtype)).reshape(shape, order=order).copy(order=order)

    def decode_numpy_generator(self, state: list) -> np.random.Generator:
        state = unpack_state(state)
        kind = getattr(np.random, str(state.get("bit_generator")), None)
        if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
            raise Refused("no generator of NumPy's")
        made = kind()
        made.state = state
        return np.random.Generator(made)

    def decode_random(self, state: list) -> random.Random:
        made = random.Random()
        made.setstate(self.decode(state))
        return made

    def decode_named(self, known: str, name: str, fields: list, items: list) -> tuple:
        items = [self.decode(item, 1) for item in items]
        kind = self.find_record(known) if known else None
        if kind is None or not issubclass(kind, tuple):
            kind = namedtuple(name, fields, rename=True)
        return tuple.__new__(kind, items)

    def decode_record(self, name: str, held: list) -> object:
        kind = self.find_record(name)
        if kind is None or not dataclasses.is_dataclass(kind):
            raise Refused(f"a record of an unknown class {name[:80]}")
        made = object.__new__(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        for field, value in held:
            if field not in known:
                raise Refused(f"{name[:80]} has no field {str(field)[:80]}")
            object.__setattr__(made, field, self.decode(value, 1))
        return made

    def decode_exception(self, encoded: list) -> BaseException:
        return self.make_exception(encoded)

    def encode_exception(self, error: BaseException) -> list:
        """[class names from the most special on, plain arguments or None, text]."""
        args = []
        for value in error.args:
            plain = type(value) in (*PLAIN, int) and not (isinstance(value, float) and math.isnan(value))
            args.append(self.encode(value) if plain else ["lost"])
        try:
            text = str(error)
        except Exception as broken:
            text = f"({type(broken).__name__} in its own text)"
        names = [kind.__name__ for kind in type(error).__mro__ if kind is not object]
        return [names, None if ["lost"] in args else args, text[:20_000]]

    # --- methods that a link overrides ---

    def is_exercise_class(self, kind: type) -> bool:
        """Whether an exercise asks for this class: its objects then pass as handles, not as plain values."""
        return True

    def name_record(self, kind: type) -> str:
        """The name by which both ends know a dataclass or a named tuple; "" if only this end knows it."""
        return ""

    def find_record(self, name: str) -> type | None:
        return None


def _make_plain_dtype(dtype: str) -> np.dtype:
    made = np.dtype(dtype)
    if made.hasobject:
        raise Refused("an array of objects")
    return made


def pack_state(state: object) -> object:
    """A bit generator's state, with its large numbers as text."""
    if isinstance(state, dict):
        return {key: pack_state(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return ["array", state.dtype.str, state.tobytes()]
    return hex(state) if isinstance(state, int) and abs(state) >= 2**63 else state


def unpack_state(state: object) -> object:
    if isinstance(state, dict):
        return {key: unpack_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return np.frombuffer(state[2], _make_plain_dtype(state[1])).copy()
    return int(state, 16) if isinstance(state, str) and state.startswith("0x") else state


def find_attribute(path: str) -> object:
    """The object at a path "module:name.name"."""
    module, _, name = path.partition(":")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value
