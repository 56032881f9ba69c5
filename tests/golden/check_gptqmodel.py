"""Whether gptqmodel reads a GPTQ checkpoint that qmix wrote: the same weights, the same logits.

    .oracles/gptqmodel/bin/python tests/golden/check_gptqmodel.py DIR

gptqmodel 7.7 knows Mixtral's tensors by its own names only, so a copy with these names is loaded
(GPTQModel.load, its Torch kernel, its conversion of v1 zeros to v2). Exits 1 at a difference. The
model is held in memory as a whole: meant for small ones.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer, the default of two cores, and it stops
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel  # noqa: E402
from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch import dequantize_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qmix.formats import open_checkpoint  # noqa: E402
from qmix.models.causal_lm import MixtralForCausalLM  # noqa: E402
from tests.support import exact  # noqa: E402

THEIRS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
RELATIVE = 2e-3  # of the logits' deviation; gptqmodel rounds every weight to float16


def renamed(name):
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(experts\.\d+)\.(w[123])\.", lambda m: f"{m[1]}.{THEIRS[m[2]]}.", name)


def copy(directory, out):
    """The checkpoint under gptqmodel's names in one file, its settings where gptqmodel looks."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= {renamed(name): value for name, value in load_file(file).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in directory.iterdir():
        if file.suffix in (".json", ".model") and ".index." not in file.name:
            shutil.copy(file, out)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    (out / "quantize_config.json").write_text(json.dumps(settings))


def main(directory):
    checkpoint = open_checkpoint(directory)
    with tempfile.TemporaryDirectory() as scratch:
        copy(directory, Path(scratch))
        os.chdir(scratch)  # it writes logs/
        theirs = GPTQModel.load(
            scratch, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
        ).model
        os.chdir(HERE)
    modules = {
        name: module
        for name, module in theirs.named_modules()
        if isinstance(module, BaseQuantLinear)
    }
    packed = [tensor for tensor in checkpoint.tensors if checkpoint.packed(tensor)]
    wrong = []
    for tensor in packed:
        module = modules.pop(renamed(tensor.name).removesuffix(".weight"))
        values = module.dequantize_weight().T
        ours = checkpoint.weight(tensor).dequantize(torch.float16)
        if values.dtype != ours.dtype or not torch.equal(values, ours):
            wrong.append(tensor.name)
    print(f"{len(packed)} weights, {len(wrong)} read differently: {wrong[:3]}")
    print(f"{len(modules)} weights that qmix does not call packed: {list(modules)[:3]}")
    ids = exact.ids(64, checkpoint.config.vocab_size, 3)[None]
    with torch.no_grad():
        expected = dequantize_model(theirs).float()(input_ids=ids, use_cache=False).logits
        model = MixtralForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
        found = model(input_ids=ids).logits
    gap = float((found - expected).abs().max() / expected.std())
    print(f"logits: largest difference {gap:.2e} of their deviation {float(expected.std()):.3f}")
    return int(bool(wrong or modules or not gap < RELATIVE))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
