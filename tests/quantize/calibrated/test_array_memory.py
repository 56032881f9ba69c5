"""How many experts are rounded together."""

import pytest
import torch

from qmix.config import MixtralConfig
from qmix.quantize.calibrated.array_memory import expert_bytes, experts_at_once
from qmix.quantize.calibrated.options import LayerOptions

TINY = MixtralConfig(hidden_size=256, intermediate_size=256)
FULL = MixtralConfig()
LOSS, LAYER = LayerOptions(objective="loss"), LayerOptions(objective="layer")


def test_small_experts_are_rounded_together_and_large_ones_alone_on_a_cpu():
    host = torch.device("cpu")
    assert experts_at_once(TINY, LOSS, host) == TINY.num_local_experts
    assert experts_at_once(FULL, LOSS, host) == experts_at_once(FULL, LAYER, host) == 1


@pytest.mark.parametrize(("free", "loss", "layer"), [(24, 2, 3), (80, 8, 8), (4, 1, 1)])
def test_a_gpu_takes_as_many_as_fit_with_the_sums_of_gradients(monkeypatch, free, loss, layer):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
    gpu = torch.device("cuda")
    assert experts_at_once(FULL, LOSS, gpu) == loss
    assert experts_at_once(FULL, LAYER, gpu) == layer


def test_the_arrays_of_an_expert_were_measured():
    """D = 512, F = 1792: 124 MB with `loss` and 67 MB with `layer` were alive at most."""
    config = MixtralConfig(hidden_size=512, intermediate_size=1792)
    assert 124e6 < expert_bytes(config, LOSS) < 1.1 * 124e6
    assert 67e6 < expert_bytes(config, LAYER) < 1.25 * 67e6
