"""Ways in which the newest checkpoint can be bad. Each is told that folder, and that of the one before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

_ADAPTER, _STATE = "adapter_model.safetensors", "trainer_state.json"


def cut(path: Path, share: float = 0.5) -> None:
    """The end is missing."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_a_byte(path: Path, share: float = 0.8) -> None:
    """One byte is another one; the size is the same."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 0xFF
    path.write_bytes(bytes(content))


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


CASES: dict[str, Callable[[Path, Path], object]] = {
    f"{_STATE} missing": lambda folder, _: (folder / _STATE).unlink(),
    f"{_STATE} empty": lambda folder, _: (folder / _STATE).write_bytes(b""),
    f"{_STATE} cut": lambda folder, _: cut(folder / _STATE),
    "adapter missing": lambda folder, _: (folder / _ADAPTER).unlink(),
    "adapter cut": lambda folder, _: cut(folder / _ADAPTER),
    "an empty folder": lambda folder, _: _empty_folder(folder),
    "optimizer.pt cut": lambda folder, _: cut(folder / "optimizer.pt"),
    "optimizer.pt missing": lambda folder, _: (folder / "optimizer.pt").unlink(),
    "rng_state.pth cut": lambda folder, _: cut(folder / "rng_state.pth"),
    "rng_state.pth missing": lambda folder, _: (folder / "rng_state.pth").unlink(),
    "scheduler.pt missing": lambda folder, _: (folder / "scheduler.pt").unlink(),
    "adapter of another step": lambda folder, older: shutil.copy(older / _ADAPTER, folder / _ADAPTER),
    "one byte of the adapter flipped": lambda folder, _: flip_a_byte(folder / _ADAPTER),
    "manifest cut": lambda folder, _: cut(folder / "manifest.json"),
    "one byte of the manifest flipped": lambda folder, _: flip_a_byte(folder / "manifest.json"),
    "a file more": lambda folder, _: (folder / "more.pt").write_bytes(b"more"),
}
# What a message about it names.
NAMED: dict[str, list[str]] = {
    name: [next((file for word, file in (("adapter", _ADAPTER), ("manifest", "manifest.json"), ("an empty", "manifest.json"),
                                        ("a file", "more.pt")) if word in name), name.split(" ")[0])]
    for name in CASES
}
