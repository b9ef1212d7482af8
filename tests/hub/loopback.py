"""A Hugging Face Hub on 127.0.0.1, in memory: model repositories for the real huggingface_hub client.

It knows repositories, branches, tags, commits, Git LFS uploads, tokens and ranges, and answers errors
with the headers by which the client picks its exceptions. There is no git and no Xet: a client that
uploads needs HF_HUB_DISABLE_XET=1. Set HF_ENDPOINT to `LoopbackHub.url` before the client is imported.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

from .loopback_parts import Answer, Blob, Fault, HubError, Repository, Request
from .loopback_server import Server

_LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".h5", ".pt")
_DATE = "2026-01-01T00:00:00.000Z"


class LoopbackHub:
    """The server; use it as a context manager, or `start` and `stop`.

    Attributes:
        repositories: by id, to look at what a client wrote.
        requests: every answered request as (method, path, status).
        faults: status, DROP_CONNECTION or Fault for every request whose path contains the key.
        without_ranges: repositories whose files can only be had whole, also by a client that has a part.
        uploads: LFS objects that have arrived, by SHA-256.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.faults: dict[str, int | Fault] = {}
        self.without_ranges: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, repo_id: str, folder: Path, *, branch: str = "main", private: bool = False) -> Repository:
        """A repository (or a further branch of it) with the files of a local folder, without a client."""
        repository = self.repositories.setdefault(repo_id, Repository(repo_id, private))
        names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
        repository.commit(branch, {name: Blob(data, _is_lfs(name)) for name, data in files.items()})
        return repository

    def downloads(self, repo_id: str) -> set[str]:
        """The files whose content has been sent."""
        pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/(.+)")
        sent = [pattern.fullmatch(path) for method, path, status in self.requests if method == "GET"]
        return {match[1] for match in sent if match}

    def take_fault(self, method: str, path: str) -> int | Fault | None:
        """The fault of a request, which uses it up a little."""
        with self._lock:
            fault = next((found for part, found in self.faults.items() if part in path), None)
            if isinstance(fault, Fault):
                if fault.times <= 0 or fault.method not in (None, method):
                    return None
                fault.times -= 1
            return fault

    def answer(self, method: str, url: str, headers: Message, body: bytes) -> Answer:
        """The answer to one request."""
        parts = urlsplit(url)
        path = parts.path.removeprefix("/mirror")  # it is its own mirror, below another path
        for verb, pattern, respond in _ROUTES:
            match = pattern.fullmatch(path)
            if match and method in (verb, "HEAD" if verb == "GET" else verb):
                fields = {name: unquote(value) for name, value in match.groupdict().items()}
                query = dict(parse_qsl(parts.query))
                try:
                    return respond(self, Request(method, fields, query, headers, body))
                except HubError as error:
                    return Answer(json.dumps(error.body).encode(), error.status, error.headers)
        return Answer(status=404)

    def _repository(self, request: Request, *, writing: bool = False) -> Repository:
        """The repository of the path, if the caller may see (or write) it."""
        repository = self.repositories.get(request.fields["repo"])
        hidden = repository is None or (repository.private and not request.has_token)
        if repository is None or hidden:
            # The Hub does not tell strangers whether a repository exists.
            raise HubError(404 if request.has_token else 401, "RepoNotFound", "Repository not found")
        if writing and not request.has_token:
            raise HubError(403, "Forbidden", "a token is needed to write")
        return repository

    # Reading.

    def _info(self, request: Request) -> Answer:
        repository = self._repository(request)
        revision = request.fields.get("revision", "main")
        siblings = [{"rfilename": path} for path in sorted(repository.files(revision))]
        facts = {"id": repository.repo_id, "sha": repository.find(revision), "private": repository.private}
        facts |= {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": False}
        return Answer.of_json(facts | {"createdAt": _DATE, "lastModified": _DATE})

    def _tree(self, request: Request) -> Answer:
        """Files below a folder, folders themselves left out."""
        repository = self._repository(request)
        files = repository.files(request.fields["revision"])
        folder = request.fields["path"] + "/" if "path" in request.fields else ""
        found = {path: blob for path, blob in files.items() if path.startswith(folder)}
        if folder and not found:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        if request.query.get("recursive", "").lower() not in ("true", "1"):
            found = {path: blob for path, blob in found.items() if "/" not in path[len(folder) :]}
        return Answer.of_json([blob.listed_as(path) for path, blob in sorted(found.items())])

    def _refs(self, request: Request) -> Answer:
        repository = self._repository(request)

        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        return Answer.of_json({"branches": branches, "tags": tags, "converts": []})

    def _resolve(self, request: Request) -> Answer:
        """The content of a file, or the range of it that was asked for."""
        repository = self._repository(request)
        commit = repository.find(request.fields["revision"])
        blob = repository.commits[commit].get(request.fields["path"])
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if not wanted or repository.repo_id in self.without_ranges:
            return Answer(blob.data, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(blob.data)), len(blob.data) - 1)
        if first > last:
            return Answer(status=416, headers={"Content-Range": f"bytes */{len(blob.data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        return Answer(blob.data[first : last + 1], 206, headers)

    # Writing.

    def _create_repository(self, request: Request) -> Answer:
        if not request.has_token:
            raise HubError(401, "Unauthorized", "a token is needed to create a repository")
        wanted = request.json
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repositories:
            raise HubError(409, "Conflict", "You already created this model repo", url=url)
        # As later clients say it, and as those before 1.7 did.
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = Repository(repo_id, is_private)
        repository.commit("main", {})
        self.repositories[repo_id] = repository
        return Answer.of_json({"id": repo_id, "name": repo_id, "url": url})

    def _create_branch(self, request: Request) -> Answer:
        repository = self._repository(request, writing=True)
        if request.fields["revision"] in repository.branches:
            raise HubError(409, "Conflict", "Reference already exists")
        start = repository.find(request.json.get("startingPoint", "main"))
        repository.branches[request.fields["revision"]] = start
        return Answer.of_json({})

    def _create_tag(self, request: Request) -> Answer:
        repository = self._repository(request, writing=True)
        repository.tags[request.json["tag"]] = repository.find(request.fields["revision"])
        return Answer.of_json({})

    def _validate_card(self, request: Request) -> Answer:
        return Answer.of_json({"errors": [], "warnings": []})

    def _choose_upload_modes(self, request: Request) -> Answer:
        repository = self._repository(request, writing=True)
        stored = repository.files(request.fields["revision"])
        entries = []
        for path in [file["path"] for file in request.json["files"]]:
            mode = "lfs" if _is_lfs(path) else "regular"
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in stored:
                entry["oid"] = stored[path].oid
            entries.append(entry)
        return Answer.of_json({"files": entries})

    def _plan_lfs_uploads(self, request: Request) -> Answer:
        """An upload address for every object that is not here yet."""
        self._repository(request, writing=True)
        objects = []
        for wanted in request.json["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.uploads:
                entry["actions"] = {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}
            objects.append(entry)
        return Answer.of_json({"transfer": "basic", "objects": objects})

    def _upload_lfs_object(self, request: Request) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != request.fields["oid"]:
            raise HubError(400, "BadRequest", "the content does not have this SHA-256")
        self.uploads[request.fields["oid"]] = request.body
        return Answer()

    def _commit(self, request: Request) -> Answer:
        """Apply a commit: one JSON object per line, each a header, a file or a deletion."""
        repository = self._repository(request, writing=True)
        files = dict(repository.files(request.fields["revision"]))
        for line in map(json.loads, request.body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.uploads[value["oid"]], is_lfs=True)
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            elif kind != "header":
                raise HubError(400, "BadRequest", f"unknown operation {kind}")
        commit = repository.commit(request.fields["revision"], files)
        url = f"{self.url}/{repository.repo_id}/commit/{commit}"
        return Answer.of_json({"success": True, "commitOid": commit, "commitUrl": url})


def _is_lfs(path: str) -> bool:
    return path.endswith(_LFS_SUFFIXES)


def _pattern(path: str) -> re.Pattern[str]:
    """`{name}` stands for one segment; `{repo}` for one or two, `{path}` for any number."""
    segments = {"repo": "[^/]+(?:/[^/]+)?", "path": ".+"}
    return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{segments.get(m[1], '[^/]+')})", path))


_ROUTES: list[tuple[str, re.Pattern[str], Callable[[LoopbackHub, Request], Answer]]] = [
    (verb, _pattern(path), respond)
    for verb, path, respond in (
        ("GET", "/api/models/{repo}", LoopbackHub._info),
        ("GET", "/api/models/{repo}/revision/{revision}", LoopbackHub._info),
        ("GET", "/api/models/{repo}/tree/{revision}", LoopbackHub._tree),
        ("GET", "/api/models/{repo}/tree/{revision}/{path}", LoopbackHub._tree),
        ("GET", "/api/models/{repo}/refs", LoopbackHub._refs),
        ("GET", "/{repo}/resolve/{revision}/{path}", LoopbackHub._resolve),
        ("POST", "/api/repos/create", LoopbackHub._create_repository),
        ("POST", "/api/models/{repo}/branch/{revision}", LoopbackHub._create_branch),
        ("POST", "/api/models/{repo}/tag/{revision}", LoopbackHub._create_tag),
        ("POST", "/api/validate-yaml", LoopbackHub._validate_card),
        ("POST", "/api/models/{repo}/preupload/{revision}", LoopbackHub._choose_upload_modes),
        ("POST", "/{repo}.git/info/lfs/objects/batch", LoopbackHub._plan_lfs_uploads),
        ("PUT", "/objects/{oid}", LoopbackHub._upload_lfs_object),
        ("POST", "/api/models/{repo}/commit/{revision}", LoopbackHub._commit),
    )
]
