"""One line of a batch: what it asks, and a key that no other line or setting has.

Knows no engine and no file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.generation.config import GenerationConfig
from qmix.serving.request import Request
from qmix.text.chat_format import chat_format
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

_FIELDS = ("prompt", "messages", "id", "max_new_tokens")
_KEY_CHARACTERS = 16
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptLine:
    """A line of the file.

    Attributes:
        number: its place, from 0 on.
        data: its bytes, without the newline.
    """

    number: int
    data: bytes

    def key(self, settings: str) -> str:
        """What its result is recognised by, when a run goes on."""
        digest = hashlib.sha256(settings.encode() + b"\0" + self.data)
        return digest.hexdigest()[:_KEY_CHARACTERS]


def prompt_lines(file: Iterable[bytes]) -> Iterator[PromptLine]:
    """The lines of a file, in order; an empty one is a line too."""
    for number, data in enumerate(file):
        yield PromptLine(number, data.rstrip(b"\r\n"))


@dataclass(frozen=True)
class Asking:
    """How lines become requests.

    Attributes:
        config: how replies are chosen and end, where a line does not say.
        template: of `messages`; see qmix.text.chat_format.chat_format.
    """

    tokenizer: LlamaTokenizer
    config: GenerationConfig
    template: str | None = None

    def request(self, line: PromptLine) -> Request:
        """What a line asks the engine.

        A seed is the line's own, so that a result depends on no other line.

        Raises:
            QmixError: it asks for nothing, or for something that is not known.
        """
        where = f"line {line.number + 1}"
        document = strict_json.loads(line.data, where=where)
        if unknown := [name for name in document if name not in _FIELDS]:
            raise CheckpointError(
                "unknown field", where=where, expected=", ".join(_FIELDS), found=unknown[0][:80]
            )
        if ("prompt" in document) == ("messages" in document):
            raise CheckpointError("give a prompt or messages", where=where)
        config = self._config(document, line.number, where)
        if "prompt" in document:
            prompt = document["prompt"]
            if not isinstance(prompt, str):
                raise CheckpointError("wrong type", where=f"{where}: prompt", expected="a string")
            return Request(self.tokenizer.encode(prompt), config)
        form = chat_format(self.tokenizer, self.template)
        ids = form.prompt(_messages(document["messages"], where))
        return Request(ids, config.with_ends(form.end_ids), starts_new_text=True)

    def _config(self, document: Mapping[str, Any], number: int, where: str) -> GenerationConfig:
        changes: dict[str, Any] = {}
        if "max_new_tokens" in document:
            changes["max_new_tokens"] = document["max_new_tokens"]
        if self.config.seed is not None:
            changes["seed"] = (self.config.seed + number) % (1 << 64)
        try:
            return self.config.updated(changes)
        except UsageError as error:
            raise error.at(f"{where}: {error.where}") from None


def own_id(line: PromptLine) -> object:
    """What the line calls itself; None if it does not, or cannot be read."""
    try:
        return strict_json.loads(line.data, where="").get("id")
    except QmixError:
        return None


def _messages(given: object, where: str) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise CheckpointError("wrong value", where=f"{where}: messages", expected="a list of turns")
    turns = []
    for turn in given:
        known = isinstance(turn, dict) and set(turn) == {"role", "content"}
        if not known or turn["role"] not in _ROLES or not isinstance(turn["content"], str):
            raise CheckpointError(
                "wrong value",
                where=f"{where}: messages",
                expected="turns of a role (system, user, assistant) and a content",
                found=repr(turn)[:80],
            )
        turns.append(Message(turn["role"], turn["content"]))
    return turns
