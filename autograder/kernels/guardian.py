"""The grader's side of a kernel's guard: starts it, and sends it what is ours to run."""

import ast
import asyncio
import marshal
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from autograder.kernels.inside.load import OURS
from autograder.kernels.inside.seal import SEAL, framed, opened, sealed

PATIENCE = 20.0  # seconds for what takes none
SOCKET = "g"  # its name, beside the kernel's own sockets
MOST = 50_000_000  # bytes of an answer


@dataclass(frozen=True)
class Lesson:
    """What a guard knows of a lesson: the modules that its cells import, the special methods (class → names) that its
    classes are asked to have, the names that its exercises define, the functions that its plain cells define, and the
    canaries (name → program)."""

    modules: tuple[str, ...] = ()
    honest: dict[str, list[str]] = field(default_factory=dict)
    theirs: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    canaries: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Answer:
    """How a cell of ours ended (`ok`, `error`, `timeout` or `stuck`), with what exception, and what the guard found."""

    status: str
    ename: str = ""
    evalue: str = ""
    places: tuple[tuple[str, int, str], ...] = ()  # file, line and function of the traceback
    reports: tuple[tuple[str, str], ...] = ()  # kind and what


class GuardLost(ConnectionError):
    """The guard does not answer, or not as only it can: the kernel must end."""


def program(source: str | ast.Module, file: str) -> bytes:
    """A program as the kernel gets it: compiled, so that its text is nowhere there."""
    return marshal.dumps(compile(source, file, "exec", dont_inherit=True))


def file_of(name: str) -> str:
    """What a cell of ours is called in tracebacks."""
    return f"{OURS}{name}>"


class Guardian:
    """A connection to a kernel's guard."""

    def __init__(self, lesson: Lesson, seed: int, grace: float):
        self.lesson, self.seed, self.grace = lesson, seed, grace
        self.key = secrets.token_bytes(SEAL)
        self.number = 0
        self.reader = self.writer = None

    async def begin(self, path: str, environment: dict[str, str]) -> None:
        """Connects to a guard that the door cell started, before anything of the learner's has run."""
        self.reader, self.writer = await asyncio.open_unix_connection(path)
        self.writer.write(self.key)
        canaries = [list(canary) for canary in self.lesson.canaries]
        answer = await self._ask(
            "begin", 10 * PATIENCE, modules=list(self.lesson.modules), canaries=canaries, environment=environment,
        )  # fmt: skip
        if answer.status != "ok":
            raise GuardLost(f"the guard did not begin: {answer.ename}: {answer.evalue}")

    async def run_plain(self, name: str, source: str, seconds: float) -> Answer:
        """Runs a cell of ours among the learner's names."""
        file = file_of(name)
        return await self._ask(
            "run_plain", seconds, code=program(source, file), file=file, source=source, theirs=list(self.lesson.theirs)
        )

    async def run_check(self, check: bytes, seconds: float, alone: bool) -> Answer:
        """Runs a check, made by `program`; with `alone`, a learner's other threads are reported."""
        return await self._ask("run_check", seconds, code=check, seed=self.seed, honest=self.lesson.honest, alone=alone)

    async def _ask(self, what: str, seconds: float, **arguments) -> Answer:
        request = {"do": what, "with": arguments, "seconds": max(0.0, seconds), "grace": self.grace}
        self.writer.write(framed(sealed(self.key, self.number, marshal.dumps(request))))
        try:
            async with asyncio.timeout(seconds + self.grace + PATIENCE):
                size = int.from_bytes(await self.reader.readexactly(8), "big")
                if size > MOST:
                    raise GuardLost("an answer too long to be one")
                message = await self.reader.readexactly(size)
            *parts, reports = ast.literal_eval(opened(self.key, self.number + 1, message).decode())
        except TimeoutError:
            return Answer("stuck")
        except (OSError, EOFError, ValueError, SyntaxError) as error:
            raise GuardLost(f"the guard is gone ({error})") from error
        self.number += 2
        return Answer(*parts, reports=reports)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def place(manager) -> str:
    """Where a kernel's guard has its socket."""
    return os.path.join(os.path.dirname(manager.ip), SOCKET)


def traceback(places: Sequence[tuple[str, int, str]], sources: dict[str, str]) -> list[str]:
    """The lines of a traceback; `sources` are the texts of our cells, by their files' names."""
    lines = []
    for file, number, function in places:
        text = sources.get(file, "").split("\n")
        shown = file.removeprefix(OURS).removesuffix(">") if file.startswith(OURS) else file
        lines.append(f"{shown}, line {number}, in {function}")
        if 0 < number <= len(text) and text[number - 1].strip():
            lines.append(f"    {text[number - 1].strip()}")
    return lines
