"""Lesson 06 against torch.optim, torch.nn.utils, torch.linalg and Hugging Face's schedules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

UPDATES = 10
SHAPES = [(7,), (4, 6), (3, 1, 5), ()]


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("06")


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A parameter and gradients whose sizes span six orders of magnitude."""
    g = torch.Generator().manual_seed(6)
    grads = [
        torch.randn(shape, generator=g, dtype=dtype) * 10.0 ** torch.randint(-3, 4, shape, generator=g)
        for _ in range(UPDATES)
    ]
    return torch.randn(shape, generator=g, dtype=dtype), grads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("step", "peer", "settings"),
    [
        ("sgd_momentum_step", torch.optim.SGD, {"lr": 0.1, "momentum": 0.0}),
        ("sgd_momentum_step", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        ("sgd_momentum_step", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        ("adam_step", torch.optim.Adam, {}),
        ("adam_step", torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
        ("adamw_step", torch.optim.AdamW, {}),
        ("adamw_step", torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.5}),
    ],
)
def test_elementwise_rules_are_pytorchs(lesson, agrees, step, peer, settings, shape):
    param, grads = draw(shape)
    ours = lesson.follow(getattr(lesson, step), param, grads, **settings)
    theirs = lesson.follow_torch(peer, param, grads, **settings)
    agrees(f"06 {step}, {UPDATES} updates", f"torch.optim.{peer.__name__}", ours[-1], theirs[-1], tolerance=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(8, 8), (24, 6), (6, 24), (1, 5), (5, 1)], ids=str)
def test_muon_is_pytorchs(lesson, agrees, shape, scale, nesterov):
    g = torch.Generator().manual_seed(7)
    param = torch.randn(shape, generator=g)
    grads = [torch.randn(shape, generator=g) for _ in range(UPDATES)]
    settings = {"lr": 0.05, "weight_decay": 0.2, "nesterov": nesterov, "adjust_lr_fn": scale}
    # PyTorch's iteration runs in bfloat16. With the same rounding in ours, only the order of its operations differs.
    rounded = lambda matrix: lesson.newton_schulz(matrix.bfloat16()).float()
    ours = lesson.follow(lesson.muon_step, param, grads, orthogonalize=rounded, **settings)
    theirs = lesson.follow_torch(torch.optim.Muon, param, grads, **settings)
    agrees(f"06 muon_step {scale}, in bfloat16", "torch.optim.Muon", ours[-1], theirs[-1], tolerance=1e-2)
    exact = lesson.follow(lesson.muon_step, param, grads, **settings)
    agrees(f"06 muon_step {scale}, in float32", "torch.optim.Muon", exact[-1], theirs[-1], tolerance=5e-3)


@pytest.mark.parametrize("shape", [(12, 12), (40, 9), (9, 40), (1, 7), (7, 1)], ids=str)
def test_newton_schulz_is_its_polynomial_on_the_singular_values(lesson, agrees, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 100
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    agrees("06 newton_schulz", "torch.linalg.svd", lesson.newton_schulz(matrix), u * s @ vt, tolerance=1e-7)


def test_the_band_that_the_lesson_states(lesson):
    # every singular value above 0.0015 of the norm lands in [0.68, 1.21] after five rounds, one below it need not
    values = torch.logspace(-2.8, 0, 4000, dtype=torch.float64)[:-1]
    after = torch.stack([lesson.newton_schulz(torch.diag(torch.stack((v, (1 - v**2).sqrt()))))[0, 0] for v in values])
    assert after.min() > 0.68
    assert after.max() < 1.21
    small = torch.diag(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert lesson.newton_schulz(small)[0, 0] < 0.5


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_is_pytorchs(lesson, agrees, max_norm):
    g = torch.Generator().manual_seed(9)
    ours = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=g)
        b.grad = a.grad.clone()
    norm, expected = lesson.clip_grad_norm(iter(ours), max_norm), nn.utils.clip_grad_norm_(theirs, max_norm)
    agrees("06 clip_grad_norm, the norm", "nn.utils.clip_grad_norm_", norm, expected, tolerance=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        agrees("06 clip_grad_norm, gradients", "nn.utils.clip_grad_norm_", a.grad, b.grad, tolerance=1e-5)


@pytest.mark.parametrize(("warmup", "decay", "total"), [(0, 20, 100), (10, 30, 100), (7, 3, 10), (1, 0, 5)])
def test_schedules_are_hugging_faces(lesson, agrees, warmup, decay, total):
    transformers = pytest.importorskip("transformers")

    def rates(make):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
        scheduler = make(optimizer)
        found = []
        for _ in range(total):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return torch.tensor(found, dtype=torch.float64)

    def ours(schedule, *settings):
        return torch.tensor([schedule(step, 0.3, *settings) for step in range(total)], dtype=torch.float64)

    agrees(
        "06 warmup_cosine",
        "transformers",
        ours(lesson.warmup_cosine, warmup, total),
        rates(lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, total)),
        tolerance=1e-12,
    )
    agrees(
        "06 warmup_stable_decay",
        "transformers",
        ours(lesson.warmup_stable_decay, warmup, decay, total),
        rates(lambda o: transformers.get_wsd_schedule(o, warmup, decay, num_training_steps=total, decay_type="linear")),
        tolerance=1e-12,
    )


def test_accumulated_gradients_are_the_whole_batchs(lesson, agrees):
    g = torch.Generator().manual_seed(10)
    torch.manual_seed(10)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20)).double()
    batches = [(torch.randint(20, (n, 6), generator=g), torch.randint(20, (n, 6), generator=g)) for n in (1, 5, 2)]
    batches[1][1][2:, 1:] = -100
    loss = lesson.accumulate_gradients(model, batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    agrees("06 accumulate_gradients, the loss", "one whole batch", torch.tensor(loss, dtype=whole.dtype), whole, 1e-12)
    for p, expected in zip(model.parameters(), torch.autograd.grad(whole, list(model.parameters())), strict=True):
        agrees("06 accumulate_gradients", "one whole batch", p.grad, expected, tolerance=1e-12)


def test_lion_is_its_published_program(lesson, agrees):
    """Program 1 of Chen et al. 2023, with its two interpolations, in NumPy-like steps on single numbers."""
    param, grads = draw((9,))
    ours = lesson.follow(lesson.lion_step, param, grads, lr=0.01, betas=(0.9, 0.99), weight_decay=0.3)[-1]
    theirs = []
    for i in range(9):
        theta, momentum = param[i].item(), 0.0
        for grad in (grad[i].item() for grad in grads):
            update = 0.9 * momentum + 0.1 * grad
            theta -= 0.01 * ((update > 0) - (update < 0) + 0.3 * theta)
            momentum = 0.99 * momentum + 0.01 * grad
        theirs.append(theta)
    agrees("06 lion_step", "scalar arithmetic", ours, torch.tensor(theirs, dtype=torch.float64), tolerance=1e-12)


def test_digits_floor_is_far_from_the_noise(lesson):
    """The graded training on 20 seeds: the worst of them stays well above the floor of 88 %."""
    from llm40 import data

    worst = 1.0
    for seed in range(20):
        images, labels = data.digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        pixels, labels = images.flatten(1)[order], labels[order]
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        picks = torch.randint(1400, (100, 128), generator=torch.Generator().manual_seed(seed + 1))
        lesson.train(
            model,
            [[(pixels[p[:100]], labels[p[:100]]), (pixels[p[100:]], labels[p[100:]])] for p in picks],
            lr=0.02,
            warmup_steps=5,
        )
        worst = min(worst, (model(pixels[1400:]).argmax(1) == labels[1400:]).float().mean().item())
    print(f"worst of 20 seeds: {100 * worst:.1f} %")
    assert worst > 0.92
