"""MessagesReply: a reply as Anthropic's documents and events. Knows no transport."""

import json
from collections.abc import Sequence
from typing import Any

from qmix.serving.call_reader import CallReader, Read
from qmix.serving.http.replies import Choice, Document
from qmix.serving.request import Ended, Piece

_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_START: Document = {"type": "message", "role": "assistant", "stop_sequence": None}


class MessagesReply:
    """See ReplyFormat.

    Args:
        head: id and model.
        prompt_tokens: of the request.
        reader: finds the calls.
    """

    choices_per_prompt = 1

    def __init__(self, head: Document, prompt_tokens: int, reader: CallReader) -> None:
        self._head = {**head, **_START, "stop_reason": None}
        self._prompt_tokens, self._reader = prompt_tokens, reader
        self._ended: Ended | None = None
        self._blocks = 0  # that have begun
        self._open: str | None = None  # what the last of them holds

    @property
    def id(self) -> str:
        """See ReplyFormat."""
        return str(self._head["id"])

    def whole(self, choices: Sequence[Choice], usage: Document) -> Document:
        """See ReplyFormat."""
        (choice,) = choices
        read, rest = self._reader.put(choice.text), self._reader.end()
        self._ended = choice.ended
        text = read.content + rest.content
        content: list[Document] = [{"type": "text", "text": text}] if text else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _value(call.arguments)}
            for call in read.calls
        ]
        return {**self._head, "content": content, **self._end(), "usage": _tokens(usage)}

    def opening(self, index: int) -> list[Document]:
        """See ReplyFormat."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        message = {**self._head, "content": [], "usage": usage}
        return [{"type": "message_start", "message": message}]

    def piece(self, index: int, piece: Piece) -> list[Document]:
        """See ReplyFormat."""
        return self._events(self._reader.put(piece.text))

    def closing(self, index: int, ended: Ended) -> list[Document]:
        """See ReplyFormat."""
        self._ended = ended
        return [*self._events(self._reader.end()), *self._closed()]

    def ending(self, usage: Document) -> list[Document]:
        """See ReplyFormat."""
        delta = {"type": "message_delta", "delta": self._end(), "usage": _tokens(usage)}
        return [delta, {"type": "message_stop"}]

    def _events(self, read: Read) -> list[Document]:
        events = []
        if read.content:
            if self._open != "text":
                events += self._begun("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": read.content}))
        for call in read.calls:
            if call.id is not None:
                block: Document = {"type": "tool_use", "id": call.id, "name": call.name}
                block["input"] = {}
                events += self._begun("tool_use", block)
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            events.append(self._delta(delta))
        return events

    def _begun(self, kind: str, block: Document) -> list[Document]:
        closed, self._open = self._closed(), kind
        self._blocks += 1
        start = {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}
        return [*closed, start]

    def _delta(self, delta: Document) -> Document:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _closed(self) -> list[Document]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._blocks - 1}]

    def _end(self) -> Document:
        """Why it ended."""
        assert self._ended is not None
        reason = _REASONS[self._ended.finish]
        if self._ended.stop is not None:
            reason = "stop_sequence"
        elif self._reader.calls and self._ended.finish == "stop":
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": self._ended.stop}


def _value(arguments: str) -> Any:
    """Arguments as an object; those that were cut are none."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _tokens(usage: Document) -> Document:
    """Anthropic's usage counts the cached part of a prompt by itself."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }
