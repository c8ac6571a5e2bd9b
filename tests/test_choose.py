"""Every auto becomes a value; what a person fixed stays; the values fit each other. Precision follows the device."""

import itertools

import pytest

from qlora.errors import HardwareError, RecipeError
from qlora.hardware import Device, usable_bytes
from qlora.planning.choose import Facts, choose, find_options
from qlora.planning.search import search
from qlora.precision import Precision, choose_precision
from qlora.recipe import build_recipe
from qlora.units import GIB


def device(kind="cuda", gib=8, bf16=True, capability=(8, 6)):
    """A described device: cards that are not in this machine are looked at, never run on."""
    return Device(
        kind=kind, name="a card" if kind == "cuda" else "a CPU", memory_bytes=int(gib * GIB), free_bytes=int(gib * GIB),
        host_bytes=32 * GIB, host_free_bytes=32 * GIB, num_threads=2, has_bf16=bf16,
        capability=capability if kind == "cuda" else None,
    )


def facts(**changes):
    values = dict(
        device=device(), budget_bytes=8 * GIB, budget_reason="the card", num_layers=32, attentions=("sdpa", "eager"), precision=Precision("bf16", "bf16", False, "it has it"), num_parameters=8_000_000_000,
        num_train_rows=5000, num_validation_rows=200, max_length=512, max_length_reason="the longest row",
        data_format="messages", data_format_reason="its columns",
    )
    return Facts(**{**values, **changes})


def recipe(**sections):
    return build_recipe(model="m", data="d.jsonl", **sections)


def need(candidate):
    """Bytes of a made-up model: grows with whatever ought to need more."""
    rows = candidate.micro_batch * candidate.max_length * (1 if candidate.checkpointing else 20) * 3_000_000
    return 3 * GIB + candidate.r * 4_000_000 + rows


def decide(recipe, facts):
    """Decisions and steps, for the made-up model within the budget of the facts."""
    options, batch = find_options(recipe, facts)
    return choose(recipe, facts, search(options, lambda candidate: need(candidate) <= facts.budget_bytes), batch)


def test_nothing_stays_auto_and_everything_has_a_reason():
    for kind, rows, validation in itertools.product(("cuda", "cpu"), (1, 7, 5000), (0, 8)):
        decisions, steps = decide(recipe(), facts(device=device(kind), num_train_rows=rows, num_validation_rows=validation))
        assert "auto" not in [decision.value for decision in decisions.values()]
        assert all(decision.reason and decision.source in ("given", "derived", "rule", "default") for decision in decisions.values())
        assert steps >= 1


@pytest.mark.parametrize("fixed", [
    {"batch": 12}, {"micro_batch": 3}, {"accumulation": 5}, {"batch": 12, "micro_batch": 4}, {"batch": 12, "accumulation": 3},
    {"micro_batch": 4, "accumulation": 3}, {"batch": 12, "micro_batch": 4, "accumulation": 3},
])
def test_what_is_fixed_stays_and_the_rest_fits(fixed):
    for rows, gib in itertools.product((3, 40, 5000), (4, 8, 24)):
        decisions, _ = decide(recipe(train=fixed), facts(num_train_rows=rows, budget_bytes=gib * GIB))
        value = {name: decisions[f"train.{name}"].value for name in ("batch", "micro_batch", "accumulation")}
        assert value["batch"] == value["micro_batch"] * value["accumulation"]
        assert all(value[name] == wanted for name, wanted in fixed.items())


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="does not divide"):
        decide(recipe(train={"batch": 10, "micro_batch": 4}), facts())


def test_alpha_and_rate_follow_a_given_rank():
    decisions, _ = decide(recipe(lora={"r": 8, "alpha": "standard"}), facts())
    assert decisions["lora.alpha"].value == 16
    assert decisions["train.learning_rate"].value * 16 / 8 == pytest.approx(2e-4)


def test_more_memory_never_gives_less():
    before = ()
    for gib in (4, 6, 8, 12, 16, 24, 48):
        decided = decide(recipe(), facts(budget_bytes=gib * GIB))[0]
        quality = (decided["train.micro_batch"].value, decided["lora.r"].value, not decided["memory.checkpointing"].value)
        assert quality >= before
        before = quality


def test_values_of_the_search_carry_their_reason():
    decided, _ = decide(recipe(), facts())
    assert decided["train.micro_batch"].reason == "the most rows at once that fit"
    assert "does not fit" in decided["memory.checkpointing"].reason
    assert decided["lora.r"].source == "rule"
    fixed, _ = decide(recipe(lora={"r": 32}, memory={"checkpointing": True}), facts())
    assert fixed["lora.r"].source == fixed["memory.checkpointing"].source == "given"


def test_a_model_without_sdpa_gets_what_it_has():
    decided, _ = decide(recipe(), facts(attentions=("eager",)))
    assert decided["model.attention"].value == "eager"


def test_without_data_there_is_a_plan_all_the_same():
    decided, steps = decide(recipe(), facts(num_train_rows=None, num_validation_rows=None))
    assert steps is None
    assert decided["train.batch"].value == 16


def test_steps_are_counted_as_the_trainer_counts_them():
    _, steps = decide(recipe(train={"micro_batch": 2, "accumulation": 3, "epochs": 2}), facts(num_train_rows=20))
    assert steps == 2 * 4  # ten micro-batches an epoch make three whole windows and a partial one


@pytest.mark.parametrize(
    ("wanted", "card", "compute", "adapters"),
    [
        ("auto", device(), "bf16", "bf16"),
        ("auto", device(bf16=False, capability=(7, 5)), "fp16", "fp32"),
        ("auto", device("cpu"), "bf16", "bf16"),
        ("fp32", device("cpu"), "fp32", "fp32"),
        ("fp16", device(), "fp16", "fp32"),
    ],
)
def test_precision_follows_the_device(wanted, card, compute, adapters):
    found = choose_precision(wanted, card)
    assert (found.compute, found.adapters, found.autocast) == (compute, adapters, compute == "fp16")
    assert found.reason


@pytest.mark.parametrize(("wanted", "card"), [("bf16", device(bf16=False, capability=(7, 5))), ("fp16", device("cpu"))])
def test_a_type_that_the_device_lacks_is_refused(wanted, card):
    with pytest.raises(HardwareError, match="model.dtype"):
        choose_precision(wanted, card)


def test_a_round_card_size_means_the_card():
    """An "8 GB" card reports 7.6 GiB or so; 24 GB on it is a mistake."""
    assert usable_bytes(device(gib=7.6), 8 * GIB) == int(7.6 * GIB)
    assert usable_bytes(device(gib=24), 8 * GIB) == 8 * GIB
    with pytest.raises(HardwareError, match="24.00 GiB, but a card has 7.60 GiB"):
        usable_bytes(device(gib=7.6), 24 * GIB)


def test_a_percentile_becomes_the_length_that_it_is():
    written = build_recipe(model="m", data={"path": "d.jsonl", "max_length": "p99"})
    decided, _ = decide(written, facts(max_length=321))
    assert decided["data.max_length"].value == 321
    assert "p99" in decided["data.max_length"].reason
    with pytest.raises(RecipeError, match="max_length"):
        build_recipe(model="m", data={"path": "d.jsonl", "max_length": "p101"})
