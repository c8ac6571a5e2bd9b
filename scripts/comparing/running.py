"""Processes of contenders: started one after the other, told in turns to go on, and ended."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparing.contenders import Contender
from comparing.work import Work

WORKER = (sys.executable, str(Path(__file__).with_name("worker.py")))
_LAST_LINES = 3


class Broken(Exception):
    """A contender's process ended, or said nothing for too long; the message says what it printed last."""


@dataclass
class Process:
    """A contender that trains as far as it is told.

    Attributes:
        found: what it has answered, in the form that `comparing.tables.row_of` reads.
    """

    contender: Contender
    child: subprocess.Popen[bytes]
    log: Path
    timeout: float
    asked_at: float
    found: dict[str, Any] = field(default_factory=lambda: {"blocks": []})
    pending: bytes = b""

    def start(self) -> None:
        """Wait for its first step.

        Raises:
            Broken: there was none.
        """
        self.found["imported"] = self._answer("imported")["seconds"]
        built = self._answer("built")
        self.found.update(built=built["seconds"], stages=built.get("stages", {}))
        first = self._answer("block")["steps"]
        self.found.update(first=first, first_step=first[0]["ended"])

    def train(self, num_steps: int) -> None:
        """Let it do a block.

        Raises:
            Broken: it did not.
        """
        self._tell(f"steps {num_steps}")
        self.found["blocks"].append(self._answer("block")["steps"])

    def end(self) -> None:
        """Let it go; what it has taken of the machine's memory is known then."""
        try:
            self._tell("stop")
            self.found["peak_rss_bytes"] = self._answer("end")["peak_rss_bytes"]
        finally:
            self.kill()

    def memory(self) -> None:
        """The answer of a process that was started to measure tensors."""
        self._answer("imported")
        self.found["memory"] = {name: value for name, value in self._answer("memory").items() if name != "event"}
        self.kill()

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # the last word was not read any more

    def _tell(self, word: str) -> None:
        try:
            self.child.stdin.write(f"{word}\n".encode())
            self.child.stdin.flush()
        except BrokenPipeError:
            raise Broken(self._last_words()) from None

    def _answer(self, event: str) -> dict[str, Any]:
        """Its next line, which must be of this event."""
        until = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise Broken(f"no answer within {self.timeout:.0f} s")
                piece = os.read(self.child.stdout.fileno(), 2**16)
                if not piece:
                    raise Broken(self._last_words())
                self.pending += piece
        line, _, self.pending = self.pending.partition(b"\n")
        answer = json.loads(line)
        assert answer["event"] == event, f"{answer['event']} in the place of {event}"
        return answer

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"ended with {self.child.wait()}: {' / '.join(lines[-_LAST_LINES:])[-300:]}"


def open_process(
    contender: Contender, work: Work, environment: Mapping[str, str], timeout: float, *, meter: bool = False,
    worker: tuple[str, ...] = WORKER,
) -> Process:
    """Start a contender's process.

    Args:
        environment: beside the contender's own variables.
        timeout: seconds within which each answer must come.
        meter: measure tensors instead of training block by block.
        worker: the command that is run, to which the words of `comparing.worker` are added.
    """
    log = Path(work.folder) / f"{contender.name}{'-meter' if meter else ''}.log"
    asked_at = time.monotonic()
    words = [*worker, contender.name, "--work", json.dumps(work.to_json()), "--asked-at", repr(asked_at),
             *(["--meter"] if meter else [])]
    with log.open("wb") as file:
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, bufsize=0,
                                 env={**os.environ, **environment, **contender.environment})
    return Process(contender, child, log, timeout, asked_at)
