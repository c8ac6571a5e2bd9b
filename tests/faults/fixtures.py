"""Fixtures of the fault tests; a test module takes them with `pytest_plugins = ["faults.fixtures"]`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.lab import Lab
from faults.runner import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The warm parent of all runs."""
    if not hasattr(os, "fork") or not Path("/proc/self/fd").is_dir():
        pytest.skip("faults are injected into forks of one process, which takes Linux")
    warm = Zygote(tmp_path_factory.mktemp("zygote"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def lab(zygote: Zygote, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Where runs are made, with the outcomes that are known already."""
    return Lab(zygote, tmp_path_factory.mktemp("lab"), small_model)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`row("disk full", "went on", runs=2)`: what happened, for the table of faults (see `faults.table`)."""

    def add(fault: str, outcome: str, runs: int = 1) -> None:
        record_property("fault", [fault, outcome, runs])

    return add


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that makes a file system of so many bytes, or that changes its size or mode: only root may."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        words = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
