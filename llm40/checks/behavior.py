"""What a call does to what it is given, and what it makes of it: inputs, gradients, flags, formats, draws, errors."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from llm40.checks.inputs import generator
from llm40.checks.values import RTOL, close, describe, name, same_bits, sentence

# A module's hooks stand in these attributes; PyTorch offers no other way to ask for them.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# --- Inputs and state stay as they are ---


@contextmanager
def unchanged(*tensors: Tensor, **named: Tensor) -> Iterator[None]:
    """Inside the block these tensors (given by position or by name) keep their values, bit for bit."""
    watched = {f"input {i}": t for i, t in enumerate(tensors)} | named
    before = {label: t.detach().clone() for label, t in watched.items()}
    yield
    for label, t in watched.items():
        if not same_bits(t.detach(), before[label]):
            raise AssertionError(f"{label} was changed in place: work on a copy, the caller still needs it.")


@contextmanager
def kept(*things: Tensor | nn.Module, values: bool = True, **named: Tensor | nn.Module) -> Iterator[None]:
    """Inside the block nothing of these tensors and modules changes that is easily forgotten.

    Of a tensor: its values, `requires_grad` and `.grad`. Of a module: the same of each parameter and buffer, their
    names, whether it and its parts are in training mode, and the number of their hooks. Besides, whether PyTorch
    records gradients, and its default dtype. With `values=False` the values may change (and those of a `.grad` that was
    there before), for what trains or updates a running mean.
    """
    watched = {f"input {i}": thing for i, thing in enumerate(things)} | named
    before = {label: _state(thing, values) for label, thing in watched.items()}
    switches = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:  # put back, or every check after this one would fail too
        left = torch.is_grad_enabled(), torch.get_default_dtype()
        torch.set_grad_enabled(switches[0])
        torch.set_default_dtype(switches[1])
    for label, thing in watched.items():
        _compare_states(label, before[label], _state(thing, values))
    if left[0] != switches[0]:
        raise AssertionError(
            f"torch.is_grad_enabled() is {left[0]} afterwards and was {switches[0]}: "
            "switch it with `with torch.no_grad():`, which puts it back."
        )
    if left[1] != switches[1]:
        raise AssertionError(f"the default dtype is {name(left[1])} afterwards and was {name(switches[1])}.")


def _state(thing: Tensor | nn.Module, values: bool) -> dict[str, Any]:
    """What `kept` compares, by its name in a sentence."""
    if isinstance(thing, Tensor):
        has_grad = thing.is_leaf or thing.retains_grad  # PyTorch warns of whoever asks another tensor
        grad = thing.grad if has_grad else None
        if grad is not None:
            grad = grad.detach().clone() if values else "there"
        state = {"requires_grad": thing.requires_grad, ".grad": grad}
        return state | ({"its values": thing.detach().clone()} if values else {})
    state: dict[str, Any] = {}
    for where, part in thing.named_modules():
        state[f"{where or 'the module'}.training"] = part.training
        state[f"the number of hooks on {where or 'the module'}"] = sum(len(getattr(part, hooks)) for hooks in HOOKS)
    tensors = dict(thing.named_parameters(remove_duplicate=False)) | dict(thing.named_buffers(remove_duplicate=False))
    state["the names of its parameters and buffers"] = sorted(tensors)
    for where, tensor in tensors.items():
        state |= {f"{what} of {where}": value for what, value in _state(tensor, values).items()}
    return state


def _compare_states(label: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, was in before.items():
        now = after.get(what, "gone")
        if isinstance(was, Tensor) and isinstance(now, Tensor):
            if not same_bits(was, now):
                raise AssertionError(f"{label}: {what} changed: put back what the caller still needs.")
        elif isinstance(was, Tensor) or isinstance(now, Tensor) or was != now:
            shown = [f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else v for v in (was, now)]
            raise AssertionError(
                f"{label}: {what} was {shown[0]} before the call and is {shown[1]} after it: leave it as it was."
            )


# --- Formats ---


def keeps_dtype(
    fn: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    rtol: Mapping[torch.dtype, float] | None = None,
    what: str = "the result",
    hint: str = "",
) -> None:
    """`fn` gives floating-point results in the format of its floating-point inputs, for each of `dtypes`.

    Tensors among `inputs` (also in lists and dictionaries; a module is not converted) are cast to each format in turn.
    With `reference`, which computes in float64 what `fn` should give, the results are compared too: a float64 result
    that went through float32, or a half-precision one that was rounded on the way, is told from a right one. `rtol`
    replaces the tolerance (`RTOL`) of a format.
    """
    for dtype in dtypes:
        cast = tree_map(lambda v, to=dtype: v.to(to) if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)
        results = tree_leaves(fn(*cast))
        for result in results:
            if isinstance(result, Tensor) and result.is_floating_point() and result.dtype != dtype:
                raise AssertionError(
                    sentence(
                        f"{what} has dtype {name(result.dtype)} for inputs of {name(dtype)}: it "
                        "should have the format of the inputs",
                        hint,
                    )
                )
        if reference is None:
            continue
        wide = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, cast)
        expected = tree_leaves(reference(*wide))
        if len(results) != len(expected):
            raise AssertionError(sentence(f"{what} has {len(results)} parts, not {len(expected)}", hint))
        for result, target in zip(results, expected, strict=True):
            is_float = isinstance(target, Tensor) and target.is_floating_point()
            close(
                result,
                target,
                what=f"{what} for inputs of {name(dtype)}",
                hint=hint,
                rtol=(RTOL | dict(rtol or {}))[dtype] if is_float else None,
                dtype=dtype if is_float else None,
            )


# --- Draws ---


def uses_generator(draw: Callable[[torch.Generator], Any], *, what: str = "the function", hint: str = "") -> None:
    """`draw(generator)` takes all its random numbers from the generator that it is given, and moves it on.

    `draw` returns tensors, numbers or containers of them; they must hold so many draws that two streams differ (forty
    fair coins or more). It is called six times. Refused are: a generator that is ignored, one that is replaced by
    another of the same seed, draws from PyTorch's, NumPy's or Python's own generator beside it, and a new seed for
    those.
    """

    def drawn(source: torch.Generator) -> list[Any]:
        return [v.detach().clone() if isinstance(v, Tensor) else v for v in tree_leaves(draw(source))]

    def fail(text: str) -> None:
        raise AssertionError(sentence(f"{what} {text}", hint))

    source, before = generator(11), _global_states()
    first = drawn(source)
    if before != _global_states():
        fail("draws from (or seeds) a generator that everybody shares: hand `generator` to every call that draws")
    if torch.equal(source.get_state(), generator(11).get_state()):
        fail("leaves its generator as it was: draw from the one that is given, not from a copy or a new one")
    second = drawn(source)
    if not _alike(first, drawn(generator(11))):
        fail("gives other draws for a generator of the same seed: is everything drawn from `generator`?")
    if _alike(first, second):
        fail("gives the same draws again although its generator has moved on: it starts another one from its seed")
    if _alike(first, drawn(generator(12))):
        fail("gives the same draws for a generator of another seed: is `generator` used?")
    advanced = generator(11)
    drawn(advanced)
    if not _alike(second, drawn(advanced)):
        fail("depends on something else than its generator")


def _global_states() -> list[Any]:
    """The states of the generators that everybody shares: PyTorch's, NumPy's and Python's."""
    _, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate()]


def _alike(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        isinstance(y, Tensor) and same_bits(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


# --- Gradients ---


def gradients(
    fn: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    names: Sequence[str] = (),
    rtol: float | None = None,
    atol: float | None = None,
    hint: str = "",
    mistakes: Mapping[str, Callable[..., Tensor]] | None = None,
) -> None:
    """`fn` and `reference` (computed in float64) have the same gradients in all floating-point inputs.

    Both meet the same random cotangent. `mistakes` maps the name of a usual mistake to a function that makes it; the
    tolerance is that of `close`.
    """
    expected = _gradients(reference, [t.double() if t.is_floating_point() else t for t in inputs])
    actual = _gradients(fn, inputs)
    wrong = {
        mistake: _gradients(f, [t.double() if t.is_floating_point() else t for t in inputs])
        for mistake, f in (mistakes or {}).items()
    }
    position = 0
    for i, t in enumerate(inputs):
        if not t.is_floating_point():
            continue
        label = names[i] if i < len(names) else f"input {i}"
        if actual[position] is None:
            raise AssertionError(sentence(f"no gradient reaches {label}: is part of the computation detached?", hint))
        close(
            actual[position],
            expected[position].to(t.dtype),
            what=f"the gradient of {label}",
            hint=hint,
            rtol=rtol,
            atol=atol,
            mistakes={m: g[position].to(t.dtype) for m, g in wrong.items() if g[position] is not None},
        )
        position += 1


def _gradients(fn: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = fn(*leaves)
    if type(out) not in (Tensor, nn.Parameter):
        raise AssertionError(f"the result is {describe(out)}, it should be a torch.Tensor.")
    if not out.requires_grad:
        raise AssertionError("the result carries no gradient: is it detached, or computed outside PyTorch?")
    cotangent = torch.randn(out.shape, generator=generator(7)).to(out)
    floating = [t for t in leaves if t.is_floating_point()]
    return list(torch.autograd.grad(out, floating, cotangent, allow_unused=True))


# --- Errors ---


def raises(
    error: type[BaseException] | tuple[type[BaseException], ...],
    fn: Callable[..., Any],
    *args: Any,
    because: str = "",
    mentions: str = "",
    **kwargs: Any,
) -> None:
    """Calling `fn` raises `error`, whose message contains `mentions`.

    An empty exercise's NotImplementedError never counts. Nothing is returned, so that a check which ends with this call
    shows no exception under a cell that passed.
    """
    try:
        value = fn(*args, **kwargs)
    except error as raised:
        if isinstance(raised, NotImplementedError):
            raise
        if mentions not in str(raised):
            raise AssertionError(
                f"the message of the {type(raised).__name__}, {str(raised)!r}, does not mention "
                f"{mentions}: say what was wrong."
            ) from None
        return
    kinds = error if isinstance(error, tuple) else (error,)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    returned = "None" if value is None else f"a value of type {type(value).__name__}"
    raise AssertionError(sentence(f"{wanted} should be raised here; the call returned {returned}", because))
