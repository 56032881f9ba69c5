"""Requests to /tokenize and /detokenize, as vLLM has them. Knows no tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.serving.http import fields
from qmix.serving.http.chat_message import MESSAGES
from qmix.serving.http.completion_request import IDS
from qmix.serving.http.errors import ApiError
from qmix.serving.http.fields import Others, flag, taken, text
from qmix.serving.tools import Turn

OTHERS = Others(ignored={}, refused={})


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """See docs/serving.md."""

    model: str | None = taken(text, "The served model's name, or nothing.")
    prompt: str | None = taken(text, "A text.")
    messages: tuple[Turn, ...] = taken(MESSAGES, "A chat, instead of a text.", ())
    add_special_tokens: bool = taken(flag, "Begin a text with the begin token.", True)
    return_token_strs: bool = taken(flag, "Say how the vocabulary writes each token.", False)


@dataclass(frozen=True, kw_only=True)
class DetokenizeRequest:
    """See docs/serving.md."""

    model: str | None = taken(text, "The served model's name, or nothing.")
    tokens: tuple[int, ...] = taken(IDS, "Token ids.", ())


def parse_tokenize(document: Mapping[str, Any]) -> TokenizeRequest:
    """
    Raises:
        ApiError: a field is missing, unknown or wrong.
    """
    request = fields.read(TokenizeRequest, document, OTHERS)
    if (request.prompt is None) == (not request.messages):
        raise ApiError("give prompt or messages", param="prompt", code="missing_field")
    return request


def parse_detokenize(document: Mapping[str, Any]) -> DetokenizeRequest:
    """
    Raises:
        ApiError: a field is unknown or wrong.
    """
    return fields.read(DetokenizeRequest, document, OTHERS)
