"""Whose token this machine has, and what it may do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora.errors import HubError
from qlora.hub.patience import Patience, explained

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAKE_A_TOKEN = ("Make a token of the kind write (Settings, Access Tokens on the Hub), then `hf auth login`, or put it into "
                 "HF_TOKEN.")


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
        owner, _, name = repo.partition("/")
        known = {self.name.lower(): None, **{name.lower(): role for name, role in self.organisations.items()}}
        if owner.lower() not in known:
            theirs = f" and the organisations {', '.join(self.organisations)}" if self.organisations else ""
            raise HubError(f"{repo} belongs to {owner}, and this machine's token to {self.name}{theirs}.",
                           f"Push to {self.name}/{name}, or log in as somebody who may write there: hf auth login.")
        if known[owner.lower()] in ("read", "no_access"):
            raise HubError(f"{self.name} may only read in the organisation {owner}.",
                           f"Ask its administrators for the role contributor or write, or push to {self.name}/{name}.")

    def refuse_narrow_token(self, repo: str, *, exists: bool) -> None:
        """Raises HubError where the token may not write to the repository, or not create one that is not there."""
        if self.role == "read":
            raise HubError("This machine's token may only read from the Hub.", _MAKE_A_TOKEN)
        if self.role != "fineGrained":
            return
        owner = repo.partition("/")[0]
        writable = {(kind, name.lower()) for (kind, name), may in self.scopes.items() if "repo.write" in may}
        whole = ("user", owner.lower()) in writable or ("org", owner.lower()) in writable
        if not whole and not (exists and ("model", repo.lower()) in writable):
            wanted = f"write to {repo}" if exists else f"create repositories of {owner}"
            raise HubError(f"This machine's token is a fine-grained one that may not {wanted}.",
                           f"Give it the permission to write to repositories of {owner}, or another one: {_MAKE_A_TOKEN}")


def find_account(api: HfApi, patience: Patience) -> Account:
    """Ask the server whose token this is.

    Raises:
        HubError: there is no token, or the server does not know it.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    if get_token() is None:
        raise HubError("There is no token for the Hub on this machine.", _MAKE_A_TOKEN)
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
