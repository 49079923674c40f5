"""What the two ends of a link say to each other: each message a dataclass, sent as its name and its fields.

Values inside are encoded (values.py). A request is answered by one Reply; between the two, the other end may send
requests of its own (a callback), which are answered first.
"""

from dataclasses import dataclass, field, fields

import msgpack

LIMIT = 2**31  # bytes of a message


class Malformed(ValueError):
    """The other end sent what is no message."""


@dataclass
class Call:
    """Call what `target` names: ["name", n], ["object", number], ["method", number, n]."""

    target: list
    args: list
    kwargs: list
    around: list = field(default_factory=list)  # measurements to take meanwhile: [where, name, args, kwargs]
    modes: list = field(default_factory=list)  # as tensors.modes gives them


@dataclass
class Gradients:
    """Pull cotangents back through a call: one for each of its outputs, None where there is none."""

    call: int
    cotangents: list
    create_graph: bool = False
    around: list = field(default_factory=list)


@dataclass
class Launch:
    """Launch a Triton kernel: tensors travel with their whole storages and come back. `places` are the storages'
    addresses here, in which addresses that are counted are told; `only` is the one tensor whose memory is touched."""

    target: list
    grid: list
    args: list
    kwargs: list
    storages: list
    places: list
    only: list | None = None
    around: list = field(default_factory=list)


@dataclass
class Describe:
    """What is bound to these names: values, functions, classes, kernels. `given` are the names of given cells."""

    names: list
    given: list = field(default_factory=list)


@dataclass
class Attribute:
    """Get, set or delete an attribute: `action` is "get", "set" or "delete"."""

    target: list
    name: str
    action: str = "get"
    value: object = None
    around: list = field(default_factory=list)


@dataclass
class Hook:
    """Register a hook of the asking end on a module: `kind` is register_forward_hook or one of its like."""

    module: int
    kind: str
    hook: object
    options: list


@dataclass
class Fork:
    """Make a twin of this process for one rank of a launch. The socket of its own link comes after the reply."""

    rank: int
    ranks: int


@dataclass
class Reach:
    """Connect to a server of the learner's, at a UNIX socket, whenever asked. The socket to ask on comes after the
    reply."""

    path: str


@dataclass
class Done:
    """The check is over: stop serving."""


@dataclass
class Reply:
    """The answer to a request: a value, or an exception as [class names, arguments, text].

    `outputs` are the tensors of the value that carry gradients, `depends` those that the gradients go to; `changed`
    are the containers among the arguments that were changed in place, by their place; `seen` is what each
    measurement saw; `switches` are PyTorch's, where a call left them otherwise than it found them.
    """

    value: object = None
    error: list | None = None
    call: int = 0
    outputs: list = field(default_factory=list)
    depends: list = field(default_factory=list)
    changed: list = field(default_factory=list)
    seen: list = field(default_factory=list)
    storages: list = field(default_factory=list)
    switches: list = field(default_factory=list)


@dataclass
class Envelope:
    """A message, and what changed at the sender since its last one."""

    message: list
    tensors: list = field(default_factory=list)  # [number, state], new or changed
    generators: list = field(default_factory=list)  # [number, state]
    modules: list = field(default_factory=list)  # [number, kind, name, value]
    things: list = field(default_factory=list)  # [number, class name, [[attribute, value]…]]
    released: list = field(default_factory=list)  # numbers the sender needs no longer
    random: bytes | None = None  # PyTorch's own random state, where it moved


REQUESTS = (Call, Gradients, Launch, Describe, Attribute, Hook, Fork, Reach, Done)
KINDS = {kind.__name__: kind for kind in (*REQUESTS, Reply, Envelope)}


def pack(message: object) -> bytes:
    return msgpack.packb(as_list(message), unicode_errors="surrogatepass")


def as_list(message: object) -> list:
    return [type(message).__name__, *(getattr(message, f.name) for f in fields(message))]


def unpack(raw: bytes) -> Envelope:
    try:
        envelope = from_list(msgpack.unpackb(raw, strict_map_key=False, unicode_errors="surrogatepass"))
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"no message: {error}") from error
    if not isinstance(envelope, Envelope):
        raise Malformed("no envelope")
    return envelope


def from_list(parts: object) -> object:
    if not isinstance(parts, list) or not parts or parts[0] not in KINDS:
        raise Malformed("a message of no known kind")
    kind = KINDS[parts[0]]
    if len(parts) - 1 != len(fields(kind)):
        raise Malformed(f"a {parts[0]} of {len(parts) - 1} fields")
    return kind(*parts[1:])
