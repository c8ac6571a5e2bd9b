"""From the name of a model to its config: a folder, the catalog, or the Hub. Only config.json is ever read."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.catalog import catalog_config, find_id, nearest_ids
from qlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def find_config(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False, inspect_only: bool = False
) -> PreTrainedConfig:
    """The transformers config of the language model named `base`; of a multimodal model, its text part.

    Looked for in this order: a folder that holds config.json; the catalog, unless a revision is asked for; the Hub,
    from which config.json alone is fetched, or taken from its cache.

    Args:
        base: a folder or a Hub id. `builtin:tiny` must have been resolved to its folder before.
        trust_remote_code: allow a config class that comes with the model.
        inspect_only: let models pass that only read text (BERT and its kin): they can be looked at, not trained here.

    Raises:
        ModelError: not found, gated, unreachable, not a config, unknown to transformers, or no causal language model.
    """
    base = base.strip()
    if base.startswith("builtin:"):
        raise ModelError(f"{base!r} is not the folder of a model.", "The embedded base is written builtin:tiny.")
    folder = Path(base).expanduser()
    id = find_id(base)
    if folder.exists() or not _HUB_ID.fullmatch(base):
        raw, source = _read_config(_config_in(folder, base)), str(folder)
    elif id is not None and revision is None:
        raw, source = catalog_config(id), None
    else:
        raw, source = _read_config(_fetch_config(base, revision)), base
    config = _build_config(base, raw, source, revision, trust_remote_code)
    config = _text_part(base, config, raw)
    config.name_or_path = id if source is None else base
    _check_kind(base, config, inspect_only)
    return config


def cached_commit(base: str, revision: str | None = None) -> str | None:
    """The commit of a model on the Hub that its client's cache holds for a branch, tag or commit: after a model has been loaded,
    the one that it came from. None for a folder, and where nothing is cached.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(base).expanduser().is_dir():
        return None
    try:
        path = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None  # there is a third answer: known not to exist


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether the config is that of a model that predicts the next token, which is all that can be trained here."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return False
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and has_remote_class(config):
        return True
    # BERT and its kin have a causal class too, for use as somebody's decoder; without `is_decoder` they see both sides.
    reads_both_sides = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not reads_both_sides


def has_remote_class(config: PreTrainedConfig) -> bool:
    """Whether the config's own class came with the model, so that its user has trusted that code already."""
    return type(config).__module__.partition(".")[0] == "transformers_modules"


def first_line(error: BaseException) -> str:
    """Type and first line of an upstream error, for use inside one of our messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


# --- finding ----------------------------------------------------------------------------------------------------------


def _config_in(folder: Path, base: str) -> Path:
    if not folder.exists():
        raise ModelError(
            f"There is no folder {folder}, and {base!r} is not written like a Hub id.",
            "Name a folder with config.json, or a model as owner/name.",
        )
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file; a base is a folder with config.json.", f"Name {folder.parent} instead?")
    file = folder / "config.json"
    if file.is_file():
        return file
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        inner = _read_json(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{folder} holds an adapter, not a base: there is adapter_config.json and no config.json.",
            f"Its base is {inner}; name that as model.base." if inner else "Name the base it was trained on.",
        )
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise ModelError(f"{folder} has no config.json (it holds {found}).", "Name the folder the model was saved into.")


def _fetch_config(base: str, revision: str | None) -> Path:
    """Download config.json, or find it in the Hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    near = nearest_ids(base)
    offline_hint = "Go online once, or name a folder that holds the model." + (
        f" Known without a network: {', '.join(near)}." if near else ""
    )
    try:
        return Path(hf_hub_download(base, "config.json", revision=revision))
    except GatedRepoError:
        raise ModelError(
            f"{base} is gated: its owner wants its terms accepted first, and this machine's token has not done that.",
            f"Accept them at https://huggingface.co/{base}, then run `hf auth login`.",
        ) from None
    except RepositoryNotFoundError:
        hint = f"Did you mean {' or '.join(near)}?" if near else "Check the spelling: owner/name."
        raise ModelError(
            f"The Hub has no model {base}, or it is private and this machine's token cannot see it.",
            f"{hint} For a private model run `hf auth login`.",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{base} has no revision {revision!r}.", "Name a branch, a tag or a commit of it.") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            problem = f"{base}{at}: the Hub answered with an error: {first_line(error.__cause__)}"
            raise ModelError(problem, "Try again later; if it names your token, run `hf auth login`.") from None
        problem = f"{base}{at}: the Hub cannot be reached, and its config is not in the cache."
        raise ModelError(problem, offline_hint) from None
    except EntryNotFoundError:
        raise ModelError(
            f"{base}{at} has no config.json; it may hold an adapter or GGUF files only.",
            "Name the 16-bit model it was made from.",
        ) from None
    except HFValidationError as error:
        raise ModelError(f"{base!r} is not a Hub id: {error}", "Write owner/name.") from None
    except HfHubHTTPError as error:
        problem = f"{base}{at}: the Hub answered with an error: {first_line(error)}"
        raise ModelError(problem, "Try again later; if it names your token, run `hf auth login`.") from None
    except OSError as error:
        problem = f"{base}{at}: config.json could not be fetched: {first_line(error)}"
        raise ModelError(problem, offline_hint) from None


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg}.", "Fetch or save the model again: it is damaged."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", "Fetch or save the model again.") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{file} holds a {type(raw).__name__}; a config is a JSON object.", "Save the model again.")
    return raw


def _read_config(file: Path) -> dict[str, Any]:
    raw = _read_json(file)
    if not isinstance(raw.get("model_type"), str):
        raise ModelError(
            f"{file} has no model_type, so nothing says how to build the model.",
            'Add "model_type", for example "llama", or save the model with transformers again.',
        )
    return raw


def _build_config(
    base: str, raw: dict[str, Any], source: str | None, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """`raw` as an object of its class. `source` is where remote code lies, None for the catalog."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = raw["model_type"]
    brings_code = "AutoConfig" in (raw.get("auto_map") or {})
    if kind not in CONFIG_MAPPING and not (brings_code and trust_remote_code):
        if brings_code:
            raise ModelError(
                f"{base}: model type {kind!r} is not part of transformers {transformers.__version__}; the model brings "
                "Python code of its own, which is not run unasked.",
                "Read that code; if you trust it, set model.trust_remote_code=true.",
            )
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=3)
        raise ModelError(
            f"{base}: transformers {transformers.__version__} does not know the model type {kind!r}.",
            (f"Near names: {', '.join(near)}. " if near else "") + "A newer transformers may know it.",
        )
    try:
        if source is None:
            return AutoConfig.for_model(**raw)
        local = {} if brings_code and trust_remote_code else {"local_files_only": True}
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **local)
    except Exception as error:  # config classes check their fields in ways of their own: any type of error comes out
        raise ModelError(
            f"{base}: transformers {transformers.__version__} cannot read its config as {kind!r}: {first_line(error)}",
            "Compare config.json with that of a model of the same family.",
        ) from error


def _text_part(base: str, config: PreTrainedConfig, raw: dict[str, Any]) -> PreTrainedConfig:
    if getattr(config, "is_encoder_decoder", False):
        return config
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:
        raise ModelError(
            f"{base}: the text part of this multimodal model is not clear: {first_line(error)}",
            "Use its text-only sibling.",
        ) from None
    inner = raw.get("text_config")
    if text is not config and "tie_word_embeddings" in raw and "tie_word_embeddings" not in (inner or {}):
        text.tie_word_embeddings = raw["tie_word_embeddings"]  # some families say it once, for the whole model
    return text


def _check_kind(base: str, config: PreTrainedConfig, inspect_only: bool) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    if is_causal(config) or (inspect_only and type(config) in MODEL_MAPPING):
        return
    example = "a causal language model, such as Qwen/Qwen3-0.6B"
    if getattr(config, "is_encoder_decoder", False):
        problem = f"{base} ({config.model_type}) is an encoder-decoder; what is trained here predicts the next token."
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        problem = (
            f"{base} ({config.model_type}) is an encoder: it reads text from both sides and cannot continue it, so "
            "there is no next token to learn."
        )
        example += "; `qlora inspect` still shows its projections"
    else:
        problem = f"{base} ({config.model_type}) has no causal language model class in transformers."
    raise ModelError(problem, f"Name {example}.")
