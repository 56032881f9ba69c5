"""What the public models return, by the names of Hugging Face's outputs.

Knows nothing of how any of it is computed. Shape letters: see qmix.nn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, overload

from torch import Tensor

from qmix.nn.cache import Cache


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelOutput:
    """Fields by attribute, by key, and by index among those that are not None.

    `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, `dict(out)`, `out.to_tuple()`; iteration
    gives the keys. A field that is None has neither key nor index. A class's own fields come
    before those that it inherits.
    """

    def keys(self) -> tuple[str, ...]:
        """The names of the fields that are not None."""
        bases = [base for base in type(self).__bases__ if is_dataclass(base)]
        inherited = [field.name for base in bases for field in fields(base)]
        own = [field.name for field in fields(self) if field.name not in inherited]
        return tuple(name for name in (*own, *inherited) if getattr(self, name) is not None)

    def values(self) -> tuple[Any, ...]:
        """The fields that are not None, in the order of `keys`."""
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Names and values of the fields that are not None."""
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """What `return_dict=False` returns: all fields that are not None, in order."""
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


@dataclass(frozen=True, eq=False, kw_only=True)
class _OutputWithPast(ModelOutput):
    """What every model returns beside its result; see MoeModelOutputWithPast."""

    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class MoeModelOutputWithPast(_OutputWithPast):
    """What MixtralModel returns.

    Attributes:
        last_hidden_state: after the final norm, (B, S, D).
        past_key_values: the cache, including the new positions; None without use_cache.
        hidden_states: the input of every layer, (B, S, D) each, and last `last_hidden_state`.
        attentions: attention weights after the softmax, one (B, H, S, keys) per layer; 0 where a
            query does not see a key. The keys are all L, or with a window those still stored.
        router_logits: before the softmax, one (B * S, E) per layer.

    The last three are None unless asked for.
    """

    last_hidden_state: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class MoeCausalLMOutputWithPast(_OutputWithPast):
    """What MixtralForCausalLM returns.

    Attributes:
        loss: mean cross-entropy of the shifted labels, plus router_aux_loss_coef * aux_loss if the
            router logits were asked for; None without labels.
        aux_loss: the load-balancing loss; None unless router logits were asked for.
        logits: float32 (B, S, V), or of the positions in logits_to_keep.
        past_key_values, hidden_states, attentions, router_logits: see MoeModelOutputWithPast.
    """

    loss: Tensor | None
    aux_loss: Tensor | None
    logits: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceClassifierOutputWithPast(_OutputWithPast):
    """What MixtralForSequenceClassification returns.

    Attributes:
        loss: by problem_type; None without labels.
        logits: float32 (B, C), from the last position of each row that is not padding.
        past_key_values, hidden_states, attentions, router_logits: see MoeModelOutputWithPast.
            Hugging Face's class of this name has no router_logits.
    """

    loss: Tensor | None
    logits: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class GenerateDecoderOnlyOutput(ModelOutput):
    """What `generate` returns with return_dict_in_generate.

    Attributes:
        sequences: int64 (B, P + n), or (B, n), the new ids, after inputs_embeds.
        scores: one float32 (B, V) per step, after all processors; None unless output_scores.
        logits: one float32 (B, V) per step, before them; None unless output_logits.
        past_key_values: the cache, with all columns but the newest; None without use_cache.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None
