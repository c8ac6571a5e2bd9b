"""A 4-bit model without its large weights, ready to be given them: matrices on meta, everything small real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from qlora import _compat
from qlora.catalog.skeleton import find_layers
from qlora.engine.arena import places_of
from qlora.model.meta import build_base_on_meta
from qlora.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_skeleton_4bit(config: PreTrainedConfig, precision: Precision, attention: str = "sdpa") -> PreTrainedModel:
    """The model that `qlora.model.build.build_base` would build, before any weight is read.

    Tensors of two and more dimensions and the 4-bit weights with their states are on meta; norms, biases and buffers (tables
    of positions and the like) are on the CPU, with the values that the model's class starts with. In evaluation mode, frozen.

    Raises:
        ModelError: transformers cannot build the model with this attention.
    """
    model = build_base_on_meta(config, precision=precision, attention=attention)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim < 2:
                start = torch.zeros_like(parameter, device="cpu")  # of biases of 4-bit layers nobody else would set it
                setattr(module, name, torch.nn.Parameter(start, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    _compat.set_start_values(model, is_left=lambda tensor: tensor.is_meta)
    return model.eval()


def layers_path_of(model: PreTrainedModel) -> str:
    """Where the stack of layers is in the model: "model.layers"."""
    return find_layers(model.config, dict(model.named_modules()))


def rest_tensors(model: torch.nn.Module, layers_path: str) -> dict[str, torch.Tensor]:
    """Every frozen tensor outside the stack of layers by its name in the model, tied ones once, and every buffer that is
    saved with the weights, wherever it is.
    """
    found, seen = {}, set()
    for place in places_of(model):
        if not place.name.startswith(f"{layers_path}.") and id(place.tensor) not in seen:
            seen.add(id(place.tensor))
            found[place.name] = place.tensor
    return found | saved_buffers(model)


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint holds, by name; tables that are computed anew at each start are not among them."""
    return {f"{path}.{name}" if path else name: buffer for path, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set}


def materialise(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> None:
    """Put tensors into a skeleton: parameters, parts of 4-bit weights and saved buffers, by name. Ties are kept, and all
    other buffers move to the device. On a CPU nothing is copied: what is a view of a file stays one.

    Raises:
        KeyError: a name that the model does not have.
    """
    places = {place.name: place for place in places_of(model)}
    holders: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((module, name))
    buffers = saved_buffers(model)
    for name, tensor in tensors.items():
        if name in buffers:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, tensor.to(device))
            continue
        place = places[name]
        held = place.tensor
        if not isinstance(held, torch.nn.Parameter):
            setattr(place.owner, place.attribute, tensor.to(device))
            continue
        made = _renewed(held, tensor.to(device))
        for module, leaf in holders[id(held)]:
            setattr(module, leaf, made)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def empty_layers(model: torch.nn.Module, layers_path: str, device: torch.device | str) -> None:
    """Give a skeleton's layers empty tensors on the device in place of those on meta, which torch lets nobody fill, so that
    a `Binding` can bind them. To be called after `materialise`.
    """
    for layer in model.get_submodule(layers_path):
        for place in places_of(layer):
            held = place.tensor
            empty = torch.empty(0, dtype=held.dtype, device=device)
            setattr(place.owner, place.attribute, _renewed(held, empty) if isinstance(held, torch.nn.Parameter) else empty)


def _renewed(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of the same kind with other values: `.data` cannot be set across meta and a device."""
    import bitsandbytes as bnb

    if not isinstance(parameter, bnb.nn.Params4bit):
        return torch.nn.Parameter(tensor, requires_grad=False)
    return bnb.nn.Params4bit(
        tensor, requires_grad=False, quant_state=parameter.quant_state, blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics, quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage, bnb_quantized=True, module=parameter.module,
    )
