"""Guard: who may call. Knows no routes but those that need no key, and no bodies.

A web page that the user visits can send requests to this machine. It cannot hide its Origin, and a
name that it has pointed here (DNS rebinding) stands in Host.
"""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qmix.serving.http.errors import MESSAGES, ApiError

HEALTH = "/health"
PAGE = "/"
# Need no key: what watches a server has none, and the page asks for it.
_OPEN = (HEALTH, PAGE)


@dataclass(frozen=True)
class Access:
    """What a request must show.

    Attributes:
        key: in `Authorization: Bearer KEY`, or Anthropic's `x-api-key`; None: nothing.
        host_names: names of this server beside localhost and addresses.
    """

    key: str | None = None
    host_names: frozenset[str] = frozenset()

    def check(self, headers: Headers, path: str) -> None:
        """
        Raises:
            ApiError: it shows something else.
        """
        host = headers.get("host", "")
        if not self._is_own(host):
            raise ApiError(
                f"Host: expected an address, localhost or a name given by --host-name; "
                f"found {host[:80]!r}",
                status=403,
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise ApiError(
                f"Origin: pages of other servers may not call; found {origin[:80]!r}",
                status=403,
                code="wrong_origin",
            )
        if self.key is not None and path not in _OPEN and not self._has_key(headers, path):
            raise ApiError(
                "Authorization: expected `Bearer` and the server's key",
                status=401,
                code="invalid_api_key",
            )

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name == "localhost" or name in self.host_names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_key(self, headers: Headers, path: str) -> bool:
        assert self.key is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if path.startswith(MESSAGES) and "x-api-key" in headers:
            scheme, given = "bearer", headers["x-api-key"]
        # Digests are of one length, so that the time of the comparison tells nothing.
        digests = [hashlib.sha256(key.encode()).digest() for key in (given.strip(), self.key)]
        return hmac.compare_digest(*digests) and scheme.lower() == "bearer"


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class Guard:
    """Answers for an app where a request may not pass."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            try:
                self._access.check(Headers(scope=scope), scope["path"])
            except ApiError as error:
                await error.response(scope["path"])(scope, receive, send)
                return
        # Or the server's own start and end; there is no route for a WebSocket.
        await self._app(scope, receive, send)
