"""Lesson 31 against torchao (affine and symmetric codes, MXFP4, NVFP4, SmoothQuant, AWQ), SciPy's Hadamard matrix,
PyTorch's fake quantization, closed forms, and float64 for the kernel over the benchmarks' sweep of shapes.

torchao's GPTQ wants a GPU: GPTQ is held against the closed form of its loss and against exact least squares.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import sweep
from llm40 import profile

pytestmark = [
    pytest.mark.xdist_group("conformance-31"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")


@pytest.fixture
def lesson(reference):
    return reference("31")


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Normal numbers; with `spread`, rows of many sizes."""
    x = torch.randn(*shape, generator=generator(seed))
    return x * torch.exp(spread * torch.randn(shape[0], 1, generator=generator(seed + 1)))


# --- torchao's integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["tensor", "channel", 64, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes(lesson, torchao, agrees, bits, group):
    from torchao.quantization import quant_primitives as ao

    w = drawn(24, 192, seed=bits, spread=1.0) + 0.2
    block = {"tensor": (24, 192), "channel": (1, 192)}.get(group, (1, group))
    for kind, low, high, dtype in (
        (ao.MappingType.ASYMMETRIC, 0, 2**bits - 1, torch.uint8),
        (ao.MappingType.SYMMETRIC, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, torch.int8),
    ):
        scale, zero = ao.choose_qparams_affine(w, kind, block, dtype, low, high, scale_dtype=torch.float32)
        symmetric = kind is ao.MappingType.SYMMETRIC
        if symmetric:
            zero = torch.zeros_like(zero)  # of an odd number of levels theirs is a half, cut off
        codes = ao.quantize_affine(w, block, scale, zero, dtype, low, high)
        theirs = ao.dequantize_affine(codes, block, scale, zero, dtype, low, high)
        made = (lesson.quantize_symmetric if symmetric else lesson.quantize_affine)(w, bits, group)
        name = f"quantize_{'symmetric' if symmetric else 'affine'}"
        agrees(f"{name}, scale", "torchao", made[1].flatten(), scale.flatten(), 1e-6)
        agrees(f"{name}, codes", "torchao", made[0].float(), codes.float(), 0.0)
        agrees("dequantize", "torchao", lesson.dequantize(*made), theirs, 1e-6)
        if not symmetric:
            agrees(f"{name}, zero", "torchao", made[2].flatten().float(), zero.flatten().float(), 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantize(lesson, agrees, bits):
    q = 2 ** (bits - 1) - 1
    w, arrives = drawn(12, 40, seed=3, spread=1.0).requires_grad_(), drawn(12, 40, seed=5)
    scale = w.detach().abs().amax(1) / q
    theirs = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(12, dtype=torch.int32), 0, -q, q)
    ours = lesson.fake_quantize(w, bits)
    agrees("fake_quantize", "torch.fake_quantize_per_channel_affine", ours, theirs, 1e-6)
    mine, peer = (torch.autograd.grad(y, w, arrives)[0] for y in (ours, theirs))
    agrees("fake_quantize, gradient", "torch.fake_quantize_per_channel_affine", mine, peer, 0.0)


def test_llm_int8(lesson, agrees):
    x, w = drawn(40, 96, seed=7), drawn(30, 96, seed=8)
    x[:, 11], x[3, 60] = 30 * x[:, 11], 9.0
    outlier = (x.abs() >= 6).any(0)
    w_step, rest = w.abs().amax(1) / 127, x.masked_fill(outlier, 0)
    x_step = rest.abs().amax(1) / 127
    codes = [torch.round(t / step[:, None]).double() for t, step in ((rest, x_step), (w, w_step))]
    exact = codes[0] @ codes[1].T * x_step[:, None] * w_step + x[:, outlier].double() @ w[:, outlier].double().T
    agrees("llm_int8_matmul", "formula in float64", lesson.llm_int8_matmul(x, w), exact, 1e-5)


# --- Scaling and rotating ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_smoothquant(lesson, torchao, agrees, alpha):
    from torchao.prototype.smoothquant.core import SmoothQuantObserver

    x, w = drawn(200, 48, seed=9) * torch.linspace(0.1, 60, 48), drawn(32, 48, seed=10)
    observer = SmoothQuantObserver(w, alpha)
    observer(x)
    theirs, _, _ = observer.calculate_qparams()
    ours = lesson.smoothquant_scales(x.abs().amax(0), [w[:20], w[20:]], alpha)
    agrees("smoothquant_scales", "torchao SmoothQuantObserver", ours, theirs, 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_awq(lesson, torchao, agrees, seed):
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import IntxWeightOnlyConfig
    from torchao.quantization.quant_primitives import MappingType

    w, x = drawn(16, 64, seed=20 + seed), drawn(120, 64, seed=30 + seed)
    x[:, seed::9] *= 12.0
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    )
    observer = AWQObserver(w, None, config)
    observer(x, None)
    s, _ = lesson.awq_search(w, x, 4, 32)
    agrees("awq_search", "torchao AWQObserver", s, observer.calculate_qparams(), 1e-5)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_rotate(lesson, agrees, size):
    linalg = pytest.importorskip("scipy.linalg")
    h = torch.from_numpy(linalg.hadamard(size)).double()
    x = drawn(7, 256, seed=40).double()
    blocks = x.unflatten(1, (-1, size)) @ h / math.sqrt(size)
    agrees("rotate", "scipy.linalg.hadamard", lesson.rotate(x, size), blocks.flatten(1), 1e-12)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "block"), [(8, 8), (16, 64), (32, 8), (64, 128)])
def test_gptq_by_least_squares(lesson, agrees, group, block):
    """Column j of the weights, when its turn comes, is what least squares gives with the columns before it fixed."""
    x = drawn(300, 64, seed=50).double() @ drawn(64, 64, seed=51).double()
    w = drawn(6, 64, seed=52).double()
    damp = 0.01
    codes, scale, zero = lesson.gptq(w, lesson.layer_hessian(x), 3, group, block, damp)
    back = lesson.dequantize(codes, scale, zero)
    h = 2 / 300 * x.T @ x
    h = h + damp * h.diagonal().mean() * torch.eye(64)
    root = torch.linalg.cholesky(h).T  # d h dᵀ = ‖root dᵀ‖²
    for j in (1, 17, 40, 63):
        fixed = root[:, :j] @ (back[:, :j] - w[:, :j]).T
        free = torch.linalg.lstsq(root[:, j:], -fixed).solution.T + w[:, j:]
        g = j // group
        code = torch.round(free[:, 0] / scale[:, g]) + zero[:, g]
        agrees("gptq, a column's codes", "torch.linalg.lstsq", codes[:, j].float(), code.clamp(0, 7).float(), 0.0)


def test_gptq_two_columns(lesson, agrees):
    """All codes of two weights by enumeration: after the first is rounded, the second is the best that there is."""
    h = torch.tensor([[2.0, 1.3], [1.3, 3.0]], dtype=torch.float64)
    w = drawn(200, 2, seed=60).double()
    codes, scale, zero = lesson.gptq(w, h, 3, 2, 2, 0.0)
    back = lesson.dequantize(codes, scale, zero)
    levels = (torch.arange(8)[None] - zero.double()) * scale
    changes = torch.stack([(back[:, :1] - w[:, :1]).expand(-1, 8), levels - w[:, 1:]], -1)
    losses = torch.einsum("rci,ij,rcj->rc", changes, h, changes)
    found = torch.einsum("ri,ij,rj->r", back - w, h, back - w)
    agrees("gptq, loss of two columns", "enumeration", found, losses.amin(1), 1e-12)


# --- Four-bit floats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_mxfp4(lesson, torchao, agrees, seed, dtype):
    from torchao.prototype.mx_formats import mx_tensor as mx

    x = drawn(64, 256, seed=70 + seed, spread=4.0).to(dtype)
    scale, data = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    theirs = mx.to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    levels, ours = lesson.quantize_fp4(x, "mx")
    agrees("quantize_fp4, MXFP4, scales", "torchao to_mx, FLOOR", ours.log2(), mx.get_fp_scale(scale).log2(), 0.0)
    back = levels * ours.repeat_interleave(32, 1)
    agrees("quantize_fp4, MXFP4", "torchao to_mx, FLOOR", back / ours.amax(), theirs / ours.amax(), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_nvfp4(lesson, torchao, agrees, seed, dtype):
    """torchao raises small scales to 2⁻⁶, the smallest normal E4M3 number: these blocks have larger ones."""
    from torchao.prototype.mx_formats import nvfp4_tensor as nv
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4

    x = drawn(64, 256, seed=80 + seed, spread=0.7).to(dtype)
    t = nv.per_tensor_amax_to_scale(x.abs().amax())
    e, data = nv.nvfp4_quantize(x, 16, t)
    assert float(e.float().min()) > 2**-6
    theirs = f4_unpacked_to_f32(unpack_uint4(data)).view(64, 256)
    levels, scale = lesson.quantize_fp4(x, "nv")
    agrees("quantize_fp4, NVFP4, scales", "torchao nvfp4_quantize", scale, e.float().view(64, 16) * t, 1e-6)
    # A number that lies between two levels: torchao multiplies by a rounded reciprocal, the lesson divides.
    exact = x.double().abs() / scale.double().repeat_interleave(16, 1)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    clear = (exact[..., None] - middles).abs().amin(-1) > 1e-5
    assert float(clear.float().mean()) > 0.98
    agrees("quantize_fp4, NVFP4", "torchao nvfp4_quantize", levels[clear], theirs[clear], 0.0)


# --- Packing and the kernel -------------------------------------------------------------------------------------------


def test_pack(lesson, torchao, agrees):
    """Two words' bytes, lowest first, are torchao's pairs of codes."""
    from torchao.prototype.mx_formats.kernels import pack_uint4

    codes = torch.randint(0, 16, (30, 64), generator=generator(90)).to(torch.uint8)
    theirs = pack_uint4(codes)
    ours = lesson.pack_int4(codes).view(torch.uint8)
    agrees("pack_int4", "torchao pack_uint4", ours.float(), theirs.float(), 0.0)
    for order in lesson.ORDERS:
        again = lesson.unpack_int4(lesson.pack_int4(codes, order), order)
        agrees("unpack_int4", "the codes that were packed", again.float(), codes.float(), 0.0)


def test_the_sweep_has_forty_shapes():
    shapes = sweep.family("31").small
    assert len(set(shapes)) >= 40
    tokens, rows, inner, group, blocks = (set(values) for values in zip(*shapes, strict=True))
    assert {1, 16, 17} <= tokens
    assert any(n % 16 for n in rows)
    assert any(k % 128 for k in inner)
    assert any(8 * b[2] > g for (_, _, _, g, b) in shapes)
    assert any(8 * b[2] < g for (_, _, _, g, b) in shapes)
    assert len(group) >= 5
    assert len(blocks) >= 4


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_kernel_over_shapes(lesson, agrees, dtype):
    """In float16 at most twice the error of the same product in PyTorch."""
    family = sweep.family("31")
    for shape in family.small:
        tensors = family.inputs(*shape, dtype=dtype)
        exact = family.plain(*map(sweep.exactly, tensors))["y"]
        plain, ours = family.plain(*tensors)["y"], family.ours(lesson, *tensors)["y"]
        limit = 2e-6 if dtype == torch.float32 else max(1e-7, 2 * sweep.relative(plain, exact))
        error = sweep.relative(ours, exact)
        assert error <= limit, f"{shape}: relative L2 {error:.1e}, allowed {limit:.1e}"
        name = f"w4a16_kernel, {str(dtype).removeprefix('torch.')}"
        agrees(name, "float64 of the dequantized weight", ours, exact, 1e-5 if dtype == torch.float32 else 5e-3)


@needs_triton
def test_from_weights_to_product(lesson, agrees):
    """Quantized, packed and multiplied, with each method's codes."""
    w, x = drawn(40, 128, seed=95), drawn(5, 128, seed=96)
    x_gpu = x.to(profile.device)
    for made in (lesson.quantize_affine(w, 4, 32), lesson.gptq(w, lesson.layer_hessian(x), 4, 32, 64)):
        codes, scale, zero = (t.to(profile.device) for t in made)
        words = lesson.pack_int4(codes.cpu()).to(profile.device)
        y = lesson.w4a16(x_gpu, words, scale, zero, 32, (16, 16, 16))
        expected = F.linear(x.double(), lesson.dequantize(*made).double())
        agrees("w4a16 of quantized weights", "dequantize, float64", y.cpu(), expected, 1e-5)


def test_orders_are_permutations(lesson):
    for order in lesson.ORDERS.values():
        assert sorted(order) == list(range(8))
    first, second = lesson.ORDERS.values()
    assert list(itertools.chain(first[::2], first[1::2])) == list(second)
