"""Server-sent events: documents as they come, an error as the last of them, and [DONE].

Knows nothing of what a document holds.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qmix.serving.http.errors import MESSAGES, ApiError
from qmix.serving.http.flight import LeftError, unless_left

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would hold events back
}
_DONE, _BEAT = b"data: [DONE]\n\n", b": waiting\n\n"


class EventStream(Response):
    """An answer in events.

    Args:
        documents: as they come; None sends a comment, a sign of life.
        close: called at the end, also where the client leaves before.
        path: that was called. Anthropic's events are named by their type, and have no [DONE].
    """

    def __init__(
        self,
        documents: AsyncIterator[dict[str, Any] | None],
        close: Callable[[], None],
        path: str,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._documents, self._close, self._path = documents, close, path
        self._named = path.startswith(MESSAGES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await unless_left(receive, self._send(send))
        except LeftError:
            return
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for document in self._documents:
                await _put(send, _BEAT if document is None else self._event(document))
        except ApiError as error:
            await _put(send, self._event(error.document_at(self._path)))
        if not self._named:
            await _put(send, _DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _event(self, document: dict[str, Any]) -> bytes:
        name = f"event: {document['type']}\n" if self._named else ""
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        return f"{name}data: {text}\n\n".encode()


async def _put(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
