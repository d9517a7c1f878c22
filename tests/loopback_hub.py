"""A Hub on this machine: as much of its interface as pushing and loading a dataset asks for, its files in memory."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from urllib.parse import unquote, urlsplit


SHA = "0123456789abcdef" * 2 + "01234567"  # of every commit


class Hub(BaseHTTPRequestHandler):
    """Answers by the path asked for: parquet files are uploaded by LFS before the commit, the others come within it."""

    files: dict[str, bytes]
    uploads: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, path: str) -> None:
        self.answer({"error": f"no {path}"}, 404, **{"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/datasets/{repo_of(json.loads(body))}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".parquet") else "regular" for name in names]
            kinds = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in zip(names, modes)]
            self.answer({"files": kinds})
        elif path.endswith("/info/lfs/objects/batch"):
            place = f"http://{self.headers['Host']}/uploads"
            wanted = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{place}/{each['oid']}"}} for each in wanted]
            objects = [{**each, "actions": action} for each, action in zip(wanted, actions)]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/paths-info/" in path:
            asked = json.loads(body)["paths"]
            self.answer([entry_of(name, self.files[name]) for name in asked if name in self.files])
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.uploads[value["oid"]]
            repo = path.removeprefix("/api/").partition("/commit/")[0]
            self.answer({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{SHA}", "commitOid": SHA})
        else:
            self.missing(path)

    def do_PUT(self) -> None:
        self.uploads[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+(?:/(.*))?", path):
            folder = found[1] + "/" if found[1] else ""
            entries = [entry_of(name, content) for name, content in self.files.items() if name.startswith(folder)]
            parents = {str(parent) for name in self.files for parent in PurePosixPath(name).parents} - {"."}
            entries += [{"type": "directory", "path": each, "oid": SHA} for each in parents if each.startswith(folder)]
            if "recursive=true" not in urlsplit(self.path).query.lower():
                entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(folder)]
            self.answer(entries) if entries or not folder else self.missing(path)
        elif found := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.*)", path):
            if found[1] not in self.files:
                return self.missing(path)
            content = self.files[found[1]]
            headers = {"ETag": f'"{oid_of(content)}"', "X-Repo-Commit": SHA}
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part and self.command == "GET":
                self.answer(content[int(part[1]) : int(part[2]) + 1], 206, **headers)
            else:
                self.answer(content, **headers)
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": found[1], "sha": SHA, "siblings": siblings, "private": False, "tags": []})
        else:
            self.missing(path)

    do_HEAD = do_GET


def repo_of(request: dict) -> str:
    return f"{request.get('organization', 'me')}/{request['name']}"


def oid_of(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry_of(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": oid_of(content)}


@contextmanager
def loopback_hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a new Hub, for HF_ENDPOINT, and the files that are pushed to it."""
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("NewHub", (Hub,), {"files": files, "uploads": {}}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
