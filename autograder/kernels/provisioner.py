"""How a kernel's process is started: in a sandbox or not, forked from the warm process or not.

jupyter_client asks a provisioner for all that it does with a kernel's process
(https://jupyter-client.readthedocs.io/en/stable/provisioning.html). This one is its own LocalProvisioner with another
process in the place of subprocess's. Where no kernel can be had from the warm process, it starts an ordinary one.
"""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner
from traitlets import Bool, Dict, List, Unicode

from autograder.kernels.limits import Limits
from autograder.kernels.sandbox import CONNECTION, HOME, PRIVATE, Sandbox, gpus

# What lessons import; and what ipykernel and IPython import when a kernel starts, beyond their own modules.
# torch._dynamo is what the first optimizer of a process imports, for a second.
LIBRARIES = ("numpy", "torch", "torch._dynamo", "matplotlib.pyplot", "seaborn")
# llm40 asks for a GPU when it is imported: where there may be one it is not for the warm process.
COURSE = ("llm40.checks", "llm40.data", "llm40.plot", "triton", "tokenizers.trainers")
IPYTHON = ("ipykernel.kernelapp", "ipykernel.zmqshell", "ipykernel.debugger", "IPython.core.magics",
           "IPython.extensions.storemagic", "sqlite3", "faulthandler")  # fmt: skip
# What Python and the libraries read when they start or are imported: a warm process with other values is another one.
EARLY = ("LANG", "LC_", "LD_LIBRARY_PATH", "OMP_", "OPENBLAS_", "MKL_", "LLM40_PROFILE", "TRITON_INTERPRET", "CUDA_",
         "NVIDIA_", "PYTORCH_", "PYTHON", "MPL", "XDG_", "PATH", "HOME")  # fmt: skip
IDLE = ("sleep", "infinity")
INLINE = "module://matplotlib_inline.backend_inline"
ANSWER = 4096  # bytes at most
LAUNCHER = "ipykernel_launcher"
CAN_FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")


_warm: dict[tuple, "Warm"] = {}  # this process's own
_starting = threading.Lock()


class NotWarm(Exception):
    """No kernel is to be had from the warm process."""


class Warm:
    """The warm process. Whoever on this machine knows its address can have kernels from it; `env` is what they share.

    It ends when it is closed, or with the process that started it.
    """

    def __init__(self, env: dict[str, str], libraries: Sequence[str] = LIBRARIES):
        env = early(env)
        libraries = list(libraries)
        gpu = bool(gpus(env))
        if not gpu:
            env["TRITON_INTERPRET"] = "1"  # as llm40 does; Triton reads it when it is imported
        env.setdefault("MPLBACKEND", INLINE)  # as a kernel does; Matplotlib reads it when it is imported
        if libraries and not gpu:
            libraries += COURSE
        elif libraries and env.get("LLM40_PROFILE", "auto") != "auto":  # else llm40 has to decide first
            libraries.append("triton")
        self.address = os.path.join(tempfile.mkdtemp(prefix="llm40-", dir=PRIVATE), "warm")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(128)
            self.process = Popen(
                [sys.executable, "-m", "autograder.kernels.warm", str(listener.fileno()), *IPYTHON, *libraries],
                env=env, cwd="/", stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, pass_fds=[listener.fileno()],
                start_new_session=True,
            )  # fmt: skip

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
    warm = Warm(env)
    try:
        yield warm.address
    finally:
        warm.close()


def early(env: dict[str, str]) -> dict[str, str]:
    """What the warm process is told. A sandbox's home is nowhere else: without one, Python asks the system for ours."""
    chosen = {name: value for name, value in env.items() if name.startswith(EARLY)}
    return {name: value for name, value in chosen.items() if (name, value) != ("HOME", HOME)}


def own_warm(env: dict[str, str], libraries: Sequence[str]) -> str:
    """The address of this process's own warm process for such an environment; started when it is not there."""
    key = (*sorted(early(env).items()), *libraries)
    with _starting:
        if key in _warm and _warm[key].process.poll() is not None:
            _warm.pop(key).close()
        if key not in _warm:
            _warm[key] = Warm(env, libraries)
        return _warm[key].address


class Forked:
    """A kernel forked from the warm process, with what jupyter_client asks of a subprocess."""

    stdin = stdout = stderr = None

    def __init__(self, address: str, request: dict, files: Sequence[int], patience: float):
        self.returncode: int | None = None
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.door.settimeout(patience)  # the warm process may still be importing
            self.door.connect(address)
            socket.send_fds(self.door, [json.dumps(request).encode()], files)
            answer = json.loads(self.door.recv(ANSWER) or "{}")
        except OSError as error:
            self.door.close()
            raise NotWarm(str(error)) from error
        if "pid" not in answer:
            self.door.close()
            raise NotWarm(answer.get("error", "it has ended"))
        self.pid = answer["pid"]

    def poll(self) -> int | None:
        with suppress(TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the signal's number if one ended it."""
        if self.returncode is None:
            self.door.settimeout(timeout)
            try:
                answer = json.loads(self.door.recv(ANSWER) or "{}")
            except (TimeoutError, BlockingIOError):
                raise TimeoutExpired("kernel", timeout) from None
            except ConnectionError:
                answer = {}
            self.returncode = answer.get("exit", -signal.SIGKILL)  # silence: its doorkeeper was killed, and it too
            self.door.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the kernel and what it started, as far as that stayed in its group."""
        if self.poll() is None:
            with suppress(ConnectionError, TimeoutExpired):
                self.door.send(json.dumps({"signal": int(number)}).encode())
                if number == signal.SIGKILL:
                    self.wait(5)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Boxed:
    """A kernel in its sandbox, the program that was started there or a forked one that has joined it."""

    stdin = stdout = stderr = None

    def __init__(self, sandbox: Sandbox, forked: Forked | None = None):
        self.sandbox = sandbox
        self.forked = forked
        self.pid = forked.pid if forked else sandbox.pid

    def poll(self) -> int | None:
        codes = [process.poll() for process in (self.forked, self.sandbox.bwrap) if process]
        code = next((code for code in codes if code is not None), None)
        if code is not None:
            self.sandbox.close()  # nothing that the kernel left behind goes on
        return code

    def wait(self, timeout: float | None = None) -> int:
        code = (self.forked or self.sandbox.bwrap).wait(timeout)
        self.sandbox.close()
        return code

    def send_signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self.kill()
        elif self.forked:
            self.forked.send_signal(number)
        elif self.poll() is None:
            self.sandbox.send_signal(number)

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.sandbox.close()
        self.wait()


class Provisioner(LocalProvisioner):
    """Starts a kernel as its traits say, which come from the kernel specification."""

    sandbox = Bool(False)
    warm = Bool(False)
    address = Unicode()  # of a warm process; without one, this process has its own
    libraries = List(default_value=list(LIBRARIES))
    limits = Dict()

    async def launch_kernel(self, cmd: list[str], **options) -> KernelConnectionInfo:
        limits = Limits(**self.limits)
        self.pgid = None
        if self.sandbox:
            self.process = self._boxed(cmd, limits, **options)
        else:
            try:
                self.process = self._forked(cmd, limits.start, **options)
            except NotWarm as reason:
                self.log.debug("an ordinary kernel, as none is to be had from the warm process: %s", reason)
                return await super().launch_kernel(cmd, **options)
        self.pid = self.process.pid
        return self.connection_info

    def _boxed(self, cmd: list[str], limits: Limits, env: dict[str, str], stdout=None, stderr=None, **_) -> Boxed:
        folder = Path(os.path.realpath(self.parent.connection_file)).parent
        os.chmod(folder / CONNECTION, 0o644)  # another user reads it; the folder above is ours alone
        if self.warm:
            idle = Sandbox(IDLE, limits, folder, env)
            try:
                return Boxed(idle, self._forked(cmd, limits.start, idle.env, HOME, stdout, stderr, idle))
            except NotWarm as reason:
                idle.close()
                self.log.debug("an ordinary kernel, as none is to be had from the warm process: %s", reason)
            except BaseException:
                idle.close()
                raise
        return Boxed(Sandbox(cmd, limits, folder, env, stdout, stderr))

    def _forked(
        self, cmd: list[str], patience: float, env: dict[str, str], cwd: str, stdout=None, stderr=None,
        box: Sandbox | None = None, **_,
    ) -> Forked:  # fmt: skip
        """A kernel from the warm process, which goes into `box` if there is one."""
        if not self.warm or not CAN_FORK or LAUNCHER not in cmd:
            raise NotWarm("not asked for, or not on this system")
        address = self.address or own_warm(env, self.libraries)
        arguments = cmd[cmd.index(LAUNCHER) + 1 :]
        request = {"arguments": arguments, "env": env, "cwd": str(cwd), "box": None}
        with ExitStack() as opened:
            files = [_descriptor(file, opened) for file in (stdout, stderr)]
            if box:
                request["box"] = {"user": box.user, "limits": box.resources}
                files.append(box.program)
            return Forked(address, request, files, patience)


def _descriptor(file, opened: ExitStack) -> int:
    """What subprocess understands as an output, as a number."""
    if file is None or file == DEVNULL:
        return opened.enter_context(open(os.devnull, "w")).fileno()
    return file if isinstance(file, int) else file.fileno()
