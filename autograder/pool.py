"""Tasks in processes of their own, several at once."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Item = TypeVar("Item")
END_TIMEOUT = 10.0  # seconds that a process has to end by itself, after its result or a SIGTERM


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Crash:
    """The result of a task whose process ended without one."""

    exit_code: int | None


def run_each(
    work: Callable[[Item, Connection], None],
    tasks: Sequence[Item],
    jobs: int,
    preload: Sequence[str] = (),
    on_progress: Callable[[Item, Any], None] = lambda task, value: None,
) -> Iterator[tuple[Item, Any]]:
    """Call `work(task, channel)` for each task in a process of its own, `jobs` at once; yields (task, result).

    `work` sends ("progress", value) as often as it likes, which reaches `on_progress` in some thread, and
    ("done", result) at the end. A process that ends without it gives a Crash, and hurts no other. Closing the
    generator, or an exception in its caller, terminates every process. `preload` names modules that are imported
    once, where processes can be forked.
    """
    # Processes are forked from a server that starts clean, so that no thread of this process is forked.
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(list(preload))
    running: set[BaseProcess] = set()
    lock = threading.Lock()
    stopping = False

    def run(task: Item) -> Any:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(task, sender), daemon=True)
        with lock:
            if stopping:
                return None
            process.start()
            running.add(process)
        sender.close()
        try:
            while True:
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process.join()
                    return Crash(process.exitcode)
                if kind == "done":
                    return value
                on_progress(task, value)
        finally:
            receiver.close()
            process.join(END_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()
            with lock:
                running.discard(process)

    with ThreadPoolExecutor(jobs, thread_name_prefix="run") as pool:
        futures = {pool.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            with lock:
                stopping = True
                for process in running:
                    process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
