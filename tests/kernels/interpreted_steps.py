"""The acceptance command's steps at tiny widths, in Triton's interpreter: every line of them runs.

Run by tests/generation/test_static_decoder.py in a process of its own with TRITON_INTERPRET=1.
Times and memory are made up.
"""

import pytest
import torch

from qmix import kernels
from qmix.evals.steps import attention, full_model, moe_block, peers, token_profile
from qmix.evals.steps.graph_timing import CallTiming
from qmix.evals.timing import bench, random_model
from qmix.evals.timing.bench import BenchTest
from qmix.kernels.gpu import packed_matmul
from tests.support.interpreter import CONVERSIONS, INTERPRETED
from tests.support.models import small_config
from tests.support.oracles import eager_bitsandbytes
from tests.support.soak import both

if not INTERPRETED:
    pytest.skip("not the interpreter", allow_module_level=True)
CPU = torch.device("cpu")

pytestmark = CONVERSIONS


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    def timed(calls, record=True):
        assert all(torch.isfinite(call()).all() for call in calls)
        return CallTiming(100.0, 90.0, 1.0, "graph", 20)

    for module in (moe_block, attention):
        monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr(token_profile, "timed_as_is", lambda call: call() or 100.0)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 1 << 20)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for module in (full_model, token_profile):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    monkeypatch.setitem(kernels._LINEAR, (kernels.PackedWeight, "cpu"), packed_matmul.linear)


def tiny(**changes):
    config = small_config(
        hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    ).replace(**changes)  # fmt: skip
    # float32: the interpreter multiplies bfloat16 wrongly
    return random_model.build_random_model(config, random_model.NF4, CPU, dtype=torch.float32)


@both
def test_the_model(soak, monkeypatch):
    """The gate has one test of one repetition; the soak has one of each kind, repeated."""
    monkeypatch.setattr(full_model, "build_model", lambda device: tiny())
    monkeypatch.setattr(full_model, "REPETITIONS", 1 + soak)
    tests = (BenchTest(kind="tg", tokens=2, batch=2, depth=8), BenchTest(kind="pp", tokens=3))
    monkeypatch.setattr(full_model, "TESTS", tests[: 1 + soak])
    build, *found = full_model.results(CPU)
    assert 4 < build["bits_per_weight"] < 16
    rows = [("tg2 @ d8", 2), ("pp3", 1)]
    assert [(row["test"], row["batch"]) for row in found] == rows[: 1 + soak]
    assert 2 <= found[0]["distinct_experts"] <= 4
    assert found[0]["of_bound"] > 0


def test_a_test_that_fails_is_a_result(monkeypatch):
    monkeypatch.setattr(full_model, "build_model", lambda device: tiny())
    monkeypatch.setattr(
        full_model, "TESTS", (BenchTest(kind="tg", tokens=2), BenchTest(kind="pp", tokens=2))
    )

    def measure(model, test, *args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "measure_test", measure)
    found = list(full_model.results(CPU))
    assert [row.get("failed") for row in found[1:]] == ["RuntimeError: out of memory"] * 2


def test_the_block(monkeypatch):
    monkeypatch.setattr(moe_block, "HIDDEN", 128)
    monkeypatch.setattr(moe_block, "WIDTH", 128)
    monkeypatch.setattr(moe_block, "WEIGHTS", 3 * 128 * 128)
    monkeypatch.setattr(moe_block, "TOKENS", (1, 20))
    monkeypatch.setattr(moe_block, "LAYERS", 1)
    monkeypatch.setattr(moe_block, "random_inputs", lambda tokens, device: torch.randn(tokens, 128))
    found = list(moe_block.results(CPU))
    assert [(row["kernel"], row["tokens"]) for row in found] == [
        ("qmix nf4", 1), ("qmix int4", 1), ("qmix nf4", 20), ("qmix int4", 20),
    ]  # fmt: skip
    assert found[1]["bits_per_weight"] < found[0]["bits_per_weight"] < 4.5


def test_attention(monkeypatch):
    monkeypatch.setattr(attention, "_random", lambda device, *shape: torch.randn(*shape))
    monkeypatch.setattr(attention, "_CACHED_BYTES", 1)
    monkeypatch.setattr(attention, "DECODE", ((2, 64),))
    monkeypatch.setattr(attention, "PREFILL", ((32, None), (32, 8)))
    monkeypatch.setattr(attention, "_flex", lambda q, k, v, window: lambda: q)
    found = list(attention.results(CPU))
    assert len(found) == 2 + 2 + 2
    assert not any("failed" in row for row in found)


def test_the_profile(monkeypatch):
    class Event:
        def __init__(self, name):
            self.name, self.device_time = name, 20.0
            self.device_type = type("DeviceType", (), {"name": "CUDA"})

    class Profile:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return [Event("gate_up"), Event("merge")] * 2

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(token_profile.full_model, "build_model", lambda device, **_: tiny())
    monkeypatch.setattr(token_profile, "DEPTHS", (8,))
    monkeypatch.setattr(token_profile, "_TOKENS", 2)
    found = list(token_profile.results(CPU))
    assert [row["kernel"] for row in found] == [
        "whole step, graph", "whole step, launched one by one", "gate_up", "merge",
    ]  # fmt: skip
    rows = {row["kernel"]: row for row in found}
    assert rows["gate_up"]["bound_microseconds"] > 0
    assert rows["merge"]["bound_microseconds"] is None


@pytest.fixture
def small_peers(monkeypatch):
    monkeypatch.setattr(peers, "HIDDEN", 128)
    monkeypatch.setattr(peers, "WIDTH", 128)
    monkeypatch.setattr(peers, "_SHAPES", ((256, 128), (128, 128)))
    monkeypatch.setattr(peers, "TOKENS", (1, 4))
    monkeypatch.setattr(peers, "LAYERS", 1)
    monkeypatch.setattr(
        peers, "random_inputs", lambda tokens, device: torch.randn(tokens, 128).bfloat16()
    )


@pytest.mark.parametrize("peer", ["bitsandbytes", "grouped_nf4_gemm"])
def test_peers(peer, small_peers, monkeypatch):
    """They are asked in their own words, where they are installed."""
    if peer == "bitsandbytes":
        eager_bitsandbytes()
    else:
        pytest.importorskip("nf4_grouped")
    tokens = (1, 4)
    if peer == "grouped_nf4_gemm":  # above one token its kernel does not run in the interpreter
        tokens = (1,)
        monkeypatch.setattr(peers, "TOKENS", tokens)
    with torch.no_grad():
        found = list(getattr(peers, peer)(CPU))
    assert [row["tokens"] for row in found] == len(found) // len(tokens) * list(tokens)
    assert found
