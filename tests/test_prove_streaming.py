"""The script that proves the memory engine: one proof end to end with a small model, and what the others rest on."""

import importlib.util
import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

from qlora.hardware import describe_machine


@pytest.fixture(scope="module")
def scripts(root):
    """Modules of scripts/, by name."""
    def load(name):
        spec = importlib.util.spec_from_file_location(name, root / "scripts" / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    names, path = ("streaming_runs", "copy_overlap", "prove_streaming"), list(sys.path)
    yield SimpleNamespace(**{name: load(name) for name in names})
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name)


@pytest.mark.long
def test_the_proof_of_an_8b_with_a_small_model(scripts, tmp_path, capsys):
    config = {**scripts.prove_streaming._SMALL, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "evidence.json"
    code = scripts.prove_streaming.main([
        "8b", "--model", str(tmp_path), "--length", "48", "--budget", "32MB", "--most-ram", "4GB", "--out", str(out),
        "memory.streaming=true", "memory.resident_layers=1", "memory.stream_from=disk",
    ])
    printed = capsys.readouterr().out
    assert code == 0, printed
    document = json.loads(out.read_text())
    assert document["kind"] == "cpu" and document["date"] and "8b --model" in document["command"]
    assert document["versions"]["torch"] != "none"
    run = document["runs"]["8b"]
    assert [step["step"] for step in run["steps"]] == [1, 2, 3] and all(step["tokens"] == 2 * 48 for step in run["steps"])
    assert all(step["loss"] > 0 and step["grad_norm"] > 0 for step in run["steps"])
    assert run["decided"]["streamed_layers"] == 2 and run["adapter_sha256"]
    assert 0 < scripts.streaming_runs.highest(run) <= 32e6 < run["process_bytes"] < 4e9
    kept = {promise["promise"]: promise["kept"] for promise in document["promises"]}
    assert all(kept.values()) and "the plan for train" in kept and any("process" in name for name in kept)
    assert "BROKEN" not in printed and "step 3: loss" in printed


def test_without_a_gpu_nothing_is_tried(scripts, capsys):
    if describe_machine().kind == "cuda":
        pytest.skip("there is a GPU")
    assert scripts.prove_streaming.main(["gpu"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_what_is_known_is_not_run_again(scripts, tmp_path, monkeypatch):
    prove, ran = scripts.prove_streaming, []

    def perform(run, keep_in=None):
        ran.append(run.name)
        return {"settings": list(run.settings), "code": 0}

    monkeypatch.setattr(prove, "perform", perform)
    options = Namespace(proof="gpu", out=tmp_path / "gpu.json", again=False, minutes=1.0, keep=None)
    device, run = describe_machine("cpu"), scripts.streaming_runs.Run("a", "model", ("lora.r=8",), 8)
    for wanted, times in ((run, 1), (run, 1), (prove.replace(run, settings=("lora.r=4",)), 2)):
        prove._Evidence(options, device, "command").perform(wanted)
        assert len(ran) == times
    prove._Evidence(options, prove.replace(device, name="another"), "command").perform(run)
    assert len(ran) == 3
    options.minutes = 0.0
    assert not prove._Evidence(options, device, "command").has_time


def test_a_promise_that_is_not_kept_shows(scripts, tmp_path, capsys):
    prove = scripts.prove_streaming
    options = Namespace(proof="8b", out=tmp_path / "8b.json", again=False, minutes=1.0, keep=None)
    result = {"planned_bytes": {"train": 1000, "save": 10}, "measured_bytes": {"save": 99}, "planned_margin_bytes": 10}
    for measured, kept in ((1000, True), (1010, True), (1011, False), (952, False), (953, True)):
        result["measured_bytes"]["train"] = measured
        assert [promise[1] for promise in prove._plan_promises(result)] == [kept], measured
    assert not prove._plan_promises({**result, "measured_bytes": {}})[0][1]
    assert [prove._at_most("it", size, 10)[1] for size in (0, 10, 11)] == [False, True, False]
    assert prove._Evidence(options, describe_machine("cpu"), "command").close([("one", True, ""), ("two", False, "")]) == 1
    assert capsys.readouterr().out.count("BROKEN") == 1


def test_the_time_of_copies_that_computation_covers(scripts):
    def event(name, start, end, device="DeviceType.CUDA"):
        times = dict(start_ns=lambda: start, duration_ns=lambda: end - start)
        return SimpleNamespace(name=lambda: name, device_type=lambda: device, **times)

    found = scripts.copy_overlap.found([
        event("Memcpy HtoD (Pinned -> Device)", 0, 100), event("Memcpy HtoD (Pinned -> Device)", 50, 120), event("gemm", 60, 80),
        event("gemm", 70, 110), event("gemm", 200, 300), event("Memcpy DtoH", 0, 100), event("mm", 0, 120, "DeviceType.CPU"),
    ])
    assert found["copy_seconds"] == pytest.approx(120e-9) and found["hidden_seconds"] == pytest.approx(50e-9)
    assert found["kernel_seconds"] == pytest.approx(150e-9) and found["hidden_share"] == pytest.approx(50 / 120, abs=1e-4)
    assert scripts.copy_overlap.found([])["hidden_share"] is None
