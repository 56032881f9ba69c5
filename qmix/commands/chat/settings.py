"""What /set changes: names, values as people write them, and who gave each.

Knows no conversation.
"""

from collections.abc import Callable, Mapping

from qmix.commands import options
from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.planning.byte_sizes import parse_count

BY = "/set"
SERVER = "the server"  # gives the values that nobody here gave; they are not known here
USER = (options.GIVEN, BY, "/load")  # whose settings outlive a change of the model
NONE = "none"


def _tokens(text: str) -> int:
    return parse_count(text, where="max_new_tokens")


SETTINGS: Mapping[str, Callable[[str], int | float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": _tokens,
    "seed": int,
}
# What Tab offers behind a name.
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "temperature": ("0", "0.7", "1.0"),
    "top_k": ("0", "50"),
    "top_p": ("0.9", "1.0"),
    "min_p": ("0", "0.05"),
    "repetition_penalty": ("1.0", "1.1"),
    "max_new_tokens": ("256", "1024", "4k"),
    "seed": (NONE, "1"),
}


def changed(config: GenerationConfig, name: str, text: str, *, by: str = BY) -> GenerationConfig:
    """The configuration with one setting, given as text; temperature 0 means greedy.

    Raises:
        UsageError: an unknown name, not a number, or out of range.
    """
    _check_known(name)
    if name == "seed" and text == NONE:
        return config.updated({"seed": None}, by=by)
    try:
        value = SETTINGS[name](text)
    except UsageError:
        raise
    except ValueError:
        kind = "a whole number" if SETTINGS[name] is int else "a number"
        raise UsageError(
            f"not {kind}", where=name, expected=f"such as {EXAMPLES[name][-1]}", found=repr(text)
        ) from None
    if name == "temperature":
        return config.updated({name: value, "do_sample": value != 0}, by=by)
    return config.updated({name: value}, by=by)


def shown(config: GenerationConfig, name: str) -> str:
    """A setting's value, and who gave it.

    Raises:
        UsageError: an unknown name.
    """
    _check_known(name)
    value, by = value_of(config, name), config.given.get(name, "the default")
    if name == "temperature" and not config.do_sample:
        by = config.given.get("do_sample", "the default")
    return f"{value:<12} {by}"


def value_of(config: GenerationConfig, name: str) -> str:
    """A setting's value as /set takes it, if it is known; temperature says that it is greedy."""
    if config.given.get(name) == SERVER:
        return "-"
    value = getattr(config, name)
    if name == "temperature" and not config.do_sample:
        return "0 (greedy)"
    return NONE if value is None else str(value)


def to_json(config: GenerationConfig) -> dict[str, int | float | None]:
    """Every setting that is known by its name, as a file keeps it; temperature 0 means greedy."""
    known = [name for name in SETTINGS if config.given.get(name) != SERVER]
    values = {name: getattr(config, name) for name in known}
    return values if config.do_sample else {**values, "temperature": 0}


def from_json(
    config: GenerationConfig, values: Mapping[str, object], *, by: str
) -> GenerationConfig:
    """The configuration with the settings of a file.

    Raises:
        UsageError: an unknown name, or a value that is none of its settings.
    """
    for name, value in values.items():
        _check_known(name)
        if value is None:
            config = config.updated({name: None}, by=by)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError("not a number", where=name, found=repr(value)[:80])
        else:
            config = changed(config, name, repr(value), by=by)
    return config


def _check_known(name: str) -> None:
    if name not in SETTINGS:
        raise UsageError(f"no setting {name!r}", expected=", ".join(SETTINGS))
