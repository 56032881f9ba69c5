"""Steps of the acceptance command with times made up and kernels left out."""

import sys
import types

import pytest
import torch

pytest.importorskip("triton")

from qmix.evals.steps import gpu_tests, moe_block, peers
from qmix.evals.steps.graph_timing import HOST_CLOCK, CallTiming
from qmix.evals.steps.setting import MIXTRAL, NotHereError, Setting
from qmix.evals.timing.random_model import FORMATS
from tests.support.steps import rehearsal


@pytest.fixture
def setting():
    return rehearsal()


def test_the_block_is_asked_layer_by_layer(setting, monkeypatch):
    asked = []
    monkeypatch.setattr(
        moe_block.gpu, "experts", lambda x, chosen, table, layer: asked.append(table)
    )

    def timed(calls, clock, record=True):
        for call in calls:
            call()
        return CallTiming(100.0, 90.0, 1.0, "graph", 20)

    monkeypatch.setattr(moe_block, "timed", timed)
    found = [row for row in moe_block.results(setting) if row["kernel"] == "qmix nf4"]
    assert [row["tokens"] for row in found] == [1, 2, 4]
    assert len({id(table) for table in asked}) == len(FORMATS) * setting.widths.turns
    first = found[0]
    assert first["distinct_experts"] == 2
    assert first["bits_per_weight"] == pytest.approx(4.25, rel=0.02)
    bytes_read = 2 * 3 * 128 * 128 * first["bits_per_weight"] / 8
    assert first["gigabytes_per_second"] == pytest.approx(bytes_read / 100e-6 / 1e9)


def test_a_peer_that_is_not_there_says_so(setting, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    for peer in ("bitsandbytes", "grouped_nf4_gemm", "marlin"):
        with pytest.raises(NotHereError, match="No module named"):
            list(peers.results(setting, peer))


def test_marlin_is_asked_in_its_own_words(setting, monkeypatch):
    """Its parameters are those of gptqmodel 7.7's apply_gptq_marlin_linear."""

    def linear(
        input, weight, weight_scale, weight_zp, g_idx, g_idx_sort_indices, workspace, wtype,
        output_size_per_partition, input_size_per_partition, is_k_full, bias=None,
    ):  # fmt: skip
        rows, columns = output_size_per_partition, input_size_per_partition
        assert input.shape[1:] == (columns,)
        assert weight.shape == (columns // 16, 2 * rows)
        assert weight_scale.shape == (columns // 128, rows)
        assert (wtype, is_k_full) == ("uint4b8", True)
        return input.new_zeros(len(input), rows)

    marlin = types.ModuleType("gptqmodel.utils.marlin")
    marlin.apply_gptq_marlin_linear = linear
    marlin.marlin_make_workspace_new = lambda device: torch.zeros(1, device=device)
    kinds = types.ModuleType("gptqmodel.utils.marlin_scalar_type")
    kinds.scalar_types = types.SimpleNamespace(uint4b8="uint4b8")
    package = types.ModuleType("gptqmodel")
    package.__version__ = "7.7.0"
    for module in (package, types.ModuleType("gptqmodel.utils"), marlin, kinds):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = list(peers.results(setting, "marlin"))
    assert [row["kernel"] for row in found] == ["gptqmodel 7.7.0 marlin"] * 3


def test_a_gather_is_timed(setting):
    found = list(peers.results(setting, "gather"))
    assert {row["bits_per_weight"] for row in found} == {8.0, 16.0}


def test_pairs_are_sorted_by_expert(setting):
    chosen = moe_block.random_routes(setting, 5)
    token, weights, sizes, experts = peers._sorted_pairs(setting, chosen)
    assert sum(sizes) == 10
    rows = [
        (expert, t.item(), w.item())
        for expert, ts, ws in zip(
            experts.tolist(), token.split(sizes), weights.split(sizes), strict=True
        )
        for t, w in zip(ts, ws, strict=True)
    ]
    meant = [
        (expert, t, chosen.weights[t, k].item())
        for expert in range(8)
        for t in range(5)
        for k in range(2)
        if chosen.ids[t, k] == expert
    ]
    assert rows == meant


def test_the_gpu_tests_are_the_interpreted_ones():
    names = [path.name for path in gpu_tests.kernel_test_files()]
    assert names[0] == "interpreted_decoding.py"
    assert "interpreted_experts.py" in names


def test_test_files_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "interpreted_few.py"
    path.write_text("import pytest\ndef test_one(): pass\ndef test_two(): assert 1 == 2, 'odd'\n")
    monkeypatch.setattr(gpu_tests, "kernel_test_files", lambda: [path])
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    setting = Setting(torch.device("cpu"), MIXTRAL, HOST_CLOCK)
    (found,) = gpu_tests.results(setting)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert "odd" in found["output"]


def test_tests_that_are_not_there_are_named(setting, monkeypatch):
    monkeypatch.setattr(gpu_tests, "kernel_test_files", list)
    with pytest.raises(NotHereError, match="not a checkout"):
        list(gpu_tests.results(setting))


def test_the_model_has_the_layers_that_fit(monkeypatch):
    setting = Setting(torch.device("cuda"), MIXTRAL, HOST_CLOCK)
    for gibibytes, layers in ((24, 26), (8, 8), (1, 1)):
        free = gibibytes << 30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert abs(setting._layers_that_fit("nf4") - layers) <= 2
