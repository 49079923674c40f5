"""Where the course runs: device, number format, sizes, and how Triton kernels are executed.

The profile is `cpu` or `gpu`: the environment variable LLM40_PROFILE says which, `auto` (the default) takes a GPU where
PyTorch sees one. On a CPU Triton's kernels run in its interpreter, which has to be chosen before Triton is imported:
importing any part of `llm40` does that.
"""

import importlib.util
import os
import sys
from typing import TypeVar

# Ask the driver's library rather than CUDA itself, so that a process that only imported this can still be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from threadpoolctl import ThreadpoolController

Size = TypeVar("Size")


def _chosen() -> str:
    name = os.environ.get("LLM40_PROFILE", "auto")
    if name not in ("auto", "cpu", "gpu"):
        raise ValueError(f"LLM40_PROFILE is {name!r}: it can be cpu, gpu or auto")
    if name == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "gpu"
    if name == "gpu":
        raise RuntimeError("LLM40_PROFILE is gpu, but PyTorch sees no CUDA device here: unset it, or set it to cpu")
    return "cpu"


def _interpret_triton() -> bool:
    """Whether kernels run in Triton's interpreter: always on a CPU, and on a GPU if TRITON_INTERPRET asks for it."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
    if name == "gpu":
        return asked
    late = "triton" in sys.modules and not asked
    if late:
        raise ImportError(
            "triton was imported before llm40, so its kernels would look for a GPU: "
            "restart the kernel and import llm40 first"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter computes with NumPy, one small operation after another: threads only get in each other's way.
    # NumPy is loaded by now (torch needs it), so an environment variable would come too late.
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    return True


name: str = _chosen()
device = torch.device("cuda" if name == "gpu" else "cpu")
# The number format of models. The interpreter computes bfloat16 wrongly, so on a CPU everything stays in float32.
dtype = torch.bfloat16 if name == "gpu" else torch.float32
interpret: bool = _interpret_triton()
# Triton has no wheel for macOS and Windows; its exercises say so there and the rest of a lesson goes on.
has_triton: bool = importlib.util.find_spec("triton") is not None


def pick(cpu: Size, gpu: Size) -> Size:
    """The one of two sizes (steps, batch, length …) that fits this profile."""
    return gpu if name == "gpu" else cpu


def synchronize() -> None:
    """Wait until the device has finished what it was given; on a CPU it always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()
