#!/usr/bin/env python3
"""Where the time of a training step goes on this machine's CPU, by kind of work, for one contender of scripts/compare.

    python scripts/profile_step.py                                          Qwen3-0.6B as this project trains it, 2 x 256 tokens
    python scripts/profile_step.py plain-logits --model HuggingFaceTB/SmolLM2-135M
    python scripts/profile_step.py qlora-fused --ops 30                     the single operators as well

Two steps warm up, and one is looked at with torch's profiler. Every operator counts for the time in itself, so the shares add up;
what is left is Python, autograd and the libraries around the operators. The work is that of scripts/compare: random weights, the
same tokens. Products with the adapters' halves are "narrow": one side has at most 64 rows or columns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from comparing.contenders import CONTENDERS
from comparing.work import Work, write_work

from qlora import _compat

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::_int_mm")
_NARROW = 64
_WARM_UP_STEPS = 2


def kind_of(name: str, shapes: Sequence[Any], vocabulary: int) -> str:
    """What an operator's own time counts as, by its name and the shapes of its inputs."""
    sizes = [size for shape in shapes if isinstance(shape, (list, tuple)) for size in shape if isinstance(size, int)]
    if name in _PRODUCTS:
        if vocabulary in sizes:
            return "products with the head"
        return "narrow products (adapters)" if sizes and min(sizes) <= _NARROW else "wide products (base)"
    if "dequantize" in name or "gemm_4bit" in name:
        return "dequantising"
    if "attention" in name:
        return "attention"
    if "adam" in name.lower() or "optimizer" in name.lower():
        return "optimizer"
    if name in ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous"):
        return "copies and conversions"
    if name.startswith(("aten::", "bitsandbytes::")):
        return "logits, number by number" if vocabulary in sizes else "number by number (norms, activations, sums)"
    return "Python and autograd"


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables; returns 0."""
    options = _parse(words)
    _compat.prepare_environment()
    _compat.quieten_libraries()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    contender = next(each for each in CONTENDERS if each.name == options.contender)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options.model, options.work or folder, length=options.length, micro_batch=options.rows)
        if not work.checkpoint.exists():
            write_work(work)
        profiler, seconds, vocabulary = _profile(contender, work)
    _print_kinds(profiler, seconds, vocabulary, options, torch.get_num_threads())
    if options.ops:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=options.ops, max_name_column_width=48))
    return 0


def _profile(contender: Any, work: Work) -> tuple[Any, float, int]:
    """torch's profile of a step, its seconds, and the size of the vocabulary."""
    from comparing.worker import make_trainer
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    _compat.silence_profiler()
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    found: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == _WARM_UP_STEPS:
                profiler.__enter__()
                found["began"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == _WARM_UP_STEPS + 1:
                found["seconds"] = time.perf_counter() - found["began"]
                profiler.__exit__(None, None, None)

    trainer = make_trainer(contender, work, _WARM_UP_STEPS + 1)
    trainer.add_callback(Watch())
    trainer.train()
    return profiler, found["seconds"], trainer.model.config.vocab_size


def _print_kinds(profiler: Any, seconds: float, vocabulary: int, options: argparse.Namespace, threads: int) -> None:
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.key_averages(group_by_input_shape=True):
        kind = kind_of(event.key, event.input_shapes, vocabulary)
        spent[kind] += event.self_cpu_time_total / 1e6
        calls[kind] += event.count
    spent["Python and autograd"] += max(0.0, seconds - sum(spent.values()))
    print(f"{options.contender}: {options.model}, {options.rows} x {options.length} tokens, {threads} threads, {seconds:.2f} s a "
          f"step, {options.rows * options.length / seconds:.0f} tokens/s with the profiler on\n")
    print("| kind of work | seconds | share | calls |\n| --- | ---: | ---: | ---: |")
    for kind, value in sorted(spent.items(), key=lambda pair: -pair[1]):
        print(f"| {kind} | {value:.3f} | {100 * value / seconds:.1f} % | {calls[kind]} |")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/profile_step.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in CONTENDERS if each.alternates]
    parser.add_argument("contender", nargs="?", default="qlora", choices=names, metavar="CONTENDER",
                        help=f"whose step: {', '.join(names)} (default: qlora)")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a model of the catalog or a folder with config.json")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch (default: 2)")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--work", metavar="FOLDER", help="keep the checkpoint there, for the next time")
    parser.add_argument("--ops", type=int, default=0, metavar="N", help="also the N operators that take longest")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
