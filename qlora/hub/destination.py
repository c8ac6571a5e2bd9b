"""Where a push goes: may this machine's token write there, and what is there already?

Everything is asked before a minute is spent on training. A token that may only read is not found out by creating the repository:
the client takes the refusal for "it exists" where it does (huggingface_hub 2.4, `create_repo(exist_ok=True)`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.errors import HubError
from qlora.hub.patience import Patience, client, describe, status_of

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
    check_name(target.repo)
    for kind, name in (("branch", target.revision), ("tag", target.tag)):
        if name is not None:
            check_reference(kind, name)
    api = client(patience)
    account = find_account(api, patience)
    repo = target.repo if "/" in target.repo else f"{account.name}/{target.repo}"
    account.refuse_foreign(repo)
    found = look(api, repo, target.revision, patience)
    account.refuse_narrow_token(repo, exists=found.exists)
    refuse_other_content(found, base, read=lambda path: _read(api, found, path, patience))
    if found.exists and target.private and not found.private:
        raise HubError(f"{repo} is public, and this push is to be private.",
                       "Say that it may be seen (hub.private: false in a recipe, --public for `qlora push`), make the repository private "
                       "in its settings on the Hub, or name another.")
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


def check_name(repo: str) -> None:
    """Raises HubError for what the Hub takes for no name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{repo!r} cannot be the name of a repository: {str(error).splitlines()[0]}",
                       "Write name or owner/name with letters, digits, '-', '_' and '.', such as me/my-adapter.") from None


def check_reference(kind: str, name: str) -> None:
    """Raises HubError for what git takes for no branch or tag (git-check-ref-format), or the Hub for a commit."""
    parts = name.split("/")
    wrong = not _REFERENCE.fullmatch(name) or ".." in name or any(not part or part[0] in ".-" or part.endswith((".", ".lock")) for part in parts)
    if wrong or _COMMIT.fullmatch(name) or parts[0] == "refs":
        raise HubError(f"{name!r} cannot be the name of a {kind}.",
                       "Write letters, digits, '-', '_', '.' and '/', such as v1 or experiments/long-rows.")


# --- who we are --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Whose token this is, and what it may do.

    Attributes:
        role: "write", "read", "fineGrained" or what else the server calls it; None where it does not say.
        organisations: the role of the user in each, None where the server does not say.
        scopes: of a fine-grained token: what it may do, by (kind, name) of the thing.
    """

    name: str
    role: str | None
    organisations: Mapping[str, str | None] = field(default_factory=dict)
    scopes: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)

    def refuse_foreign(self, repo: str) -> None:
        """Raises HubError where the owner is neither the user nor an organisation in which the user may write."""
        owner = repo.partition("/")[0]
        known = {self.name.lower(): None, **{name.lower(): role for name, role in self.organisations.items()}}
        if owner.lower() not in known:
            theirs = f" and the organisations {', '.join(self.organisations)}" if self.organisations else ""
            raise HubError(f"{repo} belongs to {owner}, and this machine's token to {self.name}{theirs}.",
                           f"Push to {self.name}/{repo.partition('/')[2]}, or log in as somebody who may write there: hf auth login.")
        if known[owner.lower()] in ("read", "no_access"):
            raise HubError(f"{self.name} may only read in the organisation {owner}.",
                           f"Ask its administrators for the role contributor or write, or push to {self.name}/{repo.partition('/')[2]}.")

    def refuse_narrow_token(self, repo: str, *, exists: bool) -> None:
        """Raises HubError where the token may not write to the repository, or not create one that is not there."""
        fix = "Make a token of the kind write (Settings, Access Tokens on the Hub), then `hf auth login`, or put it into HF_TOKEN."
        if self.role == "read":
            raise HubError("This machine's token may only read from the Hub.", fix)
        if self.role != "fineGrained":
            return
        owner = repo.partition("/")[0].lower()
        writable = {(kind, name.lower()) for (kind, name), may in self.scopes.items() if "repo.write" in may}
        if not (("user", owner) in writable or ("org", owner) in writable or (exists and ("model", repo.lower()) in writable)):
            wanted = f"write to {repo}" if exists else f"create repositories of {repo.partition('/')[0]}"
            raise HubError(f"This machine's token is a fine-grained one that may not {wanted}.",
                           f"Give it the permission to write to repositories of {repo.partition('/')[0]} (Settings, Access Tokens on the "
                           f"Hub). {fix}")


def find_account(api: HfApi, patience: Patience) -> Account:
    """Ask the server whose token this is.

    Raises:
        HubError: there is no token, or the server does not know it.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    if get_token() is None:
        raise HubError("There is no token for the Hub on this machine.",
                       "Run `hf auth login` with a token of the kind write (Settings, Access Tokens on the Hub), or put it into HF_TOKEN.")
    try:
        with explained(f"{api.endpoint} does not say whose token this is"):
            answer = patience.call(f"asking {api.endpoint} whose token this is", api.whoami, attempts=4)
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed.", "Unset it, or leave the hub section out.") from None
    return read_account(answer)


def read_account(answer: Mapping[str, Any]) -> Account:
    """The server's answer to who-am-I as an account. What is missing in it is taken for allowed: the push will tell."""
    token = (answer.get("auth") or {}).get("accessToken") or {}
    scopes: dict[tuple[str, str], frozenset[str]] = {}
    for scope in (token.get("fineGrained") or {}).get("scoped") or ():
        entity = scope.get("entity") or {}
        scopes[str(entity.get("type")), str(entity.get("name"))] = frozenset(scope.get("permissions") or ())
    organisations = {org["name"]: org.get("roleInOrg") for org in answer.get("orgs") or () if org.get("name")}
    return Account(str(answer["name"]), token.get("role"), organisations, scopes)


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
        local = patience.call(f"reading {path} of {found.repo}", lambda: api.hf_hub_download(found.repo, path, revision=found.head))
        return Path(local).read_text(encoding="utf-8", errors="replace")


# --- what the server says ----------------------------------------------------------------------------------------------


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Turn an answer of the server that no second attempt would change into a HubError whose sentence begins with `problem`."""
    try:
        yield
    except _compat.request_errors() as error:
        raise HubError(f"{problem}: {describe(error)}", _FIXES.get(status_of(error), _LOOK)) from error


_LOOK = "`hf auth whoami` says who this machine is to the Hub."
_FIXES = {
    None: "Look at HF_ENDPOINT: it is the whole address of a Hub, such as https://hub.example.org.",
    401: "The token is not known to the server: `hf auth login` with a new one, or put it into HF_TOKEN.",
    402: "The plan of that account does not allow it; its billing settings on the Hub say more.",
    403: "Take a token of the kind write, of an account that may write there; `hf auth whoami` shows whose this one is.",
    404: f"Check the name; a private repository of others looks as if it were not there. {_LOOK}",
    429: "The server wants to be left alone for a while; run the same command again later.",
}
