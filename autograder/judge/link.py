"""One end of the socket between the judge and a learner's process, with its tables of the objects that both ends know.

Both ends run the same code; they differ in the requests that they refuse (`Link.refuse_forbidden`).

- **Values** pass by copy. Where a call changes an argument in place, its reply brings the change here; not that of a
  `random.Random` or a NumPy generator, and a `defaultdict` arrives as a dict.
- **Tensors, generators and modules** pass as mirrors: each has a number and lives at both ends. Each message carries
  all changes since the last one (values, gradients, modes, parameters), in both directions.
- **Gradients** pass as vector-Jacobian products: a result that carries gradients is an output of `RemoteCall`, whose
  backward asks the end where the result was made.
- **Everything else** passes as a handle, for which the other end makes a proxy (proxies.py): attributes, items, calls
  and operators are requests.

The other end may send anything: bytes that are no message raise Malformed, and a number of no object raises Refused.
"""

import builtins
import socket
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch
from torch import Tensor, enable_grad, nn  # imported by name, because checks may watch torch's attributes
from torch.autograd.graph import _engine_run_backward as run_backward  # modes would see autograd.grad, which calls it

from autograder.judge import messages, proxies, tensors, transforms
from autograder.judge.messages import Attribute, Call, Envelope, Gradients, Reply
from autograder.judge.values import Codec, Refused, find_attribute, name_class

MUTABLE = frozenset(("list", "dict", "ordered", "counter", "set", "deque", "array", "bytearray", "record"))
LIBRARIES = ("torch.", "llm40.", "math:", "operator:", "numpy:", "builtins:")  # their functions pass by name
HELPERS = (
    "autograder.judge.agent:is_instance",
    "builtins:issubclass",
    "builtins:dir",
    "copy:copy",
    "copy:deepcopy",
    "builtins:repr",
    "builtins:type",
)
THING = ("__init__", "__repr__", "__dict__", "__weakref__")  # members that the class of a thing may define


class Lost(ConnectionError):
    """The other end is gone."""


class RemoteError(RuntimeError):
    """An exception of a class that only the other end has."""


@dataclass
class CallGraph:
    """The results of a call that carry gradients, and the tensors that they depend on."""

    outputs: list[Tensor]
    depends: list[Tensor]


class GraphToken:
    """Lives as long as this end may ask for gradients of a call; then the other end drops the call's graph."""

    def __init__(self, number: int):
        self.number = number


class RemoteCall(torch.autograd.Function):
    """The results of a call, as functions of the tensors that they depend on at the other end."""

    @staticmethod
    def forward(ctx, link, token, made, *inputs):
        ctx.link, ctx.token = link, token
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx, *cotangents):
        return None, None, None, *ctx.link.pull_back(ctx.token.number, cotangents)


class Link(Codec):
    """One end of the socket. `names` are the names of this end's notebook, `given` those that given cells define."""

    judges = False  # whether this is the judge's end

    def __init__(self, connection: socket.socket, names: dict):
        self.connection = connection
        self.names = names
        self.given: set[str] = set()
        self.next_number = 2 if self.judges else 1
        self.tensors = tensors.Mirrors(self, weak=self.judges)
        self.generators: dict[int, list] = {}  # number → [generator, state as last exchanged]
        self.generator_numbers: dict[int, int] = {}
        self.exported: dict[int, object] = {}
        self.export_numbers: dict[int, int] = {}
        self.imported: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
        self.views: dict[int, dict] = {}  # number → a shared module's parts as last exchanged
        self.shared_modules: dict[int, Callable[[], nn.Module | None]] = {}
        self.calls: dict[int, CallGraph] = {}
        self.kept: list = []  # the learner's end holds its proxies here
        self.things: dict[int, list] = {}  # number → [object, its attributes as last exchanged, the same encoded]
        self.thing_numbers: dict[int, int] = {}
        self.waiting_things: list[int] = []
        self.released: list[int] = []
        self.pending: list[int] = []
        self.broken = False  # whether a request was abandoned before its reply came
        self.depth = 0  # number of requests that wait for their replies
        self.measurements: list = []
        self.random = None
        self.tracked: list | None = None

    def make_number(self) -> int:
        self.next_number += 2
        return self.next_number

    # --- sending and receiving ---

    def send(self, message: object) -> None:
        """Sends a message, and with it every change at this end since the last one."""
        envelope = Envelope(messages.list_fields(message))
        outermost = self.depth <= (self.judges and not isinstance(message, Reply))
        self.collect_things(envelope, changed=outermost)
        self.collect_modules(envelope)
        self.collect_generators(envelope)
        self.tensors.collect()
        envelope.tensors = self.tensors.outgoing
        self.tensors.outgoing = []
        if not self.judges:
            self.drop_unheld()
        envelope.released, self.released = self.released, []
        state = tensors.read_random_state()
        if state != self.random:
            envelope.random = self.random = state
        raw = messages.pack(envelope)
        try:
            self.connection.sendall(len(raw).to_bytes(8, "big") + raw)
        except OSError as error:
            raise Lost(str(error)) from error

    def receive(self) -> tuple[object, Envelope]:
        size = int.from_bytes(self._read(8), "big")
        if size > messages.LIMIT:
            raise messages.Malformed("a message too long to be one")
        envelope = messages.unpack(self._read(size))
        if envelope.random is not None:
            self.random = envelope.random
            tensors.set_random_state(envelope.random)
        return messages.make_message(envelope.message), envelope

    def _read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            try:
                part = self.connection.recv_into(view[got:])
            except OSError as error:
                raise Lost(str(error)) from error
            if not part:
                raise Lost("the other end closed the connection")
            got += part
        return buffer

    def request(self, message: object) -> Reply:
        """Sends a request and serves the other end's requests until the reply comes. Raises what the other end raised.

        Callers make the request and call this inside one `asking` block.
        """
        if self.broken:
            raise Lost("an earlier request was not answered")
        self.broken = True  # until the reply is here, whatever is raised meanwhile
        self.send(message)
        while True:
            answer, envelope = self.receive()
            if isinstance(answer, Reply):
                break
            self.serve(answer, envelope)
            self.broken = True
        self.broken = False
        self.take(envelope, answer)
        if answer.switches:
            tensors.set_switches(answer.switches)
        for measurement, seen in zip(self.measurements, answer.seen, strict=False):
            measurement.merge(self.decode(seen))
        if answer.error is not None:
            raise self.make_exception(answer.error)
        return answer

    def take(self, envelope: Envelope, answer: Reply | None = None) -> None:
        """Applies the other end's changes here; new tensors become mirrors."""
        fresh = self.tensors.receive(envelope.tensors, held=answer.outputs if answer else ())
        for number, state in envelope.generators:
            self.receive_generator(number, state)
        if answer is not None and answer.outputs:
            inputs = [self.tensors.find(number) for number in answer.depends]
            self.tensors.leaves |= {n: t for n, t in zip(answer.depends, inputs, strict=True) if t.is_leaf and n % 2}
            token = GraphToken(answer.call)
            weakref.finalize(token, self.let_go, answer.call).atexit = False
            with enable_grad():
                results = RemoteCall.apply(self, token, [fresh[number] for number in answer.outputs], *inputs)
            self.tensors.passing |= dict(zip(answer.outputs, results, strict=True))
            for number, result in zip(answer.outputs, results, strict=True):
                self.tensors.register(number, result, self.tensors.held.pop(number))
                self.tensors.by_number[number].linked = True
                self.tensors.by_number[number].note(result, self.tensors.sign(result))
                if not self.judges:  # a callback's result: the judge drops its own graph of it after the callback
                    self.tensors.by_number[number].graph = None
        self.receive_things(envelope.things)
        for number, kind, name, value in envelope.modules:
            self.receive_part(number, kind, name, value)
        if answer is None:
            self.release(envelope.released)
        else:  # the value of this reply may still name them; the next request must not
            self.pending += envelope.released

    def let_go(self, number: int) -> None:
        """Forgets an object that this end no longer uses; the next message tells the other end."""
        self.released.append(number)
        self.views.pop(number, None)
        self.shared_modules.pop(number, None)

    def release(self, numbers: list) -> None:
        """Forgets the objects that the other end no longer uses."""
        for number in numbers:
            generator = self.generators.pop(number, None)
            if generator:
                self.generator_numbers.pop(id(generator[0]), None)
            elif self.calls.pop(number, None) is None and not self.tensors.release(number):
                value = self.exported.pop(number, None)
                if value is not None:
                    self.export_numbers.pop(id(value), None)
                self.views.pop(number, None)
                self.shared_modules.pop(number, None)

    def release_pending(self) -> None:
        """Forgets the objects that the other end let go of, before anything is encoded: they then get new numbers."""
        pending, self.pending = self.pending, []
        self.release(pending)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Surrounds the making of a request and the reading of its reply."""
        with tensors.unobserved():
            self.depth += 1
            self.release_pending()
            try:
                yield
            finally:
                self.depth -= 1
                if not self.depth:
                    self.tensors.passing.clear()

    # --- asking ---

    def call(self, target: list, args: Iterable, kwargs: dict) -> object:
        """Calls an object of the other end."""
        with self.asking():
            with self.tracking([]) as containers:
                encoded = self.encode(tuple(args)), self.encode(kwargs)
            answer = self.request(Call(target, *encoded, self.list_measurements(), tensors.read_modes()))
            for place, value in answer.changed:
                replace_contents(containers[place], self.decode(value))
            return self.decode(answer.value)

    def call_function(self, number: int, function: Callable, args: tuple, kwargs: dict) -> object:
        """Calls a function of the other end that has a proxy here."""
        if transforms.has_wrapped(args, kwargs):
            return transforms.call_wrapped(
                lambda args, kwargs: self.call(["object", number], args, kwargs), args, kwargs
            )
        return self.call(["object", number], args, kwargs)

    def list_measurements(self) -> list:
        return [measurement.spec for measurement in self.measurements]

    def pull_back(self, call: int, cotangents: Iterable[Tensor | None]) -> list:
        with self.asking():
            encoded = [self.encode(cotangent) for cotangent in cotangents]
            answer = self.request(Gradients(call, encoded, torch.is_grad_enabled(), self.list_measurements()))
            return self.decode(answer.value)

    def request_attribute(self, target: list, name: str, action: str = "get", value: object = None) -> object:
        with self.asking():
            message = Attribute(target, name, action, self.encode(value), self.list_measurements())
            return self.decode(self.request(message).value)

    # --- serving ---

    def refuse_forbidden(self, request: object) -> None:
        """Raises an exception if the other end may not send this request."""

    def serve(self, request: object, envelope: Envelope) -> None:
        """Performs a request and sends the reply."""
        reply = Reply()
        measured: list = []
        self.broken = False
        held = set(self.tensors.passing)
        try:
            self.take(envelope)
            self.refuse_forbidden(request)
            value = self.perform(request, reply, measured)
            self.release_pending()
            reply.value = self.encode(value)
            self.find_outputs(reply)
            for place, (container, before) in enumerate(getattr(request, "containers", [])):
                after = self.encode(container)
                if after != before:
                    reply.changed.append([place, after])
        except BaseException as error:
            self.release_pending()
            reply.value = None
            reply.outputs, reply.depends, reply.call, reply.changed = [], [], 0, []
            reply.error = self.encode_exception(error)
        reply.seen = [self.encode(seen) for seen in measured]
        request.containers = []  # the caller still holds the request: these would keep its tensors
        request = value = container = before = after = None
        if self.judges:  # tensors that came with this request go with its reply, unless something holds them
            for number in self.tensors.passing.keys() - held:
                if number % 2 and number in self.tensors.by_number:
                    del self.tensors.passing[number]
        self.send(reply)

    def perform(self, request: object, reply: Reply, seen: list) -> object:
        if isinstance(request, Call):
            function = self.resolve(request.target)
            self.repeated = False
            with self.tracking([]) as request.containers:
                args, kwargs = self.decode(request.args), self.decode(request.kwargs)
            if self.repeated:  # an array that occurs twice is encoded as "same" above, but in full when alone
                request.containers = [(value, self.encode(value)) for value, _ in request.containers]

            def act() -> object:
                before = tensors.read_switches()
                try:
                    return function(*args, **kwargs)
                finally:
                    after = tensors.read_switches()
                    reply.switches = after if after != before else []

            return self.measure(request.around, seen, act, request.modes)
        if isinstance(request, Gradients):
            return self.serve_gradients(request, seen)
        if isinstance(request, Attribute):
            return self.serve_attribute(request, seen)
        raise Refused(f"{type(request).__name__} is not asked of this end")

    def resolve(self, target: list) -> Callable:
        kind, *rest = target
        if kind == "object":
            return self.find_exported(rest[0])
        if kind == "method":
            return getattr(self.find_exported(rest[0]), rest[1])
        raise Refused("a target of no known kind")

    def find_exported(self, number: object) -> object:
        if number not in self.exported:
            raise Refused("a handle of nothing")
        return self.exported[number]

    def measure(self, around: list, seen: list, act: Callable[[], object], modes: list | None = None) -> object:
        """Calls `act` in the modes of the end that asked, and inside the measurements that it asks for."""
        with tensors.observed(modes):
            return act()

    def serve_attribute(self, request: Attribute, seen: list) -> object:
        owner = self.resolve(request.target) if request.target[0] != "object" else self.find_exported(request.target[1])
        if request.action == "get":
            return self.measure(request.around, seen, lambda: getattr(owner, request.name))
        if request.action == "set":
            value = self.decode(request.value)
            return self.measure(request.around, seen, lambda: setattr(owner, request.name, value))
        return self.measure(request.around, seen, lambda: delattr(owner, request.name))

    def serve_gradients(self, request: Gradients, seen: list) -> object:
        record = self.calls.get(request.call)
        if record is None:
            raise Refused("gradients of no call")
        cotangents = self.decode(["list", request.cotangents])
        pairs = [(out, given) for out, given in zip(record.outputs, cotangents, strict=True) if given is not None]
        if not pairs:
            return [None] * len(record.depends)
        outputs, given = zip(*pairs, strict=True)
        return self.measure(
            request.around,
            seen,
            lambda: list(
                run_backward(
                    outputs, given, True, bool(request.create_graph), tuple(record.depends), True, accumulate_grad=False
                )
            ),
        )

    def find_outputs(self, reply: Reply) -> None:
        """Notes in the reply which of the new tensors have a graph, and which tensors that graph reaches."""
        new = [number for number, _ in self.tensors.outgoing]
        outputs = [number for number in new if (t := self.tensors.find(number)).requires_grad and not t.is_leaf]
        if not outputs:
            return
        made = [self.tensors.find(number) for number in outputs]
        for number in outputs:
            self.tensors.by_number[number].linked = True
        depends = self.tensors.find_reached(made, set(outputs))
        reply.outputs, reply.depends = outputs, [self.tensors.number_tensor(t) for t in depends]
        reply.call = self.make_number()
        self.calls[reply.call] = CallGraph(made, depends)

    # --- tensors, generators, and containers that a call may change ---

    @contextmanager
    def tracking(self, containers: list | None) -> Iterator[list | None]:
        """Inside the block, `encode` and `decode` add the containers that a call may change to this list."""
        outer, self.tracked = self.tracked, containers
        try:
            yield containers
        finally:
            self.tracked = outer

    def encode(self, value: object, depth: int = 0) -> object:
        encoded = super().encode(value, depth)
        if self.tracked is not None and type(encoded) is list and encoded[0] in MUTABLE:
            self.tracked.append(value)
        return encoded

    def decode(self, encoded: object, depth: int = 0) -> object:
        value = super().decode(encoded, depth)
        if self.tracked is not None and type(encoded) is list and encoded[0] in MUTABLE:
            self.tracked.append((value, encoded))
        return value

    def encode_tensor(self, value: Tensor) -> list:
        return ["tensor", self.tensors.number_tensor(value)]

    def decode_tensor(self, number: int) -> Tensor:
        return self.tensors.find(number)

    def encode_generator(self, value: torch.Generator) -> list:
        number = self.generator_numbers.get(id(value))
        if number is None:
            number = self.make_number()
            self.generators[number] = [value, None]
            self.generator_numbers[id(value)] = number
        return ["generator", number]

    def decode_generator(self, number: int) -> torch.Generator:
        if number not in self.generators:
            raise Refused("a generator of nothing")
        return self.generators[number][0]

    def collect_generators(self, envelope: Envelope) -> None:
        for number, pair in self.generators.copy().items():
            state = tensors.read_generator_state(pair[0])
            if state != pair[1]:
                pair[1] = state
                envelope.generators.append([number, state])

    def receive_generator(self, number: int, state: list) -> None:
        if number not in self.generators:
            made = torch.Generator(state[0])
            self.generators[number] = [made, None]
            self.generator_numbers[id(made)] = number
        tensors.set_generator_state(self.generators[number][0], state)
        self.generators[number][1] = state

    def drop_unheld(self) -> None:
        """Makes both ends forget generators and tensors that only this link's tables hold: nothing can change them."""
        for number, pair in self.generators.copy().items():
            if sys.getrefcount(pair[0]) <= 2:
                del self.generators[number], self.generator_numbers[id(pair[0])]
                self.released.append(number)
        self.released += self.tensors.drop_unheld()

    # --- modules ---

    def collect_modules(self, envelope: Envelope) -> None:
        """Collects the changed parameters, buffers, submodules and modes of modules that both ends have."""
        for number, find in self.shared_modules.copy().items():
            module = find()
            if module is None:
                continue
            view, now = self.views[number], self.list_parts(module, number % 2 == 0)
            for key in view.keys() - now.keys():
                envelope.modules.append([number, "delete", key[0] + " " + key[1], None])
            for key, value in now.items():
                if key not in view or view[key] is not value:
                    envelope.modules.append([number, *key, self.encode(value)])
            self.views[number] = now

    def receive_part(self, number: int, kind: str, name: str, encoded: object) -> None:
        module = self.shared_modules.get(number, lambda: None)()
        if module is None:
            return
        if kind == "delete":
            kind, _, name = name.partition(" ")
            find_part_tables(module).get(kind, {}).pop(self.find_part_key(kind, name), None)
        else:
            value = self.decode(encoded)
            value = self.wrap_hook(value) if kind in HOOKS and self.judges else value
            self.set_part(module, kind, name, value)
        self.views[number] = self.list_parts(module, number % 2 == 0)

    def wrap_hook(self, hook: Callable) -> Callable:
        """Limits a hook that the learner's code put on a module: it runs while that code runs (which may have called
        the module), and never while the judge computes for itself."""

        def run(*args, **kwargs):
            return hook(*args, **kwargs) if self.depth else None

        return run

    def share_module(self, number: int, module: nn.Module) -> None:
        weak = self.judges and number % 2 == 1
        self.shared_modules[number] = weakref.ref(module) if weak else lambda: module
        self.views[number] = self.list_parts(module, number % 2 == 0)

    def list_parts(self, module: nn.Module, everything: bool) -> dict:
        """A module's parts by kind and name; with `everything` (a module of the judge's) also attributes and hooks."""
        parts = {("parameter", name): value for name, value in module._parameters.items()}
        parts |= {("buffer", name): value for name, value in module._buffers.items()}
        parts |= {("module", name): value for name, value in module._modules.items()}
        parts["training", ""] = module.training
        if everything:
            parts |= {("attribute", name): value for name, value in vars(module).items() if name not in INTERNAL}
            parts |= self.list_hooks(module)
        return parts

    def set_part(self, module: nn.Module, kind: str, name: str, value: object) -> None:
        if kind == "training":
            module.training = bool(value)
            return
        if kind == "full hooks":
            module._is_full_backward_hook = None if value is None else bool(value)
            return
        place = find_part_tables(module).get(kind)
        if place is None or not isinstance(name, str):
            raise Refused("a part of no known kind")
        if kind == "attribute" and (name in INTERNAL or proxies.is_special(name) or hasattr(type(module), name)):
            return  # an attribute that replaces a method: each end keeps its own
        wanted = {"module": nn.Module, "parameter": Tensor, "buffer": Tensor}.get(kind, object)
        if value is not None and not isinstance(value, wanted):
            raise Refused("a part that is none")
        place[self.find_part_key(kind, name)] = value

    def list_hooks(self, module: nn.Module) -> dict:
        """A module's hooks by kind and name. Both processes number hooks from 0: a name also says which end's it is."""
        hooks = {(kind, self.name_hook(key)): hook for kind in HOOKS for key, hook in getattr(module, kind).items()}
        return {("full hooks", ""): module._is_full_backward_hook} | hooks

    def name_hook(self, key: int | str) -> str:
        return key if isinstance(key, str) else f"{self.judges:d}{key}"

    def find_part_key(self, kind: str, name: str) -> int | str:
        """The key of a part in its table: a number for a hook of this end, else the name."""
        own = kind in HOOKS and name.startswith(f"{self.judges:d}") and name[1:].isdecimal()
        return int(name[1:]) if own else name

    # --- things: plain objects of a class that a check or a given cell defines ---

    def number_thing(self, value: object) -> int:
        """A thing's number; a new thing goes out with the next message, with all that its attributes reach."""
        number = self.thing_numbers.get(id(value))
        if number is None:
            number = self.make_number()
            self.thing_numbers[id(value)] = number
            self.things[number] = [value, {}, None]
            self.waiting_things.append(number)
        return number

    def collect_things(self, envelope: Envelope, changed: bool) -> None:
        """Collects new things and, if `changed`, those whose attributes changed: only where a call begins or ends,
        because a search at each of its callbacks, which may be thousands, would be slow."""
        for number, (value, attributes, before) in self.things.copy().items() if changed else ():
            same = have_same_attributes(vars(value), attributes)
            if not same or (before is not None and before != self.encode_attributes(value)):
                self.waiting_things.append(number)
        done = set()
        while self.waiting_things:  # a loop, because a chain of things may be too long for recursion
            number = self.waiting_things.pop()
            if number in done:
                continue
            done.add(number)
            value, held = self.things[number][0], self.encode_attributes(self.things[number][0])
            given = self.is_given(type(value))
            # The learner's code may also change the contents of an attribute: its end compares encodings, too.
            self.things[number][1:] = dict(vars(value)), held if given and not self.judges else None
            envelope.things.append([number, type(value).__name__, given, held])

    def encode_attributes(self, value: object) -> list:
        """Encodes a thing's attributes."""
        with self.tracking(None):
            return [[name, self.encode(each)] for name, each in vars(value).items()]

    def receive_things(self, things: list) -> None:
        for number, name, given, _ in things:
            if number not in self.things:
                kind = self.names.get(name) if given else proxies.make_plain_class(str(name))
                if given and not (isinstance(kind, type) and self.is_given(kind)):
                    raise Refused("a thing of a class that no given cell defines")
                made = object.__new__(kind)
                self.things[number] = [made, {}, None]
                self.thing_numbers[id(made)] = number
        for number, _, given, held in things:
            value = self.things[number][0]
            attributes = vars(value)
            attributes.clear()
            attributes.update({str(each): self.decode(part) for each, part in held if not proxies.is_special(each)})
            self.things[number][1:] = dict(attributes), held if given and not self.judges else None

    def is_given(self, kind: type) -> bool:
        """Whether given cells define a class and all its bases."""
        if (
            self.names.get(kind.__name__) is not kind
            or kind.__name__ not in self.given
            or kind.__module__ != "__main__"
        ):
            return False
        return all(base is object or base.__name__ in self.given for base in kind.__mro__)

    def is_given_thing(self, value: object) -> bool:
        return hasattr(value, "__dict__") and not isinstance(value, type) and self.is_given(type(value))

    def decode_thing(self, number: int) -> object:
        if number not in self.things:
            raise Refused("a thing that is none")
        return self.things[number][0]

    def forget(self) -> None:
        """Forgets, at the end of a check, the objects that the judge handed over."""
        for number in [number for number in self.exported if self.judges]:
            self.release([number])
        self.kept.clear()
        self.things.clear()
        self.thing_numbers.clear()
        self.waiting_things.clear()

    # --- handles ---

    def export(self, value: object) -> tuple[int, bool]:
        """The number of an object of this end, and whether the object is new to the other end."""
        known = self.export_numbers.get(id(value))
        if known is not None:
            return known, False
        number = self.make_number()
        self.exported[number] = value
        self.export_numbers[id(value)] = number
        return number, True

    def encode_object(self, value: object) -> list:
        number = proxies.find_number(value, self)
        if number is not None:
            return ["mine", number]
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and name in self.given and self.names.get(name) is value:
            return ["given", name]
        if self.judges:
            path = find_library_path(value)
            if path:
                return ["library", path]
            bound = next((n for n in self.given if self.names.get(n) is value), None)
            if bound:
                return ["given", bound]
            if isinstance(value, nn.Module) and (path := self.find_class_path(type(value))):
                number, new = self.export(value)
                if not new:
                    return ["built", number, None]
                with self.tracking(None):
                    description = proxies.describe_built(value, path, self)
                self.share_module(number, value)
                return ["built", number, description]
        if id(value) in self.thing_numbers or (self.judges and is_thing(value)) or self.is_given_thing(value):
            return ["thing", self.number_thing(value)]
        number, new = self.export(value)
        if not new:
            return ["object", number, None]
        with self.tracking(None):
            return ["object", number, proxies.describe(value, number, self)]

    def find_class_path(self, kind: type) -> str:
        """The path by which the other end finds a class of a library or a given cell; "" if there is none."""
        if self.names.get(kind.__name__) is kind and kind.__name__ in self.given:
            return kind.__name__
        return name_class(kind) if kind.__module__.startswith(("torch.nn.", "llm40.")) else ""

    def find_class(self, path: str) -> type:
        return find_attribute(path) if ":" in path else self.names[path]

    def decode_mine(self, number: int) -> object:
        return self.find_exported(number)

    def decode_given(self, name: str) -> object:
        if name not in self.given or name not in self.names:
            raise Refused("a name that no given cell defines")
        return self.names[name]

    def decode_object(self, number: int, description: dict | None) -> object:
        known = self.imported.get(number)
        if known is not None:
            return known
        if description is None:
            raise Refused("a handle of nothing")
        with self.tracking(None):
            made = proxies.make_proxy(self, number, description)
        self.keep_import(number, made)
        return made

    def list_operators(self, name: str) -> tuple[str, ...]:
        """The comparisons and the arithmetic that objects of a class of this name may answer themselves."""
        return (*proxies.COMPARING, *proxies.COMPUTING, "__contains__")

    def keep_import(self, number: int, proxy: object) -> None:
        """Keeps a proxy: at the judge's end until the request is over and nothing holds it, at the learner's end until
        the check is over."""
        self.imported[number] = proxy
        if not self.judges:
            self.kept.append(proxy)
            return
        self.tensors.passing[number] = proxy
        weakref.finalize(proxy, self.let_go, number).atexit = False

    # --- records and exceptions ---

    def name_record(self, kind: type) -> str:
        if kind.__name__ in self.given and self.names.get(kind.__name__) is kind:
            return kind.__name__
        return name_class(kind) if kind.__module__.startswith("llm40.") else ""

    def find_record(self, name: str) -> type | None:
        if name.startswith("llm40.") and ":" in name:
            found = find_attribute(name)
        else:
            found = self.names.get(name) if name in self.given else None
        return found if isinstance(found, type) else None

    def make_exception(self, encoded: list) -> BaseException:
        """Makes the exception that the other end raised, of the first of its classes that this end has."""
        names, args, text = encoded
        for place, name in enumerate(names):
            kind = self.names.get(name) if name in self.given else getattr(builtins, str(name), None)
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                continue
            if not issubclass(kind, Exception):
                return type(str(names[0]), (RemoteError,), {})(text)  # SystemExit ends a call, not this process
            if place:  # a class that only the other end has: it keeps its name, and derives from the nearest base here
                kind = type(str(names[0]), (kind,), {})
            try:
                made = kind(*([text] if args is None else [self.decode(arg) for arg in args]))
            except Exception:
                made = RemoteError(f"{names[0]}: {text}")
            return made
        return RemoteError(str(text))


def have_same_attributes(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(value is other[name] for name, value in one.items())


def is_thing(value: object) -> bool:
    """Whether an object consists of its attributes: a check defines its class, with no methods but those of THING."""
    kind = type(value)
    if kind.__module__ != "__main__" or kind.__bases__ != (object,) or not hasattr(value, "__dict__"):
        return False
    return all(name in THING for name, member in vars(kind).items() if callable(member) or hasattr(member, "__get__"))


def find_library_path(value: object) -> str:
    """The path "module:name" by which the other end finds a library's function or class; "" if there is none."""
    if isinstance(value, ModuleType):
        return ""
    if not isinstance(value, (type, FunctionType, BuiltinFunctionType)) and not hasattr(value, "__objclass__"):
        if type(value).__module__ in ("torch._ops", "triton.language.core"):
            pass
        else:
            return ""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", getattr(value, "name", ""))
    for place in (module, "torch", "torch.nn.functional", "math", "operator", "builtins", "triton.language"):
        path = f"{place}:{name}"
        if not place or not name or not (path.startswith(LIBRARIES) or place.startswith(("torch", "triton.language"))):
            continue
        try:
            if find_attribute(path) is value:
                return path
        except (ImportError, AttributeError, ValueError):
            continue
    return ""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
INTERNAL = frozenset(vars(nn.Module()))  # attributes that every module has


def find_part_tables(module: nn.Module) -> dict[str, dict]:
    """The dictionaries in which a module keeps its parts, by kind."""
    hooks = {kind: getattr(module, kind) for kind in HOOKS}
    return {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "module": module._modules,
        "attribute": vars(module),
        **hooks,
    }


def replace_contents(container: object, value: object) -> None:
    """Gives a container the contents of another one of its kind."""
    if type(container) is not type(value):
        return
    if isinstance(container, (list, bytearray)):
        container[:] = value
    elif isinstance(container, (dict, set)):
        container.clear()
        container.update(value)
    elif hasattr(container, "extendleft"):
        container.clear()
        container.extend(value)
    elif hasattr(container, "shape"):
        if container.shape == value.shape:
            container[...] = value
    else:
        for name, new in vars(value).items():
            object.__setattr__(container, name, new)
