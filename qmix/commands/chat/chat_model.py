"""ChatModel: what a conversation asks of a model, in this process or behind a server.

Knows neither of the two; see local_model and remote_model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmix.commands.chat.reply_stats import Finish, ReplyStats
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.errors import QmixError
from qmix.generation.config import GenerationConfig

Answer = tuple[int | str, ...]  # in the pieces that the model gave: its ids, or texts


class ServerError(QmixError):
    """The model lies behind a server, which does not answer, or not as it should."""

    exit_code = 4


@dataclass(frozen=True)
class Turn:
    """What the user said, and the pieces of the answer.

    Attributes:
        answer: without the closing end-of-sequence.
        hidden: how many of the first pieces prompts leave out, because the context has no place.
        attempt: how many answers were thrown away before this one.
        finish: why the answer ended; None if it is not known.
    """

    user: str
    answer: Answer = ()
    hidden: int = 0
    attempt: int = 0
    finish: Finish | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where the reply begins, or goes on.

    Attributes:
        turns: the last of them holds what the reply goes on from.
        ids: as the model gets them; empty if it does not tell.
        tokens: how many; None if the model does not tell.
        cached_tokens: how long a prefix need not be computed, as far as that is known.
    """

    system: str | None
    turns: tuple[Turn, ...]
    ids: tuple[int, ...] = ()
    tokens: int | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class TokenChoice:
    """One token of a reply as the vocabulary writes it, and what else it could have been.

    Attributes:
        others: the likeliest others, each with its probability.
    """

    piece: str
    probability: float
    others: tuple[tuple[str, float], ...]


class Reply(Protocol):
    """A reply to one prompt. It is iterated once, over its texts as they come, and may be left."""

    @property
    def prompt(self) -> Prompt:
        """What it is the reply to."""
        ...

    @property
    def answer(self) -> Answer:
        """Its pieces so far, without the closing end-of-sequence."""
        ...

    @property
    def choices_are(self) -> str:
        """What the probabilities of its tokens are those of."""
        ...

    def __iter__(self) -> Iterator[str]:
        """Generate it.

        Raises:
            QmixError: it cannot go on; what there is stays.
        """
        ...

    def stats(self) -> ReplyStats:
        """It in numbers, once it has ended or was left."""
        ...

    def choices(self) -> Sequence[TokenChoice]:
        """Its tokens and their probabilities.

        Raises:
            UsageError: nobody asked for them in time.
        """
        ...

    def expert_counts(self) -> Sequence[Sequence[int]]:
        """How many of its tokens each expert computed, layer by layer.

        Raises:
            UsageError: it is not known.
        """
        ...


@dataclass(frozen=True)
class Bound:
    """The most tokens a second that memory allows, and what its bandwidths are taken from."""

    tokens_per_s: float
    source: str


class ChatModel(Protocol):
    """A model to talk to."""

    @property
    def identity(self) -> ModelIdentity:
        """Which one it is."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens of prompt and reply together at most; None: not known."""
        ...

    @property
    def template(self) -> str | None:
        """What makes its prompts, where that is worth a word without a terminal."""
        ...

    def facts(self) -> tuple[str, ...]:
        """What it is and where; the first is its name."""
        ...

    def prompt(self, system: str | None, turns: Sequence[Turn]) -> Prompt:
        """The prompt for a reply to the last turn, or for more of it.

        Raises:
            QmixError: the turns do not fit its template, or nobody answers.
        """
        ...

    def reply(self, prompt: Prompt, config: GenerationConfig) -> Reply:
        """A reply that has not begun."""
        ...

    def text(self, answer: Answer) -> str:
        """The text of an answer, or of its beginning."""
        ...

    def answer(self, text: str) -> Answer:
        """An answer whose own pieces are not known."""
        ...

    def length(self, answer: Answer) -> int | None:
        """How many tokens an answer has; None: it does not tell."""
        ...

    def tokens(self, text: str) -> Sequence[tuple[str, int]]:
        """The tokens of a text: as the vocabulary writes each, and its id.

        Raises:
            UsageError: it does not tell.
        """
        ...

    def count(self, text: str) -> int | None:
        """How many tokens a text has; None: it does not tell."""
        ...

    def prompt_text(self, prompt: Prompt) -> str:
        """A prompt as the model got it.

        Raises:
            UsageError: it does not tell.
        """
        ...

    def bound(self, stats: ReplyStats) -> Bound | None:
        """How fast its memory could be at best at the end of a reply; None: it does not tell."""
        ...

    def keep_cache(self) -> int:
        """Keep what was computed of the conversation, where somebody asked for that; its tokens.

        A failure is a warning: the conversation is not lost with it.
        """
        ...

    def release(self) -> None:
        """Free what it holds; it is not used again."""
        ...
