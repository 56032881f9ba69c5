"""ApiError: a request that is refused or failed, in the shape that OpenAI's clients read.

Knows no routes.
"""

from typing import Any

from starlette.responses import JSONResponse

from qmix.errors import QmixError, UsageError
from qmix.serving.http.call_record import refused
from qmix.serving.request import BusyError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_RETRY_S = "1"
# Anthropic's clients call paths that begin with this, and read errors in a form of their own.
MESSAGES = "/v1/messages"
_MESSAGES_TYPES = {
    **_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is no reply.

    Attributes:
        status: of HTTP.
        param: the field that is to blame, such as messages[0].content.
        code: a word for programs.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @classmethod
    def of(cls, error: QmixError, *, takes_requests: bool = True) -> "ApiError":
        """What a caller is told of an error.

        Args:
            takes_requests: whether the engine does.
        """
        if isinstance(error, BusyError):
            status, code = (429, "queue_full") if takes_requests else (503, "unavailable")
            return cls(str(error), status=status, code=code)
        if isinstance(error, UsageError):
            return cls(str(error), param=error.where, code="invalid_value")
        return cls(str(error), status=500, code="failed")

    @property
    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def document_at(self, path: str) -> dict[str, Any]:
        """The body of the answer in the form that callers of a path read."""
        if not path.startswith(MESSAGES):
            return self.document
        kind = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _MESSAGES_TYPES.get(self.status, kind)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """The answer to a call of a path, which is logged."""
        refused(path, self.status, self.code, self.message)
        headers = {"retry-after": _RETRY_S} if self.status == 429 else None
        return JSONResponse(self.document_at(path), self.status, headers)
