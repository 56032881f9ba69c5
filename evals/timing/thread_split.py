"""How the CPU kernels split a pass over threads, and what that split would take on more of them.

One thread runs every piece of a pass that is split for T threads, and each parallel region's
pieces and processor time are recorded, with what runs between regions. A model of a machine turns
that into the time of T threads: a prediction, never a measurement. Knows nothing of printing.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from qmix.kernels.cpu.functions import Functions
from qmix.kernels.cpu.library import library

_FORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_ENTER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_TASKS_OFFSET = 8  # of Loop::tasks, csrc/threads.h


@dataclass(frozen=True)
class Region:
    """A parallel region: pieces that threads take from one counter until none is left.

    Attributes:
        pieces: how many, taken to be alike.
        seconds: of all of them, one after another.
    """

    pieces: int
    seconds: float


@dataclass(frozen=True)
class Split:
    """A pass that is split for a number of threads.

    Attributes:
        serial: seconds that one thread works in our kernels between regions. Recording adds some
            20 microseconds a region to it.
        outside: seconds on one thread outside our kernels: Python, and torch's operations.
    """

    threads: int
    regions: tuple[Region, ...]
    serial: float
    outside: float

    @property
    def seconds(self) -> float:
        """On one thread."""
        return sum(region.seconds for region in self.regions) + self.serial + self.outside


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a region costs besides its pieces. None of it was measured here.

    Attributes:
        fork: seconds of a fork and a join of two threads, and `fork_each` of every thread more. An
            assumption: a few microseconds on a few threads, more with their number, as the EPCC
            microbenchmarks (Bull, 1999) and G. Hager's "Barrier shootout" find for g++.
        counter: seconds until a contended counter has moved to the next core. At least 70 cycles
            (T. Downs, "A concurrency cost hierarchy", 2020); three times that for a large mesh.
        speedup: how many times the memory feeds as much as one core takes from it here.
    """

    fork: float = 2e-6
    fork_each: float = 0.1e-6
    counter: float = 80e-9
    speedup: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a pass on T threads, and where they go.

    Attributes:
        work: the pieces, if they divided evenly. idle: threads that wait for the last pieces.
        counter, memory: that regions wait besides for their counter, and for the memory.
    """

    threads: int
    work: float
    idle: float
    counter: float
    memory: float
    forks: float
    serial: float
    outside: float

    @property
    def seconds(self) -> float:
        """All of them."""
        regions = self.work + self.idle + self.counter + self.memory
        return regions + self.forks + self.serial + self.outside


def predict(split: Split, machine: Machine) -> Prediction:
    """The time of a split on its threads.

    What lies outside our kernels is taken to be torch's, split evenly: the best case.
    """
    threads = split.threads
    work = idle = counter = memory = 0.0
    for region in split.regions:
        even = region.seconds / threads
        longest = -(-region.pieces // threads) * region.seconds / region.pieces
        counted = region.pieces * machine.counter if threads > 1 else 0.0
        fed = region.seconds / machine.speedup
        work += even
        idle += longest - even
        counter += max(0.0, counted - longest)
        memory += max(0.0, fed - max(longest, counted))
    fork = machine.fork + (threads - 2) * machine.fork_each if threads > 1 else 0.0
    return Prediction(
        threads=threads,
        work=work,
        idle=idle,
        counter=counter,
        memory=memory,
        forks=len(split.regions) * fork,
        serial=split.serial,
        outside=split.outside / threads,
    )


@dataclass
class _Record:
    """The clock's stops of one pass."""

    regions: list[Region] = field(default_factory=list)
    in_calls: float = 0.0

    def fork(self, enter: int, loop: int, threads: int, flags: int) -> None:
        """In place of libgomp's entry: this thread takes all pieces."""
        begun = time.thread_time()
        _ENTER(enter)(loop)
        taken = time.thread_time() - begun
        pieces = ctypes.c_int64.from_address(loop + _TASKS_OFFSET).value
        self.regions.append(Region(pieces, taken))


@dataclass(frozen=True)
class _Recorded(Functions):
    """Functions whose calls are timed."""

    record: _Record = field(default_factory=_Record)

    def call(self, name: str, *arguments: Any) -> None:
        begun = time.thread_time()
        super().call(name, *arguments)
        self.record.in_calls += time.thread_time() - begun


@contextmanager
def _recording(threads: int) -> Iterator[_Record]:
    compiled, record = library(), _Record()
    plain = compiled.functions
    assert plain is not None
    entry = _FORK(record.fork)
    address = ctypes.cast(entry, ctypes.c_void_p).value
    compiled.functions = _Recorded(
        plain.library, plain.isa, address, threads=threads, record=record
    )
    try:
        yield record
    finally:
        compiled.functions = plain
        del entry  # alive until here: the library calls it


def split_of(work: Callable[[], object], threads: int, turns: int) -> Split:
    """How `work` is split for so many threads; of several turns the one that took the least.

    torch's own operations should run on one thread meanwhile (torch.set_num_threads).
    """
    splits = []
    for _ in range(turns):
        with _recording(threads) as record:
            begun = time.thread_time()
            work()
            taken = time.thread_time() - begun
        in_regions = sum(region.seconds for region in record.regions)
        splits.append(
            Split(
                threads=threads,
                regions=tuple(record.regions),
                serial=record.in_calls - in_regions,
                outside=taken - record.in_calls,
            )
        )
    best = splits[0]
    if all(len(split.regions) == len(best.regions) for split in splits):
        regions = zip(*(split.regions for split in splits), strict=True)
        least = tuple(min(each, key=lambda region: region.seconds) for each in regions)
        best = replace(best, regions=least)
    return replace(
        best,
        serial=min(split.serial for split in splits),
        outside=min(split.outside for split in splits),
    )
