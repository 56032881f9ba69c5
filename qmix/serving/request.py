"""Request: a prompt and how to go on from it; what comes back of it; its end.

Knows no model and no schedule.
"""

import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from qmix.errors import QmixError, UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.logits_processors import LogitsProcessor

# "cancelled": the caller left. "deadline": its time was over. "shutdown": the engine was closed.
Finish = Literal["stop", "length", "cancelled", "deadline", "shutdown", "error"]
MAX_TOP_LOGPROBS = 20


class BusyError(QmixError):
    """The queue of requests is full, or the engine takes no more."""

    exit_code = 4


class Mask(Protocol):
    """A logits processor of one request that prepares itself beside the model, id by id."""

    @property
    def ready(self) -> bool:
        """Whether a call would not wait."""
        ...

    def wait(self) -> None:
        """Until it is ready."""
        ...

    def advance(self, index: int) -> None:
        """The reply goes on with an id."""
        ...

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V), excluded ids at -inf."""
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """What one caller asks for.

    Attributes:
        ids: the prompt.
        config: when to stop and how to choose; one reply each (num_return_sequences is not used).
        starts_new_text: the reply is a text of its own; otherwise it continues the prompt's.
        processors: each `(ids so far (1, L), scores (1, V)) -> scores`; used by this request alone.
        mask: what excludes ids, after the processors.
        shown_ids: control tokens that stand in the text.
        top_logprobs: alternatives reported with each id; None: not even the id's own.
        prompt_logprobs: report those of the prompt's ids too; nothing of it is then taken from an
            earlier request's cache.
        expert_counts: count which experts computed each new id.
        deadline_s: seconds from its arrival after which it ends; None: none.

    Raises:
        UsageError: no prompt, too many alternatives, a deadline that is none.
    """

    ids: Sequence[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    _: KW_ONLY
    starts_new_text: bool = False
    processors: Sequence[LogitsProcessor] = ()
    mask: Mask | None = None
    shown_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    expert_counts: bool = False
    deadline_s: float | None = None

    @property
    def looks_inside(self) -> bool:
        """Whether it asks for more of its prompt than what follows it."""
        return self.prompt_logprobs or self.expert_counts

    def __post_init__(self) -> None:
        if not self.ids:
            raise UsageError("an empty prompt", where="ids", expected="at least one id")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UsageError(
                "out of range",
                where="top_logprobs",
                expected=f"0 to {MAX_TOP_LOGPROBS}",
                found=self.top_logprobs,
            )
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise UsageError(
                "out of range", where="deadline_s", expected="more than 0", found=self.deadline_s
            )


@dataclass(frozen=True)
class LogProb:
    """The natural logarithm of an id's probability before temperature and filters.

    Attributes:
        top: the likeliest ids with theirs, likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A new id, and the text that it completes; no text may be certain yet."""

    id: int
    text: str
    logprob: LogProb | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a request; nothing follows it.

    Attributes:
        error: why, if `finish` is "error".
        stop: the stop string that ended it.
        cached_tokens: of the prompt, found in the cache of an earlier request.
        prompt_logprobs: of the prompt's second id and those after it, if they were asked for.
        expert_counts: new ids that each expert computed, layer by layer, if they were asked for.
        waited_s, first_token_s, elapsed_s: seconds from its arrival to a slot, to the first id (0
            without one), and to the end.
    """

    finish: Finish
    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    error: QmixError | None = None
    stop: str | None = None
    prompt_logprobs: tuple[LogProb, ...] = ()
    expert_counts: tuple[tuple[int, ...], ...] = ()
    waited_s: float = 0.0
    first_token_s: float = 0.0
    elapsed_s: float = 0.0


Event = Piece | Ended
Listener = Callable[[Event], None]


class Ticket:
    """A request on its way. Its listener is called in the engine's thread and must not block.

    Attributes:
        ids: the prompt's; arrays are compared in one piece.

    Raises:
        UsageError: the prompt holds something else than ids.
    """

    def __init__(self, request: Request, listener: Listener) -> None:
        try:
            self.ids = array("q", request.ids)
        except (TypeError, OverflowError) as error:
            raise UsageError("not token ids", where="ids", found=error) from None
        self.request = request
        self.arrived = time.monotonic()
        self._listener = listener
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask for its end; nothing happens if it has ended."""
        self._cancelled.set()

    @property
    def early_finish(self) -> Finish | None:
        """How it ends without having come to its end: its caller left, or its deadline passed."""
        limit = self.request.deadline_s
        if self._cancelled.is_set():
            return "cancelled"
        return "deadline" if limit is not None and self.age_s >= limit else None

    @property
    def age_s(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived

    def tell(self, event: Event) -> None:
        """Hand an event to the caller. A listener that raises has left: the request is cancelled.

        Callers are other people's code, and a fault of theirs must not end the others' requests.
        """
        try:
            self._listener(event)
        except Exception:  # noqa: BLE001
            self.cancel()


class Events:
    """The events of one request for a caller that waits in a thread of its own."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self._queue.put(event)

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, the last of them an Ended."""
        while True:
            event = self._queue.get()
            yield event
            if isinstance(event, Ended):
                return
