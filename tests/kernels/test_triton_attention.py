"""Triton attention and pointwise kernels without a GPU: interpreted, traced, compiled."""

from collections import Counter
from importlib.metadata import version
from itertools import product

import pytest
import torch

from qmix import kernels
from qmix.errors import UnsupportedError
from qmix.kernels import Routes
from tests.support.interpreter import run_apart
from tests.support.soak import both, one_in

pytest.importorskip("triton")

from qmix.evals import aot, aot_record
from qmix.evals.timing.machine_code import SHARED_LIMIT, TRITON_VERSION
from qmix.evals.timing.plain_kernels import plain_kernels
from qmix.kernels.gpu import attention, attention_triton, pointwise, pointwise_triton


@pytest.mark.slow
@both
def test_every_kernel_in_the_interpreter(soak):
    assert "skipped" not in run_apart("attention", interpreted=True, soak=soak)


@pytest.mark.gpu
def test_every_kernel_on_the_gpu():
    assert "skipped" not in run_apart("attention", interpreted=False)


class Recorder:
    """Stands for the kernels: keeps names and grids in order, computes nothing."""

    def __init__(self, monkeypatch):
        self.launches = []
        for module in (attention_triton, pointwise_triton):
            for name, kernel in vars(module).items():
                if hasattr(kernel, "arg_names") and not name.startswith("_"):
                    monkeypatch.setattr(module, name, self.kernel(name))

    def kernel(self, name):
        launches = self.launches

        class Kernel:
            def __getitem__(self, grid):
                launches.append((name, grid))
                return lambda *_, **__: None

        return Kernel()


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_a_decode_step_waits_for_nothing(batch, monkeypatch):
    """Meta tensors raise whenever the host needs a value; six of nine launches a layer are here."""
    recorder = Recorder(monkeypatch)
    past = meta(batch, dtype=torch.int32)
    keys, values = meta(2, batch, 8, 4096, 128)
    cos, sin = kernels.rotary(meta(1, 32768, dtype=torch.int64), 128, 1e6, torch.bfloat16)
    x, weight, gate = meta(batch, 4096), meta(4096), meta(8, 4096)
    half = torch.float16

    x, normed = pointwise.residual_norm(
        x, meta(8, 2 * batch, 4096, dtype=torch.float32), weight, 1e-5, dtype=half
    )
    assert (normed.shape, normed.dtype) == ((batch, 4096), half)
    q = pointwise.rotate_store(
        meta(4, batch, 48 * 128, dtype=torch.float32), keys, values, cos, sin, past,
        heads=32, starts=past, dtype=torch.bfloat16,
    )  # fmt: skip
    out = attention.attend_cached(q, keys, values, past, starts=past, window=4096, dtype=half)
    assert (out.shape, out.dtype) == ((batch, 1, 32, 128), half)
    router = pointwise.residual_norm_route(
        x, meta(16, batch, 4096, dtype=torch.float32), weight, 1e-5, gate, 2, dtype=half
    )
    assert isinstance(router.routes, Routes)
    assert (router.routes.ids.shape, router.logits.shape) == ((batch, 2), (batch, 8))

    names = ["residual_norm", "rotate_store", "split", "merge", "residual_norm"]
    assert [name for name, _ in recorder.launches] == names
    matmuls = ["q, k, v", "o_proj", "gate_up", "down"]
    assert len(names) + len(matmuls) == 9
    with pytest.raises(RuntimeError):
        past.tolist()  # the trap is armed


@pytest.mark.parametrize("queries", [2, 16, 17, 4096])
def test_prefill_waits_for_nothing(queries, monkeypatch):
    recorder = Recorder(monkeypatch)
    q, k = meta(1, 32, queries, 128), meta(1, 8, queries, 128)
    padding_mask = meta(1, queries, dtype=torch.bool)
    assert attention.attend(q, k, k, window=None, padding_mask=padding_mask).shape == q.shape
    assert pointwise.rms_norm(meta(1, queries, 4096), meta(4096), 1e-5).shape == (1, queries, 4096)
    cos, sin = meta(2, 1, 1, queries, 128)
    assert pointwise.apply_rotary(q, cos, sin).shape == q.shape
    assert pointwise.route(meta(queries, 8), 2).ids.shape == (queries, 2)
    rows = 16 if queries <= 16 else 128
    assert recorder.launches[0] == ("prefill", (-(-queries // rows), 32, 1))


def test_columns_are_split_where_thread_blocks_are_few():
    """One row with eight key-value heads is eight blocks; an H100 has 132 multiprocessors."""
    assert attention.splits_for(8, 4096, 64, 2 * 132) == 33
    assert attention.splits_for(8, 32768, 64, 2 * 132) == 33
    assert attention.splits_for(8, 256, 64, 2 * 132) == 4  # a tile each
    assert attention.splits_for(1, 32768, 64, 2 * 132) == 64
    assert attention.splits_for(128, 4096, 64, 2 * 132) == 3
    assert attention.splits_for(1024, 4096, 64, 2 * 132) == 1


# What was reached: registers a thread, and machine instructions of the loop; of `split` on sm_90,
# and elsewhere. 128 registers are still four thread blocks of four warps a multiprocessor.
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
REACHED = {"split": (96 if TRITON >= (3, 7) else 112, 530), "prefill": (240, 1060)}
ELSEWHERE = 128, 560


@pytest.mark.slow
@pytest.mark.parametrize("padded", one_in(2, [True, False]))
@pytest.mark.parametrize("arch", one_in(9, sorted(SHARED_LIMIT, key=lambda arch: arch != 90)))
def test_attention_kernels_ahead_of_time(arch, padded, tmp_path, monkeypatch):
    """No spill, no narrow load of keys or values, and nothing worse than when it was recorded.

    Of keys and values in 8 bits, whose rows are read 32 bits at a time, no spill.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [
        v
        for v in plain_kernels([arch])
        if v.kernel in REACHED and is_padded(v) == padded and not is_dependent(v)
        if "past" in v.absent or "arrivals" not in v.absent
    ]
    assert Counter(v.codes for v in chosen) == {"": 2 + 2, "codes": 1 + 2, "new codes": 1}
    recorded = aot_record.recorded(TRITON_VERSION)
    for variant in chosen:
        cost = aot.compile_variant(variant)
        elsewhere = variant.kernel == "split" and arch != 90
        registers, loop = ELSEWHERE if elsewhere else REACHED[variant.kernel]
        assert not aot.faults(variant, cost), f"{variant}: {cost}"
        assert not list(aot_record.worse(cost, recorded.get(str(variant)))), f"{variant}: {cost}"
        if variant.codes:
            continue
        assert cost.needed_copies > 0
        assert 0 < cost.loop <= loop, f"{variant}: {cost}"
        assert cost.registers <= registers, f"{variant}: {cost}"


def is_padded(kernel):
    return not {"padding_mask", "starts"} <= set(kernel.absent)


def is_dependent(kernel):
    return bool(dict(kernel.constants).get("DEPENDENT"))


def test_the_record_has_attention_over_codes():
    """For three generations; the others have the same registers."""
    for triton in aot_record.versions():
        names = aot_record.recorded(triton).keys()
        assert {str(v) for v in aot.attention_over_codes(aot.GENERATIONS)} <= names


@pytest.mark.slow
@pytest.mark.parametrize("arch", one_in(2, [90, 80]))
@pytest.mark.parametrize("widest", one_in(2, [True, False]))
def test_pointwise_kernels_ahead_of_time(arch, widest, tmp_path, monkeypatch):
    """No spill: the widest of each, or all norms, and the widest and narrowest of the others."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    splits, parts = ((16,), (64,)) if widest else ((1, 16), (1, 64))
    chosen = [
        variant
        for variant in plain_kernels([arch])
        if variant.kernel not in REACHED
        and (
            (variant.kernel == "residual_norm" and not widest)
            or dict(variant.constants).get("SPLITS", 16) in splits
        )
        and dict(variant.constants).get("PARTS", 64) in parts
        and dict(variant.constants).get("SIZE", 128) == 128
    ]
    assert {v.kernel for v in chosen} == {
        *("combine", "merge", "residual_norm", "rotate", "rotate_store", "route", "start_norm"),
        *("search_grid", "round_group", "refine_group"),
    }
    for variant in chosen:
        cost = aot.compile_variant(variant)
        assert not aot.faults(variant, cost), f"{variant}: {cost}"


def test_every_selectable_shape_is_listed():
    """blocks_for chooses nothing that the command above does not compile."""
    listed = {
        (v.kernel, v.dtype, bool(v.codes), dict(v.constants)["COLUMNS"], v.warps)
        for v in plain_kernels([90], attention.DTYPES)
        if v.kernel in REACHED
    }
    for dtype, codes in product(attention.DTYPES, (False, True)):
        for queries in range(1, 300):
            shape = attention.blocks_for(queries, dtype, codes=codes)
            kernel = "prefill" if queries > 1 else "split"
            assert (kernel, dtype, codes, shape.columns, shape.warps) in listed


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_gradients_are_refused_for_every_input(which):
    inputs = [torch.zeros(1, 2, 3, 16) for _ in range(3)]
    attention.check(*inputs)
    inputs[which].requires_grad_()
    with pytest.raises(UnsupportedError, match="gradients"):
        attention.check(*inputs)
    with torch.no_grad():
        attention.check(*inputs)
