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
#       Stacks that mix attention with recurrence, one cache for all of their layers, the arithmetic
#       of a million tokens, and attention that reads summaries first.
#     gpu: "Nothing more."
# ---

# %% [markdown]
# ## The problem: two memories, each bad at what the other does
#
# Attention keeps every key and value. It can return any one of them exactly, and it pays for that:
# memory grows with the text, and each new token reads all of it. A recurrent layer keeps a state of
# fixed size. Its cost per token never grows, and old things in it blur.
#
# A language model seldom needs the exact wording of something a hundred thousand tokens back. When
# it does (a name, a variable, a passkey) nothing but a lookup helps. So recent models take both:
# mostly cheap layers, and a few that can look anything up. Qwen3-Next, Kimi Linear, Jamba, Gemma 3
# and DeepSeek-V4 differ in what the cheap layers are and in how many expensive ones are left.
#
# This lesson builds such a stack. The layers are soon written. The harder part is that a model with
# three kinds of memory still has to decode from *one* cache, and that somebody has to add up its
# bytes before a million tokens arrive.

# %% [markdown]
# ## Core ideas
#
# - A **hybrid** model mixes layers whose memory grows with the text and layers whose memory does
#   not. The **layer pattern** says which is which.
# - A **full** layer attends to all earlier tokens. A **local** layer attends to the last few, its
#   **window**. A **recurrent** layer carries a state.
# - The **RG-LRU** is a recurrence with one number for each channel, whose decay depends on the
#   input.
# - One cache object serves all kinds of layers: keys for some, a window for others, states for the
#   rest.
# - **Native sparse attention** (NSA) reads averages of blocks, then the tokens of the best blocks,
#   and the last few tokens.
#
# | symbol | in code | is |
# |---|---|---|
# | $B$, $n$ | `batch`, `n` | texts, tokens |
# | $H$, $H_{kv}$, $D$ | `heads`, `kv_heads`, `head_dim` | query heads, key–value heads, head size |
# | $a_t$, $h_t$ | `a`, `h` | decay and state of a recurrent layer, one number a channel |
# | $w$ | `window` | tokens that a local layer sees, the newest included |
# | $l$ | `block` | tokens of a block |

# %%
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm40 import checks, data, models, plot
from llm40.distributed import launch
from llm40.models.llama import angles, rotate
from torch import Tensor, nn

plt = plot.plt
KINDS = ("full", "local", "recurrent")

# %% [markdown]
# ## Which layer is what
#
# Nearly all published hybrids repeat a period. Ratios are written both ways round, so read with
# care: Jamba's "1 : 7" counts attention first, Gemma's "5 : 1" counts it last.
#
# | model | period | in it |
# |---|--:|---|
# | Jamba | 8 | 1 full (the fifth), 7 Mamba |
# | Gemma 3 | 6 | 5 local, then 1 full |
# | Qwen3-Next | 4 | 3 gated delta rule, then 1 full |
# | Kimi Linear | 4 | 3 delta attention, then 1 full; the last layer is full too |


# %% exercise="layer_pattern" minutes=8 difficulty=1
def layer_pattern(
    layers: int, period: int, place: int, cheap: str, last: str | None = None
) -> list[str]:
    """The kind of each of `layers` ≥ 0 layers: "full" once in every period, else `cheap`.

    place: where in each period the full layer stands, from 0 to period − 1. The first period begins
        with layer 0; the last one may be cut off.
    last: if given, the kind of the very last layer, whatever the period says.
    ValueError unless 0 ≤ place < period.

    layer_pattern(7, 3, 2, "local") is
    ["local", "local", "full", "local", "local", "full", "local"].
    """
    ### BEGIN SOLUTION
    if not 0 <= place < period:
        raise ValueError(f"place {place} is not in a period of {period}")
    pattern = ["full" if layer % period == place else cheap for layer in range(layers)]
    if last is not None and pattern:
        pattern[-1] = last
    return pattern
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: counting within a period</summary>
#
# A layer's place in its period is the rest of its index divided by the period.
# </details>

# %% check="layer_pattern" points=1
answer = layer_pattern(7, 3, 2, "local")
assert answer == ["local", "local", "full", "local", "local", "full", "local"], (
    f"seven layers, the third of every three full: yours is {answer}"
)
### BEGIN HIDDEN TESTS
PATTERNS = {  # F: full, any other letter: the cheap kind
    (32, 8, 4, "mamba", None): "....F......." + "F.......F.......F...",
    (62, 6, 5, "local", None): ".....F" * 10 + "..",
    (48, 4, 3, "linear", None): "...F" * 12,
    (27, 4, 3, "linear", "full"): "...F" * 6 + "..F",
    (8, 4, 3, "linear", "linear"): "...F....",
    (3, 5, 0, "local", None): "F..",
    (2, 5, 4, "local", None): "..",
    (4, 1, 0, "local", None): "FFFF",
    (1, 2, 0, "local", "recurrent"): "r",
    (0, 2, 0, "local", "full"): "",
}
for (layers, period, place, cheap, last), letters in PATTERNS.items():
    names = {"F": "full", ".": cheap, "r": "recurrent"}
    expected = [names[letter] for letter in letters]
    answer = layer_pattern(layers, period, place, cheap, last)
    assert answer == expected, (
        f"layer_pattern({layers}, {period}, {place}, {cheap!r}, {last!r}) is {expected}, "
        f"yours {answer}"
    )
for period, place in ((4, 4), (4, -1), (1, 7)):
    checks.raises(
        ValueError, layer_pattern, 8, period, place, "local", because="place is not in the period"
    )
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: the layer patterns of six models
STACKS = {
    "Llama 3 8B": layer_pattern(32, 1, 0, ""),
    "Gemma 3 27B": layer_pattern(62, 6, 5, "local"),
    "Jamba 52B": layer_pattern(32, 8, 4, "recurrent"),
    "Griffin": ["local" if layer % 3 == 2 else "recurrent" for layer in range(26)],
    "Qwen3-Next 80B": layer_pattern(48, 4, 3, "recurrent"),
    "Kimi Linear 48B": layer_pattern(27, 4, 3, "recurrent", last="full"),
}
LOOKS = {"full": ("#1b3a57", ""), "local": ("#7fb2d9", "//"), "recurrent": ("#f2e6c9", "")}
fig, ax = plt.subplots(figsize=(10.5, 2.9))
for row, stack in enumerate(STACKS.values()):
    for layer, kind in enumerate(stack):
        color, hatch = LOOKS[kind]
        cell = plt.Rectangle((layer, row - 0.38), 0.92, 0.76, fc=color, hatch=hatch, ec="w", lw=0)
        ax.add_patch(cell)
ax.set(xlim=(0, 62), ylim=(len(STACKS) - 0.5, -0.5), xlabel="layer")
ax.set_yticks(range(len(STACKS)), list(STACKS))
ax.grid(visible=False)
handles = [plt.Rectangle((0, 0), 1, 1, fc=c, hatch=h, ec="w") for c, h in LOOKS.values()]
ax.legend(handles, LOOKS, loc="lower right", ncols=3)
plot.caption(
    fig,
    "Each cell is a layer. Dark: attention to everything. Striped: a window. Light: a recurrent "
    "state. Griffin has no layer that sees everything.",
)
plt.show()

# %% [markdown]
# ## A recurrent layer of one number a channel
#
# The **RG-LRU** of Griffin is the smallest gated recurrence in use. Each channel of the state
# decays by its own factor $a_t \in (0, 1)$ and takes in a gated input:
#
# $$r_t = \sigma(W_r x_t + b_r), \qquad i_t = \sigma(W_i x_t + b_i),$$
# $$a_t = \exp\big(-8\,\mathrm{softplus}(\lambda)\, r_t\big), \qquad
# h_t = a_t\, h_{t-1} + \sqrt{1 - a_t^2}\;(i_t\, x_t).$$
#
# All products are channel by channel. $\lambda$ is learned. Where $r_t \approx 0$ the state is kept
# ($a_t \approx 1$) and hardly anything is written; where $r_t \approx 1$ it decays as fast as the
# channel can. The gate works on the *logarithm* of the decay, so $a_t$ can come as near to 1 as a
# memory of thousands of tokens needs.
#
# **Why $\sqrt{1 - a^2}$?** Let state and input be independent with mean 0 and variance 1. Then the
# new state has variance $a^2 \cdot 1 + (1 - a^2) \cdot 1 = 1$, whatever $a$ is. A channel that
# remembers long does not grow, and one that forgets fast does not fade.
#
# Two details of the code: the paper prints the decay with $a = \sigma(\Lambda)$ and a softplus of
# $\Lambda$ at once, which do not go together; the published code is the formula above. And at the
# first token of a text there is no state to leave room for, so its input is not scaled.

# %% [markdown]
# ### Exercise · The RG-LRU
#
# The gates' matrices are block-diagonal: the channels are split into `heads` groups, and each group
# has a matrix of its own. That is `heads` times fewer weights than a full matrix.


# %% exercise="rg_lru" minutes=30 difficulty=2
class RGLRU(nn.Module):
    """The real-gated linear recurrent unit of Griffin, arXiv:2402.19427, as its code has it.

    Parameters, made in __init__ with these names and shapes (values are yours, but finite):
        decay: (width,), the λ of the formula.
        input_weight, recurrence_weight: (heads, width/heads, width/heads).
        input_bias, recurrence_bias: (heads, width/heads).
    W_i and b_i of the formula are input_weight and input_bias, W_r and b_r the other two. Channels
    c·width/heads … (c+1)·width/heads − 1 are head c. A gate's logits are x @ weight + bias within
    each head: weight[c, i, j] leads from channel i of the head to its channel j.
    """

    def __init__(self, width: int, heads: int) -> None:
        ### BEGIN SOLUTION
        super().__init__()
        size = width // heads
        self.decay = nn.Parameter(torch.linspace(-2.0, 4.0, width))
        for name in ("input", "recurrence"):
            weight = torch.randn(heads, size, size) / size**0.5
            setattr(self, f"{name}_weight", nn.Parameter(weight))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(heads, size)))
        ### END SOLUTION

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(h, state) for x (batch, n, width), n ≥ 1.

        h: (batch, n, width), of x's dtype: the states h_1 … h_n. state: (batch, width), the last of
        them in float32 (float64 for float64 input), in which gates and recurrence run.
        state given: that of the tokens before, as a former call returned it; unchanged. None: the
        text begins here; its first token is taken in as i_1 · x_1, without the factor √(1 − a²).
        All of it is differentiable, and finite where a rounds to 1 and where it rounds to 0.
        """
        ### BEGIN SOLUTION
        heads = self.input_bias.shape[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        split = x.to(wide).unflatten(-1, (heads, -1))

        def gate(name):
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            logits = torch.einsum("bnhi,hij->bnhj", split, weight.to(wide)) + bias
            return logits.flatten(2).sigmoid()

        log_a = -8 * F.softplus(self.decay.to(wide)) * gate("recurrence")
        a, taken = log_a.exp(), x.to(wide) * gate("input")
        # 1 − a² as −expm1(2 log a): exact near a = 1, and held off the root's endless slope at 0.
        scaled = taken * (-torch.expm1(2 * log_a)).clamp(min=1e-12).sqrt()
        states = []
        for t in range(x.shape[1]):
            state = taken[:, t] if state is None else a[:, t] * state.to(wide) + scaled[:, t]
            states.append(state)
        return torch.stack(states, dim=1).to(x.dtype), state
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: a gate for each head</summary>
#
# `x.unflatten(-1, (heads, -1))` has the shape (batch, n, heads, size). One `einsum` multiplies each
# head with its own matrix; `flatten(2)` joins the heads again.
# </details>
#
# <details><summary>Hint: a decay of almost 1</summary>
#
# `1 - a * a` loses its digits when a is 0.99999, and the slope of a root at 0 is infinite. You know
# log a: `torch.expm1` computes e^y − 1 for small y exactly. Then keep the root's argument off 0.
# </details>


# %% tags=["support"]
# Support: random values for a layer's parameters
def set_gates(layer: nn.Module, generator: torch.Generator) -> None:
    """Decays from slow to fast, gates of all strengths."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values - 2 if name == "decay" else values)


# %% check="rg_lru" points=2
# One channel with gates at ½: a = exp(−8 · softplus(λ) · ½). With softplus(λ) = ¼ that is e⁻¹.
unit = RGLRU(1, 1)
with torch.no_grad():
    for name, parameter in unit.named_parameters():
        parameter.fill_(math.log(math.expm1(0.25)) if name == "decay" else 0.0)
x = torch.tensor([[[2.0], [0.0], [4.0]]])
h, state = checks.parts(unit(x), "h", "state")
second = math.exp(-1)
third = math.exp(-2) + 2 * math.sqrt(1 - math.exp(-2))
checks.close(
    h,
    torch.tensor([[[1.0], [second], [third]]]),
    what="the states of 2, 0, 4 with both gates at ½",
    mistakes={
        "scaling the first token too": torch.tensor(
            [[[0.92987], [0.34208], [0.12585 + 2 * 0.92987]]]
        ),
    },
    rtol=1e-4,
)
checks.close(state, torch.tensor([[third]]), what="the last state", rtol=1e-4)


### BEGIN HIDDEN TESTS
def recur(layer: nn.Module, x: Tensor, state: Tensor | None = None) -> Tensor:
    """States (batch, n, width) in float64, number by number."""
    p = {name: value.detach().double().tolist() for name, value in layer.named_parameters()}
    batch, n, width = x.shape
    size = width // len(p["input_bias"])
    out = torch.zeros(batch, n, width, dtype=torch.float64)
    rows = x.detach().double().tolist()
    for b in range(batch):
        for c in range(width):
            head, j = divmod(c, size)
            h = None if state is None else float(state[b, c])
            for t in range(n):
                logits = {
                    gate: p[f"{gate}_bias"][head][j]
                    + sum(
                        rows[b][t][head * size + i] * p[f"{gate}_weight"][head][i][j]
                        for i in range(size)
                    )
                    for gate in ("input", "recurrence")
                }
                i_t, r_t = (1 / (1 + math.exp(-logits[g])) for g in ("input", "recurrence"))
                power = -8 * math.log1p(math.exp(p["decay"][c])) * r_t
                new = i_t * rows[b][t][c]
                h = (
                    new
                    if h is None
                    else math.exp(power) * h + math.sqrt(-math.expm1(2 * power)) * new
                )
                out[b, t, c] = h
    return out


g = checks.generator(1)
for batch, n, width, heads, dtype in [
    (2, 5, 6, 2, torch.float32),
    (3, 1, 8, 4, torch.float64),
    (1, 9, 3, 3, torch.float32),
    (2, 4, 6, 1, torch.float64),
]:
    layer = RGLRU(width, heads).to(dtype)
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    size = width // heads
    for name, shape in {
        "decay": (width,),
        "input_weight": (heads, size, size),
        "recurrence_weight": (heads, size, size),
        "input_bias": (heads, size),
        "recurrence_bias": (heads, size),
    }.items():
        assert shapes.get(name) == shape, f"{name} has the shape {shape}, yours {shapes.get(name)}"
    set_gates(layer, g)
    x = checks.randn(n, batch, width, generator=g).transpose(0, 1).to(dtype)
    with checks.unchanged(x=x):
        h, state = layer(x)
    expected = recur(layer, x)
    checks.close(
        h, expected.to(dtype), what="the states", rtol=1e-4 if dtype == torch.float32 else None
    )
    checks.close(state, expected[:, -1].to(dtype), what="the last state", rtol=1e-4)
    before = checks.randn(batch, width, generator=g).to(dtype)
    with checks.unchanged(state=before):
        h, state = layer(x, before)
    expected = recur(layer, x, before)
    checks.close(h, expected.to(dtype), what="the states after a given one", rtol=1e-4)
    checks.close(
        state, expected[:, -1].to(dtype), what="the last state after a given one", rtol=1e-4
    )
### END HIDDEN TESTS

# %% check="rg_lru" points=1
# A text in two parts gives the states of the whole.
layer = RGLRU(6, 2)
g = checks.generator(2)
set_gates(layer, g)
x = checks.randn(2, 7, 6, generator=g)
whole, end = layer(x)
first, state = layer(x[:, :3])
rest, state = layer(x[:, 3:], state)
checks.close(torch.cat([first, rest], dim=1), whole, what="the states of a text in two parts")
checks.close(state, end, what="the last state of a text in two parts")
### BEGIN HIDDEN TESTS
for dtype in (torch.bfloat16, torch.float16):
    half, kept = layer(x.to(dtype))
    assert half.dtype == dtype, f"h has x's dtype, {dtype}; yours is {half.dtype}"
    assert kept.dtype == torch.float32, f"the state of {dtype} is float32; yours is {kept.dtype}"
    exact, _ = layer(x.to(dtype).float())
    checks.close(half.float(), exact, what=f"the states for {dtype}", rtol=0.01)
    checks.close(kept, exact[:, -1], what=f"the last state for {dtype}", rtol=1e-5)
    again, _ = layer(x[:, :2].to(dtype), state)  # a state in float32 stays as exact as it is
    checks.close(again.float(), layer(x[:, :2].to(dtype).float(), state)[0], what="h", rtol=0.01)
# Gradients, by differences in float64.
layer = RGLRU(6, 3).double()
set_gates(layer, g)
x, before, weights = (
    checks.randn(*size, generator=g).double() for size in ((2, 4, 6), (2, 6), (2, 4, 6))
)
for first in (None, before):
    moving = [x.clone().requires_grad_(), *layer.parameters()]
    if first is not None:
        first = first.clone().requires_grad_()
        moving.append(first)
    h, state = layer(moving[0], first)
    grads = torch.autograd.grad((h * weights).sum() + state.sum(), moving)
    for t, grad in zip(moving, grads, strict=True):
        way, step = checks.randn(*t.shape, generator=g).double(), 1e-6
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                t.add_(sign * step * way)
                h, state = layer(moving[0], first)
                sides.append((h * weights).sum() + state.sum())
                t.sub_(sign * step * way)
        checks.close(
            (grad * way).sum(), (sides[0] - sides[1]) / (2 * step), what="a gradient", rtol=1e-5
        )
# Decays that round to 1 and to 0. With gates at ½ the input is halved.
layer = RGLRU(4, 2)
for decay in (-120.0, -40.0, 30.0, 200.0):
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(decay if name == "decay" else 0.0)
    x = checks.randn(1, 6, 4, generator=g).requires_grad_()
    layer.zero_grad()
    h, state = layer(x)
    expected = x.detach() / 2
    if decay < 0:
        expected = expected[:, :1].expand(1, 6, 4)  # the first token for ever, and nothing more
    checks.close(h, expected, what=f"states where λ is {decay:g}", atol=1e-5)
    (h.sum() + state.sum()).backward()
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        grad = parameter.grad
        finite = grad is not None and bool(grad.isfinite().all())
        assert finite, f"where λ is {decay:g}, the gradient of {name} is not finite"
### END HIDDEN TESTS

# %% [markdown]
# ## One cache for all layers
#
# A decoder of full layers has one rule: append keys and values, read them all. A hybrid has three.
#
# | layer | keeps | a new token reads |
# |---|---|---|
# | full | every key and value | all of them and its own |
# | local | the last $w - 1$ | those and its own: $w$ in all |
# | recurrent | a state | the state |
#
# Each is simple. What makes hybrids awkward in practice is what one does *to* a cache. Beam search
# reorders its rows: every tensor in it must follow, states too. Speculative decoding takes tokens
# back: a full layer's keys can be cut off, a state cannot, since $h_{t-1}$ is not in $h_t$ any
# more; nor does a local layer still hold what left its window. So an engine copies states and
# windows before it drafts. A prefix shared by two requests can be shared as keys at any length; as
# a state only at the lengths where somebody kept it.

# %% [markdown]
# ### Exercise · The cache


# %% exercise="hybrid_cache" minutes=35 difficulty=3
class HybridCache:
    """What the layers of a hybrid model keep of a batch of texts, all of the same length.

    kinds: for each layer "full", "local" or "recurrent"; ValueError for any other word.
    window: how many tokens a query of a local layer sees, itself included, ≥ 1.
    """

    def __init__(self, kinds: Sequence[str], window: int) -> None:
        ### BEGIN SOLUTION
        unknown = set(kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"a layer is one of {KINDS}, not {unknown}")
        self.kinds, self.window = tuple(kinds), window
        self.held = [None] * len(self.kinds)  # (keys, values, tokens seen), or a state
        ### END SOLUTION

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Takes in new ≥ 1 tokens of a full or local layer: (keys, values, start).

        k, v: (batch, kv_heads, new, head_dim), unchanged. keys and values are those that any of the
        new tokens sees, in order: the ones that were kept, then the new ones. start: the position
        in the text of the first of them. Afterwards a local layer keeps its last window − 1 tokens
        (fewer, if it has not seen so many), a full layer all. What is kept has no graph; the new
        keys and values that are returned have that of k and v.
        ValueError for a recurrent layer.
        """
        ### BEGIN SOLUTION
        if self.kinds[layer] == "recurrent":
            raise ValueError(f"layer {layer} is recurrent: it has no keys")
        seen = 0
        keys, values = k, v
        if self.held[layer] is not None:
            old_k, old_v, seen = self.held[layer]
            keys, values = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        start = seen + k.shape[2] - keys.shape[2]
        keep = keys.shape[2] if self.kinds[layer] == "full" else min(self.window - 1, keys.shape[2])
        first = keys.shape[2] - keep
        kept = (t[:, :, first:].detach().clone() for t in (keys, values))
        self.held[layer] = (*kept, seen + k.shape[2])
        return keys, values, start
        ### END SOLUTION

    def state(self, layer: int):
        """What `keep` was last given for this recurrent layer, or None. ValueError for others."""
        ### BEGIN SOLUTION
        if self.kinds[layer] != "recurrent":
            raise ValueError(f"layer {layer} is {self.kinds[layer]}: it has no state")
        return self.held[layer]
        ### END SOLUTION

    def keep(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """Keeps the state of a recurrent layer, a tuple of tensors (batch, …), without a graph.

        It takes the place of the one before. ValueError for another kind of layer.
        """
        ### BEGIN SOLUTION
        if self.kinds[layer] != "recurrent":
            raise ValueError(f"layer {layer} is {self.kinds[layer]}: it has no state")
        self.held[layer] = tuple(t.detach() for t in state)
        ### END SOLUTION

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row rows[b] was, in every layer. rows: (new batch,), int64.

        A row may be named more than once or not at all. A layer that holds nothing stays so.
        """
        ### BEGIN SOLUTION
        for layer, held in enumerate(self.held):
            if held is not None:
                self.held[layer] = tuple(t[rows] if isinstance(t, Tensor) else t for t in held)
        ### END SOLUTION

    def bytes(self) -> int:
        """The bytes of all numbers that are kept: keys, values and states."""
        ### BEGIN SOLUTION
        tensors = (t for held in self.held if held for t in held if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what the first of several new tokens sees</summary>
#
# Four new tokens and a window of 3: the first of them still sees the two tokens before it. So
# return what was kept together with all that is new, and cut only what you keep.
# </details>
#
# <details><summary>Hint: where the returned keys begin</summary>
#
# Count the tokens that a layer has seen. The last returned key is the newest token; the first one
# stands as many positions before it as there are keys.
# </details>

# %% check="hybrid_cache" points=2
# Keys are the positions themselves, so that one sees what is there.
cache = HybridCache(["full", "local", "recurrent"], window=3)


def numbers(first, count):
    return torch.arange(float(first), first + count).view(1, 1, count, 1)


for layer in (0, 1):
    cache.append(layer, numbers(0, 4), -numbers(0, 4))
keys, values, start = checks.parts(
    cache.append(1, numbers(4, 2), -numbers(4, 2)), "keys", "values", "start"
)
checks.close(
    keys.flatten(),
    torch.tensor([2.0, 3.0, 4.0, 5.0]),
    what="keys of a local layer with window 3, tokens 4 and 5 new",
    hint="Token 4 sees 2, 3 and itself",
    mistakes={
        "only what the newest token sees": torch.tensor([3.0, 4.0, 5.0]),
        "keeping a window, not a window less one": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
    },
)
checks.number(start, 2, what="start")
keys, _, start = cache.append(0, numbers(4, 2), -numbers(4, 2))
checks.close(keys.flatten(), torch.arange(6.0), what="keys of the full layer")
checks.number(start, 0, what="start of the full layer")
assert cache.state(2) is None, "a recurrent layer has no state at first: None"
checks.number(cache.bytes(), 4 * 2 * (6 + 2), what="bytes of 6 and 2 tokens of one float32")
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for window, parts, dtype in [
    (4, (3, 1, 5, 1, 2), torch.float32),
    (1, (2, 1, 3), torch.float64),
    (9, (2, 2, 1), torch.bfloat16),
    (2, (1, 1, 4, 1), torch.float32),
]:
    cache = HybridCache(("local", "recurrent", "full", "local"), window)
    n = sum(parts)
    whole = {
        layer: [
            checks.randn(n, 3, 2, 5, generator=g).to(dtype).permute(1, 2, 0, 3) for _ in range(2)
        ]
        for layer in (0, 2, 3)
    }
    for layer, (k, v) in whole.items():
        done = 0
        for size in parts[: -1 if layer == 3 else None]:  # the last layer is one step behind
            new = [t[:, :, done : done + size] for t in (k, v)]
            with checks.unchanged(k=new[0], v=new[1]):
                keys, values, start = cache.append(layer, *new)
            first = 0 if layer == 2 else max(0, done - window + 1)
            checks.number(start, first, what=f"start, window {window}, {done} tokens before")
            for got, t, name in ((keys, k, "keys"), (values, v, "values")):
                checks.close(
                    got,
                    t[:, :, first : done + size],
                    what=f"{name}, window {window}, {done} before",
                )
            done += size
    old = cache.append(0, whole[0][0][:, :, :1], whole[0][1][:, :, :1])[0]
    assert old.shape[2] == min(window, n + 1), f"a window of {window}: {old.shape[2]} keys"
    states = tuple(checks.randn(*shape, generator=g) for shape in ((3, 4, 2), (3, 7)))
    cache.keep(1, tuple(2 * t for t in states))
    cache.keep(1, states)
    size = torch.empty(0, dtype=dtype).element_size()
    locals_ = min(window - 1, n + 1) + min(window - 1, n - parts[-1])
    expected = 3 * 2 * 5 * 2 * size * (locals_ + n) + 4 * 3 * (8 + 7)
    checks.number(cache.bytes(), expected, what=f"bytes, window {window}, {n} tokens")
### END HIDDEN TESTS

# %% check="hybrid_cache" points=2
cache = HybridCache(["full", "recurrent", "local"], window=2)
rows = torch.tensor([[1.0], [2.0], [3.0]])
cache.keep(1, (rows,))
cache.reorder(torch.tensor([2, 0]))
checks.close(cache.state(1)[0], torch.tensor([[3.0], [1.0]]), what="a state after reorder([2, 0])")
checks.raises(
    ValueError,
    cache.append,
    1,
    rows[:, None, None],
    rows[:, None, None],
    because="layer 1 has no keys",
)
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for order in ([1, 1, 3, 0], [3, 2, 1, 0], [0], [2, 0, 2, 1, 3]):
    cache = HybridCache(["local", "full", "recurrent", "full"], window=3)
    k, v, more = (checks.randn(4, 2, size, 3, generator=g) for size in (5, 5, 1))
    state = checks.randn(4, 6, generator=g)
    for layer in (0, 1):
        cache.append(layer, k, v)
    cache.keep(2, (state, state[:, :2]))
    index = torch.tensor(order)
    with checks.unchanged(rows=index):
        cache.reorder(index)
    for layer, first in ((0, 3), (1, 0)):
        keys, values, start = cache.append(layer, more[index], -more[index])
        for got, t, new, name in ((keys, k, more, "keys"), (values, v, -more, "values")):
            expected = torch.cat([t[index, :, first:], new[index]], dim=2)
            checks.close(got, expected, what=f"{name} of layer {layer} after reorder({order})")
        checks.number(start, first, what=f"start after reorder({order})")
    for got, expected in zip(cache.state(2), (state, state[:, :2]), strict=True):
        checks.close(got, expected[index], what=f"a state after reorder({order})")
    keys, _, start = cache.append(3, more, more)  # a layer that held nothing
    assert (keys.shape[2], start) == (1, 0), "a layer that held nothing begins anew"
cache = HybridCache(["full", "local", "recurrent"], window=2)
grown = torch.ones(1, 1, 3, 2, requires_grad=True)
for layer in (0, 1):
    keys, values, _ = cache.append(layer, 2 * grown, 3 * grown)
    assert all(t.requires_grad for t in (keys, values)), "new keys and values keep their graph"
    keys, _, _ = cache.append(layer, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert not keys.requires_grad, "what is kept has no graph"
cache.keep(2, (2 * grown,))
assert not cache.state(2)[0].requires_grad, "a state that is kept has no graph"
for layer in (0, 1):
    checks.raises(ValueError, cache.state, layer, because="only a recurrent layer has a state")
    checks.raises(ValueError, cache.keep, layer, (grown,), because="only a recurrent layer has one")
checks.raises(ValueError, HybridCache, ["full", "linear"], 4, because="there is no kind `linear`")
### END HIDDEN TESTS

# %% [markdown]
# ### A model of any pattern
#
# The rest is assembled from parts that you know. The recurrent mixer is Griffin's: two branches,
# one through a short convolution and the RG-LRU, the other a gate. Its state is the last three
# inputs of the convolution and the recurrence's last state. Attention layers rotate keys by
# position (RoPE), and see what the cache hands them.


# %%
@dataclass(frozen=True)
class Stack:
    kinds: tuple[str, ...]
    vocab: int
    width: int = 32
    heads: int = 2
    window: int = 8

    @property
    def rope(self) -> models.Config:
        """The part of a configuration that rotation asks for."""
        return models.Config(
            vocab_size=self.vocab,
            hidden_size=self.width,
            layers=1,
            heads=self.heads,
            kv_heads=self.heads,
            mlp_size=self.width,
        )


class RecurrentMixer(nn.Module):
    def __init__(self, stack: Stack, make_recurrence) -> None:
        super().__init__()
        width = stack.width
        self.into, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.gate = nn.Linear(width, width)
        nn.init.ones_(self.gate.bias)  # open at first, so that the other branch is heard
        self.conv = nn.Conv1d(width, width, 4, groups=width)
        self.recurrence = make_recurrence(width, stack.heads)

    def forward(self, x: Tensor, cache: object, layer: int) -> Tensor:
        held = None if cache is None else cache.state(layer)
        into = self.into(x).mT
        before = into.new_zeros(*into.shape[:2], 3) if held is None else held[0]
        padded = torch.cat([before, into], dim=2)
        h, state = self.recurrence(self.conv(padded).mT, None if held is None else held[1])
        if cache is not None:
            cache.keep(layer, (padded[:, :, -3:], state))
        return self.out(h * F.gelu(self.gate(x)))


class AttentionMixer(nn.Module):
    def __init__(self, stack: Stack, kind: str) -> None:
        super().__init__()
        self.stack, self.window = stack, stack.window if kind == "local" else None
        self.q, self.k, self.v, self.out = (
            nn.Linear(stack.width, stack.width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, cache: object, layer: int, past: int) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.stack.heads, -1)).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        here = torch.arange(past, past + x.shape[1])
        cos, sin = angles(here, self.stack.rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        start = past
        if cache is not None:
            k, v, start = cache.append(layer, k, v)
        there = torch.arange(start, start + k.shape[2])
        seen = there <= here[:, None]
        if self.window is not None:
            seen &= there > here[:, None] - self.window
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(out.transpose(1, 2).flatten(2))


class HybridModel(nn.Module):
    """Logits (batch, n, vocab) of tokens (batch, n); with a cache, of the next n of a text."""

    def __init__(self, stack: Stack, make_recurrence) -> None:
        super().__init__()
        self.stack, width = stack, stack.width
        self.embed = nn.Embedding(stack.vocab, width)
        self.mixers = nn.ModuleList(
            RecurrentMixer(stack, make_recurrence)
            if kind == "recurrent"
            else AttentionMixer(stack, kind)
            for kind in stack.kinds
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in stack.kinds
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in stack.kinds)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, stack.vocab, bias=False)

    def forward(self, tokens: Tensor, cache: object = None, past: int = 0) -> Tensor:
        x = self.embed(tokens)
        for layer, (norm, mixer, mlp) in enumerate(
            zip(self.norms, self.mixers, self.mlps, strict=True)
        ):
            place = () if isinstance(mixer, RecurrentMixer) else (past,)
            x = x + mixer(norm(x), cache, layer, *place)
            x = x + mlp(x)
        return self.head(self.norm(x))


# %% tags=["support"]
# Support: a recurrence of another kind, so that the cache is tried without yours
class RunningMean(nn.Module):
    """h_t = (h_{t−1} + x_t) / 2, with the interface of RGLRU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()

    def forward(self, x, state=None):
        states = []
        for t in range(x.shape[1]):
            state = x[:, t] / 2 if state is None else (state + x[:, t]) / 2
            states.append(state)
        return torch.stack(states, dim=1), state


def decode(model: nn.Module, cache: object, tokens: Tensor, parts: Sequence[int]) -> Tensor:
    """Logits of all tokens, given to the model in parts."""
    logits, past = [], 0
    for size in parts:
        logits.append(model(tokens[:, past : past + size], cache, past))
        past += size
    return torch.cat(logits, dim=1)


# %% check="hybrid_cache" points=2
# Token by token equals all at once.
torch.manual_seed(5)
model = HybridModel(Stack(("recurrent", "local", "full"), vocab=20, window=3), RunningMean)
tokens = torch.randint(0, 20, (2, 9), generator=checks.generator(5))
with torch.no_grad():
    expected = model(tokens)
    cache = HybridCache(model.stack.kinds, model.stack.window)
    checks.close(
        decode(model, cache, tokens, [1] * 9), expected, what="logits, token by token", rtol=1e-4
    )
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for kinds, window in [
    (("local", "recurrent", "local", "full"), 4),
    (("recurrent", "recurrent"), 2),
    (("full", "local"), 1),
    (("local", "local", "local"), 5),
]:
    model = HybridModel(Stack(kinds, vocab=20, window=window), RunningMean)
    tokens = torch.randint(0, 20, (3, 14), generator=g)
    with torch.no_grad():
        expected = model(tokens)
        for parts in ([14], [5, 1, 1, 6, 1], [1, 12, 1]):
            cache = HybridCache(kinds, window)
            logits = decode(model, cache, tokens, parts)
            checks.close(logits, expected, what=f"logits of {kinds} in parts {parts}", rtol=1e-4)
        size = cache.bytes()
        more = torch.randint(0, 20, (3, 1), generator=g)
        model(more, cache, 14)
        grown = cache.bytes() - size
        checks.number(
            grown, 4 * 2 * 3 * 32 * kinds.count("full"), what=f"bytes for one more token, {kinds}"
        )
### END HIDDEN TESTS

# %% [markdown]
# ## A million tokens, in bytes
#
# What a hybrid saves can be added up before anything is built. A layer keeps, for each text,
#
# $$\text{numbers} = \underbrace{p \cdot \min\!\big(\lfloor n / s \rfloor, w\big)}_{\text{entries}}
# + \underbrace{c}_{\text{state}} ,$$
#
# for $n \ge 1$, with $p$ numbers for each entry, one entry for every $s$ whole tokens, at most $w$
# entries, and $c$ numbers whatever the length. A plain layer has $s = 1$ and no bound. DeepSeek-V4
# keeps a window of plain entries and, beside it, one averaged entry for every 4 or every 128
# tokens.


# %%
@dataclass(frozen=True)
class Layers:
    """`count` layers that keep the same."""

    count: int
    per_entry: int = 0  # numbers of an entry
    stride: int = 1  # whole tokens for each entry
    window: int | None = None  # entries at most, 1 or more
    state: int = 0  # numbers, whatever the length
    entry_bytes: float = 2  # bytes of a number of an entry
    state_bytes: float = 4  # bytes of a number of the state


# Keys and values: 2 · kv_heads · head_dim. MLA: latent 512 and 64 rotated; an indexer's key: 128.
# Mamba: a state of 16 and 3 inputs of a convolution for each of 8,192 channels. Gated delta rule:
# 32 heads of 128 × 128, and 3 inputs of the convolution of queries, keys and values.
MODELS = {
    "Llama 3 8B": (Layers(32, 2 * 8 * 128),),
    "Gemma 3 27B": (Layers(52, 2 * 16 * 128, window=1024), Layers(10, 2 * 16 * 128)),
    "Jamba 52B": (Layers(4, 2 * 8 * 128), Layers(28, state=8192 * (16 + 3))),
    "Qwen3-Next 80B": (
        Layers(12, 2 * 2 * 256),
        Layers(36, state=32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128)),
    ),
    "Kimi Linear 48B": (
        Layers(7, 512 + 64),
        Layers(20, state=32 * 128 * 128 + 3 * 3 * 32 * 128),
    ),
    "DeepSeek-V3.2": (Layers(61, 512 + 64 + 128),),
    "DeepSeek-V4-Flash": (
        Layers(43, 512, window=128),
        Layers(21, 512 + 128, stride=4),
        Layers(20, 512, stride=128),
    ),
}


# %% exercise="hybrid_cache_bytes" minutes=12 difficulty=1
def hybrid_cache_bytes(groups: Sequence[Layers], tokens: int, batch: int = 1) -> int:
    """Bytes of the cache of a model, a sequence of `Layers`, for texts of `tokens` ≥ 0 each.

    There are `batch` texts. An entry that would stand for tokens not all there is not kept. A state
    is kept from the first token on, and not before: 0 tokens take 0 bytes. The sum over all groups
    and texts is rounded up to a whole number of bytes, an int.

    One group of 3 layers, 10 numbers an entry, stride 4, window 5, state 7, 18 tokens, 2 texts: 4
    entries, so 2 · 3 · (10 · 4 · 2 + 7 · 4) = 648 bytes.
    """
    ### BEGIN SOLUTION
    total = 0.0
    for group in groups if tokens > 0 else ():
        entries = tokens // group.stride
        if group.window is not None:
            entries = min(entries, group.window)
        kept = group.per_entry * entries * group.entry_bytes + group.state * group.state_bytes
        total += group.count * kept
    return math.ceil(batch * total)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what depends on the length</summary>
#
# Entries do: whole strides, and at most a window of them. The state does not. Texts and layers
# multiply both.
# </details>

# %% check="hybrid_cache_bytes" points=2
group = Layers(3, 10, stride=4, window=5, state=7)
checks.number(
    hybrid_cache_bytes([group], 18, 2),
    648,
    what="the worked example",
    mistakes={
        "rounding entries up": 768,
        "a state for each token": 2 * 3 * (80 + 28 * 18),
        "one text": 324,
    },
)
### BEGIN HIDDEN TESTS
for groups, tokens, batch, expected in [
    ([group], 0, 2, 0),
    ([group], 3, 1, 3 * 28),
    ([group], 19, 1, 3 * (10 * 4 * 2 + 28)),
    ([group], 20, 1, 3 * (10 * 5 * 2 + 28)),
    ([group], 99, 3, 3 * 3 * (10 * 5 * 2 + 28)),
    ([group, Layers(2, 6, entry_bytes=1)], 20, 1, 3 * 128 + 2 * 6 * 20),
    ([Layers(1, 3, entry_bytes=0.5)], 3, 1, 5),
    ([Layers(1, 1, entry_bytes=0.5), Layers(1, 1, entry_bytes=0.5)], 1, 1, 1),
    ([Layers(1, 1, entry_bytes=0.5)], 1, 3, 2),
    ([Layers(5, state=11, state_bytes=2)], 1, 4, 4 * 5 * 22),
    ([Layers(5, state=11, state_bytes=2)], 10**6, 1, 110),
    ([Layers(2, 7, window=1)], 9, 1, 28),
    ([], 9, 1, 0),
    (MODELS["Llama 3 8B"], 2**20, 1, 137_438_953_472),
    (MODELS["DeepSeek-V3.2"], 2**20, 1, 90_060_095_488),
    (MODELS["DeepSeek-V4-Flash"], 2**20, 2, 2 * (5_636_096 + 7_046_430_720 + 167_772_160)),
    (MODELS["Gemma 3 27B"], 131_072, 1, 4096 * 2 * (52 * 1024 + 10 * 131_072)),
]:
    answer = hybrid_cache_bytes(groups, tokens, batch)
    checks.kind(answer, int, what="hybrid_cache_bytes")
    checks.number(answer, expected, what=f"{groups} with {tokens} tokens, batch {batch}")
### END HIDDEN TESTS

# %% tags=["experiment", "figure"]
# Figure: gigabytes of one text up to a million tokens
lengths = [2**i for i in range(8, 21)]
fig, axes = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1.5, 1])
for i, (name, groups) in enumerate(MODELS.items()):
    axes[0].plot(
        lengths,
        [hybrid_cache_bytes(groups, n) / 1e9 for n in lengths],
        label=name,
        marker="os^Dv*x"[i],
        markersize=4,
    )
axes[0].set_xscale("log", base=2)
axes[0].set_yscale("log")
axes[0].set(xlabel="tokens of one text", ylabel="GB")
axes[0].set_title("one text")
axes[0].legend(fontsize=8)
last = [hybrid_cache_bytes(groups, lengths[-1]) / 1e9 for groups in MODELS.values()]
axes[1].barh(list(MODELS), last, color=plot.COLORS[0])
axes[1].invert_yaxis()
axes[1].set_xscale("log")
axes[1].set_xlim(1, max(last) * 4)
axes[1].set(xlabel="GB at 1,048,576 tokens")
axes[1].grid(axis="y", visible=False)
for row, gigabytes in enumerate(last):
    axes[1].text(gigabytes * 1.1, row, f"{gigabytes:.1f}", va="center", fontsize=8)
plot.caption(
    fig,
    "Left: a recurrent part is a floor that short texts pay and long ones do not notice; a window "
    "bends the line. Right: what a million tokens take, keys in two bytes and states in four.",
)
plt.show()

# %% [markdown]
# Read the left end as well. At a few hundred tokens the hybrids with large states take *more* than
# Llama: 36 states of half a million numbers each are worth many tokens of a cache. A hybrid pays
# for long texts.

# %% [markdown]
# ## Reading summaries first
#
# The other way to a small bill keeps all tokens and reads few of them. **Native sparse attention**
# (DeepSeek, 2025) gives every query three looks at the text:
#
# 1. **Compressed**: each block of $l$ tokens becomes one key and one value. The query attends to
#    these summaries, coarsely and over everything.
# 2. **Selected**: the summaries that got most attention name the blocks whose tokens are read in
#    full.
# 3. **Sliding**: the last $w$ tokens, in full.
#
# Three gates between 0 and 1, made from the query's token, weigh the three results. The choice of
# blocks is made once for all query heads that share keys, so that a kernel loads each chosen block
# once for the whole group.
#
# The summaries are learned in the paper (a small network over the block, blocks of 32 every 16
# tokens); this lesson takes the plain mean and one block size for both uses, as the open
# implementation in flash-linear-attention does. The paper selects 16 blocks of 64 and a window of
# 512.

# %% [markdown]
# ### Exercise · The compressed branch


# %% exercise="compressed_attention" minutes=20 difficulty=2
def compressed_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Attention of n queries to the means of blocks that lie wholly behind them: (out, weights).

    q: (batch, heads, n, head_dim); k, v: (batch, kv_heads, n, head_dim), of one dtype. heads is a
    multiple of kv_heads: query heads 0 … heads/kv_heads − 1 read key–value head 0, and so on.
    Block j holds tokens j·block … (j + 1)·block − 1; tokens behind the last whole block belong to
    none. Its key and value are the means of its tokens' keys and values. The query at position t
    sees block j if the block's last token is at t or before it. Scores are divided by √head_dim.

    out: (batch, heads, n, head_dim); weights: (batch, heads, n, n // block), both of q's dtype: the
    softmax over the blocks that a query sees, 0 elsewhere. A query that sees no block has weights 0
    and out 0, and its gradients are finite. Inputs are unchanged.
    """
    ### BEGIN SOLUTION
    n, blocks = q.shape[2], q.shape[2] // block
    group = q.shape[1] // k.shape[1]

    def means(x):
        x = x[:, :, : blocks * block].unflatten(2, (blocks, block)).mean(3)
        return x.repeat_interleave(group, dim=1)

    keys, values = means(k), means(v)
    last = torch.arange(1, blocks + 1, device=q.device) * block - 1
    seen = last <= torch.arange(n, device=q.device)[:, None]
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
    # The softmax of a row without a block would be NaN: it gets scores of 0, then weights of 0.
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ values, weights
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: rows that see nothing</summary>
#
# The first block − 1 queries see no block, and a softmax over −∞ alone is NaN. Give such rows other
# scores before the softmax, and weights of 0 after it.
# </details>

# %% check="compressed_attention" points=2
# One head of size 1, blocks of 2. Keys are 0, so every seen block gets the same weight.
values = torch.tensor([1.0, 3.0, 10.0, 20.0, 100.0]).view(1, 1, 5, 1)
zeros = torch.zeros(1, 1, 5, 1)
out, weights = checks.parts(compressed_attention(zeros, zeros, values, 2), "out", "weights")
checks.close(
    out.flatten(),
    torch.tensor([0.0, 2.0, 2.0, 8.5, 8.5]),
    what="means of the blocks [1, 3] and [10, 20] that lie behind each query",
    mistakes={
        "a block that is not over yet": torch.tensor([2.0, 2.0, 8.5, 8.5, 8.5]),
        "only blocks that end before the query": torch.tensor([0.0, 0.0, 2.0, 2.0, 8.5]),
    },
)
checks.close(weights[0, 0, 3], torch.tensor([0.5, 0.5]), what="the weights of the query at 3")
### BEGIN HIDDEN TESTS
g = checks.generator(7)
for batch, heads, kv_heads, n, d, block in [
    (2, 4, 2, 11, 8, 3),
    (1, 6, 2, 16, 4, 4),
    (3, 2, 1, 7, 16, 1),
    (2, 3, 3, 5, 8, 9),
    (1, 2, 2, 6, 4, 6),
]:
    q = checks.randn(batch, n, heads, d, generator=g).transpose(1, 2)
    k, v = (checks.randn(kv_heads, batch, n, d, generator=g).transpose(0, 1) for _ in range(2))
    with checks.unchanged(q=q, k=k, v=v):
        out, weights = compressed_attention(q, k, v, block)
    blocks = n // block
    assert weights.shape == (batch, heads, n, blocks), f"weights have shape {tuple(weights.shape)}"
    expected_out = torch.zeros(batch, heads, n, d, dtype=torch.float64)
    expected = torch.zeros(batch, heads, n, blocks, dtype=torch.float64)
    for head in range(heads):
        kv = head * kv_heads // heads
        for t in range(n):
            count = (t + 1) // block
            if count == 0:
                continue
            parts = [slice(j * block, (j + 1) * block) for j in range(count)]
            keys = torch.stack([k[:, kv, part].double().mean(1) for part in parts], dim=1)
            means = torch.stack([v[:, kv, part].double().mean(1) for part in parts], dim=1)
            scores = (keys * q[:, head, t, None].double()).sum(-1) / d**0.5
            expected[:, head, t, :count] = scores.softmax(-1)
            expected_out[:, head, t] = (scores.softmax(-1)[..., None] * means).sum(1)
    checks.close(weights, expected.float(), what=f"weights, {n} tokens in blocks of {block}")
    checks.close(out, expected_out.float(), what=f"out, {n} tokens in blocks of {block}")
inputs = [checks.randn(1, h, 7, 4, generator=g).requires_grad_() for h in (2, 1, 1)]
out, weights = compressed_attention(*inputs, 3)
grads = torch.autograd.grad(out.square().sum() + weights.square().sum(), inputs)
for name, grad in zip("qkv", grads, strict=True):
    assert bool(grad.isfinite().all()), (
        f"where queries see no block, {name}'s gradient is not finite"
    )
    assert bool(grad.abs().max() > 0), f"no gradient flows to {name}"
for part in compressed_attention(*(t.detach().bfloat16() for t in inputs), 3):
    assert part.dtype == torch.bfloat16, f"both have q's dtype, bfloat16; yours is {part.dtype}"
big = [1e4 * torch.ones(1, 1, 6, 4), 1e4 * torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4)]
out, _ = compressed_attention(*big, 2)
checks.close(out[0, 0, 1:], torch.ones(5, 4), what="out where scores are 2e8")
out, _ = compressed_attention(-big[0], *big[1:], 2)
hint = "A hidden block counts nothing, however low the others are."
checks.close(out[0, 0, 1:], torch.ones(5, 4), what="out where scores are -2e8", hint=hint)
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · Which blocks
#
# The weights are there already, so selection is nearly free: add them up over the query heads that
# share keys, and take the largest. Three blocks are always taken, as NSA does: the first of the
# text (attention sinks live there), the block that the query stands in, which need not be whole and
# so has no summary yet, and the one before, so that the nearest tokens are read wherever in its
# block the query stands.


# %% exercise="select_blocks" minutes=20 difficulty=2
def select_blocks(weights: Tensor, kv_heads: int, block: int, top: int) -> Tensor:
    """Which blocks each query reads in full: bool, (batch, kv_heads, n, blocks).

    weights: (batch, heads, n, n // block) as compressed_attention gives them; unchanged.
    blocks = n / block rounded up: the last one may be cut off. Let c = t // block be the block of
    the query at t. Blocks 0, c − 1 (if there is one) and c are chosen. Of the other blocks before
    c, those with the largest sum of weights over the query heads that share a key–value head are
    added, until `top` are chosen or there is none left; of equal ones the earlier. top ≥ 3.
    """
    ### BEGIN SOLUTION
    n, whole = weights.shape[2:]
    blocks = -(-n // block)
    sums = weights.detach().unflatten(1, (kv_heads, -1)).sum(2)
    sums = F.pad(sums, (0, blocks - whole))
    here = torch.arange(n, device=weights.device)[:, None] // block
    index = torch.arange(blocks, device=weights.device)
    forced = (index == 0) | (index == here) | (index == here - 1)
    # Weights are at most the group's size: forced blocks stand above, blocks ahead below them.
    ranked = sums.masked_fill(forced, float("inf")).masked_fill(index > here, -1.0)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :top]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, True) & (index <= here)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: forced and forbidden blocks in one ranking</summary>
#
# Give the forced blocks an infinite sum and those ahead a negative one; then take the `top`
# largest. Where fewer blocks are there than `top`, some of those ahead are among them: take them
# out again. </details>
#
# <details><summary>Hint: equal sums</summary>
#
# `topk` does not promise which of two equal values it takes. `argsort(stable=True,
# descending=True)` keeps the earlier one first.
# </details>

# %% check="select_blocks" points=2
# Six blocks of 2, one head; the last query stands in block 5 and may add one to 0, 4 and 5.
weights = torch.zeros(1, 1, 12, 6)
weights[0, 0, 11] = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.1, 0.1])
chosen = select_blocks(weights, 1, 2, top=4)
assert (chosen.dtype, tuple(chosen.shape)) == (torch.bool, (1, 1, 12, 6)), (
    f"chosen is bool of shape (1, 1, 12, 6); yours {chosen.dtype} of {tuple(chosen.shape)}"
)
answer = chosen[0, 0, 11].nonzero().flatten().tolist()
assert answer == [0, 2, 4, 5], f"the last query reads blocks 0, 2, 4 and 5; yours {answer}"
answer = chosen[0, 0, 3].nonzero().flatten().tolist()
assert answer == [0, 1], f"the query at 3 has only blocks 0 and 1; yours {answer}"
### BEGIN HIDDEN TESTS
g = checks.generator(8)
for batch, heads, kv_heads, n, block, top in [
    (2, 4, 2, 23, 3, 4),
    (1, 6, 3, 20, 2, 5),
    (2, 2, 1, 16, 4, 3),
    (1, 3, 3, 9, 1, 4),
    (2, 4, 1, 7, 4, 16),
    (1, 2, 2, 2, 5, 3),
]:
    whole = n // block
    weights = torch.rand(batch, heads, n, whole, generator=g)
    if top == 5:  # many ties
        weights = (weights * 3).floor() / 4
    with checks.unchanged(weights=weights):
        chosen = select_blocks(weights, kv_heads, block, top)
    for b in range(batch):
        for kv in range(kv_heads):
            of = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
            for t in range(n):
                here = t // block
                expected = {0, here, max(here - 1, 0)}
                sums = {j: sum(float(weights[b, h, t, j]) for h in of) for j in range(here)}
                others = sorted(set(sums) - expected, key=lambda j: (-round(sums[j], 5), j))
                expected |= set(others[: max(0, top - len(expected))])
                answer = set(chosen[b, kv, t].nonzero().flatten().tolist())
                assert answer == expected, (
                    f"query {t} of {n}, blocks of {block}, top {top}: chosen are "
                    f"{sorted(expected)}, yours {sorted(answer)}"
                )
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise · Three branches


# %% exercise="native_sparse_attention" minutes=25 difficulty=2
def native_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, block: int, top: int, window: int
) -> Tensor:
    """The gated sum of three attentions, (batch, heads, n, head_dim), of q's dtype.

    q, k, v, block: as in compressed_attention. gates: (batch, heads, n, 3) of q's dtype, between 0
    and 1: for the compressed, the selected and the sliding branch, in this order; used as they are.
    selected: softmax attention to the tokens at t or before it in the blocks that select_blocks
        chooses from the compressed branch's weights (`top` of them).
    sliding: softmax attention to the last `window` tokens, t itself included, window ≥ 1.
    Each branch has a softmax of its own and scores divided by √head_dim. Differentiable in q, k, v
    and gates; the choice of blocks has no gradient.
    """
    ### BEGIN SOLUTION
    n, kv_heads = q.shape[2], k.shape[1]
    compressed, weights = compressed_attention(q, k, v, block)
    chosen = select_blocks(weights, kv_heads, block, top)
    t = torch.arange(n, device=q.device)
    causal = t <= t[:, None]
    selected = chosen.repeat_interleave(block, dim=-1)[..., :n] & causal
    selected = selected.repeat_interleave(q.shape[1] // kv_heads, dim=1)
    sliding = causal & (t > t[:, None] - window)
    branches = [compressed]
    for mask in (selected, sliding):
        branches.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
    return (torch.stack(branches, dim=-1) * gates[..., None, :]).sum(-1).to(q.dtype)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: from blocks to tokens</summary>
#
# `chosen.repeat_interleave(block, dim=-1)[..., :n]` says of each token whether its block is chosen.
# The query's own block reaches ahead of it: combine with the causal mask.
# </details>

# %% check="native_sparse_attention" points=2
# Laws: with all blocks chosen, or a window over everything, a branch is full attention.
g = checks.generator(9)
q, k, v = (checks.randn(2, heads, 10, 8, generator=g) for heads in (4, 2, 2))
full = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def only(branch):
    gates = torch.zeros(2, 4, 10, 3)
    gates[..., branch] = 1
    return gates


checks.close(
    native_sparse_attention(q, k, v, only(1), block=2, top=5, window=1),
    full,
    what="the selected branch with all five blocks chosen",
)
checks.close(
    native_sparse_attention(q, k, v, only(2), block=2, top=3, window=10),
    full,
    what="the sliding branch with a window of the whole text",
)
checks.close(
    native_sparse_attention(q, k, v, only(2), block=2, top=3, window=1),
    v.repeat_interleave(2, dim=1),
    what="the sliding branch with a window of 1: each token's own value",
)
### BEGIN HIDDEN TESTS
for batch, heads, kv_heads, n, d, block, top, window in [
    (2, 4, 2, 19, 8, 3, 4, 5),
    (1, 6, 3, 12, 4, 2, 3, 3),
    (1, 2, 1, 9, 16, 4, 3, 20),
    (2, 3, 3, 3, 8, 4, 3, 2),
]:
    q = (3 * checks.randn(batch, n, heads, d, generator=g)).transpose(1, 2)
    k, v = (checks.randn(kv_heads, batch, n, d, generator=g).transpose(0, 1) for _ in range(2))
    gates = torch.rand(batch, heads, n, 3, generator=g)
    with checks.unchanged(q=q, k=k, v=v, gates=gates):
        out = native_sparse_attention(q, k, v, gates, block, top, window)
    expected = torch.zeros(batch, heads, n, d, dtype=torch.float64)
    for b in range(batch):
        for kv in range(kv_heads):
            group = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
            keys, values = k[b, kv].double(), v[b, kv].double()
            for t in range(n):
                past = t // block if (t + 1) % block else (t + 1) // block
                sums = torch.zeros(past, dtype=torch.float64)
                parts = {}
                for head in group:
                    query = q[b, head, t].double() / d**0.5
                    if past:
                        means = keys[: past * block].unflatten(0, (past, block)).mean(1)
                        w = (means @ query).softmax(0)
                        sums += w
                        summed = values[: past * block].unflatten(0, (past, block)).mean(1)
                        parts[head] = w @ summed
                    else:
                        parts[head] = torch.zeros(d, dtype=torch.float64)
                here = t // block
                taken = {0, here, max(here - 1, 0)}
                ranked = sorted(set(range(here)) - taken, key=lambda j: -float(sums[j]))
                taken |= set(ranked[: max(0, top - len(taken))])
                tokens = [i for i in range(t + 1) if i // block in taken]
                near = list(range(max(0, t - window + 1), t + 1))
                for head in group:
                    query = q[b, head, t].double() / d**0.5
                    looks = [parts[head]]
                    for some in (tokens, near):
                        looks.append((keys[some] @ query).softmax(0) @ values[some])
                    expected[b, head, t] = sum(
                        float(gate) * look
                        for gate, look in zip(gates[b, head, t], looks, strict=True)
                    )
    checks.close(out, expected.float(), what=f"{n} tokens, blocks of {block}, top {top}", rtol=1e-4)
inputs = [
    *(checks.randn(1, heads, 7, 4, generator=g).double().requires_grad_() for heads in (2, 1, 1)),
    torch.rand(1, 2, 7, 3, generator=g).double().requires_grad_(),
]
cases = [(inputs, "three branches")]
cases += [([*inputs[:3], one], f"branch {b} alone") for b, one in enumerate(torch.eye(3).double())]
for case, told in cases:
    case = [*case[:3], case[3].expand(1, 2, 7, 3)]
    moving = [t for t in case if t.requires_grad]
    out = native_sparse_attention(*case, 2, 3, 2)
    mix = checks.randn(*out.shape, generator=g).double()
    grads = torch.autograd.grad((out * mix).sum(), moving)
    for i, grad in enumerate(grads):
        way, sides = 1e-6 * checks.randn(*grad.shape, generator=g).double(), []
        for sign in (1, -1):
            near = [t.detach() + sign * way if j == i else t.detach() for j, t in enumerate(case)]
            sides.append((native_sparse_attention(*near, 2, 3, 2) * mix).sum())
        change = (sides[0] - sides[1]) / 2
        name = ("q", "k", "v", "the gates")[i]
        checks.close((grad * way).sum(), change, what=f"the gradient of {name}, {told}", rtol=1e-4)
out = native_sparse_attention(*(t.detach().half() for t in inputs), 2, 3, 2)
assert out.dtype == torch.float16, f"out has q's dtype, float16; yours is {out.dtype}"
### END HIDDEN TESTS

# %% [markdown]
# ## One softmax over summaries and tokens
#
# DeepSeek-V4 (2026) goes one step further: the distant tokens are not kept at all. A layer keeps a
# window of plain entries and *only* the summaries of everything else, and a query has a single
# softmax over both. Two kinds of layers alternate:
#
# - **heavily compressed**: one summary for 128 tokens, all of them read;
# - **compressed sparse**: one for 4 tokens, of which an indexer (lesson 10) picks the best few.
#
# (V4-Pro begins with two heavily compressed layers, V4-Flash with two that have the window alone;
# then both kinds alternate. Of Flash's 43 layers 21 are compressed sparse and 20 heavily
# compressed.) One function does both: the second is the first with a choice. (V4's summaries are
# weighted means with learned weights, keys and values are one tensor, and each head has a sink. The
# settings here are those of transformers' `deepseek_v4`.)

# %% [markdown]
# ### Exercise · Summaries and a window


# %% exercise="summary_attention" minutes=20 difficulty=2 path="more"
def summary_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, window: int, chosen: Tensor | None = None
) -> Tensor:
    """Attention to the last `window` tokens and to means of whole blocks, in one softmax.

    q, k, v, block: as in compressed_attention. The query at t sees the tokens t − window + 1 … t,
    window ≥ 1, and every block whose last token is at t or before it, also one that overlaps the
    window. chosen: bool, (batch, heads, n, n // block): of those blocks, the query sees only the
    chosen ones; None: all. Scores are divided by √head_dim.
    Returns (batch, heads, n, head_dim), of q's dtype; differentiable in q, k and v.
    """
    ### BEGIN SOLUTION
    n, blocks = q.shape[2], q.shape[2] // block
    t = torch.arange(n, device=q.device)
    near = (t <= t[:, None]) & (t > t[:, None] - window)
    last = torch.arange(1, blocks + 1, device=q.device) * block - 1
    far = (last <= t[:, None]).expand(*q.shape[:3], blocks)
    if chosen is not None:
        far = far & chosen
    mask = torch.cat([near.expand(*q.shape[:3], n), far], dim=-1)

    def extended(x):
        means = x[:, :, : blocks * block].unflatten(2, (blocks, block)).mean(3)
        return torch.cat([x, means], dim=2)

    return F.scaled_dot_product_attention(
        q, extended(k), extended(v), attn_mask=mask, enable_gqa=True
    )
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: more keys, one mask</summary>
#
# Join the means to the keys along the token axis, and likewise the values. Then all that is left is
# a mask of n + n // block columns.
# </details>

# %% check="summary_attention" points=2
values = torch.tensor([1.0, 3.0, 10.0, 20.0, 100.0]).view(1, 1, 5, 1)
zeros = torch.zeros(1, 1, 5, 1)
out = summary_attention(zeros, zeros, values, block=2, window=1)
checks.close(
    out.flatten(),
    torch.tensor([1.0, 2.5, 6.0, (20 + 2 + 15) / 3, (100 + 2 + 15) / 3]),
    what="each token's own value, and the means 2 and 15 of the blocks behind it",
    mistakes={
        "a softmax for each part": torch.tensor([1.0, 5.0, 12.0, 28.5, 108.5]),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
for batch, heads, kv_heads, n, d, block, window in [
    (2, 4, 2, 13, 8, 3, 4),
    (1, 2, 1, 8, 4, 4, 1),
    (2, 3, 3, 6, 16, 7, 2),
    (1, 6, 2, 10, 4, 2, 30),
]:
    q = (2 * checks.randn(batch, n, heads, d, generator=g)).transpose(1, 2)
    k, v = (checks.randn(kv_heads, batch, n, d, generator=g).transpose(0, 1) for _ in range(2))
    picks = torch.rand(batch, heads, n, n // block, generator=g) < 0.4
    for chosen in (None, picks):
        with checks.unchanged(q=q, k=k, v=v):
            out = summary_attention(q, k, v, block, window, chosen)
        expected = torch.zeros(batch, heads, n, d, dtype=torch.float64)
        for b in range(batch):
            for head in range(heads):
                kv = head * kv_heads // heads
                for t in range(n):
                    rows = [(i, i + 1) for i in range(max(0, t - window + 1), t + 1)]
                    rows += [
                        (j * block, (j + 1) * block)
                        for j in range((t + 1) // block)
                        if chosen is None or bool(chosen[b, head, t, j])
                    ]
                    keys, means = (
                        torch.stack([x[b, kv, i:j].double().mean(0) for i, j in rows])
                        for x in (k, v)
                    )
                    weight = (keys @ q[b, head, t].double() / d**0.5).softmax(0)
                    expected[b, head, t] = weight @ means
        checks.close(out, expected.float(), what=f"{n} tokens, blocks of {block}", rtol=1e-4)
inputs = [checks.randn(1, heads, 7, 4, generator=g).double() for heads in (2, 1, 1)]
moving = [t.clone().requires_grad_() for t in inputs]
mix = checks.randn(1, 2, 7, 4, generator=g).double()
grads = torch.autograd.grad((summary_attention(*moving, 3, 2) * mix).sum(), moving)
for i, grad in enumerate(grads):
    way, sides = 1e-6 * checks.randn(*grad.shape, generator=g).double(), []
    for sign in (1, -1):
        near = [t + sign * way if j == i else t for j, t in enumerate(inputs)]
        sides.append((summary_attention(*near, 3, 2) * mix).sum())
    change = (sides[0] - sides[1]) / 2
    checks.close((grad * way).sum(), change, what=f"the gradient of {'qkv'[i]}", rtol=1e-4)
out = summary_attention(*(t.detach().bfloat16() for t in inputs), 3, 2)
assert out.dtype == torch.bfloat16, f"out has q's dtype, bfloat16; yours is {out.dtype}"
big = [1e4 * torch.ones(1, 1, 6, 4), 1e4 * torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4)]
for sign in (1, -1):
    out = summary_attention(sign * big[0], *big[1:], 2, 2)
    checks.close(out, torch.ones(1, 1, 6, 4), what=f"out where all scores are {2e8 * sign:.0e}")
### END HIDDEN TESTS

# %% [markdown]
# ## Do summaries find what matters?
#
# Native sparse attention is trained with its branches from the start. Still, one thing can be
# looked at without training: does a block's mean key tell which tokens would have got attention?
#
# **Predict first.** Take the attention of the course's own `small` model over 512 tokens of its
# documentation, blocks of 16 tokens. A query reads 6 of up to 32 blocks: the first, its own, the
# one before, and three by choice. Which share of its true attention lies in them, if the choice is
# made by summaries, by nearness, or by looking at the true attention itself? Write three numbers
# down.

# %% tags=["experiment"]
small, tokenizer = models.load("small")
held_out = "\n".join(data.split(data.documentation())[1].values())
tokens = torch.tensor([[tokenizer.eos, *tokenizer.encode(held_out)[:511]]])
caught = {}


def catch(layer):
    def hook(module, arguments):
        x, cos, sin, *_ = arguments
        q, k = (
            rotate(p(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2), cos, sin)
            for p in (module.q_proj, module.k_proj)
        )
        caught[layer] = q, k

    return hook


hooks = [b.self_attn.register_forward_pre_hook(catch(i)) for i, b in enumerate(small.layers)]
with torch.no_grad():
    small(tokens)
for hook in hooks:
    hook.remove()

BLOCK, BLOCKS = 16, 32
causal = torch.ones(512, 512, dtype=torch.bool).tril()
late = slice(256, 512)  # queries with 16 blocks or more behind them


def shares(q: Tensor, k: Tensor, top: int) -> dict[str, float]:
    """The attention of late queries that lies in `top` blocks, by three ways to choose them."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    in_blocks = weights.unflatten(-1, (BLOCKS, BLOCK)).sum(-1)
    by_mean = compressed_attention(q, k, k, BLOCK)[1]
    by_place = torch.arange(BLOCKS, dtype=torch.float).expand_as(in_blocks)
    found = {}
    for name, judged in (
        ("summaries", by_mean),
        ("nearness", by_place),
        ("the attention itself", in_blocks),
    ):
        chosen = select_blocks(judged, k.shape[1], BLOCK, top).repeat_interleave(group, dim=1)
        found[name] = float((in_blocks * chosen)[:, :, late].sum(-1).mean())
    return found


tops = [3, 4, 6, 9, 12, 16]
by_top = [[shares(q, k, top) for q, k in caught.values()] for top in tops]
names = list(by_top[0][0])
means = {name: [sum(s[name] for s in row) / len(row) for row in by_top] for name in names}
for name, values in means.items():
    print(f"6 blocks by {name:<22} {values[2]:.1%} of the attention")

# %% tags=["experiment", "figure"]
# Figure: the share of the attention in the blocks that are read
fig, axes = plt.subplots(1, 2, figsize=(11, 3.8))
plot.curves(
    tops,
    means,
    xlabel="blocks read, of 17 to 32",
    ylabel="share of the attention",
    title="mean of all layers",
    ax=axes[0],
)
layers = list(caught)
for i, name in enumerate(names):
    axes[1].bar(
        [layer + 0.27 * (i - 1) for layer in layers],
        [by_top[2][layer][name] for layer in layers],
        width=0.25,
        label=name,
        color=plot.COLORS[i],
        hatch=["", "//", ".."][i],
    )
axes[1].set(xlabel="layer", ylabel="share of the attention", ylim=(0, 1.35))
axes[1].set_title("6 blocks, by layer")
axes[1].legend(fontsize=8, loc="upper left")
plot.caption(
    fig,
    "Left: how much of what full attention looks at lies in the blocks that are read. The third "
    "line is the best choice there is beside the three forced blocks. Right: the same by layer.",
)
plt.show()

# %% [markdown]
# The gap is small, and that is the finding: in this model most attention is near or at the very
# first token, and three forced blocks already hold much of it. Where the layers look further back
# (the last one) summaries do better than nearness and stay short of the best choice. Layer 0
# spreads its attention so evenly that no choice of blocks holds it. A model that is trained with
# the branches can put what it wants found into the mean of a block's keys; this one never had to.

# %% [markdown]
# ## What does a mixed stack buy?
#
# A task that asks for exact memory: **associative recall**. A text lists eight pairs of a key and a
# value, in an order of its own, and then asks 24 times for the value of one of the keys. The window
# of a local layer is four tokens, so no answer lies in it.
#
# Five stacks of two layers and of nearly equal size are trained from scratch on the same texts.
# Their caches at the end of a text differ by a factor of thirty.
#
# **Predict first.** Order them by what they recall: two recurrent layers; a recurrent one, then a
# local one; recurrent, then full; local, then full; two full layers. Which one needs least memory
# among those that answer nearly all?

# %% tags=["experiment"]
KEYS = 16  # and as many values


def recall_texts(batch: int, pairs: int, asked: int, generator: torch.Generator) -> Tensor:
    """(batch, 2 · pairs + 2 · asked) tokens: keys are 0 … 15, values 16 … 31."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(KEYS, 2 * KEYS, (batch, pairs), generator=generator)
    index = torch.randint(pairs, (batch, asked), generator=generator)
    told = torch.stack([keys, values], dim=-1).flatten(1)
    questions = torch.stack([keys.gather(1, index), values.gather(1, index)], dim=-1).flatten(1)
    return torch.cat([told, questions], dim=1)


def train_recall(kinds: tuple[str, ...], seed: int = 0, steps: int = 300) -> dict[str, float]:
    """Accuracy on fresh texts and bytes of the cache of one text, after `steps` of training."""
    pairs, asked, top_rate = 8, 24, 5e-3
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HybridModel(Stack(kinds, vocab=2 * KEYS, window=4), RGLRU)
    with torch.no_grad():  # from long memories to hardly any
        for module in model.modules():
            if isinstance(module, RGLRU):
                module.decay.copy_(torch.linspace(-2, 4, len(module.decay)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=top_rate)
    for step in range(steps):
        for part in optimizer.param_groups:
            part["lr"] = top_rate * min(1, (step + 1) / 30) * (1 - step / steps)
        texts = recall_texts(32, pairs, asked, generator)
        logits = model(texts[:, :-1])[:, 2 * pairs :: 2]
        wanted = texts[:, 2 * pairs + 1 :: 2]
        optimizer.zero_grad()
        F.cross_entropy(logits.mT, wanted).backward()
        optimizer.step()
    texts, cache = recall_texts(256, pairs, asked, generator), HybridCache(kinds, 4)
    with torch.no_grad():
        right = model(texts[:, :-1])[:, 2 * pairs :: 2].argmax(-1) == texts[:, 2 * pairs + 1 :: 2]
        model(texts[:1], cache)
    return {"recalled": float(right.float().mean()), "bytes": cache.bytes()}


R, L, A = "recurrent", "local", "full"
CONTENDERS = {(R, R): 0, (R, L): 1, (A, A): 0, (L, A): 1, (R, A): 1}  # and who trains it
shared = launch(
    lambda rank: {kinds: train_recall(kinds) for kinds, by in CONTENDERS.items() if by == rank},
    2,
    timeout=300,
)
results = shared[0] | shared[1]
for kinds in CONTENDERS:
    found = results[kinds]
    print(f"{' → '.join(kinds):<22} {found['bytes']:>6,} bytes   {found['recalled']:.0%} recalled")

# %% tags=["experiment", "figure"]
# Figure: recall against memory
fig, ax = plt.subplots(figsize=(7.5, 3.8))
for i, (kinds, found) in enumerate(results.items()):
    looks = {"marker": "os^Dv"[i], "markersize": 9, "linestyle": "", "color": plot.COLORS[i]}
    ax.plot(found["bytes"], found["recalled"], label=" → ".join(kinds), **looks)
ax.axhline(1 / 8, color="#555555", linewidth=1, linestyle=":")
ax.text(60_000, 1 / 8 - 0.06, "one of the eight values", fontsize=8, ha="right")
ax.legend(loc="center left", fontsize=9)
ax.set_xscale("log")
ax.set(
    xlim=(500, 70_000),
    ylim=(0, 1.1),
    xlabel="bytes of the cache after 64 tokens",
    ylabel="share recalled",
)
plot.caption(
    fig,
    "Five stacks of two layers after the same 300 steps of training. Left of the full layer's "
    "bytes nothing recalls; two full layers pay twice and have not learned it yet.",
)
plt.show()

# %% [markdown]
# A recurrent layer in front is cheap and does one thing that recall needs: its short convolution
# puts each key beside its value. The full layer then looks it up. Neither can do the other's part
# here: states of 32 numbers do not hold eight pairs exactly, and a window of four tokens does not
# reach them. The mix answers nearly all with half the memory of two full layers. Those have the
# memory, and after these 300 steps have not found the lookup in two stages that it takes; give them
# more steps and see. That mixed stacks are not only cheaper but can be *better* than attention
# alone is what the papers of Jamba, Griffin and Kimi Linear report at their sizes.
#
# What does not show here: whether one full layer in eight is enough for a large model. That needs
# tasks and sizes beyond two layers.

# %% [markdown]
# ## Key questions


# %% exercise="hybrid_questions" minutes=12 difficulty=2 kind="questions"
def hybrid_questions() -> dict[str, float | str]:
    """Short answers, numbers to 1 percent.

    A model of 48 layers repeats 3 recurrent layers and 1 full one. A full layer has 2 key–value
    heads of 256, in two bytes. A recurrent layer has a state of 32 matrices of 128 × 128, in four.

    "token_bytes":  bytes that one more token adds to the cache of one text.
    "state_tokens": the states of all recurrent layers take as many bytes as the keys and values of
                    how many tokens?
    "half_life":    after how many tokens is what an RG-LRU channel holds halved, if a = 0.999 at
                    each of them?
    "keys_read":    a query of native sparse attention at position 65,535 (the 65,536th token)
                    reads the means of all blocks of 64, the tokens of 16 chosen blocks, and a
                    window of 512: how many keys, counting a token in two branches twice? Its own
                    block is whole, and a mean counts as a key.
    "take_back":    three drafted tokens are rejected. What must an engine have kept for a recurrent
                    layer: "nothing", "the last three inputs" or "the state before the draft"?
    """
    ### BEGIN SOLUTION
    token = 12 * 2 * 2 * 256 * 2
    return {
        "token_bytes": token,
        "state_tokens": 36 * 32 * 128 * 128 * 4 / token,
        "half_life": math.log(2) / -math.log(0.999),
        "keys_read": 65536 // 64 + 16 * 64 + 512,
        "take_back": "the state before the draft",
    }
    ### END SOLUTION


# %% check="hybrid_questions" points=1
answer = hybrid_questions()["token_bytes"]
### BEGIN HIDDEN TESTS
checks.close(float(answer), 24576.0, rtol=0.01, what="token_bytes", hint="Only full layers grow")
### END HIDDEN TESTS

# %% check="hybrid_questions" points=1
answer = hybrid_questions()["state_tokens"]
### BEGIN HIDDEN TESTS
checks.close(float(answer), 3072.0, rtol=0.01, what="state_tokens", hint="36 layers have a state")
### END HIDDEN TESTS

# %% check="hybrid_questions" points=1
answer = hybrid_questions()["half_life"]
### BEGIN HIDDEN TESTS
checks.close(float(answer), 692.8, rtol=0.01, what="half_life", hint="0.999 to which power is ½?")
### END HIDDEN TESTS

# %% check="hybrid_questions" points=1
answer = hybrid_questions()["keys_read"]
### BEGIN HIDDEN TESTS
checks.close(float(answer), 2560.0, rtol=0.01, what="keys_read", hint="Add up three branches")
### END HIDDEN TESTS

# %% check="hybrid_questions" points=1
answer = hybrid_questions()["take_back"]
### BEGIN HIDDEN TESTS
assert answer == "the state before the draft", (
    "take_back: a state cannot be run backwards, and inputs alone do not give it"
)
### END HIDDEN TESTS

# %% [markdown]
# **Prefix caching.** Two requests begin with the same 5,000 tokens. An engine keeps blocks of keys
# and values of 16 tokens and shares them (lesson 30). What changes if the model is a hybrid, and
# what would you keep?

# %% [markdown] answer="prefix-caching"
# Keys and values of a prefix are there token by token: any shared length can be used, and blocks of
# full and local layers are shared as before (of local layers only the last window of the prefix is
# needed). A state stands for exactly one length. If nobody kept it at the length where the requests
# part, the recurrent layers have to be run again from the last kept state. So engines keep states
# at chosen lengths, such as at block borders or at the ends of prompts and turns, each as large as
# thousands of tokens of keys, and share only up to those lengths.

# %% [markdown]
# **One in four or one in eight?** You may train two hybrids for a context of a million tokens.
# Which measurements would decide the ratio of full layers?

# %% [markdown] answer="ratio"
# Loss on ordinary text hardly depends on it, so it decides little. Recall does: passkeys and lists
# of keys at many depths and lengths, copying, code that names something far away; at several sizes
# of the state, since a larger one makes up for a missing full layer up to a point. Then the bill:
# bytes of a text at the lengths that are served, and so the batch that fits, and time for each
# token at that batch. One takes the fewest full layers at which recall has not begun to fall.

# %% [markdown]
# ## References
#
# - **De et al. 2024**, *Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
#   Language Models*, arXiv:2402.19427. The RG-LRU and the recurrent block; its appendix on
#   initialization and on the gate.
# - **Lieber et al. 2024**, *Jamba: A Hybrid Transformer-Mamba Language Model*, arXiv:2403.19887.
#   The ablations of the ratio.
# - **Glorioso et al. 2024**, *Zamba: A Compact 7B SSM Hybrid Model*, arXiv:2405.16712. One
#   attention layer whose weights are shared by all its places.
# - **Gemma Team 2025**, *Gemma 3 Technical Report*, arXiv:2503.19786. Five local layers to one full
#   one, and what the cache saves.
# - **Kimi Team 2025**, *Kimi Linear: An Expressive, Efficient Attention Architecture*,
#   arXiv:2510.26692. Three to one, and the comparison with full attention under one recipe.
# - **Yuan et al. 2025**, *Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
#   Attention*, arXiv:2502.11089. The three branches, and why the choice is made for a group.
# - **DeepSeek-AI 2024**, *DeepSeek-V3 Technical Report*, arXiv:2412.19437. The latent of 512 and 64
#   that the table counts.
#
# In code: transformers' `recurrent_gemma`, `jamba`, `qwen3_next`, `kimi_linear` and `deepseek_v4`;
# flash-linear-attention's `fla/ops/nsa`.
