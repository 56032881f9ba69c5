"""One message of a chat, read from its JSON. Knows no template."""

from typing import Any

from qmix.serving.http.fields import Items, WrongValueError, at, text
from qmix.serving.http.tool_fields import tool_name
from qmix.serving.tools import ToolCall, Turn

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
MAX_MESSAGES = 2048
_MAX_CALLS = 128  # of one message


def turn(value: Any) -> Turn:
    """A message, whose content is a string or a list of text parts."""
    if not isinstance(value, dict):
        raise WrongValueError("an object")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise WrongValueError("one of " + ", ".join(_ROLES), ".role")
    for name in ("function_call", "audio"):
        if value.get(name):
            raise WrongValueError("nothing: this is not supported", f".{name}")
    calls: tuple[ToolCall, ...] = ()
    if value.get("tool_calls"):
        if role != "assistant":
            raise WrongValueError("nothing: only an assistant calls", ".tool_calls")
        calls = at(".tool_calls", Items(_call, 1, _MAX_CALLS), value["tool_calls"])
    call_id = None
    if role == "tool":
        call_id = at(".tool_call_id", text, value.get("tool_call_id"))
    content = value.get("content")
    said = "" if calls and content is None else _content(content)
    return Turn(_ROLES[role], said, calls, call_id)  # type: ignore[arg-type]


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise WrongValueError("an object of type function")
    function = value.get("function")
    if not isinstance(function, dict):
        raise WrongValueError("an object", ".function")
    return ToolCall(
        at(".id", text, value.get("id")),
        at(".function.name", tool_name, function.get("name")),
        at(".function.arguments", text, function.get("arguments")),
    )


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise WrongValueError("a string, or a list of text parts", ".content")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise WrongValueError("a part of type text: the model reads text", f".content[{index}]")
        if not isinstance(part.get("text"), str):
            raise WrongValueError("a string", f".content[{index}].text")
    return "".join(part["text"] for part in value)


MESSAGES = Items(turn, 1, MAX_MESSAGES)
