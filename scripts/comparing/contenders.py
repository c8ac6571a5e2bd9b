"""Who takes part, with which settings, and whether it is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

OURS, PLAIN, LOGITS, UNSLOTH, AXOLOTL, LITGPT, TORCHTUNE = "qlora", "trl", "trainer", "unsloth", "axolotl", "litgpt", "torchtune"
# As `qlora._compat.prepare_environment` sets them for us: threads that spin for a moment before they sleep, and large pages.
_BEST_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000", "THP_MEM_ALLOC_ENABLE": "1"}


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        kind: which program it is.
        settings: of a recipe for ours, of TRL's `SFTConfig` for the others.
        environment: variables that are set for its process.
        needs: modules that must be there; `needs_gpu`: and a GPU.
        cold_start: it is started once before all others, with nothing kept, for the time that this takes.
        tried: this runner was run where it was written; the others follow their documentation.
        named_only: it takes part where it is named.
    """

    name: str
    title: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False
    cold_start: bool = False
    tried: bool = True
    named_only: bool = False

    @property
    def is_ours(self) -> bool:
        return self.kind == OURS

    @property
    def is_plain(self) -> bool:
        """The stack that a user would write by hand."""
        return self.kind in (PLAIN, LOGITS)

    @property
    def alternates(self) -> bool:
        """It waits between blocks; the others are whole programs, which run once from beginning to end."""
        return self.kind in (OURS, PLAIN, LOGITS, UNSLOTH)

    def missing(self, on_gpu: bool) -> str:
        """Why it does not take part; "" where it does."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        return "needs a GPU" if self.needs_gpu and not on_gpu else ""


_HUGGING_FACE = ("transformers", "peft", "bitsandbytes")
_KEPT = {"memory.cache_base": True}
_WITHOUT = {"gradient_checkpointing": False}
_WITH = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

CONTENDERS = (
    Contender("qlora", "this project, as it plans by itself", OURS, _KEPT, cold_start=True),
    Contender("qlora-peft", "this project with PEFT's own backward pass", OURS, {**_KEPT, "memory.fused_lora": False}, named_only=True),
    Contender("qlora-lean", "this project, recomputing activations", OURS,
              {**_KEPT, "memory.checkpointing": True, "memory.fused_lora": True, "memory.loss_chunk": "128MiB"}, named_only=True),
    Contender("qlora-fused", "this project, its backward pass written by hand, activations kept", OURS,
              {**_KEPT, "memory.checkpointing": False, "memory.fused_lora": True, "memory.loss_chunk": "128MiB"},
              named_only=True),
    Contender("plain", "Transformers, PEFT, bitsandbytes and TRL with their defaults", PLAIN, needs=(*_HUGGING_FACE, "trl")),
    Contender("plain-best", "the same, best settings, recomputing activations", PLAIN, _WITH, _BEST_ENVIRONMENT,
              (*_HUGGING_FACE, "trl")),
    Contender("plain-fast", "the same, best settings, activations kept", PLAIN, _WITHOUT, _BEST_ENVIRONMENT,
              (*_HUGGING_FACE, "trl")),
    Contender("plain-logits", "Transformers' Trainer without TRL, activations and logits kept", LOGITS, _WITHOUT,
              _BEST_ENVIRONMENT, _HUGGING_FACE),
    Contender("unsloth", "Unsloth", UNSLOTH, needs=("unsloth", "trl"), needs_gpu=True, tried=False),
    Contender("axolotl", "Axolotl", AXOLOTL, needs=("axolotl",), needs_gpu=True, tried=False),
    Contender("litgpt", "LitGPT", LITGPT, needs=("litgpt",), needs_gpu=True, tried=False),
    Contender("torchtune", "torchtune", TORCHTUNE, needs=("torchtune", "torchao"), tried=False),
)
