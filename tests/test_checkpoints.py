"""A checkpoint is whole or is not there, whatever happens while it is written, and a damaged one is never used."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path

import pytest

from qlora.errors import DivergedError, OutputError, ResumeError
from qlora.training import checkpoints
from qlora.training.checkpoints import MANIFEST, Checkpoint, CheckpointStore

ADAPTER, OPTIMIZER, SCHEDULER, RANDOM, STATE = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"
)
FILES = [ADAPTER, OPTIMIZER, SCHEDULER, RANDOM, STATE, "adapter_config.json"]
FACTS = {"metrics_bytes": 1234, "rung": 0, "versions": {"torch": "2.11"}, "loss": 0.1, "wörter": ["ä"]}


def content(step, name, version=0):
    """What a file of a checkpoint holds. `version` tells two checkpoints of one step apart."""
    return random.Random(f"{step} {name} {version}").randbytes(40 + len(name))


def fill(step, version=0):
    def write(folder):
        for name in FILES:
            (folder / name).write_bytes(content(step, name, version))

    return write


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "lauf-ü" / "checkpoints")


@pytest.fixture
def two(store):
    """Steps 4 and 8, whole."""
    for step in (4, 8):
        store.write(step, fill(step), {**FACTS, "step": step})
    return store


def is_whole(checkpoint, version=0):
    found = {path.name: path.read_bytes() for path in checkpoint.path.iterdir() if path.name != MANIFEST}
    return found == {name: content(checkpoint.step, name, version) for name in FILES}


def leftovers(store):
    return sorted(path.name for path in store.folder.iterdir() if not path.name.startswith("checkpoint-"))


# --- writing and rotating ----------------------------------------------------------------------------------------------


def test_what_is_written_is_found(store):
    assert store.newest() == (None, []) and store.steps() == [] and not store.ever_written()
    store.sweep()
    store.rotate()
    written = store.write(4, fill(4), FACTS)
    assert written == Checkpoint(store.folder / "checkpoint-4", 4, FACTS) and is_whole(written)
    assert CheckpointStore(store.folder).newest() == (written, []) and store.at(4) == written
    assert store.steps() == [4] and store.ever_written() and leftovers(store) == []


def test_the_newest_is_the_highest_step_not_the_last_name(store):
    for step in (9, 100, 10):
        store.write(step, fill(step), {})
    assert store.newest()[0].step == 100 and store.steps() == [9, 10, 100]


def test_facts_come_back_as_json_has_them(store):
    facts = {"pair": (1, 2), 10: "ten", 9: "nine", "nan": float("nan")}
    written, found = store.write(4, fill(4), facts), store.newest()[0]
    assert found.facts["pair"] == [1, 2] and found.facts["10"] == "ten" and found.facts["nan"] != found.facts["nan"]
    assert repr(written) == repr(found)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize(("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_modes_are_those_of_the_users_umask(store, umask, folder_mode, file_mode):
    def with_private_files(folder):
        fill(4)(folder)
        (folder / ADAPTER).chmod(0o600)  # as safetensors does

    before = os.umask(umask)
    try:
        written = store.write(4, with_private_files, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(written.path.stat().st_mode) == folder_mode
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.path.iterdir()} == {file_mode}


def test_every_file_and_both_folders_are_synced_before_it_has_its_name(store, monkeypatch):
    synced, named = set(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (named.append(set(synced)), replace(a, b)))
    written = store.write(4, fill(4), {})
    inodes = {path.stat().st_ino for path in [*written.path.iterdir(), written.path]}
    assert len(inodes) == len(FILES) + 2 and named == [named[0]] and inodes <= named[0]
    assert store.folder.stat().st_ino in synced


def test_a_step_can_be_written_again(two):
    written = two.write(8, fill(8, version=1), {})
    assert is_whole(written, version=1) and two.newest() == (written, []) and leftovers(two) == []


def test_rotation_keeps_the_newest_and_those_asked_for(store):
    for step in range(2, 12, 2):
        store.write(step, fill(step), {})
    store.rotate(keep_also=[4])
    assert store.steps() == [4, 8, 10] and leftovers(store) == []


@pytest.mark.parametrize("keep", [-1, 0, 1, 2])
def test_at_least_two_are_kept(store, keep):
    small = CheckpointStore(store.folder, keep=keep)
    for step in range(1, 6):
        small.write(step, fill(step), {})
        small.rotate()
        assert len(small.steps()) == min(step, 2)


def test_only_own_folders_are_removed(two, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    for name in ("checkpoint-1", "checkpoint-0", ".incoming-1", ".outgoing-1"):
        (two.folder / name).symlink_to(outside, target_is_directory=True)
    for name in ("checkpoint-2", "checkpoint-03", "checkpoint-٣", "checkpoint-2.bak", ".incoming-x", "notes"):
        (two.folder / name).mkdir()  # the first has our name, but was never sealed
    (two.folder / ".incoming-3").write_text("a file")
    (two.folder / "checkpoint-4" / "link").symlink_to(outside, target_is_directory=True)
    there = {path.name for path in two.folder.iterdir()}
    two.write(12, fill(12), {})
    two.rotate()
    two.sweep()
    assert {path.name for path in two.folder.iterdir()} == there - {"checkpoint-4"} | {"checkpoint-12"}
    assert (outside / "precious").read_text() == "x"


def test_names_that_the_program_does_not_write_are_nobodys(store):
    names = ["checkpoint-03", "checkpoint-٣", "checkpoint-3 ", "checkpoint--3", "xcheckpoint-3", "checkpoint-3.bad"]
    for name in names:
        (store.folder / name).mkdir(parents=True)
    assert store.newest() == (None, []) and sorted(os.listdir(store.folder)) == sorted(names)


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def empty(name):
    return lambda folder: os.truncate(folder / name, 0)


def missing(name):
    return lambda folder: (folder / name).unlink()


def flip(name, position=20, bits=1):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[position] ^= bits
        (folder / name).write_bytes(data)

    return damage


def of_another_step(name):
    return lambda folder: (folder / name).write_bytes(content(4, name))


def replaced(folder):
    """A whole checkpoint, of another step."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-4"), folder)


def nothing_left(folder):
    for path in folder.iterdir():
        path.unlink()


DAMAGE = {
    "state missing": (missing(STATE), f"{STATE} is missing"),
    "state empty": (empty(STATE), f"{STATE}: 0 bytes of 58"),
    "state cut": (cut(STATE), f"{STATE}: 29 bytes of 58"),
    "adapter missing": (missing(ADAPTER), f"{ADAPTER} is missing"),
    "adapter cut": (cut(ADAPTER), f"{ADAPTER}: 32 bytes of 65"),
    "empty folder": (nothing_left, f"{MANIFEST} is missing"),
    "optimizer cut": (cut(OPTIMIZER), f"{OPTIMIZER}: 26 bytes of 52"),
    "optimizer missing": (missing(OPTIMIZER), f"{OPTIMIZER} is missing"),
    "random state cut": (cut(RANDOM), f"{RANDOM}: 26 bytes of 53"),
    "random state missing": (missing(RANDOM), f"{RANDOM} is missing"),
    "scheduler missing": (missing(SCHEDULER), f"{SCHEDULER} is missing"),
    "adapter of another step": (of_another_step(ADAPTER), f"{ADAPTER}: other content"),
    "byte flipped in the adapter": (flip(ADAPTER), f"{ADAPTER}: other content"),
    "manifest cut": (cut(MANIFEST), f"{MANIFEST} is cut off or changed"),
    "manifest empty": (empty(MANIFEST), f"{MANIFEST} is cut off or changed"),
    "manifest missing": (missing(MANIFEST), f"{MANIFEST} is missing"),
    "extra file": (lambda folder: (folder / "x.bin").touch(), "x.bin does not belong to it"),
    "extra file that plays": (lambda folder: (folder / "\x1b[2J").touch(), r"'\x1b[2J' does not belong to it"),
    "extra folder": (lambda folder: (folder / "x").mkdir(), "x is not a regular file"),
    "of another step": (replaced, f"{MANIFEST} is that of step 4"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_passed_over(two, case):
    damage, words = DAMAGE[case]
    damage(two.folder / "checkpoint-8")
    with pytest.raises(ResumeError) as refused:
        two.at(8)
    assert words in refused.value.problem and "checkpoint-8" in refused.value.problem
    found, lines = two.newest()
    assert found.step == 4 and is_whole(found) and len(lines) == 1
    assert lines[0].startswith("checkpoint-8 is damaged (") and words in lines[0]
    assert lines[0].endswith("set aside as checkpoint-8.bad") and lines[0].isprintable()
    assert (two.folder / "checkpoint-8.bad").is_dir() and two.steps() == [4]
    assert two.newest() == (found, [])


def test_every_byte_of_the_manifest_counts(store):
    folder = store.write(8, lambda folder: (folder / STATE).touch(), {"rung": 0}).path
    whole = (folder / MANIFEST).read_bytes()
    for position, bits in product(range(len(whole)), [1, ord(" ") ^ ord("\n")]):  # the latter is still JSON of the same meaning
        flip(MANIFEST, position, bits)(folder)
        with pytest.raises(ResumeError, match="cut off or changed"):
            store.at(8)
        (folder / MANIFEST).write_bytes(whole)
    assert store.at(8).facts == {"rung": 0}


@pytest.mark.parametrize("text", [b"null", b"[]", b"{}", b'{"sha256": 1}', b"[" * 100_000, b"\xff\xfe", b"9" * 10_000])
def test_a_manifest_of_anything(two, text):
    (two.folder / "checkpoint-8" / MANIFEST).write_bytes(text)
    found, lines = two.newest()
    assert found.step == 4 and "cut off or changed" in lines[0]


def seal_again(folder, **changes):
    """A manifest that somebody made up, with the right hash of itself."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["sha256"]
    (folder / MANIFEST).write_bytes(checkpoints._with_hash({**manifest, **changes}))


@pytest.mark.parametrize("changes", [
    {"files": None}, {"files": ["a"]}, {"files": {"a": 1}}, {"files": {"a": {}}}, {"files": {"a": {"bytes": "1", "sha256": "x"}}},
    {"facts": None}, {"step": None}, {"step": True}, {"step": "8"}, {"step": 8.0},
])
def test_a_made_up_manifest_that_lacks_something(two, changes):
    seal_again(two.folder / "checkpoint-8", **changes)
    found, lines = two.newest()
    assert found.step == 4 and f"{MANIFEST} lacks" in lines[0]


@pytest.mark.parametrize("kind", ["../secret", "absolute", "./secret", "..", ".", "", "C:secret", "..\\secret", "a/../../secret"])
def test_names_that_lead_out_of_the_folder_are_never_opened(two, kind, monkeypatch):
    secret = two.folder / "secret"
    secret.write_bytes(b"secret")
    folder = two.folder / "checkpoint-8"
    name = str(secret) if kind == "absolute" else kind
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    seal_again(folder, files={**files, name: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}})
    opened = []
    monkeypatch.setattr(checkpoints, "_sha256", lambda file: opened.append(file.name))
    found, lines = two.newest()
    assert found is None and f"{name} is missing" in lines[0]
    assert not [path for path in opened if Path(path).parent.name == "checkpoint-8"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_not_followed(two, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(two.folder / "checkpoint-8", moved)
    (two.folder / "checkpoint-8").symlink_to(moved, target_is_directory=True)  # whole, but not here
    adapter = two.folder / "checkpoint-4" / ADAPTER
    adapter.rename(tmp_path / "adapter")
    adapter.symlink_to(tmp_path / "adapter")
    found, lines = two.newest()
    assert found is None and "checkpoint-8 is damaged (it is no folder)" in lines[0]
    assert f"checkpoint-4 is damaged ({ADAPTER} is not a regular file)" in lines[1]
    assert len(list(moved.iterdir())) == len(FILES) + 1 and two.ever_written() and two.steps() == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", [OPTIMIZER, MANIFEST])
def test_a_pipe_is_not_waited_for(two, name):
    (two.folder / "checkpoint-8" / name).unlink()
    os.mkfifo(two.folder / "checkpoint-8" / name)
    found, lines = two.newest()
    assert found.step == 4 and f"{name} is not a regular file" in lines[0]


def test_names_for_bad_ones_are_not_used_twice(two):
    for number in range(3):
        two.write(8, fill(8), {})
        missing(STATE)(two.folder / "checkpoint-8")
        two.newest()
    names = ["checkpoint-8.bad", "checkpoint-8.bad-2", "checkpoint-8.bad-3"]
    assert sorted(path.name for path in two.folder.glob("*.bad*")) == names


def test_with_none_left_it_says_so_and_remembers_that_there_were_some(two):
    for step in (4, 8):
        missing(STATE)(two.folder / f"checkpoint-{step}")
    found, lines = two.newest()
    assert found is None and [line.split()[0] for line in lines] == ["checkpoint-8", "checkpoint-4"]
    assert two.ever_written() and two.newest() == (None, [])


def test_a_damaged_one_that_cannot_be_renamed_is_passed_over_all_the_same(two, monkeypatch):
    missing(STATE)(two.folder / "checkpoint-8")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    found, lines = two.newest()
    assert found.step == 4 and "passed over, as it cannot be renamed (Permission denied)" in lines[0]


def test_a_file_that_cannot_be_read_is_damage(two, monkeypatch):
    def fail(file):
        if "checkpoint-8" in file.name and OPTIMIZER in file.name:
            raise OSError(errno.EIO, "Input/output error", file.name)
        return sha256(file)

    sha256 = checkpoints._sha256
    monkeypatch.setattr(checkpoints, "_sha256", lambda file: fail(file) if isinstance(file.name, str) else sha256(file))
    found, lines = two.newest()
    assert found.step == 4 and f"{OPTIMIZER} cannot be read: Input/output error" in lines[0]


def test_a_later_format_is_left_alone(two):
    seal_again(two.folder / "checkpoint-8", format=2)
    for look in (two.newest, lambda: two.at(8)):
        with pytest.raises(ResumeError, match="has format 2, and this version of the program knows format 1"):
            look()
    assert two.steps() == [4, 8]


def test_a_checkpoint_that_is_not_there(two):
    with pytest.raises(ResumeError, match="checkpoint-6 is needed and cannot be used: it is missing"):
        two.at(6)


# --- crashes and failures at every operation --------------------------------------------------------------------------


class Crash(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


OPERATIONS = [(os, name) for name in ("mkdir", "open", "scandir", "chmod", "fsync", "replace", "unlink", "rmdir", "listdir")]
OPERATIONS += [(io, "open"), (checkpoints, "open")]


@contextmanager
def trouble(number, error, when):
    """Raise `error` "before" or "after" the operation of this number on the file system, or at all "from" there on.

    Yields a counter of the operations.
    """
    made = count()

    def wrap(function):
        def operation(*args, **kwargs):
            this = next(made)
            if (this == number and when == "before") or (this >= number and when == "from"):
                raise error
            result = function(*args, **kwargs)
            if this == number and when == "after":
                raise error
            return result

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, wrap(getattr(module, name, open)), raising=False)
        yield made


def stopped_at_each_operation(prepare, work, error, when):
    """What is left by `work` when it is stopped at its first, second, ... operation: (store, what was raised)."""
    for number in count():
        store, raised = prepare(), None
        with trouble(number, error, when) as made:
            try:
                work(store)
            except (Crash, OutputError) as caught:
                raised = caught
        if next(made) <= number:  # it was over before
            assert number > 15
            return
        yield CheckpointStore(store.folder), raised


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Makes a store with these steps, each time in a new folder."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and only a power cut would show the difference
    numbers = count()

    def make(*steps):
        store = CheckpointStore(tmp_path / str(next(numbers)))
        for step in steps:
            store.write(step, fill(step), {})
        return store

    return make


def write_badly(folder):
    """Writes in pieces, so that there are halves to be found."""
    for name in FILES:
        data = content(12, name)
        with open(folder / name, "wb") as file:
            file.write(data[:10])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[10:])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_point_of_a_write(fresh, when):
    outcomes = set()
    for store, _ in stopped_at_each_operation(lambda: fresh(4, 8), lambda s: s.write(12, write_badly, {}), Crash(), when):
        found, lines = store.newest()
        assert found.step in (8, 12) and is_whole(found) and lines == []
        store.sweep()
        assert leftovers(store) == [] and store.steps() in ([4, 8], [4, 8, 12]) and store.newest() == (found, [])
        outcomes.add(found.step)
    assert outcomes == {8, 12}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_point_of_the_very_first_write(fresh, when):
    outcomes = set()
    for store, _ in stopped_at_each_operation(fresh, lambda s: s.write(12, write_badly, {}), Crash(), when):
        found, lines = store.newest()
        assert lines == [] and (found is None or is_whole(found)) and store.ever_written() == (found is not None)
        outcomes.add(found is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_while_the_only_checkpoint_is_replaced(fresh, when):
    """Between two renames there is none of that name; whoever looks then finds it all the same."""
    outcomes = set()
    for store, _ in stopped_at_each_operation(lambda: fresh(8), lambda s: s.write(8, fill(8, version=1), {}), Crash(), when):
        store.sweep()
        found, lines = store.newest()
        assert found.step == 8 and lines == [] and leftovers(store) == []
        assert is_whole(found) or is_whole(found, version=1)
        outcomes.add(is_whole(found))
    assert outcomes == {True, False}


def test_a_crash_while_it_is_replaced_and_what_came_in_is_lost_too(fresh):
    store = fresh(8)
    (store.folder / "checkpoint-8").rename(store.folder / ".outgoing-8")
    (store.folder / ".incoming-8").mkdir()
    store.sweep()
    assert is_whole(store.newest()[0]) and leftovers(store) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_point_of_a_rotation(fresh, when):
    steps = set()
    for store, _ in stopped_at_each_operation(lambda: fresh(2, 4, 6, 8, 10), lambda s: s.rotate([4]), Crash(), when):
        found, lines = store.newest()
        assert found.step == 10 and is_whole(found) and lines == []
        assert all(is_whole(store.at(step)) for step in store.steps()) and {4, 8, 10} <= set(store.steps())
        steps.add(tuple(store.steps()))
        store.sweep()
        store.rotate([4])
        assert store.steps() == [4, 8, 10] and leftovers(store) == []
    assert steps == {(2, 4, 6, 8, 10), (4, 6, 8, 10), (4, 8, 10)}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_while_a_crash_is_mended(fresh, when):
    def crashed():
        store = fresh(2, 4, 6, 8)
        (store.folder / "checkpoint-8").rename(store.folder / ".incoming-8")
        (store.folder / "checkpoint-2").rename(store.folder / ".outgoing-2")
        (store.folder / ".incoming-9").mkdir()
        missing(STATE)(store.folder / "checkpoint-6")
        return store

    def mend(store):
        store.sweep()
        store.newest()

    for store, _ in stopped_at_each_operation(crashed, mend, Crash(), when):
        store.sweep()
        found, lines = store.newest()
        assert found.step == 8 and is_whole(found) and lines == [] and leftovers(store) == [] and store.steps() == [4, 6, 8]


@pytest.mark.parametrize("when", ["before", "after", "from"])
def test_an_error_at_any_point_of_a_write_is_told_and_leaves_nothing(fresh, when):
    error = OSError(errno.ENOSPC, "No space left on device")
    told = 0
    for store, raised in stopped_at_each_operation(lambda: fresh(4, 8), lambda s: s.write(12, write_badly, {}), error, when):
        assert when == "from" or not (store.folder / ".incoming-12").exists()  # nothing can be removed from a disk that is gone
        found, lines = store.newest()
        assert found.step in (8, 12) and is_whole(found) and lines == []
        assert is_whole(store.at(4)) and is_whole(store.at(8))
        if raised:
            told += 1
            assert f"step 12 could not be written to {store.folder}: No space left on device." in str(raised)
        else:
            assert found.step == 12
    assert told > 25


@pytest.mark.parametrize("when", ["before", "after", "from"])
def test_an_error_while_one_is_replaced_leaves_the_old_or_the_new(fresh, when):
    error = OSError(errno.EIO, "Input/output error")
    for store, raised in stopped_at_each_operation(lambda: fresh(8), lambda s: s.write(8, fill(8, version=1), {}), error, when):
        if when == "before":
            assert store.steps() == [8]  # at once, not only after a sweep
        found, lines = store.newest()
        assert lines == [] and (is_whole(found, version=1) or raised and is_whole(found))


@pytest.mark.parametrize(("written_bytes", "last_bytes", "words"), [
    (300_000, 0, "more than 293 KiB"), (300_000, 200_000, "more than 293 KiB"), (200_000, 300_000, "about 293 KiB")
])
def test_the_message_has_both_numbers(store, written_bytes, last_bytes, words):
    def half(folder):
        (folder / ADAPTER).write_bytes(bytes(written_bytes))
        raise OSError(errno.ENOSPC, "No space left on device")

    if last_bytes:
        store.write(8, lambda folder: (folder / ADAPTER).write_bytes(bytes(last_bytes)), {})
    with pytest.raises(OutputError) as told:
        store.write(12, half, {})
    assert f"device. It takes {words}, and " in told.value.problem and " are free there. Those before it" in told.value.problem
    assert told.value.fix and store.steps() == [8] * bool(last_bytes) and leftovers(store) == []


def test_without_numbers_none_are_given(store):
    def nothing(folder):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(OutputError) as told:
        store.write(12, nothing, {})
    assert told.value.problem.endswith("checkpoints: Read-only file system. Those before it are as they were.")


def test_an_error_of_the_run_is_not_made_one_of_the_disk(two):
    for error in (DivergedError("not finite"), OutputError("elsewhere"), ValueError("x")):
        def broken(folder, error=error):
            (folder / ADAPTER).touch()
            raise error

        with pytest.raises(type(error)) as raised:
            two.write(12, broken, {})
        assert raised.value is error and leftovers(two) == [] and two.steps() == [4, 8]


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for look in ("newest", "sweep", "rotate", "steps", "ever_written"):  # as if it were empty would mean: begin anew
        with pytest.raises(OutputError, match="file cannot be read: Not a directory"):
            getattr(CheckpointStore(tmp_path / "file"), look)()
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(OutputError, match="step 4 could not be written to"):
            CheckpointStore(folder).write(4, fill(4), {})


def test_a_file_system_that_syncs_no_folders(store, monkeypatch):
    fsync = os.fsync

    def refuse(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    assert is_whole(store.write(4, fill(4), {}))


# --- a disk that is really full ---------------------------------------------------------------------------------------

_CHILD = """\
import sys
from pathlib import Path
from qlora.errors import OutputError
from qlora.training.checkpoints import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]) / "checkpoints")
def fill(size):
    return lambda folder: [(folder / name).write_bytes(bytes(size)) for name in ("a", "b", "c")] and None
store.write(4, fill(16_000), {})
LIMIT
try:
    store.write(8, fill(60_000), {})
except OutputError as error:
    print(error.problem)
names = [path.name for path in store.folder.iterdir()]
assert names == ["checkpoint-4"], names
found, lines = store.newest()
assert found.step == 4 and not lines
store.write(8, fill(1_000), {})
assert store.newest()[0].step == 8
"""


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_a_write_that_hits_a_limit_on_file_size(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = subprocess.run([sys.executable, "-c", _CHILD.replace("LIMIT", limit), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 8 could not be written" in done.stdout and "File too large" in done.stdout


def test_a_full_disk(tmp_path):
    """A file system of 128 KiB, in name spaces of the child's own so that nothing of it stays."""
    mounted = f"mount -t tmpfs -o size=128k none '{tmp_path}'"
    try:
        possible = subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no file system can be mounted here; the limit on file size stands in for it")
    (tmp_path / "child.py").write_text(_CHILD.replace("LIMIT", ""))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=128k none '{disk}' && exec '{sys.executable}' '{tmp_path}/child.py' '{disk}'"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No space left on device. It takes more than " in done.stdout and " KiB are free there." in done.stdout
