"""An adapter on this disk: what its folder must hold before anything of it is loaded, and which base it belongs to.

The folder may come from a stranger. Its config is read as plain JSON, and what could make a library import a module, read a
pickle or change the base is refused; the weights are safetensors or nothing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import ModelError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RESOLVED, REPORT = "resolved.json", "report.json"
_LARGEST_DOCUMENT_BYTES = 32 * 2**20
_NAME_THE_BASE = "Name its base, a Hub id or a folder: --base MODEL"

# Other starts (PiSSA, OLoRA, CorDA, LoftQ, ...) take something out of the base's weights when the adapter is put on, which cannot
# be done in 4 bits; and some have PEFT read a pickle that the config names (peft 0.21, tuners/lora/corda.py).
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote down of itself, beside its adapter.

    Attributes:
        folder: where the documents are: the run folder, or run/ in what was pushed.
        is_run_folder: the run folder itself, on the machine that made it, so that paths in it may still lead somewhere.
        resolved, report: resolved.json and report.json; empty where they are missing.
    """

    folder: Path
    is_run_folder: bool
    resolved: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, key: str) -> Any:
        """The value that the run decided for `section.setting`; None where that is not known."""
        return _within(self.resolved, "settings", key, "value")


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files are here and whole.

    Attributes:
        name: the Hub id, or the folder as it was named.
        folder: with adapter_config.json, adapter_model.safetensors and, mostly, the tokenizer.
        base: a Hub id, a folder or builtin:tiny. `base_revision` is its commit, branch or tag, None where that is not known.
        revision: the commit on the Hub; None for a folder.
        run: what its run wrote down; None where nothing is there.
    """

    name: str
    folder: Path
    base: str
    base_revision: str | None
    revision: str | None
    run: RunRecord | None


def in_folder(name: str, folder: Path, *, base: str | None = None) -> Adapter:
    """The adapter of a run folder, or in an adapter's own folder.

    Raises:
        ModelError: there is none, the run is not finished, it is no adapter that can be loaded, or its base is not known.
    """
    for place in (folder / "adapter", folder):
        if (place / CONFIG).is_file():
            _refuse_links(place)
            return describe(name, place, base=base)
    raise _without_adapter(folder)


def describe(name: str, folder: Path, *, base: str | None = None, revision: str | None = None) -> Adapter:
    """What the files of an adapter say, checked.

    Args:
        base: goes before what the adapter names.
        revision: the commit, of an adapter from the Hub. Paths in such a one mean nothing here.

    Raises:
        ModelError: it is no adapter that can be loaded, or its base is not known.
    """
    config = read_document(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise without_weights(name, [path.name for path in folder.iterdir()])
    refuse_unusable(name, config)
    run = _record_of(folder, from_hub=revision is not None)
    found, found_revision = _base_of(name, config, run, base, from_hub=revision is not None)
    return Adapter(name, folder, found, found_revision, revision, run)


def refuse_unusable(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that this program cannot load, or that could do more than change a few matrices.

    Raises:
        ModelError: says what it is.
    """
    kind, task, start = config.get("peft_type"), config.get("task_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ModelError(f"{name} is {_article(kind)} adapter; only LoRA adapters can be loaded here.",
                         "Use PEFT itself for this one.")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"{name} was made for the task {_shown(task)}, not for writing text (CAUSAL_LM).",
                         "Name an adapter of a language model.")
    if start not in _PLAIN_STARTS:
        raise ModelError(f"{name} was started with {_shown(start)} (init_lora_weights), which changes the base's weights as "
                         "well; on a 4-bit base it would not be what was trained.",
                         "Ask its author for one converted to plain LoRA (PEFT: save_pretrained(..., "
                         "path_initial_model_for_weight_conversion=...)).")
    if config.get("megatron_config"):
        raise ModelError(f"{name} asks for Megatron layers (megatron_config), which are not loaded here.",
                         "Take megatron_config out of adapter_config.json if it was not trained with Megatron.")


def without_weights(name: str, files: list[str]) -> ModelError:
    """An adapter_config.json without adapter_model.safetensors beside it."""
    if PICKLE not in files:
        return ModelError(f"{name} has {CONFIG}, but no {WEIGHTS} beside it.", "Copy or push the adapter again.")
    code = ("import torch; from safetensors.torch import save_file; "
            f'save_file(torch.load("{PICKLE}", weights_only=True), "{WEIGHTS}")')
    return ModelError(
        f"{name} holds its weights as pickle ({PICKLE}), which can run code when it is loaded; only safetensors are read here.",
        "Convert them once, in a folder with the adapter; this reads numbers and runs nothing:\n"
        f"  {shlex.join(['python', '-c', code])}\nThen name that folder.",
    )


def full_model(name: str) -> ModelError:
    """A model where an adapter is wanted."""
    return ModelError(f"{name} holds a full model (config.json), not an adapter ({CONFIG}).",
                      "Name a run folder, an adapter folder, or an adapter on the Hub.")


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: it cannot be read as one.
    """
    try:
        if path.stat().st_size > _LARGEST_DOCUMENT_BYTES:
            raise ValueError("far too large")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__}, not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {_shown(getattr(error, 'strerror', None) or error)}.",
                         "Copy the adapter again" + ("." if path.name == CONFIG else "; or remove that file, which is not needed "
                         "to load it.")) from error
    return document


# --- details -----------------------------------------------------------------------------------------------------------


def _without_adapter(folder: Path) -> ModelError:
    """What a folder holds that has no adapter."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {RESOLVED, "progress.json"} & names:
        return ModelError(f"The run in {folder} is not finished: it has no adapter yet.",
                          "Run the same `qlora train` command again, which goes on with it; or name one of its checkpoints, "
                          f"{folder / 'checkpoints' / 'checkpoint-N'}, with --base MODEL.")
    if "config.json" in names:
        return full_model(str(folder))
    if names & {WEIGHTS, PICKLE}:
        return ModelError(f"{folder} holds weights of an adapter, but no {CONFIG}.",
                          "Copy the adapter again, with all its files.")
    return ModelError(f"{folder} holds no adapter: neither {CONFIG} nor adapter/{CONFIG} is there.",
                      "Name a run folder that a finished run left behind, or an adapter on the Hub.")


def _refuse_links(folder: Path) -> None:
    """Neither a run nor a download into a folder makes links; what they lead to is not what somebody looked at."""
    links = sorted(path.name for path in folder.rglob("*") if path.is_symlink())
    if links:
        raise ModelError(f"{folder} holds links: {', '.join(links[:3])}.",
                         "Put the files that are meant in their place. What the Hub's client has cached is named by its Hub id.")


def _record_of(folder: Path, *, from_hub: bool) -> RunRecord | None:
    """The documents of the run: in the run folder that an adapter lies in, or in run/ of what was pushed."""
    inside = folder / "run"
    place = inside if (inside / RESOLVED).is_file() or from_hub else folder.parent
    if not (place / RESOLVED).is_file() or (place != inside and folder.name != "adapter"):
        return None
    report = place / REPORT
    return RunRecord(place, place != inside, read_document(place / RESOLVED), read_document(report) if report.is_file() else {})


def _base_of(
    name: str, config: Mapping[str, Any], run: RunRecord | None, given: str | None, *, from_hub: bool
) -> tuple[str, str | None]:
    """The base and its revision: as given, as the run's recipe has it, or as the adapter's config names it."""
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    revision = revision if isinstance(revision, str) and revision else None
    in_recipe = _within(run.resolved, "model", "base") if run else None
    if run and revision is None:
        found, asked = _within(run.resolved, "model", "revision"), _within(run.resolved, "recipe", "model", "revision")
        revision = _text(found) or _text(asked)
    candidates = [text for text in (in_recipe, named) if isinstance(text, str) and text.strip()]
    if given is not None:
        return given, revision if given in candidates else None
    if not from_hub:
        for candidate in candidates:
            if candidate.startswith("builtin:") or Path(candidate).expanduser().is_dir():
                return candidate, revision
    # A pushed adapter's own config comes first: it is what everybody else loads it by.
    for candidate in reversed(candidates) if from_hub else candidates:
        if not _is_path(candidate):
            return candidate, revision
    if candidates:
        raise ModelError(f"{name} was trained on {_shown(candidates[-1])}, a folder that is not on this machine.", _NAME_THE_BASE)
    raise ModelError(f"{name} does not say which model it was trained on.", _NAME_THE_BASE)


def _is_path(text: str) -> bool:
    """Whether it can be nothing but a path; owner/name may be either."""
    return not text.startswith("builtin:") and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", text)


def _within(document: Any, *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _article(kind: Any) -> str:
    shown = _shown(kind or "unnamed")
    return f"{'an' if shown[:1].upper() in 'AEIOU' else 'a'} {shown}"


def _shown(value: Any) -> str:
    """What somebody else wrote, short and safe for a terminal."""
    from qlora.results.facts import printable

    return printable(str(value))[:200]
