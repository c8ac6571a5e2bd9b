"""What the machine must have before a model is loaded: disk, RAM, folders that can be written, a driver, known libraries.

Every check has the number that is needed and the number that is there, and all are made before any is reported: a person who
has to free a disk wants to hear of the RAM as well.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora.errors import HardwareError, OutputError
from qlora.hardware import Device
from qlora.home import cache_home
from qlora.training.figures import Figures, find_figures
from qlora.training.run_folder import find_run
from qlora.units import MIB, format_bytes

if TYPE_CHECKING:
    from qlora.architecture import Architecture
    from qlora.planning.plan import Plan
    from qlora.training.setup import Setup

# Beside checkpoints and adapter: the tokenizer (some have over 30 MB), plots and reports.
_OTHER_RESULTS_BYTES = 64 * MIB
# One line of metrics.jsonl has 200 to 300 bytes.
_BYTES_PER_STEP = 512


@dataclass(frozen=True)
class Check:
    """One thing that a run needs.

    Attributes:
        needed, there: what the run asks for and what was found, for people to read, with their units.
        fix: what helps where it is not `ok`.
        level: "error" stops a run that is not `ok`; "warning" is said, and the run goes on.
        storage: about files and folders.
    """

    name: str
    needed: str
    there: str
    ok: bool
    fix: str = ""
    level: Literal["error", "warning"] = "error"
    storage: bool = False

    @property
    def stops(self) -> bool:
        """Whether a run cannot begin."""
        return not self.ok and self.level == "error"

    @property
    def line(self) -> str:
        """The check in one line."""
        return f"{self.name}: needed {self.needed}; found {self.there}"


@dataclass(frozen=True)
class Space:
    """Bytes that something will take under a path. `fix` frees them."""

    what: str
    path: Path
    size_bytes: int
    fix: str


def check_machine(setup: Setup, folder: Path, *, resuming: bool, figures: Figures | None = None) -> list[Check]:
    """Hold the machine against what a run needs. Creates nothing that stays.

    Args:
        folder: the run folder, which need not be there yet.
        resuming: the run goes on there, and what it has written counts towards what it needs.
        figures: what is there; None to look.
    """
    figures = figures or find_figures(setup.device)
    spaces = [_space_of_run(setup.plan, folder, resuming), *_space_of_download(setup, figures.hub_cache)]
    return [
        *_check_disks(spaces, figures), _check_ram(setup.plan, figures), *_check_folders(spaces),
        *_check_driver(setup.device, figures), *_check_versions(figures),
    ]


def check_before_run(setup: Setup) -> list[Check]:
    """The same where no run is to begin: for the folder that one would have, the question whether it may have it included."""
    try:
        found = find_run(setup.recipe)
    except OutputError as error:
        needed = "one that is new, empty or of an unfinished run"
        return [Check("run folder", needed, error.problem, ok=False, fix=error.fix, storage=True)]
    return check_machine(setup, found.path, resuming=found.unfinished)


def refuse(checks: Sequence[Check]) -> None:
    """Stop where something that a run cannot do without is missing.

    Raises:
        OutputError, HardwareError: with every such check and what helps; the first where all of them are about files.
    """
    failed = [check for check in checks if check.stops]
    if not failed:
        return
    problem = "This machine lacks what the run needs." + "".join(f"\n  {check.line}." for check in failed)
    fix = failed[0].fix if len(failed) == 1 else "\n".join(f"{check.name}: {check.fix}" for check in failed)
    raise (OutputError if all(check.storage for check in failed) else HardwareError)(problem, fix)


def warnings(checks: Sequence[Check]) -> list[str]:
    """One line for each check that is not as it should be and stops nothing."""
    return [f"{check.line}. {check.fix}" for check in checks if not check.ok and not check.stops]


# --- disk --------------------------------------------------------------------------------------------------------------


def _space_of_run(plan: Plan, folder: Path, resuming: bool) -> Space:
    size_bytes = plan.disk_bytes + _OTHER_RESULTS_BYTES + _BYTES_PER_STEP * (plan.num_steps or 0)
    if resuming:
        size_bytes = max(_OTHER_RESULTS_BYTES, size_bytes - _size_of(folder))
    return Space("the run", folder, size_bytes, "Free space there, or set output.dir to a folder on a larger disk.")


def _space_of_download(setup: Setup, cache: Path) -> list[Space]:
    """The weights, where they are on the Hub and not yet here."""
    recipe = setup.recipe.model
    if recipe.weights == "random" or Path(setup.base).expanduser().is_dir():
        return []
    size_bytes = download_bytes(setup.base, recipe.revision, setup.architecture, cache)
    fix = "Free space there, or set HF_HOME to a folder on a larger disk."
    return [Space(f"the download of {setup.base}", cache, size_bytes, fix)] if size_bytes else []


def download_bytes(base: str, revision: str | None, architecture: Architecture, cache: Path) -> int:
    """What is still to be fetched of the weights of a model on the Hub; 0 where all of them are cached."""
    from huggingface_hub import try_to_load_from_cache

    from qlora.model.safe_files import INDEX

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(base, name, cache_dir=cache, revision=revision)
        return found if isinstance(found, str) else None  # there is a third answer: known not to exist

    if cached("model.safetensors"):
        return 0
    size_bytes, index = _stored_bytes(architecture), cached(INDEX)
    if index is None:
        return size_bytes
    try:
        document = json.loads(Path(index).read_text(encoding="utf-8"))
        shards = sorted(set(document["weight_map"].values()))
        size_bytes = int(document.get("metadata", {}).get("total_size", size_bytes))
        return size_bytes * sum(cached(shard) is None for shard in shards) // len(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return size_bytes  # a damaged index is fetched again, and so may be all else


def _stored_bytes(architecture: Architecture) -> int:
    """Weights are published in 16 bits, or in 4 where the checkpoint is quantised already."""
    if architecture.stored_quantisation is None:
        return 2 * architecture.num_parameters
    return architecture.quantised_bytes + 2 * (architecture.num_parameters - architecture.quantised_parameters)


def _check_disks(spaces: Sequence[Space], figures: Figures) -> list[Check]:
    """One check for each file system: what goes to the same one must fit there together."""
    by_system: dict[int, list[Space]] = {}
    free: dict[int, int] = {}
    for space in spaces:
        system, free_bytes = figures.disk(_nearest(space.path))
        by_system.setdefault(system, []).append(space)
        free[system] = free_bytes
    return [
        Check(
            name="disk", needed=" and ".join(f"{format_bytes(space.size_bytes)} for {space.what}" for space in group),
            there=f"{format_bytes(free[system])} free at {_nearest(group[0].path)}",
            ok=sum(space.size_bytes for space in group) <= free[system], fix=" ".join(space.fix for space in group), storage=True,
        )
        for system, group in by_system.items()
    ]


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(os.path.abspath(path.expanduser()))
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


# --- folders -----------------------------------------------------------------------------------------------------------


def _check_folders(spaces: Sequence[Space]) -> list[Check]:
    """Each can be written; plans and receipts are only remembered, so their folder stops nothing."""
    run, *download = spaces
    checks = [_check_folder("run folder", run.path, "Set output.dir to a folder you may write to.")]
    checks += [_check_folder("Hub's cache", space.path, "Set HF_HOME to a folder you may write to.") for space in download]
    fix = "Plans and receipts are not kept. Set QLORA_CACHE to a folder you may write to."
    return [*checks, _check_folder("own cache", cache_home(), fix, level="warning")]


def _check_folder(name: str, path: Path, fix: str, level: Literal["error", "warning"] = "error") -> Check:
    nearest = _nearest(path)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            there, ok = "write access", True
    except OSError as error:  # asking for permissions is not enough: a disk may be read-only, for root as well
        there, ok = f"none: {nearest} cannot be written ({error.strerror or error})", False
    return Check(name, f"write access to {path}", there, ok, fix, level, storage=True)


# --- RAM, driver, libraries --------------------------------------------------------------------------------------------


def _check_ram(plan: Plan, figures: Figures) -> Check:
    smaller = "set memory.budget to less, so that a smaller plan is made" if plan.kind == "cpu" else "name a smaller model"
    return Check(
        "RAM", f"{format_bytes(plan.host_peak_bytes)} at its highest",
        f"{format_bytes(figures.ram_bytes)} free or held by this program",
        ok=plan.host_peak_bytes <= figures.ram_bytes, fix=f"Close other programs, or {smaller}.",
    )


def _check_driver(device: Device, figures: Figures) -> list[Check]:
    """A driver runs programs for its own CUDA and older ones, and within one major version newer ones too, but for what they
    compile on the spot (NVIDIA, "CUDA Compatibility", minor version compatibility).
    """
    if device.kind != "cuda" or figures.driver_cuda is None or figures.torch_cuda is None:
        return []
    needed, there = (".".join(map(str, version)) for version in (figures.torch_cuda, figures.driver_cuda))
    too_old = figures.driver_cuda[0] < figures.torch_cuda[0]
    return [Check(
        "GPU driver", f"one for CUDA {needed}, which torch was built with", f"one for CUDA {there}",
        figures.driver_cuda >= figures.torch_cuda, f"Update NVIDIA's driver, or install torch for CUDA {there}.",
        level="error" if too_old else "warning",
    )]


def _check_versions(figures: Figures) -> list[Check]:
    """One check for each library that is not of a version that was tested; one for all where there is none."""
    checks = []
    for requirement in figures.requirements:
        version = figures.versions.get(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            checks.append(Check(
                f"version of {requirement.name}", str(requirement.specifier), version or "none",
                ok=False, fix=f'Others were not tested: pip install "{requirement.name}{requirement.specifier}"', level="warning",
            ))
    num = len(figures.requirements)
    if num and not checks:
        checks.append(Check("versions", f"{num} libraries within tested ranges", f"{num}", ok=True, level="warning"))
    return checks
