"""A terminal for tests of `qlora chat`: the lines that are typed, and what was seen."""

from qlora.chatting import Conversation, Terminal, talk


class Fake:
    """Lines may be KeyboardInterrupt: Ctrl-C at the prompt. After `stop_after` pieces of answers it is pressed once."""

    def __init__(self, *lines, interactive=True, stop_after=None):
        self.lines, self.seen, self.notes, self.asides, self.stop_after = list(lines), [], [], [], stop_after
        self.terminal = Terminal(self.read, self.write, self.notes.append, interactive, self.asides.append)

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def write(self, text):
        self.seen.append(text)
        if self.stop_after is not None and len(self.seen) > self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt

    @property
    def answers(self):
        """What was seen, without the line end that follows Ctrl-D."""
        seen = "".join(self.seen)
        return seen.removesuffix("\n") if self.terminal.interactive else seen


def conversation(adapted, *lines, interactive=True, stop_after=None, **settings):
    """A conversation of these lines, and the terminal that it was held on."""
    fake = Fake(*lines, stop_after=stop_after, interactive=interactive)
    talked = Conversation(adapted, **{"max_tokens": 12, **settings})
    talk(talked, fake.terminal)
    return talked, fake
