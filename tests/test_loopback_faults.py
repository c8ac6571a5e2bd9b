"""The faults of the loopback Hub: each does on the wire what its name says, and what the real client makes of some."""

import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest
from loopback_hub import LoopbackHub
from loopback_hub.clients import ask, commit_lines, run_client, small

LARGE = bytes(range(256)) * 12_000  # 3 MB

@pytest.fixture
def stored(hub):
    """An address of 3 MB at the storage origin."""
    repo = hub.add_repo("tester/one", {"w.bin": LARGE})
    return hub.signed(f"/lfs/{repo.number}/{hashlib.sha256(LARGE).hexdigest()}")


def raw_end(hub, request):
    """What a connection gives after `request`, and how it ends."""
    parts = urlsplit(hub.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(request)
        data = b""
        try:
            while piece := connection.recv(1 << 16):
                data += piece
        except ConnectionResetError:
            return data, "reset"
        return data, "end"


def test_fault_status(hub):
    fault = hub.fault("whoami", "status", status=429, headers={"Retry-After": "7"}, message="slower", times=2, skip=1)
    answers = [ask(hub, "GET", "/api/whoami-v2", token="read") for _ in range(4)]
    assert [answer[0] for answer in answers] == [200, 429, 429, 200] and fault.applied == 2
    assert answers[1][1]["Retry-After"] == "7" and json.loads(answers[1][2]) == {"error": "slower"}
    assert [request.fault for request in hub.log] == [None, "status", "status", None]


@pytest.mark.parametrize(("fin", "ends"), [(False, "reset"), (True, "end")])
def test_fault_drop_and_lost_response(hub, fin, ends):
    hub.add_repo("tester/one")
    lines = commit_lines(small("a", b"a"))
    request = (f"POST /api/models/tester/one/commit/main HTTP/1.1\r\nHost: x\r\nContent-Length: {len(lines)}\r\n"
               f"Authorization: Bearer {hub.token('write')}\r\n\r\n").encode() + lines
    hub.fault("/commit/", "drop", fin=fin)
    hub.fault("/commit/", "lost_response", fin=fin)
    hub.fault("/commit/", "drop_upload", size_bytes=10, fin=fin)
    for commits in (1, 2, 2):
        assert raw_end(hub, request) == (b"", ends)
        assert len(hub.commits("tester/one")) == commits
    assert [entry.received_bytes for entry in hub.log] == [0, len(lines), 10]
    assert [entry.status for entry in hub.log] == [0, 0, 0]


def test_half_a_close_lets_the_client_send_on(hub):
    hub.fault("whoami", "drop_upload", size_bytes=10, fin=True)
    request = f"POST /api/whoami-v2 HTTP/1.1\r\nHost: x\r\nContent-Length: {8 * len(LARGE)}\r\n\r\n".encode() + LARGE * 8
    assert raw_end(hub, request) == (b"", "end")


@pytest.mark.parametrize("fin", [False, True])
def test_fault_drop_download(hub, stored, fin):
    hub.fault("/lfs/", "drop_download", size_bytes=100_000, fin=fin)
    with pytest.raises(http.client.IncompleteRead if fin else ConnectionResetError) as caught:
        ask(hub, "GET", stored)
    assert not fin or len(caught.value.partial) == 100_000
    assert hub.requests("/lfs/")[0].sent_bytes == 100_000 and ask(hub, "GET", stored)[2] == LARGE


def test_fault_corrupt(hub, stored):
    hub.fault("/lfs/", "corrupt", size_bytes=1000)
    damaged = ask(hub, "GET", stored)[2]
    assert [place for place, (a, b) in enumerate(zip(damaged, LARGE, strict=True)) if a != b] == [1000]
    assert ask(hub, "GET", stored)[2] == LARGE


def test_fault_delay_stall_and_call(hub, stored):
    hub.fault("whoami", "delay", seconds=0.3)
    hub.fault("/lfs/", "stall_download", size_bytes=1000, seconds=0.3)
    for method, url in (("GET", "/api/whoami-v2"), ("GET", stored)):
        start = time.monotonic()
        assert ask(hub, method, url, token="read" if "whoami" in url else None)[0] == 200
        assert time.monotonic() - start >= 0.3
    hub.fault("/commit/", "call", action=lambda: hub.add_commit("tester/one", {"b": b"first"}))
    parent = hub.commits("tester/one")[0].oid
    lines = commit_lines(small("a", b"a"), parent=parent)
    assert ask(hub, "POST", "/api/models/tester/one/commit/main", lines, token="write")[0] == 412
    assert hub.commits("tester/one")[0].title == "somebody else's commit"
    with pytest.raises(ValueError, match="no fault is called"):
        hub.fault("/", "flood")


@pytest.mark.parametrize("kind", ["delay", "stall_upload", "stall_download"])
def test_a_server_that_never_answers_ends_with_the_test(tmp_path, kind):
    start, threads = time.monotonic(), threading.active_count()
    with LoopbackHub() as hub:
        repo = hub.add_repo("tester/one", {"w.bin": LARGE})
        address = hub.signed(f"/lfs/{repo.number}/{hashlib.sha256(LARGE).hexdigest()}")
        hub.fault("/lfs/", kind, seconds=None)
        method = "GET" if kind == "stall_download" else "PUT"
        script = ("import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1], method=sys.argv[2],"
                  " data=bytes(3_072_000) if sys.argv[2] == 'PUT' else None)).read()")
        waiting = subprocess.Popen([sys.executable, "-c", script, address, method], stderr=subprocess.PIPE,
                                   env=hub.environment(tmp_path))
        half = 0 if kind == "delay" else 1 << 16
        request = hub.wait_for("/lfs/", until=lambda request: max(request.received_bytes, request.sent_bytes) >= half)
        time.sleep(0.2)
        assert waiting.poll() is None and not request.finished
        with pytest.raises(TimeoutError, match="/lfs/"):
            hub.wait_for("/nowhere", seconds=0.1)
        idle = http.client.HTTPConnection("127.0.0.1", urlsplit(hub.url).port, timeout=5)
        idle.request("GET", "/api/whoami-v2")
        assert idle.getresponse().read() and idle.sock is not None
    assert idle.sock.recv(1) == b""
    idle.close()
    waiting.communicate(timeout=10)
    while threading.active_count() > threads and time.monotonic() - start < 10:
        time.sleep(0.02)
    assert waiting.returncode != 0 and threading.active_count() <= threads and time.monotonic() - start < 10
    assert hub.files("tester/one")["w.bin"] == LARGE


def test_the_client_overcomes_broken_transfers(hub, tmp_path):
    """A reset and half a close in the middle of an upload, and half a close in that of a download, which is resumed."""
    data = LARGE * 4  # the client writes what it reads in pieces of 10 MiB, and resumes after the last whole one
    (tmp_path / "w.bin").write_bytes(data)
    hub.add_repo("tester/one")
    for fin in (False, True):
        hub.fault("/lfs/", "drop_upload", method="PUT", size_bytes=1_000_000, fin=fin)
    hub.fault("/lfs/", "drop_download", method="GET", size_bytes=11 << 20, fin=True)
    found = run_client(hub, tmp_path / "home", """
api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo="w.bin", repo_id="tester/one")
found["path"] = hf_hub_download("tester/one", "w.bin")
""", tmp_path / "w.bin")
    with open(found["path"], "rb") as file:
        assert file.read() == hub.files("tester/one")["w.bin"] == data
    puts, gets = hub.requests("/lfs/", method="PUT"), hub.requests("/lfs/", method="GET")
    assert [(put.received_bytes, put.status) for put in puts] == [(1_000_000, 0), (1_000_000, 0), (len(data), 200)]
    assert [get.range for get in gets] == [None, f"bytes={10 << 20}-"]


def test_the_client_waits_for_as_long_as_it_is_told(hub, tmp_path):
    hub.add_repo("tester/one")
    hub.fault("/preupload/", "status", status=429, headers={"Retry-After": "1"})
    hub.fault("/commit/", "lost_response")
    found = run_client(hub, tmp_path / "home", """
def push():
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id="tester/one")
found["first"], found["second"] = name_of(push), name_of(push)
""")
    assert found["first"] == ["ReadError", None] and found["second"] == ["nothing", None]
    refused, after = hub.requests("/preupload/")[:2]
    assert refused.status == 429 and after.status == 200 and after.time_seconds - refused.time_seconds >= 1
    assert len(hub.commits("tester/one")) == 2 and len(hub.requests("/commit/")) == 1
