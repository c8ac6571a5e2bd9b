"""Hold a merged model that lies on the disk against its base with the adapter beside it: the same prompts, in fp32, by PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
class Agreement:
    """Of two models, after the same tokens.

    Attributes:
        kl, max_kl: mean and largest KL divergence of the second's next token from the first's, in nats.
        top1: share of positions with the same likeliest token.
        max_difference: the largest of |logit difference|; infinite where a number is none.
    """

    kl: float
    max_kl: float
    top1: float
    max_difference: float

    def words(self) -> str:
        return f"KL {self.kl:.2g} nats, {self.max_kl:.2g} at most, top-1 agreement {self.top1:.1%}"


def agree(first: torch.Tensor, second: torch.Tensor) -> Agreement:
    """Args: logits of shape (rows, tokens, vocabulary), in fp32."""
    wanted = first.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - second.log_softmax(-1))).sum(-1).clamp_min(0)
    difference = float((first - second).abs().max())
    if difference != difference or not bool(torch.isfinite(divergence).all()):
        return Agreement(float("inf"), float("inf"), 0.0, float("inf"))
    same = (first.argmax(-1) == second.argmax(-1)).float().mean()
    return Agreement(float(divergence.mean()), float(divergence.max()), float(same), difference)


@dataclass(frozen=True)
class Comparison:
    """Merged against base with adapter.

    Attributes:
        how: "loaded" by Transformers whole; "streamed" through its model, module by module; "tensors" alone, without running it.
        num_positions: tokens of prompts after which the logits are compared; tensors, where only those are.
        max_difference: the largest of |logit difference|; of tensors, in units of what rounding may be.
        largest_logit: for scale.
        kl, max_kl: mean and largest KL(adapter || merged) in nats; `kl_of_adapter` is the mean KL(adapter || base), what the
            adapter does on these prompts.
        top1: share of positions with the same likeliest token.
        exact: whether the merged weights are in fp32.
        trained: of the merged model with what was trained, adapter and 4-bit base; None where the base is that one.
    """

    how: str
    num_positions: int
    max_difference: float
    largest_logit: float = 0.0
    kl: float = 0.0
    kl_of_adapter: float = 0.0
    max_kl: float = 0.0
    top1: float = 1.0
    exact: bool = False
    trained: Agreement | None = None

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
    folder: Path, base: Path, adapter: Path, changes: Sequence[Change], *, nf4: Mapping[str, bool], trained: str,
    loaded_bytes: int, progress: Callable[[int, int], None],
) -> Comparison:
    """Run both on a few prompts.

    Args:
        folder: the merged model. base: its base's folder. adapter: the adapter's.
        nf4: of `nf4_weights`.
        trained: the type in which the base was quantised for training.
        loaded_bytes: a model that takes more in fp32 is streamed.

    Raises:
        ModelError: the merged model cannot be loaded.
    """
    config, merged_config = find_config(str(base)), find_config(str(folder))
    loads = 4 * sum(change.stored.num_numbers for change in changes) <= loaded_bytes
    into_nf4 = any(change.nf4 for change in changes)
    ids = token_ids(folder, config.vocab_size)
    try:
        # Transformers would quantise to NF4 from fp32; here as in training, from the type that it had.
        loads_base = loads and not into_nf4
        reference = load_plain(base, config) if loads_base else stream(base, config, nf4 if into_nf4 else {}, trained)
        progress(1, 5)
        with_adapter, without = run_both(reference, adapter, ids)
        del reference
        progress(3, 5)
        merged = run(load_plain(folder, merged_config) if loads else stream(folder, merged_config, {}, trained), ids)
        progress(4, 5)
        as_trained = None
        if not into_nf4 and nf4:
            as_trained = agree(run_both(stream(base, config, nf4, trained), adapter, ids, alone=False)[0], merged)
        progress(5, 5)
    except NeedsLoaderError:
        return compare_tensors(folder, changes, trained)
    exact = all(change.outline.dtype in ("F32", "F64") for change in changes if not change.is_copy)
    found = agree(with_adapter, merged)
    return Comparison(
        "loaded" if loads else "streamed", ids.numel(), found.max_difference, float(with_adapter.abs().max()), found.kl,
        agree(with_adapter, without).kl, found.max_kl, found.top1, exact, as_trained,
    )


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


def peak_bytes(
    changes: Sequence[Change], nf4: Mapping[str, bool], adapter_bytes: int, vocab_size: int, loaded_bytes: int
) -> int:
    """Host memory that a comparison takes at most, beside the libraries."""
    whole = 4 * sum(change.stored.num_numbers for change in changes)
    largest = max(change.stored.num_numbers for change in changes)
    logits = 6 * 4 * _ROWS * _TOKENS * vocab_size
    streamed = 4 * largest + 12 * max((c.stored.num_numbers for c in changes if c.name in nf4), default=0)
    return max(whole if whole <= loaded_bytes else 0, streamed) + 2 * adapter_bytes + logits


# --- running -----------------------------------------------------------------------------------------------------------


def token_ids(folder: Path, vocab_size: int) -> torch.Tensor:
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


def load_plain(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
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


def stream(folder: Path, config: PreTrainedConfig, nf4: Mapping[str, bool], trained: str) -> PreTrainedModel:
    """Module by module; the weights in `nf4` as NF4 leaves them."""

    def open_weights(skeleton: PreTrainedModel) -> Read:
        weights = SafetensorsWeights(str(folder))
        weights.open(skeleton)

        def read(name: str) -> torch.Tensor | None:
            found = weights.tensor(name)
            return nf4_values(found, nf4[name], trained) if name in nf4 else found

        return read

    return build_streamed(config, open_weights)


def run_both(
    model: PreTrainedModel, adapter: Path, ids: torch.Tensor, *, alone: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits with the adapter beside the base, and of the base alone where that is wanted."""
    from peft import PeftModel

    adapted: PeftModel = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu", low_cpu_mem_usage=True)
    adapted.eval()
    without = None
    if alone:
        with adapted.disable_adapter():
            without = run(adapted, ids)
    return run(adapted, ids), without


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of shape (rows, tokens, vocabulary), in fp32."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
