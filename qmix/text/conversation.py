"""A conversation as a template sees it: dicts, lists and strings, checked, and tagged at need.

Knows nothing of tokens, nor how a template is rendered.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from qmix.errors import UsageError, wrong_type, wrong_value
from qmix.text.chat_template import Message
from qmix.text.tool_schema import tool_schema

_DEPTH = 64  # of lists and dicts within each other
# Names under which a message carries its reasoning; the first is the one that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: whatever else it holds becomes its type's name, as in transformers.

    Raises:
        UsageError: nested more than 64 levels deep.
    """
    if depth > _DEPTH:
        raise UsageError(f"nested more than {_DEPTH} levels deep", where="messages")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # a subclass, such as an enum, is stripped to its base
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return plain(value.item(), depth + 1)
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name), depth + 1) for each in fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic's
        return plain(value.model_dump(), depth + 1)
    return f"<{type(value).__name__}>"


def checked(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation, without entries that are None.

    Raises:
        UsageError: there is none, or one is not a message; the error names its index.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise wrong_value("messages", "a list of messages", messages)
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if isinstance(message, Message):
            message = {"role": message.role, "content": message.content}
        entries = plain(message)
        if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
            raise wrong_type(where, "a Message, or a mapping with role and content", message)
        entries = {key: value for key, value in entries.items() if value is not None}
        reasoning = next((entries[key] for key in _REASONING if key in entries), None)
        if reasoning is not None:
            entries = {"thinking": reasoning, **entries, "reasoning_content": reasoning}
        found.append(entries)
    if not found:
        raise UsageError("no message", where="messages", found="an empty conversation")
    return found


def schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    """The tools of a conversation as JSON schemas; functions are described (`tool_schema`).

    Raises:
        UsageError: one is neither, or a function that does not describe itself.
    """
    if tools is None:
        return None
    found = []
    for index, tool in enumerate(tools):
        if inspect.isfunction(tool) or inspect.ismethod(tool):
            tool = tool_schema(tool)
        if not isinstance(tool, Mapping):
            raise wrong_type(f"tools[{index}]", "a function, or its JSON schema", tool)
        found.append(plain(tool))
    return found


def continued(
    messages: list[dict[str, Any]], field: str, render: Callable[[list[dict[str, Any]]], str]
) -> str:
    """The text of a conversation whose last message is to go on, as transformers cuts it.

    Args:
        field: the entry of the message that goes on, `content` as a rule.
        render: the text of messages.

    Raises:
        UsageError: the last message has no such text, or the template does not show it as it is.
    """
    last = messages[-1].get(field)
    if isinstance(last, list):
        last = next((part.get("text") for part in reversed(last) if "text" in part), None)
    if not isinstance(last, str):
        raise UsageError(f"the last message has no {field} to go on", where="messages")
    text = render([*messages[:-1], _tagged(messages[-1], field)])
    tag = _TAG.strip()
    at = text.rfind(tag)
    if at < 0 or last.strip() not in text:
        raise UsageError(
            "the chat template does not show the last message as it is",
            where="continue_final_message",
            found=repr(last)[:80],
        )
    kept = text[at : at + len(_TAG)] == _TAG
    return text[:at] if kept else text[:at].rstrip()


def _tagged(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The message with a tag behind the text that goes on."""
    content = message[field]
    if isinstance(content, str):
        names = [field]
        if field in _REASONING:
            names = [name for name in _REASONING if message.get(name) == content]
        return {**message, **dict.fromkeys(names, content + _TAG)}
    parts = [dict(part) for part in content]
    for part in reversed(parts):
        if "text" in part:
            part["text"] += _TAG
            break
    return {**message, field: parts}
