"""The metadata of a model card, checked as the Hub does before it takes a README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"(?!.*(--|\.\.))[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?", re.ASCII)
_LICENSES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1
    ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
""".split())
_TASKS = frozenset(("text-generation", "text-classification", "question-answering", "translation", "summarization", "fill-mask",
                    "feature-extraction", "image-text-to-text", "text-to-image", "sentence-similarity", "reinforcement-learning"))
_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation", "model_name", "inference",
          "thumbnail")
_LISTS = ("tags", "metrics")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


def metadata(readme: str) -> dict[str, Any]:
    """The front matter of a card; {} where there is none.

    Raises:
        ValueError: it is not YAML, or not a mapping.
    """
    match = _FRONT_MATTER.search(readme)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"YAML syntax: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError('"value" must be of type object')
    return found


def check_card(readme: str) -> dict[str, list[dict[str, str]]]:
    """The errors and warnings of a card, each with its message, in the words of the Hub where they are known."""
    try:
        card = metadata(readme)
    except ValueError as error:
        return {"errors": [{"message": str(error)}], "warnings": []}
    errors = [{"message": message} for message in _errors(card)]
    warnings = []
    if not card:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    if isinstance(card.get("pipeline_tag"), str) and card["pipeline_tag"] not in _TASKS:
        warnings.append({"message": f'The pipeline tag "{card["pipeline_tag"]}" is not in the official list'})
    return {"errors": errors, "warnings": warnings}


def _errors(card: dict[str, Any]) -> Iterable[str]:
    for key in _TEXTS:
        if key in card and not (isinstance(card[key], str) or (key == "inference" and isinstance(card[key], (bool, dict)))):
            yield f'"{key}" must be a string'
    for key in _LISTS:
        if key in card and not isinstance(card[key], list):
            yield f'"{key}" must be an array'
    for key in (*_LISTS, "license", "base_model", "datasets", "language"):
        if key in card:
            yield from (f'"{key}[{place}]" must be a string' for place, value in enumerate(_listed(card[key]))
                        if not isinstance(value, str))
    for value in _listed(card.get("license", [])):
        if isinstance(value, str) and value not in _LICENSES:
            yield f'"license" must be one of [{", ".join(sorted(_LICENSES))}]'
    for key, what in (("base_model", "model"), ("datasets", "dataset")):
        for value in _listed(card.get(key, [])):
            if isinstance(value, str) and not _REPO_ID.fullmatch(value):
                yield f'"{key}" with value "{value}" is not valid. Use a {what} id from https://hf.co/{what}s.'
    if "base_model_relation" in card and card["base_model_relation"] not in _RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]'


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
