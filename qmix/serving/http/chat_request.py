"""A request to /v1/chat/completions, read from its JSON object. Knows no template and no ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.serving.http import fields
from qmix.serving.http.errors import ApiError
from qmix.serving.http.fields import (
    Items,
    Others,
    Refused,
    Whole,
    WrongValueError,
    flag,
    taken,
)
from qmix.serving.http.sampling_fields import IGNORED, TOKENS, SamplingFields
from qmix.serving.request import MAX_TOP_LOGPROBS
from qmix.text.chat_template import Message

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_MESSAGES = 2048
_PART_FIELDS = {"type", "text"}


def message(value: Any) -> Message:
    """One message, whose content is a string or a list of text parts."""
    if not isinstance(value, dict):
        raise WrongValueError("an object")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise WrongValueError("one of " + ", ".join(_ROLES), ".role")
    for name in ("tool_calls", "function_call", "audio"):
        if value.get(name):
            raise WrongValueError("nothing: this is not supported", f".{name}")
    return Message(_ROLES[role], _content(value.get("content")))


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


MESSAGES = Items(message, 1, _MAX_MESSAGES)


@dataclass(frozen=True, kw_only=True)
class ChatRequest(SamplingFields):
    """See docs/serving.md."""

    messages: tuple[Message, ...] = taken(
        MESSAGES,
        f"At most {_MAX_MESSAGES}; texts, by system, developer, user and assistant.",
        (),
    )
    max_tokens: int | None = taken(TOKENS, "Tokens of the reply; default: what the context leaves.")
    max_completion_tokens: int | None = taken(TOKENS, "The same; it counts before max_tokens.")
    logprobs: bool = taken(flag, "Report the log-probability of each token.", False)
    top_logprobs: int | None = taken(
        Whole(0, MAX_TOP_LOGPROBS), "Report the likeliest tokens too; needs logprobs."
    )
    expert_counts: bool = taken(
        flag, "Report how many of the new tokens each expert computed, layer by layer.", False
    )
    continue_final_message: bool = taken(
        flag, "Go on with the last message, an assistant's.", False
    )

    @property
    def new_tokens(self) -> int | None:
        """The longest reply; None: no limit but the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        """Likeliest tokens that are reported; None: not even a token's own probability."""
        return (self.top_logprobs or 0) if self.logprobs else None


OTHERS = Others(
    ignored={
        **IGNORED,
        "parallel_tool_calls": "There are no tools.",
        **dict.fromkeys(
            ("prompt_cache_key", "prompt_cache_retention"), "Prefixes are found by themselves."
        ),
    },
    refused={
        "tools": Refused("there are no tool calls", ([],)),
        "tool_choice": Refused("there are no tool calls", ("none", "auto")),
        "functions": Refused("there are no tool calls", ([],)),
        "function_call": Refused("there are no tool calls", ("none", "auto")),
        "modalities": Refused("replies are text", (["text"],)),
        "audio": Refused("replies are text"),
        "prediction": Refused("there is no speculative decoding"),
        "reasoning_effort": Refused("the model does not reason apart", ("none",)),
        "verbosity": Refused("the model has no such setting", ("medium",)),
        "web_search_options": Refused("nothing is searched"),
    },
)


def parse(document: Mapping[str, Any]) -> ChatRequest:
    """A chat request.

    Raises:
        ApiError: a field is missing, unknown, refused or wrong.
    """
    request = fields.read(ChatRequest, document, OTHERS)
    if not request.messages:
        raise ApiError("messages is missing", param="messages", code="missing_field")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise ApiError(
            "continue_final_message needs an assistant's message at the end",
            param="continue_final_message",
            code="invalid_value",
        )
    return request
