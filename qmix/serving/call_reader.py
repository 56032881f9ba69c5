"""CallReader: a reply's text, as it comes, into what is said and what is called.

Whatever stands where a call was expected and is none stays text. Knows no grammar: a reply that was
held to one comes apart without a rest, and so does one whose model wrote calls by itself.
"""

import json
import re
from dataclasses import dataclass
from typing import Literal

from qmix.generation.stopping import overlap
from qmix.serving.tools import new_id

# The beginning of a call, to where its arguments begin; between calls stand marks and commas.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class CallPiece:
    """A part of a call.

    Attributes:
        index: of the call in its reply.
        id, name: in its first piece; None in those after it.
        arguments: JSON that follows what came before.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Read:
    """What a piece of text brought."""

    content: str = ""
    calls: tuple[CallPiece, ...] = ()


class CallReader:
    """Reads one reply.

    Args:
        opener: what stands before the first call; None: there is none.
    """

    def __init__(self, opener: str | None) -> None:
        self._opener = opener
        self._state: Literal["text", "head", "arguments"] = "text"
        self._held = ""  # not yet certain
        self._arguments = _Arguments()
        self.calls = 0

    def put(self, text: str) -> Read:
        """Take a piece of text; what is certain after it."""
        self._held += text
        content, found = "", []
        while True:
            if self._state == "text":
                said, opens = self._text()
                content += said
                if not opens:
                    break
            elif self._state == "head":
                piece = self._begun()
                if piece is None:
                    break
                found.append(piece)
            else:
                found.append(CallPiece(self.calls - 1, None, None, self._more()))
                if self._state == "arguments":
                    break
        return Read(content, _merged(found))

    def end(self) -> Read:
        """What was held back, once nothing follows: text, unless it came after a call."""
        rest, self._held = self._held, ""
        return Read("" if self.calls else rest)

    def _text(self) -> tuple[str, bool]:
        """Text that is certain, and whether the opener stands behind it."""
        if self._opener is None:
            text, self._held = self._held, ""
            return text, False
        before, opener, behind = self._held.partition(self._opener)
        if opener:
            # What a call turns out not to be is given back with its opener: see end.
            self._state = "head"
            self._held = opener + behind
            return before, True
        certain = len(before) - overlap(before, self._opener)
        self._held = before[certain:]
        return before[:certain], False

    def _begun(self) -> CallPiece | None:
        """The first piece of a call whose head is complete."""
        head = _HEAD.search(self._held)
        if head is None:
            return None
        self._held = self._held[head.end() :]
        self._state = "arguments"
        self._arguments = _Arguments()
        self.calls += 1
        return CallPiece(self.calls - 1, new_id(), _string(head[1]), "")

    def _more(self) -> str:
        """What is held of a call's arguments."""
        end = self._arguments.end_in(self._held)
        if end is None:
            text, self._held = self._held, ""
            return text
        text, self._held = self._held[:end], self._held[end:]
        self._state = "head"
        return text


class _Arguments:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def end_in(self, text: str) -> int | None:
        """Where the object ends in the next piece."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{}":
                self._depth += 1 if character == "{" else -1
                if not self._depth:
                    return at + 1
        return None


def _string(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text[1:-1]


def _merged(pieces: list[CallPiece]) -> tuple[CallPiece, ...]:
    """One piece a call; none that is empty, but for a first one."""
    merged: list[CallPiece] = []
    for piece in pieces:
        if merged and merged[-1].index == piece.index:
            first = merged.pop()
            piece = CallPiece(first.index, first.id, first.name, first.arguments + piece.arguments)
        merged.append(piece)
    return tuple(piece for piece in merged if piece.id is not None or piece.arguments)
