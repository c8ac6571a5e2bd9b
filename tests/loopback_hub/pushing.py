"""How files come in: preupload says which way, large files go to the storage origin, a commit makes them visible."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from typing import Any

from .access import writable
from .calls import Answer, Call, Refusal, as_json, content
from .cards import check_card
from .repos import File, Repo, as_file, is_large

_LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def preupload(call: Call) -> Answer:
    there, answers = writable(call).at(call.names["revision"]).files, []
    for file in call.json()["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file.get("sample") or ""))
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append({**answer, **({"oid": there[file["path"]].oid} if file["path"] in there else {})})
    return as_json({"files": answers})


def batch(call: Call) -> Answer:
    """Where each large file is to be sent: whole, or in parts; nowhere, if it is there."""
    repo, hub, wanted = writable(call), call.hub, call.json()
    in_parts = "multipart" in wanted.get("transfers", ["basic"]) and hub.part_bytes is not None
    objects = []
    for item in wanted["objects"]:
        oid, size = item["oid"], item["size"]
        if not re.fullmatch("[0-9a-f]{64}", oid):
            raise Refusal(422, f"Not a sha256: {oid}")
        if oid in repo.blobs:
            objects.append({"oid": oid, "size": size})
            continue
        address = f"/lfs/{repo.number}/{oid}"
        upload: dict[str, Any] = {"href": hub.signed(address), "header": {}}
        if in_parts and size > hub.part_bytes:
            numbers = range(1, -(-size // hub.part_bytes) + 1)
            upload = {"href": hub.signed(f"/{repo.id}.git/info/lfs/objects/{oid}/complete", origin=hub.url),
                      "header": {"chunk_size": str(hub.part_bytes),
                                 **{f"{number:05d}": hub.signed(f"{address}/{number}") for number in numbers}}}
        verify = {"href": f"{hub.url}/{repo.id}.git/info/lfs/objects/verify", "header": {}}
        objects.append({"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}})
    return as_json({"transfer": "multipart" if in_parts else "basic", "objects": objects}, headers=_LFS_JSON)


def complete(call: Call) -> Answer:
    """The parts become one file. No token comes with it: the address was signed."""
    repo, oid = call.hub.repos[call.names["repo"]], call.names["oid"]
    _check_signature(call)
    parts = []
    for part in call.json()["parts"]:
        data = repo.parts.get((oid, part["partNumber"]))
        if data is None or part["etag"].strip('"') != hashlib.md5(data).hexdigest():
            raise Refusal(400, f"InvalidPart: {part['partNumber']}")
        parts.append(data)
    _keep(repo, oid, b"".join(parts))
    return as_json({})


def verify(call: Call) -> Answer:
    repo, wanted = writable(call), call.json()
    data = repo.blobs.get(wanted["oid"])
    if data is None or len(data) != wanted["size"]:
        raise Refusal(404, f"Object {wanted['oid']} of {wanted['size']} bytes was not received")
    return as_json({})


def put_blob(call: Call) -> Answer:
    """A large file, or one part of it, at the storage origin."""
    repo, oid = _stored_in(call), call.names["oid"]
    if call.names.get("part"):
        repo.parts[oid, int(call.names["part"])] = call.body
    else:
        _keep(repo, oid, call.body)
    return Answer(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


def get_blob(call: Call) -> Answer:
    repo, oid = _stored_in(call), call.names["oid"]
    if oid not in repo.blobs:
        raise Refusal(404, "NoSuchKey")
    return content(repo.blobs[oid], {"ETag": f'"{oid}"'}, call.headers.get("range"))


def _stored_in(call: Call) -> Repo:
    """As with the stores of clouds: an address that was signed opens it, and a second credential is an error."""
    if "authorization" in call.headers:
        raise Refusal(400, "InvalidArgument: Only one auth mechanism allowed")
    _check_signature(call)
    for repo in call.hub.repos.values():
        if repo.number == int(call.names["number"]):
            return repo
    raise Refusal(404, "NoSuchBucket")


def _check_signature(call: Call) -> None:
    if call.query.get("X-Amz-Signature") != call.hub.signature(call.path):
        raise Refusal(403, "SignatureDoesNotMatch")


def _keep(repo: Repo, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "BadDigest: the sha256 of what arrived is not the one that was announced")
    repo.blobs[oid] = data


def commit(call: Call) -> Answer:
    """All operations or none: what is wrong with any of them is found before the branch moves."""
    repo, branch = writable(call), re.sub("^refs/heads/", "", call.names["revision"])
    if call.query.get("create_pr"):
        raise Refusal(400, "Pull requests are not served here.")
    if branch not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    try:
        header, *operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    except ValueError as error:
        raise Refusal(400, f"Not lines of JSON, the first of them a header: {error}") from None
    last, head = repo.at(f"refs/heads/{branch}"), header["value"]
    if head.get("parentCommit") and not last.oid.startswith(head["parentCommit"]):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(last.files)
    for operation in operations:
        _apply(repo, files, operation["key"], operation["value"])
    if {path: file.oid for path, file in files.items()} == {path: file.oid for path, file in last.files.items()}:
        raise Refusal(400, "This commit would change nothing.")
    made = repo.add_commit(branch, files, head["summary"], message=head.get("description", ""), author=call.account.user)
    return as_json({"success": True, "commitOid": made.oid, "commitUrl": f"{call.hub.url}/{repo.id}/commit/{made.oid}",
                    "hookOutput": ""})


def _apply(repo: Repo, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value["path"].rstrip("/") if key == "deletedFolder" else value["path"]
    if not all(part not in ("", ".", "..", ".git") for part in path.split("/")):
        raise Refusal(400, f"Invalid path: {path}")
    if key == "file":
        try:
            file = as_file(path, base64.b64decode(value["content"], validate=True))
        except binascii.Error as error:
            raise Refusal(400, f"{path} is not base64: {error}") from None
        if file.large and file.size_bytes:
            raise Refusal(400, f"{path} is large or binary and must be sent as a large file.")
        if path == "README.md" and (errors := check_card(file.data.decode())["errors"]):
            raise Refusal(400, f"Invalid metadata in README.md: {errors[0]['message']}")
        files[path] = File(file.data, large=False)
    elif key == "lfsFile":
        data = repo.blobs.get(value["oid"])
        if data is None or len(data) != value.get("size", len(data)):
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(data, large=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, f'A file with the name "{path}" does not exist', "EntryNotFound")
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(f"{path}/")]
        if not inside:
            raise Refusal(404, f'A folder with the name "{path}" does not exist', "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise Refusal(400, f"Unknown operation: {key}")
