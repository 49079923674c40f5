"""What learners' code asks for that reaches out of it."""

import os
import sys
import sysconfig
import types
from _thread import get_ident

from autograder.kernels.inside.load import OURS

MOST = 50  # reports
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
        if get_ident() in self.busy:
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
        thread = get_ident()
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
