"""Lesson 27 against torch.optim.swa_utils, PEFT's merge_utils, SciPy (slerp, least squares), NumPy and closed forms."""

import copy
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, minimize
from scipy.spatial import geometric_slerp
from torch import nn
from torch.optim import swa_utils

import llm40  # noqa: F401  before PEFT, which imports Triton
from llm40 import models

merge_utils = pytest.importorskip("peft.utils.merge_utils")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("27")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(state: dict) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def variants(model: nn.Module, count: int, scale: float = 0.05) -> list[nn.Module]:
    """Copies of a model, each of whose parameters was moved at random."""
    made, g = [copy.deepcopy(model) for _ in range(count)], generator(1)
    with torch.no_grad():
        for other in made:
            for parameter in other.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=g)
    return made


# --- averages ---


def test_average_of_checkpoints(lesson, agrees):
    """An equal mean of five states of `tiny`, as AveragedModel keeps it while training goes on."""
    trained = variants(models.load("tiny", device="cpu")[0].double(), 5)
    averaged = swa_utils.AveragedModel(trained[0])
    for model in trained:
        averaged.update_parameters(model)
    mine = lesson.average([model.state_dict() for model in trained])
    agrees("average", "swa_utils.AveragedModel", flat(mine), flat(averaged.module.state_dict()), 1e-9)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_average_with_weights(lesson, agrees, decay):
    """An exponential moving average is a weighted mean: (1 − d)·dᵏ for a state k steps ago, the rest for the first."""
    trained = variants(nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5)).double(), 6)
    ema = swa_utils.AveragedModel(trained[0], multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    for model in trained:
        ema.update_parameters(model)
    weights = [decay**5, *((1 - decay) * decay ** (5 - k) for k in range(1, 6))]
    mine = lesson.average([model.state_dict() for model in trained], weights)
    agrees("average, weights", "swa_utils.get_ema_multi_avg_fn", flat(mine), flat(ema.module.state_dict()), 1e-9)


def test_tied_head_of_transformers(lesson):
    """A GPT-2 of transformers with a tied head: its state names the embedding twice, the merge holds it once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=11)
    states = [transformers.GPT2LMHeadModel(config).state_dict() for _ in range(3)]
    merged = lesson.average(states)
    assert merged["lm_head.weight"] is merged["transformer.wte.weight"]
    distinct = {t.data_ptr() for t in merged.values() if t.numel()}
    assert len(distinct) == len(merged) - 1


def test_greedy_soup(lesson, agrees):
    """Of four members every order of tries is listed; the greedy rule's own path is the only one that it may take."""
    g = generator(2)
    for _ in range(20):
        points = torch.randn(4, 3, generator=g, dtype=torch.float64)

        def score(state):
            return -float((state["w"] - 0.2).square().sum())

        soup, members = lesson.greedy_soup([{"w": p} for p in points], score)
        alone = [score({"w": p}) for p in points]
        assert alone[members[0]] == max(alone)
        assert [alone[i] for i in members] == sorted((alone[i] for i in members), reverse=True)
        assert score(soup) >= max(alone)
        for i in set(range(4)) - set(members):  # each that was left out would have done harm when its turn came
            before = [j for j in members if alone[j] > alone[i]]
            assert score({"w": points[[*before, i]].mean(0)}) < score({"w": points[before].mean(0)})
        agrees("greedy_soup", "mean of its members", soup["w"], points[members].mean(0), 1e-12)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_slerp(lesson, agrees, size):
    """On the unit sphere against SciPy; off it, norm and angle by hand."""
    g = generator(size)
    a, b = torch.randn(2, size, generator=g, dtype=torch.float64)
    u, v = a / a.norm(), b / b.norm()
    places = np.linspace(0, 1, 7)
    theirs = torch.from_numpy(geometric_slerp(u.numpy(), v.numpy(), places))
    mine = torch.stack([lesson.slerp(u, v, float(t)) for t in places])
    agrees("slerp, unit vectors", "scipy.spatial.geometric_slerp", mine, theirs, 1e-9)
    scaled = torch.stack([lesson.slerp(2 * u, 7 * v, float(t)) for t in places])
    expected = theirs * torch.tensor(2 + 5 * places)[:, None]
    agrees("slerp, norms 2 and 7", "scipy.spatial.geometric_slerp, norms linear", scaled, expected, 1e-9)


def test_mergekits_slerp_is_another(lesson):
    """Its published formula at norms 1 and 3 and 90°: the same norms would give the same, these give 71.6 degrees."""
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    theirs = math.sin(math.pi / 4) * (a + b)
    assert abs(math.degrees(math.atan2(float(theirs[1]), float(theirs[0]))) - 71.565) < 1e-3
    mine = lesson.slerp(a, b, 0.5)
    assert abs(math.degrees(math.atan2(float(mine[1]), float(mine[0]))) - 45) < 1e-9


# --- task vectors ---


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_against_peft(lesson, agrees, density):
    """PEFT's functions for adapters, which work on one tensor: there a tensor is a task vector."""
    g = generator(3)
    tensors = [torch.randn(20, 15, generator=g, dtype=torch.float64) * (1 + i) for i in range(4)]
    base, scales = {"w": torch.randn(20, 15, generator=g, dtype=torch.float64)}, [0.3, -1.0, 0.7, 2.0]
    vectors = [{"w": t} for t in tensors]
    theirs = base["w"] + merge_utils.task_arithmetic(tensors, torch.tensor(scales))
    mine = lesson.apply_task_vectors(base, vectors, scales)["w"]
    agrees("apply_task_vectors", "peft task_arithmetic", mine, theirs, 1e-6)
    theirs = merge_utils.ties(tensors, torch.ones(4), density, majority_sign_method="total")
    agrees("ties_merge", "peft ties, by total mass", lesson.ties_merge(vectors, density)["w"], theirs, 1e-12)
    by_votes = merge_utils.ties(tensors, torch.ones(4), density, majority_sign_method="frequency")
    assert not torch.allclose(theirs, by_votes)


def test_task_vector_of_tiny(lesson, agrees):
    """Half precision, as the weights are shipped: there and back, bit for bit."""
    base, tuned = (models.load(n, device="cpu")[0].half().state_dict() for n in ("tiny-step460", "tiny"))
    vector = lesson.task_vector(base, tuned)
    there = lesson.apply_task_vectors(base, [vector], [1.0])
    assert all(torch.equal(there[name], tuned[name]) for name in tuned)
    back = lesson.apply_task_vectors(there, [vector], [-1.0])
    agrees("task_vector, and back, float16", "the base", flat(back), flat(base), 1e-7)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dare(lesson, agrees, p):
    """Mean and variance of each entry over 4,000 draws, against the closed form and PEFT's random pruning."""
    g = generator(4)
    vector = torch.randn(50, generator=g, dtype=torch.float64)
    draws = torch.stack([lesson.dare({"w": vector}, p, g)["w"] for _ in range(4000)])
    torch.manual_seed(4)
    theirs = torch.stack([merge_utils.random_pruning(vector, 1 - p, rescale=True) for _ in range(4000)])
    agrees("dare, mean of 4,000 draws", "the vector", draws.mean(0), vector, 0.25)
    variance = vector.square() * p / (1 - p)
    agrees("dare, variance of 4,000 draws", "p / (1 − p) · δ²", draws.var(0), variance, 0.15)
    agrees("dare, variance of 4,000 draws", "peft random_pruning", draws.var(0), theirs.var(0), 0.2)


# --- paths and units ---


def test_loss_barrier(lesson, agrees):
    """A planted wave on a slope: the highest rise above the chord is the amplitude; a quadratic has none."""
    a, b = {"w": torch.zeros(3, dtype=torch.float64)}, {"w": torch.ones(3, dtype=torch.float64)}
    wave = lambda s: 2 + 3 * float(s["w"].mean()) + 0.7 * math.sin(2 * math.pi * float(s["w"].mean()))
    barrier, losses = lesson.loss_barrier(a, b, wave, points=21)
    agrees("loss_barrier", "amplitude of a sine", torch.tensor(barrier), torch.tensor(0.7), 1e-6)
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    agrees("loss_barrier, losses", "closed form", losses, 2 + 3 * t + 0.7 * (2 * math.pi * t).sin(), 1e-9)
    matrix = torch.randn(3, 3, generator=generator(5), dtype=torch.float64)
    convex, _ = lesson.loss_barrier(a, b, lambda s: float((matrix @ (s["w"] - 0.3)).square().sum()))
    assert convex == 0


@pytest.mark.parametrize("h", [3, 6, 7])
def test_match_units(lesson, agrees, h):
    """The best of all h! orders, with NumPy's correlations; and SciPy's solver on them."""
    g = generator(h)
    a = torch.randn(12, h, generator=g)
    b = torch.randn(12, h, generator=g) + 5 * a[:, :1]
    table = np.corrcoef(a.double().numpy(), b.double().numpy(), rowvar=False)[:h, h:]
    best = max(permutations(range(h)), key=lambda p: sum(table[i, j] for i, j in enumerate(p)))
    mine = lesson.match_units(a, b)
    agrees("match_units", "all orders, numpy.corrcoef", mine, torch.tensor(best), 0)
    agrees("match_units", "scipy linear_sum_assignment", mine, torch.tensor(linear_sum_assignment(-table)[1]), 0)


def test_repair_is_exact(lesson, agrees):
    """A network of 200 units, relabeled: same function, ruined mean, and the first network again after matching."""
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(20, 200), nn.GELU(), nn.Linear(200, 5))
    state, x = net.state_dict(), torch.randn(300, 20)
    moved = lesson.permute_hidden(state, torch.randperm(200, generator=generator(7)))
    other = copy.deepcopy(net)
    other.load_state_dict(moved)
    with torch.no_grad():
        agrees("permute_hidden", "torch.nn.Sequential, before and after", other(x), net(x), 1e-5)
        order = lesson.match_units(net[:2](x), other[:2](x))
    restored = lesson.permute_hidden(moved, order)
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())
    mean = lesson.average([state, moved])
    assert not torch.allclose(mean["0.weight"], state["0.weight"], atol=1e-2)


def test_fisher_merge(lesson, agrees):
    """SciPy's minimizer of the sum of quadratics; and the mean of a normal posterior."""
    g = generator(8)
    theta = torch.randn(3, 6, generator=g, dtype=torch.float64)
    fisher = torch.rand(3, 6, generator=g, dtype=torch.float64) + 0.05
    mine = lesson.fisher_merge([{"w": t} for t in theta], [{"w": f} for f in fisher])["w"]
    cost = lambda x: float((fisher * (torch.from_numpy(x) - theta) ** 2).sum())
    found = minimize(cost, np.zeros(6), method="BFGS", options={"gtol": 1e-9}).x
    agrees("fisher_merge", "scipy.optimize.minimize of the quadratics", mine, torch.from_numpy(found), 1e-5)
    posterior = fisher.sum(0).reciprocal() * (fisher * theta).sum(0)
    agrees("fisher_merge", "product of Gaussians", mine, posterior, 1e-12)
