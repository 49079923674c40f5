"""A small Transformer over bytes, for experiments that compare one part of it: the same model in many lessons.

The parts that a lesson is about are handed in (attention, norm, block, optimizer); this is the rest, written as plainly
as lesson 14 builds it. What a lesson teaches it still builds itself.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm40 import data, profile


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention; q (batch, heads, seq, head_dim), k and v may have fewer heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Causal attention with `heads` query heads on `kv_heads` (as many by default): (batch, seq, width) to the same.

    `attend(q, k, v)`, all (batch, heads, seq, head_dim), does the work; `head_dim` is width / heads by default.
    `turn(q or k, positions)` turns queries and keys (RoPE) before that.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = sdpa,
        turn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        kv_heads, self.head_dim = kv_heads or heads, head_dim or width // heads
        self.heads, self.attend, self.turn = (heads, kv_heads, kv_heads), attend, turn
        self.qkv = nn.Linear(width, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self.heads, dim=1)
        if self.turn is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = self.turn(q, positions), self.turn(k, positions)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def two_layers(width: int, hidden: int | None = None, bias: bool = True) -> nn.Sequential:
    """Two layers with GELU between them; `hidden` is 4·width by default."""
    hidden = hidden or 4 * width
    return nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, width, bias=bias))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norm`, norm(x + attention(x)) and norm(x + mlp(x))."""

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        *,
        mlp: nn.Module | None = None,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention, self.mlp = attention, two_layers(width) if mlp is None else mlp
        self.norm_1, self.norm_2, self.post_norm = norm(width), norm(width), post_norm

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in ((self.norm_1, self.attention), (self.norm_2, self.mlp)):
            x = norm(x + branch(x)) if self.post_norm else x + branch(norm(x))
        return x


class ByteModel(nn.Module):
    """Bytes (batch, seq) → logits of each next byte (batch, seq, 256): embedding, `blocks`, norm, head.

    blocks: modules that map (batch, seq, width) to the same. context: as many learned positions as the longest
    sequence has; None: none, for blocks with RoPE. norm: what stands before the head. tied: the head is the embedding.
    """

    def __init__(
        self,
        width: int,
        blocks: Iterable[nn.Module],
        *,
        context: int | None = None,
        norm: nn.Module | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = None if context is None else nn.Embedding(context, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.head = nn.Linear(width, 256, bias=False)
        if tied:
            self.head.weight = self.bytes.weight

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """What enters the first block and what leaves each: one more (batch, seq, width) than there are blocks."""
        x = self.bytes(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden_states(tokens)[-1]))


def byte_batches(text: Tensor, steps: int, batch: int, seq: int, *, seed: int = 0) -> Tensor:
    """Windows of `text` (its length,), drawn at random: (steps, batch, seq + 1) on the profile's device."""
    starts = torch.randint(len(text) - seq, (steps, batch, 1), generator=torch.Generator().manual_seed(seed))
    return text.cpu()[starts + torch.arange(seq + 1)].to(profile.device)


def next_byte_loss(model: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """The mean cross-entropy, in nats a byte, of every next byte of windows (batch, seq + 1)."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def training_losses(
    model: nn.Module,
    batches: Sequence[Tensor] | Tensor,
    *,
    lr: float = 3e-3,
    rate: Callable[[int], float] | None = None,
    clip: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains `model` on each of `batches` (batch, seq + 1) once, and returns the loss of every step.

    AdamW at `lr` unless an `optimizer` is given; `rate(step)`, from step 0 on, multiplies its learning rate. `clip` is
    the largest norm of a gradient. `watch(step)` is called after the backward pass of every step, to look at gradients.
    """
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate or (lambda step: 1.0))
    losses = []
    for step, windows in enumerate(batches):
        loss = next_byte_loss(model, windows)
        optimizer.zero_grad()
        loss.backward()
        if watch is not None:
            watch(step)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def documentation_bytes(held_out: bool | None = None) -> Tensor:
    """Python's documentation as bytes, (length,) int64: all of it, or with True or False one side of `data.split`."""
    texts = data.documentation()
    if held_out is not None:
        texts = data.split(data.deduplicate(texts))[held_out]
    return torch.tensor(list("\n".join(texts.values()).encode()))


def entropy_of(tokens: Tensor) -> float:
    """The loss, in nats, of a model that knows how frequent each token is and nothing else."""
    frequency = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return float(torch.special.entr(frequency).sum())
