#!/usr/bin/env python3
"""How fast the planner answers on this machine, as a Markdown table: whole commands, each in a process of its own.

    python scripts/bench_planner.py            three times each
    python scripts/bench_planner.py -n 5 --model Qwen/Qwen3-8B

"First" starts with an empty cache, "again" asks the same once more. Then where the time of a first plan goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TARGET_SECONDS = {"first plan": 15.0, "the same again": 1.5, "compare": 60.0}

# Runs in a process of its own: imports, then a plan with the simulator's two kinds of work timed.
_WHERE_IT_GOES = """
import json, sys, time
started = time.perf_counter()
import qlora.training.planner as planner
import qlora.training.rehearsal
from qlora.hardware import device_from_card
from qlora.training.simulator import Simulator
from qlora.units import parse_size
spent = {"importing the libraries": time.perf_counter() - started}
counts = {}

def timed(name, label):
    method = getattr(Simulator, name)
    def run(*args, **kwargs):
        began, before = time.perf_counter(), args[0].num_simulated
        try:
            return method(*args, **kwargs)
        finally:
            spent[label] = spent.get(label, 0) + time.perf_counter() - began
            counts[label] = counts.get(label, 0) + args[0].num_simulated - before
    setattr(Simulator, name, run)

for name in ("tensors", "generation"):
    timed(name, "search, with shallow models")
timed("whole", "what was found, at full depth")
began = time.perf_counter()
planner.plan_model(sys.argv[1], device=device_from_card(None, parse_size(sys.argv[2])))
spent["the rest: config, choices, speed, writing"] = time.perf_counter() - began - sum(list(spent.values())[1:])
print(json.dumps({label: [seconds, counts.get(label)] for label, seconds in spent.items()}))
"""


def main() -> int:
    """Print the tables; returns 1 where a target is missed, else 0."""
    options = _parser().parse_args()
    print(f"{options.model} on {_threads()} threads of {_processor()}, {options.n} times each, in seconds\n", flush=True)
    plan = ["plan", "--model", options.model, "--vram", options.vram, "--json"]
    compare = ["plan", "--model", options.model, "--compare", options.compare, "--json"]
    found: dict[str, list[float]] = {name: [] for name in _TARGET_SECONDS}
    where: list[dict[str, list[float]]] = []
    for _ in range(options.n):
        with tempfile.TemporaryDirectory() as cache:
            found["first plan"].append(_run(["-m", "qlora", *plan], cache)[0])
            found["the same again"].append(_run(["-m", "qlora", *plan], cache)[0])
        with tempfile.TemporaryDirectory() as cache:
            found["compare"].append(_run(["-m", "qlora", *compare], cache)[0])
        with tempfile.TemporaryDirectory() as cache:
            where.append(json.loads(_run(["-c", _WHERE_IT_GOES, options.model, options.vram], cache)[1].splitlines()[-1]))
    commands = {"first plan": f"`qlora {' '.join(plan)}`, empty cache", "the same again": "the same again",
                "compare": f"`qlora {' '.join(compare)}`, empty cache"}
    print("| command | median | from | to | target |\n| --- | --- | --- | --- | --- |")
    for name, times in found.items():
        print(f"| {commands[name]} | {_spread(times)} | {_TARGET_SECONDS[name]:g} |")
    print("\n| where a first plan spends it | median | from | to | simulations |\n| --- | --- | --- | --- | --- |")
    for label in where[0]:
        num_simulated = where[0][label][1]
        print(f"| {label} | {_spread([each[label][0] for each in where])} | {'' if num_simulated is None else num_simulated} |")
    return int(any(statistics.median(times) > _TARGET_SECONDS[name] for name, times in found.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_planner.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=3, metavar="N", help="how often each is run (default: 3)")
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B", help="a model of the catalog (default: Llama 3.1 8B)")
    parser.add_argument("--vram", default="8GB", help="the card that it is planned for (default: 8GB)")
    parser.add_argument("--compare", default="4,6,8,12,16,24", help="the cards that are compared (default: 4,6,8,12,16,24)")
    return parser


def _run(words: Sequence[str], cache: str) -> tuple[float, str]:
    """Seconds and output of this Python with `words`. A plan that does not fit ends with 2, which is no failure here."""
    environment = {**os.environ, "QLORA_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 2) or not done.stdout:
        raise SystemExit(f"{' '.join(words[:4])} failed:\n{done.stderr}")
    return seconds, done.stdout


def _spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.1f} | {min(times):.1f} | {max(times):.1f}"


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    sys.path.insert(0, str(ROOT))
    from qlora.hardware.host import cpu_name

    return cpu_name()


if __name__ == "__main__":
    sys.exit(main())
