"""What a merge is made of: the adapter's products, the base's tensors, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora import _compat
from qlora.merging import adapter as adapters
from qlora.merging import base
from qlora.precision import Precision
from qlora.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora.hub.adapter import Adapter


@dataclass(frozen=True)
class Parts:
    """Of one adapter and its base. Weights are not read yet.

    Attributes:
        folder: with the base's files. config: the base's, of its text part.
        files: the adapter's.
        changes: one for each tensor of the base's checkpoint.
        nf4: names in the model of the weights that training has in NF4, and whether each has shape (in, out).
        trained: the type in which the base was quantised for training: bf16, fp16 or fp32.
    """

    adapter: Adapter
    folder: Path
    config: PreTrainedConfig
    files: adapters.LoraFiles
    changes: tuple[base.Change, ...]
    nf4: dict[str, bool]
    trained: str

    @property
    def num_changed(self) -> int:
        """Tensors that the adapter changes."""
        return len(self.files.products) + len(self.files.replaced)

    @property
    def num_numbers(self) -> int:
        return sum(change.stored.num_numbers for change in self.changes)


def gather(adapter: Adapter, *, into: str, dtype: str | None, progress: Progress) -> Parts:
    """Look at adapter and base; a base on the Hub is downloaded.

    Args:
        into: "16bit" or "nf4".
        dtype: a type for all numbers of the result (bf16, fp16, fp32); None leaves each tensor its own.

    Raises:
        ModelError: base or adapter cannot be had, do not belong together, or cannot be merged as a sum.
        HubError: the way to the Hub broke again and again.
    """
    from qlora.catalog.lookup import find_config

    _compat.hide_loading_bars()
    files = adapters.read_adapter(adapter.folder)
    with progress.stage(f"Looking at {adapter.base}") as update:
        folder = base.base_folder(adapter.base, adapter.base_revision, progress)
        config = find_config(str(folder))
        trained = _trained_precision(adapter)
        tensors = base.list_tensors(adapter.base, folder)
        changes = base.plan_changes(adapter.base, config, tensors, files, into=into, dtype=dtype, trained=trained)
        nf4 = base.nf4_weights(config, changes, trained)
        update(1, 1)
    return Parts(adapter, folder, config, files, tuple(changes), nf4, trained.compute)


def _trained_precision(adapter: Adapter) -> Precision:
    """As the run says; of an adapter from elsewhere, bf16."""
    found = adapter.run.setting("model.dtype") if adapter.run else None
    return Precision(found if found in ("bf16", "fp16", "fp32") else "bf16", "fp32", False, "as in training")
