"""qmix.evals.offload when its record cannot be written; tests/models/test_offload.py runs it."""

from qmix.evals import offload


def test_a_record_that_cannot_be_written_is_one_line_after_the_result(
    tmp_path, monkeypatch, capsys
):
    record = offload.OffloadRecord(
        command="", versions={}, machine={}, checkpoint="x", checkpoint_bytes=1 << 30, ram=None,
        vram=None, peak_host_bytes=1 << 20, peak_device_bytes=0, prompt_tokens=4, new_tokens=16,
        load_s=1.0, first_token_s=1.0, decode_s=1.0, tokens_per_s=15.0, ids=(), bandwidths={},
        bound_tokens_per_s=20.0, experts={}, warnings=(),
    )  # fmt: skip
    monkeypatch.setattr(offload, "measure_offload", lambda request: record)
    out = tmp_path / "missing" / "record.json"
    assert offload.main(["model", "--json", str(out)]) == 4
    captured = capsys.readouterr()
    assert captured.out == f"{record}\n"
    (line,) = captured.err.splitlines()
    assert f"{out}: cannot be written" in line
    assert offload.main(["model", "--json", str(tmp_path / "record.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
