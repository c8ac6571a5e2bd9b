"""What is checked before a model is loaded: each figure of the machine is put below, at and above what a real plan needs."""

import json
from dataclasses import replace

import pytest
from packaging.requirements import Requirement

from qlora.errors import HardwareError, OutputError
from qlora.recipe import build_recipe
from qlora.training.figures import find_figures
from qlora.training.preflight import check_before_run, check_machine, download_bytes, refuse, warnings
from qlora.training.setup import prepare
from qlora.units import GIB, MIB

HUB_ID = "me/large"


@pytest.fixture(scope="module")
def setup(small_model, tmp_path_factory):
    """A real run, planned."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    line = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "the cat sat on the mat"}]}
    rows.write_text("".join(json.dumps(line) + "\n" for _ in range(20)), encoding="utf-8")
    recipe = build_recipe(
        model=str(small_model), data=str(rows), train={"max_steps": 4, "batch": 4}, memory={"device": "cpu"},
        output=str(rows.parent / "run"),
    )
    return prepare(recipe)


@pytest.fixture
def figures(setup, tmp_path):
    """This machine, but with a Hub's cache of its own, RAM to spare, and one disk of 100 GiB."""
    return replace(find_figures(setup.device), hub_cache=tmp_path / "hub", ram_bytes=setup.plan.host_peak_bytes + GIB,
                   disk=lambda path: (1, 100 * GIB))


def with_plan(setup, **values):
    return replace(setup, plan=replace(setup.plan, **values))


def on_hub(setup, num_parameters=4 * GIB):
    """The same run with a base that is on the Hub."""
    return replace(setup, base=HUB_ID, architecture=replace(setup.architecture, num_parameters=num_parameters))


def on_gpu(setup):
    return replace(setup, device=replace(setup.device, kind="cuda", capability=(8, 9)))


def cache_files(cache, files):
    """As the Hub's client lays them out."""
    repo = cache / "models--me--large"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)


def named(checks, name):
    return [check for check in checks if check.name == name]


def failed(checks):
    return [check.name for check in checks if not check.ok]


def test_this_machine_passes_with_what_it_really_has(setup, tmp_path):
    """No figure is put in: the small model needs so little that every machine has it."""
    checks = check_machine(setup, tmp_path / "not" / "there" / "yet", resuming=False)
    assert {"disk", "RAM", "run folder", "own cache"} <= {check.name for check in checks}
    assert not [check.line for check in checks if check.stops]
    refuse(checks)
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_disk_is_enough_or_not_by_one_byte(setup, figures, tmp_path):
    needed = setup.plan.disk_bytes + 64 * MIB + 512 * setup.plan.num_steps

    def checks(free_bytes):
        return check_machine(setup, tmp_path / "run", resuming=False, figures=replace(figures, disk=lambda path: (1, free_bytes)))

    assert not failed(checks(needed))
    short = checks(needed - 1)
    assert failed(short) == ["disk"]
    with pytest.raises(OutputError, match=r"disk: needed \d.* for the run; found \d.* free at .*\n.*output\.dir"):
        refuse(short)


def test_a_larger_plan_needs_more_disk(setup, figures, tmp_path):
    larger = with_plan(setup, disk_bytes=200 * GIB)
    assert failed(check_machine(larger, tmp_path, resuming=False, figures=figures)) == ["disk"]


def test_what_a_run_has_written_counts_when_it_goes_on(setup, figures, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "optimizer.pt").open("wb") as file:
        file.truncate(90 * MIB)
    run = with_plan(setup, disk_bytes=100 * MIB)
    little = replace(figures, disk=lambda path: (1, 80 * MIB))
    assert failed(check_machine(run, tmp_path, resuming=False, figures=little)) == ["disk"]
    assert not failed(check_machine(run, tmp_path, resuming=True, figures=little))


def test_a_download_and_the_run_share_a_disk_or_do_not(setup, figures, tmp_path):
    """8 GiB of weights and 3 GiB of checkpoints fit on two disks of 10 GiB, and not on one."""
    run = with_plan(on_hub(setup), disk_bytes=3 * GIB)
    one = replace(figures, disk=lambda path: (1, 10 * GIB))
    two = replace(figures, disk=lambda path: (1 if path == tmp_path / "run" else 2, 10 * GIB))
    (tmp_path / "run").mkdir()
    [shared] = named(check_machine(run, tmp_path / "run", resuming=False, figures=one), "disk")
    assert not shared.ok and "8.00 GiB for the download of me/large" in shared.needed and "3.06 GiB for the run" in shared.needed
    assert "HF_HOME" in shared.fix and "output.dir" in shared.fix
    apart = named(check_machine(run, tmp_path / "run", resuming=False, figures=two), "disk")
    assert [check.ok for check in apart] == [True, True]


def test_random_weights_are_not_downloaded(setup, figures, tmp_path):
    recipe = setup.recipe.replace({"model.weights": "random"})
    checks = check_machine(replace(on_hub(setup, 500 * GIB), recipe=recipe), tmp_path, resuming=False, figures=figures)
    assert not failed(checks)


@pytest.mark.parametrize(
    ("cached", "left_bytes"),
    [
        ([], 8 * GIB),
        (["model.safetensors"], 0),
        (["model.safetensors.index.json"], 4000),  # the index knows better than twice the parameters
        (["model.safetensors.index.json", "model-1.safetensors"], 3000),
        (["model.safetensors.index.json", *(f"model-{n}.safetensors" for n in (1, 2, 3, 4))], 0),
    ],
)
def test_what_is_cached_is_not_downloaded_again(setup, tmp_path, cached, left_bytes):
    index = {"metadata": {"total_size": 4000}, "weight_map": {f"w{n}": f"model-{n}.safetensors" for n in (1, 2, 3, 4)}}
    cache_files(tmp_path, {name: json.dumps(index) for name in cached})
    assert download_bytes(HUB_ID, None, on_hub(setup).architecture, tmp_path) == left_bytes


def test_a_damaged_index_means_everything(setup, tmp_path):
    cache_files(tmp_path, {"model.safetensors.index.json": '{"weight_map": {}}'})
    assert download_bytes(HUB_ID, None, on_hub(setup).architecture, tmp_path) == 8 * GIB


def test_a_quantised_checkpoint_is_smaller(setup, tmp_path):
    whole = setup.architecture
    stored = replace(whole, stored_quantisation="bitsandbytes")
    assert 0 < download_bytes(HUB_ID, None, stored, tmp_path) < download_bytes(HUB_ID, None, whole, tmp_path)


def test_ram_is_enough_or_not_by_one_byte(setup, figures, tmp_path):
    needed = setup.plan.host_peak_bytes
    assert not failed(check_machine(setup, tmp_path, resuming=False, figures=replace(figures, ram_bytes=needed)))
    short = check_machine(setup, tmp_path, resuming=False, figures=replace(figures, ram_bytes=needed - 1))
    assert failed(short) == ["RAM"]
    with pytest.raises(HardwareError, match="RAM: needed .* at its highest; found .*\n.*memory.budget"):
        refuse(short)


def test_a_file_in_place_of_the_folder_cannot_be_written(setup, figures, tmp_path):
    (tmp_path / "file").write_text("")
    checks = check_machine(setup, tmp_path / "file" / "run", resuming=False, figures=figures)
    assert failed(checks) == ["run folder"]
    with pytest.raises(OutputError, match="file cannot be written .*\n.*output.dir"):
        refuse(checks)


def test_the_hubs_cache_must_be_writable_only_for_a_download(setup, figures, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = replace(figures, hub_cache=tmp_path / "file" / "hub")
    assert failed(check_machine(on_hub(setup), tmp_path, resuming=False, figures=blocked)) == ["Hub's cache"]
    assert not failed(check_machine(setup, tmp_path, resuming=False, figures=blocked))


def test_an_own_cache_that_cannot_be_written_stops_nothing(setup, figures, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file" / "cache"))
    checks = check_machine(setup, tmp_path, resuming=False, figures=figures)
    assert failed(checks) == ["own cache"]
    refuse(checks)
    [line] = warnings(checks)
    assert "QLORA_CACHE" in line


@pytest.mark.parametrize(
    ("driver", "torch", "ok", "stops"),
    [
        ((13, 0), (12, 8), True, False),
        ((12, 8), (12, 8), True, False),
        ((12, 4), (12, 8), False, False),  # within one major version a newer minor one mostly runs
        ((12, 8), (13, 0), False, True),
    ],
)
def test_the_driver_must_know_torchs_cuda(setup, figures, tmp_path, driver, torch, ok, stops):
    known = replace(figures, driver_cuda=driver, torch_cuda=torch)
    [check] = named(check_machine(on_gpu(setup), tmp_path, resuming=False, figures=known), "GPU driver")
    assert (check.ok, check.stops) == (ok, stops)
    assert f"CUDA {torch[0]}.{torch[1]}" in check.needed and f"CUDA {driver[0]}.{driver[1]}" in check.there


def test_no_driver_is_asked_on_a_cpu(setup, figures, tmp_path):
    known = replace(figures, driver_cuda=(1, 0), torch_cuda=(13, 0))
    assert not named(check_machine(setup, tmp_path, resuming=False, figures=known), "GPU driver")
    unknown = replace(figures, driver_cuda=None, torch_cuda=(13, 0))
    assert not named(check_machine(on_gpu(setup), tmp_path, resuming=False, figures=unknown), "GPU driver")


def test_versions_outside_the_declared_ranges_are_said(setup, figures, tmp_path):
    requirements = tuple(map(Requirement, ("torch>=2.11,<2.14", "trl>=1.14,<2", "peft>=0.20,<0.22", "accelerate>=1.10")))
    versions = {"torch": "2.13.0+cpu", "trl": "2.0.1", "accelerate": "1.11.0.dev0"}
    known = replace(figures, requirements=requirements, versions=versions)
    checks = check_machine(setup, tmp_path, resuming=False, figures=known)
    assert failed(checks) == ["version of trl", "version of peft"]
    refuse(checks)
    lines = warnings(checks)
    assert "<2" in lines[0] and "found 2.0.1" in lines[0] and 'pip install "trl' in lines[0] and "found none" in lines[1]


def test_the_declared_ranges_are_read_from_the_package(setup):
    found = find_figures(setup.device)
    names = {requirement.name for requirement in found.requirements}
    assert {"torch", "transformers", "trl", "bitsandbytes"} <= names <= set(found.versions)
    assert "pytest" not in names  # of an extra, which a run does not need


def test_everything_that_is_missing_is_said_at_once(setup, figures, tmp_path):
    (tmp_path / "file").write_text("")
    poor = replace(figures, ram_bytes=1, disk=lambda path: (1, 1))
    checks = check_machine(setup, tmp_path / "file" / "run", resuming=False, figures=poor)
    with pytest.raises(HardwareError) as caught:
        refuse(checks)
    for name in ("disk", "RAM", "run folder"):
        assert f"  {name}: needed" in caught.value.problem and f"{name}: " in caught.value.fix
    assert not warnings(checks)  # what stops the run is not said twice


def test_a_finished_run_is_found_before_it_is_in_the_way(setup, tmp_path):
    done = tmp_path / "done"
    done.mkdir()
    (done / "resolved.json").write_text("{}")
    (done / "report.json").write_text("{}")
    [check] = check_before_run(replace(setup, recipe=setup.recipe.replace({"output.dir": str(done)})))
    assert check.stops and "finished" in check.there and "--fresh" in check.fix


def test_check_shows_what_is_needed_and_what_is_there(setup, tmp_path, capsys):
    from qlora.cli import main

    recipe = setup.recipe
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {recipe.model.base}\ndata: {recipe.data.path}\nmemory: {{device: cpu}}\n"
                    f"train: {{max_steps: 2, batch: 4}}\noutput: {tmp_path / 'out'}\n")
    assert main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "This machine" in shown and "RAM" in shown and "at its highest" in shown and "Ready to train" in shown
    (tmp_path / "out").write_text("in the way")
    assert main(["check", str(path)]) == 2
    shown = capsys.readouterr().out
    assert "run folder: Name a new folder" in shown and "Not ready" in shown
