"""Talk to adapters on one base, turn by turn.

What is read and shown goes through a small terminal object, so a pipe will do as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from qlora.adapted import Adapted, load_adapted
from qlora.chatting.commands import COMMANDS, about_sampling, about_seed, run_command, set_system, split_command
from qlora.chatting.conversation import Answer, Conversation
from qlora.chatting.terminal import Terminal, completions, edit_lines, shown
from qlora.errors import ModelError
from qlora.hub.adapter import Adapter
from qlora.progress import Progress
from qlora.units import format_seconds

__all__ = ["Answer", "Conversation", "Terminal", "chat", "shown", "talk"]


def chat(
    adapters: Sequence[Adapter], terminal: Terminal, progress: Progress, *, device: str = "auto", max_tokens: int = 512,
    temperature: float = 0.0, seed: int | None = None, system: str = "",
) -> None:
    """Load adapters on their base, and talk to them until there are no more lines. The first one answers until another is called.

    Raises:
        ModelError, HardwareError: see `qlora.adapted.load_adapted`; ModelError also where the chat template takes no system text.
    """
    if hasattr(sys.stdin, "reconfigure"):  # a byte in a pipe that is no text is no reason to stop
        sys.stdin.reconfigure(errors="replace")
    adapted = load_adapted(adapters, device=device, progress=progress)
    try:
        conversation = Conversation(adapted, max_tokens, temperature, seed)
        if system:
            set_system(conversation, system)
        if adapted.plan.placement.streams:
            terminal.note(about_streaming(adapted))
        if terminal.interactive:
            commands = [f"/{name}" for name in [*COMMANDS, "quit"]]
            edit_lines(partial(completions, commands=commands, names=[*adapted.adapters, "base"]))
        talk(conversation, terminal)
    finally:
        adapted.close()


def talk(conversation: Conversation, terminal: Terminal) -> None:
    """Read lines and show answers until there are no more lines, or /quit."""
    if terminal.interactive:
        _greet(conversation, terminal)
    elif conversation.seed is not None and not conversation.temperature:
        terminal.note(about_seed(conversation))
    turn = partial(_turn, terminal, _Told())
    while True:
        try:
            line = _readable(terminal.read("\n> " if terminal.interactive else ""))
            command = split_command(line)
            if line == "/quit":
                return
            if command is not None:
                _obey(conversation, terminal, turn, *command)
            elif line:
                said = line[1:] if line.startswith("//") else line
                turn(conversation, lambda each, said=said: each.answer(said, terminal.write))
        except EOFError:
            if terminal.interactive:
                terminal.write("\n")
            return
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            terminal.write("\n")
            terminal.note("Ctrl-D or /quit ends.")


# --- details -----------------------------------------------------------------------------------------------------------


class _Told:
    """What is only said once."""

    forgotten = False


def _greet(conversation: Conversation, terminal: Terminal) -> None:
    plain = "" if conversation.has_template else (
        "Each line is a text that the model goes on with, as there is no chat template or it was not trained with one. ")
    several = f"{conversation.adapter} answers; /use names the others. " if len(conversation.adapted.adapters) > 1 else ""
    terminal.note(f"Type a line and press Enter. {plain}{several}/help shows the commands.")
    if conversation.temperature:
        terminal.note(f"Temperature {conversation.temperature:g}: {about_sampling(conversation)}.")
    if conversation.seed is not None:
        terminal.note(about_seed(conversation))


def _readable(line: str) -> str:
    """Without what a tokenizer cannot read, halves of characters, and white space around it."""
    return line.encode("utf-8", "replace").decode("utf-8").strip()


def _note_lines(terminal: Terminal, text: str) -> None:
    for line in text.splitlines():
        terminal.note(line)


def _obey(conversation: Conversation, terminal: Terminal, turn: Callable[..., bool], name: str, words: str) -> None:
    try:
        run_command(conversation, terminal, turn, name, words)
    except ModelError as error:
        _note_lines(terminal, str(error))


def _turn(terminal: Terminal, told: _Told, conversation: Conversation, answer: Callable[[Conversation], object]) -> bool:
    """An answer, and what there is to say about it; False where it was stopped or did not come."""
    from qlora.training.recovery import is_out_of_memory, release

    went_well, before = False, conversation.last
    try:
        answer(conversation)
        went_well = True
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
    except ModelError as error:
        _note_lines(terminal, str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release(error)
        terminal.note("Memory ran out. /reset makes the conversation short again.")
    terminal.write("\n")
    last = conversation.last
    if last is not None and last is not before:
        if terminal.interactive:
            terminal.aside(about_answer(last, conversation))
        if last.num_forgotten and not told.forgotten:
            told.forgotten = True
            terminal.note(f"The conversation has become longer than the model's {conversation.limit:,} tokens: its oldest turns "
                          "are left out from now on. /reset begins anew.")
    return went_well


def about_streaming(adapted: Adapted) -> str:
    """Why answers are slow, where layers come to the device in turns."""
    stream = adapted.engine.stream
    num_streamed = stream.num_layers - len(getattr(stream, "resident", ()))
    place = "RAM" if adapted.plan.placement.stream_from == "ram" else "the disk"
    return f"{num_streamed} of {stream.num_layers} layers come from {place} for every token, so answers are slow."


def about_answer(answer: Answer, conversation: Conversation) -> str:
    """Who wrote how much how fast, in one line."""
    tokens = f"{answer.num_tokens:,} token{'' if answer.num_tokens == 1 else 's'}"
    parts = [answer.speaker or "base", tokens]
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:,.1f} tokens/s")
    if answer.first_seconds is not None and answer.first_seconds >= 1:
        parts.append(f"{format_seconds(answer.first_seconds)} to the first")
    if answer.seed is not None:
        parts.append(f"seed {answer.seed}")
    if not answer.is_whole and answer.num_tokens >= conversation.max_tokens:
        parts.append(f"cut at {conversation.max_tokens:,} tokens (/tokens N)")
    return " · ".join(parts)
