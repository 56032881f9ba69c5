"""The packed GPU kernels on a machine without a GPU: interpreted, traced, compiled."""

import pytest
import torch

from qmix.kernels import Routes
from tests.support.interpreter import run_apart
from tests.support.soak import both, one_in

pytest.importorskip("triton")

from qmix.evals import aot
from qmix.kernels.gpu import moe as gpu
from qmix.kernels.gpu import moe_triton
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.table import ExpertTable
from qmix.weights.packed.tile_format import TileFormat
from tests.support.interpreter import Recorder
from tests.support.process import succeeds

NF4, INT4 = aot.FORMATS[:2]


@pytest.mark.slow
@both
def test_every_kernel_in_the_interpreter(soak):
    assert "skipped" not in run_apart("experts", interpreted=True, soak=soak)


@pytest.mark.gpu
def test_every_kernel_on_the_gpu():
    assert "skipped" not in run_apart("experts", interpreted=False)


def test_importing_the_kernels_imports_no_triton():
    code = (
        "import sys, qmix.kernels, qmix.weights.packed.layout, qmix.weights.packed.table; "
        "sys.exit('triton' in sys.modules)"
    )
    succeeds(code)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 1024])
def test_nothing_waits_for_the_device(tokens, monkeypatch):
    """Meta tensors raise whenever the host needs a value; all shapes are known beforehand."""
    recorders = {name: Recorder() for name in ("gate_up", "down", "combine", "packed_matmul")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(moe_triton, name, recorder)
    table = ExpertTable(
        torch.empty(2, 8, dtype=torch.int64, device="meta"), NF4, NF4, (28672, 4096), []
    )
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(tokens, 2, dtype=torch.int64, device="meta")
    routes = Routes(ids, torch.empty(tokens, 2, device="meta"))
    out = gpu.experts(x, routes, table, 1)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    blob = torch.empty(NF4.matrix_bytes((6144, 4096)), dtype=torch.uint8, device="meta")
    packed = PackedMatrix(blob, NF4, (6144, 4096), 64, torch.bfloat16)
    assert gpu.linear(x, packed).shape == (tokens, 6144)
    (gate_up,), (down,), (packed_matmul,) = (
        recorders[name].grids for name in ("gate_up", "down", "packed_matmul")
    )
    turns = min(8, 2 * tokens)  # no more thread blocks than experts that can have been chosen
    if tokens <= DECODE_TOKENS:
        assert gate_up == (14336 // 64, turns)
        assert down[:2] == (4096 // 128, turns)
    assert packed_matmul[0] == 6144 // 128
    assert len(recorders["combine"].grids) == 2
    with pytest.raises(RuntimeError):
        ids.tolist()  # the trap is armed


def test_k_is_split_where_thread_blocks_are_fewer_than_multiprocessors():
    """One token's down projection is 64 thread blocks, half of an H100's 132 multiprocessors."""
    assert gpu.splits_for(64, 224, 3 * 132) == 8
    assert gpu.splits_for(64, 224, 3 * 108) == 8
    assert gpu.splits_for(256, 224, 3 * 132) == 2
    assert gpu.splits_for(448, 64, 3 * 132) == 1
    assert gpu.splits_for(1, 4, 3 * 132) == 1  # four tiles are not worth a second thread block
    assert gpu.splits_for(1, 1000, 3 * 132) == 16


# What was reached, in machine instructions a weight of the loop, by columns. The goals were 4.5,
# 2.5. Triton 3.7 needs 3.53, 4.11, 1.98, 2.31 at most, 3.6 up to 0.25 more.
REACHED = {
    (NF4, 8): 3.75,
    (NF4, 16): 4.15,
    (INT4, 8): 2.05,
    (INT4, 16): 2.35,
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", one_in(9, sorted(aot.SHARED_LIMIT, key=lambda arch: arch != 90)))
def test_decode_kernels_ahead_of_time(arch, tmp_path, monkeypatch):
    """No spill, no narrow load, no exchange in the loop, no more instructions than once reached."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [
        variant
        for variant in aot.weight_kernels([arch], [NF4, INT4])
        if variant.kernel in ("gate_up", "down", "packed_matmul")
        and variant.config.columns <= DECODE_TOKENS
        and not variant.is_sorted
    ]
    assert len(chosen) == 2 * 2 * 3
    for variant, cost in aot.compile_all(chosen, workers=2):
        assert not aot.faults(variant, cost), f"{variant}: {cost}"
        assert cost.registers <= 144, f"{variant}: {cost}"  # three thread blocks a multiprocessor
        assert cost.loop > 0
        assert cost.per_weight <= REACHED[variant.tile_format, variant.config.columns], (
            f"{variant}: {cost}"
        )


def test_every_selectable_variant_is_listed():
    """config_for and columns_for choose nothing that the command above does not compile."""
    listed = {(v.tile_format, v.config, v.is_sorted) for v in aot.weight_kernels([90])}
    for plan in aot.FORMATS:
        for tokens in range(1, 1100):
            config = gpu.config_for(gpu.columns_for(tokens, plan), plan)
            assert (plan, config, True) in listed
            assert tokens > DECODE_TOKENS or (plan, config, False) in listed
    mixed = gpu.columns_for(64, NF4, TileFormat("int4", 64, symmetric=False))
    assert mixed == 32
