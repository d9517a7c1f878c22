"""A Hub on this machine: as much of its interface as pushing and loading models and datasets asks for, all in memory.

Repositories have commits with hashes of their own, branches and tags, visibility, gates; large files are checked against the hash
they were announced with; failures can be ordered. Point `HF_ENDPOINT` at its address, with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import RLock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_test"  # of the owner; any other token that is not in `refused` is a stranger's
LARGE = (
    "*.safetensors",
    "*.parquet",
    "*.tar",
    "*.bin",
    "*.svs",
)  # what goes by LFS, as by the Hub's own .gitattributes
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()


@dataclass
class Repo:
    """A repository: the files of every commit, and which commit a branch or tag is."""

    id: str
    kind: str
    private: bool = False
    gated: Any = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # main and the tags

    @property
    def files(self) -> dict[str, bytes]:
        """Of the last commit."""
        return self.commits[self.refs["main"]]

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{self.kind} {self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs["main"] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Failure:
    """Answers requests of this method and path with `status`, or cuts the connection when it is 0.

    The first `after` such requests pass, the next `times` fail; a cut upload is cut after `received` bytes of it.
    """

    method: str
    path: str  # with wildcards
    status: int = 500
    after: int = 0
    times: int = 1
    received: int = 1000


@dataclass
class LoopbackHub:
    """What the server knows, for a test to look at and to change.

    Attributes:
        address: for HF_ENDPOINT.
        repos: by kind ("models", "datasets") and id.
        requests: method, path and status of every request.
        received: bytes of each upload that arrived whole, by hash, in the order of arrival.
        large: the large files that are there, by hash.
        failures: what is to go wrong.
        refused: tokens that are not valid.
        read_only: namespaces that the owner may not write to.
    """

    address: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    received: list[tuple[str, int]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    read_only: set[str] = field(default_factory=set)
    lock: RLock = field(default_factory=RLock)

    def create(self, kind: str, name: str, files: dict[str, bytes] | None = None, **facts: Any) -> Repo:
        repo = self.repos[kind, name] = Repo(name, kind, **facts)
        repo.commit({".gitattributes": ATTRIBUTES, **(files or {})})
        return repo

    def model(self, name: str) -> Repo:
        return self.repos["models", name]

    def dataset(self, name: str) -> Repo:
        return self.repos["datasets", name]

    def count(self, method: str, path: str) -> int:
        """How many requests of this method and path, with wildcards, there were."""
        return sum(each[0] == method and fnmatch(each[1], path) for each in self.requests)

    def failure_of(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if failure.method == method and fnmatch(path, failure.path):
                if failure.after:
                    failure.after -= 1
                elif failure.times:
                    failure.times -= 1
                    return failure
        return None


class Handler(BaseHTTPRequestHandler):
    """Answers by the path asked for."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.hub.requests.append((self.command, unquote(urlsplit(self.path).path), status))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, **{"X-Error-Code": code, "X-Error-Message": message})

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            failure = self.hub.failure_of(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if failure and not failure.status:
            self.rfile.read(min(failure.received, length))
            self.hub.requests.append((self.command, path, 0))
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if failure:
            return self.answer({"error": "it was ordered to fail"}, failure.status)
        if self.token in self.hub.refused:
            return self.refuse(401, "InvalidToken", "Invalid user token.")
        with self.hub.lock:
            self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            self.answer({"name": "owner", "type": "user", "orgs": []}) if self.token else self.refuse(401, "", "Who?")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            wrong = [{"message": '"license" must be one of a list'}] if "license: wrong" in body.decode() else []
            self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif path.startswith("/uploads/"):
            self.upload(path.rpartition("/")[2], body)
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            self.api(self.allowed(found[1], found[2], found[3] or ""), found[3] or "", body)
        elif found := re.fullmatch(
            r"/(?:(datasets)/)?([^/]+/[^/]+?)(?:\.git/info/lfs/(.*)|/resolve/([^/]+)/(.*))", path
        ):
            repo = self.allowed(found[1] or "models", found[2], "resolve" if found[4] else "lfs")
            if repo and found[4]:
                self.resolve(repo, found[4], found[5])
            elif repo:
                self.announce(json.loads(body))
        else:
            self.refuse(404, "EntryNotFound", f"no {path}")

    def allowed(self, kind: str, name: str, action: str) -> Repo | None:
        """The repository, if there is one and this token may do that with it; else the refusal is sent."""
        repo = self.hub.repos.get((kind, name))
        writes = action.split("/")[0] in ("preupload", "lfs", "commit", "tag", "settings")
        owner = self.token == TOKEN
        if repo is None or (repo.private and not owner):
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif writes and (not owner or name.split("/")[0] in self.hub.read_only):
            self.refuse(403, "", "You don't have the rights to write here")
        elif repo.gated and not owner and action in ("resolve", "auth-check"):
            self.refuse(403 if self.token else 401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted")
        else:
            return repo
        return None

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        url = f"{self.hub.address}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if self.token is None:
            self.refuse(401, "", "Who?")
        elif self.token != TOKEN or name.split("/")[0] in self.hub.read_only:
            self.refuse(403, "", f"You don't have the rights to create a {kind[:-1]} under this namespace")
        elif (kind, name) in self.hub.repos:
            self.answer({"error": "You already created this repo", "url": url}, 409)
        else:
            self.hub.create(kind, name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self.answer({"url": url})

    def api(self, repo: Repo | None, action: str, body: bytes) -> None:
        if repo is None:
            return
        verb, _, rest = action.partition("/")
        if verb in ("", "revision"):
            sha = repo.resolve(rest or "main")
            self.describe(repo, sha) if sha else self.refuse(404, "RevisionNotFound", f"no revision {rest}")
        elif verb == "auth-check":
            self.answer({})
        elif verb == "refs":
            refs = {name: {"name": name, "ref": name, "targetCommit": sha} for name, sha in repo.refs.items()}
            main = refs.pop("main")
            self.answer({"branches": [main], "tags": list(refs.values()), "converts": []})
        elif verb == "preupload":
            modes = []
            for file in json.loads(body)["files"]:
                large = any(fnmatch(file["path"], pattern) for pattern in LARGE)
                there = repo.files.get(file["path"])
                oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
                mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                modes.append({"path": file["path"], **mode, "oid": oid})
            self.answer({"files": modes})
        elif verb == "commit":
            self.commit(repo, [json.loads(line) for line in body.splitlines()])
        elif verb == "tag":
            tag, sha = json.loads(body)["tag"], repo.resolve(rest)
            if tag in repo.refs:
                self.answer({"error": "Tag reference exists already"}, 409)
            else:
                repo.refs[tag] = sha
                self.answer({})
        elif verb == "settings":
            settings = json.loads(body)
            repo.private = settings.get("visibility", "private" if repo.private else "public") == "private"
            repo.gated = settings.get("gated", repo.gated)
            self.answer({"private": repo.private, "gated": repo.gated})
        elif verb == "paths-info":
            files = repo.commits[repo.resolve(rest)]
            self.answer([entry_of(name, files[name]) for name in json.loads(body)["paths"] if name in files])
        elif verb == "tree":
            revision, _, folder = rest.partition("/")
            self.list_tree(repo.commits.get(repo.resolve(revision), {}), folder)
        else:
            self.refuse(404, "EntryNotFound", f"no {self.path}")

    def describe(self, repo: Repo, sha: str) -> None:
        facts = {"id": repo.id, "private": repo.private, "gated": repo.gated, "tags": [], "downloads": 0, "likes": 0}
        self.answer({**facts, "sha": sha, "siblings": [{"rfilename": name} for name in repo.commits[sha]]})

    def list_tree(self, files: dict[str, bytes], folder: str) -> None:
        prefix = folder + "/" if folder else ""
        entries = [entry_of(name, content) for name, content in files.items() if name.startswith(prefix)]
        parents = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
        entries += [
            {"type": "directory", "path": each, "oid": "0" * 40} for each in parents if each.startswith(prefix)
        ]
        if "recursive=true" not in urlsplit(self.path).query.lower():
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self.answer(entries) if entries or not folder else self.refuse(404, "EntryNotFound", f"no {folder}")

    def resolve(self, repo: Repo, revision: str, name: str) -> None:
        sha = repo.resolve(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound", f"no revision {revision}")
        if name not in repo.commits[sha]:
            return self.refuse(404, "EntryNotFound", f"no {name}")
        content = repo.commits[sha][name]
        headers = {"ETag": f'"{entry_of(name, content)["oid"]}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and self.command == "GET":
            last = int(part[2]) if part[2] else len(content) - 1
            headers["Content-Range"] = f"bytes {part[1]}-{last}/{len(content)}"
            self.answer(content[int(part[1]) : last + 1], 206, **headers)
        else:
            self.answer(content, **headers)

    def announce(self, asked: dict) -> None:
        """Where to send the large files that are not there yet."""
        objects = []
        for each in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.address}/uploads/{each['oid']}"}}
            objects.append({**each, **({} if each["oid"] in self.hub.large else {"actions": action})})
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "these are not the bytes that were announced"}, 400)
        self.hub.received.append((oid, len(body)))
        self.hub.large[oid] = body
        self.answer({})

    def commit(self, repo: Repo, lines: list[dict]) -> None:
        files, header = dict(repo.files), lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs["main"]):
            return self.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self.answer({"commitUrl": f"{self.hub.address}/{repo.id}/commit/{sha}", "commitOid": sha})


def git_hash(content: bytes) -> str:
    """The hash by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry_of(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    if any(fnmatch(name, pattern) for pattern in LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of connections that were cut, by order or by the client."""


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A new, empty Hub."""
    hub = LoopbackHub()
    server = Server(("127.0.0.1", 0), type("NewHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def hub_environment(
    environment: dict[str, str], hub: LoopbackHub, home: object, token: str | None = TOKEN
) -> dict[str, str]:
    """The environment of a process that takes this Hub for the Hub, with a cache and a login of its own."""
    kept = {name: value for name, value in environment.items() if not name.startswith("HF_")}
    kept |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return kept if token is None else {**kept, "HF_TOKEN": token}
