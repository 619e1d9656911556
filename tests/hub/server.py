"""A server on this machine that speaks as much of the Hub's HTTP protocol as codd-hf needs.

The clients are the real huggingface_hub, transformers, diffusers and PEFT: start it, and run them
in a process with [`LocalHub.environment`] (the endpoint is read when huggingface_hub is imported).
Repositories live in memory; files that match `LFS_SUFFIXES` go through the LFS calls and are served
by a redirect to another server, as the Hub does it. Writing needs a token, and so does reading what
is private.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from card_rules import errors_in_card

LFS_SUFFIXES = (".safetensors", ".bin")
USER = "tester"
TOKEN = "hf_tester"


@dataclass
class Blob:
    """A file: its bytes, and whether it was uploaded by LFS."""

    data: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """What identifies the content: sha256 of an LFS file, git's blob id of another."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """Commits (files by path) and the branches and pull requests that name them."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit("main", {}, "initial commit")

    def commit(self, ref: str, files: dict[str, Blob], message: str) -> str:
        names = [f"{path} {blob.etag}" for path, blob in sorted(files.items())]
        sha = hashlib.sha1("\n".join([str(len(self.commits)), *names]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class LocalHub:
    """The server; a context manager. `repositories` is its state, by id."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.connections: list[socket.socket] = []
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads = True
            server.hub = self
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers
        )

    def __enter__(self) -> LocalHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self, spared: socket.socket | None = None) -> None:
        """Closes all connections but one; new ones are refused from then on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in self.connections:
            with suppress(OSError):  # the client has closed it
                if connection is not spared:
                    connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo_id: str, folder: Path) -> None:
        """Puts a folder into a repository, as a commit."""
        files = {
            path.relative_to(folder).as_posix(): Blob(
                path.read_bytes(), path.name.endswith(LFS_SUFFIXES)
            )
            for path in folder.rglob("*")
            if path.is_file()
        }
        for blob in files.values():
            self.objects[blob.etag] = blob.data
        self.repositories.setdefault(repo_id, Repository()).commit("main", files, "add")

    def files(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        """The files of a repository, by path."""
        repository = self.repositories[repo_id]
        return {k: blob.data for k, blob in repository.commits[repository.refs[ref]].items()}

    def environment(self, home: Path) -> dict[str, str]:
        """What a client process needs; `home` is its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


class _Failure(Exception):
    def __init__(self, status: int, code: str, message: str, commit: str | None = None):
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.hub.connections.append(self.connection)

    def log_message(self, *_) -> None:
        pass

    def _run(self) -> None:
        self.hub: LocalHub = self.server.hub
        url = urlsplit(self.path)
        self.path_only, self.query = url.path, parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for route_method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, self.path_only)
                if match and route_method == method:
                    getattr(self, action)(*map(unquote, match.groups()))
                    return
            raise _Failure(404, "NotFound", f"no route for {self.command} {self.path}")
        except _Failure as failure:
            self._answer({"error": failure.message}, failure.status, failure.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _run

    def _answer(self, content: Any, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _must_sign_in(self) -> None:
        if not self._signed_in:
            raise _Failure(401, "Unauthorized", "Invalid username or password.")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._signed_in):
            raise _Failure(404 if self._signed_in else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self._repository(repo_id)
        sha = repository.resolve(revision)
        if sha is None:
            raise _Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def stop(self) -> None:
        """Not the Hub's: lets a client see what happens when there is no network."""
        self.hub.stop(spared=self.connection)
        self._answer({}, headers={"Connection": "close"})

    def who_am_i(self) -> None:
        self._must_sign_in()
        self._answer({"name": USER, "type": "user", "orgs": []})

    def create_repository(self) -> None:
        self._must_sign_in()
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.repositories[repo_id] = Repository(asked.get("visibility") == "private")
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        self._answer(url, 409 if exists else 200)

    def validate_card(self) -> None:
        errors = errors_in_card(json.loads(self.body)["content"])
        if errors and self.headers.get("Accept") == "text/plain":
            self._answer("\n".join(errors).encode(), 400)
        else:
            found = [{"message": error} for error in errors]
            self._answer({"errors": found, "warnings": []}, 400 if errors else 200)

    def create_branch(self, repo_id: str, branch: str) -> None:
        self._must_sign_in()
        repository = self._repository(repo_id)
        if branch in repository.refs:
            raise _Failure(409, "RefExists", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = self._commit_of(repo_id, start)[0]
        self._answer({})

    def before_upload(self, repo_id: str, revision: str) -> None:
        self._must_sign_in()
        files = self._commit_of(repo_id, revision)[1]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            if path in files:
                answer["oid"] = files[path].etag
            answers.append(answer)
        self._answer({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._must_sign_in()
        self._repository(repo_id)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                href = f"{self.hub.storage}/lfs/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Failure(400, "BadDigest", "the content does not have the announced sha256")
        self.hub.objects[oid] = self.body
        self._answer({})

    def lfs_download(self, oid: str) -> None:
        self._answer(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        self._must_sign_in()
        repository = self._repository(repo_id)
        files = dict(self._commit_of(repo_id, revision)[1])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif entry["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            else:
                raise _Failure(400, "BadRequest", f"unknown operation {entry['key']!r}")
        answer = {}
        if "create_pr" in self.query:
            number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        sha = repository.commit(revision, files, message)
        answer |= {"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}"}
        self._answer(answer)

    def repository_info(self, repo_id: str, revision: str = "main") -> None:
        sha, files = self._commit_of(repo_id, revision)
        private = self._repository(repo_id).private
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._answer(
            {"_id": repo_id, "id": repo_id, "sha": sha, "private": private, "siblings": siblings}
        )

    def refs(self, repo_id: str) -> None:
        refs = self._repository(repo_id).refs.items()
        branches = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in refs]
        self._answer({"branches": branches, "converts": [], "tags": []})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        sha, files = self._commit_of(repo_id, revision)
        entries = []
        for path, blob in sorted(files.items()):
            if path.startswith(f"{folder}/" if folder else ""):
                entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.etag}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.etag, "size": len(blob.data), "pointerSize": 130}
                entries.append(entry)
        if folder and not entries:
            raise _Failure(404, "EntryNotFound", f"{folder} does not exist on {sha}", sha)
        self._answer(entries)

    def file(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._commit_of(repo_id, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise _Failure(404, "EntryNotFound", f"{path} does not exist on {sha}", sha)
        blob = files[path]
        if not blob.lfs:
            self._answer(blob.data, headers=headers | {"ETag": f'"{blob.etag}"'})
            return
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        headers["Location"] = f"{self.hub.storage}/lfs/{blob.etag}"
        self._answer(b"", 302, headers)


ID = "([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/stop", "stop"),
    ("GET", "/api/whoami-v2", "who_am_i"),
    ("POST", "/api/repos/create", "create_repository"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", f"/api/models/{ID}/branch/([^/]+)", "create_branch"),
    ("POST", f"/api/models/{ID}/preupload/([^/]+)", "before_upload"),
    ("POST", f"/api/models/{ID}/commit/([^/]+)", "commit"),
    ("POST", f"/{ID}\\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "lfs_upload"),
    ("GET", "/lfs/([0-9a-f]{64})", "lfs_download"),
    ("GET", f"/api/models/{ID}", "repository_info"),
    ("GET", f"/api/models/{ID}/revision/([^/]+)", "repository_info"),
    ("GET", f"/api/models/{ID}/refs", "refs"),
    ("GET", f"/api/models/{ID}/tree/([^/]+)", "tree"),
    ("GET", f"/api/models/{ID}/tree/([^/]+)/(.+)", "tree"),
    ("GET", f"/{ID}/resolve/([^/]+)/(.+)", "file"),
]
