"""Lesson 13 against torch.nn.init, PyTorch's spectral_norm, transformers' GPT-2, and decompositions by NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

TOLERANCE = 1e-12


@pytest.fixture
def lesson(reference):
    return reference("13")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (6, 5, 3), (4, 6, 3, 2)])
@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_xavier(lesson, agrees, shape, gain):
    """The same generator gives the same numbers."""
    mine = lesson.xavier_uniform_(torch.empty(shape, dtype=torch.float64), gain, generator(1))
    theirs = nn.init.xavier_uniform_(torch.empty(shape, dtype=torch.float64), gain, generator(1))
    agrees("xavier_uniform_", "nn.init.xavier_uniform_, same generator", mine, theirs, TOLERANCE)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (6, 5, 3), (4, 6, 3, 2)])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_kaiming(lesson, agrees, shape, mode, slope):
    gain = nn.init.calculate_gain("leaky_relu", slope)
    mine = lesson.kaiming_normal_(torch.empty(shape, dtype=torch.float64), mode, gain, generator(2))
    theirs = nn.init.kaiming_normal_(torch.empty(shape, dtype=torch.float64), slope, mode, generator=generator(2))
    agrees("kaiming_normal_", "nn.init.kaiming_normal_, same generator", mine, theirs, TOLERANCE)


def test_gpt2(lesson, agrees):
    """The standard deviation of each parameter, as transformers initializes GPT-2.

    Both estimates of a matrix's standard deviation have a relative error of 1/√(2n), n ≥ 96²: six of them are 5 %.
    """
    transformers = pytest.importorskip("transformers")
    layers, width = 6, 96
    config = transformers.GPT2Config(vocab_size=300, n_positions=128, n_embd=width, n_layer=layers, n_head=4)
    torch.manual_seed(0)
    theirs = transformers.GPT2Model(config)
    mine = lesson.GPT(300, width, layers, context=128)
    lesson.gpt2_init(mine, generator=generator(3))

    same = {
        "embed.weight": "wte.weight",
        "position.weight": "wpe.weight",
        "norm.weight": "ln_f.weight",
        "norm.bias": "ln_f.bias",
    }
    inside = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc_in": "mlp.c_fc",
        "mlp.fc_out": "mlp.c_proj",
        "attention.out_proj": "attn.c_proj",
    }
    for i in range(layers):
        for ours, other in inside.items():
            for kind in ("weight", "bias"):
                same[f"blocks.{i}.{ours}.{kind}"] = f"h.{i}.{other}.{kind}"
        for part in "qkv":  # one matrix in GPT-2
            for kind in ("weight", "bias"):
                same[f"blocks.{i}.attention.{part}_proj.{kind}"] = f"h.{i}.attn.c_attn.{kind}"
    assert set(same) == {name for name, _ in mine.named_parameters()} - {"head.weight"}
    for ours, other in same.items():
        a, b = mine.get_parameter(ours).double(), theirs.get_parameter(other).double()
        if a.dim() == 1:
            agrees("gpt2_init, vectors", "transformers GPT2Model", a, b[: len(a)], 0.0)
        else:
            count = min(a.numel(), b.numel())
            agrees("gpt2_init, standard deviations", "transformers GPT2Model", a.std(), b.std(), 6 / math.sqrt(count))


@pytest.mark.parametrize("layers", [1, 6, 24])
def test_deepnorm(lesson, agrees, layers):
    """The same numbers as nn.init.xavier_normal_ draws in the order of the modules."""
    mine, theirs = (lesson.GPT(10, 16, layers, post_norm=True) for _ in range(2))
    lesson.deepnorm_init(mine, generator(4))
    g = generator(4)
    for name, module in theirs.blocks.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1.0 if name[-6] in "qk" and name.endswith("_proj") else (8 * layers) ** -0.25
            nn.init.xavier_normal_(module.weight, gain, generator=g)
    for (name, p), q in zip(mine.blocks.named_parameters(), theirs.blocks.parameters(), strict=True):
        if p.dim() == 2:
            agrees("deepnorm_init", "nn.init.xavier_normal_, same generator", p, q, 1e-6)
        assert p.dim() == 2 or "norm" in name or not p.any()
    alphas = torch.tensor([block.alpha for block in mine.blocks], dtype=torch.float64)
    agrees("deepnorm_init, alpha", "(2L)^(1/4)", alphas, torch.full((layers,), (2.0 * layers) ** 0.25).double(), 1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (9, 5), (1, 4), (6, 6)])
@pytest.mark.parametrize("steps", [1, 4])
def test_sigma_reparam(lesson, agrees, rows, columns, steps):
    """With γ = 1 it is PyTorch's spectral norm: outputs, buffers and gradients, step by step, from the same vectors."""
    mine = lesson.SigmaReparamLinear(columns, rows).double()
    plain = nn.Linear(columns, rows).double()
    with torch.no_grad():
        plain.weight.copy_(mine.weight)
        plain.bias.copy_(mine.bias)
    theirs = spectral_norm(plain)
    inner = theirs.parametrizations.weight[0]
    mine.u, mine.v = F.normalize(normal(rows, seed=5), dim=0), F.normalize(normal(columns, seed=6), dim=0)
    inner._u, inner._v = mine.u.clone(), mine.v.clone()
    x, pull = normal(3, columns, seed=7), normal(3, rows, seed=8)
    for _ in range(steps):
        mine.zero_grad()
        theirs.zero_grad()
        out, expected = mine(x), theirs(x)
        (out * pull).sum().backward()
        (expected * pull).sum().backward()
    peer = "spectral_norm of PyTorch"
    agrees("SigmaReparamLinear, γ = 1", peer, out, expected, TOLERANCE)
    agrees("SigmaReparamLinear, buffers", peer, torch.cat([mine.u, mine.v]), torch.cat([inner._u, inner._v]), TOLERANCE)
    agrees("SigmaReparamLinear, gradient", peer, mine.weight.grad, theirs.parametrizations.weight.original.grad, 1e-9)
    agrees("SigmaReparamLinear, eval", peer, mine.eval()(x), theirs.eval()(x), TOLERANCE)


def test_sigma_reparam_norm(lesson, agrees):
    mine = lesson.SigmaReparamLinear(12, 8, bias=False).double()
    with torch.no_grad():
        mine.gamma.fill_(0.7)
    for _ in range(2000):
        mine(torch.zeros(1, 12, dtype=torch.float64))
    effective = mine.eval()(torch.eye(12, dtype=torch.float64)).T
    norm = torch.tensor(np.linalg.norm(effective.detach().numpy(), 2))
    agrees("SigmaReparamLinear, 2000 steps", "numpy.linalg.norm(…, 2)", norm, torch.tensor(0.7), 1e-6)


def test_gradient_norms(lesson, agrees):
    torch.manual_seed(0)
    model = lesson.GPT(11, 16, 2).double()
    tokens = torch.randint(0, 11, (2, 9), generator=generator(9))
    kept, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = lambda module, inputs, output, name=name: kept.setdefault(name, output).retain_grad()
            handles.append(module.register_forward_hook(keep))
    model(tokens).square().mean().backward()
    for handle in handles:
        handle.remove()
    norms = lesson.gradient_norms(model, lambda: model(tokens).square().mean())
    assert list(norms) == list(kept)
    expected = torch.stack([y.grad.norm() for y in kept.values()])
    actual = torch.tensor(list(norms.values()), dtype=torch.float64)
    agrees("gradient_norms", "Tensor.retain_grad", actual, expected, TOLERANCE)


def test_rank_and_entropy(lesson, agrees):
    x = normal(3, 9, 5, seed=10)
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    stable = torch.tensor((s**2).sum(-1) / s[:, 0] ** 2)
    agrees("token_rank", "numpy.linalg.svd", lesson.token_rank(x), stable, TOLERANCE)
    centered = x.numpy() - x.numpy().mean(1, keepdims=True)
    apart = torch.tensor(np.linalg.norm(centered, axis=(1, 2)) / np.linalg.norm(x.numpy(), axis=(1, 2)))
    agrees("token_spread", "numpy.linalg.norm", lesson.token_spread(x), apart, TOLERANCE)
    weights = (3 * normal(2, 4, 6, 7, seed=11)).softmax(-1)
    entropy = torch.distributions.Categorical(probs=weights).entropy()
    agrees(
        "attention_entropy", "torch.distributions.Categorical", lesson.attention_entropy(weights), entropy, TOLERANCE
    )


@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_forward_variance(lesson, agrees, kind):
    """A plain stack of nn.Linear, nn.ReLU with the same matrices."""
    depth, width, std = 6, 20, 0.3
    x = normal(4, width, seed=12)
    measured = lesson.forward_variance(depth, width, std, kind, x, generator(13))[1]
    g, layers = generator(13), nn.ModuleList()
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False).double()
        nn.init.normal_(layer.weight, std=std, generator=g)
        layers.append(nn.Sequential(layer, nn.ReLU() if kind == "relu" else nn.Identity()))
    expected = [x.square().mean()]
    for layer in layers:
        x = layer(x)
        expected.append(x.square().mean())
    agrees(f"forward_variance, {kind}", "a stack of nn.Linear", measured, torch.stack(expected), TOLERANCE)


def test_mup(lesson, agrees):
    """The shapes decide: a parameter of which both axes grow with the width is hidden; as in the package mup.

    There Adam's rate of such a parameter is divided by fan_in / base_fan_in, and all others keep theirs.
    """
    base, wide = lesson.GPT(13, 32), lesson.GPT(13, 96)
    groups = lesson.mup_setup(wide, base=32, lr=0.1)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    mine, expected = [], []
    for p, q in zip(wide.parameters(), base.parameters(), strict=True):
        growing = [a / b for a, b in zip(p.shape, q.shape, strict=True) if a != b]
        mine.append(rates[id(p)])
        expected.append(0.1 / growing[-1] if len(growing) == 2 else 0.1)
    mine, expected = (torch.tensor(rates, dtype=torch.float64) for rates in (mine, expected))
    agrees("mup_setup, learning rates", "axes that grow", mine, expected, TOLERANCE)
