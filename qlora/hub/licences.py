"""The licence of a base, fetched from its model card where it is on the Hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from qlora.hub.patience import Patience, client
from qlora.results.licence import Licence, licence_of_base

# A nicety, for which no push waits long. Without a limit the client would sleep for as long as a busy server asks; and after a
# first look of 10 seconds, which this is just below, it would look again for minutes (huggingface_hub 2.4,
# `_ETAG_RETRY_TIMEOUT`).
_MAX_SECONDS = 9.0


def find_licence(base: str, revision: str | None = None) -> Licence | None:
    """None where nothing is known: a card that cannot be had is no reason to keep an adapter from its owner, whose card then
    says that the licence is not known.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from qlora import _compat

    if "/" in base and not Path(base).expanduser().is_dir():
        unknown = (HfHubHTTPError, HFValidationError, OSError, *_compat.transport_errors())
        with suppress(*unknown), Patience(_MAX_SECONDS) as patience:
            client(patience).hf_hub_download(base, "README.md", revision=revision)
    return licence_of_base(base, revision)
