#!/usr/bin/env python3
"""Score the planner's simulator, and another planner, on measured rows; prints Markdown.

    .venv/bin/python scripts/score_planner.py --peer /path/to/python

`--peer` is a Python that has fitcheck-llm (`pip install fitcheck-llm==0.3.1` in an environment of its own); without it
that column is left out. Rows come from ../shared/facts/t4-measurements.json, or from the files named with `--rows`, in the
format of fitcheck-llm's data/measurements/*.json (they are in its source distribution on PyPI). The other planner cannot
score rows without a model_config.

"Tensors" is torch.cuda.max_memory_allocated; "process" is max_memory_reserved and the CUDA context. The context is taken as
it was measured, 140.875 MiB, here as in fitcheck-llm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MIB = 2**20
CONTEXT_MIB = 140.875

# Runs in the other environment: rows on stdin, (tensors, process) in MiB on stdout.
PEER = """
import json, sys
from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu
found = []
for row in json.load(sys.stdin):
    run = row["run"]
    training = TrainingConfig(
        precision=run["precision"], quantization=run["quantization"], double_quant=run["double_quant"],
        optimizer=run["optimizer"], batch_size=run["batch_size"], seq_len=run["seq_len"], lora_rank=run["lora_rank"],
        lora_targets=run["lora_targets"], grad_checkpoint=run["grad_checkpoint"], flash_attn=run["kernel"] == "flash")
    report = estimate(ModelConfig(**row["model_config"]), training, get_gpu(run["gpu_key"]))
    found.append((report.total_mib - report.overhead_mib, report.total_mib))
print(json.dumps(found))
"""


def main() -> None:
    """Read, simulate, ask the peer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that can import fitcheck")
    parser.add_argument("--rows", metavar="FILE", type=Path, action="append", help="measured rows; may be given again")
    parser.add_argument("--summary", action="store_true", help="only the summary")
    arguments = parser.parse_args()

    from qlora import _compat

    _compat.prepare_environment()
    _compat.quieten_libraries()
    from t4 import read_rows

    shared = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared"))
    rows = [row for path in arguments.rows or [shared / "facts" / "t4-measurements.json"] for row in read_rows(path)]
    peer = ask_peer(arguments.peer, rows) if arguments.peer else [None] * len(rows)
    scored = [compare(row, estimate) for row, estimate in zip(rows, peer, strict=True)]
    if not arguments.summary:
        print(row_table(scored), "\n")
    print(summary_table(scored))


def ask_peer(python: str, rows: list[dict[str, Any]]) -> list[tuple[float, float] | None]:
    """The other planner's tensors and process for each row; None where it cannot be asked."""
    asked = [row for row in rows if "model_config" in row]
    done = subprocess.run([python, "-c", PEER], input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} cannot run fitcheck-llm:\n{done.stderr.strip().splitlines()[-1]}")
    answers = iter(json.loads(done.stdout))
    return [tuple(next(answers)) if "model_config" in row else None for row in rows]


def compare(published: dict[str, Any], peer: tuple[float, float] | None) -> dict[str, Any]:
    """One row: its name, and for "tensors" and "process" (measured, simulated, the peer's) in MiB."""
    from t4 import score

    result, measured, run = score(published), published["measured"], published["run"]
    model, size = published["model_id"].split("/")[-1], f"{run['batch_size']}x{run['seq_len']}"
    return {
        "name": f"{model} {run['attn_impl']} {run['quantization']} {size}",
        "tensors": (measured["peak_allocated_mib"], result.allocated / MIB, peer and peer[0]),
        "process": (measured["peak_reserved_mib"] + CONTEXT_MIB, result.reserved / MIB + CONTEXT_MIB, peer and peer[1]),
    }


def row_table(scored: list[dict[str, Any]]) -> str:
    """Every row: MiB measured, simulated and estimated by the peer, with errors."""
    lines = ["| row | tensors | this planner | fitcheck-llm | process | this planner | fitcheck-llm |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in scored:
        cells = [row["name"]]
        for tier in ("tensors", "process"):
            measured, *estimates = row[tier]
            cells.append(f"{measured:,.0f}")
            cells += ["" if each is None else f"{each:,.0f} ({100 * (each / measured - 1):+.1f} %)" for each in estimates]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary_table(scored: list[dict[str, Any]]) -> str:
    """Errors over all rows, in percent of what was measured."""
    lines = ["| | planner | rows | mean | median | most over | most under |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for tier in ("tensors", "process"):
        for who, place in (("this planner", 1), ("fitcheck-llm", 2)):
            errors = [100 * (row[tier][place] / row[tier][0] - 1) for row in scored if row[tier][place] is not None]
            if errors:
                sizes = [abs(error) for error in errors]
                found = (statistics.mean(sizes), statistics.median(sizes))
                lines.append(f"| {tier} | {who} | {len(errors)} | {found[0]:.2f} % | {found[1]:.2f} % "
                             f"| {max(*errors, 0.0):+.2f} % | {min(*errors, 0.0):+.2f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
