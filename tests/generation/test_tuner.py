"""The Tuner: looked up, searched for and kept, with trials, a card and a clock that are made up."""

import io
import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from qmix.config import MixtralConfig
from qmix.errors import ResourceError, UsageError
from qmix.evals.timing import random_model
from qmix.generation import tuner
from qmix.generation.tuner import Tuner
from qmix.kernels.gpu.card import Card
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.planning.machine import Gpu
from qmix.tuning import axes, cache_file
from qmix.tuning.search import DeviceLostError, Outcome


class Device:
    """Trials on a card where two warps of gate_up are fastest; it counts its trials."""

    def __init__(self, odd=None, seconds=0.5):
        self.now, self.seconds, self.odd, self.tried = 0.0, seconds, odd, []

    def clock(self):
        return self.now

    def make(self, model, head, rows):
        self.rows = rows
        return self

    def prepare(self, candidates):
        pass

    def measure(self, tuning):
        self.tried.append(tuning)
        self.now += self.seconds
        if self.odd is not None and len(self.tried) == 4:
            raise self.odd
        return Outcome(80.0 if tuning.gate_up.warps == 2 else 100.0, 0.0)


FAST = StepTuning(gate_up=replace(UNTUNED.gate_up, warps=2))
CARD = Card(name="NVIDIA H100", capability=(9, 0), triton="3.6.0")
GPU = Gpu(name="NVIDIA H100", total=1, free=1, driver="570.86", capability=(9, 0))


@pytest.fixture(scope="module")
def causal_lm():
    return made("nf4")


def made(name, **changes):
    config = MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
    ).replace(**changes)  # fmt: skip
    return random_model.build_random_model(config, random_model.FORMATS[name], torch.device("cpu"))


@pytest.fixture
def on_a_card(causal_lm, monkeypatch):
    """The model as if its weights lay on a GPU."""
    monkeypatch.setenv("QMIX_TUNE", "1")
    monkeypatch.setattr(tuner.probe, "card", lambda device: CARD)
    monkeypatch.setattr(tuner.machine, "gpus", lambda: (GPU,))
    weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    return SimpleNamespace(
        norm=SimpleNamespace(weight=weight),
        experts_store=None,
        config=causal_lm.config,
        layers=causal_lm.model.layers,
        kv="16",
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning.json"


def tuner_of(device, path, stream=None):
    return Tuner(
        path=path, make_trials=device.make, stream=stream or io.StringIO(), clock=device.clock
    )


def test_the_first_step_searches_and_the_next_run_reads(on_a_card, path):
    device, stream = Device(), io.StringIO()
    found = tuner_of(device, path, stream)
    assert found.of(on_a_card, None, 1) == FAST
    assert found.of(on_a_card, None, 1) == FAST
    count = len(device.tried)
    assert device.tried[0] == UNTUNED
    assert stream.getvalue() == (
        "qmix: tuning for this card, once: NVIDIA H100, 1 row (at most 20 s; QMIX_TUNE=0 takes the "
        "defaults)\n"
    )
    assert tuner_of(device, path).of(on_a_card, None, 1) == FAST
    assert len(device.tried) == count
    (entry,) = cache_file.load(path).entries
    assert (entry.microseconds, entry.untuned, entry.complete) == (80.0, 100.0, True)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16)])
def test_rows_share_the_choices_of_the_next_number(batch, rows, on_a_card, path):
    device = Device()
    tuner_of(device, path).of(on_a_card, None, batch)
    assert device.rows == rows
    assert cache_file.load(path).entries[0].key.shapes.endswith(f"{rows} rows")


def test_more_rows_than_a_step_of_columns_are_not_tuned(on_a_card, path):
    device = Device()
    assert tuner_of(device, path).of(on_a_card, None, 17) == UNTUNED
    assert device.tried == []


def test_zero_takes_the_defaults(on_a_card, path, monkeypatch):
    device = Device()
    tuner_of(device, path).of(on_a_card, None, 1)
    monkeypatch.setenv("QMIX_TUNE", "0")
    assert tuner_of(device, path).of(on_a_card, None, 1) == UNTUNED
    monkeypatch.setenv("QMIX_TUNE", "often")
    with pytest.raises(UsageError, match="QMIX_TUNE"):
        tuner_of(device, path).of(on_a_card, None, 1)


def test_a_cpu_is_not_tuned(causal_lm, path, monkeypatch):
    monkeypatch.setenv("QMIX_TUNE", "1")
    assert tuner_of(Device(), path).of(causal_lm.model, causal_lm.lm_head, 1) == UNTUNED


def test_offloaded_experts_are_not_searched_with(on_a_card, path):
    device = Device()
    on_a_card.experts_store = object()
    assert tuner_of(device, path).of(on_a_card, None, 1) == UNTUNED
    assert device.tried == []
    on_a_card.experts_store = None
    tuner_of(device, path).of(on_a_card, None, 1)
    on_a_card.experts_store = object()
    assert tuner_of(device, path).of(on_a_card, None, 1) == FAST


@pytest.mark.parametrize("name", [field.name for field in fields(cache_file.TuningKey)])
def test_another_key_searches_again(name, on_a_card, path):
    device = Device()
    tuner_of(device, path).of(on_a_card, None, 1)
    count = len(device.tried)
    document = json.loads(path.read_text())
    document["tunings"][0]["key"][name] = "other"
    path.write_text(json.dumps(document))
    tuner_of(device, path).of(on_a_card, None, 1)
    assert len(device.tried) == 2 * count
    assert len(cache_file.load(path).entries) == 2


def test_a_damaged_file_is_told_and_the_search_repeated(on_a_card, path):
    path.write_text("{")
    with pytest.warns(UserWarning, match=r"searched for again.*not valid JSON"):
        assert tuner_of(Device(), path).of(on_a_card, None, 1) == FAST
    assert cache_file.load(path).entries


def test_choices_that_no_search_gives_are_not_believed(on_a_card, path):
    tuner_of(Device(), path).of(on_a_card, None, 1)
    document = json.loads(path.read_text())
    document["tunings"][0]["tuning"]["gate_up"]["warps"] = 64
    path.write_text(json.dumps(document))
    device = Device()
    assert tuner_of(device, path).of(on_a_card, None, 1) == FAST
    assert device.tried


def test_a_folder_that_cannot_be_written_is_told_and_the_search_serves(on_a_card, tmp_path):
    (tmp_path / "file").write_text("")
    found = tuner_of(Device(), tmp_path / "file" / "tuning.json")
    with pytest.warns(UserWarning, match="the next run searches again"):
        assert found.of(on_a_card, None, 1) == FAST


def test_twenty_seconds_are_not_passed(on_a_card, path):
    device = Device(seconds=3.0)
    tuner_of(device, path).of(on_a_card, None, 1)
    assert len(device.tried) > 3
    assert device.now <= tuner.SECONDS


def test_ctrl_c_ends_the_search_and_keeps_what_was_found(on_a_card, path):
    device = Device(odd=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tuner_of(device, path).of(on_a_card, None, 1)
    (entry,) = cache_file.load(path).entries
    assert axes.from_json(entry.tuning) == FAST
    assert not entry.complete
    again = Device()
    assert tuner_of(again, path).of(on_a_card, None, 1) == FAST
    assert again.tried == []


def test_a_lost_device_is_one_of_qmix_s_errors(on_a_card, path):
    lost = DeviceLostError()
    lost.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(ResourceError, match=r"illegal memory access.*QMIX_TUNE=0"):
        tuner_of(Device(odd=lost), path).of(on_a_card, None, 1)
    assert not cache_file.load(path).entries[0].complete


def test_defaults_that_fail_are_used_and_told(on_a_card, path):
    class Full(Device):
        def measure(self, tuning):
            raise RuntimeError("CUDA out of memory")

    with pytest.warns(UserWarning, match=r"defaults are used.*could be timed.*out of memory"):
        assert tuner_of(Full(), path).of(on_a_card, None, 1) == UNTUNED
    assert not path.exists()


def test_a_card_without_memory_for_a_search_takes_the_defaults(on_a_card, path):
    def full(model, head, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    found = Tuner(path=path, make_trials=full, stream=io.StringIO())
    with pytest.warns(UserWarning, match=r"defaults are used.*Tried to allocate 2 GiB"):
        assert found.of(on_a_card, None, 1) == UNTUNED


def test_fused_launches_that_miscompute_are_replaced_by_separate_ones(on_a_card, path):
    class Wrong(Device):
        def measure(self, tuning):
            outcome = super().measure(tuning)
            return Outcome(outcome.microseconds, 0.3 if tuning.norm_in_products else 0.0)

    with pytest.warns(UserWarning, match="more launches, as fewer fail: another result"):
        found = tuner_of(Wrong(), path).of(on_a_card, None, 1)
    assert not found.norm_in_products
    assert found.gate_up.warps == 2


def test_a_terminal_sees_one_line_that_goes_away(on_a_card, path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    tuner_of(Device(), path, stream).of(on_a_card, None, 1)
    lines = stream.getvalue().split("\r")
    assert "3 tried, 2 s (at most 20 s" in lines[4]
    assert lines[-1] == "\x1b[K"
    assert "\n" not in stream.getvalue()


def test_shapes_name_what_launches_depend_on(causal_lm):
    first = tuner.shapes_of(causal_lm.model, 1)
    assert first == (
        "128x128, 2 of 8 experts, 4/2 heads of 32, nf4 64 / nf4 64 / nf4 64 / nf4 64, bfloat16, 1 rows"
    )
    others = [
        tuner.shapes_of(made("int4").model, 1),
        tuner.shapes_of(made("nf4", intermediate_size=64).model, 1),
        tuner.shapes_of(made("nf4", num_local_experts=4).model, 1),
        tuner.shapes_of(causal_lm.model, 8),
    ]
    assert len({first, *others}) == 5
