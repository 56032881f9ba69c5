"""Connection: uvicorn's, with limits on how long a client may be silent. Knows no requests.

uvicorn bounds only the time between two requests. Here a connection is aborted when no whole head
of a request arrives, or when the client takes nothing of what is sent to it. Where there are as
many as the process can have, the one that has had no request for longest makes room for a new one.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from uvicorn.protocols.http.h11_impl import H11Protocol

from qmix.serving.http import descriptors

HEAD_S = 10.0
WRITE_S = 30.0


class Connection(H11Protocol):
    """One client's connection."""

    head_s, write_s = HEAD_S, WRITE_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        if len(self.connections) >= descriptors.most_connections():
            (self._idlest or transport).abort()
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        # Writing pauses, and its time runs, as soon as the system's own buffer is full.
        transport.set_write_buffer_limits(high=0)
        _notice_dead_peers(transport.get_extra_info("socket"), self.write_s)
        self._head = Alarm(self.loop, self.head_s, transport.abort)
        self._reader = Alarm(self.loop, self.write_s, transport.abort)
        self._head.start()

    @property
    def is_idle(self) -> bool:
        """Whether it carries no request."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _idlest(self) -> asyncio.Transport | None:
        """Of all connections that carry no request, the one that has carried none for longest."""
        idle = [
            each
            for each in self.connections
            if isinstance(each, Connection) and each.is_idle and not each.transport.is_closing()
        ]
        return min(idle, key=lambda each: each._idle_since).transport if idle else None

    def on_response_complete(self) -> None:
        """See H11Protocol."""
        super().on_response_complete()
        self._idle_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self.is_idle:
            self._head.start()  # with the first byte that no request accounts for
        else:
            self._head.stop()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._reader.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._head.stop()
        self._reader.stop()
        super().connection_lost(exc)


class Alarm:
    """Acts once its seconds have passed since it was started, unless it is stopped before."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, action: Callable[[], None]
    ) -> None:
        self._loop, self._seconds, self._action = loop, seconds, action
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it; one that runs goes on."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._action)

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _notice_dead_peers(connection: socket.socket, seconds: float) -> None:
    """Lose a connection whose peer acknowledges nothing: it has vanished without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_USER_TIMEOUT", int(seconds * 1000)), ("TCP_KEEPIDLE", int(seconds))):
        if hasattr(socket, name):
            with suppress(OSError):  # not every kernel has it
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
