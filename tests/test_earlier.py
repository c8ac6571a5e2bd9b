"""What earlier runs found out: taken over where nothing that it rests on has changed, and the run is the same with it or without."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qlora import home
from qlora.cli import main
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.training import run as flow
from qlora.training.earlier import earlier_trial
from qlora.training.run import train


class Told(Progress):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


@pytest.fixture
def run(small_model, rows_file, tmp_path, monkeypatch):
    """Runs a recipe; gives the result with the stages that were gone through and what was told."""
    seen = []
    for name in ("try_out", "evaluate"):
        plain = getattr(flow, name)
        monkeypatch.setattr(flow, name, lambda *args, _plain=plain, _name=name: (seen.append([_name, args[-1]]), _plain(*args))[1])

    def make(folder, rows=rows_file, base=small_model, **sections):
        settings = {"epochs": 1, "max_steps": 3, "batch": 4, "micro_batch": 2, "learning_rate": 5e-3, "sample_rows": 2,
                    **sections.pop("train", {})}
        recipe = build_recipe(
            model={"base": str(base)}, data={"path": str(rows), "validation": 0.2}, train=settings,
            memory={"device": "cpu", **sections.pop("memory", {})}, lora={"dropout": 0.1, **sections.pop("lora", {})},
            output=str(tmp_path / folder), **sections,
        )
        seen.clear()
        told = Told()
        result = train(recipe, told)
        stages = [name if name == "try_out" else f"{name} {last}" for name, last in seen]
        return SimpleNamespace(result=result, stages=stages, told="\n".join(told.lines),
                               report=json.loads(result.report.with_suffix(".json").read_text()), **outcome(result))

    return make


def outcome(result):
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return {"adapter": (result.adapter / "adapter_model.safetensors").read_bytes(),
            "losses": [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows], "before": result.before}


def test_the_same_run_begins_at_once_and_ends_the_same(run):
    first, again = run("first"), run("again")
    assert first.stages == ["try_out", "evaluate before", "evaluate after"]
    assert again.stages == ["evaluate after"]
    assert (again.adapter, again.losses, again.before) == (first.adapter, first.losses, first.before)
    assert again.report["measured_phases"] == first.report["measured_phases"]
    assert [sample["before"] for sample in again.report["samples"]] == [sample["before"] for sample in first.report["samples"]]
    assert "were tried out on 20" in again.told and "`train.try_out=always`" in again.told
    assert f"loss {first.before['loss']:.4f}" in again.told


def test_another_learning_rate_asks_the_same_and_another_rank_does_not(run):
    run("first")
    assert run("rate", train={"learning_rate": 1e-3, "schedule": "constant"}, lora={"alpha": 32}).stages == ["evaluate after"]
    assert run("rank", lora={"r": 8}).stages == ["try_out", "evaluate before", "evaluate after"]


@pytest.mark.parametrize("change, again", [
    ("held-out rows", ["try_out", "evaluate before"]),
    pytest.param("longer rows", ["try_out"], marks=pytest.mark.long),
    pytest.param("batch", ["try_out", "evaluate before"], marks=pytest.mark.long),
])
def test_what_it_rests_on_has_changed(change, again, run, rows_file, tmp_path):
    run("first")
    rows, train = rows_file, {}
    if change == "batch":
        train = {"micro_batch": 4}
    else:
        lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
        if change == "longer rows":
            lines[0]["messages"][1]["content"] = "the red house and so on " * 5
        rows = tmp_path / "changed.jsonl"
        rows.write_text("".join(json.dumps(line) + "\n" for line in (lines[:20] if change == "held-out rows" else lines)))
    assert run("changed", rows=rows, train=train).stages == [*again, "evaluate after"]


def test_a_config_that_computes_otherwise_is_another_base(run, small_model, tmp_path):
    """Its weights are the same, and so is their fingerprint."""
    first = run("first")
    other = shutil.copytree(small_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    found = run("changed", base=other)
    assert found.stages == ["try_out", "evaluate before", "evaluate after"] and found.before["loss"] != first.before["loss"]


def test_always_and_never(run):
    never = run("never", train={"try_out": "never"})
    assert never.stages == ["evaluate before", "evaluate after"] and never.report["measured_phases"] == {}
    assert run("first").stages == ["try_out", "evaluate after"]
    assert run("always", train={"try_out": "always"}).stages == ["try_out", "evaluate after"]


def test_a_trial_that_had_to_step_down_is_tried_again(run, monkeypatch):
    import torch

    from qlora.training.trainer import AdapterTrainer

    plain = AdapterTrainer._forward_backward

    def limited(self, model, inputs, num_items):
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("injected")
        return plain(self, model, inputs, num_items)

    monkeypatch.setattr(AdapterTrainer, "_forward_backward", limited)
    assert run("first").stages[0] == "try_out"
    assert run("again").stages == ["try_out", "evaluate after"]


def test_one_that_took_more_than_there_is_now_is_none(run, monkeypatch):
    setups = []
    plain = flow.make_session
    monkeypatch.setattr(flow, "make_session", lambda setup, *args: (setups.append(setup), plain(setup, *args))[1])
    run("first")
    setup = setups[0]
    took = max(earlier_trial(setup).allocated.values())
    for budget, known in ((took, True), (took - 1, False)):
        smaller = replace(setup, plan=replace(setup.plan, budget_bytes=budget + setup.plan.parts["context"]))
        assert (earlier_trial(smaller) is not None) == known


def test_it_is_forgotten_with_the_bases(run, capsys):
    run("first")
    assert len(list(home.starts_home().glob("*.json"))) == 2
    assert main(["cache", "clear", "--all"]) == 0
    assert not home.starts_home().exists()
    assert run("again").stages[:2] == ["try_out", "evaluate before"]
