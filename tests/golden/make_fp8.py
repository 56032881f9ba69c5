"""Write transformers-fp8-VERSION/ beside this file: tiny Mixtrals in transformers' blocks of FP8.

    python tests/golden/make_fp8.py    # in an environment with transformers 5

Kept as oracle: transformers 5.23.0 (torch 2.13 CPU). Needs no qmix. The tensors are what its
`Fp8Quantize` writes; NAME-expected.safetensors holds what its `Fp8Dequantize` makes of them in
float32.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import save_file
from tiny_mixtral import CONFIG, LINEAR, dense_tensors, random
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

OUT = Path(__file__).with_name(f"transformers-fp8-{transformers.__version__}")
CASES = {
    "block": {"weight_block_size": [32, 32]},
    "ue8m0": {"weight_block_size": [16, 32], "scale_fmt": "ue8m0"},
    "tensor": {"weight_block_size": None},
}


def main():
    for name, options in CASES.items():
        config = FineGrainedFP8Config(**options, modules_to_not_convert=["lm_head", "gate"])
        quantizer = SimpleNamespace(quantization_config=config)
        generator = torch.Generator().manual_seed(0)
        tensors, expected = dense_tensors(generator), {}
        for module, shape in LINEAR.items():
            made = Fp8Quantize(quantizer).convert({f"{module}.weight": random(generator, *shape)})
            tensors |= made
            weight, scales = made[f"{module}.weight"], made[f"{module}.weight_scale_inv"]
            expected[module] = Fp8Dequantize(quantizer)._dequantize_one(
                weight, scales, torch.float32
            )
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        document = CONFIG | {"quantization_config": config.to_dict()}
        (folder / "config.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
        save_file(expected, OUT / f"{name}-expected.safetensors")
        print(name, scales.dtype, list(scales.shape), config.to_dict())


if __name__ == "__main__":
    main()
