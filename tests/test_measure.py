"""Planned against measured: the script end to end on a CPU, and the arithmetic of its summary."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora.errors import RecipeError
from qlora.hardware import describe_machine
from qlora.planning.receipts import Receipts
from qlora.recipe import build_recipe
from qlora.training.cpu_memory import TensorMeter
from qlora.training.measure import Cell, measure_cell, parse_cells, plan_cell
from qlora.training.measured import cells_table, cells_to_do, read_lines, receipt_of, summarise, summary_table
from qlora.units import GIB, MIB

CELL = ("small:qwen3 memory.budget=90MB data.max_length=128 lora.r=16 train.micro_batch=2 train.accumulation=2 "
        "memory.checkpointing=true")


@pytest.fixture(scope="module")
def script(root) -> Path:
    return root / "scripts" / "measure"


@pytest.fixture(scope="module")
def measured(script, tmp_path_factory) -> tuple[Path, str]:
    """The file and the output of one small cell."""
    out = tmp_path_factory.mktemp("measure") / "lines.jsonl"
    return out, run(script, *CELL.split(), "--cpu", "--out", str(out)).stdout


def run(script: Path, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def load(script: Path):
    """The script as a module; it has no ending that says so."""
    loader = importlib.machinery.SourceFileLoader("measure_script", str(script))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("measure_script", loader))
    loader.exec_module(module)
    return module


def test_a_cell_is_planned_trained_and_written_down(measured):
    out, printed = measured
    line, = read_lines(out)
    assert line["cell"] == CELL and line["fits"] and not line["out_of_memory"] and "error" not in line
    for name in ("device", "versions", "command", "date", "tokens_per_second", "flops_per_token", "seconds"):
        assert line[name], name
    assert line["kind"] == "cpu" and line["driver"] is None and line["retries"] == 0
    assert line["settings"]["lora.r"] == 16 and line["settings"]["train.micro_batch"] == 2
    assert set(line["measured"]["phases"]) == {"load", "train", "eval", "generate", "save"} <= set(line["planned"]["phases"])
    assert len(line["loss"]) == len(line["gradient_norm"]) == 2
    assert all(8.5 < loss < 9.5 for loss in line["loss"])  # an untrained model guesses among 6,144 tokens: ln 6144 = 8.7
    assert all(norm > 0 for norm in line["gradient_norm"])
    assert "| small:qwen3 | 90.0 MiB | 2 x 2 | 128 | 16 | on |" in printed


def test_what_was_planned_is_what_was_measured(measured):
    line, = read_lines(measured[0])
    errors = line["phase_error_percent"]
    assert abs(line["error_percent"]) < 2 and line["error_percent"] == errors["train"]
    assert all(abs(errors[phase]) < 5 for phase in ("train", "eval", "generate", "save"))
    assert max(line["measured"]["phases"].values()) <= line["budget_bytes"]


def test_what_is_done_is_not_done_again(measured, script):
    out, printed = measured
    before = out.read_text()
    again = run(script, *CELL.split(), "--cpu", "--out", str(out))
    assert out.read_text() == before and "1 of 1 cells are in" in again.stderr
    assert again.stdout == printed == run(script, "--summary", str(out)).stdout


@pytest.mark.long
def test_a_failure_is_written_down_and_tried_again(script, tmp_path):
    out = tmp_path / "lines.jsonl"
    for tries in (1, 2):
        printed = run(script, "small:nothing", "memory.budget=1GB", "--cpu", "--out", str(out)).stdout
        assert out.read_text().count("no small model 'nothing'") == tries
    assert len(read_lines(out)) == 1 and "| failed | 1 |" in printed


@pytest.mark.long
def test_running_out_of_memory_is_a_result(tmp_path, monkeypatch):
    from qlora.training.trainer import AdapterTrainer

    def stop(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nand more")

    cell = Cell.parse(CELL)
    plan = plan_cell(cell, describe_machine("cpu"), tmp_path)
    monkeypatch.setattr(AdapterTrainer, "train", stop)
    line = json.loads(json.dumps(measure_cell(cell, plan, tmp_path)))
    assert line["out_of_memory"] and line["message"] == "CUDA out of memory. Tried to allocate 2.00 MiB"
    assert list(line["measured"]["phases"]) == ["load", "train"] and line["error_percent"] is None and line["loss"] == []
    assert line["planned"]["phases"] == plan.phases
    summary = summarise([line])
    assert (summary.num_out_of_memory, summary.num_measured) == (1, 0)
    assert "out of memory in train" in cells_table([line]) and receipt_of(line) is None


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
    {"cell": "i", "device": "card", "error": "no such model"},
]


def test_the_summary_adds_up():
    summary = summarise(LINES)
    assert (summary.num_cells, summary.num_measured, summary.num_failed) == (9, 5, 1)
    assert (summary.num_refused, summary.num_refused_tried, summary.num_false_refusals) == (3, 2, 1)
    assert (summary.num_out_of_memory, summary.num_over_budget, summary.num_retried) == (1, 1, 1)
    assert (summary.num_under, summary.num_over_margin, summary.num_long_answers) == (2, 1, 1)
    errors = [1, 1, 5, 10, 100 / 7]
    assert summary.mean_error == pytest.approx(sum(errors) / 5, abs=1e-6) and summary.median_error == pytest.approx(5)
    assert summary.worst_error == pytest.approx(100 / 7) and summary.most_under == pytest.approx(-5)
    without_retries = [100 * (5 / 4.5 - 1)] * 3 + [100 * (5 / 7.2 - 1)]
    assert summary.mean_reserved_error == pytest.approx(sum(map(abs, without_retries)) / 4)
    assert summary.most_reserved_under == pytest.approx(without_retries[-1])


def test_the_tables_say_so():
    table = summary_table([*LINES, a_line("a", device="other card")])
    assert "|  | card | other card |" in table
    assert "| cells, of them trained to the end | 9, 5 | 1, 1 |" in table
    assert "| most under | -5.00 % | none |" in table
    assert "| refused, of them trained within the budget all the same | 3, 1 of 2 tried | 0, none |" in table
    rows = cells_table(LINES).splitlines()
    assert len(rows) == 2 + len(LINES) and len({row.count("|") for row in rows}) == 1
    assert "refused, +14.29 %" in rows[7] and "refused, out of memory in save" in rows[8] and "| refused |" in rows[9]


def test_only_what_is_missing_is_measured(tmp_path):
    file = tmp_path / "lines.jsonl"
    failed = {"cell": "b x=1", "device": "card", "error": "killed"}
    written = [a_line("a x=1", planned=1), failed, refused("c x=1"), a_line("a x=1")]
    file.write_text("\n".join(map(json.dumps, written)) + '\n{"cell": "torn')
    lines = read_lines(file)
    assert [line["cell"] for line in lines] == ["a x=1", "b x=1", "c x=1"]
    assert lines[0]["planned"]["phases"]["train"] == 4 * GIB
    cells = parse_cells("a x=1\nb x=1 # why\n\n# no cell\nc x=1\nd x=1\nd x=1\n")
    assert [str(cell) for cell in cells_to_do(cells, lines, "card")] == ["b x=1", "d x=1"]
    assert [cell.model for cell in cells_to_do(cells, lines, "card", try_refused=True)] == ["b", "c", "d"]
    assert len(cells_to_do(cells, lines, "other card")) == 4


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


def test_a_cell_has_one_model():
    assert Cell.parse("qwen/qwen3-8b memory.budget=8GB lora.r=16") == Cell("Qwen/Qwen3-8B", ("memory.budget=8GB", "lora.r=16"))
    for text in ("memory.budget=8GB", "a b lora.r=16"):
        with pytest.raises(RecipeError, match="a cell has one"):
            Cell.parse(text)


def test_the_default_cells_are_thirty_over_four_families_and_four_sizes(script):
    module = load(script)
    cells = parse_cells(module._GPU_CELLS)
    assert len(set(cells)) == len(cells) >= 30
    families = {cell.model.split("/")[1].split("-")[0].rstrip("0123456789.") for cell in cells}
    assert {"Llama", "Qwen", "gemma", "SmolLM"} <= families
    assert {module._budget_bytes(cell) // GIB for cell in cells} == {4, 8, 12, 24}
    for cell in (*cells, *parse_cells(module._CPU_CELLS)):
        assert build_recipe(overrides=cell.overrides, model=cell.model, data="none").memory.budget != "auto"
