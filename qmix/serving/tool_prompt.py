"""Conversations with tools as templates take them, or as plain turns for templates without tools.

A template that knows no tools gets a text that describes them in front of the first message, calls
as the text that the model writes, and their results as a user's turn. The wording follows Hermes 2
Pro's (https://github.com/NousResearch/Hermes-Function-Calling). Knows no ids.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qmix.serving.tools import Tool, ToolCall, Turn, argument_value, short_id
from qmix.text.chat_template import Message

_INTRODUCTION = """\
You may call functions. Their signatures stand within <tools></tools>:
<tools>
{tools}
</tools>
For each call write a JSON object with the function's name and its arguments, like this:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>
The answer of a function stands within <tool_response></tool_response>."""


def for_template(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages for a template that shows tools, in transformers' form."""
    return [_entries(turn, _names(turns)) for turn in turns]


def as_text(turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Message]:
    """The messages for a template that does not: system, user and assistant alone."""
    names = _names(turns)
    messages: list[Message] = []
    answered = False  # the last message holds results
    for turn in turns:
        role, text = turn.role, turn.content
        if turn.role == "assistant":
            text = "\n".join(part for part in (text, *map(_call_text, turn.calls)) if part)
        elif turn.role == "tool":
            role, text = "user", _result_text(turn, names)
        if messages and messages[-1].role == role == "user" and (answered or turn.role == "tool"):
            messages[-1] = Message("user", f"{messages[-1].content}\n{text}")
        else:
            messages.append(Message(role, text))
        answered = turn.role == "tool"
    if tools:
        _introduce(messages, tools)
    return messages


def _introduce(messages: list[Message], tools: Sequence[Tool]) -> None:
    """Put the tools into the system's message, or before the first of another."""
    shown = "\n".join(json.dumps(tool.document, ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=shown)
    first = messages[0]
    parts = (first.content, text) if first.role == "system" else (text, first.content)
    messages[0] = Message(first.role, "\n\n".join(part for part in parts if part))


def _entries(turn: Turn, names: Mapping[str, str]) -> dict[str, Any]:
    entries: dict[str, Any] = {"role": turn.role}
    if turn.content or not turn.calls:
        entries["content"] = turn.content
    if turn.calls:
        entries["tool_calls"] = [
            {
                "id": short_id(call.id),
                "type": "function",
                "function": {"name": call.name, "arguments": argument_value(call)},
            }
            for call in turn.calls
        ]
    if turn.call_id is not None:
        entries["tool_call_id"] = short_id(turn.call_id)
        entries["name"] = names.get(turn.call_id)
    return entries


def _names(turns: Sequence[Turn]) -> dict[str, str]:
    """The function that each call calls."""
    return {call.id: call.name for turn in turns for call in turn.calls}


def _call_text(call: ToolCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'


def _result_text(turn: Turn, names: Mapping[str, str]) -> str:
    result = {"name": names.get(turn.call_id or ""), "content": turn.content}
    if result["name"] is None:
        del result["name"]
    return f"<tool_response>\n{json.dumps(result, ensure_ascii=False)}\n</tool_response>"
