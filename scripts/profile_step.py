#!/usr/bin/env python3
"""Where the time of a training step goes on this machine's CPU, by kind of work, for contenders of scripts/compare side by side.

    python scripts/profile_step.py                                          Qwen3-0.6B as this project trains it, 2 x 256 tokens
    python scripts/profile_step.py qlora plain-fast plain-logits --write    three of them, and into scripts/comparing/README.md
    python scripts/profile_step.py qlora-fused --ops 30                     the single operators as well

Two steps warm up, and one is looked at with torch's profiler. Every operator counts for the time in itself, so the shares add up;
what is left is Python, autograd and the libraries around the operators. The work is that of scripts/compare: random weights, the
same tokens. Products with the adapters' halves are "narrow": one side has at most 64 rows or columns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from comparing.contenders import CONTENDERS
from comparing.work import Work, write_work
from pages import Place

from qlora import _compat

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::_int_mm")
_NARROW = 64
_WARM_UP_STEPS = 2
_REST = "Python and autograd"
_PAGE = Path(__file__).resolve().parent / "comparing" / "README.md"


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
    return _REST


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables; returns 0."""
    options = _parse(words)
    names = options.contenders or ["qlora"]
    if options.alone:
        print(json.dumps(_looked_at(names[0], options)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or folder
        found = {name: _in_its_own_process(name, options) for name in names}
    text = table(found, options)
    print(text)
    for name, each in found.items():
        if each["operators"]:
            print(f"\n{name}\n{each['operators']}")
    if options.write:
        Place(_PAGE, f"profile of {options.model}", "scripts/profile_step.py --write").write(text)
    return 0


def table(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Seconds by kind of work, a column for each contender, in Markdown."""
    first = next(iter(found.values()))
    kinds = {kind for each in found.values() for kind in each["kinds"]}
    lines = [f"{options.model}, {options.rows} x {options.length} tokens, {first['threads']} threads, seconds of one step with the "
             "profiler on:\n", f"| kind of work | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for kind in sorted(kinds, key=lambda kind: -first["kinds"].get(kind, [0])[0]):
        cells = [f"{each['kinds'][kind][0]:.3f}" if kind in each["kinds"] else "-" for each in found.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    seconds = [f"{each['seconds']:.2f}" for each in found.values()]
    calls = [f"{sum(count for _, count in each['kinds'].values()):,}" for each in found.values()]
    lines += [f"| the whole step | {' | '.join(seconds)} |", f"| calls of operators | {' | '.join(calls)} |"]
    return "\n".join(lines)


def _in_its_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one contender's step consists of; nothing that it changes in a library reaches the next one."""
    contender = next(each for each in CONTENDERS if each.name == name)
    words = [name, "--alone", "--model", options.model, "--work", str(options.work), "--length", str(options.length),
             "--rows", str(options.rows), "--ops", str(options.ops), *(["--threads", str(options.threads)] if options.threads else [])]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **contender.environment})
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def _looked_at(name: str, options: argparse.Namespace) -> dict[str, Any]:
    contender = next(each for each in CONTENDERS if each.name == name)
    if contender.is_ours:
        _compat.prepare_environment()
    _compat.quieten_libraries()
    _compat.hide_loading_bars()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    work = Work(options.model, options.work, length=options.length, micro_batch=options.rows)
    if not work.checkpoint.exists():
        write_work(work)
    profiler, seconds, vocabulary = _profile(contender, work)
    kinds: dict[str, list[Any]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        spent = kinds.setdefault(kind_of(event.key, event.input_shapes, vocabulary), [0.0, 0])
        spent[0] += event.self_cpu_time_total / 1e6
        spent[1] += event.count
    rest = max(0.0, seconds - sum(each for each, _ in kinds.values()))
    kinds.setdefault(_REST, [0.0, 0])[0] += rest
    operators = ""
    if options.ops:
        averages = profiler.key_averages()
        operators = averages.table(sort_by="self_cpu_time_total", row_limit=options.ops, max_name_column_width=48)
    return {"kinds": kinds, "seconds": seconds, "threads": torch.get_num_threads(), "operators": operators}


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


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/profile_step.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in CONTENDERS if each.alternates]
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=f"whose step: {', '.join(names)} (default: qlora)")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a model of the catalog or a folder with config.json")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch (default: 2)")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--work", metavar="FOLDER", help="keep the checkpoint there, for the next time")
    parser.add_argument("--ops", type=int, default=0, metavar="N", help="also the N operators that take longest")
    parser.add_argument("--write", action="store_true", help="put the table into scripts/comparing/README.md")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one contender, as JSON
    options = parser.parse_args(words)
    for name in options.contenders:
        if name not in names:
            parser.error(f"there is no contender {name!r}; there are {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
