#!/usr/bin/env python3
"""Does a run on this GPU keep its plan's promise? Four real runs of the program, and what came of each as a Markdown table.

    .venv/bin/python scripts/prove_contract.py                           Qwen3-0.6B with random weights, as if the card had 4 GB
    .venv/bin/python scripts/prove_contract.py --model Qwen/Qwen3-8B --budget 8GB --length 1024

1. plain      planned against measured, by phase, under the cap of the plan
2. squeezed   at step 3 the cap is drawn in to less than the step takes: a real memory error in the middle of a step
3. crowded    at step 3 another process takes what is free of the card: the run steps down before a step fails
4. stopped    Ctrl-C at step 3, then the same command again: losses beside those of the plain run

Without a GPU (--cpu) there is no cap and no other tenant, so 2 and 3 are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_STEPS, _AT = 8, 3
_RUN = "import sys\nfrom qlora.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
# The trainer's own hook at the beginning of a step; what is drawn in is torch's cap, so the error is the allocator's.
_SQUEEZE = f"""
import qlora._compat
qlora._compat.prepare_environment()
import torch
from qlora.training.trainer import AdapterTrainer
plain = AdapterTrainer.begin_step
def begin_step(self):
    plain(self)
    if self.may_step_down and self.state.global_step + 1 == {_AT}:
        torch.cuda.empty_cache()
        highest, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        cap = now + (highest - now) * 0.7
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
AdapterTrainer.begin_step = begin_step
"""
_TENANT = """
import sys, time, torch
free = torch.cuda.mem_get_info()[0]
kept = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("taken", flush=True)
time.sleep(3600)
"""


def main() -> int:
    options = _read_options()
    home = Path(tempfile.mkdtemp(prefix="contract-"))
    rows = _write_rows(home / "rows.jsonl", options.length)
    common = [
        f"model.base={options.model}", "model.weights=random", f"data.path={rows}", "data.format=text", "data.train_on=all",
        f"data.max_length={options.length}", "data.validation=0.1", f"train.max_steps={_STEPS}", "train.eval_every=4",
        "train.save_every=2", "train.sample_rows=2", "train.epochs=9", "train.batch=8", "train.micro_batch=4", "train.keep=last",
        *(["memory.device=cpu"] if options.cpu else ["memory.device=cuda", f"memory.budget={options.budget}"]),
    ]
    recipe = home / "recipe.yaml"
    recipe.write_text(f"model: {options.model}\ndata: {rows}\n", encoding="utf-8")
    runs = {"plain": lambda f: _run(recipe, common, f), "stopped": lambda f: _stopped(recipe, common, f)}
    if not options.cpu:
        runs["squeezed"] = lambda f: _run(recipe, common, f, before=_SQUEEZE)
        runs["crowded"] = lambda f: _crowded(recipe, common, f)
    found = {}
    for name, run in runs.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        code, output = run(home / name)
        found[name] = _read(home / name, code, output)
    _print(found, options)
    if options.keep:
        print(f"\nRuns are in {home}", file=sys.stderr)
    else:
        shutil.rmtree(home, ignore_errors=True)
    return 0 if all(each["code"] == 0 for each in found.values()) else 1


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a model of the catalog, or a folder with config.json")
    parser.add_argument("--budget", default="4GB", help="the card that this one stands for (default: 4GB)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest row (default: 512)")
    parser.add_argument("--cpu", action="store_true", help="without a GPU: the first and the last run only")
    parser.add_argument("--keep", action="store_true", help="leave the run folders")
    return parser.parse_args()


def _write_rows(path: Path, length: int) -> Path:
    """Rows of all lengths up to well over the limit, in words of a few letters."""
    words = "the cat sat on the mat and the dog ran to the red house".split()
    texts = (" ".join(words[(row + i) % len(words)] for i in range(8 + row * length // 60)) for row in range(80))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


# --- runs --------------------------------------------------------------------------------------------------------------


def _start(recipe: Path, settings: list[str], folder: Path, before: str = "") -> subprocess.Popen[str]:
    log = (folder.parent / f"{folder.name}.txt").open("a", encoding="utf-8")
    command = [sys.executable, "-c", _RUN.format(before=before), "train", str(recipe), *settings, f"output.dir={folder}"]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)


def _output(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.txt").read_text(encoding="utf-8", errors="replace")


def _run(recipe: Path, settings: list[str], folder: Path, before: str = "") -> tuple[int, str]:
    code = _start(recipe, settings, folder, before).wait()
    return code, _output(folder)


def _crowded(recipe: Path, settings: list[str], folder: Path) -> tuple[int, str]:
    process = _start(recipe, settings, folder)
    _wait_for_step(folder, process)
    left = str(64 * 2**20)
    tenant = subprocess.Popen([sys.executable, "-c", _TENANT, left], stdout=subprocess.PIPE, text=True)
    tenant.stdout.readline()
    try:
        return process.wait(), _output(folder)
    finally:
        tenant.kill()


def _stopped(recipe: Path, settings: list[str], folder: Path) -> tuple[int, str]:
    process = _start(recipe, settings, folder)
    _wait_for_step(folder, process)
    process.send_signal(signal.SIGINT)
    code = process.wait()
    if code != 130:
        return code or 1, _output(folder)
    return _run(recipe, settings, folder)


def _wait_for_step(folder: Path, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text(encoding="utf-8").count('"loss"') >= _AT):
        time.sleep(0.01)


# --- results -----------------------------------------------------------------------------------------------------------


def _read(folder: Path, code: int, output: str) -> dict[str, Any]:
    def document(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    return {"code": code, "plan": document("plan.json"), "progress": document("progress.json"), "output": output,
            "losses": {row["step"]: row["loss"] for row in rows if "loss" in row}}


def _print(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    import torch
    import transformers

    plain = found["plain"]
    device = plain["plan"].get("device", "unknown")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{device}; {versions}; {datetime.now(timezone.utc):%Y-%m-%d}; "
          f"`{shlex.join(['python', 'scripts/prove_contract.py', *sys.argv[1:]])}`\n")
    print("| phase | planned MiB | measured MiB | error |\n| --- | ---: | ---: | ---: |")
    trial = plain["progress"].get("probe") or {"planned": {}, "measured": {}}
    for phase, measured in trial["measured"].items():
        planned = trial["planned"][phase]
        print(f"| {phase} | {planned / 2**20:,.1f} | {measured / 2**20:,.1f} | {100 * (planned / measured - 1):+.2f} % |")
    print("\n| run | exit code | steps | largest difference of a loss to plain | what it said |\n| --- | ---: | ---: | ---: | --- |")
    for name, each in found.items():
        shared = [abs(each["losses"][step] - plain["losses"][step]) for step in each["losses"] if step in plain["losses"]]
        events = " ".join(each["progress"].get("events", [])) or "-"
        worst = f"{max(shared):.2g}" if shared else "-"
        print(f"| {name} | {each['code']} | {len(each['losses'])} | {worst} | {events} |")
    for name, each in found.items():
        if each["code"]:
            print(f"\n{name} ended with {each['code']}:\n{os.linesep.join(each['output'].splitlines()[-15:])}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
