"""Lesson 36 against transformers' slow paths of Mamba and Mamba-2, and SciPy's systems and matrix exponential."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llm40  # noqa: F401  before transformers, which imports Triton

scipy_signal = pytest.importorskip("scipy.signal")
scipy_linalg = pytest.importorskip("scipy.linalg")
scipy_integrate = pytest.importorskip("scipy.integrate")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("36")


@pytest.fixture(scope="module")
def mamba():
    return pytest.importorskip("transformers.models.mamba.modeling_mamba")


@pytest.fixture(scope="module")
def mamba2():
    return pytest.importorskip("transformers.models.mamba2.modeling_mamba2")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- fixed systems ---


@pytest.mark.parametrize("imaginary", [0.0, 3.0])
def test_zero_order_hold(lesson, agrees, imaginary):
    """SciPy's exponential of the augmented matrix, and its own discretization of the system."""
    A = torch.complex(-drawn(6, seed=1).abs(), imaginary * drawn(6, seed=2))
    A[4] = 0
    A = A if imaginary else A.real.contiguous()
    B = drawn(6, seed=3).to(A.dtype)
    for dt in (1e-6, 0.1, 2.5):
        A_bar, B_bar = lesson.discretize_zoh(A, B, torch.tensor(dt, dtype=torch.float64))
        found = []
        for a, b in zip(A.tolist(), B.tolist(), strict=True):
            found.append(scipy_linalg.expm(dt * np.array([[a, b], [0, 0]]))[0])
        kind = "complex" if imaginary else "real"
        for k, (mine, what) in enumerate(((A_bar, "A_bar"), (B_bar, "B_bar"))):
            theirs = torch.tensor(np.array(found)[:, k]).to(mine.dtype)
            agrees(f"discretize_zoh, {what}, {kind}", "scipy.linalg.expm", *parts(mine, theirs), 1e-12)
    if not imaginary:
        size = np.zeros((1, 6)), np.zeros((1, 1))
        system = (np.diag(A.numpy()), B.numpy()[:, None], *size)
        Ad, Bd, *_ = scipy_signal.cont2discrete(system, 2.5, method="zoh")
        agrees("discretize_zoh, A_bar", "scipy.signal.cont2discrete", A_bar, torch.tensor(np.diag(Ad)), 1e-12)
        agrees("discretize_zoh, B_bar", "scipy.signal.cont2discrete", B_bar, torch.tensor(Bd[:, 0]), 1e-12)


def parts(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.view_as_real(t.contiguous()) if t.is_complex() else t for t in tensors]


def test_recurrence_kernel_and_convolution(lesson, agrees):
    """scipy.signal's discrete systems and its convolution, channel by channel."""
    channels, N, length = 3, 4, 50
    A_bar = 2 * torch.rand(channels, N, generator=torch.Generator().manual_seed(4)).double() - 1
    B_bar, C = drawn(channels, N, seed=5), drawn(channels, N, seed=6)
    u = drawn(2, length, channels, seed=7)
    y, _ = lesson.ssm_recurrence(u, A_bar, B_bar, C)
    K = lesson.ssm_kernel(A_bar, B_bar, C, length)
    convolved = lesson.ssm_convolution(u, K)
    for d in range(channels):
        # SciPy reads the state before the token is in: C·A, with C·B passed through at once.
        readout = (C[d] * A_bar[d])[None].numpy()
        through = np.array([[float(C[d] @ B_bar[d])]])
        system = (np.diag(A_bar[d].numpy()), B_bar[d][:, None].numpy(), readout, through, 1.0)
        _, impulse = scipy_signal.dimpulse(system, n=length)
        agrees("ssm_kernel", "scipy.signal.dimpulse", K[d], torch.tensor(impulse[0][:, 0]), 1e-12)
        for row in range(2):
            _, theirs, _ = scipy_signal.dlsim(system, u[row, :, d].numpy())
            theirs = torch.tensor(theirs[:, 0])
            agrees("ssm_recurrence", "scipy.signal.dlsim", y[row, :, d], theirs, 1e-12)
            agrees("ssm_convolution of ssm_kernel", "scipy.signal.dlsim", convolved[row, :, d], theirs, 1e-12)
            whole = scipy_signal.fftconvolve(u[row, :, d].numpy(), K[d].numpy())[:length]
            agrees("ssm_convolution", "scipy.signal.fftconvolve", convolved[row, :, d], torch.tensor(whole), 1e-12)


def test_hippo(lesson, agrees):
    """t·c' = A·c + B·u solved by SciPy from t = 1 to 3, against the projections by quadrature."""
    n = 6
    A, B = (t.numpy() for t in lesson.hippo_legs(n))

    def u(t):
        return np.sin(3 * t) + t**2

    def projected(t):
        def integrand(s, m):
            return u(t * s) * math.sqrt(2 * m + 1) * np.polynomial.legendre.legval(2 * s - 1, [0] * m + [1])

        return [scipy_integrate.quad(integrand, 0, 1, args=(m,), epsabs=1e-13)[0] for m in range(n)]

    solved = scipy_integrate.solve_ivp(
        lambda t, c: (A @ c + B * u(t)) / t, (1.0, 3.0), projected(1.0), method="DOP853", rtol=1e-12, atol=1e-13
    )
    agrees(
        "hippo_legs, the coefficients at t = 3",
        "scipy.integrate, Legendre projections",
        torch.tensor(solved.y[:, -1]),
        torch.tensor(projected(3.0), dtype=torch.float64),
        1e-11,
    )


# --- the selective scan ---


def selective(batch=2, length=19, channels=5, N=4, dtype=torch.float64):
    u, dt = drawn(batch, length, channels, seed=8), drawn(batch, length, channels, seed=9).abs()
    A = -drawn(channels, N, seed=10).abs()
    B, C = drawn(batch, length, N, seed=11), drawn(batch, length, N, seed=12)
    return [t.to(dtype) for t in (u, dt, A, B, C, drawn(channels, seed=13))]


def theirs_selective(mamba, u, dt, A, B, C, D):
    """Their slow path, which computes some steps in float32: (batch, channels, length) and (batch, N, length)."""
    return mamba.mamba_selective_scan(u.mT, dt.mT, A, B.mT, C.mT, D, return_last_state=True)


def test_selective_scan(lesson, agrees, mamba):
    inputs = selective(dtype=torch.float32)
    y, state = lesson.selective_scan(*inputs)
    expected, expected_state = theirs_selective(mamba, *inputs)
    agrees("selective_scan, y", "transformers mamba_selective_scan", y, expected.mT, 1e-5)
    agrees("selective_scan, state", "transformers mamba_selective_scan", state, expected_state, 1e-5)


def test_one_step(lesson, agrees, mamba):
    """Their update of a state for one token, against a scan of length 1 from that state."""
    u, dt, A, B, C, D = selective(length=1, dtype=torch.float32)
    before = drawn(2, 5, 4, seed=14, dtype=torch.float32)
    after = before.clone()
    expected = mamba.mamba_selective_state_update(after, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    y, state = lesson.selective_scan(u, dt, A, B, C, D, before)
    agrees("selective_scan of one token, y", "transformers mamba_selective_state_update", y[:, 0], expected, 1e-5)
    agrees("selective_scan of one token, state", "transformers mamba_selective_state_update", state, after, 1e-5)


def test_scan_kernels(lesson, agrees, mamba):
    if not lesson.profile.has_triton:
        pytest.skip("Triton exists for Linux only")
    device = lesson.profile.device
    u, dt, A, B, C, D = (t.to(device) for t in selective(batch=1, length=21, channels=3, dtype=torch.float32))
    y = lesson.fused_selective_scan(u, dt, A, B, C, D, blocks=(2, 8))
    expected, _ = theirs_selective(mamba, u, dt, A, B, C, D)
    agrees("fused_selective_scan", "transformers mamba_selective_scan", y, expected.mT, 1e-5)
    a, b = torch.full((3, 30), 0.875, device=device), drawn(3, 30, seed=15, dtype=torch.float32).to(device)
    h = lesson.gated_scan(a, b, blocks=(2, 16))
    filtered = scipy_signal.lfilter([1.0], [1.0, -0.875], b.cpu().numpy().astype(np.float64))
    agrees("gated_scan", "scipy.signal.lfilter", h.cpu(), torch.tensor(filtered), 1e-6)


@pytest.mark.parametrize("length", [1, 2, 9, 64, 101])
def test_associative_scan(lesson, agrees, length):
    """NumPy's own prefixes, and SciPy's filter with one decay."""
    x = drawn(length, 3, seed=16)
    for name, combine in (("add", torch.add), ("maximum", torch.maximum), ("multiply", torch.mul)):
        [found] = lesson.associative_scan(lambda p, q, combine=combine: (combine(p[0], q[0]),), (x,))
        expected = getattr(np, name).accumulate(x.numpy(), axis=0)
        agrees(f"associative_scan, {name}", "numpy accumulate", found, torch.tensor(expected), 1e-12)
    decay = torch.full_like(x, 0.9)
    _, states = lesson.associative_scan(lesson.compose, (decay, x))
    filtered = scipy_signal.lfilter([1.0], [1.0, -0.9], x.numpy(), axis=0)
    agrees("associative_scan of compose", "scipy.signal.lfilter", states, torch.tensor(filtered), 1e-12)


# --- Mamba-2 ---


def heads(batch=2, length=21, count=4, head_dim=3, groups=2, N=5):
    u, dt = drawn(batch, length, count, head_dim, seed=17), drawn(batch, length, count, seed=18).abs()
    A = -drawn(count, seed=19).abs()
    B, C = drawn(batch, length, groups, N, seed=20), drawn(batch, length, groups, N, seed=21)
    return [t.float() for t in (u, dt, A, B, C, drawn(count, seed=22), drawn(batch, count, head_dim, N, seed=23))]


def test_segment_sums(lesson, agrees, mamba2):
    log_a = -drawn(2, 3, 11, seed=24).abs()
    mine, theirs = lesson.segment_sums(log_a), mamba2.segment_sum(log_a)
    agrees("segment_sums, exp", "transformers mamba2 segment_sum", mine.exp(), theirs.exp(), 1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 7, 32])
def test_chunks(lesson, agrees, mamba2, chunk):
    u, dt, A, B, C, D, start = heads()
    y, state = lesson.ssd_chunked(u, dt, A, B, C, chunk, D, start)
    expected, expected_state = mamba2.mamba2_chunk_scan(
        u, dt, A, B, C, chunk, D, initial_states=start, return_final_states=True
    )
    agrees("ssd_chunked, y", "transformers mamba2_chunk_scan", y, expected, 1e-5)
    agrees("ssd_chunked, state", "transformers mamba2_chunk_scan", state, expected_state, 1e-5)
    whole = mamba2.mamba2_chunk_scan(u, dt, A, B, C, 256)
    by_matrix = torch.einsum("bhij,bjhp->bihp", lesson.ssd_matrix(dt, A, B, C), u)
    agrees("ssd_matrix times u", "transformers mamba2_chunk_scan", by_matrix, whole, 1e-5)


def test_state_needed(lesson):
    """NumPy's rank of every block of Mamba-2's matrix."""
    _, dt, A, B, C, _, _ = (t.double() for t in heads(batch=1, count=1, groups=1, N=3))
    M = lesson.ssd_matrix(dt, A, B, C)[0, 0]
    for cut in range(1, len(M)):
        block = M[cut:, :cut].numpy()
        assert lesson.state_needed(M, cut, 0.0) == np.linalg.matrix_rank(block, tol=1e-12 * np.linalg.norm(block, 2))


# --- the block ---


def mixers(lesson, mamba, **sizes):
    """(the lesson's block, their mixer and its config) with the same random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=12, state_size=sizes.get("d_state", 16), conv_kernel=sizes.get("d_conv", 4),
        expand=sizes.get("expand", 2), time_step_rank=sizes.get("dt_rank", "auto"), num_hidden_layers=1,
    )  # fmt: skip
    theirs = mamba.MambaMixer(config, 0).eval()
    mine = lesson.MambaBlock(12, **sizes)
    values = {name: drawn(*p.shape, seed=30 + i).float() * 0.4 for i, (name, p) in enumerate(theirs.named_parameters())}
    theirs.load_state_dict(values)
    mine.load_state_dict(values)
    return mine, theirs, config


@pytest.mark.parametrize("sizes", [{}, {"d_state": 3, "d_conv": 2, "expand": 3, "dt_rank": 4}])
@torch.no_grad()
def test_mamba_block(lesson, agrees, mamba, sizes):
    """The same parameters by name, and the same outputs."""
    mine, theirs, _ = mixers(lesson, mamba, **sizes)
    assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    x = drawn(2, 17, 12, seed=25).float()
    y, _ = mine(x)
    agrees("MambaBlock", "transformers MambaMixer", y, theirs(x), 1e-5)


@torch.no_grad()
def test_decoding(lesson, agrees, mamba):
    """A prompt and then single tokens, with their cache and with the block's memory."""
    transformers = pytest.importorskip("transformers")
    mine, theirs, config = mixers(lesson, mamba, d_state=4)
    x = drawn(2, 12, 12, seed=26).float()
    cache = transformers.DynamicCache(config=config)
    first = theirs(x[:, :7], cache_params=cache)
    y, memory = mine(x[:, :7])
    agrees("MambaBlock, the prompt", "transformers MambaMixer with a cache", y, first, 1e-5)
    for t in range(7, 12):
        expected = theirs(x[:, t : t + 1], cache_params=cache)[:, 0]
        y, memory = mine.step(x[:, t], memory)
        agrees("MambaBlock.step", "transformers MambaMixer with a cache", y, expected, 1e-5)


def test_initial_values(lesson, mamba):
    """A and D as they are published; the steps between 0.001 and 0.1."""
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    theirs = mamba.MambaMixer(transformers.MambaConfig(hidden_size=24), 0)
    block = lesson.MambaBlock(24)
    assert torch.allclose(block.A_log, theirs.A_log)
    assert torch.equal(block.D, theirs.D)
    steps = F.softplus(block.dt_proj.bias.detach())
    assert float(steps.min()) * (1 + 1e-4) >= 1e-3
    assert float(steps.max()) <= 0.1 * (1 + 1e-4)


# --- a state that turns ---


def test_turning(lesson, agrees):
    """SciPy's filter with one complex pole."""
    length = 60
    pole = 0.97 * np.exp(0.7j)
    b = drawn(1, length, 1, seed=27) + 1j * drawn(1, length, 1, seed=28)

    def scan(a, x, first):
        return torch.tensor(scipy_signal.lfilter([1.0], [1.0, -0.97], x.numpy(), axis=1))

    h = lesson.turning_scan(
        torch.full((1, length, 1), 0.97, dtype=torch.float64),
        torch.full((1, length, 1), 0.7, dtype=torch.float64),
        b,
        scan,
    )
    filtered = torch.tensor(scipy_signal.lfilter([1.0], [1.0, -pole], b.numpy(), axis=1))
    agrees("turning_scan", "scipy.signal.lfilter, a complex pole", *parts(h, filtered), 1e-12)


def test_crossings():
    """The bound of the last section, tried: 3,000 random sums of N decays and a constant."""
    generator = np.random.default_rng(36)
    t = np.arange(60)[:, None]
    for _ in range(3000):
        N = int(generator.integers(1, 7))
        decays = generator.uniform(0.01, 1.0, N)
        y = (generator.normal(size=N) * 10.0 ** generator.uniform(-1, 1, N) * decays**t).sum(1) + generator.normal()
        assert int(((y[1:] > 0) != (y[:-1] > 0)).sum()) <= N
