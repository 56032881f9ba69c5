"""Write compressed-tensors-VERSION.safetensors beside this file: weights packed and unpacked by it.

    python tests/golden/make_compressed.py    # in an environment with compressed-tensors

Kept as oracle: compressed-tensors 0.20.0 (torch 2.13 CPU). Needs no qmix.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

CASES = {  # name: bits, shape, group size (None: a channel), symmetric, dtype
    "grouped": (4, (16, 64), 32, True, torch.bfloat16),
    "asymmetric": (4, (24, 64), 32, False, torch.float16),
    "channel": (4, (11, 64), None, True, torch.bfloat16),
    "channel_asymmetric": (4, (11, 64), None, False, torch.float16),
    "grouped8": (8, (16, 64), 32, True, torch.bfloat16),
    "asymmetric8": (8, (10, 64), 32, False, torch.float16),
    "channel8": (8, (11, 64), None, True, torch.float16),
}


def main():
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, (bits, shape, size, symmetric, dtype) in CASES.items():
        weight = (torch.randn(shape, generator=generator) + 0.3).to(dtype)
        options = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **options)
        grouped = weight.view(shape[0], -1, size or shape[1])
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        packed = PackedQuantizationCompressor.compress(state, scheme)
        unpacked = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
        tensors[f"{name}.expected"] = unpacked
    name = f"compressed-tensors-{version('compressed-tensors')}.safetensors"
    save_file(tensors, Path(__file__).with_name(name))


if __name__ == "__main__":
    main()
