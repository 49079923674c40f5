# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: >-
#       A vision transformer with class and register tokens, CLIP and SigLIP trained on handwritten
#       digits, and a projector through which the course's language model captions digits and
#       answers questions about them; rotary positions for time, height and width.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# A language model reads vectors. Token ids only choose rows of a table; behind the table nothing
# asks where a vector came from. So a language model can see, if somebody makes vectors of an image
# that mean something to it.
#
# That leaves four questions. How is an image cut into tokens? Who teaches these tokens what a
# caption would say? How do they get into a sequence of words? And where do they stand, if a word
# has one neighbor to its left and a patch has four neighbors around it?
#
# ## Core ideas
#
# **Patches are words.** A **vision transformer** cuts an image into squares, maps each to a vector,
# and is from there on an ordinary transformer. A **class token** collects what the whole image
# says; **register tokens** are scratch space that nobody reads.
#
# **Captions are labels.** **CLIP** trains an image encoder and a text encoder such that an image
# and its caption get nearby vectors, and other captions of the batch far ones. **SigLIP** asks a
# yes-or-no question about each pair instead.
#
# **A projector translates.** Two linear layers map patch vectors to the width of a language model;
# their outputs take the place of a placeholder in the prompt. This is LLaVA, and in outline every
# open vision–language model since.
#
# **Positions get axes.** **Multimodal RoPE** gives each token a time, a height and a width, and
# shares the pairs of a head's dimensions out among the three.
#
# ### Notation
#
# | symbol | in code | is |
# |---|---|---|
# | $p$ | `patch` | side of a patch, in pixels |
# | $C$ | `channels` | channels of an image: 3 for color, 1 for grey |
# | $n$ | | pairs of image and text in a batch |
# | $s$ | `logit_scale` | logarithm of the factor on cosines |
# | $b$ | `logit_bias` | what SigLIP adds to them |
#
# Images are `(batch, channels, height, width)`, tokens `(batch, tokens, width)`. Patches and grids
# are counted row by row, from the top left. Losses are minimized, in nats.

# %%
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from llm40 import checks, data, models, plot, profile
from llm40.models.llama import through
from torch import Tensor, nn

IGNORE = -100  # the label of a token that does not count


def wide(x: Tensor) -> Tensor:
    """Half precision as float32; other formats as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# %% [markdown]
# ## From pixels to tokens {#patches}
#
# Cut the image into squares of $p\times p$ pixels and write each square as one row of numbers. A
# linear layer makes a vector of width $d$ of it. That is all of the input layer:
#
# $$ y_{ij} = W\,\mathrm{vec}\big(x_{:,\;ip:(i+1)p,\;jp:(j+1)p}\big) + b, \qquad
# W: (d,\; C p^2). $$
#
# In libraries you will find a convolution instead. It is the same thing. A convolution with kernel
# $K$ `(d, C, p, p)` and stride $p$ gives, for output channel $o$ at place $(i, j)$,
#
# $$ y_{ijo} = \sum_{c}\sum_{u<p}\sum_{v<p} K_{ocuv}\; x_{c,\;ip+u,\;jp+v} + b_o. $$
#
# With stride $p$ the windows do not overlap, so each window *is* a patch. The triple sum is the
# product of row $o$ of `K.flatten(1)` with the patch, provided that the patch is written in the
# same order: channel first, then row, then column. Written in another order the layer would learn
# as well, but published weights would not fit.


# %% exercise="patchify" minutes=12 difficulty=1
def patchify(images: Tensor, patch: int) -> Tensor:
    """The patches of images, each as one row of numbers.

    images: (batch, channels, height, width), any dtype and strides, height and width multiples of
    `patch`, else ValueError; they need not be equal. Returns (batch, patches, channels · patch²) of
    the same dtype. Patches come row by row from the top left; in each, numbers stand in the order
    channel, row, column.
    """
    ### BEGIN SOLUTION
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"{height} × {width} pixels cannot be cut into patches of {patch}")
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ### END SOLUTION


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse: the images (batch, channels, height, width) whose patches these are.

    The number of channels follows from the last axis. ValueError where height or width is no
    multiple of `patch`, the number of patches is not that of height × width pixels, or the last
    axis is no multiple of patch². Any dtype and strides.
    """
    ### BEGIN SOLUTION
    batch, count, size = patches.shape
    rows, columns = height // patch, width // patch
    if (rows * patch, columns * patch) != (height, width) or count != rows * columns:
        raise ValueError(f"{count} patches of {patch} make no {height} × {width} pixels")
    if size % patch**2:
        raise ValueError(f"rows of {size} numbers are no patches of {patch} × {patch} pixels")
    cut = patches.reshape(batch, rows, columns, size // patch**2, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // patch**2, height, width)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: six axes</summary>
#
# `reshape` can split an axis in two: height into (rows of patches, rows inside a patch). Split
# both, `permute` the six axes into the order that you want, and merge.
# </details>

# %% tags=["support"]
# Support: numbers that show any rounding on the way


def finest(*shape: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Random numbers of a dtype, with all the digits that it has."""
    if dtype.is_floating_point:
        x = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    elif dtype == torch.bool:
        x = torch.randint(0, 2, shape, generator=g).bool()
    else:
        x = torch.randint(0, torch.iinfo(dtype).max, shape, generator=g, dtype=dtype)
    return x.to(profile.device)


# %% check="patchify" points=2
# Two channels, 2 × 4 pixels, patches of 2.
image = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]], [[10, 11, 12, 13], [14, 15, 16, 17]]])
left, right = [0, 1, 4, 5, 10, 11, 14, 15], [2, 3, 6, 7, 12, 13, 16, 17]
checks.close(
    patchify(image[None], 2),
    torch.tensor([[left, right]]),
    what="the two patches of a 2 × 4 image of two channels",
    mistakes={
        "writing a patch as row, column, channel": torch.tensor(
            [[[0, 10, 1, 11, 4, 14, 5, 15], [2, 12, 3, 13, 6, 16, 7, 17]]]
        ),
        "reshaping without permuting": image.reshape(1, 2, 8),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
for batch, channels, rows, columns, patch in [(2, 3, 4, 6, 2), (1, 1, 3, 9, 3), (3, 2, 5, 4, 1)]:
    images = checks.randn(batch, channels, rows * patch, columns * patch, generator=g)
    expected = F.unfold(images, patch, stride=patch).mT
    by_columns = expected.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
    with checks.unchanged(images=images):
        patches = patchify(images, patch)
    checks.close(
        patches,
        expected,
        what=f"{rows} × {columns} patches of {channels} channels",
        rtol=0,
        mistakes={"taking patches column by column": by_columns},
    )
    across = images.mT.contiguous().mT  # the same numbers, column by column in memory
    checks.close(patchify(across, patch), expected, what="patches of strided images", rtol=0)
    # A convolution whose kernel is W written as (d, channels, p, p)
    kernel = checks.randn(5, channels, patch, patch, generator=g)
    convolved = F.conv2d(images, kernel, stride=patch).flatten(2).mT
    checks.close(patches @ kernel.flatten(1).T, convolved, what="a strided convolution", rtol=1e-4)
for dtype in (torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.bool):
    images = finest(2, 3, 4, 8, dtype=dtype, g=g)
    patches = patchify(images, 4)
    assert patches.dtype == dtype, f"patches of {dtype} images have dtype {patches.dtype}"
    checks.close(patches[1, 1], images[1, :, :, 4:].flatten(), what=f"a patch, {dtype}", rtol=0)
checks.close(
    patchify(torch.zeros(0, 3, 4, 4), 2), torch.zeros(0, 4, 12), what="patches of no images"
)
checks.gradients(
    lambda x: patchify(x, 2),
    lambda x: F.unfold(x, 2, stride=2).mT,
    checks.randn(2, 3, 4, 6, generator=g),
    names=("the images",),
)
for shape in ((1, 1, 4, 6), (1, 1, 6, 4)):
    checks.raises(ValueError, patchify, torch.zeros(shape), 4, because="6 is no multiple of 4")
### END HIDDEN TESTS

# %% check="patchify" points=1
patches = torch.arange(24.0).view(1, 2, 12)
image = unpatchify(patches, 2, 4, 2)
checks.close(
    image[0, 0],
    torch.tensor([[0.0, 1.0], [2.0, 3.0], [12.0, 13.0], [14.0, 15.0]]),
    what="channel 0 of two patches, one above the other",
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for batch, channels, rows, columns, patch in [(2, 3, 4, 6, 2), (1, 1, 3, 9, 3), (3, 2, 5, 4, 1)]:
    count, size = rows * columns, channels * patch**2
    patches = checks.randn(batch, size, count, generator=g).mT  # not contiguous
    area = (rows * patch, columns * patch)
    expected = F.fold(patches.mT, area, patch, stride=patch)
    with checks.unchanged(patches=patches):
        images = unpatchify(patches, patch, *area)
    checks.close(images, expected, what=f"{rows} × {columns} patches put together", rtol=0)
for dtype in (torch.uint8, torch.int64, torch.bfloat16, torch.float64):
    patches = finest(2, 6, 12, dtype=dtype, g=g)
    images = unpatchify(patches, 2, 4, 6)
    assert images.dtype == dtype, f"images from patches of {dtype} have dtype {images.dtype}"
    corner = patches[1, 5, 8:].view(2, 2)
    checks.close(images[1, 2, 2:, 4:], corner, what=f"a corner, {dtype}", rtol=0)
checks.gradients(
    lambda x: unpatchify(x, 2, 4, 6),
    lambda x: F.fold(x.mT, (4, 6), 2, stride=2),
    checks.randn(2, 6, 12, generator=g),
    names=("the patches",),
)
patches = torch.zeros(1, 6, 12)
checks.raises(ValueError, unpatchify, patches, 2, 4, 8, because="4 × 8 pixels are 8 patches")
checks.raises(ValueError, unpatchify, patches, 2, 5, 6, because="5 is no multiple of 2")
checks.raises(ValueError, unpatchify, patches, 2, 4, 7, because="7 is no multiple of 2")
checks.raises(
    ValueError, unpatchify, patches[..., :10], 2, 4, 6, because="10 numbers are no 2 × 2 pixels"
)
checks.raises(
    ValueError, unpatchify, torch.zeros(1, 6, 4), 2, 3, 8, because="3 is no multiple of 2"
)
### END HIDDEN TESTS

# %% [markdown]
# Here is a photograph as your function cuts it: a sentence of 24 words.

# %% tags=["experiment", "figure"]
# Figure: a photograph as a sequence of patches
PATCH = 96
flower = data.pictures()["flower"][:, 10:394, 32:608]
words = patchify(flower[None], PATCH)
fig, ax = plot.plt.subplots(figsize=(9.6, 4.0))
canvas = torch.ones(3 * (PATCH + 22), 8 * (PATCH + 8), 3)
for i, word in enumerate(words[0]):
    top, side = (i // 8) * (PATCH + 22) + 22, (i % 8) * (PATCH + 8)
    canvas[top : top + PATCH, side : side + PATCH] = word.view(3, PATCH, PATCH).permute(1, 2, 0)
    ax.text(side, top - 4, str(i), fontsize=8)
ax.imshow(plot.array(canvas))
ax.axis("off")
ax.set_title("Tokens 0 to 23 of a photograph")
plot.caption(
    fig,
    f"A picture of 384 × 576 pixels in patches of {PATCH}: 4 rows of 6, shown here in 3 lines of 8 "
    "as a text would be. What was one line of the picture is broken across lines: nothing in the "
    "sequence itself says that token 6 lies under token 0. That is what positions are for.",
)
plot.plt.show()

# %% [markdown]
# ## A transformer that looks {#vit}
#
# Behind the first layer stands the encoder that you know: attention without a mask, an MLP, norms
# before both. Only three things are particular to images, and all are learned vectors.
#
# **Positions.** One vector for each place of the grid is added to the patch there; nobody tells the
# model that place 6 lies under place 0, it learns so.
#
# **The class token.** Somebody has to speak for the whole image. A learned vector is put before the
# patches; in every layer it gathers what it wants from them, and its output is the image's vector.
# (Averaging the patches' outputs works too, and SigLIP attends to them with a learned query.)
#
# **Registers.** Darcet and others saw that many vision transformers (of DINOv2's, those from ViT-L
# up) take some 2 % of the patches, mostly in empty background, and store things about the whole
# image there: those tokens get norms ten times larger, and their attention maps show spots where
# nothing is. So they gave the model tokens to store things in. Registers stand in the sequence,
# belong to no place and get no position, and are thrown away at the output.
#
# The order of the sequence is: class token, registers, patches.
#
# If all registers start as the same vector, each sees the same attention and gets the same
# gradient, so that they stay equal forever. Random starts tell them apart.


# %%
class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (3, batch, heads, tokens, head_dim)."""
        return self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights, (batch, heads, queries, keys), to look at."""
        q, k, _ = self.project(x)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


# %% exercise="vision_transformer" minutes=30 difficulty=2
class VisionTransformer(nn.Module):
    """Images (batch, channels, image_size, image_size) → a pair: the class token's output
    (batch, width) and the patches' outputs (batch, patches, width).

    The sequence that goes through the blocks is: class token, registers, patches. Patches are cut
    by `patchify` and go through `embed`. Positions are added to the class token and to the patches;
    registers get none. After the blocks `norm` is applied to all tokens, and the registers are
    dropped. Images have the dtype of the parameters, and so do outputs; images are not changed.

    The parameters and their names (the checks load values into them):
        embed: nn.Linear(channels · patch², width), with a bias
        class_token: nn.Parameter (width,)
        register_tokens: nn.Parameter (registers, width), with registers = 0 too
        positions: nn.Parameter (1 + patches, width); row 0 is the class token's
        blocks: nn.ModuleList of `layers` EncoderBlock(width, heads); layers may be 0
        norm: nn.LayerNorm(width, eps=1e-6)
    class_token, register_tokens and positions start as independent normal draws with mean 0 and
    standard deviation `std`; the rest as PyTorch makes it.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        channels: int,
        width: int,
        layers: int,
        heads: int,
        registers: int = 0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.patch = patch
        patches = (image_size // patch) ** 2
        self.embed = nn.Linear(channels * patch**2, width)
        self.class_token = nn.Parameter(std * torch.randn(width))
        self.register_tokens = nn.Parameter(std * torch.randn(registers, width))
        self.positions = nn.Parameter(std * torch.randn(1 + patches, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        ### END SOLUTION

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        ### BEGIN SOLUTION
        seen = self.embed(patchify(images, self.patch)) + self.positions[1:]
        first = (self.class_token + self.positions[0]).expand(len(seen), 1, -1)
        scratch = self.register_tokens.expand(len(seen), -1, -1)
        x = torch.cat([first, scratch, seen], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + len(self.register_tokens) :]
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one vector for a whole batch</summary>
#
# `vector.expand(batch, 1, -1)` repeats it without copying; gradients of all rows add up in the one
# parameter.
# </details>
#
# <details><summary>Hint: dropping the registers</summary>
#
# They stand behind the class token. Patches begin at `1 + registers`, which is right for none, too.
# </details>

# %% tags=["support"]
# Support: a vision transformer by its formulas, in float64


def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def block_by_formulas(x: Tensor, state: dict[str, Tensor], heads: int) -> Tensor:
    y = normalized(x, state["norm_1.weight"], state["norm_1.bias"])
    q, k, v = (y @ state["qkv.weight"].T + state["qkv.bias"]).chunk(3, dim=-1)
    parts = []
    for one_q, one_k, one_v in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
        scores = (one_q @ one_k.mT / one_q.shape[-1] ** 0.5).exp()
        parts.append(scores / scores.sum(-1, keepdim=True) @ one_v)
    x = x + torch.cat(parts, dim=-1) @ state["out.weight"].T + state["out.bias"]
    y = normalized(x, state["norm_2.weight"], state["norm_2.bias"])
    y = y @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    return x + y @ state["mlp.2.weight"].T + state["mlp.2.bias"]


def vit_by_formulas(
    state: dict[str, Tensor], images: Tensor, patch: int, heads: int, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    state = {name: t.double() for name, t in state.items()}
    x = F.unfold(images.double(), patch, stride=patch).mT @ state["embed.weight"].T
    x = x + state["embed.bias"]
    places, scratch = state["positions"], state["register_tokens"]
    first, registers = state["class_token"], len(scratch)
    if mistake == "giving the class token no position":
        places = torch.cat([torch.zeros_like(places[:1]), places[1:]])
    if mistake == "giving registers positions, too" and registers:
        scratch = scratch + places[:1]
    rows = [torch.cat([(first + places[0])[None], scratch, row + places[1:]]) for row in x]
    x = torch.stack(rows)
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    for i in range(len(layers)):
        prefix = f"blocks.{i}."
        of_block = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        x = block_by_formulas(x, of_block, heads)
    if mistake != "leaving the last norm out":
        x = normalized(x, state["norm.weight"], state["norm.bias"])
    if mistake == "averaging the patches":
        return x[:, 1 + registers :].mean(1), x[:, 1 + registers :]
    return x[:, 0], x[:, 1 + registers :]


VIT_MISTAKES = (
    "giving the class token no position",
    "giving registers positions, too",
    "leaving the last norm out",
    "averaging the patches",
)


def randomize_(module: nn.Module, g: torch.Generator, scale: float = 0.5) -> dict[str, Tensor]:
    """Loads random values into all parameters, and returns them by name."""
    state = {
        name: (torch.randn(p.shape, generator=g) * scale).to(p)
        for name, p in module.state_dict().items()
    }
    module.load_state_dict(state)
    return state


def vit_shapes(patches: int, numbers: int, width: int, layers: int, registers: int) -> dict:
    """The names of a vision transformer's parameters, with their shapes."""
    shapes = {
        "embed.weight": (width, numbers),
        "embed.bias": (width,),
        "class_token": (width,),
        "register_tokens": (registers, width),
        "positions": (1 + patches, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(layers):
        for name, p in EncoderBlock(width, 1).state_dict().items():
            shapes[f"blocks.{i}.{name}"] = tuple(p.shape)
    return shapes


# %% check="vision_transformer" points=2
# Without layers only the first and the last step are left.
model = VisionTransformer(4, 2, 1, width=2, layers=0, heads=1, registers=3).to(profile.device)
found = {name: tuple(p.shape) for name, p in model.state_dict().items()}
asked = vit_shapes(4, 4, 2, 0, 3)
assert found == asked, f"parameters and shapes {asked} are asked for; yours are {found}"
state = {name: torch.zeros(shape) for name, shape in asked.items()}
state |= {
    "embed.weight": torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),
    "class_token": torch.tensor([3.0, 0.0]),
    "positions": torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 9.0], [0.0, 0.0], [9.0, 0.0]]),
    "norm.weight": torch.ones(2),
}
model.load_state_dict(state)
image = torch.arange(16.0, device=profile.device).view(1, 1, 4, 4)
first, patches = checks.parts(model(image), "class token", "patches")
checks.close(first, torch.tensor([[1.0, -1.0]]), what="the class token's output", rtol=1e-4)
checks.close(
    patches,
    torch.tensor([[[1.0, -1.0], [1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]]),
    what="the outputs of 4 patches whose sums, 10 to 50, exceed 9",
    rtol=1e-4,
    hint="Registers are dropped",
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for size, patch, channels, width, layers, heads, registers in [
    (8, 2, 1, 8, 2, 2, 3),
    (6, 3, 3, 12, 1, 3, 0),
    (4, 4, 2, 6, 3, 1, 1),
    (6, 2, 2, 8, 0, 4, 5),
]:
    model = VisionTransformer(size, patch, channels, width, layers, heads, registers)
    model = model.to(profile.device)
    found = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    asked = vit_shapes((size // patch) ** 2, channels * patch**2, width, layers, registers)
    assert found == asked, f"parameters and shapes {asked} are asked for; yours are {found}"
    state = randomize_(model, g)
    images = checks.randn(3, channels, size, size, generator=g)
    with checks.kept(model, images=images):
        first, patches = checks.parts(model(images), "class token", "patches")
    expected = vit_by_formulas(state, images, patch, heads)
    wrong = {m: vit_by_formulas(state, images, patch, heads, m) for m in VIT_MISTAKES}
    of_what = f"{layers} layers, {registers} registers"
    for i, (actual, name) in enumerate([(first, "class token"), (patches, "patches")]):
        checks.close(
            actual,
            expected[i].float(),
            what=f"the output of the {name} with {of_what}",
            rtol=1e-4,
            mistakes={m: w[i].float() for m, w in wrong.items()},
        )
    double = model.double()
    for actual, due in zip(double(images.double()), expected, strict=True):
        checks.close(actual, due, what=f"the output in float64 with {of_what}", dtype=due.dtype)
checks.close(
    double(images.double()[:0])[1],
    torch.zeros(0, 9, 8, dtype=torch.float64),
    what="the patches of no images",
)
### END HIDDEN TESTS

# %% check="vision_transformer" points=1
model = VisionTransformer(8, 2, 1, width=64, layers=1, heads=2, registers=16, std=0.3)
checks.drawn(model.register_tokens.detach(), mean=0.0, std=0.3, what="the registers at the start")
### BEGIN HIDDEN TESTS
for std in (0.02, 2.0):
    model = VisionTransformer(12, 2, 1, width=128, layers=1, heads=2, registers=9, std=std)
    for name in ("class_token", "register_tokens", "positions"):
        value = model.get_parameter(name).detach()
        checks.drawn(value, mean=0.0, std=std, what=f"{name} at the start, std = {std}")
    tails = float((model.positions.detach().abs() > 2 * std).float().mean())
    assert 0.03 < tails < 0.07, f"4.6% of normal draws lie beyond 2 std, {tails:.1%} of yours"
    tokens = torch.cat([model.class_token[None], model.register_tokens, model.positions]).detach()
    near = (F.normalize(tokens, dim=-1) @ F.normalize(tokens, dim=-1).T).fill_diagonal_(0).abs()
    assert near.max() < 0.6, "tokens and positions are drawn independently: two of yours are alike"
    assert tokens.norm(dim=-1).min() > 7 * std, "every token and position is drawn, row 0 too"
default = VisionTransformer(12, 2, 1, width=128, layers=0, heads=2)
checks.drawn(default.positions.detach(), mean=0.0, std=0.02, what="positions, std by default")
# The gradient of every parameter, against the formulas'
g = checks.generator(4)
model = VisionTransformer(8, 4, 2, width=8, layers=2, heads=2, registers=3)
model = model.to(profile.device, torch.float64)
state = {name: p.requires_grad_() for name, p in randomize_(model, g).items()}
images = checks.randn(5, 2, 8, 8, generator=g, dtype=torch.float64)
weights = checks.randn(8, generator=g, dtype=torch.float64)
seen = []
hook = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
for first, patches in (model(images), vit_by_formulas(state, images, 4, 2)):
    ((first * weights).sum() + patches.square().sum()).backward()
hook.remove()
for name, p in model.named_parameters():
    assert p.grad is not None, f"no gradient reaches {name}"
    checks.close(p.grad, state[name].grad, what=f"the gradient of {name}", rtol=1e-6, atol=1e-9)
for x in seen:
    due = state["register_tokens"].detach().expand(5, -1, -1)
    checks.close(
        x[:, 1:4], due, what="tokens 1 to 3 before the first block", hint="They are registers"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## One space for images and texts {#clip}
#
# The web has few images with labels and very many with captions. A caption says what is in the
# image, but in no fixed set of classes. **Contrastive** training turns this around: out of the $n$
# captions of a batch, find the one that belongs to this image.
#
# Let $u_i$ and $v_j$ be the outputs of the two encoders, scaled to length 1, and $z_{ij} = e^{s}\,
# u_i\!\cdot v_j$. Image $i$ chooses among the captions of its row, caption $j$ among the images of
# its column, and both choices are cross-entropies (**InfoNCE**):
#
# $$ L = \frac{1}{2n}\sum_{i}\Big(-\log\frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
# -\log\frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}}\Big). $$
#
# **Why a scale?** A cosine lies in $[-1, 1]$. Let the batch be the best conceivable: 1 on the
# diagonal and $-1/(n-1)$ elsewhere, for $n$ vectors cannot lie further apart. Even then a row of
# the softmax is not sharp, unless $e^s$ is large:

# %%
print("  factor   lowest loss of CLIP's batch, 32,768 pairs, in nats (guessing: 10.4)")
for factor in (1, 3, 10, 100):
    print(f"{factor:8}   {math.log1p(32767 * math.exp(-factor * (1 + 1 / 32767))):.3g}")

# %% [markdown]
# On a sphere of radius 1 the softmax cannot become sharp, so the radius is learned.
#
# **Why its logarithm?** The factor stays positive, and a step changes it by a proportion. CLIP
# starts at $1/0.07\approx 14.3$ and never lets it exceed 100, for stability.
#
# **Where to clamp?** Clamped inside the loss, a scale that has once passed the limit gets no
# gradient any more: it could never come back. So CLIP clamps the *parameter*, after each step.
# That is why libraries' forward passes do not clamp: it is the training loop's work.


# %% exercise="clip_loss" minutes=18 difficulty=2
def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The symmetric contrastive loss of n images and their texts, in nats; minimized.

    image, text: (n, d), n ≥ 1, one floating dtype; row i of both belong together. They have lengths
    from 1e-6 to 1e6 and are normalized here. logit_scale: a tensor without axes, any floating
    dtype, the logarithm of the factor on the cosines, whose exp is taken in the format of the
    computation; nothing is clamped. Returns a tensor without axes: the mean of the rows' and the
    columns' mean cross-entropy. Half-precision features are computed in float32, and so is the
    result; else it has their dtype. Gradients reach all three arguments; none is changed.
    """
    ### BEGIN SOLUTION
    u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
    logits = logit_scale.to(u.dtype).exp() * u @ v.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    ### END SOLUTION


def clamp_logit_scale_(logit_scale: Tensor, most: float = 100.0) -> None:
    """In place: where exp(logit_scale) exceeds `most`, logit_scale becomes log(most).

    logit_scale: a tensor or nn.Parameter without axes, which may require gradients: nothing of this
    is recorded, and its `.grad` and `requires_grad` stay. Values up to the limit stay bit for bit.
    """
    ### BEGIN SOLUTION
    with torch.no_grad():
        logit_scale.clamp_(max=math.log(most))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the columns</summary>
#
# The columns of a matrix are the rows of its transpose. In both cases the right answer of row $i$
# is class $i$.
# </details>
#
# <details><summary>Hint: a leaf that requires gradients</summary>
#
# PyTorch refuses in-place changes of it while it records. `torch.no_grad()` says that this one is
# no part of the computation.
# </details>

# %% tags=["support"]
# Support: both losses by their definitions


def cosines(image: Tensor, text: Tensor) -> Tensor:
    """(n, m) cosines, each by itself, in the dtype of the inputs."""
    dots = (image[:, None] * text[None]).sum(-1)
    return dots / (image.square().sum(-1).sqrt()[:, None] * text.square().sum(-1).sqrt()[None])


def clip_by_definition(image: Tensor, text: Tensor, s: Tensor, mistake: str = "") -> Tensor:
    """In float64, one row and one column after another."""
    image, text, s = image.double(), text.double(), s.double()
    z = cosines(image, text) * s.exp()
    if mistake == "features that are not normalized":
        z = (image[:, None] * text[None]).sum(-1) * s.exp()
    if mistake == "the logarithm as the factor":
        z = cosines(image, text) * s
    if mistake == "dividing by the factor":
        z = cosines(image, text) / s.exp()
    if mistake == "a factor that is clamped in the loss":
        z = cosines(image, text) * s.exp().clamp(max=100.0)
    of_rows = torch.stack([row.logsumexp(0) - row[i] for i, row in enumerate(z)])
    of_columns = torch.stack([column.logsumexp(0) - column[i] for i, column in enumerate(z.T)])
    if mistake == "the rows alone":
        return of_rows.mean()
    if mistake == "the columns alone":
        return of_columns.mean()
    if mistake == "the sum of both, not their mean":
        return of_rows.mean() + of_columns.mean()
    return (of_rows.mean() + of_columns.mean()) / 2


CLIP_MISTAKES = (
    "features that are not normalized",
    "the logarithm as the factor",
    "dividing by the factor",
    "a factor that is clamped in the loss",
    "the rows alone",
    "the columns alone",
    "the sum of both, not their mean",
)


def uneven(*shape: int, g: torch.Generator) -> Tensor:
    """Random features whose rows have lengths between 0.1 and 10 times the usual."""
    x = checks.randn(*shape, generator=g)
    return x * 10 ** (2 * torch.rand(shape[0], 1, generator=g).to(x) - 1)


def far_apart(*shape: int, g: torch.Generator) -> Tensor:
    """Random features whose rows have lengths from 1e-6 to 1e6, in random order."""
    x = F.normalize(checks.randn(*shape, generator=g), dim=-1)
    powers = torch.linspace(-5.9, 5.9, shape[0])[torch.randperm(shape[0], generator=g)]
    return x * (10 ** powers[:, None]).to(x)


# %% check="clip_loss" points=2
image = torch.tensor([[2.0, 0.0], [3.0, 4.0]], device=profile.device)
text = torch.tensor([[0.5, 0.0], [0.0, 1.0]], device=profile.device)
ten = torch.tensor(10.0, device=profile.device).log()
# The cosines are 1 and 0 for the first image, 0.6 and 0.8 for the second.
surprises = [math.log1p(math.exp(-x)) for x in (10 - 0, 8 - 6, 10 - 6, 8 - 0)]
checks.close(
    clip_loss(image, text, ten),
    torch.tensor(sum(surprises) / 4, dtype=torch.float32),
    what="the loss of two pairs, factor 10",
    mistakes={
        "the rows alone": torch.tensor(sum(surprises[:2]) / 2),
        "the columns alone": torch.tensor(sum(surprises[2:]) / 2),
        "the sum of both, not their mean": torch.tensor(sum(surprises) / 2),
        "features that are not normalized": clip_by_definition(
            image, text, ten, "features that are not normalized"
        ),
        "the logarithm as the factor": clip_by_definition(
            image, text, ten, "the logarithm as the factor"
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(5)
for n, d, factor in [(5, 3, 10.0), (1, 4, 14.3), (2, 6, 0.5), (9, 2, 60.0), (4, 3, 400.0)]:
    image, text = uneven(n, d, g=g), uneven(n, d, g=g)
    s = torch.tensor(factor, device=image.device).log()
    expected = clip_by_definition(image, text, s)
    with checks.unchanged(image=image, text=text, logit_scale=s):
        loss = clip_loss(image, text, s)
    checks.close(
        loss,
        expected.float(),
        what=f"the loss of {n} pairs, factor {factor:g}",
        rtol=1e-4 if factor < 100 else 1e-3,
        atol=1e-6,
        dtype=torch.float32,
        mistakes={m: clip_by_definition(image, text, s, m).float() for m in CLIP_MISTAKES},
    )
    double = clip_loss(image.double(), text.double(), s)
    due = clip_by_definition(image, text, s.double())
    checks.close(double, due, what=f"{n} pairs in float64", rtol=1e-6, atol=1e-7, dtype=due.dtype)
    sixth = s.double() + 1 / 6e7  # lost where the scale is rounded to float32
    checks.close(
        clip_loss(image.double(), text.double(), sixth),
        clip_by_definition(image, text, sixth),
        what=f"{n} pairs with a scale in float64",
        rtol=1e-11,
        atol=1e-13,
    )
    for dtype in (torch.float16, torch.bfloat16):
        half = [(100 * t).to(dtype) for t in (image, text)]  # whose squares exceed float16
        checks.close(
            clip_loss(*half, s),
            clip_by_definition(*half, s).float(),
            what=f"the loss of {n} pairs in {dtype}",
            rtol=1e-4 if factor < 100 else 1e-3,
            atol=1e-5,
            dtype=torch.float32,
            hint="Compute in float32",
        )
image, text = uneven(6, 4, g=g).double(), uneven(6, 4, g=g).double()
for factor in (3.0, 150.0):  # the second is beyond CLIP's limit
    checks.gradients(
        clip_loss,
        clip_by_definition,
        image,
        text,
        torch.tensor(factor, device=image.device, dtype=torch.float64).log(),
        names=("image", "text", "logit_scale"),
        rtol=1e-6,
        hint="Nothing is clamped in the loss" if factor > 100 else "",
    )
across = uneven(4, 6, g=g).mT
text, one = uneven(6, 4, g=g), torch.zeros((), device=across.device)
checks.close(
    clip_loss(across, text, one),
    clip_by_definition(across, text, one).float(),
    what="the loss of strided features",
    rtol=1e-4,
)
image, text = far_apart(7, 4, g=g), far_apart(7, 4, g=g)
checks.close(
    clip_loss(image, text, one + 2),
    clip_by_definition(image, text, one + 2).float(),
    what="the loss of features with lengths from 1e-6 to 1e6",
    rtol=1e-4,
)
for half in (torch.tensor(3.3).bfloat16(), torch.tensor(11.5).half()):  # e^11.5 is no float16
    half = half.to(image.device)
    checks.close(
        clip_loss(image, text, half),
        clip_loss(image, text, half.float()),
        what=f"the loss of float32 features with a scale in {half.dtype}",
        rtol=1e-5,
        hint="Widen the scale before exp",
    )
### END HIDDEN TESTS

# %% check="clip_loss" points=1
scale = nn.Parameter(torch.tensor(5.0, device=profile.device))
clamp_logit_scale_(scale)
checks.close(scale.detach(), torch.tensor(math.log(100.0)), what="5.0 after clamping at 100")
### BEGIN HIDDEN TESTS
drawn = [(4.7, 100.0), (4.6, 100.0), (-2.0, 100.0), (2.5, 7.5), (0.3, 1.0), (1.9, 7.5)]
for start, most in [*drawn, (0.013, 100.0), (-0.002, 7.5)]:
    for dtype in (torch.float32, torch.float64):
        scale = nn.Parameter(torch.tensor(start, dtype=dtype, device=profile.device))
        scale.grad = torch.full_like(scale, 0.25)
        before = scale.detach().clone()
        clamp_logit_scale_(scale, most)
        over = start > math.log(most)
        due = torch.full_like(before, math.log(most)) if over else before
        checks.close(scale.detach(), due, what=f"{start} clamped at {most}", rtol=1e-6 * over)
        assert scale.requires_grad, "the parameter requires gradients as before"
        checks.close(scale.grad, torch.full_like(due, 0.25), what="its .grad")
plain = torch.tensor(9.0, device=profile.device)
clamp_logit_scale_(plain, most=math.e)
checks.close(plain, torch.tensor(1.0), what="a plain tensor, clamped at e")
frozen = nn.Parameter(torch.tensor(0.5, device=profile.device), requires_grad=False)
clamp_logit_scale_(frozen)
needs = [t.requires_grad for t in (plain, frozen)]
assert needs == [False, False], "what needed no gradient needs one now"
### END HIDDEN TESTS

# %% [markdown]
# ## Each pair on its own: SigLIP {#siglip}
#
# The softmax ties all pairs of a row together: no term of the loss is known before the whole row
# is. **SigLIP** asks about each pair alone whether it belongs together, with $y_{ii}=1$ and
# $y_{ij}=-1$ elsewhere:
#
# $$ L = -\frac1n\sum_{i}\sum_{j}\log\sigma\big(y_{ij}\,(e^{s}\,u_i\!\cdot v_j + b)\big). $$
#
# **The sum has $n^2$ terms and is divided by $n$.** So each image's loss counts all of its
# negatives in full, as many as there are.
#
# **Why a bias?** At the start all cosines are near 0. Without $b$ every pair has probability one
# half, and the pushes of each image's $n-1$ negatives swamp the pull of the one positive: the first
# steps would do nothing but drive everything apart. With $b=-10$ every logit starts near $-10$:
# each pair is taken for a mismatch. For the negatives that is right, so their pushes nearly vanish,
# and the few positives have the word. The paper starts at $e^s = 10$, $b = -10$.
#
# **A sum can be cut.** Pairs of this device's images with *another* device's texts are all
# negatives. Each device sums over its own pairs, then sends its texts on to the next, and repeats.
# No device ever needs all logits, nor all features at once.


# %% exercise="siglip_loss" minutes=12 difficulty=1
def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    negatives_only: bool = False,
) -> Tensor:
    """The sigmoid loss: the sum over all pairs of image and text, divided by the number of images.

    image: (n, d), text: (m, d), normalized here, one floating dtype. m = n, and row i of both
    belong together; with negatives_only no two rows do (texts of another device), and m may differ
    from n. logit_scale, logit_bias: tensors without axes. Returns a tensor without axes, in nats;
    minimized. Finite for logits of any size. Lengths, dtypes and gradients as in clip_loss.
    """
    ### BEGIN SOLUTION
    u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
    logits = logit_scale.to(u.dtype).exp() * u @ v.T + logit_bias.to(u.dtype)
    signs = -torch.ones_like(logits)
    if not negatives_only:
        signs.fill_diagonal_(1.0)
    return F.softplus(-signs * logits).sum() / len(image)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a stable logarithm</summary>
#
# `torch.sigmoid(x).log()` is −∞ for x = −200. PyTorch has `F.logsigmoid` and `F.softplus`.
# </details>

# %% tags=["support"]
# Support: the sigmoid loss by its definition


def siglip_by_definition(
    image: Tensor, text: Tensor, s: Tensor, b: Tensor, alone: bool = False, mistake: str = ""
) -> Tensor:
    image, text, s, b = image.double(), text.double(), s.double(), b.double()
    z = cosines(image, text) * s.exp() + b
    if mistake == "no bias":
        z = z - b
    if mistake == "the bias inside the factor":
        z = (cosines(image, text) + b) * s.exp()
    same = torch.eye(len(image), len(text), device=z.device, dtype=torch.bool) & (not alone)
    if mistake == "turned signs":
        same = ~same
    # −log σ(x) = log(1 + e^−x), in the form that does not overflow
    x = torch.where(same, z, -z)
    each = torch.log1p((-x.abs()).exp()) + (-x).clamp(min=0)
    if mistake == "the positives alone":
        each = each * same
    if mistake == "a mean over all pairs":
        return each.mean()
    if mistake == "the sum":
        return each.sum()
    return each.sum() / len(image)


SIGLIP_MISTAKES = (
    "no bias",
    "the bias inside the factor",
    "turned signs",
    "the positives alone",
    "a mean over all pairs",
    "the sum",
)

# %% check="siglip_loss" points=2
image = torch.tensor([[2.0, 0.0], [3.0, 4.0]], device=profile.device)
text = torch.tensor([[0.5, 0.0], [0.0, 1.0]], device=profile.device)
ten, five = torch.tensor([10.0, 5.0], device=profile.device)
# Logits 10 and 0, 6 and 8 before the bias of −5; the first and the last are of pairs.
surprises = [math.log1p(math.exp(x)) for x in (-5, -5, 1, -3)]
checks.close(
    siglip_loss(image, text, ten.log(), -five),
    torch.tensor(sum(surprises) / 2),
    what="the loss of two pairs, factor 10, bias −5",
    mistakes={
        "a mean over all pairs": torch.tensor(sum(surprises) / 4),
        "the sum": torch.tensor(sum(surprises)),
        "no bias": siglip_by_definition(image, text, ten.log(), 0 * five),
        "the positives alone": torch.tensor((surprises[0] + surprises[3]) / 2),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for n, m, alone, factor, bias in [
    (5, 5, False, 10.0, -10.0),
    (4, 7, True, 3.0, -1.5),
    (1, 1, False, 20.0, 2.0),
    (3, 1, True, 2.5, -1.0),
    (6, 6, True, 2.0, 0.5),
]:
    image, text = uneven(n, 3, g=g), uneven(m, 3, g=g)
    s, b = torch.tensor(factor, device=image.device).log(), torch.tensor(bias, device=image.device)
    with checks.unchanged(image=image, text=text, logit_scale=s, logit_bias=b):
        loss = siglip_loss(image, text, s, b, negatives_only=alone)
    what = f"the loss of {n} images and {m} {'other' * alone} texts"
    checks.close(
        loss,
        siglip_by_definition(image, text, s, b, alone).float(),
        what=what,
        rtol=1e-4,
        dtype=torch.float32,
        mistakes={
            name: siglip_by_definition(image, text, s, b, alone, name).float()
            for name in SIGLIP_MISTAKES
            if not (name == "the positives alone" and alone)
        },
    )
    due = siglip_by_definition(image, text, s.double(), b, alone)
    checks.close(
        siglip_loss(image.double(), text.double(), s, b, alone),
        due,
        what=f"{what} in float64",
        rtol=1e-6,
        dtype=torch.float64,
    )
    sixths = s.double() + 1 / 6e7, b.double() + 1 / 6e7  # lost where they are rounded to float32
    checks.close(
        siglip_loss(image.double(), text.double(), *sixths, alone),
        siglip_by_definition(image, text, *sixths, alone),
        what=f"{what} with scale and bias in float64",
        rtol=1e-11,
    )
    for dtype in (torch.float16, torch.bfloat16):
        half = [(100 * t).to(dtype) for t in (image, text)]
        checks.close(
            siglip_loss(*half, s, b, alone),
            siglip_by_definition(*half, s, b, alone).float(),
            what=f"{what} in {dtype}",
            rtol=1e-4,
            dtype=torch.float32,
            hint="Compute in float32",
        )
image, text = uneven(5, 4, g=g).double(), uneven(5, 4, g=g).double()
s, b = (torch.tensor(x, device=image.device, dtype=torch.float64) for x in (1.5, -2.0))
for alone in (False, True):
    checks.gradients(
        lambda *t, alone=alone: siglip_loss(*t, alone),
        lambda *t, alone=alone: siglip_by_definition(*t, alone),
        image,
        text,
        s,
        b,
        names=("image", "text", "logit_scale", "logit_bias"),
        rtol=1e-6,
    )
leaves = [t.float().requires_grad_() for t in (image, text)]
siglip_loss(*leaves, torch.tensor(9.0, device=image.device), b.float()).backward()
assert all(t.grad.isfinite().all() for t in leaves), "logits of 8,000: a gradient is not finite"
half = [torch.tensor(x, device=image.device).bfloat16() for x in (2.3, -4.7)]
checks.close(
    siglip_loss(image.float(), text.float(), *half),
    siglip_by_definition(image, text, *half).float(),
    what="the loss of float32 features with scale and bias in bfloat16",
    rtol=1e-4,
    hint="Widen the scale before exp",
)
huge = torch.tensor(-500.0, device=image.device)
for sign in (1, -1):
    checks.close(
        siglip_loss(image.float(), text.float(), s, sign * huge),
        siglip_by_definition(image, text, s, sign * huge).float(),
        what=f"the loss with a bias of {-500 * sign}",
        rtol=1e-4,
        hint="σ(−500) is 0 in float32, and the logarithm of 0 is −∞",
    )
ends = far_apart(6, 4, g=g), far_apart(6, 4, g=g)
checks.close(
    siglip_loss(*ends, s.float(), b.float()),
    siglip_by_definition(*ends, s.float(), b).float(),
    what="the loss of features with lengths from 1e-6 to 1e6",
    rtol=1e-4,
)
# Law: two devices, each with its own texts and the other's, have the loss of the whole batch.
whole = siglip_loss(image, text[[0, 1, 2, 3, 4]], s, b)
parts = [slice(0, 2), slice(2, 5)]
own = sum(len(image[p]) * siglip_loss(image[p], text[p], s, b) for p in parts)
others = sum(
    len(image[p]) * siglip_loss(image[p], text[q], s, b, negatives_only=True)
    for p, q in (parts, parts[::-1])
)
checks.close((own + others) / 5, whole, what="the loss of two devices", rtol=1e-9)
### END HIDDEN TESTS

# %% [markdown]
# ## Training both encoders {#train}
#
# Our images are 1,797 handwritten digits of 8 × 8 pixels. Captions come from a grammar of 20
# sentences, "a thin seven" or "a bold zero": the digit is the label, and how much ink is on it,
# above or below the median, is measured.
#
# The two encoders below are small copies of CLIP's: your vision transformer, and a transformer over
# words. (CLIP's text encoder is causal and reads off its last token; SigLIP's sees both ways. This
# one sees both ways and averages.) A linear layer without bias takes each into the common space.
#
# The training loop has four rules, the last three of them from CLIP's paper:
#
# - an image stands once in a batch. A second copy would be a negative that is none;
# - weight decay for parameters of two or more axes only. Decay of gains and biases, and of the
#   scale, would pull them to 0, where nothing says that they belong;
# - $\beta_2 = 0.98$ and $\epsilon=10^{-6}$, as the paper has them for vision transformers; the rate
#   falls along a half cosine;
# - the scale is clamped after each step.


# %%
WORDS = ("a", "thin", "bold", "zero", "one", "two", "three", "four", "five", "six", "seven")
WORDS += ("eight", "nine")


def digit_captions() -> tuple[Tensor, Tensor, Tensor]:
    """Images (1797, 1, 8, 8), with mean 0 and deviation 1 over all pixels; what they show, 0 to 9;
    and whether they are bold, 0 or 1."""
    images, digits = data.digits()
    ink = images.sum((1, 2))
    images = (images - images.mean()) / images.std()
    bold = (ink > ink.median()).long()
    return tuple(t.to(profile.device) for t in (images[:, None], digits, bold))


def caption_ids(digits: Tensor, bold: Tensor) -> Tensor:
    """The captions as ids of WORDS, (n, 3): a, thin or bold, the digit."""
    return torch.stack([torch.zeros_like(digits), 1 + bold, 3 + digits], dim=1)


class TextEncoder(nn.Module):
    """Word ids (n, words) → (n, width): a transformer that sees both ways, and a mean."""

    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(0.5 * torch.randn(length, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


class DualEncoder(nn.Module):
    """Two encoders into one space of `dim` dimensions, with the scale and the bias of the losses.

    vision: images → (n, image_width), or a tuple that begins with it. text: ids → (n, text_width).
    """

    def __init__(
        self, vision: nn.Module, image_width: int, text: nn.Module, text_width: int, dim: int
    ) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.image_head = nn.Linear(image_width, dim, bias=False)
        self.text_head = nn.Linear(text_width, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(0.0))

    def encode_image(self, images: Tensor) -> Tensor:
        seen = self.vision(images)
        return self.image_head(seen[0] if isinstance(seen, tuple) else seen)

    def encode_text(self, captions: Tensor) -> Tensor:
        return self.text_head(self.text(captions))


# %% exercise="train_clip" minutes=22 difficulty=2
def train_clip(
    model: DualEncoder,
    images: Tensor,
    captions: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    weight_decay: float = 0.1,
) -> list[float]:
    """Trains both encoders in place; returns the loss of each step, before its update.

    images (N, …), captions (N, words): row i of both belong together; on the model's device.
    loss(image, text, logit_scale, logit_bias): features (n, d) of both and the model's two numbers.

    Step k = 0 … steps − 1:
    1. draws rows = torch.randperm(N, generator=generator)[:batch_size], on the CPU (with fewer rows
       than batch_size, all of them);
    2. computes the loss of model.encode_image(images[rows]) and model.encode_text(captions[rows]),
       and its gradients alone, whatever .grad held before; a loss may leave the model's bias out,
       which then stays as it is;
    3. AdamW: betas 0.9 and 0.98, eps 1e-6, learning rate lr · ½(1 + cos(πk / steps)), weight decay
       for parameters of two or more axes only;
    4. clamps model.logit_scale at log(100).

    The training mode stays as it is, every parameter's .grad is None afterwards, images and
    captions are not changed. With steps = 0 the result is [].
    """
    ### BEGIN SOLUTION
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * k / steps))
        rows = torch.randperm(len(images), generator=generator)[:batch_size].to(images.device)
        seen, said = model.encode_image(images[rows]), model.encode_text(captions[rows])
        value = loss(seen, said, model.logit_scale, model.logit_bias)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        clamp_logit_scale_(model.logit_scale)
        losses.append(value.item())
    for p in parameters:
        p.grad = None
    return losses
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two kinds of parameters, one optimizer</summary>
#
# `torch.optim.AdamW` takes a list of groups: dictionaries with "params" and settings of their own.
# Every parameter stands in one of them. The schedule sets `group["lr"]` in each.
# </details>

# %% tags=["support"]
# Support: AdamW by its formulas, and toys to train


def toy_encoder(g: torch.Generator, inputs: int = 4, vocab: int = 7, dim: int = 3) -> DualEncoder:
    """A convolution (three axes) with a norm, and a bag of words, with random values."""
    one = nn.Unflatten(1, (1, inputs)), nn.Conv1d(1, 6, inputs), nn.Flatten(), nn.LayerNorm(6)
    vision, text = nn.Sequential(*one), nn.EmbeddingBag(vocab, 5)
    model = DualEncoder(vision, 6, text, 5, dim).to(profile.device, torch.float64)
    randomize_(model, g)
    return model


def toy_loss(image: Tensor, text: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """Smooth, and with gradients in all four."""
    off = (image * text).sum(-1) - 1
    return (off.square()).mean() + (s - 1).square() + 0.3 * (b + 0.5).square()


def trained_by_formulas(
    model: DualEncoder,
    images: Tensor,
    captions: Tensor,
    steps: int,
    lr: float,
    weight_decay: float,
    mistake: str = "",
    loss: Callable = toy_loss,
) -> Tensor:
    """All parameters after full batches of the loss."""
    parameters = list(model.parameters())
    m, v = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    beta = 0.999 if mistake == "AdamW's own betas" else 0.98
    eps = 1e-8 if mistake == "AdamW's own eps" else 1e-6
    for k in range(steps):
        value = loss(
            model.encode_image(images),
            model.encode_text(captions),
            model.logit_scale,
            model.logit_bias,
        )
        grads = torch.autograd.grad(value, parameters)
        rate = lr * (1 + math.cos(math.pi * k / steps)) / 2
        rate = lr if mistake == "a constant learning rate" else rate
        with torch.no_grad():
            for i, (p, grad) in enumerate(zip(parameters, grads, strict=True)):
                m[i] = 0.9 * m[i] + 0.1 * grad
                v[i] = beta * v[i] + (1 - beta) * grad * grad
                if p.dim() > 1 or mistake == "weight decay for all parameters":
                    p -= rate * weight_decay * p * (mistake != "no weight decay")
                step = m[i] / (1 - 0.9 ** (k + 1))
                p -= rate * step / ((v[i] / (1 - beta ** (k + 1))).sqrt() + eps)
            model.logit_scale.clamp_(max=math.log(100))
    return torch.cat([p.detach().flatten() for p in parameters])


def faint_loss(*features: Tensor) -> Tensor:
    """So small that eps counts beside its gradients."""
    return 1e-5 * toy_loss(*features)


TRAINING_MISTAKES = (
    "AdamW's own betas",
    "AdamW's own eps",
    "a constant learning rate",
    "weight decay for all parameters",
    "no weight decay",
)


def counting_encoder(rows: int) -> tuple[DualEncoder, Tensor, Tensor]:
    """A model whose features are the number of the image and of the caption."""
    model = DualEncoder(nn.Identity(), 1, nn.EmbeddingBag(rows, 1), 1, 1).to(profile.device)
    with torch.no_grad():
        model.image_head.weight.fill_(1.0)
        model.text_head.weight.fill_(1.0)
        model.text.weight.copy_(torch.arange(float(rows))[:, None])
    numbers = torch.arange(rows, device=profile.device)[:, None]
    return model, numbers.float(), numbers


def info_nce(image: Tensor, text: Tensor, s: Tensor, b: Tensor) -> Tensor:
    z = s.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + 0 * b
    own = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


# %% check="train_clip" points=2
# Five pairs in batches of at most eight: each step sees all of them.
g = checks.generator(7)
images = checks.randn(5, 4, generator=g, dtype=torch.float64)
captions = torch.tensor([[0, 1], [2, 1], [3, 4], [5, 1], [6, 2]], device=profile.device)
start = toy_encoder(checks.generator(8)), toy_encoder(checks.generator(8))
losses = train_clip(start[0], images, captions, toy_loss, 4, 8, 0.05, torch.Generator())
checks.kind(losses, list, what="the losses")
assert [type(loss) for loss in losses] == [float] * 4, f"four plain numbers; yours: {losses}"


def compare_training(
    model: DualEncoder,
    other: DualEncoder,
    steps: int,
    lr: float,
    weight_decay: float,
    loss: Callable = toy_loss,
) -> None:
    """model was trained; other, which starts alike, is trained here by the formulas."""
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    state = {name: t.clone() for name, t in other.state_dict().items()}
    results = {}
    for mistake in ("", *TRAINING_MISTAKES):
        other.load_state_dict(state)
        results[mistake] = trained_by_formulas(
            other, images, captions, steps, lr, weight_decay, mistake, loss
        )
    expected = results.pop("")
    checks.close(
        found, expected, what=f"the parameters after {steps} steps", rtol=1e-6, mistakes=results
    )


compare_training(*start, steps=4, lr=0.05, weight_decay=0.1)
### BEGIN HIDDEN TESTS
for salt, steps, lr, weight_decay in [(9, 3, 0.02, 0.5), (10, 1, 0.1, 0.03), (11, 6, 0.01, 2.0)]:
    model, other = toy_encoder(checks.generator(salt)), toy_encoder(checks.generator(salt))
    model.train(salt != 10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # left over: it must not count
    flags = [part.training for part in model.modules()]
    with checks.unchanged(images=images, captions=captions):
        losses = train_clip(
            model, images, captions, toy_loss, steps, 5, lr, torch.Generator(), weight_decay
        )
    assert [part.training for part in model.modules()] == flags, "the training mode has changed"
    assert all(p.grad is None for p in model.parameters()), "afterwards every .grad is None"
    assert all(p.requires_grad for p in model.parameters()), "requires_grad has changed"
    features = other.encode_image(images), other.encode_text(captions)
    first = toy_loss(*features, other.logit_scale, other.logit_bias)
    checks.close(losses[0], float(first.detach()), what="the loss of the first step", rtol=1e-9)
    compare_training(model, other, steps, lr, weight_decay)
model, other = toy_encoder(checks.generator(25)), toy_encoder(checks.generator(25))
losses = train_clip(model, images, captions, faint_loss, 3, 5, 0.02, torch.Generator(), 0.2)
compare_training(model, other, 3, 0.02, 0.2, faint_loss)
model = toy_encoder(checks.generator(26))
model.logit_bias.grad = torch.ones_like(model.logit_bias)
before = float(model.logit_bias.detach())
train_clip(
    model,
    images,
    captions,
    lambda image, text, s, b: toy_loss(image, text, s, b.detach()),
    2,
    5,
    0.05,
    torch.Generator(),
)
checks.close(float(model.logit_bias.detach()), before, what="a bias that the loss leaves out")
assert model.logit_bias.grad is None, "afterwards every .grad is None"
model = toy_encoder(checks.generator(12))
for p in model.parameters():
    p.grad = torch.ones_like(p)
before = torch.cat([p.detach().flatten() for p in model.parameters()])
nothing = train_clip(model, images, captions, toy_loss, 0, 5, 0.1, torch.Generator())
assert nothing == [], "no steps, no losses"
after = torch.cat([p.detach().flatten() for p in model.parameters()])
checks.close(after, before, what="the parameters after no steps", rtol=0)
assert all(p.grad is None for p in model.parameters()), "afterwards every .grad is None"
### END HIDDEN TESTS

# %% check="train_clip" points=1
# A model whose features are row numbers, and a loss that takes notes.
model, numbers, ids = counting_encoder(6)
notes = []


def noting(image: Tensor, text: Tensor, s: Tensor, b: Tensor) -> Tensor:
    notes.append(
        (image.detach().flatten().tolist(), text.detach().flatten().tolist(), float(s.detach()))
    )
    return (image.sum() + text.sum() + b) * 0 - s


losses = train_clip(model, numbers, ids, noting, 3, 4, 0.0, torch.Generator().manual_seed(1))
for seen, said, _ in notes:
    assert seen == said, f"images {seen} were paired with captions {said}"
    assert len(set(seen)) == 4, f"a batch holds 4 different images; yours are {seen}"
### BEGIN HIDDEN TESTS
model, numbers, ids = counting_encoder(40)
for size, steps in [(16, 5), (40, 2), (1, 3)]:
    notes.clear()
    g, order = checks.generator(13), checks.generator(13)
    losses = train_clip(model, numbers, ids, noting, steps, size, 0.0, g)
    assert len(notes) == steps, f"{steps} steps compute {steps} losses; yours {len(notes)}"
    for seen, said, _ in notes:
        drawn = torch.randperm(40, generator=order)[:size].tolist()
        assert [round(x) for x in seen] == drawn, "see step 1 of the docstring for what is drawn"
        assert [round(x) for x in said] == drawn, "captions do not belong to the images"
    assert torch.equal(g.get_state(), order.get_state()), "one draw from `generator` for each step"
model.train()
list(model.modules())[-1].eval()  # one part is frozen in evaluation mode
modes = [part.training for part in model.modules()]
train_clip(model, numbers, ids, noting, 2, 4, 0.0, checks.generator(14))
assert modes == [part.training for part in model.modules()], "a part's training mode has changed"
# The loss is −s: the scale rises in every step, up to the limit.
notes.clear()
losses = train_clip(model, numbers, ids, noting, 8, 40, 1.0, checks.generator(14))
most = max(s for _, _, s in notes)
assert most <= math.log(100) + 1e-6, f"a loss was computed with a factor of {math.exp(most):.0f}"
checks.close(
    float(model.logit_scale.detach()), math.log(100), what="the scale at its limit", rtol=1e-6
)
### END HIDDEN TESTS

# %% check="train_clip" points=1
# A toy of 5,500 parameters on real digits: 64 pixels, one hidden layer, a bag of words.
pictures, digits, bold = digit_captions()
held = torch.arange(len(digits), device=digits.device) % 5 == 0
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(checks.seed())
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU())
    model = DualEncoder(hidden, 48, nn.EmbeddingBag(13, 32), 32, 24).to(profile.device)
sentences = caption_ids(digits, bold)
losses = train_clip(
    model, pictures[~held], sentences[~held], info_nce, 120, 48, 0.01, checks.generator(15)
)
late = sum(losses[-10:]) / 10
assert late < 0.5 * losses[0], f"the loss should fall; it goes from {losses[0]:.2f} to {late:.2f}"
### BEGIN HIDDEN TESTS
with torch.no_grad():
    every = torch.arange(10, device=digits.device).repeat_interleave(2)
    kinds = caption_ids(every, torch.arange(20, device=digits.device) % 2)
    guess = (
        cosines(model.encode_image(pictures[held]), model.encode_text(kinds))
        .argmax(1)
        .floor_divide(2)
    )
right = float((guess == digits[held]).float().mean())
assert right > 0.8, f"the nearest caption names the digit for {right:.0%} of held-out images"
### END HIDDEN TESTS

# %% [markdown]
# ## Classes from words {#zero-shot}
#
# A trained pair of encoders classifies with no further training. Write each class as a sentence,
# encode the sentences, and take the class nearest to the image: **zero-shot** classification, since
# no image of these classes was ever labeled. One sentence may be an unlucky one ("crane", bird or
# machine?), so CLIP writes each class in several **templates**, 80 for ImageNet, normalizes each
# feature, averages, and normalizes again:
#
# $$ w_c = \frac{\bar v_c}{\lVert \bar v_c\rVert},\qquad
# \bar v_c = \frac1T\sum_t \frac{v_{ct}}{\lVert v_{ct}\rVert},\qquad
# \hat c = \arg\max_c\; \frac{u}{\lVert u\rVert}\cdot w_c. $$
#
# Both norms matter. Without the inner one, a sentence with a long vector outvotes the others.
# Without the outer one, a class whose sentences disagree has a short mean, and so a score nearer to
# 0 than its cosine is: it can lose though it is the nearest.


# %% exercise="zero_shot" minutes=10 difficulty=1
def zero_shot(image: Tensor, prompts: Tensor) -> Tensor:
    """The class of each image, (n,) int64: the one with the largest cosine, of several the first.

    image: (n, d) features. prompts: (classes, templates, d) features of sentences. Both of one
    floating dtype, with lengths from 1e-6 to 1e6; half precision is computed in float32. A class's
    vector is the mean (never zero) of its normalized templates, normalized. Nothing is changed.
    """
    ### BEGIN SOLUTION
    classes = F.normalize(wide(prompts), dim=-1).mean(1)
    similarity = F.normalize(wide(image), dim=-1) @ F.normalize(classes, dim=-1).T
    return similarity.argmax(1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which norm can be left out?</summary>
#
# That of the image scales all of its cosines alike, and so moves no argmax. The other two cannot.
# </details>

# %% tags=["support"]
# Support: zero-shot classes by the definition, in float64


def classes_by_definition(image: Tensor, prompts: Tensor, mistake: str = "") -> Tensor:
    image, prompts = image.double(), prompts.double()
    rows = []
    for one in image:
        values = []
        for templates in prompts:
            lengths = templates.square().sum(-1, keepdim=True).sqrt()
            if mistake == "templates averaged as they are":
                lengths = torch.ones_like(lengths)
            mean = (templates / lengths).sum(0) / len(templates)
            if mistake != "a mean that is not normalized":
                mean = mean / mean.square().sum().sqrt()
            values.append((one * mean).sum())
        rows.append(torch.stack(values))
    return torch.stack(rows).argmax(1)


# %% check="zero_shot" points=1
# Class 0 has two sentences that disagree, class 1 one that is said twice.
prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.8, -0.6], [0.8, -0.6]]])
image = torch.tensor([[2.0, 2.0], [3.0, 0.9], [1.0, -1.0]])
checks.close(
    zero_shot(image, prompts),
    torch.tensor([0, 0, 1]),
    what="the classes of three images",
    mistakes={
        "a mean that is not normalized": classes_by_definition(
            image, prompts, "a mean that is not normalized"
        )
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(16)
for n, classes, templates, d in [(60, 7, 3, 4), (40, 3, 1, 5), (50, 5, 4, 2), (1, 1, 2, 3)]:
    image = uneven(n, d, g=g)
    prompts = uneven(classes * templates, d, g=g).view(classes, templates, d)
    expected = classes_by_definition(image, prompts)
    names = ("templates averaged as they are", "a mean that is not normalized")
    with checks.unchanged(image=image, prompts=prompts):
        found = zero_shot(image, prompts)
    checks.close(
        found,
        expected,
        what=f"the classes of {n} images among {classes}, {templates} templates",
        mistakes={name: classes_by_definition(image, prompts, name) for name in names},
    )
    assert found.dtype == torch.int64, f"classes are int64; yours are {found.dtype}"
    checks.close(zero_shot(image.double(), prompts.double()), expected, what="in float64")
# So many classes that cosines in bfloat16 tie
image, prompts = uneven(40, 2, g=g).bfloat16(), uneven(50, 2, g=g).view(50, 1, 2).bfloat16()
among = cosines(image.double(), prompts[:, 0].double())
checks.close(
    among.gather(1, zero_shot(image, prompts)[:, None])[:, 0],
    among.amax(1),
    what="the cosines of the classes chosen in bfloat16",
    atol=1e-6,
    hint="Compute in float32",
)
large = (1000 * torch.tensor([[0.5, 0.4], [0.1, 0.9]])).half()  # whose squares exceed float16
prompts = (1000 * torch.tensor([[[0.9, 0.1], [0.8, 0.3]], [[0.1, 0.9], [0.3, 0.8]]])).half()
checks.close(zero_shot(large, prompts), torch.tensor([0, 1]), what="the classes in float16")
twice = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 3.0]]])
checks.close(
    zero_shot(torch.tensor([[0.0, 2.0]]), twice), torch.tensor([1]), what="the first of two alike"
)
close_by = torch.tensor([[[1.0, 0.0]], [[1.0, 1e-9]]], dtype=torch.float64)
checks.close(
    zero_shot(torch.ones(1, 2, dtype=torch.float64), close_by),
    torch.tensor([1]),
    what="two classes that float64 alone can tell apart",
)
opposed = torch.tensor([[[1.0, 1e-6], [-1.0, 1e-6]], [[0.3, 1.0], [0.3, 1.0]]])
checks.close(
    zero_shot(torch.tensor([[0.0, 1.0]]), opposed),
    torch.tensor([0]),
    what="a class whose sentences nearly cancel: a mean of any length is normalized",
)
faint = torch.tensor([[[1e-6, 0.0], [0.0, 1.0]], [[2.1, 1.0], [2.1, 1.0]]])  # at 45 and 25 degrees
checks.close(
    zero_shot(torch.tensor([[1.2, 1.0]]), faint),  # at 40 degrees
    torch.tensor([0]),
    what="a class with a sentence of length 1e-6, which counts as much as the other",
)
image, prompts = far_apart(30, 3, g=g), far_apart(15, 3, g=g).view(5, 3, 3)
checks.close(
    zero_shot(image, prompts),
    classes_by_definition(image, prompts),
    what="the classes of features with lengths from 1e-6 to 1e6",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: twenty captions, four of them never seen {#two-losses}
#
# **Question.** Both losses train the same encoders on the same images, one fifth held out. Images
# of four captions (a bold three, a thin five, a thin seven, a bold eight) are left out of training
# entirely, though each of these words is seen in other captions. For how many held-out images is
# the right one of 20 captions the nearest? And for how many images of the four captions that were
# never seen?
#
# Chance is 5 %. Write down both numbers, and which loss will do better.

# %% tags=["experiment"]
IMAGES, DIGITS, BOLD = digit_captions()
HELD = torch.arange(len(DIGITS), device=DIGITS.device) % 5 == 0
UNSEEN = torch.zeros_like(HELD)
LEFT_OUT = ((3, 1), (5, 0), (7, 0), (8, 1))
for digit, weight in LEFT_OUT:
    UNSEEN |= DIGITS.eq(digit) & BOLD.eq(weight)
EVERY = torch.arange(20, device=DIGITS.device)
ALL_CAPTIONS = caption_ids(EVERY // 2, EVERY % 2)  # a thin zero, a bold zero, a thin one, …
SENTENCES = [" ".join(WORDS[i] for i in row) for row in ALL_CAPTIONS.tolist()]


def contrastive(kind: str, registers: int = 0, seed: int = 0) -> tuple[DualEncoder, list[float]]:
    """Encoders trained with one of the losses, and the losses of the steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are not worth sharing
    torch.manual_seed(seed)
    vision = VisionTransformer(8, 2, 1, width=48, layers=2, heads=4, registers=registers, std=0.5)
    text = TextEncoder(len(WORDS), 3, width=32, layers=1, heads=2)
    model = DualEncoder(vision, 48, text, 32, dim=32).to(profile.device)
    if kind == "SigLIP":
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.fill_(-10)
    rows = ~HELD & ~UNSEEN
    losses = train_clip(
        model,
        IMAGES[rows],
        caption_ids(DIGITS, BOLD)[rows],
        siglip_loss if kind == "SigLIP" else lambda u, v, s, b: clip_loss(u, v, s),
        steps=240,
        batch_size=32,
        lr=3e-3,
        generator=torch.Generator().manual_seed(seed),
    )
    torch.set_num_threads(threads)
    return model.eval(), losses


@torch.no_grad()
def shares(model: DualEncoder) -> dict[str, float]:
    """The shares of images that are classified right, by sentences alone."""
    image, text = model.encode_image(IMAGES), model.encode_text(ALL_CAPTIONS)
    of_digits = text.view(10, 2, -1)  # for each digit two templates: thin and bold
    known, target = HELD & ~UNSEEN, 2 * DIGITS + BOLD
    caption = zero_shot(image, text[:, None]) == target
    of_ink = zero_shot(image, of_digits.transpose(0, 1)) == BOLD  # ten templates: all digits
    return {
        "digit of 10": float((zero_shot(image, of_digits) == DIGITS)[known].float().mean()),
        "ink of 2": float(of_ink[known].float().mean()),
        "caption of 20": float(caption[known].float().mean()),
        "unseen caption of 20": float(caption[UNSEEN].float().mean()),
    }


trained = {kind: contrastive(kind) for kind in ("CLIP", "SigLIP")}
print(f"{'':8}" + "".join(f"{name:>22}" for name in shares(trained["CLIP"][0])))
for kind, (model, _) in trained.items():
    print(f"{kind:8}" + "".join(f"{share:22.0%}" for share in shares(model).values()))
for kind, (model, _) in trained.items():
    scale, bias = float(model.logit_scale.detach().exp()), float(model.logit_bias.detach())
    print(f"{kind}: factor {scale:.1f}, bias {bias:.1f} at the end")

# %% tags=["experiment", "figure"]
# Figure: which caption is near which image
with torch.no_grad():
    fig, axes = plot.plt.subplots(1, 2, figsize=(11, 5.0))
    for ax, (kind, (model, _)) in zip(axes, trained.items(), strict=True):
        image = F.normalize(model.encode_image(IMAGES), dim=-1)
        text = F.normalize(model.encode_text(ALL_CAPTIONS), dim=-1)
        kinds = 2 * DIGITS + BOLD
        rows = HELD | UNSEEN
        means = torch.stack([(image[rows & (kinds == k)] @ text.T).mean(0) for k in range(20)])
        names = [s.removeprefix("a ") for s in SENTENCES]
        for digit, weight in LEFT_OUT:
            names[2 * digit + weight] += " *"
        plot.heatmap(
            means,
            xlabel="caption",
            ylabel="images that show" if kind == "CLIP" else "",
            title=kind,
            unit="mean cosine",
            xticks=names,
            yticks=names if kind == "CLIP" else [""] * 20,
            center=0.0,
            vmin=-1,
            vmax=1,
            ax=ax,
        )
        ax.grid(False)
plot.caption(
    fig,
    "Held-out images (rows, by what they show) against all captions (columns); captions with a "
    "star were never seen in training. The diagonal is what training asks for. Beside it is the "
    "same digit with the other amount of ink; further off, digits that look alike.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** (What is said here held for each of five seeds.) Both losses learn most digits
# and most captions that they were trained on, and CLIP is ahead of SigLIP in both. The SigLIP paper
# finds the reverse: better at batches of some thousands, equal at the largest, and simpler and
# cheaper on many devices at any. What differs here is what the web hardly has. With 16 captions and
# 32 images to a batch most captions stand in it twice or more, and count as negatives of their own
# images. In a softmax they only share the probability; a sigmoid is told outright that they are
# wrong.
#
# On captions that were never seen, both are right for many times as many images as chance, and for
# far fewer than on captions of the training. Words are not just added up: nothing in a
# contrastive loss asks for that. A caption has to be told from those in its batch, and for that a
# text encoder may learn sixteen sentences by heart.

# %% [markdown]
# ## What registers do here {#registers}
#
# The text says that registers clean attention maps. Does it show? The same training again, with
# four registers. If patches are misused as memory, their norms before the last layer norm say so:
# in large models a few are ten times as large as the rest.

# %% tags=["experiment"]
with_registers, _ = contrastive("CLIP", registers=4)


@torch.no_grad()
def look_inside(model: DualEncoder, registers: int) -> tuple[Tensor, Tensor]:
    """Of held-out images: the patches' norms before the last norm (images, patches), and the class
    token's attention in the last block, (images, tokens), averaged over heads."""
    seen = {}
    last, norm = model.vision.blocks[-1], model.vision.norm
    hooks = [
        last.register_forward_pre_hook(lambda module, args: seen.update(into=args[0])),
        norm.register_forward_pre_hook(lambda module, args: seen.update(out=args[0])),
    ]
    model.encode_image(IMAGES[HELD])
    for hook in hooks:
        hook.remove()
    return seen["out"][:, 1 + registers :].norm(dim=-1), last.weights(seen["into"])[:, :, 0].mean(1)


inside = {0: look_inside(trained["CLIP"][0], 0), 4: look_inside(with_registers, 4)}
for registers, model in ((0, trained["CLIP"][0]), (4, with_registers)):
    norms, attention = inside[registers]
    right = shares(model)["caption of 20"]
    print(
        f"{registers} registers: caption of 20 right {right:.0%}; largest norm of a patch "
        f"{norms.max() / norms.median():.1f} times the median; class token's attention to "
        f"registers {attention[:, 1 : 1 + registers].sum(-1).mean():.0%}"
    )

# %% tags=["experiment", "figure"]
# Figure: where the class token looks, and how large the patches' norms are
fig = plot.plt.figure(figsize=(11, 3.9))
left, right = fig.subfigures(1, 2, width_ratios=(2.3, 1))
axes = left.subplots(3, 8)
index = torch.cumsum(HELD.long(), 0) - 1  # an image's place among those held out
for column in range(8):
    i = int((HELD & DIGITS.eq(column)).nonzero()[0])
    axes[0, column].imshow(plot.array(IMAGES[i, 0]), cmap="Greys")
    for row, registers in ((1, 0), (2, 4)):
        weights = inside[registers][1][index[i], 1 + registers :].view(4, 4)
        axes[row, column].imshow(plot.array(weights), cmap="Greys", vmin=0, vmax=0.3)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
for row, name in enumerate(("image", "no registers", "4 registers")):
    axes[row, 0].set_title(name, fontsize=9)
ax = right.subplots()
for registers, style in ((0, "-"), (4, "--")):
    norms = plot.array(inside[registers][0].flatten())
    ax.hist(norms, bins=40, histtype="step", linestyle=style, label=f"{registers} registers")
ax.set(xlabel="norm of a patch's vector", ylabel="patches")
ax.set_title("No outliers in either")
ax.legend()
plot.caption(
    fig,
    "Left: what the class token attends to in the last block, 4 × 4 patches, dark is much (0.3 and "
    "more), without and with registers. Right: norms of all patches of the held-out images, before "
    "the last layer norm. There is no second hill far to the right.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** (In each of five seeds.) Nothing that one could see: no patch is an outlier,
# with registers or without, and the accuracies differ by no more than those of two seeds. The class
# token gives the four registers less attention than it gives to four patches. That agrees with the
# paper, in which outliers come with size and long training: of DINOv2's models the three largest
# have them, and only after a third of the training. (A reproduction has found weaker ones in a
# DeiT-III of small size.) An image of 16 patches, nearly all of which carry ink or its edge, has no
# room to spare. You built registers because the models that you will load have them.

# %% [markdown]
# ## A batch across devices {#gather}
#
# CLIP's batch of 32,768 pairs lies on hundreds of devices. Rank $r$ of $R$ has $n$ pairs, $N = Rn$
# in all. Its rows of logits need all $N$ texts, its columns all $N$ images: so features are
# gathered, $N\cdot d$ numbers, and each rank computes the losses of its own $n$ rows and $n$
# columns, a matrix of $n\times N$ twice, never $N\times N$. With $L_r$ the loss of rank $r$'s own,
#
# $$ L = \frac1R\sum_r L_r. $$
#
# Now the gradient of rank $r$'s features. They were used by *every* rank, as negatives:
#
# $$ \frac{\partial L}{\partial u_r} = \frac1R\sum_{r'}\frac{\partial L_{r'}}{\partial u_r}. $$
#
# But PyTorch's `dist.all_gather` records nothing: what comes out are plain numbers, and rank $r$
# would get the summand $r'=r$ alone, and of it only what flows through its own live rows. Nothing
# fails; the encoder is trained with its negatives glued to the table.
#
# So write the backward pass. It is the mirror image of gathering: every rank has a gradient for all
# $N$ rows, and rank $r$ needs the sum, over ranks, of the piece that is its own. Then `DDP`
# averages the parameters' gradients over ranks, which is the $1/R$ above. That is all: count the
# factors of $R$ once more before you multiply by any.


# %% exercise="gathered_clip_loss" minutes=25 difficulty=3 path="more"
def gathered_clip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """This rank's share L_r of the contrastive loss of a batch that lies on all ranks of `group`.

    image, text: (n, d), this rank's pairs, float32 or float64, with the same n on all ranks. The
    batch is all ranks' rows in the order of ranks. L_r is the mean of the cross-entropies of this
    rank's n images among all texts and of its n texts among all images; the mean of L_r over the
    ranks is clip_loss of the whole batch.

    Backward, image and text get the sum over all ranks of the gradients of their losses, so that
    DDP's mean of the parameters' gradients is the gradient of clip_loss of the whole batch;
    logit_scale gets the gradient of L_r. All ranks call backward. No tensor larger than n × N, N
    rows in all, is made (where n ≥ d). Inputs are not changed.
    """
    ### BEGIN SOLUTION
    u, v = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    every_u, every_v = _GatherRows.apply(u, group), _GatherRows.apply(v, group)
    factor = logit_scale.to(u.dtype).exp()
    own = torch.arange(len(u), device=u.device) + dist.get_rank(group) * len(u)
    of_images = F.cross_entropy(factor * u @ every_v.T, own)
    return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
    ### END SOLUTION


# Here is room for your class of torch.autograd.Function.
### BEGIN SOLUTION
class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward, the sum over the ranks of the gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


### END SOLUTION

# %% [markdown]
# <details><summary>Hint: the targets</summary>
#
# This rank's first row belongs to column $r\,n$ of the gathered features. `dist.get_rank(group)` is
# the rank in the group.
# </details>
#
# <details><summary>Hint: a backward pass of your own</summary>
#
# A class of `torch.autograd.Function` has static methods `forward(ctx, x, group)` and
# `backward(ctx, gradient)`; what backward needs goes into `ctx`. An all-reduce changes its argument
# in place, so hand it a contiguous copy.
# </details>

# %% tags=["support"]
# Support: the loss on the ranks, and on one machine


@checks.measured
def loss_on_rank(loss: Callable, rank: int, case: tuple) -> dict:
    """What one rank has: its loss, its gradients, and the largest tensor that it made."""
    images, texts, s, members = case
    group = None
    for ranks in members:
        made = dist.new_group(list(ranks))
        group = made if rank in ranks else group
    image, text, scale = (t.clone().requires_grad_() for t in (images[rank], texts[rank], s))
    before = image.detach().clone(), text.detach().clone()
    with checks.allocations() as made:
        value = loss(image, text, scale, group)
        gradients = torch.autograd.grad(value, (image, text, scale))
    assert torch.equal(image, before[0]), "the images' features were changed in place"
    assert torch.equal(text, before[1]), "the texts' features were changed in place"
    return {"loss": value.detach(), "gradients": gradients, "largest": made.largest}


def shares_by_definition(image: Tensor, text: Tensor, s: Tensor, ranks: int) -> Tensor:
    """What each rank's own images and texts cost in the whole batch, (ranks,); its mean is L."""
    z = cosines(image, text) * s.exp()
    each = (z.logsumexp(0) + z.logsumexp(1)) / 2 - z.diagonal()
    return each.view(ranks, -1).mean(1)


def compare_on_ranks(loss: Callable, ranks: int, cases: list[tuple]) -> list[list[dict]]:
    found = checks.on_ranks(ranks, lambda rank, case: loss_on_rank(loss, rank, case), cases)
    for (images, texts, s, members), results in zip(cases, found, strict=True):
        for mates in members or [tuple(range(ranks))]:
            leaves = [t.double().requires_grad_() for t in (images, texts, s)]
            whole = (
                torch.cat([leaves[0][r] for r in mates]),
                torch.cat([leaves[1][r] for r in mates]),
            )
            gradients = torch.autograd.grad(clip_by_definition(*whole, leaves[2]), leaves)
            n, size, dtype = images.shape[1], len(mates), images.dtype
            steep = float(s.detach()) > math.log(50)
            shares = shares_by_definition(*whole, leaves[2], size)
            near = 20 * torch.finfo(dtype).eps  # a loss near 0 is a difference of large numbers
            fine = 1.0 if dtype == torch.float32 else 1e-4
            for place, r in enumerate(mates):
                checks.close(
                    results[r]["loss"],
                    shares[place].to(dtype),
                    what=f"the loss of rank {r} of {mates}",
                    rtol=1e-5 * fine,
                    atol=near,
                    dtype=dtype,
                    hint="Logits may be large" if steep else "",
                )
                if steep:  # gradients there are differences of numbers larger still
                    continue
                (scale,) = torch.autograd.grad(shares[place], leaves[2], retain_graph=True)
                checks.close(
                    results[r]["gradients"][2],
                    scale.to(dtype),
                    what=f"the gradient of logit_scale on rank {r} of {mates}",
                    rtol=1e-4 * fine,
                    atol=near,
                )
                for i, name in enumerate(("image", "text")):
                    sums = [size * gradients[i][r].to(dtype), gradients[i][r].to(dtype)]
                    close = 1e-4 * fine
                    checks.close(
                        results[r]["gradients"][i],
                        sums[0],
                        what=f"the gradient of {name} on rank {r} of {mates}",
                        rtol=close,
                        atol=max(near, close * float(sums[0].abs().max())),
                        mistakes={
                            "a gather that records nothing": own_gradient(whole, s, place, n, i),
                            "dividing by the number of ranks": sums[1],
                        },
                    )
    return found


def own_gradient(whole: tuple[Tensor, Tensor], s: Tensor, place: int, n: int, i: int) -> Tensor:
    """What reaches a rank's images (i = 0) or texts (1) where gathered features are constants."""
    own = slice(place * n, place * n + n)
    live = [t.detach()[own].clone().requires_grad_() for t in whole]
    total = 0.0
    for mine, others in ((live[0], whole[1].detach()), (live[1], whole[0].detach())):
        z = cosines(mine, others) * s.double().exp()
        rows = torch.arange(n)
        total = total + (z.logsumexp(1) - z[rows, rows + place * n]).mean() / 2
    return torch.autograd.grad(total, live)[i].to(s.dtype)


# %% check="gathered_clip_loss" points=2
g = checks.generator(17)
ten = torch.tensor(10.0).log()
images, texts = torch.randn(2, 3, 2, generator=g), torch.randn(2, 3, 2, generator=g)
found = compare_on_ranks(gathered_clip_loss, 2, [(images, texts, ten, ())])
### BEGIN HIDDEN TESTS
cases = []
for n, d, dtype, members in [
    (4, 3, torch.float64, ()),
    (1, 2, torch.float32, ()),
    (3, 5, torch.float64, ((0, 2), (1,))),
    (2, 3, torch.float32, ((2, 1, 0),)),
]:
    features = finest(2, 3, n, d, dtype=dtype, g=g).cpu()
    lengths = 10 ** torch.rand(2, 3, n, 1, generator=g).to(dtype)
    members = tuple(tuple(sorted(ranks)) for ranks in members)
    cases.append((*(features * lengths), torch.tensor(7.0, dtype=dtype).log(), members))
hundred = torch.tensor(100.0).log()  # e¹⁰⁰ is too large for float32
cases.append((*torch.randn(2, 3, 8, 2, generator=g), hundred, ()))
found = compare_on_ranks(gathered_clip_loss, 3, cases)
for result in compare_on_ranks(
    gathered_clip_loss, 3, [(*torch.randn(2, 3, 6, 2, generator=g), ten, ())]
)[0]:
    assert result["largest"] <= 6 * 18, (
        f"6 pairs of 18 need matrices of 6 × 18 = 108 numbers; the largest tensor of yours has "
        f"{result['largest']}: each rank computes its own rows and columns only"
    )
### END HIDDEN TESTS

# %% [markdown]
# ## From patches to words {#projector}
#
# A vision encoder's patches have its own width and its own language. The **projector** maps them to
# vectors that a language model takes for words: in LLaVA-1.5 two linear layers with GELU between.
# The class token is not used; it was made for one sentence, and questions ask for details.
#
# Tokens cost. An image of 1,344 × 1,344 pixels in patches of 14 has 9,216 of them, more than most
# documents. So neighbors are **merged** before the projector: the four vectors of each 2 × 2 square
# become one vector, four times as wide. Nothing is lost (there is an exact inverse), the sequence
# is a quarter as long, and the first linear layer decides what to keep. Qwen's models call it a
# patch merger, InternVL's pixel shuffle or pixel unshuffle. Other models compress by a learned
# query per output token instead (Flamingo's resampler), which loses the places.


# %% exercise="projector" minutes=18 difficulty=1
def merge_tokens(tokens: Tensor, grid: tuple[int, int], size: int = 2) -> Tensor:
    """Each square of size × size neighbors as one token.

    tokens: (batch, rows · columns, width), row by row, with grid = (rows, columns), any dtype and
    strides. Returns (batch, rows/size · columns/size, size² · width), row by row; in each, the
    square's vectors stand one behind the other, row by row. ValueError where the number of tokens
    is not that of the grid, or rows or columns are no multiple of `size`.
    """
    ### BEGIN SOLUTION
    rows, columns = grid
    batch, count, width = tokens.shape
    if count != rows * columns or rows % size or columns % size:
        raise ValueError(f"{count} tokens of a grid {rows} × {columns} make no squares of {size}")
    squares = tokens.reshape(batch, rows // size, size, columns // size, size, width)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)
    ### END SOLUTION


def unmerge_tokens(merged: Tensor, grid: tuple[int, int], size: int = 2) -> Tensor:
    """The inverse: the tokens (batch, rows · columns, width) of which these are the squares. `grid`
    is (rows, columns) before merging. ValueError where the number of squares is not that of the
    grid, rows or columns are no multiple of `size`, or the width is no multiple of size²."""
    ### BEGIN SOLUTION
    rows, columns = grid
    batch, count, wide_ = merged.shape
    if count * size**2 != rows * columns or rows % size or columns % size or wide_ % size**2:
        raise ValueError(f"{count} squares of {size} make no grid {rows} × {columns}")
    squares = merged.reshape(batch, rows // size, columns // size, size, size, wide_ // size**2)
    return squares.transpose(2, 3).reshape(batch, rows * columns, wide_ // size**2)
    ### END SOLUTION


class Projector(nn.Module):
    """Patches (batch, rows · columns, vision_width) → (batch, rows/size · columns/size, width):
    merge_tokens, then `first`: nn.Linear(size² · vision_width, width), exact GELU, and `second`:
    nn.Linear(width, width), both with biases. size = 1 merges nothing."""

    def __init__(self, vision_width: int, width: int, grid: tuple[int, int], size: int = 1) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.grid, self.size = grid, size
        self.first = nn.Linear(size**2 * vision_width, width)
        self.second = nn.Linear(width, width)
        ### END SOLUTION

    def forward(self, patches: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size))))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: patchify, once more</summary>
#
# A grid of tokens is an image whose pixels are vectors. Only the order inside a square differs from
# `patchify`: here the vector's numbers come last, not first.
# </details>

# %% tags=["support"]
# Support: merging one square after another


def merge_by_definition(tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    rows, columns = grid
    squares = []
    for row in range(0, rows, size):
        for column in range(0, columns, size):
            places = [(row + i) * columns + column + j for i in range(size) for j in range(size)]
            squares.append(torch.cat([tokens[:, place] for place in places], dim=-1))
    return torch.stack(squares, dim=1)


# %% check="projector" points=1
# Eight tokens of width 1 in two rows; the squares are the left and the right half.
tokens = torch.arange(8.0).view(1, 8, 1)
checks.close(
    merge_tokens(tokens, (2, 4)),
    torch.tensor([[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]),
    what="a grid of 2 × 4 merged",
    mistakes={
        "merging neighbors in the sequence": tokens.view(1, 2, 4),
        "column by column inside a square": torch.tensor(
            [[[0.0, 4.0, 1.0, 5.0], [2.0, 6.0, 3.0, 7.0]]]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(18)
for batch, grid, width, size in [(2, (4, 6), 3, 2), (1, (6, 3), 2, 3), (3, (2, 5), 4, 1)]:
    tokens = checks.randn(batch, width, grid[0] * grid[1], generator=g).mT  # not contiguous
    expected = merge_by_definition(tokens, grid, size)
    with checks.unchanged(tokens=tokens):
        merged = merge_tokens(tokens, grid, size)
    checks.close(merged, expected, what=f"a grid {grid} merged by {size}", rtol=0)
    squares = expected.mT.contiguous().mT
    with checks.unchanged(merged=squares):
        back = unmerge_tokens(squares, grid, size)
    checks.close(back, tokens, what=f"squares of {size} put back into a grid {grid}", rtol=0)
for dtype in (torch.int64, torch.bfloat16, torch.float64):
    tokens = finest(2, 16, 3, dtype=dtype, g=g)
    merged, expected = merge_tokens(tokens, (2, 8)), merge_by_definition(tokens, (2, 8), 2)
    checks.close(merged, expected, what=f"merged tokens, {dtype}", rtol=0)
    back = unmerge_tokens(expected, (2, 8))
    checks.close(back, tokens, what=f"squares put back, {dtype}", rtol=0)
    assert merged.dtype == back.dtype == dtype, f"{dtype} should stay {dtype}"
tokens = checks.randn(2, 24, 3, generator=g)
checks.gradients(
    lambda x: merge_tokens(x, (4, 6)), lambda x: merge_by_definition(x, (4, 6), 2), tokens
)
checks.gradients(lambda x: unmerge_tokens(merge_tokens(x, (4, 6)), (4, 6)), lambda x: x * 1, tokens)
for grid, size in [((4, 5), 2), ((3, 8), 2), ((8, 3), 2), ((4, 6), 3), ((5, 5), 1)]:
    checks.raises(
        ValueError, merge_tokens, tokens, grid, size, because=f"24 tokens, {grid}, {size}"
    )
merged = torch.zeros(2, 6, 12)
for grid, size in [((4, 8), 2), ((3, 8), 2), ((8, 3), 2), ((2, 27), 3), ((2, 2), 1)]:
    checks.raises(
        ValueError, unmerge_tokens, merged, grid, size, because=f"6 squares, {grid}, {size}"
    )
checks.raises(
    ValueError, unmerge_tokens, merged[..., :10], (4, 6), 2, because="10 numbers are no 4 vectors"
)
### END HIDDEN TESTS

# %% check="projector" points=1
projector = Projector(2, 3, (2, 2), size=2).to(profile.device)
found = {name: tuple(p.shape) for name, p in projector.state_dict().items()}
asked = {"first.weight": (3, 8), "first.bias": (3,), "second.weight": (3, 3), "second.bias": (3,)}
assert found == asked, f"parameters and shapes {asked} are asked for; yours are {found}"
state = {name: torch.zeros(shape) for name, shape in asked.items()}
state |= {"first.bias": torch.tensor([1.0, -1.0, 0.0]), "second.weight": torch.eye(3)}
projector.load_state_dict(state)
checks.close(
    projector(torch.ones(1, 4, 2, device=profile.device)),
    torch.tensor([[[0.8413447, -0.1586553, 0.0]]]),
    what="a projector whose first layer gives 1, −1 and 0",
)
### BEGIN HIDDEN TESTS
g = checks.generator(19)
for grid, vision_width, width, size in [((4, 6), 5, 7, 2), ((3, 3), 2, 4, 1), ((3, 6), 2, 5, 3)]:
    projector = Projector(vision_width, width, grid, size).to(profile.device)
    state = {name: t.double() for name, t in randomize_(projector, g).items()}
    patches = checks.randn(2, grid[0] * grid[1], vision_width, generator=g)
    x = merge_by_definition(patches.double(), grid, size) @ state["first.weight"].T
    x = x + state["first.bias"]
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5)) @ state["second.weight"].T + state["second.bias"]
    with checks.kept(projector, patches=patches):
        found = projector(patches)
    checks.close(found, x.float(), what=f"patches {grid} projected, size {size}", rtol=1e-4)
projector, patches = projector.double(), patches.double()
checks.close(projector(patches), x, what="the projection in float64", dtype=torch.float64)
twice = torch.zeros(1, 24, 2, device=profile.device)
checks.raises(ValueError, merge_tokens, twice, (2, 6), because="a grid of 2 × 6 has 12 tokens")


def project_by_definition(patches: Tensor) -> Tensor:
    x = merge_by_definition(patches, grid, size) @ state["first.weight"].T + state["first.bias"]
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return x @ state["second.weight"].T + state["second.bias"]


checks.gradients(projector, project_by_definition, patches, names=("the patches",), rtol=1e-6)
projector(patches).square().sum().backward()
for name, p in projector.named_parameters():
    assert p.grad is not None, f"no gradient reaches {name}"
    assert p.grad.abs().max() > 0, f"the gradient of {name} is zero"
default = Projector(5, 4, (1, 3)).to(profile.device)
checks.close(
    torch.tensor(default(checks.randn(2, 3, 5, generator=g)).shape),
    torch.tensor([2, 3, 4]),
    what="the shape without merging, which is the default",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Splicing {#splice}
#
# A prompt is written with a **placeholder** where an image stands: `<image> Which digit is it?`. It
# is one token, an image is many vectors. So ids are embedded piece by piece, and the placeholder
# gives way to the image's vectors. Rows of a batch then have other lengths than their ids had, and
# padding comes after splicing.
#
# Three things can go wrong without an error, and have: labels that are not shifted along with the
# inputs (every target after the image is then off by the image's length, less the placeholder's
# one); image positions that keep a label, so that the model is asked to predict a vector that is no
# word; and a count that does not match, after which the second image of a batch answers the first
# one's question.


# %% exercise="splice_image_tokens" minutes=25 difficulty=2
def splice_image_tokens(
    embed: Callable[[Tensor], Tensor],
    rows: Sequence[Tensor],
    labels: Sequence[Tensor],
    images: Sequence[Tensor],
    placeholder: int,
    left: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors that a language model reads for texts with images in them.

    embed: ids (length,) → vectors (length, width). It is never given the placeholder, which may be
        an id that it does not know.
    rows: at least one, (length,) int64 ids each, of unequal lengths, maybe 0; some hold the
        placeholder once, several times, or not at all.
    labels: as long as the row each, int64: the target of each token, IGNORE where none counts.
    images: (tokens, width) vectors each, in the order of the placeholders over the batch, row after
        row; of unequal numbers of tokens, maybe 0; in the dtype of embed's vectors.

    Returns (inputs, labels, mask), padded to the longest row after splicing, on the right or with
    `left` on the left: inputs (batch, longest, width) in embed's dtype, padding 0; labels (batch,
    longest) int64, IGNORE at image vectors and padding, whatever the placeholder's label was; mask
    (batch, longest) bool, False at padding. ValueError unless there are as many images as
    placeholders. Gradients reach images and embed; what is given is not changed.
    """
    ### BEGIN SOLUTION
    flat = torch.cat(list(rows))
    is_image = flat == placeholder
    if int(is_image.sum()) != len(images):
        raise ValueError(f"{int(is_image.sum())} placeholders, but {len(images)} images")
    words = embed(flat[~is_image])
    # All vectors in one pool: one of zeros for padding, then the words, then the images.
    pool = torch.cat([words.new_zeros(1, words.shape[-1]), words, *images])
    word, pixel, waiting = 1, 1 + len(words), iter(images)
    lines = []  # for each row, the place in the pool and the label of each vector
    for ids, aims in zip(rows, labels, strict=True):
        line = []
        for token, aim in zip(ids.tolist(), aims.tolist(), strict=True):
            if token == placeholder:
                count = len(next(waiting))
                line += [(pixel + k, IGNORE) for k in range(count)]
                pixel += count
            else:
                line.append((word, aim))
                word += 1
        lines.append(line)
    longest = max(map(len, lines))
    paddings = [[(0, IGNORE)] * (longest - len(line)) for line in lines]
    lines = [p + line if left else line + p for line, p in zip(lines, paddings, strict=True)]
    pairs = torch.tensor(lines, dtype=torch.int64, device=flat.device).view(len(lines), longest, 2)
    return F.embedding(pairs[..., 0], pool), pairs[..., 1], pairs[..., 0] > 0
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: pieces, or one pool</summary>
#
# One way: `(ids == placeholder).nonzero()` gives the places, and between two of them lies a piece
# of text, maybe an empty one. Another, and faster in training: embed all words of the batch in one
# call, put words and image vectors into one tensor, and say for each place which row of it stands
# there. (The gradient of an embedding is as large as its table, for every call.)
# </details>
#
# <details><summary>Hint: which image is next</summary>
#
# One iterator over all images, from which each placeholder takes `next(…)`, keeps the order across
# rows.
# </details>

# %% tags=["support"]
# Support: splicing token by token


def splice_by_definition(
    table: Tensor, rows: list, labels: list, images: list, placeholder: int, left: bool
) -> tuple[Tensor, Tensor, Tensor]:
    queue, filled = list(images), []
    for k in range(len(rows)):
        sequence = []
        for i in range(len(rows[k])):
            if int(rows[k][i]) == placeholder:
                sequence += [(vector, IGNORE, True) for vector in queue.pop(0)]
            else:
                sequence.append((table[int(rows[k][i])], int(labels[k][i]), True))
        filled.append(sequence)
    most = max(len(sequence) for sequence in filled)
    nothing = (torch.zeros_like(table[0]), IGNORE, False)
    for sequence in filled:
        empty = [nothing] * (most - len(sequence))
        sequence[:] = empty + sequence if left else sequence + empty
    return (
        torch.stack([torch.stack([vector for vector, _, _ in line]) for line in filled]),
        torch.tensor([[aim for _, aim, _ in line] for line in filled], device=table.device),
        torch.tensor([[real for _, _, real in line] for line in filled], device=table.device),
    )


class Table(nn.Module):
    """An embedding that refuses ids which it does not know."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < len(self.weight))
        if not bool(known.all()):
            raise AssertionError(
                f"the table has no row for {ids[~known].tolist()}: the placeholder?"
            )
        return self.weight[ids]


def compare_spliced(
    embed: Table, rows: list, labels: list, images: list, placeholder: int, left: bool = False
) -> None:
    given = {f"row {i}": row for i, row in enumerate(rows)}
    given |= {f"labels {i}": row for i, row in enumerate(labels)}
    given |= {f"image {i}": image for i, image in enumerate(images)}
    lists = list(rows), list(labels), list(images)
    with checks.kept(embed, **given):
        result = splice_image_tokens(embed, *lists, placeholder, left)
    assert [len(kept) for kept in lists] == [len(rows), len(labels), len(images)], (
        "rows, labels or images is no longer as long as it was: what is given is not changed"
    )
    inputs, targets, mask = checks.parts(result, "inputs", "labels", "mask")
    due = splice_by_definition(embed.weight.detach(), rows, labels, images, placeholder, left)
    checks.close(mask, due[2], what="the mask")
    checks.close(targets, due[1], what="the labels", hint="They are spliced as the inputs are")
    assert targets.dtype == torch.int64, f"labels are int64; yours are {targets.dtype}"
    checks.close(inputs, due[0].to(inputs), what="the inputs", rtol=0)
    assert inputs.dtype == embed.weight.dtype, f"inputs are {inputs.dtype}: see the docstring"


# %% check="splice_image_tokens" points=2
# Words are vectors (0, id); −1 is the placeholder. The second row is text alone.
embed = Table(torch.stack([torch.zeros(6), torch.arange(6.0)], dim=1).to(profile.device))
rows = [torch.tensor(ids, device=profile.device) for ids in ([5, -1, 2, 3], [4, 1])]
labels = [torch.tensor(ids, device=profile.device) for ids in ([IGNORE, 7, 2, 3], [IGNORE, 1])]
image = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], device=profile.device)
inputs, targets, mask = checks.parts(
    splice_image_tokens(embed, rows, labels, [image], -1), "inputs", "labels", "mask"
)
checks.close(
    inputs[0],
    torch.tensor([[0.0, 5.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [0.0, 2.0], [0.0, 3.0]]),
    what="5 <image> 2 3 with an image of three vectors",
)
checks.close(
    targets,
    torch.tensor([[IGNORE] * 4 + [2, 3], [IGNORE, 1] + [IGNORE] * 4]),
    what="the labels",
    hint="An image's vectors are no targets, whatever label the placeholder had",
)
compare_spliced(embed, rows, labels, [image], -1)
### BEGIN HIDDEN TESTS
g = checks.generator(20)
for placeholder, left, dtype in [
    (-200, False, torch.float32),
    (3, True, torch.float64),
    (7, False, torch.bfloat16),
]:
    vectors = finest(9, 4, dtype=dtype, g=g)
    vectors[1] = 0  # a word whose vector is zero is no padding
    embed = Table(vectors)
    rows, labels, images = [], [], []
    for holds, length in [(1, 5), (0, 3), (3, 7), (2, 2), (1, 1), (0, 0)]:
        ids = torch.randint(0, 9, (length,), generator=g)
        ids[ids == placeholder] = 8
        ids[torch.randperm(length, generator=g)[:holds]] = placeholder
        rows.append(ids.to(profile.device))
        labels.append(finest(length, dtype=torch.int64, g=g))
        for _ in range(holds):
            tokens = int(torch.randint(0, 5, (1,), generator=g))
            images.append(finest(tokens, 4, dtype=dtype, g=g))
            images[-1][:1] = 0
    rows[2][:] = torch.tensor([placeholder, 1, placeholder, placeholder, 2, 2, 1])  # two in a row
    images[2] = images[2][:0]  # an image without vectors
    compare_spliced(embed, rows, labels, images, placeholder, left)
    compare_spliced(embed, rows[1:2], labels[1:2], [], placeholder, left)
    for wrong in (images[:-1], [*images, images[0]], []):
        checks.raises(
            ValueError,
            splice_image_tokens,
            embed,
            rows,
            labels,
            wrong,
            placeholder,
            because=f"7 placeholders, {len(wrong)} images",
        )
### END HIDDEN TESTS

# %% check="splice_image_tokens" points=1
g = checks.generator(21)
embed = Table(checks.randn(5, 3, generator=g))
rows = [torch.tensor(ids, device=profile.device) for ids in ([0, -1, 2, 2], [-1, 4])]
labels = [torch.full_like(row, IGNORE) for row in rows]
images = [checks.randn(2, 3, generator=g), checks.randn(4, 3, generator=g)]
leaves = [image.clone().requires_grad_() for image in images]
inputs, _, _ = splice_image_tokens(embed, rows, labels, leaves, -1)
assert inputs.requires_grad, "the inputs carry no gradient: an encoder and a projector want one"
cotangent = checks.randn(2, 5, 3, generator=g)
inputs.backward(cotangent)
checks.close(leaves[0].grad, cotangent[0, 1:3], what="the gradient of the first image")
### BEGIN HIDDEN TESTS
checks.close(leaves[1].grad, cotangent[1, :4], what="the gradient of the second image")
due = torch.zeros_like(cotangent[0])
due[0], due[2], due[4] = cotangent[0, 0], cotangent[0, 3] + cotangent[0, 4], cotangent[1, 4]
checks.close(embed.weight.grad, due, what="the gradient of the embedding", rtol=1e-5)
embed = Table(checks.randn(5, 3, generator=g))


def words_alone(ids: Tensor) -> Tensor:
    assert not ids.eq(0).any(), "embed was given the placeholder, 0 here"
    return embed(ids)


row = torch.tensor([3, 0, 2], device=profile.device)
inputs, _, _ = splice_image_tokens(words_alone, [row], [row], images[:1], 0)
checks.close(inputs[0, 1:3].detach(), images[0], what="an image whose placeholder has the id 0")
# Law: padding on the left is padding on the right, moved.
right = splice_image_tokens(embed, rows, labels, images, -1)
moved = splice_image_tokens(embed, rows, labels, images, -1, left=True)
for a, b, name in zip(right, moved, ("inputs", "labels", "mask"), strict=True):
    for row, mask in ((0, right[2][0]), (1, right[2][1])):
        checks.close(
            b[row][moved[2][row]].detach(), a[row][mask].detach(), what=f"real {name}, padded left"
        )
### END HIDDEN TESTS

# %% [markdown]
# ## Experiment: a language model that sees {#experiment}
#
# The course's `tiny` has read Python's documentation and sources. It has never seen an image, and
# it was never asked a question. LLaVA teaches such a model in two stages:
#
# 1. Encoder and language model are frozen; **only the projector learns**, from captions.
# 2. The language model learns along, from questions with answers.
#
# Each digit becomes four vectors: 16 patches, merged 2 × 2, through your projector.
#
# **Question.** What does pretraining of the encoder buy? Three sources of patch vectors go through
# stage 1: raw pixels, four to a patch; a vision transformer as it starts, *untrained*; CLIP's, from
# above, frozen. Two of them, pixels and CLIP, then go through stage 2. All see the same images and
# captions in the same order.
#
# A control: the same questions with the vectors of *another* image. A model that answers them as
# well has not looked.
#
# Write down: will a frozen language model read digits at all? In which order do the three sources
# come out of stage 1? And how far are pixels behind CLIP after stage 2?

# %% tags=["experiment"]
PLACEHOLDER = -1
_, TOKENIZER = models.load("tiny")
NEWLINE = TOKENIZER.encode("\n")[0]
PROMPTS = {
    "caption": ("\nThis is", lambda d, b: f" a {WORDS[1 + b]} {WORDS[3 + d]}"),
    "digit": ("\ndigit:", lambda d, b: f" {WORDS[3 + d]}"),
    "ink": ("\nink:", lambda d, b: f" {WORDS[1 + b]}"),
    "even": ("\neven:", lambda d, b: f" {d % 2 == 0}"),
}


def example(name: str, digit: int, weight: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of: <|endoftext|> <image> prompt answer newline."""
    prompt, answer = PROMPTS[name]
    asked = [TOKENIZER.eos, PLACEHOLDER, *TOKENIZER.encode(prompt)]
    said = [*TOKENIZER.encode(answer(digit, weight)), NEWLINE]
    ids = torch.tensor(asked + said, device=profile.device)
    return ids, torch.tensor([IGNORE] * len(asked) + said, device=profile.device)


EXAMPLES = {
    (name, d, b): example(name, d, b) for name in PROMPTS for d in range(10) for b in range(2)
}


def last_states(model: models.Llama, inputs: Tensor, cache: models.Cache | None = None) -> Tensor:
    """What the head of the language model sees, from vectors instead of ids."""
    return model.norm(through(model.layers, inputs, model.config, cache))


@torch.no_grad()
def patch_vectors(source: str, seed: int) -> Tensor:
    """16 vectors for each of the 1,797 images."""
    if source == "pixels":
        return patchify(IMAGES, 2)
    if source == "CLIP":
        return trained["CLIP"][0].vision(IMAGES)[1]
    torch.manual_seed(seed + 100)
    return VisionTransformer(8, 2, 1, 48, 2, 4, std=0.5).to(profile.device)(IMAGES)[1]


def tune_to_see(
    model: models.Llama,
    projector: Projector,
    vectors: Tensor,
    names: list[str],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Trains the projector, and what of the model requires gradients, to answer about images."""
    learned = [p for p in (*projector.parameters(), *model.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0, fused=True)
    g = torch.Generator().manual_seed(seed)
    shown, digits, bold = (~HELD).nonzero()[:, 0].cpu(), DIGITS.tolist(), BOLD.tolist()
    for step in range(steps):
        rows = shown[torch.randint(len(shown), (12,), generator=g)].tolist()
        asked = torch.randint(len(names), (12,), generator=g).tolist()
        texts = [EXAMPLES[names[q], digits[i], bold[i]] for q, i in zip(asked, rows, strict=True)]
        ids, labels = zip(*texts, strict=True)
        words = list(projector(vectors[rows]))
        inputs, labels, _ = splice_image_tokens(model.embed_tokens, ids, labels, words, PLACEHOLDER)
        # Padding stands on the right, where causal attention does not see it: no mask is needed.
        counts = labels[:, 1:] != IGNORE
        states = last_states(model, inputs)[:, :-1][counts]
        answer_loss = F.cross_entropy(states @ model.embed_tokens.weight.T, labels[:, 1:][counts])
        rate = lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        answer_loss.backward()
        nn.utils.clip_grad_norm_(learned, 0.3)
        optimizer.step()


@torch.no_grad()
def answers(model: models.Llama, projector: Projector, vectors: Tensor, name: str) -> list[str]:
    """What the model writes about each image, greedily, up to the end of the line."""
    prompt = [TOKENIZER.eos, PLACEHOLDER, *TOKENIZER.encode(PROMPTS[name][0])]
    ids = [torch.tensor(prompt, device=profile.device)] * len(vectors)
    words = list(projector(vectors))
    new, _, _ = splice_image_tokens(model.embed_tokens, ids, ids, words, PLACEHOLDER)
    cache, written = models.Cache(), []
    for _ in range(6):
        states = last_states(model, new, cache)[:, -1]
        written.append((states @ model.embed_tokens.weight.T).argmax(-1))
        if torch.stack(written).eq(NEWLINE).any(0).all():
            break
        new = model.embed_tokens(written[-1])[:, None]
    texts = [TOKENIZER.decode(row) for row in torch.stack(written, 1).tolist()]
    return [text.partition("\n")[0] for text in texts]


def exact(model: models.Llama, projector: Projector, vectors: Tensor, name: str) -> float:
    """The share of 240 held-out images about which the model writes the right answer, exactly."""
    right, shown = PROMPTS[name][1], HELD.nonzero()[:240, 0]
    said = answers(model, projector, vectors[shown], name)
    truth = zip(said, DIGITS[shown].tolist(), BOLD[shown].tolist(), strict=True)
    return sum(text == right(d, b) for text, d, b in truth) / len(said)


def two_stages(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, tuple]]:
    """Exact matches of each run by prompt, and (model, projector, vectors) of each run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found, made = {}, {}
    for source in ("pixels", "untrained", "CLIP"):
        vectors = patch_vectors(source, seed)
        model = models.load("tiny")[0].requires_grad_(False)
        torch.manual_seed(seed)
        projector = Projector(vectors.shape[-1], model.config.hidden_size, (4, 4), 2)
        projector = projector.to(profile.device)
        with torch.no_grad():  # it starts with vectors that are small beside those of words
            projector.second.weight.mul_(0.1)
            projector.second.bias.mul_(0.1)
        tune_to_see(model, projector, vectors, ["caption"], steps=250, lr=1e-2, seed=seed)
        found[f"1: {source}"] = {"caption": exact(model, projector, vectors, "caption")}
        if source == "untrained":
            continue
        model.requires_grad_(True)
        tune_to_see(model, projector, vectors, list(PROMPTS), steps=120, lr=2e-3, seed=seed + 50)
        made[source] = model, projector, vectors
        found[f"2: {source}"] = {name: exact(*made[source], name) for name in PROMPTS}
    model, projector, vectors = made["CLIP"]
    other = vectors.clone()
    other[HELD] = other[HELD].roll(7, 0)
    found["2: CLIP, other image"] = {n: exact(model, projector, other, n) for n in PROMPTS}
    torch.set_num_threads(threads)
    return found, made


outcome, seeing = two_stages(0)
outcome = dict(sorted(outcome.items(), key=lambda item: item[0][0]))  # by stage
print(f"{'stage':22}" + "".join(f"{name:>15}" for name in PROMPTS))
for run, found in outcome.items():
    print(f"{run:22}" + "".join(f"{share:15.0%}" for share in found.values()))
print(f"{'chance':22}" + "".join(f"{share:15.0%}" for share in (0.05, 0.1, 0.5, 0.5)))

# %% tags=["experiment", "figure"]
# Figure: five runs, and what the model says about images that it never saw
model, projector, vectors = seeing["CLIP"]
fig = plot.plt.figure(figsize=(11, 3.9))
left, right = fig.subfigures(1, 2, width_ratios=(1, 1.25))
ax = left.subplots()
names = list(outcome)
marks = dict(zip(PROMPTS, "osD^", strict=True))
for y, run in enumerate(names):
    for k, (prompt, mark) in enumerate(marks.items()):
        if prompt in outcome[run]:
            ax.plot(
                100 * outcome[run][prompt],
                y,
                mark,
                color=plot.COLORS[k],
                markersize=8,
                markerfacecolor="white" if k else plot.COLORS[0],
                label=prompt if run.startswith("2: CLIP, other") else None,
            )
ax.set_yticks(range(len(names)), names)
ax.invert_yaxis()
ax.set(xlabel="held-out images answered word for word (%)", xlim=(0, 100))
ax.set_title("Stage 1, stage 2")
ax.legend(loc="upper right", fontsize=8)
axes = right.subplots(2, 5)
shown = HELD.nonzero()[:, 0][10::35][:10]
said = {name: answers(model, projector, vectors[shown], name) for name in PROMPTS}
for k, ax in enumerate(axes.flat):
    i = int(shown[k])
    ax.imshow(plot.array(IMAGES[i, 0]), cmap="Greys")
    truth = PROMPTS["caption"][1](int(DIGITS[i]), int(BOLD[i]))
    good = said["caption"][k] == truth
    ax.set_title(said["caption"][k].strip(), fontsize=9, fontweight="normal" if good else "bold")
    ax.set_xlabel(f"{said['even'][k].strip()}", fontsize=8)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
plot.caption(
    fig,
    "Left: filled circles are captions; with the vectors of another image everything falls to "
    "chance. Right: captions (above) and answers to “even:” (below) for ten held-out images, from "
    "stage 2 with CLIP. Captions in bold are wrong. The two answers need not agree: each is read "
    "off the image anew.",
)
plot.plt.show()

# %% [markdown]
# **What came out.** (What is said here held for each of five seeds.) A language model that never
# saw an image captions digits through a projector alone: its weights were good enough, what it
# lacked was an input. The order of the sources in stage 1 is the one that LLaVA bets on. Through
# raw pixels it learns little, since the projector sees one square at a time, and no layer of the
# language model was made to put squares together. An encoder that was never trained is better: its
# attention mixes patches at random, and random features of a whole image can be read off. CLIP's
# are ahead of both.
#
# In stage 2 most of that lead goes. Once the language model may learn, it becomes a vision encoder
# itself (Fuyu-8B was built this way, without any other), and in naming the digit neither source
# wins for every seed. Captions, and above all thin or bold, which CLIP's captions taught, stay
# better through CLIP. That pixels come so close has to do with how little there is to see in 64 of
# them: a photograph has thousands of patches, and too few captions teach a language model to see.
#
# With another image's vectors all answers fall to chance, so the model does look.

# %% [markdown]
# ## Positions in three directions {#mrope}
#
# RoPE (lesson 08) turns pair $i$ of a query or key by the angle $m\,\theta^{-2i/d}$, where $m$ is
# the token's position: one number. In a row of 24 patches the patch below is 24 steps away, and how
# far that is depends on the image's width. **Multimodal RoPE** gives every token three numbers,
# time, height and width, and each pair of dimensions is turned by one of the three.
#
# **Which numbers?** A text token has the same number three times. A patch at frame $t$, row $h$ and
# column $w$ of an image that starts at $s$ has $(s+t,\ s+h,\ s+w)$. After it, numbering goes on at
# the **largest number so far, plus one**:
#
# ```
#            text    image of 1 × 2 × 3       text
#  time      0  1    2  2  2  2  2  2         5  6
#  height    0  1    2  2  2  3  3  3         5  6
#  width     0  1    2  3  4  2  3  4         5  6
# ```
#
# Six patches took three positions, so a long context is used up more slowly. A text alone has
# $m_t=m_h=m_w$, and every pair is turned as RoPE would turn it: a language model that was trained
# with RoPE goes on unchanged.
#
# This is the paper's rule. `transformers` 5.23 continues at $s$ plus the larger of the numbers of
# rows and columns, after merging (5.2 did not), which is the same for an image. For a video of more
# frames than rows and columns it is not: text after it then repeats times that the video has used.


# %% exercise="mrope_position_ids" minutes=20 difficulty=2 path="more"
def mrope_position_ids(segments: Sequence[int | tuple[int, int, int]]) -> Tensor:
    """Time, height and width of every token of a sequence, (3, tokens) int64.

    segments: in order, a number of text tokens (0 or more), or the grid (frames, rows, columns) of
    an image or video, each 1 or more, whose tokens come frame by frame, row by row. Text counts up,
    alike on all three axes. A grid that starts at s has s + frame, s + row, s + column. Whatever
    follows starts at the largest number of what came before, plus one; the first segment at 0.
    Without tokens the result is (3, 0). ValueError for a negative number of text tokens, or a grid
    with a number below 1.
    """
    ### BEGIN SOLUTION
    pieces, start = [torch.zeros(3, 0, dtype=torch.int64)], 0
    for segment in segments:
        if isinstance(segment, int):
            if segment < 0:
                raise ValueError(f"there cannot be {segment} text tokens")
            piece = torch.arange(segment).expand(3, -1)
        else:
            if min(segment) < 1:
                raise ValueError(f"a grid of {segment} holds no tokens")
            piece = torch.cartesian_prod(*(torch.arange(count) for count in segment)).T
        pieces.append(start + piece)
        if piece.numel():
            start = int(pieces[-1].max()) + 1
    return torch.cat(pieces, dim=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: all places of a grid</summary>
#
# `torch.cartesian_prod` lists them with the last axis fastest, which is the order of the tokens;
# so do `torch.meshgrid(…, indexing="ij")` with `flatten`, or three loops.
# </details>

# %% check="mrope_position_ids" points=2
checks.close(
    mrope_position_ids([2, (1, 2, 3), 2]),
    torch.tensor(
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
        ]
    ),
    what="two words, an image of 2 × 3, two words",
    mistakes={
        "counting on from the number of tokens": torch.tensor(
            [
                [0, 1, 2, 2, 2, 2, 2, 2, 8, 9],
                [0, 1, 2, 2, 2, 3, 3, 3, 8, 9],
                [0, 1, 2, 3, 4, 2, 3, 4, 8, 9],
            ]
        ),
        "going on at the image's largest number, without one more": torch.tensor(
            [
                [0, 1, 2, 2, 2, 2, 2, 2, 4, 5],
                [0, 1, 2, 2, 2, 3, 3, 3, 4, 5],
                [0, 1, 2, 3, 4, 2, 3, 4, 4, 5],
            ]
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(22)


def ids_by_definition(segments: list, rule: str = "paper") -> Tensor:
    columns, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            columns += [(start + i,) * 3 for i in range(segment)]
            start += segment
            continue
        frames, rows, width = segment
        columns += [
            (start + t, start + h, start + w)
            for t in range(frames)
            for h in range(rows)
            for w in range(width)
        ]
        start += max(rows, width) if rule == "transformers" else max(segment)
        start += frames * rows * width - max(segment) if rule == "tokens" else 0
    return torch.tensor(columns, dtype=torch.int64).view(-1, 3).T


drawn = torch.randint(1, 6, (5, 9), generator=g).tolist()
for segments in [
    [(1, 4, 2), 3],
    [(1, 1, 1)],
    [5],
    [0, (1, 2, 2), 0, 1],
    [(2, 1, 1), (1, 1, 3), (1, 3, 1), 2],
    [3, (6, 1, 1), 2],
    [1, (4, 2, 3), 1, (5, 2, 2), 4],
    *([a, (b, c, d), e, (1, f, h), (i, 1, 2)] for a, b, c, d, e, f, h, i, _ in drawn),
]:
    checks.close(
        mrope_position_ids(segments),
        ids_by_definition(segments),
        what=f"the positions of {segments}",
        mistakes={
            "going on at the start plus the larger of rows and columns": ids_by_definition(
                segments, "transformers"
            ),
            "counting on from the number of tokens": ids_by_definition(segments, "tokens"),
        },
    )
for nothing in ([], [0], [0, 0]):
    found = mrope_position_ids(nothing)
    checks.close(found, torch.zeros(3, 0, dtype=torch.int64), what=f"the positions of {nothing}")
    assert found.dtype == torch.int64, f"positions are int64; yours are {found.dtype}"
for wrong in ([3, -1], [(1, 0, 2)], [(0, 2, 2)], [1, (2, 2, 0)], [(1, -1, -1)]):
    checks.raises(ValueError, mrope_position_ids, wrong, because=f"{wrong} makes no sense")
### END HIDDEN TESTS

# %% [markdown]
# **Which pair gets which number?** The pairs differ in speed: pair 0 turns by a radian per step,
# the last of 64 by about a millionth (θ = 1,000,000). Qwen2-VL cuts them in **blocks**: the first
# 16 are for time, the next 24 for height, the last 24 for width. Then only time has the fast pairs,
# and width has the slowest: most of them hardly move within an image. Qwen3-VL **interleaves**
# them: time, height, width, time, height, width, …, so that each axis has fast and slow pairs
# alike; of 64 pairs 24, 20 and 20, with the last four for time.
#
# | | pair 0 | 1 | 2 | 3 | … | 16 | … | 40 | … | 63 |
# |---|---|---|---|---|---|---|---|---|---|---|
# | blocks (16, 24, 24) | t | t | t | t | | h | | w | | w |
# | interleaved (24, 20, 20) | t | h | w | t | | h | | h | | t |


# %% exercise="apply_mrope" minutes=20 difficulty=2 path="more"
def apply_mrope(
    x: Tensor,
    positions: Tensor,
    sections: tuple[int, int, int],
    interleaved: bool = False,
    theta: float = 10_000.0,
) -> Tensor:
    """Queries or keys, turned by their positions on three axes.

    x: (batch, heads, seq, head_dim), floating, head_dim even; positions: (3, batch, seq), whole or
    fractional: time, height, width. Pair i is (x[i], x[i + head_dim/2]), and becomes
        (x[i] cos a − x[i + head_dim/2] sin a,  x[i + head_dim/2] cos a + x[i] sin a)
    with a = m · theta^(−2i/head_dim), m its position on the axis of the pair.

    sections: how many pairs time, height and width have, 0 or more each; ValueError unless they add
    up to head_dim/2. In blocks, the first pairs are time's, the next height's, the last width's.
    Interleaved, height has the pairs 1, 4, 7, …, as many as its section says, width 2, 5, 8, …, and
    time all that are left; ValueError if one of those pairs is beyond the last.

    Angles are computed in float32 for half-precision x and float32, in float64 for float64. Returns
    x's shape and dtype, rounded once at the end. Nothing is changed.
    """
    ### BEGIN SOLUTION
    half = x.shape[-1] // 2
    if sum(sections) != half:
        raise ValueError(f"sections {sections} share out {sum(sections)} pairs; there are {half}")
    if interleaved:
        axis = torch.zeros(half, dtype=torch.int64)
        for which in (1, 2):
            pairs = which + 3 * torch.arange(sections[which])
            if len(pairs) and pairs[-1] >= half:
                raise ValueError(f"sections {sections} reach pair {int(pairs[-1])} of {half}")
            axis[pairs] = which
    else:
        axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    full = torch.promote_types(x.dtype, torch.float32)
    speed = theta ** (-2 * torch.arange(half, dtype=full, device=x.device) / x.shape[-1])
    own = positions.to(full)[axis.to(x.device)]  # (pairs, batch, seq)
    angle = own.permute(1, 2, 0)[:, None] * speed  # (batch, 1, seq, pairs)
    first, second = x.to(full).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: one axis for each pair</summary>
#
# Make a list of head_dim/2 numbers, each 0, 1 or 2. `positions[list]` then has the positions that
# each pair turns by, with the pairs as its first axis.
# </details>
#
# <details><summary>Hint: which pairs are time's</summary>
#
# Start with a list of zeros, and write the ones and twos into it.
# </details>

# %% tags=["support"]
# Support: turning pairs as complex numbers, in float64


def axes_by_definition(sections: tuple[int, int, int], interleaved: bool) -> list[int]:
    if not interleaved:
        return [0] * sections[0] + [1] * sections[1] + [2] * sections[2]
    left = {1: sections[1], 2: sections[2]}
    axes = []
    for pair in range(sum(sections)):
        which = pair % 3
        if which and left[which]:
            left[which] -= 1
            axes.append(which)
        else:
            axes.append(0)
    return axes


def turned_by_definition(
    x: Tensor, positions: Tensor, axes: list[int], theta: float = 10_000.0
) -> Tensor:
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    columns = []
    for i, which in enumerate(axes):
        angle = positions[which].double() * theta ** (-2 * i / x.shape[-1])
        columns.append(pairs[..., i] * torch.exp(1j * angle)[:, None])
    turned = torch.stack(columns, dim=-1)
    return torch.cat([turned.real, turned.imag], dim=-1)


def grid_positions(batch: int, seq: int, g: torch.Generator) -> Tensor:
    """Random positions, another one on each axis and in each row."""
    return torch.randint(0, 40, (3, batch, seq), generator=g).to(profile.device)


# %% check="apply_mrope" points=2
# Head dimension 4: pair 0 turns by a radian per step, pair 1 by a hundredth.
x = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]], device=profile.device)
positions = torch.tensor([[[2.0]], [[50.0]], [[70.0]]], device=profile.device)
angles = torch.tensor([2.0, 0.7])
checks.close(
    apply_mrope(x, positions, (1, 0, 1)),
    torch.cat([angles.cos(), angles.sin()]).view(1, 1, 1, 4),
    what="one token, pair 0 for time and pair 1 for width",
    mistakes={
        "pairs of neighbors": torch.stack([angles.cos(), angles.sin()], 1).view(1, 1, 1, 4),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(23)
for batch, heads, seq, sections, theta in [
    (2, 3, 5, (2, 3, 3), 10_000.0),
    (1, 1, 7, (1, 1, 2), 500.0),
    (3, 2, 1, (4, 0, 0), 1_000_000.0),
    (2, 2, 4, (0, 1, 5), 10_000.0),
    (2, 1, 3, (16, 24, 24), 10_000.0),
]:
    x = checks.randn(batch, seq, heads, 2 * sum(sections), generator=g).transpose(1, 2)
    positions = grid_positions(batch, seq, g)
    axes = axes_by_definition(sections, False)
    expected = turned_by_definition(x, positions, axes, theta)
    turned = turned_by_definition(x, positions, [(a + 1) % 3 for a in axes], theta)
    with checks.unchanged(x=x, positions=positions):
        found = apply_mrope(x, positions, sections, theta=theta)
    checks.close(
        found,
        expected.float(),
        what=f"x turned in blocks {sections}, theta {theta:g}",
        rtol=1e-4,
        dtype=torch.float32,
        mistakes={"another order of the axes": turned.float()},
    )
    checks.keeps_dtype(
        lambda x, positions=positions, s=sections, t=theta: apply_mrope(x, positions, s, theta=t),
        x,
        reference=lambda x, p=positions, a=axes, t=theta: turned_by_definition(x, p, a, t),
        rtol={torch.float32: 1e-4, torch.bfloat16: 8e-3},
        what="x turned",
    )
x = checks.randn(2, 2, 6, 16, generator=g)
positions = grid_positions(2, 6, g)
axes = axes_by_definition((2, 3, 3), False)
for dtype, ulp in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
    half = x.to(dtype)
    checks.close(
        apply_mrope(half, positions, (2, 3, 3)).double(),
        turned_by_definition(half, positions, axes),
        what=f"{dtype} turned",
        rtol=1.1 * ulp,
        atol=2e-5,
        hint="Angles, cosines and products in float32, and rounded once, at the end",
    )
checks.gradients(
    lambda x: apply_mrope(x, positions, (2, 3, 3)),
    lambda x: turned_by_definition(x, positions, axes_by_definition((2, 3, 3), False)),
    x,
    names=("x",),
    rtol=1e-4,
)
parts = positions + 0.25  # fractional positions, as a video's seconds may be
checks.close(
    apply_mrope(x.double(), parts.double(), (2, 3, 3)),
    turned_by_definition(x, parts, axes),
    what="fractional positions",
)
# Law: text alone is turned as by RoPE with one axis; products depend on distances alone.
text = torch.arange(6, device=x.device).expand(3, 2, 6)
checks.close(
    apply_mrope(x, text, (2, 3, 3)),
    apply_mrope(x, text, (8, 0, 0)),
    what="text alone, against RoPE with one axis",
)
x, k = x.double(), checks.randn(2, 2, 6, 16, generator=g).double()
moved = positions + torch.tensor([5, 11, 2], device=x.device)[:, None, None]
products = [
    apply_mrope(x, p, (2, 3, 3)) @ apply_mrope(k, p, (2, 3, 3)).mT for p in (positions, moved)
]
checks.close(products[1], products[0], what="products after a move of all tokens", rtol=1e-7)
for sections in ((2, 3, 2), (8, 1, 0)):
    for interleaved in (False, True):
        checks.raises(
            ValueError,
            apply_mrope,
            x,
            positions,
            sections,
            interleaved,
            because=f"{sections} are not 8 pairs",
        )
### END HIDDEN TESTS

# %% check="apply_mrope" points=1
x = torch.ones(1, 1, 1, 8, device=profile.device)
positions = torch.tensor([[[3.0]], [[20.0]], [[40.0]]], device=profile.device)
checks.close(
    apply_mrope(x, positions, (2, 1, 1), interleaved=True),
    turned_by_definition(x, positions, [0, 1, 2, 0]).float(),
    what="four pairs for time, height, width and time again",
    mistakes={"blocks": turned_by_definition(x, positions, [0, 0, 1, 2]).float()},
)
### BEGIN HIDDEN TESTS
g = checks.generator(24)
for batch, heads, seq, sections, theta in [
    (2, 2, 5, (24, 20, 20), 5_000_000.0),
    (1, 3, 4, (4, 2, 2), 10_000.0),
    (2, 1, 6, (3, 1, 2), 10_000.0),
    (3, 2, 2, (5, 2, 0), 700.0),
    (2, 2, 3, (2, 2, 2), 10_000.0),
    (1, 2, 3, (2, 2, 1), 10_000.0),
]:
    x = checks.randn(batch, heads, seq, 2 * sum(sections), generator=g)
    positions = grid_positions(batch, seq, g)
    axes = axes_by_definition(sections, True)
    blocks = turned_by_definition(x, positions, axes_by_definition(sections, False), theta)
    checks.close(
        apply_mrope(x, positions, sections, interleaved=True, theta=theta),
        turned_by_definition(x, positions, axes, theta).float(),
        what=f"x turned, interleaved {sections}",
        rtol=1e-4,
        mistakes={"blocks": blocks.float()},
    )
x = torch.ones(1, 1, 1, 8, device=profile.device, dtype=torch.bfloat16)
positions = torch.tensor([[[1001.0]], [[515.0]], [[259.0]]], device=profile.device)
for interleaved in (False, True):
    checks.close(
        apply_mrope(x, positions, (2, 1, 1), interleaved).float(),
        turned_by_definition(x, positions, axes_by_definition((2, 1, 1), interleaved)).float(),
        what=f"x in bfloat16 at positions that bfloat16 has not, interleaved: {interleaved}",
        rtol=1e-2,
    )
for sections in ((0, 2, 2), (1, 0, 3), (16, 24, 24)):
    x = torch.zeros(1, 1, 2, 2 * sum(sections), device=profile.device)
    checks.raises(
        ValueError,
        apply_mrope,
        x,
        torch.zeros(3, 1, 2, device=x.device),
        sections,
        interleaved=True,
        because=f"{sections} reach beyond the last pair",
    )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: the three positions of a sequence, and which pairs turn by which
fig, (left, right) = plot.plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.25, 1))
ids = plot.array(mrope_position_ids([6, (1, 4, 6), 5, (4, 2, 3), 6]))
for row, (name, style) in enumerate(
    zip(("time", "height", "width"), ("-", "--", ":"), strict=True)
):
    left.step(range(ids.shape[1]), ids[row], where="mid", linestyle=style, label=name)
for start, end, name in ((6, 30, "image 1 × 4 × 6"), (35, 59, "video 4 × 2 × 3")):
    left.axvspan(start - 0.5, end - 0.5, color="#eeeeee", zorder=0)
    left.text((start + end - 1) / 2, 0.4, name, ha="center", fontsize=8)
left.set(xlabel="token", ylabel="position")
left.set_title("Six words, an image, five words, a video, six words")
left.legend(loc="upper left")
# A pair's axis is found by turning one token that stands on that axis alone.
head_dim, colors = 128, plot.COLORS[:3]
for y, (sections, interleaved) in enumerate((((16, 24, 24), False), ((24, 20, 20), True))):
    for axis in range(3):
        alone = torch.zeros(3, 1, 1, dtype=torch.float64)
        alone[axis] = 1.0
        ones = torch.ones(1, 1, 1, head_dim, dtype=torch.float64)
        turned = apply_mrope(ones, alone, sections, interleaved, theta=1_000_000.0)
        pairs = (turned[0, 0, 0, : head_dim // 2] != 1).nonzero()[:, 0]
        lengths = 2 * math.pi * 1_000_000.0 ** (2 * pairs / head_dim)
        right.plot(plot.array(lengths), [4 * y + axis] * len(pairs), "|", color=colors[axis], ms=11)
right.axvspan(1, 2 * 24, color="#eeeeee", zorder=0)
right.set_yticks(
    [0, 1, 2, 4, 5, 6], [f"{kind} {n}" for kind in ("blocks:", "interl.:") for n in ("t", "h", "w")]
)
right.invert_yaxis()
right.set(xscale="log", xlabel="steps for a full turn of the pair")
right.set_title("64 pairs and their speeds")
plot.caption(
    fig,
    "Left: words climb on all three lines at once; in the grey grids the lines part, and the words "
    "after them go on one above the highest. Right: a stroke is a pair. Those in the grey band go "
    "round at least once in 48 steps, twice the side of an image of 24 × 24 merged tokens. In "
    "blocks time has all of them; interleaved, each axis has its share. (θ = 1,000,000.)",
)
plot.plt.show()

# %% [markdown]
# Qwen2.5-VL counts time in steps of real time instead of frames, so that a speed of two frames per
# second and one of eight mean the same; Qwen3-VL writes timestamps as text between the frames and
# leaves each frame an image. Huang and others compare such designs. The vision encoders have
# positions of their own, in two dimensions, learned or rotary.

# %% [markdown]
# ## Key questions
#
# Asked in interviews, and worth a minute of thought each. Those with a number or a choice are
# graded, one by one.


# %% exercise="questions" minutes=12 difficulty=2 kind="questions"
def questions() -> dict[str, float | int]:
    """Short answers; numbers to 1 percent, whole numbers exact.

    "tokens":  ViT-L/14 at 336 × 336 pixels, with a class token and four registers: tokens in its
               blocks.
    "scale":   n = 32,768. The cosine of each image with its own text is 1, with all others 0. Which
               factor on the cosines makes the loss of CLIP 0.01 nats?
    "stuck":   a model that clamps inside the loss, min(exp(logit_scale), 100), and has
               logit_scale = 5: the gradient of logit_scale.
    "start":   SigLIP at its start, n = 1,000 pairs, all cosines 0, factor 10, bias −10: the loss in
               nats.
    "ratio":   the same with bias 0: how many times as large is the sum of the pushes (derivatives
               by the logits) of all negatives of an image as the pull of its positive?
    "next":    7 words, an image of 24 × 40 patches merged 2 × 2, then text, by the rule of the
               paper on multimodal RoPE: the position of the first token of that text.
    """
    ### BEGIN SOLUTION
    return {
        "tokens": (336 // 14) ** 2 + 1 + 4,
        "scale": math.log(32767 / math.expm1(0.01)),
        "stuck": 0.0,
        "start": math.log1p(math.exp(10)) + 999 * math.log1p(math.exp(-10)),
        "ratio": 999.0,
        "next": 7 + 20,
    }
    ### END SOLUTION


# %% check="questions" points=1
answer = questions()["tokens"]
checks.kind(answer, int, what="tokens")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    581,
    to=0,
    what="tokens",
    hint="24 × 24 patches, and five more",
    mistakes={"patches alone": 576, "no registers": 577},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["scale"]
checks.kind(answer, float, what="scale")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    14.9974,
    to=0.01,
    what="scale",
    hint="log(1 + (n − 1) e^−x) = 0.01",
    mistakes={"its logarithm": 2.7079, "cosines of −1 for the others": 7.4987},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["stuck"]
checks.kind(answer, float, what="stuck")
### BEGIN HIDDEN TESTS
checks.number(answer, 0.0, atol=1e-9, what="stuck", hint="exp(5) is 148: the minimum is 100")
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["start"]
checks.kind(answer, float, what="start")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    10.0454,
    to=0.001,
    what="start",
    hint="One positive costs log(1 + e^10), and there are 999 negatives for each",
    mistakes={"the positives alone": 10.00005, "bias 0": 693.147},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["ratio"]
checks.kind(answer, float, what="ratio")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    999.0,
    to=1e-4,
    what="ratio",
    hint="At a logit of 0 every pair pushes or pulls by ½",
    mistakes={"counting the positive among the negatives": 1000.0},
)
### END HIDDEN TESTS

# %% check="questions" points=1
answer = questions()["next"]
checks.kind(answer, int, what="next")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    27,
    to=0,
    what="next",
    hint="The merged grid has 12 × 20 tokens",
    mistakes={"counting tokens": 247, "without merging": 47, "the last of the image": 26},
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Your vision–language model answers a benchmark well. How do you find out
# whether it looks at the images?

# %% [markdown] answer="blind"
# Ask without images, with black ones, and with those of other questions, as the experiment did:
# what remains is what the text gives away. Many benchmarks can be answered far above chance by a
# model that sees nothing, because questions suggest their answers ("What color is the banana?") or
# options are unbalanced. Then build pairs of images that differ in one respect and have different
# answers to the same question; count a pair only where both are right. Look at the attention and at
# gradients to the image tokens last: they show what was read, not what it was needed for.

# %% [markdown]
# **Open question 2.** A CLIP is trained on 256 devices with 128 pairs each. Which numbers does a
# device need of the others, how large is its largest matrix, and what changes with SigLIP?

# %% [markdown] answer="devices"
# All 32,768 normalized features of both kinds, gathered in the forward pass, and the sum of all
# devices' gradients for its own 128, backward. Its logits are two matrices of 128 × 32,768; the
# full one would be 256 times as large. With SigLIP the sum falls apart into blocks of 128 × 128: a
# device computes one with its own texts, passes its texts to the next device and takes those of the
# one before, 255 times. Features of two devices are in memory at a time, and the largest matrix is
# 128 × 128. The gradient of the texts travels along in the same ring, if each step records it.

# %% [markdown]
# **Open question 3.** In stage 1 a frozen language model read the vectors of a projector, though it
# had never seen such vectors. What do they have to be for that? And why is stage 1 usually kept, if
# stage 2 trains all of it anyway?

# %% [markdown] answer="stage-one"
# They need not be the embeddings of any words. It is enough that, behind the frozen layers, they
# move the next-token distribution to the right answer: they are a prompt that was found by gradient
# descent, another one for every image, and a frozen model can be steered by such prompts towards
# much that it can say at all. Stage 1 is kept because at the start the projector's output is noise.
# Training the language model on noise teaches it to ignore images, and damages what it knew before
# the projector has become useful; and stage 1 is cheap, for it has few parameters and needs
# captions only. With enough data stage 2 alone does as well: several models have skipped stage 1.

# %% [markdown]
# ## References, and what to read in them
#
# - **Dosovitskiy et al. 2020**, *An Image is Worth 16x16 Words: Transformers for Image Recognition
#   at Scale*, arXiv:2010.11929. Section 3.1 and appendix D.4, where 1-D and 2-D positions do alike.
# - **Radford et al. 2021**, *Learning Transferable Visual Models From Natural Language
#   Supervision*, arXiv:2103.00020. Sections 2.3 to 2.5 and figure 3, the loss in a dozen lines;
#   section 3.1.4 for templates and their ensembles.
# - **Zhai et al. 2023**, *Sigmoid Loss for Language Image Pre-Training*, arXiv:2303.15343.
#   Algorithm 1, section 3.3 on the ring of devices, and the ablation of the bias.
# - **Darcet et al. 2023**, *Vision Transformers Need Registers*, arXiv:2309.16588. Section 2 for
#   what the outliers hold, and figure 7.
# - **Jiang et al. 2025**, *Vision Transformers Don't Need Trained Registers*, arXiv:2506.08010. Few
#   neurons make the outliers; moved to a token that was never trained, they do no harm.
# - **Liu et al. 2023**, *Visual Instruction Tuning*, arXiv:2304.08485. Section 4: the two stages.
# - **Liu et al. 2023**, *Improved Baselines with Visual Instruction Tuning*, arXiv:2310.03744. The
#   projector with two layers, at 336 pixels.
# - **Alayrac et al. 2022**, *Flamingo: a Visual Language Model for Few-Shot Learning*,
#   arXiv:2204.14198. Section 2.1, the resampler: the road that most have left.
# - **Wang et al. 2024**, *Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at
#   Any Resolution*, arXiv:2409.12191. Section 2.1: any resolution, merging, multimodal RoPE.
# - **Bai et al. 2025**, *Qwen3-VL Technical Report*, arXiv:2511.21631. Section 2 for the
#   interleaved positions and for vectors of several encoder layers.
# - **Huang et al. 2025**, *Revisiting Multimodal Positional Encoding in Vision-Language Models*,
#   arXiv:2510.23095. Why each axis wants all speeds.
#
# In production: open_clip's `ClipLoss` (its options `local_loss` and `gather_with_grad` belong
# together; issue 616 has the arithmetic of gradients), `transformers`' `modeling_qwen2_vl.py`
# (`get_rope_index`, `PatchMerger`) and `modeling_qwen3_vl.py`; LLaVA's `llava_arch.py`, where its
# function `prepare_inputs_labels_for_multimodal` splices. Rotary positions are lesson 08,
# all-gathers lesson 19, the answers' labels lesson 21.
