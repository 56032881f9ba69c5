"""A request to /v1/chat/completions, read from its JSON object. Knows no template and no ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.serving.http import fields, tool_fields
from qmix.serving.http.chat_message import MAX_MESSAGES, MESSAGES
from qmix.serving.http.errors import ApiError
from qmix.serving.http.fields import Others, Refused, Whole, flag, taken
from qmix.serving.http.sampling_fields import IGNORED, TOKENS, SamplingFields
from qmix.serving.http.tool_fields import ToolChoice
from qmix.serving.request import MAX_TOP_LOGPROBS
from qmix.serving.tools import Tool, ToolUse, Turn


@dataclass(frozen=True, kw_only=True)
class ChatRequest(SamplingFields):
    """See docs/serving.md."""

    messages: tuple[Turn, ...] = taken(
        MESSAGES,
        f"At most {MAX_MESSAGES}; texts, by system, developer, user, assistant and tool.",
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
    tools: tuple[Tool, ...] = taken(
        tool_fields.tools,
        f"At most {tool_fields.MAX_TOOLS} functions, of {tool_fields.MAX_TOOL_CHARACTERS} "
        "characters together.",
        (),
    )
    tool_choice: ToolChoice | None = taken(
        tool_fields.tool_choice, "none, auto, required, a function, or allowed_tools."
    )
    parallel_tool_calls: bool | None = taken(
        flag, "False: at most one call. A function that is chosen by name is called once."
    )

    @property
    def new_tokens(self) -> int | None:
        """The longest reply; None: no limit but the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        """Likeliest tokens that are reported; None: not even a token's own probability."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tool_use(self) -> ToolUse | None:
        """What the reply may call; None: nothing.

        Raises:
            ApiError: a tool is chosen that is not given.
        """
        parallel = self.parallel_tool_calls is not False
        return tool_fields.tool_use(self.tools, self.tool_choice, parallel=parallel)


_OLD_TOOLS = "give tools and tool_choice"
OTHERS = Others(
    ignored={
        **IGNORED,
        "prediction": "Drafts come from the messages and the reply.",
        **dict.fromkeys(
            ("prompt_cache_key", "prompt_cache_retention"), "Prefixes are found by themselves."
        ),
    },
    refused={
        "functions": Refused(_OLD_TOOLS, ([],)),
        "function_call": Refused(_OLD_TOOLS, ("none", "auto")),
        "modalities": Refused("replies are text", (["text"],)),
        "audio": Refused("replies are text"),
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
