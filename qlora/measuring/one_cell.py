"""One cell: planned as `qlora plan` does it, built with random weights and trained by the functions of `qlora train`.

Nothing heavy is imported before a cell runs.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import __version__
from qlora.generation import MAX_ANSWER_TOKENS, rows_at_once
from qlora.hardware import Device, context_bytes, find_device
from qlora.measuring.cells import ALWAYS, Cell, locate
from qlora.planning.cache import library_versions
from qlora.planning.plan import Plan
from qlora.progress import Progress
from qlora.recipe import Recipe, build_recipe
from qlora.training.fitting import allocator_name
from qlora.training.meter import MemoryMeter

if TYPE_CHECKING:
    from qlora.architecture import Architecture
    from qlora.training.setup import Setup

# Generation is planned for long answers, which would take longer than all the rest. Its figure is a bound here, and the peak that
# is compared is that of the other phases. On a CPU the noise that random weights are cut from counts as loading, which it is not:
# 24 MiB, more than a small model.
_ANSWER_TOKENS = 8
# What memory and speed follow from, beside all of lora and memory. Nothing here names a folder of this machine.
_SETTINGS = ("model.dtype", "model.attention", "data.max_length", "data.packing", "train.batch", "train.micro_batch",
             "train.accumulation", "train.optimizer", "train.max_steps", "train.seed")
COMPARED_PHASES = {"cuda": ("load", "train", "eval"), "cpu": ("train", "eval")}


def plan_cell(cell: Cell, device: Device, folder: Path) -> Plan:
    """The plan of a cell for rows of data.max_length tokens, 2,048 where the cell does not say. What else would fit, and how long
    rows could be, is not looked for.

    Args:
        folder: where the config of a small model is written.

    Raises:
        QloraError: an unknown model, one that cannot be trained, or a budget below what the device takes for itself.
    """
    from qlora.training.fitting import Job, Rows, make_plan

    recipe = build_recipe(overrides=(*ALWAYS, *cell.overrides), model=locate(cell, folder), data="none")
    base, config, architecture, selection, precision = _known(recipe, device)
    wanted = recipe.data.max_length
    length = wanted if isinstance(wanted, int) else min(2048, architecture.max_positions or 2048)
    rows = Rows(num_train=None, num_validation=None, max_length=length, max_length_reason="given", ragged=True, format="text",
                format_reason="of a cell")
    return make_plan(Job(recipe, device, precision, config, architecture, selection, rows))


def describe_cell(cell: Cell, plan: Plan | None, device: Device, command: str = "") -> dict[str, Any]:
    """The part of a line that is known before anything is trained; `plan` is None where there is none."""
    line = {
        "cell": str(cell), "model": cell.model, "device": device.name, "kind": device.kind, "capability": device.capability,
        "memory_bytes": device.memory_bytes, "os": platform.system(),
        "driver": _driver_version() if device.kind == "cuda" and device.present else None, "allocator": allocator_name(device),
        "versions": {"python": platform.python_version(), "qlora": __version__, **library_versions()}, "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if plan is None:
        return line
    return {
        **line, "budget_bytes": plan.budget_bytes, "fits": plan.fits,
        "settings": {key: value for key, value in plan.settings.items()
                     if key.startswith(("lora.", "memory.")) or key in _SETTINGS},
        "planned": {
            "peak_bytes": plan.peak_bytes, "phases": plan.phases, "parts": plan.parts, "reserved_bytes": plan.reserved_bytes,
            "context_bytes": plan.parts["context"], "margin_bytes": plan.parts["margin"],
            "tokens_per_second": plan.tokens_per_second,
        },
    }


def measure_cell(cell: Cell, plan: Plan, folder: Path, *, command: str = "") -> dict[str, Any]:
    """Train the worst batch of a plan, evaluate, answer and save, in a process that has trained nothing yet.

    On a CPU the steps are taken twice: tensors are counted during the first time, which slows it down, and the speed is that of
    the second.

    Args:
        folder: an empty one, for rows, metrics and adapter.

    Returns:
        The line: what `describe_cell` says, and what was measured. Running out of memory is a result too: `out_of_memory` is
        set, and the figures are those up to it, the phase in which it happened being the last.

    Raises:
        QloraError: a model that cannot be built, or a loss that is not finite.
    """
    import torch

    from qlora.training.recovery import is_out_of_memory

    started = time.perf_counter()
    setup = _make_setup(cell, plan, folder)
    meter, watching = _make_meter(setup.device)
    rows: list[dict[str, Any]] = []
    out_of_memory = None
    with watching:
        try:
            _run(setup, meter, folder / "run", rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = (str(error).splitlines() or ["out of memory"])[0]
    timed = rows
    if setup.device.kind == "cpu" and out_of_memory is None:
        _run(setup, None, folder / "timed", timed := [])
    stats = torch.cuda.memory_stats(0) if setup.device.kind == "cuda" else {}
    return {
        **describe_cell(cell, plan, setup.device, command),
        "measured": {"phases": meter.allocated, "reserved": meter.reserved, "context_bytes": context_bytes(setup.device)},
        **_errors(plan, meter if out_of_memory is None else None), "retries": stats.get("num_alloc_retries", 0),
        "out_of_memory": out_of_memory is not None, "message": out_of_memory, **_figures(setup, rows, timed),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _run(setup: Setup, meter: Any | None, folder: Path, rows: list[dict[str, Any]]) -> None:
    """The flow of `qlora.training.run.train`, with each phase measured by itself; without a meter the steps alone.

    `rows` receives the steps' figures, each with the processor's seconds up to then.
    """
    from qlora.training import stages
    from qlora.training.building import build_model

    folder.mkdir()
    phase = meter.during if meter else lambda name: nullcontext()
    with ExitStack() as held:
        with phase("load"):
            model, engine = build_model(setup, Progress())
        held.callback(engine.close)
        stages.verify(setup, model, engine)
        trainer = stages.assemble(
            setup, model, engine, folder, on_row=lambda row: rows.append({**row, "cpu_seconds": time.process_time()})
        )
        trainer.args.train_sampling_strategy = "sequential"  # shuffled, a batch might have no row of full length
        with phase("train"):
            trainer.train()
        if meter is None:
            return
        with phase("eval"):
            trainer.measure()
        with phase("generate"):
            _answer(setup, model)
        with phase("save"):
            stages.save_adapter(model, setup, folder / "adapter")


def _answer(setup: Setup, model: Any) -> None:
    """As many prompts of full length as a batch of generation holds, and short answers."""
    from qlora.generation import answer

    length, tokens = setup.plan.settings["data.max_length"], setup.plan.settings["memory.generation_tokens"]
    longest = max((row.input_ids for row in setup.data.train), key=len)
    prompt = (list(longest) * length)[:length]  # a pack has no row of full length
    answer(model, setup.tokenizer, [prompt] * rows_at_once(length, MAX_ANSWER_TOKENS, tokens), max_new_tokens=_ANSWER_TOKENS,
           stop_ids=[], tokens_per_batch=tokens)


def _known(recipe: Recipe, device: Device) -> tuple[str, Any, Architecture, Any, Any]:
    """Where the model is, its config, its layers, the projections that get an adapter, and the number formats."""
    from qlora.architecture import select_targets
    from qlora.precision import choose_precision
    from qlora.training.setup import find_model

    base, config, architecture = find_model(recipe, Progress())
    selection = select_targets(architecture, recipe.lora.targets)
    return base, config, architecture, selection, choose_precision(recipe.model.dtype, device)


def _make_setup(cell: Cell, plan: Plan, folder: Path) -> Setup:
    """What `qlora.training.setup.prepare` makes of a recipe, for a plan that is there already and rows of its shape."""
    from qlora.measuring.rows import word_tokenizer, worst_lengths, write_rows
    from qlora.training.setup import Setup, read_data

    device = find_device(plan.kind)
    overrides = (*ALWAYS, *cell.overrides, "data.format=text", f"data.max_length={plan.settings['data.max_length']}")
    recipe = build_recipe(overrides=overrides, model=locate(cell, folder), data="none")
    num_micro_batches = recipe.train.max_steps * plan.settings["train.accumulation"]
    train = write_rows(folder / "train.jsonl", worst_lengths(plan, packed=plan.settings["data.packing"]) * num_micro_batches)
    validation = write_rows(folder / "validation.jsonl", worst_lengths(plan, packed=False))
    recipe = recipe.replace({"data.path": str(train), "data.validation": str(validation)})
    base, config, architecture, selection, precision = _known(recipe, device)
    tokenizer = word_tokenizer()
    data = read_data(recipe, tokenizer, architecture.max_positions, Progress())
    return Setup(recipe, base, device, precision, config, architecture, tokenizer, data, selection, plan)


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


def _figures(setup: Setup, rows: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Loss and gradient norm of the first and last step; speed of the timed steps after the first, which warms up."""
    from qlora.planning.speed import flops_per_token

    steps, last = [row for row in rows if "loss" in row], [row for row in timed if "loss" in row][1:]
    ends = [steps[0], steps[-1]] if steps else []
    seconds = timed_cpu_seconds(timed) if setup.device.kind == "cpu" else None
    return {
        "tokens_per_second": sorted(row["tokens_per_second"] for row in last)[len(last) // 2] if last else None,
        "cpu_seconds_per_token": seconds, "loss": [row["loss"] for row in ends],
        "gradient_norm": [row["grad_norm"] for row in ends],
        "flops_per_token": flops_per_token(setup.architecture, setup.plan.settings),
    }


def timed_cpu_seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The processor's seconds for each token, of all threads: the least of the steps after the first, because others who use the
    machine can only add to it. None where there is one step.
    """
    steps = [row for row in rows if "loss" in row]
    return min(((after["cpu_seconds"] - before["cpu_seconds"]) / after["tokens"] for before, after in zip(steps, steps[1:])),
               default=None)


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
