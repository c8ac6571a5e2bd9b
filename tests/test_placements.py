"""What the memory engine may do, as a plan decides it: nothing where nothing is needed, what changes least where something is, what a
person says in any case; each decision with its reason, and contradictions refused.
"""

import itertools
import random
from dataclasses import fields, replace

import pytest
from test_choose import device, facts, recipe

from qlora.engine.placement import Placement, resident_numbers
from qlora.errors import RecipeError
from qlora.planning.choose import choose, find_options
from qlora.planning.placements import placements_for, residents_for
from qlora.planning.search import search, with_residents
from qlora.units import GIB, KIB, MIB

_NUM_LAYERS = 32
_STREAMED_FIRST = 4  # placements before the first that streams


def placements(memory=None, **changes):
    values = {"on_gpu": True, "tied_embeddings": False, "num_layers": _NUM_LAYERS, "streamable": True, "stream_from": "ram", **changes}
    return placements_for(recipe(memory=memory or {}), **values)


def draw_placement(seed):
    """Any that is possible."""
    draw = random.Random(seed)
    streams = draw.random() < 0.5
    return Placement(
        resident_layers=draw.randrange(_NUM_LAYERS) if streams else None, stream_from=draw.choice(["ram", "disk"]),
        visit_micro_batches=draw.choice([None, 1, 5]),
        embedding_device=draw.choice(["device", "host"]), head_format=draw.choice(["resident", "streamed", "int8", "nf4"]),
        loss_chunk_bytes=draw.choice([None, 64 * KIB, 3 * MIB, GIB]), offload_activations=draw.random() < 0.5,
        offload_adapters=draw.random() < 0.5, fused_lora=draw.random() < 0.5, mlp_tile_tokens=draw.choice([None, 1, 1024]),
        dequantise_once=draw.random() < 0.5,
    )


# --- as settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_settings_say_all_of_a_placement(seed):
    """What a plan keeps is what a run is built with."""
    placement = draw_placement(seed)
    settings = placement.to_settings(_NUM_LAYERS)
    assert Placement.from_settings(settings) == placement
    assert settings["memory.resident_layers"] + settings["memory.streamed_layers"] == _NUM_LAYERS
    assert "auto" not in settings.values() and None not in settings.values()


def test_what_nobody_has_decided_is_plain():
    assert Placement.from_settings({}).plain
    assert Placement.from_settings(dict.fromkeys(Placement().to_settings(4), "auto")).plain
    assert all(not replace(Placement(), **{field.name: object()}).plain for field in fields(Placement))


@pytest.mark.parametrize(("num_layers", "count"), [(n, k) for n in (1, 2, 7, 32, 80) for k in range(n + 1)])
def test_residents_are_spread_evenly(num_layers, count):
    """No run of streamed layers is longer than another by more than one, so that the link can catch up everywhere."""
    numbers = resident_numbers(num_layers, count)
    assert len(numbers) == count and numbers == sorted({*numbers}) and set(numbers) <= set(range(num_layers))
    if count:
        between = [after - before for before, after in itertools.pairwise([-1, *numbers])]
        assert max(between) - min(between) <= 1 and numbers[-1] == num_layers - 1


# --- what there is to choose from --------------------------------------------------------------------------------------------


def test_the_first_does_nothing_and_none_is_there_twice():
    found = placements()
    assert found[0].plain and len(set(found)) == len(found)
    streams = [each.streams for each in found]
    assert streams == sorted(streams) and streams.index(True) == _STREAMED_FIRST  # streaming comes after all that does without
    assert all(each.resident_layers in (None, 0) for each in found)


def test_no_placement_takes_back_what_an_earlier_one_gave_up():
    """Inside those that stream and those that do not: memory is given up step by step."""
    for group in (placements()[:_STREAMED_FIRST], placements()[_STREAMED_FIRST:]):
        for name in ("fused_lora", "offload_activations", "offload_adapters"):
            values = [getattr(each, name) for each in group]
            assert values == sorted(values), name
        hosts = [each.embedding_device == "host" for each in group]
        assert hosts == sorted(hosts)
        chunks = [each.loss_chunk_bytes for each in group if each.loss_chunk_bytes]
        assert chunks == sorted(chunks, reverse=True)


def test_what_is_not_exact_is_only_taken_where_it_is_asked_for():
    assert {each.head_format for each in placements()} == {"resident", "streamed"}
    assert all(each.head_format == "int8" for each in placements({"head_format": "int8"}))


def test_a_table_that_is_the_head_too_stays_while_the_head_does():
    for each in placements(tied_embeddings=True):
        assert each.embedding_device == "device" or each.head_format == "streamed"


def test_a_cpu_is_its_own_host():
    assert not any(each.offload_activations for each in placements(on_gpu=False))


@pytest.mark.parametrize(("memory", "streams"), [
    ({"streaming": True}, {True}), ({"streaming": False}, {False}), ({"resident_layers": 31}, {True}), ({"resident_layers": 0}, {True}),
    ({"resident_layers": 32}, {True, False}), ({}, {True, False}),
])
def test_streaming_is_what_a_person_says(memory, streams):
    assert {each.streams for each in placements(memory)} == streams
    if not memory.get("streaming"):
        assert not any(each.streams for each in placements({key: 32 for key in memory if key == "resident_layers"}, streamable=False))


@pytest.mark.parametrize(("name", "value", "field", "expected"), [
    ("embedding_device", "device", "embedding_device", "device"), ("embedding_device", "host", "embedding_device", "host"),
    ("head_format", "nf4", "head_format", "nf4"), ("offload_activations", False, "offload_activations", False),
    ("offload_adapters", True, "offload_adapters", True), ("fused_lora", False, "fused_lora", False),
    ("dequantise_once", True, "dequantise_once", True), ("mlp_tile", 64, "mlp_tile_tokens", 64),
    ("mlp_tile", "none", "mlp_tile_tokens", None), ("loss_chunk", "none", "loss_chunk_bytes", None),
    ("loss_chunk", "5MiB", "loss_chunk_bytes", 5 * MIB),
])
def test_what_a_person_sets_is_in_all_of_them(name, value, field, expected):
    found = placements({name: value})
    assert {getattr(each, field) for each in found} == {expected}
    assert all(each.loss_chunk_bytes or each.head_format == "resident" for each in found)  # TRL's loss knows no other


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_streamed_layers_wait_where_it_is_said(where):
    for found in (placements({"stream_from": where}), placements(stream_from=where)):
        assert {each.stream_from for each in found if each.streams} == {where}


def test_adapters_stay_where_fp16_scales_their_gradients():
    assert any(each.offload_adapters for each in placements())
    assert not any(each.offload_adapters for each in placements(scaled_loss=True))


@pytest.mark.parametrize(("memory", "said", "changes"), [
    ({"resident_layers": 33}, "has 32 layers", {}),
    ({"streaming": False, "resident_layers": 3}, "streaming is false", {}),
    ({"streaming": True}, "cannot be streamed", {"streamable": False}),
    ({"resident_layers": 3}, "cannot be streamed", {"streamable": False}),
    ({"head_format": "streamed", "loss_chunk": "none"}, "TRL's loss", {}),
    ({"offload_adapters": True}, "fp16", {"scaled_loss": True}),
])
def test_contradictions_are_refused(memory, said, changes):
    with pytest.raises(RecipeError, match=said) as caught:
        placements(memory, **changes)
    assert caught.value.fix and "memory." in str(caught.value)


# --- what is chosen ----------------------------------------------------------------------------------------------------------


def need_of(candidate):
    """Bytes of a made-up 70B: each thing that the engine does takes something away."""
    at = candidate.placement
    resident = _NUM_LAYERS if at.resident_layers is None else at.resident_layers + 2
    layers = resident * GIB * 35 / 32
    tables = (0 if at.embedding_device == "host" else 2 * GIB) + (0.1 * GIB if at.head_format == "streamed" else 2 * GIB)
    kept = candidate.micro_batch * (0.1 if at.offload_activations else 0.5) * GIB
    inner = candidate.micro_batch * (0.5 if at.fused_lora else 1) * (0.2 if at.mlp_tile_tokens else 1) * GIB
    loss = (at.loss_chunk_bytes or 600 * MIB) * 2
    adapters = candidate.r * (0 if at.offload_adapters else 0.1) * GIB
    return layers + tables + kept + inner + loss + adapters


def decide(budget_gib, memory=None, **changes):
    """Options, what was found, and the decisions."""
    known = facts(**{"budget_bytes": int(budget_gib * GIB), "num_layers": _NUM_LAYERS, "streamable": True, "stream_from": "ram",
                     "device": device(gib=budget_gib), **changes})
    asked = recipe(memory=memory or {}, train={"batch": 4})
    options, batch = find_options(asked, known)

    def fits(candidate):
        return need_of(candidate) <= known.budget_bytes

    found = search(options, fits)
    found = replace(found, candidate=with_residents(found.candidate, options, fits))
    return options, found, choose(asked, known, found, batch)[0]


@pytest.mark.parametrize("budget_gib", [2, 3, 5, 8, 9, 12, 20, 30, 36, 40, 41, 42, 44, 60])
def test_the_first_that_fits_is_chosen_and_as_many_layers_stay_as_fit(budget_gib):
    options, found, _ = decide(budget_gib)
    least = [need_of(options.least_with(each)) <= budget_gib * GIB for each in options.placements]
    assert found.fits == any(least) == (need_of(found.candidate) <= budget_gib * GIB)
    if not found.fits:
        return
    chosen, first = found.candidate.placement, options.placements[least.index(True)]
    assert replace(chosen, resident_layers=first.resident_layers) == first
    if chosen.streams:
        more = replace(found.candidate, placement=replace(chosen, resident_layers=chosen.resident_layers + 1))
        assert chosen.resident_layers == _NUM_LAYERS - 1 or need_of(more) > budget_gib * GIB


def test_every_kind_of_outcome_was_among_these():
    chosen = [decide(budget)[1].candidate.placement for budget in (3, 5, 8, 9, 12, 20, 30, 36, 40, 41, 42, 44, 60)]
    assert any(each.plain for each in chosen) and any(each.fused_lora and not each.streams for each in chosen)
    assert any(each.streams and each.resident_layers > 0 for each in chosen)
    assert any(each.offload_adapters for each in chosen)


def test_more_budget_never_gives_up_more():
    """What is left in the same placement goes to rows and ranks first, and to layers on the device then."""
    places, residents = [], {}
    for budget in range(2, 60):
        options, found, _ = decide(budget)
        at = found.candidate.placement
        base = replace(found.candidate, placement=replace(at, resident_layers=0 if at.streams else None))
        places.append((found.fits, -options.placements.index(base.placement)))
        residents.setdefault(base, []).append(at.resident_layers or 0)
    assert places == sorted(places)
    assert all(counts == sorted(counts) for counts in residents.values()) and max(map(len, residents.values())) > 3


@pytest.mark.parametrize("budget_gib", [3, 5, 9, 20, 41, 60])
def test_every_decision_has_its_value_and_its_reason(budget_gib):
    options, found, decisions = decide(budget_gib)
    placement, plain = found.candidate.placement, Placement().to_settings(_NUM_LAYERS)
    assert Placement.from_settings({key: decision.value for key, decision in decisions.items()}) == placement
    for key, value in placement.to_settings(_NUM_LAYERS).items():
        decision = decisions[key]
        assert decision.value == value and decision.reason and "{" not in decision.reason
        assert decision.source == ("default" if value == plain[key] else "derived"), key
    assert decisions["memory.cache_base"].value is True  # of 8B
    if placement.streams:
        assert decisions["memory.checkpointing"].value is True


def test_what_is_given_says_so():
    memory = {"fused_lora": True, "loss_chunk": "32MiB", "resident_layers": 5}
    _, found, decisions = decide(20, memory)
    assert found.candidate.placement.resident_layers == 5
    for name in memory:
        assert decisions[f"memory.{name}"].source == "given"
    assert decisions["memory.streaming"].source == "derived"
    assert residents_for(recipe(memory=memory), _NUM_LAYERS) == (5,)


def test_layers_that_wait_on_the_disk_say_why():
    _, _, decisions = decide(8, stream_from="disk")
    assert decisions["memory.stream_from"].value == "disk" and "RAM" in decisions["memory.stream_from"].reason
    _, _, decisions = decide(60, stream_from="disk")
    assert "nothing is streamed" in decisions["memory.stream_from"].reason
