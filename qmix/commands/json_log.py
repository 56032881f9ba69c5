"""--log-json: what a command says on stderr as one JSON object a line.

Its fields are documented in docs/serving.md. Knows no command.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Annotated, Any, TextIO

import typer

from qmix.errors import QmixError


class _Lines(logging.StreamHandler[TextIO]):
    """Writes a line a record to stderr, and loses it where nobody reads."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        return line(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """See logging."""


def line(record: logging.LogRecord) -> str:
    """A record as JSON: time, level, event, request_id, and the fields of its event.

    A record that names no event is a `notice` with a `message`.
    """
    at = datetime.fromtimestamp(record.created, UTC)
    message = record.getMessage().removeprefix("warning: ").rstrip()  # of a Python warning
    fields = dict(getattr(record, "fields", {"message": message}))
    document: dict[str, Any] = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": getattr(record, "event", "notice"),
        "request_id": fields.pop("request_id", None),
        **fields,
    }
    if record.exc_info:
        document["traceback"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(document, ensure_ascii=False, default=str)


def begin() -> None:
    """Write all that is logged, warned of and told in this way, from now on."""
    logging.captureWarnings(True)
    logging.getLogger().handlers = [_Lines()]
    logging.getLogger("qmix").handlers = []
    logging.getLogger("qmix.requests").setLevel(logging.INFO)


def _begun(wanted: bool) -> bool:
    if wanted:
        begin()
    return wanted


LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        help="Say what happens on stderr as one JSON object a line.",
        callback=_begun,
        is_eager=True,
    ),
]


def is_on() -> bool:
    """Whether `begin` was called."""
    return any(isinstance(handler, _Lines) for handler in logging.getLogger().handlers)


def tell(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event of the command itself."""
    logging.getLogger("qmix").log(level, event, extra={"event": event, "fields": fields})


def failed(error: BaseException, exit_code: int) -> None:
    """Log the error that ends the command."""
    document = error.to_dict() if isinstance(error, QmixError) else {"error": str(error)}
    tell("failed", level=logging.ERROR, **{**document, "exit_code": exit_code})
