"""Write modelopt-VERSION/ beside this file: tiny Mixtrals that it exports, and what it reads there.

    python tests/golden/make_modelopt.py    # in an environment with nvidia-modelopt[hf]

Kept as oracle: nvidia-modelopt 0.47.0 (transformers 5.14.1, torch 2.13 CPU). Needs no qmix. Each
folder holds what `export_hf_checkpoint` writes; expected.safetensors holds the float32 weights that
ModelOpt's own dequantization makes of them.
"""

import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

OUT = Path(__file__).with_name(f"modelopt-{version('nvidia-modelopt')}")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rope_theta": 1e6,
}
KEPT = {"quantizer_name": "*self_attn*", "enable": False}
# name: ModelOpt's config, whether the KV cache has scales, entries that are added to the config
CASES = {
    "nvfp4": (mtq.NVFP4_DEFAULT_CFG, True, []),
    "nvfp4-experts": (mtq.NVFP4_DEFAULT_CFG, True, [KEPT]),
    "fp8": (mtq.FP8_DEFAULT_CFG, True, []),
}


def export(folder, config, kv_scales, more):
    torch.manual_seed(0)
    shape = MixtralConfig(**SHAPE, architectures=["MixtralForCausalLM"])
    model = MixtralForCausalLM(shape).to(torch.bfloat16).eval()
    config = copy.deepcopy(config)
    if kv_scales:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    # Before the KV cache's own entry, which is the last.
    entries = config["quant_cfg"]
    config["quant_cfg"] = [*entries[:-1], *more, entries[-1]]
    ids = torch.randint(0, SHAPE["vocab_size"], (4, 32))
    mtq.quantize(model, config, lambda quantized: quantized(ids))
    export_hf_checkpoint(model, export_dir=folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def dequantized(tensors):
    """The weights of all packed modules in float32, by ModelOpt."""
    found = {}
    for name, scale in tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        weight = tensors[f"{module}.weight"]
        if weight.dtype == torch.uint8:
            shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
            found[module] = NVFP4QTensor(shape, torch.bfloat16, weight).dequantize(
                torch.float32,
                scale=scale,
                double_scale=tensors[f"{module}.weight_scale_2"],
                block_sizes={-1: 16},
            )
        else:
            found[module] = FP8QTensor(weight.shape, torch.bfloat16, weight).dequantize(
                torch.float32, scale=scale
            )
    return found


def main():
    for name, case in CASES.items():
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        export(folder, *case)
        found = dequantized(load_file(folder / "model.safetensors"))
        save_file(found, OUT / f"{name}-expected.safetensors")
        print(name, len(found), json.loads((folder / "hf_quant_config.json").read_text()))


if __name__ == "__main__":
    sys.exit(main())
