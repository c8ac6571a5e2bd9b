"""What a caller may see and change, with the answers that the Hub gives to those who may not."""

from __future__ import annotations

from .calls import Call, Refusal
from .people import signed_in
from .repos import Repo


def readable(call: Call) -> Repo:
    """The repository of the call's path.

    Raises:
        Refusal: 404, or 401 for strangers: it is not there, or not theirs to know of. The client takes a 401 for a missing
            repository only where the address begins with https, so that here the code must say it.
    """
    repo_id = call.names["repo"]
    repo = call.hub.repos.get(repo_id)
    if repo is None or (repo.private and not (call.account and call.account.may_read(repo_id))):
        raise no_repository(call)
    return repo


def no_repository(call: Call) -> Refusal:
    """The answer of a Hub that has no such repository, or says so."""
    if call.account is None:
        return Refusal(401, "Invalid username or password.", "RepoNotFound")
    return Refusal(404, "Repository not found", "RepoNotFound")


def open_to(call: Call) -> Repo:
    """The repository, whose files the caller may have.

    Raises:
        Refusal: 401 or 403, its files are for those whom the owner lets in.
    """
    repo = readable(call)
    if repo.gated and call.account is None:
        raise Refusal(401, f"Access to model {repo.id} is restricted. You must have access to it and be authenticated to access"
                           " it. Please log in.", "GatedRepo")
    if repo.gated and not (call.account.may_read(repo.id) or call.account.user in repo.granted):
        raise Refusal(403, f"Access to model {repo.id} is restricted and you are not in the authorized list."
                           f" Visit {call.hub.url}/{repo.id} to ask for access.", "GatedRepo")
    return repo


def writable(call: Call) -> Repo:
    """The repository, which the caller may change.

    Raises:
        Refusal: 401, 403 or 404.
    """
    repo = readable(call)
    account = signed_in(call.account)
    if not account.may_write(repo.id):
        raise Refusal(403, "Forbidden: you must use a write token to upload to a repository." if account.role == "read" else
                           "Forbidden: you do not have the required permissions for this repository.")
    return repo
