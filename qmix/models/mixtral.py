"""MixtralModel: the decoder in the shape of the reference page, arguments checked, outputs named.

Shape letters: B batch, S new positions, L positions seen, D hidden width, H heads. Knows no bits and
no files: those come through qmix.models.load.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.generation.padding import check_embeds, check_prompt, checked_mask
from qmix.models.pretrained import PreTrainedModel
from qmix.nn.cache import Cache, KVCache
from qmix.nn.decoder import Decoder
from qmix.nn.linear import initialise
from qmix.nn.outputs import MoeModelOutputWithPast

Pairs = tuple[tuple[Tensor, Tensor], ...] | list[tuple[Tensor, Tensor]]
Past = Cache | Pairs


class MixtralModel(PreTrainedModel, Decoder):
    """The decoder without a head (reference page, section MixtralModel).

    Raises:
        UnsupportedError: the config names an attn_implementation that is not here.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        initialise(self, config)
        self.set_attn_implementation(config.extra.get("attn_implementation"))

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """All modules by their checkpoint names, which a model without a head prefixes by "model."."""
        return {f"model.{name}": module for name, module in self.named_modules()}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """One pass over (B, S) new positions.

        Args:
            input_ids: int64 (B, S).
            attention_mask: (B, L + S), 0 at padding. Or (B or 1, H or 1, S, L + S) in place of
                causality and window: bool, True is seen, or floats that are added to the scores.
                Where a query sees nothing the output means nothing, but is finite.
            position_ids: int64 (B or 1, S), for the rotary embedding; default L .. L + S - 1.
            past_key_values: the cache of an earlier pass, which is appended to; or a tuple of
                (keys, values), each (B, key-value heads, L, head width), for every layer.
            inputs_embeds: (B, S, D) instead of input_ids.
            use_cache: default: the config's, and False while training.
            output_attentions: weights too. They are computed by eager attention, whatever the
                model's own, with a warning if that is another.
            output_hidden_states, output_router_logits: default: the config's.
            return_dict: False gives a plain tuple of the fields that are not None.

        Raises:
            UsageError: ids outside the vocabulary, a wrong shape, another model's cache, both or
                neither kind of input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            assert input_ids is not None
            check_prompt(input_ids, None)
            inputs_embeds = self.embed(input_ids)
        check_embeds(inputs_embeds, None, self.config.hidden_size)
        batch, new = inputs_embeds.shape[:2]
        cache = self._cache(past_key_values, use_cache, batch, new)
        past = cache.length if cache is not None else 0
        if position_ids is not None and position_ids.shape not in ((batch, new), (1, new)):
            raise _wrong_shape("position_ids", f"[{batch}, {new}]", position_ids)
        padding_mask, attn_mask = self._masks(attention_mask, batch, past, new)
        output_weights = self._asked(output_attentions, "output_attentions")
        if output_weights and self.attn_implementation != "eager":
            warnings.warn(
                f"{self.attn_implementation} attention has no weights to give: output_attentions "
                "computes them by eager attention",
                stacklevel=2,
            )
        decoded = self.decode(
            inputs_embeds,
            padding_mask=padding_mask,
            attn_mask=attn_mask,
            position_ids=position_ids,
            cache=cache,
            output_hidden_states=self._asked(output_hidden_states, "output_hidden_states"),
            output_attentions=output_weights,
        )
        routers = self._asked(output_router_logits, "output_router_logits")
        out = MoeModelOutputWithPast(
            last_hidden_state=decoded.hidden,
            past_key_values=cache,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            router_logits=decoded.router_logits if routers else None,
        )
        return out if self._wants_dict(return_dict) else out.to_tuple()

    def _asked(self, given: bool | None, field: str) -> bool:
        return bool(getattr(self.config, field, False) if given is None else given)

    def _cache(
        self, past: Past | None, use_cache: bool | None, batch: int, new: int
    ) -> Cache | None:
        if isinstance(past, (tuple, list)):
            past = KVCache.from_legacy_cache(self.config, past)
        if isinstance(past, KVCache):
            past.check_compatible(self.new_cache(batch))
        elif past is not None and not isinstance(past, Cache):
            raise UsageError(
                "not a cache of qmix",
                where="past_key_values",
                found=type(past).__name__,
                remedy="qmix.hf.adapt(model) takes the caches of transformers.",
            )
        default = self.config.use_cache and not self.training
        if past is None and (default if use_cache is None else use_cache):
            return self.new_cache(batch, new)
        return past

    def _masks(
        self, given: Tensor | None, batch: int, past: int, new: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of columns and the mask of pairs that an attention_mask stands for."""
        if given is None:
            return None, None
        given = checked_mask(given).to(self.device)
        columns = past + new
        if given.dim() == 4:
            heads = self.config.num_attention_heads
            rows, per_head, queries, keys = given.shape
            fits = rows in (1, batch) and per_head in (1, heads)
            if not fits or (queries, keys) != (new, columns):
                expected = f"[{batch} or 1, {heads} or 1, {new}, {columns}]"
                raise _wrong_shape("attention_mask", expected, given)
            if given.dtype != torch.bool and not given.is_floating_point():
                raise UsageError(
                    "wrong dtype",
                    where="attention_mask",
                    expected="bool, or floats to add to the scores, for a mask of 4 axes",
                    found=given.dtype,
                )
            return None, given
        if tuple(given.shape) != (batch, columns):
            expected = f"[{batch}, {columns}], past and new positions"
            raise _wrong_shape("attention_mask", expected, given)
        padding_mask = given.bool()
        return None if bool(
            padding_mask.all()
        ) else padding_mask, None  # the unmasked attention is faster


def _wrong_shape(where: str, expected: str, found: Tensor) -> UsageError:
    return UsageError("wrong shape", where=where, expected=expected, found=list(found.shape))
