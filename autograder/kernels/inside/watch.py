"""How the libraries were, and what of them was replaced."""

import builtins
import ctypes
import gc
import os
import sys
import types
from contextlib import suppress

# Libraries that checks stand on. Others may change as they like: Triton's interpreter and Matplotlib replace functions
# of their own all the time.
WATCHED = ("torch", "torch.nn", "torch.testing", "torch.autograd", "torch.linalg", "torch.special", "torch.fft",
           "torch.functional", "torch.overrides", "torch.optim", "torch.random", "torch.utils", "torch._tensor",
           "torch._C", "numpy", "llm40", "unittest", "tokenizers", "sklearn")  # fmt: skip
# Of these only the modules, not their classes: an optimizer's first object replaces its class's method, for example.
SHALLOW = ("torch.utils", "torch.optim", "torch.nn.attention", "numpy.", "sklearn.")
UNWATCHED = ("sys", "threading", "signal", "warnings", "logging", "linecache", "tokenize", "site", "atexit", "asyncio",
             "selectors", "concurrent", "multiprocessing", "readline", "rlcompleter", "pdb", "getpass", "socket", "ssl",
             "webbrowser", "pydoc")  # fmt: skip
# A change here is noticed even if it has been taken back.
HEART = ("builtins", "math", "torch", "torch.nn.functional", "torch.testing", "torch.testing._comparison", "torch._C",
         "torch.linalg", "torch.Tensor", "llm40.checks", "random", "random.Random", "operator", "itertools",
         "collections", "fractions.Fraction", "numpy")  # fmt: skip
CALLABLE = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
            types.GetSetDescriptorType, types.ClassMethodDescriptorType, types.MemberDescriptorType, types.MethodType,
            types.ModuleType, type, property, classmethod, staticmethod)  # fmt: skip
CONSTANTS = ("torch", "math")  # of these also what is no function: torch.bool, math.pi
MOVING = ("torch.Storage",)  # names that PyTorch itself gives to something else: set_default_dtype does
# How a tensor looks is a matter of taste; copyreg notes the last in each class whose objects are copied.
FREE = ("__repr__", "__str__", "__format__", "__slotnames__")
CONTENTS = {
    "torch.testing._comparison": ("_DTYPE_PRECISIONS",),
    "llm40.checks": ("RTOL",),
    "torch.nn.modules.module": (
        "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    ),
}  # fmt: skip
# Operations that can also be replaced below Python (torch.library).
OPERATIONS = ("abs", "allclose", "isclose", "equal", "eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "lt.Tensor",
              "lt.Scalar", "le.Tensor", "le.Scalar", "gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar", "sub.Tensor",
              "all", "any", "max", "linalg_vector_norm", "isfinite", "isnan", "logical_and", "logical_or", "nonzero",
              "bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_not", "_local_scalar_dense", "_to_copy", "detach",
              "clone")  # fmt: skip
LAYERS = ("CPU", "CUDA", "Autograd", "Composite", "BackendSelect", "ADInplaceOrView", "Python:")
REAL = ("/CPU", "/CUDA", "/AutogradCPU", "/AutogradCUDA", "/Autograd", "/CompositeImplicitAutograd")
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the others cannot be changed from Python
VERSION = 24  # bytes into a dict, where CPython keeps a number that is another one after every change (PEP 509)


def version(names: dict):
    """The number that changes with a dict, as something whose `.value` is read; None where there is none."""
    return ctypes.c_uint64.from_address(id(names) + VERSION) if COUNTED else None


def counted() -> bool:
    tried = {}
    number = ctypes.c_uint64.from_address(id(tried) + VERSION)
    before = number.value
    tried["a"] = 1
    return sys.implementation.name == "cpython" and number.value != before


COUNTED = counted()
BASES = type.__dict__["__bases__"].__get__


class Entry:
    """A module or a class, and how its names were."""

    def __init__(self, label: str, owner, names: dict):
        self.label, self.owner, self.names = label, owner, names
        self.kept = dict(names)
        self.heart = label in HEART
        self.version = version(names)
        self.seen = self.version and self.version.value

    def touched(self) -> bool:
        """Whether anything happened to it since it was last seen."""
        if self.version is None:
            return True
        before, self.seen = self.seen, self.version.value
        return self.seen != before

    def set(self, name: str, value) -> None:
        if isinstance(self.owner, type):
            type.__setattr__(self.owner, name, value)
        else:
            self.names[name] = value

    def drop(self, name: str) -> None:
        if isinstance(self.owner, type):
            type.__delattr__(self.owner, name)
        else:
            del self.names[name]

    def inherited(self, name: str) -> bool:
        """Whether a new name hides another one: a builtin, or what a class inherits."""
        if isinstance(self.owner, type):
            return any(name in vars(base) for base in self.owner.__mro__[1:])
        return name in BUILTIN_NAMES

    def matters(self, name: str, kept) -> bool:
        if f"{self.label}.{name}" in MOVING:
            return False
        return isinstance(kept, CALLABLE) or callable(kept) or (self.label in CONSTANTS and not name.startswith("_"))

    def differences(self):
        """(name, its kept value or MISSING) for all that was replaced, removed, or put before something else."""
        for name, kept in self.kept.items():
            if self.names.get(name, MISSING) is not kept and name not in FREE and self.matters(name, kept):
                yield name, kept
        if len(self.names) > len(self.kept):
            for name in [name for name in self.names if name not in self.kept]:
                if self.inherited(name) and name not in FREE:
                    yield name, MISSING
                else:
                    self.kept[name] = self.names[name]


def strange_names(names: dict) -> bool:
    """Takes away names that are no plain strings, which could pass for another; whether there were any."""
    if all(type(name) is str for name in names):
        return False
    plain = {name: value for name, value in list(names.items()) if type(name) is str}
    names.clear()
    names.update(plain)
    return True


BUILTIN_NAMES = frozenset(vars(builtins))
MISSING = object()


def settle() -> None:
    """Lets PyTorch replace now what it replaces of its own when it is first asked to compile something."""
    if "torch._dynamo" in sys.modules:
        with suppress(ImportError, AttributeError):  # not PyTorch's public interface
            from torch._dynamo import eval_frame, mutation_guard

            mutation_guard.install_generation_tagging_init()
            eval_frame.TorchPatcher.patch()


class Watch:
    """How the libraries were; what of them was replaced."""

    def __init__(self):
        settle()
        self.entries = {}  # id of what is watched → Entry
        self.modules = {}
        self.operations = {}
        self.contents = [("os.environ", vars(os.environ), dict(vars(os.environ)))]
        self.cells = []  # what functions of the heart have enclosed
        self.kinds = []  # module and its class
        self.bases = []  # class and its bases
        self.look()

    def look(self) -> None:
        """Remembers what is new: modules that our own cells imported."""
        for name, module in list(sys.modules.items()):
            if name in self.modules or not isinstance(module, types.ModuleType) or not watched(name):
                continue
            self.modules[name] = module
            self.kinds.append((module, type(module)))
            self.remember(name, module, vars(module))
            for value in () if name.startswith(SHALLOW) else list(vars(module).values()):
                if isinstance(value, type) and value.__flags__ & HEAP_TYPE and watched(value.__module__):
                    self.remember(f"{value.__module__}.{value.__qualname__}", value, names_of(value))
            for content in CONTENTS.get(name, ()):
                self.contents.append((f"{name}.{content}", vars(module)[content], dict(vars(module)[content])))
        if "torch" in self.modules and not self.operations:
            self.operations = {name: registered(name) for name in OPERATIONS}
        if "torch" in self.modules:
            self.implemented = implemented()

    def accept(self) -> None:
        """Takes what was replaced for right: before a learner's first line, when the kernel has started."""
        settle()
        for entry in self.entries.values():
            if entry.touched():
                entry.kept = dict(entry.names)
        self.modules = {name: sys.modules.get(name, module) for name, module in self.modules.items()}
        self.contents = [(label, content, dict(content)) for label, content, _ in self.contents]

    def remember(self, label: str, owner, names: dict) -> None:
        if id(names) in self.entries:
            return
        entry = self.entries[id(names)] = Entry(label, owner, names)
        if isinstance(owner, type):
            self.bases.append((owner, BASES(owner)))
        for name, value in names.items() if entry.heart else ():
            if isinstance(value, types.FunctionType):
                self._enclosed(f"{label}.{name}", value)

    def _enclosed(self, label: str, function) -> None:
        """What a function of the heart does not show among its module's names: defaults, and what it has enclosed."""
        if function.__kwdefaults__:
            self.contents.append((label, function.__kwdefaults__, dict(function.__kwdefaults__)))
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                self.cells.append((label, cell, cell.cell_contents))

    def restore(self) -> list:
        """Puts back what was replaced, and says what that was."""
        return [("patched", label) for label in self._changes()]

    def replaced(self) -> list:
        """What a cell of ours met: replaced now (and put back here), or replaced and taken back while it ran."""
        return [("patched", label) for label in self._changes(heart=True)]

    def _changes(self, heart: bool = False) -> list:
        found = []
        for entry in list(self.entries.values()):
            if not entry.touched():
                continue
            if isinstance(entry.owner, types.ModuleType) and strange_names(entry.names):
                found.append(f"a name of {entry.label}")
            before = len(entry.kept)
            differences = list(entry.differences())
            for name, kept in differences:
                entry.set(name, kept) if kept is not MISSING else entry.drop(name)
                found.append(f"{entry.label}.{name}")
            if heart and entry.heart and entry.version and not differences and len(entry.kept) == before:
                found.append(f"{entry.label}, and put back")
            entry.touched()
        for name, module in self.modules.items():
            if sys.modules.get(name) is not module:
                sys.modules[name] = module
                found.append(f"sys.modules[{name!r}]")
        for owner, kind in self.kinds:
            if type(owner) is not kind:
                owner.__class__ = kind
                found.append(f"the class of {owner.__name__}")
        for owner, bases in self.bases:
            if BASES(owner) is not bases:
                owner.__bases__ = bases
                found.append(f"the bases of {owner.__name__}")
        for label, content, kept in self.contents:
            if len(content) != len(kept) or any(content.get(name, MISSING) is not kept[name] for name in kept):
                content.clear()
                content.update(kept)
                found.append(label)
        for label, cell, kept in self.cells:
            if cell.cell_contents is not kept:
                cell.cell_contents = kept
                found.append(label)
        if "torch" in self.modules:
            found += [f"torch.ops.{name}" for name in sorted(implemented() - self.implemented)]
            self.implemented = implemented()
        for name, kept in self.operations.items():
            if registered(name) != kept:
                found.append(f"torch.ops.aten.{name}")
        return found


def watched(name: str) -> bool:
    top = name.partition(".")[0]
    if top in UNWATCHED:
        return False
    if top == "torch":
        return name == "torch" or ".".join(name.split(".")[:2]) in WATCHED
    return top in WATCHED or top in sys.stdlib_module_names


def names_of(kind: type) -> dict:
    """The very dict behind a class's mappingproxy."""
    return gc.get_referents(kind.__dict__)[0]


def registered(operation: str) -> str:
    """Which functions PyTorch calls for an operation; not those of layers that are filled as they are first needed."""
    lines = sys.modules["torch"]._C._dispatch_dump(f"aten::{operation}").split("\n")
    return "\n".join(line for line in lines if line.startswith(LAYERS))


def implemented() -> frozenset:
    """The operations of PyTorch's own that somebody has implemented again from Python, for real tensors."""
    known = sys.modules["torch"].library._impls
    return frozenset(name for name in known if name.startswith("aten/") and name.endswith(REAL))
