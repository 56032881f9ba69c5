"""ApiError: a request that is refused or failed, in the shape that OpenAI's clients read.

Knows no routes.
"""

from typing import Any

from starlette.responses import JSONResponse

from qmix.errors import QmixError, UsageError
from qmix.serving.request import BusyError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_RETRY_S = "1"


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

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"retry-after": _RETRY_S} if self.status == 429 else None
        return JSONResponse(self.document, self.status, headers)
