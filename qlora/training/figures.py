"""What this machine has, as plain figures that `qlora.training.preflight` holds against what a run needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.hardware import Device, host_memory
from qlora.hardware.driver import cuda_of_driver

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Figures:
    """What is there. Sizes in bytes.

    Attributes:
        ram_bytes: RAM that this process holds already or may still take.
        driver_cuda: the newest CUDA that the driver runs, (12, 4); None where it cannot be asked.
        torch_cuda: the CUDA that torch was built with; None for a build without.
        requirements: the libraries that this package asks for, as in pyproject.toml; empty where it is not installed.
        versions: of those that are installed, by the name in the requirement.
        hub_cache: where models from the Hub are kept.
        disk: file system and free bytes of a path that exists.
    """

    ram_bytes: int
    driver_cuda: tuple[int, int] | None
    torch_cuda: tuple[int, int] | None
    requirements: tuple[Requirement, ...]
    versions: Mapping[str, str]
    hub_cache: Path
    disk: Callable[[Path], tuple[int, int]]


def find_figures(device: Device) -> Figures:
    """Look at this machine."""
    import psutil
    from huggingface_hub import constants

    requirements = _requirements()
    return Figures(
        ram_bytes=host_memory()[1] + psutil.Process().memory_info().rss,
        driver_cuda=cuda_of_driver() if device.kind == "cuda" else None,
        torch_cuda=_cuda_of_torch() if device.kind == "cuda" else None,
        requirements=requirements, versions=_versions_of(requirements), hub_cache=Path(constants.HF_HUB_CACHE), disk=_disk,
    )


def _disk(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, shutil.disk_usage(path).free


def _cuda_of_torch() -> tuple[int, int] | None:
    import torch

    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def _requirements() -> tuple[Requirement, ...]:
    from packaging.requirements import Requirement

    try:
        found = [Requirement(text) for text in metadata.requires("qlora") or ()]
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ()
    return tuple(each for each in found if each.marker is None or each.marker.evaluate({"extra": ""}))


def _versions_of(requirements: Sequence[Requirement]) -> dict[str, str]:
    found = {}
    for requirement in requirements:
        try:
            found[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
    return found
