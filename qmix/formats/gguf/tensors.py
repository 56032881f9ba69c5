"""The tensors of a GGUF file as a checkpoint's: canonical names, one expert each, bytes of rows.

A quantized weight `P.weight` is one tensor `P.TYPE` of bytes, [rows, bytes of a row]. Stacked
experts are ranges of bytes. Knows no torch. Names: gguf 0.19, tensor_mapping.py; those of single
experts are of 2023, and llama.cpp no longer reads them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.files.safetensors_header import TensorInfo
from qmix.formats.names import ModelTensor
from qmix.formats.stacked import matrices
from qmix.formats.tensor_errors import wrong_shape
from qmix.gguf.container import GGUFTensor
from qmix.gguf.files import GGUFModel
from qmix.gguf.tensor_types import BY_NAME, DENSE, QUANTIZED

DESCRIPTION = "the metadata"  # what describes the model, for errors
_MODEL = {
    "token_embd.weight": "model.embed_tokens",
    "output_norm.weight": "model.norm",
    "output.weight": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
_EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_IN_LAYER = re.compile(r"blk\.(\d{1,6})\.(\w+)(?:\.(\d{1,6}))?\.weight")
_STACK = "_exps"


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of all files.

    Attributes:
        infos: by name: the file's, with the expert's number in brackets if it is one of a stack.
        stored_names: canonical name -> that name.
    """

    infos: Mapping[str, TensorInfo]
    stored_names: Mapping[str, str]


def named_tensors(model: GGUFModel, config: MixtralConfig) -> NamedTensors:
    """Every tensor of a model under its canonical name; unknown ones keep the file's.

    Raises:
        UnsupportedError: a type that is not read; the tensor is named.
        CheckpointError: a stack of another number of experts, or two tensors for one weight.
    """
    infos: dict[str, TensorInfo] = {}
    stored_names: dict[str, str] = {}
    for name, (file, tensor) in model.tensors.items():
        for stored, canonical, info in _parts(name, file, tensor, config):
            if canonical in stored_names:
                found = f"{stored_names[canonical]} and {stored}"
                raise CheckpointError("two tensors for one weight", where=str(file), found=found)
            infos[stored] = info
            stored_names[canonical] = stored
    return NamedTensors(infos, stored_names)


def check_shapes(named: NamedTensors, tensors: Iterable[ModelTensor]) -> None:
    """Check the bytes of every quantized weight's rows against the model's shapes.

    Raises:
        CheckpointError: a tensor is another shape's.
    """
    for tensor in tensors:
        for kind in QUANTIZED:
            stored = named.stored_names.get(f"{tensor.prefix}.{kind}")
            if stored is None:
                continue
            info, block = named.infos[stored], BY_NAME[kind]
            *rows, columns = tensor.shape
            expected = (*rows, columns // block.block_size * block.block_bytes)
            if columns % block.block_size or info.shape != expected:
                found = (*info.shape[:-1], info.shape[-1] // block.block_bytes * block.block_size)
                raise wrong_shape(
                    str(info.file), stored, tensor.shape, found, description=DESCRIPTION
                )


def _parts(
    name: str, file: Path, tensor: GGUFTensor, config: MixtralConfig
) -> Iterator[tuple[str, str, TensorInfo]]:
    """(name, canonical name, header entry) of a tensor, or of each expert of a stack."""
    prefix, stacked = _prefix(name)
    info = _info(name, file, tensor)
    ending = ".weight" if tensor.type in DENSE else f".{tensor.type}"
    if prefix is None:
        yield name, name, info
    elif not stacked:
        yield name, prefix + ending, replace(info, heads=rotary_heads(prefix, config))
    else:
        stack = matrices(name, info, config, (None, None), description=DESCRIPTION)
        for expert, matrix in enumerate(stack):
            yield f"{name}[{expert}]", prefix.format(expert) + ending, matrix


def gguf_name(tensor: ModelTensor) -> str:
    """The name of a weight in a GGUF file; all experts of a layer have the same, their stack's."""
    for names in (_MODEL, {f"blk.{tensor.layer}.{n}.weight": p for n, p in _LAYER.items()}):
        for name, module in names.items():
            layer = "" if names is _MODEL else f"model.layers.{tensor.layer}."
            if tensor.prefix == layer + module:
                return name
    matrix = tensor.prefix.rpartition(".")[2]
    (part,) = (part for part, other in _EXPERT.items() if other == matrix)
    return f"blk.{tensor.layer}.{part}{_STACK}.weight"


def _prefix(name: str) -> tuple[str | None, bool]:
    """(the canonical module, None if there is none; whether it is a stack of experts).

    The module of a stack has a place for the expert's number.
    """
    if name in _MODEL:
        return _MODEL[name], False
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return None, False
    layer, part, expert = f"model.layers.{int(match[1])}", match[2], match[3]
    if expert is None and part in _LAYER:
        return f"{layer}.{_LAYER[part]}", False
    stacked = expert is None and part.endswith(_STACK)
    matrix = _EXPERT.get(part.removesuffix(_STACK) if stacked else part)
    if matrix is None or not (stacked or expert):
        return None, False
    number = "{}" if stacked else int(expert)
    return f"{layer}.block_sparse_moe.experts.{number}.{matrix}", stacked


def _info(name: str, file: Path, tensor: GGUFTensor) -> TensorInfo:
    """A tensor's entry; the last axis of a quantized one are bytes."""
    if tensor.type in DENSE:
        return TensorInfo(file, tensor.type, tensor.shape, tensor.start, tensor.stop)
    if tensor.type not in QUANTIZED:
        raise UnsupportedError(
            f"tensor {name}: GGUF's type {tensor.type} is not read",
            where=str(file),
            expected=", ".join((*DENSE, *QUANTIZED)),
            found=tensor.type,
            remedy="Download the Q4_K_M file of the model.",
        )
    kind = BY_NAME[tensor.type]
    *rows, columns = tensor.shape
    shape = (*rows, columns // kind.block_size * kind.block_bytes)
    return TensorInfo(file, "U8", shape, tensor.start, tensor.stop)


def rotary_heads(prefix: str, config: MixtralConfig) -> int:
    """The heads whose rows llama.cpp interleaves for its rotary embedding; 0 if none."""
    if prefix.endswith(".q_proj"):
        return config.num_attention_heads
    return config.num_key_value_heads if prefix.endswith(".k_proj") else 0
