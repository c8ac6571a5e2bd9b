"""What a route gets and gives: a call, an answer, a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from .people import Account
    from .server import LoopbackHub


class Refusal(Exception):
    """An answer that is an error. `code` becomes X-Error-Code, which the client turns into its own exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        line = " ".join(message.split()).encode("latin-1", "replace").decode("latin-1")  # what a header can hold
        self.headers = {"X-Error-Message": line, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Answer:
    """A status, headers and a body of bytes."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One request as its route sees it: `names` are the named parts of the path, unquoted."""

    hub: LoopbackHub
    method: str
    path: str
    names: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None

    def json(self) -> Any:
        """The body as JSON; {} where it is empty."""
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refusal(400, f"The body is not JSON: {error}") from None

    def form(self) -> dict[str, list[str]]:
        """The body as a form, or as JSON whose values are lists."""
        if "json" in self.headers.get("content-type", ""):
            return {key: value if isinstance(value, list) else [value] for key, value in self.json().items()}
        return parse_qs(self.body.decode())


def as_json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer that carries a document."""
    return Answer(status, json.dumps(document, default=str).encode(), {"Content-Type": "application/json", **(headers or {})})


def refused(refusal: Refusal) -> Answer:
    """The answer to the client for a refusal."""
    return as_json({"error": refusal.message}, refusal.status, refusal.headers)


def content(data: bytes, headers: Mapping[str, str], wanted: str | None) -> Answer:
    """Bytes, or the range of them that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or match.groups() == ("", ""):
        return Answer(200, data, headers)
    size = len(data)
    if match[1] == "":  # the last so many bytes
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    if first > last:
        raise Refusal(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Answer(206, data[first:last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})
