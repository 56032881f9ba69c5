"""Replies in numbers: one, and all of a conversation; and why a reply ended.

Knows no model and no terminal. Times in seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qmix.experts.statistics import Statistics
from qmix.generation.draft_counts import DraftCounts
from qmix.quantities import counted

# `stop`: the model ended it. `stop_string`: its text reached one. `length`: max_new_tokens are
# there. `context`: nothing more fits. `stopped`: by Ctrl-C. `error`: its model failed.
Finish = Literal["stop", "stop_string", "length", "context", "stopped", "error"]

_SAID: dict[Finish, str] = {
    "stop": "",
    "stop_string": "stop string",
    "length": "cut short: length",
    "context": "cut short: context full",
    "stopped": "stopped",
    "error": "cut short: error",
}


@dataclass(frozen=True, kw_only=True)
class ReplyStats:
    """One reply in numbers.

    Attributes:
        prompt_tokens: of the whole prompt, of which the cache held `cached_tokens`; None: a server
            did not tell.
        dropped_turns, dropped_tokens: what did not fit the context before it.
        context_tokens, context_limit: None: not known.
        finish: why it ended.
        experts: what the store did during the reply, if the model is offloaded.
        energy_j: joules that the GPU took, if its driver tells.
        drafts: ids that were drafted from the text and verified together; None: nothing is drafted.
    """

    prompt_tokens: int | None
    cached_tokens: int | None
    dropped_turns: int = 0
    dropped_tokens: int = 0
    new_tokens: int
    first_token_s: float
    elapsed_s: float
    context_tokens: int | None
    context_limit: int | None
    finish: Finish
    experts: Statistics | None = None
    energy_j: float | None = None
    drafts: DraftCounts | None = None

    @property
    def cut(self) -> bool:
        """Whether the model would have gone on. A stop string is an end that the user chose."""
        return self.finish not in ("stop", "stop_string")

    @property
    def decode_s(self) -> float:
        """Time after the first token, whose own time is the prompt's."""
        return max(self.elapsed_s - self.first_token_s, 0.0) if self.new_tokens > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed without the first token; 0 for one token."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        document = asdict(self) | {"tokens_per_s": self.tokens_per_s, "cut": self.cut}
        return document | {"experts": None if self.experts is None else self.experts.to_dict()}

    def __str__(self) -> str:
        return self.line()

    def line(self, *, hint: str = "") -> str:
        """All of it in one line, the end first.

        Args:
            hint: what can be done about a reply that was cut.
        """
        ended = _SAID[self.finish] + (f" ({hint})" if hint and self.cut else "")
        context = "" if self.context_tokens is None else f"context {self.context_tokens}"
        if context and self.context_limit is not None and self.context_tokens is not None:
            share = round(100 * self.context_tokens / self.context_limit)
            context += f"/{self.context_limit} ({share} %)"
        parts = (
            ended,
            counted(self.new_tokens, "token"),
            f"{self.tokens_per_s:.1f} tok/s" if self.tokens_per_s else "",
            f"first token {self.first_token_s:.2f} s",
            context,
            "" if self.cached_tokens is None else f"cached {self.cached_tokens}",
        )
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class ConversationStats:
    """All replies of a conversation in numbers; of prompts those that are known."""

    replies: int
    new_tokens: int
    computed_tokens: int
    cached_tokens: int
    first_token_s: float
    tokens_per_s: float
    experts: Statistics | None
    energy_j: float | None
    drafts: DraftCounts | None

    @classmethod
    def of(cls, replies: Sequence[ReplyStats]) -> "ConversationStats":
        """The sums over at least one reply; `first_token_s` is the mean."""
        decoded = sum(reply.new_tokens - 1 for reply in replies if reply.decode_s)
        decode_s = sum(reply.decode_s for reply in replies)
        prompts = [
            (reply.prompt_tokens, reply.cached_tokens)
            for reply in replies
            if reply.prompt_tokens is not None and reply.cached_tokens is not None
        ]
        stores = [reply.experts for reply in replies if reply.experts is not None]
        drafts = [reply.drafts for reply in replies if reply.drafts is not None]
        energies = [reply.energy_j for reply in replies if reply.energy_j is not None]
        return cls(
            replies=len(replies),
            new_tokens=sum(reply.new_tokens for reply in replies),
            computed_tokens=sum(tokens - cached for tokens, cached in prompts),
            cached_tokens=sum(cached for _, cached in prompts),
            first_token_s=sum(reply.first_token_s for reply in replies) / len(replies),
            tokens_per_s=decoded / decode_s if decode_s else 0.0,
            experts=Statistics.total(stores) if stores else None,
            energy_j=sum(energies) if energies else None,
            drafts=sum(drafts, DraftCounts()) if drafts else None,
        )

    def __str__(self) -> str:
        parts = (
            counted(self.replies, "reply"),
            counted(self.new_tokens, "token"),
            f"{self.tokens_per_s:.1f} tok/s" if self.tokens_per_s else "",
            f"first token {self.first_token_s:.2f} s on average",
            f"prompts {self.computed_tokens:,} computed, {self.cached_tokens:,} cached"
            if self.computed_tokens or self.cached_tokens
            else "",
        )
        return " · ".join(part for part in parts if part)
