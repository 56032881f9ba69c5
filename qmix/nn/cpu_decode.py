"""One new token a row, on a CPU, through compiled code: when that may be, and if not, why.

`decode_tokens` runs all layers in one call, for one row or a few. `run_layer` runs one layer, in
two calls around its attention. Both compute what the modules compute. What they cannot
do, and what a caller wants to see of a pass (hooks, attention weights), goes through the modules; a
WhyNot says for which reason.

Knows modules by their parts; a decoder layer shows it those.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix import kernels
from qmix.kernels.cpu.library import DENSE_TOKENS, TokenSlot, library
from qmix.kernels.cpu.pointers import TokenLayer, takes
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.cache import Cache, KVCache
from qmix.nn.cache_rows import CacheRows
from qmix.nn.linear import Linear, RMSNorm, is_observed
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Dense, Weight


class WhyNot(Enum):
    """Why a token goes through the modules."""

    # Of the pass: no layer takes it.
    DEVICE = "the hidden states are not on the CPU"
    SEVERAL_TOKENS = "there is more than one new token, or too many rows"
    DTYPE = "the hidden states or the rotary factors are not bfloat16"
    STRIDES = "the hidden states or the rotary factors are not contiguous"
    ATTENTIONS = "attention weights are asked for"
    GRADIENTS = "gradients are recorded"
    OVERRIDE = "another kernel is chosen by kernels.override"
    # Of the pass: each layer may take it, but not all at once.
    MASK = "there is an attention mask"
    IMPLEMENTATION = "attn_implementation is not sdpa"
    CACHE = "the cache is not of these rows, in bfloat16 and on the CPU"
    # Of a layer.
    TRAINING = "the layer is in training"
    OTHER_CLASS = "a module is of another class, as an adapter is"
    OBSERVED = "a module has a hook or a forward of its own"
    PROJECTIONS = "an attention projection is not 4-bit weights that the kernels take on the CPU"
    DENSE_PARTS = "a norm or the router is packed, or not bfloat16, contiguous and on the CPU"
    NO_KERNELS = "there are no compiled kernels"
    # Of a layer: it is taken, but not in one call with the others.
    EXPERTS = "the experts are not all 4-bit weights that the kernels take in memory, or their activation is not SiLU"


class LayerModules(Protocol):
    """The parts of a decoder layer."""

    training: bool
    self_attn: Attention
    block_sparse_moe: SparseMoeBlock
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm


class CompiledLayer:
    """A layer as the compiled code takes it, made anew when its weights have changed."""

    def __init__(self) -> None:
        # What it was made of, and the result: one value, which threads replace at once.
        self._made: tuple[object, TokenLayer | WhyNot] = (None, WhyNot.NO_KERNELS)

    def of(self, layer: LayerModules) -> TokenLayer | WhyNot:
        """The layer, without its experts where those are multiplied elsewhere."""
        if layer.training:
            return WhyNot.TRAINING
        reason = why_not_modules(layer)
        if reason is not None:
            return reason
        projections = [linear.stored for linear in layer.self_attn.projections]
        router = layer.block_sparse_moe.gate.stored
        experts = layer.block_sparse_moe.quantized_weights()
        dense: list[Tensor] = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        if isinstance(router, Dense):
            dense.append(router.data)
        chosen = layer.block_sparse_moe.num_experts_per_tok
        made_of = projections, experts, [(part.data_ptr(), part.dtype) for part in dense], chosen
        last, result = self._made
        if last != made_of:
            result = _compiled(layer, projections, dense, experts)
            self._made = made_of, result
        return result

    def __reduce__(self) -> tuple[object, ...]:
        """The weights of a copy lie elsewhere."""
        return CompiledLayer, ()


def why_not_modules(layer: LayerModules) -> WhyNot | None:
    """Why the layer's modules have to be called; None if its weights say all that they compute."""
    attention, block = layer.self_attn, layer.block_sparse_moe
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if type(attention) is not Attention or type(block) is not SparseMoeBlock:
        return WhyNot.OTHER_CLASS
    linears = (*attention.projections, block.gate)
    if not all(type(linear) is Linear for linear in linears):
        return WhyNot.OTHER_CLASS
    if not all(type(norm) is RMSNorm for norm in norms):
        return WhyNot.OTHER_CLASS
    if any(is_observed(module) for module in (attention, block, *linears, *norms)):
        return WhyNot.OBSERVED
    return None


def _compiled(
    layer: LayerModules,
    projections: Sequence[Weight],
    dense: Sequence[Tensor],
    experts: Sequence[Weight | None],
) -> TokenLayer | WhyNot:
    """A layer of these parts, or why not.

    Args:
        projections: q, k, v and o.
        dense: the two norms and the router.
        experts: w1, w3 and w2 of each expert; empty if they are multiplied elsewhere.
    """
    packed = [weight for weight in projections if takes(weight)]
    if len(packed) != len(projections) or any(part.device.type != "cpu" for part in packed):
        return WhyNot.PROJECTIONS
    if len(dense) != 3 or not all(
        part.is_cpu and part.dtype == torch.bfloat16 and part.is_contiguous() for part in dense
    ):
        return WhyNot.DENSE_PARTS
    if library().isa is None:
        return WhyNot.NO_KERNELS
    block = layer.block_sparse_moe
    parts = [weight for weight in experts if takes(weight)]
    has_experts = block.act is F.silu and 0 < len(parts) == len(experts)
    return TokenLayer.of(
        packed,
        [norm.detach() for norm in dense[:2]],
        dense[2].detach(),
        list(zip(parts[::3], parts[1::3], parts[2::3], strict=True)) if has_experts else None,
        eps=layer.input_layernorm.eps,
        head_dim=layer.self_attn.head_dim,
        chosen=block.num_experts_per_tok,
    )


def why_not_step(x: Tensor, context: ForwardContext) -> WhyNot | None:
    """Why no layer takes hidden states x; None if it depends on the layer."""
    if not x.is_cpu:
        return WhyNot.DEVICE
    if x.shape[1] != 1 or not 0 < x.shape[0] <= DENSE_TOKENS:
        return WhyNot.SEVERAL_TOKENS
    if not x.dtype == context.cos.dtype == torch.bfloat16:
        return WhyNot.DTYPE
    if not (x.is_contiguous() and context.cos.is_contiguous() and context.sin.is_contiguous()):
        return WhyNot.STRIDES
    if context.attentions is not None:
        return WhyNot.ATTENTIONS
    if torch.is_grad_enabled():
        return WhyNot.GRADIENTS
    return WhyNot.OVERRIDE if kernels.overridden() else None


def run_layer(
    compiled: TokenLayer, layer: LayerModules, x: Tensor, context: ForwardContext
) -> tuple[Tensor, Tensor]:
    """One layer in two calls: (B, 1, D) -> (B, 1, D) and the raw router logits (B, E)."""
    functions = library()
    qkv = functions.before_attention(compiled, x, *_rotary_rows(context, len(x)))
    attended = layer.self_attn.attended(qkv, context).contiguous()
    x, normed, router_logits, routes = functions.after_attention(compiled, attended, x)
    if not compiled.has_experts:
        x = x + layer.block_sparse_moe.moe_forward(normed, routes).view_as(x)
    return x, router_logits


def decode_tokens(
    layers: Iterable[TokenLayer | WhyNot], x: Tensor, context: ForwardContext
) -> tuple[Tensor, list[Tensor]] | WhyNot:
    """All layers in one call: (B, 1, D) -> (B, 1, D) and the router logits (B, E) of each.

    Its own keys and values are written to the cache, which does not count them yet.
    """
    reason = why_not_step(x, context)
    if reason is not None:
        return reason
    if context.padding_mask is not None or context.attn_mask is not None:
        return WhyNot.MASK
    if context.attn_implementation != "sdpa":
        return WhyNot.IMPLEMENTATION
    rows = _cached_rows(x, context.cache)
    if rows is None:
        return WhyNot.CACHE
    ready: list[TokenLayer] = []
    for layer in layers:
        if isinstance(layer, WhyNot):
            return layer
        if not layer.has_experts:
            return WhyNot.EXPERTS
        ready.append(layer)
    cos, sin = _rotary_rows(context, len(x))
    out, logits = library().decode_tokens(ready, x, cos, sin, _slots(rows, len(ready)))
    return out, list(logits.unbind())


def _rotary_rows(context: ForwardContext, rows: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines of each row, (B, 1, 1, d)."""
    cos, sin = (part.expand(rows, -1, -1, -1).contiguous() for part in (context.cos, context.sin))
    return cos, sin


def _cached_rows(x: Tensor, cache: Cache | None) -> list[tuple[KVCache, int]] | None:
    """The cache of each row of x, and which row of that cache it is; None if they are others."""
    if cache is None:
        return []
    if type(cache) is KVCache:
        rows = [(cache, row) for row in range(cache.batch)]
    elif type(cache) is CacheRows:
        rows = [(row, 0) for row in cache.rows]
    else:
        return None
    fits = all(row.dtype == x.dtype and row.storage(0)[0].is_cpu for row, _ in rows)
    return rows if fits and len(rows) == len(x) else None


def _slots(rows: Sequence[tuple[KVCache, int]], layers: int) -> list[TokenSlot]:
    """Where the new token of each row goes: those of the first layer, then those of the second."""
    reserved = [(cache, row, *cache.reserve_slot()) for cache, row in rows]
    return [
        TokenSlot(keys[row], values[row], slot, seen)
        for layer in range(layers)
        for cache, row, slot, seen in reserved
        for keys, values in [cache.storage(layer)]
    ]
