"""What happens when memory runs short: the error is known, what it holds is let go of, and a step in parts is the same step."""

import gc
import weakref

import pytest
import torch

from qlora.errors import HardwareError
from qlora.planning.plan import Decision, Fallback, Plan
from qlora.training.recovery import Ladder, is_out_of_memory, release, split_inputs

GIB = 2**30


def rows_of(*lengths):
    """Rows as the collator takes them; a third of each, rounded up, is not trained on."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * -(-length // 3) + ids[-(-length // 3):]})
    return rows


def collate(rows, packs=None):
    """With the collator that the trainer uses: a padded batch, or one of `packs`, each with the lengths of its rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if packs:
        rows = [{**row, "seq_lengths": lengths} for row, lengths in zip(rows, packs, strict=True)]
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packs is not None)(rows)


def packed(*packs):
    return collate(rows_of(*map(sum, packs)), [list(pack) for pack in packs])


def trained(inputs):
    return int((inputs["labels"][:, 1:] != -100).sum())


# --- splitting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "num_parts", "sizes"), [
    ((9, 9, 9, 9), 2, [2, 2]), ((12, 7, 3, 9), 4, [1, 1, 1, 1]), ((5, 8, 2), 2, [1, 2]), ((5, 8, 2, 4, 4), 3, [1, 2, 2]),
    ((5, 8), 4, [1, 1]), ((5,), 3, [1]), ((5, 8), 1, [2]),
])
def test_a_padded_batch_is_cut_between_rows_and_keeps_its_padding(lengths, num_parts, sizes):
    whole = collate(rows_of(*lengths))
    parts = split_inputs(whole, num_parts)
    assert [len(part["input_ids"]) for part in parts] == sizes
    assert {part["input_ids"].shape[1] for part in parts} == {max(lengths)}
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value), key
    assert sum(map(trained, parts)) == trained(whole)


@pytest.mark.parametrize(("packs", "num_parts", "lengths"), [
    (([8, 8],), 2, [8, 8]), (([3, 9, 4], [10, 2, 4]), 2, [16, 16]), (([3, 9, 4], [10, 2, 4]), 3, [12, 14, 6]),
    (([10, 1, 1, 1],), 3, [10, 3]),  # a third part would make the longest no shorter
    (([4, 4, 4],), 9, [4, 4, 4]), (([7],), 4, [7]), (([1, 1, 1],), 2, [2, 1]),
])
def test_a_pack_is_cut_where_rows_begin_so_that_the_longest_part_is_short(packs, num_parts, lengths):
    whole = packed(*packs)
    parts = split_inputs(whole, num_parts)
    assert [part["input_ids"].shape[1] for part in parts] == lengths
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[key] for part in parts], dim=1), whole[key]), key
    assert sum(map(trained, parts)) == trained(whole)


def test_a_part_of_a_pack_is_what_the_collator_makes_of_its_rows():
    packs = ([3, 9], [4, 10, 2])
    whole = packed(*packs)
    for part, begin, lengths in zip(split_inputs(whole, 2), (0, 16), ([3, 9, 4], [10, 2]), strict=True):
        ids = whole["input_ids"][0, begin:begin + sum(lengths)].tolist()
        labels = whole["labels"][0, begin:begin + sum(lengths)].tolist()
        expected = collate([{"input_ids": ids, "labels": labels}], [lengths])
        assert part.keys() == expected.keys() == whole.keys()
        for key, value in expected.items():
            found = part[key]
            if torch.is_tensor(value):
                assert torch.equal(found, value) and found.dtype == value.dtype, key
            else:
                assert found == value, key


def test_no_cut_of_a_pack_is_better():
    """Against every way to cut ten rows into up to four parts."""
    from itertools import combinations

    lengths = [5, 1, 7, 3, 3, 8, 2, 2, 6, 4]
    whole = packed(lengths)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for num_parts in (2, 3, 4):
        best = min(
            max(end - begin for begin, end in zip((0, *cuts), (*cuts, starts[-1]), strict=True))
            for cuts in combinations(starts[1:-1], num_parts - 1)
        )
        assert max(part["input_ids"].shape[1] for part in split_inputs(whole, num_parts)) == best


@pytest.mark.parametrize("make", [
    lambda: collate(rows_of(30, 30, 30, 30)), lambda: collate(rows_of(40, 11, 25, 3)), lambda: packed([20, 14, 6], [31, 9]),
], ids=["padded", "ragged", "packed"])
def test_the_loss_of_the_parts_adds_up_to_that_of_the_whole(make, small_model):
    """Summed over tokens and divided by the whole's count, as the trainer has it: loss and gradient."""
    from transformers import AutoModelForCausalLM

    model, batch = AutoModelForCausalLM.from_pretrained(small_model), make()

    def learn(parts):
        model.zero_grad()
        loss = 0.0
        for part in parts:
            each = model(**part, num_items_in_batch=torch.tensor(trained(batch)), use_cache=False).loss
            each.backward()
            loss += each.item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradient = learn([batch])
    for num_parts in (2, 4):
        parts = split_inputs(batch, num_parts)
        assert len(parts) == num_parts
        split_loss, split_gradient = learn(parts)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(split_gradient, gradient, rtol=1e-4, atol=1e-6)


# --- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 B."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4 B."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("std::bad_alloc"),
], ids=str)
def test_errors_of_memory_are_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError("shape mismatch"),
    ValueError("out of memory"), HardwareError("The card ran out of memory.", "CUDA error: out of memory"), KeyboardInterrupt(),
], ids=str)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_an_allocation_that_cannot_be_had_is_known():
    """The real error of torch on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_release_lets_go_of_what_the_failed_attempt_held():
    held = []

    def allocate():
        activations = torch.zeros(1000, requires_grad=True)
        graph = (activations * 2).exp()
        circle = [graph]
        circle.append(circle)
        held.extend((weakref.ref(activations), weakref.ref(graph)))
        raise torch.OutOfMemoryError("injected")

    def attempt():
        labels = torch.zeros(1000)
        held.append(weakref.ref(labels))
        try:
            allocate()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("CUDA error: out of memory") from error

    gc.disable()
    try:
        attempt()
    except RuntimeError as error:
        release(error)
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


# --- the ladder ----------------------------------------------------------------------------------------------------------


def plan(*fallbacks, packing=False, checkpointing=False, micro_batch=4):
    settings = {
        "train.micro_batch": micro_batch, "train.accumulation": 4, "memory.checkpointing": checkpointing,
        "data.packing": packing, "data.max_length": 2048, "lora.r": 16,
    }
    return Plan(
        model="a/model", device="NVIDIA GeForce RTX 4060", kind="cuda", budget_bytes=8 * GIB, fits=True, phases={"train": 6 * GIB},
        parts={"activations": 7 * GIB}, reserved_bytes=0, host_peak_bytes=0, disk_bytes=0, num_steps=10, fallbacks=fallbacks,
        decisions={key: Decision(value, "given", "given") for key, value in settings.items()},
    )


DOWN = (Fallback(2, 8, False, 5 * GIB), Fallback(1, 16, False, 4 * GIB), Fallback(1, 16, True, 3 * GIB))


def test_the_ladder_goes_down_a_rung_at_a_time_and_says_so():
    ladder = Ladder(plan(*DOWN))
    assert (ladder.rung, ladder.num_rungs, ladder.micro_batch, ladder.num_parts) == (0, 4, 4, 1)
    assert ladder.step_down("in step 12") == (
        "Memory ran out in step 12; going on with 2 rows at once in 8 micro-batches instead of 4 in 4."
    )
    assert (ladder.micro_batch, ladder.num_parts, ladder.checkpointing) == (2, 2, False)
    assert "1 row at once in 16 micro-batches instead of 2 in 8" in ladder.step_down("in step 13")
    assert "activations computed anew" in ladder.step_down("in step 13")
    assert (ladder.micro_batch, ladder.num_parts, ladder.checkpointing) == (1, 4, True)
    assert ladder.peak_bytes == ladder.smallest_peak_bytes == 3 * GIB


@pytest.mark.parametrize("fallbacks", [(), DOWN])
def test_at_the_end_it_says_what_was_planned_and_what_to_change(fallbacks):
    ladder = Ladder(plan(*fallbacks))
    ladder.go_to(len(fallbacks))
    with pytest.raises(HardwareError) as caught:
        ladder.step_down("in step 12")
    rows, needs = ("1", "3.00 GiB") if fallbacks else ("4", "7.00 GiB")
    assert f"{rows} x up to 2,048 tokens" in caught.value.problem and f"{needs} of 8.00 GiB" in caught.value.problem
    assert "step 12" in caught.value.problem and "data.max_length (now 2,048)" in caught.value.fix
    assert ladder.rung == len(fallbacks)


def test_it_goes_to_the_rung_that_a_run_was_left_on():
    ladder = Ladder(plan(*DOWN))
    assert ladder.go_to(3) == (
        "Going on with 1 row at once in 16 micro-batches instead of 4 in 4 and activations computed anew (checkpointing on)."
    )
    assert ladder.num_parts == 4 and ladder.checkpointing
    line = ladder.go_to(1, "because only 5 GiB can be had now")
    assert line.endswith("(checkpointing off), because only 5 GiB can be had now.")


def test_it_finds_the_rung_for_what_is_free():
    ladder = Ladder(plan(*DOWN))
    free = [9 * GIB, 7 * GIB, 7 * GIB - 1, 4 * GIB, 3 * GIB, 3 * GIB - 1]
    assert [ladder.lowest_that_fits(size) for size in free] == [0, 0, 1, 2, 3, None]
    ladder.go_to(2)
    assert ladder.lowest_that_fits(9 * GIB) == 2  # it does not go up again


def test_packs_are_called_by_their_name_and_odd_numbers_are_covered():
    ladder = Ladder(plan(Fallback(3, 8, True, 5 * GIB), packing=True, checkpointing=True, micro_batch=5))
    assert "3 packs at once in 8 micro-batches instead of 5 in 4" in ladder.step_down("in step 1")
    assert ladder.num_parts == 2


# --- what is planned to step down to ---------------------------------------------------------------------------------------


def planned(folder, *overrides):
    from qlora.hardware import Device
    from qlora.training.planner import plan_model

    card = Device("cpu", "a CPU", 32 * GIB, 32 * GIB, 32 * GIB, 32 * GIB, 1, True)
    return plan_model(str(folder), device=card, overrides=("data.max_length=128", *overrides))


def need(plan):
    """What a plan's training and evaluation take; answers, which some versions of the libraries need more for, make their own
    batches smaller.
    """
    busiest = max(plan.phases[phase] for phase in ("load", "train", "eval"))
    return plan.peak_bytes * busiest / max(plan.phases.values())


def test_a_plan_knows_in_advance_what_to_step_down_to(small_model):
    """Each step needs less, fits, and is what the planner says of those settings when they are asked for."""
    given = ("train.batch=8", "lora.r=16", "train.optimizer=adamw")
    plan = planned(small_model, *given, "train.micro_batch=4", "memory.checkpointing=false")
    steps = [(each.micro_batch, each.accumulation, each.checkpointing) for each in plan.fallbacks]
    assert steps == [(2, 4, False), (1, 8, False), (1, 8, True)]
    needs = [need(plan), *(each.peak_bytes for each in plan.fallbacks)]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs) and plan.peak_bytes <= plan.budget_bytes
    asked = planned(small_model, *given, "train.micro_batch=2", "memory.checkpointing=false")
    assert plan.fallbacks[0].peak_bytes == pytest.approx(need(asked), rel=5e-3)


def test_odd_numbers_of_rows_are_halved_and_rounded_up(small_model):
    """A step of one micro-batch is one of several when it is cut, so that gradients are there while the later ones run."""
    plan = planned(small_model, "train.batch=3", "train.micro_batch=3", "memory.checkpointing=true", "lora.r=64")
    assert [(each.micro_batch, each.accumulation) for each in plan.fallbacks] == [(2, 2), (1, 3)]
    asked = planned(small_model, "train.batch=4", "train.micro_batch=2", "memory.checkpointing=true", "lora.r=64")
    assert plan.fallbacks[0].peak_bytes == pytest.approx(need(asked), rel=5e-3)


def test_a_row_alone_that_keeps_its_padding_needs_a_mask(small_model):
    """More than a row that was alone from the beginning, which has no padding."""
    given = ("train.batch=8", "lora.r=16", "train.optimizer=adamw", "memory.checkpointing=false", "memory.budget=20GB")
    cut = planned(small_model, *given, "train.micro_batch=2").fallbacks[0]
    alone = planned(small_model, *given, "train.micro_batch=1")
    assert (cut.micro_batch, cut.checkpointing) == (1, False)
    assert cut.peak_bytes - need(alone) > 2 * 128 * 128  # the mask, in 16 bit


def test_where_nothing_is_left_or_nothing_fits_there_is_none(small_model):
    least = ("train.batch=1", "memory.checkpointing=true")
    assert planned(small_model, *least).fallbacks == ()
    assert planned(small_model, "train.micro_batch=8", "train.batch=8", "memory.budget=3MB").fallbacks == ()


def test_fallbacks_are_in_the_file_and_a_file_without_them_is_read():
    import json

    document = json.loads(json.dumps(plan(*DOWN).to_json()))
    assert document["fallbacks"][0] == {"micro_batch": 2, "accumulation": 8, "checkpointing": False, "peak_bytes": 5 * GIB}
    assert Plan.from_json(document) == plan(*DOWN)
    del document["fallbacks"]
    assert Plan.from_json(document) == plan()


@pytest.mark.parametrize(("fallbacks", "checkpointing", "line"), [
    (DOWN, False, "2 x 8 rows (5.00 GiB), then 1 x 16 (4.00 GiB), then with checkpointing (3.00 GiB)"), ((), True, None),
])
def test_they_are_shown(fallbacks, checkpointing, line):
    import io

    from rich.console import Console

    from qlora.views import plan_view

    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(plan_view(plan(*fallbacks, checkpointing=checkpointing)))
    assert ("if memory runs short" in stream.getvalue()) == (line is not None)
    assert line is None or line in stream.getvalue()
