"""The fields that chat and completions share: how a reply is chosen, when it ends, how it comes.

Knows no prompts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.generation.config import MAX_NEW_TOKENS, GenerationConfig
from qmix.generation.logits_processors import LogitsProcessor
from qmix.serving import grammar
from qmix.serving.biases import LogitBias, OccurrencePenalties
from qmix.serving.http.errors import ApiError
from qmix.serving.http.fields import Items, Number, Whole, WrongValueError, at, flag, taken, text
from qmix.serving.tools import ANY_OBJECT, ToolUse

MAX_CHOICES = 16
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 256
_MAX_BIASES = 1024
_FORMATS = ("text", "json_object", "json_schema")
_FORMS = ("response_format", "guided_regex", "guided_grammar")
_MAX_SCHEMA_CHARACTERS, _MAX_REGEX_CHARACTERS = 1 << 16, 4096
_MAX_GRAMMAR_CHARACTERS = 1 << 14
_MAX_ID = (1 << 31) - 1
TOKENS = Whole(1, MAX_NEW_TOKENS)


def stops(value: Any) -> tuple[str, ...]:
    """A string or several, none of them empty."""
    several = Items(text, 0, _MAX_STOPS)([value] if isinstance(value, str) else value)
    for stop in several:
        if not 0 < len(stop) <= _MAX_STOP_CHARACTERS:
            raise WrongValueError(f"strings of 1 to {_MAX_STOP_CHARACTERS} characters")
    return several


def biases(value: Any) -> Mapping[int, float]:
    """An object from ids, as strings, to numbers."""
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        raise WrongValueError(f"an object of at most {_MAX_BIASES} token ids")
    found = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and int(name[:20]) <= _MAX_ID):
            raise WrongValueError("token ids as names")
        found[int(name)] = Number(-100, 100)(bias)
    return found


def includes_usage(value: Any) -> bool:
    """The one stream option that is taken."""
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise WrongValueError("an object with include_usage")
    return flag(value.get("include_usage", False))


def schema_of_format(value: Any) -> Mapping[str, Any] | None:
    """The JSON schema of a response_format; None: any text."""
    if not isinstance(value, dict) or value.get("type") not in _FORMATS:
        raise WrongValueError("an object whose type is " + ", ".join(_FORMATS))
    if value["type"] == "text":
        return None
    if value["type"] == "json_object":
        return ANY_OBJECT
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    return dict(at(".json_schema.schema", json_schema, schema))


def json_schema(value: Any) -> dict[str, Any]:
    """A JSON schema of a bounded size."""
    if not isinstance(value, dict):
        raise WrongValueError("an object")
    if len(json.dumps(value)) > _MAX_SCHEMA_CHARACTERS:
        raise WrongValueError(f"at most {_MAX_SCHEMA_CHARACTERS} characters")
    return value


@dataclass(frozen=True)
class Short:
    """A string of at most so many characters."""

    most: int

    def __call__(self, value: Any) -> str:
        if len(text(value)) > self.most:
            raise WrongValueError(f"at most {self.most} characters")
        return str(value)


@dataclass(frozen=True, kw_only=True)
class SamplingFields:
    """See docs/serving.md."""

    model: str | None = taken(text, "The served model's name, or nothing.")
    temperature: float | None = taken(Number(0, 2), "0 is greedy.")
    top_p: float | None = taken(Number(0, 1), "Keep the likeliest tokens up to this probability.")
    top_k: int | None = taken(Whole(-1, _MAX_ID), "Keep the k likeliest tokens; 0 or -1: all.")
    min_p: float | None = taken(Number(0, 1), "Drop tokens below this share of the likeliest.")
    repetition_penalty: float | None = taken(
        Number(0.01, 100), "Of prompt and reply, as in transformers; 1 is off."
    )
    presence_penalty: float = taken(Number(-2, 2), "Of ids in the reply so far, once.", 0.0)
    frequency_penalty: float = taken(Number(-2, 2), "The same, each time.", 0.0)
    logit_bias: Mapping[int, float] | None = taken(
        biases, f"Added to the scores of at most {_MAX_BIASES} ids, -100 to 100."
    )
    seed: int | None = taken(
        Whole(-(1 << 63), (1 << 64) - 1), "Makes samples repeatable; choice i gets seed + i."
    )
    stop: tuple[str, ...] = taken(
        stops, f"At most {_MAX_STOPS} strings that end the reply, of 256 characters each.", ()
    )
    n: int = taken(Whole(1, MAX_CHOICES), f"Choices, at most {MAX_CHOICES}.", 1)
    stream: bool = taken(flag, "Server-sent events.", False)
    stream_options: bool = taken(
        includes_usage, "include_usage sends the usage in a last chunk.", False
    )

    response_format: Mapping[str, Any] | None = taken(
        schema_of_format, "text, json_object or json_schema, of at most 65536 characters."
    )
    guided_regex: str | None = taken(
        Short(_MAX_REGEX_CHARACTERS), "What the whole reply matches, of at most 4096 characters."
    )
    guided_grammar: str | None = taken(
        Short(_MAX_GRAMMAR_CHARACTERS),
        "The same in the syntax of Lark or GBNF, of at most 16384 characters.",
    )

    @property
    def tool_use(self) -> ToolUse | None:
        """What the reply may call; None: nothing."""
        return None

    @property
    def form(self) -> str | None:
        """The field that says what the reply is to follow.

        Raises:
            ApiError: there are several.
        """
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ApiError("give " + " or ".join(given), param=given[1], code="invalid_value")
        return given[0] if given else None

    @property
    def grammar(self) -> str | None:
        """What the reply is to follow.

        Raises:
            UsageError: it is no grammar.
        """
        if self.response_format is not None:
            return grammar.of_schema(self.response_format)
        if self.guided_regex is not None:
            return grammar.of_regex(self.guided_regex)
        return None if self.guided_grammar is None else grammar.of_text(self.guided_grammar)

    def config(
        self, defaults: GenerationConfig, new_tokens: int, choice: int = 0
    ) -> GenerationConfig:
        """How one choice is generated; the defaults say what the caller left out."""
        given: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "stop_strings": self.stop or None,
            "temperature": self.temperature,
            "do_sample": None if self.temperature is None else self.temperature > 0,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else (self.seed + choice) % (1 << 64),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return GenerationConfig(**given).filled_from(defaults)

    def processors(self, prompt_tokens: int) -> tuple[LogitsProcessor, ...]:
        """What changes the scores behind a prompt of so many tokens."""
        found: list[LogitsProcessor] = []
        if self.presence_penalty or self.frequency_penalty:
            found.append(
                OccurrencePenalties(prompt_tokens, self.presence_penalty, self.frequency_penalty)
            )
        if self.logit_bias:
            found.append(LogitBias(self.logit_bias))
        return tuple(found)


# Fields of OpenAI's that change no text here.
IGNORED = {
    **dict.fromkeys(("user", "safety_identifier"), "Nobody is told apart."),
    **dict.fromkeys(("metadata", "store"), "Nothing is stored."),
    "service_tier": "There is one.",
}
