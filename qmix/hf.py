"""A face for transformers: its pipelines, its beams and what is built on them drive a qmix model.

    import transformers
    from qmix import hf, load
    model, tokenizer = load("mixtral-nf4")
    pipe = transformers.pipeline("text-generation", model=hf.adapt(model), tokenizer=hf.tokenizer(tokenizer))
    harness = lm_eval.models.huggingface.HFLM(hf.adapt(model), tokenizer=hf.tokenizer(tokenizer))

Importing this file imports transformers; nothing else in qmix does. Made and tested for
transformers 5.23.0. Weights, layers and kernels stay qmix's; masks, caches and generation are
transformers'. Shape letters as in qmix.nn.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.models import causal_lm
from qmix.text.tokenizer import LlamaTokenizer

try:
    import transformers
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise UnsupportedError(
        "qmix.hf needs transformers",
        found=str(error)[:120],
        remedy="pip install 'qmix-runtime[hf]'.",
    ) from error

# What belongs to this checkpoint's files, or what transformers would act upon.
_LEFT_OUT = ("architectures", "attn_implementation", "model_type", "quantization_config")


def adapt(model: causal_lm.MixtralForCausalLM) -> "MixtralForCausalLM":
    """A transformers model over the same weights; nothing is copied."""
    return MixtralForCausalLM(model)


def tokenizer(own: LlamaTokenizer) -> "Tokenizer":
    """A transformers tokenizer that gives the same ids.

    Special tokens typed into a text become control tokens, as everywhere in transformers.
    """
    return Tokenizer(own)


class _Columns:
    """A transformers cache in the words of qmix.nn.cache.Cache."""

    def __init__(self, cache: Any) -> None:
        if isinstance(cache, transformers.StaticCache):
            raise UnsupportedError(
                "a cache of fixed size shows positions that are not there yet",
                where="past_key_values",
                expected="a DynamicCache",
                found=type(cache).__name__,
            )
        self.cache = cache
        self.length = int(cache.get_seq_length())

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        held: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer)
        return held

    def align_mask(self, columns: Tensor, new: int, *, in_order: bool = False) -> Tensor:
        """The columns that a sliding layer still holds, and the new ones."""
        layers = self.cache.layers
        keys = layers[0].keys if layers and layers[0].is_initialized else None
        held = 0 if keys is None else keys.shape[-2]
        return columns[..., columns.shape[-1] - held - new :]

    def advance(self, positions: int) -> None:
        self.length += positions


class MixtralForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc]
    """A qmix model as transformers wants its models. Made by `adapt`.

    Its name is one that transformers' pipelines know.
    """

    config_class = transformers.MixtralConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, model: causal_lm.MixtralForCausalLM) -> None:
        document = {k: v for k, v in model.config.to_dict().items() if k not in _LEFT_OUT}
        super().__init__(transformers.MixtralConfig(**document))
        self.runtime = model
        own = model.generation_config
        self.generation_config = transformers.GenerationConfig(
            eos_token_id=list(own.eos_ids) or None,
            pad_token_id=own.pad_id,
            bos_token_id=own.bos_token_id,
        )

    def get_input_embeddings(self) -> Any:
        return self.runtime.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> Any:
        """One pass over (B, S) new positions: transformers' CausalLMOutputWithPast."""
        if past_key_values is None and use_cache:
            past_key_values = transformers.DynamicCache(config=self.config)
        out = self.runtime(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=None if past_key_values is None else _Columns(past_key_values),
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )
        found = CausalLMOutputWithPast(
            loss=out.loss,
            logits=out.logits,
            past_key_values=past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return found if return_dict in (None, True) else found.to_tuple()


class Tokenizer(transformers.PreTrainedTokenizer):  # type: ignore[misc]
    """A qmix tokenizer as transformers wants its tokenizers. Made by `tokenizer`."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, own: LlamaTokenizer) -> None:
        self._own = own
        super().__init__(
            bos_token=own.bos_token,
            eos_token=own.eos_token,
            unk_token=own.unk_token,
            pad_token=own.pad_token or own.eos_token,
            padding_side="left",
        )

    @property
    def vocab_size(self) -> int:
        return len(self._own)

    def get_vocab(self) -> dict[str, int]:
        return self._own.get_vocab()

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        names = self._own.convert_ids_to_tokens(self._own.encode(text, add_special_tokens=False))
        return [names] if isinstance(names, str) else names

    def _convert_token_to_id(self, token: str) -> int | list[int | None] | None:
        return self._own.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, index: int) -> str | list[str]:
        return self._own.convert_ids_to_tokens(index)

    def _decode(self, token_ids: int | list[int], *rest: Any, **options: Any) -> str:
        """Text; ids without a begin token in front go on with a text, so their first space stays."""
        text: str = super()._decode(token_ids, *rest, **options)
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = self._own.pieces
        goes_on = bool(ids) and ids[0] not in pieces.controls and pieces.drops_first_space
        return " " + text if goes_on and pieces.texts[ids[0]].startswith(" ") else text

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        ids = self._own.convert_tokens_to_ids(list(tokens))
        assert isinstance(ids, list)
        return self._own.decode([index for index in ids if index is not None])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        front = [self._own.bos_token_id] if self._own.add_bos_token else []
        return [*(i for i in front if i is not None), *token_ids_0, *(token_ids_1 or [])]
