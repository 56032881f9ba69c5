"""The acceptance command's steps at tiny widths, in Triton's interpreter: every line of them runs.

Run by tests/generation/test_static_decoder.py in a process of its own with TRITON_INTERPRET=1. The
whole command, as a rehearsal in one process, is in the soak (tests/evals/test_gpu.py).
"""

import pytest
import torch

from qmix.evals.steps import (
    attention,
    bounds,
    full_model,
    group_rounding,
    half_resident,
    moe_block,
    peers,
    self_checks,
    serving_slots,
    step_search,
    tiny_perplexity,
    token_profile,
)
from qmix.kernels.gpu.step_tuning import UNTUNED
from qmix.kernels.trial import Comparison
from qmix.tuning import axes
from tests.support.interpreter import CONVERSIONS, INTERPRETED
from tests.support.oracles import eager_bitsandbytes
from tests.support.steps import rehearsal

if not INTERPRETED:
    pytest.skip("not the interpreter", allow_module_level=True)

pytestmark = CONVERSIONS


@pytest.fixture
def setting():
    with torch.no_grad():
        yield rehearsal()


def test_a_miss_of_the_self_check_is_a_failure(setting, monkeypatch):
    miss = Comparison("matmul", torch.ones(3), torch.zeros(3))
    monkeypatch.setattr(self_checks, "first_miss", lambda *_: miss)
    assert all("matmul: an error of" in row["failed"] for row in self_checks.results(setting))


@pytest.mark.soak
def test_the_kernels_pass_the_self_check(setting):
    assert list(self_checks.results(setting)) == [{"kernels": "without weights"}]


def test_the_bandwidth(setting):
    found = list(bounds.results(setting))
    assert [row["what"] for row in found] == ["copy", "read (torch.sum)", "matmul 512 float32"]


def test_the_model(setting):
    build, first = full_model.results(setting, "nf4", "tg", 64, batch=8, depth=4096)
    assert 4 < build["bits_per_weight"] < 16
    assert (first["test"], first["batch"]) == ("tg4 @ d4", 4)
    assert 2 <= first["distinct_experts"] <= 8
    assert first["of_bound"] > 0
    (second,) = full_model.results(setting, "nf4", "tg", 64, temperature=0.7)
    assert second["test"] == "tg4 T0.7"
    (third,) = full_model.results(setting, "nf4", "pp", 512)
    assert third["test"] == "pp4"
    setting.release()
    assert len(list(full_model.results(setting, "nf4", "pp", 512))) == 2


def test_slots(setting, monkeypatch):
    """Rows whose ids went to others are told."""
    found = list(serving_slots.results(setting, "nf4"))
    assert [row["requests"] for row in found] == [1, 4]
    assert all(row["largest_error"] < 0.01 and "failed" not in row for row in found)
    model = setting.model("nf4")
    right = model.next_logits_with_experts
    monkeypatch.setattr(
        model, "next_logits_with_experts", lambda ids, *rest: right(ids.flip(0), *rest)
    )
    *_, wrong = serving_slots.results(setting, "nf4")
    assert "differ by" in wrong["failed"]


@pytest.mark.soak
def test_the_block(setting):
    found = list(moe_block.results(setting))
    assert [(row["kernel"], row["tokens"]) for row in found] == [
        (f"qmix {name}", tokens) for tokens in (1, 2, 4) for name in ("nf4", "int4")
    ]
    assert found[1]["bits_per_weight"] < found[0]["bits_per_weight"] < 4.5


@pytest.mark.soak
def test_the_rounding_of_a_group(setting, monkeypatch):
    monkeypatch.setattr(group_rounding, "first_miss", lambda *_: None)
    check, *rows = group_rounding.results(setting)
    assert check == {"matrix": "self-check"}
    assert [row["matrix"] for row in rows] == ["w1", "w2"]
    assert all(row["microseconds"] > 0 and row["predicted"] > 0 for row in rows)
    miss = Comparison("codes", torch.ones(3), torch.zeros(3))
    monkeypatch.setattr(group_rounding, "first_miss", lambda *_: miss)
    assert "codes: an error of" in next(group_rounding.results(setting))["failed"]


@pytest.mark.soak
def test_attention(setting):
    found = list(attention.results(setting))
    assert found
    assert not any("failed" in row for row in found)


@pytest.mark.soak
def test_offload(setting):
    resident, half, both = half_resident.results(setting)
    assert resident["tokens_per_second"] > 0
    assert half["device_slots"] == 2
    assert half["hits"] + half["misses"] == half["tokens"] * 2
    assert both == {"experts": "logits of both", "equal_bits": True}


@pytest.mark.soak
def test_the_search(setting):
    """Other numbers of warps compute the same; the choice serves the steps after it."""
    best, *tried = step_search.results(setting, "nf4", 1)
    assert {row["tuning"] for row in tried} == {"the defaults", "gate_up.warps 1"}
    assert not any("rejected" in row for row in tried)
    assert best["best"] in {row["tuning"] for row in tried}
    model = setting.packed_model("nf4", 1)
    chosen = setting.tunings("nf4").of(model.model, model.lm_head, 1)
    assert axes.changes(chosen) == best["best"]
    assert setting.tunings("int4").of(model.model, model.lm_head, 1) == UNTUNED


def test_a_search_in_which_nothing_can_be_timed_is_a_failure(setting, monkeypatch):
    def measure(trials, tuning):
        raise RuntimeError("no memory")

    monkeypatch.setattr(step_search.StepTrials, "measure", measure)
    best, *_ = step_search.results(setting, "nf4", 1)
    assert best["failed"] == "nothing could be timed: RuntimeError: no memory"
    assert setting.tunings("nf4").by_rows == {}


def test_the_tiny_model(setting):
    host, *paths = tiny_perplexity.results(setting)
    assert 1 < host["perplexity"] < 100
    assert [row["path"] for row in paths] == ["cpu, prompt", "cpu, steps"]
    assert not any("failed" in row for row in paths)


def test_a_wrong_path_is_told(setting, monkeypatch):
    monkeypatch.setattr(
        tiny_perplexity, "_steps", lambda model, ids: torch.zeros(ids.shape[1], 2048)
    )
    *_, steps = tiny_perplexity.results(setting)
    assert "where the CPU has" in steps["failed"]


def test_the_profile(setting, monkeypatch):
    """Two launches of 20 us, 5 us apart."""

    class Event:
        def __init__(self, name, start):
            self.name, self.device_time = name, 20.0
            self.device_type = type("DeviceType", (), {"name": "CUDA"})
            self.time_range = type("Range", (), {"start": start, "end": start + 20.0})

    class Profile:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return [Event("merge", 125.0), Event("gate_up", 100.0)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(token_profile, "DEPTHS", (8,))
    monkeypatch.setattr(token_profile, "timed_as_is", lambda call, clock, repeats: call() or 100.0)
    found = list(token_profile.results(setting, "nf4"))
    assert [row["kernel"] for row in found] == [
        "whole step, launched one by one", "whole step, graph", "gaps", "gate_up", "merge",
    ]  # fmt: skip
    rows = {row["kernel"]: row for row in found}
    assert rows["gaps"]["microseconds"] == 5.0
    assert rows["gate_up"]["bound_microseconds"] > 0
    assert rows["merge"]["bound_microseconds"] is None


@pytest.mark.parametrize("peer", ["bitsandbytes", "grouped_nf4_gemm"])
def test_peers(peer, setting):
    """They are asked in their own words, where they are installed."""
    if peer == "bitsandbytes":
        eager_bitsandbytes()
    else:
        pytest.importorskip("nf4_grouped")
    found = list(peers.results(setting, peer))
    assert [row["tokens"] for row in found] == [1, 2, 4]
