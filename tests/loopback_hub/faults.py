"""What can go wrong on the way, by the calls it befalls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

KINDS = {
    "status": "the call has no effect; `status`, `headers` and `message` are the answer",
    "drop": "the connection ends before the body is read",
    "drop_upload": "the connection ends after `size_bytes` of the request's body",
    "drop_download": "the connection ends after `size_bytes` of the answer's body",
    "lost_response": "the call has its effect; the connection ends without an answer",
    "delay": "the answer takes `seconds` longer, or, with `seconds=None`, never comes; the body is not read before",
    "stall_upload": "after `size_bytes` of the request's body, nothing is read for `seconds`, or ever",
    "stall_download": "after `size_bytes` of the answer's body, nothing is sent for `seconds`, or ever",
    "corrupt": "one byte of the answer's body, the one at `size_bytes` or the last, is flipped",
    "call": "`action` is called first, such as one in which somebody else commits; the call goes on",
}


@dataclass
class Fault:
    """One kind of trouble for calls whose method and path match; `times` of them, or all with None, after `skip` others.

    Connections that end do so by a reset, or, with `fin`, by half a close: what the server has sent arrives, then the end of the
    stream, while the client can still send. `applied` counts the calls that were hit.
    """

    path: str
    kind: str
    method: str = ".*"
    origin: str = ".*"
    times: int | None = 1
    skip: int = 0
    fin: bool = False
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected"
    size_bytes: int | None = None
    seconds: float | None = None
    action: Callable[[], object] | None = None
    applied: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault is called {self.kind!r}; there are {', '.join(KINDS)}")
        for pattern in (self.path, self.method, self.origin):
            re.compile(pattern)  # here, where the test that wrote it fails, and not in the server's thread
        if self.kind == "call" and self.action is None:
            raise ValueError("a call needs action=")

    @property
    def cut_bytes(self) -> int:
        """After how many bytes of a body it happens."""
        return 1 << 16 if self.size_bytes is None else self.size_bytes

    def matches(self, method: str, path: str, origin: str) -> bool:
        """Whether it is meant for such a call, be it spent or not."""
        return bool(re.fullmatch(self.method, method) and re.search(self.path, path) and re.fullmatch(self.origin, origin))


def take(faults: list[Fault], method: str, path: str, origin: str) -> Fault | None:
    """The fault that befalls this call, the first that is left for it; counts it as applied."""
    for fault in faults:
        if (fault.times is not None and fault.applied >= fault.times) or not fault.matches(method, path, origin):
            continue
        if fault.skip > 0:
            fault.skip -= 1
            continue
        fault.applied += 1
        return fault
    return None


def flipped(body: bytes, fault: Fault) -> bytes:
    """The body with one bit of one byte turned."""
    if not body:
        return body
    place = len(body) - 1 if fault.size_bytes is None else min(fault.size_bytes, len(body) - 1)
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1:]
