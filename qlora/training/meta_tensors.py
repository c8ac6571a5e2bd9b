"""A model's tensors on meta, for a rehearsal: what each is for, and what stands for inputs, caches and workspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qlora.engine.arena import layer_layout
from qlora.engine.install import Engine
from qlora.engine.placement import Placement, resident_numbers
from qlora.engine.sources import NoSource
from qlora.engine.stream import Stream
from qlora.hardware import Device
from qlora.model.meta import quantisation_tensors
from qlora.planning.kernels import cublas_workspace_bytes, cuda_temporaries
from qlora.planning.kernels_cpu import cpu_temporaries
from qlora.planning.trace import Recorder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PAGED, ON_HOST = "paged", "host"  # parts that are none of the device's


def temporaries(device: Device) -> Mapping[Any, Callable[..., Sequence[int]]]:
    """What a device's kernels take while they run; see `qlora.planning.trace.Recorder`."""
    return cpu_temporaries() if device.kind == "cpu" else cuda_temporaries(device.capability)


def hold_workspaces(recorder: Recorder, device: Device) -> None:
    """cuBLAS takes one for the thread of the forward pass and one for that of the backward pass."""
    if device.kind == "cuda":
        for _ in range(2):
            recorder.hold(cublas_workspace_bytes(device.capability), "cublas workspace", "workspace")


def stream_on_meta(base: PreTrainedModel, placement: Placement, layers_path: str) -> Stream:
    """The layers in slots and blocks on meta, as a run has them."""
    layers = list(base.get_submodule(layers_path))
    return Stream(
        layers, [layer_layout(layer) for layer in layers], resident=resident_numbers(len(layers), placement.resident_layers),
        read=None, source=NoSource(), device="meta",
    )


def on_device(base: PreTrainedModel, placement: Placement) -> list[torch.Tensor]:
    """Parameters and buffers of a streamed base that live on the device, outside of the layers that come and go."""
    away = []
    if placement.embedding_device == "host":
        away.append(base.get_input_embeddings().weight)
    if placement.head_format != "resident":
        away.append(base.get_output_embeddings().weight)
    everything = (*base.parameters(), *base.buffers())
    return [tensor for tensor in everything if not any(tensor is each for each in away) and tensor.numel()]


def track_weights(recorder: Recorder, model: PeftModel, engine: Engine, adapters: str) -> None:
    """Say of every tensor of a model what it is for, and count those that were there before.

    Args:
        adapters: the part that adapters belong to.
    """
    import bitsandbytes as bnb

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    placement = engine.placement
    for block in engine.stream.blocks:
        recorder.track(block, "base")
    for tensor in engine.head.tensors() if engine.head is not None else ():
        recorder.track(tensor, "head")
    parts = {embeddings: "embeddings" if placement.embedding_device == "device" else ON_HOST,
             head: "head" if placement.head_format == "resident" else ON_HOST}
    for module in model.modules():
        part = parts.get(module, "embeddings" if isinstance(module, torch.nn.Embedding) else "base")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            recorder.track(tensor, adapters if tensor.requires_grad else part)
        if isinstance(module, bnb.nn.Linear4bit):
            for tensor in quantisation_tensors(module):
                recorder.track(tensor, "base")
    recorder.track(embeddings.weight, parts[embeddings])  # where the head is tied to it, it is counted once, here


def mark_loss(recorder: Recorder, model: PeftModel) -> None:
    """What is allocated between the end of the backbone and its first gradient is the loss's."""

    def begins(module: Any, args: Any, output: Any) -> None:
        hidden = output[0]
        recorder.switch("train:loss" if hidden.requires_grad else None, "loss")
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: recorder.switch("train:backward", "activations"))

    model.get_base_model().base_model.register_forward_hook(begins)


def number() -> torch.Tensor:
    """One whole number on meta."""
    return torch.empty((), dtype=torch.long, device="meta")


def prompt(rows: int, num_tokens: int, seen: int | None = None) -> dict[str, torch.Tensor]:
    """What generation calls a model with, after `seen` tokens."""
    def numbers(width: int) -> torch.Tensor:
        return torch.empty((rows, width), dtype=torch.long, device="meta")

    # `generate` gives each row positions of its own, for which models keep one rotation a row.
    return {
        "input_ids": numbers(num_tokens), "position_ids": numbers(num_tokens), "attention_mask": numbers(seen or num_tokens),
    }


def lengthen(cache: Any, num_tokens: int) -> None:
    """The cache as it is `num_tokens` later, less the one that comes next. A sliding window keeps what it looks back on."""
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length += num_tokens - 1
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                rows, heads, length, width = tensor.shape
                length += num_tokens - 1
                setattr(layer, name, tensor.new_empty(rows, heads, min(length, window - 1) if window else length, width))
