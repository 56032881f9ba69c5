"""MixtralModel: the decoder behind Hugging Face's interface, arguments checked, outputs named.

Knows no bits and no files: those come through qmix.models.load. Shape letters as in qmix.nn.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.config_rules import MAX_POSITIONS
from qmix.errors import UsageError
from qmix.generation.padding import check_embeds, check_prompt, checked_mask, without_full_mask
from qmix.models.inputs import DecoderInputs, Inputs, Past, takes
from qmix.models.pretrained import PreTrainedModel
from qmix.nn.cache import Cache, KVCache
from qmix.nn.decoder import Decoder
from qmix.nn.linear import initialise
from qmix.nn.outputs import MoeModelOutputWithPast


class MixtralModel(PreTrainedModel, Decoder):
    """The decoder without a head: ids or embeddings in, hidden states out.

    Raises:
        UnsupportedError: the config names an attn_implementation that is not here.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        initialise(self, config)
        self.set_attn_implementation(config.extra.get("attn_implementation"))

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """All modules by their checkpoint names, which begin with "model." as below a head."""
        return {f"model.{name}": module for name, module in self.named_modules()}

    @takes(DecoderInputs)
    def forward(self, inputs: DecoderInputs) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """One pass over (B, S) new positions.

        Args:
            input_ids: int64 (B, S).
            attention_mask: (B, L), 0 at padding; L counts past and new positions. Or (B or 1,
                H or 1, S, L), which replaces causality and window: bool, True where a key is seen,
                or floats that are added to the scores. For a fully masked query the output is
                undefined but finite.
            position_ids: int64 (B or 1, S), for the rotary embedding; default L - S .. L - 1.
            past_key_values: the cache of an earlier pass, to which this one appends; or a tuple of
                (keys, values), each (B, key-value heads, L - S, head width), for every layer.
            inputs_embeds: (B, S, D) instead of input_ids.
            use_cache: default: the config's, and False while training.
            output_attentions: return attention weights too. They are computed by eager attention,
                with a warning if the model's own is another.
            output_hidden_states, output_router_logits: default: the config's.
            return_dict: False returns a plain tuple of the fields that are not None.

        Raises:
            UsageError: ids outside the vocabulary, a wrong shape, another model's cache, both or
                neither kind of input.
        """
        x = self._embeds(inputs)
        batch, new = x.shape[:2]
        cache = self._cache(inputs.past_key_values, inputs.use_cache, batch, new)
        past = cache.length if cache is not None else 0
        position_ids = inputs.position_ids
        if position_ids is not None:
            _check_positions(position_ids, batch, new)
        padding_mask, attn_mask = self._masks(inputs.attention_mask, batch, past, new)
        decoded = self.decode(
            x,
            padding_mask=padding_mask,
            attn_mask=attn_mask,
            position_ids=position_ids,
            cache=cache,
            output_hidden_states=self._flag(inputs.output_hidden_states, "output_hidden_states"),
            output_attentions=self._output_attentions(inputs.output_attentions),
        )
        routers = self._flag(inputs.output_router_logits, "output_router_logits")
        return self._returned(
            inputs.return_dict,
            MoeModelOutputWithPast(
                last_hidden_state=decoded.hidden,
                past_key_values=cache,
                hidden_states=decoded.hidden_states,
                attentions=decoded.attentions,
                router_logits=decoded.router_logits if routers else None,
            ),
        )

    def _embeds(self, inputs: Inputs) -> Tensor:
        """(B, S, D) of the ids, or as given."""
        if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds")
        embeds = inputs.inputs_embeds
        if embeds is None:
            assert inputs.input_ids is not None
            check_prompt(inputs.input_ids, None)
            embeds = self.embed(inputs.input_ids)
        check_embeds(embeds, None, self.config.hidden_size)
        return embeds

    def _output_attentions(self, value: bool | None) -> bool:
        output_attentions = self._flag(value, "output_attentions")
        if output_attentions and self.attn_implementation != "eager":
            warnings.warn(
                f"{self.attn_implementation} attention returns no weights: output_attentions "
                "computes them by eager attention",
                stacklevel=2,
            )
        return output_attentions

    def _flag(self, value: bool | None, field: str) -> bool:
        """An argument's value, or else the config's."""
        return bool(getattr(self.config, field, False) if value is None else value)

    def _cache(
        self, past: Past | None, use_cache: bool | None, batch: int, new: int
    ) -> Cache | None:
        if isinstance(past, (tuple, list)):
            past = KVCache.from_legacy_cache(self.config, past, self.kv)
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
        self, mask: Tensor | None, batch: int, past: int, new: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(padding mask (B, L), attention mask of four axes); at most one of them is not None."""
        if mask is None:
            return None, None
        mask = checked_mask(mask).to(self.device)
        columns = past + new
        if mask.dim() == 4:
            heads = self.config.num_attention_heads
            rows, per_head, queries, keys = mask.shape
            fits = rows in (1, batch) and per_head in (1, heads)
            if not fits or (queries, keys) != (new, columns):
                expected = f"[{batch} or 1, {heads} or 1, {new}, {columns}]"
                raise _wrong_shape("attention_mask", expected, mask)
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise UsageError(
                    "wrong dtype",
                    where="attention_mask",
                    expected="bool, or floats to add to the scores, for a mask of 4 axes",
                    found=mask.dtype,
                )
            return None, mask
        if tuple(mask.shape) != (batch, columns):
            expected = f"[{batch}, {columns}], past and new positions"
            raise _wrong_shape("attention_mask", expected, mask)
        return without_full_mask(mask.bool(), self.device), None


def _wrong_shape(where: str, expected: str, tensor: Tensor) -> UsageError:
    return UsageError("wrong shape", where=where, expected=expected, found=list(tensor.shape))


def _check_positions(position_ids: object, batch: int, new: int) -> None:
    integers = isinstance(position_ids, Tensor) and position_ids.dtype in (torch.int64, torch.int32)
    if not isinstance(position_ids, Tensor) or not integers:
        raise UsageError(
            "not positions",
            where="position_ids",
            expected=f"an int64 or int32 tensor [{batch}, {new}]",
            found=position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids),
        )
    if position_ids.shape not in ((batch, new), (1, new)):
        raise _wrong_shape("position_ids", f"[{batch}, {new}]", position_ids)
    if not position_ids.is_cuda and not bool(  # on a GPU the check would wait for it
        ((position_ids >= 0) & (position_ids < MAX_POSITIONS)).all()
    ):
        raise UsageError(
            "no such position",
            where="position_ids",
            expected=f"0 to {MAX_POSITIONS - 1}",
            found=f"{int(position_ids.min())} to {int(position_ids.max())}",
        )
