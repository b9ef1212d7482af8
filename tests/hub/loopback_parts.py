"""What a Hub is made of: files, commits, repositories; requests, answers, and what may go wrong with them."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, Self

TOKEN = "hf_loopback"  # the one token that may write, and see private repositories
DROP_CONNECTION = 0  # as a fault, instead of a status


class HubError(Exception):
    """An answer that is no success; the client reads `code` from a header of its own."""

    def __init__(self, status: int, code: str, message: str, *, commit: str = "", url: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, "url": url}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit:  # lets the client remember that a file is absent from this commit
            self.headers["X-Repo-Commit"] = commit


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it is stored through LFS."""

    data: bytes
    is_lfs: bool

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self) -> str:
        """SHA-256 for LFS, git's id otherwise: the ETag, and what tells the client a file is unchanged."""
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else self.git_id

    def listed_as(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """Commits (path → blob) by id, and the branches and tags that name some of them."""

    repo_id: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        commit = hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str:
        """The commit that a branch, a tag or its own id names."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.find(revision)]


@dataclass(frozen=True)
class Request:
    """What a route needs: `fields` are the parts of the path that its pattern names."""

    method: str
    fields: dict[str, str]
    query: dict[str, str]
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        headers: Content-Length is that of the body unless it is here.
        sent: bytes of the body after which the connection breaks; None for all, and it stays.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None

    @classmethod
    def of_json(cls, value: Any) -> Self:
        return cls(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


@dataclass
class Fault:
    """What becomes of the answers to the next requests; then all is well again.

    Attributes:
        times: how many requests.
        method: of requests; None for all.
    """

    change: Callable[[Answer], Answer]
    times: float = math.inf
    method: str | None = "GET"
