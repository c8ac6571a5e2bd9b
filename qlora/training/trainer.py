"""TRL's SFTTrainer on rows that are tokenised already, with four additions: it stops before a step that would spoil the
weights, it goes on in smaller parts when memory runs out, its validation loss is a mean over tokens, and it counts what it does.
The only module that imports trl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from qlora import _compat
from qlora.errors import DivergedError
from qlora.evaluation import Evaluation
from qlora.guidance import calmer
from qlora.hardware import Device
from qlora.precision import Precision, torch_dtype
from qlora.training.advice import words
from qlora.training.recovery import Ladder, is_out_of_memory, release, split_inputs
from qlora.training.row_writer import RowWriter
from qlora.training.saving import set_random_state
from qlora.training.step import Step

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora.data import TokenRow
    from qlora.engine.install import Engine

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_CHECKPOINTING = {"use_reentrant": False}
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


class AdapterTrainer(SFTTrainer):
    """SFTTrainer that raises DivergedError before a non-finite loss or gradient reaches the weights, and that answers a memory
    error by going down its ladder and running the step once more.

    Args:
        on_row: called with one dict for each line of metrics.jsonl (training steps and evaluations).
        device: where the run happens; read for the memory column.
        adapter_dtype: of the trainable weights.
        ladder: what the run may step down to; None in a trainer that is not to be helped.
        tell: told one line whenever something is done in smaller parts.
        look: called before each micro-batch and each batch of evaluation.
        engine: what the memory engine has put into the model; None in a plain run.

    Attributes:
        may_step_down: off where a memory error is answered by the caller.
        fetched: the micro-batches of the step under way, known from its begin on.
    """

    def __init__(
        self, *args: Any, on_row: Callable[[dict[str, Any]], None], device: Device, adapter_dtype: torch.dtype,
        ladder: Ladder | None = None, tell: Callable[[str], None] = lambda line: None,
        look: Callable[[], Any] = lambda: None, engine: Engine | None = None, **kwargs: Any,
    ):
        self.step = Step()
        self.engine = engine
        self.schedule = engine.schedule if engine else None
        self.fetched: list[dict[str, Any]] = []
        self.adapter_dtype = adapter_dtype
        self.ladder, self.tell, self.look = ladder, tell, look
        self.may_step_down = True
        self._skipped_steps = 0
        self._parts_in_evaluation = 1
        super().__init__(*args, **kwargs)
        if self.schedule is not None:
            self.schedule.autocast = self.compute_loss_context_manager
        self.remove_callback(PrinterCallback)
        self.row_writer = RowWriter(self, on_row, device)
        self.add_callback(self.row_writer)

    def begin_step(self) -> None:
        """A new optimizer step begins."""
        self.step = Step()

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss, or the engine's, counted, and refused if it is not finite. Shapes of inputs: (rows, tokens)."""
        labels, ids = inputs["labels"], inputs["input_ids"]
        if self.engine is not None and self.engine.loss is not None:
            loss = self.engine.loss(model, inputs, num_items_in_batch)
        else:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.step.micro_batches += 1
            mask = inputs.get("attention_mask")
            self.step.tokens += ids.numel() if mask is None else int(mask.sum())
            self.step.trained_tokens += int((labels[:, 1:] != -100).sum())
            if self.engine is not None and self.engine.loss is not None:
                self.step.correct_tokens += int(self.engine.loss.last_correct)
            value = loss[0] if return_outputs else loss
            if not torch.isfinite(value):
                raise DivergedError(
                    f"The loss became {value.item()} {self._where(ids)}. {self._suspects()}", self._advice()
                )
        return loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch forward and backward, in as many parts as the ladder says; the loss is a sum over tokens divided by
        the step's, so parts add up to the whole.

        When memory runs out, the step is run from its beginning with the ladder's next rung: gradients are dropped, random
        numbers put back, and the micro-batches that had been done are done once more.

        Raises:
            HardwareError: memory ran out on the last rung too.
            DivergedError: the loss or the gradient so far is not finite.
        """
        self.look()
        if self.schedule is not None:  # it goes through all micro-batches of a step at once; the trainer is told one after the other
            if not self.step.losses:
                self.step.inputs = self.fetched
                self.step.losses = self._learn_or_step_down(model, self.fetched, num_items_in_batch)
            return self.step.losses.pop(0)
        self.step.inputs.append(inputs)
        return self._learn_or_step_down(model, [inputs], num_items_in_batch)[-1]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As the trainer does; the micro-batches of the step that comes are known from here on."""
        self.fetched, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.fetched, num_items

    def step_down(self, where: str) -> None:
        """To the ladder's next rung.

        Raises:
            HardwareError: there is none.
        """
        self.tell(self.ladder.step_down(where))
        self.apply_rung()

    def go_to_rung(self, rung: int, why: str) -> None:
        """To a lower rung of the ladder, in time."""
        self.tell(self.ladder.go_to(rung, why))
        self.apply_rung()

    def apply_rung(self) -> None:
        """Do as the ladder says from now on. Parts of a micro-batch are asked for at each one; this is for the rest."""
        if self.ladder.checkpointing and not self.args.gradient_checkpointing and self.schedule is None:
            self.args.gradient_checkpointing = True  # or train() would not switch it on
            self.args.gradient_checkpointing_kwargs = dict(_CHECKPOINTING)
            self.model.gradient_checkpointing_enable(dict(_CHECKPOINTING))

    def _go_back_to_the_beginning_of_the_step(self) -> None:
        self.model.zero_grad()
        set_random_state(self.step.random)
        self.step.tokens = self.step.trained_tokens = self.step.correct_tokens = self.step.micro_batches = 0

    def _learn_or_step_down(
        self, model: torch.nn.Module, batches: Sequence[dict[str, Any]], num_items: torch.Tensor | int | None
    ) -> list[torch.Tensor]:
        """The losses of micro-batches; when memory runs out, of all micro-batches of the step so far."""
        while True:
            try:
                return self._learn(model, batches, num_items)
            except (RuntimeError, MemoryError) as error:
                if self.ladder is None or not self.may_step_down or not is_out_of_memory(error):
                    raise
                release(error)
            self.step_down(f"in step {self.state.global_step + 1}")
            self._go_back_to_the_beginning_of_the_step()
            batches = self.step.inputs

    def _learn(
        self, model: torch.nn.Module, batches: Sequence[dict[str, Any]], num_items: torch.Tensor | int | None
    ) -> list[torch.Tensor]:
        """The trainer's own step for each part of each micro-batch; the gradient so far is checked before anything uses it."""
        parts = [split_inputs(inputs, self.ladder.num_parts) if self.ladder else [inputs] for inputs in batches]
        calls = [partial(self._forward_backward, model, part, num_items) for each in parts for part in each]
        losses = iter(self.schedule.step(calls) if self.schedule else [call() for call in calls])
        if self.accelerator.scaler is None and not self._gradient_is_finite():
            bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise DivergedError(
                f"The gradient became non-finite {self._where(None)}, in {len(bad)} adapter weights, "
                f"first {_short(bad[0])}.", self._advice(),
            )
        return [sum(islice(losses, len(each))) for each in parts]

    def _forward_backward(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        return super().training_step(model, inputs, num_items)

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
        total, num_tokens, done = 0.0, 0, 0
        was_training = self.model.training
        self.model.eval()
        at_once = (self.schedule.at_once or self.args.gradient_accumulation_steps) if self.schedule else 1
        batches = iter(loader)
        with torch.no_grad(), self.compute_loss_context_manager():
            while group := list(islice(batches, at_once)):
                self.look()
                num_tokens += sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in group)
                total += self._summed_loss(group)
                done += len(group)
                if progress:
                    progress(done, len(loader))
        self.model.train(was_training)
        return Evaluation(loss=total / max(1, num_tokens), num_tokens=num_tokens)

    def _summed_loss(self, batches: Sequence[dict[str, Any]]) -> float:
        """The loss summed over the tokens of some batches; in parts where memory runs out. Training is not touched by that."""
        while True:
            num_parts = self._parts_in_evaluation
            parts = [part for inputs in batches for part in (split_inputs(inputs, num_parts) if num_parts > 1 else [inputs])]
            try:
                calls = [partial(self._loss_of_part, part) for part in parts]
                return sum(self.schedule.forward(calls) if self.schedule else [call() for call in calls])
            except (RuntimeError, MemoryError) as error:
                smaller = [part for inputs in batches for part in split_inputs(inputs, 2 * num_parts)]
                if not is_out_of_memory(error) or len(smaller) <= len(parts):
                    raise
                release(error)
            self._parts_in_evaluation *= 2
            self.tell(f"Memory ran out in evaluation; it goes on with batches in {self._parts_in_evaluation} parts. "
                      "Training is not touched by that.")

    def _loss_of_part(self, inputs: dict[str, Any]) -> float:
        # With a count of one the "mean" is the sum over the batch's tokens.
        one = torch.ones((), device=inputs["labels"].device)
        return self.compute_loss(self.model, dict(inputs), num_items_in_batch=one).item()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the trainer does; after a resume the adapters are of the run's own type again."""
        _compat.restore_adapter_dtype(self.model, self.adapter_dtype)
        return super().create_optimizer(*args, **kwargs)

    def take_rate(self) -> None:
        """Learning rate and weight decay of the settings, in the place of those that a checkpoint brought with it."""
        scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
        rates = [self.args.learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, rate in zip(groups, rates, strict=True):
            group["initial_lr"], group["lr"] = self.args.learning_rate, rate
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": [self.args.learning_rate] * len(groups), "_last_lr": rates})
        groups[0]["weight_decay"] = self.args.weight_decay  # the trainer's second group has none, whatever is set

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
        lora, rate = self.model.peft_config["default"], self.args.learning_rate
        settings = words(calmer(rate, lora.r, lora.lora_alpha, lower_by=2 / 3))
        return f"Rule diverging (train.learning_rate is {rate:g} now): start anew with --fresh {settings}, or raise train.warmup."


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
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    ladder: Ladder | None = None,
    tell: Callable[[str], None] = lambda line: None,
    look: Callable[[], Any] = lambda: None,
    engine: Engine | None = None,
) -> AdapterTrainer:
    """A trainer that is ready to evaluate and to train. It writes nothing by itself.

    Args:
        folder: where the trainer believes that its output goes.
        settings: decided values by dotted name, as in `Plan.settings`.
        on_row, ladder, tell, look, engine: see `AdapterTrainer`.
    """
    # The engine's schedule computes activations anew by itself.
    checkpointing = bool(settings["memory.checkpointing"]) and (engine is None or engine.schedule is None)
    eval_every = settings["train.eval_every"] if validation is not None else 0
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
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs=dict(_CHECKPOINTING) if checkpointing else None,
        use_cpu=device.kind == "cpu",
        dataloader_pin_memory=device.kind == "cuda",
        eval_strategy="steps" if eval_every else "no",
        eval_steps=eval_every or None,
        save_strategy="no",  # see qlora.training.saving
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
        on_row=on_row, device=device, adapter_dtype=torch_dtype(precision.adapters), ladder=ladder, tell=tell, look=look,
        engine=engine,
    )
    _compat.restore_adapter_dtype(trainer.model, trainer.adapter_dtype)
    if ladder is not None:
        trainer.apply_rung()
    return trainer


def _short(name: str) -> str:
    """A parameter's name without the wrappers that PEFT puts around every one."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")
