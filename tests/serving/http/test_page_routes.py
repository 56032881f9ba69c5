"""What the page asks of the server: itself without a key, the slots, and the experts of a reply."""

import json

import pytest

from tests.support.http_server import request, serving

KEY = {"authorization": "Bearer secret"}
GREEDY = {
    "messages": [{"role": "user", "content": "def add(a, b):"}],
    "max_tokens": 5,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def served():
    with serving(key="secret") as served:
        yield served


def test_the_page_needs_no_key_and_the_api_does(served):
    head, _, html = served.raw(request("GET", "/")).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    assert "content-type: text/html; charset=utf-8" in head
    assert "script-src 'sha256-" in head
    assert html.startswith("<!doctype html>")
    assert served.get("/slots")[0] == served.get("/v1/models")[0] == 401


def test_a_page_of_this_server_may_ask_and_others_may_not(served):
    own = {"origin": "http://localhost", **KEY}
    assert served.post("/v1/chat/completions", GREEDY, **own)[0] == 200
    assert served.get("/slots", **{**own, "origin": "http://evil.example"})[0] == 403


def test_slots_are_told_in_numbers(served):
    status, document = served.get("/slots", **KEY)
    assert (status, document["waiting"], len(document["slots"])) == (200, 0, 4)
    for slot in document["slots"]:
        assert slot.pop("state") == "free"
        assert {type(value) for value in slot.values()} == {int}


def test_experts_come_with_the_reply_or_the_last_chunk_of_its_stream_if_they_are_asked_for(served):
    asked = {**GREEDY, "expert_counts": True}
    _, document = served.post("/v1/chat/completions", asked, **KEY)
    (choice,) = document["choices"]
    config = served.model.config
    assert len(choice["expert_counts"]) == config.num_hidden_layers
    for row in choice["expert_counts"]:
        assert len(row) == config.num_local_experts
        assert sum(row) == 5 * config.num_experts_per_tok
    stream = request(
        "POST", "/v1/chat/completions", json.dumps({**asked, "stream": True}).encode(), **KEY
    )
    events = [line[6:] for line in served.raw(stream).decode().splitlines() if line[:6] == "data: "]
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert [each.get("expert_counts") for each in choices][-2:] == [None, choice["expert_counts"]]
    _, document = served.post("/v1/chat/completions", GREEDY, **KEY)
    assert "expert_counts" not in document["choices"][0]
