"""Tasks over processes. Results come back as they are ready, to the one who writes them down.

This is the seam for other engines: anything that maps `grade` over tasks and yields results.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from autograder.grading.task import Result, Task, grade

Engine = Callable[[Iterable[Task], int], Iterator[Result]]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: Iterable[Task], jobs: int) -> Iterator[Result]:
    """A result for every task, in the order in which they end, from `jobs` processes.

    Tasks are taken from the iterable only as processes become free, so a class need not fit in memory. A process that
    is lost (killed for memory, say) costs nothing but time: its tasks run again, each alone; one that is lost there
    twice is answered with a `fault`.
    """
    tasks = iter(tasks)
    unanswered: dict[Task, None] = {}
    others = set(multiprocessing.active_children())
    while True:
        with _pool(jobs) as pool:
            running: dict[Future, Task] = {}

            def feed(count: int, pool=pool, running=running) -> None:
                for task in islice(tasks, count):
                    unanswered[task] = None
                    running[pool.submit(_work, task)] = task

            try:
                feed(jobs + 1)
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        del unanswered[running.pop(future)]
                        yield result
                        feed(1)
                return
            except BrokenProcessPool:
                pass
            except BaseException:  # interrupted, or the writer failed: what has not begun never will
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise
        for task in unanswered:
            yield _alone(task)
        unanswered.clear()


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Not forked from here: this process has threads (the progress bar's, the database's), and a fork copies their
    # locks. A fork server has none; it pays for the imports (2.5 s) once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["autograder.grading.task"])
    return ProcessPoolExecutor(jobs, mp_context=context)


def _work(task: Task) -> Result:
    """Grades a task in a worker; told to end meanwhile, the worker takes its kernel and its folder with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return grade(task)
    except KeyboardInterrupt:
        os._exit(1)  # an exception would be sent back, and the next task begun
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _alone(task: Task) -> Result:
    """A task whose worker was lost, maybe through a neighbor's fault: two more attempts, with nobody beside it."""
    for _ in range(2):
        with _pool(1) as pool:
            try:
                return pool.submit(_work, task).result()
            except BrokenProcessPool:
                pass
    reason = "the process that graded it was lost again and again: was it killed for want of memory?"
    return Result(task.student, task.stage, task.lesson, "fault", flags=[reason])
