"""The load program, smaller: right texts and nothing left behind, on plain and on 4-bit weights."""

import json
from dataclasses import asdict

import pytest

from qmix.evals.serve_load import measure_load
from tests.support.models import TINY

pytestmark = pytest.mark.soak


def test_many_callers_get_right_texts_and_leave_nothing():
    record = measure_load(TINY, clients=60, requests=6, slots=8, queue=20, seed=0, dtype="fp32")
    assert record.wrong == ()
    assert record.leaks == ()
    assert record.exit_code == 0
    assert sum(record.asked.values()) == 360
    assert set(record.asked) == {"streams", "waits", "cancels", "slow", "malformed", "long"}
    assert json.loads(json.dumps(asdict(record)))["asked"] == record.asked
    assert 0 < record.first_s[0] < record.first_s[1]
