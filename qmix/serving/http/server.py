"""Server: an application on a listening socket, until a signal or a fault of the engine ends it.

Knows no routes. A signal lets requests go on for a while; then their streams end with an error.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from qmix.errors import ResourceError
from qmix.serving.engine import Engine
from qmix.serving.http import descriptors
from qmix.serving.http.connection import Connection

# The process ends within 10 s of a signal: requests have 6, their last events 1, torch the rest.
DRAIN_S, _GRACE_S = 6.0, 7
_KEEP_ALIVE_S = 30
_BACKLOG = 2048  # connections that the system completes before they are accepted
# asyncio accepts so many a turn, and closes what it is told to some turns later: together these fit
# into the descriptors that are kept back.
_ACCEPTS = 16
_RED_TICKS = 20  # 2 s in which the health shows that the engine has failed, before the end


class Server(uvicorn.Server):
    """uvicorn's, which ends with its engine, and its engine with it."""

    def __init__(self, app: ASGIApp, engine: Engine, started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_ACCEPTS,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._engine = engine
        self._when_started = started
        self._red_ticks = 0

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn: ten times a second, whether to end."""
        self._red_ticks += self._engine.failure is not None
        return await super().on_tick(counter) or self._red_ticks > _RED_TICKS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn, which gives the system the backlog of asyncio."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)
        self._when_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn: take no more, and let what runs come to its end."""
        # In a thread that nobody waits for: a second Ctrl-C ends the process at once.
        threading.Thread(target=self._engine.close, args=(DRAIN_S,), daemon=True).start()
        await super().shutdown(sockets)


def serve(
    app: ASGIApp, engine: Engine, listener: socket.socket, started: Callable[[], None]
) -> None:
    """Serve until SIGTERM, Ctrl-C or a fault of the engine. For the main thread.

    Args:
        started: called once requests are answered, and a signal ends it in order.

    Raises:
        QmixError: the engine's fault.
        KeyboardInterrupt: it was Ctrl-C.
    """
    descriptors.raise_limit()
    # What asyncio warns of is a write to a client that has just gone: no fault of anybody's here.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = Server(app, engine, started)
    with _terminable(server):
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ResourceError: the address is in use, or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ResourceError(
            "cannot listen",
            where=f"{host}:{port}",
            found=getattr(error, "strerror", None) or str(error),
            remedy="Give another --port or --host.",
        ) from None


@contextmanager
def _terminable(server: Server) -> Iterator[None]:
    """SIGTERM is a way to end, and no failure: uvicorn raises it again once it has ended."""

    def ended(_: int, __: FrameType | None) -> None:
        server.should_exit = True  # where uvicorn does not listen to signals yet

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
