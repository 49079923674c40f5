"""The limits of one notebook when a class is graded."""

from dataclasses import dataclass

MB = 10**6


@dataclass(frozen=True)
class Limits:
    """Times in seconds, output in bytes of messages, sizes in bytes.

    The second group binds only in a sandbox. `memory` is each process's address space (on a GPU machine its data, as
    CUDA reserves more addresses than any machine has bytes); torch, triton and plots on a CPU need about 1.1 GB of it.
    """

    cell: float = 60.0
    notebook: float = 300.0
    grace: float = 3.0  # between the interrupt and the kill
    start: float = 60.0  # for a kernel to answer
    restarts: int = 10
    output: int = 1 * MB  # per cell
    outputs: int = 10 * MB  # per notebook

    memory: int = 4000 * MB  # per process
    processes: int = 128  # with their threads
    file: int = 100 * MB  # per file
    folder: int = 200 * MB  # all files together; they lie in memory
    gpu: float = 1.0  # the share of a GPU's memory that PyTorch may take, where there is a GPU
