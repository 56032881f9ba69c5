"""Functions become the JSON schemas that transformers makes of them."""

from enum import Enum
from typing import Any, Literal, Optional

import pytest

from qmix.errors import UsageError
from qmix.text.tool_schema import tool_schema

get_json_schema = pytest.importorskip("transformers.utils").get_json_schema


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


def weather(place: str, unit: Unit = Unit.C, days: int | None = None) -> dict[str, float]:
    """
    The weather of a place.

    In two paragraphs.

    Args:
        place: Where, for example
            "Zürich", in: two lines

        unit: Which unit (choices: ["celsius", "fahrenheit "])
        days: How many
    Returns:
        Degrees
        by hour.
    Raises:
        OSError: never.
    """


def everything(
    a: list[int],
    b: tuple[str, float],
    c: dict[str, list[bool]],
    d: Literal["x", 3],
    e: int | str | None,
    f: Optional[list[str]],  # noqa: UP045 - as people write it
    g: Any,
    h: list | tuple,
    i: dict,
):
    """All of them.

    Args:
        a: 1
        b: 2
        c: 3
        d: 4
        e: 5
        f: 6
        g: 7
        h: 8
        i: 9
    """


def bare() -> object:
    """Nothing."""


class Tools:
    def method(self, text: str):
        """One line.

        Args:
            text: what
        """


@pytest.mark.parametrize("function", [weather, everything, bare, Tools().method])
def test_the_schema_is_transformers(function):
    assert tool_schema(function) == get_json_schema(function)


def undescribed(a: int):
    """Text."""


def unhinted(a):
    """Text.

    Args:
        a: one
    """


def custom(a: Tools):
    """Text.

    Args:
        a: one
    """


def choices(a: str):
    """Text.

    Args:
        a: one (choices: [x])
    """


def silent(a: int): ...


@pytest.mark.parametrize("function", [undescribed, unhinted, custom, choices, silent])
def test_what_cannot_be_described_is_refused(function):
    with pytest.raises(Exception):  # noqa: B017, PT011 - transformers' own, of several kinds
        get_json_schema(function)
    with pytest.raises(UsageError):
        tool_schema(function)
