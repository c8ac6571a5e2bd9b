"""Put a placement into effect on a model that has its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qlora.engine.boundaries import OnDevice, OnHost, OnSimulatedHost
from qlora.engine.placement import PROJECTIONS, Placement
from qlora.engine.schedule import Schedule
from qlora.engine.stream import AllThere, Stream
from qlora.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora.engine.head import Head
    from qlora.engine.loss import LanguageModelLoss
    from qlora.engine.store import BaseStore


@dataclass
class Engine:
    """What a placement has put into a model.

    Attributes:
        schedule: in the place of the model's loop over its layers; None where that runs as it is.
        loss: in the place of TRL's; None where that is used, and the model's own head with it, which else is `head`.
        layers_path: where the stack of layers is in the base.
        stream: the layers' weights.
        store: where the base came from and parts of it go on coming from; None where nothing does.
        notes: what could not be done in some module, one line each.
    """

    placement: Placement
    layers_path: str
    schedule: Schedule | None = None
    loss: LanguageModelLoss | None = None
    head: Head | None = None
    stream: Stream | AllThere = field(default_factory=lambda: AllThere(0))
    store: BaseStore | None = None
    notes: list[str] = field(default_factory=list)

    def let_go(self) -> None:
        """Give back the memory of what was read of the store's file."""
        if self.store is not None:
            self.store.let_go()

    def walk(self) -> Iterator[int]:
        """Each layer with its weights in place, one after the other."""
        return self.stream.walk(range(self.stream.num_layers))

    def close(self) -> None:
        """Let go of threads, files and page locks."""
        self.stream.close()
        if self.store is not None:
            self.store.close()


def install(
    model: PeftModel, placement: Placement, *, layers_path: str, device: torch.device | str, stream: Stream | None = None,
    store: BaseStore | None = None, simulates_gpu: bool = False,
) -> Engine:
    """Make a model work as a placement says. Its adapters stay ordinary PEFT adapters.

    Args:
        layers_path: of the stack of layers, in the base.
        stream: the layers' weights where a store has brought them; needed where the placement streams.
        store: where the base came from; what is to stay in host memory is a view of its file. Open as long as the model is used.
        simulates_gpu: tensors on meta stand for those of a GPU, which has a host beside it. A CPU is its own host.
    """
    assert stream is not None or not placement.streams, "streamed layers need a stream"
    base = model.get_base_model()
    layers = list(base.get_submodule(layers_path))
    engine = Engine(placement, layers_path, stream=stream or AllThere(len(layers)), store=store)
    tables = store.rest() if store is not None else {}
    if placement.fused_lora:
        from qlora.engine.fused import install_fused

        notes = install_fused(model, projections_alone=placement.fused_lora == PROJECTIONS)
        engine.notes += notes if placement.fused_lora is True else []  # what nobody asked for need not be explained
    if placement.mlp_tile_tokens:
        from qlora.engine.tiled_mlp import install_tiled_mlp

        install_tiled_mlp(model, placement.mlp_tile_tokens)
    names = [_name_of(base, module) for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    if placement.embedding_device == "host":
        from qlora.engine.host_embedding import embed_on_host

        embed_on_host(model, tables.get(names[0]), device, engine.let_go)
    if placement.loss_chunk_bytes is not None:
        from qlora.engine.head import make_head
        from qlora.engine.loss import LanguageModelLoss

        resident = placement.head_format == "resident"
        table = None if resident else tables.get(names[1])
        engine.head = make_head(model, placement.head_format, device, table, engine.let_go)
        engine.loss = LanguageModelLoss(model, engine.head, placement.loss_chunk_bytes)
    if placement.schedules:
        _refuse_adapters_elsewhere(model, layers)
        engine.schedule = _schedule(placement, layers, engine.stream, torch.device(device), simulates_gpu)
    return engine


def _refuse_adapters_elsewhere(model: PeftModel, layers: Sequence[torch.nn.Module]) -> None:
    """
    Raises:
        ModelError: an adapter outside of the layers: what comes before them runs without a graph.
    """
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in inside]
    if outside:
        raise ModelError(f"{outside[0]} is an adapter outside of the model's layers, which would get no gradient when those are visited "
                         "one by one.", "Leave it out of lora.targets, or set memory.streaming and memory.offload_activations to false.")


def rest_on_device(
    base: torch.nn.Module, tables: Mapping[str, torch.Tensor], placement: Placement, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The tensors outside of the layers as a base gets them: copies on the device, and views of the file for what stays on the host.

    Args:
        tables: all of them, by name, in host memory.
    """
    stays = set()
    if placement.embedding_device == "host":
        stays.add(_name_of(base, base.get_input_embeddings()))
    if placement.head_format != "resident":
        stays.add(_name_of(base, base.get_output_embeddings()))
    return {name: tensor if name in stays else tensor.to(device, copy=True) for name, tensor in tables.items()}


def _schedule(
    placement: Placement, layers: Sequence[torch.nn.Module], stream: Any, device: torch.device, simulates_gpu: bool
) -> Schedule:
    adapters = None
    if placement.offload_adapters:
        from qlora.engine.host_adapters import HostAdapters

        adapters = HostAdapters(layers, device)
    kept: Any = OnDevice()
    if placement.offload_activations and simulates_gpu:
        kept = OnSimulatedHost()
    elif placement.offload_activations and device.type == "cuda":
        kept = OnHost(device)
    kind: type[Schedule] = Schedule
    if device.type == "meta":
        from qlora.engine.rehearsed import RehearsedSchedule as kind
    return kind(
        layers, stream, kept=kept, adapters=adapters, dense=placement.dequantise_once,
        at_once=placement.visit_micro_batches if placement.streams or placement.offload_adapters else 1,
    )


def _name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    """The name of a module's weight as the model's own list has it; of tied ones the first."""
    return next((name for name, parameter in model.named_parameters() if parameter is module.weight), "")
