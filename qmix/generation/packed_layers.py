"""The weights that a StaticDecoder's launches read, where a model has them packed throughout.

Knows modules, and of bits only that they lie in the packed layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix.experts.layer_experts import Experts
from qmix.kernels import PackedExperts, PackedWeight
from qmix.nn.cpu_decode import why_not_modules
from qmix.nn.decoder import Decoder
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.linear import RMSNorm, is_observed
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Dense
from qmix.weights.packed.layout import PackedMatrix


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """What the kernels of one layer read."""

    input_norm: Tensor
    qkv: PackedMatrix
    o_proj: PackedMatrix
    post_norm: Tensor
    gate: Tensor
    experts: PackedExperts


def layer_weights(layer: nn.Module) -> LayerWeights | None:
    """The layer's weights; None if one is not packed, or the layer's modules have to be called."""
    if type(layer) is not DecoderLayer or is_observed(layer) or why_not_modules(layer):
        return None
    attention, block = layer.self_attn, layer.block_sparse_moe
    qkv, o_proj = _whole_matrix(attention.fused_qkv), _whole_matrix(attention.o_proj.stored)
    gate, experts = block.gate.stored, block.stored.packed
    if qkv is None or o_proj is None or experts is None:
        return None
    post_norm = layer.post_attention_layernorm.weight
    if not isinstance(gate, Dense):
        gate = Dense(gate.dequantize(post_norm.dtype))
    return LayerWeights(layer.input_layernorm.weight, qkv, o_proj, post_norm, gate.data, experts)


def _whole_matrix(weight: object) -> PackedMatrix | None:
    """The matrix of a packed weight; None if the weight is a part of one, or not packed."""
    if isinstance(weight, PackedWeight) and weight.selection is None:
        return weight.matrix
    return None


def first_experts(model: Decoder) -> Experts | None:
    """The first layer's experts, None without such a block; where these lie, the others lie too."""
    block = getattr(model.layers[0], "block_sparse_moe", None)
    return block.stored if isinstance(block, SparseMoeBlock) else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module need not be called: its weight says all that it computes."""
    return type(module) is kind and not is_observed(module)


def supported(model: Decoder) -> bool:
    """Whether the kernels take the decoder: its dtype, its heads, and packed weights throughout.

    The launches call no module, so one with a hook, or of another class, is not supported.
    """
    return (
        is_plain(model.norm, RMSNorm)
        and model.norm.weight.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and model.config.head_dim in (16, 32, 64, 128)
        and all(layer_weights(layer) is not None for layer in model.layers)
    )


def packed_layers(model: Decoder) -> list[LayerWeights]:
    """The weights of a decoder that is `supported`."""
    found = [layer_weights(layer) for layer in model.layers]
    layers = [layer for layer in found if layer is not None]
    assert len(layers) == len(found)
    return layers
