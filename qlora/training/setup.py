"""Everything that a run knows before it reads a weight: machine, model, data, plan. Cheap failures come first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.architecture import Architecture, TargetSelection, describe, find_config, inspection, lora_parameters, select_targets
from qlora.data import PreparedData
from qlora.data import prepare as prepare_data
from qlora.errors import DataError, RecipeError
from qlora.hardware import Device, find_device
from qlora.model.build import load_tokenizer, locate_base
from qlora.planning.choose import Facts, budget_of, choose
from qlora.planning.plan import Plan
from qlora.precision import Precision, choose_precision
from qlora.progress import Progress
from qlora.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setup:
    """A run, ready to be built. `base` is where the model is found; `recipe.model.base` is what the person wrote."""

    recipe: Recipe
    base: str
    device: Device
    precision: Precision
    config: PreTrainedConfig
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    selection: TargetSelection
    plan: Plan


def prepare(recipe: Recipe, progress: Progress | None = None) -> Setup:
    """Look at the machine, the model's config and the data, and decide every setting.

    Raises:
        QloraError: the machine, model, data or recipe cannot be used; nothing has been written.
    """
    progress = progress or Progress()
    device = find_device(recipe.memory.device)
    precision = choose_precision(recipe.model.dtype, device)
    base, config, architecture = find_model(recipe, progress)
    selection = select_targets(architecture, recipe.lora.targets)
    tokenizer = load_tokenizer(
        base, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )
    data = read_data(recipe, tokenizer, architecture.max_positions, progress)
    plan = make_plan(recipe, device, precision, architecture, selection, data)
    return Setup(recipe, base, device, precision, config, architecture, tokenizer, data, selection, plan)


def find_model(recipe: Recipe, progress: Progress) -> tuple[str, PreTrainedConfig, Architecture]:
    """Where the model is, its config, and what the config says of its layers. Reads no weights.

    Raises:
        ModelError: there is no such model, or it is not a causal language model.
    """
    with progress.stage(f"Finding {recipe.model.base}") as update:
        base = locate_base(recipe.model.base, lambda share, text: update(round(share * 100), 100))
        config = find_config(base, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
        return base, config, describe(config)


def read_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, max_positions: int | None, progress: Progress
) -> PreparedData:
    """The rows of a recipe, checked, split and (with a tokenizer) turned into tokens.

    Raises:
        DataError: rows that cannot be read, with file, line and reason.
    """
    settings = recipe.data
    with progress.stage(f"Reading {settings.path}") as update:
        return prepare_data(
            settings.path, tokenizer, split=settings.split, format=settings.format, columns=settings.columns,
            validation=settings.validation, max_rows=settings.max_rows, max_length=settings.max_length,
            chat_template=settings.chat_template, train_on=settings.train_on, on_bad_row=settings.on_bad_row,
            sample_rows=recipe.train.sample_rows, seed=recipe.train.seed, context_limit=max_positions, progress=update,
        )


def refuse_bad_data(data: PreparedData) -> None:
    """Stop where the data holds nothing to learn from.

    Raises:
        DataError: with every finding of level "error".
    """
    errors = [finding for finding in data.findings if finding.level == "error"]
    if errors:
        raise DataError("\n".join(f.text for f in errors), "\n".join(dict.fromkeys(f.fix for f in errors if f.fix)))


def make_plan(
    recipe: Recipe, device: Device, precision: Precision, architecture: Architecture, selection: TargetSelection,
    data: PreparedData,
) -> Plan:
    """Every setting with its reason, and the bytes that are known without running anything."""
    num_sequences = len(data.train)
    if recipe.data.packing:
        from qlora.training.trainer import as_dataset

        num_sequences = len(as_dataset(data.train, pack_to=data.max_length))
    facts = Facts(
        device=device, precision=precision, num_parameters=architecture.num_parameters, num_train_rows=num_sequences,
        num_validation_rows=len(data.validation), max_length=data.max_length, max_length_reason=data.max_length_reason,
    )
    decisions, num_steps = choose(recipe, facts)
    settings = {key: decision.value for key, decision in decisions.items()}
    check_checkpoints(settings)
    num_adapter = lora_parameters(selection, settings["lora.r"])
    facts_of_base = inspection(architecture, selection, settings["lora.r"])
    width = _BYTES[precision.compute]
    adapter_bytes = num_adapter * _BYTES[precision.adapters]
    # AdamW keeps two numbers of the adapters' type for each weight; the 8-bit kind two bytes.
    state_bytes = 2 * adapter_bytes if settings["train.optimizer"] == "adamw" else 2 * num_adapter
    parts = {
        "base": facts_of_base["bytes"]["nf4"],
        "embeddings": architecture.embedding_parameters * width,
        "head": 0 if architecture.tied_embeddings else architecture.head_parameters * width,
        "adapters": adapter_bytes, "gradients": adapter_bytes, "optimizer": state_bytes,
    }
    return Plan(
        model=recipe.model.base, device=device.name, budget_bytes=budget_of(recipe, device), decisions=decisions,
        parts=parts, num_steps=num_steps,
    )


def check_checkpoints(settings: dict[str, Any]) -> None:
    """`keep: best` needs a checkpoint at each evaluation.

    Raises:
        RecipeError: the two intervals do not fit.
    """
    evaluate, save = settings["train.eval_every"], settings["train.save_every"]
    if settings["train.keep"] == "best" and evaluate and (not save or save % evaluate):
        raise RecipeError(
            f"train.keep is best, but checkpoints come every {save} steps and evaluations every {evaluate}, so the best "
            "one would not be on disk.",
            f"Set train.save_every to a multiple of {evaluate}, or train.keep: last.",
        )
