"""A request to /v1/messages, Anthropic's, read from its JSON and told as a request for a chat.

Knows no template and no ids.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.serving.http import fields, tool_fields
from qmix.serving.http.chat_message import MAX_MESSAGES
from qmix.serving.http.chat_request import ChatRequest
from qmix.serving.http.errors import ApiError
from qmix.serving.http.fields import (
    Items,
    Number,
    Others,
    Refused,
    Whole,
    WrongValueError,
    at,
    flag,
    taken,
    text,
)
from qmix.serving.http.sampling_fields import TOKENS, json_schema, stops
from qmix.serving.http.tool_fields import ToolChoice
from qmix.serving.tools import Tool, ToolCall, Turn

_MODES = {"auto": "auto", "any": "required", "none": "none"}


def _text(value: Any) -> str:
    """A string, or blocks of text."""
    if isinstance(value, str):
        return value
    return "\n".join(Items(_text_block, 0, MAX_MESSAGES)(value))


def _text_block(value: Any) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise WrongValueError("a block of type text: the model reads text")
    return str(at(".text", text, value.get("text")))


def _turns(value: Any) -> tuple[Turn, ...]:
    """The turns of one message; what a tool answered stands alone."""
    if not isinstance(value, dict) or value.get("role") not in ("user", "assistant"):
        raise WrongValueError("a message whose role is user or assistant")
    content = value.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    blocks = Items(lambda block: _turn(value["role"], block), 1, MAX_MESSAGES)
    return tuple(at(".content", blocks, content))


def _turn(role: Any, block: Any) -> Turn:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "tool_use" and role == "assistant":
        arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
        name = at(".name", tool_fields.tool_name, block.get("name"))
        return Turn(role, "", (ToolCall(at(".id", text, block.get("id")), name, arguments),))
    if kind == "tool_result" and role == "user":
        answered = at(".tool_use_id", text, block.get("tool_use_id"))
        return Turn("tool", at(".content", _text, block.get("content") or ""), (), answered)
    return Turn(role, _text_block(block))


def messages(value: Any) -> tuple[Turn, ...]:
    """The turns of a conversation; those of one role in a row are one."""
    merged: list[Turn] = []
    for turn in (turn for turns in Items(_turns, 1, MAX_MESSAGES)(value) for turn in turns):
        if merged and merged[-1].role == turn.role != "tool":
            last = merged.pop()
            said = "\n".join(part for part in (last.content, turn.content) if part)
            turn = Turn(turn.role, said, (*last.calls, *turn.calls))
        merged.append(turn)
    return tuple(merged)


def _function(value: Any) -> dict[str, Any]:
    """A tool as OpenAI describes it."""
    if not isinstance(value, dict) or value.get("type", "custom") != "custom":
        raise WrongValueError("a tool of the caller's own: this server has none")
    function = {name: value.get(name) for name in ("name", "description", "strict")}
    function["parameters"] = value.get("input_schema")
    return {"type": "function", "function": function}


def tools(value: Any) -> tuple[Tool, ...]:
    """See tool_fields.tools."""
    return tool_fields.tools(list(Items(_function, 0, tool_fields.MAX_TOOLS)(value)))


def tool_choice(value: Any) -> tuple[ToolChoice, bool]:
    """The choice, and whether several calls are allowed."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "tool":
        name = at(".name", tool_fields.tool_name, value.get("name"))
        return ToolChoice("required", (name,), once=True), False
    if not isinstance(kind, str) or kind not in _MODES:
        raise WrongValueError("an object whose type is auto, any, none or tool")
    alone = value.get("disable_parallel_tool_use", False)
    return ToolChoice(_MODES[kind]), not at(".disable_parallel_tool_use", flag, alone)


def output_config(value: Any) -> dict[str, Any] | None:
    """The schema of its format; None: any text."""
    if not isinstance(value, dict) or not value.keys() <= {"format", "effort"}:
        raise WrongValueError("an object with format")
    form = value.get("format")
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise WrongValueError("an object of type json_schema", ".format")
    return dict(at(".format.schema", json_schema, form.get("schema")))


@dataclass(frozen=True, kw_only=True)
class MessagesRequest:
    """See docs/serving.md."""

    model: str | None = taken(text, "The served model's name, or nothing.")
    messages: tuple[Turn, ...] = taken(
        messages, "Blocks of text, tool_use and tool_result. An assistant's at the end goes on.", ()
    )
    system: str | None = taken(_text, "A text, or blocks of text.")
    max_tokens: int | None = taken(TOKENS, "Tokens of the reply. Must be given.")
    stop_sequences: tuple[str, ...] = taken(stops, "As `stop` of a chat.", ())
    stream: bool = taken(flag, "Server-sent events.", False)
    temperature: float | None = taken(Number(0, 1), "0 is greedy.")
    top_p: float | None = taken(Number(0, 1), "As in a chat.")
    top_k: int | None = taken(Whole(0, (1 << 31) - 1), "As in a chat.")
    tools: tuple[Tool, ...] = taken(tools, "As in a chat; the caller's own.", ())
    tool_choice: tuple[ToolChoice, bool] | None = taken(tool_choice, "auto, any, none or tool.")

    output_config: dict[str, Any] | None = taken(
        output_config, "`format`, a JSON schema; `effort` changes nothing."
    )

    def chat(self) -> ChatRequest:
        """The same as a chat."""
        system = () if self.system is None else (Turn("system", self.system),)
        choice, several = self.tool_choice or (None, True)
        shared = ("model", "max_tokens", "stream", "temperature", "top_p", "top_k", "tools")
        return ChatRequest(
            **{name: getattr(self, name) for name in shared},
            messages=(*system, *self.messages),
            continue_final_message=self.messages[-1].role == "assistant",
            stop=self.stop_sequences,
            response_format=self.output_config,
            tool_choice=choice,
            parallel_tool_calls=several,
        )


OTHERS = Others(
    ignored={
        **dict.fromkeys(("metadata", "diagnostics"), "Nothing is stored."),
        **dict.fromkeys(("service_tier", "speed", "inference_geo"), "There is one."),
        **dict.fromkeys(("user_profile_id", "workspace_id"), "Nobody is told apart."),
        "cache_control": "Prefixes are found by themselves.",
    },
    refused={
        "thinking": Refused("the model does not think apart", ({"type": "disabled"},)),
        "mcp_servers": Refused("nothing is called", ([],)),
        "container": Refused("nothing is run"),
    },
)


def parse(document: Mapping[str, Any], *, counts: bool = False) -> ChatRequest:
    """A chat, from the JSON object of a request's body.

    Args:
        counts: only its tokens are to be counted.

    Raises:
        ApiError: a field is missing, unknown, refused or wrong.
    """
    request = fields.read(MessagesRequest, document, OTHERS)
    for name in ("messages",) if counts else ("messages", "max_tokens"):
        if not getattr(request, name):
            raise ApiError(f"{name} is missing", param=name, code="missing_field")
    return request.chat()
