"""Real runs of `qlora train`, each in a process of its own, and what they leave: for scripts/prove_streaming.py."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OUT_OF_MEMORY = ("ran out of memory", "out of memory", "does not fit")
_TAIL_LINES = 12
_BETWEEN_LOOKS = 0.05  # seconds
# The environment comes before torch, as in the program itself.
_BEGIN = "import sys\nfrom qlora import _compat\n_compat.prepare_environment()\n"
_END = "from qlora.cli import main\nsys.exit(main(sys.argv[1:]))\n"
DETERMINISTIC = "import torch\ntorch.use_deterministic_algorithms(True, warn_only=True)\n"
_KEPT_OF_A_STEP = ("step", "loss", "grad_norm", "tokens", "tokens_per_second", "seconds")
_KEPT_OF_A_PLAN = ("resident_layers", "streamed_layers", "stream_from", "visit_micro_batches", "embedding_device", "head_format",
                   "loss_chunk", "offload_activations", "offload_adapters", "fused_lora", "mlp_tile", "dequantise_once", "r",
                   "micro_batch", "accumulation", "max_length")


@dataclass(frozen=True)
class Run:
    """One run of the program.

    Attributes:
        name: by which it is found again in a file of evidence.
        model: a Hub id of the catalog, or a folder with config.json.
        settings: `section.setting=value`.
        length: tokens that rows have at least; `ragged` ones are of all lengths up to it instead.
        before: Python that runs before the program does.
    """

    name: str
    model: str
    settings: tuple[str, ...]
    length: int
    num_rows: int = 8
    ragged: bool = False
    before: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def perform(run: Run, *, keep_in: Path | None = None) -> dict[str, Any]:
    """Run it and read what it has left. Running out of memory is a result, as any other end is.

    Args:
        keep_in: a folder for its output and its run folder, in the place of one that is removed afterwards.
    """
    home = Path(tempfile.mkdtemp(prefix="streaming-")) if keep_in is None else keep_in
    home.mkdir(parents=True, exist_ok=True)
    try:
        recipe = home / "recipe.yaml"
        recipe.write_text(f"model: {json.dumps(run.model)}\ndata: rows.jsonl\n", encoding="utf-8")
        _write_rows(home / "rows.jsonl", run)
        common = ("model.weights=random", "data.format=text", "data.train_on=all", "data.validation=0", "train.sample_rows=0",
                  "train.eval_every=0", "train.save_every=0", "train.epochs=1000", f"output.dir={home / 'run'}")
        command = [sys.executable, "-c", _BEGIN + run.before + _END, "train", str(recipe), "--fresh", *common, *run.settings]
        started = time.perf_counter()
        with (home / "output.txt").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **run.environment})
            code, highest_rss = _wait(child)
        output = (home / "output.txt").read_text(encoding="utf-8", errors="replace")
        return {
            "model": Path(run.model).name if Path(run.model).is_dir() else run.model, "settings": list(run.settings),
            "code": code, "out_of_memory": code != 0 and any(words in output for words in _OUT_OF_MEMORY),
            "all_seconds": round(time.perf_counter() - started, 1), "process_bytes": highest_rss, **_read(home / "run"),
            **({} if code == 0 else {"output": output.replace(str(home), ".").splitlines()[-_TAIL_LINES:]}),
        }
    finally:
        if keep_in is None:
            shutil.rmtree(home, ignore_errors=True)


def _wait(child: subprocess.Popen) -> tuple[int, int]:
    """Exit code, and the most RAM that the process had at once, in bytes, by the kernel's own count; 0 where there is none.

    The program sets that count back at each of its phases, so it is read all the time; what a phase's last moments add is lost.
    """
    highest, status = 0, Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        if status.exists():  # Linux
            counts = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
            highest = max([highest, *(int(count) * 1024 for count in counts)])
        time.sleep(_BETWEEN_LOOKS)
    return child.returncode, highest


def _write_rows(path: Path, run: Run) -> None:
    words, choice = "the cat sat on the mat and the dog ran to the red house by a tree".split(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(run.num_rows):
            length = 2 + (row * 7919) % run.length if run.ragged else 2 * run.length
            file.write(json.dumps({"text": " ".join(choice.choice(words) for _ in range(length))}) + "\n")


# --- what a run leaves -------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, Any]:
    def document(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    plan, progress, report = document("plan.json"), document("progress.json"), document("report.json")
    probe = progress.get("probe") or {"planned": {}, "measured": {}}
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return {
        "decided": {name: plan["settings"][name] for name in _KEPT_OF_A_PLAN if name in plan.get("settings", {})},
        "budget_bytes": plan.get("budget_bytes"), "planned_bytes": probe["planned"], "measured_bytes": probe["measured"],
        "planned_margin_bytes": plan.get("parts", {}).get("margin", 0),
        "planned_host_bytes": plan.get("host_peak_bytes"), "planned_tokens_per_second": plan.get("tokens_per_second"),
        "peak_bytes": report.get("peak_bytes"), "phase_seconds": {k: round(v, 1) for k, v in progress.get("seconds", {}).items()},
        "events": progress.get("events", []), "steps": _steps(folder / "metrics.jsonl"),
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None,
    }


def _steps(path: Path) -> list[dict[str, Any]]:
    """Loss, norm of the gradient and time of each step; "seconds" is since the first began, "step_seconds" of the step alone."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps, before = [], 0.0
    for row in (json.loads(line) for line in lines):
        if "loss" not in row:
            continue
        kept = {name: row[name] for name in _KEPT_OF_A_STEP if name in row}
        kept["step_seconds"], before = round(kept.pop("seconds") - before, 2), row["seconds"]
        steps.append(kept)
    return steps


def planned_errors(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """By phase, in percent of what was measured, how far the plan was over it: by itself, and with the margin that it keeps."""
    planned, margin = result["planned_bytes"], result["planned_margin_bytes"]
    return {phase: (100 * (planned[phase] / size - 1), 100 * ((planned[phase] + margin) / size - 1))
            for phase, size in result["measured_bytes"].items() if phase in planned and size}


def highest(result: Mapping[str, Any]) -> int:
    """Bytes that a run's tensors took at their highest in the trial of its longest rows; 0 where that did not come to an end."""
    return max(result["measured_bytes"].values(), default=0)


def speed(result: Mapping[str, Any]) -> float | None:
    """Tokens a second, of the fastest step after the first: what comes before is still warming up."""
    later: Sequence[Mapping[str, Any]] = result["steps"][1:] or result["steps"]
    return max((step["tokens"] / step["step_seconds"] for step in later if step["step_seconds"]), default=None)
