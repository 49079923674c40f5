"""Everything that a GPU answers, in one command and within minutes: correctness, speed, the course, a training run.

    make gpu                                             # python -m benchmarks.gpu
    python -m benchmarks.gpu --list                      # what there is, and what is known
    python -m benchmarks.gpu --only speed/29 llama       # these
    python -m benchmarks.gpu --minutes 8 --again         # anew, for so long

In this order:

1. compile, sweep   every kernel of the course compiled, and compared with float64 in float32, float16 and bfloat16
2. speed            every published size against its peers, in one process, with its goals
3. course           the lessons with PROFILE=gpu: seconds, memory, the GPU's memory
4. llama            LLaMA-160M in bfloat16: tokens per second and MFU

Each row is written to benchmarks/results/gpu.json as soon as it is known, so a run that is cut short loses nothing, and
the next one goes on there: what is known for these sources on this machine is not measured again. A part runs in a
process of its own, so that one which crashes ends alone. Exit code 1 where a row is an error; what there was no time
for is listed and is none. A missed goal is a figure, not an error.

Without a GPU the command says so and does what it can: kernels are compiled for a Hopper GPU (sm_90), the sweep's small
shapes run in Triton's interpreter, and every benchmark's cases run once at a small size. Nothing is written.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, ROOT, describe, lesson_path, write

RESULT = RESULTS / "gpu.json"
LOGS = ROOT / "build" / "gpu"
BUILT = ROOT / "build" / "gpu-wheels" / "notebooks"  # what `make gpu-wheels` leaves, for a machine that can't build
WITH_KERNELS = ("03", "04", "05", "08", "10", "11", "29", "30", "31", "35", "36")
CELL = 300.0  # seconds for one cell of a lesson
LLAMA_MINUTES = 0.75

Rows = Iterator[dict]


@dataclass(frozen=True)
class Unit:
    """What runs in a process of its own: `rows(known)` gives a row for all but the keys that are known."""

    name: str  # speed/29
    what: str
    rows: Callable[[set[str]], Rows]
    sources: tuple[str, ...]  # globs: what its rows depend on
    needs_gpu: bool = False


# --- What there is ----------------------------------------------------------------------------------------------------


def units() -> list[Unit]:
    """All of them, in the order in which they run."""
    shared = ("benchmarks/kernels.py", "llm40/profile.py", "llm40/kernels.py")
    swept = (*shared, "benchmarks/sweep.py", "benchmarks/flash_tma.py")
    found = [
        Unit("compile", "every kernel, its configurations and types", compile_rows, (*swept, "solutions/*/*.py")),
    ]
    for number in WITH_KERNELS:
        found.append(Unit(f"sweep/{number}", "kernels against float64", sweep_rows(number), (*swept, lesson(number))))
    for number in WITH_KERNELS:
        sources = (*shared, f"benchmarks/{number}_*.py", "benchmarks/flash_tma.py", lesson(number))
        found.append(Unit(f"speed/{number}", "published sizes against peers", speed_rows(number), sources))
    for number in written():
        sources = (lesson(number), "llm40/**/*.py")
        found.append(Unit(f"course/{number}", "the notebook, PROFILE=gpu", course_rows(number), sources, True))
    sources = (*shared, "benchmarks/14_*.py", lesson("14"))
    found.append(Unit("llama", "LLaMA-160M in bfloat16", llama_rows, sources, True))
    return found


def lesson(number: str) -> str:
    return f"solutions/*/{number}_*.py"


def written() -> list[str]:
    return sorted(path.name[:2] for path in ROOT.glob("solutions/stage*/*.py"))


def has_gpu() -> bool:
    """Asked in a unit's own process: whoever asks CUDA anything can't be forked any more."""
    from llm40 import profile

    return profile.name == "gpu" and not profile.interpret


def machine_has_gpu() -> bool:
    """The same, asked of a process that is over then."""
    question = "from benchmarks.gpu import has_gpu; print(has_gpu())"
    told = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, cwd=ROOT)
    if told.returncode:
        raise SystemExit(f"the course's library could not be imported:\n{told.stderr}")
    return told.stdout.split()[-1] == "True"


def choose(all_units: list[Unit], only: list[str]) -> list[Unit]:
    """Those whose name is asked for, or begins so before a slash."""
    asked = {word: [u for u in all_units if u.name == word or u.name.startswith(word + "/")] for word in only}
    empty = [word for word, found in asked.items() if not found]
    if empty:
        names = ", ".join(dict.fromkeys(unit.name.partition("/")[0] for unit in all_units))
        raise SystemExit(f"nothing is called {', '.join(empty)}: there is {names}, and one lesson of each as speed/29")
    chosen = {unit.name for found in asked.values() for unit in found}
    return [unit for unit in all_units if not only or unit.name in chosen]


# --- What each does, in its own process -------------------------------------------------------------------------------


def compile_rows(known: set[str]) -> Rows:
    """By `benchmarks.compile`, where Triton is no interpreter and no GPU is touched."""
    command = [sys.executable, "-m", "benchmarks.compile", *(["--all-shapes"] if has_gpu() else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            row = json.loads(line)
            if row["key"] not in known:
                yield row
    if process.returncode not in (0, 1):  # 1: a row says which kernel is refused
        raise RuntimeError(f"benchmarks.compile ended with exit code {process.returncode}")


def sweep_rows(number: str) -> Callable[[set[str]], Rows]:
    def rows(known: set[str]) -> Rows:
        from benchmarks.sweep import sweep

        yield from sweep(number, known)

    return rows


def speed_rows(number: str) -> Callable[[set[str]], Rows]:
    def rows(known: set[str]) -> Rows:
        from benchmarks import kernels

        if has_gpu():
            yield from kernels.time_lesson(number, published=True, known=known)
            return
        yield from kernels.rehearse(number, known)

    return rows


def course_rows(number: str) -> Callable[[set[str]], Rows]:
    def rows(known: set[str]) -> Rows:
        from autograder.run_lesson import RunTask, run_notebook

        path = lesson_path(number)
        key = f"{path.parent.name}/{path.stem}"
        env = {"LLM40_PROFILE": "gpu", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        os.environ.update(env)
        task = RunTask(key, str(notebook(key)), str(LOGS / "executed" / f"{key}.ipynb"), False, CELL, env)
        record = run_notebook(task)
        row = {name: record.get(name) for name in ("seconds", "grading_seconds", "peak_bytes", "gpu_bytes", "checks")}
        row |= {"key": path.stem, "checks_passed": record.get("checks_passed"), "slowest": record.get("slowest")}
        failures = [f"{f.get('cell', '')}: {f.get('message', '')}" for f in record.get("failures", [])]
        yield row | ({"error": "; ".join(failures) or record["status"]} if record["status"] != "ok" else {})

    return rows


def notebook(key: str) -> Path:
    """With the answers: built here, or where the builder's needs are missing, as `make gpu-wheels` has built it."""
    try:
        import jupytext  # noqa: F401
        import nbgrader  # noqa: F401
    except ImportError:
        path = BUILT / f"{key}.ipynb"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, and so are nbgrader and Jupytext, which would build it: run `make gpu-wheels` on "
                "a machine that has them, and bring build/gpu-wheels along"
            ) from None
        return path
    from autograder.build import build_sources

    if build_sources([key]):
        raise RuntimeError(f"{key} could not be built")
    return ROOT / "build" / "source" / f"{key}.ipynb"


def llama_rows(known: set[str]) -> Rows:
    from benchmarks import kernels

    yield kernels.benchmark("14").measure(LLAMA_MINUTES)


# --- One unit in a process --------------------------------------------------------------------------------------------


def work(unit: Unit, known: set[str], channel: connection.Connection, log: Path) -> None:
    """The process's main function: sends ("row", row) for each, then ("done", machine) or ("crash", text)."""
    os.setsid()  # whoever ends it ends its compilers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that notebooks' kernels end
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        for row in unit.rows(known):
            channel.send(("row", row))
        # Only where CUDA is awake already: the course's notebooks use it in processes of their own.
        channel.send(("done", sys.modules["benchmarks.kernels"].machine() if torch.cuda.is_initialized() else None))
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):
            channel.send(("crash", f"{type(error).__name__}: {error}"))
    channel.close()
    os._exit(0)  # a CUDA context that an error left behind may not end


def run(unit: Unit, known: set[str], seconds: float, on_row: Callable[[dict], None]) -> tuple[str, Any]:
    """("done", machine), ("crash", text) or ("cut short", None): rows go to `on_row` as they come."""
    # Forked: PyTorch is imported once, here, and nobody here asks CUDA anything.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(unit, known, theirs, LOGS / f"{unit.name.replace('/', '-')}.log"))
    process.start()
    theirs.close()
    until = time.monotonic() + seconds
    outcome: tuple[str, Any] = ("cut short", None)
    try:
        while ours.poll(max(0.0, until - time.monotonic())):
            try:
                kind, content = ours.recv()
            except EOFError:
                process.join(5)
                outcome = ("crash", f"its process ended with exit code {process.exitcode}")
                break
            if kind != "row":
                outcome = (kind, content)
                break
            on_row(content)
    finally:
        _end(process)
    return outcome


def _end(process: multiprocessing.process.BaseProcess) -> None:
    process.join(1 if process.exitcode is None else 0)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except (ProcessLookupError, PermissionError):
            break
        process.join(3)
    process.join(3)


# --- Results ----------------------------------------------------------------------------------------------------------


def stamp(unit: Unit, versions: dict[str, str]) -> str:
    """What rows hold for: the sources they depend on, the device, PyTorch and Triton."""
    paths = {path for pattern in unit.sources for path in ROOT.glob(pattern)}
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Asked without CUDA: it must not be touched before the fork."""
    import importlib.metadata as metadata

    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        told = []
    found = {"device": told[0] if told else "no GPU"}
    for package in ("torch", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def load(path: Path) -> dict:
    if not path.is_file():
        return {"units": {}}
    content = json.loads(path.read_text(encoding="utf-8"))
    content.setdefault("units", {})
    return content


def known_rows(content: dict, unit: Unit, mark: str) -> list[dict]:
    """Those that hold for these sources on this machine, and are no errors."""
    entry = content["units"].get(unit.name, {})
    return [row for row in entry.get("rows", []) if "error" not in row] if entry.get("stamp") == mark else []


def is_done(content: dict, unit: Unit, mark: str) -> bool:
    entry = content["units"].get(unit.name, {})
    return entry.get("stamp") == mark and entry.get("state") == "done" and not any("error" in r for r in entry["rows"])


# --- The command ------------------------------------------------------------------------------------------------------


def run_all(chosen: list[Unit], path: Path | None, minutes: float, again: bool) -> int:
    """Run what is not known yet, until the time is over; `path` is written after every row, if given."""
    started = time.monotonic()
    content, about = load(path) if path else {"units": {}}, versions()
    left, wrong = [], 0
    for unit in chosen:
        mark = stamp(unit, about)
        if not again and is_done(content, unit, mark):
            print(f"{unit.name}: known", flush=True)
            continue
        seconds = 60 * minutes - (time.monotonic() - started)
        if seconds <= 0:
            left.append(unit.name)
            continue
        kept = [] if again else known_rows(content, unit, mark)
        entry = {"stamp": mark, "state": "cut short", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        entry |= {"rows": kept}
        content["units"][unit.name] = entry
        began = time.monotonic()

        def save(row: dict, unit: Unit = unit, entry: dict = entry) -> None:
            entry["rows"].append(row)
            print(f"{unit.name}: {describe(row)}", flush=True)
            if path:
                write(path, content)

        state, told = run(unit, {row["key"] for row in kept}, seconds, save)
        entry |= {"state": state, "seconds": round(time.monotonic() - began, 1)}
        if state == "done" and told:
            content["machine"] = told | about
        elif state == "crash":
            entry["error"] = told
            print(f"{unit.name}: {told}; see {LOGS.relative_to(ROOT)}/{unit.name.replace('/', '-')}.log", flush=True)
        elif state == "cut short":
            left.append(unit.name)
        if path:
            write(path, content)
        wrong += state == "crash" or any("error" in row for row in entry["rows"])
    if left:
        print(f"no time was left for {', '.join(left)}: the next call goes on there")
    return 1 if wrong else 0


def show(all_units: list[Unit], path: Path, gpu: bool) -> None:
    """What there is, and what is known of it."""
    content, about = load(path), versions()
    print(f"on {about['device']}, PyTorch {about['torch']}, Triton {about['triton']}; results in {path.name}")
    for unit in all_units:
        entry = content["units"].get(unit.name)
        if entry is None:
            state = "needs a GPU" if unit.needs_gpu and not gpu else "not known"
        elif entry.get("stamp") != stamp(unit, about):
            state = "of other sources or another machine"
        else:
            errors = sum("error" in row for row in entry["rows"])
            state = f"{entry['state']}, {len(entry['rows'])} rows" + (f", {errors} errors" if errors else "")
        print(f"  {unit.name:12}{unit.what:46}{state}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="UNIT", help="compile, sweep, speed/29 …")
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing runs on (8)")
    parser.add_argument("--again", action="store_true", help="also what is known")
    parser.add_argument("--list", action="store_true", help="say what there is and what is known; run nothing")
    parser.add_argument("--out", type=Path, default=RESULT, help="the file of results")
    options = parser.parse_args(arguments)
    chosen = choose(units(), options.only)
    os.environ.setdefault("TRITON_CACHE_DIR", str(LOGS / "triton"))  # what is compiled first serves all that follows
    gpu = machine_has_gpu()
    if options.list:
        show(chosen, options.out, gpu)
        return 0
    if gpu:
        return run_all(chosen, options.out, options.minutes, options.again)
    print("PyTorch sees no GPU here: nothing is measured and nothing written. What there is, and what is known of it:")
    show(chosen, options.out, gpu)
    print("What can be checked without a GPU:", flush=True)
    skipped = [unit for unit in chosen if unit.needs_gpu]
    code = run_all([unit for unit in chosen if not unit.needs_gpu], None, options.minutes, options.again)
    if skipped:
        groups = dict.fromkeys(unit.name.partition("/")[0] for unit in skipped)
        print(f"left for a machine with a GPU: {', '.join(groups)}, and the figures of speed")
    return code


if __name__ == "__main__":
    sys.exit(main())
