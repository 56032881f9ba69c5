"""A server of OpenAI's API that does what a test says: other makers' ways and faults."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def event(text=None, finish=None, **more):
    """An event of a chat's stream."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, **more}
    document = {"choices": [{**choice, "finish_reason": finish}]}
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


class FakeServer(ThreadingHTTPServer):
    """Answers each chat with the next of its streams, and all else by path.

    Attributes:
        streams: bytes, or (status, bytes), each the whole answer to one chat; then it hangs up.
        answers: path -> document.
        asked: (path, document) of each request, documents of GET are None.
        keys: what each request gave as its key.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.streams, self.asked, self.keys = [], [], []
        self.answers = {"/v1/models": {"data": [{"id": "other", "owned_by": "them"}]}}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def chats(self):
        return [document for path, document in self.asked if path.endswith("/chat/completions")]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, document):
        server = self.server
        server.asked.append((self.path, document))
        server.keys.append(self.headers["authorization"])
        if self.path.endswith("/chat/completions"):
            found = server.streams.pop(0)
            status, data = found if isinstance(found, tuple) else (200, found)
        elif self.path in server.answers:
            status, data = 200, json.dumps(server.answers[self.path]).encode()
        else:
            status, data = 404, b"<html>no</html>"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def faking():
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
