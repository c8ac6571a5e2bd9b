"""Rows that somebody measured on a Tesla T4, run through the planner's simulator.

The rows are ../shared/facts/t4-measurements.json, published with fitcheck-llm 0.3.1 on PyPI (MIT). One row is what that
package's scripts/measure.py does, in its order: load (4-bit rows through transformers' loader, the others on the CPU and
then moved), peft.prepare_model_for_kbit_training for 4-bit rows, get_peft_model, one optimizer step to warm up, one that
counts. Measured were torch 2.14, transformers 5.17 and peft 0.20; simulated are the installed ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora import _compat
from qlora.catalog import find_id
from qlora.catalog.lookup import find_config
from qlora.model.meta import build_base_on_meta, give_nf4_weight
from qlora.planning.allocator import EMPTY_CACHE, Replay, replay
from qlora.planning.kernels import cublas_workspace_bytes, cuda_functions, cuda_temporaries
from qlora.planning.loading import record_loading
from qlora.planning.trace import Event, Recorder
from qlora.precision import Precision

T4 = (7, 5)
MIB = 2**20
T4_BYTES = 14912 * MIB  # its memory as CUDA reports it: the archive's manifest.json, total_mib
WARM_UP, STEP = "warm-up", "train"


@dataclass(frozen=True)
class Row:
    """What was run; rows that repeat a measurement are equal. `shape` is the published `model_config`."""

    model: str
    shape: tuple[tuple[str, Any], ...]
    attention: str
    four_bit: bool
    double_quant: bool
    micro_batch: int
    length: int
    r: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """One row: measured and simulated bytes."""

    row: Row
    measured_allocated: int
    measured_reserved: int
    allocated: int
    reserved: int

    @property
    def allocated_error(self) -> float:
        """As a fraction of what was measured; negative is too little."""
        return self.allocated / self.measured_allocated - 1

    @property
    def reserved_error(self) -> float:
        """The same for what the allocator held."""
        return self.reserved / self.measured_reserved - 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file as published: the shared one, or one of the package's data/measurements."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["rows"] if "rows" in document else document["runs"]


def as_row(published: dict[str, Any]) -> Row:
    """The settings of a published row."""
    run = published["run"]
    assert (run["optimizer"], run["precision"], run["grad_checkpoint"]) == ("adamw", "fp16", True)
    shape = tuple(sorted(published.get("model_config", {}).items()))
    return Row(published["model_id"], shape, run["attn_impl"], run["quantization"] == "nf4", run["double_quant"],
               run["batch_size"], run["seq_len"], run["lora_rank"], tuple(run["lora_targets"]))


def score(published: dict[str, Any]) -> Score:
    """A published row beside what the simulator makes of it."""
    measured, simulated = published["measured"], simulate(as_row(published))
    return Score(as_row(published), round(measured["peak_allocated_mib"] * MIB), round(measured["peak_reserved_mib"] * MIB),
                 simulated.allocated_by_phase[STEP], simulated.peak_reserved_bytes)


@functools.cache
def simulate(row: Row) -> Replay:
    """Peak allocated is that of phase `STEP`, as measured; what is reserved stays reserved."""
    return replay(trace(row))


def trace(row: Row) -> list[Event]:
    """Everything that the row's program allocates, in its order."""
    recorder = Recorder("meta", cuda_temporaries(T4))
    functions = cuda_functions(T4)
    functions["scaled_dot_product_attention"] = _expand_groups(functions["scaled_dot_product_attention"])
    with _compat.pretend_device(functions, triton=True):
        base = _load(row, recorder)
        with recorder:
            model = _adapt(row, base, recorder)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
            batch = torch.empty((row.micro_batch, row.length), dtype=torch.long, device="meta")
            for phase in (WARM_UP, STEP):
                recorder.switch(phase)
                _step(model, optimizer, batch, recorder)
    return recorder.trace()


def _config(row: Row) -> Any:
    """From the catalog, where instruct and coder models share the config of their base; else a Llama of the row's shape."""
    base = row.model.replace("-Instruct", "").replace("-Coder", "")
    if find_id(base) is not None:
        return find_config(base)
    from transformers import LlamaConfig

    shape = dict(row.shape)
    return LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_kv_heads"], head_dim=shape["head_dim"], max_position_embeddings=16384,
        tie_word_embeddings=shape["tie_word_embeddings"],
    )


def _load(row: Row, recorder: Recorder) -> Any:
    config = _config(row)
    precision = Precision("fp16", "fp32", False, "")
    if row.four_bit:
        import bitsandbytes as bnb

        model = build_base_on_meta(config, precision=precision, attention=row.attention)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                give_nf4_weight(module, torch.float16, double_quant=row.double_quant)
        record_loading(recorder, model, device_bytes=T4_BYTES)
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16, attn_implementation=row.attention)
    model.config.use_cache = False
    with recorder.during("load", "base"):
        for tensor in (*model.parameters(), *model.buffers()):
            recorder.track(tensor, "base")
    return model


def _adapt(row: Row, model: Any, recorder: Recorder) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    recorder.switch("load", "adapters")
    if row.four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        recorder.drop(recorder.hold(0, EMPTY_CACHE, "workspace"))  # it does so where there is a GPU
    model = get_peft_model(model, LoraConfig(
        r=row.r, lora_alpha=2 * row.r, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=list(row.targets),
    ))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, recorder: Recorder) -> None:
    first = not optimizer.state
    optimizer.zero_grad(set_to_none=True)
    if first:
        recorder.hold(cublas_workspace_bytes(T4), "cublas workspace", "workspace")
    out = model(input_ids=batch, labels=batch)
    if first:
        recorder.hold(cublas_workspace_bytes(T4), "cublas workspace of autograd's thread", "workspace")
    out.loss.backward()
    optimizer.step()


def _expand_groups(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The measuring script expands grouped keys before the memory-efficient kernel, which would refuse them."""

    def expanded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        groups = query.shape[-3] // key.shape[-3]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
            kwargs.pop("enable_gqa", None)
        return attention(query, key, value, *args, **kwargs)

    return expanded
