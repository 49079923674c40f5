"""Lesson 17 against SciPy's optimizers, NumPy's polynomials, transformers' Llama, PyTorch's counter and torch.func."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm40 import models

optimize = pytest.importorskip("scipy.optimize")
PUBLISHED = {
    "Chinchilla, as printed": (1.69, 406.4, 410.7, 0.34, 0.28),
    "its replication": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}
SHAPES = [
    {"hidden_size": 96, "layers": 3, "heads": 3, "kv_heads": 1, "mlp_size": 256},
    {"hidden_size": 40, "layers": 2, "heads": 5, "kv_heads": 5, "mlp_size": 72},
]


@pytest.fixture
def lesson(reference):
    return reference("17")


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid_of_runs(surface, noise: float, seed: int) -> tuple[torch.Tensor, ...]:
    """Thirty runs of models from 10 to 1,000 million parameters: n, d and the loss on a surface, with noise."""
    generator = torch.Generator().manual_seed(seed)
    n, d = torch.cartesian_prod(torch.logspace(7, 9, 5), torch.logspace(9, 11, 6)).double().T
    e, a, b, alpha, beta = surface
    draws = torch.randn(len(n), generator=generator, dtype=torch.float64)
    return n, d, (e + a / n**alpha + b / d**beta) * (1 + noise * draws)


@pytest.mark.parametrize("sizes", SHAPES)
def test_parameters_and_flops(lesson, agrees, sizes):
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, and so after llm40

    transformers = pytest.importorskip("transformers")
    config = models.Config(vocab_size=77, context=64, **sizes)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=77,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            tie_word_embeddings=True,
            pad_token_id=0,
            attn_implementation="eager",
        )
    )
    body, embedding = lesson.count_parameters(config)
    blocks = sum(p.numel() for p in theirs.model.layers.parameters())
    table = theirs.model.embed_tokens.weight.numel()
    agrees("count_parameters", "transformers Llama", doubles(body, embedding), doubles(blocks, table), 0.0)
    tokens = torch.zeros(3, 20, dtype=torch.long)
    total = float(sum(lesson.training_flops(config, 60, 20).values()))
    with FlopCounterMode(display=False) as counter:
        theirs(tokens).logits.sum().backward()
    counted = counter.get_total_flops()
    agrees("training_flops", "FLOP counter, transformers Llama", doubles(total), doubles(counted), 0.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        models.Llama(config)(tokens).sum().backward()
    counted = counter.get_total_flops()
    agrees("training_flops", "FLOP counter, the library's Llama", doubles(total), doubles(counted), 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_power_law(lesson, agrees, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.logspace(3, 9, 20, dtype=torch.float64)
    y = (1.5 + 40 * x**-0.3) * (1 + 0.01 * torch.randn(20, generator=generator, dtype=torch.float64))
    found, _ = optimize.curve_fit(
        lambda x, e, log_a, alpha: e + np.exp(log_a) * x**-alpha,
        x.numpy(),
        y.numpy(),
        p0=(1.0, 3.0, 0.25),
        sigma=y.numpy(),
        bounds=([0, -10, 0.01], [10, 20, 3]),
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    e, a, alpha = lesson.fit_power_law(x, y)
    agrees("fit_power_law", "scipy curve_fit", doubles(e, math.log(a), alpha), torch.tensor(found), 1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_parabola(lesson, agrees, seed):
    generator = torch.Generator().manual_seed(seed)
    n = 10 ** (5 + 3 * torch.rand(7, generator=generator, dtype=torch.float64))
    noise = 0.01 * torch.randn(7, generator=generator, dtype=torch.float64)
    loss = 2 + 0.05 * (n.log() - 15) ** 2 + noise
    parabola = np.polynomial.Polynomial.fit(n.log().numpy(), loss.numpy(), 2)
    vertex = float(parabola.deriv().roots()[0])
    best, least = lesson.isoflop_minimum(n, loss)
    expected = doubles(vertex, float(parabola(vertex)))
    agrees("isoflop_minimum", "numpy Polynomial.fit", doubles(math.log(best), least), expected, 1e-10)


def test_objective(lesson, agrees):
    special = pytest.importorskip("scipy.special")
    n, d, loss = grid_of_runs(PUBLISHED["its replication"], 0.01, 0)
    theta = torch.randn(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = theta * doubles(2, 2, 0.5, 0.1, 0.1) + doubles(6, 7, 0.5, 0.35, 0.35)
    e, a, b, alpha, beta = (theta[:, i, None].numpy() for i in (2, 0, 1, 3, 4))
    law = special.logsumexp(
        np.stack(np.broadcast_arrays(a - alpha * n.log().numpy(), b - beta * d.log().numpy(), e)), axis=0
    )
    expected = special.huber(1e-3, law - loss.log().numpy()).sum(-1)
    actual = lesson.chinchilla_objective(theta, n, d, loss)
    agrees("chinchilla_objective", "scipy logsumexp and huber", actual, torch.tensor(expected), 1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PUBLISHED)
def test_surface(lesson, agrees, name, seed):
    n, d, loss = grid_of_runs(PUBLISHED[name], 0.003, seed)

    def objective(theta):
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        value = 1e4 * lesson.chinchilla_objective(theta, n, d, loss)
        value.backward()
        return float(value), theta.grad.numpy()

    starts = [(6, 6, 0.5, alpha, beta) for alpha in (0.25, 0.5) for beta in (0.25, 0.5)]
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-9}
    ends = [optimize.minimize(objective, s, jac=True, method="L-BFGS-B", options=options) for s in starts]
    least = min(end.fun for end in ends) / 1e4
    e, a, b, alpha, beta = lesson.fit_chinchilla(n, d, loss)
    theta = doubles(math.log(a), math.log(b), math.log(e), alpha, beta)
    actual = lesson.chinchilla_objective(theta, n, d, loss)
    assert actual <= least * (1 + 1e-3)
    agrees("fit_chinchilla: the least objective", "scipy L-BFGS-B, 4 starts", actual, doubles(least)[0], 1e-3)


@pytest.mark.parametrize("flops", [1e10, 5.76e23])
@pytest.mark.parametrize("name", PUBLISHED)
def test_optimum(lesson, agrees, name, flops):
    surface = PUBLISHED[name]
    found = optimize.minimize_scalar(
        lambda u: math.log(lesson.surface_loss(surface, math.exp(u), flops / 6 / math.exp(u)) - surface[0]),
        bracket=(5, 25),
        tol=1e-12,
    )
    n, d = lesson.compute_optimal(surface, flops)
    # Around a minimum the loss is flat: its place is known to the root of the precision.
    agrees("compute_optimal: log N*", "scipy minimize_scalar", doubles(math.log(n)), doubles(found.x), 1e-7)
    assert math.isclose(6 * n * d, flops, rel_tol=1e-12)


def test_published_optima(lesson, agrees):
    """At Chinchilla's own budget the printed numbers say 32 billion parameters, the replicated ones 72."""
    optima = [lesson.compute_optimal(surface, 5.76e23)[0] / 1e9 for surface in PUBLISHED.values()]
    agrees("compute_optimal at 5.76e23", "billions, to two digits", doubles(*optima), doubles(32, 72), 6e-3)


@pytest.mark.parametrize("served", [0.0, 1e11, 1e13])
@pytest.mark.parametrize("name", PUBLISHED)
def test_inference(lesson, agrees, name, served):
    e, a, b, alpha, beta = surface = PUBLISHED[name]
    target = 2.2
    low = math.log(a / (target - e)) / alpha

    def total(u):
        rest = target - e - a * math.exp(-alpha * u)
        return math.log(6 * math.exp(u) * (b / rest) ** (1 / beta) + 2 * math.exp(u) * served)

    found = optimize.minimize_scalar(total, bounds=(low + 1e-6, low + 15), method="bounded", options={"xatol": 1e-12})
    n, d = lesson.inference_aware_optimum(surface, target, served)
    agrees("inference_aware_optimum: log N", "scipy bounded", doubles(math.log(n)), doubles(found.x), 1e-7)
    assert math.isclose(float(lesson.surface_loss(surface, n, d)), target, rel_tol=1e-10)


def test_gradient_noise(lesson, agrees):
    """Gradients of each sequence by torch.func; their covariance's trace and mean are what the estimators aim at."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 6), torch.nn.Linear(6, 256)).double()
    windows = torch.randint(0, 256, (12, 9))
    weights = dict(model.named_parameters())

    def loss(weights, row):
        logits = torch.func.functional_call(model, weights, (row[None, :-1],))
        return torch.nn.functional.cross_entropy(logits[0], row[1:])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, windows)
    each = torch.cat([g.detach().flatten(1) for g in grads.values()], dim=1)
    small, big = lesson.measure_gradient_noise(model, windows, 1)
    agrees("measure_gradient_noise, sequences", "torch.func.vmap of grad", small, each.square().sum(1), 1e-12)
    agrees("measure_gradient_noise, batch", "torch.func.vmap of grad", big, each.mean(0).square().sum(), 1e-12)
    parts = each.unflatten(0, (4, 3)).mean(1).square().sum(1)
    small, big = lesson.measure_gradient_noise(model, windows, 3)
    agrees("measure_gradient_noise, micro-batches", "torch.func.vmap of grad", small, parts, 1e-12)
    # One batch of m examples: the estimate of tr Σ is the sample covariance's, with m − 1.
    small, big = lesson.measure_gradient_noise(model, windows, 1)
    signal, trace, scale = lesson.gradient_noise_scale(small, big, 1, 12)
    expected = float(each.var(0, correction=1).sum())
    agrees("gradient_noise_scale: tr Σ", "sample covariance", doubles(trace), doubles(expected), 1e-10)
    expected = float(each.mean(0).square().sum()) - expected / 12
    agrees("gradient_noise_scale: |G|²", "closed form", doubles(signal), doubles(expected), 1e-9)
    assert math.isclose(scale, trace / signal, rel_tol=1e-12)
