"""Chat transcripts as windows: the template applied, and the answers scored.

What a chat model writes are answers, so only their ids are scored, the end of each included; what
stands before them is read as it is in a chat. Shape letters: W conversations, S window. Knows
nothing of models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmix.errors import CheckpointError, UsageError
from qmix.evals.quality.texts import Text, read_text
from qmix.evals.quality.windows import ScoringWindows, check_range
from qmix.formats import Checkpoint
from qmix.quantities import counted
from qmix.text.chat_encoder import INST
from qmix.text.chat_format import chosen_template
from qmix.text.tokenizer import LlamaTokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Conversations:
    """Chat transcripts to score; a Material of `evaluation`.

    Attributes:
        chats: the messages of each.
        text: they were read from it.
        where: the file, in errors.
        size: ids of a conversation at most; None: the model's positions.
        template: see `qmix.text.chat_format.chosen_template`.
    """

    chats: tuple[Messages, ...]
    text: Text
    where: str
    size: int | None = None
    template: str | None = None

    def windows(
        self, checkpoint: Checkpoint, tokenizer: LlamaTokenizer, ids: list[int]
    ) -> ScoringWindows:
        """A window for each conversation, its answers scored; the ends are padded.

        Raises:
            UsageError: there is no such template, it refuses a conversation or does not show an
                answer behind its prompt, or no answer fits.
        """
        positions = checkpoint.config.max_position_embeddings
        size = positions if self.size is None else self.size
        check_range("ctx", size, 2, positions)
        own = chosen_template(tokenizer, self.template)
        source = INST if own is None else own.source
        rows = [
            self._row(tokenizer, source, chat, number)
            for number, chat in enumerate(self.chats, start=1)
        ]
        kept = [(whole[:size], scored[:size]) for whole, scored in rows if any(scored[:size])]
        if not kept:
            raise UsageError("no answer fits the window", where=self.where, found=f"{size} tokens")
        longest = max(len(whole) for whole, _ in kept)
        cut = sum(len(whole) > size for whole, _ in rows)
        return ScoringWindows(
            torch.tensor([whole + [0] * (longest - len(whole)) for whole, _ in kept]),
            torch.tensor([scored + [False] * (longest - len(scored)) for _, scored in kept]),
            f"{counted(len(kept), 'conversation')} by the chat template "
            f"{INST if own is None else own.name}, answers scored, {cut} cut at {size} tokens, "
            f"{len(rows) - len(kept)} dropped",
        )

    def _row(
        self, tokenizer: LlamaTokenizer, template: str, chat: Messages, number: int
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation up to its last answer, and which of them are answers'."""
        encode = partial(
            tokenizer.apply_chat_template, chat_template=template, sanitize_control_tokens=True
        )
        whole: list[int] = []
        spans: list[tuple[list[int], list[int]]] = []
        try:
            for index, message in enumerate(chat):
                if message["role"] == "assistant":
                    whole = encode(chat[: index + 1], add_generation_prompt=False)
                    spans.append((encode(chat[:index]), whole))
        except UsageError as error:
            raise error.at(f"{self.where}, conversation {number}") from None
        scored = [False] * len(whole)
        for prompt, answered in spans:
            if answered[: len(prompt)] != prompt or whole[: len(answered)] != answered:
                raise UsageError(
                    "the template shows an answer otherwise than behind its prompt",
                    where=f"{self.where}, conversation {number}",
                    remedy="Give another --template, or conversations of one answer each.",
                )
            scored[len(prompt) : len(answered)] = [True] * (len(answered) - len(prompt))
        return whole, scored


def read_conversations(
    path: Path, size: int | None = None, template: str | None = None
) -> Conversations:
    """The transcripts of a JSONL file: `{"messages": [...]}`, or the list alone, on each line.

    Args:
        size, template: see Conversations.

    Raises:
        CheckpointError: not a file, unreadable, or a line is no conversation with an answer.
    """
    text = read_text(path)
    chats = []
    for number, line in enumerate(text.content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise _no_conversation(path, number, "no JSON") from None
        messages = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise _no_conversation(path, number, "something else")
        if not any(message["role"] == "assistant" for message in messages[1:]):
            raise _no_conversation(path, number, "no answer of the assistant")
        chats.append(messages)
    if not chats:
        raise CheckpointError("no conversations", where=str(path), expected="one a line")
    return Conversations(tuple(chats), text, str(path), size, template)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _no_conversation(path: Path, number: int, found: str) -> CheckpointError:
    return CheckpointError(
        "not a conversation",
        where=f"{path}, line {number}",
        expected='{"messages": [{"role": "user", "content": "..."}, ...]}',
        found=found,
    )
