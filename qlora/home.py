"""Where things that are made once are kept: the embedded base, plans, receipts, what runs found out before their first step."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """QLORA_CACHE, else the user's cache folder; it may not exist yet."""
    if os.environ.get("QLORA_CACHE"):
        return Path(os.environ["QLORA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qlora"


def starts_home() -> Path:
    """Trials and figures of bare bases, answers to held-out rows among them; see `qlora.training.earlier`."""
    return cache_home() / "starts"
