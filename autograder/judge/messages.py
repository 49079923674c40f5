"""The messages between the two ends of a link: each is a dataclass, sent as its name and its fields.

Values inside are encoded (values.py). One Reply answers each request; before it, the other end may send requests of its
own (a callback), which are answered first.
"""

from dataclasses import dataclass, field, fields

import msgpack

LIMIT = 2**31  # bytes of a message


class Malformed(ValueError):
    """The other end sent bytes that are no message."""


@dataclass
class Call:
    """Call `target`: ["name", n], ["object", number] or ["method", number, n]."""

    target: list
    args: list
    kwargs: list
    around: list = field(default_factory=list)  # measurements to take meanwhile: [where, name, args, kwargs]
    modes: list = field(default_factory=list)  # as tensors.read_modes returns them


@dataclass
class Gradients:
    """Pull cotangents back through a call: one for each of its outputs, None where an output has none."""

    call: int
    cotangents: list
    create_graph: bool = False
    around: list = field(default_factory=list)


@dataclass
class Launch:
    """Launch a Triton kernel. Its tensors travel with their whole storages, and changed storages come back. `places`
    are the storages' addresses in the judge's process, by which traffic is reported; a kernel may touch no memory but
    that of the tensor `only`, where there is one."""

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
    """Describe the values, functions, classes and kernels of these names. `given` are the names of given cells."""

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
    """Register a hook of the asking end on a module: `kind` is the method to call, such as register_forward_hook."""

    module: int
    kind: str
    hook: object
    options: list


@dataclass
class Fork:
    """Make a twin of this process for one rank of a launch. The socket of the twin's link follows the reply."""

    rank: int
    ranks: int


@dataclass
class Reach:
    """Connect to the learner's server at a UNIX socket each time the judge asks. The socket to ask on follows the
    reply."""

    path: str


@dataclass
class Done:
    """The check is over: stop serving."""


@dataclass
class Reply:
    """The answer to a request: a value, or an exception as [class names, arguments, text].

    `outputs` are the tensors of the value that carry gradients, `depends` the tensors that receive them; `changed`
    holds [place, contents] of each container among the arguments that the call changed in place; `seen` holds the
    result of each measurement; `switches` are PyTorch's global switches, if the call changed them.
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
    """A message, and the changes at the sender since its last one."""

    message: list
    tensors: list = field(default_factory=list)  # [number, state], new or changed
    generators: list = field(default_factory=list)  # [number, state]
    modules: list = field(default_factory=list)  # [number, kind, name, value]
    things: list = field(default_factory=list)  # [number, class name, whether a given cell defines it, attributes]
    released: list = field(default_factory=list)  # numbers that the sender no longer needs
    random: bytes | None = None  # PyTorch's global random state, if it changed


REQUESTS = (Call, Gradients, Launch, Describe, Attribute, Hook, Fork, Reach, Done)
KINDS = {kind.__name__: kind for kind in (*REQUESTS, Reply, Envelope)}


def pack(message: object) -> bytes:
    return msgpack.packb(list_fields(message), unicode_errors="surrogatepass")


def list_fields(message: object) -> list:
    return [type(message).__name__, *(getattr(message, f.name) for f in fields(message))]


def unpack(raw: bytes) -> Envelope:
    try:
        envelope = make_message(msgpack.unpackb(raw, strict_map_key=False, unicode_errors="surrogatepass"))
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"no message: {error}") from error
    if not isinstance(envelope, Envelope):
        raise Malformed("no envelope")
    return envelope


def make_message(parts: object) -> object:
    if not isinstance(parts, list) or not parts or parts[0] not in KINDS:
        raise Malformed("a message of no known kind")
    kind = KINDS[parts[0]]
    if len(parts) - 1 != len(fields(kind)):
        raise Malformed(f"a {parts[0]} of {len(parts) - 1} fields")
    return kind(*parts[1:])
