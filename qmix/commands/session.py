"""A conversation: its turns, what does not fit the context, and what came of each reply.

Knows a model as a ChatModel only, and nothing of terminals.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmix.commands.chat.chat_model import ChatModel, Prompt, Reply, Turn
from qmix.commands.chat.reply_stats import ReplyStats
from qmix.errors import QmixError, UsageError
from qmix.generation.config import GenerationConfig

_LEAST_SHOWN = 32  # pieces of a long answer that a continuation sees at least


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """A prompt, and what becomes of its reply.

    Attributes:
        turn: the turn that the reply becomes part of, with what it holds already.
        replaces: whether it takes the place of the last turn, once there is something of it.
        config: how the reply is sampled.
        dropped_turns, dropped_tokens: what did not fit the context.
    """

    turn: Turn
    replaces: bool
    config: GenerationConfig
    prompt: Prompt
    dropped_turns: int
    dropped_tokens: int

    @property
    def ids(self) -> tuple[int, ...]:
        """See Prompt."""
        return self.prompt.ids

    @property
    def cached_tokens(self) -> int:
        """See Prompt."""
        return self.prompt.cached_tokens


class Session:
    """Turns, system prompt and settings of one conversation with a model.

    Attributes:
        replies: the numbers of each.
        last: the last reply; None before the first.
    """

    def __init__(
        self, model: ChatModel, config: GenerationConfig, *, system: str | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.system = system
        self.turns: list[Turn] = []
        self.replies: list[ReplyStats] = []
        self.last: Reply | None = None

    @property
    def context(self) -> int | None:
        """Tokens of prompt and reply together at most; None: not known."""
        return self.model.context

    @property
    def stats(self) -> ReplyStats | None:
        """The last reply in numbers."""
        return self.replies[-1] if self.replies else None

    def clear(self) -> None:
        """Forget all turns and their statistics; the system prompt stays."""
        self.turns.clear()
        self.replies.clear()
        self.last = None

    def keep_cache(self) -> int:
        """Keep what was computed of the turns, see ChatModel; of none, nothing is kept."""
        return self.model.keep_cache() if self.turns else 0

    def release(self) -> None:
        """Let go of the model, so that another one has room; the turns go too."""
        self.clear()
        self.model.release()

    def undo(self) -> Turn:
        """Forget the last turn, and return it.

        Raises:
            UsageError: there is none.
        """
        last = self._last_turn()
        self.turns.pop()
        return last

    def text_of(self, turn: Turn) -> str:
        """The answer of a turn."""
        return self.model.text(turn.answer)

    def restore(self, texts: Sequence[tuple[str, str]]) -> None:
        """Replace all turns by these user messages and answers."""
        turns = [Turn(user, self.model.answer(text)) for user, text in texts]
        self.clear()
        self.turns = turns

    def prepare(self, text: str) -> PreparedPrompt:
        """The prompt for a reply to `text`, the next message.

        Where too little space is left for a reply, the oldest turns are dropped, down to half of
        the context at once, so that the cached prefix survives for some turns.

        Raises:
            UsageError: the message alone does not fit; the error names both token counts.
        """
        return self._prepared(Turn(text), self.config, replaces=False)

    def prepare_again(
        self, text: str | None = None, temperature: float | None = None
    ) -> PreparedPrompt:
        """The prompt for another answer to the last message, or to `text` in its place.

        Args:
            temperature: of this one reply.

        Raises:
            UsageError: there is no turn; as `prepare`; a temperature out of range.
        """
        config = self.config
        if temperature is not None:
            change = {"temperature": temperature, "do_sample": temperature != 0}
            config = config.updated(change)
        last = self._last_turn()
        attempt = last.attempt + 1 if text is None else 0
        turn = Turn(last.user if text is None else text, attempt=attempt)
        return self._prepared(turn, _reseeded(config, attempt), replaces=True)

    def prepare_continuation(self) -> PreparedPrompt:
        """The prompt for more of the last answer. If it fills the context, its beginning is hidden.

        Raises:
            UsageError: there is no turn, or the model has ended the answer itself.
        """
        last = self._last_turn()
        if last.finish == "stop":
            raise UsageError("the reply is whole", remedy="/regen asks for another.")
        config = _reseeded(self.config, len(last.answer))
        return self._prepared(last, config, replaces=True)

    def reply(self, prepared: PreparedPrompt) -> Iterator[str]:
        """Generate the answer, text by text.

        However the iteration ends (end, `close`, KeyboardInterrupt, an error), what was generated
        is kept as the turn's answer. If there is nothing, all turns stay as they were.
        """
        reply = self.model.reply(prepared.prompt, prepared.config)
        self.last = reply
        failed: dict[str, Any] = {}
        try:
            yield from reply
        except QmixError:
            failed = {"finish": "error"}
            raise
        finally:
            stats = replace(
                reply.stats(),
                **failed,
                dropped_turns=prepared.dropped_turns,
                dropped_tokens=prepared.dropped_tokens,
            )
            self._keep(prepared, reply, stats)
            self.replies.append(stats)

    def _keep(self, prepared: PreparedPrompt, reply: Reply, stats: ReplyStats) -> None:
        """Make what is new part of its turn."""
        if not stats.new_tokens:
            return
        turn = prepared.turn
        whole = replace(turn, answer=(*turn.answer, *reply.answer), finish=stats.finish)
        self.turns[len(self.turns) - prepared.replaces :] = [whole]

    def _last_turn(self) -> Turn:
        if not self.turns:
            raise UsageError("there is no turn yet")
        return self.turns[-1]

    def _prepared(self, turn: Turn, config: GenerationConfig, *, replaces: bool) -> PreparedPrompt:
        """Drop what does not fit, as far as the model tells its context and its tokens."""
        earlier = self.turns[:-1] if replaces else self.turns
        prompt = self._prompt([*earlier, turn])
        before, dropped = prompt.tokens, 0
        if self.context is not None and before is not None:
            reserve = min(config.max_new_tokens or 256, self.context // 4)
            most = self.context - reserve
            if before > most:
                while dropped < len(earlier) and _length(prompt) + reserve > self.context // 2:
                    dropped += 1
                    prompt = self._prompt([*earlier[dropped:], turn])
            if _length(prompt) > most and turn.answer:
                turn = _shortened(turn, _length(prompt), self.context // 2, most)
                prompt = self._prompt([*earlier[dropped:], turn])
            if _length(prompt) > most:
                raise _too_long(_length(prompt), self.context, reserve)
        del self.turns[:dropped]
        return PreparedPrompt(
            turn=turn,
            replaces=replaces,
            config=config,
            prompt=prompt,
            dropped_turns=dropped,
            dropped_tokens=0 if before is None else before - _length(prompt),
        )

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        return self.model.prompt(self.system, turns)


def _length(prompt: Prompt) -> int:
    """The tokens of a prompt whose model tells them."""
    assert prompt.tokens is not None
    return prompt.tokens


def _shortened(turn: Turn, length: int, half: int, most: int) -> Turn:
    """The turn with the beginning of its answer hidden, so that half of the context is free.

    Args:
        length: tokens of the prompt. most: how many it may have.
    """
    shown = len(turn.answer) - turn.hidden
    other = length - shown
    kept = max(0, min(max(half - other, _LEAST_SHOWN), most - other))
    return replace(turn, hidden=len(turn.answer) - kept) if kept < shown else turn


def _too_long(length: int, context: int, reserve: int) -> UsageError:
    return UsageError(
        "the message does not fit the context",
        expected=f"at most {context - reserve} tokens ({context} of context, "
        f"{reserve} reserved for the reply)",
        found=f"{length} tokens",
        remedy="Shorten it, or the system prompt.",
    )


def _reseeded(config: GenerationConfig, by: int) -> GenerationConfig:
    """The configuration with another seed, if it has one: the same would draw the same again."""
    if config.seed is None:
        return config
    return config.updated({"seed": (config.seed + by) % (1 << 64)})
