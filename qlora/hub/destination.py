"""Where a push goes: may this machine's token write there, and what is there already?

Everything is asked before a minute is spent on training. A token that may only read is not found out by creating the repository:
the client takes the refusal for "it exists" where it does (huggingface_hub 2.4, `create_repo(exist_ok=True)`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import HubError
from qlora.hub.account import find_account
from qlora.hub.patience import Patience, client, explained

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What every repository may have from the start, or get by hand, whatever it is for.
_NEUTRAL = {".gitattributes", ".gitignore", "README.md", "MODEL_CARD.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"}
_ADAPTER = "adapter_config.json"
_REFERENCE, _COMMIT = re.compile(r"[A-Za-z0-9_][\w./+-]{0,127}", re.ASCII), re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Remote:
    """A file as the server lists it: the sha256 of one that is stored apart (LFS), the git blob id (sha1) of others."""

    size_bytes: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Target:
    """What a push was told: a repository, with or without its owner, a branch, and whether others may see it."""

    repo: str
    private: bool = True
    revision: str = "main"
    tag: str | None = None


@dataclass(frozen=True)
class Destination:
    """A repository that may be pushed to.

    Attributes:
        repo: owner/name.
        exists, private: of the repository; None as long as it is not there.
        head: the newest commit of the branch; None where the branch is not there yet.
        files: what that commit holds, by path.
        notes: what is worth a line to the user.
    """

    repo: str
    exists: bool
    private: bool | None
    head: str | None
    files: Mapping[str, Remote] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_destination(target: Target, base: str | None, patience: Patience) -> Destination:
    """Look whether a push can succeed. Nothing is created.

    Args:
        base: what the adapter is for; a repository with an adapter of another base is not overwritten. None = not known.

    Raises:
        HubError: no token, one that may not write there, a name that cannot be, a repository that holds something else.
    """
    check_target(target)
    api = client(patience)
    account = find_account(api, patience)
    repo = target.repo if "/" in target.repo else f"{account.name}/{target.repo}"
    account.refuse_foreign(repo)
    found = look(api, repo, target.revision, patience)
    account.refuse_narrow_token(repo, exists=found.exists)
    refuse_other_content(found, base, read=lambda path: _read(api, found, path, patience))
    if found.exists and target.private and not found.private:
        raise HubError(f"{repo} is public, and this push is to be private.",
                       "Say that it may be seen (hub.private: false in a recipe, --public for `qlora push`), make the repository "
                       "private in its settings on the Hub, or name another.")
    if found.exists and not target.private and found.private:
        note = f"{repo} is private and stays so; its settings on the Hub change that."
        return Destination(found.repo, True, True, found.head, found.files, (note,))
    return found


def create(destination: Destination, target: Target, patience: Patience) -> Destination:
    """Make the repository and the branch, where they are not there.

    Raises:
        HubError: the server refuses.
    """
    api = client(patience)
    repo = destination.repo
    if not destination.exists:
        with explained(f"The repository {repo} cannot be created"):
            patience.call(f"creating {repo}", lambda: api.create_repo(repo, private=target.private, exist_ok=True))
        destination = look(api, repo, target.revision, patience)
    if destination.head is None:
        with explained(f"The branch {target.revision} of {repo} cannot be created"):
            patience.call(f"creating the branch {target.revision}",
                          lambda: api.create_branch(repo, branch=target.revision, exist_ok=True))
        destination = look(api, repo, target.revision, patience)
    return destination


def check_target(target: Target) -> None:
    """Raises HubError for names that the Hub or git would not take. Nothing is asked."""
    check_name(target.repo)
    for kind, name in (("branch", target.revision), ("tag", target.tag)):
        if name is not None:
            check_reference(kind, name)


def check_name(repo: str) -> None:
    """Raises HubError for what the Hub takes for no name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).splitlines()[0].partition(" Use `repo_type`")[0]  # there is no such argument here
        raise HubError(f"{repo!r} cannot be the name of a repository: {reason}",
                       "Write name or owner/name with letters, digits, '-', '_' and '.', such as me/my-adapter.") from None


def check_reference(kind: str, name: str) -> None:
    """Raises HubError for what git takes for no branch or tag (git-check-ref-format), or the Hub for a commit."""
    parts = name.split("/")
    wrong = any(not part or part[0] in ".-" or part.endswith((".", ".lock")) for part in parts)
    if wrong or not _REFERENCE.fullmatch(name) or ".." in name or _COMMIT.fullmatch(name) or parts[0] == "refs":
        raise HubError(f"{name!r} cannot be the name of a {kind}.",
                       "Write letters, digits, '-', '_', '.' and '/', such as v1 or experiments/long-rows.")


# --- what is there -----------------------------------------------------------------------------------------------------


def look(api: HfApi, repo: str, revision: str, patience: Patience) -> Destination:
    """The repository as it is now.

    Raises:
        HubError: the server does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def ask(revision: str | None) -> Any:
        return patience.call(f"looking at {repo}", lambda: api.model_info(repo, revision=revision, files_metadata=True))

    with explained(f"{repo} cannot be looked at"):
        try:
            info = ask(revision)
        except RepositoryNotFoundError:
            return Destination(repo, False, None, None)
        except RevisionNotFoundError:
            info = ask(None)
            return Destination(repo, True, info.private, None)
    files = {
        each.rfilename: Remote(each.size or 0, each.lfs.sha256 if each.lfs else None, None if each.lfs else each.blob_id)
        for each in info.siblings or ()
    }
    return Destination(repo, True, info.private, info.sha, files)


def refuse_other_content(found: Destination, base: str | None, read: Callable[[str], Mapping[str, Any] | None]) -> None:
    """An adapter goes into an empty repository, or one with an adapter of the same base.

    Raises:
        HubError: it holds something else.
    """
    fix = "Name a repository that is empty or not there yet, or another branch of this one (hub.revision, --revision)."
    strangers = sorted(path for path in found.files if path not in _NEUTRAL)
    if not strangers:
        return
    if _ADAPTER not in found.files:
        raise HubError(f"{found.repo} holds something else than an adapter: {', '.join(strangers[:3])}"
                       f"{f' and {len(strangers) - 3} more' if len(strangers) > 3 else ''}.", fix)
    theirs = (read(_ADAPTER) or {}).get("base_model_name_or_path")
    if base and theirs and theirs != base:
        raise HubError(f"{found.repo} holds an adapter for {theirs}, and this one is for {base}.", fix)


def _read(api: HfApi, found: Destination, path: str, patience: Patience) -> Mapping[str, Any] | None:
    """A small JSON file of the repository; None where it is none."""
    try:
        return json.loads(read_text(api, found, path, patience))
    except ValueError:
        return None


def read_text(api: HfApi, found: Destination, path: str, patience: Patience) -> str:
    """A small text file of the repository, as it is at its head.

    Raises:
        HubError: it cannot be had.
    """
    with explained(f"{path} of {found.repo} cannot be read"):
        local = patience.call(f"reading {path} of {found.repo}",
                              lambda: api.hf_hub_download(found.repo, path, revision=found.head))
        return Path(local).read_text(encoding="utf-8", errors="replace")
