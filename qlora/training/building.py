"""Build what a run trains: the 4-bit base where the plan wants it, its adapters, and what the memory engine does for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.engine.placement import Placement, resident_numbers
from qlora.errors import NeedsLoaderError, OutputError
from qlora.hardware import limit_memory
from qlora.progress import Progress
from qlora.training.setup import Setup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora.engine.install import Engine
    from qlora.engine.store import BaseStore
    from qlora.engine.stream import Stream


@dataclass(frozen=True)
class _Base:
    """A base that is ready for adapters, and the store that parts of it go on coming from."""

    model: PreTrainedModel
    stream: Stream | None = None
    store: BaseStore | None = None


def build_model(setup: Setup, progress: Progress) -> tuple[PeftModel, Engine]:
    """The 4-bit base with fresh adapters, on the device and within the budget, working as the plan's placement says.

    Raises:
        ModelError: weights that are missing, gated, unreachable, pickled, or quantised in another way.
        OutputError: there is no room on the disk for the quantised base.
    """
    from qlora.engine.install import install
    from qlora.model.adapt import add_adapters
    from qlora.model.exact import make_exact
    from qlora.precision import torch_dtype

    settings = setup.plan.settings
    placement = Placement.from_settings(settings)
    limit_memory(setup.device, setup.plan.budget_bytes - setup.plan.parts["context"])
    base = _find_base(setup, placement, progress)
    model = add_adapters(
        base.model, setup.selection, r=settings["lora.r"], alpha=settings["lora.alpha"], dropout=settings["lora.dropout"],
        seed=settings["train.seed"], dtype=torch_dtype(setup.precision.adapters),
    )
    if setup.device.kind == "cpu" and setup.precision.compute == "fp32":
        make_exact(model)
    engine = install(
        model, placement, layers_path=setup.architecture.layers_path, device=setup.device.torch_name, stream=base.stream,
        store=base.store,
    )
    for note in engine.notes:
        progress.note(note)
    return model, engine


def _find_base(setup: Setup, placement: Placement, progress: Progress) -> _Base:
    """From the store of quantised bases if the plan says so; where there is no room for one and it can be done without, as ever."""
    keeps = setup.plan.decisions["memory.cache_base"]
    if keeps.value is not True:
        return _loaded_base(setup, progress)
    try:
        return _kept_base(setup, placement, progress)
    except OutputError as error:
        if placement.streams or keeps.source == "given":
            raise
        progress.note(f"The quantised base is not kept for the next start. {error.problem}")
        return _loaded_base(setup, progress)


def _loaded_base(setup: Setup, progress: Progress) -> _Base:
    """As transformers loads and quantises it."""
    from qlora.model.build import build_base

    recipe, settings = setup.recipe, setup.plan.settings
    with progress.stage(f"Loading {recipe.model.base} in 4 bits"):
        return _Base(build_base(
            setup.base, setup.config, device=setup.device, precision=setup.precision, weights=recipe.model.weights,
            attention=settings["model.attention"], revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code, seed=settings["train.seed"],
        ))


def _kept_base(setup: Setup, placement: Placement, progress: Progress) -> _Base:
    """From the store of quantised bases, where it is made first if it is not there."""
    from qlora.architecture import find_config
    from qlora.engine.quantise import open_or_build, save_from_model
    from qlora.engine.skeleton import build_skeleton_4bit
    from qlora.engine.store import identity_of
    from qlora.engine.weights import RandomWeights, SafetensorsWeights

    model, seed, precision = setup.recipe.model, setup.plan.settings["train.seed"], setup.precision
    config = setup.config
    if model.weights == "pretrained" and not Path(setup.base).expanduser().is_dir():
        # The catalog's config is for planning; weights are read with the config that lies beside them.
        config = find_config(setup.base, revision=model.revision or "main")
    identity = identity_of(
        setup.base, weights=model.weights, config=config, precision=precision, revision=model.revision, seed=seed,
        device_name=setup.device.torch_name,
    )
    skeleton = build_skeleton_4bit(config, precision, setup.plan.settings["model.attention"])
    random = model.weights == "random"
    weights = RandomWeights(config, precision, seed) if random else SafetensorsWeights(setup.base, revision=model.revision)
    try:
        store = open_or_build(identity, skeleton, weights, device_name=setup.device.torch_name, progress=progress)
    except NeedsLoaderError:
        loaded = _loaded_base(setup, progress)
        store = save_from_model(identity, loaded.model, setup.architecture.layers_path, progress)
        if not placement.streams:
            return loaded
        del loaded
    with progress.stage(f"Loading {model.base} in 4 bits") as update:
        return _from_store(store, skeleton, setup, placement, update)


def _from_store(store: BaseStore, model: PreTrainedModel, setup: Setup, placement: Placement, loading: Any) -> _Base:
    """Put a kept base where the placement wants its parts."""
    from qlora.engine.install import rest_on_device
    from qlora.engine.skeleton import empty_layers, materialise
    from qlora.engine.sources import make_source
    from qlora.engine.stream import Stream, own_tensors

    device, layers_path = setup.device.torch_name, setup.architecture.layers_path
    materialise(model, rest_on_device(model, store.rest(), placement, device), device)
    store.let_go()
    empty_layers(model, layers_path, device)
    model.name_or_path = setup.base  # what the adapter's config names as its base
    model.hf_device_map = {"": device}
    _take_generation_config(model, setup)
    layers = list(model.get_submodule(layers_path))
    if not placement.streams:
        own_tensors(layers, store.layouts, store.read_layer, device, loading)
        store.close()
        return _Base(model)
    resident = resident_numbers(len(layers), placement.resident_layers)
    streamed = [number for number in range(len(layers)) if number not in resident]
    source = make_source(
        store.read_layer, store.layouts, streamed, device=device, stream_from=placement.stream_from, loading=loading
    )
    stream = Stream(layers, store.layouts, resident=resident, read=store.read_layer, source=source, device=device, loading=loading)
    return _Base(model, stream, store)


def _take_generation_config(model: PreTrainedModel, setup: Setup) -> None:
    """What ends an answer, where the base says so beside its weights."""
    from transformers import GenerationConfig

    if setup.recipe.model.weights == "pretrained":
        try:
            model.generation_config = GenerationConfig.from_pretrained(setup.base, revision=setup.recipe.model.revision)
        except OSError:
            pass  # not every model has one
