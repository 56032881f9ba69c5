"""The parts of a Mixtral layer as modules: linear, norm, attention, router, experts.

Shape letters: B batch, S new positions, D hidden width, H heads, G key-value heads, d head width,
T = B * S tokens, E experts. Knows no bits, no files, no tiers: products go through qmix.kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix import kernels
from qmix.cache import Cache
from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.experts.store import Store, StoredExperts
from qmix.kernels import Packed, PackedExperts, Routes
from qmix.kernels.attention import Implementation, Sight, weighted
from qmix.weights.dense import Dense, Weight
from qmix.weights.expert import Expert, Resident

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, eq=False)
class Step:
    """What every layer needs to know of one forward pass.

    Attributes:
        cos, sin: rotary factors of the new positions, (B or 1, 1, S, d).
        keep: bool (B, L), False at padding, over the keys that the cache shows; None keeps all.
        cache: where keys and values are appended; None runs without a past.
        mask: (B or 1, H or 1, S, L) in place of causality, window and keep: bool, True is seen, or
            floats added to the scores; None for the usual.
        attn_implementation: the row of kernels.attention.
        attentions: each layer adds its weights (B, H, S, L) here, oldest key first; None computes
            none.
    """

    cos: Tensor
    sin: Tensor
    keep: Tensor | None
    cache: Cache | None
    mask: Tensor | None = None
    attn_implementation: Implementation = "sdpa"
    attentions: list[Tensor] | None = None


class Linear(nn.Module):
    """A bias-free linear layer over any Weight: a trainable parameter when dense.

    `weight` is None while a packed weight is stored; `stored` is the Weight in either case.
    """

    weight: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self._packed: Weight | None = None

    @property
    def stored(self) -> Weight:
        if self._packed is not None:
            return self._packed
        assert self.weight is not None
        return Dense(self.weight)

    @property
    def hooked(self) -> bool:
        """Whether a caller wants to see each call."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)

    def store(self, weight: Weight) -> None:
        """Replace the weight; the shape [out_features, in_features] must stay."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        if isinstance(weight, Dense):
            self.weight = nn.Parameter(weight.data)
            self._packed = None
        else:
            self.weight = None
            self._packed = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return kernels.linear(x, self.stored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._packed is not None:
            # Codes and scales follow the device; a change of dtype must not round the scales.
            probe = fn(torch.empty(0, device=self._packed.device))
            self._packed = self._packed.to(probe.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self._packed is not None:
            raise UsageError(
                "a packed weight does not fit a state_dict",
                where=f"{prefix}weight",
                remedy="Use save_pretrained, which writes packed weights too.",
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.stored.scheme}"


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, causal or in a sliding window."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.dropout = config.attention_dropout
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size)
        self.joined: Packed | None = None  # q, k and v as one matrix

    @property
    def projections(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Of queries, keys, values and the output."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def store_joined(self, whole: Packed, parts: Sequence[Packed]) -> None:
        """Replace q, k and v by one matrix and its parts."""
        for module, part in zip(self.projections[:3], parts, strict=True):
            module.store(part)
        self.joined = whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not isinstance(self.q_proj.stored, Packed):
            self.joined = None  # moved: three standard weights again
        return self

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> queries (B, S, H * d), keys and values (B, S, G * d)."""
        parts = self.projections[:3]
        if self.joined is not None:
            widths = [part.out_features for part in parts]
            q, k, v = kernels.linear(x, self.joined).split_with_sizes(widths, -1)
        elif all(type(part) is Linear and not part.hooked for part in parts):
            q, k, v = kernels.linears(x, [part.stored for part in parts])
        else:
            q, k, v = (part(x) for part in parts)
        return q, k, v

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        batch, new, _ = x.shape
        q, k, v = self._projected(x)
        q = q.view(batch, new, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, new, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, new, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = kernels.apply_rotary(q, step.cos, step.sin)
        k = kernels.apply_rotary(k, step.cos, step.sin)
        result: Tensor = self.o_proj(self._attended(q, k, v, step))
        return result

    def attended(self, qkv: Tensor, step: Step) -> Tensor:
        """One token's rotated queries and keys and its values, one after another, to (1, 1, H * d)."""
        heads = qkv.view(1, -1, 1, self.head_dim)
        q, k, v = heads.split_with_sizes([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        return self._attended(q, k, v, step)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """(B, H, S, d) and (B, G, S, d) -> (B, S, H * d)."""
        batch, _, new, _ = q.shape
        if step.cache is not None:
            k, v = step.cache.append(self.layer, k, v, in_order=step.attentions is not None)
        dropout = self.dropout if self.training else 0.0
        if step.attentions is not None:
            out, weights = weighted(q, k, v, Sight(self.window, step.keep, step.mask, dropout))
            step.attentions.append(weights)
        else:
            out = kernels.attend(
                q,
                k,
                v,
                window=self.window,
                keep=step.keep,
                dropout=dropout,
                mask=step.mask,
                implementation=step.attn_implementation,
            )
        return out.transpose(1, 2).reshape(batch, new, self.num_heads * self.head_dim)


class SwiGLU(nn.Module):
    """One expert: w1 (gate), w2 (down), w3 (up). Multiplied by kernels.experts, never called."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.intermediate_size)
        self.w2 = Linear(config.intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.intermediate_size)

    @property
    def stored(self) -> Expert:
        return Expert(w1=self.w1.stored, w2=self.w2.stored, w3=self.w3.stored)


class SparseMoeBlock(nn.Module):
    """Router and experts: every token through its top-k of E (arXiv 2401.04088, section 2.1)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.jitter_noise = config.router_jitter_noise
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(config.num_local_experts))
        self._whole: PackedExperts | StoredExperts | None = None

    @property
    def stored(self) -> Sequence[Expert]:
        """The experts' weights, as a whole if they lie in packed order or in a store."""
        if self._whole is not None:
            return self._whole
        return list(self._resident)

    @property
    def _resident(self) -> Resident:
        return Resident(len(self.experts), lambda index: cast(SwiGLU, self.experts[index]).stored)

    @property
    def offloaded(self) -> Store | None:
        """The store that keeps the experts, if one does."""
        return self._whole.store if isinstance(self._whole, StoredExperts) else None

    def store(self, experts: PackedExperts | StoredExperts) -> None:
        """Replace the experts' weights."""
        for module, expert in zip(self.experts, experts, strict=True):
            assert isinstance(module, SwiGLU)
            module.w1.store(expert.w1)
            module.w2.store(expert.w2)
            module.w3.store(expert.w3)
        self._whole = experts

    def placed(self) -> list[Weight | None]:
        """What w1, w3 and w2 of each expert hold in 4 bits; none of a store's, which come and go."""
        if self._whole is not None:
            return []
        return [
            getattr(modules.get(name), "_packed", None)
            for modules in (expert._modules for expert in self.experts._modules.values())
            for name in ("w1", "w3", "w2")
        ]

    def release(self) -> None:
        """Let the experts' weights go, until others are stored."""
        for expert in self.experts:
            assert isinstance(expert, SwiGLU)
            for module in (expert.w1, expert.w2, expert.w3):
                shape = (module.out_features, module.in_features)
                module.store(Dense(torch.empty(shape, device="meta")))
        self._whole = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the raw router logits (B * S, E)."""
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        tokens = x.reshape(-1, x.shape[-1])
        logits: Tensor = self.gate(tokens)
        routes = kernels.route(logits, self.num_experts_per_tok)
        return self.routed(tokens, routes).view_as(x), logits

    def routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        """Tokens through the experts that were chosen for them: (T, D) -> (T, D)."""
        if isinstance(self._whole, StoredExperts):
            return self._whole.product(tokens, routes, self.act)
        whole = self._whole if self._whole is not None else self._resident
        return kernels.experts(tokens, routes, whole, self.act)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseMoeBlock":
        if isinstance(self._whole, StoredExperts):
            self.gate._apply(fn, recurse)  # a store's experts lie in several memories, and stay
            return self
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._whole is not None and self._whole[0].w1 is not self._first().w1.stored:
            self._whole = None  # moved: its experts are standard weights again
        return self

    def _first(self) -> SwiGLU:
        first = self.experts[0]
        assert isinstance(first, SwiGLU)
        return first


def initialise(module: nn.Module, config: MixtralConfig) -> None:
    """Plain N(0, initializer_range) for linear and embedding weights, ones for norms.

    The embedding of pad_token_id is zero.
    """
    pad = config.pad_token_id
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, config.initializer_range)
            if (
                name.endswith("embed_tokens.weight")
                and pad is not None
                and 0 <= pad < len(parameter)
            ):
                parameter[pad] = 0.0
