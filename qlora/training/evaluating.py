"""Plan a model that is only measured or talked to: where its parts go, and how much goes through it at once.

Nothing is trained, so there are no gradients, no optimizer and no activations to keep; what is left is simulated as for a run, by
the same code. The order is as there: what changes least comes first, and layers are streamed where they do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora.engine.placement import Placement
from qlora.errors import HardwareError
from qlora.generation import MAX_ANSWER_TOKENS, TOKENS_PER_BATCH
from qlora.hardware import Device
from qlora.hub.adapter import CONFIG, Adapter, read_document
from qlora.precision import Precision
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.building import BaseOrder
from qlora.units import MIB, format_bytes, parse_size

if TYPE_CHECKING:
    from qlora.architecture import Architecture
    from qlora.planning.search import Candidate
    from qlora.training.fitting import Job, Room
    from qlora.training.simulator import Simulator

_CHUNK_BYTES = 64 * MIB  # of logits at once
_ROWS_AT_ONCE = (1, 2, 4, 8, 16)
_VISIT_ROWS = 32  # rows that go through a streamed layer in one visit
_TALK_TOKENS = 4096
# A base whose weights take at most this share of the budget is not simulated before somebody talks to it: what a single answer
# takes beside them, its cache and a few rows of logits, is less than the rest.
_SMALL_SHARE, _TALK_BYTES = 0.5, 1024 * MIB


@dataclass(frozen=True)
class EvaluationPlan:
    """Where the parts of a model live, and how much goes through it at once.

    Attributes:
        rows_at_once: of a batch whose loss is taken.
        visit_rows: that go through a streamed layer in one visit.
        generation_tokens: of prompts and answers that are written at once; 0 is one row at a time.
        budget_bytes: what may be taken, the CUDA context of `context_bytes` included; None where nobody has looked.
        phases: highest tensor memory, simulated; empty where that was not needed.
    """

    placement: Placement = Placement()
    rows_at_once: int = 1
    visit_rows: int = 1
    generation_tokens: int = TOKENS_PER_BATCH
    budget_bytes: int | None = None
    context_bytes: int = 0
    phases: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """In JSON's own types."""
        placement = self.placement
        return {
            "rows_at_once": self.rows_at_once, "generation_tokens": self.generation_tokens, "streamed": placement.streams,
            "resident_layers": placement.resident_layers, "head_format": placement.head_format,
            "budget_bytes": self.budget_bytes, "planned_bytes": dict(self.phases),
        }


def plan_evaluation(
    adapters: Sequence[Adapter], device: Device, precision: Precision, *, max_length: int, prompt_tokens: int = 0,
    answer_tokens: int = 0, num_answers: int | None = None, progress: Progress | None = None,
) -> EvaluationPlan:
    """The plan for taking the loss of rows and, where there are answers to be written, for these.

    Args:
        max_length: tokens of the longest row.
        prompt_tokens, answer_tokens: of the longest prompt, and of an answer at most; 0 where none is written.
        num_answers: that are written; None is any number.

    Raises:
        HardwareError: the base does not fit, even with its layers streamed.
        ModelError: the base's config cannot be had.
    """
    from qlora.planning.receipts import Receipts
    from qlora.planning.search import Options, search, with_residents
    from qlora.training.fitting import GENERATION_TOKENS, find_room, workload
    from qlora.training.simulator import Simulator

    job = _job(adapters, device, precision, max_length)
    with (progress or Progress()).stage(f"Planning the evaluation on {device.name}"):
        room = find_room(job, Receipts.load())
        attention = _attention(adapters[0]) or job.architecture.attentions[0]
        work = replace(workload(job, attention, _VISIT_ROWS), trains=False)
        if answer_tokens:
            work = replace(work, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, num_answers=num_answers)
        simulator = Simulator(work)
        options = Options(
            ranks=(_rank(adapters),), micro_batches=_ROWS_AT_ONCE, checkpointing=(True,), optimizers=("adamw",),
            max_length=max_length, placements=_placements(job, adapters),
            num_resident=tuple(range(job.architecture.num_layers)) if job.recipe.memory.resident_layers == "auto"
            else (job.recipe.memory.resident_layers,),
        )

        def fits(candidate: Candidate) -> bool:
            return room.holds(max(_phases(simulator, candidate, 0 if answer_tokens else None).values()))

        found = search(options, fits)
        if not found.fits:
            raise _too_large(simulator, found.candidate, room, adapters[0], device)
        candidate = with_residents(found.candidate, options, fits)
        tokens = next((n for n in GENERATION_TOKENS if room.holds(simulator.generation(candidate, n))), 0) if answer_tokens else 0
        phases = _phases(simulator, candidate, tokens if answer_tokens else None)
    return EvaluationPlan(
        candidate.placement, candidate.micro_batch, _VISIT_ROWS, tokens, room.budget.bytes, room.budget.context_bytes, phases,
    )


def plan_talk(
    adapters: Sequence[Adapter], device: Device, precision: Precision, progress: Progress | None = None
) -> EvaluationPlan:
    """The plan for one answer at a time, of prompts that are not known yet.

    Raises:
        HardwareError, ModelError: see `plan_evaluation`.
    """
    from qlora.planning.receipts import Receipts
    from qlora.training.fitting import find_room

    job = _job(adapters, device, precision, _TALK_TOKENS)
    room, architecture = find_room(job, Receipts.load()), job.architecture
    placements = _placements(job, adapters)
    if not placements[0].streams and _weights_bytes(architecture) + _TALK_BYTES <= _SMALL_SHARE * room.budget.bytes:
        return EvaluationPlan(placements[0], budget_bytes=room.budget.bytes, context_bytes=room.budget.context_bytes)
    length = min(_TALK_TOKENS, architecture.max_positions or _TALK_TOKENS)
    prompt_tokens = max(1, length - MAX_ANSWER_TOKENS)
    plan = plan_evaluation(adapters, device, precision, max_length=min(length, 128), prompt_tokens=prompt_tokens,
                           answer_tokens=length - prompt_tokens, num_answers=1, progress=progress)
    return replace(plan, generation_tokens=0)


def order_base(
    adapters: Sequence[Adapter], device: Device, precision: Precision, plan: EvaluationPlan, progress: Progress
) -> BaseOrder:
    """The base, from the store of quantised ones where the run kept it there, where it is there already, or where it streams.

    Raises:
        ModelError: there is no such model.
    """
    from qlora.architecture import describe, find_config
    from qlora.model.build import locate_base

    first = adapters[0]
    revision = next((each.base_revision for each in adapters if each.base_revision), None)
    with progress.stage(f"Finding {first.base}") as update:
        place = locate_base(first.base, lambda share, text: update(round(share * 100), 100))
        config = find_config(place, revision=revision)
    order = BaseOrder(
        name=first.base, place=place, config=config, layers_path=describe(config).layers_path, device=device, precision=precision,
        placement=plan.placement, attention=_attention(first) or describe(config).attentions[0], revision=revision,
    )
    kept = first.run is not None and first.run.setting("memory.cache_base") is True
    return replace(order, keep=plan.placement.streams or kept or _is_on_shelf(order))


# --- details -----------------------------------------------------------------------------------------------------------


def recipe_of(adapter: Adapter) -> Recipe | None:
    """The recipe of the run that the adapter lies in, if that can be read here."""
    if adapter.run is None or not adapter.run.is_run_folder:
        return None
    try:
        return Recipe.model_validate(adapter.run.resolved.get("recipe"))
    except ValueError:
        return None


def _job(adapters: Sequence[Adapter], device: Device, precision: Precision, max_length: int) -> Job:
    from qlora.architecture import describe, find_config, select_targets
    from qlora.model.build import locate_base
    from qlora.training.fitting import Job, Rows

    first = adapters[0]
    config = find_config(locate_base(first.base), revision=first.base_revision)
    architecture = describe(config)
    recipe = recipe_of(first) or Recipe(model={"base": first.base}, data={"path": "none"})
    recipe = recipe.replace({
        "model.base": first.base, "data.packing": False, "lora.dropout": 0.0, "memory.offload_adapters": "auto",
        "memory.visit_micro_batches": "auto", "memory.dequantise_once": False, "memory.device": device.kind,
    })
    if recipe.memory.budget != "auto" and parse_size(recipe.memory.budget) > device.memory_bytes:  # it was for another machine
        recipe = recipe.replace({"memory.budget": "auto"})
    rows = Rows(None, None, max_length, "the longest row", True, "text", "")
    # All projections, whatever has an adapter: a few megabytes too many, and right for any number of adapters.
    return Job(recipe, device, precision, config, architecture, select_targets(architecture, "all"), rows)


def _placements(job: Job, adapters: Sequence[Adapter]) -> tuple[Placement, ...]:
    """Those of a run, without what is for training alone. The loss always comes in chunks, so that no logits are stored."""
    from qlora.planning.placements import placements_for
    from qlora.training.fitting import is_streamable, stream_source

    found = placements_for(
        job.recipe, on_gpu=job.device.kind == "cuda", tied_embeddings=job.architecture.tied_embeddings,
        num_layers=job.architecture.num_layers, streamable=is_streamable(job.architecture), stream_from=stream_source(job),
    )
    # Hidden states of a batch wait for nothing unless layers are visited one by one.
    made = [replace(each, offload_adapters=False, offload_activations=each.offload_activations and each.streams,
                    loss_chunk_bytes=each.loss_chunk_bytes or _CHUNK_BYTES) for each in found]
    if any(map(_reaches_out, adapters)):  # what is adapted outside of the layers stays what PEFT has made of it
        made = [replace(each, loss_chunk_bytes=None, head_format="resident", embedding_device="device") for each in made]
    return tuple(dict.fromkeys(made))


def _reaches_out(adapter: Adapter) -> bool:
    """Whether it changes the embedding or the output head."""
    config = read_document(adapter.folder / CONFIG)
    targets = config.get("target_modules")
    names = [targets] if isinstance(targets, str) else list(targets or ())
    if any(config.get(key) for key in ("modules_to_save", "trainable_token_indices", "target_parameters")):
        return True
    return any(word in str(name) for name in names for word in ("embed", "head", "wte", "all-linear"))


def _rank(adapters: Sequence[Adapter]) -> int:
    """Of one adapter that takes what all of them take together."""
    total = 0
    for adapter in adapters:
        config = read_document(adapter.folder / CONFIG)
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        total += max((r for r in ranks if isinstance(r, int)), default=16)
    return max(1, total)


def _attention(adapter: Adapter) -> str | None:
    found = adapter.run.setting("model.attention") if adapter.run else None
    return found if found in ("sdpa", "eager") else None


def _weights_bytes(architecture: Architecture) -> int:
    return architecture.quantised_bytes + 2 * (architecture.embedding_parameters + architecture.head_parameters)


def _phases(simulator: Simulator, candidate: Candidate, generation_tokens: int | None) -> dict[str, int]:
    """Highest tensor memory of each; of answers where there are any, in batches of so many tokens."""
    found = {"load": simulator.loading(candidate), "eval": simulator.evaluation(candidate)}
    if generation_tokens is not None:
        found["generate"] = simulator.generation(candidate, generation_tokens)
    return found


def _too_large(simulator: Simulator, candidate: Candidate, room: Room, adapter: Adapter, device: Device) -> HardwareError:
    needed = room.total(max(_phases(simulator, candidate, None).values()))
    return HardwareError(
        f"{adapter.base} does not fit on {device.name}: with the least that can be done it takes {format_bytes(needed)} of "
        f"{format_bytes(room.budget.bytes)} ({room.budget.reason}).",
        "Close other programs that use this memory, name shorter rows, or use --device cpu, which takes RAM instead.",
    )


def _is_on_shelf(order: BaseOrder) -> bool:
    """Whether the quantised base has been kept by an earlier run."""
    from qlora.engine.shelf import folder_of, read_manifest
    from qlora.engine.store import identity_of

    try:
        identity = identity_of(order.place, weights="pretrained", config=order.config, precision=order.precision,
                               revision=order.revision, device_name=order.device.torch_name)
        return read_manifest(folder_of(identity))["identity"] == identity
    except (OSError, ValueError):
        return False
