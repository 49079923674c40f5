"""Lesson 01 against PyTorch, NumPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.random_projection import GaussianRandomProjection
from sklearn.utils.extmath import randomized_svd

from llm40 import data


@pytest.fixture
def lesson(reference):
    return reference("01")


@pytest.fixture
def digits():
    return data.digits()[0].flatten(1).double()


def test_cosines(lesson, digits, agrees):
    x, y = digits[:300], digits[300:420].clone()
    y[5] = 0
    agrees(
        "01 cosine similarity",
        "scikit-learn",
        lesson.cosine_similarity_matrix(x, y),
        torch.from_numpy(cosine_similarity(x.numpy(), y.numpy())),
        1e-12,
    )
    agrees(
        "01 cosine similarity",
        "F.cosine_similarity",
        lesson.cosine_similarity_matrix(x.float(), y.float()),
        torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1),
        1e-6,
    )


def test_principal_component(lesson, digits, agrees):
    """The dominant eigenpair of a covariance is the first component of a PCA."""
    centered = digits - digits.mean(0)
    covariance = centered.T @ centered / (len(digits) - 1)
    value, vector = lesson.power_iteration(covariance, 400, torch.Generator().manual_seed(0))
    pca = PCA(n_components=1, svd_solver="full").fit(digits.numpy())
    agrees("01 power iteration, value", "sklearn PCA", value, torch.tensor(pca.explained_variance_[0]), 1e-10)
    component = torch.from_numpy(pca.components_[0])
    agrees("01 power iteration, vector", "sklearn PCA", vector * (vector @ component).sign(), component, 1e-10)


@pytest.mark.parametrize("shape", [(8, 8), (20, 7), (7, 20), (1, 5)])
@pytest.mark.parametrize("sign", [1, -1])
def test_power_iteration(lesson, agrees, shape, sign):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, _ = lesson.power_iteration(sign * w @ w.T, 3000, torch.Generator().manual_seed(2))
    values = np.linalg.eigvalsh((sign * w @ w.T).numpy())
    dominant = torch.tensor(values[np.abs(values).argmax()])
    agrees("01 power iteration, value", "numpy.linalg.eigvalsh", value, dominant, 1e-10)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_low_rank(lesson, digits, agrees, rank):
    a, b = lesson.low_rank_approximation(digits, rank)
    svd = TruncatedSVD(rank, algorithm="arpack", random_state=0).fit(digits.numpy())
    best = torch.from_numpy(svd.inverse_transform(svd.transform(digits.numpy())))
    agrees("01 low rank", "sklearn TruncatedSVD (ARPACK)", a @ b, best, 1e-9)
    sigma = torch.from_numpy(np.linalg.svd(digits.numpy(), compute_uv=False))
    error = (digits - a @ b).square().sum()
    agrees("01 low rank, squared error", "Eckart-Young", error, sigma[rank:].square().sum(), 1e-10)


def test_effective_rank(lesson, digits, agrees):
    sigma = np.linalg.svd(digits.numpy(), compute_uv=False)
    share = torch.from_numpy(sigma / sigma.sum())
    expected = torch.distributions.Categorical(probs=share).entropy().exp()
    agrees("01 effective rank", "torch.distributions", lesson.effective_rank(digits), expected, 1e-12)


def test_random_projection(lesson, digits):
    """Distances spread around their true values as scikit-learn's projection spreads them."""
    x, k, spread = digits[:60], 40, {}
    for name in ("ours", "sklearn"):
        ratios = []
        for seed in range(30):
            if name == "ours":
                y = lesson.johnson_lindenstrauss(x, k, torch.Generator().manual_seed(seed))
            else:
                y = torch.from_numpy(GaussianRandomProjection(k, random_state=seed).fit_transform(x.numpy()))
            ratios.append((torch.pdist(y) / torch.pdist(x)).square())
        ratios = torch.stack(ratios)
        assert abs(ratios.mean() - 1) < 0.1
        spread[name] = ratios.std().item()
    # 30 draws of one map for all pairs: the spread itself is known to some 10 %.
    assert spread["ours"] == pytest.approx(spread["sklearn"], rel=0.3)
    assert spread["ours"] == pytest.approx(math.sqrt(2 / k), rel=0.2)


@pytest.mark.parametrize(("rank", "passes"), [(5, 2), (20, 2), (20, 4)])
def test_randomized_svd(lesson, rank, passes):
    """At equal work the error is that of scikit-learn's randomized SVD and of torch.svd_lowrank."""
    photo = data.pictures()["china"].mean(0)
    errors = {"ours": [], "sklearn": [], "torch": []}
    for seed in range(5):
        a, b = lesson.randomized_low_rank(photo, rank, torch.Generator().manual_seed(seed), passes=passes)
        errors["ours"].append((photo - a @ b).norm())
        u, s, vh = randomized_svd(
            photo.numpy(), rank, n_oversamples=8, n_iter=passes, power_iteration_normalizer="QR", random_state=seed
        )
        errors["sklearn"].append((photo - torch.from_numpy((u * s) @ vh)).norm())
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(photo, q=rank + 8, niter=passes)
        errors["torch"].append((photo - (u[:, :rank] * s[:rank]) @ v[:, :rank].T).norm())
    mean = {name: float(torch.stack(values).mean()) for name, values in errors.items()}
    best = float(torch.linalg.svdvals(photo)[rank:].norm())
    for peer in ("sklearn", "torch"):
        assert mean["ours"] / best - 1 <= 1.5 * (mean[peer] / best - 1) + 1e-4, mean
