"""Fields of a request: what each may hold, declared beside it in a dataclass, and read from JSON.

A field is taken, ignored or refused; a name that is none of these is an error, as it is at OpenAI.
Knows no request.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from qmix.serving.http.errors import ApiError

Request = TypeVar("Request")


class WrongValueError(Exception):
    """What a kind expects instead; `at` is the place within the field, such as [0].role."""

    def __init__(self, expected: str, at: str = "") -> None:
        super().__init__(expected)
        self.expected, self.at = expected, at


Kind = Callable[[Any], Any]  # a value as it is used, from one of JSON; raises WrongValueError


@dataclass(frozen=True)
class Number:
    """A number within bounds."""

    least: float
    most: float

    def __call__(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise WrongValueError("a number")
        if not self.least <= value <= self.most:
            raise WrongValueError(f"{self.least:g} to {self.most:g}")
        return value


@dataclass(frozen=True)
class Whole:
    """An integer within bounds."""

    least: int
    most: int

    def __call__(self, value: Any) -> int:
        if type(value) is not int:
            raise WrongValueError("an integer")
        if not self.least <= value <= self.most:
            raise WrongValueError(f"{self.least} to {self.most}")
        return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise WrongValueError("true or false")
    return value


def at(place: str, kind: Kind, value: Any) -> Any:
    """What a kind reads of a value that stands at a place within the field."""
    try:
        return kind(value)
    except WrongValueError as error:
        raise WrongValueError(error.expected, place + error.at) from None


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise WrongValueError("a string")
    return value


@dataclass(frozen=True)
class Items:
    """A list of what another kind reads, with bounds on its length."""

    kind: Kind
    least: int
    most: int

    def __call__(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise WrongValueError("a list")
        if not self.least <= len(value) <= self.most:
            raise WrongValueError(f"{self.least} to {self.most} items")
        return tuple(at(f"[{index}]", self.kind, item) for index, item in enumerate(value))


@dataclass(frozen=True)
class Refused:
    """A field that asks for what is not here.

    Attributes:
        neutral: values that ask for nothing, beside null.
    """

    why: str
    neutral: Collection[Any] = ()


@dataclass(frozen=True)
class Others:
    """The fields beside those of the dataclass.

    Attributes:
        ignored: each with the reason.
    """

    ignored: Mapping[str, str]
    refused: Mapping[str, Refused]


def taken(kind: Kind, note: str, default: Any = None) -> Any:
    """A field of a request's dataclass. Null stands for its default.

    Args:
        note: what docs/serving.md says of it.
    """
    return field(default=default, metadata={"kind": kind, "note": note})


def read(request: type[Request], document: Mapping[str, Any], others: Others) -> Request:
    """A request from the JSON object of its body.

    Raises:
        ApiError: a field that is unknown, refused, or holds what it may not hold.
    """
    kinds = {each.name: each.metadata["kind"] for each in fields(request)}  # type: ignore[arg-type]
    values = {}
    for name, value in document.items():
        if name in kinds:
            if value is not None:
                values[name] = _value(name, kinds[name], value)
        elif name in others.refused:
            refused = others.refused[name]
            if value is not None and value not in refused.neutral:
                raise ApiError(
                    f"{name} is not supported: {refused.why}", param=name, code="unsupported"
                )
        elif name not in others.ignored:
            raise ApiError(
                f"unrecognized request argument: {name[:80]}", param=name[:80], code="unknown_field"
            )
    return request(**values)


def _value(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind(value)
    except WrongValueError as error:
        where = name + error.at
        found = repr(value)[:80] if not error.at else "another value"
        raise ApiError(
            f"{where}: expected {error.expected}; found {found}", param=where, code="invalid_value"
        ) from None
