"""HttpCall: one POST on a connection of its own, and its answer whole or in events as they come.

Speaks no more HTTP than two servers of the kind need. Knows nothing of what is asked.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    port: int
    host: str = "127.0.0.1"


class SilentEndError(EOFError):
    """A caller cannot tell this end from that of a whole answer."""


class HttpCall:
    """A connection that carries one request. Leaving it closes the connection, whatever came.

    Args:
        body: JSON, or bytes as they are.
        receive_bytes: of the system's buffer and of ours; a small one lets the server feel that
            nobody reads. None: the usual.

    Attributes:
        status: of the answer.
        retry_s: seconds after which a refused request may come again.
    """

    def __init__(
        self,
        address: Address,
        path: str,
        body: dict[str, Any] | bytes,
        *,
        receive_bytes: int | None = None,
    ) -> None:
        self._address, self._receive_bytes = address, receive_bytes
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        self._request = head.encode() + data
        self._is_chunked = False
        self.status = 0
        self.retry_s = 0.0

    async def __aenter__(self) -> "HttpCall":
        """Send the request and read the head of its answer.

        Raises:
            OSError: the connection was refused or lost.
            EOFError: it was closed without an answer.
        """
        connection = socket.socket()
        if self._receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(connection, (self._address.host, self._address.port))
            self._reader, self._writer = await asyncio.open_connection(
                sock=connection, limit=self._receive_bytes or _LINE_BYTES
            )
        except BaseException:
            connection.close()
            raise
        try:
            self._writer.write(self._request)
            await self._read_head()
        except BaseException:
            self._writer.transport.abort()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.transport.abort()

    async def document(self) -> dict[str, Any]:
        """The answer whole."""
        if self._is_chunked:
            data = b"".join([part async for part in self._chunks()])
        else:
            data = await self._reader.read()
        document: dict[str, Any] = json.loads(data)
        return document

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The documents of a stream, up to its [DONE].

        Raises:
            OSError, EOFError: the connection was lost in the middle.
            SilentEndError: the stream ended in order, but without it.
        """
        rest = b""
        async for part in self._chunks():
            *events, rest = (rest + part.replace(b"\r\n", b"\n")).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    return
                if event.startswith(b"data: "):
                    yield json.loads(event.removeprefix(b"data: "))
        raise SilentEndError("a stream ended without [DONE]")

    async def _read_head(self) -> None:
        words = (await self._reader.readline()).split()
        if len(words) < 2:
            raise EOFError("no answer")
        self.status = int(words[1])
        while (line := await self._reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            if name.lower() == "transfer-encoding":
                self._is_chunked = value.strip().lower() == "chunked"
            if name.lower() == "retry-after":
                self.retry_s = float(value)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while line := await self._reader.readline():
            size = int(line, 16)
            if size == 0:
                return
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        raise ConnectionResetError("the answer was cut off")
