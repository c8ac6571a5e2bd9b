"""One base for several runs of a process: loaded once, and given to each as a new model over the same tensors.

A run puts adapters, hooks and other kernels into its model, and none of that is taken out again. The next run gets new modules
instead, made from the config alone, whose parameters are the tensors that are there already: nothing of the run before can be
left in them, and nothing is copied.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError
from qlora.hardware import limit_memory
from qlora.progress import Progress
from qlora.training.building import Base, BaseOrder, find_base, order_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qlora.training.setup import Setup


class Bases:
    """Keeps the base that was asked for last.

    Attributes:
        num_loads: how often a base was loaded.
    """

    def __init__(self) -> None:
        self.num_loads = 0
        self._key: tuple[Any, ...] | None = None
        self._kept: Base | None = None
        self._alone: tuple[Any, ...] | None = None

    def take(self, setup: Setup, progress: Progress) -> Base | None:
        """The base of a run, ready for adapters; None where it cannot be shared, and the run loads its own.

        Shared is what stays on the device as a whole. Of a base whose parts come and go, each run reads those that stay.

        Raises:
            ModelError, OutputError: see `qlora.training.building.build_model`.
        """
        import torch

        gc.collect()  # the model of the run before, which refers to itself in circles
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        order = order_of(setup)
        key = _key(order)
        if not _stays_whole(order) or key == self._alone:
            self.let_go()
            return None
        if self._kept is None or key != self._key:
            if self._kept is not None:
                progress.note("The base is loaded again: this run wants it in another way than the one before.")
            self.let_go()
            limit_memory(setup.device, setup.plan.budget_bytes - setup.plan.parts["context"])
            self._key, self._kept = key, find_base(order, progress)
            self.num_loads += 1
        shared = share(self._kept.model, order)
        if shared is None:
            self._alone = key  # not to be loaded here again for nothing
            self.let_go()
            return None
        return replace(self._kept, model=shared, tensor_bytes=tensor_bytes(self._kept.model))

    def let_go(self) -> None:
        """Free the base that is kept."""
        self._key = self._kept = None
        gc.collect()


def share(model: PreTrainedModel, order: BaseOrder) -> PreTrainedModel | None:
    """A model that is as `model` was when it was loaded, over the same tensors; None where its class cannot be built from the
    config alone to the same parts.
    """
    from qlora.engine.arena import places_of
    from qlora.engine.skeleton import build_skeleton_4bit, empty_layers, materialise, rest_tensors

    try:
        made = build_skeleton_4bit(model.config, order.precision, order.attention)
    except ModelError:
        return None
    if _shapes(made) != _shapes(model):
        return None
    device = order.device.torch_name
    materialise(made, rest_tensors(model, order.layers_path), device)
    empty_layers(made, order.layers_path, device)
    held = {place.name: place.tensor.detach() for place in places_of(model)}
    for place in places_of(made):
        if place.name.startswith(f"{order.layers_path}."):
            place.put(held[place.name])
    made.name_or_path = model.name_or_path  # what the adapter's config names as its base
    made.hf_device_map = {"": device}
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def tensor_bytes(model: torch.nn.Module) -> int:
    """What the tensors of a model take that a loader has made for it: each storage once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(model)}
    return sum(storages.values())


def _storages(model: torch.nn.Module) -> Iterator[torch.UntypedStorage]:
    from qlora.engine.arena import places_of

    yield from (place.tensor.untyped_storage() for place in places_of(model))
    yield from (buffer.untyped_storage() for buffer in model.buffers())


def _shapes(model: torch.nn.Module) -> Mapping[str, tuple[Any, ...]]:
    from qlora.engine.arena import places_of

    return {place.name: (tuple(place.tensor.shape), place.tensor.dtype) for place in places_of(model)}


def _stays_whole(order: BaseOrder) -> bool:
    placement = order.placement
    return not placement.streams and placement.embedding_device == "device" and placement.head_format == "resident"


def _key(order: BaseOrder) -> tuple[Any, ...]:
    """All that the tensors of a base follow from. To be asked for before it is loaded, which changes the config."""
    return (
        order.place, order.revision, order.weights, order.config.to_json_string(use_diff=False), order.layers_path,
        order.device.torch_name, order.precision, order.attention, order.trust_remote_code,
        order.seed if order.weights == "random" else None, order.keep,
    )
