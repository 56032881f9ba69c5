"""A small Mixtral in every layout that is read: folders of the real tools, and written ones."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qmix.gguf.tensor_types import QUANTIZED
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.stored import StoredModule
from qmix.weights.scheme import Scheme
from qmix.weights.table import FP4_VALUES, Table
from tests.support import packers
from tests.support.gguf_files import gguf_bytes, golden_rows, mixtral_metadata, mixtral_tensors
from tests.support.models import GOLDEN, TINY, quantized, small_model

# Folders and files that the tools wrote, below tests/golden.
GOLDENS = (
    *(f"compressed-tensors-0.20.0/{name}" for name in ("int4-kv", "nvfp4", "mxfp4", "mixed")),
    *(f"compressed-tensors-0.20.0/fp8-{name}" for name in ("tensor", "channel", "block")),
    *(f"modelopt-0.47.0/{name}" for name in ("nvfp4", "nvfp4-experts", "fp8")),
    *(f"transformers-fp8-5.23.0/{name}" for name in ("tensor", "block", "ue8m0")),
    *("gptqmodel-7.7.0", "hqq-0.2.8", "auto-round-0.16.0", "gguf-Q4_K_M.gguf"),
    *(f"mlx-0.32.4/affine{name}" for name in ("4", "4-g128", "8")),
    *(f"mlx-0.32.4/{name}" for name in ("mixed", "mlx-old", "mxfp4", "nvfp4", "nvfp4-experts")),
    "mlx-0.32.4/tied",
)
SCHEMES = {
    "nf4": Scheme(kind="nf4"),
    "nf4 plain": Scheme(kind="nf4", double_quant=False),
    "nf4 b128": Scheme(kind="nf4", block_size=128),
    "int4": Scheme(kind="int4"),
    "int4 g32 asymmetric": Scheme(kind="int4", group_size=32, symmetric=False),
    "int4 per output": Scheme(kind="int4", group_size=-1),
}
# Types of GGUF's that differ from others in nothing but the codes, which test_gguf reads.
ALIKE = ("IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ1_M")


def _gguf(kind: str, path: Path) -> Path:
    """Every matrix and the embedding in one of GGUF's types, by blocks of llama.cpp's own."""
    model = small_model(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    row = golden_rows(kind)[0][0]
    tensors = {}
    for name, (dtype, shape, raw) in mixtral_tensors(model).items():
        if "norm" in name or "gate_inp" in name:
            tensors[name] = (dtype, shape, raw)
            continue
        count = torch.Size(shape[:-1]).numel()
        tensors[name] = (kind, shape, row[: len(row) // 2].numpy().tobytes() * count)
    file = path.with_suffix(".gguf")
    file.write_bytes(gguf_bytes(mixtral_metadata(model.config), tensors))
    return file


def _two_bits(path: Path) -> Path:
    settings = {**packers.GPTQ, "bits": 2, "checkpoint_format": "gptq_v2"}
    packers.checkpoint(path, partial(packers.gptq, version=2), settings, bits=2)
    return path


def _packed(name: str, path: Path) -> Path:
    packers.write(path, name)
    return path


def _golden(name: str, path: Path) -> Path:
    return GOLDEN / name


def _quantized(name: str, path: Path) -> Path:
    return quantized(TINY, path, SCHEMES[name], method="rtn")


def _fp4(path: Path) -> Path:
    """The codes of NF4, read as FP4's."""
    model = MixtralForCausalLM.from_pretrained(_quantized("nf4", path), device="cpu")
    table = torch.tensor(FP4_VALUES)
    for module in model.modules():
        if isinstance(module, StoredModule) and isinstance(module.stored, Table):
            module.store(replace(module.stored, table=table, kind="fp4"))
    model.save_pretrained(path.with_name("fp4"))
    return path.with_name("fp4")


# name -> (a path that does not exist) -> the checkpoint
EVERY: Mapping[str, Callable[[Path], Path]] = {
    **{name: partial(_quantized, name) for name in SCHEMES},
    "fp4": _fp4,
    "gptq 2 bits": _two_bits,
    **{name: partial(_packed, name) for name in packers.SOURCES | packers.ASYMMETRIC},
    **{name: partial(_golden, name) for name in GOLDENS},
    **{f"gguf {kind}": partial(_gguf, kind) for kind in QUANTIZED if kind not in ALIKE},
}
