"""MixtralForCausalLM: the decoder with a language-model head, and its generation.

Knows no bits and no files: those come through qmix.models.load. Shape letters as in qmix.nn.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError, wrong_type
from qmix.generation import loop as generation
from qmix.generation.config import GenerationConfig
from qmix.generation.host_copy import HostCopy
from qmix.generation.inputs import GenerationInputs
from qmix.generation.logits_processors import LogitsProcessor
from qmix.generation.padding import check_prompt
from qmix.generation.static_decoder import StaticDecoder
from qmix.generation.static_decoders import StaticDecoders
from qmix.generation.stopping import StoppingCriterion
from qmix.generation.streamers import Streamer
from qmix.generation.token_selector import SampledStep, SampleFn
from qmix.kernels.backend import preferred
from qmix.models.evaluation_mode import EvaluationMode
from qmix.models.inputs import CausalLMInputs, Pairs, takes
from qmix.models.mixtral import MixtralModel
from qmix.models.pretrained import PreTrainedModel
from qmix.nn.cache import Cache, KVCache
from qmix.nn.cache_rows import CacheRows
from qmix.nn.cache_slab import SlabRow, only_slab_rows
from qmix.nn.decoder import expert_use
from qmix.nn.exact_rows import exact_rows
from qmix.nn.linear import Linear, initialise
from qmix.nn.losses import check_labels, load_balancing_loss, next_token_loss
from qmix.nn.outputs import GenerateDecoderOnlyOutput, MoeCausalLMOutputWithPast
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

Prompt = str | Sequence[Message | Mapping[str, Any]] | Sequence[int] | Tensor


class MixtralForCausalLM(PreTrainedModel):
    """The decoder with a language-model head: next-token logits, losses, generation."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MixtralModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        initialise(self.lm_head, config)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.tokenizer: LlamaTokenizer | None = None
        self.static_decoders = StaticDecoders()
        self._evaluation_mode = EvaluationMode()
        self.tie_weights()

    def read_generation_config(self, directory: Path) -> None:
        """Take the special ids from generation_config.json."""
        self.generation_config = GenerationConfig.from_model_config(self.config, directory)

    def documents(self) -> dict[str, dict[str, Any]]:
        """generation_config.json, if it would say more than config.json does."""
        config = self.generation_config
        if set(config.given.values()) <= {"config.json"}:
            return {}
        return {"generation_config.json": config.to_dict()}

    def tie_weights(self) -> None:
        """Share the embedding with the head where the config says so."""
        if self.config.tie_word_embeddings:
            embed_tokens = self.model.embed_tokens
            if embed_tokens.weight is None:
                self.lm_head.store(embed_tokens.stored)
            else:
                self.lm_head.weight = embed_tokens.weight

    @takes(CausalLMInputs)
    def forward(self, inputs: CausalLMInputs) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """One pass over (B, S) new positions; arguments as in MixtralModel.forward.

        Args:
            labels: int64 (B, S), shifted inside; -100 is left out of the loss.
            logits_to_keep: compute the logits of the last n positions only, or of those that an
                index tensor names; 0: of all.

        Raises:
            UsageError: as MixtralModel.forward; labels of another shape or outside the vocabulary.
        """
        out = self.model(**inputs.for_decoder())
        hidden = _positions(out.last_hidden_state, inputs.logits_to_keep)
        logits = self.logits(hidden)
        loss = aux_loss = None
        if inputs.labels is not None:
            check_labels(inputs.labels)
            selected = hidden is not out.last_hidden_state
            if selected and hidden.shape[1:2] != inputs.labels.shape[1:]:
                raise UsageError("labels need the logits of all positions", where="logits_to_keep")
            loss = next_token_loss(logits, inputs.labels)
        if out.router_logits is not None:
            new_columns = None
            if inputs.attention_mask is not None and inputs.attention_mask.dim() == 2:
                new_columns = inputs.attention_mask[:, -out.last_hidden_state.shape[1] :]
            aux_loss = load_balancing_loss(
                out.router_logits, self.config.num_experts_per_tok, new_columns
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return self._returned(
            inputs.return_dict,
            MoeCausalLMOutputWithPast(
                loss=loss,
                aux_loss=aux_loss,
                logits=logits,
                past_key_values=out.past_key_values,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                router_logits=out.router_logits,
            ),
        )

    @torch.no_grad()
    def next_logits(
        self,
        input_ids: Tensor | None,
        cache: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Append ids (B, S), or embeddings (B, S, D), to the cache.

        Args:
            attention_mask: bool (B, L), False at padding, all of it on the left.

        Returns:
            logits of the last position, float32 (B, V).
        """
        if input_ids is not None and input_ids.shape[1] == 1:
            step = self._static_step(input_ids, cache, attention_mask)
            if step is not None:
                return step[0]
        x = inputs_embeds
        if x is None:
            assert input_ids is not None
            x = self.model.embed(input_ids)
        decoded = self.model.decode(
            x, padding_mask=attention_mask, position_ids=position_ids, cache=cache
        )
        return self.logits(decoded.hidden[:, -1])

    @torch.no_grad()
    def next_logits_with_experts(
        self, ids: Tensor, cache: Cache, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`next_logits` of ids (B, 1), and their `expert_use`, int64 (layers, B, E)."""
        step = self._static_step(ids, cache, None)
        if step is not None:
            logits, decoder, places = step
            return logits, expert_use(decoder.expert_ids[:, places], self.config.num_local_experts)
        decoded = self.model.decode(self.model.embed(ids), position_ids=position_ids, cache=cache)
        use = decoded.expert_use(self.config.num_experts_per_tok)
        return self.logits(decoded.hidden[:, -1]), use

    def _static_step(
        self, ids: Tensor, cache: Cache, mask: Tensor | None
    ) -> tuple[Tensor, StaticDecoder, Tensor | slice] | None:
        """Append a position (B, 1) by static shapes; None: they do not fit.

        Returns:
            its logits (B, V), the decoder, and where the rows lie in the decoder's.
        """
        of = self.static_decoders
        if isinstance(cache, KVCache) and not isinstance(cache, SlabRow):
            decoder = of.for_cache(self.model, self.lm_head, cache, mask)
            if decoder is None:
                return None
            found = decoder.step(ids).clone(), decoder, slice(None)
            cache.advance(1)
            return found
        rows = cache.rows if isinstance(cache, CacheRows) else (cache,)
        if mask is not None or not (slab_rows := only_slab_rows(rows)):
            return None
        decoder = of.for_rows(self.model, self.lm_head, slab_rows)
        if decoder is None:
            return None
        places = torch.tensor([row.place for row in slab_rows], device=ids.device)
        logits = decoder.step(torch.empty_like(ids).index_copy(0, places, ids))[places]
        cache.advance(1)
        return logits, decoder, places

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> float32 [..., V]."""
        with preferred(self.model.backend):
            logits: Tensor = self.lm_head(hidden).float()
        return logits

    @torch.no_grad()
    def sample_next(
        self, ids: Tensor, cache: KVCache, attention_mask: Tensor | None, sample_fn: SampleFn
    ) -> SampledStep | None:
        """Run ids (B,) and sample the next ones without waiting for them.

        The cache stores the new position but does not count it: the caller does `cache.advance(1)`.

        Args:
            ids: on the model's device; those of the last step are not copied.

        Returns:
            None where the step cannot run in one piece on the device.
        """
        decoder = self.static_decoders.for_cache(
            self.model, self.lm_head, cache, attention_mask, sample_fn
        )
        if decoder is None:
            return None
        decoder.step(None if ids is decoder.ids else ids)
        logits, scores = decoder.logits.clone(), decoder.scores.clone()
        return SampledStep(logits, scores, decoder.ids, HostCopy(decoder.ids))

    def generator(self, cache: KVCache, seed: int) -> torch.Generator:
        """The generator that draws the ids which follow in a cache, seeded anew."""
        return self.static_decoders.generator(cache, self.device, seed)

    def exact_rows(self) -> int:
        """How many rows of a decode step are computed each as if it were alone; 1: only one.

        Drafts of one id less (`prompt_lookup_num_tokens`) leave a text what it is without them.
        """
        return exact_rows(self.model, self.lm_head)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Mapping[str, Tensor] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | Pairs | None = None,
        tokenizer: LlamaTokenizer | None = None,
        streamer: Streamer | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate after (B, P) ids: (B, P + n), rows that end early filled with pad_token_id.

        With num_return_sequences each row is followed by its copies.

        Args:
            input_ids: or what a tokenizer returns, with its mask. Its other name is `inputs`.
            attention_mask: (B, P), 0 at padding, on whichever side.
            inputs_embeds: (B, P, D) instead of ids; the result then holds the n new ids only.
            past_key_values: already holds the first columns of input_ids; a cache, or a tuple as in
                MixtralModel.forward.
            generation_config: default: the model's own, which also gives the fields that another
                was made without.
            tokenizer: for stop_strings; default: the one that the model was loaded with.
            streamer: gets the prompt, then each new id, then `end()`; one row only.
            logits_processor: each `(ids so far (B, L), scores (B, V)) -> scores`, called after the
                penalties and before the temperature. Padding is on the left.
            stopping_criteria: each `(ids so far (B, L), scores (B, V)) -> bool`, one for all rows
                or one a row (B,); where it is true, the row ends.
            options: any field of GenerationConfig.

        Returns:
            int64 ids; with return_dict_in_generate an output that holds them, and the scores and
            logits that the configuration asks for.

        Raises:
            UsageError: an unknown option, a value outside its range, or another model's cache.
            UnsupportedError: as Decoder.decode, after a fork.
        """
        self.check_process()
        input_ids, attention_mask = _prompt(input_ids, attention_mask, options)
        config = self._generation_config(generation_config).updated(options)
        if input_ids is not None:
            check_prompt(input_ids, None)
            input_ids = input_ids.to(self.device)
        inputs = GenerationInputs(
            input_ids,
            config,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=self._generation_cache(past_key_values),
            tokenizer=tokenizer or self.tokenizer,
            logits_processor=logits_processor or (),
            stopping_criteria=stopping_criteria or (),
        )
        with self._evaluation_mode.during(self):
            return generation.generate(self, inputs, streamer)

    def _generation_cache(self, past: KVCache | Pairs | None) -> KVCache | None:
        if isinstance(past, (tuple, list)):
            return KVCache.from_legacy_cache(self.config, past, self.model.kv)
        if past is None or isinstance(past, KVCache):
            return past
        raise UsageError("not a cache of qmix", where="past_key_values", found=type(past).__name__)

    def _generation_config(self, config: GenerationConfig | None) -> GenerationConfig:
        if config is None:
            return self.generation_config
        if not isinstance(config, GenerationConfig):
            raise wrong_type("generation_config", "a qmix.GenerationConfig", config)
        return config.filled_from(self.generation_config)

    @torch.no_grad()
    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Generate the text that follows `prompt`, piece by piece.

        Args:
            prompt: a text; or messages, which the chat template puts into one; or ids, a list or a
                tensor (P,) or (1, P).
            options: any field of GenerationConfig.

        Raises:
            UsageError: the model was loaded without its tokenizer (`qmix.load` gives it one), an
                unknown option, or a value outside its range.
        """
        if self.tokenizer is None:
            raise UsageError(
                "text needs a tokenizer", remedy="Load the model with qmix.load, or set tokenizer."
            )
        ids, is_chat = _prompt_ids(prompt, self.tokenizer)
        config = self.generation_config.updated(options)
        inputs = GenerationInputs(ids, config, tokenizer=self.tokenizer, starts_new_text=is_chat)
        with self._evaluation_mode.during(self):
            for token in generation.stream(self, inputs):
                if token.texts[0]:
                    yield token.texts[0]


def _prompt(
    given: Tensor | Mapping[str, Tensor] | None, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Ids and mask, from whichever argument they come in."""
    if "inputs" in options:
        if given is not None:
            raise UsageError("give either input_ids or inputs", where="inputs")
        given = options.pop("inputs")
    if not isinstance(given, Mapping):
        return given, mask
    return given.get("input_ids"), given.get("attention_mask") if mask is None else mask


def _prompt_ids(prompt: Prompt, tokenizer: LlamaTokenizer) -> tuple[Tensor, bool]:
    """Ids (1, P) of a text, of messages or of ids; and whether the new text is one of its own.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(prompt, str):
        return torch.tensor([tokenizer.encode(prompt)]), False
    if isinstance(prompt, Tensor):
        return prompt.reshape(1, -1) if prompt.dim() < 2 else prompt, False
    parts = list(prompt) if isinstance(prompt, (list, tuple)) else []
    if parts and all(type(part) is int for part in parts):
        return torch.tensor([parts]), False
    if parts and all(isinstance(part, (Mapping, Message)) for part in parts):
        ids: Any = tokenizer.apply_chat_template(parts)
        return torch.tensor([ids["input_ids"] if isinstance(ids, Mapping) else ids]), True
    raise UsageError(
        "wrong type", where="prompt", expected="a text, messages or ids", found=repr(prompt)[:80]
    )


def _positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Hidden states (B, S, D) at the last n positions, or at those of an index tensor; 0: all."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype not in (torch.int64, torch.int32, torch.bool):
            raise _no_positions("integers", logits_to_keep.dtype)
        try:
            return hidden[:, logits_to_keep]
        except IndexError as error:
            raise _no_positions(f"positions below {hidden.shape[1]}", error) from None
    if type(logits_to_keep) is not int or logits_to_keep < 0:
        raise _no_positions("an integer of at least 0", repr(logits_to_keep)[:80])
    kept = min(logits_to_keep, hidden.shape[1])
    return hidden[:, -kept:] if kept else hidden


def _no_positions(expected: str, found: object) -> UsageError:
    return UsageError("no positions", where="logits_to_keep", expected=expected, found=found)
