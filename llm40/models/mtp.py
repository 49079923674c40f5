"""A block that predicts the token after the next: multi-token prediction as in DeepSeek-V3 (arXiv:2412.19437, 2.2).

`mtp = llm40.models.load_mtp()` belongs to `small`, whose embedding, which is also its head, it shares.
"""

import torch
from torch import Tensor, nn

from llm40.models.llama import Block, Cache, Config, Llama, through


class MTP(nn.Module):
    """From what the trunk knows at token i, and token i + 1, to token i + 2."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.token_norm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Block(config, 0)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, hidden: Tensor, embedded: Tensor, cache: Cache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """What the head sees, (batch, seq, hidden_size): `F.linear(…, model.embed_tokens.weight)` are the logits of
        token i + 2.

        hidden: `model.hidden(tokens)` at the tokens i, (batch, seq, hidden_size); embedded: `model.embed_tokens` of the
        tokens i + 1, the same shape. `cache` (its own, of one layer) and `positions` as in `Llama.forward`. To draft
        further ahead, pass what this returned as `hidden` again.
        """
        joined = torch.cat([self.hidden_norm(hidden), self.token_norm(embedded)], dim=-1)
        return self.norm(through(self.layers, self.projection(joined), self.config, cache, None, positions))


class Ahead(nn.Module):
    """A frozen trunk and its MTP block, in the shape of a `Llama` that predicts each token without having seen the one
    before through the trunk. Only the block has parameters, so only it is trained."""

    def __init__(self, trunk: Llama, mtp: MTP):
        super().__init__()
        self.config, self.layers = trunk.config, nn.ModuleList([mtp])
        self._trunk = (trunk.eval(),)  # in a tuple, PyTorch does not take it for a part

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self._trunk[0].embed_tokens

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, seq, hidden_size): at token i, from the trunk's state at i - 1 (zeros at the first) and token i."""
        with torch.no_grad():
            hidden, embedded = self._trunk[0].hidden(tokens), self.embed_tokens(tokens)
        return self.layers[0](torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1), embedded)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.hidden(tokens), self.embed_tokens.weight.detach())
