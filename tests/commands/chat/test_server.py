"""A server by its address: which are none, how events are read, and what is said of a fault."""

import sys

import pytest

from qmix.commands.chat import server as module
from qmix.commands.chat.chat_model import ServerError
from qmix.commands.chat.server import Server
from qmix.errors import UnsupportedError, UsageError
from tests.support.fake_openai import DONE, event, faking


@pytest.fixture
def fake():
    with faking() as fake:
        yield fake


@pytest.fixture
def server(fake):
    with Server(fake.url, "secret") as server:
        yield server


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("localhost:8000/", "http://localhost:8000/v1"),
        ("http://[::1]:80/v1/", "http://[::1]:80/v1"),
        ("https://example.org/api/v3", "https://example.org/api/v3"),
    ],
)
def test_an_address_gets_what_it_lacks(given, url):
    with Server(given) as server:
        assert server.url == url


@pytest.mark.parametrize(
    "given",
    ["", "ftp://a", "http://", "http://a:b", "a b", "http://a/?x", "http://[", "http://a:0x"],
)
def test_what_is_no_address_is_refused(given):
    with pytest.raises(UsageError, match="--connect: not the address"):
        Server(given)


def test_a_secret_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(UsageError, match="secret") as refused:
        Server("http://me:hunter2@localhost")
    assert "hunter2" not in str(refused.value)


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'qmix-runtime\[connect\]'"):
        Server("localhost")


def test_events_end_at_newlines_alone_and_comments_are_none():
    text = "a\u2028b\u0085c\x1c"
    parts = [b": waiting\n\nda", b"ta: ", text.encode()[:3], text.encode()[3:], b"\r\n\ndata:x\n"]
    assert list(module._events(parts)) == [text.encode(), b"x"]


def test_chunks_come_in_order_and_the_key_goes_along(fake, server):
    fake.streams = [event("a\u2028") + b": waiting\n\n" + event("b") + DONE + event("never")]
    chunks = list(server.chunks({}))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["a\u2028", "b"]
    assert fake.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("stream", "kind", "said"),
    [
        ((400, b'{"error": {"message": "too hot"}}'), UsageError, "refused; found too hot"),
        ((422, b'{"detail": "no"}'), UsageError, "found no"),
        ((401, b"{}"), UsageError, "wants a key; found no reason. Set QMIX_API_KEY"),
        ((503, b"<html>"), ServerError, "refused; found status 503"),
        (b'data: {"error": {"message": "out of memory"}}\n\n', ServerError, "found out of memory"),
        (b"data: what\n\n", ServerError, "no server of OpenAI's API"),
        (b"data: []\n\n", ServerError, "expected JSON"),
    ],
)
def test_faults_are_said_in_one_line(fake, server, stream, kind, said):
    fake.streams = [stream]
    with pytest.raises(kind) as refused:
        list(server.chunks({}))
    assert type(refused.value) is kind
    assert said in str(refused.value)
    assert fake.url in str(refused.value)


def test_a_server_that_is_not_there_or_speaks_otherwise(fake, server):
    with Server("http://127.0.0.1:1") as nobody, pytest.raises(ServerError, match="not answer"):
        nobody.models()
    fake.answers["/v1/models"] = {"data": 3}
    with pytest.raises(ServerError, match="Give its base URL"):
        server.models()
    with Server(f"{fake.url}/x") as elsewhere, pytest.raises(UsageError, match="status 404"):
        elsewhere.models()
    assert server.answer("/tokenize", {}) is None
