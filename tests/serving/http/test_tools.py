"""Tools by OpenAI's own client: forced, free and streamed calls, their results, their errors."""

import asyncio
import json
from contextlib import closing
from dataclasses import replace
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from qmix.serving.engine import Engine
from qmix.serving.http import chat_request
from qmix.serving.http.chat_reply import ChatReply
from qmix.serving.http.replies import Choice, Head
from qmix.serving.http.served_model import ServedModel
from qmix.serving.limits import Limits
from qmix.serving.request import Ended, Events
from qmix.serving.tool_format import CallFormat
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.chat_templates import MISTRAL_TOOLS
from tests.support.http_server import serving
from tests.support.models import TINY

ASK = [{"role": "user", "content": "What is it like in Bern?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["°C", "K"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}


def function(name, schema, **more):
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


TOOLS = [function("weather", WEATHER, description="Tells it."), function("clock", CLOCK)]
SCHEMAS = {"weather": WEATHER, "clock": CLOCK}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def served():
    with serving(context=1024) as served:
        yield served


@pytest.fixture(scope="module")
def chat(client):
    def create(**options):
        given = {"model": "tiny", "messages": ASK, "max_tokens": 100, "temperature": 0, **options}
        return client.chat.completions.create(**given)

    return create


def check(call):
    """A call that is whole, and holds its schema."""
    assert call.type == "function"
    assert len(call.id) == 9
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


def test_a_function_that_is_chosen_is_called_once(chat):
    (choice,) = chat(tools=TOOLS, tool_choice=NAMED).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    check(call)


def test_calls_are_required_and_drawn_within_their_schemas(chat):
    options = {"temperature": 1.5, "n": 2, "seed": 1}
    reply = chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **options)
    for choice in reply.choices:
        (call,) = choice.message.tool_calls
        check(call)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    reply = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert reply.choices[0].message.tool_calls[0].function.name == "clock"


def test_a_stream_tells_the_name_and_then_the_arguments(chat):
    whole = chat(tools=TOOLS, tool_choice=NAMED).choices[0].message.tool_calls[0]
    chunks = list(chat(tools=TOOLS, tool_choice=NAMED, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert not any(delta.content for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert {call.index for call in calls} == {0}
    assert calls[0].function.name == "weather"
    assert calls[0].id
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert len(calls) > 3
    assert "".join(call.function.arguments for call in calls) == whole.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_clients_own_helpers_read_streams_and_models(client):
    class Weather(BaseModel):
        unit: Literal["C", "K"]
        days: Literal[1, 2]

    tool = openai.pydantic_function_tool(Weather, name="weather")
    given = {"model": "tiny", "messages": ASK, "max_tokens": 100, "temperature": 0}
    called = {**given, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    reply = client.chat.completions.parse(**called)
    parsed = [call.function.parsed_arguments for call in reply.choices[0].message.tool_calls]
    assert all(isinstance(each, Weather) for each in parsed)
    formed = client.chat.completions.parse(**given, response_format=Weather)
    assert isinstance(formed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(**called) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert [call.function.parsed_arguments for call in final.tool_calls] == parsed


def test_an_async_client_gets_its_call(served):
    async def ask():
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none") as client:
            reply = await client.chat.completions.create(
                model="tiny", messages=ASK, tools=TOOLS, tool_choice=NAMED, max_tokens=100
            )
            return reply.choices[0].message.tool_calls

    (call,) = asyncio.run(ask())
    check(call)


def test_a_free_reply_may_be_text_and_holds_its_format(chat):
    free = chat(tools=TOOLS, max_tokens=12).choices[0]
    assert free.finish_reason == "length"
    assert free.message.content
    assert free.message.tool_calls is None
    chunks = chat(tools=TOOLS, max_tokens=12, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == free.message.content
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER}}
    formed = chat(tools=TOOLS, response_format=form).choices[0].message
    if formed.tool_calls is None:
        jsonschema.validate(json.loads(formed.content), WEATHER)


def test_none_leaves_the_tools_out(chat):
    reply, plain = chat(tools=TOOLS, tool_choice="none", max_tokens=8), chat(max_tokens=8)
    assert reply.choices[0].message.content == plain.choices[0].message.content
    assert reply.usage.prompt_tokens == plain.usage.prompt_tokens
    assert chat(tools=TOOLS, max_tokens=8).usage.prompt_tokens > plain.usage.prompt_tokens


def test_a_conversation_goes_on_with_what_a_function_answered(chat):
    called = chat(tools=TOOLS, tool_choice=NAMED).choices[0].message
    answer = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "Snow."}
    messages = [*ASK, called.model_dump(exclude_none=True), answer]
    reply = chat(messages=messages, tools=TOOLS, max_tokens=4)
    assert reply.choices[0].message.content
    assert reply.usage.prompt_tokens_details.cached_tokens > reply.usage.prompt_tokens // 2
    without = chat(messages=messages, max_tokens=4)
    assert without.usage.prompt_tokens < reply.usage.prompt_tokens


def test_a_call_that_is_cut_ends_by_length(chat):
    choice = chat(tools=TOOLS, tool_choice=NAMED, max_tokens=3).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    chunks = chat(tools=TOOLS, tool_choice=NAMED, max_tokens=3, stream=True)
    content = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert content == choice.message.content
    assert "<tool".startswith(content.strip()[:5])


WRONG = [
    ({"tools": TOOLS[0]}, "tools", "a list"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name", "no other"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]", "type function"),
    ({"tools": [function("a b", CLOCK)]}, "tools[0].function.name", "letters"),
    ({"tools": [function("f", {"type": "array"})]}, "tools[0].function.parameters", "object"),
    ({"tools": [function(f"f{i}", CLOCK) for i in range(129)]}, "tools", "128"),
    ({"tools": [function("f", {"description": "x" * 131072})]}, "tools", "131072"),
    (
        {"tools": [function("f", {"properties": {"a": {"type": "no"}}})], "tool_choice": "required"},
        "tools",
        "not a grammar",
    ),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "auto, required"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools|no tool"),
    ({"tool_choice": NAMED}, "tool_choice", "no tool 'weather'"),
    ({"tools": TOOLS, "extra_body": {"guided_regex": "a"}}, "guided_regex", "tools or"),
    ({"functions": [{"name": "f"}]}, "functions", "give tools"),
    ({"function_call": {"name": "f"}}, "function_call", "give tools"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "a string"),
    (
        {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "messages[1].tool_calls[0].function",
        "an object",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
     "messages[0].tool_calls", "assistant"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "param", "said"), WRONG, ids=[each[1] for each in WRONG])
def test_a_wrong_tool_is_refused_by_its_place(chat, options, param, said):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        chat(**options)
    assert caught.value.param == param


def replied(served, engine, **options):
    """The document of a reply, by the engine alone."""
    asked = chat_request.parse({"messages": ASK, "max_tokens": 100, "temperature": 0, **options})
    grammar = served.grammar(asked)
    matcher = None if grammar is None else served.grammars.compiled(grammar.text)
    (request,) = served.chat(asked, 60.0, matcher)
    events, choice = Events(), Choice()
    engine.submit(request, events)
    for event in events:
        choice.put(event)
        if isinstance(event, Ended):
            assert event.error is None
    head = Head("", "", "")
    form = ChatReply(head, served.tokenizer, False, 1, False, served.readers(asked))
    return form.whole([choice], {})["choices"][0]


def test_calls_behind_a_control_token_are_begun_by_the_model_itself(served):
    """As Mistral's tokenizer v3 has it: here <unk> stands for [TOOL_CALLS], and a bias likes it."""
    limits = Limits(context=1024, slots=1)
    tokenizer = served.tokenizer
    model = ServedModel.of(served.model, tokenizer, limits, name="tiny", created=1)
    assert model.calls == CallFormat("<tool_call>", "</tool_call>", False)
    marked = replace(
        model, calls=CallFormat("<unk>", "", True, 0), tool_template=MISTRAL_TOOLS, template="inst"
    )
    asked = {"tools": [function("clock", CLOCK, strict=True)], "parallel_tool_calls": False}
    with closing(Engine(served.model, tokenizer, limits)) as engine:
        choice = replied(marked, engine, **asked, logit_bias={"0": 100})
        text = replied(marked, engine, **asked, logit_bias={"0": -100}, max_tokens=5)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("clock", "{}")
    assert text["message"]["content"]
    assert "tool_calls" not in text["message"]


def test_a_template_that_shows_tools_gets_calls_and_results(served):
    tokenizer = LlamaTokenizer.from_pretrained(TINY, chat_template=MISTRAL_TOOLS)
    limits = Limits(context=1024, slots=1)
    model = ServedModel.of(served.model, tokenizer, limits, name="tiny", created=1)
    assert model.calls == CallFormat("[TOOL_CALLS]", "", True)
    called = {"id": "abcDEF123", "type": "function",
              "function": {"name": "weather", "arguments": '{"unit": "K", "days": 2}'}}  # fmt: skip
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "abcDEF123", "content": "Snow </s>"},
        {"role": "user", "content": "Well?"},
    ]
    asked = chat_request.parse({"messages": messages, "tools": TOOLS})
    ids = model.ids_of(asked)
    text = tokenizer.decode(ids)
    shown = text.split("[AVAILABLE_TOOLS] ")[1].split("[/AVAILABLE_TOOLS]")[0]
    assert [tool["function"]["name"] for tool in json.loads(shown)] == ["weather", "clock"]
    assert '[TOOL_CALLS] [{"name": "weather", "arguments": {"unit": "K", "days": 2}}]' in text
    assert '[TOOL_RESULTS] {"content": "Snow </s>"}[/TOOL_RESULTS]' in text
    assert ids.count(2) == 1  # behind the calls: what a function answers ends nothing
