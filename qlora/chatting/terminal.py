"""Where a conversation happens: what shows and reads lines, and the completion of what is typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _unheard(text: str) -> None:
    """For what a terminal does not show."""


@dataclass(frozen=True)
class Terminal:
    """Where a conversation happens.

    Attributes:
        read: shows a prompt and returns the next line; EOFError where there will be no more.
        write: shows a piece of an answer at once, as it is.
        note: shows a line that is no answer.
        interactive: a person types; otherwise one line is one turn, without prompts.
        aside: shows a line that is hardly worth one, such as how fast an answer came. Only used where a person types.
    """

    read: Callable[[str], str]
    write: Callable[[str], None]
    note: Callable[[str], None]
    interactive: bool
    aside: Callable[[str], None] = _unheard


def shown(text: str) -> str:
    """Text of a model or of a stranger, without characters that steer a terminal, but with its lines."""
    from qlora.results.facts import printable

    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)


# --- editing lines -----------------------------------------------------------------------------------------------------


def completions(line: str, commands: Sequence[str], names: Sequence[str]) -> list[str]:
    """What the last word of a line that is being typed may become: a command at its begin, an adapter's name after /use.

    Args:
        line: up to the cursor.
        commands: with their slash.
        names: of the adapters.
    """
    before, _, word = line.rpartition(" ")
    if not before.strip():
        return [command for command in commands if command.startswith(word)] if word.startswith("/") else []
    return [name for name in names if name.startswith(word)] if before.strip() == "/use" else []


def edit_lines(complete: Callable[[str], Sequence[str]]) -> None:
    """From now on lines can be edited, earlier ones come back with the arrow keys, and Tab completes. Nothing where Python was
    built without readline. What is typed is kept in memory only.

    Args:
        complete: from the line up to the cursor to what its last word may become.
    """
    try:
        import readline  # `input` uses it as soon as it is imported
    except ImportError:
        return

    def next_one(word: str, number: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[number] + " " * (len(found) == 1) if number < len(found) else None

    readline.set_completer(next_one)
    readline.set_completer_delims(" ")  # a slash is part of a word here
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
