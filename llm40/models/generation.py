"""Writing text with a model: prompts of any lengths in one batch, greedy or sampled, with a cache."""

import torch

from llm40.models.llama import Cache, Llama


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    stop: int | None = 0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The tokens that `model` writes after each prompt (a list of ids, not empty), without the prompt.

    `temperature` 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature) with
    `generator`. A sequence ends with the token `stop` (by default <|endoftext|>), which is its last, or after
    `max_new_tokens`. Greedy results do not depend on what else is in the batch.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one token, such as <|endoftext|> to begin a document")
    device = model.embed_tokens.weight.device
    longest = max(map(len, prompts), default=0)
    # Padding goes to the left, so that every row's next token is its last column. Rotary positions are relative: it
    # does no harm that a padded row starts further on.
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    cache, written = Cache(), [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not running:
            break
        padded = mask if longest > min(map(len, prompts)) else None
        logits = model(tokens, cache=cache, attention_mask=padded)[:, -1].float()
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        for row in list(running):
            written[row].append(int(tokens[row]))
            if written[row][-1] == stop:
                running.discard(row)
    return written
