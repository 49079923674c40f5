"""What the attention heads of a model look at: the scores of lesson 09, for every head at once."""

import torch
from torch import Tensor

from llm40.models.llama import Attention, Llama, rotate


@torch.inference_mode()
def attention_weights(model: Llama, tokens: Tensor) -> Tensor:
    """What each query of `tokens` (batch, seq) gives to each key: (layers, batch, heads, seq, seq), rows sum to 1."""
    found = []

    def look(attention: Attention, arguments: tuple, _: Tensor) -> None:
        x, cos, sin = arguments[:3]
        q, k = (
            rotate(projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2), cos, sin)
            for projection in (attention.q_proj, attention.k_proj)
        )
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2) / attention.head_dim**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        found.append(scores.masked_fill(hidden, float("-inf")).softmax(-1))

    hooks = [block.self_attn.register_forward_hook(look) for block in model.layers]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def head_scores(weights: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """{"previous_token", "induction", "sink"}, each (layers, heads), of `attention_weights`.

    previous_token: mean weight on the token before. sink: mean weight on the first token, by all later ones. induction:
    total weight on the tokens that follow an earlier occurrence of the query's token, over the queries that have one.
    """
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after = torch.nn.functional.pad(earlier, (1, 0))[..., :-1]
    repeated = earlier.any(-1)[:, None]
    found = (weights * after[:, None]).sum(-1) * repeated
    return {
        "previous_token": weights.diagonal(-1, -2, -1).mean((1, 3)),
        "induction": found.sum((1, 3)) / repeated.sum().clamp(min=1),
        "sink": weights[..., 1:, 0].mean((1, 3)),
    }
