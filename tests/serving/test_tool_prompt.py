"""What templates are told of tools, and what templates without tools are told instead."""

import json

import pytest

from qmix.serving import tool_prompt
from qmix.serving.tools import Tool, ToolCall, Turn, short_id

ADD = Tool(name="add", description="Adds ½.", parameters={"type": "object"})
CALLS = (ToolCall("call_123456789", "add", '{"a": 1}'), ToolCall("x", "add", "{broken"))
TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "1 + 1?"),
    Turn("assistant", "I add.", CALLS),
    Turn("tool", "2", call_id="call_123456789"),
    Turn("tool", "none", call_id="y"),
    Turn("user", "Well?"),
]


def test_a_template_that_shows_tools_gets_them_as_transformers_gives_them():
    system, user, assistant, result, other, _ = tool_prompt.for_template(TURNS)
    assert (system, user["content"]) == ({"role": "system", "content": "Be brief."}, "1 + 1?")
    first, second = assistant["tool_calls"]
    assert first["function"] == {"name": "add", "arguments": {"a": 1}}
    assert second["function"]["arguments"] == "{broken"
    assert (result["name"], result["content"], result["tool_call_id"]) == ("add", "2", first["id"])
    assert len(first["id"]) == 9
    assert first["id"].isalnum()
    assert other["name"] is None
    bare = tool_prompt.for_template([Turn("assistant", "", CALLS[:1])])
    assert "content" not in bare[0]


def test_an_id_of_another_server_becomes_one_of_nine_letters_always_the_same():
    assert short_id("abcDEF123") == "abcDEF123"
    assert short_id("call_x") == short_id("call_x") != short_id("call_y")


def test_other_templates_get_plain_turns_in_their_order():
    messages = tool_prompt.as_text(TURNS, [ADD])
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    system, _, assistant, results = (message.content for message in messages)
    assert system.startswith("Be brief.\n\n")
    assert json.loads(system.split("<tools>\n")[1].split("\n</tools>")[0]) == ADD.document
    assert assistant == (
        'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {broken}\n</tool_call>'
    )
    assert results.startswith(
        '<tool_response>\n{"name": "add", "content": "2"}\n</tool_response>\n'
    )
    assert results.endswith('{"content": "none"}\n</tool_response>\nWell?')


def test_tools_stand_before_the_first_message_where_no_system_speaks():
    (message,) = tool_prompt.as_text([Turn("user", "Hi")], [ADD])
    assert message.role == "user"
    assert message.content.endswith("\n\nHi")
    assert "½" in message.content


def test_two_users_in_a_row_stay_two():
    turns = [Turn("user", "a"), Turn("user", "b")]
    assert [message.content for message in tool_prompt.as_text(turns, [])] == ["a", "b"]


@pytest.mark.parametrize("tools", [[], [ADD]])
def test_a_conversation_without_tools_is_itself(tools):
    turns = [Turn("system", ""), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    messages = tool_prompt.as_text(turns, tools)
    assert [message.content for message in messages][1:] == ["a", "b", "c"]
