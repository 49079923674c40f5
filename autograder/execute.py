"""One notebook in one kernel, cell by cell: a cell that fails, hangs or kills the kernel costs nothing but itself.

When a kernel is lost a new one is started, the cells before are run again (checks excepted, and the culprit), and the
rest goes on. nbclient stops at the first dead kernel and keeps whatever a cell prints, so the loop here is our own, on
jupyter_client.
"""

import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL

import zmq.asyncio
from jupyter_client.manager import AsyncKernelManager

from autograder.kernels import guardian, inside
from autograder.kernels.guardian import Guardian, GuardLost, Lesson
from autograder.kernels.limits import Limits
from autograder.kernels.manager import Kernels

OUTPUTS = ("stream", "display_data", "update_display_data", "execute_result", "error", "clear_output")
ROOT = Path(__file__).resolve().parents[1]
Managers = Callable[[Limits], AbstractContextManager[AsyncKernelManager]]  # how a kernel is made
SANDBOXED = Kernels()
SAID = 20_000  # characters of an exception that are kept
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Step:
    """A cell to run. A check is not run again in a new kernel: no cell needs it.

    A cell of ours has a name, and is run by the guard where there is one; a check then comes armed (grading.integrity).
    """

    source: str
    check: bool = False
    name: str = ""
    armed: bytes = b""
    alone: bool = False  # no other thread of the learner's may be there


@dataclass
class Outcome:
    """What became of a step: `ok`, `error`, `timeout`, `died` (it took the kernel along) or `not run`."""

    status: str
    ename: str = ""
    evalue: str = ""
    outputs: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    count: int | None = None  # the kernel's number for it
    reports: list[tuple[str, str]] = field(default_factory=list)  # what the guard found: kind and what


class KernelFailed(RuntimeError):
    """A kernel that does not even start: the machine's fault or ours, never the notebook's."""


class KernelLost(Exception):
    """The kernel's process has ended, or must be ended, because of the cell whose outcome this carries."""

    def __init__(self, outcome: Outcome | None = None):
        super().__init__()
        self.outcome = outcome


def printable(value):
    """The same value, its strings fit for UTF-8: lone surrogates become question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value


def environment(folder: Path, seed: int) -> dict[str, str]:
    """A kernel's environment: repeatable, and blind to files in its folder and to the user's own IPython set-up."""
    return {
        # One thread per kernel: a class is graded over many kernels, and the sums do not depend on the machine.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **os.environ,
        "LLM40_SEED": str(seed),
        "PYTHONHASHSEED": str(seed % 2**32),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),  # llm40, uninstalled
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
        "IPYTHONDIR": str(folder / ".ipython"),
        "TRITON_CACHE_DIR": str(folder / ".triton"),
        "NBGRADER_EXECUTION": "autograde",
    }


class Output:
    """Collects a cell's outputs as they arrive, up to a number of bytes; the rest is dropped unread."""

    def __init__(self, budget: int):
        self.budget = budget
        self.used = 0
        self.cut = False
        self.clear = False
        self.items: list[dict] = []

    def add(self, kind: str, body: bytes) -> None:
        """One message from the kernel: its type, and its content still packed."""
        if kind not in OUTPUTS:
            return
        self.cut = self.cut or self.used + len(body) > self.budget
        if self.cut:
            return
        self.used += len(body)
        content = printable(json.loads(body))
        if self.clear or (kind == "clear_output" and not content.get("wait")):
            self.items.clear()
        self.clear = kind == "clear_output" and bool(content.get("wait"))
        if kind == "clear_output":
            return
        display = (content.pop("transient", None) or {}).get("display_id")
        if kind == "update_display_data":
            for item in self.items:
                if display and item.get("display") == display:
                    item.update(data=content["data"], metadata=content["metadata"])
            return
        last = self.items[-1] if self.items else {}
        if kind == "stream" and last.get("name") == content["name"]:
            last["text"] += content["text"]
        else:
            self.items.append({"output_type": kind, **content, "display": display})

    def close(self) -> list[dict]:
        """The outputs in nbformat's form."""
        for item in self.items:
            del item["display"]
        if self.cut:
            note = f"[output cut: no more than {self.budget / 1e6:.3g} MB of a cell's output are kept]\n"
            self.items.append({"output_type": "stream", "name": "stderr", "text": note})
        return self.items


async def receive(socket: zmq.asyncio.Socket, client) -> tuple[str, str, bytes]:
    """The next message's type, the id of the request it answers, and its content still packed."""
    _, (_, header, parent, _, body, *_) = client.session.feed_identities(await socket.recv_multipart())
    return json.loads(header)["msg_type"], json.loads(parent).get("msg_id", ""), body


class Kernel:
    """One kernel's life. `run` gives a cell a time limit and comes back whatever the cell does."""

    def __init__(self, manager: AsyncKernelManager, limits: Limits):
        self.manager = manager
        self.limits = limits
        self.client = None
        self.guardian = None

    async def start(self, folder: Path, env: dict[str, str]) -> None:
        try:
            await self.manager.start_kernel(
                cwd=str(folder),
                env=env,
                extra_arguments=["--HistoryManager.hist_file=:memory:"],
                stdout=DEVNULL,  # what goes past IPython, such as a crash's last words, is not for our terminal
                stderr=DEVNULL,
            )
            await asyncio.wait_for(self._connect(), self.limits.start)
        except TimeoutError:
            raise KernelFailed(f"the kernel gave no answer for {self.limits.start:g} s") from None
        except (RuntimeError, OSError) as error:
            raise KernelFailed(f"the kernel did not start: {error}") from error

    async def _connect(self) -> None:
        """Until the kernel answers on both channels.

        jupyter_client's own way costs 0.3 s more: it tries a socket again only after a while, and listens for a while
        whether anything is still to come; our loop knows which answer belongs to what.
        """
        manager = self.manager
        sockets = [f"{manager.ip}-{port}" for port in (manager.shell_port, manager.iopub_port)]
        while manager.transport == "ipc" and not all(map(os.path.exists, sockets)):
            await self._still_alive()
            await asyncio.sleep(0.005)
        self.client = manager.client()
        self.client.start_channels(hb=False, stdin=False)
        channels = {self.client.shell_channel.socket, self.client.iopub_channel.socket}
        poller = zmq.asyncio.Poller()
        for channel in channels:
            poller.register(channel, zmq.POLLIN)
        asked = 0.0
        while channels:
            if time.monotonic() > asked + 1:  # what is published before we are subscribed is lost
                asked = time.monotonic()
                self.client.kernel_info()
            for channel in dict(await poller.poll(100)):
                await channel.recv_multipart()
                channels.discard(channel)
            await self._still_alive()

    async def _still_alive(self) -> None:
        if not await self.alive():
            raise RuntimeError("its process ended at once")

    async def guard(self, lesson: Lesson, seed: int) -> None:
        """Puts a guard into the kernel, which nothing of a learner's has reached yet."""
        path = guardian.place(self.manager)
        try:
            for door in inside.doors(path):
                outcome = await self.run(door, self.limits.start, self.limits.output)
                if outcome.status == "ok":
                    break
            else:
                raise KernelFailed(f"the guard did not start: {outcome.ename}: {outcome.evalue}")
            self.guardian = Guardian(lesson, seed, self.limits.grace)
            await self.guardian.begin(path, {"LLM40_SEED": str(seed)})
        except (GuardLost, KernelLost, OSError) as error:
            raise KernelFailed(f"the guard did not start: {error}") from error

    async def stop(self) -> None:
        if self.guardian:
            self.guardian.close()
        if self.client:
            self.client.stop_channels()
        with suppress(RuntimeError):
            await self.manager.shutdown_kernel(now=True)

    async def alive(self) -> bool:
        return await self.manager.is_alive()

    async def step(self, step: Step, limit: float, budget: int) -> Outcome:
        """Runs a step: a learner's cell as Jupyter does, one of ours through the guard. KernelLost as `run`."""
        if not (self.guardian and step.name):
            return await self.run(step.source, limit, budget)
        began = time.monotonic()
        try:
            if step.check:
                answer = await self.guardian.run_check(step.armed, limit, step.alone)
            else:
                answer = await self.guardian.run_plain(step.name, step.source, limit)
        except GuardLost:
            raise KernelLost(Outcome("died", seconds=time.monotonic() - began)) from None
        outcome = Outcome(answer.status, answer.ename, answer.evalue, seconds=time.monotonic() - began)
        outcome.reports = list(answer.reports)
        if answer.status == "error":
            lines = guardian.traceback(answer.places, {guardian.file_of(step.name): step.source})
            said = {"ename": answer.ename, "evalue": answer.evalue}
            outcome.outputs = [{"output_type": "error", **said, "traceback": lines}]
        elif answer.status == "stuck":
            outcome.status = "timeout"
            raise KernelLost(outcome)
        return outcome

    async def run(self, source: str, limit: float, budget: int) -> Outcome:
        """Runs one cell for at most `limit` seconds. KernelLost, with the outcome, if the kernel cannot go on."""
        began = time.monotonic()
        output = Output(budget)
        request = self.client.execute(source, allow_stdin=False, stop_on_error=False)
        waiting = asyncio.ensure_future(self._reply(request, output))
        try:
            done, _ = await asyncio.wait({waiting}, timeout=limit)
            late = not done
            if late:
                with suppress(RuntimeError):
                    await self.manager.interrupt_kernel()
                done, _ = await asyncio.wait({waiting}, timeout=self.limits.grace)
            reply = waiting.result() if done else None
        finally:
            waiting.cancel()
        reply = reply or {}
        outcome = Outcome("ok", outputs=output.close(), seconds=time.monotonic() - began)
        outcome.count = reply.get("execution_count")
        if reply.get("status") == "error":
            outcome.status = "error"
            outcome.ename = printable(str(reply.get("ename", ""))[:SAID])
            outcome.evalue = printable(ANSI.sub("", str(reply.get("evalue", ""))[:SAID]))
        left = not reply or any(part.get("source") == "ask_exit" for part in reply.get("payload", []))
        if late:
            outcome.status = "timeout"
        elif left:
            outcome.status = "died"
        if left:
            raise KernelLost(outcome)
        return outcome

    async def _reply(self, request: str, output: Output) -> dict | None:
        """The reply to a request, its output gathered meanwhile; None if the process ended without one."""
        shell, iopub = self.client.shell_channel.socket, self.client.iopub_channel.socket
        poller = zmq.asyncio.Poller()
        poller.register(shell, zmq.POLLIN)
        poller.register(iopub, zmq.POLLIN)
        reply, idle, last_call = None, False, 0.0
        while reply is None or not (idle or time.monotonic() > last_call):
            ready = dict(await poller.poll(200))
            if iopub in ready:
                kind, parent, body = await receive(iopub, self.client)
                if parent == request and kind == "status":
                    idle = idle or json.loads(body)["execution_state"] == "idle"
                elif parent == request:
                    output.add(kind, body)
            if shell in ready:
                _, parent, body = await receive(shell, self.client)
                if parent == request:
                    reply = json.loads(body)
                    # The last output is still on its way; a flood may have swallowed the message that ends it.
                    last_call = time.monotonic() + 2.0
            if not ready and reply is None and not await self.alive():
                return None
        return reply


@asynccontextmanager
async def started(
    managers: Managers, limits: Limits, seed: int, lesson: Lesson | None = None
) -> AsyncIterator[Kernel]:
    """A running kernel in an empty folder of its own; both are gone at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="llm40-", ignore_cleanup_errors=True) as folder,
        managers(limits) as manager,
    ):
        kernel = Kernel(manager, limits)
        try:
            await kernel.start(Path(folder), environment(Path(folder), seed))
            if lesson:
                await kernel.guard(lesson, seed)
            yield kernel
        finally:
            await kernel.stop()


async def execute_async(
    steps: Sequence[Step],
    limits: Limits,
    seed: int,
    managers: Managers,
    lesson: Lesson | None,
) -> list[Outcome]:
    ends = time.monotonic() + limits.notebook
    space = limits.outputs
    outcomes: list[Outcome] = []
    culprits: set[int] = set()  # cells that are not run again
    losses = 0
    async with AsyncExitStack() as stack:
        kernel = None

        async def run(index: int) -> Outcome:
            nonlocal kernel, losses
            seconds = min(limits.cell, ends - time.monotonic())
            try:
                outcome = await kernel.step(steps[index], seconds, min(limits.output, space))
            except KernelLost as lost:
                outcome = lost.outcome
                kernel = None
                losses += 1
                await stack.aclose()
            if kernel is None or outcome.status == "timeout":
                culprits.add(index)
            return outcome

        def spent() -> str:
            """Why nothing more is run, if so."""
            if time.monotonic() >= ends:
                return f"the notebook's {limits.notebook:g} s were used up before"
            if losses > limits.restarts:
                return f"the kernel had died {losses} times before"
            return ""

        for index in range(len(steps)):
            if kernel is not None and not await kernel.alive():  # it died after its last answer
                kernel = None
                losses += 1
                culprits.add(index - 1)
                await stack.aclose()
            while kernel is None and not spent():
                kernel = await stack.enter_async_context(started(managers, limits, seed, lesson))
                for earlier in range(index):
                    if kernel and not spent() and earlier not in culprits and not steps[earlier].check:
                        await run(earlier)
            reason = spent()
            outcome = Outcome("not run", evalue=reason) if reason else await run(index)
            space = max(0, space - sum(len(str(item)) for item in outcome.outputs))
            outcomes.append(outcome)
    return outcomes


def execute(
    steps: Sequence[Step],
    limits: Limits | None = None,
    seed: int = 0,
    managers: Managers = SANDBOXED,
    lesson: Lesson | None = None,
) -> list[Outcome]:
    """Runs the steps in order in one kernel, or in as many as their accidents take; one outcome for each.

    `managers` says how a kernel is made: another function, another kind of kernel. With a `lesson` there is a guard in
    it, which runs what is ours.
    """
    return asyncio.run(execute_async(steps, limits or Limits(), seed, managers, lesson))
