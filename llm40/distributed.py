"""Real processes for lessons on distributed training: `launch(function, 4)` runs `function(rank)` in four of them.

They are forked from this one, so they know everything that it has defined; they meet in a file and talk through gloo
over the machine's own loopback. No network and no port is needed.
"""

import faulthandler
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from io import TextIOBase
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # does nothing where there is no prctl

# Called as hook(rank, ranks) in the launching process, just before that rank is forked. What a hook returns, if it is
# not None, is called in the new rank without arguments, before the rank joins the others.
at_fork: list[Callable[[int, int], Callable[[], object] | None]] = []

_OUTPUT, _RESULT, _ERROR = b"o", b"r", b"e"  # kinds of message from a rank
_LOST = "onnection"  # in all of gloo's sentences about a connection that it closed
_GRACE = 0.1  # seconds to hear of a death that explains another rank's error, or where a rank hangs
_PATIENCE = 2.0  # the same, where without it nothing is explained


class RankError(RuntimeError):
    """A rank ended without a result: it died, or raised what cannot be handed to another process."""


class _RankTraceback(Exception):
    """The traceback in the rank, shown as the cause of the exception that `launch` raises."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def launch(function: Callable, ranks: int, *arguments: Any, timeout: float = 20.0) -> list:
    """Runs `function(rank, *arguments)` in `ranks` processes at once and returns their results in the order of ranks.

    In each process torch.distributed is initialized (gloo, on the CPU) and PyTorch has one thread. `function` and
    `arguments` may be anything, lambdas and models too: a rank begins as a copy of this process. So it also begins with
    the same state of the random numbers; and what it changes, stays in it. A result is a plain value or tensors: it is
    pickled. What a rank prints appears here, a whole line at a time, after "rank 0: ".

    The first rank that raises ends the launch: its exception is raised here, with the rank's own traceback as its
    cause. Raises RankError where a rank dies, TimeoutError where one has not ended after `timeout` seconds (where it
    waits, is said), ValueError where there is nothing to launch, RuntimeError on a system without fork (Windows).
    However a launch ends, none of its processes is left.
    """
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks is the number of processes, 1 or more, not {ranks!r}")
    if not hasattr(os, "fork"):
        raise RuntimeError("launch forks this process, which Windows cannot do: use Linux, macOS or WSL")
    sys.stdout.flush(), sys.stderr.flush()  # or each rank would write out what is still held back, too
    running: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="llm40-ranks-") as folder:
        try:
            for rank in range(ranks):
                running.append(_Rank(rank, ranks, function, arguments, Path(folder), timeout))
            return _results(running, timeout)
        finally:
            for process in running:
                process.end()


def _results(running: "list[_Rank]", timeout: float) -> list:
    """What the ranks return, once all have; raises what ends the launch otherwise."""
    deadline = time.monotonic() + timeout
    while waiting := [process for process in running if process.outcome is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(_where_it_hangs(waiting, len(running), timeout))
        _listen(waiting, min(left, 1.0))
        if any(process.failed for process in running):
            # A rank that dies breaks the connections of the others, whose errors may be the first to arrive.
            unexplained = all(process.unexplained for process in running if process.failed)
            _listen([process for process in waiting if not process.failed], _PATIENCE if unexplained else _GRACE)
            failed = [process for process in running if process.failed]
            min(failed, key=lambda process: (process.outcome[0] == _ERROR, process.unexplained, process.rank)).fail()
    return [process.result() for process in running]


def _listen(processes: "list[_Rank]", seconds: float) -> None:
    """Takes in what these ranks have sent, or what they send within `seconds`."""
    ready, _, _ = select.select([process.pipe for process in processes], [], [], seconds)
    for process in processes:
        if process.pipe in ready:
            process.receive()


def _where_it_hangs(waiting: "list[_Rank]", ranks: int, timeout: float) -> str:
    """The sentence of a TimeoutError. Each waiting rank is asked for its stack."""
    for process in waiting:
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(_GRACE)
    names = ", ".join(str(process.rank) for process in waiting)
    done = f"the other {ranks - len(waiting)} had" if len(waiting) < ranks else "none had"
    stacks = "".join(f"\nrank {process.rank}, innermost call first:\n{process.stack()}" for process in waiting)
    return (
        f"after {timeout:g} s rank{'s' * (len(waiting) > 1)} {names} of {ranks} had not ended ({done}). A collective "
        f"waits until every rank calls it, and a receive until something is sent.{stacks}"
    )


class _Rank:
    """One process, as the launching one sees it. `outcome` is (kind of its last message, content), or None so far."""

    def __init__(self, rank: int, ranks: int, function, arguments, folder: Path, timeout: float):
        self.rank, self.folder, self.outcome = rank, folder, None
        self.received, self.line = bytearray(), ""
        begun = [begin for hook in at_fork if (begin := hook(rank, ranks)) is not None]
        self.pipe, write = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns where a process has other threads; the rank is careful not to need them.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            _be_a_rank(rank, ranks, function, arguments, begun, self._stack_file, write, timeout)
        os.close(write)

    @property
    def _stack_file(self) -> Path:
        return self.folder / f"stack-{self.rank}"

    @property
    def failed(self) -> bool:
        return self.outcome is not None and self.outcome[0] != _RESULT

    @property
    def unexplained(self) -> bool:
        """Whether gloo closed this rank's connection, which it says with a port and without a cause."""
        return self.failed and self.outcome[0] == _ERROR and _LOST in pickle.loads(self.outcome[1])[1]

    def receive(self) -> None:
        part = os.read(self.pipe, 1 << 20)
        if not part:  # the rank's end of the pipe is closed, and no outcome has come
            self.outcome = b"", None
            return
        self.received += part
        while len(self.received) >= 9 and len(self.received) >= (end := 9 + int.from_bytes(self.received[1:9])):
            kind, content = bytes(self.received[:1]), bytes(self.received[9:end])
            del self.received[:end]
            if kind == _OUTPUT:
                *lines, self.line = (self.line + content.decode()).split("\n")
                for line in lines:
                    print(f"rank {self.rank}: {line}")
            else:
                self.outcome = kind, content

    def result(self) -> Any:
        try:
            return pickle.loads(self.outcome[1])
        except Exception as error:
            raise RankError(f"the result of rank {self.rank} cannot be read here ({error}): {_RETURN}") from error

    def fail(self) -> NoReturn:
        """Raises what ended the rank."""
        kind, content = self.outcome
        if kind != _ERROR:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            if code == -signal.SIGABRT:
                how += " (gloo ends a rank that is sent more than it expects)"
            place = f". It was here, innermost call first:\n{stack}" if (stack := self.stack()) else ""
            raise RankError(f"rank {self.rank} {how} before its function returned{place}")
        pickled, said, stack = pickle.loads(content)
        if self.unexplained:
            raise RankError(
                f"rank {self.rank} lost its connection within a collective: the ranks call different ones, or with "
                "tensors of different sizes"
            ) from _RankTraceback(stack)
        try:
            error = pickle.loads(pickled)
        except Exception:  # its class cannot be found here, or built from its arguments
            error = RankError(f"rank {self.rank} raised {said}")
        error.add_note(f"(raised in rank {self.rank})")
        raise error from _RankTraceback(stack)

    def stack(self) -> str:
        """Where the rank is, innermost call first: its own part, without what launched it."""
        try:
            text = self._stack_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        _, _, text = text.partition("(most recent call first):\n")
        return text.partition(f'  File "{__file__}"')[0]

    def end(self) -> None:
        """Kills the rank and all that it has started, and waits until it is gone."""
        if self.line:
            print(f"rank {self.rank}: {self.line}")
        if self.pid:
            for kill in (os.killpg, os.kill):  # it may not have come to make its group
                with suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.pipe)


# --- in the rank ----------------------------------------------------------------------------------------------------

_RETURN = "let it return numbers, strings, tensors, or lists and dicts of these"


class _Output(TextIOBase):
    """The rank's sys.stdout and sys.stderr."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        _send(self.pipe, _OUTPUT, text.encode(errors="replace"))
        return len(text)


def _send(pipe: int, kind: bytes, content: bytes) -> None:
    message = memoryview(kind + len(content).to_bytes(8) + content)
    while message:
        message = message[os.write(pipe, message) :]


def _be_a_rank(rank, ranks, function, arguments, begun, stack_file: Path, pipe: int, timeout: float) -> NoReturn:
    """What the forked process does; it never returns into the code that it is a copy of."""
    try:
        os.setpgid(0, 0)  # Ctrl-C in a terminal is the launching process's; and the whole group can be killed
        die_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout + 10)  # should all else fail
        stacks = os.open(stack_file, os.O_WRONLY | os.O_CREAT, 0o600)
        faulthandler.enable(stacks, all_threads=False)  # should it crash
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
        # The launching process's threads are not in its copy: whatever needs one would wait for ever.
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = _Output(pipe)
        try:
            for begin in begun:
                begin()
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
            dist.init_process_group(
                "gloo",
                init_method=f"file://{stack_file.parent}/meeting",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=2 * timeout + 10),  # the launching process is the one that ends a wait
            )
            result = function(rank, *arguments)
            try:
                content = pickle.dumps(result)
            except Exception as error:
                raise TypeError(
                    f"rank {rank} returns a {type(result).__name__} that cannot be handed back ({error}): {_RETURN}"
                ) from error
            _send(pipe, _RESULT, content)
        except BaseException as error:
            _send(pipe, _ERROR, _packed(error))
        # The others may still need it, and none of them fails because it left: it stays until it is ended.
        while True:
            signal.pause()
    finally:
        os._exit(70)


def _packed(error: BaseException) -> bytes:
    """The exception, if it can be pickled; what it says; its traceback in the rank."""
    stack = "".join(traceback.format_exception(error))
    said = "".join(traceback.format_exception_only(error)).strip()
    if not isinstance(error, Exception):  # SystemExit or KeyboardInterrupt would end more than the launch
        return pickle.dumps((b"", said, stack))
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = b""
    return pickle.dumps((pickled, said, stack))
