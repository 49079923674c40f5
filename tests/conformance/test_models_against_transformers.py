"""The small models beside Hugging Face's Llama with the same weights, and beside themselves on other Pythons."""

import pytest
import torch
from twins import as_transformers

from llm40 import models


@torch.inference_mode()
@pytest.mark.parametrize("size", ["small", "tiny"])
def test_same_logits_as_hugging_face(size):
    ours, tokenizer = models.load(size, device="cpu")
    theirs = as_transformers(ours)
    text = "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n" * 8
    tokens = torch.tensor([tokenizer.encode(text)[:200]])
    assert tokens.shape[1] == 200
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
