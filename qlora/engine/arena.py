"""One layer's frozen tensors side by side in one block of bytes, so that a layer moves with a single copy.

A layout says where each tensor lies: 4-bit weights, their scales and code tables, norms and biases. The same layout is used for the
file that a base is kept in, for host memory and for the slots on the device; a layer whose tensors are views of a block computes
exactly what it would with tensors of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Where tensors begin inside a block: kernels choose faster paths for addresses that divide by 512, and results must not depend on
# where a layer happens to lie. Whole blocks begin and end at pages, which is what direct reads and page-locked memory want.
TENSOR_ALIGNMENT = 512
PAGE = 4096


@dataclass(frozen=True)
class Entry:
    """One tensor of a layer.

    Attributes:
        name: its path in the layer, adapters' wrappers left out: "self_attn.q_proj.weight", "self_attn.q_proj.weight.absmax".
        dtype: torch's name of it, "uint8".
        offset: in the block, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a layer lies in its block, whose size is a whole number of pages."""

    entries: tuple[Entry, ...]
    size_bytes: int

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that lie in a block of uint8, by name; nothing is copied."""
        return {entry.name: self._view(block, entry) for entry in self.entries}

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return {"size_bytes": self.size_bytes,
                "entries": [[entry.name, entry.dtype, list(entry.shape), entry.offset] for entry in self.entries]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Layout:
        """What `to_json` wrote."""
        entries = tuple(Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in document["entries"])
        return cls(entries, document["size_bytes"])

    @staticmethod
    def _view(block: torch.Tensor, entry: Entry) -> torch.Tensor:
        return block[entry.offset : entry.offset + entry.num_bytes].view(entry.torch_dtype).view(entry.shape)


@dataclass(frozen=True)
class Place:
    """A frozen tensor where a module holds it: `owner.attribute`, a parameter or a part of a 4-bit weight's state."""

    name: str
    owner: Any
    attribute: str

    @property
    def tensor(self) -> torch.Tensor:
        return getattr(self.owner, self.attribute)

    def put(self, tensor: torch.Tensor) -> None:
        """Make the module use this tensor, which has the type and device of the one that is there."""
        held = self.tensor
        if isinstance(held, torch.nn.Parameter):
            held.data = tensor
        else:
            setattr(self.owner, self.attribute, tensor)


def places_of(module: torch.nn.Module) -> list[Place]:
    """Every frozen tensor of a module: parameters that are not trained, and what 4-bit weights have beside themselves. Adapters
    that wrap a layer do not show in the names. Buffers are not among them.
    """
    return list(_places(module))


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """A layout for tensors by name, in their order; on meta or with values."""
    entries, offset = [], 0
    for name, tensor in tensors.items():
        entry = Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)
        entries.append(entry)
        offset = _round_up(offset + entry.num_bytes, TENSOR_ALIGNMENT)
    return Layout(tuple(entries), max(PAGE, _round_up(offset, PAGE)))


def layer_layout(layer: torch.nn.Module) -> Layout:
    """The layout of a layer's frozen tensors, as they are in it now."""
    return layout_of({place.name: place.tensor for place in _places(layer)})


def fill(layout: Layout, block: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors by name to where they lie in a block; gaps between them become zeros."""
    block.zero_()
    for name, view in layout.views(block).items():
        view.copy_(tensors[name])


class Binding:
    """A layer and the places of its frozen tensors, found once, so that binding it to a block costs next to nothing.

    Raises:
        AssertionError: the layer's tensors are not those of the layout.
    """

    def __init__(self, layer: torch.nn.Module, layout: Layout):
        self.layer, self.layout = layer, layout
        places = {place.name: place for place in _places(layer)}
        names = [entry.name for entry in layout.entries]
        assert sorted(places) == sorted(names), f"{sorted(set(places) ^ set(names))} are in one of layer and layout alone"
        self._places = [places[name] for name in names]

    def bind(self, block: torch.Tensor) -> None:
        """Make every frozen tensor of the layer a view of the block."""
        self.put(self.layout.views(block))

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the layer use these tensors, by name in the order of the layout."""
        for place, tensor in zip(self._places, tensors.values(), strict=True):
            place.put(tensor)

    def release(self, device: torch.device | str) -> None:
        """Leave the layer without weights: empty tensors, so that a use by mistake fails at once and never computes with another
        layer's numbers. Single numbers become NaN, in host memory, because a model's state_dict() asks for them.
        """
        for place, entry in zip(self._places, self.layout.entries, strict=True):
            if entry.shape == () and entry.torch_dtype.is_floating_point:
                place.put(torch.tensor(math.nan, dtype=entry.torch_dtype))
            else:
                place.put(torch.empty(0, dtype=entry.torch_dtype, device=device))


def _places(module: torch.nn.Module) -> Iterator[Place]:
    for path, child in module.named_modules():
        path = path.replace(".base_layer", "")  # PEFT keeps the wrapped layer under this name
        for name, parameter in child.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if parameter.requires_grad or ".lora_" in f".{full}":
                continue
            yield Place(full, child, name)
            yield from _state_places(full, getattr(parameter, "quant_state", None))


def _state_places(name: str, state: Any) -> Iterator[Place]:
    """The tensors of bitsandbytes' QuantState (0.50, functional.py)."""
    if state is None:
        return
    yield Place(f"{name}.absmax", state, "absmax")
    yield Place(f"{name}.code", state, "code")
    if state.nested:
        yield Place(f"{name}.offset", state, "offset")
        yield Place(f"{name}.nested_absmax", state.state2, "absmax")
        yield Place(f"{name}.nested_code", state.state2, "code")


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def aligned_block(size_bytes: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A block of uint8 that begins at a page; on devices other than the CPU allocators align far enough by themselves."""
    if torch.device(device).type != "cpu":
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    raw = torch.empty(size_bytes + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + size_bytes]


Reader = Callable[[int, torch.Tensor], None]
"""Fills a block of host memory with the bytes of a layer, by its number."""
