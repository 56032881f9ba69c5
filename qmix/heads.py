"""The public models: MixtralModel and MixtralForCausalLM, in the shape of the reference page.

Shape letters: B batch, S new positions, L positions held, D hidden width, E experts, V vocabulary.
Knows no bits and no files: those come through qmix.loader.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix import generate as generation
from qmix import loader
from qmix.cache import KVCache
from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.generate import GenerationConfig, Streamer
from qmix.layers import Linear, initialise
from qmix.model import Decoded, Decoder
from qmix.tokenizer import LlamaTokenizer


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What MixtralModel returns.

    Attributes:
        last_hidden_state: after the final norm, (B, S, D).
        past_key_values: the cache, now holding L + S positions; None without use_cache.
        hidden_states: L + 1 tensors (B, S, D), the last after the final norm; None unless asked for.
        router_logits: raw, one (B * S, E) a layer; None unless asked for.
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None


@dataclass(frozen=True, eq=False)
class CausalLMOutput:
    """What MixtralForCausalLM returns.

    Attributes:
        logits: float32 (B, S or the positions kept, V).
        loss: mean cross-entropy of the shifted labels, plus router_aux_loss_coef * aux_loss if the
            router logits were asked for; None without labels.
        aux_loss: the load-balancing loss; None unless router logits were asked for.
        past_key_values, hidden_states, router_logits: as in ModelOutput.
    """

    logits: Tensor
    loss: Tensor | None
    aux_loss: Tensor | None
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None


class _Loadable(nn.Module):
    """Loading, placing and caching: what both models share."""

    config: MixtralConfig

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a checkpoint directory, dense or 4-bit.

        Args:
            directory: holds config.json and safetensors, one file or shards with an index.
            torch_dtype, dtype: of the activations and dense weights; default: the checkpoint's.
            device: default: the GPU if there is one.

        Raises:
            CheckpointError: a file is missing, damaged, or its tensors are not the model's.
            UnsupportedError: a layout that qmix does not read.
        """
        model = loader.load(cls, directory, dtype=_agreed(torch_dtype, dtype), device=device)
        model.adopt(Path(directory))
        return model

    def adopt(self, directory: Path) -> None:
        """Take what else the directory says of a model; nothing without a head."""

    def save_pretrained(
        self, directory: str | Path, *, max_shard_bytes: int = loader.SHARD_BYTES
    ) -> None:
        """Write config.json and sharded safetensors, dense and 4-bit weights as they are.

        Raises:
            UsageError: the directory holds weights already.
        """
        loader.save(self, self.config, directory, max_shard_bytes)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def new_cache(self, batch: int = 1, capacity: int = 0) -> KVCache:
        """An empty cache for this model; `capacity` positions are allocated at once."""
        return KVCache(self.config, batch, dtype=self.dtype, device=self.device, capacity=capacity)


class MixtralModel(_Loadable, Decoder):
    """The decoder without a head (reference page, section MixtralModel)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        initialise(self, config)

    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        *,
        keep_hidden_states: bool = False,
    ) -> Decoded:
        """Check the inputs and run the decoder; the cache is appended to."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            assert input_ids is not None
            generation.check_prompt(input_ids, None)
            inputs_embeds = self.embed(input_ids)
        if position_ids is not None and position_ids.dim() != 2:
            raise UsageError(
                "wrong shape",
                where="position_ids",
                expected="[batch, sequence]",
                found=list(position_ids.shape),
            )
        batch, new = inputs_embeds.shape[:2]
        past = cache.length if cache is not None else 0
        keep = None
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (batch, past + new):
                raise UsageError(
                    "wrong shape",
                    where="attention_mask",
                    expected=f"[{batch}, {past + new}], past and new positions",
                    found=list(attention_mask.shape),
                )
            keep = attention_mask.to(inputs_embeds.device).bool()
            if bool(keep.all()):
                keep = None  # the unmasked attention is faster
        return self.decode(
            inputs_embeds,
            keep=keep,
            positions=position_ids,
            cache=cache,
            keep_hidden_states=keep_hidden_states,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
    ) -> ModelOutput:
        """One pass over (B, S) new positions.

        Args:
            input_ids: int64 (B, S).
            attention_mask: (B, L + S), 0 at padding.
            position_ids: (B, S); default L .. L + S - 1.
            past_key_values: a cache from an earlier pass; it is appended to.
            inputs_embeds: (B, S, D) instead of input_ids.
            use_cache: default: the config's, and False while training.
        """
        cache = self._cache(past_key_values, use_cache, input_ids, inputs_embeds)
        decoded = self.run(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            keep_hidden_states=output_hidden_states,
        )
        wants_routers = _default(output_router_logits, self.config.output_router_logits)
        return ModelOutput(
            last_hidden_state=decoded.hidden,
            past_key_values=cache,
            hidden_states=decoded.hidden_states,
            router_logits=decoded.router_logits if wants_routers else None,
        )

    def _cache(
        self,
        past: KVCache | None,
        use_cache: bool | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> KVCache | None:
        given = input_ids if input_ids is not None else inputs_embeds
        if past is not None or given is None or given.dim() < 2:
            return past
        if not _default(use_cache, self.config.use_cache and not self.training):
            return None
        return self.new_cache(given.shape[0], given.shape[1])


class MixtralForCausalLM(_Loadable):
    """The decoder with a language-model head (reference page, section MixtralForCausalLM)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MixtralModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        initialise(self.lm_head, config)
        self.generation_config = GenerationConfig.of(config)
        self.tokenizer: LlamaTokenizer | None = None
        self.tie_weights()

    def adopt(self, directory: Path) -> None:
        """Take the special ids from generation_config.json."""
        self.generation_config = GenerationConfig.of(self.config, directory)

    def tie_weights(self) -> None:
        """Share the embedding with the head, where the config says so."""
        if self.config.tie_word_embeddings:
            shared = self.model.embed_tokens.weight
            assert isinstance(shared, nn.Parameter)
            self.lm_head.weight = shared

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """One pass over (B, S) new positions; arguments as in MixtralModel.forward.

        Args:
            labels: (B, S), shifted inside; -100 is left out of the loss.
            logits_to_keep: compute the last n positions only, or those of an index tensor; 0 = all.
        """
        wants_routers = _default(output_router_logits, self.config.output_router_logits)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            wants_routers,
        )
        kept = out.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            kept = kept[:, logits_to_keep]
        elif logits_to_keep:
            kept = kept[:, -logits_to_keep:]
        logits = self.lm_head(kept).float()
        loss = aux_loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise UsageError("labels need the logits of all positions", where="logits_to_keep")
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
            )
        if wants_routers:
            new = out.last_hidden_state.shape[1]
            keep = attention_mask[:, -new:] if attention_mask is not None else None
            aux_loss = load_balancing_loss(out.router_logits, self.config.num_experts_per_tok, keep)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return CausalLMOutput(
            logits=logits,
            loss=loss,
            aux_loss=aux_loss,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
        )

    @torch.no_grad()
    def next_logits(
        self,
        input_ids: Tensor,
        cache: KVCache,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Append (B, S) ids to the cache; float32 logits of the last position only (B, V)."""
        x = self.model.embed(input_ids)
        decoded = self.model.decode(x, keep=keep, positions=positions, cache=cache)
        logits: Tensor = self.lm_head(decoded.hidden[:, -1]).float()
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        tokenizer: LlamaTokenizer | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate after (B, P) ids: (B, P + N), rows that end early filled with pad_token_id.

        Args:
            attention_mask: (B, P), 0 at padding, on whichever side.
            generation_config: defaults to the model's own.
            tokenizer: for stop_strings; defaults to the one the model was loaded with.
            streamer: gets the prompt, then each new token, then `end()`; one row only.
            options: any field of GenerationConfig.

        Raises:
            UsageError: an unknown option or a value outside its range.
        """
        config = (generation_config or self.generation_config).updated(options)
        self.eval()
        if isinstance(input_ids, Tensor):
            input_ids = input_ids.to(self.device)
        return generation.generate(
            self,
            input_ids,
            config,
            attention_mask=attention_mask,
            tokenizer=tokenizer or self.tokenizer,
            streamer=streamer,
        )

    @torch.no_grad()
    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The text that follows `prompt`, piece by piece as it is finished.

        Args:
            options: any field of GenerationConfig.

        Raises:
            UsageError: the model was loaded without its tokenizer (`qmix.load` gives it one), an
                unknown option, or a value outside its range.
        """
        if self.tokenizer is None:
            raise UsageError(
                "text needs a tokenizer", remedy="Load the model with qmix.load, or set tokenizer."
            )
        self.eval()
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        config = self.generation_config.updated(options)
        for token in generation.stream(self, ids, config, tokenizer=self.tokenizer):
            if token.texts[0]:
                yield token.texts[0]


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], num_experts_per_tok: int, keep: Tensor | None = None
) -> Tensor:
    """`E * sum_e f_e P_e` over all layers' tokens (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_e is the share of tokens that chose e among their top k (summing to k), P_e the mean router
    probability: k at perfect balance.

    Args:
        router_logits: raw, one (B * S, E) a layer.
        keep: (B, S), 0 at padding.
    """
    logits = torch.cat([layer.float() for layer in router_logits])
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities)
    chosen = chosen.scatter(1, probabilities.topk(num_experts_per_tok, -1).indices, 1.0)
    if keep is not None:
        valid = keep.reshape(-1).repeat(len(router_logits)).to(probabilities)[:, None]
        share = (chosen * valid).sum(0) / valid.sum()
        mean = (probabilities * valid).sum(0) / valid.sum()
    else:
        share, mean = chosen.mean(0), probabilities.mean(0)
    return logits.shape[-1] * (share * mean).sum()


def _default(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _agreed(
    torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None
) -> torch.dtype | None:
    """One dtype out of its two spellings."""
    first, second = loader.named_dtype(torch_dtype), loader.named_dtype(dtype)
    if first is not None and second is not None and first != second:
        raise UsageError(
            "torch_dtype and dtype differ", where="dtype", expected=first, found=second
        )
    return first or second
