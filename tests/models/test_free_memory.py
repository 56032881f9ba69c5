"""Every command looks at free memory before it allocates: exit 4, one line, nothing written."""

import pytest
import torch

from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.commands.checkpoint.export import export_checkpoint
from qmix.errors import ResourceError
from qmix.evals.quality.layer_streaming import Scorer
from qmix.formats import open_checkpoint
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.planning import machine
from qmix.planning.machine import HostMemory
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.windows import calibration_windows
from qmix.quantize.source import open_source
from qmix.weights.scheme import Recipe, Scheme
from tests.support import raw_mistral
from tests.support.models import TINY, quantized, small_model

MIB = 1 << 20
INT4 = Scheme(kind="int4")


def starve(monkeypatch, available):
    memory = HostMemory(total=64 << 30, available=available, limit="cgroup")
    monkeypatch.setattr(machine, "memory", lambda: memory)


def quantize(tmp_path):
    quantized(TINY, tmp_path / "out")


def gptq(tmp_path):
    text = "free memory is looked at first " * 200
    windows = calibration_windows(text, lambda _: list(range(3, 900)), samples=1, seqlen=64)
    recipe = Recipe.uniform(INT4, attention=True)
    quantize_calibrated(open_source(TINY), tmp_path / "out", recipe, windows, CalibratedOptions())


def evaluate(_):
    ids = torch.zeros(2, 64, dtype=torch.long)
    Scorer(open_checkpoint(TINY), ids, dtype=None, device="cpu")


def load(_):
    MixtralForCausalLM.from_pretrained(TINY, device="cpu")


@pytest.mark.parametrize("command", [quantize, gptq, evaluate, load])
def test_too_little_is_refused_before_anything_is_written(monkeypatch, tmp_path, command):
    starve(monkeypatch, MIB)
    with pytest.raises(
        ResourceError, match=r"not enough free host memory; expected .* found 1.00 MiB free"
    ):
        command(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [quantize, evaluate, load])
def test_the_tiny_model_needs_little(monkeypatch, tmp_path, command):
    starve(monkeypatch, 150 * MIB)
    command(tmp_path)


def test_export_and_convert_look_too(monkeypatch, tmp_path):
    quantized(TINY, tmp_path / "int4", INT4, method="rtn")
    source = raw_mistral.write(tmp_path / "raw", small_model(), layout="safetensors")
    starve(monkeypatch, 1 << 12)
    with pytest.raises(ResourceError, match="free host memory"):
        export_checkpoint(tmp_path / "int4", tmp_path / "ct", "compressed-tensors")
    with pytest.raises(ResourceError, match="free host memory"):
        convert_checkpoint(source, tmp_path / "hub")
    assert not (tmp_path / "ct").exists()
    assert not (tmp_path / "hub").exists()
