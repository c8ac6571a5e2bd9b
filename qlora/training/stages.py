"""The stages of a run after it is built, one function each: verify, assemble, judge, keep."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora.durable import sync_folder, sync_tree
from qlora.errors import DivergedError, OutputError, VerificationError
from qlora.evaluation import Evaluation
from qlora.training.setup import Setup, base_revision

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora.engine.install import Engine
    from qlora.training.trainer import AdapterTrainer

_Result = TypeVar("_Result")
_LEAST_TOKENS = 512  # less than that is one row anyway


def verify(
    setup: Setup, model: PeftModel, engine: Engine, beside: Callable[[Iterator[int]], Iterator[int]] = lambda walk: walk
) -> str:
    """Hold what was built against the plan; return the fingerprint of the frozen base.

    Args:
        beside: goes along with the walk over the layers, each of which has its weights in place meanwhile.

    Raises:
        VerificationError: counts, types or frozen state differ from the plan.
    """
    from qlora.model.adapt import verify_adapters
    from qlora.model.build import fingerprint_base
    from qlora.precision import torch_dtype

    verify_adapters(
        model, setup.selection, setup.plan.settings["lora.r"], dtype=torch_dtype(setup.precision.adapters)
    )
    return fingerprint_base(model, lambda: beside(engine.walk()), engine.let_go)


def verify_unchanged(model: PeftModel, engine: Engine, fingerprint: str, folder: Path) -> None:
    """The base after training is the base before it.

    Raises:
        VerificationError: a frozen number has changed.
    """
    from qlora.model.build import fingerprint_base

    if fingerprint_base(model, engine.walk, engine.let_go) != fingerprint:
        fix = f"This is a fault of the program: please report it with {folder / 'resolved.json'}."
        if engine.placement.streams:
            fix = f"Its layers are read again and again: look at the disk and the RAM of this machine. If they are sound, {fix[0].lower()}{fix[1:]}"
        raise VerificationError("The frozen base changed during training, so the adapter does not belong to it.", fix)


def assemble(setup: Setup, model: PeftModel, engine: Engine, folder: Path, **hooks: Any) -> AdapterTrainer:
    """The trainer over this run's rows.

    Args:
        hooks: on_row, ladder, tell and look, see `qlora.training.trainer.AdapterTrainer`.

    Raises:
        RecipeError: packed rows would see each other in this model.
    """
    from qlora.training.packing import verify_packing
    from qlora.training.trainer import as_dataset, build_trainer

    packing = setup.plan.settings["data.packing"]
    trainer = build_trainer(
        model, setup.tokenizer,
        as_dataset(setup.data.train, pack_to=setup.data.max_length if packing else None),
        as_dataset(setup.data.validation) if setup.data.validation else None,
        folder=folder / "checkpoints", settings=setup.plan.settings, precision=setup.precision, device=setup.device,
        num_steps=setup.plan.num_steps, engine=engine, **hooks,
    )
    if packing:
        verify_packing(trainer)
    return trainer


def held_out_loss(trainer: AdapterTrainer, progress: Callable[[int, int], None]) -> Evaluation:
    """Mean loss over the tokens of the held-out rows."""
    return trainer.measure(progress=progress)


def answers_of(
    setup: Setup, model: PeftModel, tell: Callable[[str], None], progress: Callable[[int, int], None]
) -> list[str]:
    """Greedy answers to the sampled held-out rows, in smaller batches where memory runs out."""
    from qlora.generation import answer
    from qlora.training.probe import answer_tokens

    def attempt(num_tokens: int) -> list[str]:
        return answer(
            model, setup.tokenizer, [sample.prompt_ids for sample in setup.data.samples], max_new_tokens=answer_tokens(setup),
            stop_ids=setup.data.stop_ids, progress=progress, tokens_per_batch=num_tokens,
        )

    return in_smaller_batches(attempt, setup.plan.settings["memory.generation_tokens"], tell)


def in_smaller_batches(
    attempt: Callable[[int], _Result], num_tokens: int, tell: Callable[[str], None],
    also: str = " Training is not touched by that.",
) -> _Result:
    """Write answers, `num_tokens` of prompts and answers at once; where memory runs out half as many, down to one row. `also` is
    told with each step down.
    """
    from qlora.training.recovery import is_out_of_memory, release

    while True:
        try:
            return attempt(num_tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or num_tokens == 0:
                raise
            release(error)
        num_tokens = num_tokens // 2 if num_tokens > _LEAST_TOKENS else 0  # 0 is one row at a time
        tell(f"Memory ran out while answers were written; they are written {f'{num_tokens} tokens' if num_tokens else 'one'} at a "
             f"time.{also}")


def save_adapter(model: PeftModel, setup: Setup, folder: Path) -> Path:
    """Adapter, tokenizer and template, as plain PEFT and Transformers files that others may read: all of them, or none.

    Raises:
        DivergedError: the adapter holds a number that is not finite; nothing is written.
        OutputError: it cannot be written.
    """
    from qlora.training.saving import refuse_non_finite, save_adapter_files

    refuse_non_finite(model)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    # Whoever loads the adapter gets the base as it was, and not what its authors make of it later.
    model.peft_config["default"].revision = base_revision(setup)
    try:
        save_adapter_files(model, aside)
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's form to be filled in; the run's model card is beside the folder
        setup.tokenizer.save_pretrained(str(aside))
        make_readable(aside)
        sync_tree(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OutputError(
            f"The adapter cannot be written to {folder}: {error.strerror or error}. "
            f"{shutil.disk_usage(folder.parent).free:,} bytes are free there.",
            "Free some space, then run the same command again: it goes on from the last checkpoint.",
        ) from error
    return folder


def make_readable(folder: Path) -> None:
    """safetensors leaves files that only their owner may read; an adapter is there to be shared."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def keep_last_good(error: DivergedError, model: PeftModel, folder: Path) -> DivergedError:
    """Save the weights as they were before the step that failed, and say where they are."""
    from qlora.training.saving import refuse_non_finite, save_adapter_files

    kept = folder / "checkpoints" / "last-good"
    try:
        refuse_non_finite(model)
    except DivergedError:
        return error
    save_adapter_files(model, kept)
    make_readable(kept)
    return DivergedError(f"{error.problem} The weights before that step are in {kept}.", error.fix)
