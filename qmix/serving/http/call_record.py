"""CallRecord: what is told of a call once its requests have ended: lines of a log, and a trace.

Knows no documents and no exporter.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qmix.serving.request import Ended, Event, Request

if TYPE_CHECKING:
    from qmix.serving.http.tracing import CallTrace

_LOGGER = logging.getLogger("qmix.requests")


@dataclass(frozen=True)
class Call:
    """A call that the engine takes.

    Attributes:
        id: that of the reply.
        path, headers: of the call.
        begun: seconds since 1970.
    """

    id: str
    path: str
    model: str
    stream: bool
    requests: Sequence[Request]
    headers: Mapping[str, str]
    begun: float = field(default_factory=time.time)


class CallRecord:
    """Takes the events of a call's requests.

    Args:
        trace: where they go beside the log.
    """

    def __init__(self, call: Call, trace: "CallTrace | None" = None) -> None:
        self._call, self._trace = call, trace
        self._new_tokens = dict.fromkeys(range(len(call.requests)), 0)  # of those that run

    def put(self, index: int, event: Event) -> None:
        """Take an event of a request."""
        if not isinstance(event, Ended):
            self._new_tokens[index] += 1
        elif self._new_tokens.pop(index, None) is not None:
            self._ended(index, event)

    def close(self) -> None:
        """The caller has left, or all have ended."""
        elapsed = time.time() - self._call.begun
        for index, tokens in list(self._new_tokens.items()):
            prompt = len(self._call.requests[index].ids)
            left = Ended(finish="cancelled", prompt_tokens=prompt, elapsed_s=elapsed)
            self.put(index, replace(left, new_tokens=tokens))
        if self._trace is not None:
            self._trace.end()

    def _ended(self, index: int, ended: Ended) -> None:
        if self._trace is not None:
            self._trace.put(index, ended)
        if not _LOGGER.isEnabledFor(logging.INFO):
            return
        failed = ended.finish == "error"
        fields: dict[str, Any] = {
            "request_id": self._call.id,
            "choice": index,
            "path": self._call.path,
            "model": self._call.model,
            "stream": self._call.stream,
            "finish": ended.finish,
            "prompt_tokens": ended.prompt_tokens,
            "cached_tokens": ended.cached_tokens,
            "new_tokens": ended.new_tokens,
            "waited_s": round(ended.waited_s, 4),
            "first_token_s": round(ended.first_token_s, 4),
            "elapsed_s": round(ended.elapsed_s, 4),
            "error": str(ended.error) if failed else None,
        }
        level = logging.ERROR if failed else logging.INFO
        _LOGGER.log(level, "request", extra={"event": "request", "fields": fields})


def refused(path: str, status: int, code: str | None, message: str) -> None:
    """Log a call that had no reply."""
    fields = {"path": path, "status": status, "code": code, "message": message}
    level = logging.ERROR if status >= 500 else logging.WARNING
    if _LOGGER.isEnabledFor(logging.INFO):
        _LOGGER.log(level, "refused", extra={"event": "refused", "fields": fields})
