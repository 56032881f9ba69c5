"""What may be chosen of a StepTuning, by the names of its fields; a tuning as JSON and back.

A field of the class that is a truth value or a Literal is an axis by its type. Numbers are listed
here. What a file says is taken only if it is one of these values or the default.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qmix.kernels.gpu import attention_tuning, grid
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning

# Of each kind of tuning: a field's values, those first that promise most. The second tuple is for
# long searches.
_NUMBERS: Mapping[type, Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    grid.Tuning: {
        "warps": ((2, 1, 4), ()),
        "stages": ((3, 4), (2, 5, 6)),
        "warps_per_sm": ((14, 4), (10, 20, 28)),
    },
    attention_tuning.Tuning: {
        "columns": ((128, 32), (64,)),
        "stages": ((3,), (4,)),
        "blocks_per_sm": ((4, 1), (3, 6)),
    },
}
# The axes that promise most come first: a search ends when its time does.
_FIRST = ("gate_up.warps", "down.warps", "dependent", "prefetch")
_LAST = ("attention.stages", "attention.columns", "qkv.stages", "o_proj.stages")

# The form of a step with the simplest launches, each of which the probe compares with torch.
SEPARATE = replace(
    UNTUNED,
    **{each.name: False for each in fields(StepTuning) if getattr(UNTUNED, each.name) is True},  # type: ignore[arg-type]
)

Axis = Callable[[StepTuning], Sequence[StepTuning]]


def axes(*, full: bool = False) -> tuple[Axis, ...]:
    """What a search goes along; a full one twice, since one choice may depend on another."""
    found = tuple(partial(_along, name, values) for name, values in values_of(full=full).items())
    return found * 2 if full else found


def values_of(*, full: bool) -> dict[str, tuple[object, ...]]:
    """The values of each field, by its name such as `gate_up.warps`, as they are searched."""
    found: dict[str, tuple[object, ...]] = {}
    hints = get_type_hints(StepTuning)
    for field in fields(StepTuning):
        part = getattr(UNTUNED, field.name)
        if is_dataclass(part):
            for name, (few, more) in _NUMBERS[type(part)].items():
                default = getattr(part, name)
                found[f"{field.name}.{name}"] = (default, *few, *(more if full else ()))
        elif isinstance(part, bool):
            found[field.name] = (True, False)
        elif get_origin(hints[field.name]) is Literal:
            found[field.name] = get_args(hints[field.name])
    rank = dict.fromkeys(_FIRST, 0) | dict.fromkeys(_LAST, 2)
    return dict(sorted(found.items(), key=lambda item: rank.get(item[0], 1)))


def to_json(tuning: StepTuning) -> dict[str, Any]:
    """The tuning as JSON."""
    return asdict(tuning)


def from_json(document: object) -> StepTuning:
    """The tuning that `to_json` wrote.

    Raises:
        ValueError: a field is missing or unknown, or has a value that no search gives.
    """
    tuning = UNTUNED
    if not isinstance(document, dict) or document.keys() != asdict(UNTUNED).keys():
        raise ValueError("not the fields of a tuning")
    for name, values in values_of(full=True).items():
        part, _, field = name.partition(".")
        value = document[part]
        if field:
            value = value.get(field, ...) if isinstance(value, dict) else ...
        if not any(type(value) is type(each) and value == each for each in values):
            raise ValueError(f"{name} is {value!r}"[:80])
        tuning = _with(tuning, name, value)
    if to_json(tuning) != document:
        raise ValueError("not the fields of a tuning")
    return tuning


def changes(tuning: StepTuning) -> str:
    """What is not the default, for a person to read."""
    parts = []
    for name in values_of(full=True):
        if _get(tuning, name) != _get(UNTUNED, name):
            parts.append(f"{name} {_get(tuning, name)}")
    return ", ".join(parts) or "the defaults"


def _along(name: str, values: Sequence[object], tuning: StepTuning) -> list[StepTuning]:
    return [_with(tuning, name, value) for value in values]


def _get(tuning: StepTuning, name: str) -> object:
    part, _, field = name.partition(".")
    value = getattr(tuning, part)
    return getattr(value, field) if field else value


def _with(tuning: StepTuning, name: str, value: object) -> StepTuning:
    part, _, field = name.partition(".")
    if field:
        value = replace(getattr(tuning, part), **{field: value})
    return replace(tuning, **{part: value})  # type: ignore[arg-type]
