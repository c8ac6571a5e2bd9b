"""A plan is kept: settings that were planned for a budget are trained in a process of its own, and the memory of their tensors
is measured.
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import truth
from faults.parameters import in_long

from qlora.engine.placement import Placement
from qlora.planning.plan import Plan
from qlora.training.planner import plan_model
from qlora.units import MIB

# Budgets between what the least settings need and what all of them together do, so that something has to give.
PAIRS = {
    "llama": (70, 130, 270), "qwen3": (80, 180), "gemma2": (70, 150), "gpt2": (64, 200), "phi3": (50, 100),
}
GIVEN = ("data.max_length=256", "train.batch=4")
WITHOUT_ENGINE = ("memory.streaming=false", "memory.fused_lora=false", "memory.loss_chunk=none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders with a config.json, all that a plan needs of a model."""
    found = {}
    for model in PAIRS:
        found[model] = tmp_path_factory.mktemp(model)
        truth.small_config(truth.Cell(model)).save_pretrained(found[model])
    return found


def planned(folder: Path, budget_mib: float, *overrides: str) -> Plan:
    return plan_model(str(folder), device=truth.CPU, overrides=(*GIVEN, f"memory.budget={budget_mib}MB", *overrides))


def as_cell(model: str, plan: Plan) -> dict:
    """The real run of a plan."""
    settings = plan.settings
    return dict(
        model=model, r=settings["lora.r"], micro_batch=settings["train.micro_batch"], accumulation=settings["train.accumulation"],
        length=settings["data.max_length"], checkpointing=settings["memory.checkpointing"], optimizer=settings["train.optimizer"],
        attention=settings["model.attention"], ragged=settings["train.micro_batch"] > 1,
    )


def trained(cells: list[dict], folder: Path) -> list[dict[str, int]]:
    """Peaks by phase of two real optimizer steps and an evaluation, for each cell, in a process of their own."""
    script = ("import sys, json; from pathlib import Path; import truth\n"
              "for i, cell in enumerate(json.loads(sys.argv[1])):\n"
              "    folder = Path(sys.argv[2]) / str(i); folder.mkdir()\n"
              "    print('peaks', json.dumps(truth.measure(truth.Cell(**cell), folder, after=('eval',)).peaks))")
    done = subprocess.run([sys.executable, "-c", script, json.dumps(cells), str(folder)], capture_output=True, text=True,
                          cwd=Path(__file__).parent, check=True)
    return [json.loads(line.removeprefix("peaks ")) for line in done.stdout.splitlines() if line.startswith("peaks ")]


@pytest.mark.parametrize("model", ["llama", *in_long("qwen3", "gemma2", "gpt2", "phi3")])
def test_planned_runs_stay_within_their_budgets(model, folders, tmp_path):
    # The runs of tests/truth.py are without the memory engine.
    plans = [planned(folders[model], budget, *WITHOUT_ENGINE) for budget in PAIRS[model]]
    runs = trained([as_cell(model, plan) for plan in plans], tmp_path)
    assert len(runs) == len(plans) >= 2
    for budget_mib, plan, measured in zip(PAIRS[model], plans, runs):
        assert plan.fits and plan.peak_bytes <= plan.budget_bytes == budget_mib * MIB
        peak = max(measured[phase] for phase in ("load", "train", "eval"))
        assert peak <= plan.budget_bytes
        assert peak == pytest.approx(max(plan.phases[phase] for phase in ("load", "train", "eval")), rel=0.05)


def test_there_are_ten_pairs():
    assert sum(map(len, PAIRS.values())) >= 10


def test_a_larger_budget_never_gives_a_worse_plan(folders):
    before = ()
    for budget_mib in (50, 70, 130, 200, 400):
        plan = planned(folders["llama"], budget_mib)
        settings = plan.settings
        placement = Placement.from_settings(settings)
        engine = sum(getattr(placement, field.name) != field.default for field in fields(Placement))  # the less of it the better
        quality = (plan.fits, -engine, settings["train.micro_batch"], settings["lora.r"], not settings["memory.checkpointing"])
        assert plan.fits == (plan.peak_bytes <= plan.budget_bytes)
        if plan.fits:
            assert quality >= before
            before = quality
    assert before[0]


def test_what_does_not_fit_is_refused_with_what_would(folders):
    plan = planned(folders["llama"], 50, *WITHOUT_ENGINE)
    assert not plan.fits
    assert plan.largest_part in ("activations", "base", "loss", "embeddings", "head")
    assert [each.overrides[0] for each in plan.alternatives][0].startswith("data.max_length=")
    assert all(each.peak_bytes <= each.budget_bytes for each in plan.alternatives)
    shorter = planned(folders["llama"], 50, *WITHOUT_ENGINE, *plan.alternatives[0].overrides)
    assert shorter.fits
