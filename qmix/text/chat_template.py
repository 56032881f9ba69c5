"""A conversation as token ids: Mixtral-8x7B-Instruct's [INST] format, segment by segment.

Pure: knows of a tokenizer only that it encodes. `[INST]` is ordinary text to this tokenizer (733
16289 28793), so a user who types it cannot be told from the format: no claim of immunity is made.
Control tokens (`<s>`, `</s>`) never come out of a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmix.errors import UsageError

ROLES = ("system", "user", "assistant")


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Message:
    """One turn. `ids`: an assistant's answer as it was generated, used instead of its text.

    Encoding the text of an answer again need not give the ids that were sampled, and a KV cache
    knows the sampled ones.
    """

    role: str
    content: str
    ids: tuple[int, ...] | None = None


def encode(messages: Sequence[Message | Mapping[str, str]], tokenizer: Encoder) -> list[int]:
    """The ids that the model continues with its next answer.

    `<s>`, then for each turn `[INST] user [/INST]` and `answer </s>`; a system prompt and a blank
    line stand before the first user text. Texts are taken as they are: nothing is stripped.
    (Format v1 of mistral-common, which refuses an empty answer; here it is just `</s>`.)

    Args:
        messages: `Message`s, or mappings with `role` and `content`. A system message first or
            not at all, then user and assistant in turn, the user last.

    Raises:
        UsageError: a wrong order of roles; the message names the index and the role.
    """
    turns = [_message(one, index) for index, one in enumerate(messages)]
    _check_order(turns)
    system = ""
    if turns[0].role == "system":
        # An empty system prompt is none: no blank line is left of it.
        system = turns[0].content and f"{turns[0].content}\n\n"
        turns = turns[1:]
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids += _user(system + turns[0].content, tokenizer)
    for answer, user in zip(turns[1::2], turns[2::2], strict=True):
        ids += _answer(answer, tokenizer)
        ids += continue_turn(user.content, tokenizer)
    return ids


def continue_turn(text: str, tokenizer: Encoder) -> list[int]:
    """The ids of one more user turn, to append behind an answer that already stands in a cache.

    `</s>` and `[INST] text [/INST]`: exactly what `encode` puts behind that answer. Leave the
    first id out if the answer's own `</s>` has been fed to the model.
    """
    return [_end(tokenizer), *_user(text, tokenizer)]


def _user(text: str, tokenizer: Encoder) -> list[int]:
    return tokenizer.encode(f"[INST] {text} [/INST]", add_special_tokens=False)


def _answer(message: Message, tokenizer: Encoder) -> list[int]:
    if message.ids is None:
        return tokenizer.encode(message.content, add_special_tokens=False)
    ids = list(message.ids)
    return ids[:-1] if ids[-1:] == [_end(tokenizer)] else ids


def _end(tokenizer: Encoder) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-sequence token", where="tokenizer")
    return tokenizer.eos_token_id


def _message(value: Message | Mapping[str, str], index: int) -> Message:
    where = f"messages[{index}]"
    if isinstance(value, Mapping):
        missing = [key for key in ("role", "content") if key not in value]
        if missing:
            raise UsageError(f"{missing[0]} is missing", where=where, found=sorted(map(str, value)))
        value = Message(value["role"], value["content"])
    if not isinstance(value, Message):
        raise UsageError(
            "wrong type",
            where=where,
            expected="a Message, or a mapping with role and content",
            found=type(value).__name__,
        )
    if value.role not in ROLES:
        raise UsageError(
            "unknown role",
            where=where,
            expected="one of " + ", ".join(ROLES),
            found=repr(value.role)[:80],
        )
    if not isinstance(value.content, str):
        raise UsageError(
            f"the {value.role}'s content is not a text",
            where=where,
            expected="a string",
            found=type(value.content).__name__,
        )
    return value


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
                remedy="A system message first or not at all, then user and assistant in turn.",
            )
    if len(turns) == first:
        raise UsageError("no user message", where="messages", found=f"{len(turns)} messages")
    if turns[-1].role != "user":
        raise UsageError(
            "the last message is not the user's",
            where=f"messages[{len(turns) - 1}]",
            expected="user",
            found=turns[-1].role,
        )
