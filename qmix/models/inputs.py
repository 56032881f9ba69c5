"""The arguments of the models' forward passes, each declared once, in Hugging Face's order.

Knows no model. MixtralModel.forward says what each argument means.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

from torch import Tensor

from qmix.nn.cache import Cache

Pairs = tuple[tuple[Tensor, Tensor], ...] | list[tuple[Tensor, Tensor]]
Past = Cache | Pairs

InputsT = TypeVar("InputsT", bound="Inputs")
Output = TypeVar("Output")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What every forward takes first."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Past | None = None
    inputs_embeds: Tensor | None = None

    def for_decoder(self) -> dict[str, Any]:
        """The keyword arguments of the same pass without the head."""
        names = {field.name for field in fields(DecoderInputs)}
        shared = {name: value for name, value in vars(self).items() if name in names}
        return {**shared, "return_dict": True}


@dataclass(frozen=True, eq=False)
class DecoderInputs(Inputs):
    """The arguments of MixtralModel.forward."""

    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_router_logits: bool | None = None
    return_dict: bool | None = None


@dataclass(frozen=True, eq=False)
class CausalLMInputs(Inputs):
    """The arguments of MixtralForCausalLM.forward."""

    labels: Tensor | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_router_logits: bool | None = None
    return_dict: bool | None = None
    logits_to_keep: int | Tensor = 0


@dataclass(frozen=True, eq=False)
class ClassifierInputs(Inputs):
    """The arguments of MixtralForSequenceClassification.forward."""

    labels: Tensor | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None
    output_router_logits: bool | None = None


def takes(
    inputs: type[InputsT],
) -> Callable[[Callable[[Any, InputsT], Output]], Callable[..., Output]]:
    """Turn a method that takes `inputs` into one that takes its fields, by position or by name.

    `inspect.signature` shows the fields.
    """

    def decorate(method: Callable[[Any, InputsT], Output]) -> Callable[..., Output]:
        @wraps(method)
        def forward(self: Any, *arguments: Any, **options: Any) -> Output:
            return method(self, inputs(*arguments, **options))

        self_parameter = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [self_parameter, *signature(inputs).parameters.values()]
        forward.__signature__ = signature(method).replace(  # type: ignore[attr-defined]
            parameters=parameters
        )
        return forward

    return decorate
