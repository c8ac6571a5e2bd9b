"""When memory runs short: tell that it has, let go of what the failed attempt holds, and go on in smaller parts.

A step is split, not changed: the parts of a micro-batch hold the same rows in the same order, and the loss is a sum over tokens
divided by the whole step's count, so the gradients of the parts add up to that of the whole.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from qlora.errors import HardwareError, QloraError
from qlora.planning.plan import Fallback
from qlora.units import format_bytes

if TYPE_CHECKING:
    from qlora.planning.plan import Plan

# What torch and the libraries below it say where they do not raise an error of its own kind. The first is torch's allocator on
# a CPU (c10/core/impl/alloc_cpu.cpp), the second CUDA's error 2 as the runtime and the driver have it, the third cuBLAS and
# cuDNN when they cannot have a workspace, the last what C++ throws.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA (driver )?error: out of memory|_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc"
)
# Of a padding-free batch: where its rows begin, and what the kernels for rows of different lengths are told about them.
_BOUNDARIES, _LONGEST, _ROW_NUMBERS = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k"), "seq_idx"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or in RAM; errors of ours that explain one do not."""
    if isinstance(error, QloraError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def release(error: BaseException) -> None:
    """Let go of what an error keeps alive: the tensors in the frames that it came through, and the cache of the allocator.

    To be called once the error is handled. Frames that are still running, such as the caller's, stay as they are.
    """
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)
    gc.collect()  # graph and modules refer to each other in circles
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or while handling."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            waiting += [each.__cause__, each.__context__]
            yield each


# --- splitting a micro-batch -------------------------------------------------------------------------------------------


def split_inputs(inputs: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """A collated micro-batch in up to `num_parts` parts with whole rows, in their order; none is without a row.

    A padded batch, (rows, tokens), is cut between rows, into parts of as equal a number as can be. The padding stays, so that
    the numbers of a row do not change. A padding-free batch, (1, tokens) with positions that start at 0 for each row, is cut
    where rows begin, so that the longest part is as short as can be; more parts than that takes are not made.
    """
    if num_parts <= 1:
        return [inputs]
    num_rows, num_tokens = inputs["input_ids"].shape
    if "attention_mask" in inputs or "position_ids" not in inputs:
        slices = _even_slices(num_rows, min(num_parts, num_rows))
        return [{key: value[part] for key, value in inputs.items()} for part in slices]
    begins = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    edges = _balanced_edges([*begins, num_tokens], num_parts)
    return [_cut_pack(inputs, begin, end) for begin, end in pairwise(edges)]


def _even_slices(num_rows: int, num_parts: int) -> list[slice]:
    edges = [num_rows * part // num_parts for part in range(num_parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _balanced_edges(boundaries: Sequence[int], num_parts: int) -> list[int]:
    """Some of the boundaries, the first and the last with them, such that the longest of up to `num_parts` parts between them is
    as short as can be.

    Args:
        boundaries: where each row begins, and where the last one ends, in tokens.
    """
    def within(limit: int) -> list[int]:
        """The fewest parts of up to so many tokens."""
        edges = [boundaries[0]]
        for begin, end in pairwise(boundaries):
            if end - edges[-1] > limit:
                edges.append(begin)
        return [*edges, boundaries[-1]]

    low, high = max(end - begin for begin, end in pairwise(boundaries)), boundaries[-1] - boundaries[0]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(within(middle)) - 1 <= num_parts else (middle + 1, high)
    return within(low)


def _cut_pack(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """The tokens from `begin` to `end` of a padding-free batch, as the collator would have made them."""
    begins = (inputs["position_ids"][0, begin:end] == 0).nonzero().flatten()
    boundaries = torch.cat([begins, begins.new_tensor([end - begin])])
    part: dict[str, Any] = {}
    for key, value in inputs.items():
        if key in _BOUNDARIES:
            part[key] = boundaries.to(value.dtype)
        elif key in _LONGEST:
            part[key] = int(boundaries.diff().max())
        elif key == _ROW_NUMBERS:
            part[key] = value[:, begin:end] - value[:, begin]
        else:
            part[key] = value[:, begin:end]
    return part


# --- what to step down to ----------------------------------------------------------------------------------------------


class Ladder:
    """The settings of the moment: a plan's own at the top, and its fallbacks below, one rung after the other.

    Attributes:
        rung: 0 as planned, 1 for the first fallback, and so on.
    """

    def __init__(self, plan: Plan):
        settings = plan.settings
        planned = Fallback(
            micro_batch=settings["train.micro_batch"], accumulation=settings["train.accumulation"],
            checkpointing=bool(settings["memory.checkpointing"]), peak_bytes=plan.peak_bytes,
        )
        self.rung = 0
        self._plan = plan
        self._rungs = (planned, *plan.fallbacks)
        self._unit = "pack" if settings["data.packing"] else "row"

    @property
    def num_rungs(self) -> int:
        return len(self._rungs)

    @property
    def micro_batch(self) -> int:
        """Rows at once."""
        return self._rungs[self.rung].micro_batch

    @property
    def num_parts(self) -> int:
        """Parts that a planned micro-batch is cut into."""
        return -(-self._rungs[0].micro_batch // self.micro_batch)

    @property
    def checkpointing(self) -> bool:
        return self._rungs[self.rung].checkpointing

    @property
    def peak_bytes(self) -> int:
        """What the run needs now, counted as `Plan.peak_bytes` is."""
        return self.peak_bytes_at(self.rung)

    @property
    def smallest_peak_bytes(self) -> int:
        """What it needs on the last rung."""
        return self.peak_bytes_at(self.num_rungs - 1)

    def peak_bytes_at(self, rung: int) -> int:
        """What it needs on a rung."""
        return self._rungs[rung].peak_bytes

    def step_down(self, where: str) -> str:
        """To the next rung, after memory has run out; one line that says so.

        Args:
            where: when or with what it ran out: "in step 12".

        Raises:
            HardwareError: this is the last one.
        """
        if self.rung + 1 == self.num_rungs:
            plan, now = self._plan, self._rungs[self.rung]
            length = plan.settings["data.max_length"]
            raise HardwareError(
                f"Memory ran out {where}, and there is nothing smaller to go on with: {now.micro_batch} x up to {length:,} "
                f"tokens, {'with' if now.checkpointing else 'without'} checkpointing, was planned to take "
                f"{format_bytes(now.peak_bytes)} of {format_bytes(plan.budget_bytes)} on {plan.device}.",
                "Close other programs that use this memory and run the same command again. If that does not help, lower "
                f"data.max_length (now {length:,}), then lora.r (now {plan.settings['lora.r']}), and add --fresh.",
            )
        before = self._rungs[self.rung]
        self.rung += 1
        return f"Memory ran out {where}; going on with {self._change(before)}."

    def go_to(self, rung: int, why: str = "") -> str:
        """To any rung; one line that says so.

        Args:
            why: what the line ends with: "because only 3 GiB can be had now".
        """
        before, self.rung = self._rungs[self.rung], rung
        return f"Going on with {self._change(before)}{why and ', '}{why}."

    def lowest_that_fits(self, free_bytes: int) -> int | None:
        """The next rung, from the present one on, that needs no more than this; None where not even the last one does."""
        fitting = (rung for rung in range(self.rung, self.num_rungs) if self.peak_bytes_at(rung) <= free_bytes)
        return next(fitting, None)

    def _change(self, before: Fallback) -> str:
        """'2 rows at once in 8 micro-batches instead of 4 in 4'; what is computed does not change."""
        now, texts = self._rungs[self.rung], []
        if now.micro_batch != before.micro_batch:
            plural = "" if now.micro_batch == 1 else "s"
            texts.append(f"{now.micro_batch} {self._unit}{plural} at once in {now.accumulation} micro-batches instead of "
                         f"{before.micro_batch} in {before.accumulation}")
        if now.checkpointing != before.checkpointing:
            texts.append(f"activations {'computed anew' if now.checkpointing else 'kept'} (checkpointing "
                         f"{'on' if now.checkpointing else 'off'})")
        return " and ".join(texts) or "the settings as they are"
