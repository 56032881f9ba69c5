"""ServedModel: what a server tells of its model, and the ids of what callers ask it.

Knows no HTTP and runs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantities import counted
from qmix.serving import tool_prompt
from qmix.serving.call_reader import CallReader
from qmix.serving.grammar import Grammar, GrammarMask, Grammars
from qmix.serving.http.chat_request import ChatRequest
from qmix.serving.http.completion_request import CompletionRequest, Prompt
from qmix.serving.http.errors import ApiError
from qmix.serving.http.sampling_fields import SamplingFields
from qmix.serving.limits import Limits
from qmix.serving.request import Request
from qmix.serving.tool_format import CallFormat, call_format
from qmix.serving.tools import Tool, Turn
from qmix.text.chat_encoder import INST
from qmix.text.chat_format import chosen_template
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# What neither a caller nor the checkpoint's generation_config.json says: OpenAI's defaults.
_DEFAULTS = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)


@dataclass(frozen=True)
class ServedModel:
    """A model by its name.

    Attributes:
        created: seconds since 1970 when it began to be served.
        template: Jinja text of its chats, or "inst".
        tool_template: the same, of chats with tools.
        calls: how the model writes calls of tools.
        defaults: how replies are generated where the caller does not say.
        chat_ends: ids that end a chat's reply, beside the model's own.
        limits: the engine's.
    """

    name: str
    created: int
    tokenizer: LlamaTokenizer
    template: str
    tool_template: str
    calls: CallFormat
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
        with_tools = tokenizer.template(tools=True) if template is None else own
        source, tool_source = (INST if each is None else each.source for each in (own, with_tools))
        chat_ends = () if own is None else tokenizer.end_ids(own)
        return cls(
            name=name,
            created=created,
            tokenizer=tokenizer,
            template=source,
            tool_template=tool_source,
            calls=call_format(tool_source, tokenizer),
            defaults=model.generation_config.filled_from(_DEFAULTS),
            chat_ends=chat_ends,
            limits=limits,
            vocab_size=model.config.vocab_size,
            grammars=Grammars(tokenizer, (*model.generation_config.eos_ids, *chat_ends)),
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

    def grammar(self, asked: SamplingFields) -> Grammar | None:
        """What the replies are to follow.

        Raises:
            ApiError: there are two grammars, or it is none.
        """
        form, use = asked.form, asked.tool_use
        if use is not None and form not in (None, "response_format"):
            raise ApiError(f"give tools or {form}", param=form, code="invalid_value")
        field = form if use is None else "tools"
        if field is None:
            return None
        try:
            if use is None:
                text = asked.grammar
            else:
                text = self.calls.grammar(use, asked.response_format)
        except UsageError as error:
            raise ApiError(str(error), param=field, code="invalid_value") from None
        assert text is not None
        return Grammar(text, field)

    def chat(
        self, asked: ChatRequest, deadline_s: float, matcher: "LLMatcher | None"
    ) -> list[Request]:
        """A request for each choice.

        Args:
            matcher: of the grammar that the replies follow.

        Raises:
            ApiError: the conversation does not fit the template, or the context.
        """
        self.check(asked)
        use, ids = asked.tool_use, self.ids_of(asked)
        new_tokens = asked.new_tokens or self.limits.context
        self._check_length(ids, "messages")
        shown = () if use is None or self.calls.opener_id is None else (self.calls.opener_id,)
        # A grammar of the whole reply sees the first token's space, so that it stays in the text.
        starts = not asked.continue_final_message and (asked.form is None or use is not None)
        return [
            Request(
                ids,
                asked.config(self.defaults, new_tokens, choice).with_ends(self.chat_ends),
                starts_new_text=starts,
                processors=asked.processors(len(ids)),
                mask=self._mask(matcher),
                shown_ids=frozenset(shown),
                top_logprobs=asked.reported,
                expert_counts=asked.expert_counts,
                deadline_s=deadline_s,
            )
            for choice in range(asked.n)
        ]

    def readers(self, asked: ChatRequest) -> list[CallReader]:
        """What finds the calls of each choice; none where nothing may be called."""
        if asked.tool_use is None:
            return []
        return [CallReader(self.calls.opener) for _ in range(asked.n)]

    def ids_of(self, asked: ChatRequest) -> list[int]:
        """The prompt of a chat.

        Raises:
            ApiError: the conversation does not fit the template, or the model is another.
        """
        self.check_name(asked.model)
        use = asked.tool_use
        tools = () if use is None else use.shown
        return self.chat_ids(asked.messages, tools, continues=asked.continue_final_message)

    def chat_ids(
        self, turns: Sequence[Turn], tools: Sequence[Tool] = (), *, continues: bool = False
    ) -> list[int]:
        """The ids of a conversation, up to where the reply begins.

        Args:
            continues: the reply goes on with the last message.

        Raises:
            ApiError: it does not fit the template.
        """
        has_tools = bool(tools) or any(turn.has_tools for turn in turns)
        in_template = has_tools and self.calls.in_template
        messages: Sequence[Message | Mapping[str, Any]] = tool_prompt.as_text(turns, tools)
        if in_template:
            messages = tool_prompt.for_template(turns)
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages,
                tools=[tool.document for tool in tools] if in_template and tools else None,
                chat_template=self.tool_template if in_template else self.template,
                continue_final_message=continues,
                sanitize_control_tokens=True,
            )
        except UsageError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from None
        return ids

    def completion(
        self, asked: CompletionRequest, deadline_s: float, matcher: "LLMatcher | None"
    ) -> list[Request]:
        """A request for each choice of each prompt, a prompt's together.

        Args:
            matcher: of the grammar that the replies follow.

        Raises:
            ApiError: an id is none, a prompt does not fit the context, or there are too many.
        """
        self.check(asked)
        most = self.limits.slots + self.limits.waiting
        if len(asked.prompt) * asked.n > most:
            raise ApiError(
                f"prompt: expected at most {most} replies at a time, as many as may run and wait; "
                f"found {counted(len(asked.prompt), 'prompt')} with {asked.n} each",
                param="prompt",
                code="invalid_value",
            )
        ends = () if asked.form is None else self.chat_ends  # a mask allows them at its end
        return [
            Request(
                ids,
                asked.config(self.defaults, max(asked.max_tokens, 1), choice).with_ends(ends),
                processors=asked.processors(len(ids)),
                mask=self._mask(matcher),
                top_logprobs=asked.logprobs,
                prompt_logprobs=asked.echo and asked.logprobs is not None,
                deadline_s=deadline_s,
            )
            for ids in map(self._prompt_ids, asked.prompt)
            for choice in range(asked.n)
        ]

    def echoes(self, asked: CompletionRequest) -> list[str]:
        """The text of each choice's prompt."""
        texts = [
            prompt
            if isinstance(prompt, str)
            else self.tokenizer.decode(prompt, skip_special_tokens=True)
            for prompt in asked.prompt
        ]
        return [text for text in texts for _ in range(asked.n)]

    def _mask(self, matcher: "LLMatcher | None") -> GrammarMask | None:
        return None if matcher is None else self.grammars.mask(matcher)

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
                # Clients know this error by OpenAI's words.
                f"{param}: this model's maximum context length is {self.limits.context} tokens; "
                f"{counted(len(ids), 'token')} leave no place for a reply",
                param=param,
                code="context_length_exceeded",
            )
