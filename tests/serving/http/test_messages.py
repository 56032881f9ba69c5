"""Anthropic's /v1/messages: replies, events, tools and errors, as its clients read them."""

import json

import jsonschema
import pytest

from tests.support.http_server import request, serving

ASK = [{"role": "user", "content": "def add(a, b):"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"name": "count", "description": "Counts.", "input_schema": SCHEMA}
FORCED = {"type": "tool", "name": "count"}


@pytest.fixture(scope="module")
def served():
    with serving(context=1024, key="secret") as served:
        yield served


@pytest.fixture(scope="module")
def post(served):
    def call(path="/v1/messages", **options):
        given = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0, **options}
        given = {name: value for name, value in given.items() if value is not None}
        return served.post(path, given, x_api_key="secret", anthropic_version="2023-06-01")

    return call


@pytest.fixture(scope="module")
def events(served):
    def call(**options):
        """(name, document) of each event of a stream."""
        given = {"messages": ASK, "max_tokens": 8, "temperature": 0, "stream": True, **options}
        body = json.dumps(given).encode()
        data = served.raw(request("POST", "/v1/messages", body, x_api_key="secret"))
        text = data.partition(b"\r\n\r\n")[2].decode()
        parts = [part.partition("event: ")[2] for part in text.split("\n\n") if "event: " in part]
        pairs = [part.split("\n")[:2] for part in parts]
        return [(name, json.loads(data.removeprefix("data: "))) for name, data in pairs]

    return call


def chat_text(served, messages=ASK, **options):
    given = {"messages": messages, "max_tokens": 8, "temperature": 0, **options}
    _, reply = served.post("/v1/chat/completions", given, authorization="Bearer secret")
    return reply["choices"][0]["message"]["content"]


def test_a_message_is_the_reply_of_a_chat(served, post):
    status, reply = post()
    assert status == 200
    assert reply["content"] == [{"type": "text", "text": chat_text(served)}]
    assert (reply["type"], reply["role"], reply["model"]) == ("message", "assistant", "tiny")
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("max_tokens", None)
    usage = reply["usage"]
    assert usage["output_tokens"] == 8
    whole = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert post("/v1/messages/count_tokens", max_tokens=None) == (200, {"input_tokens": whole})


def test_system_blocks_and_a_begun_answer_are_read_as_in_a_chat(served, post):
    blocks = [{"type": "text", "text": "def add(a, b):", "cache_control": {"type": "ephemeral"}}]
    _, reply = post(system="Be brief.", messages=[{"role": "user", "content": blocks}])
    system = {"role": "system", "content": "Be brief."}
    assert reply["content"][0]["text"] == chat_text(served, [system, *ASK])
    begun = [*ASK, {"role": "assistant", "content": "Return the"}]
    _, reply = post(messages=begun)
    assert reply["content"][0]["text"] == chat_text(served, begun, continue_final_message=True)


def test_a_stop_sequence_is_named(served, post):
    stop = chat_text(served).split()[1]
    _, reply = post(stop_sequences=["never", stop])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", stop)
    assert stop not in reply["content"][0]["text"]


def test_events_come_in_their_order(post, events):
    found = events()
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert all(document["type"] == name for name, document in found)
    deltas = [document["delta"]["text"] for name, document in found if name == names[2]]
    assert "".join(deltas) == post()[1]["content"][0]["text"]
    assert found[-2][1]["delta"]["stop_reason"] == "max_tokens"
    assert found[-2][1]["usage"]["output_tokens"] == 8
    assert found[0][1]["message"]["usage"]["input_tokens"] > 0


def test_tools_are_called_in_blocks_and_answered(post, events):
    status, reply = post(tools=[TOOL], tool_choice=FORCED, max_tokens=60)
    assert status == 200
    (call,) = reply["content"]
    assert reply["stop_reason"] == "tool_use"
    assert (call["type"], call["name"]) == ("tool_use", "count")
    jsonschema.validate(call["input"], SCHEMA)
    found = events(tools=[TOOL], tool_choice=FORCED, max_tokens=60)
    start = found[1][1]["content_block"]
    assert (start["type"], start["name"], start["input"]) == ("tool_use", "count", {})
    pieces = [d["delta"]["partial_json"] for _, d in found if d["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == call["input"]
    answer = {"type": "tool_result", "tool_use_id": call["id"], "content": "9"}
    messages = [
        *ASK,
        {"role": "assistant", "content": reply["content"]},
        {"role": "user", "content": [answer, {"type": "text", "text": "And now?"}]},
    ]
    status, reply = post(messages=messages, tools=[TOOL], tool_choice={"type": "auto"})
    assert status == 200
    assert reply["content"]


def test_a_reply_holds_the_schema_of_its_format(post):
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    _, reply = post(output_config=form, max_tokens=60, temperature=1, cache_control=None)
    jsonschema.validate(json.loads(reply["content"][0]["text"]), SCHEMA)


WRONG = [
    ({"output_config": {"format": {"type": "xml"}}}, 400, "output_config.format"),
    ({"max_tokens": None}, 400, "max_tokens is missing"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "user or assistant"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "messages[0].content[0]: expected a block of type text",
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, 400, "tools[0]: "),
    ({"tool_choice": FORCED}, 400, "no tool 'count'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "think apart"),
    ({"frequency_penalty": 1}, 400, "unrecognized"),
    ({"model": "claude"}, 404, "no model 'claude'"),
]


@pytest.mark.parametrize(("options", "status", "said"), WRONG, ids=[each[2] for each in WRONG])
def test_errors_have_their_form(post, options, status, said):
    got, document = post(**options)
    assert got == status
    assert document["type"] == "error"
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert document["error"]["type"] == kind
    assert said in document["error"]["message"]


def test_the_key_counts_in_either_header(served):
    given = {"messages": ASK, "max_tokens": 1}
    for headers in ({"x_api_key": "secret"}, {"authorization": "Bearer secret"}):
        assert served.post("/v1/messages", given, **headers)[0] == 200
    for headers in ({}, {"x_api_key": "other"}, {"x_api_key": "bearer"}):
        status, document = served.post("/v1/messages", given, **headers)
        assert (status, document["error"]["type"]) == (401, "authentication_error")
    assert served.post("/v1/chat/completions", given, x_api_key="secret")[0] == 401
