"""A conversation: what has been said, who answers, and how an answer is written."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora.adapted import Adapted
from qlora.chatting.terminal import shown
from qlora.chatting.text import Streamer, cache_bytes, prompt_ids
from qlora.errors import DataError, ModelError
from qlora.generation import GREEDY

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_DRAWN_SEEDS = 10**6  # short enough to be typed again
# What the authors of a base recommend for sampling, in its generation_config.json; and what each does nothing with.
_RECOMMENDED = {"top_p": 1.0, "top_k": 0, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Answer:
    """What was written, and what it took.

    Attributes:
        speaker: the adapter that wrote it; None for the base.
        seed: what the random numbers began with; None where the most probable token was taken each time.
        is_whole: the model ended it. Otherwise it was stopped, or cut after `Conversation.max_tokens`.
        num_forgotten: turns that were left out from now on, as the conversation had become too long.
        seconds: from the question to the end, `first_seconds` to the first token (None where there was none).
        cache_bytes: of keys and values at the end; None where it was stopped.
    """

    text: str
    speaker: str | None
    seed: int | None
    is_whole: bool
    num_forgotten: int
    num_prompt_tokens: int
    num_tokens: int
    seconds: float
    first_seconds: float | None
    cache_bytes: int | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which also waits for the prompt to be read."""
        if self.first_seconds is None or self.num_tokens < 2 or self.seconds <= self.first_seconds:
            return None
        return (self.num_tokens - 1) / (self.seconds - self.first_seconds)


@dataclass
class Conversation:
    """What has been said so far to a base and its adapters, kept as text: each adapter reads all of it in its own template.

    What a model that thinks aloud writes, such as Qwen3's <think>...</think>, is shown as it is and kept in the turn; whether the
    thoughts of earlier turns are read again is for the chat template to say (Qwen3's leaves them out).

    Attributes:
        max_tokens: of an answer.
        temperature: 0 takes the most probable token each time. Above it the base's recommendations hold as well, see `sampling`.
        seed: of each answer's random numbers, so that the same seed, adapter and conversation give the same answer; None
            draws one for each answer.
        system: goes before the first turn; "" is none.
        turns: messages so far. Where lines are texts to go on with, see `has_template`, they are neither used nor added to.
        adapter: the name of the one that is in use; `bare`: the base answers without it, though in its template.
        line, before: what was answered last, and the turns before it.
        last: how that went.
    """

    adapted: Adapted
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    adapter: str = ""
    bare: bool = False
    line: str = ""
    before: list[dict[str, str]] = field(default_factory=list)
    last: Answer | None = None

    def __post_init__(self) -> None:
        self.adapter = self.adapter or self.adapted.active or next(iter(self.adapted.adapters))

    @property
    def speaker(self) -> str | None:
        """Who answers: an adapter, or None for the base."""
        return None if self.bare else self.adapter

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the adapter in use, with the chat template that it was trained with."""
        return self.adapted.tokenizer_of(self.adapter)

    @property
    def has_template(self) -> bool:
        """Whether lines are turns of a conversation: there is a template, and the adapter was not trained on plain text."""
        run = self.adapted.adapters[self.adapter].run
        data = run.report.get("data") if run else None
        plain = isinstance(data, dict) and data.get("format") in ("text", "prompt_completion")
        return bool(self.tokenizer.chat_template) and not plain

    @property
    def limit(self) -> int:
        """Tokens that the model takes, the answer included."""
        return getattr(self.adapted.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def reset(self) -> None:
        """Forget what was said; the system text and who answers stay."""
        self.turns, self.line, self.before, self.last = [], "", [], None

    def draw_seed(self) -> int | None:
        """What the random numbers of the next answer begin with; None where none are needed."""
        if not self.temperature:
            return None
        return secrets.randbelow(_DRAWN_SEEDS) if self.seed is None else self.seed

    def prompt(self, turns: Sequence[dict[str, str]], line: str) -> list[int]:
        """Token ids of what the model would read.

        Raises:
            ModelError: the chat template cannot write the conversation.
        """
        if not self.has_template:
            return prompt_ids(self.tokenizer, line)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return prompt_ids(self.tokenizer, [*system, *turns, {"role": "user", "content": line}])

    def answer(self, line: str, show: Callable[[str], None]) -> Answer:
        """Answer a line; `show` gets it piece by piece while it is written, safe for a terminal.

        Raises:
            ModelError: the line is too long for the model, or the chat template cannot write the conversation.
            KeyboardInterrupt: what was written before it stays in the conversation, and in `last`.
        """
        kept, ids = self._fitting(line)
        self.line, self.before, self.last = line, list(self.turns), None
        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            show(shown(text))

        seed, streamer, started = self.draw_seed(), Streamer(self.tokenizer, keep), time.perf_counter()
        ended, is_whole, held_bytes = False, False, None
        try:
            is_whole, held_bytes = self._write(ids, streamer, seed)
            ended = True
        finally:
            seconds, text = time.perf_counter() - started, "".join(pieces)
            if self.has_template and (pieces or ended):  # otherwise nothing was answered, so nothing was asked
                self.turns = [*kept, {"role": "user", "content": line}, {"role": "assistant", "content": text}]
            self.last = Answer(
                text, self.speaker, seed, is_whole, len(self.before) - len(kept), len(ids), streamer.num_tokens, seconds,
                streamer.first_at and streamer.first_at - started, held_bytes,
            )
        return self.last

    def again(self, show: Callable[[str], None]) -> Answer:
        """Answer the last line anew, in the place of its answer; it stays where none comes."""
        turns, self.turns = self.turns, list(self.before)
        try:
            return self.answer(self.line, show)
        finally:
            if self.turns == self.before:
                self.turns = turns

    # --- details -------------------------------------------------------------------------------------------------------

    def _fitting(self, line: str) -> tuple[list[dict[str, str]], list[int]]:
        """The turns that are kept, and the prompt's token ids: of a long conversation the oldest turns are left out, two at a
        time, so that an answer has room.
        """
        turns, limit = list(self.turns), self.limit
        while True:
            ids = self.prompt(turns, line)
            if len(ids) + min(self.max_tokens, limit // 2) <= limit:
                break
            if not turns or not self.has_template:
                raise ModelError(f"That is {len(ids):,} tokens long, and the model takes {limit:,} with the answer.",
                                 "Write less at once.")
            del turns[:2]
        size = self.adapted.model.config.get_text_config().vocab_size
        if max(ids, default=0) >= size:
            raise ModelError(f"This text has the token {max(ids):,}, and the base knows {size:,}.",
                             "The tokenizer beside the adapter is not the base's; write it in other words.")
        if not ids:
            raise ModelError("There is nothing in this line that the model could read.", "Write a word.")
        return turns, ids

    def _write(self, ids: list[int], streamer: Streamer, seed: int | None) -> tuple[bool, int]:
        """Whether the model came to an end by itself, and the bytes of keys and values that it held then."""
        import torch

        adapted, stop_ids = self.adapted, self._stop_ids()
        config = self._config(min(self.max_tokens, self.limit - len(ids)), stop_ids)
        inputs = torch.tensor([ids], device=adapted.device.torch_name)
        with adapted.using(self.speaker), adapted.computing(), _random_from(seed, inputs.device):
            out = adapted.model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config,
                                         streamer=streamer)
        return int(out.sequences[0, -1]) in stop_ids, cache_bytes(out.past_key_values)

    def _config(self, max_new_tokens: int, stop_ids: list[int]) -> GenerationConfig:
        from transformers import GenerationConfig

        tokenizer = self.tokenizer
        # What is left open here, the base's own generation_config fills in.
        how = {"do_sample": True, "temperature": self.temperature, **sampling(self.adapted)} if self.temperature else GREEDY
        return GenerationConfig(
            max_new_tokens=max_new_tokens, use_cache=True, eos_token_id=stop_ids, num_beams=1, return_dict_in_generate=True,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id, **how,
        )

    def _stop_ids(self) -> list[int]:
        """What ends an answer in the template that is used, and what the base says that ends its texts."""
        from qlora.data import end_ids
        from qlora.data.conversation import ChatWriter

        tokenizer = self.tokenizer
        try:
            writer = ChatWriter(tokenizer, []) if self.has_template else None
        except DataError:  # a template that training would refuse may do for talking
            writer = None
        of_base = self.adapted.model.generation_config.eos_token_id
        of_base = of_base if isinstance(of_base, list) else [] if of_base is None else [of_base]
        return list(dict.fromkeys([*end_ids(tokenizer, writer), *of_base]))


def sampling(adapted: Adapted) -> dict[str, Any]:
    """How tokens are drawn beside the temperature: as the base's generation_config recommends, and from all of them where it does
    not say (transformers would take the 50 most probable).
    """
    config = adapted.model.generation_config
    found = {name: getattr(config, name, None) for name in _RECOMMENDED}
    return {name: _RECOMMENDED[name] if value is None else value for name, value in found.items()}


@contextmanager
def _random_from(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, random numbers begin with the seed; outside, they go on as if nothing had been drawn."""
    import torch

    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
