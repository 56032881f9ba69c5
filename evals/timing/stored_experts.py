"""Random experts of true width as the tools store them: a checkpoint for each layout.

Codes are random bytes and scales valid numbers, so sizes and times are those of real files. GGUF's
blocks stand in a safetensors file under the names that its reader gives them: only the container
differs. Knows nothing of time. Shape letters: see qmix.kernels.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.evals.timing.random_layer import random_weight
from qmix.formats.files.shard_writer import ShardWriter
from qmix.formats.layouts import compressed_tensors, writer
from qmix.formats.names import model_tensors
from qmix.formats.tensor_spec import TensorSpec
from qmix.gguf.tensor_types import BY_NAME
from qmix.weights.affine import Affine

EXPERTS = 2  # as many as a token passes
_SCALE = 1 / 1024  # of every group; its values are as large as those of a real layer

# (N, K) -> the tensors of a weight, by what follows the module's name
Stored = Callable[[int, int], dict[str, Tensor]]


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _words(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return _codes(*shape[:-1], 4 * shape[-1]).view(dtype)


def _scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.full(shape, _SCALE).to(dtype)


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of module `m`, by what follows its name."""
    return {name.removeprefix("m"): tensor for name, tensor in tensors.items()}


def _written(weight_format: str, rows: int, columns: int) -> dict[str, Tensor]:
    """As qmix writes a weight: NF4 in bitsandbytes' layout, Int4 in GPTQ's."""
    return _named(writer.pack(random_weight(weight_format, (rows, columns), 0), "m"))


def _pack_quantized(rows: int, columns: int) -> dict[str, Tensor]:
    weight = random_weight("int4 g128", (rows, columns), 0)
    assert isinstance(weight, Affine)
    return _named(compressed_tensors.pack(weight, "m"))


def _eight_bits(rows: int, columns: int) -> dict[str, Tensor]:
    weight = random_weight("int4 g128", (rows, 2 * columns), 0)
    assert isinstance(weight, Affine)
    assert isinstance(weight.scales, Tensor)
    scales = weight.scales[:, : columns // 128].contiguous()
    return _named(writer.pack(replace(weight, bits=8, scales=scales), "m"))


def _awq(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".qweight": _words(columns, rows // 8),
        ".qzeros": _words(columns // 128, rows // 8),
        ".scales": _scales(columns // 128, rows),
    }


def _e4m3(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns // 16), 1.0).to(torch.float8_e4m3fn)


def _modelopt(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".weight": _codes(rows, columns // 2),
        ".weight_scale": _e4m3(rows, columns),
        ".weight_scale_2": torch.tensor(_SCALE),
    }


def _nvfp4(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".weight_packed": _codes(rows, columns // 2),
        ".weight_scale": _e4m3(rows, columns),
        ".weight_global_scale": torch.tensor([1 / _SCALE]),
    }


def _mxfp4(rows: int, columns: int) -> dict[str, Tensor]:
    exponents = torch.full((rows, columns // 32), 117, dtype=torch.uint8)
    return {".weight_packed": _codes(rows, columns // 2), ".weight_scale": exponents}


def _mlx(bits: int, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".weight": _words(rows, columns * bits // 32, dtype=torch.uint32),
        ".scales": _scales(rows, columns // 64, dtype=torch.bfloat16),
        ".biases": _scales(rows, columns // 64, dtype=torch.bfloat16),
    }


def _hqq(rows: int, columns: int) -> dict[str, Tensor]:
    groups = rows * columns // 64
    return {
        ".W_q": _codes(groups // 2, 64),
        ".scale": _scales(groups, 1),
        ".zero": torch.full((groups, 1), 8.0).half(),
        ".nbits": torch.tensor(4, dtype=torch.int32),
        ".group_size": torch.tensor(64, dtype=torch.int32),
        ".shape": torch.tensor([rows, columns]),
        ".axis": torch.tensor(1, dtype=torch.int32),
        ".packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
    }


# The bytes of a block that hold float16 scales, in those of GGUF's types that are measured.
_GGUF_SCALES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "IQ4_NL", "IQ4_XS", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q4_K", "Q5_1", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}


def _gguf(kind: str, rows: int, columns: int) -> dict[str, Tensor]:
    block = BY_NAME[kind]
    blocks = _codes(rows * columns // block.block_size, block.block_bytes)
    scale = torch.tensor([_SCALE / 32]).half().view(torch.uint8)
    for start in _GGUF_SCALES[kind]:
        blocks[:, start : start + 2] = scale
    return {f".{kind}": blocks.view(rows, -1)}


LAYOUTS: Mapping[str, Stored] = {
    "NF4": partial(_written, "nf4"),
    "NF4, nested": partial(_written, "nf4 nested"),
    "GPTQ g128": partial(_written, "int4 g128"),
    "GPTQ g32": partial(_written, "int4 g32"),
    "GPTQ, 8 bits": _eight_bits,
    "AWQ g128": _awq,
    "compressed-tensors, int4 g128": _pack_quantized,
    "NVFP4 of ModelOpt": _modelopt,
    "NVFP4 of compressed-tensors": _nvfp4,
    "MXFP4": _mxfp4,
    "MLX, 4 bits g64": partial(_mlx, 4),
    "MLX, 8 bits g64": partial(_mlx, 8),
    "HQQ, 4 bits g64": _hqq,
    **{f"GGUF {kind}": partial(_gguf, kind) for kind in _GGUF_SCALES},
}


def shape(*, hidden: int = 4096, width: int = 14336) -> MixtralConfig:
    """The config of one layer with two experts of the 8x7B's widths, and little else."""
    return MixtralConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        dtype="bfloat16",
    )


def write_experts(folder: Path, stored: Stored, config: MixtralConfig) -> None:
    """Write a checkpoint into an empty folder; its experts are stored so, the rest is bfloat16."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for tensor in model_tensors(config):
        if tensor.kind == "expert":
            parts = stored(tensor.shape[0], tensor.shape[1])
            tensors |= {f"{tensor.prefix}{suffix}": part for suffix, part in parts.items()}
        else:
            tensors[tensor.name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
    specs = [TensorSpec(name, data.dtype, tuple(data.shape)) for name, data in tensors.items()]
    with ShardWriter(folder / "model.safetensors", specs) as file:
        for name, data in tensors.items():
            file.write(name, data)
    config.save_pretrained(folder)
