"""Replies as documents, whole or in chunks: what chats and completions share, and completions'.

Knows no transport.
"""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qmix import __version__
from qmix.serving.http import logprobs
from qmix.serving.http.flight import Flight
from qmix.serving.request import Ended, LogProb, Piece, Request
from qmix.text.tokenizer import LlamaTokenizer

Document = dict[str, Any]


@dataclass
class Choice:
    """What has come of one request."""

    text: str = ""
    logprobs: list[LogProb] = field(default_factory=list)
    ended: Ended | None = None

    def put(self, event: Piece | Ended) -> None:
        """Take an event."""
        if isinstance(event, Ended):
            self.ended = event
            return
        self.text += event.text
        if event.logprob is not None:
            self.logprobs.append(event.logprob)

    @property
    def finish(self) -> str:
        """Why it ended."""
        assert self.ended is not None
        return self.ended.finish


class ReplyFormat(Protocol):
    """What differs between chats and completions."""

    @property
    def id(self) -> str:
        """The reply's."""
        ...

    @property
    def choices_per_prompt(self) -> int: ...

    def whole(self, choices: Sequence[Choice], usage: Document) -> Document:
        """A reply in one document."""
        ...

    def opening(self, index: int) -> list[Document]:
        """A stream's first chunks of a choice."""
        ...

    def piece(self, index: int, piece: Piece) -> list[Document]:
        """A stream's chunks of one token; none: nothing is certain yet."""
        ...

    def closing(self, index: int, ended: Ended) -> list[Document]:
        """A stream's last chunks of a choice."""
        ...

    def ending(self, usage: Document) -> list[Document]:
        """A stream's last chunks of all."""
        ...


@dataclass(frozen=True)
class Head:
    """What all documents of a reply begin with."""

    prefix: str
    object: str
    model: str
    serial: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """Of the reply."""
        return self.prefix + self.serial

    def document(self, choices: list[Document], **more: Any) -> Document:
        """One with these choices."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"qmix-{__version__}",
            "choices": choices,
            **more,
        }


@dataclass(frozen=True)
class CompletionReply:
    """See ReplyFormat.

    Attributes:
        requests: of all choices.
        echoes: the text of each choice's prompt, if it stands before the reply.
        reports: whether log-probabilities were asked for.
        echo_only: there is to be no reply.
    """

    head: Head
    tokenizer: LlamaTokenizer
    requests: Sequence[Request]
    echoes: Sequence[str] | None
    reports: bool
    echo_only: bool
    choices_per_prompt: int
    includes_usage: bool

    @property
    def id(self) -> str:
        """See ReplyFormat."""
        return self.head.id

    def whole(self, choices: Sequence[Choice], usage: Document) -> Document:
        """See ReplyFormat."""
        listed = [self._whole(index, choice) for index, choice in enumerate(choices)]
        return self.head.document(listed, usage=usage)

    def opening(self, index: int) -> list[Document]:
        """See ReplyFormat."""
        return [] if self.echoes is None else [self._chunk(index, self.echoes[index])]

    def piece(self, index: int, piece: Piece) -> list[Document]:
        """See ReplyFormat."""
        if self.echo_only:
            return [self._chunk(index, "")]
        found = [] if piece.logprob is None else [piece.logprob]
        return [self._chunk(index, piece.text, self._reported(index, found, 0))]

    def closing(self, index: int, ended: Ended) -> list[Document]:
        """See ReplyFormat."""
        return [self._chunk(index, "", finish=ended.finish)]

    def ending(self, usage: Document) -> list[Document]:
        """See ReplyFormat."""
        return [self.head.document([], usage=usage)] if self.includes_usage else []

    def _whole(self, index: int, choice: Choice) -> Document:
        text, found = ("", []) if self.echo_only else (choice.text, choice.logprobs)
        echo = "" if self.echoes is None else self.echoes[index]
        reported = self._reported(index, found, len(echo))
        if self.echoes is not None and reported is not None:
            assert choice.ended is not None
            reported = self._with_prompt(index, choice.ended.prompt_logprobs, reported)
        return {
            "index": index,
            "text": echo + text,
            "logprobs": reported,
            "finish_reason": choice.finish,
        }

    def _reported(self, index: int, found: Sequence[LogProb], offset: int) -> Document | None:
        if not self.reports:
            return None
        return logprobs.of_completion(found, self.tokenizer, self.requests[index].ids, offset)

    def _with_prompt(self, index: int, found: Sequence[LogProb], reply: Document) -> Document:
        """Those of the prompt before the reply's; the first id has none."""
        first = LogProb(self.requests[index].ids[0], 0.0)
        prompt = logprobs.of_completion([first, *found], self.tokenizer, (), 0)
        prompt["token_logprobs"][0] = None
        return {name: [*prompt[name], *reply[name]] for name in reply}

    def _chunk(
        self, index: int, text: str, reported: Document | None = None, finish: str | None = None
    ) -> Document:
        choice = {"index": index, "text": text, "logprobs": reported, "finish_reason": finish}
        return self.head.document([choice], **({"usage": None} if self.includes_usage else {}))


def expert_counts(ended: Ended | None) -> Document:
    """What a choice says of its experts, if it was asked for: tokens of each, layer by layer."""
    return {"expert_counts": ended.expert_counts} if ended and ended.expert_counts else {}


async def whole(flight: Flight, form: ReplyFormat) -> Document:
    """The reply once all its choices have ended.

    Raises:
        ApiError: one failed.
    """
    choices = [Choice() for _ in range(len(flight))]
    async for found in flight.events():
        if found is not None:
            index, event = found
            choices[index].put(event)
    ended = [choice.ended for choice in choices if choice.ended is not None]
    return form.whole(choices, _usage(ended, form.choices_per_prompt))


async def chunks(flight: Flight, form: ReplyFormat) -> AsyncIterator[Document | None]:
    """The reply as it comes; None: nothing for a while.

    Raises:
        ApiError: a choice failed.
    """
    for index in range(len(flight)):
        for document in form.opening(index):
            yield document
    ends: dict[int, Ended] = {}
    async for found in flight.events():
        if found is None:
            yield None
            continue
        index, event = found
        if isinstance(event, Ended):
            ends[index] = event
            for document in form.closing(index, event):
                yield document
        elif event.text or event.logprob is not None:
            for document in form.piece(index, event):
                yield document
    for document in form.ending(
        _usage([ends[index] for index in sorted(ends)], form.choices_per_prompt)
    ):
        yield document


def _usage(ends: Sequence[Ended], choices_per_prompt: int) -> Document:
    """Tokens; a prompt with several choices counts once."""
    prompt = sum(end.prompt_tokens for end in ends[::choices_per_prompt])
    cached = sum(end.cached_tokens for end in ends[::choices_per_prompt])
    new = sum(end.new_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
