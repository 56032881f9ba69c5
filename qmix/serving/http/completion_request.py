"""A request to /v1/completions, read from its JSON object. Knows no ids but those it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.generation.config import MAX_NEW_TOKENS
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
    text,
)
from qmix.serving.http.sampling_fields import IGNORED, SamplingFields
from qmix.serving.request import MAX_TOP_LOGPROBS

Prompt = str | tuple[int, ...]

_MAX_PROMPTS = 256
_NEW_TOKENS = 16  # OpenAI's default
_MAX_IDS = 1 << 20  # more than any context
IDS = Items(Whole(0, (1 << 31) - 1), 1, _MAX_IDS)


def prompts(value: Any) -> tuple[Prompt, ...]:
    """One text, or one list of ids, or a list of several of either."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise WrongValueError("a string, a list of token ids, or a list of several")
    if isinstance(value[0], int):
        return (IDS(value),)
    return Items(text if isinstance(value[0], str) else IDS, 1, _MAX_PROMPTS)(value)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(SamplingFields):
    """See docs/serving.md."""

    prompt: tuple[Prompt, ...] = taken(
        prompts, f"A text, token ids, or a list of at most {_MAX_PROMPTS} of either.", ()
    )
    max_tokens: int = taken(
        Whole(0, MAX_NEW_TOKENS), "Tokens of the reply; 0 needs echo.", _NEW_TOKENS
    )
    logprobs: int | None = taken(
        Whole(0, MAX_TOP_LOGPROBS), "Report log-probabilities, and this many likeliest tokens."
    )
    echo: bool = taken(flag, "Put the prompt before the reply, with its log-probabilities.", False)


OTHERS = Others(
    ignored=IGNORED,
    refused={
        "suffix": Refused("the model does not fill in", ("",)),
        "best_of": Refused("give n", (1,)),
    },
)


def parse(document: Mapping[str, Any]) -> CompletionRequest:
    """A completion request.

    Raises:
        ApiError: a field is missing, unknown, refused or wrong.
    """
    request = fields.read(CompletionRequest, document, OTHERS)
    if not request.prompt:
        raise ApiError("prompt is missing", param="prompt", code="missing_field")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError("max_tokens 0 needs echo", param="max_tokens", code="invalid_value")
    if request.stream and request.echo and request.logprobs is not None:
        raise ApiError(
            "echo with logprobs does not stream: the prompt's come at its end",
            param="echo",
            code="unsupported",
        )
    return request
