"""One connection: reads calls, lets faults happen, sends answers."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from .access import no_repository
from .calls import Answer, Call, Refusal, refused
from .faults import Fault, flipped
from .log import KEPT_BYTES, Request
from .table import find

if TYPE_CHECKING:
    from .server import LoopbackHub

_CHUNK_BYTES = 1 << 16
# After half a close the client may still send; this long is listened, so that the rest of a large file does not meet a reset.
_LINGER_SECONDS = 10.0
# A reset throws away what the client has not read yet; this long it gets to read what was sent before.
_BEFORE_RESET_SECONDS = 0.05


class Cut(Exception):
    """The connection is to end here."""


class Origin(ThreadingHTTPServer):
    """One of the two servers, `hub` or `cdn`. Connections that are open are known, so that closing ends them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, name: str, port: int) -> None:
        self.hub, self.name = hub, name
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed break connections, as tests mean them to. The rest is a mistake in here."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):  # ValueError: reading from a connection closed meanwhile
            super().handle_error(request, client_address)

    def end(self) -> None:
        """Stops listening and ends what is open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """Calls of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; together they would wait 40 ms for an acknowledgement
    server: Origin

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """The log is kept by the hub."""

    def serve(self) -> None:
        """One call, from its headers on."""
        hub = self.server.hub
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request, fault = hub.arrived(self.server.name, self.command, unquote(url.path), url.query, headers)
        try:
            if fault and fault.kind == "drop":
                raise Cut
            if fault and fault.kind == "call":
                fault.action()
            if fault and fault.kind == "delay":
                self._wait(fault)
            body = b"".join(self._body(request, fault))
            request.body = body[:KEPT_BYTES]
            answer = self._answer(request, fault, url.path, body)
            if fault and fault.kind == "lost_response":
                raise Cut
            self._send(request, answer, fault)
        except Cut:
            self._end(fin=fault is not None and fault.fin)
        except OSError:  # the client went away
            self.close_connection = True
        finally:
            hub.left(request)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _wait(self, fault: Fault) -> None:
        """Nothing happens for a while; the end of the server ends it."""
        if self.server.hub.closing.wait(fault.seconds) or fault.seconds is None:
            raise Cut

    def _body(self, request: Request, fault: Fault | None) -> Iterator[bytes]:
        """The body in pieces, up to where a fault lets it come."""
        limited = fault is not None and fault.kind in ("drop_upload", "stall_upload")
        limit = fault.cut_bytes if limited else None
        for left in self._pieces():
            while left:
                if limit is not None and request.received_bytes >= limit:
                    limit = self._stop_reading(fault)
                most = min(left, _CHUNK_BYTES) if limit is None else min(left, _CHUNK_BYTES, limit - request.received_bytes)
                data = self.rfile.read1(most)
                if not data:
                    raise ConnectionAbortedError("the client went away")
                left -= len(data)
                request.received_bytes += len(data)
                yield data
        if limit is not None:  # a body shorter than the limit: what is to happen happens at its end
            self._stop_reading(fault)

    def _pieces(self) -> Iterator[int]:
        """The sizes of the parts that a body comes in: one of known length, or chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            yield int(self.headers.get("Content-Length") or 0)
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _stop_reading(self, fault: Fault) -> None:
        if fault.kind == "stall_upload":
            self._wait(fault)
        else:
            raise Cut

    def _answer(self, request: Request, fault: Fault | None, raw_path: str, body: bytes) -> Answer:
        hub = self.server.hub
        if fault and fault.kind == "status":
            return refused(Refusal(fault.status, fault.message, headers=fault.headers))
        try:
            with hub.lock:
                return self._routed(request, raw_path, body)
        except Refusal as refusal:
            return refused(refusal)
        except Exception as error:  # a mistake in here must reach the test, and the client must not wait for an answer
            hub.mistakes.append(f"{request}: {type(error).__name__}: {error}")
            return refused(Refusal(500, f"A mistake in the loopback hub: {type(error).__name__}: {error}"))

    def _routed(self, request: Request, raw_path: str, body: bytes) -> Answer:
        hub, origin = self.server.hub, self.server.name
        account = hub.account(request.headers)
        if origin == "hub" and request.authorised and account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        found = find(origin, request.method, raw_path)
        query = dict(parse_qsl(request.query))
        call = Call(hub, request.method, request.path, found[1] if found else {}, query, request.headers, body, account)
        if found is None:
            models = raw_path.startswith("/api/models/") or "/resolve/" in raw_path
            raise no_repository(call) if models else Refusal(404, f"No route for {request.method} {request.path}")
        return found[0](call)

    def _send(self, request: Request, answer: Answer, fault: Fault | None) -> None:
        body = flipped(answer.body, fault) if fault and fault.kind == "corrupt" else answer.body
        limit = fault.cut_bytes if fault and fault.kind in ("drop_download", "stall_download") else None
        self.send_response(answer.status)
        for name, value in {"X-Request-Id": f"request-{request.number}", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        request.status = answer.status
        if self.command == "HEAD":
            return
        for start in range(0, len(body), _CHUNK_BYTES):
            data = body[start:start + _CHUNK_BYTES]
            if limit is not None and start + len(data) > limit:
                self._write(request, data[:limit - start])
                if fault.kind == "drop_download":
                    raise Cut
                self._wait(fault)
                data, limit = data[limit - start:], None
            self._write(request, data)

    def _write(self, request: Request, data: bytes) -> None:
        self.wfile.write(data)
        request.sent_bytes += len(data)

    def _end(self, *, fin: bool) -> None:
        """Half a close, or a reset."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            if not fin:
                time.sleep(_BEFORE_RESET_SECONDS)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # it holds the connection open
                self.connection.close()
                return
            self.connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + _LINGER_SECONDS
            self.connection.settimeout(0.2)
            while time.monotonic() < until and not self.server.hub.closing.is_set():
                with contextlib.suppress(TimeoutError):
                    if not self.connection.recv(_CHUNK_BYTES):
                        return
