"""Untrained models of two small layers, one for each family that is exported, with a tokenizer of the kind that such models have,
and an adapter on each: for tests of what must hold for every family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXT = ["the cat sat on the mat and the dog ran to the red house", "write one sentence about the sea",
         "it's 17:45 and 3.14, we'll see", "name the capital of italy; def add(a, b): return a + b",
         "List three animals that can fly. Explain why the sky is blue."] * 8
_COMMON = {"max_position_embeddings": 256, "initializer_range": 0.2, "hidden_size": 64, "intermediate_size": 128,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SLIDING = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4-mini", "gpt2")
_SPM = ("mistral", "gemma2", "gemma3", "phi3")
# How text is cut, by its expression in tokenizer.json, and whether whole words are looked up first.
_CUT = {"llama3": ("llama-bpe", True), "qwen2": ("qwen2", False), "qwen3": ("qwen2", False), "phi4-mini": ("gpt-4o", False)}


def family_config(name: str, vocab_size: int) -> Any:
    """A config of one of `FAMILIES`."""
    import transformers

    kept = {**_COMMON, "vocab_size": vocab_size, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    if name in ("llama", "llama3"):
        more = {"rope_parameters": _LLAMA3, "tie_word_embeddings": True} if name == "llama3" else {"attention_bias": True}
        return transformers.LlamaConfig(**kept, **more)
    if name == "mistral":
        return transformers.MistralConfig(**kept, head_dim=32, sliding_window=None)
    if name == "qwen2":
        return transformers.Qwen2Config(**kept, tie_word_embeddings=True)
    if name == "qwen3":
        return transformers.Qwen3Config(**kept, head_dim=32)
    if name == "gemma2":
        return transformers.Gemma2Config(**kept, **_SLIDING)
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention"]  # real ones have five to one, which llama.cpp takes for granted
        return transformers.Gemma3TextConfig(**kept, **_SLIDING, layer_types=kinds)
    if name == "phi3":
        return transformers.Phi3Config(**kept, original_max_position_embeddings=256)
    if name == "phi4-mini":
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "long_factor": [2.0] * 6,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "original_max_position_embeddings": 512}
        return transformers.Phi3Config(**{**kept, "max_position_embeddings": 1024}, rope_parameters=rope,
                                       original_max_position_embeddings=512, tie_word_embeddings=True)
    assert name == "gpt2", name
    return transformers.GPT2Config(vocab_size=vocab_size, n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2,
                                   bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def make_tokenizer(name: str) -> Any:
    """As such a family has it: SentencePiece's with bytes to fall back on, or byte-level with an expression of its own."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if name in _SPM:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trained.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=160, show_progress=False))
        import json

        model = json.loads(trained.to_str())["model"]
        words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
        tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)},
                                         merges=[tuple(pair) for pair in model["merges"]], byte_fallback=True, fuse_unk=True,
                                         unk_token="<unk>"))
        space = [normalizers.Replace(" ", "\u2581")]
        prefix = [] if name.startswith("gemma") else [normalizers.Prepend("\u2581")]
        tokenizer.normalizer = normalizers.Sequence([*prefix, *space])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        from qlora.exporting.vocabulary import SPLITS

        cut, whole = _CUT.get(name, (None, False))
        tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
        tokenizer.pre_tokenizer = byte_level if cut is None else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLITS[cut]), "isolated"), byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(_TEXT, trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([*special, "<|turn|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>")
    fast.chat_template = ("{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
                          "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}")
    return fast


def save_family(name: str, folder: Path, dtype: Any = None) -> Path:
    """A folder with such a model. Norms and biases are random too, and the embedding has more rows than the tokenizer tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(name)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, len(tokenizer) + 3))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter on all projections whose B is not zero, as PEFT saves it."""
    import json

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings},
                        fan_in_fan_out=model.config.model_type == "gpt2")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    document = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": str(base)}
    path.write_text(json.dumps(document), encoding="utf-8")
    return folder
