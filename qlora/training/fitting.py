"""Make the plan: search for the settings that use the budget best, simulate what was found, and say what it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora._compat import expandable_segments
from qlora.architecture import Architecture, TargetSelection
from qlora.engine.placement import Placement
from qlora.errors import ModelError
from qlora.generation import MAX_ANSWER_TOKENS, TOKENS_PER_BATCH
from qlora.hardware import Device
from qlora.planning.allocator import slack_bytes
from qlora.planning.budget import PROGRAM_BYTES, Budget, find_budget, program_bytes
from qlora.planning.choose import Facts, choose, find_options
from qlora.planning.plan import PARTS, Decision, Fallback, Plan
from qlora.planning.receipts import Margin, Receipts
from qlora.planning.search import Candidate, Found, Options, largest_length, search, with_residents
from qlora.planning.speed import estimate_speed
from qlora.precision import Precision
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.alternatives import find_alternatives
from qlora.training.simulator import Simulated, Simulator, Workload
from qlora.units import GIB, format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Batches of generation to choose from, in tokens; 0 is one row at a time.
GENERATION_TOKENS = (TOKENS_PER_BATCH, 2048, 1024, 512, 0)
_SHORTEST_LENGTH, _LONGEST_LENGTH = 128, 131_072
# Of a machine's RAM: what a run may keep there for a GPU, and the part of that for the layers.
_HOST_SHARE, _LAYERS_SHARE = 0.75, 0.8
# Checkpoints that are on disk at once: two that are kept, and one that is being written.
_NUM_CHECKPOINTS = 3


@dataclass(frozen=True)
class Rows:
    """What a plan wants to know of the data. Counts are None where there is none.

    Attributes:
        max_length: tokens of the longest row, or of a full pack.
        ragged: rows differ in length.
        host_bytes: RAM that the tokens take.
        shrinkable: the length is only a guess, and is shortened where it would not fit.
        prompt_tokens, answer_tokens, num_answers, trained_tokens: of what is generated and trained on; see
            `qlora.training.simulator.Workload`.
    """

    num_train: int | None
    num_validation: int | None
    max_length: int
    max_length_reason: str
    ragged: bool
    format: str
    format_reason: str
    host_bytes: int = 0
    shrinkable: bool = False
    prompt_tokens: int | None = None
    answer_tokens: int = MAX_ANSWER_TOKENS
    num_answers: int | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class Job:
    """A recipe and what was found out for it: all that a plan follows from."""

    recipe: Recipe
    device: Device
    precision: Precision
    config: PreTrainedConfig = field(repr=False)
    architecture: Architecture = field(repr=False)
    selection: TargetSelection = field(repr=False)
    rows: Rows


@dataclass(frozen=True)
class Room:
    """A budget, and what a run takes of it beside its tensors."""

    budget: Budget
    margin: Margin
    expandable: bool
    on_gpu: bool

    def total(self, tensor_bytes: int) -> int:
        """What must be there for so many bytes of tensors."""
        return tensor_bytes + self.slack(tensor_bytes) + self.reserve(tensor_bytes) + self.budget.context_bytes

    def slack(self, tensor_bytes: int) -> int:
        """What torch's allocator holds and cannot use."""
        return slack_bytes(tensor_bytes, expandable=self.expandable) if self.on_gpu else 0

    def reserve(self, tensor_bytes: int) -> int:
        """The margin for what the simulation has missed in earlier runs."""
        return self.margin.of(tensor_bytes)

    def holds(self, tensor_bytes: int) -> bool:
        """Whether so many bytes of tensors fit."""
        return self.total(tensor_bytes) <= self.budget.bytes

    def longest(self, simulator: Simulator, candidate: Candidate, low: int, high: int) -> int | None:
        """The longest rows, from `low` to `high` tokens, with which a candidate fits; None where `low` is too long."""
        def need(length: int) -> int:
            return self.total(simulator.tensors(replace(candidate, max_length=length)))

        return largest_length(need, self.budget.bytes, low, high) if need(low) <= self.budget.bytes else None


def make_plan(job: Job, progress: Progress | None = None, *, look_around: bool = False, sketch: bool = False) -> Plan:
    """The plan for a job.

    Args:
        look_around: also find the longest length that fits.
        sketch: leave it at shallow models, and look for neither alternatives nor fallbacks: for tables of many models.

    Raises:
        QloraError: fixed values that contradict each other, a budget below what a card takes for itself, a model that the
            training code cannot run.
    """
    started = time.perf_counter()
    receipts = Receipts.load()
    room = find_room(job, receipts)
    facts = _facts(job, room.budget)
    options, batch = find_options(job.recipe, facts)
    simulator = Simulator(workload(job, facts.attentions[0], batch.value))
    with (progress or Progress()).stage(f"Planning {job.recipe.model.base}"):
        options, found, generation_tokens, whole = _fit(simulator, options, room, sketch)
        if not found.fits and job.rows.shrinkable and (length := _shorter_length(simulator, options, room)):
            reason = "no data yet; the longest rows that fit, up to 2,048 tokens"
            facts = replace(facts, max_length=length, max_length_reason=reason)
            options, batch = find_options(job.recipe, facts)
            options, found, generation_tokens, whole = _fit(simulator, options, room, sketch)
    decisions, num_steps = choose(job.recipe, facts, found, batch)
    decisions["memory.generation_tokens"] = _generation_decision(generation_tokens)
    settings = {key: decision.value for key, decision in decisions.items()}
    speed = estimate_speed(job.architecture, settings, job.device, receipts)
    longest = _longest(simulator, options, found, room, job.architecture.max_positions) if look_around else None
    alternatives = () if found.fits or sketch else find_alternatives(job, simulator, options, room)
    parts = _parts(whole, room)
    host_bytes = _host_bytes(job, simulator, whole, found.candidate, receipts)
    fallbacks = _fallbacks(simulator, found.candidate, room, sum(parts.values())) if found.fits and not sketch else ()
    return Plan(
        model=job.recipe.model.base, device=job.device.name, kind=job.device.kind, budget_bytes=room.budget.bytes,
        fits=found.fits, phases=whole.phases, parts=parts, reserved_bytes=whole.reserved_bytes,
        host_peak_bytes=host_bytes,
        disk_bytes=_disk_bytes(whole.parts, simulator.store_bytes if settings["memory.cache_base"] else 0), decisions=decisions,
        num_steps=num_steps,
        alternatives=alternatives, fallbacks=fallbacks, tokens_per_second=speed.tokens_per_second, speed_basis=speed.basis,
        notes=(*_notes(job, room), *_streaming_notes(job, simulator, found.candidate, host_bytes)), longest_length=longest,
        seconds=round(time.perf_counter() - started, 3),
    )


def find_room(job: Job, receipts: Receipts) -> Room:
    """The budget with the margin that earlier runs on this device have taught.

    Raises:
        HardwareError: the budget is below the CUDA context, or above the card.
    """
    on_gpu = job.device.kind == "cuda"
    budget = find_budget(job.device, job.recipe.memory.budget, receipts)
    expandable = on_gpu and expandable_segments(windows=job.device.windows)
    margin = receipts.margin(job.device, allocator_name(job.device))
    return Room(budget, margin, expandable=expandable, on_gpu=on_gpu)


def allocator_name(device: Device) -> str:
    """How receipts call the allocator that a run uses."""
    if device.kind == "cpu":
        return "cpu"
    return "expandable" if expandable_segments(windows=device.windows) else "native"


def workload(job: Job, attention: str, batch: int) -> Workload:
    """What the simulator needs of a job."""
    return Workload(
        config=job.config, architecture=job.architecture, selection=job.selection, precision=job.precision, device=job.device,
        attention=attention, batch=batch, packed=job.recipe.data.packing, ragged=job.rows.ragged, dropout=job.recipe.lora.dropout,
        dequantise_once=job.recipe.memory.dequantise_once,
        host_bytes=_host_room(job) if job.device.kind == "cuda" else None, prompt_tokens=job.rows.prompt_tokens,
        answer_tokens=job.rows.answer_tokens, num_answers=job.rows.num_answers,
        trained_tokens=job.rows.trained_tokens,
    )


def _parts(whole: Simulated, room: Room) -> dict[str, int]:
    """What the peak consists of, context and margin with it, in the order of `planning.plan.PARTS`."""
    peak = whole.peak_bytes
    parts = {**whole.parts, "context": room.budget.context_bytes, "margin": room.reserve(peak)}
    parts["workspace"] = parts.get("workspace", 0) + max(room.slack(peak), whole.slack_bytes)
    return {name: parts.get(name, 0) for name in PARTS}


def _facts(job: Job, budget: Budget) -> Facts:
    rows, wanted = job.rows, job.recipe.model.attention
    return Facts(
        device=job.device, budget_bytes=budget.bytes, budget_reason=budget.reason, precision=job.precision,
        num_parameters=job.architecture.num_parameters, num_layers=job.architecture.num_layers,
        attentions=(wanted,) if wanted != "auto" else job.architecture.attentions, num_train_rows=rows.num_train,
        num_validation_rows=rows.num_validation, max_length=rows.max_length, max_length_reason=rows.max_length_reason,
        data_format=rows.format, data_format_reason=rows.format_reason, tied_embeddings=job.architecture.tied_embeddings,
        streamable=is_streamable(job.architecture), stream_from=stream_source(job),
    )


def is_streamable(architecture: Architecture) -> bool:
    """Whether a base is of the kind that is quantised, kept and brought to the device layer by layer."""
    return not architecture.unquantised_expert_parameters and architecture.stored_quantisation is None


def stream_source(job: Job) -> str:
    """RAM where it holds the whole 4-bit base and leaves room for what else waits there; else the disk. A CPU's slots are in RAM."""
    enough = job.architecture.quantised_bytes <= _LAYERS_SHARE * _host_room(job)
    return "ram" if job.device.kind == "cuda" and enough else "disk"


def _host_room(job: Job) -> int:
    """RAM for what a GPU fetches from there. Counted from all that the machine has: what happens to be free is looked at when a run
    begins (`qlora.training.preflight`).
    """
    return max(0, int(_HOST_SHARE * job.device.host_bytes) - PROGRAM_BYTES - job.rows.host_bytes)


def _fit(simulator: Simulator, options: Options, room: Room, sketch: bool) -> tuple[Options, Found, int, Simulated]:
    """What was found, and the options that it was chosen from: without the engine's schedule, where that cannot run the model because
    its layers have something to do with each other beside the hidden states.
    """
    try:
        return options, *_search(simulator, options, room, sketch)
    except ModelError:
        resident = tuple(placement for placement in options.placements if not placement.schedules)
        if not resident or resident == options.placements:
            raise
        options = replace(options, placements=resident)
        return options, *_search(simulator, options, room, sketch)


def _search(simulator: Simulator, options: Options, room: Room, sketch: bool) -> tuple[Found, int, Simulated]:
    """Search with shallow models; what is found is simulated whole, and looked for again should that need more."""
    refused: set[Candidate] = set()

    def fits(candidate: Candidate) -> bool:
        if candidate in refused or not room.holds(_weights_bytes(simulator.workload.architecture, candidate.placement)):
            return False
        return room.holds(simulator.tensors(candidate))

    while True:
        found = search(options, fits)
        found = replace(found, candidate=_finished(found, simulator, options, fits))
        tokens = next((n for n in GENERATION_TOKENS if room.holds(simulator.generation(found.candidate, n))), 0)
        if sketch:
            return found, tokens, simulator.sketch(found.candidate, tokens)
        whole = simulator.whole(found.candidate, tokens)
        if not found.fits or sum(_parts(whole, room).values()) <= room.budget.bytes:
            return found, tokens, whole
        refused.add(found.candidate)


def _weights_bytes(architecture: Architecture, placement: Placement) -> int:
    """What a base takes on the device at the least: a plan that cannot hold it need not be simulated."""
    layers = 0 if placement.streams else architecture.quantised_bytes
    return layers + 2 * architecture.embedding_parameters * (placement.embedding_device == "device")


def _finished(found: Found, simulator: Simulator, options: Options, fits: Callable[[Candidate], bool]) -> Candidate:
    """What streaming leaves to decide: as many micro-batches a visit as RAM holds the hidden states of; where several go through a
    layer in one visit, weights that are dequantised once; then as many layers on the device as fit beside that.
    """
    candidate, work = found.candidate, simulator.workload
    if not (found.fits and candidate.placement.streams):
        return candidate
    num_micro_batches = -(-work.batch // candidate.micro_batch)
    if candidate.placement.visit_micro_batches is None and work.host_bytes is not None:
        # As few visits as can be, and as equal.
        sizes = dict.fromkeys(-(-num_micro_batches // visits) for visits in range(2, num_micro_batches + 1))
        tried = [candidate, *(_placed(candidate, visit_micro_batches=size) for size in sizes)]
        candidate = next((each for each in tried if simulator.waiting_bytes(each) <= work.host_bytes), tried[-1])
    once = _placed(candidate, dequantise_once=True)
    several = num_micro_batches > 1 and candidate.placement.visit_micro_batches != 1
    if work.dequantise_once == "auto" and several and fits(once):
        candidate = once
    return with_residents(candidate, options, fits)


def _placed(candidate: Candidate, **changes: Any) -> Candidate:
    return replace(candidate, placement=replace(candidate.placement, **changes))


def _shorter_length(simulator: Simulator, options: Options, room: Room) -> int | None:
    """The longest rows that fit with the least settings, where those of the options do not; None where there is nothing to do."""
    least = options.least
    if room.holds(simulator.tensors(least)) or least.max_length <= _SHORTEST_LENGTH:
        return None
    return room.longest(simulator, least, _SHORTEST_LENGTH, least.max_length)


def _longest(simulator: Simulator, options: Options, found: Found, room: Room, max_positions: int | None) -> int | None:
    """Tokens of the longest rows that fit at all, with the least of what may be chosen; None where not even short ones do."""
    least = replace(options.least, r=min(options.least.r, found.candidate.r))
    most = min(max_positions or _LONGEST_LENGTH, _LONGEST_LENGTH)
    low, high = (least.max_length, most) if found.fits else (min(_SHORTEST_LENGTH, least.max_length), least.max_length)
    return room.longest(simulator, least, low, high)


def _fallbacks(simulator: Simulator, planned: Candidate, room: Room, peak_bytes: int) -> tuple[Fallback, ...]:
    """What a run steps down to when memory runs short, as far as each step needs less than the one before.

    Args:
        peak_bytes: what the run needs as planned.
    """
    found: list[Fallback] = []
    for candidate in _smaller(planned):
        num_parts = -(-planned.micro_batch // candidate.micro_batch)
        accumulation = simulator.workload.batch // planned.micro_batch * num_parts
        # Parts of odd numbers could hold more rows than there are; simulated are as many micro-batches as there will be.
        # A row alone keeps the padding of those it was cut from, and with it a mask.
        alone = candidate.micro_batch == 1 < planned.micro_batch and simulator.workload.ragged
        workload = replace(simulator.workload, batch=candidate.micro_batch * accumulation, in_parts=alone)
        needed = room.total((simulator if workload == simulator.workload else Simulator(workload)).tensors(candidate))
        if needed < (found[-1].peak_bytes if found else peak_bytes):
            found.append(Fallback(candidate.micro_batch, accumulation, candidate.checkpointing, needed))
    return tuple(found)


def _smaller(candidate: Candidate) -> Iterator[Candidate]:
    """Half as many rows at once, down to one; then with activations computed anew. None of that changes what is learnt."""
    while candidate.micro_batch > 1:
        candidate = replace(candidate, micro_batch=-(-candidate.micro_batch // 2))
        yield candidate
    if not candidate.checkpointing:
        yield replace(candidate, checkpointing=True)


def _generation_decision(num_tokens: int) -> Decision:
    if num_tokens == GENERATION_TOKENS[0]:
        return Decision(num_tokens, "default", "prompts and answers that are written at once, in tokens")
    return Decision(num_tokens, "derived", "as many tokens of answers at once as fit beside the weights")


def _host_bytes(job: Job, simulator: Simulator, whole: Simulated, candidate: Candidate, receipts: Receipts) -> int:
    """The program, the rows and, on a CPU, the tensors; on a GPU what passes through RAM on its way there, and what waits there."""
    on_cpu = job.device.kind == "cpu"
    tensors = max(whole.phases.values()) if on_cpu else simulator.loading_host_bytes
    waiting = 0 if on_cpu else simulator.waiting_bytes(candidate)
    return program_bytes(job.device, receipts) + job.rows.host_bytes + max(tensors, waiting)


def _disk_bytes(parts: Mapping[str, int], base_bytes: int) -> int:
    """Checkpoints with adapter and optimizer state, the adapter itself, and the quantised base where it is kept."""
    return _NUM_CHECKPOINTS * (parts.get("adapters", 0) + parts.get("optimizer", 0)) + parts.get("adapters", 0) + base_bytes


def _notes(job: Job, room: Room) -> tuple[str, ...]:
    return (*job.selection.notes, f"The margin is {room.margin.reason}.")


def _streaming_notes(job: Job, simulator: Simulator, candidate: Candidate, host_bytes: int) -> tuple[str, ...]:
    """What is streamed, and what that takes beside the device."""
    placement, num_layers = candidate.placement, job.architecture.num_layers
    if not placement.streams:
        return ()
    num_streamed = num_layers - placement.resident_layers
    source = "RAM" if placement.stream_from == "ram" else "disk"
    needs = f"{format_bytes(simulator.store_bytes)} of disk for the quantised base, kept for the next run"
    if job.device.kind == "cuda":
        needs += f", and {format_bytes(host_bytes)} of RAM"
    return (f"{num_streamed} of {num_layers} layers, {format_bytes(simulator.streamed_bytes(candidate))}, are streamed from {source}. "
            f"That takes {needs}.",)
