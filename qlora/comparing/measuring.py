"""Run a model over rows: the loss of each, and the answers it writes. In batches as planned, smaller where memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora.adapted import Adapted
from qlora.comparing.figures import Measured
from qlora.progress import Progress

if TYPE_CHECKING:
    import torch

    from qlora.comparing.rows import Rows
    from qlora.data import TokenRow

_TRIED_TOKENS = 64

Update = Callable[[int, int], None]


def measure(adapted: Adapted, name: str | None, rows: Rows, progress: Progress) -> Measured:
    """The loss of all rows and greedy answers to some, by an adapter or, for None, by the bare base."""
    shown, began = name or "base", time.perf_counter()
    with adapted.using(name):
        with progress.stage(f"Loss of {shown}") as update:
            losses, rows_at_once = row_losses(adapted, rows.rows, update, progress.note)
        found = Measured(shown, tuple(losses), tuple(row.num_trained for row in rows.rows), rows.bytes, rows_at_once=rows_at_once,
                         seconds={"loss": round(time.perf_counter() - began, 3)})
        if not rows.samples:
            return found
        began = time.perf_counter()
        with progress.stage(f"Answers of {shown}") as update:
            answers = _answers(adapted, rows, progress.note, update)
    return replace(found, answers=tuple(answers), references=tuple(sample.reference for sample in rows.samples),
                   seconds={**found.seconds, "answers": round(time.perf_counter() - began, 3)})


def row_losses(
    adapted: Adapted, rows: Sequence[TokenRow], update: Update = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[list[float], int]:
    """The loss of each row in nats, summed over its trained tokens, without storing logits; and how many rows went through at
    once in the end.

    Longest rows first, so that memory that is short shows at the begin; half as many at once where it runs out.

    Raises:
        RuntimeError, MemoryError: one row alone is too much.
    """
    from qlora.training.recovery import is_out_of_memory, release

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    summed, schedule = _summed_losses(adapted, rows), adapted.engine.schedule
    at_once = adapted.plan.rows_at_once if adapted.engine.loss is not None else 1
    visited, losses, done = max(at_once, adapted.plan.visit_rows) if schedule else at_once, [0.0] * len(rows), 0
    while done < len(rows):
        part = order[done : done + visited]
        calls = [partial(summed, [rows[i] for i in part[first : first + at_once]]) for first in range(0, len(part), at_once)]
        try:
            with adapted.computing():
                found = schedule.forward(calls) if schedule else [call() for call in calls]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or max(at_once, min(visited, len(part))) == 1:
                raise
            release(error)
            at_once, visited = -(-at_once // 2), -(-visited // 2)
            tell(f"Memory ran out; the loss is taken of {at_once} row{'s' if at_once > 1 else ''} at once.")
            continue
        for i, loss in zip(part, (loss for batch in found for loss in batch), strict=True):
            losses[i] = loss
        done += len(part)
        update(done, len(rows))
    return losses, at_once


def _summed_losses(adapted: Adapted, rows: Sequence[TokenRow]) -> Callable[[Sequence[TokenRow]], list[float]]:
    """A function of a batch of rows that gives the sum of the losses of each.

    The chunked one knows what most models do between their last states and their logits. A model that does something else is
    found out on one short row, and takes the memory of its logits, a row at a time.
    """
    import torch

    model, loss = adapted.model, adapted.engine.loss
    pad = adapted.tokenizer.pad_token_id or 0

    def plainly(batch: Sequence[TokenRow]) -> list[float]:
        inputs = _padded(batch, pad, model.device)
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return [float(torch.nn.functional.cross_entropy(each.float(), wanted, ignore_index=-100, reduction="sum"))
                for each, wanted in zip(logits, labels[:, 1:], strict=True)]

    def in_chunks(batch: Sequence[TokenRow]) -> list[float]:
        return loss.of_rows(model, _padded(batch, pad, model.device)).tolist()

    if loss is None or not rows:
        return plainly
    if adapted.engine.schedule is None:  # there it would take every layer to the device twice more
        short = replace(rows[0], input_ids=rows[0].input_ids[:_TRIED_TOKENS], labels=rows[0].input_ids[:_TRIED_TOKENS])
        with adapted.computing():
            chunks, plain = torch.tensor(in_chunks([short])), torch.tensor(plainly([short]))
        if not torch.isclose(chunks, plain, rtol=1e-2, atol=1e-2):
            return lambda batch: [loss for row in batch for loss in plainly([row])]
    return in_chunks


def _padded(batch: Sequence[TokenRow], pad: int, device: torch.device) -> dict[str, Any]:
    """Ids and labels of shape (rows, tokens), filled up on the right, with a mask where anything is."""
    import torch

    width = max(len(row.input_ids) for row in batch)
    lengths = torch.tensor([len(row.input_ids) for row in batch])
    ids, labels = torch.full((len(batch), width), pad), torch.full((len(batch), width), -100)
    for number, row in enumerate(batch):
        ids[number, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[number, : len(row.labels)] = torch.tensor(row.labels)
    inputs = {"input_ids": ids.to(device), "labels": labels.to(device)}
    if int(lengths.min()) < width:
        inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long().to(device)
    return inputs


def _answers(adapted: Adapted, rows: Rows, tell: Callable[[str], None], update: Update) -> list[str]:
    """As a run writes them, in smaller batches where memory runs out."""
    from qlora.generation import answer
    from qlora.training.stages import in_smaller_batches

    def attempt(num_tokens: int) -> list[str]:
        with adapted.computing():
            return answer(
                adapted.model, rows.data.tokenizer, [sample.prompt_ids for sample in rows.samples], stop_ids=rows.data.stop_ids,
                max_new_tokens=rows.answer_tokens, progress=update, tokens_per_batch=num_tokens,
            )

    return in_smaller_batches(attempt, adapted.plan.generation_tokens, tell, also="")
