"""What goes wrong around a run, and what the same command makes of it afterwards: it goes on to the same result, to the last
bit, or it stops with one block that names the file and what helps. Everything here is the real program in a process of its own.

`scripts/faults` runs the long form and writes the table of qlora/training/README.md.
"""

import json
import math
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from faults import damage, kills
from faults.lab import NUM_STEPS, SAVE_EVERY, Outcome, read_rows, refused, sealed
from faults.parameters import few_and_many, in_long

pytest_plugins = ["faults.fixtures"]

_NUM_CHAINS, _NUM_LONG_CHAINS = 7, 63  # of about three kills each: 20 and 200 in all


def contents(folder):
    """Every file with its bytes. A lock file comes and goes with whoever looks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# --- the harness itself ------------------------------------------------------------------------------------------------


def test_a_fork_of_the_warm_parent_is_a_program_that_has_just_started(lab):
    """The same bytes as from `python -m qlora` in a new process, with another seed of Python's hashes."""
    import subprocess
    import sys

    from faults.runner import environment

    folder = lab.folder()
    done = subprocess.run(
        [sys.executable, "-m", "qlora", "train", str(lab.recipe), f"output.dir={folder}"], capture_output=True, text=True,
        env={**environment(), "PYTHONHASHSEED": "1"}, cwd=lab.home,
    )
    assert done.returncode == 0, done.stderr
    assert not Outcome.of(folder).differences(lab.reference())


def test_a_difference_in_one_bit_is_found(lab):
    """The comparison that everything here rests on."""
    folder = Path(shutil.copytree(lab.plain.folder, lab.folder()))
    damage.flip_a_byte(folder / "adapter" / "adapter_model.safetensors")
    assert Outcome.of(folder).differences(lab.reference()) == ["the adapter's bytes"]
    metrics = folder / "metrics.jsonl"
    loss = read_rows(folder)[0]["loss"]
    metrics.write_text(metrics.read_text().replace(repr(loss), repr(math.nextafter(loss, 9)), 1))
    assert len(Outcome.of(folder).differences(lab.reference())) == 2


# --- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", few_and_many(_NUM_CHAINS, _NUM_CHAINS + _NUM_LONG_CHAINS))
def test_a_run_that_is_killed_again_and_again_comes_to_the_same(lab, row, seed):
    """kill -9 at any time, within a checkpoint, within rotation, in the first and in the last steps."""
    folder, words, newest = lab.folder(), kills.words(seed), 0
    for kind, faults, seconds in kills.chain(seed, lab):
        process = lab.start(folder, *words, faults=faults)
        if seconds is not None:
            process.poll(seconds)
            process.kill()
        code = process.wait().code
        if (folder / "report.json").exists():
            break  # it was faster, or killed when all was done
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), process.err
        assert max(sealed(folder), default=0) >= newest, "a good checkpoint was lost"
        newest = max(sealed(folder), default=0)
        steps = [each["step"] for each in read_rows(folder)]
        # A checkpoint is written right after the row of its step, so the row of the next one may be there as well.
        assert max(steps, default=0) - newest <= SAVE_EVERY
        row(f"kill -9 {kind}", "went on; the same to the last bit")
    if (folder / "report.json").exists():
        assert not Outcome.of(folder).differences(lab.reference(*words))
    else:
        found = re.search(r"Going on with .* from step (\d+)", lab.finish(folder, *words).shown)
        assert not newest or (found and int(found[1]) >= newest)  # a checkpoint that was whole, but not yet renamed, counts too


def lose_power(lab, folder, pattern, count, seed):
    fault = ("lose_power", {"below": str(folder), "pattern": pattern, "count": count, "seed": seed})
    assert lab.run(folder, faults=[fault]).code == -signal.SIGKILL


@pytest.mark.parametrize("seed", few_and_many(1, 40))
def test_a_power_cut_loses_what_was_not_on_the_disk_and_nothing_else(lab, row, seed):
    """As kill -9, but what had not been fsynced goes with it."""
    folder = lab.folder()
    lose_power(lab, folder, "/checkpoints/", random.Random(seed).randint(1, lab.plain.count("/checkpoints/")), seed)
    lab.finish(folder)
    row("power cut in a checkpoint or in rotation", "went on; the same to the last bit")


@pytest.mark.parametrize("before_the_last", few_and_many(1, 12))
def test_a_power_cut_at_the_very_end(lab, row, before_the_last):
    """A run that calls itself finished has its adapter on the disk."""
    folder = lab.folder()
    pattern = kills.LAST_STEPS + r"|/\.running\.json$"
    lose_power(lab, folder, pattern, lab.plain.count(pattern) - before_the_last, before_the_last)
    done = lab.run(folder)
    if done.code:
        refused(done, 2, "finished")
    assert not Outcome.of(folder).differences(lab.reference())
    row("power cut in the last steps", "finished, or went on; the same to the last bit")


# --- a disk that does not take it --------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_a_checkpoint(lab, row, small_disk):
    """A real file system that is full. With room again, the same command goes on."""
    folder = small_disk("size=128m") / "run"
    full = ("at_step", {"step": 6, "action": "fill_disk", "ballast": str(folder.parent / "ballast")})
    done = lab.run(folder, faults=[full])
    refused(done, 2, str(folder), "No space left on device")
    (folder.parent / "ballast").unlink()
    assert sealed(folder)[-1] == 4
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".incoming")]
    lab.finish(folder, said=["step 4"])
    row("disk full at a checkpoint (tmpfs)", "stopped, with the folder and the bytes; with room again the same to the last bit")


_WRITES = {  # path, which of its operations, of which kinds
    "checkpoint": (r"/\.incoming-6$", 1, "mkdir"), "file": (r"/\.incoming-6/", 2, "open fsync"),
    "manifest": (r"/\.incoming-6/.*manifest", 1, "open"), "rename": (r"/checkpoint-6$", 1, "rename"),
    "adapter": (r"/\.?adapter(\.part)?/", 2, "open"), "report": (r"/\.?report\.json", 1, "open"),
}
_QUICK_WRITES = [("manifest", False), ("report", False), ("rename", True)]


@pytest.mark.parametrize(("where", "lasting"), [
    pytest.param(where, lasting, id=f"{where}, {'from then on' if lasting else 'once'}",
                 marks=[] if (where, lasting) in _QUICK_WRITES else pytest.mark.long)
    for where in _WRITES for lasting in (False, True)
])
def test_a_write_that_fails(lab, row, where, lasting):
    """Whatever the operating system refuses, once (ENOSPC) or from then on (EROFS), what was good stays."""
    folder = lab.folder()
    pattern, count, kinds = _WRITES[where]
    fault = {"pattern": pattern, "count": count, "kinds": kinds, "action": "fail", "code": "ENOSPC"}
    if lasting:
        fault.update(code="EROFS", then_below=str(folder))
    done = lab.run(folder, faults=[("at_operation", fault)])
    if done.code == 0:
        assert not Outcome.of(folder).differences(lab.reference())
        assert where not in ("adapter", "report") and "No space left on device" in done.shown, done.told
        row(f"a write fails ({where})", "said so, went on, the same to the last bit")
        return
    refused(done, 2, str(folder), "ead-only file system" if lasting else "No space left on device")
    lab.finish(folder)
    row(f"a write fails ({where})", "stopped, naming the file; afterwards the same to the last bit")


@pytest.mark.long
def test_a_file_that_may_not_grow(lab, row):
    """The limit of a process (or of a file system) cuts a checkpoint's file in the middle."""
    folder = lab.folder()
    limit = {"pattern": r"/\.incoming-6$", "count": 1, "kinds": "mkdir", "action": "limit_files", "num_bytes": 100_000}
    done = lab.run(folder, faults=[("at_operation", limit)])
    assert done.code == 0, done.told
    said = ("checkpoint of step 6 could not be written", "File too large", "iB are free")
    assert all(each in done.shown for each in said), done.told
    assert sealed(folder)[-1] == 4
    assert not Outcome.of(folder).differences(lab.reference())
    row("file size limit at a checkpoint", "said so, with the bytes, and went on without; the same to the last bit")


def test_a_place_that_cannot_be_written_is_refused_before_any_work(lab, row, small_disk):
    (lab.home / "a file").write_text("not a folder")
    done = lab.run(lab.home / "a file" / "run")
    refused(done, 2, str(lab.home / "a file"), "output.dir")
    assert "Loading" not in done.err
    row("output below a file", "refused before the model loads")
    done = lab.run(small_disk("ro") / "run")
    refused(done, 2, "ead-only file system", "output.dir")
    assert "Loading" not in done.err
    row("output on a read-only file system", "refused before the model loads")


# --- damaged checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_off(lab):
    """A run that was killed in step 12, with checkpoints 8 and 10."""
    folder = lab.folder()
    done = lab.run(folder, faults=[("at_step", {"step": NUM_STEPS, "action": "die"})])
    assert done.code == -signal.SIGKILL, done.told
    assert sealed(folder) == [NUM_STEPS - 4, NUM_STEPS - 2]
    return folder


_DAMAGE = (
    "trainer_state.json cut", "an empty folder", "optimizer.pt missing", "rng_state.pth missing", "adapter of another step",
    "one byte of the adapter flipped", "one byte of the manifest flipped",
)


@pytest.mark.parametrize("name", [*_DAMAGE, *in_long(*(name for name in damage.CASES if name not in _DAMAGE))])
def test_a_damaged_checkpoint_is_set_aside(lab, row, broken_off, name):
    folder = Path(shutil.copytree(broken_off, lab.folder()))
    newest, older = (folder / "checkpoints" / f"checkpoint-{step}" for step in (NUM_STEPS - 2, NUM_STEPS - 4))
    damage.CASES[name](newest, older)
    lab.finish(folder, said=["checkpoint-10 is damaged", *damage.NAMED[name], "checkpoint-10.bad", "step 8"])
    assert (folder / "checkpoints" / "checkpoint-10.bad").is_dir()
    row(f"newest checkpoint: {name}", "set aside, fell back; the same to the last bit")


def test_with_no_good_checkpoint_left_it_stops_and_starts_anew_only_when_told(lab, row, broken_off):
    folder = Path(shutil.copytree(broken_off, lab.folder()))
    for step in sealed(folder):
        damage.flip_a_byte(folder / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    done = lab.run(folder)
    refused(done, 2, "checkpoint-10", "checkpoint-8", "optimizer.pt", "--fresh")
    refused(lab.run(folder), 2, "no good checkpoint", "--fresh")  # they are set aside now, and it still does not start over
    assert not (folder / "report.json").exists()
    assert lab.run(folder, "--fresh").code == 0
    beside = folder.with_name(f"{folder.name}-2")
    assert not Outcome.of(beside).differences(lab.reference())
    row("every checkpoint damaged", "refused, naming the files and --fresh, which then works", runs=3)


@pytest.mark.parametrize("name", ["metrics.jsonl", "progress.json", "plan.json", "resolved.json"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_document_of_the_run_is_named(lab, row, broken_off, name, how):
    folder = Path(shutil.copytree(broken_off, lab.folder()))
    damage.cut(folder / name) if how == "cut" else (folder / name).unlink()
    refused(lab.run(folder), 2, name)
    assert sealed(folder) == [NUM_STEPS - 4, NUM_STEPS - 2]
    row(f"{name} {how}", "refused, naming the file")


# --- numbers that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gradient", *in_long("loss")])
def test_a_step_that_is_not_finite_stops_the_run_before_it_counts(lab, row, where):
    """Something that passes (a bit that flipped, another version) costs the steps since the last checkpoint."""
    folder = lab.folder()
    spoil = ("not_a_number", {"where": where, "step": 8, "micro_batch": 2})
    refused(lab.run(folder, faults=[spoil]), 4, "step 8", where, "learning_rate")
    assert not (folder / "adapter").exists() and not (folder / "report.json").exists()
    refused(lab.run(folder, faults=[spoil]), 4, "step 8")
    row(f"NaN in the {where}, always", "exit code 4, naming the step; never saved", runs=2)
    lab.finish(folder)
    row(f"NaN in the {where}, once", "exit code 4; afterwards the same to the last bit")


@pytest.mark.parametrize("step", [6, *in_long(7)], ids=["before a checkpoint", "after a checkpoint"])
def test_a_weight_that_is_not_finite_is_never_saved(lab, row, step):
    folder = lab.folder()
    refused(lab.run(folder, faults=[("poke_weight", {"step": step})]), 4, "not finite")
    assert sealed(folder)[-1] == 4 + 2 * (step == 7)
    assert not (folder / "adapter").exists()
    lab.finish(folder)
    row("NaN in a weight alone", "exit code 4 at the next step or checkpoint, never saved; afterwards the same to the last bit")


# --- stopped from outside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", in_long(signal.SIGTERM, signal.SIGHUP, signal.SIGINT), ids=["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_saves_the_step_and_ends_the_run(lab, row, number):
    folder = lab.folder()
    done = lab.run(folder, faults=[("at_step", {"step": 5, "action": "interrupt", "number": number})])
    refused(done, 128 + number, "To go on: qlora train")
    assert sealed(folder)[-1] == 5
    lab.finish(folder, said=["step 5"])
    row(number.name, f"checkpoint of that very step, exit code {128 + number}; then the same to the last bit")


def test_a_signal_from_another_process(lab, row):
    """As a shell or a scheduler sends it, at any moment."""
    folder = lab.folder()
    process = lab.start(folder)
    process.wait_for(lambda: read_rows(folder))
    process.kill(signal.SIGINT)
    done = process.wait()
    refused(done, 130, "To go on: qlora train")
    lab.finish(folder, said=[f"step {sealed(folder)[-1]}"])
    row("SIGINT", "checkpoint of that very step, exit code 130; then the same to the last bit")


@pytest.mark.long
def test_a_second_ctrl_c_stops_now(lab, row):
    folder = lab.folder()
    twice = [("at_step", {"step": 6, "micro_batch": micro, "action": "interrupt", "number": signal.SIGINT}) for micro in (1, 2)]
    done = lab.run(folder, faults=twice)
    refused(done, 130, "checkpoint of step 4", "To go on: qlora train")
    assert sealed(folder) == [2, 4]
    lab.finish(folder, said=["step 4"])
    row("SIGINT twice", "stopped at once, exit code 130; then the same to the last bit")


def test_a_second_ctrl_c_within_a_checkpoint_leaves_the_older_one_intact(lab, row):
    folder = lab.folder()
    faults = [
        ("at_step", {"step": 6, "action": "interrupt", "number": signal.SIGINT}),
        ("at_operation", {"pattern": r"/\.incoming-6/", "count": 3, "action": "interrupt", "number": signal.SIGINT}),
    ]
    refused(lab.run(folder, faults=faults), 130, "checkpoint of step 4")
    assert sealed(folder) == [2, 4]
    lab.finish(folder, said=["step 4"])
    row("SIGINT twice, within a checkpoint", "stopped at once, older checkpoint intact; then the same to the last bit")


@pytest.mark.parametrize("where", ["before training", *in_long("after training")])
@pytest.mark.parametrize("number", [signal.SIGINT, *in_long(signal.SIGTERM)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_outside_training(lab, row, number, where):
    folder = lab.folder()
    path = r"/plan\.json" if where == "before training" else r"/\.adapter\.part/"
    done = lab.run(folder, faults=[("at_operation", {"pattern": path, "count": 1, "action": "interrupt", "number": number})])
    # There is nothing to save: SIGTERM ends it as any program, which a shell shows as 143.
    assert done.code in ((130,) if number == signal.SIGINT else (143, -number)), done.told
    assert "Traceback" not in done.err and ("nterrupted" in done.err) == (number == signal.SIGINT), done.told
    lab.finish(folder)
    row(f"{number.name} {where}", f"exit code {128 + number}; then the same to the last bit")


# --- two at once -------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(lab, row):
    folder = lab.folder()
    process = lab.start(folder)
    process.wait_for(lambda: read_rows(folder))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        refused(lab.run(folder), 2, str(process.pid), str(folder))
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait().code == 0
    assert not Outcome.of(folder).differences(lab.reference())
    row("second run in the folder", "refused, naming the process; the first one is not disturbed")


def test_of_two_that_begin_together_one_is_refused(lab, row):
    """The second has found the folder free, and is slow: the first has finished in it by the time that it comes to write."""
    folder = lab.folder()
    slow = lab.start(folder)
    slow.wait_for("Starting")
    os.kill(slow.pid, signal.SIGSTOP)
    try:
        assert not folder.exists(), "too late to prove anything"
        assert lab.run(folder).code == 0
        before = contents(folder)
    finally:
        os.kill(slow.pid, signal.SIGCONT)
    refused(slow.wait(), 2, str(folder))
    assert contents(folder) == before
    row("two runs begin in a folder at once", "one is refused; the other is not disturbed")


def test_the_lock_of_a_killed_run_is_taken_over(lab, row):
    folder = lab.folder()
    process = lab.start(folder, faults=[("at_step", {"step": 5, "action": "die"})])
    assert process.wait().code == -signal.SIGKILL
    lab.finish(folder, said=[str(process.pid), "step 4"])
    row("lock left by kill -9", "taken over, and said so; the same to the last bit")


# --- what has changed meanwhile ----------------------------------------------------------------------------------------


def test_other_versions_are_told_and_nothing_is_claimed(lab, row, broken_off):
    folder = Path(shutil.copytree(broken_off, lab.folder()))
    done = lab.run(folder, faults=[("pretend_versions", {"versions": {"bitsandbytes": "0.99.7"}})])
    assert done.code == 0, done.told
    assert "0.99.7" in done.shown and "not known" in done.shown
    row("other versions of libraries", "said so, claimed no exactness, went on")


def test_other_settings_are_refused_by_name_unless_forced(lab, row, broken_off):
    folder = Path(shutil.copytree(broken_off, lab.folder()))
    refused(lab.run(folder, "lora.alpha=32", "train.learning_rate=1e-3"), 2, "lora.alpha: auto, now 32", "train.learning_rate",
            "--fresh", "--force")
    row("settings changed", "refused, naming each")
    lab.finish(folder, "train.save_every=5", like=lab.reference())
    row("a setting changed that leaves the result", "went on; the same to the last bit")
    folder = Path(shutil.copytree(broken_off, lab.folder()))
    done = lab.run(folder, "train.learning_rate=1e-3", "--force")
    assert done.code == 0 and "learning_rate" in done.shown, done.told
    now, before = ([rows["learning_rate"] for rows in outcome.rows if rows["step"] == NUM_STEPS - 1 and "loss" in rows]
                   for outcome in (Outcome.of(folder), lab.reference()))
    assert now == pytest.approx([before[0] / 5])  # the rate is a fifth of what it was, and must not be so in words alone
    row("settings changed, --force", "said so, went on")


def test_edited_data_is_refused_unless_forced(lab, row):
    folder, rows = lab.folder(), lab.home / "edited.jsonl"
    shutil.copy(lab.data, rows)
    words = (f"data.path={rows}",)
    assert lab.run(folder, *words, faults=[("at_step", {"step": NUM_STEPS, "action": "die"})]).code == -signal.SIGKILL
    rows.write_text(rows.read_text().replace("house", "horse"))
    refused(lab.run(folder, *words), 2, "data.path", str(rows), "--fresh", "--force")
    assert lab.run(folder, *words, "--force").code == 0
    row("data edited meanwhile", "refused, naming the file; --force goes on", runs=2)


def test_another_base_is_refused(lab, row, broken_off):
    """Under the same name: somebody has merged something into it, say."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(broken_off, lab.folder()))
    model = Path(shutil.copytree(lab.model, lab.home / "another"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += torch.randn(weights["model.layers.1.mlp.up_proj.weight"].shape)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(lab.run(folder, f"model.base={model}"), 2, "model.base", "--fresh", "--force")
    row("weights of the base changed", "refused, naming it")


def test_without_any_checkpoint_it_begins_again(lab, row):
    folder = lab.folder()
    assert lab.run(folder, faults=[("at_step", {"step": 2, "action": "die"})]).code == -signal.SIGKILL
    lab.finish(folder, said=["begins again"])
    row("kill -9 before the first checkpoint", "said so, began again; the same to the last bit")


def test_a_finished_run_is_left_alone(lab, row):
    folder, before = lab.plain.folder, contents(lab.plain.folder)
    refused(lab.run(folder), 2, "finished", "--fresh")
    assert contents(folder) == before
    row("finished run", "refused; nothing in it changed")


# --- other -------------------------------------------------------------------------------------------------------------


def test_names_that_are_not_ascii(lab, row):
    """Folder, data, recipe and model; the run folder's name is made from the recipe's."""
    home = lab.home / "실험 🚀 \"a\" 'b'"
    home.mkdir()
    data = Path(shutil.copy(lab.data, home / "행 é.jsonl"))
    recipe = lab.write_recipe(home / "조리법 🚀 'x' \"y\".yaml", data)
    model = Path(shutil.copytree(lab.model, home / "모델"))
    argv = ["train", recipe.name, f"model.base={model}"]
    into = home / "arguments.json"
    faults = [("at_step", {"step": 10, "action": "die"}), ("note_trainer", {"into": str(into)})]
    killed = lab.zygote.run(argv, cwd=home, faults=faults)
    assert killed.code == -signal.SIGKILL, killed.told
    (folder,) = (home / "runs").iterdir()
    done = lab.zygote.run(argv, cwd=home)
    assert done.code == 0, done.told
    assert [folder] == list((home / "runs").iterdir()) and folder.name.startswith("조리법 🚀 'x'")
    assert not Outcome.of(folder).differences(lab.reference())
    row("names with Hangul, emoji, blanks and quotes", "as with any other; the same to the last bit")
    # Rows are in memory as tokens, so a worker would have nothing to do but could be lost.
    assert json.loads(into.read_text())["dataloader_num_workers"] == 0
