"""Local processes, a scheduler elsewhere, and workers that are lost."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import psutil
import pytest
import tiny
from classroom import new_class, recorded, wait_until
from distributed import LocalCluster

from autograder.execute import Limits
from autograder.grading import cluster as clusters_of_dask
from autograder.grading import fingerprint
from autograder.grading import grade as grading
from autograder.grading.engine import NoScheduler, run_tasks
from autograder.grading.grade import grade_class
from autograder.grading.masters import make_sent_master
from autograder.grading.task import Task, grade_task

pytestmark = pytest.mark.xdist_group("engine")
WHERE = "import os\nprint('ran at', os.environ.get('LLM40_WHERE'))"


def tasks(count: int, **options) -> list[Task]:
    master = nbformat.writes(make_sent_master(tiny.master())).encode()
    notebook = tiny.answered()
    notebook.cells.append(tiny.added(WHERE))
    data = tiny.dumps(notebook)
    options = {"kernels": tiny.KERNELS} | options
    return [Task(f"s{i}", tiny.STAGE, tiny.LESSON, data, master, **options) for i in range(count)]


def place(result) -> str:
    cells = nbformat.reads(result.notebook.decode(), as_version=4).cells
    return next(cell for cell in cells if cell.source == WHERE).outputs[0].text


def test_two_workers_that_share_nothing_but_the_network(tmp_path, cluster):
    """They give the gradebook that one process alone gives, and each of them does its part."""
    made = new_class(tmp_path / "class", 6)
    local = made.grade(engine=lambda tasks, jobs: map(grade_task, tasks), out=made.folder / "alone")
    scores = made.grade(engine=lambda tasks, jobs: run_tasks(tasks, jobs, cluster.address))
    assert scores == local == made.expected
    books = [recorded(f"sqlite:///{made.folder / out / 'gradebook.db'}") for out in ("out", "alone")]
    assert books[0] == books[1] == made.expected
    places = [place(result) for result in run_tasks(tasks(6), 1, cluster.address)]
    for worker in cluster.workers:
        assert any(worker.name in text for text in places), places


def test_a_worker_is_killed(cluster):
    """Its task runs again on the other; nobody loses anything."""
    results = run_tasks(tasks(6), 1, cluster.address)
    first = next(results)
    cluster.workers[0].kill()
    rest = list(results)
    assert sorted(r.student for r in [first, *rest]) == [f"s{i}" for i in range(6)]
    assert {r.status for r in [first, *rest]} == {"graded"}


def test_a_worker_with_other_code(cluster):
    """Workers that would grade by other rules are found out: their answer is a fault, not a score."""
    found = fingerprint.find_versions()
    result = clusters_of_dask._grade_in_worker(tasks(1)[0], found | {"torch": "1.0"})
    assert result.status == "fault"
    assert f"torch {found['torch']}, not 1.0" in result.flags[0]


def test_no_scheduler_there():
    with pytest.raises(NoScheduler, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"):
        next(run_tasks(tasks(1), 1, "tcp://127.0.0.1:1", patience=1))


def test_no_scheduler_is_a_sentence_and_exit_2(tmp_path, monkeypatch, capsys):
    made = new_class(tmp_path / "build", 1)
    monkeypatch.setattr(grading, "ROOT", tmp_path)
    nobody = partial(run_tasks, scheduler="tcp://127.0.0.1:1", patience=1)
    assert grade_class(made.folder / "in", made.out, engine=nobody, unsafe=tiny.UNSAFE) == 2
    assert "Nothing graded: no Dask scheduler answers" in capsys.readouterr().err


# --- few tasks ------------------------------------------------------------------------------------------------


def test_few_tasks_need_no_cluster(monkeypatch):
    monkeypatch.setattr(clusters_of_dask, "run_in_cluster", None)
    assert {result.status for result in run_tasks(iter(tasks(2)), 2)} == {"graded"}
    assert [result.status for result in run_tasks(iter(tasks(1)), 2)] == ["graded"]
    assert list(run_tasks(iter(()), 2)) == []


def test_who_stops_waiting_stops_them():
    """Ctrl-C, say: what runs in threads ends with its kernels, long before its limit."""
    endless = replace(tasks(1)[0], submission=tiny.dumps(tiny.answered(double="while True:\n    pass\n")))
    results = run_tasks(iter([tasks(1)[0], replace(endless, limits=Limits(cell=300, notebook=300))]), 2)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 30


def test_grading_imports_no_torch_and_one_notebook_no_dask():
    code = (
        "import sys, autograder.cli, autograder.grading.grade\n"
        "print(sorted({'torch', 'distributed', 'dask'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- lost workers of this machine -----------------------------------------------------------------------------


def lose_the_worker(limits):
    os.kill(os.getpid(), signal.SIGKILL)


class LoseOnce:
    """The first kernel asked for costs the worker, the second is an ordinary one."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __call__(self, limits):
        if not self.marker.exists():
            self.marker.touch()
            lose_the_worker(limits)
        return tiny.KERNELS(limits)


def test_lost_once_runs_again_lost_twice_is_quarantined(tmp_path):
    kernels = {"once": LoseOnce(tmp_path / "marker"), "always": lose_the_worker, "never": tiny.KERNELS}
    given = [replace(tasks(1, kernels=make)[0], student=name) for name, make in kernels.items()]
    results = {result.student: result for result in run_tasks(iter(given), 2)}
    assert {who: r.status for who, r in results.items()} == {"once": "graded", "always": "fault", "never": "graded"}
    assert results["always"].flags[0].startswith("quarantined: the process that graded it was lost again and again")
    assert results["always"].score == 0
    assert results["always"].checks == []


def test_workers_that_nobody_replaces(monkeypatch):
    """Dask gives a worker up that is lost while it starts: then the cluster itself is asked for another."""
    clusters = []

    class Seen(LocalCluster):
        def __init__(self, **options):
            super().__init__(**options)
            clusters.append(self)

    monkeypatch.setattr(clusters_of_dask, "LocalCluster", Seen)
    results = run_tasks(iter(tasks(6)), 2)
    next(results)
    for nanny in list(clusters[0].workers.values()):  # as after a start that failed
        clusters[0].loop.add_callback(nanny.close)
    assert {result.status for result in results} == {"graded"}


def test_tasks_are_read_as_workers_become_free():
    """A class of thousands need not fit in memory."""
    read = []

    def slowly():
        for task in tasks(8):
            read.append(task.student)
            yield task

    results = run_tasks(slowly(), 2)
    next(results)
    assert len(read) <= 4
    assert len(list(results)) == 7


def a_worker_or_kernel(process: psutil.Process) -> bool:
    """Whether it runs; Python's own resource tracker stays for as long as we do."""
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_nothing_is_left_behind(monkeypatch):
    """Neither processes nor the folder in which the workers had theirs."""
    folders = []

    class Seen(TemporaryDirectory):
        def __init__(self, **options):
            super().__init__(**options)
            folders.append(Path(self.name))

    monkeypatch.setattr(clusters_of_dask, "TemporaryDirectory", Seen)
    us = psutil.Process()
    before = set(us.children(recursive=True))
    results = run_tasks(iter(tasks(3)), 2)
    next(results)
    assert any(folders[0].iterdir())
    during = {child for child in set(us.children(recursive=True)) - before if a_worker_or_kernel(child)}
    assert during
    assert len(list(results)) == 2
    wait_until(lambda: not any(map(a_worker_or_kernel, during)), 20, "processes are left")
    assert not folders[0].exists()
