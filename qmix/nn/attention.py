"""The attention of a layer, and the context of a forward pass that layers share.

Knows no bits, no files and no tiers: weights are multiplied by qmix.kernels. Shape letters: see
qmix.nn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.kernels import PackedWeight
from qmix.kernels.attention import Implementation, attention_with_weights
from qmix.kernels.attention_mask import AttentionMask
from qmix.kv_format import KVFormat
from qmix.nn.cache import Cache
from qmix.nn.cache_pass import CachePass
from qmix.nn.cache_rows import CacheRows
from qmix.nn.linear import Linear, is_observed


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """What every layer needs to know about one forward pass.

    Attributes:
        cos, sin: rotary factors of the new positions, (B or 1, 1, S, d).
        cache: where keys and values are appended; None: there is no past.
        padding_mask, attn_mask: as in kernels.AttentionMask, over the keys that the cache returns.
        attn_implementation: the entry of kernels.attention.
        attentions: each layer appends its weights (B, H, S, L) here, oldest key first; None:
            weights are not computed.
    """

    cos: Tensor
    sin: Tensor
    cache: Cache | None = None
    padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    attn_implementation: Implementation = "sdpa"
    attentions: list[Tensor] | None = None

    @classmethod
    def without_past(
        cls,
        config: MixtralConfig,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        kv: KVFormat = "16",
    ) -> "ForwardContext":
        """The context of a pass over the first `tokens` positions.

        Args:
            kv: what a cache would make of their keys and values.
        """
        positions = torch.arange(tokens, device=device)[None]
        cos, sin = kernels.rotary(positions, config.head_dim, config.rope_theta, dtype)
        return cls(cos=cos, sin=sin, cache=None if kv == "16" else CachePass(kv))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, causal or in a sliding window."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self._config = config
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size)
        self.fused_qkv: PackedWeight | None = None  # q, k and v as one matrix

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included; None: all before it."""
        return self._config.sliding_window

    @property
    def dropout(self) -> float:
        """The share of attention weights that training drops."""
        return self._config.attention_dropout

    @property
    def projections(self) -> tuple[Linear, Linear, Linear, Linear]:
        """The projections of queries, keys and values, and the output projection."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def store_fused_qkv(self, whole: PackedWeight, parts: Sequence[PackedWeight]) -> None:
        """Replace q, k and v by one matrix, and each by its part of that matrix."""
        for module, part in zip(self.projections[:3], parts, strict=True):
            module.store(part)
        self.fused_qkv = whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.fused_qkv is not None:
            device = fn(torch.empty(0, device=self.fused_qkv.device)).device
            if device != self.fused_qkv.device:
                self.fused_qkv = None  # moved: q, k and v are separate weights again
        return self

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> queries (B, S, H * d), keys and values (B, S, G * d).

        With an adapter or a hook on one of them, each is called by itself.
        """
        parts = self.projections[:3]
        plain = all(type(part) is Linear and not is_observed(part) for part in parts)
        if plain and self.fused_qkv is not None:
            widths = [part.out_features for part in parts]
            q, k, v = kernels.linear(x, self.fused_qkv).split_with_sizes(widths, -1)
        elif plain:
            q, k, v = kernels.linears(x, [part.stored for part in parts])
        else:
            q, k, v = (part(x) for part in parts)
        return q, k, v

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        batch, new, _ = x.shape
        q, k, v = self._projected(x)
        q = q.view(batch, new, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, new, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, new, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = kernels.apply_rotary(q, context.cos, context.sin)
        k = kernels.apply_rotary(k, context.cos, context.sin)
        result: Tensor = self.o_proj(self._attended(q, k, v, context))
        return result

    def attended(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """Attention of one token a row: (B, (H + 2 G) * d) -> (B, 1, H * d).

        Args:
            qkv: queries, keys and values in this order, queries and keys already rotated.
        """
        heads = qkv.view(len(qkv), -1, 1, self.head_dim)
        q, k, v = heads.split_with_sizes([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        return self._attended(q, k, v, context)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        """(B, H, S, d) and (B, G, S, d) -> (B, S, H * d)."""
        if isinstance(context.cache, CacheRows):
            rows = zip(q, k, v, context.cache.rows, strict=True)
            parts = [
                self._attended(q1[None], k1[None], v1[None], replace(context, cache=row))
                for q1, k1, v1, row in rows
            ]
            return torch.cat(parts)
        batch, _, new, _ = q.shape
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v, in_order=context.attentions is not None)
        dropout = self.dropout if self.training else 0.0
        mask = AttentionMask(self.window, context.padding_mask, context.attn_mask)
        if context.attentions is not None:
            out, weights = attention_with_weights(q, k, v, mask, dropout)
            context.attentions.append(weights)
        else:
            out = kernels.attend(
                q, k, v, mask, dropout=dropout, implementation=context.attn_implementation
            )
        return out.transpose(1, 2).reshape(batch, new, self.num_heads * self.head_dim)
