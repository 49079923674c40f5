"""Lesson 38 against transformers' vision and vision–language models, with their weights, as tensors."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llm40.distributed import launch


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("38")


def randomized(module: nn.Module, seed: int, scale: float = 0.3) -> nn.Module:
    """The module in float64 and evaluation mode, all of its parameters random."""
    g = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return module


def block_state(attention: nn.Module, norms: tuple, mlp: tuple, scales: tuple | None = None) -> dict:
    """The weights of one of their blocks under our names. A layer scale is folded into the layer before it."""
    one = torch.ones((), dtype=torch.float64)
    first, second = scales or (one, one)

    def scaled(linear: nn.Linear, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (scale.reshape(-1, 1) * linear.weight, scale * linear.bias)

    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    out, down = scaled(attention.o_proj, first), scaled(mlp[1], second)
    return {
        "norm_1.weight": norms[0].weight,
        "norm_1.bias": norms[0].bias,
        "norm_2.weight": norms[1].weight,
        "norm_2.bias": norms[1].bias,
        "qkv.weight": torch.cat([p.weight for p in parts]),
        "qkv.bias": torch.cat([p.bias for p in parts]),
        "out.weight": out[0],
        "out.bias": out[1],
        "mlp.0.weight": mlp[0].weight,
        "mlp.0.bias": mlp[0].bias,
        "mlp.2.weight": down[0],
        "mlp.2.bias": down[1],
    }


def load(model: nn.Module, embeddings: nn.Module, norm: nn.Module, blocks: list[dict], registers: torch.Tensor):
    projection = embeddings.patch_embeddings.projection
    state = {
        "embed.weight": projection.weight.flatten(1),
        "embed.bias": projection.bias,
        "class_token": embeddings.cls_token.flatten(),
        "register_tokens": registers,
        "positions": embeddings.position_embeddings[0],
        "norm.weight": norm.weight,
        "norm.bias": norm.bias,
    }
    for i, block in enumerate(blocks):
        state |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    model.double().load_state_dict(state)


SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 3,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
}


def test_vit(lesson, agrees):
    from transformers import ViTConfig, ViTModel

    theirs = randomized(ViTModel(ViTConfig(**SIZES, intermediate_size=96), add_pooling_layer=False), 1)
    ours = lesson.VisionTransformer(12, 3, 3, 24, 3, 4)
    blocks = [
        block_state(layer.attention, (layer.layernorm_before, layer.layernorm_after), (layer.mlp.fc1, layer.mlp.fc2))
        for layer in theirs.layers
    ]
    load(ours, theirs.embeddings, theirs.layernorm, blocks, torch.zeros(0, 24))
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = theirs(images).last_hidden_state
    first, patches = ours(images)
    agrees("VisionTransformer, class token", "transformers ViTModel", first, expected[:, 0], 1e-11)
    agrees("VisionTransformer, patches", "transformers ViTModel", patches, expected[:, 1:], 1e-11)


def test_registers(lesson, agrees):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    theirs = randomized(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=5)), 3)
    ours = lesson.VisionTransformer(12, 3, 3, 24, 3, 4, registers=5)
    blocks = [
        block_state(
            layer.attention,
            (layer.norm1, layer.norm2),
            (layer.mlp.fc1, layer.mlp.fc2),
            (layer.layer_scale1.lambda1, layer.layer_scale2.lambda1),
        )
        for layer in theirs.encoder.layer
    ]
    load(ours, theirs.embeddings, theirs.layernorm, blocks, theirs.embeddings.register_tokens[0])
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = theirs(images).last_hidden_state
    first, patches = ours(images)
    name = "transformers Dinov2WithRegistersModel"
    agrees("5 registers, class token", name, first, expected[:, 0], 1e-11)
    agrees("5 registers, patches", name, patches, expected[:, 6:], 1e-11)


def towers(of: str) -> tuple[dict, dict]:
    """Sizes of a small text and a small vision model."""
    same = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = same | {"vocab_size": 30, "max_position_embeddings": 8}
    if of == "clip":
        text |= {"projection_dim": 12, "eos_token_id": 29}
    return text, same | {"image_size": 8, "patch_size": 4}


def losses(theirs: nn.Module) -> tuple:
    """(their output for five pairs, features whose lengths were changed)."""
    g = torch.Generator().manual_seed(6)
    ids = torch.randint(1, 28, (5, 8), generator=g)
    ids[:, -1] = 29
    images = torch.randn(5, 3, 8, 8, generator=g, dtype=torch.float64)
    output = theirs(input_ids=ids, pixel_values=images, return_loss=True)
    lengths = 0.1 + 5 * torch.rand(2, 5, 1, generator=g, dtype=torch.float64)
    return output, output.image_embeds.detach() * lengths[0], output.text_embeds.detach() * lengths[1]


def test_clip_loss(lesson, agrees):
    from transformers import CLIPConfig, CLIPModel

    text, vision = towers("clip")
    theirs = randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)), 5)
    with torch.no_grad():
        theirs.logit_scale.fill_(2.6592)
    output, u, v = losses(theirs)
    scale = theirs.logit_scale.detach().clone().requires_grad_()
    loss = lesson.clip_loss(u, v, scale)
    agrees("clip_loss", "transformers CLIPModel", loss, output.loss, 1e-12)
    (expected,) = torch.autograd.grad(output.loss, theirs.logit_scale)
    (found,) = torch.autograd.grad(loss, scale)
    agrees("gradient of logit_scale, clip_loss", "transformers CLIPModel", found, expected, 1e-10)


def test_siglip_loss(lesson, agrees):
    from transformers import SiglipConfig, SiglipModel

    text, vision = towers("siglip")
    theirs = randomized(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), 7)
    with torch.no_grad():
        theirs.logit_scale.fill_(2.3026)
        theirs.logit_bias.fill_(-3.0)
    output, u, v = losses(theirs)
    own = [p.detach().clone().requires_grad_() for p in (theirs.logit_scale, theirs.logit_bias)]
    loss = lesson.siglip_loss(u, v, own[0][0], own[1][0])
    agrees("siglip_loss", "transformers SiglipModel", loss, output.loss, 1e-12)
    expected = torch.autograd.grad(output.loss, (theirs.logit_scale, theirs.logit_bias))
    for name, a, b in zip(("scale", "bias"), torch.autograd.grad(loss, own), expected, strict=True):
        agrees(f"gradient of logit_{name}, siglip_loss", "transformers SiglipModel", a, b, 1e-10)


def test_gathered_clip_loss(lesson, agrees):
    """Losses and gradients on three ranks against PyTorch's own gather with a backward pass."""
    from torch.distributed.nn.functional import all_gather

    g = torch.Generator().manual_seed(8)
    features = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)

    def by_pytorch(u, v, s):
        u, v = (nn.functional.normalize(t, dim=-1) for t in (u, v))
        every_u, every_v = torch.cat(all_gather(u)), torch.cat(all_gather(v))
        own = torch.arange(4) + 4 * dist.get_rank()
        entropy = nn.functional.cross_entropy
        return (entropy(s.exp() * u @ every_v.T, own) + entropy(s.exp() * v @ every_u.T, own)) / 2

    def both(rank):
        results = []
        for loss in (lesson.gathered_clip_loss, by_pytorch):
            leaves = [t.clone().requires_grad_() for t in (*features[:, rank], torch.tensor(1.5).double())]
            value = loss(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        return results

    for ours, theirs in launch(both, 3):
        for name, a, b in zip(("loss", "image", "text", "scale"), ours, theirs, strict=True):
            agrees(f"gathered_clip_loss, {name}", "torch.distributed.nn all_gather", a, b, 1e-12)


def test_merge_tokens(lesson, agrees):
    """Qwen2-VL's merger wants the four tokens of a square one behind the other: merge_tokens puts them so."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    merger = randomized(PatchMerger(dim=10, context_dim=6, spatial_merge_size=2), 9)
    tokens = torch.randn(1, 24, 6, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    order = [(2 * r + i) * 6 + 2 * c + j for r in range(2) for c in range(3) for i in range(2) for j in range(2)]
    expected = merger(tokens[0, order])
    merged = lesson.merge_tokens(merger.ln_q(tokens), (4, 6))
    agrees("merge_tokens", "transformers Qwen2-VL PatchMerger", merger.mlp(merged)[0], expected, 1e-12)


def test_projector(lesson, agrees):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    vision = CLIPVisionConfig(hidden_size=6, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(hidden_size=12, num_attention_heads=2))
    theirs = randomized(LlavaMultiModalProjector(config), 11)
    ours = lesson.Projector(6, 12, (3, 4)).double()
    ours.load_state_dict(
        {name.replace("linear_1", "first").replace("linear_2", "second"): t for name, t in theirs.state_dict().items()}
    )
    patches = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    agrees("Projector", "transformers LlavaMultiModalProjector", ours(patches), theirs(patches), 1e-12)


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {
        "hidden_size": 128,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 60,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10_000.0},
    }
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 128, "spatial_merge_size": 2}
    return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


SEQUENCES = {
    "a text": [5],
    "an image": [(1, 4, 6)],
    "text and images": [3, (1, 2, 5), 4, (1, 7, 2), 1, (1, 3, 3)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_mrope_position_ids(lesson, agrees, name):
    """Images only: for videos the library departs from the paper (see the lesson)."""
    kinds, grids = [], []
    for segment in SEQUENCES[name]:
        if isinstance(segment, int):
            kinds += [0] * segment
        else:
            frames, rows, columns = segment
            kinds += [1] * (frames * rows * columns)
            grids.append([frames, 2 * rows, 2 * columns])  # before merging
    kinds = torch.tensor(kinds)[None]
    expected, _ = qwen2_vl().get_rope_index(
        torch.ones_like(kinds), kinds, image_grid_thw=torch.tensor(grids) if grids else None
    )
    found = lesson.mrope_position_ids(SEQUENCES[name])
    agrees(f"mrope_position_ids, {name}", "transformers Qwen2VLModel", found, expected[:, 0], 0)


def rotary_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(13)
    q, k = torch.randn(2, 2, 3, 9, 128, generator=g)
    return q, k, torch.randint(0, 50, (3, 2, 9), generator=g)


def test_apply_mrope_in_blocks(lesson, agrees):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    q, k, positions = rotary_inputs()
    cos, sin = qwen2_vl().language_model.rotary_emb(q, positions)
    for name, x, expected in zip(("q", "k"), (q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        found = lesson.apply_mrope(x, positions, (16, 24, 24))
        agrees(f"apply_mrope, {name}, blocks 16, 24, 24", "transformers Qwen2-VL", found, expected, 2e-5)


def test_apply_mrope_interleaved(lesson, agrees):
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, apply_rotary_pos_emb

    config = Qwen3VLTextConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        rope_parameters={"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5_000_000.0},
    )
    q, k, positions = rotary_inputs()
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(q, positions)
    for name, x, expected in zip(("q", "k"), (q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        found = lesson.apply_mrope(x, positions, (24, 20, 20), interleaved=True, theta=5_000_000.0)
        agrees(f"apply_mrope, {name}, interleaved 24, 20, 20", "transformers Qwen3-VL", found, expected, 2e-5)
