"""What loading a base allocates, tensor by tensor, on the device and in RAM.

Read in transformers 5.23 (5.17 does the same), where `from_pretrained` quantises a 16-bit checkpoint as it loads it:

1. modeling_utils.py, caching_allocator_warmup: on CUDA one block of the size of the whole model, 4-bit weights counted as
   half a byte each and their scales not at all, is taken and given back at once. What follows is cut from it.
2. core_model_loading.py, convert_and_load_state_dict_in_model: tensors go one at a time, in the natural order of their
   names ("layers.2" before "layers.10"); the threads that load ahead are off while quantising. Each is moved to the device
   in 16 bits, a change of type is made in RAM on the way.
3. integrations/bitsandbytes.py, Bnb4bitQuantize: it is quantised there, and the 16-bit tensor is released after that.
   GPT-2's weights are stored transposed: quantising them makes a second 16-bit copy.
4. Experts that a checkpoint stores one by one are moved to the device together and stacked there (MergeModulelist,
   Concatenate): for a moment there are two copies of a layer's gate and up projections.

The 4-bit tensors: bitsandbytes 0.50, functional.quantize_4bit and quantize_blockwise, backends/cuda/ops.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora.planning.kernels_cpu import quantising_bytes
from qlora.planning.trace import Recorder

if TYPE_CHECKING:
    import bitsandbytes as bnb
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qlora.precision import Precision

_KEPT_FREE_BYTES = 1.2 * 2**30  # of the card's memory; modeling_utils.py, caching_allocator_warmup


def record_loading(
    recorder: Recorder, model: PreTrainedModel, *, warm_up: bool = True, on_cpu: bool = False, device_bytes: int | None = None
) -> None:
    """Record the phase "load" of a model that ends up like this one, whose tensors are counted from here on.

    What each tensor is for may be said later with `Recorder.track`; here all of it is "base".

    Args:
        model: on meta, in 4 bits, as `qlora.model.meta.build_base_on_meta` leaves it.
        warm_up: transformers' first block, which it takes on CUDA and not on the CPU.
        on_cpu: the mapped file, which is the system's cache and no tensor, stands in for 16-bit tensors, and quantising takes
            copies in fp32.
        device_bytes: the card's memory; the first block leaves 1.2 GiB of it alone. None: as large as it likes.
    """
    import bitsandbytes as bnb
    import torch
    from transformers.pytorch_utils import Conv1D

    with recorder.during("load", "base"):
        if warm_up:
            recorder.drop(recorder.hold(_warm_up_bytes(model, device_bytes), "warm-up", "workspace"))
        stacked = _stacked_parameters(model)
        for name, tensor in in_loading_order(model):
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, bnb.nn.Linear4bit) and name.endswith(".weight"):
                transposed = issubclass(getattr(module, "source_cls", object), Conv1D)
                _quantise(recorder, module, transposed=transposed, on_cpu=on_cpu)
            elif name in stacked:
                _stack(recorder, tensor, stacked[name])
            elif not on_cpu or tensor.dtype == torch.float32:
                recorder.track(tensor, "base")
        for parameter in model.parameters():  # on a CPU 16-bit ones are views of the file until the base is complete
            recorder.track(parameter, "base")
        for buffer in model.buffers():  # they are made anew after the weights
            recorder.track(buffer, "base")


def record_streamed_loading(
    recorder: Recorder, model: PreTrainedModel, on_device: Sequence[torch.Tensor], *, on_cpu: bool
) -> None:
    """The phase "load" of a model whose layers are streamed: quantised one by one, if that has not been done before, and then brought
    to their blocks.

    Args:
        on_device: the rest of the model's tensors on the device, and the blocks of the layers that are there.
        on_cpu: layers are quantised in RAM, which is the device, and in pieces.
    """
    with recorder.during("load", "base"):
        recorder.drop(recorder.hold(_store_building_bytes(model, on_cpu=on_cpu), "quantising a layer", "workspace"))
        for tensor in on_device:
            recorder.track(tensor, "base")


def block_sizes(config: PreTrainedConfig, precision: Precision) -> list[int]:
    """Bytes of each layer's block (`qlora.engine.arena`)."""
    from qlora.engine.arena import layer_layout
    from qlora.engine.skeleton import layers_path_of
    from qlora.model.meta import build_base_on_meta

    model = build_base_on_meta(config, precision=precision, attention="eager")  # which every class has, and no weight hangs on it
    return [layer_layout(layer).size_bytes for layer in model.get_submodule(layers_path_of(model))]


def loading_host_bytes(model: PreTrainedModel) -> int:
    """RAM that loading needs beside the process itself, where the device is a GPU: the checkpoint's largest tensor in 16
    bits, once as it was read and once in another 16-bit type. The mapped file is the system's cache, which gives way.
    """
    stacked = _stacked_parameters(model)
    pieces = {name: num_sources * model.get_parameter(name).shape[0] for name, num_sources in stacked.items()}
    return max(2 * 2 * _num_weights(parameter) // pieces.get(name, 1) for name, parameter in model.named_parameters())


def in_loading_order(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by name in the order in which the loader goes through them; tied ones once."""
    return sorted(model.named_parameters(), key=lambda item: _natural_key(item[0]))


# --- details -----------------------------------------------------------------------------------------------------------


def _store_building_bytes(model: PreTrainedModel, *, on_cpu: bool) -> int:
    """At most, while the largest matrix is quantised: in 16 bits as it was read and as it is needed, then its packed form with fp32
    scales; on a CPU also the block that the layer is gathered in, and a piece of a million numbers at 22 bytes each
    (`qlora.engine.quantise`).
    """
    import bitsandbytes as bnb

    from qlora.engine.arena import layer_layout
    from qlora.engine.skeleton import layers_path_of

    largest = max(_num_weights(module.weight) for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    scales = 2 * 4 * largest // 64
    if not on_cpu:
        return 2 * largest + largest // 2 + 2 * scales
    block = max(layer_layout(layer).size_bytes for layer in model.get_submodule(layers_path_of(model)))
    return block + 2 * 2 * largest + 2 * (largest // 2) + 2 * scales + 22 * 2**20


def _warm_up_bytes(model: PreTrainedModel, device_bytes: int | None) -> int:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size if device_bytes is None else min(size, int(device_bytes - _KEPT_FREE_BYTES))


def _quantise(recorder: Recorder, module: bnb.nn.Linear4bit, *, transposed: bool, on_cpu: bool) -> None:
    """From the 16-bit tensor to the packed one and its scales, in bitsandbytes' order."""
    state = module.quant_state
    size = _num_weights(module.weight) * state.dtype.itemsize
    copies = transposed + (not on_cpu or state.dtype.itemsize == 4)
    held = [recorder.hold(size, "16-bit weight", "workspace") for _ in range(copies)]
    inside = quantising_bytes(_num_weights(module.weight), state.dtype) if on_cpu else []
    held_inside = [recorder.hold(size, "quantising", "workspace") for size in inside]
    if not state.nested:
        recorder.track(state.absmax, "base")
        recorder.track(module.weight, "base")
        recorder.track(state.code, "base")
    else:
        scales_bytes = 4 * state.absmax.numel()
        scales = recorder.hold(scales_bytes, "fp32 scales", "workspace")
        recorder.track(module.weight, "base")
        for number in held_inside:
            recorder.drop(number)
        held_inside = []
        recorder.track(state.code, "base")
        recorder.track(state.offset, "base")
        centred = recorder.hold(scales_bytes, "fp32 scales less their mean", "workspace")
        recorder.track(state.state2.absmax, "base")
        recorder.track(state.absmax, "base")
        recorder.track(state.state2.code, "base")
        recorder.drop(centred)
        recorder.drop(scales)
    for number in (*held, *held_inside):
        recorder.drop(number)


def _stack(recorder: Recorder, tensor: torch.Tensor, num_sources: int) -> None:
    """Experts that came one by one: all of them, then one source after the other stacked, then the stacks side by side."""
    size, num_experts = tensor.numel() * tensor.element_size() // num_sources, tensor.shape[0]
    sources = [[recorder.hold(size // num_experts, "expert", "workspace") for _ in range(num_experts)]
               for _ in range(num_sources)]
    stacks = []
    for source in sources:
        if num_sources == 1:
            recorder.track(tensor, "base")
        else:
            stacks.append(recorder.hold(size, "stacked experts", "workspace"))
        for number in source:
            recorder.drop(number)
    recorder.track(tensor, "base")
    for number in stacks:
        recorder.drop(number)


def _stacked_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters that the loader stacks from one tensor per expert, with the number of tensors of each expert."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    found = {}
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightConverter) and any(isinstance(op, MergeModulelist) for op in conversion.operations):
            ends = tuple(conversion.target_patterns)
            found |= {name: len(conversion.source_patterns) for name, parameter in model.named_parameters()
                      if name.endswith(ends) and parameter.ndim == 3}
    return found


def _num_weights(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _natural_key(name: str) -> list[tuple[Any, ...]]:
    """As core_model_loading.py, dot_natural_key: numbers by value and before words; "shard_2" before "shard_11"."""
    key: list[tuple[Any, ...]] = []
    for word in name.split("."):
        stem, digits = re.fullmatch(r"(.*?)(\d*)", word).groups()
        key.append((0, int(word)) if word.isdigit() else (1, stem, int(digits)) if digits else (1, stem))
    return key
