"""Between text and tokens: what the model reads, and what it writes, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qlora.chatting.terminal import shown
from qlora.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_CUT_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are no character yet


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a text to go on with, or of a conversation that the assistant is to answer, as rows are written in training.

    Raises:
        ModelError: the chat template cannot write this conversation.
    """
    from qlora.data import adds_bos

    if isinstance(prompt, str):
        text = prompt
    else:
        try:
            text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except _template_errors() as error:
            raise ModelError(f"The chat template cannot write this conversation: {shown(str(error))[:200]}",
                             "/reset forgets it; a template that cannot write any is the adapter's fault.") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def takes_system(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the chat template writes a system text."""
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "a"}]
    try:
        return text.strip() in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except _template_errors():
        return False


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template can raise: its own raise_exception, undefined names, and Python's for unexpected values."""
    import jinja2

    return jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError


class Streamer:
    """What `generate` hands each new token to: passes its text on, and counts.

    A token is decoded together with those just before it, as some tokenizers write a token at the begin of a text without its
    space; and no sooner than its bytes make characters. The pieces make up the text of all tokens, decoded at once.

    Args:
        keep: gets each piece of text.

    Attributes:
        num_tokens: that were written.
        first_at: `time.perf_counter()` at the first one; None before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keep: Callable[[str], None]):
        self.num_tokens = 0
        self.first_at: float | None = None
        self._tokenizer, self._keep = tokenizer, keep
        self._past_prompt = False
        self._ids: list[int] = []  # from those on whose text is needed to decode the next
        self._num_shown = 0  # how many of them are

    def put(self, value: torch.Tensor) -> None:
        """The prompt, first; then a token each time."""
        if not self._past_prompt:
            self._past_prompt = True
            return
        ids = value.flatten().tolist()
        self.num_tokens += len(ids)
        self.first_at = self.first_at or time.perf_counter()
        self._ids += ids
        self._show(at_end=False)

    def end(self) -> None:
        """There will be no more."""
        self._show(at_end=True)

    def _show(self, *, at_end: bool) -> None:
        known, text = self._text(self._ids[: self._num_shown]), self._text(self._ids)
        if not at_end and (text.endswith(_CUT_CHARACTER) or len(text) <= len(known)):
            return
        self._ids, self._num_shown = self._ids[self._num_shown :], len(self._ids) - self._num_shown
        if text[len(known) :]:
            self._keep(text[len(known) :])

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""


def cache_bytes(cache: Any) -> int:
    """What transformers' cache holds: keys and values of attention layers, states of others."""
    import torch

    held = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    tensors = [value for value in held if isinstance(value, torch.Tensor) and value.ndim > 1]  # others count tokens
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
