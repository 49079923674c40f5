"""A LLaMA-style decoder from PyTorch's own parts: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The embedding is also the head. Parameters are named as in Hugging Face's `LlamaModel`: with "model." before each name,
they load into its `LlamaForCausalLM`.
Papers: Touvron et al. 2023, arXiv:2302.13971 (LLaMA); Ainslie et al. 2023, arXiv:2305.13245 (GQA); Su et al. 2021,
arXiv:2104.09864 (RoPE); Shazeer 2020, arXiv:2002.05202 (SwiGLU); Zhang and Sennrich 2019, arXiv:1910.07467 (RMSNorm).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 7
    heads: int = 8
    kv_heads: int = 2  # each is shared by heads // kv_heads query heads
    mlp_size: int = 704
    context: int = 512  # the longest sequence seen in training; rotary positions go on beyond it, less well
    rope_theta: float = 10_000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


CONFIGS = {
    "small": Config(),
    "tiny": Config(hidden_size=96, layers=3, heads=3, kv_heads=1, mlp_size=256),
}


class Cache:
    """Keys and values of the tokens seen so far: pass the same one to every call, with only the new tokens."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []  # each (batch, kv_heads, length, head_dim)

    def __len__(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new keys and values of one layer and returns all of that layer's."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            old_k, old_v = self.layers[layer]
            self.layers[layer] = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        return self.layers[layer]

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens, as after a rejected draft."""
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + head_dim/2]) by its angle.

    x (batch, heads, seq, head_dim); cos and sin (1 or batch, 1, seq, head_dim/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_size = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        # (batch, seq, heads · head_dim) → (batch, heads, seq, head_dim)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        causal = mask is None and q.shape[2] > 1  # a single new token sees all that came before it
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole decoder, with random weights: `llm40.models.load` gives trained ones."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller, so that its variance does not grow with depth.
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if ends_branch else 0.02)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, seq, vocab_size) of the token after each of `tokens` (batch, seq), int64.

        With a `cache`, `tokens` are only the new ones; it is extended in place. `attention_mask` (batch, cached + seq),
        bool, is False on padding, which no other token then sees. `positions` (seq,) or (batch, seq), whole or
        fractional, are cached, cached + 1, … by default.
        """
        return F.linear(self.hidden(tokens, cache, attention_mask, positions), self.embed_tokens.weight)

    def hidden(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What the head sees: (batch, seq, hidden_size), after the last norm. Arguments as in `forward`."""
        x = self.embed_tokens(tokens)
        return self.norm(through(self.layers, x, self.config, cache, attention_mask, positions))


def through(
    blocks: nn.ModuleList,
    x: Tensor,
    config: Config,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The residual stream (batch, seq, hidden_size) after these blocks. Arguments as in `Llama.forward`."""
    past, seq = len(cache) if cache is not None else 0, x.shape[1]
    order = torch.arange(past + seq, device=x.device)
    cos, sin = angles(order[past:] if positions is None else positions, config)
    mask = None
    if attention_mask is not None or (past and seq > 1):
        own = order[past:, None] == order  # (seq, past + seq): each token sees itself, so that no row is empty
        mask = order[past:, None] >= order
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool() | own  # (batch, 1, seq, past + seq)
    for block in blocks:
        x = block(x, cos, sin, mask, cache)
    return x


def angles(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i/head_dim), float32, each (1 or batch, 1, seq, head_dim/2)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    turned = positions.float()[..., None] * config.rope_theta**-exponent
    turned = turned.reshape(-1, 1, *turned.shape[-2:])
    return turned.cos(), turned.sin()
