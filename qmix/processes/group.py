"""The processes that share the work of one command, as one of them sees them.

accelerate's `PartialState`: started by `accelerate launch`, by torchrun, or by `launch`. Knows
nothing of the work.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

from qmix.errors import QmixError, UnsupportedError

Item = TypeVar("Item")

# One process may compute for days while the others wait for it. A lost one is noticed at once: its
# connections end.
_PATIENCE = timedelta(days=30)


class LostPeerError(QmixError):
    """Another process of the group was lost; whoever started the group says which."""

    exit_code = 76


@dataclass(frozen=True)
class Group:
    """This process, and the others that run the same command.

    Every method but `share` waits for the others, which must call it too.

    Attributes:
        rank: which of them this is. size: how many they are.
        exchange: takes a list of this process, and returns those of all, joined in their order.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[list[Any]], list[Any]] = list

    @property
    def is_first(self) -> bool:
        """Whether this one leads, and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of some items: consecutive ones, as many as the others have or
        one more.
        """
        first, last = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(items[first:last])

    def rounds(self, items: Sequence[Item]) -> list[list[Item]]:
        """This process's items of each round, one or none; a round has one for each process."""
        starts = range(0, len(items), self.size)
        return [list(items[start:][: self.size][self.rank :][:1]) for start in starts]

    def gathered(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in their order.

        Raises:
            LostPeerError: another process was lost.
        """
        return self.exchange(items)

    def told(self, item: Item | None = None) -> Any:
        """What the first process says; the others say nothing.

        Raises:
            LostPeerError: another process was lost.
        """
        (said,) = self.exchange([item] if self.is_first else [])
        return said

    def wait(self) -> None:
        """Go on when all have come here.

        Raises:
            LostPeerError: another process was lost.
        """
        self.exchange([])


ALONE = Group()


def processes() -> int:
    """How many processes this one is of; 1 if nobody started several."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def is_first() -> bool:
    """Whether this process prints."""
    return os.environ.get("RANK", "0") == "0"


def on_one_machine() -> bool:
    """Whether all processes run here."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


def check_extra() -> None:
    """
    Raises:
        UnsupportedError: accelerate is missing.
    """
    if find_spec("accelerate") is None:
        raise UnsupportedError(
            "several processes need accelerate",
            remedy="Run: pip install 'qmix-runtime[scale]'",
        )


def current() -> Group:
    """The group that this process was started in, connected to the others."""
    if processes() == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return Group(state.process_index, state.num_processes, _exchange)


def _exchange(items: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    try:
        gathered: list[Any] = gather_object(items)
    except RuntimeError as error:  # a connection that ended
        raise LostPeerError("another process was lost; what started them says which") from error
    return gathered
