"""What llama.cpp is given to quantize, and what is said where it is not installed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qmix.errors import ResourceError
from qmix.evals.quality.importance import importance
from qmix.evals.quality.llama_quantizers import quantized
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.calibrated.windows import Calibration
from tests.support.models import write_dense

# A llama_cpp whose quantizer writes down what it was asked.
STAND_IN = """
import ctypes, json
class llama_model_imatrix_data(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)),
                ("size", ctypes.c_size_t)]
class Params:
    imatrix = None
llama_log_callback = lambda function: function
LLAMA_FTYPE_MOSTLY_Q3_K_M, LLAMA_FTYPE_MOSTLY_IQ3_S = 12, 26
llama_model_quantize_default_params = Params
def llama_model_quantize(source, target, params):
    asked = {"source": source.decode(), "ftype": params.ftype, "head": params.output_tensor_type}
    found = {}
    for entry in params.imatrix or []:
        if entry.name is None:
            break
        found[entry.name.decode()] = entry.data[: entry.size]
    open(target, "w").write(json.dumps({**asked, "importance": found}))
    return 0
"""
PACKAGE = """
import ctypes
from . import llama_cpp
__version__ = "0.3.36"
ctypes.byref = lambda params: params
llama_log_set = lambda *_: None
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_dense(
        tmp_path_factory.mktemp("llama") / "source",
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_local_experts=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(1))


def test_importance_is_the_mean_square_of_what_each_matrix_multiplies(source, windows):
    model = MixtralForCausalLM.from_pretrained(source, dtype="float32", device="cpu")
    layer, seen = model.model.layers[0], {"o": [], "moe": []}
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen["o"].append(x[0]))
    layer.block_sparse_moe.register_forward_pre_hook(lambda _, x: seen["moe"].append(x[0]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
        tokens = torch.cat(seen["moe"]).flatten(0, 1)
        logits = layer.block_sparse_moe.gate(tokens)
    found = importance(source, windows)
    expected = torch.cat(seen["o"]).square().mean((0, 1))
    torch.testing.assert_close(found["blk.0.attn_output.weight"], expected)
    gate, down = (found[f"blk.0.ffn_{part}_exps.weight"].view(4, -1) for part in ("gate", "down"))
    assert (gate.shape, down.shape) == ((4, 64), (4, 96))
    for index, expert in enumerate(layer.block_sparse_moe.experts):
        chosen = tokens[(logits.topk(2).indices == index).any(-1)]
        torch.testing.assert_close(gate[index], chosen.square().mean(0))
        w1, w3 = (weight.stored.dequantize(torch.float32) for weight in (expert.w1, expert.w3))
        inner = torch.nn.functional.silu(chosen @ w1.T) * (chosen @ w3.T)
        torch.testing.assert_close(down[index], inner.square().mean(0), rtol=1e-4, atol=1e-9)


def test_llama_cpp_gets_the_model_and_the_importance(source, windows, tmp_path, monkeypatch):
    package = tmp_path / "path" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "llama_cpp.py").write_text(STAND_IN)
    # The script takes the types of files from the package, as llama-cpp-python gives them.
    (package / "__init__.py").write_text(PACKAGE + "from .llama_cpp import *\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    scratch, said = tmp_path / "scratch", []
    scratch.mkdir()
    calibration = Calibration(windows, "0" * 64)
    kinds = ("Q3_K_M", "IQ3_S+imatrix")
    files = quantized(Path(sys.executable), source, scratch, calibration, kinds, say=said.append)
    assert [file.name for file in files] == ["Q3_K_M.gguf", "IQ3_S+imatrix.gguf"]
    assert said == ["llama.cpp: 0.3.36", "llama.cpp: Q3_K_M", "llama.cpp: IQ3_S+imatrix"]
    plain, weighted = (json.loads(file.read_text()) for file in files)
    assert (plain["ftype"], weighted["ftype"], plain["importance"]) == (12, 26, {})
    assert Path(plain["source"]).read_bytes()[:4] == b"GGUF"
    assert plain["head"] == 1, "in 16 bits, as ours"
    exact = importance(source, windows)
    assert weighted["importance"].keys() == exact.keys()
    for name, values in weighted["importance"].items():
        assert values == exact[name].tolist()


@pytest.mark.parametrize("python", ["no-such-python", sys.executable])
def test_where_llama_cpp_is_not_there_one_error_says_so(
    source, windows, tmp_path, monkeypatch, python
):
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text('raise ImportError("no llama.cpp here")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ResourceError, match="quantizes nothing here") as caught:
        quantized(Path(python), source, scratch, Calibration(windows, ""), ("Q4_0",))
    assert "pip install llama-cpp-python" in str(caught.value.remedy)
    assert ("No such file" if python == "no-such-python" else "no llama.cpp") in str(caught.value)
