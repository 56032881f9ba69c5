"""The decoder: embedding, layers, final norm; hidden states in, hidden states out.

Knows no bits, no files and no text.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.experts.store import Store
from qmix.kernels.attention import Implementation
from qmix.kernels.backend import Backend, preferred
from qmix.kv_format import KVFormat
from qmix.nn.attention import ForwardContext
from qmix.nn.cache import Cache
from qmix.nn.cpu_decode import WhyNot, decode_tokens
from qmix.nn.decoder_layer import DecoderLayer, compiled_whole
from qmix.nn.embedding import Embedding, check_ids
from qmix.nn.linear import RMSNorm
from qmix.nn.moe import SparseMoeBlock
from qmix.nn.process import MadeHere


@dataclass(frozen=True, eq=False)
class Decoded:
    """The results of a pass through the decoder.

    Attributes:
        hidden: after the final norm, (B, S, D).
        router_logits: before the softmax, one (B * S, E) per layer.
        hidden_states: the input of every layer and, last, `hidden`; None unless asked for.
        attentions: weights (B, H, S, keys in the cache), one per layer; None unless asked for.
    """

    hidden: Tensor
    router_logits: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def expert_use(self, chosen: int) -> Tensor:
        """1 where an expert computed a position, else 0: int64 (layers, B * S, E).

        Args:
            chosen: experts that each position goes through.
        """
        logits = torch.stack(self.router_logits)
        ids = kernels.route(logits.flatten(0, 1), chosen).ids.view(*logits.shape[:2], chosen)
        return expert_use(ids, logits.shape[-1])


def expert_use(expert_ids: Tensor, experts: int) -> Tensor:
    """1 where an expert is among the chosen ones (..., k), else 0: int64 (..., experts)."""
    use = expert_ids.new_zeros(*expert_ids.shape[:-1], experts)
    return use.scatter_(-1, expert_ids, 1)


class Decoder(nn.Module):
    """embed_tokens, layers, norm."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        config.mark_built()
        self.attn_implementation: Implementation = "sdpa"
        self.backend: Backend = "qmix"
        self.kv: KVFormat = "16"  # of caches that are made for it
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.made_here = MadeHere()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.config.mark_built()  # a copy's config is a copy

    @property
    def experts_store(self) -> Store | None:
        """The store that keeps the experts, if one does; the layers share it."""
        for module in self.layers.modules():  # ends in the first layer, which may be wrapped
            if isinstance(module, SparseMoeBlock):
                return module.offloaded
        return None

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D).

        Raises:
            UsageError: an id outside the vocabulary.
        """
        check_ids(input_ids, self.embed_tokens.num_embeddings)
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded

    def decode(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        attn_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Decoded:
        """Run embedded positions (B, S, D) through all layers, after those in `cache`.

        Args:
            padding_mask: bool (B, L), False at padding; None: no padding.
            position_ids: (B or 1, S), for the rotary embedding; default: L - S .. L - 1.
            attn_mask: (B or 1, H or 1, S, L), replaces causality, window and `padding_mask`.
            output_hidden_states, output_attentions: return them too. The weights are computed by
                eager attention, whatever the model's implementation is.

        Raises:
            UnsupportedError: the process was forked after the model was made; see MadeHere.
        """
        self.made_here.check(x.device)
        new = x.shape[1]
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x.device)[None]
        cos, sin = kernels.rotary(
            position_ids.to(x.device), self.config.head_dim, self.config.rope_theta, x.dtype
        )
        if cache is not None:
            padding_mask, attn_mask = (
                None if mask is None else cache.align_mask(mask, new, in_order=output_attentions)
                for mask in (padding_mask, attn_mask)
            )
        context = ForwardContext(
            cos=cos,
            sin=sin,
            cache=cache,
            padding_mask=padding_mask,
            attn_mask=attn_mask,
            attn_implementation=self.attn_implementation,
            attentions=[] if output_attentions else None,
        )
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        layers = partial(self._through_layers, x, context, hidden_states)
        store = self.experts_store
        with preferred(self.backend):
            x, router_logits = layers() if store is None else store.in_turn(layers)
            if cache is not None:
                cache.advance(new)
            x = self.norm(x)
        return Decoded(
            hidden=x,
            router_logits=tuple(router_logits),
            hidden_states=None if hidden_states is None else (*hidden_states, x),
            attentions=None if context.attentions is None else tuple(context.attentions),
        )

    def _through_layers(
        self, x: Tensor, context: ForwardContext, hidden_states: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, S, D) -> (B, S, D) and the router logits of each layer.

        Args:
            hidden_states: the input of each layer is appended here; None: nobody asks for them.
        """
        if hidden_states is None:
            outcome = decode_tokens(map(compiled_whole, self.layers), x, context)
            if not isinstance(outcome, WhyNot):
                return outcome
        router_logits: list[Tensor] = []
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            x, logits = layer(x, context)
            router_logits.append(logits)
        return x, router_logits
