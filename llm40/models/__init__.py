"""The course's own small pretrained models: `model, tokenizer = llm40.models.load("small")`.

`weights/README.md` is their card: what they were trained on, how well they do, what they cannot do.
"""

from llm40.models.generation import generate
from llm40.models.llama import CONFIGS, Cache, Config, Llama
from llm40.models.mtp import MTP
from llm40.models.tokenizer import Tokenizer
from llm40.models.weights import CHECKPOINTS, WeightsError, load, load_mtp, load_tokenizer, scaling_runs

__all__ = [
    "CHECKPOINTS",
    "CONFIGS",
    "MTP",
    "Cache",
    "Config",
    "Llama",
    "Tokenizer",
    "WeightsError",
    "generate",
    "load",
    "load_mtp",
    "load_tokenizer",
    "scaling_runs",
]
