"""What an adapter's base is, and what is wrong with it, for somebody who has named only the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qlora.errors import ModelError
from qlora.hub.adapter import Adapter

if TYPE_CHECKING:
    from qlora.architecture import Architecture

ANOTHER_BASE = "Name the base that it was trained on: --base MODEL"


def find_architecture(adapter: Adapter) -> Architecture:
    """What the config of the base says of it. Reads no weights.

    Raises:
        ModelError: it cannot be had.
    """
    from qlora.architecture import describe, find_config
    from qlora.model.build import locate_base

    with base_explained(adapter):
        return describe(find_config(locate_base(adapter.base), revision=adapter.base_revision))


@contextmanager
def base_explained(adapter: Adapter) -> Iterator[None]:
    """What is wrong with the base is told to somebody who has named only the adapter."""
    try:
        yield
    except ModelError as error:
        fix = f"It is the base of {adapter.name}. {error.fix}\nOr take another copy of it: --base MODEL"
        if "trust_remote_code" in error.fix:
            fix = "Code of a model is never run here. " + ANOTHER_BASE
        raise ModelError(error.problem, fix) from error
