"""Adapters to transformers: its pipelines, its beam search and their users run a qmix model.

    import transformers
    from qmix import hf, load
    model, tokenizer = load("mixtral-nf4")
    adapted, words = hf.adapt(model), hf.tokenizer(tokenizer)
    pipe = transformers.pipeline("text-generation", model=adapted, tokenizer=words)
    harness = lm_eval.models.huggingface.HFLM(adapted, tokenizer=words)

Importing this file imports transformers; nothing else in qmix does. It is tested with
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

# Fields of the config that describe this checkpoint's files, or that transformers would act upon.
_LEFT_OUT = ("architectures", "attn_implementation", "model_type", "quantization_config")


def adapt(model: causal_lm.MixtralForCausalLM) -> "MixtralForCausalLM":
    """A transformers model over the same weights, none of which is copied."""
    return MixtralForCausalLM(model)


def tokenizer(llama_tokenizer: LlamaTokenizer) -> "Tokenizer":
    """A transformers tokenizer that encodes to the same ids.

    Special tokens that are typed into a text become control tokens, as everywhere in transformers.
    """
    return Tokenizer(llama_tokenizer)


# The output's field: `cache` since transformers 5.24, `past_key_values` before.
_CACHE_FIELD = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


class _Columns:
    """A transformers cache behind the interface of qmix.nn.cache.Cache."""

    def __init__(self, cache: Any) -> None:
        if isinstance(cache, transformers.StaticCache):
            raise UnsupportedError(
                "a cache of fixed size shows positions that are not written yet",
                where="past_key_values",
                expected="a DynamicCache",
                found=type(cache).__name__,
            )
        self.cache = cache
        self.length = int(cache.get_seq_length())

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer)
        return stored

    def align_mask(self, columns: Tensor, new: int, *, in_order: bool = False) -> Tensor:
        """A mask's columns of the positions that a sliding layer still stores, and of the new."""
        layers = self.cache.layers
        keys = layers[0].keys if layers and layers[0].is_initialized else None
        stored_length = 0 if keys is None else keys.shape[-2]
        return columns[..., columns.shape[-1] - stored_length - new :]

    def advance(self, positions: int) -> None:
        self.length += positions


class MixtralForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc]
    """A qmix model that is a transformers model; `adapt` makes one.

    transformers' pipelines know it by its class name.
    """

    config_class = transformers.MixtralConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, model: causal_lm.MixtralForCausalLM) -> None:
        document = {k: v for k, v in model.config.to_dict().items() if k not in _LEFT_OUT}
        if model.model.kv != "16":
            raise UnsupportedError(
                "the caches of transformers keep 16 bits",
                where="kv",
                found=model.model.kv,
                remedy="Load the model without kv=, or let qmix generate.",
            )
        super().__init__(transformers.MixtralConfig(**document))
        self.runtime = model
        own = model.generation_config
        stated = {n: v for n, v in own.to_dict().items() if n not in ("seed", "use_cache")}
        ids = {"eos_token_id": list(own.eos_ids) or None, "pad_token_id": own.pad_id}
        self.generation_config = transformers.GenerationConfig(**{**stated, **ids})

    def get_input_embeddings(self) -> Any:
        return self.runtime.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> Any:
        """One pass over (B, S) new positions; returns transformers' CausalLMOutputWithPast."""
        if cache is None:  # the name since transformers 5.24
            cache = past_key_values
        if cache is None and use_cache:
            cache = transformers.DynamicCache(config=self.config)
        out = self.runtime(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=None if cache is None else _Columns(cache),
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )
        output = CausalLMOutputWithPast(
            loss=out.loss,
            logits=out.logits,
            **{_CACHE_FIELD: cache},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return output if return_dict in (None, True) else output.to_tuple()


class Tokenizer(transformers.PreTrainedTokenizer):  # type: ignore[misc]
    """A qmix tokenizer that is a transformers tokenizer; `tokenizer` makes one."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, llama_tokenizer: LlamaTokenizer) -> None:
        self._llama_tokenizer = llama_tokenizer
        super().__init__(
            bos_token=llama_tokenizer.bos_token,
            eos_token=llama_tokenizer.eos_token,
            unk_token=llama_tokenizer.unk_token,
            pad_token=llama_tokenizer.pad_token or llama_tokenizer.eos_token,
            padding_side="left",
        )

    @property
    def vocab_size(self) -> int:
        return len(self._llama_tokenizer)

    def get_vocab(self) -> dict[str, int]:
        return self._llama_tokenizer.get_vocab()

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [name or "" for name in self._llama_tokenizer.tokenize(text)]

    def _convert_token_to_id(self, token: str) -> int | list[int | None] | None:
        return self._llama_tokenizer.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, index: int) -> str | list[str | None] | None:
        return self._llama_tokenizer.convert_ids_to_tokens(index)

    def _decode(self, token_ids: int | list[int], *rest: Any, **options: Any) -> str:
        """Text. Ids without a leading begin token continue a text: their first space stays."""
        text: str = super()._decode(token_ids, *rest, **options)
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = self._llama_tokenizer.pieces
        continues = bool(ids) and ids[0] not in pieces.controls and pieces.drops_first_space
        return " " + text if continues and pieces.texts[ids[0]].startswith(" ") else text

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        ids = self._llama_tokenizer.convert_tokens_to_ids(list(tokens))
        assert isinstance(ids, list)
        return self._llama_tokenizer.decode([index for index in ids if index is not None])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        front = [self._llama_tokenizer.bos_token_id] if self._llama_tokenizer.add_bos_token else []
        return [*(i for i in front if i is not None), *token_ids_0, *(token_ids_1 or [])]
