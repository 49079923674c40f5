"""The small models beside Hugging Face's Llama with the same weights, and beside themselves on other Pythons."""

import pytest
import torch

from llm40 import models


@torch.inference_mode()
@pytest.mark.parametrize("size", ["small", "tiny"])
def test_same_logits_as_hugging_face(size):
    transformers = pytest.importorskip("transformers")
    ours, tokenizer = models.load(size, device="cpu")
    config = ours.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(
        {f"model.{name}": tensor for name, tensor in ours.state_dict().items()}, strict=False
    )
    assert (missing, unexpected) in ((["lm_head.weight"], []), ([], []))
    theirs.tie_weights()
    text = "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n" * 8
    tokens = torch.tensor([tokenizer.encode(text)[:200]])
    assert tokens.shape[1] == 200
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
