"""Two clients: the real one in a process of its own, and calls by hand."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
import sys
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .server import LoopbackHub

_PRELUDE = """
import json, os, sys
os.environ["HF_HUB_DISABLE_XET"] = "1"
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api, found = HfApi(), {}

def name_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    return "nothing", None
"""


def run_client(hub: LoopbackHub, home: Path, script: str, *args: object, token: str | None = "write") -> dict[str, Any]:
    """What the real client found: `script` fills the dict `found`, with `api`, an HfApi, and `name_of`, which names an error."""
    environment = hub.environment(home, token)
    command = [sys.executable, "-c", f"{_PRELUDE}\n{script}\nprint(json.dumps(found))", *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + hub.transcript()
    return json.loads(done.stdout.splitlines()[-1])


def ask(hub: LoopbackHub, method: str, url: str, body: str | bytes | None = None, *, token: str | None = None,
        headers: Mapping[str, str] | None = None) -> tuple[int, Message, bytes]:
    """One call, as the account `token` names: status, headers, body."""
    parts = urlsplit(url if url.startswith("http") else hub.url + url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    headers = {**(headers or {}), **({"Authorization": f"Bearer {hub.token(token)}"} if token else {})}
    try:
        connection.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def commit_lines(*operations: tuple[str, dict[str, Any]], parent: str | None = None) -> bytes:
    """The body of a commit of operations, each its key and its value."""
    header = {"summary": "by hand", "description": "", **({"parentCommit": parent} if parent else {})}
    lines = [{"key": "header", "value": header}, *({"key": key, "value": value} for key, value in operations)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def small(path: str, data: bytes) -> tuple[str, dict[str, Any]]:
    """The operation that adds a small file."""
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}
