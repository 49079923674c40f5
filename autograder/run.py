"""`make run`: execute every lesson with its answers, prove that its stub fails every check, and report on both."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path

from autograder import report
from autograder.kernels.provisioner import warm_process
from autograder.run_lesson import Task, work

ROOT = Path(__file__).resolve().parents[1]
# On two CPU cores. On a GPU machine a lesson does more, and CUDA's own libraries alone fill the memory.
BUDGETS = {"seconds": 30.0, "grading_seconds": 8.0, "peak_bytes": 2 * 2**30}
CELL_TIMEOUT = 120.0


class UsageError(Exception):
    """What was asked for makes no sense; the message says what would."""


def run_course(
    lesson: str | None = None,
    stage: str | None = None,
    profile: str = "auto",
    jobs: int | None = None,
    notebooks: Path | None = None,
    timeout: float = CELL_TIMEOUT,
    strict_budgets: bool = False,
    out: Path | None = None,
) -> int:
    """Run lessons and stubs in parallel processes, write `out` (build/): report.json, .md, .html and executed/.

    `notebooks` names a folder of built notebooks, `source/<stage>/<lesson>.ipynb` and `course/…`; then nothing is
    built, and nbgrader, Jupytext and JupyterLab need not be installed. Returns the exit code: 0 when every cell of
    every lesson ran and every check failed on its stub, 1 otherwise, 2 for wrong usage, 130 when interrupted.
    """
    out = out or ROOT / "build"
    try:
        sources, stubs = _folders(notebooks)
        keys = select(_known(notebooks, sources), lesson, stage)
        chosen, device = _profile(profile)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if notebooks is None:
        from autograder.build import build_sources

        code = build_sources(keys)
        if code:
            return code

    # A lesson and its stub are two runs. Lessons on a GPU measure time, so by default nothing runs beside them.
    jobs = jobs or (1 if chosen == "gpu" else min(_cores(), 2 * len(keys)))
    env = _environment(chosen, jobs)
    started = time.perf_counter()
    try:
        with _sigterm_interrupts(), warm_process(os.environ | env) as warm:
            tasks = _tasks(keys, sources, stubs, out, timeout, env, warm)
            records = _with_progress(tasks, jobs)
    except KeyboardInterrupt:
        print("interrupted: every kernel has been stopped, no report was written", file=sys.stderr)
        return 130

    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": chosen,
        "jobs": jobs,
        "seconds": round(time.perf_counter() - started, 1),
        "budgets": BUDGETS if chosen == "cpu" else None,
        "strict_budgets": strict_budgets,
        "versions": _versions(device),
        "lessons": [_lesson(key, sources, records, stubs) for key in keys],
    }
    for record in result["lessons"]:
        record["warnings"] = _over_budget(record) if chosen == "cpu" else []
    failed = [r for r in result["lessons"] if _failures(r) or (strict_budgets and r["warnings"])]
    result["status"] = "failed" if failed else "ok"

    _write_reports(result, out)
    color = sys.stdout.isatty()
    for record in result["lessons"]:
        for failure in _failures(record):
            print(report.failure_text(record, failure, color))
    print(report.table_text(result))
    print(f"\nreport: {_short(out / 'report.html')}   executed notebooks: {_short(out / 'executed')}")
    return 1 if failed else 0


# What to run --------------------------------------------------------------------------------------------------------


def _folders(notebooks: Path | None) -> tuple[Path, Path]:
    """Where the notebooks with answers lie, and where the stubs."""
    if notebooks is None:
        return ROOT / "build" / "source", ROOT / "course"
    notebooks = notebooks.resolve()
    if not notebooks.is_dir():
        raise UsageError(f"--notebooks: there is no folder {notebooks}")
    sources = notebooks / "source" if (notebooks / "source").is_dir() else notebooks
    stubs = notebooks / "course" if (notebooks / "course").is_dir() else ROOT / "course"
    return sources, stubs


def _known(notebooks: Path | None, sources: Path) -> list[str]:
    """The lessons that exist, as `<stage>/<lesson>`, in order."""
    folder, ending = (ROOT / "solutions", ".py") if notebooks is None else (sources, ".ipynb")
    found = [f"{path.parent.name}/{path.stem}" for path in folder.glob(f"*/*{ending}") if path.name[0] not in "._"]
    if not found:
        raise UsageError(f"there is no lesson in {folder}: it should hold <stage>/<lesson>{ending}")
    return sorted(found)


def select(known: list[str], lesson: str | None, stage: str | None) -> list[str]:
    """The lessons meant by what someone typed: `9`, `09`, `09_attention`; a stage as `2` or its folder's name."""
    keys = known
    if stage:
        keys = [key for key in known if stage in (key.split("/")[0], key[: len("stage0")].removeprefix("stage"))]
    if lesson:
        name = Path(lesson).name.removesuffix(".py").removesuffix(".ipynb")
        number = name.zfill(2) if name.isdecimal() else None
        keys = [key for key in keys if key.split("/")[1] == name or key.split("/")[1].split("_")[0] == number]
    if not keys:
        asked = " ".join(f"{what} {value!r}" for what, value in (("stage", stage), ("lesson", lesson)) if value)
        listing = "\n  ".join(known)
        raise UsageError(f"there is no {asked} here. These are the lessons:\n  {listing}")
    return keys


def _tasks(keys: list[str], sources: Path, stubs: Path, out: Path, timeout: float, env: dict, warm: str) -> list[Task]:
    """Solutions first: they take longer."""
    tasks = [
        Task(key, str(sources / f"{key}.ipynb"), str(out / "executed" / f"{key}.ipynb"), False, timeout, env, warm)
        for key in keys
    ]
    for key in keys:
        stub = stubs / f"{key}.ipynb"
        if stub.exists():
            tasks.append(Task(key, str(stub), str(out / "stubs" / f"{key}.ipynb"), True, timeout, env, warm))
    return tasks


# Where it runs ------------------------------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _profile(asked: str) -> tuple[str, str]:
    """`cpu` or `gpu`, and the device's name."""
    if asked not in ("auto", "cpu", "gpu"):
        raise UsageError(f"the profile can be cpu, gpu or auto, not {asked!r}")
    gpu = None if asked == "cpu" else _gpu_name()
    if asked == "gpu" and not gpu:
        raise UsageError("PROFILE=gpu was asked for, but PyTorch sees no GPU here: use PROFILE=cpu")
    return ("gpu", gpu) if gpu else ("cpu", _cpu_name())


def _gpu_name() -> str | None:
    """The GPU that PyTorch sees: asked in another process, and only where there is a driver, as it takes seconds."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if sys.platform == "linux" and not any(os.path.exists(path) for path in drivers):
        return None
    question = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            lines = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
            name = next(lines, name)
    return f"{name}, {_cores()} cores"


def _versions(device: str) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "device": device}
    for package in ("torch", "triton", "papermill", "ipykernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _environment(profile: str, jobs: int) -> dict[str, str]:
    """What kernels are told: the profile, their share of the cores, and where `llm40` lies when it is not installed.

    Threads that have to wait do so asleep: where other programs hold the cores too, spinning ones make a lesson of
    40 s take many minutes.
    """
    threads = str(max(1, _cores() // jobs))
    env = {
        "LLM40_PROFILE": profile,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if profile == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


# Running ------------------------------------------------------------------------------------------------------------


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM (from a CI system that cancels the job) ends the run as Ctrl-C does."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_progress(tasks: list[Task], jobs: int) -> dict[tuple[str, bool], dict]:
    """The records of all tasks by (key, is stub), under a progress bar of cells; without a terminal, a line per run."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    cells = {task: _cells(task) for task in tasks}
    counted = dict.fromkeys(tasks, 0)
    with tqdm(total=sum(cells.values()), unit="cell", disable=not terminal, dynamic_ncols=True) as bar:

        def on_cell(task: Task, count: int) -> None:
            bar.set_description(f"{Path(task.key).name}{' (stub)' if task.stub else ''}", refresh=False)
            bar.update(count - counted[task])
            counted[task] = count

        def on_end(task: Task, record: dict) -> None:
            on_cell(task, cells[task])
            if not terminal:
                print(report.progress_line(task.stub, record), flush=True)

        return run_tasks(tasks, jobs, on_cell, on_end)


def _cells(task: Task) -> int:
    """Code cells, for the bar; a notebook that cannot be read fails later, in its own process."""
    try:
        cells = json.loads(Path(task.notebook).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(cell.get("cell_type") == "code" for cell in cells)


def run_tasks(
    tasks: list[Task],
    jobs: int,
    on_cell: Callable[[Task, int], None] = lambda task, count: None,
    on_end: Callable[[Task, dict], None] = lambda task, record: None,
) -> dict[tuple[str, bool], dict]:
    """Each task in a process of its own, `jobs` at once; whatever ends this function ends them and their kernels."""
    # Importing papermill takes more than a second: where the system can, processes are forked from one that has it.
    # That one starts clean, so no thread of this process is forked.
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(["autograder.run_lesson", "papermill"])
    waiting = deque(tasks)
    running: dict[connection.Connection, tuple[Task, multiprocessing.Process]] = {}
    records = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe(duplex=False)
                task = waiting.popleft()
                process = context.Process(target=work, args=(task, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (task, process)
            for channel in connection.wait(list(running)):
                task, process = running[channel]
                try:
                    kind, value = channel.recv()
                except EOFError:  # it ended without a result
                    process.join()
                    kind, value = "done", _crashed(task, process.exitcode)
                if kind == "cell":
                    on_cell(task, value)
                    continue
                records[task.key, task.stub] = value
                on_end(task, value)
                del running[channel]
                channel.close()
                _stop([process], patience=10)
    finally:
        for _, process in running.values():
            process.terminate()
        _stop([process for _, process in running.values()], patience=5)
    return records


def _stop(processes: list, patience: float) -> None:
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()


def _crashed(task: Task, code: int | None) -> dict:
    message = f"the process that ran it ended with exit code {code}; its message is above"
    failure = {"kind": "crash", "cell": "", "message": message, "source": "", "traceback": ""}
    return {"key": task.key, "status": "failed", "failures": [failure], "seconds": 0.0}


# Results ------------------------------------------------------------------------------------------------------------


def _lesson(key: str, sources: Path, records: dict, stubs: Path) -> dict:
    stage, name = key.split("/")
    stub = records.get((key, True))
    if stub is None:
        message = f"there is no {_short(stubs / key)}.ipynb: make it with `make course`"
        failure = {"kind": "no stub", "cell": "", "message": message, "source": "", "traceback": ""}
        stub = {"key": key, "status": "failed", "failures": [failure]}
    empty = {"peak_bytes": 0, "gpu_bytes": None, "checks": 0, "checks_passed": 0, "points": 0, "max_points": 0,
             "figures": 0, "slowest": None, "grading_seconds": 0.0}  # fmt: skip
    return {
        "stage": stage,
        "name": name,
        "title": _title(sources / f"{key}.ipynb") or name,
        **empty,
        **records[key, False],
        "stub": stub,
    }


def _title(notebook: Path) -> str | None:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["llm40"]["title"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _failures(record: dict) -> list[dict]:
    return record["failures"] + [{**failure, "stub": True} for failure in record["stub"]["failures"]]


def _over_budget(record: dict) -> list[str]:
    """What a lesson took beyond its budgets, in words."""
    words = {
        "seconds": ("the whole notebook takes", report.seconds),
        "grading_seconds": ("without experiments it takes", report.seconds),
        "peak_bytes": ("memory peaks at", report.size),
    }
    return [
        f"{text} {show(record[name])}, over the budget of {show(BUDGETS[name])}"
        for name, (text, show) in words.items()
        if record[name] > BUDGETS[name]
    ]


def _write_reports(result: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(report.run_markdown(result), encoding="utf-8")
    (out / "report.html").write_text(report.run_html(result), encoding="utf-8")


def _short(path: Path) -> str:
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
