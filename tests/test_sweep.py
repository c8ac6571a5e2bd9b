"""Sweeps: what is searched, how it is decided, one base for all runs, and the same table after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

from qlora import guidance
from qlora.cli import main
from qlora.errors import DataError, DivergedError, DoesNotFitError, HardwareError, OutputError, RecipeError, ResumeError
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.sweeping import read_order, sweep
from qlora.sweeping.preview import preview
from qlora.sweeping.results import Figures, Point, smallest_as_good
from qlora.sweeping.search import guided
from qlora.sweeping.space import Range, guided_space, name_of, overrides_of, read_space
from qlora.sweeping.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ("train.max_steps=2", "train.sample_rows=2", "train.save_every=1", "train.eval_every=0", "train.learning_rate=0.005",
        "train.batch=2", "train.micro_batch=1", "memory.checkpointing=true", "memory.device=cpu", "memory.budget=1GB")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "the cat " * (1 + i % 4)}]
             for i in range(24)]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return path


@pytest.fixture(scope="module")
def recipe(small_model, rows):
    """A function that makes a recipe; words are overrides."""

    def make(*overrides, **sections):
        data = {"path": str(rows), "validation": 0.25, **sections.pop("data", {})}
        return build_recipe("tried", [*FAST, *overrides], model=str(small_model), data=data, **sections)

    return make


@pytest.fixture(scope="module")
def swept(recipe, tmp_path_factory, one_thread):
    """One small grid, ended: to be compared with a run alone, and looked at again and again."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    order = read_order(recipe(), grid=["lora.r=2,4", "lora.alpha=2r"], num_seeds=1, out=str(folder), keep="all")
    return order, sweep(order)


def with_run_of(swept, folder, name):
    """A sweep's folder with one finished run of another, which is read and not made again."""
    order, _ = swept
    shutil.copytree(order.folder / "trials" / name, folder / "trials" / name)
    return folder


def plain(result):
    """All that must be equal after a stop: not seconds, nor a measurement to the last byte."""
    def strip(value):
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if key not in ("seconds", "measured_bytes", "versions")}
        return [strip(each) for each in value] if isinstance(value, list | tuple) else value

    return strip(result.to_json())


def point(name, *losses, parameters=10, problem=""):
    runs = tuple(Figures(seed, "", parameters, 1, 1, 1.0, 1, 1e-3, 5.0, loss) for seed, loss in enumerate(losses))
    return Point(name, {"lora.r": name}, {"lora.r": name}, runs, problem)


# --- what is searched --------------------------------------------------------------------------------------------------


def test_alpha_in_ranks_is_a_number_where_the_rank_is_known(recipe):
    assert overrides_of({"lora.r": 8, "lora.alpha": "2r"}, recipe()) == ["lora.r=8", "lora.alpha=16"]
    assert overrides_of({"lora.alpha": "1.5r"}, recipe("lora.r=4")) == ["lora.alpha=6"]
    assert overrides_of({"lora.alpha": "4r"}, recipe()) == ["lora.alpha=aggressive"]
    with pytest.raises(RecipeError, match="needs a rank"):
        overrides_of({"lora.alpha": "3r"}, recipe())


def test_values_and_names(recipe):
    space = read_space(["lora.r=8,16", "lora.dropout=0,1e-1", "lora.targets=[q_proj, v_proj],all"], recipe(), ranges=False)
    assert space["lora.r"] == (8, 16) and space["lora.dropout"] == (0, 0.1)
    assert space["lora.targets"] == ("[q_proj, v_proj]", "all")
    names = {name_of({"lora.r": r, "lora.targets": targets}, recipe()) for r in (8, 16) for targets in space["lora.targets"]}
    assert "r8-all" in names and len(names) == 4 and not any(set(name) & set("/ []") for name in names)
    drawn = read_space(["train.weight_decay=1e-3..1e-1", "lora.r=4..64"], recipe(), ranges=True)
    assert drawn == {"train.weight_decay": Range(1e-3, 1e-1), "lora.r": Range(4, 64)} and drawn["lora.r"].whole


@pytest.mark.parametrize(("words", "said"), [
    ([], "empty"), (["lora.r="], "no values"), (["lora.r"], "no values"), (["lora.r=8,,16"], "empty"), (["lora.r=8,8"], "twice"),
    (["lora.r=4", "lora.r=8"], "twice"), (["lora.rank=8"], "lora.r"), (["lora.r=8,zero"], "zero"), (["lora.alpha=r,-2"], "-2"),
    (["train.seed=1,2"], "--seeds"), (["data.path=a,b"], "compared"),
    (["train.epochs=1,2", "train.max_steps=1,2"], "command line"),
    (["lora.r=" + ",".join(map(str, range(1, 40))), "lora.alpha=" + ",".join(map(str, range(1, 40)))], "combinations"),
])
def test_a_grid_that_makes_no_sense_is_refused(recipe, words, said):
    with pytest.raises(RecipeError, match=said):
        read_space(words, recipe(), ranges=False)


@pytest.mark.parametrize("text", ["8..4", "a..b", "1..", "1..inf"])
def test_a_range_that_is_none_is_refused(recipe, text):
    with pytest.raises(RecipeError, match="not a range"):
        read_space([f"lora.r={text}"], recipe(), ranges=True)


def test_what_is_given_on_the_command_line_is_not_searched(recipe):
    assert list(guided_space(recipe("lora.targets=qv"))) == ["lora.r", "lora.alpha"]
    with pytest.raises(RecipeError, match="nothing left"):
        guided_space(recipe("lora.r=8", "lora.alpha=8", "lora.targets=qv"))


# --- what is decided ---------------------------------------------------------------------------------------------------


def test_a_gain_must_be_above_its_noise_and_matter():
    pays = lambda before, after: guidance.gain_pays(before, after).value  # noqa: E731
    assert pays([2.0, 2.1, 1.9], [1.9, 2.0, 1.8])  # the same gain with every seed, however far those are apart
    assert not pays([2.0, 2.1, 1.9], [1.995, 2.095, 1.895])
    assert not pays([2.0, 2.1, 1.9], [1.5, 2.4, 1.8])  # 0.1 on average, by chance
    assert not pays([2.0], [2.1]) and pays([2.0], [1.9])
    assert "no evidence" in guidance.gain_pays([2.0], [1.9]).reason


def test_of_those_that_are_as_good_the_smallest_is_taken():
    large, small = point("large", 1.0, 1.1, parameters=40), point("small", 1.005, 1.104, parameters=10)
    weak, broken = point("weak", 1.5, 1.6, parameters=5), point("broken", parameters=1, problem="diverged")
    assert smallest_as_good([large, small, weak, broken]).point is small
    assert smallest_as_good([broken]).point is None


def test_guided_goes_up_in_rank_until_it_no_longer_pays_then_alpha_then_targets(recipe):
    gains = {"lora.r": {4: 0.0, 8: 0.3, 16: 0.305, 32: 0.9}, "lora.alpha": {"r": 0.0, "2r": 0.2, "4r": 0.1},
             "lora.targets": {"qv": -0.5, "attention": 0.0, "all": 0.0}}
    tried, most = [], []

    def evaluate(values, left):
        tried.append((values["lora.r"], values["lora.alpha"], values["lora.targets"]))
        most.append(len(tried) + left)
        loss = 3.0 - sum(gains[key][value] for key, value in values.items())
        made = point("-".join(map(str, tried[-1])), loss, loss + 0.5)
        return replace(made, values=dict(values), settings=dict(values))

    choice = guided(guided_space(recipe()), evaluate)
    assert tried == [(4, "r", "all"), (8, "r", "all"), (16, "r", "all"), (8, "2r", "all"), (8, "4r", "all"), (8, "2r", "qv"),
                     (8, "2r", "attention")]
    assert choice.point.name == "8-2r-attention" and len(choice.reasons) == 6
    assert most[-1] == len(tried) and most == sorted(most, reverse=True)


def test_guided_stops_doubling_at_what_does_not_fit(recipe):
    def evaluate(values, left):
        fits = values["lora.r"] < 8
        made = point(str(values), *([1.0, 1.1] if fits else []), problem="" if fits else "does not fit: needs 9 of 8")
        return replace(made, values=dict(values), settings=dict(values))

    choice = guided(guided_space(recipe("lora.alpha=8", "lora.targets=all")), evaluate)
    assert choice.point.values == {"lora.r": 4} and "does not fit" in choice.reasons[0]


# --- the study ---------------------------------------------------------------------------------------------------------


def test_a_study_gives_back_what_was_added_and_survives_half_a_line(tmp_path):
    space = {"lora.r": (4, 8)}
    added = replace(point("r4", 1.25, 1.5), values={"lora.r": 4}, settings={"lora.r": 4})
    Study(tmp_path, 0).add(added, space)
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "half')
    (tmp_path / "study.journal.lock").write_text("")  # of a process that was killed in the middle of writing
    again = Study(tmp_path, 0)
    again.add(replace(point("r8", problem="diverged"), values={"lora.r": 8}, settings={"lora.r": 8}), space)
    assert again.points[0] == added and [p.name for p in Study(tmp_path, 0).points] == ["r4", "r8"]
    journal.write_bytes(b"no journal\n")
    with pytest.raises(OutputError, match="damaged"):
        Study(tmp_path, 0)


def test_proposals_follow_from_the_results_and_not_from_how_often_the_program_started(tmp_path):
    space = {"train.learning_rate": Range(1e-4, 1e-2), "lora.r": (4, 8, 16)}

    def draw(folder, reopen, best=3e-3):
        folder.mkdir()
        study, drawn = Study(folder, 7), []
        for number in range(13):  # ten are drawn blindly
            study = Study(folder, 7) if reopen else study
            values = study.propose(space, number, number)
            drawn.append(values)
            loss = abs(values["train.learning_rate"] - best)
            study.add(replace(point(f"p{number}", loss), values=values, settings=values), space)
        return drawn

    once = draw(tmp_path / "a", False)
    assert once == draw(tmp_path / "b", True) and len({str(values) for values in once}) == 13
    assert all(1e-4 <= values["train.learning_rate"] <= 1e-2 for values in once)
    other = draw(tmp_path / "c", False, best=1e-2)
    assert other[:10] == once[:10] and other[10:] != once[10:]


# --- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_in_a_sweep_is_the_run_alone_to_the_last_bit(swept, tmp_path):
    """The last point: another run has put its adapters on the base before it."""
    from qlora.training.run import train

    order, result = swept
    inside = order.folder / result.points[-1].runs[0].folder
    alone = train(order.recipe.with_overrides(["lora.r=4", "lora.alpha=8", f"output.dir={tmp_path / 'alone'}"]))
    name = "adapter/adapter_model.safetensors"
    assert (inside / name).read_bytes() == (alone.folder / name).read_bytes()

    def steps(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timed = {"seconds", "tokens_per_second", "memory_bytes", "monitor_seconds"}
        return [{key: value for key, value in line.items() if key not in timed} for line in lines]

    assert steps(inside) == steps(alone.folder) and steps(inside)
    mine, theirs = (json.loads((folder / "report.json").read_text()) for folder in (inside, alone.folder))
    assert mine["before"] == theirs["before"] and mine["after"] == theirs["after"]
    assert mine["planned_phases"] == theirs["planned_phases"]
    for phase, size in theirs["measured_phases"].items():  # the base was there before the run, and counts all the same
        assert abs(mine["measured_phases"][phase] - size) < 8192


def test_the_base_is_loaded_once_and_left_as_it_was(recipe, tmp_path, one_thread):
    import torch

    from qlora.model.build import fingerprint_base
    from qlora.precision import choose_precision
    from qlora.training.bases import Bases
    from qlora.training.building import build_model
    from qlora.training.setup import prepare

    bases, setup = Bases(), prepare(recipe("lora.r=4"))
    first = bases.take(setup, Progress())
    pointers = {p.data_ptr() for p in first.model.parameters()}
    before = fingerprint_base(first.model)
    model, _ = build_model(setup, Progress(), first)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    second = bases.take(setup, Progress())
    assert bases.num_loads == 1 and second.model is not first.model
    assert {p.data_ptr() for p in second.model.parameters()} == pointers and second.tensor_bytes > 0
    assert not any("lora" in name for name, _ in second.model.named_modules())
    assert second.model.config._attn_implementation == "sdpa" and fingerprint_base(second.model) == before
    other = choose_precision("fp32" if setup.precision.compute == "bf16" else "bf16", setup.device)
    bases.take(replace(setup, precision=other), Progress())
    assert bases.num_loads == 2
    bases.let_go()


def test_what_a_sweep_leaves(swept):
    order, result = swept
    assert [p.name for p in result.points] == ["r2-alpha4", "r4-alpha8"]
    names = {path.name for path in order.folder.iterdir()}
    assert {"sweep.json", "sweep.md", "study.journal", "plots", "trials"} <= names and ".running.json" not in names
    assert {"loss-r.png", "cost.png"} == {path.name for path in (order.folder / "plots").iterdir()}
    document, page = json.loads((order.folder / "sweep.json").read_text()), (order.folder / "sweep.md").read_text()
    assert document["winner"] == result.winner.name and all(p["parameters"] for p in document["points"])
    assert all(p["loss_after"] < p["loss_before"] and p["planned_bytes"] and p["measured_bytes"] for p in document["points"])
    assert page.count("\n| 2 | 4 | ") == 1 and page.count("\n| 4 | 8 | ") == 1 and "✓" in page and "no spread" in page
    run = order.folder / result.points[0].runs[0].folder
    assert (run / "adapter").is_dir() and not (run / "checkpoints").exists()


def test_a_finished_sweep_runs_nothing_again_and_its_study_is_read_from_the_runs(swept, tmp_path):
    order, result = swept
    shown = {path: path.stat().st_mtime_ns for path in order.folder.rglob("report.json")}
    assert plain(sweep(order)) == plain(result)
    (order.folder / "study.journal").unlink()
    assert plain(sweep(order)) == plain(result)
    assert shown == {path: path.stat().st_mtime_ns for path in order.folder.rglob("report.json")}
    shutil.copytree(order.folder, tmp_path / "sweep", ignore=shutil.ignore_patterns("trials"))  # and the runs from the study
    assert plain(sweep(replace(order, folder=tmp_path / "sweep"))) == plain(result)


def test_a_sweep_that_stops_in_the_middle_comes_to_the_same_table(recipe, swept, tmp_path):
    """It stops in the second of two runs, after a checkpoint."""
    _, whole = swept
    folder = with_run_of(swept, tmp_path / "sweep", "r2-alpha4-seed42")
    order = read_order(recipe(), grid=["lora.r=2,4", "lora.alpha=2r"], num_seeds=1, out=str(folder), keep="all")

    class Stops(Progress):
        steps = 0

        @staticmethod
        def update(done, total):
            Stops.steps += 1
            if Stops.steps == 2:
                raise OSError(28, "No space left on device")

        def stage(self, text, **options):
            return nullcontext(self.update if text.startswith("Run") else lambda done, total: None)

    with pytest.raises(OSError, match="No space"):
        sweep(order, Stops())
    unfinished = order.folder / "trials" / "r4-alpha8-seed42"
    assert unfinished.is_dir() and not (unfinished / "report.json").exists()
    assert "Not finished" in (order.folder / "sweep.md").read_text()
    again = sweep(order)
    assert plain(again)["points"] == plain(whole)["points"] and again.winner.name == whole.winner.name


@pytest.mark.parametrize(("change", "said"), [
    (dict(words=["lora.r=2,8", "lora.alpha=2r"]), "values that are searched"), (dict(num_seeds=2), "seeds: 42, now 42,43"),
    (dict(overrides=["train.max_steps=3"]), "train.max_steps: 2, now 3"), (dict(rows="short.jsonl"), "rows to train on"),
    (dict(search=True), "search"),
])
def test_a_sweep_that_was_begun_with_something_else_is_not_gone_on_with(swept, recipe, rows, tmp_path, change, said):
    order, _ = swept
    words = change.get("words", ["lora.r=2,4", "lora.alpha=2r"])
    data = {}
    if "rows" in change:
        path = tmp_path / change["rows"]
        path.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
        data = {"path": str(path)}
    how = {} if "search" in change else {"grid": words}
    given = recipe(*change.get("overrides", ()), data=data)
    other = read_order(given, num_seeds=change.get("num_seeds", 1), out=str(order.folder), **how)
    with pytest.raises(ResumeError, match=said):
        sweep(other)


def test_a_finished_run_of_other_settings_is_not_taken_for_a_trial(swept, recipe, tmp_path):
    order, result = swept
    folder = tmp_path / "sweep"
    (folder / "trials").mkdir(parents=True)
    shutil.copytree(order.folder / result.points[0].runs[0].folder, folder / "trials" / "r4-seed42")
    with pytest.raises(ResumeError, match="lora.r: 2, now 4"):
        sweep(read_order(recipe("lora.alpha=4"), grid=["lora.r=4"], num_seeds=1, out=str(folder)))


def test_what_does_not_fit_and_what_diverges_are_rows(recipe, swept, tmp_path, monkeypatch):
    """The planner and the trainer raise these by themselves, see their own tests; here it matters what a sweep makes of them."""
    from qlora.training import run

    def train(given, *words, **options):
        if given.lora.r == 3:
            raise DoesNotFitError("too large", "", 9 * 2**30, 8 * 2**30)
        raise DivergedError("The loss is not finite in step 3. All weights are.\nMore of it.", "")

    monkeypatch.setattr(run, "train", train)
    folder = with_run_of(swept, tmp_path / "sweep", "r4-alpha8-seed42")
    order = read_order(recipe(), grid=["lora.r=3,4,5", "lora.alpha=2r"], num_seeds=1, out=str(folder), keep="none")
    result = sweep(order)
    assert [p.problem for p in result.points] == [
        "does not fit: needs 9.00 GiB of 8.00 GiB", "", "diverged with seed 42: The loss is not finite in step 3"]
    assert result.winner.name == "r4-alpha8" and not list(order.folder.rglob("adapter"))
    page = (order.folder / "sweep.md").read_text()
    assert "does not fit" in page and "diverged" in page
    with pytest.raises(HardwareError, match="does not fit"):
        sweep(read_order(recipe(), grid=["lora.r=3"], num_seeds=1, out=str(tmp_path / "none")))
    with pytest.raises(DivergedError, match="diverged with seed 42"):
        sweep(read_order(recipe(), grid=["lora.r=3,5"], num_seeds=1, out=str(tmp_path / "neither")))


def test_without_held_out_rows_there_is_nothing_to_compare(recipe, tmp_path):
    with pytest.raises(DataError, match="held-out"):
        sweep(read_order(recipe(data={"validation": 0.0}), grid=["lora.r=2,4"], out=str(tmp_path / "sweep")))
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="no sweep"):
        sweep(read_order(recipe(), grid=["lora.r=2,4"], out=str(tmp_path)))
    with pytest.raises(OutputError, match="not a folder"):
        sweep(read_order(recipe(), grid=["lora.r=2,4"], out=str(tmp_path / "letter.txt")))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_plan_of_a_sweep_trains_and_writes_nothing(recipe, tmp_path):
    found = preview(read_order(recipe(), space=["lora.r=4..64"], num_trials=5, num_seeds=2, out=str(tmp_path / "sweep")))
    assert found.points[0].name == "r64" and found.points[0].fits and found.num_points == 5 and found.seconds > 0
    assert not (tmp_path / "sweep").exists()


@pytest.mark.long
def test_a_real_plan_that_does_not_fit_is_a_row(recipe, tmp_path):
    words = (recipe("memory.budget=100KB"),)
    planned = preview(read_order(*words, grid=["lora.r=4"], out=str(tmp_path / "sweep")))
    assert not planned.points[0].fits
    with pytest.raises(HardwareError, match="r4: does not fit: needs .* of 100 KiB"):
        sweep(read_order(*words, grid=["lora.r=4"], out=str(tmp_path / "sweep")))
    assert not list((tmp_path / "sweep" / "trials").iterdir())


def test_a_trial_never_pushes(recipe, tmp_path):
    from qlora.sweeping.begun import look

    order = read_order(recipe(hub="me/adapter"), grid=["lora.r=2"], out=str(tmp_path))
    grounds = look(order.recipe, order.search, order.space, order.seeds, Progress())
    assert grounds.recipe.hub is None and not grounds.recipe.is_given("hub.repo")


# --- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["nowhere.yaml"], "no recipe"), (["RECIPE", "--grid"], "empty"),
    (["RECIPE", "--grid", "lora.rank=4"], "Did you mean lora.r"),
    (["RECIPE", "lora.r=4", "--grid", "lora.r=4,8"], "Write it once"),
])
def test_mistakes_are_one_block_and_exit_code_2(recipe, rows, small_model, tmp_path, capsys, words, said):
    path = tmp_path / "tried.yaml"
    path.write_text(f"model: {small_model}\ndata: {rows}\n")
    assert main(["sweep", *(str(path) if word == "RECIPE" else word for word in words)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


@pytest.mark.long
def test_a_killed_process_goes_on_to_the_same_table(root, tmp_path):
    """SIGKILL in the middle of runs, several times; the last start finishes, and nothing but seconds differs."""
    def command(folder):
        return [sys.executable, "-m", "qlora", "sweep", str(root / "recipes" / "quickstart.yaml"), "train.max_steps=6",
                "data.max_rows=80", "train.sample_rows=2", "train.save_every=1", "memory.device=cpu", "--grid", "lora.r=4,8",
                "--seeds", "2", "--out", str(folder)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    for wanted in ("r4-seed42", "r8-seed42"):
        process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        checkpoints = tmp_path / "killed" / "trials" / wanted / "checkpoints"
        while process.poll() is None and not list(checkpoints.glob("checkpoint-[2-9]*")):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), env=environment, check=True, capture_output=True)

    def table(folder):
        points = json.loads((folder / "sweep.json").read_text())["points"]
        return [[(run["seed"], run["loss_before"], run["loss_after"], run["match_after"], run["parameters"], run["planned_bytes"])
                 for run in each["runs"]] for each in points]

    assert table(tmp_path / "whole") == table(tmp_path / "killed")
    report = json.loads((tmp_path / "killed" / "trials" / "r4-seed42" / "report.json").read_text())
    assert any("gone on with" in note for note in report["notes"])
