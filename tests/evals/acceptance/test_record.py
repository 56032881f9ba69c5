"""The record: its name, and what its page says."""

from qmix.evals.acceptance.record import AcceptanceRecord, StepOutcome


def record():
    return AcceptanceRecord(
        "command", "2026-01-02T03:04:05+00:00", "NVIDIA H100 80GB HBM3", "1.2", {"torch": "2"}, None, 9.0
    )  # fmt: skip


def test_the_table():
    found = record()
    found.steps["moe"] = StepOutcome(
        "ok", 3.0, [{"kernel": "a|b", "us": 95.123456, "list": [1]}, {"kernel": "c", "tok": 3}]
    )
    found.steps["peers"] = StepOutcome("failed", 1.0, [], "Traceback\nValueError: odd\n")
    found.steps["moe"].clocks = {"sm_mhz": {"median": 1755.0, "largest": 1980.0}}
    text = found.markdown()
    assert "median (largest): sm_mhz 1755 (1980)" in text
    assert "| kernel | us | tok |" in text
    assert "| a/b | 95.12 |  |" in text
    assert "failed: ValueError: odd" in text


def test_the_record_is_named_by_date_and_gpu(tmp_path):
    assert record().write(tmp_path).name == "2026-01-02-nvidia-h100-80gb-hbm3-acceptance.json"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md"]
