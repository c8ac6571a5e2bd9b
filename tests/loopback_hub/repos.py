"""Repositories: files, commits, branches, tags, and the large files beside them. All in memory."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

from .calls import Refusal

# Large by its name, as in the .gitattributes of a new repository; and whatever else is as large as this, or binary.
_LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".arrow", ".parquet", ".zip", ".gz", ".msgpack")
_LARGE_BYTES = 10 * 2**20
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LARGE_SUFFIXES).encode()
_numbers = itertools.count(1)


@dataclass(frozen=True)
class File:
    """Content, and whether it is kept beside the repository with a pointer to it inside."""

    data: bytes = field(repr=False)
    large: bool

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds in the place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size_bytes}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        """Git's name of the blob: of the content, or of the pointer."""
        data = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares its own file with: sha256 of a large file, git's name of a small one."""
        return self.sha256 if self.large else self.blob_id


@dataclass(frozen=True)
class Commit:
    """All files of the repository at one time."""

    oid: str
    parent: str | None
    files: Mapping[str, File] = field(repr=False)
    title: str
    message: str
    author: str
    date: str


def is_large(path: str, size_bytes: int, sample: bytes) -> bool:
    """Whether a file of this name, size and beginning is to be sent beside the repository."""
    return path.endswith(_LARGE_SUFFIXES) or size_bytes >= _LARGE_BYTES or b"\0" in sample


def as_file(path: str, data: bytes) -> File:
    """The file as a push of it would leave it."""
    return File(data, is_large(path, len(data), data[:512]))


class Repo:
    """One repository of models. `gated` is False, "auto" or "manual"; `granted` are the names that may read it all the same."""

    def __init__(self, repo_id: str, *, private: bool = False, author: str = "system") -> None:
        self.id = repo_id
        self.number = next(_numbers)
        self.private = private
        self.gated: str | bool = False
        self.granted: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.add_commit("main", {".gitattributes": as_file(".gitattributes", _ATTRIBUTES)}, "initial commit", author=author)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, or an id of at least seven digits names.

        Raises:
            Refusal: 404, there is none.
        """
        name = re.sub(r"^refs/(heads|tags)/", "", revision)
        oid = self.branches.get(name) or self.tags.get(name)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", name):
            oid = next((known for known in self.commits if known.startswith(name)), None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add_commit(self, branch: str, files: Mapping[str, File], title: str, *, message: str = "", author: str) -> Commit:
        """A commit with exactly these files, and the branch on it."""
        now = datetime.now(timezone.utc)
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.id} {len(self.commits)} {parent} {title} {now.isoformat()}".encode()).hexdigest()
        date = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"
        self.blobs.update({file.sha256: file.data for file in files.values() if file.large})
        commit = Commit(oid, parent, dict(files), title, message, author, date)
        self.commits[oid] = commit
        self.branches[branch] = oid
        return commit

    def history(self, revision: str) -> Iterator[Commit]:
        """Its commits, the newest first."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None


def listing(commit: Commit, folder: str = "", *, recursive: bool = True) -> list[dict[str, Any]]:
    """Entries as in the answers of tree and paths-info: files, and the folders they are in, below `folder`."""
    prefix = folder.strip("/") + "/" if folder.strip("/") else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix):].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            inner = prefix + "/".join(parts[:depth])
            entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": hashlib.sha1(inner.encode()).hexdigest()}
        if recursive or len(parts) == 1:
            entries[path] = file_entry(path, file)
    return list(entries.values())


def file_entry(path: str, file: File) -> dict[str, Any]:
    """One file as in the answers of tree and paths-info."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size_bytes, "oid": file.blob_id}
    if file.large:
        entry["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": len(file.pointer)}
    return entry
