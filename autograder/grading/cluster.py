"""Spreads tasks over processes and machines, by Dask. Results come back as they are ready, to the gradebook's writer.

Without an address a cluster of this machine's own is started; with one (`tcp://host:8786`) the tasks go to the workers
of that scheduler, whoever started them. A task and its result are bytes: the workers share nothing with the grader but
the network. Dask replaces a worker that is lost and runs its task again; a task that loses its worker twice is
quarantined: it runs once more with nothing beside it, and then its result is a `fault`, with no score.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from tempfile import TemporaryDirectory

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed
from tornado.ioloop import PeriodicCallback

from autograder.grading.engine import NoScheduler
from autograder.grading.fingerprint import find_versions
from autograder.grading.task import Result, Task, grade_task

ALLOWED_LOSSES = 1  # Dask gives a task up when it has lost more workers than this

SETTINGS = {
    "distributed.scheduler.allowed-failures": ALLOWED_LOSSES,
    "distributed.worker.daemon": False,  # workers have children: kernels
    "distributed.admin.low-level-log-length": 10,  # messages kept for debugging: here each is a notebook and its master
}


def run_in_cluster(tasks: Iterable[Task], jobs: int, scheduler: str | None, patience: float) -> Iterator[Result]:
    """As engine.run_tasks, whatever the number of tasks."""
    tasks, number = iter(tasks), count()
    with _open_client(jobs, scheduler, patience) as client:
        running, suspects = {}, []
        done = as_completed(loop=client.loop)

        def submit(task: Task) -> Future:
            name = f"{task.student}/{task.stage}/{task.lesson}"
            return client.submit(_grade_in_worker, task, find_versions(), key=f"{name}-{next(number)}", pure=False)

        def feed(room: int) -> None:
            for task in islice(tasks, room):
                future = submit(task)
                running[future.key] = task
                done.add(future)

        # One task more than there are workers: there is always one at hand, whatever the network takes.
        feed(sum(client.ncores().values()) + 1)
        for future in done:
            task = running.pop(future.key)
            if isinstance(future.exception(), KilledWorker):
                suspects.append(task)
            else:
                yield _wait_for_result(task, future)
            future.release()
            feed(1)
        # Dask blames whatever waited at a worker that was lost: each of them again, with nothing beside it.
        for task in suspects:
            yield _wait_for_result(task, submit(task))


def _grade_in_worker(task: Task, expected: dict[str, str]) -> Result:
    """Grades a task in a worker, if its course and libraries are the grader's."""
    here = find_versions()
    other = [f"{name} {here.get(name)}, not {wanted}" for name, wanted in expected.items() if here.get(name) != wanted]
    if other:
        flag = "the worker differs from the grader: " + "; ".join(other)
        return Result(task.student, task.stage, task.lesson, "fault", flags=[flag])
    return grade_task(task)


def _wait_for_result(task: Task, future: Future) -> Result:
    """A task's result, waited for; a fault if there is none."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, KilledWorker):
        reason = "quarantined: the process that graded it was lost again and again; was it killed for want of memory?"
    else:
        reason = f"the grader failed: {type(error).__name__}: {error}"
    return Result(task.student, task.stage, task.lesson, "fault", flags=[reason])


@contextmanager
def _open_client(jobs: int, scheduler: str | None, patience: float):
    """A client of the scheduler asked for, or of a cluster that lives as long as it is needed."""
    # A lost worker and a closed connection are told in results; Dask would tell them in the middle of the progress bar.
    for name in ("distributed", "distributed.worker", "distributed.nanny", "distributed.scheduler", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler:
        try:
            client = Client(scheduler, timeout=patience, set_as_default=False)
        except (OSError, ValueError) as error:
            raise NoScheduler(f"no Dask scheduler answers at {scheduler}: {error}") from error
        with client:
            if not client.ncores():
                print(f"Waiting for a worker of {scheduler}: dask worker {scheduler} starts one.", file=sys.stderr)
            try:
                client.wait_for_workers(1, timeout=patience)
            except TimeoutError as error:
                raise NoScheduler(f"the scheduler at {scheduler} has no worker after {patience:.0f} s") from error
            yield client
        return
    # However a worker ends, the files that it and its kernels left go with this folder.
    with dask.config.set(SETTINGS), TemporaryDirectory(prefix="llm40-", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            memory_limit=0,  # kernels are processes of their own, with limits of their own
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=folder,
            env={"TMPDIR": folder},
            preload="autograder.grading.task",
            silence_logs=logging.CRITICAL,
        )
        # A worker that is lost while it starts is not replaced until somebody asks for the number there should be.
        keeper = PeriodicCallback(lambda: cluster.scale(jobs), 1000)
        with cluster, Client(cluster, set_as_default=False) as client:
            cluster.loop.add_callback(keeper.start)
            try:
                yield client
            finally:
                cluster.loop.add_callback(keeper.stop)
