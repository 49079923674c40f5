"""The warm process and what is forked from it."""

import asyncio
import os
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from box import LIMITS, SANDBOX, printed

from autograder.execute import Step, execute
from autograder.kernels import forking
from autograder.kernels.forking import ROOT, WarmProcess, make_kernel_environment
from autograder.kernels.manager import Kernels
from autograder.kernels.sandbox import make_sandbox_environment
from autograder.kernels.warm import FEW

pytestmark = pytest.mark.skipif(not forking.CAN_FORK, reason="kernels are forked on Linux only")
LOADED = "import sys; print([name in sys.modules for name in ('torch', 'matplotlib.pyplot', 'seaborn', 'numpy')])"


def state(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.fixture(scope="module")
def warm():
    """A warm process with everything, that has given some kernels already, and kernels from it without a sandbox."""
    with closing(WarmProcess({**os.environ, "PYTHONPATH": str(ROOT), "LLM40_PROFILE": "cpu"})) as warm:
        kernels = Kernels(sandbox=False, address=warm.address)
        for _ in range(FEW):
            loaded = printed(execute([Step(LOADED)], managers=kernels)[0])
            assert loaded in ("[True, True, False, True]\n", "[True, True, True, True]\n")  # seaborn can wait
        assert printed(execute([Step(LOADED)], managers=kernels)[0]) == "[True, True, True, True]\n"
        yield warm, kernels


def test_it_only_imports(warm):
    """One thread, no zmq context, no CUDA: what would not survive a fork is not there."""
    process = warm[0].process.pid
    assert state(process)["Threads"] == "1"
    links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()]
    assert not any(link.startswith(("anon_inode:[event", "/dev/nvidia")) for link in links)


def test_a_kernel_from_it_starts_at_once(warm):
    """Start, one cell, end: 0.2 s on a quiet machine; an ordinary start and the imports take 2.5 s."""

    def seconds() -> float:
        began = time.monotonic()
        assert execute([Step("import torch, seaborn")], managers=warm[1])[0].status == "ok"
        return time.monotonic() - began

    assert statistics.median(seconds() for _ in range(3)) < 1.0


def test_lessons_find_what_they_expect(warm):
    """The interpreter of Triton, one thread, figures in the notebook."""
    cells = [
        "import torch, triton; from llm40 import profile; print(profile.name, profile.interpret)",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
        "import os, sys; print(sys.argv[0], os.environ['MPLBACKEND'], '' in sys.path, '/' in sys.path)",
    ]
    first, figure, third = execute([Step(cell) for cell in cells], managers=warm[1])
    assert printed(first) == "cpu True\n"
    assert "image/png" in figure.outputs[-1]["data"]
    assert printed(third) == "ipykernel_launcher.py module://matplotlib_inline.backend_inline True False\n"


def test_every_kernel_draws_its_own_numbers(warm):
    draw = Step("import random, numpy, uuid; print(random.random(), numpy.random.rand(), uuid.uuid4())")
    first, second = (printed(execute([draw], managers=warm[1])[0]).split() for _ in range(2))
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_every_kernel_has_its_own_triton_cache():
    show = Step("import os; print(os.environ['TRITON_CACHE_DIR'])")
    caches = {printed(execute([show], LIMITS, managers=Kernels(sandbox=False, libraries=()))[0]) for _ in range(2)}
    assert len(caches) == 2


def test_hashes_are_those_of_the_seed():
    """Python reads PYTHONHASHSEED when it starts: another seed is another warm process."""
    show = [Step("print(hash('a word'))")]
    hashes = [printed(execute(show, LIMITS, seed, SANDBOX["forked"])[0]) for seed in (1, 2, 1)]
    assert hashes[0] == hashes[2] != hashes[1]
    environment_of_1 = {**os.environ, "PYTHONHASHSEED": "1"}
    fresh = subprocess.run([sys.executable, "-c", "print(hash('a word'))"], env=environment_of_1, capture_output=True)
    assert fresh.stdout.decode() == hashes[0]


def test_it_ends_with_whoever_started_it():
    """Killed, it could clean nothing up; the kernel that is at work goes too."""
    program = (
        "import os, sys, time\n"
        "from autograder.kernels.forking import WarmProcess\n"
        "warm = WarmProcess(dict(os.environ), ())\n"
        "print(warm.process.pid, warm.address, flush=True)\n"
        "time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) as owner:
        process, address = owner.stdout.readline().split()
        owner.kill()
    ends = time.monotonic() + 20
    while Path(f"/proc/{process}").exists() and state(int(process))["State"][0] != "Z":
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert not Path(address).parent.exists()


@pytest.mark.parametrize("sandbox", [True, False])
def test_without_it_kernels_start_all_the_same(monkeypatch, sandbox):
    """It cannot be reached, or it dies, or it cannot enter the sandbox: an ordinary start follows, by itself."""
    steps = [Step("print('here')")]
    nowhere = Kernels(sandbox, address="/nowhere", libraries=())
    assert printed(execute(steps, LIMITS, managers=nowhere)[0]) == "here\n"
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    with closing(WarmProcess(dict(os.environ), ())) as dead:
        monkeypatch.undo()
        address = Kernels(sandbox, address=dead.address, libraries=())
        assert printed(execute(steps, LIMITS, managers=address)[0]) == "here\n"
    assert not Path(dead.address).parent.exists()


def test_a_new_one_takes_the_place_of_one_that_was_killed():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    address = forking.find_own_warm(env, ())
    assert forking.find_own_warm(env, ()) == address
    (killed,) = [warm for warm in forking._warm.values() if warm.address == address]
    killed.process.kill()
    killed.process.wait()
    assert forking.find_own_warm(env, ()) != address
    assert not Path(address).parent.exists()


def test_a_kernel_can_be_restarted():
    """jupyter_client's own restart: same connection file, same sockets, another process."""

    async def restarted(manager, folder: Path) -> list[str]:
        env = make_kernel_environment(folder, 0)
        await manager.start_kernel(cwd=str(folder), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels(hb=False)
        told = []
        try:
            for _ in range(2):
                await client.wait_for_ready(timeout=20)
                reply = await client.execute_interactive(
                    "x = globals().get('x', 0) + 1", user_expressions={"x": "x"}, output_hook=lambda message: None
                )
                told.append(reply["content"]["user_expressions"]["x"]["data"]["text/plain"])
                await manager.restart_kernel(now=True)
                assert await manager.is_alive()
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)
        assert not await manager.is_alive()
        return told

    for kernels in SANDBOX.values():
        with kernels(LIMITS) as manager:
            assert asyncio.run(restarted(manager, Path("/tmp"))) == ["1", "1"]


def test_the_whole_start_of_a_graded_kernel():
    """With everything imported, in the sandbox, as grading starts it."""
    kernels = Kernels()
    steps, limits = [Step("import torch, triton, matplotlib.pyplot")], replace(LIMITS, start=120)
    execute(steps, limits, managers=kernels)
    began = time.monotonic()
    assert execute(steps, limits, managers=kernels)[0].status == "ok"
    assert time.monotonic() - began < 1.5


def test_what_it_is_told_of_our_environment():
    """Its own first environment stays readable in every kernel, as /proc/self/environ."""
    kept = forking.choose_early(
        make_sandbox_environment({"AWS_SECRET_ACCESS_KEY": "hunter2", "LANG": "C.UTF-8"}, LIMITS)
    )
    assert "AWS_SECRET_ACCESS_KEY" not in kept
    assert kept["LANG"] == "C.UTF-8"
    assert "HOME" not in kept  # the sandbox's: outside of it anyone could put a folder there
