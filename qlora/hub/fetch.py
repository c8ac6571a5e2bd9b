"""An adapter from a folder or from the Hub, with every byte of it checked.

The client (huggingface_hub 1.31 to 2.4) compares only the size of what it downloads over plain HTTP, so a byte that was turned
over on the way goes through. Here each file is held against the checksum that the server lists, fetched once more if it is
another, and refused if that does not help.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import HubError, ModelError, UnreachableError
from qlora.hub.adapter import CONFIG, WEIGHTS, Adapter, describe, full_model, in_folder, without_weights
from qlora.hub.patience import Patience, chain, client, describe as reason_of, status_of
from qlora.progress import Progress
from qlora.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Adapter", "find_adapter"]

_HOURS = 6 * 3600.0  # an adapter with embeddings has some GiB, and lines are slow
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
# No code, no pickles, and nothing but plain names: what a repository lists is a stranger's.
_NEEDED = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|[\w-]+\.tiktoken"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[\w-]+\.jinja|run/(resolved|report)\.json"
)


@dataclass(frozen=True)
class _File:
    """A file as the server lists it: `checksum` is the sha256 of a large one, and of any other the sha1 of its git object."""

    path: str
    size_bytes: int
    checksum: str


def find_adapter(
    source: str, *, revision: str | None = None, base: str | None = None, patience: Patience | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """The adapter that is meant by a run folder, an adapter folder, or an id on the Hub such as me/adapter or me/adapter@v2.

    A folder that is there goes before an id. From the Hub comes only what loading needs, of one commit, into the client's own
    cache; without network, what is there of an earlier time is taken.

    Args:
        revision: branch, tag or commit on the Hub; main by default.
        base: instead of the one that the adapter names.
        patience: how long the Hub may take; six hours by default, as long as bytes arrive.

    Raises:
        ModelError: no such folder, no adapter in it, or one that cannot be loaded.
        HubError: the Hub does not have it, does not let us, cannot be reached, or sends something else than it lists.
    """
    progress = progress or Progress()
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{source} is a folder here, which has no revisions.",
                             "Leave --revision out, or start in another folder to load the adapter of that name from the Hub.")
        return in_folder(source, folder, base=base)
    repo, _, at = source.partition("@")
    if not _HUB_ID.fullmatch(repo) or folder.exists():
        what = ("is a file, not a folder" if folder.exists()
                else "is no folder that is there, and not written like an adapter on the Hub")
        raise ModelError(f"{source} {what}.", "Name a run folder, an adapter folder, or owner/name on the Hub.")
    if at and revision and at != revision:
        raise ModelError(f"{source} names the revision {at}, and --revision {revision} another.", "Leave one of them out.")
    wanted = at or revision or "main"
    with progress.stage(f"Fetching {source}") as update:
        with nullcontext(patience) if patience is not None else Patience(_HOURS, tell=progress.note) as waiting:
            snapshot = _fetch(repo, wanted, waiting, progress, update)
    return describe(repo, snapshot, base=base, revision=snapshot.name)


# --- from the Hub ------------------------------------------------------------------------------------------------------


def _fetch(repo: str, revision: str, patience: Patience, progress: Progress, update: Callable[[int, int], None]) -> Path:
    """The folder in the client's cache with the files of one commit, each of them checked."""
    from huggingface_hub import is_offline_mode

    api = client(patience)
    cached = _cached(repo, revision)
    if is_offline_mode():
        if cached is None:
            raise HubError(f"{repo} (revision {revision}) is not on this machine, and HF_HUB_OFFLINE forbids to ask the Hub.",
                           "Unset HF_HUB_OFFLINE, or name a folder that holds the adapter.")
        return _checked_cache(repo, cached)
    try:
        commit, files = _listing(api, repo, revision, patience, attempts=6 if cached is None else 2)
    except UnreachableError:
        if cached is None:
            raise
        progress.note(f"The Hub cannot be reached; {repo} is taken as it was fetched earlier (commit {cached.name[:8]}).")
        return _checked_cache(repo, cached)
    total, done = sum(file.size_bytes for file in files), 0
    for file in files:

        def moved(count: int, before: int = done) -> None:
            if count:  # each attempt begins with 0, which nobody has sent
                patience.sign_of_life()
            patience.check()
            update(before + count, total)

        # Asked by the name of the branch or tag, the client remembers which commit that is, for a day without network. It is the
        # last file that is, so that a fetch that was broken off leaves what was there before.
        names = (revision, commit) if file.path == CONFIG else (commit,)
        path = _fetch_file(api, repo, file, names, patience, moved, progress)
        done += file.size_bytes
        update(done, total)
    return path.parent


def _fetch_file(
    api: HfApi, repo: str, file: _File, revisions: Sequence[str], patience: Patience, moved: Callable[[int], None],
    progress: Progress,
) -> Path:
    """The file as the last of the revisions has it, which is a commit; checked. A branch before it may have moved meanwhile."""
    for revision in revisions:
        path = _download(api, repo, file, revision, patience, moved)
        if revisions[-1] in path.parts:
            break
    if _checksum_of(path, file) == file.checksum:
        return path
    progress.note(f"{file.path} of {repo} is not as the server lists it; it is fetched once more.")
    path = _download(api, repo, file, revisions[-1], patience, moved, force=True)
    if _checksum_of(path, file) == file.checksum:
        return path
    raise HubError(f"{file.path} of {repo} is not what the server says that it holds: its checksum is another, twice in a row.",
                   "Try again later, or over another connection; if it stays so, tell the owner of the repository. Nothing was "
                   "loaded.")


def _listing(api: HfApi, repo: str, revision: str, patience: Patience, attempts: int) -> tuple[str, list[_File]]:
    """The commit, and what of its files is needed, the config last."""
    with _refusals(repo, revision):
        # Without a time-out of its own this call has none, whatever the client has.
        info = patience.call(f"looking up {repo}", lambda: api.model_info(
            repo, revision=revision, files_metadata=True, timeout=patience.answer_seconds), attempts=attempts)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if CONFIG not in names:
        raise full_model(repo) if "config.json" in names else ModelError(
            f"{repo} (revision {revision}) holds no adapter: it has no {CONFIG}.",
            "Name an adapter on the Hub, or a folder that holds one.")
    if WEIGHTS not in names:
        raise without_weights(repo, names)
    files = []
    for sibling in info.siblings:
        if _NEEDED.fullmatch(sibling.rfilename):
            checksum = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
            if sibling.size is None or not checksum:
                raise HubError(f"The server does not list the size and checksum of {sibling.rfilename} in {repo}.",
                               "Fetch the adapter by other means, and name the folder that it is in.")
            files.append(_File(sibling.rfilename, sibling.size, checksum))
    return info.sha, sorted(files, key=lambda file: (file.path == CONFIG, file.size_bytes))


def _download(
    api: HfApi, repo: str, file: _File, revision: str, patience: Patience, moved: Callable[[int], None], *, force: bool = False
) -> Path:
    """One file, into the client's cache; from its begin again where the connection broke in a way that the client gives up at."""

    def attempt() -> str:
        moved(0)
        try:
            return api.hf_hub_download(repo, file.path, revision=revision, force_download=force, tqdm_class=_counting(moved))
        except (OSError, RuntimeError) as error:
            if type(error) is OSError and error.errno is None:  # the client's own check of the size
                raise ConnectionError("fewer bytes arrived than were announced") from error
            if isinstance(error, RuntimeError):  # by which hf_xet reports whatever went wrong on the way
                raise ConnectionError(str(error)) from error
            raise

    with _refusals(repo, revision):
        try:
            return Path(patience.call(f"the download of {file.path} ({format_bytes(file.size_bytes)}) from {repo}", attempt))
        except OSError as error:
            if error.errno is None or status_of(error) is not None or isinstance(error, ConnectionError):
                raise
            raise HubError(f"{file.path} of {repo} cannot be kept on this disk: {error.strerror or error}.",
                           "Make room, or set HF_HOME to a folder on a larger disk.") from error


def _counting(moved: Callable[[int], None]) -> type:
    """A class that the client takes for its progress bars. They draw nothing, and pass on how far the furthest has come: there
    are two for a file that comes in chunks (Xet), one for what has arrived and one for what is put together.
    """
    furthest = 0

    class Count:
        def __init__(self, *args: Any, initial: int = 0, total: int | None = None, **_: Any):
            self.n, self.total = initial, total
            self.format_dict: dict[str, Any] = {}

        def update(self, count: float | None = 1) -> None:
            nonlocal furthest
            self.n += int(count or 0)
            furthest = max(furthest, self.n)
            moved(furthest)

        def nothing(self, *args: Any, **_: Any) -> None:
            pass

        close = refresh = set_description = set_postfix_str = nothing

        def __enter__(self) -> Count:
            return self

        def __exit__(self, *args: object) -> None:
            pass

    return Count


@contextmanager
def _refusals(repo: str, revision: str) -> Iterator[None]:
    """Turn what the server refuses for good into sentences. What may pass is the affair of the patience.

    Raises:
        HubError
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        # The client wraps what its first request met into "cannot be found in the cache".
        found = next((each for each in chain(error) if isinstance(each, HfHubHTTPError)), error)
        if isinstance(found, GatedRepoError):
            problem, fix = f"{repo} is gated: its owner has not let this account in.", "Ask for access on its page, then run " \
                "`hf auth login` with a token of that account."
        elif isinstance(found, RevisionNotFoundError):
            problem, fix = f"{repo} has no revision {revision}.", "Look at its page for branches, tags and commits."
        elif isinstance(found, RepositoryNotFoundError):
            problem = (f"{repo} is neither a folder here nor on the Hub; or it is private, and this machine has no token that "
                       "may read it.")
            fix = "Check the name. For a private one, run `hf auth login`, or set HF_TOKEN."
        elif status_of(found) == 401:
            problem, fix = "The Hub does not accept the token of this machine.", "Run `hf auth login` anew, or correct HF_TOKEN."
        else:
            problem, fix = f"{repo} cannot be fetched: {reason_of(found)}", "Check the name, and `hf auth whoami`."
        raise HubError(problem, fix) from found
    except HFValidationError as error:
        raise HubError(f"{repo} cannot be an id on the Hub: {reason_of(error)}", "Write owner/name.") from error


# --- checksums, and the cache ------------------------------------------------------------------------------------------


def _checksum_of(path: Path, file: _File) -> str:
    """In the form of the one that the server lists: 64 digits for sha256, 40 for the sha1 of a git object."""
    return _digest(path, is_sha256=len(file.checksum) == 64)


def _digest(path: Path, *, is_sha256: bool) -> str:
    # Git's names of objects: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _cached(repo: str, revision: str) -> Path | None:
    """The folder of an earlier fetch, if it came to its end: the config is the last file of one."""
    from huggingface_hub import try_to_load_from_cache

    config, weights = (try_to_load_from_cache(repo, name, revision=revision) for name in (CONFIG, WEIGHTS))
    return Path(config).parent if isinstance(config, str) and isinstance(weights, str) else None


def _checked_cache(repo: str, snapshot: Path) -> Path:
    """The same, once its files are what they were when they came: the client names each by its checksum. Where the file system
    has no links, it keeps no such names, and there is nothing to hold them against.

    Raises:
        HubError: names the file that has changed.
    """
    for path in sorted(snapshot.rglob("*")):
        if not _NEEDED.fullmatch(path.relative_to(snapshot).as_posix()) or not path.is_symlink():
            continue
        name = Path(os.path.realpath(path)).name
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name) and _digest(path, is_sha256=len(name) == 64) != name:
            raise HubError(f"{path.name} of {repo} has changed on this disk since it was fetched.",
                           f"Remove {Path(os.path.realpath(path))}, and fetch it again with network.")
    return snapshot
