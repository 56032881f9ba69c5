"""litellm against a server: plain, streamed, asynchronous, with a schema, and its errors.

litellm asks for an older openai than this repository's tests, so it has an environment of its own
(make clients).
"""

import asyncio
import json

import pytest

litellm = pytest.importorskip("litellm", reason="litellm is not installed: make clients")

from tests.support.http_server import serving  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # litellm's own

ASK = [{"role": "user", "content": "def add(a, b):"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["list", "dict"]}, "size": {"type": "integer", "maximum": 9}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def options():
    with serving(context=512) as served:
        yield {
            "model": "openai/tiny",
            "api_base": served.url,
            "api_key": "none",
            "max_retries": 0,
            "max_tokens": 8,
            "temperature": 0,
        }


@pytest.fixture(scope="module")
def text(options):
    return litellm.completion(messages=ASK, **options).choices[0].message.content


def test_a_reply_has_its_usage(options, text):
    reply = litellm.completion(messages=ASK, **options)
    assert text
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8


def test_a_stream_is_the_same_text(options, text):
    chunks = list(
        litellm.completion(
            messages=ASK, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    )
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == 8


def test_asynchronous_calls_and_streams(options, text):
    async def ask():
        reply = await litellm.acompletion(messages=ASK, **options)
        stream = await litellm.acompletion(messages=ASK, stream=True, **options)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        many = await asyncio.gather(
            *(litellm.acompletion(messages=ASK, **options) for _ in range(6))
        )
        return reply, "".join(pieces), [each.choices[0].message.content for each in many]

    reply, streamed, many = asyncio.run(ask())
    assert reply.choices[0].message.content == streamed == text
    assert set(many) == {text}


def test_a_text_is_continued(options):
    given = {**options, "model": "text-completion-openai/tiny"}
    reply = litellm.text_completion(prompt="Return a", **given)
    assert reply.choices[0].text
    assert reply.usage.completion_tokens == 8


def test_a_schema_is_followed(options):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    given = {**options, "max_tokens": 60}
    reply = litellm.completion(messages=ASK, response_format=asked, **given)
    found = json.loads(reply.choices[0].message.content)
    assert set(found) == {"kind", "size"}
    assert found["kind"] in ("list", "dict")


def test_a_forced_tool_is_called(options):
    choice = {"type": "function", "function": {"name": "add"}}
    given = {**options, "max_tokens": 60}
    reply = litellm.completion(messages=ASK, tools=[TOOL], tool_choice=choice, **given)
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert 0 <= json.loads(call.function.arguments)["a"] <= 9
    stream = litellm.completion(
        messages=ASK, tools=[TOOL], tool_choice=choice, stream=True, **given
    )
    whole = litellm.stream_chunk_builder(list(stream))
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def test_errors_are_litellms_own(options):
    with pytest.raises(litellm.BadRequestError, match="expected"):
        litellm.completion(messages=ASK, **{**options, "temperature": 3})
    with pytest.raises(litellm.NotFoundError, match="tiny"):
        litellm.completion(messages=ASK, **{**options, "model": "openai/gpt-4"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 600}], **options)
