"""Clients that send nonsense, too much or nothing, or leave: nobody else notices."""

import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qmix import LlamaTokenizer
from qmix.serving.http import body, descriptors
from qmix.serving.http.connection import Connection
from tests.support.http_server import all_of, answer, request, serving, until
from tests.support.models import TINY, small_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": [5], "max_tokens": 10_000, "temperature": 0, "stream": True}


def long_model():
    """A model with room for replies that take a while, and its tokenizer."""
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    size = {"num_hidden_layers": 1, "max_position_embeddings": 1 << 16}
    return small_model(vocab_size=len(tokenizer), **size), tokenizer


@pytest.fixture(scope="module")
def served():
    model, tokenizer = long_model()
    with serving(model, tokenizer, slots=2, waiting=1, context=1 << 15) as served:
        yield served


def reply(served, **options):
    return served.post(COMPLETIONS, {"prompt": [5], "max_tokens": 3, **options})


def still_answers(served):
    status, document = reply(served)
    return status == 200 and document["usage"]["completion_tokens"] == 3


def streaming(served, **options):
    """A connection on which a long stream has begun."""
    return served.streaming(COMPLETIONS, {**LONG, **options})


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "an object"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"prompt": ' + b"[" * 50_000, "JSON"),
        (b'{"max_tokens": 1' + b"0" * 5000 + b"}", "digits"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(served, sent, said):
    status, document = served.post(COMPLETIONS, sent)
    assert status == 400
    assert document["error"]["code"] == "invalid_json"
    assert said in document["error"]["message"]


def test_a_body_of_another_kind_is_refused(served):
    for headers in ({"content_type": "text/plain"}, {"content_encoding": "gzip"}):
        status, document = served.post(COMPLETIONS, {"prompt": "a"}, **headers)
        assert (status, document["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(served):
    for size in (body.MAX_BYTES + 1, 1 << 30, 10**13):
        head = request("POST", CHAT, content_length=str(size))
        assert answer(served.raw(head))[0] == 413


def test_a_body_in_chunks_without_end_is_refused(served):
    head = request("POST", CHAT, content_length=None, transfer_encoding="chunked")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with served.connected() as client:
        client.sendall(head)
        for _ in range(body.MAX_BYTES // 0x10000):
            client.sendall(chunk)
        # What passes the limit is one byte: bytes that nobody reads would reset the connection, and
        # the answer could be lost.
        client.sendall(b"1\r\n \r\n")
        assert answer(all_of(client))[0] == 413


def test_what_is_no_http_and_heads_without_end_are_refused(served):
    assert served.raw(b"\x16\x03\x01\x02\x00\r\n\r\n").startswith(b"HTTP/1.1 400")
    long = b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 70_000
    assert served.raw(long).startswith(b"HTTP/1.1 400")


def test_other_paths_and_methods_answer_in_the_same_shape(served):
    for method, path, status in (("GET", "/v2", 404), ("GET", CHAT, 405), ("POST", "/health", 405)):
        found, document = answer(served.raw(request(method, path)))
        assert (found, document["error"]["code"]) == (status, "unknown_url")


def test_a_foreign_host_is_refused(served):
    assert served.get("/v1/models", host="evil.example")[0] == 403


def test_a_client_that_leaves_ends_its_stream_at_once(served):
    before = served.engine.counts.cancelled
    streaming(served).close()
    until(lambda: served.engine.counts.cancelled == before + 1)
    client = served.connected()
    client.sendall(request("POST", COMPLETIONS, json.dumps({**LONG, "stream": False}).encode()))
    until(lambda: served.engine.counts.running == 1)
    client.close()
    until(lambda: served.engine.counts.cancelled == before + 2)
    assert still_answers(served)


def test_a_full_queue_refuses_and_counts_every_choice(served):
    with streaming(served), streaming(served), served.connected() as waits:
        waits.sendall(request("POST", COMPLETIONS, json.dumps(LONG).encode()))
        until(lambda: served.engine.counts.waiting == 1)
        data = served.raw(request("POST", COMPLETIONS, json.dumps(LONG).encode()))
        assert b"retry-after: 1" in data
        status, document = answer(data)
        assert (status, document["error"]["code"]) == (429, "queue_full")
        unread = served.raw(request("POST", COMPLETIONS, b"[" * 1000))
        assert answer(unread)[0] == 429  # it costs no parsing
    served.until_idle()
    assert still_answers(served)


def test_many_callers_share_a_few_threads(served):
    with ThreadPoolExecutor(24) as callers:
        prompt = json.dumps({"prompt": "the quick brown fox " * 500}).encode()
        asked = [
            callers.submit(served.raw, request("POST", "/tokenize", prompt)) for _ in range(48)
        ]
        assert {answer(each.result())[0] for each in asked} == {200}
    names = {thread.name for thread in threading.enumerate()}  # numbered in each server
    assert 1 <= sum(name.startswith("qmix-body") for name in names) <= 4


def test_silent_connections_hold_nobody_up_and_are_ended(served, monkeypatch):
    monkeypatch.setattr(Connection, "head_s", 0.2)
    begun = [b"", b"POST /v1/completions HTTP/1.1\r\nhost: loc"]
    clients = [served.connected() for _ in range(40)]
    for index, client in enumerate(clients):
        client.sendall(begun[index % 2])
    assert still_answers(served)
    for client in clients:
        with client:
            assert gone(client)


def gone(client):
    """Whether the server ends the connection."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_where_connections_are_as_many_as_can_be_the_longest_idle_one_makes_room(
    served, monkeypatch
):
    monkeypatch.setattr(descriptors, "most_connections", lambda: 4)
    with streaming(served) as stream:
        clients = [served.connected() for _ in range(20)]
        for _ in range(3):
            assert still_answers(served)
        for client in clients[:15]:
            assert gone(client)
        for client in clients:
            client.close()
        assert b"data: " in stream.recv(4096)  # one that carries a request is not ended
    monkeypatch.setattr(descriptors, "most_connections", lambda: 1)
    with streaming(served) as stream, served.connected() as second:
        assert gone(second)
        assert b"data: " in stream.recv(4096)
    served.until_idle()


def test_most_connections_leave_descriptors_for_all_else(monkeypatch):
    for limit, most in ((256, 128), (1024, 896), (64, 32), (resource.RLIM_INFINITY, 65536 - 128)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert descriptors.most_connections() == most


def test_a_peer_that_has_vanished_is_noticed_by_the_system(served):
    with served.connected():
        until(lambda: served.server.server_state.connections)
        (connection,) = served.server.server_state.connections
        found = connection.transport.get_extra_info("socket")
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
        assert seconds == Connection.write_s


def test_a_slow_body_is_ended(served, monkeypatch):
    monkeypatch.setattr(body, "_WAIT_S", 0.1)
    with served.connected() as client:
        client.sendall(request("POST", CHAT, b"{", content_length="100"))
        assert answer(all_of(client))[0] == 408


def test_a_client_that_reads_nothing_is_dropped_and_its_request_ended(served, monkeypatch):
    monkeypatch.setattr(Connection, "write_s", 0.3)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", served.port))
    before = served.engine.counts.cancelled
    with client:
        asked = {**LONG, "logprobs": 20, "n": 2}
        client.sendall(request("POST", COMPLETIONS, json.dumps(asked).encode()))
        until(lambda: served.engine.counts.running == 2)
        assert still_answers(served)
        until(lambda: served.engine.counts.cancelled == before + 2)


def test_requests_that_take_too_long_say_so():
    model, tokenizer = long_model()
    with serving(model, tokenizer, deadline_s=0.2, slots=1, context=1 << 15) as served:
        status, document = served.post(COMPLETIONS, {**LONG, "stream": False})
        assert (status, document["error"]["code"]) == (504, "deadline_exceeded")
        with streaming(served) as client:
            *_, error, done = all_of(client).split(b"data: ")
            assert b"deadline_exceeded" in error
            assert done.startswith(b"[DONE]")


def test_a_fault_of_one_request_is_told_to_it_alone(served, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("qmix.serving.biases.LogitBias.__call__", broken)
    status, document = reply(served, logit_bias={"5": 1})
    assert (status, document["error"]["type"]) == (500, "server_error")
    assert "out of memory" in document["error"]["message"]
    assert still_answers(served)


def test_shutting_down_lets_streams_end_with_an_event_and_takes_no_more():
    model, tokenizer = long_model()
    with serving(model, tokenizer, slots=1, context=1 << 15) as served:
        assert served.get("/health") == (200, {"status": "ok"})
        with streaming(served) as client:
            closing = threading.Thread(target=served.engine.close, args=(0.1,))
            closing.start()
            until(lambda: not served.engine.healthy)
            assert served.get("/health")[0] == 503
            status, document = reply(served)
            assert (status, document["error"]["code"]) == (503, "unavailable")
            events = all_of(client)
            assert events.rpartition(b"data: ")[2].startswith(b"[DONE]")
            assert b"the server is shutting down" in events
            closing.join()


def test_time_passes_while_many_clients_ask(served):
    """Twenty clients on two slots and a queue of one: each gets its reply, or is told to wait."""
    found = []

    def ask():
        while True:
            status, document = reply(served)
            if status == 429:
                time.sleep(0.02)
                continue
            found.append(document["usage"]["completion_tokens"])
            return

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 20
    served.until_idle()


def test_texts_and_chats_become_ids_and_ids_become_text(served):
    ids = served.tokenizer.encode("a list")
    for asked, right in (
        ({"prompt": "a list"}, ids),
        ({"prompt": "a list", "add_special_tokens": False}, ids[1:]),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            served.tokenizer.apply_chat_template([{"role": "user", "content": "a"}]),
        ),
    ):
        status, document = served.post("/tokenize", asked)
        assert (status, document["tokens"], document["count"]) == (200, right, len(right))
    assert served.post("/detokenize", {"tokens": ids[1:]}) == (200, {"prompt": "a list"})
    for path, asked in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [1], "model": "other"}),
    ):
        assert served.post(path, asked)[0] in (400, 404)


def test_metrics_count_what_happened(served):
    def metrics():
        text = served.raw(request("GET", "/metrics")).decode()
        lines = [line.split() for line in text.splitlines() if line.startswith("qmix_")]
        return {name: float(value) for name, value in lines}

    before = metrics()
    assert still_answers(served)
    after = metrics()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed["qmix_requests_total"] == changed["qmix_prompt_tokens_total"] == 1
    assert changed["qmix_new_tokens_total"] == changed["qmix_decode_steps_total"] + 1 == 3
    assert changed["qmix_first_token_seconds_count"] == changed["qmix_request_seconds_count"] == 1
    assert (after["qmix_up"], after["qmix_slots"], after["qmix_requests_running"]) == (1, 2, 0)
