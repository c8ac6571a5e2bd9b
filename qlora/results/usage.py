"""The code with which others load an adapter: Python for PEFT and Transformers, a command for vLLM."""

from __future__ import annotations

import json
import re
import shlex

from qlora.results.facts import ModelFacts, RunSummary

_TORCH_NAMES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
# vLLM takes no other value of --max-lora-rank: vllm/config/lora.py, MaxLoRARanks, in v0.8 as in v0.27 (1 only in the newer).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TINY = "builtin:tiny"


def load_with_peft(summary: RunSummary, *, four_bits: bool) -> str:
    """Lines of Python that make `model` and `tokenizer`: with the base in 4 bits, as it was trained on, or in 16."""
    names = ["AutoModelForCausalLM", "AutoTokenizer"] + ["BitsAndBytesConfig"] * four_bits
    adapter = quoted(summary.adapter)
    lines = [
        "import torch", "from peft import PeftModel", f"from transformers import {', '.join(names)}", *_imports(summary.model),
        "", *(_four_bits(summary) if four_bits else ()),
        _base_line("base", summary, four_bits=four_bits),
        f"model = PeftModel.from_pretrained(base, {adapter})",
        f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
    ]
    return "\n".join(lines)


def four_bits_instead(summary: RunSummary) -> str:
    """The lines of `load_with_peft` that are others where the base is loaded in 4 bits."""
    return "\n".join(["from transformers import BitsAndBytesConfig", "", *_four_bits(summary),
                      _base_line("base", summary, four_bits=True)])


def load_with_transformers(summary: RunSummary) -> str:
    """Lines of Python that make `model` and `tokenizer` without naming PEFT, which must be installed all the same."""
    adapter = quoted(summary.adapter)
    return "\n".join([
        "import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", *_imports(summary.model), "",
        _base_line("model", summary, four_bits=False),
        f"model.load_adapter({adapter})",
        f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
    ])


def answer_with_model(summary: RunSummary) -> str:
    """Lines of Python that get an answer out of `model` and `tokenizer`, ending at the tokens that end one."""
    data, stops = summary.data, ""
    if not data.is_chat:
        ask = ['inputs = tokenizer("...", return_tensors="pt").to(model.device)']
    else:
        ask = [
            'messages = [{"role": "user", "content": "..."}]',
            "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
            'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)',
        ]
        tokens = ", ".join(quoted(token) for token in data.template.stop_tokens) if data.template else ""
        stops = f", eos_token_id=tokenizer.convert_tokens_to_ids([{tokens}])" if tokens else ""
    return "\n".join([
        *ask,
        f"output = model.generate(**inputs, max_new_tokens=256, do_sample=False{stops})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ])


def serve_with_vllm(summary: RunSummary) -> str:
    """The command that serves base and adapter; empty where vLLM cannot: the embedded base, or a rank that is too high.

    The tokenizer is named where its chat template is not the base's own; vLLM takes the base's revision for it otherwise.
    """
    model, rank = summary.model, summary.settings["lora.r"].value
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if model.base == _TINY or allowed is None:
        return ""
    wanted = summary.adapter.rpartition("/")[2] if summary.on_hub else summary.name
    name = re.sub(r"[^\w.-]+", "-", wanted, flags=re.ASCII).strip("-")
    words = ["vllm", "serve", base_name(model)]
    if model.revision and not model.is_folder:
        words += ["--revision", model.revision]
    if summary.data.template and summary.data.template.name != "tokenizer":
        words += ["--tokenizer", summary.adapter] + (["--tokenizer-revision", "main"] if summary.on_hub else [])
    words += ["--enable-lora", "--max-lora-rank", str(allowed), "--lora-modules", f"{name or 'adapter'}={summary.adapter}"]
    return shlex.join(words)


def base_name(model: ModelFacts) -> str:
    """What stands for the base in code: for a folder of which only the name is told, a path to be filled in."""
    return f"path/to/{model.base}" if model.is_folder and not re.search(r"[/\\~]", model.base) else model.base


def quoted(text: str) -> str:
    """A text as a Python or JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _imports(model: ModelFacts) -> list[str]:
    return ["from qlora.model.tiny import tiny_folder  # the one base that is not on the Hub"] if model.base == _TINY else []


def _four_bits(summary: RunSummary) -> list[str]:
    return ["four_bits = BitsAndBytesConfig(",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
            f"    bnb_4bit_compute_dtype={_dtype(summary)},", ")"]


def _base_line(name: str, summary: RunSummary, *, four_bits: bool) -> str:
    model = summary.model
    words = ["str(tiny_folder())" if model.base == _TINY else quoted(base_name(model))]
    if model.revision and not model.is_folder and model.base != _TINY:
        words.append(f"revision={quoted(model.revision)}")
    # Without a device_map, transformers brings a 4-bit base to the GPU by itself, and leaves one in 16 bits on the CPU.
    words += ["quantization_config=four_bits"] * four_bits + [f"dtype={_dtype(summary)}"]
    words += [] if four_bits else ['device_map="auto"']
    return f"{name} = AutoModelForCausalLM.from_pretrained({', '.join(words)})"


def _dtype(summary: RunSummary) -> str:
    decision = summary.settings.get("model.dtype")
    return _TORCH_NAMES.get(str(decision.value) if decision else "", "torch.bfloat16")
