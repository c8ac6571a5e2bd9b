#!/usr/bin/env python3
"""What hand-written backward passes save, on this machine's CPU: one Llama-shaped layer in bf16, forward and backward.

    python scripts/bench_fused.py                     a layer with a quarter of Llama-3-8B's widths, 1024 tokens
    python scripts/bench_fused.py --full              its real widths
    python scripts/bench_fused.py --tokens 4096 --tile 512

Prints a Markdown table. "Kept" is what lies in memory between forward and backward pass, "peak" the most that tensors take during
both (torch's profiler), less what is there before. Times are medians of turns taken one after the other, and a layer's weights
are dequantised in each pass, as in training without a schedule.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from qlora import _compat

_compat.prepare_environment()
_compat.quieten_libraries()

import torch
from torch.autograd.graph import saved_tensors_hooks

from qlora.architecture import describe, select_targets
from qlora.engine.fused import install_fused, remove_fused
from qlora.engine.tiled_mlp import install_tiled_mlp
from qlora.hardware import Device
from qlora.model.adapt import add_adapters
from qlora.model.build import build_base
from qlora.precision import Precision
from qlora.training.cpu_memory import TensorMeter

WIDTHS = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def main() -> int:
    """Print the table; returns 0."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = build(1 if arguments.full else 4)
    layer = Layer(model, arguments.tokens)
    ways: dict[str, Callable[[], Any]] = {
        "PEFT": lambda: None,
        "fused": lambda: install_fused(model),
        "tiled": lambda: install_tiled_mlp(model, arguments.tile),
        "fused, tiled": lambda: (install_fused(model), install_tiled_mlp(model, arguments.tile)),
    }
    kept, peaks, seconds = {}, {}, {name: [] for name in ways}
    for name, install in ways.items():
        install()
        kept[name] = layer.kept_bytes()
        peaks[name] = layer.peak_bytes()
        remove_fused(model)
    for _ in range(arguments.repeat):
        for name, install in ways.items():
            install()
            seconds[name].append(layer.seconds())
            remove_fused(model)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    width = model.config.hidden_size
    vector = arguments.tokens * width * 2
    print(f"Hidden width {width}, {arguments.tokens} tokens, tiles of {arguments.tile}, rank 16, {arguments.threads} threads, "
          f"median of {arguments.repeat}; memory in hidden vectors a token\n")
    print("| | kept | of PEFT's | peak | of PEFT's | time | of PEFT's |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name in ways:
        print(f"| {name} | {kept[name] / vector:.2f} | {kept[name] / kept['PEFT']:.3f} "
              f"| {peaks[name] / vector:.1f} | {peaks[name] / peaks['PEFT']:.3f} "
              f"| {medians[name] * 1000:.0f} ms | {medians[name] / medians['PEFT']:.2f} |")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Llama-3-8B's widths; 10 GB and minutes")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=256, help="tokens")
    parser.add_argument("-n", "--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def build(divide: int) -> Any:
    """One layer of a base with adapters, in training, B not zero."""
    from transformers import LlamaConfig

    sizes = {name: size if "heads" in name else size // divide for name, size in WIDTHS.items()}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=256, max_position_embeddings=2**17)
    cpu = Device("cpu", "this CPU", 2**40, 2**40, 2**40, 2**40, 1, True)
    base = build_base("random", config, device=cpu, precision=Precision("bf16", "bf16", False, ""), weights="random")
    _compat.hide_loading_bars()
    model = add_adapters(base, select_targets(describe(config)), r=16, alpha=16, seed=0, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


class Layer:
    """The layer and what a model would give it."""

    def __init__(self, model: Any, tokens: int):
        inner = model.get_base_model().model
        self.layer = inner.layers[0]
        self.x = torch.randn(1, tokens, model.config.hidden_size, dtype=torch.bfloat16)
        self.rotation = inner.rotary_emb(self.x, torch.arange(tokens)[None])
        self.gradient = torch.randn_like(self.x)

    def __call__(self, hook: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        """Forward and backward."""
        self.layer.zero_grad()
        x = self.x.clone().requires_grad_()
        with saved_tensors_hooks(hook, lambda tensor: tensor):
            y = self.layer(x, position_embeddings=self.rotation, attention_mask=None)
        y.backward(self.gradient)

    def kept_bytes(self) -> int:
        """Storages, shared ones once; without parameters and the rotation, which serves all layers."""
        kept: dict[int, torch.Tensor] = {}

        def hook(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        self(hook)
        given = {tensor.untyped_storage()._cdata for tensor in (*self.layer.parameters(), *self.rotation)}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in given)

    def peak_bytes(self) -> int:
        """With gradients in place, which are as large for every way."""
        self()
        meter = TensorMeter()
        with meter.watching(), meter.during("both"):
            self()
        return meter.allocated["both"]

    def seconds(self) -> float:
        """Of one forward and backward pass."""
        began = time.perf_counter()
        self()
        return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
