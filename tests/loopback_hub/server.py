"""The Hub as a test holds it: starts, is filled, is made to fail, and is asked what happened."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .faults import Fault, take
from .log import Request, leaks
from .people import Account, everybody, made_up_token
from .repos import Commit, Repo, as_file
from .wire import Origin

# Settings of the person who runs the tests that would lead the client elsewhere, or give it another token.
_OTHERS = re.compile(r"(HF|HUGGING_?FACE)_.*|(HTTP|HTTPS|ALL)_PROXY", re.IGNORECASE)


class LoopbackHub:
    """A Hub for models at two origins of the loopback interface: `url` for the API, `storage_url` for large files.

    Use it as a context manager. Everything is in memory and gone with it. `accounts` are the people by label (see people.py),
    `repos` the repositories by id, `log` all requests, `part_bytes` the size of the parts in which larger files are sent (None:
    whole), `mistakes` what went wrong in the server itself.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.closing = threading.Event()
        self.accounts: dict[str, Account] = everybody()
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.mistakes: list[str] = []
        self.part_bytes: int | None = None
        self._origins = [Origin(self, "hub", port), Origin(self, "cdn", 0)]
        # Two names of the same machine: some clients (1.31) take another port of one name for the same origin, and send their
        # token there.
        self.url, self.storage_url = (f"http://{name}:{origin.server_port}"
                                      for name, origin in zip(("127.0.0.1", "localhost"), self._origins, strict=True))

    def __enter__(self) -> LoopbackHub:
        for origin in self._origins:
            threading.Thread(target=origin.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends at once, whatever is under way; a client that waits for an answer meets the end of its connection."""
        self.closing.set()
        for origin in self._origins:
            origin.end()

    # Who calls, and from where.

    def token(self, label: str) -> str:
        """The token of an account; for any other word, one of the right form that belongs to nobody."""
        return self.accounts[label].token if label in self.accounts else made_up_token(label)

    def account(self, headers: Mapping[str, str]) -> Account | None:
        """Whose token the headers carry; None where they carry none, or one that nobody has."""
        token = headers.get("authorization", "").removeprefix("Bearer ").strip()
        return next((account for account in self.accounts.values() if account.token == token), None)

    def environment(self, home: Path, token: str | None = "write", **more: str) -> dict[str, str]:
        """All variables for a program that is to meet this Hub and no other, with its files of the Hub's in `home`.

        `token` is the label of an account, another word for a token that nobody has, or None for nobody signed in. HF_TOKEN is
        empty then, which the client takes for none. Xet is left as it is.
        """
        kept = {name: value for name, value in os.environ.items() if not _OTHERS.fullmatch(name)}
        return {
            **kept, "HF_ENDPOINT": self.url, "HF_TOKEN": "" if token is None else self.token(token), "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", **more,
        }

    # What is there.

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, *, private: bool = False,
                 gated: str | bool = False, granted: tuple[str, ...] = ()) -> Repo:
        """A repository without a client; `granted` are the users who may read it if it is gated."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, private=private, author=repo_id.split("/")[0])
            repo.gated, repo.granted = "auto" if gated is True else gated, set(granted)
        if files:
            self.add_commit(repo_id, files)
        return repo

    def add_commit(self, repo_id: str, files: Mapping[str, bytes | None], *, branch: str = "main",
                   title: str = "somebody else's commit") -> Commit:
        """What somebody else changes meanwhile; None removes a file."""
        with self.lock:
            repo = self.repos[repo_id]
            now = dict(repo.at(branch).files)
            for path, data in files.items():
                if data is None:
                    del now[path]
                else:
                    now[path] = as_file(path, data)
            return repo.add_commit(branch, now, title, author="somebody")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Paths and contents."""
        with self.lock:
            return {path: file.data for path, file in self.repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The newest first; the last is the one that every repository begins with."""
        with self.lock:
            return list(self.repos[repo_id].history(revision))

    # What goes wrong.

    def fault(self, path: str, kind: str, **more: Any) -> Fault:
        """From now on, for calls whose path matches: see Fault and KINDS in faults.py. Earlier faults go first."""
        fault = Fault(path, kind, **more)
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """From now on nothing goes wrong; what is under way stays as it is."""
        with self.lock:
            self.faults.clear()

    # What happened.

    def requests(self, path: str = "", *, method: str = ".*", origin: str = ".*") -> list[Request]:
        """Requests whose path holds a match of `path` and whose method and origin match; in order of arrival."""
        with self.lock:
            return [request for request in self.log if re.search(path, request.path) and re.fullmatch(method, request.method)
                    and re.fullmatch(origin, request.origin)]

    def wait_for(self, path: str, *, method: str = ".*", origin: str = ".*", until: Callable[[Request], bool] = lambda _: True,
                 seconds: float = 30.0) -> Request:
        """The first request of that kind for which `until` holds, once it is there: to act while something is under way.

        Raises:
            TimeoutError: none came.
        """
        end = time.monotonic() + seconds
        with self.changed:
            while True:
                found = next(filter(until, self.requests(path, method=method, origin=origin)), None)
                if found is not None:
                    return found
                if time.monotonic() > end:
                    raise TimeoutError(f"no {method} of {path} within {seconds} s; there were:\n{self.transcript()}")
                # `until` may look at bytes that are counted without notice.
                self.changed.wait(0.02)

    def leaks(self) -> list[Request]:
        """Requests that carried a token where none belongs."""
        with self.lock:
            tokens = {account.token for account in self.accounts.values()}
            tokens |= {request.headers["authorization"].removeprefix("Bearer ") for request in self.log
                       if request.headers.get("authorization", "").removeprefix("Bearer ").strip()}
            return leaks(self.log, tokens)

    def transcript(self) -> str:
        """The log, a request a line, without secrets."""
        with self.lock:
            return "\n".join(map(str, self.log))

    # For the connections.

    def arrived(self, origin: str, method: str, path: str, query: str,
                headers: Mapping[str, str]) -> tuple[Request, Fault | None]:
        """Enters a request and picks its fault."""
        with self.changed:
            account, fault = self.account(headers), take(self.faults, method, path, origin)
            request = Request(
                len(self.log) + 1, time.time(), origin, method, path, query, "authorization" in headers,
                account.user if account else None, headers.get("range"), headers, fault=fault.kind if fault else None,
            )
            self.log.append(request)
            self.changed.notify_all()
            return request, fault

    def left(self, request: Request) -> None:
        """The call is over."""
        with self.changed:
            request.finished = True
            self.changed.notify_all()

    def signature(self, path: str) -> str:
        """What opens one address of the storage origin without a token."""
        return hashlib.sha256(f"{id(self)} {path}".encode()).hexdigest()

    def signed(self, path: str, *, origin: str | None = None) -> str:
        """Such an address."""
        return f"{origin or self.storage_url}{path}?X-Amz-Signature={self.signature(path)}"
