"""Receipts survive what files suffer, and the margin follows them in the right direction and never too far."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from qlora.errors import OutputError
from qlora.hardware import Device
from qlora.planning.cache import library_versions
from qlora.planning.receipts import Receipt, Receipts, default_path
from qlora.units import GIB, MIB

PRIOR = {"cuda": 0.02, "cpu": 0.01}


def device(kind="cuda", name="NVIDIA GeForce RTX 4060"):
    return Device(kind, name, 8 * GIB, 8 * GIB, 32 * GIB, 32 * GIB, 2, True, (8, 9) if kind == "cuda" else None)


def receipt(excess=0.0, kind="cuda", **changes):
    """A run that went over its plan by this share (and by the bytes that every margin on a GPU has besides)."""
    planned = 4 * GIB
    spare = 32 * MIB if kind == "cuda" else 0
    values = dict(
        device=device(kind).name, kind=kind, model="m", planned={"load": GIB, "train": planned},
        measured={"load": GIB, "train": round(planned * (1 + excess)) + spare}, versions=library_versions(),
    )
    return Receipt(**{**values, **changes})


def share(*excesses, kind="cuda", **changes):
    return Receipts([receipt(e, kind, **changes) for e in excesses]).margin(device(kind)).share


def test_without_receipts_there_is_a_prior():
    for kind, prior in PRIOR.items():
        margin = Receipts().margin(device(kind))
        assert margin.share == prior and margin.reason and "\n" not in margin.reason
    assert Receipts().margin(device()).of(GIB) == pytest.approx(0.02 * GIB + 32 * MIB, abs=2)
    assert Receipts().margin(device("cpu")).of(GIB) == pytest.approx(0.01 * GIB, abs=2)


def test_runs_that_keep_to_their_plan_lower_the_margin_step_by_step():
    shares = [share(*[-0.001] * n) for n in range(8)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 0.02 and shares[5] == shares[7] == 0.005


def test_the_worst_run_sets_the_margin_until_there_are_many():
    assert share(*[0.0] * 7, 0.08) == pytest.approx(0.08, abs=1e-6)
    assert share(*[0.0] * 199, 0.08) == 0.005  # one in two hundred is within the 5 % that are accepted
    assert share(*[0.0] * 15, *[0.08] * 5) == pytest.approx(0.08, abs=1e-6)


def test_the_margin_covers_the_runs_it_was_learned_from():
    rng = random.Random(1)
    for _ in range(50):
        runs = [receipt(rng.uniform(-0.1, 0.2)) for _ in range(rng.randint(5, 19))]
        margin = Receipts(runs).margin(device())
        assert all(r.measured["train"] <= r.planned["train"] + margin.of(r.planned["train"]) + 1 for r in runs)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_run_over_its_margin_never_lowers_it(kind):
    rng = random.Random(2)
    for _ in range(300):
        runs = [rng.gauss(0.0, 0.03) for _ in range(rng.choice([0, 1, 2, 4, 5, 18, 19, 20, 38, 39, 60]))]
        before = share(*runs, kind=kind)
        assert share(*runs, before + rng.uniform(0, 0.3), kind=kind) >= before - 1e-6
        if runs:  # any run that took more than it did
            worse = list(runs)
            worse[rng.randrange(len(runs))] += rng.uniform(0, 0.3)
            assert share(*worse, kind=kind) >= before - 1e-6
        assert 0.005 <= before <= 0.25


def test_there_is_a_floor_and_a_ceiling():
    assert share(*[-0.5] * 30) == 0.005 and share(*[3.0] * 30) == 0.25


def test_only_runs_on_this_device_with_this_allocator_count():
    bad = [receipt(0.1, device="another card") for _ in range(9)] + [receipt(0.1, "cpu") for _ in range(9)]
    assert Receipts(bad).margin(device()).share == 0.02
    runs = Receipts([receipt(0.1, allocator="expandable")] * 6 + [receipt(0.0, allocator="native")] * 6)
    assert runs.margin(device(), "native").share == 0.005 and runs.margin(device(), "expandable").share == pytest.approx(0.1, abs=1e-6)
    assert runs.margin(device()).share == pytest.approx(0.1, abs=1e-6)
    same_card = [receipt(0.1, device="GeForce RTX 4060") for _ in range(6)]  # as the table of cards calls it
    assert Receipts(same_card).margin(device()).share == pytest.approx(0.1, abs=1e-6)


def test_runs_of_other_library_versions_can_only_raise_the_prior():
    old = {"versions": {"torch": "1.0"}}
    assert share(*[-0.01] * 9, **old) == 0.02
    assert share(*[0.1] * 9, **old) == pytest.approx(0.1, abs=1e-6)
    mixed = Receipts([receipt(0.1, **old)] * 9 + [receipt(0.0)] * 5)
    assert mixed.margin(device()).share == 0.005  # five runs of today replace the prior altogether


def test_reasons_say_what_they_rest_on():
    assert "Tesla T4" in Receipts().margin(device()).reason
    reason = Receipts([receipt(0.03)]).margin(device()).reason
    assert "1 run on" in reason and "3.0 % over" in reason and "Tesla T4" in reason
    assert "Tesla T4" not in Receipts([receipt(-0.01)] * 5).margin(device()).reason


# --- files --------------------------------------------------------------------------------------------------------------


def test_what_is_added_is_read_back(tmp_path):
    path = tmp_path / "deep" / "receipts.jsonl"
    whole = receipt(
        0.01, capability=(8, 9), settings={"lora.r": 16}, planned_reserved={"train": 5}, measured_reserved={"train": 6},
        context_bytes=7, num_retries=1, tokens_per_second=100.5, flops_per_token=1e9, key="k",
    )
    assert len(Receipts.load(path)) == 0
    receipts = Receipts.load(path)
    receipts.add(whole)
    receipts.add(receipt(0.02))
    assert list(Receipts.load(path)) == list(receipts) and list(receipts)[0] == whole
    assert len(path.read_text().splitlines()) == 2


def test_the_cache_is_where_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    Receipts.load().add(receipt())
    assert default_path() == tmp_path / "receipts.jsonl" and len(Receipts.load()) == 1


DAMAGE = [
    "", "not json", '{"device": "x"', "[]", "3", "null", '{"device": "x"}', "\x00\x00", '{"kind": "tpu"}',
    json.dumps({"device": "x", "kind": "cuda", "model": "m", "planned": {"train": 0}, "measured": {"train": 1}}),
    json.dumps({"device": "x", "kind": "cuda", "model": "m", "planned": {"train": "1"}, "measured": {"train": 1}}),
    json.dumps({"device": "x", "kind": "cuda", "model": "m", "planned": [1], "measured": {"train": 1}}),
    '{"device": "x", "kind": "cuda", "model": "m", "planned": {"train": 1}, "measured": {"train": NaN}}',
    '{"device": "x", "kind": "cuda", "model": "m", "planned": {"train": 1}, "measured": {"train": 1}, "tokens_per_second": "fast"}',
]


def test_damaged_lines_are_skipped(tmp_path):
    path = tmp_path / "r.jsonl"
    good = Receipts(path=path)
    good.add(receipt(0.01))
    with path.open("a") as file:
        file.write("\n".join(DAMAGE))  # and no newline at the end, as after a crash
    good.add(receipt(0.02))
    with path.open("a") as file:
        later = {"from_a_later_version": 1, "device": "y", "kind": "cpu", "model": "m", "planned": {"a": 1}, "measured": {"a": 1}}
        file.write("\n" + json.dumps(later))
    assert [r.device for r in Receipts.load(path)] == [device().name, device().name, "y"]


def test_many_runs_may_end_at_once(tmp_path):
    path = tmp_path / "r.jsonl"
    script = (
        "import sys, time; from pathlib import Path; from qlora.planning.receipts import Receipt, Receipts\n"
        "receipts = Receipts(path=Path(sys.argv[1])); time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "for i in range(200): receipts.add(Receipt('d', 'cpu', 'm' * 3000, {'train': 1}, {'train': i + 1}, key=sys.argv[2]))"
    )
    start = time.time() + 2  # so that they write at the same time
    programs = [subprocess.Popen([sys.executable, "-c", script, str(path), str(i), str(start)]) for i in range(4)]
    assert [program.wait() for program in programs] == [0] * 4
    found = list(Receipts.load(path))
    assert len(found) == 800  # a line may be empty where two met
    assert all([r.measured["train"] for r in found if r.key == str(i)] == list(range(1, 201)) for i in range(4))


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Receipts(path=tmp_path / "file" / "r.jsonl").add(receipt())


def test_other_peoples_receipts_count_for_the_same_card(tmp_path):
    ours = Receipts(path=tmp_path / "ours.jsonl")
    ours.add(receipt(0.0, tokens_per_second=100, flops_per_token=1e9))
    theirs = [receipt(0.1, key=str(number), tokens_per_second=900, flops_per_token=1e9) for number in range(6)]
    assert ours.adopt([*theirs, theirs[0]], "theirs.jsonl") == 6
    assert ours.adopt(theirs, "again.jsonl") == ours.adopt(list(ours), "ours.jsonl") == 0
    for found in (ours, Receipts.load(ours.path)):
        assert [r.origin for r in found] == ["theirs.jsonl"] * 6 + [""]  # our own are the latest
        assert found.margin(device()).share == pytest.approx(0.1, abs=1e-6)
    assert Receipts(theirs).margin(device(name="another")).share == 0.02
    with pytest.raises(OutputError, match="cannot be written"):
        Receipts(path=ours.path / "r.jsonl").adopt(theirs, "theirs.jsonl")


# --- speed and context ----------------------------------------------------------------------------------------------------


def test_speed_comes_from_the_same_model_if_it_can():
    runs = [receipt(tokens_per_second=s, flops_per_token=1e9) for s in (90, 100, 110)]
    other = receipt(model="n", tokens_per_second=500, flops_per_token=1e9)
    assert Receipts().tokens_per_second(device(), "m", 1e9) is None
    assert Receipts([*runs, other]).tokens_per_second(device(), "m", 1e9)[0] == 100
    speed, basis = Receipts(runs).tokens_per_second(device(), "twice as large", 2e9)
    assert speed == 50 and "other models" in basis
    assert Receipts(runs).tokens_per_second(device(name="another"), "m", 1e9) is None


def test_the_context_is_the_most_that_was_seen():
    runs = [receipt(context_bytes=b) for b in (300, 200, None)]
    assert Receipts(runs).context_bytes(device()) == 300 and Receipts([receipt()]).context_bytes(device()) is None
    assert Receipts([replace(runs[0], device="another")]).context_bytes(device()) is None
