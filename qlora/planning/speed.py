"""An estimate of tokens per second, and what it rests on: earlier runs, else arithmetic on published speeds.

Where layers are streamed, it is the speed of the same step with all layers on the device times what `roofline` leaves of it.

FLOPs count a multiplication and an addition as two, as everybody does.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.architecture import Architecture, lora_parameters, select_targets
from qlora.catalog.cards import find_card, slowest_of_size
from qlora.errors import HardwareError, ModelError
from qlora.hardware import Device
from qlora.planning.receipts import Receipts
from qlora.planning.roofline import Link, StreamedSpeed, Streaming, link_of, streamed_speed
from qlora.units import MIB

# Share of a card's peak that whole training steps reach, with their FLOPs counted as below, and where:
# fsdp_qlora, benchmarks_03_2024.md: Llama-2-7B and Yi-34B on RTX 3090 and 4090, not compiled: 61 to 73 %; 70B on A5000,
# A100 and H100: 35 to 54 %, RTX 6000 Ada 22 %, several cards at once. torchtune's README: Llama-3.1-8B on an RTX 4090,
# compiled: 70 %. fitcheck-llm 0.3.1: 40 steps on a Tesla T4, in fp16 with fp32 adapters. tests/test_speed.py has them all.
_CONSUMER = (0.63, "as published runs on RTX 3090 and 4090 reach")
_SERVER = (0.35, "as published runs on A100 and H100 reach")
_OLD_TENSOR_CORES = (0.13, "as published runs on a Tesla T4 reach")
_NO_TENSOR_CORES = (0.60, "assumed, for no runs on such cards are published")
# Below so many FLOP per byte of bandwidth there are no tensor cores; above, they run at the full rate of server cards,
# which memory and power do not follow.
_FEW_FLOP_PER_BYTE, _MANY_FLOP_PER_BYTE = 40, 180

# A weight is read in 4 bits with its scales (0.516 bytes) and written in 16, each time it is used.
_DEQUANTISED_BYTES_PER_WEIGHT = 2.516
# Starting the kernels of one layer once, whatever their size: SmolLM2-135M on a Tesla T4 took 0.36 s for a step of 30
# layers, three passes each (fitcheck-llm 0.3.1).
_SECONDS_PER_LAYER_AND_PASS = 0.004

# Of what a plain product of matrices reaches on the CPU. A 90M Llama on one core of an EPYC reached 0.53 in bf16 and 0.73 in
# fp32 with checkpointing.
_CPU_SHARE = 0.5


@dataclass(frozen=True)
class Speed:
    """Tokens per second of training, None where nothing is known; `basis` is one line that says what it rests on.

    `streamed` is how streaming was reckoned; None where nothing is streamed, or where a run was measured that streamed alike.
    """

    tokens_per_second: float | None
    basis: str
    streamed: StreamedSpeed | None = None


def estimate_speed(
    architecture: Architecture, settings: Mapping[str, Any], device: Device, receipts: Receipts | None = None, *,
    link: Link | None = None, disk_gb_s: float | None = None,
) -> Speed:
    """How fast a run will be, evaluations and saving left out.

    Args:
        settings: decided values by dotted name, as in `Plan.settings`. Layers are streamed where "memory.streamed_layers" is
            above 0: from "memory.stream_from", with micro-batch x accumulation x length tokens a visit.
        receipts: runs on this device win over any table. Runs that streamed count for runs that stream about alike, the others
            for what a streamed run would reach with all layers on the device.
        link: to host memory, where it is not the one that the card's table has.
        disk_gb_s: of the disk that layers are streamed from, in GB/s; None takes that of an NVMe drive, and says so.
    """
    if not device.present and device.kind == "cuda" and device.tflops is None:
        return _for_the_slowest(architecture, settings, device)
    flops = flops_per_token(architecture, settings)
    streaming = Streaming.of(settings)
    measured = receipts.tokens_per_second(device, architecture.name, flops, streaming) if receipts is not None else None
    if measured is not None:
        return Speed(*measured)
    if streaming is None:
        return _arithmetic(architecture, settings, device, flops)
    beside = receipts.tokens_per_second(device, architecture.name, flops) if receipts is not None else None
    resident = Speed(*beside) if beside is not None else _arithmetic(architecture, settings, device, flops)
    return _streamed(architecture, settings, streaming, resident, link or link_of(device), disk_gb_s)


def flops_per_token(architecture: Architecture, settings: Mapping[str, Any]) -> float:
    """FLOPs of one training step per token of its rows.

    Frozen weights: 2 each forward, 2 for the gradient of the input, 2 again where checkpointing recomputes; the head always
    has 6, because its logits are computed twice (TRL's chunked loss). Adapters also need 2 for their own gradient.
    Attention of a causal model: 2 x length x width a layer forward, 2.5 times that backward (FlashAttention,
    https://arxiv.org/abs/2205.14135: the scores are computed again).
    """
    return sum(_flops(architecture, settings))


# --- details ----------------------------------------------------------------------------------------------------------


def _for_the_slowest(architecture: Architecture, settings: Mapping[str, Any], device: Device) -> Speed:
    """Of a card of which only the size is known: the slowest that is sold with it."""
    card = slowest_of_size(device.memory_bytes)
    if card is None:
        return Speed(None, f"{device.name} is not in the table of cards")
    named = replace(device, name=card.name, tflops=card.tflops, bandwidth=card.bandwidth, capability=card.capability)
    found = estimate_speed(architecture, settings, named)
    return replace(found, basis=f"the slowest card of this size being the {card.name}: {found.basis}")


def _arithmetic(architecture: Architecture, settings: Mapping[str, Any], device: Device, flops: float) -> Speed:
    """The speed with all layers on the device, without any run to go by."""
    if architecture.unquantised_expert_parameters:
        return Speed(None, "no runs of mixture-of-experts models are published that this could rest on")
    if device.kind == "cpu":
        return _cpu_speed(flops, settings.get("model.dtype", "bf16"))
    device_tflops, bandwidth = device.tflops, device.bandwidth
    if device_tflops is None or bandwidth is None:
        try:
            card = find_card(device.name, memory_mib=device.memory_bytes / MIB)
        except HardwareError:
            return Speed(None, f"{device.name} is not in the table of cards, and no run on it has been recorded")
        device_tflops, bandwidth = card.tflops, card.bandwidth
    if settings.get("model.dtype") == "fp32":
        return Speed(None, "training in fp32 is for comparisons; nobody publishes its speed")
    share, where = _share(device, device_tflops, bandwidth)
    tokens = settings["train.micro_batch"] * settings["data.max_length"]
    passes = _passes(settings)
    # Once a visit means twice a step.
    times = 2 / settings.get("train.accumulation", 1) if settings.get("memory.dequantise_once") else passes
    dequantising = times * architecture.quantised_parameters * _DEQUANTISED_BYTES_PER_WEIGHT / (bandwidth * 1e9)
    seconds = max(
        tokens * flops / (device_tflops * 1e12 * share) + dequantising,
        architecture.num_layers * passes * _SECONDS_PER_LAYER_AND_PASS,
    )
    return Speed(tokens / seconds, f"{100 * share:.0f} % of the card's {device_tflops:g} TFLOP/s, {where}")


def _streamed(
    architecture: Architecture, settings: Mapping[str, Any], streaming: Streaming, resident: Speed, link: Link,
    disk_gb_s: float | None,
) -> Speed:
    """What streaming leaves of the speed that the same step would have with all layers on the device."""
    if resident.tokens_per_second is None:
        return resident
    assert streaming.tokens_per_visit is not None, "settings of a plan have rows at once and their length"
    forward, backward, head = _flops(architecture, settings)
    flops = forward + backward + head
    streamed_layers = min(streaming.streamed_layers, architecture.num_layers)
    layers_bytes = architecture.quantised_bytes + 2 * sum(weights for _, weights in architecture.kept_linear)
    found = streamed_speed(
        resident_tokens_per_second=resident.tokens_per_second, forward_share=forward / flops, backward_share=backward / flops,
        num_layers=architecture.num_layers, streamed_layers=streamed_layers,
        streamed_bytes=layers_bytes * streamed_layers / architecture.num_layers, tokens_per_visit=streaming.tokens_per_visit,
        link=link, source=streaming.source, disk_gb_s=disk_gb_s,
    )
    return Speed(found.tokens_per_second, f"{found.basis}; that speed: {resident.basis}", found)


def _flops(architecture: Architecture, settings: Mapping[str, Any]) -> tuple[float, float, float]:
    """FLOPs per token of the layers' forward pass, of their backward pass with what is computed again in it, and of the head."""
    passes = _passes(settings)
    projections = (*architecture.projections, *architecture.others)
    body = sum(p.in_features * p.out_features * p.count for p in projections)
    head = architecture.hidden_size * architecture.vocab_size if architecture.head_name else 0
    try:
        targets = select_targets(architecture, settings.get("lora.targets", "all"))
        adapters = lora_parameters(targets, settings.get("lora.r", 16))
    except ModelError:
        adapters = 0  # a model without projections that are known by name is refused elsewhere
    attention_out = [
        p for p in architecture.projections if p.kind == "attention" and p.out_features == architecture.hidden_size
    ]
    width = max((p.in_features for p in attention_out), default=architecture.hidden_size)
    attention = architecture.num_layers * 2 * settings["data.max_length"] * width
    forward = 2 * (body + adapters) + attention
    backward = 2 * (passes - 1) * body + 2 * passes * adapters + attention * (passes - 2 + 2.5)
    return forward, backward, 6 * head


def _passes(settings: Mapping[str, Any]) -> int:
    """How often a layer's weights are used in a step: forward, backward, and once more with checkpointing or where it streams."""
    return 3 if settings.get("memory.checkpointing") or Streaming.of(settings) is not None else 2


def _share(device: Device, tflops: float, bandwidth: float) -> tuple[float, str]:
    flop_per_byte = tflops * 1000 / bandwidth
    if flop_per_byte < _FEW_FLOP_PER_BYTE:
        return _NO_TENSOR_CORES
    if (device.capability or (8, 0)) < (8, 0):
        return _OLD_TENSOR_CORES
    return _SERVER if flop_per_byte > _MANY_FLOP_PER_BYTE else _CONSUMER


def _cpu_speed(flops: float, dtype: str) -> Speed:
    if "torch" not in sys.modules:
        return Speed(None, "no run on this CPU has been recorded")
    reached = _product_flops_per_second(dtype)
    basis = f"{100 * _CPU_SHARE:.0f} % of the {reached / 1e12:.2g} TFLOP/s that a product of {dtype} matrices reaches here"
    return Speed(_CPU_SHARE * reached / flops, basis)


@functools.cache
def _product_flops_per_second(dtype: str) -> float:
    """The best of some products that take 0.2 s together, on the threads that torch uses now."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    a, b = torch.ones(512, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
    best, end = float("inf"), time.perf_counter() + 0.2
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / best
