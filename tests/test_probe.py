"""The trial before the run: it sees the worst there is, measures it, and leaves no trace in what is learnt."""

import json

import pytest
from faults.parameters import in_long
import torch

from qlora.errors import HardwareError
from qlora.planning.receipts import Receipts
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.training import run as flow
from qlora.training import watch
from qlora.training.run import train
from qlora.training.trainer import AdapterTrainer


@pytest.fixture
def recipe(small_model, rows_file, tmp_path):
    def make(folder="run", **sections):
        settings = {"epochs": 1, "max_steps": 4, "batch": 8, "micro_batch": 4, "learning_rate": 5e-3, "sample_rows": 2,
                    **sections.pop("train", {})}
        return build_recipe(
            model={"base": str(small_model), **sections.pop("model", {})},
            data={"path": str(rows_file), "validation": 0.2, **sections.pop("data", {})}, train=settings,
            memory={"device": "cpu", **sections.pop("memory", {})}, output=str(tmp_path / folder), **sections,
        )

    return make


def outcome(result):
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval_loss")) for row in rows]
    return (result.adapter / "adapter_model.safetensors").read_bytes(), numbers


@pytest.mark.parametrize("sections", [
    {"lora": {"dropout": 0.1}},
    *in_long({"data": {"packing": True, "max_length": 100}, "train": {"micro_batch": 2, "batch": 4}}, {"model": {"dtype": "fp32"}}, {"train": {"optimizer": "adamw_8bit"}}),
])
def test_a_run_that_was_tried_out_equals_one_that_was_not(sections, recipe, monkeypatch):
    tried = outcome(train(recipe("tried", **sections)))
    monkeypatch.setattr(flow, "try_out", lambda *args: None)
    assert outcome(train(recipe("plain", **sections))) == tried


def test_the_trial_takes_the_longest_rows_and_the_run_meets_no_longer_ones(recipe, monkeypatch):
    shapes = []
    plain = AdapterTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        shapes.append((model.training, self.args.max_steps, tuple(inputs["input_ids"].shape)))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", seen)
    train(recipe())
    trial = [shape for training, steps, shape in shapes if training and steps == 2]
    later = [shape for training, steps, shape in shapes if training and steps == 4]
    assert len(trial) == 4 and len(set(trial)) == 1  # two steps of two micro-batches
    assert len(later) == 8 and max(shape[1] for shape in later) <= trial[0][1]
    held_out = [shape for training, _, shape in shapes if not training]
    assert max(shape[1] for shape in held_out) == held_out[0][1]


def test_what_it_took_is_held_against_the_plan_and_remembered(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))  # receipts of other tests come at the same time
    result = train(recipe())
    report = json.loads((result.folder / "report.json").read_text())
    measured, planned = report["measured_phases"], report["planned_phases"]
    assert list(measured) == ["train", "eval", "generate", "save"] == list(planned)
    for phase in ("train", "eval"):
        assert 0.9 * planned[phase] <= measured[phase] <= 1.01 * planned[phase], phase
    *_, trial, finished = Receipts.load()
    assert trial.compares_tensors and trial.measured == measured and trial.planned == planned
    assert not finished.compares_tensors and finished.tokens_per_second > 0
    assert not list(result.folder.glob(".trial*"))


def values(numbers):
    return [value for row in numbers for value in row if value is not None]


def fail_when(monkeypatch, condition):
    """A memory error in the middle of a micro-batch's backward pass; returns the list of where it came."""
    plain, failed = AdapterTrainer._forward_backward, []

    def sometimes(self, model, inputs, num_items):
        loss = plain(self, model, inputs, num_items)
        if condition(self, inputs, len(failed)):
            failed.append((self.args.max_steps, self.state.global_step + 1, tuple(inputs["input_ids"].shape)))
            raise torch.OutOfMemoryError("injected")
        return loss

    monkeypatch.setattr(AdapterTrainer, "_forward_backward", sometimes)
    return failed


@pytest.mark.parametrize("step", [1, *in_long(3)])
def test_a_step_that_runs_out_of_memory_is_split_and_nothing_else_changes(step, recipe, monkeypatch):
    """In fp32 on the CPU not one bit: rows, order and gradients are the same."""
    sections = {"model": {"dtype": "fp32"}}
    adapter, numbers = outcome(train(recipe("plain", **sections)))
    failed = fail_when(monkeypatch, lambda trainer, inputs, count: count == 0 and trainer.args.max_steps == 4
                       and trainer.state.global_step + 1 == step and trainer.step.micro_batches == 2)
    notes = []
    result = train(recipe("split", **sections), Told(notes))
    assert len(failed) == 1
    assert outcome(result)[0] == adapter
    assert values(outcome(result)[1]) == pytest.approx(values(numbers), rel=1e-6)
    line = next(note for note in notes if "ran out" in note)
    assert f"step {step}" in line and "2 rows" in line
    assert line in (result.folder / "report.md").read_text().replace("\\", "")


def test_the_trial_finds_the_rung_on_which_the_run_fits(recipe, monkeypatch):
    """More than two rows at once never fit: the trial finds out, and the run itself meets no error."""
    failed = fail_when(monkeypatch, lambda trainer, inputs, count: len(inputs["input_ids"]) > 2)
    notes = []
    train(recipe(), Told(notes))
    assert [steps for steps, _, _ in failed] == [2]
    assert any("tried out" in note for note in notes)


@pytest.mark.long
def test_when_nothing_smaller_is_left_the_numbers_are_told(recipe, monkeypatch, tmp_path):
    fail_when(monkeypatch, lambda trainer, inputs, count: True)
    with pytest.raises(HardwareError) as caught:
        train(recipe())
    assert caught.value.exit_code == 2 and "iB" in str(caught.value) and caught.value.fix
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.long
def test_evaluation_that_runs_out_does_not_touch_training(recipe, monkeypatch):
    shapes, plain = [], AdapterTrainer.compute_loss

    def refuses_large_batches(self, model, inputs, *args, **kwargs):
        if not model.training and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("injected")
        if model.training:
            shapes.append(len(inputs["input_ids"]))
        return plain(self, model, inputs, *args, **kwargs)

    expected = outcome(train(recipe("plain")))
    monkeypatch.setattr(AdapterTrainer, "compute_loss", refuses_large_batches)
    notes = []
    found = outcome(train(recipe("small"), Told(notes)))
    assert set(shapes) == {4}
    assert found[0] == expected[0] and [row[1] for row in found[1]] == [row[1] for row in expected[1]]
    assert values(found[1]) == pytest.approx(values(expected[1]), rel=1e-3)
    assert any("evaluation" in note for note in notes)


def test_a_run_steps_down_before_another_process_makes_it_fail(recipe, monkeypatch):
    """What is within reach falls between steps: the next rung that fits is taken, and the bits stay the same (fp32)."""
    sections = {"model": {"dtype": "fp32"}}
    expected = outcome(train(recipe("plain", **sections)))
    within_reach = iter([500, 500, 250, 250])  # one look a step
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN", 0)
    monkeypatch.setattr(watch, "used_memory_bytes", lambda device: 100)
    monkeypatch.setattr(watch, "free_memory_bytes", lambda device: next(within_reach) - 100)
    monkeypatch.setattr(flow, "needed_bytes", lambda session, rung: 400 - 100 * rung)
    notes = []
    result = train(recipe("crowded", **sections), Told(notes))
    assert outcome(result)[0] == expected[0]
    line, = [note for note in notes if "another process" in note]
    assert "before step 3" in line and "1 row at once" in line  # 300 bytes on the rung between would not do
    assert "another process" in (result.folder / "report.md").read_text()


def test_when_nothing_smaller_would_fit_the_run_says_so_once_and_goes_on(recipe, monkeypatch):
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN", 0)
    monkeypatch.setattr(watch, "free_memory_bytes", lambda device: 0)
    monkeypatch.setattr(flow, "needed_bytes", lambda session, rung: 2**50)
    notes = []
    train(recipe(), Told(notes))
    line, = [note for note in notes if "gets short" in note]
    assert "before step 1" in line and "GiB" in line


class Told(Progress):
    def __init__(self, notes):
        self.notes = notes

    def note(self, text):
        self.notes.append(text)
