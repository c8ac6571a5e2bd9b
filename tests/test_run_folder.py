"""Run folders: finding them, holding them for one process, and reading back what an unfinished run wrote down."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.errors import BusyError, OutputError, ResumeError
from qlora.planning.plan import PARTS, PHASES, Decision, Plan
from qlora.progress import Progress
from qlora.recipe import build_recipe, load_recipe
from qlora.settings import describe_settings
from qlora.training import lock as lock_module
from qlora.training import run_documents
from qlora.training.lock import RunLock
from qlora.training.metrics_file import MetricsFile
from qlora.training.run_documents import RunProgress, differences, read_saved, write_json
from qlora.training.run_folder import Found, find_run, open_folder, refuse_links


def recipe(name="study", **sections):
    return build_recipe(name=name, **{"model": "builtin:tiny", "data": "rows.jsonl", **sections})


def begin(folder, *, finished=False):
    """A run's folder as far as `find_run` looks."""
    open_folder(Found(folder, unfinished=False))
    write_json(folder / "resolved.json", {})
    if finished:
        write_json(folder / "report.json", {})
    return folder


class Notes(Progress):
    """Remembers what it is told."""

    def __init__(self):
        self.notes, self.rows = [], []

    def note(self, text):
        self.notes.append(text)

    def row(self, row):
        self.rows.append(row)


# --- finding the folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "résultats d'été", "실행 結果 🐈"])
def test_a_named_folder_is_new_then_gone_on_with_then_closed(tmp_path, name):
    folder = tmp_path / name
    assert find_run(recipe(output=str(folder))) == Found(folder, unfinished=False)
    assert not folder.exists()  # looking changes nothing
    folder.mkdir()
    assert find_run(recipe(output=str(folder))) == Found(folder, unfinished=False)
    begin(folder)
    assert find_run(recipe(output=str(folder))) == Found(folder, unfinished=True)
    begin(folder, finished=True)
    with pytest.raises(OutputError, match="not empty.*report.md") as caught:
        find_run(recipe(output=str(folder)))
    assert "--fresh" in caught.value.fix


@pytest.mark.parametrize("left", [
    [".lock"], ["metrics.jsonl"], [".lock", ".running.json", "metrics.jsonl", ".resolved.json.part"],
])
def test_a_run_killed_in_its_first_moment_is_ours(tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    assert find_run(recipe(output=str(tmp_path))).unfinished


@pytest.mark.parametrize("name", ["notes.txt", "report.json", "plan.json", "checkpoints"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, name):
    (tmp_path / ".lock").touch()
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match="is not empty, and nothing there is overwritten"):
        find_run(recipe(output=str(tmp_path)))


def test_somebody_elses_metrics_are_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(OutputError, match="is not empty"):
        find_run(recipe(output=str(tmp_path)))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        find_run(recipe(output=str(tmp_path / "file")))
    with pytest.raises(OutputError, match="cannot be written"):
        open_folder(find_run(recipe(output=str(tmp_path / "file" / "run"))))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only to this user")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="cannot be written"):
        open_folder(Found(tmp_path / "run", unfinished=False))


def test_fresh_takes_the_first_free_name_beside(tmp_path):
    folder = begin(tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "notes.txt").touch()
    assert find_run(recipe(output=str(folder)), fresh=True) == Found(tmp_path / "run-3", unfinished=False)
    assert find_run(recipe(output=str(tmp_path / "other")), fresh=True) == Found(tmp_path / "other", unfinished=False)


def test_fresh_beside_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(begin(tmp_path / "run"))
    assert find_run(recipe(output="."), fresh=True).path == tmp_path / "run-2"


def test_automatic_folders_go_on_with_the_newest_and_number_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    assert find_run(recipe()) == Found(runs / "study", unfinished=False)
    begin(runs / "study")
    assert find_run(recipe()) == Found(runs / "study", unfinished=True)
    assert find_run(recipe(), fresh=True) == Found(runs / "study-2", unfinished=False)
    for number in range(2, 11):
        begin(runs / f"study-{number}", finished=True)
    for other in ("study-x", "study-01", "study-99-old", "studying-50"):
        begin(runs / other)
    assert find_run(recipe()) == Found(runs / "study-11", unfinished=False)  # by number, not by letter; study is not the newest
    begin(runs / "study-11")
    assert find_run(recipe()) == Found(runs / "study-11", unfinished=True)


@pytest.mark.parametrize("name", ["..", ".", "../../etc", "a/b", "a\\b", "", "C:evil", "x\0y", "...hidden"])
def test_an_automatic_folder_is_always_in_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found = find_run(recipe(name))
    open_folder(found)
    assert [path.parent for path in tmp_path.rglob("*") if path.is_dir() and path.name != "runs"] == [tmp_path / "runs"]
    assert find_run(recipe(name)) == Found(found.path, unfinished=True)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_in_a_run_folder_are_refused(tmp_path):
    folder, outside = begin(tmp_path / "run"), tmp_path / "outside"
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    refuse_links(folder)
    (tmp_path / "by-link").symlink_to(folder)
    refuse_links(tmp_path / "by-link")  # named by a person, who may mean it
    (tmp_path / "elsewhere").mkdir()
    checkpoints = folder / "checkpoints"
    for place, target in (
        (checkpoints / "checkpoint-2", tmp_path / "elsewhere"),
        (checkpoints / "checkpoint-1" / "optimizer.pt", outside),  # dangling: nothing must be made there either
        (folder / ".lock", outside),
    ):
        place.symlink_to(target)
        with pytest.raises(OutputError, match=f"holds links.*{place.name}"):
            refuse_links(folder)
        place.unlink()


# --- one process at a time ---------------------------------------------------------------------------------------------


_HOLD = """
import sys, time
from pathlib import Path
from qlora.errors import BusyError
from qlora.training.lock import RunLock
assert "torch" not in sys.modules
if len(sys.argv) > 2:
    while time.time() < float(sys.argv[2]): pass
try:
    with RunLock(Path(sys.argv[1])) as held:
        print("held", flush=True)
        sys.stdin.readline()
except BusyError:
    print("busy", flush=True)
"""


@contextlib.contextmanager
def holding(folder, *arguments):
    """A process that tries for the lock, says "held" or "busy", and holds it until it reads a line."""
    command = [sys.executable, "-c", _HOLD, str(folder), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_second_process_is_told_who_is_there(tmp_path):
    folder = tmp_path / "실행"
    folder.mkdir()
    with holding(folder) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(BusyError) as caught:
            RunLock(folder).__enter__()
        assert f"process {child.pid} on {socket.gethostname()}, at work since " in caught.value.problem
        assert "--fresh" in caught.value.fix
        child.communicate("\n")
    assert not (folder / ".running.json").exists()
    with RunLock(folder) as held:
        assert held.taken_over is None


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    with holding(tmp_path) as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        child.wait()
    assert (tmp_path / ".running.json").exists()
    with RunLock(tmp_path) as held:
        assert held.taken_over.startswith(f"process {child.pid} on {socket.gethostname()}")
        assert json.loads((tmp_path / ".running.json").read_text())["pid"] == os.getpid()
    with RunLock(tmp_path) as held:
        assert held.taken_over is None


def test_of_several_at_once_one_gets_in(tmp_path):
    start = str(time.time() + 1.5)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(holding(tmp_path, start)) for _ in range(4)]
        assert sorted(child.stdout.readline() for child in children) == ["busy\n"] * 3 + ["held\n"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'{"pid": "x"}', b"\xff", b'{"pid": 1, "host": "h", "started": 5}', b"[" * 100_000,
], ids=["empty", "cut", "list", "no number", "not UTF-8", "no time", "deep"])
def test_a_damaged_name_tag_blocks_nobody(tmp_path, content):
    (tmp_path / ".running.json").write_bytes(content)
    with RunLock(tmp_path) as held:
        assert held.taken_over == "a process that left an unreadable .running.json"


def test_an_error_within_frees_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path) as held:
        assert held.taken_over is None


def test_a_lock_whose_name_tag_cannot_be_written_is_given_back(tmp_path, monkeypatch):
    def full(path, document):
        raise OutputError(f"{path} cannot be written")

    first = RunLock(tmp_path)  # kept, so that it is not its end that frees the lock
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="cannot be written"):
        patch.setattr(lock_module, "write_json", full)
        first.__enter__()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock here")])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, error):
    def refuse(self, **_):
        raise error

    monkeypatch.setattr(lock_module.FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match="cannot be locked.*(No locks available|no flock here)") as caught:
        RunLock(tmp_path).__enter__()
    assert not isinstance(caught.value, BusyError) and "local disk" in caught.value.fix


def test_a_lock_in_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be locked"):
        RunLock(tmp_path / "file").__enter__()


# --- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_going_on_cuts_what_will_be_done_again(tmp_path):
    path, shown = tmp_path / "mesures-é.jsonl", Notes()
    first = [{"step": step, "loss": 0.1 * step, "text": "é"} for step in range(1, 4)]
    with MetricsFile(path, shown) as metrics:
        for row in first[:2]:
            metrics.add(row)
        kept = metrics.position()
        assert kept == path.stat().st_size
        metrics.add(first[2])
    with path.open("ab") as file:
        file.write(b'{"step": 4, "lo')  # killed in the middle of a line
    with MetricsFile(path, shown, keep_bytes=kept) as metrics:
        assert metrics.rows == first[:2]
        metrics.add({"step": 3})
        assert metrics.rows == [*first[:2], {"step": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*first[:2], {"step": 3}]
    assert shown.rows == [*first, {"step": 3}] and not shown.notes


def test_rows_come_back_to_the_last_bit(tmp_path):
    rows = [{"loss": 0.1 + 0.2}, {"loss": 1e-320}, {"loss": float("inf")}]
    with MetricsFile(tmp_path / "m", Progress()) as metrics:
        for row in rows:
            metrics.add(row)
        kept = metrics.position()
    with MetricsFile(tmp_path / "m", Progress(), keep_bytes=kept) as metrics:
        assert metrics.rows == rows


def test_going_on_from_the_very_beginning(tmp_path):
    with MetricsFile(tmp_path / "m", Progress(), keep_bytes=0) as metrics:
        assert metrics.rows == [] and metrics.position() == 0
        metrics.add({"step": 1})
    with MetricsFile(tmp_path / "m", Progress(), keep_bytes=0) as metrics:
        assert metrics.rows == [] and metrics.position() == 0


@pytest.mark.parametrize(("content", "keep", "message"), [
    (b'{"step": 1}\n', 24, "12 bytes, and had 24"),
    (None, 24, "0 bytes, and had 24"),
    (b'{"step": 1}\n', 5, "no line ends at byte 5"),
    (b'{"step": 1}\n{"st\x00p"\n', 20, "m:2 is damaged"),
    (b'{"step": 1}\n12345678\n', 21, "m:2 is damaged"),
    (b"\n", 1, "m:1 is damaged"),
])
def test_rows_are_never_lost_in_silence(tmp_path, content, keep, message):
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    with pytest.raises(ResumeError, match=message) as caught:
        MetricsFile(tmp_path / "m", Progress(), keep_bytes=keep).__enter__()
    assert "--fresh" in caught.value.fix
    assert not content or (tmp_path / "m").read_bytes() == content  # and left as it was found


@contextlib.contextmanager
def no_file_longer_than(limit_bytes):
    """A full disk, as far as one file goes: the kernel writes up to the limit, then refuses."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_does_not_end_a_run(tmp_path):
    path, shown = tmp_path / "m", Notes()
    rows = [{"step": step, "loss": 1.5} for step in range(8)]
    with MetricsFile(path, shown) as metrics:
        with no_file_longer_than(70):  # two lines and a part of the third
            for row in rows[:6]:
                metrics.add(row)
            assert path.stat().st_size == 70
            with pytest.raises(OutputError, match="cannot be written.*bytes wait in memory"):
                metrics.position()
        assert len(shown.notes) == 1 and "kept in memory" in shown.notes[0]
        assert shown.rows == metrics.rows == rows[:6]
        metrics.add(rows[6])
        assert metrics.position() == path.stat().st_size
        metrics.add(rows[7])
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_rows_that_never_got_out_are_spoken_of(tmp_path):
    shown = Notes()
    with no_file_longer_than(5), MetricsFile(tmp_path / "m", shown) as metrics:
        metrics.add({"step": 1})
    assert "last rows" in shown.notes[-1] and len(shown.notes) == 2


# --- what an unfinished run says of itself -----------------------------------------------------------------------------


@pytest.fixture
def plan():
    return Plan(
        model="builtin:tiny", device="CPU", kind="cpu", budget_bytes=10, fits=True, phases=dict.fromkeys(PHASES, 1),
        parts=dict.fromkeys(PARTS, 1), reserved_bytes=1, host_peak_bytes=1, disk_bytes=1,
        decisions={"lora.r": Decision(16, "rule", "données")}, num_steps=4,
    )


@pytest.fixture
def unfinished(tmp_path, plan):
    """A folder with all three documents, of a recipe that gives lora.r."""
    folder = begin(tmp_path / "실행")
    write_json(folder / "resolved.json", {"recipe": recipe(lora={"r": 16}).model_dump(exclude_unset=True), "versions": {}})
    write_json(folder / "plan.json", plan.to_json())
    RunProgress(folder, checkpoint=8, before={"loss": 2.5}, seconds={"train": 1.5}, events=["é"], sessions=2).save()
    return folder


def test_documents_are_read_back(unfinished, plan):
    saved = read_saved(unfinished)
    assert saved.plan == plan
    assert saved.recipe == recipe(lora={"r": 16}).model_dump() and saved.resolved["versions"] == {}
    expected = RunProgress(unfinished, checkpoint=8, before={"loss": 2.5}, seconds={"train": 1.5}, events=["é"], sessions=2)
    assert saved.progress == expected


@pytest.mark.parametrize("name", ["resolved.json", "plan.json", "progress.json"])
def test_killed_before_the_documents_were_whole(unfinished, name):
    (unfinished / name).unlink()
    assert read_saved(unfinished) is None
    (unfinished / "checkpoints" / "checkpoint-4.bad").mkdir(parents=True)
    with pytest.raises(ResumeError, match=f"{name} is missing"):
        read_saved(unfinished)


@pytest.mark.parametrize("name", ["resolved.json", "plan.json", "progress.json"])
@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:-20], lambda whole: b"[]", lambda whole: b"\xff" + whole,
    lambda whole: b"[" * 100_000,
], ids=["empty", "cut", "list", "not UTF-8", "deep"])
def test_damaged_documents_are_named(unfinished, name, damage):
    path = unfinished / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResumeError, match=f"{name} is damaged") as caught:
        read_saved(unfinished)
    assert "--fresh" in caught.value.fix


@pytest.mark.parametrize(("name", "key", "value"), [
    ("resolved.json", "recipe", {"model": {"base": "x"}, "data": {"path": "y"}, "train": {"unheard_of": 1}}),
    ("resolved.json", "recipe", 5), ("plan.json", "sections", {"nothing": "here"}), ("plan.json", "alternatives", [1]),
    ("progress.json", "checkpoint", "8"), ("progress.json", "events", None), ("progress.json", "before", [1]),
])
def test_documents_of_another_shape_are_named(unfinished, name, key, value):
    document = json.loads((unfinished / name).read_text())
    write_json(unfinished / name, {**document, key: value})
    with pytest.raises(ResumeError, match=f"{name}.* is damaged"):
        read_saved(unfinished)


def test_progress_of_a_newer_version_is_read(unfinished):
    document = json.loads((unfinished / "progress.json").read_text())
    write_json(unfinished / "progress.json", {**document, "folder": "/elsewhere", "unheard_of": 1})
    progress = RunProgress.load(unfinished)
    assert progress.checkpoint == 8 and progress.folder == unfinished
    assert RunProgress.load(unfinished / "nothing") == RunProgress(unfinished / "nothing")


@pytest.mark.parametrize(("before", "now", "line"), [
    ({"lora": {"r": 16}}, {"lora": {"r": 32}}, "lora.r: 16, now 32"),
    ({}, {"lora": {"r": 32}}, "lora.r: auto, now 32"),
    ({"train": {"max_steps": 4}}, {}, "train.max_steps: 4, now null"),
    ({"lora": {"targets": ["q_proj", "v_proj"]}}, {}, "lora.targets: [q_proj, v_proj], now all"),
    ({"data": {"path": "a", "columns": {"question": "Frage"}}}, {}, "data.columns: {question: Frage}, now {}"),
    ({"data": {"path": "a", "validation": "v.jsonl"}}, {"data": {"path": "a", "validation": 0.1}},
     "data.validation: v.jsonl, now 0.1"),
    ({"data": {"path": "a", "validation": "v.jsonl"}}, {}, "data.validation: v.jsonl, now auto"),
    ({"memory": {"device": "cpu"}}, {}, "memory.device: cpu, now auto"),
])
def test_what_changes_the_result_is_a_difference(before, now, line):
    assert differences(recipe(**before).model_dump(exclude_unset=True), recipe(**now)) == [line]
    assert differences(recipe(**before).model_dump(), recipe(**now)) == [line]


def test_what_does_not_change_the_result_is_none():
    before = recipe(model="a", data={"path": "b", "validation": "v.jsonl"}, output="x", hub="me/it", train={"save_every": 5})
    now = recipe(model="builtin:tiny", data={"path": "c", "validation": "w.jsonl"}, memory={"budget": "4GB"},
                 train={"report_to": ["wandb"], "save_every": 7})
    assert differences(before.model_dump(), now) == []
    assert differences(recipe(train={"epochs": 1}).model_dump(), recipe(train={"epochs": 1.0})) == []


def test_every_shipped_recipe_equals_itself_read_back(root):
    paths = sorted((root / "recipes").rglob("*.yaml"))
    assert paths
    for path in paths:
        loaded = load_recipe(path)
        assert differences(json.loads(json.dumps(loaded.model_dump(exclude_unset=True))), loaded) == []
        assert differences(json.loads(json.dumps(loaded.model_dump())), loaded) == []


def test_settings_that_may_change_are_settings():
    known = {doc.key for doc in describe_settings()}
    assert run_documents._FREE_SETTINGS - {"train.save_minutes"} <= known
    assert {key.partition(".")[0] for key in known} > run_documents._FREE_SECTIONS


# --- JSON --------------------------------------------------------------------------------------------------------------


def test_json_is_there_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "é.json"
    write_json(path, {"name": "é \udcff", "path": Path("x")})  # a surrogate: a byte of a file name that is not UTF-8
    before = path.read_bytes()
    assert json.loads(before) == {"name": "é \udcff", "path": "x"} and "é" in before.decode()

    def crash(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OutputError, match="é.json cannot be written: No space left"):
            patch.setattr(os, name, crash)
            write_json(path, {"name": "other"})
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["é.json"]
    with no_file_longer_than(10), pytest.raises(OutputError, match="cannot be written"):
        write_json(path, {"name": "long" * 100})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["é.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(path / "below-a-file.json", {})
