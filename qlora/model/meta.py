"""The 4-bit base without memory: the modules that `build_base` would build, on the meta device, in a blink.

What stands on meta has the types, shapes and storages of the real thing, to the byte, and no values; a simulated step runs
through the same modules as a real one. `tests/test_meta.py` holds it against real bitsandbytes modules.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from qlora import _compat
from qlora.catalog.lookup import has_remote_class
from qlora.catalog.skeleton import find_layers
from qlora.errors import ModelError
from qlora.model.build import quantisation
from qlora.precision import Precision, torch_dtype

if TYPE_CHECKING:
    import bitsandbytes as bnb
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def build_base_on_meta(
    config: PreTrainedConfig, *, precision: Precision, attention: str = "sdpa", num_layers: int | None = None
) -> PreTrainedModel:
    """The base as `qlora.model.build.build_base` leaves it: projections in NF4, all else in the compute type, frozen.

    Args:
        num_layers: keep only the first so many layers.

    Raises:
        ModelError: transformers cannot build the model with this attention.
    """
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    dtype = torch_dtype(precision.compute)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention,
                trust_remote_code=has_remote_class(config),
            )
    except (ImportError, ValueError) as error:
        raise ModelError(f"{config.model_type} cannot be built with {attention} attention: {error}",
                         "Set model.attention: auto.") from error
    if num_layers is not None:
        keep_layers(model, num_layers)
    quantiser = AutoHfQuantizer.from_config(quantisation(precision), pre_quantized=False)
    quantiser.preprocess_model(model=model, device_map={"": "meta"}, dtype=dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            give_nf4_weight(module, dtype)
    quantiser.postprocess_model(model)
    model.hf_quantizer = quantiser
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _compat.use_plain_cpu_kernels(model)
    model.config.use_cache = False
    return model


def keep_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Cut the stack of layers after the first `num_layers`; everything around it stays as it is."""
    path = find_layers(model.config, dict(model.named_modules()))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, model.get_submodule(path)[:num_layers])


def give_nf4_weight(module: bnb.nn.Linear4bit, dtype: torch.dtype, *, double_quant: bool = True) -> None:
    """Replace a 16-bit weight on meta by what bitsandbytes makes of it when it moves to a device.

    Source: bitsandbytes 0.50, functional.quantize_4bit and nn/modules.py, Params4bit: blocks of 64 numbers with one scale
    each; with double quantisation 8-bit scales, in blocks of 256, and their fp32 mean.
    """
    import bitsandbytes as bnb
    import torch

    if module.bias is not None:  # transformers makes it in fp32, and the loader gives it the type of the rest
        module.bias = torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    State = bnb.functional.QuantState
    num_weights = module.in_features * module.out_features
    num_blocks = math.ceil(num_weights / 64)
    common = dict(shape=torch.Size((module.out_features, module.in_features)), code=empty(16), blocksize=64,
                  quant_type="nf4", dtype=dtype)
    if double_quant:
        scales = State(absmax=empty(math.ceil(num_blocks / 256)), code=empty(256), blocksize=256, dtype=torch.float32)
        state = State(absmax=empty(num_blocks, dtype=torch.uint8), offset=empty(), state2=scales, **common)
    else:
        state = State(absmax=empty(num_blocks), **common)
    module.weight = bnb.nn.Params4bit(
        empty(math.ceil(num_weights / 2), 1, dtype=torch.uint8), requires_grad=False, quant_state=state, blocksize=64,
        compress_statistics=double_quant, quant_type="nf4", bnb_quantized=True, module=module,
    )
    module.quant_state = state


def quantisation_tensors(module: bnb.nn.Linear4bit) -> list[torch.Tensor]:
    """The tensors that a 4-bit weight has beside itself: scales and tables."""
    state = module.quant_state
    found = [state.absmax, state.code]
    return [*found, state.offset, state.state2.absmax, state.state2.code] if state.nested else found
