"""How a chat is put into ids, turn by turn: by a checkpoint's template, or in the [INST] format.

What a user types never becomes a control token, and the ids of an answer stay as they were
generated wherever the template shows the answer as it is: those ids are in a cache.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from qmix.errors import UsageError
from qmix.files import regular_file
from qmix.text import chat_template, chat_templates
from qmix.text.chat_encoder import INST, ChatEncoder, ChatTemplate
from qmix.text.chat_template import Message

INST_NAME = "[INST]"


class ChatFormat(Protocol):
    """What makes prompts of conversations."""

    @property
    def name(self) -> str:
        """What is said of it at a chat's start."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a reply, beside the model's own end."""
        ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that the model is to continue.

        Args:
            messages: an answer may come as ids alone, without its text.

        Raises:
            UsageError, CheckpointError: the messages do not fit the format, or it fails.
        """
        ...


class InstFormat:
    """Mixtral's [INST] format, segment by segment; see `chat_template`."""

    name = INST_NAME
    end_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: ChatEncoder) -> None:
        self._tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See ChatFormat."""
        return chat_template.encode(messages, self._tokenizer)


class TemplateFormat:
    """A template of the checkpoint or of the user; see `chat_encoder`."""

    def __init__(self, tokenizer: ChatEncoder, template: ChatTemplate, name: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.name = name
        self._text = ""  # of the last prompt, with its marks
        self._ids: list[int] = []

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See ChatFormat."""
        return self._tokenizer.end_ids(self._template)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See ChatFormat."""
        turns = [self._written(message) for message in messages]
        text = self._tokenizer.rendered(self._template, turns, sanitized=True)
        if text == self._text:  # the same question again: the cache holds its ids
            return list(self._ids)
        ids = self._continued(text, messages[-2]) if len(messages) > 1 else None
        if ids is None:
            ids = self._tokenizer.rendered_ids(text, self._template, sanitized=True)
        self._text, self._ids = text, ids
        return list(ids)

    def _continued(self, text: str, answer: Message) -> list[int] | None:
        """The last prompt, the answer's own ids, and what follows; None if the text is another."""
        if not self._text or answer.ids is None:
            return None
        for shown in self._shown(answer.ids):
            before = self._text + self._tokenizer.marked(shown, self._template)
            if text.startswith(before):
                rest = text[len(before) :]
                behind = self._tokenizer.rendered_ids(
                    rest, self._template, sanitized=True, starts=False
                )
                return [*self._ids, *answer.ids, *behind]
        return None

    def _shown(self, ids: Sequence[int]) -> Iterator[str]:
        """The text of an answer: as it is read, and with the space that it has behind a prompt."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        yield text
        pieces = self._tokenizer.pieces
        if ids and pieces.drops_first_space and pieces.texts[ids[0]].startswith(" "):
            yield f" {text}"

    def _written(self, message: Message) -> Message:
        if message.ids is None:
            return message
        text = self._tokenizer.decode(list(message.ids), skip_special_tokens=True)
        return Message(message.role, text)


def chosen_template(tokenizer: ChatEncoder, given: str | None = None) -> ChatTemplate | None:
    """The template of chats; None: the [INST] format.

    Args:
        given: the name of a template of the checkpoint, a file, or "inst"; None: the checkpoint's
            own, and [INST] without one.

    Raises:
        UsageError: there is no such template.
        CheckpointError: the file cannot be read.
    """
    names = tokenizer.chat_templates
    if given is None or given == INST or given in names:
        return tokenizer.template(given)
    if not regular_file.exists(Path(given)):
        known = ", ".join([*sorted(names), INST])
        raise UsageError(
            "no such template",
            where="--template",
            expected=f"one of {known}, or a file",
            found=repr(given)[:80],
        )
    return ChatTemplate(name=given, source=chat_templates.read_file(Path(given)))


def chat_format(tokenizer: ChatEncoder, given: str | None = None) -> ChatFormat:
    """The format of a chat; see chosen_template.

    Raises:
        UsageError: there is no such template.
        CheckpointError: the file cannot be read.
    """
    template = chosen_template(tokenizer, given)
    if template is None:
        return InstFormat(tokenizer)
    is_file = given is not None and given not in tokenizer.chat_templates
    name = template.name if is_file else f"the checkpoint's own, {template.name}"
    return TemplateFormat(tokenizer, template, name)
