"""What all processes of a kernel do together: time, memory, number."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from box import LIMITS, SANDBOX, printed

from autograder.execute import KernelLost, Limits, NotebookKernel, Step, execute, started
from autograder.kernels import group
from autograder.kernels.manager import Kernels

NOBODY = 2**22 + 1  # a number that no process has
BURN = """
import time
def burn(seconds):
    while time.process_time() < seconds:
        pass
"""
IN_CHILDREN = """
import multiprocessing
workers = [multiprocessing.get_context("fork").Process(target=burn, args=(0.5,)) for _ in range(2)]
for worker in workers: worker.start()
for worker in workers: worker.join()
"""
DETACHED = """
import subprocess, sys
busy = "import os, time; os.setsid()\\nwhile time.process_time() < 3: pass"
subprocess.Popen([sys.executable, "-S", "-c", busy])
time.sleep(1)
"""


@asynccontextmanager
async def alone(kernels: Kernels, limits: Limits = LIMITS) -> AsyncIterator[NotebookKernel]:
    """A learner's kernel without a judge."""
    async with started(kernels, limits, 0, judging=False, files={}) as pair:
        yield pair.kernel


async def measured(kernels: Kernels, *cells: str) -> list[float]:
    """CPU seconds before the first cell, and after each."""
    async with alone(kernels) as kernel:
        told = [kernel.manager.provisioner.count_cpu_seconds()]
        for cell in cells:
            assert (await kernel.run(cell, 20, 1000)).status == "ok"
            told.append(kernel.manager.provisioner.count_cpu_seconds())
    return told


@pytest.mark.parametrize("kernels", [*SANDBOX.values(), Kernels(sandbox=False, libraries=())], ids=[*SANDBOX, "unsafe"])
def test_the_time_of_processors_is_counted_for_all_processes(kernels):
    """Sleeping costs nothing; what children do is counted, whether somebody waits for them or they hide."""
    told = asyncio.run(measured(kernels, BURN, "time.sleep(1)", IN_CHILDREN, DETACHED))
    spent = [after - before for before, after in pairwise(told)]
    assert spent[1] < 0.3
    assert 0.9 < spent[2] < 2
    assert spent[3] > 0.2


# --- memory and number ----------------------------------------------------------------------------------------

SMALL = """
import subprocess, sys, time
hold = "import time; b = bytearray({size}); b[::4096] = bytes(len(b[::4096])); print(1, flush=True); time.sleep(60)"
crowd = [subprocess.Popen([sys.executable, "-S", "-c", hold], stdout=subprocess.PIPE) for _ in range({number})]
held = [process.stdout.readline() for process in crowd]
"""
CROWD = SMALL.format(number=20, size=100 * 10**6)


@pytest.fixture(params=["counted by the system", "looked at by us"])
def counting(request, monkeypatch):
    """With control groups where there are some, and as it is where there are none."""
    if request.param == "looked at by us":
        monkeypatch.setattr(group, "find_places", dict)
    elif not group.find_places():
        pytest.skip("no control groups are to be had here")


@pytest.mark.usefixtures("counting")
def test_memory_is_that_of_all_processes(kernels):
    """None of them has much; together they have twice the limit. The kernel is stopped, and it is known why."""

    async def stopped() -> tuple[str, str]:
        async with alone(kernels, replace(LIMITS, memory=1200 * 10**6)) as kernel:
            try:
                return (await kernel.run(CROWD + "time.sleep(20)", 30, 1000)).status, ""
            except KernelLost as lost:
                return lost.outcome.status, kernel.manager.provisioner.over

    assert asyncio.run(stopped()) == ("died", "more than 1200 MB of memory in all its processes")


@pytest.mark.usefixtures("counting")
def test_the_next_cell_has_a_kernel_again(run):
    limits = replace(LIMITS, memory=1200 * 10**6)
    before, crowd, after = run("kept = 1", CROWD + "time.sleep(20)", "print(kept)", limits=limits)
    assert (before.status, crowd.status, printed(after)) == ("ok", "died", "1\n")


@pytest.mark.usefixtures("counting")
def test_what_processes_share_is_counted_once(run):
    """Forked processes have the memory of their parent in common, as the kernels have that of the warm process."""
    forked = """
import os, time
shared = bytearray(300 * 10**6)
shared[::4096] = bytes(len(shared[::4096]))
for _ in range(10):
    if os.fork() == 0:
        time.sleep(20)
time.sleep(1)
"""
    assert run(forked, limits=replace(LIMITS, memory=1200 * 10**6))[0].status == "ok"


def test_memory_that_no_process_shows_is_refused_where_nobody_counts_it(kernels, monkeypatch):
    monkeypatch.setattr(group, "find_places", dict)
    cell = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
try:
    print(os.memfd_create("hidden"))
except OSError as error:
    print(errno.errorcode[error.errno])
print(libc.shmget(0, 10**8, 0o1600), errno.errorcode[ctypes.get_errno()])
"""
    assert printed(execute([Step(cell)], LIMITS, managers=kernels)[0]).split() == ["ENOSYS", "-1", "ENOSYS"]


@pytest.mark.usefixtures("counting")
def test_when_the_machine_has_no_memory_left_the_kernel_with_the_most_in_all_goes_first(kernels):
    """Not the one with the largest process: every process of the crowd is before the tensor of another student."""

    def scores(kernel) -> list[int]:
        processes = kernel.manager.provisioner.box.group
        processes.look()
        return [int(processes._read(process, "oom_score")) for process in processes._list_processes()]

    async def compared() -> tuple[list[int], list[int]]:
        async with alone(kernels) as mallory, alone(kernels) as ada:
            await mallory.run(CROWD, 60, 1000)
            await ada.run("import time; x = bytearray(400 * 10**6); x[::4096] = bytes(len(x[::4096]))", 60, 1000)
            return scores(mallory), scores(ada)

    crowd, honest = asyncio.run(compared())
    assert min(crowd) > max(honest) > 0


@pytest.mark.skipif(
    "cpu" not in group.find_places() and "unified" not in group.find_places(), reason="no control groups here"
)
def test_a_crowd_has_no_more_of_a_processor_than_one(kernels):
    """Two kernels on one core: twelve busy processes of one have at most what the busy one of the other has."""
    cores = os.sched_getaffinity(0)

    async def shares() -> tuple[float, float]:
        async with alone(kernels) as mallory, alone(kernels) as ada:
            both = [kernel.manager.provisioner for kernel in (mallory, ada)]
            busy = "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n        while True: pass"
            await mallory.run(busy, 20, 1000)
            before = [kernel.count_cpu_seconds() for kernel in both]
            await ada.run(BURN + "burn(time.process_time() + 1)", 60, 1000)
            return [after.count_cpu_seconds() - began for after, began in zip(both, before, strict=True)]

    os.sched_setaffinity(0, {min(cores)})
    try:
        crowd, honest = asyncio.run(shares())
    finally:
        os.sched_setaffinity(0, cores)
    assert 0.9 < honest < 2
    assert crowd < 1.7 * honest


def test_nothing_is_left_of_the_groups(kernels):
    """When a kernel has ended; and what a grader that was killed has left is removed by the next."""

    def groups() -> set[Path]:
        made_by = (os.getpid(), NOBODY)  # other graders on this machine have theirs meanwhile
        places = set(group.find_places().values())
        return {path for folder in places for pid in made_by for path in folder.glob(f"{group.PREFIX}{pid}-*")}

    before = groups()
    execute([Step("import os; os._exit(0)"), Step("1")], LIMITS, managers=kernels)
    assert groups() <= before
    for folder in set(group.find_places().values()):
        (folder / f"{group.PREFIX}{NOBODY}-dead").mkdir()
        group._sweep(folder)
    assert groups() <= before
