"""Lesson 25 against PEFT (LoRA, DoRA, prefix tuning on transformers' Llama) and the NF4 table of bitsandbytes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import as_transformers

from llm40 import models  # before peft, which imports Triton

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# bitsandbytes' table, digit by digit: it depends on its CUDA build, which a test does not need.
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


@pytest.fixture
def lesson(reference):
    return reference("25")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(parameters, seed: int) -> None:
    g = generator(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def adapted_by_peft(net: nn.Module, **options) -> nn.Module:
    config = peft.LoraConfig(target_modules=["first", "second"], **options)
    return peft.get_peft_model(copy.deepcopy(net), config).double()


def factors(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora(lesson, agrees, net, rank, rslora):
    """Outputs, gradients of A, B and x, and merged weights, with PEFT's factors copied over."""
    theirs = adapted_by_peft(net, r=rank, lora_alpha=5, use_rslora=rslora, lora_dropout=0.0)
    mine = copy.deepcopy(net)
    assert lesson.inject_lora(mine, ["first", "second"], rank, 5.0, 0.0, rslora) == ["first", "second"]
    assert sum(p.numel() for p in mine.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    for seed, name in enumerate(("first", "second")):
        layer = getattr(mine, name)
        randomize((layer.A, layer.B), seed)
        a, b = factors(getattr(theirs.base_model.model, name))
        with torch.no_grad():
            a.copy_(layer.A)
            b.copy_(layer.B)
    x = torch.randn(4, 3, 7, generator=generator(9), dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(leaf) for model, leaf in zip((mine, theirs), inputs, strict=True)]
    what = f"LoRALinear, rslora={rslora}"
    agrees(f"{what}: output", "peft LoRA", *outputs, 1e-12)
    for out in outputs:
        out.square().sum().backward()
    agrees(f"{what}: gradient of x", "peft LoRA", inputs[0].grad, inputs[1].grad, 1e-12)
    for name in ("first", "second"):
        layer = getattr(mine, name)
        for factor, other in zip((layer.A, layer.B), factors(getattr(theirs.base_model.model, name)), strict=True):
            agrees(f"{what}: gradients of A, B", "peft LoRA", factor.grad, other.grad, 1e-12)
    for name in ("first", "second"):
        getattr(mine, name).merge()
    merged = theirs.merge_and_unload()
    for name in ("first", "second"):
        agrees(f"{what}: merged", "peft LoRA", getattr(mine, name).base.weight, getattr(merged, name).weight, 1e-12)


def test_lora_begins_as_peft_does(lesson, agrees):
    """The same random numbers give the same A; B is zero in both."""
    layer = nn.Linear(40, 24)
    torch.manual_seed(3)
    mine = lesson.LoRALinear(layer, 8)
    torch.manual_seed(3)
    a = nn.Linear(40, 8, bias=False)
    torch.manual_seed(3)
    theirs = nn.init.kaiming_uniform_(torch.empty_like(a.weight), a=math.sqrt(5))
    agrees("LoRALinear: A at first", "nn.init.kaiming_uniform_, as peft draws", mine.A, theirs, 0)
    other = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"], r=8))
    a, b = factors(other.base_model.model[0])
    assert float(a.detach().abs().max()) <= 40**-0.5 >= float(mine.A.detach().abs().max())
    assert not b.any()
    assert not mine.B.any()


@pytest.mark.parametrize("targets", [["first"], ["second"], ["0.first"], ["second", "1.first"]])
def test_targets_are_named_as_in_peft(lesson, targets):
    torch.manual_seed(0)
    model = nn.Sequential(*(Net() for _ in range(12)))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, r=2))
    assert set(lesson.inject_lora(model, targets, 2)) == set(theirs.targeted_module_names)


def test_nothing_matched_is_an_error_in_peft_too(lesson, net):
    with pytest.raises(ValueError, match="third"):
        peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(target_modules=["third"]))
    with pytest.raises(ValueError, match="third"):
        lesson.inject_lora(net, ["third"], 2)


@pytest.mark.parametrize("rank", [1, 4])
def test_dora(lesson, agrees, net, rank):
    """Outputs and gradients of A, B, m with PEFT's parameters; PEFT detaches the norm, too."""
    theirs = adapted_by_peft(net, r=rank, lora_alpha=5, use_dora=True)
    mine = copy.deepcopy(net)
    for seed, name in enumerate(("first", "second")):
        layer = lesson.DoRALinear(getattr(mine, name), rank, 5.0)
        other = getattr(theirs.base_model.model, name)
        length = other.lora_magnitude_vector["default"].weight
        agrees("DoRALinear: m at first", "peft DoRA", layer.m, length, 1e-6)
        setattr(mine, name, layer)
        randomize((layer.A, layer.B, layer.m), seed)
        with torch.no_grad():
            for to, of in zip((*factors(other), length), (layer.A, layer.B, layer.m), strict=True):
                to.copy_(of)
    x = torch.randn(6, 7, generator=generator(9), dtype=torch.float64)
    outputs = [model(x) for model in (mine, theirs)]
    agrees("DoRALinear: output", "peft DoRA", *outputs, 1e-12)
    for out in outputs:
        out.square().sum().backward()
    for name in ("first", "second"):
        layer, other = getattr(mine, name), getattr(theirs.base_model.model, name)
        length = other.lora_magnitude_vector["default"].weight
        for p, q in zip((layer.A, layer.B, layer.m), (*factors(other), length), strict=True):
            agrees("DoRALinear: gradients of A, B, m", "peft DoRA", p.grad, q.grad, 1e-12)


def test_nf4_table(lesson, agrees):
    agrees("nf4_codebook", "bitsandbytes' table, a literal", lesson.nf4_codebook(), NF4, 1e-6)
    scipy = pytest.importorskip("scipy.stats")
    delta = 1 - (1 / 30 + 1 / 32) / 2
    up = torch.from_numpy(scipy.norm.ppf(torch.linspace(0.5, delta, 9, dtype=torch.float64)[1:].numpy()))
    down = torch.from_numpy(scipy.norm.ppf(torch.linspace(0.5, delta, 8, dtype=torch.float64)[1:].numpy()))
    table = torch.cat([-down.flip(0), torch.zeros(1), up]) / up[-1]
    agrees("nf4_codebook", "scipy.stats.norm.ppf", lesson.nf4_codebook(), table, 1e-7)


@pytest.mark.parametrize("block", [16, 64, 100])
def test_nf4_there_and_back(lesson, agrees, block):
    """The nearest value of the literal table, by all distances, in float64."""
    x = torch.randn(37, 53, generator=generator(1)) * 0.02
    packed, absmax = lesson.quantize_nf4(x, block)
    mine = lesson.dequantize_nf4(packed, absmax, x.shape, block)
    flat = x.double().flatten()
    largest = torch.stack([part.abs().max() for part in flat.split(block)])
    scale = largest.repeat_interleave(block)[: flat.numel()]
    table = NF4.double()
    nearest = table[(flat[:, None] / scale[:, None] - table).abs().argmin(1)] * scale
    agrees(f"quantize_nf4, blocks of {block}", "all distances to the literal table", mine.flatten(), nearest, 1e-6)


def test_qlora(lesson, agrees):
    """PEFT's LoRA around a layer whose weight is the dequantized one."""
    base = nn.Linear(64, 48)
    layer = lesson.QLoRALinear(base, 4, 8.0)
    randomize((layer.A, layer.B), 1)
    plain = nn.Linear(64, 48)
    plain.load_state_dict({"weight": layer.dequantized(), "bias": base.bias})
    theirs = peft.get_peft_model(nn.Sequential(plain), peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8))
    a, b = factors(theirs.base_model.model[0])
    with torch.no_grad():
        a.copy_(layer.A)
        b.copy_(layer.B)
    x = torch.randn(5, 64, generator=generator(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0]), theirs(inputs[1])]
    agrees("QLoRALinear: output", "peft LoRA on the dequantized weight", *outputs, 1e-5)
    for out in outputs:
        out.square().sum().backward()
    agrees("QLoRALinear: gradient of x", "peft LoRA on the dequantized weight", inputs[0].grad, inputs[1].grad, 1e-5)
    agrees("QLoRALinear: gradient of A", "peft LoRA on the dequantized weight", layer.A.grad, a.grad, 1e-5)


def test_prefix(lesson, agrees):
    """PEFT's prefix tuning of transformers' Llama with the same weights: logits, and the gradient of the prefix."""
    config = models.Config(vocab_size=50, hidden_size=24, layers=2, heads=4, kv_heads=4, mlp_size=20)
    mine = models.Llama(config).requires_grad_(False)
    randomize(mine.parameters(), 3)
    theirs = as_transformers(mine)
    length = 5
    wrapped = peft.get_peft_model(
        theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    ).eval()
    embedding = wrapped.prompt_encoder["default"].embedding.weight  # (length, layers · 2 · heads · head_dim)
    randomize([embedding], 4)
    stored = embedding.detach().view(length, 2, 2, 4, 6).permute(1, 2, 3, 0, 4)  # layer, key or value, head, …
    keys, values = (stored[:, i].contiguous().requires_grad_() for i in (0, 1))
    tokens = torch.randint(0, 50, (3, 7), generator=generator(5))
    logits = lesson.prefix_logits(mine, keys, values, tokens)
    expected = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    agrees("prefix_logits", "peft prefix tuning, transformers Llama", logits, expected, 1e-4)
    weights = torch.randn(logits.shape, generator=generator(6))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = embedding.grad.view(length, 2, 2, 4, 6).permute(1, 2, 3, 0, 4)
    for i, mine_ in enumerate((keys, values)):
        agrees("prefix_logits: gradients", "peft prefix tuning, transformers Llama", mine_.grad, gradient[:, i], 1e-3)


def test_many_adapters(lesson, agrees):
    """PEFT's batches of mixed adapters; "__base__" is none."""
    torch.manual_seed(0)
    layer = nn.Linear(9, 6, bias=False).double()
    names, alphas = ["default", "one", "two"], [3, 8, 20]
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=alphas[0])
    )
    for name, alpha in zip(names[1:], alphas[1:], strict=True):
        theirs.add_adapter(name, peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=alpha))
    theirs = theirs.double().eval()
    inner = theirs.base_model.model[0]
    a = torch.randn(3, 4, 9, generator=generator(1), dtype=torch.float64)
    b = torch.randn(3, 6, 4, generator=generator(2), dtype=torch.float64)
    with torch.no_grad():
        for i, name in enumerate(names):
            inner.lora_A[name].weight.copy_(a[i])
            inner.lora_B[name].weight.copy_(b[i])
    index = torch.tensor([2, -1, 0, 1, 2])
    x = torch.randn(5, 4, 9, generator=generator(3), dtype=torch.float64)
    mine = lesson.multi_lora_linear(x, layer.weight, a, b, torch.tensor(alphas, dtype=torch.float64) / 4, index)
    wanted = [names[i] if i >= 0 else "__base__" for i in index.tolist()]
    expected = theirs(x, adapter_names=wanted)
    agrees("multi_lora_linear", "peft, adapter_names of a mixed batch", mine, expected, 1e-12)
    assert not torch.equal(mine, F.linear(x, layer.weight))
