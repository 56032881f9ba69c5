"""How a command of the chat describes itself, for completion and help."""

from dataclasses import dataclass
from enum import Enum


class Argument(Enum):
    """What stands behind a command's name."""

    NONE = "nothing"
    TEXT = "text"
    PATH = "a path"
    SETTING = "a setting and its value"
    MODEL = "a model"


@dataclass(frozen=True)
class Command:
    """A command of the chat.

    Attributes:
        name: with its slash.
        argument: decides what Tab offers behind the name.
        help: one line.
    """

    name: str
    argument: Argument
    help: str
