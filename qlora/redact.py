"""Take secrets out of text before anybody else can read it: the terminal, a report, a file in the run folder.

Known are the tokens of the Hugging Face Hub by their form, whatever environment variables hold whose names speak of secrets,
and the places in URLs and headers where passwords stand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

_MASK = "***"
# Shorter values are words such as "true" and "none"; taking those out would spoil text and protect nothing.
_SHORTEST_SECRET = 8

# Whole words of a name: TOKENIZERS_PARALLELISM and MAX_TOKENS hold no token.
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(API|ACCESS|PRIVATE|SECRET)_?KEY)(?![A-Z])", re.IGNORECASE
)
# HF_TOKEN_PATH and its kin say where a secret is; an error about that file should name it.
_PLACE_NAME = re.compile(r"_(PATH|FILE|DIR|HOME|NAME)$", re.IGNORECASE)

_PATTERNS = (
    # Tokens of users and organisations are 34 letters and digits; those of OAuth sessions are JSON web tokens.
    re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])hf_(?:oauth|jwt)_[\w.-]{20,}"),
    re.compile(r"(?<=://)[^\s/?#'\"<>]+(?=@)"),
    re.compile(r"(?<=[?&])(?P<kept>[\w.-]*(?:token|secret|password|signature|credential|key)=)[^&\s'\"<>]+", re.IGNORECASE),
    re.compile(r"(?P<kept>\bauthorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token)\s+)?[^\s'\",]+", re.IGNORECASE),
    re.compile(r"(?P<kept>\bbearer\s+)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE),
)


def redact(text: str) -> str:
    """The text with every secret in it as ***."""
    for secret in _secrets():
        text = text.replace(secret, _MASK)
    for pattern in _PATTERNS:
        text = pattern.sub(_masked, text)
    return text


def redact_values(value: Any) -> Any:
    """The same for every text in a document of mappings and lists, before it is written as JSON. Keys stay as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(item) for item in value]
    return value


def _secrets() -> list[str]:
    """What the environment holds now, the longest first, so that no piece is left of one that contains another."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            lines = [line.strip() for line in value.splitlines()]  # a private key has many
            found.update(form for line in lines for form in (line, quote(line, safe="")))
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _masked(match: re.Match[str]) -> str:
    return match.groupdict().get("kept", "") + _MASK
