"""What a push sends: the adapter with tokenizer and template, the model card, and below run/ what the run says of itself.

Files are named one by one. Whatever else lies in a run folder (checkpoints, optimizer state, metrics, rows) stays where it is,
and what is sent is looked through for secrets first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.errors import HubError, OutputError
from qlora.redact import redact
from qlora.results.facts import ModelFacts
from qlora.results.licence import Licence
from qlora.results.model_card import is_unedited, render_card
from qlora.results.report import load_report, render_markdown
from qlora.results.sharing import document_for_others, for_others, name_of

CARD, CARD_BESIDE = "README.md", "MODEL_CARD.md"
ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A tokenizer's files, as transformers and sentencepiece write them.
_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"(spiece|sentencepiece(\.bpe)?)\.model|\w+\.tiktoken|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
)
# Adapters of other tools may have left weights as pickle, which loaders take where there are no others.
_OLD_WEIGHTS = "adapter_model.bin"
# Larger text is a vocabulary.
_MAX_SEARCHED_BYTES = 2**20


@dataclass(frozen=True)
class Item:
    """A file to be sent: its path in the repository, and where its bytes are."""

    path: str
    source: Path | None = None
    made: bytes | None = None

    @property
    def content(self) -> bytes:
        """All of it, read now."""
        return self.made if self.made is not None else self.source.read_bytes()

    @property
    def size_bytes(self) -> int:
        """What the server should list."""
        return len(self.made) if self.made is not None else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Of the content, as hexadecimal digits: the name of a file that is stored apart (LFS)."""
        if self.made is not None:
            return hashlib.sha256(self.made).hexdigest()
        with self.source.open("rb") as file:
            return _digest(file, hashlib.sha256())

    @cached_property
    def blob_id(self) -> str:
        """The git blob id: sha1 over "blob", the size, a zero byte and the content."""
        digest = hashlib.sha1(b"blob %d\0" % self.size_bytes)
        if self.made is not None:
            digest.update(self.made)
            return digest.hexdigest()
        with self.source.open("rb") as file:
            return _digest(file, digest)


@dataclass(frozen=True)
class Parcel:
    """Everything that a push sends.

    Attributes:
        base: what the base is called to others; None where it has no name that means something to them.
        card_by_hand: the card is one that a person has edited in the run folder.
        left_out: names in the adapter's folder that are not sent.
    """

    run: Path
    items: tuple[Item, ...]
    base: str
    card_by_hand: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def card(self) -> Item:
        """The model card."""
        return next(item for item in self.items if item.path == CARD)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(item.size_bytes for item in self.items)


def find_run(folder: Path) -> Path:
    """The run folder that is meant: a finished run's, by its own name or that of its adapter/.

    Raises:
        OutputError: there is no finished run, or it holds links, which could lead anywhere.
    """
    run = folder.parent if folder.name == "adapter" and (folder / ADAPTER_CONFIG).is_file() else folder
    if not run.is_dir():
        raise OutputError(f"{folder} is no folder.", "Name the folder of a finished run, such as runs/quickstart.")
    if not (run / "adapter" / ADAPTER_CONFIG).is_file() or not (run / "report.json").is_file():
        if (run / "resolved.json").is_file():
            raise OutputError(f"The run in {run} is not finished, so it has no adapter to push.",
                              "Run its `qlora train` command again: it goes on from the last checkpoint.")
        raise OutputError(f"{run} holds no finished run: adapter/{ADAPTER_CONFIG} or report.json is missing.",
                          "Name the folder of a finished run, such as runs/quickstart.")
    links = sorted(path.name for path in (run / "adapter").rglob("*") if path.is_symlink())
    if links:  # what they lead to would be sent
        raise OutputError(f"{run / 'adapter'} holds links, which a run does not make: {', '.join(links[:3])}.",
                          "Put the files that are meant in their place, or remove them.")
    return run


def gather(
    run: Path, repo: str, *, base_model: str | None = None, licence: Licence | None = None, samples: bool = False
) -> Parcel:
    """All that is sent of a finished run, see `find_run`.

    Args:
        repo: owner/name, for the card's lines on how to load it.
        base_model: what a base that was a folder is called on the Hub.
        licence: of the base.
        samples: the held-out prompts and answers of the report as well.

    Raises:
        OutputError: the run's own files cannot be read.
        HubError: a file that is to be sent holds a secret.
    """
    summary = load_report(run)
    shared = for_others(summary, repo=repo, samples=samples)
    base = base_model or shared.model.base
    plots = sorted(path.name for path in (run / "plots").glob("*.png"))
    items = [Item(path, source=run / "adapter" / path) for path in _adapter_files(run / "adapter")]
    items += [
        Item(ADAPTER_CONFIG, made=_adapter_config(run / "adapter" / ADAPTER_CONFIG, base, None if base_model else shared.model)),
        Item("run/report.md", made=render_markdown(shared, plots).encode()),
        Item("run/report.json", made=_as_json(shared.to_json())),
        *(Item(f"run/{name}", made=_as_json(document_for_others(read_json(run / name), run)))
          for name in ("resolved.json", "plan.json") if (run / name).is_file()),
        *(Item(f"run/plots/{name}", source=run / "plots" / name) for name in plots),
    ]
    by_hand = _card_by_hand(run / CARD)
    card = by_hand or render_card(
        shared, repo=repo, licence=licence, plots=plots, template=_template(run / "adapter"), samples=samples, base=base_model,
    )
    items.append(Item(CARD, made=card.encode()))
    _refuse_secrets(items)
    sent = {item.path for item in items} | {CARD}
    left_out = sorted(str(path.relative_to(run / "adapter")) for path in (run / "adapter").rglob("*") if path.is_file())
    return Parcel(run, tuple(sorted(items, key=lambda item: item.path)), base, by_hand is not None,
                  tuple(name for name in left_out if name not in sent))


def is_ours(path: str) -> bool:
    """Whether a file of a repository is of a kind that a push writes, so that an old one is removed: a template that is left
    behind would be loaded with the new adapter.
    """
    return path.startswith("run/") or path in (ADAPTER_CONFIG, WEIGHTS, _OLD_WEIGHTS) or bool(_TOKENIZER.fullmatch(path))


def public_name(base: str) -> str:
    """What the base of a recipe is called to others: of a folder the last part of its name."""
    return name_of(base) if Path(base).expanduser().is_dir() else base


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        OutputError: it cannot be read as one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no mapping")
        return document
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {str(error).splitlines()[0]}.",
                          "Name the folder of a finished run.") from error


# --- details -----------------------------------------------------------------------------------------------------------


def _digest(file: Any, digest: Any) -> str:
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def _adapter_files(folder: Path) -> list[str]:
    """Weights and tokenizer, by their path in the folder; the config is made anew."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if WEIGHTS not in found:
        raise OutputError(f"{folder} holds no {WEIGHTS}.", "Name the folder of a finished run; its weights are safetensors.")
    return [path for path in found if path == WEIGHTS or _TOKENIZER.fullmatch(path)]


def _adapter_config(path: Path, base: str, model: ModelFacts | None) -> bytes:
    """PEFT's config with a base that others can find, pinned to the commit that it was trained on.

    Args:
        model: None where the base has another name than the run gave it, so that no commit of it is known.
    """
    config = read_json(path)
    config["base_model_name_or_path"] = base
    pinned = model is not None and not model.is_folder and not base.startswith("builtin:")
    config["revision"] = (config.get("revision") or model.revision) if pinned else None
    return _as_json(config)


def _card_by_hand(path: Path) -> str | None:
    """The run folder's card where somebody has edited it."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return None if is_unedited(text) else text


def _template(adapter: Path) -> str | None:
    path = adapter / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _refuse_secrets(items: Iterable[Item]) -> None:
    for item in items:
        if item.size_bytes > _MAX_SEARCHED_BYTES or not item.path.endswith((".json", ".md", ".jinja", ".txt")):
            continue
        text = item.content.decode(errors="replace")
        if redact(text) != text:
            line = next(number for number, line in enumerate(text.splitlines(), 1) if redact(line) != line)
            raise HubError(f"{item.path}, line {line}, holds what looks like a token or a password; nothing is pushed.",
                           f"Take it out{f' of {item.source}' if item.source else ''}, then run the same command again.")


def _as_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
