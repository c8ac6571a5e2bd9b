"""The tokenizer of an adapter: its own, with the chat template that it was trained with, or that of its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora.adapted.base import base_explained
from qlora.hub.adapter import Adapter
from qlora.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def find_tokenizers(adapters: Sequence[Adapter], progress: Progress) -> list[PreTrainedTokenizerBase]:
    """Of each adapter; see `find_tokenizer`."""
    found = [find_tokenizer(each, Progress()) for each in adapters]
    without = [each.name for each in adapters if not _has_tokenizer(each)]
    if without:
        progress.note(f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} no tokenizer; the base's is used.")
    return found


def _has_tokenizer(adapter: Adapter) -> bool:
    return any((adapter.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def find_tokenizer(adapter: Adapter, progress: Progress) -> PreTrainedTokenizerBase:
    """The adapter's own, with the chat template that it was trained with; else the base's.

    Raises:
        ModelError: neither can be had.
    """
    from qlora.model.build import load_tokenizer, locate_base

    folder = adapter.folder
    with base_explained(adapter):
        if _has_tokenizer(adapter):
            return load_tokenizer(str(folder))
        tokenizer = load_tokenizer(locate_base(adapter.base), revision=adapter.base_revision)
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    progress.note("The adapter has no tokenizer beside it; the base's is used.")
    return tokenizer


def about_vocabulary(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Token numbers that the model has no embedding for."""
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]  # one on the host has no weight at times
    if len(tokenizer) <= size:
        return ()
    return (f"The tokenizer has {len(tokenizer):,} tokens, and the base embeddings for {size:,}: it cannot read the others.",)
