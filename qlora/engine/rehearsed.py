"""The schedule as the planner rehearses it on meta: with many micro-batches, of which only the first and the last are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from qlora.engine.schedule import Pass, Schedule

_Result = TypeVar("_Result")
_PHANTOM: Any = object()


class RehearsedSchedule(Schedule):
    """A schedule in which most micro-batches only take the memory that they would take between two layers.

    Attributes:
        num_phantoms: how many of them stand between the first and the last call of each visit.
    """

    num_phantoms = 0
    _seen: Pass

    def _step(self, calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
        return super()._step(self._with_phantoms(calls))

    def forward(self, calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
        return super().forward(self._with_phantoms(calls))

    def _with_phantoms(self, calls: Sequence[Callable[[], _Result]]) -> list[Any]:
        return [calls[0], *[_PHANTOM] * self.num_phantoms, *calls[1:]]

    def _record(self, position: int, call: Any) -> Pass:
        if call is not _PHANTOM:
            self._seen = super()._record(position, call)
            return self._seen
        copies: dict[int, torch.Tensor] = {}

        def copy(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return copies.setdefault(id(value), torch.empty_like(value))
            return value

        arguments = [(tree_map(copy, args), tree_map(copy, kwargs)) for args, kwargs in self._seen.arguments]
        shape, dtype = self._seen.like
        self._kept.keep((0, position), torch.empty(shape, dtype=dtype, device="meta"))
        return Pass(like=self._seen.like, arguments=arguments, is_phantom=True)

    def _replay(self, position: int, call: Any) -> Any:
        return super()._replay(position, call if call is not _PHANTOM else lambda: None)

    def _compute(self, number: int, each: Pass, hidden: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(hidden) if each.is_phantom else super()._compute(number, each, hidden)
