"""The faults of the Hub, a row each: what is arranged, how a push or a download ends, and in how long at most."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

from hub_runs import Done, Flipper, Running, Scene, dead_address, turned

PUT = {"path": "/lfs/", "method": "PUT", "origin": "cdn"}
EVERY_CALL = {
    "whoami": {"path": "/whoami-v2"}, "the look": {"path": "/api/models/.*/revision/main", "method": "GET"},
    "create": {"path": "/repos/create"}, "preupload": {"path": "/preupload/"},
        "the batch of large files": {"path": "/objects/batch"},
    "PUT of a file": PUT, "verify of a file": {"path": "/objects/verify"}, "validate-yaml": {"path": "/validate-yaml"},
    "commit": {"path": "/commit/main"},
}
COMMIT, CREATE, WHOAMI, PREUPLOAD, LOOK = (EVERY_CALL[name] for name in ("commit", "create", "whoami", "preupload", "the look"))
FINISH = "To finish the push: qlora push"
SHORT = 0.08  # minutes; a push that nothing happens to takes one second or two
_ARRIVES, _COMES = "arrives", "comes, checked"
_AT_LIMIT, _AT_LIMIT_2 = "3: gives up; {limit:.0f} s were allowed", "2: gives up; {limit:.0f} s were allowed"
_TOO_LONG, _UNTOUCHED = "3: says at once that this is longer than it may take", "2: before anything is made or sent"


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        name, outcome: as the table says them; {limit} stands for the seconds of --max-minutes.
        arrange: called with the scene before the push.
        code, says: its exit code, and what stderr must hold.
        during: called with the scene and the running process.
        mend: called before the second try; faults are gone then, token and address are right.
        minutes: for --max-minutes; seconds: until the push must have ended.
        commits: after the first try and after the second; besides: files of others.
        check: called with the scene and how the first try ended.
        second: what the table says of the second try, where that is not the usual.
        fetches: it is a download, of a run that has been pushed before.
    """

    name: str
    outcome: str
    arrange: Callable[[Scene], object]
    code: int = 0
    says: tuple[str, ...] = ()
    during: Callable[[Scene, Running], object] | None = None
    mend: Callable[[Scene], object] | None = None
    minutes: float = 2.0
    seconds: float = 45.0
    commits: tuple[int, int] | None = None
    besides: tuple[str, ...] = ()
    check: Callable[[Scene, Done], object] | None = None
    long: bool = False
    second: str = ""
    fetches: bool = False


def fault(where: dict[str, str], kind: str, **more) -> Callable[[Scene], object]:
    return lambda scene: scene.hub.fault(kind=kind, **where, **more)


def busy(where: dict[str, str], status: int = 500, times: int | None = None, **more) -> Callable[[Scene], object]:
    return fault(where, "status", status=status, times=times, **more)


def asking(where: dict[str, str], status: int = 429, **headers: str) -> Callable[[Scene], object]:
    return busy(where, status, 1, headers={name.replace("_", "-"): value for name, value in headers.items()})


def all_of(*arrangements: Callable[[Scene], object]) -> Callable[[Scene], object]:
    return lambda scene: [arrange(scene) for arrange in arrangements]


def with_(**values) -> Callable[[Scene], object]:
    return lambda scene: [setattr(scene, name, value) for name, value in values.items()]


def in_parts(scene: Scene) -> None:
    scene.hub.part_bytes = 4 * 2**20


def waited(path: str, seconds: float) -> Callable[[Scene, Done], None]:
    """The second of two calls came so long after the first."""
    def check(scene: Scene, done: Done) -> None:
        first, second = (request.time_seconds for request in scene.hub.requests(path)[:2])
        assert seconds - 0.1 <= second - first < seconds + 3
    return check


def sent_in_parts(scene: Scene, done: Done) -> None:
    assert len({request.path for request in scene.hub.requests("/lfs/.*/[0-9]+$", method="PUT")}) == 4


def tried(path: str, times: int) -> Callable[[Scene, Done], None]:
    def check(scene: Scene, done: Done) -> None:
        assert len(scene.hub.requests(path)) == times, scene.hub.transcript()
    return check


def not_even_asked(scene: Scene, done: Done) -> None:
    """Nothing but questions went to the server."""
    assert {request.method for request in scene.hub.log} <= {"GET", "HEAD"}


# --- rows --------------------------------------------------------------------------------------------------------------

_DATE = {"Retry_After": format_datetime(datetime.now(timezone.utc) + timedelta(days=365), usegmt=True)}
PASSING = [
    Row("500 once from each of nine calls", _ARRIVES, all_of(*(busy(where, times=1) for where in EVERY_CALL.values())),
        says=("Trying again in",)),
    Row("500 twice from whoami and from the commit", f"{_ARRIVES}; waits 1 and 2 s",
        all_of(busy(WHOAMI, times=2), busy(COMMIT, times=2)), check=tried("/commit/", 3), long=True),
    *(Row(f"503 three times from {name}", _ARRIVES, busy(where, 503, times=3), long=True) for name, where in EVERY_CALL.items()),
    Row("429 from the commit, `Retry-After: 2`", f"{_ARRIVES}; waits as told", asking(COMMIT, Retry_After="2"),
        check=waited("/commit/", 3)),
    Row("429 from create, `ratelimit: \"api\";r=0;t=2`", f"{_ARRIVES}; waits as told", asking(CREATE, ratelimit='"api";r=0;t=2'),
        check=waited("/repos/create", 3), long=True),
    Row("429 from preupload, `Retry-After: 2`", f"{_ARRIVES}; waits as told", asking(PREUPLOAD, Retry_After="2"),
        check=waited("/preupload/", 3), long=True),
    Row("reset after 1 MiB of an upload", _ARRIVES, fault(PUT, "drop_upload", size_bytes=2**20), long=True),
    Row("half a close after 1 MiB of an upload", _ARRIVES, fault(PUT, "drop_upload", size_bytes=2**20, fin=True)),
    Row("reset in part 2 of an upload in parts", _ARRIVES,
        all_of(in_parts, fault({**PUT, "path": "/lfs/.*/2$"}, "drop_upload", size_bytes=2**20)), check=sent_in_parts),
    Row("half a close in part 2 of an upload in parts", _ARRIVES,
        all_of(in_parts, fault({**PUT, "path": "/lfs/.*/2$"}, "drop_upload", size_bytes=2**20, fin=True)), long=True),
    Row("create done, its answer lost", _ARRIVES, fault(CREATE, "lost_response"), check=tried("/repos/create", 2)),
    Row("commit done, its answer lost", f"{_ARRIVES}, with one commit", fault(COMMIT, "lost_response")),
    Row("commit done, its answer ends in half a close", f"{_ARRIVES}, with one commit", fault(COMMIT, "lost_response", fin=True),
        long=True),
    Row("reset before the commit is read", _ARRIVES, fault(COMMIT, "drop"), long=True),
    Row("somebody else commits between the look and the commit", f"{_ARRIVES} on top of it; their file stays",
        lambda scene: scene.hub.fault(**COMMIT, kind="call",
            action=lambda: scene.hub.add_commit(scene.repo, {"LICENSE": b"theirs"})),
        commits=(2, 2), besides=("LICENSE",), check=tried("/commit/", 2)),
]
FOR_EVER = [
    Row("500 from the commit for ever", _AT_LIMIT, busy(COMMIT), 3, ("500", "ommit", FINISH), minutes=SHORT, seconds=15,
        long=True),
    Row("500 from the commit for ever, six attempts", "3: gives up after 31 s of pauses", busy(COMMIT), 3,
        ("in 6 attempts", "500", FINISH), seconds=60, check=tried("/commit/", 6), long=True),
    *(Row(f"500 from {name} for ever", _AT_LIMIT, busy(where), 3, ("500", FINISH), minutes=0.5, seconds=50, long=True)
      for name, where in EVERY_CALL.items() if name != "commit"),
    Row("429 from the commit, `Retry-After: 3600`", _TOO_LONG, asking(COMMIT, Retry_After="3600"),
        3, ("429", FINISH), seconds=20),
    Row("429 from preupload, `Retry-After: 3600`", _TOO_LONG,
        asking(PREUPLOAD, Retry_After="3600"), 3, ("429", FINISH), seconds=20, long=True),
    Row("429 from the commit, `Retry-After` with a date in a year", _TOO_LONG,
        asking(COMMIT, **_DATE), 3, ("429", FINISH), seconds=20, long=True),
    Row("nothing listens", _AT_LIMIT, lambda scene: setattr(scene, "endpoint", dead_address()), 3, (FINISH,),
        minutes=SHORT, seconds=15),
    Row("nothing listens, four attempts", "3: gives up after 7 s of pauses",
        lambda scene: setattr(scene, "endpoint", dead_address()), 3,
        ("in 4 attempts", FINISH), seconds=40, long=True),
    Row("whoami is never answered", _AT_LIMIT, fault(WHOAMI, "delay", times=None), 3, (FINISH,), minutes=SHORT, seconds=15),
    # The client asks for it expressly without a time-out.
    Row("the look is never answered", _AT_LIMIT, fault(LOOK, "delay", times=None), 3, ("ooking at", FINISH), minutes=SHORT,
        seconds=15),
    Row("create is never answered", _AT_LIMIT, fault(CREATE, "delay", times=None), 3, ("creating", FINISH), minutes=SHORT,
        seconds=15, long=True),
    Row("an upload is taken and never answered", _AT_LIMIT, fault(PUT, "delay", times=None), 3,
        ("adapter_model.safetensors", FINISH), minutes=SHORT, seconds=15),
    Row("an upload stops in its middle", _AT_LIMIT, fault(PUT, "stall_upload", size_bytes=2**20, times=None), 3,
        ("adapter_model.safetensors", FINISH), minutes=0.1, seconds=20, long=True),
    Row("the commit is never answered", _AT_LIMIT, fault(COMMIT, "delay", times=None), 3, ("ommit", FINISH),
        minutes=SHORT, seconds=15),
    Row("an upload is never answered, one hour allowed", "3: gives up after 3 minutes without a sign",
        fault(PUT, "delay", times=None), 3,
        ("nothing was heard", "adapter_model.safetensors", FINISH), minutes=60, seconds=300, long=True),
    Row("the commit is never answered, other calls are, one hour allowed", "3: gives up after six attempts of a minute each",
        fault(COMMIT, "delay", times=None), 3, ("in 6 attempts", FINISH), minutes=60, seconds=440, long=True),
    Row("every upload ends in a reset", _AT_LIMIT, fault(PUT, "drop_upload", times=None), 3,
        ("adapter_model.safetensors", FINISH), minutes=0.2, seconds=30, long=True),
    Row("somebody else commits before each of our commits", "3: gives up after four looks",
        lambda scene: scene.hub.fault(**COMMIT, kind="call", times=None,
                                      action=lambda: scene.hub.add_commit(scene.repo, {"LICENSE": str(time.time()).encode()})),
        3, (FINISH,), commits=(4, 5), besides=("LICENSE",), check=tried("/commit/", 4), long=True),
]


def somewhere_else(repo: str) -> Callable[[Scene], object]:
    return with_(repo=repo)


def store_wrong(scene: Scene) -> None:
    """The server takes what was sent, and one bit of it turns over in its store before the commit."""
    def spoil() -> None:
        blobs = scene.hub.repos[scene.repo].blobs
        oid = max(blobs, key=lambda each: len(blobs[each]))
        scene.sound, blobs[oid] = (oid, blobs[oid]), turned(blobs[oid])
    scene.hub.fault(**COMMIT, kind="call", action=spoil)


def put_right(scene: Scene) -> None:
    oid, data = scene.sound
    scene.hub.repos[scene.repo].blobs[oid] = data


def flip_on_the_way(scene: Scene) -> None:
    scene.flipper = Flipper(scene.hub.storage_url)
    scene.right_url, scene.hub.storage_url = scene.hub.storage_url, scene.flipper.url


def straight_way(scene: Scene) -> None:
    assert scene.flipper.flipped
    scene.flipper.close()
    scene.hub.storage_url = scene.right_url


def read_token_on_what_is_there(scene: Scene) -> None:
    """`create_repo(exist_ok=True)` lets a read-only token through where the repository is there."""
    scene.hub.add_repo(scene.repo, private=True)
    scene.token = "read"


_BEFORE = {"code": 2, "check": not_even_asked}
REFUSED = [
    Row("wrong token", _UNTOUCHED, with_(token="nobody's"), says=("token", "hf auth login"), **_BEFORE),
    Row("no token", "2: before anything is asked", with_(token=""), says=("There is no token", "hf auth login"), long=True,
        **_BEFORE),
    Row("read-only token", _UNTOUCHED, with_(token="read"), says=("may only read", "hf auth login"), **_BEFORE),
    Row("read-only token, the repository is there", "2: before anything is sent", read_token_on_what_is_there,
        says=("may only read",),
        long=True, **_BEFORE),
    Row("fine-grained token without write", _UNTOUCHED, with_(token="fine-read"), says=("fine-grained",), long=True, **_BEFORE),
    Row("fine-grained token for an organisation, own namespace", _UNTOUCHED, with_(token="fine-org"),
        says=("fine-grained",), long=True, **_BEFORE),
    Row("fine-grained token for another repository", _UNTOUCHED, with_(token="fine-one"), says=("fine-grained",),
        long=True, **_BEFORE),
    Row("namespace of somebody else", _UNTOUCHED, with_(repo="stranger/it"), says=("belongs to stranger", "tester/it"),
        mend=somewhere_else("tester/it"), second="to the own namespace: arrives", long=True, **_BEFORE),
    Row("organisation in which one may only read", _UNTOUCHED, with_(repo="quiet-lab/it"),
        says=("may only read in the organisation",), mend=somewhere_else("acme/it"), second="to one that takes it: arrives",
            long=True, **_BEFORE),
    Row("403 from create all the same", "3: names the refusal", busy(CREATE, 403, message="not you"), 3,
        ("403", "not you", FINISH), long=True),
    Row("403 from the commit", "3: names the refusal", busy(COMMIT, 403, message="not you"), 3, ("403", "not you", FINISH),
        check=tried("/commit/", 1), long=True),
    Row("507 from an upload: the server is full", "3: names what is missing", busy(PUT, 507, message="out of space"), 3,
        ("adapter_model.safetensors", "507", FINISH)),
    Row("413 from the commit", "3: names what is missing", busy(COMMIT, 413), 3, ("adapter_model.safetensors", "413", FINISH),
        long=True),
    Row("one bit flipped in an upload; the server refuses it", "3: names what is missing", flip_on_the_way, 3,
        ("adapter_model.safetensors", "400", FINISH), mend=straight_way),
    Row("the server stores another byte than was sent", "3: found by the look afterwards", store_wrong, 3,
        ("by size or checksum", "adapter_model.safetensors", FINISH), mend=put_right, commits=(1, 2)),
]


def ctrl_c(scene: Scene, running: Running) -> None:
    scene.upload_under_way(2**20)
    running.send(signal.SIGINT)


def ctrl_c_among_small_files(scene: Scene, running: Running) -> None:
    scene.hub.wait_for("/lfs/", method="PUT", until=lambda request: request.fault)
    time.sleep(0.2)
    running.send(signal.SIGINT)


def ctrl_c_at_the_commit(scene: Scene, running: Running) -> None:
    scene.hub.wait_for("/commit/")
    running.send(signal.SIGINT)


def kill(scene: Scene, running: Running) -> None:
    scene.upload_under_way(2**20)
    running.send(signal.SIGKILL)


def kill_at_the_commit(scene: Scene, running: Running) -> None:
    scene.hub.wait_for("/commit/", until=lambda request: scene.num_commits == 1)
    running.send(signal.SIGKILL)


def terminate(scene: Scene, running: Running) -> None:
    scene.upload_under_way(2**20)
    running.send(signal.SIGTERM)


_SLOW = fault(PUT, "stall_upload", size_bytes=2**20)
STOPPED = [
    Row("Ctrl-C in an upload", "130, at once", _SLOW, 130, ("interrupted", "To finish it: qlora push"), ctrl_c),
    Row("Ctrl-C in an upload of small files", "130, at once", fault(PUT, "delay", skip=2), 130,
        ("interrupted", "To finish it: qlora push"), ctrl_c_among_small_files),
    Row("Ctrl-C while the commit is not answered", "130, at once", fault(COMMIT, "delay"), 130, ("To finish it: qlora push",),
        ctrl_c_at_the_commit, long=True),
    Row("kill -9 in an upload", "killed", _SLOW, -9, (), kill),
    Row("kill -9 right after the server has made the commit", "killed", fault(COMMIT, "lost_response", times=None), -9, (),
        kill_at_the_commit, commits=(1, 1), long=True),
    Row("SIGTERM in an upload", "ended", _SLOW, -15, (), terminate, long=True),
]

# --- the way back ------------------------------------------------------------------------------------------------------

_FILE, _GET = {"path": "/resolve/.*/adapter_model"}, {"path": "/lfs/", "method": "GET", "origin": "cdn"}
_LOOK = {"path": "/api/models/", "method": "GET"}


def resumed(scene: Scene, done: Done) -> None:
    ranges = [request.range for request in scene.hub.requests("/lfs/", method="GET")]
    assert ranges == [None, f"bytes={10 * 2**20}-"], ranges  # the client writes 10 MiB at a time


def ctrl_c_in_a_download(scene: Scene, running: Running) -> None:
    scene.hub.wait_for("/lfs/", method="GET", until=lambda request: request.sent_bytes >= 2**20)
    running.send(signal.SIGINT)


def kill_in_a_download(scene: Scene, running: Running) -> None:
    scene.hub.wait_for("/lfs/", method="GET", until=lambda request: request.sent_bytes >= 2**20)
    running.send(signal.SIGKILL)


_DOWNLOADS = [
    Row("half a close after 11 MiB", f"{_COMES}; goes on from 10 MiB",
        fault(_GET, "drop_download", size_bytes=11 * 2**20, fin=True), check=resumed),
    Row("reset after 1 MiB", f"{_COMES}; that file is begun again", fault(_GET, "drop_download", size_bytes=2**20), long=True),
    Row("500 twice from the look, from a file's address and from its store", _COMES,
        all_of(*(busy(where, times=2) for where in (_LOOK, _FILE, _GET))), long=True),
    Row("429 from the look, `Retry-After: 2`", f"{_COMES}; waits as told", asking(_LOOK, Retry_After="2"),
        check=waited("/api/models/", 3), long=True),
    Row("one bit flipped, once", f"{_COMES}; that file is fetched anew", fault(_GET, "corrupt", size_bytes=2**21),
        says=("once more",)),
    Row("one bit flipped, every time", "2: refused, nothing is loaded", fault(_GET, "corrupt", size_bytes=2**21, times=None), 2,
        ("adapter_model.safetensors", "checksum"), long=True),
    Row("500 from the look for ever", _AT_LIMIT_2, busy(_LOOK), 2, ("500",), minutes=SHORT, seconds=15, long=True),
    Row("every download ends in half a close", _AT_LIMIT_2, fault(_GET, "drop_download", times=None, fin=True), 2,
        ("adapter_model.safetensors",), minutes=0.3, seconds=40, long=True),
    Row("the file is never sent", _AT_LIMIT_2, fault(_GET, "delay", times=None), 2, ("adapter_model.safetensors",),
        minutes=0.3, seconds=40, long=True),
    Row("nothing listens", _AT_LIMIT_2, lambda scene: setattr(scene, "endpoint", dead_address()), 2, minutes=SHORT, seconds=15,
        long=True),
    Row("wrong token", "2: says so", with_(token="nobody's"), 2, ("token", "hf auth login"), long=True),
    Row("private repository, token of somebody else", "2: says so", with_(token="stranger"), 2, ("private", "hf auth login"),
        long=True),
    Row("Ctrl-C", "130, at once", fault(_GET, "stall_download", size_bytes=2**20), 130, (), ctrl_c_in_a_download, long=True),
    Row("kill -9", "killed", fault(_GET, "stall_download", size_bytes=2**20), -9, (), kill_in_a_download, long=True),
]
DOWNLOADS = [replace(row, name=f"download: {row.name}", second="comes, checked", fetches=True) for row in _DOWNLOADS]
ROWS = [*PASSING, *FOR_EVER, *REFUSED, *STOPPED, *DOWNLOADS]


