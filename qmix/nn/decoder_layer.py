"""A whole layer: attention and experts, each behind its norm; and one token on a CPU, all layers in one call.

Shape letters: B batch, S new positions, D hidden width, H heads, G key-value heads, d head width, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.kernels.cpu.ctypes_structs import TokenLayer
from qmix.kernels.cpu.library import library
from qmix.nn.attention import Attention, ForwardContext
from qmix.nn.cache import KVCache
from qmix.nn.linear import Linear, RMSNorm
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Weight
from qmix.weights.integers import Int4
from qmix.weights.nf4 import NF4


class DecoderLayer(nn.Module):
    """`h = x + attention(norm x); out = h + experts(norm h)`."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.block_sparse_moe = SparseMoeBlock(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Of which parts it was made, and what the compiled products take of them, if they do.
        self._token: tuple[tuple[object, ...], TokenLayer | None] | None = None

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the raw router logits (B * S, E)."""
        token = self._one_token() if _is_one_token(x, context) else None
        if token is not None:
            return self._compiled(token, x, context)
        x = x + self.self_attn(self.input_layernorm(x), context)
        y, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y, router_logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DecoderLayer":
        self._token = None  # let go of what is moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_token": None}  # a copy's weights lie elsewhere

    def _compiled(
        self, token: TokenLayer, x: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """The same of one token on a CPU, in two calls around attention."""
        compiled = library()
        attended = self.self_attn.attended(
            compiled.before_attention(token, x, context.cos, context.sin), context
        )
        x, normed, router_logits, routes = compiled.after_attention(token, attended, x)
        if not token.has_experts:
            x = x + self.block_sparse_moe.moe_forward(normed, routes)
        return x, router_logits

    def _one_token(self) -> TokenLayer | None:
        """What the compiled products need of this layer, if they may take it."""
        if self.training:
            return None
        attention, block = self.self_attn, self.block_sparse_moe
        norms = (self.input_layernorm, self.post_attention_layernorm)
        if type(attention) is not Attention or type(block) is not SparseMoeBlock:
            return None
        linears = (*attention.projections, block.gate)
        if not all(type(linear) is Linear for linear in linears):
            return None  # an adapter's
        if not all(type(norm) is RMSNorm for norm in norms):
            return None
        if any(_seen(module) for module in (attention, block, *linears, *norms)):
            return None
        *projections, router = (linear.stored for linear in linears)
        experts = block.placed()
        tensors = (*(norm.weight for norm in norms), getattr(router, "data", None))
        parts = (projections, experts, [(t.data_ptr(), t.dtype) for t in tensors if t is not None])
        if self._token is None or self._token[0] != parts:
            self._token = parts, self._prepared(projections, tensors, experts)
        return self._token[1]

    def _prepared(
        self,
        projections: Sequence[Weight],
        tensors: Sequence[Tensor | None],
        experts: Sequence[Weight | None],
    ) -> TokenLayer | None:
        """The parts of a layer for the compiled products, if they multiply all but the experts."""
        packed = [weight for weight in projections if isinstance(weight, (NF4, Int4))]
        dense = [t.detach() for t in tensors if t is not None and t.dtype == torch.bfloat16]
        if (
            (len(packed), len(dense)) != (4, 3)
            or not all(part.device.type == "cpu" for part in (*packed, *dense))
            or not all(t.is_contiguous() for t in dense)
            or library().isa is None
        ):
            return None
        block = self.block_sparse_moe
        parts = [weight for weight in experts if isinstance(weight, (NF4, Int4))]
        whole = block.act is F.silu and 0 < len(parts) == len(experts)
        return TokenLayer.of(
            packed,
            dense[:2],
            dense[2],
            list(zip(parts[::3], parts[1::3], parts[2::3], strict=True)) if whole else None,
            eps=self.input_layernorm.eps,
            head_dim=self.self_attn.head_dim,
            chosen=block.num_experts_per_tok,
        )


def one_token(
    layers: Iterable[nn.Module], x: Tensor, context: ForwardContext
) -> tuple[Tensor, list[Tensor]] | None:
    """All layers in one call: (1, 1, D) -> (1, 1, D) and each one's router logits (1, E).

    None where each must be called: on another device or dtype, for more tokens, where somebody wants to
    see what passes between, or where the experts come and go.
    """
    cache = context.cache
    if not (
        _is_one_token(x, context)
        and (cache is None or (type(cache) is KVCache and _holds(cache, x)))
        and context.padding_mask is None
        and context.attn_mask is None
        and context.attn_implementation == "sdpa"
    ):
        return None
    ready = []
    for layer in layers:
        if type(layer) is not DecoderLayer or _seen(layer):
            return None
        token = layer._one_token()
        if token is None or not token.has_experts:
            return None
        ready.append(token)
    slot, seen = (0, 1) if cache is None else cache.reserve_slot()
    caches = [] if cache is None else [cache.storage(index) for index in range(len(ready))]
    out, logits = library().decode_token(
        ready, x, context.cos, context.sin, caches, slot=slot, seen=seen
    )
    return out, list(logits[:, None].unbind())


def _is_one_token(x: Tensor, context: ForwardContext) -> bool:
    """Whether the compiled products take such a context."""
    return (
        x.is_cpu
        and x.shape[:2] == (1, 1)
        and x.dtype == context.cos.dtype == torch.bfloat16
        and x.is_contiguous()
        and context.cos.is_contiguous()
        and context.sin.is_contiguous()
        and context.attentions is None
        and not (torch.is_grad_enabled() or kernels.overridden())
    )


def _holds(cache: KVCache, x: Tensor) -> bool:
    """Whether keys of x lie in the cache as they are."""
    keys, _ = cache.storage(0)
    return keys.is_cpu and keys.dtype == x.dtype and keys.shape[0] == 1


def _seen(module: nn.Module) -> bool:
    """Whether somebody wants to see each call of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
