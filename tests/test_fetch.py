"""Adapters found in folders and fetched from a Hub on the loopback interface: what comes, and what happens when it does not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.errors import HubError, ModelError
from qlora.hub.fetch import find_adapter

ID = "tester/adapter"
WEIGHTS = "adapter_model.safetensors"
_SCRIPT = """
import json, sys
from qlora.errors import QloraError
from qlora.hub.fetch import find_adapter
from qlora.hub.patience import Patience
from qlora.progress import Progress

options = json.loads(sys.argv[1])
notes, bars = [], []

class Watch(Progress):
    def note(self, text):
        notes.append(text)
    def stage(self, text):
        from contextlib import nullcontext
        return nullcontext(lambda done, total: bars.append((done, total)))

seconds = options.pop("seconds", None)
patience = Patience(seconds, stall_seconds=seconds / 2, tell=notes.append) if seconds else None
try:
    found = find_adapter(options.pop("source"), progress=Watch(), patience=patience, **options)
    document = {"folder": str(found.folder), "base": found.base, "base_revision": found.base_revision, "revision": found.revision,
                "name": found.name, "run": None if found.run is None else found.run.is_run_folder}
except QloraError as error:
    document = {"error": type(error).__name__, "text": str(error)}
print(json.dumps({**document, "notes": notes, "bars": bars}))
"""


@pytest.fixture(scope="module")
def files():
    """A small adapter as it is pushed, made by hand: what is in the weights does not matter here, but their size does."""
    from safetensors.numpy import save

    import numpy

    weights = numpy.random.default_rng(0).standard_normal(100_000, dtype="float32")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "Qwen/Qwen3-0.6B", "revision": "c0ffee",
              "r": 4}
    return {
        "adapter_config.json": json.dumps(config).encode(), WEIGHTS: save({"base_model.model.x.lora_A.weight": weights}),
        "tokenizer.json": b'{"version": "1.0"}' * 50, "tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ messages }}",
        "run/resolved.json": json.dumps({"model": {"base": "Qwen/Qwen3-0.6B"}}).encode(), "run/report.json": b"{}",
    }


@pytest.fixture
def adapter(hub, files):
    """A repository with the adapter, and with much that is not needed."""
    others = {"README.md": b"# card", "modeling.py": b"raise SystemExit", "adapter_model.bin": b"pickle",
              "optimizer.pt": b"state", "run/plots/loss.png": b"png", "checkpoint-5/adapter_config.json": b"{}",
              "tokenizer.py": b"raise SystemExit"}
    return hub.add_repo(ID, {**files, **others}, private=True)


@pytest.fixture
def fetch(hub, tmp_path):
    """A function that runs `find_adapter` in a process of its own, which sees this Hub; returns what came of it."""

    def run(source=ID, token="read", environment=None, **options):
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, json.dumps({"source": source, **options})], capture_output=True, text=True,
            timeout=60, env={**hub.environment(tmp_path / "home", token), **(environment or {})}, cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr + hub.transcript()
        return json.loads(done.stdout.splitlines()[-1])

    return run


def held(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_is_needed_comes_and_nothing_else(hub, adapter, files, fetch):
    found = fetch()
    assert held(found["folder"]) == files
    assert (found["base"], found["base_revision"], found["name"]) == ("Qwen/Qwen3-0.6B", "c0ffee", ID)
    assert found["revision"] == hub.commits(ID)[0].oid and found["run"] is False
    asked = {request.path.rpartition("/")[2] for request in hub.requests("/resolve/")}
    assert asked == {path.rpartition("/")[2] for path in files}
    assert not hub.leaks()
    size = sum(map(len, files.values()))
    assert found["bars"][-1] == [size, size] and len(found["bars"]) > len(files)
    assert [done for done, _ in found["bars"]] == sorted(done for done, _ in found["bars"])


def test_what_is_there_is_not_fetched_again(hub, adapter, fetch):
    first, before = fetch(), len(hub.requests(method="GET", origin="cdn"))
    assert fetch()["folder"] == first["folder"]
    assert len(hub.requests(method="GET", origin="cdn")) == before == 1


@pytest.mark.parametrize("path", ["/lfs/", "/resolve/.*/tokenizer.json"])
def test_a_flipped_byte_is_found_and_healed(hub, adapter, files, fetch, path):
    hub.fault(path, "corrupt", method="GET", size_bytes=500)
    found = fetch()
    assert held(found["folder"]) == files
    assert any("is not as the server lists it" in note for note in found["notes"])


def test_a_byte_that_is_always_flipped_is_refused_and_not_kept_for_good(hub, adapter, files, fetch):
    hub.fault("/lfs/", "corrupt", method="GET", times=None)
    found = fetch()
    assert found["error"] == "HubError" and WEIGHTS in found["text"] and "Nothing was loaded" in found["text"]
    hub.clear_faults()
    assert held(fetch()["folder"]) == files


@pytest.mark.parametrize(
    ("path", "kind", "more"),
    [
        ("/lfs/", "drop_download", {"size_bytes": 100_000}),
        ("/lfs/", "drop_download", {"size_bytes": 100_000, "fin": True}),
        ("/lfs/", "status", {"status": 500}),
        ("/api/models/", "status", {"status": 503, "times": 2}),
        ("/api/models/", "status", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("/api/models/", "drop", {}),
        ("/resolve/.*/adapter_config.json", "status", {"status": 502}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_passes_is_tried_again(hub, adapter, files, fetch, path, kind, more):
    hub.fault(path, kind, **{"method": "GET|HEAD", **more})
    found = fetch()
    assert held(found["folder"]) == files, found


def test_a_download_that_was_killed_ends_right_the_next_time(hub, adapter, files, fetch, tmp_path):
    hub.fault("/lfs/", "stall_download", method="GET", size_bytes=150_000)
    child = subprocess.Popen([sys.executable, "-c", _SCRIPT, json.dumps({"source": ID})],
                             env=hub.environment(tmp_path / "home", "read"), cwd=tmp_path)
    hub.wait_for("/lfs/", method="GET", until=lambda request: request.sent_bytes >= 150_000)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not [path for path in (tmp_path / "home").rglob(WEIGHTS)]
    assert held(fetch()["folder"]) == files


def test_a_server_that_never_answers_is_given_up(hub, adapter, fetch):
    hub.fault("/api/models/", "delay", seconds=None, times=None)
    started = time.monotonic()
    found = fetch(seconds=6)
    assert found["error"] == "UnreachableError" and time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("source", "token", "word"),
    [
        (ID, None, "private"), (ID, "stranger", "private"), (ID, "nobody", "token"),
        ("tester/nothing", "read", "neither a folder here"),
        (ID + "@v9", "read", "no revision v9"), ("tester/gated", "stranger", "gated"), ("tester/full", "read", "full model"),
        ("tester/pickle", "read", "pickle"), ("tester/empty", "read", "no adapter"),
        ("no/such/thing", "read", "not written like"), ("tester/prompt", "read", "PREFIX_TUNING"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(hub, adapter, files, fetch, source, token, word):
    hub.add_repo("tester/gated", files, gated="manual")
    hub.add_repo("tester/full", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.add_repo("tester/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    hub.add_repo("tester/prompt", {**files, "adapter_config.json": b'{"peft_type": "PREFIX_TUNING"}'})
    hub.add_repo("tester/empty")
    found = fetch(source, token)
    assert word in found["text"], found
    assert found["error"] in ("HubError", "ModelError") and len(hub.requests("/api/models/")) <= 1
    assert not hub.requests(method="GET", origin="cdn") or source == "tester/prompt"
    assert token is None or hub.token(token) not in json.dumps(found)


def test_a_revision_stays_what_it_was(hub, adapter, files, fetch):
    first = hub.commits(ID)[0].oid
    adapter.tags["v1"] = first
    hub.add_commit(ID, {"tokenizer_config.json": b'{"new": 1}'})
    for source, options in ((f"{ID}@v1", {}), (ID, {"revision": "v1"}), (f"{ID}@{first}", {}), (f"{ID}@{first[:10]}", {})):
        found = fetch(source, **options)
        assert found["revision"] == first and held(found["folder"]) == files
    newest = fetch()
    assert newest["revision"] == hub.commits(ID)[0].oid != first
    assert held(newest["folder"])["tokenizer_config.json"] == b'{"new": 1}'
    assert "another" in fetch(f"{ID}@v1", revision="main")["text"]


def test_a_commit_in_the_middle_does_not_mix_two(hub, adapter, files, fetch):
    first = hub.commits(ID)[0].oid
    config = json.dumps({**json.loads(files["adapter_config.json"]), "r": 8}).encode()
    newer = {"adapter_config.json": config, WEIGHTS: b"new"}
    hub.fault("/resolve/.*/tokenizer.json", "call", action=lambda: hub.add_commit(ID, newer))
    found = fetch()
    assert found["revision"] == first and held(found["folder"]) == files


def test_without_network_what_was_fetched_is_taken(hub, adapter, files, fetch):
    offline = {"HF_HUB_OFFLINE": "1"}
    assert "not on this machine" in fetch(environment=offline)["text"]
    first = fetch()
    num_requests = len(hub.log)
    for source in (ID, f"{ID}@{first['revision']}"):
        again = fetch(source, environment=offline)
        assert (again["folder"], again["revision"]) == (first["folder"], first["revision"])
    assert len(hub.log) == num_requests
    assert "not on this machine" in fetch(f"{ID}@v2", environment=offline)["text"]
    weights = Path(os.path.realpath(Path(first["folder"]) / WEIGHTS))
    weights.write_bytes(b"\1" + weights.read_bytes()[1:])
    changed = fetch(environment=offline)
    assert changed["error"] == "HubError" and "has changed on this disk" in changed["text"]
    healed = fetch()  # with network
    assert held(healed["folder"]) == files


def test_a_fetch_that_broke_off_leaves_the_one_before_for_a_day_without_network(hub, adapter, files, fetch):
    first = fetch()
    hub.add_commit(ID, {WEIGHTS: files[WEIGHTS] + b"more"})
    hub.fault("/lfs/", "status", method="GET", status=404, times=None)
    assert fetch()["error"] == "HubError"
    again = fetch(environment={"HF_HUB_OFFLINE": "1"})
    assert again["revision"] == first["revision"] and held(again["folder"]) == files


def test_a_hub_that_is_gone_does_not_matter_for_what_is_here(hub, adapter, fetch):
    first = fetch()
    hub.fault("", "status", status=503, times=None)
    again = fetch()
    assert again["folder"] == first["folder"] and any("cannot be reached" in note for note in again["notes"])


# --- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path, files):
    """A function that writes an adapter's folder, with changes to its config."""

    def write(place="adapter", **config):
        folder = tmp_path / place
        for name in ("adapter_config.json", WEIGHTS, "tokenizer.json"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name])
        changed = {**json.loads(files["adapter_config.json"]), **config}
        kept = {key: value for key, value in changed.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        return folder

    return write


def refused(source, **options):
    with pytest.raises((ModelError, HubError)) as caught:
        find_adapter(str(source), **options)
    assert caught.value.fix and caught.value.exit_code == 2
    return str(caught.value)


def test_an_adapter_is_found_in_its_folder_and_in_the_run_folder(make, tmp_path):
    place = make("run/adapter")
    (tmp_path / "run" / "resolved.json").write_text(json.dumps({"model": {"base": "builtin:tiny", "revision": None}}))
    for source in (tmp_path / "run", place):
        found = find_adapter(str(source))
        assert (found.folder, found.name, found.revision, found.run.is_run_folder) == (place, str(source), None, True)
        assert found.base == "builtin:tiny"
    assert find_adapter(str(make("alone"))).run is None


def test_a_folder_goes_before_an_id(make, tmp_path, monkeypatch):
    make("tester/adapter")
    monkeypatch.chdir(tmp_path)
    assert find_adapter(ID).revision is None
    assert "a folder here" in refused(ID, revision="v1")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"peft_type": "IA3"}, "an IA3 adapter"), ({"peft_type": ...}, "LoRA"), ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"), ({"init_lora_weights": "corda"}, "changes the base"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "Megatron"), ({"base_model_name_or_path": ...}, "--base MODEL"),
        ({"base_model_name_or_path": "/no/such/folder\x1b[2J"}, "not on this machine"),
        ({"base_model_name_or_path": "C:\\models\\x"}, "not on this machine"), ({"peft_type": {"\x1b": 1}}, "LoRA"),
    ],
)
def test_an_adapter_that_cannot_be_used_says_why(make, config, word):
    text = refused(make(**config))
    assert word in text and "\x1b" not in text


def test_what_is_no_finished_adapter_says_what_it_is(make, tmp_path):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        return tmp_path / name

    assert "not finished" in refused(folder("unfinished", "resolved.json", "progress.json"))
    assert "full model" in refused(folder("merged", "config.json", "model.safetensors"))
    assert "pickle" in refused(folder("old", "adapter_config.json", "adapter_model.bin"))
    assert "no adapter_model" in refused(folder("half", "adapter_config.json"))
    assert "no adapter_config.json" in refused(folder("weights", WEIGHTS))
    assert "holds no adapter" in refused(folder("empty"))
    assert "is a file" in refused(make() / WEIGHTS)
    assert "not written like" in refused(tmp_path / "nothing" / "here")
    linked = make("linked")
    (linked / "tokenizer.json").unlink()
    (linked / "tokenizer.json").symlink_to("/etc/passwd")
    assert "links" in refused(linked)
    for text in ("[1]", "{", "[" * 100_000):
        broken = make("broken")
        (broken / "adapter_config.json").write_text(text)
        assert "cannot be read" in refused(broken)


def test_the_base_comes_from_who_knows_it_best(make, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    adapter = make("run/adapter", base_model_name_or_path=str(model), revision=None)

    def resolved(base, revision=None):
        (tmp_path / "run" / "resolved.json").write_text(json.dumps({"model": {"base": base, "revision": revision}}))
        found = find_adapter(str(adapter))
        return found.base, found.base_revision

    assert find_adapter(str(adapter)).base == str(model)
    assert resolved("builtin:tiny") == ("builtin:tiny", None)
    assert resolved("models/gone") == (str(model), None)  # a path of the folder that training was started in
    model.rmdir()
    assert resolved("Qwen/Qwen3-8B", "abc") == ("Qwen/Qwen3-8B", "abc")
    assert "not on this machine" in refused_with(resolved, "/elsewhere/model")
    assert find_adapter(str(adapter), base="mine").base == "mine"


def refused_with(function, *args):
    with pytest.raises(ModelError) as caught:
        function(*args)
    return str(caught.value)


def test_paths_in_an_adapter_of_a_stranger_lead_nowhere(hub, files, fetch, tmp_path):
    (tmp_path / "model").mkdir()
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": str(tmp_path / "model")}
    documents = {"adapter_config.json": json.dumps(config).encode(), "run/resolved.json": b'{"model": {"base": "/etc"}}'}
    hub.add_repo(ID, {**files, **documents})
    assert "--base MODEL" in fetch(token=None)["text"]
    assert fetch(token=None, base=str(tmp_path / "model"))["base"] == str(tmp_path / "model")


def test_checksums_are_those_of_git_and_sha256(tmp_path):
    from qlora.hub.fetch import _digest

    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    assert _digest(path, is_sha256=False) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert _digest(path, is_sha256=True) == hashlib.sha256(b"hello\n").hexdigest()
