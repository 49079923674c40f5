"""The warm process for those who want kernels from it: they start it, know its address, and close it.

It takes seconds to import the libraries of lessons, so whoever will want kernels starts it before anything else: this
module imports nothing that takes time.
"""

import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

from autograder.kernels.limits import Limits
from autograder.kernels.sandbox import HOME, PRIVATE, find_gpus, find_sandbox_trouble, make_sandbox_environment

LATER = "--later"  # to the warm process: the modules after it can wait
ROOT = Path(__file__).resolve().parents[2]
GIVEN_SEED = 40  # LLM40_SEED for given cells where checks are judged: a learner's own
# Imports of lessons; and those of ipykernel and IPython when a kernel starts, beyond their own modules.
LIBRARIES = ("numpy", "torch", "matplotlib.pyplot")
# A second each, and not every notebook's: the first optimizer of a process imports torch._dynamo.
SELDOM = ("torch._dynamo", "seaborn", "tokenizers.trainers")
# llm40 asks for a GPU when it is imported: where there may be one it is not for the warm process.
COURSE = (
    "llm40",
    "llm40.checks",
    "llm40.data",
    "llm40.plot",
    "triton",
    "autograder.judge.agent",
    "autograder.judge.court",
)
IPYTHON = (
    "ipykernel.kernelapp",
    "ipykernel.zmqshell",
    "ipykernel.debugger",
    "IPython.core.magics",
    "IPython.extensions.storemagic",
    "sqlite3",
    "faulthandler",
)
# Variables that Python and the libraries read when they start or are imported: each set has its own warm process.
EARLY = (
    "LANG",
    "LC_",
    "LD_LIBRARY_PATH",
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "LLM40_PROFILE",
    "TRITON_INTERPRET",
    "CUDA_",
    "NVIDIA_",
    "PYTORCH_",
    "TORCHINDUCTOR_",
    "PYTHON",
    "MPL",
    "XDG_",
    "PATH",
    "HOME",
)
INLINE = "module://matplotlib_inline.backend_inline"
CAN_FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")


_warm: dict[tuple, "WarmProcess"] = {}  # this process's own
_starting = threading.Lock()


def make_kernel_environment(folder: Path, seed: int) -> dict[str, str]:
    """A kernel's environment: repeatable, and blind to files in its folder and to the user's own IPython set-up."""
    return {
        # One thread per kernel: a class is graded over many kernels, and the sums do not depend on the machine.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **os.environ,
        "LLM40_SEED": str(seed),
        "PYTHONHASHSEED": str(seed % 2**32),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),  # llm40, uninstalled
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
        "IPYTHONDIR": str(folder / ".ipython"),
        "TRITON_CACHE_DIR": str(folder / ".triton"),
        "NBGRADER_EXECUTION": "autograde",
    }


class WarmProcess:
    """The warm process. Whoever on this machine knows its address can get kernels from it; they share `env`.

    It ends when it is closed, or with the process that started it.
    """

    def __init__(self, env: dict[str, str], libraries: Sequence[str] = LIBRARIES):
        env = choose_early(env)
        libraries = list(libraries)
        gpu = bool(find_gpus(env))
        if not gpu:
            env["TRITON_INTERPRET"] = "1"  # as llm40 does; Triton reads it when it is imported
        env.setdefault("MPLBACKEND", INLINE)  # as a kernel does; Matplotlib reads it when it is imported
        if libraries and not gpu:
            libraries += COURSE
        elif libraries and env.get("LLM40_PROFILE", "auto") != "auto":  # else llm40 has to decide first
            libraries.append("triton")
        modules = [*IPYTHON, *libraries, *([LATER, *SELDOM] if libraries else [])]
        self.address = os.path.join(tempfile.mkdtemp(prefix="llm40-", dir=PRIVATE), "warm")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(128)
            self.process = Popen(
                [sys.executable, "-m", "autograder.kernels.warm", str(listener.fileno()), *modules],
                env=env,
                cwd="/",
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except TimeoutExpired:  # still importing
            self.process.kill()
            self.process.wait()
        shutil.rmtree(os.path.dirname(self.address), ignore_errors=True)  # where it could not do so itself


@contextmanager
def warm_process(env: dict[str, str]) -> Iterator[str]:
    """The address of a warm process that is there for a while; empty where kernels cannot be forked."""
    if not CAN_FORK:
        yield ""
        return
    warm = WarmProcess(env)
    try:
        yield warm.address
    finally:
        warm.close()


def choose_early(env: dict[str, str]) -> dict[str, str]:
    """The warm process's environment. A sandbox's home exists only there: without one, Python asks the system."""
    chosen = {name: value for name, value in env.items() if name.startswith(EARLY)}
    return {name: value for name, value in chosen.items() if (name, value) != ("HOME", HOME)}


def find_own_warm(env: dict[str, str], libraries: Sequence[str]) -> str:
    """The address of this process's own warm process for such an environment; started when it is not there."""
    key = (*sorted(choose_early(env).items()), *libraries)
    with _starting:
        if key in _warm and _warm[key].process.poll() is not None:
            _warm.pop(key).close()
        if key not in _warm:
            _warm[key] = WarmProcess(env, libraries)
        return _warm[key].address


def start_early(limits: Limits, sandbox: bool) -> None:
    """Starts two things that grading will need, and waits for neither: the warm process, and a try of the sandbox.

    With a GPU the warm process depends on how many notebooks will share it, which nobody knows yet.
    """
    env = make_kernel_environment(Path(), GIVEN_SEED)
    if CAN_FORK and not find_gpus(env):
        find_own_warm(make_sandbox_environment(env, limits) if sandbox else env, LIBRARIES)
    if sandbox:
        threading.Thread(target=find_sandbox_trouble, daemon=True).start()
