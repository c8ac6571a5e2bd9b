"""Untrained models of a few small layers, one for each kind of decoder, in folders as real ones come: for tests of what must hold
for every shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NUM_LAYERS = 3
_COMMON = {"vocab_size": 320, "max_position_embeddings": 256, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
           "initializer_range": 0.2}
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
         "num_key_value_heads": 2}
_KINDS = ["sliding_attention", "full_attention"]
SHAPES = ("llama", "qwen3", "gemma3", "gpt2")


def shape_config(name: str, num_layers: int = NUM_LAYERS) -> Any:
    """A config of one of `SHAPES`; without dropout, which GPT-2 has."""
    import transformers

    depth = {"num_hidden_layers": num_layers}
    kinds = (_KINDS * num_layers)[:num_layers]
    if name == "llama":
        return transformers.LlamaConfig(**{**_COMMON, **_WIDE, **depth})
    if name == "qwen3":
        return transformers.Qwen3Config(**{**_COMMON, **_WIDE, **depth}, head_dim=16, tie_word_embeddings=True)
    if name == "gemma3":  # norms around both parts, scaled embeddings, two kinds of attention
        return transformers.Gemma3TextConfig(**{**_COMMON, **_WIDE, **depth}, head_dim=16, sliding_window=8, layer_types=kinds)
    return transformers.GPT2Config(
        **{**_COMMON, "n_positions": 256}, n_embd=64, n_layer=num_layers, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )


def save_shape(name: str, folder: Path, tokenizer: Path, num_layers: int = NUM_LAYERS) -> Path:
    """A folder with such a model and the tokenizer of another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape_config(name, num_layers)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
