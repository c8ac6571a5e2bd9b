"""Where the 16-bit weights of a base come from, one tensor at a time: safetensors files, or noise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora import _compat
from qlora.engine.skeleton import saved_buffers
from qlora.errors import ModelError, NeedsLoaderError
from qlora.model import build
from qlora.model.safe_files import INDEX, pickled, refuse_unsafe_files
from qlora.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SINGLE = "model.safetensors"


class RandomWeights:
    """Noise for every matrix, the same for all of one shape, and zeros for biases; what `build_base` takes for
    `weights="random"`.

    Attributes:
        alike: layers of equal shapes have equal values, so one of them need not be quantised again.
    """

    alike = True

    def __init__(self, config: PreTrainedConfig, precision: Precision, seed: int):
        self._config, self._precision, self._seed = config, precision, seed
        self._tensors: dict[str, torch.Tensor] = {}

    def open(self, skeleton: PreTrainedModel) -> None:
        """Make them: views of one buffer of 8 MiB."""
        plain = build.plain_skeleton(self._config, self._precision)
        self._tensors = build.random_weights(plain, self._precision, self._seed)

    def tensor(self, name: str) -> torch.Tensor | None:
        """A matrix or a bias as a checkpoint would hold it; None for what keeps its usual start, such as norms."""
        return self._tensors.get(name)


class SafetensorsWeights:
    """The weights of a folder, or of a model on the Hub, which is downloaded when they are opened.

    Tensors are read one at a time and their file is let go at once, so that what was read does not stay in memory.
    """

    alike = False

    def __init__(self, base: str, *, revision: str | None = None):
        self.base, self._revision = base, revision
        self._files: dict[str, tuple[Path, str]] = {}

    def open(self, skeleton: PreTrainedModel) -> None:
        """Find every tensor that the model needs.

        Raises:
            NeedsLoaderError: they come in a form that only transformers' loader reads, such as experts to be merged.
            ModelError: weights that are missing, of other shapes, gated, unreachable, or pickled.
        """
        from safetensors import SafetensorError

        try:
            refuse_unsafe_files(self.base, revision=self._revision)
            config = skeleton.config
            if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
                raise NeedsLoaderError(f"{self.base} names the files of its weights itself.")
            self._take_names(skeleton, self._locate())
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise build.explain(error, self.base, "weights") from error

    def tensor(self, name: str) -> torch.Tensor | None:
        """A tensor as the files hold it; None where they do not, which `open` has found to be right."""
        return self._read(*self._files[name]) if name in self._files else None

    def _locate(self) -> list[Path]:
        """The files, in the order in which the loader looks for them: one alone, then those that an index names."""
        folder = Path(self.base).expanduser()
        if not folder.is_dir():
            return self._download()
        if (folder / _SINGLE).is_file():
            return [folder / _SINGLE]
        if (folder / INDEX).is_file():
            return [folder / name for name in _shards(folder / INDEX)]
        raise NeedsLoaderError(f"{self.base} has neither {_SINGLE} nor {INDEX}.")

    def _download(self) -> list[Path]:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(self.base, name, revision=self._revision))

        try:
            try:
                return [fetch(_SINGLE)]
            except EntryNotFoundError:
                return [fetch(name) for name in _shards(fetch(INDEX))]
        except LocalEntryNotFoundError:  # no network, and not in the client's cache
            raise
        except EntryNotFoundError:
            raise pickled(self.base) from None

    def _take_names(self, skeleton: PreTrainedModel, paths: list[Path]) -> None:
        from safetensors import safe_open

        where: dict[str, Path] = {}
        outlines: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a file, not a dict)
                    piece = file.get_slice(key)
                    where[key], outlines[key] = path, (piece.get_dtype(), tuple(piece.get_shape()))
        names, converted = _compat.checkpoint_names(skeleton, sorted(where), build.TEXT_PART_KEYS)
        if converted:
            others = f" and {len(converted) - 1} others" if len(converted) > 1 else ""
            raise NeedsLoaderError(f"{self.base} keeps {converted[0]}{others} in another form than its model.")
        found = {name: (where[key], key) for key, name in names.items()}
        missing, mismatched = [], []
        for aliases, shape in _wanted(skeleton):
            present = [name for name in aliases if name in found]
            if not present:
                missing.append(aliases[0])
                continue
            for name in present:
                dtype, is_shape = outlines[found[name][1]]
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise NeedsLoaderError(f"{self.base} keeps {name} as {dtype}.")
                if is_shape != shape:
                    mismatched.append(name)
            self._files.update(dict.fromkeys(aliases, found[present[0]]))
            if len(present) > 1 and not _equal(self._read(*found[name]) for name in present):
                raise NeedsLoaderError(f"{self.base} says that {' and '.join(present)} are one, and keeps two that differ.")
        build.refuse_missing(self.base, {"missing_keys": _that_count(skeleton, missing), "mismatched_keys": mismatched})

    @staticmethod
    def _read(path: Path, key: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)


# --- details -----------------------------------------------------------------------------------------------------------


def _wanted(skeleton: PreTrainedModel) -> Iterable[tuple[list[str], tuple[int, ...]]]:
    """For each tensor that the model needs, its names, several where it is tied, and its shape in a checkpoint."""
    from transformers.pytorch_utils import Conv1D

    names: dict[int, list[str]] = {}
    parameters = list(skeleton.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        names.setdefault(id(parameter), []).append(name)
    done = set()
    for name, parameter in parameters:
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        state = getattr(parameter, "quant_state", None)
        shape = tuple(parameter.shape if state is None else state.shape)
        holder = skeleton.get_submodule(name.rpartition(".")[0])
        turned = state is not None and issubclass(getattr(holder, "source_cls", object), Conv1D)
        yield names[id(parameter)], shape[::-1] if turned else shape
    for name, buffer in saved_buffers(skeleton).items():
        yield [name], tuple(buffer.shape)


def _that_count(skeleton: PreTrainedModel, missing: list[str]) -> list[str]:
    """Without those that the model's class does not mind."""
    patterns = getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()
    return [name for name in missing if not any(re.search(pattern, name) for pattern in patterns)]


def _equal(tensors: Iterable[torch.Tensor]) -> bool:
    first, *others = tensors
    return all(torch.equal(first, other) for other in others)


def _shards(index: Path) -> list[str]:
    """Names of files, each once. `refuse_unsafe_files` has been over them."""
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
