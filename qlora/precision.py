"""The one policy for number formats: what is computed in which type, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.errors import HardwareError
from qlora.hardware import Device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """`compute` is the type of activations, of dequantised weights and of every weight that is not quantised;
    `adapters` the type in which LoRA weights are kept and updated. `autocast` says that the two differ and torch
    converts on the way. Names are bf16, fp16 and fp32.
    """

    compute: str
    adapters: str
    autocast: bool
    reason: str


def choose_precision(wanted: str, device: Device) -> Precision:
    """bf16 where the device has it; fp16 with fp32 adapters and loss scaling where not.

    bf16 has the range of fp32, so everything, adapters included, is kept in it and nothing is converted. fp16 overflows
    at 65,504: its adapters are updated in fp32 and the loss is scaled.

    Raises:
        HardwareError: a type is asked for that the device lacks.
    """
    if wanted == "fp32":
        return Precision("fp32", "fp32", False, "given; four bytes a number, for comparisons rather than for small cards")
    if wanted == "bf16" or (wanted == "auto" and device.has_bf16):
        if not device.has_bf16:
            raise HardwareError(
                f"model.dtype is bf16, but {device.name} (compute capability {_dotted(device)}) has no bf16 arithmetic.",
                "Leave model.dtype at auto, which takes fp16 on this card.",
            )
        where = "the CPU computes in it" if device.kind == "cpu" else f"compute capability {_dotted(device)} has it"
        return Precision("bf16", "bf16", False, f"bf16 has the range of fp32, and {where}")
    if device.kind == "cpu":
        raise HardwareError("model.dtype is fp16, but CPUs train in bf16 or fp32.", "Set model.dtype: bf16 or fp32.")
    why = "given" if wanted == "fp16" else f"compute capability {_dotted(device)} has no bf16"
    return Precision("fp16", "fp32", True, f"{why}; adapters stay in fp32 because fp16 updates would underflow")


def torch_dtype(name: str) -> torch.dtype:
    """torch's name for bf16, fp16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _dotted(device: Device) -> str:
    return ".".join(map(str, device.capability or ()))
