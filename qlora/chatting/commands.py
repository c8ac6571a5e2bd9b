"""What lines that begin with a slash do."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora.chatting.conversation import Conversation, sampling
from qlora.chatting.memory import memory_lines
from qlora.chatting.terminal import Terminal, shown
from qlora.chatting.text import takes_system
from qlora.errors import ModelError
from qlora.hub.adapter import CONFIG, WEIGHTS, read_document
from qlora.units import format_bytes

_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
_LARGEST_SEED = 2**63 - 1  # of torch's generators

# Answers a line of a conversation on a terminal; False where it was stopped.
Turn = Callable[[Conversation, Callable[[Conversation], object]], bool]


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        usage: as it is typed.
        help: what it does, in one line.
        do: carries it out. It gets what follows the command's name.
    """

    usage: str
    help: str
    do: Callable[[Conversation, Terminal, Turn, str], None]


def split_command(line: str) -> tuple[str, str] | None:
    """(name, words) of a line such as /use poet; None of any other. Two slashes begin a line that is meant for the model."""
    match = _COMMAND.fullmatch(line)
    return None if match is None else (match[1].lower(), (match[2] or "").strip())


def run_command(conversation: Conversation, terminal: Terminal, turn: Turn, name: str, words: str) -> None:
    """Do what a command says, and tell about it."""
    if name in COMMANDS:
        COMMANDS[name].do(conversation, terminal, turn, words)
        return
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    terminal.note(f"There is no /{name}. " + (f"Did you mean /{near[0]}?" if near else "/help lists the commands."))
    terminal.note(f"To say it to the model, write two slashes: //{name}")


def help_text() -> str:
    """All commands, a line each."""
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    return "\n".join([*lines, f"{'/quit':{width}}  end; Ctrl-D does too. Ctrl-C stops an answer"])


# --- who answers -------------------------------------------------------------------------------------------------------


def _use(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    if not words:
        for line in adapter_lines(conversation):
            terminal.note(line)
        return
    name = None if words == "base" else find_name(words, list(conversation.adapted.adapters))
    _speak(conversation, terminal, name)


def _base(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    _speak(conversation, terminal, conversation.adapter if conversation.bare else None)


def _speak(conversation: Conversation, terminal: Terminal, name: str | None) -> None:
    conversation.bare = name is None
    conversation.adapter = name or conversation.adapter
    terminal.note("Without the adapter: the base answers." if name is None else f"With the adapter {name}.")
    if conversation.system and name is not None and not takes_system(conversation.tokenizer, conversation.system):
        terminal.note(f"The chat template of {name} takes no system text. /system off leaves it out.")


def adapter_lines(conversation: Conversation) -> list[str]:
    """The adapters with rank, size and where they are from, and the base; who answers is marked."""
    adapted, rows = conversation.adapted, []
    for name, adapter in adapted.adapters.items():
        config = read_document(adapter.folder / CONFIG)
        size = (adapter.folder / WEIGHTS).stat().st_size
        rows.append((name, f"rank {shown(str(config.get('r')))}", format_bytes(size), shown(adapter.name)))
    rows.append(("base", "", "", shown(adapted.adapter.base)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    speaker = conversation.speaker or "base"
    return [f"{'*' if row[0] == speaker else ' '} {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"
            for row in rows]


def find_name(word: str, names: Sequence[str]) -> str:
    """The adapter that is meant: its name, or as much of its begin as no other has.

    Raises:
        ModelError: none is, or several are.
    """
    if word in names:
        return word
    begins = [name for name in names if name.lower().startswith(word.lower())]
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise ModelError(f"{shown(word)} may be {' or '.join(begins)}.", "Write more of its name.")
    near = difflib.get_close_matches(word, names, n=1)
    raise ModelError(f"No adapter is called {shown(word)[:100]}.", f"Did you mean {near[0]}?" if near else
                     "/use lists them. Others are loaded by naming them on the command line.")


def _both(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    _compare(conversation, terminal, turn, words, [None, conversation.adapter])


def _all(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    _compare(conversation, terminal, turn, words, [None, *conversation.adapted.adapters])


def _compare(conversation: Conversation, terminal: Terminal, turn: Turn, words: str, speakers: Sequence[str | None]) -> None:
    """The same line to several, with the same seed. The conversation goes on with the answer of the one who is in use."""
    if not (words or conversation.line):
        terminal.note("There is no line to answer yet. Write it after the command.")
        return
    line, turns = (words, conversation.turns) if words else (conversation.line, conversation.before)
    seed, answered = conversation.draw_seed(), None
    for speaker in speakers:
        other = replace(conversation, bare=speaker is None, adapter=speaker or conversation.adapter, turns=list(turns), seed=seed)
        terminal.note(f"{speaker or 'base'}:")
        went_well = turn(other, lambda each: each.answer(line, terminal.write))
        if other.speaker == conversation.speaker:
            answered = other
        if not went_well:
            break
    if answered is not None and answered.last is not conversation.last:
        conversation.turns, conversation.line = answered.turns, answered.line
        conversation.before, conversation.last = answered.before, answered.last


def _again(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    if not conversation.line:
        terminal.note("There is no line to answer yet.")
        return
    turn(conversation, lambda each: each.again(terminal.write))


# --- how it answers ----------------------------------------------------------------------------------------------------


def _seed(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    if words == "off":
        conversation.seed = None
    elif words:
        if not (words.isascii() and words.isdecimal() and int(words[:20]) <= _LARGEST_SEED and len(words) < 20):
            raise ModelError(f"{shown(words)[:40]} is no seed.", f"Write a whole number from 0 to {_LARGEST_SEED}, or off.")
        conversation.seed = int(words)
    terminal.note(about_seed(conversation))


def about_seed(conversation: Conversation) -> str:
    """What the seed does, in one line."""
    if conversation.seed is None:
        return "No seed: sampled answers differ each time."
    if not conversation.temperature:
        return f"Seed {conversation.seed}. It has no effect at temperature 0; /temperature 0.7 samples."
    return f"Seed {conversation.seed}: the same adapter and conversation give the same answer."


def _temperature(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    if words:
        try:
            value = float(words)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 10:
            raise ModelError(f"{shown(words)[:40]} is no temperature.", "Write a number from 0 to 10.")
        conversation.temperature = value
    value = conversation.temperature
    terminal.note(f"Temperature {value:g}: {about_sampling(conversation)}." if value
                  else "Temperature 0: the most probable word each time.")


def about_sampling(conversation: Conversation) -> str:
    """What words are drawn from."""
    bounds = [f"{name} {value:g}" for name, value in sampling(conversation.adapted).items()
              if value is not None and value != {"top_k": 0}.get(name, 1.0)]
    return f"drawn with {', '.join(bounds)}, as the base recommends" if bounds else "drawn from all words"


def _tokens(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    if words:
        if not (words.isascii() and words.isdecimal() and len(words) < 10 and int(words)):
            raise ModelError(f"{shown(words)[:40]} is no number of tokens.", "Write a whole number from 1.")
        conversation.max_tokens = int(words)
    terminal.note(f"An answer has {conversation.max_tokens:,} tokens at most.")


def _system(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    if words == "off":
        conversation.system = ""
    elif words:
        set_system(conversation, words)
    terminal.note(f"System text: {shown(conversation.system)}" if conversation.system else "There is no system text.")


def set_system(conversation: Conversation, text: str) -> None:
    """Let a text go before the conversation.

    Raises:
        ModelError: the chat template takes none.
    """
    if not conversation.has_template or not takes_system(conversation.tokenizer, text):
        raise ModelError(f"{conversation.adapter} has no chat template that takes a system text.",
                         "Write what it should know into the first line.")
    conversation.system = text


# --- the conversation --------------------------------------------------------------------------------------------------


def _reset(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    conversation.reset()
    terminal.note("The conversation is forgotten.")


def _memory(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    for line in memory_lines(conversation):
        terminal.note(line)


def _help(conversation: Conversation, terminal: Terminal, turn: Turn, words: str) -> None:
    for line in help_text().splitlines():
        terminal.note(line)


COMMANDS = {
    "use": Command("/use [NAME]", "let this adapter answer; alone: list them", _use),
    "base": Command("/base", "answer without the adapter, as the base does; again: with it", _base),
    "both": Command("/both [TEXT]", "base and adapter answer this line, or the last one", _both),
    "all": Command("/all [TEXT]", "base and every adapter do", _all),
    "again": Command("/again", "answer the last line anew", _again),
    "reset": Command("/reset", "forget the conversation", _reset),
    "system": Command("/system [TEXT]", "a text that goes before the conversation; off: none", _system),
    "temperature": Command("/temperature [T]", "0 takes the most probable word each time, 0.7 varies", _temperature),
    "seed": Command("/seed [N]", "makes sampled answers repeatable; off: a new one each time", _seed),
    "tokens": Command("/tokens [N]", "of an answer, at most", _tokens),
    "memory": Command("/memory", "what all this takes, and how much longer it may become", _memory),
    "help": Command("/help", "these lines", _help),
}
