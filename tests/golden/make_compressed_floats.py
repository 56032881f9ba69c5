"""Write compressed-tensors-VERSION/ beside this file: tiny Mixtrals in FP4, FP8 and mixtures.

    python tests/golden/make_compressed_floats.py    # in an environment with compressed-tensors

Kept as oracle: compressed-tensors 0.20.0 (torch 2.13 CPU). Needs no qmix. The tensors of each
module are what its compressor writes, config.json has the settings as its ModelCompressor writes
them; the rest follows llm-compressor's names. NAME-expected.safetensors holds each weight as the
compressor reads it (bfloat16), and of two `.float32` as its arithmetic gives it in float32.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import (
    FP8,
    FP8_BLOCK,
    FP8_DYNAMIC,
    MXFP4,
    NVFP4,
    W4A16,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from tiny_mixtral import CONFIG, LAYER, LINEAR, dense_tensors, random

VERSION = version("compressed-tensors")
OUT = Path(__file__).with_name(f"compressed-tensors-{VERSION}")
IGNORED = ["lm_head", "re:.*block_sparse_moe.gate"]
BLOCKS = {"weights": QuantizationArgs(
    num_bits=8, type="float", strategy="block", symmetric=True, block_structure=[32, 32]
)}  # fmt: skip
EXACT = (".k_proj", ".1.w2")  # modules whose values in float32 are kept
KV = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
FLOAT = "float-quantized"
# name: groups of (targets, preset, format), and whether the cache has scales
CASES = {
    "nvfp4": ([(["Linear"], NVFP4, "nvfp4-pack-quantized")], True),
    "mxfp4": ([(["Linear"], MXFP4, "mxfp4-pack-quantized")], False),
    "fp8-tensor": ([(["Linear"], FP8, FLOAT)], True),
    "fp8-channel": ([(["Linear"], FP8_DYNAMIC, FLOAT)], False),
    "fp8-block": ([(["Linear"], {**FP8_BLOCK, **BLOCKS}, FLOAT)], False),
    "int4-kv": ([(["Linear"], {"weights": W4A16["weights"].model_copy(
        update={"group_size": 32})}, "pack-quantized")], True),
    "mixed": ([(["re:.*experts.*"], NVFP4, "nvfp4-pack-quantized"),
               (["re:.*self_attn.*"], FP8_DYNAMIC, FLOAT)], False),
}  # fmt: skip


def parameters(weight, args):
    """(scale, zero point, global scale) of a weight, as a min-max observer finds them."""
    rows, columns = weight.shape
    if args.strategy in ("group", "tensor_group"):
        parts = weight.view(rows, -1, args.group_size)
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "block":
        size = args.block_structure
        parts = weight.view(rows // size[0], size[0], columns // size[1], size[1])
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    else:
        low, high = weight.min().view(1), weight.max().view(1)
    factor = None
    if args.strategy == "tensor_group":
        factor = generate_gparam(weight.min().float(), weight.max().float())
    return (*calculate_qparams(low, high, args, global_scale=factor), factor)


def compressed(weight, scheme, layout):
    """(the tensors of a module, the weight as the compressor reads them, the same in float32)."""
    args = scheme.weights
    scale, zero, factor = parameters(weight, args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if factor is not None:
        state["weight_global_scale"] = factor
    if scheme.input_activations is not None and args.num_bits == 4 and factor is not None:
        state["input_global_scale"] = torch.tensor([1234.5])
    if scheme.input_activations is not None and scheme.input_activations.dynamic is False:
        state["input_scale"] = torch.tensor([0.0125], dtype=weight.dtype)
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    read = compressor.decompress(dict(packed), scheme)["weight"]
    return packed, read, in_float32(packed, scheme, compressor)


def in_float32(packed, scheme, compressor):
    """What the compressor's own arithmetic gives if nothing is rounded to bfloat16."""
    if "weight_shape" in packed:
        return None
    if "weight_packed" in packed:
        rows, half = packed["weight_packed"].shape
        values = unpack_fp4_from_uint8(packed["weight_packed"], rows, 2 * half, torch.float32)
        scale = compressor._decompress_scale(packed["weight_scale"], torch.float32)
    else:
        values, scale = packed["weight"].float(), packed["weight_scale"].float()
    return dequantize(
        x_q=values,
        scale=scale,
        args=scheme.weights,
        global_scale=packed.get("weight_global_scale"),
        dtype=torch.float32,
    )


def scheme_of(module, groups):
    """The group of a module: the mixture's targets are told apart by their first letters."""
    for targets, preset, layout in groups:
        part = ".experts." if "experts" in targets[0] else ".self_attn."
        if targets == ["Linear"] or part in module:
            return QuantizationScheme(targets=targets, format=layout, **preset), layout
    raise AssertionError(module)


def main():
    for name, (groups, kv_scales) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        tensors = dense_tensors(generator)
        expected = {}
        for module, shape in LINEAR.items():
            scheme, layout = scheme_of(module, groups)
            packed, read, exact = compressed(random(generator, *shape), scheme, layout)
            tensors |= {f"{module}.{key}": value.contiguous() for key, value in packed.items()}
            expected[module] = read.contiguous()
            if exact is not None and module.endswith(EXACT):
                expected[f"{module}.float32"] = exact.contiguous()
        if kv_scales:
            for part in "kv":
                tensors[f"{LAYER}.self_attn.{part}_scale"] = torch.tensor([0.03]).bfloat16()
        formats = {layout for _, _, layout in groups}
        settings = QuantizationConfig(
            config_groups={
                f"group_{i}": QuantizationScheme(targets=targets, format=layout, **preset)
                for i, (targets, preset, layout) in enumerate(groups)
            },
            ignore=IGNORED,
            kv_cache_scheme=KV if kv_scales else None,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed",
        ).model_dump(exclude=["quant_method"])
        about = {"version": VERSION, "quant_method": "compressed-tensors"}
        about |= {"sparsity_config": {}, "transform_config": {}}
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        document = CONFIG | {"quantization_config": about | settings}
        (folder / "config.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
        save_file(expected, OUT / f"{name}-expected.safetensors")
        print(name, {key: (str(t.dtype), list(t.shape)) for key, t in packed.items()})


if __name__ == "__main__":
    main()
