"""What candidates need, by rehearsal: two shallow models for a quick answer, the whole one for a promise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qlora._compat import expandable_segments
from qlora.architecture import Architecture, TargetSelection, lora_parameters
from qlora.catalog.skeleton import build_skeleton, layer_kinds
from qlora.engine.placement import resident_numbers
from qlora.errors import ModelError, QloraError
from qlora.generation import MAX_ANSWER_TOKENS
from qlora.hardware import Device
from qlora.home import cache_home
from qlora.planning.allocator import live_peaks, parts_at_peak, replay, slack_bytes
from qlora.planning.cache import remembered
from qlora.planning.depth import depths_to_simulate, extend
from qlora.planning.loading import block_sizes, loading_host_bytes
from qlora.planning.search import Candidate
from qlora.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora.planning.trace import Event

_Answer = TypeVar("_Answer", bound=Any)


@dataclass(frozen=True)
class Workload:
    """What a search does not change.

    Attributes:
        batch: rows of an optimizer step.
        ragged: whether rows that share a batch differ in length.
        dropout: of the adapters.
        in_parts: micro-batches are parts of larger ones, and keep their padding: a row may be padded although it is alone.
        dequantise_once: as a person has set it; a search does not look at it.
        host_bytes: RAM for what waits there; None is any.
        prompt_tokens, answer_tokens, num_answers: of the longest prompt that is answered, None where it may be as long as a row;
            of an answer at most; and how many are written, None is any number.
        trained_tokens: of a row at most, None where it may be all but one; the project's own loss takes these alone.
        trains: off, the model is only measured: there are neither gradients nor an optimizer.
    """

    config: PreTrainedConfig = field(repr=False)
    architecture: Architecture = field(repr=False)
    selection: TargetSelection = field(repr=False)
    precision: Precision
    device: Device
    attention: str
    batch: int
    packed: bool
    ragged: bool
    dropout: float
    in_parts: bool = False
    dequantise_once: Literal["auto"] | bool = "auto"
    host_bytes: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int = MAX_ANSWER_TOKENS
    num_answers: int | None = None
    trained_tokens: int | None = None
    trains: bool = True


@dataclass(frozen=True)
class Simulated:
    """A run at full depth, without CUDA context and margin. Bytes.

    Attributes:
        phases: highest tensor memory by phase.
        parts: what the highest of them consists of.
        reserved_bytes: what the caching allocator takes at its highest, without a cap.
        slack_bytes: what it must be given beyond the tensors' bytes.
    """

    phases: dict[str, int]
    parts: dict[str, int]
    reserved_bytes: int
    slack_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The highest of the phases of a run."""
        return max(size for phase, size in self.phases.items() if phase != "merge")


class Simulator:
    """Simulates candidates, each one once: within this object, and over runs through the cache on disk."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.num_simulated = 0
        skeleton = build_skeleton(workload.config)
        self.loading_host_bytes = loading_host_bytes(skeleton)
        self._depths = depths_to_simulate(layer_kinds(skeleton))
        self._known: dict[Any, Any] = {}

    def tensors(self, candidate: Candidate) -> int:
        """Highest tensor memory of loading, training and evaluation."""
        return max(self.loading(candidate), *self._quick(candidate, ("train", "eval"), 0).values())

    def loading(self, candidate: Candidate) -> int:
        """Highest tensor memory while the base is loaded; it depends on where the base goes."""
        return self._quick(replace(_ANY, placement=candidate.placement), ("load",), 0)["load"]

    def evaluation(self, candidate: Candidate) -> int:
        """Highest tensor memory while the loss of rows is taken."""
        return self._quick(candidate, ("eval",), 0)["eval"]

    def generation(self, candidate: Candidate, num_tokens: int) -> int:
        """Highest tensor memory while answers are written, in batches of up to so many tokens."""
        return self._quick(candidate, ("generate",), num_tokens)["generate"]

    @functools.cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """What each layer's block takes, in a slot and in the store."""
        return tuple(self._remember("layers", _ANY, 0, lambda: block_sizes(self.workload.config, self.workload.precision)))

    @property
    def store_bytes(self) -> int:
        """What the quantised base takes on a disk."""
        architecture = self.workload.architecture
        return sum(self.layer_bytes) + 2 * (architecture.embedding_parameters + architecture.head_parameters)

    def streamed_bytes(self, candidate: Candidate) -> int:
        """Of the layers that do not stay on the device."""
        if not candidate.placement.streams:
            return 0
        return sum(self.layer_bytes) - self._resident_bytes(candidate)

    def waiting_bytes(self, candidate: Candidate) -> int:
        """RAM for what a GPU fetches from there: layers, hidden states, and adapters with gradients and optimizer."""
        placement, work = candidate.placement, self.workload
        layers = self.streamed_bytes(candidate) if placement.stream_from == "ram" else 2 * max(self.layer_bytes) * placement.streams
        at_once = placement.visit_micro_batches or -(-work.batch // candidate.micro_batch)
        rows = candidate.micro_batch * (at_once if placement.streams else 1)
        width = work.architecture.hidden_size * (4 if work.precision.compute == "fp32" else 2)
        states = (work.architecture.num_layers + 2) * rows * candidate.max_length * width if placement.offload_activations else 0
        adapters = 16 * lora_parameters(work.selection, candidate.r) if placement.offload_adapters else 0
        return layers + states + adapters

    def _resident_bytes(self, candidate: Candidate) -> int:
        numbers = resident_numbers(len(self.layer_bytes), candidate.placement.resident_layers)
        return sum(self.layer_bytes[number] for number in numbers)

    def whole(self, candidate: Candidate, generation_tokens: int) -> Simulated:
        """Every phase at full depth, with the allocator's history.

        Raises:
            ModelError: the training code cannot run this model.
        """
        def work_out() -> dict[str, Any]:
            events = self._rehearse(candidate, generation_tokens)
            phases = _by_phase(live_peaks(events))
            resident = phases["save"]
            # Merging is a command of its own: it takes one projection after the other, and no base beside it.
            phases["merge"] = phases["merge"] - resident
            training = [event for event in events if event.phase != "merge"]
            reserved, slack = self._allocator(training)
            return {"phases": phases, "parts": parts_at_peak(training)[1], "reserved_bytes": reserved, "slack_bytes": slack}

        return Simulated(**self._remember("whole", candidate, generation_tokens, work_out))

    def sketch(self, candidate: Candidate, generation_tokens: int) -> Simulated:
        """The same from the two shallow models: right to a percent, in a fraction of the time."""
        phases = {"load": self.loading(candidate), **self._quick(candidate, ("train", "eval"), 0),
                  **self._quick(candidate, ("generate",), generation_tokens)}

        def work_out() -> dict[str, int]:
            def parts(num_layers: int | None) -> dict[str, int]:
                return parts_at_peak(self._rehearse(candidate, 0, phases=("train",), num_layers=num_layers, brief=True))[1]

            return self._extended(parts)

        parts = self._remember("parts", candidate, generation_tokens, work_out)
        rest = max(phases.values()) - sum(parts.values())
        return Simulated(phases, {**parts, "activations": parts.get("activations", 0) + rest}, max(phases.values()), 0)

    def _allocator(self, events: list[Event]) -> tuple[int, int]:
        """What the allocator reserves when it may, and what it needs beyond the tensors when it may not."""
        live = max(live_peaks(events).values())
        if self.workload.device.kind == "cpu":
            return live, 0
        expandable = expandable_segments(windows=self.workload.device.windows)
        free = replay(events, expandable=expandable).peak_reserved_bytes
        slack = slack_bytes(live, expandable=expandable)
        if live + slack < free and replay(events, expandable=expandable, limit_bytes=live + slack).out_of_memory:
            slack = free - live
        return free, slack

    def _quick(self, candidate: Candidate, phases: tuple[str, ...], generation_tokens: int) -> dict[str, int]:
        resident = 0
        if candidate.placement.streams:  # in shallow models no layer is resident; each that is takes its block more
            resident = self._resident_bytes(candidate)
            candidate = replace(candidate, placement=replace(candidate.placement, resident_layers=0))

        def moments(num_layers: int | None) -> dict[str, int]:
            found = live_peaks(self._rehearse(candidate, generation_tokens, phases=phases, num_layers=num_layers, brief=True))
            return {moment: peak for moment, peak in found.items() if moment.partition(":")[0] in phases}

        peaks = self._remember("-".join(phases), candidate, generation_tokens, lambda: _by_phase(self._extended(moments)))
        return {phase: peak + resident for phase, peak in peaks.items()}

    def _extended(self, at_depth: Callable[[int | None], dict[str, int]]) -> dict[str, int]:
        """Values at full depth, from two shallow models where the layers allow it."""
        if self._depths is None:
            return at_depth(None)
        shallow, deeper = (at_depth(depth) for depth in self._depths)
        return extend(shallow, deeper, self._depths, self.workload.architecture.num_layers)

    def _rehearse(self, candidate: Candidate, generation_tokens: int, **options: Any) -> list[Event]:
        from qlora.training.rehearsal import Batches, rehearse

        work = self.workload
        batches = Batches(
            micro_batch=candidate.micro_batch, accumulation=max(1, work.batch // candidate.micro_batch),
            row_tokens=candidate.max_length,
            ragged=work.packed or (work.ragged and (work.in_parts or candidate.micro_batch > 1)),
            packed=work.packed, generation_tokens=generation_tokens, prompt_tokens=work.prompt_tokens,
            answer_tokens=work.answer_tokens, num_answers=work.num_answers, trained_tokens=work.trained_tokens, tried_out=work.trains,
        )
        settings = {
            "lora.r": candidate.r, "lora.alpha": candidate.r, "lora.dropout": work.dropout,
            "memory.checkpointing": candidate.checkpointing, "train.optimizer": candidate.optimizer,
            "model.attention": work.attention, "data.packing": work.packed, **_WITHOUT_EFFECT,
            **candidate.placement.to_settings(work.architecture.num_layers),
        }
        self.num_simulated += 1
        try:
            return rehearse(work.config, work.selection, precision=work.precision, device=work.device, settings=settings,
                            batches=batches, trains=work.trains, **options)
        except QloraError:
            raise
        except Exception as error:  # any type may come out of a model's own code
            raise ModelError(
                f"{work.architecture.name or work.architecture.model_type} cannot be trained in 4 bits with these libraries: a "
                f"step on its skeleton stopped with {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                "Choose another model of its size; `qlora models` lists those that are known.",
            ) from error

    def _remember(self, kind: str, candidate: Candidate, generation_tokens: int, work_out: Callable[[], _Answer]) -> _Answer:
        key = kind, candidate, generation_tokens
        if key not in self._known:
            question = {"kind": kind, "tokens": generation_tokens, **asdict(candidate), **self._question()}
            self._known[key] = remembered(cache_home() / "plans", question, work_out)
        return self._known[key]

    def _question(self) -> dict[str, Any]:
        work = self.workload
        config = {key: value for key, value in work.config.to_dict().items() if not key.startswith("_")}
        return {
            "config": config, "targets": work.selection.patterns, "precision": asdict(work.precision), "attention": work.attention,
            "device": [work.device.kind, work.device.capability, work.device.windows, work.device.num_threads,
                       expandable_segments(windows=work.device.windows)],
            "batch": work.batch, "packed": work.packed, "ragged": work.ragged, "dropout": work.dropout,
            "in_parts": work.in_parts, "trains": work.trains,
            "trained": work.trained_tokens, "answers": [work.prompt_tokens, work.answer_tokens, work.num_answers],
        }


def _by_phase(moments: dict[str, int]) -> dict[str, int]:
    """The highest of the moments of each phase."""
    phases: dict[str, int] = {}
    for moment, peak in moments.items():
        phase = moment.partition(":")[0]
        phases[phase] = max(phases.get(phase, 0), peak)
    return phases


# For what no candidate changes.
_ANY = Candidate(r=16, micro_batch=1, checkpointing=True, optimizer="adamw_8bit", max_length=8)
# Settings that the trainer wants and memory does not depend on.
_WITHOUT_EFFECT = {
    "train.keep": "last", "train.epochs": 1, "train.learning_rate": 1e-4, "train.schedule": "constant", "train.warmup": 0,
    "train.weight_decay": 0.0, "train.max_grad_norm": 1.0, "train.seed": 0,
}
