"""Tensors at both ends of a link: their states in messages, their changes, and the tensors that their graphs reach."""

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, inference_mode, nn, set_grad_enabled  # imported by name, because checks may watch torch's
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from autograder.judge.values import Refused

COMPARED = 4 * 2**20  # bytes: a larger tensor counts as unchanged as long as PyTorch's version number of it is the same
LARGEST = 2**31  # bytes of a tensor
# References to a tensor that only Mirrors holds, while it counts them: a closure, a local name, getrefcount's argument.
HELD_HERE, STORAGE_HELD_HERE = 3, 2


@contextmanager
def unobserved() -> Iterator[None]:
    """Inside the block, the caller's PyTorch modes see nothing: the link's own work is no part of a check."""
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        yield


def read_modes() -> list:
    """The caller's modes, which the other end takes over."""
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        str(torch.get_autocast_dtype("cpu")).removeprefix("torch."),
        str(torch.get_default_dtype()).removeprefix("torch."),
        find_default_device(),
    ]


def read_switches() -> list:
    """The modes that a call can change for good: they belong to the process, not to a block."""
    return [torch.is_grad_enabled(), str(torch.get_default_dtype()).removeprefix("torch.")]


def set_switches(wanted: list) -> None:
    gradients, default = wanted
    set_grad_enabled(bool(gradients))
    torch.set_default_dtype(find_dtype(default))


def find_default_device() -> str:
    """The device of a `with torch.device(…)` or torch.set_default_device; "" where there is none.

    torch.get_default_device makes a tensor to find out, and inside `unobserved` that tensor ignores the mode.
    """
    inside = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return str(inside[-1].device) if inside else ""


@contextmanager
def observed(wanted: list | None = None) -> Iterator[None]:
    """The opposite of `unobserved`, around a requested call; sets the modes of the end that asked."""
    with ExitStack() as stack:
        stack.enter_context(torch._C._EnableTorchFunction())
        if wanted:
            gradients, inference, autocast, autocast_dtype, default, device = wanted
            if device != find_default_device():
                stack.enter_context(torch.device(device or "cpu"))
            if default != str(torch.get_default_dtype()).removeprefix("torch."):
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(getattr(torch, default))
            if inference:
                stack.enter_context(inference_mode())
            if gradients != torch.is_grad_enabled():
                stack.enter_context(set_grad_enabled(gradients))
            if autocast:
                stack.enter_context(torch.autocast("cpu", dtype=getattr(torch, autocast_dtype)))
        yield


def read_random_state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


def set_random_state(state: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def read_generator_state(generator: torch.Generator) -> list:
    return [str(generator.device), generator.get_state().numpy().tobytes()]


def set_generator_state(generator: torch.Generator, state: list) -> None:
    generator.set_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


# --- a tensor's state -----------------------------------------------------------------------------------------


def read_elements(t: Tensor) -> bytes:
    """A tensor's elements in their order, without gaps."""
    if not t.numel() or t.device.type == "meta":
        return b""
    t = t.detach().resolve_conj().resolve_neg()
    flat = t.cpu().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def is_free_of_overlap(t: Tensor) -> bool:
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride < reach:
            return False
        reach = stride * size
    return True


def describe(t: Tensor, whole: bool, grad: object, moves: int) -> list:
    """[dtype, shape, strides, device, elements, requires_grad, parameter, gradient, offset, whole storage, moves]."""
    storage = b""
    if whole:
        storage = torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()).numpy().tobytes()
    return [
        str(t.dtype).removeprefix("torch."),
        list(t.shape),
        list(t.stride()),
        str(t.device),
        b"" if whole else read_elements(t),
        t.requires_grad,
        isinstance(t, nn.Parameter),
        grad,
        t.storage_offset() if whole else -1,
        storage,
        moves,
    ]


def find_dtype(name: object) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise Refused("a tensor of no dtype")
    return dtype


def build(state: list) -> Tensor:
    """A tensor of this state, without a graph. Its strides are kept; gaps between its elements are NaN."""
    name, shape, strides, device, raw, _, _, _, offset, storage, _ = state
    dtype = find_dtype(name)
    if offset >= 0:
        return share_storage(torch.frombuffer(bytearray(storage), dtype=torch.uint8), dtype, shape, strides, offset)
    size = math.prod(shape)
    if device == "meta":
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if size * dtype.itemsize != len(raw):
        raise Refused("a tensor with other elements than its shape says")
    if not size:
        return torch.empty_strided(shape, strides, dtype=dtype)
    packed = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    flat = share_storage(packed, dtype, shape, torch.empty(shape, device="meta").stride())
    if list(flat.stride()) == strides or size <= 1:
        return share_storage(packed, dtype, shape, strides).to(device)
    spread = [0 if stride == 0 else slice(None) for stride in strides]
    narrow = flat[tuple(slice(0, 1) if s == 0 else slice(None) for s in spread)] if 0 in strides else flat
    span = 1 + sum(stride * (n - 1) for stride, n in zip(strides, narrow.shape, strict=True))
    if span * dtype.itemsize > LARGEST or any(stride < 0 for stride in strides):
        raise Refused("a tensor with strides too large")
    base = torch.empty(span, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        base.view(torch.uint8).fill_(0xFF)  # NaN in every format
    place = base.as_strided(narrow.shape, strides)
    if not is_free_of_overlap(place):
        return flat.to(device)
    place.copy_(narrow)
    return share_storage(base, dtype, shape, strides).to(device)


def share_storage(t: Tensor, dtype: torch.dtype, shape: list, strides: list, offset: int = 0) -> Tensor:
    """A tensor over the storage of another one; no view, because a view keeps its base alive."""
    return torch.empty(0, dtype=dtype).set_(t.untyped_storage(), offset, shape, strides)


def overwrite(t: Tensor, state: list, moved: bool) -> None:
    """Gives a tensor another state: in place where that is possible, in a new storage if it has `moved`."""
    made = build(state)
    if state[8] >= 0 and t.untyped_storage().nbytes() == len(state[9]):
        t.untyped_storage().copy_(made.untyped_storage())
    elif not moved and t.shape == made.shape and t.dtype == made.dtype and is_free_of_overlap(t):
        t.data.copy_(made)
    else:
        t.data = made
    if t.is_leaf and t.requires_grad != state[5] and (made.is_floating_point() or made.is_complex()):
        t.requires_grad_(state[5])


# --- mirrors --------------------------------------------------------------------------------------------------


@dataclass
class Mirror:
    find: Callable[[], Tensor | None]
    state: list | None  # as last exchanged
    signature: tuple = ()
    graph: object = None  # the grad_fn at registration; a tensor with another one is another result
    linked: bool = False  # whether it is the result of a call over the link: its graph continues at the other end
    moves: int = 0  # how often it got another storage: tensors that share the old one no longer see its changes
    copy: Tensor | None = None  # its elements as last exchanged: faster to compare than a state

    def note(self, t: Tensor, signature: tuple) -> None:
        self.signature = signature
        compared = t.numel() * t.element_size() <= COMPARED and t.device.type != "meta"
        self.copy = t.detach().clone() if compared else None

    def is_unchanged(self, t: Tensor) -> bool:
        """Whether a tensor of the same signature has the same elements: writes to t.data leave the signature alone."""
        if self.copy is None:  # too large
            return True
        whole = self.state is not None and self.state[8] >= 0
        return not whole and t.dtype == self.copy.dtype and torch.equal(t.detach(), self.copy)


class Mirrors:
    """The tensors that both ends have. The judge's end holds them weakly, and tells the other end when one is gone.

    A tensor may go at any time, even while a loop reads `by_number`: loops therefore read a copy. (`list(items())` is
    not safe: Python may collect garbage while it makes the pairs.)
    """

    def __init__(self, link, weak: bool):
        self.link, self.weak = link, weak
        self.by_number: dict[int, Mirror] = {}
        self.numbers: dict[int, int] = {}
        self.outgoing: list = []  # [number, state] for the next message
        self.whole = None  # a predicate: whether a tensor's whole storage passes
        self.held: dict[int, list] = {}  # states of results that are about to get their graph
        self.passing: dict[int, object] = {}  # keeps alive everything exchanged since the outermost request began
        # Tensors that the other end has changed since the open call began, each with what it was then.
        self.rewritten: list[tuple[Tensor, Tensor]] = []
        self.leaves: dict[int, Tensor] = {}  # tensors that gather gradients, held until the check ends

    def find(self, number: int) -> Tensor:
        mirror = self.by_number.get(number)
        found = mirror.find() if mirror else None
        if found is None:
            raise Refused(f"a tensor of nothing {number}")
        return found

    def number_tensor(self, t: Tensor) -> int:
        """A tensor's number; a new one goes out with the next message."""
        known = self.numbers.get(id(t))
        if known is not None and (mirror := self.by_number[known]).find() is t and t.grad_fn is mirror.graph:
            return known
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise Refused(
                "what is a check's works on values, not on the tensors of this transform of torch.func: use autograd"
            )
        if t.layout != torch.strided or t.is_quantized:
            raise Refused(f"a {t.layout} tensor cannot be handed over")
        if nn.parameter.is_lazy(t):
            raise Refused("a lazy layer has no weights before its first call: give it its sizes")
        number = self.link.make_number()
        self.register(number, t)
        if self.weak:
            self.passing[number] = t
        mirror = self.by_number[number]
        mirror.state = self.read_state(t)
        mirror.note(t, self.sign(t))
        self.outgoing.append([number, mirror.state])
        return number

    def read_state(self, t: Tensor, moves: int = 0) -> list:
        grad = None
        if t.is_leaf and t.grad is not None:
            grad = self.link.encode(t.grad)
        return describe(t, bool(self.whole and self.whole(t)), grad, moves)

    def sign(self, t: Tensor) -> tuple:
        grad = t.grad if t.is_leaf else None
        version = -1 if t.is_inference() else t._version
        # The gradient's number, not its address: a later gradient may have the same address.
        return version, t.data_ptr(), t.requires_grad, self.numbers.get(id(grad), -1) if grad is not None else 0

    def register(self, number: int, t: Tensor, state: list | None = None) -> None:
        find = weakref.ref(t) if self.weak else lambda: t
        self.by_number[number] = Mirror(find, state, graph=t.grad_fn)
        self.numbers[id(t)] = number
        if self.weak:
            weakref.finalize(t, self._forget, number, id(t)).atexit = False

    def _forget(self, number: int, place: int) -> None:
        if self.numbers.get(place) == number:
            del self.numbers[place]
        if self.by_number.pop(number, None) is not None:
            self.link.released.append(number)

    def release(self, number: int) -> bool:
        self.passing.pop(number, None)
        mirror = self.by_number.pop(number, None)
        if mirror is None:
            return False
        t = mirror.find()
        if t is not None and self.numbers.get(id(t)) == number:
            del self.numbers[id(t)]
        return True

    def collect(self) -> None:
        """Collects the states of mirrors that changed since the last message."""
        going = {number for number, _ in self.outgoing}
        for number, mirror in self.by_number.copy().items():
            t = mirror.find()
            if t is None or number in going:
                continue
            signature = self.sign(t)
            if signature == mirror.signature and mirror.is_unchanged(t):
                continue
            mirror.moves += signature[1] != mirror.signature[1]
            state = self.read_state(t, mirror.moves)
            mirror.note(t, self.sign(t))
            if state != mirror.state:
                mirror.state = state
                self.outgoing.append([number, state])

    def receive(self, states: list, held: Iterable[int]) -> dict[int, Tensor]:
        """Applies the states that the other end sent; returns the new tensors by number.

        `held` are the numbers of results, which get a graph before they are registered.
        """
        fresh, held = {}, set(held)
        for number, state in states:
            if len(state) != 11:
                raise Refused("a tensor of no state")
            if self.weak and state[8] >= 0:
                raise Refused("a whole storage: only the judge's end sends one")
            mirror = self.by_number.get(number)
            t = mirror.find() if mirror else None
            if t is not None:
                if mirror.state != state:
                    known = mirror.state
                    changed = known is not None and [*known[:2], known[4]] != [*state[:2], state[4]]
                    if self.weak and changed and not any(t is one for one, _ in self.rewritten):
                        self.rewritten.append((t, t.detach().clone()))
                    overwrite(t, state, moved=mirror.moves != state[10])
                mirror.state, mirror.moves = state, state[10]
                continue
            t = build(state)
            if number in held:
                self.held[number] = state
            elif state[6]:
                t = nn.Parameter(t, requires_grad=state[5])
            elif state[5] and (t.is_floating_point() or t.is_complex()):
                t.requires_grad_(True)
            fresh[number] = t
            if number not in held:
                if self.weak:
                    self.passing[number] = t
                self.register(number, t, state)
        for number, state in states:
            mirror = self.by_number.get(number)
            if mirror is None:
                continue
            t = mirror.find()
            if t.is_leaf and (t.requires_grad or state[7] is not None or t.grad is not None):
                t.grad = self.link.decode(state[7])
            mirror.note(t, self.sign(t))
        return fresh

    def drop_unheld(self) -> list[int]:
        """Forgets the tensors that only this table holds and whose storage nothing else uses; returns their numbers."""
        dropped = []
        for number, mirror in self.by_number.copy().items():
            t = mirror.find()
            if (
                sys.getrefcount(t) > HELD_HERE
                or torch._C._storage_Use_Count(t.untyped_storage()._cdata) > STORAGE_HELD_HERE
            ):
                continue
            del self.by_number[number]
            if self.numbers.get(id(t)) == number:  # a tensor whose graph changed has a second, newer number
                del self.numbers[id(t)]
            dropped.append(number)
        return dropped

    def find_reached(self, outputs: list[Tensor], without: set[int]) -> list[Tensor]:
        """The shared tensors that the graph of these outputs reaches, and the leaves of this end that it reaches.

        A shared tensor that is no result of a call over the link (an argument of a callback) has no graph at the other
        end: the search continues behind it. It is returned only by the judge's end, because a learner's hook may ask
        for its gradient.
        """
        known = {}
        for number, mirror in self.by_number.copy().items():
            t = mirror.find()
            if t is not None and t.grad_fn is not None and t.grad_fn is mirror.graph and number not in without:
                known[t.grad_fn, t.output_nr] = t, mirror.linked
        found: dict[int, Tensor] = {}
        waiting, seen = [(t.grad_fn, t.output_nr) for t in outputs], set()
        while waiting:
            place = waiting.pop()
            met, linked = known.get(place, (None, False))
            if met is not None and (linked or self.weak):
                found[id(met)] = met
            if place in seen:
                continue
            seen.add(place)
            node = place[0]
            if linked:
                if self.weak:
                    waiting += find_places_behind(node, known)
                continue
            if hasattr(node, "variable"):
                found[id(node.variable)] = node.variable
            else:
                waiting += [following for following in node.next_functions if following[0] is not None]
        return list(found.values())


def find_places_behind(node: object, known: dict) -> list[tuple]:
    """The places where a graph continues at the judge's end behind the result of a call. Of an argument with a graph
    here (a hook's output) the other end has only the value; leaves and results of its own it knows completely."""
    places = []
    for place in node.next_functions:
        if place[0] is None or hasattr(place[0], "variable"):
            continue
        met, linked = known.get(place, (None, False))
        if met is None:
            places.append(place)
        elif not linked:
            places += [following for following in place[0].next_functions if following[0] is not None]
    return places


# --- storages, for kernels ------------------------------------------------------------------------------------


def place_in_storage(t: Tensor, storages: dict[int, list]) -> list:
    """Encodes a tensor as a place in one of the storages, which are numbered in their order."""
    storage = t.untyped_storage()
    place, _ = storages.setdefault(storage._cdata, [len(storages), storage])
    return ["placed", place, str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride()), t.storage_offset()]


def read_storage(storage: torch.UntypedStorage) -> bytes:
    return torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tobytes()


def make_storage(raw: bytes) -> torch.UntypedStorage:
    if not raw:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage()


def fill_storage(storage: torch.UntypedStorage, raw: bytes) -> None:
    if storage.nbytes() != len(raw):
        raise Refused("a storage of another size")
    storage.copy_(make_storage(raw))


def make_placed(encoded: list, storages: list[torch.UntypedStorage]) -> Tensor:
    _, place, dtype, shape, strides, offset = encoded
    return torch.tensor([], dtype=find_dtype(dtype)).set_(storages[place], offset, shape, strides)
