"""Streamed speed: what is published of streaming, and what must hold whatever the numbers are."""

import json
import math
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from qlora.architecture import describe, find_config
from qlora.catalog.cards import cards, find_card
from qlora.hardware import Device, device_from_card, find_device
from qlora.planning.receipts import Receipt, Receipts
from qlora.planning.roofline import Link, Streaming, link_of, link_rate, pass_seconds, streamed_speed
from qlora.planning.speed import estimate_speed, flops_per_token
from qlora.units import GIB, spread

SETTINGS = {
    "train.micro_batch": 1, "train.accumulation": 4, "data.max_length": 1024, "lora.r": 16, "lora.targets": "all",
    "model.dtype": "bf16", "memory.checkpointing": True,
}
STEP = dict(
    resident_tokens_per_second=100.0, forward_share=0.3, backward_share=0.65, num_layers=40, streamed_layers=40,
    streamed_bytes=40e9, tokens_per_visit=400, link=Link(20.0, "20 GB/s"),
)


def step(**changes):
    return streamed_speed(**{**STEP, **changes})


def settings(streamed=80, resident=0, **changes):
    moved = {"memory.streamed_layers": streamed, "memory.resident_layers": resident, "memory.stream_from": "ram"}
    return {**SETTINGS, **moved, **{key.replace("__", "."): value for key, value in changes.items()}}


def card(name):
    return device_from_card(find_card(name))


@pytest.fixture(scope="module")
def llama_70b():
    return describe(find_config("meta-llama/Llama-3.1-70B"))


# --- against what is published -------------------------------------------------------------------------------------------

# bitsandbytes, branch QLORA-2, docs/streaming_analysis/README.md: 20 layers of 470 MB over 11 GB/s, two slots, forward passes on
# an RTX 4090: tokens, milliseconds to compute a layer, by how much loads lengthened the pass. One layer was there already.
EXPERIMENT = [(512, 6.4, 5.36), (1024, 12.6, 2.24), (2048, 24.5, 0.67), (4096, 50.0, 0.002), (8192, 100.0, 0.004)]


@pytest.mark.parametrize("tokens, compute, published", EXPERIMENT)
def test_a_pass_waits_as_long_as_in_a_published_experiment(tokens, compute, published):
    seconds = pass_seconds(20, range(20), compute, 470 / 11, num_slots=2, num_loaded=1)
    assert seconds / (20 * compute) == pytest.approx(1 + published, rel=0.03)


def test_loads_hide_between_the_tokens_between_which_they_do_in_that_experiment():
    for tokens, hidden in ((2048, False), (4096, True)):
        compute = tokens * 0.050 / 4096  # seconds, as measured there
        seconds = pass_seconds(20, range(20), compute, 470e6 / (link_rate(3, 16).gigabytes_per_second * 1e9), 2, 2)
        assert (seconds <= 1.01 * 20 * compute) == hidden


# fsdp_qlora, benchmarks_03_2024.md, the base in host memory: 1,024 rows of 2,048 tokens on two cards, per card. The RTX 3090s
# were held to 280 W; the A5000s had activations in host memory too, and the estimate is nearly half again too high for them.
PUBLISHED = [
    ("70b", "4090", 2, 4399, 0.05), ("70b", "3090", 2, 11795, 0.20), ("34b", "4090", 4, 2061, 0.10),
    ("34b", "3090", 4, 4830, 0.10), ("7b", "4090", 12, 464, 0.10), ("70b", "A5000", 2, 9688, 0.50),
]
SHAPES = {
    "7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=32),
    "34b": dict(vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
                num_key_value_heads=8),
    "70b": dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                num_key_value_heads=8),
}


@pytest.mark.parametrize("model, name, rows, seconds, within", PUBLISHED)
def test_near_published_runs_with_the_base_in_host_memory(model, name, rows, seconds, within):
    architecture = describe(LlamaConfig(**SHAPES[model]))
    chosen = settings(architecture.num_layers, train__micro_batch=rows, train__accumulation=1, data__max_length=2048)
    speed = estimate_speed(architecture, chosen, card(name))
    assert speed.tokens_per_second == pytest.approx(1024 * 2048 / seconds / 2, rel=within)
    assert speed.streamed.bound == "compute"  # they found offloading to cost nothing: 2,061 s with it, 2,072 s without


# --- what must hold anyway -----------------------------------------------------------------------------------------------


def test_a_pass_is_never_shorter_than_its_arithmetic_or_its_loads():
    cases = [(40, 2, 1.0, 0.5), (40, 2, 1.0, 3.0), (13, 2, 1.0, 2.0), (13, 3, 0.1, 2.0), (2, 4, 1.0, 9.0)]
    for streamed, slots, compute, load in cases:
        seconds = pass_seconds(40, spread(40, streamed), compute, load, slots, slots)
        loads = max(0, streamed - slots) * load
        assert max(40 * compute, loads) - 1e-9 <= seconds <= 40 * compute + loads + 1e-9
    assert pass_seconds(40, range(40), 1.0, 0.5, 2, 2) == pytest.approx(40)  # hidden altogether


def test_layers_that_slots_keep_are_not_loaded():
    """With next to no arithmetic a pass takes its loads: all streamed layers but those that are in their slots."""
    for slots in (2, 3, 8):
        assert pass_seconds(40, range(40), 1e-9, 1.0, slots, slots) == pytest.approx(40 - slots, abs=1e-6)


def test_residents_between_streamed_layers_give_slack_and_in_front_of_them_do_not():
    apart = pass_seconds(40, spread(40, 20), 1.0, 1.9, 2, 2)
    together = pass_seconds(40, range(20, 40), 1.0, 1.9, 2, 2)
    assert apart == pytest.approx(40) and together > 50


def test_with_enough_tokens_nothing_is_lost_and_with_few_the_loads_are_all():
    many, few = step(tokens_per_visit=100_000), step(tokens_per_visit=1)
    assert many.share == pytest.approx(1) and many.bound == "compute" and many.tokens_per_second == pytest.approx(100)
    assert few.bound == "link" and few.tokens_per_second == pytest.approx(1 / (2 * 38 * 0.05), rel=0.02)


def test_the_knee_is_where_the_forward_pass_takes_as_long_as_its_loads():
    knee = step().hidden_from_tokens
    assert knee == pytest.approx(100 * 40 * 0.05 / 0.3, rel=0.05)  # tokens/s x seconds of all loads / forward's share
    assert step(tokens_per_visit=knee).share >= 0.99 > step(tokens_per_visit=knee - 1).share
    assert step(streamed_layers=20, streamed_bytes=20e9).hidden_from_tokens == pytest.approx(knee / 2, rel=0.15)


def test_more_of_anything_good_is_never_slower():
    def ladder(name, values):
        found = [step(**{"tokens_per_visit": 300, name: value}) for value in values]
        assert [f.share for f in found] == sorted(f.share for f in found), name
        assert found[0].share < found[-1].share <= 1, name

    ladder("tokens_per_visit", range(20, 1500, 40))
    ladder("num_slots", range(2, 40))
    ladder("link", [Link(rate, "") for rate in (1.0, 6.2, 12.0, 24.0, 56.0)])
    shares = [step(tokens_per_visit=300, streamed_layers=n, streamed_bytes=n * 1e9).share for n in range(40, 0, -1)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_a_disk_counts_where_it_is_slower_than_the_link():
    slow, fast = step(source="disk", disk_gb_s=0.5), step(source="disk", disk_gb_s=100.0)
    assert slow.bound == "disk" and slow.share < step().share and "0.5 GB/s from disk" in slow.basis
    assert fast.share == step().share and fast.bound == step().bound == "link"
    unknown = step(source="disk")
    assert unknown.share == step(source="disk", disk_gb_s=3.5).share and "assumed" in unknown.basis
    assert "assumed" not in slow.basis + step().basis


def test_every_card_has_a_link_and_more_of_it_is_faster():
    for each in cards():
        link = link_of(device_from_card(each))
        generation, lanes = each.pcie
        raw = 0.985 * 2 ** (generation - 3) * lanes  # GB/s, 128b/130b coding
        assert 0.4 * raw < link.gigabytes_per_second < 0.9 * raw and f"PCIe {generation}.0 x{lanes}" in link.basis
    ladders = [[(1, 8), (2, 8), (3, 8), (3, 16), (4, 16), (5, 16)], [(3, 4), (3, 8), (4, 8), (5, 8)]]
    for slower, faster in [pair for ladder in ladders for pair in zip(ladder, ladder[1:])]:
        assert link_rate(*slower).gigabytes_per_second < link_rate(*faster).gigabytes_per_second


def test_what_no_table_has_counts_as_slow_and_says_so():
    strange = Device("cuda", "Some New Card", 8 * GIB, 8 * GIB, GIB, GIB, 2, True, (13, 0))
    link = link_of(strange)
    assert link.gigabytes_per_second == min(link_of(device_from_card(each)).gigabytes_per_second for each in cards())
    assert "assumed" in link.basis and "Some New Card" in link.basis


def test_on_a_cpu_only_a_disk_can_be_waited_for():
    link = link_of(find_device("cpu"))
    assert math.isinf(link.gigabytes_per_second)
    ram = step(link=link, tokens_per_visit=1)
    assert ram.share == 1 and ram.hidden_from_tokens == 0 and ram.bound == "compute" and "inf" not in ram.basis
    assert step(link=link, source="disk", tokens_per_visit=10).bound == "disk"


# --- as part of a plan ---------------------------------------------------------------------------------------------------


def test_settings_without_streaming_are_estimated_as_ever(llama_70b):
    plain = estimate_speed(llama_70b, SETTINGS, card("3090"))
    assert plain.streamed is None
    assert estimate_speed(llama_70b, settings(0, 80), card("3090")) == plain


def test_a_streamed_plan_says_what_is_left_and_why(llama_70b):
    plain = estimate_speed(llama_70b, SETTINGS, card("4090"))
    hidden = estimate_speed(llama_70b, settings(), card("4090"))
    assert hidden.tokens_per_second == pytest.approx(plain.tokens_per_second)
    waiting = estimate_speed(llama_70b, settings(train__accumulation=1, memory__stream_from="disk"), card("4090"))
    assert waiting.tokens_per_second == pytest.approx(plain.tokens_per_second * waiting.streamed.share, rel=1e-6)
    assert waiting.streamed.bound == "disk" and waiting.streamed.share < 0.5
    said = [(hidden, ["100 %", "4,096", "TFLOP/s", "24 GB/s"]), (waiting, ["bound by the disk", "assumed", "1,024"])]
    for speed, words in said:
        assert all(word in speed.basis for word in [*words, f"{speed.streamed.hidden_from_tokens:,}", "80 of 80"])
        assert "\n" not in speed.basis
    half = estimate_speed(llama_70b, settings(40, 40, train__accumulation=1, memory__stream_from="disk"), card("4090"))
    assert waiting.tokens_per_second < half.tokens_per_second < plain.tokens_per_second
    assert half.streamed.hidden_from_tokens == pytest.approx(waiting.streamed.hidden_from_tokens / 2, rel=0.1)
    nvme = estimate_speed(llama_70b, settings(memory__stream_from="disk"), card("4090"), disk_gb_s=12.0)
    assert nvme.streamed.hidden_from_tokens < waiting.streamed.hidden_from_tokens / 3


def test_streaming_recomputes_whatever_the_settings_say(llama_70b):
    kept = settings(memory__checkpointing=False)
    assert flops_per_token(llama_70b, kept) == flops_per_token(llama_70b, settings())
    assert flops_per_token(llama_70b, {**kept, "memory.streamed_layers": 0}) < flops_per_token(llama_70b, settings())


def test_weights_that_are_dequantised_once_a_visit_save_time(llama_70b):
    def speed(**changes):
        return estimate_speed(llama_70b, settings(data__max_length=512, **changes), card("4090")).tokens_per_second

    each, once = speed(), speed(memory__dequantise_once=True)
    assert each < once < speed(memory__dequantise_once=True, train__accumulation=16)
    assert each == speed(memory__dequantise_once=False)
    weights = 2.516 * llama_70b.quantised_parameters / (card("4090").bandwidth * 1e9)
    assert 4 * 512 / each - 4 * 512 / once == pytest.approx((4 * 3 - 2) * weights, rel=0.01)  # of a step, nearly all of it hidden


def test_slots_are_as_many_as_the_engine_has():
    from qlora.engine import stream
    from qlora.planning import roofline

    assert roofline.NUM_SLOTS == stream.NUM_SLOTS


def test_what_is_not_known_stays_unknown_when_streamed(llama_70b):
    strange = Device("cuda", "Some New Card", 8 * GIB, 8 * GIB, GIB, GIB, 2, True, (13, 0))
    assert estimate_speed(llama_70b, settings(), strange).tokens_per_second is None


# --- receipts ------------------------------------------------------------------------------------------------------------


def receipt(speed, chosen, architecture):
    return Receipt(
        card("4090").name, "cuda", architecture.name, {}, {}, settings=dict(chosen), tokens_per_second=speed,
        flops_per_token=flops_per_token(architecture, chosen),
    )


def test_a_streamed_run_speaks_only_for_runs_that_stream_alike(llama_70b):
    here, chosen = card("4090"), settings()
    receipts = Receipts([receipt(50.0, chosen, llama_70b)])

    def found(**changes):
        return estimate_speed(llama_70b, {**chosen, **changes}, here, receipts)

    assert found().tokens_per_second == pytest.approx(50) and "streamed alike" in found().basis
    assert found(**{"train.micro_batch": 2, "train.accumulation": 2}).tokens_per_second == pytest.approx(50)
    others = [
        {"memory.streamed_layers": 0, "memory.resident_layers": 80}, {"memory.streamed_layers": 60, "memory.resident_layers": 20},
        {"memory.stream_from": "disk"}, {"train.accumulation": 8}, {"train.accumulation": 1},
    ]
    for changes in others:
        assert "measured" not in found(**changes).basis, changes
    smaller = describe(find_config("meta-llama/Llama-3.1-8B"))
    assert "measured" not in estimate_speed(smaller, settings(32), here, receipts).basis


def test_a_run_with_all_layers_on_the_device_tells_what_streaming_starts_from(llama_70b):
    receipts = Receipts([receipt(100.0, SETTINGS, llama_70b)])
    hidden = estimate_speed(llama_70b, settings(), card("4090"), receipts)
    assert hidden.tokens_per_second == pytest.approx(100, rel=0.01) and "measured" in hidden.basis
    waiting = estimate_speed(llama_70b, settings(train__accumulation=1, memory__stream_from="disk"), card("4090"), receipts)
    assert waiting.tokens_per_second < 60 and waiting.streamed.resident_tokens_per_second == pytest.approx(100)


def test_streamed_receipts_come_back_from_the_file_and_old_ones_do_not_stream(llama_70b, tmp_path):
    path = tmp_path / "receipts.jsonl"
    Receipts(path=path).add(receipt(50.0, settings(), llama_70b))
    old = {"device": "x", "kind": "cuda", "model": "m", "planned": {}, "measured": {}, "settings": {"lora.r": 16}}
    strange = {**old, "settings": {"memory.streamed_layers": "many", "memory.resident_layers": None}}
    unfinished = {**old, "settings": {"memory.streamed_layers": 3, "memory.resident_layers": -1, "train.micro_batch": 1}}
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in (old, strange, unfinished))
    first, *others = Receipts.load(path)
    assert first.streaming == Streaming(0, 80, "ram", 4096) and first.streaming.share == 1
    assert [each.streaming for each in others] == [None, None, Streaming(0, 3, "disk", None)]


# --- documents -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_table_of_the_readme_is_what_the_script_prints(root):
    done = subprocess.run([sys.executable, str(root / "scripts" / "roofline_table.py"), "--check"])
    assert done.returncode == 0, "run python scripts/roofline_table.py --write"


def test_figures_in_the_readme_are_those_of_the_tests(root):
    text = " ".join((root / "qlora" / "engine" / "README.md").read_text(encoding="utf-8").split())
    waits = [100 * (pass_seconds(20, range(20), c, 470 / 11, 2, 1) / (20 * c) - 1) for _, c, _ in EXPERIMENT[:3]]
    assert "says {:.0f}, {:.0f} and {:.0f} %".format(*waits) in text
    said = []
    for model, name, rows, *_ in PUBLISHED:
        architecture = describe(LlamaConfig(**SHAPES[model]))
        chosen = settings(architecture.num_layers, train__micro_batch=rows, train__accumulation=1, data__max_length=2048)
        said.append(f"{estimate_speed(architecture, chosen, card(name)).tokens_per_second:,.0f}")
    sentences = ["238, we say {0}", "89, we say {1}", "509 and 217, we say {2} and {3}", "2,260, we say {4}", "108, we say {5}"]
    missing = [each for each in (sentence.format(*said) for sentence in sentences) if each not in text]
    assert not missing
