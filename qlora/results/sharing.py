"""What a run says to others: without the rows, without paths of the machine it ran on, without secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.data import Finding
from qlora.redact import redact_values
from qlora.results.facts import RunSummary, without_home

LEFT_OUT = "Held-out prompts and answers were left out of this report, as they are rows of the data."
# Texts that quote rows, or name files that are no part of the run: what of them may be told.
_QUOTES_AFTER = {"skipped_rows": " The first: ", "special_tokens_in_content": " (first: ", "files": ""}

_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|ya?ml|jinja|txt|safetensors)$", re.IGNORECASE)
_HUB_ROWS = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:[\w.-]+)?\[[^\]/\\]+\]", re.ASCII)
# Settings that name a file or folder; whatever else they may be has no separator in it.
_PATHS = {"data.validation", "data.chat_template", "output.dir"}
_PART = r"[^\s/\\'\"`|<>,;()\[\]{}]"
# Absolute paths and those that begin at home, here or above, in the middle of a text; of a URL or "</s>" nothing is taken.
_PATH_IN_TEXT = (
    re.compile(rf"(?<![\w/.~\\-])(?:file://)?(?:(?:~|\.\.?)(?:/{_PART}+)*/|/(?:{_PART}+/)+)(?P<name>{_PART}+)"),
    re.compile(rf"(?<![\w\\])(?:[A-Za-z]:[\\/](?:{_PART}+[\\/])*|\\\\(?:{_PART}+[\\/])+)(?P<name>{_PART}+)"),
)
_BEGINS_AS_PATH = re.compile(r"/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\")


def for_others(summary: RunSummary, *, repo: str | None, samples: bool) -> RunSummary:
    """The summary as it may be read by anybody: of every path the last name, *** for secrets.

    What it says of itself does not change by doing it twice.

    Args:
        repo: where the adapter is on the Hub; None leaves it in the run folder.
        samples: tell held-out prompts and answers, and findings that quote rows, as well.
    """
    kept = summary.samples if samples else ()
    notes = summary.notes if len(kept) == len(summary.samples) else (*summary.notes, LEFT_OUT)
    data, model = summary.data, summary.model
    is_folder = model.is_folder or bool(_BEGINS_AS_PATH.match(model.base))
    found = replace(
        summary, samples=(), notes=notes, command=_public_command(summary.command), folder=name_of(summary.folder),
        model=replace(model, base=name_of(model.base) if is_folder else model.base, is_folder=is_folder),
        data=replace(
            data, files=tuple(file if hub_dataset(file) else name_of(file) for file in data.files), template=None,
            findings=tuple(data.findings if samples else filter(None, map(_without_rows, data.findings))),
        ),
    )
    document = _public(found.to_json())  # which leaves out all answers but those of the samples
    for key, decision in document["settings"].items():
        is_path = key in _PATHS or (key == "data.path" and not any(map(hub_dataset, data.files))) or (
            key == "model.base" and is_folder)
        if is_path and isinstance(decision["value"], str):
            decision["value"] = name_of(decision["value"])
    document["samples"] = replace(found, samples=kept).to_json()["samples"]
    document["data"]["template"] = replace(found, data=data).to_json()["data"]["template"]
    if repo is not None:
        document["adapter"], document["on_hub"] = repo, True
    return RunSummary.from_json(redact_values(document))


def document_for_others(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """resolved.json or plan.json as others may read it: of every path the last name, or what is left of it in the run folder;
    *** for secrets.
    """
    inside = os.path.abspath(folder) + os.sep

    def relative(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(inside, "")
        if isinstance(value, Mapping):
            return {key: relative(item) for key, item in value.items()}
        return [relative(item) for item in value] if isinstance(value, (list, tuple)) else value

    return redact_values(_public(relative(document)))


def hub_dataset(file: str) -> str | None:
    """The id of the data set, where the rows did not come from a file: "owner/name:configuration[split]"."""
    match = _HUB_ROWS.fullmatch(file)
    return match["id"] if match else None


def name_of(path: str) -> str:
    """The last part of a path, on whatever system it was written."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _without_rows(finding: Finding) -> Finding | None:
    """The finding without what it quotes; None where nothing is left."""
    if finding.code not in _QUOTES_AFTER:
        return finding
    mark = _QUOTES_AFTER[finding.code]
    text, found, rest = finding.text.partition(mark) if mark else ("", "", "")
    if found and mark.lstrip().startswith("("):
        text += rest.partition(")")[2]
    return replace(finding, text=text) if text else None


def _public(value: Any) -> Any:
    """The same with names for paths in every text."""
    if isinstance(value, str):
        return _public_text(value)
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return value


def _public_text(text: str) -> str:
    is_sentence = " " in text and text.endswith((".", "!", "?"))
    is_path = _BEGINS_AS_PATH.match(text) or (_FILE.search(text) and " " not in text and "://" not in text)
    if is_path and not is_sentence and "\n" not in text:
        return name_of(text)
    text = without_home(text)
    for pattern in _PATH_IN_TEXT:
        text = pattern.sub(lambda match: match["name"], text)
    return text


def _public_command(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # not one of ours
        return _public_text(command)
    shown = []
    for word in words:
        key, equals, value = word.partition("=")
        shown.append(f"{key}={_public_text(value)}" if equals and value else _public_text(word))
    return shlex.join(shown)
