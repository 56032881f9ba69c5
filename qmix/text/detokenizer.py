"""Ids to text as they arrive: whole characters only, each once.

Knows nothing of encoding or of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmix.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What each id shows: one table, so that streaming and decoding cannot disagree."""

    names: tuple[str, ...]
    texts: tuple[str, ...]  # with spaces in place of the mark
    bytes_by_id: Mapping[int, int]
    controls: frozenset[int]  # unknown, begin, end, special added tokens: no text of their own
    drops_first_space: bool


class Decodes(Protocol):
    """What is asked of a tokenizer."""

    @property
    def pieces(self) -> Pieces: ...


class StreamDetokenizer:
    """Text from ids as they arrive: what is finished comes out, and comes out once.

    All `put` results and `end` together are the text that `decode` gives for the same ids. The
    bytes of an unfinished character wait for their rest. O(1) a token.

    Args:
        tokenizer: whose ids they are.
        prompt: ids that stand before the first `put`; their text is not repeated. With a prompt
            the first piece keeps its leading space (`generate`: the text goes on); without one
            it loses it (`chat`: an answer starts).
        skip_special_tokens: leave control tokens out.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skip = skip_special_tokens
        self._started = not self._pieces.drops_first_space
        self._waiting = b""
        for index in prompt:
            self.put(index)

    def put(self, token_id: int) -> str:
        """The text that `token_id` finishes; often one piece, sometimes nothing.

        Raises:
            UsageError: an id outside the vocabulary.
        """
        pieces = self._pieces
        if isinstance(token_id, int) and token_id >= len(pieces.texts):
            return self._finished(last=True)  # a row of a padded embedding has no text
        if not isinstance(token_id, int) or token_id < 0:
            expected = f"a token id from 0 to {len(pieces.texts) - 1}"
            raise UsageError(
                "wrong value", where="token_id", expected=expected, found=repr(token_id)[:80]
            )
        byte = pieces.bytes_by_id.get(token_id)
        if byte is not None:
            self._started = True
            self._waiting += bytes((byte,))
            return self._finished(last=False)
        before = self._finished(last=True)
        if token_id in pieces.controls and self._skip:
            return before
        text = pieces.texts[token_id]
        if not self._started:
            self._started = True
            text = text.removeprefix(" ")
        return before + text

    def end(self) -> str:
        """What still waits: U+FFFD for each byte of a character that never came whole."""
        return self._finished(last=True)

    def _finished(self, *, last: bool) -> str:
        text = ""
        while self._waiting:
            try:
                text += self._waiting.decode()
                self._waiting = b""
            except UnicodeDecodeError as error:
                # Only "unexpected end" reaches the last byte without breaking a rule of UTF-8.
                if error.reason == "unexpected end of data" and not last:
                    return text
                # One U+FFFD a byte, as sentencepiece does; Python's own rule merges some.
                text += self._waiting[: error.start].decode() + "\ufffd"
                self._waiting = self._waiting[error.start + 1 :]
        return text
