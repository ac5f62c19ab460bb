"""A small Hugging Face Hub on 127.0.0.1, for tests: what huggingface_hub 2.4 really asks when it pushes and loads.

It keeps repositories, branches, commits and large files in memory, checks what it is sent (sizes, sha256, parents of
commits, ETags of parts, permissions), and has faults that a test puts at the nth request of a kind. It offers no xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".pt2", ".onnx", ".bin")
TOKENS = {"hf_me": ("me", "write"), "hf_reader": ("me", "read"), "hf_other": ("other", "write")}
ORGS = {"me": [{"name": "club", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}], "other": []}


class Fault(NamedTuple):
    """What goes wrong at the requests `first` to `last`, counted from 1, whose method and path match.

    `kind` is an HTTP status, or: `cut` (half of the body is read, then the connection ends), `cut answer` (half of the
    answer is sent), `corrupt` (the body is stored with a byte changed), `no etag`, `wrong etag`, `slow` (half a
    second), `lost answer` (it is done, but nobody hears of it), `overtaken` (somebody else commits first).
    """

    method: str
    path: str
    kind: str
    first: int = 1
    last: int = 1


class File(NamedTuple):
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]]
    branches: dict[str, str]
    messages: list[str] = field(default_factory=list)
    gated: bool = False

    @classmethod
    def new(cls, private: bool, space: bool = False) -> Repo:
        first = secrets.token_hex(20)
        files = {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}
        if space:  # the Hub's own page of a new static Space
            files |= {name: File(b"hello", False) for name in ("README.md", "index.html")}
        return cls(private, {first: files}, {"main": first})

    def at(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server and what it holds. `part_bytes`: larger files are uploaded in parts of that size."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another host, as the Hub's large files are
        self.lock = threading.RLock()
        self.part_bytes = 1 << 30
        self.reset()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.seen: dict[Fault, int] = {}
        self.part_bytes = 1 << 30

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a download of `repo` would give, the Hub's own file aside; nothing where there is no repository."""
        if repo not in self.repos:
            return {}
        files = self.repos[repo].commits[self.repos[repo].branches[revision]]
        return {name: file.content for name, file in files.items() if name != ".gitattributes"}

    def fault(self, method: str, path: str) -> str:
        with self.lock:
            self.requests.append(f"{method} {path}")
            matching = [fault for fault in self.faults if fault.method == method and re.search(fault.path, path)]
            for fault in matching:
                self.seen[fault] = self.seen.get(fault, 0) + 1
            kinds = [fault.kind for fault in matching if fault.first <= self.seen[fault] <= fault.last]
        return kinds[0] if kinds else ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        self.server_close()


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        kind = self.server.fault(self.command, path)
        self.kind, self.sent = kind, False
        if kind == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.drop()
            return
        self.body = self.read_body()
        if kind == "slow":
            time.sleep(0.5)
        if kind.isdigit():
            self.answer(int(kind), {"error": "a fault"}, {"Retry-After": "0"})
            return
        if kind == "corrupt" and self.body:
            self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
        try:
            with self.server.lock:
                self.route(path)
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
            self.answer(refused.status, {"error": refused.message, **refused.body}, headers)
        assert self.sent, f"{self.command} {path}: no answer"

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def drop(self) -> None:
        self.close_connection = self.sent = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.sent = True
        if self.kind == "lost answer":
            self.drop()
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            half = self.kind == "cut answer"
            self.wfile.write(content[: len(content) // 2] if half else content)
            if half:
                self.drop()

    # --- who may do what --------------------------------------------------------------------------------------------

    def user(self) -> tuple[str, str]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def may_write(self, namespace: str) -> None:
        name, role = self.user()
        writable = {name, *(org["name"] for org in ORGS[name] if org["roleInOrg"] != "read")}
        if role != "write" or namespace not in writable:
            raise RefusedError(403, f"You don't have the rights to write to {namespace}")

    def repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is not None and repo.private:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            reader = TOKENS.get(token, ("",))[0]
            if owner(name) not in {reader, *(org["name"] for org in ORGS.get(reader, ()))}:
                repo = None
        if repo is None:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if repo.gated:
            raise RefusedError(403, f"Access to model {name} is restricted", "GatedRepo")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.at(revision)
        if oid is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # --- routes -----------------------------------------------------------------------------------------------------

    def route(self, path: str) -> None:
        """A Space is kept, and asked for, as `spaces/USER/NAME`."""
        path = path.replace("/api/spaces/", "/api/models/spaces/")
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                getattr(self, name)(*match.groups())
                return
        raise RefusedError(404, f"no such route: {path}", "EntryNotFound")

    def json(self) -> Any:
        return json.loads(self.body)

    def whoami(self) -> None:
        name, role = self.user()
        self.answer(200, {"name": name, "orgs": ORGS[name], "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        asked = self.json()
        namespace = asked["organization"] or self.user()[0]
        self.may_write(namespace)
        space = asked.get("type") == "space"
        if space and asked.get("sdk") != "static":
            raise RefusedError(400, "sdk must be static")
        name = f"{'spaces/' if space else ''}{namespace}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.server.repos[name] = Repo.new(asked.get("visibility") == "private", space)
        self.answer(200, {"url": url, "name": name})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        oid = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        own = name.removeprefix("spaces/")
        self.answer(200, {"id": own, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def auth_check(self, name: str, write: str | None) -> None:
        self.repo(name)
        if write:
            self.may_write(owner(name))
        self.answer(200, {})

    def commits(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        self.commit_of(repo, revision)
        entries = [
            {"id": oid, "title": "a commit", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for oid in repo.commits
        ]
        self.answer(200, entries)

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name)
        self.may_write(owner(name))
        if branch in repo.branches:
            raise RefusedError(409, "Reference already exists")
        repo.branches[branch] = self.commit_of(repo, self.json().get("startingPoint", "main"))
        self.answer(200, {})

    def validate_yaml(self) -> None:
        import yaml

        content = self.json()["content"]
        parts = content.split("---\n")
        try:
            assert content.startswith("---\n") and isinstance(yaml.safe_load(parts[1]), dict)
        except (AssertionError, yaml.YAMLError):
            raise RefusedError(400, "Invalid metadata", errors=[{"message": "not YAML"}], warnings=[]) from None
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        if "create_pr" not in self.query:
            self.may_write(owner(name))
        there = repo.commits[self.commit_of(repo, revision)]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].oid if file["path"] in there else None,
            }
            for file in self.json()["files"]
        ]
        self.answer(200, {"files": files})

        if self.kind == "overtaken":
            repo.branches[revision] = oid = secrets.token_hex(20)
            repo.commits[oid] = {**there, "theirs.txt": File(b"theirs", False)}

    def batch(self, name: str) -> None:
        self.repo(name)
        asked, answers = self.json(), []
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            answers.append(answer)
            if oid in self.server.objects:
                continue
            upload: dict[str, Any] = {"href": f"{self.server.cdn}/upload/{oid}/{size}"}
            if size > self.server.part_bytes:
                count = -(-size // self.server.part_bytes)
                urls = {f"{part:05d}": f"{upload['href']}/{part}" for part in range(1, count + 1)}
                upload = {
                    "href": f"{self.server.url}/complete/{oid}/{size}",
                    "header": {"chunk_size": str(self.server.part_bytes), **urls},
                }
            verify = {"href": f"{self.server.url}/verify/{name}"}
            answer["actions"] = {"upload": upload, "verify": verify}
        self.answer(200, {"objects": answers, "transfer": "basic"})

    def keep(self, oid: str, size: str, content: bytes) -> None:
        if len(content) != int(size) or hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, "the sha256 of what was uploaded is another one")
        self.server.objects[oid] = content

    def upload(self, oid: str, size: str) -> None:
        self.keep(oid, size, self.body)
        self.answer(200, {}, {"ETag": etag(self.body)})

    def upload_part(self, oid: str, size: str, part: str) -> None:
        self.server.parts[oid, int(part)] = self.body
        tags = {"no etag": {}, "wrong etag": {"ETag": etag(b"wrong")}}
        self.answer(200, {}, tags.get(self.kind, {"ETag": etag(self.body)}))

    def complete(self, oid: str, size: str) -> None:
        content = b""
        for part in self.json()["parts"]:
            stored = self.server.parts.pop((oid, part["partNumber"]), b"")
            if etag(stored) != part["etag"]:
                raise RefusedError(400, "a part's ETag is another one")
            content += stored
        self.keep(oid, size, content)
        self.answer(200, {})

    def verify(self, name: str) -> None:
        asked = self.json()
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "the object is not there")
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        to_pr = "create_pr" in self.query
        if not to_pr:
            self.may_write(owner(name))
        parent = self.commit_of(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise RefusedError(412, "A commit has happened since")
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise RefusedError(422, "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = File(self.server.objects[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = secrets.token_hex(20)
        repo.commits[oid] = files
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        repo.branches[f"refs/pr/{number}" if to_pr else revision] = oid
        repo.messages.append(header["summary"])
        url = f"{self.server.url}/{name}"
        self.answer(
            200,
            {
                "commitUrl": f"{url}/commit/{oid}",
                "commitOid": oid,
                "pullRequestUrl": f"{url}/discussions/{number}" if to_pr else None,
            },
        )

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit_of(repo, revision)]
        if folder and not any(path.startswith(f"{folder}/") for path in files):
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        entries = [entry(path, file) for path, file in files.items() if path.startswith(f"{folder}/" if folder else "")]
        self.answer(200, entries)

    def paths_info(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit_of(repo, revision)]
        self.answer(200, [entry(path, files[path]) for path in self.json()["paths"] if path in files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        oid = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": oid}
        file = repo.commits[oid].get(path)
        if file is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        tag = f'"{"0" * len(file.oid) if self.kind == "wrong etag" else file.oid}"'
        if not file.large:
            self.ranged(file.content, {**headers, "ETag": tag})
            return
        linked = {"X-Linked-Etag": tag, "X-Linked-Size": str(len(file.content))}
        self.answer(302, b"", {**headers, **linked, "Location": f"{self.server.cdn}/cdn/{file.oid}"})

    def download(self, oid: str) -> None:
        content = self.server.objects[oid]
        if self.kind == "corrupt":
            content = bytes([*content[:-1], content[-1] ^ 1])
        self.ranged(content, {"ETag": etag(content)})

    def ranged(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(200, content, {**headers, "Accept-Ranges": "bytes"})
            return
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        span = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        self.answer(206, content[start:stop], {**headers, "Content-Range": span})


def owner(name: str) -> str:
    return name.removeprefix("spaces/").partition("/")[0]


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def entry(path: str, file: File) -> dict[str, Any]:
    plain = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if not file.large:
        return plain
    return {**plain, "lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}}


REPO = r"((?:spaces/)?[\w.-]+/[\w.-]+)"
REVISION = r"(refs/pr/\d+|[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/models/{REPO}/auth-check(/write)?", "auth_check"),
    ("GET", f"/api/models/{REPO}", "info"),
    ("GET", f"/api/models/{REPO}/revision/(.+)", "info"),
    ("GET", f"/api/models/{REPO}/commits/(.+)", "commits"),
    ("POST", f"/api/models/{REPO}/branch/(.+)", "branch"),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/(.+)", "commit"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(.+))?", "tree"),
    ("POST", f"/api/models/{REPO}/paths-info/(.+)", "paths_info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/upload/(\w+)/(\d+)", "upload"),
    ("PUT", r"/upload/(\w+)/(\d+)/(\d+)", "upload_part"),
    ("POST", r"/complete/(\w+)/(\d+)", "complete"),
    ("POST", f"/verify/{REPO}", "verify"),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(.+)", "resolve"),
    ("GET HEAD", r"/cdn/(\w+)", "download"),
)
