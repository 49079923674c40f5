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
#       The Transformer of 2017, whole, translating dates into French, Chinese and Arabic; beam
#       search and BLEU; and the arithmetic that reads any model's parameters and FLOPs from its
#       config.
#     gpu: "Nothing more: every cell runs on a CPU; on a GPU the same cells run there."
# ---

# %% [markdown]
# ## The problem
#
# A new model is announced. Its card is a page of adjectives and a file of forty lines named
# `config.json`. Will it fit on your machine? What does one of its tokens cost, and what does a long
# context cost? Is it the model you know with other numbers, or something new?
#
# The forty lines answer all of that, because since 2017 the design has hardly moved. There is one
# block, attention and a feed-forward layer with residuals and norms around them, and a handful of
# decisions about it. This lesson first builds the original whole and trains it on the task it was
# made for, translation. Then it takes the decisions one at a time, and ends with two functions that
# read a config: one counts its parameters to the last digit, the other its arithmetic.
#
# ## The idea: who may look at whom
#
# The three **families** differ in one thing first: which positions a position may see.
#
# | family | sees | trained to | examples |
# |---|---|---|---|
# | **encoder-only** | everything, both ways | fill in hidden tokens | BERT; embedding and ranking models |
# | **decoder-only** | itself and what came before | predict the next token | GPT-2, GPT-3, LLaMA, Mistral, Mixtral, DeepSeek-V3 |
# | **encoder–decoder** | the source both ways; the target itself, backward only, and the whole source | predict the target's next token | the Transformer of 2017, T5, Whisper |
#
# An encoder knows both neighbors of a word, which helps to understand it, and cannot write: there
# is no order in which its outputs depend on one another. A decoder writes, and its first word knows
# nothing of the second. An encoder–decoder has one of each.
#
# A fourth arrangement lies between. A **prefix LM** is a decoder whose first tokens, the prefix,
# may look at one another both ways: a prompt has no need of causality, since the model does not
# have to predict it. Write source and target one after the other and compare: a prefix LM lets
# every position see exactly what an encoder–decoder lets it see. What remains between them is whose
# weights do the work. The encoder–decoder has one stack for the source, another for the target, and
# a separate **cross-attention** between them; the prefix LM has one stack and one softmax over
# both. That is what the T5 paper compared (its section 3.2), at equal parameters and at equal
# arithmetic.
#
# **Images and sound** enter by the same door. In Gemini's family, as its report of 2023 describes
# it, pictures, sound and video become token vectors that stand interleaved with the text's in the
# sequence of one decoder: the mask and the block do not change, the embedding does. Flamingo
# entered by the other door: its images are a second sequence that the text reads through
# cross-attention. Some models (PaliGemma) put image and prompt under a prefix mask, because pixels
# have no first and last. Lesson 38 builds these.

# %%
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from llm40 import checks, data, plot, profile
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# %% [markdown]
# A warm-up: the families as masks. True = may attend, a row is a query, as in lesson 09.


# %% exercise="visibility" minutes=5 difficulty=1
def visibility(kind: str, prefix: int, seq: int) -> Tensor:
    """Which positions each of `seq` positions may see.

    kind: "encoder" (all see all), "decoder" (each sees itself and those before it), or "prefix"
    (the first `prefix` positions see one another, and nothing else; a later position sees them,
    itself, and all before it). `prefix`, from 0 to seq, plays no part in the first two. Any other
    kind is a ValueError.
    Returns (seq, seq), bool: entry (i, j) says whether i sees j.
    """
    ### BEGIN SOLUTION
    if kind == "encoder":
        return torch.ones(seq, seq, dtype=torch.bool)
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    if kind == "decoder":
        return causal
    if kind == "prefix":
        return causal | (torch.arange(seq) < prefix)
    raise ValueError(f"no family is called {kind!r}: encoder, decoder or prefix")
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the prefix in one line</summary>
#
# Which positions see the keys of the prefix? All of them do: those inside because it is theirs,
# those after because it came before. So nothing has to be said about the queries.
# </details>

# %% check="visibility" points=1
checks.close(
    visibility("prefix", 2, 4),
    torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool(),
    what='visibility("prefix", 2, 4)',
    mistakes={
        "a causal mask": torch.ones(4, 4).tril().bool(),
        "a prefix that is cut off from what follows": torch.tensor(
            [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        ).bool(),
        "a prefix that also sees what follows": torch.tensor(
            [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
        ).bool(),
        "a mask where True means hidden": torch.tensor(
            [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
        ).bool(),
    },
)
### BEGIN HIDDEN TESTS
for prefix, seq in [(0, 1), (1, 1), (0, 5), (3, 5), (5, 5), (1, 6), (4, 9)]:
    sees = {
        "encoder": lambda i, j: True,
        "decoder": lambda i, j: j <= i,
        "prefix": lambda i, j, p=prefix: j < p if i < p else j <= i,
    }
    for kind, rule in sees.items():
        expected = torch.tensor([[rule(i, j) for j in range(seq)] for i in range(seq)])
        checks.close(
            visibility(kind, prefix, seq), expected, what=f"visibility({kind!r}, {prefix}, {seq})"
        )
checks.raises(ValueError, visibility, "middle", 1, 3, because="no family has that name")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: the families as masks
words = ["Thursday", "March", "5", "<to French>", "jeudi", "5", "mars"]
titles = ("encoder-only: BERT", "decoder-only: GPT, LLaMA", "prefix LM, and encoder–decoder")
fig, axes = plot.plt.subplots(1, 3, figsize=(12.5, 4.6))
for ax, kind, title in zip(axes, ("encoder", "decoder", "prefix"), titles, strict=True):
    plot.heatmap(
        visibility(kind, 4, len(words)).float(),
        xlabel="seen",
        ylabel="who sees" if ax is axes[0] else "",
        title=title,
        xticks=words,
        yticks=words if ax is axes[0] else [""] * len(words),
        vmin=0,
        vmax=1.6,
        colorbar=False,
        ax=ax,
    )
axes[2].axhline(4, color="black", linewidth=1.2)
axes[2].axvline(4, color="black", linewidth=1.2)
plot.caption(
    fig,
    "Dark: may attend. The black lines cut the third mask into what an encoder–decoder calls "
    "self-attention of the encoder (top left), cross-attention (bottom left) and "
    "causal self-attention of the decoder (bottom right). One mask, three modules.",
)
plot.plt.show()

# %% [markdown]
# ## The layers of 2017
#
# Every sublayer of the original stands in the same frame, **post-norm**: the residual is added
# first and the sum is normalized,
#
# $$ x \leftarrow \mathrm{LayerNorm}\big(x + \mathrm{sublayer}(x)\big). $$
#
# Models since GPT-2 normalize what goes *into* the sublayer,
# $x \leftarrow x + \mathrm{sublayer}(\mathrm{Norm}(x))$ (**pre-norm**). It matters for depth. Take
# $L$ sublayers. In a pre-norm stack the derivative of the output with respect to the first input is
# a product of factors $(I + J_l)$, so one of its terms is the identity, whatever the sublayers do:
# the gradient has a path on which nothing touches it. In post-norm every factor is $N_l (I + J_l)$
# with $N_l$ the Jacobian of a LayerNorm. At initialization the two summands have about the same
# variance, so that the sum has standard deviation about $\sqrt2$, and $N_l$, which divides by it,
# shrinks by $1/\sqrt2$: the identity path carries $2^{-L/2}$. Twelve sublayers leave $\frac1{64}$.
# This is why the original needs its learning rate warmed up, and why it grew no deeper than a few
# dozen layers before pre-norm. Lesson 04 measured it.
#
# **Shapes.** `x` is `(batch, seq, d_model)`, masks broadcast to `(batch, heads, q_len, k_len)`,
# True = may attend. Attention is given, with four projections with biases as in lesson 09; it keeps
# the weights of its last call in `.weights`, for the figures. Dropout is left out: the task below
# is not one that a model of this size can memorize.


# %%
class Attention(nn.Module):
    """Multi-head attention with biases, as in lesson 09; `weights` are those of its last call."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )
        self.weights: Tensor | None = None

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch, q_len, d_model) asks context (batch, k_len, d_model).

        mask broadcasts to (batch, heads, q_len, k_len).
        """
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        self.weights = weights.detach()
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2))


# %% exercise="encoder_layer" minutes=10 difficulty=1
class EncoderLayer(nn.Module):
    """An encoder layer of 2017: self-attention, then a feed-forward layer, each post-norm.

    Modules, and no others: self_attn = Attention(d_model, heads); linear1 (d_model → d_ff) and
    linear2 (d_ff → d_model) with biases; norm1 after attention and norm2 after the feed-forward
    layer, nn.LayerNorm(d_model). The feed-forward layer is linear2(activation(linear1(x))), per
    position. activation is any function of a tensor (BERT's is F.gelu), called as it was handed in;
    an activation that is itself a module may be a child too.
    """

    def __init__(
        self, d_model: int, heads: int, d_ff: int, activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.self_attn = Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.activation = activation
        ### END SOLUTION

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch, seq, d_model) → (batch, seq, d_model).

        mask: broadcastable to (batch, heads, seq, seq), True = may attend.
        """
        ### BEGIN SOLUTION
        x = self.norm1(x + self.self_attn(x, x, mask))
        return self.norm2(x + self.linear2(self.activation(self.linear1(x))))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the order in one frame</summary>
#
# Sublayer, add, normalize. The second frame starts from the *normalized* result of the first, on
# both sides of its plus.
# </details>

# %% [markdown]
# The check compares with PyTorch's own layers, loaded with your weights. PyTorch keeps the three
# input projections in one matrix, and its masks mean the opposite: True = hidden.

# %% tags=["support"]
# Support: PyTorch's layers with your weights, and random ones


def copy_attention(mine: nn.Module, theirs: nn.MultiheadAttention) -> None:
    """PyTorch's attention with the weights of `mine`."""
    projections = (mine.q_proj, mine.k_proj, mine.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    theirs.out_proj.load_state_dict(mine.out_proj.state_dict())


def pytorch_layer(mine: nn.Module, kind: type, heads: int, norm_first: bool = False) -> nn.Module:
    """nn.TransformerEncoderLayer or …DecoderLayer with the weights of `mine`."""
    d_ff, d_model = mine.linear1.weight.shape
    twin = kind(d_model, heads, d_ff, dropout=0.0, batch_first=True, norm_first=norm_first).to(
        mine.linear1.weight
    )
    copy_attention(mine.self_attn, twin.self_attn)
    if hasattr(twin, "multihead_attn"):
        copy_attention(mine.cross_attn, twin.multihead_attn)
    for name in ("linear1", "linear2", "norm1", "norm2", "norm3"):
        if hasattr(twin, name):
            getattr(twin, name).load_state_dict(getattr(mine, name).state_dict())
    return twin


def same_size(mine: nn.Module, theirs: nn.Module) -> None:
    """Of two modules that do the same, do both have as many parameters?"""
    ours, due = (sum(p.numel() for p in m.parameters()) for m in (mine, theirs))
    assert ours == due, (
        f"your {type(mine).__name__} has {ours:,} parameters, PyTorch's of the same sizes "
        f"{due:,}: are all arguments used, and has every layer its own weights?"
    )


def randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module in float64 on the profile's device, every parameter random, norms' too."""
    module = module.double().to(profile.device)
    with torch.no_grad():
        for p in module.parameters():
            matrix = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
            p.copy_(matrix + (0.5 if p.dim() == 1 else 0.0))
    return module


# %% check="encoder_layer" points=2
g = checks.generator(1)
mine = EncoderLayer(8, 2, 12)
names = {name for name, _ in mine.named_children()}
assert names == {"self_attn", "linear1", "linear2", "norm1", "norm2"}, (
    f"the modules should be self_attn, linear1, linear2, norm1, norm2; yours are {sorted(names)}"
)
mine = randomized(mine, g)
x = checks.randn(2, 5, 8, generator=g, dtype=torch.float64)
out = mine(x)
plain = pytorch_layer(mine, nn.TransformerEncoderLayer, 2)
checks.close(
    out,
    plain(x),
    what="the output of one layer",
    mistakes={
        "pre-norm, the norm before the sublayer,": pytorch_layer(
            mine, nn.TransformerEncoderLayer, 2, norm_first=True
        )(x)
    },
)
### BEGIN HIDDEN TESTS
for d_model, heads, d_ff, batch, seq in [(12, 3, 7, 3, 4), (6, 1, 24, 1, 1), (16, 4, 32, 2, 9)]:
    mine = randomized(EncoderLayer(d_model, heads, d_ff), g)
    same_size(mine, nn.TransformerEncoderLayer(d_model, heads, d_ff))
    twin = pytorch_layer(mine, nn.TransformerEncoderLayer, heads)
    x = checks.randn(batch, seq, d_model, generator=g, dtype=torch.float64)
    attended = x + mine.self_attn(x, x)
    mistakes = {
        "pre-norm, the norm before the sublayer,": pytorch_layer(
            mine, nn.TransformerEncoderLayer, heads, norm_first=True
        )(x),
        "a second residual that skips the first norm": F.layer_norm(
            attended + mine.linear2(mine.linear1(mine.norm1(attended)).relu()),
            (d_model,),
            mine.norm2.weight,
            mine.norm2.bias,
        ),
    }
    with checks.unchanged(x=x):
        out = mine(x)
    checks.close(
        out,
        twin(x),
        what=f"the output with d_model {d_model}, {heads} heads, d_ff {d_ff}",
        mistakes=mistakes,
    )
    checks.gradients(lambda x, m=mine: m(x), lambda x, t=twin: t(x), x, names=("x",), rtol=1e-7)
# Law: an encoder has no order of its own: permuting the positions permutes the output.
order = torch.randperm(9, generator=g).to(x.device)
checks.close(mine(x[:, order]), mine(x)[:, order], what="the output of permuted positions")
### END HIDDEN TESTS

# %% check="encoder_layer" points=1
g = checks.generator(2)
mine = randomized(EncoderLayer(8, 2, 12), g)
x = checks.randn(1, 4, 8, generator=g, dtype=torch.float64)
real = torch.tensor([True, True, True, False], device=x.device)  # the last position is padding
changed = x.clone()
changed[:, 3] += 1
checks.close(
    mine(changed, real)[:, :3],
    mine(x, real)[:, :3],
    what="outputs 0 to 2 after the padding was changed",
    hint="Does the mask reach the attention?",
)
### BEGIN HIDDEN TESTS
twin = pytorch_layer(mine, nn.TransformerEncoderLayer, 2)
x = checks.randn(3, 6, 8, generator=g, dtype=torch.float64)
lengths = torch.tensor([6, 2, 4], device=x.device)
real = torch.arange(6, device=x.device) < lengths[:, None]
causal = torch.ones(6, 6, dtype=torch.bool, device=x.device).tril()
checks.close(
    mine(x, real[:, None, None])[real],
    twin(x, src_key_padding_mask=~real)[real],
    what="the output at real positions with a padding mask",
)
checks.close(mine(x, causal), twin(x, src_mask=~causal), what="the output with a causal mask")
seen = (torch.rand(3, 2, 6, 6, generator=g) < 0.5).to(x.device)
seen[..., 2] = True
checks.close(
    mine(x, seen),
    twin(x, src_mask=~seen.flatten(0, 1)),
    what="the output with another mask for every head of every sentence",
)
for name, activation in (
    ("F.gelu", F.gelu),
    ("torch.tanh", torch.tanh),
    ("cosine", lambda z: z.cos()),
):
    active = randomized(EncoderLayer(8, 2, 12, activation=activation), g)
    twin = pytorch_layer(active, nn.TransformerEncoderLayer, 2)
    twin.activation, twin.activation_relu_or_gelu = activation, 0
    checks.close(
        active(x),
        twin(x),
        what=f"the output with the activation {name}",
        hint="Is the activation that was handed in the one that is used?",
    )
### END HIDDEN TESTS

# %% [markdown]
# ### The decoder's third sublayer
#
# A decoder layer has **cross-attention** between the two: queries come from the target, keys and
# values from the **memory**, the output of the last encoder layer. The same memory is read by every
# decoder layer. It has its own mask (the source's padding), and the softmax is over the source
# alone: however little the source has to say about the next token, all of the weight lands on it.


# %% exercise="decoder_layer" minutes=10 difficulty=2
class DecoderLayer(nn.Module):
    """A decoder layer of 2017: self-attention, cross-attention, feed-forward, each post-norm.

    Modules, and no others: self_attn and cross_attn = Attention(d_model, heads); linear1, linear2
    as in the encoder layer, ReLU between them; norm1 after self-attention, norm2 after
    cross-attention, norm3 after the feed-forward layer.
    """

    def __init__(self, d_model: int, heads: int, d_ff: int) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.self_attn, self.cross_attn = Attention(d_model, heads), Attention(d_model, heads)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        ### END SOLUTION

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x (batch, q_len, d_model): the target; memory (batch, k_len, d_model): the encoder's.

        mask, broadcastable to (batch, heads, q_len, q_len), is for self-attention; memory_mask,
        broadcastable to (batch, heads, q_len, k_len), for cross-attention. True = may attend. The
        layer adds no mask of its own. Returns (batch, q_len, d_model).
        """
        ### BEGIN SOLUTION
        x = self.norm1(x + self.self_attn(x, x, mask))
        x = self.norm2(x + self.cross_attn(x, memory, memory_mask))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: who asks whom?</summary>
#
# The given `Attention` takes the one who asks first and the one who is asked second. Each of the
# three residuals belongs to the target.
# </details>

# %% check="decoder_layer" points=2
g = checks.generator(3)
mine = DecoderLayer(8, 2, 12)
names = {name for name, _ in mine.named_children()}
expected_names = {"self_attn", "cross_attn", "linear1", "linear2", "norm1", "norm2", "norm3"}
assert names == expected_names, (
    f"the modules should be {sorted(expected_names)}; yours are {sorted(names)}"
)
mine = randomized(mine, g)
x, memory = (
    checks.randn(1, 4, 8, generator=g, dtype=torch.float64),
    checks.randn(1, 4, 8, generator=g, dtype=torch.float64),
)
twin = pytorch_layer(mine, nn.TransformerDecoderLayer, 2)
once = mine.norm1(x + mine.self_attn(x, x))
from_itself = mine.norm2(once + mine.cross_attn(once, once))
checks.close(
    mine(x, memory),
    twin(x, memory),
    what="the output of one layer",
    mistakes={
        "pre-norm, the norm before the sublayer,": pytorch_layer(
            mine, nn.TransformerDecoderLayer, 2, norm_first=True
        )(x, memory),
        "cross-attention that reads its own states, not the memory,": mine.norm3(
            from_itself + mine.linear2(mine.linear1(from_itself).relu())
        ),
    },
)
### BEGIN HIDDEN TESTS
for d_model, heads, d_ff, batch, q_len, k_len in [
    (12, 3, 7, 3, 4, 6),
    (6, 1, 24, 1, 1, 5),
    (16, 4, 32, 2, 7, 1),
    (10, 5, 8, 2, 5, 5),
]:
    mine = randomized(DecoderLayer(d_model, heads, d_ff), g)
    same_size(mine, nn.TransformerDecoderLayer(d_model, heads, d_ff))
    twin = pytorch_layer(mine, nn.TransformerDecoderLayer, heads)
    x = checks.randn(batch, q_len, d_model, generator=g, dtype=torch.float64)
    memory = checks.randn(batch, k_len, d_model, generator=g, dtype=torch.float64)
    once = mine.norm1(x + mine.self_attn(x, x))
    from_itself = mine.norm2(once + mine.cross_attn(once, once))
    mistakes = {
        "cross-attention that reads its own states, not the memory,": mine.norm3(
            from_itself + mine.linear2(mine.linear1(from_itself).relu())
        ),
        "pre-norm, the norm before the sublayer,": pytorch_layer(
            mine, nn.TransformerDecoderLayer, heads, norm_first=True
        )(x, memory),
    }
    with checks.unchanged(x=x, memory=memory):
        out = mine(x, memory)
    checks.close(
        out,
        twin(x, memory),
        what=f"the output with {heads} heads, q_len {q_len}, k_len {k_len}",
        mistakes=mistakes,
    )
    checks.gradients(
        lambda x, m, mine=mine: mine(x, m),
        lambda x, m, twin=twin: twin(x, m),
        x,
        memory,
        names=("x", "memory"),
        rtol=1e-7,
    )
### END HIDDEN TESTS

# %% check="decoder_layer" points=2
g = checks.generator(4)
mine = randomized(DecoderLayer(8, 2, 12), g)
x, memory = (
    checks.randn(1, 4, 8, generator=g, dtype=torch.float64),
    checks.randn(1, 3, 8, generator=g, dtype=torch.float64),
)
causal = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril()
changed = x.clone()
changed[:, 3] += 1
checks.close(
    mine(changed, memory, causal)[:, :3],
    mine(x, memory, causal)[:, :3],
    what="outputs 0 to 2 under a causal mask after position 3 was changed",
)
### BEGIN HIDDEN TESTS
twin = pytorch_layer(mine, nn.TransformerDecoderLayer, 2)
for q_len, k_len in [(4, 6), (5, 5), (6, 2)]:
    x, memory = (checks.randn(3, n, 8, generator=g, dtype=torch.float64) for n in (q_len, k_len))
    causal = torch.ones(q_len, q_len, dtype=torch.bool, device=x.device).tril()
    real = (
        torch.arange(k_len, device=x.device) < torch.tensor([k_len, 1, 2], device=x.device)[:, None]
    )
    expected = twin(x, memory, tgt_mask=~causal, memory_key_padding_mask=~real)
    checks.close(
        mine(x, memory, causal, real[:, None, None]),
        expected,
        what=f"the output with both masks, q_len {q_len}, k_len {k_len}",
        hint="mask belongs to self-attention, memory_mask to cross-attention",
    )
    checks.close(
        mine(x, memory),
        twin(x, memory),
        what="the output without masks",
        hint="the layer adds no mask of its own",
    )
    # Masks of any kind: another row for every query, of every head, of every sentence.
    seen, read = (
        (torch.rand(3, 2, q_len, n, generator=g) < 0.5).to(x.device) for n in (q_len, k_len)
    )
    seen[..., -1], read[..., 0] = True, True
    checks.close(
        mine(x, memory, seen, read),
        twin(x, memory, tgt_mask=~seen.flatten(0, 1), memory_mask=~read.flatten(0, 1)),
        what=f"the output with a mask for every query and head, q_len {q_len}, k_len {k_len}",
        hint="the masks are used as they are handed in",
    )
# Law: the memory is a set. Permuting it together with its mask changes nothing.
order = torch.tensor([1, 0], device=x.device)
checks.close(
    mine(x, memory[:, order], causal, real[:, None, None][..., order]),
    mine(x, memory, causal, real[:, None, None]),
    what="the output after the memory was permuted",
)
### END HIDDEN TESTS

# %% [markdown]
# ## The whole Transformer
#
# Tokens become vectors, vectors go through the stacks, and the target's states are compared with
# the embedding of every token to give **logits**. Three details of 2017:
#
# - **one matrix three times**: source embedding, target embedding and output projection share their
#   weights (both languages share a vocabulary);
# - **embeddings times $\sqrt{d}$**: drawn with standard deviation $1/\sqrt d$, so that a logit, a
#   sum of $d$ products of a normalized state (each component of size 1) with an embedding, has
#   standard deviation $\sqrt{d}\cdot 1/\sqrt d = 1$. As an input the same row would be $\sqrt d$
#   times smaller than the sinusoids added to it. The factor brings it to size 1;
# - **sinusoids** for positions, fixed, added once at the bottom of both stacks.


# %%
def sinusoids(seq: int, d_model: int) -> Tensor:
    """(seq, d_model): sin(t/10000^(2i/d)) at feature 2i, the cosine at 2i + 1. d_model is even."""
    frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000.0) / d_model))
    angle = torch.arange(seq)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


# %% exercise="transformer" minutes=35 difficulty=3
class Transformer(nn.Module):
    """The encoder–decoder of 2017: no dropout, one embedding for source, target and output.

    Modules, and no others: embedding = nn.Embedding(vocab_size, d_model), drawn from a normal
    distribution of mean 0 and standard deviation d_model^−½ (the row of `pad` is drawn and gets its
    gradient as all others do: no padding_idx); encoder and decoder, nn.ModuleList of `layers`
    EncoderLayer and DecoderLayer, each with weights of its own.

    Inputs of both stacks: embedding · √d_model + sinusoids. No norm after the last layer, no bias
    on the logits. `pad` is the id that fills up short sequences, on the right.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 64,
        heads: int = 4,
        layers: int = 2,
        d_ff: int = 256,
        pad: int = 0,
    ) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, heads, d_ff) for _ in range(layers))
        self.pad = pad
        ### END SOLUTION

    ### BEGIN SOLUTION
    def embed(self, tokens: Tensor) -> Tensor:
        width = self.embedding.embedding_dim
        positions = sinusoids(tokens.shape[1], width).to(self.embedding.weight)
        return self.embedding(tokens) * math.sqrt(width) + positions

    ### END SOLUTION
    def encode(self, source: Tensor) -> Tensor:
        """source (batch, k_len), int64 → memory (batch, k_len, d_model). Padding is never seen."""
        ### BEGIN SOLUTION
        x, mask = self.embed(source), (source != self.pad)[:, None, None]
        for layer in self.encoder:
            x = layer(x, mask)
        return x
        ### END SOLUTION

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """target (batch, q_len), memory from `encode(source)` → logits (batch, q_len, vocab_size).

        The logits at position i depend on target[:, :i + 1] and on the real tokens of the source,
        on nothing else.
        """
        ### BEGIN SOLUTION
        seq = target.shape[1]
        causal = torch.ones(seq, seq, dtype=torch.bool, device=target.device).tril()
        x, memory_mask = self.embed(target), (source != self.pad)[:, None, None]
        for layer in self.decoder:
            x = layer(x, memory, causal, memory_mask)
        return x @ self.embedding.weight.T
        ### END SOLUTION

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """decode(target, encode(source), source)."""
        ### BEGIN SOLUTION
        return self.decode(target, self.encode(source), source)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: masks</summary>
#
# Three attentions, three masks: the encoder hides the source's padding, the decoder's
# self-attention hides the future, cross-attention hides the source's padding again. The target's
# padding needs no mask. It stands on the right, so the causal mask hides it from every real token.
# </details>
#
# <details><summary>Hint: the mask's shape</summary>
#
# `source != pad` is (batch, k_len). It has to broadcast to (batch, heads, q_len, k_len).
# </details>
#
# <details><summary>Hint: float64</summary>
#
# The check calls your model in float64. Bring what you add to the embeddings into the embedding's
# dtype and device.
# </details>


# %% tags=["support"]
# Support: the same model from nn.TransformerEncoder and nn.TransformerDecoder


class PyTorchTransformer(nn.Module):
    """What yours is compared with, and what the training check trains."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 64,
        heads: int = 4,
        layers: int = 2,
        d_ff: int = 256,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.pad, self.d_model = pad, d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        kind = {"dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, heads, d_ff, **kind),
            layers,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(d_model, heads, d_ff, **kind), layers
        )

    def embed(self, tokens: Tensor) -> Tensor:
        positions = sinusoids(tokens.shape[1], self.d_model).to(self.embedding.weight)
        return self.embedding(tokens) * self.d_model**0.5 + positions

    def encode(self, source: Tensor) -> Tensor:  # PyTorch's masks: True = hidden
        return self.encoder(self.embed(source), src_key_padding_mask=source == self.pad)

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        seq, hidden = target.shape[1], source == self.pad
        future = torch.ones(seq, seq, dtype=torch.bool, device=target.device).triu(1)
        x = self.embed(target)
        x = self.decoder(x, memory, tgt_mask=future, memory_key_padding_mask=hidden)
        return x @ self.embedding.weight.T

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encode(source)
        return self.decode(target, memory, source)


def pytorch_twin(mine: nn.Module, heads: int, pad: int = 0) -> PyTorchTransformer:
    """PyTorchTransformer with the weights of `mine`."""
    vocab_size, d_model = mine.embedding.weight.shape
    twin = PyTorchTransformer(
        vocab_size,
        d_model,
        heads,
        len(mine.encoder),
        mine.encoder[0].linear1.out_features,
        pad,
    ).to(mine.embedding.weight)
    twin.embedding.load_state_dict(mine.embedding.state_dict())
    for i in range(len(mine.encoder)):
        twin.encoder.layers[i] = pytorch_layer(mine.encoder[i], nn.TransformerEncoderLayer, heads)
        twin.decoder.layers[i] = pytorch_layer(mine.decoder[i], nn.TransformerDecoderLayer, heads)
    return twin


# %% check="transformer" points=3
g = checks.generator(5)
mine = Transformer(11, d_model=8, heads=2, layers=2, d_ff=12)
names = {name for name, _ in mine.named_children()}
assert names == {"embedding", "encoder", "decoder"}, (
    f"the modules should be embedding, encoder, decoder; yours are {sorted(names)}"
)
mine = randomized(mine, g)
source, target = (
    torch.tensor([[3, 5, 2]], device=profile.device),
    torch.tensor([[1, 4, 6, 2]], device=profile.device),
)
logits = mine(source, target)
assert logits.shape == (1, 4, 11), (
    f"logits have shape {tuple(logits.shape)}, not (batch, q_len, vocab_size) = (1, 4, 11)"
)
checks.close(
    logits,
    pytorch_twin(mine, 2)(source, target),
    what="the logits",
    hint="Embeddings times √d_model plus sinusoids into both stacks; logits are states times the "
    "embedding matrix, with no norm or bias before",
)
### BEGIN HIDDEN TESTS
for vocab_size, d_model, heads, layers, d_ff, batch, k_len, q_len in [
    (7, 12, 3, 1, 9, 3, 5, 4),
    (20, 8, 4, 3, 16, 1, 1, 6),
    (9, 6, 1, 2, 8, 2, 7, 1),
]:
    mine = randomized(Transformer(vocab_size, d_model, heads, layers, d_ff), g)
    same_size(mine, PyTorchTransformer(vocab_size, d_model, heads, layers, d_ff))
    source, target = (
        torch.randint(1, vocab_size, (batch, n), generator=g).to(profile.device)
        for n in (k_len, q_len)
    )
    expected = pytorch_twin(mine, heads)(source, target)
    with checks.unchanged(source=source, target=target):
        logits = mine(source, target)
    checks.close(
        logits,
        expected,
        what=f"the logits with {layers} layers, d_model {d_model}, source {k_len}, target {q_len}",
    )
    checks.close(
        mine.decode(target, mine.encode(source), source),
        expected,
        what="decode(target, encode(source), source)",
    )
fresh = Transformer(3000, d_model=64, layers=1)
deviation = float(fresh.embedding.weight.detach().std()) * 8
assert abs(deviation - 1) < 0.02, (
    f"the embedding's standard deviation should be 64^−½ = 0.125; yours is {deviation / 8:.4f}"
)
for pad in (0, 7):
    fresh = Transformer(9, d_model=400, layers=1, pad=pad)
    checks.drawn(
        fresh.embedding.weight[pad],
        mean=0.0,
        std=0.05,
        what=f"the embedding of pad = {pad}, width 400",
        hint="The row of pad is drawn like any other",
    )
### END HIDDEN TESTS

# %% check="transformer" points=2
g = checks.generator(6)
mine = randomized(Transformer(11, d_model=8, heads=2, layers=2, d_ff=12), g)
source = torch.tensor([[3, 5, 2, 0, 0]], device=profile.device)
target = torch.tensor([[1, 4, 6, 2]], device=profile.device)
changed = target.clone()
changed[0, 3] = 9
checks.close(
    mine(source, changed)[:, :3],
    mine(source, target)[:, :3],
    what="logits 0 to 2 after target token 3 was changed",
    hint="The decoder sees its own future: is there a causal mask?",
)
checks.close(
    mine(source[:, :3], target),
    mine(source, target),
    what="the logits with and without two padding tokens at the source's end",
)
### BEGIN HIDDEN TESTS
for pad in (0, 4):
    mine = randomized(Transformer(13, d_model=12, heads=3, layers=2, d_ff=10, pad=pad), g)
    choices = torch.tensor([t for t in range(13) if t != pad])
    source, target = (
        choices[torch.randint(12, (3, n), generator=g)].to(profile.device) for n in (6, 5)
    )
    source[1, 2:], source[2, 5:], target[0, 3:] = pad, pad, pad
    logits = mine(source, target)
    real = target != pad
    checks.close(
        logits[real],
        pytorch_twin(mine, 3, pad)(source, target)[real],
        what=f"the logits of a padded batch (pad = {pad})",
    )
    for row, n in enumerate((6, 2, 5)):
        alone = mine(source[row : row + 1, :n], target[row : row + 1])
        checks.close(
            logits[row],
            alone[0],
            what=f"row {row} of a padded batch against the same sentence alone (pad = {pad})",
        )
        for cut in (1, 2, 4):
            checks.close(
                mine(source[row : row + 1], target[row : row + 1, :cut])[0],
                logits[row, :cut],
                what=f"the logits of a target cut after {cut} tokens",
                hint="Logits at position i depend on target[:, :i + 1] alone",
            )
# The source matters to every logit, through cross-attention.
other = source.clone()
other[:, 0] = torch.where(source[:, 0] == 1, 2, 1)
moved = (mine(other, target) - logits).abs().amax(-1)[target != pad]
assert bool((moved > 1e-9).all()), (
    "changing the source's first token leaves some logits as they were"
)
# decode reads the padding of its own source, whatever was encoded in between.
memory = mine.encode(source)
mine.encode(source.flip(0).roll(1, 1))
checks.close(
    mine.decode(target, memory, source),
    logits,
    what="decode(target, memory, source) after another source was encoded",
    hint="The mask of cross-attention comes from the source that decode is given",
)
twin = pytorch_twin(mine, 3, pad)
twin(source, target).pow(2).sum().backward()
mine(source, target).pow(2).sum().backward()
checks.close(
    mine.embedding.weight.grad,
    twin.embedding.weight.grad,
    what="the gradient of the embedding, the row of pad included",
)
for name, p in mine.named_parameters():
    assert p.grad is not None, f"no gradient reaches {name}"
    assert bool(torch.isfinite(p.grad).all()), f"the gradient of {name} is not finite"
### END HIDDEN TESTS

# %% [markdown]
# ## Training: the answer shifted by one
#
# The decoder learns all positions of a sentence in one pass. Position $i$ gets the *right* tokens
# $y_0 \dots y_i$ as input, whatever the model would have written, and is to predict $y_{i+1}$:
# **teacher forcing**. One matrix of ids serves as both. With $y_0$ a start token and an end token
# after the last word,
#
# ```
# target    <bos>  5     ␣     mars  <eos>  <pad>
# input     <bos>  5     ␣     mars  <eos>              all but the last column
# label     5      ␣     mars  <eos> <pad>              all but the first; padding does not count
# ```
#
# Feed the target unshifted, as input and as label, and the loss falls beautifully: position $i$
# sees the token that it is to predict, and copies it. Nothing in the loss curve gives this away.
# Generation does.
#
# **Label smoothing.** Cross-entropy with a one-hot label is least when the right logit is
# infinitely ahead. Smoothing asks for less: the target distribution keeps $1-\varepsilon$ on the
# label and spreads $\varepsilon$ evenly over the $V' = V - 1$ real tokens, the label among them,
# and *not* over padding, which must never be predicted:
#
# $$ q_c = (1-\varepsilon)\,[c = y] + \frac{\varepsilon}{V'}\,[c \ne \mathrm{pad}], \qquad \ell = -\sum_{c} q_c \log p_c . $$
#
# The minimum is at $p = q$, where the loss is the entropy of $q$, not 0. Between the label and any
# other real token the logits then differ by
# $\log\frac{1-\varepsilon+\varepsilon/V'}{\varepsilon/V'}$, a finite number: 7.0 for
# $\varepsilon = 0.1$, $V' = 120$.
#
# **Warm-up.** The learning rate of 2017 rises linearly for $w$ steps and then falls with the root
# of the step:
#
# $$ \eta(k) = d^{-1/2}\,\min\!\big(k^{-1/2},\; k\,w^{-3/2}\big), \qquad k = 1, 2, \dots $$
#
# The two branches meet at $k = w$, the peak $1/\sqrt{d\,w}$. It rises because Adam's second moment
# is at first an estimate from a few samples, and because of post-norm, as above.


# %% exercise="warmup_rate" minutes=3 difficulty=1
def warmup_rate(step: int, d_model: int, warmup: int) -> float:
    """The learning rate of "Attention Is All You Need" at this step.

    Steps are counted from 1; one below 1 is a ValueError.
    """
    ### BEGIN SOLUTION
    if step < 1:
        raise ValueError(f"steps are counted from 1, not {step}")
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: which branch when?</summary>
#
# None has to be chosen: before the peak the rising one is the smaller, after it the falling one.
# </details>

# %% check="warmup_rate" points=1
checks.close(warmup_rate(1, 64, 100), 0.000125, what="the rate at step 1 (d_model 64, warm-up 100)")
checks.close(
    warmup_rate(100, 64, 100), 0.0125, what="the rate at the peak", hint="1 / √(d·w) = 1 / √6400"
)
### BEGIN HIDDEN TESTS
for d_model, warmup in [(512, 4000), (64, 1), (100, 37)]:
    peak = 1 / math.sqrt(d_model * warmup)
    for step in (1, 2, max(1, warmup // 2), warmup, warmup + 1, 4 * warmup, 100 * warmup):
        expected = peak * (step / warmup if step <= warmup else math.sqrt(warmup / step))
        checks.close(
            warmup_rate(step, d_model, warmup),
            expected,
            what=f"the rate at step {step} (d_model {d_model}, warm-up {warmup})",
        )
for step in (0, -1):
    checks.raises(ValueError, warmup_rate, step, 64, 100, because="the first step is 1")
### END HIDDEN TESTS


# %% exercise="smoothed_loss" minutes=15 difficulty=2
def smoothed_loss(logits: Tensor, labels: Tensor, pad: int = 0, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy against smoothed labels: the mean over all positions whose label is not `pad`.

    logits: (batch, seq, vocab), finite, of any size; that of `pad` may be −10⁹, say.
    labels: (batch, seq), int64, at least one of them not `pad`.

    The wanted distribution has 1 − smoothing on the label, and smoothing spread evenly over all
    tokens but `pad`, the label included. The softmax of the logits is over the whole vocabulary,
    `pad` included. Returns a scalar through which gradients flow.
    """
    ### BEGIN SOLUTION
    real = labels != pad
    logp = F.log_softmax(logits[real], dim=-1)  # (n, vocab)
    right = logp.gather(-1, labels[real][:, None])[:, 0]
    spread = torch.arange(logits.shape[-1], device=logits.device) != pad
    others = logp[:, spread].mean(-1)
    return -((1 - smoothing) * right + smoothing * others).mean()
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: no table of q is needed</summary>
#
# $-\sum_c q_c \log p_c$ splits into $(1-\varepsilon)$ times the usual cross-entropy and
# $\varepsilon$ times the mean of $-\log p_c$ over the tokens that are not padding.
# </details>
#
# <details><summary>Hint: <code>F.cross_entropy</code> does almost this</summary>
#
# Its `label_smoothing` spreads the mass over all $V$ tokens, padding too. `ignore_index` is about
# positions, not about that mass.
# </details>

# %% check="smoothed_loss" points=1
# Probabilities of <pad> and three tokens, at two positions.
logits = torch.tensor([[0.5, 0.125, 0.125, 0.25]]).log()[None].expand(1, 2, 4)
labels = torch.tensor([[3, 0]])  # the second position is padding
expected = 0.7 * math.log(4) + 0.3 * (2 * math.log(8) + math.log(4)) / 3
checks.close(
    smoothed_loss(logits, labels, smoothing=0.3),
    expected,
    what="the loss of one real position",
    rtol=1e-5,
    mistakes={
        "counting the padding position": float(
            F.cross_entropy(logits[0], labels[0], label_smoothing=0.3)
        ),
        "spreading the mass over padding, too,": float(
            F.cross_entropy(logits[0], labels[0], label_smoothing=0.3, ignore_index=0)
        ),
        "no smoothing": math.log(4),
        "spreading the mass over the other tokens only": 0.7 * math.log(4) + 0.3 * math.log(8),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for batch, seq, vocab, pad, smoothing in [
    (2, 5, 7, 0, 0.1),
    (1, 1, 3, 2, 0.3),
    (3, 4, 50, 11, 0.0),
    (4, 6, 9, 8, 0.5),
]:
    logits = checks.randn(batch, seq, vocab, generator=g, dtype=torch.float64, scale=3.0)
    labels = torch.randint(vocab, (batch, seq), generator=g).to(logits.device)
    labels[:, -1], labels[0, 0] = pad, (pad + 1) % vocab
    wanted = torch.full((vocab,), smoothing / (vocab - 1), dtype=torch.float64)
    wanted[pad] = 0
    wanted = wanted.to(logits.device) + (1 - smoothing) * F.one_hot(labels, vocab).double()
    real = labels != pad

    def by_definition(logits: Tensor, wanted: Tensor = wanted, real: Tensor = real) -> Tensor:
        return F.cross_entropy(
            logits[real], wanted[real]
        )  # PyTorch's, with distributions for targets

    what = f"the loss with vocabulary {vocab}, pad {pad}, smoothing {smoothing}"
    mistakes = {
        "averaging over padding positions, too,": by_definition(logits) * real.double().mean(),
        "a sum over positions instead of their mean": by_definition(logits) * real.sum(),
        "spreading the mass over padding, too,": F.cross_entropy(
            logits[real], labels[real], label_smoothing=smoothing
        ),
    }
    with checks.unchanged(logits=logits, labels=labels):
        checks.close(
            smoothed_loss(logits, labels, pad, smoothing),
            by_definition(logits),
            what=what,
            mistakes=mistakes,
        )
    checks.gradients(
        lambda z, y=labels, p=pad, s=smoothing: smoothed_loss(z, y, p, s)[None],
        lambda z, f=by_definition: f(z)[None],
        logits,
        names=("logits",),
    )
### END HIDDEN TESTS

# %% check="smoothed_loss" points=1
# The minimum is at p = q: with exactly these logits the gradient vanishes.
# ε = 0.1 over 5 real tokens.
wanted = torch.tensor([0.0, 0.92, 0.02, 0.02, 0.02, 0.02], dtype=torch.float64)
logits = (wanted + 1e-300).log().clamp(min=-60)[None, None].requires_grad_()
loss = smoothed_loss(logits, torch.tensor([[1]]), pad=0, smoothing=0.1)
entropy = -(wanted[1:] * wanted[1:].log()).sum()
checks.close(
    loss,
    entropy,
    what="the loss where the model's distribution is the smoothed one",
    hint="it is that distribution's entropy",
)
### BEGIN HIDDEN TESTS
(gradient,) = torch.autograd.grad(loss, logits)
checks.close(
    gradient,
    torch.zeros_like(logits),
    what="the gradient where the model's distribution is the smoothed one",
    atol=1e-12,
)
for large in (1e3, 1e4):
    logits = torch.zeros(1, 1, 6)
    logits[..., 2] = large
    value = smoothed_loss(logits, torch.tensor([[1]]), smoothing=0.1)
    assert bool(torch.isfinite(value)), (
        f"logits of {large:.0e} give {float(value)}: take the logarithm of the softmax in one "
        f"function"
    )
    # −log p is `large` for every token but number 2: 0.9 of the mass on the label, and 4 of the 5
    # equal shares of 0.1
    checks.close(
        value,
        torch.tensor(large * 0.98),
        what=f"the loss of a wrong answer given with a lead of {large:.0e}",
    )
# The logit of <pad> does not count, however small: four tokens of probability ¼ remain.
for pad, small in [(0, -1e4), (0, -1e9), (4, -1e9), (2, -1e30)]:
    logits = torch.zeros(2, 3, 5)
    logits[..., pad] = small
    logits.requires_grad_()
    labels = torch.full((2, 3), pad)
    labels[1, 1] = 1
    value = smoothed_loss(logits, labels, pad=pad, smoothing=0.3)
    what = f"the loss of four equal tokens where the logit of pad is {small:.0e}"
    checks.close(value, torch.tensor(math.log(4)), what=what)
    (gradient,) = torch.autograd.grad(value, logits)
    assert bool(torch.isfinite(gradient).all()), f"{what} has a gradient that is not finite"
### END HIDDEN TESTS

# %% [markdown]
# ### The data: dates
#
# Real dates in real languages, from the tables of Unicode's CLDR, which Babel ships. A date is
# small enough to learn in seconds and still needs what translation needs: order changes
# (`March 5, 2024` → `5 mars 2024` → `2024年3月5日`), some words are copied, some replaced, and some
# depend on the style of the source (French abbreviates `Feb` to `févr.` and `March` not at all). A
# token is a word, a digit, a Chinese character or a sign. One day in eleven is held out: the model
# has seen neither that date nor the same day in another style or language.
#
# One model learns all three languages. Which one is wanted, it is told by the source's first token:
# this is how T5 and multilingual translators are told their task.

# %%
SPECIAL = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)


def cut(text: str) -> list[str]:
    """Words, digits, Chinese characters and signs, spaces included: "".join(cut(text)) == text."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W\d_]+|\d|.", text)


def date_pairs(languages: Sequence[str], count: int) -> tuple[list, list]:
    """(training, held out): pairs such as (["<fr>", "March", " ", "5"], ["5", " ", "mars"])."""
    parts: tuple[list, list] = ([], [])
    for language in languages:
        # One seed: the same days each time.
        days = [day for _, day in data.dates("en", "iso", count)]
        for day, (english, other) in zip(days, data.dates("en", language, count), strict=True):
            year, month, date = map(int, day.split("-"))
            parts[(372 * year + 31 * month + date) % 11 == 0].append(
                ([f"<{language}>", *cut(english)], cut(other))
            )
    return parts


class Vocabulary:
    """Ids of tokens, and batches of ids."""

    def __init__(self, pairs: list) -> None:
        self.tokens = SPECIAL + sorted({token for pair in pairs for side in pair for token in side})
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, pairs: list) -> tuple[Tensor, Tensor]:
        """source (n, k_len): tokens <eos>; target (n, q_len): <bos> tokens <eos>; padded."""
        sources = [[self.ids[t] for t in source] + [EOS] for source, _ in pairs]
        targets = [[BOS] + [self.ids[t] for t in target] + [EOS] for _, target in pairs]
        return tuple(
            nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True).to(profile.device)
            for rows in (sources, targets)
        )

    def text(self, row: Tensor) -> list[str]:
        """The tokens before <eos>, without <bos>."""
        ids = row.tolist()
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return [self.tokens[i] for i in ids if i not in (BOS, PAD)]


@torch.no_grad()
def greedy(model: nn.Module, source: Tensor, length: int) -> Tensor:
    """The likeliest token, again and again: (batch, k_len) → (batch, length), <pad> after <eos>."""
    target, memory = torch.full((len(source), 1), BOS, device=source.device), model.encode(source)
    for _ in range(length - 1):
        ended = (target == EOS).any(1)
        token = model.decode(target, memory, source)[:, -1].argmax(-1).masked_fill(ended, PAD)
        target = torch.cat([target, token[:, None]], 1)
    return target


def xavier(model: nn.Module) -> nn.Module:
    """Draws matrices, not the embedding, evenly from ±√(6 / (rows + columns)), as in 2017."""
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embedding" not in name:
            nn.init.xavier_uniform_(p)
    return model


def exact_match(model: nn.Module, source: Tensor, target: Tensor) -> float:
    """The share of sentences of which every token is right."""
    return float((greedy(model, source, target.shape[1]) == target).all(1).float().mean())


# %% exercise="train" minutes=20 difficulty=2
def train(
    model: nn.Module,
    source: Tensor,
    target: Tensor,
    *,
    steps: int,
    batch: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    rate_fn: Callable[[int], float],
    generator: torch.Generator | None = None,
    report: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains `model` with teacher forcing, and returns the loss of every step.

    model(source, input) → logits (batch, length, vocab).
    source: (n, k_len).
    target: (n, length + 1), each row <bos>, tokens, <eos>, padding.

    Step k = 1 … steps: draws `batch` row numbers with torch.randint and `generator`; the model
    reads these sources and all but the last column of the targets; loss_fn(logits, labels) judges
    against all but the first. One update of Adam (betas 0.9 and 0.98, eps 1e-9) at the learning
    rate rate_fn(k), a function of k alone that may be called any number of times; after it
    report(k), if given. The losses are those before the updates.
    """
    ### BEGIN SOLUTION
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    losses = []
    for k in range(1, steps + 1):
        rows = torch.randint(len(source), (batch,), generator=generator).to(source.device)
        wanted = target[rows]
        loss = loss_fn(model(source[rows], wanted[:, :-1]), wanted[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_fn(k)
        optimizer.step()
        losses.append(float(loss.detach()))
        if report is not None:
            report(k)
    return losses
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: setting the learning rate</summary>
#
# An optimizer reads its rate at every step from `optimizer.param_groups`, a list of dictionaries
# with a key `"lr"`. You may write to it.
# </details>
#
# <details><summary>Hint: the loss falls, and the translations are nonsense</summary>
#
# Print input and label of one row, side by side. At each position: is the label already visible in
# the input?
# </details>


# %% check="train" points=2
class Spy(nn.Module):
    """A model that writes down what it reads; its logits are one parameter, whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.seen = []

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        self.seen.append((source.clone(), target.clone()))
        return self.w.expand(*target.shape, 2)


spy, judged, asked = Spy(), [], []
source = torch.tensor([[10, 2], [20, 2], [30, 2]])
target = torch.tensor([[1, 11, 12, 2], [1, 21, 22, 2], [1, 31, 32, 2]])
losses = train(
    spy,
    source,
    target,
    steps=6,
    batch=4,
    loss_fn=lambda logits, labels: judged.append(labels.clone()) or 1 * logits[0, 0, 0],
    rate_fn=lambda k: asked.append(k) or 0.01 * k,
    generator=checks.generator(11),
)
assert len(spy.seen) == len(judged) == 6, (
    f"6 steps are asked for; the model was called {len(spy.seen)} times, the loss {len(judged)} "
    f"times"
)
for (sources, inputs), labels in zip(spy.seen, judged, strict=True):
    assert inputs.shape == labels.shape == (4, 3), (
        f"inputs are {tuple(inputs.shape)} and labels {tuple(labels.shape)}; both should be "
        f"(batch, length) = (4, 3)"
    )
    assert not torch.equal(inputs, labels), (
        "the model reads the very tokens that it is to predict: shift the one against the other"
    )
    assert bool((inputs[:, 0] == 1).all()), "the input starts with <bos>: all columns but the last"
    assert torch.equal(inputs[:, 1:], labels[:, :-1]), (
        "the labels are the inputs' next tokens: all columns but the first"
    )
    assert bool((sources[:, 0] == inputs[:, 1] - 1).all()), (
        "source and target of a row no longer belong together"
    )
# A constant gradient of 1: Adam moves by exactly the learning rate in each step, 0.01 + 0.02 + … +
# 0.06 in all.
checks.close(
    spy.w.detach()[0],
    torch.tensor(-0.21).double(),
    what="how far a parameter with gradient 1 has moved",
    rtol=1e-6,
    hint="the learning rate of step k is rate_fn(k), k from 1; gradients do not add up over the "
    "steps",
)
### BEGIN HIDDEN TESTS
assert sorted(set(asked)) == [1, 2, 3, 4, 5, 6], (
    f"rate_fn should be asked for steps 1 to 6; yours asks for {sorted(set(asked))}"
)
checks.close(
    torch.tensor(losses).double(),
    -torch.tensor([0.0, 0.01, 0.03, 0.06, 0.10, 0.15]).double(),
    what="the losses that are returned",
    rtol=1e-5,
    hint="one number a step, the loss before the update",
)


def first_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return 1 * logits[0, 0, 0]


def rows_read(generator: torch.Generator) -> Tensor:
    model, how = Spy(), {"steps": 5, "batch": 12, "loss_fn": first_logit, "rate_fn": lambda k: 0.0}
    train(model, source, target, **how, generator=generator)
    return torch.stack([sources[:, 0] for sources, _ in model.seen])


checks.uses_generator(rows_read, what="train")
assert len({tuple(sources[:, 0].tolist()) for sources, _ in spy.seen}) > 1, (
    "every step trains on the same rows: draw anew"
)
told, spy = [], Spy()
train(
    spy,
    source,
    target,
    steps=3,
    batch=2,
    loss_fn=first_logit,
    rate_fn=lambda k: 0.1,
    report=lambda k: told.append((k, round(float(spy.w.detach()[0]), 4))),
)
assert [k for k, _ in told] == [1, 2, 3], (
    f"report should be called with 1, 2, 3; yours was called with {[k for k, _ in told]}"
)
assert [w for _, w in told] == [-0.1, -0.2, -0.3], (
    f"report(k) comes after the update of step k: the parameter should then be −0.1, −0.2, −0.3; "
    f"it was {[w for _, w in told]}"
)
# Gradients of several sizes: with betas 0.9 and 0.98 the parameter moves to a place of its own;
# where gradients are as small as eps, eps shows.
for unit in (1.0, 1e-9):
    sizes = [1.0 * unit, -3.0 * unit, 2.0 * unit, 0.5 * unit]
    signs = iter(sizes)
    spy, m, v, place = Spy(), 0.0, 0.0, 0.0
    train(
        spy,
        source,
        target,
        steps=4,
        batch=1,
        loss_fn=lambda logits, labels, signs=signs: next(signs) * logits[0, 0, 0],
        rate_fn=lambda k: 0.1,
    )
    for k, s in enumerate(sizes, start=1):
        m, v = 0.9 * m + 0.1 * s, 0.98 * v + 0.02 * s * s
        place -= 0.1 * (m / (1 - 0.9**k)) / (math.sqrt(v / (1 - 0.98**k)) + 1e-9)
    checks.close(
        spy.w.detach()[0],
        torch.tensor(place).double(),
        what=f"a parameter after four steps with gradients 1, −3, 2, 0.5 times {unit:g}",
        rtol=1e-6,
        hint="Adam with betas 0.9 and 0.98 and eps 1e-9",
    )
### END HIDDEN TESTS

# %% [markdown]
# The second check lets your loop train PyTorch's Transformer, one layer each, on English dates and
# their Chinese, and then lets it write. The hidden part asks for 40 % of the held-out dates exact
# to the character. (A correct loop gets about 90 %, one that leaks the answer 0 %.)

# %% check="train" points=3
pairs, held_out = date_pairs(["zh"], 4000)
vocabulary = Vocabulary(pairs + held_out)
source, target = vocabulary.batch(pairs)
torch.manual_seed(checks.seed())
model = xavier(PyTorchTransformer(len(vocabulary), layers=1, d_ff=128)).to(profile.device)
losses = train(
    model,
    source,
    target,
    steps=220,
    batch=48,
    generator=checks.generator(12),
    rate_fn=lambda k: 0.005 * min(k / 40, (221 - k) / 180),
    loss_fn=lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=PAD
    ),
)
assert sum(losses[-20:]) < 0.5 * sum(losses[:20]), (
    f"the loss should fall by half; yours goes from {losses[0]:.2f} to {losses[-1]:.2f}"
)
### BEGIN HIDDEN TESTS
share = exact_match(model, *vocabulary.batch(held_out[:200]))
assert share >= 0.4, (
    f"{share:.0%} of the held-out dates are translated without an error, at least 40 % should be"
    + (
        ". The loss is low and the translations are wrong: does the model see the labels among "
        "its inputs?"
        if losses[-1] < 0.1
        else ""
    )
)
### END HIDDEN TESTS

# %% [markdown]
# ### The experiment: three languages, one model
#
# Now yours: your layers, your model, your loss, your loop. **Before you run it**, write down:
#
# 1. What is learned first: the form of a date (signs and spaces in the right places), the month, or
#    the digits of the year?
# 2. When the model writes the Chinese month, `3月`, at which English token does its cross-attention
#    look? And when it writes the weekday, `星期二`?
# 3. Most tokens of a date are right long before all of them are. What will BLEU, which counts
#    matching runs of tokens, say when exact match still says 10 %?

# %% tags=["experiment"]
languages = ["fr", "zh", "ar"]
pairs, held_out = date_pairs(languages, 5000)
vocabulary = Vocabulary(pairs + held_out)
source, target = vocabulary.batch(pairs)
random.Random(0).shuffle(held_out)
test_source, test_target = vocabulary.batch(held_out[:180])
by_kind = {"digit": [], "word": [], "sign or space": []}
snapshots, written = [], []


def look(step: int) -> None:
    """Every 25 steps: what the model writes, and the share of each kind of token that is right."""
    if step % 25:
        return
    output = greedy(model, test_source, test_target.shape[1])
    snapshots.append(step)
    written.append(output)
    with torch.no_grad():
        right = model(test_source, test_target[:, :-1]).argmax(-1) == test_target[:, 1:]
    kinds = [
        "digit" if t.isdigit() else "word" if len(t) > 1 else "sign or space"
        for t in vocabulary.tokens
    ]
    for kind, curve in by_kind.items():
        here = (
            torch.tensor([k == kind for k in kinds])[test_target[:, 1:].cpu()]
            & (test_target[:, 1:] > EOS).cpu()
        )
        curve.append(float(right.cpu()[here].float().mean()))


torch.manual_seed(0)
model = xavier(Transformer(len(vocabulary), d_model=64, heads=4, layers=2, d_ff=128)).to(
    profile.device
)
losses = train(
    model,
    source,
    target,
    steps=325,
    batch=48,
    generator=torch.Generator().manual_seed(0),
    report=look,
    loss_fn=smoothed_loss,
    rate_fn=lambda k: 0.3 * warmup_rate(k, 64, 100),
)
exact = [float((w == test_target).all(1).float().mean()) for w in written]
for language in languages:
    mine = [i for i, (s, _) in enumerate(held_out[:180]) if s[0] == f"<{language}>"]
    share = float((written[-1][mine] == test_target[mine]).all(1).float().mean())
    i = mine[0]
    print(
        f"{language}: {share:.0%} of {len(mine)} held-out dates exact.  "
        f"{''.join(held_out[i][0][1:])} → {''.join(vocabulary.text(written[-1][i]))}"
    )

# %% [markdown]
# ## Beam search
#
# Greedy decoding takes the best token at each step. The best *sentence* may start with the
# second-best token: with $p(a) = 0.6$, $p(b) = 0.4$, and then $p(\cdot\mid a)$ spread over ten
# continuations while $p(c \mid b) = 1$, greedy ends with probability 0.06 and $bc$ has 0.4. **Beam
# search** keeps the `beam` most likely beginnings alive instead of one.
#
# Two matters decide whether it works.
#
# **Finished hypotheses.** One that has ended leaves the beam and is kept aside. It is not extended,
# and it does not compete for a place among the living. Nor may it be thrown away because others
# live on.
#
# **Length.** Log-probabilities are at most 0, and every token adds one. Compared by their sums,
# short hypotheses win, and the shortest of all is the empty one. Divided by their length $L$ they
# compete fairly, perhaps too fairly. In between, Wu et al. (2016) divide by
#
# $$ \mathrm{lp}(L) = \Big(\frac{5 + L}{6}\Big)^{\alpha}, \qquad \mathrm{score} = \frac{\log p}{\mathrm{lp}(L)}, $$
#
# with $\alpha = 0$ the plain sum, $\alpha = 0.6$ in the paper of 2017. ($L$ counts the generated
# tokens, the end token included.)
#
# **When to stop.** A living hypothesis of log-probability $\ell \le 0$ can only lose: continued to
# length $L$ its score is at most $\ell/\mathrm{lp}(L) \le \ell/\mathrm{lp}(L_{\max})$. When even
# this is no better than the worst of `beam` finished ones, for all that live, nothing can change
# any more.


# %% exercise="beam_search" minutes=40 difficulty=3 path="more"
def beam_search(
    step_fn: Callable[[Tensor], Tensor],
    beam: int,
    length_penalty: float = 0.6,
    *,
    bos: int = 1,
    eos: int = 2,
    max_len: int = 32,
) -> list[tuple[tuple[int, ...], float]]:
    """The best finished sequences that a search with `beam` living hypotheses finds, best first.

    step_fn(prefixes): prefixes (n, t) int64, rows of `bos` and t − 1 generated tokens →
        log-probabilities (n, vocab) of the next token, −inf where it is impossible. Called once per
        length, with the living hypotheses only.

    Every living hypothesis is extended by every possible token. What ends with `eos` is finished,
    with the score log p / ((5 + L) / 6)^length_penalty, where L ≤ max_len counts the generated
    tokens, `eos` included. Of the rest the `beam` most likely live on. Among equals the earlier
    length goes first, then the earlier parent, then the smaller token. log p is summed in float64.
    beam ≥ 1, max_len ≥ 1, length_penalty ≥ 0.

    Returns up to `beam` pairs (tokens without bos, with eos; score), best first, and calls step_fn
    no more once no living one can beat the worst of `beam` finished ones, by the bound above.
    """

    ### BEGIN SOLUTION
    def penalty(length: int) -> float:
        return ((5 + length) / 6) ** length_penalty

    living: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for length in range(1, max_len + 1):
        prefixes = torch.tensor([(bos, *tokens) for tokens, _ in living])
        extended = []
        for (tokens, logp), row in zip(living, step_fn(prefixes).double().tolist(), strict=True):
            for token, step in enumerate(row):
                if token == eos and step > -math.inf:
                    finished.append(((*tokens, eos), (logp + step) / penalty(length)))
                elif step > -math.inf:
                    extended.append(((*tokens, token), logp + step))
        # Python's sort is stable: equals keep the order in which they came, parents first and then
        # tokens.
        finished = sorted(finished, key=lambda pair: -pair[1])[:beam]
        living = sorted(extended, key=lambda pair: -pair[1])[:beam]
        if not living or (
            len(finished) == beam and living[0][1] / penalty(max_len) <= finished[-1][1]
        ):
            break
    return finished
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two lists</summary>
#
# Keep `living` and `finished` as lists of (tokens, number). One round: extend all the living, sort
# what ended into `finished`, choose who lives on from the rest.
# </details>
#
# <details><summary>Hint: ties</summary>
#
# `torch.topk` promises no order among equals. Python's `sorted` keeps equals in the order in which
# they stood, and so does `torch.sort(..., stable=True)`. Which order do they stand in, if you go
# through the parents in order and through the tokens in order?
# </details>
#
# <details><summary>Hint: which number is compared with which</summary>
#
# The living compete by log p: they are all of one length. The finished compete by their score: they
# are not.
# </details>


# %% tags=["support"]
# Support: step functions from tables of probabilities


def automaton(
    table: dict[tuple[int, ...], dict[int, float]], vocab: int
) -> Callable[[Tensor], Tensor]:
    """A step_fn from {generated tokens: {next token: probability}}; the rest is impossible."""

    def step_fn(prefixes: Tensor) -> Tensor:
        rows = torch.full((len(prefixes), vocab), -math.inf, dtype=torch.float64)
        for row, prefix in zip(rows, prefixes.tolist(), strict=True):
            for token, p in table.get(tuple(prefix[1:]), {}).items():
                row[token] = math.log(p)
        return rows

    return step_fn


A, B, C, D = 3, 4, 5, 6  # tokens; 1 is <bos>, 2 is <eos>


def score_of(p: float, length: int, length_penalty: float) -> float:
    return math.log(p) / ((5 + length) / 6) ** length_penalty


# %% check="beam_search" points=2
garden = {
    (): {A: 0.6, B: 0.4},
    (A,): {C: 0.55, D: 0.45},
    (B,): {C: 1.0},
    (A, C): {2: 1.0},
    (A, D): {2: 1.0},
    (B, C): {2: 1.0},
}
found = beam_search(automaton(garden, 7), 2, 0.0)
assert isinstance(found, list), f"a list of (tokens, score) is asked for; yours is {found!r}"
assert found, "nothing was found"
assert found[0][0] == (B, C, 2), (
    f"the most likely sequence is (B, C, <eos>) with probability 0.4; yours starts with "
    f"{found[0][0]}" + (": this is the greedy one" if found[0][0] == (A, C, 2) else "")
)
checks.close(float(found[0][1]), math.log(0.4), what="its score without length penalty")
checks.close(
    float(beam_search(automaton(garden, 7), 2, 0.6)[0][1]),
    score_of(0.4, 3, 0.6),
    what="its score with length_penalty 0.6",
    mistakes={
        "dividing by the length to the power of 0.6": math.log(0.4) / 3**0.6,
        "not dividing at all": math.log(0.4),
        "leaving <eos> out of the length": score_of(0.4, 2, 0.6),
        "counting <bos>": score_of(0.4, 4, 0.6),
    },
)
### BEGIN HIDDEN TESTS
assert [tokens for tokens, _ in found] == [(B, C, 2), (A, C, 2)], (
    f"two results are due, (B, C, <eos>) and (A, C, <eos>); yours are {[t for t, _ in found]}"
)
assert [t for t, _ in beam_search(automaton(garden, 7), 1, 0.0)] == [(A, C, 2)], (
    "with beam 1 the search is greedy, and finds (A, C, <eos>)"
)
# Other ids for <bos> and <eos>; token 2 is then an ordinary one.
read = []


def renamed(prefixes: Tensor) -> Tensor:
    read.append(prefixes.clone())
    return automaton({(): {2: 0.6, 1: 0.4}, (2,): {0: 1.0}, (1,): {0: 1.0}}, 7)(prefixes)


found = beam_search(renamed, 2, 1.0, bos=5, eos=0, max_len=3)
assert [t for t, _ in found] == [(2, 0), (1, 0)], (
    f"with eos=0 the results are (2, 0) and (1, 0); yours are {[t for t, _ in found]}"
)
assert all(bool((prefixes[:, 0] == 5).all()) for prefixes in read), (
    "with bos=5 every prefix starts with 5"
)
# One that ends early and is best must survive while others live on: 0.5 against 0.5 · 0.9⁸.
patient = {(): {2: 0.5, A: 0.5}} | {
    (A,) * n: {A: 0.9, 2: 0.1} if n < 8 else {2: 1.0} for n in range(1, 9)
}
found = beam_search(automaton(patient, 7), 2, 0.0, max_len=12)
assert found[0][0] == (2,), (
    f"the empty sentence has probability 0.5, more than any other; the first result is "
    f"{found[0][0]}. Are finished ones kept while others live on?"
)
checks.close(
    float(found[1][1]),
    math.log(0.5 * 0.9**7),
    what="the second score of the patient automaton",
    hint="A eight times, then <eos>, has probability 0.5 · 0.9⁷",
)
# The length penalty turns the order round: long and likely against short.
turn = {
    (): {A: 0.7, 2: 0.3},
    (A,): {A: 1.0},
    (A, A): {A: 1.0},
    (A, A, A): {2: 0.4, B: 0.6},
    (A, A, A, B): {2: 1.0},
}
expected = {
    alpha: sorted(
        [
            (score_of(0.3, 1, alpha), (2,)),
            (score_of(0.28, 4, alpha), (A, A, A, 2)),
            (score_of(0.42, 5, alpha), (A, A, A, B, 2)),
        ],
        reverse=True,
    )
    for alpha in (0.0, 0.6, 1.0, 2.0)
}
for alpha, ranking in expected.items():
    found = beam_search(automaton(turn, 7), 3, alpha)
    assert [t for t, _ in found] == [t for _, t in ranking], (
        f"with length_penalty {alpha} the order is {[t for _, t in ranking]}; yours is "
        f"{[t for t, _ in found]}"
    )
    checks.close(
        torch.tensor([float(s) for _, s in found]).double(),
        torch.tensor([s for s, _ in ranking]).double(),
        what=f"the scores with length_penalty {alpha}",
    )
# Two that end on the way must not take places from the living: with beam 2 both A·A·… and B·B·… go
# on.
crowd = {
    (): {A: 0.5, B: 0.5},
    (A,): {2: 0.6, A: 0.4},
    (B,): {2: 0.6, B: 0.4},
    (A, A): {2: 1.0},
    (B, B): {C: 1.0},
    (B, B, C): {2: 1.0},
}
found = beam_search(automaton(crowd, 7), 2, 6.0)
assert [t for t, _ in found] == [(B, B, C, 2), (A, A, 2)], (
    f"with length_penalty 6 the two longest win: (B, B, C, <eos>) and (A, A, <eos>); yours are "
    f"{[t for t, _ in found]}. "
    "Finished hypotheses take no place from the living"
)
### END HIDDEN TESTS


# %% check="beam_search" points=3
def every_sequence(
    step_fn: Callable[[Tensor], Tensor], max_len: int, eos: int = 2
) -> list[tuple[tuple[int, ...], float]]:
    """All sequences that end within max_len tokens, with their log-probabilities."""
    ended, open_ones = [], [((), 0.0)]
    while open_ones:
        tokens, logp = open_ones.pop()
        if len(tokens) < max_len:
            for token, step in enumerate(step_fn(torch.tensor([(1, *tokens)]))[0].tolist()):
                if step > -math.inf:
                    (ended if token == eos else open_ones).append(((*tokens, token), logp + step))
    return ended


def draw_automaton(vocab: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Random transitions that depend on the last token and on the length."""
    tables = torch.randn(40, vocab, vocab, generator=generator, dtype=torch.float64) * 1.5
    tables = tables.log_softmax(-1)
    return lambda prefixes: tables[prefixes.shape[1], prefixes[:, -1]]


step_fn = draw_automaton(5, checks.generator(20))
likeliest, logp = max(
    every_sequence(step_fn, 4), key=lambda pair: pair[1] / ((5 + len(pair[0])) / 6) ** 0.6
)
found = beam_search(step_fn, 200, 0.6, max_len=4)  # wide enough to lose nothing
assert found[0][0] == likeliest, (
    f"with a beam of 200 nothing is lost: the best of all sequences is {likeliest}, "
    f"yours is {found[0][0]}"
)
### BEGIN HIDDEN TESTS
g = checks.generator(21)
for vocab, max_len, alpha in [(4, 5, 0.0), (5, 4, 1.0), (6, 3, 0.6), (4, 6, 2.5)]:
    step_fn = draw_automaton(vocab, g)
    ranked = sorted(
        ((lp / ((5 + len(t)) / 6) ** alpha, t) for t, lp in every_sequence(step_fn, max_len)),
        reverse=True,
    )
    wide = beam_search(step_fn, 1500, alpha, max_len=max_len)
    assert len(wide) == len(ranked), (
        f"{len(ranked)} sequences end within {max_len} tokens; a beam of 1500 should find all, "
        f"yours finds {len(wide)}"
    )
    assert [t for t, _ in wide] == [t for _, t in ranked], (
        f"a beam that loses nothing should rank all {len(ranked)} sequences as exhaustive search "
        f"does (length_penalty {alpha})"
    )
    checks.close(
        torch.tensor([float(s) for _, s in wide]).double(),
        torch.tensor([s for s, _ in ranked]).double(),
        what="their scores",
    )
# Where the next token does not depend on the last, the k best of each length have the k best
# beginnings: even a narrow beam is exact.
for vocab, max_len, alpha, beam in [(5, 5, 0.0, 2), (6, 4, 0.6, 4), (4, 6, 3.0, 3), (5, 5, 8.0, 1)]:
    table = torch.randn(40, vocab, generator=g, dtype=torch.float64).log_softmax(-1)
    step_fn = lambda prefixes, table=table: table[prefixes.shape[1]].expand(len(prefixes), -1)
    ranked = sorted(
        ((lp / ((5 + len(t)) / 6) ** alpha, t) for t, lp in every_sequence(step_fn, max_len)),
        reverse=True,
    )[:beam]
    narrow = beam_search(step_fn, beam, alpha, max_len=max_len)
    checks.close(
        torch.tensor([float(s) for _, s in narrow]).double(),
        torch.tensor([s for s, _ in ranked]).double(),
        what=f"the {beam} best scores where tokens are independent (length_penalty {alpha})",
        hint="here a beam of any width loses nothing",
    )
# Greedy search, written as a loop, is beam 1 as long as nothing but the end is finished.
for _ in range(5):
    inner = draw_automaton(6, g)

    def late_end(prefixes: Tensor, inner: Callable = inner) -> Tensor:
        rows = inner(prefixes).clone()
        rows[:, 2] = -math.inf if prefixes.shape[1] < 7 else 0.0
        return rows

    tokens, greedy_total = (), 0.0
    while not tokens or tokens[-1] != 2:
        row = late_end(torch.tensor([(1, *tokens)]))[0]
        tokens, greedy_total = (*tokens, int(row.argmax())), greedy_total + float(row.max())
    found = beam_search(late_end, 1, 0.0)
    assert found[0][0] == tokens, (
        f"with beam 1 the search is greedy, which gives {tokens}; yours is {found[0][0]}"
    )
    checks.close(float(found[0][1]), greedy_total, what="the score of the greedy sequence")
assert (
    beam_search(automaton({(): {A: 1.0}, (A,): {A: 1.0}, (A, A): {2: 1.0}}, 7), 2, 0.6, max_len=2)
    == []
), "what has not ended after max_len tokens is no result"
assert [
    t
    for t, _ in beam_search(
        automaton({(): {A: 1.0}, (A,): {A: 1.0}, (A, A): {2: 1.0}}, 7), 2, 0.6, max_len=3
    )
] == [(A, A, 2)], "a sequence of exactly max_len tokens is a result"
### END HIDDEN TESTS

# %% check="beam_search" points=1
# <eos>, A and B, over and over; sums are exact.
half = torch.full((7,), -math.inf).double()
half[[2, 3, 4]] = torch.tensor([-2.0, -1.0, -1.0]).double()
calls = []


def even(prefixes: Tensor) -> Tensor:
    calls.append(prefixes.clone())
    return half.expand(len(prefixes), -1)


found = beam_search(even, 3, 0.0, max_len=3)
order = [(2,), (A, 2), (B, 2)]
assert [t for t, _ in found] == order, (
    f"of equal scores the earlier comes first: {order}; yours are {[t for t, _ in found]}"
)


### BEGIN HIDDEN TESTS
def living_at_each_call(beam: int, alpha: float, max_len: int) -> list[list[tuple[int, ...]]]:
    calls.clear()
    beam_search(even, beam, alpha, max_len=max_len)
    return [[tuple(row[1:]) for row in prefixes.tolist()] for prefixes in calls]


steps = living_at_each_call(3, 5.0, 4)
assert steps[:4] == [
    [()],
    [(A,), (B,)],
    [(A, A), (A, B), (B, A)],
    [(A, A, A), (A, A, B), (A, B, A)],
], (
    f"of equally likely ones those of the earlier parent live on, then those with the smaller "
    f"token; step_fn was called with {steps[:4]}"
)
for prefixes in calls:
    assert len(prefixes) <= 3, f"step_fn was called with {len(prefixes)} hypotheses; the beam is 3"
    assert prefixes.dtype == torch.int64, f"prefixes are int64; yours are {prefixes.dtype}"
    assert bool((prefixes[:, 0] == 1).all()), "prefixes start with <bos>"
    assert not bool((prefixes == 2).any()), "a hypothesis that had ended was extended"
assert len(living_at_each_call(2, 5.0, 6)) == 6, "step_fn is called once per length"
assert [t for t, _ in beam_search(even, 4, 0.0, max_len=5)] == [(2,), (A, 2), (B, 2), (A, A, 2)], (
    "of equal scores the earlier parent comes first"
)
# Where <eos> is the largest id, the order of lengths is not that of ids.
found = beam_search(automaton({(): {6: 0.5, A: 0.5}, (A,): {6: 1.0}}, 7), 2, 0.0, eos=6)
assert [t for t, _ in found] == [(6,), (A, 6)], (
    f"of equal scores the earlier length comes first, whatever the ids: yours are "
    f"{[t for t, _ in found]}"
)
# B is likelier than A, so that its children stand first, among the living and among the finished.
sums = {(1,): {A: -2.0, B: -1.0}, (1, A): {C: -1.0}, (1, B): {C: -2.0}}
sums |= {(1, A, C): {2: -1.0}, (1, B, C): {2: -1.0}}


def sums_in_float64(prefixes: Tensor) -> Tensor:
    calls.append(prefixes.clone())
    rows = [[sums[tuple(row)].get(t, -math.inf) for t in range(7)] for row in prefixes.tolist()]
    return torch.tensor(rows)


calls.clear()
found = beam_search(sums_in_float64, 2, 0.0)
assert calls[2].tolist() == [[1, B, C], [1, A, C]], (
    f"of equally likely ones that of the earlier parent stands first; yours are {calls[2].tolist()}"
)
assert [t for t, _ in found] == [(B, C, 2), (A, C, 2)], (
    f"of equal scores that of the earlier parent comes first; yours are {[t for t, _ in found]}"
)
# Thirty float32 log-probabilities of −1/10.
tenth = torch.full((7,), -math.inf)
tenth[[A, 2]] = torch.tensor([-0.1, -50.0])
found = beam_search(lambda prefixes: tenth.expand(len(prefixes), -1), 1, 5.0, max_len=31)
assert found[0][0] == (A,) * 30 + (2,), f"the longest is the best here; yours is {found[0][0]}"
checks.close(
    float(found[0][1]),
    (30 * float(tenth[A]) - 50.0) / 6.0**5,
    what="the score of 31 tokens from log-probabilities in float32",
    rtol=1e-9,
    hint="log p is summed in float64",
)
### END HIDDEN TESTS

# %% check="beam_search" points=1
calls = 0


def soon_over(prefixes: Tensor) -> Tensor:
    global calls
    calls += 1
    return torch.tensor([0.0, 0.0, 0.98, 0.01, 0.01]).double().log().expand(len(prefixes), -1)


beam_search(soon_over, 1, 0.0, max_len=500)
assert calls <= 2, (
    f"after the first step the result is certain: <eos> has 0.98, and no other sequence can get "
    f"more than 0.02. step_fn was called {calls} times"
)
### BEGIN HIDDEN TESTS
calls = 0
found = beam_search(soon_over, 2, 1.0, max_len=30)
# All scores by hand: A or B n times and then <eos>. Two are finished after length 2; l / lp(30)
# bounds what lives.
assert calls < 8, (
    f"two are finished after two steps, and soon nothing can beat them; step_fn was called "
    f"{calls} times"
)
checks.close(
    float(found[1][1]),
    (math.log(0.01) + math.log(0.98)) / (7 / 6),
    what="the second score",
    mistakes={"no length penalty": math.log(0.0098)},
)
# With a large penalty a long one may still win: stopping at the first finished ones would miss it.
slow = {(): {2: 0.5, A: 0.5}} | {(A,) * n: {A: 1.0} for n in range(1, 9)} | {(A,) * 9: {2: 1.0}}
found = beam_search(automaton(slow, 7), 1, 1.0, max_len=12)
assert found[0][0] == (A,) * 9 + (2,), (
    f"divided by its length the long one wins, log 0.5 / 2.5 against log 0.5 / 1; yours is "
    f"{found[0][0]}. Is the search stopped too early?"
)
### END HIDDEN TESTS

# %% [markdown]
# ## Judging a translation: BLEU
#
# Exact match is fair to dates. A sentence has many right translations, and Papineni et al. (2002)
# proposed to count **n-grams**, runs of $n$ tokens, that a hypothesis shares with a reference.
# Three corrections make the count usable, and each is a usual mistake when left out:
#
# - **Clipping.** "the the the the" is made of words that all occur in "the cat is on the mat". An
#   n-gram counts at most as often as it stands in one reference (the one that has it most often).
# - **The corpus, not the mean.** For each $n = 1 \dots 4$ the clipped matches $m_n$ of all
#   sentences are added up, and so are the n-grams $t_n$ of all hypotheses; $p_n = m_n/t_n$. A mean
#   of sentence scores is another quantity, and for short sentences, whose $p_4$ is often 0, a
#   useless one.
# - **Brevity.** Precision punishes superfluous words and rewards silence. With $c$ the length of
#   all hypotheses and $r$ that of the references (for each sentence the reference *closest* in
#   length to the hypothesis, the shorter of two equally close),
#
# $$ \mathrm{BLEU} = 100 \cdot \mathrm{BP} \cdot \Big(\prod_{n=1}^4 p_n\Big)^{1/4}, \qquad \mathrm{BP} = \begin{cases} 1 & c \ge r \\ e^{1 - r/c} & c < r. \end{cases} $$
#
# The geometric mean is 0 as soon as one $p_n$ is. There are smoothings against that; here there is
# none.


# %% exercise="corpus_bleu" minutes=25 difficulty=2 path="more"
def corpus_bleu(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> float:
    """BLEU of a corpus, from 0 to 100: n-grams up to 4, unsmoothed.

    hypotheses: one list of tokens per sentence; references: per sentence one or more lists of
    tokens. ValueError where the two differ in number. 0.0 where any p_n is 0 or has no n-gram to
    count; hypotheses may be empty.
    """
    ### BEGIN SOLUTION
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses, but references for {len(references)}")

    def ngrams(tokens: Sequence[str], n: int) -> Counter:
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    matches, totals, ours, theirs = Counter(), Counter(), 0, 0
    for hypothesis, several in zip(hypotheses, references, strict=True):
        ours += len(hypothesis)
        theirs += min((abs(len(r) - len(hypothesis)), len(r)) for r in several)[1]
        for n in range(1, 5):
            mine, most = ngrams(hypothesis, n), Counter()
            for reference in several:
                most |= ngrams(reference, n)  # | of Counters: the larger count
            totals[n] += mine.total()
            matches[n] += (mine & most).total()  # &: the smaller
    if not all(matches[n] for n in range(1, 5)):
        return 0.0
    precision = math.exp(sum(math.log(matches[n] / totals[n]) for n in range(1, 5)) / 4)
    return 100 * precision * min(1.0, math.exp(1 - theirs / ours))
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: counting</summary>
#
# `collections.Counter` knows set operations on counts: `a & b` takes the smaller of each, `a | b`
# the larger. Tuples can be counted, lists cannot.
# </details>
#
# <details><summary>Hint: several references</summary>
#
# For the clipping, each n-gram has its own best reference. For the brevity, each sentence has one
# length.
# </details>

# %% tags=["support"]
# Support: a sentence
CAT = ["the", "cat", "is", "on", "the", "mat", "today"]

# %% check="corpus_bleu" points=1
reference = CAT
checks.close(
    corpus_bleu([reference], [[reference]]),
    100.0,
    what="the BLEU of a perfect translation",
    mistakes={"leaving out the factor 100": 1.0},
)
hypothesis = ["the", "cat", "is", "on", "the", "the", "the", "the"]
# matches: 5 of 8 words (the: at most 2), 4 of 7 pairs, 3 of 6 triples, 2 of 5 fours; it is longer
# than the reference
expected = 100 * (5 / 8 * 4 / 7 * 3 / 6 * 2 / 5) ** 0.25
checks.close(
    corpus_bleu([hypothesis], [[reference]]),
    expected,
    what="the BLEU of “the cat is on the the the the”",
    mistakes={
        "leaving out the clipping": 100 * (8 / 8 * 4 / 7 * 3 / 6 * 2 / 5) ** 0.25,
        "the arithmetic mean of the precisions": 25 * (5 / 8 + 4 / 7 + 3 / 6 + 2 / 5),
    },
)


### BEGIN HIDDEN TESTS
def slow_bleu(
    hypotheses: list, references: list, clip: bool = True, brevity: str = "closest"
) -> float:
    """By the definition, n-gram by n-gram, with mistakes on demand."""
    ours = sum(len(h) for h in hypotheses)
    pick = {
        "closest": lambda h, rs: sorted(rs, key=lambda r: (abs(len(r) - len(h)), len(r)))[0],
        "shortest": lambda h, rs: min(rs, key=len),
        "longest": lambda h, rs: max(rs, key=len),
        "none": lambda h, rs: [],
        "first": lambda h, rs: rs[0],
    }[brevity]
    theirs = sum(len(pick(h, rs)) for h, rs in zip(hypotheses, references, strict=True))
    product = 1.0
    for n in (1, 2, 3, 4):
        cut_up = lambda tokens, n=n: [
            " ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)
        ]
        match = total = 0
        for h, rs in zip(hypotheses, references, strict=True):
            pieces = cut_up(h)
            total += len(pieces)
            for piece in sorted(set(pieces)):
                allowed = max(cut_up(r).count(piece) for r in rs)
                match += min(
                    pieces.count(piece), allowed if clip else (len(pieces) if allowed else 0)
                )
        if match == 0:
            return 0.0
        product *= match / total
    return 100 * product**0.25 * (1.0 if ours >= theirs else math.exp(1 - theirs / ours))


# A mean of sentence scores differs; the second sentence, with no run of four, counts as well.
one, two = list("abcdef"), list("ghijk")
pair = ([one, list("ghxjk")], [[one], [two]])
checks.close(
    corpus_bleu(*pair),
    100 * (10 / 11 * 7 / 9 * 4 / 7 * 3 / 5) ** 0.25,
    what="the BLEU of two sentences",
    hint="matches and n-grams are added up over the corpus",
    mistakes={"a mean of sentence scores": 50.0, "summing the logarithms over sentences": 0.0},
)
# An n-gram is a run of tokens, not of characters: 12·3 is not 1·23.
for mine, right in (("12 3", "1 23"), ("a_b c", "a b_c")):
    mine, right = ([t.replace("_", " ") for t in text.split(" ")] for text in (mine, right))
    checks.close(
        corpus_bleu([[*mine, *"wxyz"]], [[[*right, *"wxyz"]]]),
        100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25,
        what=f"the BLEU of {mine} w x y z against {right} w x y z",
        hint="Compare runs of tokens, not strings glued from them",
    )
assert corpus_bleu([["a", "b", "c"]], [[["a", "b", "c"]]]) == 0.0, (
    "without any run of four tokens p₄ is 0, and so is the score"
)
assert corpus_bleu([[], []], [[["a"]], [["b"]]]) == 0.0, "empty hypotheses score 0"
checks.raises(
    ValueError, corpus_bleu, [["a"]], [], because="there is one hypothesis and no reference"
)
g = checks.generator(30)
for count, vocab, most in [(1, 2, 1), (6, 3, 1), (20, 4, 1), (12, 3, 3), (40, 8, 2)]:
    pick_tokens = lambda n, vocab=vocab: [
        f"w{t}" for t in torch.randint(vocab, (n,), generator=g).tolist()
    ]
    lengths = torch.randint(4, 12, (count, 5), generator=g).tolist()
    references = [
        [pick_tokens(n) for n in row[: int(torch.randint(1, most + 1, (), generator=g))]]
        for row in lengths
    ]
    # Hypotheses are references with words replaced and dropped, so that all n-grams match
    # sometimes; one is empty.
    hypotheses = []
    for several, row in zip(references, lengths, strict=True):
        base = [t if torch.rand((), generator=g) < 0.85 else pick_tokens(1)[0] for t in several[-1]]
        hypotheses.append(base + pick_tokens(row[4] - 9) if row[4] > 9 else base[: row[4]])
    if count > 6:
        hypotheses[3] = []
    expected = slow_bleu(hypotheses, references)
    mistakes = {
        "leaving out the clipping": slow_bleu(hypotheses, references, clip=False),
        "leaving out the brevity penalty": slow_bleu(hypotheses, references, brevity="none"),
    }
    before = repr((hypotheses, references))
    checks.close(
        corpus_bleu(hypotheses, references),
        expected,
        what=f"the BLEU of {count} sentences with up to {most} references",
        rtol=1e-9,
        mistakes={name: value for name, value in mistakes.items() if abs(value - expected) > 1e-3},
    )
    assert repr((hypotheses, references)) == before, "the hypotheses or references were changed"
### END HIDDEN TESTS

# %% check="corpus_bleu" points=1
short, reference = CAT[:5], CAT  # 5 of 7 words, all right
checks.close(
    corpus_bleu([short], [[reference]]),
    100 * math.exp(1 - 7 / 5),
    what="the BLEU of a translation that stops early",
    mistakes={
        "leaving out the brevity penalty": 100.0,
        "e^(1 − c/r)": 100 * math.exp(1 - 5 / 7),
        "c / r": 500 / 7,
    },
)
### BEGIN HIDDEN TESTS
six, four, nine = list("abcdef"), list("abcd"), list("abcdefghi")
# hypothesis of 6: the closest of 4 and 9 is 4, so no penalty; of 5 and 7 both are 1 away, and the
# shorter counts
checks.close(
    corpus_bleu([six], [[nine, four]]),
    100.0,
    what="the BLEU with references of 9 and 4 tokens for a hypothesis of 6",
    hint="the closest length is 4",
    mistakes={"brevity by the longest reference": 100 * math.exp(1 - 9 / 6)},
)
checks.close(
    corpus_bleu([six], [[list("abcdefg"), list("abcde")]]),
    100.0,
    what="the BLEU with references of 7 and 5 tokens for a hypothesis of 6",
    hint="of two equally close lengths the shorter counts",
    mistakes={"taking the longer of two equally close": 100 * math.exp(1 - 7 / 6)},
)
checks.close(
    corpus_bleu([six], [[four, list("abcdefg")]]),
    100 * math.exp(1 - 7 / 6),
    what="the BLEU with references of 4 and 7 tokens for a hypothesis of 6",
    hint="the closest length is 7",
    mistakes={"brevity by the shortest reference": 100.0},
)
# Over the corpus, not by sentence: one too short and one too long make up for each other.
long_one, short_one = list("abcdefgh"), list("ijklm")
together = corpus_bleu([[*long_one, "x"], short_one[:4]], [[long_one], [short_one]])
checks.close(
    together,
    100 * (12 / 13 * 10 / 11 * 8 / 9 * 6 / 7) ** 0.25,
    what="the BLEU of one sentence a word too long and one a word too short",
    hint="c and r are sums over the corpus; here c = r and nothing is taken off",
)
# An n-gram may find its count in one reference, another in another, but counts of two references do
# not add up.
checks.close(
    corpus_bleu([list("aabb")], [[list("aabz"), list("abbz")]]),
    0.0,
    what="the BLEU of aabb against aabz and abbz",
    hint="no run of four matches",
)
checks.close(
    corpus_bleu([list("abcda")], [[list("abcdx"), list("ybcda")]]),
    100 * (4 / 5 * 4 / 4 * 3 / 3 * 2 / 2) ** 0.25,
    what="the BLEU of abcda against abcdx and ybcda",
    mistakes={"adding up the counts of several references": 100.0},
)
### END HIDDEN TESTS

# %% [markdown]
# ### What came out
#
# The training above left snapshots of what the model wrote. Your BLEU and your beam search now read
# them. Compare with the three predictions that you wrote down.

# %% tags=["experiment", "figure"]
# Figure: what is learned when, and two judges
references = [[vocabulary.text(row)] for row in test_target]
bleu = [corpus_bleu([vocabulary.text(row) for row in w], references) for w in written]
fig, axes = plot.plt.subplots(1, 2, figsize=(11, 3.8))
plot.curves(
    snapshots,
    by_kind,
    xlabel="training step",
    ylabel="share right (teacher forcing)",
    title="what is learned when",
    ax=axes[0],
)
plot.curves(
    snapshots,
    {"BLEU / 100": [b / 100 for b in bleu], "exact match": exact},
    xlabel="training step",
    ylabel="score of what it writes",
    title="two judges of one model",
    ax=axes[1],
)
near = min(range(len(exact)), key=lambda i: abs(exact[i] - 0.1))
plot.caption(
    fig,
    "180 held-out dates in three languages. Left: each token predicted from the right tokens "
    "before it; a word is the name of a month or a weekday, a Chinese character counts as a sign. "
    f"Right: what the model writes on its own. At step {snapshots[near]}, {exact[near]:.0%} of the "
    f"dates are exact and BLEU is {bleu[near]:.0f}: it gives credit for every run of right tokens, "
    "and a date with one wrong digit is a wrong date.",
)
plot.plt.show()

# %% tags=["experiment", "figure"]
# Figure: where the model looks in the source, token by token as it writes
# Pinyin for the figure, which has to be readable without a Chinese font and without Chinese.
SOUNDS = [
    "nián (year)",
    "yuè (month)",
    "rì (day)",
    "xīng",
    "qī",
    "yī (1)",
    "èr (2)",
    "sān (3)",
    "sì (4)",
    "wǔ (5)",
    "liù (6)",
]
PINYIN = dict(zip("年月日星期一二三四五六", SOUNDS, strict=True))


def shown(tokens: Sequence[str]) -> list[str]:
    return [{" ": "␣"}.get(t, PINYIN.get(t, t)) for t in tokens]


@torch.no_grad()
def alignment(pair: tuple[list[str], list[str]]) -> tuple[Tensor, list[str], list[str]]:
    """The last decoder layer's cross-attention while the model writes, mean over heads."""
    source, _ = vocabulary.batch([pair])
    output = greedy(model, source, 18)
    output = output[:, : int((output[0] == EOS).nonzero()[0]) + 1]
    model(source, output[:, :-1])
    weights = model.decoder[-1].cross_attn.weights[0].mean(0)
    return weights, [vocabulary.tokens[i] for i in output[0, 1:]], [*pair[0], "<eos>"]


def full_style(language: str) -> tuple[list[str], list[str]]:
    """The first held-out date with a weekday that the model translates without an error."""
    ours = [pair for pair in held_out if pair[0][0] == f"<{language}>"]
    long = (pair for pair in ours if len(pair[0]) > 12)
    return next((pair for pair in long if alignment(pair)[1] == [*pair[1], "<eos>"]), ours[0])


fig, axes = plot.plt.subplots(1, 2, figsize=(12.5, 6.2))
for ax, language, title in zip(axes, ("fr", "zh"), ("into French", "into Chinese"), strict=True):
    weights, rows, columns = alignment(full_style(language))
    plot.heatmap(
        weights,
        xlabel="English source: what is looked at",
        ylabel="token that is being written",
        title=title,
        unit="weight",
        xticks=shown(columns),
        yticks=shown(rows),
        vmin=0,
        vmax=1,
        colorbar=language == "zh",
        ax=ax,
    )
plot.caption(
    fig,
    "Cross-attention of the last decoder layer, mean of four heads, while the model writes. A row "
    "is a token that is being written, its weights over the source sum to 1. Right panel: the year "
    "comes first, and the first four rows look to the source's end. In both, see which rows find "
    "their own digit or name, and where those of signs and spaces, which need little from the "
    "source, leave their weight.",
)
plot.plt.show()

# %% [markdown]
# Beam search needs a model that hesitates, so the next cell trains a fresh one for 140 steps only
# and lets it translate 40 held-out dates by beams of different widths, with and without length
# penalty. Before you run it: what will a wider beam do to exact match? And to the log-probability
# of what is found?

# %% tags=["experiment"]
torch.manual_seed(1)
young = xavier(Transformer(len(vocabulary), d_model=64, heads=4, layers=1, d_ff=128)).to(
    profile.device
)
train(
    young,
    source,
    target,
    steps=140,
    batch=64,
    generator=torch.Generator().manual_seed(1),
    loss_fn=smoothed_loss,
    rate_fn=lambda k: 0.3 * warmup_rate(k, 64, 80),
)


@torch.no_grad()
def beam_translate(
    model: nn.Module, source: Tensor, beam: int, length_penalty: float
) -> tuple[list[str], float]:
    """The best translation of one source (1, k_len), and its log-probability."""
    source = source[:, : int((source[0] == EOS).nonzero()[0]) + 1]
    memory = model.encode(source)

    def step_fn(prefixes: Tensor) -> Tensor:
        n = len(prefixes)
        logits = model.decode(
            prefixes.to(source.device), memory.expand(n, -1, -1), source.expand(n, -1)
        )[:, -1]
        logits[:, [PAD, BOS]] = -torch.inf
        return logits.log_softmax(-1)

    found = beam_search(step_fn, beam, length_penalty, max_len=18)
    if not found:
        return [], -math.inf
    tokens, score = found[0]
    return [vocabulary.tokens[i] for i in tokens[:-1]], score * (
        (5 + len(tokens)) / 6
    ) ** length_penalty


print(" beam  length penalty   exact   BLEU   mean log p of what is found")
for beam, alpha in ((1, 0.0), (2, 0.0), (4, 0.0), (4, 0.6), (4, 2.0)):
    outputs = [beam_translate(young, test_source[i : i + 1], beam, alpha) for i in range(40)]
    right = (
        sum(
            [tokens] == reference
            for (tokens, _), reference in zip(outputs, references[:40], strict=True)
        )
        / 40
    )
    mean = sum(logp for _, logp in outputs) / 40
    print(
        f"{beam:5d} {alpha:15.1f} {right:7.0%} "
        f"{corpus_bleu([t for t, _ in outputs], references[:40]):6.1f} {mean:12.2f}"
    )

# %% [markdown]
# What comes out is sobering, and typical. The log-probability of what is found rises a little from
# beam 1 to beam 2 and hardly after that; exact match moves by a few dates of forty, and forty dates
# cannot tell that from noise (near one half their standard deviation is three dates); and the
# length penalty changes next to nothing, because the length of a date is almost determined by its
# first tokens. Beam search pays where outputs are long, one good continuation exists, and early
# tokens mislead: translation and speech. In open-ended writing, where the most likely text is dull
# or empty, models sample instead (lesson 14).

# %% [markdown]
# ## Reading a config
#
# The encoder–decoder lost most of the market. One stack that reads and writes, trained on every
# token of any text, turned out to be the simplest thing to scale, and a chat has no natural point
# at which a source ends and a target begins. What has changed inside that stack between 2019 and
# 2024 can be read from six files. Below are the fields of the published `config.json` that decide
# the shape, with the published values, as Python dictionaries. (Two things are written out that
# GPT-2's file leaves to defaults: that the head is tied, and `n_inner`.)

# %%
CONFIGS = {
    "GPT-2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "tie_word_embeddings": True,
    },
    "LLaMA-7B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Llama-2-70B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "Mistral-7B": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
    },
}

# %% [markdown]
# What the fields say, part by part. $d$ is the width (`n_embd` or `hidden_size`), $d_h$ the width
# of a head ($d$ over the number of heads, unless the config has a field `head_dim`), $H$ and
# $H_{kv}$ the heads of queries and of keys and values (`num_key_value_heads`; where the field is
# missing, $H_{kv} = H$).
#
# | part | GPT-2 | LLaMA, Mistral, Mixtral | DeepSeek-V3 |
# |---|---|---|---|
# | positions | a learned table $(n_\text{positions}, d)$ | rotary: no parameters | rotary, in 64 of a head's 192 features |
# | biases | on every linear layer but the head | none | none |
# | norm | LayerNorm: scale and shift | RMSNorm: scale | RMSNorm: scale |
# | norms | 2 a layer, 1 at the end | the same | the same, and 2 more inside each attention |
# | attention | $q, k, v, o$, each $d \times d$ | $q, o$: $d \times H d_h$; $k, v$: $d \times H_{kv} d_h$ | MLA, below |
# | feed-forward | up, down: $d \times 4d$ (`n_inner`, if given) | **SwiGLU**: gate, up, down, each $d \times$ `intermediate_size` | the same |
# | experts | – | Mixtral: each layer has `num_local_experts` such feed-forward layers and a **router** $d \times$ experts | from layer `first_k_dense_replace` on: `n_routed_experts` of width `moe_intermediate_size`, `n_shared_experts` more through which every token goes, a router $d \times$ routed experts |
# | head | the embedding again (**tied**) | a matrix of its own | a matrix of its own |
#
# **MLA**, multi-head latent attention, the subject of lesson 10, here only its shapes. Keys and
# values are made from a short latent vector, and so are queries:
#
# | matrix | from | to |
# |---|---|---|
# | down for queries, then RMSNorm of this width | $d$ | `q_lora_rank` |
# | up for queries | `q_lora_rank` | $H \cdot$ (`qk_nope_head_dim` + `qk_rope_head_dim`) |
# | down for keys and values, RMSNorm over the first `kv_lora_rank` | $d$ | `kv_lora_rank` + `qk_rope_head_dim` |
# | up for keys and values | `kv_lora_rank` | $H \cdot$ (`qk_nope_head_dim` + `v_head_dim`) |
# | output | $H \cdot$ `v_head_dim` | $d$ |
#
# Where `q_lora_rank` is None (as in DeepSeek-V2-Lite) one matrix $d \to H\cdot(\dots)$ and no norm
# stand in place of the first two rows.
#
# Three of DeepSeek's fields that are easy to count wrongly. `num_nextn_predict_layers` describes a
# multi-token-prediction module of 11.5 billion further parameters that is used in training and left
# out of the model's 671 billion. The bias that balances its routing is adjusted by rule, not by
# gradient, and is no parameter. And `num_key_value_heads` says nothing here: MLA's latent is shared
# by all heads.
#
# **Active parameters** are those that one token meets: of the routed experts only the chosen ones,
# and everything else.


# %% exercise="count_parameters" minutes=40 difficulty=3
def count_parameters(config: dict, active: bool = False) -> dict[str, int]:
    """How many parameters a model has, by part, from its config alone.

    config: a dictionary like those in CONFIGS, of any size; model_type is gpt2, llama, mistral,
        mixtral or deepseek_v3 (ValueError otherwise). All fields that the tables above name for it
        are there, but head_dim and num_key_value_heads may be missing; n_inner and q_lora_rank may
        be None. first_k_dense_replace may exceed the number of layers: all are dense then.
    active: of the routed experts only the `num_experts_per_tok` that one token meets; all other
        parts count whole.

    Returns {"embedding", "attention", "ffn", "router", "norm", "head"} → int, whose sum is the
    total. embedding: of tokens and learned positions; attention: its matrices with their biases;
    ffn: feed-forward layers and experts, routed and shared, with biases; norm: all norms, those
    within MLA too; head: 0 where it is tied to the embedding.
    """
    ### BEGIN SOLUTION
    kind = config["model_type"]
    if kind not in ("gpt2", "llama", "mistral", "mixtral", "deepseek_v3"):
        raise ValueError(f"no rule for model_type {kind!r}")
    vocab = config["vocab_size"]
    if kind == "gpt2":
        d, layers = config["n_embd"], config["n_layer"]
        inner = config["n_inner"] or 4 * d
        return {
            "embedding": (vocab + config["n_positions"]) * d,
            "attention": layers * 4 * (d * d + d),
            "ffn": layers * (2 * d * inner + inner + d),
            "router": 0,
            "norm": (2 * layers + 1) * 2 * d,
            "head": 0 if config["tie_word_embeddings"] else vocab * d,
        }

    d, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    norm = (2 * layers + 1) * d
    if kind == "deepseek_v3":
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        value = config["v_head_dim"]
        q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
        queries = heads * (nope + rope)
        attention = d * queries if q_rank is None else d * q_rank + q_rank * queries
        attention += d * (kv_rank + rope) + kv_rank * heads * (nope + value) + heads * value * d
        norm += layers * ((q_rank or 0) + kv_rank)
        dense, experts = min(config["first_k_dense_replace"], layers), config["n_routed_experts"]
        met = (config["num_experts_per_tok"] if active else experts) + config["n_shared_experts"]
        ffn = (
            dense * 3 * d * config["intermediate_size"]
            + (layers - dense) * met * 3 * d * config["moe_intermediate_size"]
        )
        router = (layers - dense) * d * experts
    else:
        head_dim = config.get("head_dim") or d // heads
        attention = 2 * d * head_dim * (heads + config.get("num_key_value_heads", heads))
        ffn, router = layers * 3 * d * config["intermediate_size"], 0
        if kind == "mixtral":
            experts = config["num_local_experts"]
            ffn *= config["num_experts_per_tok"] if active else experts
            router = layers * d * experts
    head = 0 if config["tie_word_embeddings"] else vocab * d
    return {
        "embedding": vocab * d,
        "attention": layers * attention,
        "ffn": ffn,
        "router": router,
        "norm": norm,
        "head": head,
    }
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: off by how much?</summary>
#
# An exact count is a detective's job: the difference from the true total factors into what you
# forgot. Divide it by the number of layers, then by $d$.
# </details>
#
# <details><summary>Hint: three matrices</summary>
#
# SwiGLU has a gate. So has every expert.
# </details>
#
# <details><summary>Hint: the last norm</summary>
#
# A pre-norm stack needs one more norm after its last layer, before the head.
# </details>

# %% check="count_parameters" points=2
small = CONFIGS["GPT-2"] | {
    "vocab_size": 10,
    "n_positions": 6,
    "n_embd": 4,
    "n_layer": 1,
    "n_head": 2,
}
small_counts = count_parameters(small)
assert isinstance(small_counts, dict), (
    f"a dictionary of six parts is asked for; yours is {small_counts!r}"
)
assert set(small_counts) == {"embedding", "attention", "ffn", "router", "norm", "head"}, (
    f"a dictionary of six parts is asked for; yours has {sorted(small_counts)}"
)
checks.close(
    small_counts["embedding"],
    64,
    what="the embedding of a small GPT-2: 10 tokens and 6 positions of width 4",
    mistakes={"leaving out the positions": 40},
)
checks.close(
    small_counts["attention"],
    80,
    what="its attention: four matrices 4×4 with biases",
    mistakes={"leaving out the biases": 64},
)
checks.close(
    small_counts["ffn"],
    148,
    what="its feed-forward layer: 4×16 and 16×4 with biases",
    mistakes={"leaving out the biases": 128},
)
checks.close(
    small_counts["norm"],
    24,
    what="its norms: two in the layer and one at the end, with scale and shift",
    mistakes={"leaving out the shifts": 12, "leaving out the last norm": 16},
)
checks.close(
    small_counts["head"],
    0,
    what="its head, which is tied",
    mistakes={"counting the tied head twice": 40},
)


### BEGIN HIDDEN TESTS
def summed(config: dict, active: bool = False) -> int:
    return sum(count_parameters(config, active).values())


checks.close(
    summed(CONFIGS["GPT-2"]),
    124_439_808,
    what="GPT-2's parameters",
    mistakes={
        "counting the tied head twice": 124_439_808 + 50257 * 768,
        "forgetting the biases of the linear layers": 124_439_808 - 12 * 9 * 768,
        "forgetting the table of positions": 124_439_808 - 1024 * 768,
        "norms without shifts": 124_439_808 - 25 * 768,
    },
)
checks.close(
    summed(CONFIGS["LLaMA-7B"]),
    6_738_415_616,
    what="LLaMA-7B's parameters",
    mistakes={
        "tying the head": 6_738_415_616 - 32000 * 4096,
        "forgetting the gate of SwiGLU": 6_738_415_616 - 32 * 4096 * 11008,
        "forgetting the last norm": 6_738_415_616 - 4096,
        "counting shifts of RMSNorm": 6_738_415_616 + 65 * 4096,
    },
)
for vocab, positions, d, layers, inner, tied in [
    (11, 5, 6, 3, None, False),
    (50, 32, 12, 2, 30, True),
]:
    due_parts = [nn.Embedding(vocab, d), nn.Embedding(positions, d), nn.LayerNorm(d)]
    for _ in range(layers):
        due_parts += [
            nn.LayerNorm(d),
            nn.Linear(d, 3 * d),
            nn.Linear(d, d),
            nn.LayerNorm(d),
            nn.Linear(d, inner or 4 * d),
            nn.Linear(inner or 4 * d, d),
        ]
    due_parts += [] if tied else [nn.Linear(d, vocab, bias=False)]
    config = {
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": positions,
        "n_embd": d,
        "n_layer": layers,
        "n_head": 2,
        "n_inner": inner,
        "tie_word_embeddings": tied,
    }
    before = dict(config)
    checks.close(
        summed(config),
        sum(p.numel() for p in nn.ModuleList(due_parts).parameters()),
        what=f"the parameters of {config}",
        hint="built from nn.Linear, nn.LayerNorm and nn.Embedding, and counted",
    )
    checks.close(
        summed(config, active=True), summed(config), what="the active parameters of a dense model"
    )
    assert config == before, "the config was changed"
checks.raises(
    ValueError,
    count_parameters,
    {"model_type": "rwkv", "vocab_size": 10},
    because="there is no rule for this model_type",
)
### END HIDDEN TESTS

# %% check="count_parameters" points=2
mistral = count_parameters(CONFIGS["Mistral-7B"])
checks.close(
    mistral["attention"],
    32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
    what="the attention of Mistral-7B",
    mistakes={"as many heads for keys and values as for queries": 32 * 4 * 4096 * 4096},
)
checks.close(sum(mistral.values()), 7_241_732_096, what="Mistral-7B's parameters")
### BEGIN HIDDEN TESTS
checks.close(
    sum(count_parameters(CONFIGS["Llama-2-70B"]).values()),
    68_976_648_192,
    what="Llama-2-70B's parameters",
    mistakes={
        "as many heads for keys and values as for queries": 68_976_648_192
        + 80 * 2 * 8192 * 56 * 128
    },
)
for vocab, d, layers, heads, kv_heads, head_dim, inner, tied in [
    (13, 12, 2, 4, 2, None, 20, False),
    (9, 10, 3, 3, 1, 8, 7, True),
    (17, 16, 1, 4, None, None, 5, False),
]:
    hd, kv = head_dim or d // heads, kv_heads or heads
    due_parts = [nn.Embedding(vocab, d), nn.RMSNorm(d)]
    for _ in range(layers):
        due_parts += [nn.RMSNorm(d), nn.RMSNorm(d)]
        due_parts += [
            nn.Linear(a, b, bias=False)
            for a, b in (
                (d, heads * hd),
                (d, kv * hd),
                (d, kv * hd),
                (heads * hd, d),
                (d, inner),
                (d, inner),
                (inner, d),
            )
        ]
    due_parts += [] if tied else [nn.Linear(d, vocab, bias=False)]
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }
    config |= ({"head_dim": head_dim} if head_dim else {}) | (
        {"num_key_value_heads": kv_heads} if kv_heads else {}
    )
    checks.close(
        sum(count_parameters(config).values()),
        sum(p.numel() for p in nn.ModuleList(due_parts).parameters()),
        what=f"the parameters of {config}",
        hint="built from PyTorch's modules, and counted",
    )
### END HIDDEN TESTS

# %% check="count_parameters" points=3
mixtral = CONFIGS["Mixtral-8x7B"]
checks.close(
    sum(count_parameters(mixtral).values()),
    46_702_792_704,
    what="Mixtral-8x7B's parameters",
    mistakes={"forgetting the router": 46_702_792_704 - 32 * 8 * 4096},
)
checks.close(
    sum(count_parameters(mixtral, active=True).values()),
    12_879_925_248,
    what="the parameters of Mixtral-8x7B that a token meets",
    mistakes={
        "counting all experts": 46_702_792_704,
        "counting one expert, not two,": 12_879_925_248 - 32 * 3 * 4096 * 14336,
        "cutting the router down to the chosen experts": 12_879_925_248 - 32 * 6 * 4096,
    },
)


### BEGIN HIDDEN TESTS
def built_by_pytorch(config: dict, met: int) -> int:
    """A model of `met` routed experts a layer from PyTorch's modules, on the meta device (no
    memory), counted.
    """
    d, layers, heads, vocab = (
        config[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    linear = lambda i, o: nn.Linear(i, o, bias=False)
    swiglu = lambda inner: nn.ModuleList([linear(d, inner), linear(d, inner), linear(inner, d)])
    with torch.device("meta"):
        due_parts = nn.ModuleList([nn.Embedding(vocab, d), nn.RMSNorm(d)])
        if not config["tie_word_embeddings"]:
            due_parts.append(linear(d, vocab))
        for layer in range(layers):
            due_parts.extend([nn.RMSNorm(d), nn.RMSNorm(d)])
            if config["model_type"] == "mixtral":
                head_dim = d // heads
                due_parts.extend(
                    [
                        linear(d, d),
                        linear(d, config["num_key_value_heads"] * head_dim),
                        linear(d, config["num_key_value_heads"] * head_dim),
                        linear(d, d),
                    ]
                )
                due_parts.append(linear(d, config["num_local_experts"]))
                due_parts.extend(swiglu(config["intermediate_size"]) for _ in range(met))
                continue
            qk, v = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
            if config["q_lora_rank"] is None:
                due_parts.append(linear(d, heads * qk))
            else:
                due_parts.extend(
                    [
                        linear(d, config["q_lora_rank"]),
                        nn.RMSNorm(config["q_lora_rank"]),
                        linear(config["q_lora_rank"], heads * qk),
                    ]
                )
            due_parts.extend(
                [
                    linear(d, config["kv_lora_rank"] + config["qk_rope_head_dim"]),
                    nn.RMSNorm(config["kv_lora_rank"]),
                    linear(config["kv_lora_rank"], heads * (config["qk_nope_head_dim"] + v)),
                    linear(heads * v, d),
                ]
            )
            if layer < config["first_k_dense_replace"]:
                due_parts.append(swiglu(config["intermediate_size"]))
            else:
                due_parts.append(linear(d, config["n_routed_experts"]))
                due_parts.extend(
                    swiglu(config["moe_intermediate_size"])
                    for _ in range(met + config["n_shared_experts"])
                )
    return sum(p.numel() for p in due_parts.parameters())


deepseek = CONFIGS["DeepSeek-V3"]
expert, in_layers = 3 * 7168 * 2048, 58
for active, right in ((False, 671_026_404_352), (True, 37_552_282_624)):
    mistakes = {
        "forgetting the shared expert": right - in_layers * expert,
        "forgetting the router": right - in_layers * 256 * 7168,
        "counting the bias of the routing": right + in_layers * 256,
        "forgetting the norms inside MLA": right - 61 * 2048,
        "counting one more layer, the MTP head's,": right + expert * (257 if not active else 9),
        "experts in all layers, no dense ones,": right
        + 3 * (expert * (257 if not active else 9) + 256 * 7168 - 3 * 7168 * 18432),
    }
    checks.close(
        sum(count_parameters(deepseek, active).values()),
        right,
        what=f"DeepSeek-V3's {'active ' if active else ''}parameters",
        mistakes=mistakes,
    )
small = {
    "model_type": "deepseek_v3",
    "vocab_size": 19,
    "hidden_size": 10,
    "intermediate_size": 14,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 7,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
}
for changes in (
    {},
    {"q_lora_rank": None, "first_k_dense_replace": 0},
    {"n_shared_experts": 0, "tie_word_embeddings": False, "v_head_dim": 8},
    {"num_nextn_predict_layers": 0, "num_hidden_layers": 2},
    {"first_k_dense_replace": 9},
):
    config = small | changes
    for active in (False, True):
        expected = built_by_pytorch(
            config, config["num_experts_per_tok" if active else "n_routed_experts"]
        )
        checks.close(
            sum(count_parameters(config, active).values()),
            expected,
            what=f"the {'active ' if active else ''}parameters of a small DeepSeek with "
            f"{changes or 'one dense layer'}",
            hint="built from PyTorch's modules, and counted",
        )
config = mixtral | {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 9,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
}
for active in (False, True):
    checks.close(
        sum(count_parameters(config, active).values()),
        built_by_pytorch(config, 3 if active else 5),
        what=f"the {'active ' if active else ''}parameters of a small Mixtral",
    )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: parameters by part, total and active
names, totals = list(CONFIGS), [sum(count_parameters(c).values()) for c in CONFIGS.values()]
actives = [sum(count_parameters(c, active=True).values()) for c in CONFIGS.values()]
shades = {
    "embedding": "#0072B2",
    "attention": "#56B4E9",
    "ffn": "#E69F00",
    "router": "#000000",
    "norm": "#CC79A7",
    "head": "#009E73",
}
hatches = {"embedding": "", "attention": "//", "ffn": "", "router": "", "norm": "", "head": "xx"}
fig, axes = plot.plt.subplots(1, 2, figsize=(12, 3.9), width_ratios=(1.25, 1))
left = [0.0] * len(names)
for part, color in shades.items():
    shares = [
        100 * count_parameters(c)[part] / t for c, t in zip(CONFIGS.values(), totals, strict=True)
    ]
    axes[0].barh(
        names,
        shares,
        left=left,
        color=color,
        hatch=hatches[part],
        edgecolor="white",
        linewidth=0.6,
        label=part,
    )
    left = [a + b for a, b in zip(left, shares, strict=True)]
axes[0].set(xlabel="share of the parameters (%)", xlim=(0, 100))
axes[0].set_title("parameters by part")
axes[0].invert_yaxis()
axes[0].legend(
    ncols=6,
    loc="lower center",
    bbox_to_anchor=(0.45, -0.36),
    fontsize=8,
    handlelength=1.2,
    columnspacing=1.0,
)
rows = range(len(names))
axes[1].barh([r - 0.2 for r in rows], totals, height=0.38, color="#0072B2", label="total")
axes[1].barh(
    [r + 0.2 for r in rows],
    actives,
    height=0.38,
    color="#E69F00",
    hatch="//",
    edgecolor="white",
    label="met by one token",
)
for r, t, a in zip(rows, totals, actives, strict=True):
    axes[1].annotate(
        f"{t / 1e9:.3g} B" + (f", active {a / 1e9:.3g} B" if a != t else ""),
        (t, r),
        textcoords="offset points",
        xytext=(4, -3),
        fontsize=8,
    )
axes[1].set(
    xscale="log", xlabel="parameters", yticks=rows, yticklabels=[""] * len(names), xlim=(5e7, 3e13)
)
axes[1].set_title("total and active")
axes[1].invert_yaxis()
axes[1].legend(loc="upper right", fontsize=8)
plot.caption(
    fig,
    "Counted by your function. In GPT-2 nearly a third of the parameters is the table of tokens; "
    "in every larger model the feed-forward layers hold most of them, from Llama-2-70B on more "
    "than three quarters. Routers and norms are too few to be seen. Experts separate what a model "
    "holds from what a token costs.",
)
plot.plt.show()

# %% [markdown]
# On the title page DeepSeek-V3 has 37 billion active parameters. Your count says 37.6 with the
# table of tokens and 36.6 without it: a token reads one row of that table, and the arithmetic below
# leaves it out. Mixtral's paper says 13 billion, which fits both (12.9 and 12.7). When two counts
# of active parameters differ by about $V d$, this is why.

# %% [markdown]
# ## FLOPs of a token
#
# A product of a matrix $(o, i)$ with a vector is $o \cdot i$ multiplications and as many additions:
# **2 FLOPs per parameter**. So a model costs at least $2N$ FLOPs per token, $N$ the active
# parameters that stand in matrices (the table of tokens is a lookup and costs nothing, a tied head
# costs as any other).
#
# Attention adds products that have no parameters. Per layer and token, with $T$ keys: $q\cdot k$
# for $H$ heads of width $d_{qk}$ is $2 T H d_{qk}$, and $\sum_j w_j v_j$ is $2 T H d_v$. Grouped
# heads do not change this: they share keys, not products. A causal model needs only half of it,
# about $T/2$ keys on average, and an implementation that skips the hidden half saves it. The
# convention, in the PaLM paper as in PyTorch's counter, is to count the full square, as is done
# here.
#
# **Training.** For $y = W x$ the forward pass is one product. The backward pass has two:
# $\partial L/\partial x = W^\top\, \partial L/\partial y$ and
# $\partial L/\partial W = \partial L/\partial y\; x^\top$. They are of the same size, so backward
# costs twice forward, and training **three times** forward. In attention both factors are
# activations; each still gets its gradient by a product of the same size. With $2N$ forward, this
# is the $6N$ per token of the scaling laws.
#
# Norms, activations, softmax, rotations take no matrix product and are left out, as is usual in
# such counts.


# %% exercise="flops_per_token" minutes=25 difficulty=3 path="more"
def flops_per_token(config: dict, seq: int, training: bool = False) -> int:
    """FLOPs of the matrix products for one token, `seq` tokens going through the model at once.

    config: as for count_parameters.
    training: forward and backward together, nothing recomputed.

    2 FLOPs for a multiplication and an addition. Counted are: every linear layer that a token meets
    (router, shared and chosen experts, head, tied or not), without biases; and q·k and the weighted
    sum of values, in all heads, for all `seq` keys, whether a causal mask or a sliding window hides
    them or not. MLA is computed as in training: keys and values are made from the latent for every
    head, then attention is plain, with queries and keys of width qk_nope + qk_rope, values of
    v_head_dim. Lookups, norms, softmax, positions cost nothing. The MTP module is left out.
    """
    ### BEGIN SOLUTION
    kind = config["model_type"]
    if kind == "gpt2":
        d, layers, vocab = config["n_embd"], config["n_layer"], config["vocab_size"]
        weights = layers * (4 * d * d + 2 * d * (config["n_inner"] or 4 * d)) + vocab * d
        widths = layers * 2 * d  # of q·k and of the weighted sum, all heads together
    else:
        parts = count_parameters(config, active=True)
        d, heads = config["hidden_size"], config["num_attention_heads"]
        weights = parts["attention"] + parts["ffn"] + parts["router"] + config["vocab_size"] * d
        if kind == "deepseek_v3":
            width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
        else:
            width = 2 * (config.get("head_dim") or d // heads)
        widths = config["num_hidden_layers"] * heads * width
    forward = 2 * weights + 2 * widths * seq
    return 3 * forward if training else forward
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what your first function already knows</summary>
#
# `count_parameters(config, active=True)` has the weights of most matrices. Not all of its parts are
# matrices, one matrix is missing where the head is tied, and GPT-2's numbers hold biases.
# </details>

# %% [markdown]
# The check counts with PyTorch's own formulas for each operation, as `torch.utils.flop_counter`
# does, on the meta device: tensors with a shape and no content.

# %% tags=["support"]
# Support: a counter of FLOPs, and small configs


@checks.measured
class CountFlops(TorchDispatchMode):
    """Adds up the FLOPs of the products inside the block, as torch.utils.flop_counter has them."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.registry, self.total = flop_registry, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # spares two seconds of imports
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.registry:
            self.total += self.registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


TINY = {
    "model_type": "gpt2",
    "vocab_size": 10,
    "n_positions": 6,
    "n_embd": 4,
    "n_layer": 1,
    "n_head": 2,
    "n_inner": None,
    "tie_word_embeddings": True,
}
TINY_WEIGHTS = 4 * 16 + 2 * 64 + 40  # attention, feed-forward, head
GPT = TINY | {"vocab_size": 31, "n_embd": 12, "n_layer": 3, "n_head": 3}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


# %% check="flops_per_token" points=2
with torch.device("meta"), CountFlops() as counted:
    x, up, down = torch.empty(7, 4), nn.Linear(4, 16), nn.Linear(16, 4)
    down(up(x))
assert counted.total == 7 * 2 * 2 * 64, (
    "two products, 64 weights each, 7 tokens: 2 FLOPs per weight and token"
)
checks.close(
    flops_per_token(TINY, 5),
    2 * TINY_WEIGHTS + 2 * 2 * 5 * 4,
    what="the FLOPs of a token in a tiny GPT-2, 5 tokens at once",
    mistakes={
        "leaving out the products without parameters": 2 * TINY_WEIGHTS,
        "one FLOP for a multiplication and an addition": TINY_WEIGHTS + 2 * 5 * 4,
        "counting the visible half of the scores": 2 * TINY_WEIGHTS + 2 * 5 * 4,
        "leaving out the tied head": 2 * (TINY_WEIGHTS - 40) + 80,
        "counting biases": 2 * (TINY_WEIGHTS + 36) + 80,
        "multiplying by seq twice": 2 * TINY_WEIGHTS + 4 * 25 * 4,
    },
)


### BEGIN HIDDEN TESTS
def run_on_meta(config: dict, seq: int, training: bool) -> float:
    """FLOPs per token of a forward (and backward) pass of two sequences through a dense model,
    every product done and counted.
    """
    gpt2 = config["model_type"] == "gpt2"
    d, layers, heads = (
        config[k]
        for k in (
            ("n_embd", "n_layer", "n_head")
            if gpt2
            else ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
    )
    head_dim, kv_heads = (
        config.get("head_dim") or d // heads,
        config.get("num_key_value_heads", heads),
    )
    linear = lambda x, width: nn.Linear(x.shape[-1], width, bias=gpt2)(x)
    split = lambda x, n: linear(x, n * head_dim).unflatten(-1, (n, -1)).transpose(1, 2)
    with torch.device("meta"), CountFlops() as counted:
        x = torch.empty(2, seq, d, requires_grad=True)  # the embedding wants its gradient
        for _ in range(layers):
            q, k, v = (
                split(x, heads),
                split(x, kv_heads).repeat_interleave(heads // kv_heads, 1),
                split(x, kv_heads).repeat_interleave(heads // kv_heads, 1),
            )
            x = x + linear(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2), d)
            inner = config["n_inner"] or 4 * d if gpt2 else config["intermediate_size"]
            x = x + linear(linear(x, inner) if gpt2 else linear(x, inner) * linear(x, inner), d)
        logits = nn.Linear(d, config["vocab_size"], bias=False)(x)
        if training:
            logits.sum().backward()
    return counted.total / (2 * seq)


for config, seq in [
    (GPT, 8),
    (GPT | {"n_inner": 7, "tie_word_embeddings": False}, 3),
    (LLAMA, 9),
    (LLAMA | {"head_dim": 6, "tie_word_embeddings": True}, 5),
    (LLAMA | {"model_type": "mistral"}, 1),
    (LLAMA | {"model_type": "mistral", "sliding_window": 4}, 9),
]:
    expected = run_on_meta(config, seq, False)
    quadratic = run_on_meta(config, 2 * seq, False) - expected  # it alone depends on seq
    checks.close(
        flops_per_token(config, seq),
        round(expected),
        what=f"the FLOPs of a token, seq {seq}, {config}",
        mistakes={
            "leaving out the products without parameters": round(expected - quadratic),
            "one FLOP for a multiplication and an addition": round(expected / 2),
            "counting the visible half of the scores": round(expected - quadratic / 2),
        },
    )
# The published ones too: shapes without content fit any machine.
for name in ("GPT-2", "LLaMA-7B", "Mistral-7B"):
    checks.close(
        flops_per_token(CONFIGS[name], 1000),
        round(run_on_meta(CONFIGS[name], 1000, False)),
        what=f"the FLOPs of a token of {name} at 1000 tokens",
    )
### END HIDDEN TESTS

# %% check="flops_per_token" points=1
forward = 2 * TINY_WEIGHTS + 2 * 2 * 5 * 4
checks.close(
    flops_per_token(TINY, 5, training=True),
    3 * forward,
    what="the FLOPs of training on a token",
    mistakes={
        "a backward pass as dear as forward, or backward alone,": 2 * forward,
        "four times forward": 4 * forward,
        "the forward pass alone": forward,
    },
)


### BEGIN HIDDEN TESTS
def run_on_meta(config: dict, seq: int, training: bool) -> float:
    """FLOPs per token of a forward (and backward) pass of two sequences through a dense model,
    every product done and counted.
    """
    gpt2 = config["model_type"] == "gpt2"
    d, layers, heads = (
        config[k]
        for k in (
            ("n_embd", "n_layer", "n_head")
            if gpt2
            else ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
    )
    head_dim, kv_heads = (
        config.get("head_dim") or d // heads,
        config.get("num_key_value_heads", heads),
    )
    linear = lambda x, width: nn.Linear(x.shape[-1], width, bias=gpt2)(x)
    split = lambda x, n: linear(x, n * head_dim).unflatten(-1, (n, -1)).transpose(1, 2)
    with torch.device("meta"), CountFlops() as counted:
        x = torch.empty(2, seq, d, requires_grad=True)  # the embedding wants its gradient
        for _ in range(layers):
            q, k, v = (
                split(x, heads),
                split(x, kv_heads).repeat_interleave(heads // kv_heads, 1),
                split(x, kv_heads).repeat_interleave(heads // kv_heads, 1),
            )
            x = x + linear(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2), d)
            inner = config["n_inner"] or 4 * d if gpt2 else config["intermediate_size"]
            x = x + linear(linear(x, inner) if gpt2 else linear(x, inner) * linear(x, inner), d)
        logits = nn.Linear(d, config["vocab_size"], bias=False)(x)
        if training:
            logits.sum().backward()
    return counted.total / (2 * seq)


for config, seq in [(GPT, 6), (LLAMA, 7), (CONFIGS["GPT-2"], 100)]:
    checks.close(
        flops_per_token(config, seq, training=True),
        round(run_on_meta(config, seq, True)),
        what=f"the FLOPs of training on a token, seq {seq}, {config['model_type']}",
        hint="counted through .backward()",
    )
### END HIDDEN TESTS

# %% check="flops_per_token" points=2
mixtral = CONFIGS["Mixtral-8x7B"]
met = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 8 + 2 * 3 * 4096 * 14336) + 32000 * 4096
checks.close(
    flops_per_token(mixtral, 100),
    2 * met + 4 * 100 * 32 * 4096,
    what="the FLOPs of a token of Mixtral-8x7B, 100 at once",
    mistakes={
        "all eight experts": 2 * (met + 32 * 6 * 3 * 4096 * 14336) + 4 * 100 * 32 * 4096,
        "forgetting the router": 2 * (met - 32 * 4096 * 8) + 4 * 100 * 32 * 4096,
        "attention products for the heads of keys and values only": 2 * met + 4 * 100 * 32 * 1024,
    },
)


### BEGIN HIDDEN TESTS
def run_on_meta(config: dict, seq: int, training: bool) -> float:
    """FLOPs per token of a pass of two sequences through a model with experts, every product done
    and counted.
    """
    deepseek = config["model_type"] == "deepseek_v3"
    d, heads = config["hidden_size"], config["num_attention_heads"]
    linear = lambda x, width: nn.Linear(x.shape[-1], width, bias=False)(x)
    split = lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2)
    swiglu = lambda x, inner: linear(linear(x, inner) * linear(x, inner), d)

    def block(x: Tensor, layer: int) -> Tensor:
        if deepseek:
            nope, rope, value = (
                config["qk_nope_head_dim"],
                config["qk_rope_head_dim"],
                config["v_head_dim"],
            )
            q = split(
                linear(
                    x if config["q_lora_rank"] is None else linear(x, config["q_lora_rank"]),
                    heads * (nope + rope),
                ),
                heads,
            )
            latent, shared = linear(x, config["kv_lora_rank"] + rope).split(
                [config["kv_lora_rank"], rope], -1
            )
            k, v = split(linear(latent, heads * (nope + value)), heads).split([nope, value], -1)
            k = torch.cat([k, shared[:, None].expand(-1, heads, -1, -1)], -1)
        else:
            kv_heads = config["num_key_value_heads"]
            q = split(linear(x, d), heads)
            k, v = (
                split(linear(x, d // heads * kv_heads), kv_heads).repeat_interleave(
                    heads // kv_heads, 1
                )
                for _ in range(2)
            )
        x = x + linear(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2), d)
        if deepseek and layer < config["first_k_dense_replace"]:
            return x + swiglu(x, config["intermediate_size"])
        scores = linear(x, config["n_routed_experts" if deepseek else "num_local_experts"])
        inner = config["moe_intermediate_size" if deepseek else "intermediate_size"]
        met = config["num_experts_per_tok"] + (config["n_shared_experts"] if deepseek else 0)
        return x + scores.sum(-1, keepdim=True) * sum(
            swiglu(x, inner) for _ in range(met)
        )  # as many as a token meets

    with torch.device("meta"), CountFlops() as counted:
        x = torch.empty(2, seq, d, requires_grad=True)  # the embedding wants its gradient
        for layer in range(config["num_hidden_layers"]):
            x = block(x, layer)
        logits = linear(x, config["vocab_size"])
        if training:
            logits.sum().backward()
    return counted.total / (2 * seq)


small = {
    "model_type": "deepseek_v3",
    "vocab_size": 19,
    "hidden_size": 10,
    "intermediate_size": 14,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 7,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
few = mixtral | {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 9,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
}
for config, seq in [
    (small, 4),
    (small | {"q_lora_rank": None, "n_shared_experts": 2, "v_head_dim": 7}, 9),
    (few, 6),
]:
    for training in (False, True):
        checks.close(
            flops_per_token(config, seq, training),
            round(run_on_meta(config, seq, training)),
            what=f"the FLOPs of a token, {config['model_type']}, seq {seq}, "
            f"{'training' if training else 'forward'}",
        )
checks.close(
    flops_per_token(CONFIGS["DeepSeek-V3"], 500),
    round(run_on_meta(CONFIGS["DeepSeek-V3"], 500, False)),
    what="the FLOPs of a token of DeepSeek-V3 at 500 tokens",
)
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: share of the products without parameters
contexts = [2**n for n in range(9, 18)]
share = {
    name: [100 * (1 - flops_per_token(c, 0) / flops_per_token(c, n)) for n in contexts]
    for name, c in CONFIGS.items()
    if name not in ("LLaMA-7B", "Mixtral-8x7B")
}
ax = plot.curves(
    contexts,
    share,
    logx=True,
    xlabel="tokens in the sequence",
    ylabel="share of the FLOPs (%)",
    title="products without parameters: q·k and the weighted sum",
)
ax.set_ylim(0, 100)
plot.caption(
    ax.figure,
    "Computed by your function, the full square counted. 2N per token is a good rule for short "
    "contexts only. The share falls with the width of the feed-forward layers that "
    "stand beside attention; DeepSeek-V3, whose 128 heads are wide and whose active feed-forward "
    "layers are small, meets the square first among the large ones.",
)
plot.plt.show()

# %% [markdown]
# ### The families side by side
#
# Everything in the next table is computed from the configs. What a config does not say, because
# the model's name implies it, stands in the two dictionaries at the top of the cell: that is
# knowledge about `model_type`, the one field that points to code.

# %% tags=["experiment"]
NORM = {"gpt2": "LayerNorm, pre"} | dict.fromkeys(
    ("llama", "mistral", "mixtral", "deepseek_v3"), "RMSNorm, pre"
)
POSITION = (
    {"gpt2": "learned table"}
    | dict.fromkeys(("llama", "mistral", "mixtral"), "rotary")
    | {"deepseek_v3": "rotary, 64 of 192"}
)


def describe(config: dict) -> tuple[list[str], int]:
    """Size, norm, position, attention, feed-forward, head; and the numbers cached per token."""
    kind = config["model_type"]
    if kind == "gpt2":
        layers, heads, d = config["n_layer"], config["n_head"], config["n_embd"]
    else:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        d = config["hidden_size"]
    kv_heads = config.get("num_key_value_heads", heads)
    if "kv_lora_rank" in config:
        attention = f"MLA, {heads} heads, latent {config['kv_lora_rank']}"
        cached = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        shared = f"MHA, {heads}" if kv_heads == heads else f"GQA, {heads} over {kv_heads}"
        attention, cached = f"{shared} heads of {d // heads}", 2 * kv_heads * (d // heads)
    if config.get("sliding_window"):
        attention += f", window {config['sliding_window']}"
    if kind == "gpt2":
        ffn = f"GELU, {config['n_inner'] or 4 * d}"
    elif "num_experts_per_tok" in config:
        experts = config.get("num_local_experts") or config["n_routed_experts"]
        ffn = (
            f"SwiGLU, {config['num_experts_per_tok']} of {experts} × "
            f"{config.get('moe_intermediate_size', config['intermediate_size'])}"
        )
        if config.get("n_shared_experts"):
            shared, dense = config["n_shared_experts"], config["first_k_dense_replace"]
            ffn += f", {shared} shared; {dense} layers dense"
    else:
        ffn = f"SwiGLU, {config['intermediate_size']}"
    return [
        f"{layers} × {d}",
        NORM[kind],
        POSITION[kind],
        attention,
        ffn,
        "tied" if config["tie_word_embeddings"] else "separate",
    ], layers * cached


described = {name: describe(config) for name, config in CONFIGS.items()}
columns = ["model", "layers × width", "norm", "position", "attention", "feed-forward", "head"]
columns.append("cache, KiB a token (bfloat16)")
rows = [[name, *row, f"{2 * cached / 1024:.0f}"] for name, (row, cached) in described.items()]
lines = [columns, ["---"] * len(columns), *rows]
display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))

# %% [markdown]
# Five years in one table. The norm lost its mean and its shift, positions became rotations, the
# feed-forward layer got a gate and then experts, and most of the rest is the fight against the
# cache: with 128 heads and 61 layers DeepSeek-V3 keeps less per token than any of the others but
# GPT-2.

# %% [markdown]
# ## BERT's objective
#
# An encoder sees both ways, so it cannot learn by predicting the next token: it would look. BERT
# hides some tokens and asks for them. 15 % of the tokens are **selected**; the loss counts on these
# alone. If all became `[MASK]`, the encoder would see no text without it in pre-training, and none
# with it afterwards. So of the selected ones
#
# - 80 % become `[MASK]`,
# - 10 % become a random token: the encoder cannot trust even an ordinary-looking input,
# - 10 % stay as they are, and are still to be predicted: so a representation must be good at every
#   position.
#
# The price stands in the first line: a text of 512 tokens gives a decoder 511 predictions and an
# encoder 77.


# %% exercise="bert_mask" minutes=15 difficulty=2 path="more"
def bert_mask(
    tokens: Tensor,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator | None = None,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked language modeling.

    tokens: (batch, seq), int64.
    special_ids: [CLS], [SEP], padding …; these tokens are never selected.

    Each other token is selected with `probability`, independently. A selected token is replaced by
    mask_id with probability 0.8, by a token drawn evenly from all vocab_size ids with 0.1 (it may
    be special, mask_id, or the same one: so 0.8 + 0.1 / vocab_size of the selected end as mask_id),
    and stays with 0.1. All chance comes from `generator` (a CPU generator).

    Returns (inputs, labels), both like tokens: labels are the original token where selected and
    −100 elsewhere.
    """
    ### BEGIN SOLUTION
    shape, device = tokens.shape, tokens.device
    special = torch.isin(tokens, torch.tensor(list(special_ids)).to(tokens))
    chance, fate = (torch.rand(shape, generator=generator).to(device) for _ in range(2))
    anything = torch.randint(vocab_size, shape, generator=generator).to(device)
    selected = (chance < probability) & ~special
    inputs = tokens.masked_fill(selected & (fate < 0.8), mask_id)
    inputs = torch.where(selected & (fate >= 0.9), anything, inputs)
    return inputs, tokens.masked_fill(~selected, -100)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: three fates, one number</summary>
#
# One uniform number per token decides between the three. With two independent coins the second has
# to be tossed among what the first left over: half of the remaining 20 %, not a tenth.
# </details>

# %% check="bert_mask" points=1
CLS, SEP, MASK = 101, 102, 103
tokens = torch.tensor([[CLS, 7, 8, 9, 10, SEP, 0, 0]])
with checks.unchanged(tokens=tokens):
    result = bert_mask(tokens, [0, CLS, SEP], MASK, 1000, checks.generator(40), probability=1.0)
inputs, labels = checks.parts(result, "inputs", "labels")
checks.close(
    labels,
    torch.tensor([[-100, 7, 8, 9, 10, -100, -100, -100]]),
    what="the labels with probability 1",
    mistakes={
        "labels everywhere": tokens,
        "selecting special tokens": tokens,
        "−1 for what is not selected": torch.tensor([[-1, 7, 8, 9, 10, -1, -1, -1]]),
    },
)
checks.close(
    inputs[:, [0, 5, 6, 7]],
    tokens[:, [0, 5, 6, 7]],
    what="the special tokens among the inputs",
    hint="they are never masked",
)
### BEGIN HIDDEN TESTS
g = checks.generator(41)
tokens = torch.randint(0, 50, (40, 60), generator=g)
for special in ([0, 1, 2], [], [49, 17, 3, 8]):
    with checks.unchanged(tokens=tokens):
        inputs, labels = bert_mask(tokens, special, 4, 50, g, 0.4)
    assert inputs.dtype == labels.dtype == torch.int64, (
        f"inputs and labels are int64; yours are {inputs.dtype} and {labels.dtype}"
    )
    assert inputs.shape == labels.shape == tokens.shape, (
        f"inputs and labels have the shape of tokens; yours have {tuple(inputs.shape)} and "
        f"{tuple(labels.shape)}"
    )
    selected = labels != -100
    checks.close(
        labels[selected],
        tokens[selected],
        what="the labels of selected tokens",
        hint="the original tokens",
    )
    checks.close(
        inputs[~selected],
        tokens[~selected],
        what="the inputs that are not selected",
        hint="they stay as they are",
    )
    assert not any(bool((tokens[selected] == s).any()) for s in special), (
        "a special token was selected"
    )
    assert bool(selected.any()), "nothing was selected"
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 50, (
        f"inputs are ids from 0 to 49; yours go from {int(inputs.min())} to {int(inputs.max())}"
    )
untouched, nothing = bert_mask(tokens, list(range(50)), 4, 50, g)
assert torch.equal(untouched, tokens), "where every token is special the inputs are the tokens"
assert bool((nothing == -100).all()), "where every token is special nothing is selected"
assert bool((bert_mask(tokens, [], 4, 50, g, probability=0.0)[1] == -100).all()), (
    "with probability 0 nothing is selected"
)
checks.uses_generator(lambda g: bert_mask(tokens, [0], 4, 50, g), what="bert_mask")
### END HIDDEN TESTS


# %% check="bert_mask" points=2
def within(count: int, trials: int, p: float, what: str, hint: str = "") -> None:
    """Six standard deviations of a binomial count: chance fails it once in half a billion."""
    if abs(count - trials * p) > 6 * math.sqrt(trials * p * (1 - p)) + 1:
        raise AssertionError(
            f"{what}: {count / trials:.2%} of {trials}, it should be {p:.2%}. {hint}".strip()
        )


vocab = 5000
tokens = torch.randint(10, vocab, (200, 250), generator=checks.generator(42))
inputs, labels = bert_mask(tokens, range(10), 4, vocab, checks.generator(43))
selected = labels != -100
within(int(selected.sum()), tokens.numel(), 0.15, "selected tokens")
within(
    int((inputs[selected] == 4).sum()),
    int(selected.sum()),
    0.8 + 0.1 / vocab,
    "selected tokens that become [MASK]",
)
### BEGIN HIDDEN TESTS
n = int(selected.sum())
same, masked = inputs[selected] == tokens[selected], inputs[selected] == 4
within(
    int(same.sum()),
    n,
    0.1 + 0.1 / vocab,
    "selected tokens that stay",
    "Of the 20 % that are not masked one half stays, one half becomes random",
)
within(
    int((~same & ~masked).sum()),
    n,
    0.1 * (1 - 2 / vocab),
    "selected tokens that become another token",
    "Of the 20 % that are not masked one half stays, one half becomes random",
)
replaced = inputs[selected][~same & ~masked]
within(
    int((replaced < vocab // 2).sum()),
    len(replaced),
    0.5,
    "random tokens in the lower half of the vocabulary",
    "They are drawn from all ids, from 0 to vocab_size − 1",
)
# Special tokens do not change the rate among the others, and a rate may be any.
inputs, labels = bert_mask(tokens, range(vocab // 2), 4, vocab, checks.generator(44), 0.3)
ordinary = tokens >= vocab // 2
within(
    int((labels != -100).sum()),
    int(ordinary.sum()),
    0.3,
    "selected tokens among those that are not special",
)
replaced = inputs[(labels != -100) & (inputs != labels) & (inputs != 4)]
within(
    int((replaced < vocab // 2).sum()),
    len(replaced),
    0.5,
    "random tokens with special ids, where half of the ids are special",
    "They are drawn from all ids, special ones too",
)
# Selection is independent from row to row and from place to place: pairs of neighbors are selected
# with probability p².
selected = bert_mask(tokens, [], 4, vocab, checks.generator(45), 0.5)[1] != -100
for one, other, what in (
    (selected[:, :-1:2], selected[:, 1::2], "neighbors in a row"),
    (selected[:-1:2], selected[1::2], "the same place in two rows"),
):
    within(
        int((one & other).sum()),
        one.numel(),
        0.25,
        f"both selected, for {what}",
        "Each token is selected independently",
    )
# From call to call the number of selected tokens varies, and so does that of masked ones.
few, source = tokens[:1, :40], checks.generator(48)
for rate, due in ((0.3, 40 * 0.3 * 0.7), (1.0, 40 * 0.8 * 0.2)):
    drawn = [bert_mask(few, [], 4, vocab, source, rate) for _ in range(150)]
    numbers = [(labels != -100 if rate < 1 else inputs == 4).sum() for inputs, labels in drawn]
    variance = float(torch.stack(numbers).double().var())
    # A standard deviation of the variance is due · (2 / 149)^½.
    assert 0.3 * due < variance < 1.9 * due, (
        f"from call to call of 40 tokens the number of {'selected' if rate < 1 else 'masked'} ones "
        f"has a variance of {variance:.1f}, it should be {due:.1f}: each is decided independently"
    )
# Few ids: a token drawn evenly from 4 is the original one in a quarter of the cases, and the mask
# in another.
small = torch.randint(0, 3, (200, 250), generator=checks.generator(46))
inputs, labels = bert_mask(small, [], 3, 4, checks.generator(47), 0.5)
selected = labels != -100
within(
    int((inputs[selected] == small[selected]).sum()),
    int(selected.sum()),
    0.125,
    "selected tokens that stay, by decision or by chance, with 4 ids",
)
within(
    int((inputs[selected] == 3).sum()),
    int(selected.sum()),
    0.825,
    "selected tokens that are [MASK], by decision or by chance, with 4 ids",
)
### END HIDDEN TESTS

# %% [markdown]
# ## Key questions
#
# Asked in interviews. Those with a number or a choice are graded.


# %% exercise="model_numbers" minutes=18 difficulty=2 kind="questions"
def model_numbers() -> dict[str, float | str]:
    """Five short answers; numbers to 1 percent.

    "prefix":      a model reads 256 image patches and then 44 text tokens in one sequence. The
                   patches are a prefix that sees itself both ways; the text is causal. How many
                   True entries has the mask (300, 300)? (a whole number, exactly)
    "utilization": LLaMA-7B was trained on 1.0 trillion tokens; the paper reports 82,432 GPU-hours
                   on A100s, which reach at most 312 TFLOP/s in bfloat16. By the rule of 6N FLOPs
                   per token with N = 6.7 billion: which share (0 to 1) of the peak was used?
    "cache":       DeepSeek-V3 caches, per token and layer, one latent vector of kv_lora_rank
                   numbers and one rotary key of qk_rope_head_dim numbers, which all heads share.
                   How many bytes per token is that, over all layers, in bfloat16? (exactly)
    "masked":      a BERT batch holds 32 sequences of 512 tokens, of each 3 are special. How many
                   [MASK] tokens does a batch hold on average? (to a tenth of a percent)
    "leak":        a colleague's translation model has a training loss near 0 after 200 steps, a
                   validation loss near 0 as well, and what it writes is one token repeated. Most
                   likely "a" it has overfit; "b" beam search is missing a length penalty; "c"
                   labels are not shifted against the decoder's input; "d" the source is masked in
                   cross-attention.
    """
    ### BEGIN SOLUTION
    deepseek = CONFIGS["DeepSeek-V3"]
    cached = deepseek["kv_lora_rank"] + deepseek["qk_rope_head_dim"]
    return {
        "prefix": int(visibility("prefix", 256, 300).sum()),
        "utilization": 6 * 6.7e9 * 1.0e12 / (82_432 * 3600 * 312e12),
        "cache": deepseek["num_hidden_layers"] * cached * 2,
        "masked": 32 * (512 - 3) * 0.15 * 0.8,
        "leak": "c",
    }
    ### END SOLUTION


# %% check="model_numbers" points=1
answer = model_numbers()["prefix"]
checks.kind(answer, int, what="prefix")
### BEGIN HIDDEN TESTS
seen = sum(256 if i < 256 else i + 1 for i in range(300))
checks.number(
    answer,
    seen,
    to=0,
    what="prefix",
    hint="Every row sees the 256 patches; a text row sees the text up to itself as well",
    mistakes={
        "a causal mask over everything": 300 * 301 // 2,
        "everything visible": 90_000,
        "text that does not see the patches": 256 * 256 + 44 * 45 // 2,
        "a text token that does not see itself": seen - 44,
    },
)
### END HIDDEN TESTS

# %% check="model_numbers" points=1
answer = model_numbers()["utilization"]
checks.kind(answer, float, what="utilization")
### BEGIN HIDDEN TESTS
needed_seconds = 4.02e22 / 312e12
checks.number(
    answer,
    needed_seconds / (82_432 * 3600),
    what="utilization",
    hint="FLOPs needed over the FLOPs that all GPU-hours offer; a share lies between 0 and 1",
    mistakes={
        "2N, the forward pass alone,": needed_seconds / 3 / (82_432 * 3600),
        "hours taken for minutes": needed_seconds / (82_432 * 60),
        "a figure in percent": 100 * needed_seconds / (82_432 * 3600),
    },
)
### END HIDDEN TESTS

# %% check="model_numbers" points=1
answer = model_numbers()["cache"]
checks.kind(answer, int, what="cache")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    70_272,
    to=0,
    what="cache",
    hint="61 layers, 512 + 64 numbers, 2 bytes. With a key and a value for each of its 128 heads "
    "it would be 71 times as much",
    mistakes={
        "a key and a value for each of 128 heads": 61 * 128 * (192 + 128) * 2,
        "a latent for keys and one for values": 61 * (2 * 512 + 64) * 2,
        "numbers, not bytes": 35_136,
        "the latent alone": 61 * 512 * 2,
    },
)
### END HIDDEN TESTS

# %% check="model_numbers" points=1
answer = model_numbers()["masked"]
checks.kind(answer, float, what="masked")
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    32 * 509 * 12 / 100,
    to=1e-3,
    what="masked",
    hint="15 % are selected, and of these 80 % masked; special tokens never",
    mistakes={
        "all selected tokens": 32 * 509 * 0.15,
        "selecting among special tokens too": 32 * 512 * 0.12,
        "one sequence": 509 * 0.12,
    },
)
### END HIDDEN TESTS

# %% check="model_numbers" points=1
answer = model_numbers()["leak"]
assert answer in ("a", "b", "c", "d"), f"leak: one of 'a' to 'd'; yours is {answer!r}"
### BEGIN HIDDEN TESTS
assert str(answer) == "c", (
    "leak: overfitting would show in the validation loss, and without the source no loss could get "
    "near 0. Which mistake makes the loss small on data never seen, and generation worthless?"
)
### END HIDDEN TESTS

# %% [markdown]
# **Open question 1.** Why did decoder-only models win over encoder–decoders for general use,
# although an encoder–decoder reads its source both ways, with weights made for reading?

# %% [markdown] answer="why-decoder-only"
# Several reasons meet, and none alone decides. Every token of any text gives a loss, with no need
# to cut a text into source and target. A conversation grows at its end: a decoder keeps the cache
# of all that was said, while an encoder that sees both ways would have to read the whole source
# again when a turn is added. One stack puts all parameters to work on every token. In-context
# learning needs no distinction between task description, examples and answer. And causal reading
# costs less than one thinks: a position deep in the stack can still look back at everything, and
# the last token sees all of the prompt. At equal compute the T5 paper found the encoder–decoder
# ahead after fine-tuning with its denoising objective; what changed afterwards was the use,
# zero-shot and long dialogues, at least as much as the quality.

# %% [markdown]
# **Open question 2.** A config gives 46.7 billion parameters, 12.9 billion active. What do these
# two numbers predict about memory, about the speed of a single user's decoding, and about the speed
# of a large batch?

# %% [markdown] answer="total-and-active"
# Memory follows the total: all experts must be there, since any token may want any of them.
# Decoding for a single user reads from memory what one token meets, so its time follows the active
# count (12.9 B, two bytes each). In a large batch different tokens meet different experts, soon
# every expert is read in every step, and the time to read follows the total again; the arithmetic,
# however, follows the active count times the batch, so that once the step is bound by arithmetic,
# the sparse model is the cheaper one. Between the two there is a range of batch sizes in which a
# sparse model is slower than a dense one of its active size would be.

# %% [markdown]
# **Open question 3.** You need vectors for searching ten million documents. Somebody proposes the
# last hidden state of a decoder-only model with 7 billion parameters, somebody else an encoder with
# 100 million. What decides?

# %% [markdown] answer="which-encoder"
# What it costs to embed ten million documents once and each query at once (the factor of 70 in
# FLOPs per token), and how good the vectors are on one's own queries, which has to be measured, not
# argued. In a decoder only the last position has seen the whole text, so one takes that state (or a
# mean in which early positions know little), or removes the causal mask and trains on; an encoder's
# positions all see everything. Either needs contrastive training, as neither next-token nor masked
# prediction makes the distance between two vectors mean anything. A large decoder brings knowledge
# and long contexts; where queries are short and the domain is narrow the small encoder is often as
# good.

# %% [markdown]
# ## References, and what to read in them
#
# - **Vaswani et al. 2017**, *Attention Is All You Need*,
#   [arXiv:1706.03762](https://arxiv.org/abs/1706.03762). Section 3.1 is the post-norm frame, 3.4
#   the shared embedding and its $\sqrt d$, 5.3 the warm-up, 5.4 label smoothing, 6.1 beam 4 with
#   $\alpha = 0.6$.
# - **Devlin et al. 2018**, *BERT*, [arXiv:1810.04805](https://arxiv.org/abs/1810.04805). Section
#   3.1 and appendix C.2, where the 80/10/10 is varied.
# - **Raffel et al. 2019**, *T5*, [arXiv:1910.10683](https://arxiv.org/abs/1910.10683). Section 3.2:
#   encoder–decoder, decoder and prefix LM compared fairly; figures 3 and 4 are this lesson's first
#   figure.
# - **Radford et al. 2019**, *Language Models are Unsupervised Multitask Learners* (GPT-2), section
#   2.3; **Brown et al. 2020**, *GPT-3*, [arXiv:2005.14165](https://arxiv.org/abs/2005.14165), table
#   2.1.
# - **Touvron et al. 2023**, *LLaMA*, [arXiv:2302.13971](https://arxiv.org/abs/2302.13971), section
#   2.2 and table 15 for the GPU-hours; *Llama 2*,
#   [arXiv:2307.09288](https://arxiv.org/abs/2307.09288), appendix A.2.1 on grouped heads.
# - **Jiang et al.**, *Mistral 7B*, [arXiv:2310.06825](https://arxiv.org/abs/2310.06825), and
#   *Mixtral of Experts*, [arXiv:2401.04088](https://arxiv.org/abs/2401.04088): tables 1, the
#   configs.
# - **DeepSeek-AI 2024**, *DeepSeek-V3*, [arXiv:2412.19437](https://arxiv.org/abs/2412.19437),
#   sections 2.1 and 4.2.
# - **Gemini Team 2023**, *Gemini*, [arXiv:2312.11805](https://arxiv.org/abs/2312.11805), section 2;
#   **Alayrac et al. 2022**, *Flamingo*, [arXiv:2204.14198](https://arxiv.org/abs/2204.14198): the
#   two doors.
# - **Wu et al. 2016**, *Google's Neural Machine Translation System*,
#   [arXiv:1609.08144](https://arxiv.org/abs/1609.08144), section 7: the length penalty.
# - **Papineni et al. 2002**, *BLEU* (ACL), and **Post 2018**, *A Call for Clarity in Reporting BLEU
#   Scores*, [arXiv:1804.08771](https://arxiv.org/abs/1804.08771): why tokenization has to be fixed
#   before two scores may be compared; sacreBLEU came of it.
# - **Stahlberg and Byrne 2019**, *On NMT Search Errors and Model Errors: Cat Got Your Tongue?*,
#   [arXiv:1908.10090](https://arxiv.org/abs/1908.10090). The most likely translation of many
#   sentences, by exact search, is the empty one.
#
# In production: PyTorch's `torch/nn/modules/transformer.py`; Hugging Face transformers,
# `models/t5/modeling_t5.py` for an encoder–decoder, `models/llama/modeling_llama.py` for the block
# that most others vary, `models/deepseek_v3/modular_deepseek_v3.py`, and `generation/utils.py` for
# a beam search with all its options; `torch/utils/flop_counter.py`.
