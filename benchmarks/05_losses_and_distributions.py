"""Speed of lesson 05's cross-entropy with its gradient on this GPU, beside a copy, torch.compile, PyTorch and Liger.

    python -m benchmarks.05_losses_and_distributions

bfloat16 logits, 8,192 tokens over 32k and 128k words: the mean loss and the gradient in the logits. TB/s count three
passes over the logits (read, read, write); the copy moves two. Ours and Liger's write the gradient over the logits, so
that each has logits of its own and finds its last gradient in them: numbers like any others. Liger's kernel where
liger-kernel is installed.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case, Goal, imported, main
from llm40 import profile

DTYPE = torch.bfloat16
ROWS, VOCABULARIES = 8192, (32768, 131072)
SMALL = {"ROWS": 3, "VOCABULARIES": (40,)}
OURS = "lesson 05"
GOALS = [Goal("8192 × 131072", "Liger", 1.3), Goal("8192 × 131072", "torch.compile", 1.5)]


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> list[Tensor]:
    leaf = logits.detach().requires_grad_()
    return list(torch.autograd.grad(loss(leaf, targets), leaf))


def ways(lesson: SimpleNamespace) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """Each takes logits and targets. The first, and Liger's, spend the logits."""
    compiled = torch.compile(F.cross_entropy, dynamic=False)
    found = {
        OURS: lesson.cross_entropy_,
        "torch.compile": lambda logits, targets: with_gradient(compiled, logits, targets),
        "F.cross_entropy": lambda logits, targets: with_gradient(F.cross_entropy, logits, targets),
    }
    liger = imported("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
    if liger:  # its forward pass writes the gradient; the backward pass would only multiply it by the one that arrives
        found["Liger"] = lambda x, y: liger.apply(x.detach().requires_grad_(), y, None)[0]
    return found


def wrong_peers(lesson: SimpleNamespace, rows: int = 64, vocab: int = 1000) -> dict[str, str]:
    """The gradients of all ways, on logits that nobody has spent: what peers that fail say. Ours must be right."""
    found: dict[str, str] = {}
    logits = torch.randn(rows, vocab, device=profile.device, dtype=DTYPE)
    targets = torch.randint(0, vocab, (rows,), device=profile.device)
    [exact] = with_gradient(F.cross_entropy, logits.double(), targets)
    for name, way in ways(lesson).items():
        spent = logits.clone()
        try:
            told = way(spent, targets)
            gradient = told[0] if isinstance(told, list) else spent
            error = float((gradient.double() - exact).norm() / exact.norm())
            if not error < 0.01:
                raise AssertionError(f"the gradient is off by {error:.1e} (relative L2)")
        except Exception as problem:
            if name == OURS:
                raise
            found[name] = f"{type(problem).__name__}: {problem}"
    return found


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    wrong = wrong_peers(lesson)
    for vocab in VOCABULARIES[-1:] if published else VOCABULARIES:
        generator = torch.Generator(profile.device).manual_seed(5)
        logits = torch.randn(ROWS, vocab, device=profile.device, dtype=DTYPE, generator=generator)
        targets = torch.randint(0, vocab, (ROWS,), device=profile.device, generator=generator)
        functions: dict[str, Callable] = {}
        for name, way in ways(lesson).items():
            if name in wrong:
                continue
            own = logits.clone()
            functions[name] = lambda way=way, own=own, targets=targets: way(own, targets)
        target, size = torch.empty_like(logits), logits.numel() * logits.element_size()
        functions["copy"] = lambda target=target, logits=logits: target.copy_(logits)
        yield Case(
            f"{ROWS} × {vocab}",
            OURS,
            functions,
            {"": 3 * size, "copy": 2 * size},
            "TB/s",
            same=False,
            settings={"wrong": wrong},
        )


if __name__ == "__main__":
    main("05", __doc__.splitlines()[0])
