"""Ids to text as they arrive: whole characters only, each exactly once.

Knows nothing of encoding or of files.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmix.errors import wrong_value


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The vocabulary by id. Streaming and decoding share it, so they cannot disagree.

    Attributes:
        names: the pieces as sentencepiece names them.
        texts: the pieces with spaces in place of sentencepiece's mark.
        bytes_by_id: the bytes of each piece that may be part of a character.
        controls: unknown, begin, end and special added tokens, which have no text of their own.
        drops_first_space: whether decoding drops the space of the first piece.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    bytes_by_id: Mapping[int, bytes]
    controls: frozenset[int]
    drops_first_space: bool


class Decodes(Protocol):
    """The part of a tokenizer that decoding needs."""

    @property
    def pieces(self) -> Pieces: ...


class StreamDetokenizer:
    """Turns ids into text as they arrive, each character as soon as it is complete.

    The results of all `put` calls and of `end`, joined, are the text that `decode` gives for the
    same ids. The bytes of an incomplete character are held back. Each token costs O(1).

    Args:
        tokenizer: the tokenizer of the ids.
        prompt: ids before the first `put`, whose text is not repeated. After a prompt the first
            piece keeps its leading space, because the text continues (`generate`). Without one it
            loses the space, because an answer starts (`chat`).
        skip_special_tokens: leave control tokens out.
        shown: control tokens that stand in the text nevertheless.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.pieces.controls.difference(shown) if skip_special_tokens else ()
        self._started = not self._pieces.drops_first_space
        self._waiting = b""
        for index in prompt:
            self.put(index)

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes: mostly one piece, sometimes nothing.

        An id above the vocabulary is a row of a padded embedding, which has no text.

        Raises:
            UsageError: not an integer, or a negative one.
        """
        pieces = self._pieces
        if not isinstance(token_id, int) or token_id < 0:
            expected = f"a token id from 0 to {len(pieces.texts) - 1}"
            raise wrong_value("token_id", expected, token_id)
        if token_id >= len(pieces.texts):
            return self._complete(last=True)
        byte = pieces.bytes_by_id.get(token_id)
        if byte is not None:
            self._started = True
            self._waiting += byte
            return self._complete(last=False)
        before = self._complete(last=True)
        if token_id in self._skipped:
            return before
        text = pieces.texts[token_id]
        if not self._started:
            self._started = True
            text = text.removeprefix(" ")
        return before + text

    def end(self) -> str:
        """End the text: U+FFFD for each byte of a character that was never completed."""
        return self._complete(last=True)

    def _complete(self, *, last: bool) -> str:
        text = ""
        while self._waiting:
            try:
                text += self._waiting.decode()
                self._waiting = b""
            except UnicodeDecodeError as error:
                # Only after "unexpected end" can further bytes still make the sequence valid.
                if error.reason == "unexpected end of data" and not last:
                    return text
                # One U+FFFD for each byte, as in sentencepiece; Python would merge some.
                text += self._waiting[: error.start].decode() + "\ufffd"
                self._waiting = self._waiting[error.start + 1 :]
        return text
