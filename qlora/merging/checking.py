"""Hold a merged model that lies on the disk against its base with the adapter beside it: the same prompts, in fp32, by PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora.catalog.lookup import find_config
from qlora.engine.weights import SafetensorsWeights
from qlora.errors import ModelError, NeedsLoaderError
from qlora.merging.base import Change
from qlora.merging.shards import as_bytes, read_list, read_bytes, read_rows
from qlora.merging.streamed import Read, build_streamed
from qlora.merging.writing import merged_rows, nf4_values
from qlora.model import build
from qlora.units import GIB

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

# A model whose weights take more than this in fp32 is not loaded whole, so that a merge takes little memory for any model.
LOADED_BYTES = GIB
_ROWS, _TOKENS = 4, 32
_PROMPTS = (
    "Write one sentence about the sea.", "What is 17 plus 25? Answer with the number alone.",
    "Translate into French: the red house", "List three animals that can fly.", "def fibonacci(n):", "Name the capital of Italy.",
    "Once upon a time there was a little girl who", "Explain in two sentences why the sky is blue.",
)

# What a merge may differ by. In fp32 it is rounding of sums alone: largest difference of logits, as a share of the largest logit
# (of 1 at least). In 16 bits the weights themselves are rounded, to 8 or 11 binary places: mean KL divergence in nats a token.
# Measured in bf16: 4e-6 on the embedded base, 7e-5 on a Llama of 1.0B with random weights; without the adapter 2.1 and 0.05.
MAX_SHARE_FP32 = 1e-4
MAX_KL_16BIT = 0.002


@dataclass(frozen=True)
class Comparison:
    """Merged against base with adapter.

    Attributes:
        how: "loaded" by Transformers whole; "streamed" through its model, module by module; "tensors" alone, without running it.
        num_positions: tokens of prompts after which the logits are compared; tensors, where only those are.
        max_difference: the largest of |logit difference|; of tensors, in units of what rounding may be.
        largest_logit: for scale.
        kl: mean KL(adapter || merged) in nats; `kl_of_adapter` is KL(adapter || base), what the adapter does on these prompts.
        top1: share of positions with the same likeliest token.
        exact: whether the merged weights are in fp32.
    """

    how: str
    num_positions: int
    max_difference: float
    largest_logit: float = 0.0
    kl: float = 0.0
    kl_of_adapter: float = 0.0
    top1: float = 1.0
    exact: bool = False

    @property
    def limit(self) -> str:
        """What was allowed, in words."""
        if self.how == "tensors":
            return "each number within its rounding"
        return f"|logit difference| up to {self._most:.1e}" if self.exact else f"KL up to {MAX_KL_16BIT} nats"

    @property
    def passes(self) -> bool:
        if self.how == "tensors":
            return self.max_difference <= 1
        return self.max_difference <= self._most if self.exact else self.kl <= MAX_KL_16BIT

    @property
    def _most(self) -> float:
        return MAX_SHARE_FP32 * max(1.0, self.largest_logit)


def compare(
    folder: Path, base: Path, adapter: Path, changes: Sequence[Change], *, trained: str, loaded_bytes: int,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Run both on a few prompts.

    Args:
        folder: the merged model. base: its base's folder. adapter: the adapter's.
        trained: the type in which the base was quantised for training.
        loaded_bytes: a model that takes more in fp32 is streamed.

    Raises:
        ModelError: the merged model cannot be loaded.
    """
    config, merged_config = find_config(str(base)), find_config(str(folder))
    loads = 4 * sum(change.stored.num_numbers for change in changes) <= loaded_bytes
    into_nf4 = any(change.nf4 for change in changes)
    ids = _token_ids(folder, config.vocab_size)
    try:
        # Transformers would quantise to NF4 from fp32; here as in training, from the type that it had.
        loads_base = loads and not into_nf4
        reference = _loaded(base, config) if loads_base else _streamed(base, config, changes, trained)
        progress(1, 4)
        with_adapter, without = _both(reference, adapter, ids)
        del reference
        progress(3, 4)
        merged = _logits(_loaded(folder, merged_config) if loads else _streamed(folder, merged_config, (), trained), ids)
        progress(4, 4)
    except NeedsLoaderError:
        return compare_tensors(folder, changes, trained)
    exact = all(change.outline.dtype in ("F32", "F64") for change in changes if not change.is_copy)
    return _figures(with_adapter, without, merged, "loaded" if loads else "streamed", exact)


def compare_tensors(folder: Path, changes: Sequence[Change], trained: str) -> Comparison:
    """Read the written files back: unchanged tensors have the base's bytes, changed ones the sum, rounded once."""
    written = {stored.name: stored for path in folder.glob("*.safetensors") for stored in read_list(path)}
    worst = 0.0
    for change in changes:
        stored = written.get(change.outline.name)
        if stored is None:
            return Comparison("tensors", len(changes), float("inf"))
        if change.is_copy:
            same = all(one == two for one, two in zip(read_bytes(change.stored), read_bytes(stored), strict=True))
            worst = max(worst, 0.0 if same else float("inf"))
            continue
        first = 0
        for rows in merged_rows(change, trained):
            found = read_rows(stored, first, len(rows) if rows.ndim else None)
            first += len(rows) if rows.ndim else 0
            ulp = torch.finfo(found.dtype).eps * rows.abs().clamp_min(torch.finfo(found.dtype).smallest_normal)
            worst = max(worst, float(((found.to(rows.dtype) - rows).abs() / ulp).max()))
    return Comparison("tensors", len(changes), worst)


def peak_bytes(changes: Sequence[Change], adapter_bytes: int, vocab_size: int, loaded_bytes: int) -> int:
    """Host memory that a comparison takes at most, beside the libraries."""
    whole = 4 * sum(change.stored.num_numbers for change in changes)
    largest = max(change.stored.num_numbers for change in changes)
    logits = 6 * 4 * _ROWS * _TOKENS * vocab_size
    nf4 = any(change.nf4 for change in changes)
    streamed = 4 * largest + (12 * max((c.stored.num_numbers for c in changes if c.nf4), default=0) if nf4 else 0)
    return max(whole if whole <= loaded_bytes else 0, streamed) + 2 * adapter_bytes + logits


# --- details -----------------------------------------------------------------------------------------------------------


def _token_ids(folder: Path, vocab_size: int) -> torch.Tensor:
    """Token ids of shape (rows, tokens): prompts in the model's own form, one after another, cut into rows."""
    found: list[int] = []
    try:
        tokenizer = build.load_tokenizer(str(folder))
    except ModelError:  # no tokenizer anywhere: any tokens do
        return torch.randint(0, vocab_size, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    while len(found) < _ROWS * _TOKENS:
        before = len(found)
        for prompt in _PROMPTS:
            found += _encode(tokenizer, prompt)
        if len(found) == before:
            found += list(range(_ROWS * _TOKENS))
    return (torch.tensor(found[: _ROWS * _TOKENS]) % vocab_size).reshape(_ROWS, _TOKENS)


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        try:
            message = {"role": "user", "content": prompt}
            prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse a lone question in any way it likes; the prompt as it is does as well
            pass
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def _loaded(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """By Transformers, as anybody loads it, in fp32.

    Raises:
        ModelError: it cannot.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, dtype=torch.float32, use_safetensors=True, key_mapping=build.TEXT_PART_KEYS,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise build.explain(error, str(folder), "weights") from error
    build.refuse_missing(str(folder), loading)
    return model.requires_grad_(False).eval()


def _streamed(folder: Path, config: PreTrainedConfig, changes: Sequence[Change], trained: str) -> PreTrainedModel:
    """Module by module; what `changes` puts into NF4 as NF4 leaves it."""
    in_nf4 = {f"{change.module}.weight": change.transposed for change in changes if change.nf4}

    def open_weights(skeleton: PreTrainedModel) -> Read:
        weights = SafetensorsWeights(str(folder))
        weights.open(skeleton)

        def read(name: str) -> torch.Tensor | None:
            found = weights.tensor(name)
            return nf4_values(found, in_nf4[name], trained) if name in in_nf4 else found

        return read

    return build_streamed(config, open_weights)


def _both(model: PreTrainedModel, adapter: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with the adapter beside the base, and of the base alone."""
    from peft import PeftModel

    adapted: PeftModel = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu", low_cpu_mem_usage=True)
    adapted.eval()
    with adapted.disable_adapter():
        without = _logits(adapted, ids)
    return _logits(adapted, ids), without


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of shape (rows, tokens, vocabulary), in fp32."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def _figures(with_adapter: torch.Tensor, without: torch.Tensor, merged: torch.Tensor, how: str, exact: bool) -> Comparison:
    wanted = with_adapter.log_softmax(-1)

    def divergence(logits: torch.Tensor) -> float:
        return float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean().clamp_min(0))

    difference = float((with_adapter - merged).abs().max())
    return Comparison(
        how, with_adapter.shape[0] * with_adapter.shape[1], difference if difference == difference else float("inf"),
        float(with_adapter.abs().max()), divergence(merged), divergence(without),
        float((with_adapter.argmax(-1) == merged.argmax(-1)).float().mean()), exact,
    )
