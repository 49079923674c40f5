"""Random inputs of a check, which follow the run's seed."""

import os

import torch
from torch import Tensor

from llm40 import profile


def seed() -> int:
    """The run's seed: fixed for a learner, chosen by the grader for each run (environment variable LLM40_SEED)."""
    return int(os.environ.get("LLM40_SEED", "40"))


def generator(salt: int = 0) -> torch.Generator:
    """A fresh generator of the run's seed; another `salt` gives another stream."""
    return torch.Generator().manual_seed(seed() * 1_000_003 + salt)


def randn(
    *shape: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    device: torch.device | str = profile.device,
) -> Tensor:
    """Normal numbers of standard deviation `scale`, drawn on the CPU and moved to `device`: the same everywhere."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)
