"""Tools: functions that a reply may call, the calls, and a conversation that holds them.

Knows no template, no grammar and no HTTP.
"""

import hashlib
import json
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_ID_CHARACTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that a reply may call.

    Attributes:
        parameters: JSON schema of its arguments, an object.
        strict: calls hold the schema also where the model is free not to call.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any]
    strict: bool = False

    @property
    def document(self) -> dict[str, Any]:
        """As chat templates take it."""
        described = {} if self.description is None else {"description": self.description}
        return {
            "type": "function",
            "function": {"name": self.name, **described, "parameters": self.parameters},
        }


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        arguments: JSON, as the model wrote it.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """A message of a conversation with tools.

    Attributes:
        calls: what an assistant's message calls.
        call_id: what a tool's message answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None

    @property
    def has_tools(self) -> bool:
        """Whether templates that know no tools cannot show it."""
        return bool(self.calls) or self.role == "tool"


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What a reply may call, and must.

    Attributes:
        shown: all tools, as the prompt describes them.
        callable: those of them that may be called.
        required: there is to be a call.
        several: there may be more than one.
    """

    shown: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    required: bool = False
    several: bool = True

    def schema(self, tool: Tool) -> Mapping[str, Any]:
        """What the arguments of a call are held to."""
        return tool.parameters if tool.strict or self.required else ANY_OBJECT


def new_id() -> str:
    """The name of a call, of nine letters and digits, as the templates of Mistral want it."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def short_id(given: str) -> str:
    """The same for an id of another server, always the same one."""
    if len(given) == _ID_LENGTH and given.isascii() and given.isalnum():
        return given
    digest = int.from_bytes(hashlib.sha256(given.encode(errors="replace")).digest())
    letters = []
    for _ in range(_ID_LENGTH):
        digest, index = divmod(digest, len(_ID_CHARACTERS))
        letters.append(_ID_CHARACTERS[index])
    return "".join(letters)


def argument_value(call: ToolCall) -> Any:
    """A call's arguments as a value; text that is no JSON stays text."""
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments
