#!/usr/bin/env python3
"""Does the memory engine do what it says? Models larger than their memory, trained by `qlora train`, with random weights.

    scripts/prove_streaming.py 8b     Llama-3.1-8B on a CPU: tensors within 1.6 GiB, the process within 3 GiB; 6 GB of disk
    scripts/prove_streaming.py 70b    Llama-3.3-70B on a CPU: the process within 8 GiB; 40 GB of disk, an hour
    scripts/prove_streaming.py bits   a small model: streamed and resident runs come to the same bits, on the device at hand
    scripts/prove_streaming.py gpu    all that needs a GPU: see below

Every run has a process of its own. What it took is printed last, beside what was planned, and written to scripts/evidence/ with
device, versions, command and date. A base that was quantised stays in the cache for the next time: `qlora cache` shows it and
clears it.

8b and 70b take settings of the program as further words, and --model another model, such as a folder with a small config.json:

    scripts/prove_streaming.py 8b --model my/config --budget 40MB --most-ram 2GB memory.resident_layers=0

gpu runs these, in this order. What the file of evidence has of this device is left out, there and with bits, so the same command
goes on from where it stopped; --only chooses, and --again begins anew:

    bits          bit-equality on CUDA, with deterministic attention
    8b-4gb        Llama-3.1-8B under a cap of 4 GB
    70b           Llama-3.3-70B under a cap of 24 GB, and without one, where the card has room for it
    visit         Llama-3.1-8B, all layers streamed and all resident, at 1,024 to 8,192 tokens a visit
    overlap       the share of the copies' time that passes beside computation, by torch's profiler
    context       the longest rows that are planned for 8, 12, 16 and 24 GB, with and without streaming, really trained

    scripts/prove_streaming.py gpu --minutes 9 --only bits 8b-4gb visit     as far as it gets in 9 minutes

Exit code: 0 when all is as promised, 1 when something is not, 2 where it cannot be tried.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from streaming_runs import DETERMINISTIC, Run, highest, perform, planned_errors, speed

from qlora import _compat
from qlora.errors import QloraError
from qlora.hardware import Device, describe_machine
from qlora.planning.cache import library_versions
from qlora.units import format_bytes, parse_size

EVIDENCE = Path(__file__).resolve().parent / "evidence"
LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.3-70B-Instruct"
_LEAST_ERROR, _MOST_ERROR = 0.0, 5.0  # percent by which a plan may be over what was measured
_VISITS = (1024, 2048, 4096, 8192)
_CARDS_GB = (8, 12, 16, 24)
_PARTS = ("bits", "8b-4gb", "70b", "visit", "overlap", "context")
_MOST_LOSS = 5.0  # percent of the resident speed
# Wide enough for a cap to mean something, small enough for seconds.
_SMALL = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=256, intermediate_size=768, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=4, vocab_size=2048, max_position_embeddings=1024, tie_word_embeddings=False,
)


def main(words: Sequence[str]) -> int:
    """Run the script; returns the exit code."""
    options = _parser().parse_intermixed_args(words)
    _compat.prepare_environment()
    proof = {"8b": _prove_8b, "70b": _prove_70b, "bits": _prove_bits, "gpu": _prove_gpu}[options.proof]
    try:
        return proof(options, shlex.join(["scripts/prove_streaming.py", *words]))
    except QloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=("8b", "70b", "bits", "gpu"))
    parser.add_argument("settings", nargs="*", metavar="section.setting=value", help="for the runs of 8b and 70b")
    parser.add_argument("--model", help="another model than the proof's own")
    parser.add_argument("--budget", help="for tensors (default: 1.6GiB for 8b, 5GiB for 70b)")
    parser.add_argument("--most-ram", help="that the process may take (default: 3GiB for 8b, 8GiB for 70b)")
    parser.add_argument("--length", type=int, help="tokens of a row (default: 256 for 8b, 64 for 70b)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so many")
    parser.add_argument("--only", nargs="+", default=[], choices=_PARTS, help="parts of gpu")
    parser.add_argument("--again", action="store_true", help="also what the file of evidence has already")
    parser.add_argument("--out", type=Path, help="file of evidence (default: in scripts/evidence/)")
    parser.add_argument("--keep", type=Path, help="a folder that run folders and output are left in")
    return parser


# --- on a CPU ----------------------------------------------------------------------------------------------------------


def _prove_8b(options: argparse.Namespace, command: str) -> int:
    run = Run("8b", LLAMA_8B, ("lora.r=16", "train.max_steps=3", "train.batch=2", "train.micro_batch=2"), 256)
    return _prove_on_cpu(run, "1.6GiB", "3GiB", options, command)


def _prove_70b(options: argparse.Namespace, command: str) -> int:
    run = Run("70b", LLAMA_70B, ("lora.r=16", "train.max_steps=1", "train.batch=1", "train.micro_batch=1"), 64)
    return _prove_on_cpu(run, "5GiB", "8GiB", options, command)


def _prove_on_cpu(run: Run, budget: str, most_ram: str, options: argparse.Namespace, command: str) -> int:
    budget, most_ram = options.budget or budget, options.most_ram or most_ram
    length = options.length or run.length
    settings = (*run.settings, f"data.max_length={length}", "memory.device=cpu", f"memory.budget={budget}", *options.settings)
    run = replace(run, model=options.model or run.model, settings=settings, length=length)
    evidence = _Evidence(options, describe_machine("cpu"), command)
    result = evidence.perform(run)
    promises = [
        ("the run came to its end", result["code"] == 0, f"exit code {result['code']}"),
        _at_most("tensors", highest(result), parse_size(budget)),
        _at_most("the process", result["process_bytes"], parse_size(most_ram)),
        *_plan_promises(result),
    ]
    _print_runs([(run.name, result)])
    return evidence.close(promises)


# --- the same bits -----------------------------------------------------------------------------------------------------


def _prove_bits(options: argparse.Namespace, command: str) -> int:
    device = describe_machine()
    evidence = _Evidence(options, device, command)
    promises = _same_bits(evidence, device, options)
    _print_runs(evidence.results())
    return evidence.close(promises)


def _same_bits(evidence: _Evidence, device: Device, options: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """Ten steps of a small model in many ways, which have to come to the same adapter, bit by bit."""
    promises = []
    for accumulation in (1, 3):
        for name, shared in (("plain", ("memory.fused_lora=false", "memory.loss_chunk=none")),
                             ("fused", ("memory.fused_lora=true", "memory.loss_chunk=1MiB"))):
            runs = [_bits_run(f"bits-{name}-{accumulation}-{way}", accumulation, (*shared, *settings), device)
                    for way, settings in _ways().items()]
            results = [evidence.perform(run) for run in runs if evidence.has_time]
            if len(results) < len(runs):
                return promises
            sums = {result["adapter_sha256"] for result in results}
            steps = {json.dumps([(step["loss"], step["grad_norm"]) for step in result["steps"]]) for result in results}
            same = all(result["code"] == 0 for result in results) and len(sums) == len(steps) == 1
            promises.append((f"{len(runs)} ways to the same bits: {name}, accumulation {accumulation}", same,
                             f"{len(sums)} adapters, {len(steps)} histories of losses and gradient norms"))
    return promises


def _ways() -> dict[str, tuple[str, ...]]:
    none = ("memory.embedding_device=device", "memory.head_format=resident", "memory.offload_activations=false",
            "memory.offload_adapters=false", "memory.mlp_tile=none")
    streamed = ("memory.streaming=true", "memory.dequantise_once=false")
    return {
        "resident": (*none, "memory.streaming=false"),
        "streamed-all": (*none, *streamed, "memory.resident_layers=0", "memory.stream_from=disk"),
        "streamed-half": (*none, *streamed, "memory.resident_layers=3", "memory.stream_from=ram"),
        "streamed-dense": (*none, "memory.streaming=true", "memory.dequantise_once=true", "memory.resident_layers=0",
                           "memory.stream_from=ram"),
        "streamed-none": (*none, *streamed, "memory.resident_layers=6", "memory.stream_from=ram"),
    }


def _bits_run(name: str, accumulation: int, settings: tuple[str, ...], device: Device) -> Run:
    common = (f"memory.device={device.kind}", "memory.budget=2GB", "memory.checkpointing=true", "memory.cache_base=true",
              "train.max_steps=10", "train.micro_batch=2", f"train.batch={2 * accumulation}", "data.max_length=192", "lora.r=8",
              "train.learning_rate=1e-3")
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if device.kind == "cuda" else {}
    return Run(name, str(_small_config()), (*common, *settings), 192, num_rows=64, ragged=True,
               before=DETERMINISTIC if device.kind == "cuda" else "", environment=environment)


def _small_config() -> Path:
    """A folder in the cache: where a base comes from is part of what it is called there."""
    from qlora.home import cache_home

    folder = cache_home() / "small-llama"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(_SMALL), encoding="utf-8")
    return folder


# --- on a GPU ----------------------------------------------------------------------------------------------------------


def _prove_gpu(options: argparse.Namespace, command: str) -> int:
    device = describe_machine()
    if device.kind != "cuda":
        print("There is no GPU here, or torch is one without CUDA: nothing was tried.", file=sys.stderr)
        return 2
    evidence = _Evidence(options, device, command)
    promises: list[tuple[str, bool, str]] = []
    parts = {"bits": lambda: _same_bits(evidence, device, options), "8b-4gb": lambda: _under_caps(evidence, "8b"),
             "70b": lambda: _under_caps(evidence, "70b"), "visit": lambda: _visits(evidence),
             "overlap": lambda: _overlaps(evidence), "context": lambda: _contexts(evidence)}
    for name, part in parts.items():
        if evidence.has_time and (not options.only or name in options.only):
            promises += part()
    _print_runs(evidence.results())
    return evidence.close(promises)


def _gpu_run(name: str, model: str, length: int, micro_batches: int, *settings: str, steps: int = 4, **more: Any) -> Run:
    common = ("memory.device=cuda", f"data.max_length={length}", "train.micro_batch=1", f"train.batch={micro_batches}",
              f"train.max_steps={steps}")
    return Run(name, model, (*common, *settings), length, num_rows=2 * micro_batches, **more)


def _under_caps(evidence: _Evidence, which: str) -> list[tuple[str, bool, str]]:
    """A model under the cap of a card that is too small for it; the large one also without, for the speed of resident layers."""
    if which == "8b":
        result = evidence.perform(_gpu_run("8b-4gb", LLAMA_8B, 1024, 8, "memory.budget=4GB"))
        return [_came_to_its_end("8b-4gb", result), *_plan_promises(result)]
    capped = evidence.perform(_gpu_run("70b-24gb", LLAMA_70B, 1024, 8, "memory.budget=24GB", steps=3))
    promises = [_came_to_its_end("70b-24gb", capped), *_plan_promises(capped)]
    if not evidence.has_time:
        return promises
    resident = evidence.perform(_gpu_run("70b-resident", LLAMA_70B, 1024, 8, "memory.streaming=false", steps=3))
    return promises + _share_of("70b-24gb", capped, resident)


def _visits(evidence: _Evidence) -> list[tuple[str, bool, str]]:
    promises = []
    same = ("memory.fused_lora=true", "memory.loss_chunk=64MiB", "memory.embedding_device=device", "memory.head_format=resident",
            "memory.checkpointing=true", "memory.offload_activations=false", "memory.cache_base=true", "lora.r=16")
    for tokens in _VISITS:
        if not evidence.has_time:
            break
        streamed = ("memory.streaming=true", "memory.resident_layers=0", "memory.stream_from=ram")
        pair = [evidence.perform(_gpu_run(f"visit-{tokens}-{name}", LLAMA_8B, 1024, tokens // 1024, *same, *settings))
                for name, settings in (("resident", ("memory.streaming=false",)), ("streamed", streamed))]
        promises += [_came_to_its_end(f"visit-{tokens}", pair[1]), *_share_of(f"visit-{tokens}", pair[1], pair[0], _MOST_LOSS)]
    return promises


def _overlaps(evidence: _Evidence) -> list[tuple[str, bool, str]]:
    """The share is a finding and no promise: it follows from the link, the card and the tokens of a visit."""
    here = Path(__file__).resolve().parent
    for tokens in (1024, 4096):
        for source in ("ram", "disk"):
            if not evidence.has_time:
                return []
            name, out = f"overlap-{tokens}-{source}", here / "evidence" / ".overlap.json"
            before = f"sys.path.insert(0, {str(here)!r})\nimport copy_overlap\ncopy_overlap.watch({str(out)!r}, step=3)\n"
            out.parent.mkdir(exist_ok=True)
            settings = ("memory.streaming=true", "memory.resident_layers=0", f"memory.stream_from={source}", "lora.r=16")
            result = evidence.perform(_gpu_run(name, LLAMA_8B, 1024, tokens // 1024, *settings, before=before))
            if out.exists():
                result["overlap"] = json.loads(out.read_text(encoding="utf-8"))
                out.unlink()
                evidence.save()
    return []


def _contexts(evidence: _Evidence) -> list[tuple[str, bool, str]]:
    """The longest rows by card, as scripts/context_table.py plans them, trained."""
    from qlora.training.planner import plan_model

    promises = []
    for card in _CARDS_GB:
        for name, settings in (("streamed", ()), ("resident", ("memory.streaming=false",))):
            if not evidence.has_time:
                return promises
            settings = (f"memory.budget={card}GB", "lora.r=32", *settings)
            fixed = ["train.batch=1", "data.max_length=1024", *settings]
            length = plan_model(LLAMA_8B, device=evidence.device, overrides=fixed).longest_length
            if not length:
                print(f"context-{card}-{name}: no length fits", file=sys.stderr)
                continue
            result = evidence.perform(_gpu_run(f"context-{card}-{name}", LLAMA_8B, length, 1, *settings, steps=2))
            promises += [_came_to_its_end(f"context-{card}-{name} of {length:,} tokens", result), *_plan_promises(result)]
    return promises


def _share_of(
    name: str, result: dict[str, Any], resident: dict[str, Any], most_loss: float | None = None
) -> list[tuple[str, bool, str]]:
    """Speed beside that of the same run with all layers resident."""
    speeds = speed(result), speed(resident)
    if None in speeds:
        return []
    share = 100 * speeds[0] / speeds[1]
    text = f"{speeds[0]:,.0f} of {speeds[1]:,.0f} tokens/s, {share:.1f} %"
    return [(f"{name}: speed beside resident", most_loss is None or share >= 100 - most_loss, text)]


# --- promises and evidence ---------------------------------------------------------------------------------------------


def _came_to_its_end(name: str, result: dict[str, Any]) -> tuple[str, bool, str]:
    return name, result["code"] == 0, "ran out of memory" if result["out_of_memory"] else f"exit code {result['code']}"


def _at_most(what: str, size: int, most: int) -> tuple[str, bool, str]:
    return f"{what}: at most {format_bytes(most)}", 0 < size <= most, format_bytes(size)


def _plan_promises(result: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """The plan of the phase that takes most: with its margin not under what was measured, and not far over it."""
    errors = planned_errors(result)
    if not errors:
        return [("the plan", False, "nothing was measured")]
    most = max(errors, key=result["measured_bytes"].__getitem__)
    plain, error = errors[most]
    kept = _LEAST_ERROR <= error and plain <= _MOST_ERROR
    return [(f"the plan for {most}", kept, f"{error:+.3f} %, without its margin {plain:+.3f} %")]


class _Evidence:
    """A JSON file of what has been measured, written anew after each run, so that an interrupted proof goes on."""

    def __init__(self, options: argparse.Namespace, device: Device, command: str):
        self.device, self._keep = device, options.keep
        self._path: Path = options.out or EVIDENCE / f"{options.proof}-{_slug(device.name)}.json"
        self._again, self._minutes = options.again or options.proof in ("8b", "70b"), options.minutes
        self._started = time.monotonic()
        about = {"device": device.name, "kind": device.kind, "memory_bytes": device.memory_bytes,
                 "versions": {"python": platform.python_version(), **library_versions()}}
        kept = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() and not self._again else {}
        runs = kept.get("runs", {}) if all(kept.get(name) == value for name, value in about.items()) else {}
        self.document: dict[str, Any] = {**about, "command": command, "date": "", "promises": [], "runs": runs}

    @property
    def has_time(self) -> bool:
        return time.monotonic() - self._started < 60 * self._minutes

    def perform(self, run: Run) -> dict[str, Any]:
        """What came of a run; what is known already is not run again."""
        known = self.document["runs"].get(run.name)
        if known is not None and known["settings"] == list(run.settings):
            return known
        print(f"{run.name} ...", file=sys.stderr, flush=True)
        result = perform(run, keep_in=self._keep / run.name if self._keep else None)
        self.document["runs"][run.name] = result
        self.save()
        return result

    def results(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return self.document["runs"].items()

    def save(self) -> None:
        self.document["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")

    def close(self, promises: list[tuple[str, bool, str]]) -> int:
        """Print what was promised and what came of it; returns the exit code."""
        self.document["promises"] = [dict(zip(("promise", "kept", "found"), promise, strict=True)) for promise in promises]
        self.save()
        for what, kept, found in promises:
            print(f"{'kept  ' if kept else 'BROKEN'}  {what}: {found}")
        print(f"Evidence: {self._path}")
        return 0 if all(kept for _, kept, _ in promises) else 1


def _print_runs(runs: Iterable[tuple[str, dict[str, Any]]]) -> None:
    for name, result in runs:
        decided = result["decided"]
        where = f"{decided.get('resident_layers')} layers resident, {decided.get('streamed_layers')} streamed"
        print(f"{name}: {where}; process {format_bytes(result['process_bytes'])}; exit code {result['code']}")
        for phase, (error, _) in planned_errors(result).items():
            planned, size = result["planned_bytes"][phase], result["measured_bytes"][phase]
            print(f"  {phase:<9} planned {planned / 2**20:>11,.2f} MiB  measured {size / 2**20:>11,.2f} MiB  {error:+.3f} %")
        for step in result["steps"]:
            print(f"  step {step['step']}: loss {step['loss']:.6f}, gradient norm {step['grad_norm']:.6f}, "
                  f"{step['tokens']:,} tokens in {step['step_seconds']:.2f} s")
        if "overlap" in result:
            print(f"  copies beside computation: {result['overlap']}")
        for line in result.get("output", ()):
            print(f"  | {line}")


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
