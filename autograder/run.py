"""`make run`: execute every lesson with its answers, prove that its stub fails every check, and report on both."""

import importlib.metadata
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from autograder import report
from autograder.build import build_sources
from autograder.catalog import UsageError, select_keys
from autograder.kernels.forking import warm_process
from autograder.layout import ROOT, write
from autograder.logs import VERBOSE
from autograder.pool import Crash, count_cores, run_each
from autograder.run_lesson import RunTask, run_task

log = logging.getLogger(__name__)
# On two CPU cores. On a GPU machine a lesson does more, and CUDA's own libraries alone fill the memory.
BUDGETS = {"seconds": 30.0, "grading_seconds": 8.0, "peak_bytes": 2 * 2**30}
CELL_TIMEOUT = 120.0


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
        sources, stubs = _find_folders(notebooks)
        keys = select_keys(_find_lessons(notebooks, sources), lesson, stage)
        chosen, device = _choose_profile(profile)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if notebooks is None:
        code = build_sources(keys)
        if code:
            return code

    # A lesson and its stub are two runs. Lessons on a GPU measure time, so by default nothing runs beside them.
    jobs = jobs or (1 if chosen == "gpu" else min(count_cores(), 2 * len(keys)))
    env = _make_environment(chosen, jobs)
    created, versions = datetime.now(UTC).isoformat(timespec="seconds"), _collect_versions(device)
    made_with = {"created": created, "profile": chosen, **versions}
    started = time.perf_counter()
    try:
        with _interrupt_on_sigterm(), warm_process(os.environ | env) as warm:
            tasks = _make_tasks(keys, sources, stubs, out, timeout, env, warm, made_with)
            records = _run_all(tasks, jobs)
    except KeyboardInterrupt:
        print("interrupted: every kernel has been stopped, no report was written", file=sys.stderr)
        return 130

    result = {
        "created": created,
        "profile": chosen,
        "jobs": jobs,
        "seconds": round(time.perf_counter() - started, 1),
        "budgets": BUDGETS if chosen == "cpu" else None,
        "strict_budgets": strict_budgets,
        "versions": versions,
        "lessons": [_make_lesson_record(key, sources, records, stubs) for key in keys],
    }
    for record in result["lessons"]:
        record["warnings"] = _compare_with_budgets(record) if chosen == "cpu" else []
    failed = [r for r in result["lessons"] if _collect_failures(r) or (strict_budgets and r["warnings"])]
    result["status"] = "failed" if failed else "ok"

    _write_reports(result, out)
    color = sys.stdout.isatty()
    for record in result["lessons"]:
        for failure in _collect_failures(record):
            print(report.format_failure(record, failure, color))
    print(report.format_summary(result))
    print(f"\nreport: {_shorten_path(out / 'report.html')}   executed notebooks: {_shorten_path(out / 'executed')}")
    return 1 if failed else 0


# What to run --------------------------------------------------------------------------------------------------------


def _find_folders(notebooks: Path | None) -> tuple[Path, Path]:
    """The folder of the notebooks with answers, and that of the stubs."""
    if notebooks is None:
        return ROOT / "build" / "source", ROOT / "course"
    notebooks = notebooks.resolve()
    if not notebooks.is_dir():
        raise UsageError(f"--notebooks: there is no folder {notebooks}")
    sources = notebooks / "source" if (notebooks / "source").is_dir() else notebooks
    stubs = notebooks / "course" if (notebooks / "course").is_dir() else ROOT / "course"
    return sources, stubs


def _find_lessons(notebooks: Path | None, sources: Path) -> list[str]:
    """The lessons that exist, as `<stage>/<lesson>`, in order."""
    folder, ending = (ROOT / "solutions", ".py") if notebooks is None else (sources, ".ipynb")
    found = [f"{path.parent.name}/{path.stem}" for path in folder.glob(f"*/*{ending}") if path.name[0] not in "._"]
    if not found:
        raise UsageError(f"there is no lesson in {folder}: it should hold <stage>/<lesson>{ending}")
    return sorted(found)


def _make_tasks(
    keys: list[str],
    sources: Path,
    stubs: Path,
    out: Path,
    timeout: float,
    env: dict,
    warm: str,
    made_with: dict,
) -> list[RunTask]:
    """Solutions first: they take longer."""

    def make(key: str, notebook: Path, folder: str, stub: bool) -> RunTask:
        return RunTask(key, str(notebook), str(out / folder / f"{key}.ipynb"), stub, timeout, env, warm, made_with)

    tasks = [make(key, sources / f"{key}.ipynb", "executed", False) for key in keys]
    for key in keys:
        stub = stubs / f"{key}.ipynb"
        if stub.exists():
            tasks.append(make(key, stub, "stubs", True))
    return tasks


# Where it runs ------------------------------------------------------------------------------------------------------


def _choose_profile(asked: str) -> tuple[str, str]:
    """`cpu` or `gpu`, and the device's name."""
    if asked not in ("auto", "cpu", "gpu"):
        raise UsageError(f"the profile can be cpu, gpu or auto, not {asked!r}")
    gpu = None if asked == "cpu" else _ask_gpu_name()
    if asked == "gpu" and not gpu:
        raise UsageError("PROFILE=gpu was asked for, but PyTorch sees no GPU here: use PROFILE=cpu")
    return ("gpu", gpu) if gpu else ("cpu", _read_cpu_name())


def _ask_gpu_name() -> str | None:
    """The GPU that PyTorch sees: asked in another process, and only where there is a driver, as it takes seconds."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if sys.platform == "linux" and not any(os.path.exists(path) for path in drivers):
        return None
    question = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _read_cpu_name() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            lines = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
            name = next(lines, name)
    return f"{name}, {count_cores()} cores"


def _collect_versions(device: str) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "device": device}
    for package in ("torch", "triton", "papermill", "ipykernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _make_environment(profile: str, jobs: int) -> dict[str, str]:
    """The kernels' environment: the profile, their share of the cores, and the place of `llm40` if it is not installed.

    Threads wait asleep: where other programs hold the cores too, spinning ones make a lesson of 40 s take many
    minutes.
    """
    threads = str(max(1, count_cores() // jobs))
    env = {
        "LLM40_PROFILE": profile,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        VERBOSE: os.environ.get(VERBOSE, ""),
    }
    if profile == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


# Running ------------------------------------------------------------------------------------------------------------


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """A SIGTERM (from a CI system that cancels the job) ends the run as Ctrl-C does."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(tasks: list[RunTask], jobs: int) -> dict[tuple[str, bool], dict]:
    """The records of all tasks by (key, is stub), under a progress bar of cells; without a terminal, a line per run."""
    from tqdm import tqdm

    bar_shown = sys.stderr.isatty() and not log.isEnabledFor(logging.DEBUG)
    cells = {task: _count_cells(task) for task in tasks}
    counted = dict.fromkeys(tasks, 0)
    records = {}
    lock = threading.Lock()
    with tqdm(total=sum(cells.values()), unit="cell", disable=not bar_shown, dynamic_ncols=True) as bar:

        def count(task: RunTask, number: int) -> None:
            with lock:
                bar.set_description(f"{Path(task.key).name}{' (stub)' if task.stub else ''}", refresh=False)
                bar.update(number - counted[task])
                counted[task] = number

        # Importing papermill takes more than a second.
        preload = ("autograder.run_lesson", "papermill")
        for task, result in run_each(run_task, tasks, jobs, preload=preload, on_progress=count):
            record = _describe_crash(task, result.exit_code) if isinstance(result, Crash) else result
            records[task.key, task.stub] = record
            count(task, cells[task])
            if not bar_shown:
                print(report.format_progress(task.stub, record), flush=True)
    return records


def _count_cells(task: RunTask) -> int:
    """Code cells, for the bar; a notebook that cannot be read fails later, in its own process."""
    try:
        cells = json.loads(Path(task.notebook).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(cell.get("cell_type") == "code" for cell in cells)


def _describe_crash(task: RunTask, code: int | None) -> dict:
    message = f"the process that ran it ended with exit code {code}; its message is above"
    failure = {"kind": "crash", "cell": "", "message": message, "source": "", "traceback": ""}
    return {"key": task.key, "status": "failed", "failures": [failure], "seconds": 0.0}


# Results ------------------------------------------------------------------------------------------------------------


def _make_lesson_record(key: str, sources: Path, records: dict, stubs: Path) -> dict:
    stage, name = key.split("/")
    stub = records.get((key, True))
    if stub is None:
        message = f"there is no {_shorten_path(stubs / key)}.ipynb: make it with `make course`"
        failure = {"kind": "no stub", "cell": "", "message": message, "source": "", "traceback": ""}
        stub = {"key": key, "status": "failed", "failures": [failure]}
    empty = {
        "peak_bytes": 0,
        "gpu_bytes": None,
        "checks": 0,
        "checks_passed": 0,
        "left_out": [],
        "points": 0,
        "max_points": 0,
        "figures": 0,
        "slowest": None,
        "grading_seconds": 0.0,
    }
    return {
        "stage": stage,
        "name": name,
        "title": _read_title(sources / f"{key}.ipynb") or name,
        **empty,
        **records[key, False],
        "stub": stub,
    }


def _read_title(notebook: Path) -> str | None:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["llm40"]["title"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _collect_failures(record: dict) -> list[dict]:
    return record["failures"] + [{**failure, "stub": True} for failure in record["stub"]["failures"]]


def _compare_with_budgets(record: dict) -> list[str]:
    """A sentence for each budget that a lesson exceeds."""
    words = {
        "seconds": ("the whole notebook takes", report.format_seconds),
        "grading_seconds": ("without experiments it takes", report.format_seconds),
        "peak_bytes": ("memory peaks at", report.format_size),
    }
    return [
        f"{text} {show(record[name])}, over the budget of {show(BUDGETS[name])}"
        for name, (text, show) in words.items()
        if record[name] > BUDGETS[name]
    ]


def _write_reports(result: dict, out: Path) -> None:
    write(out / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write(out / "report.md", report.render_markdown(result))
    write(out / "report.html", report.render_html(result))


def _shorten_path(path: Path) -> str:
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
