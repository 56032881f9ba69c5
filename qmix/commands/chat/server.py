"""Server: one that speaks OpenAI's API, over HTTP: what it lists, what it answers, what it streams.

Knows no chat. The only file that imports httpx.
"""

import ipaddress
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from qmix.commands.chat.chat_model import ServerError
from qmix.errors import QmixError, UnsupportedError, UsageError

_CONNECT_S = 10.0
_SILENCE_S = 600.0  # a server that reads a long prompt may say nothing for minutes
_SHOWN = 400  # characters of what a server says
_KEYLESS = (401, 403)
_REFUSED = (400, 404, 405, 413, 415, 422)

Document = Mapping[str, Any]


class Server:
    """A server by its address. As a context manager it closes its connections.

    Args:
        url: such as http://127.0.0.1:8000 or https://example.org/api/v1. Without a path it is /v1.
        key: sent as a bearer token; None: none.

    Raises:
        UsageError: the address is none.
        UnsupportedError: httpx is not installed.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise UnsupportedError(
                "qmix chat --connect needs httpx", remedy="Run: pip install 'qmix-runtime[connect]'"
            ) from None
        self.url = _checked(url)
        self._root = self.url.removesuffix("/v1")
        self._client = httpx.Client(
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S),
            trust_env=not _is_loopback(self.url),  # no proxy leads back to this machine
        )

    def models(self) -> list[Document]:
        """What it serves, each by its `id`.

        Raises:
            ServerError: nobody answers, or in another language.
            UsageError: it wants a key.
        """
        with self._told():
            response = self._client.get(f"{self.url}/models")
            if response.status_code != 200:
                raise self._refusal(response)
            found = _object(response.content).get("data")
        if not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
            raise self._strange("a list of models")
        return [each for each in found if isinstance(each.get("id"), str)]

    def answer(self, path: str, body: Document) -> Document | None:
        """What it answers beside the API, at `path` from the root; None where it does not.

        Raises:
            ServerError: nobody answers.
        """
        with self._told():
            response = self._client.post(self._root + path, json=body)
        if response.status_code != 200:
            return None
        try:
            return _object(response.content)
        except ValueError:
            return None

    def chunks(self, body: Document) -> Generator[Document, None, None]:
        """A chat's reply as it comes. Leaving the iteration closes the connection.

        Raises:
            ServerError: nobody answers, or not to the end.
            UsageError: it refuses the request.
        """
        with (
            self._told(),
            self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise self._refusal(response)
            for data in _events(response.iter_bytes()):
                if data == b"[DONE]":
                    return
                document = _object(data)
                if "error" in document:
                    raise ServerError("the server failed", where=self.url, found=_said(document))
                yield document

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what went wrong on the way.

        Raises:
            ServerError: something did.
        """
        import httpx

        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = str(error)[:_SHOWN] or type(error).__name__
            begun = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            what = "the server is gone" if begun else "the server does not answer"
            raise ServerError(what, where=self.url, found=said) from None
        except ValueError as error:
            if isinstance(error, QmixError):
                raise
            raise self._strange("JSON") from None

    def _strange(self, expected: str) -> ServerError:
        return ServerError(
            "this is no server of OpenAI's API",
            where=self.url,
            expected=expected,
            remedy="Give its base URL, such as http://127.0.0.1:8000/v1.",
        )

    def _refusal(self, response: Any) -> QmixError:
        """What a status and its body say."""
        try:
            said = _said(_object(response.content))
        except ValueError:
            said = f"status {response.status_code}"
        if response.status_code in _KEYLESS:
            remedy = "Set QMIX_API_KEY, or give --api-key-file."
            return UsageError("the server wants a key", where=self.url, found=said, remedy=remedy)
        kind = UsageError if response.status_code in _REFUSED else ServerError
        return kind("the server refused", where=self.url, found=said)


def _checked(url: str) -> str:
    """An address with its scheme and path, and no slash at its end.

    Raises:
        UsageError: it is none.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or not whole.isprintable() or " " in whole:
        raise UsageError(
            "not the address of a server",
            where="--connect",
            expected="such as http://127.0.0.1:8000",
            found=repr(url)[:80],
        )
    if "@" in parts.netloc:
        raise UsageError(
            "a secret does not belong into an address",
            where="--connect",
            remedy="Set QMIX_API_KEY, or give --api-key-file.",
        )
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _is_loopback(url: str) -> bool:
    name = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _events(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events. Lines end by \\n alone: JSON may hold other separators."""
    held = b""
    for part in parts:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _object(data: bytes) -> Document:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError
    return document


def _said(document: Document) -> str:
    """The message of an error, in one of the forms that servers give it."""
    error = document.get("error", document.get("message", document.get("detail", "no reason")))
    said = error.get("message", error) if isinstance(error, dict) else error
    return str(said)[:_SHOWN]
