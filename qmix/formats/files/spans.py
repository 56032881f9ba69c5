"""Tensors that lie together in a file, read together.

Knows nothing of models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from qmix.errors import CheckpointError
from qmix.formats.files.large_reads import Span, opened
from qmix.formats.files.shards import Allocate, Entry
from qmix.weights.blob import PAGE_BYTES, TOGETHER_BYTES, TOGETHER_RUNS

Spread = Callable[[Sequence[Callable[[], None]]], None]


def in_turn(parts: Sequence[Callable[[], None]]) -> None:
    """Do the parts of a read one after another."""
    for part in parts:
        part()


@dataclass(frozen=True)
class Together:
    """How tensors that lie together are read.

    Attributes:
        spread: does the parts of a read, and waits for all of them.
        past_cache: what the page cache does not hold is read past it.
    """

    spread: Spread = in_turn
    past_cache: bool = False

    def read(self, entries: Mapping[str, Entry], into: Allocate) -> dict[str, Tensor]:
        """The tensors that lie in long runs, as views of the runs' pages; no others.

        Args:
            into: returns uint8 memory of the given number of bytes. Only what begins on a page is
                read past the cache.

        Raises:
            CheckpointError: see read_span.
        """
        read: dict[str, Tensor] = {}
        for span, within in spans(entries):
            pages = into(span.nbytes)
            past_cache = self.past_cache and pages.data_ptr() % PAGE_BYTES == 0
            what = f"the data of {within[0]} to {within[-1]}"
            read_span(span, what, pages, self.spread, past_cache=past_cache)
            for name in within:
                entry = entries[name]
                data = pages[entry.start - span.first : entry.stop - span.first]
                read[name] = data.view(entry.dtype).view(entry.shape)
        return read


def spans(entries: Mapping[str, Entry]) -> list[tuple[Span, list[str]]]:
    """The long runs of tensors side by side, the longest first, and the tensors within each."""
    runs: list[tuple[Span, list[str]]] = []
    ordered = sorted(entries.items(), key=lambda item: (item[1].file, item[1].start))
    for name, entry in ordered:
        if entry.start % entry.dtype.itemsize:  # no tensor can be a view of it
            continue
        if runs and (runs[-1][0].file, runs[-1][0].stop) == (entry.file, entry.start):
            span, within = runs.pop()
            runs.append((Span(span.file, span.start, entry.stop), [*within, name]))
        else:
            runs.append((Span(entry.file, entry.start, entry.stop), [name]))
    long = [run for run in runs if run[0].stop - run[0].start >= TOGETHER_BYTES]
    return sorted(long, key=lambda run: run[0].start - run[0].stop)[:TOGETHER_RUNS]


def read_span(span: Span, what: str, pages: Tensor, spread: Spread, *, past_cache: bool) -> None:
    """Read a span's pages.

    Args:
        what: lies there, for errors.
        pages: uint8 [span.nbytes]; past the cache, on a page of memory.

    Raises:
        CheckpointError: the file is gone, cannot be read, or ends before the span does.
    """
    memory = pages.numpy().data

    def read(way: Callable[[memoryview, int], int], start: int, stop: int) -> None:
        nbytes = way(memory[start:stop], span.first + start)
        if span.first + start + nbytes < min(span.first + stop, span.stop):
            raise CheckpointError(
                f"{what} ends early",
                where=str(span.file),
                expected=f"{span.stop} B",
                found=f"{span.first + start + nbytes} B",
                remedy="The file changed while it was read, or is still being written.",
            )

    with opened(span.file, past_cache=past_cache, what=f"{what} cannot be read") as reader:
        copies: list[Callable[[], None]] = []
        reads: list[Callable[[], None]] = []
        for start, stop in span.pieces():
            if reader.is_cached(span.first + start, span.first + stop):
                copies.append(partial(read, reader.copy, start, stop))
            else:
                reads.append(partial(read, reader.read, start, stop))
        if reader.is_past_cache:
            spread([*reads, *copies])
            return
        spread(copies)
        for part in reads:  # the system reads ahead of one reader, and not of several
            spread([part])
