"""Executes one notebook by papermill, in a process of its own: `run` starts one for every lesson and every stub.

A process each, because papermill changes the whole process's directory and because a run must be able to end at once:
when it is told to (SIGTERM), or when the process that started it is gone, its kernel and its sockets go with it.
"""

import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from pathlib import Path
from subprocess import Popen

from autograder.kernels.manager import Kernels
from autograder.logs import show_logs_as_parent
from autograder.text import strip_colors

log = logging.getLogger(__name__)
EXPERIMENT = "experiment"  # the tag of cells that train and draw
NO_TRITON = "Triton exists for Linux only"  # llm40.kernels begins its error so, where there is no Triton
_MARKER = "papermill-error-cell-tag"  # on cells that papermill inserts around a failure

# A question to the kernel after the run: only about torch that the lesson itself imported.
_QUESTION = (
    "(lambda t: t.cuda.max_memory_allocated() if t is not None and t.cuda.is_initialized() else 0)"
    "(__import__('sys').modules.get('torch'))"
)


@dataclass(frozen=True)
class RunTask:
    """A notebook for a process to run. `stub` is a learner's notebook: experiments are skipped and errors expected."""

    key: str  # stage2_transformer/09_attention_mha_mqa_gqa
    notebook: str
    output: str
    stub: bool
    timeout: float  # seconds for one cell
    env: dict[str, str] = field(hash=False)
    warm: str = ""  # the address of the process from which kernels are forked
    made_with: dict[str, str | None] = field(default_factory=dict, hash=False)  # goes into the executed notebook


def run_task(task: RunTask, channel: connection.Connection) -> None:
    """The process's main function: sends ("progress", count) after every code cell, and at the end ("done", record)."""
    os.environ.update(task.env)
    show_logs_as_parent()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it logs what the record says
    # Ctrl-C reaches every process of the terminal; this one waits for the SIGTERM that follows. A function, not
    # SIG_IGN: the kernel would inherit that.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel.send(("done", run_notebook(task, lambda count: channel.send(("progress", count)))))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def run_notebook(task: RunTask, on_cell: Callable[[int], None] = lambda count: None) -> dict:
    """Run the notebook to its end or its first failure; for a stub, through all failures. Returns the record of it."""
    import nbformat
    from nbclient.exceptions import CellTimeoutError
    from papermill import PapermillExecutionError, execute_notebook

    started = time.perf_counter()
    counted = 0

    def count_cell(cell, **_) -> None:
        nonlocal counted
        counted += 1
        log.debug("%s: cell %d, %s: %s", where, counted, _choose_label(cell), _describe_error(cell) or "ok")
        on_cell(counted)

    where = f"{task.key}{' (stub)' if task.stub else ''}"
    failure = None  # that no cell's output tells: a timeout, a dead kernel
    with _start_kernel(task) as kernel:
        log.debug("%s: kernel started after %.1f s", where, time.perf_counter() - started)
        try:
            execute_notebook(
                task.notebook,
                kernel.notebook,
                km=kernel.manager,
                cwd=kernel.folder,
                progress_bar=False,
                execution_timeout=task.timeout,
                iopub_timeout=60,  # a cell's last figures may take a while on a busy machine
                allow_errors=task.stub or not _has_triton(),
                skip_cells_with_tag=EXPERIMENT if task.stub else "",
                on_cell_executed=count_cell,
            )
        except PapermillExecutionError:
            pass  # the notebook that papermill wrote says what happened, and where
        except CellTimeoutError:
            failure = {"kind": "timeout", "message": f"ran longer than {task.timeout:g} s"}
        except RuntimeError as error:  # nbclient's for a kernel that died, or that never answered
            code = kernel.find_exit_code()
            failure = {"kind": "dead kernel", "message": f"{error} ({_describe_ending(code)})"}
        seconds = time.perf_counter() - started
        gpu_bytes = _ask_gpu_memory(kernel.manager) if failure is None else None
        peak = kernel.measure_peak_memory()
        log.debug(
            "%s: %s after %.1f s, %d MiB at most",
            where,
            failure["message"] if failure else "ended",
            seconds,
            peak / 2**20,
        )
        if failure:
            kernel.end()
            failure["traceback"] = kernel.read_log()
        # papermill saves after every cell: in the private folder, so that two runs at once cannot mix.
        notebook = nbformat.read(kernel.notebook, as_version=4)

    for path in ("input_path", "output_path"):
        notebook.metadata.papermill.pop(path, None)  # of this machine
    notebook.metadata.setdefault("llm40", {})["run"] = task.made_with
    Path(task.output).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, task.output)
    notebook.cells = [cell for cell in notebook.cells if _MARKER not in cell.metadata.get("tags", [])]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    record = {
        "key": task.key,
        "seconds": round(seconds, 2),
        "peak_bytes": peak,
        "gpu_bytes": gpu_bytes,
        **(_judge_stub(cells, failure) if task.stub else _judge_solution(cells, failure)),
    }
    if not task.stub:
        experiments = sum(_get_duration(cell) for cell in cells if EXPERIMENT in cell.metadata.get("tags", []))
        record["grading_seconds"] = round(seconds - experiments, 2)
    return record


# Findings -----------------------------------------------------------------------------------------------------------


def _judge_solution(cells: list, failure: dict | None) -> dict:
    """Status, checks, figures and the slowest cell of an executed solution.

    papermill calls a notebook a success when a cell called `sys.exit(0)` and the rest never ran; here every cell must
    have run, and without an error.
    """
    broken = _find_broken(cells, failure) or _find_noisy_check(cells)
    lost = _find_last_started(cells) if failure else None  # it began, so it has an execution count, but never ended
    checks = [cell for cell in cells if is_check(cell)]
    passed = [
        cell for cell in checks if cell.execution_count is not None and not _find_error(cell) and cell is not lost
    ]
    slowest = max(cells, key=_get_duration, default=None)
    return {
        "status": "failed" if broken else "ok",
        "failures": [broken] if broken else [],
        "checks": len(checks),
        "checks_passed": len(passed),
        "left_out": [_name_cell(cell, cells) for cell in _find_left_out(cells)],
        "points": sum(_get_points(cell) for cell in passed),
        "max_points": sum(_get_points(cell) for cell in checks),
        "figures": sum(_count_figures(cell) for cell in cells),
        "slowest": slowest
        and {
            "cell": _name_cell(slowest, cells),
            "seconds": round(_get_duration(slowest), 2),
            "line": _find_first_line(slowest.source),
        },
    }


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _find_left_out(cells: list) -> list:
    """The cells that need Triton, where there is none, and those that need what these would have made."""
    left_out = []
    for cell in cells:
        error = _find_error(cell)
        if error and (NO_TRITON in error.evalue or (left_out and error.ename == "NameError")):
            left_out.append(cell)
    return left_out


def _find_broken(cells: list, failure: dict | None) -> dict | None:
    """The first cell with an error, or the one at which the kernel was lost, or the first one that never ran."""
    left_out = set(map(id, _find_left_out(cells)))
    for cell in cells:
        error = _find_error(cell)
        if error and id(cell) not in left_out:
            left = sum(other.execution_count is None for other in cells)
            message = f"{error.ename}: {error.evalue}"
            if error.ename == "SystemExit" and left:
                message = f"sys.exit ended the run here; cells that never ran after it: {left}"
            return _describe_failure(cell, cells, "error", message, "\n".join(error.traceback))
    if failure:
        return _describe_failure(
            _find_last_started(cells), cells, failure["kind"], failure["message"], failure["traceback"]
        )
    missed = [cell for cell in cells if cell.execution_count is None]
    if missed:
        return _describe_failure(missed[0], cells, "not run", f"first of {len(missed)} that never ran", "")
    return None


def _find_noisy_check(cells: list) -> dict | None:
    """The first check that passes and would lose points by nbgrader's own rule, which its Validate button tells too.

    To nbgrader a word on standard error, a warning say, is a failure, and a value that a cell shows is a score.
    """
    for cell in filter(is_check, cells):
        for output in cell.outputs:
            if output.get("name") == "stderr" or output.output_type == "execute_result":
                said = output.get("text") or output.get("data", {}).get("text/plain", "")
                message = f"nbgrader takes what this check writes for a failure or a score: {said.strip()}"
                return _describe_failure(cell, cells, "not silent", message, "")
    return None


def _find_last_started(cells: list):
    return next((cell for cell in reversed(cells) if cell.metadata.get("papermill", {}).get("start_time")), None)


def _judge_stub(cells: list, failure: dict | None) -> dict:
    """A stub is sound when every check fails on it and nothing else does, except an exercise's NotImplementedError."""
    failures = []
    lost = _find_last_started(cells) if failure else None
    if failure:
        failures.append(_describe_failure(lost, cells, failure["kind"], failure["message"], failure["traceback"]))
    cells_run = [cell for cell in cells if EXPERIMENT not in cell.metadata.get("tags", [])]
    for cell in cells_run:
        error = _find_error(cell)
        if cell is lost:
            continue
        if cell.execution_count is None:
            if not failure:
                failures.append(_describe_failure(cell, cells, "not run", "the cell never ran", ""))
        elif is_check(cell):
            if not error:
                message = "the check passes on the stub: it cannot tell an answer from none"
                failures.append(_describe_failure(cell, cells, "check passes", message, ""))
        elif error and not (is_exercise(cell) and error.ename == "NotImplementedError"):
            message = f"{error.ename}: {error.evalue}"
            failures.append(_describe_failure(cell, cells, "error", message, "\n".join(error.traceback)))
    checks = [cell for cell in cells_run if is_check(cell)]
    return {
        "status": "failed" if failures else "ok",
        "failures": failures,
        "checks": len(checks),
        "checks_failing": sum(bool(_find_error(cell)) for cell in checks),
    }


def _describe_failure(cell, cells: list, kind: str, message: str, traceback: str) -> dict:
    return {
        "kind": kind,
        "cell": _name_cell(cell, cells) if cell else "before the first cell",
        "message": strip_colors(message),
        "source": cell.source if cell else "",
        "traceback": traceback,
    }


def is_check(cell) -> bool:
    """nbgrader's autograder test: gives points, and is not the learner's to write."""
    mark = cell.metadata.get("nbgrader", {})
    return bool(mark.get("grade")) and not mark.get("solution")


def is_exercise(cell) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def _choose_label(cell) -> str:
    """The cell's name, or its first line."""
    name = cell.metadata.get("nbgrader", {}).get("grade_id")
    return name or (_find_first_line(cell.source) if cell.source.strip() else "")


def _describe_error(cell) -> str:
    error = _find_error(cell)
    return f"{error.ename}: {error.evalue}" if error else ""


def _get_points(cell) -> float:
    return cell.metadata.get("nbgrader", {}).get("points", 0)


def _name_cell(cell, cells: list) -> str:
    """`sdpa-check-1 (code cell 7 of 40)`, or `code cell 7 of 40` where a cell has no name."""
    name = cell.metadata.get("nbgrader", {}).get("grade_id")
    number = next(index for index, other in enumerate(cells, start=1) if other is cell)
    return f"{name} (code cell {number} of {len(cells)})" if name else f"code cell {number} of {len(cells)}"


def _find_error(cell):
    return next((output for output in cell.outputs if output.output_type == "error"), None)


def _get_duration(cell) -> float:
    return cell.metadata.get("papermill", {}).get("duration") or 0.0


def _count_figures(cell) -> int:
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in cell.outputs)


def _find_first_line(source: str) -> str:
    """The first line that is neither blank nor a comment; the first line of all where there is no other."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(("#", "%"))), lines[0])


def _describe_ending(code: int | None) -> str:
    if code is None:
        return "still running, but silent"
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


# The kernel -----------------------------------------------------------------------------------------------------------


class _PapermillKernel:
    """A running kernel, its private folder, and the most memory it was ever seen to hold."""

    def __init__(self, manager, folder: str):
        self.manager = manager
        self.folder = folder
        self.notebook = os.path.join(os.path.dirname(folder), "executed.ipynb")
        self._peak = 0
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        # Repeated, because a kernel that dies takes its figure with it.
        while not self._ended.wait(0.2):
            self.measure_peak_memory()

    def measure_peak_memory(self) -> int:
        """Bytes of resident memory at the kernel's peak; Linux keeps the peak itself, elsewhere it is sampled."""
        with suppress(Exception):  # the process may be gone at any moment
            self._peak = max(self._peak, _read_peak_memory(self.manager.provisioner.pid))
        return self._peak

    def read_log(self) -> str:
        """The last lines that the kernel's process itself wrote: why it did not start, for one."""
        text = Path(self.folder, "kernel.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-40:])

    def find_exit_code(self) -> int | None:
        """None while it runs."""
        process = self.manager.provisioner and self.manager.provisioner.process
        return process.poll() if process else None

    def end(self) -> None:
        """Kill the kernel and all that it started, now."""
        self._ended.set()
        _kill(self.manager)


def _kill(manager) -> None:
    process = manager.provisioner and manager.provisioner.process
    if not process:  # it was never started
        return
    if hasattr(os, "killpg") and isinstance(process, Popen):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the launcher made it the leader of its own group
    with suppress(ProcessLookupError):
        process.kill()
    process.wait(10)


@contextmanager
def _start_kernel(task: RunTask) -> Iterator[_PapermillKernel]:
    """A kernel in a private empty folder, with nothing of the user's IPython; dead when the block is left."""
    from jupyter_core.utils import run_sync

    kernels = Kernels(sandbox=False, warm=bool(task.warm), address=task.warm)
    with tempfile.TemporaryDirectory(prefix="llm40-run-", ignore_cleanup_errors=True) as home, kernels() as km:
        folder = Path(home, "work")
        folder.mkdir()
        env = {
            "TRITON_CACHE_DIR": os.path.join(home, "triton"),  # unless told another: kernels made before are used
            **os.environ,
            "IPYTHONDIR": os.path.join(home, "ipython"),
        }
        kernel = None
        try:
            with open(folder / "kernel.log", "wb") as log:
                run_sync(km.start_kernel)(
                    env=env,
                    cwd=str(folder),
                    stdout=log,
                    stderr=log,
                    extra_arguments=["--HistoryManager.hist_file=:memory:"],
                )
            kernel = _PapermillKernel(km, str(folder))
            yield kernel
        finally:
            kernel.end() if kernel else _kill(km)


def _read_peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(found.group(1)) * 1024 if found else 0
    import psutil

    return psutil.Process(pid).memory_info().rss


def _ask_gpu_memory(manager) -> int | None:
    """The most bytes that PyTorch held on the GPU, from the kernel itself; None where it does not answer."""
    from jupyter_core.utils import run_sync

    client = manager.client()
    client.start_channels()
    try:
        run_sync(client.wait_for_ready)(timeout=10)
        reply = run_sync(client.execute_interactive)(
            "",
            silent=True,
            store_history=False,
            user_expressions={"bytes": _QUESTION},
            timeout=10,
            output_hook=lambda message: None,
        )
        return int(reply["content"]["user_expressions"]["bytes"]["data"]["text/plain"])
    except (RuntimeError, TimeoutError, KeyError, ValueError):
        return None
    finally:
        client.stop_channels()
