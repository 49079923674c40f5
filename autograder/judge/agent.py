"""The learner's end of the link: it calls the learner's code and answers with values.

It runs in the learner's own kernel and main thread, as a cell would. Nothing here decides a verdict: a learner who
bends it changes answers, and a changed answer is judged like any other. Measurements that are possible only where the
learner's code runs (allocations, calls of PyTorch's functions) are made here for the judge.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent

from autograder.judge import proxies, relay, tensors
from autograder.judge.link import HELPERS, Link, Lost
from autograder.judge.messages import Describe, Done, Fork, Hook, Launch, Malformed, Reach, Reply
from autograder.judge.values import find_attribute

PLAIN = (int, float, str, bool, list, tuple, dict, set)
APART = 4096  # bytes after each storage of a launch, so that each address belongs to one storage


class Agent(Link):
    """Answers the judge's requests, for one check or for all."""

    judges = False

    def __init__(self, connection: socket.socket, names: dict):
        super().__init__(connection, names)
        self.built: dict[int, object] = {}
        self.built_numbers: dict[int, int] = {}
        self.asked: set[str] = set()  # names that exercises define
        self.children: list[int] = []  # processes: twins, and connectors to servers
        self.handed: list[socket.socket] = []  # sockets to the children, which the judge gets after the reply
        self.meeting = ""  # the folder in which the twins meet
        self.only: torch.Tensor | None = None  # during a launch: the one tensor whose memory the kernel may touch

    def resolve(self, target: list):
        kind, *rest = target
        if kind == "name":
            if rest[0] not in self.names:
                raise NameError(f"name {rest[0]!r} is not defined")
            return self.names[rest[0]]
        if kind == "library" and rest[0] in HELPERS:
            return find_attribute(rest[0])
        return super().resolve(target)

    def perform(self, request: object, reply: Reply, seen: list) -> object:
        if isinstance(request, Describe):
            return self.describe(request)
        if isinstance(request, Hook):
            module = self.find_exported(request.module)
            return getattr(module, request.kind)(self.decode(request.hook), **self.decode(request.options))
        if isinstance(request, Launch):
            return self.launch(request, reply, seen)
        if isinstance(request, Fork):
            self.handed.append(self.fork_twin(request.rank, request.ranks))
            return None
        if isinstance(request, Reach):
            pid, control = relay.fork_connector(request.path, self.connection)
            self.children.append(pid)
            self.handed.append(control)
            return None
        if isinstance(request, Done):
            return None
        return super().perform(request, reply, seen)

    def forget(self) -> None:
        super().forget()
        for number in self.built:
            self.views.pop(number, None)
            self.shared_modules.pop(number, None)
        self.built.clear()
        self.built_numbers.clear()

    def describe(self, request: Describe) -> dict:
        self.given, self.asked = set(request.given), set(request.names)
        return {name: self.names[name] for name in request.names if name in self.names}

    def is_exercise_class(self, kind: type) -> bool:
        return kind.__name__ in self.asked

    def launch(self, request: Launch, reply: Reply, seen: list) -> None:
        kernel = self.resolve(request.target)
        storages = [tensors.make_storage(raw + bytes(APART)) for raw in request.storages]

        def decode(encoded):
            is_placed = isinstance(encoded, list) and encoded[0] == "placed"
            return tensors.make_placed(encoded, storages) if is_placed else self.decode(encoded)

        args = [decode(encoded) for encoded in request.args]
        kwargs = {name: decode(encoded) for name, encoded in request.kwargs}
        grid = self.decode(request.grid)
        if request.only is not None:
            self.only = tensors.make_placed(request.only, storages)
        self.measure(request.around, seen, lambda: kernel[grid](*args, **kwargs))
        self.only = None
        for each in seen:
            if isinstance(each, dict) and each and all(isinstance(counts, Counter) for counts in each.values()):
                each |= {way: relocate(counts, storages, request.places) for way, counts in each.items()}
        for place, (storage, before) in enumerate(zip(storages, request.storages, strict=True)):
            after = tensors.read_storage(storage)[: len(before)]
            if after != before:
                reply.storages.append([place, after])

    def measure(self, around: list, seen: list, act, modes: list | None = None) -> object:
        if not around:
            return super().measure(around, seen, act, modes)
        done, value, contexts = False, None, [self.open_measurement(spec) for spec in around]
        watched = []
        try:
            with tensors.observed(modes), ExitStack() as stack:
                for context in contexts:
                    watched.append(stack.enter_context(context))
                value = act()
                done = True
        except AssertionError as error:
            if not done:
                raise
            seen.extend(read_measurement(value) for value in watched[:-1])
            seen.append({"raised": str(error)})
            return value
        finally:
            if len(seen) < len(watched):
                seen.extend(read_measurement(one) for one in watched[len(seen) :])
        return value

    def open_measurement(self, spec: list):
        """Opens the measurement that the judge names: one of llm40.checks, or of a given cell."""
        place, name, args, kwargs = spec
        made = getattr(sys.modules["llm40.checks"], name) if place == "checks" else self.names[name]
        options = self.decode(kwargs)
        if self.only is not None and name == "traffic":
            options["only"] = self.only
        return made(*self.decode(args), **options)

    def decode_library(self, path: str):
        return find_attribute(path)

    def decode_built(self, number: int, description: dict | None):
        known = self.imported.get(number)
        if known is not None:
            return known
        with self.tracking(None):  # as the judge's end encodes it: the two count the same containers
            made = proxies.build_module(self, number, description)
        self.imported[number] = made
        self.built[number] = made
        self.built_numbers[id(made)] = number
        return made

    def encode_object(self, value: object) -> list:
        if id(value) in self.built_numbers:
            return ["mine", self.built_numbers[id(value)]]
        return super().encode_object(value)

    def serve_check(self) -> None:
        """Answers requests until a check is over."""
        while True:
            request, envelope = self.receive()
            self.serve(request, envelope)
            if self.handed:
                with self.handed.pop() as control:
                    socket.send_fds(self.connection, [b"\0"], [control.fileno()])
            if isinstance(request, Done):
                self.end_children()
                self.forget()
                return

    # --- twins, for checks that launch ranks (llm40.distributed) ---

    def fork_twin(self, rank: int, ranks: int) -> socket.socket:
        """Forks this process for a rank of the check; the twins have a process group among themselves. Returns the
        judge's socket."""
        if not rank:
            self.end_children()
            self.meeting = tempfile.mkdtemp(prefix="llm40-twins-")
        control, own = socket.socketpair()
        pid = os.fork()
        if pid:
            own.close()
            self.children.append(pid)
            return control
        try:
            control.close()
            self.connection.close()
            self.connection, self.children, self.handed = own, [], []
            die_with_parent(signal.SIGKILL)
            torch.set_num_threads(1)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
            dist.init_process_group("gloo", init_method=f"file://{self.meeting}/meeting", rank=rank, world_size=ranks)
            self.serve_check()
        finally:
            os._exit(0)

    def end_children(self) -> None:
        for pid in self.children:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.children.clear()
        if self.meeting:
            shutil.rmtree(self.meeting, ignore_errors=True)
            self.meeting = ""


def relocate(counts: dict[int, int], storages: list, places: list[int]) -> Counter:
    """Counts by the addresses of the judge's process. A kernel may reach far beyond its tensors (rows 2³⁰ elements
    apart): an address belongs to the storage in which it lies, else to the nearest one before it, multiples of 2³¹
    apart."""
    bounds = [(storage.data_ptr(), storage.nbytes(), there) for storage, there in zip(storages, places, strict=True)]
    moved: Counter = Counter()
    for address, count in counts.items():
        begin, _, there = min(
            bounds, key=lambda b: (not b[0] <= address < b[0] + b[1], (address - b[0]) % 2**31, abs(address - b[0]))
        )
        moved[there + address - begin] += count
    return moved


def read_measurement(watched: object) -> object:
    """The result of a measurement, as plain values."""
    if is_dataclass(watched):
        return {f.name: getattr(watched, f.name) for f in fields(watched)}
    if isinstance(watched, PLAIN):
        return watched
    if watched is None:
        return None
    return {
        name: value for name, value in vars(watched).items() if isinstance(value, PLAIN) and not name.startswith("_")
    }


def is_instance(value: object, kind: type) -> bool:
    """Like isinstance, but out of reach of a metaclass."""
    return kind in type(value).__mro__


_agents: dict[str, Agent] = {}


def listen(path: str, names: dict) -> None:
    """Listens at `path` for the judge, who connects for the first check; called in the kernel's first cell."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(1)
    _agents["listener"] = listener
    _agents["names"] = names


def serve() -> None:
    """Answers the judge until a check is over; called in a cell of its own for each check."""
    agent = _agents.get("agent")
    if agent is None:
        connection, _ = _agents["listener"].accept()
        agent = _agents["agent"] = Agent(connection, _agents["names"])
    try:
        agent.serve_check()
    except BaseException as error:
        _agents.pop("agent", None)
        agent.connection.close()  # the judge notices at once
        if not isinstance(error, (Lost, Malformed)):
            raise
