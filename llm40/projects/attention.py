"""What a FlashAttention of a project must do: exact values and gradients, in kernels, without the scores in memory."""

import itertools
from types import ModuleType

import torch
from torch import Tensor

from llm40 import checks, profile

PROVIDES = '''\
def attention(q, k, v, causal):
    """softmax(q kᵀ / √d) v in Triton kernels, with a backward of its own.

    q (batch, heads, n, d), k and v (batch, kv_heads, m, d), heads a multiple of kv_heads, any strides, float32 or half
    precision; causal (then n = m) is True or False."""
'''
# heads, heads of k and v, queries, keys, width
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 1, 64, 64, 32),
    (4, 2, 65, 65, 64),
    (2, 2, 17, 130, 32),
    (6, 2, 127, 127, 16),
    (1, 1, 200, 3, 64),
]


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """In float64, with all scores."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


def _inputs(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """q, k and v, each with strides of its own."""
    heads, kv_heads, n, m, d = shape
    draws = torch.Generator().manual_seed(seed)
    made = []
    for index, (count, length) in enumerate([(heads, n), (kv_heads, m), (kv_heads, m)]):
        wide = torch.randn(2, length, count, d + 8 * index, generator=draws).to(profile.device)
        made.append(wide[..., :d].transpose(1, 2))
    return made


def _cases():
    for seed, (shape, causal) in enumerate(itertools.product(SHAPES, (False, True))):
        if not causal or shape[2] == shape[3]:
            yield *_inputs(shape, seed), causal, f"{shape[2]} queries, {shape[3]} keys, causal {causal}"


def _apart(actual: Tensor, expected: Tensor) -> float:
    assert isinstance(actual, Tensor), f"A result is {actual!r}."
    assert actual.shape == expected.shape, f"A result is {tuple(actual.shape)}, {tuple(expected.shape)} is right."
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def is_exact(project: ModuleType) -> str:
    """It equals attention in float64, for every shape, mask and stride."""
    largest = 0.0
    for q, k, v, causal, told in _cases():
        apart = _apart(project.attention(q, k, v, causal), _dense(q, k, v, causal))
        assert apart <= 1e-3, f"With {told} it is off by {apart:.2g} of the largest value."
        largest = max(largest, apart)
    return f"{len(list(_cases()))} cases, off by at most {largest:.1g}."


def has_gradients(project: ModuleType) -> str:
    """The gradients of q, k and v equal those of attention in float64."""
    largest = 0.0
    for count, (q, k, v, causal, told) in enumerate(_cases(), start=1):
        given = torch.randn(q.shape, generator=torch.Generator().manual_seed(count)).to(q.device)
        ours, theirs = ([t.detach().requires_grad_() for t in (q, k, v)] for _ in range(2))
        project.attention(*ours, causal).backward(given)
        _dense(*theirs, causal).backward(given.double())
        for name, t, wanted in zip("qkv", ours, theirs, strict=True):
            apart = _apart(t.grad, wanted.grad.double())
            assert apart <= 2e-3, f"With {told} the gradient of {name} is off by {apart:.2g} of the largest value."
            largest = max(largest, apart)
    return f"{count} cases, off by at most {largest:.1g}."


def is_a_kernel(project: ModuleType) -> str:
    """It is made of Triton kernels that a GPU can run, forward and backward."""
    q, k, v = (t.requires_grad_() for t in _inputs(SHAPES[1], 0))
    with checks.compiled(), checks.launches() as counted:
        out = project.attention(q, k, v, True)
        forward = counted.count
        out.sum().backward()
    backward = counted.count - forward
    assert min(forward, backward) > 0, f"It launches {forward} kernels forward and {backward} backward."
    return f"{forward} launched forward, {backward} backward."


def stores_no_scores(project: ModuleType) -> str:
    """No tensor that it makes is as large as the scores."""
    n = profile.pick(256, 4096)
    q, k, v = (t.requires_grad_() for t in _inputs((1, 1, n, n, 16), 1))
    with checks.allocations() as made:
        project.attention(q, k, v, True).sum().backward()
    assert made.largest < 2 * n * n / 4, f"One has {made.largest:,} numbers; {n} × {n} scores are {n * n:,}."
    return f"The largest has {made.largest:,} numbers, the scores would be {2 * n * n:,}."
