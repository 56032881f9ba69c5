"""The table of what a decode step's kernels cost."""

from qmix.evals import aot_record


def test_the_table_shows_the_worst_of_the_usual_forms_alone(monkeypatch):
    def line(registers, per_weight):
        return [registers, 0, 0, 99, per_weight, 0, "HMMA"]

    name = "sm_90 down {}, 8 columns, 2 warps".format
    lines = {
        name("nf4 64"): line(90, 3.4),
        name("nf4 64").replace("down", "gate_up"): line(80, 3.5),
        name("nf4 64").replace("2 warps", "1 warps"): line(99, 3.9),
        name("own nf4 64"): line(99, 3.9),
        name("int4 128"): line(70, 1.9),
        name("int4 128 asymmetric"): line(99, 2.9),
        name("int3 128"): line(77, 2.4),
        name("int3 128 g32"): line(99, 2.9),
    }
    monkeypatch.setattr(aot_record, "_read", lambda: {"3.7.1": lines})
    nf4, int4, int3 = aot_record.table().splitlines()[2:]
    assert nf4 == "| NF4, Triton 3.7.1 | - | - | - | 3.50 (90) | - | - |"
    assert int4 == "| Int4, Triton 3.7.1 | - | - | - | 1.90 (70) | - | - |"
    assert int3 == "| Int3, Triton 3.7.1 | - | - | - | 2.40 (77) | - | - |"
