"""Planned against measured: the command end to end on a CPU, and the arithmetic of its summary."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from qlora.cli import main
from qlora.errors import OutputError, RecipeError
from qlora.hardware import describe_machine
from qlora.measuring import flow
from qlora.measuring.cells import Cell, choose_cells, parse_cells, read_cells, small_config
from qlora.measuring.child import answer
from qlora.measuring.default_cells import cells_for, default_cells
from qlora.measuring.flow import Order, measure_planned, run_child
from qlora.measuring.lines import adopt_receipts, cells_to_do, need_lines, read_lines, receipt_of
from qlora.measuring.one_cell import describe_cell, measure_cell, timed_cpu_seconds
from qlora.measuring.summary import CELL_TITLES, cell_row, family_of, markdown_tables, percent, strategy, summarise
from qlora.planning.plan import Plan
from qlora.planning.receipts import Receipts
from qlora.recipe import build_recipe
from qlora.training.cpu_memory import TensorMeter
from qlora.units import GIB, MIB

# Everything is fixed, so that nothing has to be searched for.
CELL = ("small:qwen3:1x128 memory.budget=90MB data.max_length=64 lora.r=8 train.micro_batch=2 train.accumulation=1 "
        "memory.checkpointing=true train.optimizer=adamw memory.streaming=false memory.fused_lora=false memory.loss_chunk=none "
        "memory.embedding_device=device memory.offload_activations=false memory.offload_adapters=false memory.mlp_tile=none "
        "memory.head_format=resident")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, str]:
    """The file and the output of one small cell."""
    out, printed = tmp_path_factory.mktemp("measure") / "lines.jsonl", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["measure", *CELL.split(), "--cpu", "--out", str(out), "--markdown"]) == 0
    return out, printed.getvalue()


def test_a_cell_is_planned_trained_and_written_down(measured):
    out, printed = measured
    line, = read_lines(out)
    assert line["cell"] == CELL and line["fits"] and not line["out_of_memory"] and "error" not in line
    for name in ("device", "versions", "command", "date", "tokens_per_second", "cpu_seconds_per_token", "flops_per_token",
                 "seconds"):
        assert line[name], name
    assert line["kind"] == "cpu" and line["driver"] is None and line["retries"] == 0
    assert line["settings"]["lora.r"] == 8 and line["settings"]["train.micro_batch"] == 2
    assert set(line["measured"]["phases"]) == {"load", "train", "eval", "generate", "save"} <= set(line["planned"]["phases"])
    assert sum(line["planned"]["parts"].values()) == line["planned"]["peak_bytes"]
    assert len(line["loss"]) == len(line["gradient_norm"]) == 2
    assert all(8.5 < loss < 9.5 for loss in line["loss"])  # an untrained model guesses among 6,144 tokens: ln 6144 = 8.7
    assert all(norm > 0 for norm in line["gradient_norm"])
    assert "| small:qwen3:1x128 | 90.0 MiB | 2 x 1 | 64 | 8 | checkpointing, adamw |" in printed
    assert str(out.parent) not in out.read_text() and "/tmp" not in out.read_text()  # it may be shown to others


def test_what_was_planned_is_what_was_measured(measured):
    line, = read_lines(measured[0])
    errors = line["phase_error_percent"]
    assert abs(line["error_percent"]) < 2 and line["error_percent"] == errors["train"]
    assert all(abs(errors[phase]) < 5 for phase in ("train", "eval", "generate"))
    assert max(line["measured"]["phases"].values()) <= line["budget_bytes"]


def test_what_is_done_is_not_done_again(measured, capsys):
    out, printed = measured
    before = out.read_text()
    assert main(["measure", *CELL.split(), "--cpu", "--out", str(out), "--markdown"]) == 0
    again = capsys.readouterr()
    assert out.read_text() == before and "1 of 1 cells are in" in again.err and again.out == printed
    assert main(["measure", "--summary", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["lines"] == read_lines(out) and document["summaries"][0]["num_measured"] == 1
    assert main(["measure", "--summary", str(out)]) == 0
    assert "cells, of them trained to the end" in capsys.readouterr().out


def test_a_margin_follows_from_what_somebody_measured(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    line, = read_lines(measured[0])
    device = describe_machine("cpu")
    theirs = tmp_path / "theirs.jsonl"
    train, twice = (str(factor * line[side]["phases"]["train"]) for side, factor in (("measured", 1), ("planned", 2)))
    over = json.loads(json.dumps(line).replace(train, twice))
    theirs.write_text("\n".join(map(json.dumps, [over, {"cell": "torn"}, {**line, "cell": "b", "planned": 3}])) + "\n{")
    assert Receipts.load().margin(device).share == 0.01
    for new in (1, 0):
        assert main(["measure", "--receipts", str(theirs)]) == 0
        assert f"1 measurements, {new} of them new" in capsys.readouterr().out
    assert Receipts.load().margin(device).share == pytest.approx(0.8 * 0.01 + 0.2 * 0.25)  # one of five that it takes, at its cap
    assert [receipt.origin for receipt in Receipts.load()] == ["theirs.jsonl"]
    # A receipts.jsonl does as well.
    assert adopt_receipts(Receipts.load().path, Receipts(path=tmp_path / "others.jsonl")) == (1, 1)
    with pytest.raises(OutputError, match="no receipt"):
        adopt_receipts(tmp_path / "missing", Receipts.load())


def test_a_failure_is_written_down_and_tried_again(tmp_path, monkeypatch, capsys):
    asked = []

    def broken(what, question, timeout_seconds):
        asked.append(question["cell"])
        return {"error": "the child died"}

    monkeypatch.setattr(flow, "run_child", broken)
    out = tmp_path / "lines.jsonl"
    out.write_text('{"torn')
    for tries in (1, 2):
        assert main(["measure", "small:llama", "memory.budget=1GB", "--cpu", "--out", str(out)]) == 2
        written = [json.loads(text)["cell"] for text in out.read_text().splitlines()[1:]]
        assert asked == ["small:llama memory.budget=1GB"] * tries == written
    assert len(read_lines(out)) == 1 and "the child died" in capsys.readouterr().out


def test_a_child_that_dies_says_how():
    assert "KeyError" in run_child("plan", {}, 60)["error"]
    assert run_child("plan", {"cell": "small:llama"}, 0.01) == {"error": "gave up after 0 s"}


def test_a_bad_question_is_answered():
    question = {"cell": "no/such-model-anywhere memory.budget=1GB", "cpu": True, "card_bytes": None}
    assert list(answer("plan", question)) == ["error"]


@pytest.mark.long
def test_running_out_of_memory_is_a_result(measured, tmp_path, monkeypatch):
    from qlora.measuring.one_cell import plan_cell
    from qlora.training.trainer import AdapterTrainer

    def stop(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nand more")

    cell = Cell.parse(CELL)
    plan = plan_cell(cell, describe_machine("cpu"), tmp_path)  # simulated already, for the fixture
    monkeypatch.setattr(AdapterTrainer, "train", stop)
    line = json.loads(json.dumps(measure_cell(cell, plan, tmp_path)))
    assert line["out_of_memory"] and line["message"] == "CUDA out of memory. Tried to allocate 2.00 MiB"
    assert list(line["measured"]["phases"]) == ["load", "train"] and line["error_percent"] is None and line["loss"] == []
    assert line["planned"]["phases"] == plan.phases
    summary = summarise([line])
    assert (summary.num_out_of_memory, summary.num_measured) == (1, 0)
    assert "out of memory in train" in cell_row(line) and receipt_of(line) is None


def test_what_does_not_fit_is_trained_only_where_that_is_asked_for(measured, monkeypatch):
    """And a base that was kept on the disk for a cell goes with it."""
    from qlora.engine import shelf

    line, = read_lines(measured[0])
    cell, device = Cell.parse(CELL), describe_machine("cpu")
    plan = {**_a_plan(line), "fits": False}
    made = shelf.bases_home() / "qwen3-0123456789ab"
    other = shelf.bases_home() / "llama-0123456789ab"

    def child(what, question, timeout_seconds):
        assert what == "measure" and question["plan"] == plan
        for folder in (made, other):
            folder.mkdir(parents=True)
        return {"measured": {}}

    monkeypatch.setattr(flow, "run_child", child)
    assert "measured" not in measure_planned(cell, plan, Order(), device) and not made.exists()
    found = measure_planned(cell, plan, Order(try_refused=True), device)
    assert found["measured"] == {} and found["fits"] is False
    assert found["command"] == f"qlora measure --try-refused {CELL}"
    assert not made.exists() and other.exists()
    shelf.clear_stores([other.name])


def _a_plan(line):
    """A plan's JSON with the figures of a line."""
    from qlora.planning.plan import Decision

    planned = line["planned"]
    plan = Plan(
        model=line["model"], device=line["device"], kind=line["kind"], budget_bytes=line["budget_bytes"], fits=line["fits"],
        phases=planned["phases"], parts=planned["parts"], reserved_bytes=planned["reserved_bytes"], host_peak_bytes=0,
        disk_bytes=0,
        decisions={key: Decision(value, "given", "") for key, value in line["settings"].items()}, num_steps=2,
    )
    assert describe_cell(Cell("a"), plan, describe_machine("cpu"))["planned"]["parts"] == planned["parts"]
    return plan.to_json()


def test_tensors_are_counted_by_phase_and_to_the_byte():
    meter = TensorMeter()
    with meter.watching():
        with meter.during("load"):
            kept = torch.empty(3 * MIB, dtype=torch.uint8)
        with meter.during("train"):
            for _ in range(3):
                torch.empty(5 * MIB, dtype=torch.uint8)
        torch.empty(50 * MIB, dtype=torch.uint8)  # in no phase
        with meter.during("eval"):
            torch.empty(MIB, dtype=torch.uint8)
        with meter.during("train"):
            pass
    assert meter.allocated == {"load": 3 * MIB, "train": 8 * MIB, "eval": 4 * MIB}
    assert kept.numel() == 3 * MIB


def test_the_processors_time_is_that_of_the_steps_after_the_first():
    rows = [{"loss": 1, "tokens": 10, "cpu_seconds": 100.0}, {"loss": 1, "tokens": 10, "cpu_seconds": 103.0}, {"eval_loss": 1},
            {"loss": 1, "tokens": 5, "cpu_seconds": 104.0}]
    assert timed_cpu_seconds(rows) == pytest.approx(0.2) and timed_cpu_seconds(rows[:1]) is None


# --- many lines --------------------------------------------------------------------------------------------------------


def a_line(cell, *, device="card", fits=True, planned=4.0, measured=4.0, reserved=4.5, generate=3.0, **more):
    """A line by hand; sizes in GiB."""
    phases = {"load": 2 * GIB, "train": round(measured * GIB), "eval": GIB, "generate": round(generate * GIB), "save": GIB}
    return {
        "cell": cell, "model": cell.split()[0], "device": device, "kind": "cuda", "capability": [9, 0], "os": "Linux",
        "allocator": "expandable", "versions": {"torch": "2"}, "date": "2026-01-01", "budget_bytes": 8 * GIB, "fits": fits,
        "settings": {"lora.r": 16, "train.micro_batch": 1, "train.accumulation": 4, "data.max_length": 1024,
                     "memory.checkpointing": True, "train.optimizer": "adamw"},
        "planned": {"peak_bytes": 5 * GIB, "phases": {**phases, "train": round(planned * GIB), "generate": 3 * GIB},
                    "reserved_bytes": 5 * GIB, "context_bytes": GIB // 2, "margin_bytes": GIB // 8},
        "measured": {"phases": phases, "reserved": {"train": round(reserved * GIB)}, "context_bytes": GIB // 2},
        "error_percent": 100 * (planned / measured - 1), "reserved_error_percent": 100 * (5 / reserved - 1), "retries": 0,
        "out_of_memory": False, "tokens_per_second": 1000.0, "flops_per_token": 1e9, "loss": [9.0, 8.5], **more,
    }


def refused(cell):
    line = a_line(cell, fits=False)
    return {name: line[name] for name in line if name not in ("measured", "error_percent", "retries", "out_of_memory")}


LINES = [
    a_line("a", planned=4.04),
    a_line("b", planned=3.96),
    a_line("c", planned=3.8, reserved=8.0, retries=3),  # under by more than the margin, and 8.5 GiB of a budget of 8
    a_line("d", planned=4.4, generate=3.2),
    a_line("e", out_of_memory=True, error_percent=None, reserved_error_percent=None),
    a_line("f", fits=False, planned=8.0, measured=7.0, reserved=7.2),  # refused, but it trains
    a_line("g", fits=False, out_of_memory=True, error_percent=None),
    refused("h"),
    {"cell": "i", "model": "i", "device": "card", "kind": "cuda", "error": "no such model"},
]


def test_the_summary_adds_up():
    summary = summarise(LINES)
    assert (summary.num_cells, summary.num_measured, summary.num_failed) == (9, 5, 1)
    assert (summary.num_refused, summary.num_refused_tried, summary.num_false_refusals) == (3, 2, 1)
    assert (summary.num_out_of_memory, summary.num_over_budget, summary.num_retried) == (1, 1, 1)
    assert (summary.num_under, summary.num_over_margin, summary.num_long_answers) == (2, 1, 1)
    assert summarise([a_line("over its cap", fits=False, reserved=8.0)]).num_false_refusals == 0
    assert summary.budgets_bytes == (8 * GIB,) and summary.families == tuple("abcdefgh")
    errors = [1, 1, 5, 10, 100 / 7]
    assert summary.mean_error == pytest.approx(sum(errors) / 5, abs=1e-6) and summary.median_error == pytest.approx(5)
    assert summary.worst_error == pytest.approx(100 / 7) and summary.most_under == pytest.approx(-5)
    without_retries = [100 * (5 / 4.5 - 1)] * 3 + [100 * (5 / 7.2 - 1)]
    assert summary.mean_reserved_error == pytest.approx(sum(map(abs, without_retries)) / 4)
    assert summary.most_reserved_under == summary.worst_reserved_error == pytest.approx(without_retries[-1])


def test_the_tables_say_so():
    table = markdown_tables([*LINES, a_line("a", device="other card")])
    assert "|  | card | other card |" in table
    assert "| cells, of them trained to the end | 9, 5 | 1, 1 |" in table
    assert "| most under | -5.00 % | none |" in table
    assert "| refused, of them trained within the budget all the same | 3, 1 of 2 tried | 0, none |" in table
    rows = table.split("\n\n")[0].splitlines()
    assert len(rows) == 2 + len(LINES) + 1 and len({row.count("|") for row in rows}) == 1
    assert "refused, +14.29 %" in rows[7] and "refused, out of memory in save" in rows[8] and "| refused |" in rows[9]
    assert "reserved" not in markdown_tables([{**a_line("a"), "measured": {**LINES[0]["measured"], "reserved": {}}}])
    assert len(CELL_TITLES) == len(cell_row(LINES[0])) == len(cell_row(LINES[-1]))


def test_a_strategy_is_named():
    usual = {"memory.checkpointing": False, "train.optimizer": "adamw"}
    assert strategy(usual) == "no checkpointing, adamw"
    unusual = {**usual, "memory.streamed_layers": 4, "memory.stream_from": "ram", "data.packing": True, "model.dtype": "fp16",
               "memory.loss_chunk": "64MiB", "memory.fused_lora": True}
    assert strategy(unusual) == "no checkpointing, 4 layers streamed from ram, loss by 64MiB, fused, packed, adamw, fp16"
    assert [percent(value) for value in (None, 0.0, -0.004, 3.14159)] == ["-", "+0.00 %", "-0.004 %", "+3.14 %"]
    names = {"Qwen/Qwen3-8B": "qwen", "small:gpt2": "gpt", "meta-llama/Llama-3.1-8B": "llama", "a/SmolLM2-1.7B": "smollm"}
    assert {name: family_of(name) for name in names} == names


def test_only_what_is_missing_is_measured(tmp_path):
    file = tmp_path / "lines.jsonl"
    failed = {"cell": "b lora.r=1", "device": "card", "kind": "cuda", "error": "killed"}
    written = [a_line("a lora.r=1", planned=1), failed, refused("c lora.r=1"), a_line("a lora.r=1")]
    file.write_text("\n".join(map(json.dumps, written)) + '\n[]\n{"cell": 3}\n{"cell": "torn')
    lines = need_lines([file])
    assert [line["cell"] for line in lines] == ["a lora.r=1", "b lora.r=1", "c lora.r=1"]
    assert lines[0]["planned"]["phases"]["train"] == 4 * GIB
    cells = parse_cells("a lora.r=1\nb  # why\n  lora.r=1\n\n# no cell\nc lora.r=1\nd lora.r=1\nd lora.r=1\n")
    assert [str(cell) for cell in cells_to_do(cells, lines, "card")] == ["b lora.r=1", "d lora.r=1"]
    assert [cell.model for cell in cells_to_do(cells, lines, "card", try_refused=True)] == ["b", "c", "d"]
    assert len(cells_to_do(cells, lines, "other card")) == 4
    odd = ({**a_line("a"), "planned": 3}, {**a_line("b"), "settings": None})
    (tmp_path / "odd").write_text("\n".join(map(json.dumps, odd)))
    (tmp_path / "mixed").write_text("\n".join(map(json.dumps, [*odd, a_line("c")])))
    assert [line["cell"] for line in need_lines([tmp_path / "mixed"])] == ["c"]
    for missing in ("missing", "odd"):
        with pytest.raises(OutputError, match="no measurements"):
            need_lines([file, tmp_path / missing])


def test_a_line_becomes_a_receipt(tmp_path):
    receipts = Receipts(path=tmp_path / "receipts.jsonl")
    receipts.add(receipt_of(a_line("Qwen/Qwen3-8B", planned=3.9)))
    receipt, = Receipts.load(receipts.path)
    assert receipt.measured == {"load": 2 * GIB, "train": 4 * GIB, "eval": GIB}
    assert receipt.planned == {"load": 2 * GIB, "train": round(3.9 * GIB), "eval": GIB}
    assert receipt.capability == (9, 0) and receipt.context_bytes == GIB // 2
    assert receipt.measured_reserved == {"train": 4.5 * GIB}
    assert 0 < receipt.excess < 4 / 3.9 - 1  # the margin's fixed part is not counted again
    assert receipt_of(refused("h")) is None and receipt_of(LINES[-1]) is None


# --- cells -------------------------------------------------------------------------------------------------------------


def test_a_cell_has_one_model_and_real_settings(tmp_path):
    assert Cell.parse("qwen/qwen3-8b memory.budget=8GB lora.r=16") == Cell("Qwen/Qwen3-8B", ("memory.budget=8GB", "lora.r=16"))
    for text, problem in (("memory.budget=8GB", "a cell has one"), ("a b lora.r=16", "a cell has one"), ("a lora.rank=1", "rank"),
                          ("small:bert", "no small model"), ("small:llama:6x100", "no shape"), ("small:gpt2:2x128", "no shape")):
        with pytest.raises(RecipeError, match=problem):
            Cell.parse(text)
    with pytest.raises(RecipeError, match="cannot|can be read"):
        read_cells(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(RecipeError, match="no cell"):
        read_cells(tmp_path / "empty.txt")
    assert small_config("llama:6x768")[1]["num_hidden_layers"] == 6 and small_config("llama")[1]["num_hidden_layers"] == 3


def test_default_cells_are_chosen_by_budget():
    cells = default_cells("cuda")
    assert {cell.budget_bytes for cell in choose_cells(cells, [4 * GIB, 8 * GIB], 80 * GIB)} == {4 * GIB, 8 * GIB}
    a_little_less = round(7.64 * GIB)  # than 8, as CUDA sees a card of 8 GB
    assert {cell.budget_bytes for cell in choose_cells(cells, None, a_little_less)} == {4 * GIB, 8 * GIB}
    for sizes, memory, problem in (([6 * GIB], 80 * GIB, "No default cell"), ([24 * GIB], 8 * GIB, "this device has 8GB")):
        with pytest.raises(RecipeError, match=problem):
            choose_cells(cells, sizes, memory)
    assert cells_for(sizes_bytes=[8 * GIB], plan_only=True, cpu=True) == ([c for c in cells if c.budget_bytes == 8 * GIB], False)
    assert cells_for(cpu=True) == (default_cells("cpu"), True)
    with pytest.raises(RecipeError, match="on the CPU"):
        cells_for(sizes_bytes=[8 * GIB], cpu=True)
    with pytest.raises(RecipeError, match="A cell and --vram"):
        cells_for(["small:llama"], sizes_bytes=[8 * GIB])


def test_the_default_cells_are_sixty_over_four_families_and_four_sizes():
    cells = default_cells("cuda")
    assert len(set(cells)) == len(cells) >= 60
    for gigabytes in (4, 8, 12, 24):
        families = {family_of(cell.model) for cell in cells if cell.budget_bytes == gigabytes * GIB}
        assert families >= {"llama", "qwen", "gemma", "mistral"}
    words = " ".join(map(str, cells))
    for strategy_word in ("memory.streaming=true", "offload_activations=true", "packing=true", "dtype=fp16", "paged_adamw_8bit",
                          "fused_lora=true", "loss_chunk=", "attention=eager"):
        assert strategy_word in words
    for cell in (*cells, *default_cells("cpu")):
        recipe = build_recipe(overrides=cell.overrides, model=cell.model, data="none")
        assert recipe.memory.budget != "auto" and isinstance(recipe.data.max_length, int)


def test_the_plan_of_a_card_that_is_not_here(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(flow, "run_child", lambda what, question, timeout: asked.append(question) or {"error": "not now"})
    assert main(["measure", "--vram", "8", "--plan-only", "--cpu"]) == 2
    assert {question["card_bytes"] for question in asked} == {8 * GIB} and "0 of" in capsys.readouterr().out
