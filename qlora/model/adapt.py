"""Put LoRA adapters on a frozen base, and check what stands there before anything is trained.

PEFT's `prepare_model_for_kbit_training` is not used: it turns embeddings and output head into fp32, 2 GiB on an 8B.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qlora.architecture import TargetSelection, lora_parameters
from qlora.errors import VerificationError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_adapters(
    model: PreTrainedModel,
    selection: TargetSelection,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int,
    dtype: torch.dtype,
) -> PeftModel:
    """LoRA on the selected projections: h = W x + (alpha / r) B A x, everything else frozen.

    A of shape (r, in) is Kaiming-uniform and B of shape (out, r) zero (https://arxiv.org/abs/2106.09685, section 4.1),
    so the adapted model equals the base until the first step. The same seed gives the same adapters, on any device;
    the program's random state is left as it was. On a model on meta the adapters are on meta too.

    Args:
        model: changed in place, and held by what is returned.
        dtype: of the adapters, 16-bit, or fp32 on cards without bf16.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(selection.patterns),
        # Where GPT-2 is quantised, its Conv1D has become a Linear4bit with the usual (out, in) weight, and PEFT does
        # not look at this. It is for those who load the adapter on a 16-bit GPT-2, whose weights are (in, out).
        fan_in_fan_out=any(projection.module == "Conv1D" for projection in selection.projections),
        bias="none",
        task_type="CAUSAL_LM",
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # PEFT draws A on the CPU and moves it; other devices stay untouched
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def verify_adapters(
    model: PeftModel,
    selection: TargetSelection,
    r: int,
    *,
    dtype: torch.dtype | None = None,
    num_quantised: int | None = None,
) -> None:
    """Hold what was built against what was planned, before a step is spent on it.

    Args:
        dtype: what the adapters should be in; None accepts any, as long as it is one.
        num_quantised: 4-bit modules there should be; None takes the architecture's, which leaves the head in 16 bit.

    Raises:
        VerificationError: with every difference found.
    """
    import bitsandbytes as bnb

    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = []
    strangers = [name for name in trainable if ".lora_A." not in name and ".lora_B." not in name]
    if strangers:
        problems.append(f"{len(strangers)} trainable tensors are no adapters, the first is {strangers[0]}.")
    found, planned = sum(p.numel() for p in trainable.values()), lora_parameters(selection, r)
    if found != planned:
        problems.append(f"{found:,} parameters are trainable, planned were {planned:,}.")
    missing = {path for p in selection.projections for path in p.paths} - _adapted_paths(trainable)
    if missing:
        problems.append(f"{len(missing)} selected modules have no adapter, the first is {min(missing)}.")
    hollow = [name for name, parameter in trainable.items() if parameter.is_meta]
    if hollow and not all(parameter.is_meta for parameter in model.parameters()):
        problems.append(f"{len(hollow)} adapter tensors have no values, the first is {hollow[0]}.")
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in trainable.values())
    wanted = None if dtype is None else str(dtype).removeprefix("torch.")
    if len(dtypes) > 1 or (wanted is not None and set(dtypes) - {wanted}):
        held = ", ".join(f"{count} tensors in {name}" for name, count in sorted(dtypes.items()))
        problems.append(f"The adapters are {held}; planned was {wanted or 'one type'}.")
    expected = selection.architecture.num_quantised_modules if num_quantised is None else num_quantised
    quantised = sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    if quantised != expected:
        problems.append(f"{quantised} modules of the base are 4-bit, planned were {expected}.")
    if problems:
        raise VerificationError(
            "The model that was built is not the one that was planned:\n" + "\n".join(problems),
            "Nothing was trained. Does the checkpoint hold another model than its config says?",
        )


def _adapted_paths(trainable: dict[str, torch.nn.Parameter]) -> set[str]:
    """Names in the base of the modules that have both halves of an adapter."""
    halves = Counter(name.partition(".lora_")[0] for name in trainable if ".lora_" in name)
    return {name.removeprefix("base_model.model.") for name, count in halves.items() if count == 2}
