"""A conversation as token ids: Mixtral-8x7B-Instruct's [INST] format, segment by segment.

`[INST]` is ordinary text to this tokenizer (733 16289 28793), so a user who types it cannot be told
apart from the format: the format gives no protection against injection. A text never encodes to a
control token (`<s>`, `</s>`). Knows of a tokenizer only that it encodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qmix.errors import UsageError, wrong_type
from qmix.quantities import counted

ROLES = ("system", "user", "assistant")


class Encoder(Protocol):
    """The part of a tokenizer that the template needs."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(
        self, text: str, add_special_tokens: bool = True, *, split_special_tokens: bool = False
    ) -> list[int]: ...


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: the text.
        ids: the ids of an assistant's answer as they were generated, used instead of its text.
            Encoding the text again need not give the sampled ids, which are those in a KV cache.
    """

    role: str
    content: str
    ids: tuple[int, ...] | None = None


def encode(messages: Sequence[Message | Mapping[str, Any]], tokenizer: Encoder) -> list[int]:
    """Encode a conversation that the model is to continue with its next answer.

    The ids are `<s>`, then `[INST] user [/INST]` and `answer </s>` for each turn. A system prompt
    and a blank line precede the first user text. Texts are not stripped. (This is format v1 of
    mistral-common, which refuses an empty answer; here an empty answer is just `</s>`.)

    Args:
        messages: `Message`s, or mappings with `role` and `content`: at most one system message,
            which comes first, then user and assistant alternating, the user last.

    Raises:
        UsageError: the roles are out of order; the message names the index and the role.
    """
    turns = [checked_message(message, index) for index, message in enumerate(messages)]
    _check_order(turns)
    system = ""
    if turns[0].role == "system":
        # An empty system prompt counts as none and leaves no blank line.
        system = turns[0].content and f"{turns[0].content}\n\n"
        turns = turns[1:]
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids += _user(system + turns[0].content, tokenizer)
    for reply, user in zip(turns[1::2], turns[2::2], strict=True):
        ids += answer(reply, tokenizer)
        ids += continue_turn(user.content, tokenizer)
    return ids


def continue_turn(text: str, tokenizer: Encoder) -> list[int]:
    """The ids of one more user turn, to append after an answer that is already in a cache.

    They are `</s>` and `[INST] text [/INST]`, exactly what `encode` puts after that answer. Leave
    out the first id if the answer's own `</s>` has been fed to the model.
    """
    return [end(tokenizer), *_user(text, tokenizer)]


def _user(text: str, tokenizer: Encoder) -> list[int]:
    return _typed(f"[INST] {text} [/INST]", tokenizer)


def answer(message: Message, tokenizer: Encoder) -> list[int]:
    """The ids of an answer, without the end."""
    if message.ids is None:
        return _typed(message.content, tokenizer)
    ids = list(message.ids)
    return ids[:-1] if ids[-1:] == [end(tokenizer)] else ids


def _typed(text: str, tokenizer: Encoder) -> list[int]:
    """The ids of a text in which no special token counts as one."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def end(tokenizer: Encoder) -> int:
    """The id that ends an answer.

    Raises:
        UsageError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-sequence token", where="tokenizer")
    return tokenizer.eos_token_id


def checked_message(value: Message | Mapping[str, Any], index: int) -> Message:
    """A message, of which the content may be a list of text parts.

    Raises:
        UsageError: it is none; the error names its index.
    """
    where = f"messages[{index}]"
    if isinstance(value, Mapping):
        missing = [key for key in ("role", "content") if key not in value]
        if missing:
            raise UsageError(f"{missing[0]} is missing", where=where, found=sorted(map(str, value)))
        value = Message(value["role"], _joined(value["content"]))
    if not isinstance(value, Message):
        raise wrong_type(where, "a Message, or a mapping with role and content", value)
    if value.role not in ROLES:
        raise UsageError(
            "unknown role",
            where=where,
            expected="one of " + ", ".join(ROLES),
            found=repr(value.role)[:80],
        )
    if not isinstance(value.content, str):
        raise UsageError(
            f"the {value.role}'s content is not text",
            where=where,
            expected="a string",
            found=type(value.content).__name__,
        )
    return value


def _joined(content: Any) -> Any:
    """The text of a list of text parts; anything else as it is."""
    parts = content if isinstance(content, (list, tuple)) else ()
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return "".join(map(str, texts)) if texts and all(isinstance(t, str) for t in texts) else content


def _check_order(turns: Sequence[Message]) -> None:
    first = 1 if turns and turns[0].role == "system" else 0
    for index, message in enumerate(turns[first:], start=first):
        expected = ("user", "assistant")[(index - first) % 2]
        if message.role != expected:
            raise UsageError(
                "roles out of order",
                where=f"messages[{index}]",
                expected=expected,
                found=message.role,
                remedy="Give at most one system message, first, then user and assistant alternating.",
            )
    if len(turns) == first:
        raise UsageError("no user message", where="messages", found=counted(len(turns), "message"))
    if turns[-1].role != "user":
        raise UsageError(
            "the last message is not from the user",
            where=f"messages[{len(turns) - 1}]",
            expected="user",
            found=turns[-1].role,
        )
