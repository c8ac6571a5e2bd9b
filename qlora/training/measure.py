"""Planned against measured: train the worst batch of a plan for real, and write down what it took.

A cell is a model under a budget. It is planned as `qlora plan` does it, built with random weights and trained for two
optimizer steps by the functions of `qlora train`, under the plan's cap; one line of JSON holds both sides. scripts/measure
runs many, each in a process of its own. Nothing is downloaded, and nothing heavy is imported before a cell runs.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.catalog import find_id
from qlora.errors import RecipeError
from qlora.generation import rows_at_once
from qlora.hardware import Device, context_bytes, find_device
from qlora.planning.cache import library_versions
from qlora.planning.plan import Plan
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.training.fitting import allocator_name
from qlora.training.meter import MemoryMeter
from qlora.training.planner import plan_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.training.setup import Setup

NUM_STEPS = 2  # optimizer state is there from the second on
# Generation is planned for answers of 256 tokens, which would take longer than all the rest. Its figure is a bound here, and
# the peak that is compared is that of the other phases. On a CPU the noise that random weights are cut from counts as loading,
# which it is not: 24 MiB, more than a small model.
_ANSWER_TOKENS, _PLANNED_ANSWER_TOKENS = 8, 256
COMPARED_PHASES = {"cuda": ("load", "train", "eval"), "cpu": ("train", "eval")}
_ALWAYS = ("model.weights=random", f"train.max_steps={NUM_STEPS}", "train.eval_every=0", "train.save_every=0")
_SETTINGS = ("lora.r", "train.micro_batch", "train.accumulation", "data.max_length", "data.packing", "lora.targets",
             "memory.checkpointing", "train.optimizer", "model.attention", "model.dtype", "memory.generation_tokens")

# Small models that need no catalog, for machines without a GPU: wide enough that a step takes tens of MiB.
_SMALL_MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
                  vocab_size=4096, max_position_embeddings=2048),
    "qwen3": dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                  head_dim=64, vocab_size=6144, max_position_embeddings=2048, tie_word_embeddings=True),
    "gemma2": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=64, vocab_size=4096, max_position_embeddings=2048, sliding_window=128, query_pre_attn_scalar=64),
    "gpt2": dict(n_embd=384, n_layer=3, n_head=6, vocab_size=4096, n_positions=2048),
    "phi3": dict(hidden_size=320, intermediate_size=896, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
                 vocab_size=3200, max_position_embeddings=2048, original_max_position_embeddings=2048),
}


@dataclass(frozen=True)
class Cell:
    """One measurement: a model, and what is fixed of its settings; the rest is planned.

    Attributes:
        model: a Hub id of the catalog, a folder with config.json, or "small:llama" for a small one of that architecture.
        overrides: `section.setting=value`, memory.budget among them.
    """

    model: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Cell:
        """From a line such as "Qwen/Qwen3-8B memory.budget=8GB lora.r=16".

        Raises:
            RecipeError: the model is missing, or there are two.
        """
        words = text.split()
        models = [word for word in words if "=" not in word]
        if len(models) != 1:
            raise RecipeError(f'"{text}" names {len(models)} models; a cell has one.',
                              "Write MODEL section.setting=value ..., such as Qwen/Qwen3-8B memory.budget=8GB lora.r=16")
        return cls(find_id(models[0]) or models[0], tuple(word for word in words if "=" in word))

    def __str__(self) -> str:
        return " ".join((self.model, *self.overrides))


def parse_cells(text: str) -> list[Cell]:
    """One cell a line; empty lines and what follows a # are left out."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [Cell.parse(line) for line in lines if line]


# --- one cell ----------------------------------------------------------------------------------------------------------


def plan_cell(cell: Cell, device: Device, folder: Path) -> Plan:
    """The plan of a cell.

    Args:
        folder: where the config of a small model is written.

    Raises:
        QloraError: see `qlora.training.planner.plan_model`.
    """
    return plan_model(_model_of(cell, folder), device=device, overrides=(*_ALWAYS, *cell.overrides))


def describe_cell(cell: Cell, plan: Plan | None, device: Device, command: str = "") -> dict[str, Any]:
    """The part of a line that is known before anything is trained; `plan` is None where there is none."""
    line = {
        "cell": str(cell), "model": cell.model, "device": device.name, "kind": device.kind, "capability": device.capability,
        "memory_bytes": device.memory_bytes, "os": platform.system(),
        "driver": _driver_version() if device.kind == "cuda" else None, "allocator": allocator_name(device),
        "versions": {"python": platform.python_version(), **library_versions()}, "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if plan is None:
        return line
    return {
        **line, "budget_bytes": plan.budget_bytes, "fits": plan.fits,
        "settings": {name: plan.settings[name] for name in _SETTINGS},
        "planned": {
            "peak_bytes": plan.peak_bytes, "phases": plan.phases, "reserved_bytes": plan.reserved_bytes,
            "context_bytes": plan.parts["context"], "margin_bytes": plan.parts["margin"],
            "tokens_per_second": plan.tokens_per_second,
        },
    }


def measure_cell(cell: Cell, plan: Plan, folder: Path, *, command: str = "") -> dict[str, Any]:
    """Train the worst batch of a plan, evaluate, answer and save, in a process that has trained nothing yet.

    Args:
        folder: an empty one, for rows, metrics and adapter.

    Returns:
        The line: what `describe_cell` says, and what was measured. Running out of memory is a result too: `out_of_memory` is
        set, and the figures are those up to it, the phase in which it happened being the last.

    Raises:
        QloraError: a model that cannot be built, or a loss that is not finite.
    """
    import torch

    started = time.perf_counter()
    setup = _make_setup(cell, plan, folder)
    meter, watching = _make_meter(setup.device)
    rows: list[dict[str, Any]] = []
    out_of_memory = None
    with watching:
        try:
            _run(setup, meter, folder, rows)
        except torch.OutOfMemoryError as error:
            out_of_memory = str(error).splitlines()[0]
    stats = torch.cuda.memory_stats(0) if setup.device.kind == "cuda" else {}
    return {
        **describe_cell(cell, plan, setup.device, command),
        "measured": {"phases": meter.allocated, "reserved": meter.reserved, "context_bytes": context_bytes(setup.device)},
        **_errors(plan, meter if out_of_memory is None else None), "retries": stats.get("num_alloc_retries", 0),
        "out_of_memory": out_of_memory is not None, "message": out_of_memory, **_figures(setup, rows),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _run(setup: Setup, meter: Any, folder: Path, rows: list[dict[str, Any]]) -> None:
    """The flow of `qlora.training.run.train`, with each phase measured by itself. `rows` receives the steps' figures."""
    from qlora.generation import answer
    from qlora.training import stages
    from qlora.training.building import build_model
    from qlora.training.metrics_file import MetricsFile

    progress, settings = Progress(), setup.plan.settings
    with MetricsFile(folder / "metrics.jsonl", progress) as metrics:
        metrics.rows = rows
        with meter.during("load"):
            model, engine = build_model(setup, progress)
        stages.verify(setup, model, engine)
        trainer = stages.assemble(setup, model, engine, folder, on_row=metrics.add)
        trainer.args.train_sampling_strategy = "sequential"  # shuffled, a batch might have no row of full length
        with meter.during("train"):
            trainer.train()
        with meter.during("eval"):
            trainer.measure()
        with meter.during("generate"):
            answer(
                model, setup.tokenizer, _prompts(setup), max_new_tokens=_ANSWER_TOKENS, stop_ids=[],
                tokens_per_batch=settings["memory.generation_tokens"],
            )
        with meter.during("save"):
            stages.save_adapter(model, setup, folder / "adapter")


def _make_setup(cell: Cell, plan: Plan, folder: Path) -> Setup:
    """What `qlora.training.setup.prepare` makes of a recipe, for a plan that is there already and rows of its shape."""
    from qlora.architecture import select_targets
    from qlora.precision import choose_precision
    from qlora.training.setup import Setup, find_model, read_data

    device = find_device(plan.kind)
    num_micro_batches = NUM_STEPS * plan.settings["train.accumulation"]
    train = _write_rows(folder / "train.jsonl", _lengths(plan, packed=plan.settings["data.packing"]) * num_micro_batches)
    validation = _write_rows(folder / "validation.jsonl", _lengths(plan, packed=False))
    overrides = (*_ALWAYS, *cell.overrides, f"data.validation={validation}", "data.format=text",
                 f"data.max_length={plan.settings['data.max_length']}")
    recipe = build_recipe(overrides=overrides, model=_model_of(cell, folder), data=str(train))
    base, config, architecture = find_model(recipe, Progress())
    tokenizer = _word_tokenizer()
    data = read_data(recipe, tokenizer, architecture.max_positions, Progress())
    return Setup(
        recipe, base, device, choose_precision(recipe.model.dtype, device), config, architecture, tokenizer, data,
        select_targets(architecture, recipe.lora.targets), plan,
    )


def _model_of(cell: Cell, folder: Path) -> str:
    """model.base of a cell; a small model is a config in `folder`."""
    kind, _, name = cell.model.partition(":")
    if kind != "small":
        return cell.model
    if name not in _SMALL_MODELS:
        raise RecipeError(f"There is no small model {name!r}.", f"There are {', '.join(_SMALL_MODELS)}.")
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, bos_token_id=1, eos_token_id=1, pad_token_id=0, **_SMALL_MODELS[name])
    config.save_pretrained(folder / name)
    return str(folder / name)


# --- rows --------------------------------------------------------------------------------------------------------------


def _lengths(plan: Plan, *, packed: bool) -> list[int]:
    """Tokens of each row of a micro-batch, as a plan without data takes them to be: one of full length and others of half
    that; a pack has two of half.
    """
    length, micro_batch = plan.settings["data.max_length"], plan.settings["train.micro_batch"]
    if packed:
        return [length // 2, length - length // 2]
    return [length, *[max(2, length // 2)] * (micro_batch - 1)]


def _write_rows(path: Path, lengths: Sequence[int]) -> Path:
    """One row a length, in words that are a token each; the tokenizer adds the last one."""
    texts = [" ".join(f"w{(7 * row + i) % _NUM_WORDS}" for i in range(length - 1)) for row, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


_NUM_WORDS = 211


def _word_tokenizer() -> PreTrainedTokenizerBase:
    """A word is a token, so that rows have the length that is wanted of them, whatever the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": 2 + i for i in range(_NUM_WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def _prompts(setup: Setup) -> list[list[int]]:
    """As many prompts of full length as a batch of generation holds."""
    length, tokens = setup.plan.settings["data.max_length"], setup.plan.settings["memory.generation_tokens"]
    longest = max((row.input_ids for row in setup.data.train), key=len)
    return [longest] * rows_at_once(length, _PLANNED_ANSWER_TOKENS, tokens)


# --- figures -----------------------------------------------------------------------------------------------------------


def _make_meter(device: Device) -> tuple[Any, Any]:
    """Something to measure phases with, and what it must be used within."""
    if device.kind == "cuda":
        return MemoryMeter(device), nullcontext()
    from qlora.training.cpu_memory import TensorMeter

    meter = TensorMeter()
    return meter, meter.watching()


def _errors(plan: Plan, meter: Any | None) -> dict[str, Any]:
    """Planned against measured in percent of what was measured; below 0 is an under-estimate. None where a run broke off."""
    if meter is None:
        return {"error_percent": None, "phase_error_percent": {}, "reserved_error_percent": None}
    phases = {phase: _percent(plan.phases[phase], size) for phase, size in meter.allocated.items() if phase in plan.phases}
    reserved = max(meter.reserved.values(), default=0)
    return {
        "error_percent": _percent(compared_peak(plan.phases, plan.kind), compared_peak(meter.allocated, plan.kind)),
        "phase_error_percent": phases,
        "reserved_error_percent": _percent(plan.reserved_bytes, reserved) if reserved else None,
    }


def compared_peak(phases: Mapping[str, int], kind: str) -> int:
    """The highest of the phases that are measured just as they are planned, on a device of this kind."""
    return max(phases.get(phase, 0) for phase in COMPARED_PHASES[kind])


def _percent(planned: int, measured: int) -> float:
    return round(100 * (planned / measured - 1), 3)


def _figures(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Speed of the last step, loss and gradient norm of the first and last."""
    from qlora.planning.speed import flops_per_token

    steps = [row for row in rows if "loss" in row]
    ends = [steps[0], steps[-1]] if steps else []
    return {
        "tokens_per_second": steps[-1]["tokens_per_second"] if steps else None, "loss": [row["loss"] for row in ends],
        "gradient_norm": [row["grad_norm"] for row in ends],
        "flops_per_token": flops_per_token(setup.architecture, setup.plan.settings),
    }


def _driver_version() -> str | None:
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        version = nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    finally:
        nvml.nvmlShutdown()
