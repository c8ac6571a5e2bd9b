"""Run the training code on a model without weights, and record what it allocates.

The model is on the meta device; trainer, collator, loss, adapters and optimizer are the ones that a run uses. So the record
changes when the code or a library changes, and no formula of memory has to be kept up with them.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qlora import _compat
from qlora.architecture import TargetSelection
from qlora.engine.install import Engine, install
from qlora.engine.placement import Placement
from qlora.generation import MAX_ANSWER_TOKENS, TOKENS_PER_BATCH, rows_at_once
from qlora.hardware import Device
from qlora.model.adapt import add_adapters
from qlora.model.exact import make_exact
from qlora.model.meta import build_base_on_meta
from qlora.planning.autocast import AutocastOnMeta
from qlora.planning.kernels import cuda_functions
from qlora.planning.kernels_cpu import cpu_attention_kernel
from qlora.planning.loading import record_loading, record_streamed_loading
from qlora.planning.trace import Event, Recorder
from qlora.precision import Precision, torch_dtype
from qlora.training.meta_tensors import (
    ON_HOST, PAGED, hold_workspaces, lengthen, mark_loss, number, on_device, prompt, stream_on_meta, temporaries, track_weights,
)
from qlora.training.probe import WRITTEN_TOKENS
from qlora.training.trainer import AdapterTrainer, as_dataset, build_trainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PAGED_FROM = 100_000  # numbers; smaller state stays on the card (bitsandbytes 0.50, optim/optimizer.py, get_state_buffer)


class _Row(NamedTuple):
    """What the trainer reads of a `qlora.data.TokenRow`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batches:
    """The shape of what goes through the model.

    Attributes:
        row_tokens: the longest row, or a full pack.
        ragged: rows of a batch differ in length, so it is padded and attention needs a mask; also of a row alone that was cut
            out of such a batch.
        packed: one sequence of several rows, with positions that start anew.
        generation_tokens: prompts and answers of one batch of generation.
        prompt_tokens, answer_tokens: of the longest prompt, None where it may be as long as a row, and of an answer at most.
        num_answers: that are written at all; None is any number.
        trained_tokens: of a row at most; None where it may be all but one.
        tried_out: the run begins with a trial, in which the rest of an answer is read with its prompt; see `qlora.training.probe`.
    """

    micro_batch: int
    accumulation: int
    row_tokens: int
    ragged: bool = False
    packed: bool = False
    generation_tokens: int = TOKENS_PER_BATCH
    prompt_tokens: int | None = None
    answer_tokens: int = MAX_ANSWER_TOKENS
    num_answers: int | None = None
    trained_tokens: int | None = None
    tried_out: bool = False

    @property
    def masked(self) -> bool:
        """Attention in training needs a mask: rows are padded, or must not see each other."""
        return self.packed or self.ragged


def rehearse(
    config: PreTrainedConfig,
    selection: TargetSelection,
    *,
    precision: Precision,
    device: Device,
    settings: Mapping[str, Any],
    batches: Batches,
    num_layers: int | None = None,
    phases: Sequence[str] = ("load", "train", "eval", "generate", "save", "merge"),
    brief: bool = False,
    trains: bool = True,
) -> list[Event]:
    """Record the phases of a run, in this order. What comes after a colon in an event's phase is a moment of it; at different
    depths of a model different moments can be the highest.

    Args:
        device: whose kernels are assumed; it need not be here.
        settings: decided values by dotted name, as in `Plan.settings`.
        num_layers: keep only the first layers of the model.
        brief: one micro-batch with gradients and optimizer state in place, instead of two steps that make them. The peaks are
            the same; the history that the allocator sees is not.
        trains: off, there is no optimizer, as where a model is only measured.
    """
    recorder = Recorder("meta", temporaries(device), ragged=batches.masked)
    state = random.getstate(), torch.get_rng_state()
    on_gpu = device.kind == "cuda"
    functions = cuda_functions(device.capability) if on_gpu else {"scaled_dot_product_attention": cpu_attention_kernel()}
    try:
        autocast = torch_dtype(precision.compute) if precision.autocast else None
        with _compat.pretend_device(functions, triton=on_gpu and not device.windows, autocast=autocast):
            base = build_base_on_meta(
                config, precision=precision, attention=settings["model.attention"], num_layers=num_layers
            )
            placement, layers_path = Placement.from_settings(settings), selection.architecture.layers_path
            stream = stream_on_meta(base, placement, layers_path) if placement.streams else None
            if "load" in phases and stream is not None:
                record_streamed_loading(recorder, base, [*stream.blocks, *on_device(base, placement)], on_cpu=not on_gpu)
            elif "load" in phases:
                record_loading(recorder, base, warm_up=on_gpu, on_cpu=not on_gpu, device_bytes=device.memory_bytes)
            if stream is not None and placement.stream_from == "ram" and not on_gpu:
                recorder.hold(stream.streamed_bytes, "layers in RAM", "base")  # which is the device
            model = _adapt(base, selection, precision, device, settings)
            with recorder, recorder.during(phases[0], "workspace"):
                engine = install(model, placement, layers_path=layers_path, device="meta", stream=stream, simulates_gpu=on_gpu)
            stage = _Stage(model, recorder, precision, settings, batches, engine, on_gpu)
            with recorder:
                hold_workspaces(recorder, device)
                if brief and trains:
                    stage.skip_ahead(with_gradients="train" in phases)
                for phase in (phase for phase in phases if phase != "load"):
                    with recorder.during(phase, "activations"):
                        getattr(stage, phase)()
    finally:
        random.setstate(state[0])
        torch.set_rng_state(state[1])
    return [event for event in recorder.trace() if event.part not in (PAGED, ON_HOST)]


class _Stage:
    """A trainer with a model on meta, and one method for each phase."""

    def __init__(
        self, model: PeftModel, recorder: Recorder, precision: Precision, settings: Mapping[str, Any], batches: Batches,
        engine: Engine, on_gpu: bool,
    ):
        self.model, self.recorder, self.batches, self.precision = model, recorder, batches, precision
        self.engine, self.schedule = engine, engine.schedule
        self.steps = (1, min(2, batches.accumulation))  # micro-batches of each
        self.trainer = _trainer(model, precision, settings, batches, engine)
        self.at_once, self.sees_gradients = 1, batches.accumulation > 1  # micro-batches a visit; whether a later one finds gradients
        if self.schedule is not None:
            at_once = min(self.schedule.at_once or batches.accumulation, batches.accumulation)
            self.sees_gradients = batches.accumulation > at_once
            self.at_once = self.schedule.at_once = min(2, at_once)
            self.steps = (self.at_once, self.at_once * (1 + self.sees_gradients))
            self.schedule.num_phantoms = max(0, at_once - 2)
            self.schedule.autocast = self.autocast
        if engine.loss is not None:  # the last token of a row has no next one to be told
            engine.loss.most_trained = batches.micro_batch * (batches.trained_tokens or batches.row_tokens - 1)
        self.trainer.current_gradient_accumulation_steps = batches.accumulation  # what its training loop sets
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.paged = settings["train.optimizer"].startswith("paged")
        self.optimizer = _optimizer(self.trainer, self.trainable)
        self.adapters_are_away = engine.placement.offload_adapters and on_gpu  # a CPU's host is the CPU
        track_weights(recorder, model, engine, ON_HOST if self.adapters_are_away else "adapters")
        mark_loss(recorder, model)

    def autocast(self) -> AbstractContextManager:
        """What the trainer's compute_loss_context_manager stands for, on meta."""
        return AutocastOnMeta(torch_dtype(self.precision.compute)) if self.precision.autocast else nullcontext()

    def skip_ahead(self, with_gradients: bool) -> None:
        """To the last micro-batch of a later step: what the earlier ones leave behind, without running them."""
        self._make_gradients()
        self.optimizer.step()
        self._track_optimizer()
        self.model.zero_grad()
        if with_gradients and self.sees_gradients:
            self._make_gradients()
        self.steps = (self.at_once,)

    def train(self) -> None:
        """Optimizer steps; from the second on there is optimizer state, and from its second micro-batch on gradients."""
        self.model.train()
        if self.trainer.args.gradient_checkpointing:
            options = dict(self.trainer.args.gradient_checkpointing_kwargs)
            if self.precision.autocast:  # what is computed anew in the backward pass is so in mixed precision too
                options["context_fn"] = lambda: (nullcontext(), self.autocast())
            self.model.gradient_checkpointing_enable(options)
        for num_micro_batches in self.steps:
            # The trainer fetches all micro-batches of a step before the first one.
            self._run([partial(self._learn, self._inputs()) for _ in range(num_micro_batches)])
            if self.engine.placement.offload_adapters:  # on meta none arrive in host memory by themselves
                self._make_gradients()
            for parameter in self.trainable:
                self._track_of_adapters(parameter.grad, "gradients")
            self.recorder.switch("train:optimizer", "workspace")
            torch.nn.utils.clip_grad_norm_(self.trainable, self.trainer.args.max_grad_norm, foreach=False)
            self.optimizer.step()
            self._track_optimizer()
            self.model.zero_grad()

    def _learn(self, inputs: dict[str, Any]) -> None:
        """What the trainer does with a micro-batch."""
        self.recorder.switch("train:forward", "activations")
        with self.autocast():
            loss = self.trainer.compute_loss(self.model, dict(inputs), num_items_in_batch=number())
        loss.backward()
        del loss
        if self.schedule is None:
            for parameter in self.trainable:
                self.recorder.track(parameter.grad, "gradients")

    def _run(self, calls: list[Callable[[], None]]) -> None:
        """The micro-batches of a step, one after the other or by the engine's schedule."""
        if self.schedule is not None:
            self.schedule.step(calls)
            return
        while calls:
            calls.pop(0)()

    def eval(self) -> None:
        """A batch of held-out rows, or as many as the engine takes at once, as `AdapterTrainer.measure` does it."""
        self.model.eval()
        batches = [self._inputs() for _ in range(self.at_once)]
        self.recorder.switch(part="activations")
        with torch.no_grad(), self.autocast():
            calls = [partial(self.trainer.compute_loss, self.model, inputs, num_items_in_batch=number()) for inputs in batches]
            del batches
            if self.schedule is not None:
                self.schedule.forward(calls)
            else:
                calls[0]()

    def generate(self) -> None:
        """A prompt and a long answer, as `qlora.generation.answer` batches them: first and last token."""
        num_new = self.batches.answer_tokens
        prompt_tokens = self.batches.prompt_tokens or self.batches.row_tokens
        rows = rows_at_once(prompt_tokens, num_new, self.batches.generation_tokens)
        rows = min(rows, self.batches.num_answers or rows)
        read = prompt_tokens  # where it may be as long as a row, there is no answer beside it
        if self.batches.tried_out and self.batches.prompt_tokens is not None:
            read += max(0, num_new - WRITTEN_TOKENS)
        self.model.eval()
        self.recorder.ragged = rows > 1 and (self.batches.ragged or self.batches.packed)
        with torch.no_grad():
            out = self.model(**prompt(rows, read), use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            out.logits[:, -1].to(torch.float32, copy=True)
            del out
            self.recorder.switch("generate:last token")
            lengthen(cache, prompt_tokens + num_new - read)
            step = prompt(rows, 1, seen=prompt_tokens + num_new)
            self.model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def save(self) -> None:
        """Adapter and optimizer go to the file from where they are; nothing is allocated on the device."""
        self.recorder.hold(0, "save", "workspace")

    def merge(self) -> None:
        """One projection after the other: the dequantised weight and what the adapter adds to it."""
        from peft.tuners.lora import LoraLayer

        import bitsandbytes as bnb

        layers = self.model.get_base_model().get_submodule(self.engine.layers_path)
        with torch.no_grad():
            for position in self.engine.walk():
                for module in layers[position].modules():
                    if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), bnb.nn.Linear4bit):
                        weight = module.get_base_layer().weight
                        full = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                        full + module.get_delta_weight("default").to(full.dtype)

    def _inputs(self) -> dict[str, torch.Tensor]:
        with self.recorder.during(part="activations"):
            return {key: torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value
                    for key, value in self._collated.items()}

    @property
    def _collated(self) -> dict[str, Any]:
        rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in _rows(self.batches)]
        if self.batches.packed:
            rows = [{**row, "seq_lengths": [len(row["input_ids"]) // 2, len(row["input_ids"]) - len(row["input_ids"]) // 2]}
                    for row in rows]
        return dict(self.trainer.data_collator(rows))

    def _make_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = torch.empty_like(parameter)
            self._track_of_adapters(parameter.grad, "gradients")

    def _track_of_adapters(self, tensor: torch.Tensor | None, part: str) -> None:
        """What goes with adapters into host memory is none of the device's."""
        self.recorder.track(tensor, ON_HOST if self.adapters_are_away else part)

    def _track_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    paged = self.paged and value.numel() >= _PAGED_FROM
                    self._track_of_adapters(value, PAGED if paged else "optimizer")


# --- building ----------------------------------------------------------------------------------------------------------


def _adapt(
    base: PreTrainedModel, selection: TargetSelection, precision: Precision, device: Device, settings: Mapping[str, Any]
) -> PeftModel:
    model = add_adapters(
        base, selection, r=settings["lora.r"], alpha=settings["lora.alpha"], dropout=settings["lora.dropout"], seed=0,
        dtype=torch_dtype(precision.adapters),
    )
    if device.kind == "cpu" and precision.compute == "fp32":
        make_exact(model)
    return model


def _trainer(
    model: PeftModel, precision: Precision, settings: Mapping[str, Any], batches: Batches, engine: Engine
) -> AdapterTrainer:
    """The run's own trainer. It thinks that it is on a CPU: where it is does not change what it asks of the model."""
    settings = {**settings, "train.eval_every": 0, "train.save_every": 0, "train.max_steps": 1, "train.report_to": (),
                "train.micro_batch": batches.micro_batch, "train.accumulation": batches.accumulation}
    host = Device("cpu", "meta", 0, 0, 0, 0, 1, True)
    with tempfile.TemporaryDirectory() as folder:
        return build_trainer(
            model, _tokenizer(), as_dataset(_rows(Batches(1, 1, 8))), None, folder=Path(folder), settings=settings,
            precision=Precision(precision.compute, precision.adapters, False, ""), device=host, num_steps=1,
            on_row=lambda row: None, engine=engine,
        )


def _tokenizer() -> PreTrainedTokenizerBase:
    """The trainer wants one; rows are tokens already, so it is never asked."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def _rows(batches: Batches) -> list[_Row]:
    """The longest row, and with it others: as long, or half as long where rows are ragged."""
    lengths = [batches.row_tokens] * batches.micro_batch
    if batches.ragged:
        lengths[1:] = [max(2, batches.row_tokens // 2)] * (len(lengths) - 1)
    return [_Row(input_ids=[1] * length, labels=[1] * length) for length in lengths]


def _optimizer(trainer: AdapterTrainer, trainable: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The class and options that the trainer would use, for state that is not paged.

    Paged state is managed memory, which the driver moves off the card when others need it; on meta it is plain state that is
    left out of the count.
    """
    cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    options.pop("is_paged", None)
    return cls(trainable, **options)
