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
from qmix.nn.linear import Linear, RMSNorm, is_observed
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Dense
from qmix.weights.packed.layout import PackedMatrix

# One packed matrix, or several weights whose outputs follow each other: packed, or dense [N, K].
Projection = PackedMatrix | tuple[PackedMatrix | Tensor, ...]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """What the kernels of one layer read."""

    input_norm: Tensor
    qkv: Projection
    o_proj: Projection
    post_norm: Tensor
    gate: Tensor
    experts: PackedExperts

    @property
    def projections(self) -> tuple[PackedMatrix, PackedMatrix] | None:
        """Of attention, if both are one packed matrix, which launches that do more want."""
        if isinstance(self.qkv, PackedMatrix) and isinstance(self.o_proj, PackedMatrix):
            return self.qkv, self.o_proj
        return None


def layer_weights(layer: nn.Module) -> LayerWeights | None:
    """The layer's weights; None if one has no kernel, or the layer's modules have to be called."""
    if type(layer) is not DecoderLayer or is_observed(layer) or why_not_modules(layer):
        return None
    attention, block = layer.self_attn, layer.block_sparse_moe
    qkv = _projection(attention.fused_qkv, attention.q_proj, attention.k_proj, attention.v_proj)
    o_proj = _projection(attention.o_proj.stored, attention.o_proj)
    gate, experts = block.gate.stored, block.stored.packed
    if qkv is None or o_proj is None or experts is None:
        return None
    post_norm = layer.post_attention_layernorm.weight
    if not isinstance(gate, Dense):
        gate = Dense(gate.dequantize(post_norm.dtype))
    return LayerWeights(layer.input_layernorm.weight, qkv, o_proj, post_norm, gate.data, experts)


def _projection(whole: object, *modules: Linear) -> Projection | None:
    """What a projection's kernels read; None if a weight is neither packed nor dense."""
    if isinstance(whole, PackedWeight) and whole.selection is None:
        return whole.matrix
    parts: list[PackedMatrix | Tensor] = []
    for module in modules:
        weight = module.stored
        if isinstance(weight, Dense):
            parts.append(weight.data)
        elif isinstance(weight, PackedWeight) and weight.selection is None:
            parts.append(weight.matrix)
        else:
            return None
    return tuple(parts)


def first_experts(model: Decoder) -> Experts | None:
    """The first layer's experts, None without such a block; where these lie, the others lie too."""
    block = getattr(model.layers[0], "block_sparse_moe", None)
    return block.stored if isinstance(block, SparseMoeBlock) else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module need not be called: its weight says all that it computes."""
    return type(module) is kind and not is_observed(module)


def supported(model: Decoder) -> bool:
    """Whether the kernels take the decoder: its dtype, its heads, and packed experts throughout.

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
