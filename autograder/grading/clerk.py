"""Works on learners' text in a process of its own: reads a notebook, colors code, prepares it to be compared.

No code of a learner's runs there. But a text can be written so that work on it costs hours or all memory: lists in
lists, two million lines, traps for regular expressions. So each task has a limit of processor time and of
memory. The process is started when there is something to do, and again when it was stopped.

    python -m autograder.grading.clerk SECONDS BYTES

takes tasks from its standard input and answers on its standard output: msgpack, each message with its length in front.
"""

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO

import msgpack

from autograder.grading import rebuild
from autograder.grading.rebuild import SubmittedCell, Unreadable

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 30, 3 * 10**9  # of a processor, and bytes of addresses, for each task
LENGTH = struct.Struct(">Q")


class TooMuch(Exception):
    """A task took more time or memory than it may."""


class Clerk:
    """The process, as seen from outside. One task after another, whichever thread asks."""

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY):
        self.bounds = [str(seconds), str(memory)]
        self.process: subprocess.Popen | None = None
        self.working = threading.Lock()

    def do(self, task: str, *arguments):
        """Does the task of this name; returns its answer. Raises TooMuch, the task's Unreadable, or RuntimeError."""
        packed = _pack([task, *arguments])
        with self.working:
            try:
                self._start()
                _send(self.process.stdin, packed)
                kind, answer = msgpack.unpackb(_read_message(self.process.stdout))
            except (OSError, EOFError) as error:
                self.close()
                raise TooMuch("more time or memory than such work may take") from error
            except BaseException:
                self.close()
                raise
        if kind == "done":
            return answer
        raise {"unreadable": Unreadable, "too much": TooMuch}.get(kind, RuntimeError)(answer)

    def _start(self) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autograder.grading.clerk", *self.bounds],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            try:
                _read_message(self.process.stdout)
            except EOFError:
                command = f"{sys.executable} -m autograder.grading.clerk {' '.join(self.bounds)}"
                raise RuntimeError(f"the grader's reader of notebooks does not start: `{command}` says why") from None

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    stream.close()
            self.process = None


CLERK = Clerk()  # this process's own


def read_submission_safely(data: bytes) -> tuple[list[SubmittedCell], list[str]]:
    """The cells of a submitted file, and a line for everything unusual about the file. Unreadable if it has none."""
    if len(data) > rebuild.MAX_BYTES:
        return rebuild.read_submission(data)  # it says so, and looks no further
    try:
        cells, flags = CLERK.do("read", data)
    except TooMuch as error:
        raise Unreadable(f"reading the file takes {error}") from None
    return [SubmittedCell(*cell) for cell in cells], flags


def color_safely(source: str) -> str | None:
    """Code as HTML; None where that takes too much."""
    with suppress(TooMuch):
        return CLERK.do("color", source)


def normalize_safely(code: str) -> str | None:
    """Code as copydetect compares it, names alike and comments dropped; None where that takes too much."""
    with suppress(TooMuch):
        return CLERK.do("normalize", code)


# --- inside ---------------------------------------------------------------------------------------------------


def _read_as_tuples(data: bytes) -> tuple[list[tuple], list[str]]:
    cells, flags = rebuild.read_submission(data)
    return [astuple(cell) for cell in cells], flags


def _color(source: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))


def _normalize(code: str) -> str:
    from copydetect.utils import filter_code  # a second's import, and seldom asked for

    return filter_code(code, "answer.py", "python")[0]


TASKS: dict[str, Callable] = {"read": _read_as_tuples, "color": _color, "normalize": _normalize}


def _pack(value) -> bytes:
    return msgpack.packb(value, unicode_errors="replace")


def _read_message(stream: BinaryIO) -> bytes:
    head = stream.read(LENGTH.size)
    body = stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
    if not body:
        raise EOFError
    return body


def _send(stream: BinaryIO, packed: bytes) -> None:
    stream.write(LENGTH.pack(len(packed)) + packed)
    stream.flush()


def main(seconds: int, memory: int) -> None:
    import resource
    from time import process_time

    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    with suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    _send(sys.stdout.buffer, _pack("ready"))
    while True:
        try:
            task, *arguments = msgpack.unpackb(_read_message(sys.stdin.buffer))
        except EOFError:
            return
        resource.setrlimit(resource.RLIMIT_CPU, (int(process_time()) + 1 + seconds, hard))
        try:
            answer = ["done", TASKS[task](*arguments)]
        except Unreadable as error:
            answer = ["unreadable", str(error)]
        except MemoryError:
            answer = ["too much", "more memory than such work may take"]
        except Exception as error:
            answer = ["failed", f"{type(error).__name__}: {error}"]
        _send(sys.stdout.buffer, _pack(answer))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
