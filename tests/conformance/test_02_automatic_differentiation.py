"""Lesson 02's answers against PyTorch's engine, its forward mode, its numerical check and its checkpointing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint


@pytest.fixture
def lesson(reference):
    return reference("02")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_numerical_gradient(lesson, agrees):
    x = draw(3, 4).requires_grad_()
    (expected,) = torch.autograd.grad((x.sin() * x.exp()).sum(), x)
    agrees(
        "02 numerical_gradient",
        "torch.autograd",
        lesson.numerical_gradient(lambda t: (t.sin() * t.exp()).sum(), x),
        expected,
        tolerance=1e-9,
    )


def test_engine_on_a_two_layer_network(lesson, agrees):
    values = [draw(*shape, seed=i) for i, shape in enumerate([(8, 5), (5, 7), (7,), (7, 3), (3,)])]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    x, w1, b1, w2, b2 = (lesson.Tensor(v.numpy()) for v in values)
    loss = lesson.cross_entropy((x @ w1 + b1).relu() @ w2 + b2, labels.numpy())
    loss.backward()
    leaves = [v.clone().requires_grad_() for v in values]
    expected = F.cross_entropy((leaves[0] @ leaves[1] + leaves[2]).relu() @ leaves[3] + leaves[4], labels)
    agrees("02 cross_entropy", "F.cross_entropy", torch.from_numpy(np.asarray(loss.data)), expected.detach(), 1e-12)
    for mine, theirs in zip((x, w1, b1, w2, b2), torch.autograd.grad(expected, leaves), strict=True):
        agrees("02 Tensor.backward", "torch.autograd", torch.from_numpy(np.asarray(mine.grad)), theirs, tolerance=1e-12)


def test_softmax_function(lesson, agrees):
    x = draw(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lesson.SoftmaxFunction.apply, (x,))
    for scale in (1.0, 1e3):
        wide = (scale * x).detach().requires_grad_()
        cotangent = draw(4, 6, seed=1)
        mine = torch.autograd.grad(lesson.SoftmaxFunction.apply(wide), wide, cotangent)[0]
        theirs = torch.autograd.grad(torch.softmax(wide, -1), wide, cotangent)[0]
        agrees("02 SoftmaxFunction", "torch.softmax", mine, theirs, tolerance=1e-12)


def test_forward_mode(lesson, agrees):
    x, v, w = draw(5, 4), draw(5, 4, seed=1), draw(4, 3, seed=2)

    def layer(t):
        return (t @ w).tanh().exp().sum(1).log()

    expected = torch.func.jvp(layer, (x,), (v,))
    for mine, theirs in zip(lesson.jvp_forward(layer, x, v), expected, strict=True):
        agrees("02 jvp_forward", "torch.func.jvp", mine, theirs, tolerance=1e-12)


def test_checkpoint(lesson, agrees):
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Dropout(0.4), torch.nn.Linear(9, 6)
    block = torch.nn.Sequential(*layers).double()

    def gradients(checkpoint) -> list[torch.Tensor]:
        block.zero_grad()
        x = draw(7, 6).requires_grad_()
        torch.manual_seed(1)  # of the dropout
        checkpoint(block, checkpoint(block, x)).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in block.parameters())]

    theirs = gradients(lambda fn, x: torch.utils.checkpoint.checkpoint(fn, x, use_reentrant=False))
    for mine, expected in zip(gradients(lesson.checkpoint), theirs, strict=True):
        agrees("02 checkpoint", "torch.utils.checkpoint", mine, expected, tolerance=1e-12)
