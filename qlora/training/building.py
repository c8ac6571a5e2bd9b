"""Build what a run trains: the 4-bit base where the plan wants it, its adapters, and what the memory engine does for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.engine.placement import Placement, resident_numbers
from qlora.errors import NeedsLoaderError, OutputError
from qlora.hardware import Device, limit_memory
from qlora.precision import Precision
from qlora.progress import Progress
from qlora.training.setup import Setup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

    from qlora.engine.install import Engine
    from qlora.engine.store import BaseStore
    from qlora.engine.stream import Stream


@dataclass(frozen=True)
class BaseOrder:
    """Which base is wanted, and how.

    Attributes:
        name: what a person calls it; `place` is where it is found.
        layers_path: of the stack of layers.
        keep: read it from the store of quantised bases, and put it there if it is not. `must_keep`: or not at all.
    """

    name: str
    place: str
    config: PreTrainedConfig
    layers_path: str
    device: Device
    precision: Precision
    placement: Placement
    attention: str = "sdpa"
    revision: str | None = None
    weights: str = "pretrained"
    trust_remote_code: bool = False
    seed: int = 0
    keep: bool = False
    must_keep: bool = False


@dataclass(frozen=True)
class Base:
    """A base that is ready for adapters, and the store that parts of it go on coming from.

    Attributes:
        tensor_bytes: what its tensors take, where they were there before the run that it is for.
    """

    model: PreTrainedModel
    stream: Stream | None = None
    store: BaseStore | None = None
    tensor_bytes: int = 0


def build_model(setup: Setup, progress: Progress, base: Base | None = None) -> tuple[PeftModel, Engine]:
    """The 4-bit base with fresh adapters, on the device and within the budget, working as the plan's placement says.

    Args:
        base: the one that it is built on, see `qlora.training.bases`; None loads it.

    Raises:
        ModelError: weights that are missing, gated, unreachable, pickled, or quantised in another way.
        OutputError: there is no room on the disk for the quantised base.
    """
    limit_memory(setup.device, setup.plan.budget_bytes - setup.plan.parts["context"])
    return put_adapters(setup, base or find_base(order_of(setup), progress), progress)


def order_of(setup: Setup) -> BaseOrder:
    """The base of a run, as its plan wants it."""
    model, settings, keeps = setup.recipe.model, setup.plan.settings, setup.plan.decisions["memory.cache_base"]
    return BaseOrder(
        name=model.base, place=setup.base, config=setup.config, layers_path=setup.architecture.layers_path, device=setup.device,
        precision=setup.precision, placement=Placement.from_settings(settings), attention=settings["model.attention"],
        revision=model.revision, weights=model.weights, trust_remote_code=model.trust_remote_code, seed=settings["train.seed"],
        keep=keeps.value is True, must_keep=keeps.value is True and keeps.source == "given",
    )


def put_adapters(setup: Setup, base: Base, progress: Progress) -> tuple[PeftModel, Engine]:
    """Fresh adapters on a base, and what the placement does to both."""
    from qlora.engine.install import install
    from qlora.model.adapt import add_adapters
    from qlora.model.exact import make_exact
    from qlora.precision import torch_dtype

    settings = setup.plan.settings
    model = add_adapters(
        base.model, setup.selection, r=settings["lora.r"], alpha=settings["lora.alpha"], dropout=settings["lora.dropout"],
        seed=settings["train.seed"], dtype=torch_dtype(setup.precision.adapters),
    )
    if setup.device.kind == "cpu" and setup.precision.compute == "fp32":
        make_exact(model)
    engine = install(
        model, Placement.from_settings(settings), layers_path=setup.architecture.layers_path, device=setup.device.torch_name,
        stream=base.stream, store=base.store,
    )
    for note in engine.notes:
        progress.note(note)
    return model, engine


def find_base(order: BaseOrder, progress: Progress) -> Base:
    """From the store of quantised bases if that is wanted; where there is no room for one and it can be done without, as ever.

    Raises:
        ModelError, OutputError: see `build_model`.
    """
    if not order.keep:
        return _loaded_base(order, progress)
    try:
        return _kept_base(order, progress)
    except OutputError as error:
        if order.placement.streams or order.must_keep:
            raise
        progress.note(f"The quantised base is not kept for the next start. {error.problem}")
        return _loaded_base(order, progress)


def _loaded_base(order: BaseOrder, progress: Progress) -> Base:
    """As transformers loads and quantises it."""
    from qlora.model.build import build_base

    with progress.stage(f"Loading {order.name} in 4 bits"):
        return Base(build_base(
            order.place, order.config, device=order.device, precision=order.precision, weights=order.weights,
            attention=order.attention, revision=order.revision, trust_remote_code=order.trust_remote_code, seed=order.seed,
        ))


def _kept_base(order: BaseOrder, progress: Progress) -> Base:
    """From the store of quantised bases, where it is made first if it is not there."""
    from qlora.architecture import find_config
    from qlora.engine.quantise import open_or_build, save_from_model
    from qlora.engine.skeleton import build_skeleton_4bit
    from qlora.engine.store import identity_of
    from qlora.engine.weights import RandomWeights, SafetensorsWeights

    config, random, device_name = order.config, order.weights == "random", order.device.torch_name
    if not random and not Path(order.place).expanduser().is_dir():
        # The catalog's config is for planning; weights are read with the config that lies beside them.
        config = find_config(order.place, revision=order.revision or "main")
    identity = identity_of(
        order.place, weights=order.weights, config=config, precision=order.precision, revision=order.revision, seed=order.seed,
        device_name=device_name,
    )
    skeleton = build_skeleton_4bit(config, order.precision, order.attention)
    weights = (RandomWeights(config, order.precision, order.seed) if random
               else SafetensorsWeights(order.place, revision=order.revision))
    try:
        store = open_or_build(identity, skeleton, weights, device_name=device_name, progress=progress)
    except NeedsLoaderError:
        loaded = _loaded_base(order, progress)
        store = save_from_model(identity, loaded.model, order.layers_path, progress)
        if not order.placement.streams:
            return loaded
        del loaded
    with progress.stage(f"Loading {order.name} in 4 bits") as update:
        return _from_store(store, skeleton, order, update)


def _from_store(store: BaseStore, model: PreTrainedModel, order: BaseOrder, loading: Any) -> Base:
    """Put a kept base where the placement wants its parts."""
    from qlora.engine.install import rest_on_device
    from qlora.engine.skeleton import empty_layers, materialise
    from qlora.engine.sources import make_source
    from qlora.engine.stream import Stream, own_tensors

    device, placement = order.device.torch_name, order.placement
    materialise(model, rest_on_device(model, store.rest(), placement, device), device)
    store.let_go()
    empty_layers(model, order.layers_path, device)
    model.name_or_path = order.place  # what the adapter's config names as its base
    model.hf_device_map = {"": device}
    _take_generation_config(model, order)
    layers = list(model.get_submodule(order.layers_path))
    if not placement.streams:
        own_tensors(layers, store.layouts, store.read_layer, device, loading)
        store.close()
        return Base(model)
    resident = resident_numbers(len(layers), placement.resident_layers)
    streamed = [number for number in range(len(layers)) if number not in resident]
    source = make_source(
        store.read_layer, store.layouts, streamed, device=device, stream_from=placement.stream_from, loading=loading
    )
    stream = Stream(layers, store.layouts, resident=resident, read=store.read_layer, source=source, device=device, loading=loading)
    return Base(model, stream, store)


def _take_generation_config(model: PreTrainedModel, order: BaseOrder) -> None:
    """What ends an answer, where the base says so beside its weights."""
    from transformers import GenerationConfig

    if order.weights == "pretrained":
        try:
            model.generation_config = GenerationConfig.from_pretrained(order.place, revision=order.revision)
        except OSError:
            pass  # not every model has one
