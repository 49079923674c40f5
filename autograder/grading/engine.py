"""Tasks graded: a few in threads of this process, many in processes or on machines of their own (grading/cluster).

A task needs none of them: in its own processes, kernels, the learner's code runs. So what starts for a class takes
seconds, and nothing of it is started, or imported, for one notebook.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from autograder.execute import stop_all
from autograder.grading.task import Result, Task, grade_task
from autograder.kernels.forking import make_kernel_environment
from autograder.kernels.manager import Kernels

Engine = Callable[[Iterable[Task], int], Iterator[Result]]


class NoScheduler(RuntimeError):
    """The scheduler does not answer, or has no worker."""


def run_tasks(
    tasks: Iterable[Task], jobs: int, scheduler: str | None = None, patience: float = 60.0
) -> Iterator[Result]:
    """A result for every task, in the order in which they end.

    The workers of `scheduler` work on them, or `jobs` processes of this machine; where there are no more tasks than
    that, this process alone. Tasks are taken from the iterable only as workers become free, so a class need not fit in
    memory. NoScheduler if within `patience` seconds the scheduler does not answer or has no worker.
    """
    if not scheduler:
        tasks = map(_share_warm_process, tasks)
        first = list(islice(tasks, jobs + 1))
        if len(first) <= jobs:
            yield from _run_here(first)
            return
        tasks = chain(first, tasks)
    from autograder.grading.cluster import run_in_cluster  # half a second's import

    yield from run_in_cluster(tasks, jobs, scheduler, patience)


def _run_here(tasks: Sequence[Task]) -> Iterator[Result]:
    """All at once, each in a thread; one alone in this one, where Ctrl-C reaches it."""
    if len(tasks) <= 1:
        yield from map(grade_task, tasks)
        return
    with ThreadPoolExecutor(len(tasks)) as pool:
        try:
            for done in as_completed([pool.submit(grade_task, task) for task in tasks]):
                yield done.result()
        except BaseException:
            stop_all()
            raise


def _share_warm_process(task: Task) -> Task:
    """The task, its kernels forked from this process's own warm one, whichever worker grades it."""
    if not isinstance(task.kernels, Kernels):
        return task
    return replace(task, kernels=task.kernels.share_warm(make_kernel_environment(Path(), task.seed), task.limits))
