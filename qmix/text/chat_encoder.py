"""Conversations to text and ids by the checkpoint's own template, as transformers does it.

A checkpoint without a template gets Mixtral's [INST] format. Knows no files.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qmix.errors import QmixError, UsageError, wrong_value
from qmix.text import chat_template as inst
from qmix.text import chat_templates, control_marks, conversation
from qmix.text.batch_encoding import BatchEncoding, EncodingOptions
from qmix.text.chat_template import Message
from qmix.text.sentencepiece_backend import SentencePieceBackend
from qmix.text.template_renderer import TemplateRenderer
from qmix.text.text_encoder import TextEncoder
from qmix.text.tokenizer_config import TokenizerConfig
from qmix.text.tokenizers_backend import TokenizersBackend

INST = "inst"  # the name of the format of a checkpoint without a template
_ANSWER = "An answer, and nothing but an answer."  # of a conversation that shows what follows one

Messages = Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template to be rendered.

    Attributes:
        name: of the checkpoint's own, or the file that it was given in.
        source: Jinja text.
    """

    name: str
    source: str

    @property
    def where(self) -> str:
        """Names it in errors."""
        return f"chat template {self.name}"


class ChatEncoder(TextEncoder):
    """What turns conversations into ids.

    Args:
        backend, config: as of a TextEncoder.
        templates: the checkpoint's own by name.

    Raises:
        CheckpointError: an entry of the config is wrong.
    """

    def __init__(
        self,
        backend: SentencePieceBackend | TokenizersBackend,
        config: TokenizerConfig,
        templates: Mapping[str, str],
    ) -> None:
        super().__init__(backend, config)
        self._templates = dict(templates)
        self._renderer = TemplateRenderer()

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The templates by name."""
        return dict(self._templates)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, or if there are several, all by name; None: the [INST] format is used."""
        if set(self._templates) <= {chat_templates.DEFAULT}:
            return self._templates.get(chat_templates.DEFAULT)
        return dict(self._templates)

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self._templates = chat_templates.of_entry(template, "chat_template", UsageError)

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Any] | None = None
    ) -> str:
        """The source of the template that is used, given by name, by its text, or by neither.

        Raises:
            UsageError: there is none.
        """
        template = self.template(chat_template, tools=tools is not None)
        if template is None:
            raise UsageError("this tokenizer has no chat template", where="chat_template")
        return template.source

    def template(self, given: str | None = None, *, tools: bool = False) -> ChatTemplate | None:
        """The template that is meant; None: the [INST] format.

        Args:
            given: a name, the text of a template, or "inst".
            tools: there are tools, for which there may be a template of its own.

        Raises:
            UsageError: neither a name nor a template.
        """
        if given is not None and not isinstance(given, str):
            raise wrong_value("chat_template", "a template, or the name of one", given)
        if given is not None and given not in self._templates:
            if given == INST:
                return None
            if "{" in given:
                return ChatTemplate(name="that was given", source=given)
        name = chat_templates.choose(self._templates, given, tools=tools)
        return None if name is None else ChatTemplate(name=name, source=self._templates[name])

    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: Literal[False] = False,
        **variables: Any,
    ) -> Any:
        """A conversation, or several, in the checkpoint's own chat template.

        The template runs in a process of its own, in jinja2's sandbox, with limits on time and
        memory. Without one it is Mixtral's [INST] format (see `qmix.text.chat_template`).

        Args:
            conversation: mappings with role and content, a text or a list of text parts.
            tools, documents: functions or JSON schemas, and mappings, passed to the template.
            chat_template: another template, the name of one, or "inst"; default: the checkpoint's.
            add_generation_prompt: end where an answer begins. Default: True, unless
                `continue_final_message`; transformers' is False.
            continue_final_message: leave the last message open.
            sanitize_control_tokens: control tokens in the messages stay text.
            return_dict: the ids with their mask, a BatchEncoding.
            variables: more of them, for the template.

        Returns:
            Ids, int64 ids (1, length) with `return_tensors`, or with `tokenize=False` the text.

        Raises:
            UsageError: a message or an option is wrong, or the template refuses the messages.
            CheckpointError: the template fails, or takes too long.
        """
        _check_request(tokenize, sanitize_control_tokens, return_assistant_tokens_mask)
        given: dict[str, Any] = {"tools": tools, "documents": documents}
        given["add_generation_prompt"] = _ends_open(add_generation_prompt, continue_final_message)
        given["continue_final_message"] = continue_final_message
        template = self.template(chat_template, tools=tools is not None)
        batched = _is_batch(conversation)
        conversations: Any = conversation if batched else [conversation]
        if template is None:
            rows = [self._inst(each, **given) for each in conversations]
            texts = [] if tokenize else [self.decode(row) for row in rows]
        else:
            given |= {"sanitized": sanitize_control_tokens, "variables": variables}
            texts = [self.rendered(template, each, **given) for each in conversations]
            rows = self._rows(texts, template, sanitize_control_tokens) if tokenize else []
        if not tokenize:
            return texts if batched else texts[0]
        options = self._options(return_tensors, padding, truncation, max_length)
        encoding = self._batch(rows, options, batched=batched)
        return encoding if return_dict else encoding["input_ids"]

    def _rows(self, texts: list[str], template: ChatTemplate, sanitized: bool) -> list[list[int]]:
        return [self.rendered_ids(text, template, sanitized=sanitized) for text in texts]

    def _batch(
        self, rows: list[list[int]], options: EncodingOptions, *, batched: bool
    ) -> BatchEncoding:
        """Rows as they are asked for; lists of one conversation stand alone."""
        rows = [options.truncated(row, [], []) for row in rows]
        encoding = options.batch(rows, self._padding_id)
        if batched or options.return_tensors is not None:
            return encoding
        return BatchEncoding({name: each[0] for name, each in encoding.items()})

    def rendered(
        self,
        template: ChatTemplate,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        sanitized: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; with `sanitized`, marked for `rendered_ids`.

        Raises:
            UsageError, CheckpointError: see `apply_chat_template`.
        """
        turns = conversation.checked(messages)
        given = {
            "tools": conversation.schemas(tools),
            "documents": None if documents is None else conversation.plain(list(documents)),
            **{name: conversation.plain(value) for name, value in (variables or {}).items()},
        }
        if sanitized:
            tokens = self._control_tokens(template)
            turns, given = control_marks.marked(turns, tokens), control_marks.marked(given, tokens)

        def render(turns: list[dict[str, Any]]) -> str:
            more = {**self.special_tokens_map, **given, "messages": turns}
            more["add_generation_prompt"] = add_generation_prompt
            return self._renderer.render(template.source, more, template.where)

        if not continue_final_message:
            return render(turns)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        return conversation.continued(turns, field, render)

    def rendered_ids(
        self, text: str, template: ChatTemplate, *, sanitized: bool, starts: bool = True
    ) -> list[int]:
        """The ids of a text that `rendered` gave.

        Args:
            sanitized: as it was given there.
            starts: it is the beginning; False: it goes on behind other ids.
        """
        ids: list[int] = []
        encode: Callable[..., list[int]] = self._backend.encode
        self._check_unicode(text)
        if not sanitized:
            return encode(text, starts=starts)
        for part, typed in control_marks.parts(text, self._control_tokens(template)):
            ids += encode(part, match="none" if typed else "all", starts=starts)
            starts = False
        return ids

    def marked(self, text: str, template: ChatTemplate) -> str:
        """A text as `rendered` marks it where it stands in a message."""
        marked: str = control_marks.marked(text, self._control_tokens(template))
        return marked

    def end_ids(self, template: ChatTemplate) -> tuple[int, ...]:
        """The added token that the template puts right behind an answer, which ends a reply.

        None if it puts a text there, or cannot be asked.
        """
        messages = [Message("user", "A question?"), Message("assistant", _ANSWER)]
        try:
            text = self.rendered(template, messages, add_generation_prompt=False)
        except QmixError:
            return ()
        _, found, behind = text.rpartition(_ANSWER)
        for index in self._backend.encode(behind, starts=False) if found else ():
            if index in self._added:
                return (index,)
            if self.decode([index]).strip():
                break
        return ()

    def _control_tokens(self, template: ChatTemplate) -> re.Pattern[str]:
        """What a user cannot type: special tokens, and added ones that the template writes."""
        return control_marks.pattern(
            token.content
            for token in self._added.values()
            if token.special or (token.content in template.source and not token.content.isspace())
        )

    def _inst(
        self,
        messages: Messages,
        *,
        tools: object,
        documents: object,
        add_generation_prompt: bool,
        continue_final_message: bool | str,
    ) -> list[int]:
        """A conversation in the [INST] format, which may end with an answer."""
        if tools or documents:
            raise UsageError("the [INST] format takes no tools and no documents")
        turns = list(messages)
        last = inst.checked_message(turns[-1], len(turns) - 1) if turns else None
        if last is None or last.role != "assistant" or add_generation_prompt:
            return inst.encode(turns, self)
        ids = inst.encode(turns[:-1], self) + inst.answer(last, self)
        return ids if continue_final_message else [*ids, inst.end(self)]


def _check_request(tokenize: bool, sanitize: bool, mask: bool) -> None:
    if mask:
        raise wrong_value("return_assistant_tokens_mask", "False", True)
    if sanitize and not tokenize:
        raise wrong_value("sanitize_control_tokens", "False, because tokenize=False", True)


def _ends_open(asked: bool | None, goes_on: bool | str) -> bool:
    """Whether a conversation ends where an answer begins.

    Raises:
        UsageError: it is to go on with its last message as well.
    """
    if asked and goes_on:
        raise wrong_value("add_generation_prompt", "False, to go on with a message", True)
    return not goes_on if asked is None else asked


def _is_batch(conversation: Any) -> bool:
    """Whether it is a list of conversations."""
    if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
        return False
    return bool(conversation) and isinstance(conversation[0], (list, tuple))
