"""Bodies of requests: JSON of a bounded size that arrives in bounded time. Knows no fields.

Also the threads in which requests are prepared.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from qmix import strict_json
from qmix.errors import QmixError
from qmix.serving.http.errors import ApiError
from qmix.serving.http.flight import LeftError

Result = TypeVar("Result")
MAX_BYTES = 4 << 20
_MAX_HELD_BYTES = 256 << 20  # of all bodies that are being read or parsed
_WAIT_S = 30.0
# Each thread has memory of its own from the allocator, which keeps what a prompt of 1 MB once
# needed: with up to 64 threads the server grew by 500 MB, with 4 it does not.
_THREADS = 4


class Bodies:
    """Reads bodies, and counts what all of them together hold."""

    def __init__(self) -> None:
        self._held = 0
        self._threads = ThreadPoolExecutor(_THREADS, "qmix-body")

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body; it counts as held until the context's end.

        Raises:
            ApiError: the body is too large or too slow.
            LeftError: the client has gone.
        """
        _check_headers(request)
        body = bytearray()
        try:
            await self._read(request, body)
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def run(self, prepare: Callable[[], Result]) -> Result:
        """What `prepare` gives, in one of a few threads: it may compute, and must not wait.

        Raises:
            ApiError: as prepare, also for its other errors.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, prepare)
        except QmixError as error:
            raise ApiError.of(error) from error

    async def _read(self, request: Request, body: bytearray) -> None:
        try:
            async with asyncio.timeout(_WAIT_S):
                async for part in request.stream():
                    body += part
                    self._held += len(part)
                    self._check(len(body))
        except TimeoutError:
            raise ApiError("the body took too long", status=408, code="timeout") from None
        except ClientDisconnect:
            raise LeftError from None

    def _check(self, size: int) -> None:
        if size > MAX_BYTES:
            raise _too_large()
        if self._held > _MAX_HELD_BYTES:
            raise ApiError("too many large bodies at a time", status=503, code="unavailable")


def _check_headers(request: Request) -> None:
    """
    Raises:
        ApiError: the body is not plain JSON, or says that it is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            f"Content-Type: expected application/json; found {kind[:80] or 'none'}",
            status=415,
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            "Content-Encoding: bodies are taken as they are",
            status=415,
            code="unsupported_media_type",
        )
    size = request.headers.get("content-length", "0")
    if len(size) > 12 or (size.isdigit() and int(size) > MAX_BYTES):
        raise _too_large()


def _too_large() -> ApiError:
    return ApiError(
        f"the body is larger than {MAX_BYTES:,} bytes", status=413, code="request_too_large"
    )


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        ApiError: it is none.
    """
    try:
        return strict_json.loads(body, where="the body")
    except QmixError as error:
        raise ApiError(str(error), code="invalid_json") from None
