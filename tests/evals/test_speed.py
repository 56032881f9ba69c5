"""The speed table says what the records say, and that there are none where there are none."""

import json

import pytest

from qmix.errors import CheckpointError
from qmix.evals import speed


def record(date="2026-01-02T00:00:00+00:00", gpu="NVIDIA H100", us=95.4):
    def result(**values):
        return values

    nf4 = {"weights": "nf4", "layers": 32, "batch": 1}
    return {
        "gpu": gpu,
        "date": date,
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "steps": {
            "bandwidth": {"results": [result(what="copy", gigabytes_per_second=3000.0)]},
            "experts": {"results": [
                result(kernel="qmix nf4", tokens=1, microseconds=us, gigabytes_per_second=1500.0),
                result(kernel="qmix nf4", tokens=2, microseconds=99.0, gigabytes_per_second=1.0),
            ]},
            "peer slow": {"results": [
                result(kernel="slow", tokens=1, microseconds=300.0, bits_per_weight=4.5),
            ]},
            "peer fast": {"results": [
                result(kernel="fast", tokens=1, microseconds=120.0, bits_per_weight=4.25),
            ]},
            "peer gone": {"results": []},
            "nf4 tg64": {"results": [
                result(test="build", weights="nf4", layers=32, peak_bytes=1),
                result(test="tg64", **nf4, tokens_per_second=250.0, of_bound=0.55, peak_bytes=1),
            ]},
            "nf4 tg64 T0.7": {"results": [
                result(test="tg64 T0.7", **nf4, tokens_per_second=245.0, of_bound=0.54, peak_bytes=1),
            ]},
            "nf4 tg64 depth 4096": {"results": [
                result(test="tg64 @ d4096", **nf4, tokens_per_second=240.0, of_bound=0.5,
                       peak_bytes=25 * 2**30),
            ]},
            "nf4 pp4096": {"results": [
                result(test="pp4096", **nf4, tokens_per_second=12345.0, of_bound=None, peak_bytes=1),
            ]},
            "int4 tg64": {"results": [
                result(test="tg64", **{**nf4, "weights": "int4", "layers": 20},
                       tokens_per_second=300.0, of_bound=0.6, peak_bytes=1),
            ]},
            "int4 tg64 batch 8": {"results": []},
        },
    }  # fmt: skip


def put(folder, name, document):
    (folder / f"{name}-acceptance.json").write_text(json.dumps(document))


def test_no_record_no_figure(tmp_path):
    assert speed.speed_table(tmp_path) == speed.NOTHING
    put(tmp_path, "2026-01-01-no-gpu", {**record(), "gpu": None})
    assert speed.speed_table(tmp_path) == speed.NOTHING


def test_the_rows(tmp_path):
    put(tmp_path, "a", record())
    lines = speed.speed_table(tmp_path).splitlines()
    assert (
        lines[0] == "**NVIDIA H100**, 2026-01-02, torch 2.11.0, triton 3.6.0 (`a-acceptance.json`)"
    )
    assert lines[4:] == [
        "| memory, copied | 3,000 GB/s |  |  |",
        "| experts of a layer, M=1, nf4 | 95.4 us | 50 % | fast: 120.0 us, 4.25 bits |",
        "| nf4, decode, batch 1 | 250 tok/s | 55 % |  |",
        "| nf4, decode, batch 1, sampled | 245 tok/s | 54 % |  |",
        "| nf4, decode, batch 1, after 4k | 240 tok/s | 50 % |  |",
        "| nf4, prefill of 4k | 12,345 tok/s |  |  |",
        "| nf4, peak memory, 4k of context | 25.0 GiB |  |  |",
        "| int4, decode, batch 1, 20 of 32 layers | 300 tok/s | 60 % |  |",
    ]


def test_the_newest_record_of_a_gpu_counts(tmp_path):
    put(tmp_path, "2026-01-02", record(us=95.4))
    put(tmp_path, "2026-01-09", record(us=80.0))
    put(tmp_path, "2026-01-03", record(gpu="A100"))
    text = speed.speed_table(tmp_path)
    assert text.count("**") == 4
    assert "80.0 us" in text
    assert text.index("A100") < text.index("H100")


def test_what_is_no_record_is_refused(tmp_path):
    put(tmp_path, "odd", {"gpu": 1})
    with pytest.raises(CheckpointError, match="not a record"):
        speed.speed_table(tmp_path)


def test_the_table_goes_between_its_marks():
    text = "a\n<!-- speed -->\nold\n<!-- /speed -->\nb\n"
    assert speed.with_table(text, "new\n") == "a\n<!-- speed -->\nnew\n<!-- /speed -->\nb\n"
    with pytest.raises(CheckpointError, match="no place"):
        speed.with_table("a\n", "new\n")


def test_the_page_shows_the_records():
    """The table is never written by hand."""
    text = speed.PAGE.read_text()
    assert speed.with_table(text, speed.speed_table()) == text
