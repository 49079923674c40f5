"""Whether a value is the expected one."""

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
# Relative tolerance by the coarser of the two formats compared.
RTOL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
# The limit itself is computed in float64: 1.01 for 1 is one percent, though 1.01 − 1 is a little more than 0.01 there.
SLACK = 1 + 1e-9
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    tuple: "a tuple",
    dict: "a dictionary",
    set: "a set",
    Tensor: "a torch.Tensor",
    np.ndarray: "a NumPy array",
}

# --- Equal within a tolerance ---


def close(
    actual: Any,
    expected: Any,
    *,
    what: str = "the result",
    hint: str = "",
    rtol: float | None = None,
    atol: float | None = None,
    dtype: torch.dtype | None = None,
    mistakes: Mapping[str, Any] | None = None,
) -> None:
    """`actual` equals `expected` in shape and, elementwise, |actual − expected| ≤ max(atol, rtol·|expected|).

    The larger of the two limits holds, never their sum. rtol follows the coarser format of the two (`RTOL`); atol is
    rtol times the largest finite |expected|, so that zeros and cancellations among larger numbers can be judged: an
    array is compared relative to its largest element, a number relative to itself. `rtol=0.01` takes what is off by
    1.0 percent and refuses 1.1; `rtol=0.01, atol=0` asks for one percent of every element. NaN equals NaN, and an
    infinity equals itself.

    `actual` is of the kind of `expected`:

    | expected | actual may be |
    |---|---|
    | a tensor | a tensor (no subclass); a plain number for a tensor without axes |
    | a NumPy array | a NumPy array, or a number of NumPy's |
    | a number | a number, a tensor or NumPy array without axes |
    | a list of numbers (of lists …) | the same, a tensor or a NumPy array |

    Integers and booleans must be equal; a float is refused where they are expected, and a boolean where a number is.
    With `dtype`, `actual` must be a tensor of that dtype; without it, and without an rtol, a half-precision `actual` is
    refused where `expected` is none: its tolerance would let wrong answers through.

    `mistakes` maps the name of a usual mistake to what it would give. A value that is nearer to a mistake than to
    `expected`, and equals it within the tolerance, is refused and told so, even if it is within the tolerance of
    `expected` too. A mistake that noise can't tell from `expected` is none: they differ by less than `RTOL`, or by
    less than an `atol` that is given.
    """
    target = _expected(expected)
    if target.is_complex():
        raise TypeError("close compares real numbers: hand it torch.view_as_real of both")
    result = _result(actual, expected, target, what, hint, tensor=dtype is not None)
    if dtype is not None and result.dtype != dtype:
        raise AssertionError(sentence(f"{what} has dtype {name(result.dtype)}, it should have {name(dtype)}", hint))
    _same_kind(actual, result, target, what, hint)
    if dtype is None and rtol is None and result.dtype in HALF and target.dtype not in HALF:
        raise AssertionError(
            sentence(
                f"{what} has dtype {name(result.dtype)}, too coarse to be compared with "
                f"{name(target.dtype)}: keep more digits",
                hint,
            )
        )
    if result.shape != target.shape:
        raise AssertionError(sentence(f"{what} has shape {tuple(result.shape)}, not {tuple(target.shape)}", hint))
    target = target.to(result.device)
    limit = _limit(result, target, rtol, atol)
    wrong = _beyond(result, target, limit)
    known = _mistake(result, target, rtol, atol, mistakes or {})
    if not wrong.any() and known is None:
        return
    if wrong.any():
        problem = _difference(result, target, wrong, limit)
    else:  # within the tolerance, and still the mistake
        problem = _difference(result, target, _distance(result, target) > 0, None)
    text = f"{what}: {problem}" + (f". This is what {known} gives" if known else "")
    raise AssertionError(sentence(text, hint))


def number(
    actual: Any,
    expected: float,
    *,
    to: float = 0.01,
    atol: float = 0.0,
    what: str = "the answer",
    hint: str = "",
    mistakes: Mapping[str, float] | None = None,
) -> None:
    """`actual` is a plain number within the share `to` of `expected`: for answers computed by hand or head.

    |actual − expected| ≤ max(atol, to·|expected|); `to=0` asks for `expected` itself, and for a whole number where
    `expected` is one. A boolean, a string, a tensor is refused with a sentence. `mistakes` as in `close`.
    """
    kind(actual, int if to == 0 and atol == 0 and isinstance(expected, int) else float, what=what, hint=hint)
    if to == 0 and atol == 0 and isinstance(expected, int):
        close(int(actual), expected, what=what, hint=hint, mistakes=mistakes)
    else:
        close(
            float(actual),
            float(expected),
            what=what,
            hint=hint,
            rtol=to,
            atol=atol,
            mistakes={known: float(value) for known, value in (mistakes or {}).items()},
        )


def relative_l2(
    actual: Any,
    expected: Tensor,
    limit: float,
    *,
    what: str = "the result",
    hint: str = "",
    mistakes: Mapping[str, Tensor] | None = None,
) -> None:
    """‖actual − expected‖ / ‖expected‖ ≤ `limit`, in float64: for kernels, where single elements round freely.

    `mistakes` as in `close`, with ‖·‖ for the distance.
    """
    result = _result(actual, expected, expected, what, hint)
    if result.shape != expected.shape:
        raise AssertionError(sentence(f"{what} has shape {tuple(result.shape)}, not {tuple(expected.shape)}", hint))
    error = _relative_error(result, expected)
    noise = max(RTOL.get(result.dtype, 0.0), RTOL.get(expected.dtype, 0.0))
    known, nearest = None, min(error, limit)
    for mistake, value in (mistakes or {}).items():
        if value.shape != result.shape or _relative_error(value, expected) <= noise:
            continue
        distance = _relative_error(result, value)
        if distance < nearest:
            known, nearest = mistake, distance
    if error <= limit and known is None:
        return
    finite = torch.isfinite(result)
    where = "" if finite.all() else f"; {int((~finite).sum())} values are not finite, first at {_index(~finite)}"
    where += f". This is what {known} gives" if known else ""
    raise AssertionError(sentence(f"{what}: relative error {error:.1e}, allowed {limit:.1e}{where}", hint))


def drawn(
    sample: Any,
    *,
    mean: float | None = None,
    std: float | None = None,
    kurtosis: float = 3.0,
    sigmas: float = 6.0,
    what: str = "the sample",
    hint: str = "",
    mistakes: Mapping[str, float] | None = None,
) -> None:
    """The mean and the standard deviation of independent draws are what they should be, within `sigmas` errors.

    The standard error of the mean is σ/√n, that of the deviation σ·√((kurtosis − 1)/4n): `kurtosis` is 3 for a normal
    distribution, 1.8 for a uniform one. σ is `std`, or that of the sample where only `mean` is given. With six errors
    and at least 100 draws of a normal or uniform distribution (for rare events: 100 of them), fewer than one right
    sample in a million is refused; of a hundred draws with longer tails about one in a hundred thousand. A share that
    is off by less than six errors passes: draw as many as the mistake needs.

    `mistakes` maps a usual mistake to the deviation (the mean, where no `std` is given) that it would have.
    """
    values = _result(sample, [], torch.zeros(1), what, hint).double().flatten()
    count = values.numel()
    if count < 100:
        raise ValueError(f"{count} draws are too few to judge a distribution by: take 100 or more")
    if not torch.isfinite(values).all():
        raise AssertionError(sentence(f"{what} holds values that are not finite", hint))
    spread = float(values.std()) if std is None else std
    measured = {
        "mean": (float(values.mean()), mean, spread / math.sqrt(count)),
        "standard deviation": (float(values.std()), std, spread * math.sqrt((kurtosis - 1) / (4 * count))),
    }
    for statistic, (found, asked, error) in measured.items():
        if asked is None or abs(found - asked) <= sigmas * error:
            continue
        text = (
            f"{what}: the {statistic} of {count} draws is {_digits(found, asked)[0]}, "
            f"it should be {_digits(found, asked)[1]} ± {sigmas * error:.2g}"
        )
        if (statistic == "mean") == (std is None):
            known = [
                m
                for m, value in (mistakes or {}).items()
                if abs(found - value) < min(sigmas * error, abs(found - asked))
            ]
            text += f". This is what {known[0]} gives" if known else ""
        raise AssertionError(sentence(text, hint))


# --- Kinds ---


def kind(value: Any, wanted: type, *, what: str = "the answer", hint: str = "") -> None:
    """`value` is of a kind: `float` (any real number), `int` (a whole one), `bool`, `str`, `list`, `dict`, Tensor …

    No boolean is a number here, and no subclass of Tensor a tensor, since it could redefine what equality means.
    """
    if wanted in (int, float):
        fine = isinstance(value, numbers.Integral if wanted is int else numbers.Real)
        fine = fine and not isinstance(value, bool | np.bool_)
    elif wanted is Tensor:
        fine = type(value) in (Tensor, torch.nn.Parameter)
    else:
        fine = isinstance(value, wanted)
    if not fine:
        asked = KINDS.get(wanted, f"a {wanted.__name__}")
        raise AssertionError(sentence(f"{what}: {asked} is asked for; yours is {describe(value)}", hint))


def parts(value: Any, *names: str, what: str = "the result", hint: str = "") -> tuple:
    """The parts of a tuple of as many values as there are names: `out, weights = parts(result, "out", "weights")`."""
    count = {2: "a pair", 3: "three values", 4: "four values"}.get(len(names), f"{len(names)} values")
    asked = f"{what}: {count} ({', '.join(names)}) {'is' if len(names) == 2 else 'are'} asked for"
    if not isinstance(value, tuple):
        raise AssertionError(sentence(f"{asked}; yours is {describe(value)}", hint))
    if len(value) != len(names):
        raise AssertionError(sentence(f"{asked}; yours are {len(value)}", hint))
    return tuple(value)


def _expected(expected: Any) -> Tensor:
    if isinstance(expected, Tensor):
        return expected.detach()
    if isinstance(expected, np.ndarray | np.generic):
        return torch.from_numpy(np.array(expected))
    leaves = list(_leaves(expected))
    is_float = any(
        isinstance(leaf, float | np.floating) or (isinstance(leaf, int) and not -(2**63) <= leaf < 2**63)
        for leaf in leaves
    )
    return torch.tensor(expected, dtype=torch.float64 if is_float else None)


def _result(actual: Any, expected: Any, target: Tensor, what: str, hint: str, tensor: bool = False) -> Tensor:
    """The learner's value as a plain tensor without a graph, or a sentence that says what it is instead."""
    if type(actual) in (Tensor, torch.nn.Parameter) and not isinstance(expected, np.ndarray):
        return _real(Tensor.detach(actual), what, hint)  # a subclass could redefine what equality means
    of_numpy = type(actual) is np.ndarray or isinstance(actual, np.generic)
    if isinstance(expected, np.ndarray):
        asked, fine = "a NumPy array", of_numpy
    elif isinstance(expected, Tensor):
        asked = "a torch.Tensor" if target.dim() else "a number"
        fine = isinstance(actual, bool | int | float) and not target.dim()
    elif isinstance(expected, list | tuple):
        asked = "a list of numbers"
        fine = of_numpy or (
            type(actual) in (list, tuple)
            and all(isinstance(leaf, bool | int | float | np.generic) for leaf in _leaves(actual))
        )
    else:
        asked, fine = "a number", of_numpy or isinstance(actual, bool | int | float)
    if tensor:
        asked, fine = "a torch.Tensor", fine and not target.dim()
    if not fine and asked == "a list of numbers" and type(actual) in (list, tuple):
        odd = next(leaf for leaf in _leaves(actual) if not isinstance(leaf, bool | int | float | np.generic))
        raise AssertionError(
            sentence(f"{what}: a list of numbers is asked for; yours holds what is {describe(odd)}", hint)
        )
    if not fine:
        raise AssertionError(sentence(f"{what} is {describe(actual)}, it should be {asked}", hint))
    try:
        value = torch.from_numpy(np.array(actual)) if of_numpy else _expected(actual)
    except (TypeError, ValueError) as error:  # an array of objects, a list whose rows are of unequal length
        raise AssertionError(sentence(f"{what} can't be read as numbers: {error}", hint)) from None
    if not value.numel() and not of_numpy:
        value = value.to(target.dtype)  # an empty list has no kind of its own; its shape is told
    return _real(value.to(target.device), what, hint)


def _real(value: Tensor, what: str, hint: str) -> Tensor:
    if value.is_complex():  # as a real number it would lose its imaginary part
        raise AssertionError(
            sentence(f"{what} has dtype {name(value.dtype)}; real numbers are asked for: take `.real`", hint)
        )
    return value


def _same_kind(actual: Any, result: Tensor, target: Tensor, what: str, hint: str) -> None:
    """No float for a whole number or a truth value, and no truth value for a number."""
    is_bool = result.dtype == torch.bool or (
        type(actual) in (list, tuple) and any(isinstance(leaf, bool | np.bool_) for leaf in _leaves(actual))
    )
    exact = not target.is_floating_point()
    if target.dtype == torch.bool:
        asked = None if result.dtype == torch.bool else "True or False"
    elif is_bool or (
        exact and result.is_floating_point() and not isinstance(actual, int)
    ):  # an int of 64 bits and more
        asked = "whole numbers" if exact else "numbers"
    else:
        asked = None
    if asked:
        own = f"have dtype {name(result.dtype)}" if result.dim() else f"is {actual!r}"
        if result.dim() == 0 and asked != "True or False":
            asked = "a whole number" if exact else "a number"
        verb = "are" if asked.endswith("numbers") else "is"
        raise AssertionError(sentence(f"{what}: {asked} {verb} asked for; yours {own}", hint))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


# --- Distances ---


def _limit(actual: Tensor, expected: Tensor, rtol: float | None, atol: float | None) -> Tensor:
    """What each element may be off by, (…) in float64; zero for integers and booleans."""
    if not actual.dtype.is_floating_point and not expected.dtype.is_floating_point:
        return torch.zeros(expected.shape, dtype=torch.float64, device=expected.device)
    if rtol is None:
        rtol = max(RTOL.get(actual.dtype, 0.0), RTOL.get(expected.dtype, 0.0))
    size = expected.double().abs().nan_to_num(0.0, 0.0, 0.0)
    if atol is None:
        atol = rtol * float(size.max()) if size.numel() else 0.0
    return (rtol * size).clamp_min(atol) * SLACK


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual − expected|, 0 for what is alike (NaN and infinities too), inf where only one of the two is finite."""
    if not actual.dtype.is_floating_point and not expected.dtype.is_floating_point:  # exact beyond 2⁵³
        a, e = actual.long(), expected.long()  # PyTorch does not compare uint16 and wider with signed numbers
        return torch.where(a == e, 0.0, (a.double() - e.double()).abs().clamp_min(1e-300))
    a, e = actual.double(), expected.double()
    alike = (a == e) | (torch.isnan(a) & torch.isnan(e))
    return torch.where(alike, 0.0, (a - e).abs().nan_to_num(math.inf, math.inf, math.inf))


def _beyond(actual: Tensor, expected: Tensor, limit: Tensor) -> Tensor:
    return _distance(actual, expected) > limit


def _mistake(
    actual: Tensor, expected: Tensor, rtol: float | None, atol: float | None, mistakes: Mapping[str, Any]
) -> str | None:
    """The mistake that gives this: within the tolerance of it, and nearer to it than to what is expected."""
    known, nearest = None, _largest(_distance(actual, expected))
    for mistake, value in mistakes.items():
        value = _expected(value).to(actual.device)
        if value.shape != actual.shape:
            continue
        noise = _limit(actual, expected, None, None).clamp_min(atol or 0.0)
        if not _beyond(value, expected, noise).any():
            continue
        distance = _distance(actual, value)
        if not (distance > _limit(actual, value, rtol, atol)).any() and _largest(distance) < nearest:
            known, nearest = mistake, _largest(distance)
    return known


def _largest(distance: Tensor) -> float:
    return float(distance.max()) if distance.numel() else 0.0


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and in every value, NaN included."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    a, e = actual.detach().double(), expected.detach().double().to(actual.device)
    error = float(torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e).clamp_min(1e-300))
    return math.inf if math.isnan(error) else error


# --- Sentences ---


def _difference(actual: Tensor, expected: Tensor, wrong: Tensor, limit: Tensor | None) -> str:
    """A description of the first place where they differ, with the limit there if it was passed."""
    index = _index(wrong)
    place = f" at index {index}" if index else ""
    found, asked = _digits(actual[index].item(), expected[index].item())
    text = f"expected {asked}{place}, yours is {found}"
    error = _distance(actual, expected)[wrong]
    finite = error[torch.isfinite(error)]
    allowed = 0.0 if limit is None else float(limit[index])
    if wrong.numel() > 1:
        text += f" ({int(wrong.sum())} of {wrong.numel()} values differ"
        text += f", by up to {float(finite.max()):.2g}" if finite.numel() and expected.is_floating_point() else ""
        text += ")"
    elif finite.numel() and allowed:
        text += f" (off by {float(error):.2g}, allowed is {allowed:.2g})"
    return text


def _digits(*values: Any) -> list[str]:
    """The numbers in as many digits as it takes for different ones to look different; six are the fewest."""
    if not any(isinstance(value, float) for value in values):
        return [str(value) for value in values]
    for digits in range(6, 18):
        texts = [f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def _index(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def name(dtype: torch.dtype) -> str:
    """float32, without torch. before it."""
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """What somebody's value is, in the words of a sentence; short, and without asking it for much."""
    if value is None:
        return "None (is there a return?)"
    if value is NotImplemented or value is Ellipsis:
        return repr(value)
    if type(value) in (bool, int, float, str):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}…"
    return f"of type {type(value).__name__}"


def sentence(text: str, hint: str) -> str:
    return f"{text}. {hint}" if hint else f"{text}."
