"""Adapters, their gradients and the optimizer's state in host memory; on the device are only those of the layer that is visited.

During a visit tensors on the device take the places of the host's inside the modules, so whatever computes there computes with
ordinary parameters. Between visits every name, state dict, optimizer and norm of gradients finds the host's. Where all
micro-batches of a step go through one visit, gradients are summed on the device as they always are, and come out the same to the
last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from qlora.engine.arena import Layout, aligned_block, layout_of


class HostAdapters:
    """The adapters of some layers, moved to the host. Use the same layers in the same order as the numbers that are passed.

    On meta nothing is on the host: visits allocate what they would on a device, and the parameters never get gradients, so an
    optimizer has nothing to do and no state.

    Args:
        layers: modules in which LoRA adapters are; one may have none.
        device: where visits happen.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], device: torch.device | str):
        self._device = torch.device(device)
        self._layers = [_Adapters(places) for places in ([*_adapter_places(layer)] for layer in layers)]
        for adapters in self._layers:
            adapters.gather(pinned=self._device.type == "cuda")

    def enter(self, i: int, train: bool) -> None:
        """A visit of layer i begins: its adapters are on the device.

        Args:
            train: they collect gradients.

        Raises:
            AssertionError: the layer is being visited already.
        """
        adapters = self._layers[i]
        assert not adapters.leaves, f"layer {i} is being visited already"
        adapters.gather(pinned=self._device.type == "cuda")
        if not adapters.places:
            return
        if adapters.block is None:
            copied = torch.empty(adapters.layout.size_bytes, dtype=torch.uint8, device="meta")
        else:
            # From page-locked memory without waiting; the host changes it only after `leave` has waited for the gradients.
            copied = adapters.block.to(self._device, non_blocking=True, copy=True)
        for place, view in zip(adapters.places, adapters.layout.views(copied).values(), strict=True):
            leaf = torch.nn.Parameter(view, requires_grad=train and place.parameter.requires_grad)
            place.module.weight = leaf
            adapters.leaves.append(leaf)

    def leave(self, i: int) -> None:
        """The visit ends: gradients are added to those of the host's parameters, which are in place again. Waits for the device.

        Raises:
            AssertionError: the layer is not being visited.
        """
        adapters = self._layers[i]
        assert adapters.leaves or not adapters.places, f"layer {i} is not being visited"
        leaves = adapters.put_back()
        found = [(place.parameter, leaf.grad) for place, leaf in zip(adapters.places, leaves, strict=True)
                 if leaf.grad is not None]
        if found and not found[0][1].is_meta:
            _add_on_host(found)

    def abandon(self) -> None:
        """End all visits and drop their gradients; for a step that is to be done anew. The host's gradients stay as they are."""
        for adapters in self._layers:
            adapters.put_back()


class _Place(NamedTuple):
    """A or B of an adapter: a linear module, and the parameter that is its weight between visits."""

    module: torch.nn.Module
    parameter: torch.nn.Parameter


@dataclass
class _Adapters:
    """Of one layer. The parameters are views of a block of bytes, which goes to the device in one copy.

    Attributes:
        block: None on meta.
        leaves: what stands in the places during a visit, in their order.
    """

    places: list[_Place]
    layout: Layout = Layout((), 0)
    block: torch.Tensor | None = None
    leaves: list[torch.nn.Parameter] = field(default_factory=list)

    def gather(self, *, pinned: bool) -> None:
        """Make the parameters views of the block, unless they are: at first, and when something has given one other memory or
        another type, as a trainer may.
        """
        if not self.places or self.layout.entries and all(map(self._is_in_block, self.places)):
            return
        tensors = {str(number): place.parameter for number, place in enumerate(self.places)}
        self.layout = layout_of(tensors)
        if next(iter(tensors.values())).is_meta:
            return
        self.block = _host_block(self.layout.size_bytes, pinned=pinned)
        for place, view in zip(self.places, self.layout.views(self.block).values(), strict=True):
            view.copy_(place.parameter.data)
            place.parameter.data = view
            if place.parameter.grad is not None:
                place.parameter.grad = place.parameter.grad.to("cpu")

    def put_back(self) -> list[torch.nn.Parameter]:
        """The host's parameters are in place again; what was there is returned."""
        leaves, self.leaves = self.leaves, []
        if leaves:
            for place in self.places:
                place.module.weight = place.parameter
        return leaves

    def _is_in_block(self, place: _Place) -> bool:
        held = place.parameter
        return held.is_meta or held.untyped_storage().data_ptr() == self.block.untyped_storage().data_ptr()


def _adapter_places(layer: torch.nn.Module) -> Iterator[_Place]:
    from peft.tuners.lora import LoraLayer

    for module in layer.modules():
        if isinstance(module, LoraLayer):
            for half in (module.lora_A, module.lora_B):
                for linear in half.values():
                    yield _Place(linear, linear.weight)


def _add_on_host(found: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Add gradients on the device to those of parameters on the host; they travel together."""
    gradients = [gradient for _, gradient in found]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).to("cpu")
    for (parameter, gradient), part in zip(found, flat.split([g.numel() for g in gradients]), strict=True):
        part = part.view(gradient.shape)
        if parameter.grad is None:
            parameter.grad = part
        else:
            parameter.grad.add_(part)


def _host_block(size_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Page-locked where that is wanted and to be had; some systems (WSL) give little of it, and ordinary memory does too."""
    if pinned:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return aligned_block(size_bytes)
    return aligned_block(size_bytes)
