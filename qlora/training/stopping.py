"""Ctrl-C and termination signals: the step under way is finished and saved, then the run ends. A second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; what a system or a scheduler sends before it kills; and what a closed terminal sends.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopper:
    """Within it, a first signal asks the run to stop after this step; a second Ctrl-C is a KeyboardInterrupt.

    Args:
        tell: told one line once the request has been noticed. Not by the handler itself: it may have interrupted a print.

    Attributes:
        requested: the signal that came, None while none has.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self.requested: signal.Signals | None = None
        self._told = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers nowhere else
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and shells' background jobs, mean it
                    self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number)

    def look(self) -> bool:
        """Whether the run is to stop; says so the first time."""
        if self.requested is not None and not self._told:
            self._told = True
            self.tell("Stopping after this step, with a checkpoint. Ctrl-C again stops now and leaves the last checkpoint as it is.")
        return self.requested is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + (self.requested or signal.SIGINT)
