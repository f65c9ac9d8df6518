"""A small hub on loopback: repositories in memory, behind those endpoints of the hub that `huggingface_hub` calls.

It answers from its own state alone and is told by `Fault` where to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_thisTokenMayNeverBePrinted"
USER = "user"


@dataclass
class Repo:
    """A repository: its commits in order, and which one a branch or a tag names."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        """Add files on top of a branch; returns the commit's id."""
        whole = self.files(branch) | files
        seed = repr((sorted(whole.items()), len(self.commits)))
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = whole
        self.refs[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files at a branch, a tag or a commit."""
        return self.commits.get(self.refs.get(revision, revision), {})


@dataclass
class Fault:
    """How the server fails.

    :param where: Pattern of the requests that it fails on, as `METHOD /path`.
    :param times: How often; then it works again.
    :param cut: Send only so many bytes of the content, and close the connection.
    """

    where: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    times: int = 1_000_000
    cut: int | None = None


class Hub(ThreadingHTTPServer):
    """The server and its state.

    `asked` lists all requests as `METHOD /path`; `trusted` those that had a token.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.trusted: list[str] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self) -> str:
        """Where large files lie: another host, which may not get the token."""
        return self.endpoint.replace("127.0.0.1", "localhost")

    def add(self, name: str, files: dict[str, bytes], **how: bool) -> Repo:
        """A repository with one commit."""
        self.repos[name] = Repo(**how)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs", **files})
        return self.repos[name]

    def fault(self, line: str) -> Fault | None:
        """The fault that a request meets."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.server.asked.append(line)
        if "Authorization" in self.headers:
            self.server.trusted.append(line)
        fault = self.server.fault(line)
        self.cut = None if fault is None else fault.cut
        if fault is not None and fault.cut is None:
            return self._send(fault.status, fault.body, fault.headers)
        if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self._json({"error": message}, 401, {"X-Error-Message": message})
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, line)
            if found is not None:
                return method(self, *found.groups())
        return self._json({"error": "no such page"}, 404)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            self.wfile.write(body[: self.cut])
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository, or None after an error was sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._known):
            status = 404 if self._known else 401
            self._json({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
            return None
        if write and not (self._known and name.startswith(f"{USER}/")):
            message = "You don't have the rights to write here"
            self._json({"error": message}, 403, {"X-Error-Message": message})
            return None
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        oid = repo.refs.get(revision, revision)
        if oid in repo.commits:
            return oid
        self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        oid = None if repo is None else self._commit_of(repo, revision or "main")
        if repo is None or oid is None:
            return
        siblings: list[dict[str, Any]] = []
        for file, data in repo.commits[oid].items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": git_blob(data)}
            if file.endswith(".safetensors"):
                entry["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
            siblings.append(entry)
        content = {"_id": "1", "id": name, "modelId": name, "sha": oid, "private": repo.private, "tags": []}
        self._json(content | {"gated": repo.gated, "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        oid = None if repo is None else self._commit_of(repo, revision)
        if repo is not None and oid is not None:
            files = repo.commits[oid].items()
            self._json(
                [{"type": "file", "oid": git_blob(data), "size": len(data), "path": file} for file, data in files]
            )

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        oid = None if repo is None else self._commit_of(repo, revision)
        if repo is None or oid is None:
            return None
        if repo.gated and not self._known:
            return self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        data = repo.commits[oid].get(file)
        if data is None:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{git_blob(data)}"'}
        if file.endswith(".safetensors"):
            self.server.stored[sha256(data)] = data
            headers |= {"X-Linked-ETag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            headers |= {"Location": f"{self.server.store}/cdn/{sha256(data)}?Signature=ofTheStore"}
            return self._send(302, b"", headers)
        return self._send(200, data, headers)

    def content(self, oid: str) -> None:
        data = self.server.stored[oid]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            return self._send(200, data, {"ETag": f'"{oid}"'})
        where = int(start[1])
        return self._send(206, data[where:], {"Content-Range": f"bytes {where}-{len(data) - 1}/{len(data)}"})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if not self._known:
            return self._json({"error": "Invalid username or password."}, 401)
        if owner != USER:
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            return self._json({"error": message}, 403, {"X-Error-Message": message})
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.server.add(name, {}, private=wanted.get("private") is True or wanted.get("visibility") == "private")
        return self._json({"url": url, "name": name})

    def branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        if repo is None:
            return None
        if branch in repo.refs:
            return self._json({"error": "exists"}, 409)
        repo.refs[branch] = repo.refs["main"]
        return self._json({})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        try:
            header = yaml.safe_load(text.split("---\n")[1])
            errors = [] if isinstance(header, dict) else [{"message": "no metadata"}]
            if str(header.get("license", "")).startswith("no-"):
                errors = [{"message": '"license" must be one of [mit, other]'}]
        except (yaml.YAMLError, IndexError) as error:
            errors = [{"message": str(error)}]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, _revision: str) -> None:
        if self._repo(name, write=True) is None:
            return
        files = [
            {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
            | {"shouldIgnore": False}
            for each in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, name: str) -> None:
        if self._repo(name, write=True) is None:
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            href = f"{self.server.endpoint}/store/{each['oid']}"
            there = each["oid"] in self.server.stored
            objects.append(each | ({} if there else {"actions": {"upload": {"href": href, "header": {}}}}))
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert sha256(self.body) == oid
        self.server.stored[oid] = self.body
        self._send(200, b"")

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        if repo is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.refs[revision]):
            return self._json({"error": "a commit has happened since"}, 412)
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        oid = repo.commit(files, header["summary"], revision)
        return self._json({"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid})


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (rf"GET /api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"(?:HEAD|GET) /{_NAME}/resolve/([^/]+|refs/pr/\d+|feature/[^/]+)/(.+)", _Handler.resolve),
    (r"(?:HEAD|GET) /cdn/(\w+)", _Handler.content),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /store/(\w+)", _Handler.store),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
)
