"""The worker's side of a judge: gives it orders and connects it to the learner's process."""

import asyncio
import json
import socket
from dataclasses import dataclass

ANSWER = 10_000_000  # bytes at most
SOCKET, AGENT = "j", "a"  # names of the judge's and of the agent's socket, each beside its kernel's own
LISTEN = "__import__('autograder.judge.agent', fromlist=['listen']).listen({path!r}, globals())"
SERVE = "__import__('autograder.judge.agent', fromlist=['serve']).serve()"


@dataclass(frozen=True)
class Verdict:
    """How a cell ended in the judge's process: `ok`, `error` or `lost` (the learner's process no longer answers)."""

    status: str
    ename: str = ""
    evalue: str = ""
    places: tuple[str, ...] = ()  # the lines that led to an error
    counted: bool = False  # whether the check counted something in the learner's process


class JudgeLost(ConnectionError):
    """The judge's process does not answer."""


class Judge:
    """A connection to a judge's process."""

    def __init__(self, path: str):
        self.path = path
        self.connection: socket.socket | None = None

    async def connect(self, patience: float) -> None:
        """Connects to the judge's process as soon as it listens."""
        self.connection = await reach(self.path, patience)

    async def attach(self, path: str, patience: float) -> None:
        """Hands the judge a connection to the agent in the learner's process."""
        try:
            agent = await reach(path, patience)
        except OSError as error:
            raise JudgeLost(str(error)) from error
        agent.setblocking(True)
        with agent:
            await self.order(order="attach", file=agent.fileno())

    async def run_given(self, name: str, source: str) -> Verdict:
        return await self.order(order="given", name=name, source=source)

    async def run_check(
        self,
        name: str,
        source: str,
        asked: list[str],
        seed: int,
        hidden: int,
        written: list[str],
        defined: dict[str, dict],
    ) -> Verdict:
        """Runs a check. `asked` are the names that exercises define, `hidden` is the first line of its hidden tests,
        `written` the learner's text for it, `defined` what the exercises' text says of what they define."""
        about = {"name": name, "source": source, "asked": asked, "seed": str(seed), "hidden": hidden}
        return await self.order(order="check", written=written, defined=defined, **about)

    async def order(self, file: int | None = None, **order: object) -> Verdict:
        loop = asyncio.get_running_loop()
        raw = json.dumps(order).encode()
        try:
            await loop.sock_sendall(self.connection, len(raw).to_bytes(8, "big") + raw)
            if file is not None:
                socket.send_fds(self.connection, [b"\0"], [file])
            size = int.from_bytes(await self.receive(8), "big")
            if size > ANSWER:
                raise JudgeLost("an answer too long to be one")
            answer = json.loads(await self.receive(size))
        except (OSError, ValueError) as error:
            raise JudgeLost(str(error)) from error
        return Verdict(**{**answer, "places": tuple(answer.get("places", ()))})

    async def receive(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        got = bytearray()
        while len(got) < size:
            part = await loop.sock_recv(self.connection, size - len(got))
            if not part:
                raise JudgeLost("the judge's process has ended")
            got += part
        return bytes(got)

    def close(self) -> None:
        if self.connection:
            self.connection.close()


async def reach(path: str, patience: float) -> socket.socket:
    """Connects to a socket as soon as another process listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)  # a listener whose queue is full would hold up the whole grader
    try:
        async with asyncio.timeout(patience):
            while True:
                try:
                    connection.connect(path)
                    break
                except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                    await asyncio.sleep(0.005)
    except BaseException:
        connection.close()
        raise
    return connection
