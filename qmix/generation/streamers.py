"""Streamers: where the ids of a generation go while it runs.

Text comes from the detokenizer in whole characters; the bytes of an unfinished one wait. Knows no
models. Shape letters: see qmix.nn.
"""

import queue
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from qmix.errors import UsageError, wrong_type
from qmix.printable import printable
from qmix.text.detokenizer import Decodes, StreamDetokenizer


class Streamer(Protocol):
    """Hugging Face's protocol: the prompt (1, P) first, then each new id (1,), then end."""

    def put(self, value: Tensor, /) -> None: ...
    def end(self) -> None: ...


class TextStreamer:
    """Writes a generation's text to stdout as it is finished.

    Args:
        tokenizer: decodes the ids.
        skip_prompt: do not write the prompt's text.
        skip_special_tokens: do not write control tokens.

    Override `on_finalized_text` to send the text elsewhere.
    """

    def __init__(
        self, tokenizer: Decodes, skip_prompt: bool = False, *, skip_special_tokens: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._detokenizer: StreamDetokenizer | None = None

    def put(self, value: Tensor, /) -> None:
        """Write the text of ids (1, P) or (1,).

        Raises:
            UsageError: not a tensor of ids, or more than one row.
        """
        if not isinstance(value, Tensor):
            raise wrong_type("streamer", "a tensor", value)
        if value.dim() > 1 and value.shape[0] != 1:
            raise UsageError("a streamer takes one row", where="streamer", found=list(value.shape))
        first = self._detokenizer is None
        if self._detokenizer is None:
            self._detokenizer = StreamDetokenizer(
                self.tokenizer, skip_special_tokens=self.skip_special_tokens
            )
        text = "".join([self._detokenizer.put(index) for index in value.flatten().tolist()])
        if text and not (first and self.skip_prompt):
            self.on_finalized_text(text)

    def end(self) -> None:
        """Write the rest of the text; the streamer may then serve another generation."""
        rest = self._detokenizer.end() if self._detokenizer is not None else ""
        self._detokenizer = None
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write text that will not change any more; `stream_end` adds a line end.

        Characters that control a terminal are left out.
        """
        sys.stdout.write(printable(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


class TextIteratorStreamer(TextStreamer):
    """The text of a generation that runs in another thread, as an iterator.

    Args:
        timeout: seconds to wait for the next piece before queue.Empty is raised; None waits
            without end.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **options)
        self.timeout = timeout
        self._pieces: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
