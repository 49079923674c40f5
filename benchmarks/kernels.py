"""What the benchmarks of the lessons' kernels share: a lesson's answers, fair timing, rows with goals, a command line.

A lesson's benchmark is a module named as its lesson, with

    cases(lesson, published)    shapes, each with the functions to time: ours and its peers
    GOALS                       what ours is held against
    DTYPE, SMALL                the number format; the module's constants as a rehearsal without a GPU has them

`python -m benchmarks.29_flash_attention` times all its shapes and writes benchmarks/results/29_flash_attention.json;
`python -m benchmarks.gpu` times the published ones of every lesson.
"""

import argparse
import importlib
import linecache
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.rows import RESULTS, describe, lesson_path, write
from llm40 import profile

QUANTILES = (0.5, 0.2, 0.8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# --- A lesson's answers -----------------------------------------------------------------------------------------------


def benchmark(number: str) -> ModuleType:
    """The benchmark of a lesson: a module whose name no import statement can say."""
    return importlib.import_module(f"benchmarks.{lesson_path(number).stem}")


def reference(number: str) -> SimpleNamespace:
    """What a lesson's plain and exercise cells define, the answers in place. No Jupytext: a bare machine has none."""
    names: dict[str, Any] = {"__name__": f"lesson_{number}"}
    for i, cell in enumerate(re.split(r"^# %%", lesson_path(number).read_text(encoding="utf-8"), flags=re.M)[1:]):
        marks, _, source = cell.partition("\n")
        if "[markdown]" in marks or "check=" in marks or '"experiment"' in marks:
            continue
        where = f"<lesson {number}, cell {i}>"
        # Triton reads a kernel's text through inspect, and so through this cache.
        linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
        exec(compile(source, where, "exec"), names)
    return SimpleNamespace(**names)


# --- What is timed ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """Ours at least so many times as fast as a peer, in the cases whose name begins so; of bandwidth, for a copy."""

    case: str
    peer: str
    at_least: float
    stretch: float | None = None


@dataclass
class Case:
    """One shape. `functions` are timed in turn; `work` is what each does: bytes moved or FLOPs, "" for all others.

    `same` says that all functions return the same tensors, and they are compared before any is timed; a copy is not.
    `settings` are put beside the figures.
    """

    name: str
    ours: str
    functions: dict[str, Callable[[], Any]]
    work: dict[str, float]
    unit: str  # "TB/s" or "TFLOP/s"
    same: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


def need_gpu() -> None:
    if profile.name != "gpu" or profile.interpret:
        sys.exit("This measures a GPU and PyTorch sees none here (or TRITON_INTERPRET=1 is set).")


def imported(module: str, name: str) -> Any:
    """A peer from a library that may be missing here, or may not fit this Triton; None then, and the log says why."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        print(f"{module}.{name} is no peer here: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def layout_of(output: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the output's own layout: what autograd would send, and what no kernel has to copy first."""
    return torch.empty_like(output).copy_(gradient)


def backward_of(outputs: Any, leaves: list[Tensor], gradients: Any) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


@contextmanager
def strict_compiler() -> Iterator[None]:
    """torch.compile as new, and an error where it would silently run something slower.

    Dynamo compiles one function for at most eight shapes and runs the ninth uncompiled, which nobody sees; and
    flex_attention says in a warning that it runs unfused.
    """
    import torch._dynamo

    torch._dynamo.reset()
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    getattr(flex, "_WARNINGS_SHOWN", set()).clear()  # it warns once a process
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unfused implementation.*")
        yield


def tensors_of(result: Any) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    return [t.detach() for t in found]


def disagreement(results: dict[str, Any], ours: str) -> dict[str, float]:
    """Relative L2 distance of each peer's tensors from ours, the largest of them."""
    mine = tensors_of(results[ours])
    return {
        name: max(
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(tensors_of(r), mine, strict=True)
        )
        for name, r in results.items()
        if name not in (ours, "copy")
    }


def interleave(functions: dict[str, Callable[[], Any]], milliseconds: float = 500) -> tuple[dict, dict | None]:
    """({name: [median, 20 % and 80 % quantile in ms]}, the clocks in the middle): peers take turns, warmed up.

    So a clock that sinks sinks for all. Before each call the L2 cache is flushed, and a pause on the device lets Python
    run ahead: what is measured is the GPU.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    marks: dict[str, list] = {name: [] for name in functions}

    def once(name: str) -> None:
        flush.zero_()
        torch.cuda._sleep(200_000)  # cycles: 0.1 ms
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        functions[name]()
        end.record()
        marks[name].append((begin, end))

    for _ in range(3):
        for name in functions:
            once(name)
    torch.cuda.synchronize()
    turn = sum(begin.elapsed_time(end) for begin, end in (marks[name][-1] for name in functions))
    for found in marks.values():
        found.clear()
    for _ in range(min(200, max(10, int(milliseconds / turn)))):
        for name in functions:
            once(name)
    seen = clocks()  # while the device still works
    torch.cuda.synchronize()
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    times = {name: torch.tensor([a.elapsed_time(b) for a, b in found]).double() for name, found in marks.items()}
    return {name: [round(q, 5) for q in torch.quantile(ms, at).tolist()] for name, ms in times.items()}, seen


def attempt(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Each function once: how far the peers' results are from ours, and what this machine lacks. Ours must run."""
    missing, results = {}, {}
    for name, function in case.functions.items():
        try:
            results[name] = function()
            profile.synchronize()
        except Exception as error:  # a back end that this build or GPU lacks, too little memory, an unfused peer
            if name == case.ours:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    distance = disagreement(results, case.ours) if case.same else {}
    wrong = {name: value for name, value in distance.items() if not value < 0.02}
    if wrong:
        raise AssertionError(f"{case.name}: results differ from ours by {wrong} (relative L2; 0.02 is allowed)")
    return distance, missing


def measure(case: Case, goals: list[Goal]) -> dict:
    """The row of one case. What a peer said that does not run here stands in `missing`."""
    distance, missing = attempt(case)
    functions = {name: function for name, function in case.functions.items() if name not in missing}
    times, seen = interleave(functions)
    speed = {name: case.work.get(name, case.work.get("")) / ms[0] / 1e9 for name, ms in times.items()}
    ratios = {name: round(speed[case.ours] / value, 3) for name, value in speed.items() if name != case.ours}
    return {
        "key": case.name,
        "ours": case.ours,
        "unit": case.unit,
        "ms": times,
        "speed": {name: float(f"{value:.4g}") for name, value in speed.items()},
        "ratios": ratios,
        "goals": [judge(goal, ratios) for goal in goals if case.name.startswith(goal.case)],
        "distances": distance,
        "missing": missing,
        "clocks": seen,
        **case.settings,
    }


def judge(goal: Goal, ratios: dict[str, float]) -> dict:
    ratio = ratios.get(goal.peer)
    return {"peer": goal.peer, "at_least": goal.at_least, "ratio": ratio, "met": ratio and ratio >= goal.at_least} | (
        {"stretch": goal.stretch} if goal.stretch else {}
    )


def time_lesson(number: str, published: bool, known: set[str] = frozenset()) -> Iterator[dict]:
    """A row for each case of a lesson's benchmark, but for those whose rows are known."""
    module, lesson = benchmark(number), reference(number)
    cases = module.cases(lesson, published)
    while True:
        with strict_compiler():  # also while a case is made: backward passes are compiled there
            case = next(cases, None)
            if case is None:
                return
            if case.name not in known:
                try:
                    row = measure(case, module.GOALS)
                except Exception as error:  # the next case may do
                    row = {"key": case.name, "error": f"{type(error).__name__}: {error}"}
                yield row
        case.functions.clear()  # its tensors, before the next case makes its own


def rehearse(number: str, known: set[str] = frozenset()) -> Iterator[dict]:
    """What a GPU would be asked, on a CPU: every function of small cases runs once, in float16, and results agree.

    PyTorch's compiler is left out, and kernels run in Triton's interpreter.
    """
    module = benchmark(number)
    with mock.patch.multiple(module, DTYPE=torch.float16, **module.SMALL), mock.patch("torch.compile", uncompiled):
        for case in module.cases(reference(number), True):
            distance, missing = attempt(case)
            if case.name not in known:
                yield {"key": case.name, "rehearsed": [name for name in case.functions if name not in missing]} | {
                    "distances": distance,
                    "missing": missing,
                }


def uncompiled(function: Callable, **options: Any) -> Callable:
    """In place of torch.compile."""
    return function


# --- The machine ------------------------------------------------------------------------------------------------------


def clocks() -> dict[str, str] | None:
    """What the driver's tool reads: clocks in MHz, degrees, watts; None where there is none."""
    asked = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.splitlines()[0]  # fmt: skip
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(asked.split(","), told.split(", "), strict=True))


@cache
def machine() -> dict[str, Any]:
    """What figures hold for. On a GPU, asked in the process that uses it."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if profile.has_triton else None,
        "numpy": importlib.import_module("numpy").__version__,
    }
    if profile.name != "gpu":
        return {"device": "CPU", **found, "cores": os.cpu_count()}
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        **found,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main(number: str, what: str) -> None:
    """The command of one lesson's benchmark: all its shapes, written as each is known."""
    stem = lesson_path(number).stem
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{stem}", description=what)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{stem}.json", help="the JSON file to write")
    options = parser.parse_args()
    need_gpu()
    began = time.perf_counter()
    content = {"what": what, "date": datetime.now(UTC).isoformat(timespec="seconds"), **machine(), "rows": []}
    for row in time_lesson(number, published=False):
        print(describe(row), flush=True)
        content["rows"].append(row)
        write(options.out, content | {"seconds": round(time.perf_counter() - began, 1)})
