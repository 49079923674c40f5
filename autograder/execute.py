"""Runs one notebook in one kernel, cell by cell: a cell that fails, hangs or kills the kernel costs nothing but itself.

Where checks are judged (autograder/judge), a second process goes with the kernel: given cells run in both, checks in
the judge's, everything else in the learner's. When one of the two is lost both are started anew, the cells before are
run again (checks excepted, and the culprit), and the rest goes on. nbclient stops at the first dead kernel and keeps
whatever a cell prints, so the loop here is written on jupyter_client.
"""

import asyncio
import base64
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL

import zmq.asyncio
from jupyter_client.manager import AsyncKernelManager

from autograder.judge import client
from autograder.judge.client import Judge, JudgeLost, Verdict
from autograder.kernels.forking import GIVEN_SEED, make_kernel_environment
from autograder.kernels.limits import MB, Limits
from autograder.kernels.manager import Kernels
from autograder.kernels.provisioner import COURT
from autograder.text import make_printable, strip_colors

OUTPUTS = ("stream", "display_data", "update_display_data", "execute_result", "error", "clear_output")
HEADER, REPLY = 10_000, 10 * MB  # bytes that are read of a message's header, and of a reply
Managers = Callable[[Limits], AbstractContextManager[AsyncKernelManager]]  # how a kernel is made
SANDBOXED = Kernels()
SAID = 20_000  # characters of an exception that are kept
LOOK = 0.2  # seconds between two looks at the CPU time
IDLE = 0.02  # of a core: who uses less than this is waiting for something
LAST_RESORT = 5  # times a limit, in wall time
# The learner's kernel before its first cell: as in JupyterLab, modules beside the notebook can be imported; and the
# files that lie beside it are there.
PREPARE = """
def prepare(files):
    import base64, os, sys
    sys.path.insert(0, "")
    os.environ.pop("PYTHONSAFEPATH", None)
    for name, packed in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(base64.b64decode(packed))
prepare({files!r})
del prepare
"""


@dataclass(frozen=True)
class Step:
    """A cell to run: `kind` is "given", "check" or "learner". A check is not run again in a new kernel: no cell needs
    it.

    `judged` is the text as plain Python, for the judge; `asked` are the names that the exercises above a check define,
    `hidden` is the line at which its hidden tests begin, and `written` is the learner's text: the exercise's cell, then
    the cells that they added. `defined` is what the exercises' text says of what they define (judge/sources.py).
    """

    source: str
    kind: str = "learner"
    name: str = ""
    judged: str = ""
    asked: tuple[str, ...] = ()
    hidden: int = 0
    written: tuple[str, ...] = ()
    defined: dict[str, dict] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a step: `ok`, `error`, `timeout`, `died` (it took the kernel along) or `not run`."""

    status: str
    ename: str = ""
    evalue: str = ""
    outputs: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    count: int | None = None  # the kernel's number for it
    counted: bool = False  # whether a check counted something in the learner's process


class KernelFailed(RuntimeError):
    """A kernel that does not even start: the machine's fault or the grader's, never the notebook's."""


class KernelLost(Exception):
    """The kernel's process has ended, or must be ended, because of the cell whose outcome this carries."""

    def __init__(self, outcome: Outcome | None = None):
        super().__init__()
        self.outcome = outcome


def parse_packed(packed: bytes, most: int) -> dict:
    """The dictionary that a kernel has packed, empty where it is none. Learners' code can write to the sockets too."""
    try:
        content = json.loads(packed) if len(packed) <= most else None
    except (ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def take_text(value) -> str:
    return value if isinstance(value, str) else ""


def take_whole(value) -> int | None:
    return value if type(value) is int else None


def format_output(kind: str, content: dict) -> dict:
    """An output in nbformat's form, whatever a kernel has sent."""
    if kind == "stream":
        name = "stderr" if content.get("name") == "stderr" else "stdout"
        return {"output_type": kind, "name": name, "text": take_text(content.get("text"))}
    if kind == "error":
        lines = content.get("traceback")
        lines = [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
        said = {"ename": take_text(content.get("ename")), "evalue": take_text(content.get("evalue"))}
        return {"output_type": kind, **said, "traceback": lines}
    shown = {name: content[name] if isinstance(content.get(name), dict) else {} for name in ("data", "metadata")}
    numbered = {"execution_count": take_whole(content.get("execution_count"))} if kind == "execute_result" else {}
    return {"output_type": kind, **shown, **numbered}


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
        content = make_printable(parse_packed(body, self.budget))
        if self.clear or (kind == "clear_output" and not content.get("wait")):
            self.items.clear()
        self.clear = kind == "clear_output" and bool(content.get("wait"))
        if kind == "clear_output":
            return
        transient = content.get("transient")
        display = transient.get("display_id") if isinstance(transient, dict) else None
        shown = format_output(kind, content)
        if kind == "update_display_data":
            for item in self.items:
                if display and item["display"] == display:
                    item.update(data=shown["data"], metadata=shown["metadata"])
            return
        last = self.items[-1] if self.items else {}
        if kind == "stream" and last.get("name") == shown["name"]:
            last["text"] += shown["text"]
        else:
            self.items.append({**shown, "display": display})

    def close(self) -> list[dict]:
        """The outputs in nbformat's form."""
        for item in self.items:
            del item["display"]
        if self.cut:
            note = f"[output cut: no more than {self.budget / 1e6:.3g} MB of a cell's output are kept]\n"
            self.items.append({"output_type": "stream", "name": "stderr", "text": note})
        return self.items


async def receive(socket: zmq.asyncio.Socket, client) -> tuple[str, str, bytes]:
    """The next message's type, the id of the request it answers, and its content still packed; empty if it is none."""
    try:
        _, (_, header, parent, _, body, *_) = client.session.feed_identities(await socket.recv_multipart())
    except ValueError:
        return "", "", b""
    return (
        take_text(parse_packed(header, HEADER).get("msg_type")),
        take_text(parse_packed(parent, HEADER).get("msg_id")),
        body,
    )


class NotebookKernel:
    """One kernel of a notebook. `run` gives a cell a time limit and comes back whatever the cell does."""

    def __init__(self, manager: AsyncKernelManager, limits: Limits):
        self.manager = manager
        self.limits = limits
        self.client = None

    async def start(self, folder: Path, env: dict[str, str]) -> None:
        try:
            await start_process(self.manager, folder, env, "--HistoryManager.hist_file=:memory:")
            await asyncio.wait_for(self._connect(), self.limits.start)
        except TimeoutError:
            raise KernelFailed(f"the kernel gave no answer for {self.limits.start:g} s") from None
        except (RuntimeError, OSError) as error:
            raise KernelFailed(f"the kernel did not start: {error}") from error

    async def _connect(self) -> None:
        """Waits until the kernel answers on both channels.

        jupyter_client's own way costs 0.3 s more: it tries a socket again only after a while, and listens for a while
        whether anything is still to come; the loop here knows which answer belongs to which request.
        """
        manager = self.manager
        sockets = [f"{manager.ip}-{port}" for port in (manager.shell_port, manager.iopub_port)]
        while manager.transport == "ipc" and not all(map(os.path.exists, sockets)):
            await self._check_alive()
            await asyncio.sleep(0.005)
        self.client = manager.client(context=manager.context)  # with its bounds
        self.client.start_channels(hb=False, stdin=False)
        channels = {self.client.shell_channel.socket, self.client.iopub_channel.socket}
        poller = zmq.asyncio.Poller()
        for channel in channels:
            poller.register(channel, zmq.POLLIN)
        asked = 0.0
        while channels:
            if time.monotonic() > asked + 1:  # messages published before the subscription are lost
                asked = time.monotonic()
                self.client.kernel_info()
            for channel in dict(await poller.poll(100)):
                await channel.recv_multipart()
                channels.discard(channel)
            await self._check_alive()

    async def _check_alive(self) -> None:
        if not await self.is_alive():
            raise RuntimeError("its process ended at once")

    async def prepare(self, source: str) -> None:
        """Runs the grader's code and shows nothing of it. A folder too small for the files costs those who use them."""
        try:
            await self.run(source, self.limits.start, 0, silent=True)
        except KernelLost:
            raise KernelFailed("the kernel ended before its first cell") from None

    async def stop(self) -> None:
        if self.client:
            self.client.stop_channels()
        with suppress(RuntimeError):
            await self.manager.shutdown_kernel(now=True)

    async def is_alive(self) -> bool:
        return await self.manager.is_alive()

    async def run(self, source: str, limit: float, budget: int, silent: bool = False) -> Outcome:
        """Runs one cell for at most `limit` seconds. KernelLost, with the outcome, if the kernel cannot go on."""
        began = time.monotonic()
        output = Output(budget)
        waiting = self.begin(source, output, silent)
        try:
            late = not await wait_within(limit, {waiting}, self.count_cpu_seconds)
            if late:
                await self.interrupt({waiting})
            reply = waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
        reply = reply or {}
        outcome = Outcome("ok", outputs=output.close(), seconds=time.monotonic() - began)
        outcome.count = take_whole(reply.get("execution_count"))
        if reply.get("status") == "error":
            outcome.status = "error"
            outcome.ename = make_printable(str(reply.get("ename", ""))[:SAID])
            outcome.evalue = make_printable(strip_colors(str(reply.get("evalue", ""))[:SAID]))
        payload = reply.get("payload") if isinstance(reply.get("payload"), list) else []
        left = not reply or any(isinstance(part, dict) and part.get("source") == "ask_exit" for part in payload)
        if late:
            outcome.status = "timeout"
        elif left:
            outcome.status = "died"
            outcome.evalue = self.over
        if left:
            raise KernelLost(outcome)
        return outcome

    def begin(self, source: str, output: Output, silent: bool = False) -> asyncio.Future:
        """Sends a cell; returns its reply, or None if the process ended without one."""
        request = self.client.execute(source, silent=silent, allow_stdin=False, stop_on_error=False)
        return asyncio.ensure_future(self._wait_for_reply(request, output))

    async def interrupt(self, waiting: set[asyncio.Future]) -> None:
        """Asks a cell to end, and gives it a moment."""
        with suppress(RuntimeError):
            await self.manager.interrupt_kernel()
        await asyncio.wait(waiting, timeout=self.limits.grace)

    def count_cpu_seconds(self) -> float:
        return count_used_seconds(self.manager)

    @property
    def over(self) -> str:
        """The limit that all its processes together were over, if they were stopped for one."""
        return getattr(self.manager.provisioner, "over", "")

    async def _wait_for_reply(self, request: str, output: Output) -> dict | None:
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
                    idle = idle or parse_packed(body, HEADER).get("execution_state") == "idle"
                elif parent == request:
                    output.add(kind, body)
            if shell in ready:
                _, parent, body = await receive(shell, self.client)
                if parent == request:
                    reply = parse_packed(body, REPLY)
                    # The last output is still on its way; a flood may have swallowed the message that ends it.
                    last_call = time.monotonic() + 2.0
            if not ready and reply is None and not await self.is_alive():
                return None
        if not idle:  # something is lost; after a message that is too large, the connection too
            output.cut = True
            with suppress(zmq.ZMQError):
                iopub.disconnect(iopub.last_endpoint)
            iopub.connect(iopub.last_endpoint)
        return reply


async def start_process(manager: AsyncKernelManager, folder: Path, env: dict[str, str], *arguments: str) -> None:
    await manager.start_kernel(
        cwd=str(folder),
        env=env,
        extra_arguments=list(arguments),
        stdout=DEVNULL,  # output that bypasses IPython, such as a crash's last words, is dropped
        stderr=DEVNULL,
    )


def count_used_seconds(manager: AsyncKernelManager) -> float:
    """CPU seconds that a process and all that it started have used; 0 where nobody counts them."""
    count = getattr(manager.provisioner, "count_cpu_seconds", None)
    return count() if count else 0.0


async def wait_within(limit: float, waiting: set[asyncio.Future], used: Callable[[], float]) -> bool:
    """Waits for the first of these until they have used `limit` seconds of CPU time; returns whether it came.

    On a busy machine the same work takes longer: wall time decides only where next to nothing is
    computed (a process that sleeps), and as the last resort.
    """
    began, before = time.monotonic(), used()
    while True:
        done, _ = await asyncio.wait(waiting, timeout=min(LOOK, max(limit, 0.0)), return_when=asyncio.FIRST_COMPLETED)
        if done:
            return True
        wall, cpu = time.monotonic() - began, used() - before
        if cpu >= limit or wall >= LAST_RESORT * limit or (wall >= limit and cpu < IDLE * wall):
            return False


class KernelPair:
    """The learner's kernel, and the judge's process beside it if there is one."""

    def __init__(self, kernel: NotebookKernel, judge: Judge | None = None, manager: AsyncKernelManager | None = None):
        self.kernel, self.judge, self.judge_manager = kernel, judge, manager

    def count_cpu_seconds(self) -> float:
        judged = count_used_seconds(self.judge_manager) if self.judge_manager else 0.0
        return self.kernel.count_cpu_seconds() + judged

    async def step(self, step: Step, limit: float, budget: int, seed: int) -> Outcome:
        """Runs a step. Raises KernelLost as `NotebookKernel.run` does."""
        if not self.judge or step.kind == "learner":
            return await self.kernel.run(step.source, limit, budget)
        if step.kind == "given":
            return await self.run_given(step, limit, budget)
        return await self.run_check(step, limit, seed)

    async def run_given(self, step: Step, limit: float, budget: int) -> Outcome:
        """Runs a given cell in both processes; its output is the learner's."""
        judged = asyncio.ensure_future(self.judge.run_given(step.name, step.judged))
        try:
            outcome = await self.kernel.run(step.source, limit, budget)
            if not await wait_within(limit, {judged}, self.count_cpu_seconds):
                raise KernelLost(Outcome("timeout", seconds=outcome.seconds))
            verdict = judged.result()
        except JudgeLost as error:
            raise KernelLost(Outcome("died", evalue=f"the judge: {error}")) from None
        finally:
            judged.cancel()
        if outcome.status == "ok" and verdict.status != "ok":
            outcome.status, outcome.ename, outcome.evalue = "error", verdict.ename, verdict.evalue
        return outcome

    async def run_check(self, step: Step, limit: float, seed: int) -> Outcome:
        """Runs a check in the judge's process, while the learner's answers its requests."""
        began = time.monotonic()
        serving = self.kernel.begin(client.SERVE, Output(0), silent=True)
        judged = asyncio.ensure_future(self.judge_step(step, seed))
        try:
            await wait_within(limit, {serving, judged}, self.count_cpu_seconds)
            late = not judged.done() and not serving.done()
            if late:
                await self.kernel.interrupt({judged})
            elif not judged.done():  # the learner's process stopped serving: the judge notices
                await wait_within(limit, {judged}, self.count_cpu_seconds)
            verdict = judged.result() if judged.done() else Verdict("lost")
            if not late and verdict.status != "lost":
                await asyncio.wait({serving}, timeout=self.kernel.limits.grace)
            ended = serving.done() and serving.result() is not None
        except JudgeLost as error:
            verdict, late, ended = Verdict("lost", evalue=str(error)), False, False
        finally:
            judged.cancel()
            serving.cancel()
        outcome = Outcome(verdict.status, verdict.ename, verdict.evalue, seconds=time.monotonic() - began)
        outcome.counted = verdict.counted
        if verdict.status == "error":
            said = {"ename": verdict.ename, "evalue": verdict.evalue}
            outcome.outputs = [{"output_type": "error", **said, "traceback": list(verdict.places)}]
        if late:
            outcome.status = "timeout"
        elif verdict.status == "lost":
            outcome.status, outcome.evalue = "died", self.kernel.over
        if verdict.status == "lost" or not ended:
            raise KernelLost(outcome)
        return outcome

    async def judge_step(self, step: Step, seed: int) -> Verdict:
        asked, written = list(step.asked), list(step.written)
        return await self.judge.run_check(step.name, step.judged, asked, seed, step.hidden, written, step.defined)


def find_socket_beside(manager: AsyncKernelManager, name: str) -> str:
    """The path of a socket beside a kernel's own."""
    return os.path.join(os.path.dirname(manager.ip), name)


@asynccontextmanager
async def started(
    managers: Managers, limits: Limits, seed: int, judging: bool, files: Mapping[str, bytes]
) -> AsyncIterator[KernelPair]:
    """A running kernel in a folder of its own with these files, with a judge if wanted; all is gone at the end."""
    prepare = PREPARE.format(files={name: base64.b64encode(data).decode() for name, data in files.items()})
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llm40-", ignore_cleanup_errors=True)))
        kernel = NotebookKernel(stack.enter_context(managers(limits)), limits)
        stack.push_async_callback(kernel.stop)
        if not judging:
            await kernel.start(folder, make_kernel_environment(folder, seed))
            await kernel.prepare(prepare)
            yield KernelPair(kernel)
            return
        # Given cells draw the same numbers in both processes, and others than checks draw.
        env = make_kernel_environment(folder, GIVEN_SEED)
        judge, manager = await start_judge(stack, managers, limits, folder, env)
        await kernel.start(folder, env)
        try:
            await judge.connect(limits.start)
            listen = client.LISTEN.format(path=find_socket_beside(kernel.manager, client.AGENT))
            listening = await kernel.run(listen, limits.start, 0, silent=True)
            # Before any cell of the learner's, who could put another socket there. The agent accepts it later.
            await judge.attach(find_socket_beside(kernel.manager, client.AGENT), limits.start)
            await kernel.prepare(prepare)
        except (KernelLost, JudgeLost, TimeoutError, OSError) as error:
            raise KernelFailed(f"the judge did not start: {error}") from error
        if listening.status != "ok":
            raise KernelFailed(f"the judge's agent did not start: {listening.ename}: {listening.evalue}")
        yield KernelPair(kernel, judge, manager)


async def start_judge(
    stack: AsyncExitStack, managers: Managers, limits: Limits, folder: Path, env: dict[str, str]
) -> tuple[Judge, AsyncKernelManager]:
    """The judge's process: started as a kernel is, so that it has the same walls and limits."""
    manager = stack.enter_context(managers(limits))

    async def stop() -> None:
        with suppress(RuntimeError):
            await manager.shutdown_kernel(now=True)

    stack.push_async_callback(stop)
    path = find_socket_beside(manager, client.SOCKET)
    try:
        await start_process(manager, folder, env, COURT, path)
    except (RuntimeError, OSError) as error:
        raise KernelFailed(f"the judge did not start: {error}") from error
    judge = Judge(path)
    stack.callback(judge.close)
    return judge, manager


async def execute_async(
    steps: Sequence[Step],
    limits: Limits,
    seed: int,
    managers: Managers,
    judging: bool,
    files: Mapping[str, bytes],
) -> list[Outcome]:
    begun = time.monotonic()
    spent_before = 0.0  # CPU seconds of kernels that are gone
    space = limits.outputs
    outcomes: list[Outcome] = []
    culprits: set[int] = set()  # cells that are not run again
    losses = 0
    async with AsyncExitStack() as stack:
        pair = None

        def count_left() -> float:
            """Seconds of the notebook's limit that are left: of CPU time where that is counted."""
            wall = time.monotonic() - begun
            used = spent_before + (pair.count_cpu_seconds() if pair else 0.0)
            return limits.notebook - max(used, wall / LAST_RESORT if used else wall)

        async def lose() -> None:
            nonlocal pair, losses, spent_before
            spent_before += pair.count_cpu_seconds()
            pair = None
            losses += 1
            await stack.aclose()

        async def run(index: int) -> Outcome:
            try:
                seconds = min(limits.cell, count_left())
                outcome = await pair.step(steps[index], seconds, min(limits.output, space), seed)
            except KernelLost as lost:
                outcome = lost.outcome
                await lose()
            if pair is None or outcome.status == "timeout":
                culprits.add(index)
            return outcome

        def tell_spent() -> str:
            """Why nothing more is run; empty while there is time."""
            if count_left() <= 0:
                return f"the notebook's {limits.notebook:g} s were used up before"
            if losses > limits.restarts:
                return f"the kernel had died {losses} times before"
            return ""

        for index in range(len(steps)):
            if pair is not None and not await pair.kernel.is_alive():  # it died after its last answer
                culprits.add(index - 1)
                await lose()
            while pair is None and not tell_spent():
                pair = await stack.enter_async_context(started(managers, limits, seed, judging, files))
                for earlier in range(index):
                    if pair and not tell_spent() and earlier not in culprits and steps[earlier].kind != "check":
                        await run(earlier)
            reason = tell_spent()
            outcome = Outcome("not run", evalue=reason) if reason else await run(index)
            space = max(0, space - sum(len(str(item)) for item in outcome.outputs))
            outcomes.append(outcome)
    return outcomes


def execute(
    steps: Sequence[Step],
    limits: Limits | None = None,
    seed: int = 0,
    managers: Managers = SANDBOXED,
    judging: bool = False,
    files: Mapping[str, bytes] | None = None,
) -> list[Outcome]:
    """Runs the steps in order in one kernel, or in as many as their accidents take; one outcome for each.

    `managers` says how a kernel is made: another function, another kind of kernel. With `judging`, checks run in a
    process of their own beside it. `files` (place → content) lie in the kernel's folder.
    """

    async def run() -> list[Outcome]:
        task = asyncio.current_task()
        _running[task] = asyncio.get_running_loop()
        try:
            return await execute_async(steps, limits or Limits(), seed, managers, judging, files or {})
        finally:
            del _running[task]

    return asyncio.run(run())


_running: dict[asyncio.Task, asyncio.AbstractEventLoop] = {}  # of all threads


def stop_all() -> None:
    """Ends what `execute` is doing in other threads: there it raises CancelledError, when its kernels are gone."""
    for task, loop in list(_running.items()):
        with suppress(RuntimeError):  # it has just ended
            loop.call_soon_threadsafe(task.cancel)
