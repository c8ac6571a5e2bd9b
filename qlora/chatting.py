"""Talk to an adapter, turn by turn. What is read and shown goes through a small terminal object, so a pipe will do as well."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from qlora.adapted import Adapted, load_adapted
from qlora.errors import DataError, ModelError
from qlora.hub.adapter import Adapter
from qlora.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer

HELP = """\
/base    answer without the adapter, as the base does; again: with it
/reset   forget the conversation
/help    these lines
/quit    end; Ctrl-D does too. Ctrl-C stops an answer."""
_COMMAND = re.compile(r"/[a-z]+")


@dataclass(frozen=True)
class Terminal:
    """Where a conversation happens.

    Attributes:
        read: shows a prompt and returns the next line; EOFError where there will be no more.
        write: shows a piece of an answer at once, as it is.
        note: shows a line that is no answer.
        interactive: a person types; otherwise one line is one turn, without prompts.
    """

    read: Callable[[str], str]
    write: Callable[[str], None]
    note: Callable[[str], None]
    interactive: bool


@dataclass
class Conversation:
    """One adapter, and what has been said so far.

    Attributes:
        max_tokens: of an answer.
        temperature: 0 takes the most probable token each time.
        turns: messages so far. Without `has_template` there are none, as each line is a text to go on with.
        with_adapter: off, the base answers.
    """

    adapted: Adapted
    max_tokens: int = 512
    temperature: float = 0.0
    turns: list[dict[str, str]] = field(default_factory=list)
    with_adapter: bool = True

    @property
    def has_template(self) -> bool:
        """Whether lines are turns of a conversation: there is a template, and the adapter was not trained on plain text."""
        run = self.adapted.adapter.run
        data = run.report.get("data") if run else None
        plain = isinstance(data, dict) and data.get("format") in ("text", "prompt_completion")
        return bool(self.adapted.tokenizer.chat_template) and not plain

    def answer(self, line: str, show: Callable[[str], None]) -> str:
        """The answer to a line; `show` gets it piece by piece while it is written, safe for a terminal.

        Raises:
            ModelError: the line is too long for the model, or the chat template cannot write the conversation.
            KeyboardInterrupt: what was written before it stays in the conversation.
        """
        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            show(shown(text))

        ended = False
        self.turns.append({"role": "user", "content": line})
        try:
            self._write(self._prompt(line), keep)
            ended = True
        finally:
            if not self.has_template:
                self.turns.clear()
            elif pieces or ended:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:  # nothing was answered, so nothing was asked
                self.turns.pop()
        return "".join(pieces)

    def _prompt(self, line: str) -> list[int]:
        """Token ids; of a long conversation the oldest turns are left out, two at a time, so that an answer has room."""
        while True:
            ids = prompt_ids(self.adapted.tokenizer, self.turns if self.has_template else line)
            if len(ids) + min(self.max_tokens, self._limit // 2) <= self._limit:
                return ids
            if len(self.turns) < 3:
                raise ModelError(f"That is {len(ids):,} tokens long, and the model takes {self._limit:,} with the answer.",
                                 "Write less at once.")
            del self.turns[:2]

    def _write(self, ids: list[int], keep: Callable[[str], None]) -> None:
        import torch
        from transformers import GenerationConfig

        model, tokenizer = self.adapted.model, self.adapted.tokenizer
        config = GenerationConfig(
            max_new_tokens=min(self.max_tokens, self._limit - len(ids)), use_cache=True, eos_token_id=self._stop_ids, num_beams=1,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **({"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}),
        )
        inputs = torch.tensor([ids], device=model.device)
        with self.adapted.computing(), nullcontext() if self.with_adapter else self.adapted.without_adapter():
            model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config,
                           streamer=_streamer(tokenizer, keep))

    @cached_property
    def _limit(self) -> int:
        """Tokens that the model takes, the answer included."""
        return getattr(self.adapted.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @cached_property
    def _stop_ids(self) -> list[int]:
        """What ends an answer in the template that is used, and what the base says that ends its texts."""
        from qlora.data import end_ids
        from qlora.data.conversation import ChatWriter

        tokenizer = self.adapted.tokenizer
        try:
            writer = ChatWriter(tokenizer, []) if self.has_template else None
        except DataError:  # a template that training would refuse may do for talking
            writer = None
        of_base = self.adapted.model.generation_config.eos_token_id
        of_base = of_base if isinstance(of_base, list) else [] if of_base is None else [of_base]
        return list(dict.fromkeys([*end_ids(tokenizer, writer), *of_base]))


def chat(
    adapter: Adapter, terminal: Terminal, progress: Progress, *, device: str = "auto", max_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """Load an adapter on its base, and talk to it until there are no more lines.

    Raises:
        ModelError, HardwareError: see `qlora.adapted.load_adapted`.
    """
    if hasattr(sys.stdin, "reconfigure"):  # a byte in a pipe that is no text is no reason to stop
        sys.stdin.reconfigure(errors="replace")
    talk(Conversation(load_adapted(adapter, device=device, progress=progress), max_tokens, temperature), terminal)


def talk(conversation: Conversation, terminal: Terminal) -> None:
    """Read lines and show answers until there are no more lines, or /quit."""
    if terminal.interactive:
        plain = "" if conversation.has_template else (
            "Each line is a text that the model goes on with, as there is no chat template or it was not trained with one. ")
        terminal.note(f"Type a line and press Enter. {plain}/help shows the commands.")
    while True:
        try:
            line = terminal.read("\n> " if terminal.interactive else "").strip()
            if line == "/quit":
                return
            if _COMMAND.fullmatch(line):
                for told in command(conversation, line).splitlines():
                    terminal.note(told)
            elif line:
                _turn(conversation, terminal, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            terminal.note("Ctrl-D or /quit ends.")


def command(conversation: Conversation, line: str) -> str:
    """Do what a line such as /reset says; what there is to tell about it."""
    if line == "/reset":
        conversation.turns.clear()
        return "The conversation is forgotten."
    if line == "/base":
        conversation.with_adapter = not conversation.with_adapter
        return "With the adapter." if conversation.with_adapter else "Without the adapter: the base answers."
    return HELP if line == "/help" else f"There is no {line}.\n{HELP}"


def _turn(conversation: Conversation, terminal: Terminal, line: str) -> None:
    from qlora.training.recovery import is_out_of_memory, release

    try:
        conversation.answer(line, terminal.write)
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
    except ModelError as error:
        terminal.note(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release(error)
        terminal.note("Memory ran out. /reset makes the conversation short again.")
    terminal.write("\n")


# --- text and tokens ---------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a text to go on with, or of a conversation that the assistant is to answer, as rows are written in training.

    Raises:
        ModelError: the chat template cannot write this conversation.
    """
    import jinja2

    from qlora.data import adds_bos

    if isinstance(prompt, str):
        text = prompt
    else:
        try:
            text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ModelError(f"The chat template cannot write this conversation: {shown(str(error))[:200]}",
                             "/reset forgets it; a template that cannot write any is the adapter's fault.") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def shown(text: str) -> str:
    """Text of a model, without characters that steer a terminal, but with its lines."""
    from qlora.results.facts import printable

    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)


def _streamer(tokenizer: PreTrainedTokenizerBase, keep: Callable[[str], None]) -> TextStreamer:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Passes on whole words, instead of printing them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                keep(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
