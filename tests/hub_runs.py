"""Pushes that something happens to: a finished run, the real program against a Hub of its own, and what must hold afterwards."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from faults.runner import Done
from loopback_hub import LoopbackHub

# More than the buffers of a connection hold, so that an upload can really be broken in its middle.
WEIGHTS_BYTES = 12 * 2**20
# A program that was started in a shell's background ignores Ctrl-C, and so does what it starts; these do not.
_INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
_PUSH = f"{_INTERRUPTIBLE}import sys\nfrom qlora.cli import main\nsys.exit(main())"
_FETCH = f"""{_INTERRUPTIBLE}import json, sys
from qlora.errors import QloraError
from qlora.hub.fetch import find_adapter
from qlora.hub.patience import Patience
from qlora.progress import Progress
class Lines(Progress):
    def note(self, text): print(text, file=sys.stderr)
try:
    patience = Patience(float(sys.argv[2]) * 60, tell=lambda line: print(line, file=sys.stderr))
    print(json.dumps(str(find_adapter(sys.argv[1], patience=patience, progress=Lines()).folder)))
except QloraError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
"""


def finished_run(folder: Path, small_model: Path, rows: Path) -> Path:
    """Train two steps; then give the adapter one tensor more, which makes it large enough to be broken off in the middle."""
    import torch
    from safetensors.torch import load_file, save_file

    from qlora.cli import main

    recipe = {
        "model": {"base": str(small_model)}, "data": {"path": str(rows), "validation": 0.2}, "memory": {"device": "cpu"},
        "train": {"max_steps": 2, "batch": 8, "sample_rows": 2}, "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    weights = folder / "run" / "adapter" / "adapter_model.safetensors"
    ballast = torch.arange(WEIGHTS_BYTES // 4, dtype=torch.int32).view(torch.float32)
    save_file({**load_file(weights), "base_model.model.ballast.lora_A.weight": ballast}, weights, metadata={"format": "pt"})
    return folder / "run"


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of the last change of every file below the folder."""
    return {str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


class Running:
    """A process under way; it is killed where it outlives its bound, which no push may."""

    def __init__(self, scene: Scene, command: Sequence[str], environment: Mapping[str, str], within: float):
        self._scene, self._within, self._started = scene, within, time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def send(self, number: signal.Signals) -> None:
        """A signal; from then on the process has a few seconds."""
        self._within = time.monotonic() - self._started + 5
        self.process.send_signal(number)

    def wait(self) -> Done:
        """How it ended, and that it left the run folder alone and told nobody a token.

        Raises:
            AssertionError: it did not end in time, or one of these does not hold.
        """
        left = self._within - (time.monotonic() - self._started)
        try:
            out, err = self.process.communicate(timeout=max(0.1, left))
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"still running after {self._within:.0f} s:\n{err}\n{self._scene.hub.transcript()}") from None
        done = Done(self.process.returncode, out, err, time.monotonic() - self._started)
        self._scene.check(done)
        return done


class Scene:
    """One Hub, the run, and a home for the client's files. Several scenes share one run folder, which nobody may change."""

    def __init__(self, hub: LoopbackHub, run: Path, before: Mapping[str, tuple[str, int]], home: Path):
        self.hub, self.run, self.home, self._before = hub, run, home, before
        self.repo, self.token, self.endpoint, self.base = "tester/it", "write", hub.url, None

    def push(self, *, minutes: float, within: float) -> Running:
        """Begin `qlora push`; it may take so many seconds."""
        words = ["push", str(self.run), self.repo, "--max-minutes", str(minutes)]
        words += ["--base-model", self.base] if self.base else []
        return Running(self, [sys.executable, "-c", _PUSH, *words], self._environment(), within)

    def fetch(self, *, minutes: float, within: float) -> Running:
        """Begin to fetch the adapter; it prints the folder that it is in."""
        return Running(self, [sys.executable, "-c", _FETCH, self.repo, str(minutes)], self._environment(), within)

    def upload_under_way(self, size_bytes: int = 1) -> None:
        """Wait until a large file is on its way."""
        self.hub.wait_for("/lfs/", method="PUT", until=lambda request: request.received_bytes >= size_bytes)

    def _environment(self) -> dict[str, str]:
        return self.hub.environment(self.home, self.token or None, HF_ENDPOINT=self.endpoint, OMP_NUM_THREADS="1", COLUMNS="200")

    @property
    def num_commits(self) -> int:
        """Those after the one that every repository begins with; 0 where there is no repository."""
        return len(self.hub.commits(self.repo)) - 1 if self.repo in self.hub.repos else 0

    def expected(self) -> dict[str, bytes]:
        """What a push of the run brings, by path."""
        return _expected(self.run, self.repo)

    def check(self, done: Done) -> None:
        """What holds after every push, however it ended."""
        assert "Traceback" not in done.err, done.err
        assert digests(self.run) == self._before, "the run folder was changed"
        assert not self.hub.mistakes
        assert not self.hub.leaks(), self.hub.leaks()
        tokens = [self.hub.token(label) for label in (*self.hub.accounts, "nobody's")]
        for token in tokens:
            assert token not in done.out + done.err
        for path in (path for path in self.home.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert not [token for token in tokens if token.encode() in content], path
        # A repository that is torn would hold some of the files.
        if self.repo in self.hub.repos:
            now = self.hub.files(self.repo)
            missing = set(self.expected()) - set(now)
            assert not missing or missing == set(self.expected()), f"torn: {missing}"

    def check_whole(self, *, besides: Sequence[str] = ()) -> None:
        """Every file of the run is there, byte for byte, and nothing else but what is named."""
        now, expected = self.hub.files(self.repo), self.expected()
        assert {path: data for path, data in now.items() if path in expected} == expected
        assert set(now) - set(expected) == {".gitattributes", *besides}
        assert now["adapter_model.safetensors"] == (self.run / "adapter" / "adapter_model.safetensors").read_bytes()


@cache
def _expected(run: Path, repo: str) -> dict[str, bytes]:
    from qlora.hub.push import order_for, pack

    return {item.path: item.content for item in pack(order_for(run, repo)).items}


class Flipper:
    """A line on which one bit of the first large body is turned over, once: a forwarder before a server."""

    def __init__(self, url: str, at_bytes: int = 2**20):
        self.flipped = False
        outer, address = self, (url.rpartition(":")[0].partition("//")[2], int(url.rpartition(":")[2]))

        class Forward(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(address) as there:
                    back = threading.Thread(target=pump, args=(there, self.request), daemon=True)
                    back.start()
                    pump(self.request, there, turn=True)
                    back.join()

        def pump(source: socket.socket, sink: socket.socket, *, turn: bool = False) -> None:
            seen = 0
            try:
                while data := source.recv(1 << 16):
                    seen += len(data)
                    if turn and seen > at_bytes and not outer.flipped:
                        outer.flipped = True
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:  # either end went away
                pass

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward)
        self._server.daemon_threads = True
        self.url = f"http://localhost:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._server.shutdown()
        self._server.server_close()


def dead_address() -> str:
    """Where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def turned(data: bytes) -> bytes:
    """The same with one bit in the middle turned over."""
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]

