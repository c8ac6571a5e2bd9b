"""What earlier runs on this machine found out, so that one that asks the same begins at once.

Two things come before the first step and do not depend on what is learnt: whether the longest rows fit, and how good the bare base
is on the held-out rows. Both are kept by everything that they rest on: the program's own source, the libraries and the device,
the rows, and the settings that matter to them. A sweep over learning rates finds out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from qlora import home
from qlora.data import fingerprint
from qlora.evaluation import Evaluation
from qlora.planning.cache import keep, recall
from qlora.training.setup import Setup

# Settings of which the size of no tensor depends, once the plan is made.
_SIZELESS = frozenset({
    "model.base", "model.revision", "data.path", "lora.alpha", "train.epochs", "train.max_steps", "train.learning_rate",
    "train.schedule", "train.warmup", "train.weight_decay", "train.max_grad_norm", "train.seed", "train.eval_every", "train.monitor_every",
    "train.save_every", "train.save_minutes", "train.keep", "train.report_to", "train.try_out", "memory.budget", "memory.cache_base",
})
# Settings that a held-out loss and answers depend on: how numbers are computed, and which rows go through the model together. Fresh
# adapters add nothing.
_OF_RESULTS = ("model.dtype", "model.attention", "train.micro_batch", "train.accumulation", "lora.targets", "lora.r")
_LAST = "save"  # phase of a trial


@dataclass(frozen=True)
class Trial:
    """A trial that went well on the first rung: the highest memory of its phases, in bytes.

    Attributes:
        allocated: of tensors; `reserved` what the GPU's allocator held, empty on a CPU.
        date: of the day, as 2026-11-22.
    """

    allocated: dict[str, int]
    reserved: dict[str, int]
    date: str


def earlier_trial(setup: Setup) -> Trial | None:
    """The trial of a run of the same shapes; None where there was none, or where it took more than may be taken now."""
    found = recall(home.starts_home(), _of_trial(setup))
    if not isinstance(found, dict):
        return None
    trial = Trial(**found)
    room = setup.plan.budget_bytes - setup.plan.parts["context"]
    return trial if max((trial.reserved or trial.allocated).values()) <= room else None


def keep_earlier_trial(setup: Setup, allocated: Mapping[str, int], reserved: Mapping[str, int]) -> None:
    """Remember a trial that went through everything on the first rung; one that broke off is none."""
    if _LAST in allocated:
        keep(home.starts_home(), _of_trial(setup), {"allocated": dict(allocated), "reserved": dict(reserved), "date": _today()})


def earlier_evaluation(setup: Setup, base: str) -> tuple[Evaluation, str] | None:
    """How good this very base was on these held-out rows without an adapter, and the day on which that was measured.

    Args:
        base: fingerprint of the frozen weights.
    """
    if setup.recipe.model.trust_remote_code:  # what code computes does not show in its weights
        return None
    found = recall(home.starts_home(), _of_evaluation(setup, base))
    return (Evaluation.from_record(found["evaluation"]), found["date"]) if isinstance(found, dict) else None


def keep_earlier_evaluation(setup: Setup, base: str, evaluation: Evaluation) -> None:
    """Remember it."""
    keep(home.starts_home(), _of_evaluation(setup, base), {"evaluation": evaluation.to_record(), "date": _today()})


# --- what they rest on -------------------------------------------------------------------------------------------------


def _of_trial(setup: Setup) -> dict[str, Any]:
    settings = {key: value for key, value in setup.plan.settings.items() if key not in _SIZELESS}
    return {**_common(setup), "about": "trial", "settings": settings, "train": setup.data.fingerprint, "phases": setup.plan.phases}


def _of_evaluation(setup: Setup, base: str) -> dict[str, Any]:
    settings = {key: value for key, value in setup.plan.settings.items()
                if key in _OF_RESULTS or (key.startswith("memory.") and key not in _SIZELESS)}
    return {**_common(setup), "about": "base", "base": base, "settings": settings}


def _common(setup: Setup) -> dict[str, Any]:
    from qlora.training.probe import answer_tokens

    # Rotary scaling and the like are in no weight: the config says how they are computed with.
    config = {key: value for key, value in setup.config.to_dict().items() if not key.startswith("_")}
    data = setup.data
    samples = [[sample.prompt_ids, sample.reference] for sample in data.samples]
    return {"device": setup.device.lasting, "config": config, "validation": fingerprint(data.validation), "samples": samples, "stop": data.stop_ids,
            "answer_tokens": answer_tokens(setup) if samples else 0}


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()
