"""Starts a kernel's process: in a sandbox or not, forked from the warm process or not.

jupyter_client asks a provisioner for all that it does with a kernel's process
(https://jupyter-client.readthedocs.io/en/stable/provisioning.html). This one is its own LocalProvisioner with another
process in the place of subprocess's. Where the warm process gives no kernel, it starts an ordinary one.
"""

import json
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner
from traitlets import Bool, Dict, List, Unicode

from autograder.kernels.forking import CAN_FORK, LIBRARIES, find_own_warm
from autograder.kernels.group import count_tree_seconds
from autograder.kernels.limits import Limits
from autograder.kernels.sandbox import CONNECTION, HOME, Sandbox

IDLE = ("sleep", "infinity")
ANSWER = 4096  # bytes at most
LAUNCHER = "ipykernel_launcher"
COURT = "--court"  # in the place of a kernel's options: the judge's process (autograder/judge), and its socket


class NotWarm(Exception):
    """The warm process gives no kernel."""


class ForkedKernel:
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
            self.returncode = answer.get("exit", -signal.SIGKILL)  # no reply: doorkeeper and kernel were killed
            self.door.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the kernel and to what it started, as far as that stayed in its group."""
        if self.poll() is None:
            with suppress(ConnectionError, TimeoutExpired):
                self.door.send(json.dumps({"signal": int(number)}).encode())
                if number == signal.SIGKILL:
                    self.wait(5)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class BoxedKernel:
    """A kernel in its sandbox, the program that was started there or a forked one that has joined it."""

    stdin = stdout = stderr = None

    def __init__(self, sandbox: Sandbox, forked: ForkedKernel | None = None):
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
    box: Sandbox | None = None

    async def launch_kernel(self, cmd: list[str], **options) -> KernelConnectionInfo:
        limits = Limits(**self.limits)
        if COURT in cmd and not (self.warm and CAN_FORK):
            cmd = [cmd[0], "-m", "autograder.judge.court", cmd[cmd.index(COURT) + 1]]
        self.pgid = self.box = None
        if self.sandbox:
            self.process = self._start_boxed(cmd, limits, **options)
            self.box = self.process.sandbox
        else:
            try:
                self.process = self._start_forked(cmd, limits.start, **options)
            except NotWarm as reason:
                self.log.debug("falling back to an unforked kernel: %s", reason)
                return await super().launch_kernel(cmd, **options)
        self.pid = self.process.pid
        return self.connection_info

    def count_cpu_seconds(self) -> float:
        """CPU time that the kernel, with all that it has started, has used so far: what limits are counted in.

        It may be asked a few times in a second. Of a kernel in a sandbox it never falls, and stays when it has
        ended; of another it is 0 when it has ended.
        """
        if self.box:
            return self.box.count_cpu_seconds()
        return count_tree_seconds(self.pid) if self.process else 0.0

    @property
    def over(self) -> str:
        """The limit for which the kernel's processes were stopped; empty if they were not."""
        return self.box.over if self.box else ""

    def _start_boxed(
        self, cmd: list[str], limits: Limits, env: dict[str, str], stdout=None, stderr=None, **_
    ) -> BoxedKernel:
        folder = Path(os.path.realpath(self.parent.connection_file)).parent
        os.chmod(folder / CONNECTION, 0o644)  # another user reads it; the folder above is the grader's alone
        if self.warm:
            idle = Sandbox(IDLE, limits, folder, env)
            try:
                return BoxedKernel(idle, self._start_forked(cmd, limits.start, idle.env, HOME, stdout, stderr, idle))
            except NotWarm as reason:
                idle.close()
                self.log.debug("falling back to an unforked kernel: %s", reason)
            except BaseException:
                idle.close()
                raise
        return BoxedKernel(Sandbox(cmd, limits, folder, env, stdout, stderr))

    def _start_forked(
        self,
        cmd: list[str],
        patience: float,
        env: dict[str, str],
        cwd: str,
        stdout=None,
        stderr=None,
        box: Sandbox | None = None,
        **_,
    ) -> ForkedKernel:
        """A kernel from the warm process, which goes into `box` if there is one."""
        if not self.warm or not CAN_FORK or LAUNCHER not in cmd:
            raise NotWarm("not asked for, or not on this system")
        address = self.address or find_own_warm(env, self.libraries)
        arguments = cmd[cmd.index(LAUNCHER) + 1 :]
        request = {"arguments": arguments, "env": env, "cwd": str(cwd), "box": None}
        with ExitStack() as opened:
            files = [_find_descriptor(file, opened) for file in (stdout, stderr)]
            if box:
                request["box"] = {"user": box.user, "limits": box.resources, "counted": box.control is not None}
                request["groups"] = box.control.entrances if box.control else []
                files.append(box.program)
            return ForkedKernel(address, request, files, patience)


def _find_descriptor(file, opened: ExitStack) -> int:
    """The descriptor of an output that subprocess understands."""
    if file is None or file == DEVNULL:
        return opened.enter_context(open(os.devnull, "w")).fileno()
    return file if isinstance(file, int) else file.fileno()
