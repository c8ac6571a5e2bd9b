"""Quantise a base once, layer by layer, into the store that later runs read.

One layer at a time is in memory, and of that one matrix at a time in 16 bits. `qlora.engine.writing` brings it to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qlora.engine.arena import places_of
from qlora.engine.skeleton import layers_path_of
from qlora.engine.store import BaseStore
from qlora.engine.writing import Content, look_up_or_write
from qlora.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers that are quantised at once on a CPU, where bitsandbytes (0.50) takes 22 bytes a number for the time being and is
# faster when these stay in the cache: 1.4 s instead of 2.0 s for 58.7 million (4096 x 14336, one core, AVX512).
_PIECE = 2**20


class Weights(Protocol):
    """A reader of 16-bit weights: see `qlora.engine.weights`."""

    alike: bool

    def open(self, skeleton: PreTrainedModel) -> None: ...

    def tensor(self, name: str) -> torch.Tensor | None: ...


def open_or_build(
    identity: Mapping[str, Any], skeleton: PreTrainedModel, weights: Weights, *, device_name: str, progress: Progress
) -> BaseStore:
    """The kept base of this identity; made first where there is none that is whole. Two that want the same make it once.

    Args:
        skeleton: of `build_skeleton_4bit`; what `weights` does not have keeps the skeleton's values.
        device_name: what quantises, "cpu" or "cuda"; the one that `identity_of` was told.

    Raises:
        NeedsLoaderError: the weights need transformers' own loader; see `save_from_model`.
        ModelError: weights that are missing or cannot be had.
        OutputError: no room on the disk, with both sizes, or the cache cannot be written.
    """
    assert identity["quantiser"]["device"] == torch.device(device_name).type, "the identity is of another device's quantiser"

    def content() -> Content:
        weights.open(skeleton)
        return _Quantised(skeleton, weights, device_name)

    return look_up_or_write(identity, content, progress)


def save_from_model(
    identity: Mapping[str, Any], model: PreTrainedModel, layers_path: str, progress: Progress
) -> BaseStore:
    """A store of a base that transformers' loader has quantised: for weights that cannot be read one by one.

    Raises:
        OutputError: as `open_or_build`.
    """
    return look_up_or_write(identity, lambda: _Copied(model, layers_path), progress)


# --- what is written ---------------------------------------------------------------------------------------------------


class _Copied(Content):
    """A model that has its weights."""

    def fill(self, number: int, block: torch.Tensor) -> None:
        block.zero_()
        views = self.layouts[number].views(block)
        for place in places_of(self.layers[number]):
            views[place.name].copy_(place.tensor)

    def rest_tensor(self, name: str) -> torch.Tensor:
        return self.rest[name].detach()


class _Quantised(Content):
    """A skeleton, and weights that are quantised as they are needed."""

    def __init__(self, skeleton: PreTrainedModel, weights: Weights, device_name: str):
        super().__init__(skeleton, layers_path_of(skeleton))
        self._weights, self._device = weights, device_name
        self._filled: int | None = None  # the layer that is in the block now, where layers may be alike
        self._rest_parts: dict[str, torch.Tensor] = {}

    def fill(self, number: int, block: torch.Tensor) -> None:
        if self._filled is not None and self._is_like(number, self._filled):
            return
        block.zero_()
        views = self.layouts[number].views(block)
        for place in places_of(self.layers[number]):
            if not isinstance(place.tensor, torch.nn.Parameter):
                continue  # part of a 4-bit weight's state, which comes with the weight
            for suffix, tensor in self._tensors(f"{self.layers_path}.{number}.{place.name}", place.tensor, place.owner).items():
                views[f"{place.name}{suffix}"].copy_(tensor)
        self._filled = number if self._weights.alike else None

    def rest_tensor(self, name: str) -> torch.Tensor:
        if name in self._rest_parts:  # the state of the 4-bit weight that came before it
            return self._rest_parts.pop(name)
        held = self.rest[name]
        path = name.rpartition(".")[0]
        found = self._tensors(name, held, self.model.get_submodule(path))
        self._rest_parts.update({f"{name}{suffix}": tensor for suffix, tensor in found.items() if suffix})
        return found[""]

    def _is_like(self, number: int, other: int) -> bool:
        """Whether random layers are equal: matrices are where shapes are, but for what keeps the skeleton's values."""
        if self.layouts[number] is not self.layouts[other]:
            return False
        pairs = zip(places_of(self.layers[number]), places_of(self.layers[other]), strict=True)
        return all(one.tensor.is_meta or torch.equal(one.tensor, two.tensor) for one, two in pairs)

    def _tensors(self, name: str, held: torch.Tensor, owner: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A parameter or buffer of the skeleton with its values, and the parts of its state where it is 4-bit, by suffix."""
        import bitsandbytes as bnb
        from transformers.pytorch_utils import Conv1D

        found = self._weights.tensor(name)
        if found is None:
            assert not held.is_meta, f"{name} has no values"
            return {"": held.detach()}
        if not isinstance(held, bnb.nn.Params4bit):
            return {"": found if found.dtype == held.dtype else found.to(held.dtype)}
        if issubclass(owner.source_cls, Conv1D):
            found = found.T  # GPT-2's are stored as (in, out)
        return quantise_nf4(found.to(held.quant_state.dtype), self._device)


def quantise_nf4(weight: torch.Tensor, device_name: str) -> dict[str, torch.Tensor]:
    """What `bnb.nn.Params4bit` makes of a matrix when it moves to a device: the packed weight under "", then the parts of its
    state under the names that `arena.places_of` gives them.

    On a CPU it is made piece by piece, with the same numbers: blocks of 64 are independent, and the scales are quantised
    together, as bitsandbytes does it (0.50, functional.quantize_4bit).
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    settings = dict(blocksize=64, quant_type="nf4", quant_storage=torch.uint8)
    if torch.device(device_name).type != "cpu" or weight.numel() <= _PIECE:
        packed, state = quantize_4bit(weight.contiguous().to(device_name), compress_statistics=True, **settings)
        absmax, code, offset, scales = state.absmax, state.code, state.offset, state.state2
    else:
        flat = weight.contiguous().view(-1)  # a view, unless the weight is turned or of random rows
        pieces, parts = [], []
        for start in range(0, flat.numel(), _PIECE):
            piece, state = quantize_4bit(flat[start : start + _PIECE], compress_statistics=False, **settings)
            pieces.append(piece)
            parts.append(state.absmax)
        packed, absmax, code = torch.cat(pieces), torch.cat(parts), state.code
        offset = absmax.mean()
        absmax, scales = quantize_blockwise(absmax - offset, blocksize=256)
    return {"": packed, ".absmax": absmax, ".code": code, ".offset": offset, ".nested_absmax": scales.absmax,
            ".nested_code": scales.code}
