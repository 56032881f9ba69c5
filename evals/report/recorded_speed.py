"""Speeds that `qmix bench --json` recorded, read again for a report. Measures nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.pages.page import Section, Table

_EXPECTED = "what qmix bench --json printed"


@dataclass(frozen=True)
class RecordedSpeed:
    """One test of a bench; a speed is of all rows together, in tokens a second."""

    model: str
    device: str
    dtype: str
    test: str
    batch: int
    tokens_per_second: float
    deviation: float


def read_speeds(path: Path) -> tuple[RecordedSpeed, ...]:
    """The tests of one document of `qmix bench --json`.

    Raises:
        CheckpointError: unreadable, or another document.
    """
    document = strict_json.read(path)
    try:
        return tuple(_speed(document, entry) for entry in document["measurements"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "not a record of speeds",
            where=str(path),
            expected=_EXPECTED,
            found=f"{type(error).__name__}: {error}"[:80],
        ) from None


def _speed(document: dict[str, Any], entry: dict[str, Any]) -> RecordedSpeed:
    return RecordedSpeed(
        model=str(document["model"]),
        device=str(document["device"]),
        dtype=str(document["dtype"]),
        test=str(entry["test"]),
        batch=int(entry["batch"]),
        tokens_per_second=float(entry["tokens_per_second"]),
        deviation=float(entry["deviation"]),
    )


def speed_section(speeds: Sequence[RecordedSpeed]) -> Section | None:
    """All records as one table; None if there are none."""
    if not speeds:
        return None
    rows = tuple(
        (
            speed.model,
            speed.test,
            str(speed.batch),
            f"{speed.tokens_per_second:.2f}",
            f"{speed.deviation:.2f}",
            f"{speed.dtype} on {speed.device}",
        )
        for speed in speeds
    )
    header = ("model", "test", "batch", "tokens/s", "±", "measured")
    words = (
        "As qmix bench recorded them; nothing was timed for this page. pp reads a prompt, tg "
        "writes tokens one by one.",
    )
    return Section("Speed", words, (Table("Recorded speeds", header, rows),))
