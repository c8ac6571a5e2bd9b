"""Stop anywhere and go on: the run that comes of it is the uninterrupted one, every logged loss and every byte of the adapter.
Run out of memory anywhere: the adapter has the same bytes.
"""

import shutil
import signal

import pytest

from faults.lab import NUM_STEPS, Outcome, refused, sealed, write_rows
from faults.parameters import in_long

pytest_plugins = ["faults.fixtures"]

# Words of the command, and after which steps the run is stopped, one session after the other. An epoch has six steps; evaluations
# come after every third.
_RUNS = {
    "dropout": ((), (5, 11)),
    "evaluation, epoch's end, last step": ((), (3, 6, NUM_STEPS)),
    "no dropout, last window not full": (("lora.dropout=0", "data.path={rows}", "train.epochs=3"), (7, 13)),
    "packing": (("data.packing=true", "data.max_length=64", "train.epochs=8"), (3, 7)),
    # At this rate the held-out loss rises after step 2, and without keeping the best its checkpoint would be rotated away.
    "the best is kept": (("train.keep=best", "train.learning_rate=0.1", "train.schedule=constant", "lora.dropout=0",
                          "train.eval_every=1", "train.save_every=1", "train.max_steps=4"), (1, 3)),
}
_LONG_RUNS = {
    "8-bit optimizer": (("train.optimizer=adamw_8bit", "lora.r=64"), (2, 7)),
    "bf16": (("model.dtype=bf16",), (4, 9)),
    "activations computed anew": (("memory.checkpointing=true",), (5,)),
    "no checkpoints but where it was stopped": (("train.save_every=0",), (5,)),
    "one row at a time": (("train.micro_batch=1", "train.accumulation=4"), (5, 6)),
    "paged 8-bit optimizer": (("train.optimizer=paged_adamw_8bit", "lora.r=64"), (2, 7)),
    "every step": ((), tuple(range(1, NUM_STEPS + 1))),
    "every step, packing and bf16": (
        ("data.packing=true", "data.max_length=64", "train.epochs=8", "model.dtype=bf16"), tuple(range(1, 9))
    ),
}


@pytest.mark.parametrize("name", [*_RUNS, *in_long(*_LONG_RUNS)])
def test_stopped_and_gone_on_with_is_uninterrupted(lab, row, name):
    words, stops = {**_RUNS, **_LONG_RUNS}[name]
    words = tuple(word.format(rows=write_rows(lab.home / "odd.jsonl", 36)) for word in words)
    folder = lab.folder()
    for step in stops:
        done = lab.run(folder, *words, faults=[("at_step", {"step": step, "action": "interrupt", "number": signal.SIGTERM})])
        refused(done, 143, f"step {step} ")
        assert sealed(folder)[-1] == step
        if "8-bit" in name:
            assert "uint8" in types_of_state(folder, step)
    lab.finish(folder, *words, said=[f"step {stops[-1]}"])
    if name == "the best is kept":
        losses = {each["step"]: each["eval_loss"] for each in lab.reference(*words).rows if "eval_loss" in each}
        assert min(losses, key=losses.__getitem__) == max(losses) - 2  # else keeping the best would prove nothing
    row(f"stop and go on: {name}", "the same to the last bit", runs=len(stops))


def types_of_state(folder, step):
    """Types of the tensors that the optimizer keeps, without the package's name."""
    import torch

    state = torch.load(folder / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
    return {str(value.dtype).removeprefix("torch.") for entry in state.values() for value in _tensors(entry)}


def _tensors(value):
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


@pytest.mark.parametrize("rung", [1, *in_long(2)])
def test_stopped_after_a_step_that_was_split_it_goes_on_in_parts(lab, row, rung):
    """In bf16 parts round differently, so a run that forgot them would show. On the second rung activations are computed anew."""
    words, split = ("model.dtype=bf16",), ("run_out_of_memory", {"phase": "train", "step": 4, "times": rung})
    uninterrupted = lab.folder()
    done = lab.run(uninterrupted, *words, faults=[split])
    assert done.code == 0 and "1 row at once" in done.shown and ("checkpointing on" in done.shown) == (rung == 2), done.told
    expected = Outcome.of(uninterrupted)
    assert expected.adapter != lab.reference(*words).adapter
    folder = lab.folder()
    stop = ("at_step", {"step": 7, "action": "interrupt", "number": signal.SIGTERM})
    refused(lab.run(folder, *words, faults=[split, stop]), 143, "step 7 ")
    lab.finish(folder, *words, like=expected)
    row("stop and go on: after a split step", "the same to the last bit")


def test_gone_on_with_from_an_older_checkpoint_it_is_the_same_too(lab, row):
    """What was logged after that checkpoint is taken back."""
    folder = lab.folder()
    done = lab.run(folder, faults=[("at_step", {"step": 10, "action": "die"})])
    assert done.code == -signal.SIGKILL
    shutil.rmtree(folder / "checkpoints" / "checkpoint-8")
    lab.finish(folder, said=["step 6"])
    row("newest checkpoint removed", "went on from the one before; the same to the last bit")


# --- memory ------------------------------------------------------------------------------------------------------------

_MEMORY = {
    "in step 1": {"phase": "train", "step": 1, "times": 1},
    "in the backward pass of step 5": {"phase": "train", "step": 5, "times": 1, "where": "backward"},
    "at the longest row": {"phase": "train", "tokens": 30, "rows": 1},
    "in the trial's training": {"phase": "trial-train", "rows": 1},
    "in all training with two rows": {"phase": "trial-train train", "rows": 1},
    "in all evaluation with two rows": {"phase": "trial-eval eval", "rows": 1},
    "in all answers with two rows": {"phase": "trial-generate generate", "rows": 1},
    "in one batch of answers": {"phase": "generate", "times": 1},
}
_IN_LONG = (
    "in step 1", "at the longest row", "in the trial's training", "in all answers with two rows", "in one batch of answers",
)
_STEPS_DOWN = "going on with 1 row at once"


@pytest.mark.parametrize("name", [*(name for name in _MEMORY if name not in _IN_LONG), *in_long(*_IN_LONG)])
def test_memory_that_runs_out_changes_nothing_but_the_time(lab, row, name):
    """In fp32 on a CPU the adapter's bytes are those of the run that had room for all. Dropout would draw its numbers in another
    order for rows in parts, so there is none here.
    """
    folder, words = lab.folder(), ("lora.dropout=0",)
    done = lab.run(folder, *words, faults=[("run_out_of_memory", _MEMORY[name])])
    assert done.code == 0, done.told
    assert "emory ran out" in done.shown
    # What runs out in evaluation never changes the training batch.
    assert (_STEPS_DOWN in done.shown) == ("train" in _MEMORY[name]["phase"]), done.told
    found, expected = Outcome.of(folder), lab.reference(*words)
    assert found.adapter == expected.adapter
    assert [each["step"] for each in found.rows] == [each["step"] for each in expected.rows]
    row(f"out of memory {name}", "said so, went on in smaller parts; the same bytes")


def test_memory_that_runs_out_in_a_checkpoint(lab, row):
    folder = lab.folder()
    done = lab.run(folder, faults=[("run_out_of_memory_in_save", {"times": 1})])
    assert done.code == 0, done.told
    assert not Outcome.of(folder).differences(lab.reference())
    row("out of memory in a checkpoint", "wrote it again; the same to the last bit")


@pytest.mark.parametrize("phase", ["trial-train train", *in_long("train")], ids=["in the trial", "later"])
def test_when_the_smallest_plan_does_not_fit_it_stops_with_numbers(lab, row, phase):
    folder = lab.folder()
    refused(lab.run(folder, faults=[("run_out_of_memory", {"phase": phase})]), 2, "iB", "data.max_length")
    assert not (folder / "adapter").exists()
    lab.finish(folder)
    row("out of memory on every rung", "exit code 2 with the numbers; with room again the same to the last bit")
