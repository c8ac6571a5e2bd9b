"""Build the frozen 4-bit base and its tokenizer: from a folder, from the Hub, or with random weights from a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.architecture import find_config
from qlora.errors import ModelError
from qlora.hardware import Device
from qlora.model.safe_files import pickled, refuse_unsafe_files
from qlora.precision import Precision, torch_dtype

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY = "builtin:tiny"

# Multimodal checkpoints keep their language model under another name. Ordinary ones have no such keys. Without this the
# loader finds none of the text part's weights and starts them at random, with no more than a log line.
TEXT_PART_KEYS = {r"^language_model\.lm_head": "lm_head", r"^(model\.)?language_model\.(model\.)?": "model."}


def locate_base(base: str, progress: Any = None) -> str:
    """The folder of the embedded base, built at the first call; any other name unchanged.

    Raises:
        ModelError: an unknown builtin.
    """
    if base == TINY:
        from qlora.model.tiny import tiny_folder

        return str(tiny_folder(progress))
    if base.startswith("builtin:"):
        raise ModelError(f"There is no built-in model {base!r}.", f"The one that ships with the program is {TINY}.")
    return base


def load_tokenizer(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a located base.

    Raises:
        ModelError: it is not there, is gated, or cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise explain(error, base, "tokenizer") from error


def stand_in_tokenizer(base: str, vocab_size: int) -> tuple[PreTrainedTokenizerBase, bool]:
    """A tokenizer for a base with random weights, without a download: the base's own where it is on this machine, else
    the embedded base's. The second value says that it is a stand-in.

    Raises:
        ModelError: the model's vocabulary is smaller than the stand-in's.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True), False
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = load_tokenizer(locate_base(TINY))
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"{base} has a vocabulary of {vocab_size:,} tokens and no tokenizer on this machine; the one that would stand in "
            f"for it has {len(tokenizer):,}.",
            "Name a folder that holds the model's tokenizer.",
        )
    return tokenizer, True


def quantisation(precision: Precision) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, https://arxiv.org/abs/2305.14314, section 3): 4.127 bits a weight."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(precision.compute),
    )


def build_base(
    base: str,
    config: PreTrainedConfig,
    *,
    device: Device,
    precision: Precision,
    weights: str = "pretrained",
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """The base on its device: projections in NF4, all else in the 16-bit compute type, nothing trainable.

    Weights are read from safetensors only. `weights="random"` builds from `config` alone through the same loader, one
    tensor at a time, for benchmarks and tests.

    Raises:
        ModelError: weights that are missing, gated, unreachable, pickled, or quantised in another way.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if weights == "pretrained" and not Path(base).expanduser().is_dir():
        # The catalog's config is for planning; weights are read with the config that lies beside them.
        config = find_config(base, revision=revision or "main", trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = dict(
        config=config, dtype=torch_dtype(precision.compute), device_map={"": device.torch_name},
        attn_implementation=attention, quantization_config=quantisation(precision),
    )
    prequantised = getattr(config, "quantization_config", None)
    if prequantised is not None:
        refuse_other_quantisation(base, prequantised)
        settings.pop("quantization_config")
    try:
        if weights == "random":
            skeleton = plain_skeleton(config, precision)
            model = type(skeleton).from_pretrained(None, state_dict=random_weights(skeleton, precision, seed), **settings)
            model.name_or_path = base  # what the adapter's config names as its base
        else:
            refuse_unsafe_files(base, revision=revision)
            model, loading = AutoModelForCausalLM.from_pretrained(
                base, revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True,
                key_mapping=TEXT_PART_KEYS, output_loading_info=True, **settings,
            )
            refuse_missing(base, loading)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise explain(error, base, "weights") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if device.kind == "cpu":
        _give_own_storage(model)
    _compat.use_plain_cpu_kernels(model)
    model.config.use_cache = False  # the cache is for generation, which asks for it itself
    return model


def fingerprint_base(
    model: torch.nn.Module, walk: Callable[[], Iterable[Any]] = lambda: (None,), let_go: Callable[[], None] = lambda: None
) -> str:
    """A digest over every frozen number of the model, quantisation state included: equal before and after training, and however
    its layers are placed.

    Sums of the bytes, taken as integers and weighted by position modulo 2**64, are made on the device, in chunks of
    16 MiB, so that the check needs no copy of the base.

    Args:
        walk: goes through moments at which some of the layers have their weights, until each has had them; at the others they are
            empty. By default all are there.
        let_go: called after each chunk: gives back the memory of what was read of a mapped file.
    """
    import hashlib

    sums: dict[str, int] = {}
    for _ in walk():
        for name, tensor in _frozen_tensors(model):
            if name not in sums and tensor.numel():
                sums[name] = _weighted_sum(tensor, let_go)
    return hashlib.sha256("".join(f"{name}:{total}" for name, total in sorted(sums.items())).encode()).hexdigest()


# --- details -----------------------------------------------------------------------------------------------------------


def _frozen_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            continue
        found.append((name, parameter.data))
        state = getattr(parameter, "quant_state", None)
        if state is not None and parameter.numel():
            # The scales live beside the parameter, not in it; a changed scale is a changed weight.
            parts = state.as_dict(packed=True)
            found += [(f"{name}.{key}", value) for key, value in parts.items() if hasattr(value, "data_ptr")]
    return found


def _weighted_sum(tensor: torch.Tensor, let_go: Callable[[], None]) -> int:
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = 0
    for start in range(0, raw.numel(), 2**24):
        chunk = raw[start : start + 2**24]
        if chunk.numel() % 8:
            chunk = torch.nn.functional.pad(chunk, (0, 8 - chunk.numel() % 8))
        words = chunk.view(torch.int64)
        # Odd weights are invertible modulo 2**64: no single changed word can leave the sum as it was.
        weights = torch.arange(start, start + words.numel(), device=words.device, dtype=torch.int64) * 2 + 1
        total = (total * 31 + int((words * weights).sum())) % 2**64
        let_go()
    return total


def refuse_missing(base: str, loading: dict[str, Any]) -> None:
    """The loader gives a weight that it does not find a random start; a base with such weights is no base."""
    missing = sorted(loading.get("missing_keys") or ())
    mismatched = sorted(str(key) for key in loading.get("mismatched_keys") or ())
    if missing or mismatched:
        raise ModelError(
            f"{base} lacks {len(missing)} of the weights that its config asks for, first {missing[0]}." if missing
            else f"{base} has {len(mismatched)} weights of another shape than its config says, first {mismatched[0]}.",
            "Download or save the model again; config.json and the weights must be of the same model.",
        )


def _give_own_storage(model: PreTrainedModel) -> None:
    """On a CPU, weights that keep the type that they have in the file are views of it, and keep all of it mapped; random ones
    are views of one buffer of noise."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def plain_skeleton(config: PreTrainedConfig, precision: Precision) -> PreTrainedModel:
    """The model in 16 bits on meta, tensors as a checkpoint holds them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch_dtype(precision.compute))


def random_weights(skeleton: PreTrainedModel, precision: Precision, seed: int) -> dict[str, torch.Tensor]:
    """A state dict of matrices that takes 8 MiB however large the model is: each is a view into one buffer of noise.

    Rows of a matrix larger than the buffer overlap, shifted; that is random enough for timing and memory. Norms are
    left out, and the loader gives them their usual start. Biases are zero: it leaves those of 4-bit layers as they were found.
    """
    import torch

    size = 2**22
    std = getattr(skeleton.config, "initializer_range", None) or 0.02
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul_(std).to(torch_dtype(precision.compute))
    weights = {}
    for name, parameter in skeleton.named_parameters():
        if name.endswith(".bias"):
            weights[name] = torch.zeros(parameter.shape, dtype=parameter.dtype)
        if parameter.ndim < 2:
            continue
        columns = parameter.shape[-1]
        rows = parameter.numel() // columns
        if columns > size:
            raise ModelError(f"{name} has rows of {columns:,} numbers; random weights go up to {size:,}.")
        step = max(1, min(columns, (size - columns) // rows))
        strides = [step]
        for extent in reversed(parameter.shape[1:-1]):
            strides.insert(0, strides[0] * extent)
        weights[name] = noise.as_strided(tuple(parameter.shape), (*strides, 1))
    return weights


def refuse_other_quantisation(base: str, found: Any) -> None:
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    four_bit = found.get("load_in_4bit") if isinstance(found, dict) else getattr(found, "load_in_4bit", False)
    if str(getattr(method, "value", method)) != "bitsandbytes" or not four_bit:
        raise ModelError(
            f"{base} is already quantised ({method}); adapters are trained on a 16-bit model that is quantised to NF4 here, "
            "or on one that bitsandbytes stored in 4 bits.",
            "Name the original 16-bit model as model.base.",
        )


def explain(error: Exception, base: str, what: str) -> ModelError:
    """One sentence for the ways in which a model cannot be had."""
    text = str(error)
    local = Path(base).expanduser()
    if local.is_dir():
        return ModelError(f"The {what} in {base} cannot be loaded: {_first_line(text)}",
                          "The folder needs config.json, *.safetensors and the tokenizer's files.")
    lowered = text.lower()
    if "gated" in lowered or "401" in text or "403" in text:
        return ModelError(f"{base} is gated or private on the Hub.",
                          f"Accept its licence at https://huggingface.co/{base}, then run `hf auth login`.")
    if "offline" in lowered or "connect" in lowered or "resolve" in lowered or "couldn't reach" in lowered:
        return ModelError(f"{base}: its {what} cannot be found on this machine, and the Hub cannot be reached.",
                          "Connect once, or name a folder that holds the model.")
    if what == "weights" and "cannot be loaded with `safetensors`" in text:
        return pickled(base)
    if "trust_remote_code" in text:
        return ModelError(f"{base} comes with Python code of its own, which is not run by default.",
                          "Read that code; if you trust it, set model.trust_remote_code: true.")
    return ModelError(f"The {what} of {base} cannot be loaded: {_first_line(text)}",
                      "Check model.base; it is a Hub id, a folder, or builtin:tiny.")


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given."
