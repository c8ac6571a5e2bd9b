"""Everything that a run knows before it reads a weight: machine, model, data, plan. Cheap failures come first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.architecture import Architecture, TargetSelection, describe, find_config, select_targets
from qlora.catalog.lookup import cached_commit
from qlora.data import PreparedData
from qlora.data import prepare as prepare_data
from qlora.errors import DoesNotFitError, ModelError, RecipeError
from qlora.generation import longest_answer
from qlora.hardware import Device, find_device, gpu_is_hidden
from qlora.model.build import load_tokenizer, locate_base, stand_in_tokenizer
from qlora.model.safe_files import refuse_unsafe_files
from qlora.planning.plan import Plan
from qlora.precision import Precision, choose_precision
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.fitting import Job, Rows, make_plan
from qlora.training.preflight import Check, check_before_run
from qlora.training.pushing import check_hub
from qlora.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# A row's ids and labels as Python integers in lists, and once more as the trainer's Arrow table.
_BYTES_PER_TOKEN = 2 * 8 + 2 * 8


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


def prepare(
    recipe: Recipe, progress: Progress | None = None, *, device: Device | None = None, look_around: bool = False,
    plan: Plan | None = None,
) -> Setup:
    """Look at the machine, the model's config and the data, and decide every setting.

    Args:
        device: plan for this one, instead of the one that is here.
        look_around: also look for the longest length that fits; what is near is looked for wherever nothing fits.
        plan: of a run that is gone on with; no new one is made.

    Raises:
        QloraError: the machine, model, data or recipe cannot be used; nothing has been written.
    """
    progress = progress or Progress()
    check_trackers(recipe)
    elsewhere, device = device is not None, device or find_device(recipe.memory.device)
    hidden = gpu_is_hidden() if device.kind == "cpu" and recipe.memory.device == "auto" and not elsewhere else None
    if hidden:
        progress.note(f"Running on the CPU, although there is an NVIDIA driver: {hidden}")
    precision = choose_precision(recipe.model.dtype, device)
    base, config, architecture = find_model(recipe, progress)
    if recipe.model.weights == "pretrained" and Path(base).expanduser().is_dir():
        refuse_unsafe_files(base)  # those of a model on the Hub are looked at when they are fetched
    selection = select_targets(architecture, recipe.lora.targets)
    tokenizer, notes = find_tokenizer(recipe, base, architecture, progress)
    data = read_data(recipe, tokenizer, architecture.max_positions, progress)
    if plan is None:
        job = Job(recipe, device, precision, config, architecture, selection, rows_of(recipe, data))
        plan = make_plan(job, progress, look_around=look_around)
    if not plan.settings["train.sample_rows"]:
        data = replace(data, samples=[])
    return Setup(recipe, base, device, precision, config, architecture, tokenizer, data, selection, plan, notes)


def check(recipe: Recipe, progress: Progress, *, data_only: bool = False) -> tuple[PreparedData, Plan | None, list[Check]]:
    """What `qlora check` looks at: the recipe, the rows, the model's config, the plan that follows, and whether this machine
    has what the plan needs. No weights.

    Args:
        data_only: leave the tokenizer and the model alone; rows and formats are checked, tokens are not counted, and
            there is neither a plan nor a check of the machine.

    Raises:
        QloraError: rows that cannot be read, a model that cannot be found.
    """
    if data_only:
        return read_data(recipe, None, None, progress), None, []
    try:
        setup = prepare(recipe, progress)
    except ModelError as error:
        raise ModelError(error.problem, f"{error.fix}\nWithout the model, `qlora check --data-only` checks the rows.") from error
    return setup.data, setup.plan, [*check_before_run(setup), *check_hub(recipe, progress)]


def find_model(recipe: Recipe, progress: Progress) -> tuple[str, PreTrainedConfig, Architecture]:
    """Where the model is, its config, and what the config says of its layers. Reads no weights.

    Raises:
        ModelError: there is no such model, or it is not a causal language model.
    """
    if recipe.model.trust_remote_code:
        progress.note(f"model.trust_remote_code is on: Python code that comes with {recipe.model.base} is run on this machine, "
                      "and may do whatever you may.")
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


def rows_of(recipe: Recipe, data: PreparedData) -> Rows:
    """What the plan wants to know of the rows."""
    lengths = [len(row.input_ids) for row in (*data.train, *data.validation)]
    num_train = len(data.train)
    if recipe.data.packing:
        from qlora.training.trainer import as_dataset

        num_train = len(as_dataset(data.train, pack_to=data.max_length))
    return Rows(
        num_train=num_train, num_validation=len(data.validation), max_length=data.max_length, max_length_reason=_why_length(data),
        ragged=len(set(lengths)) > 1, format=data.rowset.format, format_reason=data.rowset.format_reason,
        host_bytes=_BYTES_PER_TOKEN * sum(lengths), trained_tokens=None if recipe.data.packing else _trained(data), **_answers(data),
    )


def _trained(data: PreparedData) -> int:
    """Of a row at most."""
    return max((row.num_trained for row in (*data.train, *data.validation)), default=1)


def _answers(data: PreparedData) -> dict[str, int]:
    """What is known of the answers that a run writes; nothing where it writes none."""
    if not data.samples:
        return {}
    return {"prompt_tokens": max(len(sample.prompt_ids) for sample in data.samples), "num_answers": len(data.samples),
            "answer_tokens": longest_answer([sample.reference for sample in data.samples], data.tokenizer)}


def _why_length(data: PreparedData) -> str:
    longest, num_rows = data.lengths.max, len(data.rowset.rows)
    if data.max_length >= longest:
        return f"the longest of {num_rows:,} rows has {longest:,.0f} tokens"
    return f"rows go up to {longest:,.0f} tokens; {data.fit.num_truncated:,} are cut"


def refuse_what_does_not_fit(plan: Plan) -> None:
    """Before anything is downloaded or written.

    Raises:
        DoesNotFitError: with the numbers, and what is near and fits.
    """
    if plan.fits:
        return
    nearest = "".join(f"\n  {each.change}: {format_bytes(each.peak_bytes)}  ({' '.join(each.overrides)})" for each in plan.alternatives)
    raise DoesNotFitError(
        f"{plan.model} does not fit on {plan.device}: with the least that the recipe allows it takes "
        f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}, most of it {plan.largest_part} "
        f"({format_bytes(plan.parts[plan.largest_part])}).",
        f"What would fit:{nearest}" if nearest else "Nothing near it fits either; `qlora models` shows what does.",
        plan.peak_bytes, plan.budget_bytes,
    )


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


def base_revision(setup: Setup) -> str | None:
    """The commit of the base that was loaded; what the recipe says where none is known, as of a folder."""
    named = setup.recipe.model
    return (cached_commit(setup.base, named.revision) if named.weights == "pretrained" else None) or named.revision


def library_versions() -> dict[str, str]:
    """Versions of Python, of this program and of every library whose change could change a run."""
    import platform

    from qlora import __version__
    from qlora.planning import cache

    return {"python": platform.python_version(), "qlora": __version__, **cache.library_versions()}
