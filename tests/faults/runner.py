"""Start runs of the program, watch them, and end them in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]

# A function of `faults.injections` and its arguments.
Fault = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Done:
    """How a run ended. `code` is the exit code, negative for the signal that ended it."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def told(self) -> str:
        """stderr without the plan: for messages of tests."""
        return f"exit code {self.code}\n{self.err.rpartition('Run folder:')[2]}"

    @property
    def shown(self) -> str:
        """Both streams with line breaks as spaces, to look for words in: a terminal breaks lines anywhere."""
        return " ".join(f"{self.out}\n{self.err}".split())


class Process:
    """A run under way."""

    def __init__(self, zygote: Zygote, pid: int, out: Path, err: Path):
        self.pid = pid
        self._zygote, self._out, self._err = zygote, out, err
        self._started = time.perf_counter()
        self._code: int | None = None

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._err.read_text(encoding="utf-8", errors="replace") if self._err.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self, seconds: float = 0) -> int | None:
        """The exit code, negative for a signal; None if it still runs after so long."""
        if self._code is None:
            self._code = self._zygote.ask({"do": "wait", "pid": self.pid, "seconds": seconds})["code"]
        return self._code

    def wait_for(self, condition: str | Callable[[], Any], timeout: float = 60) -> None:
        """Until the text is on stderr, or the function says yes.

        Raises:
            AssertionError: it ended first, or it took too long.
        """
        end = time.monotonic() + timeout
        holds = (lambda: condition in self.err) if isinstance(condition, str) else condition
        while not holds():
            ended = self.poll()
            assert ended is None or holds(), f"ended with {ended} before {condition}:\n{self.err}"
            assert time.monotonic() < end, f"{condition} did not come within {timeout} s:\n{self.err}"
            time.sleep(0.005)

    def wait(self, timeout: float = 120) -> Done:
        """How it ended.

        Raises:
            AssertionError: it still runs after `timeout` seconds; it is killed then, because a run must never hang.
        """
        if self.poll(timeout) is None:
            self.kill()
            self.poll(10)
            raise AssertionError(f"still running after {timeout} s:\n{self.err}")
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err))
        return Done(self._code, out, err, time.perf_counter() - self._started)


class Zygote:
    """The warm parent. `home` holds the streams of its runs."""

    def __init__(self, home: Path):
        self._home, self._num_runs = home, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(), cwd=home, start_new_session=True,
        )
        assert "ready" in self._read()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, f"the warm parent has ended with {self._process.wait(10)}"
        return json.loads(line)

    def start(
        self, argv: Sequence[str | Path], *, faults: Sequence[Fault] = (), cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Begin `qlora ARGV`."""
        self._num_runs += 1
        out, err = (self._home / f"{self._num_runs}.{kind}" for kind in ("out", "err"))
        answer = self.ask({
            "do": "start", "argv": [str(word) for word in argv], "cwd": str(cwd or self._home), "env": dict(env or {}),
            "out": str(out), "err": str(err), "faults": [[name, dict(values)] for name, values in faults],
        })
        return Process(self, answer["pid"], out, err)

    def run(self, argv: Sequence[str | Path], *, timeout: float = 120, **start: Any) -> Done:
        """`start`, then `wait`."""
        return self.start(argv, **start).wait(timeout)

    def close(self) -> None:
        """End it, and every run that is left."""
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def environment() -> dict[str, str]:
    """What makes two runs the same, and keeps the parent at one thread; the cache is that of the tests."""
    own = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "COLUMNS": "200", "PYTHONPATH": str(_TESTS),
        # pyarrow's allocator would start a thread of its own as it loads.
        "ARROW_DEFAULT_MEMORY_POOL": "system", "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    paths = [str(_TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
