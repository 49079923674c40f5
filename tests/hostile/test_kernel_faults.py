"""Code that hangs, crashes or fills its kernel costs its own cell: the next one runs, with what was there before.

Each fault stands between a cell that sets a name and one that reads it.
"""

import os
import time
from dataclasses import replace

import pytest
from box import LIMITS, SANDBOX, gone, printed

from autograder.execute import Outcome, Step, execute

QUICK = replace(LIMITS, cell=1.5, grace=0.5)
FOREVER = "import time\nwhile True:\n    time.sleep(0.05)"
STUBBORN = """
import time
while True:
    try:
        time.sleep(0.05)
    except KeyboardInterrupt:
        pass
"""
FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
THREADS = """
import threading, time
started = []
try:
    while True:
        started.append(threading.Thread(target=time.sleep, args=(3600,), daemon=True))
        started[-1].start()
finally:
    print(len(started))
"""
DEADLOCK = """
import threading
lock = threading.Lock()
def wait():
    with lock:
        lock.acquire()
thread = threading.Thread(target=wait)
thread.start()
thread.join()
"""
FILL = """
import errno
try:
    for number in range(1000):
        with open(f"{folder}/{{number}}", "wb") as file:
            file.write(b"x" * 10**6)
except OSError as error:
    print(errno.errorcode[error.errno], number)
"""


@pytest.fixture
def fault():
    """Runs a fault between two cells; returns its outcome when the cells around it were not harmed."""

    def fault(source: str, limits=LIMITS) -> Outcome:
        steps = [Step("kept = 'before'"), Step(source), Step("print(kept)")]
        _, outcome, after = execute(steps, limits, managers=SANDBOX["forked"])
        assert printed(after) == "before\n"
        return outcome

    return fault


# --- without end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forked", "started"])
def test_an_infinite_loop_is_interrupted(how):
    """And the kernel is not even lost: the name is there though its cell is not run again."""
    steps = [Step("import time; born = time.monotonic()"), Step(FOREVER), Step("print(time.monotonic() - born > 1)")]
    _, loop, after = execute(steps, QUICK, managers=SANDBOX[how])
    assert (loop.status, loop.ename) == ("timeout", "KeyboardInterrupt")
    assert after.count == 3
    assert printed(after) == "True\n"


@pytest.mark.parametrize("how", ["forked", "started"])
def test_a_loop_that_swallows_the_interrupt(how):
    _, loop, after = execute([Step("x = 1"), Step(STUBBORN), Step("print(x)")], QUICK, managers=SANDBOX[how])
    assert loop.status == "timeout"
    assert printed(after) == "1\n"


def test_a_loop_deaf_to_interrupts(fault):
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    assert fault(deaf, QUICK).status == "timeout"


def test_a_loop_in_c(fault):
    """It never comes back to Python, where an interrupt is heard."""
    assert fault("import itertools, collections\ncollections.deque(itertools.count(), 0)", QUICK).status == "timeout"


def test_a_deadlocked_thread(fault):
    assert fault(DEADLOCK, QUICK).status == "timeout"


def test_a_kernel_that_stops_itself(fault):
    assert fault("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", QUICK).status == "timeout"


def test_a_program_that_does_not_end(fault):
    word = f"88{os.getpid()}.5"
    assert fault(f"import subprocess\nsubprocess.run(['sleep', '{word}'])", QUICK).status == "timeout"
    assert gone(word)


def test_input_that_never_comes(fault):
    outcome = fault("input()", QUICK)
    assert (outcome.status, outcome.ename) == ("error", "StdinNotImplementedError")


# --- too much -------------------------------------------------------------------------------------------------


def test_a_fork_bomb(fault):
    began = time.monotonic()
    assert fault(FORK_BOMB, replace(QUICK, processes=64)).status in ("timeout", "died")
    assert time.monotonic() < began + 30


def test_threads_without_end(fault):
    outcome = fault(THREADS, replace(LIMITS, processes=64))
    assert (outcome.status, outcome.ename) == ("error", "RuntimeError")
    assert int(outcome.outputs[0]["text"]) < 64


@pytest.mark.parametrize("source", ["x = bytearray(40 * 10**9)", "x = []\nwhile True: x.append(bytearray(10**8))"])
def test_40_gb_of_memory(fault, source):
    outcome = fault(source, replace(LIMITS, memory=1500 * 10**6))
    assert (outcome.status, outcome.ename) == ("error", "MemoryError")


def test_40_gb_in_a_tensor(fault):
    outcome = fault("import torch\ntorch.zeros(10**10)", replace(LIMITS, cell=40))
    assert (outcome.status, outcome.ename) == ("error", "RuntimeError")
    assert "can't allocate memory" in outcome.evalue


def test_a_line_of_100_mb(fault):
    outcome = fault("print('x' * 10**8)")
    assert outcome.status == "ok"
    assert "output cut" in outcome.outputs[-1]["text"]


def test_a_flood_of_lines(fault):
    outcome = fault("while True: print('x' * 1000)", QUICK)
    assert outcome.status == "timeout"
    assert sum(len(output.get("text", "")) for output in outcome.outputs) < 2 * LIMITS.output


@pytest.mark.parametrize("folder", ["/tmp", "/tmp/home", "/dev/shm"])
def test_a_full_disk(fault, folder):
    """The private folder's limit binds, and it is this kernel's alone."""
    told = printed(fault(FILL.format(folder=folder), replace(LIMITS, folder=30 * 10**6)))
    assert told.startswith("ENOSPC")
    assert int(told.split()[1]) <= (70 if folder == "/dev/shm" else 30)


def test_a_file_too_large(fault):
    outcome = fault("with open('large', 'wb') as file: file.write(b'x' * 10**7)", replace(LIMITS, file=10**6))
    assert (outcome.status, outcome.ename) == ("error", "OSError")
    assert "File too large" in outcome.evalue


def test_endless_recursion(fault):
    outcome = fault("def f(): f()\nf()")
    assert (outcome.status, outcome.ename) == ("error", "RecursionError")


def test_recursion_through_the_stack(fault):
    source = "import sys, re\nsys.setrecursionlimit(10**8)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    assert fault(source).status in ("died", "error")


# --- the end of the kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal\nos.kill(2, signal.SIGKILL)\nimport time\ntime.sleep(9)",
        "import os\nos.execv('/usr/bin/true', ['true'])",
        "exit()",
    ],
    ids=["_exit", "abort", "segfault", "SIGKILL", "its group", "everything", "the idle process", "exec", "exit()"],
)
def test_the_kernel_ends(fault, source):
    assert fault(source).status == "died"


def test_a_forked_copy_that_goes_on(fault):
    """The copy of the kernel has its sockets, too; it must not speak for the kernel, nor outlive it."""
    assert fault("import os, time\nif os.fork() == 0:\n    time.sleep(600)").status == "ok"


def test_all_files_closed(fault):
    assert fault("import os\nos.closerange(3, 4096)", QUICK).status in ("timeout", "died")


def test_the_private_folder_removed(fault):
    assert fault("import os; os.system('rm -rf /tmp/* /tmp/.*')").status == "ok"


def test_the_sockets_replaced_by_links_to_ours(fault, tmp_path):
    (tmp_path / "ours").write_text("ours")
    outcome = fault(f"""
import glob, os
for path in glob.glob("/tmp/llm40-*/s/*"):
    os.unlink(path)
    os.symlink({str(tmp_path / "ours")!r}, path)
""")
    assert outcome.status == "ok"
    assert (tmp_path / "ours").read_text() == "ours"
