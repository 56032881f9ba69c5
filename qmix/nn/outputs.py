"""What the public models return, by the names of Hugging Face's outputs.

Shape letters: B batch, S new positions, D hidden width, H heads, K keys shown, E experts,
V vocabulary, C labels. Knows nothing of how any of it is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, overload

from torch import Tensor

from qmix.nn.cache import Cache


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """Fields by attribute, by key, and by place among those that are not None.

    `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, `dict(out)`, `out.to_tuple()`; iteration
    gives the keys. A field that is None has neither key nor place.
    """

    def keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def values(self) -> tuple[Any, ...]:
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """What `return_dict=False` gives: the fields in order, those left out that are None."""
        return tuple(getattr(self, name) for name in self.keys())

    @overload
    def __getitem__(self, key: str | int) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


@dataclass(frozen=True, eq=False)
class MoeModelOutputWithPast(ModelOutput):
    """What MixtralModel returns.

    Attributes:
        last_hidden_state: after the final norm, (B, S, D).
        past_key_values: the cache, the new positions included; None without use_cache.
        hidden_states: the input of every layer, (B, S, D) each, and last `last_hidden_state`.
        attentions: weights after the softmax, one (B, H, S, K) a layer, 0 where a query does not
            see a key. K counts the past and new positions, or with a window those still held.
        router_logits: raw, before the softmax, one (B * S, E) a layer.

    The last three are None unless asked for.
    """

    last_hidden_state: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class MoeCausalLMOutputWithPast(ModelOutput):
    """What MixtralForCausalLM returns.

    Attributes:
        loss: mean cross-entropy of the shifted labels, plus router_aux_loss_coef * aux_loss if the
            router logits were asked for; None without labels.
        aux_loss: the load-balancing loss; None unless router logits were asked for.
        logits: float32 (B, S or the positions kept, V).
        past_key_values, hidden_states, attentions, router_logits: as in MoeModelOutputWithPast.
    """

    loss: Tensor | None
    aux_loss: Tensor | None
    logits: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """What MixtralForSequenceClassification returns.

    Attributes:
        loss: by problem_type; None without labels.
        logits: float32 (B, C), from the last position of each row that is no padding.
        past_key_values, hidden_states, attentions: as in MoeModelOutputWithPast.
        router_logits: as there; Hugging Face's class of this name has no such field.
    """

    loss: Tensor | None
    logits: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """What `generate` returns with return_dict_in_generate.

    Attributes:
        sequences: int64 (B, P + N), or the N new ids after inputs_embeds.
        scores: one float32 (B, V) a step, after all processors; None unless output_scores.
        logits: one float32 (B, V) a step, before them; None unless output_logits.
        past_key_values: the cache, all columns but the newest; None without use_cache.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None
