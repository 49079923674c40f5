"""The guard's work: runs the cells of ours, and finds what bends them."""

import builtins
import linecache
import os
import random
import sys
from _thread import get_ident
from contextlib import suppress
from marshal import loads

from autograder.kernels.inside.kinds import Kinds
from autograder.kernels.inside.load import OURS
from autograder.kernels.inside.sentry import Sentry
from autograder.kernels.inside.watch import BUILTIN_NAMES, MISSING, Watch, names_of, strange_names

MOST = 50  # reports of a kind
LARGE = 1_000_000  # numbers of a tensor; larger ones are not watched
TEXT = 20_000  # characters of what an exception says


class Surroundings:
    """What is there before a learner: the classes and the libraries. `arms` is the text of that file."""

    def __init__(self, arms: str):
        self.arms = compile(arms, f"{OURS}arms>", "exec")
        self.kinds = Kinds()
        self.watch = Watch()


class Desk:
    """What the door's helpers know: the notebook's names, those that are ours, and the state to come back to."""

    def __init__(self, names: dict, surroundings: "Surroundings"):
        self.names = names
        self.ours = {}  # name → value, as our cells made it
        self.arms, self.kinds, self.watch = surroundings.arms, surroundings.kinds, surroundings.watch
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

    def begin(self, modules: list, canaries: list, environment: dict) -> tuple:
        """Before anything of the learner's: imports what the lesson will, and remembers how everything is."""
        for name in modules:
            with suppress(ImportError):  # told by the cell that needs it
                __import__(name)
        self.canaries = [(label, loads(code)) for label, code in canaries]
        self.environment = environment
        self.builtins = dict(vars(builtins))
        self.helpers = library_threads()
        torch = sys.modules.get("torch")
        self.threads = set(sys._current_frames()) - {get_ident()}  # this one ends, and its number is free again
        self.tensors = frozenset((torch.Tensor, torch.nn.Parameter)) if torch else frozenset()
        self.kinds.renew()
        self.watch.accept()
        self.sentry = Sentry(self.found)
        self._remember()
        sys.addaudithook(self.sentry.hear)
        return ("ok", "", "", ())

    def run_plain(self, code: bytes, file: str, source: str, theirs: list) -> tuple:
        """A cell of ours, in the notebook's own names. `theirs` are names that a learner's answer may define."""
        self._restore()
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # Triton reads a kernel's source
        before = dict(self.names)
        exec(loads(code), self.names)
        for name, value in self.names.items():
            if name not in theirs and before.get(name, MISSING) is not value:
                self.ours[name] = value
        self.kinds.fine.update(id(value) for value in self.ours.values() if isinstance(value, type))
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
        names.update(made["arms"](self.kinds, self.tensors, asked, self.mark))
        made["of_check"](names)
        names["__call__"] = calling(dict(self.builtins))
        try:
            exec(loads(code), names)
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
        known = {*self.threads, get_ident()}
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
        if self.dtype and sys.modules["torch"].get_default_dtype() != self.dtype:
            sys.modules["torch"].set_default_dtype(self.dtype)
            self.watch.restore()  # to set it gives torch.Storage to another class, which is nobody's trick


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
