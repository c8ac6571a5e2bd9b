"""TRL's SFTTrainer on rows that are tokenised already, with three additions: it stops before a step that would spoil the
weights, its validation loss is a mean over tokens, and it counts what it does. The only module that imports trl.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from qlora import _compat
from qlora.errors import DivergedError
from qlora.evaluation import Evaluation
from qlora.hardware import Device, used_memory_bytes
from qlora.precision import Precision, torch_dtype

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

    from qlora.data import TokenRow

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# fp16 loss scaling finds its scale by overflowing a few times; this many in a row is something else.
_MAX_SKIPPED_STEPS = 20


def as_dataset(rows: Sequence[TokenRow], *, pack_to: int | None = None) -> Dataset:
    """The columns that TRL's collator reads: input_ids and labels, one row each, or rows packed to `pack_to` tokens.

    Packing is best-fit decreasing; the boundaries are kept in `seq_lengths`, and the collator turns them into positions
    that start at 0 for each row, which is what keeps attention from crossing them.
    """
    dataset = Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )
    return dataset if pack_to is None else pack_dataset(dataset, seq_length=pack_to, strategy="bfd")


@dataclass
class Step:
    """Counters of the optimizer step under way; made anew at each step's begin."""

    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    trained_tokens: int = 0
    micro_batches: int = 0


class AdapterTrainer(SFTTrainer):
    """SFTTrainer that raises DivergedError before a non-finite loss or gradient reaches the weights.

    Args:
        on_row: called with one dict for each line of metrics.jsonl (training steps and evaluations).
        device: where the run happens; read for the memory column.
    """

    def __init__(self, *args: Any, on_row: Callable[[dict[str, Any]], None], device: Device, **kwargs: Any):
        self.step = Step()
        self._skipped_steps = 0
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_RowWriter(self, on_row, device))

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss, counted, and refused if it is not finite. Shapes of inputs: (rows, tokens)."""
        labels, ids = inputs["labels"], inputs["input_ids"]
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.step.micro_batches += 1
            mask = inputs.get("attention_mask")
            self.step.tokens += ids.numel() if mask is None else int(mask.sum())
            self.step.trained_tokens += int((labels[:, 1:] != -100).sum())
            value = loss[0] if return_outputs else loss
            if not torch.isfinite(value):
                raise DivergedError(
                    f"The loss became {value.item()} {self._where(ids)}. {self._suspects()}", self._advice()
                )
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forward and backward; the gradient so far is checked before anything uses it."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None and not self._gradient_is_finite():
            bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise DivergedError(
                f"The gradient became non-finite {self._where(None)}, in {len(bad)} adapter weights, "
                f"first {_short(bad[0])}.", self._advice(),
            )
        return loss

    def count_skipped_step(self) -> None:
        """fp16 only: the loss scaler skips steps whose gradient overflowed, which is normal a few times.

        Raises:
            DivergedError: it has been skipping for too long to be looking for a scale.
        """
        if self.accelerator.scaler is None:
            return
        self._skipped_steps = 0 if self._gradient_is_finite() else self._skipped_steps + 1
        if self._skipped_steps > _MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"The fp16 gradient overflowed in {self._skipped_steps} steps in a row, up to {self._where(None)}.",
                self._advice(),
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss over the held-out rows as a mean over tokens. Reported like the trainer's own evaluation."""
        found = self.measure(eval_dataset)
        metrics = {
            f"{metric_key_prefix}_loss": found.loss,
            f"{metric_key_prefix}_perplexity": found.perplexity,
            f"{metric_key_prefix}_tokens": found.num_tokens,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(
        self, dataset: Dataset | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Summed loss over summed tokens, through the same fused head as training, so no logits are stored."""
        loader = self.get_eval_dataloader(dataset)
        total, num_tokens = 0.0, 0
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for done, inputs in enumerate(loader, 1):
                num_tokens += int((inputs["labels"][:, 1:] != -100).sum())
                # With a count of one the "mean" is the sum over the batch's tokens.
                one = torch.ones((), device=inputs["labels"].device)
                total += self.compute_loss(self.model, dict(inputs), num_items_in_batch=one).item()
                if progress:
                    progress(done, len(loader))
        self.model.train(was_training)
        return Evaluation(loss=total / max(1, num_tokens), num_tokens=num_tokens)

    def _gradient_is_finite(self) -> bool:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    def _where(self, ids: torch.Tensor | None) -> str:
        shape = f" ({ids.shape[0]} x {ids.shape[1]} tokens)" if ids is not None else ""
        return f"in step {self.state.global_step + 1} of {self.state.max_steps}, micro-batch {self.step.micro_batches}{shape}"

    def _suspects(self) -> str:
        bad = [n for n, p in self.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if bad:
            return f"{len(bad)} adapter weights are not finite either, first {_short(bad[0])}."
        return "All adapter weights are finite: the overflow happened on the way through the model."

    def _advice(self) -> str:
        rate = self.args.learning_rate
        return f"Lower train.learning_rate (now {rate:g}; try {rate / 3:.1g}) or raise train.warmup, and run again."


class _RowWriter(TrainerCallback):
    """Turns the trainer's events into the lines of metrics.jsonl."""

    def __init__(self, trainer: AdapterTrainer, on_row: Callable[[dict[str, Any]], None], device: Device):
        self.trainer, self.on_row, self.device = trainer, on_row, device
        self.began = time.perf_counter()
        self.last_step_seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.step = Step()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.count_skipped_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.last_step_seconds = time.perf_counter() - self.trainer.step.started
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True  # so that the last step can be the best one

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: Mapping[str, float] | None = None, **_: Any,
    ) -> None:
        logs = logs or {}
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            step = self.trainer.step
            row.update(
                loss=logs["loss"], grad_norm=logs.get("grad_norm"), learning_rate=logs.get("learning_rate"),
                token_accuracy=logs.get("mean_token_accuracy"), tokens=step.tokens, trained_tokens=step.trained_tokens,
                tokens_per_second=round(step.tokens / max(1e-9, self.last_step_seconds), 1),
                seconds=round(time.perf_counter() - self.began, 3), memory_bytes=used_memory_bytes(self.device),
            )
        elif "eval_loss" in logs:
            row.update({key: logs[key] for key in ("eval_loss", "eval_perplexity", "eval_tokens")})
        else:
            return
        self.on_row(row)


def build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    precision: Precision,
    device: Device,
    num_steps: int,
    on_row: Callable[[dict[str, Any]], None],
    callbacks: Sequence[TrainerCallback] = (),
) -> AdapterTrainer:
    """A trainer that is ready to evaluate and to train.

    Args:
        folder: where checkpoints go.
        settings: decided values by dotted name, as in `Plan.settings`.
    """
    every = {"eval": settings["train.eval_every"] if validation is not None else 0, "save": settings["train.save_every"]}
    keep_best = settings["train.keep"] == "best" and every["eval"] > 0 and every["save"] > 0
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings["train.micro_batch"],
        per_device_eval_batch_size=settings["train.micro_batch"],
        gradient_accumulation_steps=settings["train.accumulation"],
        num_train_epochs=settings["train.epochs"],
        max_steps=settings["train.max_steps"] or -1,
        learning_rate=settings["train.learning_rate"],
        lr_scheduler_type=_SCHEDULES[settings["train.schedule"]],
        warmup_steps=round(settings["train.warmup"] * num_steps),
        weight_decay=settings["train.weight_decay"],
        max_grad_norm=settings["train.max_grad_norm"],
        optim=_OPTIMIZERS[settings["train.optimizer"]],
        seed=settings["train.seed"],
        data_seed=settings["train.seed"],
        bf16=precision.autocast and precision.compute == "bf16",
        fp16=precision.autocast and precision.compute == "fp16",
        gradient_checkpointing=bool(settings["memory.checkpointing"]),
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings["memory.checkpointing"] else None,
        use_cpu=device.kind == "cpu",
        dataloader_pin_memory=device.kind == "cuda",
        eval_strategy="steps" if every["eval"] else "no",
        eval_steps=every["eval"] or None,
        save_strategy="steps" if every["save"] else "no",
        save_steps=every["save"] or 500,
        save_total_limit=2,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if every["eval"] else None,
        greater_is_better=False if every["eval"] else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter logs a NaN loss as 0.0
        report_to=list(settings["train.report_to"]),
        disable_tqdm=True,
        push_to_hub=False,  # the trainer's background push can fail without a word
        router_aux_loss_coef=0.0,  # routers are frozen: there is nothing that this loss could balance
        max_length=None,  # rows are cut already
        packing=False,
        padding_free=bool(settings["data.packing"]),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = AdapterTrainer(
        model=model, args=config, train_dataset=train, eval_dataset=validation, processing_class=tokenizer,
        callbacks=list(callbacks), on_row=on_row, device=device,
    )
    _compat.restore_adapter_dtype(trainer.model, torch_dtype(precision.adapters))
    return trainer


def _short(name: str) -> str:
    """A parameter's name without the wrappers that PEFT puts around every one."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")
