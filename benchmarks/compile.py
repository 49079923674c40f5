"""Every kernel of the course compiled for the GPU that is here, or for a Hopper GPU where none is: that takes no GPU.

    python -m benchmarks.compile 03 29

The launchers of the lessons are called as `benchmarks.sweep` calls them, on the CPU, and with the autotuner's every
configuration; what they launch is noted and compiled, not run, in as many processes as there are cores. Triton keeps
the results on disk, so that on a GPU the runs that follow find their kernels made. Prints a row of JSON for each lesson
and dtype. Exit code 1 where a kernel does not compile.

A process of its own: in this one Triton is never an interpreter, and no GPU is touched.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["LLM40_PROFILE"] = "cpu"
from llm40 import profile

os.environ["TRITON_INTERPRET"] = "0"  # after llm40, which sets it, and before Triton
profile.interpret = False

import torch  # noqa: E402

from benchmarks import sweep  # noqa: E402

HOPPER = 90  # compute capability 9.0: H100, H200
SHARED = 227 * 1024  # bytes of shared memory that a program can have there
PROCESSORS = 132


@dataclass
class Launch:
    kernel: Any  # triton.JITFunction
    args: tuple
    kwargs: dict[str, Any]
    tuned: bool  # one of the autotuner's configurations, which may ask for too much: it is then left out

    def __str__(self) -> str:
        constants = [p.name for p in self.kernel.params if p.is_constexpr]
        given = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.kwargs
        named = [f"{name} {given[name]}" for name in constants if name in given]
        named += [f"{name} {given[name]}" for name in ("num_warps", "num_stages") if name in given]
        return ", ".join(named)


@cache
def capability() -> int:
    """Of the GPU that the driver's tool names; Hopper's where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(told.splitlines()[0].replace(".", ""))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return HOPPER


class NoDriver:
    """In place of Triton's driver: a GPU of this kind, on which nothing is launched."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches inside the block are noted, all configurations of autotuned kernels, and nothing runs."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **kwargs):
        if callable(grid):
            grid(kwargs)
        launches.append(Launch(kernel, args, kwargs, False))

    def run_all(tuner, *args, **kwargs):
        for config in tuner.configs:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())
            launches[-1].tuned = len(tuner.configs) > 1

    gpu = SimpleNamespace(multi_processor_count=PROCESSORS)
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", run_all),
        mock.patch.object(sweep, "drawn", undrawn),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu),
    ):
        yield launches


def undrawn(*shape: int, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """In place of random numbers, which nobody looks at: memory that is not touched either."""
    return torch.empty(*shape, dtype=dtype)


lesson_of = cache(sweep.reference)


def launches_of(number: str, dtype: torch.dtype, all_shapes: bool) -> list[Launch]:
    """What a lesson's kernels are launched with: at its published shape, with the autotuner's configurations too, and
    at the sweep's."""
    family, lesson = sweep.family(number), lesson_of(number)
    shapes = family.typical + (family.small + family.large if all_shapes else family.small[:1])
    with noted() as launches:
        if number == "03":  # the page that introduces Triton
            lesson.stamp_kernel[3,](torch.empty(21, dtype=torch.int32), 21, BLOCK=8)
        for shape in shapes:
            tensors = family.inputs(*shape, dtype=dtype)
            family.ours(lesson, *tensors)
            if number == "29" and shape in family.typical and dtype == torch.bfloat16:
                q, k, v, do, causal = tensors
                o, lse = lesson.flash_forward(q, k, v, causal)
                lesson.flash_backward(q, k, v, o, lse, do, causal)
                sweep.flash_tma.forward(q, k, v, causal)
    return list({(launch.kernel.fn.__name__, types(launch), str(launch)): launch for launch in launches}.values())


def types(launch: Launch) -> str:
    """Triton compiles anew for other types, for a 1, and for whole numbers and addresses that 16 does not divide."""

    def kind(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {value.data_ptr() % 16 == 0}"
        return f"{value == 1} {value % 16 == 0}" if isinstance(value, int) else type(value).__name__

    return ", ".join(kind(value) for value in launch.args)


_jobs: list[Launch] = []  # what forked processes find


def compile_job(i: int) -> tuple[int, str | None, int]:
    """(i, what Triton has against it, bytes of shared memory)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    launch = _jobs[i]
    driver.set_active(NoDriver(GPUTarget("cuda", capability(), 32)))
    try:
        made = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
        made = made.result() if hasattr(made, "result") else made
    except Exception as error:  # whatever Triton raises is its answer
        return i, f"{type(error).__name__}: {str(error).strip()[:300]}", 0
    return i, None, made.metadata.shared


def compile_lessons(numbers: list[str], all_shapes: bool, jobs: int) -> Iterator[dict]:
    """A row for each lesson and dtype: each kernel, in how many variants, and the shared memory that it takes."""
    waiting: dict[tuple[str, torch.dtype], int] = {}
    owners, results = [], {}
    for number in numbers:
        for dtype in sweep.family(number).dtypes:
            launches = launches_of(number, dtype, all_shapes)
            _jobs.extend(launches)
            owners += [(number, dtype)] * len(launches)
            waiting[number, dtype] = len(launches)
            results[number, dtype] = []
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for i, problem, shared in pool.imap_unordered(compile_job, range(len(_jobs))):
            results[owners[i]].append((_jobs[i], problem, shared))
            waiting[owners[i]] -= 1
            if not waiting[owners[i]]:
                yield describe(*owners[i], results[owners[i]])


def describe(number: str, dtype: torch.dtype, results: list[tuple[Launch, str | None, int]]) -> dict:
    kernels: dict[str, dict[str, Any]] = {}
    refused = []
    for launch, problem, shared in results:
        name = launch.kernel.fn.__name__
        found = kernels.setdefault(name, {"variants": 0, "shared_kib": 0, "left_out": []})
        found["variants"] += 1
        if not problem and shared > SHARED:
            problem = f"{shared // 1024} KiB of shared memory, more than there is"
            if launch.tuned:  # the autotuner leaves it out
                found["left_out"].append(f"{launch}: {problem}")
                continue
        if problem:
            refused.append(f"{name}, {launch}: {problem}")
        found["shared_kib"] = max(found["shared_kib"], round(shared / 1024))
    key = f"lesson {number}, {str(dtype).removeprefix('torch.')}"
    row = {"key": key, "target": f"sm_{capability()}", "kernels": kernels}
    return row | ({"error": f"{len(refused)} do not compile", "refused": refused} if refused else {})


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", help="numbers; all lessons with kernels by default")
    parser.add_argument("--all-shapes", action="store_true", help="what the sweep of a GPU launches too")
    parser.add_argument("--list", action="store_true", help="name the kernels and their variants; compile nothing")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Lessons print as they are read: to standard error, so that standard output is rows and nothing else.
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    wrong = 0
    capability()  # asked once, for all processes
    numbers = options.lessons or [family.lesson for family in sweep.FAMILIES]
    if options.list:
        for number in numbers:
            for launch in launches_of(number, torch.bfloat16, options.all_shapes):
                print(f"{number} {launch.kernel.fn.__name__}: {launch}", file=rows, flush=True)
        return 0
    for row in compile_lessons(numbers, options.all_shapes, options.jobs):
        wrong += "error" in row
        print(json.dumps(row), file=rows, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
