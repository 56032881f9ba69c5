"""qmix.evals.cpu on a small layer: every row is there, and says what it is."""

import dataclasses
import json
import math

import pytest
import torch

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.evals import cpu
from qmix.evals.timing import cpu_layer
from qmix.evals.timing.cpu_layer import PlainRead, median_between, time_layer
from qmix.evals.timing.llama import LlamaPeer, start_llama
from qmix.evals.timing.random_layer import FORMATS, random_layer, random_weight
from tests.support.models import GOLDEN

SMALL = MixtralConfig(
    hidden_size=256, intermediate_size=384, num_attention_heads=8, num_key_value_heads=2
)


@pytest.mark.parametrize("form", FORMATS)
def test_random_weights_are_of_their_format_and_of_normal_size(form):
    weight = random_weight(form, (128, 256), 0)
    assert weight.shape == (128, 256)
    kinds = {"q4_k": "int4", "iq4_xs": "iq4"}
    assert weight.scheme.kind == kinds.get(form, form.split()[0])
    values = weight.dequantize(torch.float32)
    assert torch.isfinite(values).all()
    assert 0.1 < float(values.square().mean().sqrt()) * math.sqrt(256) < 10


@pytest.mark.usefixtures("compiled")
def test_a_run_measures_ours_and_names_who_is_absent(monkeypatch):
    monkeypatch.setattr(cpu_layer, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(cpu_layer, "_EXPERT_TURNS", {1: 2, 8: 1})
    monkeypatch.setattr(cpu_layer, "_LAYER_TURNS", {1: 3, 8: 1})
    report = cpu.measure_cpu(SMALL, llama_python=None, tokens=(1, 8))
    assert report.bandwidth > 0
    for part, forms in (("experts", FORMATS), ("layer", cpu.LAYER_FORMATS)):
        for form in forms:
            found = [m for m in report.measurements if m.part == part and m.way == f"qmix {form}"]
            assert [m.tokens for m in found] == [1, 8]
            if part == "layer":  # differences: of so small layers, of any sign
                assert all(m.note == "half of three layers less one" for m in found)
                continue
            assert all(0 < m.best <= m.median for m in found)
            assert found[0].of_bound > 0
    absent = [m for m in report.measurements if m.best is None]
    assert [m.note for m in absent if m.way == "llama.cpp"] == ["not installed: no --llama"]
    assert json.loads(json.dumps(dataclasses.asdict(report)))["threads"] == torch.get_num_threads()
    _, _, header, rule, *rows = str(report).splitlines()
    assert rule == "| --- | --- | --- | --- | --- | --- | --- |"
    assert {line.count(" | ") for line in (header, *rows)} == {6}
    assert len(rows) == len(report.measurements)


def test_a_record_that_cannot_be_written_is_one_line_after_the_table(tmp_path, monkeypatch, capsys):
    report = cpu.CpuReport(
        command="", date="", cpu="x", threads=1, isa=None, features=(), dtype="bfloat16", shape={}, versions={},
        bandwidth=1e9, bandwidth_range=(1e9, 1e9),
        measurements=(cpu_layer.CpuTiming.absent("layer", "llama.cpp", "not installed"),),
    )  # fmt: skip
    monkeypatch.setattr(cpu, "measure_cpu", lambda *_, **__: report)
    out = tmp_path / "missing" / "record.json"
    assert cpu.main(["--json", str(out)]) == 4
    captured = capsys.readouterr()
    assert captured.out == str(report)
    (line,) = captured.err.splitlines()
    assert f"{out}: cannot be written" in line
    assert cpu.main(["--json", str(tmp_path / "record.json")]) == 0
    assert json.loads((tmp_path / "record.json").read_text())["cpu"] == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_an_interpreter_that_is_none_is_named(tmp_path):
    with (
        pytest.raises(UsageError, match="--llama"),
        start_llama(str(tmp_path / "none"), "Q4_0", SMALL),
    ):
        pass


def test_the_median_of_quotients_and_how_sure_it_is():
    assert median_between([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        middle, low, high = median_between(torch.randn(119, generator=generator).tolist())
        assert low <= middle <= high
        held += low <= 0 <= high
    assert 184 <= held <= 198  # 19 of 20, give or take


def test_the_layers_of_a_file_are_those_that_llama_cpp_loaded(tmp_path):
    (tmp_path / "Q4_K_M-3.gguf").symlink_to(GOLDEN / "gguf-Q4_K_M.gguf")
    layers = cpu._layers(SMALL, cpu.SAME_FILE, LlamaPeer("Q4_K_M", None, tmp_path))
    schemes = {str(layer.self_attn.q_proj.stored.scheme) for layer in layers}
    assert all("int" in scheme for scheme in schemes), schemes
    assert layers[0].input_layernorm.weight.dtype == torch.bfloat16
    assert [cpu._stands_beside(kind, cpu.SAME_FILE) for kind in ("Q4_K", "Q4_K_M")] == [False, True]


class Fixed:
    """A peer that takes the same times whatever comes."""

    kind, versions, failure = "Q4_0", {}, ""

    def seconds(self, count):
        return 1.0, 3.0 + count


@pytest.mark.usefixtures("compiled")
def test_a_peer_is_compared_turn_by_turn(monkeypatch):
    monkeypatch.setattr(cpu_layer, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(cpu_layer, "_LAYER_TURNS", {1: 3})
    monkeypatch.setattr(
        cpu_layer, "seconds", lambda work, device: work() or 1.0 + len(work.args[0])
    )
    layers = [random_layer(SMALL, "nf4") for _ in range(3)]
    reads = PlainRead.__new__(PlainRead)
    monkeypatch.setattr(reads, "rate", lambda: 1e9, raising=False)
    ours, theirs = time_layer(layers, SMALL, "nf4", 1, Fixed(), reads)
    assert (ours.best, ours.median) == (1.0, 1.0)  # half of 4 less 2
    assert theirs.best == 1.5  # half of 4 less 1
    assert ours.of_peer == pytest.approx((1 / 1.5,) * 3)
    assert theirs.of_peer is None
