"""The speed estimate: near what others publish, in the right order between settings, and beaten by a run on this device."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from qlora.architecture import describe, find_config
from qlora.catalog.cards import find_card
from qlora.hardware import Device, device_from_card, find_device
from qlora.planning.receipts import Receipt, Receipts
from qlora.planning.speed import estimate_speed, flops_per_token
from qlora.units import GIB

SETTINGS = {
    "train.micro_batch": 2, "data.max_length": 2048, "lora.r": 16, "lora.targets": "all", "memory.checkpointing": True,
    "model.dtype": "bf16",
}


def settings(**changes):
    return {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}}


@pytest.fixture(scope="module")
def llama_8b():
    return describe(find_config("meta-llama/Llama-3.1-8B"))


@pytest.fixture(scope="module")
def llama_70b():
    return describe(find_config("meta-llama/Llama-3.1-70B"))


@pytest.fixture(scope="module")
def llama_7b():
    return describe(LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    ))


@pytest.fixture(scope="module")
def yi_34b():
    return describe(LlamaConfig(
        vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
        num_key_value_heads=8,
    ))


# Tokens a second and card. torchtune's README; fsdp_qlora, benchmarks_03_2024.md: 1,024 rows of 2,048 tokens on so many cards.
PUBLISHED = [
    ("llama_8b", "4090", 2, 2413, 0.15), ("llama_7b", "4090", 8, 1024 * 2048 / 450 / 2, 0.15),
    ("llama_7b", "3090", 8, 1024 * 2048 / 875 / 2, 0.15), ("yi_34b", "4090", 2, 1024 * 2048 / 2072 / 2, 0.15),
    ("yi_34b", "3090", 2, 1024 * 2048 / 5041 / 2, 0.15), ("llama_70b", "H100 SXM5 80GB", 8, 1024 * 2048 / 667 / 4, 0.6),
    ("llama_70b", "A100 SXM4 40GB", 4, 1024 * 2048 / 672 / 8, 0.6), ("llama_70b", "A5000", 1, 1024 * 2048 / 2613 / 8, 0.6),
    ("llama_70b", "RTX 6000 Ada", 3, 1024 * 2048 / 2904 / 4, 0.6),
]


@pytest.mark.parametrize("model, card, rows, published, within", PUBLISHED)
def test_near_what_others_publish(request, model, card, rows, published, within):
    architecture = request.getfixturevalue(model)
    speed = estimate_speed(architecture, settings(train__micro_batch=rows), device_from_card(find_card(card)))
    assert speed.tokens_per_second == pytest.approx(published, rel=within) and "TFLOP/s" in speed.basis


@pytest.mark.shared
def test_near_what_was_measured_on_a_t4(shared):
    """Rows of up to 1,024 tokens; longer ones lack FlashAttention on this card and are slower than the estimate."""
    rows = json.loads((shared / "facts/t4-measurements.json").read_text(encoding="utf-8"))["rows"]
    num = 0
    for row in rows:
        run, shape = row["run"], row["model_config"]
        if run["quantization"] != "nf4" or run["attn_impl"] != "sdpa" or run["seq_len"] > 1024:
            continue
        architecture = describe(LlamaConfig(
            vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_attention_heads"],
            num_key_value_heads=shape["num_kv_heads"], tie_word_embeddings=shape["tie_word_embeddings"],
        ))
        speed = estimate_speed(architecture, settings(
            train__micro_batch=run["batch_size"], data__max_length=run["seq_len"], lora__r=run["lora_rank"], lora__targets="attention",
        ), device_from_card(find_card("T4")))
        measured = run["batch_size"] * run["seq_len"] / row["measured"]["step_seconds"]
        assert speed.tokens_per_second == pytest.approx(measured, rel=0.15)
        num += 1
    assert num >= 5


def test_flops_are_six_for_each_weight_and_token(llama_8b):
    weights = llama_8b.quantised_parameters + llama_8b.head_parameters
    flops = flops_per_token(llama_8b, settings(data__max_length=1))
    assert flops == pytest.approx(6 * weights, rel=0.05)
    without = flops_per_token(llama_8b, settings(data__max_length=1, memory__checkpointing=False))
    assert without == pytest.approx(flops - 2 * llama_8b.quantised_parameters, rel=0.01)


def test_more_work_takes_longer(llama_8b, llama_70b):
    device = device_from_card(find_card("4060"))

    def speed(architecture=llama_8b, device=device, **changes):
        return estimate_speed(architecture, settings(**changes), device).tokens_per_second

    assert speed() > speed(llama_70b) > 0
    assert speed(memory__checkpointing=False) > speed()
    assert speed(data__max_length=1024) > speed(data__max_length=8192)
    assert speed(train__micro_batch=8) > speed(train__micro_batch=1)  # the weights are made 16-bit less often
    assert speed(lora__targets="qv") > speed(lora__r=64)
    ladder = [speed(device=device_from_card(find_card(name))) for name in ("1650", "3060", "4060", "4070", "3090", "4090", "5090")]
    assert ladder == sorted(ladder)


def test_small_models_wait_for_their_kernels_to_start(llama_8b):
    small = describe(find_config("HuggingFaceTB/SmolLM2-135M"))
    device = device_from_card(find_card("4090"))
    one, two = (estimate_speed(small, settings(train__micro_batch=n, data__max_length=64), device).tokens_per_second for n in (1, 2))
    assert two == pytest.approx(2 * one)


def test_runs_on_this_device_win(llama_8b, llama_70b):
    device = device_from_card(find_card("4060"))
    flops = flops_per_token(llama_8b, settings())
    run = Receipt(device.name, "cuda", llama_8b.name, {"train": 1}, {"train": 1}, tokens_per_second=123.0, flops_per_token=flops)
    speed = estimate_speed(llama_8b, settings(), device, Receipts([run]))
    assert speed.tokens_per_second == pytest.approx(123) and "measured" in speed.basis
    larger = estimate_speed(llama_70b, settings(), device, Receipts([run])).tokens_per_second
    assert larger == pytest.approx(123 * flops / flops_per_token(llama_70b, settings()))
    assert "TFLOP/s" in estimate_speed(llama_8b, settings(), device, Receipts()).basis


def test_what_is_not_known_is_not_made_up(llama_8b):
    described = Device("cuda", "Some New Card", 8 * GIB, 8 * GIB, GIB, GIB, 2, True, (13, 0))
    unknown = estimate_speed(llama_8b, settings(), described)
    assert unknown.tokens_per_second is None and "Some New Card" in unknown.basis
    experts = estimate_speed(describe(find_config("Qwen/Qwen3-30B-A3B")), settings(), device_from_card(find_card("4090")))
    assert experts.tokens_per_second is None and "experts" in experts.basis
    assert estimate_speed(llama_8b, settings(model__dtype="fp32"), device_from_card(find_card("4090"))).tokens_per_second is None


def test_this_machines_card_is_looked_up_by_its_name(llama_8b):
    here = Device("cuda", "NVIDIA GeForce RTX 4060 Ti", 16 * GIB, 16 * GIB, GIB, GIB, 2, True, (8, 9))
    assert estimate_speed(llama_8b, settings(), here) == estimate_speed(llama_8b, settings(), device_from_card(find_card("4060 Ti 16GB")))


def test_on_a_cpu_it_follows_a_product_of_matrices(llama_8b):
    speed = estimate_speed(llama_8b, settings(), find_device("cpu"))
    assert 0.01 < speed.tokens_per_second < 1000 and "bf16 matrices" in speed.basis
    assert estimate_speed(llama_8b, settings(), find_device("cpu")) == speed  # timed once


def test_without_torch_a_cpu_is_not_timed():
    script = (
        "import sys; from qlora.planning import speed\n"
        "print(speed._cpu_speed(1e9, 'bf16').tokens_per_second, 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split() == ["None", "False"]
