"""Makes kernels that are reached over UNIX sockets in a private folder, where the system has them.

Kernels over TCP race for ports when many start at once; a socket path of one's own cannot be taken by another kernel.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path

import zmq
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory

from autograder.kernels.forking import CAN_FORK, LIBRARIES, find_own_warm
from autograder.kernels.limits import MB, Limits
from autograder.kernels.sandbox import CONNECTION, SOCKETS, make_sandbox_environment

# A UNIX socket's path is at most 108 bytes, so the folder is short, wherever the project lies.
TEMPORARY = "/tmp" if Path("/tmp").is_dir() else None
# Of a kernel's messages at most four wait on this side; the others stay in the kernel's memory. One that is larger than
# this closes the connection.
BOUNDS = {zmq.RCVHWM: 4, zmq.MAXMSGSIZE: 128 * MB}
PROVISIONER = EntryPoint("llm40", "autograder.kernels.provisioner:Provisioner", KernelProvisionerFactory.GROUP_NAME)


@dataclass(frozen=True)
class Kernels:
    """The kind of kernels that are wanted: a small description that can be sent anywhere.

    A warm kernel is forked from a process that has imported `libraries`: from the one at `address`, or from this
    process's own. Called, it gives the manager of one kernel, not started yet, whose sockets are removed at the end.
    """

    sandbox: bool = True
    warm: bool = True
    address: str = ""
    libraries: tuple[str, ...] = LIBRARIES

    def share_warm(self, env: dict[str, str], limits: Limits) -> "Kernels":
        """The same kernels, all forked from one warm process, this process's own, whoever asks for them."""
        if self.address or not (self.warm and CAN_FORK):
            return self
        return replace(
            self, address=find_own_warm(make_sandbox_environment(env, limits) if self.sandbox else env, self.libraries)
        )

    @contextmanager
    def __call__(self, limits: Limits | None = None) -> Iterator[AsyncKernelManager]:
        specs = Specs(self, limits or Limits())
        if sys.platform == "win32":  # no UNIX sockets in libzmq there
            yield _set_bounds(AsyncKernelManager(kernel_spec_manager=specs))
            return
        folder = os.path.realpath(tempfile.mkdtemp(prefix="llm40-", dir=TEMPORARY))
        sockets = os.path.join(folder, SOCKETS)
        if not self.sandbox:
            os.mkdir(sockets)
        try:
            yield _set_bounds(
                AsyncKernelManager(
                    kernel_spec_manager=specs,
                    transport="ipc",
                    ip=os.path.join(sockets, "k"),
                    connection_file=os.path.join(folder, CONNECTION),
                )
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _set_bounds(manager: AsyncKernelManager) -> AsyncKernelManager:
    """The same manager; the sockets of its context will have the bounds. A client can share that context."""
    for option, value in BOUNDS.items():
        manager.context.setsockopt(option, value)
    return manager


class Specs(KernelSpecManager):
    """The one kernel that there is: this very environment's, started by kernels/provisioner.

    A `python3` that a user has registered with Jupyter, and that would come first in an ordinary search, may be
    another Python without PyTorch. So no folder is searched.
    """

    def __init__(self, kernels: Kernels, limits: Limits):
        super().__init__(kernel_dirs=[])
        self.settings = {**asdict(kernels), "libraries": list(kernels.libraries), "limits": asdict(limits)}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        KernelProvisionerFactory.instance().provisioners[PROVISIONER.name] = PROVISIONER
        spec = super().get_kernel_spec(kernel_name)
        spec.metadata["kernel_provisioner"] = {"provisioner_name": PROVISIONER.name, "config": self.settings}
        return spec
