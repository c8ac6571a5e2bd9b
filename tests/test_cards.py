"""The table of cards: what people and drivers write is understood, and the numbers agree with what makers publish."""

import json
import re
import subprocess
import sys

import pytest

from qlora.catalog.cards import cards, find_card
from qlora.errors import HardwareError
from qlora.hardware import cuda_bytes, device_from_card
from qlora.units import GIB, MIB


def test_every_card_is_found_by_its_own_name_and_by_the_drivers():
    assert len(cards()) > 100
    for card in cards():
        assert find_card(card.name) == card
        assert find_card(f"NVIDIA {card.name.replace('Laptop', 'Laptop GPU')}") == card
        assert find_card(card.name.lower().removeprefix("geforce ")) == card


@pytest.mark.parametrize("text, name", [
    ("4060", "GeForce RTX 4060"), ("RTX 4060 laptop", "GeForce RTX 4060 Laptop"), ("rtx4060ti 16gb", "GeForce RTX 4060 Ti 16GB"),
    ("4070tisuper", "GeForce RTX 4070 Ti SUPER"), ("2080s", "GeForce RTX 2080 SUPER"), ("4050", "GeForce RTX 4050 Laptop"),
    ("3060m", "GeForce RTX 3060 Laptop"), ("GTX 1650 with Max-Q Design", "GeForce GTX 1650 Laptop"),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"), ("NVIDIA A100-SXM4-80GB", "A100 SXM4 80GB"), ("Tesla T4", "T4"), ("t4 16gb", "T4"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM5 80GB"), ("a10", "A10"), ("a10g", "A10G"), ("L40s", "L40S"), ("A6000", "RTX A6000"),
    ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("Tesla V100-SXM2-32GB", "V100 32GB"), ("rtx pro 6000", "RTX PRO 6000 Blackwell"),
])
def test_forgiving_names(text, name):
    assert find_card(text).name == name


def test_a_size_that_is_left_open_is_said_and_can_be_told():
    card = find_card("NVIDIA GeForce RTX 3060")
    assert card.name == "GeForce RTX 3060 12GB" and "RTX 3060 8GB" in card.note
    assert find_card("3060 8gb").note == "" and find_card("3060 8gb").memory_mib == 8192
    assert find_card("NVIDIA GeForce RTX 3060", memory_mib=7900).name == "GeForce RTX 3060 8GB"
    assert find_card("NVIDIA GeForce RTX 4060 Ti", memory_mib=15_900).memory_mib > 16_000
    assert find_card("4090").note == ""


@pytest.mark.parametrize("text, problem, fix", [
    ("RTX 9999", "not in the table", "RTX 5090"), ("rtx 3o60", "not in the table", "RTX 3060"), ("Radeon", "not in the table", "--vram"),
    ("", "not in the table", "--vram"), ("rtx", "not in the table", "--vram"),
    ("RTX 6000", "RTX 6000 Ada or RTX PRO 6000", "Write one"), ("ti", "or others", "Write one"),
    ("RTX 4090 8GB", "names 8 GB, but GeForce RTX 4090 has 24 GB", "Leave the size out"), ("3080 16gb", "10 GB or 12 GB", "size"),
])
def test_what_is_not_understood_is_said(text, problem, fix):
    with pytest.raises(HardwareError) as error:
        find_card(text)
    assert problem in error.value.problem and fix in error.value.fix


# Dense FP16 tensor TFLOP/s with FP32 accumulation, and GB/s, as NVIDIA's whitepapers and data sheets print them.
@pytest.mark.parametrize("name, tflops, bandwidth", [
    ("RTX 2080 Ti", 53.8, 616), ("Quadro RTX 6000", 130.5, 672), ("RTX 3070", 40.6, 448), ("RTX 3080 10GB", 59.5, 760),
    ("RTX 3090", 71, 936), ("RTX A6000", 154.8, 768), ("RTX 4080", 97.5, 717), ("RTX 4090", 165.2, 1008),
    ("RTX 6000 Ada", 364.2, 960), ("RTX 5070", 61.7, 672), ("RTX 5080", 112.6, 960), ("RTX 5090", 209.5, 1792),
    ("T4", 65, 320), ("A10", 125, 600), ("L4", 121, 300), ("A100 SXM4 80GB", 312, 2039), ("H100 PCIe", 756, 2039),
])
def test_speeds_are_those_of_the_whitepapers(name, tflops, bandwidth):
    card = find_card(name)
    assert card.tflops == pytest.approx(tflops, rel=0.01) and card.bandwidth == pytest.approx(bandwidth, rel=0.01)


def test_the_table_is_sound(root):
    document = json.loads((root / "qlora/catalog/cards.json").read_text(encoding="utf-8"))
    assert {card.family for card in cards()} <= set(document["sources"])
    for card in cards():
        assert card.has_bf16 == (card.capability[0] >= 8)
        assert card.capability in [(6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]
        assert 3072 <= card.memory_mib <= 150_000 and card.pcie[0] in (3, 4, 5) and card.pcie[1] in (8, 16)
        assert card.laptop == ("Laptop" in card.name)
        named = re.search(r"(\d+)GB", card.name)
        if named:
            assert 0 <= 1 - card.memory_mib / (int(named[1]) * 1024) < 0.07


# GiB that CUDA had in messages of torch ("GPU 0 has a total capacity of ..."), each from the GitHub issue named.
SEEN = [
    ("T4", 14.56, "facebookresearch/tribev2#28"), ("RTX 4090", 23.52, "pytorch/torchchat#1341"),
    ("RTX 5090", 31.36, "TrajectoryCrafter/TrajectoryCrafter#20"), ("RTX A4000", 15.61, "DengKaiCQ/VGGT-Long#6"),
    ("RTX A500 Laptop", 3.68, "Robbyant/lingbot-map#73"), ("RTX 6000 Ada", 44.43, "DINGYANB/MTVCrafter#21"),
    ("L40", 44.40, "QwenLM/Qwen3-VL#2097"), ("A10", 21.99, "zai-org/CogVLM#236"), ("A100 SXM4 80GB", 79.25, "HiDream-ai/VAREdit#6"),
]


@pytest.mark.parametrize("name, gib, issue", SEEN)
def test_what_cuda_sees_of_a_card(name, gib, issue):
    assert device_from_card(find_card(name)).memory_bytes == pytest.approx(gib * GIB, rel=0.004), issue


def test_a_larger_card_never_has_less_for_cuda():
    sizes = [cuda_bytes(size * 64 * MIB) for size in range(1, 2000)]
    assert sizes == sorted(sizes) and all(size > 0 for size in sizes)


def test_a_card_that_is_not_here():
    whole, slice_ = device_from_card(find_card("4090")), device_from_card(find_card("4090"), 8 * GIB)
    any_card = device_from_card(None, 8 * GIB)
    assert whole.kind == "cuda" and whole.capability == (8, 9) and whole.has_bf16 and not whole.present and whole.tflops
    assert slice_.memory_bytes == 8 * GIB and slice_.name == whole.name
    assert any_card.name == "a card of 8 GB" and 7.5 * GIB < any_card.memory_bytes < 7.8 * GIB and any_card.has_bf16
    assert not device_from_card(find_card("2080 ti")).has_bf16
    with pytest.raises(HardwareError, match="24.00 GiB are asked for"):
        device_from_card(find_card("4060"), 24 * GIB)


def test_the_table_needs_no_torch():
    script = "import sys; from qlora.catalog.cards import find_card; find_card('4060'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "False"
