"""However the runner ends, its kernels end with it and their sockets are gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from built_course import code

from autograder.run import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# The kernel says who it is and where its sockets are, and is then busy for ever.
BUSY = """
import os, pathlib, time
path = pathlib.Path({path!r})
path.with_suffix(".part").write_text(f"{{os.getpid()}} " + get_ipython().config["IPKernelApp"]["connection_file"])
path.with_suffix(".part").rename(path)
while True:
    time.sleep(0.1)
"""


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not yet waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    try:
        return not (status.exists() and "State:\tZ" in status.read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("how", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_kernel_outlives_the_runner(course, tmp_path, how, exit_code):
    built = course()
    notes = [tmp_path / "one", tmp_path / "two"]
    for number, note in enumerate(notes, start=1):
        built.add(f"stage1_a/0{number}_busy", [code(BUSY.format(path=str(note)))])
    program = (
        f"import signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored, if we are a shell's background job
        "from pathlib import Path\n"
        "from autograder.run import run_course\n"
        f"sys.exit(run_course(profile='cpu', jobs=2, notebooks=Path({str(built.root)!r}), out=Path({str(tmp_path)!r})))"
    )
    runner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: all(note.exists() for note in notes), 60)
        kernels = [note.read_text().split(" ", 1) for note in notes]
        assert all(alive(int(pid)) for pid, _ in kernels)
        runner.send_signal(how)
        assert runner.wait(15) == exit_code
        for pid, connection_file in kernels:
            assert wait_until(lambda pid=pid: not alive(int(pid)), 10), f"kernel {pid} outlived the runner"
            folder = Path(connection_file).parent
            assert wait_until(lambda folder=folder: not folder.exists(), 10), f"{folder} was left behind"
    finally:
        runner.kill()
