"""Bring files into a repository: what it lacks, sent with a count of the bytes, and written in one commit."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qlora.hub.destination import Destination, Remote, Target
from qlora.hub.parcel import Item, is_ours
from qlora.hub.patience import Patience, status_of
from qlora.progress import Progress
from qlora.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Hosts that take uploads through Xet, which resumes inside a file. Others are spoken to in the plain protocol (LFS): nothing
# tells beforehand whether a server knows Xet (https://github.com/huggingface/huggingface_hub/issues/4786).
_XET_HOSTS = ("huggingface.co", "hub-ci.huggingface.co")
# Files are sent one after the other, but small texts together: a question to the server costs more than they do.
_SMALL_BYTES = 2**20
_TEXT = (".json", ".jinja", ".md", ".txt")


@dataclass(frozen=True)
class Difference:
    """What a repository lacks, and what of ours it should no longer hold. False where there is neither."""

    items: tuple[Item, ...]
    stale: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.items or self.stale)

    def __str__(self) -> str:
        names = [*(item.path for item in sorted(self.items, key=lambda item: -item.size_bytes)), *self.stale]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more} ({format_bytes(self.size_bytes)})"

    @property
    def size_bytes(self) -> int:
        """What is to be sent."""
        return sum(item.size_bytes for item in self.items)


def difference(items: Iterable[Item], files: Mapping[str, Remote]) -> Difference:
    """Hold what should be there against what the server lists."""
    wanted = {item.path for item in items}
    return Difference(tuple(item for item in items if not is_there(item, files)),
                      tuple(path for path in files if is_ours(path) and path not in wanted))


def is_there(item: Item, files: Mapping[str, Remote]) -> bool:
    """Whether the server lists the file with this size and checksum."""
    remote = files.get(item.path)
    if remote is None or remote.size_bytes != item.size_bytes:
        return False
    return remote.sha256 == item.sha256 if remote.sha256 else remote.blob_id == item.blob_id


def commit(
    api: HfApi, found: Destination, change: Difference, target: Target, message: str, patience: Patience, progress: Progress
) -> bool:
    """Upload files, then write all of them into one commit. False where others have changed the branch meanwhile: nothing is
    written.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    through_xet = uses_xet(api.endpoint)
    text = f"Pushing {len(change.items)} files, {format_bytes(change.size_bytes)}, to {found.repo}"
    # Xet's client draws bars of its own, and tells nobody else how far it is.
    with progress.stage(text, in_bytes=True, bar=not through_xet) as update, ExitStack() as held:
        if not through_xet:
            held.enter_context(without_bars())
        reader = Reader(change.items, update, patience)
        sources = [reader.xet_source(item) if through_xet else held.enter_context(reader.open(item)) for item in change.items]
        additions = [CommitOperationAdd(item.path, source) for item, source in zip(change.items, sources, strict=True)]
        if not through_xet:
            for addition in additions:
                addition.upload_info.sha256  # reads the file, if it has not been read yet, and is no upload
            reader.counts = True
        for group in grouped(change.items, additions):
            what = group[0].path_in_repo if len(group) == 1 else f"{len(group)} small files"
            patience.call(f"uploading {what}", lambda: api.preupload_lfs_files(
                found.repo, group, revision=target.revision, free_memory=False, num_threads=1))
        operations = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in change.stale)]
        try:
            patience.call(f"the commit to {found.repo}", lambda: api.create_commit(
                found.repo, operations, commit_message=message, revision=target.revision, parent_commit=found.head))
        except Exception as error:
            if status_of(error) == 412:
                return False
            raise
        update(change.size_bytes, change.size_bytes)
        return True


def grouped(items: Sequence[Item], additions: list[Any]) -> Iterator[list[Any]]:
    """Large files alone, so that one that fails is tried again alone; small texts together at the end. Small files that are no
    text are large to the Hub, and go alone as well: several at once are sent by threads of the client, which Ctrl-C would have
    to wait for.
    """
    texts = [addition for item, addition in zip(items, additions) if _goes_with_others(item)]
    yield from ([addition] for item, addition in zip(items, additions) if not _goes_with_others(item))
    if texts:
        yield texts


def _goes_with_others(item: Item) -> bool:
    return item.size_bytes < _SMALL_BYTES and item.path.endswith(_TEXT)


def uses_xet(endpoint: str) -> bool:
    """Whether files go through Xet: on the Hub itself, where its client is there and not switched off."""
    from importlib.util import find_spec

    from huggingface_hub import constants

    return urlsplit(endpoint).hostname in _XET_HOSTS and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


@contextmanager
def without_bars() -> Iterator[None]:
    """The client draws none meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class Reader:
    """Opens files for the client to read, and tells how much of all of them has been read. A file that is sent again is counted
    again from its beginning.
    """

    def __init__(self, items: Sequence[Item], update: Callable[[int, int], None], patience: Patience):
        self._total_bytes = sum(item.size_bytes for item in items)
        self._update, self._patience = update, patience
        self._places: dict[str, int] = {}
        self.counts = False

    def open(self, item: Item) -> CountedFile:
        """The file, to be closed by the caller."""
        return CountedFile(item, self)

    def xet_source(self, item: Item) -> str | bytes:
        """What Xet's client reads itself: it takes no open files."""
        return item.made if item.made is not None else str(item.source)

    def moved(self, path: str, place: int) -> None:
        """So much of the file has been read.

        Raises:
            UnreachableError: the time is over.
        """
        if self.counts:
            self._patience.check()
            self._patience.sent()
            self._places[path] = place
            self._update(sum(self._places.values()), self._total_bytes)


class CountedFile(io.BufferedIOBase):
    """A file, or bytes, that tells its reader how far it has been read."""

    def __init__(self, item: Item, reader: Reader):
        self._file = io.BytesIO(item.made) if item.made is not None else item.source.open("rb")
        self._path, self._reader = item.path, reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data = self._file.read(size)
        self._reader.moved(self._path, self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
