"""ServedModel: what a server tells of its model, and the ids of what callers ask it.

Knows no HTTP and runs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.serving.grammar import GrammarMask, Grammars
from qmix.serving.http.chat_request import ChatRequest
from qmix.serving.http.completion_request import CompletionRequest, Prompt
from qmix.serving.http.errors import ApiError
from qmix.serving.http.sampling_fields import SamplingFields
from qmix.serving.http.token_request import DetokenizeRequest, TokenizeRequest
from qmix.serving.request import Request
from qmix.serving.scheduler import Limits
from qmix.text.chat_encoder import INST
from qmix.text.chat_format import chosen_template
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

# What neither a caller nor the checkpoint's generation_config.json says: OpenAI's defaults.
_DEFAULTS = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)


@dataclass(frozen=True)
class ServedModel:
    """A model by its name.

    Attributes:
        created: seconds since 1970 when it began to be served.
        template: Jinja text of its chats, or "inst".
        defaults: how replies are generated where the caller does not say.
        chat_ends: ids that end a chat's reply, beside the model's own.
        limits: the engine's.
    """

    name: str
    created: int
    tokenizer: LlamaTokenizer
    template: str
    defaults: GenerationConfig
    chat_ends: tuple[int, ...]
    limits: Limits
    vocab_size: int
    grammars: Grammars

    @classmethod
    def of(
        cls,
        model: MixtralForCausalLM,
        tokenizer: LlamaTokenizer,
        limits: Limits,
        *,
        name: str,
        created: int,
        template: str | None = None,
    ) -> "ServedModel":
        """
        Args:
            template: see qmix.text.chat_format.chosen_template.

        Raises:
            UsageError, CheckpointError: there is no such template.
        """
        own = chosen_template(tokenizer, template)
        return cls(
            name=name,
            created=created,
            tokenizer=tokenizer,
            template=INST if own is None else own.source,
            defaults=model.generation_config.filled_from(_DEFAULTS),
            chat_ends=() if own is None else tokenizer.end_ids(own),
            limits=limits,
            vocab_size=model.config.vocab_size,
            grammars=Grammars(tokenizer, model.generation_config.eos_ids),
        )

    @property
    def document(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qmix",
            "max_model_len": self.limits.context,
        }

    def check(self, asked: SamplingFields) -> None:
        """Refuse another model's name, and biases of ids that are none.

        Raises:
            ApiError: see above.
        """
        self.check_name(asked.model)
        for index in asked.logit_bias or ():
            if index >= self.vocab_size:
                raise ApiError(
                    f"logit_bias: expected token ids below {self.vocab_size}; found {index}",
                    param="logit_bias",
                    code="invalid_value",
                )

    def check_name(self, name: str | None) -> None:
        """
        Raises:
            ApiError: it is another model's.
        """
        if name is not None and name != self.name:
            raise ApiError(
                f"there is no model {name[:80]!r}; this server has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def chat(self, asked: ChatRequest, deadline_s: float) -> list[Request]:
        """A request for each choice.

        Raises:
            ApiError: the conversation does not fit the template, or the context.
        """
        self.check(asked)
        ids = self.chat_ids(asked.messages, continues=asked.continue_final_message)
        new_tokens = asked.new_tokens or self.limits.context
        self._check_length(ids, "messages")
        mask = self._masks(asked)
        return [
            Request(
                ids,
                asked.config(self.defaults, new_tokens, choice).with_ends(self.chat_ends),
                # A grammar sees the first token's space, so that it stays in the text.
                starts_new_text=not asked.continue_final_message and asked.grammar is None,
                processors=[*asked.processors(len(ids)), *mask(len(ids))],
                top_logprobs=asked.reported,
                expert_counts=asked.expert_counts,
                deadline_s=deadline_s,
            )
            for choice in range(asked.n)
        ]

    def chat_ids(self, messages: Sequence[Message], *, continues: bool = False) -> list[int]:
        """The ids of a conversation, up to where the reply begins.

        Args:
            continues: the reply goes on with the last message.

        Raises:
            ApiError: it does not fit the template.
        """
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                continue_final_message=continues,
                sanitize_control_tokens=True,
            )
        except UsageError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from None
        return ids

    def completion(self, asked: CompletionRequest, deadline_s: float) -> list[Request]:
        """A request for each choice of each prompt, a prompt's together.

        Raises:
            ApiError: an id is none, a prompt does not fit the context, or there are too many.
        """
        self.check(asked)
        most = self.limits.slots + self.limits.waiting
        if len(asked.prompt) * asked.n > most:
            raise ApiError(
                f"prompt: expected at most {most} replies at a time, as many as may run and wait; "
                f"found {len(asked.prompt)} prompts with {asked.n} each",
                param="prompt",
                code="invalid_value",
            )
        mask = self._masks(asked)
        return [
            Request(
                ids,
                asked.config(self.defaults, max(asked.max_tokens, 1), choice),
                processors=[*asked.processors(len(ids)), *mask(len(ids))],
                top_logprobs=asked.logprobs,
                prompt_logprobs=asked.echo and asked.logprobs is not None,
                deadline_s=deadline_s,
            )
            for ids in map(self._prompt_ids, asked.prompt)
            for choice in range(asked.n)
        ]

    def tokenized(self, asked: TokenizeRequest) -> dict[str, Any]:
        """The answer of /tokenize.

        Raises:
            ApiError: the conversation does not fit the template, or the model is another.
        """
        self.check_name(asked.model)
        if asked.prompt is None:
            ids = self.chat_ids(asked.messages)
        else:
            ids = self.tokenizer.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.limits.context}

    def detokenized(self, asked: DetokenizeRequest) -> dict[str, Any]:
        """The answer of /detokenize.

        Raises:
            ApiError: the model is another.
        """
        self.check_name(asked.model)
        return {"prompt": self.tokenizer.decode(asked.tokens)}

    def echoes(self, asked: CompletionRequest) -> list[str]:
        """The text of each choice's prompt."""
        texts = [
            prompt
            if isinstance(prompt, str)
            else self.tokenizer.decode(prompt, skip_special_tokens=True)
            for prompt in asked.prompt
        ]
        return [text for text in texts for _ in range(asked.n)]

    def _masks(self, asked: SamplingFields) -> Callable[[int], list[GrammarMask]]:
        """What makes the masks of a choice, from the length of its prompt.

        Raises:
            ApiError: there are two grammars, or one is none.
        """
        if asked.grammar is None:
            return lambda prompt_tokens: []
        param = "guided_regex" if asked.response_format is None else "response_format"
        if asked.response_format is not None and asked.guided_regex is not None:
            raise ApiError("give response_format or guided_regex", param=param)
        try:
            matcher = self.grammars.compiled(asked.grammar)
        except UsageError as error:
            raise ApiError(str(error), param=param, code="invalid_value") from None
        return lambda prompt_tokens: [GrammarMask(matcher.deep_copy(), prompt_tokens)]

    def _prompt_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            ids: Sequence[int] = self.tokenizer.encode(prompt)
        else:
            ids = prompt
        if not ids:
            raise ApiError("prompt: it is empty", param="prompt", code="invalid_value")
        self._check_length(ids, "prompt")
        if max(ids) >= self.vocab_size:
            raise ApiError(
                f"prompt: expected token ids below {self.vocab_size}; found {max(ids)}",
                param="prompt",
                code="invalid_value",
            )
        return ids

    def _check_length(self, ids: Sequence[int], param: str) -> None:
        if len(ids) >= self.limits.context:
            raise ApiError(
                f"{param}: {len(ids)} tokens leave no place for a reply; "
                f"the context has {self.limits.context}",
                param=param,
                code="context_length_exceeded",
            )
