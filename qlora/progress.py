"""What a long piece of work tells whoever is watching. The base class says nothing; `qlora.console` draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from qlora.planning.plan import Plan


class Progress:
    """Override what you want to hear of. Every method may be left as it is."""

    def note(self, text: str) -> None:
        """One plain line."""

    @contextmanager
    def stage(self, text: str, *, in_bytes: bool = False, bar: bool = True) -> Iterator[Callable[[int, int], None]]:
        """A piece of work that takes a while; call what it yields with (done, total) to move its bar.

        Args:
            in_bytes: done and total are bytes.
            bar: False where somebody else draws one meanwhile.
        """
        yield lambda done, total: None

    def planned(self, plan: Plan, folder: Path) -> None:
        """Every setting is decided and written down; heavy work begins."""

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        """The training loop runs inside."""
        yield

    def row(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, as it is written."""
