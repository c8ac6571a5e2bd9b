"""Every request that arrived, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Of bodies, this much is kept: all of any commit in a test, the beginning of a large file.
KEPT_BYTES = 1 << 20


@dataclass
class Request:
    """One request. Numbers count from 1; times are seconds of the system's clock; sizes are those of bodies.

    `status` stays 0 where no answer was sent. `user` is the name that the token belongs to. The token itself, and whatever else
    was sent, is in `headers` and `body`, which do not show when a request is printed.
    """

    number: int
    time_seconds: float
    origin: str
    method: str
    path: str
    query: str
    authorised: bool
    user: str | None
    range: str | None
    headers: Mapping[str, str] = field(repr=False)
    status: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    fault: str | None = None
    finished: bool = False
    body: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        who = self.user or ("unknown token" if self.authorised else "nobody")
        query = f"?{self.query}" if self.query else ""
        return (f"{self.number:4d} {self.origin:3s} {self.status or '---'} {self.method} {self.path}{query} by {who},"
                f" {self.received_bytes} bytes in, {self.sent_bytes} out"
                + (f", range {self.range}" if self.range else "") + (f", fault: {self.fault}" if self.fault else ""))


def leaks(log: Iterable[Request], tokens: Iterable[str]) -> list[Request]:
    """Requests that carried a token where none belongs: to the storage origin, or elsewhere than in the Authorization header."""
    known = [token.encode() for token in tokens]

    def holds(text: bytes) -> bool:
        return any(token in text for token in known)

    found = []
    for request in log:
        others = "\n".join(f"{name}: {value}" for name, value in request.headers.items() if name != "authorization")
        outside = holds(f"{request.path}\n{request.query}\n{others}".encode()) or holds(request.body)
        if outside or (request.origin != "hub" and "authorization" in request.headers):
            found.append(request)
    return found
