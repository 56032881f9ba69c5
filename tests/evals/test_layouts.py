"""qmix.evals.layouts on small experts: every layout is read as itself, and says its bits."""

import dataclasses
import json

import pytest

from qmix.evals import layouts
from qmix.evals.timing.stored_experts import LAYOUTS, shape, write_experts
from qmix.formats.metadata import read_metadata

SMALL = shape(hidden=256, width=512)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_written_is_read_as_that_layout(tmp_path, name):
    write_experts(tmp_path, LAYOUTS[name], SMALL)
    metadata = read_metadata(tmp_path)
    found = {metadata.packing(one).layout for one in metadata.tensors if one.kind == "expert"}
    (layout,) = found
    made = {"NF4": "bitsandbytes", "NVFP4": "ModelOpt", "MXFP4": "compressed-tensors"}
    first = name.split(",")[0].split(" ")[0]
    expected = "compressed-tensors" if name.endswith("compressed-tensors") else made.get(first)
    assert layout == (expected or first)


@pytest.mark.usefixtures("compiled")
def test_a_run_measures_every_layout(monkeypatch):
    monkeypatch.setattr(layouts, "_LOADS", 1)
    monkeypatch.setattr(layouts, "_TURNS", 1)
    report = layouts.measure_layouts(SMALL, note="alone")
    found = {one.layout: one for one in report.measurements}
    assert list(found) == list(LAYOUTS)
    assert {name: found[name].resident_bits for name in ("NF4", "MXFP4", "GGUF Q4_K")} == {
        "NF4": 4.5,
        "MXFP4": pytest.approx(4.25, rel=1e-3),  # and one number a weight
        "GGUF Q4_K": 4.5,
    }
    assert found["GGUF Q5_K"].stored_bits == 5.5
    assert found["GGUF Q5_K"].resident_bits == 5.5
    for one in report.measurements:
        assert one.load_rate > 0
        assert one.token > 0
        assert one.of_nf4 > 0
        assert one.peak_bytes is None or one.peak_bytes >= 0
    document = json.loads(json.dumps(dataclasses.asdict(report)))
    assert document["note"] == "alone"
    assert "| GGUF Q6_K | 6.562 | 6.562 |" in str(report)
