"""The Hub's API: people, repositories, files, commits, branches and tags."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .access import open_to, readable, writable
from .calls import Answer, Call, Refusal, as_json, content
from .cards import check_card, metadata
from .people import signed_in
from .repos import Commit, Repo, file_entry, listing

_NAME = re.compile(r"(?!.*(--|\.\.))(?![.-])[\w.-]{1,96}(?<!\.git)(?<!\.ipynb)(?<![.-])", re.ASCII)


def whoami(call: Call) -> Answer:
    return as_json(signed_in(call.account).whoami())


def validate_yaml(call: Call) -> Answer:
    found = check_card(call.json().get("content", ""))
    return as_json(found, 400 if found["errors"] else 200)


def create_repo(call: Call) -> Answer:
    account, wanted = signed_in(call.account), call.json()
    namespace = wanted.get("organization") or account.user
    repo_id = f"{namespace}/{wanted['name']}"
    if wanted.get("type") not in (None, "model"):
        raise Refusal(400, "Only models are served here.")
    if not _NAME.fullmatch(wanted["name"]):
        raise Refusal(400, f"Invalid repo name: {wanted['name']}")
    if not account.may_write(repo_id):  # asked before whether it is there, so that a read token always meets it
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    made = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in call.hub.repos:
        message = "You already created this model repo"
        return as_json({**made, "error": message}, 409, {"X-Error-Message": message})
    private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
    call.hub.repos[repo_id] = Repo(repo_id, private=private, author=account.user)
    return as_json(made)


def delete_repo(call: Call) -> Answer:
    wanted = call.json()
    repo_id = f"{wanted.get('organization') or signed_in(call.account).user}/{wanted['name']}"
    repo = writable(replace(call, names={"repo": repo_id}))
    del call.hub.repos[repo.id]
    return as_json({})


def settings(call: Call) -> Answer:
    repo, wanted = writable(call), call.json()
    if "visibility" in wanted or "private" in wanted:
        repo.private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
    if "gated" in wanted:
        repo.gated = wanted["gated"]
    return as_json({"private": repo.private, "gated": repo.gated})


def auth_check(call: Call) -> Answer:
    open_to(call)
    return as_json({})


def auth_check_write(call: Call) -> Answer:
    writable(call)
    return as_json({})


def model_info(call: Call) -> Answer:
    repo = readable(call)
    commit = repo.at(call.names.get("revision") or "main")
    return as_json(_info(repo, commit, with_blobs=call.query.get("blobs", "").lower() in ("true", "1")))


def _info(repo: Repo, commit: Commit, *, with_blobs: bool) -> dict[str, Any]:
    siblings = []
    for path, file in sorted(commit.files.items()):
        entry: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            entry.update(size=file.size_bytes, blobId=file.blob_id)
            if file.large:
                entry["lfs"] = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": len(file.pointer)}
        siblings.append(entry)
    card = _card(commit)
    tags = [str(tag) for tag in card.get("tags") or []] + ([f"license:{card['license']}"] if "license" in card else [])
    return {
        "_id": f"{repo.number:024x}", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid,
        "private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": tags,
        "lastModified": commit.date, "createdAt": next(iter(repo.commits.values())).date, "siblings": siblings,
        **({"cardData": card} if card else {}),
        **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
    }


def _card(commit: Commit) -> dict[str, Any]:
    """The metadata of its README.md; {} where there is none, or none that can be read."""
    try:
        return metadata(commit.files["README.md"].data.decode())
    except (KeyError, ValueError):
        return {}


def tree(call: Call) -> Answer:
    commit, folder = readable(call).at(call.names["revision"]), call.names.get("path") or ""
    entries = listing(commit, folder, recursive=call.query.get("recursive", "").lower() in ("true", "1"))
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist on {call.names['revision']}", "EntryNotFound")
    return as_json(entries)


def paths_info(call: Call) -> Answer:
    commit, entries = readable(call).at(call.names["revision"]), []
    folders = {entry["path"]: entry for entry in listing(commit) if entry["type"] == "directory"}
    for path in call.form().get("paths", []):
        if path in commit.files:
            entries.append(file_entry(path, commit.files[path]))
        elif path in folders:
            entries.append(folders[path])
    return as_json(entries)


def refs(call: Call) -> Answer:
    repo = readable(call)

    def named(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in found.items()]

    pull_requests = {"pullRequests": []} if call.query.get("include_prs") else {}
    return as_json({"branches": named("heads", repo.branches), "tags": named("tags", repo.tags), "converts": [], **pull_requests})


def commits(call: Call) -> Answer:
    return as_json([
        {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date,
         "authors": [{"user": commit.author}]}
        for commit in readable(call).history(call.names["revision"])
    ])


def create_branch(call: Call) -> Answer:
    repo, name = writable(call), call.names["name"]
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.at(call.json().get("startingPoint") or "main").oid
    return as_json({})


def delete_branch(call: Call) -> Answer:
    repo, name = writable(call), call.names["name"]
    if name == "main":
        raise Refusal(403, "Cannot delete the main branch")
    if name not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repo.branches[name]
    return as_json({})


def create_tag(call: Call) -> Answer:
    repo, name = writable(call), call.json()["tag"]
    commit = repo.at(call.names["name"])
    if name in repo.tags:
        raise Refusal(409, f"Tag reference exists already: refs/tags/{name}")
    repo.tags[name] = commit.oid
    return as_json({})


def delete_tag(call: Call) -> Answer:
    repo, name = writable(call), call.names["name"]
    if name not in repo.tags:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repo.tags[name]
    return as_json({})


def no_xet(call: Call) -> Answer:
    readable(call)
    raise Refusal(404, "Xet is not served here")


def resolve(call: Call) -> Answer:
    commit = open_to(call).at(call.names["revision"])
    file = commit.files.get(call.names["path"])
    at = {"X-Repo-Commit": commit.oid}
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", at)
    if not file.large:
        return content(file.data, {**at, "ETag": f'"{file.blob_id}"'}, call.headers.get("range"))
    number = call.hub.repos[call.names["repo"]].number
    return Answer(302, b"Found. Redirecting.", {
        **at, "Location": call.hub.signed(f"/lfs/{number}/{file.sha256}"), "X-Linked-ETag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size_bytes), "Accept-Ranges": "bytes",
    })
