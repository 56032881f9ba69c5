"""The fields of a chat that say what the reply may call: tools, tool_choice. Knows no messages."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmix.serving.http.errors import ApiError
from qmix.serving.http.fields import Items, Kind, WrongValueError, at, flag, text
from qmix.serving.tools import Tool, ToolUse

MAX_TOOLS, MAX_TOOL_CHARACTERS = 128, 1 << 17
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True)
class ToolChoice:
    """What tool_choice says.

    Attributes:
        mode: "none", "auto" or "required".
        names: the tools that may be called; None: all.
        once: the reply is one call.
    """

    mode: str
    names: tuple[str, ...] | None = None
    once: bool = False


def tool_name(value: Any) -> str:
    """The name of a function."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise WrongValueError("a name of 1 to 64 letters, digits, _ and -")
    return value


def tools(value: Any) -> tuple[Tool, ...]:
    """Functions, no two of one name, of a bounded size together."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise WrongValueError(f"a list of at most {MAX_TOOLS} functions")
    if len(json.dumps(value, ensure_ascii=False)) > MAX_TOOL_CHARACTERS:
        raise WrongValueError(f"at most {MAX_TOOL_CHARACTERS} characters of JSON")
    found: dict[str, Tool] = {}
    for index, each in enumerate(value):
        tool = at(f"[{index}]", _tool, each)
        if tool.name in found:
            raise WrongValueError("a name that no other tool has", f"[{index}].function.name")
        found[tool.name] = tool
    return tuple(found.values())


def _tool(value: Any) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise WrongValueError("an object of type function")
    function = value.get("function")
    if not isinstance(function, dict):
        raise WrongValueError("an object", ".function")
    return Tool(
        name=at(".function.name", tool_name, function.get("name")),
        description=at(".function.description", _optional(text), function.get("description")),
        parameters=at(".function.parameters", _object_schema, function.get("parameters")),
        strict=bool(at(".function.strict", _optional(flag), function.get("strict"))),
    )


def _optional(kind: Kind) -> Kind:
    """The same, or null."""
    return lambda value: None if value is None else kind(value)


def _object_schema(value: Any) -> dict[str, Any]:
    """The schema of a function's arguments; None: it has none."""
    if value is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise WrongValueError("a JSON schema of type object")
    return {"type": "object", **value}


def tool_choice(value: Any) -> ToolChoice:
    """A mode, a function's name, or the names of those that are allowed."""
    if isinstance(value, str) and value in _MODES:
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "function":
        return ToolChoice("required", (_name_in(value),), once=True)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        allowed: ToolChoice = at(".allowed_tools", _allowed, value.get("allowed_tools"))
        return allowed
    raise WrongValueError("none, auto, required, or an object that names a function")


def _allowed(value: Any) -> ToolChoice:
    if not isinstance(value, dict) or value.get("mode") not in _MODES[1:]:
        raise WrongValueError("an object with a mode, auto or required, and tools")
    names = at(".tools", Items(_name_in, 1, MAX_TOOLS), value.get("tools"))
    return ToolChoice(value["mode"], names)


def _name_in(value: Any) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict):
        raise WrongValueError("an object with the name of a function", ".function")
    return tool_name(function.get("name"))


def tool_use(given: Sequence[Tool], choice: ToolChoice | None, *, parallel: bool) -> ToolUse | None:
    """What a reply may call; None: nothing, and the model is told of no tool.

    Raises:
        ApiError: a tool is chosen that is not given.
    """
    choice = choice or ToolChoice("auto")
    names = {tool.name for tool in given}
    for name in choice.names or ():
        if name not in names:
            raise _wrong_choice(f"there is no tool {name!r} in tools")
    if choice.mode == "required" and not given:
        raise _wrong_choice("tool_choice needs tools")
    if choice.mode == "none" or not given:
        return None
    return ToolUse(
        shown=tuple(given),
        callable=tuple(t for t in given if choice.names is None or t.name in choice.names),
        required=choice.mode == "required",
        several=parallel and not choice.once,
    )


def _wrong_choice(message: str) -> ApiError:
    return ApiError(f"tool_choice: {message}", param="tool_choice", code="invalid_value")
