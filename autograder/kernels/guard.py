"""Runs inside a kernel, from before a learner's first line: it runs what is ours there, and sees what bends it.

A check has to run in the learner's own process, among the learner's own objects. So that what runs there is the check,
and nothing but the check, it does not go through IPython, whose every part a cell can replace. It goes to a thread of
this module's, over a connection of its own:

- The door is that thread. What it receives and sends is sealed with a key that only its own frame holds. After a
  learner's first line it touches no object that a learner could have made, and calls nothing that one could have
  replaced: C functions taken beforehand, its own functions, its own copy of the builtins.
- Everything else happens in a fresh thread for each cell of ours, with its own state of PyTorch's modes.
- A check has names of its own: a copy of the notebook's, those that our cells made as we made them, and untouched
  builtins. What a check calls `expected` is no name of the notebook's.
- `Watch` knows every attribute of the libraries that checks stand on as it was. Before a cell of ours what was replaced
  is put back; after it, what was replaced meanwhile is found, also where it was put back since.
- `Sentry` is an audit hook (PEP 578), which nobody can remove: learners' code gets no frame, no list of all objects, no
  other function's code, no foreign memory.
- Canaries, assertions that must fail, are run after each check that passed.

What is found is reported with the next answer. None of this holds against code that writes to arbitrary memory.

The file is sent to the kernel as text (see guardian), as nothing of the project but llm40 is to be seen there. It needs
the standard library only.
"""

import _thread
import builtins
import ctypes
import gc
import hashlib
import linecache
import marshal
import os
import random
import socket
import sys
import sysconfig
import types
from collections import deque
from contextlib import suppress

SEAL = 32  # bytes
OURS = "<llm40 "  # how the names of our cells' files begin
MOST = 50  # reports of a kind
LARGE = 1_000_000  # numbers of a tensor; larger ones are not watched
TEXT = 20_000  # characters of what an exception says


# --- messages, sealed -----------------------------------------------------------------------------------------


def sealed(key: bytes, number: int, data: bytes) -> bytes:
    """A message that only those who have the key can read, or could have made; `number` is another one every time."""
    once = key + number.to_bytes(8, "big")
    stream = hashlib.shake_256(once).digest(len(data))
    hidden = (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")
    return hashlib.blake2b(once + hidden, key=key, digest_size=SEAL).digest() + hidden


def opened(key: bytes, number: int, message: bytes) -> bytes:
    """What `sealed` was given. ValueError for a message that is not of it."""
    once, hidden = key + number.to_bytes(8, "big"), message[SEAL:]
    if hashlib.blake2b(once + hidden, key=key, digest_size=SEAL).digest() != message[:SEAL]:
        raise ValueError("a message that is not ours")
    stream = hashlib.shake_256(once).digest(len(hidden))
    return (int.from_bytes(hidden, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(hidden), "big")


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(8, "big") + message


def received(receive, size: int) -> bytes:
    """That many bytes from a connection. EOFError where it ends before."""
    parts = b""
    while len(parts) < size:
        part = receive(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


# --- the door -------------------------------------------------------------------------------------------------


def open_door(path: str, names: dict) -> None:
    """Waits in a thread for the grader, at a socket of this path; `names` are the notebook's."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(1)
    _thread.start_new_thread(keep_door, (listener, path, names))


def keep_door(listener: socket.socket, path: str, names: dict) -> None:
    """Answers requests until the grader goes. The connection and its key are in this frame and nowhere else."""
    connection, _ = listener.accept()
    listener.close()
    os.unlink(path)
    receive, send = connection.recv, connection.sendall  # C code, whatever becomes of the class
    key = received(receive, SEAL)
    desk = Desk(names)
    number = 0
    while True:
        try:
            size = int.from_bytes(received(receive, 8), "big")
            request = marshal.loads(opened(key, number, received(receive, size)))
        except (EOFError, OSError, ValueError):
            return
        send(framed(sealed(key, number + 1, repr(answer(desk, request)).encode())))
        number += 2


def answer(desk: "Desk", request: dict) -> tuple:
    """What came of a request, as plain values: how it ended, with which exception, message, places, and reports."""
    box, ended = [], _thread.allocate_lock()
    ended.acquire()
    thread = _thread.start_new_thread(desk.serve, (request, box, ended))
    if not ended.acquire(timeout=request["seconds"]):
        interrupt(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
        if not ended.acquire(timeout=request["grace"]):
            return ("stuck", "", "", (), desk.reports())
        return ("timeout", "", "", (), desk.reports())
    return (*box[0], desk.reports())


interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Desk:
    """What the door's helpers know: the notebook's names, those that are ours, and the state to come back to."""

    def __init__(self, names: dict):
        self.names = names
        self.ours = {}  # name → value, as our cells made it
        self.watch = None
        self.sentry = None
        self.canaries = ()
        self.helpers = set()
        self.environ, self.environment = os.environ, {}
        self.dtype = None
        self.data = {}  # name → a tensor that our cells made, and a copy
        self.mark = f"check {os.urandom(16).hex()}"  # the module of the classes that a check makes
        self.found = []

    def reports(self) -> tuple:
        """What was found since the last time: (kind, what)."""
        found, self.found[:] = tuple(self.found), []
        return found

    def serve(self, request: dict, box: list, ended) -> None:
        """In a thread of its own: one request. Its outcome goes into the box."""
        streams = sys.stdout, sys.stderr
        sink = open(os.devnull, "w")  # noqa: SIM115
        try:
            sys.stdout = sys.stderr = sink  # what checks print is nothing to anybody
            box.append(getattr(self, request["do"])(**request["with"]))
        except BaseException as error:
            box.append(told(error))
        finally:
            sys.stdout, sys.stderr = streams
            sink.close()
            ended.release()

    def begin(self, modules: list, canaries: list, environment: dict, arms: bytes) -> tuple:
        """Before anything of the learner's: imports what the lesson will, and remembers how everything is."""
        for name in modules:
            with suppress(ImportError):  # told by the cell that needs it
                __import__(name)
        self.canaries = [(label, marshal.loads(code)) for label, code in canaries]
        self.environment = environment
        self.arms = marshal.loads(arms)
        self.builtins = dict(vars(builtins))
        self.helpers = library_threads()
        kinds = known_types()  # kept alive, so that their ids remain theirs
        self.kinds, self.fine = kinds, frozenset(map(id, kinds))
        self.known = frozenset(kind for kind in kinds if type(kind) is type)
        holding = (list, tuple, set, frozenset, dict, deque)
        self.holding = frozenset(kind for kind in self.known if issubclass(kind, holding))
        torch = sys.modules.get("torch")
        self.threads = set(sys._current_frames()) - {_thread.get_ident()}  # this one ends, and its number is free again
        self.tensors = frozenset((torch.Tensor, torch.nn.Parameter)) if torch else frozenset()
        self.watch = Watch()
        self.sentry = Sentry(self.found)
        self._remember()
        sys.addaudithook(self.sentry.hear)
        return ("ok", "", "", ())

    def run_plain(self, code: bytes, file: str, source: str, theirs: list) -> tuple:
        """A cell of ours, in the notebook's own names. `theirs` are names that a learner's answer may define."""
        self._restore()
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # Triton reads a kernel's source
        before = dict(self.names)
        exec(marshal.loads(code), self.names)
        for name, value in self.names.items():
            if name not in theirs and before.get(name, MISSING) is not value:
                self.ours[name] = value
        self.fine |= {id(value) for value in self.ours.values() if isinstance(value, type)}
        for name, value in self.ours.items():
            if type(value) in self.tensors and not value.isnan().any() and value.numel() < LARGE:
                self.data.setdefault(name, (value, value.detach().clone()))
            if isinstance(value, type) and value.__module__ == "__main__":
                self.watch.remember(f"the notebook's {name}", value, names_of(value))
        self._remember()
        return ("ok", "", "", ())

    def run_check(self, code: bytes, seed: int, honest: dict, alone: bool) -> tuple:
        """A check, in names of its own; then the canaries, where it passed.

        With `alone` it watches what is called, by modes of PyTorch that another thread does not have.
        """
        self._restore()
        reseed(seed)
        names = self._names()
        made = {"__builtins__": dict(self.builtins), "__name__": "llm40 check"}
        exec(self.arms, made)
        asked = {id(self.names.get(name)): methods for name, methods in honest.items()}
        arms = made["arms"](self.known, self.fine, self.holding, self.tensors, asked, self.mark)
        names["__operand__"], names["__argument__"], names["__collection__"] = arms
        made["of_check"](names)
        names["__call__"] = calling(dict(self.builtins))
        try:
            exec(marshal.loads(code), names)
            outcome = ("ok", "", "", ())
        except BaseException as error:
            outcome = told(error)
        self._report(*self.watch.replaced())
        self._report(*(("patched", f"the notebook's {name}") for name in self._rebound() + self._changed_data()))
        if alone and self._others():
            self._report(("beside", "another thread"))
        if outcome[0] == "ok":
            self._report(*self._silent_canaries())
        return outcome

    def _rebound(self) -> list:
        """Names that our cells made, and a learner's function has given to something else while a check ran."""
        return [name for name, value in self.ours.items() if self.names.get(name, MISSING) is not value]

    def _changed_data(self) -> list:
        """Tensors that our cells made and that have other values now, which are put back."""
        torch, found = sys.modules.get("torch"), []
        for name, (tensor, kept) in self.data.items():
            if not torch.equal(tensor, kept):
                with torch.no_grad():
                    tensor.copy_(kept) if tensor.shape == kept.shape else tensor.set_(kept.clone())
                found.append(name)
        return found

    def _others(self) -> list:
        """The threads that learners' code has left running; what a progress bar or ZeroMQ starts is none."""
        known = {*self.threads, _thread.get_ident()}
        frames = [frame for thread, frame in sys._current_frames().items() if thread not in known]
        return [frame for frame in frames if not self._of_library(frame)]

    def _of_library(self, frame) -> bool:
        while frame is not None and frame.f_code not in self.helpers:
            frame = frame.f_back
        return frame is not None

    def _names(self) -> dict:
        """The notebook's names, but ours as we made them, and nothing in the place of a builtin."""
        theirs = {name: value for name, value in list(self.names.items()) if name not in BUILTIN_NAMES}
        return {**theirs, **self.ours, "__builtins__": dict(self.builtins), "__name__": self.mark}

    def _silent_canaries(self):
        """The canaries that should have cried out and did not."""
        for label, code in self.canaries:
            try:
                exec(code, self._names())
            except AssertionError:
                continue
            except BaseException as error:
                label = f"{label} (raised {told(error)[1]})"
            yield ("canary", label)

    def _report(self, *found: tuple) -> None:
        self.found.extend(found[:MOST])

    def _remember(self) -> None:
        torch = sys.modules.get("torch")
        self.dtype = torch.get_default_dtype() if torch else None
        self.watch.look()

    def _restore(self) -> None:
        self._report(*self.watch.restore())
        if strange_names(self.names):
            self._report(("patched", "a name of the notebook"))
        for name, value in self.ours.items():
            self.names[name] = value
        self.names["__builtins__"] = builtins
        self._changed_data()
        os.environ = self.environ  # noqa: B003 - the very one that Python made
        os.environ.update(self.environment)
        if self.dtype:
            sys.modules["torch"].set_default_dtype(self.dtype)


MISSING = object()


def library_threads() -> set:
    """The code of threads that libraries start on their own."""
    found = set()
    with suppress(ImportError):
        from tqdm import TMonitor

        found.add(TMonitor.run.__code__)
    with suppress(ImportError):
        from zmq.utils.garbage import GarbageCollectorThread

        found.add(GarbageCollectorThread.run.__code__)
    return found


def calling(own: dict):
    """A function that calls another: `eval`, given as an answer, then runs among its names and not among a check's."""
    names = {"__builtins__": own}
    exec(compile("def call(function, /, *a, **k): return function(*a, **k)", f"{OURS}call>", "exec"), names)
    return names.pop("call")


def reseed(seed: int) -> None:
    """Random numbers of every library as they are at the seed: a check does not depend on what ran before it."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch = sys.modules.get("torch")
    if torch:
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


def told(error: BaseException) -> tuple:
    """An exception as plain text: its class, what it says, and the places (file, line, function) that it passed."""
    try:
        text = plain_text(str(error))
    except BaseException as failed:
        text = f"(an exception whose text cannot be had: {plain_text(type(failed).__name__)})"
    places, trace = [], TRACEBACK.__get__(error)
    while trace is not None and len(places) < MOST:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(OURS + "guard"):
            places.append((plain_text(code.co_filename), trace.tb_lineno or 0, plain_text(code.co_name)))
        trace = trace.tb_next
    return ("error", plain_text(type(error).__name__), text, tuple(places))


TRACEBACK = BaseException.__dict__["__traceback__"]


def plain_text(value) -> str:
    """Exactly a string, of a class that nobody wrote, and fit for UTF-8."""
    return str.encode(value, "utf-8", "replace").decode("utf-8")[:TEXT]


# --- what was replaced ----------------------------------------------------------------------------------------

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
SHOWN = ("__repr__", "__str__", "__format__")  # how a tensor looks is a matter of taste
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
        return isinstance(kept, CALLABLE) or callable(kept) or (self.label in CONSTANTS and not name.startswith("_"))

    def differences(self):
        """(name, its kept value or MISSING) for all that was replaced, removed, or put before something else."""
        for name, kept in self.kept.items():
            if self.names.get(name, MISSING) is not kept and name not in SHOWN and self.matters(name, kept):
                yield name, kept
        if len(self.names) > len(self.kept):
            for name in [name for name in self.names if name not in self.kept]:
                if self.inherited(name):
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


class Watch:
    """How the libraries were; what of them was replaced."""

    def __init__(self):
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


def known_types() -> list:
    """Every class there is."""
    found, waiting = [object], [object]
    while waiting:
        below = type.__subclasses__(waiting.pop())
        found += below
        waiting += below
    return found


# --- what was asked for ---------------------------------------------------------------------------------------

# Event → the word by which a library's code that causes it names it.
FRAMES = {
    "sys._getframe": "_getframe",
    "sys._current_frames": "_current_frames",
    "sys._current_exceptions": "_current_exceptions",
    "gc.get_objects": "get_objects",
    "gc.get_referrers": "get_referrers",
    "gc.get_referents": "get_referents",
    "sys.settrace": "settrace",
    "sys.setprofile": "setprofile",
    "sys.addaudithook": "addaudithook",
    "sys.monitoring.register_callback": "register_callback",
    "marshal.loads": "loads",
    "marshal.load": "load",
    "code.__new__": "",
    "compile": "",
    "ctypes.dlopen": "",
    "ctypes.dlsym": "",
    "ctypes.cdata": "",
    "ctypes.cdata/buffer": "",
    "ctypes.string_at": "",
    "ctypes.wstring_at": "",
    "ctypes.call_function": "",
    "ctypes.PyObj_FromPtr": "",
    "ctypes.addressof": "",
}
ATTRIBUTES = ("tb_frame", "gi_frame", "cr_frame", "ag_frame", "__code__", "__defaults__", "__kwdefaults__")
FORGEABLE = ("code.__new__", "compile")  # of these only what pretends to be a library's or ours
PROFILERS = ("/cProfile.py", "/profile.py", "/torch/profiler/profiler.py", "/torch/autograd/profiler.py")
MESSAGE = "this is not to be had in a notebook that is graded: "


def exact(text) -> str | None:
    """A path's text without a call of its methods: None where its class is another. Where there is none it is empty."""
    if type(text) is bytes:
        return bytes.decode(text, "utf-8", "surrogateescape")
    if type(text) is str:
        return text
    return "" if text is None else None


class Sentry:
    """An audit hook. It keeps from learners' code what reaches out of it, and reports that it was tried."""

    def __init__(self, found: list):
        self.found = found
        self.proc = os.stat("/proc/self").st_dev if os.path.exists("/proc/self") else -1
        self.busy = set()  # threads that are being heard: to look at a frame is such an event too
        places = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
        places += [os.path.dirname(sys.modules["llm40"].__file__)] if "llm40" in sys.modules else []
        self.libraries = ("<frozen ", *(place + "/" for place in dict.fromkeys(places)))
        self.inspecting = tuple(f"{place}/{name}" for place in places
                                for name in ("inspect.py", "types.py", "functools.py"))  # fmt: skip

    def hear(self, event: str, arguments: tuple) -> None:
        """Python calls this at every event. RuntimeError, and a report, where a learner's code must not have it."""
        if event not in HEARD:
            return
        if _thread.get_ident() in self.busy:
            return
        what = self._forbidden(event, arguments)
        if what:
            if len(self.found) < MOST and ("asked", what) not in self.found:
                self.found.append(("asked", what))
            raise RuntimeError(MESSAGE + what)

    def _forbidden(self, event: str, arguments: tuple) -> str:
        """What was asked for, if a learner's code asked for what it must not have.

        No method of an argument is called: it may be a learner's.
        """
        if event.startswith("object."):
            word = arguments[1]
            if word not in ATTRIBUTES or (event == "object.__getattr__" and word.startswith("__")):
                return ""
            return word if self._asks(self._frame(), word) else ""
        if event == "open":
            path, mode, *_ = arguments  # without a mode it is os.open, which may start at another folder
            memory = type(path) is not int and self._memory(path, elsewhere=mode is None)
            return "the process's own memory" if memory and self._learner_in(self._frame()) else ""
        if event in FORGEABLE:
            file = exact(arguments[1])
            false = (file is None or file.startswith((OURS, *self.libraries))) and self._learner_in(self._frame(), 4)
            return "code in another's name" if false else ""
        if event == "sys.settrace" and self._ours(sys.gettrace()):
            return ""  # Python itself takes a tracer away that has raised: a lesson's own, which counts steps
        return event if self._asks(self._frame(), FRAMES[event]) else ""

    def _ours(self, function) -> bool:
        return type(function) is types.FunctionType and function.__code__.co_filename.startswith(OURS)

    def _frame(self):
        """The frame in which an event happened. To ask for it is such an event too: it is not heard."""
        thread = _thread.get_ident()
        self.busy.add(thread)
        frame = sys._getframe(3)
        self.busy.discard(thread)
        return frame

    def _memory(self, path, elsewhere: bool) -> bool:
        """Whether a path may lead to a process's memory: a file of /proc that only its owner reads and writes."""
        text = exact(path)
        if text is None:  # a path of a learner's class, which may say another thing the next time
            return True
        try:
            found = os.stat(text)
        except (OSError, ValueError):
            return elsewhere and text == "mem"
        return found.st_dev == self.proc and found.st_mode & 0o777 == 0o600

    def _kind(self, frame) -> str:
        file = frame.f_code.co_filename
        if type(file) is not str:
            return "learner"
        if file.startswith(self.inspecting):
            return "through"
        if file.startswith(self.libraries):
            return "library"
        if file.startswith(OURS):
            return "ours"
        return "through" if file.startswith("<") else "learner"

    def _learner_in(self, frame, depth: int = 1000) -> bool:
        while frame is not None and depth:
            if self._kind(frame) == "learner":
                return True
            frame, depth = frame.f_back, depth - 1
        return False

    def _captures(self, frame) -> bool:
        """Whether a traceback is asked for with the values of variables, or frame by frame."""
        while frame is not None and self._kind(frame) == "library":
            if frame.f_locals.get("capture_locals"):
                return True
            walking, frame = frame.f_code.co_name == "walk_tb", frame.f_back
            if walking and frame is not None and self._kind(frame) == "learner":
                return True
        return False

    def _asks(self, frame, word: str) -> bool:
        """Whether the asker is a learner's code: itself, through `inspect`, as a callback, or by a library's function
        that would give it what that function was given."""
        kind = self._kind(frame)
        file = frame.f_code.co_filename
        if word == "_getframe" and kind == "library" and file.endswith("/traceback.py"):
            return self._learner_in(frame, 4)  # print_stack; but print_exc looks at an exception, and may
        if word == "tb_frame" and kind == "library" and file.endswith("/traceback.py"):
            return self._captures(frame) and self._learner_in(frame)
        if word == "setprofile" and kind == "library" and file.endswith(PROFILERS):
            return False
        if kind == "library" and word and word not in frame.f_code.co_names:
            return self._learner_in(frame)  # a library's function was told to call it
        while kind == "through":
            frame = frame.f_back
            if frame is None:
                return False
            kind = self._kind(frame)
        if kind != "library":
            return kind == "learner"
        if frame.f_code.co_name in ("namedtuple", "make_dataclass"):
            return False
        below = frame.f_back
        return below is not None and self._kind(below) == "learner"


HEARD = frozenset(FRAMES) | {
    "open", "object.__getattr__", "object.__setattr__", "object.__delattr__",
}  # fmt: skip
