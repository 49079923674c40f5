"""Lesson 18 against torch's own number formats and casts, GradScaler, Adam, autocast's lists, and saved tensors."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

CARRIERS = {"BF16": torch.int16, "FP16": torch.int16, "E5M2": torch.uint8, "E4M3": torch.uint8}
SATURATES = torch.tensor(1e9).to(torch.float8_e4m3fn).float().isfinite()  # PyTorch's cast to E4M3, since version 2.12


@pytest.fixture
def lesson(reference):
    return reference("18")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def any_float32(count: int, seed: int) -> torch.Tensor:
    """Random bit patterns: every octave, subnormals, infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator(seed)).to(torch.int32)
    return torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])


def bit_for_bit(agrees, what: str, against: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Values, infinities, NaN and the sign of zero; the finite ones make the row of the table."""
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(actual[known].signbit(), expected[known].signbit())
    assert torch.equal(actual[known], expected[known])
    finite = expected.isfinite()
    agrees(what, against, actual[finite], expected[finite], 0.0)


@pytest.mark.parametrize("name", CARRIERS)
def test_decode_all_patterns(lesson, agrees, name):
    kind = getattr(lesson, name)
    bits = torch.arange(2 ** (1 + kind.exponent + kind.mantissa))
    expected = bits.to(CARRIERS[name]).view(kind.dtype).float()
    decoded = lesson.decode_float(bits, *kind.layout)
    bit_for_bit(agrees, f"decode_float, all of {name}", str(kind.dtype), decoded, expected)


def test_decode_float32(lesson, agrees):
    x = any_float32(200_000, 1)
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    bit_for_bit(agrees, "decode_float, FP32", "torch.float32", lesson.decode_float(bits, 8, 23), x)


@pytest.mark.parametrize("name", ["BF16", "FP16", "E5M2"])
def test_round(lesson, agrees, name):
    kind, x = getattr(lesson, name), any_float32(200_000, 2)
    rounded = lesson.round_to_format(x, *kind.layout)
    bit_for_bit(agrees, f"round_to_format, {name}", f"cast to {kind.dtype}", rounded, x.to(kind.dtype).float())


def test_round_e4m3(lesson, agrees):
    x = torch.cat([any_float32(200_000, 3), torch.linspace(-500, 500, 20_001)])
    cast = x.to(torch.float8_e4m3fn).float()
    what = "saturating" if SATURATES else "not saturating"
    rounded = lesson.round_to_format(x, *lesson.E4M3.layout, saturate=bool(SATURATES))
    bit_for_bit(agrees, f"round_to_format, E4M3 {what}", "cast to torch.float8_e4m3fn", rounded, cast)
    plain = lesson.round_to_format(x, *lesson.E4M3.layout)
    fits = x.abs() <= 464
    bit_for_bit(agrees, "round_to_format, E4M3 up to 464", "cast to torch.float8_e4m3fn", plain[fits], cast[fits])
    assert plain[~fits].isnan().all()


@pytest.mark.parametrize("name", CARRIERS)
def test_ties(lesson, agrees, name):
    """Every middle between two neighbors, in float32 where that holds it."""
    kind = getattr(lesson, name)
    line = torch.arange(2 ** (kind.exponent + kind.mantissa)).to(CARRIERS[name]).view(kind.dtype).float()
    line = line[line.isfinite()].double()
    middle = (line[1:] + line[:-1]) / 2
    assert torch.equal(middle.float().double(), middle)
    rounded = lesson.round_to_format(middle, *kind.layout)
    cast = middle.float().to(kind.dtype)
    bit_for_bit(agrees, f"round_to_format, ties of {name}", f"cast to {kind.dtype}", rounded, cast)


def test_round_float64(lesson, agrees):
    exponents = torch.randint(-160, 140, (100_000,), generator=generator(4))
    x = torch.randn(100_000, generator=generator(5), dtype=torch.float64) * 2.0**exponents
    rounded = lesson.round_to_format(x, *lesson.FP32.layout)
    bit_for_bit(agrees, "round_to_format, FP32", "cast from float64 to float32", rounded, x.float())


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("E4M3", "float8_e4m3fn"),
        ("E5M2", "float8_e5m2"),
        ("E3M2", "float6_e3m2fn"),
        ("E2M3", "float6_e2m3fn"),
        ("E2M1", "float4_e2m1fn"),
    ],
)
def test_ml_dtypes(lesson, agrees, name, peer):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind, x = getattr(lesson, name), any_float32(50_000, 6)
    if kind.special == "none":
        x = x[~x.isnan()]
    with np.errstate(invalid="ignore"):  # NumPy warns of a cast that gives NaN
        theirs = torch.from_numpy(x.numpy().astype(getattr(ml_dtypes, peer)).astype("float32"))
    rounded = lesson.round_to_format(x, *kind.layout)
    bit_for_bit(agrees, f"round_to_format, {name}", f"ml_dtypes {peer}", rounded, theirs)


def test_stochastic_rounding(lesson, agrees):
    x = torch.randn(400, generator=generator(7)) * 2.0 ** torch.randint(-20, 20, (400,), generator=generator(8))
    draws = 4000
    drawn = lesson.stochastic_round_bf16(x.expand(draws, -1), generator(9)).double()
    low, high = drawn.amin(0), drawn.amax(0)
    nearest = x.bfloat16().double()
    assert ((low == nearest) | (high == nearest)).all()
    standard = (high - low) / 2 / draws**0.5
    z = (drawn.mean(0) - x.double()) / standard.clamp(min=1e-300)
    agrees("stochastic_round_bf16, mean in standard errors", "unbiased", z / 6, torch.zeros(400), 1.0)
    exact = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    again = lesson.stochastic_round_bf16(exact.float(), generator(10))
    bit_for_bit(agrees, "stochastic_round_bf16 of bfloat16 numbers", "themselves", again, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_master_weights(lesson, agrees, dtype):
    g = generator(11)
    mine = [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((7, 3), (5,))]
    theirs = [nn.Parameter(p.detach().float().clone()) for p in mine]
    ours, peer = lesson.MasterWeightAdam(mine, lr=3e-3), torch.optim.Adam(theirs, lr=3e-3)
    for _ in range(300):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            q.grad = p.grad.float()
        assert ours.step() is True
        peer.step()
    for p, m, q in zip(mine, ours.master, theirs, strict=True):
        agrees(f"MasterWeightAdam, {dtype}", "torch.optim.Adam in float32", m, q, 1e-5)
        assert torch.equal(p.detach(), m.to(dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_scale": 2.0**10, "growth_interval": 3},
        {"growth_interval": 7},
        {"init_scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 2},
    ],
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_loss_scaler(lesson, agrees, settings, optimizer):
    """Two hundred iterations with random infinities and NaN, with and without clipping in between."""
    g = generator(12)
    start = torch.randn(6, generator=g)
    sides = []
    for make in (lesson.DynamicLossScaler, lambda **s: torch.amp.GradScaler("cpu", **s)):
        p = nn.Parameter(start.clone())
        sides.append((p, optimizer([p], lr=0.01), make(**settings)))
    scales = ([], [])
    for _ in range(200):
        slope = torch.randn(6, generator=g)
        if torch.rand(1, generator=g) < 0.15:
            slope[torch.randint(0, 6, (1,), generator=g)] = math.inf if torch.rand(1, generator=g) < 0.5 else math.nan
        clip = bool(torch.rand(1, generator=g) < 0.5)
        for (p, rule, scaler), log in zip(sides, scales, strict=True):
            rule.zero_grad()
            scaler.scale((p * slope).sum()).backward()
            if clip:
                scaler.unscale_(rule)
                nn.utils.clip_grad_norm_([p], 0.3)
            scaler.step(rule)
            scaler.update()
            log.append(scaler.get_scale())
    assert scales[0] == scales[1]
    agrees("DynamicLossScaler", "torch.amp.GradScaler", sides[0][0], sides[1][0], 1e-6)


def test_autocast_table(lesson):
    """The lists in ATen/autocast_mode.h, which PyTorch ships."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    if not header.exists():
        pytest.skip("this build of PyTorch has no headers")
    lists = {}
    for name, body in re.findall(r"#define AT_FORALL_(\w+)\(_\)((?:.*\\\n)*.*)", header.read_text()):
        lists[name] = set(re.findall(r"_\((\w+)", body))
    kinds = {
        "half": lists["LOWER_PRECISION_FP"],
        "float32": lists["FP32"] | lists["FP32_SET_OPT_DTYPE"],
        "widest": lists["PROMOTE"],
    }
    assert sum(map(len, lesson.AUTOCAST.values())) == 30
    for name, operations in lesson.AUTOCAST.items():
        assert set(operations) <= kinds[name], name
    on_a_list = set().union(*kinds.values())
    assert not on_a_list & {
        "relu",
        "gelu",
        "silu",
        "add",
        "mul",
        "dropout",
        "embedding",
        "transpose",
        "tanh",
        "sigmoid",
    }


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_formats(lesson, half):
    """Operations whose rule is the same on a CPU, run by torch.autocast itself."""
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    program = [("h", "linear", ["x", "w"]), ("a", "relu", ["h"]), ("y", "matmul", ["a", "w"]), ("x", "add", ["x", "y"])]
    with torch.autocast("cpu", half):
        h = F.linear(x, w)
        a = F.relu(h)
        y = a @ w
        out = x + y
    expected = {"h": h.dtype, "a": a.dtype, "y": y.dtype, "x": out.dtype}
    assert lesson.autocast_formats(program, {"x": x.dtype, "w": w.dtype}, half) == expected


@pytest.mark.parametrize(("m", "k", "n"), [(5, 300, 200), (64, 512, 128), (1, 1, 1)])
def test_blockwise_fp8(lesson, agrees, m, k, n):
    g = generator(13)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    a *= 10.0 ** torch.randint(-3, 4, (m, 1), generator=g)
    kept = []
    for x, (tall, wide) in ((a, (1, 128)), (b, (128, 128))):
        y = torch.zeros(x.shape, dtype=torch.float64)
        for i in range(0, x.shape[0], tall):
            for j in range(0, x.shape[1], wide):
                tile = x[i : i + tall, j : j + wide]
                scale = tile.abs().max() / 448
                y[i : i + tall, j : j + wide] = (tile / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
        kept.append(y)
    product = lesson.blockwise_fp8_matmul(a, b)
    agrees("blockwise_fp8_matmul", "block by block, products in float64", product, kept[0] @ kept[1], 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "seq", "heads", "width"), [(1, 9, 1, 4), (3, 16, 4, 32), (2, 40, 6, 24)])
def test_activations(lesson, agrees, batch, seq, heads, width, checkpointing):
    """Bytes that autograd hands to saved_tensors_hooks, for each storage once."""
    config = lesson.GPTConfig(vocab=70, width=width, layers=3, heads=heads, context=seq)
    model, tokens = lesson.GPT(config), torch.randint(0, 70, (batch, seq), generator=generator(14))
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.is_floating_point() and t.dim() and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(tokens, tokens, checkpointing=checkpointing)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    need = lesson.training_memory(config, batch, seq, mixed=False, checkpointing=checkpointing)
    what = "training_memory, activations" + (", checkpointed" if checkpointing else "")
    agrees(what, "saved_tensors_hooks", torch.tensor(need["activations"]), torch.tensor(measured), 0.0)


def test_parameters_and_paper(lesson, agrees):
    """GPT-2's parameters in transformers; the formula of Korthikanti et al. without dropout masks and statistics."""
    transformers = pytest.importorskip("transformers")
    config = lesson.GPTConfig(vocab=50_257, width=768, layers=12, heads=12, context=1024)
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    count = sum(p.numel() for p in gpt2.parameters())
    need = lesson.training_memory(config, 4, 1000)
    mine, theirs = torch.tensor(need["parameters"]), torch.tensor(2 * count)
    agrees("training_memory, parameters", "transformers GPT2LMHeadModel", mine, theirs, 0.0)
    s, b, h, a = 1000, 4, 768, 12
    masks = 2 * s * b * h + a * s * s * b + 2 * a * s * s * b  # dropout: two masks, that of the weights, their output
    paper = 34 * s * b * h + 5 * a * s * s * b - masks
    deeper = lesson.GPTConfig(vocab=50_257, width=768, layers=13, heads=12, context=1024)
    layer = lesson.training_memory(deeper, b, s)["activations"] - need["activations"] - 16 * s * b
    mine, theirs = torch.tensor(layer), torch.tensor(paper)
    agrees("training_memory, one layer", "34sbh + 5as²b, arXiv:2205.05198", mine, theirs, 0.0)


def test_model_is_gpt2(lesson, agrees):
    """The model whose memory is counted computes what transformers' GPT-2 computes."""
    transformers = pytest.importorskip("transformers")
    config = lesson.GPTConfig(vocab=60, width=24, layers=2, heads=3, context=12)
    settings = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "activation_function": "gelu"}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_positions=12, n_embd=24, n_layer=2, n_head=3, **settings)
    )
    mine = lesson.GPT(config)
    body = theirs.transformer
    with torch.no_grad():
        mine.embed.weight.copy_(body.wte.weight)
        mine.position.weight.copy_(body.wpe.weight)
        mine.norm.load_state_dict(body.ln_f.state_dict())
        for block, peer in zip(mine.blocks, body.h, strict=True):
            block.norm1.load_state_dict(peer.ln_1.state_dict())
            block.norm2.load_state_dict(peer.ln_2.state_dict())
            for linear, conv in (
                (block.qkv, peer.attn.c_attn),
                (block.out, peer.attn.c_proj),
                (block.up, peer.mlp.c_fc),
                (block.down, peer.mlp.c_proj),
            ):
                linear.weight.copy_(conv.weight.T)
                linear.bias.copy_(conv.bias)
    tokens = torch.randint(0, 60, (2, 12), generator=generator(15))
    targets = torch.randint(0, 60, (2, 12), generator=generator(16))
    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    agrees("GPT, loss", "transformers GPT2LMHeadModel", mine(tokens, targets), expected, 1e-6)
