"""When nothing fits: what is near and does. Each is simulated whole before it is offered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qlora.architecture import describe, find_config, select_targets
from qlora.catalog import catalog_entry, catalog_ids, find_id
from qlora.hardware import cuda_bytes
from qlora.planning.plan import Alternative
from qlora.planning.search import Candidate, Options
from qlora.training.simulator import Simulator
from qlora.units import GIB

if TYPE_CHECKING:
    from qlora.training.fitting import Job, Room

_SHORTEST_LENGTH = 128
_CARD_SIZES_GIB = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 192)
_MAX_SMALLER_MODELS = 4


def find_alternatives(job: Job, simulator: Simulator, options: Options, room: Room) -> tuple[Alternative, ...]:
    """Shorter rows, adapters on attention alone, a smaller model of the family, a bigger card: those of them that fit."""
    least = options.least
    found = (_shorter(job, simulator, least, room), _attention_only(job, simulator, least, room),
             _smaller_model(job, simulator, least, room), _bigger_card(job, simulator, least, room))
    return tuple(each for each in found if each is not None)


def _shorter(job: Job, simulator: Simulator, least: Candidate, room: Room) -> Alternative | None:
    if least.max_length <= _SHORTEST_LENGTH:
        return None
    length = room.longest(simulator, least, _SHORTEST_LENGTH, least.max_length)
    if length is None:
        return None
    change = f"rows of up to {length:,} tokens instead of {least.max_length:,}"
    return _verified(job, simulator, replace(least, max_length=length), room, change, f"data.max_length={length}")


def _attention_only(job: Job, simulator: Simulator, least: Candidate, room: Room) -> Alternative | None:
    if job.recipe.lora.targets != "all":
        return None
    other = Simulator(replace(simulator.workload, selection=select_targets(job.architecture, "attention")))
    if not room.holds(other.tensors(least)):
        return None
    return _verified(job, other, least, room, "adapters on the attention projections alone", "lora.targets=attention")


def _smaller_model(job: Job, simulator: Simulator, least: Candidate, room: Room) -> Alternative | None:
    own = find_id(job.recipe.model.base)
    smaller = [id for id in catalog_ids() if id != own and catalog_entry(id).parameters < job.architecture.num_parameters]
    tried = 0
    for id in sorted(smaller, key=lambda id: -catalog_entry(id).parameters):
        if tried == _MAX_SMALLER_MODELS:
            break
        config = find_config(id)
        if config.model_type != job.architecture.model_type:
            continue
        tried += 1
        architecture = describe(config)
        selection = select_targets(architecture, job.recipe.lora.targets if isinstance(job.recipe.lora.targets, str) else "all")
        other = Simulator(replace(simulator.workload, config=config, architecture=architecture, selection=selection))
        if room.holds(other.tensors(least)):
            return _verified(job, other, least, room, f"the smaller {id}", f"model.base={id}", model=id)
    return None


def _bigger_card(job: Job, simulator: Simulator, least: Candidate, room: Room) -> Alternative | None:
    if job.device.kind != "cuda":
        return None
    needed = room.total(simulator.whole(least, generation_tokens=0).peak_bytes)
    size = next((size for size in _CARD_SIZES_GIB if needed <= cuda_bytes(size * GIB)), None)
    if size is None:
        return None
    card = f"a card of {size} GB"
    return Alternative(card, (f"--vram {size}GB",), job.recipe.model.base, card, needed, cuda_bytes(size * GIB))


def _verified(
    job: Job, simulator: Simulator, candidate: Candidate, room: Room, change: str, override: str, model: str | None = None
) -> Alternative | None:
    needed = room.total(simulator.whole(candidate, generation_tokens=0).peak_bytes)
    if needed > room.budget.bytes:
        return None
    return Alternative(change, (override,), model or job.recipe.model.base, job.device.name, needed, room.budget.bytes)
