"""A server in this process: an engine over the tiny model, its application, and raw sockets."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import qmix
from qmix.serving.engine import Engine
from qmix.serving.http.app import app
from qmix.serving.http.guard import Access
from qmix.serving.http.served_model import ServedModel
from qmix.serving.http.server import Server, listening
from qmix.serving.limits import Limits
from tests.support.models import TINY
from tests.support.process import PATIENCE


@dataclass
class Caller:
    """Who calls a server on a port of 127.0.0.1."""

    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def connected(self):
        """A socket that is connected to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def raw(self, data):
        """All that the server sends for these bytes, until it closes the connection."""
        with self.connected() as client:
            client.sendall(data)
            return all_of(client)

    def post(self, path, document, **headers):
        """The status and the document that come back, on a connection of its own."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return answer(self.raw(request("POST", path, body, **headers)))

    def streaming(self, path, document):
        """A connection on which a stream has begun."""
        client = self.connected()
        client.sendall(request("POST", path, json.dumps(document).encode()))
        data = b""
        while b"data: " not in data:
            data += client.recv(4096)
        return client

    def get(self, path, **headers):
        return answer(self.raw(request("GET", path, **headers)))


@dataclass
class Served(Caller):
    """A server that runs in this process."""

    model: qmix.MixtralForCausalLM
    tokenizer: qmix.LlamaTokenizer
    engine: Engine
    server: Server

    def until_idle(self):
        """Wait until the engine runs nothing."""
        until(lambda: self.engine.counts.running == self.engine.counts.waiting == 0)


def request(method, path, body=b"", **headers):
    """The bytes of a request that closes its connection; underscores in names are hyphens."""
    given = {"host": "localhost", "connection": "close", "content-length": str(len(body))}
    if method == "POST":
        given["content-type"] = "application/json"
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


def answer(data):
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def all_of(client):
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serving(model=None, tokenizer=None, *, key=None, deadline_s=600.0, names=(), **limits):
    """A server of a model, the tiny one unless another is given."""
    if model is None:
        model, tokenizer = qmix.load(TINY, device="cpu", dtype="float32")  # no two scores tie
    limits = Limits(**{"context": 256, "slots": 4, **limits})
    engine = Engine(model, tokenizer, limits)
    served = ServedModel.of(model, tokenizer, limits, name="tiny", created=1)
    listener = listening("127.0.0.1", 0)
    port = listener.getsockname()[1]
    access = Access(key, frozenset(names))
    server = Server(app(engine, served, access, deadline_s=deadline_s), engine, lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(port, model, tokenizer, engine, server)
    finally:
        engine.close(0)  # what still runs is not waited for
        server.should_exit = True
        thread.join()
