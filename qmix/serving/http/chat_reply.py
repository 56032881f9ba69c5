"""ChatReply: a chat's reply as OpenAI's documents, whole or in chunks. Knows no transport."""

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.serving.call_reader import CallPiece, CallReader, Read
from qmix.serving.http import logprobs
from qmix.serving.http.replies import Choice, Document, Head, expert_counts
from qmix.serving.request import Ended, LogProb, Piece
from qmix.text.tokenizer import LlamaTokenizer


@dataclass(frozen=True)
class ChatReply:
    """See ReplyFormat.

    Attributes:
        reports: whether log-probabilities were asked for.
        readers: find the calls of each choice; empty: nothing may be called.
    """

    head: Head
    tokenizer: LlamaTokenizer
    reports: bool
    choices_per_prompt: int
    includes_usage: bool
    readers: Sequence[CallReader] = ()

    @property
    def id(self) -> str:
        """See ReplyFormat."""
        return self.head.id

    def whole(self, choices: Sequence[Choice], usage: Document) -> Document:
        """See ReplyFormat."""
        listed = [
            {
                "index": index,
                "message": self._message(index, choice.text),
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": self._reason(index, choice.finish),
                **expert_counts(choice.ended),
            }
            for index, choice in enumerate(choices)
        ]
        return self.head.document(listed, usage=usage)

    def opening(self, index: int) -> list[Document]:
        """See ReplyFormat."""
        content = None if self.readers else ""
        delta = {"role": "assistant", "content": content, "refusal": None}
        return [self._chunk(index, delta)]

    def piece(self, index: int, piece: Piece) -> list[Document]:
        """See ReplyFormat."""
        found = [] if piece.logprob is None else [piece.logprob]
        if not self.readers:
            return [self._chunk(index, {"content": piece.text}, self._logprobs(found))]
        delta = _delta(self.readers[index].put(piece.text))
        return [self._chunk(index, delta, self._logprobs(found))] if delta or found else []

    def closing(self, index: int, ended: Ended) -> list[Document]:
        """See ReplyFormat."""
        rest = _delta(self.readers[index].end()) if self.readers else {}
        last = self._chunk(index, {}, finish=self._reason(index, ended.finish))
        last["choices"][0].update(expert_counts(ended))
        return [self._chunk(index, rest), last] if rest else [last]

    def ending(self, usage: Document) -> list[Document]:
        """See ReplyFormat."""
        return [self.head.document([], usage=usage)] if self.includes_usage else []

    def _message(self, index: int, text: str) -> Document:
        if not self.readers:
            return {"role": "assistant", "content": text, "refusal": None}
        reader = self.readers[index]
        reads = [reader.put(text), reader.end()]
        content = "".join(read.content for read in reads)
        message: Document = {"role": "assistant", "content": content, "refusal": None}
        if reader.calls:
            message["content"] = content or None
            message["tool_calls"] = [_call(piece, whole=True) for piece in reads[0].calls]
        return message

    def _reason(self, index: int, finish: str) -> str:
        """Why a choice ended; one that was cut does not end with its calls."""
        called = self.readers and self.readers[index].calls
        return "tool_calls" if called and finish == "stop" else finish

    def _chunk(
        self,
        index: int,
        delta: Document,
        reported: Document | None = None,
        finish: str | None = None,
    ) -> Document:
        choice = {"index": index, "delta": delta, "logprobs": reported, "finish_reason": finish}
        return self.head.document([choice], **({"usage": None} if self.includes_usage else {}))

    def _logprobs(self, found: Sequence[LogProb]) -> Document | None:
        return logprobs.of_chat(found, self.tokenizer.pieces) if self.reports else None


def _delta(read: Read) -> Document:
    delta: Document = {}
    if read.content:
        delta["content"] = read.content
    if read.calls:
        delta["tool_calls"] = [_call(piece) for piece in read.calls]
    return delta


def _call(piece: CallPiece, *, whole: bool = False) -> Document:
    """A call, or in a chunk a piece of one, which has an index."""
    call: Document = {} if whole else {"index": piece.index}
    function: Document = {}
    if piece.id is not None:
        call |= {"id": piece.id, "type": "function"}
        function["name"] = piece.name
    return {**call, "function": {**function, "arguments": piece.arguments}}
