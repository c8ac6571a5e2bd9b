"""A quantised base on the disk: what it is the same as, and its layers, read block by block.

Nothing is quantised here; `qlora.engine.quantise` makes what is opened here. See `qlora.engine.shelf` for the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora.engine import shelf
from qlora.engine.arena import Layout
from qlora.engine.shelf import clear_stores, list_stores
from qlora.errors import StoreError
from qlora.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["BaseStore", "clear_stores", "find_store", "identity_of", "list_stores", "look_up"]

_CHUNK = 2**24
# Fields of a config that say nothing about the weights.
_VOLATILE = ("transformers_version", "_name_or_path", "name_or_path", "use_cache", "dtype", "torch_dtype", "attn_implementation",
             "_attn_implementation")


class BaseStore:
    """A base that is open for reading. Layers can be read from several threads at once.

    Attributes:
        folder: where it is.
        identity: what it is the same as, see `identity_of`.
        layouts: one a layer; layers that are alike share the object.
        rest_layout: of everything outside of the layers.
        size_bytes: of its files.
        num_parameters: of the model, 4-bit weights counted one by one.
        read_layers: how many layers have been read since it was opened.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        layouts = [Layout.from_json(document) for document in manifest["layouts"]]
        self.layouts = tuple(layouts[layer["layout"]] for layer in manifest["layers"])
        self.rest_layout = Layout.from_json(manifest["rest"]["layout"])
        self.size_bytes: int = manifest["layers_bytes"] + manifest["rest_bytes"]
        self.num_parameters: int = manifest["num_parameters"]
        self.read_layers = 0
        self._offsets = [layer["offset"] for layer in manifest["layers"]]
        self._checksums = [layer["crc32"] for layer in manifest["layers"]]
        self._rest_checksum = manifest["rest"]["crc32"]
        self._mapped: mmap.mmap | None = None
        self._file = open(folder / shelf.LAYERS, "rb", buffering=0)  # noqa: SIM115 (open until close)
        self._lock = threading.Lock()
        self._verified: set[int] = set()
        self._rest: dict[str, torch.Tensor] | None = None
        self._hold = shelf.Hold(folder)

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def read_layer(self, number: int, block: torch.Tensor) -> None:
        """Read a layer into a block of host memory; from its first reading on it is known to be whole.

        Args:
            block: uint8, `layouts[number].size_bytes` long, on the CPU; it should begin at a page.

        Raises:
            StoreError: it is damaged, and then will be made anew at the next start; or it cannot be read.
        """
        size = self.layouts[number].size_bytes
        assert block.dtype == torch.uint8 and block.numel() == size and block.is_contiguous() and block.device.type == "cpu"
        view = memoryview(block.numpy())
        try:
            num_read = self._read(view, self._offsets[number])
        except OSError as error:
            raise self._unreadable(f"layer {number}", error) from error
        self.read_layers += 1
        if num_read < size:
            raise self._damaged(f"layer {number} ends after {num_read:,} of {size:,} bytes")
        if number not in self._verified:
            if zlib.crc32(view) != self._checksums[number]:
                raise self._damaged(f"the checksum of layer {number} is wrong")
            self._verified.add(number)

    def rest(self) -> dict[str, torch.Tensor]:
        """Everything outside of the layers, by its name in the model. The tensors are views of the mapped file: they take
        memory as they are read, and what is written to them does not reach the file.

        Raises:
            StoreError: as `read_layer`.
        """
        with self._lock:
            if self._rest is None:
                self._rest = self.rest_layout.views(self._map_rest())
            return dict(self._rest)

    def let_go(self) -> None:
        """Give back the memory that parts of `rest` took when they were read; they are read again when they are needed."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files. Tensors of `rest` stay good."""
        self._file.close()
        self._rest = None
        self._hold.release()

    def _read(self, view: memoryview, offset: int) -> int:
        """Bytes read, fewer than asked for at the end of the file. The interpreter's lock is free meanwhile."""
        done = 0
        while done < len(view):
            if hasattr(os, "preadv"):
                num = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            else:  # Windows has no reads at a place
                with self._lock:
                    self._file.seek(offset + done)
                    num = self._file.readinto(view[done:]) or 0
            if num == 0:
                break
            done += num
        return done

    def _map_rest(self) -> torch.Tensor:
        path, size = self.folder / shelf.REST, self.rest_layout.size_bytes
        try:
            with open(path, "rb") as file:
                # A private mapping: torch has no read-only tensors, and a write by mistake must not reach the file.
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
                checksum = 0
                while chunk := file.read(_CHUNK):  # read and not touched, so that it takes no memory
                    checksum = zlib.crc32(chunk, checksum)
        except ValueError as error:  # mmap's, of a file that is too short
            raise self._damaged(f"{shelf.REST} is too short") from error
        except OSError as error:
            raise self._unreadable(shelf.REST, error) from error
        if checksum != self._rest_checksum:
            raise self._damaged(f"the checksum of {shelf.REST} is wrong")
        self._mapped = mapped
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def _damaged(self, reason: str) -> StoreError:
        shelf.mark_damaged(self.folder, reason)
        return StoreError(
            f"The quantised copy of {shelf.short_name(self.identity)} in {self.folder} is damaged: {reason}.",
            "The same command repairs it. If this happens again, look at the disk, or set QLORA_CACHE to another one.")

    def _unreadable(self, what: str, error: OSError) -> StoreError:
        return StoreError(f"{what} of the quantised base in {self.folder} cannot be read: {error.strerror or error}.",
                          "Look at the disk that it is on; then the same command goes on from the last checkpoint.")


# --- what a base is ----------------------------------------------------------------------------------------------------


def identity_of(
    base: str, *, weights: str, config: PreTrainedConfig, precision: Precision, revision: str | None = None, seed: int = 0,
    device_name: str = "cpu",
) -> dict[str, Any]:
    """All that the bytes of a quantised base follow from, as plain JSON values: equal identities, equal bytes.

    Args:
        base: a folder or a Hub id. Of a folder, names, sizes and times of its files count; of a model on the Hub, the commit,
            None where neither the Hub nor the cache of its client tells it.
        device_name: what it is quantised on; CUDA's kernel need not round as the CPU's does.
    """
    if weights == "random":
        source: dict[str, Any] = {"seed": seed}
    elif Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
        files = [path for path in sorted(Path(base).iterdir()) if path.name == "config.json" or ".safetensors" in path.name]
        source = {"files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]}
    else:
        source = {"commit": _commit(base, revision)}
    fields = {key: value for key, value in json.loads(config.to_json_string(use_diff=False)).items() if key not in _VOLATILE}
    return {
        "format": shelf.FORMAT, "base": base, "weights": weights, "source": source, "config": shelf.digest(fields),
        "quantiser": {"type": "nf4", "blocksize": 64, "double": True, "device": torch.device(device_name).type},
        "compute": precision.compute, "bitsandbytes": ".".join(version("bitsandbytes").split(".")[:2]),
    }


def find_store(identity: Mapping[str, Any]) -> BaseStore | None:
    """The kept base of this identity, open; None where there is none that is whole."""
    return look_up(identity)[0]


def look_up(identity: Mapping[str, Any]) -> tuple[BaseStore | None, str]:
    """The kept base, and why there is none; "" where there never was one."""
    folder = shelf.folder_of(identity)
    if folder.is_dir():
        try:
            manifest = shelf.read_manifest(folder)
            if manifest["identity"] != identity:
                return None, "it is of another base"
            store = BaseStore(folder, manifest)
        except ValueError as error:
            return None, str(error)
        except OSError as error:
            return None, f"it cannot be opened ({error.strerror or error})"
        with contextlib.suppress(OSError):
            os.utime(folder / shelf.MANIFEST)  # when it was used last
        return store, ""
    if identity["source"].get("commit", "") is None:
        return _of_any_commit(identity)
    others = shelf.other_versions(identity)
    return None, f"the copy that is kept differs in: {others[0]}" if others else ""


def _of_any_commit(identity: Mapping[str, Any]) -> tuple[BaseStore | None, str]:
    """Without a network, and with the 16-bit weights gone from the Hub's cache: the copy used last."""
    for shelved in list_stores():
        with contextlib.suppress(ValueError):
            kept = shelf.read_manifest(shelf.bases_home() / shelved.name)["identity"]
            if "commit" in kept["source"] and {**kept, "source": identity["source"]} == identity:
                return look_up(kept)
    return None, ""


def _commit(base: str, revision: str | None) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    try:
        path = Path(hf_hub_download(base, "config.json", revision=revision))
    except (EntryNotFoundError, OfflineModeIsEnabled, OSError):
        return None
    return path.parent.name
