"""How a kernel is reached: over UNIX sockets in a private folder, where the system has them.

Kernels over TCP race for ports when many start at once; a socket path of one's own cannot be taken by another kernel.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

# A UNIX socket's path is at most 108 bytes, so the folder is short, wherever the project lies.
SOCKETS = "/tmp" if Path("/tmp").is_dir() else None


@contextmanager
def kernel_manager(kernel_name: str = "python3") -> Iterator[AsyncKernelManager]:
    """A manager for one kernel, not started yet; its sockets are removed at the end.

    The kernel runs in this very environment: a `python3` that a user has registered with Jupyter, and that would
    come first in an ordinary search, may be another Python without PyTorch. So no folder is searched.
    """
    specs = KernelSpecManager(kernel_dirs=[])
    if sys.platform == "win32":  # no UNIX sockets in libzmq there
        yield AsyncKernelManager(kernel_name=kernel_name, kernel_spec_manager=specs)
        return
    folder = tempfile.mkdtemp(prefix="llm40-", dir=SOCKETS)
    try:
        yield AsyncKernelManager(
            kernel_name=kernel_name,
            kernel_spec_manager=specs,
            transport="ipc",
            ip=os.path.join(folder, "k"),
            connection_file=os.path.join(folder, "connection.json"),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
