"""Stand-in for the Hugging Face hub on the loopback interface, with the part of its HTTP interface that we use.

Repositories have commits, branches, owners and access as on the hub. Small files come in the commit, weights are
uploaded before it, by Git LFS.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN, STRANGER = "hf_of_the_owner", "hf_of_a_stranger"  # noqa: S105 - of no real account
OWNER = "lab"


@dataclass
class Repo:
    """Repository: files of each commit by path, commits of branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class Refused(Exception):
    """Answer with an error status; `name` is the repository that is there already."""

    def __init__(self, status: int, code: str = "", message: str = "", name: str = "") -> None:
        self.status, self.code, self.message, self.name = status, code, message, name


class Hub:
    """Server with `repos` by name; `downloads` are the paths that were asked for. A context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.downloads: list[str] = []
        self.broken = ""  # requests whose path holds this text fail
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self._body()
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                headers, content = {}, b""
                try:
                    status, headers, content = hub.answer(self.command, unquote(self.path), token, body)
                except Refused as refused:
                    status = refused.status
                    headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                    content = json.dumps({"error": refused.message, "url": f"{hub.address}/{refused.name}"}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of an answer. Raises Refused."""
        path = urlsplit(path).path
        if self.broken and self.broken in path:
            raise Refused(400, message="the hub is down")  # 500 would be tried again, for long
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda *_: {"errors": [], "warnings": []}),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._modes),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(\w+)", self._store),
        ):
            if found := re.fullmatch(pattern, path):
                made = answer(token, body, *found.groups())
                return 200, {"Content-Type": "application/json"}, json.dumps(made).encode()
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(method, token, *found.groups())
        raise Refused(404, "EntryNotFound")

    def _repo(self, name: str, token: str, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if write and not token:
            raise Refused(401, message="Invalid username or password.")
        if repo is None or (repo.private and token != TOKEN):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != TOKEN:
            raise Refused(403, message="You don't have the rights to write there")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _create(self, token: str, body: bytes) -> dict:
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name'].rpartition('/')[2]}"
        if not token:
            raise Refused(401, message="Invalid username or password.")
        if token != TOKEN:
            raise Refused(403, message=f"You don't have the rights to create a model under {OWNER}")
        if name in self.repos:
            raise Refused(409, message="You already created this model repo", name=name)
        private = asked.get("private", asked.get("visibility") == "private")
        self.repos[name] = Repo(private=bool(private))
        self.repos[name].commit("main", {".gitattributes": b""})
        return {"url": f"{self.address}/{name}", "name": name, "id": name}

    def _branch(self, token: str, _: bytes, name: str, branch: str) -> dict:
        repo = self._repo(name, token, write=True)
        if branch in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def _refs(self, token: str, _: bytes, name: str) -> dict:
        branches = self._repo(name, token).branches
        found = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": oid} for key, oid in branches.items()]
        return {"branches": found, "tags": [], "converts": []}

    def _info(self, token: str, _: bytes, name: str, revision: str = "main") -> dict:
        repo = self._repo(name, token)
        oid = self._commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        return {"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}

    def _tree(self, token: str, _: bytes, name: str, revision: str) -> list[dict]:
        repo = self._repo(name, token)
        files = repo.commits[self._commit_of(repo, revision)]
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]

    def _modes(self, token: str, body: bytes, name: str, _: str) -> dict:
        self._repo(name, token, write=True)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}

    def _batch(self, token: str, body: bytes, name: str) -> dict:
        self._repo(name, token, write=True)
        objects = json.loads(body)["objects"]
        links = [{"upload": {"href": f"{self.address}/lfs/{one['oid']}", "header": {}}} for one in objects]
        return {
            "transfer": "basic",
            "objects": [dict(one) | {"actions": link} for one, link in zip(objects, links, strict=True)],
        }

    def _store(self, _: str, body: bytes, oid: str) -> dict:
        assert hashlib.sha256(body).hexdigest() == oid
        self.lfs[oid] = body
        return {}

    def _commit(self, token: str, body: bytes, name: str, branch: str) -> dict:
        repo = self._repo(name, token, write=True)
        files = dict(repo.commits[self._commit_of(repo, branch)])
        for line in body.splitlines():
            kind, value = (one := json.loads(line))["key"], one["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(branch, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}", "hookOutput": ""}

    def _file(self, method: str, token: str, name: str, revision: str, path: str):
        repo = self._repo(name, token)
        if repo.gated:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        oid = self._commit_of(repo, revision)
        if path not in repo.commits[oid]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = repo.commits[oid][path]
        if method == "GET":
            self.downloads.append(path)
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": oid, "Content-Length": str(len(data))}, data
