"""The course's own small pretrained models: `model, tokenizer = llm40.models.load("small")`.

`weights/README.md` is their card: what they were trained on, how well they do, what they cannot do.
"""

from llm40.models.generation import generate
from llm40.models.llama import CONFIGS, Cache, Config, Llama
from llm40.models.tokenizer import Tokenizer
from llm40.models.weights import WeightsError, load, load_tokenizer

__all__ = ["CONFIGS", "Cache", "Config", "Llama", "Tokenizer", "WeightsError", "generate", "load", "load_tokenizer"]
