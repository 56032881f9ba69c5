"""The self-check in Triton's interpreter, or on a GPU: right kernels pass, a wrong one is named.

Run by test_probe.py in a process of its own with TRITON_INTERPRET=1.
"""

import pytest
import torch

from qmix.kernels.gpu import attention, fused, moe, pointwise, self_check, self_check_fused
from qmix.kernels.trial import Draw, first_beyond
from qmix.weights.scheme import Scheme
from tests.support.interpreter import CONVERSIONS, DEVICE, skip_without_a_device
from tests.support.soak import one_in

skip_without_a_device()
pytestmark = CONVERSIONS

INT4 = Scheme(kind="int4")


def missed(scheme, dtype=torch.float16):
    return self_check.first_miss(DEVICE, dtype, scheme)


def test_the_kernels_that_read_no_weights_are_right():
    assert missed(None, torch.float32) is None


@pytest.mark.soak
@pytest.mark.parametrize(
    "scheme", [Scheme(kind="nf4"), Scheme(kind="int4", symmetric=False)], ids=str
)
def test_the_kernels_that_read_weights_are_right(scheme):
    assert missed(scheme) is None


@pytest.mark.parametrize(
    ("room", "launcher", "scheme", "what"),
    [
        (moe, "linear", INT4, "matmul of 1 tokens and int4 g128"),
        (moe, "dequantize", INT4, "dequantize of int4 g128"),
        (pointwise, "rms_norm", None, "norm"),
        (pointwise, "apply_rotary", None, "rotation"),
        (attention, "attend_cached", None, "attention of 1 queries"),
    ],
)
def test_a_kernel_that_returns_zeros_is_named(monkeypatch, room, launcher, scheme, what):
    launch = getattr(room, launcher)
    monkeypatch.setattr(room, launcher, lambda *args, **more: launch(*args, **more).zero_())
    miss = missed(scheme)
    assert miss.what == what
    assert miss.error == 1


WHAT = {
    "project_route": "residual behind a matmul of int4 g128",
    "add_experts": "residual behind experts of int4 g128",
}


@pytest.mark.parametrize("launcher", one_in(2, sorted(WHAT)))
def test_a_fused_kernel_that_adds_nothing_is_named(monkeypatch, launcher):
    launch = getattr(fused, launcher)

    def idle(*arguments):
        out = launch(*arguments)
        normed = out[0] if isinstance(out, tuple) else out
        normed.total.copy_(arguments[2 if launcher == "project_route" else 0].total)
        return out

    monkeypatch.setattr(fused, launcher, idle)
    tried = self_check_fused.comparisons(Draw(DEVICE), torch.float16, INT4)
    assert first_beyond(tried).what == WHAT[launcher]


def test_one_wrong_weight_of_a_row_is_a_miss(monkeypatch):
    """A nibble that is read as its neighbour, once in 256 inputs."""
    dequantize = moe.dequantize

    def swapped(matrix, dtype):
        out = dequantize(matrix, dtype)
        out[5, 7] = -out[5, 7] + out.abs().max() / 20
        return out

    monkeypatch.setattr(moe, "dequantize", swapped)
    assert missed(INT4).what.startswith("dequantize")
