"""Look at the files of a base before they are loaded: weights as safetensors alone, all in their own folder, and no adapter
among them.

A pickle can run code when it is loaded. The loader refuses one by name, but follows the index of a sharded model wherever it
leads, and puts an adapter that lies beside the weights onto the base without a word.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from qlora.errors import ModelError

INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Left by a trainer; never read as weights.
_OF_TRAINERS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
# Names of shards are plain: "model-00001-of-00004.safetensors". No folders, no drives, nothing hidden.
_SHARD = re.compile(r"[A-Za-z0-9_][\w.-]*\.safetensors")


def refuse_unsafe_files(base: str, *, revision: str | None = None) -> None:
    """Refuse a base that could not be loaded without running what is in it, or that would not be the base that was named.

    A folder without any weights passes: a plan needs none. Of a model on the Hub, the list of weights is fetched, or taken from
    the cache.

    Raises:
        ModelError: weights as pickle, an index that names anything but safetensors files beside it, or an adapter.
        OSError: the Hub answers with an error.
    """
    folder = Path(base).expanduser()
    if not folder.is_dir():
        _refuse_unsafe_on_hub(base, revision)
        return
    if (folder / _ADAPTER).is_file():
        raise _with_adapter(base, f"Move {_ADAPTER} and the adapter's weights out of that folder to train the bare base.")
    names = sorted(path.name for path in folder.iterdir())
    if not any(".safetensors" in name for name in names) and (pickles := [name for name in names if _is_pickle(name)]):
        raise pickled(base, pickles)
    for name in names:
        if name.endswith(".safetensors.index.json"):
            _refuse_strays(base, folder / name)
    _refuse_other_names(base, folder / "config.json")


def pickled(base: str, names: Sequence[str] = ()) -> ModelError:
    """Weights that are there as pickle only, and the command that converts them without running what is in them."""
    target = f"{Path(base).expanduser().name}-safetensors"
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"old, new = {json.dumps(base)}, {json.dumps(target)}; "
        'M.from_pretrained(old, dtype="auto", weights_only=True).save_pretrained(new); '
        "T.from_pretrained(old).save_pretrained(new)"
    )
    shown = f" ({', '.join(names[:3])})" if names else ""
    return ModelError(
        f"{base} holds its weights as pickle{shown}, which can run code when it is loaded; only safetensors are read here.",
        f"Convert them once; this reads numbers and runs nothing:\n  {shlex.join(['python', '-c', code])}\n"
        f"Then set model.base to the folder {target}.",
    )


# --- details -----------------------------------------------------------------------------------------------------------


def _is_pickle(name: str) -> bool:
    return name.endswith(_PICKLES) and not name.startswith(_OF_TRAINERS)


def _with_adapter(base: str, fix: str) -> ModelError:
    return ModelError(
        f"{base} holds an adapter ({_ADAPTER}). The loader would put it onto the base, or take the base that it names instead.",
        fix,
    )


def _refuse_strays(base: str, index: Path) -> None:
    """Every shard must be a safetensors file in the folder of its index."""
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{base}: {index.name} cannot be read as a list of weights ({type(error).__name__}).",
                         "Download or save the model again.") from error
    strays = sorted({repr(name) for name in names if not (isinstance(name, str) and _SHARD.fullmatch(name))})
    if strays:
        raise ModelError(
            f"{base}: {index.name} names {', '.join(strays[:3])}; only safetensors files in the model's own folder are read.",
            "Do not use this copy of the model; download it again from where its authors publish it.",
        )


def _refuse_other_names(base: str, config: Path) -> None:
    """config.json may name the file of the weights itself."""
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # whoever reads the config says what is wrong with it
    if name is not None and not _SHARD.fullmatch(str(name).removesuffix(".index.json")):
        raise ModelError(
            f"{base}: config.json names {str(name)!r} as its weights; only safetensors files in the model's own folder are read.",
            "Take transformers_weights out of config.json.",
        )


def _refuse_unsafe_on_hub(base: str, revision: str | None) -> None:
    if _from_hub(base, _ADAPTER, revision) is not None:
        raise _with_adapter(base, "Name the model that the adapter was trained on, or one that it has been merged into.")
    index = _from_hub(base, INDEX, revision)
    if index is not None:
        _refuse_strays(base, index)


def _from_hub(base: str, name: str, revision: str | None) -> Path | None:
    """A small file of a model on the Hub, by way of the cache; None where it has none, or where there is no network and the
    file is not cached, as the weights that it would list are not.

    Raises:
        OSError: of the Hub's client, for everything else.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(base, name, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
