"""Rows of the lengths with which a batch takes as much as its plan promises at most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.planning.plan import Plan

_NUM_WORDS = 211


def worst_lengths(plan: Plan, *, packed: bool) -> list[int]:
    """Tokens of each row of a micro-batch: one of full length and others that lack a token; a pack has two of half.

    They are padded, and attention needs a mask, as a plan without data takes it to be; yet hardly a token is none that the loss
    counts. Much padding would take less than planned where logits are only made of tokens that count.
    """
    length, micro_batch = plan.settings["data.max_length"], plan.settings["train.micro_batch"]
    if packed:
        return [length // 2, length - length // 2]
    return [length, *[max(2, length - 1)] * (micro_batch - 1)]


def write_rows(path: Path, lengths: Sequence[int]) -> Path:
    """One row a length, in words that are a token each; the tokenizer adds the last one."""
    texts = [" ".join(f"w{(7 * row + i) % _NUM_WORDS}" for i in range(length - 1)) for row, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def word_tokenizer() -> PreTrainedTokenizerBase:
    """A word is a token, so that rows have the length that is wanted of them, whatever the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": 2 + i for i in range(_NUM_WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
