"""What of the source is kept while it is rounded."""

import pytest
import torch

from qmix.formats import open_checkpoint
from qmix.quantize.calibrated import layer_tensors
from qmix.quantize.calibrated.layer_tensors import LayerTensors
from qmix.quantize.calibrated.layer_work import EXPECTED, LayerWork
from qmix.quantize.calibrated.options import LayerOptions
from qmix.work_meter import WorkMeter
from tests.support.calibration import RECIPE, write_source

NAMES = [f"model.layers.0.block_sparse_moe.experts.0.{part}.weight" for part in ("w1", "w2")]


@pytest.mark.parametrize(("device", "readings"), [("cpu", 4), ("meta", 2)])
def test_beside_a_gpu_a_tensor_is_read_once_until_it_is_let_go(
    tmp_path, monkeypatch, device, readings
):
    """`meta` stands for a GPU: tensors of the source stay on the CPU."""
    read, found = layer_tensors.read_finite, []

    def counted(checkpoint, tensor):
        found.append(tensor.name)
        return read(checkpoint, tensor)

    monkeypatch.setattr(layer_tensors, "read_finite", counted)
    checkpoint = open_checkpoint(write_source(tmp_path / "source"))
    device = torch.device(device)
    work = LayerWork(checkpoint.config, LayerOptions(), 32, torch.device("cpu"))
    tensors = LayerTensors(
        checkpoint, 0, RECIPE, work, device=device, dtype=torch.float32, meter=WorkMeter(EXPECTED)
    )
    for _ in range(2):
        for name in NAMES:
            assert tensors.exact(name).device == device
    assert len(found) == readings
    tensors.let_go()
    tensors.exact(NAMES[0])
    assert len(found) == readings + 1
