"""The budget adds up, what the driver says is read right, and sizes are read as people type them."""

import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from qlora.catalog.cards import find_card
from qlora.errors import HardwareError, QloraError
from qlora.hardware import Device, describe_machine, device_from_card, driver, find_device, host, own_gpu_bytes
from qlora.planning.budget import PROGRAM_BYTES, find_budget, read_vram
from qlora.planning.receipts import Receipt, Receipts
from qlora.units import GIB, MIB


def gpu(gib=8.0, others=0.0, capability=(8, 9), **changes):
    """A described device: cards that are not in this machine are looked at, never run on."""
    total = int(gib * GIB)
    return Device(
        kind="cuda", name="NVIDIA GeForce RTX 4060", memory_bytes=total, free_bytes=total - int(others * GIB),
        host_bytes=32 * GIB, host_free_bytes=32 * GIB, num_threads=2, has_bf16=True, capability=capability,
        used_by_others_bytes=int(others * GIB), **changes,
    )


def cpu(gib=32.0, free=24.0):
    return Device("cpu", "a CPU", int(gib * GIB), int(free * GIB), int(gib * GIB), int(free * GIB), 4, True)


@pytest.mark.parametrize("device", [
    gpu(), gpu(others=1.5), gpu(others=0.5, display=True), gpu(others=0.5, windows=True), gpu(24, capability=(12, 0)),
    cpu(), cpu(8, 5), device_from_card(find_card("4090")), device_from_card(None, 6 * GIB),
])
def test_the_parts_add_up(device):
    budget = find_budget(device)
    assert budget.bytes == budget.total_bytes - budget.others_bytes - budget.reserve_bytes
    assert budget.total_bytes == device.memory_bytes and 0 < budget.bytes <= device.memory_bytes
    assert 0 <= budget.context_bytes < budget.bytes and (budget.context_bytes == 0) == (device.kind == "cpu")
    assert budget.reason and "\n" not in budget.reason


def test_what_others_and_the_desktop_take_is_not_ours():
    free = find_budget(gpu()).bytes
    assert find_budget(gpu(others=1)).bytes == free - GIB and "in use by others" in find_budget(gpu(others=1)).reason
    assert find_budget(gpu(others=0.1)).bytes == find_budget(gpu(others=0.11)).bytes <= free - int(0.11 * GIB)  # in steps
    assert find_budget(gpu(display=True)).bytes < free
    assert find_budget(gpu(windows=True, display=True)).bytes < find_budget(gpu(display=True)).bytes


def test_ram_is_what_is_free_less_the_program_and_a_reserve():
    budget = find_budget(cpu(32, 24))
    assert 24 * GIB - 3 * GIB < budget.bytes < 24 * GIB
    assert find_budget(cpu(32, 20)).bytes == budget.bytes - 4 * GIB


def test_what_this_process_holds_of_the_program_is_not_counted_twice(monkeypatch):
    def budget(rss, free):
        monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=rss)))
        return find_budget(cpu(32, free)).bytes

    assert budget(0, 24) == budget(GIB // 2, 23.5)  # before and after torch is loaded
    assert budget(3 * GIB, 21) < budget(0, 24)  # what goes beyond the program is in use


def test_a_card_that_is_not_here_has_all_its_memory():
    device = replace(device_from_card(find_card("4060")), windows=True, display=True)
    assert find_budget(device).bytes == device.memory_bytes


def test_a_stated_size_is_that_size():
    assert find_budget(gpu(24), "8GB").bytes == 8 * GIB
    assert find_budget(gpu(24, others=4, display=True), "8GB").bytes == 8 * GIB
    assert "only 4.00 GiB are free" in find_budget(gpu(8, others=4), "8GB").reason
    rounded = find_budget(gpu(7.65), "8GB")
    assert rounded.bytes == gpu(7.65).memory_bytes and "all 7.65 GiB" in rounded.reason
    assert find_budget(cpu(), "500MB").bytes == 500 * MIB and find_budget(cpu(32), "64GB").bytes == 32 * GIB
    with pytest.raises(HardwareError, match="24.00 GiB, but .* has 8.00 GiB"):
        find_budget(gpu(8), "24GB")


@pytest.mark.parametrize("device, wanted", [
    (gpu(), "100MB"), (gpu(0.25), "auto"), (gpu(8, others=7.8), "auto"), (device_from_card(None, 200 * MIB), "auto"), (cpu(8, 0.2), "auto"),
])
def test_too_little_is_refused_with_both_numbers(device, wanted):
    with pytest.raises(HardwareError) as error:
        find_budget(device, wanted)
    assert error.value.problem.count("iB") >= 2 and error.value.fix


def test_the_context_follows_the_card_until_it_is_measured():
    by_age = [find_budget(gpu(capability=c)).context_bytes for c in ((7, 5), (8, 6), (9, 0), (12, 0))]
    assert by_age == sorted(by_age) and len(set(by_age)) == 4
    seen = {(7, 5): 141 * MIB, (8, 6): 256 * MIB, (12, 0): int(0.71 * GIB)}  # see the table in budget.py
    assert all(find_budget(gpu(capability=c)).context_bytes > size for c, size in seen.items())
    runs = Receipts([
        Receipt("NVIDIA GeForce RTX 4060", "cuda", "m", {"train": 1}, {"train": 1}, context_bytes=size)
        for size in (180 * MIB, 190 * MIB)
    ])
    assert find_budget(gpu(), receipts=runs).context_bytes == 190 * MIB
    assert find_budget(replace(gpu(), name="another"), receipts=runs).context_bytes == find_budget(gpu()).context_bytes


@pytest.mark.parametrize("text, gib, said", [
    ("8", 8, True), ("7.5", 7.5, True), (" 12 ", 12, True), ("8GB", 8, False), ("8 gb", 8, False), ("7.5GiB", 7.5, False),
    ("512MB", 0.5, False),
])
def test_sizes_as_people_type_them(text, gib, said):
    size, note = read_vram(text)
    assert size == gib * GIB and (note is not None) == said
    assert not said or text.strip() in note


def test_a_size_that_looks_like_mib_is_questioned():
    assert "8000MB" in read_vram("8000")[1]


@pytest.mark.parametrize("text", ["0", "0GB", "-8", "-8GB", "", "eight", "8 bananas", "nan", "1e3", "8,5"])
def test_sizes_that_are_none(text):
    with pytest.raises(QloraError) as error:
        read_vram(text)
    assert error.value.fix and ("above zero" in error.value.problem) == text.startswith(("0", "-"))


@pytest.mark.long
def test_the_program_takes_what_the_table_says():
    """Resident memory of a process that has imported what a run imports, a torch product and its threads included."""
    script = (
        "import psutil, torch, datasets, qlora.training.run, qlora.training.trainer, qlora.model.build\n"
        "a = torch.ones(256, 256); a @ a\n"
        "print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.55 * PROGRAM_BYTES < int(done.stdout.split()[-1]) < 1.05 * PROGRAM_BYTES


def test_the_machine_is_described_alike_with_and_without_torch():
    script = (
        "import sys; from qlora.hardware import describe_machine; from qlora.planning.budget import find_budget\n"
        "device = describe_machine(); find_budget(device); from qlora.planning import receipts, speed\n"
        "receipts.Receipts.load().margin(device); assert 'torch' not in sys.modules\n"
        "print(device.kind, device.name, device.num_threads, device.has_bf16, device.capability, device.memory_bytes, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    device = find_device()
    *facts, memory_bytes = done.stdout.strip().split("|")
    assert facts == [str(fact) for fact in (device.kind, device.name, device.num_threads, device.has_bf16, device.capability)]
    assert int(memory_bytes) == pytest.approx(device.memory_bytes, rel=0.005)  # the driver and CUDA count alike, nearly


# --- the driver, which cannot be here -----------------------------------------------------------------------------------


class FakeError(Exception):
    pass


def fake_driver(cards, own=None, display=1):
    """A stand-in for pynvml with cards given as (name, capability, total, reserved, free in MiB)."""
    def entry(i):
        name, capability, total, reserved, free = cards[i]
        return SimpleNamespace(total=total * MIB, reserved=reserved * MIB, free=free * MIB, used=0)

    def display_active(i):
        if display is None:
            raise FakeError("not supported")
        return display

    nvml = ModuleType("pynvml")
    nvml.__dict__.update(
        NVMLError=FakeError, nvmlMemory_v2=2, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards), nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda i: cards[i][0], nvmlDeviceGetCudaComputeCapability=lambda i: cards[i][1],
        nvmlDeviceGetMemoryInfo=lambda i, version=None: entry(i), nvmlDeviceGetDisplayActive=display_active,
        nvmlDeviceGetComputeRunningProcesses=lambda i: [] if own is None else [SimpleNamespace(pid=os.getpid(), usedGpuMemory=own * MIB)],
    )
    return nvml


CARDS = [("NVIDIA GeForce GTX 1660", (7, 5), 6144, 190, 5900), ("NVIDIA GeForce RTX 4060", (8, 9), 8188, 350, 7000)]


def test_what_the_driver_says(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(CARDS[1:], own=300))
    monkeypatch.setattr("qlora.hardware._torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = describe_machine()
    assert (device.kind, device.name, device.capability, device.has_bf16) == ("cuda", "NVIDIA GeForce RTX 4060", (8, 9), True)
    assert device.memory_bytes == (8188 - 350) * MIB and device.display and device.present
    assert device.used_by_others_bytes == (8188 - 350 - 7000 - 300) * MIB  # less what this process holds itself
    assert own_gpu_bytes() == 300 * MIB
    assert find_budget(device).bytes < device.free_bytes  # a desktop is drawn by this card
    assert 0 <= device.free_bytes - find_budget(replace(device, display=False)).bytes < 64 * MIB
    assert describe_machine("cpu").kind == "cpu"


def test_which_card_comes_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(CARDS))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    assert driver.gpu_facts().name.endswith("4060")  # the fastest, as CUDA counts
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert driver.gpu_facts().name.endswith("1660")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert driver.gpu_facts().name.endswith("4060")
    for hidden in ("", "-1", "7"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert driver.gpu_facts() is None


def test_a_driver_that_does_not_answer(monkeypatch):
    nvml = fake_driver(CARDS, display=None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert driver.gpu_facts().display is False
    monkeypatch.setattr(driver, "on_windows", lambda: True)
    assert driver.gpu_facts().display and driver.gpu_facts().windows

    def broken():
        raise FakeError("no driver")

    nvml.nvmlInit = broken
    assert driver.gpu_facts() is None and own_gpu_bytes() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert driver.gpu_facts() is None


@pytest.mark.parametrize("group, base, files", [
    ("0::/user/job", "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
    ("4:memory:/user/job", "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
])
def test_a_container_limits_the_ram(tmp_path, group, base, files):
    limit, used, cache = files
    for folder, size in (("user", "4000"), ("user/job", "max")):
        (tmp_path / base / folder).mkdir(parents=True)
        (tmp_path / base / folder / limit).write_text(size)
        (tmp_path / base / folder / used).write_text("3000")
        (tmp_path / base / folder / "memory.stat").write_text(f"anon 5\n{cache} 500\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"2:cpu:/\n{group}\n")
    assert list(host._control_groups(tmp_path)) == [(4000, 1500)]
    assert list(host._control_groups(tmp_path / "nothing")) == []
