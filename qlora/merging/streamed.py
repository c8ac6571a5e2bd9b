"""Run a model whose weights stay on the disk: each module's are read when the forward pass comes to it, and dropped after it.

Everything is computed in fp32. Of an embedding, the rows of the tokens are read; a linear layer is computed some outputs at a
time. So a model of any size takes little more than its activations and the largest of its other modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qlora import _compat
from qlora.engine.skeleton import saved_buffers
from qlora.merging.shards import PIECE
from qlora.model import build
from qlora.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FP32 = Precision("fp32", "fp32", False, "to compare by")
_SMALL = 2**16  # parameters of this size stay: norms and biases

Read = Callable[[str], torch.Tensor | None]


def build_streamed(config: PreTrainedConfig, open_weights: Callable[[PreTrainedModel], Read]) -> PreTrainedModel:
    """A model in fp32 and evaluation mode that reads its weights as it goes.

    Args:
        open_weights: given the model on meta, returns what reads a tensor by its name in the model, in any type; None for one
            that the checkpoint does not have, which keeps the value it starts with.
    """
    model = build.plain_skeleton(config, _FP32)
    read = open_weights(model)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    saved = {name: tensor for name in saved_buffers(model) if (tensor := read(name)) is not None}
    _compat.set_start_values(model, is_left=lambda tensor: tensor.is_meta)
    for name, tensor in saved.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, tensor)
    for path, module in model.named_modules():
        names = {leaf: f"{path}.{leaf}" if path else leaf for leaf, _ in module.named_parameters(recurse=False)}
        for leaf, name in list(names.items()):
            if isinstance(module, torch.nn.Embedding) or getattr(module, leaf).numel() > _SMALL:
                continue
            if leaf == "weight" and type(module) is torch.nn.Linear:
                continue
            setattr(module, leaf, _fixed(read(name).float()))
            del names[leaf]
        if names:
            _Streamed(module, names, read)
    return model.requires_grad_(False).eval()


class _Streamed:
    """Hooks on one module."""

    def __init__(self, module: torch.nn.Module, names: dict[str, str], read: Read):
        self._names, self._read = names, read
        self._held: dict[str, Any] = {}
        for leaf in names:  # at rest: the right shape on the CPU, where PEFT then puts the adapter, and four bytes of memory
            setattr(module, leaf, _fixed(torch.zeros(1).expand(getattr(module, leaf).shape)))
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._held = {leaf: getattr(module, leaf) for leaf in self._names}
        if isinstance(module, torch.nn.Embedding):
            return self._give_rows(module, inputs)
        if type(module) is torch.nn.Linear:
            self._held["bias"] = module.bias
            module.weight, module.bias = _fixed(torch.empty(0, module.in_features)), None  # `_after` computes
            return inputs
        for leaf, name in self._names.items():
            setattr(module, leaf, _fixed(self._read(name).float()))
        return inputs

    def _after(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if type(module) is torch.nn.Linear and output is not None:
            output = self._product(module, inputs[0])
        for leaf, held in self._held.items():
            setattr(module, leaf, held)
        self._held = {}
        return output

    def _give_rows(self, module: torch.nn.Embedding, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The rows of the tokens alone, under new numbers."""
        used, numbers = inputs[0].unique(return_inverse=True)
        module.weight = _fixed(self._read(self._names["weight"])[used].float())
        self._held["padding_idx"], module.padding_idx = module.padding_idx, None  # it is for gradients
        return (numbers, *inputs[1:])

    def _product(self, module: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self._read(self._names["weight"]), self._held["bias"]
        step = max(1, PIECE // module.in_features)
        pieces = (weight[first : first + step].float() for first in range(0, len(weight), step))
        product = torch.cat([torch.nn.functional.linear(inputs, piece) for piece in pieces], dim=-1)
        return product if bias is None else product + bias


def _fixed(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
