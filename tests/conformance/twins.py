"""The course's Llama as Hugging Face's: the same configuration, the same weights."""

import pytest

from llm40.models import Config, Llama

transformers = pytest.importorskip("transformers")


def llama_config(config: Config, **more: object) -> "transformers.LlamaConfig":
    """transformers' name for each of the course's settings; `more` are its own, in their place or beside them."""
    same = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return transformers.LlamaConfig(**same | more)


def as_transformers(model: Llama, **more: object) -> "transformers.LlamaForCausalLM":
    """A LlamaForCausalLM in evaluation mode, of the model's format, with a copy of its weights."""
    twin = transformers.LlamaForCausalLM(llama_config(model.config, **more)).to(model.embed_tokens.weight.dtype).eval()
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    twin.tie_weights()
    return twin
