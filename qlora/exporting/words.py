"""What an export tells the user: what was written, how true it is, and how to load it."""

from __future__ import annotations

import shlex

from qlora.exporting import Exported
from qlora.merging import INTO
from qlora.units import format_bytes


def lines_of(found: Exported) -> list[str]:
    plan = found.plan
    lines = [f"Written: {found.path}  ({format_bytes(found.size_bytes)}; {plan.form.name}, architecture {plan.family.arch})"]
    lines += _adapter_lines(found) if found.adapter is not None else _model_lines(found)
    return [*lines, *(f"Note:    {note}" for note in plan.notes)]


def _model_lines(found: Exported) -> list[str]:
    plan, model, texts = found.plan, found.model, found.texts
    reader = "loaded by Transformers" if model.how == "Transformers" else "read back and run module by module"
    lines = [
        f"How:     {INTO[plan.into]}",
        f"Checked: all {found.numbers.num_tensors} tensors read back; {reader}, in fp32 on {model.num_positions} tokens",
        f"         adapter and merged    {model.merged.words()}",
        f"         merged and exported   {model.exported.words()}; allowed: KL {model.limit:g}",
        f"         adapter and exported  {model.whole.words()}; the adapter itself: KL {model.kl_of_adapter:.2g}",
        f"Tokens:  {texts.words()}" + ("" if texts.example is None else f"; the first that differs: {texts.example[:40]!r}"),
    ]
    if model.trained is not None:
        lines.append(f"Cost:    against what was trained, the adapter on the base in 4 bits (NF4): {model.trained.words()}; "
                     "--into nf4 starts from what was trained")
    if model.exported.kl > 0.1 * model.kl_of_adapter > 0:
        lines.append("Note:    rounding takes a tenth or more of what the adapter does; a finer format keeps more")
    return [*lines, *_load_lines(found)]


def _load_lines(found: Exported) -> list[str]:
    plan, path, folder = found.plan, str(found.path), str(found.folder)
    name = plan.file.rpartition("-")[0].lower()
    chat = ("the chat template is in the Modelfile" if found.has_template
            else "Ollama guesses the chat template by that inside the file")
    given = "" if found.model.from_header else f", config=AutoConfig.from_pretrained({plan.parts.adapter.base!r})"
    adapter = plan.parts.adapter
    tokenizer = str(adapter.folder) if (adapter.folder / "tokenizer.json").is_file() else adapter.base
    return [
        f"Ollama:       {shlex.join(['ollama', 'create', name, '-f', str(found.folder / 'Modelfile')])}   # {chat}",
        f"llama.cpp:    {shlex.join(['llama-cli', '-m', path])}",
        f"vLLM:         {shlex.join(['vllm', 'serve', path, '--tokenizer', tokenizer])}   # it calls GGUF experimental",
        f"Transformers: AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={plan.file!r}{given})",
    ]


def _adapter_lines(found: Exported) -> list[str]:
    plan, check = found.plan, found.adapter
    return [
        f"Checked: {check.num_products} products read back, off by {check.share:.1g} of their largest number at most (allowed: "
        f"{check.limit:.0e})",
        f"         on the base in fp32, {check.num_positions} tokens: {check.agreement.words()}; the adapter itself: "
        f"KL {check.kl_of_adapter:.2g}",
        f"llama.cpp:    {shlex.join(['llama-cli', '-m', 'BASE.gguf', '--lora', str(found.path)])}",
        f"Ollama:       {shlex.join(['ollama', 'create', 'NAME', '-f', str(found.folder / 'Modelfile')])}   # first name "
        "the base in it",
        f"The base must be a GGUF file of {plan.parts.adapter.base}. vLLM and Transformers load the adapter's own folder.",
    ]
