"""Mixed precision on meta does with types and copies what torch's autocast does on a device that has it."""

import pytest
import torch
from torch.nn import functional as F

from qlora.planning.autocast import AutocastOnMeta
from qlora.planning.trace import Recorder


def forward(device, x, weight, norm):
    """A product with a trained fp32 weight, twice; functions that stay in fp32; one that does not care."""
    first = F.linear(x, weight)
    second = torch.matmul(first, F.linear(x, weight).transpose(-1, -2))
    return [first, second, torch.softmax(second, -1), second.pow(2).sum(), F.layer_norm(first, (8,), norm), first * 2, x + first]


def tensors(device):
    return torch.zeros(4, 8, device=device, dtype=torch.bfloat16), torch.nn.Parameter(torch.zeros(8, 8, device=device)), torch.ones(8, device=device)


def test_types_are_those_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        real = [value.dtype for value in forward("cpu", *tensors("cpu"))]
    with AutocastOnMeta(torch.bfloat16):
        found = [value.dtype for value in forward("meta", *tensors("meta"))]
    assert found[:2] == real[:2] == [torch.bfloat16] * 2
    assert found[2] == torch.float32  # CUDA's list: softmax, pow, sum and norms are fp32 there, whatever the CPU does
    assert found[3:5] == [torch.float32] * 2
    assert found[5:] == real[5:]


@pytest.mark.parametrize("times", [1, 3])
def test_a_trained_weight_is_converted_once(times):
    x, weight, norm = tensors("meta")
    recorder = Recorder("meta")
    with recorder, AutocastOnMeta(torch.bfloat16):
        kept = [F.linear(x, weight) for _ in range(times)]
    assert len(kept) == times
    assert sum(event.op == "aten._to_copy.default" and event.size_bytes == 8 * 8 * 2 for event in recorder.events) == 1
