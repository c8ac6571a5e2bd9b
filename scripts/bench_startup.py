#!/usr/bin/env python3
"""How long the program takes to begin, on this machine, as Markdown tables: every command in a process of its own.

    python scripts/bench_startup.py                    `--help`, a plan that was made before, and the imports of `--help`
    python scripts/bench_startup.py --train            also `qlora train` on a base of 1B parameters, to its first step: nothing
                                                       kept, with the quantised base kept, and with the trial of the same rows
                                                       and the bare base's loss kept too; 4 GB of disk and some minutes
    python scripts/bench_startup.py --train --model HuggingFaceTB/SmolLM2-135M

The checkpoint of --train has random weights of the model's real config and is removed afterwards. "CPU" is the time that
processors worked for it, which says more than the clock does where other programs run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

_HELP_SECONDS = 0.3
_IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")
_HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "gguf", "optuna", "matplotlib")


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables; returns 1 where `--help` misses its target or imports what it should not, else 0."""
    options = _parse(words)
    print("| command | median, s | from | to | CPU, s |\n| --- | ---: | ---: | ---: | ---: |")
    help_seconds = _print_row("`qlora --help`", [_timed(["--help"]) for _ in range(options.n)])
    with tempfile.TemporaryDirectory() as cache:
        plan = ["plan", "--model", "Qwen/Qwen3-4B", "--vram", "8GB"]
        _timed(plan, cache)
        _print_row(f"`qlora {' '.join(plan)}`, asked before", [_timed(plan, cache) for _ in range(options.n)])
    imports = slowest_imports(_importtime(["--help"]))
    print("\nWhat `qlora --help` imports, in milliseconds with all that each brings along:\n\n| module | ms |\n| --- | ---: |")
    for name, milliseconds in imports[: options.imports]:
        print(f"| {name} | {milliseconds:.1f} |")
    heavy = [name for name, _ in imports if name in _HEAVY]
    if heavy:
        print(f"\n`qlora --help` imports {', '.join(heavy)}, which it should not.")
    if options.train:
        _print_training(options.model)
    return int(help_seconds > _HELP_SECONDS or bool(heavy))


def slowest_imports(text: str) -> list[tuple[str, float]]:
    """Modules and milliseconds, those that they import included, slowest first, of what `python -X importtime` wrote."""
    found = {match[4]: int(match[2]) / 1000 for match in map(_IMPORT_LINE.match, text.splitlines()) if match}
    return sorted(found.items(), key=lambda pair: -pair[1])


def _print_row(name: str, times: Sequence[tuple[float, float]]) -> float:
    """The median of seconds, which is printed too."""
    walls, cpus = zip(*times)
    print(f"| {name} | {statistics.median(walls):.2f} | {min(walls):.2f} | {max(walls):.2f} | {statistics.median(cpus):.2f} |",
          flush=True)
    return statistics.median(walls)


def _timed(words: Sequence[str], cache: str | None = None) -> tuple[float, float]:
    """Seconds by the clock and of processors that a command takes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "qlora", *words], env=_environment(cache), cwd=ROOT, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _importtime(words: Sequence[str]) -> str:
    command = [sys.executable, "-X", "importtime", "-m", "qlora", *words]
    return subprocess.run(command, env=_environment(None), cwd=ROOT, capture_output=True, text=True).stderr


def _environment(cache: str | None) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **({"QLORA_CACHE": cache} if cache else {})}


# --- training ----------------------------------------------------------------------------------------------------------


def _print_training(model: str) -> None:
    from comparing.work import Work, write_work

    with tempfile.TemporaryDirectory() as folder:
        work = Work(model, folder)
        write_work(work)
        print(f"\n`qlora train`, {model} with random weights, rows of {work.length} tokens, in seconds from the command:\n\n"
              "| | first line of metrics.jsonl | where it went |\n| --- | ---: | --- |")
        cache = Path(folder) / "cache"
        for number, name in enumerate(("nothing kept", "base kept, other rows", "base kept, the same rows", "once more")):
            if number == 1:
                shutil.rmtree(cache / "starts")  # what a run finds out of its rows; see qlora/training/earlier.py
            seconds, stages = _first_step(work.checkpoint, work.text_file, Path(folder) / f"run-{number}", str(cache))
            print(f"| {name} | {seconds:.1f} | {stages} |", flush=True)


def _first_step(checkpoint: Path, rows: Path, run: Path, cache: str) -> tuple[float, str]:
    """Seconds to the first training step of a run, and what the run says of its stages."""
    recipe = run.with_suffix(".yaml")
    recipe.write_text(json.dumps({"model": str(checkpoint), "data": str(rows)}), encoding="utf-8")  # JSON is YAML
    words = ["train", str(recipe), f"output.dir={run}", "data.format=text", "data.max_length=256", "memory.cache_base=true",
             "train.micro_batch=2", "train.accumulation=1", "train.max_steps=1", "train.sample_rows=0", "data.validation=0.1",
             "train.eval_every=0"]
    began, found = time.perf_counter(), threading.Event()
    child = subprocess.Popen([sys.executable, "-m", "qlora", *words], env=_environment(cache), cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
    when = 0.0
    while child.poll() is None and not found.is_set():
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8"):
            when = time.perf_counter() - began
            found.set()
        time.sleep(0.05)
    output = child.communicate()[0]
    if not found.is_set():
        raise SystemExit(f"qlora train ended with {child.returncode} before its first step:\n{output[-2000:]}")
    report = json.loads((run / "report.json").read_text(encoding="utf-8")) if (run / "report.json").is_file() else {}
    stages = report.get("seconds") or {}
    return when, ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items()) or "-"


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_startup.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=5, metavar="N", help="how often each is run (default: 5)")
    parser.add_argument("--imports", type=int, default=12, metavar="N", help="modules to list (default: 12)")
    parser.add_argument("--train", action="store_true", help="also the start of a run")
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B", help="for --train (default: Llama 3.2 1B)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
