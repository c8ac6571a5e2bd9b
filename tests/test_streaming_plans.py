"""Plans for models that are larger than their card: they fit, and say what is streamed, how fast it is and what it takes beside the card."""

from dataclasses import replace

import pytest

from qlora.catalog.cards import find_card
from qlora.engine.placement import Placement
from qlora.hardware import device_from_card
from qlora.training.planner import plan_model
from qlora.units import GIB

SIZES = [("meta-llama/Llama-3.1-8B", 4), pytest.param("Qwen/Qwen3-32B", 8, marks=pytest.mark.long),
         pytest.param("meta-llama/Llama-3.3-70B-Instruct", 24, marks=pytest.mark.long)]


def host(device, ram_gib):
    """The card in a machine with so much RAM, whatever this one has."""
    return replace(device, host_bytes=ram_gib * GIB, host_free_bytes=ram_gib * GIB)


@pytest.fixture(scope="module")
def plan_for():
    """Each plan once."""
    made = {}

    def plan(model, device, *overrides):
        key = model, device, overrides
        if key not in made:
            made[key] = plan_model(model, device=device, overrides=overrides, sketch=True)
        return made[key]

    return plan


@pytest.mark.parametrize("model, vram", SIZES)
def test_a_model_larger_than_the_card_fits(plan_for, model, vram):
    plan = plan_for(model, host(device_from_card(None, vram * GIB), 64))
    settings = plan.settings
    assert plan.fits and plan.peak_bytes <= plan.budget_bytes
    assert settings["memory.streaming"] is True and settings["memory.streamed_layers"] > 0
    placement = Placement.from_settings(settings)
    assert placement.streams and placement.resident_layers == settings["memory.resident_layers"]
    note = next(note for note in plan.notes if "are streamed from" in note)
    assert f"{settings['memory.streamed_layers']} of " in note and "of disk" in note and "of RAM" in note
    assert plan.tokens_per_second > 1 and "with all layers on the device" in plan.speed_basis
    assert settings["memory.cache_base"] is True and plan.disk_bytes > 4 * GIB
    assert settings["train.sample_rows"] == 0
    assert set(plan.decisions) >= {f"memory.{name}" for name in ("head_format", "loss_chunk", "embedding_device", "stream_from")}


@pytest.mark.long
def test_where_layers_wait_follows_the_ram(plan_for):
    model, card = "meta-llama/Llama-3.1-8B", device_from_card(find_card("RTX 3050 laptop"))
    rich, poor = (plan_for(model, host(card, ram)).settings for ram in (64, 4))
    assert (rich["memory.stream_from"], poor["memory.stream_from"]) == ("ram", "disk")
    assert rich["memory.visit_micro_batches"] == "all" and poor["memory.visit_micro_batches"] < 16
    assert rich["train.accumulation"] == poor["train.accumulation"] == 16


def test_a_card_is_filled(plan_for):
    """One layer more on the device would not fit."""
    plan = plan_for("meta-llama/Llama-3.1-8B", host(device_from_card(None, 4 * GIB), 64))
    free = plan.budget_bytes - plan.peak_bytes
    layer = 109_600_000
    assert 0 < plan.settings["memory.resident_layers"] < 32 and free < 1.1 * layer


@pytest.mark.long
def test_what_fits_is_not_streamed(plan_for):
    device = host(device_from_card(None, 12 * GIB), 64)
    plain = plan_for("Qwen/Qwen3-0.6B", device)
    assert Placement.from_settings(plain.settings).plain and not any("streamed" in note for note in plain.notes)
    asked = plan_for("Qwen/Qwen3-0.6B", device, "memory.streaming=true", "memory.resident_layers=4", "train.sample_rows=8")
    assert asked.settings["memory.streamed_layers"] == 24 and asked.settings["train.sample_rows"] == 8
    assert asked.phases["train"] < plain.phases["train"]


def test_more_resident_layers_take_more_and_nothing_else_changes(plan_for):
    device = host(device_from_card(None, 12 * GIB), 64)
    peaks = [plan_for("Qwen/Qwen3-0.6B", device, "memory.streaming=true", f"memory.resident_layers={n}", "train.micro_batch=1")
             .phases["train"] for n in (4, 5, 6)]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] > 7_000_000
