"""A server on loopback that speaks as much of the hub's API as huggingface_hub asks for.

Models' pages, trees of files, `resolve` with a redirect of large files to another path, ranges, and
the refusals: 401 of a gated or missing repository, 404, 429, and a connection that is cut.
"""

import json
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".gguf", ".pt", ".bin")
CHUNK = 1 << 16


@dataclass(frozen=True)
class Virtual:
    """A file that begins with `start` and is `nbytes` long: zeros follow."""

    start: bytes
    nbytes: int

    def read(self, first: int, last: int) -> bytes:
        data = self.start[first:last]
        return data + bytes(last - first - len(data))


BIG = Virtual(b"", 50 << 30)


@dataclass(frozen=True)
class OnDisk:
    """A file of this machine."""

    path: Path

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def read(self, first: int, last: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(first)
            return file.read(last - first)


@dataclass
class Hub:
    """What the server holds, and what was asked of it.

    Attributes:
        repositories: ORG/NAME -> path -> file.
        gated: may be read with a token only.
        cut: the next answer with data of this file ends after so many bytes.
        status: every answer is this refusal.
        ranges: whether it knows them.
        pause_s: after each 64 KiB.
        sent: bytes of data and documents that went out.
        requests: method and path of each.
    """

    url: str = ""
    repositories: dict = field(default_factory=dict)
    gated: set = field(default_factory=set)
    commits: dict = field(default_factory=lambda: {"main": COMMIT})
    cut: dict = field(default_factory=dict)
    status: int | None = None
    ranges: bool = True
    pause_s: float = 0
    sent: int = 0
    requests: list = field(default_factory=list)

    def reset(self) -> None:
        """Hold nothing, refuse nothing, have been asked nothing."""
        for kept in (self.repositories, self.gated, self.cut, self.requests):
            kept.clear()
        self.status, self.ranges, self.sent, self.pause_s = None, True, 0, 0

    def add(self, name: str, folder: Path, **files) -> None:
        """Publish a folder's files, and others given as bytes or `Virtual`."""
        found = {p.name: OnDisk(p) for p in folder.iterdir()} if folder is not None else {}
        for path, data in files.items():
            found[path] = Virtual(data, len(data)) if isinstance(data, bytes) else data
        self.repositories[name] = found

    @property
    def elsewhere(self) -> str:
        """Another host, as the hub's store of large files is: no token may be sent there."""
        return self.url.replace("127.0.0.1", "localhost")

    def environment(self, home: Path) -> dict:
        """Of a process that sees this hub, with its own empty cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


@contextmanager
def serving():
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def seen_by_this_process(hub: Hub, home: Path, patch: pytest.MonkeyPatch):
    """huggingface_hub reads its environment when it is imported: set what it read.

    `patch` is the test's own: what both set must be undone in the reverse order.
    """
    from huggingface_hub import close_session, constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    close_session()
    yield
    close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        hub = self.hub
        parts = urlsplit(self.path)
        hub.requests.append(f"{self.command} {parts.path}")
        if hub.status is not None:
            self.refuse(hub.status, "", {"Retry-After": "7"} if hub.status == 429 else {})
            return
        words = [unquote(word) for word in parts.path.split("/")[1:]]
        if words[:2] == ["api", "models"]:
            self.api(words[2:], parse_qs(parts.query))
        elif words[0] == "blobs-elsewhere":
            self.data("/".join(words[1:3]), "/".join(words[3:]), body=body)
        elif len(words) > 4 and words[2] == "resolve":
            self.resolve("/".join(words[:2]), words[3], "/".join(words[4:]), body=body)
        else:
            self.refuse(404, "RepoNotFound")

    def found(self, name, revision):
        """Whether the caller may see the revision; answers if not."""
        hub = self.hub
        allowed = self.headers.get("authorization") == "Bearer hf_good"
        if name not in hub.repositories:
            self.refuse(404 if allowed else 401, "RepoNotFound")
        elif name in hub.gated and not allowed:
            self.refuse(401 if "authorization" not in self.headers else 403, "GatedRepo")
        elif revision not in hub.commits and revision not in hub.commits.values():
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def api(self, words, query):
        name, rest = "/".join(words[:2]), words[2:]
        revision = "/".join(rest[1:]) if rest else "main"
        if not self.found(name, revision):
            return
        files = self.hub.repositories[name]
        commit = self.hub.commits.get(revision, revision)
        if rest and rest[0] == "tree":
            document = [
                {"type": "file", "path": path, "size": file.nbytes, "oid": _etag(path, file),
                 **({"lfs": {"oid": _sha(file), "size": file.nbytes, "pointerSize": 134}}
                    if path.endswith(LARGE) else {})}
                for path, file in files.items()
            ]  # fmt: skip
        else:
            siblings = [
                {"rfilename": path, **({"size": file.nbytes} if "blobs" in query else {})}
                for path, file in files.items()
            ]
            document = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False,
                        "tags": [], "downloads": 0, "siblings": siblings}  # fmt: skip
        data = json.dumps(document).encode()
        self.start(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.send(data)

    def resolve(self, name, revision, path, *, body):
        if not self.found(name, revision):
            return
        commit = self.hub.commits.get(revision, revision)
        file = self.hub.repositories[name].get(path)
        headers = {"X-Repo-Commit": commit}
        if file is None:
            self.refuse(404, "EntryNotFound", headers)
        elif path.endswith(LARGE):
            headers |= {"X-Linked-Size": str(file.nbytes), "X-Linked-Etag": f'"{_sha(file)}"',
                        "Location": f"{self.hub.elsewhere}/blobs-elsewhere/{name}/{path}"}  # fmt: skip
            self.start(302, {**headers, "Content-Length": "0"})
        else:
            self.data(name, path, {**headers, "ETag": f'"{_etag(path, file)}"'}, body=body)

    def data(self, name, path, headers=(), *, body):
        file = self.hub.repositories[name][path]
        first, last, status = 0, file.nbytes, 200
        wanted = self.headers.get("Range") if self.hub.ranges else None
        if wanted is not None:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop or last) + (1 if stop else 0), file.nbytes)
            status = 206
        headers = {"ETag": f'"{_etag(path, file)}"', **dict(headers)}
        headers["Content-Length"] = str(last - first)
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{file.nbytes}"
        self.start(status, headers)
        if not body:
            return
        stop = min(last, first + self.hub.cut.pop(path, last))
        for at in range(first, stop, CHUNK):
            self.send(file.read(at, min(at + CHUNK, stop)))
            time.sleep(self.hub.pause_s)
        if stop < last:
            self.close_connection = True
            self.connection.shutdown(2)

    def refuse(self, status, code, headers=()):
        self.start(status, {"X-Error-Code": code, "Content-Length": "0", **dict(headers)})

    def start(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, data):
        try:
            self.wfile.write(data)
            self.hub.sent += len(data)
        except OSError:  # the reader has what it wanted
            self.close_connection = True


def _sha(file) -> str:
    """A name for the content that is cheap to make: no test asks for the real hash."""
    return sha256(file.read(0, min(file.nbytes, CHUNK)) + str(file.nbytes).encode()).hexdigest()


def _etag(path, file) -> str:
    return _sha(file)[: 64 if path.endswith(LARGE) else 40]


def mixtral_8x7b() -> dict:
    """A repository of the 8x7B's shapes in 19 shards whose data are zeros."""
    from qmix.config import MixtralConfig
    from qmix.formats.files.shard_names import INDEX, shard_name
    from qmix.formats.names import model_tensors

    config = MixtralConfig(dtype="bfloat16", max_position_embeddings=32768)
    count, weight_map, shards = 19, {}, [{} for _ in range(19)]
    tensors = list(model_tensors(config))
    nbytes = [2 * math.prod(tensor.shape) for tensor in tensors]
    share, done = sum(nbytes) / count, 0
    for tensor, size in zip(tensors, nbytes, strict=True):
        shard = min(int(done / share), count - 1)
        start = max((entry["data_offsets"][1] for entry in shards[shard].values()), default=0)
        shards[shard][tensor.name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, start + size]
        }  # fmt: skip
        weight_map[tensor.name] = shard_name(shard, count)
        done += size
    files = {
        "config.json": config.to_json().encode(),
        INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
    }
    for number, entries in enumerate(shards):
        header = json.dumps(entries).encode()
        start = len(header).to_bytes(8, "little") + header
        size = len(start) + max(entry["data_offsets"][1] for entry in entries.values())
        files[shard_name(number, count)] = Virtual(start, size)
    return files
