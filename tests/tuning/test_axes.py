"""The choices of a decode step: every field is one, and only known values come out of a file."""

import json
from dataclasses import fields, replace

import pytest

from qmix.kernels.gpu.grid import Tuning
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.tuning import axes


def test_every_field_of_a_step_is_an_axis():
    parts = {name.partition(".")[0] for name in axes.values_of(full=False)}
    assert parts == {field.name for field in fields(StepTuning)}


def test_values_are_distinct_and_the_default_is_one():
    for full in (False, True):
        for name, values in axes.values_of(full=full).items():
            assert len(set(values)) == len(values), name
            assert axes._get(UNTUNED, name) in values


def test_an_axis_changes_one_field():
    for name, axis in zip(axes.values_of(full=False), axes.axes(), strict=True):
        candidates = axis(UNTUNED)
        assert len(set(candidates)) == len(candidates) > 1
        for candidate in candidates:
            assert candidate == UNTUNED or axes.changes(candidate).startswith(f"{name} ")
            assert ", " not in axes.changes(candidate)


def test_the_products_with_most_bytes_come_first():
    assert list(axes.values_of(full=True))[:2] == ["gate_up.warps", "down.warps"]


def test_json_and_back():
    for axis in axes.axes(full=True):
        for tuning in axis(replace(UNTUNED, down=Tuning(warps=1))):
            document = json.loads(json.dumps(axes.to_json(tuning)))
            assert axes.from_json(document) == tuning


@pytest.mark.parametrize(
    "change",
    [
        {"gate_up": None},
        {"gate_up": {"warps": 3, "stages": None, "warps_per_sm": 7, "dense_tokens": 1024}},
        {"gate_up": {"warps": True, "stages": None, "warps_per_sm": 7, "dense_tokens": 1024}},
        {"gate_up": {"warps": 2, "stages": None, "warps_per_sm": 7, "dense_tokens": 5}},
        {"gate_up": {"warps": 2, "stages": None, "warps_per_sm": 7}},
        {"down": []},
        {"merge_in_split": 1},
        {"more": True},
    ],
    ids=str,
)
def test_what_no_search_gives_is_refused(change):
    with pytest.raises(ValueError, match=r"not the fields|is "):
        axes.from_json({**axes.to_json(UNTUNED), **change})
    with pytest.raises(ValueError, match="not the fields"):
        axes.from_json(list(change))
