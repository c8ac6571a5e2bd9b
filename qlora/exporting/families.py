"""How llama.cpp wants a model's tensors: their names, the order of their rows, and what is different in each family.

From llama.cpp's converters (conversion/llama.py, qwen.py, gemma.py, phi.py, gpt2.py) and its own loading code (src/models/), as
of llama-cpp-python 0.3.36; names of tensors by gguf-py's table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from qlora.merging.base import Change


@dataclass(frozen=True)
class Family:
    """What llama.cpp computes, which must be what the model computes.

    Attributes:
        arch: llama.cpp's name of the architecture.
        activation: the only one that it has there.
        interleaved: rotary positions turn neighbouring rows of q and k, not the two halves of a head, so rows are regrouped.
        norm_offset: added to the weights of RMS norms, where the model computes with 1 + weight.
        sliding: "full" where windows of attention are not kept, else the period of layers that llama.cpp takes for granted.
    """

    arch: str
    activation: tuple[str, ...]
    interleaved: bool = False
    norm_offset: float = 0.0
    sliding: int | str = "full"


_SILU, _GELU = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh")
FAMILIES = {  # by config.model_type
    "llama": Family("llama", _SILU, interleaved=True),
    "mistral": Family("llama", _SILU, interleaved=True),
    "qwen2": Family("qwen2", _SILU),
    "qwen3": Family("qwen3", _SILU),
    "gemma2": Family("gemma2", _GELU, norm_offset=1.0, sliding=2),
    "gemma3_text": Family("gemma3", _GELU, norm_offset=1.0, sliding=6),
    "phi3": Family("phi3", _SILU),
    "gpt2": Family("gpt2", _GELU),
}


@dataclass(frozen=True)
class Placed:
    """A tensor of the model and its place in the file.

    Attributes:
        name: in the file. shape: there, in torch's order.
        order: which row of the model's tensor each row is; None where they are as they were.
        transposed: the model has it as (in, out).
        offset: added to every number.
    """

    change: Change
    name: str
    shape: tuple[int, ...]
    order: torch.Tensor | None = None
    transposed: bool = False
    offset: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether it must be in memory whole to be turned."""
        return self.transposed or self.order is not None

    def to_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """The model's tensor, or rows of one that need not be whole, as the file has it."""
        tensor = tensor.T.contiguous() if self.transposed else tensor
        tensor = tensor if self.order is None else tensor[self.order]
        return tensor + self.offset if self.offset else tensor

    def from_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way round, of the whole tensor."""
        tensor = tensor - self.offset if self.offset else tensor
        tensor = tensor if self.order is None else tensor[self.order.argsort()]
        return tensor.T.contiguous() if self.transposed else tensor


def find_family(base: str, config: PreTrainedConfig) -> Family:
    """Raises ModelError for a family, or a setting of one, that llama.cpp would compute otherwise."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"{base} is of the family {config.model_type}, which is not written as GGUF here; these are: "
                         f"{', '.join(FAMILIES)}.",
                         "Write the merged model with `qlora merge`, and convert that folder with llama.cpp's "
                         "convert_hf_to_gguf.py.")
    found = next((value for name in ("hidden_activation", "hidden_act", "activation_function")
                  if (value := getattr(config, name, None)) is not None), None)
    if found not in family.activation:
        raise _unlike(base, f"the activation {found}, where llama.cpp computes {family.activation[0]}")
    for name in ("use_bidirectional_attention", "add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, name, False):
            raise _unlike(base, f"{name}, which llama.cpp does not compute")
    if config.model_type == "gpt2" and not config.scale_attn_weights:
        raise _unlike(base, "no scaling of attention, which llama.cpp always does")
    if family.arch.startswith("gemma"):
        _check_scale(base, config)
    return family


def place(base: str, config: PreTrainedConfig, family: Family, changes: Sequence[Change]) -> list[Placed]:
    """Every tensor of the model in the order of the checkpoint; what is none of the text model's is left out.

    Raises:
        ModelError: a tensor that llama.cpp has no place for.
    """
    from qlora.merging.base import skeleton_of

    skeleton = skeleton_of(config)
    known = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    placed = []
    for change in changes:
        if change.name not in known or (tied and change.name == "lm_head.weight"):
            continue
        placed.append(_place(base, config, family, change))
    twice = [one.name for one in placed]
    assert len(set(twice)) == len(twice), f"{base} has two tensors for one place"
    return placed


def name_of(base: str, config: PreTrainedConfig, family: Family, name: str) -> str:
    """A tensor's name in the file, by its name in the model.

    Raises:
        ModelError: there is no place for it.
    """
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
    stem, _, ending = name.rpartition(".")
    found = gguf.get_tensor_name_map(arch, config.num_hidden_layers).get_name(stem)
    if found is None or ending not in ("weight", "bias"):
        raise _unlike(base, f"{name}, which llama.cpp's {family.arch} has no place for")
    return f"{found}.{ending}"


def head_order(config: PreTrainedConfig, family: Family, name: str, rows: int) -> torch.Tensor | None:
    """Which row of the model's q or k each row of the file's is; None for all else.

    Rotary positions turn row i and i + d/2 of a head in Transformers, and 2 i and 2 i + 1 in llama.cpp's `llama`
    (conversion/llama.py: permute).
    """
    import torch

    found = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
    if not family.interleaved or not found:
        return None
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


# --- details -----------------------------------------------------------------------------------------------------------


def _place(base: str, config: PreTrainedConfig, family: Family, change: Change) -> Placed:
    name, shape = change.name, change.stored.shape
    transposed = config.model_type == "gpt2" and bool(re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name))
    is_norm = name.endswith("norm.weight")
    return Placed(
        change, name_of(base, config, family, name), shape[::-1] if transposed else shape,
        head_order(config, family, name, shape[0]), transposed, family.norm_offset if is_norm else 0.0,
    )


def window_pattern(config: PreTrainedConfig) -> Iterator[bool]:
    """Of each layer, whether it sees a window alone."""
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers:
        yield kind == "sliding_attention"


def _check_scale(base: str, config: PreTrainedConfig) -> None:
    """llama.cpp takes the scale of attention from the head, and of the 27B models, which it knows by their depth, from the width
    (src/models/gemma2.cpp, gemma3.cpp)."""
    large = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
    expected = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != expected:
        raise _unlike(base, f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where llama.cpp computes with {expected}")


def _unlike(base: str, what: str) -> ModelError:
    return ModelError(f"{base} has {what}; the file would not be the model.",
                      "Use the merged model instead: qlora merge")
