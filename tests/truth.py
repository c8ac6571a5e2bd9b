"""The truth about memory on a CPU: our own path, run for real under torch's profiler, and what its allocator took.

The profiler runs from before the model is built to the end, so that every allocation of the run is counted and nothing has
to be added that "was there before". Allocations are those of torch's CPU allocator: every tensor, and every buffer that a
kernel takes from it on the thread that called it; what other threads take for themselves the profiler does not see. Buffers
that a library takes by malloc (MKL's, for one) are neither here nor in a plan.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from qlora import _compat
from qlora.architecture import describe, select_targets
from qlora.hardware import Device
from qlora.model.adapt import add_adapters
from qlora.model.build import build_base
from qlora.model.exact import make_exact
from qlora.precision import Precision, torch_dtype
from qlora.training.cpu_memory import TensorMeter

CPU = Device("cpu", "this CPU", 2**35, 2**35, 2**35, 2**35, torch.get_num_threads(), True)
PRECISIONS = {
    "bf16": Precision("bf16", "bf16", False, "a test"),
    "fp32": Precision("fp32", "fp32", False, "a test"),
}
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Cell:
    """One real run: a small model, and what the memory of its steps depends on."""

    model: str
    r: int = 16
    micro_batch: int = 1
    accumulation: int = 1
    length: int = 256
    checkpointing: bool = True
    optimizer: str = "adamw"
    compute: str = "bf16"
    attention: str = "sdpa"
    ragged: bool = False
    packed: bool = False
    threads: int = 1
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """What differs from the defaults, for a test's name."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name not in ("model", "sizes")
                   and getattr(self, f.name) != f.default]
        return "-".join([self.model, *changed, *(["other sizes"] if self.sizes else [])])

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.compute]

    def settings(self) -> dict[str, Any]:
        """As `Plan.settings`, for `build_trainer`."""
        return {
            "train.eval_every": 0, "train.save_every": 0, "train.keep": "last", "train.micro_batch": self.micro_batch,
            "train.accumulation": self.accumulation, "train.epochs": 1, "train.max_steps": 2, "train.learning_rate": 1e-4,
            "train.schedule": "constant", "train.warmup": 0, "train.weight_decay": 0.0, "train.max_grad_norm": 1.0,
            "train.optimizer": self.optimizer, "train.seed": 0, "memory.checkpointing": self.checkpointing,
            "train.report_to": [], "data.packing": self.packed, "lora.r": self.r, "lora.alpha": self.r, "lora.dropout": 0.0,
            "model.attention": self.attention,
        }


# Two layers and more, and widths at which a step takes tens of megabytes, so that trifles of kilobytes do not decide.
_SIZES = {
    "llama": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=3, num_attention_heads=8,
                  num_key_value_heads=4, vocab_size=4096, max_position_embeddings=2048),
    "qwen3": dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=3, num_attention_heads=6,
                  num_key_value_heads=2, head_dim=64, vocab_size=6144, max_position_embeddings=2048,
                  tie_word_embeddings=True),
    "gemma2": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=64, vocab_size=4096, max_position_embeddings=2048, sliding_window=128,
                   query_pre_attn_scalar=64),
    "gpt2": dict(n_embd=384, n_layer=3, n_head=6, vocab_size=4096, n_positions=2048),
    "phi3": dict(hidden_size=320, intermediate_size=896, num_hidden_layers=2, num_attention_heads=5,
                 num_key_value_heads=5, vocab_size=3200, max_position_embeddings=2048,
                 original_max_position_embeddings=2048, pad_token_id=0),
}


def small_config(cell: Cell) -> Any:
    """The config of a cell's model."""
    from transformers import AutoConfig

    sizes = {**_SIZES[cell.model], "bos_token_id": 1, "eos_token_id": 2, **dict(cell.sizes)}
    return AutoConfig.for_model(cell.model, **sizes)


def stand_in_tokenizer() -> Any:
    """What the trainer asks of a tokenizer: a padding token. Nothing is tokenised here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def rows(cell: Cell, num_rows: int) -> list[Any]:
    """Tokenised rows of the cell's length, all trained; every second one is half as long where they are ragged.

    Where they are packed, two of half the length for each of one.
    """
    lengths = [cell.length // 2 if cell.ragged and i % 2 else cell.length for i in range(num_rows)]
    if cell.packed:
        lengths = [cell.length // 2] * (2 * num_rows)
    return [types.SimpleNamespace(input_ids=[3 + (7 * i + j) % 200 for j in range(n)],
                                  labels=[3 + (7 * i + j) % 200 for j in range(n)]) for i, n in enumerate(lengths)]


@dataclass
class Truth(TensorMeter):
    """A meter of one run, with the losses that the run came by."""

    losses: list[float] = field(default_factory=list)

    @property
    def peaks(self) -> dict[str, int]:
        """The highest in each phase."""
        return self.allocated


def save_base(config: Any, folder: Path) -> None:
    """An untrained model on disk, in bf16, as those on the Hub are."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def measure(cell: Cell, folder: Path, *, after: tuple[str, ...] = ()) -> Truth:
    """Build, adapt and train two optimizer steps; then, if asked, evaluate ("eval") and answer ("generate").

    Phases: load (base and adapters), prepare (the trainer), train, and those of `after`.
    """
    from qlora.generation import answer, rows_at_once
    from qlora.training.trainer import as_dataset, build_trainer

    _compat.quieten_libraries()
    config, settings, precision = small_config(cell), cell.settings(), cell.precision
    selection, tokenizer = select_targets(describe(config)), stand_in_tokenizer()
    data = as_dataset(rows(cell, 2 * cell.micro_batch * cell.accumulation), pack_to=cell.length if cell.packed else None)
    truth, metrics = Truth(), []
    save_base(config, folder / "base")
    with truth.watching():
        with truth.during("load"):
            base = build_base(str(folder / "base"), config, device=CPU, precision=precision, attention=cell.attention)
            model = add_adapters(base, selection, r=cell.r, alpha=cell.r, seed=0, dtype=torch_dtype(precision.adapters))
            del base
            if cell.compute == "fp32":
                make_exact(model)
        with truth.during("prepare"):
            trainer = build_trainer(
                model, tokenizer, data, None, folder=folder, settings=settings, precision=precision, device=CPU,
                num_steps=2, on_row=metrics.append,
            )
        with truth.during("train"):
            trainer.train()
        if "eval" in after:
            with truth.during("eval"):
                trainer.measure(data)
        if "generate" in after:
            prompts = [row.input_ids for row in rows(cell, rows_at_once(cell.length, ANSWER_TOKENS))]
            with truth.during("generate"):
                answer(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, stop_ids=[])
        del trainer, model
    truth.losses = [row["loss"] for row in metrics if "loss" in row]
    return truth
