"""Everything that a run knows before it reads a weight: machine, model, data, plan. Cheap failures come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.architecture import Architecture, TargetSelection, describe, find_config, lora_parameters, select_targets
from qlora.data import PreparedData
from qlora.data import prepare as prepare_data
from qlora.errors import ModelError, RecipeError
from qlora.hardware import Device, find_device, gpu_is_hidden
from qlora.model.build import load_tokenizer, locate_base, stand_in_tokenizer
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
    notes: tuple[str, ...] = ()


def prepare(recipe: Recipe, progress: Progress | None = None) -> Setup:
    """Look at the machine, the model's config and the data, and decide every setting.

    Raises:
        QloraError: the machine, model, data or recipe cannot be used; nothing has been written.
    """
    progress = progress or Progress()
    check_trackers(recipe)
    device = find_device(recipe.memory.device)
    hidden = gpu_is_hidden() if device.kind == "cpu" and recipe.memory.device == "auto" else None
    if hidden:
        progress.note(f"Running on the CPU, although there is an NVIDIA driver: {hidden}")
    precision = choose_precision(recipe.model.dtype, device)
    base, config, architecture = find_model(recipe, progress)
    selection = select_targets(architecture, recipe.lora.targets)
    tokenizer, notes = find_tokenizer(recipe, base, architecture, progress)
    data = read_data(recipe, tokenizer, architecture.max_positions, progress)
    plan = make_plan(recipe, device, precision, architecture, selection, data)
    return Setup(recipe, base, device, precision, config, architecture, tokenizer, data, selection, plan, notes)


def check(recipe: Recipe, progress: Progress, *, data_only: bool = False) -> tuple[PreparedData, Plan | None]:
    """What `qlora check` looks at: the recipe, the rows, the model's config, and the plan that follows. No weights.

    Args:
        data_only: leave the tokenizer and the model alone; rows and formats are checked, tokens are not counted, and
            there is no plan.

    Raises:
        QloraError: rows that cannot be read, a model that cannot be found.
    """
    if data_only:
        return read_data(recipe, None, None, progress), None
    try:
        setup = prepare(recipe, progress)
    except ModelError as error:
        raise ModelError(error.problem, f"{error.fix}\nWithout the model, `qlora check --data-only` checks the rows.") from error
    return setup.data, setup.plan


def find_model(recipe: Recipe, progress: Progress) -> tuple[str, PreTrainedConfig, Architecture]:
    """Where the model is, its config, and what the config says of its layers. Reads no weights.

    Raises:
        ModelError: there is no such model, or it is not a causal language model.
    """
    with progress.stage(f"Finding {recipe.model.base}") as update:
        base = locate_base(recipe.model.base, lambda share, text: update(round(share * 100), 100))
        config = find_config(base, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
        return base, config, describe(config)


def find_tokenizer(
    recipe: Recipe, base: str, architecture: Architecture, progress: Progress
) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """The model's tokenizer, and what there is to say about it.

    Raises:
        ModelError: it cannot be had. With random weights the embedded base's stands in.
    """
    with progress.stage(f"Finding the tokenizer of {recipe.model.base}"):
        if recipe.model.weights == "random":
            tokenizer, stands_in = stand_in_tokenizer(base, architecture.vocab_size)
            note = "Rows are read with the tokenizer of builtin:tiny, because the model's own is not on this machine."
            return tokenizer, (note,) if stands_in else ()
        found = load_tokenizer(base, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
        return found, ()


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
            chat_template=settings.chat_template, train_on=settings.train_on, packing=settings.packing,
            on_bad_row=settings.on_bad_row, num_samples=recipe.train.sample_rows, seed=recipe.train.seed,
            context_limit=max_positions, progress=update,
        )


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
        num_validation_rows=len(data.validation), max_length=data.max_length, max_length_reason=_why_length(data),
        data_format=data.rowset.format, data_format_reason=data.rowset.format_reason,
    )
    decisions, num_steps = choose(recipe, facts)
    settings = {key: decision.value for key, decision in decisions.items()}
    check_checkpoints(settings)
    num_adapter = lora_parameters(selection, settings["lora.r"])
    width = _BYTES[precision.compute]
    adapter_bytes = num_adapter * _BYTES[precision.adapters]
    # AdamW keeps two numbers of the adapters' type for each weight; the 8-bit kind two bytes.
    state_bytes = 2 * adapter_bytes if settings["train.optimizer"] == "adamw" else 2 * num_adapter
    # Norms and, in a mixture of experts, all experts: counted with the base, in 16 bit.
    rest = (architecture.num_parameters - architecture.quantised_parameters - architecture.embedding_parameters
            - architecture.head_parameters)
    parts = {
        "base": architecture.quantised_bytes + rest * width,
        "embeddings": architecture.embedding_parameters * width,
        "head": architecture.head_parameters * width,
        "adapters": adapter_bytes, "gradients": adapter_bytes, "optimizer": state_bytes,
    }
    return Plan(
        model=recipe.model.base, device=device.name, budget_bytes=budget_of(recipe, device), decisions=decisions,
        parts=parts, num_steps=num_steps,
    )


def _why_length(data: PreparedData) -> str:
    longest = data.lengths.max
    if data.max_length >= longest:
        return f"the longest of {len(data.rowset.rows):,} rows has {longest:,.0f} tokens"
    return f"rows go up to {longest:,.0f} tokens; {data.fit.num_truncated:,} are cut"


def check_trackers(recipe: Recipe) -> None:
    """A tracker that is not installed is found out now, not after the model is loaded.

    Raises:
        RecipeError: names the package to install.
    """
    from importlib.util import find_spec

    for name in recipe.train.report_to:
        if find_spec(name) is None:
            raise RecipeError(f"train.report_to names {name}, which is not installed.",
                              f"Run `pip install {name}`, or leave it out: metrics.jsonl has the same figures.")


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


def library_versions() -> dict[str, str]:
    """Versions of Python and of every library whose change could change a run."""
    import platform
    from importlib.metadata import version

    libraries = ("qlora", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}
