"""Who may do what: people, organisations, and tokens of every role that the Hub knows."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .calls import Refusal

# What a member may do in an organisation: those who write may create repositories in it.
_ROLES_THAT_WRITE = ("admin", "write", "contributor")


@dataclass(frozen=True)
class Scope:
    """What a fine-grained token may do with one entity: a user's or an organisation's repositories, or one repository."""

    kind: str
    name: str
    permissions: tuple[str, ...]

    def covers(self, repo_id: str) -> bool:
        """Whether the entity is that repository, or holds it."""
        return self.name == repo_id or (self.kind in ("user", "org") and self.name == repo_id.split("/")[0])


@dataclass(frozen=True)
class Account:
    """A token and the person it belongs to. `orgs` maps the organisations they are members of to their role in each."""

    label: str
    user: str
    role: str
    orgs: Mapping[str, str] = field(default_factory=dict)
    scopes: tuple[Scope, ...] = ()

    @property
    def token(self) -> str:
        """In the form of real ones; made up, and the same in every run."""
        letters = random.Random(f"loopback hub, {self.label}")
        return "hf_" + "".join(letters.choices(string.ascii_letters, k=34))

    def is_member(self, namespace: str) -> bool:
        """Whether repositories there are this person's to see."""
        return namespace == self.user or namespace in self.orgs

    def may_read(self, repo_id: str) -> bool:
        """Whether the token lets its owner see a private repository."""
        if not self.is_member(repo_id.split("/")[0]):
            return False
        return self.role != "fineGrained" or any(
            scope.covers(repo_id) and {"repo.content.read", "repo.write"} & set(scope.permissions) for scope in self.scopes
        )

    def may_write(self, repo_id: str) -> bool:
        """Whether the token lets its owner change a repository, or create it."""
        namespace = repo_id.split("/")[0]
        if namespace != self.user and self.orgs.get(namespace) not in _ROLES_THAT_WRITE:
            return False
        if self.role == "fineGrained":
            return any(scope.covers(repo_id) and "repo.write" in scope.permissions for scope in self.scopes)
        return self.role == "write"

    def whoami(self) -> dict[str, Any]:
        """The document of /api/whoami-v2."""
        access: dict[str, Any] = {"displayName": self.label, "role": self.role, "createdAt": "2024-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            scoped = [{"entity": {"_id": "0" * 24, "type": scope.kind, "name": scope.name},
                       "permissions": list(scope.permissions)} for scope in self.scopes]
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "id": "1" * 24, "name": name, "fullname": name.title(), "isEnterprise": False, "roleInOrg": role}
                for name, role in self.orgs.items()]
        return {
            "type": "user", "id": "0" * 24, "name": self.user, "fullname": self.user.title(), "isPro": False, "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }


# acme takes what its members create; quiet-lab lets this one only read.
_ORGS = {"acme": "write", "quiet-lab": "read"}


def everybody() -> dict[str, Account]:
    """The accounts of a new Hub by label. All but the stranger's belong to the same person."""
    accounts = [
        Account("write", "tester", "write", _ORGS),
        Account("read", "tester", "read", _ORGS),
        Account("fine", "tester", "fineGrained", _ORGS, (Scope("user", "tester", ("repo.content.read", "repo.write")),)),
        Account("fine-read", "tester", "fineGrained", _ORGS, (Scope("user", "tester", ("repo.content.read",)),)),
        Account("fine-org", "tester", "fineGrained", _ORGS, (Scope("org", "acme", ("repo.content.read", "repo.write")),)),
        Account("fine-one", "tester", "fineGrained", _ORGS,
                (Scope("model", "tester/only-this", ("repo.content.read", "repo.write")),)),
        Account("stranger", "stranger", "write"),
    ]
    return {account.label: account for account in accounts}


def made_up_token(label: str) -> str:
    """A token of the right form that belongs to nobody."""
    return Account(f"nobody, {label}", "nobody", "read").token


def signed_in(account: Account | None) -> Account:
    """Whoever calls.

    Raises:
        Refusal: 401, no token was sent.
    """
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    return account
